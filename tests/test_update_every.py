"""Uneven training: a module of the simultaneous schedule that is updated every n-th step (paper, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from layerwise.pipeline.setup import Setup
from layerwise.recipe import Recipe
from layerwise.recipe.loader import apply_overrides
from layerwise.training.feeds import Batch
from layerwise.training.step import train_step
from tests.conftest import TINY


def uneven(*every: int) -> Recipe:
    return apply_overrides(TINY, ["schedule=simultaneous", f"training.update_every={list(every)}"])


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_a_module_changes_in_its_own_steps_alone(micro_batch: int | None, make_setup: Callable[..., Setup]) -> None:
    setup = make_setup(uneven(1, 3, 2))
    modules = setup.untrained()
    learners = [setup.learner(number, module) for number, module in enumerate(modules, 1)]
    batch = Batch(setup.splits.train.batch(np.arange(16), 0))
    for step in range(7):
        before = [[weight.clone() for weight in module.parameters()] for module in modules]
        losses = train_step(learners, batch, step, replace(setup.arithmetic, micro_batch=micro_batch))
        assert len(losses) == 3
        changed = [
            any(not torch.equal(new, old) for new, old in zip(module.parameters(), olds, strict=True))
            for module, olds in zip(modules, before, strict=True)
        ]
        assert changed == [True, step % 3 == 0, step % 2 == 0]


def test_the_last_number_holds_for_the_modules_above(make_setup: Callable[..., Setup]) -> None:
    setup = make_setup(uneven(1, 4))
    assert [setup.learner(n, module).every for n, module in enumerate(setup.untrained(), 1)] == [1, 4, 4]


def test_one_after_another_every_module_is_updated_in_every_step(make_setup: Callable[..., Setup]) -> None:
    setup = make_setup(apply_overrides(TINY, ["training.update_every=[1, 4]"]))
    assert setup.learner(2, setup.untrained()[1]).every == 1
