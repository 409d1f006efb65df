"""Repair rewrites the damaged shards, and nothing but them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from activation_cache import (
    CacheError,
    Damaged,
    NotCommitted,
    SplitSpec,
    Stale,
    Storage,
    create,
    inspect,
    make_key,
    open_cache,
    repair,
    verify,
)

VALUES = np.random.default_rng(0).standard_normal((11, 3)).astype(np.float32)
IDS = [f"image {i}" for i in range(11)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    spec = SplitSpec("train", 11, (3,), {"class": "int8"}, views=2, shard_samples=3)
    with create(tmp_path, make_key({}, Storage()), [spec], Storage()) as writer:
        fill(writer)
        writer.commit()
    return tmp_path


def fill(writer) -> list[tuple[int, range]]:  # type: ignore[no-untyped-def]
    done = []
    for view in range(2):
        for part in writer.pending("train", view):
            s = slice(part.start, part.stop)
            writer.append("train", VALUES[s] + view, IDS[s], {"class": np.arange(11)[s]} if view == 0 else {}, view)
            done.append((view, part))
    return done


def mend(location: Path) -> None:
    with repair(location) as writer:
        fill(writer)
        writer.commit()


def is_right(location: Path) -> bool:
    split = open_cache(location).splits["train"]
    return split.ids == IDS and all(np.array_equal(split.read(range(11), v), VALUES + v) for v in range(2))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def test_only_the_damaged_shards_are_asked_for(cache: Path) -> None:
    damage(cache / "train/values/0/c/1/0")
    (cache / "train/values/1/c/3/0").unlink()
    inodes = {p: p.stat().st_ino for p in cache.glob("train/values/*/c/*/0")}
    report = verify(cache)
    assert set(report.damaged) == {"train/values/0/c/1/0", "train/values/1/c/3/0"}
    assert "chunks 0 are altered" in report.damaged["train/values/0/c/1/0"]
    with repair(cache) as writer:
        assert writer.pending("train", 0) == [range(3, 6)]
        assert writer.pending("train", 1) == [range(9, 11)]
        with pytest.raises(NotCommitted):
            open_cache(cache)
        fill(writer)
        writer.commit()
    assert is_right(cache)
    assert verify(cache).ok
    changed = {p for p, inode in inodes.items() if p.stat().st_ino != inode}
    assert changed == {cache / "train/values/0/c/1/0"}


def test_every_other_file_is_made_again_without_a_sample(cache: Path) -> None:
    for path in sorted(path for path in cache.rglob("*") if path.is_file()):
        name = path.relative_to(cache).as_posix()
        if name.startswith(("record/train/", "record/lock", "train/values/0/c/", "train/values/1/c/")):
            continue
        damage(path)
        with repair(cache) as writer:
            assert fill(writer) == [], f"{path} was damaged, and samples were asked for"
            writer.commit()
        assert is_right(cache)
        assert verify(cache).ok


def test_a_damaged_journal_entry_costs_its_shard(cache: Path) -> None:
    damage(cache / "record/train/1/2.json")
    with repair(cache) as writer:
        assert fill(writer) == [(1, range(6, 9))]
        writer.commit()
    assert is_right(cache)


def test_an_entry_of_another_shard_is_not_believed(cache: Path) -> None:
    one, other = cache / "record/train/0/0.json", cache / "record/train/0/1.json"
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    with repair(cache) as writer:
        assert fill(writer) == [(0, range(0, 6))]
        writer.commit()
    assert is_right(cache)


def test_nothing_to_repair(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(NotCommitted):
        repair(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    damage(cache / "record/plan.json")
    damage(cache / "record/commit.json")
    with pytest.raises(Damaged, match="both lost"):
        repair(cache)
    with pytest.raises(CacheError):
        open_cache(cache)


def other_plan(location: Path) -> bytes:
    with create(location, make_key({"weights": "other"}, Storage()), [SplitSpec("train", 5, (2,))], Storage()):
        return (location / "record/plan.json").read_bytes()


def test_the_plan_of_another_cache_destroys_nothing(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (cache / "record/plan.json").write_bytes(other_plan(tmp_path_factory.mktemp("other")))
    assert inspect(cache).state == "damaged"
    with repair(cache) as writer:
        assert fill(writer) == []
        writer.commit()
    assert is_right(cache)
    assert verify(cache).ok


def test_nothing_is_deleted_where_another_key_is_wanted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (cache / "record/commit.json").unlink()
    (cache / "record/plan.json").write_bytes(other_plan(tmp_path_factory.mktemp("other")))
    before = {path: path.read_bytes() for path in cache.rglob("*.json")}
    with pytest.raises(Stale, match="weights"):
        repair(cache, make_key({}, Storage()))
    assert {path: path.read_bytes() for path in cache.rglob("*.json")} == before


@pytest.mark.parametrize("path", ["record/commit.json", "record/plan.json", "record/train/0/0.json", "zarr.json"])
def test_a_folder_in_the_place_of_a_file(cache: Path, path: str) -> None:
    (cache / path).unlink()
    (cache / path).mkdir()
    (cache / path / "something").write_bytes(b"x")
    assert inspect(cache).state == "damaged"
    assert path in verify(cache).damaged
    with pytest.raises(Damaged, match=path):
        open_cache(cache)
    with pytest.raises(Damaged, match=f"{path} is a folder.*move it away"):
        mend(cache)
    assert (cache / path / "something").read_bytes() == b"x", "it is somebody's, and stays"
    (cache / path / "something").unlink()
    mend(cache)  # an empty one is no loss
    assert is_right(cache)
    assert verify(cache).ok


def test_what_is_damaged_can_be_repaired_if_anything_says_what_it_is(cache: Path) -> None:
    key = make_key({}, Storage())
    damage(cache / "record/commit.json")
    assert inspect(cache, key).state == "damaged"
    assert inspect(cache, key).key == key
    assert inspect(cache, make_key({"weights": "other"}, Storage())).state == "stale"
    damage(cache / "record/plan.json")
    assert inspect(cache, key).state == "damaged"
    assert inspect(cache, key).key is None
