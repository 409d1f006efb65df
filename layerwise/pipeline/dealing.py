"""Which modules each process of a pipeline trains: consecutive ones, so that the slowest process has least to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from layerwise.memory.predict import Samples, stage_batch
from layerwise.nets.module import encode
from layerwise.pipeline.setup import Setup
from layerwise.recipe.learner import make_learner
from layerwise.recipe.recipe import Recipe
from layerwise.training.pipe import Deal
from layerwise.training.step import Arithmetic, rehearsal

FEW = 4
"""Samples on which a module is timed."""
TIMES = 3


def deal(numbers: Sequence[int], seconds: Sequence[float], processes: int) -> Deal:
    """Divide modules, each of which takes so many seconds, among processes. Where there are more processes than
    modules, the slow modules have several, which share their batches.
    """
    if processes <= len(numbers):
        borders = _even(seconds, processes)
        parts = [tuple(numbers[begin:end]) for begin, end in zip([0, *borders], [*borders, len(numbers)], strict=True)]
        return Deal(parts, (1,) * processes)
    shares = [1] * len(numbers)
    for _ in range(processes - len(numbers)):
        slowest = max(range(len(numbers)), key=lambda index: seconds[index] / shares[index])
        shares[slowest] += 1
    return Deal([(number,) for number in numbers], tuple(shares))


def _even(seconds: Sequence[float], parts: int) -> list[int]:
    """Where all parts but the first begin, of consecutive ones of which the slowest is as fast as can be."""
    until = [0.0, *accumulate(seconds)]
    best: list[tuple[float, list[int]]] = [(total, []) for total in until]  # of the first modules, in one part
    for part in range(1, parts):
        longer = list(best)
        for end in range(part + 1, len(until)):
            longer[end] = min(
                (max(best[begin][0], until[end] - until[begin]), [*best[begin][1], begin]) for begin in range(part, end)
            )
        best = longer
    return best[-1][1]


def module_seconds(setup: Setup, recipe: Recipe, numbers: Sequence[int]) -> list[float]:
    """How long each of the first modules takes to go forward and backward on a few samples, measured."""
    facts, training = setup.facts, recipe.training
    few = min(FEW, training.batch_size)
    smaller = recipe.model_copy(
        update={"training": training.model_copy(update={"batch_size": few, "loss_group": None})}
    )
    batch = stage_batch(smaller, [], Samples(facts.sample_shape, facts.classes))
    batch = replace(batch, inputs=torch.rand(batch.inputs.shape, generator=torch.Generator().manual_seed(0)))
    arithmetic = Arithmetic(setup.device, training.precision, None, recipe.seed)
    modules, found = setup.untrained(), []
    for number in numbers:
        learner = make_learner(
            recipe, number, modules[number - 1], facts.sample_shape, facts.classes, setup.device
        )  # its weights are drawn for this alone
        with rehearsal([learner], batch, arithmetic) as rehearse:
            rehearse()
            found.append(min(_timed(rehearse, setup.device) for _ in range(TIMES)))
        with torch.no_grad(), arithmetic.autocast():
            output = encode(learner.module, batch.inputs_on(setup.device), number).output
        (inputs,) = batch.by_sample((output,))
        batch = replace(batch, inputs=inputs)
    return found


def _timed(work: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
