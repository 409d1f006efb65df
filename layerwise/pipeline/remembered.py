"""The recipe that a run follows, from the run's own files.

A run may come from a stranger, so the recipe file that it names is run only where the user named it on this machine.
Otherwise its settings are taken from the run's recipe.json, as long as layerwise has all their classes.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from layerwise.errors import DamagedData, RecipeError, UsageError
from layerwise.files.records import RECIPE, read_record
from layerwise.pipeline import trust
from layerwise.pipeline.run import IN_PYTHON, run_source
from layerwise.recipe.as_json import AS_WRITTEN, NeedsCode, rebuild
from layerwise.recipe.loader import read_recipe
from layerwise.recipe.named_data import function_named, sources_of
from layerwise.recipe.recipe import Recipe


def remembered_recipe(
    folder: Path, say: Callable[[str], None], asked: Sequence[str] = ()
) -> tuple[str, list[str], Recipe]:
    """Where the recipe of a run came from, the overrides that the run was last used with, and the recipe without them.

    Args:
        asked: overrides that are to follow; a dataset among them takes the place of the run's.

    Raises:
        NotReady: there is no run.
        UsageError: the recipe is a file that the user did not name on this machine, or that was edited since, and that
            is needed; the message says how to name it.
        DamagedData: the run's files are not what was written.
    """
    source, overrides = run_source(folder)
    if any(map(_is_dataset, asked)):
        overrides = [override for override in overrides if not _is_dataset(override)]
    _require_known_data(folder, overrides, say)
    if source == IN_PYTHON:
        return source, overrides, settings_in(folder)
    if not source.endswith(".py"):
        return source, overrides, read_recipe(source)
    altered = trust.changes(Path(source), say)
    if altered == []:
        return source, overrides, read_recipe(source)
    words = [f"--set={override}" for override in overrides]
    if altered is not None:
        raise UsageError(
            f"the recipe file of {folder} was edited since you named it ({', '.join(altered)}), so it is not run. "
            f"Name it again with: {trust.name_again(source, overrides, folder)}"
        )
    try:
        recipe = settings_in(folder)
    except NeedsCode as error:
        here = source if Path(source).is_file() else "PATH.py"
        raise UsageError(
            f"{folder} follows the recipe file {source!r}, which was not named on this machine, so it is not run, "
            f"and the run's recipe.json cannot replace it: {error}. If you trust the file, add to the command: "
            f"{shlex.join([f'--recipe={here}', *words])}"
        ) from error
    say(f"the recipe file {source!r} was not named on this machine: using the settings in {folder / 'recipe.json'}")
    return source, overrides, recipe


def _is_dataset(override: str) -> bool:
    return override.partition("=")[0].strip() == "dataset"


def _require_known_data(folder: Path, overrides: Sequence[str], say: Callable[[str], None]) -> None:
    """
    Raises:
        UsageError: the run's dataset is made by a function that was not named on this machine, or was edited since.
    """
    for name in filter(None, map(function_named, overrides)):
        try:
            sources = sources_of(name)
            altered = trust.changes(sources[""], say, sources)
        except RecipeError as error:
            raise UsageError(f"{folder} needs its dataset: {error}. Name it again with --data") from error
        if altered != []:
            why = "was not named on this machine" if altered is None else f"was edited ({', '.join(altered)})"
            raise UsageError(
                f"the dataset of {folder} comes from {name}, which {why}, so it is not run. If you trust it, add to "
                f"the command: {shlex.join(['--data', name])}"
            )


def settings_in(folder: Path) -> Recipe:
    """The recipe of a run as its recipe.json has it, which needs no code of the user's.

    Raises:
        NeedsCode: the run's recipe.json does not say all of it.
        DamagedData: it says what no recipe can be.
    """
    described = dict(read_record(folder / "recipe.json", RECIPE) or {}).get(AS_WRITTEN)
    if described is None:
        raise NeedsCode("the run was made by an earlier version")
    try:
        return rebuild(described)
    except DamagedData as error:
        raise DamagedData(f"{folder / 'recipe.json'} is damaged: {error}") from error
