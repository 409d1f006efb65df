"""What a run holds, from its files alone: neither the recipe nor torch is needed, and no data are read."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import activation_cache
from activation_cache import CacheError, Storage
from layerwise.errors import DamagedData
from layerwise.files.findings import intact
from layerwise.files.made_from import cache_made_from, probe_made_from, stage_made_from
from layerwise.files.metrics import METRICS, read_metrics
from layerwise.files.records import CHECKPOINT, EXPECTED, PROBE, RECIPE, STAGE, ExpectedRecord, StageRecord, read_record
from layerwise.files.run_files import FOLDERS, LOCK, RECORDS
from layerwise.files.storage import JSON_BYTES, read_file
from layerwise.files.window import note_of, rolling_at
from layerwise.pipeline import trust
from layerwise.pipeline.run import cache_location, window_location
from layerwise.settings.identity import changes_within, differences

NOTE = "expected.json"


class Unsure(Exception):
    """Something below is missing or damaged, so that what rests on it cannot be compared; the message says what."""


def read_expected(folder: Path) -> ExpectedRecord | None:
    """What the recipe that a run follows asks for; None where that was not noted for this recipe, or makes no sense.

    Raises:
        DamagedData: the note is not what was written.
    """
    found = read_record(folder / NOTE, EXPECTED)
    if found is None or found["recipe"] != recipe_digest(folder):
        return None
    for number, module in enumerate(found["modules"], 1):
        group = module["group"]
        if group != [*range(group[0], group[-1] + 1)] or number not in group or group[-1] > len(found["modules"]):
            return None
        if not isinstance(module["stage"].get("inputs", {}), dict):
            return None
    return found


def recipe_digest(folder: Path) -> str:
    """sha256 of a run's recipe.json, by which expected.json names what it is of."""
    return hashlib.sha256(read_file(folder / "recipe.json", JSON_BYTES) or b"").hexdigest()


def status(folder: Path, expected: ExpectedRecord) -> dict[str, Any]:
    """The state of each module: trained, unfinished, stale or damaged (and why), or not yet; unknown where a damaged
    record below would tell; its epochs and last losses (nats); the state of its cache, with the bytes of its rolling
    window; its probe's accuracy. `bytes`: of all files of the run and its caches; `next`: the command to type.
    """
    looked = _Look(folder, expected)
    modules = []
    for number in range(1, len(expected["modules"]) + 1):
        found = {"stage": looked.stage(number), "cache": looked.cache(number), "probe": looked.probe(number)}
        modules.append({"module": number, **found})
    recipe = read_record(folder / "recipe.json", RECIPE)
    return {
        "run": str(folder),
        "recipe": "?" if recipe is None else recipe["name"],
        "modules": modules,
        "bytes": looked.bytes(modules),
        "next": looked.next(modules),
    }


