"""How to train by an objective of your own: the digits, with a local loss that is defined in this file.

An objective is two classes. Its *settings* (an `ObjectiveSettings`) are what a recipe chooses and `--set` changes; they
build the loss of each module. The *loss* (an `Objective`) has two parts, and the cut between them is what lets a module
train in micro-batches with the gradients of the whole batch:

* `represent` reads what the module made of some samples, one by one, and returns small tensors, each (B, …);
* `loss` reads those of the whole batch, and may couple them as it likes. Random draws come from `context.generator`
  and labels from `context.labels`, by task, so that a resumed training ends in the same bits.

Copy this file, change it, and train it as any recipe: layerwise run --recipe path/to/yours.py

The loss here is VICReg's (Bardes, Ponce & LeCun 2022) between a patch and the one two rows below it: be alike, vary
over the batch, and do not repeat yourself.

Letters: B batch, C channels, R rows, S columns, N = B x (R - 2) x S pairs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from layerwise.data.digits import Digits
from layerwise.nets.module import Module
from layerwise.nets.resnet import Group, PatchResNet
from layerwise.objectives.objective import Context, Objective
from layerwise.recipe import CacheSettings, ObjectiveSettings, Optimiser, Probe, Recipe, Shape, Training


class VICReg(ObjectiveSettings):
    alike: float = Field(25.0, ge=0, description="weight of the squared difference")
    varied: float = Field(25.0, ge=0, description="weight of a deviation below 1")
    distinct: float = Field(1.0, ge=0, description="weight of the squared covariances")

    def build(self, module: Module, sample_shape: Shape, classes: Mapping[str, int]) -> Objective:
        return VICRegLoss(self)


class VICRegLoss(Objective):
    def __init__(self, weights: VICReg) -> None:
        super().__init__()
        self.weights = weights

    # `represent` is left as it is: z, which is (B, C, R, S).

    def loss(self, representations: tuple[Tensor, ...], context: Context) -> Tensor:
        z = representations[0]
        upper, lower = (part.permute(0, 2, 3, 1).flatten(0, 2) for part in (z[:, :, :-2], z[:, :, 2:]))  # (N, C)
        total = self.weights.alike * F.mse_loss(upper, lower)
        for side in (upper, lower):
            centred = side - side.mean(0)
            deviation = (centred.square().sum(0) / (len(side) - 1) + 1e-4).sqrt()
            covariance = centred.T @ centred / (len(side) - 1)
            shared = covariance - torch.diag(covariance.diagonal())
            total = total + self.weights.varied / 2 * F.relu(1 - deviation).mean()
            total = total + self.weights.distinct * shared.square().sum() / side.shape[1]
        return total


recipe = Recipe(
    name="own_objective",
    dataset=Digits(),
    network=PatchResNet(
        patch=8,
        patch_stride=4,
        stem_channels=16,
        groups=(
            Group(channels=32, blocks=1),
            Group(channels=64, blocks=1, stride=2),
            Group(channels=128, blocks=1, stride=2),
        ),
    ),
    objective=VICReg(),
    optimiser=Optimiser(learning_rate=1e-3),
    training=Training(batch_size=32, epochs=15, patience=4, micro_batch=4),
    probe=Probe(learning_rates=(1e-3,), epochs=200, standardise=True),
    cache=CacheSettings(dtype="uint8"),
)
