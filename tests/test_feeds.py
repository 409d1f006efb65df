"""Feeds: every sample once, the same from everywhere, from any place on."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from activation_cache import calibrate
from activation_cache.format.quantise import dequantise
from layerwise.data.read_ahead import read_ahead
from layerwise.data.stl10 import STL10
from layerwise.errors import RecipeError
from layerwise.nets.module import Encoded, Module
from layerwise.objectives.cross_entropy import CrossEntropy
from layerwise.pipeline.caching import write_cache
from layerwise.pipeline.frozen import stage_identity
from layerwise.pipeline.inputs import stage_inputs
from layerwise.pipeline.probe import features
from layerwise.pipeline.run import open_run
from layerwise.pipeline.schedule import run_stage
from layerwise.pipeline.setup import Setup
from layerwise.recipe.loader import apply_overrides, load_recipe
from layerwise.training.feeds import DatasetFeed, RecomputeFeed, decoder
from layerwise.training.stage import validate
from layerwise.training.step import Arithmetic, Learner
from tests.conftest import TINY


def pictures(folder, draw, name, count):
    (folder / f"{name}_X.bin").write_bytes(draw.integers(0, 256, (count, 3, 96, 96), np.uint8).tobytes())
    if name != "unlabeled":
        (folder / f"{name}_y.bin").write_bytes(bytes(i % 10 + 1 for i in range(count)))


def test_stages_above_the_first_run_when_the_dataset_is_gone(tmp_path):
    """Real files in STL-10's format, deleted between the stages."""
    folder = tmp_path / "data" / "stl10_binary"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, count in {"unlabeled": 40, "train": 12, "test": 10}.items():
        pictures(folder, draw, name, count)
    recipe = TINY.model_copy(update={"dataset": STL10(crop=16, validation=0.2), "name": "gone"})

    def setup():
        return Setup(open_run(tmp_path / "run", recipe), torch.device("cpu"), tmp_path / "data")

    run_stage(setup(), 1)
    write_cache(setup(), 1)
    shutil.rmtree(tmp_path / "data")
    run_stage(setup(), 2)
    write_cache(setup(), 2)
    run_stage(setup(), 3)


@pytest.mark.parametrize("codec", ["none", "lz4"])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_cache_and_recomputation_give_the_same_batches_from_any_place(make_setup, codec, start):
    recipe = apply_overrides(TINY, [f"cache.codec={codec}", "cache.views=2"])
    setup = make_setup(recipe)
    run_stage(setup, 1)
    write_cache(setup, 1)
    cached = stage_inputs(setup, 2)
    recomputed = stage_inputs(make_setup(apply_overrides(recipe, ["feed=recompute"])), 2)
    for epoch in (0, 1):
        found = [b.inputs_on(setup.device).clone() for b in cached.shuffled(epoch, start)]
        assert len(found) == 6 - start
        for mine, other in zip(found, recomputed.shuffled(epoch, start), strict=True):
            assert torch.equal(mine, other.inputs)
    for split in cached.splits():
        mine = torch.cat([b.inputs_on(setup.device).clone() for b in cached.in_order(split, None, 3 * start)])
        other = torch.cat([b.inputs for b in recomputed.in_order(split, 0 if split == "train" else None, 3 * start)])
        assert torch.equal(mine, other)


class OverwritesOnceFrozen(Module):
    """What training, in which it leaves its input alone, lets pass."""

    channels = target_channels = 4

    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(1, 4, 4, 4)

    def forward(self, x):
        z = self.project(x if self.training else x.mul_(2))
        return Encoded(z, z, z)


@pytest.mark.parametrize("use", ["feed", "features", "validate"])
def test_a_frozen_module_that_overwrites_its_input_is_refused(make_setup, tmp_path, use):
    setup = make_setup()
    source = DatasetFeed(setup.splits, 16, seed=0)
    module = OverwritesOnceFrozen()
    objective = CrossEntropy().build(module, (4, 4, 4), {"class": 10})
    learner = Learner(1, module, objective, torch.optim.SGD(module.parameters(), 0.1))
    arithmetic = Arithmetic(setup.device, "fp32", 4, seed=0)
    recomputed = RecomputeFeed(source, [module], setup.device)
    uses = {
        "feed": lambda: next(recomputed.in_order("validation")),
        "features": lambda: features(source, module, "probe", setup.device, tmp_path),
        "validate": lambda: validate([learner], source, arithmetic, 16),
    }
    module.eval()
    with pytest.raises(RecipeError, match=r"OverwritesOnceFrozen.* changes its input in place"):
        uses[use]()


def test_every_sample_once_an_epoch(make_setup):
    feed = stage_inputs(make_setup(apply_overrides(TINY, ["training.batch_size=101"])), 1)
    first, second = (next(feed.shuffled(epoch)).ids for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert len(set(first)) == 101
    assert list(first) != list(second)


def test_reading_ahead_keeps_the_order_and_passes_errors_on():
    assert list(read_ahead(lambda item: item * 2, range(20), readers=3)) == [item * 2 for item in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(lambda item: 1 // (item - 3), range(20), readers=3))


def test_a_stage_knows_that_small_compressed_samples_come_in_another_order(make_setup, monkeypatch):
    """Where they do not, codec and feed change nothing, and a stage does not know them."""
    compressed, plain = (apply_overrides(TINY, [f"cache.codec={codec}"]) for codec in ("lz4", "none"))
    recomputed = apply_overrides(TINY, ["feed=recompute"])
    for number in (1, 2):
        run_stage(make_setup(recomputed), number)

    def inputs(recipe):
        return stage_identity(make_setup(recipe), 3)["inputs"]

    assert inputs(compressed) == inputs(plain) == inputs(recomputed)
    for module in ("activation_cache.format.layout", "layerwise.pipeline.frozen"):
        monkeypatch.setattr(f"{module}.SHUFFLED_TOGETHER", 0)  # as if there were more chunks
    assert inputs(compressed) == {**inputs(plain), "order": "in windows"}
    assert inputs(plain) == inputs(recomputed)


@pytest.mark.parametrize("name", ["digits", "voices", "stl10", "librispeech"])
def test_output_shapes_are_those_of_the_modules(tmp_path, monkeypatch, name):
    recipe = load_recipe(name)
    shape = recipe.dataset.expects()[0]
    setup = Setup(open_run(tmp_path / "run", recipe), torch.device("cpu"))
    setup.facts = SimpleNamespace(sample_shape=shape)
    x = torch.zeros(1, *shape)
    with torch.no_grad():
        real = [tuple((x := module(x).output).shape[1:]) for module in setup.untrained()]
    assert setup.output_shapes == real


@pytest.mark.parametrize("lowest", [[0, 0, 0], [-3, 0, 0], [-3, -1, -2]], ids=["after a ReLU", "mixed", "signed"])
def test_the_device_finds_the_numbers_that_the_cache_defines(lowest):
    calibration = calibrate([np.array([[lowest, [5, 0.1, 700]]], np.float32)], channel_axis=1)
    stored = np.random.default_rng(0).integers(0, 256, (4, 2, 3, 5), np.uint8)
    decode = decoder("uint8", calibration, 3, torch.device("cpu"))
    np.testing.assert_array_equal(decode(torch.from_numpy(stored)).numpy(), dequantise(stored, calibration))
