"""metrics.jsonl: how the losses of a training went, a sealed line an epoch.

Nothing but the curves of a report is made from it. So a line that is damaged costs a point of a curve, and never ends
a training.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from activation_cache.store.files import open_regular
from layerwise.files.records import EPOCH, EpochRecord
from layerwise.files.storage import SEAL, parse_json, raise_unwritten, read_file, write_file

METRICS = "metrics.jsonl"
METRICS_BYTES = 16 << 20
"""The most that is read of one such file, bytes: a hundred thousand epochs."""
MOST_DAMAGED = 1000
"""Damaged lines after which the others are not looked at."""


@dataclass(frozen=True)
class Metrics:
    """What a file of metrics holds."""

    epochs: list[EpochRecord]
    """Of the lines that are intact, in their order."""
    damaged: list[int]
    """The numbers, from 1, of the lines that are not what was written."""
    torn: bool = False
    """Whether a last line has no end, as after a kill in the middle of writing it."""


def read_metrics(path: Path, modules: int) -> Metrics:
    """The epochs of a training of so many modules; nothing where there is no file.

    Raises:
        DamagedData: something else lies in the place of the file.
    """
    *lines, torn = (read_file(path, METRICS_BYTES) or b"").split(b"\n")
    found = Metrics([], [], torn=bool(torn))
    for number, line in enumerate(lines, 1):
        epoch = _parse(line, modules)
        if epoch is None or (found.epochs and epoch["epoch"] <= found.epochs[-1]["epoch"]):  # or it is there twice
            found.damaged.append(number)
            if len(found.damaged) == MOST_DAMAGED:
                break
        else:
            found.epochs.append(epoch)
    return found


def _parse(line: bytes, modules: int) -> EpochRecord | None:
    try:
        content = parse_json(line)
        if not isinstance(content, dict) or content.pop(SEAL, None) is None or sealed_line(content) != line + b"\n":
            return None
        epoch = EPOCH.validate_python(content)
    except (ValueError, ValidationError):
        return None
    return epoch if len(epoch["loss"]) == len(epoch["validation_loss"]) == modules else None


def sealed_line(record: Mapping[str, Any]) -> bytes:
    """A line of the file: a record with the first half of its own sha256 beside its fields."""
    seal = hashlib.sha256(json.dumps(record, sort_keys=True, allow_nan=False).encode()).hexdigest()[:32]
    return (json.dumps({**record, SEAL: seal}, allow_nan=False) + "\n").encode()


def append_metrics(path: Path, record: Mapping[str, Any]) -> None:
    """
    Raises:
        WillNotFit: the disk is full.
        DamagedData: something else lies in the place of the file.
    """
    line = sealed_line(record)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise_unwritten(path, len(line), error)


def keep_metrics(path: Path, epochs: int, modules: int) -> list[int]:
    """Drop the lines behind the first `epochs` epochs, since those are about to be trained again, and the damaged ones.

    Returns the epochs that are lost.
    """
    found = read_metrics(path, modules)
    kept = [line for line in found.epochs if line["epoch"] <= epochs]
    if found.torn or found.damaged or len(kept) < len(found.epochs):
        write_file(path, b"".join(map(sealed_line, kept)))
    return missing_epochs(kept, epochs)


def missing_epochs(lines: Iterable[EpochRecord], epochs: int) -> list[int]:
    """Those of the first `epochs` epochs of which no line tells."""
    there = {line["epoch"] for line in lines}
    return [epoch for epoch in range(1, epochs + 1) if epoch not in there] if len(there) < epochs else []
