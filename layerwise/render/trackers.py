"""Curves of a run in TensorBoard, Weights & Biases or Trackio.

A training has two logs, `module-1-train` by update and `module-1-validation` by epoch, whose losses have one name, so
that both curves are in one chart; probes, peaks of memory and pictures have logs of their own. A training that was
killed and resumed continues in its logs: each update stands there once, with the numbers that the run kept.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from activation_cache.store.files import open_regular
from layerwise.errors import NotReady, in_one_line
from layerwise.files.run_files import CURVES, is_folder
from layerwise.files.storage import read_file, write_file
from layerwise.progress import Progress, Step
from layerwise.settings.choices import TrackerName

EVENTS = re.compile(r"events\.out\.tfevents\.(\d{10})\.")
PAGE = os.sysconf("SC_PAGE_SIZE")  # bytes
SEND_EVERY = 2.0  # seconds between sendings, so that a step costs an append
Row = tuple[int, Mapping[str, float]]
"""A step, and its numbers by name."""


class Tracker(Protocol):
    """A log that somebody else's tool shows."""

    def scalars(self, rows: Sequence[Row]) -> None:
        """Add these rows, whose steps rise; once this returns they outlast a kill."""

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Add a picture."""

    def close(self) -> None:
        """Send what is left."""


Opener = Callable[[str, int], Tracker]
"""From the name of a log, and the step behind which it goes on, to the log."""


@contextmanager
def tracked(progress: Progress, kind: TrackerName | None, run: Path) -> Iterator[Progress]:
    """The same progress, which writes to a tracker too; itself where `kind` is None.

    Raises:
        NotReady: the tracker's package cannot be imported.
        DamagedData: a link, or a file, lies in the place of the folder of curves.
    """
    if kind is None:
        yield progress
        return
    library = _imported(kind)
    is_folder(run / CURVES)
    openers: dict[str, Callable[[str, int], Tracker]] = {
        "tensorboard": lambda log, step: TensorBoard(run / CURVES / log, step),
        "wandb": lambda log, step: WandB(library, run, log, step),
        "trackio": lambda log, step: Trackio(library, run, log, step),
    }
    found = Tracked(progress, openers[kind])
    try:
        yield found
    finally:
        found.close()


def _imported(kind: TrackerName) -> Any:
    try:
        return import_module("tensorboard.summary.writer.record_writer" if kind == "tensorboard" else kind)
    except ImportError as error:
        raise NotReady(
            f"--track {kind} needs the package {kind}, which cannot be imported here ({in_one_line(error)}). Install "
            f"the extra: pip install 'layerwise[{kind}]'"
        ) from error


class Tracked:
    """Tells another progress, and a tracker. A tracker that fails ends the tracking, not the training."""

    def __init__(self, progress: Progress, opener: Opener) -> None:
        self._progress, self._open = progress, opener
        self._train: Tracker = Nowhere()
        self._validation: Tracker = Nowhere()
        self._rows: list[Row] = []
        self._sent = time.monotonic()
        self._last: float | None = None
        """When the step before ended, where the time since then was spent on the next."""

    def note(self, text: str) -> None:
        self._progress.note(text)

    def begin(self, title: str, total: int, unit: str) -> None:
        self._progress.begin(title, total, unit)

    def advance(self, amount: int, samples: int, detail: str) -> None:
        self._progress.advance(amount, samples, detail)

    def training(self, modules: Sequence[int], step: int, whole: int) -> None:
        self._progress.training(modules, step, whole)
        self.close()
        name = f"module-{modules[0]}" if len(modules) == 1 else f"modules-{modules[0]}-{modules[-1]}"
        with self._trying():
            self._train = self._open(f"{name}-train", step)
            self._validation = self._open(f"{name}-validation", whole)
        self._last = None

    def step(self, done: Step) -> None:
        self._progress.step(done)
        now = time.monotonic()
        row = {f"loss/module {number}": loss for number, loss in zip(done.modules, done.losses, strict=True)}
        if self._last is not None:
            row["throughput/samples per second"] = done.samples / max(now - self._last, 1e-9)
        row |= _memory()
        self._last = now
        self._rows.append((done.step, row))
        if now - self._sent >= SEND_EVERY:
            self._send()

    def flush(self) -> None:
        self._progress.flush()
        self._send()

    def epoch(self, numbers: Sequence[int], record: Mapping[str, Any]) -> None:
        self._progress.epoch(numbers, record)
        row: dict[str, float] = {"epoch": record["epoch"]}
        for number, mean, validation in zip(numbers, record["loss"], record["validation_loss"], strict=True):
            row[f"mean training loss/module {number}"] = mean
            row[f"loss/module {number}"] = validation
        with self._trying():
            self._validation.scalars([(record["step"], row)])
        self._last = None  # validation took time

    def measured(self, of: str, number: int, values: Mapping[str, float]) -> None:
        self._progress.measured(of, number, values)
        with self._trying():
            tracker = self._open(f"{of}-{number}", 0)
            tracker.scalars([(number, {f"{of}/{name}": value for name, value in values.items()})])
            tracker.close()

    def picture(self, name: str, png: bytes) -> None:
        self._progress.picture(name, png)
        with self._trying():
            tracker = self._open(f"picture-{name}", 0)
            tracker.picture(1, name, png)
            tracker.close()

    def end(self) -> None:
        self._progress.end()
        self.close()

    def close(self) -> None:
        """Send what is left, and end the logs of the training under way."""
        self._send()
        with self._trying():
            self._train.close()
            self._validation.close()
        self._train, self._validation = Nowhere(), Nowhere()

    def _send(self) -> None:
        rows, self._rows, self._sent = self._rows, [], time.monotonic()
        if rows:
            with self._trying():
                self._train.scalars(rows)

    @contextmanager
    def _trying(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of somebody else's package, a server, a full disk
            self._train, self._validation, self._open = Nowhere(), Nowhere(), lambda log, step: Nowhere()
            self._progress.note(f"tracking ends here, and the work goes on without it: {in_one_line(error)}")


class Nowhere:
    """The log of nobody."""

    def scalars(self, rows: Sequence[Row]) -> None: ...

    def picture(self, step: int, name: str, png: bytes) -> None: ...

    def close(self) -> None: ...


def _memory() -> dict[str, float]:
    """Bytes that this process holds now: in tensors on the GPU, else of the machine's memory."""
    if torch.cuda.is_initialized():
        return {"memory/bytes in tensors at most": float(torch.cuda.max_memory_allocated())}
    try:
        with open("/proc/self/statm", "rb") as file:
            return {"memory/bytes of the process": float(int(file.read().split()[1]) * PAGE)}
    except OSError:  # no such file system
        return {}


