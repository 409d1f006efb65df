"""What the parts of the GPU benchmark share: how much is measured, and the trial of a few steps."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerwise.memory.measure import process_bytes
from layerwise.memory.predict import Step, stage_batch
from layerwise.paper.memory_rows import Asked, Row, count_modules, row_recipe, samples_of
from layerwise.recipe.learner import make_learner
from layerwise.recipe.recipe import Recipe
from layerwise.seeding import seeded
from layerwise.training.feeds import Batch
from layerwise.training.step import Arithmetic, Learner, train_step

Figures = dict[str, Any]
Task = tuple[str, Callable[[], Figures]]
ENOUGH = 1.5  # seconds of steps, after which no more are timed


class Skipped(Exception):
    """A row that this machine cannot have, such as one of a package that is not installed."""


@dataclass(frozen=True)
class Bench:
    """What is measured, and how much of it."""

    device: torch.device
    work: Path
    """Folder for files that only this part needs."""
    deadline: float = float("inf")
    """Of `time.monotonic`, after which no row begins."""

    @property
    def small(self) -> bool:
        """Shrunk to a few seconds, as on a CPU."""
        return self.device.type == "cpu"

    @property
    def recipe(self) -> str:
        return "digits" if self.small else "stl10"

    @property
    def batches(self) -> tuple[int, ...]:
        return (4,) if self.small else (16, 128)

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("fp32", "bf16") if self.small else ("fp32", "tf32", "bf16")

    @property
    def modules(self) -> tuple[int, ...]:
        """Those that are measured one by one."""
        return (2,) if self.small else tuple(range(1, count_modules(self.recipe_of(Row("", "gim"))) + 1))

    @property
    def repeats(self) -> int:
        return 1 if self.small else 8

    def asked(self, batch: int | None = None, depth: int | None = None) -> Asked:
        overrides = ("training.micro_batch=null",)
        return Asked(self.recipe, overrides, batch or self.batches[0], self.device.type, depth)

    def recipe_of(self, row: Row, batch: int | None = None, depth: int | None = None) -> Recipe:
        return row_recipe(self.asked(batch, depth), row)


def use_precision(precision: str) -> str:
    """Set torch's multiplications of float32 to exact ("fp32") or TF32, and return the recipe's word for the rest.

    torch's own default is exact in matrix products and TF32 in convolutions.
    """
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return "bf16" if precision == "bf16" else "fp32"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prepared(
    recipe: Recipe, numbers: Sequence[int], device: torch.device, *, on_device: bool = False
) -> tuple[list[Learner], Batch, Arithmetic]:
    """Learners, a batch of noise in page-locked memory or on the device, and the arithmetic of the recipe."""
    samples = samples_of(recipe)
    with seeded(recipe.seed, "modules"):
        modules = recipe.network.modules(samples.shape)
    batch = stage_batch(recipe, modules[: numbers[0] - 1], samples)
    if batch.inputs.is_floating_point():
        batch.inputs.normal_(generator=torch.Generator().manual_seed(0))
    if device.type == "cuda":
        inputs = batch.inputs.to(device) if on_device else batch.inputs.pin_memory()
        batch = Batch(inputs, batch.labels, batch.ids, batch.decode)
    learners = [make_learner(recipe, n, modules[n - 1], samples.shape, samples.classes, device) for n in numbers]
    training = recipe.training
    return (
        learners,
        batch,
        Arithmetic(device, training.precision, training.micro_batch, recipe.seed, training.loss_group),
    )


def same(learner: Learner) -> Learner:
    return learner


def trial(
    recipe: Recipe,
    numbers: Sequence[int],
    bench: Bench,
    step: Step = train_step,
    change: Callable[[Learner], Learner] = same,
    *,
    on_device: bool = False,
) -> Figures:
    """Bytes and median seconds of a step, after two that are not measured."""
    device = bench.device
    clear(device)
    before = _device_bytes(device)
    learners, batch, arithmetic = prepared(recipe, numbers, device, on_device=on_device)
    learners = [change(learner) for learner in learners]
    for number in (0, 1):
        step(learners, batch, number, arithmetic)
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for number in range(2, 2 + bench.repeats):
        began = time.perf_counter()
        step(learners, batch, number, arithmetic)
        wait(device)
        seconds.append(time.perf_counter() - began)
        if sum(seconds) > ENOUGH:
            break
    median = statistics.median(seconds)
    return {"seconds": median, "samples_per_second": len(batch) / median, **_held(device, before)}


def _held(device: torch.device, before: int | None) -> Figures:
    """Bytes: in tensors, of the allocator, of the process as the driver tells, and of its CUDA context alone."""
    if device.type != "cuda":
        return {}
    reserved, process, used = torch.cuda.max_memory_reserved(device), process_bytes(device), _device_bytes(device)
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": reserved,
        "driver": process,
        # Inside some containers the driver names no processes; on a device of our own all that is used is ours.
        "device_used": used,
        "device_used_before": before,
        "context": (process if process is not None else used or 0) - torch.cuda.memory_reserved(device),
    }


def _device_bytes(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
