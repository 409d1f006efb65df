"""The small files of a cache: everything but its shards, as a function of the plan and the journal.

That they can be computed again at any time is what lets a damaged one be repaired without computing a sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from activation_cache.format import layout
from activation_cache.format.canonical import digest
from activation_cache.format.layout import Plan, SplitSpec
from activation_cache.format.quantise import CALIBRATED
from activation_cache.format.record import Entry
from activation_cache.format.shard import CRC_BYTES, crc32c

Offsets = npt.NDArray[np.int64]


def side_files(plan: Plan, entries: Mapping[tuple[str, int], Sequence[Entry]]) -> dict[str, bytes]:
    """Path -> content. `entries` maps (split, view) to the entries of all its shards in order."""
    files = {f"{layout.RECORD}/zarr.json": layout.group_metadata({})}
    for spec in plan.splits:
        views = [entries[spec.name, view] for view in range(spec.views)]
        _split_files(plan, spec, views, files)
    files["zarr.json"] = layout.group_metadata(layout.root_attributes(plan, digest(plan.key)))
    return files


def _split_files(plan: Plan, spec: SplitSpec, views: Sequence[Sequence[Entry]], files: dict[str, bytes]) -> None:
    split = spec.name
    ids = [name.encode() for entry in views[0] for name in entry.ids]
    _add_ragged(files, split, "ids", [np.frombuffer(name, np.uint8) for name in ids], "uint8")
    for label, dtype in spec.labels.items():
        given = [value for entry in views[0] for value in entry.labels[label]]
        if dtype.endswith("[]"):
            plain = dtype.removesuffix("[]")
            _add_ragged(files, split, f"labels/{label}", [np.array(value, plain) for value in given], plain)
        else:
            _add(files, f"{split}/labels/{label}", np.array(given, dtype))
    g = layout.grid(spec, plan.storage)
    for view, shards in enumerate(views):
        files[f"{layout.values_path(split, view)}/zarr.json"] = layout.values_metadata(spec, plan.storage)
        if g.ragged_axis is not None:
            _add(files, f"{split}/offsets/values/{view}", ragged_offsets(shards, g))
    if plan.calibration is not None:
        for name in CALIBRATED:
            _add(files, f"{split}/calibration/{name}", getattr(plan.calibration, name))
    groups = {path.rsplit("/", 2)[0] for path in files if path.startswith(f"{split}/") and path.endswith("/zarr.json")}
    for group in sorted({*groups, *(group.rsplit("/", 1)[0] for group in groups if "/" in group), split}):
        if group != split:
            files[f"{group}/zarr.json"] = layout.group_metadata({})
    saturated = sum(entry.saturated for shards in views for entry in shards)
    files[f"{split}/zarr.json"] = layout.group_metadata(
        {
            "activation_cache": {
                "samples": spec.samples,
                "shape": list(spec.shape),
                "dtype": plan.storage.dtype,
                "views": spec.views,
                "labels": dict(spec.labels),
                "calibration_axis": None if plan.calibration is None else plan.calibration.axis,
                "saturated": saturated,
            }
        }
    )


def ragged_offsets(shards: Sequence[Entry], g: layout.Grid) -> Offsets:
    """[start, stop) of each ragged sample on the flat axis, int64 of shape (samples, 2)."""
    rows = []
    for number, entry in enumerate(shards):
        stops = number * g.shard_rows + np.cumsum(np.array(entry.lengths, np.int64))
        rows.append(np.stack([stops - np.array(entry.lengths, np.int64), stops], axis=1))
    return np.concatenate(rows) if rows else np.empty((0, 2), np.int64)


def _add_ragged(files: dict[str, bytes], split: str, name: str, values: Sequence[npt.NDArray[Any]], dtype: str) -> None:
    flat = np.concatenate(values) if values else np.empty(0, dtype)
    stops = np.cumsum([len(value) for value in values], dtype=np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), stops])[:-1]
    _add(files, f"{split}/{name}", flat)
    _add(files, f"{split}/offsets/{name}", np.stack([starts[: len(values)], stops], axis=1))


def _add(files: dict[str, bytes], path: str, array: npt.NDArray[Any]) -> None:
    files[f"{path}/zarr.json"] = layout.small_metadata(array.shape, array.dtype.name)
    if array.size:
        data = np.ascontiguousarray(array).tobytes()
        files[layout.small_chunk(path, array.ndim)] = data + crc32c(data).to_bytes(CRC_BYTES, "little")
