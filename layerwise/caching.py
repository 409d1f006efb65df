"""A frozen module's outputs, written once to an activation cache, so that the stages above never run it again.

The cache's key holds all that can change a value in it. A cache whose key differs is stale, and no stage reads it.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import activation_cache
from activation_cache import Cache, CacheError, CacheWriter, Calibration, SplitSpec, Storage, Window
from layerwise.errors import DamagedData, NotReady, RunLocked, StoppedEarly, WillNotFit
from layerwise.feeds import HOST, CacheFeed, DatasetFeed, Feed, RecomputeFeed
from layerwise.frozen import frozen_digests, load_frozen, require_stages
from layerwise.rolling import SLOTS, Rolling, WindowFeed, filling, read_rolling, settle_rolling
from layerwise.setup import Setup
from layerwise.units import size

CALIBRATION_SAMPLES = 256


def storage(setup: Setup) -> Storage:
    return Storage(dtype=setup.recipe.cache.dtype, codec=setup.recipe.cache.codec)


def cache_key(setup: Setup, number: int) -> dict[str, Any]:
    """Everything that can change a value in module `number`'s cache."""
    recipe = setup.recipe
    causes: dict[str, Any] = {
        "module": number,
        "seed": recipe.seed,
        "dataset": recipe.dataset.identity(),
        "manifest": setup.facts.manifest,
        "network": recipe.network.identity_through(number),
        "weights": frozen_digests(setup, number),
        "views": recipe.cache.views,
        "calibration": CALIBRATION_SAMPLES if recipe.cache.dtype == "uint8" else None,
    }
    if (stored := stored_inputs(setup, number)) is not None:
        causes["inputs"] = stored
    if rolling := read_rolling(setup, number):
        causes["window"] = rolling.identity  # such a cache has no training samples: they are in the window
    return activation_cache.make_key(causes, storage(setup))


def stored_inputs(setup: Setup, number: int) -> str | None:
    """The dtype of the cache whose values module `number`'s outputs are computed from.

    None where they are computed from the exact values, for which a float32 cache and the frozen modules serve alike.
    """
    cache = setup.recipe.cache
    if number == 1 or setup.recipe.feed != "cache" or cache.dtype == "float32" or read_rolling(setup, number - 1):
        return None
    return cache.dtype


def open_cache(setup: Setup, number: int) -> Cache:
    """Module `number`'s cache, checked against the modules and settings that it should come from.

    Raises:
        NotReady: there is none, it is unfinished, or stale.
        DamagedData: its files are not what was written.
    """
    with cache_errors(setup, number):
        return activation_cache.open_cache(setup.run.cache(number), cache_key(setup, number))


@contextmanager
def cache_errors(setup: Setup, number: int) -> Iterator[None]:
    """The cache's errors as ours, with the command that mends them."""
    command = _command(setup, number)
    try:
        yield
    except activation_cache.Damaged as error:
        raise DamagedData(f"{error} Mend it with: {command} --repair") from error
    except activation_cache.DoesNotFit as error:
        raise WillNotFit(str(error)) from error
    except activation_cache.Locked as error:
        raise RunLocked(str(error)) from error
    except CacheError as error:
        raise NotReady(f"{error} Write it with: {command}") from error


def _command(setup: Setup, number: int) -> str:
    return f"layerwise cache --module {number} --run-dir {shlex.quote(str(setup.run.folder))}"


def cached(setup: Setup, number: int) -> bool:
    """Whether module `number`'s cache is whole and made from what the recipe asks for."""
    return activation_cache.inspect(setup.run.cache(number), cache_key(setup, number)).state == "valid"


def stage_inputs(setup: Setup, number: int) -> Feed:
    """What stage `number` reads: the dataset for the first, else the cache below it, or the frozen modules themselves.

    Raises:
        NotReady: a module below is not frozen, or its cache is not there, with the command that mends it.
    """
    if number == 1:
        return DatasetFeed(setup.splits, setup.recipe.training.batch_size, setup.order_seed(1))
    require_stages(setup, number - 1)
    return _from_cache(setup, number) if setup.recipe.feed == "cache" else _recomputed(setup, number)


