"""What a run has come to, as plain numbers: for reports, tables and machines."""

from __future__ import annotations

from typing import Any

import activation_cache
from layerwise.caching import cache_key, describe_cache
from layerwise.errors import NotReady
from layerwise.frozen import stage_record
from layerwise.run import read_lines
from layerwise.setup import Setup
from layerwise.storage import read_json


def collect(setup: Setup) -> dict[str, Any]:
    """Everything that the report shows.

    `stages`: a record a module, with its `curve` (a line an epoch: losses in nats). `probes`: by module. `caches`:
    bytes and layout. `recipe`: every setting.
    """
    run = setup.run
    stages = []
    for number in range(1, setup.depth + 1):
        record = stage_record(setup, number)
        if record is None:
            continue
        together = record["trained_with"]
        position = together.index(number)
        curve = [
            {
                "epoch": line["epoch"],
                "step": line["step"],
                "loss": line["loss"][position],
                "validation_loss": line["validation_loss"][position],
            }
            for line in read_lines(run.training(together) / "metrics.jsonl")
        ]
        stages.append(
            {"module": number, **{name: value for name, value in record.items() if name != "made_from"}, "curve": curve}
        )
    caches = [describe_cache(setup, number) for number in range(1, setup.depth + 1) if run.cache(number).exists()]
    probes = [found for number in range(1, setup.depth + 1) if (found := read_json(run.probe(number))) is not None]
    return {
        "run": str(run.folder),
        "recipe": setup.recipe.model_dump(mode="json"),
        "dataset": {
            "sizes": setup.facts.sizes,
            "notes": setup.facts.notes,
            "sample_shape": list(setup.facts.sample_shape),
        },
        "device": str(setup.device),
        "modules": setup.module_facts,
        "stages": stages,
        "caches": caches,
        "probes": probes,
    }


def status(setup: Setup) -> dict[str, Any]:
    """The state of each module: trained, training, stale (and why) or not yet; of its cache; its probe's accuracy."""
    modules = []
    for number in range(1, setup.depth + 1):
        modules.append(
            {
                "module": number,
                "stage": _stage_state(setup, number),
                "cache": _cache_state(setup, number),
                "probe": read_json(setup.run.probe(number)),
            }
        )
    return {"run": str(setup.run.folder), "recipe": setup.recipe.name, "modules": modules}


def _stage_state(setup: Setup, number: int) -> dict[str, Any]:
    try:
        record = stage_record(setup, number)
    except NotReady as error:
        return {"state": "stale", "reason": str(error)}
    if record is not None:
        return {"state": "trained", "epochs": record["epochs"], "seconds": record["seconds"]}
    checkpoint = read_json(setup.run.training([number]) / "checkpoint.json") or read_json(
        setup.run.training(list(range(1, setup.depth + 1))) / "checkpoint.json"
    )
    if checkpoint is not None:
        return {
            "state": "unfinished",
            "epochs": checkpoint["place"]["epoch"],
            "seconds": checkpoint["place"]["seconds"],
        }
    return {"state": "not trained"}


def _cache_state(setup: Setup, number: int) -> dict[str, Any]:
    try:
        found = activation_cache.inspect(setup.run.cache(number), cache_key(setup, number))
    except NotReady:
        found = activation_cache.inspect(setup.run.cache(number))
    return {"state": found.state, "reason": found.reason, "bytes": found.bytes}
