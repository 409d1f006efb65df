"""`layerwise memreport --timeline`: memory over one step, of one way to train or of five under one axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from layerwise.errors import LayerwiseError, UsageError
from layerwise.memory.fit import fit
from layerwise.memory.measure import measure
from layerwise.memory.timeline import CATEGORIES, timeline
from layerwise.paper.memory_rows import STEPS, Asked, Row, count_modules, row_recipe, samples_of
from layerwise.render.memory import timeline_picture
from layerwise.render.tables import show, table
from layerwise.render.units import size
from layerwise.settings.choices import MethodName

COMPARED = (
    Row("end to end (cpc)", "cpc"),
    Row("end to end, checkpointed", "cpc", training=("checkpointing=true",)),
    Row("all modules, whole batch, losses summed", "gim", step="summed"),
    Row("all modules, eager: each updated after its own forward", "gim"),
    Row("all modules, eager, micro-batches of 1", "gim", training=("micro_batch=1",)),
)
"""From what takes most to what takes least."""


def one_row(asked: Asked, method: MethodName, module: int | None) -> Row:
    """
    Raises:
        UsageError: the network has no such module.
    """
    modules = count_modules(row_recipe(asked, Row("", method)))
    if module is None:
        return Row(f"{method}, all modules" if modules > 1 else method, method)
    if module > modules:
        raise UsageError(f"--module {module}: trained by {method}, {asked.recipe} has {modules}, numbered from 1")
    return Row(f"{method}, module {module}", method, (module,))


def timelines(
    asked: Asked, rows: Sequence[Row], *, real: bool = False, snapshot: Path | None = None
) -> list[dict[str, Any]]:
    """A record a row: its name, and its timeline or the `problem` that there is none.

    Args:
        real: take real steps on the device that is asked for, in place of fake ones.
        snapshot: also write what CUDA's allocator did; of the first row.

    Raises:
        UsageError: no row could be recorded.
    """
    found: list[dict[str, Any]] = []
    for row in rows:
        try:
            recipe = row_recipe(asked, row)
            samples = samples_of(recipe)
            numbers = row.modules or tuple(range(1, count_modules(recipe) + 1))
            step = STEPS[row.step]
            recipe = fit(recipe, numbers, samples, step=step).applied(recipe)
            device = torch.device(asked.device) if real else None
            record = timeline(recipe, numbers, samples, step=step, device=device).as_json()
            found.append({"name": row.name, "problem": None, **record})
            if snapshot is not None and len(found) == 1:
                measure(recipe, numbers, samples, torch.device("cuda"), step, snapshot)
        except LayerwiseError as error:
            found.append({"name": row.name, "problem": str(error)})
    if all(one["problem"] is not None for one in found):
        raise UsageError(f"no step could be recorded: {found[0]['problem']}")
    return found


def picture(found: Sequence[dict[str, Any]], asked: Asked, *, real: bool = False) -> bytes:
    return timeline_picture([(one["name"], one) for one in found if one["problem"] is None], _title(asked, real))


def timeline_table(found: Sequence[dict[str, Any]], asked: Asked, *, real: bool = False) -> None:
    """What each way holds at its peak; of one, its ten largest tensors too."""
    made = table(_title(asked, real), "", "peak", *CATEGORIES)
    for one in found:
        if one["problem"] is None:
            made.add_row(one["name"], size(one["peak"]), *(size(one["at_peak"][name]) for name in CATEGORIES))
    parts = [made]
    if len(found) == 1:
        largest = table("largest tensors at the peak", "layer", "category", "dtype", "shape", "size")
        for held in found[0]["largest"]:
            shape = "x".join(map(str, held["shape"]))
            largest.add_row(held["layer"], held["category"], held["dtype"], shape, size(held["bytes"]))
        parts.append(largest)
    show(*parts, *(f"{one['name']}: {one['problem']}" for one in found if one["problem"] is not None))


def _title(asked: Asked, real: bool) -> str:
    how = f"real tensors on {asked.device}" if real else "predicted on fake tensors"
    return f"memory over one step: {Path(asked.recipe).stem}, batch {asked.batch}, {how}"
