"""What writing a cache adds to the forward pass that feeds it."""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from activation_cache import SplitSpec, Storage, create, make_key
from benchmarks.cache_peers import Array
from benchmarks.cache_workloads import WORKLOADS, activations, say


def writing(work: Path, raw: dict[str, Path], repeats: int) -> dict[str, float]:
    """Seconds of: the forward pass alone, a raw write alone, and both through the cache's writer; and the ratio of the
    last to the longer of the others, the median over rounds in which each had its turn.
    """
    keep_freed_memory()
    count = 240  # 1.5 GB: enough that the last shard, which nothing overlaps, weighs little
    samples: Array = np.memmap(raw["A"], np.float16, "r").reshape(-1, *WORKLOADS[0].shape)
    kept = np.array(samples)
    storage = Storage("float16")
    target = work / "written"
    seconds: dict[str, list[float]] = {"forward": [], "raw write": [], "cache": []}

    def forward() -> None:
        for _ in activations(count):
            pass

    def raw_write() -> None:
        with open(work / "raw-written", "wb", buffering=0) as file:
            for i in range(count):
                file.write(kept[i % len(kept)].data)
            os.fsync(file.fileno())

    def cache() -> None:
        spec = SplitSpec("train", count, WORKLOADS[0].shape)
        threads = 1 if torch.cuda.is_available() else 0
        with create(target, make_key({}, storage), [spec], storage, threads=threads) as writer:
            for i, sample in enumerate(activations(count)):
                writer.append("train", sample[None], [str(i)])
            writer.commit()

    for repeat in range(-1, repeats):
        for name, work_of in (("forward", forward), ("raw write", raw_write), ("cache", cache)):
            (work / "raw-written").unlink(missing_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            os.sync()  # a disk that is told of the blocks that became free takes its time over it
            began = time.perf_counter()
            work_of()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rounds = zip(seconds["forward"], seconds["raw write"], seconds["cache"], strict=True)
    medians["ratio"] = statistics.median(cached / max(alone, raw) for alone, raw, cached in rounds)
    say(f"writing: forward {medians['forward']:.2f} s, raw write {medians['raw write']:.2f} s, both through the cache "
        f"{medians['cache']:.2f} s: {medians['ratio']:.2f} of the longer")  # fmt: skip
    return medians


def keep_freed_memory() -> None:
    """Keeps what is freed, where the C library is glibc: giving pages back to the system and getting new ones makes
    the same forward pass take up to twice as long, and it is chance which of two passes does.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX
