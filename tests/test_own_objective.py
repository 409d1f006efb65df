"""The example of a user's own objective does what its text says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from layerwise.pipeline.run import open_run
from layerwise.pipeline.setup import Setup
from layerwise.recipe.loader import load_recipe
from layerwise.training.feeds import Batch
from layerwise.training.step import train_step

EXAMPLE = Path(__file__).parents[1] / "recipes" / "own_objective.py"


def test_the_example_loads_by_path_learns_and_trains_in_micro_batches(tmp_path: Path) -> None:
    setup = Setup(open_run(tmp_path, load_recipe(str(EXAMPLE), ["objective.varied=10"])), torch.device("cpu"))
    batch = Batch(setup.splits.train.batch(np.arange(12), 0))
    trained = []
    for micro_batch in (None, 5):
        learner = setup.learner(1, setup.untrained()[0])
        assert learner.objective.weights.varied == 10  # type: ignore[union-attr]
        arithmetic = replace(setup.arithmetic, micro_batch=micro_batch)
        losses = [train_step([learner], batch, step, arithmetic)[0] for step in range(5)]
        assert losses[-1] < losses[0]
        trained.append(losses[0])
    assert abs(trained[0] - trained[1]) < 1e-3 * abs(trained[0])