def nearest_inputs(setup: Setup, number: int, splits: Collection[str]) -> Feed:
    """What module `number` reads, from the cache below it where that is valid and has these splits, else from the
    dataset.
    """
    whole = number > 1 and read_rolling(setup, number - 1) is None
    if whole and setup.recipe.feed == "cache" and cached(setup, number - 1):
        feed = _from_cache(setup, number)
        if set(splits) <= set(feed.splits()):
            return feed
    return _recomputed(setup, number)


def _from_cache(setup: Setup, number: int) -> Feed:
    """What stage `number` reads from the cache below it: all of it, or a window that rolls."""
    below = number - 1
    cache, batch_size = open_cache(setup, below), setup.recipe.training.batch_size
    mend = f"{_command(setup, below)} --repair"
    feed = CacheFeed(cache, batch_size, setup.order_seed(number), setup.device, mend=mend)
    rolling = read_rolling(setup, below)
    if rolling is None:
        return feed
    split = next(iter(cache.splits.values()))
    location, kept = setup.run.window(below), storage(setup)
    source = DatasetFeed(setup.splits, batch_size, setup.order_seed(number))
    tasks = (task for task, values in next(source.in_order("train", 0)).labels.items() if values.ndim == 1)
    spec = SplitSpec("train", setup.facts.sizes["train"], split.shape, labels=dict.fromkeys(tasks, "int64"))
    window = Window(
        location,
        cache_key(setup, below),
        spec,
        kept,
        rolling.slots,
        rolling.slot_samples,
        setup.order_seed(number),
        split.calibration,
    )
    outputs = RecomputeFeed(source, load_frozen(setup, below), setup.device)
    fill = filling(setup, source, outputs, lambda values: _as_stored(values, kept))
    reserve = activation_cache.reserve(location) if setup.recipe.cache.budget is None else 0
    seed, device = setup.order_seed(number), setup.device
    errors = partial(cache_errors, setup, below)
    return WindowFeed(feed, window, fill, rolling, batch_size, seed, device, errors, reserve)


def _recomputed(setup: Setup, number: int) -> Feed:
    recipe = setup.recipe
    source = DatasetFeed(setup.splits, recipe.training.batch_size, setup.order_seed(number), views=recipe.cache.views)
    if number == 1:
        return source
    limited = recipe.training.micro_batch is not None or recipe.training.max_memory is not None
    return RecomputeFeed(source, load_frozen(setup, number - 1), setup.device, HOST if limited else setup.device)


def write_cache(setup: Setup, number: int) -> Cache:
    """Run frozen module `number` over every split and store what it gives; goes on where an earlier, killed writing
    stopped.

    Raises:
        NotReady: the module is not frozen.
        StoppedEarly: interrupted; whole shards are kept.
    """
    names = [name for name in setup.facts.sizes if setup.recipe.cache.probe_splits or name not in ("probe", "test")]
    outputs = _outputs(setup, number, names)
    splits = [_layout(setup, outputs, name) for name in names]
    axis = setup.untrained()[number - 1].channel_axis
    calibration = _calibrate(outputs, axis) if setup.recipe.cache.dtype == "uint8" else None
    splits = _within_budget(setup, number, splits, outputs, calibration)
    key, location = cache_key(setup, number), setup.run.cache(number)
    stale = activation_cache.inspect(location, key).state == "stale"
    reserve = activation_cache.reserve(location) if setup.recipe.cache.budget is None else 0
    with (
        cache_errors(setup, number),
        activation_cache.create(
            location, key, splits, storage(setup), calibration=calibration, replace=stale, reserve=reserve
        ) as writer,
    ):
        _fill(setup, number, writer, outputs)
    return open_cache(setup, number)


