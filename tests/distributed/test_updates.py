"""Several processes make the update of one: the same losses and gradients, whatever the objective and the groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from layerwise.training.ranks import ALONE
from tests.distributed import updates
from tests.distributed.forked import forked


def found_by(folder: Path, *worlds: int) -> dict[int, dict[str, Tensor]]:
    """Number of processes to what they found."""
    found = {1: updates.as_tensors(ALONE)}
    for world in worlds:
        found[world], *_ = forked(world, folder, updates.as_tensors, seconds=300)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Tensor]]:
    return found_by(tmp_path_factory.mktemp("updates"), 2, 3)


def apart(one: Tensor, other: Tensor) -> float:
    """How far two tensors differ, relative to the larger."""
    return float((one - other).norm() / torch.maximum(one.norm(), other.norm()).clamp(min=1e-300))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_make_the_update_of_one(world: int, found: dict[int, dict[str, Tensor]]) -> None:
    require_same(found[world], found[1])


@pytest.mark.long
def test_four_processes_make_the_update_of_one(tmp_path: Path) -> None:
    found = found_by(tmp_path, 4)
    require_same(found[4], found[1])


def require_same(ours: dict[str, Tensor], alone: dict[str, Tensor]) -> None:
    assert ours.keys() == alone.keys()
    for case, wanted in alone.items():
        assert wanted.abs().sum() > 0, case
        if "float64" in case:
            assert apart(ours[case], wanted) < 1e-12, case
        else:  # which rounds these gradients by some 1e-6, whoever computes them
            exact = alone[case.replace("float32", "float64")].float()
            assert apart(ours[case], exact) < 1e-6 + 4 * apart(wanted, exact), case


def test_the_comparison_would_see_a_gradient_that_is_divided_or_multiplied(found: dict[int, dict[str, Tensor]]) -> None:
    """By the number of processes, as where a loss is reduced inside the graph, or gathered with its gradient."""
    for case, wanted in found[1].items():
        for factor in (1 / 2, 2):
            assert apart(found[2][case] * factor, wanted) > 0.1, case
