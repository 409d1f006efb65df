"""Caches that were written when their format was new are read by every later version, to the same numbers.

`pytest --regenerate-golden tests/golden/test_format.py` adds those of the present format. Caches of an earlier format
that is no longer read are refused as such; they stay here to show it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from activation_cache import FORMAT, FormatError, SplitSpec, Storage, calibrate, create, make_key, open_cache, verify
from activation_cache.format.quantise import from_bfloat16

CACHES = Path(__file__).parent / "caches"
SAMPLES, SHAPE, VIEWS = 7, (3, 4, 2), 2
KINDS = ("float32-none", "float16-lz4", "bfloat16-zstd", "uint8-zstd", "ragged")


def value(sample: int, view: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray[Any, Any]:
    """Sums of eighths, which float32 and bfloat16 hold exactly."""
    steps = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    return np.maximum(((steps * 5 + sample * 3 + view) % 17 - 4) / 8, 0).astype(np.float32)


def length(sample: int) -> int:
    return 1 + sample * 3 % 5


def write(kind: str, location: Path) -> None:
    ids = [f"sample {number} é" for number in range(SAMPLES)]
    classes = np.arange(SAMPLES) % 3
    if kind == "ragged":
        spec = SplitSpec("train", SAMPLES, (3, None), {"phone": "int16[]"}, longest=5, shard_samples=3)
        storage = Storage("float16", "lz4")
        with create(location, make_key({"kind": kind}, storage), [spec], storage) as writer:
            for number in range(SAMPLES):
                one = value(number, 0, (3, length(number)))
                phones = [np.arange(length(number), dtype=np.int16)]
                writer.append("train", [one], ids[number : number + 1], {"phone": phones})
            writer.commit()
        return
    dtype, codec = kind.split("-")
    storage = Storage(dtype, codec)  # type: ignore[arg-type]
    specs = [
        SplitSpec("train", SAMPLES, SHAPE, {"class": "int64"}, views=VIEWS, shard_samples=3, chunk_samples=2),
        SplitSpec("validation", 2, SHAPE, {"class": "int64"}),
    ]
    every = [np.stack([value(number, view) for number in range(SAMPLES)]) for view in range(VIEWS)]
    scales = calibrate(every) if dtype == "uint8" else None
    with create(location, make_key({"kind": kind}, storage), specs, storage, calibration=scales) as writer:
        for view in range(VIEWS):
            writer.append("train", every[view], ids, {"class": classes} if view == 0 else {}, view)
        writer.append("validation", every[0][:2], ids[:2], {"class": classes[:2]})
        writer.commit()


@pytest.mark.parametrize("kind", KINDS)
def test_present_format_is_written_down(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    archive = CACHES / f"format-{FORMAT}-{kind}.zip"
    if request.config.getoption("--regenerate-golden"):
        write(kind, tmp_path / "cache")
        shutil.make_archive(str(archive.with_suffix("")), "zip", tmp_path / "cache")
    assert archive.exists(), "the format has changed: pytest --regenerate-golden tests/golden/test_format.py"


@pytest.mark.parametrize("archive", sorted(CACHES.glob("*.zip")), ids=lambda path: path.stem)
def test_caches_of_every_format_are_read_or_refused(archive: Path, tmp_path: Path) -> None:
    copy = tmp_path / "cache"
    shutil.unpack_archive(archive, copy)
    _, number, kind = archive.stem.split("-", 2)
    if int(number) != FORMAT:
        with pytest.raises(FormatError, match="format"):
            open_cache(copy)
        return
    report = verify(copy)
    assert report.ok, report
    split = open_cache(copy).splits["train"]
    assert list(split.ids) == [f"sample {number} é" for number in range(SAMPLES)]
    if kind == "ragged":
        for number, (found, phones) in enumerate(
            zip(split.read(np.arange(SAMPLES)), split.labels["phone"], strict=True)
        ):
            np.testing.assert_array_equal(found, value(number, 0, (3, length(number))))
            np.testing.assert_array_equal(phones, np.arange(length(number)))
        return
    np.testing.assert_array_equal(split.labels["class"], np.arange(SAMPLES) % 3)
    group = zarr.open_group(copy, mode="r")
    for view in range(VIEWS):
        stored = split.read(np.arange(SAMPLES), view)
        np.testing.assert_array_equal(stored, group[f"train/values/{view}"][...])
        meant = np.stack([value(number, view) for number in range(SAMPLES)])
        if kind.startswith("uint8"):
            np.testing.assert_allclose(split.dequantise(stored), meant, atol=meant.max() / 250)
        else:
            found = from_bfloat16(stored) if kind.startswith("bfloat16") else stored
            np.testing.assert_array_equal(found, meant)
