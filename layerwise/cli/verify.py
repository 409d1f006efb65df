"""layerwise verify"""

from __future__ import annotations

import sys
from typing import Any

import click

from layerwise.cli.command import Command
from layerwise.cli.common import setup_for
from layerwise.cli.options import RUN, Options, options
from layerwise.cli.outcome import emit


@click.command(cls=Command, name="verify")
@options(*RUN)
def command(options: Options) -> None:
    """Read every byte of a run's caches and frozen modules, and name whatever is damaged. Exits 65 if anything is."""
    with setup_for(options, purpose="verify", writes=False) as setup:
        from layerwise.cache_report import verify_caches
        from layerwise.errors import DamagedData
        from layerwise.frozen import verify_stages
        from layerwise.render.tables import verify_table

        stages, caches = verify_stages(setup), verify_caches(setup)
        found: dict[str, Any] = {"run": str(setup.run.folder), "stages": stages, "caches": caches}
        damaged = [stage["damaged"] for stage in stages if stage["damaged"]]
        damaged += [f"{cache['location']}/{path}" for cache in caches for path in cache["damaged"]]
        if damaged:
            folder = f"--run-dir {setup.run.folder}"
            problem = DamagedData(
                f"{len(damaged)} damaged: {', '.join(damaged[:5])}{' …' if damaged[5:] else ''}. Mend a cache with: "
                f"layerwise cache --module N --repair {folder}; a module with: layerwise stage N --fresh {folder}"
            )
            found |= {"error": "DamagedData", "message": str(problem), "exit_code": problem.exit_code}
        emit(options, found, lambda: verify_table(found))
        if damaged:
            if options.json:  # one document: the error is in it
                sys.exit(problem.exit_code)
            raise problem
