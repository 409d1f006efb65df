"""Reading a cache: opening checks the record, and the first use of any bytes checks their checksums.

Shards are mapped, not read: a sample is copied once, from the page cache into the batch. Checking happens once in a
process's life, chunk by chunk as the chunks are first needed, and costs nothing afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import batches as batching
from .batches import Allocate, CachedBatch
from .errors import Damaged, FormatError, Stale
from .key import Json, Key, describe, differences, digest
from .layout import PLAN, Grid, SplitSpec, Storage, grid
from .order import Indices, epoch_order, windowed_order
from .quantise import Calibration, dequantise, from_bfloat16
from .record import Commit, mend, read_commit, sha256, shard_file
from .shard import CRC_BYTES, BadShard, Bytes, Index, chunk_is_good, decode_chunk, read_index
from .sides import small_chunk
from .store import Store, open_store

Array = npt.NDArray[Any]

WINDOW = 64  # chunks of small compressed samples that are shuffled together


def open_cache(location: str | Path | Store, key: Mapping[str, Json] | None = None) -> Cache:
    """The finished cache at `location`, made from `key` if one is given.

    Checks the commit record, the presence and size of every file, and the content of all metadata. Raises
    NotCommitted, Stale (with the fields that differ), Damaged (with the files) or FormatError.
    """
    store = open_store(location)
    commit = read_commit(store)
    check_key(commit.plan.key, key, store.location)
    damaged = check_files(store, commit)
    if damaged:
        raise Damaged(
            f"{store.location} is damaged: " + "; ".join(f"{p} {why}" for p, why in list(damaged.items())[:5])
            + ("; …" if len(damaged) > 5 else "") + f"; {mend(store.location)}",
            list(damaged),
        )  # fmt: skip
    return Cache(store, commit)


def check_key(cached: Mapping[str, Json], wanted: Mapping[str, Json] | None, location: str) -> None:
    """Raises Stale if the two keys differ; None asks for no check."""
    different = differences(cached, wanted) if wanted is not None else {}
    if different:
        raise Stale(f"{location} was made from something else: {describe(different)}; write it again", different)


def check_files(store: Store, commit: Commit) -> dict[str, str]:
    """What is wrong without reading any data: path -> reason, for files of another size and altered metadata."""
    wrong: dict[str, str] = {}
    for path, (size, expected) in commit.files.items():
        found = store.size(path)
        if found is None:
            wrong[path] = "is missing"
        elif found != size:
            wrong[path] = f"has {found} bytes instead of {size}"
        elif (path.endswith("zarr.json") or path == PLAN) and sha256(store.read(path)) != expected:
            wrong[path] = "was altered"
    return wrong


class Cache:
    """A finished cache, open for reading. Picklable and safe to use after a fork; it holds no lock and no thread."""

    def __init__(self, store: Store, commit: Commit) -> None:
        self._store, self._commit = store, commit
        self.splits: dict[str, Split] = {spec.name: Split(store, commit, spec) for spec in commit.plan.splits}

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


class Split:
    """One split of a cache.

    samples, shape, views   as planned; `shape` is of one sample, with None for a ragged axis
    storage, calibration    how numbers are stored; the calibration is None but for uint8
    grid                    where samples lie
    ids, labels             a list of names; name -> array (samples,), or for a ragged label a list of arrays
    """

    def __init__(self, store: Store, commit: Commit, spec: SplitSpec) -> None:
        self._store, self._commit, self._spec = store, commit, spec
        self.grid = grid(spec, commit.plan.storage)
        self._shards: dict[tuple[int, int], MappedShard] = {}
        self._offsets: dict[int, npt.NDArray[np.int64]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Split, (self._store, self._commit, self._spec)

    def __len__(self) -> int:
        return self.samples

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
    def views(self) -> int:
        return self._spec.views

    @property
    def storage(self) -> Storage:
        return self._commit.plan.storage

    @property
    def calibration(self) -> Calibration | None:
        return self._commit.plan.calibration

    @property
    def scales(self) -> npt.NDArray[np.float32] | None:
        """The scale of each channel for uint8, otherwise None."""
        return None if self.calibration is None else self.calibration.scale

    @functools.cached_property
    def ids(self) -> list[str]:
        return [bytes(name).decode() for name in self._ragged("ids", "uint8")]

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
        g = self.grid
        if self.storage.codec == "none" or g.chunk_rows == 1 or g.ragged_axis is not None:
            return epoch_order(self.samples, seed, epoch)
        return windowed_order(self.samples, g.chunk_rows, WINDOW, seed, epoch)

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
        view: int = 0,
        threads: int | None = None,
        allocate: Allocate = np.empty,
    ) -> Iterator[CachedBatch]:
        """One epoch's batches of one rank, from the `start`-th on; see `batches.iterate` for what they hold.

        The order depends on seed and epoch alone (`order`; the stored order without `shuffle`), never on `threads` or
        `start`. Step t of all ranks together covers the next batch_size * world_size samples. A last, shorter step is
        dropped with `drop_last`, and shared out evenly without.
        """
        if not 0 <= view < self.views:
            raise FormatError(f"split {self.name!r} has {self.views} view(s), counted from 0; there is no view {view}")
        return batching.iterate(
            self,
            batch_size,
            order=self.order(seed, epoch) if shuffle else np.arange(self.samples),
            start=start,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            view=view,
            threads=threads,
            allocate=allocate,
        )

    def read(self, indices: Sequence[int] | Indices, view: int = 0) -> Array | list[Array]:
        """Samples by index, as stored, in a new array (or for ragged ones a list of arrays)."""
        chosen = np.asarray(indices, np.int64)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= self.samples):
            raise IndexError(f"split {self.name!r} has samples 0 to {self.samples - 1}; asked for {chosen.tolist()}")
        return batching.gather(self, chosen, view)

    def dequantise(self, values: Array, dtype: npt.DTypeLike = np.float32) -> Array:
        """Real numbers for a batch as stored: the reference for what a device does with uint8 or bfloat16."""
        if self.calibration is not None:
            return dequantise(values, self.calibration, dtype)
        return (from_bfloat16(values) if self.storage.dtype == "bfloat16" else values).astype(dtype)

    def shard(self, view: int, number: int) -> MappedShard:
        """A shard, mapped and its index checked. Kept open."""
        found = self._shards.get((view, number))
        if found is None:
            path = shard_file(self._commit.plan, self._spec, view, number)
            samples = self.grid.shard_range(number)
            rows = len(samples)
            if self.grid.ragged_axis is not None:
                rows = int(self.offsets(view)[samples.stop - 1, 1]) - number * self.grid.shard_rows
            found = MappedShard(self._store, path, self.grid, self.storage, rows, self._commit.files[path])
            self._shards[view, number] = found
        return found

    def offsets(self, view: int) -> npt.NDArray[np.int64]:
        """For ragged samples: the rows [start, stop) of each on the flat axis, int64 of shape (samples, 2)."""
        if view not in self._offsets:
            self._offsets[view] = self._small(f"offsets/values/{view}", "int64", (self.samples, 2))
        return self._offsets[view]

    def _ragged(self, name: str, dtype: str) -> list[Array]:
        offsets = self._small(f"offsets/{name}", "int64", (self.samples, 2))
        flat = self._small(name, dtype, (int(offsets[-1, 1]) if len(offsets) else 0,))
        return [flat[start:stop] for start, stop in offsets.tolist()]

    def _small(self, name: str, dtype: str, shape: tuple[int, ...]) -> Array:
        """A side array, checked against the record."""
        if 0 in shape:
            return np.empty(shape, dtype)
        path = small_chunk(f"{self.name}/{name}", len(shape))
        try:
            data = self._store.read(path)
        except FileNotFoundError:
            data = b""
        size, expected = self._commit.files[path]
        if len(data) != size or sha256(data) != expected:
            where = self._store.location
            raise Damaged(f"{where}: {path} is missing, truncated or altered; {mend(where)}", [path])
        return np.frombuffer(data[:-CRC_BYTES], dtype).reshape(shape)


class MappedShard:
    """A shard file in memory: its chunks are checked when they are first asked for."""

    def __init__(
        self, store: Store, path: str, g: Grid, storage: Storage, rows: int, recorded: tuple[int, str]
    ) -> None:
        self.path, self._location, self._storage = path, store.location, storage
        size, seal = recorded
        try:
            self.image: Bytes = store.map(path)
        except FileNotFoundError:
            raise self.damaged("it is missing") from None
        if len(self.image) != size:
            raise self.damaged(f"it has {len(self.image)} bytes instead of {size}")
        try:
            self.index: Index = read_index(self.image, -(-rows // g.chunk_rows), g.chunks_per_shard, seal)
        except BadShard as error:
            raise self.damaged(str(error)) from None
        self.checked: npt.NDArray[np.bool_] = np.zeros(len(self.index.offsets), bool)
        self.all_checked = False

    def check(self, chunks: npt.NDArray[np.int64]) -> None:
        """Checks the checksums of those of `chunks` that were not checked before. Raises Damaged."""
        if self.all_checked:
            return
        for chunk in chunks[~self.checked[chunks]].tolist():
            if not chunk_is_good(self.image, self.index, chunk):
                raise self.damaged(f"the checksum of its chunk {chunk} does not match")
            self.checked[chunk] = True
        self.all_checked = bool(self.checked.all())

    def decode(self, chunk: int, out: Bytes) -> None:
        """Decodes a chunk into `out`, flat bytes of its size. The chunk must have been checked."""
        try:
            decode_chunk(self.image, self.index, chunk, self._storage, out)
        except BadShard as error:
            raise self.damaged(str(error)) from None

    def damaged(self, why: str) -> Damaged:
        return Damaged(f"{self._location}: shard {self.path} is damaged: {why}; {mend(self._location)}", [self.path])
