"""Small runs to attack, and what of them has to survive."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

SMALL = {
    "dataset.samples": 100,
    "dataset.side": 18,
    "dataset.crop": 16,
    "network.patch": 8,
    "network.patch_stride": 4,
    "network.stem_channels": 4,
    "network.groups.0.channels": 8,
    "network.groups.1.channels": 8,
    "network.groups.2.channels": 8,
    "network.cuts": "[1,2]",
    "objective.steps": 1,
    "objective.negatives": 4,
    "training.batch_size": 16,
    "training.epochs": 2,
    "training.micro_batch": "null",
    "training.checkpoint_every": 2,
    "probe.learning_rates": "[0.01]",
    "probe.epochs": 2,
}
"""The recipe `digits`, as two modules, trained in about two seconds; it has no code of a user's own."""

VARIANTS: dict[str, dict[str, Any]] = {
    "uint8": {},
    "float32": {"cache.dtype": "float32", "cache.codec": "none", "cache.views": 2},
    "rolling": {
        "cache.dtype": "float32",
        "cache.codec": "none",
        "cache.renew": "true",
        "cache.window_epochs": 1,
        "training.epochs": 4,
        "training.batch_size": 8,
    },
    "simultaneous": {"schedule": "simultaneous"},
}


def asked(run: str, **changed: Any) -> list[str]:
    """The arguments of `layerwise run` for a small run in the folder `run`."""
    settings = [part for name, value in {**SMALL, **changed}.items() for part in ("--set", f"{name}={value}")]
    return ["run", "--recipe", "digits", "--run-dir", run, *settings]


def bits(run: Path) -> dict[str, Any]:
    """All that a run found out: weights, losses and probes, without times."""
    found: dict[str, Any] = {}
    for path in sorted(run.glob("stages/*/module.safetensors")):
        found[path.relative_to(run).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(run.glob("stages/*/metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.relative_to(run).as_posix()] = [(x["epoch"], x["loss"], x["validation_loss"]) for x in lines]
    for path in sorted(run.glob("probes/*.json")):
        found[path.relative_to(run).as_posix()] = json.loads(path.read_text())["tasks"]
    return found


def tree(folder: Path) -> dict[str, Any]:
    """Every file, folder and link below a folder: kind, permissions, time of change and content."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        known = path.lstat()
        content: Any = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.relative_to(folder).as_posix()] = (oct(known.st_mode), known.st_mtime_ns, content)
    return found


def make_bystander(folder: Path) -> None:
    """A folder of the user's with names like ours, which no command has any business in."""
    for name in (
        "notes.txt",
        "probe-notes.txt",
        "probe-experiments/data.csv",
        "caches/1/record/commit.json",
        ".x.1.tmp",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mine: {name}")


ADVICE = re.compile(r"layerwise ((?:cache --module|stage) \d+(?: --repair| --fresh)?)\b")


def advised(output: str) -> list[list[str]]:
    """The commands, without the run's folder, that a message says to type, each once and in its order."""
    return [found.split() for found in dict.fromkeys(ADVICE.findall(" ".join(output.split())))]
