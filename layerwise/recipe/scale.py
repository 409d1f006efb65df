"""A recipe made small, to see in minutes whether its parts fit together. Its figures are not those of the recipe."""

from __future__ import annotations

import math
from typing import Any

from layerwise.data.parts import Fraction
from layerwise.recipe.overrides import for_stage
from layerwise.recipe.recipe import Recipe
from layerwise.settings.training import Optimiser, Probe, SpeechProbes


def with_scale(recipe: Recipe, scale: float) -> Recipe:
    """Fewer samples, epochs and channels, each so that the work is `scale` times what it was: `scale` cubed in all."""
    if scale == 1:
        return recipe
    return recipe.model_copy(
        update={
            "scale": scale,
            "dataset": Fraction(dataset=recipe.dataset, share=scale),
            "network": recipe.network.scaled(scale),
            "training": recipe.training.model_copy(update={"epochs": math.ceil(recipe.training.epochs * scale)}),
            "optimiser": _shorter_optimiser(recipe.optimiser, scale),
            "stages": {number: _shorter_stage(recipe, number, scale) for number in recipe.stages},
            "probe": _shorter(recipe.probe, scale),
        }
    )


def is_scaled(recipe: Recipe) -> bool:
    """Whether a recipe is as small as its scale says, and does not merely say so."""
    dataset: object = recipe.dataset
    while dataset is not None and not isinstance(dataset, Fraction):
        dataset = getattr(dataset, "dataset", None)
    return recipe.scale == 1 or dataset is not None


def _shorter_stage(recipe: Recipe, number: int, scale: float) -> dict[str, Any]:
    own, whole = recipe.stages[number], for_stage(recipe, number)
    if "epochs" in own.get("training", {}):
        own = {**own, "training": {**own["training"], "epochs": math.ceil(whole.training.epochs * scale)}}
    shorter = _shorter_optimiser(whole.optimiser, scale)
    if "optimiser" in own and shorter != whole.optimiser:
        own = {**own, "optimiser": shorter}
    return own


def _shorter_optimiser(optimiser: Optimiser, scale: float) -> Optimiser:
    """With a schedule of the learning rate over as many times fewer epochs, or over steps as there are fewer."""
    share = scale if optimiser.schedule_unit == "epochs" else scale**2  # of fewer samples too
    changed = {"warmup": optimiser.warmup, "cosine_length": optimiser.cosine_length}
    if optimiser.schedule == "step":
        changed["step_every"] = optimiser.step_every
    found = {name: math.ceil(value * share) for name, value in changed.items() if value is not None}
    return optimiser.model_copy(update=found)


def _shorter(probe: Probe | SpeechProbes, scale: float) -> Probe | SpeechProbes:
    if isinstance(probe, SpeechProbes):
        return SpeechProbes(phone=_fewer_epochs(probe.phone, scale), speaker=_fewer_epochs(probe.speaker, scale))
    return _fewer_epochs(probe, scale)


def _fewer_epochs(probe: Probe, scale: float) -> Probe:
    return probe.model_copy(update={"epochs": math.ceil(probe.epochs * scale)})
