"""How fast caches are read in shuffled epochs, and how small they get, beside other stores."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from activation_cache import Storage, open_cache
from activation_cache.reading.order import epoch_order
from benchmarks.cache_peers import Array, Epoch, peer_readers
from benchmarks.cache_workloads import WORKLOADS, say, write_cache

STORAGES = (Storage("float16"), Storage("float16", "lz4"), Storage("uint8", "lz4"), Storage("uint8", "zstd"))


def reading(work: Path, raw: dict[str, Path], repeats: int, peers: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for workload in WORKLOADS:
        whole = np.memmap(raw[workload.name], np.float16, "r")
        samples: Array = whole.reshape(-1, *workload.shape)
        limit = limit_reader(samples, workload.batch)
        readers = {"memmap": memmap_reader(samples, workload.batch)}
        stores = {}
        for storage in STORAGES:
            name = f"{storage.dtype}+{storage.codec}"
            location = work / f"{workload.name}-{name}"
            write_cache(location, samples, storage)
            readers[f"cache {name}"] = cache_reader(location, workload.batch)
            stores[name] = sizes(location, samples)
        speeds = compare(limit, readers, workload.sample_bytes, repeats)
        if peers:
            # Made and read after ours: several leave threads behind.
            theirs = peer_readers(work, workload.name, samples, workload.batch)
            speeds |= {**compare(limit, theirs, workload.sample_bytes, repeats), "limit": speeds["limit"]}
        found[workload.name] = {"speeds": speeds, "stores": stores}
        for name, speed in speeds.items():
            say(f"{workload.name}  {name:28s} {speed['gb_per_s']:7.2f} GB/s  {speed['of_limit']:5.2f} of the limit"
                f"  ({speed['of_limit_cpu']:5.2f} by processor time)")  # fmt: skip
        for name, store in stores.items():
            say(f"{workload.name}  {name:28s} {store['ratio']:.3f} of the float16 bytes, error {store['error']:.1e}")
    return found


def limit_reader(samples: Array, batch: int) -> Epoch:
    out = np.empty((batch, *samples.shape[1:]), samples.dtype)

    def epoch(number: int) -> int:
        order = epoch_order(len(samples), 1, number)
        for at in range(0, len(order) - batch + 1, batch):
            np.take(samples, order[at : at + batch], axis=0, out=out, mode="clip")
        return len(order) // batch * batch

    return epoch


def memmap_reader(samples: Array, batch: int) -> Epoch:
    """One by one into a warm buffer, as a hand-written loader would."""
    out = np.empty((batch, *samples.shape[1:]), samples.dtype)

    def epoch(number: int) -> int:
        order = epoch_order(len(samples), 1, number)
        for at in range(0, len(order) - batch + 1, batch):
            for place, index in enumerate(order[at : at + batch].tolist()):
                out[place] = samples[index]
        return len(order) // batch * batch

    return epoch


def cache_reader(location: Path, batch: int, threads: int | None = None) -> Epoch:
    split = open_cache(location).splits["train"]
    return lambda number: sum(len(b) for b in split.batches(batch, seed=1, epoch=number, threads=threads))


def compare(limit: Epoch, readers: dict[str, Epoch], sample_bytes: int, repeats: int) -> dict[str, dict[str, float]]:
    """Reader -> GB/s, and fractions of the limit's speed by wall and by processor time; medians.

    Each epoch of a reader follows one of the limit, and fractions are taken of such pairs: the speed of memory changes
    with whatever else the machine has just done.
    """
    pairs: dict[str, list[tuple[_Taken, _Taken]]] = {name: [] for name in readers}
    for repeat in range(-1, repeats):
        for name, epoch in readers.items():
            pair = _timed(limit, repeat + 1), _timed(epoch, repeat + 1)
            if repeat >= 0:  # the first epoch warms up, and checks checksums
                pairs[name].append(pair)
    limits = [first.wall for found in pairs.values() for first, _ in found]
    speeds = {
        "limit": {"gb_per_s": sample_bytes / statistics.median(limits) / 1e9, "of_limit": 1.0, "of_limit_cpu": 1.0}
    }
    for name, found in pairs.items():
        speeds[name] = {
            "gb_per_s": sample_bytes / statistics.median(reader.wall for _, reader in found) / 1e9,
            "of_limit": statistics.median(first.wall / reader.wall for first, reader in found),
            "of_limit_cpu": statistics.median(first.processor / reader.processor for first, reader in found),
        }
    return speeds


class _Taken(NamedTuple):
    """Seconds a sample."""

    wall: float
    processor: float


def _timed(epoch: Epoch, number: int) -> _Taken:
    wall, processor = time.perf_counter(), time.process_time()
    samples = epoch(number)
    return _Taken((time.perf_counter() - wall) / samples, (time.process_time() - processor) / samples)


def sizes(location: Path, samples: Array) -> dict[str, float]:
    """Bytes on disk over those of float16, and the relative L2 error, on some samples."""
    cache = open_cache(location)
    split = cache.splits["train"]
    some = np.arange(0, len(samples), max(1, len(samples) // 32))
    values = split.read(some)
    assert isinstance(values, np.ndarray)
    exact = samples[some].astype(np.float32)
    error = np.linalg.norm(split.dequantise(values) - exact) / np.linalg.norm(exact)
    return {"ratio": cache.nbytes / samples.nbytes, "error": float(error)}
