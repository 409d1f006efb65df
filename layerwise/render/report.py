"""A run on one page that needs nothing else: no network, no script, its pictures inside it and beside it."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from layerwise.files.run_files import MANIFEST, MARK, PAGE, require_own_report
from layerwise.files.storage import write_file, write_json
from layerwise.render.plots import DARK, LIGHT, Picture, pictures
from layerwise.render.units import duration, size
from layerwise.settings.units import counted

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d5d9de; --tint: #f3f5f7;
        --good: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16191d; --ink: #e4e7eb; --soft: #a2abb5; --line: #3b4148; --tint: #1f242a; --good: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0; line-height: 1.25; }
h1, p, .settings td { overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; }
p { margin: .4rem 0; }
.soft { color: var(--soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem; margin: 1.5rem 0 0; }
.facts div { background: var(--tint); border-radius: .5rem; padding: .8rem 1rem; }
.facts b { display: block; font-size: 1.55rem; line-height: 1.3; color: var(--good); }
.note { border-left: 4px solid var(--good); background: var(--tint); padding: .5rem .9rem; margin: .6rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; min-width: 50%; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .38rem .8rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.settings th:nth-child(2), .settings td:nth-child(2) { text-align: left; }
.settings td:nth-child(2) { font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
img { display: block; width: 100%; height: auto; }
figure { margin: 0; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .9em; background: var(--tint);
       padding: .1em .35em; border-radius: .25rem; }
summary { cursor: pointer; font-size: 1.2rem; font-weight: bold; margin: 2.75rem 0 .5rem; }
@media print { body { max-width: none; } details { display: block; } }
"""


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.html`, its pictures and a manifest with their hashes to `folder`.

    `results` is what `layerwise.pipeline.results.collect` found.

    Returns the page's path.

    Raises:
        UsageError: files of the user lie in their places.
    """
    require_own_report(folder)
    figures, files = [], {}
    for picture in pictures(results):
        light, dark = picture.png(LIGHT), picture.png(DARK)
        files[f"{picture.name}.png"] = light
        figures.append(_figure(picture, light, dark))
    files[PAGE] = _page(results, figures).encode("utf-8", "backslashreplace")
    probes = (*results["probes"], *results.get("fixed_features", ()))
    shows = [f"stages/{stage['module']}/stage.json" for stage in results["stages"]]
    shows += [f"probes/{probe['module']}.json" for probe in probes]
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    manifest = {"files": hashes, "shows": shows}
    # First what is to come, so that a report which was killed half way is not mistaken for a damaged one.
    write_json(folder / MANIFEST, {"finished": False, **manifest})
    for name, content in files.items():
        write_file(folder / name, content)
    write_json(folder / MANIFEST, {"finished": True, **manifest})
    return folder / PAGE


def _page(results: Mapping[str, Any], figures: Sequence[str]) -> str:
    recipe = results["recipe"]
    title = f"{recipe['name']}: {_schedule(recipe)}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(_network(results))} · {escape(_machine(results))}</p>',
        *(f'<p class="note">{escape(note)}</p>' for note in (*results["dataset"]["notes"], *_lost(results))),
        _headlines(results),
        *figures,
        _modules(results),
        _probes(results),
        _caches(results["caches"]),
        _dataset(results["dataset"]),
        _settings(recipe),
        f'<p class="soft">Made again with <code>{escape(_command(results))}</code></p>',
    ]
    # Nothing may be loaded, whatever a name in the data tries.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARK.decode()}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _lost(results: Mapping[str, Any]) -> list[str]:
    """A sentence for each module whose curve has gaps."""
    return [
        f"The curves of module {stage['module']} lack {len(lost)} of {counted(stage['epochs'], 'epoch')}, whose lines "
        "in metrics.jsonl are damaged or missing. The weights are not affected."
        for stage in results["stages"]
        if (lost := stage.get("lost_epochs"))
    ]


def _schedule(recipe: Mapping[str, Any]) -> str:
    return "all modules in each step" if recipe["schedule"] == "simultaneous" else "one module after another"


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
            facts.append(
                (f"{trained:.1f} %", f"{task}, module {last['module']}, linear probe; untrained {untrained:.1f} %")
            )
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


def _figure(picture: Picture, light: bytes, dark: bytes) -> str:
    def source(content: bytes) -> str:
        return f"data:image/png;base64,{base64.b64encode(content).decode()}"

    return (
        f"<h2>{escape(picture.title)}</h2>\n<figure><picture>"
        f'<source srcset="{source(dark)}" media="(prefers-color-scheme: dark)">'
        f'<img src="{source(light)}" alt="{escape(picture.words)}"></picture></figure>'
    )


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
    headings = ["module", "parameters", "channels", "epochs", "kept", "training loss", "validation loss", "weights"]
    return (
        "<h2>Modules</h2>"
        + _table(headings, rows)
        + '<p class="soft">Losses in nats, of the epoch whose weights were kept; weights: how their sha256 begins.</p>'
        + _table(["training", "updates", "time", "peak memory"], trainings)
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
                    f"{100 * trained['accuracy']:.1f}",
                    f"{100 * untrained['accuracy']:.1f}",
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
            accuracies = [f"{100 * found['accuracy']:.1f}", "", f"{100 * found['train_accuracy']:.1f}"]
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
    return "<h2>Probes</h2>" + _table(headings, rows)


def _caches(caches: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for cache in caches:
        on_disk = size(cache["bytes"])
        for name, split in cache["splits"].items():
            views = f" x {split['views']} views" if split["views"] > 1 else ""
            shape = " x ".join(map(str, split["shape"]))
            stored = f"{split['dtype']}, {split['codec']}"
            rows.append([f"module {cache['module']}", name, f"{split['samples']:,}{views}", shape, stored, on_disk])
            on_disk = ""  # of all splits together
    if not rows:
        return ""
    return "<h2>Caches</h2>" + _table(["cache", "split", "samples", "a sample", "stored as", "on disk"], rows)


def _dataset(dataset: Mapping[str, Any]) -> str:
    rows = [[name, f"{count:,}"] for name, count in dataset["sizes"].items()]
    shape = " x ".join(map(str, dataset["sample_shape"]))
    return (
        f'<h2>Dataset</h2>{_table(["split", "samples"], rows)}<p class="soft">A sample is {escape(shape)} numbers.</p>'
    )


def _settings(recipe: Mapping[str, Any]) -> str:
    rows = [[name, value] for name, value in flatten(recipe)]
    return f"<details open><summary>Settings</summary>{_table(['field', 'value'], rows, 'settings')}</details>"


def flatten(settings: object, name: str = "") -> list[tuple[str, str]]:
    """Every field of nested settings, named as `--set` names it."""
    items: Iterable[tuple[object, object]]
    if isinstance(settings, Mapping):
        items = settings.items()
    elif isinstance(settings, list) and any(isinstance(item, Mapping) for item in settings):
        items = enumerate(settings)
    else:
        words = {"None": "null", "True": "true", "False": "false"}
        return [(name, words.get(str(settings), str(settings)))]
    return [row for key, value in items for row in flatten(value, f"{name}.{key}" if name else str(key))]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
