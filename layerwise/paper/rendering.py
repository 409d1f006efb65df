"""Tables and figures of the paper, ours beside the paper's: for a terminal, as Markdown, and as pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import UsageError
from layerwise.files.run_files import is_sealed
from layerwise.files.storage import write_file, write_json
from layerwise.render.plots import LIGHT, Picture, Theme, panels
from layerwise.render.tables import show, table
from layerwise.render.units import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULT_BYTES = 1 << 28
"""The most that is read of an earlier result: Figure 2 holds pictures."""
NAMES = {"gim": "GIM", "cpc": "CPC", "supervised": "Supervised"}


def write_reproduction(what: str, result: Mapping[str, Any], folder: Path) -> list[Path]:
    """WHAT.json, WHAT.md and WHAT.png."""
    files = require_own_files(what, folder)
    write_json(files[0], result)
    write_file(files[1], markdown(what, result).encode())
    write_file(files[2], PICTURES[what](result).png(LIGHT))
    return files


def require_own_files(what: str, folder: Path) -> list[Path]:
    """Where the result is written.

    Raises:
        UsageError: a file of the user lies there.
    """
    files = [folder / f"{what}.{kind}" for kind in ("json", "md", "png")]
    there = [path for path in files if os.path.lexists(path)]
    if there and not is_sealed(files[0], RESULT_BYTES):
        raise UsageError(
            f"{', '.join(map(str, there))} would be written over, and layerwise did not write it: choose another "
            "--run-dir, or move it"
        )
    return files


def show_reproduction(what: str, result: Mapping[str, Any], files: Sequence[Path]) -> None:
    lines = [*warnings(result), *result.get("notes", [])]
    if what.startswith("table"):
        head, *rows = _memory_grid(result) if what == "table2" else _grid(result)
        made = table(result["title"], *head)
        for row in rows:
            made.add_row(*row)
        show(made)
    show(*(f"! {line}" for line in lines), *(str(file) for file in files))


def markdown(what: str, result: Mapping[str, Any]) -> str:
    """The whole result as a page that shows its picture."""
    parts = [f"# {result['title']}", ""]
    parts += [f"> **{line}**\n" for line in warnings(result)]
    seeds = result["seeds"]
    parts += [f"Recipe `{result['recipe']}`, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}."]
    parts += [f"{note}." for note in result.get("notes", [])]
    if what.startswith("table"):
        parts += ["", *_markdown_rows(_memory_grid(result) if what == "table2" else _grid(result)), ""]
        parts += [f"* {row['title']}: {row['note']}." for row in result["rows"] if row.get("note")]
    picture = PICTURES[what](result)
    parts += ["", f"![{picture.title}]({what}.png)", "", picture.words]
    return "\n".join(parts) + "\n"


def warnings(result: Mapping[str, Any]) -> list[str]:
    """What stands between these figures and the paper's."""
    found = []
    if result["scale"] < 1:
        found.append(
            f"SCALED DOWN to {result['scale']:g}: fewer samples, epochs and channels. These figures only show that the "
            "parts work; they say nothing of the methods"
        )
    if _other_data(result):
        found.append(
            f"OTHER DATA: the recipe {result['recipe']!r}, where the paper has {result['paper_dataset']}. Compare the "
            "order of the rows, not the figures"
        )
    return found


def _other_data(result: Mapping[str, Any]) -> bool:
    return bool(result.get("paper_recipe", result["recipe"]) != result["recipe"])


def _grid(result: Mapping[str, Any]) -> list[list[str]]:
    tasks = list(result["rows"][0]["cells"])
    head = ["method"]
    for task in tasks:
        head += [f"{task}: ours, %", "paper, %", "difference"]
    lines = [[*head, "training"]]
    for row in result["rows"]:
        line = [row["title"]]
        for cell in row["cells"].values():
            line += [_plus_minus(cell["mean"], cell["deviation"]), _plus_minus(cell["paper"], cell["paper_deviation"])]
            line.append("–" if cell["difference"] is None else f"{cell['difference']:+.1f}")
        line.append(duration(max(cell["seconds"] for cell in row["cells"].values())))
        lines.append(line)
    return lines


def _memory_grid(result: Mapping[str, Any]) -> list[list[str]]:
    lines = [["training", "ours, GB", "how", "paper, GB", "difference"]]
    for row in result["rows"]:
        numbers = [row["ours"], row["paper"], row["difference"]]
        ours, paper, difference = ("–" if number is None else f"{number:.2f}" for number in numbers)
        lines.append([row["title"], ours, row["problem"] or row["kind"], paper, difference])
    return lines


