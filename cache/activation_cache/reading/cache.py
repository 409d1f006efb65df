"""Reading a cache: opening checks the record, and the first use of any bytes checks their checksums.

Shards are mapped, not read: a sample is copied once, from the page cache into the batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from activation_cache.errors import CacheError, FormatError
from activation_cache.format.canonical import Json, digest
from activation_cache.format.key import Key, check_key
from activation_cache.format.layout import PLAN, SHUFFLED_TOGETHER, SplitSpec, Storage, grid, packed, small_chunk
from activation_cache.format.quantise import Calibration, dequantise, from_bfloat16
from activation_cache.format.record import Commit, altered, damage, read_commit, sha256
from activation_cache.format.shard import CRC_BYTES
from activation_cache.store.base import Store, open_store

from .batches import Allocate, Buffers, CachedBatch, as_bytes, iterate
from .order import Indices, epoch_order, rank_slice, windowed_order
from .sources import ChunkSource, Kept, PackedSource, RaggedSource, RawSource, ShardFiles, Shards

Array = npt.NDArray[Any]


def open_cache(location: str | Path | Store, key: Mapping[str, Json] | None = None) -> Cache:
    """The finished cache at `location`, made from `key` if one is given.

    Checks the commit record, the presence and size of every file, and the content of all metadata. Raises
    NotCommitted (also where another process replaces it meanwhile), Stale (with the fields that differ), Damaged (with
    the files) or FormatError. What is read later raises Damaged or NotCommitted in the same way.
    """
    store = open_store(location)
    commit = read_commit(store)
    check_key(commit.plan.key, key, store.location)
    damaged = check_files(store, commit)
    if damaged:
        some = "; ".join(f"{path} {why}" for path, why in list(damaged.items())[:5])
        raise damage(store, commit, f"{store.location} is damaged: {some}{'; …' * (len(damaged) > 5)}", list(damaged))
    return Cache(store, commit)


def check_files(store: Store, commit: Commit) -> dict[str, str]:
    """What is wrong without reading any data: path -> reason, for files of another size and altered metadata."""
    wrong: dict[str, str] = {}
    sizes = dict(store.list())
    for path, (size, expected) in commit.files.items():
        found = sizes.get(path)
        if found is None:
            wrong[path] = "is missing"
        elif found != size:
            wrong[path] = f"has {found} bytes instead of {size}" if found else "is empty or no regular file"
        elif (path.endswith("zarr.json") or path == PLAN) and (why := altered(store, path, expected)):
            wrong[path] = why
    return wrong


class Cache:
    """A finished cache, open for reading. Picklable and safe to use after a fork; it holds no lock and no thread."""

    def __init__(self, store: Store, commit: Commit) -> None:
        self._store, self._commit = store, commit
        kept = Kept(store.limit, commit)
        self.splits: dict[str, Split] = {spec.name: Split(store, commit, spec, kept) for spec in commit.plan.splits}

    def __repr__(self) -> str:
        splits = ", ".join(f"{name}: {len(split):,} samples {split.shape}" for name, split in self.splits.items())
        return f"<cache {self.location}: {splits}; {self.storage.dtype}, {self.storage.codec}, {self.nbytes:,} bytes>"

    @property
    def location(self) -> str:
        return self._store.location

    @property
    def key(self) -> Key:
        """What the cache was made from."""
        return dict(self._commit.plan.key)

    @property
    def digest(self) -> str:
        """The sha256 of the key: what a cache built on this one puts into its own key."""
        return digest(self._commit.plan.key)

    @property
    def storage(self) -> Storage:
        return self._commit.plan.storage

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(size for size, _ in self._commit.files.values())

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, (self._store, self._commit)


class KeepsBuffers:
    """Hands an epoch's buffers on to the next: memory that was touched before fills several times faster."""

    def __init__(self) -> None:
        self._buffers: list[Buffers] = []

    def take_buffers(self, allocate: Allocate) -> Buffers:
        """The buffers of an earlier epoch, or new ones."""
        try:
            kept = self._buffers.pop()
        except IndexError:  # none yet, or another iterator has them
            return Buffers(allocate)
        return kept if kept.allocate == allocate else Buffers(allocate)

    def give_back(self, buffers: Buffers) -> None:
        """Keeps an epoch's buffers for the next."""
        self._buffers[:] = [buffers]


