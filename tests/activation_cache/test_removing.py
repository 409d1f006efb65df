"""Removing a cache removes what its writers made, and nothing of anybody else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from activation_cache import (
    FormatError,
    Locked,
    SplitSpec,
    Storage,
    StoreError,
    Window,
    calibrate,
    create,
    inspect,
    make_key,
    open_cache,
    remove,
    remove_window,
)
from activation_cache.store.base import LocalStore

KINDS = {
    "float32": (Storage(), SplitSpec("train", 5, (4,), {"class": "int8"}, shard_samples=2)),
    "uint8 views": (Storage("uint8", "lz4"), SplitSpec("a-b", 5, (4,), views=2, shard_samples=2)),
    "ragged": (Storage("float16", "zstd"), SplitSpec("t", 5, (3, None), {"phones": "int16[]"}, longest=4)),
}


def write(location: Path, kind: str = "float32", **how: object) -> None:
    storage, spec = KINDS[kind]
    ragged = None in spec.shape
    values = np.ones((5, 3, 4) if ragged else (5, 4), np.float32)
    calibration = calibrate([values]) if storage.dtype == "uint8" else None
    labels = {"class": range(5)} if "class" in spec.labels else {"phones": [[1]] * 5} if ragged else {}
    with create(location, make_key({}, storage), [spec], storage, calibration=calibration, **how) as writer:  # type: ignore[arg-type]
        for view in range(spec.views):
            given = list(values) if ragged else values
            writer.append(spec.name, given, [str(i) for i in range(5)], labels if view == 0 else {}, view)
        writer.commit()


def everything(folder: Path) -> dict[str, bytes | str]:
    """All that lies below a folder, to be compared: content of files, targets of links."""
    return {
        p.relative_to(folder).as_posix(): os.readlink(p)
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else "folder"
        for p in folder.rglob("*")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_of_a_cache(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "c", kind)
    (tmp_path / "c/train/.activation_cache-1-2.tmp").parent.mkdir(exist_ok=True)
    (tmp_path / "c/train/.activation_cache-1-2.tmp").write_bytes(b"of a killed writer")
    assert remove(tmp_path / "c") == []
    assert not (tmp_path / "c").exists() or everything(tmp_path / "c") == {"train": "folder"}
    assert remove(tmp_path / "c") == []


NOTES = [
    "notes.txt",
    "train/notes.txt",
    "train/values/0/c/notes.txt",
    "train/values/mine/zarr.json",
    "train/zarr.json.17.tmp",
    "record/notes.txt",
    "record/mine/0.json",
    "experiments/zarr.json",
    "experiments/values/0/c/0/0",
    "probe-1/.x.tmp",
]


def put_notes(location: Path) -> dict[str, bytes | str]:
    for path in NOTES:
        (location / path).parent.mkdir(parents=True, exist_ok=True)
        (location / path).write_text(f"my {path}")
    return {path: f"my {path}".encode() for path in NOTES}


@pytest.mark.parametrize("state", ["committed", "unfinished", "damaged plan", "no record", "another format"])
@pytest.mark.parametrize("how", ["remove", "replace"])
def test_files_of_the_user_stay_and_are_named(tmp_path: Path, how: str, state: str) -> None:
    location = tmp_path / "c"
    write(location)
    if state == "unfinished":
        (location / "record/commit.json").unlink()
    elif state == "damaged plan":
        for name in ("plan", "commit"):
            data = (location / f"record/{name}.json").read_bytes()
            (location / f"record/{name}.json").write_bytes(b"#" + data[1 : len(data) // 2])
    elif state == "no record":
        for name in ("plan", "commit"):
            (location / f"record/{name}.json").unlink()
    elif state == "another format":
        for path in location.rglob("*.json"):
            path.write_bytes(path.read_bytes().replace(b'"format":2', b'"format":1'))
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "0").write_text("precious")
    (location / "linked").symlink_to(victim)
    (location / "train/linked").symlink_to(victim)
    notes = put_notes(location)
    if how == "remove":
        left = remove(location)
    else:
        writer = create(location, make_key({"other": 1}, Storage()), [SplitSpec("b", 1, (2,))], Storage(), replace=True)
        writer.append("b", np.ones((1, 2)), ["one"])
        writer.commit()
        left = list(writer.left)
        assert open_cache(location).splits["b"].samples == 1
        assert not (location / "train/values/0/zarr.json").exists()
    assert left == sorted([*NOTES, "linked", "train/linked"])
    found = everything(location)
    assert {path: found[path] for path in NOTES} == notes
    assert everything(victim) == {"0": b"precious"}
    if how == "remove":
        assert {path for path, content in found.items() if content != "folder"} == set(left)


def test_a_link_in_the_place_of_a_file_of_ours_goes_and_not_what_it_points_to(tmp_path: Path) -> None:
    write(tmp_path / "c")
    (tmp_path / "kept").mkdir()
    for path in ("train/values/0/c/0/0", "record/train/0/0.json", "zarr.json"):
        (tmp_path / "c" / path).rename(tmp_path / "kept" / path.replace("/", "-"))
        (tmp_path / "c" / path).symlink_to(tmp_path / "kept" / path.replace("/", "-"))
    before = everything(tmp_path / "kept")
    assert remove(tmp_path / "c") == []
    assert not (tmp_path / "c").exists()
    assert everything(tmp_path / "kept") == before


def strangers(folder: Path) -> None:
    """A folder that looks in many ways like a cache, and is somebody's own Zarr store and notes."""
    for path in ("zarr.json", "train/zarr.json", "train/values/0/zarr.json", "train/values/0/c/0/0", "notes.txt"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    (folder / "record").mkdir()
    (folder / "record/plan.json").write_text('{"plan": "buy milk"}')
    (folder / "record/lock").write_text("")


@pytest.mark.parametrize(
    "use",
    [
        remove,
        *(
            lambda p, r=r: create(p, make_key({}, Storage()), [KINDS["float32"][1]], Storage(), replace=r)
            for r in (0, 1)
        ),
    ],
    ids=["remove", "create", "replace"],
)
def test_a_folder_that_is_no_cache_is_refused_and_stays_as_it_is(tmp_path: Path, use: Callable[[Path], object]) -> None:
    strangers(tmp_path)
    before = everything(tmp_path)
    with pytest.raises(FormatError, match="is not an activation cache"):
        use(tmp_path)
    assert everything(tmp_path) == before


def test_a_cache_may_be_begun_beside_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/notes.txt").write_text("mine")
    write(tmp_path, replace=True)
    assert remove(tmp_path) == ["notes.txt", "train/notes.txt"]


def test_what_is_being_written_is_not_removed(tmp_path: Path) -> None:
    with create(tmp_path, make_key({}, Storage()), [KINDS["float32"][1]], Storage()):
        before = everything(tmp_path)
        with pytest.raises(Locked):
            remove(tmp_path)
        assert everything(tmp_path) == before
    assert inspect(tmp_path).state == "partial"


def test_a_window_goes_and_what_is_not_of_it_stays(tmp_path: Path) -> None:
    storage = Storage()
    window = Window(tmp_path / "w", make_key({}, storage), SplitSpec("train", 10, (2,)), storage, 2, 2, seed=1)
    for slot in range(3):
        with window.writer(slot) as writer:
            writer.append("train", np.ones((2, 2)), ["a", "b"])
            writer.commit()
    write(tmp_path / "elsewhere")
    elsewhere = everything(tmp_path / "elsewhere")
    (tmp_path / "w/slot-000007").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "w/slot-000008").mkdir()
    kept = {
        "slot-000007",
        "slot-000008/notes.txt",
        "slot-000001/notes.txt",
        "slot-1/zarr.json",
        "slot-000000.bak/zarr.json",
    }
    for path in kept - {"slot-000007"}:
        (tmp_path / "w" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "w" / path).write_text("mine")
    window.evict(5)
    assert not (window.folder(0)).exists()
    assert {p for p, content in everything(tmp_path / "w").items() if content != "folder"} == kept
    assert remove_window(tmp_path / "w") == sorted(kept)
    assert everything(tmp_path / "elsewhere") == elsewhere
    for path in kept:
        (tmp_path / "w" / path).unlink()
        if "/" in path:
            (tmp_path / "w" / path).parent.rmdir()
    assert remove_window(tmp_path / "w") == []
    assert not (tmp_path / "w").exists()
    assert remove_window(tmp_path / "w") == []


