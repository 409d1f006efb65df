"""A cache under a budget: the stage above trains on a window that rolls, in the same bits however it is interrupted."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest

import activation_cache
from layerwise.caching import write_cache
from layerwise.errors import StoppedEarly, WillNotFit
from layerwise.inputs import stage_inputs
from layerwise.module_cache import cached
from layerwise.rolling import read_rolling
from layerwise.schedule import run_stage
from layerwise.storage import read_json
from tests.conftest import TINY

BUDGET = 4_200_000


def recipe(**cache):
    training = TINY.training.model_copy(update={"epochs": 4, "patience": 10, "batch_size": 8})
    settings = TINY.cache.model_copy(update={"budget": BUDGET, "window_epochs": 1, "codec": "none", **cache})
    return TINY.model_copy(update={"training": training, "cache": settings})


def bytes_in(folder: Path) -> int:
    """Of all files of a folder that changes meanwhile."""
    total = 0
    for root, _, names in os.walk(folder):  # passes over folders that vanish
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(root, name)).st_size
    return total


def weights(setup):
    return read_json(setup.run.stage(2) / "stage.json")["weights"]


@pytest.fixture
def begun(make_setup):
    """`begun(name, **cache)`: a setup with module 1 trained and its cache written."""

    def make(name="run", **cache):
        setup = make_setup(recipe(**cache), name)
        run_stage(setup, 1)
        write_cache(setup, 1)
        return setup

    return make


def test_trains_within_the_budget(begun):
    setup = begun()
    rolling = read_rolling(setup, 1)
    assert rolling is not None
    assert cached(setup, 1)
    assert set(activation_cache.open_cache(setup.run.cache(1)).splits) == {"validation", "probe", "test"}
    most, done = [0], threading.Event()

    def watch():
        while not done.is_set():
            most[0] = max(most[0], bytes_in(setup.run.caches))

    watcher = threading.Thread(target=watch)
    watcher.start()
    run_stage(setup, 2)
    done.set()
    watcher.join()
    assert most[0] <= BUDGET
    slots = {int(path.name[5:]) for path in setup.run.window(1).glob("slot-*")}
    assert min(slots) == 3, "after four epochs of one turn each, three slots were evicted"
    assert run_stage(setup, 2)["epochs"] == 4


def test_interrupted_or_not_the_weights_are_the_same(begun, make_setup):
    whole = begun("whole")
    run_stage(whole, 2)
    setup = begun("interrupted")
    steps = 0

    def stop():
        nonlocal steps
        steps += 1
        return steps % 29 == 0

    setup.should_stop = stop
    for _ in range(100):
        try:
            run_stage(setup, 2)
            break
        except StoppedEarly:
            continue
    assert weights(setup) == weights(whole)


def test_a_window_that_holds_other_samples_gives_other_weights(begun):
    one, other = begun("one"), begun("other", budget=4_000_000)
    run_stage(one, 2)
    run_stage(other, 2)
    assert weights(one) != weights(other)


def test_room_for_all_makes_no_window(begun):
    setup = begun(budget=10**9)
    assert read_rolling(setup, 1) is None
    assert "train" in activation_cache.open_cache(setup.run.cache(1)).splits
    feed = stage_inputs(setup, 2)
    assert feed.samples == setup.facts.sizes["train"]


def test_no_room_at_all(begun):
    with pytest.raises(WillNotFit, match="at least"):
        begun(budget=30_000)
