"""Overrides of a recipe's fields: `key=value` from the command line, and what a recipe says for single modules."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError

from layerwise.errors import RecipeError
from layerwise.objectives.settings import ObjectiveSettings
from layerwise.recipe.named_data import function_named, named_data
from layerwise.recipe.recipe import Recipe
from layerwise.settings.base import Settings
from layerwise.settings.training import Optimiser, Training

IN_STAGES: dict[str, type[Settings] | None] = {"objective": ObjectiveSettings, "optimiser": Optimiser, "training": None}
"""What a recipe may say for one module alone, and the settings that may stand there whole."""
TRAINING_IN_STAGES = ("epochs", "patience", "tolerance", "keep", "noise")
"""Fields of `training` among them; the others hold for all modules."""


def apply_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Each `a.b=value` replaces one field, `a.0.b=value` one of an item, `stages.2.a.b=value` one of module 2 alone.

    The value is JSON, or else a plain word.

    All are replaced before any is checked, so that fields which must agree may be given in any order.

    Raises:
        RecipeError: no such field, or a value that it cannot have.
    """
    draft = _draft(recipe)
    for override in overrides:
        name, separator, text = (part.strip() for part in override.partition("="))
        if not separator or not name:
            raise RecipeError(f"--set takes key=value, as in --set objective.negatives=32; got {override!r}")
        path = name.split(".")
        if (function := function_named(override)) is not None:
            draft.fields["dataset"] = _draft(named_data(function))
        elif path[0] == "stages" and path[1:]:
            _put_in_stage(draft.fields["stages"], path[1:], _value(text), name)
        else:
            _put(draft, path, _value(text), name)
    built = _build(draft, "")
    assert isinstance(built, Recipe)
    for number in built.stages:
        for_stage(built, number)
    return built


def for_stage(recipe: Recipe, number: int) -> Recipe:
    """The recipe as it holds for module `number`: what `stages` says of it has taken the place of what holds for all.

    Raises:
        RecipeError: `stages` names no such field, or a value that it cannot have.
    """
    if not recipe.stages:
        return recipe
    changed = {}
    for group, part in recipe.stages.get(number, {}).items():
        name = f"stages.{number}.{group}"
        if group not in IN_STAGES:
            hint = nearest(group, IN_STAGES, f"stages.{number}.") or f"a single module has {listed(IN_STAGES)}"
            raise RecipeError(f"there is no field {name!r}: {hint}")
        whole = IN_STAGES[group]
        if whole is not None and isinstance(part, whole):
            changed[group] = part
        elif isinstance(part, Mapping):
            draft = _draft(getattr(recipe, group))
            if group == "training":
                _require_in_stages(part, name)
            _merge(draft, part, f"{name}.")
            changed[group] = _build(draft, f"{name}.")
        else:
            raise RecipeError(f"{name} = {shown(part)}: give fields and their values, as in {{'epochs': 50}}")
    return recipe.model_copy(update={**changed, "stages": {}})


def _require_in_stages(part: Mapping[str, Any], name: str) -> None:
    known = Training.model_fields
    if common := [field for field in part if field in known and field not in TRAINING_IN_STAGES]:
        raise RecipeError(
            f"{name}.{common[0]} cannot differ between modules: {listed(TRAINING_IN_STAGES)} can. Set it for all with "
            f"--set training.{common[0]}=…"
        )


def _merge(draft: _Group, part: Mapping[str, Any], above: str) -> None:
    """Put the fields that are named in their places; groups inside likewise."""
    for field, value in part.items():
        if field not in draft.fields:
            hint = nearest(field, draft.fields, above) or f"{above.rstrip('.')} has {listed(draft.fields)}"
            raise RecipeError(f"there is no field {above + field!r}: {hint}")
        inside = draft.fields[field]
        if isinstance(inside, _Group) and isinstance(value, Mapping):
            _merge(inside, value, f"{above}{field}.")
        elif isinstance(inside, dict) and isinstance(value, Mapping):
            draft.fields[field] = {**inside, **value}
        else:
            draft.fields[field] = value


def _put_in_stage(stages: dict[int, dict[str, Any]], path: Sequence[str], value: Any, name: str) -> None:
    """Note the field in `stages`; a group, or a stage, that is set to null is as if nothing had been said of it."""
    number, *fields = path
    if not (number.isdecimal() and len(number) < 6 and int(number) > 0):
        raise RecipeError(
            f"{name}: after `stages` comes the number of a module, as in stages.2.optimiser.learning_rate, and not "
            f"{number!r}"
        )
    if len(fields) < 2:
        if value is not None:
            inner = ", ".join(f"{name}.{field}" for field in ([] if fields else IN_STAGES))
            raise RecipeError(f"{name} is a group of fields: set one of them{f' ({inner} …)' if inner else ''}")
        if fields:
            stages.get(int(number), {}).pop(fields[0], None)
        else:
            stages.pop(int(number), None)
        return
    group, *way, last = fields
    own = stages.setdefault(int(number), {})
    if isinstance(own.get(group), Settings):  # whole, of a class of its own
        draft = _draft(own[group])
        _put(draft, [*way, last], value, name, f"stages.{number}.{group}.")
        own[group] = _build(draft, f"stages.{number}.{group}.")
        return
    part = own.setdefault(group, {})
    for field in way:
        part = part.setdefault(field, {})
        if not isinstance(part, dict):
            raise RecipeError(f"there is no field {name!r}: {field} has no fields of its own")
    part[last] = value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


@dataclass
class _Group:
    """Settings taken apart, to be changed and put together again."""

    kind: type[Settings]
    fields: dict[str, Any]
    held: dict[str, Any]
    """Objects that came with the settings and are no fields, such as datasets that were made in Python."""


