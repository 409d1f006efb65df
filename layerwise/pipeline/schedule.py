"""In which order modules are trained: one after another, or all in each step, by one process or as a pipeline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import torch

from layerwise import memory
from layerwise.errors import NotReady, Unpredictable
from layerwise.files.storage import remove_file
from layerwise.pipeline.caching import write_cache
from layerwise.pipeline.dealing import deal as deal_out
from layerwise.pipeline.dealing import module_seconds
from layerwise.pipeline.expected import note_expected
from layerwise.pipeline.frozen import (
    finished,
    freeze,
    frozen_weights,
    meant_for_one,
    require_stage,
    require_stages,
    stage_identity,
    to_make_again,
)
from layerwise.pipeline.inputs import stage_inputs
from layerwise.pipeline.plan import require_fit
from layerwise.pipeline.probe import probe_fixed, probe_module
from layerwise.pipeline.room import unsettled
from layerwise.pipeline.setup import Setup, holds
from layerwise.progress import SILENT
from layerwise.recipe.learner import make_learner
from layerwise.recipe.overrides import for_stage
from layerwise.recipe.recipe import Recipe
from layerwise.seeding import derive_seed
from layerwise.settings.units import size
from layerwise.training.checkpoint import drop_checkpoint, keep_checkpoint, load_checkpoint
from layerwise.training.feeds import ALL, HOST, Feed
from layerwise.training.noise import NoisyFeed
from layerwise.training.pipe import DEPTH, Deal, HandedFeed, Pipe
from layerwise.training.ranks import Ranks
from layerwise.training.stage import train
from layerwise.training.step import Arithmetic, Learner, require_separable
from layerwise.training.threads import threads_restored

META = torch.device("meta")


@holds("stage")
def run_stage(setup: Setup, number: int, *, fresh: bool = False) -> dict[str, Any]:
    """Train module `number` to convergence and freeze it, or find that this was done; returns its record.

    Raises:
        NotReady: what it reads is not there, or it was trained with other settings.
    """
    if fresh and number == 1:
        setup.forget_dataset()
    setup.require_module(number)
    if len(setup.group(number)) > 1:
        return run_together(setup, fresh=fresh)[number - 1]
    try:
        if not fresh and (record := finished(setup, number)) is not None:
            setup.progress.note(f"module {number} is already trained and frozen")
            return record
        feed = stage_inputs(setup, number)
    except NotReady as error:
        raise _of_the_lowest(setup, number, error) from error
    _train_and_freeze(setup, [number], _noisy(setup, number, feed), fresh)
    return require_stage(setup, number)


def _noisy(setup: Setup, number: int, feed: Feed) -> Feed:
    noise = for_stage(setup.recipe, number).training.noise
    if number == 1 or noise == 0:
        return feed
    return NoisyFeed(feed, noise, derive_seed(setup.recipe.seed, "noise", number))


def _of_the_lowest(setup: Setup, number: int, error: NotReady) -> NotReady:
    """What stands in the way of a stage: of the lowest module that does not fit the settings, since those above it
    cannot be trained before it; and how to set what was asked for in this module alone.
    """
    try:
        require_stages(setup, number - 1)
    except NotReady as below:
        if meant := meant_for_one(setup, number):
            trained = (setup.run.stage(number) / "stage.json").exists()
            alone = setup.command(f"stage {number}{' --fresh' if trained else ''}", *meant)
            return NotReady(f"{below}. If the new settings are for module {number} alone: {alone}")
        return below
    return error


def run_together(setup: Setup, *, fresh: bool = False) -> list[dict[str, Any]]:
    """Train the first modules together in each step, every one by its own loss; returns their records."""
    if fresh:
        setup.forget_dataset()
    numbers = setup.group(1)
    done = [] if fresh else [finished(setup, number) for number in numbers]
    if not done or None in done:
        part = ALL if _is_pipeline(setup, numbers) else None
        _train_and_freeze(setup, numbers, stage_inputs(setup, 1, part), fresh)
    else:
        setup.progress.note(f"modules 1-{numbers[-1]} are already trained and frozen")
    return [require_stage(setup, number) for number in numbers]


def _train_and_freeze(setup: Setup, numbers: Sequence[int], feed: Feed, fresh: bool) -> None:
    recipe, folder = setup.recipe, setup.run.training(numbers)
    if len(numbers) == 1:
        recipe = for_stage(recipe, numbers[0])
    note_expected(setup)
    title = f"module {numbers[0]}" if len(numbers) == 1 else f"modules {numbers[0]}-{numbers[-1]} together"
    deal = _deal(setup, recipe, numbers)
    fit = _fit(setup, recipe, numbers, title) if deal is None else _fit_of_pipe(setup, recipe, deal)
    fitted = recipe if fit is None else fit.applied(recipe)
    steps = feed.samples // recipe.training.batch_size
    if deal is not None:
        _require_possible(setup, fitted, deal)
    own = numbers if deal is None else deal.modules[deal.position(setup.ranks.rank)]
    learners, others = _learners(setup, fitted, numbers, own, steps, setup.device)
    made_from = stage_identity(setup, numbers[-1])
    before = None if fresh else frozen_weights(setup, numbers)
    if fresh:  # only now that nothing stands in the way of training anew
        drop_checkpoint(folder)
        for number in numbers:
            remove_file(setup.run.stage(number) / "stage.json")
    budget, batch_size = recipe.training.max_memory, recipe.training.batch_size
    setup.progress.begin(title, recipe.training.epochs * steps, "updates")
    job = {"numbers": list(numbers), "deal": None if deal is None else asdict(deal)}
    how = {name: getattr(fitted.training, name) for name in ("micro_batch", "checkpointing")}
    setup.ranks.told({"do": "train", **job, "how": how})
    pipe = Pipe(setup.ranks, numbers, deal)
    arithmetic = _arithmetic(setup, fitted, pipe)
    if deal is not None:
        feed.close()
        feed = _piped(setup, pipe, arithmetic)
    with (
        closing(feed),
        memory.peak(setup.device, fit) as peak,
        memory.explain_exhaustion(setup.device, fit, batch_size, title),
        setup.at_steps(),
        threads_restored(),
    ):
        place = train(
            learners,
            feed,
            recipe.training,
            arithmetic,
            folder,
            made_from,
            setup.progress,
            setup.should_stop,
            lambda: memory.check_first_step(setup.device, fit, budget, title),
            setup.measure_threads,
            pipe,
            others,
        )
    setup.progress.end()
    if deal is not None:
        _take_largest(peak, setup.ranks)
        learners, _ = _learners(setup, fitted, numbers, numbers, steps, HOST)
        load_checkpoint(folder, learners, made_from, best=recipe.training.keep == "best")
    known = {
        name: value for name in ("allocated", "reserved", "predicted") if (value := getattr(peak, name)) is not None
    }
    setup.progress.measured("memory", numbers[-1], {f"peak bytes, {name}": value for name, value in known.items()})
    outcome = {
        "epochs": place.epoch,
        "best_epoch": place.best_epoch,
        "seconds": place.seconds,
        "steps": place.step,
        "peak": asdict(peak),
        "threads": place.threads,
        "checkpoint_bytes": 0,
    }
    if recipe.training.keep_checkpoint:
        outcome["checkpoint_bytes"] = keep_checkpoint(folder, learners, best=recipe.training.keep == "best")
    for number in numbers:
        remove_file(setup.run.stage(number) / "stage.json")  # where they were trained on: it is of other weights
        if setup.run.stage(number) != folder:
            drop_checkpoint(setup.run.stage(number))  # left by another schedule
    for learner in learners:
        freeze(setup, learner, made_from, {**outcome, "trained_with": list(numbers)})
    if not recipe.training.keep_checkpoint:
        drop_checkpoint(folder)
    changed = before not in (None, frozen_weights(setup, numbers))
    if changed and (stale := to_make_again(setup, numbers[-1])):
        setup.progress.note(
            f"{title}: the weights have changed, so everything made from them is stale. Make it again with: "
            f"{'; '.join(stale)}"
        )


def help_to_train(setup: Setup, job: Mapping[str, Any]) -> None:
    """Take this process's part in the training that the first process leads, which alone writes what comes of it."""
    numbers, recipe = job["numbers"], setup.recipe
    if len(numbers) == 1:
        recipe = for_stage(recipe, numbers[0])
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update=job["how"])})
    pipe = Pipe(setup.ranks, numbers, None if job["deal"] is None else Deal(**job["deal"]))
    arithmetic = _arithmetic(setup, recipe, pipe)
    if job["deal"] is None:
        feed = _noisy(setup, numbers[0], stage_inputs(setup, numbers[0]))
    else:
        feed = _piped(setup, pipe, arithmetic)
    steps = feed.samples // recipe.training.batch_size
    learners, others = _learners(setup, recipe, numbers, pipe.own, steps, setup.device)
    with closing(feed), memory.peak(setup.device) as peak, threads_restored():
        train(
            learners,
            feed,
            recipe.training,
            arithmetic,
            setup.run.training(numbers),
            stage_identity(setup, numbers[-1]),
            SILENT,
            setup.should_stop,
            measure_threads=setup.measure_threads,
            pipe=pipe,
            others=others,
        )
    if job["deal"] is not None:
        _take_largest(peak, setup.ranks)


