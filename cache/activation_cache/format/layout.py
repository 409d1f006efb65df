"""What lies where in a cache: dtypes, codecs, arrays, shards and chunks. README.md describes it in full."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np

from activation_cache.errors import FormatError

from .canonical import Json, digest
from .quantise import CALIBRATED, Calibration

Dtype: TypeAlias = Literal["float32", "float16", "bfloat16", "uint8"]
Codec: TypeAlias = Literal["none", "lz4", "zstd"]

FORMAT = 2  # the version of what README.md describes

STORED = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "uint8": "uint8"}  # numpy and Zarr name
LABELS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")

SHARD_BYTES = 32 << 20  # a shard's size before compression
CHUNK_SAMPLES = 256  # compressed samples below SMALL_SAMPLE bytes share a chunk with so many others
SMALL_SAMPLE = 16 << 10
TINY_SAMPLE = 512  # below so many bytes, uncompressed samples share a chunk too: 20 bytes of checksum and index each
CHUNK_BYTES = 256 << 10  # a chunk of small or ragged samples stays near this size

# Of a plan, whoever wrote it: so that a reader or writer of any is done in reasonable time and memory.
MOST_SHARDS = 1 << 22  # files: 128 TB of shards of the usual size
MOST_VIEWS = 1 << 16  # of all splits together
MOST_CHUNKS = 1 << 22  # of a shard
MOST_SHARD_BYTES = 1 << 32  # of a shard of more than one sample, before compression
MOST_BYTES = 1 << 60  # of a cache, before compression

SHUFFLED_TOGETHER = 64  # chunks, of small compressed samples

RECORD = "record"  # the folder for what is not Zarr: plan, journal, commit record
PLAN = f"{RECORD}/plan.json"
COMMIT = f"{RECORD}/commit.json"


@dataclass(frozen=True)
class Storage:
    """How numbers are stored. `level` is the codec's own; None takes 5 for lz4 and 1 for zstd."""

    dtype: Dtype = "float32"
    codec: Codec = "none"
    level: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in STORED:
            raise FormatError(f"dtype {self.dtype!r} is not stored here; choose one of {', '.join(STORED)}")
        if self.codec not in ("none", "lz4", "zstd"):
            raise FormatError(f"codec {self.codec!r} is not known here; choose one of none, lz4, zstd")
        if self.level is None:
            object.__setattr__(self, "level", {"none": 0, "lz4": 5, "zstd": 1}[self.codec])
        least, most = {"none": (0, 22), "lz4": (0, 9), "zstd": (-(1 << 17), 22)}[self.codec]
        if self.level is not None and not least <= self.level <= most:
            raise FormatError(f"{self.codec} has the levels {least} to {most}, got {self.level!r}")

    @property
    def stored(self) -> np.dtype[Any]:
        """The numpy dtype on disk and in a batch: uint16 for bfloat16, otherwise the dtype itself."""
        return np.dtype(STORED[self.dtype])


