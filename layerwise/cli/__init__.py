"""The command line. Nothing heavy is imported before a command runs, so that `--help` answers at once."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from layerwise.cli import cache, grow, memreport, plan, probe, recipes, reproduce, run, stage, status, verify


class Commands(click.Group):
    """Commands whose wrong use is told to machines as every other error is, where `--json` is among the arguments."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("args", args[0] if args else None)
        as_json = "--json" in (sys.argv[1:] if given is None else given)
        if not as_json or not kwargs.get("standalone_mode", True):
            return super().main(*args, **kwargs)
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.ClickException as error:
            kind = "UsageError" if isinstance(error, click.UsageError) else type(error).__name__
            code = error.exit_code
            click.echo(json.dumps({"error": kind, "message": error.format_message(), "exit_code": code}))
            sys.exit(code)
        except click.Abort:  # a question was not answered
            click.echo(json.dumps({"error": "Abort", "message": "a question was not answered", "exit_code": 1}))
            sys.exit(1)
        sys.exit(status if isinstance(status, int) else 0)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="layerwise")
def main() -> None:
    """Train a deep network one module at a time, from an activation cache on disk.

    \b
    Begin here:
      layerwise run --recipe digits     every stage, its cache, the probes, a report (two minutes on a laptop)
      layerwise recipes                 what else can be trained
    \b
    Step by step:
      layerwise stage 1 --recipe stl10 --data-dir DIR
      layerwise cache --module 1
      layerwise stage 2
      layerwise probe --module 2
    \b
    Before anything runs:
      layerwise plan --recipe stl10     memory, cache bytes and free disk, stage by stage
      layerwise memreport               what each way of training takes, beside the paper's figures
    """


for module in (run, stage, cache, probe, plan, memreport, status, verify, reproduce, recipes, grow):
    main.add_command(module.command)
