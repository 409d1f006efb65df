"""The memory report as a table, CSV, JSON, and charts."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from layerwise.memory.fit import without_ways
from layerwise.render.plots import LIGHT, Picture, Theme
from layerwise.render.tables import show, table
from layerwise.render.units import size, unit_of_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from layerwise.paper.memory_rows import Asked, Found

PARTS = ("parameters", "gradients", "optimiser", "inputs", "activations")
UNIT = "all, losses summed"  # the row that ratios are taken to, as in the paper: all modules as it trained them
GIB = 2**30


def memory_json(found: Sequence[Found], asked: Asked) -> dict[str, Any]:
    """Every figure, in bytes; `paper` in GB as printed."""
    rows = [
        {
            "name": one.row.name,
            "method": one.row.method,
            "modules": one.row.modules,
            "step": one.row.step,
            "depth": one.depth,
            "peak": one.peak,
            "kind": _kind(one),
            "predicted": one.predicted or None,
            "measured": one.measured,
            "error": one.error,
            "micro_batch": one.micro_batch,
            "checkpointing": one.checkpointing,
            "ratio": ratio,
            "paper": one.row.paper,
            "paper_ratio": paper_ratio,
            "problem": one.problem,
        }
        for one, (ratio, paper_ratio) in zip(found, _ratios(found), strict=True)
    ]
    return {"asked": asdict(asked), "rows": rows}


def memory_csv(found: Sequence[Found], asked: Asked) -> bytes:
    """A line a row; bytes, but for the paper's figure in GB."""
    text = io.StringIO()
    columns = ["name", "depth", "kind", "peak", *PARTS, "allocated", "reserved", "process", "error", "micro_batch"]
    writer = csv.writer(text)
    writer.writerow([*columns, "ratio", "paper", "paper_ratio", "problem"])
    for row in memory_json(found, asked)["rows"]:
        flat = {**row, **(row["predicted"] or {}), **(row["measured"] or {}), "peak": row["peak"]}
        writer.writerow([flat.get(name) for name in (*columns, "ratio", "paper", "paper_ratio", "problem")])
    return text.getvalue().encode()


def memory_table(found: Sequence[Found], asked: Asked) -> None:
    measured = any(one.measured is not None for one in found)
    unit, scale = unit_of_bytes([one.peak for one in found])

    def amount(count: float | None) -> str:
        return "–" if count is None else f"{count / scale:.2f}"

    columns = [*(["predicted", "allocated", "reserved", "driver", "error"] if measured else ["predicted"]), *PARTS]
    paper = ["ratio", "paper, GB", "its ratio"] if any(one.row.paper is not None for one in found) else ["ratio"]
    made = table(f"{_title(found, asked)}; {unit}", "", *columns, *paper)
    made.box = None
    for column in made.columns:
        column.no_wrap = True
    for one, ratios in zip(found, _ratios(found), strict=True):
        row: Mapping[str, Any] = one.measured or {}
        cells = [amount(one.predicted.get("peak"))]
        if measured:
            cells += [amount(row.get(name)) for name in ("allocated", "reserved", "process")]
            cells.append("–" if one.error is None else f"{100 * one.error:+.1f}%")
        cells += [amount(one.predicted.get(part)) for part in PARTS]
        numbers = (ratios[0], one.row.paper, ratios[1])[: len(paper)]
        made.add_row(_name(one, found), *cells, *("–" if number is None else f"{number:.2f}" for number in numbers))
    show(made, *_notes(found, asked))


def _notes(found: Sequence[Found], asked: Asked) -> list[str]:
    failed = [one for one in found if one.problem is not None]
    problems, enough = without_ways([one.problem or "" for one in failed])
    notes = [f"{_name(one, found)}: {problem}" for one, problem in zip(failed, problems, strict=True)]
    notes += [] if enough is None else [f"What would fit all of them: --max-memory {enough}MB"]
    chosen = {one.row.name: one.micro_batch for one in found if "under" in one.row.name and one.micro_batch is not None}
    if chosen:
        notes.append("micro-batches chosen: " + ", ".join(f"{name}: {size_}" for name, size_ in chosen.items()))
    if asked.device != "cuda":
        notes.append(
            "Predicted: bytes in tensors on the device. A CUDA context, workspaces and the allocator's reserve come on "
            "top (the paper's figures have them). --device cuda measures."
        )
    if any(one.measured is not None for one in found):
        notes.append(
            "Allocated: in tensors. Reserved: taken by PyTorch's allocator. Driver: of the whole process, with CUDA's "
            "context."
        )
    notes.append("Columns from parameters on: what the bytes of the predicted peak are.")
    return notes


def _title(found: Sequence[Found], asked: Asked) -> str:
    devices = {one.measured["device"] for one in found if one.measured is not None}
    how = f"measured on {', '.join(sorted(devices))}" if devices else "predicted, no GPU was used"
    return f"memory of a step: {asked.recipe}, batch {asked.batch}, {how}"


