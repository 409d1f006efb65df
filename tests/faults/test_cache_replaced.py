"""A cache removed or replaced beneath a reader, one that no address space holds, a plan altered before the commit."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from activation_cache import (
    CacheError,
    Damaged,
    DoesNotFit,
    NotCommitted,
    SplitSpec,
    Stale,
    Storage,
    create,
    inspect,
    make_key,
    open_cache,
    remove,
    repair,
    verify,
)
from activation_cache.store.base import LocalStore

OLD, NEW = make_key({"weights": "old"}, Storage()), make_key({"weights": "new"}, Storage())
SPEC = SplitSpec("train", 6, (4,), {"class": "int8"}, shard_samples=2)


def write(location: Path, key=OLD, spec: SplitSpec = SPEC, value: float = 1) -> None:  # type: ignore[no-untyped-def]
    with create(location, key, [spec], Storage(), replace=True) as writer:
        count = spec.samples
        values = np.full((count, *spec.shape), value, np.float32)
        writer.append("train", values, [str(i) for i in range(count)], {"class": [0] * count} if spec.labels else {})
        writer.commit()


class Removed(LocalStore):
    """Goes as soon as its files were listed once."""

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        yield from list(super().list(prefix))
        if prefix == "" and self.size("record/commit.json") is not None:
            remove(self.root)


@pytest.mark.parametrize("use", [open_cache, verify, inspect], ids=lambda use: use.__name__)
def test_removed_while_it_is_opened(tmp_path: Path, use: Callable[[LocalStore], object]) -> None:
    write(tmp_path / "c")
    try:
        found = use(Removed(tmp_path / "c"))
    except CacheError as error:
        assert isinstance(error, NotCommitted)  # noqa: PT017 - inspect and verify may say it in what they return
    else:
        assert use is not open_cache
        assert getattr(found, "state", "absent") in ("absent", "damaged")


READS = {
    "values": lambda split: split.read([5]),
    "batches": lambda split: list(split.batches(2)),
    "ids": lambda split: split.ids,
    "labels": lambda split: split.labels,
}


@pytest.mark.parametrize("change", ["remove", "replace", "repair"])
@pytest.mark.parametrize("what", READS)
def test_replaced_while_it_is_read(tmp_path: Path, what: str, change: str) -> None:
    write(tmp_path / "c")
    split = open_cache(tmp_path / "c").splits["train"]
    split.read([0])
    if change == "remove":
        remove(tmp_path / "c")
    elif change == "replace":
        write(tmp_path / "c", NEW, SplitSpec("train", 3, (9,), shard_samples=1), value=2)
    else:
        repair(tmp_path / "c").close()
        for path in ("values/0/c/0/0", "values/0/c/1/0", "values/0/c/2/0", "ids/c/0", "labels/class/c/0"):
            (tmp_path / "c/train" / path).write_bytes(b"being written anew")
    with pytest.raises(NotCommitted, match=r"removed, replaced or taken for repair.*open it again"):
        READS[what](split)


def test_damage_is_still_damage(tmp_path: Path) -> None:
    write(tmp_path / "c")
    split = open_cache(tmp_path / "c").splits["train"]
    (tmp_path / "c/train/values/0/c/2/0").unlink()
    with pytest.raises(Damaged, match=r"values/0/c/2/0.*missing"):
        split.read([5])


def test_readers_beside_a_writer_that_replaces(tmp_path: Path) -> None:
    """Any moment: what is read is one of the two caches, whole, or refused by an error of the package."""
    stop, location = threading.Event(), tmp_path / "c"
    write(location)

    def replacing() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            write(location, NEW if number % 2 else OLD, value=1 + number % 2)

    thread = threading.Thread(target=replacing)
    thread.start()
    outcomes: dict[str, int] = {}
    try:
        for _ in range(150):
            try:
                cache = open_cache(location, OLD)
                split = cache.splits["train"]
                assert np.array_equal(split.read(range(6)), np.ones((6, 4)))
                assert split.ids == [str(i) for i in range(6)]
                outcome = "read"
            except (NotCommitted, Stale, Damaged) as error:
                outcome = type(error).__name__
            inspect(location)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    finally:
        stop.set()
        thread.join()
    assert len(outcomes) > 1, outcomes


def test_no_address_space(tmp_path: Path) -> None:
    spec = SplitSpec("train", 4, (1 << 20,), shard_samples=2)
    write(tmp_path / "c", OLD, spec)
    read, sent = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        split = open_cache(tmp_path / "c").splits["train"]
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (now + (6 << 20), hard))
        try:
            next(split.batches(1, allocate=lambda shape, dtype: np.empty(shape, dtype)))
            said = "nothing"
        except DoesNotFit as error:
            said = f"{error} {error.needed}"
        except BaseException as error:
            said = repr(error)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        if split.read([3])[0][0] != 1:
            said = "and then it was not read"
        os.write(sent, said.encode())
        os._exit(0)
    os.close(sent)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert "bytes of shards failed" in said
    assert "ulimit -v" in said
    assert int(said.split()[-1]) >= 16 << 20


@pytest.mark.parametrize("how", ["flip", "remove", "another"])
def test_a_plan_that_changes_before_the_commit_is_not_sealed_in(tmp_path: Path, how: str) -> None:
    plan = tmp_path / "c/record/plan.json"
    with create(tmp_path / "c", OLD, [SPEC], Storage()) as writer:
        writer.append("train", np.ones((6, 4)), [str(i) for i in range(6)], {"class": [0] * 6})
        data = plan.read_bytes()
        if how == "flip":
            plan.write_bytes(data.replace(b'"old"', b'"odd"'))
        elif how == "remove":
            plan.unlink()
        else:
            write(tmp_path / "other", NEW)
            plan.write_bytes((tmp_path / "other/record/plan.json").read_bytes())
        writer.commit()
    assert plan.read_bytes() == data
    assert verify(tmp_path / "c").ok
    assert open_cache(tmp_path / "c", OLD).splits["train"].samples == 6
