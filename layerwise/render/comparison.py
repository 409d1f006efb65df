"""Several runs on one page: what they came to, their curves under one axis, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerwise.errors import UsageError
from layerwise.files.run_files import MARK
from layerwise.files.storage import read_file, write_file
from layerwise.render.charts import BLUE, GREEN, GREY, ORANGE, PINK, SKY, VERMILION, Frame, axes, line, svg, ticks
from layerwise.render.page import HEIGHT, WIDTH, dot, keys, page, panel, table
from layerwise.render.report import flatten, margin
from layerwise.render.units import duration, size

COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PINK, SKY, GREY)
DASHES = {"": "", "6 3": " (dashed)", "2 3": " (dotted)"}
"""Of a line, and what the key says of it."""
MOST = len(COLOURS) * len(DASHES)


def write_comparison(found: Mapping[str, Mapping[str, Any]], file: Path) -> Path:
    """Write the page.

    Args:
        found: name of a run to what `layerwise.pipeline.results.for_report` found of it.

    Raises:
        UsageError: a file of the user lies in its place, or there are too many runs to tell apart.
    """
    if len(found) > MOST:
        raise UsageError(f"--compare {len(found)} runs: their curves can be told apart up to {MOST}; name fewer")
    if file.exists() and MARK not in (read_file(file) or b"")[:1024]:
        raise UsageError(f"{file} was not written by layerwise and would be written over: choose another --out")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, comparison(found).encode("utf-8", "backslashreplace"))
    return file


def comparison(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = {name: (COLOURS[i % len(COLOURS)], list(DASHES)[i // len(COLOURS)]) for i, name in enumerate(found)}
    title = f"{len(found)} runs side by side"
    parts = [
        f"<h1>{title}</h1>",
        _outcomes(found),
        keys({name + DASHES[dash]: colour for name, (colour, dash) in lines.items()}),
        _losses(found, lines),
        _probes(found, lines),
        _differences(found),
    ]
    return page(title, parts)


def _outcomes(found: Mapping[str, Mapping[str, Any]]) -> str:
    tasks = dict.fromkeys(task for run in found.values() for probe in run["probes"] for task in probe["tasks"])
    rows = []
    for name, run in found.items():
        last = run["probes"][-1]["tasks"] if run["probes"] else {}
        peaks = [one["peak_bytes"] for one in run["trainings"] if one["peak_bytes"] is not None]
        memory = run.get("memory") or {}
        ours, whole = memory.get("stage"), memory.get("end_to_end")
        rows.append(
            [
                name,
                f"{len(run['stages'])} of {len(run['modules'])}",
                *(_accuracy(last[task]["trained"]) if task in last else "–" for task in tasks),
                size(max(peaks)) if peaks else "–",
                f"{ours['peak'] / whole['peak']:.2f}" if ours and whole else "–",
                duration(sum(one["seconds"] for one in run["trainings"])) if run["trainings"] else "–",
                size(sum(cache["bytes"] for cache in run["caches"])) if run["caches"] else "–",
            ]
        )
    headings = ["run", "modules trained", *(f"{task}, %" for task in tasks)]
    return table([*headings, "peak memory", "of end to end", "training", "caches"], rows) + (
        '<p class="soft">Accuracies: linear probe on the last module that was probed, on test samples, with the 95% '
        "interval. Of end to end: peak memory as a part of that of end-to-end training.</p>"
    )


def _accuracy(outcome: Mapping[str, Any]) -> str:
    return f"{100 * outcome['accuracy']:.1f} ± {100 * margin(outcome):.1f}"


Series = Mapping[str, Sequence[tuple[float, float]]]


def _chart(
    title: str, series: Series, lines: Mapping[str, tuple[str, str]], x_label: str, y_label: str, *, dots: bool = False
) -> str:
    """A line a run."""
    points = [point for of_run in series.values() for point in of_run]
    x, y = (sorted({point[axis] for point in points}) for axis in (0, 1))
    room = 0.06 * (y[-1] - y[0]) or 0.5
    frame = Frame(44, 22, WIDTH - 54, HEIGHT - 62, (x[0], max(x[-1], x[0] + 1)), (y[0] - room, y[-1] + room))
    whole = [tick for tick in ticks(*frame.x, 6) if tick == int(tick)]
    parts = axes(frame, x_label=x_label, y_label=y_label, x_ticks=whole, y_ticks=ticks(*frame.y, 5))
    hover: dict[float, list[str]] = {}
    for name, of_run in series.items():
        colour, dash = lines[name]
        places = [frame.at(*point) for point in of_run]
        parts.append(line(places, colour, dash=dash))
        parts += [dot(*place, colour) for place in places] if dots or len(places) == 1 else []
        for (at, value), (place, _) in zip(of_run, places, strict=True):
            hover.setdefault(place, [f"{x_label} {at:g}"]).append(f"{name} {value:.4g}")
    told = [(place, "\n".join(of_place)) for place, of_place in sorted(hover.items())]
    words = f"{title}: " + "; ".join(f"{name} ends at {of_run[-1][1]:.4g}" for name, of_run in series.items())
    return panel(title, svg(parts, WIDTH, HEIGHT, words, told))


def _losses(found: Mapping[str, Mapping[str, Any]], lines: Mapping[str, tuple[str, str]]) -> str:
    numbers = sorted({stage["module"] for run in found.values() for stage in run["stages"] if stage["curve"]})
    panels = []
    for number in numbers:
        series = {
            name: [(point["epoch"], point["validation_loss"]) for point in stage["curve"]]
            for name, run in found.items()
            for stage in run["stages"]
            if stage["module"] == number and stage["curve"]
        }
        panels.append(_chart(f"module {number}", series, lines, "epoch", "nats"))
    return f'<h2>Validation loss</h2><div class="panels">{"".join(panels)}</div>' if panels else ""


def _probes(found: Mapping[str, Mapping[str, Any]], lines: Mapping[str, tuple[str, str]]) -> str:
    tasks = dict.fromkeys(task for run in found.values() for probe in run["probes"] for task in probe["tasks"])
    panels = []
    for task in tasks:
        series: dict[str, list[tuple[float, float]]] = {}
        for name, run in found.items():
            for probe in run["probes"]:
                if task in probe["tasks"]:
                    accuracy = 100 * probe["tasks"][task]["trained"]["accuracy"]
                    series.setdefault(name, []).append((probe["module"], accuracy))
        panels.append(_chart(task, series, lines, "module", "test, %", dots=True))
    return f'<h2>Probes</h2><div class="panels">{"".join(panels)}</div>' if panels else ""


def _differences(found: Mapping[str, Mapping[str, Any]]) -> str:
    settings = {name: dict(flatten(run["recipe"])) for name, run in found.items()}
    fields = dict.fromkeys(field for of_run in settings.values() for field in of_run)
    rows = []
    for field in fields:
        values = [of_run.get(field, "–") for of_run in settings.values()]
        if len(set(values)) > 1:
            rows.append([field, *values])
    heading = "<h2>Settings in which they differ</h2>"
    if not rows:
        return heading + "<p>None: the runs have the same settings.</p>"
    return heading + table(["field", *map(str, found)], rows, "words")
