"""Gathering samples into batches: reused buffers, several batches ahead where there is something to decode."""

from __future__ import annotations

import itertools
import os
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import FormatError
from .order import Indices, rank_slice
from .shard import CRC_BYTES, Bytes

if TYPE_CHECKING:
    from .reader import MappedShard, Split

Array = npt.NDArray[Any]
Allocate: TypeAlias = "Callable[[tuple[int, ...], np.dtype[Any]], Array]"

_COPY_ONE_BY_ONE = 16 << 10  # bytes; smaller samples are gathered by one vectorised call a shard
_BLOCK = 128  # small samples gathered at a time, so that what lies between stays in the processor's caches


class CachedBatch:
    """A batch as stored.

    values    array (B, *shape) in storage.stored, or for ragged samples a list of B arrays
    indices   which samples, int64 (B,)

    The memory of `values` is used again for a later batch, once nothing refers to the array any more (neither a view
    nor a tensor made from it). An asynchronous copy from it must hold on to it until it is done.
    """

    __slots__ = ("_split", "indices", "values")

    def __init__(self, split: Split, values: Array | list[Array], indices: Indices) -> None:
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
    split: Split,
    batch_size: int,
    *,
    order: Indices,
    start: int,
    drop_last: bool,
    rank: int,
    world_size: int,
    view: int,
    threads: int | None,
    allocate: Allocate,
) -> Iterator[CachedBatch]:
    """The batches of `order`.

    `threads` gather and decode several batches ahead; 0 gathers in the caller's thread when a batch is asked for; None
    takes 0 for uncompressed samples, where handing over costs more than it hides, and two (at most one a processor)
    for compressed ones. `allocate(shape, dtype)` makes the buffers, which are then reused: give one that pins memory.
    """
    if batch_size < 1 or start < 0 or not 0 <= rank < world_size:
        raise FormatError(f"batch_size {batch_size}, start {start}, rank {rank} of {world_size} make no batches")
    todo = rank_slice(order, batch_size, rank, world_size, drop_last)[start:]
    if threads is None:
        threads = 0 if split.storage.codec == "none" else min(2, os.cpu_count() or 1)
    return _run(split, todo, view, threads, Buffers(allocate))


