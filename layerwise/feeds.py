"""Where a stage's inputs come from: the dataset, a cache, or the dataset through the frozen modules below. One interface.

Two feeds of the same stage give the same samples in the same order, and (where the cache is float32) the same bits.

Letters: B batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from activation_cache import Cache, epoch_order
from layerwise.data.dataset import IntArray, Splits
from layerwise.errors import RecipeError
from layerwise.nets.module import Module


Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """Inputs as they were read, moved to the device and decoded there when asked, all of them or a micro-batch."""

    inputs: Tensor
    """(B, *sample_shape) on the CPU, or wherever they were computed."""
    labels: dict[str, Tensor] = field(default_factory=dict)
    decode: Callable[[Tensor], Tensor] = staticmethod(lambda stored: stored)
    """From what is stored to float inputs, on the device: de-quantises."""

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def inputs_on(self, device: torch.device, chunk: slice = slice(None)) -> Tensor:
        return self.decode(self.inputs[chunk].to(device, non_blocking=True))

    def labels_on(self, device: torch.device) -> dict[str, Tensor]:
        return {task: values.to(device, non_blocking=True) for task, values in self.labels.items()}


class Feed(ABC):
    """Inputs of one stage."""

    samples: int
    """Training samples in an epoch."""

    @abstractmethod
    def shuffled(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Training batches of one epoch, all of full size, beginning with batch number `start`."""

    @abstractmethod
    def in_order(self, split: str, view: int | None = None) -> Iterator[Batch]:
        """Every sample of a split, in order; the last batch may be smaller. `view` is for `train` alone."""

    @abstractmethod
    def splits(self) -> Sequence[str]:
        """Names of the splits that there are."""


class DatasetFeed(Feed):
    """Samples of a dataset; training views are fresh in every epoch unless `views` fixes their number."""

    def __init__(self, splits: Splits, batch_size: int, seed: int, *, views: int | None = None, readers: int = 2) -> None:
        self._splits, self._batch_size, self._seed, self._views, self._readers = splits, batch_size, seed, views, readers
        self.samples = len(splits.train)
        require_full_batch(self.samples, batch_size)

    def splits(self) -> Sequence[str]:
        return list(self._splits.named())

    def shuffled(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = epoch_order(self.samples, self._seed, epoch)
        whole = self.samples // self._batch_size
        view = epoch if self._views is None else epoch % self._views
        yield from self._read("train", np.split(order[: whole * self._batch_size], whole)[start:], view)

    def in_order(self, split: str, view: int | None = None) -> Iterator[Batch]:
        indices = np.arange(len(self._splits.named()[split]))
        yield from self._read(split, [indices[i : i + self._batch_size] for i in range(0, len(indices), self._batch_size)], view)

    def _read(self, name: str, batches: Sequence[IntArray], view: int | None) -> Iterator[Batch]:
        split = self._splits.named()[name]

        def read(indices: IntArray) -> Batch:
            return Batch(split.batch(indices, view), {task: torch.from_numpy(values[indices]) for task, values in split.labels.items()})

        yield from read_ahead(read, batches, self._readers)


class RecomputeFeed(Feed):
    """Another feed's inputs, passed through the frozen modules below."""

    def __init__(self, source: Feed, prefix: Sequence[Module], device: torch.device) -> None:
        self._source, self._prefix, self._device = source, prefix, device
        self.samples = source.samples

    def splits(self) -> Sequence[str]:
        return self._source.splits()

    def shuffled(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        yield from map(self._encode, self._source.shuffled(epoch, start))

    def in_order(self, split: str, view: int | None = None) -> Iterator[Batch]:
        yield from map(self._encode, self._source.in_order(split, view))

    def _encode(self, batch: Batch) -> Batch:
        # Sample by sample: a frozen module's activations are many times its output, and nothing is gained by holding a batch of them.
        with torch.no_grad():
            encoded = [self._through(batch.inputs_on(self._device, slice(i, i + 1))) for i in range(len(batch))]
        return Batch(torch.cat(encoded), batch.labels)

    def _through(self, x: Tensor) -> Tensor:
        for module in self._prefix:
            x = module(x).output
        return x


class CacheFeed(Feed):
    """Outputs of the frozen modules below, read from an activation cache."""

    def __init__(self, cache: Cache, batch_size: int, seed: int, device: torch.device, *, readers: int = 2) -> None:
        self._cache, self._batch_size, self._seed, self._device, self._readers = cache, batch_size, seed, device, readers
        self.samples = cache.splits["train"].samples
        require_full_batch(self.samples, batch_size)

    def splits(self) -> Sequence[str]:
        return list(self._cache.splits)

    def shuffled(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        views = self._cache.splits["train"].views
        yield from self._read("train", epoch=epoch, start=start, shuffle=True, drop_last=True, view=epoch % views)

    def in_order(self, split: str, view: int | None = None) -> Iterator[Batch]:
        yield from self._read(split, epoch=0, start=0, shuffle=False, drop_last=False, view=view or 0)

    def _read(self, name: str, *, epoch: int, start: int, shuffle: bool, drop_last: bool, view: int) -> Iterator[Batch]:
        split = self._cache.splits[name]
        decode = decoder(split.storage.dtype, split.scales, self._device)
        for found in split.batches(
            self._batch_size, seed=self._seed, epoch=epoch, start=start, shuffle=shuffle, drop_last=drop_last, view=view, threads=self._readers
        ):
            yield Batch(torch.from_numpy(found.values), {task: torch.from_numpy(values) for task, values in found.labels.items()}, decode)


def require_full_batch(samples: int, batch_size: int) -> None:
    if samples < batch_size:
        raise RecipeError(f"training.batch_size is {batch_size} and there are {samples} training samples: choose {samples} or fewer")


def decoder(dtype: str, scales: object, device: torch.device) -> Callable[[Tensor], Tensor]:
    """From stored values on the device to float32: the counterpart of the cache's `dequantise`."""
    if dtype == "uint8":
        scale = torch.as_tensor(scales, dtype=torch.float32, device=device)
        return lambda stored: stored.to(torch.float32).mul_(scale)
    if dtype == "bfloat16":
        return lambda stored: stored.view(torch.bfloat16).float()
    return lambda stored: stored.float()


def read_ahead(read: Callable[[Item], Result], items: Sequence[Item], readers: int) -> Iterator[Result]:
    """`map` in the same order, with a few results being made by threads ahead of the one that is asked for."""
    with ThreadPoolExecutor(max_workers=readers) as pool:
        pending: deque[Future[Result]] = deque()
        remaining = iter(items)
        try:
            for item in remaining:
                pending.append(pool.submit(read, item))
                if len(pending) > readers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
