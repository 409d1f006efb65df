"""Every field of every recipe is described, and is listed as `--set` takes it."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator

import pytest

import layerwise.data
import layerwise.nets
import layerwise.objectives
from layerwise.recipe import Settings
from layerwise.recipe.fields import groups
from layerwise.recipe.loader import apply_overrides, built_in, load_recipe


def kinds(kind: type[Settings]) -> Iterator[type[Settings]]:
    for below in kind.__subclasses__():
        yield below
        yield from kinds(below)


def test_every_field_says_what_it_means() -> None:
    for package in (layerwise.data, layerwise.nets, layerwise.objectives):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    ours = {kind for kind in kinds(Settings) if kind.__module__.startswith("layerwise.")}
    assert len(ours) > 20
    silent = [
        f"{kind.__name__}.{name}" for kind in ours for name, info in kind.model_fields.items() if not info.description
    ]
    assert silent == []


@pytest.mark.parametrize("name", built_in())
def test_every_field_is_listed_as_set_takes_it(name: str) -> None:
    recipe = load_recipe(name)
    fields = [field for group in groups(recipe) for field in group.fields]
    assert len(fields) > 30
    assert all(field.description for field in fields)
    assert len({field.name for field in fields}) == len(fields)
    assert apply_overrides(recipe, [f"{field.name}={json.dumps(field.value)}" for field in fields]) == recipe


def test_value_default_and_what_is_allowed() -> None:
    fields = {field.name: field for group in groups(load_recipe("stl10")) for field in group.fields}
    patience = fields["training.patience"]
    assert (patience.value, patience.default, patience.required, patience.allowed) == (20, 10, False, "1 to 1,000,000")
    assert fields["dataset.crop"].allowed == "8 to 96"
    assert fields["optimiser.learning_rate"].allowed == "above 0, at most 10"
    assert fields["cache.codec"].allowed == "none, lz4, zstd"
    assert fields["cache.budget"].allowed == "as 500MB or 2GiB, or null"
    assert fields["network.groups.1.channels"].required
