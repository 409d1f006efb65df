"""How much a cache will take, how much there is, and what to do when it is not enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import DoesNotFit
from .format.layout import SplitSpec, Storage, grid
from .format.quantise import Calibration, quantise, to_bfloat16
from .format.shard import CRC_BYTES, encode
from .store.base import Store, open_store
from .store.disk import reserve_of

SIDE_BYTES = 100  # of a sample: its id and labels, in the journal and in the side arrays, and its share of the record


def sample_bytes(spec: SplitSpec, storage: Storage, ratio: float = 1.0) -> float:
    """Bytes on disk of one sample of one view, where compression leaves `ratio` of it; a ragged one at its longest."""
    g = grid(spec, storage)
    rows = 1 if g.ragged_axis is None else (spec.longest or 1)
    raw = rows * math.prod(g.row_shape) * storage.stored.itemsize
    return raw * ratio + (16 + CRC_BYTES) * max(1.0, rows / g.chunk_rows) / (g.chunk_rows if rows == 1 else 1)


def estimate(splits: Sequence[SplitSpec], storage: Storage, ratio: float = 1.0) -> int:
    """Bytes on disk of a cache of these splits, where compression leaves `ratio` of the stored values."""
    total = 16384.0  # metadata
    for spec in splits:
        total += spec.samples * (spec.views * sample_bytes(spec, storage, ratio) + SIDE_BYTES)
    return math.ceil(total)


def measured_ratio(values: npt.NDArray[Any], storage: Storage, calibration: Calibration | None = None) -> float:
    """What compression leaves of real samples (B, *shape): bytes encoded over bytes as stored, measured on these."""
    if storage.codec == "none" or values.size == 0:
        return 1.0
    if values.dtype == storage.stored:
        stored = np.ascontiguousarray(values)
    else:
        stored = np.empty(values.shape, storage.stored)
        if storage.dtype == "uint8":
            assert calibration is not None
            quantise(values, calibration, stored)
        elif storage.dtype == "bfloat16":
            to_bfloat16(values, stored)
        else:
            np.copyto(stored, values, casting="same_kind")
    spec = SplitSpec("sample", len(values), tuple(values.shape[1:]))
    g = grid(spec, storage)
    encoded = encode(stored, storage, g.chunk_rows, -(-len(values) // g.chunk_rows))
    chunks = -(-len(values) // g.chunk_rows)
    return (encoded.size - chunks * (16 + CRC_BYTES) - CRC_BYTES) / stored.nbytes


def free(location: str | Path | Store) -> int | None:
    """Bytes free on the disk where a cache lies, or would; None on an object store."""
    return open_store(location).free()


def reserve(location: str | Path | Store) -> int:
    """Bytes of the disk that a cache without a budget leaves free: a twentieth of what is free, at most 10 GB."""
    there = free(location)
    return 0 if there is None else reserve_of(there)


def available(
    location: str | Path | Store, budget: int | None = None, also: Sequence[str | Path | Store] = ()
) -> int | None:
    """Bytes that a cache may take: the budget, as far as the disk has it; without one what the disk has, less the
    reserve. The disk has what is free and what is the cache's own already, that at the places `also` included.

    None: there is neither a budget nor a limit to the store.
    """
    store = open_store(location)
    there = store.free()
    if there is None:
        return budget
    there += sum(size for place in (store, *map(open_store, also)) for _, size in place.list())
    return there - reserve_of(there) if budget is None else min(budget, there)


def slot_samples(
    spec: SplitSpec,
    storage: Storage,
    budget: int,
    *,
    slots: int,
    ratio: float = 1.0,
    besides: int = 0,
    least: int = 1,
) -> int:
    """Samples of each slot of a rolling window of `slots` slots and one being filled, within `budget` bytes.

    `besides`: bytes that other splits take. Raises DoesNotFit if not even `least` samples a slot fit.
    """
    each = sample_bytes(spec, storage, ratio) + SIDE_BYTES
    room = (budget - besides) / (slots + 1) - 16384
    found = min(int(room // each), max(least, spec.samples // slots))
    if found < least:
        needed = besides + math.ceil((slots + 1) * (least * each + 16384)) + 1
        raise DoesNotFit(
            f"a budget of {budget:,} bytes is too small for a window of {slots} slots and one being filled, of "
            f"{least} samples or more: a sample takes {each:,.0f} bytes and the other splits {besides:,}; at least "
            f"{needed:,} are needed",
            needed=needed,
            free=budget,
        )
    return found
