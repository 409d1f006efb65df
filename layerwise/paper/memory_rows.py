"""The rows of the memory table: ways to train one network, and what one step of each takes (paper, Table 2).

`python -m layerwise.paper.memory_rows` reads rows as JSON and writes what it found. A row that is measured gets a
process of its own, so that none sees another's allocator; predictions allocate nothing, and share one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from layerwise.errors import LayerwiseError, NotReady
from layerwise.memory.fit import fit
from layerwise.memory.measure import measure
from layerwise.memory.predict import Samples, Step
from layerwise.paper.baselines import summed_step
from layerwise.recipe.loader import read_recipe
from layerwise.recipe.methods import with_method
from layerwise.recipe.overrides import apply_overrides
from layerwise.recipe.recipe import Recipe
from layerwise.recipe.scale import with_scale
from layerwise.settings.choices import MethodName
from layerwise.training.step import train_step

PAPER = {"supervised": 6.3, "cpc": 7.7, "gim all": 7.0, "gim module 1": 2.5}
"""Table 2 of the paper: GB of GPU memory at batch 16, with the PyTorch of 2019."""
SUMMED = ", losses summed"  # how the published code, and so the paper, trains all modules
STEPS: dict[str, Step] = {"eager": train_step, "summed": summed_step}


@dataclass(frozen=True)
class Row:
    """One way to train."""

    name: str
    method: MethodName
    modules: tuple[int, ...] | None = None
    """Those that learn in one step; None: all."""
    training: tuple[str, ...] = ()
    """Overrides of the recipe's `training`, such as `max_memory=500MB`."""
    step: str = "eager"
    paper: float | None = None
    """The paper's figure, GB."""


@dataclass(frozen=True)
class Asked:
    """What the rows have in common."""

    recipe: str
    """Name or path."""
    overrides: tuple[str, ...] = ()
    batch: int = 16
    device: str = "cpu"
    depth: int | None = None
    """So many modules in place of the recipe's own; see `NetworkSettings.repeated`."""


@dataclass(frozen=True)
class Found:
    """What one row takes, in bytes."""

    row: Row
    depth: int
    """Modules that the network has."""
    predicted: dict[str, int] = field(default_factory=dict)
    """`Footprint`, by field; empty where it could not be told."""
    measured: dict[str, Any] | None = None
    """`Measured`, by field; None without CUDA."""
    micro_batch: int | None = None
    checkpointing: bool = False
    problem: str | None = None
    """Why there is no figure."""

    @property
    def peak(self) -> int | None:
        return self.predicted.get("peak") if self.measured is None else int(self.measured["allocated"])

    @property
    def error(self) -> float | None:
        """Of the prediction, as a part of what was measured."""
        if self.measured is None or not self.predicted:
            return None
        return float(self.predicted["peak"] / self.measured["allocated"] - 1)


def table_rows(
    modules: int, methods: Sequence[MethodName], budget: str, paper: Mapping[str, float] | None = None
) -> list[Row]:
    """The paper's rows, and ours, of a network of so many modules, beside the figures in `paper`."""
    rows = [row for method in methods for row in _rows_of(method, modules, budget)]
    return [replace(row, paper=(paper or {}).get(row.name.removesuffix(SUMMED))) for row in rows]


def _rows_of(method: MethodName, modules: int, budget: str) -> list[Row]:
    if method == "gim":
        return _greedy_rows(method, modules, budget)
    if method in ("greedy-supervised", "predsim", "greedy-dim"):
        return _greedy_rows(method, modules, None)
    return [Row(method, method), Row(f"{method}, checkpointed", method, training=("checkpointing=true",))]


