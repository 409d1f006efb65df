"""Every field of a recipe that `--set` takes: its value, its default, what it may be and what it means."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from layerwise.settings.base import Bytes, JsonValue, Settings


@dataclass(frozen=True)
class Field:
    """One field, as `--set name=value` takes it."""

    name: str
    value: JsonValue
    default: JsonValue
    required: bool
    """It has no default: every recipe chooses it."""
    allowed: str
    """Which values it takes; empty where the description says all."""
    description: str
    """What it means, with its unit."""


@dataclass(frozen=True)
class Group:
    """Settings inside the recipe: a name before the dot, their class, and what they are for."""

    name: str
    kind: str
    description: str
    fields: tuple[Field, ...]


def groups(settings: Settings, name: str = "") -> Iterator[Group]:
    """The settings and all those inside them, outermost first."""
    fields, inside = [], []
    for field, info in type(settings).model_fields.items():
        value, path = getattr(settings, field), f"{name}.{field}" if name else field
        if isinstance(value, Settings):
            inside.append((path, value))
        elif isinstance(value, tuple) and value and all(isinstance(item, Settings) for item in value):
            inside += [(f"{path}.{index}", item) for index, item in enumerate(value)]
        else:
            fields.append(_field(path, value, info))
    kind = type(settings)
    yield Group(name, kind.__name__, (kind.__doc__ or "").strip().split("\n")[0], tuple(fields))
    for path, value in inside:
        yield from groups(value, path)


def _field(name: str, value: Any, info: FieldInfo) -> Field:
    required = info.is_required()
    default = None if required else info.get_default(call_default_factory=True, validated_data={})
    shown = to_jsonable_python(value), to_jsonable_python(default)
    return Field(name, *shown, required, _allowed(info), info.description or "")


def described(kind: type[Settings]) -> Iterator[tuple[str, str, str, str]]:
    """For each field of a class of settings: name, default ("" where there is none), allowed values, meaning with unit.

    A default that is a group of settings is shown as the name of its class.
    """
    for name, info in kind.model_fields.items():
        default = None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})
        if isinstance(default, Settings):
            shown = type(default).__name__
        else:
            shown = "" if info.is_required() else json.dumps(to_jsonable_python(default))
        yield name, shown, _allowed(info), info.description or ""


def _allowed(info: FieldInfo) -> str:
    annotation, optional = _without_none(info.annotation)
    if annotation is bool:
        choices = "true or false"
    elif get_origin(annotation) is Literal:
        choices = ", ".join(map(str, get_args(annotation)))
    elif annotation == Bytes:
        choices = "as 500MB or 2GiB"
    else:
        choices = _limits(info.metadata)
    return f"{choices}, or null" if choices and optional else choices


def _without_none(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation, False
    others = [one for one in get_args(annotation) if one is not type(None)]
    return others[0] if len(others) == 1 else annotation, len(others) < len(get_args(annotation))


def _limits(metadata: list[Any]) -> str:
    found = {
        kind: getattr(limit, kind)
        for limit in metadata
        for kind in ("ge", "gt", "le", "lt", "multiple_of", "min_length")
        if getattr(limit, kind, None) is not None
    }
    if {"ge", "le"} <= found.keys():
        parts = [
            " to ".join(
                f"{limit:,}" if isinstance(limit, int) else f"{limit:g}" for limit in (found["ge"], found["le"])
            )
        ]
    else:
        words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
        parts = [f"{word} {found[kind]}" for kind, word in words.items() if kind in found]
    if "multiple_of" in found:
        parts.append(f"a multiple of {found['multiple_of']}")
    if "min_length" in found:
        parts.append("a list of one or more" if found["min_length"] == 1 else f"{found['min_length']} or more")
    return ", ".join(parts)
