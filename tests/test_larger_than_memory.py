"""Pictures larger than memory: cut into tiles, they stream through stage 1, and the cache feeds stage 2."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layerwise import memory
from layerwise.data.folder import ImageFolder
from layerwise.errors import WillNotFit
from layerwise.memory import Samples
from layerwise.nets.resnet import Group, PatchResNet
from layerwise.pipeline.caching import write_cache
from layerwise.pipeline.run import open_run
from layerwise.pipeline.schedule import run_stage
from layerwise.pipeline.setup import Setup
from layerwise.recipe import CacheSettings, Recipe, Training
from tests.conftest import TINY

SIDE, TILE, BUDGET = 768, 64, 4 * 10**6
PICTURES = ImageFolder(tile=TILE, resize=None, crop=TILE, grayscale=True, validation=0.3)
NETWORK = PatchResNet(
    patch=16,
    patch_stride=16,
    stem_channels=4,
    groups=(Group(channels=8, blocks=1), Group(channels=16, blocks=1, stride=2)),
)
RECIPE: Recipe = TINY.model_copy(
    update={
        "dataset": PICTURES,
        "network": NETWORK,
        "training": Training(batch_size=16, epochs=1, max_memory=BUDGET),
        "cache": CacheSettings(dtype="uint8"),
    }
)


LARGE, LARGE_TILE, LARGE_BUDGET = 8192, 256, 48 * 10**6


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.fromarray(draw.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)).save(tmp_path / f"pictures/{number}.png")
    return tmp_path / "pictures"


def test_one_picture_at_once_would_break_the_budget() -> None:
    whole = RECIPE.model_copy(update={"training": RECIPE.training.model_copy(update={"batch_size": 1})})
    with pytest.raises(WillNotFit):
        memory.fit(whole, [1], Samples((1, SIDE, SIDE), {}))


def test_tile_by_tile_it_trains_within_it(tmp_path, pictures) -> None:
    setup = Setup(open_run(tmp_path / "run", RECIPE), torch.device("cpu"), data_dir=pictures)
    first = run_stage(setup, 1)
    write_cache(setup, 1)
    second = run_stage(setup, 2)
    for record in (first, second):
        assert record["steps"] > 0
        assert record["peak"]["predicted"] <= BUDGET
    assert sum(setup.facts.sizes.values()) == 3 * (SIDE // TILE) ** 2


@pytest.mark.long
def test_pictures_of_67_megapixels_take_the_memory_of_their_tiles(tmp_path: Path) -> None:
    """Two pictures of 8192 x 8192, each of which, encoded at once, takes gigabytes; minutes on one core."""
    draw = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        pixels = draw.integers(0, 256, (LARGE, LARGE), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"pictures/{number}.png", compress_level=0)
    del pixels
    dataset = PICTURES.model_copy(update={"tile": LARGE_TILE, "crop": LARGE_TILE, "validation": 0.5})
    training = Training(batch_size=16, epochs=1, max_memory=LARGE_BUDGET)
    recipe = RECIPE.model_copy(update={"dataset": dataset, "training": training})

    unlimited = recipe.model_copy(update={"training": Training(batch_size=1, epochs=1)})
    at_once = memory.fit(unlimited, [1], Samples((1, LARGE, LARGE), {})).footprint.peak
    assert at_once > 20 * LARGE_BUDGET

    setup = Setup(open_run(tmp_path / "run", recipe), torch.device("cpu"), data_dir=tmp_path / "pictures")
    peaks = {"before": resident_peak()}
    _ = setup.splits
    peaks["looked at"] = resident_peak()
    records = [run_stage(setup, 1)]
    peaks["stage 1"] = resident_peak()
    write_cache(setup, 1)
    peaks["cache"] = resident_peak()
    records.append(run_stage(setup, 2))
    peaks["stage 2"] = resident_peak()
    print(f"at once {at_once:,} bytes (predicted); resident at most, bytes: {peaks}")
    print([(record["seconds"], record["peak"]) for record in records])

    assert setup.facts.sizes == {"train": 1024, "validation": 1024}
    for record in records:
        assert record["steps"] == 1024 // 16
        assert record["peak"]["predicted"] <= LARGE_BUDGET
    assert peaks["stage 2"] - peaks["before"] < at_once / 4


def resident_peak() -> int:
    """Bytes of memory that this process has held at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