@dataclass(frozen=True)
class SplitSpec:
    """One split to be written.

    samples          how many
    shape            of one sample; at most one axis is None: ragged, of another length in every sample
    longest          for ragged samples: the greatest length that may come (a bound; nothing is padded to it)
    labels           name -> dtype, one number a sample; `int16[]` is a ragged list of int16 a sample
    views            how many augmentations of every sample, numbered from 0
    shard_samples    samples a shard file, chunk_samples: samples a chunk; None: chosen from the sample's size
    """

    name: str
    samples: int
    shape: tuple[int | None, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    views: int = 1
    longest: int | None = None
    shard_samples: int | None = None
    chunk_samples: int | None = None

    def __post_init__(self) -> None:
        for what, name in (("split", self.name), *(("label", label) for label in self.labels)):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name) or name == RECORD:
                raise FormatError(f"{what} name {name!r}: use letters, digits, _ and -, at most 64, and not {RECORD!r}")
        for label, dtype in self.labels.items():
            if dtype.removesuffix("[]") not in LABELS:
                raise FormatError(f"label {label!r} has dtype {dtype!r}; choose from {', '.join(LABELS)}, or + '[]'")
        if self.samples < 0 or self.views < 1 or any(size is not None and size < 1 for size in self.shape):
            raise FormatError(f"split {self.name!r}: samples >= 0, views >= 1 and sizes >= 1 are needed, got {self}")
        if sum(size is None for size in self.shape) > 1:
            raise FormatError(f"split {self.name!r}: one axis may be ragged (None), got {self.shape}")
        if (None in self.shape) != (self.longest is not None) or (self.longest is not None and self.longest < 1):
            raise FormatError(f"split {self.name!r}: `longest` goes with None in {self.shape}, got {self.longest}")
        for given in (self.shard_samples, self.chunk_samples):
            if given is not None and given < 1:
                raise FormatError(f"split {self.name!r}: shard_samples and chunk_samples are at least 1, got {given}")


@dataclass(frozen=True)
class Grid:
    """Where a split's samples lie.

    Rows are samples or, for ragged ones, steps along the ragged axis, which is moved to the front. Shard i holds
    samples [i * shard_samples, (i + 1) * shard_samples) and owns rows [i * shard_rows, (i + 1) * shard_rows); each
    of its chunks holds `chunk_rows` rows. Ragged shards leave the rows they do not need unwritten.
    """

    samples: int
    row_shape: tuple[int, ...]
    ragged_axis: int | None
    shard_samples: int
    shard_rows: int
    chunk_rows: int

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_samples)

    @property
    def rows(self) -> int:
        """The first axis of the Zarr array."""
        return self.samples if self.ragged_axis is None else self.shards * self.shard_rows

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_rows // self.chunk_rows

    def shard_range(self, shard: int) -> range:
        """The samples of a shard."""
        return range(shard * self.shard_samples, min(self.samples, (shard + 1) * self.shard_samples))


