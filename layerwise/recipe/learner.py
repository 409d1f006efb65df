"""From a recipe and a module to what a stage trains: the module with its objective and its optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from layerwise.nets.checkpointing import checkpoint_blocks
from layerwise.nets.module import Module
from layerwise.recipe.overrides import for_stage
from layerwise.recipe.recipe import Recipe
from layerwise.seeding import seeded
from layerwise.settings.base import Shape
from layerwise.training.optimisers import learning_rate, make_optimiser
from layerwise.training.step import Learner


def make_learner(
    recipe: Recipe,
    number: int,
    module: Module,
    sample_shape: Shape,
    classes: Mapping[str, int],
    device: torch.device,
    steps_per_epoch: int = 1,
) -> Learner:
    """The module, brought to the device, with a fresh objective and optimiser, as the recipe has them for it.

    Args:
        steps_per_epoch: batches in an epoch, on which schedules of the learning rate depend; no matter for memory.
    """
    recipe = for_stage(recipe, number)
    with seeded(recipe.seed, "objective", number):
        objective = recipe.objective.build(module, sample_shape, classes)
    if device.type != "cpu":  # weights are made on the CPU
        module.to(device)
        objective.to(device)
    module.train()
    if recipe.training.checkpointing:
        checkpoint_blocks(module)
    settings = recipe.optimiser.lasting(recipe.training.epochs)
    optimiser = make_optimiser(settings, [module, objective], device, number)
    varies = settings.schedule != "constant" or settings.warmup > 0
    rate = partial(learning_rate, settings, steps_per_epoch) if varies else None
    apart = recipe.schedule == "iterative" or (recipe.together is not None and number > recipe.together)
    steps = (1,) if apart else recipe.training.update_every
    every = steps[min(number, len(steps)) - 1]
    return Learner(number, module, objective, optimiser, every, rate, settings.clip_norm)
