"""A writer that is interrupted, a reader whose cache is replaced, and maps for which there is no room."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from activation_cache import (
    CacheWriter,
    Damaged,
    Locked,
    NotCommitted,
    SplitSpec,
    Storage,
    create,
    make_key,
    open_cache,
    verify,
)
from activation_cache.store.base import LocalStore

KEY = make_key({}, Storage())
SPEC = SplitSpec("train", 6, (4,), shard_samples=2)
VALUES = np.arange(24, dtype=np.float32).reshape(6, 4)
IDS = [str(i) for i in range(6)]


class SlowStore(LocalStore):
    """Its shards reach the disk when `go` is set."""

    go = threading.Event()
    begun = threading.Event()

    def begin(self, path, parts):  # type: ignore[no-untyped-def]
        finish = super().begin(path, parts)

        def later() -> None:
            self.begun.set()
            assert self.go.wait(30)
            finish()

        return later


def files(location: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in location.rglob("*") if path.is_file()}


@pytest.mark.parametrize("threads", [0, 1])
def test_an_interrupted_writer_lets_go_when_its_last_write_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    store = SlowStore(tmp_path)
    store.go, store.begun = threading.Event(), threading.Event()
    writer = create(store, KEY, [SPEC], Storage(), threads=threads)
    writer.append("train", VALUES[:4], IDS[:4])
    assert store.begun.wait(30)
    shutdown = writer._pool.shutdown

    def interrupted(wait: bool = True, cancel_futures: bool = False) -> None:
        if wait:
            raise KeyboardInterrupt  # as it arrives in the wait
        shutdown(wait=wait, cancel_futures=cancel_futures)

    monkeypatch.setattr(writer._pool, "shutdown", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    with pytest.raises(Locked):  # a thread is still writing
        create(tmp_path, KEY, [SPEC], Storage())
    store.go.set()
    shutdown(wait=True)
    before = files(tmp_path)
    with create(tmp_path, KEY, [SPEC], Storage()) as following:
        assert not [name for name in files(tmp_path) if name.endswith(".tmp")]
        assert {n: t for n, t in files(tmp_path).items() if n != "lock"} == {
            n: t for n, t in before.items() if n != "lock"
        }
        finish(following)
    assert verify(tmp_path).ok


def finish(writer: CacheWriter) -> None:
    for part in writer.pending("train"):
        writer.append("train", VALUES[part.start : part.stop], IDS[part.start : part.stop])
    writer.commit()


def read_ids(store: LocalStore) -> None:
    assert open_cache(store).splits["train"].ids == IDS


def test_a_reader_of_a_cache_that_is_replaced_gets_a_typed_error(tmp_path: Path) -> None:
    """Every file is taken away just before a reader reads it."""
    with create(tmp_path, KEY, [SPEC], Storage()) as writer:
        finish(writer)

    class Going(LocalStore):
        victim = ""

        def read(self, path: str) -> bytes:
            if path == self.victim:
                (self.root / path).rename(self.root / "gone")
            return super().read(path)

    for path in [p for p, _ in LocalStore(tmp_path).list() if "lock" not in p]:
        store = Going(tmp_path)
        store.victim = path
        for use in (read_ids, verify):
            with suppress(Damaged, NotCommitted):
                use(store)
            if (tmp_path / "gone").exists():
                (tmp_path / "gone").rename(tmp_path / path)
    assert verify(tmp_path).ok


def test_a_cache_that_is_written_anew_while_it_is_opened_is_not_called_damaged(tmp_path: Path) -> None:
    with create(tmp_path, KEY, [SPEC], Storage()) as writer:
        finish(writer)

    class Replaced(LocalStore):
        def list(self, prefix: str = ""):  # type: ignore[no-untyped-def]
            create(tmp_path, KEY, [SPEC], Storage(), replace=True).close()
            return super().list(prefix)

    with pytest.raises(NotCommitted):
        open_cache(Replaced(tmp_path))


def test_no_address_space_left_for_a_map(tmp_path: Path) -> None:
    with create(tmp_path, KEY, [SplitSpec("train", 64, (1 << 18,))], Storage()) as writer:
        writer.append("train", np.zeros((64, 1 << 18), np.float32), [str(i) for i in range(64)])
        writer.commit()
    program = f"""
import resource, pathlib
from activation_cache import DoesNotFit, open_cache
split = open_cache({str(tmp_path)!r}).splits["train"]
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
try:
    split.read([0])
except DoesNotFit as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "address space" in done.stdout, done.stderr
