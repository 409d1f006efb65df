"""The losses of the first updates of every recipe and method are those that were written down.

They change with any change to a network, an objective, an optimiser or the seeds, and with none that only moves code.
`pytest --regenerate-golden tests/golden/test_losses.py` writes them anew: do that when the change was meant, and say
so in the changelog.

In float64, on made-up samples of each dataset's shape, so that the losses depend on the recipe alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from layerwise.recipe.learner import make_learner
from layerwise.recipe.loader import load_recipe
from layerwise.seeding import seeded
from layerwise.training.feeds import Batch
from layerwise.training.step import Arithmetic, train_step

GOLDEN = Path(__file__).parent / "losses.json"
RECIPES = ("digits", "own_objective", "voices", "stl10", "images", "librispeech", "speech")
METHODS = ("gim", "cpc", "supervised", "greedy-supervised", "predsim", "dim", "greedy-dim")
SPEECH_METHODS = ("gim", "cpc", "supervised", "greedy-supervised")
LONGEST = {"librispeech": 5120, "speech": 5120, "voices": 5120}
NARROW = {
    "stl10": ["network.width=0.125"],
    "images": ["network.width=0.125"],
    "librispeech": ["network.channels=64", "network.context.hidden=64"],
    "speech": ["network.channels=64", "network.context.hidden=64"],
}
STEPS, BATCH = 3, 4
CLASSES = {"class": 5, "phone": 7, "speaker": 3}

ALIKE = ("own_objective", "images", "librispeech", "speech")
"""Recipes whose other methods are those of a recipe before them, on a network of the same kind."""
CASES = [
    (recipe, method)
    for recipe in RECIPES
    for method in (SPEECH_METHODS if recipe in LONGEST else METHODS)
    if method == "gim" or recipe not in ALIKE
]


def losses(name: str, method: str) -> list[list[float]]:
    """Of each update and module, nats."""
    recipe = load_recipe(
        name, [f"method={method}", f"training.batch_size={BATCH}", "training.micro_batch=2", *NARROW.get(name, [])]
    )
    shape = recipe.dataset.expects()[0]  # type: ignore[index]
    shape = (*shape[:-1], LONGEST.get(name, shape[-1]))
    device = torch.device("cpu")
    with seeded(recipe.seed, "modules"):
        modules = recipe.network.modules(shape)
    learners = []
    for number, module in enumerate(modules, 1):
        learner = make_learner(recipe, number, module, shape, CLASSES, device)
        learner.module.double()
        learner.objective.double()
        learners.append(learner)
    steps = torch.arange(STEPS * BATCH * torch.Size(shape).numel(), dtype=torch.float64)
    inputs = (steps.mul(0.7).sin() + steps.mul(0.0191).cos()).view(STEPS, BATCH, *shape)
    labels = {task: torch.arange(BATCH) % classes for task, classes in CLASSES.items()}
    if name in LONGEST:
        labels["phone"] = torch.arange(BATCH * 32).view(BATCH, 32) % CLASSES["phone"]
    arithmetic = Arithmetic(device, "fp32", 2, recipe.seed, recipe.training.loss_group)
    return [train_step(learners, Batch(inputs[step], labels), step, arithmetic) for step in range(STEPS)]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_first_losses_are_as_written_down(name: str, method: str, request: pytest.FixtureRequest) -> None:
    found = losses(name, method)
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--regenerate-golden"):
        known.setdefault(name, {})[method] = found
        GOLDEN.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        return
    torch.testing.assert_close(torch.tensor(found), torch.tensor(known[name][method]), rtol=1e-6, atol=1e-9)


def test_every_case_is_written_down_and_learns() -> None:
    known = json.loads(GOLDEN.read_text())
    assert {(recipe, method) for recipe, methods in known.items() for method in methods} == set(CASES)
    for recipe, methods in known.items():
        for method, (first, second, _) in methods.items():
            assert first != second, (recipe, method)
