"""layerwise probe"""

from __future__ import annotations

import click

from layerwise.cli.common import Options, emit, options, setup_for


@click.command(name="probe")
@click.option(
    "--module",
    "number",
    type=click.IntRange(min=1),
    help="Whose representation to classify. Default: the last module's.",
)
@click.option("--fresh", is_flag=True, help="Measure again even if this was measured before.")
@options
def command(number: int | None, fresh: bool, options: Options) -> None:
    """Train a linear classifier on a module's frozen representation.

    The same is done on the untrained network of the same seed, to compare with.
    """
    with setup_for(options, purpose="probe") as setup:
        from layerwise.probe import probe_module
        from layerwise.render.tables import probe_table

        result = probe_module(setup, number or len(setup.holders), fresh=fresh)
        emit(options, result, lambda: probe_table([result]))
