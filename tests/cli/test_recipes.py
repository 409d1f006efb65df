"""`layerwise recipes`: what can be trained, and every field that --set takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from layerwise.cli import main
from layerwise.recipe.loader import built_in

RECIPE = str(Path(__file__).parents[1] / "tiny_recipe.py")


def call(*arguments: str, width: int = 100) -> Result:
    return CliRunner(env={"COLUMNS": str(width)}).invoke(main, ["recipes", *arguments], catch_exceptions=False)


def test_all_are_listed_with_how_to_train_one() -> None:
    listed = call().stdout
    assert all(name in listed for name in built_in())
    assert "layerwise run --recipe NAME" in listed
    assert "layerwise recipes NAME" in listed
    assert list(json.loads(call("--json").stdout)["recipes"]) == list(built_in())


def test_a_recipe_lists_value_default_and_meaning_of_each_field() -> None:
    lines = call("stl10", width=200).stdout.splitlines()
    (patience,) = [line.split() for line in lines if "training.patience=" in line]
    assert patience[:3] == ["training.patience=20", "10", "epochs"]
    assert any(line.startswith("network.groups.2: Group.") for line in lines)
    told = json.loads(call("stl10", "--json").stdout)
    assert told["recipe"] == "stl10"
    by_name = {field["name"]: field for group in told["groups"] for field in group["fields"]}
    assert by_name["training.patience"]["default"] == 10
    assert by_name["dataset.crop"]["description"] == "side of a random crop, pixels"


@pytest.mark.parametrize("width", [60, 100])
def test_the_list_fits_the_terminal_and_names_are_whole(width: int) -> None:
    listed = call("digits", width=width).stdout
    assert max(map(len, listed.splitlines())) <= width
    assert "network.groups.0.channels=32 " in listed


def test_a_recipe_of_ones_own_and_one_that_is_not_there() -> None:
    assert "objective.negatives=4" in call(RECIPE).stdout
    refused = call("digit", "--json")
    assert refused.exit_code == json.loads(refused.stdout)["exit_code"] == 2
    assert "did you mean digits?" in json.loads(refused.stdout)["message"]
