"""layerwise plan"""

from __future__ import annotations

import sys

import click

from layerwise.cli.command import Command
from layerwise.cli.common import setup_for
from layerwise.cli.options import CACHE, MEMORY, RUN, Options, options
from layerwise.cli.outcome import emit


@click.command(cls=Command, name="plan")
@options(*RUN, "schedule", "feed", "device", "data_dir", "data", *MEMORY, *CACHE)
def command(options: Options) -> None:
    """Predict the memory and cache of each stage, and whether they fit, before anything runs.

    The exit code is 3 if they do not fit. Nothing is trained, and no GPU is needed.
    """
    with setup_for(options, purpose="plan", writes=False) as setup:
        from layerwise.pipeline.plan import make_plan
        from layerwise.render.plan import plan_json, plan_table

        plan = make_plan(setup)
        emit(options, plan_json(plan), lambda: plan_table(plan, setup.recipe))
        if not plan.fits:
            sys.exit(3)
