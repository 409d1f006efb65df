"""Looking at a cache without using it: in what state it is, and whether every byte of it is what was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from .errors import CacheError, Damaged, FormatError, NotCommitted, Stale
from .format.canonical import Json
from .format.key import Key, check_key
from .format.layout import COMMIT, RECORD, grid
from .format.quantise import Calibration
from .format.record import altered, finished_shards, read_commit, read_plan, shard_file, surviving_plan
from .reading.cache import Cache, check_files
from .reading.sources import Shards
from .store.base import Store, open_store


@dataclass(frozen=True)
class Status:
    """state      absent; partial (to be continued); valid; stale (made from something else); damaged
    reason        what is behind it, for people; empty when valid
    bytes         on disk
    samples       split -> samples there (of all of its views, the fewest)
    key           what it was made from; None where nothing says so: a damaged cache is then not to be repaired
    calibration   for uint8; of a partial cache, what it was begun with and will be gone on with
    """

    state: Literal["absent", "partial", "valid", "stale", "damaged"]
    reason: str
    bytes: int
    samples: Mapping[str, int]
    key: Key | None
    calibration: Calibration | None = None


def inspect(location: str | Path | Store, key: Mapping[str, Json] | None = None) -> Status:
    """The state of the cache at `location`, from its records and the sizes of its files; no data is read."""
    store = open_store(location)
    size = sum(size for _, size in store.list())
    try:
        commit = read_commit(store)
    except NotCommitted as error:
        return _unfinished(store, key, size, str(error))
    except Damaged as error:
        return _without_commit(store, key, size, str(error))
    except CacheError as error:
        return _unreadable(error, size)
    plan = commit.plan
    samples = {spec.name: spec.samples for spec in plan.splits}
    try:
        check_key(plan.key, key, store.location)
    except Stale as error:
        return Status("stale", str(error), size, samples, plan.key, plan.calibration)
    damaged = check_files(store, commit)
    reason = "; ".join(f"{path} {why}" for path, why in damaged.items())
    return Status("damaged" if damaged else "valid", reason, size, samples, plan.key, plan.calibration)


def _without_commit(store: Store, key: Mapping[str, Json] | None, size: int, reason: str) -> Status:
    """A cache that was finished, and whose commit record is damaged; the plan may still say what it is."""
    try:
        plan = surviving_plan(store)
        check_key(plan.key, key, store.location)
    except Stale as error:
        return Status("stale", str(error), size, {}, plan.key, plan.calibration)
    except CacheError:
        return Status("damaged", reason, size, {}, None)
    return Status("damaged", reason, size, {}, plan.key, plan.calibration)


def _unfinished(store: Store, key: Mapping[str, Json] | None, size: int, reason: str) -> Status:
    try:
        plan = read_plan(store)
    except CacheError as error:
        return _unreadable(error, size)
    if plan is None:
        return Status("absent", reason, size, {}, None)
    samples, finished = {}, finished_shards(store, plan)
    for spec in plan.splits:
        g = grid(spec, plan.storage)
        views = [finished[spec.name, view] for view in range(spec.views)]
        samples[spec.name] = min(sum(len(g.shard_range(shard)) for shard in found) for found in views)
    try:
        check_key(plan.key, key, store.location)
    except Stale as error:
        return Status("stale", str(error), size, samples, plan.key, plan.calibration)
    return Status("partial", reason, size, samples, plan.key, plan.calibration)


def _unreadable(error: CacheError, size: int) -> Status:
    """A cache of another format that still says what it was made from is no use, but not damaged either."""
    if isinstance(error, FormatError) and error.key is not None:
        return Status("stale", str(error), size, {}, error.key)
    return Status("damaged", str(error), size, {}, None)


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    bytes, files   read
    damaged        path -> what is wrong with it; for a shard, with the chunks
    unexpected     files that the cache did not write; they change nothing, but somebody put them there
    """

    bytes: int
    files: int
    damaged: Mapping[str, str]
    unexpected: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.damaged


def verify(location: str | Path | Store) -> Report:
    """Reads every byte of a finished cache and compares it with the record. Raises NotCommitted (also where
    it is replaced meanwhile) or FormatError.

    A damaged commit record is reported like any other damaged file; nothing else can be checked then, nor can the
    shards of ragged samples whose offsets are damaged.
    """
    store = open_store(location)
    try:
        commit = read_commit(store)
    except Damaged as error:
        return Report(dict(store.list(RECORD)).get(COMMIT, 0), 1, {COMMIT: str(error)}, ())
    damaged = check_files(store, commit)
    cache = Cache(store, commit)
    shards = set()
    for split in cache.splits.values():
        for view in range(split.views):
            spec = commit.plan.split(split.name)
            paths = [shard_file(commit.plan, spec, view, number) for number in range(split.grid.shards)]
            shards.update(paths)
            try:
                files = split.shards(view)
            except Damaged as error:
                damaged.update(
                    (path, "is missing, truncated or altered") for path in error.paths if path not in damaged
                )
                continue  # without the offsets of ragged samples nothing says how many chunks a shard has
            for number, path in enumerate(paths):
                if path in damaged:
                    continue
                try:
                    bad = _bad_chunks(files, number)
                except Damaged as error:
                    damaged[path] = str(error)
                    continue
                if bad:
                    damaged[path] = f"chunks {', '.join(map(str, bad[:20]))}{'…' if bad[20:] else ''} are altered"
    for path, (_, expected) in commit.files.items():
        if path not in shards and path not in damaged and (why := altered(store, path, expected)):
            damaged[path] = why
    known = {*commit.files, COMMIT}
    unexpected = sorted(p for p, _ in store.list() if p not in known and not p.startswith(f"{RECORD}/lock"))
    size = sum(size for size, _ in commit.files.values())
    return Report(size, len(commit.files) + 1, damaged, tuple(unexpected))


def _bad_chunks(shards: Shards, number: int) -> list[int]:
    """The chunks of a shard whose checksum is wrong or that do not decode. Raises Damaged for the shard as a whole."""
    shards.files.forget(number)
    shard = shards[number]
    out = np.empty(shards.files.grid.chunk_rows * shards.files.row_bytes if shard.checked else 0, np.uint8)
    bad = []
    for chunk in range(len(shard.checked)):
        try:
            shard.decode(chunk, out)
        except Damaged:
            bad.append(chunk)
    return bad
