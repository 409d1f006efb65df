"""A writer may be killed, or its disk fail, at any moment: what is left is refused or right, and can be finished."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from activation_cache import CacheError, NotCommitted, SplitSpec, Storage, create, inspect, make_key, open_cache, verify
from activation_cache.store.base import LocalStore
from activation_cache.testing import Fault, FaultyStore
from tests.faults.conftest import scaled

SAMPLES = 12
VALUES = np.random.default_rng(5).standard_normal((SAMPLES, 4, 5)).astype(np.float32)
IDS = [f"image {i}" for i in range(SAMPLES)]
STORAGE = Storage("float32", "lz4")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes go to the page cache alone: a killed process loses nothing of it, and these tests cut no power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def write(store: LocalStore | FaultyStore, threads: int = 1) -> None:
    """Writes what is still to be written, in two splits, and commits."""
    splits = [
        SplitSpec("train", SAMPLES, (4, 5), {"class": "int8"}, shard_samples=3),
        SplitSpec("test", 5, (4, 5), shard_samples=2),
    ]
    with create(store, make_key({"weights": "ab"}, STORAGE), splits, STORAGE, threads=threads) as writer:
        for part in writer.pending("train"):
            for i in part:
                writer.append("train", VALUES[i : i + 1], IDS[i : i + 1], {"class": [i]})
        for part in writer.pending("test"):
            writer.append("test", VALUES[part.start : part.stop], IDS[part.start : part.stop])
        writer.commit()


def is_right(location: Path) -> bool:
    splits = open_cache(location, make_key({"weights": "ab"}, STORAGE)).splits
    return (
        np.array_equal(splits["train"].read(range(SAMPLES)), VALUES)
        and np.array_equal(splits["test"].read(range(5)), VALUES[:5])
        and splits["train"].ids == IDS
        and np.array_equal(splits["train"].labels["class"], np.arange(SAMPLES))
    )


def changes(location: Path) -> int:
    counting = FaultyStore(LocalStore(location), -1, "fail")
    write(counting)
    return counting.changes


def in_child(store: FaultyStore, threads: int) -> int:
    """Writes in a forked child; the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            write(store, threads)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.mark.parametrize("fault", ["kill", "kill after", "truncate"])
def test_killed_at_every_change(tmp_path: Path, fault: Fault) -> None:
    total = changes(tmp_path / "counted")
    assert total > 30
    for at in range(total):
        location = tmp_path / str(at)
        assert in_child(FaultyStore(LocalStore(location), at, fault), threads=at % 2) == signal.SIGKILL
        if inspect(location).state == "valid":
            assert is_right(location), f"killed at change {at}, and the cache opens and is wrong"
            continue
        with pytest.raises(CacheError):
            open_cache(location)
        if fault == "truncate" and inspect(location).state == "damaged":  # the commit record or the plan itself
            with create(location, make_key({"weights": "ab"}, STORAGE), [], STORAGE, replace=True):
                pass
            continue
        write(LocalStore(location))
        assert is_right(location)
        assert verify(location).ok
        assert not list(location.rglob("*.tmp"))


@pytest.mark.parametrize("fault", ["fail", "full"])
def test_a_disk_that_fails_at_every_change(tmp_path: Path, fault: Fault) -> None:
    for at in range(changes(tmp_path / "counted")):
        location = tmp_path / str(at)
        with pytest.raises(OSError):
            write(FaultyStore(LocalStore(location), at, fault), threads=at % 2)
        with pytest.raises(NotCommitted):
            open_cache(location)
        write(LocalStore(location))
        assert is_right(location)


WRITER = """
import sys
from collections import Counter
from pathlib import Path
import numpy as np
from activation_cache import SplitSpec, Storage, create, make_key
storage = Storage("float16", "zstd")
spec = SplitSpec("train", 400, (64, 32), {"class": "int16"}, shard_samples=10)
print("started", flush=True)
with create(sys.argv[1], make_key({}, storage), [spec], storage, threads=int(sys.argv[2])) as writer:
    for part in writer.pending("train"):
        for i in part:
            value = np.random.default_rng(i).standard_normal((1, 64, 32)).astype(np.float16)
            writer.append("train", value, [str(i)], {"class": [i]})
    writer.commit()
"""


def killed_at_random(tmp_path: Path, tally: Counter[str], kills: int, seed: int) -> None:
    rng = random.Random(seed)
    location, killed, rounds = tmp_path / "cache", 0, 0
    expected = np.concatenate(
        [np.random.default_rng(i).standard_normal((1, 64, 32)).astype(np.float16) for i in range(400)]
    )
    while killed < kills:
        writer = [sys.executable, "-c", WRITER, str(location), str(killed % 2)]
        with subprocess.Popen(writer, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                process.wait(rng.uniform(0, 0.15))
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
                tally["killed"] += 1
        try:
            split = open_cache(location).splits["train"]
        except NotCommitted:
            continue
        np.testing.assert_array_equal(split.read(range(400)), expected)
        np.testing.assert_array_equal(split.labels["class"], np.arange(400))
        rounds += 1
        tally["caches ended right"] += 1
        location = tmp_path / f"cache {rounds}"  # finished: begin another
    subprocess.run([sys.executable, "-c", WRITER, str(location), "0"], check=True, stdout=subprocess.PIPE)
    np.testing.assert_array_equal(open_cache(location).splits["train"].read(range(400)), expected)
    assert verify(location).ok


def test_killed_10_times_at_random(tmp_path: Path, tally: Counter[str]) -> None:
    killed_at_random(tmp_path, tally, 10, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_killed_500_times_at_random(tmp_path: Path, tally: Counter[str], part: int) -> None:
    killed_at_random(tmp_path, tally, scaled(125), seed=1 + part)
