"""Random numbers that depend on what they are for, and on nothing that happened before.

Every draw (a view of a sample, the negatives of a step, a module's initial weights) has its own generator, seeded by
the recipe's seed and the draw's coordinates. So a resumed run needs no stored generator state, and the order of work
never changes a value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive_seed(seed: int, *coordinates: int | str) -> int:
    """A seed below 2**63 for the draw at these coordinates."""
    text = "\x1f".join([str(seed), *map(str, coordinates)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def numpy_generator(seed: int, *coordinates: int | str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(derive_seed(seed, *coordinates)))


def torch_generator(seed: int, *coordinates: int | str) -> torch.Generator:
    """On the CPU whatever the device, so that the same numbers are drawn everywhere."""
    return torch.Generator().manual_seed(derive_seed(seed, *coordinates))


@contextmanager
def same_bits_in_every_run() -> Iterator[None]:
    """Ask torch for sums in one order within the block: with several threads, gathering's gradient otherwise adds in
    whichever comes.
    """
    settings: Any = torch.utils.deterministic  # torch does not declare what it holds
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # nothing here reads memory that it did not write
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled


@contextmanager
def seeded(seed: int, *coordinates: int | str) -> Iterator[None]:
    """Seed torch's global generator (initialisation, dropout) inside the block and restore it afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, *coordinates))
        yield
