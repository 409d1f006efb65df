"""The learning rate of each update against the closed form of its schedule."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from layerwise.recipe.optimisers import SGD
from layerwise.training.optimisers import learning_rate

EPOCH = 10
"""Steps in an epoch."""


def rates(count: int, epochs: int = 8, **fields: object) -> list[float]:
    settings = SGD(lr=0.5, **fields).lasting(epochs)
    return [learning_rate(settings, EPOCH, step) for step in range(count)]


def test_constant() -> None:
    assert rates(100) == [0.5] * 100


@pytest.mark.parametrize(("fields", "steps"), [({"warmup": 2}, 20), ({"warmup": 7, "schedule_unit": "steps"}, 7)])
def test_warm_up_is_a_straight_line_that_begins_above_zero(fields: dict[str, object], steps: int) -> None:
    found = rates(100, **fields)
    assert found[:steps] == pytest.approx([0.5 * (step + 1) / steps for step in range(steps)])
    assert found[steps:] == [0.5] * (100 - steps)


def test_the_cosine_is_torchs() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([weight], lr=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 80, eta_min=0.05)
    wanted = []
    for _ in range(80):
        wanted.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert rates(80, schedule="cosine", cosine_end=0.1) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "fields",
    [
        {"warmup": 2, "cosine_length": 5},
        {"warmup": 20, "cosine_length": 50, "schedule_unit": "steps"},
    ],
)
def test_the_cosine_follows_the_warm_up_and_stays_at_its_end(fields: dict[str, object]) -> None:
    found = rates(100, schedule="cosine", cosine_end=0.2, **fields)
    wanted = [0.5 * (0.2 + 0.8 * (1 + math.cos(math.pi * (step - 20) / 30)) / 2) for step in range(20, 50)]
    assert found[19] == found[20] == 0.5
    assert found[20:50] == pytest.approx(wanted)
    assert found[50:] == pytest.approx([0.1] * 50)
    assert all(later <= earlier for earlier, later in pairwise(found[20:]))


def test_a_cosine_no_longer_than_its_warm_up_leaves_its_end() -> None:
    assert rates(30, schedule="cosine", warmup=2, cosine_length=1, cosine_end=0.5)[19:] == [0.5] + [0.25] * 10


@pytest.mark.parametrize("fields", [{"step_every": 3}, {"step_every": 30, "schedule_unit": "steps"}])
def test_steps_down_are_counted_from_the_start(fields: dict[str, object]) -> None:
    found = rates(100, schedule="step", step_factor=0.5, **fields)
    assert found == [0.5] * 30 + [0.25] * 30 + [0.125] * 30 + [0.0625] * 10
