"""layerwise stage"""

from __future__ import annotations

import click

from layerwise.cli.command import Command, Number
from layerwise.cli.common import setup_for
from layerwise.cli.options import CACHE, DATA, MEMORY, RUN, Options, options
from layerwise.cli.outcome import emit


@click.command(cls=Command, name="stage")
@click.argument("number", type=Number(min=1))
@click.option("--fresh", is_flag=True, help="Train it again from the beginning.")
@options(*RUN, "device", *DATA, *MEMORY, *CACHE, "track")
def command(number: int, fresh: bool, options: Options) -> None:
    """Train module NUMBER to convergence and freeze it.

    Goes on where an interrupted training stopped. Modules above the first read the cache of the module below.
    """
    with setup_for(options, purpose=f"stage {number}") as setup:
        from layerwise.pipeline.schedule import run_stage
        from layerwise.render.tables import stage_table

        record = run_stage(setup, number, fresh=fresh)
        emit(
            options,
            {"module": number, "run": str(setup.run.folder), **record},
            lambda: stage_table(setup.run, number, record, last=number == setup.depth),
        )
