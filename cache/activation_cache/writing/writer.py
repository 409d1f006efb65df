"""Writing a cache: whole shards in the background, each entered in the journal, and the commit record last.

While the caller computes the next samples, a thread converts, compresses and writes the last full shard; without
threads, `append` does so itself, and only the disk works meanwhile. A writer that is killed loses the shards in memory
and nothing else; the next one with the same key goes on behind the last shard that reached the disk. Until the commit
there is not even a Zarr group, so no reader of any kind can take an unfinished cache for a finished one.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from activation_cache.errors import AlreadyCommitted, InvalidSamples, NotCommitted
from activation_cache.format.key import Key
from activation_cache.format.layout import COMMIT, PLAN, Plan, grid, journal_path
from activation_cache.format.quantise import Calibration, first_not_finite, quantise, to_bfloat16
from activation_cache.format.record import Commit, Entry, altered, finished_shards, plan_bytes, sha256, shard_file
from activation_cache.format.shard import encode
from activation_cache.store.base import Store, sweep

from .filling import Filling, Track
from .metadata import side_files
from .room import Room

Array = npt.NDArray[Any]
_Result = TypeVar("_Result")


class CacheWriter:
    """Writes the samples of a cache in order. Make one with `create`; use it as a context manager.

    Leaving the context without `commit` keeps the finished shards for the next writer. Not to be shared by threads.

    left   the files that `create(..., replace=True)` left in place, since no cache wrote them
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        release: Callable[[], None],
        rank: int,
        world_size: int,
        room: Room,
        threads: int,
        left: Sequence[str] = (),
    ) -> None:
        self._store, self._plan, self._hold = store, plan, _Hold(release)
        self._rank, self._world_size, self._room = rank, world_size, room
        self._closed = False
        self.left = tuple(left)
        self._tracks: dict[tuple[str, int], Track] = {}
        self._saturated: dict[str, int] = {}
        found = finished_shards(store, plan)
        for spec in plan.splits:
            g = grid(spec, plan.storage)
            mine = range(rank * g.shards // world_size, (rank + 1) * g.shards // world_size)
            for view in range(spec.views):
                finished = found[spec.name, view]
                pending = [shard for shard in mine if shard not in finished]
                before = sum(entry.saturated for entry in finished.values())
                self._saturated[spec.name] = self._saturated.get(spec.name, 0) + before
                seen = {name for entry in finished.values() for name in entry.ids}
                self._tracks[spec.name, view] = Track(spec, view, g, pending, seen)
        self._jobs: list[Future[tuple[str, int]]] = []
        self._inline = threads == 0
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="cache-writer")
        # One buffer to fill while each thread empties another; they are made when first needed and then reused.
        self._buffers: queue.Queue[npt.NDArray[np.uint8] | None] = queue.Queue()
        for _ in range(max(1, threads) + 1):
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
        return self._track(split, view).pending()

    def unfinished(self, world_size: int) -> list[int]:
        """Which of so many ranks (counted from 0) have a shard to write, of those that this writer waits for."""
        tracks = self._tracks.values()
        return sorted({-(-(shard + 1) * world_size // t.grid.shards) - 1 for t in tracks for shard in t.shards})

    def done(self, split: str, view: int = 0) -> int:
        """How many samples of this split's view need not be appended any more; after a repair not the first ones, as
        `pending` says.
        """
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

        Raises InvalidSamples for what cannot be stored faithfully (none of it is kept then, and the same ids may be
        appended again), and whatever an earlier shard met on its way to disk (DoesNotFit, OSError).
        """
        self._raise_failures()
        track, labels = self._track(split, view), labels or {}
        if self._closed:
            raise InvalidSamples(f"split {split!r}, view {view}: the writer is closed")
        checked = track.checked(values, ids, labels, self._plan.storage)
        at = 0
        while at < len(ids):
            filling = track.open or self._open_next(track, checked.dtype)
            part = slice(at, at + len(filling.samples) - len(filling.ids))
            filling.add(checked.rows[part], ids[part], {name: some[part] for name, some in checked.labels.items()})
            at += len(ids[part])
            if filling.whole:
                track.open = None
                self._jobs.append(self._send(track, filling))

    def commit(self) -> None:
        """Waits for the shards on their way, writes the metadata and last of all the commit record; then closes.

        With several ranks: called by rank 0, when all others have closed their writers. Raises NotCommitted if
        samples are missing, and says which; InvalidSamples if the views have different ids, or two ranks the same;
        DoesNotFit where the small files exceed the disk or the budget.
        """
        if self._closed:
            raise NotCommitted(f"the writer of {self._store.location} is closed")
        self._wait()
        if self._rank != 0:
            raise NotCommitted(f"rank {self._rank} tried to commit {self._store.location}: close it, rank 0 commits")
        entries: dict[tuple[str, int], list[Entry]] = {}
        finished = finished_shards(self._store, self._plan)
        for (split, view), track in self._tracks.items():
            found = finished[split, view]
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
            counts = Counter(name for entry in entries[split, view] for name in entry.ids)
            if twice := [name for name, count in counts.items() if count > 1]:
                raise InvalidSamples(f"split {split!r}, view {view}: two ranks appended the id {twice[0]!r}")
        sweep(self._store)
        sides = side_files(self._plan, entries)
        for path, data in sides.items():
            self._write(path, data)
        files = {path: (len(data), sha256(data)) for path, data in sides.items()}
        for (split, view), shards in entries.items():
            for number, entry in enumerate(shards):
                files[shard_file(self._plan, self._tracks[split, view].spec, view, number)] = (entry.size, entry.seal)
                path = journal_path(split, view, number)
                data = entry.to_bytes(self._plan, split, view, number)
                files[path] = (len(data), sha256(data))
        plan = plan_bytes(self._plan)  # what was meant, whatever became of the file
        if altered(self._store, PLAN, sha256(plan)):
            self._write(PLAN, plan)
        files[PLAN] = (len(plan), sha256(plan))
        record = Commit(self._plan, files).to_bytes()
        self._room.take(COMMIT, len(record))
        if not self._store.create(COMMIT, record):
            raise AlreadyCommitted(f"{self._store.location} was committed by another process meanwhile")
        self.close()

    def close(self) -> None:
        """Waits for the shards on their way, and lets go of the cache; what is not in a whole shard is given up.

        Where the wait is interrupted, shards that wait for a thread are given up too, and whatever is being written
        lets go of the cache when it is there: nobody else gets the lock before.
        """
        if self._closed:
            return
        try:
            self._closed = True
            self._pool.shutdown(wait=True)
        except BaseException:
            # Without threads of encoding, what is in the pool is half written, and has a file open.
            self._pool.shutdown(wait=False, cancel_futures=not self._inline)
            raise
        finally:
            self._hold.close()
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

    def _write(self, path: str, data: bytes) -> None:
        self._room.take(path, len(data))
        self._store.write(path, [data])

    def _track(self, split: str, view: int) -> Track:
        spec = self._plan.split(split)
        if not 0 <= view < spec.views:
            raise InvalidSamples(f"split {split!r} has no view {view}: its views are 0 to {spec.views - 1}")
        return self._tracks[split, view]

    def _open_next(self, track: Track, dtype: np.dtype[Any]) -> Filling:
        # Where no shard is on its way, none brings a buffer back: each view or split that is open has one.
        waits = any(not job.done() for job in self._jobs)
        buffer = None if self._buffers.empty() and not waits else self._buffers.get()
        shard = track.shards.pop(0)
        size = track.grid.shard_rows * int(np.prod(track.grid.row_shape, dtype=np.int64)) * dtype.itemsize
        if buffer is None or len(buffer) < size:
            buffer = np.empty(size, np.uint8)
        track.open = Filling(shard, track.grid.shard_range(shard), track.grid, buffer, dtype)
        return track.open

    def _send(self, track: Track, filled: Filling) -> Future[tuple[str, int]]:
        """A full shard on its way to the disk; (split, how many numbers saturated) once it is there."""
        if not self._inline:
            return self._hold.until_done(self._pool.submit(lambda: self._start(track, filled)()))
        try:
            finish = self._start(track, filled)
        except Exception as error:  # raised by the next append, like the error of a thread
            failed: Future[tuple[str, int]] = Future()
            failed.set_exception(error)
            return failed
        try:
            return self._hold.until_done(self._pool.submit(finish))
        except BaseException:
            finish()
            raise

    def _start(self, track: Track, filled: Filling) -> Callable[[], tuple[str, int]]:
        """Converts and encodes a shard and begins to write it; the rest, its journal entry too, in what it returns."""
        try:
            rows, saturated = self._stored(track, filled)
            encoded = encode(rows, self._plan.storage, track.grid.chunk_rows, track.grid.chunks_per_shard)
            path = shard_file(self._plan, track.spec, track.view, filled.shard)
            self._room.take(path, encoded.size)
            finish_shard = self._store.begin(path, encoded.parts)
        except BaseException:
            self._buffers.put(filled.buffer)
            raise

        def finish() -> tuple[str, int]:
            try:
                finish_shard()
                entry = Entry(encoded.size, encoded.seal, filled.ids, filled.lengths, filled.labels, saturated)
                split, view = track.spec.name, track.view
                content = entry.to_bytes(self._plan, split, view, filled.shard)
                self._write(journal_path(split, view, filled.shard), content)
                return split, saturated
            finally:
                self._buffers.put(filled.buffer)

        return finish

    def _stored(self, track: Track, filled: Filling) -> tuple[Array, int]:
        """A shard's rows in the dtype in which they are stored, and how many of their numbers saturated."""
        storage, rows, saturated = self._plan.storage, filled.rows(), 0
        if storage.dtype == "uint8" and filled.dtype != np.uint8:
            self._require_finite(track, filled, rows, str(filled.dtype))  # `quantise` knows no names
        if filled.dtype != storage.stored:
            stored = np.empty(rows.shape, storage.stored)
            if storage.dtype == "uint8":
                assert self._plan.calibration is not None
                saturated = quantise(rows, _for_rows(self._plan.calibration, track.grid.ragged_axis), stored)
            elif storage.dtype == "bfloat16":
                to_bfloat16(rows, stored)
            else:
                with np.errstate(over="ignore"):  # as in Filling.add
                    np.copyto(stored, rows, casting="same_kind")
            rows = stored
        self._require_finite(track, filled, rows, storage.dtype)
        return rows, saturated

    def _require_finite(self, track: Track, filled: Filling, rows: Array, dtype: str) -> None:
        bad = first_not_finite(rows, dtype)
        if bad is not None:
            raise InvalidSamples(
                f"split {track.spec.name!r}: sample {filled.sample_of_row(bad)!r} has values not finite in {dtype}"
            )

    def _raise_failures(self) -> None:
        finished = [job.done() for job in self._jobs]  # asked once: a job may finish meanwhile
        done = [job for job, is_done in zip(self._jobs, finished, strict=True) if is_done]
        self._jobs = [job for job, is_done in zip(self._jobs, finished, strict=True) if not is_done]
        for job in done:
            self._count(job)

    def _wait(self) -> None:
        while self._jobs:
            self._jobs[0].exception()  # waits; interrupted, it loses no job
            self._count(self._jobs.pop(0))

    def _count(self, job: Future[tuple[str, int]]) -> None:
        split, saturated = job.result()
        self._saturated[split] += saturated


class _Hold:
    """The lock of a cache, which is released when the writer is closed and the last job is done, whichever is later."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release, self._users, self._counting = release, 1, threading.Lock()  # the writer is the first user

    def until_done(self, job: Future[_Result]) -> Future[_Result]:
        """Keeps the lock until `job` is done or cancelled; returns it."""
        with self._counting:
            self._users += 1
        job.add_done_callback(lambda _: self.close())
        return job

    def close(self) -> None:
        """Called once by each user."""
        with self._counting:
            self._users -= 1
            last = self._users == 0
        if last:
            self._release()


def _for_rows(calibration: Calibration, ragged_axis: int | None) -> Calibration:
    """The calibration for rows: ragged samples lose one axis, and each of their steps is a row."""
    if ragged_axis is None:
        return calibration
    axis = calibration.axis - (calibration.axis > ragged_axis)
    return replace(calibration, axis=axis)
