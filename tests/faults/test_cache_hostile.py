"""A cache made by a stranger, its checksums all right: only errors of the package, within a second, in little memory.

Each edit begins with a valid cache and changes one thing in it: JSON of the record, a side array, the index or a chunk
of a shard, or any byte. All seals and hashes are then computed again, so that no checksum stops the lie; bytes are also
changed without that.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activation_cache import (
    CacheError,
    Damaged,
    SplitSpec,
    Storage,
    Window,
    calibrate,
    create,
    inspect,
    make_key,
    open_cache,
    repair,
    verify,
)
from activation_cache.format.canonical import digest
from activation_cache.format.record import seal_json, sha256
from activation_cache.format.shard import CRC_BYTES, crc32c

SECONDS, BYTES = 1.0, 1 << 30  # that one use of a cache may take
VALUES = np.maximum(np.random.default_rng(0).standard_normal((5, 2, 3)), 0).astype(np.float32)
PLAIN = SplitSpec("train", 5, (2, 3), {"class": "int16", "words": "int32[]"}, shard_samples=2)
RAGGED = SplitSpec("train", 5, (None, 3), {"class": "int16"}, longest=2, shard_samples=2)
VIEWS = SplitSpec("train", 5, (2, 3), views=2, shard_samples=4, chunk_samples=2)
KINDS: dict[str, tuple[SplitSpec, Storage]] = {
    "float32": (PLAIN, Storage()),
    "uint8+lz4": (PLAIN, Storage("uint8", "lz4")),
    "bfloat16+zstd": (PLAIN, Storage("bfloat16", "zstd")),
    "ragged": (RAGGED, Storage()),
    "ragged+lz4": (RAGGED, Storage("float16", "lz4")),
    "views": (VIEWS, Storage()),
    "views+zstd": (VIEWS, Storage("float16", "zstd")),
    "slot": (SplitSpec("train", 5, (2, 3), {"class": "int16"}), Storage()),
}


def fill(writer: Any) -> None:
    for split, view in writer.tracks():
        for part in writer.pending(split, view):
            numbers = [i % 5 for i in part]
            ragged = KINDS["ragged"][0].shape == writer._plan.split(split).shape
            values: Any = [VALUES[i, : i % 3] for i in numbers] if ragged else VALUES[numbers]
            given = {"class": numbers, "words": [[i] * i for i in numbers]}
            labels = {name: given[name] for name in writer._plan.split(split).labels} if view == 0 else {}
            writer.append(split, values, [f"é{i}" for i in part], labels, view)


def writer_of(location: Path, kind: str) -> Any:
    spec, storage = KINDS[kind]
    if kind == "slot":
        return Window(location.parent, make_key({}, storage), spec, storage, 1, 4, 0).writer(0)
    calibration = calibrate([VALUES]) if storage.dtype == "uint8" else None
    return create(location, make_key({"weights": "ab"}, storage), [spec], storage, calibration=calibration)


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk() -> Iterator[None]:
    """Writes go to the page cache alone: these tests cut no power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished cache of each kind."""
    found = {}
    for kind in KINDS:
        found[kind] = tmp_path_factory.mktemp("valid") / "slot-000000"
        with writer_of(found[kind], kind) as writer:
            fill(writer)
            writer.commit()
    return found


def read_everything(location: Path) -> None:
    for split in open_cache(location).splits.values():
        assert len(split.ids) == split.samples
        assert all(len(values) == split.samples for values in split.labels.values())
        for view in range(split.views):
            split.read(range(split.samples), view)
            for batch in split.batches(2, drop_last=False, view=view):
                assert len(batch.values) == len(batch.indices)


def close(writer: Any) -> None:
    writer.close()


USES: dict[str, Callable[[Path], object]] = {
    "read": read_everything,
    "inspect": inspect,
    "verify": verify,
    "repair": lambda location: close(repair(location)),
}


@contextmanager
def bounded(what: str) -> Iterator[None]:
    """Only errors of the package, no more than SECONDS of the processor and BYTES of memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, before[1]))
    start = time.process_time()
    try:
        yield
    except CacheError:
        pass
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - start < SECONDS, what


