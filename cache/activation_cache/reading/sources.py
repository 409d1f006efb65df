"""From sample numbers to samples: one class for each way in which samples can lie in shards.

A source reads one view of one split. It maps a shard when one of its samples is first wanted and checks its index
and seal; it checks a chunk's checksum when the chunk is first wanted. Afterwards neither costs anything. But for
PackedSource, they may be used by several threads at once: all they share are flags that only ever turn true.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from activation_cache.errors import CacheError, StoreError
from activation_cache.format.layout import SplitSpec, grid
from activation_cache.format.record import Commit, damage, shard_file
from activation_cache.format.shard import (
    CRC_BYTES,
    BadShard,
    Index,
    check_chunks,
    chunk_is_good,
    decode_chunk,
    read_index,
)
from activation_cache.store.base import Store
from activation_cache.store.files import Bytes, NotARegularFile

from .order import Indices
from .region import Region, whole_pages

Array = npt.NDArray[Any]

_COPY_ONE_BY_ONE = 16 << 10  # bytes; smaller samples are gathered by vectorised calls
_BLOCK = 256 << 10  # bytes of small samples gathered at a time, so that they stay in the processor's caches


class ShardFiles:
    """The shards of one view of one split: where they are and what the record says of them."""

    def __init__(
        self, store: Store, commit: Commit, spec: SplitSpec, view: int, offsets: npt.NDArray[np.int64] | None
    ) -> None:
        self._store, self._commit, self._spec, self._view = store, commit, spec, view
        self.storage, self.grid, self.offsets = commit.plan.storage, grid(spec, commit.plan.storage), offsets
        self.row_bytes = math.prod(self.grid.row_shape) * self.storage.stored.itemsize

    def path(self, number: int) -> str:
        return shard_file(self._commit.plan, self._spec, self._view, number)

    def local(self, number: int) -> Path:
        return self._store.local(self.path(number), self.recorded(number)[1])

    def forget(self, number: int) -> None:
        """Of a store that copies: the next reader gets the shard anew."""
        self._store.forget(self.path(number), self.recorded(number)[1])

    def recorded(self, number: int) -> tuple[int, str]:
        """(bytes, seal) of a shard."""
        return self._commit.files[self.path(number)]

    def rows(self, number: int) -> int:
        """How many rows a shard holds: samples, or steps of ragged ones."""
        samples = self.grid.shard_range(number)
        if self.offsets is None:
            return len(samples)
        return int(self.offsets[samples.stop - 1, 1]) - number * self.grid.shard_rows

    def damaged(self, number: int, why: str) -> CacheError:
        self.forget(number)  # it may have been the copy alone
        path, where = self.path(number), self._store.location
        return damage(self._store, self._commit, f"{where}: shard {path} is damaged: {why}", [path])


class MappedShard:
    """A shard file in memory, its index checked; its chunks are checked when they are first asked for."""

    def __init__(self, files: ShardFiles, number: int, region: Region, slot: int) -> None:
        self._files, self._number, self._storage = files, number, files.storage
        size, seal = files.recorded(number)
        try:
            self.image: Bytes = _mapped(files, number, region, slot)
        except FileNotFoundError:
            raise self.damaged("it is missing") from None
        except NotARegularFile as error:
            raise self.damaged(f"it {error.strerror}") from None
        except ValueError as error:
            raise self.damaged(str(error)) from None
        except OSError as error:
            raise StoreError(
                f"{files.path(number)} cannot be read: {error.strerror}; see to it, and try again"
            ) from error
        if len(self.image) != size:
            raise self.damaged(f"it has {len(self.image)} bytes instead of {size}")
        chunks = -(-files.rows(number) // files.grid.chunk_rows)
        try:
            self.index: Index = read_index(self.image, chunks, files.grid.chunks_per_shard, seal)
            check_chunks(self.index, files.storage, files.grid.chunk_rows * files.row_bytes)
        except BadShard as error:
            raise self.damaged(str(error)) from None
        self.checked = [False] * chunks

    def check(self, chunk: int) -> None:
        """Checks a chunk's checksum, unless that was done before. Raises Damaged."""
        if not self.checked[chunk]:
            if not chunk_is_good(self.image, self.index, chunk):
                raise self.damaged(f"the checksum of its chunk {chunk} does not match")
            self.checked[chunk] = True

    def decode(self, chunk: int, out: Bytes) -> None:
        """Decodes a chunk into `out`, flat bytes of its size. Raises Damaged."""
        self.check(chunk)
        try:
            decode_chunk(self.image, self.index, chunk, self._storage, out)
        except BadShard as error:
            raise self.damaged(str(error)) from None

    def copy(self, chunk: int, start: int, out: Bytes) -> None:
        """Copies the bytes of an uncompressed chunk from `start` on into `out`. Raises Damaged."""
        self.check(chunk)
        begin = int(self.index.offsets[chunk]) + start
        out[:] = self.image[begin : begin + len(out)]

    def damaged(self, why: str) -> CacheError:
        return self._files.damaged(self._number, why)