def _within_budget(
    setup: Setup, number: int, splits: list[SplitSpec], outputs: Feed, calibration: Calibration | None
) -> list[SplitSpec]:
    """The splits that are stored whole: all, or if they do not fit, all but `train`, whose window is settled.

    Raises:
        WillNotFit: not even a window fits.
    """
    kept, location, cache = storage(setup), setup.run.cache(number), setup.recipe.cache
    some = next(outputs.in_order("train", view=0)).inputs
    ratio = activation_cache.measured_ratio(_as_stored(some, kept), kept, calibration)
    needed = activation_cache.estimate(splits, kept, ratio)
    room = activation_cache.available(location, cache.budget)
    if room is None:
        return splits
    left = "" if kept.codec == "none" else f", of which {kept.codec} leaves {100 * ratio:.0f}%"
    whose = "the budget is" if cache.budget is not None else "the disk has"
    setup.progress.note(f"cache of module {number}: about {size(needed)} in {kept.dtype}{left}; {whose} {size(room)}")
    rolling: Rolling | None = None
    if needed > room:
        rolling = read_rolling(setup, number)
        whole = [spec for spec in splits if spec.name != "train"]
        train = replace(next(spec for spec in splits if spec.name == "train"), views=1)
        if rolling is None:
            with cache_errors(setup, number):
                besides = activation_cache.estimate(whole, kept, ratio)
                each = activation_cache.slot_samples(train, kept, room, slots=SLOTS, ratio=ratio, besides=besides)
            rolling = Rolling(SLOTS, each, cache.window_epochs)
        splits = whole
        held = rolling.slots * rolling.slot_samples
        setup.progress.note(
            f"that does not fit: the next stage trains on a window of {held:,} of {train.samples:,} samples, a quarter "
            f"of which is replaced every {rolling.epochs} epochs"
        )
    settle_rolling(setup, number, rolling)
    return splits


def repair_cache(setup: Setup, number: int) -> dict[str, Any]:
    """Read all of module `number`'s cache, and compute again only the shards that are damaged.

    Returns what was `damaged` (path to reason) and how many `samples` were written again.

    Raises:
        NotReady: there is no cache, or it is stale: then it has to be written anew.
    """
    location, key = setup.run.cache(number), cache_key(setup, number)
    with cache_errors(setup, number):
        found = activation_cache.inspect(location, key)
        if found.state == "stale":
            raise NotReady(f"{found.reason}. Write it with: {_command(setup, number)}")
        damaged = {} if found.state == "partial" else dict(activation_cache.verify(location).damaged)
        with activation_cache.repair(location) as writer:
            if differing := activation_cache.differences(writer.key, key):
                raise NotReady(
                    f"{location} was made from something else ({', '.join(differing)}). "
                    f"Write it with: {_command(setup, number)}"
                )
            names = {name for name, _ in writer.tracks()}
            written = _fill(setup, number, writer, _outputs(setup, number, names))
    open_cache(setup, number)
    return {"module": number, "damaged": damaged, "samples": written}


def _outputs(setup: Setup, number: int, splits: Collection[str]) -> Feed:
    require_stages(setup, number)
    # Where rounding in the cache below shows in the values, only that cache will do: the key says so.
    exact = stored_inputs(setup, number) is None
    inputs = nearest_inputs(setup, number, splits) if exact else _from_cache(setup, number)
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
    return setup.recipe.cache.views if split == "train" else 1


