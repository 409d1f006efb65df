"""What a run has come to, as plain numbers: for reports, tables and machines."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from layerwise.errors import LayerwiseError
from layerwise.files.metrics import METRICS, Metrics, missing_epochs, read_metrics
from layerwise.files.records import RUN, read_record
from layerwise.memory import Samples
from layerwise.memory.timeline import timeline
from layerwise.nets.merged import Merged
from layerwise.pipeline.cache_report import describe_cache, read_speed
from layerwise.pipeline.frozen import stage_record
from layerwise.pipeline.module_cache import cached
from layerwise.pipeline.probe import probe_record
from layerwise.pipeline.run import Run
from layerwise.pipeline.setup import Setup
from layerwise.recipe.overrides import for_stage
from layerwise.training.threads import number_of


def collect(setup: Setup) -> dict[str, Any]:
    """Everything that the report shows.

    `stages`: a record a module, with its `curve` (a line an epoch: losses in nats) and the `lost_epochs` that it
    lacks because their lines are damaged. `trainings`: what each training
    cost, be it of one module or of several. `probes`: by module; `fixed_features`: those of features by hand.
    `caches`: bytes and layout. `recipe`: every setting.
    """
    run = setup.run
    stages = []
    for number in range(1, setup.depth + 1):
        record = stage_record(setup, number)
        if record is None:
            continue
        told = {name: value for name, value in record.items() if name != "made_from"}
        lost = missing_epochs(_metrics(run, record).epochs, record["epochs"])
        stages.append({"module": number, **told, "curve": curve(run, record, number), "lost_epochs": lost})
    numbers = [stage["module"] for stage in stages]
    trained = [number for number, own in enumerate(numbers, 1) if number == own]  # above a gap nothing counts
    caches = [describe_cache(setup, number) for number in trained if cached(setup, number)]
    parts = range(1, len(setup.holders) + 1)
    probes = [found for part in parts if (found := probe_record(setup, part)) is not None]
    features = setup.recipe.network.fixed_features()
    fixed = [found for name in features if (found := probe_record(setup, name)) is not None]
    return {
        "run": str(run.folder),
        "recipe": setup.recipe.model_dump(mode="json"),
        "dataset": {
            "sizes": setup.facts.sizes,
            "notes": setup.facts.notes,
            "sample_shape": list(setup.facts.sample_shape),
        },
        "machine": _machine(setup, stages),
        "command": read_record(run.folder / "run.json", RUN) or {"recipe": setup.recipe.name, "set": []},
        "modules": setup.module_facts,
        "stages": stages,
        "trainings": trainings(stages),
        "caches": caches,
        "probes": probes,
        "fixed_features": fixed,
    }


def for_report(setup: Setup) -> dict[str, Any]:
    """What `collect` finds, and what takes a moment to find: `memory` over one step, as `Timeline.as_json`, of the
    training that takes most (`stage`) and of end-to-end training (`end_to_end`), or the `problem` that there is none;
    how fast each cache is read; and the recipe's `defaults`, None for a recipe that was made in Python.
    """
    found = collect(setup)
    for cache in found["caches"]:
        cache["read_bytes_per_second"] = read_speed(setup, cache["module"])
    defaults = None if setup.origin is None else setup.origin.as_written.model_dump(mode="json")
    return {**found, "memory": _memory(setup, found["stages"]), "defaults": defaults}


def _memory(setup: Setup, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    known = [stage for stage in stages if (stage.get("peak") or {}).get("predicted") is not None]
    if not known:
        return None
    stage = max(known, key=lambda stage: int(stage["peak"]["predicted"]))
    numbers, peak = list(stage["trained_with"]), stage["peak"]
    recipe = setup.recipe if len(numbers) > 1 else for_stage(setup.recipe, numbers[0])
    way = {"micro_batch": peak.get("micro_batch"), "checkpointing": peak.get("checkpointing", False)}
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update=way)})
    samples = Samples(setup.facts.sample_shape, setup.facts.classes)
    host_apart = setup.device.type != "cpu"
    title = f"module {numbers[0]}" if len(numbers) == 1 else f"modules {numbers[0]}-{numbers[-1]} together"
    if way["micro_batch"] is not None:
        title += f", micro-batches of {way['micro_batch']}"
    try:
        ours = timeline(recipe, numbers, samples, host_apart=host_apart).as_json()
    except LayerwiseError as error:
        return {"title": title, "stage": None, "problem": str(error)}
    told = {"title": title, "stage": ours, "end_to_end": None}
    if isinstance(setup.recipe.network, Merged) or setup.depth == 1:
        return told
    with suppress(LayerwiseError):  # not every objective can be put on top of the whole network
        whole = setup.recipe.training.model_copy(update={"micro_batch": None, "checkpointing": False})
        merged = {"network": Merged(network=setup.recipe.network), "stages": {}, "training": whole}
        merged["schedule"] = "iterative"
        recipe = setup.recipe.model_copy(update=merged)
        told["end_to_end"] = timeline(recipe, [1], samples, host_apart=host_apart).as_json()
    return told


def curve(run: Run, record: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    """Epoch, step, and the losses of a module (nats), a line an epoch, from the log of the training it was part of."""
    position = record["trained_with"].index(number)
    return [
        {
            "epoch": line["epoch"],
            "step": line["step"],
            "loss": line["loss"][position],
            "validation_loss": line["validation_loss"][position],
        }
        for line in _metrics(run, record).epochs
        if line["epoch"] <= record["epochs"]  # where it is being trained on, there are more
    ]


def _metrics(run: Run, record: Mapping[str, Any]) -> Metrics:
    together = record["trained_with"]
    return read_metrics(run.training(together) / METRICS, len(together))


def trainings(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Time (seconds) and peak memory (bytes, measured or predicted, or None) of each training, in their order."""
    found = {}
    for stage in stages:
        together = stage["trained_with"]
        name = f"module {together[0]}" if len(together) == 1 else f"modules {together[0]}-{together[-1]}"
        bytes_, kind = peak_bytes(stage)
        cost = {"seconds": stage["seconds"], "steps": stage["steps"], "peak_bytes": bytes_, "peak_kind": kind}
        found[name] = {"title": name, "modules": together, **cost}
    return list(found.values())


def peak_bytes(stage: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """Most bytes in tensors at once, and whether that was measured or predicted."""
    peak = stage.get("peak") or {}
    for name, kind in (("allocated", "measured"), ("predicted", "predicted")):
        if peak.get(name) is not None:
            return int(peak[name]), kind
    return None, None


def _machine(setup: Setup, stages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    device = setup.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {_threads(stages)}"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def _threads(stages: Sequence[Mapping[str, Any]]) -> str:
    """What the modules were trained with."""
    now = torch.get_num_threads()
    numbers = sorted({stage.get("threads") or now for stage in stages} or {now})
    return number_of(numbers[0]) if len(numbers) == 1 else f"{' or '.join(map(str, numbers))} threads"
