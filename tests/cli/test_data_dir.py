"""Missing data are found first, and a command that fails before it did anything leaves no trace."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from layerwise.cli import main
from layerwise.errors import RunLocked, WillNotFit
from layerwise.files.run_files import lock
from layerwise.pipeline.run import Run

RECIPE = str(Path(__file__).parents[1] / "tiny_recipe.py")
TRAINED = ("--recipe", RECIPE, "--set", "training.epochs=1")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


@pytest.fixture(autouse=True)
def _empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def files(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("recipe", ["images", "speech", "stl10", "librispeech"])
@pytest.mark.parametrize("command", [["run"], ["run", "--fresh"], ["stage", "1"], ["reproduce", "table1"]])
def test_a_recipe_that_reads_files_asks_for_them_first(recipe: str, command: list[str], tmp_path: Path) -> None:
    refused = call(*command, "--recipe", recipe)
    assert refused.exit_code == 2
    assert "--data-dir" in refused.stderr
    assert "fits" not in refused.stdout
    assert list(tmp_path.iterdir()) == []
    assert json.loads(call(*command, "--recipe", recipe, "--json").stdout)["exit_code"] == 2


def test_missing_files_are_found_before_anything_is_predicted(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    refused = call("run", "--recipe", "images", "--data-dir", "data")
    assert refused.exit_code == 1
    assert "there are no pictures in 'data'" in refused.stderr
    assert refused.stdout == ""
    assert list(tmp_path.iterdir()) == [tmp_path / "data"]


@pytest.mark.parametrize("command", ["run", "plan", "stage 1", "cache --module 1", "probe", "reproduce table1"])
def test_a_folder_that_is_not_there_is_wrong_use(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, reason in (("nowhere", "does not exist"), ("file", "is not a folder")):
        refused = call(*command.split(), "--recipe", "stl10", "--data-dir", place)
        assert refused.exit_code == 2
        assert f"--data-dir '{place}' {reason}" in refused.stderr


@pytest.mark.parametrize(
    ("recipe", "given", "reason"),
    [
        ("digits", ["--data-dir", "."], "--data-dir would have no effect: the dataset of the recipe 'digits' reads no"),
        ("digits", ["--data-dir", "/nope"], "--data-dir would have no effect"),
        ("digits", ["--set", "scale=0.5", "--data-dir", "."], "--data-dir would have no effect"),
        ("digits", ["--method", "supervised", "--data-dir", "."], "--data-dir would have no effect"),
        ("digits", ["--download"], "--download would have no effect"),
        ("images", ["--download", "--data-dir", "."], "the dataset of the recipe 'images' cannot be downloaded"),
        ("voices", ["--download"], "--download would have no effect"),
    ],
)
def test_an_option_without_effect_is_refused(recipe: str, given: list[str], reason: str, tmp_path: Path) -> None:
    refused = call("run", "--recipe", recipe, *given)
    assert refused.exit_code == 2
    assert reason in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "refused",
    [
        ("run", "--recipe", "images"),
        ("stage", "2", "--recipe", RECIPE, "--run-dir", "deep/down/other"),
        ("cache", "--module", "1", "--recipe", RECIPE, "--run-dir", "other"),
        ("run", "--recipe", RECIPE, "--run-dir", "other", "--cache-budget", "1kB"),
        ("stage", "1", "--recipe", RECIPE, "--run-dir", "other", "--set", "training.batch_size=500"),
        ("stage", "1", "--set", "optimiser.learning_rate=0.5"),
    ],
)
def test_a_refused_command_leaves_no_trace(refused: tuple[str, ...], tmp_path: Path) -> None:
    assert call("stage", "1", *TRAINED).exit_code == 0
    before = files(tmp_path)
    assert call(*refused).exit_code in (1, 2, 3)
    assert files(tmp_path) == before
    assert "runs/tiny" in call("status").stderr, "the run that was used last"


def test_a_folder_of_the_user_is_left_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine" / "stages").mkdir(parents=True)
    (tmp_path / "mine" / "note.txt").write_text("keep")
    before = files(tmp_path)
    assert call("stage", "2", "--recipe", RECIPE, "--run-dir", "mine").exit_code == 1
    assert files(tmp_path) == before


def test_a_command_that_fails_on_its_way_keeps_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise WillNotFit("the disk is full")

    monkeypatch.setattr("layerwise.pipeline.schedule.write_cache", full)
    assert call("run", *TRAINED).exit_code == 3
    assert (tmp_path / "runs/tiny/stages/1/stage.json").exists()
    assert "runs/tiny" in call("status").stderr, "the run that was used last"


def test_fresh_keeps_the_note_of_a_dataset_where_the_new_one_is_missing(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(8):
        Image.effect_noise((80, 80), 60).convert("RGB").save(_folder(tmp_path / "data") / f"{number}.png")
    small = [f"--set={field}" for field in ("training.epochs=1", "training.batch_size=4", "network.width=0.1")]
    assert call("stage", "1", "--recipe", "images", "--data-dir", "data", *small).exit_code == 0
    (tmp_path / "data").rename(tmp_path / "away")
    before = files(tmp_path / "runs")
    for command in (["run", "--fresh"], ["stage", "1", "--fresh"]):
        assert call(*command).exit_code == 1
        assert files(tmp_path / "runs") == before


def _folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


def test_a_lock_that_was_removed_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another command opened the lock before the one that held it removed it and the folder."""

    def open_and_lose(path: Path, flags: int) -> int:
        descriptor = os.open(path, flags)
        path.unlink()
        return descriptor

    monkeypatch.setattr("layerwise.files.run_files.open_regular", open_and_lose)
    with pytest.raises(RunLocked), lock(tmp_path, "run"):
        pytest.fail("held")


def test_a_run_that_another_command_made_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = Run.locked

    @contextmanager
    def after_another(run: Run, purpose: str) -> Iterator[None]:
        monkeypatch.setattr(Run, "locked", locked)
        assert call("stage", "1", *TRAINED).exit_code == 0
        with locked(run, purpose):
            yield

    monkeypatch.setattr(Run, "locked", after_another)
    assert call("stage", "3", *TRAINED).exit_code == 1
    assert call("stage", "1").exit_code == 0
