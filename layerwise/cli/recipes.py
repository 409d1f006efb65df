"""layerwise recipes"""

from __future__ import annotations

import json

import click

from layerwise.cli.command import Command, Option


@click.command(cls=Command, name="recipes")
@click.option("--json", "as_json", cls=Option, heading="Output", is_flag=True, help="Machine output on stdout.")
def command(as_json: bool) -> None:
    """List the recipes that can be trained, and how to write one."""
    from layerwise.recipe_loader import built_in, summary

    found = {name: summary(path) for name, path in built_in().items()}
    if as_json:
        click.echo(json.dumps({"recipes": found}))
        return
    width = max(map(len, found))
    for name, text in found.items():
        click.echo(f"{click.style(name.ljust(width), bold=True)}  {text}")
    click.echo(
        "\nlayerwise run --recipe NAME. A recipe of your own is a Python file that defines `recipe`: "
        "--recipe path/to/mine.py"
    )
