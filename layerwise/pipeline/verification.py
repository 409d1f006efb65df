"""Every byte of a run, read again and compared with what was written: records, weights, metrics, checkpoints, probes,
caches, windows and the report.

Nothing here needs the recipe, its code or torch: the files of a run say themselves what they should be.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

import activation_cache
from activation_cache import CacheError, StoreError
from layerwise.errors import DamagedData, NotReady
from layerwise.files.findings import Verification, intact, listed, reason_of
from layerwise.files.metrics import METRICS, METRICS_BYTES, missing_epochs, read_metrics
from layerwise.files.records import (
    CHECKPOINT,
    DATASET,
    EXPECTED,
    PLACE,
    PROBE,
    RECIPE,
    REPORT,
    RUN,
    STAGE,
    WINDOW,
    CheckpointRecord,
    StageRecord,
)
from layerwise.files.run_files import (
    CACHE,
    CURVES,
    FOLDERS,
    LOCK,
    MANIFEST,
    PLACE_FILE,
    RECORDS,
    SLOT,
    STAGE_FOLDER,
    is_folder,
    is_run,
    require_usable,
    subfolders,
)
from layerwise.files.storage import read_file
from layerwise.pipeline import trust
from layerwise.pipeline.run import cache_location, window_location
from layerwise.settings.units import counted

ATTEMPTS = 5
MOST_MODULES = 1000


def verify_run(run: Path, note: Callable[[str], None] = lambda _: None) -> Verification:
    """Read every byte of the run.

    Raises:
        NotReady: there is no run, or an object store is not reached.
        UsageError: the folder is no run.
    """
    found = Verification(run)
    _verify_records(found)
    for part in (_verify_stages, _verify_probes, _verify_report):
        part(found)
    _verify_caches(found, note)
    _find_unexpected(found)
    found.order_mends()
    return found


def _verify_records(found: Verification) -> None:
    if not is_run(found.run):
        require_usable(found.run)
        raise NotReady(f"{found.run} is not a run. Name a recipe, for example: layerwise run --recipe digits")
    forms: dict[str, TypeAdapter[Any]] = dict(zip(RECORDS, (RUN, RECIPE, DATASET, EXPECTED), strict=True))
    for name, form in forms.items():
        path = found.run / name
        delete = f"rm {shlex.quote(str(path))}"
        noted = name in ("dataset.json", "expected.json")  # again whenever the run is worked on
        again = found.command("run") if noted else found.command("run", "--recipe", "NAME|FILE.py")
        there = os.path.lexists(path)
        if found.read(path, form, f"{delete}; {again}" if there else again) is None and not there:
            trained = [stage for stage in _stages(found) if os.path.lexists(stage / "stage.json")]
            if not noted or trained:
                found.damage(path, "is missing", again)


def _stages(found: Verification) -> list[Path]:
    try:
        return subfolders(found.run / "stages", STAGE_FOLDER)
    except DamagedData:  # which `_verify_stages` reports
        return []


def _verify_stages(found: Verification) -> None:
    try:
        folders = subfolders(found.run / "stages", STAGE_FOLDER)
    except DamagedData as error:
        found.damage(found.run / "stages", str(error))
        return
    trainings: dict[Path, tuple[StageRecord, str]] = {}
    below: dict[int, str] = {}
    for folder in folders:
        number = int(folder.name.split("-")[0])
        mend = found.command("stage", str(number), "--fresh")
        record = found.read(folder / "stage.json", STAGE, mend)
        if record is not None:
            found.check_sha256(folder / "module.safetensors", record["sha256"], mend)
            together = record["trained_with"]
            if number not in together:
                found.damage(folder / "stage.json", f"it is of the modules {together}", mend)
            name = str(number) if len(together) == 1 else f"{together[0]}-{together[-1]}"
            trainings[found.run / "stages" / name] = record, mend
            made_from = record["made_from"].get("inputs")
            weights = made_from.get("weights") if isinstance(made_from, dict) else None
            below |= dict.fromkeys(range(1, 1 + len(weights if isinstance(weights, list) else together)), str(number))
    for folder in sorted({*folders, *trainings}):
        record, mend = trainings.get(folder, (None, found.command("stage", folder.name.split("-")[0], "--fresh")))
        _verify_checkpoint(found, folder, record, mend)
        _require_frozen(found, folder)
        _verify_metrics(found, folder, record, mend)
    for number, above in sorted(below.items()):
        folder = found.run / "stages" / str(number)
        if not os.path.lexists(folder / "stage.json") and not _is_trained_again(found, number):
            reason = f"is missing, and module {above} was trained on it or with it"
            found.damage(folder / "stage.json", reason, found.command("stage", str(number), "--fresh"))


def _is_trained_again(found: Verification, number: int) -> bool:
    """Whether a training of module `number`, alone or with others, is under way or was interrupted."""
    for folder in _stages(found):
        first, last = int(folder.name.split("-")[0]), int(folder.name.split("-")[-1])
        if first <= number <= last and os.path.lexists(folder / "checkpoint.json"):
            return True
    return False


def _verify_checkpoint(found: Verification, folder: Path, stage: StageRecord | None, mend: str) -> None:
    """A training that is under way replaces its files meanwhile: then they are looked at again.

    Args:
        stage: the record of a module that was trained there, once it is frozen.
    """
    path = folder / "checkpoint.json"
    for _ in range(ATTEMPTS):
        trial = Verification(found.run)
        record = trial.read(path, CHECKPOINT, mend)
        if record is None and stage is not None and stage.get("checkpoint_bytes") and not os.path.lexists(path):
            trial.damage(path, "is missing: the modules cannot be trained for more epochs", mend)
        if record is not None:
            if not _finished(stage, record):
                found.unfinished[str(folder)] = f"trained for {counted(record['place']['epoch'], 'epoch')}"
            entries = {entry["file"]: entry["sha256"] for entry in (record["files"]["latest"], record["files"]["best"])}
            for file, sha256 in entries.items():
                trial.check_sha256(folder / file, sha256, mend)
        if not trial.damaged or record == intact(path, CHECKPOINT):
            break
    found.files, found.bytes = found.files + trial.files, found.bytes + trial.bytes
    found.known |= trial.known
    for damaged, reason in trial.damaged.items():
        found.damage(damaged, reason, mend)


def _require_frozen(found: Verification, folder: Path) -> None:
    """Name the records of modules whose training is over and that are not frozen."""
    checkpoint = intact(folder / "checkpoint.json", CHECKPOINT)
    training = {} if checkpoint is None else checkpoint["made_from"].get("training")
    if checkpoint is None or not isinstance(training, dict):
        return
    epoch, best = checkpoint["place"]["epoch"], checkpoint["place"]["best_epoch"]
    ends = ((training.get("epochs"), epoch), (training.get("patience"), epoch - best))
    if any(isinstance(most, int) and done >= most for most, done in ends):
        first, *last = (int(number) for number in folder.name.split("-"))
        for number in range(first, 1 + min(max([first, *last]), first + MOST_MODULES)):
            path = found.run / "stages" / str(number) / "stage.json"
            if not os.path.lexists(path):
                found.damage(path, "is missing, though the training is over", found.command("stage", str(first)))


def _finished(stage: StageRecord | None, checkpoint: CheckpointRecord | None) -> bool:
    """Whether a training is over: its module is frozen, and is not being trained on from its checkpoint."""
    return stage is not None and (checkpoint is None or checkpoint["place"]["epoch"] <= stage["epochs"])


def _verify_metrics(found: Verification, folder: Path, record: StageRecord | None, mend: str) -> None:
    """`record`: that of a module which was trained there, once it is frozen."""
    path = folder / METRICS
    found.expect(path)
    checkpoint = intact(folder / "checkpoint.json", CHECKPOINT)
    epochs = record["epochs"] if record is not None else checkpoint["place"]["epoch"] if checkpoint is not None else 0
    first, *rest = (int(number) for number in folder.name.split("-"))
    modules = len(record["trained_with"]) if record is not None else rest[0] - first + 1 if rest else 1
    try:
        raw = read_file(path, METRICS_BYTES)
        metrics = read_metrics(path, modules)
    except DamagedData as error:
        found.damage(path, reason_of(path, error), mend)
        return
    lost = missing_epochs(metrics.epochs, epochs)
    if raw is None:
        if lost:
            found.damage(path, "is missing: the report has no curves of this training", mend)
        return
    finished = _finished(record, checkpoint)
    beyond = [line["epoch"] for line in metrics.epochs if line["epoch"] > epochs] if finished else []
    reason = ""
    if metrics.damaged:
        reason = f"lines {listed(metrics.damaged)} were altered, or have no checksum"
    elif metrics.torn and finished:
        reason = "its last line was altered or cut short"
    elif beyond:
        reason = f"it tells of epochs {listed(beyond)}, and {epochs} were trained"
    elif lost:
        reason = f"the lines of epochs {listed(lost)} are missing"
    if reason:
        found.damage(path, f"{reason}; the curves lack them; the weights are intact", mend)
        return
    found.files += 1
    found.bytes += len(raw)


def _verify_probes(found: Verification) -> None:
    folder = found.run / "probes"
    try:
        names = sorted(os.listdir(folder)) if is_folder(folder) else []
    except DamagedData as error:
        found.damage(folder, str(error))
        return
    for name in names:
        if re.fullmatch(r"[A-Za-z0-9_-]+\.json", name):
            part = name.removesuffix(".json")
            mend = _probe_again(found, part)
            record = found.read(folder / name, PROBE, mend)
            if record is not None and str(record["module"]) != part:
                found.damage(folder / name, f"it is of {record['module']!r}", mend)


def _probe_again(found: Verification, part: str) -> str:
    return found.command("probe", *(["--module", part] if part.isdecimal() else ["--fixed"]), "--fresh")


def _verify_report(found: Verification) -> None:
    folder, again = found.run / "report", found.command("run")
    try:
        if not is_folder(folder) or not os.listdir(folder):
            return
    except DamagedData as error:
        found.damage(folder, str(error))
        return
    manifest = found.read(folder / MANIFEST, REPORT, again)
    if manifest is None:
        if not os.path.lexists(folder / MANIFEST):
            found.damage(folder / MANIFEST, "is missing: it is not known what the report should contain", again)
        return
    for name, sha256 in manifest["files"].items():
        if manifest["finished"]:
            found.check_sha256(folder / name, sha256, again)
        else:
            found.expect(folder / name)
    if not manifest["finished"]:
        found.unfinished[str(folder)] = f"the report is incomplete. Write it with: {again}"
    for name in manifest["shows"]:
        kind, part = Path(name).parts[0], Path(name).parts[1].removesuffix(".json")
        path = found.run / name
        if os.path.lexists(path) or (kind == "stages" and _is_trained_again(found, int(part))):
            continue
        mend = _probe_again(found, part) if kind == "probes" else found.command("stage", part, "--fresh")
        found.damage(path, "is missing, and the report shows it", mend)


def _verify_caches(found: Verification, note: Callable[[str], None]) -> None:
    folder = found.run / "caches"
    try:
        local = subfolders(folder, CACHE)
        names = sorted(os.listdir(folder)) if is_folder(folder) else []
    except DamagedData as error:
        found.damage(folder, str(error))
        return
    for name in names:
        if re.fullmatch(r"\d{1,5}\.window\.json", name):
            mend = f"rm {shlex.quote(str(folder / name))}; " + found.command("cache", "--module", name.split(".")[0])
            found.read(folder / name, WINDOW, mend)
    places: list[tuple[int, Path | str]] = []
    recipe = intact(found.run / "recipe.json", RECIPE)
    url = None if recipe is None else recipe["cache"].get("url")
    place = found.run / PLACE_FILE
    known = not os.path.lexists(place) or found.read(place, PLACE, f"rm {shlex.quote(str(place))}") is not None
    if url is not None and not trust.knows_address(url):
        found.unfinished[url] = trust.not_contacted(found.run, url)
    elif url is not None and known:
        numbers = {int(stage.name) for stage in _stages(found) if stage.name.isdecimal()}
        places += [(number, cache_location(found.run, url, number)) for number in sorted(numbers)]
        windows = [window_location(found.run, url, number) for number in sorted(numbers)]
        local += [window for window in windows if window.is_dir() and window not in local]
    for cache in local:
        number = int(cache.name.split("-")[0])
        try:
            places += [(number, slot) for slot in ([cache] if cache.name.isdecimal() else subfolders(cache, SLOT))]
        except DamagedData as error:
            found.damage(cache, str(error))
    for number, location in places:
        _verify_cache(found, number, location, note)


def _verify_cache(found: Verification, number: int, location: Path | str, note: Callable[[str], None]) -> None:
    mend = found.command("cache", "--module", str(number), "--repair")
    entry: dict[str, Any] = {"module": number, "location": str(location), "bytes": 0, "files": 0}
    try:
        status = activation_cache.inspect(location)
        if status.state == "absent":
            return
        if status.state == "stale":  # of another format: no key was given
            found.unfinished[str(location)] = status.reason
            return
        if status.state == "partial":
            found.unfinished[str(location)] = "the cache is not written to its end"
            return
        note(f"reading {location}")
        report = activation_cache.verify(location)
        entry |= {"bytes": report.bytes, "files": report.files}
        entry |= {"damaged": dict(report.damaged), "unexpected": list(report.unexpected)}
    except StoreError as error:
        raise NotReady(str(error)) from error
    except (CacheError, OSError) as error:
        entry |= {"damaged": {".": str(error)}, "unexpected": []}
    found.caches.append(entry)
    found.files += entry["files"]
    found.bytes += entry["bytes"]
    found.unexpected += [f"{location}/{path}" for path in entry["unexpected"]]
    for path, reason in entry["damaged"].items():
        found.damage(f"{location}/{path}".removesuffix("/."), reason, mend)


def _find_unexpected(found: Verification) -> None:
    """All that no command put there; beside the run's own folders only the topmost names, which may be the user's."""
    known = {*found.known, *(found.run / name for name in (LOCK, CURVES, *FOLDERS))}
    names = sorted(os.listdir(found.run))
    found.unexpected += [str(found.run / name) for name in names if found.run / name not in known]
    for name in FOLDERS:
        if str(found.run / name) not in found.damaged and is_folder(found.run / name):
            _list_unexpected(found, found.run / name)
    found.unexpected.sort()


def _list_unexpected(found: Verification, folder: Path) -> None:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if path in found.known:
            continue
        if not entry.is_dir(follow_symlinks=False):
            found.unexpected.append(entry.path)
        elif not (folder.name == "caches" and CACHE.fullmatch(entry.name)):
            _list_unexpected(found, path)
        elif entry.name.endswith("-window"):
            known = [inner for inner in os.scandir(path) if not SLOT.fullmatch(inner.name)]
            found.unexpected += [inner.path for inner in known]
