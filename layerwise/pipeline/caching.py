"""Writing a frozen module's outputs to its activation cache, so that the stages above never run it again."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import numpy.typing as npt
from torch import Tensor

import activation_cache
from activation_cache import Cache, CacheWriter, Calibration, SplitSpec, Stale
from layerwise.errors import DamagedData, NotReady, StoppedEarly
from layerwise.files.run_files import PLACE_FILE
from layerwise.files.storage import sealed_json, write_file
from layerwise.pipeline.frozen import load_frozen, require_stages, with_its_threads
from layerwise.pipeline.inputs import cached_inputs, nearest_inputs
from layerwise.pipeline.module_cache import (
    CALIBRATION_SAMPLES,
    as_stored,
    cache_command,
    cache_errors,
    cache_key,
    cached,
    open_cache,
    storage,
    stored_inputs,
    stored_splits,
    without_advice,
)
from layerwise.pipeline.rolling import mend_window, read_rolling
from layerwise.pipeline.room import Trained, settle
from layerwise.pipeline.run import cache_folder
from layerwise.pipeline.setup import Setup, holds
from layerwise.training.feeds import Feed, RecomputeFeed


@holds("cache")
@with_its_threads
def write_cache(setup: Setup, number: int, trained: Trained = "preferred") -> Cache:
    """Run frozen module `number` over every split and store what it gives; goes on where an earlier, killed writing
    stopped.

    Args:
        trained: what counts the selection of samples on which the next stage has trained.

    Raises:
        NotReady: the module is not frozen, or the next stage has trained on a selection that is to be kept.
        WillNotFit: the disk or the budget is too small even for a window.
        DamagedData: a damaged cache lies there that `repair_cache` mends.
        StoppedEarly: interrupted; whole shards are kept.
    """
    names = stored_splits(setup)
    outputs = _outputs(setup, number, names)
    settle_place(setup, number)
    splits = [_layout(setup, outputs, name) for name in names]
    calibration = _calibration(setup, number, outputs) if setup.recipe.cache.dtype == "uint8" else None
    splits = settle(setup, number, splits, outputs, calibration, trained)
    if cached(setup, number):  # only the size of its window had to be settled
        return open_cache(setup, number)
    with cache_errors(setup, number), _begin(setup, number, splits, calibration) as writer:
        whole = sum(setup.facts.sizes[name] for name, _ in writer.tracks())
        left = sum(len(part) for name, view in writer.tracks() for part in writer.pending(name, view))
        if left < whole and setup.ranks.alone:  # else this is one process's share
            setup.progress.note(f"cache of module {number}: resuming at sample {whole - left + 1:,} of {whole:,}")
        setup.ranks.told({"do": "cache", "number": number, "splits": [spec.name for spec in splits]})
        _fill(setup, number, writer, outputs)
        setup.ranks.wait()  # until the others have closed their writers
        writer.commit()
    return open_cache(setup, number)


def help_to_cache(setup: Setup, job: Mapping[str, Any]) -> None:
    """Compute this process's share of a cache that the first process has begun, and commits."""
    fill_share(setup, job["number"], job["splits"], setup.ranks.rank, setup.ranks.world)
    setup.ranks.wait()


@with_its_threads
def fill_share(setup: Setup, number: int, names: Collection[str], rank: int, world: int) -> int:
    """Write what is missing of one of `world` shares (counted from 0) of module `number`'s cache, and commit nothing;
    returns how many samples that was.
    """
    outputs = _outputs(setup, number, names)
    with (
        cache_errors(setup, number),
        activation_cache.create(
            setup.run.cache(number),
            cache_key(setup, number),
            [_layout(setup, outputs, name) for name in names],
            storage(setup),
            calibration=partial(_calibration, setup, number, outputs) if storage(setup).dtype == "uint8" else None,
            rank=rank,
            world_size=world,
            budget=setup.recipe.cache.budget,
            threads=_writing_threads(setup),
        ) as writer,
    ):
        return _fill(setup, number, writer, outputs)