def _is_pipeline(setup: Setup, numbers: Sequence[int]) -> bool:
    return setup.recipe.schedule == "pipelined" and len(numbers) > 1 and not setup.ranks.alone


def _deal(setup: Setup, recipe: Recipe, numbers: Sequence[int]) -> Deal | None:
    """How a pipeline divides these modules among the processes; None where they are trained without one."""
    if not _is_pipeline(setup, numbers):
        if recipe.schedule == "pipelined" and len(numbers) > 1:
            setup.progress.note("one process trains all modules in each step; start several with torchrun")
        return None
    with threads_restored():
        seconds = module_seconds(setup, recipe, numbers)
    found, share = deal_out(numbers, seconds, setup.ranks.world), sum(seconds) / 100
    parts = [
        f"{'-'.join(map(str, sorted({own[0], own[-1]})))} "
        f"({f'{count} processes, ' if count > 1 else ''}"
        f"{sum(seconds[numbers.index(number)] for number in own) / share:.0f} %)"
        for own, count in zip(found.modules, found.processes, strict=True)
    ]
    setup.progress.note(
        f"pipeline over {setup.ranks.world} processes, modules: {', '.join(parts)} of the measured time"
    )
    return found


def _require_possible(setup: Setup, recipe: Recipe, deal: Deal) -> None:
    """
    Raises:
        RecipeError: a batch is too small for the processes of a position, or a module couples samples and a batch would
            not go through whole.
    """
    modules, batch_size = setup.untrained(), recipe.training.batch_size
    for own, count in zip(deal.modules, deal.processes, strict=True):
        arithmetic = replace(setup.arithmetic, micro_batch=recipe.training.micro_batch, ranks=Ranks(0, count))
        arithmetic.part(batch_size)
        if count > 1 or len(arithmetic.slices(batch_size)) > 1:
            require_separable({number: modules[number - 1] for number in own}, arithmetic)