def grid(spec: SplitSpec, storage: Storage) -> Grid:
    """The grid for a split: shards near SHARD_BYTES; a chunk a sample, or several where samples are small."""
    itemsize = storage.stored.itemsize
    ragged = spec.shape.index(None) if None in spec.shape else None
    row_shape = tuple(size for size in spec.shape if size is not None)
    row_bytes = math.prod(row_shape) * itemsize
    if ragged is not None:
        assert spec.longest is not None
        shard_samples = spec.shard_samples or max(1, SHARD_BYTES // (row_bytes * spec.longest))
        shard_samples = max(1, min(shard_samples, spec.samples))
        chunk = spec.chunk_samples or min(max(1, CHUNK_BYTES // row_bytes), spec.longest)
        chunk = min(chunk, shard_samples * spec.longest)
        rows = -(-shard_samples * spec.longest // chunk) * chunk
        return Grid(spec.samples, row_shape, ragged, shard_samples, rows, chunk)
    small = row_bytes < (TINY_SAMPLE if storage.codec == "none" else SMALL_SAMPLE)
    chunk = spec.chunk_samples or (max(1, min(CHUNK_SAMPLES, 2 * CHUNK_BYTES // row_bytes)) if small else 1)
    wanted = max(1, min(spec.shard_samples or max(1, SHARD_BYTES // row_bytes), spec.samples))
    chunk = min(chunk, wanted)
    shard = -(-wanted // chunk) * chunk
    return Grid(spec.samples, row_shape, None, shard, shard, chunk)


def packed(grid: Grid, storage: Storage) -> bool:
    """Whether several compressed samples share a chunk."""
    return storage.codec != "none" and grid.chunk_rows > 1 and grid.ragged_axis is None


def shuffled_in_windows(spec: SplitSpec, storage: Storage) -> bool:
    """Whether a shuffled epoch reads a split in windows of chunks, and so in another order than `epoch_order`."""
    g = grid(spec, storage)
    return packed(g, storage) and g.samples > SHUFFLED_TOGETHER * g.chunk_rows


@dataclass(frozen=True)
class Plan:
    """What a cache is to hold, fixed when it is created: everything a writer needs to go on, or a reader to read."""

    key: dict[str, Json]
    storage: Storage
    splits: tuple[SplitSpec, ...]
    calibration: Calibration | None = None

    def split(self, name: str) -> SplitSpec:
        for spec in self.splits:
            if spec.name == name:
                return spec
        raise FormatError(f"there is no split {name!r} here; there are {', '.join(s.name for s in self.splits)}")

    def to_json(self) -> dict[str, Json]:
        c = self.calibration
        calibration: Json = None
        if c is not None:
            numbers: dict[str, Json] = {name: getattr(c, name).tolist() for name in CALIBRATED}
            calibration = {"axis": c.axis, **numbers}
        storage: Json = {"dtype": self.storage.dtype, "codec": self.storage.codec, "level": self.storage.level}
        splits: Json = [_spec_json(spec) for spec in self.splits]
        return {"key": self.key, "storage": storage, "splits": splits, "calibration": calibration}

    @cached_property
    def digest(self) -> str:
        """The sha256 of the plan, which ties a journal entry to it."""
        return digest(self.to_json())


def check_plan(plan: Plan) -> None:
    """Raises FormatError for a plan that asks for the impossible: more shards than a disk should hold as files, shards
    that no memory holds, a calibration that does not fit.
    """
    shards = views = 0
    for spec in plan.splits:
        g = grid(spec, plan.storage)
        raw = g.shard_rows * math.prod(g.row_shape) * plan.storage.stored.itemsize
        if g.chunks_per_shard > MOST_CHUNKS or raw > (MOST_SHARD_BYTES if g.shard_samples > 1 else MOST_BYTES):
            raise FormatError(
                f"split {spec.name!r}: shards of {g.shard_samples:,} samples have {raw:,} bytes in "
                f"{g.chunks_per_shard:,} chunks; at most {MOST_SHARD_BYTES:,} and {MOST_CHUNKS:,} are possible, so "
                "choose another shard_samples or chunk_samples"
            )
        shards, views = shards + g.shards * spec.views, views + spec.views
        if raw * g.shards * spec.views > MOST_BYTES:
            raise FormatError(f"split {spec.name!r} would take {raw * g.shards * spec.views:,} bytes")
    if shards > MOST_SHARDS or views > MOST_VIEWS:
        raise FormatError(
            f"{shards:,} shards of {views:,} views are planned, and at most {MOST_SHARDS:,} of {MOST_VIEWS:,} possible"
        )
    _check_calibration(plan)


def _check_calibration(plan: Plan) -> None:
    c = plan.calibration
    if (plan.storage.dtype == "uint8") != (c is not None):
        raise FormatError("uint8 is stored with a calibration (see `calibrate`), the other dtypes without one")
    if c is None:
        return
    channels = len(c.scale)
    fits = all(
        getattr(c, name).shape == (channels,) and bool(np.isfinite(getattr(c, name)).all()) for name in CALIBRATED
    )
    if not fits or not ((c.scale > 0).all() and (c.bend >= 0).all() and (c.bend * 255 < 1).all()):
        raise FormatError("the calibration has a scale, offset or bend that is missing, not finite or out of range")
    for spec in plan.splits:
        if not 0 <= c.axis < len(spec.shape) or spec.shape[c.axis] != channels:
            raise FormatError(
                f"the calibration has {channels} channels on axis {c.axis}, and split {spec.name!r} shape {spec.shape}"
            )


def _spec_json(spec: SplitSpec) -> dict[str, Json]:
    return {
        "name": spec.name,
        "samples": spec.samples,
        "shape": list(spec.shape),
        "labels": dict(spec.labels),
        "views": spec.views,
        "longest": spec.longest,
        "shard_samples": spec.shard_samples,
        "chunk_samples": spec.chunk_samples,
    }


def settled(spec: SplitSpec, storage: Storage) -> SplitSpec:
    """The same split with its shard and chunk sizes written out, so that later defaults cannot change them."""
    g = grid(spec, storage)
    return SplitSpec(
        spec.name, spec.samples, spec.shape, dict(spec.labels), spec.views, spec.longest, g.shard_samples, g.chunk_rows
    )


# Paths, relative to the cache.


def values_path(split: str, view: int) -> str:
    return f"{split}/values/{view}"


def shard_path(split: str, view: int, shard: int, ndim: int) -> str:
    """The file of a shard; `ndim` is that of the Zarr array (rows first)."""
    return f"{values_path(split, view)}/c/{shard}" + "/0" * (ndim - 1)


def journal_path(split: str, view: int, shard: int) -> str:
    return f"{RECORD}/{split}/{view}/{shard}.json"


def small_chunk(path: str, ndim: int) -> str:
    """The one chunk of a side array."""
    return f"{path}/c" + "/0" * ndim


# Zarr metadata.


def bytes_codec(itemsize: int) -> Json:
    return {"name": "bytes"} if itemsize == 1 else {"name": "bytes", "configuration": {"endian": "little"}}


def _chunk_codecs(storage: Storage) -> list[Json]:
    codecs: list[Json] = [bytes_codec(storage.stored.itemsize)]
    if storage.codec == "zstd":
        codecs.append({"name": "zstd", "configuration": {"level": storage.level, "checksum": False}})
    elif storage.codec == "lz4":
        # The blosc container, without shuffling: of the codecs that hold lz4 it is the one in the Zarr specification.
        blosc: Json = {
            "cname": "lz4",
            "clevel": storage.level,
            "shuffle": "noshuffle",
            "typesize": storage.stored.itemsize,
            "blocksize": 0,
        }
        codecs.append({"name": "blosc", "configuration": blosc})
    codecs.append({"name": "crc32c"})
    return codecs


def _array(shape: Sequence[int], dtype: str, chunk: Sequence[int], codecs: Sequence[Json], attributes: Json) -> bytes:
    fill: Json = False if dtype == "bool" else (0.0 if dtype.startswith("float") else 0)
    return _metadata(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": fill,
            "codecs": list(codecs),
            "attributes": attributes,
            "storage_transformers": [],
        }
    )


def values_metadata(spec: SplitSpec, storage: Storage) -> bytes:
    """The zarr.json of a values array: sharded, crc32c on every inner chunk and on the index."""
    g = grid(spec, storage)
    sharding: Json = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [g.chunk_rows, *g.row_shape],
            "codecs": _chunk_codecs(storage),
            "index_codecs": [bytes_codec(8), {"name": "crc32c"}],
            "index_location": "end",
        },
    }
    attributes: Json = {"dtype": storage.dtype, "ragged_axis": g.ragged_axis}
    shape, shard = (g.rows, *g.row_shape), (g.shard_rows, *g.row_shape)
    return _array(shape, storage.stored.name, shard, [sharding], {"activation_cache": attributes})


def small_metadata(shape: Sequence[int], dtype: str) -> bytes:
    """The zarr.json of a side array (ids, labels, offsets, calibration): one chunk, with its crc32c."""
    chunk = [max(1, size) for size in shape]
    return _array(shape, dtype, chunk, [bytes_codec(np.dtype(dtype).itemsize), {"name": "crc32c"}], {})


def group_metadata(attributes: Json) -> bytes:
    return _metadata({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def root_attributes(plan: Plan, digest: str) -> Json:
    return {"activation_cache": {"format": FORMAT, "key": digest, "splits": [s.name for s in plan.splits]}}


def _metadata(value: Json) -> bytes:
    return (json.dumps(value, allow_nan=False) + "\n").encode()
