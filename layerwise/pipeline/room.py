"""How much of a module's outputs is stored: all of them, or, where the disk or the budget is too small or they are to
be renewed, a window on the training samples that rolls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import activation_cache
from activation_cache import Calibration, DoesNotFit, SplitSpec
from activation_cache.store.disk import free_needed
from layerwise.errors import NotReady, WillNotFit
from layerwise.files.window import Rolling
from layerwise.pipeline.frozen import frozen_digests, trained_inputs
from layerwise.pipeline.module_cache import as_stored, cache_command, cache_key, cached, storage
from layerwise.pipeline.rolling import SLOTS, least_slot, noted, read_rolling, rolls, settle_rolling
from layerwise.pipeline.setup import Setup
from layerwise.settings.units import counted, size
from layerwise.training.feeds import Feed

LARGER = 1.1
"""A window that could be larger by less than this factor stays: the free space of a disk always changes a little."""
SAFE = 1.05
"""Other samples may compress less than those that were measured, and a budget is enforced while writing."""
Trained: TypeAlias = Literal["kept", "preferred", "ignored"]
"""The samples on which the next stage has trained: refuse any others; take them where they fit; or, since that stage
will be trained again, take what fits now.
"""


def unsettled(setup: Setup, number: int) -> bool:
    """Whether module `number`'s cache is to be written, or its window, on which no stage has trained, settled again."""
    return not cached(setup, number) or (rolls(setup, number) and _trained_on(setup, number) is None)


def settle(
    setup: Setup,
    number: int,
    splits: Sequence[SplitSpec],
    outputs: Feed,
    calibration: Calibration | None,
    trained: Trained,
) -> list[SplitSpec]:
    """The splits to store whole: all of them, or all but `train`, whose window is settled.

    Raises:
        WillNotFit: no window of a batch fits, or not the samples on which the next stage has trained.
        NotReady: the settings ask for other samples than those on which the next stage has trained.
    """
    kept, location, cache = storage(setup), setup.run.cache(number), setup.recipe.cache
    there = activation_cache.inspect(location, cache_key(setup, number))
    measured = _ratio(setup, outputs, calibration)
    ratio = min(measured * SAFE, 1.0)
    whole = there.state == "valid" and not rolls(setup, number)
    needed = there.bytes if whole else activation_cache.estimate(splits, kept, ratio)
    room = activation_cache.available(location, cache.budget, [setup.run.window(number)])
    left = "" if kept.codec == "none" else f", of which {kept.codec} leaves {100 * measured:.0f}%"
    limit = "" if room is None else f"; {'the budget is' if room == cache.budget else 'the disk has'} {size(room)}"
    setup.progress.note(f"cache of module {number}: about {size(needed)} in {kept.dtype}{left}{limit}")
    fits = room is None or needed <= room
    # A window on samples of something else had another size.
    known, same_budget = (
        None if there.state == "stale" else noted(setup, number),
        read_rolling(setup, number) is not None,
    )
    inputs = None if trained == "ignored" else _trained_on(setup, number)
    stands = known is not None and inputs is not None and known.same_size(inputs.get("window"))
    rolling, train = None, replace(next(spec for spec in splits if spec.name == "train"), views=1)
    others = [spec for spec in splits if spec.name != "train"]
    if not fits or cache.renew:
        least = least_slot(setup.recipe.training.batch_size)
        if known is not None and stands and trained == "kept":
            least = known.slot_samples
        rolling = _largest_window(setup, number, train, others, ratio, needed, least)
        if known is not None and known.slot_samples <= rolling.slot_samples:
            near = same_budget and inputs is None and rolling.slot_samples <= LARGER * known.slot_samples
            rolling = known if stands or near else rolling
    elif same_budget and stands:
        rolling = known
    if trained == "kept" and inputs is not None:
        _require_same(setup, number, inputs.get("window"), rolling, needed, fits)
    if rolling is not None:
        setup.progress.note(
            f"{'a part of them is renewed' if fits else 'that does not fit'}: the next stage trains on a window of "
            f"{rolling.samples:,} of {train.samples:,} samples, a quarter of which is replaced every "
            f"{counted(rolling.epochs, 'epoch')}. It lies in {setup.run.window(number)}"
        )
    settle_rolling(setup, number, rolling)
    return list(splits) if rolling is None else others


def _ratio(setup: Setup, outputs: Feed, calibration: Calibration | None) -> float:
    """What the codec leaves of a batch, drawn at random: the first samples in order may compress better."""
    kept, ragged = storage(setup), outputs.shape("train").ragged
    some = next(outputs.in_order("train", view=0) if ragged else outputs.shuffled(epoch=0)).inputs
    return activation_cache.measured_ratio(as_stored(some, kept), kept, calibration)


