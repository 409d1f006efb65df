"""What a run will take, told before anything runs: memory and disk, stage by stage, and whether they are there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

import activation_cache
from layerwise import memory
from layerwise.data.parts import Labelled
from layerwise.errors import NotReady, RecipeError, Unpredictable, UsageError, WillNotFit
from layerwise.memory import Fit, Samples
from layerwise.memory.fit import without_ways
from layerwise.nets.speech import LABEL_HOP, LABEL_SPAN, at_labels
from layerwise.pipeline.cache_plan import SplitSizes, bytes_to_write, cache_plans, module_outputs, ways_out
from layerwise.pipeline.setup import Setup
from layerwise.recipe.recipe import Recipe
from layerwise.settings.base import Shape
from layerwise.settings.units import size
from layerwise.training.feeds import require_full_batch


@dataclass(frozen=True)
class StagePlan:
    """One training, of one module or of several together."""

    modules: tuple[int, ...]
    parameters: int
    """Weights of the modules; those of the objectives, which are thrown away, not counted."""
    output: Shape
    """Shape of what the last of them hands on for a sample."""
    fit: Fit | None
    """How it goes through its batches, and the bytes that this takes: what takes least where nothing fits; None where
    that cannot be predicted."""
    problem: str | None
    """Why it does not fit, or why its memory cannot be predicted."""
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
    """One for each stage and each cache that does not fit."""
    advice: str | None
    """A command that would fit, where something does not."""
    published: bool
    """Whether the dataset is not there, and the sizes of its splits are those that its authors publish."""

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def peak(self) -> int | None:
        """Of the stage that takes most."""
        return max((stage.fit.footprint.peak for stage in self.stages if stage.fit is not None), default=None)

    def __str__(self) -> str:
        """One line; where something does not fit, one for each problem."""
        if not self.fits:
            return "\n".join(["will not fit:", self.why_not()])
        disk = "an unknown part" if self.disk_needed is None else size(self.disk_needed)
        if self.disk_free is None:
            disk += " on an object store, and rolling windows on this machine"
        else:
            if self.disk_needed is not None and self.disk_needed > self.disk_free:
                disk += ", more than there is, and so as rolling windows,"
            disk += f" of {size(self.disk_free)} of free disk"
        there = f" of the {size(self.memory)} {self.memory_of}" if self.memory is not None else ""
        return f"fits: at most {size(self.peak)} of memory (predicted){there}; {disk} for caches"

    def why_not(self) -> str:
        """A line for each problem, and one for what would fit."""
        return "\n".join([*self.problems, *([] if self.advice is None else [self.advice])])


def make_plan(setup: Setup) -> Plan:
    """Work out every stage without training or allocating anything.

    Raises:
        NotReady: the dataset is not there, and its settings do not tell the shape of a sample.
        RecipeError: a batch is larger than the dataset.
    """
    recipe = setup.recipe
    samples, sizes = _samples(setup)
    if sizes is not None and recipe.method != "random":
        require_full_batch(sizes.samples["train"], recipe.training.batch_size)
    shapes, weights = module_outputs(recipe, samples.shape, samples.shape)
    _require_probes(recipe, samples, shapes)
    caches = {} if sizes is None else {plan.module: plan for plan in cache_plans(setup, samples.shape, sizes)}
    available, whose = _memory(setup)
    stages, problems, too_large = [], [], []
    for group in recipe.groups(len(shapes)):
        found, problem = _fit(setup, group, samples)
        if problem is None and found is not None and available is not None and found.footprint.peak > available:
            problem = (
                f"stage {group[-1]} takes {size(found.footprint.peak)} (predicted), more than the {size(available)} "
                f"{whose}"
            )
        # What cannot be predicted is no reason not to run, unless there is a budget to keep.
        if problem is not None and (found is not None or recipe.training.max_memory is not None):
            problems.append(problem)
            too_large.append(found)
        cache = caches.get(group[-1])
        stages.append(
            StagePlan(
                group,
                sum(weights[number - 1] for number in group),
                shapes[group[-1] - 1],
                found,
                problem,
                None if cache is None else cache.bytes_(recipe.cache),
                0 if cache is None else cache.floor(recipe.cache, recipe.training.batch_size),
                0 if cache is None else cache.written,
            )
        )
    advice = _memory_advice(setup, too_large)
    if advice is not None:
        problems = without_ways(problems)[0]
    free = activation_cache.free(setup.run.cache(1))
    for cache in caches.values():
        if not cache.fits(recipe.cache, recipe.training.batch_size, free):
            problems.append(
                f"the cache of module {cache.module} takes {cache.floor(recipe.cache, recipe.training.batch_size):,} "
                f"bytes at least, and there is room for {cache.room(recipe.cache, free):,}"
            )
            advice = advice or ways_out(setup, list(caches.values()), free, len(shapes))
    needed = None if sizes is None else bytes_to_write(list(caches.values()), recipe.cache)
    published = sizes is not None and sizes.published
    return Plan(stages, recipe.cache.dtype, needed, free, available, whose, problems, advice, published)


def require_fit(setup: Setup) -> Plan:
    """
    Raises:
        WillNotFit: memory or disk is too small.
    """
    plan = make_plan(setup)
    if not plan.fits:
        raise WillNotFit(plan.why_not())
    return plan


def _samples(setup: Setup) -> tuple[Samples, SplitSizes | None]:
    """What samples are like and how many there are, from the dataset, else from its settings alone."""
    dataset = setup.recipe.dataset
    try:
        facts = setup.facts
    except (NotReady, UsageError):  # no files, or no --data-dir
        expected = dataset.expects()
        if expected is None or (isinstance(dataset, Labelled) and not expected[1]):
            raise
        published = dataset.published_sizes()
        return Samples(*expected), None if published is None else SplitSizes(published, {}, True)
    return Samples(facts.sample_shape, facts.classes), SplitSizes(facts.sizes, facts.lengths, False)


def _require_probes(recipe: Recipe, samples: Samples, shapes: Sequence[Shape]) -> None:
    """
    Raises:
        RecipeError: frames of a module cannot be brought to the labels of phones, which a probe would find out after
            the module is trained.
    """
    if "phone" not in samples.classes:
        return
    with torch.device("meta"):
        for number, (module, shape) in enumerate(zip(recipe.network.modules(samples.shape), shapes, strict=True), 1):
            labels = (samples.shape[-1] - LABEL_SPAN) // LABEL_HOP + 1
            for part in module.parts():
                frames = torch.empty(1, 1, shape[-1]) if part is module else torch.empty(1, 1, 0)
                try:
                    at_labels(frames, part.hop, labels if part is module else 0, part.front)
                except RecipeError as error:
                    raise RecipeError(f"module {number} cannot be probed for phones: {error}") from error


def _fit(setup: Setup, numbers: Sequence[int], samples: Samples) -> tuple[Fit | None, str | None]:
    try:
        return memory.find(setup.recipe, numbers, samples, host_apart=setup.device.type != "cpu")
    except Unpredictable as error:
        return None, str(error)


def _memory_advice(setup: Setup, too_large: Sequence[Fit | None]) -> str | None:
    """A command with a budget that is enough for every stage."""
    known = [found.footprint.peak for found in too_large if found is not None]
    if setup.recipe.training.max_memory is None or not known or len(known) < len(too_large):
        return None
    enough = -(-max(known) // 10**6)
    return f"Every stage fits with: {setup.command('run', f'training.max_memory={enough}MB')}"


def _memory(setup: Setup) -> tuple[int | None, str]:
    """The bytes that there are, and what they are."""
    if setup.recipe.training.max_memory is not None:
        return setup.recipe.training.max_memory, "that the budget allows"
    if setup.device.type == "cuda":
        return torch.cuda.mem_get_info(setup.device)[0], "that the GPU has free"
    if {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "that this machine has in all"
    return None, ""
