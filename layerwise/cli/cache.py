"""layerwise cache"""

from __future__ import annotations

import os

import click

from layerwise.cli.command import Command, Number
from layerwise.cli.common import setup_for
from layerwise.cli.options import CACHE, DATA, RUN, Options, options
from layerwise.cli.outcome import emit, say


@click.command(cls=Command, name="cache")
@click.option("--module", "number", type=Number(min=1), metavar="NUMBER", help="The module whose outputs to store.")
@click.option("--repair", is_flag=True, help="Read the whole cache, and write again only what is damaged.")
@click.option(
    "--task",
    is_flag=False,
    flag_value="array",
    metavar="TASK/TASKS",
    help="Write one part of the cache, as in 3/64, while other jobs write the others; --commit finishes it. "
    "Default: SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT.",
)
@click.option("--commit", is_flag=True, help="Commit the cache if all tasks are done; otherwise list the missing ones.")
@click.option("--prune", is_flag=True, help="Remove the run's stale caches, after asking.")
@click.option("--yes", is_flag=True, help="With --prune: do not ask.")
@options(*RUN, "device", *DATA, *CACHE)
def command(
    number: int | None, repair: bool, task: str | None, commit: bool, prune: bool, yes: bool, options: Options
) -> None:
    """Write a frozen module's outputs to its Zarr store, for the next stage to train from.

    Continues where an interrupted one stopped.
    """
    if (number is None) != prune or sum((repair, prune, task is not None, commit)) > 1:
        raise click.UsageError(
            "give --module N, alone or with --repair, --task or --commit; or give --prune, for all modules"
        )
    if task is not None and number is not None:
        _task(number, *_share(task), options)
        return
    with setup_for(options, purpose="cache --prune" if prune else f"cache {number}") as setup:
        import activation_cache
        from layerwise.pipeline.cache_report import describe_cache, stale_caches, stale_windows
        from layerwise.pipeline.caching import repair_cache, write_cache
        from layerwise.pipeline.module_cache import cache_errors
        from layerwise.pipeline.room import unsettled
        from layerwise.pipeline.tasks import commit_tasks
        from layerwise.render.tables import cache_table, prune_table, repair_table
        from layerwise.settings.units import counted

        if prune:
            stale, windows = stale_caches(setup), stale_windows(setup)
            for reason in (*stale.values(), *windows.values()):
                say(reason)
            count = len(stale) + len(windows)
            agreed = count > 0 and (yes or click.confirm(f"remove {counted(count, 'stale cache')}?", err=True))
            left: list[str] = []  # files that no cache wrote
            for module in stale if agreed else ():
                with cache_errors(setup, module):
                    found = activation_cache.remove(setup.run.cache(module))
                    left += [f"{setup.run.cache(module)}/{path}" for path in found]
            for module in windows if agreed else ():
                with cache_errors(setup, module):
                    found = activation_cache.remove_window(setup.run.window(module))
                    left += [f"{setup.run.window(module)}/{path}" for path in found]
            for path in left:
                say(f"left in place, because layerwise did not write it: {path}")
            outcome = {
                "stale": stale,
                "removed": list(stale) if agreed else [],
                "stale_windows": windows,
                "removed_windows": list(windows) if agreed else [],
                "left": left,
            }
            emit(options, outcome, lambda: prune_table(outcome))
            return
        assert number is not None
        setup.require_module(number)
        if repair:
            repaired = repair_cache(setup, number)
            emit(options, repaired, lambda: repair_table(repaired))
            return
        if commit:
            commit_tasks(setup, number, _array_tasks())
        elif unsettled(setup, number):
            write_cache(setup, number)
        else:
            setup.progress.note(f"module {number}'s cache is already complete and valid")
        facts = describe_cache(setup, number)
        emit(options, facts, lambda: cache_table(facts, last=number == setup.depth))


def _task(number: int, task: int, tasks: int, options: Options) -> None:
    """One task, which neither holds the run nor writes into it."""
    with setup_for(options, purpose=f"cache {number}", writes=False) as setup:
        from layerwise.pipeline.tasks import write_task

        setup.require_module(number)
        outcome = write_task(setup, number, task, tasks)
        written = f"{outcome['samples']:,} samples written" if outcome["samples"] else "already done"
        emit(options, outcome, lambda: say(f"task {task} of {tasks}: {written}"))


def _share(task: str) -> tuple[int, int]:
    """The number of a task, from 1, and how many there are."""
    if task == "array":
        named = {name: os.environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("ID", "COUNT", "MIN")}
        if not all(value.isdecimal() for value in named.values()):
            raise click.UsageError("--task: this is not a Slurm array job, so name the task, as in --task 3/64")
        return int(named["ID"]) - int(named["MIN"]) + 1, int(named["COUNT"])
    number, _, count = task.partition("/")
    if not (number.isdecimal() and count.isdecimal() and len(task) < 20):
        raise click.UsageError(f"--task {task}: give the number of the task and the number of tasks, as in --task 3/64")
    return int(number), int(count)


def _array_tasks() -> int | None:
    count = os.environ.get("SLURM_ARRAY_TASK_COUNT", "")
    return int(count) if count.isdecimal() else None
