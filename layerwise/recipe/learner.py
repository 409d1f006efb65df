"""From a recipe and a module to what a stage trains: the module with its objective and its optimiser."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from layerwise.nets.checkpointing import checkpoint_blocks
from layerwise.nets.module import Module
from layerwise.recipe.overrides import for_stage
from layerwise.recipe.recipe import Recipe
from layerwise.seeding import seeded
from layerwise.settings.base import Shape
from layerwise.training.step import Learner


def make_learner(
    recipe: Recipe, number: int, module: Module, sample_shape: Shape, classes: Mapping[str, int], device: torch.device
) -> Learner:
    """The module, brought to the device, with a fresh objective and optimiser, as the recipe has them for it."""
    recipe = for_stage(recipe, number)
    with seeded(recipe.seed, "objective", number):
        objective = recipe.objective.build(module, sample_shape, classes)
    if device.type != "cpu":  # weights are made on the CPU
        module.to(device)
        objective.to(device)
    module.train()
    if recipe.training.checkpointing:
        checkpoint_blocks(module)
    rates = recipe.optimiser
    optimiser = torch.optim.Adam(
        [*module.parameters(), *objective.parameters()],
        lr=rates.learning_rate,
        betas=(rates.beta1, rates.beta2),
        eps=rates.epsilon,
        weight_decay=rates.weight_decay,
        # Elsewhere than on the CPU the default makes temporaries as large as all parameters together.
        fused=True if device.type == "cuda" else None,
    )
    apart = recipe.schedule == "iterative" or (recipe.together is not None and number > recipe.together)
    steps = (1,) if apart else recipe.training.update_every
    return Learner(number, module, objective, optimiser, steps[min(number, len(steps)) - 1])
