"""layerwise status"""

from __future__ import annotations

from pathlib import Path

import click

from layerwise.cli.command import Command
from layerwise.cli.common import run_folder, setup_for
from layerwise.cli.options import Options, options
from layerwise.cli.outcome import emit, say


@click.command(cls=Command, name="status")
@options("recipe", "method", "set", "run_dir", recipe="Compare with this recipe. Default: the recipe used last.")
def command(options: Options) -> None:
    """Say what a run holds: trained modules with their losses, caches and whether they are valid, probes, the bytes on
    disk, and what to type next.
    """
    from layerwise.pipeline.status import read_expected, status
    from layerwise.render.tables import status_table

    as_used = options.recipe is None and options.method is None and not options.set
    folder = run_folder(options) if as_used else None
    expected = None if folder is None else read_expected(folder)
    edited = None if folder is None or expected is None else _edited(folder)
    if folder is None or expected is None:  # another recipe, or one of which nothing was noted
        with setup_for(options, purpose="status", writes=False) as setup:
            from layerwise.pipeline.expected import expected as asked_for

            folder, expected = setup.run.folder, asked_for(setup)
    found = {**status(folder, expected), "edited": edited}
    emit(options, found, lambda: status_table(found))


def _edited(folder: Path) -> str | None:
    """What to say where the recipe file of a run was edited since the user named it; it is not run to find out more."""
    from layerwise.pipeline import trust
    from layerwise.pipeline.run import run_source

    source, overrides = run_source(folder)
    changed = trust.changes(Path(source), say) if source.endswith(".py") else None
    if not changed:
        return None
    return (
        f"the recipe file of {folder} was edited since you named it ({', '.join(changed)}). This is how the run stands "
        f"to the recipe as it was; see how it stands now with: {trust.name_again(source, overrides, folder)}"
    )
