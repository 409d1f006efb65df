"""layerwise verify"""

from __future__ import annotations

import sys

import click

from layerwise.cli.command import Command
from layerwise.cli.common import run_folder
from layerwise.cli.options import Options, options
from layerwise.cli.outcome import emit


@click.command(cls=Command, name="verify")
@options("recipe", "run_dir", recipe="Verify the run of this recipe. Default: the run used last.")
def command(options: Options) -> None:
    """Read every byte of a run and name whatever is damaged or missing. Exits 65 if anything is.

    Records, weights, metrics, checkpoints, probes, caches and the report are compared with what was written; neither
    the recipe nor the dataset is needed.
    """
    from layerwise.errors import DamagedData
    from layerwise.pipeline.verification import verify_run
    from layerwise.render.tables import verify_table

    found = verify_run(run_folder(options), lambda text: click.echo(text, err=True))
    result = found.as_json()
    if found.damaged:
        paths = list(found.damaged)
        mends = "; ".join(found.mends)
        problem = DamagedData(
            f"{len(paths)} damaged: {', '.join(paths[:5])}{' …' if paths[5:] else ''}. Repair them with: {mends}"
        )
        result |= {"error": "DamagedData", "message": str(problem), "exit_code": problem.exit_code}
    emit(options, result, lambda: verify_table(result))
    if found.damaged:
        if options.json:  # one document: the error is in it
            sys.exit(problem.exit_code)
        raise problem
