"""When not all outputs of a module fit the disk, or are to be renewed: a window that rolls as the next stage trains.

The window holds as many training samples as the budget allows, at most all. After every `epochs` epochs its oldest
slot makes room for other samples, in augmentations that were never seen, computed while the stage goes on training on
the rest. The splits that are judged on (validation, probe, test) are always stored whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

import activation_cache
from activation_cache import CacheWriter, Filler, JoinedSplits, Window
from layerwise.errors import NotReady, StoppedEarly
from layerwise.files.records import WINDOW, read_record
from layerwise.files.storage import remove_file, write_json
from layerwise.files.window import Rolling, note_of, rolling_at
from layerwise.pipeline.setup import Setup
from layerwise.training.feeds import (
    Batch,
    CacheFeed,
    DatasetFeed,
    Feed,
    RecomputeFeed,
    SampleShape,
    batch_of,
    require_full_batch,
)

Fill: TypeAlias = Callable[[CacheWriter, npt.NDArray[np.int64], npt.NDArray[np.int64]], None]
SLOTS = 4  # a fifth of the budget is for the one that is being filled


def least_slot(batch_size: int) -> int:
    """Samples of a slot, so that the window holds a batch."""
    return -(-batch_size // SLOTS)


def rolls(setup: Setup, number: int) -> bool:
    """Whether the cache of module `number` was written without its training samples: a window holds some of them."""
    return window_note(setup, number).exists()


def read_rolling(setup: Setup, number: int) -> Rolling | None:
    """How the window on the outputs of module `number` rolls; None where there is none, or where it has to be settled
    again: for another budget or `renew`, or because it holds less than a batch.
    """
    cache, least = setup.recipe.cache, setup.recipe.training.batch_size
    return rolling_at(window_note(setup, number), cache.budget, cache.renew, cache.window_epochs, least)


def noted(setup: Setup, number: int) -> Rolling | None:
    """As `read_rolling`, also where the window was settled for another budget."""
    known, cache = read_record(window_note(setup, number), WINDOW), setup.recipe.cache
    budget, least = None if known is None else known["budget"], setup.recipe.training.batch_size
    return rolling_at(window_note(setup, number), budget, cache.renew, cache.window_epochs, least)


def settle_rolling(setup: Setup, number: int, rolling: Rolling | None) -> None:
    """Note how a cache rolls, or that it does not, before it is written. Slots of another size are removed: their
    bytes are needed.
    """
    note, window = window_note(setup, number), setup.run.window(number)
    if (rolling is None or not rolling.same_size(read_record(note, WINDOW))) and (
        left := activation_cache.remove_window(window)
    ):
        setup.progress.note(f"left in {window}, because no cache wrote it: {', '.join(left)}")
    if rolling is None:
        remove_file(note)
    else:
        sizes = {"slots": rolling.slots, "slot_samples": rolling.slot_samples}
        settled_for = {"budget": setup.recipe.cache.budget, "renew": setup.recipe.cache.renew}
        write_json(note, {**settled_for, **sizes})


def window_note(setup: Setup, number: int) -> Path:
    """The file that says how the window on module `number`'s outputs rolls, if there is one."""
    return note_of(setup.run.caches, number)


def mend_window(setup: Setup, number: int) -> list[str]:
    """Read every byte of the window on module `number`'s outputs, and remove each slot that is damaged: the stage that
    needs it computes it again. Of a slot that was only begun, what is whole stays.

    Returns the names of the slots that were removed.
    """
    removed = []
    for slot in sorted(setup.run.window(number).glob("slot-*")):
        try:
            state = activation_cache.inspect(slot).state
            if state == "partial":
                activation_cache.repair(slot).close()
            if state in ("partial", "absent"):
                continue
            whole = activation_cache.verify(slot).ok
        except (activation_cache.Damaged, activation_cache.FormatError, activation_cache.NotCommitted):
            whole = False
        if not whole:
            activation_cache.remove(slot)
            removed.append(slot.name)
    return removed


class WindowFeed(Feed):
    """Training batches from a rolling window; the other splits from a cache that holds them whole."""

    def __init__(
        self,
        fixed: CacheFeed,
        window: Window,
        fill: Fill,
        rolling: Rolling,
        batch_size: int,
        seed: int,
        device: torch.device,
        errors: Callable[[], AbstractContextManager[None]],
        reserve: int,
        slot_budget: int | None,
    ) -> None:
        self._fixed, self._epochs, self._batch_size, self._seed = fixed, rolling.epochs, batch_size, seed
        self._device, self._errors = device, errors
        self._filler = Filler(window, fill, reserve, slot_budget)
        self._turn = -1
        self._joined: JoinedSplits | None = None
        self.samples = window.samples
        require_full_batch(self.samples, batch_size)

    def splits(self) -> Sequence[str]:
        return ["train", *self._fixed.splits()]

    def shuffled(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        with self._errors():
            turn = epoch // self._epochs
            if self._joined is None or turn != self._turn:
                self._joined = None  # lets go of the slot that is about to be evicted
                self._joined, self._turn = self._filler.turn(turn), turn
            found = self._joined.batches(self._batch_size, seed=self._seed, epoch=epoch, start=start)
            yield from map(batch_of(self._joined, self._device), found)

    def in_order(self, split: str, view: int | None = None, start: int = 0) -> Iterator[Batch]:
        if split == "train":
            raise NotReady("the window holds a part of the training samples only, and no order of them")
        yield from self._fixed.in_order(split, view, start)

    def samples_of(self, split: str) -> int:
        return self._fixed.samples_of(split)

    def shape(self, split: str) -> SampleShape:
        return self._fixed.shape("validation")

    def close(self) -> None:
        self._filler.close()


def filling(setup: Setup, source: DatasetFeed, outputs: RecomputeFeed, stored: Callable[[torch.Tensor], Any]) -> Fill:
    """What writes samples of a window: `outputs` passes the dataset `source` through all frozen modules."""

    def fill(writer: CacheWriter, samples: npt.NDArray[np.int64], views: npt.NDArray[np.int64]) -> None:
        for view in np.unique(views).tolist():  # they come in ascending order
            for batch in source.chosen("train", samples[views == view], view):
                found = outputs.encode(batch)
                labels = {task: values.numpy() for task, values in found.labels.items() if values.ndim == 1}
                names = [f"{name}/{view}" for name in found.ids]  # a sample may come twice, in two augmentations
                writer.append("train", stored(found.inputs), names, labels)
                if setup.should_stop():
                    raise StoppedEarly("stopped while filling the window; the same command resumes")

    return fill
