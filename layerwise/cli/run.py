"""layerwise run"""

from __future__ import annotations

import click

from layerwise.cli.command import Command
from layerwise.cli.common import setup_for
from layerwise.cli.options import CACHE, DATA, MEMORY, RUN, Options, options
from layerwise.cli.outcome import emit


@click.command(cls=Command, name="run")
@click.option("--fresh", is_flag=True, help="Train everything again.")
@options(*RUN, "schedule", "feed", "device", *DATA, *MEMORY, *CACHE, "track")
def command(fresh: bool, options: Options) -> None:
    """Train every module, write the caches, probe the representations, and write a report.

    What is done already is skipped, and what was interrupted goes on where it stopped.
    """
    with setup_for(options, purpose="run") as setup:
        from layerwise.files.run_files import require_own_report
        from layerwise.pipeline.results import for_report
        from layerwise.pipeline.schedule import run_all
        from layerwise.render.plots import LIGHT, pictures
        from layerwise.render.report import write_report
        from layerwise.render.tables import probe_table

        require_own_report(setup.run.report)  # before hours of training, not after
        run_all(setup, fresh=fresh)
        results = for_report(setup)
        page = write_report(results, setup.run.report)
        if options.track is not None:
            for picture in pictures(results):
                setup.progress.picture(picture.name, picture.png(LIGHT))
        emit(
            options,
            {**results, "report": str(page)},
            lambda: probe_table([*results["probes"], *results["fixed_features"]], page),
        )