def _mapped(files: ShardFiles, number: int, region: Region, slot: int) -> Bytes:
    for _ in range(3):  # another process that keeps its copies in the same folder may just have removed this one
        with suppress(FileNotFoundError):
            return region.map(slot, files.local(number))
    return region.map(slot, files.local(number))


class Kept:
    """The shards that a process has mapped of a cache whose store copies them, no more than `limit` bytes together.

    `limit` is None where all of them fit, and none need be let go of.
    """

    def __init__(self, limit: int | None, commit: Commit) -> None:
        total = sum(size for size, _ in commit.files.values())
        self.limit = None if limit is None or total <= limit else limit
        self._sizes: dict[tuple[Shards, int], int] = {}  # in the order in which they were mapped

    def add(self, shards: Shards, number: int) -> None:
        """Enters a shard. Lets go of those mapped first; a thread that still reads one keeps it until it is done."""
        if self.limit is None:
            return
        self._sizes[shards, number] = shards.files.recorded(number)[0]
        for oldest in list(self._sizes)[:-1]:
            if sum(list(self._sizes.values())) <= self.limit:
                break
            if self._sizes.pop(oldest, None) is not None:
                oldest[0].release(oldest[1])


class Shards:
    """The shards of a view, mapped as they are needed."""

    def __init__(self, files: ShardFiles, kept: Kept) -> None:
        self.files, self._kept = files, kept
        self._mapped: dict[int, MappedShard] = {}

    def __getitem__(self, number: int) -> MappedShard:
        shard = self._mapped.get(number)
        if shard is None:
            region = Region(1, whole_pages(self.files.recorded(number)[0]))
            shard = self._mapped[number] = MappedShard(self.files, number, region, 0)
            self._kept.add(self, number)
        return shard

    def release(self, number: int) -> None:
        """Lets go of a shard and of its copy."""
        self._mapped.pop(number, None)
        self.files.forget(number)


