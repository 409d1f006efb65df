"""A writer whose `close` is interrupted lets go of its cache, and writes nothing into it afterwards."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from activation_cache import Locked, SplitSpec, Storage, create, make_key, open_cache, verify
from activation_cache.store.base import LocalStore
from activation_cache.writing.writer import CacheWriter

KEY = make_key({}, Storage())
SPEC = SplitSpec("train", 8, (4,), shard_samples=2)
VALUES = np.arange(32, dtype=np.float32).reshape(8, 4)


class SlowDisk(LocalStore):
    """Takes its time over journal entries, until `goes_on` is set."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.waits, self.goes_on = threading.Event(), threading.Event()

    def write(self, path: str, parts) -> None:  # type: ignore[no-untyped-def]
        self.waits.set()
        assert self.goes_on.wait(20)
        super().write(path, parts)


def append(writer: CacheWriter) -> None:
    for part in writer.pending("train"):
        writer.append("train", VALUES[part.start : part.stop], [str(i) for i in part])


def interrupted(call: Callable[[], None]) -> None:
    """Calls it, and presses Ctrl-C while it waits."""
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


def free_at_last(location: Path) -> None:
    for _ in range(500):
        try:
            LocalStore(location).lock(0, 1)()
        except Locked:
            time.sleep(0.01)
        else:
            return
    raise AssertionError("the lock was kept")


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_close_interrupted(tmp_path: Path, threads: int) -> None:
    store = SlowDisk(tmp_path)
    writer = create(store, KEY, [SPEC], Storage(), threads=threads)
    for i in range(0, 4 if threads < 2 else 6, 2):  # as many as there are buffers for
        writer.append("train", VALUES[i : i + 2], [str(i), str(i + 1)])
    assert store.waits.wait(20)
    interrupted(writer.close)
    with pytest.raises(Locked):  # a shard is on its way still: nobody else may write
        create(tmp_path, KEY, [SPEC], Storage())
    store.goes_on.set()
    free_at_last(tmp_path)
    then = sorted(LocalStore(tmp_path).list())
    time.sleep(0.2)
    assert sorted(LocalStore(tmp_path).list()) == then, "written into a cache that was let go of"
    if threads == 1:
        assert not (tmp_path / "record/train/0/1.json").exists(), "what waited for the thread is given up"
    with create(tmp_path, KEY, [SPEC], Storage()) as again:
        append(again)
        again.commit()
    np.testing.assert_array_equal(open_cache(tmp_path).splits["train"].read(range(8)), VALUES)
    assert verify(tmp_path).ok


def test_commit_interrupted_loses_no_failure_and_no_lock(tmp_path: Path) -> None:
    store = SlowDisk(tmp_path)
    writer = create(store, KEY, [SPEC], Storage())
    writer.append("train", VALUES[:2], ["0", "1"])
    assert store.waits.wait(20)
    interrupted(writer.commit)
    store.goes_on.set()
    writer.close()
    LocalStore(tmp_path).lock(0, 1)()
    with create(tmp_path, KEY, [SPEC], Storage()) as again:
        assert again.pending("train") == [range(2, 8)], "the shard on its way arrived"
