"""A rolling window: when all samples do not fit, as many as do, and others in their stead as training goes on.

The window is a row of slots, each a small cache of its own. Slot s holds the next samples of an endless stream: all
samples in random order with their first augmentation, then all in another order with their second, and so on. In turn
t the window is made of slots t to t + slots - 1, while slot t + slots is being written; then slot t is evicted and
the new one joins. What is read is a function of (seed, turn) alone, so it does not matter when a slot was written, and
nothing is ever changed in place: every slot is committed, checked and keyed like any cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import FormatError
from .format.canonical import Json
from .format.key import Key, make_key
from .format.layout import SplitSpec, Storage
from .format.quantise import Calibration
from .reading.batches import Allocate, CachedBatch, iterate
from .reading.cache import KeepsBuffers, Split, open_cache
from .reading.order import Indices, epoch_order, rank_slice
from .reading.sources import JoinedSource
from .store.base import LocalStore
from .verify import inspect
from .writing.creation import create, remove
from .writing.writer import CacheWriter

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Window:
    """A rolling window over a split, in a directory of its own.

    spec           the whole split: one view, samples of one shape
    key            what determines the values of any sample in any augmentation, from make_key
    slots          how many make up the window; one more is on disk while it is filled
    slot_samples   samples of each
    """

    location: Path
    key: Key
    spec: SplitSpec
    storage: Storage
    slots: int
    slot_samples: int
    seed: int
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if None in self.spec.shape or self.spec.views != 1:
            raise FormatError("a rolling window takes samples of one shape, and no more than one view: it renews them")
        if self.slots < 1 or not 1 <= self.slot_samples <= self.spec.samples:
            raise FormatError(f"{self.slots} slots of {self.slot_samples} are no window on {self.spec.samples} samples")

    @property
    def samples(self) -> int:
        """In the window at any time."""
        return self.slots * self.slot_samples

    def contents(self, slot: int) -> tuple[Indices, Indices]:
        """(sample numbers, augmentation numbers) of a slot, each int64 of shape (slot_samples,)."""
        positions = np.arange(slot * self.slot_samples, (slot + 1) * self.slot_samples)
        rounds, places = np.divmod(positions, self.spec.samples)
        samples = np.empty(len(positions), np.int64)
        for number in np.unique(rounds).tolist():
            these = rounds == number
            samples[these] = epoch_order(self.spec.samples, self.seed, number)[places[these]]
        return samples, rounds.astype(np.int64)

    def folder(self, slot: int) -> Path:
        return self.location / _slot_name(slot)

    def slot_key(self, slot: int) -> Key:
        fields: dict[str, Json] = {name: value for name, value in self.key.items() if name not in ("format", "dtype")}
        which: dict[str, Json] = {"number": slot, "samples": self.slot_samples, "seed": self.seed}
        return make_key({**fields, "slot": which}, self.storage)

    def has(self, slot: int) -> bool:
        """Whether a slot is written and committed."""
        return inspect(self.folder(slot), self.slot_key(slot)).state == "valid"

    def writer(self, slot: int, reserve: int = 0, budget: int | None = None) -> CacheWriter:
        """A writer for a slot: its one split is that of `spec`, its samples those of `contents` in that order.

        `reserve`, `budget`: bytes, see `create`; the budget is that of this slot alone.
        """
        spec = replace(self.spec, samples=self.slot_samples, shard_samples=None, chunk_samples=None)
        stale = inspect(self.folder(slot), self.slot_key(slot)).state in ("stale", "damaged")
        return create(
            self.folder(slot),
            self.slot_key(slot),
            [spec],
            self.storage,
            calibration=self.calibration,
            replace=stale,
            reserve=reserve,
            budget=budget,
        )

    def live(self, turn: int) -> range:
        """The slots of a turn."""
        return range(turn, turn + self.slots)

    def evict(self, turn: int, own: Collection[int] = ()) -> None:
        """Removes the slots that a turn neither reads nor fills, and those made from something else: beside its own
        they would take more than the window may. Whoever still reads one keeps what is mapped.

        `own`: slots that the caller has written itself, or is writing; they are not looked into. Files that no cache
        wrote stay, as `remove` says. Raises Locked while another process writes one of the slots.
        """
        for slot, folder in slot_folders(self.location).items():
            wanted = turn <= slot <= turn + self.slots
            if not wanted or (slot not in own and inspect(folder, self.slot_key(slot)).state == "stale"):
                with suppress(FormatError):  # somebody's folder that has the name of a slot
                    remove(folder)

    def open(self, turn: int) -> JoinedSplits:
        """The samples of a turn. Raises what open_cache does if one of its slots is not there."""
        caches = [open_cache(self.folder(slot), self.slot_key(slot)) for slot in self.live(turn)]
        return JoinedSplits([cache.splits[self.spec.name] for cache in caches])


def slot_folders(location: Path) -> dict[int, Path]:
    """Slot -> folder, for each slot of the window in a directory; no links."""
    found = {}
    for folder in sorted(location.glob("slot-*")):
        number = folder.name.removeprefix("slot-")
        named = re.fullmatch(r"[0-9]{6,18}", number) and folder.name == _slot_name(int(number))  # not a copy of one
        if named and folder.is_dir() and not folder.is_symlink():
            found[int(number)] = folder
    return found


def remove_window(location: str | Path) -> list[str]:
    """Removes the rolling window in a directory: its slots, and the directory if that leaves it empty.

    Returns the files that are left in place since no cache wrote them, relative to the location. Raises Locked while
    a slot is being written.
    """
    location = Path(location)
    for folder in slot_folders(location).values():
        with suppress(FormatError):  # no cache: what it holds is listed below
            remove(folder)
    left = sorted(path for path, _ in LocalStore(location).list())
    if not left:
        with suppress(OSError):  # never made, or not empty: folders of somebody else
            location.rmdir()
    return left


def _slot_name(slot: int) -> str:
    return f"slot-{slot:06d}"


class JoinedSplits(KeepsBuffers):
    """Several splits, of one shape and storage, as one: their samples are counted through."""

    def __init__(self, parts: Sequence[Split]) -> None:
        super().__init__()
        self.parts = list(parts)
        self.samples = sum(part.samples for part in parts)

    @property
    def storage(self) -> Storage:
        return self.parts[0].storage

    @property
    def calibration(self) -> Calibration | None:
        return self.parts[0].calibration

    @property
    def shape(self) -> tuple[int | None, ...]:
        return self.parts[0].shape

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.parts[0].sample_shape

    @cached_property
    def ids(self) -> list[str]:
        return [name for part in self.parts for name in part.ids]

    @cached_property
    def labels(self) -> dict[str, Array | list[Array]]:
        joined: dict[str, Array | list[Array]] = {}
        for name in self.parts[0].labels:
            values = [part.labels[name] for part in self.parts]
            plain = isinstance(values[0], np.ndarray)
            joined[name] = np.concatenate(values) if plain else [value for part in values for value in part]
        return joined

    def source(self, view: int, plan: Sequence[Indices], pool: ThreadPoolExecutor | None = None) -> JoinedSource:
        starts = np.cumsum([0, *(part.samples for part in self.parts[:-1])])
        sources: list[Any] = []
        for start, part in zip(starts.tolist(), self.parts, strict=True):
            own = [i[(i >= start) & (i < start + part.samples)] - start for i in plan]
            sources.append(part.source(view, [i for i in own if len(i)], pool))
        return JoinedSource(sources, starts)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        threads: int | None = None,
        allocate: Allocate = np.empty,
    ) -> Iterator[CachedBatch]:
        """As Split.batches, over all parts in the order `epoch_order(samples, seed, epoch)`."""
        todo = rank_slice(epoch_order(self.samples, seed, epoch), batch_size, rank, world_size, drop_last, start)
        return iterate(self, todo, 0, threads, allocate)


class Filler:
    """Writes the slots that are missing, one after another, in a thread, while others are read.

    `fill(writer, samples, views)` appends the samples (numbers in the whole split, in the augmentations named) to the
    writer; it commits nothing, and is called once for each run of samples that a slot lacks. `reserve`: bytes of the
    disk to leave free; `slot_budget`: bytes that one slot may take, enforced while it is written (see `create`).
    """

    def __init__(
        self,
        window: Window,
        fill: Callable[[CacheWriter, Indices, Indices], None],
        reserve: int = 0,
        slot_budget: int | None = None,
    ) -> None:
        self._window, self._fill, self._reserve, self._slot_budget = window, fill, reserve, slot_budget
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cache-filler")
        self._jobs: dict[int, Any] = {}

    def turn(self, turn: int) -> JoinedSplits:
        """The samples of a turn: waits for its slots, evicts all others, and has the next slot begun.

        Raises whatever writing one of its slots met.
        """
        self._window.evict(turn, self._jobs)
        for slot in self._window.live(turn):
            self._begin(slot)
        for slot in self._window.live(turn):
            self._jobs[slot].result()
        opened = self._window.open(turn)
        self._begin(turn + self._window.slots)
        self._jobs = {slot: job for slot, job in self._jobs.items() if slot >= turn}
        return opened

    def close(self) -> None:
        """Waits for a slot that is being written; what is not begun is left."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Filler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, slot: int) -> None:
        if slot not in self._jobs:
            self._jobs[slot] = self._pool.submit(self._write, slot)

    def _write(self, slot: int) -> None:
        if self._window.has(slot):
            return
        samples, views = self._window.contents(slot)
        with self._window.writer(slot, self._reserve, self._slot_budget) as writer:
            for part in writer.pending(self._window.spec.name):
                these = slice(part.start, part.stop)
                self._fill(writer, samples[these], views[these])
            writer.commit()
