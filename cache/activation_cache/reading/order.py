"""The order of samples in an epoch: a function of (samples, seed, epoch) and of nothing else.

Built on the raw output of PCG64, whose stream numpy guarantees, rather than on `Generator.permutation`, whose
algorithm it does not: a run resumed under another numpy goes on in the same order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from activation_cache.errors import FormatError

Indices = npt.NDArray[np.int64]


def epoch_order(samples: int, seed: int, epoch: int) -> Indices:
    """A permutation of range(samples), shape (samples,) int64, drawn from (seed, epoch); both at least 0."""
    return _shuffled(np.zeros(samples, np.uint64), 1, seed, epoch)


def windowed_order(samples: int, chunk: int, window: int, seed: int, epoch: int) -> Indices:
    """A permutation for samples that are stored `chunk` to a compressed chunk, shape (samples,) int64.

    Chunks are shuffled; then the samples of each `window` consecutive chunks are shuffled together, so that a reader
    decodes every chunk once an epoch and holds `window` of them. With at most `window` chunks it is `epoch_order`.
    """
    chunks = -(-samples // chunk)
    if chunks <= window:
        return epoch_order(samples, seed, epoch)
    place = np.empty(chunks, np.uint64)  # place[c]: in which window chunk c is read
    place[_shuffled(np.zeros(chunks, np.uint64), 1, seed, epoch, 1)] = np.arange(chunks, dtype=np.uint64) // window
    return _shuffled(np.repeat(place, chunk)[:samples], -(-chunks // window), seed, epoch)


def _shuffled(group: npt.NDArray[np.uint64], groups: int, *entropy: int) -> Indices:
    """The numbers of all items in order of their group (below `groups`), at random within each.

    Sorts 64-bit words of group, random bits and number, in this order from the top: no two are equal, so the result
    does not depend on how numpy sorts, and plain sorting is several times faster than argsort.
    """
    number_bits, group_bits = max(1, len(group) - 1).bit_length(), (groups - 1).bit_length()
    draws: npt.NDArray[np.uint64] = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(len(group))
    words = (draws >> np.uint64(group_bits + number_bits)) << np.uint64(number_bits)
    words |= np.arange(len(group), dtype=np.uint64)
    if group_bits:
        words |= group << np.uint64(64 - group_bits)
    words.sort()
    return (words & np.uint64((1 << number_bits) - 1)).astype(np.int64)


def rank_slice(
    order: Indices, batch_size: int, rank: int, world_size: int, drop_last: bool, start: int = 0
) -> list[Indices]:
    """Batches of one rank from the `start`-th on: step t of all ranks together covers the next
    batch_size * world_size samples of `order`.

    The last, shorter step is dropped with `drop_last`, and otherwise shared out evenly (a rank may get none of it).
    """
    if batch_size < 1 or start < 0 or not 0 <= rank < world_size:
        raise FormatError(f"no batches of {batch_size} from number {start} on for rank {rank} of {world_size}")
    step = batch_size * world_size
    whole = len(order) // step
    batches = [order[t * step + rank * batch_size : t * step + (rank + 1) * batch_size] for t in range(whole)]
    if not drop_last and whole * step < len(order):
        last = np.array_split(order[whole * step :], world_size)[rank]
        if len(last):
            batches.append(last)
    return batches[start:]
