"""Train deep networks one gradient-isolated module at a time, from an activation cache on disk.

The public names; each is imported when it is first used, so that `import layerwise` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerwise.api import Trained, describe, open, train
    from layerwise.data.settings import DatasetSettings
    from layerwise.nets.encoder import Encoder
    from layerwise.nets.group_norm import group_norm
    from layerwise.nets.module import Encoded, Module
    from layerwise.nets.settings import NetworkSettings
    from layerwise.nets.split import split
    from layerwise.objectives.barlow_twins import BarlowTwins
    from layerwise.objectives.cross_entropy import CrossEntropy
    from layerwise.objectives.infonce import PatchInfoNCE
    from layerwise.objectives.nt_xent import NTXent
    from layerwise.objectives.objective import Context, Objective
    from layerwise.objectives.settings import ObjectiveSettings
    from layerwise.pipeline.caching import write_cache
    from layerwise.pipeline.export import load_encoder
    from layerwise.pipeline.frozen import load_frozen
    from layerwise.pipeline.module_cache import open_cache
    from layerwise.pipeline.probe import probe_module
    from layerwise.pipeline.run import Run, open_run
    from layerwise.pipeline.schedule import run_all, run_stage
    from layerwise.pipeline.setup import Setup
    from layerwise.recipe.loader import load_recipe
    from layerwise.recipe.optimisers import LARS, SGD, Adam, AdamW
    from layerwise.recipe.recipe import Recipe

__all__ = [
    "LARS",
    "SGD",
    "Adam",
    "AdamW",
    "BarlowTwins",
    "Context",
    "CrossEntropy",
    "DatasetSettings",
    "Encoded",
    "Encoder",
    "Module",
    "NTXent",
    "NetworkSettings",
    "Objective",
    "ObjectiveSettings",
    "PatchInfoNCE",
    "Recipe",
    "Run",
    "Setup",
    "Trained",
    "describe",
    "group_norm",
    "load_encoder",
    "load_frozen",
    "load_recipe",
    "open",
    "open_cache",
    "open_run",
    "probe_module",
    "run_all",
    "run_stage",
    "split",
    "train",
    "write_cache",
]

_HOMES = {
    "pipeline.caching": ("write_cache",),
    "pipeline.export": ("load_encoder",),
    "pipeline.frozen": ("load_frozen",),
    "pipeline.module_cache": ("open_cache",),
    "nets.encoder": ("Encoder",),
    "nets.group_norm": ("group_norm",),
    "nets.module": ("Encoded", "Module"),
    "nets.split": ("split",),
    "objectives.barlow_twins": ("BarlowTwins",),
    "objectives.cross_entropy": ("CrossEntropy",),
    "objectives.infonce": ("PatchInfoNCE",),
    "objectives.nt_xent": ("NTXent",),
    "objectives.objective": ("Context", "Objective"),
    "recipe.optimisers": ("LARS", "SGD", "Adam", "AdamW"),
    "pipeline.probe": ("probe_module",),
    "recipe": ("DatasetSettings", "NetworkSettings", "ObjectiveSettings", "Recipe"),
    "recipe.loader": ("load_recipe",),
    "pipeline.run": ("Run", "open_run"),
    "pipeline.schedule": ("run_all", "run_stage"),
    "pipeline.setup": ("Setup",),
    "api": ("Trained", "describe", "open", "train"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"layerwise.{home}"), name)
    raise AttributeError(f"module 'layerwise' has no attribute {name!r}")
