"""The budget: what is estimated is what is written, and a rolling window holds what it should when it should."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from activation_cache import (
    DoesNotFit,
    Filler,
    SplitSpec,
    Status,
    Storage,
    Window,
    available,
    calibrate,
    create,
    estimate,
    inspect,
    make_key,
    measured_ratio,
    open_cache,
    repair,
    slot_samples,
)
from activation_cache.format.key import Key
from activation_cache.writing.writer import CacheWriter


def values(rng: np.random.Generator, *shape: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.maximum(rng.standard_normal(shape), 0).astype(np.float32)


@pytest.mark.parametrize("storage", [Storage(), Storage("float16", "zstd"), Storage("uint8", "lz4")], ids=str)
@pytest.mark.parametrize("shape", [(8, 30, 30), (500,)])
def test_the_estimate_is_what_is_written(tmp_path: Path, storage: Storage, shape: tuple[int, ...]) -> None:
    given = values(np.random.default_rng(0), 600, *shape)
    calibration = calibrate([given]) if storage.dtype == "uint8" else None
    splits = [SplitSpec("train", 600, shape, {"class": "int64"}), SplitSpec("test", 100, shape)]
    with create(tmp_path, make_key({}, storage), splits, storage, calibration=calibration) as writer:
        writer.append("train", given, [f"train-{i:05d}" for i in range(600)], {"class": np.arange(600)})
        writer.append("test", given[:100], [f"test-{i:05d}" for i in range(100)])
        writer.commit()
    written = open_cache(tmp_path).nbytes
    expected = estimate(splits, storage, measured_ratio(given[:64], storage, calibration))
    assert expected * 0.7 <= written <= expected * 1.05


def test_without_a_budget_the_disk_less_a_reserve_is_the_budget(tmp_path: Path) -> None:
    assert available(tmp_path, 1000) == 1000
    free = available(tmp_path)
    assert free is not None
    assert free > 0
    (tmp_path / "own").write_bytes(bytes(10**6))
    own = available(tmp_path)
    assert own is not None
    assert abs(own - free) < 10**9  # what is its own counts as free; others write to this disk too


def test_a_budget_beyond_the_disk_is_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").write_bytes(bytes(1000))
    monkeypatch.setattr("activation_cache.store.local.free_bytes", lambda folder: 500)
    assert available(tmp_path, 10**12) == 1500
    assert available(tmp_path, 200) == 200


def test_slots_fit_the_budget() -> None:
    spec = SplitSpec("train", 10_000, (64,), {"class": "int64"})
    found = slot_samples(spec, Storage(), 1_000_000, slots=4, besides=100_000)
    assert 5 * estimate([SplitSpec("train", found, (64,))], Storage()) + 100_000 <= 1_000_000
    assert 5 * estimate([SplitSpec("train", int(found * 1.1), (64,))], Storage()) + 100_000 > 1_000_000
    assert slot_samples(spec, Storage(), 10**12, slots=4) == 2500
    with pytest.raises(DoesNotFit, match="at least"):
        slot_samples(spec, Storage(), 50_000, slots=4)


SPEC = SplitSpec("train", 37, (3,), {"class": "int16"})


def sample(number: int, view: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.array([number, view, number * 100 + view], np.float32)


def fill(writer: CacheWriter, samples: np.ndarray, views: np.ndarray) -> None:  # type: ignore[type-arg]
    for number, view in zip(samples.tolist(), views.tolist(), strict=True):
        writer.append("train", sample(number, view)[None], [f"{number}/{view}"], {"class": [number]})


@pytest.fixture(params=[Storage(), Storage("float32", "lz4")], ids=["none", "lz4"])
def window(request: pytest.FixtureRequest, tmp_path: Path) -> Window:
    return Window(tmp_path / "w", make_key({"weights": "ab"}, request.param), SPEC, request.param, 3, 5, seed=7)


def pairs(window: Window, slots: range) -> list[tuple[int, int]]:
    stream = [window.contents(slot) for slot in slots]
    return [(int(s), int(v)) for samples, views in stream for s, v in zip(samples, views, strict=True)]


def test_every_sample_comes_once_in_each_augmentation(window: Window) -> None:
    stream = pairs(window, range(15))  # 75 samples: two rounds of 37 and one more
    for view in (0, 1):
        assert Counter(s for s, v in stream if v == view) == Counter(range(37))
    assert [v for _, v in stream] == sorted(v for _, v in stream)


def test_turns(window: Window) -> None:
    with Filler(window, fill) as filler:
        for turn in (0, 1, 2, 5):
            joined = filler.turn(turn)
            seen = []
            for epoch in range(2):
                for batch in joined.batches(4, seed=1, epoch=epoch, drop_last=False):
                    for row, name, label in zip(batch.values, batch.ids, batch.labels["class"], strict=True):
                        number, view = map(int, name.split("/"))
                        np.testing.assert_array_equal(row, sample(number, view))
                        assert label == number
                        seen.append((number, view))
            assert Counter(seen) == Counter(dict.fromkeys(pairs(window, window.live(turn)), 2))
            on_disk = {int(path.name[5:]) for path in window.location.glob("slot-*")}
            assert on_disk <= set(range(turn, turn + 4))


def test_a_slot_begun_is_gone_on_with_and_a_damaged_one_written_again(window: Window) -> None:
    samples, views = window.contents(0)
    with window.writer(0) as writer:
        fill(writer, samples[:2], views[:2])
    assert not window.has(0)
    with Filler(window, fill) as filler:
        filler.turn(0)
    shard = next(path for path in window.folder(1).glob("train/values/0/c/**/*") if path.is_file())
    shard.unlink()
    assert not window.has(1)
    with Filler(window, fill) as filler:
        joined = filler.turn(0)
    assert sum(len(batch) for batch in joined.batches(5)) == 15


def test_a_slot_with_a_hole_is_filled_where_it_lacks_samples(window: Window) -> None:
    """A killed writer may have finished a later shard and not an earlier one; repair forgets any."""
    samples, views = window.contents(0)
    spec = replace(SPEC, samples=5, shard_samples=2, chunk_samples=2)
    with create(window.folder(0), window.slot_key(0), [spec], window.storage) as writer:
        fill(writer, samples, views)
        writer.commit()
    shards = sorted(path for path in window.folder(0).glob("train/values/0/c/**/*") if path.is_file())
    assert len(shards) == 3
    shards[1].unlink()
    repair(window.folder(0)).close()
    with Filler(window, fill) as filler:
        joined = filler.turn(0)
        found = {name: row for b in joined.batches(5) for name, row in zip(b.ids, b.values, strict=True)}
    for number, view in pairs(window, window.live(0)):
        np.testing.assert_array_equal(found[f"{number}/{view}"], sample(number, view))


def test_begun_again_a_window_takes_no_more_than_its_slots(window: Window) -> None:
    """Nothing that a later turn, or another window, left there stays beside what is filled now."""
    with Filler(window, fill) as filler:
        filler.turn(20)
    held: set[int] = set()

    def counts(writer: CacheWriter, samples: np.ndarray, views: np.ndarray) -> None:  # type: ignore[type-arg]
        held.add(len(list(window.location.glob("slot-*"))))
        fill(writer, samples, views)

    with Filler(window, counts) as filler:
        filler.turn(18)  # reads two that are there and one that is not
    assert max(held) <= window.slots + 1
    other = replace(window, seed=8)
    stale = [other.folder(slot) for slot in range(18, 22)]
    with Filler(other, fill) as filler:
        other.evict(18)
        assert not any(folder.exists() for folder in stale)
        filler.turn(18)


def test_a_slot_that_is_being_written_is_not_looked_into(window: Window, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files come and go."""
    with Filler(window, fill) as filler:
        filler.turn(0)
        caller, looked = threading.get_ident(), []

        def looks(folder: Path, key: Key) -> Status:
            if threading.get_ident() == caller:
                looked.append(folder.name)
            return inspect(folder, key)

        monkeypatch.setattr("activation_cache.window.inspect", looks)
        filler.turn(1)
        filler.turn(2)
    assert looked == []


def test_what_fails_in_the_background_is_told(window: Window) -> None:
    def fails(writer: CacheWriter, samples: np.ndarray, views: np.ndarray) -> None:  # type: ignore[type-arg]
        if window.has(2):
            raise RuntimeError("out of memory")
        fill(writer, samples, views)

    with Filler(window, fails) as filler:
        filler.turn(0)
        with pytest.raises(RuntimeError, match="out of memory"):
            filler.turn(1)
