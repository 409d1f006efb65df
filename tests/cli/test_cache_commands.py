"""`layerwise cache --repair`, `--prune` and `verify`, as a person meets them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from activation_cache import open_cache
from layerwise.cli import main

RECIPE = Path(__file__).parents[2] / "tests" / "tiny_recipe.py"


@pytest.fixture
def layerwise(tmp_path, monkeypatch):
    """Run a command in an empty directory in which module 1 is trained and cached."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, input=None):
        return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False, input=input)

    assert run("stage", 1, "--recipe", RECIPE).exit_code == 0
    assert run("cache", "--module", 1).exit_code == 0
    return run


CACHE = Path("runs/tiny/caches/1")


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damage_is_reported_and_mended(layerwise):
    assert layerwise("verify").exit_code == 0
    before = open_cache(CACHE).splits["train"].read(range(8)).tobytes()
    shard = next(path for path in CACHE.glob("train/values/0/c/0/**/0") if path.is_file())
    damage(shard)
    result = layerwise("verify", "--json")
    assert result.exit_code == 65
    report = json.loads(result.stdout)
    assert list(report["caches"][0]["damaged"]) == [str(shard.relative_to(CACHE))]
    assert "--repair" in report["message"]
    result = layerwise("stage", 2)
    assert result.exit_code == 65
    assert str(shard.relative_to(CACHE)) in result.stderr
    assert "layerwise cache --module 1" in result.stderr
    assert layerwise("cache", "--module", 1, "--repair").exit_code == 0
    assert layerwise("verify").exit_code == 0
    assert open_cache(CACHE).splits["train"].read(range(8)).tobytes() == before
    assert json.loads(layerwise("cache", "--module", 1, "--repair", "--json").stdout)["samples"] == 0


def test_damaged_weights_are_reported(layerwise):
    damage(Path("runs/tiny/stages/1/module.safetensors"))
    result = layerwise("verify")
    assert result.exit_code == 65
    assert "module.safetensors" in result.stderr


def test_stale_caches_are_removed_after_asking(layerwise):
    stale = ("--recipe", RECIPE, "--run-dir", "runs/tiny", "--set", "cache.dtype=float16")
    found = json.loads(layerwise("status", *stale, "--json").stdout)["modules"][0]["cache"]
    assert found["state"] == "stale"
    assert 'dtype (cached "float32", wanted "float16")' in found["reason"]
    assert layerwise("cache", "--prune").stdout.startswith("0 stale caches removed")
    assert layerwise("cache", "--module", 1, "--repair", *stale).exit_code == 1
    unanswered = layerwise("cache", "--prune", "--json", *stale, input="")
    assert unanswered.exit_code == json.loads(unanswered.stdout)["exit_code"] == 1
    assert layerwise("cache", "--prune", *stale, input="n\n").exit_code == 0
    assert CACHE.exists()
    assert layerwise("cache", "--prune", *stale, input="y\n").exit_code == 0
    assert not CACHE.exists()


def test_usage(layerwise):
    for wrong in (["cache"], ["cache", "--prune", "--module", 1], ["cache", "--repair"]):
        assert layerwise(*wrong).exit_code == 2
    asked = layerwise("stage", 9)
    for arguments in ([], ["--repair"]):
        refused = layerwise("cache", "--module", 9, *arguments)
        assert (refused.exit_code, refused.stderr) == (2, asked.stderr)
    refused = layerwise("cache", "--module", 9, "--json")
    assert refused.exit_code == json.loads(refused.stdout)["exit_code"] == 2


def test_a_cache_elsewhere(layerwise, tmp_path):
    url = ("--cache-url", f"file://{tmp_path}/elsewhere")
    assert layerwise("cache", "--module", 1, *url).exit_code == 0
    (own,) = (tmp_path / "elsewhere").iterdir()
    assert re.fullmatch(r"tiny-[0-9a-f]{8}", own.name)
    assert open_cache(own / "1").splits["train"].samples
    shutil.rmtree("runs/tiny/caches")
    assert layerwise("stage", 2).exit_code == 0, "the run remembers where its caches are"
    assert layerwise("verify").exit_code == 0
    assert layerwise("stage", 1, "--cache-url", "ftp://x").exit_code == 2


def test_two_runs_of_one_name_share_a_url_and_no_cache(layerwise, tmp_path):
    url = ("--cache-url", f"file://{tmp_path}/elsewhere")
    assert layerwise("cache", "--module", 1, *url).exit_code == 0
    other = tmp_path / "other/tiny"
    shutil.copytree("runs/tiny/stages", other / "stages")
    for name in ("run.json", "recipe.json", "dataset.json", "expected.json"):
        shutil.copy(f"runs/tiny/{name}", other)
    assert layerwise("cache", "--module", 1, "--run-dir", other, *url).exit_code == 0
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2
    assert layerwise("verify", "--run-dir", other).exit_code == 0
    (other / "place.json").write_text("{}")
    damaged = layerwise("verify", "--run-dir", other)
    assert damaged.exit_code == 65
    assert "place.json" in damaged.output


def test_caches_that_an_earlier_version_wrote_stay_in_use(layerwise, tmp_path):
    assert layerwise("cache", "--module", 1).exit_code == 0
    shutil.move("runs/tiny/caches/1", tmp_path / "elsewhere/tiny/1")  # in the folder of the run's name
    url = ("--cache-url", f"file://{tmp_path}/elsewhere")
    assert layerwise("stage", 2, *url).exit_code == 0
    assert layerwise("cache", "--module", 2, *url).exit_code == 0
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["tiny"]


