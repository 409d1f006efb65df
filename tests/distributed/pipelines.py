"""One training of several modules, by one process of several, or by one alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sklearn.datasets  # noqa: F401 - this and others are else imported where they are used, by each process anew
import torch
import torch._dynamo
import torch.fx.experimental.symbolic_shapes

import layerwise.nets.resnet
import layerwise.nets.speech
import layerwise.objectives.frame_infonce
import layerwise.objectives.infonce
import layerwise.recipe.methods  # noqa: F401
from layerwise.pipeline.following import follow, leading
from layerwise.pipeline.run import open_run
from layerwise.pipeline.schedule import run_stage
from layerwise.pipeline.setup import Setup
from layerwise.progress import Silent, Step
from layerwise.recipe import Recipe
from layerwise.training.ranks import Ranks

CPU = torch.device("cpu")
AtStep = Callable[[int, int], bool]
"""From the number of a process and that of a step in this sitting to whether to stop; it may do worse."""


def never(rank: int, step: int) -> bool:
    return False


@dataclass(frozen=True)
class Stop:
    """One process is asked to stop."""

    rank: int
    step: int

    def __call__(self, rank: int, step: int) -> bool:
        return rank == self.rank and step >= self.step


@dataclass(frozen=True)
class Kill:
    """One process is killed."""

    rank: int
    step: int

    def __call__(self, rank: int, step: int) -> bool:
        if rank == self.rank and step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
        return False


class Told(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[Step] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, done: Step) -> None:
        self.steps.append(done)


def train(recipe: Recipe, folder: Path, at_step: AtStep, ranks: Ranks) -> Any:
    """Train the first modules; returns the notes and steps that the first process was told, and the exit code of the
    others.
    """
    asked, told = iter(range(10**9)), Told()
    run = open_run(folder / "run", recipe)
    setup = Setup(run, CPU, progress=told, should_stop=lambda: at_step(ranks.rank, next(asked)), ranks=ranks)
    setup.writes = ranks.first
    if not ranks.first:
        return follow(ranks, lambda _: setup)
    with leading(ranks), setup.held("test"):
        ranks.told({"do": "begin"})
        run_stage(setup, 1)
    return told.notes, told.steps