def _arithmetic(setup: Setup, recipe: Recipe, pipe: Pipe) -> Arithmetic:
    return replace(setup.arithmetic, micro_batch=recipe.training.micro_batch, ranks=pipe.ranks)


def _piped(setup: Setup, pipe: Pipe, arithmetic: Arithmetic) -> Feed:
    """What this position of a pipeline reads."""
    batch_size = setup.recipe.training.batch_size
    if not pipe.before:
        return stage_inputs(setup, 1, ALL if pipe.ranks.alone else arithmetic.part(batch_size))
    facts, views = setup.facts, setup.recipe.views_of(pipe.own[0])
    ragged = "validation" in facts.lengths
    return HandedFeed(pipe, arithmetic, batch_size, facts.sizes, ragged=ragged, views=views)


def _take_largest(peak: memory.Peak, ranks: Ranks) -> None:
    """Of what the processes measured."""
    for name in ("allocated", "reserved"):
        (most,) = ranks.largest([getattr(peak, name) or 0])
        if most:
            setattr(peak, name, int(most))


def _learners(
    setup: Setup, recipe: Recipe, numbers: Sequence[int], own: Sequence[int], steps: int, device: torch.device
) -> tuple[list[Learner], list[Learner]]:
    """`own` ones of these numbers on the device, and the others without memory for their weights."""
    modules, facts = setup.untrained(), setup.facts  # of which the prefix and the suffix have no part in this stage
    made = {
        number: make_learner(
            recipe,
            number,
            modules[number - 1],
            facts.sample_shape,
            facts.classes,
            device if number in own else META,
            steps,
        )
        for number in numbers
    }
    return [made.pop(number) for number in own], list(made.values())


