"""Datasets by the name of a function that makes them: `package.module:function` or `FILE.py:function`.

The function takes nothing, and returns a map-style dataset to train on, or a mapping of them: "train", and if there are
any "validation", and the labelled "probe" (which classifiers learn from) and "test".
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import LayerwiseError, RecipeError
from layerwise.settings.sources import RECIPE_MODULE, digest, local_files

if TYPE_CHECKING:
    from layerwise.recipe.given import GivenData

SPLITS = ("train", "validation", "probe", "test")


def is_named_data(value: object) -> bool:
    """Whether a value for a recipe's `dataset` names a function."""
    return isinstance(value, str) and ":" in value


def function_named(override: str) -> str | None:
    """The function that an override such as `dataset=FILE.py:function` names, as `apply_overrides` reads it; None of
    any other override.
    """
    field, _, value = (part.strip() for part in override.partition("="))
    return value if field == "dataset" and is_named_data(value) else None


def named_data(name: str) -> GivenData:
    """The datasets that the function `name` returns. Importing its module runs it.

    Raises:
        RecipeError: there is no such function, it fails, or what it returns is no dataset; one line.
    """
    return _called(name, digest(source_of(name)))


def source_of(name: str) -> Path:
    """The file that defines the function, found without running anything.

    Raises:
        RecipeError: there is no such file.
    """
    return sources_of(name)[""]


def sources_of(name: str) -> dict[str, Path]:
    """The files that run when the function is called, found without running anything: under the name "" the one that
    defines it, and by their names the packages that it lies in and the local modules that these files import.

    Raises:
        RecipeError: there is no such file.
    """
    where, _, function = name.rpartition(":")
    if not function.isidentifier() or not where:
        raise RecipeError(
            f"the dataset {name!r} does not name a function: write package.module:function, or FILE.py:function"
        )
    if where.endswith(".py"):
        path = Path(where).absolute()
        if not path.is_file():
            raise RecipeError(f"the dataset {name!r}: there is no file {where!r}")
        return local_files(path)
    found: dict[str, Path] = {}
    folders: Sequence[str] | None = [*sys.path, os.getcwd()]  # the command's own path lacks the latter
    for depth in range(where.count(".") + 1):
        module = ".".join(where.split(".")[: depth + 1])
        spec = None if folders is None else PathFinder.find_spec(module, folders)
        if spec is None:
            raise RecipeError(
                f"the dataset {name!r}: there is no module {module!r} in {os.getcwd()} or among the installed packages"
            )
        folders, origin = spec.submodule_search_locations, spec.origin or ""
        if origin.endswith(".py"):
            package = module if folders is not None else module.rpartition(".")[0]
            files = local_files(Path(origin), package)
            found |= {imported or module: file for imported, file in files.items()}
    if not origin.endswith(".py"):
        raise RecipeError(f"the dataset {name!r}: {where!r} is no Python file")
    return {"": found.pop(where), **found}


@lru_cache(maxsize=8)
def _called(name: str, content: str) -> GivenData:
    """`content`: of the file, so that one that was edited is run again."""
    from layerwise.seeding import seeded

    where, _, function = name.rpartition(":")
    try:
        with seeded(0, "dataset"):
            return _of_splits(name, getattr(_imported(where, content), function)())
    except LayerwiseError:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"the dataset {name!r} could not be made: {type(error).__name__}: {reason}") from error


def _imported(where: str, content: str) -> Any:
    if not where.endswith(".py"):
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # last: what is installed goes first
        return importlib.import_module(where)
    path = Path(where).absolute()
    own_name = f"{RECIPE_MODULE}data_{content[:12]}"
    spec = importlib.util.spec_from_file_location(own_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[own_name] = module  # worker processes look classes up there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module


def _of_splits(name: str, made: Any) -> GivenData:
    from layerwise.recipe.given import GivenData

    splits = made if isinstance(made, Mapping) else {"train": made}
    if "train" not in splits or (unknown := [str(key) for key in splits if key not in SPLITS]):
        wrong = "has no 'train'" if "train" not in splits else f"has {', '.join(unknown)}"
        raise RecipeError(
            f"the dataset {name!r} {wrong}: return a dataset, or a dict of datasets by the names {', '.join(SPLITS)}"
        )
    for split, dataset in splits.items():
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise RecipeError(
                f"the dataset {name!r}: {split} is a {type(dataset).__name__}, and not a map-style dataset, which has "
                "a length and samples by number"
            )
    if ("probe" in splits) != ("test" in splits):
        raise RecipeError(
            f"the dataset {name!r}: give probe and test together: a classifier learns from one and is tested on the "
            "other"
        )
    data = GivenData.of(splits["train"], splits.get("validation"))
    return data.with_labelled(splits["probe"], splits["test"]) if "probe" in splits else data