MEMORY_NOTE = (
    "Predicted bytes are those of tensors; the paper measured a GPU's allocation with the PyTorch of 2019, where a "
    "CUDA context and the allocator's reserve come on top"
)


def _memory(result: Mapping[str, Any]) -> Picture:
    """Ours and the paper's are different quantities, bytes of tensors and those that a driver counts: an axis each."""

    def draw(theme: Theme) -> Figure:
        rows = result["rows"]
        figure, every = panels(1, 2, 0.45 * len(rows) + 1.5)
        kinds = " and ".join(sorted({row["kind"] for row in rows if row["kind"]}))
        titles = (f"ours: in tensors, {kinds}", f"the paper's ({result['paper_dataset']}): whole GPU, 2019")
        for axes, name, title, colour in zip(
            every, ("ours", "paper"), titles, (theme.first, theme.second), strict=True
        ):
            for place, row in enumerate(rows):
                axes.barh(place, row[name] or 0, height=0.6, color=colour)
                nothing = "not known" if name == "ours" else "not in the paper"
                label = nothing if row[name] is None else f"{row[name]:.2f}"
                axes.annotate(label, (row[name] or 0, place), xytext=(4, 0), textcoords="offset points", va="center")
            axes.set_title(title, fontsize=10)
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.margins(x=0.2)
            axes.grid(axis="y", visible=False)
            axes.set_xlabel("GB")
        every[0].set_yticks(range(len(rows)), [row["title"] for row in rows])
        every[1].set_yticks(range(len(rows)), [""] * len(rows))
        figure.suptitle(_heading(result), x=0.01, ha="left", fontsize=11)
        return figure

    words = "; ".join(f"{line[0]}: {line[1]} GB" for line in _memory_grid(result)[1:])
    return Picture("memory", result["title"], f"{words}. {MEMORY_NOTE}.", draw)


def _plus_minus(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def _markdown_rows(grid: Sequence[Sequence[str]]) -> Iterator[str]:
    head, *rows = grid
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join(['---'] + ['---:'] * (len(head) - 1))} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _heading(result: Mapping[str, Any]) -> str:
    facts = [f"recipe {result['recipe']}"]
    if len(result["seeds"]) > 1:
        facts.append(f"mean ± standard deviation of {len(result['seeds'])} seeds")
    if result["scale"] < 1:
        facts.append(f"SCALED DOWN to {result['scale']:g}")
    return f"{result['title']}\n{', '.join(facts)}"


