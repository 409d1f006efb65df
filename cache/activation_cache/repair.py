"""Mending a damaged cache: what is whole stays, and a writer is told to make the rest again."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np

from .errors import CacheError, Damaged, NotCommitted
from .layout import COMMIT, Plan, SplitSpec, grid, journal_path
from .record import Entry, read_commit, read_entry, read_plan, shard_file, write_plan
from .shard import BadShard, chunk_is_good, decode_chunk, read_index
from .store import Store, open_store
from .writer import CacheWriter


def repair(location: str | Path | Store, *, reserve: int = 0, threads: int = 1) -> CacheWriter:
    """A writer for what is damaged in the cache at `location`, which is unfinished from here on.

    Reads every shard, forgets those that are damaged, and returns a writer whose `pending` says which samples must be
    appended again; `commit` writes all small files anew. Works on a damaged finished cache and on an unfinished one.
    Raises NotCommitted where there is nothing, Damaged where plan and commit record are both lost (then nothing says
    what the shards hold), Locked while another process writes it.
    """
    store = open_store(location)
    if next(store.list(), None) is None:
        raise NotCommitted(f"{store.location} holds no activation cache; write it")
    release = store.lock(0, 1)
    try:
        plan = _surviving_plan(store)
        store.delete(COMMIT)
        write_plan(store, plan)
        for spec in plan.splits:
            for view in range(spec.views):
                for shard in range(grid(spec, plan.storage).shards):
                    if not _is_whole(store, plan, spec, view, shard):
                        store.delete(journal_path(spec.name, view, shard))
        return CacheWriter(store, plan, release, 0, 1, reserve, threads)
    except BaseException:
        release()
        raise


def _surviving_plan(store: Store) -> Plan:
    plan: Plan | None = None
    with suppress(Damaged):
        plan = read_plan(store)
    if plan is None:
        try:
            plan = read_commit(store).plan
        except CacheError as error:
            raise Damaged(
                f"{store.location} cannot be repaired: its plan and its commit record are both lost; write it again"
            ) from error
    return plan


def _is_whole(store: Store, plan: Plan, spec: SplitSpec, view: int, shard: int) -> bool:
    """Whether a shard and its journal entry are what was written, down to the last byte."""
    g, path = grid(spec, plan.storage), shard_file(plan, spec, view, shard)
    try:
        entry: Entry | None = read_entry(store, plan, spec.name, view, shard)
        if entry is None or store.size(path) != entry.size:
            return False
        image = np.frombuffer(store.read(path), np.uint8)
        rows = len(entry.ids) if g.ragged_axis is None else sum(entry.lengths)
        index = read_index(image, -(-rows // g.chunk_rows), g.chunks_per_shard, entry.seal)
        size = int(np.prod(g.row_shape, dtype=np.int64)) * plan.storage.stored.itemsize
        out = np.empty(g.chunk_rows * size, np.uint8)
        for chunk in range(len(index.offsets)):
            if not chunk_is_good(image, index, chunk):
                return False
            decode_chunk(image, index, chunk, plan.storage, out)
    except (Damaged, BadShard):
        return False
    return True
