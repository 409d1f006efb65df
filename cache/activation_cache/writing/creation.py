"""Beginning to write a cache, or going on with one; and removing it.

What lies at the place decides: nothing, an unfinished cache of the same plan, one of another, or a finished one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from activation_cache.errors import AlreadyCommitted, Damaged, FormatError, NotCommitted, Stale
from activation_cache.format.canonical import Json
from activation_cache.format.key import Key, check_key, describe, differences
from activation_cache.format.layout import COMMIT, FORMAT, Plan, SplitSpec, Storage, check_plan, settled
from activation_cache.format.quantise import Calibration
from activation_cache.format.record import create_plan, read_commit, read_plan
from activation_cache.store.base import Store, open_store, sweep

from .contents import contents, wipe
from .room import Room
from .writer import CacheWriter


def create(
    location: str | Path | Store,
    key: Key,
    splits: Sequence[SplitSpec],
    storage: Storage,
    *,
    calibration: Calibration | Callable[[], Calibration] | None = None,
    replace: bool = False,
    rank: int = 0,
    world_size: int = 1,
    reserve: int = 0,
    budget: int | None = None,
    threads: int = 1,
) -> CacheWriter:
    """A writer for the cache at `location`: a new one, or one that goes on with an unfinished cache of the same key.

    An unfinished cache is continued as it was planned: its codec, shard sizes and calibration stay (a callable
    `calibration` is not called then). `replace` removes the cache that lies there first, and nothing else: the
    writer's `left` names the files that no cache wrote, which stay. With `world_size` ranks,
    each writes its own shards: rank 0 calls first, and after a barrier the others; only rank 0 may replace, and only
    rank 0 commits, after all have closed their writers.

    reserve   bytes of the disk to leave free
    budget    bytes that all files of the cache together may take, those of an unfinished one included. It is enforced
              while writing: `append` or `commit` raises DoesNotFit before a shard or any other file would exceed it;
              what was written is kept, and a later writer with a larger budget goes on. None: no budget.
    threads   how many convert, encode and write in the background. With 0, `append` converts, encodes and hands the
              bytes to the system, and only the wait for the disk is in the background: for a caller whose own
              computation keeps all processors busy, since a thread that takes one of them holds up the others too.

    Raises AlreadyCommitted over a finished cache, Stale over an unfinished one of another key or other splits, Locked
    while another process writes it, FormatError for a key that make_key did not make, two splits of one name, uint8
    without calibration, or a folder that is no cache and holds files in the places of a cache's own.
    """
    if key.get("format") != FORMAT or key.get("dtype") != storage.dtype:
        raise FormatError("the key has no `format` and `dtype` that fit this storage; make it with make_key")
    if len({spec.name for spec in splits}) < len(splits):
        raise FormatError(f"two splits have one name: {', '.join(spec.name for spec in splits)}")
    if not 0 <= rank < world_size:
        raise FormatError(f"rank {rank} is not one of {world_size} ranks, counted from 0")
    if threads < 0:
        raise FormatError(f"{threads} threads cannot write; 0 writes in `append`")
    store = open_store(location)
    left: list[str] = []
    found = contents(store, [spec.name for spec in splits]) if rank == 0 else None  # before there is a lock of ours
    if found and found.ours and not found.proven:
        raise FormatError(
            f"{store.location} is not an activation cache, and holds files that writing one would replace: "
            f"{', '.join(found.ours[:5])}{', …' if found.ours[5:] else ''}; choose another place"
        )
    release = store.lock(rank, world_size)
    try:
        if replace and found:
            left = wipe(store, [spec.name for spec in splits]) if found.proven else []
        elif store.size(COMMIT) is not None:
            with suppress(Damaged):
                read_commit(store)  # of another format, it cannot be opened
            raise AlreadyCommitted(f"{store.location} holds a finished cache; open it, or replace it explicitly")
        splits = tuple(settled(spec, storage) for spec in splits)
        plan = read_plan(store)
        if plan is None:
            scales = calibration() if callable(calibration) else calibration
            plan = Plan(key, storage, splits, scales)
            check_plan(plan)
            if not create_plan(store, plan):  # another writer was faster, on a store that knows no locks
                plan = read_plan(store)
        elif world_size == 1:
            sweep(store)
        assert plan is not None
        _check_same(plan, key, splits, store.location)
        room = Room(store, reserve, budget, world_size)
        return CacheWriter(store, plan, release, rank, world_size, room, threads, left)
    except BaseException:
        release()
        raise


def resume(
    location: str | Path | Store, key: Mapping[str, Json] | None = None, *, reserve: int = 0, budget: int | None = None
) -> CacheWriter:
    """A writer for the unfinished cache at `location`, as it was planned; of all that is missing, whichever rank it was
    meant for. `reserve` and `budget`: see `create`.

    Raises NotCommitted where there is none, AlreadyCommitted where it is finished, Stale where it is made from
    something else than `key`, Locked while another process writes it.
    """
    store = open_store(location)
    if next(store.list(), None) is None:
        raise NotCommitted(f"{store.location} holds no activation cache; write it")
    release = store.lock(0, 1)
    try:
        if store.size(COMMIT) is not None:
            raise AlreadyCommitted(f"{store.location} holds a finished cache")
        plan = read_plan(store)
        if plan is None:
            raise NotCommitted(f"{store.location} holds no activation cache; write it")
        check_key(plan.key, key, store.location)
        return CacheWriter(store, plan, release, 0, 1, Room(store, reserve, budget, 1), 0)
    except BaseException:
        release()
        raise


def remove(location: str | Path | Store) -> list[str]:
    """Removes the cache that lies at a location: the files that its writers made, and the folders this leaves empty.

    Returns the files that are left in place since no cache wrote them, relative to the location. Raises Locked while
    the cache is being written, FormatError where nothing says that there is, or was, a cache: then nothing is removed.
    """
    store = open_store(location)
    if next(store.list(), None) is None:
        return []
    if not contents(store).proven:
        raise FormatError(
            f"{store.location} holds files and is not an activation cache, so nothing was removed; delete it yourself "
            "if nobody needs it"
        )
    release = store.lock(0, 1)
    try:
        return wipe(store, locks=True)
    finally:
        release()


def _check_same(plan: Plan, key: Mapping[str, Json], splits: Sequence[SplitSpec], location: str) -> None:
    different = differences(plan.key, key)

    def facts(spec: SplitSpec) -> Json:
        return [spec.samples, list(spec.shape), dict(spec.labels), spec.views, spec.longest]

    old, new = {s.name: facts(s) for s in plan.splits}, {s.name: facts(s) for s in splits}
    different.update({f"split {name}": pair for name, pair in differences(old, new).items()})
    if different:
        raise Stale(
            f"{location} holds an unfinished cache of something else: {describe(different)}; "
            "replace it explicitly, or choose another place",
            different,
        )
