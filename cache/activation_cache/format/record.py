"""What a cache knows about itself: the plan, a journal entry for each finished shard, and the commit record.

    record/plan.json                 key, storage, splits; written first
    record/<split>/<view>/<n>.json   what shard n holds; written once the shard is safely there
    record/commit.json               every file with its size and hash; written last, and only then is it a cache

Each is one JSON object in canonical form with its own sha256, so that a change of any byte shows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from activation_cache.errors import CacheError, Damaged, FormatError, NotCommitted
from activation_cache.store.base import Store

from .canonical import Json, canonical
from .layout import COMMIT, FORMAT, PLAN, RECORD, Plan, SplitSpec, grid, journal_path, shard_path
from .parse import entry_from_json, files_from_json, key_from_json, plan_from_json

_NAME = "activation-cache"
_MOST_BYTES = 1 << 30  # of a file of the record, which is read whole
_ENTRY = re.compile(rf"{RECORD}/([^/]+)/(0|[1-9]\d{{0,8}})/(0|[1-9]\d{{0,8}})\.json")
_Value = TypeVar("_Value")


def seal_json(body: Mapping[str, Json]) -> bytes:
    """A JSON object as it is written here: canonical, with the sha256 of the rest in it."""
    return canonical({**body, "sha256": hashlib.sha256(canonical(body)).hexdigest()})


def unseal_json(data: bytes, path: str, location: str) -> dict[str, Any]:
    """The object behind seal_json's bytes. Raises Damaged if any byte differs from what was written."""
    try:
        value = json.loads(data)
        if isinstance(value, dict) and canonical(value) == data:
            expected = value.pop("sha256")
            if expected == hashlib.sha256(canonical(value)).hexdigest():
                return value
    except (ValueError, KeyError, RecursionError):
        pass
    raise Damaged(f"{location}: {path} is damaged (it does not match its own checksum); {mend(location)}", [path])


def mend(location: str) -> str:
    """The advice that ends a message about damage."""
    return f"repair the cache at {location} or write it again"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Entry:
    """The journal of one shard: its file's size and seal, and what belongs to its samples.

    size        of the file, bytes
    lengths     of ragged samples, otherwise empty
    labels      name -> a number, or a list of numbers, for each sample
    saturated   how many numbers were outside the calibrated range
    """

    size: int
    seal: str
    ids: list[str]
    lengths: list[int]
    labels: dict[str, list[Any]]
    saturated: int

    def to_bytes(self, plan: Plan, split: str, view: int, shard: int) -> bytes:
        return seal_json({**_place(plan, split, view, shard), **vars(self)})


def _place(plan: Plan, split: str, view: int, shard: int) -> dict[str, Json]:
    """What ties an entry to its shard, so that one from elsewhere is not taken for it."""
    return {"plan": plan.digest, "split": split, "view": view, "shard": shard}


def read_entry(store: Store, plan: Plan, split: str, view: int, shard: int) -> Entry | None:
    """A shard's journal entry, or None where there is none. Raises Damaged."""
    path = journal_path(split, view, shard)
    data = _read(store, path)
    if data is None:
        return None
    value = unseal_json(data, path, store.location)
    place = _place(plan, split, view, shard)
    if canonical({name: value.pop(name, None) for name in place}) != canonical(place):
        raise Damaged(f"{store.location}: {path} belongs to another shard; {mend(store.location)}", [path])
    fields = _parsed(lambda: entry_from_json(value, plan, plan.split(split), view, shard), path, store.location)
    return Entry(**fields)


def journalled(store: Store, plan: Plan) -> dict[tuple[str, int], list[int]]:
    """(split, view) -> its planned shards that have an entry, in order: from names alone, whatever the plan claims."""
    return _journalled(plan, [path for path, _ in store.list(RECORD)])


def _journalled(plan: Plan, paths: Iterable[str]) -> dict[tuple[str, int], list[int]]:
    planned = {spec.name: (spec.views, grid(spec, plan.storage).shards) for spec in plan.splits}
    found: dict[tuple[str, int], list[int]] = {}
    for path in paths:
        if entry := _ENTRY.fullmatch(path):
            split, view, shard = entry[1], int(entry[2]), int(entry[3])
            views, shards = planned.get(split, (0, 0))
            if view < views and shard < shards:
                found.setdefault((split, view), []).append(shard)
    return {track: sorted(shards) for track, shards in found.items()}


def finished_shards(store: Store, plan: Plan) -> dict[tuple[str, int], dict[int, Entry]]:
    """(split, view) -> shard number -> entry, for each shard that is safely there with the size its entry says."""
    sizes = dict(store.list())
    entered = _journalled(plan, sizes)
    found: dict[tuple[str, int], dict[int, Entry]] = {}
    for spec in plan.splits:
        for view in range(spec.views):
            found[spec.name, view] = {}
            for shard in entered.get((spec.name, view), ()):
                try:
                    entry = read_entry(store, plan, spec.name, view, shard)
                except Damaged:
                    continue  # the shard counts as unwritten
                if entry is not None and sizes.get(shard_file(plan, spec, view, shard)) == entry.size:
                    found[spec.name, view][shard] = entry
    return found


def shard_file(plan: Plan, spec: SplitSpec, view: int, shard: int) -> str:
    """The path of a shard."""
    return shard_path(spec.name, view, shard, 1 + len(grid(spec, plan.storage).row_shape))


