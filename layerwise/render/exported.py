"""What left a run: an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerwise.render.tables import show, table
from layerwise.render.units import size

if TYPE_CHECKING:
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
