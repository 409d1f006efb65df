"""What stages, caches and probes are made from: the recipe's part of it, and what the run's own files add.

The recipe's part is noted in the run (expected.json), so that a run can be looked at without its recipe, whose code
may be somebody's own and takes seconds to import. Here the two are put together, for the trainer and the onlooker
alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import activation_cache
from activation_cache import Storage

Identity = dict[str, Any]


def stage_made_from(part: Identity, weights: Sequence[str], window: Mapping[str, int] | None) -> Identity:
    """
    Args:
        part: of the recipe; without `inputs` where the stage reads the dataset.
        weights: sha256 of the weights of each module below.
        window: how the rolling window below rolls, where the stage reads one.
    """
    if "inputs" not in part:
        return part
    inputs = {**part["inputs"], "weights": list(weights)}
    if window is not None:
        inputs.pop("order", None)  # a window has no chunks to shuffle in
        inputs["window"] = dict(window)
    return {**part, "inputs": inputs}


def cache_made_from(
    part: Identity, weights: Sequence[str], storage: Storage, *, rolls: bool, below_rolls: bool
) -> Identity:
    """The key of a module's cache.

    Args:
        part: of the recipe.
        weights: sha256 of the weights of the module and each below.
        rolls: the cache was written without its training samples, of which a window holds some.
        below_rolls: so was that of the module below, and the outputs are computed from the exact values.
    """
    causes = {**part, "weights": list(weights)}
    if below_rolls:
        causes.pop("inputs", None)
    if rolls:
        causes["window"] = True
    return activation_cache.make_key(causes, storage)


def probe_made_from(part: Identity, weights: Sequence[str]) -> Identity:
    """
    Args:
        part: of the recipe.
        weights: sha256 of the weights of the modules that the representation went through.
    """
    return {**part, "weights": list(weights)}
