"""The vision recipes from the command line, step by step, on generated files and a network cut down to seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from layerwise.cli import main

SMALL = (
    "network.width=0.0625",
    "objective.negatives=4",
    "training.batch_size=8",
    "training.epochs=1",
    "probe.epochs=2",
)

Command = Callable[..., dict[str, Any]]


@pytest.fixture
def layerwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command with --json in an empty directory; what it prints, with its `exit_code`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> dict[str, Any]:
        result = CliRunner().invoke(main, [*map(str, arguments), "--json"], catch_exceptions=False)
        return {**json.loads(result.stdout), "exit_code": result.exit_code}

    return run


def overrides(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def write_stl10(folder: Path) -> None:
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, count in (("unlabeled", 24), ("train", 20), ("test", 10)):
        (folder / f"{name}_X.bin").write_bytes(draw.integers(0, 256, (count, 3, 96, 96), np.uint8).tobytes())
        if name != "unlabeled":
            (folder / f"{name}_y.bin").write_bytes(bytes(i % 10 + 1 for i in range(count)))


def write_pictures(folder: Path, names: list[str]) -> None:
    draw = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (80, 90, 3), np.uint8)).save(folder / name)


def test_stl10_step_by_step(tmp_path: Path, layerwise: Command) -> None:
    """The dataset's place is given once; stages 2 and 3 read caches alone."""
    write_stl10(tmp_path / "data" / "stl10_binary")

    first = layerwise("stage", 1, "--recipe", "stl10", "--data-dir", "data", *overrides(*SMALL))
    assert first["exit_code"] == 0
    cache = layerwise("cache", "--module", 1)
    assert cache["exit_code"] == 0, cache
    assert cache["splits"]["train"]["shape"] == [49, 16, 16, 16]
    assert {name: split["samples"] for name, split in cache["splits"].items()} == {
        "train": 23,
        "validation": 1,
        "probe": 20,
        "test": 10,
    }
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert layerwise("stage", 2)["exit_code"] == 0
    assert layerwise("cache", "--module", 2)["exit_code"] == 0
    assert layerwise("stage", 3)["exit_code"] == 0
    assert layerwise("probe")["exit_code"] != 0, "the untrained network reads the pictures"
    probe = layerwise("probe", "--data-dir", "elsewhere")
    assert probe["tasks"]["class"]["trained"]["test_samples"] == 10


def test_stl10_that_is_not_there(layerwise: Command) -> None:
    Path("empty").mkdir()
    answer = layerwise("stage", 1, "--recipe", "stl10", "--data-dir", "empty")
    assert answer["exit_code"] == 1
    assert "lacks unlabeled_X.bin, train_X.bin, train_y.bin, test_X.bin, test_y.bin. Either" in answer["message"]


def test_damaged_stl10_ends_with_65(tmp_path: Path, layerwise: Command) -> None:
    write_stl10(tmp_path / "stl10_binary")
    with (tmp_path / "stl10_binary" / "test_X.bin").open("ab") as file:
        file.write(b"?")
    assert layerwise("stage", 1, "--recipe", "stl10", "--data-dir", tmp_path)["exit_code"] == 65


def test_pictures_without_classes_run_to_the_report(tmp_path: Path, layerwise: Command) -> None:
    write_pictures(tmp_path / "data", [f"{index}.png" for index in range(10)])

    done = layerwise("run", "--recipe", "images", "--data-dir", "data", *overrides(*SMALL))

    assert done["exit_code"] == 0, done
    assert [stage["module"] for stage in done["stages"]] == [1, 2, 3]
    assert done["probes"] == []
    assert "there is nothing to probe with" in Path(done["report"]).read_text()


def test_tiles_of_large_pictures_run_to_the_report(tmp_path: Path, layerwise: Command) -> None:
    write_pictures(tmp_path / "data", [f"{'ab'[index % 2]}/{index}.png" for index in range(8)])
    tiled = ("dataset.tile=40", "dataset.resize=null", "dataset.crop=32", "objective.steps=1")

    done = layerwise("run", "--recipe", "images", "--data-dir", "data", *overrides(*SMALL, *tiled))

    assert done["exit_code"] == 0, done
    assert done["dataset"]["sizes"] == {"train": 30, "validation": 6, "probe": 36, "test": 12}
    assert [probe["module"] for probe in done["probes"]] == [1, 2, 3]


def test_too_many_unreadable_pictures_end_with_65(tmp_path: Path, layerwise: Command) -> None:
    for index in range(30):
        (tmp_path / f"{index}.jpg").write_bytes(b"not a picture")
    answer = layerwise("run", "--recipe", "images", "--data-dir", tmp_path)
    assert answer["exit_code"] == 65
    assert "cannot be read" in answer["message"]
