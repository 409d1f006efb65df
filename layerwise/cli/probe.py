"""layerwise probe"""

from __future__ import annotations

import click

from layerwise.cli.command import Command, Number
from layerwise.cli.common import setup_for
from layerwise.cli.options import DATA, RUN, Options, options
from layerwise.cli.outcome import emit


@click.command(cls=Command, name="probe")
@click.option(
    "--module",
    "number",
    type=Number(min=1),
    metavar="NUMBER",
    help="The module whose representation to classify. Default: the last.",
)
@click.option("--fixed", is_flag=True, help="Classify hand-crafted features instead (MFCC, for speech).")
@click.option("--fresh", is_flag=True, help="Measure again, even if there is a result already.")
@options(*RUN, "device", *DATA, "track")
def command(number: int | None, fixed: bool, fresh: bool, options: Options) -> None:
    """Train a linear classifier on a module's frozen representation.

    The same is done on the untrained network of the same seed, to compare with.
    """
    with setup_for(options, purpose="probe") as setup:
        from layerwise.errors import UsageError
        from layerwise.pipeline.probe import probe_fixed, probe_module
        from layerwise.render.tables import probe_table

        if fixed:
            results = probe_fixed(setup, fresh=fresh)
            if not results:
                raise UsageError(f"the recipe {setup.recipe.name!r} has no hand-crafted features: leave out --fixed")
            emit(options, {"probes": results}, lambda: probe_table(results))
            return
        result = probe_module(setup, number or len(setup.holders), fresh=fresh)
        emit(options, result, lambda: probe_table([result]))
