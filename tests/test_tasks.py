"""A cache that jobs fill by numbered tasks: any worker, any order, killed or not, the bytes of one writer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import activation_cache.format.layout
from activation_cache import CacheWriter
from layerwise.cli import main

RECIPE = str(Path(__file__).parent / "tiny_recipe.py")
TASKS = 8


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_cache.format.layout, "SHARD_BYTES", 64 << 10)


@pytest.fixture
def layerwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Commands in a folder where stage 1 is trained."""
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    assert run.invoke(main, ["stage", "1", "--recipe", RECIPE, "--run-dir", "run"]).exit_code == 0
    return lambda *words: run.invoke(main, [*words, "--run-dir", "run"])


def files(folder: Path) -> dict[str, bytes]:
    """Content of every file of a cache but the locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("lock")
    }


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "uint8"])
def test_three_workers_with_kills_write_the_bytes_of_one(
    dtype: str, layerwise: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("--module", "1", "--set", f"cache.dtype={dtype}")
    assert layerwise("cache", *settings).exit_code == 0
    whole = files(Path("run/caches/1"))
    assert sum("c/" in name for name in whole) >= TASKS  # shards
    for path in sorted(Path("run/caches/1").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    rng = random.Random(0)
    todo = [*range(1, TASKS + 1)] * 3  # each worker tries all of them
    rng.shuffle(todo)
    append, kills = CacheWriter.append, 0
    for task in todo:
        dies_at, calls = rng.choice([1, 3, 99, 99]), 0

        def append_or_die(self: CacheWriter, *args: object, **kwargs: object) -> None:
            nonlocal calls
            calls += 1
            if calls == dies_at:  # noqa: B023
                raise KeyboardInterrupt
            append(self, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(CacheWriter, "append", append_or_die)
        result = layerwise("cache", *settings, "--task", f"{task}/{TASKS}")
        assert result.exit_code in (0, 75), result.output
        kills += result.exit_code == 75
    monkeypatch.setattr(CacheWriter, "append", append)
    assert kills
    refused = layerwise("cache", *settings, "--commit")
    if refused.exit_code:  # some task was killed each time
        missing = [word.strip(",") for word in refused.output.partition("of 8 tasks ")[2].partition(" are")[0].split()]
        assert missing
        for task in missing:
            assert layerwise("cache", *settings, "--task", f"{task}/{TASKS}").exit_code == 0
    assert layerwise("cache", *settings, "--commit").exit_code == 0
    assert files(Path("run/caches/1")) == whole
    assert layerwise("stage", "2", "--set", f"cache.dtype={dtype}").exit_code == 0


def test_commit_names_what_is_missing(layerwise: Callable[..., Result]) -> None:
    nothing = layerwise("cache", "--module", "1", "--commit")
    assert nothing.exit_code == 1
    assert "it is absent" in " ".join(nothing.output.split())
    for task in range(1, TASKS + 1):
        if task not in (3, 6):
            assert layerwise("cache", "--module", "1", "--task", f"{task}/{TASKS}").exit_code == 0
    refused = layerwise("cache", "--module", "1", "--commit")
    assert refused.exit_code == 1
    assert "of 8 tasks 3, 6 are missing" in " ".join(refused.output.split())
    results = [layerwise("cache", "--module", "1", "--task", f"{task}/{TASKS}", "--json") for task in (3, 6, 6)]
    first, second, again = (json.loads(result.stdout)["samples"] for result in results)
    assert first > 0
    assert second > 0
    assert again == 0
    assert layerwise("cache", "--module", "1", "--commit").exit_code == 0
    assert layerwise("cache", "--module", "1", "--task", "1/8", "--json").exit_code == 0  # nothing is left to do


def test_a_slurm_array_job_says_which_task(layerwise: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    unsaid = layerwise("cache", "--module", "1", "--task")
    assert unsaid.exit_code == 2
    assert "this is not a Slurm array job" in " ".join(unsaid.output.split())
    for name, value in {"ID": "12", "COUNT": "4", "MIN": "10"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    result = layerwise("cache", "--module", "1", "--json", "--task")
    assert (json.loads(result.stdout)["task"], json.loads(result.stdout)["tasks"]) == (3, 4)


@pytest.mark.parametrize("task", ["0/8", "9/8", "3", "a/b", "-1/8"])
def test_a_task_that_there_is_not_is_refused(task: str, layerwise: Callable[..., Result]) -> None:
    result = layerwise("cache", "--module", "1", f"--task={task}")
    assert result.exit_code == 2, result.output