class Split(KeepsBuffers):
    """One split of a cache.

    samples, shape, views   as planned; `shape` is of one sample, with None for a ragged axis
    storage, calibration    how numbers are stored; the calibration is None but for uint8
    grid                    where samples lie
    ids, labels             a list of names; name -> array (samples,), or for a ragged label a list of arrays
    """

    def __init__(self, store: Store, commit: Commit, spec: SplitSpec, kept: Kept | None = None) -> None:
        super().__init__()
        self._store, self._commit, self._spec = store, commit, spec
        self._kept = kept or Kept(store.limit, commit)
        self.grid = grid(spec, commit.plan.storage)
        self._shards: dict[int, Shards] = {}
        self._sources: dict[int, RawSource | ChunkSource | RaggedSource] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Split, (self._store, self._commit, self._spec)

    def __len__(self) -> int:
        return self.samples

    def __repr__(self) -> str:
        views = f", {self.views} views" if self.views > 1 else ""
        return f"<split {self.name}: {len(self):,} samples of shape {self.shape}{views}, {self.storage.dtype}>"

    @property
    def name(self) -> str:
        return self._spec.name

    @property
    def samples(self) -> int:
        return self._spec.samples

    @property
    def shape(self) -> tuple[int | None, ...]:
        return self._spec.shape

    @property
    def longest(self) -> int | None:
        """For ragged samples: the greatest length that the plan allowed; None for others."""
        return self._spec.longest

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """`shape` of samples that are not ragged."""
        return self.grid.row_shape

    @property
    def views(self) -> int:
        return self._spec.views

    @property
    def storage(self) -> Storage:
        return self._commit.plan.storage

    @property
    def calibration(self) -> Calibration | None:
        return self._commit.plan.calibration

    @functools.cached_property
    def ids(self) -> list[str]:
        try:
            return [bytes(name).decode() for name in self._ragged("ids", "uint8")]
        except UnicodeDecodeError:
            raise self._damaged(small_chunk(f"{self.name}/ids", 1), "its names are not UTF-8") from None

    @functools.cached_property
    def labels(self) -> dict[str, Array | list[Array]]:
        found: dict[str, Array | list[Array]] = {}
        for name, dtype in self._spec.labels.items():
            if dtype.endswith("[]"):
                found[name] = self._ragged(f"labels/{name}", dtype.removesuffix("[]"))
            else:
                found[name] = self._small(f"labels/{name}", dtype, (self.samples,))
        return found

    def order(self, seed: int, epoch: int) -> Indices:
        """The order in which a shuffled epoch reads this split, int64 of shape (samples,).

        It is `epoch_order(samples, seed, epoch)`, unless samples are so small that compressed chunks hold several of
        them: then it is `windowed_order` over those chunks.
        """
        if packed(self.grid, self.storage):
            return windowed_order(self.samples, self.grid.chunk_rows, SHUFFLED_TOGETHER, seed, epoch)
        return epoch_order(self.samples, seed, epoch)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        within: slice = slice(None),
        view: int = 0,
        threads: int | None = None,
        allocate: Allocate = np.empty,
    ) -> Iterator[CachedBatch]:
        """One epoch's batches of one rank, from the `start`-th on; see CachedBatch for what they hold.

        The order is that of `order(seed, epoch)` (the stored one without `shuffle`), whatever `threads` and `start`.
        Step t of all ranks together covers the next batch_size * world_size samples. A last, shorter step is dropped
        with `drop_last`, and shared out evenly without. `within` reads a part of each batch only, for processes that
        share it unevenly. `threads` and `allocate`: see `iterate`.
        """
        self._check_view(view)
        order = self.order(seed, epoch) if shuffle else np.arange(self.samples)
        todo = [batch[within] for batch in rank_slice(order, batch_size, rank, world_size, drop_last, start)]
        return iterate(self, todo, view, threads, allocate)

    def read(self, indices: Sequence[int] | Indices, view: int = 0) -> Array | list[Array]:
        """Samples by index, as stored, in a new array (or for ragged ones a list of arrays).

        Raises IndexError for what is not a list of integers (a mask either), or out of range.
        """
        given = np.asarray(indices)
        if given.ndim != 1 or (len(given) and given.dtype.kind not in "iu"):
            raise IndexError(
                f"split {self.name!r} is read by a list of sample numbers, integers; got {given.dtype} of shape "
                f"{given.shape} (for a mask, np.flatnonzero(mask))"
            )
        chosen = given.astype(np.int64)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= self.samples):
            raise IndexError(f"split {self.name!r} has samples 0 to {self.samples - 1}; asked for {chosen.tolist()}")
        source = self.source(view, [chosen])
        if isinstance(source, RaggedSource):
            return source.gather(chosen)
        values = np.empty((len(chosen), *self.grid.row_shape), self.storage.stored)
        if len(chosen):
            source.gather(chosen, as_bytes(values))
        return values

    def dequantise(self, values: Array, dtype: npt.DTypeLike = np.float32) -> Array:
        """Real numbers for a batch as stored: the reference for what a device does with uint8 or bfloat16."""
        if self.calibration is not None:
            return dequantise(values, self.calibration, dtype)
        return (from_bfloat16(values) if self.storage.dtype == "bfloat16" else values).astype(dtype)

    def source(
        self, view: int, plan: Sequence[Indices], pool: ThreadPoolExecutor | None = None
    ) -> RawSource | ChunkSource | PackedSource | RaggedSource:
        """What reads this split's samples, kept from call to call; `plan` and `pool` are for small compressed ones."""
        self._check_view(view)
        shards = self.shards(view)
        if packed(self.grid, self.storage):
            return PackedSource(shards, plan, 2 * SHUFFLED_TOGETHER, pool)
        if view not in self._sources:
            if self.grid.ragged_axis is not None:
                self._sources[view] = RaggedSource(shards)
            elif self.storage.codec == "none" and self._kept.limit is None:
                self._sources[view] = RawSource(shards.files)
            else:
                self._sources[view] = ChunkSource(shards)
        return self._sources[view]

    def shards(self, view: int) -> Shards:
        """The shard files of a view."""
        if view not in self._shards:
            offsets = None
            if self.grid.ragged_axis is not None:
                name = f"offsets/values/{view}"
                offsets = self._small(name, "int64", (self.samples, 2))
                if not self._possible(offsets):
                    raise self._damaged(
                        small_chunk(f"{self.name}/{name}", 2), "it says that samples lie where none can"
                    )
            files = ShardFiles(self._store, self._commit, self._spec, view, offsets)
            self._shards[view] = Shards(files, self._kept)
        return self._shards[view]

    def _check_view(self, view: int) -> None:
        if not 0 <= view < self.views:
            raise FormatError(f"split {self.name!r} has no view {view}: its views are 0 to {self.views - 1}")

    def _ragged(self, name: str, dtype: str) -> list[Array]:
        offsets = self._small(f"offsets/{name}", "int64", (self.samples, 2))
        if not self.samples:
            return []
        lengths = offsets[:, 1] - offsets[:, 0]
        if offsets[0, 0] != 0 or (lengths < 0).any() or (offsets[1:, 0] != offsets[:-1, 1]).any():
            raise self._damaged(small_chunk(f"{self.name}/offsets/{name}", 2), "its parts do not lie end to end")
        flat = self._small(name, dtype, (int(offsets[-1, 1]),))
        return [flat[start:stop] for start, stop in offsets.tolist()]

    def _possible(self, offsets: Array) -> bool:
        """Whether ragged samples lie end to end in their shards, none longer than planned."""
        starts, stops, first = offsets[:, 0], offsets[:, 1], np.arange(self.samples) // self.grid.shard_samples
        begun, firsts = first * self.grid.shard_rows, np.arange(0, self.samples, self.grid.shard_samples)
        before = np.concatenate([[0], stops[:-1]])[: self.samples]
        before[firsts] = begun[firsts]
        lengths = stops - starts
        return bool(
            (starts == before).all()
            and (lengths >= 0).all()
            and (lengths <= (self.longest or 0)).all()
            and (stops - begun <= self.grid.shard_rows).all()
        )

    def _small(self, name: str, dtype: str, shape: tuple[int, ...]) -> Array:
        """A side array, checked against the record."""
        if 0 in shape:
            return np.empty(shape, dtype)
        path = small_chunk(f"{self.name}/{name}", len(shape))
        size, expected = self._commit.files.get(path, (0, ""))
        if size != math.prod(shape) * np.dtype(dtype).itemsize + CRC_BYTES:
            raise self._damaged(path, f"it has {size} bytes, which are not those of {shape} numbers")
        try:
            data = self._store.read(path)
        except FileNotFoundError:
            data = b""
        if len(data) != size or sha256(data) != expected:
            raise self._damaged(path, "it is missing, truncated or altered")
        return np.frombuffer(data[:-CRC_BYTES], dtype).reshape(shape)

    def _damaged(self, path: str, why: str) -> CacheError:
        return damage(self._store, self._commit, f"{self._store.location}: {path} is damaged: {why}", [path])
