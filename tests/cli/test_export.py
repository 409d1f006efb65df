"""`layerwise export`, as a person meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from layerwise.cli import main

RECIPE = Path(__file__).parents[2] / "tests" / "tiny_recipe.py"


@pytest.fixture
def layerwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in an empty directory in which module 1 is trained."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> Result:
        return CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)

    assert run("stage", 1, "--recipe", RECIPE).exit_code == 0
    return run


@pytest.mark.parametrize("to", [".", "..", "/", "no-ending"])
def test_a_name_without_an_ending_is_refused_in_a_line(layerwise: Callable[..., Result], to: str) -> None:
    refused = layerwise("export", "--module", 1, "--to", to)
    assert refused.exit_code == 2, refused.output
    assert "the file's name must end in .pt2, .onnx or .safetensors" in refused.stderr


@pytest.mark.parametrize(
    ("file", "needs"),
    [("encoder.pt2", ["torch"]), ("encoder.onnx", ["numpy", "onnxruntime"]), ("encoder.safetensors", ["layerwise"])],
)
def test_the_loader_that_is_printed_loads_the_file(
    layerwise: Callable[..., Result], file: str, needs: list[str]
) -> None:
    shown = layerwise("export", "--module", 1, "--to", file)
    assert shown.exit_code == 0
    assert ", ".join(needs) in shown.stdout
    assert "(batch, 1, 16, 16) float32" in shown.stdout
    loader = shown.stdout.partition("Load it with:\n\n")[2]
    assert len(loader.split("\n")) < 9
    subprocess.run([sys.executable, "-c", f"{loader}\nassert representation.shape == (1, 8, 3, 3)"], check=True)
    found = json.loads(layerwise("export", "--module", 1, "--to", file, "--overwrite", "--json").stdout)
    assert (found["file"], found["description"], found["needs"]) == (file, f"{file}.json", needs)
    assert found["about"] == json.loads(Path(f"{file}.json").read_text())
    assert found["loader"] == loader.strip("\n")


def test_errors(layerwise: Callable[..., Result]) -> None:
    before = sorted(str(path) for path in Path().rglob("*"))
    for arguments, code, message in (
        (["--module", 2, "--to", "a.pt2"], 1, "module 2 is not trained yet. Run: layerwise stage 2"),
        (["--module", 9, "--to", "a.pt2"], 2, "there is no module 9: the recipe 'tiny' has modules 1 to 3"),
        (["--module", 1, "--to", "a.bin"], 2, "must end in .pt2, .onnx or .safetensors"),
        (["--module", 1, "--to", "runs"], 2, "must end in"),
        (["--module", 1], 2, "--to"),
    ):
        refused = layerwise("export", *arguments)
        assert refused.exit_code == code
        assert message in refused.stderr
        assert json.loads(layerwise("export", *arguments, "--json").stdout)["exit_code"] == code
    assert sorted(str(path) for path in Path().rglob("*")) == before
    assert layerwise("export", "--module", 1, "--to", "a.safetensors").exit_code == 0
    again = layerwise("export", "--module", 1, "--to", "a.safetensors")
    assert again.exit_code == 2
    assert "a.safetensors, a.safetensors.json already exists" in again.stderr
