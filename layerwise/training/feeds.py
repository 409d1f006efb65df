"""Where a stage's inputs come from: the dataset, a cache, or the dataset through the frozen modules below. One
interface.

Two feeds of the same stage give the same samples in the same order, and (where the cache is float32) the same bits.
Samples of differing length come in batches of one.

Letters: B batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from activation_cache import Cache, CachedBatch, CacheError, Calibration, Damaged, JoinedSplits, epoch_order
from activation_cache import Split as CachedSplit
from activation_cache.reading.processors import allowed_processors
from layerwise.data.dataset import IntArray, Splits
from layerwise.errors import DamagedData, NotReady, RecipeError
from layerwise.nets.module import Module, encode

Array = npt.NDArray[Any]


def as_stored(inputs: Tensor) -> Tensor:
    return inputs


HOST = torch.device("cpu")
ALL = slice(None)
_AT_ONCE = 1 << 20  # numbers that are dequantised at a time, so that what lies between stays in the caches


@dataclass(frozen=True)
class Batch:
    """Inputs as they were read, moved to the device and decoded there when asked, all of them or a micro-batch."""

    inputs: Tensor
    """(B, *sample_shape) on the CPU, or wherever they were computed."""
    labels: dict[str, Tensor] = field(default_factory=dict)
    ids: Sequence[str] = ()
    decode: Callable[[Tensor], Tensor] = as_stored
    """From what is stored to float inputs, on the device: de-quantises."""
    begin: int = 0
    """Number of the first of these samples in the whole batch, of which they may be one process's part."""
    whole: int | None = None
    """Samples of the whole batch; None: these are all."""
    views: int = 1
    """Augmented views of each sample. Where there are several, inputs are (B, views, *sample_shape) as stored, and the
    views of a sample go through a module one after another, as samples of their own.
    """

    def __len__(self) -> int:
        return self.inputs.shape[0]

    @property
    def total(self) -> int:
        """Samples of the whole batch."""
        return len(self) if self.whole is None else self.whole

    def behind(self, count: int) -> Batch:
        """Without its first `count` samples."""
        labels = {task: values[count:] for task, values in self.labels.items()}
        return replace(self, inputs=self.inputs[count:], labels=labels, ids=self.ids[count:])

    def inputs_on(self, device: torch.device, chunk: slice = slice(None)) -> Tensor:
        """(b, *sample_shape), or (b * views, *sample_shape), floating point."""
        stored = self.inputs[chunk].to(device)
        return self.decode(stored if self.views == 1 else stored.flatten(0, 1))

    def by_sample(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Representations (b * views, ...) as (b, views, ...)."""
        return parts if self.views == 1 else tuple(part.unflatten(0, (-1, self.views)) for part in parts)

    def labels_on(self, device: torch.device) -> dict[str, Tensor]:
        return {task: values.to(device) for task, values in self.labels.items()}


class SampleShape(NamedTuple):
    """Of one input, or of the longest where they differ in length along the last axis."""

    sizes: tuple[int, ...]
    ragged: bool


class Feed(ABC):
    """Inputs of one stage."""

    samples: int
    """Training samples in an epoch."""
    views: int = 1
    """Views of each sample in a batch that `shuffled` and `validation` give."""

    @abstractmethod
    def shuffled(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Training batches of one epoch, all of full size, beginning with batch number `start`."""

    @abstractmethod
    def in_order(self, split: str, view: int | None = None, start: int = 0) -> Iterator[Batch]:
        """Every sample of a split from number `start` on, in order; the last batch may be smaller. `view` is for
        `train` alone.
        """

    def validation(self, start: int = 0) -> Iterator[Batch]:
        """Every validation sample from number `start` on, in order, and in as many views as a stage trains on."""
        if self.views == 1:
            yield from self.in_order("validation", start=start)
        else:
            yield from side_by_side([self.in_order("validation", view, start) for view in range(self.views)])

    @abstractmethod
    def splits(self) -> Sequence[str]:
        """Names of the splits that there are."""

    @abstractmethod
    def shape(self, split: str) -> SampleShape:
        """What one input of a split is like."""

    @abstractmethod
    def samples_of(self, split: str) -> int:
        """How many samples a split that can be read in order has."""

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """End whatever works in the background."""


class DatasetFeed(Feed):
    """Samples of a dataset; training views are fresh in every epoch unless `views` fixes their number."""

    def __init__(
        self,
        splits: Splits,
        batch_size: int,
        seed: int,
        *,
        views: int | None = None,
        together: int = 1,
        part: slice = ALL,
    ) -> None:
        """`together`: views of each sample in a batch; `part`: which samples of each training batch are read, those of
        this process.
        """
        self._splits, self._batch_size, self._seed, self._views = splits, batch_size, seed, views
        self._part, self.views = part, together
        self.samples = len(splits.train)
        require_full_batch(self.samples, batch_size)

    def splits(self) -> Sequence[str]:
        return list(self._splits.named())

    def shuffled(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = epoch_order(self.samples, self._seed, epoch)
        whole = self.samples // self._batch_size
        batches = np.split(order[: whole * self._batch_size], whole)[start:]
        parts = [batch[self._part] for batch in batches]
        read = [self._read("train", parts, view) for view in views_of(epoch, self.views, self._views)]
        yield from map(part_of(self._part, self._batch_size), side_by_side(read))

    def in_order(self, split: str, view: int | None = None, start: int = 0) -> Iterator[Batch]:
        indices = np.arange(start, len(self._splits.named()[split]))
        size = 1 if self.shape(split).ragged else self._batch_size
        yield from self._read(split, [indices[i : i + size] for i in range(0, len(indices), size)], view)

    def samples_of(self, split: str) -> int:
        return len(self._splits.named()[split])

    def shape(self, split: str) -> SampleShape:
        chosen = self._splits.named()[split]
        *sizes, last = chosen.sample_shape
        length = chosen.longest if last is None else last
        assert length is not None
        return SampleShape((*(size for size in sizes if size is not None), length), last is None)

    def chosen(self, split: str, indices: IntArray, view: int) -> Iterator[Batch]:
        """These samples of a split, in this order and augmentation."""
        size = self._batch_size
        yield from self._read(split, [indices[i : i + size] for i in range(0, len(indices), size)], view)

    def _read(self, name: str, batches: Sequence[IntArray], view: int | None) -> Iterator[Batch]:
        split = self._splits.named()[name]
        found = split.read(batches, view, _readers())
        for indices, (inputs, labels) in zip(batches, found, strict=True):
            known = {task: torch.from_numpy(values) for task, values in labels.items()}
            yield Batch(inputs, known, [split.ids[index] for index in indices])


class RecomputeFeed(Feed):
    """Another feed's inputs, passed through the frozen modules below.

    `keep` is where the outputs wait to be used: the host's memory, unless the device has room for a batch of them.
    """

    def __init__(self, source: Feed, prefix: Sequence[Module], device: torch.device, keep: torch.device = HOST) -> None:
        self._source, self._prefix, self._device, self._keep = source, prefix, device, keep
        self.samples, self.views = source.samples, source.views

    def splits(self) -> Sequence[str]:
        return self._source.splits()

    def shuffled(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        yield from map(self.encode, self._source.shuffled(epoch, start))

    def in_order(self, split: str, view: int | None = None, start: int = 0) -> Iterator[Batch]:
        yield from map(self.encode, self._source.in_order(split, view, start))

    def samples_of(self, split: str) -> int:
        return self._source.samples_of(split)

    def shape(self, split: str) -> SampleShape:
        sizes, ragged = self._source.shape(split)
        with torch.no_grad():
            return SampleShape(tuple(self._through(torch.zeros(1, *sizes, device=self._device)).shape[1:]), ragged)

    def encode(self, batch: Batch) -> Batch:
        """The outputs for a batch of inputs."""
        # A few at a time: a frozen module's activations are many times its output, and on a CPU those of one sample
        # stay in the processor's caches.
        few = 16 if self._device.type == "cuda" else 1
        rows = batch if batch.views == 1 else replace(batch, inputs=batch.inputs.flatten(0, 1), views=1)
        with torch.no_grad():
            first = self._through(rows.inputs_on(self._device, slice(0, few)))
            outputs = first.new_empty((len(rows), *first.shape[1:]), device=self._keep)
            outputs[:few] = first
            for begin in range(few, len(rows), few):
                chunk = slice(begin, begin + few)
                outputs[chunk] = self._through(rows.inputs_on(self._device, chunk))
        (outputs,) = batch.by_sample((outputs,))
        return replace(batch, inputs=outputs, decode=as_stored)

    def _through(self, x: Tensor) -> Tensor:
        for module in self._prefix:
            x = encode(module, x).output
        return x


class CacheFeed(Feed):
    """Outputs of the frozen modules below, read from an activation cache."""

    def __init__(
        self,
        cache: Cache,
        batch_size: int,
        seed: int,
        device: torch.device,
        *,
        mend: str = "",
        together: int = 1,
        part: slice = ALL,
    ) -> None:
        """`mend`: the command that repairs the cache, for messages; `together` and `part`: see `DatasetFeed`."""
        self._cache, self._batch_size, self._seed, self._device = cache, batch_size, seed, device
        self._mend, self._part, self.views = mend, part, together
        if "train" in cache.splits:
            self.samples = cache.splits["train"].samples
            require_full_batch(self.samples, batch_size)

    def splits(self) -> Sequence[str]:
        return list(self._cache.splits)

    def shuffled(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        split = self._cache.splits["train"]
        found = [
            split.batches(
                self._batch_size,
                seed=self._seed,
                epoch=epoch,
                start=start,
                view=view,
                within=self._part,
                threads=_readers(),
                allocate=pinned if self._device.type == "cuda" else np.empty,
            )
            for view in views_of(epoch, self.views, split.views)
        ]
        part, converted = part_of(self._part, self._batch_size), batch_of(split, self._device)
        with self._damage_named():
            yield from map(part, side_by_side([map(converted, batches) for batches in found]))

    def in_order(self, split: str, view: int | None = None, start: int = 0) -> Iterator[Batch]:
        chosen = self._cache.splits[split]
        size = 1 if None in chosen.shape else self._batch_size
        whole, skipped = divmod(start, size)
        found = chosen.batches(
            size,
            seed=0,
            epoch=0,
            start=whole,
            shuffle=False,
            drop_last=False,
            view=view or 0,
            threads=_readers(),
        )
        with self._damage_named():
            for batch in map(batch_of(chosen, self._device), found):
                yield batch.behind(skipped)
                skipped = 0

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except Damaged as error:
            raise DamagedData(f"{error}. Repair it with: {self._mend}") from error
        except CacheError as error:  # such as an object store that fails
            raise NotReady(str(error)) from error

    def samples_of(self, split: str) -> int:
        return self._cache.splits[split].samples

    def shape(self, split: str) -> SampleShape:
        chosen = self._cache.splits[split]
        sizes = tuple(chosen.longest or 0 if size is None else size for size in chosen.shape)
        return SampleShape(sizes, chosen.longest is not None)


def views_of(epoch: int, together: int, stored: int | None) -> list[int]:
    """The numbers of the views that an epoch's batches carry: new ones, or of `stored` ones those whose turn it is."""
    numbers = range(epoch * together, (epoch + 1) * together)
    return [number if stored is None else number % stored for number in numbers]


def side_by_side(views: Sequence[Iterator[Batch]]) -> Iterator[Batch]:
    """Batches that carry several views of the same samples, from those that carry one each."""
    if len(views) == 1:
        yield from views[0]
        return
    for batches in zip(*views, strict=True):
        inputs = torch.stack([batch.inputs for batch in batches], 1)
        yield replace(batches[0], inputs=inputs, views=len(batches))


def part_of(part: slice, batch_size: int) -> Callable[[Batch], Batch]:
    """Says of a batch that it is this part of one of `batch_size` samples."""
    if part == ALL:
        return lambda batch: batch
    begin, _, _ = part.indices(batch_size)
    return lambda batch: replace(batch, begin=begin, whole=batch_size)


def _readers() -> int:
    """Threads that read ahead: two, or fewer where there are fewer processors for this process."""
    return min(2, allowed_processors())


def batch_of(split: CachedSplit | JoinedSplits, device: torch.device) -> Callable[[CachedBatch], Batch]:
    """From a batch as the cache gives it to one of ours, without copying."""
    decode = decoder(split.storage.dtype, split.calibration, len(split.shape), device)

    def convert(found: CachedBatch) -> Batch:
        labels = {task: torch.from_numpy(stacked(values)) for task, values in found.labels.items()}
        return Batch(torch.from_numpy(stacked(found.values)), labels, found.ids, decode)

    return convert


def pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Page-locked memory, which a CUDA device copies from at the speed of the bus."""
    buffer = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, pin_memory=True)
    found: npt.NDArray[Any] = buffer.numpy().view(dtype).reshape(shape)
    return found


def stacked(values: Array | list[Array]) -> Array:
    """One array of a batch, also where the cache gives a list: samples of differing length come one by one."""
    return np.stack(values) if isinstance(values, list) else values


def require_full_batch(samples: int, batch_size: int) -> None:
    if samples < batch_size:
        raise RecipeError(
            f"training.batch_size is {batch_size}, but there are only {samples} training samples: choose {samples} "
            f"or fewer"
        )


def decoder(
    dtype: str, calibration: Calibration | None, dimensions: int, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """From stored values on the device to float32, for samples of so many dimensions; equals the cache's own
    `dequantise`.
    """
    if dtype == "bfloat16":
        return lambda stored: stored.view(torch.bfloat16).float()
    if calibration is None:
        return lambda stored: stored.float()
    scale, offset, bend = (torch.from_numpy(part).to(device) for part in calibration.along(dimensions))
    bent, shifted = bool(bend.any()), bool(offset.any())

    def dequantise(stored: Tensor) -> Tensor:
        values = stored.float()
        if bent:
            for some in values.split(max(1, _AT_ONCE // max(1, values[:1].numel()))):
                width = some.mul(bend).neg_().add_(1)
                some.mul_(scale).div_(width)
        else:
            values.mul_(scale)
        return values.add_(offset) if shifted else values

    return dequantise
