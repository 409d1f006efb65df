"""What others may rely on."""

from __future__ import annotations

import layerwise


def test_the_public_names():
    assert sorted(layerwise.__all__) == [
        "Adam",
        "AdamW",
        "BarlowTwins",
        "Context",
        "CrossEntropy",
        "DatasetSettings",
        "Encoded",
        "Encoder",
        "LARS",
        "Module",
        "NTXent",
        "NetworkSettings",
        "Objective",
        "ObjectiveSettings",
        "PatchInfoNCE",
        "Recipe",
        "Run",
        "SGD",
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
    assert all(getattr(layerwise, name).__module__.startswith("layerwise.") for name in layerwise.__all__)
