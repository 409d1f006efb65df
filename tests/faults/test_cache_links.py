"""Links, pipes and folders in the places of a cache's files: refused by name, never followed, never waited for."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from activation_cache import (
    CacheError,
    Damaged,
    SplitSpec,
    Storage,
    create,
    inspect,
    make_key,
    open_cache,
    repair,
    verify,
)

KEY = make_key({}, Storage())
SPEC = SplitSpec("train", 5, (4,), {"class": "int8"}, shard_samples=2)
VALUES = np.arange(20, dtype=np.float32).reshape(5, 4)


@pytest.fixture(autouse=True)
def _no_hanging() -> Iterator[None]:
    """A pipe that is waited for ends the test."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    finish(tmp_path / "cache")
    return tmp_path / "cache"


def finish(location: Path) -> None:
    with create(location, KEY, [SPEC], Storage()) as writer:
        for part in writer.pending("train"):
            writer.append("train", VALUES[part.start : part.stop], [str(i) for i in part], {"class": list(part)})
        writer.commit()


def read(location: Path) -> None:
    split = open_cache(location).splits["train"]
    assert split.ids
    assert split.labels
    np.testing.assert_array_equal(split.read(range(5)), VALUES)


def in_place_of(path: Path, kind: str, victim: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


READ = ["record/commit.json", "record/plan.json", "train/zarr.json", "train/values/0/c/1/0", "train/ids/c/0"]


@pytest.mark.parametrize("kind", ["link", "loop", "pipe", "folder"])
@pytest.mark.parametrize("path", READ)
def test_a_reader_refuses_what_is_no_regular_file(cache: Path, tmp_path: Path, path: str, kind: str) -> None:
    shutil.copytree(cache, tmp_path / "copy")  # what a link points to is right in every byte
    in_place_of(cache / path, kind, tmp_path / "copy" / path)
    with pytest.raises(CacheError, match=path):
        read(cache)
    assert inspect(cache).state == "damaged"
    assert path in verify(cache).damaged


@pytest.mark.parametrize("folder", ["record", "train", "train/values", "train/values/0/c", "train/ids"])
def test_a_reader_follows_no_folder_that_is_a_link(cache: Path, tmp_path: Path, folder: str) -> None:
    shutil.move(cache / folder, tmp_path / "elsewhere")
    (cache / folder).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match=folder):
        read(cache)
    try:
        assert verify(cache).damaged
    except CacheError as error:
        assert folder in str(error)  # noqa: PT017 - either will do


@pytest.mark.parametrize("use", [create, repair], ids=["create", "repair"])
@pytest.mark.parametrize("path", ["record/lock", "record", "train", "train/values", "train/values/0/c/2"])
def test_a_writer_follows_no_link(cache: Path, tmp_path: Path, path: str, use: Callable[..., object]) -> None:
    """An unfinished cache with a link in it: what it points to is neither emptied nor added to nor replaced."""
    (cache / "record/commit.json").unlink()
    (cache / "record/train/0/2.json").unlink()
    victim = tmp_path / "victim"
    if path == "record/lock":
        victim.write_text("precious")
    else:
        shutil.move(cache / path, victim)
    before = {p: p.read_bytes() for p in [victim, *victim.rglob("*")] if p.is_file()}
    in_place_of(cache / path, "link", victim)
    with pytest.raises(Damaged, match=f"{path} is a link"):
        finish(cache) if use is create else mend(cache)
    assert {p: p.read_bytes() for p in [victim, *victim.rglob("*")] if p.is_file()} == before


def mend(location: Path) -> None:
    with repair(location) as writer:
        for part in writer.pending("train"):
            writer.append("train", VALUES[part.start : part.stop], [str(i) for i in part], {"class": list(part)})
        writer.commit()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused(cache: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "victim").write_text("precious")
    in_place_of(cache / "record/lock", kind, tmp_path / "victim")
    (cache / "record/commit.json").unlink()
    with pytest.raises(Damaged, match="record/lock"):
        finish(cache)
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("path", ["record", "train", "train/values/0", "."])
def test_a_file_in_the_place_of_a_folder(tmp_path: Path, path: str) -> None:
    location = tmp_path / "cache"
    (location / path).parent.mkdir(parents=True, exist_ok=True)
    (location / path).write_text("mine")
    with pytest.raises(CacheError, match=r"no folder|is a file"):
        finish(location)
    with pytest.raises(CacheError):
        read(location)
    assert (location / path).read_text() == "mine"


def test_the_folder_that_the_user_named_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    finish(tmp_path / "cache")
    read(tmp_path / "cache")
    assert verify(tmp_path / "cache").ok
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for use in (read, finish, inspect, repair):
        with pytest.raises(CacheError, match="loop"):
            use(tmp_path / "loop")
