"""Several processes on one cache, a disk that fills up, and caches made to do harm."""

from __future__ import annotations

import copy
import errno
import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from activation_cache import (
    Cache,
    CacheError,
    Damaged,
    DoesNotFit,
    Locked,
    NotCommitted,
    SplitSpec,
    Stale,
    Storage,
    create,
    inspect,
    make_key,
    open_cache,
    verify,
)
from activation_cache.store.base import LocalStore

VALUES = np.random.default_rng(0).standard_normal((40, 16, 16)).astype(np.float32)
STORAGES = [Storage(), Storage("float32", "lz4")]


def write(location: Path, storage: Storage, samples: int = 40) -> None:
    spec = SplitSpec("train", samples, (16, 16), {"class": "int8"}, shard_samples=10)
    with create(location, make_key({}, storage), [spec], storage) as writer:
        for part in writer.pending("train"):
            for i in part:
                writer.append("train", VALUES[i : i + 1], [str(i)], {"class": [i]})
        writer.commit()


def total(cache: Cache) -> float:
    return float(sum(batch.values.astype(np.float64).sum() for batch in cache.splits["train"].batches(8)))


def put_total(cache: Cache, queue: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    queue.put(total(cache))


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.codec)
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_reader_works_in_worker_processes(tmp_path: Path, method: str, storage: Storage) -> None:
    write(tmp_path / "c", storage)
    cache = open_cache(tmp_path / "c")
    expected = total(cache)  # used before the fork: maps, flags and buffers are inherited
    half = cache.splits["train"].batches(4, threads=2)
    next(half)  # and threads are running
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=put_total, args=(cache, queue)) for _ in range(2)]  # type: ignore[attr-defined]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=120) for _ in workers] == [pytest.approx(expected)] * 2
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert sum(len(batch) for batch in half) == 36


def test_a_torch_loader_with_workers(tmp_path: Path) -> None:
    data = pytest.importorskip("torch.utils.data")
    write(tmp_path / "c", Storage())
    split = open_cache(tmp_path / "c").splits["train"]

    class Samples(data.Dataset):  # type: ignore[misc, name-defined]
        def __len__(self) -> int:
            return split.samples

        def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[type-arg]
            found = split.read([index])[0]
            assert isinstance(found, np.ndarray)
            return found

    loader = data.DataLoader(Samples(), batch_size=10, num_workers=2)
    np.testing.assert_array_equal(np.concatenate([batch.numpy() for batch in loader]), VALUES)


WRITER = """
import sys
from activation_cache import SplitSpec, Storage, create, make_key
create(sys.argv[1], make_key({}, Storage()), [SplitSpec("train", 40, (16, 16))], Storage())
print("writing", flush=True)
sys.stdin.read()
"""


def test_the_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "c")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout is not None
        first.stdout.readline()
        with pytest.raises(Locked, match=str(first.pid)) as caught:
            create(tmp_path / "c", make_key({}, Storage()), [SplitSpec("train", 40, (16, 16))], Storage())
        assert str(first.pid) in copy.copy(caught.value).holder  # copied as between processes
        with pytest.raises(NotCommitted):
            open_cache(tmp_path / "c")
        first.kill()


def test_a_reader_keeps_reading_what_is_replaced_beneath_it(tmp_path: Path) -> None:
    write(tmp_path / "c", Storage())
    split = open_cache(tmp_path / "c").splits["train"]
    np.testing.assert_array_equal(split.read(range(40)), VALUES)
    other = make_key({"other": 1}, Storage())
    with create(tmp_path / "c", other, [SplitSpec("train", 1, (2,))], Storage(), replace=True) as writer:
        writer.append("train", np.ones((1, 2)), ["a"])
        writer.commit()
    np.testing.assert_array_equal(split.read(range(40)), VALUES)
    with pytest.raises(Stale):
        open_cache(tmp_path / "c", make_key({}, Storage()))


