"""The number of threads: measured once, kept to the end of a training, and never chosen over the user's head."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from layerwise.errors import StoppedEarly
from layerwise.nets.module import Encoded, Module
from layerwise.objectives.objective import Objective
from layerwise.pipeline.caching import write_cache
from layerwise.pipeline.frozen import stage_record
from layerwise.pipeline.schedule import run_stage
from layerwise.progress import Silent
from layerwise.recipe.loader import apply_overrides
from layerwise.training import threads
from layerwise.training.feeds import Batch
from layerwise.training.step import Arithmetic, Learner, rehearsal
from tests.conftest import TINY
from tests.test_stage import StopAt, weights

SMALL = apply_overrides(TINY, ["training.epochs=1", "dataset.samples=100", "training.checkpoint_every=100"])


class Clock:
    """Stands still but for the work, which takes `seconds[threads]`."""

    def __init__(self, seconds):
        self.now, self.seconds, self.units = 0.0, seconds, []

    def __call__(self):
        return self.now

    def work(self):
        self.units.append(torch.get_num_threads())
        self.now += self.seconds[torch.get_num_threads()]


@pytest.mark.parametrize(
    ("seconds", "most", "best"),
    [
        ({1: 0.004, 2: 0.1}, 2, 1),  # a busy machine
        ({1: 0.004, 2: 0.0021}, 2, 2),  # an idle one
        ({1: 0.004, 2: 0.0038}, 2, 1),  # hardly faster: not worth a processor
        ({1: 0.008, 2: 0.004, 4: 0.002, 6: 0.0015}, 6, 6),
        ({1: 0.008, 2: 0.004, 4: 0.009, 8: 1.0}, 8, 2),
    ],
)
def test_the_fewest_threads_that_are_fastest(seconds, most, best):
    clock = Clock(seconds)
    found = threads.measure(clock.work, most, lambda one: 1.0, clock)
    assert found.best == best
    assert torch.get_num_threads() == 1  # as before
    assert clock.now < 1.3


def test_numbers_beyond_one_that_is_clearly_slower_are_not_tried():
    clock = Clock({1: 0.008, 2: 0.004, 4: 0.009})
    threads.measure(clock.work, 64, lambda one: 1.0, clock)


@pytest.mark.parametrize("seconds", [0.6, 30.0])
def test_work_that_takes_long_is_not_measured(seconds):
    clock = Clock({1: seconds})
    assert threads.measure(clock.work, 2, lambda one: 1.0, clock) is None
    assert len(clock.units) <= 2


def test_what_was_measured_is_told():
    found = threads.Speeds({1: 62.5, 2: 6.5})
    assert found.told(4) == "computing with 1 thread: 250 samples a second, against 26 with 2"


class Counting(Module):
    """Batch statistics and dropout: a forward pass changes buffers and draws."""

    channels = target_channels = 4

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))

    def forward(self, x):
        found = self.layers(x)
        return Encoded(found, found, found)


class Plain(Objective):
    def represent(self, encoded):
        return (encoded.c.mean((2, 3)), torch.arange(len(encoded.c)))

    def loss(self, representations, context):
        return representations[0].square().mean()


def test_a_rehearsal_leaves_everything_as_it_was():
    module, objective = Counting(), Plain()
    learner = Learner(1, module, objective, torch.optim.Adam(module.parameters()))
    state, optimiser = copy.deepcopy(module.state_dict()), copy.deepcopy(learner.optimiser.state_dict())
    batch = Batch(torch.from_numpy(np.random.default_rng(0).normal(size=(6, 1, 8, 8)).astype("float32")))
    drawn = torch.random.get_rng_state()
    with rehearsal([learner], batch, Arithmetic(torch.device("cpu"), "fp32", None, 0)) as rehearse:
        rehearse()
        assert module.layers[0].weight.grad is not None
        assert module.layers[1].num_batches_tracked == 1
    assert all(torch.equal(before, module.state_dict()[name]) for name, before in state.items())
    assert learner.optimiser.state_dict() == optimiser
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(weight.grad is None for weight in module.parameters())


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        if text.startswith("computing with"):
            self.notes.append(text)


@pytest.fixture
def two(monkeypatch):
    """A machine of two processors whose user set no number of threads; returns what is measured there."""
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "TORCH_DEFAULT", 2)
    monkeypatch.setattr(threads, "allowed_processors", lambda: 2)
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    speeds, honest = {1: 62.5, 2: 6.5}, threads.measure

    def measured(work, most, seconds):
        honest(work, most, lambda one: 0.01)  # the work is done all the same
        return threads.Speeds(speeds)

    monkeypatch.setattr(threads, "measure", measured)
    return speeds


def measuring(setup):
    setup.measure_threads, setup.progress = True, Notes()
    return setup


def test_a_stage_begins_with_the_fastest_and_says_so(make_setup, two):
    setup = measuring(make_setup(SMALL))
    run_stage(setup, 1)
    assert setup.progress.notes == ["computing with 1 thread: 1,000 samples a second, against 104 with 2"]
    assert stage_record(setup, 1)["threads"] == 1
    assert torch.get_num_threads() == 2  # of the process
    torch.set_num_threads(1)
    plain = make_setup(SMALL, "plain")
    run_stage(plain, 1)
    assert weights(plain, 1) == weights(setup, 1)  # the measurement changed nothing


def test_a_resumed_stage_keeps_the_number_that_it_began_with(make_setup, two):
    asked = []
    stopped = measuring(make_setup(SMALL))
    stopped.progress, stopped.should_stop = StopAt(2, lambda: asked.append(True)), lambda: bool(asked)
    with pytest.raises(StoppedEarly):
        run_stage(stopped, 1)
    two.update({1: 1.0, 2: 100.0})  # the machine has other things to do now, or none
    resumed = measuring(make_setup(SMALL))
    run_stage(resumed, 1)
    assert stage_record(resumed, 1)["threads"] == 1
    assert resumed.progress.notes == []


def test_a_stage_killed_before_its_first_checkpoint_keeps_it_too(make_setup, two):
    class Killed(Exception):
        pass

    class KilledAtOnce(Silent):
        def advance(self, amount, samples, detail):
            raise Killed

    setup = measuring(make_setup(SMALL))
    setup.progress = KilledAtOnce()
    with pytest.raises(Killed):
        run_stage(setup, 1)
    two.update({1: 1.0, 2: 100.0})
    resumed = measuring(make_setup(SMALL))
    run_stage(resumed, 1)
    assert stage_record(resumed, 1)["threads"] == 1


def test_fewer_processors_than_a_stage_began_with_are_told(make_setup, two, monkeypatch):
    two.update({1: 1.0, 2: 100.0})
    asked = []
    stopped = measuring(make_setup(SMALL))
    stopped.progress, stopped.should_stop = StopAt(2, lambda: asked.append(True)), lambda: bool(asked)
    with pytest.raises(StoppedEarly):
        run_stage(stopped, 1)
    monkeypatch.setattr(threads, "allowed_processors", lambda: 1)
    resumed = measuring(make_setup(SMALL))
    run_stage(resumed, 1)
    assert resumed.progress.notes == [
        "computing with 2 threads, as at the start of this training, on 1 processor: slower, with the same bits"
    ]
    assert stage_record(resumed, 1)["threads"] == 2


def test_the_users_own_number_is_kept(make_setup, two, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    setup = measuring(make_setup(SMALL))
    run_stage(setup, 1)
    assert (setup.progress.notes, stage_record(setup, 1)["threads"]) == ([], 2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(3)  # as a recipe may
    other = measuring(make_setup(SMALL, "other"))
    run_stage(other, 1)
    assert (other.progress.notes, stage_record(other, 1)["threads"]) == ([], 3)


def test_another_number_of_the_users_own_is_told_where_a_stage_is_resumed(make_setup, two):
    asked = []
    stopped = measuring(make_setup(SMALL))
    stopped.progress, stopped.should_stop = StopAt(2, lambda: asked.append(True)), lambda: bool(asked)
    with pytest.raises(StoppedEarly):
        run_stage(stopped, 1)
    torch.set_num_threads(3)
    resumed = measuring(make_setup(SMALL))
    run_stage(resumed, 1)
    assert len(resumed.progress.notes) == 1
    assert resumed.progress.notes[0].startswith("computing with 3 threads, as is set, but this training started with 1")


def test_caches_are_computed_with_the_threads_of_their_module(make_setup, two, monkeypatch):
    setup = measuring(make_setup(SMALL))
    run_stage(setup, 1)
    seen, forward = set(), Module.__call__

    def called(self, *inputs):
        seen.add(torch.get_num_threads())
        return forward(self, *inputs)

    monkeypatch.setattr(Module, "__call__", called)
    write_cache(setup, 1)
    assert seen == {1}
    assert torch.get_num_threads() == 2
