"""The stage runner: what survives, what is refused, and what equals what, to the bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import is_fake

from layerwise.data.digits import Digits
from layerwise.data.images import ArrayImages
from layerwise.errors import DamagedData, Diverged, NotReady, StoppedEarly, WillNotFit
from layerwise.files.metrics import read_metrics
from layerwise.objectives.infonce import PatchInfoNCELoss
from layerwise.pipeline.caching import write_cache
from layerwise.pipeline.frozen import load_frozen, stage_record
from layerwise.pipeline.schedule import run_all, run_stage, run_together
from layerwise.progress import RESUMED, Silent
from layerwise.recipe.loader import apply_overrides
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]


def weights(setup, number):
    return stage_record(setup, number)["weights"]


def train_two(setup):
    run_stage(setup, 1)
    if setup.recipe.feed == "cache":
        write_cache(setup, 1)
    run_stage(setup, 2)
    return weights(setup, 1), weights(setup, 2)


def test_a_float32_cache_and_recomputation_give_the_same_bits(make_setup):
    cached = train_two(make_setup(TINY, "cached"))
    recomputed = train_two(make_setup(apply_overrides(TINY, ["feed=recompute"]), "recomputed"))
    assert cached == recomputed


@pytest.mark.parametrize("views", [1, 2])
def test_so_they_do_with_several_views(make_setup, views):
    recipe = apply_overrides(TINY, [f"cache.views={views}"])
    cached = train_two(make_setup(recipe, "cached"))
    recomputed = train_two(make_setup(apply_overrides(recipe, ["feed=recompute"]), "recomputed"))
    assert cached == recomputed


def test_the_seed_and_nothing_else_decides(make_setup):
    first, again = make_setup(TINY, "first"), make_setup(TINY, "again")
    other = make_setup(apply_overrides(TINY, ["seed=1"]), "other")
    for setup in (first, again, other):
        run_stage(setup, 1)
    assert weights(first, 1) == weights(again, 1) != weights(other, 1)


def test_training_lowers_the_loss_of_each_module(make_setup):
    setup = make_setup(apply_overrides(TINY, ["training.epochs=6"]))
    for number in (1, 2, 3):
        run_stage(setup, number)
        if number < 3:
            write_cache(setup, number)
        losses = [line["loss"][0] for line in read_metrics(setup.run.stage(number) / "metrics.jsonl", 1).epochs]
        assert losses[-1] < losses[0]


def test_stages_above_the_first_never_touch_the_dataset(make_setup, monkeypatch):
    setup = make_setup()
    run_stage(setup, 1)
    write_cache(setup, 1)

    def gone(*_, **__):
        raise AssertionError("the dataset was opened")

    monkeypatch.setattr(Digits, "open", gone)
    later = make_setup()
    run_stage(later, 2)
    write_cache(later, 2)
    run_stage(later, 3)


class StopAt(Silent):
    """Calls `action` when so many updates are done, over all stages."""

    def __init__(self, count, action):
        self.count, self.action = count, action

    def advance(self, amount, samples, detail):
        self.count -= amount if detail != RESUMED else 0
        if self.count == 0:
            self.action()


@pytest.mark.parametrize("step", range(1, 12, 5))
@pytest.mark.parametrize("schedule", ["iterative", "simultaneous"])
def test_stopped_and_resumed_ends_in_the_same_bits(make_setup, step, schedule):
    recipe = apply_overrides(TINY, [f"schedule={schedule}"])
    whole = make_setup(recipe, "whole")
    run_stage(whole, 1)
    stopped = make_setup(recipe, "stopped")
    asked = []
    stopped.progress, stopped.should_stop = StopAt(step, lambda: asked.append(True)), lambda: bool(asked)
    with pytest.raises(StoppedEarly, match=f"after {step} update"):
        run_stage(stopped, 1)
    resumed = make_setup(recipe, "stopped")
    run_stage(resumed, 1)
    trained = (1,) if schedule == "iterative" else (1, 2, 3)
    assert [weights(resumed, number) for number in trained] == [weights(whole, number) for number in trained]

    def curve(setup):
        return [
            {**line, "seconds": 0}
            for line in read_metrics(setup.run.training(trained) / "metrics.jsonl", len(trained)).epochs
        ]

    assert curve(resumed) == curve(whole)


def test_a_resumed_training_begins_its_report_where_it_stopped(make_setup):
    reports = []

    class Listener(StopAt):
        def advance(self, amount, samples, detail):
            reports.append((amount, samples))
            super().advance(amount, samples, detail)

    asked = []
    setup = make_setup()
    setup.progress, setup.should_stop = StopAt(8, lambda: asked.append(True)), lambda: bool(asked)
    with pytest.raises(StoppedEarly):
        run_stage(setup, 1)
    resumed = make_setup()
    resumed.progress = Listener(0, lambda: None)
    run_stage(resumed, 1)
    assert reports == [(8, 0), *[(1, 16)] * 4]  # of 12 updates


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from tests.conftest import TINY
from tests.test_stage import StopAt
from layerwise.pipeline.run import open_run
from layerwise.pipeline.schedule import run_all
from layerwise.pipeline.setup import Setup
torch.set_num_threads(1)
setup = Setup(open_run(Path(sys.argv[1]), TINY), torch.device("cpu"))
setup.progress = StopAt(int(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL))
run_all(setup)
"""