class TensorBoard:
    """An event file in a folder of its own. What the folder has already of later steps is taken back, by the entry that
    TensorBoard writes for a restarted session.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        if not is_folder(folder):
            folder.mkdir(parents=True)
        # Readers go by the names of the files: a session resumed within the same second comes after the one before.
        earlier = (EVENTS.match(name) for name in os.listdir(folder))
        stamp = max([int(time.time()), *(int(found[1]) + 1 for found in earlier if found)])
        self._file = open_new(folder / f"events.out.tfevents.{stamp:010d}.layerwise")
        self._writer = RecordWriter(self._file)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._add(Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, rows: Sequence[Row]) -> None:
        now = time.time()
        for step, values in rows:
            numbers = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            self._add(self._event(wall_time=now, step=step, summary=self._summary(value=numbers)))
        self._file.flush()

    def picture(self, step: int, name: str, png: bytes) -> None:
        from PIL import Image

        with Image.open(io.BytesIO(png)) as image:
            width, height = image.size
        encoded = self._summary.Image(encoded_image_string=png, colorspace=3, width=width, height=height)
        value = self._summary.Value(tag=name, image=encoded)
        self._add(self._event(wall_time=time.time(), step=step, summary=self._summary(value=[value])))

    def close(self) -> None:
        self._file.close()

    def _add(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())


def open_new(path: Path) -> IO[bytes]:
    """A file that is not there yet, to be written."""
    return open(open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb")


class WandB:
    """A run of Weights & Biases for each log, grouped by the run directory. It ignores steps that it has already, and a
    resumed training gives the same numbers for them. A training that begins anew has a new run.
    """

    def __init__(self, library: Any, run: Path, log: str, step: int) -> None:
        self._library = library
        settings = library.Settings(silent=True, console="off")
        self._run = library.init(
            project="layerwise",
            group=run.resolve().name,
            name=log,
            id=_identity(run / CURVES / f"{log}.wandb-id", step),
            resume="allow",
            dir=str(run / CURVES),
            reinit="create_new",
            settings=settings,
        )

    def scalars(self, rows: Sequence[Row]) -> None:
        for step, values in rows:
            self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, png: bytes) -> None:
        from PIL import Image

        self._run.log({name: self._library.Image(Image.open(io.BytesIO(png)))}, step=step)

    def close(self) -> None:
        self._run.finish()


def _identity(path: Path, step: int) -> str:
    """A new one for a training that begins, and the one in the file for one that goes on."""
    known = read_file(path, 100) if step else None
    found = secrets.token_hex(8) if known is None else known.decode(errors="replace")
    write_file(path, found.encode())
    return found


class Trackio:
    """A run of Trackio for each log, in a project of the run directory's name. Steps that it has already are left out:
    a resumed training gives the same numbers for them. A training that begins anew has a new run.
    """

    def __init__(self, library: Any, run: Path, log: str, step: int) -> None:
        self._library, project = library, run.resolve().name
        with redirect_stdout(io.StringIO()):  # which is for the command's own results
            self._run = library.init(project=project, name=log, group=project, resume="allow" if step else "never")
        library.context_vars.current_run.set(None)  # else the next `init` ends this log
        known = library.SQLiteStorage.get_max_step_for_run(project, log, run_id=self._run.id)
        self._after = -1 if known is None else int(known)

    def scalars(self, rows: Sequence[Row]) -> None:
        for step, values in rows:
            if step > self._after:
                self._run.log(dict(values), step=step)
                self._after = step

    def picture(self, step: int, name: str, png: bytes) -> None:
        from PIL import Image

        if step > self._after:
            self._run.log({name: self._library.Image(Image.open(io.BytesIO(png)))}, step=step)

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._run.finish()
