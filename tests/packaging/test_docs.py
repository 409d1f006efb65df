"""The examples of the docs run as they are printed, one after another, in one process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

DOCS = Path(__file__).parents[2] / "docs"


def test_the_examples_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "your-own.md").read_text(), re.S)
    assert len(blocks) == 4
    assert all(sum(map(bool, block.splitlines())) <= 15 for block in blocks)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(64, 1, 16, 16, generator=generator)
    names = {"pictures": TensorDataset(pixels), "labelled": TensorDataset(pixels, torch.arange(64) % 10)}
    path = tmp_path / "examples.py"
    path.write_text("\n".join(blocks))  # code of one's own is read from its file
    exec(compile(path.read_text(), str(path), "exec"), names | {"__name__": "examples"})  # noqa: S102
    assert {folder.name for folder in Path("runs").iterdir()} >= {"own-loss", "own-decoder", "own-data", "own-network"}


def test_every_command_of_the_docs_is_understood() -> None:
    import shlex

    import click

    from layerwise.cli import main

    found = 0
    for page in DOCS.glob("*.md"):
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
            for words in re.findall(r"(?:-m )?layerwise ([a-z][^\n\"|;)]*)", block):
                name, *arguments = shlex.split(words, comments=True)
                main.commands[name].make_context(name, arguments, parent=click.Context(main))
                found += 1
    assert found > 5
