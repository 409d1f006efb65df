"""Mending a damaged cache: what is whole stays, and a writer is told to make the rest again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from activation_cache.errors import Damaged, NotCommitted
from activation_cache.format.canonical import Json
from activation_cache.format.key import check_key
from activation_cache.format.layout import COMMIT, Plan, SplitSpec, grid, journal_path
from activation_cache.format.record import Entry, journalled, read_entry, shard_file, surviving_plan, write_plan
from activation_cache.format.shard import BadShard, check_chunks, chunk_is_good, decode_chunk, read_index
from activation_cache.store.base import Store, open_store

from .room import Room
from .writer import CacheWriter


def repair(
    location: str | Path | Store,
    key: Mapping[str, Json] | None = None,
    *,
    reserve: int = 0,
    budget: int | None = None,
    threads: int = 1,
) -> CacheWriter:
    """A writer for what is damaged in the cache at `location`, which is unfinished from here on.

    Reads every shard, forgets those that are damaged, and returns a writer whose `pending` says which samples must be
    appended again; `commit` writes all small files anew. Works on a damaged finished cache and on an unfinished one.
    Raises NotCommitted where there is nothing, Damaged where plan and commit record are both lost (then nothing says
    what the shards hold), Stale where they were made from something else than `key`, Locked while another process
    writes it; in each case nothing has been changed. `reserve`, `budget`, `threads`: see `create`.
    """
    store = open_store(location)
    if next(store.list(), None) is None:
        raise NotCommitted(f"{store.location} holds no activation cache; write it")
    release = store.lock(0, 1)
    try:
        plan = surviving_plan(store)
        check_key(plan.key, key, store.location)
        write_plan(store, plan)  # before the commit record goes: one of the two says what the shards hold
        store.delete(COMMIT)
        for (split, view), shards in journalled(store, plan).items():
            for shard in shards:
                if not _is_whole(store, plan, plan.split(split), view, shard):
                    store.delete(journal_path(split, view, shard))
        return CacheWriter(store, plan, release, 0, 1, Room(store, reserve, budget, 1), threads)
    except BaseException:
        release()
        raise


def _is_whole(store: Store, plan: Plan, spec: SplitSpec, view: int, shard: int) -> bool:
    """Whether a shard and its journal entry are what was written, down to the last byte."""
    g, path = grid(spec, plan.storage), shard_file(plan, spec, view, shard)
    try:
        entry: Entry | None = read_entry(store, plan, spec.name, view, shard)
        if entry is None or store.size(path) != entry.size:
            return False
        image = np.frombuffer(store.read(path), np.uint8)
        rows = len(entry.ids) if g.ragged_axis is None else sum(entry.lengths)
        chunk_bytes = g.chunk_rows * math.prod(g.row_shape) * plan.storage.stored.itemsize
        index = read_index(image, -(-rows // g.chunk_rows), g.chunks_per_shard, entry.seal)
        check_chunks(index, plan.storage, chunk_bytes)
        out = np.empty(chunk_bytes if len(index.offsets) else 0, np.uint8)
        for chunk in range(len(index.offsets)):
            if not chunk_is_good(image, index, chunk):
                return False
            decode_chunk(image, index, chunk, plan.storage, out)
    except (Damaged, BadShard):
        return False
    return True
