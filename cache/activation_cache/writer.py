"""Writing a cache: whole shards in the background, each entered in the journal, and the commit record last.

While the caller computes the next samples, a thread converts, compresses and writes the last full shard. A writer
that is killed loses the shards in memory and nothing else; the next one with the same key goes on behind the last
shard that reached the disk. Until the commit there is not even a Zarr group, so no reader of any kind can take an
unfinished cache for a finished one.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from . import key as keys
from .errors import AlreadyCommitted, DoesNotFit, FormatError, InvalidSamples, NotCommitted, Stale
from .key import Json, Key
from .layout import COMMIT, PLAN, RECORD, Grid, Plan, SplitSpec, Storage, grid, journal_path, settled
from .quantise import Calibration, first_not_finite, quantise, to_bfloat16
from .record import Commit, Entry, create_plan, finished_shards, read_plan, sha256, shard_file
from .shard import encode
from .sides import side_files
from .store import Store, open_store

Array = npt.NDArray[Any]


def create(
    location: str | Path | Store,
    key: Key,
    splits: Sequence[SplitSpec],
    storage: Storage,
    *,
    calibration: Calibration | Callable[[], Calibration] | None = None,
    replace: bool = False,
    rank: int = 0,
    world_size: int = 1,
    reserve: int = 0,
    threads: int = 1,
) -> CacheWriter:
    """A writer for the cache at `location`: a new one, or one that goes on with an unfinished cache of the same key.

    An unfinished cache is continued as it was planned: its codec, shard sizes and calibration stay (a callable
    `calibration` is not called then). `replace` removes whatever cache lies there first. With `world_size` ranks,
    each writes its own shards: rank 0 calls first, and after a barrier the others; only rank 0 may replace, and only
    rank 0 commits, after all have closed their writers. `reserve`: bytes of the disk to leave free.

    Raises AlreadyCommitted over a finished cache, Stale over an unfinished one of another key or other splits, Locked
    while another process writes it, FormatError for a key that make_key did not make, or for uint8 without calibration.
    """
    if key.get("format") != keys.FORMAT or key.get("dtype") != storage.dtype:
        raise FormatError("the key has no `format` and `dtype` that fit this storage; make it with make_key")
    if not 0 <= rank < world_size:
        raise FormatError(f"rank {rank} is not one of {world_size} ranks, counted from 0")
    store = open_store(location)
    release = store.lock(rank, world_size)
    try:
        if replace and rank == 0:
            _wipe(store)
        elif store.size(COMMIT) is not None:
            raise AlreadyCommitted(f"{store.location} holds a finished cache; open it, or replace it explicitly")
        splits = tuple(settled(spec, storage) for spec in splits)
        plan = read_plan(store)
        if plan is None:
            scales = calibration() if callable(calibration) else calibration
            if (storage.dtype == "uint8") != (scales is not None):
                raise FormatError("uint8 is stored with a calibration (see `calibrate`), the other dtypes without one")
            plan = Plan(key, storage, splits, scales)
            _check_calibration(plan)
            if not create_plan(store, plan):  # another writer was faster, on a store that knows no locks
                plan = read_plan(store)
        else:
            if world_size == 1:
                _sweep(store)
        assert plan is not None
        _check_same(plan, key, splits, store.location)
        return CacheWriter(store, plan, release, rank, world_size, reserve, threads)
    except BaseException:
        release()
        raise


def _wipe(store: Store) -> None:
    store.delete(COMMIT)  # first, so that a half-removed cache is not taken for a whole one
    for path, _ in list(store.list()):
        if not path.startswith(f"{RECORD}/lock") and path != PLAN:
            store.delete(path)
    store.delete(PLAN)
    store.clear()


def remove(location: str | Path | Store) -> None:
    """Removes whatever cache lies at a location, with its directory. Raises Locked while it is being written."""
    store = open_store(location)
    if next(store.list(), None) is None:
        return
    release = store.lock(0, 1)
    try:
        _wipe(store)
        for path, _ in list(store.list()):  # the locks
            store.delete(path)
        store.clear()
    finally:
        release()


def _sweep(store: Store) -> None:
    """Removes what a killed writer left half-written."""
    for path, _ in list(store.list()):
        if path.endswith(".tmp"):
            store.delete(path)


def _check_calibration(plan: Plan) -> None:
    if plan.calibration is None:
        return
    for spec in plan.splits:
        axis, channels = plan.calibration.axis, len(plan.calibration.scale)
        if not 0 <= axis < len(spec.shape) or spec.shape[axis] != channels:
            raise FormatError(
                f"the calibration has {channels} channels on axis {axis}, and split {spec.name!r} shape {spec.shape}"
            )


def _check_same(plan: Plan, key: Mapping[str, Json], splits: Sequence[SplitSpec], location: str) -> None:
    different = keys.differences(plan.key, key)

    def facts(spec: SplitSpec) -> Json:
        return [spec.samples, list(spec.shape), dict(spec.labels), spec.views, spec.longest]

    old, new = {s.name: facts(s) for s in plan.splits}, {s.name: facts(s) for s in splits}
    different.update({f"split {name}": pair for name, pair in keys.differences(old, new).items()})
    if different:
        raise Stale(
            f"{location} holds an unfinished cache of something else: {keys.describe(different)}; "
            "replace it explicitly, or choose another place",
            different,
        )


@dataclass
class _Open:
    """A shard being filled: rows in `buffer`, raw bytes that `dtype` says how to read."""

    shard: int
    samples: range
    buffer: npt.NDArray[np.uint8]
    dtype: np.dtype[Any]
    rows: int = 0
    ids: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    labels: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class _Track:
    """One view of one split: which of this rank's shards are still to come, and the one being filled."""

    spec: SplitSpec
    view: int
    grid: Grid
    pending: list[int]
    seen: set[str]
    open: _Open | None = None


