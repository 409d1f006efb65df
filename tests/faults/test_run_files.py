"""A run in a folder of the user: nothing of the user's is deleted, emptied, appended to or written over, no link is
followed, and what lies in the place of a file of ours ends a command in an error that names it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from layerwise.cli import main
from layerwise.errors import DamagedData, UsageError
from layerwise.files.metrics import append_metrics
from layerwise.files.storage import read_file, write_file, write_json
from layerwise.files.tensors import load_tensors, save_tensors
from layerwise.pipeline.rolling import settle_rolling
from layerwise.pipeline.run import open_run
from layerwise.pipeline.setup import Setup
from layerwise.recipe.learner import make_learner
from layerwise.training.checkpoint import drop_checkpoint, load_checkpoint, save_checkpoint
from tests.conftest import TINY

RECIPE = str(Path(__file__).parents[1] / "tiny_recipe.py")
LINE = {"epoch": 1, "step": 6, "loss": [1.0], "validation_loss": [1.0], "seconds": 0.5}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail where the block hangs, as at a pipe that nobody writes to."""
    watch = threading.Timer(seconds, os._exit, (70,))
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def held(folder: Path) -> None:
    """What every command that writes does first and last."""
    run = open_run(folder, TINY)
    with run.locked("test"), run.following(RECIPE, [], None, TINY):
        pass


