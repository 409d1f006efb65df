"""Lint, types and the direction of imports: the parts of the check that run no code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["mypy"],
        ["importlinter.cli", "lint"],
    ],
    ids=["ruff", "mypy", "import-linter"],
)
def test_static(command: list[str]) -> None:
    name, *arguments = command
    program = (
        [sys.executable, "-m", name]
        if name != "importlinter.cli"
        else [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    )
    result = subprocess.run(
        [*program, *(arguments if name != "importlinter.cli" else [])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
