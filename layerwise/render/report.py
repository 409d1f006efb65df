"""A run on one page that needs nothing else: its pictures are in it, and it loads nothing."""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from layerwise.files.run_files import MANIFEST, PAGE, require_own_report
from layerwise.files.storage import write_file, write_json
from layerwise.render.charts import Frame, axes, line, svg, text, ticks
from layerwise.render.memory import COLOURS, timeline_plot
from layerwise.render.page import HEIGHT, WIDTH, dot, keys, page, panel, table
from layerwise.render.units import duration, size, unit_of_bytes
from layerwise.settings.choices import TOGETHER
from layerwise.settings.units import counted


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.html` and a manifest with its hash to `folder`.

    `results` is what `layerwise.pipeline.results.for_report` found.

    Returns the page's path.

    Raises:
        UsageError: files of the user lie in their places.
    """
    require_own_report(folder)
    content = _page(results).encode("utf-8", "backslashreplace")
    probes = (*results["probes"], *results.get("fixed_features", ()))
    shows = [f"stages/{stage['module']}/stage.json" for stage in results["stages"]]
    shows += [f"probes/{probe['module']}.json" for probe in probes]
    manifest = {"files": {PAGE: hashlib.sha256(content).hexdigest()}, "shows": shows}
    # First what is to come, so that a report which was killed half way is not mistaken for a damaged one.
    write_json(folder / MANIFEST, {"finished": False, **manifest})
    write_file(folder / PAGE, content)
    write_json(folder / MANIFEST, {"finished": True, **manifest})
    return folder / PAGE


def _page(results: Mapping[str, Any]) -> str:
    recipe = results["recipe"]
    title = f"{recipe['name']}: {_schedule(recipe)}"
    return page(
        title,
        [
            f"<h1>{escape(title)}</h1>",
            f'<p class="lead">{escape(summary(results))}</p>',
            f'<p class="soft">{escape(_network(results))} · {escape(_machine(results))}</p>',
            *(f'<p class="note">{escape(note)}</p>' for note in (*results["dataset"]["notes"], *_lost(results))),
            _headlines(results),
            _toggles(results),
            _curves(results["stages"]),
            _probes(results),
            _memory(results),
            _caches(results["caches"]),
            _times(results),
            _modules(results),
            _dataset(results["dataset"]),
            _settings(results),
            _environment(results),
            f"<h2>Reproduce</h2><pre>{escape(_command(results))}</pre>",
        ],
    )


def summary(results: Mapping[str, Any]) -> str:
    """What came out, in one or two sentences with the figures that matter."""
    sentences = []
    if results["probes"]:
        last = results["probes"][-1]
        for task, states in last["tasks"].items():
            trained, untrained = states["trained"], states["untrained"]
            gain = 100 * (trained["accuracy"] - untrained["accuracy"])
            unsure = 100 * math.hypot(margin(trained), margin(untrained))
            of = f"A linear probe on module {last['module']} gets {100 * trained['accuracy']:.1f} % of {task} right"
            if abs(gain) <= unsure:
                sentences.append(
                    f"{of}, which {counted(trained['test_samples'], 'test sample')} cannot tell from the untrained "
                    f"network's {100 * untrained['accuracy']:.1f} %."
                )
            else:
                than = "above" if gain > 0 else "below"
                sentences.append(f"{of}, {abs(gain):.1f} points {than} the untrained network.")
    elif results["stages"]:
        sentences.append(f"{len(results['stages'])} of {counted(len(results['modules']), 'module')} are trained.")
    else:
        sentences.append("Nothing is trained yet.")
    if (ratio := _saved(results)) is not None:
        sentences.append(f"Training takes {ratio:.2f} times the memory that end-to-end training would.")
    return " ".join(sentences)


def margin(outcome: Mapping[str, Any]) -> float:
    """Half the width of the 95% interval of an accuracy on so many test samples (Wilson 1927)."""
    p, n, z = outcome["accuracy"], outcome["test_samples"], 1.96
    return float(z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))


def _saved(results: Mapping[str, Any]) -> float | None:
    memory = results.get("memory") or {}
    ours, whole = memory.get("stage"), memory.get("end_to_end")
    return ours["peak"] / whole["peak"] if ours and whole else None


def _lost(results: Mapping[str, Any]) -> list[str]:
    """A sentence for each module whose curve has gaps."""
    return [
        f"The curves of module {stage['module']} lack {len(lost)} of {counted(stage['epochs'], 'epoch')}, whose lines "
        "in metrics.jsonl are damaged or missing. The weights are not affected."
        for stage in results["stages"]
        if (lost := stage.get("lost_epochs"))
    ]


def _schedule(recipe: Mapping[str, Any]) -> str:
    return "all modules in each step" if recipe["schedule"] in TOGETHER else "one module after another"


def _network(results: Mapping[str, Any]) -> str:
    modules = results["modules"]
    count = f"{len(modules)} module" + "s" * (len(modules) != 1)
    return f"{count}, {sum(module['parameters'] for module in modules):,} parameters, seed {results['recipe']['seed']}"


def _machine(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    return f"{machine['device']}, {results['recipe']['training']['precision']}, torch {machine['torch']}"


def _command(results: Mapping[str, Any]) -> str:
    command = results["command"]
    return shlex.join(
        ["layerwise", "run", "--recipe", command["recipe"], *(f"--set={item}" for item in command["set"])]
    )


def _headlines(results: Mapping[str, Any]) -> str:
    """The few numbers that a reader looks for first."""
    facts: list[tuple[str, str]] = []
    if results["probes"]:
        last = results["probes"][-1]
        for task, states in last["tasks"].items():
            trained, untrained = (100 * states[state]["accuracy"] for state in ("trained", "untrained"))
            unsure = 100 * margin(states["trained"])
            told = f"{task}, module {last['module']}, linear probe; untrained {untrained:.1f} %"
            facts.append((f"{trained:.1f} ± {unsure:.1f} %", told))
    trainings = results["trainings"]
    known = [training for training in trainings if training["peak_bytes"] is not None]
    if known:
        most = max(known, key=lambda training: training["peak_bytes"])
        facts.append((size(most["peak_bytes"]), f"highest peak memory, {most['title']} ({most['peak_kind']})"))
    if trainings:
        facts.append((duration(sum(training["seconds"] for training in trainings)), "training, all stages"))
    if results["caches"]:
        facts.append((size(sum(cache["bytes"] for cache in results["caches"])), "activation caches on disk"))
    return '<div class="facts">' + "".join(f"<div><b>{escape(n)}</b>{escape(w)}</div>" for n, w in facts) + "</div>"


def _toggles(results: Mapping[str, Any]) -> str:
    numbers = [stage["module"] for stage in results["stages"]]
    if len(numbers) < 2:
        return ""
    buttons = "".join(f'<button aria-pressed="true" data-toggle="{n}">module {n}</button>' for n in numbers)
    return f'<p style="margin-top:2rem"><span class="soft">Show </span>{buttons}</p>'


def _curves(stages: Sequence[Mapping[str, Any]]) -> str:
    stages = [stage for stage in stages if stage["curve"]]
    if not stages:
        return ""
    names = ("loss", "validation_loss")
    losses = [point[name] for stage in stages for point in stage["curve"] for name in names]
    room = 0.06 * (max(losses) - min(losses)) or 0.5
    y = (min(losses) - room, max(losses) + room)
    panels = []
    for stage in stages:
        epochs = [point["epoch"] for point in stage["curve"]]
        frame = Frame(44, 22, WIDTH - 54, HEIGHT - 62, (epochs[0], max(epochs[-1], epochs[0] + 1)), y)
        parts = axes(
            frame,
            x_label="epoch",
            y_label="nats",
            x_ticks=[tick for tick in ticks(*frame.x, 6) if tick == int(tick)],
            y_ticks=ticks(*y, 5),
        )
        for name, colour, dash in (("loss", "var(--first)", ""), ("validation_loss", "var(--second)", "5 3")):
            points = [frame.at(point["epoch"], point[name]) for point in stage["curve"]]
            parts.append(line(points, colour, dash=dash))
            if len(points) == 1:
                parts.append(dot(*points[0], colour))
        hover = []
        for point in stage["curve"]:
            chosen = point["epoch"] == stage["best_epoch"]
            if chosen:
                parts.append(dot(*frame.at(point["epoch"], point["validation_loss"]), "var(--second)"))
            told = f"epoch {point['epoch']}\ntraining {point['loss']:.4f}\nvalidation {point['validation_loss']:.4f}"
            hover.append((frame.at(point["epoch"], 0)[0], told + "\nweights taken from here" * chosen))
        first, best = stage["curve"][0], min(point["validation_loss"] for point in stage["curve"])
        words = f"validation loss of module {stage['module']}: from {first['validation_loss']:.3f} to {best:.3f} nats"
        panels.append(panel(f"module {stage['module']}", svg(parts, WIDTH, HEIGHT, words, hover), stage["module"]))
    return (
        "<h2>Loss</h2>"
        + keys({"training": "var(--first)", "validation (dashed)": "var(--second)"})
        + f'<div class="panels">{"".join(panels)}</div>'
        + '<p class="soft">The dot is the epoch whose weights the module has.</p>'
    )


def _accuracies(results: Mapping[str, Any]) -> str:
    tasks = dict.fromkeys(task for probe in results["probes"] for task in probe["tasks"])
    panels = []
    for task in tasks:
        probes = [probe for probe in results["probes"] if task in probe["tasks"]]
        fixed = [one for one in results.get("fixed_features", ()) if task in one["tasks"]]
        outcomes = [probe["tasks"][task][state] for probe in probes for state in ("trained", "untrained")]
        outcomes += [one["tasks"][task]["fixed"] for one in fixed]
        low = max(min(100 * (one["accuracy"] - margin(one)) for one in outcomes) - 2, 0)
        high = min(max(100 * (one["accuracy"] + margin(one)) for one in outcomes) + 4, 104)
        x = (probes[0]["module"] - 0.5, probes[-1]["module"] + 0.5)
        frame = Frame(44, 22, WIDTH - 54, HEIGHT - 62, x, (low, high))
        marks = [tick for tick in ticks(*x, 10) if tick == int(tick)]
        parts = axes(frame, x_label="module", y_label="test, %", x_ticks=marks, y_ticks=ticks(low, high, 5))
        for one in fixed:
            outcome = one["tasks"][task]["fixed"]
            ends = [frame.at(edge, 100 * outcome["accuracy"]) for edge in x]
            parts.append(line(ends, "var(--soft)", dash="2 3"))
            parts.append(text(ends[1][0], ends[1][1] - 4, str(one["module"]), anchor="end", fill="soft"))
        hover: dict[float, list[str]] = {}
        for state, colour, dash, shift in (("untrained", "second", "5 3", 4), ("trained", "first", "", -4)):
            points = []
            for probe in probes:
                outcome = probe["tasks"][task][state]
                accuracy, unsure = 100 * outcome["accuracy"], 100 * margin(outcome)
                at, y = frame.at(probe["module"], accuracy)
                points.append((at + shift, y))
                ends = [(at + shift, frame.at(0, min(max(accuracy + sign * unsure, 0), 100))[1]) for sign in (-1, 1)]
                parts.append(line(ends, f"var(--{colour})", width=1.2))
                told = f"{state} {accuracy:.1f} ± {unsure:.1f} %"
                hover.setdefault(at, [f"module {probe['module']}"]).append(told)
            parts.append(line(points, f"var(--{colour})", dash=dash))
            parts += [dot(px, py, f"var(--{colour})") for px, py in points]
        words = "; ".join(
            f"module {probe['module']}: {100 * probe['tasks'][task]['trained']['accuracy']:.1f} %" for probe in probes
        )
        told_at = [(at, "\n".join(told)) for at, told in hover.items()]
        panels.append(panel(task, svg(parts, WIDTH, HEIGHT, f"test accuracy for {task}, {words}", told_at)))
    return (
        keys({"trained": "var(--first)", "untrained, same seed (dashed)": "var(--second)"})
        + f'<div class="panels">{"".join(panels)}</div>'
        + '<p class="soft">Bars are 95% intervals for the number of test samples.</p>'
    )


def _memory(results: Mapping[str, Any]) -> str:
    memory = results.get("memory")
    if not memory:
        return ""
    if (ours := memory.get("stage")) is None:
        return f'<h2>Memory</h2><p class="soft">{escape(memory["problem"])}</p>'
    shown = [(memory["title"], ours)]
    if (whole := memory.get("end_to_end")) is not None:
        shown.append(("end to end, whole batch", whole))
    unit, scale = unit_of_bytes([one["peak"] for _, one in shown])
    top = 1.1 * max(one["peak"] for _, one in shown) / scale
    panels = []
    for title, one in shown:
        frame = Frame(44, 22, WIDTH - 54, HEIGHT - 62, (0, one["events"]), (0, top))
        hover: list[tuple[float, str]] = []
        parts = [*timeline_plot(one, frame, unit, scale, hover), text(0, 12, unit, fill="soft")]
        words = f"memory over one step, {title}: peak {size(one['peak'])}"
        panels.append(panel(title, svg(parts, WIDTH, HEIGHT, words, hover)))
    rows = [
        [held["layer"], held["category"], held["dtype"], " x ".join(map(str, held["shape"])), size(held["bytes"])]
        for held in ours["largest"]
    ]
    largest = table(["layer", "category", "dtype", "shape", "size"], rows)
    ratio = _saved(results)
    told = (
        "" if ratio is None else f"The peak is {ratio:.2f} of that of end-to-end training with the same loss on top. "
    )
    return (
        "<h2>Memory over one step</h2>"
        + f"<p>{told}Live bytes of tensors by what they are for, counted on fake tensors.</p>"
        + keys(COLOURS)
        + f'<div class="panels">{"".join(panels)}</div>'
        + f"<details><summary>The largest tensors at the peak of {escape(memory['title'])}</summary>{largest}</details>"
    )


def _times(results: Mapping[str, Any]) -> str:
    costs = [(f"training {one['title']}", one["seconds"]) for one in results["trainings"]]
    costs += [(f"probe of module {one['module']}", one["seconds"]) for one in results["probes"] if "seconds" in one]
    if not costs:
        return ""
    longest = max(seconds for _, seconds in costs) or 1.0
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{duration(seconds)}</td>"
        f'<td class="bar"><i style="width:{100 * seconds / longest:.1f}%"></i></td></tr>'
        for name, seconds in costs
    )
    total = duration(sum(seconds for _, seconds in costs))
    return f'<h2>Time</h2><p>{total} in all.</p><div class="wide"><table><tbody>{rows}</tbody></table></div>'


def _modules(results: Mapping[str, Any]) -> str:
    stages = {stage["module"]: stage for stage in results["stages"]}
    rows = []
    for module in results["modules"]:
        stage = stages.get(module["module"])
        parts: list[str] = ["not trained", "", "", "", ""]
        if stage is not None:
            kept = next((line for line in stage["curve"] if line["epoch"] == stage["best_epoch"]), None)
            parts = [
                f"{stage['epochs']}",
                f"{stage['best_epoch']}",
                f"{kept['loss']:.4f}" if kept else "–",
                f"{kept['validation_loss']:.4f}" if kept else "–",
                stage["weights"][:12],
            ]
        rows.append([str(module["module"]), f"{module['parameters']:,}", f"{module['channels']:,}", *parts])
    trainings = [
        [
            training["title"],
            f"{training['steps']:,}",
            duration(training["seconds"]),
            f"{size(training['peak_bytes'])} ({training['peak_kind']})" if training["peak_bytes"] is not None else "–",
        ]
        for training in results["trainings"]
    ]
    headings = [
        "module",
        "parameters",
        "channels",
        "epochs",
        "best epoch",
        "training loss",
        "validation loss",
        "sha256",
    ]
    return (
        "<h2>Modules</h2>"
        + table(headings, rows)
        + '<p class="soft">Losses in nats, of the epoch whose weights the module has; their hash begins as shown.</p>'
        + table(["training", "updates", "time", "peak memory"], trainings)
    )


def _probes(results: Mapping[str, Any]) -> str:
    if not results["probes"]:
        return ""
    rows = []
    for probe in results["probes"]:
        for task, states in probe["tasks"].items():
            trained, untrained = states["trained"], states["untrained"]
            rows.append(
                [
                    f"module {probe['module']}",
                    task,
                    f"{100 * trained['accuracy']:.1f} ± {100 * margin(trained):.1f}",
                    f"{100 * untrained['accuracy']:.1f} ± {100 * margin(untrained):.1f}",
                    f"{100 * trained['train_accuracy']:.1f}",
                    f"{trained['samples']:,}",
                    f"{trained['test_samples']:,}",
                    f"{trained['learning_rate']:g}",
                ]
            )
    for features in results.get("fixed_features", ()):
        for task, states in features["tasks"].items():
            found = states["fixed"]
            counts = [f"{found['samples']:,}", f"{found['test_samples']:,}", f"{found['learning_rate']:g}"]
            accuracies = [
                f"{100 * found['accuracy']:.1f} ± {100 * margin(found):.1f}",
                "",
                f"{100 * found['train_accuracy']:.1f}",
            ]
            rows.append([str(features["module"]), task, *accuracies, *counts])
    headings = [
        "representation",
        "task",
        "test, %",
        "untrained, %",
        "training, %",
        "training samples",
        "test samples",
        "learning rate",
    ]
    return "<h2>Probes</h2>" + _accuracies(results) + table(headings, rows)


def _caches(caches: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for cache in caches:
        rate, ratio = cache.get("read_bytes_per_second"), cache.get("ratio")
        of_all = [
            size(cache["bytes"]),
            "–" if ratio is None else f"{ratio:.2f}",
            "–" if rate is None else f"{size(rate)}/s",
        ]
        for name, split in cache["splits"].items():
            views = f" x {split['views']} views" if split["views"] > 1 else ""
            shape = " x ".join("?" if length is None else str(length) for length in split["shape"])
            stored = f"{split['dtype']}, {split['codec']}"
            rows.append([f"module {cache['module']}", name, f"{split['samples']:,}{views}", shape, stored, *of_all])
            of_all = ["", "", ""]  # of all splits together
    if not rows:
        return ""
    headings = ["cache", "split", "samples", "a sample", "stored as", "on disk", "of float32", "read"]
    return (
        "<h2>Caches</h2>"
        + table(headings, rows)
        + '<p class="soft">Of float32: bytes on disk as a part of what plain float32 takes. Read: bytes of samples a '
        "second, decoded, when this page was written.</p>"
    )


def _dataset(dataset: Mapping[str, Any]) -> str:
    rows = [[name, f"{count:,}"] for name, count in dataset["sizes"].items()]
    shape = " x ".join(map(str, dataset["sample_shape"]))
    return (
        f'<h2>Dataset</h2>{table(["split", "samples"], rows)}<p class="soft">A sample is {escape(shape)} numbers.</p>'
    )


def _settings(results: Mapping[str, Any]) -> str:
    rows = flatten(results["recipe"])
    every = f"<details><summary>All settings</summary>{table(['field', 'value'], rows, 'words')}</details>"
    if (defaults := results.get("defaults")) is None:
        return "<h2>Settings</h2>" + every
    before = dict(flatten(defaults))
    changed = [(name, value, before.get(name, "–")) for name, value in rows if before.get(name) != value]
    if not changed:
        return f"<h2>Settings</h2><p>All as the recipe {escape(str(defaults['name']))} has them.</p>" + every
    return "<h2>Settings</h2>" + table(["field", "this run", "the recipe's default"], changed, "words") + every


def _environment(results: Mapping[str, Any]) -> str:
    rows = [(name, str(value)) for name, value in results["machine"].items()]
    rows += [("seed", str(results["recipe"]["seed"])), ("run", results["run"])]
    return "<h2>Environment</h2>" + table(["", ""], rows, "words")


def flatten(settings: object, name: str = "") -> list[tuple[str, str]]:
    """Every field of nested settings, named as `--set` names it."""
    items: Iterable[tuple[object, object]]
    if isinstance(settings, Mapping):
        items = settings.items()
    elif isinstance(settings, list) and any(isinstance(item, Mapping) for item in settings):
        items = enumerate(settings)
    else:
        words = {"None": "not set", "True": "true", "False": "false"}
        return [(name, words.get(str(settings), str(settings)))]
    return [row for key, value in items for row in flatten(value, f"{name}.{key}" if name else str(key))]
