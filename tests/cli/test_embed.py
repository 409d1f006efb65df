"""`layerwise embed`, as a person meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors import safe_open

from layerwise.cli import main
from tests.data.test_folder import picture

RECIPE = Path(__file__).parents[2] / "tests" / "tiny_recipe.py"


@pytest.fixture
def layerwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in an empty directory in which module 1 is trained, beside two pictures."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> Result:
        return CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)

    assert run("stage", 1, "--recipe", RECIPE).exit_code == 0
    for index in range(2):
        picture(Path(f"{index}.png"), index)
    return run


def test_files_become_vectors(layerwise: Callable[..., Result]) -> None:
    shown = layerwise("embed", "--module", 1, "0.png", "1.png")
    assert shown.exit_code == 0
    assert "embeddings.safetensors" in shown.stdout
    with safe_open("embeddings.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()["layerwise"])["ids"] == ["0.png", "1.png"]
        assert opened.get_tensor("representations").shape == (2, 8)
    asked = ("embed", "--module", 1, "0.png", "1.png", "--positions", "--to", "a.npz", "--json")
    found = json.loads(layerwise(*asked).stdout)
    assert found["bytes"] == Path("a.npz").stat().st_size
    assert {**found, "bytes": None} == {
        "file": "a.npz", "bytes": None, "module": 1, "recipe": "tiny", "samples": 2, "shape": [8, 3, 3],
        "ids": ["0.png", "1.png"],
    }  # fmt: skip


def test_errors(layerwise: Callable[..., Result]) -> None:
    Path("bad.png").write_bytes(b"hello")
    Path("taken.npz").write_bytes(b"mine")
    before = sorted(str(path) for path in Path().rglob("*"))
    for arguments, code, message in (
        (["0.png", "--module", 2], 1, "module 2 is not trained yet. Run: layerwise stage 2"),
        (["0.png", "--module", 9], 2, "there is no module 9"),
        (["none.png", "--module", 1], 2, "there is no file none.png"),
        (["runs", "--module", 1], 2, "runs is a folder"),
        (["bad.png", "--module", 1], 65, "bad.png cannot be read as a picture"),
        (["0.png", "--module", 1, "--to", "a.csv"], 2, "must end in .safetensors, .npz or .parquet"),
        (["0.png", "--module", 1, "--to", "taken.npz"], 2, "taken.npz already exists"),
        (["--module", 1], 2, "FILE"),
    ):
        refused = layerwise("embed", *arguments)
        assert refused.exit_code == code, refused.output
        assert message in refused.stderr
        assert json.loads(layerwise("embed", *arguments, "--json").stdout)["exit_code"] == code
    assert sorted(str(path) for path in Path().rglob("*")) == before
    assert Path("taken.npz").read_bytes() == b"mine"
