"""The results as Markdown and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.machine import in_words
from layerwise.render.plots import LIGHT, Picture, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BYTES = {"predicted", "allocated", "reserved", "driver", "device_used", "device_used_before", "context"}
PARTS_OF_ONE = {"error", "of_limit", "waiting", "of_forward", "mfu", "of_matrix_product"}
NOT_SHOWN = {"row", "took", "flops", "sample_bytes", "depth", "device_used_before"}


def markdown(results: Mapping[str, Any]) -> str:
    lines = ["# The GPU benchmark", "", f"{in_words(results['machine'])}; device {results['device']}.", ""]
    for name, part in results["parts"].items():
        lines += [f"## {name}", "", f"{part['seconds']:.0f} s{'; ' + part['problem'] if part['problem'] else ''}.", ""]
        rows = [row for row in part["rows"] if "problem" not in row and "skipped" not in row]
        columns = list(dict.fromkeys(key for row in rows for key in row if key not in NOT_SHOWN and key != "name"))
        if rows:
            lines += [
                "| | " + " | ".join(_heading(column) for column in columns) + " |",
                "| --- |" + " ---: |" * len(columns),
                *(f"| {row['name']} | " + " | ".join(_cell(c, row.get(c)) for c in columns) + " |" for row in rows),
                "",
            ]
        told = [
            (row["name"], kind, row[kind]) for row in part["rows"] for kind in ("problem", "skipped") if kind in row
        ]
        lines += [f"- {title}: {kind}: {reason}" for title, kind, reason in told]
        lines += [""] if told else []
    return "\n".join(lines).rstrip() + "\n"


def _heading(column: str) -> str:
    unit = ", GiB" if column in BYTES else ", %" if column in PARTS_OF_ONE else ""
    return column.replace("_", " ") + unit


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "–"
    if column in BYTES:
        return f"{value / 2**30:.3f}"
    if column in PARTS_OF_ONE:
        return f"{100 * value:.1f}"
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def pictures(results: Mapping[str, Any]) -> dict[str, bytes]:
    """File name to PNG, of the parts that have something to show."""
    drawn: dict[str, bytes] = {}
    makers: dict[str, Callable[[Sequence[Mapping[str, Any]], Theme], Figure]] = {
        "table2": _memory,
        "alternatives": _alternatives,
        "depth": _depth,
        "feeds": _feeds,
    }
    for name, make in makers.items():
        rows = [row for row in results["parts"].get(name, {}).get("rows", ()) if "seconds" in row or "feed" in row]
        if rows:

            def draw(theme: Theme, make: Any = make, rows: Any = rows) -> Figure:
                figure: Figure = make(rows, theme)
                return figure

            drawn[f"{name}.png"] = Picture(name, name, "", draw).png(LIGHT)
    return drawn


def _bars(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str], scale: float, unit: str, theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    kinds = [kind for kind in kinds if any(row.get(kind) is not None for row in rows)]
    figure = Figure(figsize=(10, 0.22 * len(rows) * (len(kinds) + 0.6) + 1.2), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(kinds)
    for index, kind in enumerate(kinds):
        places = [row + (index - (len(kinds) - 1) / 2) * height for row in range(len(rows))]
        values = [(row.get(kind) or 0) / scale for row in rows]
        colour = (theme.first, theme.second, theme.third, "#cc79a7")[index]
        bars = axes.barh(places, values, height=height, color=colour, label=kind.replace("_", " "))
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=7)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(unit)
    axes.legend(loc="lower right")
    return figure


def _memory(rows: Sequence[Mapping[str, Any]], theme: Theme) -> Figure:
    return _bars(rows, ("predicted", "allocated", "reserved", "driver"), 2**30, "GiB", theme)


def _alternatives(rows: Sequence[Mapping[str, Any]], theme: Theme) -> Figure:
    if not any("allocated" in row for row in rows):
        return _bars(rows, ("seconds",), 1e-3, "milliseconds a step", theme)
    return _bars(rows, ("allocated", "reserved"), 2**30, "GiB", theme)


def _feeds(rows: Sequence[Mapping[str, Any]], theme: Theme) -> Figure:
    return _bars(rows, ("samples_per_second",), 1, "samples a second", theme)


def _depth(rows: Sequence[Mapping[str, Any]], theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    kind = "allocated" if any("allocated" in row for row in rows) else "predicted"
    colours = (theme.first, theme.third, theme.second, "#cc79a7", "#999999", "#e69f00")
    for index, name in enumerate(dict.fromkeys(row["row"] for row in rows)):
        line = [(row["depth"], row[kind] / 2**30) for row in rows if row["row"] == name]
        form = "osD^vP"[index % 6] + ("-", "--", "-.", ":")[index % 4]
        axes.plot(*zip(*line, strict=True), form, color=colours[index % 6], label=name)
    axes.set_xlabel("modules")
    axes.set_ylabel(f"GiB {kind}")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")
    return figure