def _fit(setup: Setup, recipe: Recipe, numbers: Sequence[int], title: str) -> memory.Fit | None:
    """How the stage goes through its batches; None where its memory cannot be told and there is no budget to keep.

    Raises:
        WillNotFit: the stage takes more than the budget, whatever the micro-batch.
    """
    training, facts = recipe.training, setup.facts
    samples = memory.Samples(facts.sample_shape, facts.classes)
    try:
        fit = memory.fit(recipe, numbers, samples, host_apart=setup.device.type != "cpu")
    except Unpredictable as error:
        if training.max_memory is not None:
            raise
        setup.progress.note(str(error))
        return None
    if training.max_memory is not None:
        taken, allowed = size(fit.footprint.peak), size(training.max_memory)
        setup.progress.note(f"{title}: {fit} (batch {training.batch_size}), {taken} of {allowed} (predicted)")
    return fit


def _fit_of_pipe(setup: Setup, recipe: Recipe, deal: Deal) -> memory.Fit | None:
    """How every position goes through its batches, so that each stays within the budget, and what the largest takes.

    Raises:
        WillNotFit: a position takes more than the budget, whatever the micro-batch.
    """
    found = []
    for own in deal.modules:
        handed, budget = recipe, recipe.training.max_memory
        if own[0] > 1:  # its inputs come as they are, and the modules before it are elsewhere
            exact = recipe.cache.model_copy(update={"dtype": "float32"})
            handed = recipe.model_copy(update={"feed": "cache", "cache": exact})
        if budget is not None and setup.device.type == "cpu":
            budget = max(1, budget - _on_their_way(setup, recipe, own, deal))
        training = recipe.training.model_copy(update={"max_memory": budget})
        title = f"module {own[0]}" if len(own) == 1 else f"modules {own[0]}-{own[-1]}"
        one = _fit(setup, handed.model_copy(update={"training": training}), own, title)
        if one is None:
            return None
        found.append(one)
    sizes = [one.micro_batch for one in found if one.micro_batch is not None]
    most = max((one.footprint for one in found), key=lambda footprint: footprint.peak)
    return memory.Fit(min(sizes, default=None), most, any(one.checkpointing for one in found))


def _on_their_way(setup: Setup, recipe: Recipe, own: Sequence[int], deal: Deal) -> int:
    """Bytes of the host's memory for batches that come and go: what waits beside the one that is in use."""

    def of_batch(number: int) -> int:
        return 4 * recipe.training.batch_size * recipe.views_of(number) * math.prod(setup.output_shapes[number - 1])

    before = (DEPTH - 1) * of_batch(own[0] - 1) if own[0] > 1 else 0
    behind = DEPTH * of_batch(own[-1]) if own is not deal.modules[-1] else 0
    return before + behind


@holds("run")
def run_all(setup: Setup, *, fresh: bool = False) -> None:
    """Every stage, the cache that the next one reads, and the probes, where there are labels; what is done already is
    skipped.
    """
    if fresh:
        setup.forget_dataset()
    elif finished(setup, 1) is None:
        _ = setup.splits  # missing files are found before anything is predicted or written
    setup.progress.note(str(require_fit(setup)))
    for number in train_all(setup, fresh=fresh):
        for part, holder in enumerate(setup.holders, 1):
            if holder == number and setup.facts.classes and {"probe", "test"} <= setup.facts.sizes.keys():
                probe_module(setup, part)
    try:
        probe_fixed(setup)
    except NotReady as error:  # the library of a comparison is missing: no reason to withhold the results
        setup.progress.note(f"left out: {error}")


def train_all(setup: Setup, *, fresh: bool = False) -> Iterator[int]:
    """Every stage and the cache that the next one reads; the number of each module once it is frozen."""
    for group in setup.recipe.groups(setup.depth):
        run_stage(setup, group[0], fresh=fresh)
        if setup.recipe.feed == "cache" and group[-1] < setup.depth and (fresh or unsettled(setup, group[-1])):
            write_cache(setup, group[-1], "ignored" if fresh else "kept")
        yield from group
