"""The paper's tables and figures anew: every row trained by its method, ours beside the paper's.

The trainings lie side by side in one folder, and tables and figures share them. What is finished is skipped.

    ROOT/
      gim-simultaneous-seed0/     a run, as any other
      table1.json table1.md table1.png
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from layerwise.errors import StoppedEarly, UsageError
from layerwise.paper.memory_rows import PAPER, Asked, Row, count_modules, row_recipe, work_out_apart
from layerwise.paper.numbers import CPC, GIM, SUPERVISED, TABLES, Cell, PaperTable, Training
from layerwise.paper.patches import exciting_patches, require_patches
from layerwise.pipeline.frozen import require_stage
from layerwise.pipeline.probe import probe_fixed, probe_module
from layerwise.pipeline.results import curve
from layerwise.pipeline.run import open_run
from layerwise.pipeline.schedule import train_all
from layerwise.pipeline.setup import Origin, Setup
from layerwise.progress import Progress
from layerwise.recipe.loader import heeded, read_recipe, resolve_recipe
from layerwise.recipe.recipe import Recipe
from layerwise.stopping import Stopping


@dataclass(frozen=True)
class Ground:
    """What all trainings of a reproduction share."""

    source: str
    """The recipe, a name or a path."""
    overrides: tuple[str, ...]
    """Of the recipe, as --set takes them; the scale among them."""
    root: Path
    seeds: int
    device: torch.device
    data_dir: Path | None
    download: bool
    fresh: bool
    progress: Progress
    stopping: Stopping
    _anew: set[Path] = field(default_factory=set, init=False)
    """Runs that `fresh` has trained again: several cells share one."""

    @cached_property
    def as_written(self) -> Recipe:
        """As its file gives it."""
        return read_recipe(self.source)

    @cached_property
    def recipe(self) -> Recipe:
        """As its file and the overrides give it."""
        return resolve_recipe(self.as_written, self.overrides)

    def all_seeds(self) -> range:
        first = self.recipe.seed
        return range(first, first + self.seeds)

    def facts(self) -> dict[str, Any]:
        """What a reader of any figure must know."""
        recipe = self.recipe
        return {"recipe": recipe.name, "scale": recipe.scale, "seeds": list(self.all_seeds()), "set": self.overrides}

    def overrides_for(self, training: Training, seed: int) -> list[str]:
        """Those of the reproduction that the training heeds, and its own."""
        own = (f"method={training.method}", f"schedule={training.schedule}", f"seed={seed}", *training.changes)
        return heeded(self.as_written, (*self.overrides, *own))  # one --set for all rows, whatever their method

    @contextmanager
    def trained(self, training: Training, seed: int, task: str | None = None) -> Iterator[Setup]:
        """The finished training, held while the block reads from it.

        Args:
            task: what the dataset must have labels for, as `choose_task` takes it; None: it needs none.

        Raises:
            UsageError: it has none; nothing was trained.
        """
        overrides = self.overrides_for(training, seed)
        recipe = resolve_recipe(self.as_written, overrides)
        folder = self.root / f"{training.key}-seed{seed}"
        run = open_run(folder, recipe)
        stopping = self.stopping
        setup = Setup(
            run,
            self.device,
            self.data_dir,
            self.download,
            self.progress,
            stopping,
            at_steps=stopping.at_steps,
            measure_threads=True,
            origin=Origin(self.source, tuple(overrides), self.as_written),
        )
        with setup.held("reproduce"):
            if task is not None:
                choose_task(setup, task)
            for _ in train_all(setup, fresh=self.fresh and folder not in self._anew):
                pass
            self._anew.add(folder)
            yield setup


def table(ground: Ground, paper: PaperTable) -> dict[str, Any]:
    """Every row of a table: the accuracies (%) of each seed, their mean and deviation, and the difference to the paper.

    Raises:
        UsageError: the recipe's dataset lacks a task of the table, or the recipe a field that a row changes.
    """
    _require_tasks(ground, paper)
    for cell in (cell for row in paper.rows for cell in row.cells.values()):  # before the first is trained
        resolve_recipe(ground.as_written, ground.overrides_for(cell.training, ground.recipe.seed))
    rows, sources = [], []
    for number, row in enumerate(paper.rows, 1):
        ground.progress.note(f"row {number} of {len(paper.rows)}: {row.title}")
        cells = {}
        for task, cell in row.cells.items():
            found = [_judge(ground, cell, task, seed) for seed in ground.all_seeds()]
            name = found[0]["task"]
            sources += [one["source"] for one in found]
            cells[name] = compare([one["accuracy"] for one in found], cell.paper, cell.deviation)
            cells[name]["seconds"] = statistics.fmean(one["seconds"] for one in found)
            cells[name]["epochs"] = [one["epochs"] for one in found]
        rows.append({"title": row.title, "note": row.note, "cells": cells})
    facts = {"paper_dataset": paper.dataset, "paper_recipe": paper.recipe, **ground.facts(), **_told(sources)}
    return {"title": paper.title, **facts, "rows": rows}


def _require_tasks(ground: Ground, paper: PaperTable) -> None:
    """
    Raises:
        UsageError: the dataset is known to lack a task of the table, before anything is trained.
    """
    expected = ground.recipe.dataset.expects()
    wanted = {task for row in paper.rows for task in row.cells if task}
    if expected is not None and expected[1] and (missing := wanted - expected[1].keys()):
        raise UsageError(
            f"this table needs labels for {', '.join(sorted(missing))}, and the dataset of {ground.recipe.name!r} has "
            f"{', '.join(expected[1])}: choose another --recipe"
        )


def _source(setup: Setup) -> dict[str, Any]:
    """What a reader must know of the data that a training saw."""
    return {"dataset": type(setup.recipe.dataset).__name__, "notes": list(setup.facts.notes)}


def _told(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All that several of them say, once."""
    notes = list(dict.fromkeys(note for source in sources for note in source["notes"]))
    return {"notes": notes, "dataset": sources[-1]["dataset"] if sources else ""}


