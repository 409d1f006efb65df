"""A run as it comes along: a table of its trainings, and the curves of the latest as dots of braille."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from layerwise.render.tables import table
from layerwise.render.units import duration

WIDTH, HEIGHT = 60, 6  # characters of a chart; each has two by four dots
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 8
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille character, by row and column."""
Point = tuple[float, float]


def watch_view(found: Mapping[str, Any]) -> RenderableType:
    """What `layerwise watch` shows of a `snapshot`."""
    parts: list[RenderableType] = [Text(_headline(found), style="bold"), _trainings(found["trainings"])]
    if found["trainings"]:
        parts += _charts(_latest(found["trainings"]))
    if found["probes"]:
        parts.append(_probes(found["probes"]))
    return Group(*parts)


def _headline(found: Mapping[str, Any]) -> str:
    holder = f"in use by {found['holder']}" if found["holder"] else "no process of this machine works on it"
    age = "" if found["age"] is None else f", last change {duration(found['age'])} ago"
    return f"{found['run']}: {holder}{age}"


def _trainings(trainings: Sequence[Mapping[str, Any]]) -> RenderableType:
    if not trainings:
        return Text("no training has begun yet")
    made = table("", "module", "state", "epoch", "updates", "loss", "validation", "by epoch", "updates/s")
    for training in trainings:
        for index, number in enumerate(training["modules"]):
            lines = training["epochs"]
            under_way = training["under_way"]
            loss = under_way[index] if under_way else lines[-1]["loss"][index] if lines else None
            validation = [line["validation_loss"][index] for line in lines]
            made.add_row(
                str(number),
                training["state"],
                str(training["epoch"]),
                f"{training['step']:,}",
                _number(loss),
                _number(validation[-1] if validation else None),
                sparkline(validation),
                "–" if training["updates_per_second"] is None else f"{training['updates_per_second']:.3g}",
            )
    return made


def _latest(trainings: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    under_way = [training for training in trainings if training["state"] == "training"]
    return (under_way or trainings)[-1]


def _charts(training: Mapping[str, Any]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for index, number in enumerate(training["modules"]):
        for title, name in (("loss", "loss"), ("validation loss", "validation_loss")):
            points = [(line["step"], line[name][index]) for line in training["epochs"]]
            if name == "loss" and training["under_way"]:
                points.append((training["step"], training["under_way"][index]))
            if len(points) > 1:
                parts += [Text(f"\nmodule {number}, {title} over updates"), Text("\n".join(chart(points)))]
    return parts


def _probes(probes: Sequence[Mapping[str, Any]]) -> RenderableType:
    made = table("\nlinear probes: test accuracy, %", "module", "task", "trained", "untrained")
    for probe in probes:
        for task, states in probe["tasks"].items():
            trained = states.get("trained", states.get("fixed"))
            untrained = states.get("untrained")
            shown = ("–" if one is None else f"{100 * one['accuracy']:.1f}" for one in (trained, untrained))
            made.add_row(str(probe["module"]), task, *shown)
    return made


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def sparkline(values: Sequence[float]) -> str:
    """The values as bars of one line, from the lowest to the highest; of many, the last of each stretch."""
    count = min(len(values), SPARK_WIDTH)
    shown = [values[(index + 1) * len(values) // count - 1] for index in range(count)]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] for value in shown)


def chart(points: Sequence[Point], width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    """Lines of text: the points joined by dots, with the limits of both axes written beside them."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    columns, rows = 2 * width, 4 * height
    cells = [[0x2800] * width for _ in range(height)]
    placed = [(_place(x, min(xs), max(xs), columns), rows - 1 - _place(y, low, high, rows)) for x, y in points]
    for (left, begin), (right, end) in zip(placed, placed[1:] or placed, strict=False):
        steps = max(abs(right - left), abs(end - begin), 1)
        for part in range(steps + 1):
            column, row = left + (right - left) * part // steps, begin + round((end - begin) * part / steps)
            cells[row // 4][column // 2] |= DOTS[row % 4][column % 2]
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    margin = max(map(len, labels))
    lines = [f"{label:>{margin}} ┤{''.join(map(chr, cell))}" for label, cell in zip(labels, cells, strict=True)]
    first, last = f"{min(xs):,g}", f"{max(xs):,g}"
    return [*lines, f"{' ' * margin} └{'─' * width}", f"{' ' * margin}  {first}{last:>{width - len(first)}}"]


def _place(value: float, low: float, high: float, count: int) -> int:
    return round((value - low) / (high - low) * (count - 1)) if high > low else 0