def _largest_window(
    setup: Setup,
    number: int,
    train: SplitSpec,
    others: Sequence[SplitSpec],
    ratio: float,
    needed: int,
    least: int,
) -> Rolling:
    """
    Args:
        least: samples of a slot.

    Raises:
        WillNotFit: not so many fit, or the samples differ in length.
    """
    kept, besides = storage(setup), activation_cache.estimate(others, storage(setup), ratio)
    room = _room_of_window(setup, number, besides)
    if None in train.shape:
        raise WillNotFit(
            f"the cache of module {number} takes about {size(needed)}. Its training samples differ in length, and a "
            f"rolling window needs samples of one length: train on pieces of one length, or without cache.renew. "
            f"{_way_out(setup, number, room, needed)}"
        )
    try:
        each = activation_cache.slot_samples(train, kept, room, slots=SLOTS, ratio=ratio, besides=besides, least=least)
    except DoesNotFit as error:
        raise WillNotFit(
            f"the cache of module {number} takes about {size(needed)}, or {error.needed:,} bytes for a window of "
            f"{SLOTS * least:,} training samples, the fewest for this stage, with all samples of the other splits. "
            f"{_way_out(setup, number, room, error.needed)}"
        ) from error
    return Rolling(SLOTS, each, setup.recipe.cache.window_epochs)


def _room_of_window(setup: Setup, number: int, besides: int) -> int:
    """Bytes for a window and the splits beside it, which take `besides`: of an object store's, the window alone lies
    on this machine.
    """
    location, window, budget = setup.run.cache(number), setup.run.window(number), setup.recipe.cache.budget
    if (room := activation_cache.available(location, None if _remote(setup, number) else budget, [window])) is not None:
        return room
    own = activation_cache.available(window)
    assert own is not None  # a folder has a disk
    return own + besides if budget is None else min(own + besides, budget)


def _remote(setup: Setup, number: int) -> bool:
    """Whether the cache lies on an object store, which knows no end."""
    return activation_cache.free(setup.run.cache(number)) is None


def _way_out(setup: Setup, number: int, room: int, needed: int) -> str:
    """What there is, and the commands that lead on: with `needed` bytes, or without a cache."""
    location, window, budget = setup.run.cache(number), setup.run.window(number), setup.recipe.cache.budget
    more, command = 0, cache_command(setup, number)
    disk = window if _remote(setup, number) else location
    if room != budget:
        free, own = activation_cache.free(disk), (activation_cache.inspect(place).bytes for place in (location, window))
        there = (free or 0) + sum(own)
        more = free_needed(needed) - there if budget is None else needed - there
    if budget is not None and budget < needed:
        command = setup.command(f"cache --module {number}", f"cache.budget={needed}")
    told = f"The budget is {room:,} bytes" if room == budget else f"The disk has {room:,} bytes for it"
    first = f"Free {more:,} more on the disk of {disk}, then run" if more > 0 else "Run"
    without = without_caches(setup, setup.depth)
    return f"{told}. {first}: {command}" + (f" ; or train without caches: {without}" if without is not None else "")


def _require_same(
    setup: Setup, number: int, before: Mapping[str, Any] | None, rolling: Rolling | None, needed: int, fits: bool
) -> None:
    """
    Raises:
        WillNotFit, NotReady: the next stage has trained on other samples; the message says how to go on.
    """
    if rolling is None if before is None else (rolling is not None and rolling.same_size(before)):
        return
    then = "all training samples" if before is None else _held(before)
    now = "all training samples" if rolling is None else _held(rolling.identity)
    again = (
        f"To train stage {number + 1} again on {now}: {cache_command(setup, number)} && "
        f"{setup.command(f'stage {number + 1} --fresh')}"
    )
    if before is None and not fits:
        room = activation_cache.available(setup.run.cache(number), setup.recipe.cache.budget) or 0
        raise WillNotFit(
            f"stage {number + 1} has trained on {then}, and the cache of module {number} takes {needed:,} bytes. "
            f"{_way_out(setup, number, room, needed)} ; {again}"
        )
    raise NotReady(
        f"stage {number + 1} has trained on {then}, and cache.budget and cache.renew now ask for {now}. Go back to "
        f"those settings. {again}"
    )


def _held(window: Mapping[str, Any]) -> str:
    return f"a window of {window.get('slots')} slots of {window.get('slot_samples')} samples"


def without_caches(setup: Setup, depth: int) -> str | None:
    """The command that trains without caches; None where one of `depth` stages has trained on what a cache rounded or
    left out, and would have to be trained again.
    """
    known = (trained_inputs(setup, number) for number in range(2, depth + 1))
    if any(inputs is not None and (inputs.get("dtype") != "float32" or "window" in inputs) for inputs in known):
        return None
    return setup.command("run", "feed=recompute")


def _trained_on(setup: Setup, number: int) -> dict[str, Any] | None:
    """The inputs of the next stage, if it has trained on outputs of these weights."""
    inputs = trained_inputs(setup, number + 1)
    return inputs if inputs is not None and inputs.get("weights") == frozen_digests(setup, number) else None
