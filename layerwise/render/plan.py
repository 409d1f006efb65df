"""A plan as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from layerwise.render.tables import show, table
from layerwise.settings.units import size

if TYPE_CHECKING:
    from layerwise.pipeline.plan import Plan
    from layerwise.recipe.recipe import Recipe


def plan_json(plan: Plan) -> dict[str, Any]:
    """Bytes and numbers; `fits` says whether the run may begin."""
    return {**asdict(plan), "fits": plan.fits, "peak": plan.peak}


def plan_table(plan: Plan, recipe: Recipe) -> None:
    dtypes = ("float32", "float16", "uint8")
    made = table(
        f"plan of {recipe.name}, batch {recipe.training.batch_size}",
        "stage",
        "weights",
        "output of a sample",
        "memory",
        "at once",
        *(f"cache, {dtype}" for dtype in dtypes),
    )
    for stage in plan.stages:
        first, last = stage.modules[0], stage.modules[-1]
        at_once = "–" if stage.fit is None else str(stage.fit.micro_batch or recipe.training.batch_size)
        made.add_row(
            str(first) if first == last else f"{first}-{last} together",
            f"{stage.parameters:,}",
            "x".join(map(str, stage.output)),
            "?" if stage.fit is None else size(stage.fit.footprint.peak),
            at_once,
            *("–" if stage.cache is None else size(stage.cache[dtype]) for dtype in dtypes),
        )
    notes = ["memory: predicted, in tensors; caches: before compression"]
    if plan.published:
        notes.append("the dataset is not there: its splits are counted as its authors publish them")
    elif plan.disk_needed is None and recipe.feed == "cache":
        notes.append("the dataset is not there, so how much its caches take is not known")
    if plan.fits:
        notes += [f"?: {stage.problem}" for stage in plan.stages if stage.fit is None and stage.problem is not None]
    show(made, *notes, str(plan))
