"""The byte layer: whole files in, whole files or maps of them out. Everything above it is the same for any store.

Where something that is no file lies in a file's place, a store raises Damaged and leaves it alone; what its disk or
network refuses, it raises as StoreError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from .files import Bytes
from .local import TEMPORARY, LocalStore

__all__ = ["LocalStore", "Store", "open_store", "sweep"]


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
        """Removes a file if it is there; of a link, the link. Raises Damaged for a folder that holds something."""
        ...

    def clear(self, is_ours: Callable[[str], bool]) -> None:
        """Removes what is left of a place whose files were deleted: the empty folders of which `is_ours` is true, and
        the place itself if it is empty.
        """
        ...

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(path, bytes) of each file below a folder, in any order; 0 bytes for what is no regular file, links too."""
        ...

    def free(self) -> int | None:
        """Bytes that can still be written, or None where there is no such limit."""
        ...

    def lock(self, rank: int, world_size: int) -> Callable[[], None]:
        """Takes the writer's lock and returns what releases it. Raises Locked."""
        ...


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
        if TEMPORARY.fullmatch(path.rpartition("/")[2]):
            store.delete(path)
