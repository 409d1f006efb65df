"""Predsim, a supervised local loss of two halves (Nøkland & Eidnes 2019, "Training Neural Networks with Local Error
Signals").

*pred*: cross-entropy of a linear classifier on the averaged representation. *sim*: samples of one class should look
alike, and others not: the matrix of similarities between the samples' representations, after a 3x3 convolution,
should be that of their labels.

The convolution and what is taken of its result are per sample, so a module trains in micro-batches; the similarity
matrix couples the batch. The loss is (1 - b) pred + b sim, in nats as far as pred goes.

Letters: B batch, C channels, P positions, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import RecipeError
from layerwise.nets.module import Encoded, Module
from layerwise.objectives.cross_entropy import choose_task, require_one_label
from layerwise.objectives.objective import Context, Objective, at_least_float32
from layerwise.objectives.settings import ObjectiveSettings
from layerwise.settings.base import Shape


class PredSim(ObjectiveSettings):
    """Classify, and match similarities."""

    weight: float = Field(0.99, ge=0, le=1, description="b: share of the similarity loss")
    task: str | None = Field(None, description="task whose labels to learn; null: the dataset's first")

    def build(self, module: Module, sample_shape: Shape, classes: Mapping[str, int]) -> Objective:
        task = choose_task(self.task, classes)
        return PredSimLoss(module.channels, task, classes[task], self.weight)


class PredSimLoss(Objective):
    """The representation is read as one feature map, (B, C, rows, columns) over the patches or (B, C, frames)."""

    def __init__(self, channels: int, task: str, classes: int, weight: float) -> None:
        super().__init__()
        self.task, self.classes, self.weight = task, classes, weight
        self.classifier = nn.Linear(channels, classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        # One kernel for grids of patches; a sequence of frames is a grid of one row, which only its middle row touches.
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def represent(self, encoded: Encoded) -> tuple[Tensor, ...]:
        """(B, C) means over the positions, and (B, C) standard deviations over them after the convolution."""
        maps = encoded.c if encoded.c.dim() == 4 else encoded.c.unsqueeze(2)
        if maps[0, 0].numel() < 2:
            raise RecipeError(
                "predsim compares how a representation varies over its positions; this module has only one "
                f"({tuple(encoded.c.shape[1:])})"
            )
        convolved = self.convolution(maps).flatten(2)
        return maps.flatten(2).mean(2), deviation(at_least_float32(convolved))

    def loss(self, representations: tuple[Tensor, ...], context: Context) -> Tensor:
        means, deviations = representations
        labels = context.labels[self.task]
        require_one_label(self.task, labels, "choose a task of whole samples")
        predicted = F.cross_entropy(at_least_float32(self.classifier(means)), labels)
        wanted = similarity(F.one_hot(labels, self.classes).to(deviations.dtype))
        alike = F.mse_loss(similarity(deviations), wanted)
        loss: Tensor = (1 - self.weight) * predicted + self.weight * alike
        return loss


def deviation(maps: Tensor) -> Tensor:
    """(B, C, P) to the (B, C) standard deviations over P; a tiny addend keeps a constant map's gradient finite."""
    return (maps.var(2) + math.sqrt(torch.finfo(maps.dtype).tiny)).sqrt()


def similarity(rows: Tensor) -> Tensor:
    """(B, B) cosine similarities of centred (B, C) rows, within ±1."""
    unit = F.normalize(rows - rows.mean(1, keepdim=True), dim=1, eps=1e-8)
    return (unit @ unit.T).clamp(-1, 1)
