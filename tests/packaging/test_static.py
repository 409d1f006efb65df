"""Lint, types and the direction of imports: the parts of the check that run no code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy", "lint-imports"])
def test_static(command: str) -> None:
    program, *arguments = command.split()
    if program == "mypy" and [int(part) for part in np.__version__.split(".")[:2]] < [2, 4]:
        pytest.skip("types are checked against those that numpy declares since 2.4")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "cache")])
    result = subprocess.run(
        [PROGRAMS / program, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "MYPYPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