def compare(ours: Sequence[float], paper: float | None, deviation: float | None = None) -> dict[str, Any]:
    """Mean and standard deviation (of the sample; None for one value) beside the paper's, and the difference."""
    mean = statistics.fmean(ours)
    return {
        "ours": list(ours),
        "mean": mean,
        "deviation": statistics.stdev(ours) if len(ours) > 1 else None,
        "paper": paper,
        "paper_deviation": deviation,
        "difference": None if paper is None else mean - paper,
    }


def _judge(ground: Ground, cell: Cell, task: str, seed: int) -> dict[str, Any]:
    with ground.trained(cell.training, seed, task) as setup:
        name = choose_task(setup, task)
        if cell.features is None:
            accuracy = probe_module(setup, len(setup.holders))["tasks"][name]["trained"]["accuracy"]
        else:
            fixed = {found["module"]: found for found in probe_fixed(setup)}
            accuracy = fixed[cell.features]["tasks"][name]["fixed"]["accuracy"]
        return {
            "task": name,
            "accuracy": 100 * accuracy,
            "source": _source(setup),
            **_cost(setup),
        }


def choose_task(setup: Setup, task: str) -> str:
    """The named task, or the dataset's first where there is no name.

    Raises:
        UsageError: the dataset has no such labels.
    """
    tasks = list(setup.facts.classes)
    name = task or next(iter(tasks), "")
    if name not in tasks:
        raise UsageError(
            f"this needs labels for {task or 'some task'}, and the dataset of {setup.recipe.name!r} has "
            f"{', '.join(tasks) or 'none'}: choose another --recipe"
        )
    return name


def _cost(setup: Setup) -> dict[str, Any]:
    """Seconds of training, over all modules, and epochs of each."""
    records = {tuple(record["trained_with"]): record for record in _records(setup)}
    return {
        "seconds": sum(record["seconds"] for record in records.values()),
        "epochs": [record["epochs"] for record in records.values()],
    }


def _records(setup: Setup) -> list[dict[str, Any]]:
    return [require_stage(setup, number) for number in range(1, setup.depth + 1)]


def training_curves(ground: Ground) -> dict[str, Any]:
    """Figure 3: the losses of each module, epoch by epoch, trained with all others or one after another."""
    modules: dict[int, dict[str, list[Any]]] = {}
    sources = []
    for schedule in ("simultaneous", "iterative"):
        for seed in ground.all_seeds():
            with ground.trained(Training("gim", schedule), seed) as setup:
                sources.append(_source(setup))
                for number, record in enumerate(_records(setup), 1):
                    lines = modules.setdefault(number, {}).setdefault(schedule, [])
                    lines.append(curve(setup.run, record, number))
    found = [{"module": number, **by_schedule} for number, by_schedule in modules.items()]
    title = "Figure 3: training and validation curves of each module"
    return {"title": title, **STL10, **ground.facts(), **_told(sources), "modules": found}


STL10 = {"paper_dataset": "STL-10", "paper_recipe": "stl10"}
LIBRISPEECH = {"paper_dataset": "LibriSpeech train-clean-100", "paper_recipe": "librispeech"}
"""Where the paper's own figures come from."""


