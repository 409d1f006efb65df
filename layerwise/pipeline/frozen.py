"""Frozen modules: what they were made from, and whether that still holds.

A stage is finished when `stage.json` stands beside its weights. It records every setting and input that could have
changed a bit of them, so that a stage made otherwise is never mistaken for the one that the recipe asks for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch

import activation_cache
from activation_cache import SHUFFLED_TOGETHER, SplitSpec, Storage, shuffled_in_windows
from layerwise.errors import DamagedData, NotReady
from layerwise.files.made_from import stage_made_from
from layerwise.files.records import CHECKPOINT, STAGE, StageRecord, read_record
from layerwise.files.storage import write_json
from layerwise.files.tensors import load_tensors, save_tensors, weights_digest
from layerwise.nets.module import Module
from layerwise.pipeline.rolling import read_rolling
from layerwise.pipeline.setup import Setup
from layerwise.recipe.overrides import IN_STAGES, TRAINING_IN_STAGES, for_stage
from layerwise.recipe.recipe import Recipe
from layerwise.settings.identity import changes, changes_within, differences
from layerwise.settings.training import Optimiser
from layerwise.training.checkpoint import RECORD as CHECKPOINT_FILE
from layerwise.training.checkpoint import has_checkpoint
from layerwise.training.step import Learner
from layerwise.training.threads import set_by_user, threads_restored

FORMAT = 1
Work = TypeVar("Work", bound=Callable[..., Any])


def stage_identity(setup: Setup, number: int) -> dict[str, Any]:
    """Everything that can change the bits of a stage's weights.

    Modules that are trained together are one stage, identified by the last of them.

    Raises:
        NotReady: a module below is not frozen.
    """
    part, below = stage_part(setup, number), setup.group(number)[0] - 1
    if "inputs" not in part:
        return part
    rolling = read_rolling(setup, below) if setup.recipe.feed == "cache" else None
    return stage_made_from(part, frozen_digests(setup, below), None if rolling is None else rolling.identity)


def stage_part(setup: Setup, number: int) -> dict[str, Any]:
    """The recipe's part of `stage_identity`."""
    group = setup.group(number)
    recipe = setup.recipe if len(group) > 1 else for_stage(setup.recipe, number)
    number, manifest = group[-1], setup.facts.manifest
    identity: dict[str, Any] = {
        "format": FORMAT,
        "schedule": _schedule(recipe) if group[0] == 1 else "iterative",
        "module": number,
        "seed": recipe.seed,
        "dataset": recipe.dataset.identity(of_stages=True),
        "manifest": {split: manifest[split] for split in ("train", "validation")},
        "network": recipe.network.through(number),
        "objective": recipe.objective.identity(),
        "optimiser": _identity_of(recipe, "optimiser"),
        "training": recipe.training.identity(),
    }
    if own := {str(one): differing for one in group if (differing := _own_settings(recipe, one))}:
        identity["stages"] = own
    if group[0] > 1:
        # A float32 cache and the modules themselves give the same bits in the same order, so it does not matter which
        # of the two feeds the stage; but for small compressed samples, which the cache shuffles in windows.
        stored = recipe.cache.dtype if recipe.feed == "cache" else "float32"
        identity["inputs"] = {"views": recipe.stored_views("train"), "dtype": stored}
        if recipe.feed == "cache" and _in_windows(setup, number - 1):
            identity["inputs"]["order"] = "in windows"
    return identity


def _schedule(recipe: Recipe) -> str:
    """The schedule of the first modules; a pipeline gives the numbers of training them together in one process."""
    return "simultaneous" if recipe.schedule == "pipelined" else recipe.schedule


def _own_settings(recipe: Recipe, number: int) -> dict[str, Any]:
    """What is not the same for a module as for those that it is trained together with."""
    one = for_stage(recipe, number)
    groups = ((name, _identity_of(recipe, name), _identity_of(one, name)) for name in IN_STAGES)
    return {name: alone for name, common, alone in groups if alone != common}


