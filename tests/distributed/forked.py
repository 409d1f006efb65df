"""Processes of one training, forked from one that has imported everything: they take no longer than their work."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from layerwise.training.ranks import Ranks

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.distributed.pipelines", "tests.distributed.updates"])


def forked(world: int, folder: Path, work: Callable[[Ranks], Any], seconds: float = 60) -> list[Any]:
    """What `work` returns or raises in each of so many processes; the negative number of a signal that ended one."""
    folder.mkdir(parents=True, exist_ok=True)
    store = str(folder / f"store-{time.monotonic_ns()}")
    processes = [SERVER.Process(target=_work, args=(world, rank, store, work)) for rank in range(world)]
    for process in processes:
        process.start()
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} of {world} processes did not end in {seconds} s"
    return [
        pickle.loads(Path(f"{store}-{rank}").read_bytes()) if process.exitcode == 0 else process.exitcode  # noqa: S301
        for rank, process in enumerate(processes)
    ]


def _work(world: int, rank: int, store: str, work: Callable[[Ranks], Any]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    shared = dist.FileStore(store, world)
    dist.init_process_group("gloo", store=dist.PrefixStore("group", shared), rank=rank, world_size=world)
    try:
        result = work(Ranks(rank, world, dist.PrefixStore("layerwise", shared)))
    except Exception as error:
        result = error
    Path(f"{store}-{rank}").write_bytes(pickle.dumps(result))
    os._exit(0)  # others may have ended, and connections to them would be waited for
