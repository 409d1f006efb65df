"""The record of a step against what is predicted, what a real step holds, and tensors whose place is known."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from layerwise.cli import main
from layerwise.memory.predict import predict
from layerwise.memory.timeline import CATEGORIES, timeline
from layerwise.paper.baselines import summed_step
from layerwise.training.step import train_step
from tests.memory.test_predict import CPU, SAMPLES, SMALL, change

RECIPE = str(Path(__file__).parents[1] / "tiny_recipe.py")


@pytest.mark.parametrize(
    ("numbers", "training", "step"),
    [
        ([1], {}, train_step),
        ([2], {"micro_batch": 5, "checkpointing": True}, train_step),
        ([3], {"micro_batch": 5, "precision": "bf16"}, train_step),
        ([1, 2, 3], {}, summed_step),
        ([1, 2, 3], {"micro_batch": 4}, train_step),
    ],
)
def test_the_peak_is_the_predicted_one_to_the_byte(numbers: list[int], training: dict[str, Any], step: Any) -> None:
    recipe = change(SMALL, **training)
    found = timeline(recipe, numbers, SAMPLES, step=step)
    footprint = predict(recipe, numbers, SAMPLES, step=step)
    assert found.peak == footprint.peak
    at_peak = found.at_peak
    assert sum(at_peak.values()) == found.peak
    for name in ("parameters", "gradients", "optimiser"):
        assert at_peak[name] == getattr(footprint, name)
    real = timeline(recipe, numbers, SAMPLES, step=step, device=CPU)
    assert real.peak == pytest.approx(found.peak, rel=0.05)


def test_a_step_ends_with_what_stays() -> None:
    found = timeline(SMALL, [2], SAMPLES)
    last = {name: values[-1] for name, values in found.bytes.items()}
    assert last["parameters"] > 0
    assert last["gradients"] == 0
    assert last["activations"] < max(found.bytes["activations"]) / 10
    assert len(found.times) <= 401
    assert found.times == sorted(set(found.times))
    assert found.times[-1] <= found.events


def test_marks_name_each_module_and_micro_batch_in_their_order() -> None:
    found = timeline(change(SMALL, micro_batch=8), [1, 2], SAMPLES)
    assert [(mark.sweep, mark.micro_batch, mark.module) for mark in found.marks] == [
        (sweep, micro_batch, module) for sweep in (1, 2) for micro_batch in (1, 2) for module in (1, 2)
    ]
    assert [mark.time for mark in found.marks] == sorted(mark.time for mark in found.marks)


def test_the_largest_tensors_have_their_layer_and_shape() -> None:
    found = timeline(SMALL, [2], SAMPLES)
    assert [held.bytes for held in found.largest] == sorted((held.bytes for held in found.largest), reverse=True)
    assert len(found.largest) == 10
    for held in found.largest:
        assert held.layer.startswith("module 2") or held.category in ("inputs", "temporaries")
        assert held.category in CATEGORIES
    [batch] = [held for held in found.largest if held.category == "inputs"]
    assert (batch.shape, batch.dtype) == ((16, 9, 32, 8, 8), "float32")
    assert any("blocks" in held.layer for held in found.largest if held.category == "activations")


def test_activations_are_what_the_backward_needs() -> None:
    """Checkpointing keeps fewer; without a graph there are none."""
    whole, less = (timeline(change(SMALL, checkpointing=one), [2], SAMPLES) for one in (False, True))
    assert less.at_peak["activations"] < whole.at_peak["activations"]
    two_passes = timeline(change(SMALL, micro_batch=4), [1], SAMPLES)
    second = next(mark.time for mark in two_passes.marks if mark.sweep == 2)
    first_pass = [place for place, time in enumerate(two_passes.times) if time < second]
    held = [two_passes.bytes["activations"][place] for place in first_pass]
    # The loss on the representations is taken before the second pass, and has a graph.
    assert max(held) < max(two_passes.bytes["activations"]) / 2


def test_the_command_draws_one_way_and_five(tmp_path: Path) -> None:
    def memreport(*more: str) -> Any:
        asked = ["memreport", "--recipe", RECIPE, "--device", "cpu", "--batch", "4", *more]
        return CliRunner().invoke(main, asked, catch_exceptions=False)

    one, five = tmp_path / "one.svg", tmp_path / "five.svg"
    shown = memreport("--timeline", str(one), "--module", "2", "--real")
    assert shown.exit_code == 0, shown.output
    assert "largest tensors at the peak" in shown.output
    texts = [part.text or "" for part in ElementTree.parse(one).iter() if part.tag.endswith("text")]
    assert any(text.startswith("peak ") for text in texts)
    assert any("real tensors on cpu" in text for text in texts)

    told = memreport("--timeline", str(five), "--compare", "--json")
    assert told.exit_code == 0, told.output
    rows = json.loads(told.stdout)["rows"]
    assert len(rows) == 5
    peaks = [row["peak"] for row in rows]
    assert peaks[2] > peaks[3] > peaks[4], "summed, eager, micro-batched"
    drawn = ElementTree.parse(five).getroot()
    assert sum((part.text or "").startswith("peak ") for part in drawn.iter() if part.tag.endswith("text")) == 5

    for wrong, told_so in (
        (["--compare"], "add --timeline"),
        (["--timeline", "x.svg", "--module", "9"], "numbered from 1"),
        (["--timeline", "x.svg", "--compare", "--module", "1"], "leave out --module"),
        (["--timeline", "x.svg", "--snapshot", "y.pickle"], "CUDA's allocator"),
        (["--timeline", "x.svg", "--depth", "3"], "ask for one of them"),
    ):
        refused = memreport(*wrong)
        assert refused.exit_code == 2
        assert told_so in " ".join(refused.stderr.split())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA device")
def test_a_snapshot_of_the_allocator(tmp_path: Path) -> None:
    asked = ["memreport", "--recipe", RECIPE, "--device", "cuda", "--timeline", str(tmp_path / "a.svg")]
    done = CliRunner().invoke(main, [*asked, "--snapshot", str(tmp_path / "a.pickle")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "a.pickle").stat().st_size > 1000
