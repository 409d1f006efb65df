"""What can go wrong with a cache. Every message says what was asked, what was found, and what to do.

CacheError
├── NotCommitted       absent, not committed by its writer yet, or removed or replaced while it was read
├── AlreadyCommitted   a writer was asked to write where a finished cache lies
├── Stale              finished, but made from something else (`differences` says which fields of the key)
├── Damaged            a file is missing, truncated or altered (`paths` names them)
├── FormatError        not an activation cache, or one of another format version
├── DoesNotFit         the disk, the budget or the address space is too small (`path`, `needed` and `free` bytes)
├── Locked             another process is writing it (`holder` names it)
├── InvalidSamples     what was appended cannot be stored faithfully (also a ValueError)
└── StoreError         the object store failed for good, after retries; or the disk, other than by being full
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class CacheError(Exception):
    """The base of every error of this package."""

    def __reduce__(self) -> tuple[Any, ...]:  # errors travel from worker processes with their attributes
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[CacheError], args: tuple[Any, ...], state: dict[str, Any]) -> CacheError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class NotCommitted(CacheError):
    """There is no finished cache at this place, or not any more: another process removed, replaced or repairs it."""


class AlreadyCommitted(CacheError):
    """A finished cache lies where a new one was to be written."""


class Stale(CacheError):
    """The cache was made from something else than what was asked for.

    `differences` maps each field of the key that differs to (value in the cache, value asked for); a field that one
    side lacks shows as None.
    """

    def __init__(self, message: str, differences: Mapping[str, tuple[Any, Any]]) -> None:
        super().__init__(message)
        self.differences = dict(differences)


class Damaged(CacheError):
    """A file of the cache is missing, truncated or altered; `paths` names them, relative to the cache."""

    def __init__(self, message: str, paths: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.paths = tuple(paths)


class FormatError(CacheError):
    """Not an activation cache, or one of a format version that this package does not read; of the latter, `key` is
    what it was made from.
    """

    def __init__(self, message: str, key: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.key = None if key is None else dict(key)


class DoesNotFit(CacheError):
    """The disk or the budget is too small for what was to be written, or the address space for what was to be mapped.

    `needed` and `free` are in bytes.
    """

    def __init__(self, message: str, path: str = "", needed: int = 0, free: int = 0) -> None:
        super().__init__(message)
        self.path, self.needed, self.free = path, needed, free


class Locked(CacheError):
    """Another process is writing this cache; `holder` names it."""

    def __init__(self, message: str, holder: str = "") -> None:
        super().__init__(message)
        self.holder = holder


class InvalidSamples(CacheError, ValueError):
    """What was appended cannot be stored faithfully: wrong shape or dtype, not finite, out of range, too many."""


class StoreError(CacheError):
    """The object store failed for good, after the retries that were safe; or the disk refused a file."""
