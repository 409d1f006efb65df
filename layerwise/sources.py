"""The Python source that a file or a class brings along: its own, and that of the local files that it imports.

A file is local where it lies on the disk and belongs neither to Python, nor to an installed package, nor to layerwise.
Imports are read from the source; nothing is run. What the source does not show is not seen: modules that are imported
by a computed name, and data files.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

OURS = ("layerwise", "activation_cache")
INSTALLED = ("site-packages", "dist-packages")


def local_files(path: Path, package: str = "") -> dict[str, Path]:
    """The file itself, under the name "", and by its name each local module that it imports, directly or through
    another.

    Args:
        package: that the file belongs to, for imports relative to it.
    """
    found: dict[str, Path] = {"": path}
    open_ends = [(path, package)]
    while open_ends:
        file, inside = open_ends.pop()
        for name in _imports(file, inside):
            for module, (origin, is_package) in _located(name, path.parent).items():
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
