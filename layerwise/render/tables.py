"""Results as tables for a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from layerwise.render.units import duration, size
from layerwise.render.words import terminal_width, wrapped
from layerwise.settings.units import counted

WIDEST = 10_000
MENTIONED = 20
"""Files of others that are listed, at most."""


def table(title: str, *columns: str) -> Table:
    """The first column to the left, the others to the right."""
    made = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_header=any(columns),
    )
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return made


def console() -> Console:
    """Of standard output; tables take what they need where it has no width, as in a pipe."""
    return Console(highlight=False, markup=False, width=terminal_width(sys.stdout) or WIDEST)


def show(*parts: str | Table) -> None:
    """Nothing is cut off: where there is no width, as in a pipe, tables take what they need; on a terminal, cells and
    lines go on below.
    """
    width = terminal_width(sys.stdout)
    console = Console(highlight=False, markup=False, width=width)
    for part in parts:
        if isinstance(part, str):
            console.print(wrapped(part, width), soft_wrap=True)
            continue
        if width is None:
            console.width = max(Measurement.get(console, console.options.update(max_width=WIDEST), part).maximum, 1)
        console.print(part)


def stage_table(run: Any, number: int, record: Mapping[str, Any], *, last: bool) -> None:
    made = table(f"module {number} of {run.folder}", "", "")
    made.add_row(
        "trained",
        f"{counted(record['epochs'], 'epoch')}, {counted(record['steps'], 'update')}, {duration(record['seconds'])}",
    )
    made.add_row("weights taken from epoch", str(record["best_epoch"]))
    made.add_row("sha256", record["weights"][:16])
    if kept := record.get("checkpoint_bytes"):
        made.add_row("kept to train for more epochs", size(kept))
    show(made, *([] if last else [f"next: layerwise cache --module {number}"]))


def cache_table(facts: Mapping[str, Any], *, last: bool) -> None:
    made = table(f"cache of module {facts['module']}", "split", "samples", "shape of a sample", "stored as")
    for name, split in facts["splits"].items():
        views = f" x {split['views']} views" if split["views"] > 1 else ""
        made.add_row(
            name,
            f"{split['samples']:,}{views}",
            "x".join(map(str, split["shape"])),
            f"{split['dtype']}, {split['codec']}",
        )
    show(made, f"{size(facts['bytes'])} at {facts['location']}")
    if not last:
        show(f"next: layerwise stage {facts['module'] + 1}")


def prune_table(outcome: Mapping[str, Any]) -> None:
    found = len(outcome["stale"]) + len(outcome["stale_windows"])
    removed = len(outcome["removed"]) + len(outcome["removed_windows"])
    show(f"{counted(removed, 'stale cache')} removed" + (f", {found} found" if removed != found else ""))


def repair_table(outcome: Mapping[str, Any]) -> None:
    made = table(f"cache of module {outcome['module']}: damaged", "file", "what was wrong")
    for path, reason in outcome["damaged"].items():
        made.add_row(path, reason)
    count = f"{counted(outcome['samples'], 'sample')} written again; the cache is whole"
    damaged = counted(len(outcome["slots"]), "damaged slot")
    slots = [f"{damaged} of its window removed: the stage that needs one computes it again"]
    show(*([made] if outcome["damaged"] else []), count, *(slots if outcome["slots"] else []))


def verify_table(found: Mapping[str, Any]) -> None:
    made = table(f"{found['run']}: damaged", "file", "what is wrong")
    for path, reason in found["damaged"].items():
        made.add_row(path, reason)
    lines = [f"unfinished: {path}: {reason}" for path, reason in found["unfinished"].items()]
    lines += [f"not a file of layerwise: {path}" for path in found["unexpected"][:MENTIONED]]
    more = len(found["unexpected"]) - MENTIONED
    lines += [f"and {counted(more, 'more file')} not of layerwise"] if more > 0 else []
    intact = f"as written: {counted(found['files'], 'file')} ({size(found['bytes'])})"
    show(*([made] if found["damaged"] else []), *lines, f"{found['run']}: {intact}")


def probe_table(probes: Sequence[Mapping[str, Any]], report: Path | None = None) -> None:
    made = table("linear probes: test accuracy, %", "module", "task", "trained", "untrained")
    for probe in probes:
        for task, states in probe["tasks"].items():
            if "fixed" in states:
                made.add_row(str(probe["module"]), task, "", _percent(states["fixed"]))
            else:
                made.add_row(str(probe["module"]), task, _percent(states["trained"]), _percent(states["untrained"]))
    show(made, *([f"report: {report}"] if report else []))


def _percent(result: Mapping[str, Any]) -> str:
    return f"{100 * result['accuracy']:.1f}"


def status_table(found: Mapping[str, Any]) -> None:
    title = f"{found['run']} (recipe {found['recipe']}), {size(found['bytes'])} on disk"
    made = table(title, "module", "stage", "loss", "validation", "cache", "probe, %")
    reasons = [] if found["edited"] is None else [found["edited"]]
    for module in found["modules"]:
        stage, cache, probe = module["stage"], module["cache"], module["probe"]
        epochs = f", {counted(stage['epochs'], 'epoch')}" if "epochs" in stage else ""
        losses = (f"{stage[name]:.3f}" if name in stage else "–" for name in ("loss", "validation_loss"))
        accuracies = "–" if probe is None else _accuracies(probe)
        bytes_ = f", {size(cache['bytes'])}" if cache["bytes"] else ""
        made.add_row(str(module["module"]), stage["state"] + epochs, *losses, cache["state"] + bytes_, accuracies)
        told = (part for part in (stage, cache, probe or {}) if part.get("state") in ("stale", "damaged", "unknown"))
        reasons += [part["reason"] for part in told if part.get("reason")]
    last = "Every module is trained and probed." if found["next"] is None else f"Next: {found['next']}"
    show(made, *dict.fromkeys(reasons), last)


def _accuracies(probe: Mapping[str, Any]) -> str:
    if "tasks" not in probe:
        return str(probe["state"])
    return ", ".join(f"{100 * states['trained']['accuracy']:.1f}" for states in probe["tasks"].values())


def recipe_table(found: Mapping[str, Any]) -> None:
    """Every field as `--set` takes it, with what it means, what it may be, and its default."""
    show(f"{found['recipe']}: {found['summary']}", f"from {found['file']}")
    for group in found["groups"]:
        kind = f"{group['kind']}. {group['description']}".rstrip()
        made = table(f"{group['name'] or 'recipe'}: {kind}", "--set", "default", "meaning")
        made.columns[2].justify = "left"
        names = [f"{field['name']}={_as_set(field['value'])}" for field in group["fields"]]
        made.columns[0].min_width = min(max(map(len, names), default=0), 32)
        for name, field in zip(names, group["fields"], strict=True):
            default = "none" if field["required"] else _as_set(field["default"])
            allowed = f" ({field['allowed']})" if field["allowed"] else ""
            made.add_row(name, default, field["description"] + allowed)
        if group["fields"]:
            show(made)


def _as_set(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
