"""layerwise recipes"""

from __future__ import annotations

import dataclasses

import click

from layerwise.cli.command import Command
from layerwise.cli.options import Options, options
from layerwise.cli.outcome import emit


@click.command(cls=Command, name="recipes")
@click.argument("source", metavar="[NAME|FILE.py]", required=False)
@options()
def command(source: str | None, options: Options) -> None:
    """List the recipes that can be trained, or every field of one that --set takes."""
    from layerwise.recipe.loader import built_in, summary

    if source is None:
        found = {name: summary(path) for name, path in built_in().items()}
        emit(options, {"recipes": found}, lambda: _list(found))
        return
    from layerwise.recipe.fields import groups
    from layerwise.recipe.loader import find_recipe, read_recipe
    from layerwise.render.tables import recipe_table

    recipe, path = read_recipe(source), find_recipe(source)
    described = {
        "recipe": recipe.name,
        "summary": summary(path),
        "file": str(path),
        "groups": [dataclasses.asdict(group) for group in groups(recipe)],
    }
    emit(options, described, lambda: recipe_table(described))


def _list(recipes: dict[str, str]) -> None:
    width = max(map(len, recipes))
    for name, text in recipes.items():
        click.echo(f"{click.style(name.ljust(width), bold=True)}  {text}")
    click.echo(
        "\nTrain one:           layerwise run --recipe NAME"
        "\nList its fields:     layerwise recipes NAME"
        "\nYour own recipe is a Python file that defines `recipe`: layerwise run --recipe path/to/mine.py"
    )