HOSTILE: list[Any] = [
    0, 1, -1, 2, 3, 7, 255, 10**9, 10**15, 2**48, 2**63, 10**40, 1.5, -0.0, 1e300, True, False, None, "", "..", "a/b",
    "/etc", "train", "float64", "object", "zstd", "none", "0" * 64, "x" * 5000, "\ud800", [], {}, [[]], [None],
    [1, "x"], {"": []}, [10**15, 10**15], [0], [1] * 40,
]  # fmt: skip


def nested(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for name, one in inner for place in places(one, (*path, name)))]


def edit_json(data: st.DataObject, value: Any) -> None:
    """Replaces, removes or adds one thing in it."""
    *way, last = data.draw(st.sampled_from([place for place in places(value) if place]), label="place")
    at = value
    for name in way:
        at = at[name]
    how = data.draw(st.sampled_from(["replace", "replace", "replace", "change", "remove", "add"]), label="how")
    new = data.draw(st.one_of(st.sampled_from(HOSTILE), st.integers(0, 900).map(nested)), label="new")
    if how == "remove":
        del at[last]
    elif how == "add" and isinstance(at, list):
        at.insert(last, new)
    elif how == "add":
        at[f"{last} too"] = new
    elif how == "change" and isinstance(at[last], int):
        at[last] += data.draw(st.integers(-3, 3), label="by")
    else:
        at[last] = new


class Editor:
    """A copy of a cache, to be changed and then sealed again."""

    def __init__(self, location: Path) -> None:
        self.location = location
        self.commit = self.load("record/commit.json")

    def load(self, path: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.location / path).read_bytes())
        del value["sha256"]
        return value

    def save(self, path: str, value: Any) -> None:
        self.put(path, seal_json(value))

    def put(self, path: str, content: bytes, seal: str | None = None) -> None:
        """A file, entered in the commit record."""
        (self.location / path).write_bytes(content)
        self.commit["files"][path] = [len(content), seal or sha256(content)]

    def finish(self) -> None:
        try:
            (self.location / "record/commit.json").write_bytes(seal_json(self.commit))
        except (ValueError, RecursionError, AttributeError):  # no JSON that a file can hold with a seal
            (self.location / "record/commit.json").write_text(json.dumps(self.commit))

    def paths(self, inside: str) -> list[str]:
        files = self.commit.get("files") if isinstance(self.commit, dict) else None  # an edit may have taken them
        return sorted(path for path in files if inside in path) if isinstance(files, dict) else []

    def journal(self) -> list[str]:
        return [path for path in self.paths(".json") if path.startswith("record/train/")]

    def shards(self) -> list[str]:
        return [path for path in self.paths("/c/") if path.startswith("train/values/")]


def edit_plan(data: st.DataObject, editor: Editor) -> None:
    plan = editor.load("record/plan.json")
    edit_json(data, plan["plan"])
    editor.commit["plan"] = plan["plan"]
    editor.save("record/plan.json", plan)
    for path in editor.journal():
        editor.save(path, {**editor.load(path), "plan": digest(plan["plan"])})


def edit_commit(data: st.DataObject, editor: Editor) -> None:
    edit_json(data, editor.commit)


def edit_journal(data: st.DataObject, editor: Editor) -> None:
    path = data.draw(st.sampled_from(editor.journal()))
    entry = editor.load(path)
    edit_json(data, entry)
    editor.save(path, entry)


