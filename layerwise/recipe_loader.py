"""From a name or a path, and overrides, to a `Recipe`.

A recipe is Python, so loading one runs it: only those that are built in, and files that the user names by an
explicit path ending in `.py`.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from layerwise.errors import RecipeError
from layerwise.recipe import Recipe, Settings


def recipes_folder() -> Path:
    """Where the built-in recipes lie: inside an installed package, else beside the checkout's."""
    shipped = Path(__file__).parent / "_recipes"
    return shipped if shipped.is_dir() else Path(__file__).parent.parent / "recipes"


def built_in() -> dict[str, Path]:
    """Name to file, sorted."""
    return {path.stem: path for path in sorted(recipes_folder().glob("[a-z]*.py"))}


def summary(path: Path) -> str:
    """First line of a recipe's docstring, read without running it."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe named or at the path `source`, with `key=value` overrides applied.

    Raises:
        RecipeError: no such recipe, field or value; one line that names the nearest good one.
    """
    path = _find(source)
    recipe = _execute(path)
    return apply_overrides(recipe, overrides)


def resolve_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe as it is trained: loaded, overridden, shrunk by its scale and changed by its method.

    An override names a field of the recipe, or else one that the method brings (`objective.task`,
    `network.context.layers`).

    Raises:
        RecipeError: no such recipe, field or value.
    """
    from layerwise.methods import with_method
    from layerwise.scale import with_scale

    recipe, later = load_recipe(source), []
    for override in overrides:
        if _has_field(recipe, override.partition("=")[0].strip().split(".")):
            recipe = apply_overrides(recipe, [override])
        else:
            later.append(override)
    return apply_overrides(with_method(with_scale(recipe, recipe.scale), recipe.method), later)


def _has_field(settings: Any, path: Sequence[str]) -> bool:
    field, *rest = path
    return (
        isinstance(settings, Settings)
        and field in type(settings).model_fields
        and (not rest or _has_field(getattr(settings, field), rest))
    )


def _find(source: str) -> Path:
    known = built_in()
    if source in known:
        return known[source]
    if not source.endswith(".py"):
        printable = source.encode("unicode_escape").decode()
        nearest = difflib.get_close_matches(source, known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(known)}."
        raise RecipeError(
            f"there is no recipe {printable!r}: {hint} A recipe of your own is given as a path that ends in .py"
        )
    path = Path(source)
    if not path.is_file():
        raise RecipeError(f"there is no file {str(path)!r} to load a recipe from")
    return path.resolve()


def _execute(path: Path) -> Recipe:
    name = f"layerwise_recipe_{re.sub(r'[^A-Za-z0-9]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: its own classes look themselves up there
    try:
        spec.loader.exec_module(module)
    except ValidationError as error:
        raise RecipeError(f"{path}: {explain(error, None)}") from error
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"{path} could not be run: {type(error).__name__}: {error}") from error
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{path} must define `recipe = Recipe(…)`; it defines "
            f"{'no recipe' if recipe is None else type(recipe).__name__}"
        )
    return recipe


def apply_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Each `a.b=value` replaces one field; the value is JSON, or else a plain word."""
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator or not name:
            raise RecipeError(f"--set takes key=value, as in --set objective.negatives=32; got {override!r}")
        recipe = _replace(recipe, name.strip().split("."), _value(text.strip()), name.strip())
    return recipe


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _replace(settings: Any, path: Sequence[str], value: Any, name: str) -> Any:
    field, *rest = path
    if not isinstance(settings, Settings) or field not in type(settings).model_fields:
        raise RecipeError(f"there is no field {name!r}: {_nearest_field(settings, field, name)}")
    if rest:
        value = _replace(getattr(settings, field), rest, value, name)
    elif isinstance(getattr(settings, field), Settings) and value is not None:
        raise RecipeError(
            f"{name} is a group of fields: set one of them "
            f"({', '.join(f'{name}.{inner}' for inner in type(getattr(settings, field)).model_fields)})"
        )
    # Only this level is validated anew: values of the levels below are settings already.
    fields = {inner: getattr(settings, inner) for inner in type(settings).model_fields}
    try:
        return type(settings).model_validate({**fields, field: value})
    except ValidationError as error:
        raise RecipeError(explain(error, name)) from error


def _nearest_field(settings: Any, field: str, name: str) -> str:
    if not isinstance(settings, Settings):
        return f"{name.rpartition('.')[0]} has no fields of its own"
    fields = list(type(settings).model_fields)
    above = name[: len(name) - len(field)] if name.endswith(field) else ""
    nearest = difflib.get_close_matches(field, fields, n=1, cutoff=0.5)
    return (
        f"did you mean {above}{nearest[0]}?"
        if nearest
        else f"{(above or 'the recipe').rstrip('.')} has {', '.join(fields)}"
    )


def explain(error: ValidationError, name: str | None) -> str:
    """One line: field, value, what is allowed, and the nearest good value where there is one."""
    first = error.errors()[0]
    inner = ".".join(str(part) for part in first["loc"])
    field = name if name is not None else inner
    value, limits = first.get("input"), first.get("ctx", {})
    nearest = next((limits[key] for key in ("ge", "le") if key in limits), None)
    hint = f"; the nearest good value is {nearest}" if nearest is not None else ""
    if first["type"] == "literal_error" and isinstance(value, str):
        choices = re.findall(r"'([^']*)'", str(limits.get("expected", "")))
        close = difflib.get_close_matches(value, choices, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    verb = "is" if first["type"] == "value_error" else "should be"
    shown = "" if first["type"] in ("value_error", "missing") else f" = {value!r}"
    return f"{field}{shown}: {message if first['type'] in ('value_error', 'missing') else f'{verb} {message}'}{hint}"
