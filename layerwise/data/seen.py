"""Looking through the files of a dataset: each is read, hashed and decoded, and not a second time while it stays as it
was.

What was found out is kept in the user's cache, a file for each folder of data and kind of files, for all runs. Its
content hash is what identifies a file; that it still is that content is trusted where path, size, and the times of its
last change that the file system keeps (mtime of the content and ctime of the file, both in nanoseconds) are those of
when it was read. Any write sets ctime, and no program can set it back; so what goes unnoticed is a change in the very
tick of the clock in which the file was looked at, and one beneath the file system (a failing disk). Delete the folder
`seen` of the user's cache to have every file read again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from activation_cache.reading.processors import allowed_processors
from layerwise.errors import DamagedData, WillNotFit
from layerwise.files.storage import read_json, write_json
from layerwise.progress import Progress

READERS = 4
SEEN_BYTES = 1 << 30
"""The most that is read of what is known of a folder of data."""

Facts = dict[str, Any]
"""What is known of a file, as JSON: its `sha256`, and what its kind has besides."""


class Unreadable(Exception):
    """A file that cannot be used, and why."""


def look_through(
    files: Sequence[Path],
    kind: str,
    look: Callable[[bytes], Facts],
    progress: Progress,
    title: str,
    unit: str,
) -> Generator[Facts | Unreadable | OSError, None, None]:
    """What `look` finds in each file, with its sha256, in their order; or why it cannot be used.

    What was found out is kept also if the caller stops in the middle. Unusable files are looked at every time.

    Args:
        kind: names what `look` does; another look at the same files has another name.
        look: from a file's content to what is worth knowing of it; raises Unreadable.
    """
    place = _place(files, kind)
    known = _recall(place)
    fresh: dict[str, Any] = {}

    def facts_of(path: Path) -> Facts | Unreadable | OSError:
        name = str(path.absolute())
        try:
            before = _mark(path)
            if name in known and known[name]["mark"] == before:
                return dict(known[name]["facts"])
            content = path.read_bytes()
            facts = {"sha256": hashlib.sha256(content).hexdigest(), **look(content)}
            if _mark(path) == before:
                fresh[name] = {"mark": before, "facts": facts}
        except (Unreadable, OSError) as error:
            return error
        return facts

    progress.begin(title, len(files), unit)
    pool = ThreadPoolExecutor(min(READERS, allowed_processors()))
    try:
        for found in pool.map(facts_of, files):
            progress.advance(1, 1, "")
            yield found
    finally:
        pool.shutdown(cancel_futures=True)
        progress.end()
        if fresh:
            try:
                write_json(place, {"files": {**known, **fresh}})
            except (OSError, WillNotFit, DamagedData) as error:  # only the time that the next look takes
                progress.note(f"every command will read all of these files again: {error}")


def legible(name: str | os.PathLike[str]) -> str:
    """A file's name in characters that any file and any terminal can hold."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def user_cache() -> Path:
    """Where this user keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerwise"


def _place(files: Sequence[Path], kind: str) -> Path:
    folder = os.path.commonpath([path.absolute().parent for path in files]) if files else ""
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return user_cache() / "seen" / f"{kind}-{digest}.json"


def _recall(place: Path) -> dict[str, Any]:
    try:
        return dict((read_json(place, SEEN_BYTES) or {"files": {}})["files"])
    except (DamagedData, OSError):
        return {}


def _mark(path: Path) -> list[int]:
    """Size in bytes, and when it was changed."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
