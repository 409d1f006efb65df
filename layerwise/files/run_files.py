"""The files of a run: their names, whether a folder is a run of ours, and what a killed command left in one.

A run may lie in a folder that holds files of the user too. Nothing is written over or removed there but files of these
names, and only where a sealed record proves that the folder is a run.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from activation_cache.store.files import open_regular
from layerwise.errors import DamagedData, RunLocked, UsageError
from layerwise.files.metrics import METRICS
from layerwise.files.storage import JSON_BYTES, raise_misplaced, read_file, read_json, temporary_of

RECORDS = ("run.json", "recipe.json", "dataset.json", "expected.json")
FOLDERS = ("stages", "caches", "probes", "report")
LOCK = "lock"
CURVES = "curves"
"""What trackers wrote, such as TensorBoard: nothing reads it but they."""
HOLDER = re.compile(r"process \d+ \([^()\n]{1,80}\)")
"""What a lock says of the process that holds it, or that was killed while it did."""

STAGE_FOLDER = re.compile(r"\d{1,5}(-\d{1,5})?")
"""The folder of a module, or of modules that are trained together."""
TENSORS = re.compile(r"checkpoint-\d+-\d+\.safetensors")
"""Those of a checkpoint."""
PLACE_FILE = "place.json"
"""Where caches lie that do not lie in the run."""
CACHE = re.compile(r"\d{1,5}(-window)?")
SLOT = re.compile(r"slot-\d{6,12}")
"""The folder of a slot of a rolling window."""
PICTURE = re.compile(r"[a-z]+\.png")

IN_STAGE = ("stage.json", "module.safetensors", "checkpoint.json", METRICS)
PAGE, MANIFEST = "report.html", "manifest.json"


def _in_run(name: str) -> bool:
    return name in RECORDS or name == PLACE_FILE


def _in_stage(name: str) -> bool:
    return name in IN_STAGE or TENSORS.fullmatch(name) is not None


def _in_caches(name: str) -> bool:
    return re.fullmatch(r"\d{1,5}\.window\.json", name) is not None


def _in_probes(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_-]+\.json", name) is not None


def _in_report(name: str) -> bool:
    return name in (PAGE, MANIFEST) or PICTURE.fullmatch(name) is not None


def folders_of(run: Path) -> Iterator[tuple[Path, Callable[[str], bool]]]:
    """Each folder of a run that we write files to, but for caches, and which names in it are ours.

    Raises:
        DamagedData: a link, or a file, lies in the place of one of them.
    """
    yield run, _in_run
    for name, ours in (("caches", _in_caches), ("probes", _in_probes), ("report", _in_report)):
        if is_folder(run / name):
            yield run / name, ours
    for stage in subfolders(run / "stages", STAGE_FOLDER):
        yield stage, _in_stage


def subfolders(folder: Path, names: re.Pattern[str]) -> list[Path]:
    """Those of these names, sorted; none where `folder` is not there.

    Raises:
        DamagedData: a link, or a file, lies in the place of one of them.
    """
    if not is_folder(folder):
        return []
    return [folder / name for name in sorted(os.listdir(folder)) if names.fullmatch(name) and is_folder(folder / name)]


def is_folder(path: Path) -> bool:
    """Whether the folder is there.

    Raises:
        DamagedData: a link, or a file, lies in its place.
    """
    if not os.path.lexists(path):
        return False
    if path.is_symlink() or not path.is_dir():
        kind = "a link, and layerwise follows no links inside a run" if path.is_symlink() else "no folder"
        elsewhere = ", and keep caches elsewhere with --cache-url file:///PATH" if path.name == "caches" else ""
        raise DamagedData(f"{path} is {kind}. Put a folder in its place{elsewhere}.")
    return True


def is_run(folder: Path) -> bool:
    """Whether a record of ours lies there whose seal holds."""
    records = [folder / name for name in RECORDS]
    with suppress(DamagedData):
        for stage in subfolders(folder / "stages", STAGE_FOLDER):
            records += [stage / "stage.json", stage / "checkpoint.json"]
    return any(is_sealed(path) for path in records)


def is_sealed(path: Path, limit: int = JSON_BYTES) -> bool:
    """Whether the file is a record of ours, of at most `limit` bytes, as it was written."""
    with suppress(DamagedData, OSError):
        return read_json(path, limit) is not None
    return False


def require_usable(run: Path) -> None:
    """Make sure that all of a run can be written below `run`, which need not exist, without touching what is the
    user's.

    Raises:
        UsageError: the folder is no run, and something in it has a name that a run needs.
        DamagedData: a link or a file lies in the place of a folder of the run.
    """
    if not is_run(run):
        taken = [run / name for name in (*RECORDS, *FOLDERS) if _holds_something(run / name)]
        if taken:
            raise UsageError(
                f"{run} is not a run, and layerwise would overwrite existing files: "
                f"{', '.join(map(str, taken))}. Choose another --run-dir, or move what is there."
            )
    for _ in folders_of(run):
        pass
    subfolders(run / "caches", CACHE)


def _holds_something(path: Path) -> bool:
    real_folder = path.is_dir() and not path.is_symlink()
    return any(path.iterdir()) if real_folder else os.path.lexists(path)


@contextmanager
def lock(run: Path, purpose: str) -> Iterator[None]:
    """Hold the run while the block runs. The lock dies with the process.

    Raises:
        RunLocked: another process holds it; the message says which and for what.
        UsageError: the file in the lock's place is not ours.
        DamagedData: a link, a folder or a pipe lies in its place.
    """
    path = run / LOCK
    try:
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise_misplaced(path, error)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = not _lies_at(descriptor, path)  # a command that did nothing removes its lock
        except BlockingIOError:
            held = True
        said = os.read(descriptor, 200).decode(errors="replace").strip()
        ours = HOLDER.fullmatch(said) is not None
        if held:
            holder = said if ours else "another process"
            raise RunLocked(f"{run} is in use by {holder}. Wait for it, or choose another --run-dir.")
        if said and not ours:
            raise UsageError(
                f"{path} was not written by layerwise, which needs a file of this name: choose another --run-dir, or "
                f"move it: mv {shlex.quote(str(path))} {shlex.quote(str(path) + '.mine')}"
            )
        os.ftruncate(descriptor, 0)
        with suppress(OSError):  # on a full disk the lock holds without its holder's name
            os.pwrite(descriptor, f"process {os.getpid()} ({purpose})".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _lies_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def sweep(run: Path) -> None:
    """Remove the temporary files of a command that was killed while it wrote; for the holder of the run alone."""
    for folder, ours in folders_of(run):
        for name in os.listdir(folder):
            target = temporary_of(name)
            if target is not None and ours(target) and not (folder / name).is_dir():
                (folder / name).unlink()


MARK = b'<meta name="generator" content="layerwise">'
"""In the first kilobyte of a page of ours."""


def require_own_report(folder: Path) -> None:
    """
    Raises:
        UsageError: a page or a picture of the user lies where the report would be written.
        DamagedData: a link or a file lies in the folder's place.
    """
    there = [name for name in os.listdir(folder) if _in_report(name)] if is_folder(folder) else []
    if not there or is_sealed(folder / MANIFEST):
        return
    with suppress(DamagedData):
        if MARK in (read_file(folder / PAGE) or b"")[:1024]:
            return
    raise UsageError(
        f"{folder} holds {', '.join(sorted(there))}, which layerwise did not write and would overwrite. Move them: "
        f"mv {shlex.quote(str(folder))} {shlex.quote(str(folder) + '.mine')}"
    )