def test_files_of_the_user_stay(tmp_path: Path) -> None:
    for path in (
        "probe-experiments/a.txt",
        "probe-notes.txt",
        ".notes.tmp",
        ".run.json.123.tmp",
        "lock.txt",
        "x/stages",
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("mine")
    (tmp_path / "probe-link").symlink_to(tmp_path / "probe-experiments")
    before = everything(tmp_path)
    held(tmp_path)
    held(tmp_path)
    after = everything(tmp_path)
    assert {path: after.get(path, "gone") for path in before} == before
    assert after.keys() - before.keys() == {"lock", "run.json", "recipe.json"}


@pytest.mark.parametrize(
    "name", ["run.json", "recipe.json", "dataset.json", "lock", "stages/a", "caches/1/a", "probes/1.json", "report/a"]
)
def test_a_file_of_the_user_that_has_a_name_of_ours_is_named_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('{"mine": 1}')
    before = everything(tmp_path)
    for arguments in (("--run-dir", "."), ("--run-dir", ".", "--json")):
        refused = call("stage", "1", "--recipe", RECIPE, *arguments)
        assert refused.exit_code == 2
        assert name.partition("/")[0] in refused.output
        assert "elete" not in refused.output
    after = everything(tmp_path)
    assert {path: after.get(path, "gone") for path in before} == before


def test_only_tensors_of_checkpoints_are_removed(tmp_path: Path, make_setup: Callable[..., Setup]) -> None:
    folder = tmp_path / "stage"
    folder.mkdir()
    for name in ("checkpoint-best.safetensors", "checkpoint-1-1.safetensors.bak", "checkpoint-3-0.safetensors"):
        (folder / name).write_text("mine")
    learner = make_learner(TINY, 1, make_setup().untrained()[0], (1, 16, 16), {}, torch.device("cpu"))
    place = {"epoch": 0, "batch": 1, "step": 1, "sums": [1.0], "best_loss": None, "best_epoch": 0, "seconds": 1.0}
    save_checkpoint(folder, [learner], {}, place)
    assert not (folder / "checkpoint-3-0.safetensors").exists()  # a name of ours, which no record names
    drop_checkpoint(folder)
    assert sorted(os.listdir(folder)) == ["checkpoint-1-1.safetensors.bak", "checkpoint-best.safetensors"]


def test_notes_in_a_window_stay(make_setup: Callable[..., Setup]) -> None:
    setup = make_setup()
    notes = setup.run.window(1) / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    settle_rolling(setup, 1, None)
    assert notes.read_text() == "mine"


def test_temporary_files_of_a_killed_command_are_removed(tmp_path: Path) -> None:
    held(tmp_path)
    left = [tmp_path / ".run.json.0123abcd.tmp", tmp_path / "stages/1/.stage.json.0123abcd.tmp"]
    left += [tmp_path / "stages/1/.checkpoint-3-1.safetensors.0123abcd.tmp", tmp_path / "probes/.1.json.0123abcd.tmp"]
    others = [tmp_path / ".thesis.tex.0123abcd.tmp", tmp_path / "stages/x/.stage.json.0123abcd.tmp"]
    for path in (*left, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    held(tmp_path)
    assert [path.exists() for path in left] == [False] * len(left)
    assert all(path.exists() for path in others)


def test_a_link_in_the_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_text("mine")
    held(run)
    for name in ("lock", "run.json", "stages/1/metrics.jsonl"):
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(victim)
    with pytest.raises(DamagedData, match=r"run\.json is damaged.*is a link"):
        open_run(run, TINY).data_dir  # noqa: B018
    with pytest.raises(DamagedData, match=r"lock is damaged.*is a link"):
        held_without_records(run)
    with pytest.raises(DamagedData, match=r"metrics\.jsonl is damaged.*is a link"):
        append_metrics(run / "stages/1/metrics.jsonl", LINE)
    assert victim.read_text() == "mine"


def held_without_records(folder: Path) -> None:
    with open_run(folder, TINY).locked("test"):
        pass


@pytest.mark.parametrize("name", ["stages", "stages/1", "caches", "caches/1", "probes", "report"])
@pytest.mark.parametrize("kind", ["link", "loop", "file"])
def test_something_else_in_the_place_of_a_folder_is_named(tmp_path: Path, name: str, kind: str) -> None:
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    held(run)
    path = run / name
    path.parent.mkdir(exist_ok=True)
    if kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to(elsewhere if kind == "link" else path)
    with pytest.raises(DamagedData, match=f"{path} is"):
        held(run)
    assert not list(elsewhere.iterdir())


def test_a_pipe_a_folder_or_a_loop_in_the_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    pipe, folder, loop = tmp_path / "pipe", tmp_path / "folder", tmp_path / "loop"
    os.mkfifo(pipe)
    folder.mkdir()
    loop.symlink_to(loop)
    for path in (pipe, folder, loop, folder / ("x" * 300)):
        with within(20), pytest.raises(DamagedData, match=str(path)[:60]):
            read_file(path)
        with within(20), pytest.raises(DamagedData, match=str(path)[:60]):
            append_metrics(path, LINE)
    for path in (folder, pipe / "inside"):
        with pytest.raises(DamagedData, match=str(path)):
            write_file(path, b"content")
    assert sorted(os.listdir(tmp_path)) == ["folder", "loop", "pipe"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_in_the_place_of_the_lock(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "lock")
    with within(20), pytest.raises(DamagedData, match="lock is damaged"):
        held(tmp_path)


def test_a_lock_that_is_not_ours_is_kept(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("process 12 (run) and more of mine")
    with pytest.raises(UsageError, match=f"mv {tmp_path}/lock {tmp_path}/lock.mine"):
        held(tmp_path)
    assert (tmp_path / "lock").read_text() == "process 12 (run) and more of mine"
    (tmp_path / "lock").write_text("process 12 (cache --prune)")  # which was killed
    held(tmp_path)


def test_tensors_of_another_network_are_named(tmp_path: Path) -> None:
    path, right = tmp_path / "module.safetensors", {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    for wrong, message in (
        ({"a": torch.zeros(2, 3)}, "b is missing"),
        ({**right, "c": torch.zeros(1)}, "'c' belongs to nothing"),
        ({**right, "a": torch.zeros(3, 2)}, r"a is float32 \(3, 2\), not float32 \(2, 3\)"),
        ({**right, "a": torch.zeros(2, 3).double()}, r"a is float64 \(2, 3\)"),
        ({**right, "a": torch.zeros(200, 300)}, "240,"),
    ):
        sha256 = save_tensors(path, wrong)
        with pytest.raises(DamagedData, match=message):
            load_tensors(path, sha256, right)
    assert load_tensors(path, save_tensors(path, right), right).keys() == right.keys()


def test_a_checkpoint_names_files_beside_it_alone(tmp_path: Path, make_setup: Callable[..., Setup]) -> None:
    learner = make_learner(TINY, 1, make_setup().untrained()[0], (1, 16, 16), {}, torch.device("cpu"))
    place = {"epoch": 0, "batch": 1, "step": 1, "sums": [1.0], "best_loss": None, "best_epoch": 0, "seconds": 1.0}
    save_checkpoint(tmp_path, [learner], {}, place)
    sha256 = "0" * 64
    for file in ("../../victim.safetensors", "/etc/passwd"):
        files = {name: {"file": file, "sha256": sha256} for name in ("latest", "best")}
        write_json(tmp_path / "checkpoint.json", {"made_from": {}, "place": place, "files": files})
        with pytest.raises(DamagedData, match=r"files\.latest\.file"):
            load_checkpoint(tmp_path, [learner], {})
