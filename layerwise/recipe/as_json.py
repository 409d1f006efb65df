"""A recipe as JSON and back: its settings, each with the class that it is of. Only classes of layerwise are rebuilt."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from layerwise.errors import DamagedData, LayerwiseError
from layerwise.recipe.overrides import explain
from layerwise.recipe.recipe import Recipe
from layerwise.settings.base import JsonValue, Settings

CLASS = "class"  # no field can have the name: it is a keyword of Python
AS_WRITTEN = "as_written"
"""The field of a run's recipe.json that holds the recipe before overrides, method and scale."""


class NeedsCode(LayerwiseError):
    """Some settings are of a class that is not part of layerwise; the message says which."""


def describe(settings: Settings) -> dict[str, JsonValue]:
    """Every field, nested settings likewise, each with the full name of its class."""
    plain = settings.model_dump(mode="json")
    kind = type(settings)
    fields = {name: _described(getattr(settings, name), plain[name]) for name in kind.model_fields}
    return {CLASS: f"{kind.__module__}.{kind.__qualname__}", **fields}


def _described(value: Any, plain: JsonValue) -> JsonValue:
    if isinstance(value, Settings):
        return describe(value)
    if isinstance(value, Mapping):
        return {str(name): _described(item, plain[str(name)]) for name, item in value.items()}
    if isinstance(value, tuple) and any(isinstance(item, Settings) for item in value):
        return [_described(item, one) for item, one in zip(value, plain, strict=True)]
    return plain


def rebuild(described: JsonValue) -> Recipe:
    """The recipe that `describe` was given; nothing but modules of layerwise is imported for it.

    Raises:
        NeedsCode: some settings are of a class of the user's.
        DamagedData: no recipe can have these fields.
    """
    recipe = rebuild_settings(described)
    if not isinstance(recipe, Recipe):
        raise DamagedData("it describes no recipe")
    return recipe


def rebuild_settings(described: JsonValue) -> Any:
    """The settings that `describe` was given, whatever their class.

    Raises:
        NeedsCode: some settings are of a class of the user's.
        DamagedData: no settings can have these fields.
    """
    try:
        return _rebuilt(described)
    except ValidationError as error:
        raise DamagedData(explain(error)) from error


def _rebuilt(described: JsonValue) -> Any:
    if isinstance(described, list):
        return [_rebuilt(item) for item in described]
    if not isinstance(described, dict):
        return described
    fields = {
        name: _rebuilt_by_name(value) if name in ("stages", "arguments") else _rebuilt(value)
        for name, value in described.items()
        if name != CLASS
    }
    return _settings_class(described.get(CLASS)).model_validate(fields)


def _rebuilt_by_name(described: JsonValue) -> Any:
    """`Recipe.stages`, in which settings may stand whole, or `Optimiser.arguments`."""
    if not isinstance(described, dict) or CLASS in described:
        return _rebuilt(described)
    return {name: _rebuilt_by_name(value) for name, value in described.items()}


def _settings_class(name: JsonValue) -> type[Settings]:
    if not isinstance(name, str):
        raise DamagedData("a group of its fields names no class")
    module, _, qualified = name.rpartition(".")
    if re.fullmatch(r"layerwise(\.[a-z][a-z0-9_]*)+", module) is None:
        raise NeedsCode(f"its settings {name!r} are defined in a file of somebody's own")
    try:
        found = getattr(importlib.import_module(module), qualified, None)
    except ImportError:
        found = None
    if not (isinstance(found, type) and issubclass(found, Settings) and found.__module__.startswith("layerwise.")):
        raise DamagedData(f"this version of layerwise has no settings {name!r}")
    if inspect.isabstract(found):
        raise DamagedData(f"the settings {name!r} cannot be used by themselves")
    return found
