"""One update of every objective, by one process of several or by one alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from layerwise.recipe.learner import make_learner
from layerwise.recipe.loader import load_recipe
from layerwise.seeding import seeded
from layerwise.training.feeds import Batch
from layerwise.training.ranks import Ranks
from layerwise.training.step import Arithmetic, Learner, train_step

BATCH = 8
CLASSES = {"class": 5, "phone": 7, "speaker": 3}
NARROW = {
    "digits": ["network.width=0.125"],
    "own_objective": ["network.width=0.125"],
    "voices": ["network.channels=16", "network.context.hidden=16"],
}
METHODS = {
    "digits": ("gim", "greedy-supervised", "predsim", "dim"),
    "own_objective": ("gim",),
    "voices": ("gim", "greedy-supervised"),
}
ARITHMETIC = {"whole": (None, None), "micro 2": (2, None), "groups of 2": (None, 2), "groups of 4, micro 2": (2, 4),
              "groups of 3": (None, 3)}  # fmt: skip

BRIEFLY = ("whole", "groups of 4, micro 2")
"""Those of them that are tried with every method."""


class Noting(torch.optim.SGD):
    """Keeps the gradients that it was given, and changes nothing."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.noted = [
            torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
            for weight in self.param_groups[0]["params"]
        ]


def learners(name: str, method: str, dtype: torch.dtype, batch: int) -> tuple[list[Learner], Batch, int]:
    recipe = load_recipe(name, [*NARROW[name], f"method={method}"])
    known = recipe.dataset.expects()
    assert known is not None
    shape = (1, 2560) if name == "voices" else known[0]
    made = []
    with seeded(0, "modules"):
        modules = recipe.network.modules(shape)
    for number, module in enumerate(modules, 1):
        learner = make_learner(recipe, number, module, shape, CLASSES, torch.device("cpu"))
        weights = [*learner.module.to(dtype).parameters(), *learner.objective.to(dtype).parameters()]
        made.append(replace(learner, optimiser=Noting(weights, lr=1.0), rate=None))
    numbers = torch.arange(batch * torch.Size(shape).numel(), dtype=torch.float64)
    inputs = (numbers.mul(0.7).sin() + numbers.mul(0.0191).cos()).view(batch, *shape).to(dtype)
    labels = {task: torch.arange(batch) % classes for task, classes in CLASSES.items()}
    if name == "voices":
        labels["phone"] = torch.arange(batch * 16).view(batch, 16) % CLASSES["phone"]
    return made, Batch(inputs, labels), recipe.seed


def part_of(batch: Batch, part: slice) -> Batch:
    return replace(
        batch,
        inputs=batch.inputs[part],
        labels={task: values[part] for task, values in batch.labels.items()},
        begin=part.start,
        whole=len(batch),
    )


def updates(ranks: Ranks) -> Iterator[tuple[str, list[float], list[Tensor]]]:
    """For each case its name, the losses and the gradients of all modules and objectives, one tensor each."""
    for name, methods in METHODS.items():
        for method in methods:
            for dtype in (torch.float32, torch.float64):
                made, whole, seed = learners(name, method, dtype, BATCH)
                for how, (micro, group) in ARITHMETIC.items():
                    if method != "gim" and dtype == torch.float32:
                        continue
                    if (method, dtype) != ("gim", torch.float64) and how not in BRIEFLY:
                        continue
                    if micro and any(one.module.couples_samples() for one in made):
                        continue
                    arithmetic = Arithmetic(torch.device("cpu"), "fp32", micro, seed, group, ranks)
                    batch = whole if ranks.alone else part_of(whole, arithmetic.part(len(whole)))
                    losses = train_step(made, batch, 0, arithmetic)
                    found = [torch.cat([g.flatten() for g in one.optimiser.noted]) for one in made]  # type: ignore[attr-defined]
                    yield f"{name} {method} {dtype} {how}", losses, found


def as_tensors(ranks: Ranks) -> dict[str, Tensor]:
    found = {}
    for case, losses, gradients in updates(ranks):
        found[f"{case} losses"] = torch.tensor(losses, dtype=torch.float64)
        found |= {f"{case} {number}": gradient for number, gradient in enumerate(gradients, 1)}
    return found
