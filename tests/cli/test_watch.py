"""`layerwise watch`: how a run stands, read while another process trains it."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from layerwise.cli import main
from layerwise.files.metrics import read_metrics
from layerwise.render.watch import chart, sparkline
from tests.cli.test_stopping import interrupt

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "tests" / "tiny_recipe.py")
FIRST = ("stage", "1", "--recipe", RECIPE, "--set", "training.checkpoint_every=1")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


@pytest.fixture(autouse=True)
def _empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def look() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call("watch", "--run-dir", "runs/tiny", "--json").stdout)
    return found


def test_a_run_from_its_first_update_to_its_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "training.stage", "train_step", signal.SIGINT, at=8)
        assert call(*FIRST).exit_code == 75
    (first,) = look()["trainings"]
    curve = read_metrics(Path("runs/tiny/stages/1/metrics.jsonl"), 1).epochs
    assert (first["modules"], first["state"], first["epoch"], first["step"]) == ([1], "training", 1, 8)
    assert first["epochs"] == curve
    assert first["updates_per_second"] > 0
    sums = json.loads(Path("runs/tiny/stages/1/checkpoint.json").read_text())["place"]["sums"]
    assert first["under_way"] == [sums[0] / 2]
    shown = call("watch", "--once").stdout
    assert re.search(rf"1 +training +1 +8 +{sums[0] / 2:.4f} +{curve[0]['validation_loss'][0]:.4f}", shown)
    assert "module 1, loss over updates" in shown

    assert call("run").exit_code == 0
    found = look()
    assert [(one["modules"], one["state"], one["epoch"]) for one in found["trainings"]] == [
        ([1], "trained", 2), ([2], "trained", 2), ([3], "trained", 2),
    ]  # fmt: skip
    assert [probe["module"] for probe in found["probes"]] == [1, 2, 3]
    assert found["holder"] is None
    assert found["age"] >= 0
    shown = call("watch", "--once").stdout
    accuracy = found["probes"][2]["tasks"]["class"]["trained"]["accuracy"]
    assert re.search(rf"3 +class +{100 * accuracy:.1f}", shown)
    assert "no process of this machine works on it" in shown


def test_modules_that_are_trained_together() -> None:
    assert call("stage", "1", "--recipe", RECIPE, "--set", "schedule=simultaneous").exit_code == 0
    (training,) = json.loads(call("watch", "--json").stdout)["trainings"]
    assert (training["modules"], training["state"]) == ([1, 2, 3], "trained")
    assert call("watch", "--once").stdout.count("validation loss over updates") == 3


def test_damage_and_strangers_do_not_end_it() -> None:
    assert call("watch", "--run-dir", "nothing").exit_code == 1
    assert "there is no last used run" in call("watch").stderr
    assert call(*FIRST).exit_code == 0
    for path in Path("runs/tiny/stages/1").iterdir():
        path.write_bytes(path.read_bytes()[:-9] + b"?" * 9)
    found = look()
    assert found["trainings"][0]["epochs"][0]["epoch"] == 1  # the last line is damaged
    Path("runs/tiny/stages/1/metrics.jsonl").unlink()
    os.mkfifo("runs/tiny/stages/1/metrics.jsonl")
    assert look()["trainings"][0]["epochs"] == []


TRAINING = f"""
import sys, time
import layerwise.training.stage as stage
from layerwise.cli import main
step = stage.train_step
def slow(*arguments):
    time.sleep(0.1)
    return step(*arguments)
stage.train_step = slow
main({[*FIRST]!r})
"""


def test_on_a_terminal_it_follows_a_process_that_trains() -> None:
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cache'}", "TERM": "xterm", "COLUMNS": "100",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    training = subprocess.Popen([sys.executable, "-c", TRAINING], env=environment, stdout=subprocess.DEVNULL)
    try:
        while not Path("runs/tiny/stages/1/metrics.jsonl").exists():
            assert training.poll() is None
            time.sleep(0.05)
        assert f"process {training.pid} (stage 1)" in look()["holder"]
        ours, theirs = pty.openpty()
        watch = [sys.executable, "-c", "from layerwise.cli import main; main()", "watch", "--every", "0.1"]
        watching = subprocess.Popen(
            [*watch, "--run-dir", "runs/tiny"],
            env=environment,
            stdout=theirs,
            stderr=theirs,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # ignored where tests run in the background
        )
        os.close(theirs)
        shown = ""
        while not re.search(r"1 +trained", shown):
            shown += os.read(ours, 1 << 16).decode(errors="replace")
        assert re.search(r"1 +training", shown)
        watching.send_signal(signal.SIGINT)
        with suppress(OSError):  # until the other end is closed
            while os.read(ours, 1 << 16):
                pass
        assert watching.wait(timeout=60) == 0
        os.close(ours)
    finally:
        assert training.wait() == 0


def test_a_chart_and_a_sparkline() -> None:
    assert sparkline([1.0, 2.0, 3.0]) == "▁▅█"
    assert sparkline([2.0]) == "▁"
    assert sparkline([]) == ""
    assert len(sparkline(list(range(1000)))) == 8
    lines = chart([(10, 5.0), (20, 1.0), (30, 3.0)], width=10, height=3)
    assert lines[0].startswith("5 ┤")
    assert lines[2].startswith("1 ┤")
    assert lines[-1].split() == ["10", "30"]
    assert lines[0][3] != "⠀"  # the first point is the highest
    assert lines[2][3 + 5] != "⠀"  # the one in the middle the lowest
