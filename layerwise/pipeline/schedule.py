"""In which order modules are trained: one after another, or all in each step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

from layerwise import memory
from layerwise.errors import NotReady, Unpredictable
from layerwise.files.storage import remove_file
from layerwise.pipeline.caching import write_cache
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
from layerwise.training.checkpoint import drop_checkpoint, keep_checkpoint
from layerwise.training.feeds import Feed
from layerwise.training.noise import NoisyFeed
from layerwise.training.stage import train
from layerwise.training.step import Learner
from layerwise.training.threads import threads_restored


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
        _train_and_freeze(setup, numbers, stage_inputs(setup, 1), fresh)
    else:
        setup.progress.note(f"modules 1-{numbers[-1]} are already trained and frozen")
    return [require_stage(setup, number) for number in numbers]


def _train_and_freeze(setup: Setup, numbers: Sequence[int], feed: Feed, fresh: bool) -> None:
    recipe, folder = setup.recipe, setup.run.training(numbers)
    if len(numbers) == 1:
        recipe = for_stage(recipe, numbers[0])
    note_expected(setup)
    title = f"module {numbers[0]}" if len(numbers) == 1 else f"modules {numbers[0]}-{numbers[-1]} together"
    fit = _fit(setup, recipe, numbers, title)
    fitted = recipe if fit is None else fit.applied(recipe)
    steps = feed.samples // recipe.training.batch_size
    learners = _learners(setup, fitted, numbers, steps)
    made_from = stage_identity(setup, numbers[-1])
    before = None if fresh else frozen_weights(setup, numbers)
    if fresh:  # only now that nothing stands in the way of training anew
        drop_checkpoint(folder)
        for number in numbers:
            remove_file(setup.run.stage(number) / "stage.json")
    budget, batch_size = recipe.training.max_memory, recipe.training.batch_size
    setup.progress.begin(title, recipe.training.epochs * steps, "updates")
    setup.ranks.told({"do": "train", "numbers": list(numbers), "micro_batch": fitted.training.micro_batch})
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
            replace(setup.arithmetic, micro_batch=fitted.training.micro_batch),
            folder,
            made_from,
            setup.progress,
            setup.should_stop,
            lambda: memory.check_first_step(setup.device, fit, budget, title),
            setup.measure_threads,
        )
    setup.progress.end()
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
    with closing(_noisy(setup, numbers[0], stage_inputs(setup, numbers[0]))) as feed, threads_restored():
        train(
            _learners(setup, recipe, numbers, feed.samples // recipe.training.batch_size),
            feed,
            recipe.training,
            replace(setup.arithmetic, micro_batch=job["micro_batch"]),
            setup.run.training(numbers),
            stage_identity(setup, numbers[-1]),
            SILENT,
            setup.should_stop,
            measure_threads=setup.measure_threads,
        )


def _learners(setup: Setup, recipe: Recipe, numbers: Sequence[int], steps: int) -> list[Learner]:
    modules, facts = setup.untrained(), setup.facts  # of which the prefix and the suffix have no part in this stage
    return [
        make_learner(recipe, number, modules[number - 1], facts.sample_shape, facts.classes, setup.device, steps)
        for number in numbers
    ]


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
