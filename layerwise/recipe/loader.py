"""From a name or a path, and overrides, to a `Recipe`.

A recipe is Python, so loading one runs it: only those that are built in, and files that the user names by an
explicit path ending in `.py`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from layerwise.errors import RecipeError
from layerwise.recipe.overrides import IN_STAGES, apply_overrides, explain, for_stage, listed, nearest, shown
from layerwise.recipe.recipe import Recipe
from layerwise.settings.base import Settings
from layerwise.settings.choices import TOGETHER
from layerwise.settings.sources import RECIPE_MODULE, local_files


def recipes_folder() -> Path:
    """Where the built-in recipes lie: inside an installed package, else beside the checkout's."""
    package = Path(__file__).parents[1]
    shipped = package / "_recipes"
    return shipped if shipped.is_dir() else package.parent / "recipes"


def built_in() -> dict[str, Path]:
    """Name to file, sorted."""
    return {path.stem: path for path in sorted(recipes_folder().glob("[a-z]*.py"))}


def summary(path: Path) -> str:
    """First line of a recipe's docstring, read without running it."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe named or at the path `source` as it is trained: with `key=value` overrides, its scale and its
    method applied.

    Raises:
        RecipeError: no such recipe, field or value, or one that would have no effect; one line that names the nearest
            good one.
    """
    recipe = resolve_recipe(source, overrides)
    require_heeded(recipe)
    return recipe


def read_recipe(source: str) -> Recipe:
    """Read the recipe as its file gives it, before overrides, scale and method.

    Raises:
        RecipeError: there is no such recipe.
    """
    return _execute(find_recipe(source))


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


def as_trained(recipe: Recipe) -> Recipe:
    """The recipe with its scale and its method applied, if they are not yet, as in one that was made in Python."""
    from layerwise.recipe.methods import is_by_its_method, with_method
    from layerwise.recipe.scale import is_scaled, with_scale

    if not is_scaled(recipe):
        recipe = with_scale(recipe, recipe.scale)
    return recipe if is_by_its_method(recipe) else with_method(recipe, recipe.method)


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
    from layerwise.nets.merged import Merged

    together, noise = recipe.schedule in TOGETHER, recipe.training.noise
    if noise > 0 and (isinstance(recipe.network, Merged) or recipe.method == "random"):
        how = "trains nothing" if recipe.method == "random" else "trains the network end to end, as one module"
        raise RecipeError(
            f"training.noise = {noise:g} would have no effect: it is added to the inputs of modules that train on "
            f"frozen ones, and the method {recipe.method} {how}. Choose --method gim, or leave it at --set "
            f"training.noise=0"
        )
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
    for number, own in recipe.stages.items():
        if together and "training" in own and (recipe.together is None or number <= recipe.together):
            field = next(iter(own["training"]), "epochs")
            raise RecipeError(
                f"stages.{number}.training.{field} would have no effect: module {number} is trained together with "
                f"others, in the same steps. Set it for all with --set training.{field}=…, train one after another "
                f"with --schedule iterative, or take it back with --set stages.{number}.training=null"
            )
        if number == 1 and own.get("training", {}).get("noise"):
            raise RecipeError(
                "stages.1.training.noise would have no effect: it is added to the inputs of modules trained on frozen "
                "ones. Take it back with --set stages.1.training.noise=0"
            )
    if together and recipe.together is None and noise > 0:
        raise RecipeError(
            f"training.noise = {noise:g} would have no effect: it is added to the inputs of modules that train on "
            f"frozen ones, and these are all trained together. Train one after another with "
            "--schedule iterative, or leave it at --set training.noise=0"
        )


def _by_method(source: str | Recipe, overrides: Sequence[str]) -> tuple[Recipe, list[str], dict[str, str]]:
    """The recipe as its method leaves it, the overrides that are still to be applied to what the method brought, and
    those that reach nothing, each with the reason.
    """
    from layerwise.recipe.methods import with_method
    from layerwise.recipe.scale import with_scale

    asked = read_recipe(source) if isinstance(source, str) else source
    if (asked.method, asked.scale) != ("gim", 1) and as_trained(asked) is asked:
        return _of_trained(asked, overrides), [], {}
    paths = {override: override.partition("=")[0].strip().split(".") for override in overrides}
    first = [override for override in overrides if _has_field(asked, paths[override])]
    asked = apply_overrides(asked, first)
    asked = with_scale(asked, asked.scale)
    trained = with_method(asked, asked.method)
    later, lost = [], {}
    for override in overrides:
        path, replaced = paths[override], trained.objective is not asked.objective
        alone = path[0] == "stages" and path[2:] != [] and path[1].isdecimal()
        field = path[2:] if alone else path
        if override in first and _survives(asked, trained, path):
            continue
        reached = not alone or int(path[1]) in trained.stages
        if override not in first or (field[:1] == ["objective"] and replaced and reached and _has_field(trained, path)):
            later.append(override)
        elif not reached:
            lost[override] = f"the method {trained.method} has no settings for single modules"
        elif field[:1] == ["objective"]:
            kinds = type(asked.objective).__name__, type(trained.objective).__name__
            lost[override] = f"the method {trained.method} replaces the objective {kinds[0]} by {kinds[1]}"
        else:
            sets = shown(_value_at(trained, path))
            lost[override] = f"the method {trained.method} sets {'.'.join(path)} to {sets}"
    return trained, later, lost


def _of_trained(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """
    Raises:
        RecipeError: an override would change the method or the scale, which were applied when the recipe was made.
    """
    changed = apply_overrides(recipe, overrides)
    for field in ("method", "scale"):
        if getattr(changed, field) != getattr(recipe, field):
            raise RecipeError(
                f"{field} is {getattr(recipe, field)} already, applied where this recipe was made in Python: it "
                "cannot be changed afterwards. Change it there, for a run of its own"
            )
    return changed


def _survives(asked: Any, trained: Any, path: Sequence[str]) -> bool:
    """Whether the field that was asked for is still there: where it was, or inside settings that were put around it."""
    if asked == trained:
        return True
    if isinstance(asked, Recipe) and path[0] == "stages":
        return path[2:3] == [] or path[2] in trained.stages.get(int(path[1]), {})
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
    if isinstance(settings, Recipe) and field == "stages" and rest:
        number, *inside = rest
        if not number.isdecimal() or (inside and inside[0] not in IN_STAGES):
            return False
        return _has_field(for_stage(settings, int(number)), inside)
    if isinstance(settings, tuple):
        return field in map(str, range(len(settings))) and _has_field(settings[int(field)], rest)
    if isinstance(settings, dict):
        return not rest
    known = isinstance(settings, Settings) and field in type(settings).model_fields
    return known and _has_field(getattr(settings, field), rest)


def find_recipe(source: str) -> Path:
    known = built_in()
    if source in known:
        return known[source]
    if not source.endswith(".py"):
        raise RecipeError(
            f"there is no recipe {source!r}: {nearest(source, known) or f'there are {listed(known)}.'} "
            "To use your own recipe, give a path that ends in .py"
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
    from layerwise.seeding import seeded

    name = f"{RECIPE_MODULE}{re.sub(r'[^A-Za-z0-9]', '_', path.stem)}_{place}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: its own classes look themselves up there
    _import_helpers_anew(path)
    try:
        # Weights that a recipe draws are the same each time; and bytecode may be that of an edit a moment ago.
        with seeded(0, "recipe"), _no_bytecode():
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
        with suppress(ValueError):
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
