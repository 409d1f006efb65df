"""Processes of one training, forked from one that has imported everything: they take no longer than their work."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
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
    processes, answers = [], []
    for rank in range(world):
        here, there = SERVER.Pipe()
        process = SERVER.Process(target=_work, args=(world, rank, store, work, there))
        process.start()
        there.close()  # so that the end of the process ends the pipe
        processes.append(process)
        answers.append(here)
    until = time.monotonic() + seconds
    late = [rank for rank, answer in enumerate(answers) if not answer.poll(max(0.0, until - time.monotonic()))]
    for rank in late:
        processes[rank].kill()
    assert not late, f"{len(late)} of {world} processes did not end in {seconds} s"
    return [_answer(process, answer) for process, answer in zip(processes, answers, strict=True)]


def _answer(process: Any, answer: Connection) -> Any:
    try:
        with answer:
            return answer.recv()
    except EOFError:
        process.join()
        return process.exitcode


def _work(world: int, rank: int, store: str, work: Callable[[Ranks], Any], answer: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    shared = dist.FileStore(store, world)
    dist.init_process_group("gloo", store=dist.PrefixStore("group", shared), rank=rank, world_size=world)
    try:
        result = work(Ranks(rank, world, dist.PrefixStore("layerwise", shared)))
    except Exception as error:
        result = error
    answer.send(result)
    answer.poll(None)  # tensors lie in memory of this process until they are received
    os._exit(0)  # others may have ended, and connections to them would be waited for
