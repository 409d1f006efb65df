"""Memory and time of a step: the paper's Table 2, over depth, and beside other ways to save memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.gpu.part import Bench, Figures, Skipped, Task, same, trial
from layerwise.memory.fit import Fit
from layerwise.memory.predict import Footprint
from layerwise.paper.memory_rows import (
    PAPER,
    STEPS,
    Asked,
    Found,
    Row,
    count_modules,
    depth_rows,
    table_rows,
    work_out,
    work_out_apart,
)
from layerwise.training.step import Learner

GROUPS = ("loss_group=4", "micro_batch=4")


def table2(bench: Bench) -> Iterator[Task]:
    """Every row of `layerwise memreport`, and loss groups; then the largest batch."""
    modules = count_modules(bench.recipe_of(Row("", "gim")))
    rows = table_rows(modules, ("gim", "cpc", "supervised"), "500MB", {} if bench.small else PAPER)
    groups = "loss groups of 4, in fours"
    rows += [Row(f"gim module {m}, {groups}", "gim", (m,), GROUPS) for m in range(1, modules + 1)]
    rows.append(Row(f"gim all, eager, {groups}", "gim", training=GROUPS))
    if bench.small:
        rows = [row for row in rows if row.name in ("gim all, losses summed", "gim all, eager, one by one", "cpc")]
    # At larger batches, what a reader compares first: one by one takes long there.
    fewer = [row for row in rows if "bf16" not in row.name and "one by one" not in row.name]
    first, *others = bench.batches
    pairs = [(bench.asked(first), row) for row in rows]
    pairs += [(bench.asked(batch), row) for batch in others for row in fewer]
    yield from _measured(bench, pairs)


def depth(bench: Bench) -> Iterator[Task]:
    """The deepest stage, all modules, and end to end, of ever deeper networks."""
    depths = (2,) if bench.small else (3, 12, 24, 48)
    rows = [(bench.asked(depth=one), row) for one in depths for row in depth_rows(one)]
    yield from _measured(bench, rows[:2] if bench.small else rows)


def alternatives(bench: Bench) -> Iterator[Task]:
    """The same network trained by other means of saving memory, end to end, and by ours."""
    checkpointing, one = ("checkpointing=true",), ("micro_batch=1",)
    rows: list[tuple[Row, Callable[[Learner], Learner]]] = []
    for method in ("cpc",) if bench.small else ("cpc", "supervised"):
        kinds: tuple[tuple[str, tuple[str, ...], Callable[[Learner], Learner]], ...] = (
            ("", (), same),
            (", gradient checkpointing", checkpointing, same),
            (", 8-bit Adam", (), partial(_eight_bit, device=bench.device.type)),
            (", optimiser on the host", (), partial(_offloaded, device=bench.device.type)),
            (", checkpointing and 8-bit Adam", checkpointing, partial(_eight_bit, device=bench.device.type)),
        )
        for name, training, change in kinds:
            rows.append((Row(f"{method} end to end{name}", method, training=training), change))  # type: ignore[arg-type]
    rows += [
        (Row("ours: all modules, eager", "gim"), same),
        (Row("ours: all modules, one by one", "gim", training=one), same),
        *((Row(f"ours: module {m} from its cache", "gim", (m,)), same) for m in bench.modules),
    ]
    for row, change in rows:
        recipe = bench.recipe_of(row)
        numbers = row.modules or tuple(range(1, count_modules(recipe) + 1))
        yield row.name, partial(trial, recipe, numbers, bench, STEPS[row.step], change)


def _measured(bench: Bench, pairs: list[tuple[Asked, Row]]) -> Iterator[Task]:
    """Predictions side by side on the CPU first, then each row on the device."""
    count = min(len(pairs), 8)
    predicting = [[(replace(asked, device="cpu"), row) for asked, row in pairs[first::count]] for first in range(count)]
    if bench.small:
        found = [[work_out(asked, row) for asked, row in share] for share in predicting]
    else:
        with ThreadPoolExecutor(count) as pool:
            found = list(pool.map(work_out_apart, predicting))
    for place, (asked, row) in enumerate(pairs):
        title = f"batch {asked.batch}: {row.name}" if asked.depth is None else f"depth {asked.depth}: {row.name}"
        yield title, partial(_row, bench, asked, row, found[place % count][place // count])


def _row(bench: Bench, asked: Asked, row: Row, found: Found) -> Figures:
    if found.problem is not None and not found.predicted:
        raise Skipped(found.problem)
    footprint = Footprint(**found.predicted)
    recipe = bench.recipe_of(row, asked.batch, asked.depth)
    recipe = Fit(found.micro_batch, footprint, found.checkpointing).applied(recipe)
    numbers = row.modules or tuple(range(1, count_modules(recipe) + 1))
    figures: dict[str, Any] = {
        "row": row.name,
        "batch": asked.batch,
        "depth": found.depth,
        "micro_batch": found.micro_batch,
        "predicted": footprint.peak,
        "paper_gb": row.paper if asked.batch == 16 and asked.depth is None else None,
    }
    figures |= trial(recipe, numbers, bench, STEPS[row.step])
    if "allocated" in figures:
        figures["error"] = footprint.peak / figures["allocated"] - 1
    return figures


def _rate(learner: Learner) -> float:
    return float(learner.optimiser.param_groups[0]["lr"])


def _torchao(device: str) -> Any:
    try:
        import torchao.optim  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise Skipped(f"torchao is not installed ({error})") from error
    if device != "cuda":
        raise Skipped("torchao's optimisers are measured on CUDA alone")
    return torchao.optim


def _eight_bit(learner: Learner, device: str) -> Learner:
    weights = [weight for group in learner.optimiser.param_groups for weight in group["params"]]
    return replace(learner, optimiser=_torchao(device).Adam8bit(weights, lr=_rate(learner)))


def _offloaded(learner: Learner, device: str) -> Learner:
    import torch

    weights = [weight for group in learner.optimiser.param_groups for weight in group["params"]]
    made = _torchao(device).CPUOffloadOptimizer(weights, torch.optim.Adam, lr=_rate(learner), fused=True)
    return replace(learner, optimiser=made)