class _Look:
    """At one run."""

    def __init__(self, folder: Path, expected: ExpectedRecord) -> None:
        self.folder, self.expected, self.caches = folder, expected, folder / "caches"
        recipe = intact(folder / "recipe.json", RECIPE)
        self.url = None if recipe is None else recipe["cache"].get("url")
        self.contacted = trust.knows_address(self.url)

    def stage(self, number: int) -> dict[str, Any]:
        module = self.expected["modules"][number - 1]
        try:
            record = self._record(number)
            training = self._training(module["group"])
            checkpoint = read_record(training / "checkpoint.json", CHECKPOINT)
        except DamagedData as error:
            return {"state": "damaged", "reason": str(error)}
        if record is None:
            if checkpoint is None:
                return {"state": "not trained"}
            place = checkpoint["place"]
            told = {"epochs": place["epoch"], "seconds": place["seconds"]}
            return {"state": "unfinished", **told, **self._losses(training, module["group"], number)}
        try:
            below = module["group"][0] - 1
            made_from = stage_made_from(module["stage"], self._weights(below), self._window(below))
        except Unsure as error:
            return {"state": "unknown", "reason": str(error)}
        if changed := differences(record["made_from"], made_from):
            goes_on = self._goes_on(record, made_from)
            again = self.command("stage", str(number), *([] if goes_on else ["--fresh"]))
            reason = (
                f"stage {number} was trained with other settings ({'; '.join(changed[:5])}). "
                f"{'Train it further' if goes_on else 'Train it again'} with: {again}"
            )
            return {"state": "stale", "reason": reason, "again": again}
        weights = self.folder / "stages" / str(number) / "module.safetensors"
        if not weights.is_file():
            again = self.command("stage", str(number), "--fresh")
            reason = f"{weights} is missing: restore it, or train the module again with: {again}"
            return {"state": "damaged", "reason": reason}
        trained = self._training(record["trained_with"])
        told = {"epochs": record["epochs"], "seconds": record["seconds"]}
        return {"state": "trained", **told, **self._losses(trained, record["trained_with"], number)}

    def cache(self, number: int) -> dict[str, Any]:
        if self.url is not None and not self.contacted:
            return {"state": "unknown", "reason": trust.not_contacted(self.folder, self.url), "bytes": 0}
        try:
            location = self._location(number)
            window = activation_cache.inspect(window_location(self.folder, self.url, number)).bytes
            try:
                key = self._key(number)
            except (Unsure, DamagedData) as error:
                found = activation_cache.inspect(location)
                if found.state == "valid":
                    return {"state": "unknown", "reason": str(error), "bytes": found.bytes + window}
            else:
                found = activation_cache.inspect(location, key)
        except (CacheError, DamagedData) as error:  # an object store that is not reached; the note on its place
            return {"state": "unknown", "reason": str(error), "bytes": 0}
        return {"state": found.state, "reason": found.reason, "bytes": found.bytes + window}

    def probe(self, number: int) -> dict[str, Any] | None:
        module = self.expected["modules"][number - 1]
        try:
            record = read_record(self.folder / "probes" / f"{module['part']}.json", PROBE)
        except DamagedData as error:
            return {"state": "damaged", "reason": str(error)}
        try:
            made_from = probe_made_from(module["probe"], self._weights(number))
        except Unsure:
            return None
        current = record is not None and record["module"] == module["part"] and record["made_from"] == made_from
        return {**record} if record is not None and current else None

    def bytes(self, modules: list[dict[str, Any]]) -> int:
        """Of the run's own files, and of its caches wherever they lie."""
        own = sum(_sizes(self.folder))
        elsewhere = 0 if self.url is None else sum(module["cache"]["bytes"] for module in modules)
        return own + elsewhere

    def next(self, modules: list[dict[str, Any]]) -> str | None:
        """The command that does the next thing; None where all is done."""
        for module, facts in zip(modules, self.expected["modules"], strict=True):
            number, stage = module["module"], module["stage"]["state"]
            if stage == "damaged":
                return self.command("verify")
            if stage != "trained":
                again: str | None = module["stage"].get("again")
                return again or self.command("stage", str(number))
            if facts["stored"] and self.contacted and module["cache"]["state"] != "valid":
                mend = ["--repair"] if module["cache"]["state"] == "damaged" else []
                return self.command("cache", "--module", str(number), *mend)
        if not self.expected["labelled"]:
            return None
        probes = [module["probe"] for module in modules]
        if any(probe is not None and probe.get("state") == "damaged" for probe in probes):
            return self.command("verify")
        return self.command("run") if None in probes else None

    def command(self, *words: str) -> str:
        return shlex.join(["layerwise", *words, "--run-dir", str(self.folder)])

    def _location(self, number: int) -> Path | str:
        return cache_location(self.folder, self.url, number)

    def _training(self, numbers: list[int]) -> Path:
        name = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        return self.folder / "stages" / name

    def _record(self, number: int) -> StageRecord | None:
        return read_record(self.folder / "stages" / str(number) / "stage.json", STAGE)

    def _goes_on(self, record: StageRecord, made_from: Mapping[str, Any]) -> bool:
        """Whether a finished stage becomes what is asked for by more epochs alone, from its checkpoint."""
        checkpoint = intact(self._training(record["trained_with"]) / "checkpoint.json", CHECKPOINT)
        if changes_within(record["made_from"], made_from) or (checkpoint is None and record["epochs"] > 0):
            return False
        training = made_from.get("training")
        epochs = training.get("epochs") if isinstance(training, dict) else None
        return isinstance(epochs, int) and epochs >= record["epochs"]

    def _losses(self, training: Path, group: list[int], number: int) -> dict[str, float]:
        """Of the last epoch, nats; nothing where no line tells."""
        try:
            lines = read_metrics(training / METRICS, len(group)).epochs
        except DamagedData:  # `verify` tells
            return {}
        if not lines or number not in group:
            return {}
        at = group.index(number)
        return {"loss": lines[-1]["loss"][at], "validation_loss": lines[-1]["validation_loss"][at]}

    def _weights(self, through: int) -> list[str]:
        found = []
        for number in range(1, through + 1):
            try:
                record = self._record(number)
            except DamagedData as error:
                raise Unsure(str(error)) from error
            if record is None:
                raise Unsure(f"module {number} is not trained yet. Run: {self.command('stage', str(number))}")
            found.append(record["weights"])
        return found

    def _window(self, below: int) -> Mapping[str, int] | None:
        asked = self.expected
        if asked["feed"] != "cache" or below == 0:
            return None
        settings = asked["budget"], asked["renew"], asked["window_epochs"], asked["batch_size"]
        try:
            rolling = rolling_at(note_of(self.caches, below), *settings)
        except DamagedData as error:
            raise Unsure(str(error)) from error
        return None if rolling is None else rolling.identity

    def _key(self, number: int) -> dict[str, Any]:
        storage = Storage(self.expected["dtype"], self.expected["codec"])  # type: ignore[arg-type]
        rolls, below = (note_of(self.caches, of).exists() for of in (number, number - 1))
        part = self.expected["modules"][number - 1]["cache"]
        return cache_made_from(part, self._weights(number), storage, rolls=rolls, below_rolls=below)


def _sizes(folder: Path) -> Iterator[int]:
    """Bytes of each file where a run has its own; of a link, its own. The folder may hold more, of the user's."""
    files = [folder / name for name in (*RECORDS, LOCK)]
    files += [Path(place, name) for of in FOLDERS for place, _, names in os.walk(folder / of) for name in names]
    for file in files:
        with suppress(FileNotFoundError):  # a command may be at work
            yield file.lstat().st_size
