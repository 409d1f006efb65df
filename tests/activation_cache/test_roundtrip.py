"""What is written comes back, through this package and through plain zarr-python alike."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_cache import SplitSpec, Storage, calibrate, create, make_key, open_cache
from activation_cache.format.quantise import from_bfloat16

DTYPES = ("float32", "float16", "bfloat16", "uint8")
CODECS = ("none", "lz4", "zstd")


def activations(rng: np.random.Generator, *shape: int) -> np.ndarray[Any, Any]:
    """Like those after a ReLU: half zeros, each channel of its own scale."""
    return np.maximum(rng.standard_normal(shape), 0).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    codec=st.sampled_from(CODECS),
    samples=st.integers(0, 23),
    shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    shard=st.none() | st.integers(1, 9),
    chunk=st.none() | st.integers(1, 5),
    views=st.integers(1, 2),
    piece=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_direct_reads_equal_zarr_python(
    dtype: Any,
    codec: Any,
    samples: int,
    shape: tuple[int, ...],
    shard: int | None,
    chunk: int | None,
    views: int,
    piece: int,
    seed: int,
) -> None:
    if dtype == "uint8" and not shape:
        shape = (3,)
    rng = np.random.default_rng(seed)
    values = [activations(rng, samples, *shape) for _ in range(views)]
    storage = Storage(dtype, codec)
    spec = SplitSpec("train", samples, shape, {"class": "int64"}, views, shard_samples=shard, chunk_samples=chunk)
    calibration = calibrate([*values, np.ones((1, *shape), np.float32)]) if dtype == "uint8" else None
    ids = [f"sample {i} é" for i in range(samples)]
    classes = rng.integers(0, 10, samples)
    with tempfile.TemporaryDirectory() as folder:
        location = Path(folder, "cache")
        with create(location, make_key({"seed": seed}, storage), [spec], storage, calibration=calibration) as writer:
            for view in range(views):
                for at in range(0, samples, piece):
                    part = slice(at, at + piece)
                    labels = {"class": classes[part]} if view == 0 else {}
                    writer.append("train", values[view][part], ids[part], labels, view)
            writer.commit()
        split = open_cache(location).splits["train"]
        assert split.ids == ids
        np.testing.assert_array_equal(split.labels["class"], classes)
        group = zarr.open_group(location, mode="r")
        np.testing.assert_array_equal(group["train/labels/class"][:], classes)
        for view in range(views):
            plain = group[f"train/values/{view}"][...]
            chosen = rng.permutation(samples)
            np.testing.assert_array_equal(split.read(chosen, view), plain[chosen])
            batches = list(split.batches(4, seed=seed, epoch=1, drop_last=False, view=view))
            assert sorted(i for b in batches for i in b.indices.tolist()) == list(range(samples))
            for batch in batches:
                np.testing.assert_array_equal(batch.values, plain[batch.indices])
                np.testing.assert_array_equal(batch.labels["class"], classes[batch.indices])
                assert batch.ids == [ids[i] for i in batch.indices]
            back = split.dequantise(plain)
            if dtype == "float32":
                np.testing.assert_array_equal(plain, values[view])
            elif dtype == "float16":
                np.testing.assert_array_equal(plain, values[view].astype(np.float16))
            elif dtype == "bfloat16":
                np.testing.assert_allclose(from_bfloat16(plain), values[view], rtol=2**-8)
            else:
                codes = plain.astype(np.int64)
                below, above = (split.dequantise(np.clip(codes + step, 0, 255)) for step in (-1, 1))
                step = np.maximum(above - back, back - below)
                assert (np.abs(back - values[view]) <= 0.501 * step).all()


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    codec=st.sampled_from(CODECS),
    lengths=st.lists(st.integers(0, 9), max_size=12),
    axis=st.integers(0, 1),
    shard=st.none() | st.integers(1, 5),
    chunk=st.none() | st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_ragged_samples_come_back_without_padding(
    dtype: Any, codec: Any, lengths: list[int], axis: int, shard: int | None, chunk: int | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shape: tuple[int | None, ...] = (None, 3) if axis == 0 else (3, None)
    values = [activations(rng, *(n if size is None else size for size in shape)) for n in lengths]
    phones = [rng.integers(0, 40, n) for n in lengths]
    storage = Storage(dtype, codec)
    calibration = calibrate([np.full((1, 3, 1), 5.0)]) if dtype == "uint8" else None
    if calibration is not None and axis == 0:
        calibration = calibrate([np.full((1, 1, 3), 5.0)], channel_axis=1)
    spec = SplitSpec("train", len(lengths), shape, {"phones": "int16[]"}, 1, 9, shard, chunk)
    with tempfile.TemporaryDirectory() as folder:
        location = Path(folder, "cache")
        with create(location, make_key({}, storage), [spec], storage, calibration=calibration) as writer:
            for i, value in enumerate(values):
                writer.append("train", [value], [str(i)], {"phones": [phones[i]]})
            writer.commit()
        split = open_cache(location).splits["train"]
        for want, have in zip(phones, split.labels["phones"], strict=True):
            np.testing.assert_array_equal(have, want)
        group = zarr.open_group(location, mode="r")
        offsets = group["train/offsets/values/0"][...]
        for i, sample in enumerate(split.read(range(len(lengths)))):
            start, stop = offsets[i]
            plain = np.moveaxis(group["train/values/0"][start:stop], 0, axis)
            np.testing.assert_array_equal(sample, plain)
            assert sample.shape == values[i].shape
            if dtype == "float32":
                np.testing.assert_array_equal(sample, values[i])
        seen = [i for b in split.batches(2, drop_last=False, threads=1) for i in b.indices.tolist()]
        assert sorted(seen) == list(range(len(lengths)))


def test_the_metadata_opens_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    with create(tmp_path / "c", make_key({}, Storage()), [SplitSpec("train", 2, (3,))], Storage()) as writer:
        writer.append("train", np.ones((2, 3)), ["a", "b"])
        writer.commit()
    group = zarr.open_group(tmp_path / "c", mode="r")
    names = {name for name, _ in group.members()}
    assert names == {"train", "record"}
    assert not recwarn.list


def test_a_cache_says_what_it_holds(tmp_path: Path) -> None:
    storage = Storage("float16", "lz4")
    key = make_key({"made": "here"}, storage)
    with create(tmp_path / "cache", key, [SplitSpec("train", 3, (4, 2), views=2)], storage) as writer:
        for view in range(2):
            writer.append("train", np.zeros((3, 4, 2), np.float16), list("abc"), view=view)
        writer.commit()
    cache = open_cache(tmp_path / "cache")
    assert repr(cache).startswith(f"<cache {tmp_path / 'cache'}: train: 3 samples (4, 2); float16, lz4, ")
    assert f"{cache.nbytes:,} bytes" in repr(cache)
    assert repr(cache.splits["train"]) == "<split train: 3 samples of shape (4, 2), 2 views, float16>"
