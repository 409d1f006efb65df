"""The state of a training between two steps: written whole, checked when read.

`checkpoint.json` is the record: it names the files of tensors and their hashes, and is replaced last. Files that no
record names any more are removed afterwards, so that a kill at any moment leaves a record whose files are all there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import NotReady
from layerwise.recipe import differences
from layerwise.step import Learner
from layerwise.storage import flush_directory, load_tensors, read_json, save_tensors, write_json

RECORD = "checkpoint.json"
LENGTH_ONLY = "training.epochs: "
"""How long a training lasts at most: it may change in its middle, to what has not passed yet."""


def save_checkpoint(
    folder: Path,
    learners: Sequence[Learner],
    made_from: Mapping[str, Any],
    place: Mapping[str, Any],
    *,
    best: bool = False,
) -> None:
    """Replace the checkpoint; with `best`, these weights are also those that freezing will take."""
    record = read_json(folder / RECORD) or {}
    # Every place has a name of its own: the file that the standing record names is never written over.
    name = f"checkpoint-{place['step']}-{place['epoch']}.safetensors"
    files = {"latest": {"file": name, "sha256": save_tensors(folder / name, _state(learners))}}
    files["best"] = files["latest"] if best else record.get("files", {}).get("best", files["latest"])
    write_json(folder / RECORD, {"made_from": made_from, "place": place, "files": files})
    kept = {entry["file"] for entry in files.values()}
    for path in folder.glob("checkpoint-*.safetensors"):
        if path.name not in kept:
            path.unlink(missing_ok=True)


def load_checkpoint(
    folder: Path, learners: Sequence[Learner], made_from: Mapping[str, Any], *, best: bool = False
) -> dict[str, Any] | None:
    """Put the saved state into the learners and return the place, or None where there is no checkpoint.

    Raises:
        NotReady: the checkpoint was made with other settings.
        DamagedData: a file is not what was written.
    """
    record = read_json(folder / RECORD)
    if record is None:
        return None
    changed = [line for line in differences(record["made_from"], made_from) if not line.startswith(LENGTH_ONLY)]
    if changed:
        raise NotReady(
            f"{folder} holds an unfinished training with other settings ({'; '.join(changed[:5])}). "
            "Go back to those settings, choose another --run-dir, or add --fresh to begin again."
        )
    place: dict[str, Any] = record["place"]
    asked = made_from.get("training", {}).get("epochs")
    if asked is not None and not best and place["epoch"] + (place["batch"] > 0) > asked:
        raise NotReady(
            f"{folder} holds a training that is in epoch {place['epoch'] + (place['batch'] > 0)} already, and "
            f"training.epochs is {asked}: ask for more, choose another --run-dir, or add --fresh to begin again."
        )
    entry = record["files"]["best" if best else "latest"]
    _restore(learners, load_tensors(folder / entry["file"], entry["sha256"]))
    return place


def drop_checkpoint(folder: Path) -> None:
    (folder / RECORD).unlink(missing_ok=True)
    for path in folder.glob("checkpoint-*.safetensors"):
        path.unlink()
    if folder.exists():
        flush_directory(folder)


def _state(learners: Sequence[Learner]) -> dict[str, Tensor]:
    tensors = {}
    for learner in learners:
        for part in ("module", "objective"):
            for name, tensor in getattr(learner, part).state_dict().items():
                tensors[f"{learner.number}.{part}.{name}"] = tensor
        for index, values in learner.optimiser.state_dict()["state"].items():
            for name, value in values.items():
                tensors[f"{learner.number}.optimiser.{index}.{name}"] = torch.as_tensor(value)
    return tensors


def _restore(learners: Sequence[Learner], tensors: Mapping[str, Tensor]) -> None:
    for learner in learners:
        for part in ("module", "objective"):
            prefix = f"{learner.number}.{part}."
            getattr(learner, part).load_state_dict(
                {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            )
        prefix = f"{learner.number}.optimiser."
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                index, field = name.removeprefix(prefix).split(".")
                state.setdefault(int(index), {})[field] = tensor
        learner.optimiser.load_state_dict(
            {"state": state, "param_groups": learner.optimiser.state_dict()["param_groups"]}
        )
