"""The Python source that a file, a class or a function brings along: its own, and that of the local files it imports.

A file is local where it lies on the disk and belongs neither to Python, nor to an installed package, nor to layerwise.
Imports are read from the source; nothing is run. What the source does not show is not seen: modules that are imported
by a computed name, and data files.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FunctionType
from typing import Any

OURS = ("layerwise", "activation_cache")
INSTALLED = ("site-packages", "dist-packages")
RECIPE_MODULE = "layerwise_recipe_"
"""What the names of modules begin with that recipe files are executed as."""
JsonTree = Any


def local_files(path: Path, package: str = "") -> dict[str, Path]:
    """The file itself, under the name "", and by its name each local module that it imports, directly or through
    another.

    Args:
        package: that the file belongs to, for imports relative to it.
    """
    found: dict[str, Path] = {"": path}
    open_ends = [(path, package)]
    beside = path.parents[package.count(".") + 1 if package else 0]  # of the outermost package
    while open_ends:
        file, inside = open_ends.pop()
        for name in _imports(file, inside):
            for module, (origin, is_package) in _located(name, beside).items():
                if module not in found and is_local(origin):
                    found[module] = origin
                    open_ends.append((origin, module if is_package else module.rpartition(".")[0]))
    return {name: found[name] for name in sorted(found)}


def is_local(path: Path) -> bool:
    """Whether a module's file is neither Python's own nor that of an installed package."""
    return not (set(INSTALLED) & set(path.parts)) and not path.is_relative_to(Path(os.__file__).parent)


def _imports(path: Path, package: str) -> Iterator[str]:
    """The absolute names of all modules that a file may import: of `from a import b`, both `a` and `a.b`."""
    try:
        tree = ast.parse(path.read_bytes())
    except (ValueError, SyntaxError, RecursionError):  # an extension module; or nothing that Python would run
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level and not package:  # fails where it is run, too
                continue
            if node.level:
                above = package.split(".")[: max(len(package.split(".")) - node.level + 1, 0)]
                base = ".".join([*above, *([base] if base else [])])
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")


def _located(name: str, folder: Path) -> dict[str, tuple[Path, bool]]:
    """Of a module and the packages that it lies in: name to file, and whether it is a package."""
    parts = name.split(".")
    if parts[0] in sys.stdlib_module_names or parts[0] in OURS:
        return {}
    found: dict[str, tuple[Path, bool]] = {}
    search: Sequence[str] | None = None
    for count in range(1, len(parts) + 1):
        module = ".".join(parts[:count])
        spec = _spec(module, search)
        if spec is None and count == 1:  # a file beside the recipe
            spec = PathFinder.find_spec(module, [str(folder)])
        if spec is None:
            break
        locations = spec.submodule_search_locations
        if spec.has_location and spec.origin is not None:
            found[module] = Path(spec.origin).resolve(), locations is not None
        if locations is None:
            break
        search = list(getattr(locations, "_path", locations))  # a namespace package's asks for its imported parent
    return found


def _spec(name: str, search: Sequence[str] | None) -> Any:
    """Where an import would find a module; unlike importlib's own way, without importing the packages above it."""
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = None if find is None else find(name, search, None)
        if spec is not None:
            return spec
    return None


def digest(path: Path) -> str:
    """sha256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class NoSource(Exception):
    """The source of a class cannot be read; the message says of which, and why."""


def code_of(kind: type | FunctionType) -> str | None:
    """sha256 over the source of what a class or a function is made of, where that is not all from layerwise.

    For it and each class that it inherits from: the syntax of the whole file that defines it, and of the local files
    that this one imports; of an installed package, the defining file alone and the package's version. Comments,
    docstrings, formatting and the places of files do not count, nor does a statement `recipe = …`.

    Raises:
        NoSource: a class or a function was not defined in a file.
    """
    found: dict[str, str] = {}
    for base in kind.__mro__ if isinstance(kind, type) else (kind,):
        package = base.__module__.partition(".")[0]
        if package in OURS or package in sys.stdlib_module_names or package in ("pydantic", "torch"):
            continue
        module = sys.modules.get(base.__module__)
        file = getattr(module, "__file__", None)
        if file is None or not os.path.isfile(file):
            what = "class" if isinstance(kind, type) else "function"
            raise NoSource(f"the {what} {base.__qualname__} was not defined in a file")
        inside = getattr(module, "__package__", None) or ""
        if is_local(Path(file).resolve()):
            is_recipe = base.__module__.startswith(RECIPE_MODULE)
            root = "" if is_recipe or base.__module__ == "__main__" else base.__module__  # a recipe may be renamed
            for name, path in local_files(Path(file).resolve(), inside).items():
                found.setdefault(name or root, syntax(path, is_recipe=is_recipe and not name))
        else:
            found[base.__module__] = syntax(Path(file))
            with suppress(PackageNotFoundError):
                found[f"version of {package}"] = version(package)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() if found else None


def syntax(path: Path, *, is_recipe: bool = False) -> str:
    """sha256 of a file's syntax tree without comments and docstrings, and of a recipe file without the statements
    `recipe = …`; of the content where it is no Python.
    """
    try:
        tree = ast.parse(path.read_bytes())
        tree.body = [node for node in tree.body if not (is_recipe and _sets_recipe(node))]
        return hashlib.sha256(json.dumps(_tree(tree)).encode()).hexdigest()
    except (ValueError, SyntaxError, RecursionError):
        return digest(path)


def _sets_recipe(node: ast.stmt) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)] == ["recipe"]


def _tree(node: object) -> JsonTree:
    """The same for every version of Python, as ast.dump is not."""
    if isinstance(node, list):
        return [_tree(item) for item in node if not _is_docstring(item)]
    if not isinstance(node, ast.AST):
        return f"{type(node).__name__} {node!r}"
    fields = {name: value for name, value in ast.iter_fields(node) if name not in ("ctx", "kind", "type_comment")}
    return [type(node).__name__, {name: _tree(value) for name, value in fields.items() if value not in (None, [])}]


def _is_docstring(node: object) -> bool:
    """Of a module, class, function or field; or `pass`, which one may replace."""
    return (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) or isinstance(node, ast.Pass)
