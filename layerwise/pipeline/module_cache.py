"""A module's activation cache: what it is made from, in what form, and opening it.

The cache's key holds all that can change a value in it. A cache whose key differs is stale, and no stage reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import activation_cache
from activation_cache import Cache, CacheError, Status, Storage
from layerwise.errors import DamagedData, NotReady, RunLocked, WillNotFit
from layerwise.files.made_from import cache_made_from
from layerwise.pipeline.frozen import frozen_digests
from layerwise.pipeline.rolling import read_rolling, rolls
from layerwise.pipeline.setup import Setup

PROBED = ("probe", "test")
CALIBRATION_SAMPLES = 512  # where a sample has one number a channel, 64 leave an error twice as large


def storage(setup: Setup) -> Storage:
    return Storage(dtype=setup.recipe.cache.dtype, codec=setup.recipe.cache.codec)


def cache_key(setup: Setup, number: int) -> dict[str, Any]:
    """Everything that can change a value in module `number`'s cache."""
    return cache_made_from(
        cache_part(setup, number),
        frozen_digests(setup, number),
        storage(setup),
        rolls=rolls(setup, number),
        below_rolls=number > 1 and rolls(setup, number - 1),
    )


def cache_part(setup: Setup, number: int) -> dict[str, Any]:
    """The recipe's part of `cache_key`."""
    recipe = setup.recipe
    causes: dict[str, Any] = {
        "module": number,
        "seed": recipe.seed,
        "dataset": recipe.dataset.identity(of_stages=recipe.dataset.probed_apart),
        "manifest": {name: value for name, value in setup.facts.manifest.items() if name in _splits(setup)},
        "network": recipe.network.through(number),
        "views": recipe.stored_views("train"),
        "calibration": CALIBRATION_SAMPLES if recipe.cache.dtype == "uint8" else None,
    }
    if number > 1 and recipe.feed == "cache" and recipe.cache.dtype != "float32":
        causes["inputs"] = recipe.cache.dtype  # the outputs are computed from rounded values
    return causes


def stored_splits(setup: Setup) -> list[str]:
    """The names of the splits that a cache of this recipe holds."""
    return [name for name in _splits(setup) if setup.recipe.cache.probe_splits or name not in PROBED]


def _splits(setup: Setup) -> list[str]:
    """The names of those that a cache may hold."""
    return [name for name in setup.facts.sizes if not (setup.recipe.dataset.probed_apart and name in PROBED)]


def stored_inputs(setup: Setup, number: int) -> str | None:
    """The dtype of the cache whose values module `number`'s outputs are computed from.

    None where they are computed from the exact values, for which a float32 cache and the frozen modules serve alike.
    """
    found: str | None = cache_part(setup, number).get("inputs")
    return None if found is None or rolls(setup, number - 1) else found


def open_cache(setup: Setup, number: int) -> Cache:
    """Module `number`'s cache, checked against the modules and settings that it should come from.

    Raises:
        NotReady: there is none, it is unfinished, or stale.
        DamagedData: its files are not what was written.
    """
    with cache_errors(setup, number):
        return activation_cache.open_cache(setup.run.cache(number), cache_key(setup, number))


def as_stored(values: Tensor, storage: Storage) -> npt.NDArray[Any]:
    """Rounded on the device, where that is quick, and half as much to move."""
    if storage.dtype == "float16":
        return values.half().cpu().numpy()
    if storage.dtype == "bfloat16":
        return values.bfloat16().view(torch.int16).cpu().numpy().view(np.uint16)
    return values.float().cpu().numpy()


@contextmanager
def cache_errors(setup: Setup, number: int) -> Iterator[None]:
    """The cache's errors as ours, with the command that mends them."""
    command = cache_command(setup, number)
    try:
        yield
    except activation_cache.Damaged as error:
        raise DamagedData(f"{without_advice(str(error))}. Repair it with: {command} --repair") from error
    except activation_cache.DoesNotFit as error:
        raise WillNotFit(f"{error}. {_more_room(setup, number, error)}") from error
    except activation_cache.Locked as error:
        raise RunLocked(str(error)) from error
    except activation_cache.StoreError as error:
        raise NotReady(str(error)) from error
    except activation_cache.InvalidSamples as error:
        raise NotReady(f"{error}. Another --set cache.dtype may hold it, such as float32") from error
    except CacheError as error:
        raise NotReady(f"{without_advice(str(error))}. Write it with: {command}") from error


def without_advice(message: str) -> str:
    """A message of the cache without its general advice at the end, for where ours, a command, takes its place."""
    return re.sub(r"; (?:write it|repair the cache at )[^;]*$", "", message)


def _more_room(setup: Setup, number: int, error: activation_cache.DoesNotFit) -> str:
    """What to type where a writer met the end of the disk or of the budget: less was left out than was estimated."""
    budget, free = setup.recipe.cache.budget, activation_cache.free(setup.run.cache(number))
    if budget is not None and (free is None or free >= error.needed):
        return f"Allow more with: {setup.command(f'cache --module {number}', f'cache.budget={budget * 5 // 4}')}"
    return f"After freeing disk space, resume with: {cache_command(setup, number)}"


def cache_command(setup: Setup, number: int) -> str:
    return setup.command(f"cache --module {number}")


def cached(setup: Setup, number: int) -> bool:
    """Whether module `number`'s cache is whole, made from what the recipe asks for, and within the budget; and its
    window, if it has one, of a size that was settled for these settings.
    """
    if rolls(setup, number) and read_rolling(setup, number) is None:
        return False
    found = activation_cache.inspect(setup.run.cache(number), cache_key(setup, number))
    return found.state == "valid" and not over_budget(setup, found)


def over_budget(setup: Setup, found: Status) -> bool:
    """Whether a cache that was written under another budget is larger than the recipe allows now."""
    return setup.recipe.cache.budget is not None and found.bytes > setup.recipe.cache.budget
