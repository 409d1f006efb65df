"""What left a run: an encoder, or representations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.render.tables import show, table
from layerwise.render.units import size

if TYPE_CHECKING:
    from layerwise.pipeline.embed import Embeddings
    from layerwise.pipeline.export import Exported


def export_json(exported: Exported) -> dict[str, Any]:
    return {
        "file": str(exported.file),
        "description": str(exported.description),
        "bytes": exported.file.stat().st_size,
        "needs": list(exported.needs),
        "difference": exported.difference,
        "loader": exported.loader,
        "about": exported.about,
    }


def show_export(exported: Exported) -> None:
    about = exported.about
    made = table(f"encoder through module {about['module']} of {about['recipe']}", "", "")
    made.columns[1].justify = "left"
    made.add_row("file", f"{exported.file} ({size(exported.file.stat().st_size)})")
    made.add_row("preprocessing", str(exported.description))
    made.add_row("inputs", _shape(about["inputs"]))
    made.add_row("representation", _shape(about["representation"]))
    made.add_row("needs", ", ".join(exported.needs))
    if exported.difference is not None:
        made.add_row("largest difference from the run's encoder", f"{exported.difference:.1e}")
    show(made)
    print(f"\nLoad it with:\n\n{exported.loader}")


def _shape(values: Mapping[str, Any]) -> str:
    return f"({', '.join(map(str, values['shape']))}) {values['dtype']}"


def embeddings_json(embeddings: Embeddings, file: Path) -> dict[str, Any]:
    shapes = {tuple(value.shape) for value in embeddings.values.values()}
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "module": embeddings.about["module"],
        "recipe": embeddings.about["recipe"],
        "samples": len(embeddings.values),
        "shape": list(shapes.pop()) if len(shapes) == 1 else None,
        "ids": list(embeddings.values),
    }


def show_embeddings(result: Mapping[str, Any]) -> None:
    made = table(f"module {result['module']} of {result['recipe']}", "", "")
    made.columns[1].justify = "left"
    made.add_row("samples", f"{result['samples']:,}")
    shape = result["shape"]
    made.add_row("shape of each", "they differ in length" if shape is None else "x".join(map(str, shape)))
    made.add_row("file", f"{result['file']} ({size(result['bytes'])})")
    show(made)