class CacheWriter:
    """Writes the samples of a cache in order. Make one with `create`; use it as a context manager.

    Leaving the context without `commit` keeps the finished shards for the next writer. Not to be shared by threads.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        release: Callable[[], None],
        rank: int,
        world_size: int,
        reserve: int,
        threads: int,
    ) -> None:
        self._store, self._plan, self._release = store, plan, release
        self._rank, self._world_size, self._reserve = rank, world_size, reserve
        self._closed = False
        self._tracks: dict[tuple[str, int], _Track] = {}
        self._saturated: dict[str, int] = {}
        for spec in plan.splits:
            g = grid(spec, plan.storage)
            mine = range(rank * g.shards // world_size, (rank + 1) * g.shards // world_size)
            for view in range(spec.views):
                finished = finished_shards(store, plan, spec, view)
                pending = [shard for shard in mine if shard not in finished]
                before = sum(entry.saturated for entry in finished.values())
                self._saturated[spec.name] = self._saturated.get(spec.name, 0) + before
                seen = {name for entry in finished.values() for name in entry.ids}
                self._tracks[spec.name, view] = _Track(spec, view, g, pending, seen)
        self._jobs: list[Future[tuple[str, int]]] = []
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="cache-writer")
        # One buffer to fill while each thread empties another; they are made when first needed and then reused.
        self._buffers: queue.Queue[npt.NDArray[np.uint8] | None] = queue.Queue()
        for _ in range(threads + 1):
            self._buffers.put(None)

    @property
    def key(self) -> Key:
        """What the cache is made from."""
        return dict(self._plan.key)

    def tracks(self) -> list[tuple[str, int]]:
        """(split, view) of everything that is to be written, in order."""
        return list(self._tracks)

    @property
    def calibration(self) -> Calibration | None:
        """The calibration that is in use: of an unfinished cache that is continued, the one it began with."""
        return self._plan.calibration

    @property
    def saturated(self) -> dict[str, int]:
        """Split -> how many numbers lay outside the calibrated range, in the shards that are finished; for uint8."""
        self._wait()
        return dict(self._saturated)

    def pending(self, split: str, view: int = 0) -> list[range]:
        """The samples this rank has still to append, as ranges in the order in which `append` expects them."""
        track = self._track(split, view)
        ranges: list[range] = []
        start = track.open.samples.start + len(track.open.ids) if track.open else None
        for shard in ([track.open.shard] if track.open else []) + track.pending:
            samples = track.grid.shard_range(shard)
            if start is not None:
                samples, start = range(start, samples.stop), None
            if ranges and ranges[-1].stop == samples.start:
                ranges[-1] = range(ranges[-1].start, samples.stop)
            else:
                ranges.append(samples)
        return ranges

    def done(self, split: str, view: int = 0) -> int:
        """Samples of this split's view that need not be appended any more: by one rank, writing goes on there."""
        track = self._track(split, view)
        return track.spec.samples - sum(map(len, self.pending(split, view)))

    def append(
        self,
        split: str,
        values: Array | Sequence[Array],
        ids: Sequence[str],
        labels: Mapping[str, Any] | None = None,
        view: int = 0,
    ) -> None:
        """The next samples of `pending(split, view)`.

        values   array (B, *shape), or for ragged samples a sequence of B arrays: floating point, or already as stored
                 (uint8 after `quantise`, bfloat16's bits as uint16). Copied before this returns.
        ids      B names, each once in a split; the same names in the same order for every view.
        labels   name -> B numbers, or B sequences for a ragged label; for view 0, each label of the split.

        Raises InvalidSamples for what cannot be stored faithfully, and whatever an earlier shard met on its way to
        disk (DoesNotFit, OSError).
        """
        self._raise_failures()
        track = self._track(split, view)
        rows = self._check(track, values, ids, labels or {})
        at = 0
        while at < len(ids):
            if track.open is None:
                self._open_next(track, rows[0].dtype if isinstance(rows, list) else rows.dtype)
            filling = track.open
            assert filling is not None
            take = min(len(ids) - at, len(filling.samples) - len(filling.ids))
            _fill(track, filling, rows[at : at + take])
            filling.ids += ids[at : at + take]
            if view == 0:
                for name, dtype in track.spec.labels.items():
                    kept = (labels or {})[name][at : at + take]
                    filling.labels.setdefault(name, []).extend(_plain(kept, dtype))
            at += take
            if len(filling.ids) == len(filling.samples):
                track.open = None
                self._jobs.append(self._pool.submit(self._finish, track, filling))

    def commit(self) -> None:
        """Waits for the shards on their way, writes the metadata and last of all the commit record; then closes.

        With several ranks: called by rank 0, when all others have closed their writers. Raises NotCommitted if
        samples are missing, and says which.
        """
        if self._closed:
            raise NotCommitted(f"the writer of {self._store.location} is closed")
        self._wait()
        if self._rank != 0:
            raise NotCommitted(f"rank {self._rank} tried to commit {self._store.location}: close it, rank 0 commits")
        entries: dict[tuple[str, int], list[Entry]] = {}
        for (split, view), track in self._tracks.items():
            found = finished_shards(self._store, self._plan, track.spec, view)
            missing = [track.grid.shard_range(s) for s in range(track.grid.shards) if s not in found]
            if missing:
                ranges = ", ".join(f"{r.start} to {r.stop - 1}" for r in missing[:5]) + ("…" if missing[5:] else "")
                raise NotCommitted(
                    f"{self._store.location} cannot be committed: split {split!r}, view {view} lacks samples {ranges}; "
                    "append them first"
                )
            entries[split, view] = [found[shard] for shard in range(track.grid.shards)]
            if [e.ids for e in entries[split, view]] != [e.ids for e in entries[split, 0]]:
                raise InvalidSamples(f"split {split!r}: view {view} has other ids, or another order, than view 0")
        _sweep(self._store)
        sides = side_files(self._plan, entries)
        for path, data in sides.items():
            self._store.write(path, [data])
        files = {path: (len(data), sha256(data)) for path, data in sides.items()}
        for (split, view), shards in entries.items():
            for number, entry in enumerate(shards):
                files[shard_file(self._plan, self._tracks[split, view].spec, view, number)] = (entry.size, entry.seal)
                path = journal_path(split, view, number)
                data = entry.to_bytes(self._plan, split, view, number)
                files[path] = (len(data), sha256(data))
        plan = self._store.read(PLAN)
        files[PLAN] = (len(plan), sha256(plan))
        if not self._store.create(COMMIT, Commit(self._plan, files).to_bytes()):
            raise AlreadyCommitted(f"{self._store.location} was committed by another process meanwhile")
        self.close()

    def close(self) -> None:
        """Waits for the shards on their way, and lets go of the cache; what is not in a whole shard is given up."""
        if not self._closed:
            self._closed = True
            self._pool.shutdown(wait=True)
            self._release()
            self._raise_failures()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:
            if error is None:  # otherwise the first error is the one to be told
                raise

    def _track(self, split: str, view: int) -> _Track:
        spec = self._plan.split(split)
        if not 0 <= view < spec.views:
            raise InvalidSamples(f"split {split!r} has {spec.views} view(s), counted from 0; there is no view {view}")
        return self._tracks[split, view]

    def _check(
        self, track: _Track, values: Array | Sequence[Array], ids: Sequence[str], labels: Mapping[str, Any]
    ) -> Array | list[Array]:
        """The samples as rows that can be copied into a shard, once everything about them is in order."""
        spec, name = track.spec, f"split {track.spec.name!r}, view {track.view}"
        if self._closed:
            raise InvalidSamples(f"{name}: the writer is closed")
        left = sum(map(len, self.pending(spec.name, track.view)))
        if len(ids) > left:
            raise InvalidSamples(f"{name}: {len(ids)} samples were appended, and only {left} are still to come")
        wanted = set(spec.labels) if track.view == 0 else set()
        if (set(labels) != wanted and track.view == 0) or not set(labels) <= set(spec.labels):
            raise InvalidSamples(f"{name}: labels {sorted(labels)} were given, {sorted(spec.labels)} are wanted")
        for what, given in (("values", values), *labels.items()):
            if len(given) != len(ids):
                raise InvalidSamples(f"{name}: {len(ids)} ids were given, and {len(given)} {what}")
        for one in ids:
            if one in track.seen:
                raise InvalidSamples(f"{name}: the id {one!r} was appended before; is the position right?")
            track.seen.add(one)
        rows: Array | list[Array]
        if track.grid.ragged_axis is None:
            rows = np.asarray(values)
            if rows.shape[1:] != spec.shape:
                raise InvalidSamples(f"{name}: samples have shape {spec.shape}, got {rows.shape[1:]}")
            dtypes = {rows.dtype}
        else:
            rows = []
            for one, value in zip(ids, values, strict=True):
                array = np.asarray(value)
                fits = array.ndim == len(spec.shape) and all(
                    have == want if want is not None else have <= (spec.longest or 0)
                    for have, want in zip(array.shape, spec.shape, strict=True)
                )
                if not fits:
                    raise InvalidSamples(
                        f"{name}: sample {one!r} has shape {array.shape}; planned is {spec.shape} with at most "
                        f"{spec.longest} on the ragged axis"
                    )
                rows.append(np.moveaxis(array, track.grid.ragged_axis, 0))
            dtypes = {row.dtype for row in rows}
        for dtype in dtypes:
            if dtype.kind != "f" and dtype != self._plan.storage.stored:
                raise InvalidSamples(f"{name}: {dtype} cannot be stored as {self._plan.storage.dtype}")
        return rows

    def _open_next(self, track: _Track, dtype: np.dtype[Any]) -> None:
        shard = track.pending.pop(0)
        buffer = self._buffers.get()
        storage = self._plan.storage
        # Converted in the background, not while the caller waits; except from float64, which nobody computes in.
        stage = dtype if dtype in (storage.stored, np.float16, np.float32) else np.dtype(np.float32)
        size = track.grid.shard_rows * int(np.prod(track.grid.row_shape, dtype=np.int64)) * stage.itemsize
        if buffer is None or len(buffer) < size:
            buffer = np.empty(size, np.uint8)
        track.open = _Open(shard, track.grid.shard_range(shard), buffer, stage)

    def _finish(self, track: _Track, filled: _Open) -> tuple[str, int]:
        """In a thread of the pool: converts, encodes and writes one shard, then its journal entry.

        Returns the split and how many numbers saturated.
        """
        try:
            storage, g = self._plan.storage, track.grid
            rows = _rows(track, filled, 0, filled.rows)
            saturated = 0
            if filled.dtype != storage.stored:
                stored = np.empty(rows.shape, storage.stored)
                if storage.dtype == "uint8":
                    assert self._plan.calibration is not None
                    saturated = quantise(rows, _for_rows(self._plan.calibration, g.ragged_axis), stored)
                elif storage.dtype == "bfloat16":
                    to_bfloat16(rows, stored)
                else:
                    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is refused below
                        np.copyto(stored, rows, casting="same_kind")
                rows = stored
            bad = first_not_finite(rows, storage.dtype)
            if bad is not None:
                at = bad if g.ragged_axis is None else int(np.searchsorted(np.cumsum(filled.lengths), bad, "right"))
                raise InvalidSamples(
                    f"split {track.spec.name!r}: sample {filled.ids[at]!r} has values not finite in {storage.dtype}"
                )
            encoded = encode(rows, storage, g.chunk_rows, g.chunks_per_shard)
            path = shard_file(self._plan, track.spec, track.view, filled.shard)
            self._check_room(path, encoded.size)
            self._store.write(path, encoded.parts)
            entry = Entry(encoded.size, encoded.seal, filled.ids, filled.lengths, filled.labels, saturated)
            split, view = track.spec.name, track.view
            content = entry.to_bytes(self._plan, split, view, filled.shard)
            self._store.write(journal_path(split, view, filled.shard), [content])
            return track.spec.name, saturated
        finally:
            self._buffers.put(filled.buffer)

    def _check_room(self, path: str, needed: int) -> None:
        free = self._store.free()
        if free is not None and free < needed + self._reserve:
            raise DoesNotFit(
                f"{self._store.location}: {path} takes {needed:,} bytes, and {free:,} are free, of which "
                f"{self._reserve:,} are to stay free; make room and write again, and it goes on from here",
                path,
                needed,
                free,
            )

    def _raise_failures(self) -> None:
        done = [job for job in self._jobs if job.done()]
        self._jobs = [job for job in self._jobs if not job.done()]
        for job in done:
            self._count(job)

    def _wait(self) -> None:
        while self._jobs:
            self._count(self._jobs.pop(0))

    def _count(self, job: Future[tuple[str, int]]) -> None:
        split, saturated = job.result()
        self._saturated[split] += saturated


