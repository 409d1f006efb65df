"""Whether the device computes what the CPU does in float64, and the tests that need a GPU."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.part import Bench, Figures, Skipped, Task, use_precision
from benchmarks.memory import realistic_inputs
from layerwise.paper.memory_rows import Row, count_modules, samples_of
from layerwise.recipe.learner import make_learner
from layerwise.seeding import seeded
from layerwise.training.checkpoint import load_checkpoint, save_checkpoint
from layerwise.training.feeds import Batch
from layerwise.training.stage import Place
from layerwise.training.step import Arithmetic, Learner, train_step

BATCH = 4
CPU = torch.device("cpu")


def correctness(bench: Bench) -> Iterator[Task]:
    for number in bench.modules:
        for precision in bench.precisions:
            yield f"module {number}, {precision}, against float64", partial(_against_double, bench, number, precision)
    for number in bench.modules:
        yield f"module {number}, one by one against whole", partial(_chunked, bench, number)
    yield "all modules, resumed against straight", partial(_resumed, bench)


def pytest(bench: Bench) -> Iterator[Task]:
    """The tests that are marked `cuda`."""
    yield "pytest -m cuda", partial(_tests, bench)


def _learners(bench: Bench, numbers: Sequence[int], device: torch.device) -> list[Learner]:
    recipe = bench.recipe_of(Row("", "gim"), BATCH)
    samples = samples_of(recipe)
    with seeded(recipe.seed, "modules"):
        modules = recipe.network.modules(samples.shape)
    return [make_learner(recipe, n, modules[n - 1], samples.shape, samples.classes, device) for n in numbers]


def _inputs(bench: Bench, number: int) -> Tensor:
    """A batch for module `number`, computed on the CPU."""
    recipe = bench.recipe_of(Row("", "gim"), BATCH)
    samples = samples_of(recipe)
    with seeded(recipe.seed, "modules"):
        below = recipe.network.modules(samples.shape)[: number - 1]
    return realistic_inputs(below, BATCH, samples.shape)


def _gradient(learner: Learner, inputs: Tensor, arithmetic: Arithmetic) -> tuple[float, Tensor]:
    """The loss of a step, and its gradient in float64 on the CPU."""
    kept: list[Tensor] = []

    def keep(optimiser: Any, args: Any, kwargs: Any) -> None:
        weights = (weight for group in optimiser.param_groups for weight in group["params"])
        kept.append(torch.cat([weight.grad.flatten().double().cpu() for weight in weights if weight.grad is not None]))

    learner.optimiser.register_step_pre_hook(keep)
    (loss,) = train_step([learner], Batch(inputs), 0, arithmetic)
    return loss, kept[0]


def _arithmetic(
    bench: Bench, device: torch.device, precision: str = "fp32", micro_batch: int | None = None
) -> Arithmetic:
    recipe = bench.recipe_of(Row("", "gim"), BATCH)
    return Arithmetic(device, precision, micro_batch, recipe.seed)


def _against_double(bench: Bench, number: int, precision: str) -> Figures:
    inputs = _inputs(bench, number)
    (exact,) = _learners(bench, [number], CPU)
    exact.module.double()
    exact.objective.double()
    loss, gradient = _gradient(exact, inputs.double(), _arithmetic(bench, CPU))
    word = use_precision(precision)
    (learner,) = _learners(bench, [number], bench.device)
    found, of_device = _gradient(learner, inputs, _arithmetic(bench, bench.device, word))
    return {
        "module": number,
        "precision": precision,
        "loss": found,
        "loss_error": abs(found - loss) / abs(loss),
        "gradient_error": float((of_device - gradient).norm() / gradient.norm()),
    }


def _chunked(bench: Bench, number: int) -> Figures:
    use_precision("fp32")
    inputs = _inputs(bench, number)
    found = []
    for micro_batch in (None, 1):
        (learner,) = _learners(bench, [number], bench.device)
        found.append(_gradient(learner, inputs, _arithmetic(bench, bench.device, micro_batch=micro_batch)))
    (loss, gradient), (loss_chunked, chunked) = found
    return {
        "module": number,
        "loss_error": abs(loss_chunked - loss) / abs(loss),
        "gradient_error": float((chunked - gradient).norm() / gradient.norm()),
    }


def _resumed(bench: Bench) -> Figures:
    """The largest difference in any weight after four steps, straight, straight again, and resumed after two."""
    use_precision("fp32")
    numbers = tuple(range(1, count_modules(bench.recipe_of(Row("", "gim"))) + 1))
    batch, arithmetic = Batch(_inputs(bench, 1)), _arithmetic(bench, bench.device)

    def straight() -> list[Tensor]:
        learners = _learners(bench, numbers, bench.device)
        for step in range(4):
            train_step(learners, batch, step, arithmetic)
        return _weights(learners)

    once, again = straight(), straight()
    learners = _learners(bench, numbers, bench.device)
    for step in range(2):
        train_step(learners, batch, step, arithmetic)
    folder = bench.work / "checkpoint"
    folder.mkdir()
    save_checkpoint(folder, learners, {}, asdict(replace(Place(), step=2)))
    learners = _learners(bench, numbers, bench.device)
    load_checkpoint(folder, learners, {})
    for step in range(2, 4):
        train_step(learners, batch, step, arithmetic)
    return {"straight_again": _apart(once, again), "resumed": _apart(once, _weights(learners))}


def _weights(learners: Sequence[Learner]) -> list[Tensor]:
    parts = (part for learner in learners for part in (learner.module, learner.objective))
    return [weight.detach().cpu() for part in parts for weight in part.parameters()]


def _apart(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(some, others, strict=True))


def _tests(bench: Bench) -> Figures:
    tests = Path(__file__).parents[2] / "tests"
    if bench.device.type != "cuda":
        raise Skipped("no CUDA device was asked for")
    if not tests.is_dir() or importlib.util.find_spec("pytest") is None:
        raise Skipped("tests/ or pytest is not here")
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tests.parent, check=False)
    if done.returncode == 5:
        raise Skipped("no test is marked cuda")
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)}
    if done.returncode != 0:
        raise RuntimeError(f"pytest ended with {done.returncode}: {last}")
    return counts
