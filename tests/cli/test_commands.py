"""The command line as a person and as a script meet it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from layerwise.cli import main

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "tiny_recipe.py"


@pytest.fixture
def layerwise(tmp_path, monkeypatch):
    """Run a command in an empty directory; the result has exit_code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)

    return run


def start(folder, *arguments):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "cache")])
    program = "import torch; torch.set_num_threads(1); from layerwise.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_help_imports_nothing_heavy():
    program = (
        "import sys\nfrom layerwise.cli import main\n"
        "try: main(['run', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'zarr', 'pydantic', 'matplotlib', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "cache")])
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr.strip() == "[]"


@pytest.mark.parametrize("command", [[], *([name] for name in main.commands)])
def test_every_command_has_help(layerwise, command):
    result = layerwise(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_step_by_step(layerwise):
    assert layerwise("stage", 1, "--recipe", RECIPE).exit_code == 0
    assert layerwise("cache", "--module", 1).exit_code == 0
    assert layerwise("stage", 2).exit_code == 0
    result = layerwise("probe", "--module", 2, "--json")
    assert result.exit_code == 0
    assert "the run of" in result.stderr
    assert 0 <= json.loads(result.stdout)["tasks"]["class"]["trained"]["accuracy"] <= 1
    found = json.loads(layerwise("status", "--json").stdout)
    assert [module["stage"]["state"] for module in found["modules"]] == ["trained", "trained", "not trained"]
    assert [module["cache"]["state"] for module in found["modules"]] == ["valid", "absent", "absent"]


@pytest.mark.parametrize("schedule", ["iterative", "simultaneous"])
def test_run_to_its_end_and_again(layerwise, schedule):
    first = layerwise("run", "--recipe", RECIPE, "--schedule", schedule)
    assert first.exit_code == 0
    again = layerwise("run", "--recipe", RECIPE, "--schedule", schedule, "--json")
    assert "already trained and frozen" in again.stderr
    results = json.loads(again.stdout)
    assert [stage["module"] for stage in results["stages"]] == [1, 2, 3]
    assert len(results["probes"]) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "--recipe", "digit"], 2, "there is no recipe 'digit': did you mean digits?"),
        (["run", "--recipe", "digits", "--set", "objective.negative=3"], 2, "did you mean objective.negatives?"),
        (
            ["run", "--recipe", "digits", "--set", "objective.negatives=0"],
            2,
            "objective.negatives = 0: should be greater",
        ),
        (["stage", "4", "--recipe", str(RECIPE)], 2, "there is no module 4: the recipe 'tiny' has modules 1 to 3"),
        (["stage", "2", "--recipe", str(RECIPE)], 1, "module 1 is not trained yet. Run: layerwise stage 1"),
        (["cache", "--module", "1", "--recipe", str(RECIPE)], 1, "module 1 is not trained yet"),
        (["status"], 1, "there is no last used run in"),
        (
            ["run", "--recipe", "digits", "--method", "supervised", "--schedule", "simultaneous"],
            2,
            "the method supervised sets schedule to 'iterative'",
        ),
        (
            ["stage", "1", "--recipe", str(RECIPE), "--set", "training.batch_size=500"],
            2,
            "there are only 101 training samples",
        ),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(layerwise, arguments, code, message):
    result = layerwise(*arguments)
    assert (result.exit_code, result.stderr.count("Traceback")) == (code, 0)
    assert message in result.stderr
    as_json = layerwise(*arguments, "--json")
    assert as_json.exit_code == code
    assert message in json.loads(as_json.stdout)["message"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--recipe", "digits", "--bogus"], "No such option"),
        (["run", "--device", "tpu"], "'tpu' is not one of"),
        (["stage"], "Missing argument 'NUMBER'"),
        (["stage", "0"], "0 is not in the range"),
        (["cache"], "give --module N"),
        (["trian"], "there is no command 'trian'"),
        (["memreport", "--depth", "x"], "not a list of numbers"),
    ],
)
def test_wrong_use_is_an_error_as_any_other_for_machines(layerwise, arguments, message):
    told = layerwise(*arguments, "--json")
    assert told.exit_code == 2
    error = json.loads(told.stdout)
    assert (error["error"], error["exit_code"]) == ("UsageError", 2)
    assert message in error["message"]
    people = layerwise(*arguments)
    assert people.exit_code == 2
    assert people.stderr.startswith("Usage: ")
    assert message in people.stderr


