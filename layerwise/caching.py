"""A frozen module's outputs, written once to an activation cache, so that the stages above never run it again.

The cache's key holds all that can change a value in it. A cache whose key differs is stale, and no stage reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import activation_cache
from activation_cache import Cache, CacheError, Calibration, SplitSpec, Storage
from layerwise.errors import DamagedData, NotReady, StoppedEarly
from layerwise.feeds import CacheFeed, DatasetFeed, Feed, RecomputeFeed
from layerwise.frozen import frozen_digests, load_frozen, require_stages
from layerwise.setup import Setup

CALIBRATION_SAMPLES = 256


def cache_key(setup: Setup, number: int) -> dict[str, Any]:
    """Everything that can change a value in module `number`'s cache."""
    recipe = setup.recipe
    key = {
        "module": number,
        "seed": recipe.seed,
        "dataset": recipe.dataset.identity(),
        "manifest": setup.facts.manifest,
        "network": recipe.network.identity_through(number),
        "weights": frozen_digests(setup, number),
        "precision": recipe.training.precision,
        "views": recipe.cache.views,
        "dtype": recipe.cache.dtype,
    }
    if recipe.cache.dtype == "uint8":
        key["calibration"] = CALIBRATION_SAMPLES
    return key


def open_cache(setup: Setup, number: int) -> Cache:
    """Module `number`'s cache, checked against the modules and settings that it should come from.

    Raises:
        NotReady: there is none, it is unfinished, or stale.
        DamagedData: its files are not what was written.
    """
    write = f"layerwise cache --module {number} --run-dir {setup.run.folder}"
    try:
        return activation_cache.open_cache(setup.run.cache(number), cache_key(setup, number))
    except activation_cache.Damaged as error:
        raise DamagedData(f"{error} Mend it with: {write} --repair") from error
    except CacheError as error:
        raise NotReady(f"{error} Write it with: {write}") from error


def cached(setup: Setup, number: int) -> bool:
    """Whether module `number`'s cache is whole and made from what the recipe asks for."""
    return activation_cache.inspect(setup.run.cache(number), cache_key(setup, number)).state == "valid"


def stage_inputs(setup: Setup, number: int) -> Feed:
    """What stage `number` reads: the dataset for the first, else the cache below it, or the frozen modules themselves.

    Raises:
        NotReady: a module below is not frozen, or its cache is not there, with the command that mends it.
    """
    if number == 1:
        return DatasetFeed(setup.splits, setup.recipe.training.batch_size, setup.order_seed(1))
    require_stages(setup, number - 1)
    return _from_cache(setup, number) if setup.recipe.feed == "cache" else _recomputed(setup, number)


def nearest_inputs(setup: Setup, number: int) -> Feed:
    """What module `number` reads, from the cache below it where that is valid, else from the dataset."""
    if number > 1 and setup.recipe.feed == "cache" and cached(setup, number - 1):
        return _from_cache(setup, number)
    return _recomputed(setup, number)


def _from_cache(setup: Setup, number: int) -> Feed:
    return CacheFeed(open_cache(setup, number - 1), setup.recipe.training.batch_size, setup.order_seed(number), setup.device)


def _recomputed(setup: Setup, number: int) -> Feed:
    recipe = setup.recipe
    source = DatasetFeed(setup.splits, recipe.training.batch_size, setup.order_seed(number), views=recipe.cache.views)
    return RecomputeFeed(source, load_frozen(setup, number - 1), setup.device) if number > 1 else source


def write_cache(setup: Setup, number: int) -> Cache:
    """Run frozen module `number` over every split and store what it gives; goes on where an earlier, killed writing stopped.

    Raises:
        NotReady: the module is not frozen.
        StoppedEarly: interrupted; whole shards are kept.
    """
    require_stages(setup, number)
    outputs = RecomputeFeed(nearest_inputs(setup, number), load_frozen(setup, number)[-1:], setup.device)
    recipe, facts = setup.recipe, setup.facts
    shape = tuple(next(outputs.in_order("validation")).inputs.shape[1:])
    splits = [
        SplitSpec(name, size, shape, labels={task: "int64" for task in facts.classes}, views=recipe.cache.views if name == "train" else 1)
        for name, size in facts.sizes.items()
    ]
    calibration = _calibrate(outputs) if recipe.cache.dtype == "uint8" else None
    storage = Storage(dtype=recipe.cache.dtype, codec=recipe.cache.codec)
    total = sum(split.samples * split.views for split in splits)
    setup.progress.begin(f"cache {number}", total, "samples")
    with activation_cache.create(setup.run.cache(number), cache_key(setup, number), splits, storage, calibration=calibration) as writer:
        raise NotImplementedError
    setup.progress.end()
    return open_cache(setup, number)


def _calibrate(outputs: Feed) -> Calibration:
    """Scales from the first training samples, in their order: the same whatever the machine."""

    def batches() -> Iterator[npt.NDArray[Any]]:
        seen = 0
        for batch in outputs.in_order("train", view=0):
            yield batch.inputs.float().cpu().numpy()
            seen += len(batch)
            if seen >= CALIBRATION_SAMPLES:
                return

    return activation_cache.calibrate(batches(), channel_axis=1)


def describe_cache(setup: Setup, number: int) -> dict[str, Any]:
    """Where a cache lies, its bytes, and what each split holds."""
    cache = open_cache(setup, number)
    splits = {
        name: {"samples": split.samples, "views": split.views, "shape": list(split.shape), "dtype": split.storage.dtype, "codec": split.storage.codec}
        for name, split in cache.splits.items()
    }
    location = setup.run.cache(number)
    return {"module": number, "location": str(location), "bytes": activation_cache.inspect(location).bytes, "splits": splits}
