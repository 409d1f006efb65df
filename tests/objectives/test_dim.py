"""Deep InfoMax against plain loops over pairs in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from layerwise.nets.module import Encoded
from layerwise.objectives.dim import DeepInfoMaxLoss
from layerwise.objectives.objective import Context

B, C, P, U = 4, 5, 6, 7


@pytest.mark.parametrize("measure", ["jsd", "nce"])
def test_against_loops(measure: str) -> None:
    torch.manual_seed(0)
    objective = DeepInfoMaxLoss(C, U, measure).double()
    c = torch.randn(B, C, 2, 3, dtype=torch.float64)
    loss = objective.loss(objective.represent(Encoded(c, c, c)), Context(torch.Generator())).item()

    positions = c.reshape(B, C, P).numpy()
    local = embed(objective.local, positions)
    summary = embed(objective.summary, positions.mean(2, keepdims=True))[:, :, 0]

    def score(i: int, j: int, p: int) -> float:
        return float(summary[i] @ local[j, :, p])

    if measure == "jsd":
        own = [math.log(2) - softplus(-score(i, i, p)) for i in range(B) for p in range(P)]
        mixed = [
            softplus(-score(i, j, p)) + score(i, j, p) - math.log(2)
            for i in range(B)
            for j in range(B)
            if i != j
            for p in range(P)
        ]
        expected = np.mean(mixed) - np.mean(own)
    else:
        terms = []
        for i in range(B):
            others = [score(i, j, q) for j in range(B) if j != i for q in range(P)]
            for p in range(P):
                every = np.array([score(i, i, p), *others])
                terms.append(np.log(np.exp(every - every.max()).sum()) + every.max() - every[0])
        expected = np.mean(terms)
    assert loss == pytest.approx(expected, abs=1e-9)


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def embed(embedding: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    """(B, C, P) to (B, U, P): convolution of width one is a matrix product at each position."""
    state = {name: value.numpy() for name, value in embedding.state_dict().items()}
    hidden = np.einsum("uc,bcp->bup", state["residual.0.weight"][:, :, 0], x)
    mean, variance = hidden.mean((0, 2), keepdims=True), hidden.var((0, 2), keepdims=True)
    hidden = (hidden - mean) / np.sqrt(variance + 1e-5)
    hidden = hidden * state["residual.1.weight"][:, None] + state["residual.1.bias"][:, None]
    hidden = (
        np.einsum("uv,bvp->bup", state["residual.3.weight"][:, :, 0], np.maximum(hidden, 0))
        + state["residual.3.bias"][:, None]
    )
    hidden = hidden + np.einsum("uc,bcp->bup", state["shortcut.weight"][:, :, 0], x) + state["shortcut.bias"][:, None]
    normalised = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True) + 1e-5)
    return normalised * state["normalise.weight"][:, None] + state["normalise.bias"][:, None]


@pytest.mark.parametrize("measure", ["jsd", "nce"])
def test_a_last_batch_of_one_sample_can_be_validated(measure: str) -> None:
    objective = DeepInfoMaxLoss(C, U, measure).eval()
    c = torch.randn(1, C, 2, 3)
    assert torch.isfinite(objective.loss(objective.represent(Encoded(c, c, c)), Context(torch.Generator())))
