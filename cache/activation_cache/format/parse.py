"""From the JSON of a record to what it stands for. A file may come from a stranger: its checksum proves nothing.

Every type, range and total is checked here, when a cache is opened, so that nothing behind has to: no number leads
beyond a file, and none asks for more time or memory than the files that are there account for. What does not fit
raises FormatError, without the file's name, which the caller adds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeGuard

import numpy as np

from activation_cache.errors import FormatError

from .canonical import KEY_DEPTH, Json, canonical, depth
from .expected import expected_files, shard_tail
from .layout import FORMAT, Grid, Plan, SplitSpec, Storage, check_plan, grid, settled, shard_path
from .quantise import CALIBRATED, Calibration
from .shard import CRC_BYTES, most_decoded

LARGEST = 2**48  # of any number of samples, or size of an axis
MOST_AXES = 30
_HASH = re.compile(r"[0-9a-f]{64}")


def plan_from_json(value: Any) -> Plan:
    """The plan behind Plan.to_json."""
    _require(isinstance(value, dict) and isinstance(value.get("splits"), list), "the plan lacks its fields")
    key = key_from_json(value.get("key"))
    storage = _storage(value.get("storage"))
    _require(key.get("format") == FORMAT and key.get("dtype") == storage.dtype, "the key has another format or dtype")
    splits = tuple(_split(split) for split in value["splits"])
    _require(len({spec.name for spec in splits}) == len(splits), "two splits have one name")
    plan = Plan(key, storage, splits, _calibration(value.get("calibration")))
    check_plan(plan)
    _require(all(spec == settled(spec, storage) for spec in splits), "shards and chunks have no possible size")
    _require(canonical(plan.to_json()) == canonical(value), "the plan has fields that are not known")
    return plan


def key_from_json(value: Any) -> dict[str, Json]:
    """The key of a cache, of any format."""
    _require(isinstance(value, dict) and depth(value, KEY_DEPTH) <= KEY_DEPTH, "the key is no flat mapping")
    return dict(value)


def _storage(value: Any) -> Storage:
    _require(isinstance(value, dict) and set(value) == {"dtype", "codec", "level"}, "`storage` lacks its fields")
    _require(isinstance(value["dtype"], str) and isinstance(value["codec"], str), "dtype and codec are no names")
    _require(type(value["level"]) is int, "the level of the codec is no integer")
    return Storage(**value)


def _split(value: Any) -> SplitSpec:
    names = ("name", "samples", "shape", "labels", "views", "longest", "shard_samples", "chunk_samples")
    _require(isinstance(value, dict) and set(value) == set(names), "a split lacks a field or has an unknown one")
    _require(isinstance(value["name"], str), "the name of a split is no text")
    shape, labels = value["shape"], value["labels"]
    _require(isinstance(shape, list) and len(shape) <= MOST_AXES, f"a split has more than {MOST_AXES} axes, or none")
    _require(
        isinstance(labels, dict) and all(isinstance(dtype, str) for dtype in labels.values()), "labels have no dtypes"
    )
    _require(
        _is_count(value["samples"], 0)
        and all(_is_count(value[name], 1) for name in ("views", "shard_samples", "chunk_samples"))
        and all(size is None or _is_count(size, 1) for size in (*shape, value["longest"])),
        f"split {value['name']!r} has sizes that are no integers up to {LARGEST:,}",
    )
    return SplitSpec(**{**value, "shape": tuple(shape)})


def _calibration(value: Any) -> Calibration | None:
    if value is None:
        return None
    _require(isinstance(value, dict) and set(value) == {"axis", *CALIBRATED}, "the calibration lacks its fields")
    _require(_is_count(value["axis"], 0), "the axis of the calibration is no integer")
    for name in CALIBRATED:
        given = value[name]
        _require(isinstance(given, list) and set(map(type, given)) <= {float}, f"the calibration's {name} is no list")
    with np.errstate(over="ignore"):  # what overflows is refused as not finite
        return Calibration(value["axis"], *(np.array(value[name], np.float32) for name in CALIBRATED))


def files_from_json(value: Any, plan: Plan) -> dict[str, tuple[int, str]]:
    """Path -> (bytes, hash) of a commit record: all files that the plan asks for, no others, of possible sizes."""
    _require(isinstance(value, dict), "`files` is no mapping")
    for path, entry in value.items():
        ok = isinstance(entry, list) and len(entry) == 2 and _is_count(entry[0], 1) and isinstance(entry[1], str)
        _require(ok and _HASH.fullmatch(entry[1]) is not None, f"the entry of {path[:99]!r} is no size and hash")
    files: dict[str, tuple[int, str]] = {path: (size, digest) for path, (size, digest) in value.items()}
    shards = sum(grid(spec, plan.storage).shards * spec.views for spec in plan.splits)
    _require(2 * shards <= len(files), f"{len(files)} files are listed, and {shards:,} shards are planned")
    required, optional = expected_files(plan)
    for path, size in required.items():
        _require(path in files, f"{path} is not listed")
        _require(size is None or files[path][0] == size, f"{path} is listed with {files[path][0]} bytes, not {size}")
    for path in files.keys() - required.keys():
        _require(path in optional, f"{path[:99]!r} is listed, and no part of such a cache")
        _require((files[path][0] - CRC_BYTES) % optional[path] == 0, f"{path} is listed with an impossible size")
    for spec in plan.splits:
        g = grid(spec, plan.storage)
        for view in range(spec.views):
            for shard in range(g.shards):
                path = shard_path(spec.name, view, shard, 1 + len(g.row_shape))
                _check_shard_size(path, files[path][0], g, shard, plan.storage)
    return files


def _check_shard_size(path: str, size: int, g: Grid, shard: int, storage: Storage) -> None:
    """Whether the samples of a shard can be in so many bytes; of ragged ones, whether its chunks can."""
    chunk_bytes = g.chunk_rows * math.prod(g.row_shape) * storage.stored.itemsize
    data = size - shard_tail(g)
    chunks = None if g.ragged_axis is not None else -(-len(g.shard_range(shard)) // g.chunk_rows)
    if storage.codec == "none":
        possible = data % (chunk_bytes + CRC_BYTES) == 0 and chunks in (None, data // (chunk_bytes + CRC_BYTES))
    else:
        fewest = chunks if chunks is not None else int(data > 0)
        possible = fewest * chunk_bytes <= most_decoded(storage.codec, data)
    _require(data >= 0 and possible, f"{path} is listed with {size} bytes, which its samples cannot have")


def entry_from_json(value: Mapping[str, Any], plan: Plan, spec: SplitSpec, view: int, shard: int) -> dict[str, Any]:
    """The fields of a shard's journal entry."""
    g = grid(spec, plan.storage)
    count = len(g.shard_range(shard))
    _require(set(value) == {"size", "seal", "ids", "lengths", "labels", "saturated"}, "it lacks a field")
    _require(_is_count(value["size"], 1) and _is_count(value["saturated"], 0), "its size is no integer")
    _require(isinstance(value["seal"], str) and _HASH.fullmatch(value["seal"]) is not None, "its seal is no hash")
    ids, lengths, labels = value["ids"], value["lengths"], value["labels"]
    _require(_is_list_of(ids, str) and len(ids) == count and _is_text(ids), "it has not one id a sample")
    _require(
        _is_list_of(lengths, int)
        and len(lengths) == (0 if g.ragged_axis is None else count)
        and all(0 <= length <= (spec.longest or 0) for length in lengths),
        "it has not one possible length a sample",
    )
    _require(
        isinstance(labels, dict) and set(labels) == (set(spec.labels) if view == 0 else set()), "it has other labels"
    )
    for name, values in labels.items():
        _require(isinstance(values, list) and len(values) == count, f"label {name!r} has not one value a sample")
        _require(_fit(values, spec.labels[name]), f"label {name!r} has values that are not of its dtype")
    _check_shard_size(shard_path(spec.name, view, shard, 1 + len(g.row_shape)), value["size"], g, shard, plan.storage)
    return dict(value)


def _fit(values: list[Any], dtype: str) -> bool:
    """Whether labels are plain numbers that `dtype` holds."""
    if dtype.endswith("[]"):
        return _is_list_of(values, list) and _fit(list(chain.from_iterable(values)), dtype.removesuffix("[]"))
    kept = np.dtype(dtype)
    if kept.kind == "b":
        return _is_list_of(values, bool)
    if kept.kind == "f":
        most = float(np.finfo(kept).max)
        return _is_list_of(values, float) and all(-most <= value <= most for value in values)
    limits = np.iinfo(kept)
    return _is_list_of(values, int) and (not values or (limits.min <= min(values) and max(values) <= limits.max))


def _is_count(value: Any, least: int) -> TypeGuard[int]:
    return type(value) is int and least <= value <= LARGEST


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {kind}


def _is_text(names: list[str]) -> bool:
    try:
        "".join(names).encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _require(ok: bool, problem: str) -> None:
    if not ok:
        raise FormatError(problem)
