"""What the README prints can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from layerwise.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("layerwise ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    command = main.commands[name]
    command.make_context(name, arguments, parent=click.Context(main))


def test_the_python_example_is_a_recipe(tmp_path: Path) -> None:
    from layerwise.recipe_loader import load_recipe

    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    path = tmp_path / "mine.py"
    path.write_text(example)
    recipe = load_recipe(str(path))
    assert len(recipe.network.modules((1, 64, 64))) == 4


def test_every_file_that_is_named_is_there() -> None:
    linked = re.findall(r"\]\(([^)#]+)\)", README)
    named = re.findall(r"^(?:  )?([a-z_]+(?:/[a-z_]+)*(?:\.py|/))", README, re.M)
    assert linked
    assert all((ROOT / path).exists() for path in linked)
    assert named
    assert all(any((ROOT / top / path).exists() for top in ("", "layerwise", "cache")) for path in named)
