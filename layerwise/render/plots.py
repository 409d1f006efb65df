"""A run's numbers as pictures, each for a light and for a dark page.

Colours are Okabe & Ito's (2008), which people with any colour vision can tell apart; series differ in form as well.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerwise.render.units import duration, size, unit_of_bytes, unit_of_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10.0  # inches
DPI = 160
COLUMNS = 3
LABELLED = 12  # points beyond which numbers beside them would overlap


@dataclass(frozen=True)
class Theme:
    name: str
    paper: str
    ink: str
    faint: str
    first: str
    second: str
    third: str


LIGHT = Theme("light", "#ffffff", "#1f2328", "#d5d9de", "#0072b2", "#d55e00", "#009e73")
DARK = Theme("dark", "#16191d", "#e4e7eb", "#3b4148", "#56b4e9", "#e69f00", "#2fc79a")
THEMES = (LIGHT, DARK)


@dataclass(frozen=True)
class Picture:
    """One picture of a report."""

    name: str
    title: str
    words: str
    """What it shows, for those who cannot see it."""
    draw: Callable[[Theme], Figure]

    def png(self, theme: Theme) -> bytes:
        import matplotlib

        style: dict[Any, Any] = {
            "font.size": 11,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.facecolor": theme.paper,
            "figure.facecolor": theme.paper,
            "axes.edgecolor": theme.ink,
            "axes.labelcolor": theme.ink,
            "text.color": theme.ink,
            "xtick.color": theme.ink,
            "ytick.color": theme.ink,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": theme.faint,
            "grid.linewidth": 0.8,
            "legend.frameon": False,
        }
        with matplotlib.rc_context(style):
            figure = self.draw(theme)
            content = io.BytesIO()
            figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
        return content.getvalue()


def pictures(results: Mapping[str, Any]) -> list[Picture]:
    """What `layerwise.pipeline.results.collect` found, as far as there is something to show."""
    found = []
    if any(stage["curve"] for stage in results["stages"]):
        found.append(_curves(results["stages"]))
    if results["probes"]:
        found.append(_probes(results["probes"], results.get("fixed_features", ())))
    if results["trainings"] or results["caches"]:
        found.append(_costs(results))
    return found


def _curves(stages: Sequence[Mapping[str, Any]]) -> Picture:
    stages = [stage for stage in stages if stage["curve"]]

    def draw(theme: Theme) -> Figure:
        columns = 2 if len(stages) == 4 else min(len(stages), COLUMNS)
        rows = -(-len(stages) // columns)
        figure, every = panels(rows, columns, 3.1 * rows + 0.4, one_scale=True)
        for axes, stage in zip(every, stages, strict=False):
            _curve(axes, stage, theme)
        for axes in every[len(stages) :]:
            axes.set_visible(False)
        for axes in every[::columns]:
            axes.set_ylabel("loss (nats)")
        handles, labels = every[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=3)
        return figure

    ends = "; ".join(
        f"module {stage['module']} from {stage['curve'][0]['validation_loss']:.3f} to "
        f"{min(line['validation_loss'] for line in stage['curve']):.3f}"
        for stage in stages
    )
    return Picture("curves", "Training and validation loss", f"Validation loss in nats: {ends}.", draw)


def _curve(axes: Axes, stage: Mapping[str, Any], theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    curve = stage["curve"]
    epochs = [line["epoch"] for line in curve]
    marker = "o" if len(curve) == 1 else None
    training = [line["loss"] for line in curve]
    validation = [line["validation_loss"] for line in curve]
    axes.plot(epochs, training, color=theme.first, linewidth=1.8, marker=marker, label="training")
    axes.plot(epochs, validation, color=theme.second, linewidth=1.8, marker=marker, linestyle="--", label="validation")
    best = stage["best_epoch"]
    if best in epochs:
        at = validation[epochs.index(best)]
        label = "weights kept"
        axes.plot([best], [at], "D", color=theme.second, markersize=7, markeredgecolor=theme.paper, label=label)
    axes.set_title(f"module {stage['module']}")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))


def _probes(probes: Sequence[Mapping[str, Any]], fixed: Sequence[Mapping[str, Any]]) -> Picture:
    tasks = list(dict.fromkeys(task for probe in probes for task in probe["tasks"]))
    points = {
        task: [
            (probe["module"], *(100 * probe["tasks"][task][state]["accuracy"] for state in ("trained", "untrained")))
            for probe in probes
            if task in probe["tasks"]
        ]
        for task in tasks
    }

    def draw(theme: Theme) -> Figure:
        figure, every = panels(1, len(tasks), 3.8)
        for axes, task in zip(every, tasks, strict=True):
            lines = {
                str(features["module"]): 100 * features["tasks"][task]["fixed"]["accuracy"]
                for features in fixed
                if task in features["tasks"]
            }
            _accuracies(axes, task, points[task], lines, theme)
        every[0].set_ylabel("test accuracy (%)")
        handles, labels = every[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=4)
        return figure

    words = "; ".join(
        f"{task}, module {module}: {trained:.1f} %, untrained {untrained:.1f} %"
        for task in tasks
        for module, trained, untrained in points[task]
    )
    return Picture("probes", "Linear probes, module by module", words, draw)


def _accuracies(
    axes: Axes, task: str, points: Sequence[tuple[int, float, float]], lines: Mapping[str, float], theme: Theme
) -> None:
    modules = [module for module, _, _ in points]
    trained, untrained = [row[1] for row in points], [row[2] for row in points]
    axes.plot(modules, trained, "o-", color=theme.first, markersize=8, linewidth=2, label="trained")
    axes.plot(modules, untrained, "s--", color=theme.second, markersize=7, linewidth=1.6, label="untrained, same seed")
    for name, accuracy in lines.items():
        axes.axhline(accuracy, color=theme.third, linestyle=":", linewidth=2, label=name)
    every = [*trained, *untrained, *lines.values()]
    lowest, highest = min(every), max(every)
    room = max(0.2 * (highest - lowest), 1.0)
    axes.set_ylim(max(lowest - room, -2), min(highest + room, 104))
    axes.set_xlim(modules[0] - 0.4, modules[-1] + 0.4)
    if len(modules) <= LABELLED:
        axes.set_xticks(modules)
        for module, own, other in points:
            above = own >= other
            _beside(axes, module, own, theme.first, above)
            _beside(axes, module, other, theme.second, not above)
    axes.set_title(f"task: {task}")
    axes.set_xlabel("module")


def _beside(axes: Axes, x: float, y: float, color: str, above: bool) -> None:
    axes.annotate(
        f"{y:.1f}",
        (x, y),
        xytext=(0, 8 if above else -8),
        textcoords="offset points",
        ha="center",
        va="bottom" if above else "top",
        color=color,
        fontweight="bold",
    )


def _costs(results: Mapping[str, Any]) -> Picture:
    trainings, caches = results["trainings"], results["caches"]
    names = [training["title"] for training in trainings]
    peaks = [training["peak_bytes"] for training in trainings]
    kinds = {training["peak_kind"] for training in trainings if training["peak_bytes"] is not None}
    seconds = [training["seconds"] for training in trainings]
    stored = [cache["bytes"] for cache in caches]

    def draw(theme: Theme) -> Figure:
        most = max(len(trainings), len(caches))
        figure, every = panels(1, 3, max(2.6, 0.42 * most + 1.4))
        _bars(every[0], names, peaks, "peak memory", unit_of_bytes(peaks), size, theme.first, most, theme)
        if kinds:
            every[0].set_title(f"peak memory, {' and '.join(sorted(kinds))}")
        _bars(every[1], names, seconds, "training time", unit_of_seconds(seconds), duration, theme.third, most, theme)
        labels = [f"module {cache['module']}" for cache in caches]
        _bars(every[2], labels, stored, "cache on disk", unit_of_bytes(stored), size, theme.second, most, theme)
        return figure

    words = [
        f"{name}: peak {size(peak)}, {duration(time)}" for name, peak, time in zip(names, peaks, seconds, strict=True)
    ]
    words += [f"cache of module {cache['module']}: {size(cache['bytes'])}" for cache in caches]
    return Picture("costs", "What it took", "; ".join(words), draw)


def _bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float | None],
    title: str,
    unit: tuple[str, float],
    text: Callable[[float], str],
    color: str,
    most: int,
    theme: Theme,
) -> None:
    """Horizontal bars, the first on top, each with its value; as thick as if there were `most` of them."""
    axes.set_title(title)
    axes.grid(axis="y", visible=False)
    if not any(values):
        axes.text(0.5, 0.5, "not known" if names else "none", transform=axes.transAxes, ha="center", va="center")
        axes.set_axis_off()
        return
    name, scale = unit
    rows = range(len(names))
    axes.barh(rows, [(value or 0) / scale for value in values], color=color, height=0.62)
    for row, value in zip(rows, values, strict=True):
        label = "not known" if value is None else text(value)
        axes.annotate(
            label, ((value or 0) / scale, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=10
        )
    axes.set_yticks(rows, names)
    axes.set_ylim(most - 0.4, -0.6)
    axes.margins(x=0.38)
    axes.set_xlabel(name)
    axes.spines["left"].set_color(theme.faint)
    axes.tick_params(axis="y", length=0)


def panels(rows: int, columns: int, height: float, *, one_scale: bool = False) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharey=one_scale).flat)
