"""What is known of a run's caches: where they lie and what they hold, which are stale, which are damaged."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import activation_cache
from layerwise.errors import NotReady
from layerwise.pipeline.module_cache import cache_key, open_cache
from layerwise.pipeline.rolling import rolls
from layerwise.pipeline.setup import Setup


def describe_cache(setup: Setup, number: int) -> dict[str, Any]:
    """Where a cache lies, its bytes, their `ratio` to those of plain float32 (None for samples of several lengths), and
    what each split holds.
    """
    cache = open_cache(setup, number)
    splits = {
        name: {
            "samples": split.samples,
            "views": split.views,
            "shape": list(split.shape),
            "dtype": split.storage.dtype,
            "codec": split.storage.codec,
        }
        for name, split in cache.splits.items()
    }
    location = setup.run.cache(number)
    bytes_ = activation_cache.inspect(location).bytes
    ragged = any(None in split.shape for split in cache.splits.values())
    plain = sum(
        4 * split.samples * split.views * math.prod(n or 0 for n in split.shape) for split in cache.splits.values()
    )
    return {
        "module": number,
        "location": str(location),
        "bytes": bytes_,
        "ratio": None if ragged or not plain else bytes_ / plain,
        "splits": splits,
    }


def read_speed(setup: Setup, number: int, seconds: float = 0.3) -> float | None:
    """Bytes a second at which the training samples of a cache are read and decoded, shuffled, measured for at most so
    many seconds; None where there are none, or where they cannot be read.
    """
    split = open_cache(setup, number).splits.get("train")
    if split is None or not split.samples:
        return None
    began, read = time.perf_counter(), 0
    try:
        for batch in split.batches(min(setup.recipe.training.batch_size, split.samples)):
            read += sum(part.nbytes for part in (batch.values if isinstance(batch.values, list) else [batch.values]))
            if time.perf_counter() - began > seconds:
                break
    except (activation_cache.CacheError, OSError):  # a report is no check: `verify` names what is damaged
        return None
    return read / (time.perf_counter() - began)


def stale_caches(setup: Setup) -> dict[int, str]:
    """Module number to reason, for each cache of the run that no stage will ever read again."""
    found = {}
    numbers = {int(path.name) for path in setup.run.caches.glob("*") if path.name.isdecimal()}
    for number in sorted(numbers | set(range(1, setup.depth + 1))):
        location = setup.run.cache(number)
        if activation_cache.inspect(location).state == "absent":
            continue
        if number > setup.depth:
            found[number] = f"{location} belongs to module {number}, but the recipe has {setup.depth} modules"
            continue
        try:
            status = activation_cache.inspect(location, cache_key(setup, number))
        except NotReady as error:
            found[number] = f"{location}: {error}"
            continue
        if status.state == "stale":
            found[number] = status.reason
    return found


def stale_windows(setup: Setup) -> dict[int, str]:
    """Module number to reason, for each rolling window of the run that holds what no stage will ever read again."""
    found = {}
    for folder in sorted(setup.run.window(1).parent.glob("*-window")):
        if not (name := folder.name.removesuffix("-window")).isdecimal():
            continue  # none of ours
        number = int(name)
        if number > setup.depth:
            found[number] = f"{folder} belongs to module {number}, but the recipe has {setup.depth} modules"
        elif not rolls(setup, number):
            found[number] = f"{folder} is a window on module {number}'s outputs, and its cache holds all of them"
        else:
            try:
                key = cache_key(setup, number)
            except NotReady as error:
                found[number] = f"{folder}: {error}"
                continue
            if changed := {name for slot in folder.glob("slot-*") for name in _differing(slot, key)}:
                found[number] = f"{folder} was made from something else ({', '.join(sorted(changed))})"
    return found


def _differing(slot: Path, key: Mapping[str, Any]) -> list[str]:
    """The fields in which a slot differs from the cache that its window belongs to."""
    own = activation_cache.inspect(slot).key or key
    return list(activation_cache.differences({n: v for n, v in own.items() if not n.startswith("slot.")}, key))
