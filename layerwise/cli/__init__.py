"""The command line. Nothing heavy is imported before a command runs, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys

import click

from layerwise.cli import (
    cache,
    embed,
    export,
    grow,
    memreport,
    plan,
    probe,
    recipes,
    report,
    reproduce,
    run,
    stage,
    status,
    verify,
    watch,
)
from layerwise.cli.command import Commands

SHARED = ("run", "stage", "cache", "probe", "grow")
"""Commands that several processes work on together, each of which comes to its end by itself."""


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="layerwise")
@click.pass_context
def main(context: click.Context) -> None:
    """Train a deep network one module at a time, from an activation cache on disk.

    \b
    Begin here:
      layerwise run --recipe digits     two minutes on a laptop
      layerwise recipes                 what else can be trained
      layerwise recipes digits          every field of a recipe that --set takes
    \b
    Step by step:
      layerwise stage 1 --recipe stl10 --data-dir DIR
      layerwise cache --module 1
      layerwise stage 2
      layerwise probe --module 2
      layerwise export --module 2 --to encoder.pt2
    \b
    Before anything runs:
      layerwise plan --recipe stl10     memory and disk, stage by stage
      layerwise memreport               memory of each method
    """
    if context.invoked_subcommand not in SHARED and os.environ.get("RANK", "0") != "0":
        sys.exit()  # of several processes that torchrun started, the first is enough


for module in (
    run,
    stage,
    cache,
    probe,
    export,
    embed,
    plan,
    memreport,
    status,
    watch,
    verify,
    report,
    reproduce,
    recipes,
    grow,
):
    main.add_command(module.command)
