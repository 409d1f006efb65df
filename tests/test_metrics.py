"""Metrics: a line that was altered costs its point of the curve, and nothing else."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from layerwise.errors import StoppedEarly
from layerwise.files.metrics import append_metrics, keep_metrics, missing_epochs, read_metrics, sealed_line
from layerwise.pipeline.results import curve
from layerwise.pipeline.schedule import run_stage
from layerwise.recipe.loader import apply_overrides
from tests.conftest import TINY


def line(epoch: int, loss: float = 1.5) -> dict[str, object]:
    return {"epoch": epoch, "step": 6 * epoch, "loss": [loss], "validation_loss": [loss], "seconds": 0.5}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    for epoch in (1, 2, 3):
        append_metrics(tmp_path / "stage" / "metrics.jsonl", line(epoch))
    return tmp_path / "stage" / "metrics.jsonl"


def test_what_is_written_is_read(path: Path) -> None:
    found = read_metrics(path, 1)
    assert (found.epochs, found.damaged, found.torn) == ([line(1), line(2), line(3)], [], False)
    assert read_metrics(path.with_name("none"), 1).epochs == []


def test_every_flip_costs_its_line_and_no_other(path: Path) -> None:
    data = path.read_bytes()
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(np.random.default_rng(at).integers(8))
        path.write_bytes(flipped)
        found = read_metrics(path, 1)
        assert found.damaged or found.torn
        assert all(epoch == line(epoch["epoch"]) for epoch in found.epochs)
        assert len(missing_epochs(found.epochs, 3)) <= 2  # two, where the end of a line was hit


@pytest.mark.parametrize(
    "bad",
    [
        b"{}\n",
        b'{"epoch": 1}\n',
        b"[1]\n",
        b"NaN\n",
        b"\xff\n",
        b"[" * 100_000 + b"\n",
        b'{"epoch": 2, "step": 12, "loss": [1.0], "validation_loss": [1.0], "seconds": 1}\n',  # without a seal
        sealed_line({"epoch": 2}),
        sealed_line({**line(2), "epoch": 10**30}),
        sealed_line({**line(2), "loss": ["1"]}),
        sealed_line({**line(2), "loss": [1.0, 1.0]}),  # of two modules
    ],
)
def test_a_line_that_no_training_writes_is_damaged(path: Path, bad: bytes) -> None:
    path.write_bytes(sealed_line(line(1)) + bad + sealed_line(line(3)))
    found = read_metrics(path, 1)
    assert (found.damaged, missing_epochs(found.epochs, 3)) == ([2], [2])


def test_going_on_keeps_the_lines_of_what_is_done(path: Path) -> None:
    with path.open("ab") as file:
        file.write(sealed_line(line(4))[:20])
    assert keep_metrics(path, 2, 1) == []
    assert path.read_bytes() == sealed_line(line(1)) + sealed_line(line(2))
    path.write_bytes(sealed_line(line(1)).replace(b"1.5", b"1.4") + sealed_line(line(2)))
    assert keep_metrics(path, 2, 1) == [1]
    assert keep_metrics(path.with_name("none"), 0, 1) == []


def test_a_damaged_line_costs_the_curve_and_never_the_training(make_setup) -> None:  # type: ignore[no-untyped-def]
    recipe = apply_overrides(TINY, ["training.epochs=3", "training.patience=3"])
    whole, hurt = make_setup(recipe, "whole"), make_setup(recipe, "hurt")
    run_stage(whole, 1)
    asked: list[bool] = []
    hurt.should_stop = lambda: (hurt.run.stage(1) / "metrics.jsonl").exists() and not asked
    with pytest.raises(StoppedEarly):
        run_stage(hurt, 1)
    path = hurt.run.stage(1) / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"epoch": 1', b'"epoch": 3'))
    asked.append(True)
    notes: list[str] = []
    hurt.progress.note = notes.append
    record = run_stage(hurt, 1)
    assert [note for note in notes if "metrics.jsonl is damaged: the curves miss epoch 1" in note]
    weights = run_stage(whole, 1)["weights"]
    assert record["weights"] == weights
    assert [at["epoch"] for at in curve(hurt.run, record, 1)] == [2, 3]
    path.write_bytes(b"\x00" * 100 + b"\n")
    assert run_stage(hurt, 1)["weights"] == weights  # it is frozen, whatever became of its curve
    assert curve(hurt.run, record, 1) == []
    assert run_stage(hurt, 1, fresh=True)["weights"] == weights
    assert [at["epoch"] for at in curve(hurt.run, record, 1)] == [1, 2, 3]


def test_a_large_file_of_nothing_is_read_at_once(path: Path) -> None:
    path.write_bytes(b"\n" * (8 << 20))
    began = time.process_time()
    assert not read_metrics(path, 1).epochs
    assert time.process_time() - began < 2
