"""Which files a finished cache has, and how large they can be: what follows from its plan alone."""

from __future__ import annotations

import math

import numpy as np

from .layout import (
    PLAN,
    RECORD,
    Grid,
    Plan,
    SplitSpec,
    grid,
    journal_path,
    shard_path,
    small_chunk,
    values_path,
)
from .quantise import CALIBRATED
from .shard import CRC_BYTES


def shard_tail(g: Grid) -> int:
    """Bytes of a shard's index with its checksum."""
    return 16 * g.chunks_per_shard + CRC_BYTES


def expected_files(plan: Plan) -> tuple[dict[str, int | None], dict[str, int]]:
    """(path -> bytes of each file that must be there, None where only its content decides;
    path -> bytes of an item, of each side array that has a file unless it is empty).
    """
    required: dict[str, int | None] = {"zarr.json": None, f"{RECORD}/zarr.json": None, PLAN: None}
    optional: dict[str, int] = {}
    for spec in plan.splits:
        _expect_split(plan, spec, required, optional)
    return required, optional


def _expect_split(plan: Plan, spec: SplitSpec, required: dict[str, int | None], optional: dict[str, int]) -> None:
    g, split = grid(spec, plan.storage), spec.name

    def array(path: str, dtype: str, *shape: int) -> None:
        groups_of(path)
        if 0 not in shape:
            size = math.prod(shape) * np.dtype(dtype).itemsize + CRC_BYTES
            required[small_chunk(f"{split}/{path}", len(shape))] = size

    def flat(path: str, dtype: str) -> None:
        """One whose length the samples decide, with the offsets that say where each begins and ends."""
        groups_of(path)
        optional[small_chunk(f"{split}/{path}", 1)] = np.dtype(dtype).itemsize
        array(f"offsets/{path}", "int64", spec.samples, 2)

    def groups_of(path: str) -> None:
        while path:
            required[f"{split}/{path}/zarr.json"] = None
            path = path.rpartition("/")[0]

    required[f"{split}/zarr.json"] = None
    flat("ids", "uint8")
    for label, dtype in spec.labels.items():
        if dtype.endswith("[]"):
            flat(f"labels/{label}", dtype.removesuffix("[]"))
        else:
            array(f"labels/{label}", dtype, spec.samples)
    if plan.calibration is not None:
        for name in CALIBRATED:
            array(f"calibration/{name}", "float32", len(plan.calibration.scale))
    for view in range(spec.views):
        groups_of(values_path(split, view).removeprefix(f"{split}/"))
        if g.ragged_axis is not None:
            array(f"offsets/values/{view}", "int64", spec.samples, 2)
        for shard in range(g.shards):
            required[journal_path(split, view, shard)] = None
            required[shard_path(split, view, shard, 1 + len(g.row_shape))] = None