def run_until_killed(folder, count):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "cache")])
    command = [sys.executable, "-c", KILLED, str(folder), str(count)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "every",
    [pytest.param((5, 150, 480), id="short"), pytest.param(tuple(range(1, 700, 9)), id="long", marks=pytest.mark.long)],
)
def test_killed_again_and_again_it_ends_in_the_same_bits(make_setup, tmp_path, every):
    """Kill -9 in the middle of stages, caches and probes; each new process goes on."""
    whole = make_setup(TINY, "whole")
    run_all(whole)
    for count in every:
        result = run_until_killed(tmp_path / "killed", count)
        assert result.returncode in (0, -signal.SIGKILL), result.stderr
    resumed = make_setup(TINY, "killed")
    run_all(resumed)
    assert [weights(resumed, number) for number in (1, 2, 3)] == [weights(whole, number) for number in (1, 2, 3)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_anything_is_frozen(make_setup, monkeypatch, bad):
    calls, honest = [], PatchInfoNCELoss.loss

    def injected(self, representations, context):
        if not is_fake(representations[0]):  # the prediction of memory runs the step too
            calls.append(True)
        return honest(self, representations, context) * (bad if len(calls) == 5 else 1)

    monkeypatch.setattr(PatchInfoNCELoss, "loss", injected)
    setup = make_setup()
    with pytest.raises(Diverged, match=rf"module 1 is {bad} at step 4 \(learning rate 0.01\)"):
        run_stage(setup, 1)
    assert stage_record(setup, 1) is None
    run_stage(make_setup(), 1)  # goes on from the last good checkpoint


def test_a_finished_stage_of_other_settings_is_refused(make_setup):
    run_stage(make_setup(), 1)
    other = make_setup(apply_overrides(TINY, ["optimiser.learning_rate=0.5"]))
    with pytest.raises(NotReady, match=r"optimiser\.learning_rate: 0\.01 -> 0\.5.*--fresh"):
        run_stage(other, 1)
    run_stage(other, 1, fresh=True)
    assert stage_record(other, 1) is not None


def test_settings_that_cannot_change_a_value_do_not_make_a_stage_stale(make_setup):
    run_stage(make_setup(), 1)
    same = make_setup(apply_overrides(TINY, ["training.checkpoint_every=7", "cache.codec=zstd"]))
    assert stage_record(same, 1) is not None


def test_a_stage_without_its_cache_says_which_command_writes_it(make_setup):
    setup = make_setup()
    run_stage(setup, 1)
    with pytest.raises(NotReady, match="layerwise cache --module 1 --run-dir"):
        run_stage(setup, 2)


def test_a_stage_on_a_stale_cache_is_refused(make_setup):
    setup = make_setup()
    run_stage(setup, 1)
    write_cache(setup, 1)
    run_stage(make_setup(), 1, fresh=True)  # the same settings give the same bits: nothing is stale
    run_stage(make_setup(), 2)
    other = make_setup(apply_overrides(TINY, ["seed=1"]))
    run_stage(other, 1, fresh=True)
    with pytest.raises(NotReady, match=r"(?s)seed.*layerwise cache --module 1"):
        run_stage(other, 2, fresh=True)
    write_cache(other, 1)
    run_stage(other, 2, fresh=True)


@pytest.mark.parametrize("at", [0, 100, -1])
def test_one_flipped_bit_in_frozen_weights_is_found(make_setup, at):
    setup = make_setup()
    run_stage(setup, 1)
    path = setup.run.stage(1) / "module.safetensors"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedData, match=r"module\.safetensors is damaged"):
        load_frozen(setup, 1)


