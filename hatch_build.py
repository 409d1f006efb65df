"""Ships `recipes/` inside the wheel, as `layerwise/_recipes`. An editable install reads the checkout's own."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ShipRecipes(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            build_data["force_include"]["recipes"] = "layerwise/_recipes"
