"""`layerwise grow`: another module on top of a finished run, and nothing below it touched (paper, section 3)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from layerwise.cli import main

RECIPE = Path(__file__).parents[1] / "tiny_recipe.py"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--json"], catch_exceptions=False)


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        training = ("--recipe", RECIPE, "--run-dir", "run", "--set", "training.epochs=1", "--set", "feed=recompute")
        assert call("stage", number, *training).exit_code == 0
    return tmp_path / "run"


def test_only_the_new_module_is_trained_and_it_stays(finished: Path) -> None:
    below = sorted(finished.glob("stages/*/module.safetensors"))
    before = {path: path.read_bytes() for path in below}
    assert len(before) == 3

    result = json.loads(call("grow", "--channels", 32).stdout)
    assert result["module"] == 4
    assert result["trained"]["epochs"] == 1
    assert [probe["module"] for probe in result["probes"]] == [3, 4]
    assert {path: path.read_bytes() for path in below} == before

    states = json.loads(call("status").stdout)["modules"]
    assert [module["stage"]["state"] for module in states] == ["trained"] * 4
    assert json.loads(call("grow", "--channels", 16).stdout)["module"] == 5


@pytest.mark.long
def test_on_modules_that_were_trained_together_one_is_trained_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ("--set", "training.epochs=1", "--set", "training.update_every=[1,2,2]")
    assert call("run", "--recipe", RECIPE, "--run-dir", "run", "--schedule", "simultaneous", *settings).exit_code == 0
    below = sorted((tmp_path / "run").glob("stages/*/module.safetensors"))
    before = {path: path.read_bytes() for path in below}
    assert len(before) == 3

    for number, channels in ((4, 32), (5, 64)):
        result = json.loads(call("grow", "--channels", channels).stdout)
        assert result["module"] == number
        assert result["trained"]["trained_with"] == [number]
        assert result["trained"]["steps"] == 101 // 16
    assert {path: path.read_bytes() for path in below} == before

    found = json.loads(call("status").stdout)["modules"]
    assert [module["stage"]["state"] for module in found] == ["trained"] * 5
    assert [module["cache"]["state"] for module in found] == ["absent", "absent", "valid", "valid", "absent"]
    again = json.loads(call("run").stdout)  # all of it is there
    assert [stage["trained_with"] for stage in again["stages"]] == [[1, 2, 3]] * 3 + [[4], [5]]
    planned = json.loads(call("plan").stdout)
    assert [stage["modules"] for stage in planned["stages"]] == [[1, 2, 3], [4], [5]]
    iterative = json.loads((tmp_path / "run" / "stages" / "4" / "stage.json").read_text())["made_from"]
    assert iterative["schedule"] == "iterative"
    assert len(iterative["inputs"]["weights"]) == 3


def test_a_module_that_would_change_the_one_below_is_refused(finished: Path) -> None:
    refused = call("grow", "--channels", 16)
    assert refused.exit_code == 2
    assert "--stride" in json.loads(refused.stdout)["message"]


def test_channels_are_compared_as_the_width_makes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        narrow = ("--set", "network.width=0.5", "--set", "training.epochs=1", "--set", "feed=recompute")
        assert call("stage", number, "--recipe", RECIPE, "--run-dir", "run", *narrow).exit_code == 0
    refused = call("grow", "--channels", 20)  # 10 is taken for 8, which the last module has
    assert refused.exit_code == 2
    assert "network.width = 0.5" in json.loads(refused.stdout)["message"]
    assert call("grow", "--channels", 24).exit_code == 0


def test_an_unfinished_run_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("stage", 1, "--recipe", RECIPE, "--set", "training.epochs=1").exit_code == 0
    refused = call("grow")
    assert refused.exit_code == 1
    assert "layerwise stage 2" in json.loads(refused.stdout)["message"]


def test_a_run_that_was_scaled_down_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("stage", 1, "--recipe", RECIPE, "--set", "scale=0.5", "--set", "training.epochs=1").exit_code == 0
    refused = call("grow")
    assert refused.exit_code == 2
    assert "scaled down (scale = 0.5)" in json.loads(refused.stdout)["message"]
