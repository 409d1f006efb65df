"""What commands say on their way: where they go on from, counts that agree with their noun, advice given once."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from layerwise.cli import main
from layerwise.pipeline.module_cache import without_advice
from tests.cli.test_stopping import interrupt

RECIPE = str(Path(__file__).parents[1] / "tiny_recipe.py")
SETTINGS = ("--recipe", RECIPE, "--set", "training.epochs=2", "--set", "training.checkpoint_every=1")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


@pytest.fixture(autouse=True)
def _empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_resumed_training_says_where_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "training.stage", "train_step", signal.SIGINT, at=8)
        assert call("stage", "1", *SETTINGS).exit_code == 75
    resumed = call("stage", "1", *SETTINGS)
    assert resumed.exit_code == 0
    assert "module 1: resuming at epoch 2 of 2, update 8\n" in resumed.stdout
    assert "resuming" not in call("stage", "1", *SETTINGS, "--fresh").stdout


def test_modules_that_resume_together_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "training.stage", "train_step", signal.SIGINT, at=3)
        assert call("run", *SETTINGS, "--schedule", "simultaneous").exit_code == 75
    resumed = call("stage", "1", *SETTINGS, "--set", "schedule=simultaneous")
    assert "modules 1-3: resuming at epoch 1 of 2, update 3\n" in resumed.stdout


def test_a_resumed_cache_says_where_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("stage", "1", *SETTINGS).exit_code == 0
    with monkeypatch.context() as patch:
        interrupt(patch, "pipeline.caching", "as_stored", signal.SIGINT, at=10)
        assert call("cache", "--module", "1").exit_code == 75
    resumed = call("cache", "--module", "1")
    assert re.search(r"cache of module 1: resuming at sample \d+ of 272\n", resumed.stdout)


def test_counts_agree_with_their_noun() -> None:
    trained = call("stage", "1", "--recipe", RECIPE, "--set", "training.epochs=1", "--set", "training.batch_size=101")
    assert trained.exit_code == 0
    assert "1 epoch, 1 update, " in trained.stdout
    assert "module 1: up to 1 update\n" in trained.stdout
    assert call("cache", "--prune").stdout == "0 stale caches removed\n"


def test_advice_is_given_once(tmp_path: Path) -> None:
    assert call("stage", "1", *SETTINGS).exit_code == 0
    refused = call("stage", "2")
    assert refused.exit_code == 1
    assert "holds no activation cache. Write it with: layerwise cache --module 1" in refused.stderr
    assert call("cache", "--module", "1").exit_code == 0
    stale = call("stage", "2", "--set", "cache.dtype=float16")
    assert stale.stderr.lower().count("write it") == 1
    shard = next(path for path in Path("runs/tiny/caches/1").glob("train/values/0/c/0/**/0") if path.is_file())
    shard.write_bytes(b"")
    damaged = call("stage", "2")
    assert damaged.exit_code == 65
    assert damaged.stderr.count("--repair") == 1


@pytest.mark.parametrize(
    ("message", "fact"),
    [
        ("c holds no activation cache; write it", "c holds no activation cache"),
        ("c is stale: a; b; write it again", "c is stale: a; b"),
        ("c: x is damaged; repair the cache at c or write it again", "c: x is damaged"),
        (
            "c: x is a link; move it away, then repair the cache or write it again",
            "c: x is a link; move it away, then repair the cache or write it again",
        ),
    ],
)
def test_only_general_advice_is_left_out(message: str, fact: str) -> None:
    assert without_advice(message) == fact