def _draft(value: Any) -> Any:
    if isinstance(value, Settings):
        fields = {name: _draft(getattr(value, name)) for name in type(value).model_fields}
        return _Group(type(value), fields, dict(value.__pydantic_private__ or {}))
    return [_draft(item) for item in value] if isinstance(value, tuple) else deepcopy(value)


def _put(draft: Any, path: Sequence[str], value: Any, name: str, above: str = "") -> None:
    field, *rest = path
    fields: dict[Any, Any]
    key: Any = field
    if isinstance(draft, _Group):
        fields = draft.fields
    elif isinstance(draft, dict) and not rest:
        draft[field] = value
        return
    elif isinstance(draft, list):
        fields = dict(enumerate(draft))
        key = int(field) if field.isdecimal() and len(field) < 9 else field
    else:
        raise RecipeError(f"there is no field {name!r}: {above.rstrip('.')} has no fields of its own")
    if key not in fields:
        known = [str(other) for other in fields]
        hint = _inside(draft, path, above) or nearest(field, known, above, rest)
        hint = hint or f"{above.rstrip('.') or 'the recipe'} has {listed(known)}"
        raise RecipeError(f"there is no field {name!r}: {hint}")
    if rest:
        _put(fields[key], rest, value, name, f"{above}{field}.")
    elif isinstance(fields[key], _Group) and value is not None:
        inner = listed([f"{name}.{known}" for known in fields[key].fields])
        optional = isinstance(draft, _Group) and type(None) in get_args(draft.kind.model_fields[field].annotation)
        without = f", or leave it out with {name}=null" if optional else ""
        raise RecipeError(f"{name} is a group of fields: set one of them ({inner}){without}")
    elif isinstance(draft, _Group):
        draft.fields[key] = value
    else:
        draft[key] = value


def _inside(draft: Any, path: Sequence[str], above: str) -> str:
    """Which groups in this one have the field."""
    inner = draft.fields.items() if isinstance(draft, _Group) else ()
    holding = [name for name, group in inner if isinstance(group, _Group) and path[0] in group.fields]
    return f"did you mean {' or '.join('.'.join([above + name, *path]) for name in holding)}?" if holding else ""


def _build(draft: Any, above: str) -> Any:
    if isinstance(draft, list):
        return [_build(item, f"{above}{index}.") for index, item in enumerate(draft)]
    if not isinstance(draft, _Group):
        return draft
    values = {name: _build(value, f"{above}{name}.") for name, value in draft.fields.items()}
    try:
        built = draft.kind.model_validate(values)
    except ValidationError as error:
        raise RecipeError(explain(error, above)) from error
    if draft.held:
        built.__pydantic_private__ = draft.held
    return built


def explain(error: ValidationError, above: str = "") -> str:
    """One line: field, value, what is allowed, and the nearest good value where there is one."""
    # A field that does not exist explains the one that is missing.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    kind, value, limits = first["type"], first.get("input"), first.get("ctx", {})
    name = (above + ".".join(str(part) for part in first["loc"])).rstrip(".") or "the recipe"
    name = name if name.isprintable() else ascii(name)[1:-1]
    if kind == "value_error":
        return f"{name}: {limits['error']}"
    if kind == "extra_forbidden":
        *way, wrong = map(str, first["loc"])
        fields = _fields_at(error.title, first["loc"][:-1])
        hint = nearest(wrong, fields, above + "".join(f"{part}." for part in way)) or f"there are {listed(fields)}"
        return f"there is no field {name!r}: {hint}"
    if kind == "missing":
        return f"{name} is missing"
    message = re.sub(r"^\w+ should ", "should ", first["msg"])
    if kind == "string_pattern_mismatch" and (described := _description(error.title, first["loc"])):
        message = f"does not have the required form ({described})"
    return f"{name} = {shown(value)}: {message}{_nearest_value(kind, value, limits)}"


def _fields_at(title: str, way: Iterable[int | str]) -> list[str]:
    """Names of the fields of the settings called `title`, or of those that `way` leads to from there."""
    kind: Any = next((kind for kind in _kinds(Settings) if kind.__name__ == title), None)
    for part in way:
        kind = get_args(kind)[0] if isinstance(part, int) else kind.model_fields[part].annotation
    return list(getattr(kind, "model_fields", ()))


def _description(title: str, way: Sequence[int | str]) -> str | None:
    kind = next((kind for kind in _kinds(Settings) if kind.__name__ == title), None)
    info = None if kind is None or len(way) != 1 else kind.model_fields.get(str(way[0]))
    return None if info is None else info.description


def _kinds(kind: type[Settings]) -> Iterator[type[Settings]]:
    for below in kind.__subclasses__():
        yield below
        yield from _kinds(below)


def _nearest_value(kind: str, value: Any, limits: Mapping[str, Any]) -> str:
    if kind == "literal_error":
        return (
            "; " + hint if (hint := nearest(str(value), re.findall(r"'([^']*)'", str(limits.get("expected"))))) else ""
        )
    good: float | None = next((limits[key] for key in ("ge", "le") if key in limits), None)
    if kind == "int_from_float" and isinstance(value, float):
        good = round(value)
    if "multiple_of" in limits and isinstance(value, (int, float)):
        good = max(round(value / limits["multiple_of"]), 1) * limits["multiple_of"]
    return "" if good is None else f"; the nearest valid value is {good}"


def nearest(wrong: str, known: Iterable[str], above: str = "", below: Sequence[str] = ()) -> str:
    found = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.5)
    return f"did you mean {'.'.join([above + found[0], *below])}?" if found else ""


def listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