def _lasting(setup: Setup, split: str, labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The labels that a cache can hold: those of positions belong to one view, and are left out beside several."""
    return {task: values for task, values in labels.items() if values.ndim == 1 or _views(setup, split) == 1}


def _fill(setup: Setup, number: int, writer: CacheWriter, outputs: Feed) -> int:
    """Append what the writer still waits for, and commit; returns how many samples that was."""
    todo = [(name, view, part) for name, view in writer.tracks() for part in writer.pending(name, view)]
    total = sum(len(part) for _, _, part in todo)
    ragged = {name: outputs.shape(name).ragged for name, _, _ in todo}
    setup.progress.begin(f"cache {number}", total, "samples")
    for name, view, part in todo:
        at = part.start
        for batch in outputs.in_order(name, view if name == "train" else None, part.start):
            count = min(len(batch), part.stop - at)
            labels = {task: part[:count].numpy() for task, part in _lasting(setup, name, batch.labels).items()}
            values = _as_stored(batch.inputs[:count], storage(setup))
            writer.append(
                name, list(values) if ragged[name] else values, batch.ids[:count], labels if view == 0 else None, view
            )
            at += count
            setup.progress.advance(count, count, name)
            if setup.should_stop():
                raise StoppedEarly(
                    f"stopped while writing the cache of module {number}; whole shards are kept: "
                    "the same command, without --fresh, goes on"
                )
            if at == part.stop:
                break
    writer.commit()
    setup.progress.end()
    return total


def _as_stored(values: Tensor, storage: Storage) -> npt.NDArray[Any]:
    """Rounded on the device, where that is quick, and half as much to move."""
    if storage.dtype == "float16":
        return values.half().cpu().numpy()
    if storage.dtype == "bfloat16":
        return values.bfloat16().view(torch.int16).cpu().numpy().view(np.uint16)
    return values.float().cpu().numpy()


def _calibrate(outputs: Feed, channel_axis: int) -> Calibration:
    """Scales from the first training samples, in their order: the same whatever the machine."""

    def batches() -> Iterator[npt.NDArray[Any]]:
        seen = 0
        for batch in outputs.in_order("train", view=0):
            yield batch.inputs[: CALIBRATION_SAMPLES - seen].float().cpu().numpy()
            seen += len(batch)
            if seen >= CALIBRATION_SAMPLES:
                return

    return activation_cache.calibrate(batches(), channel_axis)


def describe_cache(setup: Setup, number: int) -> dict[str, Any]:
    """Where a cache lies, its bytes, and what each split holds."""
    cache = open_cache(setup, number)
    splits = {
        name: {
            "samples": split.samples,
            "views": split.views,
            "shape": list(split.shape),
            "dtype": split.storage.dtype,
            "codec": split.storage.codec,
        }
        for name, split in cache.splits.items()
    }
    location = setup.run.cache(number)
    return {
        "module": number,
        "location": str(location),
        "bytes": activation_cache.inspect(location).bytes,
        "splits": splits,
    }


def stale_caches(setup: Setup) -> dict[int, str]:
    """Module number to reason, for each cache of the run that no stage will ever read again."""
    found = {}
    numbers = {int(path.name) for path in setup.run.caches.glob("*") if path.name.isdigit()}
    for number in sorted(numbers | set(range(1, setup.depth + 1))):
        location = setup.run.cache(number)
        if activation_cache.inspect(location).state == "absent":
            continue
        if number > setup.depth:
            found[number] = f"{location} is of module {number}, and the recipe has {setup.depth}"
            continue
        try:
            status = activation_cache.inspect(location, cache_key(setup, number))
        except NotReady as error:
            found[number] = f"{location}: {error}"
            continue
        if status.state == "stale":
            found[number] = status.reason
    return found


def verify_caches(setup: Setup) -> list[dict[str, Any]]:
    """Read every byte of every cache of the run. `damaged`: path to what is wrong with it; `unexpected`: files that
    no writer of a cache put there.
    """
    found = []
    for number in range(1, setup.depth + 1):
        window = sorted(setup.run.window(number).glob("slot-*"))
        for location in (setup.run.cache(number), *window):
            if activation_cache.inspect(location).state in ("absent", "partial"):
                continue
            setup.progress.note(f"reading {location}")
            with cache_errors(setup, number):
                report = activation_cache.verify(location)
            facts = {"bytes": report.bytes, "files": report.files}
            wrong = {"damaged": dict(report.damaged), "unexpected": list(report.unexpected)}
            found.append({"module": number, "location": str(location), **facts, **wrong})
    return found
