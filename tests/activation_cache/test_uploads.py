"""A byte that changes on its way to an object store: put again or refused, and never committed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activation_cache import (
    NotCommitted,
    SplitSpec,
    Storage,
    StoreError,
    calibrate,
    create,
    make_key,
    open_cache,
    verify,
)

pytest.importorskip("obstore")
pytest.importorskip("moto")

from activation_cache.store.remote import RemoteStore
from tests.activation_cache.faulty_s3 import Proxy, faulty_s3

VALUES = np.maximum(np.random.default_rng(3).standard_normal((7, 3, 4)), 0).astype(np.float32)
SPECS = {
    "plain": SplitSpec("train", 7, (3, 4), {"class": "int8"}, shard_samples=4),
    "ragged": SplitSpec("train", 7, (3, None), {"words": "int16[]"}, longest=4, shard_samples=4),
}
KINDS = [
    (Storage(dtype, codec), spec)  # type: ignore[arg-type]
    for dtype in ("float32", "bfloat16", "uint8")
    for codec in ("none", "lz4", "zstd")
    for spec in SPECS
]
prefixes = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    with faulty_s3() as proxy:
        yield proxy


@pytest.fixture
def place(server: Proxy, tmp_path: Path) -> Iterator[Any]:
    """Makes stores, each in a prefix of its own."""
    options = {
        "endpoint": server.url,
        "access_key_id": "test",
        "secret_access_key": "test",
        "region": "us-east-1",
        "client_options": {"allow_http": True},
        "retry_config": {"max_retries": 2, "retry_timeout": timedelta(seconds=20)},
    }
    yield lambda: RemoteStore(f"s3://bucket/upload {next(prefixes)}", folder=tmp_path / "kept", options=options)
    server.fault = lambda number, method, path: None


def write(store: RemoteStore, storage: Storage, spec: str) -> None:
    calibration = calibrate([VALUES]) if storage.dtype == "uint8" else None
    with create(store, make_key({}, storage), [SPECS[spec]], storage, calibration=calibration, threads=0) as writer:
        for part in writer.pending("train"):
            s = slice(part.start, part.stop)
            labels = {"class": list(part)} if spec == "plain" else {"words": [[i] * i for i in part]}
            writer.append("train", VALUES[s] if spec == "plain" else list(VALUES[s]), [f"{i}" for i in part], labels)
        writer.commit()


def is_right(store: RemoteStore) -> bool:
    split = open_cache(store).splits["train"]
    read = split.dequantise(np.stack(split.read(range(7))))  # type: ignore[arg-type]
    step = VALUES.max() / 100
    return verify(store).ok and bool(np.allclose(read, VALUES, atol=step)) and split.ids == [f"{i}" for i in range(7)]


@pytest.mark.parametrize(("storage", "spec"), KINDS, ids=str)
def test_every_file_is_altered_on_its_first_way(place: Any, server: Proxy, storage: Storage, spec: str) -> None:
    flipped: set[str] = set()

    def fault(number: int, method: str, path: str) -> str | None:
        if method != "PUT" or path in flipped:
            return None
        flipped.add(path)
        return "flip"

    store = place()
    server.fault = fault
    write(store, storage, spec)
    assert len(flipped) == len(list(store.list())) > 15
    assert is_right(store)


def flip_each_upload(place: Any, server: Proxy, storage: Storage, spec: str, every: int) -> int:
    """One write for every `every`-th upload, which alone is altered; how many were."""
    uploads = [0]
    for at in itertools.count(0, every):
        uploads[0] = 0

        def fault(number: int, method: str, path: str, at: int = at) -> str | None:
            uploads[0] += method == "PUT"
            return "flip" if method == "PUT" and uploads[0] == at + 1 else None

        store = place()
        server.fault = fault
        write(store, storage, spec)
        assert is_right(store), f"upload {at} of {storage} {spec} was altered, and the cache committed damaged"
        if uploads[0] <= at:
            return at
    raise AssertionError


def test_one_upload_is_altered(place: Any, server: Proxy) -> None:
    assert flip_each_upload(place, server, Storage("float32", "zstd"), "plain", every=6) > 15


@pytest.mark.long
@pytest.mark.parametrize(("storage", "spec"), KINDS, ids=str)
def test_each_upload_is_altered(place: Any, server: Proxy, storage: Storage, spec: str) -> None:
    assert flip_each_upload(place, server, storage, spec, every=1) > 15


@pytest.mark.parametrize("name", ["plan.json", "0.json", "/c/1/0/0", "ids/c/0", "train/zarr.json", "commit.json"])
def test_a_file_that_never_arrives_whole_is_an_error(place: Any, server: Proxy, name: str) -> None:
    store = place()
    server.fault = lambda number, method, path: "flip" if method == "PUT" and path.endswith(name) else None
    with pytest.raises(StoreError, match=f"{name}.* arrives altered"):
        write(store, Storage(), "plain")
    with pytest.raises(NotCommitted):
        open_cache(store)
    server.fault = lambda number, method, path: None
    write(store, Storage(), "plain")
    assert is_right(store)


def test_uploads_in_parts_and_stores_whose_tags_say_nothing(
    place: Any, server: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = place()
    whole = np.random.default_rng(0).bytes(13 << 20)
    read: list[str] = []
    monkeypatch.setattr(
        RemoteStore, "read", lambda self, path, read_=RemoteStore.read: read.append(path) or read_(self, path)
    )
    store.write("large", [whole])
    assert read == [], "the tag of an upload in parts proves it"
    seen: list[str] = []

    def second(number: int, method: str, path: str) -> str | None:
        seen.append(method)
        return "flip" if method == "PUT" and seen.count("PUT") == 2 else None

    server.fault = second
    store.write("large", [whole])
    assert store.read("large") == whole
    monkeypatch.setattr("activation_cache.store.remote._tag", lambda data, in_parts: "of a store that makes its own")
    seen.clear()
    read.clear()
    store.write("large", [whole])
    assert store.read("large") == whole
    assert len(read) >= 2, "read back, and again after it was put again"


def test_copies_of_somebody_else_make_no_room(place: Any) -> None:
    store = place()
    write(store, Storage(), "plain")
    mine = store.folder.parent / ("0" * 16) / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(bytes(10_000))
    (mine.parent / ("a" * 64)).symlink_to(mine)
    make, (url, folder, _, options) = store.__reduce__()
    assert is_right(make(url, folder, 1_000, options))
    assert mine.exists()
    assert (mine.parent / ("a" * 64)).is_symlink()
