"""Files that are either whole or absent, and JSON objects that are what their seal says.

A file is written beside its place, flushed to the disk, and renamed over it; the directory is flushed too. So a
reader never meets half a file, and a power cut never leaves one. No link is followed, and only regular files are
opened, since somebody else may have put others there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from activation_cache.store.files import NotARegularFile, open_regular, read_regular
from layerwise.errors import DamagedData, WillNotFit

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk says, or a limit, that can take no more."""

MISPLACED = (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.EIO)
"""What the system says where something else lies in a file's place, or where the disk cannot read it."""

JSON_BYTES = 4 << 20
"""The most that is read of a file of JSON in a run, bytes."""

JSON_DEPTH = 50
"""The most levels of objects and lists in it."""


def read_file(path: Path, limit: int | None = None) -> bytes | None:
    """The content of a regular file of at most `limit` bytes, or None where there is no file.

    Raises:
        DamagedData: something else lies there: a link, a folder, a pipe, or a larger file.
    """
    try:
        return read_regular(path, limit)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise DamagedData(
                f"{path} is damaged: {error.strerror}. Delete it, and the command repeats that part."
            ) from error
        raise_misplaced(path, error)


def file_sha256(path: Path) -> str | None:
    """sha256 of a regular file of any size, or None where there is no file.

    Raises:
        DamagedData: something else lies there.
    """
    try:
        with open(open_regular(path, os.O_RDONLY), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise_misplaced(path, error)


def raise_misplaced(path: Path, error: OSError) -> NoReturn:
    """
    Raises:
        DamagedData: something else lies where the file or folder `path` belongs; the message says what.
        OSError: the error itself, where it is another.
    """
    if not isinstance(error, NotARegularFile) and error.errno not in MISPLACED:
        raise error
    reason = error.strerror if isinstance(error, NotARegularFile) else os.strerror(error.errno or 0)
    raise DamagedData(
        f"{path} is damaged: layerwise keeps a file of its own there, but this one cannot be used ({reason}). "
        "Move it away, and the command repeats that part."
    ) from error


def write_file(path: Path, content: bytes, *, once: bool = False) -> None:
    """Replace the file's content, or leave it as it was; with `once` a file that is there stays, whoever wrote it.

    Raises:
        WillNotFit: the disk is full; the message names the path and the bytes.
        OSError: the disk cannot write.
        DamagedData: a folder lies in the file's place, or a file in its folder's.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if once:
            with suppress(FileExistsError):
                os.link(temporary, path)
            temporary.unlink()
        else:
            temporary.replace(path)
        flush_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise_unwritten(path, len(content), error)


def raise_unwritten(path: Path, size: int, error: OSError) -> NoReturn:
    """Say why `size` bytes could not be written to `path`.

    Raises:
        WillNotFit: the disk is full.
        OSError: the disk cannot write, though it is not full; with the path, which the system leaves out.
        DamagedData: something else lies where the file or its folder belongs.
    """
    if error.errno in FULL:
        raise WillNotFit(
            f"could not write {path} ({size:,} bytes): {os.strerror(error.errno)}. Free some disk space and run the "
            f"same command again; what was saved before is intact."
        ) from error
    if error.errno == errno.EIO:
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    raise_misplaced(path, error)


def temporary_of(name: str) -> str | None:
    """The name of the file that a temporary file of `write_file` was to become; None for any other file."""
    found = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.tmp", name)
    return None if found is None else found[1]


def remove_file(path: Path) -> None:
    """Remove a file, if it is there; of a link, the link alone.

    Raises:
        DamagedData: a folder lies in its place.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        if path.is_dir():  # the system's own answer differs: EISDIR, EPERM
            raise DamagedData(f"{path} is a folder where layerwise keeps a file: move it away.") from error
        raise_misplaced(path, error)


def flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


SEAL = "seal"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON object with its own sha256 beside its fields, so that an altered one is never believed."""
    write_file(path, sealed_json(content))


def sealed_json(content: Mapping[str, Any]) -> bytes:
    """What `write_json` writes."""
    sealed = {**content, SEAL: _seal(content)}
    return (json.dumps(sealed, indent=2, allow_nan=False) + "\n").encode()


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_json(path: Path, limit: int = JSON_BYTES) -> dict[str, Any] | None:
    """The object that `write_json` left in the file, or None where there is no file.

    Raises:
        DamagedData: the file is not what was written.
    """
    raw = read_file(path, limit)
    return None if raw is None else unseal_json(path, raw)


def unseal_json(path: Path, raw: bytes) -> dict[str, Any]:
    """The object whose sealed form is `raw`, the content of the file `path`.

    Raises:
        DamagedData: `raw` is not what was written.
    """
    try:
        content = parse_json(raw)
    except ValueError as error:
        raise DamagedData(
            f"{path} is damaged: it should hold a JSON object ({error}). Delete it, and the command repeats that part."
        ) from error
    if not isinstance(content, dict):
        raise DamagedData(
            f"{path} is damaged: it should hold a JSON object and holds a {type(content).__name__}. Delete it, and "
            f"the command repeats that part."
        )
    if content.pop(SEAL, None) != _seal(content):
        raise DamagedData(
            f"{path} is damaged: its fields differ from those that were written. Delete it, and the command repeats "
            f"that part."
        )
    return content


def parse_json(raw: bytes) -> Any:
    """The value of a JSON text whose numbers are all finite.

    Raises:
        ValueError: it is none, or is nested too deeply.
    """
    try:
        value = json.loads(raw, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(JSON_DEPTH):
        level = [inner for outer in level for inner in _members(outer)]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def _members(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value
