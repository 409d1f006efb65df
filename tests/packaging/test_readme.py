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


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_network_of_ones_own_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is printed, but for the number of epochs."""
    import torch
    from torch.utils.data import TensorDataset

    (example,) = (example for example in EXAMPLES if "lw.train(" in example)
    monkeypatch.chdir(tmp_path)
    data = TensorDataset(torch.rand(64, 3, 64, 64), torch.arange(64) % 2)
    few = TensorDataset(torch.rand(4, 3, 64, 64), torch.arange(4) % 2)
    names = {"pictures": data, "held_out": few, "labelled": few, "test": few}
    exec(example.replace("epochs=50", "epochs=1"), names)
    features, encoder = names["features"], names["encoder"]
    assert isinstance(features, torch.Tensor)
    assert features.shape == (64, 49, 128, 2, 2)
    assert isinstance(encoder, torch.nn.Module)
    assert encoder(torch.rand(2, 3, 64, 64)).shape == (2, 256, 7, 7)


def test_every_command_is_named() -> None:
    assert {line.split()[1] for line in COMMANDS} | {"run"} == set(main.commands)


def test_every_file_that_is_linked_is_there() -> None:
    linked = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README)
    assert len(linked) > 20
    assert all((ROOT / path).exists() for path in linked)
