"""What a run will take, told before anything runs: memory and disk, stage by stage, and whether they are there."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import activation_cache
from layerwise import memory
from layerwise.data.parts import Labelled
from layerwise.errors import NotReady, Unpredictable, UsageError, WillNotFit
from layerwise.memory import Fit, Samples
from layerwise.nets.module import output_shapes
from layerwise.recipe import Recipe, Shape
from layerwise.rolling import SLOTS, least_slot
from layerwise.setup import DatasetFacts, Setup
from layerwise.units import size

PROBED = ("probe", "test")
ITEM = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
COMPRESSED = 0.5
"""Of their bytes, what a lossless codec leaves of rectified activations, at best: half of them are zeros."""


@dataclass(frozen=True)
class StagePlan:
    """One training, of one module or of several together."""

    modules: tuple[int, ...]
    parameters: int
    """Weights of the modules; those of the objectives, which are thrown away, not counted."""
    output: Shape
    """Shape of what the last of them hands on for a sample."""
    fit: Fit | None
    """How it goes through its batches, and the bytes that this takes; None where it does not fit or cannot be told."""
    problem: str | None
    cache: Mapping[str, int] | None
    """dtype to bytes of its cache before compression; None where nothing is stored, or how many samples there are is
    not known."""
    cache_floor: int
    """Bytes that its cache takes at least, after compression: of the training samples a rolling window is enough."""
    cached: int
    """Bytes of its cache that are on the disk already."""


@dataclass(frozen=True)
class Plan:
    """All stages, and what there is for them."""

    stages: Sequence[StagePlan]
    dtype: str
    """That of the caches, as the recipe says."""
    disk_needed: int | None
    """Bytes of the caches that are still to be written, at their best compression and within the budget for caches;
    None where the number of samples is not known."""
    disk_free: int | None
    """Bytes of the disk where caches lie; None on an object store."""
    memory: int | None
    """Bytes that there are for a stage: the budget; else what the GPU has free; else all memory of the machine. None
    where that is not known."""
    memory_of: str
    """Which of these it is."""
    problems: Sequence[str]

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def peak(self) -> int | None:
        """Of the stage that takes most."""
        return max((stage.fit.footprint.peak for stage in self.stages if stage.fit is not None), default=None)

    def __str__(self) -> str:
        """One line."""
        if not self.fits:
            return f"will not fit: {'; '.join(self.problems)}"
        disk = "an unknown part" if self.disk_needed is None else size(self.disk_needed)
        if self.disk_free is None:
            disk += " on an object store"
        else:
            if self.disk_needed is not None and self.disk_needed > self.disk_free:
                disk += ", more than there is, and so in windows that roll,"
            disk += f" of {size(self.disk_free)} of free disk"
        there = f" of the {size(self.memory)} {self.memory_of}" if self.memory is not None else ""
        return f"fits: at most {size(self.peak)} of memory (predicted){there}; {disk} for caches"


def make_plan(setup: Setup) -> Plan:
    """Work out every stage without training or allocating anything.

    Raises:
        NotReady: the dataset is not there, and its settings do not tell the shape of a sample.
    """
    recipe = setup.recipe
    samples, facts = _samples(setup)
    shapes, weights = _outputs(recipe, samples.shape, samples.shape)
    counts = [] if facts is None else _counts(recipe, facts, samples.shape)
    available, whose = _memory(setup)
    stages, problems = [], []
    for group in recipe.groups(len(shapes)):
        found, problem = _fit(setup, group, samples)
        if problem is None and found is not None and available is not None and found.footprint.peak > available:
            problem = (
                f"stage {group[-1]} takes {size(found.footprint.peak)} (predicted), more than the {size(available)} "
                f"{whose}"
            )
        if problem is not None and found is None and recipe.training.max_memory is None:
            problem = None  # it could not be told, which is no reason not to run
        problems += [problem] if problem is not None else []
        stores = recipe.feed == "cache" and group[-1] < len(shapes)
        stored = counts[group[-1] - 1] if stores and counts else None
        location = setup.run.cache(group[-1])
        stages.append(
            StagePlan(
                group,
                sum(weights[number - 1] for number in group),
                shapes[group[-1] - 1],
                found,
                problem,
                None if stored is None else _cache_bytes(recipe, stored),
                0 if stored is None else _cache_floor(recipe, stored, math.prod(shapes[group[-1] - 1])),
                activation_cache.inspect(location).bytes if stores else 0,
            )
        )
    free = activation_cache.free(setup.run.cache(1))
    limits = [limit for limit in (free, recipe.cache.budget) if limit is not None]
    for stage in stages:
        if limits and stage.cache_floor - stage.cached > min(limits):
            problems.append(
                f"the cache of module {stage.modules[-1]} takes {size(stage.cache_floor)} at least, and there are "
                f"{size(min(limits))} for it: choose another --run-dir, --set cache.dtype=uint8, a larger "
                "--cache-budget, or --feed recompute"
            )
    needed = _disk_needed(recipe, stages) if facts is not None else None
    return Plan(stages, recipe.cache.dtype, needed, free, available, whose, problems)


def require_fit(setup: Setup) -> Plan:
    """
    Raises:
        WillNotFit: memory or disk is too small.
    """
    plan = make_plan(setup)
    if not plan.fits:
        raise WillNotFit("; ".join(plan.problems))
    return plan


def _samples(setup: Setup) -> tuple[Samples, DatasetFacts | None]:
    """What samples are like, from the dataset, else from its settings alone."""
    try:
        facts = setup.facts
    except (NotReady, UsageError):  # no files, or no --data-dir
        expected = setup.recipe.dataset.expects()
        if expected is None or (isinstance(setup.recipe.dataset, Labelled) and not expected[1]):
            raise
        return Samples(*expected), None
    return Samples(facts.sample_shape, facts.classes), facts


def _outputs(recipe: Recipe, sample: Shape, inputs: Shape) -> tuple[list[Shape], list[int]]:
    """Shape of each module's output for an input, and its number of weights; `sample` is what it is trained on."""
    with FakeTensorMode():
        modules = recipe.network.modules(sample)
        shapes = output_shapes(modules, inputs)
    weights = [sum(weight.numel() for weight in module.parameters()) for module in modules]
    return shapes, weights