def test_together_equals_one_after_another_for_the_first_module(make_setup):
    """Gradient isolation: what trains above a module changes nothing in it."""
    alone = make_setup(TINY, "alone")
    run_stage(alone, 1)
    together = make_setup(apply_overrides(TINY, ["schedule=simultaneous"]), "together")
    run_together(together)
    first = load_frozen(alone, 1)[0].state_dict()
    assert all(torch.equal(first[name], tensor) for name, tensor in load_frozen(together, 1)[0].state_dict().items())


def test_bf16_trains(make_setup):
    setup = make_setup(apply_overrides(TINY, ["training.precision=bf16"]))
    run_stage(setup, 1)
    assert all(tensor.dtype == torch.float32 for tensor in load_frozen(setup, 1)[0].state_dict().values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8"])
@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_every_kind_of_cache_feeds_a_stage(make_setup, dtype, codec):
    setup = make_setup(apply_overrides(TINY, [f"cache.dtype={dtype}", f"cache.codec={codec}", "training.epochs=1"]))
    train_two(setup)


def test_a_dataset_that_changed_under_a_run_is_refused(make_setup, monkeypatch):
    setup = make_setup()
    run_stage(setup, 1)
    monkeypatch.setattr(ArrayImages, "manifest", lambda self: f"other {len(self)}")
    with pytest.raises(NotReady, match=r"its samples of probe, test, train, validation differ.*--fresh"):
        write_cache(make_setup(), 1)
    run_stage(make_setup(), 1, fresh=True)
    write_cache(make_setup(), 1)


def test_a_lossy_cache_is_computed_from_the_cache_below_it_and_from_nothing_else(make_setup):
    """Else its values would depend on which caches happened to lie there."""
    setup = make_setup(apply_overrides(TINY, ["cache.dtype=uint8", "training.epochs=1"]))
    train_two(setup)
    shutil.rmtree(setup.run.cache(1))
    with pytest.raises(NotReady, match="layerwise cache --module 1"):
        write_cache(setup, 2)


@pytest.mark.parametrize("name", ["stage.json", "checkpoint.json"])
def test_an_altered_record_is_not_believed(make_setup, name):
    setup = make_setup()
    if name == "stage.json":
        run_stage(setup, 1)
    else:
        asked = []
        setup.progress, setup.should_stop = StopAt(4, lambda: asked.append(True)), lambda: bool(asked)
        with pytest.raises(StoppedEarly):
            run_stage(setup, 1)
    path = setup.run.stage(1) / name
    content = path.read_text()
    for altered in (content.replace(": 1", ": 7", 1), "{}", content[:-20]):
        path.write_text(altered)
        with pytest.raises(DamagedData, match=f"{name} is damaged"):
            run_stage(make_setup(), 1)


def test_what_cannot_begin_destroys_nothing(make_setup):
    run_stage(make_setup(), 1)
    with pytest.raises(WillNotFit):
        run_stage(make_setup(apply_overrides(TINY, ["training.max_memory=1000"])), 1, fresh=True)
    assert stage_record(make_setup(), 1) is not None


def test_a_validation_loss_that_is_not_finite_is_not_an_improvement(make_setup, monkeypatch):
    monkeypatch.setattr("layerwise.training.stage.validate", lambda *_: [float("nan")])
    with pytest.raises(Diverged, match="module 1 is nan"):
        run_stage(make_setup(), 1)


def test_an_unfinished_stage_may_become_longer_and_not_shorter_than_it_is(make_setup):
    setup = make_setup()
    asked = []
    setup.progress, setup.should_stop = StopAt(8, lambda: asked.append(True)), lambda: bool(asked)
    with pytest.raises(StoppedEarly):
        run_stage(setup, 1)  # in its second epoch
    with pytest.raises(NotReady, match="reached epoch 2 already"):
        run_stage(make_setup(apply_overrides(TINY, ["training.epochs=1"])), 1)
    longer = make_setup(apply_overrides(TINY, ["training.epochs=3"]))
    run_stage(longer, 1)
    whole = make_setup(apply_overrides(TINY, ["training.epochs=3"]), "whole")
    run_stage(whole, 1)
    assert weights(longer, 1) == weights(whole, 1)


def test_several_threads_give_the_same_bits_in_every_run(make_setup):
    torch.set_num_threads(2)
    recipe = apply_overrides(TINY, ["training.epochs=1", "training.batch_size=64", "objective.negatives=16"])
    found = set()
    for name in ("first", "second", "third"):
        setup = make_setup(recipe, name)
        run_stage(setup, 1)
        found.add(weights(setup, 1))
    assert len(found) == 1
