"""For tests of and with this package: a store that fails on demand, and what every store must pass.

`FaultyStore` wraps a store and misbehaves at its n-th change. `check_store` is the conformance suite of the byte
layer: call it in a test of a new store, with a function that makes an empty one.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from .errors import Locked
from .store.base import LocalStore, Store
from .store.files import Bytes

Fault = Literal["fail", "full", "kill", "truncate", "kill after"]


class FaultyStore:
    """A store whose n-th change (counted from 0 over write, begin, create and delete) goes wrong; of `begin` in its
    first half where it fails, and in its second where the process is killed.

    fail        raises OSError(EIO), and nothing is written
    full        raises OSError(ENOSPC) from below, as a full disk does
    kill        ends the process with SIGKILL before the change
    kill after  ends it with SIGKILL after the change
    truncate    leaves half of the file under its real name, as a disk may after a power failure, then SIGKILL
    """

    def __init__(self, inner: Store, at: int, fault: Fault) -> None:
        self.inner, self.at, self.fault, self.changes = inner, at, fault, 0

    @property
    def location(self) -> str:
        return self.inner.location

    def size(self, path: str) -> int | None:
        return self.inner.size(path)

    def read(self, path: str) -> bytes:
        return self.inner.read(path)

    def local(self, path: str, version: str = "") -> Path:
        return self.inner.local(path, version)

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        return self.inner.list(prefix)

    def clear(self, is_ours: Callable[[str], bool]) -> None:
        self.inner.clear(is_ours)

    def free(self) -> int | None:
        return self.inner.free()

    @property
    def limit(self) -> int | None:
        return self.inner.limit

    def forget(self, path: str, version: str = "") -> None:
        self.inner.forget(path, version)

    def lock(self, rank: int, world_size: int) -> Callable[[], None]:
        return self.inner.lock(rank, world_size)

    def write(self, path: str, parts: Sequence[Bytes | bytes]) -> None:
        self._change(path, parts, lambda: self.inner.write(path, parts))

    def begin(self, path: str, parts: Sequence[Bytes | bytes]) -> Callable[[], None]:
        number = self._number(path)
        finish = self.inner.begin(path, parts)

        def change() -> None:
            self._happen(number, path, parts, finish)

        return change

    def create(self, path: str, data: bytes) -> bool:
        return self._change(path, [data], lambda: self.inner.create(path, data))

    def delete(self, path: str) -> None:
        self._change(path, [], lambda: self.inner.delete(path))

    def _change(self, path: str, parts: Sequence[Bytes | bytes], change: Callable[[], bool | None]) -> bool:
        return self._happen(self._number(path), path, parts, change)

    def _number(self, path: str) -> int:
        """Of the next change. Raises OSError if it is the one that fails."""
        number, self.changes = self.changes, self.changes + 1
        if number == self.at and self.fault in ("fail", "full"):
            code = errno.EIO if self.fault == "fail" else errno.ENOSPC
            raise OSError(code, os.strerror(code), path)
        return number

    def _happen(
        self, number: int, path: str, parts: Sequence[Bytes | bytes], change: Callable[[], bool | None]
    ) -> bool:
        if number == self.at:
            if self.fault == "truncate" and parts:
                whole = b"".join(bytes(part) for part in parts)
                self.inner.write(path, [whole[: len(whole) // 2]])
            if self.fault == "kill after":
                change()
            os.kill(os.getpid(), signal.SIGKILL)
        return bool(change())


def check_store(make: Callable[[], Store], exclusive: bool = True) -> None:
    """Asserts everything that the rest of the package takes for granted of a store.

    `make` returns a new store object on the same, at first empty place. `exclusive`: whether it locks.
    """
    store = make()
    assert list(store.list()) == []
    assert store.size("a/b") is None
    for read in (store.read, store.local):
        try:
            read("a/b")
        except FileNotFoundError:
            pass
        else:
            raise AssertionError("a file that is not there was read")
    parts: list[Bytes | bytes] = [b"one", np.arange(5, dtype=np.uint8), b""]
    parts += [bytes([i % 251]) * 3 for i in range(3000)]
    whole = b"".join(bytes(part) for part in parts)
    store.write("a/b", parts)
    other = make()
    assert other.read("a/b") == whole
    assert other.local("a/b").read_bytes() == whole
    assert other.size("a/b") == len(whole)
    store.write("a/b", [b"new"])
    assert make().read("a/b") == b"new", "a file is replaced as a whole"
    assert make().local("a/b").read_bytes() == b"new", "and no older copy of it is read"
    assert store.create("c", b"first")
    assert not store.create("c", b"second")
    assert make().read("c") == b"first"
    finish = store.begin("a/b", [b"newer"])
    assert make().read("a/b") == b"new", "until a file is whole it is not seen"
    finish()
    assert make().read("a/b") == b"newer"
    store.write("empty", [])
    assert make().read("empty") == b""
    assert dict(store.list()) == {"a/b": 5, "c": 5, "empty": 0}
    assert dict(store.list("a")) == {"a/b": 5}
    store.delete("a/b")
    store.delete("a/b")
    assert make().size("a/b") is None
    assert store.free() is None or store.free() > 0  # type: ignore[operator]
    if exclusive:
        _check_lock(make)


def _check_lock(make: Callable[[], Store]) -> None:
    def is_free(rank: int, world_size: int) -> bool:
        try:
            make().lock(rank, world_size)()
        except Locked:
            return False
        return True

    release = make().lock(0, 1)
    assert not is_free(0, 1)
    assert not is_free(1, 2)
    release()
    release = make().lock(1, 3)
    assert is_free(0, 3)
    assert is_free(2, 3)
    assert not is_free(1, 3)
    assert not is_free(0, 1)
    release()
    assert is_free(0, 1)


def local_store(root: str | Path) -> Store:
    """A store in a directory, for FaultyStore to wrap."""
    return LocalStore(root)