def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: writing beyond it fails in the same way."""
    read, sent = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            write(tmp_path / "c", Storage())
            outcome = {"error": None}
        except DoesNotFit as error:
            outcome = {"error": str(error), "needed": error.needed, "path": error.path}  # type: ignore[dict-item]
        except BaseException as error:
            outcome = {"error": repr(error), "path": ""}  # type: ignore[dict-item]
        os.write(sent, json.dumps(outcome).encode())
        os._exit(0)
    os.close(sent)
    with os.fdopen(read) as pipe:
        outcome = json.loads(pipe.read())
    os.waitpid(child, 0)
    assert outcome["error"] is not None
    assert os.strerror(errno.EFBIG) in outcome["error"]
    assert "/train/values/0/c/" in outcome["path"]
    assert outcome["needed"] > 10 * 1024
    assert inspect(tmp_path / "c").state == "partial"
    assert not list((tmp_path / "c").rglob("*.tmp"))
    write(tmp_path / "c", Storage())
    assert verify(tmp_path / "c").ok


def test_the_reserve_is_kept_while_writing(tmp_path: Path) -> None:
    spec = SplitSpec("train", 40, (16, 16), shard_samples=10)
    with create(tmp_path, make_key({}, Storage()), [spec], Storage(), reserve=10**18) as writer:
        writer.append("train", VALUES[:10], [str(i) for i in range(10)])
        with pytest.raises(DoesNotFit, match="are to stay free"):
            writer.commit()


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.codec)
def test_the_budget_is_kept_while_writing(tmp_path: Path, storage: Storage, threads: int) -> None:
    """Whatever the budget, never a byte more lies there; and with a larger one the same cache is finished."""
    spec = SplitSpec("train", 40, (16, 16), {"class": "int8"}, shard_samples=10)
    write(tmp_path / "whole", storage)
    whole = sum(size for _, size in LocalStore(tmp_path / "whole").list()) + 200  # and the name of who holds the lock
    refused = 0
    for budget in (*range(5_000, whole, 9_000), whole):
        try:
            with create(tmp_path / "c", make_key({}, storage), [spec], storage, budget=budget, threads=threads) as w:
                for part in w.pending("train"):
                    w.append("train", VALUES[part.start : part.stop], [str(i) for i in part], {"class": list(part)})
                w.commit()
        except DoesNotFit as error:
            refused += 1
            assert f"of the budget of {budget:,} bytes" in str(error)  # noqa: PT017 - more than the error is looked at
            assert error.needed > error.free  # noqa: PT017
        assert sum(size for _, size in LocalStore(tmp_path / "c").list()) <= budget
    assert refused >= 3
    assert verify(tmp_path / "c").ok


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_cache_is_executed(tmp_path: Path) -> None:
    write(tmp_path / "c", Storage("float32", "lz4"))
    crafted = pickle.dumps(Canary(tmp_path / "canary"))
    for path in [p for p in (tmp_path / "c").rglob("*") if p.is_file()]:
        kept = path.read_bytes()
        path.write_bytes(crafted)
        with suppress(CacheError):
            total(open_cache(tmp_path / "c"))
        verify(tmp_path / "c")
        path.write_bytes(kept)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_shard_that_lies_about_its_sizes(tmp_path: Path, codec: str) -> None:
    """Even with all checksums made to fit, a decoder is not led beyond its buffers."""
    from activation_cache.format.layout import Storage as Kept
    from activation_cache.format.shard import BadShard, decode_chunk, encode, read_index

    rows = np.ones((1, 4096), np.uint8)
    storage = Kept("uint8", codec)  # type: ignore[arg-type]
    encoded = encode(rows, storage, 1, 1)
    image = np.frombuffer(b"".join(bytes(part) for part in encoded.parts), np.uint8).copy()
    index = read_index(image, 1, 1, encoded.seal)
    for size in (4095, 4097, 16):
        with pytest.raises(BadShard):
            decode_chunk(image, index, 0, storage, np.empty(size, np.uint8))
    rng = np.random.default_rng(0)
    for _ in range(2000):
        changed = image.copy()
        at = int(rng.integers(0, index.lengths[0]))
        changed[at] = rng.integers(0, 256)
        try:
            decode_chunk(changed, index, 0, storage, np.empty(4096, np.uint8))
        except BadShard:
            continue


def test_damage_error_travels(tmp_path: Path) -> None:
    error = Damaged("x", ["a", "b"])
    assert copy.copy(error).paths == ("a", "b")  # copied as between processes
