"""layerwise status"""

from __future__ import annotations

import click

from layerwise.cli.command import Command
from layerwise.cli.common import setup_for
from layerwise.cli.options import RUN, Options, options
from layerwise.cli.outcome import emit


@click.command(cls=Command, name="status")
@options(*RUN)
def command(options: Options) -> None:
    """Say what a run holds: trained modules, caches and whether they are valid, probes."""
    with setup_for(options, purpose="status", writes=False) as setup:
        from layerwise.render.tables import status_table
        from layerwise.results import status

        found = status(setup)
        emit(options, found, lambda: status_table(found))