def _writing_threads(setup: Setup) -> int:
    return 0 if setup.device.type == "cpu" else 1  # a module's own threads keep every core of a CPU busy


def settle_place(setup: Setup, number: int) -> None:
    """Give the run a folder of its own below cache.url, so that another run of its name has another. Caches that an
    earlier version wrote into the folder of its name stay in use.
    """
    note, url = setup.run.folder / PLACE_FILE, setup.recipe.cache.url
    if url is None or note.exists():
        return
    name = cache_folder(setup.run.folder)
    before = (activation_cache.inspect(setup.run.cache(n), cache_key(setup, n)) for n in range(1, number + 1))
    if all(found.state in ("absent", "stale") or found.key is None for found in before):
        name = f"{name[:200]}-{secrets.token_hex(4)}"
    write_file(note, sealed_json({"name": name}), once=True)  # by one of several tasks
    setup.progress.note(f"the caches of this run lie in {url.rstrip('/')}/{cache_folder(setup.run.folder)}")


def _begin(setup: Setup, number: int, splits: list[SplitSpec], calibration: Calibration | None) -> CacheWriter:
    """Goes on with an unfinished cache of the same key and splits, and replaces whatever else can be of no use.

    Raises:
        DamagedData: what lies there can be repaired.
    """
    key, location = cache_key(setup, number), setup.run.cache(number)
    found = activation_cache.inspect(location, key)
    if found.state == "damaged" and found.key is not None:
        open_cache(setup, number)  # raises, naming the files and the command that mends them
    reserve = activation_cache.reserve(location) if setup.recipe.cache.budget is None else 0
    begin = partial(
        activation_cache.create,
        location,
        key,
        splits,
        storage(setup),
        calibration=calibration,
        reserve=reserve,
        budget=setup.recipe.cache.budget,
        world_size=setup.ranks.world,
        threads=_writing_threads(setup),
    )
    if found.state == "damaged":
        why = "is damaged, and it is no longer known what it was made from"
    elif found.state == "stale":
        why = f"was made from something else ({', '.join(activation_cache.differences(found.key or {}, key))})"
    else:
        try:
            return begin()
        except Stale as error:  # the same key, and other splits
            why = f"is unfinished, and was meant for other contents ({', '.join(error.differences)})"
    setup.progress.note(f"the cache of module {number} at {location} {why}: it is replaced")
    writer = begin(replace=True)
    if writer.left:
        setup.progress.note(f"left in {location}, because no cache wrote it: {', '.join(writer.left)}")
    return writer


@holds("cache")
@with_its_threads
def repair_cache(setup: Setup, number: int) -> dict[str, Any]:
    """Read all of module `number`'s cache, and compute again only the shards that are damaged.

    Returns what was `damaged` (path to reason), how many `samples` were written again, and which `slots` of its window
    were damaged and removed.

    Raises:
        NotReady: there is no cache, or it is stale: then it has to be written anew.
        DamagedData: nothing says any more what the cache holds, or how its window rolls: likewise.
    """
    read_rolling(setup, number)  # raises where it is damaged
    location, key = setup.run.cache(number), cache_key(setup, number)
    with cache_errors(setup, number):
        found = activation_cache.inspect(location, key)
        if found.state == "stale":
            raise NotReady(f"{without_advice(found.reason)}. Write it with: {cache_command(setup, number)}")
        if found.state == "damaged" and found.key is None:
            raise DamagedData(
                f"{location} cannot be repaired: it is no longer known what it was made from "
                f"({without_advice(found.reason)}). "
                f"Replace it with: {cache_command(setup, number)}"
            )
        damaged = {} if found.state == "partial" else dict(activation_cache.verify(location).damaged)
        with activation_cache.repair(location, key, budget=setup.recipe.cache.budget) as writer:
            names = {name for name, _ in writer.tracks()}
            written = _fill(setup, number, writer, _outputs(setup, number, names))
            writer.commit()
        slots = mend_window(setup, number)
    open_cache(setup, number)
    return {"module": number, "damaged": damaged, "samples": written, "slots": slots}


