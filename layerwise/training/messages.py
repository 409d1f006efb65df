"""What one process sends to another: bytes of tensors, through gloo and the host's memory.

Messages of one kind between two processes arrive in their order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from layerwise.training.feeds import HOST
from layerwise.training.ranks import lost_is_told


class Kind(IntEnum):
    FORM = 1
    LABELS = 2
    INPUTS = 3
    NOTE = 4
    STATE = 5


@dataclass(frozen=True)
class Moving:
    """A tensor on its way to or from another process; it lives until it is there."""

    work: dist.Work
    tensor: Tensor

    def wait(self) -> None:
        """
        Raises:
            ProcessLost: the other process ended.
        """
        with lost_is_told():
            self.work.wait()


def send(process: int, kind: Kind, tensor: Tensor) -> Moving:
    """Begin to send a contiguous tensor in the host's memory, which must not change until it is there."""
    flat = tensor.reshape(-1).view(torch.uint8)
    with lost_is_told():
        work = dist.isend(flat, process, tag=kind)
    assert work is not None
    return Moving(work, flat)


def receive(process: int, kind: Kind, into: Tensor) -> Moving:
    """Begin to fill a contiguous tensor in the host's memory with what the other process sends."""
    flat = into.view(-1).view(torch.uint8)
    with lost_is_told():
        work = dist.irecv(flat, process, tag=kind)
    assert work is not None
    return Moving(work, flat)


def send_json(process: int, kind: Kind, value: Any) -> list[Moving]:
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [send(process, kind, torch.tensor([len(content)])), send(process, kind, content)]


def receive_json(process: int, kind: Kind) -> Any:
    length = torch.empty(1, dtype=torch.int64)
    receive(process, kind, length).wait()
    content = torch.empty(int(length), dtype=torch.uint8)
    receive(process, kind, content).wait()
    return json.loads(content.numpy().tobytes())


def send_tensors(process: int, tensors: Mapping[str, Tensor]) -> list[Moving]:
    """Begin to send copies, so that the tensors may change."""
    copies = {
        name: tensor.detach().to(HOST, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    forms = {name: [dtype_name(tensor.dtype), list(tensor.shape)] for name, tensor in copies.items()}
    moving = send_json(process, Kind.STATE, forms)
    return [*moving, *(send(process, Kind.STATE, tensor) for tensor in copies.values() if tensor.numel())]


def receive_tensors(process: int) -> dict[str, Tensor]:
    """What the other process gave to `send_tensors`."""
    forms: Mapping[str, tuple[str, list[int]]] = receive_json(process, Kind.STATE)
    found = {name: torch.empty(shape, dtype=dtype_of(dtype)) for name, (dtype, shape) in forms.items()}
    wait(receive(process, Kind.STATE, tensor) for tensor in found.values() if tensor.numel())
    return found


def wait(moving: Iterable[Moving]) -> None:
    for one in moving:
        one.wait()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def dense(tensor: Tensor, *, whole: bool) -> Tensor:
    """The tensor, or a contiguous copy where its numbers do not lie side by side in memory; row by row, unless it is
    sent `whole`.
    """
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return tensor.contiguous()
        expected *= size
    in_rows = len(tensor) == 1 or tensor.stride(0) == math.prod(tensor.shape[1:])
    return tensor if whole or in_rows else tensor.contiguous()
