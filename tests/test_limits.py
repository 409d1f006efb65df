"""Settings have an end: a run of somebody else's cannot make a command count, or allocate, for ever."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import annotated_types
import pytest
from click.testing import CliRunner

import layerwise
from layerwise.cli import main
from layerwise.recipe import Settings
from layerwise.recipe.given import GivenData


def all_settings() -> list[type[Settings]]:
    for package in ("data", "nets", "objectives"):
        folder = importlib.import_module(f"layerwise.{package}").__path__
        for found in pkgutil.iter_modules(folder, f"layerwise.{package}."):
            importlib.import_module(found.name)
    found, kinds = set(), [Settings]
    while kinds:
        kinds += (new := set(kinds.pop().__subclasses__()) - found)
        found |= new
    return sorted((kind for kind in found if kind.__module__.startswith(layerwise.__name__)), key=str)


def whole_numbers(kind: Any, limits: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The limits of each int in an annotation."""
    if kind is int:
        yield limits
    elif get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        yield from whole_numbers(inner, (*limits, *(getattr(one, "metadata", [one]) for one in more)))
    else:
        for inner in get_args(kind):
            yield from whole_numbers(inner, limits if get_origin(kind) in (Union, UnionType) else ())


@pytest.mark.parametrize("kind", all_settings(), ids=lambda kind: kind.__name__)
def test_every_whole_number_has_an_upper_limit(kind):
    held_otherwise = {"cuts"}  # to the number of blocks
    endless = []
    for name, field in kind.model_fields.items():
        for limits in whole_numbers(field.annotation, tuple([one] for one in field.metadata)):
            flat = [limit for some in limits for limit in (some if isinstance(some, list) else [some])]
            if not any(isinstance(limit, annotated_types.Le | annotated_types.Lt) for limit in flat):
                endless.append(name)
    assert set(endless) <= held_otherwise | ({"classes"} if kind is GivenData else set())


@pytest.mark.parametrize(
    "field",
    [
        "network.groups.0.blocks=1000000000",
        "network.groups.0.channels=1000000000000000",
        "network.stem_channels=1000000000000000",
        "objective.steps=1000000000",
        "objective.negatives=1000000000000000000000000000000",
        "dataset.side=1000000",
        "cache.views=1000000000",
    ],
)
def test_an_absurd_number_is_refused(field, tmp_path):
    result = CliRunner().invoke(
        main, ["plan", "--recipe", "digits", "--set", field, "--run-dir", str(tmp_path / "run")]
    )
    assert result.exit_code == 2
    assert field.split("=")[0] in result.stderr


def test_the_blocks_of_all_groups_together_have_a_limit(tmp_path):
    groups = ",".join(['{"channels":4,"blocks":600}'] * 2)
    arguments = ["plan", "--recipe", "digits", "--set", f"network.groups=[{groups}]", "--set", "network.cuts=null"]
    result = CliRunner().invoke(main, [*arguments, "--run-dir", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "1200 blocks, more than 1000" in result.stderr
