"""A cache that many jobs fill, each by itself: tasks fixed by number, and one commit when all are done.

A task is a share of the shards that follows from its number alone. Jobs may run any of them, in any order, on any
machine that sees the run and the place of the cache; they hold no lock on the run and exchange nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import activation_cache
from layerwise.errors import NotReady, UsageError
from layerwise.pipeline.caching import fill_share, settle_place
from layerwise.pipeline.module_cache import cache_command, cache_errors, cache_key, cached, stored_splits
from layerwise.pipeline.setup import Setup, holds
from layerwise.seeding import same_bits_in_every_run

_LOCK = re.compile(r"lock-\d+-of-([1-9]\d{0,8})")


def write_task(setup: Setup, number: int, task: int, tasks: int) -> dict[str, Any]:
    """Write share `task` (from 1) of `tasks` of module `number`'s cache, or what is missing of it.

    Returns how many `samples` were written: none where the task was done.

    Raises:
        NotReady: the module is not frozen, or something else lies at the place of the cache.
        UsageError: there is no such task, or the cache would be a window that rolls.
        StoppedEarly: interrupted; whole shards are kept.
    """
    if not 1 <= task <= tasks:
        raise UsageError(f"--task {task}/{tasks}: tasks are counted from 1 to {tasks}")
    if setup.recipe.cache.renew:
        raise UsageError("cache.renew makes a rolling window, which tasks cannot fill: set cache.renew=false")
    samples = 0
    if not cached(setup, number):
        settle_place(setup, number)
        with same_bits_in_every_run():
            samples = fill_share(setup, number, stored_splits(setup), task - 1, tasks)
    return {"module": number, "task": task, "tasks": tasks, "samples": samples}


@holds("cache --commit")
def commit_tasks(setup: Setup, number: int, tasks: int | None) -> None:
    """Commit module `number`'s cache, which tasks have filled.

    Args:
        tasks: how many there are, to name those that are missing; None: as many as their lock files say.

    Raises:
        NotReady: a part of it is missing, with the tasks that write it.
    """
    if cached(setup, number):
        return
    location, key = setup.run.cache(number), cache_key(setup, number)
    again = f"{cache_command(setup, number)} --task"
    with cache_errors(setup, number):
        found = activation_cache.inspect(location, key)
        if found.state != "partial":
            raise NotReady(
                f"the cache of module {number} cannot be committed: it is {found.state}. Write it by tasks, each "
                f"with: {again} TASK/TASKS"
            )
        with activation_cache.resume(location, key, budget=setup.recipe.cache.budget) as writer:
            left = sum(len(part) for track in writer.tracks() for part in writer.pending(*track))
            if left:
                total = tasks or _tasks_at(location)
                missing = [] if total is None else [str(rank + 1) for rank in writer.unfinished(total)]
                which = f"of {total} tasks {', '.join(missing)} are missing" if missing else "tasks are missing"
                raise NotReady(
                    f"the cache of module {number} lacks {left:,} samples: {which}. Write each with: {again} "
                    f"{missing[0] if missing else 'TASK'}/{total or 'TASKS'}"
                )
            writer.commit()


def _tasks_at(location: Path | str) -> int | None:
    """As many as the tasks' lock files say, where they all say the same."""
    if not isinstance(location, Path):
        return None
    found = {int(match[1]) for path in location.glob("record/lock-*") if (match := _LOCK.fullmatch(path.name))}
    return found.pop() if len(found) == 1 else None
