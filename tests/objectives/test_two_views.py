"""Losses that compare two views, against plain loops; and trained by a stage, in micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from layerwise.nets.module import Encoded, Module
from layerwise.nets.resnet import PatchResNet
from layerwise.objectives.barlow_twins import BarlowTwins
from layerwise.objectives.nt_xent import NTXent
from layerwise.objectives.objective import Context
from layerwise.pipeline.caching import write_cache
from layerwise.pipeline.schedule import run_stage
from layerwise.pipeline.setup import Setup
from layerwise.recipe import ObjectiveSettings
from layerwise.training.feeds import Batch
from layerwise.training.step import Arithmetic, Learner, train_step
from tests.conftest import TINY

SETTINGS = [BarlowTwins(widths=(12, 7)), NTXent(widths=(12, 7))]
BATCH, CHANNELS = 5, 6


class Pooled(Module):
    """Reads (B, channels) and returns it changed a little."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = CHANNELS
        self.layer = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: torch.Tensor) -> Encoded:
        z = self.layer(x)
        return Encoded(z, z, z)


def projected(x: np.ndarray[Any, Any], layers: nn.Sequential) -> np.ndarray[Any, Any]:
    first, _, _, last = layers
    hidden = x @ first.weight.detach().numpy().T
    hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
    return np.maximum(hidden, 0) @ last.weight.detach().numpy().T


def made(settings: ObjectiveSettings) -> tuple[Any, np.ndarray[Any, Any], float]:
    """A loss, the projections (2, B, D) that it compares, and its value."""
    torch.manual_seed(0)
    loss = settings.build(Pooled(), (CHANNELS,), {}).double()
    views = torch.rand(BATCH, 2, CHANNELS, dtype=torch.float64)
    value = loss.loss((views,), Context(torch.Generator())).item()
    return loss, np.stack([projected(views[:, view].numpy(), loss.projector) for view in (0, 1)]), value


def test_barlow_twins_is_its_definition() -> None:
    _, (one, two), value = made(SETTINGS[0])
    one, two = ((z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) for z in (one, two))
    expected = 0.0
    for i in range(7):
        for j in range(7):
            correlation = sum(one[b, i] * two[b, j] for b in range(BATCH)) / BATCH
            expected += (1 - correlation) ** 2 if i == j else 0.0051 * correlation**2
    assert value == pytest.approx(0.024 * expected, rel=1e-12)


def test_nt_xent_is_its_definition() -> None:
    _, views, value = made(SETTINGS[1])
    every = [view / np.linalg.norm(view) for view in views.reshape(2 * BATCH, 7)]
    expected = 0.0
    for i, anchor in enumerate(every):
        scores = {j: float(anchor @ other) / 0.5 for j, other in enumerate(every) if j != i}
        expected -= scores[(i + BATCH) % (2 * BATCH)] - math.log(sum(map(math.exp, scores.values())))
    assert value == pytest.approx(expected / (2 * BATCH), rel=1e-12)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: type(settings).__name__)
def test_micro_batches_give_the_gradients_of_the_whole_batch(settings: ObjectiveSettings) -> None:
    found = []
    for micro in (None, 1, 2):
        torch.manual_seed(0)
        module = Pooled().double()
        loss = settings.build(module, (CHANNELS,), {}).double()
        weights = [*module.parameters(), *loss.parameters()]
        before = [weight.detach().clone() for weight in weights]
        learner = Learner(1, module, loss, torch.optim.SGD(weights, lr=1.0))
        batch = Batch(torch.rand(BATCH, 2, CHANNELS, dtype=torch.float64), views=2)
        train_step([learner], batch, 0, Arithmetic(torch.device("cpu"), "fp32", micro, 0))
        found.append(torch.cat([(a - b.detach()).flatten() for a, b in zip(before, weights, strict=True)]))
    assert found[0].norm() > 1e-4
    assert all((one - found[0]).norm() / found[0].norm() < 1e-12 for one in found)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: type(settings).__name__)
def test_a_run_trains_by_it_from_caches(settings: ObjectiveSettings, make_setup: Callable[..., Setup]) -> None:
    assert isinstance(TINY.network, PatchResNet)
    setup = make_setup(TINY.model_copy(update={"objective": settings}))
    first = run_stage(setup, 1)
    write_cache(setup, 1)
    second = run_stage(setup, 2)
    assert first["epochs"] == second["epochs"] == 2
    assert len(setup.facts.sample_shape) == 3
