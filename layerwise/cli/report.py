"""layerwise report"""

from __future__ import annotations

import click

from layerwise.cli.command import Command
from layerwise.cli.common import setup_for
from layerwise.cli.options import RUN, Options, options
from layerwise.cli.outcome import emit


@click.command(cls=Command, name="report")
@options(*RUN)
def command(options: Options) -> None:
    """Write a page on a run: curves, probes, memory, caches and settings, as far as it has come."""
    with setup_for(options, purpose="report") as setup:
        from layerwise.pipeline.results import for_report
        from layerwise.render.report import write_report

        results = for_report(setup)
        page = write_report(results, setup.run.report)
        emit(options, {**results, "report": str(page)}, lambda: click.echo(f"report: {page}"))