def _run(split: Split, todo: list[Indices], view: int, threads: int, buffers: Buffers) -> Iterator[CachedBatch]:
    memo = _Memo(split) if split.storage.codec != "none" and split.grid.chunk_rows > 1 else None

    def room(indices: Indices) -> Array | None:
        if split.grid.ragged_axis is not None:
            return None
        return buffers.get((len(indices), *split.grid.row_shape), split.storage.stored)

    if threads == 0 or memo is not None:
        for indices in todo:
            yield CachedBatch(split, gather(split, indices, view, room(indices), memo), indices)
        return
    ahead: deque[tuple[Indices, Future[Array | list[Array]]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="cache-reader")
    try:
        for indices in todo:
            ahead.append((indices, pool.submit(gather, split, indices, view, room(indices))))
            if len(ahead) > threads + 1:
                yield _next(split, ahead)
        while ahead:
            yield _next(split, ahead)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _next(split: Split, ahead: deque[tuple[Indices, Future[Array | list[Array]]]]) -> CachedBatch:
    indices, job = ahead.popleft()
    return CachedBatch(split, job.result(), indices)


class Buffers:
    """Arrays that are handed out again when nobody but this object refers to them any more. For one thread."""

    def __init__(self, allocate: Allocate, most: int = 16) -> None:
        self._allocate, self._most = allocate, most
        self._kept: deque[Array] = deque([np.empty(0)])
        self._at_rest = sys.getrefcount(self._kept[0])

    def get(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        for _ in range(len(self._kept)):
            if self._kept[0].shape == shape and sys.getrefcount(self._kept[0]) == self._at_rest:
                self._kept.rotate(-1)  # the one handed out longest ago comes first again next time
                return self._kept[-1]
            self._kept.rotate(-1)
        array = self._allocate(shape, dtype)
        if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
            raise FormatError(f"`allocate` was asked for C-contiguous {dtype} {shape}, got {array.dtype} {array.shape}")
        if not isinstance(array.base, np.ndarray):  # a view of another array does not learn of views made from itself
            self._kept.append(array)
            if len(self._kept) > self._most:
                self._kept.popleft()
        return array


class _Memo:
    """The decoded chunks that a windowed order may still come back to."""

    def __init__(self, split: Split) -> None:
        from .reader import WINDOW

        self._limit = 2 * WINDOW + 2
        self._kept: OrderedDict[tuple[int, int], Bytes] = OrderedDict()

    def get(self, shard: MappedShard, number: int, chunk: int, size: int) -> Bytes:
        found = self._kept.get((number, chunk))
        if found is None:
            found = np.empty(size, np.uint8)
            shard.decode(chunk, found)
            self._kept[number, chunk] = found
            if len(self._kept) > self._limit:
                self._kept.popitem(last=False)
        return found


def gather(
    split: Split, indices: Indices, view: int, out: Array | None = None, memo: _Memo | None = None
) -> Array | list[Array]:
    """The samples at `indices`, as stored: in `out` (B, *shape) or a new array; ragged ones in a list."""
    g = split.grid
    if g.ragged_axis is not None:
        return [_ragged_sample(split, index, view) for index in indices.tolist()]
    if out is None:
        out = np.empty((len(indices), *g.row_shape), split.storage.stored)
    if len(indices) == 0:
        return out
    target = out.reshape(len(indices), -1).view(np.uint8)
    numbers = indices // g.shard_samples
    by_shard = np.argsort(numbers, kind="stable")
    numbers = numbers[by_shard]
    cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    for first, last in itertools.pairwise(cuts):
        number = int(numbers[first])
        places = by_shard[first:last]
        _from_shard(split, view, number, indices[places] - number * g.shard_samples, places, target, memo)
    return out


def _from_shard(
    split: Split, view: int, number: int, local: Indices, places: Indices, target: Bytes, memo: _Memo | None
) -> None:
    """target[places] = the samples `local` of a shard, all as bytes (rows, bytes of a sample)."""
    g, shard, row = split.grid, split.shard(view, number), target.shape[1]
    chunks = local // g.chunk_rows if g.chunk_rows > 1 else local
    shard.check(np.unique(chunks) if g.chunk_rows > 1 else chunks)
    if split.storage.codec == "none":
        stride = g.chunk_rows * row + CRC_BYTES
        table = shard.image[: len(shard.index.offsets) * stride].reshape(-1, stride)
        if g.chunk_rows > 1:
            rows = table[:, : g.chunk_rows * row].reshape(-1, g.chunk_rows, row, copy=False)
            target[places] = rows[chunks, local % g.chunk_rows]
        elif row >= _COPY_ONE_BY_ONE:
            for place, one in zip(places.tolist(), local.tolist(), strict=True):
                target[place] = table[one, :row]
        else:
            target[places] = table[local, :row]
    elif g.chunk_rows == 1:
        for place, one in zip(places.tolist(), local.tolist(), strict=True):
            shard.decode(one, target[place])
    else:
        memo = memo or _Memo(split)
        size = g.chunk_rows * row
        for chunk in np.unique(chunks).tolist():
            these = chunks == chunk
            decoded = memo.get(shard, number, chunk, size).reshape(-1, row)
            target[places[these]] = decoded[local[these] % g.chunk_rows]


def _ragged_sample(split: Split, index: int, view: int) -> Array:
    g = split.grid
    start, stop = split.offsets(view)[index].tolist()
    number = index // g.shard_samples
    shard = split.shard(view, number)
    start, stop = start - number * g.shard_rows, stop - number * g.shard_rows
    sample = np.empty((stop - start, *g.row_shape), split.storage.stored)
    target = sample.reshape(-1).view(np.uint8)
    row = len(target) // max(1, stop - start)
    chunks = np.arange(start // g.chunk_rows, -(-stop // g.chunk_rows)) if stop > start else np.empty(0, np.int64)
    shard.check(chunks)
    whole = np.empty(g.chunk_rows * row, np.uint8)
    for chunk in chunks.tolist():
        base = chunk * g.chunk_rows
        low, high = max(start, base), min(stop, base + g.chunk_rows)
        shard.decode(chunk, whole)
        target[(low - start) * row : (high - start) * row] = whole[(low - base) * row : (high - base) * row]
    return np.moveaxis(sample, 0, g.ragged_axis or 0)
