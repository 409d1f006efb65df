"""The byte layer: whole files in, whole files or maps of them out. Everything above it is the same for any store."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from .disk import free_bytes
from .errors import DoesNotFit, Locked
from .shard import Bytes

TEMPORARY = ".tmp"  # how the names of files end that are not whole yet
_VECTOR = 1024  # buffers in one writev
# Bytes of one writev. For larger ones Linux looks for pages of 2 MB, which virtual machines have often given back to
# their host: on one, getting them again made writing five times slower.
_PIECE = 256 << 10


class Store(Protocol):
    """Where a cache's files lie. Paths are relative, with `/`. A file is seen whole or not at all."""

    @property
    def location(self) -> str:
        """For messages."""
        ...

    def size(self, path: str) -> int | None:
        """A file's bytes, or None where there is none."""
        ...

    def read(self, path: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        ...

    def local(self, path: str, version: str = "") -> Path:
        """A file on a local disk with the content of `path`, to be mapped. Raises FileNotFoundError.

        A store that copies may return an earlier copy that it made of the same `version`.
        """
        ...

    @property
    def limit(self) -> int | None:
        """Bytes of files that `local` may keep; None where it does not copy them, or keeps them all."""
        ...

    def forget(self, path: str, version: str = "") -> None:
        """The copy that `local` made is not needed any more, or not to be trusted."""
        ...

    def write(self, path: str, parts: Sequence[Bytes | bytes]) -> None:
        """Puts a whole file there durably, replacing one atomically. Raises DoesNotFit."""
        ...

    def begin(self, path: str, parts: Sequence[Bytes | bytes]) -> Callable[[], None]:
        """`write` in two halves: as much of it as the processor does, and in the call that is returned the wait for
        the disk or the network, after which the file is there. `parts` must not change before that is over.
        """
        ...

    def create(self, path: str, data: bytes) -> bool:
        """As write, but only where there is no such file; False where there is."""
        ...

    def delete(self, path: str) -> None:
        """Removes a file if it is there."""
        ...

    def clear(self) -> None:
        """Removes what is left of a place whose files were deleted: empty folders."""
        ...

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(path, bytes) of each file below a folder, in any order."""
        ...

    def free(self) -> int | None:
        """Bytes that can still be written, or None where there is no such limit."""
        ...

    def lock(self, rank: int, world_size: int) -> Callable[[], None]:
        """Takes the writer's lock and returns what releases it. Raises Locked."""
        ...


class LocalStore:
    """A directory on a local disk. Picklable: it holds nothing but its path."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()

    @property
    def location(self) -> str:
        return str(self.root)

    def size(self, path: str) -> int | None:
        try:
            return os.stat(self.root / path).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def local(self, path: str, version: str = "") -> Path:
        if not (self.root / path).is_file():
            raise FileNotFoundError(self.root / path)
        return self.root / path

    limit = None

    def forget(self, path: str, version: str = "") -> None:
        """Nothing: `local` made no copy."""

    def write(self, path: str, parts: Sequence[Bytes | bytes]) -> None:
        self.begin(path, parts)()

    def begin(self, path: str, parts: Sequence[Bytes | bytes]) -> Callable[[], None]:
        return self._put(path, parts, _replace)

    def create(self, path: str, data: bytes) -> bool:
        try:
            self._put(path, [data], os.link)()  # unlike a rename, a link fails where the name is taken
        except FileExistsError:
            return False
        return True

    def _put(
        self, path: str, parts: Sequence[Bytes | bytes], publish: Callable[[Path, Path], None]
    ) -> Callable[[], None]:
        target = self.root / path
        temporary = target.with_name(f"{target.name}.{os.getpid()}{TEMPORARY}")
        needed = sum(map(len, parts))
        with self._tidy(target, temporary, needed):
            new_folders = _make_folders(target.parent)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                _write_all(descriptor, parts)
            except BaseException:
                os.close(descriptor)
                raise

        def finish() -> None:
            with self._tidy(target, temporary, needed):
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                publish(temporary, target)
                temporary.unlink(missing_ok=True)  # still there after a link
                for folder in (target.parent, *new_folders):
                    _sync_folder(folder)

        return finish

    @contextmanager
    def _tidy(self, target: Path, temporary: Path, needed: int) -> Iterator[None]:
        """Where writing fails, nothing half-written stays, and a full disk is called by its name."""
        try:
            yield
        except BaseException as error:
            with suppress(OSError):
                temporary.unlink()
            if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            free = self.free()
            raise DoesNotFit(
                f"writing {target} ({needed:,} bytes) failed: {os.strerror(error.errno)} ({free:,} bytes free). "
                "Make room, or give the cache another place or a smaller budget; what was written so far is kept.",
                str(target),
                needed,
                free,
            ) from error

    def delete(self, path: str) -> None:
        try:
            (self.root / path).unlink(missing_ok=True)
        except IsADirectoryError:  # damage: a folder where a file of ours belongs
            shutil.rmtree(self.root / path)

    def clear(self) -> None:
        for folder, _, _ in os.walk(self.root, topdown=False):
            with suppress(OSError):  # not empty
                os.rmdir(folder)

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        for folder, _, names in os.walk(self.root / prefix):
            for name in names:
                path = Path(folder, name)
                try:
                    size = path.stat().st_size
                except FileNotFoundError:  # a writer renamed or removed it meanwhile; or a dangling link
                    continue
                yield path.relative_to(self.root).as_posix(), size

    def free(self) -> int:
        return free_bytes(self.root)

    def lock(self, rank: int, world_size: int) -> Callable[[], None]:
        """A lone writer excludes all; the ranks of one group share, and each excludes another of its own number."""
        _make_folders(self.root / "record")
        held: list[int] = []
        try:
            _take(self.root / "record/lock", fcntl.LOCK_SH if world_size > 1 else fcntl.LOCK_EX, held)
            if world_size > 1:
                _take(self.root / f"record/lock-{rank}-of-{world_size}", fcntl.LOCK_EX, held)
        except BaseException:
            _release(held)
            raise
        return lambda: _release(held)


def _take(path: Path, kind: int, held: list[int]) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 4096).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise Locked(
            f"{path.parent.parent} is being written by {holder}; wait for it, or end it and try again", holder
        ) from error
    held.append(descriptor)
    if kind == fcntl.LOCK_EX:  # those who share the lock would write over each other's name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": os.uname().nodename}).encode(), 0)


def _release(held: list[int]) -> None:
    while held:
        descriptor = held.pop()
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may still hold the descriptor open
        os.close(descriptor)


def _write_all(descriptor: int, parts: Sequence[Bytes | bytes]) -> None:
    group: list[memoryview] = []
    room = _PIECE
    for part in parts:
        left = memoryview(part) if isinstance(part, bytes) else part.data
        while left:
            piece, left = left[:room], left[room:]
            group.append(piece)
            room -= len(piece)
            if room == 0 or len(group) == _VECTOR:
                _write(descriptor, group)
                group, room = [], room or _PIECE
    _write(descriptor, group)


def _write(descriptor: int, group: list[memoryview]) -> None:
    left = sum(map(len, group)) - os.writev(descriptor, group)
    if left:  # the call was cut short: a signal, or a full disk
        rest = memoryview(b"".join(group))[-left:]
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def _replace(temporary: Path, target: Path) -> None:
    try:
        os.replace(temporary, target)
    except IsADirectoryError:  # damage, as in `delete`
        shutil.rmtree(target)
        os.replace(temporary, target)


def _make_folders(folder: Path) -> list[Path]:
    """Makes a folder with its parents; returns the folders that gained an entry, to be synced."""
    if folder.is_dir():
        return []
    above = _make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    return [*above, folder.parent]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_store(location: str | Path | Store) -> Store:
    """The store at a location: a directory, a URL (file://, s3://, gs://, az://), or one that was made already."""
    if not isinstance(location, str | Path):
        return location
    scheme, found, rest = str(location).partition("://")
    if not found:
        return LocalStore(location)
    if scheme == "file":
        return LocalStore(rest)
    from .remote import RemoteStore

    return RemoteStore(str(location))


def sweep(store: Store) -> None:
    """Removes what a killed writer left half-written."""
    for path, _ in list(store.list()):
        if path.endswith(TEMPORARY):
            store.delete(path)
