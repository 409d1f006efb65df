"""Barlow Twins for each module (Zbontar et al. 2021; block by block: Siddiqui et al. 2023, "Blockwise Self-Supervised
Learning at Scale").

Two augmentations of an image are projected; over the batch, each number of the one should correlate with the same
number of the other, and with no other. Batch statistics are taken in `loss`, which sees the whole batch, so that
micro-batches are exact.

Letters: B batch, C channels, D numbers of the projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor

from layerwise.nets.module import Encoded, Module
from layerwise.objectives.objective import Context, Objective
from layerwise.objectives.projector import Standardised, pooled, projector
from layerwise.objectives.settings import ObjectiveSettings
from layerwise.settings.base import MOST_CHANNELS, Shape


class BarlowTwins(ObjectiveSettings):
    """Redundancy reduction between two views; the numbers are those of Zbontar et al."""

    off_diagonal: float = Field(0.0051, ge=0, description="weight of the correlations between different channels")
    scale: float = Field(0.024, gt=0, description="the loss is multiplied by this")
    widths: tuple[Annotated[int, Field(ge=1, le=MOST_CHANNELS)], ...] = Field(
        (8192, 8192, 8192), min_length=1, max_length=8, description="channels of each layer of the projector"
    )

    @property
    def views(self) -> int:
        return 2

    def build(self, module: Module, sample_shape: Shape, classes: Mapping[str, int]) -> Objective:
        return BarlowTwinsLoss(self, module.channels)


class BarlowTwinsLoss(Objective):
    def __init__(self, settings: BarlowTwins, channels: int) -> None:
        super().__init__()
        self.settings = settings
        self.projector = projector(channels, settings.widths)
        self.standardised = Standardised(settings.widths[-1], affine=False)

    def represent(self, encoded: Encoded) -> tuple[Tensor, ...]:
        return pooled(encoded)

    def loss(self, representations: tuple[Tensor, ...], context: Context) -> Tensor:
        """Representations are the pooled (B, 2, C)."""
        first, second = (self.standardised(self.projector(view)) for view in representations[0].unbind(1))  # (B, D)
        correlation = first.T @ second / len(first)  # (D, D)
        squares = correlation.square()
        diagonal = correlation.diagonal()
        on, off = (1 - diagonal).square().sum(), squares.sum() - diagonal.square().sum()
        found: Tensor = self.settings.scale * (on + self.settings.off_diagonal * off)
        return found