class RawSource:
    """Uncompressed samples: all shards lie in one region, and a sample is copied straight out of it."""

    ragged, own_threads = False, False

    def __init__(self, files: ShardFiles) -> None:
        g = self._grid = files.grid
        self._files, self._row = files, files.row_bytes
        self._stride = g.chunk_rows * self._row + CRC_BYTES  # of chunks
        largest = g.chunks_per_shard * (self._stride + 16) + CRC_BYTES
        vectorised = g.chunk_rows > 1 or self._row < _COPY_ONE_BY_ONE
        self._region = Region(g.shards, whole_pages(largest, self._stride if vectorised else 1))
        # The region as chunks with their checksums; every slot begins with a whole one.
        self._chunks = self._region.bytes.view(f"V{self._stride}") if vectorised else None
        shards, local = np.divmod(np.arange(g.samples), g.shard_samples)
        unit = self._stride if vectorised else 1
        # Of each sample's chunk: its number in _chunks, or where it begins in the region.
        self._where = shards * (self._region.slot_bytes // unit) + local // g.chunk_rows * (self._stride // unit)
        self._mapped = np.zeros(g.shards, bool)
        self._checked = np.zeros(g.shards * g.chunks_per_shard, bool)
        self._all_checked = False

    def gather(self, indices: Indices, target: Bytes, places: Indices | None = None) -> None:
        """target[places[j]] = the bytes of sample indices[j]; without `places`, target[j]."""
        if not self._all_checked:
            self._check(indices)
        per, row, where = self._grid.chunk_rows, self._row, self._where[indices]
        if self._chunks is None:
            memory, out = self._region.bytes.data, target.reshape(-1).data
            for place, start in zip(
                range(len(where)) if places is None else places.tolist(), where.tolist(), strict=True
            ):
                out[place * row : (place + 1) * row] = memory[start : start + row]
        elif per == 1:
            step = max(1, min(len(where), _BLOCK // self._stride))
            scratch, item = np.empty(step, self._chunks.dtype), f"V{row}"
            bare = scratch.view(np.uint8).reshape(step, self._stride)[:, :row].view(item)[:, 0]
            out_items = target.view(item)[:, 0]
            for at in range(0, len(where), step):
                some = where[at : at + step]
                self._chunks.take(some, out=scratch[: len(some)], mode="clip")
                out_items[slice(at, at + step) if places is None else places[at : at + step]] = bare[: len(some)]
        else:
            table = self._chunks.view(np.uint8).reshape(-1, self._stride)
            rows = np.lib.stride_tricks.as_strided(table, (len(table), per, row), (self._stride, row, 1))
            target[slice(None) if places is None else places] = rows[where, indices % per]

    def _check(self, indices: Indices) -> None:
        """Checks the shards and chunks of these samples, as far as they were not checked before."""
        shards, chunks = indices // self._grid.shard_samples, indices // self._grid.chunk_rows
        for shard in np.unique(shards[~self._mapped[shards]]).tolist():
            MappedShard(self._files, shard, self._region, shard)
            self._mapped[shard] = True
        todo = np.unique(chunks[~self._checked[chunks]])
        starts = self._where[todo * self._grid.chunk_rows] * (1 if self._chunks is None else self._stride)
        image, memory, size = self._region.bytes, self._region.bytes.data, self._stride - CRC_BYTES
        for chunk, start in zip(todo.tolist(), starts.tolist(), strict=True):
            stop = start + size
            if google_crc32c.value(image[start:stop]) != int.from_bytes(memory[stop : stop + CRC_BYTES], "little"):
                shard, local = divmod(chunk, self._grid.chunks_per_shard)
                raise self._files.damaged(shard, f"the checksum of its chunk {local} does not match")
        self._checked[todo] = True
        total = -(-self._grid.samples // self._grid.chunk_rows)
        self._all_checked = int(np.count_nonzero(self._checked)) == total


class ChunkSource:
    """Samples one by one: with a chunk of their own, which is decoded straight into the batch; or uncompressed and
    several to a chunk, of shards that are let go of again.
    """

    ragged, own_threads = False, False

    def __init__(self, shards: Shards) -> None:
        self._shards, self._grid, self._row = shards, shards.files.grid, shards.files.row_bytes

    def gather(self, indices: Indices, target: Bytes, places: Indices | None = None) -> None:
        """target[places[j]] = the bytes of sample indices[j]; without `places`, target[j]."""
        for place, index in zip(range(len(indices)) if places is None else places, indices.tolist(), strict=True):
            number, local = divmod(index, self._grid.shard_samples)
            chunk, row = divmod(local, self._grid.chunk_rows)
            if self._grid.chunk_rows == 1:
                self._shards[number].decode(chunk, target[place])
            else:
                self._shards[number].copy(chunk, row * self._row, target[place])


class PackedSource:
    """Several compressed samples a chunk. Chunks are decoded into slots of a pool, from which batches are gathered.

    It follows a plan, the batches to come: chunks are decoded in the order in which the plan first needs them, up to
    `keep` at a time, and a slot is free again when the plan needs its chunk no more. Not for several threads at once;
    it employs some of its own when `pool` is given.
    """

    ragged, own_threads = False, True

    def __init__(self, shards: Shards, plan: Sequence[Indices], keep: int, pool: ThreadPoolExecutor | None) -> None:
        g = shards.files.grid
        self._shards, self._grid, self._row, self._pool = shards, g, shards.files.row_bytes, pool
        needed = np.concatenate(plan) // g.chunk_rows if plan else np.empty(0, np.int64)
        chunks, first, uses = np.unique(needed, return_index=True, return_counts=True)
        self._coming = deque(chunks[np.argsort(first)].tolist())
        total = g.shards * g.chunks_per_shard
        self._uses = np.zeros(total, np.int64)  # of each chunk, in the batches to come
        self._uses[chunks] = uses
        self._slot = np.full(total, -1, np.int64)  # of each chunk
        slots = min(len(chunks), max(keep, _most_at_once(needed, [len(indices) for indices in plan])))
        self._memory = np.empty((slots * g.chunk_rows, self._row), np.uint8)
        self._free = list(range(slots))
        self._jobs: dict[int, Future[None]] = {}

    def gather(self, indices: Indices, target: Bytes, places: Indices | None = None) -> None:
        """target[places[j]] = the bytes of sample indices[j], the plan's next batch; without `places`, target[j]."""
        per = self._grid.chunk_rows
        chunks = indices // per
        distinct, counts = np.unique(chunks, return_counts=True)
        while self._coming and (self._slot[distinct] < 0).any():
            assert self._free, "the pool has room for the chunks of a batch, and others are given back in time"
            self._fetch()
        for chunk in distinct.tolist():
            job = self._jobs.pop(chunk, None)
            if job is not None:
                job.result()
        items = self._memory.view(f"V{self._row}")[:, 0]
        where, out = self._slot[chunks] * per + indices % per, target.view(items.dtype)[:, 0]
        if places is None:
            np.take(items, where, out=out, mode="clip")
        else:
            out[places] = items[where]
        self._uses[distinct] -= counts
        done = distinct[self._uses[distinct] == 0]
        self._free += self._slot[done].tolist()
        while self._free and self._coming and self._pool is not None:
            self._fetch()

    def _fetch(self) -> None:
        chunk, slot = self._coming.popleft(), self._free.pop()
        self._slot[chunk] = slot
        if self._pool is None:
            self._decode(chunk, slot)
        else:
            self._jobs[chunk] = self._pool.submit(self._decode, chunk, slot)

    def _decode(self, chunk: int, slot: int) -> None:
        number, local = divmod(chunk, self._grid.chunks_per_shard)
        per = self._grid.chunk_rows
        self._shards[number].decode(local, self._memory[slot * per : (slot + 1) * per].reshape(-1))


def _most_at_once(needed: Indices, sizes: Sequence[int]) -> int:
    """How many chunks are held at once, if each is from the first batch that needs it to the last."""
    if not len(needed):
        return 0
    batch = np.repeat(np.arange(len(sizes)), sizes)
    first, last = np.full(needed.max() + 1, len(sizes)), np.full(needed.max() + 1, -1)
    np.minimum.at(first, needed, batch)
    np.maximum.at(last, needed, batch)
    used = last >= 0
    begun, ended = (np.bincount(of[used], minlength=len(sizes)) for of in (first, last))
    held = np.cumsum(begun) - np.concatenate([[0], np.cumsum(ended)[:-1]])
    return int(held.max())


class JoinedSource:
    """Several sources of samples of one shape, counted through one after the other."""

    def __init__(self, parts: Sequence[RawSource | ChunkSource | PackedSource], starts: Indices) -> None:
        self._parts, self._starts = parts, starts
        self.own_threads = any(part.own_threads for part in parts)

    ragged = False

    def gather(self, indices: Indices, target: Bytes) -> None:
        """target[j] = the bytes of sample indices[j]."""
        of = np.searchsorted(self._starts, indices, "right") - 1
        for number in np.unique(of).tolist():
            places = np.flatnonzero(of == number)
            self._parts[number].gather(indices[places] - self._starts[number], target, places)


class RaggedSource:
    """Samples of different lengths: runs of rows that may begin and end in the middle of a chunk."""

    ragged, own_threads = True, False

    def __init__(self, shards: Shards) -> None:
        self._files, self._shards = shards.files, shards

    def gather(self, indices: Indices) -> list[Array]:
        return [self.sample(index) for index in indices.tolist()]

    def sample(self, index: int) -> Array:
        """A sample, its ragged axis back in place, in memory of its own."""
        g, storage = self._files.grid, self._files.storage
        assert self._files.offsets is not None
        number = index // g.shard_samples
        start, stop = (self._files.offsets[index] - number * g.shard_rows).tolist()
        if stop == start:
            return np.moveaxis(np.empty((0, *g.row_shape), storage.stored), 0, g.ragged_axis or 0)
        shard = self._shards[number]  # its chunks have the bytes that are asked for below, or it is refused here
        sample = np.empty((stop - start, *g.row_shape), storage.stored)
        row = self._files.row_bytes
        target = sample.reshape(-1).view(np.uint8)
        whole = np.empty(g.chunk_rows * row, np.uint8)
        for chunk in range(start // g.chunk_rows, -(-stop // g.chunk_rows)):
            base = chunk * g.chunk_rows
            low, high = max(start, base), min(stop, base + g.chunk_rows)
            shard.decode(chunk, whole)
            target[(low - start) * row : (high - start) * row] = whole[(low - base) * row : (high - base) * row]
        return np.moveaxis(sample, 0, g.ragged_axis or 0)
