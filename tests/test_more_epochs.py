"""A finished stage is trained for more epochs: the same bits as if they had been asked for at the start."""

from __future__ import annotations

import pytest

from layerwise.errors import NotReady, StoppedEarly
from layerwise.pipeline.caching import write_cache
from layerwise.pipeline.expected import expected
from layerwise.pipeline.frozen import load_frozen, stage_record
from layerwise.pipeline.results import curve
from layerwise.pipeline.schedule import run_stage, run_together
from layerwise.pipeline.status import status
from layerwise.pipeline.verification import verify_run
from layerwise.progress import Silent
from layerwise.recipe.loader import apply_overrides
from tests.conftest import TINY
from tests.test_stage import StopAt, weights


def asked(**training):
    fields = {"epochs": 3, "checkpoint_every": 100, **training}
    overrides = [f"training.{name}={value}" for name, value in fields.items()]
    return apply_overrides(TINY, ["dataset.samples=100", *overrides])


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def told(setup):
    setup.progress = Notes()
    return setup


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("tolerance", [1e-3, 0.5], ids=["improving", "worse-than-its-best"])
def test_the_same_bits_as_from_the_start(make_setup, keep, tolerance):
    rules = {"keep": keep, "tolerance": tolerance, "patience": 50}
    run_stage(make_setup(asked(epochs=2, **rules)), 1)
    for epochs in (3, 5):
        longer = make_setup(asked(epochs=epochs, **rules))
        run_stage(longer, 1)
    whole = make_setup(asked(epochs=5, **rules), "whole")
    run_stage(whole, 1)
    first, second = stage_record(longer, 1), stage_record(whole, 1)
    same = ("weights", "epochs", "best_epoch", "steps", "made_from")
    assert {name: first[name] for name in same} == {name: second[name] for name in same}
    assert [line["loss"] for line in curve(longer.run, first, 1)] == [
        line["loss"] for line in curve(whole.run, second, 1)
    ]


def test_so_it_is_for_modules_trained_together(make_setup):
    fields = ["schedule=simultaneous"]
    run_together(make_setup(apply_overrides(asked(epochs=1), fields)))
    longer, whole = (make_setup(apply_overrides(asked(epochs=2), fields), name) for name in ("run", "whole"))
    run_together(longer)
    run_together(whole)
    assert [weights(longer, number) for number in (1, 2, 3)] == [weights(whole, number) for number in (1, 2, 3)]


def test_stopped_on_the_way_the_frozen_module_stays_until_the_end(make_setup):
    run_stage(make_setup(asked(epochs=1)), 1)
    before = weights(make_setup(asked(epochs=1)), 1)
    stopped, stop = make_setup(asked(epochs=3)), []
    stopped.progress, stopped.should_stop = StopAt(4, lambda: stop.append(True)), lambda: bool(stop)
    with pytest.raises(StoppedEarly):
        run_stage(stopped, 1)
    back = make_setup(asked(epochs=1))
    assert weights(back, 1) == before
    load_frozen(back, 1)
    assert len(curve(back.run, stage_record(back, 1), 1)) == 1
    back.run.follow("tiny", [], None, TINY)
    assert verify_run(back.run.folder).damaged == {}
    resumed, whole = make_setup(asked(epochs=3)), make_setup(asked(epochs=3), "whole")
    run_stage(resumed, 1)
    run_stage(whole, 1)
    assert weights(resumed, 1) == weights(whole, 1)


@pytest.mark.parametrize("patience", [1, 2])
def test_what_had_converged_stays_so_unless_it_gets_more_patience(make_setup, patience):
    rules = {"tolerance": 0.9}  # no epoch after the first improves
    run_stage(make_setup(asked(epochs=4, patience=1, **rules)), 1)
    before = stage_record(make_setup(asked(epochs=4, patience=1, **rules)), 1)
    assert before["epochs"] == 2
    longer = make_setup(asked(epochs=6, patience=patience, **rules))
    run_stage(longer, 1)
    whole = make_setup(asked(epochs=6, patience=patience, **rules), "whole")
    run_stage(whole, 1)
    assert stage_record(longer, 1)["epochs"] == stage_record(whole, 1)["epochs"] == patience + 1
    assert weights(longer, 1) == weights(whole, 1)


def test_fewer_epochs_and_less_patience_than_were_trained_are_refused(make_setup):
    run_stage(make_setup(asked(epochs=3)), 1)
    with pytest.raises(NotReady, match=r"reached epoch 3 already, and training\.epochs is 2.*--fresh"):
        run_stage(make_setup(asked(epochs=2)), 1)
    with pytest.raises(NotReady, match=r"training\.patience: 10 -> 9.*layerwise stage 1 --fresh"):
        run_stage(make_setup(asked(epochs=4, patience=9)), 1)
    assert stage_record(make_setup(asked(epochs=3)), 1)["epochs"] == 3


def test_what_rests_on_it_is_stale_and_the_commands_are_told(make_setup):
    setup = make_setup(asked(epochs=1))
    for number in (1, 2):
        run_stage(setup, number)
        write_cache(setup, number)
    with pytest.raises(NotReady, match=r"training\.epochs: 1 -> 2\).*resume it with: layerwise stage 1 --run-dir"):
        stage_record(make_setup(asked(epochs=2)), 1)
    longer = told(make_setup(asked(epochs=2)))
    run_stage(longer, 1)
    commands = longer.progress.notes[-1].partition("Make it again with: ")[2].split("; ")
    here = f"--run-dir {longer.run.folder}"
    assert commands == [
        f"layerwise cache --module 1 {here}",
        f"layerwise stage 2 --fresh {here}",
        f"layerwise cache --module 2 {here}",
    ]
    states = [
        (module["stage"]["state"], module["cache"]["state"])
        for module in status(longer.run.folder, expected(longer))["modules"]
    ]
    assert states == [("trained", "stale"), ("stale", "stale"), ("not trained", "absent")]


def test_a_checkpoint_that_was_not_kept_is_said_and_costs_nothing(make_setup):
    setup = make_setup(asked(epochs=1, keep_checkpoint=False))
    assert run_stage(setup, 1)["checkpoint_bytes"] == 0
    assert sorted(path.name for path in setup.run.stage(1).iterdir()) == [
        "metrics.jsonl",
        "module.safetensors",
        "stage.json",
    ]
    with pytest.raises(NotReady, match=r"training\.epochs: 1 -> 2.*layerwise stage 1 --fresh"):
        run_stage(make_setup(asked(epochs=2)), 1)


def test_the_disk_that_it_takes_is_known(make_setup):
    setup = make_setup(asked(epochs=3, tolerance=0.9))  # the best epoch is not the last
    record = run_stage(setup, 1)
    files = list(setup.run.stage(1).glob("checkpoint-*.safetensors"))
    assert len(files) == 2
    assert record["checkpoint_bytes"] == sum(path.stat().st_size for path in files)
    sizes = sorted(path.stat().st_size for path in files)
    assert 2.5 * sizes[0] < sizes[1]  # the best weights lie there without the state of an optimiser


def test_status_suggests_what_does_it(make_setup):
    run_stage(make_setup(asked(epochs=2)), 1)
    for fields, fresh in (({"epochs": 3}, False), ({"epochs": 1}, True), ({"batch_size": 17}, True)):
        setup = make_setup(asked(**{"epochs": 2, **fields}))
        found = status(setup.run.folder, expected(setup))
        assert found["modules"][0]["stage"]["state"] == "stale"
        assert ("--fresh" in found["next"]) == fresh
        assert found["modules"][0]["stage"]["reason"].endswith(found["next"])
