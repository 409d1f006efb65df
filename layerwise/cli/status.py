"""layerwise status"""

from __future__ import annotations

import click

from layerwise.cli.command import Command
from layerwise.cli.common import run_folder, setup_for
from layerwise.cli.options import Options, options
from layerwise.cli.outcome import emit


@click.command(cls=Command, name="status")
@options("recipe", "method", "set", "run_dir", recipe="Compare with this recipe. Default: as the run was used last.")
def command(options: Options) -> None:
    """Say what a run holds: trained modules with their losses, caches and whether they are valid, probes, the bytes on
    disk, and what to type next.
    """
    from layerwise.records import EXPECTED, read_record
    from layerwise.render.tables import status_table
    from layerwise.status import status

    as_used = options.recipe is None and options.method is None and not options.set
    folder = run_folder(options) if as_used else None
    expected = None if folder is None else read_record(folder / "expected.json", EXPECTED)
    if folder is None or expected is None:  # another recipe, or a run of which no module was begun
        with setup_for(options, purpose="status", writes=False) as setup:
            from layerwise.expected import expected as asked_for

            folder, expected = setup.run.folder, asked_for(setup)
    found = status(folder, expected)
    emit(options, found, lambda: status_table(found))