def create_plan(store: Store, plan: Plan) -> bool:
    """Writes the plan of a new cache; False where there is another."""
    return store.create(PLAN, plan_bytes(plan))


def write_plan(store: Store, plan: Plan) -> None:
    """Writes the plan over whatever lies in its place."""
    store.write(PLAN, [plan_bytes(plan)])


def plan_bytes(plan: Plan) -> bytes:
    """What the plan's file is to hold."""
    return seal_json({"format": FORMAT, "name": _NAME, "plan": plan.to_json()})


def read_plan(store: Store) -> Plan | None:
    """The plan of a cache, finished or not; None where there is none. Raises Damaged or FormatError."""
    data = _read(store, PLAN)
    if data is None:
        return None
    value = unseal_json(data, PLAN, store.location)
    check_format(value, store.location)
    return _parsed(lambda: plan_from_json(value.get("plan")), PLAN, store.location)


@dataclass(frozen=True)
class Commit:
    """The commit record: the plan, and for each file (bytes, hash): a shard's seal, or the sha256 of any other file."""

    plan: Plan
    files: dict[str, tuple[int, str]]

    def to_bytes(self) -> bytes:
        files: Json = {path: list(entry) for path, entry in self.files.items()}
        return seal_json({"format": FORMAT, "name": _NAME, "plan": self.plan.to_json(), "files": files})


def read_commit(store: Store) -> Commit:
    """The commit record. Raises NotCommitted, Damaged or FormatError."""
    data = _read(store, COMMIT)
    if data is None:
        partial = store.size(PLAN) is not None
        with suppress(Damaged):
            read_plan(store)  # of another format, it cannot be gone on with
        what = "is not finished: its writer was stopped before it committed" if partial else "holds no activation cache"
        todo = "write it again with the same key, and it goes on from the last whole shard" if partial else "write it"
        raise NotCommitted(f"{store.location} {what}; {todo}")
    value = unseal_json(data, COMMIT, store.location)
    check_format(value, store.location)

    def commit() -> Commit:
        plan = plan_from_json(value.get("plan"))
        files, meant = files_from_json(value.get("files"), plan), plan_bytes(plan)
        if files[PLAN] != (len(meant), sha256(meant)):
            raise FormatError(f"the hash of {PLAN} is not that of the plan that was committed")
        return Commit(plan, files)

    return _parsed(commit, COMMIT, store.location)


def _parsed(parse: Callable[[], _Value], path: str, location: str) -> _Value:
    """What `parse` returns; what it cannot accept of the file at `path` as Damaged."""
    try:
        return parse()
    except FormatError as error:
        raise Damaged(
            f"{location}: {path} says what no writer of this package writes: {error}; {mend(location)}", [path]
        ) from None


def surviving_plan(store: Store) -> Plan:
    """The plan in the commit record, which is what the shards were committed with; else the one in its own file.

    Raises Damaged where neither can be read: then nothing says what the shards hold.
    """
    with suppress(Damaged, NotCommitted):
        return read_commit(store).plan
    with suppress(Damaged):
        if (plan := read_plan(store)) is not None:
            return plan
    raise Damaged(
        f"{store.location} cannot be repaired: its plan and its commit record are both lost; write it again",
        [PLAN, COMMIT],
    )


def damage(store: Store, commit: Commit, message: str, paths: Sequence[str]) -> CacheError:
    """The error for files that are not what `commit` says: Damaged; or NotCommitted where the cache is not the one that
    was opened any more, since another process removed or replaced it, or repairs it.
    """
    try:
        same = read_commit(store) == commit
    except NotCommitted:
        same = False
    except CacheError:
        same = True
    if same:
        return Damaged(f"{message}; {mend(store.location)}", paths)
    return NotCommitted(
        f"{store.location} was removed, replaced or taken for repair by another process while it was read "
        f"({message}); open it again when it is finished"
    )


def altered(store: Store, path: str, expected: str) -> str | None:
    """What is wrong with the content of a file that is no shard."""
    try:
        return None if sha256(store.read(path)) == expected else "was altered"
    except FileNotFoundError:  # removed since it was listed
        return "is missing"
    except Damaged:
        return "is no regular file"


def _read(store: Store, path: str) -> bytes | None:
    """A file of the record, or None where there is none. Raises Damaged for one that no memory should hold."""
    if (store.size(path) or 0) > _MOST_BYTES:
        raise Damaged(f"{store.location}: {path} has more than {_MOST_BYTES:,} bytes; {mend(store.location)}", [path])
    try:
        return store.read(path)
    except FileNotFoundError:
        return None


def check_format(value: Mapping[str, Any], location: str) -> None:
    name, version = value.get("name"), value.get("format")
    if name == _NAME and type(version) is int and version == FORMAT:
        return
    key = None
    if name == _NAME and isinstance(plan := value.get("plan"), dict):
        with suppress(FormatError):
            key = key_from_json(plan.get("key"))
    name, version = (shown if isinstance(shown, str | int) else type(shown) for shown in (name, version))
    raise FormatError(
        f"{location} has format {str(name)[:40]!r} {str(version)[:40]}, and this package reads {_NAME!r} {FORMAT}; "
        "write the cache again, or use the version that wrote it",
        key,
    )
