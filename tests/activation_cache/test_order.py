"""Every sample exactly once an epoch, in an order that depends on seed and epoch alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activation_cache import FormatError, JoinedSplits, SplitSpec, Storage, create, epoch_order, make_key, open_cache
from activation_cache.reading.order import rank_slice, windowed_order

SEEDS = st.integers(0, 2**40)


def test_the_order_never_changes() -> None:
    """A run that is resumed under another version goes on in the order it began with."""
    assert epoch_order(12, seed=3, epoch=5).tolist() == [5, 0, 8, 11, 6, 9, 3, 10, 4, 1, 2, 7]
    assert windowed_order(12, 2, 2, seed=3, epoch=5).tolist() == [11, 3, 10, 2, 5, 6, 4, 7, 0, 8, 9, 1]


@given(samples=st.integers(0, 300), seed=SEEDS, epoch=SEEDS)
def test_a_permutation(samples: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(samples, seed, epoch).tolist()) == list(range(samples))


@given(st.integers(0, 300), st.integers(1, 20), st.integers(1, 6), SEEDS, SEEDS)
def test_a_windowed_permutation_needs_few_chunks_at_a_time(samples, chunk, window, seed, epoch) -> None:  # type: ignore[no-untyped-def]
    order = windowed_order(samples, chunk, window, seed, epoch)
    assert sorted(order.tolist()) == list(range(samples))
    chunks = order // chunk
    seen: list[int] = []
    for c in chunks.tolist():
        if c not in seen:
            seen.append(c)
        assert seen.index(c) // window == (len(seen) - 1) // window  # never back to an earlier window


def test_positions_are_uniform() -> None:
    """Where a sample goes does not depend on its number: 2000 epochs of 8 samples, each cell within 5 sigma of 250."""
    counts = np.zeros((8, 8))
    for epoch in range(2000):
        counts[np.arange(8), epoch_order(8, 0, epoch)] += 1
    assert np.abs(counts - 250).max() < 5 * np.sqrt(250)


@given(st.integers(0, 200), st.integers(1, 17), st.integers(1, 5), st.booleans())
def test_ranks_share_an_epoch_without_overlap(samples, batch, world, drop_last) -> None:  # type: ignore[no-untyped-def]
    order = epoch_order(samples, 0, 0)
    ranks = [rank_slice(order, batch, rank, world, drop_last) for rank in range(world)]
    read = [i for batches in ranks for indices in batches for i in indices.tolist()]
    assert len(set(read)) == len(read)
    assert len(read) == (samples // (batch * world) * batch * world if drop_last else samples)
    if drop_last:
        assert {len(indices) for batches in ranks for indices in batches} <= {batch}
        assert len({len(batches) for batches in ranks}) == 1


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"start": -1}, {"rank": 2, "world_size": 2}], ids=str)
def test_batches_that_cannot_be_are_refused(cache: Path, wrong: dict[str, int]) -> None:
    split = open_cache(cache).splits["train"]
    for samples in (split, JoinedSplits([split])):
        with pytest.raises(FormatError, match="no batches of"):
            samples.batches(**{"batch_size": 4, **wrong})


@pytest.fixture(scope="module", params=[("none", None), ("lz4", 1), ("zstd", 4), ("none", 4)], ids=str)
def cache(request, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    codec, chunk = request.param
    storage = Storage("float16", codec)
    location: Path = tmp_path_factory.mktemp("order") / "cache"
    spec = SplitSpec("train", 1000, (3,), shard_samples=90, chunk_samples=chunk)
    with create(location, make_key({}, storage), [spec], storage) as writer:
        writer.append("train", np.arange(3000, dtype=np.float16).reshape(1000, 3) % 997, [str(i) for i in range(1000)])
        writer.commit()
    return location


def test_threads_and_starts_change_nothing(cache: Path) -> None:
    split = open_cache(cache).splits["train"]
    plain = split.read(range(1000))
    whole = [b.indices.tolist() for b in split.batches(32, seed=7, epoch=2, threads=0)]
    assert whole == [split.order(7, 2)[t * 32 : (t + 1) * 32].tolist() for t in range(1000 // 32)]
    assert whole != [b.indices.tolist() for b in split.batches(32, seed=7, epoch=3, threads=0)]
    for threads in (None, 0, 1, 3):
        for start in (0, 1, 17, 31, 99):
            batches = list(split.batches(32, seed=7, epoch=2, threads=threads, start=start))
            assert [b.indices.tolist() for b in batches] == whole[start:]
            for b in batches:
                np.testing.assert_array_equal(b.values, plain[b.indices])


def own(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:  # type: ignore[type-arg]
    return np.empty(shape, dtype)


def viewed(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:  # type: ignore[type-arg]
    """As pinned memory comes: bytes, seen as something else."""
    return np.empty(int(np.prod(shape)) * dtype.itemsize, np.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("make", [own, viewed])
def test_buffers_are_reused_only_when_nobody_holds_them(cache: Path, make) -> None:  # type: ignore[no-untyped-def]
    split = open_cache(cache).splits["train"]
    made: list[int] = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:  # type: ignore[type-arg]
        made.append(1)
        return make(shape, dtype)  # type: ignore[no-any-return]

    for threads in (0, 2):
        for epoch in range(3):
            for _ in split.batches(32, epoch=epoch, threads=threads, allocate=allocate):
                pass
        assert len(made) <= threads + 5
        made.clear()
    for part in (lambda v: v, lambda v: v[:1], lambda v: v.reshape(-1)[3:5], lambda v: v.T):
        held = [(part(b.values), part(b.values).copy()) for b in split.batches(32, allocate=allocate)]
        for kept, was in held:
            np.testing.assert_array_equal(kept, was)


def test_leaving_an_epoch_early_ends_its_threads(cache: Path) -> None:
    import threading

    split = open_cache(cache).splits["train"]
    for _ in split.batches(8, threads=2):
        break
    assert not [t for t in threading.enumerate() if t.name.startswith("cache-reader") and t.is_alive()]
