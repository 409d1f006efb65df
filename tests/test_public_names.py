"""What others may rely on."""

from __future__ import annotations

import layerwise


def test_the_public_names():
    assert sorted(layerwise.__all__) == [
        "Context",
        "DatasetSettings",
        "Encoded",
        "Module",
        "NetworkSettings",
        "Objective",
        "ObjectiveSettings",
        "Recipe",
        "Run",
        "Setup",
        "load_frozen",
        "load_recipe",
        "open_cache",
        "open_run",
        "probe_module",
        "run_all",
        "run_stage",
        "split",
        "write_cache",
    ]
    assert all(getattr(layerwise, name).__module__.startswith("layerwise.") for name in layerwise.__all__)
