"""What a stage reads: the dataset, the cache below it, a window on what is below, or the frozen modules themselves."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import activation_cache
from activation_cache import SplitSpec, Window
from layerwise.errors import NotReady, UsageError, WillNotFit
from layerwise.pipeline.frozen import load_frozen, require_stages
from layerwise.pipeline.module_cache import (
    as_stored,
    cache_command,
    cache_errors,
    cache_key,
    cached,
    open_cache,
    over_budget,
    storage,
)
from layerwise.pipeline.rolling import WindowFeed, filling, read_rolling, rolls
from layerwise.pipeline.setup import Setup
from layerwise.training.feeds import ALL, HOST, CacheFeed, DatasetFeed, Feed, RecomputeFeed


def stage_inputs(setup: Setup, number: int, part: slice | None = None) -> Feed:
    """What stage `number` reads: the dataset for the first, else the cache below it, or the frozen modules themselves.

    Args:
        part: which samples of each training batch are read; None: this process's share among all.

    Raises:
        NotReady: a module below is not frozen, or its cache is not there, with the command that mends it.
    """
    part = setup.part if part is None else part
    if number == 1:
        return DatasetFeed(
            setup.splits,
            setup.recipe.training.batch_size,
            setup.order_seed(1),
            together=setup.recipe.views_of(1),
            part=part,
        )
    require_stages(setup, number - 1)
    read = cached_inputs if setup.recipe.feed == "cache" else _recomputed
    return read(setup, number, setup.recipe.views_of(number), part)


def nearest_inputs(setup: Setup, number: int, splits: Collection[str]) -> Feed:
    """What module `number` reads, from the cache below it where that is valid and has these splits, else from the
    dataset.
    """
    whole = number > 1 and not rolls(setup, number - 1)
    if whole and setup.recipe.feed == "cache" and cached(setup, number - 1):
        feed = cached_inputs(setup, number)
        if set(splits) <= set(feed.splits()):
            return feed
    return _recomputed(setup, number)


def cached_inputs(setup: Setup, number: int, together: int = 1, part: slice = ALL) -> Feed:
    """What stage `number` reads from the cache below it: all of it, or a window that rolls.

    Args:
        together: views of each sample that a training batch carries.
        part: which samples of each training batch are read.
    """
    below = number - 1
    cache, batch_size = open_cache(setup, below), setup.recipe.training.batch_size
    mend = f"{cache_command(setup, below)} --repair"
    if not rolls(setup, below):
        found = activation_cache.inspect(setup.run.cache(below))
        if over_budget(setup, found):
            raise WillNotFit(
                f"the cache of module {below} takes {found.bytes:,} bytes, more than the budget of "
                f"{setup.recipe.cache.budget:,}. Write it again as a window with: {cache_command(setup, below)}"
            )
        return CacheFeed(
            cache, batch_size, setup.order_seed(number), setup.device, mend=mend, together=together, part=part
        )
    if together > 1:
        raise UsageError(
            f"the cache of module {below} is a rolling window, which holds one view of each sample, but the "
            f"objective compares {together}: allow the whole cache with --cache-budget, or read none with --set "
            f"feed=recompute"
        )
    if part != ALL:
        raise UsageError(
            f"the cache of module {below} is a rolling window, which several processes cannot share: start one "
            "process, allow the whole cache with --cache-budget, or read none with --set feed=recompute"
        )
    rolling = read_rolling(setup, below)
    if rolling is None:
        raise NotReady(
            f"the window on the outputs of module {below} was made for another --cache-budget than "
            f"{setup.recipe.cache.budget}, for another cache.renew than {str(setup.recipe.cache.renew).lower()}, or "
            f"for batches of fewer than {batch_size} samples. Choose its size again with: {cache_command(setup, below)}"
        )
    feed = CacheFeed(cache, batch_size, setup.order_seed(number), setup.device, mend=mend)
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
    fill = filling(setup, source, outputs, lambda values: as_stored(values, kept))
    budget = setup.recipe.cache.budget
    reserve = activation_cache.reserve(location) if budget is None else 0
    left = None if budget is None else budget - activation_cache.inspect(setup.run.cache(below)).bytes
    slot_budget = None if left is None else max(left, 0) // (rolling.slots + 1)
    seed, device = setup.order_seed(number), setup.device
    errors = partial(cache_errors, setup, below)
    return WindowFeed(feed, window, fill, rolling, batch_size, seed, device, errors, reserve, slot_budget)


def _recomputed(setup: Setup, number: int, together: int = 1, part: slice = ALL) -> Feed:
    recipe, views = setup.recipe, setup.recipe.stored_views("train")
    source = DatasetFeed(
        setup.splits, recipe.training.batch_size, setup.order_seed(number), views=views, together=together, part=part
    )
    if number == 1:
        return source
    limited = recipe.training.micro_batch is not None or recipe.training.max_memory is not None
    return RecomputeFeed(source, load_frozen(setup, number - 1), setup.device, HOST if limited else setup.device)
