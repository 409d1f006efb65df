"""Measure the peak memory of a piece of work, and hold it to what was predicted.

Only a CUDA device counts its own bytes; elsewhere the prediction stands alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from layerwise.errors import WillNotFit
from layerwise.memory.fit import Fit
from layerwise.memory.predict import Samples, Step, stage_batch
from layerwise.recipe.learner import make_learner
from layerwise.recipe.recipe import Recipe
from layerwise.settings.units import size
from layerwise.training.step import Arithmetic, train_step


@dataclass
class Peak:
    """Most bytes held at once; None where that is not known."""

    allocated: int | None = None
    """In tensors, measured."""
    reserved: int | None = None
    """Taken from the device by the allocator, measured."""
    predicted: int | None = None
    """In tensors."""
    micro_batch: int | None = None
    """Samples that went through at once; None: the whole batch."""
    checkpointing: bool = False
    """Whether activations inside blocks were computed a second time."""


@contextmanager
def peak(device: torch.device, fit: Fit | None = None) -> Iterator[Peak]:
    """Measure the block."""
    found = Peak()
    if fit is not None:
        found.predicted = fit.footprint.peak
        found.micro_batch, found.checkpointing = fit.micro_batch, fit.checkpointing
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found.allocated = torch.cuda.max_memory_allocated(device)
        found.reserved = torch.cuda.max_memory_reserved(device)


def check_first_step(device: torch.device, fit: Fit | None, budget: int | None, whom: str) -> None:
    """To be called after a real step: did it stay under the budget?

    Raises:
        WillNotFit: it did not.
    """
    if device.type != "cuda" or budget is None or fit is None:
        return
    held = torch.cuda.max_memory_allocated(device)
    if held > budget:
        # The prediction was short by this factor, so the next budget asked for should be smaller by as much.
        asked = budget * fit.footprint.peak // held
        raise WillNotFit(
            f"the first step of {whom} held {size(held)}, over the budget of {size(budget)} (predicted: "
            f"{size(fit.footprint.peak)}). Run again with --max-memory {asked // 10**6}MB, which leaves room for the "
            "difference"
        )


@contextmanager
def explain_exhaustion(device: torch.device, fit: Fit | None, batch_size: int, whom: str) -> Iterator[None]:
    """
    Raises:
        WillNotFit: in place of PyTorch's own error when the device runs out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        micro_batch = (fit.micro_batch if fit is not None else None) or batch_size
        how = f"a batch of {batch_size}" + (f" in micro-batches of {micro_batch}" if micro_batch < batch_size else "")
        smaller = f"--micro-batch {micro_batch // 2}, or " if micro_batch > 1 else ""
        raise WillNotFit(
            f"the device ran out of memory while training {whom} with {how}: {size(held)} were held at most and "
            f"{size(fit.footprint.peak if fit is not None else None)} predicted. Try {smaller}--max-memory with what "
            "the device has free"
        ) from error


@dataclass(frozen=True)
class Measured:
    """Most bytes that real steps held on a CUDA device."""

    allocated: int
    reserved: int
    process: int | None
    """With the CUDA context; None where the driver does not tell."""
    device: str


def measure(
    recipe: Recipe,
    numbers: Sequence[int],
    samples: Samples,
    device: torch.device,
    step: Step = train_step,
    snapshot: Path | None = None,
) -> Measured:
    """Train these modules for three real steps on zeros; the first makes the optimiser's states and is not measured.

    Args:
        snapshot: write what the allocator did there, as a pickle that https://pytorch.org/memory_viz shows.
    """
    modules = recipe.network.modules(samples.shape)
    batch = stage_batch(recipe, modules[: numbers[0] - 1], samples)
    learners = [
        make_learner(recipe, number, modules[number - 1], samples.shape, samples.classes, device) for number in numbers
    ]
    del modules
    arithmetic = Arithmetic(
        device, recipe.training.precision, recipe.training.micro_batch, recipe.seed, recipe.training.loss_group
    )
    step(learners, batch, 0, arithmetic)
    if snapshot is not None:
        torch.cuda.memory._record_memory_history(device=device)
    with peak(device) as found:
        for number in (1, 2):
            step(learners, batch, number, arithmetic)
        torch.cuda.synchronize(device)
    if snapshot is not None:
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(snapshot))
        torch.cuda.memory._record_memory_history(enabled=None, device=device)
    assert found.allocated is not None
    assert found.reserved is not None
    return Measured(found.allocated, found.reserved, process_bytes(device), torch.cuda.get_device_name(device))


def process_bytes(device: torch.device) -> int | None:
    """What this process takes of the device in all, its CUDA context included, as the driver tells; None where it does
    not (inside some containers it names no processes).
    """
    if device.type != "cuda" or (program := shutil.which("nvidia-smi")) is None:
        return None
    query = [program, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    told = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    for line in told.splitlines():
        pid, _, mebibytes = line.partition(",")
        if pid.strip() == str(os.getpid()) and mebibytes.strip().isdigit():
            return int(mebibytes) * 2**20
    return None
