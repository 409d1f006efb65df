"""The ways to train one network that the paper compares, each a transformation of one recipe (paper, section 4).

A recipe as its file gives it is trained by `gim`: module by module, each by the recipe's own objective. Every other
method changes what it must and leaves the rest: an end-to-end method merges the stack into one module, a supervised
one trains on the labelled samples. So there is one trainer, and whatever holds for a recipe (caches, micro-batches,
resuming, probes) holds for its methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from layerwise.data.parts import Labelled
from layerwise.errors import RecipeError
from layerwise.nets.merged import Merged
from layerwise.nets.pixelcnn import PixelCNN
from layerwise.objectives.cross_entropy import CrossEntropy
from layerwise.objectives.dim import DeepInfoMax
from layerwise.objectives.predsim import PredSim
from layerwise.recipe.recipe import Recipe
from layerwise.settings.choices import MethodName


def with_method(recipe: Recipe, name: MethodName) -> Recipe:
    """The recipe, trained otherwise.

    Args:
        recipe: as its file and the overrides give it, before any method was applied.

    Raises:
        RecipeError: an end-to-end method of a recipe that is trained end to end already.
    """
    changed = METHODS[name](recipe)
    if "network" in changed or "training" in changed:  # modules are merged, or nothing is trained
        changed["stages"] = {}
    elif "objective" in changed:
        changed["stages"] = {
            number: {group: part for group, part in own.items() if group != "objective"}
            for number, own in recipe.stages.items()
        }
    return recipe.model_copy(update={**changed, "method": name})


def is_by_its_method(recipe: Recipe) -> bool:
    """Whether a recipe is what its method makes of one, and not merely says so."""
    if recipe.method == "gim":
        return True
    try:
        changed = METHODS[recipe.method](recipe)
    except RecipeError:  # merged already
        return True
    return all(
        getattr(recipe, name) == value if name == "training" else type(getattr(recipe, name)) is type(value)
        for name, value in changed.items()
    )


def _gim(recipe: Recipe) -> dict[str, Any]:
    """Greedy InfoMax: each module by the recipe's objective (Löwe et al. 2019)."""
    return {}


def _cpc(recipe: Recipe) -> dict[str, Any]:
    """Contrastive predictive coding: the same objective, end to end, from a context (Oord et al. 2018)."""
    return _merged(recipe, context=None if recipe.network.has_context else PixelCNN())


def _supervised(recipe: Recipe) -> dict[str, Any]:
    """The labels, end to end."""
    return {**_merged(recipe), **_labelled(recipe), "objective": CrossEntropy()}


def _greedy_supervised(recipe: Recipe) -> dict[str, Any]:
    """The labels, module by module (Belilovsky et al. 2019)."""
    return {**_labelled(recipe), "objective": CrossEntropy()}


def _predsim(recipe: Recipe) -> dict[str, Any]:
    """Labels and similarities, module by module (Nøkland & Eidnes 2019)."""
    return {**_labelled(recipe), "objective": PredSim()}


def _dim(recipe: Recipe) -> dict[str, Any]:
    """Deep InfoMax's local objective, end to end (Hjelm et al. 2019)."""
    return {**_merged(recipe), "objective": DeepInfoMax()}


def _greedy_dim(recipe: Recipe) -> dict[str, Any]:
    """Deep InfoMax's local objective, module by module."""
    return {"objective": DeepInfoMax()}


def _random(recipe: Recipe) -> dict[str, Any]:
    """No training: the network as the seed makes it. Nothing reads a cache."""
    return {"training": recipe.training.model_copy(update={"epochs": 0}), "schedule": "iterative", "feed": "recompute"}


def _merged(recipe: Recipe, context: PixelCNN | None = None) -> dict[str, Any]:
    if isinstance(recipe.network, Merged):
        raise RecipeError(
            f"the recipe {recipe.name!r} is already merged into one module: --method needs a recipe whose network "
            f"has several modules"
        )
    return {"network": Merged(network=recipe.network, context=context), "schedule": "iterative"}


def _labelled(recipe: Recipe) -> dict[str, Any]:
    return {"dataset": Labelled(dataset=recipe.dataset)}


METHODS: dict[MethodName, Callable[[Recipe], dict[str, Any]]] = {
    "gim": _gim,
    "cpc": _cpc,
    "supervised": _supervised,
    "greedy-supervised": _greedy_supervised,
    "predsim": _predsim,
    "dim": _dim,
    "greedy-dim": _greedy_dim,
    "random": _random,
}
"""Each method by name: the fields of the recipe that it replaces."""
