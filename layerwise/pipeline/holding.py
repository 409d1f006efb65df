"""Holding a run while a command works on it; a command that fails before it did anything leaves no trace.

The traces are the run's folder with its notes, and which run was used last.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from layerwise.files.run_files import FOLDERS, LOCK, RECORDS
from layerwise.files.storage import JSON_BYTES, read_file, remove_file, write_file
from layerwise.pipeline.run import RUNS, Run, remember_last
from layerwise.pipeline.trust import trust_address
from layerwise.recipe.recipe import Recipe

LAST = RUNS / ".last.json"


@contextmanager
def hold(
    run: Run,
    purpose: str,
    source: str,
    overrides: Sequence[str],
    data_dir: Path | None,
    as_written: Recipe,
    *,
    remember: bool = True,
) -> Iterator[None]:
    """Lock the run, and let it follow this recipe from now on, as `Run.following` takes it.

    Args:
        remember: it becomes the run that was used last.

    Raises:
        RunLocked: another process holds it.
    """
    folder = run.folder
    missing = [path for path in (folder, *folder.parents, RUNS) if not path.exists()]
    unlocked = not os.path.lexists(folder / LOCK)
    with run.locked(purpose):  # until it is held, another command may have made the run
        last = read_file(LAST, JSON_BYTES)
        absent = [folder / name for name in RECORDS if not os.path.lexists(folder / name)]
        if unlocked and len(absent) == len(RECORDS):
            absent.append(folder / LOCK)
        before = _work(folder)
        trust_address(run.recipe.cache.url)
        try:
            with run.following(source, overrides, data_dir, as_written):
                if remember:
                    remember_last(folder)
                yield
        except BaseException:
            if _work(folder) == before:
                if remember:
                    _restore(LAST, last)
                for note in absent:  # the lock too, while it is held: what waits for it sees that it is gone
                    remove_file(note)
                for path in sorted(missing, key=lambda path: len(path.parts), reverse=True):
                    with suppress(OSError):  # not empty
                        path.rmdir()
            raise


def _work(folder: Path) -> dict[Path, int]:
    """Each file and folder of the run's work, down to those of a stage or cache, with when it last changed."""
    found = {}
    for path in (path for name in FOLDERS for pattern in ("*", "*/*") for path in (folder / name).glob(pattern)):
        with suppress(FileNotFoundError):
            found[path] = path.lstat().st_mtime_ns
    return found


def _restore(path: Path, content: bytes | None) -> None:
    if content is None:
        remove_file(path)
    else:
        write_file(path, content)
