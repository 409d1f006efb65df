"""Deep InfoMax, the local objective (Hjelm et al. 2019, "Learning Deep Representations by Mutual Information Estimation
and Maximization").

Each position of a sample's representation (local) should tell that it belongs to the sample's summary (global) rather
than to another sample's: T = phi(local) . psi(global) is high for pairs of one sample and low for mixed pairs. The
summary is the mean over positions.

Letters: B batch, C channels, P positions, U units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import RecipeError
from layerwise.nets.module import Encoded, Module
from layerwise.objectives.objective import Context, Objective, at_least_float32
from layerwise.objectives.settings import ObjectiveSettings
from layerwise.settings.base import MOST_CHANNELS, Shape


class DeepInfoMax(ObjectiveSettings):
    """Tell a sample's own positions from those of the others."""

    units: int = Field(1024, ge=1, le=MOST_CHANNELS, description="U: size of the embeddings that are compared")
    measure: Literal["jsd", "nce"] = Field(
        "jsd", description="Jensen-Shannon divergence, or noise contrast against all other samples' positions"
    )

    def build(self, module: Module, sample_shape: Shape, classes: Mapping[str, int]) -> Objective:
        return DeepInfoMaxLoss(module.channels, self.units, self.measure)


class DeepInfoMaxLoss(Objective):
    """Only the embeddings take batch statistics, and they see the whole batch: the module may run in micro-batches."""

    def __init__(self, channels: int, units: int, measure: str) -> None:
        super().__init__()
        self.measure = {"jsd": jensen_shannon, "nce": noise_contrast}[measure]
        self.local = Embedding(channels, units)
        self.summary = Embedding(channels, units)

    def represent(self, encoded: Encoded) -> tuple[Tensor, ...]:
        """(B, C, P)."""
        return (encoded.c.flatten(2),)

    def loss(self, representations: tuple[Tensor, ...], context: Context) -> Tensor:
        positions = representations[0]
        if self.training and len(positions) < 2:
            raise RecipeError(
                "Deep InfoMax tells the samples of a batch apart, and got one: set training.batch_size to 2 or more"
            )
        local = self.local(positions)  # (B, U, P)
        summary = self.summary(positions.mean(2, keepdim=True)).squeeze(2)  # (B, U)
        scores = torch.einsum("gu,bup->gbp", summary, local)
        return self.measure(at_least_float32(scores))


class Embedding(nn.Module):
    """1x1 convolution, batch normalisation, ReLU, 1x1 convolution; plus a 1x1 shortcut; normalised over the units."""

    def __init__(self, channels: int, units: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv1d(channels, units, 1, bias=False), nn.BatchNorm1d(units), nn.ReLU(), nn.Conv1d(units, units, 1)
        )
        self.shortcut = nn.Conv1d(channels, units, 1)
        self.normalise = nn.LayerNorm(units)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, P) to (B, U, P)."""
        embedded: Tensor = self.normalise((self.residual(x) + self.shortcut(x)).transpose(1, 2))
        return embedded.transpose(1, 2)


def jensen_shannon(scores: Tensor) -> Tensor:
    """Mean over mixed pairs of softplus(-T) + T - log 2, less the mean over own pairs of log 2 - softplus(-T).

    Args:
        scores: (B, B, P) T of each summary with each sample's positions. One sample alone has no mixed pairs, and
        they are left out.
    """
    gain = (math.log(2) - F.softplus(-_own(scores))).mean()
    b, _, p = scores.shape
    mixed = F.softplus(-scores) + scores - math.log(2)
    return mixed.masked_fill(_is_own(scores), 0).sum() / max(1, b * (b - 1) * p) - gain


def noise_contrast(scores: Tensor) -> Tensor:
    """Mean of -log softmax of an own pair's T among itself and its summary's T with every position of other samples."""
    mixed = scores.masked_fill(_is_own(scores), torch.finfo(scores.dtype).min).flatten(1).logsumexp(1, keepdim=True)
    own = _own(scores)
    return (torch.logaddexp(own, mixed) - own).mean()


def _own(scores: Tensor) -> Tensor:
    """(B, P): T of each summary with its own sample's positions."""
    return scores.diagonal().T


def _is_own(scores: Tensor) -> Tensor:
    """(B, B, 1). A mask, since shapes that depend on values could not be worked out before a training."""
    return torch.eye(len(scores), dtype=torch.bool, device=scores.device).unsqueeze(2)
