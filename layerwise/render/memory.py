"""Memory over one step, as a picture: stacked areas by category, modules and micro-batches below, the peak named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerwise.render.charts import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    YELLOW,
    Frame,
    alone,
    areas,
    axes,
    legend,
    svg,
    text,
    ticks,
)
from layerwise.render.units import size, unit_of_bytes

COLOURS = {
    "parameters": BLUE,
    "optimiser": SKY,
    "gradients": PINK,
    "inputs": YELLOW,
    "representations": ORANGE,
    "activations": GREEN,
    "temporaries": GREY,
}
WIDTH = 900.0


def timeline_plot(
    found: Mapping[str, Any], frame: Frame, unit: str, scale: float, hover: list[tuple[float, str]] | None = None
) -> list[str]:
    """The parts of one plot.

    Args:
        found: a `layerwise.memory.timeline.Timeline` as JSON.
        frame: its y in `unit`s of `scale` bytes; its x is the time of the step.
        hover: what is told where is added to it.
    """
    times = found["times"]
    values = {name: [count / scale for count in found["bytes"][name]] for name in COLOURS}
    font = frame.font
    parts = axes(frame, y_ticks=ticks(*frame.y, 4))
    parts += areas(frame, times, values, COLOURS)
    parts += _marks(found["marks"], found["events"], frame)
    x, y = frame.at(found["peak_time"], found["peak"] / scale)
    parts.append(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="var(--ink)" stroke="var(--paper)" stroke-width="1.5"/>'
    )
    label = f"peak {found['peak'] / scale:.2f} {unit}"
    place, anchor = (x - 9, "end") if x > frame.left + 0.6 * frame.width else (x + 9, "start")
    parts.append(text(place, max(y - 0.4 * font, frame.top), label, size=font, anchor=anchor, bold=True))
    if hover is not None:
        for place, time in enumerate(times):
            held = {name: found["bytes"][name][place] for name in reversed(COLOURS)}
            told = [f"{size(sum(held.values()))} in all", *(f"{name} {size(n)}" for name, n in held.items() if n)]
            hover.append((frame.at(time, 0)[0], "\n".join([*_where(found["marks"], time), *told])))
    return parts


def _where(marks: Sequence[Mapping[str, Any]], time: int) -> list[str]:
    before = [mark for mark in marks if mark["time"] <= time]
    if not before:
        return []
    last = before[-1]
    several = any(mark["micro_batch"] > 1 for mark in marks)
    return [f"module {last['module']}" + (f", micro-batch {last['micro_batch']}, pass {last['sweep']}" * several)]


def _marks(marks: Sequence[Mapping[str, Any]], events: int, frame: Frame) -> list[str]:
    """A strip below: a piece for each module and micro-batch, deeper modules darker, and where a pass begins."""
    height, font = 0.9 * frame.font, frame.font
    deepest = max((mark["module"] for mark in marks), default=1)
    below = frame.bottom + 3 + height + 1.05 * font
    parts, free = [], 0.0
    for place, mark in enumerate(marks):
        end = marks[place + 1]["time"] if place + 1 < len(marks) else events
        (x, _), (stop, _) = frame.at(mark["time"], 0), frame.at(end, 0)
        shade = 0.2 + 0.6 * mark["module"] / deepest
        parts.append(
            f'<rect x="{x:.1f}" y="{frame.bottom + 3:.1f}" width="{max(stop - x - 0.8, 0.4):.1f}" '
            f'height="{height:.1f}" fill="var(--soft)" fill-opacity="{shade:.2f}"/>'
        )
        begins_pass = not place or marks[place - 1]["sweep"] != mark["sweep"]
        label, room = f"module {mark['module']}", stop - x
        if any(other["micro_batch"] > 1 for other in marks):
            label, room = f"pass {mark['sweep']}", (frame.right if begins_pass else 0.0) - x
        # A single module needs no name; the others get theirs where it does not run into the one before.
        if deepest + len(marks) > 2 and room > 0.6 * font * len(label) and x >= free:
            free = x + 0.6 * font * len(label)
            parts.append(text(x, below, label, size=font, fill="soft"))
    return parts


def timeline_picture(found: Sequence[tuple[str, Mapping[str, Any]]], title: str) -> bytes:
    """An SVG of one step, with its ten largest tensors; or of several ways to take it, under one axis."""
    highest = max(one["peak"] for _, one in found)
    unit, scale = unit_of_bytes([highest])
    font, height = 15.0, 300.0 if len(found) == 1 else 130.0
    words = f"{title}: " + "; ".join(f"{name}: peak {size(one['peak'])}" for name, one in found)
    parts = [text(14, 28, title, size=17, bold=True)]
    names, y = legend(COLOURS, 14, 44, WIDTH - 14, font)
    parts += names
    for name, one in found:
        top = y + 34
        parts.append(text(14, top - 8, name, size=font, bold=True))
        frame = Frame(70, top + 14, WIDTH - 90, height, (0, one["events"]), (0, 1.08 * highest / scale), font)
        parts += timeline_plot(one, frame, unit, scale)
        parts.append(text(62, frame.top - 5, unit, size=font - 2, anchor="end", fill="soft"))
        y = frame.bottom + 2.4 * font
    if len(found) == 1:
        rows, y = _largest(found[0][1], y + 10, font)
        parts += rows
    parts.append(
        text(
            14,
            y + 18,
            "Across: tensors as they begin and end. Below: modules, the deeper the darker, and micro-batches.",
            size=13,
            fill="soft",
        )
    )
    full = y + 32
    return alone(svg(parts, WIDTH, full, words), WIDTH, full)


def _largest(found: Mapping[str, Any], y: float, font: float) -> tuple[list[str], float]:
    parts = [text(14, y + font, "The largest tensors at the peak", size=font, bold=True)]
    y += 1.4 * font
    for held in found["largest"]:
        y += 1.5 * font
        parts.append(
            f'<rect x="14" y="{y - 0.75 * font:.1f}" width="11" height="11" fill="{COLOURS[held["category"]]}"/>'
        )
        parts.append(text(120, y, size(held["bytes"]), size=font - 1, anchor="end"))
        parts.append(text(136, y, f"{held['dtype']} {' x '.join(map(str, held['shape']))}", size=font - 1))
        parts.append(text(430, y, held["layer"], size=font - 1, fill="soft"))
    return parts, y + 8
