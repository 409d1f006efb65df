"""layerwise run"""

from __future__ import annotations

import click

from layerwise.cli.common import Options, cache_options, emit, memory_options, options, setup_for


@click.command(name="run")
@click.option(
    "--schedule",
    type=click.Choice(["iterative", "simultaneous"]),
    help="One module after another, or all in each step.",
)
@click.option("--feed", type=click.Choice(["cache", "recompute"]), help="What the modules above the first read.")
@click.option("--fresh", is_flag=True, help="Train everything again.")
@options
@cache_options
@memory_options
def command(schedule: str | None, feed: str | None, fresh: bool, options: Options) -> None:
    """Train every module, write the caches, probe the representations, and write a report.

    What is done already is skipped, and what was interrupted goes on where it stopped.
    """
    chosen = {"schedule": schedule, "feed": feed}
    options = options.override(**{name: value for name, value in chosen.items() if value is not None})
    with setup_for(options, purpose="run") as setup:
        from layerwise.render.report import write_report
        from layerwise.render.tables import probe_table
        from layerwise.results import collect
        from layerwise.schedule import run_all

        run_all(setup, fresh=fresh)
        results = collect(setup)
        page = write_report(results, setup.run.report)
        emit(
            options,
            {**results, "report": str(page)},
            lambda: probe_table([*results["probes"], *results["fixed_features"]], page),
        )
