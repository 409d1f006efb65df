"""A cache under a budget: the stage above trains on a window that rolls, in the same bits however it is interrupted."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

import activation_cache
from layerwise.errors import NotReady, StoppedEarly, WillNotFit
from layerwise.files.storage import read_json
from layerwise.pipeline.cache_report import stale_windows
from layerwise.pipeline.caching import write_cache
from layerwise.pipeline.expected import expected
from layerwise.pipeline.inputs import stage_inputs
from layerwise.pipeline.module_cache import cached
from layerwise.pipeline.rolling import Rolling, WindowFeed, read_rolling
from layerwise.pipeline.schedule import run_stage
from layerwise.pipeline.status import status
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


def test_a_window_on_all_where_they_are_to_be_renewed(begun, make_setup):
    setup = begun(budget=None, renew=True)
    everything = setup.facts.sizes["train"]
    assert read_rolling(setup, 1) == Rolling(slots=4, slot_samples=everything // 4, epochs=1)
    assert "train" not in activation_cache.open_cache(setup.run.cache(1)).splits
    feed = stage_inputs(setup, 2)
    assert isinstance(feed, WindowFeed)
    assert feed.samples // 8 == everything // 8, "as many updates an epoch as from a cache of all"
    seen = [{name for batch in feed.shuffled(epoch) for name in batch.ids} for epoch in range(3)]
    assert len({name.partition("/")[0] for name in seen[0]}) == everything // 8 * 8, "each sample once at first"
    for earlier, later in pairwise(seen):
        assert len(later - earlier) == pytest.approx(everything / 4, abs=8), "a quarter is new, in new augmentations"
    feed.close()
    plain = make_setup(recipe(budget=None))
    assert not cached(plain, 1)
    with pytest.raises(NotReady, match=r"another cache\.renew"):
        stage_inputs(plain, 2)
    write_cache(plain, 1)
    assert stage_inputs(plain, 2).samples == everything
    assert not plain.run.window(1).exists()


def test_no_room_at_all(begun):
    with pytest.raises(WillNotFit, match=r"a window of 8 .*The budget is 30,000 bytes\. Run: layerwise"):
        begun(budget=30_000)


def test_what_is_stored_whole_stays_under_another_window(begun, make_setup):
    before = begun()
    commit = (before.run.cache(1) / "record/commit.json").read_bytes()
    run_stage(before, 2)
    sparser = make_setup(recipe(window_epochs=2))
    assert cached(sparser, 1)
    smaller = make_setup(recipe(budget=4_000_000))
    assert not cached(smaller, 1)
    with pytest.raises(NotReady, match=r"another --cache-budget .* layerwise cache --module 1"):
        stage_inputs(smaller, 2)
    write_cache(smaller, 1)
    assert (smaller.run.cache(1) / "record/commit.json").read_bytes() == commit
    assert read_rolling(smaller, 1).slot_samples < read_rolling(begun("again"), 1).slot_samples
    with pytest.raises(NotReady, match="other settings"):
        run_stage(smaller, 2)
    run_stage(smaller, 2, fresh=True)
    assert bytes_in(smaller.run.caches) <= 4_000_000


def test_a_window_on_something_else_is_sized_anew(begun, make_setup):
    small = {"budget": 900_000, "probe_splits": False}
    half = begun("one", dtype="float16", **small)
    whole = make_setup(recipe(dtype="float32", **small), "one")
    write_cache(whole, 1)
    expected = read_rolling(begun("two", dtype="float32", **small), 1)
    assert read_rolling(whole, 1) == expected
    assert read_rolling(half, 1) == expected, "it is the one note of the run"
    run_stage(whole, 2)
    assert bytes_in(whole.run.caches) <= 900_000


def test_status_counts_the_window_and_nothing_of_it_is_left_behind(begun, make_setup):
    setup = begun()
    run_stage(setup, 2)
    told = status(setup.run.folder, expected(setup))["modules"][0]["cache"]
    assert told["state"] == "valid"
    window = bytes_in(setup.run.window(1))
    assert told["bytes"] == bytes_in(setup.run.cache(1)) + window > window > 0
    assert stale_windows(setup) == {}
    other = make_setup(recipe(dtype="float16"))
    assert list(stale_windows(other)) == [1]
    assert "dtype" in stale_windows(other)[1]
    roomy = make_setup(recipe(budget=10**9))
    kept = setup.run.window(1).rename(setup.run.folder / "kept")
    setup.run.window(1).mkdir()
    write_cache(roomy, 1)
    assert "train" in activation_cache.open_cache(roomy.run.cache(1)).splits
    assert not roomy.run.window(1).exists()
    kept.rename(roomy.run.window(1))
    assert "holds all of them" in stale_windows(roomy)[1]
