"""Nothing silent: whatever is done to any file of a cache, reading it raises an error that names the file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from activation_cache import CacheError, Damaged, SplitSpec, Storage, calibrate, create, make_key, open_cache, verify

SAMPLES = 3
VALUES = np.maximum(np.random.default_rng(0).standard_normal((SAMPLES, 2, 3)), 0).astype(np.float32)


def write(location: Path, storage: Storage) -> None:
    splits = [SplitSpec("train", SAMPLES, (2, 3), {"class": "int16"}, shard_samples=2)]
    calibration = calibrate([VALUES]) if storage.dtype == "uint8" else None
    with create(location, make_key({"weights": "ab"}, storage), splits, storage, calibration=calibration) as writer:
        writer.append("train", VALUES, [f"é{i}" for i in range(SAMPLES)], {"class": range(SAMPLES)})
        writer.commit()


def read_everything(location: Path) -> object:
    split = open_cache(location).splits["train"]
    assert split.ids
    assert split.labels
    labels = np.asarray(split.labels["class"])
    return [
        (batch.values.tobytes(), batch.ids, labels[batch.indices].tolist())  # type: ignore[union-attr]
        for batch in split.batches(2, drop_last=False, threads=0)
    ]


def is_noticed(location: Path, path: str) -> bool:
    """Whether reading, or for what a reader does not use, verifying, raises an error that names the file."""
    try:
        read_everything(location)
    except CacheError as error:
        return path in str(error)
    return path in verify(location).damaged


@pytest.fixture(
    params=[
        pytest.param(Storage(), marks=pytest.mark.long, id="float32"),
        pytest.param(Storage("uint8", "lz4"), id="uint8+lz4"),
        pytest.param(Storage("float16", "zstd"), marks=pytest.mark.long, id="float16+zstd"),
    ]
)
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write(tmp_path / "cache", request.param)
    return tmp_path / "cache"


def files(cache: Path) -> list[str]:
    return sorted(p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file() and "lock" not in p.name)


def test_every_byte_flipped(cache: Path) -> None:
    rng = np.random.default_rng(1)
    before = read_everything(cache)
    for path in files(cache):
        data = (cache / path).read_bytes()
        for at in range(len(data)):
            flipped = bytearray(data)
            flipped[at] ^= int(rng.integers(1, 256))
            (cache / path).write_bytes(flipped)
            assert is_noticed(cache, path), f"byte {at} of {path} was changed, and nobody noticed"
        (cache / path).write_bytes(data)
    assert read_everything(cache) == before


def test_every_file_removed_truncated_or_lengthened(cache: Path) -> None:
    for path in files(cache):
        data = (cache / path).read_bytes()
        for damaged in (None, b"", data[:-1], data[: len(data) // 2], data + b"\0", data + data):
            (cache / path).unlink()
            if damaged is not None:
                (cache / path).write_bytes(damaged)
            if damaged is None and path == "record/commit.json":
                with pytest.raises(CacheError, match="not finished"):
                    open_cache(cache)
            else:
                assert is_noticed(cache, path), f"{path} with {damaged and len(damaged)} bytes went unnoticed"
            (cache / path).write_bytes(data)


def test_good_shards_in_the_wrong_place(cache: Path) -> None:
    one, other = (cache / f"train/values/0/c/{i}/0/0" for i in (0, 1))
    shutil.copy(one, cache / "kept")
    shutil.copy(other, one)
    shutil.copy(cache / "kept", other)
    with pytest.raises(Damaged):
        read_everything(cache)


def test_an_edited_shape(cache: Path) -> None:
    path = "train/values/0/zarr.json"
    data = (cache / path).read_bytes()
    edited = data.replace(b'"shape": [3,', b'"shape": [2,')
    assert edited != data
    (cache / path).write_bytes(edited)
    assert is_noticed(cache, path)


def test_damaged_offsets_of_ragged_samples_are_reported(tmp_path: Path) -> None:
    spec = SplitSpec("train", 3, (None, 2), longest=5)
    with create(tmp_path, make_key({}, Storage()), [spec], Storage()) as writer:
        writer.append("train", [np.ones((n, 2), np.float32) for n in (2, 5, 3)], ["0", "1", "2"])
        writer.commit()
    path = "train/offsets/values/0/c/0/0"
    data = (tmp_path / path).read_bytes()
    for damaged in (bytes([data[0] ^ 1]) + data[1:], data[:-1]):
        (tmp_path / path).write_bytes(damaged)
        assert list(verify(tmp_path).damaged) == [path]
