"""What a cache knows about itself: the plan, a journal entry for each finished shard, and the commit record.

    record/plan.json                 key, storage, splits; written first
    record/<split>/<view>/<n>.json   what shard n holds; written once the shard is safely there
    record/commit.json               every file with its size and hash; written last, and only then is it a cache

Each is one JSON object in canonical form with its own sha256, so that a change of any byte shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .canonical import Json, canonical, digest
from .errors import Damaged, FormatError, NotCommitted
from .layout import COMMIT, FORMAT, PLAN, Plan, SplitSpec, grid, journal_path, shard_path
from .store import Store

_NAME = "activation-cache"


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
    return {"plan": digest(plan.to_json()), "split": split, "view": view, "shard": shard}


def read_entry(store: Store, plan: Plan, split: str, view: int, shard: int) -> Entry | None:
    """A shard's journal entry, or None where there is none. Raises Damaged."""
    path = journal_path(split, view, shard)
    data = _read(store, path)
    if data is None:
        return None
    value = unseal_json(data, path, store.location)
    place = _place(plan, split, view, shard)
    if {name: value.pop(name, None) for name in place} != place:
        raise Damaged(f"{store.location}: {path} belongs to another shard; {mend(store.location)}", [path])
    entry, spec = Entry(**value), plan.split(split)
    g = grid(spec, plan.storage)
    counts = {
        len(entry.ids),
        *map(len, entry.labels.values()),
        *([len(entry.lengths)] if g.ragged_axis is not None else []),
    }
    if counts != {len(g.shard_range(shard))} or set(entry.labels) != (set(spec.labels) if view == 0 else set()):
        raise Damaged(f"{store.location}: {path} has not one of everything a sample; {mend(store.location)}", [path])
    return entry


def finished_shards(store: Store, plan: Plan, spec: SplitSpec, view: int) -> dict[int, Entry]:
    """Shard number -> entry, for each shard of a split's view that is safely there with the size its entry says."""
    found: dict[int, Entry] = {}
    for shard in range(grid(spec, plan.storage).shards):
        try:
            entry = read_entry(store, plan, spec.name, view, shard)
        except Damaged:
            continue  # the shard counts as unwritten
        if entry is not None and store.size(shard_file(plan, spec, view, shard)) == entry.size:
            found[shard] = entry
    return found


def shard_file(plan: Plan, spec: SplitSpec, view: int, shard: int) -> str:
    """The path of a shard."""
    return shard_path(spec.name, view, shard, 1 + len(grid(spec, plan.storage).row_shape))


def create_plan(store: Store, plan: Plan) -> bool:
    """Writes the plan of a new cache; False where there is another."""
    return store.create(PLAN, _plan_bytes(plan))


def write_plan(store: Store, plan: Plan) -> None:
    """Writes the plan over whatever lies in its place."""
    store.write(PLAN, [_plan_bytes(plan)])


def _plan_bytes(plan: Plan) -> bytes:
    return seal_json({"format": FORMAT, "name": _NAME, "plan": plan.to_json()})


def read_plan(store: Store) -> Plan | None:
    """The plan of a cache, finished or not; None where there is none. Raises Damaged or FormatError."""
    data = _read(store, PLAN)
    if data is None:
        return None
    value = unseal_json(data, PLAN, store.location)
    check_format(value, store.location)
    return Plan.from_json(value["plan"])


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
    return Commit(Plan.from_json(value["plan"]), {path: (size, h) for path, (size, h) in value["files"].items()})


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


def _read(store: Store, path: str) -> bytes | None:
    """A file of the record, or None where there is none. Raises Damaged for a folder in its place."""
    try:
        return store.read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError:
        raise Damaged(f"{store.location}: {path} is a folder; {mend(store.location)}", [path]) from None


def check_format(value: Mapping[str, Any], location: str) -> None:
    if value.get("name") != _NAME or value.get("format") != FORMAT:
        plan = value.get("plan") if value.get("name") == _NAME else None
        raise FormatError(
            f"{location} has format {value.get('name')!r} {value.get('format')!r}, and this package reads "
            f"{_NAME!r} {FORMAT}; write the cache again, or use the version that wrote it",
            plan.get("key") if isinstance(plan, dict) else None,
        )
