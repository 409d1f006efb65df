"""Which files below a location were made by writers of this format, and removing those and no others.

A file is ours by its name: one that the plan, the journal, the commit record, Zarr or a writer's temporaries can have.
That alone proves nothing about a folder, so nothing is removed unless one of those files says, in its content, that an
activation cache lies there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass

from activation_cache.errors import Damaged
from activation_cache.format.layout import COMMIT, PLAN, RECORD
from activation_cache.store.base import Store
from activation_cache.store.local import TEMPORARY

_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"  # of a split or a label
_NODE = (
    rf"(values(/\d+)?|ids|labels(/{_NAME})?|calibration(/(scale|offset|bend))?"
    rf"|offsets(/(ids|labels(/{_NAME})?|values(/\d+)?))?)"
)
_LOCK = re.compile(rf"{RECORD}/lock(-\d+-of-\d+)?")
_JOURNAL = re.compile(rf"{RECORD}/(?P<split>{_NAME})/\d+/\d+\.json")
_COMMON = re.compile(rf"zarr\.json|{RECORD}/zarr\.json|{PLAN}|{COMMIT}|{_LOCK.pattern}")
_OF_SPLIT = re.compile(rf"(?P<split>{_NAME})(/{_NODE})?/zarr\.json|(?P<other>{_NAME})/{_NODE}/c(/\d+)+")
_FOLDER = re.compile(rf"{RECORD}(/(?P<split>{_NAME})(/\d+)?)?|(?P<other>{_NAME})(/{_NODE}(/c(/\d+)*)?)?")


@dataclass(frozen=True)
class Contents:
    """What lies at a location.

    ours            files that a writer made, or links in their place; the locks among them
    splits          names of splits that files tell
    proven          whether the content of one of them says that an activation cache lies here, or lay
    is_our_folder   of a path below the location, whether a writer makes such a folder
    """

    ours: list[str]
    splits: frozenset[str]
    proven: bool
    is_our_folder: Callable[[str], bool]


def contents(store: Store, splits: Collection[str] = ()) -> Contents:
    """What lies at a location. `splits`: names of splits, beside those that the files themselves tell."""
    listed = [path for path, _ in store.list()]
    proven, names = _evidence(store, listed)
    names.update(splits)

    def matches(pattern: re.Pattern[str], path: str) -> bool:
        found = pattern.fullmatch(path)
        return found is not None and set(found.groupdict().values()) <= {None, *names}

    def is_ours(path: str) -> bool:
        temporary = TEMPORARY.fullmatch(path.rpartition("/")[2])
        return bool(temporary or _COMMON.fullmatch(path)) or matches(_JOURNAL, path) or matches(_OF_SPLIT, path)

    return Contents(list(filter(is_ours, listed)), frozenset(names), proven, lambda path: matches(_FOLDER, path))


def is_lock(path: str) -> bool:
    return _LOCK.fullmatch(path) is not None


def wipe(store: Store, splits: Collection[str] = (), locks: bool = False) -> list[str]:
    """Remove the files that writers made at a location, the locks too if `locks`; returns what is left in place.

    The plan goes last, once a second look finds nothing else of ours: until then it says that what is left is ours, and
    a look at a store may have been disturbed.
    """
    before: list[str] = []
    while True:
        found = contents(store, splits)
        splits = found.splits
        rest = sorted((path for path in found.ours if path != PLAN and not is_lock(path)), key=COMMIT.__ne__)
        if rest == before:  # nothing, or folders that hold something of somebody else's
            break
        _delete(store, rest)
        before = rest
    _delete(store, [PLAN, *(filter(is_lock, found.ours) if locks else ())])
    store.clear(found.is_our_folder)
    return sorted(path for path, _ in store.list() if not is_lock(path))


def _delete(store: Store, paths: Iterable[str]) -> None:
    for path in paths:
        with suppress(Damaged):  # a folder that holds something: it stays, and is told
            store.delete(path)


def _evidence(store: Store, listed: Collection[str]) -> tuple[bool, set[str]]:
    """Whether the content of a file shows that an activation cache lies here, and the splits that files name.

    Works on damaged files too, as far as they still say it.
    """
    journal = {path: match["split"] for path in listed if (match := _JOURNAL.fullmatch(path))}
    names, proven = set(journal.values()), False
    for path in (PLAN, COMMIT, "zarr.json"):
        data = _content(store, path) if path in listed else b""
        if b'"activation-cache"' in data or b'"activation_cache"' in data:
            proven = True
            names |= _splits(data)
    for path in (*list(journal)[:1], *filter(is_lock, listed)):
        data, marks = _content(store, path), (b'"pid"', b'"host"') if is_lock(path) else (b'"seal"', b'"shard"')
        proven = proven or all(mark in data for mark in marks)
    return proven, names - {RECORD}


def _content(store: Store, path: str) -> bytes:
    try:
        return store.read(path)
    except (Damaged, FileNotFoundError):
        return b""


def _splits(data: bytes) -> set[str]:
    """The names of splits in a plan, a commit record or the root's zarr.json."""
    try:
        value = json.loads(data)
        plan = value.get("plan")
        names = [s["name"] for s in plan["splits"]] if plan else value["attributes"]["activation_cache"]["splits"]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):  # damaged
        names = [name.decode() for name in re.findall(rb'"name":"([\w-]+)"', data)]
    return {name for name in names if isinstance(name, str) and re.fullmatch(_NAME, name)}
