"""Opening files that somebody else may have put there: regular files only, no links followed, nothing that can hang."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
"""A stretch of memory."""


class NotARegularFile(OSError):
    """A link, a folder, a pipe or a device lies where a file of ours belongs; `filename` names it."""


def open_regular(path: str | Path, flags: int, mode: int = 0o666) -> int:
    """A descriptor of the regular file at `path`, opened with `flags` (as of os.open), for the caller to close.

    A link is not followed and a pipe is not waited for. Truncation (O_TRUNC) happens only once the file is known to be
    a regular one. Raises FileNotFoundError, NotARegularFile, or what the system says otherwise.
    """
    try:
        descriptor = os.open(
            path, (flags & ~os.O_TRUNC) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, mode
        )
    except OSError as error:
        # ELOOP: a link. ENXIO: a pipe without a reader, or a socket. EISDIR: a folder opened for writing.
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _not_regular(path) from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _not_regular(path)
        if flags & os.O_TRUNC:
            os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(path: str | Path, limit: int | None = None) -> bytes:
    """The content of the regular file at `path`.

    Raises FileNotFoundError, NotARegularFile, or OSError (EFBIG) where it has more than `limit` bytes.
    """
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        if limit is not None and (size := os.fstat(file.fileno()).st_size) > limit:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than the {limit:,} that are read", str(path))
        return file.read()


def require_real_folders(root: str | Path, path: str) -> None:
    """Make sure that no folder between `root` and the relative `path` is a link, which would lead somewhere else.

    `root` itself may be one: it is what the user named. Raises NotARegularFile.
    """
    folder = str(root)
    for part in Path(path).parts[:-1]:
        folder = os.path.join(folder, part)
        if os.path.islink(folder):
            raise _not_regular(folder)


def _not_regular(path: str | Path) -> NotARegularFile:
    kind = "is a link" if os.path.islink(path) else "is a folder" if os.path.isdir(path) else "is no regular file"
    return NotARegularFile(errno.ELOOP if os.path.islink(path) else errno.EINVAL, kind, str(path))
