"""Datasets made of another dataset's samples: the labelled ones alone, or a fraction of all."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field, SerializeAsAny
from torch import Tensor

from layerwise.data.dataset import IntArray, Split, Splits
from layerwise.data.settings import DatasetSettings
from layerwise.errors import NotReady
from layerwise.progress import SILENT, Progress
from layerwise.seeding import numpy_generator
from layerwise.settings.base import Shape

HELD_OUT = 0.2  # of the labelled samples, as the paper holds out for its classifiers (appendix A.1)
FEWEST = 64  # samples of a split that a fraction keeps, where there are so many


class Labelled(DatasetSettings):
    """Train on the labelled samples alone: what the supervised methods see.

    The self-supervised methods train on `train`, labelled or not; the supervised ones on the samples that the linear
    probe learns from, in augmented views, with a fifth held out to tell when they have converged.
    """

    dataset: SerializeAsAny[DatasetSettings] = Field(description="the dataset that the samples are taken from")

    def heeds(self) -> frozenset[str]:
        return self.dataset.heeds()

    def expects(self) -> tuple[Shape, dict[str, int]] | None:
        return self.dataset.expects()

    def published_sizes(self) -> dict[str, int] | None:
        sizes = self.dataset.published_sizes()
        if sizes is None or "probe" not in sizes:
            return None
        held = int(sizes["probe"] * HELD_OUT)
        return {**sizes, "train": sizes["probe"] - held, "validation": held}

    def open(self, data_dir: Path | None, *, download: bool, seed: int, progress: Progress = SILENT) -> Splits:
        every = self.dataset.open(data_dir, download=download, seed=seed, progress=progress)
        labelled = every.probe
        if labelled is None or not every.classes:
            raise NotReady(
                f"the dataset {type(self.dataset).__name__} has no labelled samples to train on: choose a method that "
                "needs none (gim, cpc, dim)"
            )
        if None in labelled.sample_shape:  # whole recordings: training sees windows of them, and those have the labels
            return every
        order = _shuffled(len(labelled), "labelled")
        held = int(len(order) * HELD_OUT)
        train, validation = Part(labelled, order[held:]), Part(labelled, order[:held])
        return Splits(train, validation, labelled, every.test, every.classes, every.notes)


class Fraction(DatasetSettings):
    """The same fraction of every split, to try things out on."""

    dataset: SerializeAsAny[DatasetSettings] = Field(description="the dataset that the samples are taken from")
    share: float = Field(
        gt=0, le=1, description="of the samples of each split; no fewer than 64 where there are so many"
    )

    def heeds(self) -> frozenset[str]:
        return self.dataset.heeds()

    def expects(self) -> tuple[Shape, dict[str, int]] | None:
        return self.dataset.expects()

    def published_sizes(self) -> dict[str, int] | None:
        sizes = self.dataset.published_sizes()
        return None if sizes is None else {name: self._kept(size) for name, size in sizes.items()}

    def _kept(self, samples: int) -> int:
        return max(math.ceil(samples * self.share), min(samples, FEWEST))

    def open(self, data_dir: Path | None, *, download: bool, seed: int, progress: Progress = SILENT) -> Splits:
        every = self.dataset.open(data_dir, download=download, seed=seed, progress=progress)

        def part(split: Split, name: str) -> Split:
            return Part(split, np.sort(_shuffled(len(split), name)[: self._kept(len(split))]))

        parts = {name: part(split, name) for name, split in every.named().items()}
        note = "taken: " + ", ".join(
            f"{len(part)} of {len(every.named()[name])} {name} samples" for name, part in parts.items()
        )
        return Splits(**parts, classes=every.classes, notes=(*every.notes, note))


def _shuffled(count: int, purpose: str) -> IntArray:
    """The dataset's own order: the same for every seed of the training."""
    return numpy_generator(0, purpose).permutation(count)


class Part(Split):
    """Some samples of a split, in a given order."""

    def __init__(self, whole: Split, chosen: IntArray) -> None:
        self._whole, self._chosen = whole, chosen
        self.sample_shape = whole.sample_shape
        self.lengths = None if whole.lengths is None else whole.lengths[chosen]
        self.ids = [whole.ids[int(index)] for index in chosen]
        self.labels = {task: values[chosen] for task, values in whole.labels.items()}

    def batch(self, indices: IntArray, view: int | None) -> Tensor:
        return self._whole.batch(self._chosen[indices], view)

    def labels_of(self, indices: IntArray, view: int | None) -> dict[str, IntArray]:
        return self._whole.labels_of(self._chosen[indices], view)

    def read(
        self, batches: Sequence[IntArray], view: int | None, readers: int
    ) -> Iterator[tuple[Tensor, dict[str, IntArray]]]:
        yield from self._whole.read([self._chosen[indices] for indices in batches], view, readers)

    def manifest(self) -> str:
        return hashlib.sha256(self._whole.manifest().encode() + self._chosen.tobytes()).hexdigest()
