"""A small finished run, made once, to damage copies of."""

from __future__ import annotations

import atexit
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from click.testing import CliRunner, Result

from layerwise.cli import main

SETTINGS = {
    "dataset.samples": 100,
    "dataset.side": 18,
    "dataset.crop": 16,
    "network.patch": 8,
    "network.patch_stride": 4,
    "network.stem_channels": 4,
    "network.groups.0.channels": 8,
    "network.groups.1.channels": 8,
    "network.groups.2.channels": 8,
    "objective.steps": 1,
    "objective.negatives": 4,
    "training.batch_size": 16,
    "training.epochs": 2,
    "training.micro_batch": "null",
    "training.checkpoint_every": 2,
    "probe.learning_rates": "[0.01]",
    "probe.epochs": 2,
}
"""Of the recipe `digits`."""


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


@cache
def _made() -> Path:
    folder = Path(mkdtemp(prefix="layerwise-small-run-")) / "run"
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    settings = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    made = call("run", "--recipe", "digits", "--run-dir", str(folder), *settings)
    assert made.exit_code == 0, made.output
    return folder


def copy_of_a_run(target: Path) -> Path:
    """A finished run of three modules with their caches, probes and report."""
    shutil.copytree(_made(), target)
    return target


def files(run: Path) -> list[str]:
    """All but locks, whose content is for people and is forgotten."""
    found = (path for path in run.rglob("*") if path.is_file() and "lock" not in path.name)
    return sorted(path.relative_to(run).as_posix() for path in found)