def _fit(setup: Setup, numbers: Sequence[int], samples: Samples) -> tuple[Fit | None, str | None]:
    try:
        return memory.fit(setup.recipe, numbers, samples, host_apart=setup.device.type != "cpu"), None
    except (WillNotFit, Unpredictable) as error:
        return None, str(error)


def _counts(recipe: Recipe, facts: DatasetFacts, sample: Shape) -> list[dict[str, int]]:
    """For each module, the number of values that it makes of each split which a cache stores.

    Training sees windows of recordings, and probes all of them: those splits are counted as so many recordings of
    their mean length, which is off by less than a position each.
    """
    stored = [split for split in facts.sizes if recipe.cache.probe_splits or split not in PROBED]
    inputs = {split: (*sample[:-1], facts.lengths[split]) if split in facts.lengths else sample for split in stored}
    outputs = {shape: _outputs(recipe, sample, shape)[0] for shape in set(inputs.values())}
    depth = len(outputs[sample])
    return [
        {split: facts.sizes[split] * math.prod(outputs[inputs[split]][module]) for split in stored}
        for module in range(depth)
    ]


def _cache_bytes(recipe: Recipe, counts: Mapping[str, int]) -> dict[str, int]:
    values = sum(count * (recipe.cache.views if split == "train" else 1) for split, count in counts.items())
    return {dtype: values * item for dtype, item in ITEM.items()}


def _cache_floor(recipe: Recipe, counts: Mapping[str, int], each: int) -> int:
    """`each`: values of a training sample. A window holds a batch, and fills one more slot."""
    window = (SLOTS + 1) * least_slot(recipe.training.batch_size) * each
    values = sum({**counts, "train": min(window, counts["train"])}.values())
    return int(values * ITEM[recipe.cache.dtype] * _left(recipe))


def _left(recipe: Recipe) -> float:
    return 1.0 if recipe.cache.codec == "none" else COMPRESSED


def _disk_needed(recipe: Recipe, stages: Sequence[StagePlan]) -> int:
    whole = [int(stage.cache[recipe.cache.dtype] * _left(recipe)) if stage.cache else 0 for stage in stages]
    kept = whole if recipe.cache.budget is None else [min(bytes_, recipe.cache.budget) for bytes_ in whole]
    return sum(max(bytes_ - stage.cached, 0) for bytes_, stage in zip(kept, stages, strict=True))


def _memory(setup: Setup) -> tuple[int | None, str]:
    """The bytes that there are, and what they are."""
    if setup.recipe.training.max_memory is not None:
        return setup.recipe.training.max_memory, "that the budget allows"
    if setup.device.type == "cuda":
        return torch.cuda.mem_get_info(setup.device)[0], "that the GPU has free"
    if {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "that this machine has in all"
    return None, ""
