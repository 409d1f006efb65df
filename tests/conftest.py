"""Shared by all tests: a recipe that trains in seconds, and runs in temporary directories."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.data.digits import Digits
from layerwise.nets.resnet import Group, PatchResNet
from layerwise.objectives.infonce import PatchInfoNCE
from layerwise.pipeline.run import open_run
from layerwise.pipeline.setup import Setup
from layerwise.recipe import CacheSettings, Optimiser, Probe, Recipe, Training

TINY = Recipe(
    name="tiny",
    dataset=Digits(samples=160, side=18, crop=16),
    network=PatchResNet(
        patch=8,
        patch_stride=4,
        stem_channels=4,
        groups=(
            Group(channels=8, blocks=1),
            Group(channels=16, blocks=1, stride=2),
            Group(channels=16, blocks=1, stride=2),
        ),
    ),
    objective=PatchInfoNCE(steps=1, negatives=4),
    optimiser=Optimiser(learning_rate=1e-2),
    training=Training(batch_size=16, epochs=2, checkpoint_every=3),
    probe=Probe(learning_rates=(1e-2,), epochs=5),
    cache=CacheSettings(dtype="float32"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate-golden", action="store_true", help="write the files of tests/golden anew instead of comparing"
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tests run side by side; and sums in one thread are the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages in one line, whatever the terminal that the tests run in."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def _own_user_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another, or the user, left there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user-cache")))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("user-state")))


@pytest.fixture
def make_setup(tmp_path: Path) -> Callable[..., Setup]:
    """`make_setup(recipe, name)`: a setup on the CPU whose run lies in the test's own directory."""

    def make(recipe: Recipe = TINY, name: str = "run") -> Setup:
        return Setup(open_run(tmp_path / name, recipe), torch.device("cpu"))

    return make


_tallies: dict[str, Counter[str]] = defaultdict(Counter)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Adds up the tallies of attacks (tests/faults/conftest.py) over their parts, which may run side by side."""
    if report.when == "teardown":
        for name, counts in (value for kind, value in report.user_properties if kind == "attack"):
            _tallies[name].update(counts)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name, counts in sorted(_tallies.items()):
        terminalreporter.write_line(f"{name}: {', '.join(f'{count} {what}' for what, count in sorted(counts.items()))}")
