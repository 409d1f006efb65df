"""Gathering samples into batches: reused buffers, several batches ahead where there is something to decode."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from activation_cache.errors import FormatError
from activation_cache.store.files import Bytes

from .order import Indices
from .processors import allowed_processors

if TYPE_CHECKING:
    from activation_cache.format.layout import Storage

Array = npt.NDArray[Any]
Allocate: TypeAlias = "Callable[[tuple[int, ...], np.dtype[Any]], Array]"


class Samples(Protocol):
    """What batches are taken from: a split, or several that are joined."""

    @property
    def ids(self) -> list[str]: ...

    @property
    def labels(self) -> dict[str, Array | list[Array]]: ...

    @property
    def storage(self) -> Storage: ...

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of samples that are not ragged."""
        ...

    def source(self, view: int, plan: Sequence[Indices], pool: ThreadPoolExecutor | None = None) -> Any: ...

    def take_buffers(self, allocate: Allocate) -> Buffers: ...

    def give_back(self, buffers: Buffers) -> None: ...


class CachedBatch:
    """A batch as stored.

    values    array (B, *shape) in storage.stored, or for ragged samples a list of B arrays
    indices   which samples, int64 (B,)

    The memory of `values` is used again for a later batch, once nothing refers to the array any more (neither a view
    nor a tensor made from it). An asynchronous copy from it must hold on to it until it is done.
    """

    __slots__ = ("_split", "indices", "values")

    def __init__(self, split: Samples, values: Array | list[Array], indices: Indices) -> None:
        self._split, self.values, self.indices = split, values, indices

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def ids(self) -> list[str]:
        ids = self._split.ids
        return [ids[i] for i in self.indices.tolist()]

    @property
    def labels(self) -> dict[str, Array | list[Array]]:
        """Name -> array (B,), or for a ragged label a list of B arrays."""
        return {
            name: values[self.indices] if isinstance(values, np.ndarray) else [values[i] for i in self.indices.tolist()]
            for name, values in self._split.labels.items()
        }


def iterate(
    split: Samples, todo: Sequence[Indices], view: int, threads: int | None, allocate: Allocate
) -> Iterator[CachedBatch]:
    """The batches `todo`, each an array of sample numbers.

    `threads` gather and decode several batches ahead; 0 gathers in the caller's thread when a batch is asked for; None
    takes 0 for uncompressed samples, where handing over costs more than it hides, and two (at most one a processor)
    for compressed ones. `allocate(shape, dtype)` makes the buffers, which are then reused: give one that pins memory.
    """
    if threads is None:
        threads = 0 if split.storage.codec == "none" else min(2, allowed_processors())
    pool = ThreadPoolExecutor(threads, thread_name_prefix="cache-reader") if threads else None
    source = split.source(view, todo, pool)
    buffers = split.take_buffers(allocate)
    ahead: deque[tuple[Indices, Any, Future[Any]]] = deque()
    try:
        for indices in todo:
            values: Any = None
            samples: Any
            job: Callable[[], Any]
            if source.ragged:
                job = partial(source.gather, indices)
            else:
                values = buffers.get((len(indices), *split.sample_shape), split.storage.stored)
                job = partial(source.gather, indices, as_bytes(values))
            if pool is None or source.own_threads:
                samples = job()
                yield CachedBatch(split, values if values is not None else samples, indices)
                del samples
            else:
                ahead.append((indices, values, pool.submit(job)))
            del values, job  # or they would keep the buffer from being used again
            if len(ahead) > threads + 1:
                yield _first(split, ahead)
        while ahead:
            yield _first(split, ahead)
    finally:
        split.give_back(buffers)
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)


def _first(split: Samples, ahead: deque[tuple[Indices, Any, Future[Any]]]) -> CachedBatch:
    indices, values, job = ahead.popleft()
    samples = job.result()
    return CachedBatch(split, samples if values is None else values, indices)


def as_bytes(values: Array) -> Bytes:
    """C-contiguous samples as (B, bytes of a sample)."""
    return values.reshape(len(values), -1).view(np.uint8) if values.size else np.empty((len(values), 0), np.uint8)


class Buffers:
    """Arrays that are handed out again when nobody but this object refers to them any more. For one thread."""

    def __init__(self, allocate: Allocate, most: int = 16) -> None:
        self.allocate, self._most = allocate, most
        self._kept: deque[Array] = deque([np.empty(8, np.uint8).view(np.uint64)])
        self._at_rest = self._references(self._kept)

    @staticmethod
    def _references(kept: deque[Array]) -> tuple[int, int]:
        """To the first array, and to the one whose memory it shows, to which views of it refer."""
        return sys.getrefcount(kept[0]), sys.getrefcount(kept[0].base)

    def _is_free(self) -> bool:
        mine, base = self._references(self._kept)
        return mine == self._at_rest[0] and (base == self._at_rest[1] or not isinstance(self._kept[0].base, np.ndarray))

    def get(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        for _ in range(len(self._kept)):
            if self._kept[0].shape == shape and self._kept[0].dtype == dtype and self._is_free():
                self._kept.rotate(-1)  # the one handed out longest ago comes first again next time
                return self._kept[-1]
            self._kept.rotate(-1)
        array = self.allocate(shape, dtype)
        if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
            raise FormatError(f"`allocate` was asked for C-contiguous {dtype} {shape}, got {array.dtype} {array.shape}")
        self._kept.append(array)
        if len(self._kept) > self._most:
            self._kept.popleft()
        return array
