"""layerwise watch"""

from __future__ import annotations

import sys
import time

import click

from layerwise.cli.command import Command
from layerwise.cli.common import run_folder
from layerwise.cli.options import Options, options
from layerwise.cli.outcome import emit


@click.command(cls=Command, name="watch")
@click.option("--once", is_flag=True, help="Show the current state once, and exit.")
@click.option(
    "--every",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    default=2.0,
    show_default=True,
    help="Seconds between updates.",
)
@options("recipe", "run_dir", recipe="Watch the run of this recipe. Default: the run used last.")
def command(once: bool, every: float, options: Options) -> None:
    """Show curves and progress of a run in the terminal while another process trains it. Ctrl-C ends it.

    Only the run's own files are read. A single look is shown with --once, with --json, or where there is no terminal.
    """
    from rich.live import Live

    from layerwise.pipeline.watching import snapshot
    from layerwise.render.tables import console
    from layerwise.render.watch import watch_view

    folder = run_folder(options)
    found = snapshot(folder)
    shown = console()
    if once or options.json or not sys.stdout.isatty():
        emit(options, found, lambda: shown.print(watch_view(found)))
        return
    try:
        with Live(watch_view(found), console=shown, auto_refresh=False, vertical_overflow="visible") as live:
            while True:
                time.sleep(every)
                live.update(watch_view(snapshot(folder)), refresh=True)
    except KeyboardInterrupt:
        return
