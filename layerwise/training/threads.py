"""How many threads a training on the CPU computes with.

A small step is many short pieces of parallel work, and each waits for its slowest thread. On a machine whose
processors are busy with other work, two threads can be ten times slower than one, so the number is measured.

It also decides in which order sums are rounded. A training therefore settles it once, at its first step, and keeps it
in its checkpoints.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from activation_cache.reading.processors import allowed_processors
from layerwise.progress import Progress
from layerwise.training.feeds import Feed
from layerwise.training.step import Arithmetic, Learner, rehearsal

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
GAIN = 1.1
"""How many times as fast more threads must be to be worth it: fewer leave processors to others."""
CLEARLY_SLOWER = 1.5
"""How many times as slow more threads are where trying still more makes no sense."""
TORCH_DEFAULT = torch.get_num_threads()
"""Torch's own number for this machine, unless the user set another before layerwise was imported."""


@dataclass(frozen=True)
class Speeds:
    """What was measured: number of threads to units of work a second."""

    found: dict[int, float]

    @property
    def best(self) -> int:
        """The fewest threads that no larger number beats by GAIN."""
        enough = max(self.found.values()) / GAIN
        return min(threads for threads, speed in self.found.items() if speed >= enough)

    def told(self, samples: int) -> str:
        """One line, for units of so many samples."""
        rates = {threads: f"{samples * speed:,.0f}" for threads, speed in self.found.items()}
        others = ", ".join(f"{rate} with {threads}" for threads, rate in rates.items() if threads != self.best)
        speed = f"{rates[self.best]} samples a second, against {others}"
        return f"computing with {number_of(self.best)}: {speed}"


def number_of(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def set_by_user() -> str | None:
    """What the user said the number of threads with, or None."""
    named = next((name for name in VARIABLES if os.environ.get(name)), None)
    return named or ("torch.set_num_threads" if torch.get_num_threads() != TORCH_DEFAULT else None)


@contextmanager
def threads_restored() -> Iterator[None]:
    """Leave the block with the number of threads that it was entered with."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    work: Callable[[], object],
    most: int,
    seconds: Callable[[float], float],
    clock: Callable[[], float] = time.perf_counter,
) -> Speeds | None:
    """How fast `work` is with 1, 2, 4, … and `most` threads, up to where more are clearly slower.

    None where a unit of work takes too long to measure: such work gains from every thread.

    Args:
        seconds: from the seconds that one unit takes in one thread to those that all measuring may take.
    """
    numbers = sorted({*(1 << power for power in range(most.bit_length())), most})
    found: dict[int, float] = {}
    share = math.inf

    def timed() -> float:
        began = clock()
        work()
        return clock() - began

    with threads_restored():
        for threads in numbers:
            torch.set_num_threads(threads)
            first = timed()  # starts the threads, and makes what belongs to their number: no measure of speed
            if threads == 1:
                share = seconds(first) / len(numbers)
                if first > seconds(first) or (first := timed()) > share:
                    return None
                share = seconds(first) / len(numbers)
            spent = [timed()]
            while sum(spent) + first < share and len(spent) < 20:
                spent.append(timed())
            found[threads] = len(spent) / sum(spent)
            if found[threads] * CLEARLY_SLOWER < max(found.values()):
                break
    return Speeds(found)


def best_threads(
    learners: Sequence[Learner], feed: Feed, epochs: int, arithmetic: Arithmetic, progress: Progress
) -> int:
    """The number of threads that goes through a micro-batch fastest, which takes a second or 2% of the training."""
    most = min(torch.get_num_threads(), allowed_processors())
    if most == 1:
        return 1
    with threads_restored():
        torch.set_num_threads(1)  # the feed may compute too
        batch = next(feed.shuffled(epoch=0))
    slices = arithmetic.slices(len(batch))
    units = epochs * (feed.samples // len(batch)) * len(slices)
    with rehearsal(learners, batch, arithmetic) as rehearse:
        speeds = measure(rehearse, most, lambda one: min(max(1.0, 0.02 * units * one / most), 10.0))
    if speeds is None:
        return most
    progress.note(speeds.told(slices[0].stop))
    return speeds.best


def use_threads(began_with: int | None, progress: Progress, *, fixed: bool) -> int:
    """Compute with the threads that the training began with, and return their number; `fixed`: torch's number stays."""
    now = torch.get_num_threads()
    if began_with is None:
        return now
    if fixed:
        if now != began_with:
            progress.note(
                f"computing with {number_of(now)}, as is set, but this training started with {number_of(began_with)}: "
                "its weights may differ in their last bits from those of a training that was not interrupted"
            )
        return began_with
    if began_with > (allowed := allowed_processors()):
        progress.note(
            f"computing with {number_of(began_with)}, as at the start of this training, on {allowed} processor"
            f"{'s' * (allowed > 1)}: slower, with the same bits"
        )
    torch.set_num_threads(began_with)
    return began_with
