"""LARS against the formulas of the paper, computed with NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerwise.training.lars import LARS

RATE, MOMENTUM, DECAY, TRUST = 0.7, 0.9, 0.01, 0.02


def by_hand(weight: np.ndarray, gradients: list[np.ndarray], adapted: bool) -> np.ndarray:
    """You et al. 2017, algorithm 1: lambda = trust |w| / (|g| + decay |w|); v = m v + rate lambda (g + decay w)."""
    velocity = np.zeros_like(weight)
    for gradient in gradients:
        norm, slope = np.sqrt((weight**2).sum()), np.sqrt((gradient**2).sum())
        local = TRUST * norm / (slope + DECAY * norm) if adapted and norm > 0 and slope > 0 else 1.0
        velocity = MOMENTUM * velocity + RATE * local * (gradient + DECAY * weight)
        weight = weight - velocity
    return weight


@pytest.mark.parametrize("adapted", [True, False])
def test_five_steps_are_those_of_the_paper(adapted: bool) -> None:
    generator = np.random.default_rng(0)
    for shape in ((4, 3), (5,), (2, 3, 3, 3)):
        start = generator.normal(size=shape)
        gradients = [generator.normal(size=shape) * 10.0**power for power in range(-2, 3)]
        weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
        optimiser = LARS([weight], RATE, MOMENTUM, DECAY, TRUST, adapted)
        for gradient in gradients:
            weight.grad = torch.from_numpy(gradient)
            optimiser.step()
        wanted = by_hand(start, gradients, adapted)
        assert np.abs(weight.detach().numpy() - wanted).max() <= 1e-12 * np.abs(wanted).max()


def test_a_step_does_not_depend_on_the_size_of_the_gradient() -> None:
    found = []
    for scale in (1.0, 1e6):
        weight = torch.nn.Parameter(torch.arange(1.0, 5.0, dtype=torch.float64))
        weight.grad = scale * torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
        LARS([weight], lr=1.0, momentum=0.0, trust=0.1).step()
        found.append(weight.detach())
    torch.testing.assert_close(*found)
    start = torch.arange(1.0, 5.0, dtype=torch.float64)
    assert (found[0] - start).norm().item() == pytest.approx(0.1 * start.norm().item())


def test_weights_that_are_zero_can_leave_it_and_the_gradient_stays_as_it_is() -> None:
    weight, still = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.ones(3))
    weight.grad, still.grad = torch.ones(3), torch.zeros(3)
    LARS([weight, still], lr=0.5).step()
    assert weight.tolist() == [-0.5] * 3
    assert still.tolist() == [1.0] * 3
    assert weight.grad.tolist() == [1.0] * 3
