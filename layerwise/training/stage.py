"""The stage runner: train one module (or several together) until it converges, and freeze it.

The loop is `train`. All it knows survives a kill: a checkpoint holds the weights, the optimiser's state and the
place in the data, and every random draw is a function of that place, so a resumed stage ends in the same bits as one
that was never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from layerwise.errors import StoppedEarly
from layerwise.files.metrics import METRICS, append_metrics, keep_metrics
from layerwise.progress import Progress, Step
from layerwise.settings.training import Training
from layerwise.settings.units import counted
from layerwise.training.checkpoint import load_checkpoint, save_checkpoint
from layerwise.training.feeds import Feed
from layerwise.training.step import Arithmetic, Learner, grouped_loss, require_finite, train_step
from layerwise.training.threads import best_threads, set_by_user, use_threads


@dataclass
class Place:
    """How far a training has come; all of it is in every checkpoint."""

    epoch: int = 0
    """Whole epochs done."""
    batch: int = 0
    """Batches done of the epoch under way."""
    step: int = 0
    """Updates done."""
    sums: list[float] = field(default_factory=list)
    """Sum of each learner's losses in the epoch under way, nats."""
    best_loss: float | None = None
    """Lowest validation loss, summed over the learners, nats."""
    best_epoch: int = 0
    """The epoch after which it was reached."""
    seconds: float = 0.0
    """Spent training, over all sittings."""
    threads: int | None = None
    """That the training began with and keeps, since their number changes rounding; None: settled at the first step."""

    def converged(self, training: Training) -> bool:
        return self.epoch >= training.epochs or self.epoch - self.best_epoch >= training.patience

    def improves(self, loss: float, training: Training) -> bool:
        return self.best_loss is None or loss < self.best_loss - training.tolerance * abs(self.best_loss)


def train(
    learners: Sequence[Learner],
    feed: Feed,
    training: Training,
    arithmetic: Arithmetic,
    folder: Path,
    made_from: Mapping[str, Any],
    progress: Progress,
    should_stop: Callable[[], bool] = lambda: False,
    after_first_step: Callable[[], None] = lambda: None,
    measure_threads: bool = False,
) -> Place:
    """Train until the validation loss no longer falls, and leave the learners with the weights of the best epoch
    (or the last, as `training.keep` says).

    Args:
        measure_threads: choose the number of threads where the training begins on a CPU and the user set none; torch
            keeps it. Otherwise torch's present number is used.

    Raises:
        StoppedEarly: `should_stop` answered true; all is saved.
        Diverged: a loss was not finite; the last checkpoint stays.
    """
    place = Place(**load_checkpoint(folder, learners, made_from) or {})
    first_step, modules = place.step, [learner.number for learner in learners]
    progress.training(modules, first_step, first_step - place.batch)
    if first_step and not place.converged(training):
        numbers = "-".join(map(str, (modules[0], modules[-1])[: len(modules)]))
        where = f"epoch {place.epoch + 1} of {training.epochs}, update {first_step}"
        progress.note(f"{'module' if len(modules) == 1 else 'modules'} {numbers}: resuming at {where}")
    if lost := keep_metrics(folder / METRICS, place.epoch, len(learners)):
        epochs = ", ".join(map(str, lost[:5])) + (" …" if lost[5:] else "")
        progress.note(f"{folder / METRICS} is damaged: the curves lack epoch {epochs}; the training is unharmed")
    if arithmetic.device.type == "cpu" and not place.converged(training):
        free = measure_threads and set_by_user() is None
        if free and place.threads is None and place.step == 0:
            place.threads = best_threads(learners, feed, training.epochs, arithmetic, progress)
            save_checkpoint(folder, learners, made_from, asdict(place))  # a second measurement may end otherwise
        place.threads = use_threads(place.threads, progress, fixed=not free)
    while not place.converged(training):
        began = time.perf_counter()
        for batch in feed.shuffled(place.epoch, start=place.batch):
            losses = train_step(learners, batch, place.step, arithmetic)
            if place.step == first_step:
                after_first_step()
            place.sums = [total + loss for total, loss in zip(place.sums or [0.0] * len(losses), losses, strict=True)]
            place.step, place.batch = place.step + 1, place.batch + 1
            progress.step(Step(modules, place.step, place.epoch + 1, losses, len(batch)))
            stop = should_stop()
            if stop or place.step % training.checkpoint_every == 0:
                progress.flush()
                place.seconds, began = place.seconds + time.perf_counter() - began, time.perf_counter()
                save_checkpoint(folder, learners, made_from, asdict(place))
            if stop:
                raise StoppedEarly(
                    f"stopped in epoch {place.epoch + 1}, after {counted(place.step, 'update')}; everything is saved: "
                    "the same command, without --fresh, goes on"
                )

        validation = validate(learners, feed, arithmetic)
        for learner, loss in zip(learners, validation, strict=True):
            require_finite(loss, learner, place.step)
        means = [total / place.batch for total in place.sums]
        improved = place.improves(sum(validation), training)
        place.epoch, place.batch, place.sums = place.epoch + 1, 0, []
        place.seconds += time.perf_counter() - began
        if improved:
            place.best_loss, place.best_epoch = sum(validation), place.epoch
        record = {
            "epoch": place.epoch,
            "step": place.step,
            "loss": means,
            "validation_loss": validation,
            "seconds": round(place.seconds, 3),
        }
        append_metrics(folder / METRICS, record)
        progress.epoch(modules, record)
        progress.flush()
        save_checkpoint(folder, learners, made_from, asdict(place), best=improved)
    load_checkpoint(folder, learners, made_from, best=training.keep == "best")
    return place


def validate(learners: Sequence[Learner], feed: Feed, arithmetic: Arithmetic) -> list[float]:
    """Mean validation loss of each learner, nats, with the same draws every time."""
    totals, samples = [0.0] * len(learners), 0
    with torch.no_grad(), arithmetic.autocast():
        for learner in learners:
            learner.module.eval()
            learner.objective.eval()
        for number, batch in enumerate(feed.in_order("validation")):
            parts: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in learners]
            for chunk in arithmetic.slices(len(batch)):
                x = batch.inputs_on(arithmetic.device, chunk)
                for learner, found in zip(learners, parts, strict=True):
                    encoded = learner.module(x)
                    found.append(learner.objective.represent(encoded))
                    x = encoded.output
            for index, (learner, found) in enumerate(zip(learners, parts, strict=True)):
                representations = tuple(torch.cat(pieces) for pieces in zip(*found, strict=True))
                draws, labels = ("validation", learner.number, number), batch.labels_on(arithmetic.device)
                totals[index] += grouped_loss(learner, representations, labels, arithmetic, draws).item() * len(batch)
            samples += len(batch)
        for learner in learners:
            learner.module.train()
            learner.objective.train()
    return [total / samples for total in totals]