def _outputs(setup: Setup, number: int, splits: Collection[str]) -> Feed:
    require_stages(setup, number)
    # Where rounding in the cache below shows in the values, only that cache will do: the key says so.
    exact = stored_inputs(setup, number) is None
    inputs = nearest_inputs(setup, number, splits) if exact else cached_inputs(setup, number)
    return RecomputeFeed(inputs, load_frozen(setup, number)[-1:], setup.device)


def _layout(setup: Setup, outputs: Feed, name: str) -> SplitSpec:
    """A split as it is stored."""
    sizes, ragged = outputs.shape(name)
    labels = _lasting(setup, name, next(outputs.in_order(name, 0 if name == "train" else None)).labels)
    return SplitSpec(
        name,
        setup.facts.sizes[name],
        (*sizes[:-1], None) if ragged else sizes,
        labels={task: "int64" if values.ndim == 1 else "int64[]" for task, values in labels.items()},
        views=_views(setup, name),
        longest=sizes[-1] if ragged else None,
    )


def _views(setup: Setup, split: str) -> int:
    return setup.recipe.stored_views(split)


def _read_as(setup: Setup, split: str, view: int) -> int | None:
    """The view of the inputs of which a view of the outputs is made: of a split that has one, the evaluation view."""
    return view if split == "train" or _views(setup, split) > 1 else None


def _lasting(setup: Setup, split: str, labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The labels that a cache can hold: those of positions belong to one view, and are left out beside several."""
    return {task: values for task, values in labels.items() if values.ndim == 1 or _views(setup, split) == 1}


def _fill(setup: Setup, number: int, writer: CacheWriter, outputs: Feed) -> int:
    """Append what the writer still waits for; returns how many samples that was."""
    todo = [(name, view, part) for name, view in writer.tracks() for part in writer.pending(name, view)]
    total = sum(len(part) for _, _, part in todo)
    ragged = {name: outputs.shape(name).ragged for name, _, _ in todo}
    setup.progress.begin(f"cache {number}", total, "samples")
    for name, view, part in todo:
        at = part.start
        for batch in outputs.in_order(name, _read_as(setup, name, view), part.start):
            count = min(len(batch), part.stop - at)
            labels = {task: part[:count].numpy() for task, part in _lasting(setup, name, batch.labels).items()}
            values = as_stored(batch.inputs[:count], storage(setup))
            writer.append(
                name, list(values) if ragged[name] else values, batch.ids[:count], labels if view == 0 else None, view
            )
            at += count
            setup.progress.advance(count, count, name)
            if setup.should_stop():
                raise StoppedEarly(
                    f"stopped while writing the cache of module {number}; complete shards are saved: the same "
                    f"command, without --fresh, resumes"
                )
            if at == part.stop:
                break
    setup.progress.end()
    return total


def _calibration(setup: Setup, number: int, outputs: Feed) -> Calibration:
    """That of the unfinished cache which is gone on with; else from training samples drawn at random, the same on any
    machine, or from all of them where they are few.
    """
    with cache_errors(setup, number):
        found = activation_cache.inspect(setup.run.cache(number), cache_key(setup, number))
    if found.state == "partial" and found.calibration is not None:
        return found.calibration
    # The first samples in order may all be of one class, and their range not that of the others.
    few = outputs.shape("train").ragged or outputs.samples < 2 * CALIBRATION_SAMPLES
    drawn = outputs.in_order("train", view=0) if few else outputs.shuffled(epoch=0)
    wanted = outputs.samples if few else CALIBRATION_SAMPLES

    def batches() -> Iterator[npt.NDArray[Any]]:
        left = wanted
        for batch in drawn:
            yield batch.inputs[:left].float().cpu().numpy()
            left -= len(batch)
            if left <= 0:
                return

    return activation_cache.calibrate(batches(), setup.untrained()[number - 1].channel_axis)
