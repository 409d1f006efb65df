"""The GPU benchmark, shrunk, on the CPU: every part ends with figures, and a part that breaks ends alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import rows
from benchmarks.gpu.__main__ import LIMITS
from benchmarks.gpu.part import Bench, Figures, Skipped

HOUSE = Path(__file__).parents[2]
NOT_ON_A_CPU = {"pytest"}


@pytest.mark.long
def test_every_part_ends_with_figures(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--minutes", "3", "--out", str(tmp_path)]
    paths = os.pathsep.join([str(HOUSE), str(HOUSE / "cache")])
    done = subprocess.run(
        command, cwd=HOUSE, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert list(results["parts"]) == list(LIMITS)
    assert set(LIMITS) == set(rows.HOMES)
    for name, part in results["parts"].items():
        assert part["problem"] is None, name
        assert [row for row in part["rows"] if "problem" in row] == []
        figures = [row for row in part["rows"] if "skipped" not in row]
        assert name in NOT_ON_A_CPU or figures, name
        assert all(any(isinstance(value, float) for key, value in row.items() if key != "took") for row in figures), (
            name
        )
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"## {name}" in text for name in LIMITS)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "table2.png",
        "alternatives.png",
        "depth.png",
        "feeds.png",
    }
    errors = {row["name"]: row for row in results["parts"]["correctness"]["rows"]}
    assert errors["module 2, fp32, against float64"]["gradient_error"] < 1e-5
    assert errors["all modules, resumed against straight"]["resumed"] == 0


def test_the_command_runs_parts_and_writes_pages(tmp_path: Path) -> None:
    """The short form: one part of nine."""
    parts = ("table2",)
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--minutes", "3", "--out", str(tmp_path)]
    paths = os.pathsep.join([str(HOUSE), str(HOUSE / "cache")])
    done = subprocess.run(
        [*command, *(f"--only={part}" for part in parts)],
        cwd=HOUSE, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert list(results["parts"]) == list(parts)
    assert all(part["rows"] and not any("problem" in row for row in part["rows"]) for part in results["parts"].values())
    assert (tmp_path / "table2.png").exists()


def test_a_row_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Figures:
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    def skip() -> Figures:
        raise Skipped("not installed")

    def part(bench: Bench) -> Any:
        yield "first", fail
        yield "second", skip
        yield "third", lambda: {"seconds": 1.0}

    monkeypatch.setattr("benchmarks.gpu.memory.table2", part)
    found: list[Figures] = []
    rows.run_part("table2", Bench(torch.device("cpu"), tmp_path), found.append)
    assert found[0]["problem"] == "RuntimeError: CUDA error: an illegal memory access and more"
    assert found[1]["skipped"] == "not installed"
    assert found[2]["seconds"] == 1.0
