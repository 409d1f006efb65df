"""Exact chunked gradients on the paper's own networks, at full width and as they are first made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from layerwise.recipe.learner import make_learner
from layerwise.recipe.loader import load_recipe
from layerwise.seeding import seeded
from layerwise.training.feeds import Batch
from layerwise.training.step import Arithmetic, train_step

CPU = torch.device("cpu")


def photographs() -> Tensor:
    """Four crops (4, 1, 64, 64) of the two photographs that scikit-learn ships, normalised."""
    grey = [photograph.mean(axis=2) / 255 for photograph in load_sample_images().images]
    crops = np.stack([grey[i % 2][100 * i : 100 * i + 64, 120 : 120 + 64] for i in range(4)])
    return torch.tensor((crops - 0.412) / 0.257, dtype=torch.float32)[:, None]


def sounds() -> Tensor:
    """Four stretches (4, 1, 5120) of noise with resonances, as a voice has."""
    rng = np.random.default_rng(0)
    spectrum = np.fft.rfft(rng.standard_normal((4, 1, 5120)))
    hertz = np.fft.rfftfreq(5120, 1 / 16000)
    shape = sum(1 / (1 + ((hertz - formant) / 80) ** 2) for formant in (500.0, 1500.0, 2500.0))
    waves = np.fft.irfft(spectrum * shape)
    return torch.tensor(waves / waves.std(), dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "inputs"), [pytest.param("stl10", photographs, marks=pytest.mark.long), ("librispeech", sounds)]
)
def test_gradients_one_by_one_are_those_of_the_whole_batch(name, inputs) -> None:
    recipe, x = load_recipe(name), inputs()
    shape = tuple(x.shape[1:])
    with seeded(0, "modules"):
        modules = recipe.network.modules(shape)
    for number, module in enumerate(modules, 1):
        learner = make_learner(recipe, number, module, shape, {}, CPU)
        found: list[Tensor] = []

        def keep(optimiser, args, kwargs, found=found) -> None:
            weights = (weight for group in optimiser.param_groups for weight in group["params"])
            found.append(torch.cat([weight.grad.flatten().double() for weight in weights]))

        initial = {name: weight.clone() for name, weight in learner.module.state_dict().items()}
        predictor = {name: weight.clone() for name, weight in learner.objective.state_dict().items()}
        learner.optimiser.register_step_pre_hook(keep)
        for micro_batch in (None, 1, 3):
            learner.module.load_state_dict(initial)
            learner.objective.load_state_dict(predictor)
            train_step([learner], Batch(x), 0, Arithmetic(CPU, "fp32", micro_batch, seed=0))
        for chunked in found[1:]:
            # Promised are 1e-5; with biases whose gradients oneDNN sums, the first module of stl10 comes to 8e-6.
            assert (chunked - found[0]).norm() <= 3e-6 * found[0].norm(), f"module {number}"
        learner.module.load_state_dict(initial)
        with torch.no_grad():
            x = module(x).output
