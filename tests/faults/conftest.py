"""For attacks: processes to run commands in, and a tally that ends up in the summary of the tests."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.commands import Commands
from tests.faults.runs import VARIANTS, asked


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with Commands(tmp_path_factory.mktemp("commands") / "of") as found:
        yield found


@pytest.fixture(scope="session")
def finished(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`finished(variant)`: a run that nobody disturbed, to be copied or put back as it was."""
    folder = tmp_path_factory.mktemp("finished")

    def make(variant: str) -> Path:
        if not (folder / variant).exists():
            outcome = commands.call(*asked(variant, **VARIANTS[variant]), cwd=folder)
            assert outcome.code == 0, outcome
        return folder / variant

    return make


@pytest.fixture
def tally(request: pytest.FixtureRequest, record_property: Callable[[str, Any], None]) -> Iterator[Counter[str]]:
    """Counts by outcome; those of all parts of an attack are added up and printed behind the tests."""
    found: Counter[str] = Counter()
    yield found
    record_property("attack", [request.node.originalname, dict(found)])


def scaled(count: int) -> int:
    """So many of an attack's parts, times ATTACKS from the environment, as in ATTACKS=0.1 or ATTACKS=10."""
    return max(1, round(count * float(os.environ.get("ATTACKS", "1"))))
