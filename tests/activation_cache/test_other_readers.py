"""A cache read without this package, by what other people built: tensorstore, and zarrs behind zarr-python.

Only README.md is used here to make numbers of what they return.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr

from activation_cache import SplitSpec, Storage, calibrate, create, make_key

Array = npt.NDArray[Any]
Reader = Callable[[Path], Array]

DTYPES = ("float32", "float16", "bfloat16", "uint8")
CODECS = ("none", "lz4", "zstd")
SAMPLES = 21
NAMES = [f"sample {i} é" for i in range(SAMPLES)]


def with_tensorstore(path: Path) -> Array:
    tensorstore = pytest.importorskip("tensorstore")
    kept = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return np.array(tensorstore.open(kept, read=True).result().read().result())


def with_zarrs(path: Path) -> Array:
    pytest.importorskip("zarrs")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}):
        array = zarr.open_array(path, mode="r")
        return np.asarray(array[...])


READERS = [pytest.param(with_tensorstore, id="tensorstore"), pytest.param(with_zarrs, id="zarrs")]


def activations(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    """Half zeros, each channel (axis 1) of its own scale."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-2, 2, (1, shape[1], *[1] * (len(shape) - 2)))
    return (np.maximum(rng.standard_normal(shape), 0) * scale).astype(np.float32)


def numbers(split: Path, stored: Array, dtype: str, read: Reader) -> Array:
    """What README.md says the stored ones stand for; channels along axis 1 of `stored`."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype == "uint8":
        attributes = json.loads((split / "zarr.json").read_text())["attributes"]["activation_cache"]
        assert attributes["calibration_axis"] == 0
        shape = (-1, *[1] * (stored.ndim - 2))
        scale, offset, bend = (
            read(split / "calibration" / name).reshape(shape) for name in ("scale", "offset", "bend")
        )
        return scale * stored.astype(np.float32) / (1 - bend * stored) + offset
    return stored.astype(np.float32)


def assert_close(found: Array, values: Array, dtype: str) -> None:
    """As near as the dtype goes: exactly, to half of its last place, or to half of a step, which for uint8 is
    (1 + t)^2 / 2 of an even one at the fraction t of the range.
    """
    if dtype == "uint8":
        most = values.max(axis=(0, *range(2, values.ndim)), keepdims=True)
        step = (1 + values / most) ** 2 / 2 * most / 255
        assert (np.abs(found - values) <= 0.51 * step).all()
    else:
        kept = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
        np.testing.assert_allclose(found, values, rtol=kept, atol=1e-7 if dtype == "float16" else 0)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_implementation_reads_the_same_numbers(tmp_path: Path, dtype: Any, codec: Any, read: Reader) -> None:
    values = [activations(seed, SAMPLES, 5, 4, 3) for seed in range(2)]
    classes, lists = np.arange(SAMPLES) - 7, [np.arange(i % 3, dtype=np.int16) for i in range(SAMPLES)]
    storage = Storage(dtype, codec)
    labels = {"class": "int64", "phones": "int16[]"}
    spec = SplitSpec("train", SAMPLES, (5, 4, 3), labels, 2, shard_samples=8, chunk_samples=2)
    calibration = calibrate(values) if dtype == "uint8" else None
    with create(tmp_path, make_key({}, storage), [spec], storage, calibration=calibration) as writer:
        for view in range(2):
            given = {"class": classes, "phones": lists} if view == 0 else {}
            writer.append("train", values[view], NAMES, given, view)
        writer.commit()
    split = tmp_path / "train"
    for view in range(2):
        stored = read(split / f"values/{view}")
        assert stored.dtype == storage.stored
        together = np.concatenate(values)  # the range that was calibrated
        found = [numbers(split, read(split / f"values/{one}"), dtype, read) for one in range(2)]
        assert_close(np.concatenate(found), together, dtype)
    np.testing.assert_array_equal(read(split / "labels/class"), classes)
    flat, offsets = read(split / "labels/phones"), read(split / "offsets/labels/phones")
    for want, (start, stop) in zip(lists, offsets, strict=True):
        np.testing.assert_array_equal(flat[start:stop], want)
    names, offsets = read(split / "ids"), read(split / "offsets/ids")
    assert [names[start:stop].tobytes().decode() for start, stop in offsets] == NAMES


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_and_so_it_does_where_lengths_differ(tmp_path: Path, dtype: Any, codec: Any, read: Reader) -> None:
    lengths = [(7 * i) % 10 for i in range(SAMPLES)]
    values = [activations(i, 1, 3, length)[0] for i, length in enumerate(lengths)]
    storage = Storage(dtype, codec)
    spec = SplitSpec("train", SAMPLES, (3, None), longest=9, shard_samples=4, chunk_samples=5)
    joined = np.concatenate(values, axis=1)
    calibration = calibrate([joined[None]]) if dtype == "uint8" else None
    with create(tmp_path, make_key({}, storage), [spec], storage, calibration=calibration) as writer:
        writer.append("train", values, NAMES)
        writer.commit()
    split = tmp_path / "train"
    stored, offsets = read(split / "values/0"), read(split / "offsets/values/0")
    assert (np.diff(offsets, axis=1)[:, 0] == lengths).all()
    rows = np.concatenate([stored[start:stop] for start, stop in offsets])
    assert_close(numbers(split, rows, dtype, read), joined.T, dtype)


def test_zarrs_itself_decodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Were its pipeline not in use, the tests above would only try zarr-python twice."""
    zarrs = pytest.importorskip("zarrs")
    used = []
    decode = zarrs.ZarrsCodecPipeline.read

    async def counted(*arguments: Any, **named: Any) -> Any:
        used.append(True)
        return await decode(*arguments, **named)

    monkeypatch.setattr(zarrs.ZarrsCodecPipeline, "read", counted)
    with create(tmp_path, make_key({}, Storage()), [SplitSpec("train", 2, (3,))], Storage()) as writer:
        writer.append("train", np.ones((2, 3)), ["a", "b"])
        writer.commit()
    np.testing.assert_array_equal(with_zarrs(tmp_path / "train/values/0"), np.ones((2, 3)))
    assert used
