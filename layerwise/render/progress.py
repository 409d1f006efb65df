"""How the work goes: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from layerwise.progress import RESUMED, Progress, Step
from layerwise.render.units import duration, size
from layerwise.render.words import terminal_width, wrapped
from layerwise.settings.units import counted

LOG_EVERY = 10.0  # seconds between lines where there is no terminal


@contextmanager
def console_progress(stream: IO[str]) -> Iterator[Progress]:
    """A bar where `stream` is a terminal, log lines where it is not."""
    console = Console(file=stream, highlight=False, markup=False, soft_wrap=True, width=terminal_width(stream))
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}", markup=False),
        TextColumn("{task.fields[detail]}", markup=False),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        yield _Bars(bar)


class _Work:
    """What both kinds know of the piece of work under way."""

    def __init__(self, title: str = "", total: int = 0, unit: str = "") -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self.samples = 0
        self.resumed: int | None = None
        """Units that an earlier sitting did; None until the first report."""
        self.began = time.monotonic()

    def advance(self, amount: int, samples: int) -> bool:
        """Whether this only told what an earlier sitting had done, as a first report without samples does."""
        self.done, self.samples = self.done + amount, self.samples + samples
        earlier = self.resumed is None and samples == 0
        if self.resumed is None:
            self.resumed = amount if earlier else 0
        return earlier

    def amount(self) -> str:
        if self.unit == "bytes":
            return f"{size(self.done)} of {size(self.total)}"
        return f"{self.done:,} of {counted(self.total, self.unit.removesuffix('s'))}"

    def rate(self) -> str:
        seconds, now = time.monotonic() - self.began, self.done - (self.resumed or 0)
        if seconds <= 0 or now <= 0:
            return ""
        if self.unit == "bytes":
            return f"{size(now / seconds)}/s"
        speed = self.samples / seconds
        return f"{speed:,.0f} samples/s" if speed >= 10 else f"{speed:.1f} samples/s" if self.samples else ""

    def left(self) -> str:
        now, rest = self.done - (self.resumed or 0), self.total - self.done
        seconds = time.monotonic() - self.began
        return f"{duration(seconds / now * rest)} left" if now > 0 and rest > 0 else ""


def epoch_line(numbers: Sequence[int], record: Mapping[str, Any]) -> str:
    pairs = zip(numbers, record["loss"], record["validation_loss"], strict=True)
    losses = "  ".join(
        f"module {number}: loss {loss:.4f}, validation {validation:.4f}" for number, loss, validation in pairs
    )
    return f"epoch {record['epoch']:>3}  {losses}  ({duration(record['seconds'])})"


class _Bars:
    def __init__(self, bar: Bar) -> None:
        self._bar, self._work = bar, _Work()
        self._task = bar.add_task("", total=None, visible=False, amount="", detail="")

    def note(self, text: str) -> None:
        self._bar.console.print(wrapped(text, self._bar.console.width))

    def begin(self, title: str, total: int, unit: str) -> None:
        self._work = _Work(title, total, unit)
        self._bar.reset(self._task, description=title, total=total, visible=True, amount=self._work.amount(), detail="")

    def advance(self, amount: int, samples: int, detail: str) -> None:
        work = self._work
        if work.advance(amount, samples):
            self._bar.reset(self._task, completed=work.done)  # not to be taken for speed
        shown = "  ".join(part for part in (detail, work.rate()) if part)
        self._bar.update(self._task, completed=work.done, amount=work.amount(), detail=shown)

    def training(self, modules: Sequence[int], step: int, whole: int) -> None:
        if step:
            self.advance(step, 0, RESUMED)

    def step(self, done: Step) -> None:
        self.advance(1, done.samples, done.told())

    def flush(self) -> None: ...

    def measured(self, of: str, number: int, values: Mapping[str, float]) -> None: ...

    def picture(self, name: str, png: bytes) -> None: ...

    def epoch(self, numbers: Sequence[int], record: Mapping[str, Any]) -> None:
        self.note(epoch_line(numbers, record))

    def end(self) -> None:
        self._bar.update(self._task, visible=False)


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console, self._work = console, _Work()
        self._last = 0.0

    def note(self, text: str) -> None:
        self._console.print(wrapped(text, terminal_width(self._console.file)))

    def begin(self, title: str, total: int, unit: str) -> None:
        self._work = _Work(title, total, unit)
        self._last = time.monotonic()
        amount = size(total) if unit == "bytes" else counted(total, unit.removesuffix("s"))
        self._console.print(f"{title}: {'up to ' if unit == 'updates' else ''}{amount}")

    def advance(self, amount: int, samples: int, detail: str) -> None:
        work, now = self._work, time.monotonic()
        work.advance(amount, samples)
        if now - self._last >= LOG_EVERY:
            self._last = now
            parts = (f"{work.title}: {work.amount()}", detail, work.rate(), work.left())
            self._console.print("  ".join(part for part in parts if part))

    def training(self, modules: Sequence[int], step: int, whole: int) -> None:
        if step:
            self.advance(step, 0, RESUMED)

    def step(self, done: Step) -> None:
        self.advance(1, done.samples, done.told())

    def flush(self) -> None: ...

    def measured(self, of: str, number: int, values: Mapping[str, float]) -> None: ...

    def picture(self, name: str, png: bytes) -> None: ...

    def epoch(self, numbers: Sequence[int], record: Mapping[str, Any]) -> None:
        self.note(epoch_line(numbers, record))

    def end(self) -> None: ...
