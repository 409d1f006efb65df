"""layerwise cache"""

from __future__ import annotations

import click

from layerwise.cli.common import Options, emit, options, setup_for


@click.command(name="cache")
@click.option("--module", "number", type=click.IntRange(min=1), required=True, help="Whose outputs to store.")
@options
def command(number: int, options: Options) -> None:
    """Write a frozen module's outputs to its Zarr store, for the next stage to train from.

    Goes on where an interrupted writing stopped.
    """
    with setup_for(options, purpose=f"cache {number}") as setup:
        from layerwise.caching import cached, describe_cache, write_cache
        from layerwise.render.tables import cache_table

        if cached(setup, number):
            setup.progress.note(f"module {number}'s cache is whole and valid already")
        else:
            write_cache(setup, number)
        facts = describe_cache(setup, number)
        emit(options, facts, lambda: cache_table(facts))
