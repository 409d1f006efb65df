"""From a name or a path, and overrides, to a `Recipe`.

A recipe is Python, so loading one runs it: only those that are built in, and files that the user names by an
explicit path ending in `.py`.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from layerwise.errors import RecipeError
from layerwise.recipe import Recipe, Settings
from layerwise.sources import RECIPE_MODULE, local_files


def recipes_folder() -> Path:
    """Where the built-in recipes lie: inside an installed package, else beside the checkout's."""
    shipped = Path(__file__).parent / "_recipes"
    return shipped if shipped.is_dir() else Path(__file__).parent.parent / "recipes"


def built_in() -> dict[str, Path]:
    """Name to file, sorted."""
    return {path.stem: path for path in sorted(recipes_folder().glob("[a-z]*.py"))}


def summary(path: Path) -> str:
    """First line of a recipe's docstring, read without running it."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe named or at the path `source`, with `key=value` overrides applied.

    Raises:
        RecipeError: no such recipe, field or value; one line that names the nearest good one.
    """
    return apply_overrides(_execute(find_recipe(source)), overrides)


def resolve_recipe(source: str | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe as it is trained: loaded (or as its file gives it), overridden, shrunk by its scale and changed by its
    method.

    An override names a field of the recipe, or else one that the method brings (`objective.task`,
    `network.context.layers`).

    Raises:
        RecipeError: no such recipe, field or value, or the method replaces the field that an override names.
    """
    recipe, later, lost = _by_method(source, overrides)
    for override, reason in lost.items():
        raise RecipeError(f"{override} would have no effect: {reason}. Leave it out, or choose another method")
    return apply_overrides(recipe, later)


def heeded(source: str | Recipe, overrides: Sequence[str]) -> list[str]:
    """Those of the overrides that name no field that the method replaces: for overrides that several methods share.

    Raises:
        RecipeError: no such recipe or value.
    """
    lost = _by_method(source, overrides)[2]
    return [override for override in overrides if override not in lost]


def require_heeded(recipe: Recipe) -> None:
    """Hold a recipe to fields that mean something in its schedule.

    Raises:
        RecipeError: one is set that would be ignored.
    """
    together = recipe.schedule == "simultaneous"
    if not together and recipe.training.update_every != (1,):
        raise RecipeError(
            f"training.update_every = {list(recipe.training.update_every)} would have no effect: it counts the steps "
            "of modules that are trained together, and these are trained one after another. Train them together with "
            "--schedule simultaneous, or leave it at --set training.update_every=[1]"
        )
    if not together and recipe.together is not None:
        raise RecipeError(
            f"together = {recipe.together} would have no effect: these modules are trained one after another. Train "
            "the first ones together with --schedule simultaneous, or leave it at --set together=null"
        )
    if together and recipe.together is None and recipe.training.noise > 0:
        raise RecipeError(
            f"training.noise = {recipe.training.noise:g} would have no effect: it is added to the inputs of modules "
            "trained on frozen ones, and these are all trained together. Train one after another with "
            "--schedule iterative, or leave it at --set training.noise=0"
        )


def _by_method(source: str | Recipe, overrides: Sequence[str]) -> tuple[Recipe, list[str], dict[str, str]]:
    """The recipe as its method leaves it, the overrides that are still to be applied to what the method brought, and
    those that reach nothing, each with the reason.
    """
    from layerwise.methods import with_method
    from layerwise.scale import with_scale

    asked = load_recipe(source) if isinstance(source, str) else source
    paths = {override: override.partition("=")[0].strip().split(".") for override in overrides}
    first = [override for override in overrides if _has_field(asked, paths[override])]
    asked = apply_overrides(asked, first)
    asked = with_scale(asked, asked.scale)
    trained = with_method(asked, asked.method)
    later, lost = [], {}
    for override in overrides:
        path, replaced = paths[override], trained.objective is not asked.objective
        if override in first and _survives(asked, trained, path):
            continue
        if override not in first or (path[0] == "objective" and replaced and _has_field(trained, path)):
            later.append(override)
        elif path[0] == "objective":
            kinds = type(asked.objective).__name__, type(trained.objective).__name__
            lost[override] = f"the method {trained.method} puts {kinds[1]} in the place of the objective {kinds[0]}"
        else:
            sets = _shown(_value_at(trained, path))
            lost[override] = f"the method {trained.method} sets {'.'.join(path)} to {sets}"
    return trained, later, lost


def _survives(asked: Any, trained: Any, path: Sequence[str]) -> bool:
    """Whether the field that was asked for is still there: where it was, or inside settings that were put around it."""
    if asked == trained:
        return True
    if not isinstance(asked, Settings) or not isinstance(trained, Settings):
        return False
    if any(getattr(trained, name) == asked for name in type(trained).model_fields):
        return True
    if type(asked) is not type(trained) or not path:
        return False
    return _survives(getattr(asked, path[0]), getattr(trained, path[0]), path[1:])


def _value_at(settings: Any, path: Sequence[str]) -> Any:
    for field in path:
        settings = settings[int(field)] if isinstance(settings, tuple) else getattr(settings, field)
    return settings


def _has_field(settings: Any, path: Sequence[str]) -> bool:
    if not path:
        return True
    field, *rest = path
    if isinstance(settings, tuple):
        return field in map(str, range(len(settings))) and _has_field(settings[int(field)], rest)
    known = isinstance(settings, Settings) and field in type(settings).model_fields
    return known and _has_field(getattr(settings, field), rest)


def find_recipe(source: str) -> Path:
    known = built_in()
    if source in known:
        return known[source]
    if not source.endswith(".py"):
        raise RecipeError(
            f"there is no recipe {source!r}: {_nearest(source, known) or f'there are {_listed(known)}.'} "
            "A recipe of your own is given as a path that ends in .py"
        )
    try:
        path = Path(source).resolve(strict=True)
        found = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, a loop of links
        found = False
    if not found:
        raise RecipeError(f"there is no file {source!r} to load a recipe from")
    return path


def _execute(path: Path) -> Recipe:
    place = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]  # two recipes may have one name
    name = f"{RECIPE_MODULE}{re.sub(r'[^A-Za-z0-9]', '_', path.stem)}_{place}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: its own classes look themselves up there
    _import_helpers_anew(path)
    try:
        with _no_bytecode():  # which may be that of an edit a moment ago
            exec(compile(path.read_bytes(), path, "exec", dont_inherit=True), module.__dict__)
    except ValidationError as error:
        raise RecipeError(f"{str(path)!r}: {explain(error)}") from error
    except RecipeError:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{str(path)!r} could not be run: {type(error).__name__}: {reason}") from error
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        found = "no recipe" if recipe is None else f"a recipe of type {type(recipe).__name__}"
        raise RecipeError(f"{str(path)!r} must define `recipe = Recipe(…)`; it defines {found}")
    return recipe


_HELPERS: set[str] = set()
"""Names of the modules that were imported from beside recipes."""
_BESIDE: list[str] = []
"""The folder of the latest recipe of the user's, where that was added to the places that Python imports from."""


def _import_helpers_anew(path: Path) -> None:
    """Let a recipe import modules that lie beside it, each as its file is now, and not one of the same name from
    beside another recipe.
    """
    for name in _HELPERS:
        sys.modules.pop(name, None)
    for folder in _BESIDE:
        sys.path.remove(folder)
    _BESIDE.clear()
    folder = str(path.parent)
    if path.parent != recipes_folder() and folder not in sys.path:
        sys.path.append(folder)  # last: what is installed goes first
        _BESIDE.append(folder)
    _HELPERS.update(name for name in local_files(path) if name and name not in sys.modules)


@contextmanager
def _no_bytecode() -> Iterator[None]:
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def apply_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Each `a.b=value` replaces one field, `a.0.b=value` one of an item; the value is JSON, or else a plain word.

    All are replaced before any is checked, so that fields which must agree may be given in any order.

    Raises:
        RecipeError: no such field, or a value that it cannot have.
    """
    draft = _draft(recipe)
    for override in overrides:
        name, separator, text = (part.strip() for part in override.partition("="))
        if not separator or not name:
            raise RecipeError(f"--set takes key=value, as in --set objective.negatives=32; got {override!r}")
        _put(draft, name.split("."), _value(text), name)
    built = _build(draft, "")
    assert isinstance(built, Recipe)
    return built


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


def _draft(value: Any) -> Any:
    if isinstance(value, Settings):
        return _Group(type(value), {name: _draft(getattr(value, name)) for name in type(value).model_fields})
    return [_draft(item) for item in value] if isinstance(value, tuple) else value


def _put(draft: Any, path: Sequence[str], value: Any, name: str, above: str = "") -> None:
    field, *rest = path
    fields: dict[Any, Any]
    key: Any = field
    if isinstance(draft, _Group):
        fields = draft.fields
    elif isinstance(draft, list):
        fields = dict(enumerate(draft))
        key = int(field) if field.isdecimal() and len(field) < 9 else field
    else:
        raise RecipeError(f"there is no field {name!r}: {above.rstrip('.')} has no fields of its own")
    if key not in fields:
        known = [str(other) for other in fields]
        hint = _inside(draft, path, above) or _nearest(field, known, above, rest)
        hint = hint or f"{above.rstrip('.') or 'the recipe'} has {_listed(known)}"
        raise RecipeError(f"there is no field {name!r}: {hint}")
    if rest:
        _put(fields[key], rest, value, name, f"{above}{field}.")
    elif isinstance(fields[key], _Group) and value is not None:
        inner = _listed([f"{name}.{known}" for known in fields[key].fields])
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
        return draft.kind.model_validate(values)
    except ValidationError as error:
        raise RecipeError(explain(error, above)) from error


def explain(error: ValidationError, above: str = "") -> str:
    """One line: field, value, what is allowed, and the nearest good value where there is one."""
    # A field that does not exist explains the one that is missing.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    kind, value, limits = first["type"], first.get("input"), first.get("ctx", {})
    name = (above + ".".join(str(part) for part in first["loc"])).rstrip(".") or "the recipe"
    if kind == "value_error":
        return f"{name}: {limits['error']}"
    if kind == "extra_forbidden":
        *way, wrong = map(str, first["loc"])
        fields = _fields_at(error.title, first["loc"][:-1])
        hint = _nearest(wrong, fields, above + "".join(f"{part}." for part in way)) or f"there are {_listed(fields)}"
        return f"there is no field {name!r}: {hint}"
    if kind == "missing":
        return f"{name} is missing"
    message = re.sub(r"^\w+ should ", "should ", first["msg"])
    if kind == "string_pattern_mismatch" and (described := _description(error.title, first["loc"])):
        message = f"is not of the form it needs ({described})"
    return f"{name} = {_shown(value)}: {message}{_nearest_value(kind, value, limits)}"


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
            "; " + hint if (hint := _nearest(str(value), re.findall(r"'([^']*)'", str(limits.get("expected"))))) else ""
        )
    good: float | None = next((limits[key] for key in ("ge", "le") if key in limits), None)
    if kind == "int_from_float" and isinstance(value, float):
        good = round(value)
    if "multiple_of" in limits and isinstance(value, (int, float)):
        good = max(round(value / limits["multiple_of"]), 1) * limits["multiple_of"]
    return "" if good is None else f"; the nearest good value is {good}"


def _nearest(wrong: str, known: Iterable[str], above: str = "", below: Sequence[str] = ()) -> str:
    found = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.5)
    return f"did you mean {'.'.join([above + found[0], *below])}?" if found else ""


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