def _accuracies(result: Mapping[str, Any]) -> Picture:
    tasks = list(result["rows"][0]["cells"])

    # On other data than the paper's, its figures have an axis of their own: they do not compare with ours.
    apart = _other_data(result) and any(
        cell["paper"] is not None for row in result["rows"] for cell in row["cells"].values()
    )

    def draw(theme: Theme) -> Figure:
        shown = [(task, whose) for task in tasks for whose in (("ours", "paper") if apart else ("both",))]
        figure, every = panels(1, len(shown), 0.42 * len(result["rows"]) + 1.7)
        for axes, (task, whose) in zip(every, shown, strict=True):
            _accuracy_rows(axes, [(row["title"], row["cells"][task]) for row in result["rows"]], theme, result, whose)
            named = [task if apart else f"task: {task}"] * (len(tasks) > 1) + (
                [whose.replace("paper", "the paper's")] if apart else []
            )
            axes.set_title(", ".join(named), fontsize=10)
        for axes in every[1:]:
            axes.set_yticklabels([])
        told = f"\nours on {result['recipe']}; the paper's on {result['paper_dataset']}" if apart else ""
        figure.suptitle(_heading(result) + told, x=0.01, ha="left", fontsize=11)
        if not apart:
            handles, labels = every[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower right", ncols=2)
        return figure

    words = "; ".join(
        f"{row['title']}: " + ", ".join(f"{task} {cell['mean']:.1f} %" for task, cell in row["cells"].items())
        for row in result["rows"]
    )
    return Picture("accuracies", result["title"], f"{words}.", draw)


def _accuracy_rows(
    axes: Axes, rows: Sequence[tuple[str, Mapping[str, Any]]], theme: Theme, result: Mapping[str, Any], whose: str
) -> None:
    """Bars of ours with the paper's as marks (`both`), or of one of them (`ours`, `paper`)."""
    for place, (_, cell) in enumerate(rows):
        hidden = "_" if place else ""  # one entry in the legend
        theirs = f"{hidden}the paper's ({result['paper_dataset']})"
        mean, deviation = (
            (cell["paper"], cell["paper_deviation"]) if whose == "paper" else (cell["mean"], cell["deviation"])
        )
        colour = theme.second if whose == "paper" else theme.first
        axes.barh(place, mean or 0, height=0.6, color=colour, label=f"{hidden}ours")
        if deviation is not None:
            axes.errorbar(mean, place, xerr=deviation, color=theme.ink, capsize=3, linewidth=1.2)
        if whose == "both" and cell["paper"] is not None:
            axes.plot(
                cell["paper"],
                place,
                "D",
                markersize=8,
                markerfacecolor=theme.second,
                markeredgecolor=theme.paper,
                linestyle="none",
                zorder=4,
                clip_on=False,
                label=theirs,
            )
        # Beside the plot, where no bar, deviation or mark of the paper's can cross it.
        axes.annotate(
            _plus_minus(mean, deviation),
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
        )
    axes.set_yticks(range(len(rows)), [title for title, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("test accuracy (%)")


def _curves(result: Mapping[str, Any]) -> Picture:
    modules = result["modules"]

    def draw(theme: Theme) -> Figure:
        from matplotlib.ticker import MaxNLocator

        columns = min(len(modules), 3)
        rows = -(-len(modules) // columns)
        figure, every = panels(rows, columns, 3.0 * rows + 0.9, one_scale=True)
        for axes, module in zip(every, modules, strict=False):
            # The first module's curves are the same under both: the one drawn first shows behind the other.
            for schedule, color, width in (("simultaneous", theme.first, 3.2), ("iterative", theme.second, 1.5)):
                for name, style in (("loss", "-"), ("validation_loss", "--")):
                    label = f"{schedule}, {'validation' if name == 'validation_loss' else 'training'}"
                    _band(axes, module[schedule], name, color, style, width, label)
            axes.set_title(f"module {module['module']}")
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        for axes in every[len(modules) :]:
            axes.set_visible(False)
        for axes in every[::columns]:
            axes.set_ylabel("loss (nats)")
        figure.suptitle(_heading(result), x=0.01, ha="left", fontsize=11)
        handles, labels = every[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return figure

    words = "; ".join(
        f"module {module['module']}: lowest validation loss "
        + ", ".join(f"{_lowest(module[schedule]):.3f} {schedule}" for schedule in ("simultaneous", "iterative"))
        for module in modules
    )
    return Picture("curves", result["title"], f"In nats, mean over seeds: {words}.", draw)


def _lowest(runs: Sequence[Sequence[Mapping[str, float]]]) -> float:
    return math.fsum(min(line["validation_loss"] for line in run) for run in runs) / len(runs)


def _band(
    axes: Axes,
    runs: Sequence[Sequence[Mapping[str, float]]],
    name: str,
    color: str,
    style: str,
    width: float,
    label: str,
) -> None:
    """The mean over seeds, for as many epochs as all of them have, and the range between them."""
    epochs = [line["epoch"] for line in min(runs, key=len)]
    values = [[run[place][name] for run in runs] for place in range(len(epochs))]
    means = [math.fsum(row) / len(row) for row in values]
    marker = "o" if len(epochs) == 1 else None
    axes.plot(epochs, means, style, color=color, linewidth=width, marker=marker, markersize=6 + 2 * width, label=label)
    if len(runs) > 1:
        axes.fill_between(epochs, [min(row) for row in values], [max(row) for row in values], color=color, alpha=0.15)


def _errors(result: Mapping[str, Any]) -> Picture:
    def draw(theme: Theme) -> Figure:
        from matplotlib.ticker import LogLocator, NullFormatter

        figure, (axes,) = panels(1, 1, 4.4)
        styles = zip((theme.first, theme.second, theme.third), ("o-", "s--", "^-."), strict=True)
        for line, (color, style) in zip(result["methods"], styles, strict=True):
            modules = [point["module"] for point in line["points"]]
            errors = [max(point["mean"], FLOOR) for point in line["points"]]
            spread = [point["deviation"] or 0 for point in line["points"]]
            below = [min(width, error * 0.9) for width, error in zip(spread, errors, strict=True)]
            axes.errorbar(
                modules,
                errors,
                yerr=[below, spread] if any(spread) else None,
                fmt=style,
                color=color,
                linewidth=2,
                markersize=8,
                capsize=4,
                label=NAMES[line["method"]],
            )
            if line["paper_last"] is not None and not _other_data(result):
                axes.plot(
                    [modules[-1]],
                    [line["paper_last"]],
                    style[0],
                    markersize=11,
                    markerfacecolor="none",
                    markeredgecolor=color,
                    markeredgewidth=1.8,
                    label=f"{NAMES[line['method']]}, the paper's",
                )
        axes.set_yscale("log")
        lowest, highest = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest > 10 * lowest else range(1, 10)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(which="minor", linewidth=0.4)
        axes.set_xticks(modules)
        axes.set_xlabel("module whose representation is classified")
        faultless = any(point["mean"] < FLOOR for line in result["methods"] for point in line["points"])
        floor = f"; 0 at {FLOOR:g}" if faultless else ""
        axes.set_ylabel(f"{result['task']}: test error (%), log scale{floor}")
        known = [line for line in result["methods"] if line["paper_last"] is not None]
        whose = f"hollow: the paper's,\n{result['paper_dataset']}" if known else None
        if known and _other_data(result):  # far from ours, which would be squeezed at the top of one axis
            last = "\n".join(f"{NAMES[line['method']]} {line['paper_last']:g} %" for line in known)
            whose = f"the paper's last module,\n{result['paper_dataset']}:\n{last}\n\nours, {result['recipe']}:"
        legend = axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title=whose)
        legend.get_title().set_multialignment("left")
        figure.suptitle(_heading(result), x=0.01, ha="left", fontsize=11)
        return figure

    words = "; ".join(
        f"{NAMES[line['method']]}: " + ", ".join(f"{point['mean']:.1f} %" for point in line["points"])
        for line in result["methods"]
    )
    return Picture("errors", result["title"], f"Error by module, from the first: {words}.", draw)


FLOOR = 0.02  # %, where no mistake at all is drawn on a log scale


def _patches(result: Mapping[str, Any]) -> Picture:
    modules = result["modules"]
    patches = [patch for module in modules for one in module["neurons"] for patch in one["patches"]]
    every = [value for patch in patches for row in patch["pixels"] for value in row]
    low, high = min(every), max(every)

    side = len(modules[0]["neurons"][0]["patches"][0]["pixels"])
    shown = len(modules[0]["neurons"][0]["patches"])

    def draw(theme: Theme) -> Figure:
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        columns = _columns(modules)
        figure = Figure(figsize=(1.25 * columns + 1.0, 1.55 * len(modules) + 0.8), layout="constrained")
        colors = colormaps["gray"].with_extremes(bad=theme.first)
        grid = figure.subplots(len(modules), columns, squeeze=False)
        for line, module in zip(grid, modules, strict=True):
            for axes in line:
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
                axes.grid(visible=False)
            for axes, one in zip(line, module["neurons"], strict=False):
                axes.imshow(_mosaic(one["patches"]), cmap=colors, vmin=low, vmax=high, interpolation="nearest")
                axes.set_title(f"neuron {one['neuron']}", fontsize=9, fontweight="normal", loc="center")
            for axes in line[len(module["neurons"]) :]:
                axes.set_visible(False)
            line[0].set_ylabel(f"module {module['module']}", fontsize=11, fontweight="bold")
        told = f"each square: the {shown} patches, of as many pictures, that excite the neuron most; lines part them"
        figure.suptitle(f"{_heading(result)}\n{told}", x=0.01, ha="left", fontsize=11)
        return figure

    words = (
        f"For {_columns(modules)} neurons of each module, the {shown} patches ({side}x{side} pixels, of as many "
        "pictures that no stage learnt from) with the neuron's highest activations."
    )
    return Picture("patches", result["title"], words, draw)


def _columns(modules: Sequence[Mapping[str, Any]]) -> int:
    return max(len(module["neurons"]) for module in modules)


FINE = 8
"""Dots along each side of a pixel as drawn, so that the line between two patches is thinner than a pixel."""


def _mosaic(patches: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """At most four patches, two by two, with a thin line of no value between them; none where there are fewer."""
    side = FINE * len(patches[0]["pixels"])
    line = [math.nan] * (FINE // 4)
    nothing = [[math.nan] * side] * side
    fine = [_finely(patch["pixels"]) for patch in patches]
    first, second, third, fourth = (fine + [nothing] * 4)[:4]
    upper = [[*left, *line, *right] for left, right in zip(first, second, strict=True)]
    lower = [[*left, *line, *right] for left, right in zip(third, fourth, strict=True)]
    return [*upper, *([math.nan] * (2 * side + len(line)) for _ in line), *lower]


def _finely(pixels: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[value for value in row for _ in range(FINE)] for row in pixels for _ in range(FINE)]


PICTURES = {
    "table1": _accuracies,
    "table2": _memory,
    "table3": _accuracies,
    "table4": _accuracies,
    "figure2": _patches,
    "figure3": _curves,
    "figure4": _errors,
}