def test_a_window_lies_beside_its_cache(layerwise, tmp_path):
    url = ("--cache-url", f"file://{tmp_path}/elsewhere", "--cache-budget", "4MB")
    assert layerwise("cache", "--module", 1, *url).exit_code == 0
    assert layerwise("stage", 2).exit_code == 0
    (own,) = (tmp_path / "elsewhere").iterdir()
    assert list((own / "1-window").glob("slot-*"))
    assert not list(Path("runs/tiny").rglob("slot-*"))
    assert layerwise("verify").exit_code == 0
    slot = next(path for path in own.glob("1-window/slot-*/train/values/**/0") if path.is_file())
    slot.write_bytes(slot.read_bytes()[:-1])
    assert layerwise("verify").exit_code == 65


def test_a_store_that_is_not_reached_is_said_in_one_line(layerwise, monkeypatch):
    pytest.importorskip("obstore")
    monkeypatch.setattr("activation_cache.store.remote.ATTEMPTS", 1)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    for command in (["plan"], ["stage", 2], ["cache", "--module", 1], ["cache", "--prune"]):
        result = layerwise(*command, "--set", "cache.url=s3://bucket/prefix")
        assert result.exit_code == 1
        assert "check the network" in result.stderr


def test_the_url_of_a_run_names_its_folder(layerwise, tmp_path, monkeypatch):
    monkeypatch.chdir("runs/tiny")
    assert layerwise("cache", "--module", 1, "--run-dir", ".", "--cache-url", f"file://{tmp_path}/e").exit_code == 0
    (own,) = (tmp_path / "e").iterdir()
    assert own.name.startswith("tiny-")
    assert (own / "1/zarr.json").exists()
    for url in ("s3:///prefix", "file:///", "file://relative/path", "file://"):
        assert layerwise("status", "--run-dir", ".", "--set", f"cache.url={url}").exit_code == 2


def test_what_is_no_window_of_ours_is_left_alone(rolling):
    shutil.copytree(WINDOW / "slot-000001", WINDOW / "slot-000001.bak")
    (WINDOW.parent / "old-window").mkdir()
    assert rolling("stage", 2, "--fresh").exit_code == 0
    assert rolling("cache", "--prune", "--yes").exit_code == 0
    assert (WINDOW / "slot-000001.bak/zarr.json").exists()
    assert (WINDOW.parent / "old-window").exists()


WINDOW = Path("runs/tiny/caches/1-window")
ROLLING = ("--recipe", RECIPE, "--run-dir", "runs/tiny", "--cache-budget", "4200000", "--set", "cache.codec=none")


@pytest.fixture
def rolling(layerwise):
    """The same, with a cache that is a window, on which module 2 was trained."""
    shutil.rmtree(CACHE)
    assert layerwise("cache", "--module", 1, *ROLLING).exit_code == 0
    assert layerwise("stage", 2).exit_code == 0
    return layerwise


def test_a_damaged_slot_of_a_window_is_removed_and_computed_again(rolling):
    weights = json.loads(rolling("stage", 2, "--json").stdout)["weights"]
    damage(next(path for path in WINDOW.glob("slot-000001/train/values/0/c/**/*") if path.is_file()))
    assert rolling("verify").exit_code == 65
    again = rolling("stage", 2, "--fresh")
    assert again.exit_code == 65
    assert "--repair" in again.stderr
    mended = json.loads(rolling("cache", "--module", 1, "--repair", "--json").stdout)
    assert mended["slots"] == ["slot-000001"]
    assert rolling("verify").exit_code == 0
    assert json.loads(rolling("stage", 2, "--fresh", "--json").stdout)["weights"] == weights
    assert json.loads(rolling("cache", "--module", 1, "--repair", "--json").stdout)["slots"] == []
    damage(WINDOW / "slot-000002/record/commit.json")
    assert "1 damaged slot of" in rolling("cache", "--module", 1, "--repair").stdout
    assert not (WINDOW / "slot-000002").exists()
    assert rolling("stage", 2, "--fresh").exit_code == 0


def test_a_damaged_note_of_a_window_is_reported(rolling):
    note = WINDOW.parent / "1.window.json"
    damage(note)
    told = json.loads(rolling("verify", "--json").stdout)
    assert told["exit_code"] == 65
    assert "caches/1.window.json" in told["message"]
    for command in (["cache", "--module", 1, "--repair"], ["cache", "--module", 1]):
        refused = rolling(*command)
        assert refused.exit_code == 65
        assert "Delete it, and the command repeats that part" in refused.stderr
    note.unlink()
    assert rolling("cache", "--module", 1).exit_code == 0
    assert rolling("verify").exit_code == 0


def test_a_stale_window_is_pruned(rolling):
    assert rolling("cache", "--prune", "--yes").stdout.startswith("0 stale")
    shutil.copytree(WINDOW, "kept")
    assert rolling("cache", "--module", 1, *ROLLING, "--cache-budget", "1GB").exit_code == 0
    assert not WINDOW.exists()
    shutil.copytree("kept", WINDOW)
    assert json.loads(rolling("cache", "--prune", "--yes", "--json").stdout)["removed_windows"] == [1]
    assert not WINDOW.exists()
    assert CACHE.exists()
