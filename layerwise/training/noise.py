"""Noise on what a stage reads, to stand in for that of a network below that still learns.

Training one module after another loses some accuracy to training all together, which the paper tentatively lays to the
noise that the upper modules' inputs then have at first (section 4.1, Figure 3). A cache has none, unless it is added.

Letters: B batch, b micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.seeding import derive_seed, torch_generator
from layerwise.training.feeds import Batch, Feed, SampleShape


@dataclass(frozen=True)
class NoisyBatch(Batch):
    """Gaussian noise in units of each sample's own deviation; the same for any micro-batch, and whenever it is read."""

    level: float = 0.0
    seed: int = 0

    def inputs_on(self, device: torch.device, chunk: slice = slice(None)) -> Tensor:
        clean = super().inputs_on(device, chunk)
        samples = range(*chunk.indices(len(self)))
        noise = torch.stack([self._drawn(self.begin + sample, clean.shape[1:]) for sample in samples]).to(
            device, clean.dtype
        )
        deviation = clean.flatten(1).std(1).view(-1, *(1,) * (clean.dim() - 1))
        return clean + self.level * deviation * noise

    def _drawn(self, sample: int, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=torch_generator(self.seed, sample))


class NoisyFeed(Feed):
    """Another feed with noise on its training batches, fresh in every epoch; nothing else is touched."""

    def __init__(self, feed: Feed, level: float, seed: int) -> None:
        self._feed, self._level, self._seed = feed, level, seed
        self.samples, self.views = feed.samples, feed.views

    def shuffled(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for number, batch in enumerate(self._feed.shuffled(epoch, start), start):
            seed = derive_seed(self._seed, epoch, number)
            yield NoisyBatch(**vars(batch), level=self._level, seed=seed)

    def in_order(self, split: str, view: int | None = None, start: int = 0) -> Iterator[Batch]:
        yield from self._feed.in_order(split, view, start)

    def validation(self, start: int = 0) -> Iterator[Batch]:
        yield from self._feed.validation(start)

    def splits(self) -> Sequence[str]:
        return self._feed.splits()

    def samples_of(self, split: str) -> int:
        return self._feed.samples_of(split)

    def shape(self, split: str) -> SampleShape:
        return self._feed.shape(split)