def test_help_is_help_for_machines_too(layerwise):
    told = layerwise("run", "--json", "--help")
    assert (told.exit_code, told.stdout.startswith("Usage: ")) == (0, True)


def test_a_second_process_on_one_run_is_refused_and_told_who_holds_it(layerwise, tmp_path):
    long = start(
        tmp_path, "stage", 1, "--recipe", RECIPE, "--set", "training.epochs=100000", "--set", "training.patience=100000"
    )
    try:
        wait_for(tmp_path / "runs" / "tiny" / "stages" / "1" / "metrics.jsonl", long)
        second = layerwise("stage", 1, "--recipe", RECIPE)
        assert second.exit_code == 73
        assert f"in use by process {long.pid} (stage 1)" in second.stderr
    finally:
        long.kill()
        long.wait()
    assert layerwise("status").exit_code == 0  # the lock died with its process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_75(layerwise, tmp_path, number):
    settings = ["--set", "training.epochs=100000", "--set", "training.patience=100000"]
    stopped = start(tmp_path, "stage", 1, "--recipe", RECIPE, *settings)
    try:
        wait_for(tmp_path / "runs" / "tiny" / "stages" / "1" / "metrics.jsonl", stopped)
        stopped.send_signal(number)
        _, stderr = stopped.communicate(timeout=300)
    finally:
        stopped.kill()
    assert stopped.returncode == 75, stderr
    assert "everything is saved" in stderr
    reached = json.loads((tmp_path / "runs/tiny/stages/1/checkpoint.json").read_text())["place"]["epoch"]
    resumed = layerwise("stage", 1, "--recipe", RECIPE, *settings, "--set", f"training.epochs={reached + 2}")
    assert resumed.exit_code == 0
    record = json.loads((tmp_path / "runs/tiny/stages/1/stage.json").read_text())
    assert record["epochs"] == reached + 2


def wait_for(path, process):
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_refused_command_leaves_the_run_as_it_was(layerwise):
    assert layerwise("stage", 1, "--recipe", RECIPE).exit_code == 0
    refused = layerwise("stage", 1, "--set", "optimiser.learning_rate=0.5")
    assert refused.exit_code == 1
    assert layerwise("stage", 1).exit_code == 0


def test_looking_changes_nothing(layerwise, tmp_path):
    assert layerwise("stage", 1, "--recipe", RECIPE).exit_code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert layerwise("status", "--set", "dataset.samples=150").exit_code == 0
    assert {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()} == before


def test_another_method_leaves_behind_what_it_replaces_and_says_so(layerwise):
    chosen = ("--set", "objective.negatives=3", "--set", "training.epochs=1")
    assert layerwise("stage", 1, "--recipe", RECIPE, *chosen).exit_code == 0
    other = layerwise("stage", 1, "--method", "greedy-supervised")
    assert other.exit_code == 0
    assert "left behind, since greedy-supervised replaces it: objective.negatives=3" in other.stderr
    noted = json.loads(Path("runs/tiny-greedy-supervised/run.json").read_text())
    assert noted["set"] == ["training.epochs=1", "method=greedy-supervised"]


@pytest.mark.parametrize(
    ("setting", "schedule", "way_out"),
    [
        ("training.update_every=[1,2]", "iterative", "simultaneous"),
        ("together=2", "iterative", "simultaneous"),
        ("training.noise=0.1", "simultaneous", "iterative"),
    ],
)
def test_a_field_that_the_schedule_would_ignore_is_refused(layerwise, tmp_path, setting, schedule, way_out):
    refused = layerwise("run", "--recipe", RECIPE, "--schedule", schedule, "--set", setting)
    assert refused.exit_code == 2
    assert setting.partition("=")[0] in refused.stderr
    assert f"--schedule {way_out}" in refused.stderr
    assert not list(tmp_path.rglob("run.json"))