def edit_side(data: st.DataObject, editor: Editor) -> None:
    """One number of a side array, or its length."""
    path = data.draw(st.sampled_from([path for path in editor.paths("/c/") if path not in editor.shards()]))
    content = bytearray((editor.location / path).read_bytes()[:-CRC_BYTES])
    if "offsets" in path:
        at = 8 * data.draw(st.integers(0, len(content) // 8 - 1))
        content[at : at + 8] = struct.pack("<q", data.draw(st.sampled_from([-1, 0, 1, 5, 99, 2**40, 2**62, -(2**63)])))
    elif data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    else:
        content = content[: data.draw(st.integers(0, len(content)))]
    editor.put(path, bytes(content) + crc32c(bytes(content)).to_bytes(CRC_BYTES, "little"))


def edit_shard(data: st.DataObject, editor: Editor) -> None:
    """A number of the index or a byte of a chunk, or chunks of other lengths, all consistent with each other."""
    path = data.draw(st.sampled_from(editor.shards()))
    _, _, view, _, number, *_ = path.split("/")
    entry_path = f"record/train/{view}/{number}.json"
    image = (editor.location / path).read_bytes()
    per = json.loads((editor.location / f"{path.split('/c/')[0]}/zarr.json").read_bytes())
    inner = per["codecs"][0]["configuration"]["chunk_shape"][0]
    count = -(-per["chunk_grid"]["configuration"]["chunk_shape"][0] // inner)
    tail = 16 * count + CRC_BYTES
    index = np.frombuffer(image[-tail:-CRC_BYTES], "<u8").reshape(-1, 2).copy()
    present = [row for row in index if row[1] != 2**64 - 1]
    chunks = [bytearray(image[int(o) : int(o + n) - CRC_BYTES]) for o, n in present]
    if not chunks:
        return
    which = data.draw(st.integers(0, len(chunks) - 1))
    how = data.draw(st.sampled_from(["index", "byte", "length", "empty", "other"]))
    if how == "byte":
        chunks[which][data.draw(st.integers(0, len(chunks[which]) - 1))] = data.draw(st.integers(0, 255))
    elif how == "length":
        chunks[which] = (chunks[which] * 2)[: data.draw(st.integers(0, 2 * len(chunks[which])))]
    elif how in ("empty", "other"):  # bytes go from one chunk to the other, or to none
        moved, chunks[which] = chunks[which], bytearray()
        if how == "other":
            chunks[which - 1] += moved
    checksums = [crc32c(bytes(chunk)).to_bytes(CRC_BYTES, "little") for chunk in chunks]
    at = 0
    for row, chunk in enumerate(chunks):
        index[row] = at, len(chunk) + CRC_BYTES
        at += len(chunk) + CRC_BYTES
    if how == "index":
        row, column = data.draw(st.integers(0, len(index) - 1)), data.draw(st.integers(0, 1))
        index[row, column] = data.draw(st.sampled_from([0, 1, 3, 4, 99, 2**32, 2**63, 2**64 - 1]))
    raw = index.tobytes()
    raw += crc32c(raw).to_bytes(CRC_BYTES, "little")
    body = b"".join(bytes(chunk) + checksum for chunk, checksum in zip(chunks, checksums, strict=True))
    seal = sha256(b"".join(checksums) + raw)
    editor.put(path, body + raw, seal)
    entry = {**editor.load(entry_path), "seal": seal, "size": len(body + raw)}
    editor.save(entry_path, entry)


def edit_bytes(data: st.DataObject, editor: Editor) -> None:
    """Any file, whose hash is entered in the commit record or not."""
    path = data.draw(st.sampled_from([*sorted(editor.commit["files"]), "record/commit.json"]))
    content = bytearray((editor.location / path).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    if path != "record/commit.json" and data.draw(st.booleans()):
        editor.put(path, bytes(content), editor.commit["files"][path][1] if path in editor.shards() else None)
    else:
        (editor.location / path).write_bytes(content)
        if path == "record/commit.json":
            editor.finish = lambda: None  # type: ignore[method-assign]


EDITS = [edit_plan, edit_commit, edit_journal, edit_side, edit_shard, edit_bytes]


def check_an_edit(valid: dict[str, Path], folder: Path, data: st.DataObject, use: str) -> None:
    kind, edit = data.draw(st.sampled_from(list(KINDS))), data.draw(st.sampled_from(EDITS))
    location = folder / "slot-000000"
    shutil.rmtree(location, ignore_errors=True)
    shutil.copytree(valid[kind], location)
    editor = Editor(location)
    try:
        edit(data, editor)
        editor.finish()
    except (ValueError, RecursionError):  # a value that JSON with a seal cannot hold
        return
    what = f"{use} of {kind} after {edit.__name__}"
    if use == "continue":
        (location / "record/commit.json").unlink()
        for path in editor.shards()[1:2]:
            (location / path).unlink(missing_ok=True)  # the edit may have invented it
        with bounded(f"inspect before {what}"):
            inspect(location)
        with bounded(what), writer_of(location, kind) as writer:
            fill(writer)
            writer.commit()
    else:
        with bounded(what):
            USES[use](location)


@pytest.mark.parametrize("use", [*USES, "continue"])
def test_only_typed_errors(valid: dict[str, Path], tmp_path: Path, use: str) -> None:
    @settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check_an_edit(valid, tmp_path, data, use)

    run()


@pytest.mark.long
@pytest.mark.parametrize("use", [*USES, "continue"])
def test_only_typed_errors_after_2500_edits(valid: dict[str, Path], tmp_path: Path, use: str) -> None:
    @settings(max_examples=2500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check_an_edit(valid, tmp_path, data, use)

    run()


# What was found by attack, each by itself.


def edited(valid: dict[str, Path], folder: Path, kind: str, change: Callable[[Editor], None]) -> Path:
    location = folder / "slot-000000"
    shutil.copytree(valid[kind], location)
    editor = Editor(location)
    change(editor)
    editor.finish()
    return location


@pytest.mark.parametrize(("field", "value"), [("samples", 10**15), ("views", 10**9), ("shard_samples", 2**48)])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("committed", [True, False])
def test_absurd_numbers(
    valid: dict[str, Path], tmp_path: Path, field: str, value: int, use: str, committed: bool
) -> None:
    def change(editor: Editor) -> None:
        plan = editor.load("record/plan.json")
        plan["plan"]["splits"][0][field] = value
        editor.commit["plan"] = plan["plan"]
        editor.save("record/plan.json", plan)

    location = edited(valid, tmp_path, "float32", change)
    if not committed:
        (location / "record/commit.json").unlink()
    with bounded(use):
        found = USES[use](location)
        assert use in ("inspect", "verify")
        assert getattr(found, "state", "damaged") == "damaged"


def test_an_uncompressed_chunk_without_bytes(tmp_path: Path) -> None:
    """The map ended before the page in which the chunk was read: SIGBUS."""
    key = make_key({}, Storage())
    with create(tmp_path, key, [SplitSpec("train", 2, (1 << 14,))], Storage()) as writer:
        writer.append("train", np.ones((2, 1 << 14), np.float32), ["a", "b"])
        writer.commit()
    raw = np.array([[0, 4], [4, 4]], "<u8").tobytes()
    raw += crc32c(raw).to_bytes(CRC_BYTES, "little")
    empty = crc32c(b"").to_bytes(CRC_BYTES, "little") * 2
    editor = Editor(tmp_path)
    editor.put("train/values/0/c/0/0", empty + raw, sha256(empty + raw))
    editor.finish()
    with pytest.raises(Damaged, match="train/values/0/c/0/0"):
        read_everything(tmp_path)


def test_chunks_of_other_lengths_in_a_file_of_the_right_size(valid: dict[str, Path], tmp_path: Path) -> None:
    def change(editor: Editor) -> None:
        chunks = [b"\0" * 48, b""]
        raw = np.array([[0, 52], [52, 4]], "<u8").tobytes()
        raw += crc32c(raw).to_bytes(CRC_BYTES, "little")
        sums = [crc32c(chunk).to_bytes(CRC_BYTES, "little") for chunk in chunks]
        seal = sha256(b"".join(sums) + raw)
        editor.put("train/values/0/c/0/0/0", chunks[0] + sums[0] + chunks[1] + sums[1] + raw, seal)

    with pytest.raises(Damaged, match="train/values/0/c/0/0/0"):
        read_everything(edited(valid, tmp_path, "float32", change))


@pytest.mark.parametrize("lie", [-1, 99, 2**62])
@pytest.mark.parametrize("path", ["offsets/ids/c/0/0", "offsets/values/0/c/0/0"])
def test_offsets_that_lie(valid: dict[str, Path], tmp_path: Path, path: str, lie: int) -> None:
    def change(editor: Editor) -> None:
        content = bytearray((editor.location / "train" / path).read_bytes()[:-CRC_BYTES])
        content[8:16] = struct.pack("<q", lie)
        editor.put(f"train/{path}", bytes(content) + crc32c(bytes(content)).to_bytes(CRC_BYTES, "little"))

    with pytest.raises(Damaged, match=path):
        read_everything(edited(valid, tmp_path, "ragged", change))
