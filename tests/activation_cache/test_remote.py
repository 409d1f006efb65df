"""Caches on an object store: the same as on disk, whatever the network does."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activation_cache import (
    CacheError,
    Damaged,
    NotCommitted,
    SplitSpec,
    Stale,
    Storage,
    StoreError,
    create,
    inspect,
    make_key,
    open_cache,
    repair,
    verify,
)
from activation_cache.testing import check_store

pytest.importorskip("obstore")
pytest.importorskip("moto")

from activation_cache.store.remote import RemoteStore
from tests.activation_cache.faulty_s3 import Proxy, faulty_s3

VALUES = np.random.default_rng(3).standard_normal((20, 6, 7)).astype(np.float32)
STORAGE = Storage("float32", "zstd")
KEY = make_key({"weights": "ab"}, STORAGE)
SPEC = SplitSpec("train", 20, (6, 7), {"class": "int8"}, shard_samples=4)
prefixes = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    with faulty_s3() as proxy:
        yield proxy


@pytest.fixture
def s3(server: Proxy, tmp_path: Path) -> Iterator[RemoteStore]:
    quick = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5), "base": 2}
    options = {
        "endpoint": server.url,
        "access_key_id": "test",
        "secret_access_key": "test",
        "region": "us-east-1",
        "client_options": {"allow_http": True},
        "retry_config": {"max_retries": 4, "backoff": quick, "retry_timeout": timedelta(seconds=20)},
    }
    server.requests = 0
    yield RemoteStore(f"s3://bucket/cache {next(prefixes)}", folder=tmp_path / "kept", options=options)
    server.fault, server.tags = lambda number, method, path: None, True


def write(store: RemoteStore) -> None:
    with create(store, KEY, [SPEC], STORAGE) as writer:
        for part in writer.pending("train"):
            s = slice(part.start, part.stop)
            writer.append("train", VALUES[s], [f"image {i}" for i in part], {"class": list(part)})
        writer.commit()


def is_right(store: RemoteStore) -> bool:
    split = open_cache(store, KEY).splits["train"]
    seen = [(i, v) for b in split.batches(3, drop_last=False) for i, v in zip(b.indices, b.values.copy(), strict=True)]
    return sorted(i for i, _ in seen) == list(range(20)) and all(np.array_equal(v, VALUES[i]) for i, v in seen)


def test_conforms(s3: RemoteStore) -> None:
    check_store(lambda: copy.copy(s3), exclusive=False)  # as a worker gets it


def test_later_epochs_are_read_from_the_local_copies(s3: RemoteStore, server: Proxy) -> None:
    write(s3)
    split = open_cache(s3, KEY).splits["train"]
    for epoch in range(3):
        assert sum(len(batch) for batch in split.batches(4, epoch=epoch)) == 20
        if epoch == 0:
            after_one = server.requests
    assert server.requests == after_one
    assert verify(s3).ok


def again(store: RemoteStore, limit: int | None) -> RemoteStore:
    """The same place, with another limit."""
    make, (url, folder, _, options) = store.__reduce__()
    return make(url, folder, limit, options)


def copies(store: RemoteStore) -> list[Path]:
    return [path for path in store.folder.parent.rglob("*") if path.is_file()]


@pytest.mark.parametrize("storage", [STORAGE, Storage("float32")], ids=str)
def test_the_local_copies_of_all_views_together_are_bounded(s3: RemoteStore, storage: Storage) -> None:
    spec = SplitSpec("train", 20, (6, 100), shard_samples=4, views=2)
    values = np.random.default_rng(3).standard_normal((20, 6, 100)).astype(np.float32)
    with create(s3, KEY, [spec], storage) as writer:
        for view in range(2):
            writer.append("train", values + view, [f"image {i}" for i in range(20)], view=view)
        writer.commit()
    shard = max(size for path, size in s3.list() if "/c/" in path)
    bounded = again(s3, 2 * shard)
    split = copy.copy(open_cache(bounded, KEY)).splits["train"]
    for epoch in range(4):
        for batch in split.batches(2, epoch=epoch, view=epoch % 2):
            np.testing.assert_array_equal(batch.values, values[batch.indices] + epoch % 2)
            assert sum(path.stat().st_size for path in copies(bounded)) <= bounded.limit


def test_shards_of_small_uncompressed_samples_are_let_go_of_too(s3: RemoteStore) -> None:
    """A copy that was removed keeps its place on the disk as long as it is mapped."""
    storage = Storage("float32")
    values = np.arange(300, dtype=np.float32).reshape(100, 3)
    with create(s3, KEY, [SplitSpec("train", 100, (3,), shard_samples=10, chunk_samples=4)], storage) as writer:
        writer.append("train", values, [str(i) for i in range(100)])
        writer.commit()
    shard = max(size for path, size in s3.list() if "values/0/c/" in path)
    split = open_cache(again(s3, 2 * shard), KEY).splits["train"]
    for epoch in range(2):
        for batch in split.batches(7, epoch=epoch, drop_last=False):
            np.testing.assert_array_equal(batch.values, values[batch.indices])
    assert Path("/proc/self/maps").read_text().count(str(s3.folder)) <= 2


def test_copies_of_other_caches_make_room_for_new_ones(s3: RemoteStore) -> None:
    write(s3)
    assert is_right(s3)
    old = copies(s3)
    other = RemoteStore(f"{s3.location} 2", folder=s3.folder.parent, options=s3.__reduce__()[1][3])
    write(other)
    assert is_right(other)
    assert len(copies(s3)) == 2 * len(old), "there is room for both"
    total = sum(path.stat().st_size for path in old)
    for path in set(copies(s3)) - set(old):
        path.unlink()
    assert is_right(again(other, total + 1))
    assert not set(old) & set(copies(s3))


def test_a_copy_that_another_process_removes_is_fetched_again(s3: RemoteStore, monkeypatch: Any) -> None:
    write(s3)
    fetch = RemoteStore.local

    def removed(store: RemoteStore, path: str, version: str = "") -> Path:
        kept = fetch(store, path, version)
        if removed_once.isdisjoint({kept}):
            removed_once.add(kept)
            kept.unlink()
        return kept

    removed_once: set[Path] = set()
    monkeypatch.setattr(RemoteStore, "local", removed)
    assert is_right(s3)
    assert removed_once


def test_no_room_for_a_copy_is_said(s3: RemoteStore, tmp_path: Path) -> None:
    write(s3)
    (tmp_path / "file").write_text("no folder")
    make, (url, _, limit, options) = s3.__reduce__()
    with pytest.raises(StoreError, match=r"cannot be kept in .*make room"):
        is_right(make(url, tmp_path / "file", limit, options))


@pytest.mark.parametrize("fault", ["busy", "drop", "lost reply"])
def test_faults_that_pass_are_not_noticed(s3: RemoteStore, server: Proxy, fault: str) -> None:
    server.fault = lambda number, method, path: fault if number % 3 == 1 else None
    write(s3)
    assert is_right(s3)


def test_answers_cut_short_are_never_taken_for_whole(s3: RemoteStore, server: Proxy) -> None:
    write(s3)
    server.fault = lambda number, method, path: "truncate" if method == "GET" and "values" in path else None
    with pytest.raises((StoreError, Damaged)):
        is_right(s3)
    server.fault = lambda number, method, path: None
    assert is_right(s3)


@pytest.mark.parametrize("fault", ["busy", "drop", "deny"])
def test_a_store_that_fails_for_good_leaves_nothing_false(s3: RemoteStore, server: Proxy, fault: str) -> None:
    failures = 0
    for after in (0, 3, 7, 12, 16, 20, 24, 28, 10**6):
        server.requests = 0
        server.fault = lambda number, method, path, after=after: fault if number >= after else None
        try:
            write(s3)
        except StoreError as error:
            failures += 1
            assert "s3://bucket/cache" in str(error)  # noqa: PT017 - more than the error is looked at
            server.fault = lambda number, method, path: None
            with pytest.raises(NotCommitted):
                open_cache(s3)
        else:
            break
    server.fault = lambda number, method, path: None
    assert failures >= 4
    assert is_right(s3)


def test_a_lost_answer_to_the_commit(s3: RemoteStore, server: Proxy) -> None:
    lost = []

    def fault(number: int, method: str, path: str) -> str | None:
        if method == "PUT" and path.endswith("commit.json") and not lost:
            lost.append(number)
            return "lost reply"
        return None

    server.fault = fault
    write(s3)
    assert lost
    assert is_right(s3)


def test_a_deleted_or_altered_object_is_named(s3: RemoteStore) -> None:
    write(s3)
    names = [path for path, _ in s3.list() if not path.startswith("record/commit")]
    for path in names[::4]:
        data = s3.read(path)
        for damaged in (None, data[:-1], bytes([data[0] ^ 1]) + data[1:]):
            s3.delete(path) if damaged is None else s3.write(path, [damaged])
            try:
                open_cache(s3, KEY)
                found = path in verify(s3).damaged
            except CacheError as error:
                found = path in str(error)
            assert found, f"{path} was damaged, and nobody noticed"
        s3.write(path, [data])
    shard = next(path for path in names if "/c/" in path and "values" in path)
    s3.delete(shard)
    with repair(s3) as writer:
        (part,) = writer.pending("train")
        s = slice(part.start, part.stop)
        writer.append("train", VALUES[s], [f"image {i}" for i in part], {"class": list(part)})
        writer.commit()
    assert is_right(s3)


def test_a_bad_local_copy_is_found_and_fetched_anew(s3: RemoteStore) -> None:
    write(s3)
    assert is_right(s3)
    for kept in s3.folder.iterdir():
        data = bytearray(kept.read_bytes())
        data[10] ^= 1
        kept.write_bytes(data)
    split = open_cache(s3).splits["train"]
    for shard in range(5):
        with pytest.raises(Damaged):
            split.read([4 * shard])
    assert verify(s3).ok
    assert is_right(s3)


def test_two_writers(s3: RemoteStore) -> None:
    other = make_key({"weights": "cd"}, STORAGE)
    with create(s3, KEY, [SPEC], STORAGE):
        with pytest.raises(Stale):
            create(s3, other, [SPEC], STORAGE)
        write(s3)  # the same key: the same bytes
    assert is_right(s3)
    assert inspect(s3, other).state == "stale"


@pytest.mark.parametrize("tags", [True, False], ids=["told by the store", "read back"])
def test_a_byte_flipped_once_in_every_upload_is_noticed_and_sent_again(
    s3: RemoteStore, server: Proxy, tags: bool
) -> None:
    seen: list[str] = []

    def spoil(number: int, method: str, path: str) -> str | None:
        if method == "PUT":
            seen.append(path)
        return "flip upload" if method == "PUT" and seen.count(path) == 1 else None

    server.fault, server.tags = spoil, tags
    write(s3)
    assert len(set(seen)) >= 18
    assert {seen.count(path) for path in seen} == {2}
    assert verify(s3).ok
    assert is_right(s3)


@pytest.mark.long
def test_a_byte_flipped_in_one_upload_at_each_position(s3: RemoteStore, server: Proxy, tmp_path: Path) -> None:
    """One cache for each upload that writing one takes; none is committed damaged."""
    make, (url, _, _, options) = s3.__reduce__()
    uploads, flipped = 0, 0

    def spoil(number: int, method: str, path: str) -> str | None:
        nonlocal uploads
        uploads += method == "PUT"
        return "flip upload" if method == "PUT" and uploads == flipped else None

    server.fault = spoil
    write(s3)
    total = uploads
    assert total >= 18
    for position in range(1, total + 1):
        uploads, flipped = 0, position
        store = make(f"{url} {position}", tmp_path / "kept", None, options)
        write(store)
        assert uploads == total + 1, "one was sent again"
        assert verify(store).ok


@pytest.mark.parametrize("spoilt", ["/values/0/c/", "record/plan.json", "record/commit.json", "/ids/"])
def test_what_always_arrives_altered_is_never_committed(s3: RemoteStore, server: Proxy, spoilt: str) -> None:
    server.fault = lambda number, method, path: "flip upload" if method == "PUT" and spoilt in path else None
    with pytest.raises(StoreError, match="arrives altered"):
        write(s3)
    server.fault = lambda number, method, path: None
    with pytest.raises(NotCommitted):
        open_cache(s3, KEY)
    write(s3)
    assert is_right(s3)


def test_a_plan_that_changes_after_it_was_written_is_not_sealed_in(s3: RemoteStore) -> None:
    with create(s3, KEY, [SPEC], STORAGE) as writer:
        writer.append("train", VALUES, [f"image {i}" for i in range(20)], {"class": list(range(20))})
        meant = s3.read("record/plan.json")
        s3.write("record/plan.json", [meant.replace(b"ab", b"aB")])
        writer.commit()
    assert s3.read("record/plan.json") == meant
    assert verify(s3).ok
