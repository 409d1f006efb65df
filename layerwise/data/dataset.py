"""What every dataset is: named splits of samples that can be read by index, in a given view.

A *view* is one random augmentation of a sample, numbered; view v of sample i is always the same. `None` is the
evaluation view (the centre crop, say). So a cache can hold views, a later stage can ask for a fresh one, and both
know which they have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from layerwise.data.read_ahead import read_ahead

IntArray = npt.NDArray[np.int64]

UNKNOWN = -100
"""The label of what has none: no loss and no probe counts it."""


class Split(ABC):
    """Samples of one purpose."""

    sample_shape: tuple[int | None, ...]
    """Shape of one sample's input. The last axis is None where samples differ in length, and are read one at a time."""
    lengths: IntArray | None = None
    """(N,) lengths of the samples along the last axis, where they differ."""
    ids: Sequence[str]
    """What each sample is called, for messages and caches."""
    labels: dict[str, IntArray]
    """Task to (N,) labels; empty where there are none."""

    @property
    def longest(self) -> int | None:
        """Length of the longest sample, where they differ."""
        return None if self.lengths is None else int(self.lengths.max(initial=0))

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def batch(self, indices: IntArray, view: int | None) -> Tensor:
        """(len(indices), *sample_shape) float32 inputs on the CPU."""

    def labels_of(self, indices: IntArray, view: int | None) -> dict[str, IntArray]:
        """Task to (len(indices),) labels, or (len(indices), positions) where each position has its own."""
        return {task: values[indices] for task, values in self.labels.items()}

    def read(
        self, batches: Sequence[IntArray], view: int | None, readers: int
    ) -> Iterator[tuple[Tensor, dict[str, IntArray]]]:
        """Inputs and labels of each of these batches of indices, in order, read a few ahead by so many threads."""
        yield from read_ahead(
            lambda indices: (self.batch(indices, view), self.labels_of(indices, view)), batches, readers
        )

    @abstractmethod
    def manifest(self) -> str:
        """sha256 over the contents: two splits of the same manifest give the same numbers."""


@dataclass(frozen=True)
class Splits:
    """All splits of a dataset."""

    train: Split
    """For the stages; augmented views."""
    validation: Split
    """Held out of `train`; tells when a module has converged."""
    probe: Split | None = None
    """Labelled samples that a linear classifier learns from."""
    test: Split | None = None
    """Labelled samples that it is judged on."""
    classes: dict[str, int] = field(default_factory=dict)
    """Task to number of classes."""
    notes: tuple[str, ...] = ()
    """What a reader of the results must know, such as `a subset of STL-10`."""

    def named(self) -> dict[str, Split]:
        every = {"train": self.train, "validation": self.validation, "probe": self.probe, "test": self.test}
        return {name: split for name, split in every.items() if split is not None}
