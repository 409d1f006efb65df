"""How the work goes: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from layerwise.progress import Progress

LOG_EVERY = 10.0  # seconds between lines where there is no terminal


@contextmanager
def console_progress(stream: IO[str]) -> Iterator[Progress]:
    """A bar where `stream` is a terminal, log lines where it is not."""
    console = Console(file=stream, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        yield _Bars(bar)


class _Work:
    """What both kinds know of the piece of work under way."""

    def __init__(self) -> None:
        self.title, self.unit = "", ""
        self.total, self.done, self.samples = 0, 0, 0
        self.began = 0.0

    def start(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit, self.done, self.samples, self.began = (
            title,
            total,
            unit,
            0,
            0,
            time.monotonic(),
        )

    def rate(self) -> str:
        seconds = time.monotonic() - self.began
        return f"{self.samples / seconds:,.0f} samples/s" if self.samples and seconds > 0 else ""


def epoch_line(numbers: Sequence[int], record: Mapping[str, Any]) -> str:
    pairs = zip(numbers, record["loss"], record["validation_loss"], strict=True)
    losses = "  ".join(
        f"module {number}: loss {loss:.4f}, validation {validation:.4f}" for number, loss, validation in pairs
    )
    return f"epoch {record['epoch']:>3}  {losses}  ({record['seconds']:.1f} s)"


class _Bars:
    def __init__(self, bar: Bar) -> None:
        self._bar, self._work = bar, _Work()
        self._task = bar.add_task("", total=None, visible=False, detail="")

    def note(self, text: str) -> None:
        self._bar.console.print(text)

    def begin(self, title: str, total: int, unit: str) -> None:
        self._work.start(title, total, unit)
        self._bar.reset(self._task, description=title, total=total, visible=True, detail="")

    def advance(self, amount: int, samples: int, detail: str) -> None:
        self._work.samples += samples
        self._bar.update(self._task, advance=amount, detail=f"{detail}  {self._work.rate()}")

    def epoch(self, numbers: Sequence[int], record: Mapping[str, Any]) -> None:
        self._bar.console.print(epoch_line(numbers, record))

    def end(self) -> None:
        self._bar.update(self._task, visible=False)


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console, self._work = console, _Work()
        self._last = 0.0

    def note(self, text: str) -> None:
        self._console.print(text)

    def begin(self, title: str, total: int, unit: str) -> None:
        self._work.start(title, total, unit)
        self._last = time.monotonic()
        self._console.print(f"{title}: up to {total:,} {unit}" if unit == "updates" else f"{title}: {total:,} {unit}")

    def advance(self, amount: int, samples: int, detail: str) -> None:
        self._work.done += amount
        self._work.samples += samples
        now = time.monotonic()
        if now - self._last >= LOG_EVERY:
            self._last = now
            left = (now - self._work.began) / self._work.done * (self._work.total - self._work.done)
            self._console.print(
                f"{self._work.title}: {self._work.done:,} of {self._work.total:,} {self._work.unit}  "
                f"{detail}  {self._work.rate()}  {left:,.0f} s left"
            )

    def epoch(self, numbers: Sequence[int], record: Mapping[str, Any]) -> None:
        self._console.print(epoch_line(numbers, record))

    def end(self) -> None: ...