class Failing(LocalStore):
    """Refuses to delete one file, as an object store does that fails."""

    refuses: str | None = None

    def delete(self, path: str) -> None:
        if path == self.refuses:
            raise StoreError(f"deleting {path} failed")
        super().delete(path)


def replace(store: LocalStore) -> None:
    storage, spec = KINDS["float32"]
    create(store, make_key({}, storage), [spec], storage, replace=True).close()


@pytest.mark.parametrize("use", [replace, remove])
def test_removing_that_a_store_ended_midway_is_gone_on_with(
    tmp_path: Path, use: Callable[[LocalStore], object]
) -> None:
    """Until the last file is gone, one of those left says that a cache of ours lies there."""
    write(tmp_path / "whole")
    for path in (path for path, _ in list(LocalStore(tmp_path / "whole").list()) if "/lock" not in path):
        write(tmp_path / "cache")
        store = Failing(tmp_path / "cache")
        store.refuses = path
        with pytest.raises(StoreError, match="deleting"):
            use(store)
        store.refuses = None
        use(store)
        remove(tmp_path / "cache")
        assert list(LocalStore(tmp_path / "cache").list()) == []


class Disturbed(LocalStore):
    """Alters the first reading of the plan, as a network does."""

    reads = 0

    def read(self, path: str) -> bytes:
        data = super().read(path)
        if path == "record/plan.json":
            self.reads += 1
            if self.reads == 1:
                return data.replace(b'"name":"a-b"', b'"name":"a-c"')
        return data


@pytest.mark.parametrize("altered_at", [1, 2])
def test_a_disturbed_look_does_not_leave_files_behind_that_nothing_proves_ours(tmp_path: Path, altered_at: int) -> None:
    write(tmp_path / "cache", "uint8 views")
    (tmp_path / "cache/record/commit.json").unlink()
    store = Disturbed(tmp_path / "cache")
    store.reads = 1 - altered_at  # in the look before the removal, or in the removal
    assert remove(store) == []
    assert list(store.list()) == []
