"""Bytes of the caches of a run before any is written: whole, as a window of one batch, and what there is for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import activation_cache
from layerwise.nets.module import output_shapes
from layerwise.pipeline.frozen import trained_inputs
from layerwise.pipeline.rolling import SLOTS, least_slot
from layerwise.pipeline.room import without_caches
from layerwise.pipeline.setup import Setup
from layerwise.recipe.recipe import Recipe
from layerwise.settings.base import Shape
from layerwise.settings.training import CacheSettings

PROBED = ("probe", "test")
ITEM = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
COMPRESSED = 0.5
"""Of their bytes, what a lossless codec leaves of rectified activations, at best: half of them are zeros."""


@dataclass(frozen=True)
class SplitSizes:
    """Of the splits of a dataset."""

    samples: Mapping[str, int]
    lengths: Mapping[str, int]
    """Mean length of the samples of each split in which they differ."""
    published: bool
    """By the dataset's authors, since its files are not there."""


@dataclass(frozen=True)
class CachePlan:
    """The cache of one module."""

    module: int
    samples: Mapping[str, int]
    """Of each split."""
    views: Mapping[str, int]
    """That are stored of each sample of a split."""
    values: Mapping[str, int]
    """Numbers that the module makes of each split."""
    each: int
    """Numbers that it makes of a training sample."""
    written: int
    """Bytes that are on the disk already."""

    def bytes_(self, cache: CacheSettings) -> dict[str, int]:
        """dtype to bytes before compression."""
        values = sum(
            count * self.views[split]
            for split, count in self.values.items()
            if cache.probe_splits or split not in PROBED
        )
        return {dtype: values * item for dtype, item in ITEM.items()}

    def floor(self, cache: CacheSettings, batch_size: int) -> int:
        """Bytes that it takes at least, after compression: of the training samples a window of one batch is enough,
        and the slot that is being filled.
        """
        return int(self._least(cache, batch_size) * left(cache))

    def enough(self, cache: CacheSettings, batch_size: int) -> int:
        """Bytes that are enough for the same, however little compression leaves out."""
        return int(1.02 * self._least(cache, batch_size)) + sum(self.samples.values()) * 128 + (SLOTS + 2) * 16384

    def _least(self, cache: CacheSettings, batch_size: int) -> int:
        window = (SLOTS + 1) * least_slot(batch_size) * self.each
        others = {split: count * self.views[split] for split, count in self.values.items()}
        stored = {**others, "train": min(window, self.values["train"])}
        values = sum(count for split, count in stored.items() if cache.probe_splits or split not in PROBED)
        return values * ITEM[cache.dtype]

    def room(self, cache: CacheSettings, free: int | None) -> int | None:
        """Bytes that there are for it; None where there is no limit."""
        limits = [cache.budget, None if free is None else free + self.written]
        return min((limit for limit in limits if limit is not None), default=None)

    def fits(self, cache: CacheSettings, batch_size: int, free: int | None) -> bool:
        room = self.room(cache, free)
        return room is None or self.floor(cache, batch_size) <= room


def cache_plans(setup: Setup, sample: Shape, sizes: SplitSizes) -> list[CachePlan]:
    """One for each module whose outputs are stored; `sample` is what the network is trained on."""
    recipe = setup.recipe
    if recipe.feed != "cache":
        return []
    counts, shapes = values_made(recipe, sizes, sample), module_outputs(recipe, sample, sample)[0]
    stored = [group[-1] for group in recipe.groups(len(shapes)) if group[-1] < len(shapes)]
    return [
        CachePlan(
            number,
            sizes.samples,
            {split: recipe.stored_views(split) for split in sizes.samples},
            counts[number - 1],
            math.prod(shapes[number - 1]),
            activation_cache.inspect(setup.run.cache(number)).bytes,
        )
        for number in stored
    ]


def module_outputs(recipe: Recipe, sample: Shape, inputs: Shape) -> tuple[list[Shape], list[int]]:
    """Shape of each module's output for an input, and its number of weights; `sample` is what it is trained on."""
    shapes = output_shapes(partial(recipe.network.modules, sample), inputs)
    with torch.device("meta"):
        modules = recipe.network.modules(sample)
    return shapes, [sum(weight.numel() for weight in module.parameters()) for module in modules]


def values_made(recipe: Recipe, sizes: SplitSizes, sample: Shape) -> list[dict[str, int]]:
    """For each module, the number of values that it makes of each split.

    Training sees windows of recordings, and probes all of them: those splits are counted as so many recordings of
    their mean length, which is off by less than a position each.
    """
    inputs = {
        split: (*sample[:-1], sizes.lengths[split]) if split in sizes.lengths else sample for split in sizes.samples
    }
    outputs = {shape: module_outputs(recipe, sample, shape)[0] for shape in {sample, *inputs.values()}}
    return [
        {split: count * math.prod(outputs[inputs[split]][module]) for split, count in sizes.samples.items()}
        for module in range(len(outputs[sample]))
    ]


def left(cache: CacheSettings) -> float:
    """What compression leaves at best."""
    return 1.0 if cache.codec == "none" else COMPRESSED


def bytes_to_write(plans: Sequence[CachePlan], cache: CacheSettings) -> int:
    """What is still to be written of all caches, at their best compression and each within the budget."""
    whole = [int(plan.bytes_(cache)[cache.dtype] * left(cache)) for plan in plans]
    kept = whole if cache.budget is None else [min(bytes_, cache.budget) for bytes_ in whole]
    return sum(max(bytes_ - plan.written, 0) for bytes_, plan in zip(kept, plans, strict=True))


def ways_out(setup: Setup, plans: Sequence[CachePlan], free: int | None, depth: int) -> str | None:
    """Commands with which every cache fits: a larger budget, fewer bytes a sample, or no caches."""
    cache, batch_size = setup.recipe.cache, setup.recipe.training.batch_size
    commands = []
    enough = max(plan.enough(cache, batch_size) for plan in plans)
    choices: list[dict[str, Any]] = [{"probe_splits": False}]
    if trained_inputs(setup, 2) is None:  # else that stage has trained on values of this dtype
        choices += [{"dtype": "uint8"}, {"probe_splits": False, "dtype": "uint8"}]

    def fit(**fields: Any) -> bool:
        changed = cache.model_copy(update=fields)
        return all(plan.fits(changed, batch_size, free) for plan in plans)

    if cache.budget is not None and fit(budget=enough):
        commands.append(setup.command("run", f"cache.budget={enough}"))
    for fields in choices:
        if all(getattr(cache, name) != value for name, value in fields.items()) and fit(**fields):
            commands.append(setup.command("run", *(f"cache.{name}={str(v).lower()}" for name, v in fields.items())))
            break
    if (without := without_caches(setup, depth)) is not None:
        commands.append(without)
    return f"These would fit: {' ; '.join(commands)}" if commands else None
