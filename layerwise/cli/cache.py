"""layerwise cache"""

from __future__ import annotations

import click

from layerwise.cli.command import Command, Number
from layerwise.cli.common import setup_for
from layerwise.cli.options import CACHE, DATA, RUN, Options, options
from layerwise.cli.outcome import emit, say


@click.command(cls=Command, name="cache")
@click.option("--module", "number", type=Number(min=1), metavar="NUMBER", help="Whose outputs to store.")
@click.option("--repair", is_flag=True, help="Read all of the cache, and write only what is damaged again.")
@click.option("--prune", is_flag=True, help="Remove the run's stale caches, after asking.")
@click.option("--yes", is_flag=True, help="With --prune: do not ask.")
@options(*RUN, "device", *DATA, *CACHE)
def command(number: int | None, repair: bool, prune: bool, yes: bool, options: Options) -> None:
    """Write a frozen module's outputs to its Zarr store, for the next stage to train from.

    Goes on where an interrupted writing stopped.
    """
    if (number is None) != prune or (repair and prune):
        raise click.UsageError("give --module N, alone or with --repair; or --prune, which looks at all modules")
    with setup_for(options, purpose="cache --prune" if prune else f"cache {number}") as setup:
        import activation_cache
        from layerwise.pipeline.cache_report import describe_cache, stale_caches, stale_windows
        from layerwise.pipeline.caching import repair_cache, write_cache
        from layerwise.pipeline.module_cache import cache_errors
        from layerwise.pipeline.room import unsettled
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
                say(f"left in place, since no cache wrote it: {path}")
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
        if unsettled(setup, number):
            write_cache(setup, number)
        else:
            setup.progress.note(f"module {number}'s cache is whole and valid already")
        facts = describe_cache(setup, number)
        emit(options, facts, lambda: cache_table(facts, last=number == setup.depth))
