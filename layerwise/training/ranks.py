"""The processes that train together, as torchrun starts them: each is one more slice of every batch.

Every process goes through its own samples, and what they have is summed here. No collective is part of a graph, and no
sum is divided: a loss is a mean over the whole batch already, so that the gradients of the slices add up to its own.

Whatever is drawn at random follows from numbers of samples in the whole batch, never from the number of a process.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from layerwise.errors import ProcessLost, UsageError

BUCKET = 1 << 22  # numbers that are summed at a time, so that a copy of them all is never needed
PATIENCE = timedelta(minutes=30)
"""How long a process waits for another in a step: an epoch's checkpoint and a slow file system lie within it."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. Calls are collective: every process makes the same ones, in the
    same order.

    Raises (all of its calls):
        ProcessLost: another process ended in the meantime.
    """

    rank: int = 0
    world: int = 1
    store: Store | None = field(default=None, compare=False)
    handed_out: list[int] = field(default_factory=lambda: [0], compare=False)
    """How many values `told` has passed on."""
    group: dist.ProcessGroup | None = field(default=None, compare=False)
    """Of collectives; None: all processes."""

    @property
    def alone(self) -> bool:
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, and prints."""
        return self.rank == 0

    def shares(self, count: int) -> list[int]:
        """Where the share of each process begins among `count` things, and where that of the last ends."""
        return [count * rank // self.world for rank in range(self.world + 1)]

    def whole(self, part: Tensor, begin: int, total: int) -> Tensor:
        """All rows of a tensor of which this process has those from `begin` on; exact for every dtype. No gradient."""
        rows = part.detach().contiguous()
        found = torch.zeros((total, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        found[begin : begin + len(rows)] = rows
        with lost_is_told():
            dist.all_reduce(found.view(-1).view(torch.uint8), group=self.group)
        return found

    def summed(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes."""
        if self.alone:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        with lost_is_told():
            dist.all_reduce(found, group=self.group)
        return found.tolist()

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the processes."""
        if self.alone:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        with lost_is_told():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return found.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is set in any process."""
        return self.summed([float(flag)])[0] > 0

    def sum_gradients(self, weights: Iterable[Tensor], loss: float) -> Callable[[], float]:
        """Begin to sum the gradients of these weights in place, and the loss; the call that is returned waits for the
        end and gives the sum of the losses. A weight without a gradient in all processes keeps none.
        """
        if self.alone:
            return lambda: loss
        trained = [weight for weight in weights if weight.requires_grad]
        has = torch.tensor([loss, *(float(weight.grad is not None) for weight in trained)], dtype=torch.float64)
        for weight in trained:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        with lost_is_told():
            works = [dist.all_reduce(has, group=self.group, async_op=True)]
            flat = []
            for some in _buckets(trained):
                flat.append((some, torch.cat([weight.grad.flatten() for weight in some])))  # type: ignore[union-attr]
                works.append(dist.all_reduce(flat[-1][1], group=self.group, async_op=True))

        def wait() -> float:
            with lost_is_told():
                for work in works:
                    work.wait()
            for some, sums in flat:
                for weight, found in zip(some, sums.split([weight.numel() for weight in some]), strict=True):
                    weight.grad.copy_(found.view_as(weight))  # type: ignore[union-attr]
            total, *present = has.tolist()
            for weight, count in zip(trained, present, strict=True):
                if not count:
                    weight.grad = None
            return float(total)

        return wait

    def wait(self) -> None:
        """Until all processes are here."""
        self.summed([0.0])

    def within(self, parts: Sequence[range]) -> Ranks:
        """This process among those of its part, of parts that together hold every process once."""
        self.handed_out[0] += 1
        mine = ALONE
        for part in parts:
            if len(part) == 1:
                continue
            group = dist.new_group(list(part), timeout=PATIENCE)  # which every process has to call
            if self.rank in part:
                assert self.store is not None
                assert isinstance(group, dist.ProcessGroup)
                store = PrefixStore(f"part/{self.handed_out[0]}/{part.start}", self.store)
                mine = Ranks(self.rank - part.start, len(part), store, group=group)
        return mine

    def ask(self, question: str) -> None:
        """Let every process that calls `asked` know."""
        assert self.store is not None
        with lost_is_told():
            self.store.set(question, "1")

    def asked(self, question: str) -> bool:
        """Whether any process has called `ask`; costs a round trip to the first."""
        assert self.store is not None
        with lost_is_told():
            return self.store.check([question])

    def told(self, value: Any) -> Any:
        """What the first process gives (as JSON), in every process, however long it takes."""
        if self.alone:
            return value
        assert self.store is not None
        self.handed_out[0] += 1
        key = f"told/{self.handed_out[0]}"
        try:
            if self.first:
                self.store.set(key, json.dumps(value))
                return value
            pause = 0.002  # seconds; to wait inside the store would hold up signals, and print warnings
            while not self.store.check([key]):
                time.sleep(pause)
                pause = min(1.5 * pause, 0.2)
            return json.loads(self.store.get(key))
        except dist.DistNetworkError as error:
            raise ProcessLost(LOST) from error


ALONE = Ranks()
LOST = (
    "another process of this training has ended, and its own message says why; everything up to the last checkpoint "
    "is saved, and the same command resumes from there"
)


def is_follower() -> bool:
    """Whether torchrun started this process, and another one writes and prints."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


def local_device(kind: str) -> torch.device:
    """The device of this process: with "cuda", of as many as there are processes on this machine, one each."""
    if kind == "cuda" and os.environ.get("WORLD_SIZE", "1") != "1":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(kind)


def joined(device: torch.device) -> Ranks:
    """This process among those that torchrun (or RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) says there are.

    Raises:
        UsageError: not all of these are set.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ALONE
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UsageError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that several processes train together, but {missing[0]} is "
            "not set: start them with torchrun, or unset WORLD_SIZE"
        )
    return _started(device)


@cache
def _started(device: torch.device) -> Ranks:
    """The connections of this process, which it makes once."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, world = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=world, timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)
    return Ranks(rank, world, PrefixStore("layerwise", store))


def _buckets(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The weights by dtype and device, some at a time."""
    some: list[Tensor] = []
    for weight in weights:
        other = bool(some) and (weight.dtype, weight.device) != (some[0].dtype, some[0].device)
        if some and (other or sum(known.numel() for known in some) + weight.numel() > BUCKET):
            yield some
            some = []
        some.append(weight)
    if some:
        yield some


@contextmanager
def lost_is_told() -> Iterator[None]:
    """
    Raises:
        ProcessLost: in place of the errors of connections that have ended.
    """
    try:
        yield
    except RuntimeError as error:  # gloo has no type of its own for a connection that ends
        if isinstance(error, dist.DistError) or re.search("onnection|peer|imed out|Socket", str(error)):
            raise ProcessLost(LOST) from error
        raise
