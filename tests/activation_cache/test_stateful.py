"""A cache against a model of it in memory, under everything that may be done to it in any order."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from activation_cache import (
    CacheError,
    CacheWriter,
    SplitSpec,
    Storage,
    create,
    inspect,
    make_key,
    open_cache,
    repair,
    verify,
)

SAMPLES, SHARD = 11, 3


class CacheMachine(RuleBasedStateMachine):
    """The model: which samples reached a whole shard, whether it is committed, which files are damaged."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.location = self.folder / "cache"
        self.writer: CacheWriter | None = None
        self.version, self.committed = 0, False
        self.damaged: set[str] = set()

    @initialize(dtype=st.sampled_from(["float32", "float16"]), codec=st.sampled_from(["none", "lz4", "zstd"]))
    def begin(self, dtype: str, codec: str) -> None:
        self.storage = Storage(dtype, codec)  # type: ignore[arg-type]

    def teardown(self) -> None:
        if self.writer is not None:
            self.writer.close()
        shutil.rmtree(self.folder)

    def values(self, part: range) -> np.ndarray:  # type: ignore[type-arg]
        return np.array([[i, self.version, -i] for i in part], self.storage.stored)

    @property
    def key(self) -> dict:  # type: ignore[type-arg]
        return make_key({"version": self.version}, self.storage)

    def spec(self) -> SplitSpec:
        return SplitSpec("train", SAMPLES, (3,), {"class": "int16"}, shard_samples=SHARD)

    def append(self, part: range) -> None:
        assert self.writer is not None
        self.writer.append("train", self.values(part), [f"s{i}" for i in part], {"class": list(part)})

    @precondition(lambda self: self.writer is None and not self.committed)
    @rule(threads=st.integers(0, 2))
    def open_writer(self, threads: int) -> None:
        again = partial(create, self.location, self.key, [self.spec()], self.storage, threads=threads)
        try:
            self.writer = again()
        except CacheError:
            assert self.damaged, "nothing is wrong, and the writer was refused"
            self.writer = again(replace=True)
            self.damaged = set()

    @precondition(lambda self: self.writer is not None)
    @rule(count=st.integers(1, 5))
    def append_some(self, count: int) -> None:
        assert self.writer is not None
        for part in self.writer.pending("train"):
            self.append(part[:count])
            break

    @precondition(lambda self: self.writer is not None)
    @rule()
    def leave_without_commit(self) -> None:
        assert self.writer is not None
        self.writer.close()
        self.writer = None

    @precondition(lambda self: self.writer is not None)
    @rule()
    def finish(self) -> None:
        assert self.writer is not None
        for part in self.writer.pending("train"):
            self.append(part)
        self.writer.commit()
        # Shards damaged before the commit are in it as they are: their own checksums tell.
        self.writer, self.committed = None, True

    @precondition(lambda self: self.writer is None and self.location.exists())
    @rule(data=st.data(), how=st.sampled_from(["flip", "truncate", "remove"]))
    def damage(self, data: st.DataObject, how: str) -> None:
        files = sorted(
            p.relative_to(self.location).as_posix()
            for p in self.location.rglob("*")
            if p.is_file() and "lock" not in p.name
        )
        if not files:
            return
        path = data.draw(st.sampled_from(files))
        content = (self.location / path).read_bytes()
        if how == "remove":
            os.unlink(self.location / path)
        elif content:
            at = data.draw(st.integers(0, len(content) - 1))
            changed = (
                content[:at] if how == "truncate" else content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]
            )
            (self.location / path).write_bytes(changed)
        self.damaged.add(path)

    @precondition(
        lambda self: self.writer is None and self.location.exists() and inspect(self.location).state != "absent"
    )
    @rule()
    def mend(self) -> None:
        try:
            self.writer = repair(self.location)
        except CacheError:
            assert {"record/plan.json", "record/commit.json"} <= self.damaged or not self.committed
            self.replace()
            return
        self.damaged = set()
        self.finish()
        assert verify(self.location).ok

    @precondition(lambda self: self.writer is None)
    @rule()
    def replace(self) -> None:
        self.version += 1
        self.committed, self.damaged = False, set()
        self.writer = create(self.location, self.key, [self.spec()], self.storage, replace=True)

    @precondition(lambda self: self.writer is None)
    @rule()
    def evict(self) -> None:
        shutil.rmtree(self.location, ignore_errors=True)
        self.committed, self.damaged = False, set()

    @invariant()
    def reading_is_right_or_refused(self) -> None:
        if not hasattr(self, "storage"):
            return
        try:
            split = open_cache(self.location, self.key).splits["train"]
            values = split.read(range(SAMPLES))
            ids, classes = split.ids, split.labels["class"]
        except CacheError:
            assert self.damaged or not self.committed, "nothing is wrong, and reading was refused"
            return
        assert self.committed
        np.testing.assert_array_equal(values, self.values(range(SAMPLES)))
        assert ids == [f"s{i}" for i in range(SAMPLES)]
        np.testing.assert_array_equal(classes, np.arange(SAMPLES))
        if not self.damaged:
            assert inspect(self.location, self.key).state == "valid"


TestCache = CacheMachine.TestCase
TestCache.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
