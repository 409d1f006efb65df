"""Peak memory of a piece of work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class Peak:
    """Most bytes held at once; None where the device does not say."""

    allocated: int | None = None
    """In tensors."""
    reserved: int | None = None
    """Taken from the device by the allocator."""


@contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """Measure the block. On a CUDA device alone: the others do not count."""
    found = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found.allocated = torch.cuda.max_memory_allocated(device)
        found.reserved = torch.cuda.max_memory_reserved(device)
