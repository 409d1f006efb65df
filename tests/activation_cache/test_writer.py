"""Writing: resuming, several ranks, several views, and everything that is refused."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from activation_cache import (
    AlreadyCommitted,
    Calibration,
    FormatError,
    InvalidSamples,
    Locked,
    NotCommitted,
    SplitSpec,
    Stale,
    Storage,
    calibrate,
    create,
    differences,
    inspect,
    make_key,
    open_cache,
    verify,
)
from activation_cache.format import key as key_module
from activation_cache.format import layout, record
from activation_cache.format.quantise import BEND, dequantise, first_not_finite, quantise, to_bfloat16
from activation_cache.format.record import read_entry, read_plan
from activation_cache.store.base import LocalStore
from activation_cache.writing import creation

FLOAT32 = Storage()
KEY = make_key({"weights": "ab", "recipe": {"width": 3}}, FLOAT32)
SPEC = SplitSpec("train", 10, (4,), {"class": "uint8"}, shard_samples=3)
VALUES = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
IDS = [f"image {i}" for i in range(10)]
CLASSES = np.arange(10)


def append(writer, part: slice, view: int = 0) -> None:  # type: ignore[no-untyped-def]
    writer.append("train", VALUES[part] + view, IDS[part], {"class": CLASSES[part]} if view == 0 else None, view)


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="two splits have one name: train, test, train"):
        create(tmp_path / "c", KEY, [SPEC, dataclasses.replace(SPEC, name="test"), SPEC], FLOAT32)
    assert not (tmp_path / "c").exists()
    with pytest.raises(FormatError, match="levels 0 to 9, got 10"):
        Storage("float32", "lz4", 10)


def test_goes_on_behind_the_last_whole_shard(tmp_path: Path) -> None:
    with create(tmp_path, KEY, [SPEC], FLOAT32) as writer:
        append(writer, slice(0, 8))
        assert writer.done("train") == 8
    assert inspect(tmp_path, KEY).state == "partial"
    assert inspect(tmp_path, KEY).samples == {"train": 6}
    with pytest.raises(NotCommitted, match="goes on from the last whole shard"):
        open_cache(tmp_path)
    with create(tmp_path, KEY, [SPEC], FLOAT32) as writer:
        assert writer.done("train") == 6
        assert writer.pending("train") == [range(6, 10)]
        append(writer, slice(6, 10))
        writer.commit()
    split = open_cache(tmp_path, KEY).splits["train"]
    np.testing.assert_array_equal(split.read(range(10)), VALUES)
    assert split.ids == IDS
    assert inspect(tmp_path, KEY).state == "valid"
    assert verify(tmp_path).ok


def test_a_caller_that_loses_its_place_is_told(tmp_path: Path) -> None:
    with create(tmp_path, KEY, [SPEC], FLOAT32) as writer:
        append(writer, slice(0, 6))
    with (
        create(tmp_path, KEY, [SPEC], FLOAT32) as writer,
        pytest.raises(InvalidSamples, match="'image 0' was appended"),
    ):
        append(writer, slice(0, 4))


def test_what_is_missing_is_named_at_the_commit(tmp_path: Path) -> None:
    with create(tmp_path, KEY, [SPEC], FLOAT32) as writer:
        append(writer, slice(0, 4))
        with pytest.raises(NotCommitted, match="'train', view 0 lacks samples 3 to 5, 6 to 8, 9 to 9"):
            writer.commit()


def test_several_ranks_write_disjoint_shards(tmp_path: Path) -> None:
    writers = [create(tmp_path, KEY, [SPEC], FLOAT32, rank=rank, world_size=3) for rank in range(3)]
    parts = [part for writer in writers for part in writer.pending("train")]
    assert sorted(i for part in parts for i in part) == list(range(10))
    with pytest.raises(Locked, match="pid"):
        create(tmp_path, KEY, [SPEC], FLOAT32, rank=1, world_size=3)
    with pytest.raises(Locked):
        create(tmp_path, KEY, [SPEC], FLOAT32)
    for writer in reversed(writers):
        for part in writer.pending("train"):
            append(writer, slice(part.start, part.stop))
        if writer is not writers[0]:
            writer.close()
    writers[0].commit()
    np.testing.assert_array_equal(open_cache(tmp_path, KEY).splits["train"].read(range(10)), VALUES)


def test_views(tmp_path: Path) -> None:
    spec = SplitSpec("train", 10, (4,), {"class": "uint8"}, views=3)
    with create(tmp_path, KEY, [spec], FLOAT32) as writer:
        for view in range(3):
            append(writer, slice(0, 10), view)
        writer.commit()
    split = open_cache(tmp_path).splits["train"]
    for view in range(3):
        np.testing.assert_array_equal(split.read(range(10), view), VALUES + view)
    with pytest.raises(FormatError, match="has no view 3"):
        split.batches(2, view=3)


def test_refuses_to_write_over_another_cache(tmp_path: Path) -> None:
    other = make_key({"weights": "cd", "recipe": {"width": 3}}, FLOAT32)
    with create(tmp_path, KEY, [SPEC], FLOAT32) as writer:
        append(writer, slice(0, 8))
    with pytest.raises(Stale, match=r'weights \(cached "ab", wanted "cd"\)') as caught:
        create(tmp_path, other, [SPEC], FLOAT32)
    assert caught.value.differences == {"weights": ("ab", "cd")}
    with create(tmp_path, other, [SPEC], FLOAT32, replace=True) as writer:
        append(writer, slice(0, 10))
        writer.commit()
    with pytest.raises(AlreadyCommitted):
        create(tmp_path, other, [SPEC], FLOAT32)
    with pytest.raises(Stale, match="weights"):
        open_cache(tmp_path, KEY)
    assert inspect(tmp_path, KEY).state == "stale"
    with create(tmp_path, KEY, [SPEC], FLOAT32, replace=True):
        assert inspect(tmp_path, KEY).state == "partial"


def test_an_unfinished_cache_keeps_its_calibration(tmp_path: Path) -> None:
    storage, key = Storage("uint8", "lz4"), make_key({}, Storage("uint8"))
    first = calibrate([np.abs(VALUES)])
    with create(tmp_path, key, [SPEC], storage, calibration=first) as writer:
        writer.append("train", np.abs(VALUES[:5]), IDS[:5], {"class": CLASSES[:5]})

    def never() -> Calibration:
        raise AssertionError("calibrated again")

    with create(tmp_path, key, [SPEC], storage, calibration=never) as writer:
        assert writer.calibration == first
        writer.append("train", np.abs(VALUES[3:]), IDS[3:], {"class": CLASSES[3:]})
        writer.commit()
    split = open_cache(tmp_path).splits["train"]
    widest = np.abs(VALUES).max() / 255 * 2  # a step, at the maximum
    np.testing.assert_allclose(split.dequantise(split.read(range(10))), np.abs(VALUES), atol=widest * 0.501)


@pytest.mark.parametrize(
    ("values", "ids", "labels", "message"),
    [
        (np.ones((2, 5)), ["a", "b"], {"class": [1, 2]}, "have shape"),
        (np.ones((2, 4)), ["a"], {"class": [1]}, "1 ids were given, and 2 values"),
        (np.ones((2, 4)), ["a", "a"], {"class": [1, 2]}, "'a' was appended before"),
        (np.ones((2, 4)), ["a", "b"], {}, "labels"),
        (np.ones((2, 4)), ["a", "b"], {"class": [1, 300]}, "not what uint8 holds"),
        (np.ones((2, 4), np.int64), ["a", "b"], {"class": [1, 2]}, "int64 cannot be stored as float32"),
        (np.ones((2, 4)), ["a", "\udcff.png"], {"class": [1, 2]}, "cannot be written as UTF-8"),
        (np.ones((2, 4)), ["a", "b"], {"class": ["one", "two"]}, "not what uint8 holds"),
        (np.ones((11, 4)), [str(i) for i in range(11)], {"class": range(11)}, "only 10 are still to come"),
    ],
)
def test_refuses_samples_that_it_cannot_keep(tmp_path: Path, values, ids, labels, message) -> None:  # type: ignore[no-untyped-def]
    with create(tmp_path, KEY, [SPEC], FLOAT32) as writer, pytest.raises(InvalidSamples, match=message):
        writer.append("train", values, ids, labels)


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_names_the_sample_that_is_not_finite(tmp_path: Path, dtype, value, threads) -> None:  # type: ignore[no-untyped-def]
    storage = Storage(dtype)
    values = np.ones((10, 4), np.float64)
    values[7, 2] = value
    calibration = calibrate([np.ones((1, 4))]) if dtype == "uint8" else None
    spec = SplitSpec("train", 10, (4,))
    writer = create(tmp_path, make_key({}, storage), [spec], storage, calibration=calibration, threads=threads)
    writer.append("train", values, IDS)
    with pytest.raises(InvalidSamples, match="'image 7' has values not finite"):
        writer.commit()
    writer.close()
    assert inspect(tmp_path).state == "partial"


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000, 0x7FFF8000])
def test_every_nan_is_found_in_bfloat16(bits: int) -> None:
    values = np.array([[1, 2], [3, 4]], np.float32)
    values.view(np.uint32)[1, 0] = bits
    stored = np.empty(values.shape, np.uint16)
    to_bfloat16(values, stored)
    assert first_not_finite(stored, "bfloat16") == 1


def test_counts_what_saturates(tmp_path: Path) -> None:
    storage = Storage("uint8")
    calibration = calibrate([np.array([[1, 1, 1, 1], *[[0.1, 0.1, 0.1, -1]] * 20])])
    with create(tmp_path, make_key({}, storage), [SplitSpec("a", 3, (4,))], storage, calibration=calibration) as writer:
        writer.append("a", np.array([[0, 0.6, 1, 2], [3, -1, 0, -1], [1e9, -1e9, 0.001, -2]]), ["a", "b", "c"])
        writer.commit()
        assert writer.saturated == {"a": 6}
    stored = [[0, 191, 255, 255], [255, 0, 0, 0], [255, 0, 1, 0]]
    np.testing.assert_array_equal(open_cache(tmp_path).splits["a"].read([0, 1, 2]), stored)


def test_steps_are_narrow_near_zero_where_no_number_is_negative() -> None:
    after_relu, signed = calibrate([np.array([[1.0], *[[0.1]] * 20])]), calibrate([np.array([[-1.0], [1.0]])])
    codes = np.arange(256)[:, None]
    for calibration, first, last in ((after_relu, 0.5 / 255, 2 / 255), (signed, 2 / 255, 2 / 255)):
        values = dequantise(codes, calibration)
        steps = np.diff(values[:, 0])
        assert np.isclose(steps[0], first, rtol=0.01)
        assert np.isclose(steps[-1], last, rtol=0.01)
        stored = np.empty(codes.shape, np.uint8)
        assert quantise(values, calibration, stored) == 0
        np.testing.assert_array_equal(stored, codes)
    assert dequantise(codes, after_relu)[[0, 255], 0].tolist() == [0, 1]


@pytest.mark.parametrize(("power", "bent"), [(0.5, False), (1, False), (4, True)])
def test_steps_are_bent_where_that_leaves_less_error(power: float, bent: bool) -> None:
    values = np.random.default_rng(0).uniform(0, 7, (64, 3, 10, 10)) ** power
    chosen = calibrate([values[:40], values[40:]])
    assert chosen.bend.any() == bent
    errors = {}
    for bend in (np.float32(0), BEND):
        scale = np.full(3, values.max() / 255 * (1 - 255 * bend), np.float32)
        one = Calibration(0, scale, np.zeros(3, np.float32), np.full(3, bend))
        stored = np.empty(values.shape, np.uint8)
        quantise(values, one, stored)
        errors[bend] = np.linalg.norm(dequantise(stored, one) - values)
    assert (errors[BEND] < errors[0]) == bent


def test_what_revives_in_a_dead_channel_is_counted() -> None:
    stored = np.empty((1, 2, 3), np.uint8)
    dead = calibrate([np.array([[[0, 0, 0], [1, 2, 3]]])])
    assert quantise(np.array([[[0, 1e-9, 1e30], [1, 2, 3]]]), dead, stored) == 2


def test_views_may_be_filled_side_by_side(tmp_path: Path) -> None:
    spec = SplitSpec("train", 4, (4,), views=4, shard_samples=2)
    values = np.arange(16, dtype=np.float32).reshape(4, 4)
    for threads in (0, 1):
        with create(tmp_path / str(threads), KEY, [spec], FLOAT32, threads=threads) as writer:
            for i in range(4):
                for view in range(4):
                    writer.append("train", values[i : i + 1] + view, [f"image {i}"], view=view)
            writer.commit()
        split = open_cache(tmp_path / str(threads)).splits["train"]
        for view in range(4):
            np.testing.assert_array_equal(split.read(range(4), view), values + view)


def test_a_cache_of_another_format_is_stale_and_can_be_replaced(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    old, unfinished = tmp_path / "old", tmp_path / "unfinished"
    with monkeypatch.context() as then:
        for module in (layout, key_module, record, creation):
            then.setattr(module, "FORMAT", 1)
        for place in (old, unfinished):
            with create(place, make_key({}, FLOAT32), [SplitSpec("train", 2, (4,))], FLOAT32) as writer:
                writer.append("train", np.ones((2, 4)), ["a", "b"])
                if place == old:
                    writer.commit()
    wanted = make_key({}, FLOAT32)
    for place in (old, unfinished):
        found = inspect(place, wanted)
        assert found.state == "stale"
        assert differences(found.key or {}, wanted) == {"format": (1, layout.FORMAT)}
        for use in (partial(open_cache, place), partial(create, place, wanted, [], FLOAT32), partial(verify, place)):
            with pytest.raises(FormatError, match="has format 'activation-cache' 1, and this package reads"):
                use()
        with create(place, wanted, [SplitSpec("train", 2, (4,))], FLOAT32, replace=True):
            assert inspect(place, wanted).state == "partial"


def test_refused_samples_leave_no_trace(tmp_path: Path) -> None:
    spec = SplitSpec("train", 3, (4,), {"class": "int8"})
    with create(tmp_path, KEY, [spec], FLOAT32) as writer:
        for i, label in enumerate([1, 300, 2]):
            if label == 300:
                with pytest.raises(InvalidSamples, match="not what int8 holds"):
                    writer.append("train", VALUES[i : i + 1], IDS[i : i + 1], {"class": [label]})
                with pytest.raises(InvalidSamples, match="have shape"):
                    writer.append("train", VALUES[i : i + 1, :2], IDS[i : i + 1], {"class": [3]})
                assert writer.pending("train") == [range(1, 3)]
                label = 3
            writer.append("train", VALUES[i : i + 1], IDS[i : i + 1], {"class": [label]})
        writer.commit()
    split = open_cache(tmp_path).splits["train"]
    np.testing.assert_array_equal(split.labels["class"], [1, 3, 2])
    np.testing.assert_array_equal(split.read(range(3)), VALUES[:3])
    assert split.ids == IDS[:3]


def test_a_sample_given_up_is_missing_at_the_commit(tmp_path: Path) -> None:
    spec = SplitSpec("train", 3, (4,), {"class": "int8"})
    with create(tmp_path, KEY, [spec], FLOAT32) as writer:
        for i, label in enumerate([1, 300, 2]):
            with suppress(InvalidSamples):
                writer.append("train", VALUES[i : i + 1], IDS[i : i + 1], {"class": [label]})
        with pytest.raises(NotCommitted, match="lacks samples"):
            writer.commit()


def test_a_shard_with_fewer_labels_than_samples_is_written_again(tmp_path: Path) -> None:
    with create(tmp_path, KEY, [SPEC], FLOAT32) as writer:
        append(writer, slice(0, 6))
    store, plan = LocalStore(tmp_path), read_plan(LocalStore(tmp_path))
    assert plan is not None
    entry = read_entry(store, plan, "train", 0, 1)
    assert entry is not None
    short = dataclasses.replace(entry, labels={"class": entry.labels["class"][:2]})
    store.write("record/train/0/1.json", [short.to_bytes(plan, "train", 0, 1)])
    with create(tmp_path, KEY, [SPEC], FLOAT32) as writer:
        assert writer.pending("train") == [range(3, 10)]


def test_a_shard_holds_samples_of_one_dtype(tmp_path: Path) -> None:
    with create(tmp_path, KEY, [SPEC], FLOAT32) as writer:
        writer.append("train", VALUES[:1].astype(np.float16), IDS[:1], {"class": [0]})
        with pytest.raises(InvalidSamples, match="one dtype, got float16, float32"):
            append(writer, slice(1, 3))


def test_two_ranks_with_the_same_ids_are_not_committed(tmp_path: Path) -> None:
    spec = SplitSpec("train", 4, (4,), shard_samples=2)
    writers = [create(tmp_path, KEY, [spec], FLOAT32, rank=rank, world_size=2) for rank in range(2)]
    for writer in writers:
        writer.append("train", VALUES[:2], IDS[:2])
    writers[1].close()
    with pytest.raises(InvalidSamples, match="two ranks appended the id 'image 0'"):
        writers[0].commit()
    writers[0].close()
    assert inspect(tmp_path).state == "partial"


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_refuses_labels_that_are_not_finite(tmp_path: Path, value: float) -> None:
    spec = SplitSpec("train", 2, (4,), {"level": "float32"})
    with (
        create(tmp_path, KEY, [spec], FLOAT32) as writer,
        pytest.raises(InvalidSamples, match="not what float32 holds"),
    ):
        writer.append("train", VALUES[:2], IDS[:2], {"level": [1.0, value]})


def test_refuses_a_range_wider_than_float32() -> None:
    with pytest.raises(InvalidSamples, match="further apart"):
        calibrate([np.array([[-3e38, 3e38]], np.float32).reshape(1, 1, 2)])


@pytest.mark.parametrize("indices", [[1.7], np.array([True, False, True]), 3, [[1, 2]]])
def test_refuses_indices_that_are_no_sample_numbers(tmp_path: Path, indices) -> None:  # type: ignore[no-untyped-def]
    with create(tmp_path, KEY, [SPEC], FLOAT32) as writer:
        append(writer, slice(0, 10))
        writer.commit()
    split = open_cache(tmp_path).splits["train"]
    with pytest.raises(IndexError, match="sample numbers, integers"):
        split.read(indices)
    assert len(split.read([])) == 0
