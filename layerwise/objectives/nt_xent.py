"""SimCLR's loss for each module (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual
Representations").

Of 2 B - 1 other views in the batch, a view should find the one that shows its own image.

Letters: B batch, C channels, D numbers of the projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from layerwise.nets.module import Encoded, Module
from layerwise.objectives.objective import Context, Objective
from layerwise.objectives.projector import pooled, projector
from layerwise.objectives.settings import ObjectiveSettings
from layerwise.settings.base import MOST_CHANNELS, Shape


class NTXent(ObjectiveSettings):
    """Normalised temperature-scaled cross-entropy between two views of each image."""

    temperature: float = Field(0.5, gt=0, description="cosines are divided by this")
    widths: tuple[Annotated[int, Field(ge=1, le=MOST_CHANNELS)], ...] = Field(
        (2048, 128), min_length=1, max_length=8, description="channels of each layer of the projector"
    )

    @property
    def views(self) -> int:
        return 2

    def build(self, module: Module, sample_shape: Shape, classes: Mapping[str, int]) -> Objective:
        return NTXentLoss(self, module.channels)


class NTXentLoss(Objective):
    def __init__(self, settings: NTXent, channels: int) -> None:
        super().__init__()
        self.temperature = settings.temperature
        self.projector = projector(channels, settings.widths)

    def represent(self, encoded: Encoded) -> tuple[Tensor, ...]:
        return pooled(encoded)

    def loss(self, representations: tuple[Tensor, ...], context: Context) -> Tensor:
        """Representations are the pooled (B, 2, C)."""
        views = [F.normalize(self.projector(view), dim=1) for view in representations[0].unbind(1)]
        every = torch.cat(views)  # (2 B, D)
        cosines = every @ every.T / self.temperature
        itself = torch.eye(len(every), dtype=torch.bool, device=every.device)
        other = torch.arange(len(every), device=every.device).roll(len(views[0]))
        return F.cross_entropy(cosines.masked_fill(itself, float("-inf")), other)
