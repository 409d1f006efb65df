"""The byte layer in a directory: whole files under their names, regular ones only, no link followed below the root."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from activation_cache.errors import Damaged, DoesNotFit, FormatError, Locked, StoreError

from .disk import free_bytes
from .files import Bytes, NotARegularFile, open_regular, read_regular, require_real_folders

TEMPORARY = re.compile(r"\.activation_cache-\d+-\d+\.tmp")  # names of files that are not whole yet
_number = itertools.count()  # of this process's temporary files
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk says that can take no more, or a limit
_VECTOR = 1024  # buffers in one writev
# Bytes of one writev. For larger ones Linux looks for pages of 2 MB, which virtual machines have often given back to
# their host: on one, getting them again made writing five times slower.
_PIECE = 256 << 10


class LocalStore:
    """A directory on a local disk. Picklable: it holds nothing but its path.

    The root may be a link; what lies below it and is a link, a pipe or a folder in a file's place raises Damaged.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()

    @property
    def location(self) -> str:
        return str(self.root)

    def size(self, path: str) -> int | None:
        try:
            with self._refusing():
                require_real_folders(self.root, path)
                found = os.lstat(self.root / path)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode):
            raise self._strange(path, "is not a regular file")
        return found.st_size

    def read(self, path: str) -> bytes:
        with self._refusing():
            require_real_folders(self.root, path)
            return read_regular(self.root / path)

    def local(self, path: str, version: str = "") -> Path:
        if self.size(path) is None:
            raise FileNotFoundError(self.root / path)
        return self.root / path

    limit = None

    def forget(self, path: str, version: str = "") -> None:
        """Nothing: `local` made no copy."""

    def write(self, path: str, parts: Sequence[Bytes | bytes]) -> None:
        self.begin(path, parts)()

    def begin(self, path: str, parts: Sequence[Bytes | bytes]) -> Callable[[], None]:
        return self._put(path, parts, self._replace)

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
        temporary = target.with_name(f".activation_cache-{os.getpid()}-{next(_number)}.tmp")
        needed = sum(map(len, parts))
        with self._tidy(target, temporary, needed):
            new_folders = self._make_folders(path)
            temporary.unlink(missing_ok=True)  # of a killed process with the same number
            descriptor = open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
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
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(target)  # of a write or a flush the system does not say whose
            if not isinstance(error, OSError) or error.errno not in FULL:
                raise
            free = self.free()
            raise DoesNotFit(
                f"writing {target} ({needed:,} bytes) failed: {os.strerror(error.errno)} ({free:,} bytes free). "
                "Make room, or give the cache another place or a smaller budget; what was written so far is kept.",
                str(target),
                needed,
                free,
            ) from error

    def _replace(self, temporary: Path, target: Path) -> None:
        try:
            os.replace(temporary, target)  # a link in the target's place goes, not what it points to
        except IsADirectoryError:  # damage: a folder where a file of ours belongs
            self._remove_folder(target)
            os.replace(temporary, target)

    def _make_folders(self, path: str) -> Sequence[Path]:
        """Make the folders above a file; returns those that gained an entry, to be synced."""
        with self._refusing():
            require_real_folders(self.root, path)
            try:
                return _make_folders((self.root / path).parent)
            except FileExistsError as error:
                if self.root.is_relative_to(error.filename):
                    raise FormatError(f"{error.filename} is a file, and a cache is a folder; choose another") from None
                raise NotARegularFile(errno.ENOTDIR, "is no folder", error.filename) from None

    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError), self._refusing():
            require_real_folders(self.root, path)
            if stat.S_ISDIR(os.lstat(self.root / path).st_mode):
                self._remove_folder(self.root / path)
            else:
                os.unlink(self.root / path)

    def _remove_folder(self, folder: Path) -> None:
        """Remove an empty folder in a file's place. Raises Damaged for one that holds something: it is not ours."""
        try:
            os.rmdir(folder)
        except OSError:
            raise self._strange(
                folder.relative_to(self.root).as_posix(), "is a folder that holds files of somebody else"
            ) from None

    def clear(self, is_ours: Callable[[str], bool]) -> None:
        for folder, _, _ in os.walk(self.root, topdown=False):
            relative = Path(folder).relative_to(self.root).as_posix()
            if relative == "." or is_ours(relative):
                with suppress(OSError):  # not empty
                    os.rmdir(folder)

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        folders = [prefix.rstrip("/")]
        with self._refusing():
            require_real_folders(self.root, f"{folders[0]}/.")
            while folders:
                folder = folders.pop()
                try:
                    entries = list(os.scandir(self.root / folder))
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except OSError:  # too deep, or not ours to look into
                    if not folder:
                        raise
                    yield folder, 0
                    continue
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(path)
                        continue
                    try:
                        found = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:  # a writer renamed or removed it meanwhile
                        continue
                    yield path, found.st_size if stat.S_ISREG(found.st_mode) else 0

    def free(self) -> int:
        return free_bytes(self.root)

    def lock(self, rank: int, world_size: int) -> Callable[[], None]:
        """A lone writer excludes all; the ranks of one group share, and each excludes another of its own number."""
        self._make_folders("record/lock")
        held: list[int] = []
        try:
            with self._refusing():
                _take(self.root / "record/lock", fcntl.LOCK_SH if world_size > 1 else fcntl.LOCK_EX, held)
                if world_size > 1:
                    _take(self.root / f"record/lock-{rank}-of-{world_size}", fcntl.LOCK_EX, held)
        except BaseException:
            _release(held)
            raise
        return lambda: _release(held)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """What is in a file's place and none of ours, and what the disk refuses, as this package's errors."""
        try:
            yield
        except NotARegularFile as error:
            raise self._strange(
                Path(error.filename).relative_to(self.root).as_posix(), error.strerror or "is no regular file"
            ) from None
        except NotADirectoryError as error:  # a file in a folder's place: what belongs into it is not there
            raise FileNotFoundError(error.errno, error.strerror, error.filename) from None
        except (FileNotFoundError, FileExistsError):
            raise
        except OSError as error:
            if error.errno in FULL:
                raise
            raise StoreError(
                f"{error.filename or self.root} cannot be used: {error.strerror}; see to it, and try again"
            ) from error

    def _strange(self, path: str, what: str) -> Damaged:
        return Damaged(
            f"{self.root}: {path} {what}, where the cache has a file or folder of its own; move it away, then repair "
            "the cache or write it again",
            [path],
        )


def _take(path: Path, kind: int, held: list[int]) -> None:
    descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
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