def _rows(track: _Track, filling: _Open, start: int, stop: int) -> Array:
    """Rows [start, stop) of a shard's buffer, (rows, *row_shape)."""
    row = int(np.prod(track.grid.row_shape, dtype=np.int64))
    flat = filling.buffer.view(filling.dtype) if len(filling.buffer) % filling.dtype.itemsize == 0 else None
    if flat is None:
        usable = len(filling.buffer) // filling.dtype.itemsize * filling.dtype.itemsize
        flat = filling.buffer[:usable].view(filling.dtype)
    return flat[start * row : stop * row].reshape(stop - start, *track.grid.row_shape)


def _fill(track: _Track, filling: _Open, samples: Array | list[Array]) -> None:
    with np.errstate(over="ignore"):  # as below, in _finish
        for rows in [samples] if isinstance(samples, np.ndarray) else samples:
            np.copyto(_rows(track, filling, filling.rows, filling.rows + len(rows)), rows, casting="same_kind")
            filling.rows += len(rows)
            if not isinstance(samples, np.ndarray):
                filling.lengths.append(len(rows))


def _plain(values: Any, dtype: str) -> list[Any]:
    """Labels as plain numbers for the journal, exactly as `dtype` holds them. Raises InvalidSamples where it cannot."""

    def convert(value: Any, ndim: int) -> list[Any]:
        given = np.asarray(value)
        kept = given.astype(dtype.removesuffix("[]"))
        exact = kept.dtype.kind == "f" or np.array_equal(given, kept)  # floats may round, integers may not wrap
        if given.ndim != ndim or not exact:
            raise InvalidSamples(f"labels {given.ravel()[:8]}… of shape {given.shape} are not what {dtype} holds")
        plain: list[Any] = kept.tolist()
        return plain

    return [convert(value, 1) for value in values] if dtype.endswith("[]") else convert(values, 1)


def _for_rows(calibration: Calibration, ragged_axis: int | None) -> Calibration:
    """The calibration for rows: ragged samples lose one axis, and each of their steps is a row."""
    if ragged_axis is None:
        return calibration
    axis = calibration.axis - (calibration.axis > ragged_axis)
    return Calibration(axis, calibration.scale, calibration.offset)
