"""The stage runner: train one module (or several together) until it converges, and freeze it.

The loop is `train`. All it knows survives a kill: a checkpoint holds the weights, the optimiser's state and the
place in the data, and every random draw is a function of that place, so a resumed stage ends in the same bits as one
that was never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from layerwise.errors import Diverged, StoppedEarly
from layerwise.files.metrics import METRICS, append_metrics, keep_metrics
from layerwise.files.tensors import weights_digest
from layerwise.nets.module import encode
from layerwise.progress import Progress, Step
from layerwise.settings.training import Training
from layerwise.settings.units import counted
from layerwise.training.checkpoint import load_checkpoint, save_checkpoint, state
from layerwise.training.feeds import Batch, Feed
from layerwise.training.pipe import Pipe
from layerwise.training.ranks import Ranks
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
    pipe: Pipe | None = None,
    others: Sequence[Learner] = (),
) -> Place:
    """Train until the validation loss no longer falls, and leave the learners with the weights of the best epoch
    (or the last, as `training.keep` says).

    Args:
        pipe: of which these learners are one position; None: they are all that is trained.
        others: learners of the other positions, of which no weight is looked at.
        measure_threads: choose the number of threads where the training begins on a CPU and the user set none; torch
            keeps it. Otherwise torch's present number is used.

    Raises:
        StoppedEarly: `should_stop` answered true; all is saved.
        Diverged: a loss was not finite; the last checkpoint stays.
    """
    pipe = pipe or Pipe(arithmetic.ranks, [learner.number for learner in learners])
    ranks, modules = pipe.everyone, pipe.numbers
    place = Place(**load_checkpoint(folder, learners, made_from, others=others) or {})
    ranks.wait()  # until all have read it, and before the first writes another
    first_step = place.step
    progress.training(modules, first_step, first_step - place.batch)
    if first_step and not place.converged(training):
        numbers = "-".join(map(str, (modules[0], modules[-1])[: len(modules)]))
        where = f"epoch {place.epoch + 1} of {training.epochs}, update {first_step}"
        progress.note(f"{'module' if len(modules) == 1 else 'modules'} {numbers}: resuming at {where}")
    if ranks.first and (lost := keep_metrics(folder / METRICS, place.epoch, len(modules))):
        epochs = ", ".join(map(str, lost[:5])) + (" …" if lost[5:] else "")
        progress.note(f"{folder / METRICS} is damaged: the curves miss epoch {epochs}; the training is intact")
    if arithmetic.device.type == "cpu" and not place.converged(training):
        free = measure_threads and set_by_user() is None
        if free and place.threads is None and place.step == 0 and not others:
            if ranks.first:
                place.threads = best_threads(learners, feed, training.epochs, arithmetic, progress)
                save_checkpoint(folder, learners, made_from, asdict(place))  # a second measurement may end otherwise
            place.threads = ranks.told(place.threads)
        place.threads = use_threads(place.threads, progress, fixed=not free)
    hand_on = pipe.handing_on(arithmetic, training.batch_size)
    while not place.converged(training):
        began = time.perf_counter()
        for batch in feed.shuffled(place.epoch, start=place.batch):
            with pipe.divergence_told(place.step):
                losses = train_step(learners, batch, place.step, arithmetic, hand_on)
            losses = pipe.losses(place.step, losses)
            if place.step == first_step:
                after_first_step()
            place.sums = [total + loss for total, loss in zip(place.sums or [0.0] * len(losses), losses, strict=True)]
            place.step, place.batch = place.step + 1, place.batch + 1
            progress.step(Step(modules, place.step, place.epoch + 1, losses, batch.total))
            stop = pipe.stops(should_stop())
            if stop or place.step % training.checkpoint_every == 0:
                theirs = pipe.states(lambda: state(learners))
                if ranks.first:
                    progress.flush()
                    place.seconds, began = place.seconds + time.perf_counter() - began, time.perf_counter()
                    save_checkpoint(folder, learners, made_from, asdict(place), others=theirs)
            if stop:
                pipe.close()
                raise StoppedEarly(
                    f"stopped in epoch {place.epoch + 1}, after {counted(place.step, 'update')}; everything is "
                    f"saved: the same command, without --fresh, resumes"
                )

        validation = pipe.after_validation(validate(learners, feed, arithmetic, training.batch_size, pipe))
        _require_same_weights(learners, arithmetic.ranks)
        here = {learner.number: learner for learner in learners}
        for number, loss in zip(modules, validation, strict=True):
            require_finite(loss, number, place.step, here.get(number))
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
        if ranks.first:
            append_metrics(folder / METRICS, record)
        progress.epoch(modules, record)
        progress.flush()
        theirs = pipe.states(lambda: state(learners))
        if ranks.first:
            save_checkpoint(folder, learners, made_from, asdict(place), best=improved, others=theirs)
    pipe.close()
    ranks.wait()  # until the first has written it
    load_checkpoint(folder, learners, made_from, best=training.keep == "best", others=others)
    ranks.wait()  # until all have read it, and before the first drops it
    return place


def validate(
    learners: Sequence[Learner], feed: Feed, arithmetic: Arithmetic, batch_size: int, pipe: Pipe | None = None
) -> list[float]:
    """Mean validation loss of each learner, nats, with the same draws every time. Each process takes some batches."""
    samples, losses = feed.samples_of("validation"), [0.0] * len(learners)
    handing_on = pipe is not None and len(pipe.behind) > 0
    batches = _batches(feed, batch_size) if handing_on else 0
    found: dict[int, list[float]] = {}
    with torch.no_grad(), arithmetic.autocast():
        for learner in learners:
            learner.module.eval()
            learner.objective.eval()
        for number, batch in _validation_batches(feed, batch_size, arithmetic.ranks):
            hand_on = pipe.validating(number, batches) if pipe is not None and handing_on else None
            parts: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in learners]
            for chunk in arithmetic.slices(len(batch)):
                x = batch.inputs_on(arithmetic.device, chunk)
                for learner, of_learner in zip(learners, parts, strict=True):
                    encoded = encode(learner.module, x, learner.number)
                    of_learner.append(batch.by_sample(learner.objective.represent(encoded)))
                    x = encoded.output
                if hand_on is not None:
                    hand_on(batch, chunk, x)
            labels, found[number] = batch.labels_on(arithmetic.device), []
            for learner, of_learner in zip(learners, parts, strict=True):
                representations = tuple(torch.cat(pieces) for pieces in zip(*of_learner, strict=True))
                loss = grouped_loss(
                    learner, representations, labels, arithmetic, ("validation", learner.number, number)
                )
                found[number].append(loss.item() * len(batch))
        for learner in learners:
            learner.module.train()
            learner.objective.train()
    for sums in _of_all(found, len(learners), arithmetic.ranks):  # in one order, whoever took them
        losses = [total + loss for total, loss in zip(losses, sums, strict=True)]
    return [total / samples for total in losses]


def _validation_batches(feed: Feed, batch_size: int, ranks: Ranks) -> Iterator[tuple[int, Batch]]:
    """Those that this process takes, with their numbers."""
    if ranks.alone:
        yield from enumerate(feed.validation())
        return
    shares = ranks.shares(_batches(feed, batch_size))
    mine = range(shares[ranks.rank], shares[ranks.rank + 1])
    if mine:
        size = 1 if feed.shape("validation").ragged else batch_size
        yield from zip(mine, feed.validation(mine.start * size), strict=False)


def _batches(feed: Feed, batch_size: int) -> int:
    """How many batches of validation there are."""
    size = 1 if feed.shape("validation").ragged else batch_size
    return -(-feed.samples_of("validation") // size)


def _of_all(found: dict[int, list[float]], learners: int, ranks: Ranks) -> list[list[float]]:
    """What the processes found in each batch, in the order of the batches."""
    if ranks.alone:
        return list(found.values())
    batches = int(ranks.summed([len(found)])[0])
    flat = ranks.summed([loss for number in range(batches) for loss in found.get(number, [0.0] * learners)])
    return [flat[begin : begin + learners] for begin in range(0, len(flat), learners)]


def _require_same_weights(learners: Sequence[Learner], ranks: Ranks) -> None:
    """
    Raises:
        Diverged: the processes, which make the same updates, have come to other weights.
    """
    if ranks.alone:
        return
    digests = [weights_digest(part) for learner in learners for part in (learner.module, learner.objective)]
    if ranks.any(digests != ranks.told(digests)):
        raise Diverged(
            "the processes of this training have different weights; the last checkpoint is from before that. Check "
            "that all machines run the same versions on the same kind of device."
        )
