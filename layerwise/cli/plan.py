"""layerwise plan"""

from __future__ import annotations

import sys

import click

from layerwise.cli.common import Options, cache_options, emit, memory_options, options, schedule_options, setup_for


@click.command(name="plan")
@options
@schedule_options
@cache_options
@memory_options
def command(options: Options) -> None:
    """Say what a run will take before anything runs: memory and cache of each stage, and whether they fit.

    Ends with 3 where they do not. Nothing is trained, and no GPU is needed.
    """
    with setup_for(options, purpose="plan", writes=False) as setup:
        from layerwise.plan import make_plan
        from layerwise.render.plan import plan_json, plan_table

        plan = make_plan(setup)
        emit(options, plan_json(plan), lambda: plan_table(plan, setup.recipe))
        if not plan.fits:
            sys.exit(3)
