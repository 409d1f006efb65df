"""Writing a module's cache in uint8: what calibrates it, and that an interrupted writing does so once."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch

import activation_cache
from activation_cache import SplitSpec
from activation_cache.format.quantise import dequantise
from layerwise.errors import DamagedData, NotReady, StoppedEarly, WillNotFit
from layerwise.pipeline import caching
from layerwise.pipeline.caching import repair_cache, write_cache
from layerwise.pipeline.module_cache import cache_errors, cached
from layerwise.pipeline.rolling import rolls
from layerwise.pipeline.room import settle
from layerwise.pipeline.schedule import run_stage
from layerwise.recipe.loader import apply_overrides
from layerwise.training.feeds import Batch, SampleShape
from tests.conftest import TINY

UINT8 = apply_overrides(TINY, ["cache.dtype=uint8"])


@pytest.fixture
def setup(make_setup):
    found = make_setup(UINT8)
    run_stage(found, 1)
    return found


def test_few_samples_calibrate_all_of_them(setup):
    write_cache(setup, 1)
    with activation_cache.repair(setup.run.cache(1)) as writer:
        assert writer.saturated["train"] == 0
        writer.commit()


def test_an_interrupted_writing_is_calibrated_once(setup, monkeypatch):
    monkeypatch.setattr("activation_cache.format.layout.SHARD_BYTES", 1 << 16)
    calls = count()
    setup.should_stop = lambda: next(calls) == 4
    with pytest.raises(StoppedEarly):
        write_cache(setup, 1)
    begun = activation_cache.inspect(setup.run.cache(1))
    assert begun.state == "partial"
    assert begun.calibration is not None
    assert begun.samples["train"]
    setup.should_stop = lambda: False

    def again(*_):
        raise AssertionError("calibrated again")

    monkeypatch.setattr(activation_cache, "calibrate", again)
    assert write_cache(setup, 1).splits["train"].calibration == begun.calibration


def test_a_stale_unfinished_cache_lends_no_calibration(setup, make_setup, monkeypatch):
    setup.should_stop = lambda: True
    with pytest.raises(StoppedEarly):
        write_cache(setup, 1)
    calls = count()
    calibrate = activation_cache.calibrate

    def counted(*arguments):
        next(calls)
        return calibrate(*arguments)

    monkeypatch.setattr(activation_cache, "calibrate", counted)
    write_cache(make_setup(apply_overrides(UINT8, ["cache.views=2"])), 1)
    assert next(calls) == 1


class Sorted:
    """Outputs that grow from one sample to the next, as those of a dataset sorted by class may."""

    samples = 64

    def shape(self, split):
        return SampleShape((2, 8), False)

    def in_order(self, split, view=None, start=0):
        return self._batches(torch.arange(64))

    def shuffled(self, epoch, start=0):
        return self._batches(torch.randperm(64, generator=torch.Generator().manual_seed(epoch)))

    def _batches(self, order):
        for at in range(0, 64, 16):
            yield Batch(order[at : at + 16, None, None].expand(16, 2, 8).float())


def test_samples_are_drawn_from_all_over_the_dataset(setup, monkeypatch):
    monkeypatch.setattr(caching, "CALIBRATION_SAMPLES", 16)
    calibration = caching._calibration(setup, 1, Sorted())
    assert (dequantise(np.full((1, 2, 8), 255), calibration) > 48).all(), "the first sixteen reach to 15"


def test_samples_that_differ_in_length_make_no_window(setup):
    spec = SplitSpec("train", 64, (2, None), longest=8)
    tight = apply_overrides(TINY, ["cache.budget=1000"])
    setup.run = replace(setup.run, recipe=tight)
    with pytest.raises(WillNotFit, match=r"differ in length.*cache --module 1 .*--set=cache.budget="):
        settle(setup, 1, [spec], Sorted(), None, "preferred")


@pytest.fixture
def written(make_setup):
    found = make_setup()
    run_stage(found, 1)
    write_cache(found, 1)
    return found


def damage(setup, *names):
    for name in names:
        path = setup.run.cache(1) / name
        data = bytearray(path.read_bytes())
        data[10] ^= 1
        path.write_bytes(data)


def test_a_damaged_cache_is_not_written_over_but_repaired(written):
    shard = next(p for p in written.run.cache(1).rglob("train/values/0/c/0/*") if p.is_file() or p.is_dir())
    shutil.rmtree(shard) if shard.is_dir() else shard.unlink()
    with pytest.raises(DamagedData, match=r"train/values/0/c/0.* is missing.*--repair"):
        write_cache(written, 1)
    assert repair_cache(written, 1)["samples"]
    assert activation_cache.verify(written.run.cache(1)).ok


def test_a_damaged_commit_record_is_repaired_without_a_sample(written):
    damage(written, "record/commit.json")
    with pytest.raises(DamagedData, match=r"record/commit\.json is damaged.*--repair"):
        write_cache(written, 1)
    assert repair_cache(written, 1)["samples"] == 0


def test_a_cache_that_lost_both_records_is_replaced(written):
    damage(written, "record/commit.json", "record/plan.json")
    with pytest.raises(DamagedData, match=r"cannot be repaired.*Replace it with: layerwise cache --module 1 "):
        repair_cache(written, 1)
    write_cache(written, 1)
    assert activation_cache.verify(written.run.cache(1)).ok


def test_an_unfinished_cache_with_half_a_plan_is_replaced(written):
    (written.run.cache(1) / "record/commit.json").unlink()
    plan = written.run.cache(1) / "record/plan.json"
    plan.write_bytes(plan.read_bytes()[:100])
    write_cache(written, 1)
    assert activation_cache.verify(written.run.cache(1)).ok


def test_repair_of_an_unfinished_cache_of_something_else_deletes_nothing(written, make_setup):
    (written.run.cache(1) / "record/commit.json").unlink()
    before = {p for p in written.run.cache(1).rglob("*") if p.is_file()}
    with pytest.raises(NotReady, match="views"):
        repair_cache(make_setup(apply_overrides(TINY, ["cache.views=2"])), 1)
    assert {p for p in written.run.cache(1).rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("setting", ["cache.probe_splits=false", "cache.views=2"])
def test_an_unfinished_cache_of_other_settings_is_replaced(written, make_setup, monkeypatch, setting):
    (written.run.cache(1) / "record/commit.json").unlink()
    other = make_setup(apply_overrides(TINY, [setting]))
    notes = []
    monkeypatch.setattr(other.progress, "note", notes.append)
    cache = write_cache(other, 1)
    assert any("it is replaced" in note for note in notes)
    assert ("test" in cache.splits) == (setting != "cache.probe_splits=false")


def test_where_there_is_no_limit_no_window_is_left(written, make_setup, monkeypatch):
    rolling = make_setup(apply_overrides(TINY, ["cache.budget=4200000", "cache.codec=none"]))
    write_cache(rolling, 1)
    assert rolls(rolling, 1)
    monkeypatch.setattr(activation_cache, "available", lambda *_: None)  # as of an object store
    cache = write_cache(written, 1)
    assert "train" in cache.splits
    assert not rolls(written, 1)
    assert cached(written, 1)


def test_numbers_that_a_dtype_cannot_hold_are_said_with_another_dtype(make_setup):
    setup = make_setup(apply_overrides(TINY, ["cache.dtype=float16"]))
    run_stage(setup, 1)
    with pytest.raises(NotReady, match=r"not finite in float16\. Another --set cache\.dtype"), cache_errors(setup, 1):
        raise activation_cache.InvalidSamples("split 'train': sample 'a' has values not finite in float16")