def _kind(one: Found) -> str | None:
    return None if one.peak is None else "predicted" if one.measured is None else "measured"


def _name(one: Found, found: Sequence[Found]) -> str:
    """With its depth where the row is there at several."""
    several = sum(other.row.name == one.row.name for other in found) > 1
    return f"{one.row.name}, {one.depth} modules" if several else one.row.name


def _ratios(found: Sequence[Found]) -> list[tuple[float | None, float | None]]:
    """Of each row to that of its depth in which all modules learn from the sum of their losses: ours, the paper's."""
    units = {one.depth: one for one in found if one.row.name == f"gim {UNIT}"}
    ratios = []
    for one in found:
        unit = units.get(one.depth)
        ours = one.peak / unit.peak if unit is not None and one.peak is not None and unit.peak else None
        paper = one.row.paper / unit.row.paper if unit is not None and one.row.paper and unit.row.paper else None
        ratios.append((ours, paper))
    return ratios


def memory_chart(found: Sequence[Found], asked: Asked) -> bytes:
    """Bars of the peaks, split into their parts where they are predicted."""

    def draw(theme: Theme) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 0.34 * len(found) + 1.6), layout="constrained")
        axes = figure.subplots()
        rows = range(len(found))
        colours = (theme.first, "#cc79a7", theme.second, "#f0e442", theme.third)
        left = [0.0] * len(found)
        for part, colour in zip(PARTS, colours, strict=True):
            values = [one.predicted.get(part, 0) / GIB if one.measured is None else 0.0 for one in found]
            axes.barh(rows, values, left=left, color=colour, height=0.66, label=part)
            left = [before + value for before, value in zip(left, values, strict=True)]
        if any(one.measured is not None for one in found):
            peaks = [(one.peak or 0) / GIB if one.measured is not None else 0.0 for one in found]
            axes.barh(rows, peaks, color=theme.first, height=0.66, label="measured, allocated")
        for row, one in zip(rows, found, strict=True):
            label = size(one.peak) + (f"  (paper: {one.row.paper} GB)" if one.row.paper is not None else "")
            axes.annotate(
                label, ((one.peak or 0) / GIB, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
            )
        axes.set_yticks(rows, [one.row.name for one in found])
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.margins(x=0.25)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("GiB")
        axes.set_title(_title(found, asked))
        axes.legend(loc="lower right", ncols=1)
        return figure

    return Picture("memory", "Memory of a step", "", draw).png(LIGHT)


def depth_chart(found: Sequence[Found], asked: Asked) -> bytes:
    """Peak against the number of modules, a line a way of training."""

    def draw(theme: Theme) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 5.2), layout="constrained")
        axes = figure.subplots()
        names = list(dict.fromkeys(one.row.name for one in found))
        colours = (theme.first, theme.third, theme.second, "#cc79a7", "#999999", "#e69f00")
        ends: list[tuple[float, float, str, str]] = []
        for index, name in enumerate(names):
            line = [(one.depth, one.peak / GIB) for one in found if one.row.name == name and one.peak is not None]
            if not line:
                continue
            style = "osD^vP"[index % 6] + ("-", "--", "-.", ":")[index % 4]
            colour = colours[index % 6]
            axes.plot([depth for depth, _ in line], [peak for _, peak in line], style, color=colour, linewidth=2)
            ends.append((*line[-1], f"{name}: {line[-1][1]:.2f}", colour))
        axes.set_xlabel("modules")
        axes.set_ylabel("peak memory of a step, GiB")
        axes.set_ylim(bottom=0)
        axes.set_title(_title(found, asked))
        # Each line is named at its end; names of lines that end together stand one above the other.
        right = max((depth for depth, *_ in ends), default=0)
        for (depth, peak, label, colour), height in _spread(ends, 0.062 * axes.get_ylim()[1]):
            arrow = {"arrowstyle": "-", "color": colour, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 5}
            place = (1.05 * right, height)
            axes.annotate(label, (depth, peak), xytext=place, va="center", color=theme.ink, arrowprops=arrow)
        axes.set_xticks(sorted({one.depth for one in found}))
        return figure

    return Picture("depth", "Memory and depth", "", draw).png(LIGHT)


End = tuple[float, float, str, str]


def _spread(ends: Sequence[End], apart: float) -> list[tuple[End, float]]:
    """Heights for labels of the ends of lines, `apart` at least, each group of them about the middle of its lines."""
    groups: list[list[End]] = []
    for end in sorted(ends, key=lambda end: end[1]):
        if groups and end[1] - _middle(groups[-1]) < apart * (len(groups[-1]) + 1) / 2:
            groups[-1].append(end)
        else:
            groups.append([end])
    return [
        (end, _middle(group) + apart * (place - (len(group) - 1) / 2))
        for group in groups
        for place, end in enumerate(group)
    ]


def _middle(group: Sequence[End]) -> float:
    return sum(end[1] for end in group) / len(group)
