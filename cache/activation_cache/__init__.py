"""A store of activations: standard Zarr v3 on disk, read at memory speed, keyed to what made it.

with create(location, key, [SplitSpec("train", 1000, (256, 16, 16), {"class": "int64"})], Storage("float16")) as w:
    for part in w.pending("train"):                     # all of it, or what a killed writer left
        for i in part:
            w.append("train", compute(i)[None], [names[i]], {"class": [classes[i]]})
    w.commit()

cache = open_cache(location, key)                       # refuses what is unfinished, stale or damaged
for batch in cache.splits["train"].batches(32, seed=0, epoch=3):
    ...                                                 # batch.values, batch.labels["class"], batch.ids
"""

from __future__ import annotations

from .budget import available, estimate, free, measured_ratio, reserve, slot_samples
from .errors import (
    AlreadyCommitted,
    CacheError,
    Damaged,
    DoesNotFit,
    FormatError,
    InvalidSamples,
    Locked,
    NotCommitted,
    Stale,
    StoreError,
)
from .format.canonical import digest
from .format.key import differences, make_key
from .format.layout import FORMAT, SHUFFLED_TOGETHER, SplitSpec, Storage, shuffled_in_windows
from .format.quantise import Calibration, calibrate
from .reading.batches import CachedBatch
from .reading.cache import Cache, Split, open_cache
from .reading.order import epoch_order
from .verify import Report, Status, inspect, verify
from .window import Filler, JoinedSplits, Window, remove_window
from .writing.creation import create, remove, resume
from .writing.repair import repair
from .writing.writer import CacheWriter

__all__ = [
    "FORMAT",
    "SHUFFLED_TOGETHER",
    "AlreadyCommitted",
    "Cache",
    "CacheError",
    "CacheWriter",
    "CachedBatch",
    "Calibration",
    "Damaged",
    "DoesNotFit",
    "Filler",
    "FormatError",
    "InvalidSamples",
    "JoinedSplits",
    "Locked",
    "NotCommitted",
    "Report",
    "Split",
    "SplitSpec",
    "Stale",
    "Status",
    "Storage",
    "StoreError",
    "Window",
    "available",
    "calibrate",
    "create",
    "differences",
    "digest",
    "epoch_order",
    "estimate",
    "free",
    "inspect",
    "make_key",
    "measured_ratio",
    "open_cache",
    "remove",
    "remove_window",
    "repair",
    "reserve",
    "resume",
    "shuffled_in_windows",
    "slot_samples",
    "verify",
]
