"""Any map-style dataset as a split: of torch, torchvision, Hugging Face, or a list.

A dataset of somebody else's draws its augmentations from the global generators of torch, numpy and Python. Each sample
gets its own: they are seeded by the recipe's seed, the sample's number and the view before it is read, and restored
afterwards. So a view is the same whoever reads it and whenever, and a resumed training sees what it would have seen.
Other threads share these generators, so samples are read by the thread that asks for them, or by worker processes.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from layerwise.data.dataset import IntArray, Split
from layerwise.errors import DamagedData, UsageError
from layerwise.seeding import derive_seed

Read: TypeAlias = Callable[[Any], tuple[Any, Mapping[str, int]]]
LOOKED_AT = 64  # samples whose content is part of the identity, spread over the dataset


class Dataset(Protocol):
    """What torch calls a map-style dataset: samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class MappedSplit(Split):
    """Samples of a map-style dataset.

    Args:
        dataset: gives samples as `read` takes them: by default an input alone, (input, label), or a dict with one
            input (a tensor, an array or a picture) and its labels (whole numbers).
        name: of the split, for messages and in the seeds of its samples.
        workers: processes that read; 0: the thread that asks.
        read: from a sample to its input and its labels by task.
    """

    def __init__(self, dataset: Dataset, name: str, seed: int, *, workers: int = 0, read: Read | None = None) -> None:
        self._dataset, self._name, self._seed, self._workers = dataset, name, seed, workers
        self._read = read or input_and_labels
        self.ids = Numbered(name, len(dataset))
        if not len(dataset):
            raise UsageError(f"the {name} dataset ({type(dataset).__name__}) is empty: give it at least one sample")
        first, labels = self._sample(0, None)
        self.sample_shape = tuple(first.shape)
        self.tasks = tuple(labels)

    @property
    def labels(self) -> dict[str, IntArray]:  # type: ignore[override]
        """Task to (N,) labels: reads every sample, unless the dataset keeps its labels apart, as torchvision's do."""
        if not self.tasks:
            return {}
        for attribute in ("targets", "labels"):
            apart = getattr(self._dataset, attribute, None)
            if len(self.tasks) == 1 and apart is not None and np.ndim(apart) == 1 and len(apart) == len(self):
                return {self.tasks[0]: np.asarray(apart).astype(np.int64)}
        found = [self._sample(index, None)[1] for index in range(len(self))]
        return {task: np.array([labels[task] for labels in found], np.int64) for task in self.tasks}

    def batch(self, indices: IntArray, view: int | None) -> Tensor:
        return self._batch(indices, view)[0]

    def labels_of(self, indices: IntArray, view: int | None) -> dict[str, IntArray]:
        return self._batch(indices, view)[1]

    def read(
        self, batches: Sequence[IntArray], view: int | None, readers: int
    ) -> Iterator[tuple[Tensor, dict[str, IntArray]]]:
        if not self._workers:
            yield from (self._batch(indices, view) for indices in batches)
            return
        yield from DataLoader(
            _Seeded(self, view),
            batch_sampler=[indices.tolist() for indices in batches],
            num_workers=min(self._workers, len(batches)),
            collate_fn=_stacked,
            generator=torch.Generator(),  # else it draws a seed from the global one
        )

    def manifest(self) -> str:
        """Over the number of samples and the content of some, spread evenly. A change of others is not seen."""
        digest = hashlib.sha256(f"{len(self)}".encode())
        for index in np.unique(np.linspace(0, len(self) - 1, LOOKED_AT).astype(int)).tolist():
            sample, labels = self._sample(index, None)
            digest.update(f"{index} {sample.dtype} {tuple(sample.shape)} {sorted(labels.items())}".encode())
            digest.update(sample.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _batch(self, indices: IntArray, view: int | None) -> tuple[Tensor, dict[str, IntArray]]:
        return _stacked([self._sample(int(index), view) for index in indices])

    def _sample(self, index: int, view: int | None) -> tuple[Tensor, dict[str, int]]:
        with global_generators_at(derive_seed(self._seed, self._name, index, "fixed" if view is None else view)):
            sample = self._dataset[index]
        value, labels = self._read(sample)
        found = as_input(value)
        shape = getattr(self, "sample_shape", tuple(found.shape))
        if tuple(found.shape) != shape:
            raise DamagedData(
                f"sample {index} of the {self._name} dataset has shape {tuple(found.shape)}, but sample 0 has "
                f"{shape}: all must have the same shape, so resize, crop or pad them in the dataset's transform"
            )
        return found, {task: int(label) for task, label in labels.items()}


class Numbered(Sequence[str]):
    """Names of samples that have none of their own."""

    def __init__(self, name: str, count: int) -> None:
        self._name, self._count = name, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"there are {self._count} names; asked for number {index}")
        return f"{self._name}-{int(index) % self._count:07d}"


class _Seeded(torch.utils.data.Dataset[Any]):
    """A split in one view, as a worker process reads it."""

    def __init__(self, split: MappedSplit, view: int | None) -> None:
        self._split, self._view = split, view

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, int]]:
        return self._split._sample(index, self._view)


def _stacked(samples: Sequence[tuple[Tensor, Mapping[str, int]]]) -> tuple[Tensor, dict[str, IntArray]]:
    labels = {task: np.array([known[task] for _, known in samples], np.int64) for task in samples[0][1]}
    return torch.stack([sample for sample, _ in samples]), labels


@contextmanager
def global_generators_at(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python inside the block and restore them afterwards."""
    before = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)  # the CPU's alone
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def input_and_labels(sample: Any) -> tuple[Any, dict[str, int]]:
    """The usual forms of a sample: an input, (input, label), or a dict.

    Raises:
        UsageError: it has another form.
    """
    if isinstance(sample, Mapping):
        inputs = {name: value for name, value in sample.items() if not _is_label(value) and not isinstance(value, str)}
        if len(inputs) == 1:
            labels = {name: int(value) for name, value in sample.items() if _is_label(value)}
            return next(iter(inputs.values())), labels
        found = f"a dict with {len(inputs)} inputs ({', '.join(map(str, inputs)) or 'none'})"
    elif isinstance(sample, tuple | list) and len(sample) == 2 and _is_label(sample[1]):
        return sample[0], {"class": int(sample[1])}
    elif isinstance(sample, tuple | list):
        if len(sample) == 1:
            return sample[0], {}
        found = f"a {type(sample).__name__} of {len(sample)}"
    else:
        return sample, {}
    raise UsageError(
        f"a sample is {found}, but this takes an input, (input, label), or a dict with one input. For any other form "
        'pass read=, a function from a sample to its input and its labels, such as: lambda s: (s[0], {"class": s[1]})'
    )


def _is_label(value: Any) -> bool:
    """Whether a value is one whole number."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim == 0 and not (
            value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind == "f"
        )
    return isinstance(value, int | np.integer)


def as_input(value: Any) -> Tensor:
    """A tensor: pictures as (C, H, W) from 0 to 1, whole numbers of eight bytes (tokens) as they are, others as
    float32.
    """
    if not isinstance(value, Tensor | np.ndarray) and hasattr(value, "getbands"):  # a picture of Pillow's
        plain = value if value.mode in ("L", "RGB", "RGBA") else value.convert("RGB")
        pixels = torch.from_numpy(np.array(plain))
        return (pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)).float() / 255
    found = torch.as_tensor(value).as_subclass(Tensor)
    return found if found.dtype == torch.int64 else found.float()