def _greedy_rows(method: MethodName, modules: int, budget: str | None) -> list[Row]:
    every = [(number,) for number in range(1, modules + 1)]
    rows = [Row(f"{method} all{SUMMED}", method, step="summed")]
    rows += [Row(f"{method} module {m[0]}", method, m) for m in every]
    rows.append(Row(f"{method} all, eager", method))
    if budget is not None:
        bf16, under = ("precision=bf16",), (f"max_memory={budget}",)
        rows += [Row(f"{method} module {m[0]}, bf16", method, m, bf16) for m in every]
        rows.append(Row(f"{method} all, eager, bf16", method, None, bf16))
        rows += [Row(f"{method} module {m[0]} under {budget}", method, m, under) for m in every]
        rows.append(Row(f"{method} all, eager, under {budget}", method, None, under))
        rows += [Row(f"{method} module {m[0]}, one by one", method, m, ("micro_batch=1",)) for m in every]
        rows.append(Row(f"{method} all, eager, one by one", method, None, ("micro_batch=1",)))
    return rows


def depth_rows(depth: int) -> list[Row]:
    """What is compared over depth: the deepest stage alone, all modules together in two ways, and end to end."""
    return [
        Row("gim, deepest stage", "gim", (depth,)),
        Row("gim all, eager", "gim"),
        Row("gim all, losses summed", "gim", step="summed"),
        Row("cpc", "cpc"),
        Row("supervised", "supervised"),
        Row("supervised, checkpointed", "supervised", training=("checkpointing=true",)),
    ]


def row_recipe(asked: Asked, row: Row) -> Recipe:
    """The recipe that a row trains."""
    overrides = [*asked.overrides, f"training.batch_size={asked.batch}", *(f"training.{one}" for one in row.training)]
    recipe = apply_overrides(read_recipe(asked.recipe), overrides)
    if asked.depth is not None:
        recipe = recipe.model_copy(update={"network": recipe.network.repeated(asked.depth)})
    return with_method(with_scale(recipe, recipe.scale), row.method)


def samples_of(recipe: Recipe) -> Samples:
    """
    Raises:
        NotReady: the settings of the dataset do not tell.
    """
    expected = recipe.dataset.expects()
    if expected is None:
        raise NotReady(
            f"the settings of {type(recipe.dataset).__name__} do not tell the shape of a sample, only its files do: "
            "layerwise plan opens them"
        )
    return Samples(*expected)


def count_modules(recipe: Recipe) -> int:
    return _modules_and_parts(recipe)[0]


def _modules_and_parts(recipe: Recipe) -> tuple[int, int]:
    """How many modules learn on their own, and how many the network was cut into before any were merged."""
    with torch.device("meta"):
        modules = recipe.network.modules(samples_of(recipe).shape)
    return len(modules), sum(len(module.parts()) for module in modules)


def work_out(asked: Asked, row: Row) -> Found:
    """One row, in this process."""
    recipe = row_recipe(asked, row)
    samples, (modules, depth) = samples_of(recipe), _modules_and_parts(recipe)
    numbers = row.modules or tuple(range(1, modules + 1))
    try:
        found = fit(recipe, numbers, samples, step=STEPS[row.step])
    except LayerwiseError as error:
        return Found(row, depth, problem=str(error))
    measured = None
    if asked.device == "cuda":
        measured = asdict(measure(found.applied(recipe), numbers, samples, torch.device("cuda"), STEPS[row.step]))
    return Found(row, depth, asdict(found.footprint), measured, found.micro_batch, found.checkpointing)


def work_out_apart(pairs: Sequence[tuple[Asked, Row]]) -> list[Found]:
    """Rows, in a fresh process."""
    request = json.dumps([{"asked": asdict(asked), "row": asdict(row)} for asked, row in pairs])
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=request,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        problem = f"its process ended with {done.returncode}: {last[0]}"
        return [Found(row, asked.depth or 0, problem=problem) for asked, row in pairs]
    return [Found(**{**told, "row": row}) for told, (_, row) in zip(json.loads(done.stdout), pairs, strict=True)]


def main() -> None:
    found = []
    for request in json.load(sys.stdin):
        asked, row = request["asked"], request["row"]
        modules = None if row["modules"] is None else tuple(row["modules"])
        found.append(
            work_out(
                Asked(**{**asked, "overrides": tuple(asked["overrides"])}),
                Row(**{**row, "modules": modules, "training": tuple(row["training"])}),
            )
        )
    json.dump([asdict(one) for one in found], sys.stdout)


if __name__ == "__main__":
    main()
