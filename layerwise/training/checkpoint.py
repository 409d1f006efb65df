"""The state of a training between two steps: written whole, checked when read; of a finished one too, to train it on.

`checkpoint.json` is the record: it names the files of tensors and their hashes, and is replaced last. Files that no
record names any more are removed afterwards, so that a kill at any moment leaves a record whose files are all there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from layerwise.errors import DamagedData, NotReady
from layerwise.files.records import CHECKPOINT, TensorsRecord, read_record
from layerwise.files.run_files import TENSORS, is_folder
from layerwise.files.storage import flush_directory, remove_file, write_json
from layerwise.files.tensors import load_tensors, save_tensors
from layerwise.settings.base import MOST_UPDATES
from layerwise.settings.identity import changes_within
from layerwise.training.optimisers import state_forms
from layerwise.training.step import Learner

RECORD = "checkpoint.json"
NOTHING: Mapping[str, Tensor] = {}


def save_checkpoint(
    folder: Path,
    learners: Sequence[Learner],
    made_from: Mapping[str, Any],
    place: Mapping[str, Any],
    *,
    best: bool = False,
    others: Mapping[str, Tensor] = NOTHING,
) -> None:
    """Replace the checkpoint; with `best`, these weights are also those that freezing will take.

    Args:
        others: `state` of the learners that other processes train.
    """
    record = read_record(folder / RECORD, CHECKPOINT)
    # Every place has a name of its own: the file that the standing record names is never written over.
    name = f"checkpoint-{place['step']}-{place['epoch']}.safetensors"
    latest: TensorsRecord = {"file": name, "sha256": save_tensors(folder / name, {**state(learners), **others})}
    files = {"latest": latest, "best": latest if best or record is None else record["files"]["best"]}
    write_json(folder / RECORD, {"made_from": made_from, "place": place, "files": files})
    _drop_tensors(folder, {entry["file"] for entry in files.values()})


def _drop_tensors(folder: Path, kept: Collection[str] = ()) -> None:
    """Remove the tensors that no record names any more."""
    if is_folder(folder):
        for name in os.listdir(folder):
            if TENSORS.fullmatch(name) and name not in kept:
                remove_file(folder / name)


def load_checkpoint(
    folder: Path,
    learners: Sequence[Learner],
    made_from: Mapping[str, Any],
    *,
    best: bool = False,
    others: Sequence[Learner] = (),
) -> dict[str, Any] | None:
    """Put the saved state into the learners and return the place, or None where there is no checkpoint.

    Args:
        others: learners that other processes train, of whose state only the names and forms are checked.

    Raises:
        NotReady: the checkpoint was made with other settings.
        DamagedData: a file is not what was written.
    """
    record = read_record(folder / RECORD, CHECKPOINT)
    if record is None:
        return None
    if changed := changes_within(record["made_from"], made_from):
        raise NotReady(
            f"{folder} contains a training with other settings ({'; '.join(changed[:5])}). "
            "Go back to those settings, choose another --run-dir, or add --fresh to start over."
        )
    place = record["place"]
    count = len(learners) + len(others)
    if len(place["sums"]) not in (0, count):
        raise DamagedData(
            f"{folder / RECORD} is damaged: it holds the losses of {len(place['sums'])} modules, and {count} are "
            "trained. Delete it to train again."
        )
    asked = made_from.get("training", {}).get("epochs")
    if asked is not None and not best and place["epoch"] + (place["batch"] > 0) > asked:
        raise NotReady(
            f"{folder} contains a training that has reached epoch {place['epoch'] + (place['batch'] > 0)} already, and "
            f"training.epochs is {asked}: ask for more, choose another --run-dir, or add --fresh to start over."
        )
    entry = record["files"]["best"] if best else record["files"]["latest"]
    _restore(learners, others, folder / entry["file"], entry["sha256"])
    return {**place}


def has_checkpoint(folder: Path) -> bool:
    """
    Raises:
        DamagedData: its record is not what was written.
    """
    return read_record(folder / RECORD, CHECKPOINT) is not None


def keep_checkpoint(folder: Path, learners: Sequence[Learner], *, best: bool) -> int:
    """Reduce the checkpoint of a finished training to what training it on takes; returns its bytes.

    That is the latest state and, with `best`, the best weights, which the learners hold now; not the optimiser's state
    beside those.
    """
    record = read_record(folder / RECORD, CHECKPOINT)
    if record is None:
        return 0
    files = record["files"]
    if not best:
        files["best"] = files["latest"]
    elif files["best"]["file"] != files["latest"]["file"]:
        name = f"checkpoint-0-{record['place']['best_epoch']}.safetensors"  # no whole state has the step 0 and an epoch
        files["best"] = {"file": name, "sha256": save_tensors(folder / name, _weights(learners))}
    write_json(folder / RECORD, record)
    kept = {entry["file"] for entry in (files["latest"], files["best"])}
    _drop_tensors(folder, kept)
    return sum((folder / name).stat().st_size for name in kept)


def drop_checkpoint(folder: Path) -> None:
    """Remove the record, then the tensors that it names."""
    remove_file(folder / RECORD)
    _drop_tensors(folder)
    if is_folder(folder):
        flush_directory(folder)


def _weights(learners: Sequence[Learner]) -> dict[str, Tensor]:
    return {
        f"{learner.number}.{part}.{name}": tensor
        for learner in learners
        for part in ("module", "objective")
        for name, tensor in getattr(learner, part).state_dict().items()
    }


def state(learners: Sequence[Learner]) -> dict[str, Tensor]:
    """All that a checkpoint holds of learners: weights, buffers, and what their optimisers keep."""
    tensors = _weights(learners)
    for learner in learners:
        for index, values in learner.optimiser.state_dict()["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):  # a state that is switched off may be None
                    tensors[f"{learner.number}.optimiser.{index}.{name}"] = value
    return tensors


def _restore(learners: Sequence[Learner], others: Sequence[Learner], path: Path, sha256: str) -> None:
    forms = {learner.number: state_forms(learner.optimiser) for learner in (*learners, *others)}
    kept = {
        f"{number}.optimiser.{index}.{name}": form
        for number, of_weights in forms.items()
        for index, fields in of_weights.items()
        for name, form in fields.items()
    }
    tensors = load_tensors(path, sha256, _weights((*learners, *others)), kept)
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
        expected = forms[learner.number]
        if any(fields.keys() != expected[index].keys() or not _possible(fields) for index, fields in state.items()):
            raise DamagedData(f"{path} is not the state of an optimiser. Delete its folder to train it again.")
        learner.optimiser.load_state_dict(
            {"state": state, "param_groups": learner.optimiser.state_dict()["param_groups"]}
        )


def _possible(fields: Mapping[str, Tensor]) -> bool:
    """Whether the single numbers that an optimiser keeps of a weight can be what it counted."""
    scalars = {name: tensor.item() for name, tensor in fields.items() if tensor.ndim == 0 and tensor.numel() == 1}
    steps = scalars.get("step", 0)
    return all(map(math.isfinite, scalars.values())) and 0 <= steps < MOST_UPDATES