PAPER_SPEAKER_ERRORS = {"gim": 100 - 99.4, "cpc": 100 - 99.6, "supervised": 100 - 98.9}
"""%, of the last module (the paper's Table 3); its Figure 4 shows the others without numbers."""


def errors_by_layer(ground: Ground) -> dict[str, Any]:
    """Figure 4: the error (%) of a linear classifier on each module's representation, by method.

    Speakers where the dataset has them, else its first task.
    """
    lines, sources, task = [], [], ""
    for training in (GIM, CPC, SUPERVISED):
        by_module: dict[int, list[float]] = {}
        for seed in ground.all_seeds():
            with ground.trained(_for_speakers(ground, training), seed, "") as setup:
                sources.append(_source(setup))
                task = "speaker" if "speaker" in setup.facts.classes else choose_task(setup, "")
                for part in range(1, len(setup.holders) + 1):
                    accuracy = probe_module(setup, part)["tasks"][task]["trained"]["accuracy"]
                    by_module.setdefault(part, []).append(100 * (1 - accuracy))
        paper = PAPER_SPEAKER_ERRORS[training.method] if task == "speaker" else None
        points = [{"module": part, **compare(errors, None)} for part, errors in by_module.items()]
        lines.append({"method": training.method, "points": points, "paper_last": paper})
    return {
        "title": "Figure 4: error of a linear classifier by module",
        "task": task,
        **LIBRISPEECH,
        **ground.facts(),
        **_told(sources),
        "methods": lines,
    }


def _for_speakers(ground: Ground, training: Training) -> Training:
    with_speakers = training.method == "supervised" and ground.recipe.network.has_context
    return Training(training.method, training.schedule, ("objective.task=speaker",)) if with_speakers else training


def patches_of_neurons(ground: Ground) -> dict[str, Any]:
    """Figure 2: the patches that excite chosen neurons of each module most."""
    require_patches(ground.recipe)
    with ground.trained(GIM, ground.recipe.seed) as setup:
        modules = exciting_patches(setup, NEURONS)
        told = _told([_source(setup)])
    return {
        "title": "Figure 2: patches that excite a neuron most",
        **STL10,
        **ground.facts(),
        **told,
        "modules": modules,
    }


def memory_of_a_step(ground: Ground) -> dict[str, Any]:
    """Table 2: the memory of one step at the paper's batch, in GB (10^9 bytes), as memreport works it out."""
    asked = Asked(ground.source, ground.overrides, PAPER_BATCH, ground.device.type)
    count = count_modules(row_recipe(asked, Row("", "gim")))
    modules = [Row(f"gim module {number}", "gim", (number,)) for number in range(1, count + 1)]
    asked_rows = [
        (Row("supervised", "supervised"), "Supervised"),
        (Row("cpc", "cpc"), "CPC"),
        (Row("gim all", "gim", step="summed"), "GIM, all modules (losses summed)"),
        *((row, f"GIM, module {number}") for number, row in enumerate(modules, 1)),
        (Row("gim all, eager", "gim"), "GIM, all modules, each stepped at once (ours)"),
    ]
    rows = []
    for row, title in asked_rows:
        if ground.stopping():
            raise StoppedEarly(f"stopped before the row {title!r}; the same command begins the table again")
        (found,) = work_out_apart([(asked, row)])
        if found.problem is not None and ground.stopping():  # the signal ended that process too
            raise StoppedEarly(f"stopped in the row {title!r}; the same command begins the table again")
        ours, paper = None if found.peak is None else found.peak / 1e9, PAPER.get(row.name)
        rows.append(
            {
                "title": title,
                "ours": ours,
                "kind": "predicted" if found.measured is None else "measured",
                "paper": paper,
                "difference": None if ours is None or paper is None else ours - paper,
                "problem": found.problem,
            }
        )
    return {
        "title": f"Table 2: memory of a training step, batch {PAPER_BATCH}",
        **STL10,
        **ground.facts(),
        "rows": rows,
    }


PAPER_BATCH = 16
NEURONS = 8  # shown of each module


def reproduce(ground: Ground, what: str) -> dict[str, Any]:
    """A table or figure by the name that the command line gives it, as plain numbers."""
    if what in TABLES:
        return table(ground, TABLES[what])
    return FIGURES[what](ground)


FIGURES: Mapping[str, Callable[[Ground], dict[str, Any]]] = {
    "table2": memory_of_a_step,
    "figure2": patches_of_neurons,
    "figure3": training_curves,
    "figure4": errors_by_layer,
}
