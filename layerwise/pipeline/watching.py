"""How far a run has come, read from its directory while another process works on it. Nothing is written or locked, and
neither the recipe nor torch is needed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from layerwise.errors import DamagedData, NotReady
from layerwise.files.findings import intact
from layerwise.files.metrics import METRICS, read_metrics
from layerwise.files.records import CHECKPOINT, PROBE, STAGE, CheckpointRecord, EpochRecord, StageRecord
from layerwise.files.run_files import LOCK, STAGE_FOLDER, is_run, subfolders
from layerwise.files.storage import read_file


def snapshot(run: Path) -> dict[str, Any]:
    """What the run's directory says now.

    `trainings`: of one module or several, in order: their `state` ("training" until their weights are frozen, then
    "trained"), `epoch` and `step` (updates) that they have come to, `epochs` (a line each: losses in nats, seconds),
    `under_way` (mean losses of the epoch that is not over, or None), `updates_per_second` and `peak_bytes`. `probes`:
    accuracies from 0 to 1. `holder`: the process that works on the run, or None. `age`: seconds since a file of a
    stage or probe changed, or None.

    Raises:
        NotReady: there is no run in the folder.
    """
    if not is_run(run):
        raise NotReady(f"{run} is not a run. Name one with --run-dir, or start one: layerwise run --recipe digits")
    probes = []
    for path in sorted((run / "probes").glob("*.json"), key=lambda path: (len(path.name), path.name)):
        if (found := intact(path, PROBE)) is not None:
            probes.append({"module": found["module"], "tasks": found["tasks"]})
    return {"run": str(run), "holder": _holder(run), "age": _age(run), "trainings": _trainings(run), "probes": probes}


def _trainings(run: Path) -> list[dict[str, Any]]:
    found: dict[tuple[int, ...], StageRecord | None] = {}
    for folder in subfolders(run / "stages", STAGE_FOLDER):
        first, _, last = folder.name.partition("-")
        numbers = tuple(range(int(first), int(last or first) + 1))
        record = intact(folder / "stage.json", STAGE)
        if record is not None:
            found[tuple(record["trained_with"])] = record
        elif (folder / "checkpoint.json").exists() or (folder / METRICS).exists():
            found.setdefault(numbers)
    return [_training(run, numbers, found[numbers]) for numbers in sorted(found)]


def _training(run: Path, modules: tuple[int, ...], record: StageRecord | None) -> dict[str, Any]:
    name = str(modules[0]) if len(modules) == 1 else f"{modules[0]}-{modules[-1]}"
    folder = run / "stages" / name
    epochs: list[EpochRecord] = []
    with suppress(DamagedData):  # which `verify` tells
        epochs = read_metrics(folder / METRICS, len(modules)).epochs
    checkpoint = intact(folder / "checkpoint.json", CHECKPOINT)
    # A finished training may go on for more epochs, and keeps its record until it is frozen anew.
    goes_on = checkpoint is not None and record is not None and checkpoint["place"]["step"] > record["steps"]
    state = "training" if record is None or goes_on else "trained"
    place = checkpoint["place"] if checkpoint is not None and state == "training" else None
    last = {"epoch": epochs[-1]["epoch"], "step": epochs[-1]["step"]} if epochs else {"epoch": 0, "step": 0}
    peak = record.get("peak") if record is not None else None
    return {
        "modules": list(modules),
        "state": state,
        "epoch": last["epoch"] if place is None else place["epoch"],
        "step": last["step"] if place is None else max(place["step"], last["step"]),
        "epochs": [{**line} for line in epochs],
        "under_way": _under_way(checkpoint if state == "training" else None, epochs),
        "updates_per_second": _speed(checkpoint if state == "training" else None, epochs),
        "peak_bytes": None if not peak else peak.get("allocated") or peak.get("predicted"),
    }


def _under_way(checkpoint: CheckpointRecord | None, epochs: Sequence[EpochRecord]) -> list[float] | None:
    """Mean losses so far of the epoch that the latest checkpoint was written in."""
    if checkpoint is None:
        return None
    place = checkpoint["place"]
    over = bool(epochs) and epochs[-1]["epoch"] > place["epoch"]
    return [total / place["batch"] for total in place["sums"]] if place["batch"] and not over else None


def _speed(checkpoint: CheckpointRecord | None, epochs: Sequence[EpochRecord]) -> float | None:
    """Updates per second, validation included, over the latest epoch and what follows it; None before there is any."""
    marks = [(0, 0.0), *((line["step"], line["seconds"]) for line in epochs)]
    if checkpoint is not None:
        marks.append((checkpoint["place"]["step"], checkpoint["place"]["seconds"]))
    then = marks[max(len(marks) - 3, 0)]
    updates, seconds = marks[-1][0] - then[0], marks[-1][1] - then[1]
    return updates / seconds if updates > 0 and seconds > 0 else None


def _holder(run: Path) -> str | None:
    """What the lock says, where the process that wrote it is alive on this machine."""
    with suppress(DamagedData):
        said = (read_file(run / LOCK, 200) or b"").decode(errors="replace")
        process = re.match(r"process (\d{1,10}) ", said)
        if process is not None and os.path.exists(f"/proc/{process[1]}"):
            return said
    return None


def _age(run: Path) -> float | None:
    times = []
    for path in (*run.glob("stages/*/*"), *run.glob("probes/*")):
        with suppress(FileNotFoundError):  # replaced meanwhile
            times.append(path.lstat().st_mtime)
    return max(0.0, time.time() - max(times)) if times else None