def _identity_of(recipe: Recipe, group: str) -> dict[str, Any]:
    """Of a group of settings; of the optimiser, with the epochs over which its learning rate falls."""
    settings = getattr(recipe, group)
    if isinstance(settings, Optimiser):
        settings = settings.lasting(recipe.training.epochs)
    found: dict[str, Any] = settings.identity()
    return found


def _in_windows(setup: Setup, number: int) -> bool:
    """Whether the training samples in module `number`'s cache are shuffled in windows of chunks."""
    cache, samples = setup.recipe.cache, setup.facts.sizes["train"]
    if cache.codec == "none" or samples <= SHUFFLED_TOGETHER:  # there cannot be more chunks than that
        return False
    spec = SplitSpec("train", samples, setup.output_shapes[number - 1])
    return shuffled_in_windows(spec, Storage(cache.dtype, cache.codec))


def freeze(setup: Setup, learner: Learner, made_from: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
    """Write a module's weights, then the record that makes them count."""
    folder = setup.run.stage(learner.number)
    sha256 = save_tensors(folder / "module.safetensors", learner.module.state_dict())
    record = {"made_from": made_from, "sha256": sha256, "weights": weights_digest(learner.module), **outcome}
    write_json(folder / "stage.json", record)


def stage_record(setup: Setup, number: int) -> dict[str, Any] | None:
    """The record of a finished stage, or None.

    Raises:
        NotReady: the stage was made with other settings or inputs; the message says which.
    """
    record = _read_stage(setup, number)
    if record is None:
        return None
    identity = stage_identity(setup, number)
    if changed := differences(record["made_from"], identity):
        again = f"train it again with: {setup.command(f'stage {number} --fresh')}"
        if _can_go_on(setup, record, identity):
            again = f"resume it with: {setup.command(f'stage {number}')}"
        raise NotReady(
            f"stage {number} of {setup.run.folder} was trained with other settings ({'; '.join(changed[:5])}). "
            f"Go back to those settings, choose another --run-dir, or {again}"
        )
    return {**record}


def _can_go_on(setup: Setup, record: StageRecord, identity: Mapping[str, Any]) -> bool:
    """Whether a stage that was made from something else has all that it takes to become one of this identity."""
    if changes_within(record["made_from"], identity):
        return False
    return has_checkpoint(setup.run.training(record["trained_with"])) or record["epochs"] == 0


def _read_stage(setup: Setup, number: int) -> StageRecord | None:
    path = setup.run.stage(number) / "stage.json"
    record = read_record(path, STAGE)
    if record is not None and number not in record["trained_with"]:
        raise DamagedData(
            f"{path} is damaged: it is of the modules {record['trained_with']}. Delete it, and the command repeats "
            f"that part."
        )
    return record


def trained_inputs(setup: Setup, number: int) -> dict[str, Any] | None:
    """The inputs in the identity of a stage above the first, finished or begun; None where it was not begun."""
    made = _read_stage(setup, number) or read_record(setup.run.training((number,)) / CHECKPOINT_FILE, CHECKPOINT)
    inputs = None if made is None else made["made_from"].get("inputs")
    return inputs if isinstance(inputs, dict) else None


@contextmanager
def threads_of(setup: Setup, number: int) -> Iterator[None]:
    """Compute on a CPU with as many threads as module `number` was trained with, unless the user set their number."""
    record = _read_stage(setup, number)
    recorded = None if record is None else record.get("threads")
    with threads_restored():
        if recorded is not None and setup.measure_threads and setup.device.type == "cpu" and set_by_user() is None:
            torch.set_num_threads(recorded)
        yield


def with_its_threads(work: Work) -> Work:
    """Have `work(setup, number)` run within `threads_of` the module."""

    @wraps(work)
    def wrapped(setup: Setup, number: int, *rest: Any, **named: Any) -> Any:
        with threads_of(setup, number):
            return work(setup, number, *rest, **named)

    return wrapped  # type: ignore[return-value]


def missing_weights(setup: Setup, number: int) -> str | None:
    """What to say of a finished stage whose weights are not beside its record; None where they are."""
    path = setup.run.stage(number) / "module.safetensors"
    if path.is_file():
        return None
    again = setup.command(f"stage {number} --fresh")
    return f"{path} is missing: restore it, or train the module again with: {again}"


def finished(setup: Setup, number: int) -> dict[str, Any] | None:
    """The record of a finished stage; None also where it is to be trained for another number of epochs.

    Raises:
        NotReady: it was made with other settings or inputs.
        DamagedData: its weights are missing.
    """
    found = _read_stage(setup, number)
    if found is not None:
        identity = stage_identity(setup, number)
        if found["made_from"] != identity and _can_go_on(setup, found, identity):
            return None
    record = stage_record(setup, number)
    if record is not None and (missing := missing_weights(setup, number)) is not None:
        raise DamagedData(missing)
    return record


def require_stage(setup: Setup, number: int) -> dict[str, Any]:
    """
    Raises:
        NotReady: the stage is not finished, or not with these settings.
    """
    setup.require_module(number)
    record = stage_record(setup, number)
    if record is None:
        raise _not_trained(setup, number)
    return record


def _not_trained(setup: Setup, number: int) -> NotReady:
    return NotReady(f"module {number} is not trained yet. Run: {setup.command(f'stage {number}')}")


def meant_for_one(setup: Setup, number: int) -> list[str]:
    """Overrides by which module `number` alone gets the settings that the modules below it were not trained with; none
    where that would not be all that has changed.
    """
    found: dict[str, str] = {}
    for below in range(1, number):
        record = _read_stage(setup, below)
        if record is None:
            return []
        for name, old, new in changes(record["made_from"], stage_identity(setup, below)):
            group, _, field = name.partition(".")
            single = group in ("objective", "optimiser") or (group == "training" and field in TRAINING_IN_STAGES)
            if not single or name.endswith((".kind", ".code")):
                return []
            if found.setdefault(name, json.dumps(old)) != json.dumps(old):
                return []
            found[f"stages.{number}.{name}"] = json.dumps(new)
    return [f"{name}={value}" for name, value in found.items()]


def require_stages(setup: Setup, number: int) -> None:
    """Modules 1 to `number` are frozen as the recipe asks for them, or NotReady."""
    for below in range(1, number + 1):
        require_stage(setup, below)


def frozen_digests(setup: Setup, number: int) -> list[str]:
    """sha256 of the weights of modules 1 to `number`, as recorded."""
    records = [_read_stage(setup, below) for below in range(1, number + 1)]
    for below, record in enumerate(records, 1):
        if record is None:
            raise _not_trained(setup, below)
    return [record["weights"] for record in records if record is not None]


def frozen_weights(setup: Setup, numbers: Sequence[int]) -> list[str] | None:
    """sha256 of the weights of these modules, as recorded; None where one of them is not frozen."""
    records = [_read_stage(setup, number) for number in numbers]
    found = [record["weights"] for record in records if record is not None]
    return found if len(found) == len(records) else None


def to_make_again(setup: Setup, number: int) -> list[str]:
    """The commands that make again what there is of the caches and stages that rest on module `number`, in order."""
    found = []
    for group in setup.recipe.groups(setup.depth):
        if group[0] > number and _read_stage(setup, group[-1]) is not None:
            found.append(setup.command(f"stage {group[0]} --fresh"))
        if group[-1] >= number and activation_cache.inspect(setup.run.cache(group[-1])).state != "absent":
            found.append(setup.command(f"cache --module {group[-1]}"))
    return found


def load_frozen(setup: Setup, number: int) -> list[Module]:
    """Modules 1 to `number`, frozen, on the device.

    Raises:
        NotReady: one of them is not finished.
        DamagedData: a file of weights is not what was written.
    """
    modules = setup.untrained()[:number]
    for below, module in enumerate(modules, 1):
        record = require_stage(setup, below)
        path = setup.run.stage(below) / "module.safetensors"
        module.load_state_dict(load_tensors(path, record["sha256"], module.state_dict()))
        module.to(setup.device).eval().requires_grad_(False)
    return modules
