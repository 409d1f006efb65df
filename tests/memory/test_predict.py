"""Predictions against a count of the live bytes of real steps, and the promises about their size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import RecipeError, Unpredictable, WillNotFit
from layerwise.memory import Samples, fit, predict
from layerwise.memory.count import LiveBytes
from layerwise.memory.fit import WAYS, without_ways
from layerwise.nets.module import Encoded, Module
from layerwise.nets.resnet import Group, PatchResNet
from layerwise.objectives.objective import Context, Objective
from layerwise.recipe import NetworkSettings, ObjectiveSettings, Recipe, Shape
from layerwise.recipe.learner import make_learner
from layerwise.recipe.loader import load_recipe, resolve_recipe
from layerwise.seeding import seeded
from layerwise.training.feeds import Batch, decoder
from layerwise.training.step import Arithmetic, train_step
from tests.conftest import TINY

CPU = torch.device("cpu")
SMALL = TINY.model_copy(
    update={
        "network": PatchResNet(
            patch=8,
            patch_stride=4,
            stem_channels=8,
            groups=(Group(channels=32, blocks=1), Group(channels=64, blocks=2, stride=2), Group(channels=64, blocks=1)),
        )
    }
)
SAMPLES = Samples((1, 16, 16), {"class": 10})
PAPER = load_recipe("stl10", ["training.batch_size=16"])
PAPER_SAMPLES = Samples((1, 64, 64), {"class": 10})


def change(recipe: Recipe, **training: Any) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=training)})


def counted(recipe: Recipe, numbers: Sequence[int], stored: torch.dtype) -> int:
    """Peak of live bytes in a real second step, inputs as a feed gives them."""
    with LiveBytes() as live:
        with seeded(0, "modules"):
            modules = recipe.network.modules(SAMPLES.shape)
        x = torch.randn(recipe.training.batch_size, *SAMPLES.shape)
        with torch.no_grad():
            for number in range(1, numbers[0]):
                x = modules[number - 1](x).output
        learners = [make_learner(recipe, n, modules[n - 1], SAMPLES.shape, SAMPLES.classes, CPU) for n in numbers]
        labels = {"class": torch.zeros(len(x), dtype=torch.long)}
        batch = Batch(x.to(stored), labels, decode=decoder(str(stored)[6:], None, x.dim() - 1, CPU))
        del modules, x
        arithmetic = Arithmetic(CPU, recipe.training.precision, recipe.training.micro_batch, 0)
        train_step(learners, batch, 0, arithmetic)
        live.reset_peak()
        train_step(learners, batch, 1, arithmetic)
        return live.peak


@pytest.mark.parametrize("numbers", [[1], [2], [3], [1, 2, 3]])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("micro_batch", [None, 5, 1])
def test_a_prediction_is_within_5_percent_of_a_real_step(
    numbers: list[int], precision: str, micro_batch: int | None
) -> None:
    recipe = change(SMALL, micro_batch=micro_batch, precision=precision)
    recipe = recipe.model_copy(update={"cache": recipe.cache.model_copy(update={"dtype": "float16"})})
    found = predict(recipe, numbers, SAMPLES, host_apart=False)
    real = counted(recipe, numbers, torch.float32 if numbers[0] == 1 else torch.float16)
    assert found.peak == pytest.approx(real, rel=0.05)


def test_parts_add_up_and_are_what_they_say() -> None:
    found = predict(change(SMALL, micro_batch=1), [2], SAMPLES)
    module = SMALL.network.modules(SAMPLES.shape)[1]
    objective = SMALL.objective.build(module, SAMPLES.shape, {})
    weights = 4 * sum(p.numel() for part in (module, objective) for p in part.parameters())
    assert found.parameters == weights
    assert found.gradients == weights
    assert found.optimiser == pytest.approx(2 * weights, rel=0.01)  # Adam: two moments, and a count of steps
    parts = (found.parameters, found.gradients, found.optimiser, found.inputs, found.activations)
    assert sum(parts) == found.peak
    assert found.inputs == 4 * 9 * 32 * 8 * 8  # one sample: the others wait in the host's memory


def test_inputs_in_the_hosts_memory_count_where_it_is_the_devices() -> None:
    recipe = change(SMALL, micro_batch=1)
    apart, same = (predict(recipe, [2], SAMPLES, host_apart=apart) for apart in (True, False))
    assert same.peak - apart.peak == pytest.approx(15 * 4 * 9 * 32 * 8 * 8, rel=0.1)


def test_a_recomputed_stage_counts_the_frozen_modules_below() -> None:
    recomputed = SMALL.model_copy(update={"feed": "recompute"})
    below = 4 * sum(p.numel() for module in SMALL.network.modules(SAMPLES.shape)[:2] for p in module.parameters())
    assert predict(recomputed, [3], SAMPLES).parameters - predict(SMALL, [3], SAMPLES).parameters == below


def test_the_papers_network_takes_what_is_promised() -> None:
    """At batch 16 in float32: eager at most 1.20 times the largest module; each module no more than alone."""
    alone = [predict(PAPER, [number], PAPER_SAMPLES).peak for number in (1, 2, 3)]
    together = predict(PAPER, [1, 2, 3], PAPER_SAMPLES).peak
    assert together <= 1.20 * max(alone)
    ones = change(PAPER, micro_batch=1)
    assert all(predict(ones, [number], PAPER_SAMPLES).peak <= 0.25 * 2**30 for number in (1, 2, 3))
    assert predict(ones, [1, 2, 3], PAPER_SAMPLES).peak <= 0.35 * 2**30


def test_a_budget_chooses_the_largest_micro_batch_that_fits() -> None:
    whole = fit(SMALL, [2], SAMPLES)
    assert whole.micro_batch is None
    assert fit(change(SMALL, max_memory=whole.footprint.peak), [2], SAMPLES) == whole
    less = fit(change(SMALL, max_memory=whole.footprint.peak - 1), [2], SAMPLES)
    assert less.micro_batch == 8
    assert less.footprint.peak < whole.footprint.peak
    one = predict(change(SMALL, micro_batch=1), [2], SAMPLES).peak
    assert fit(change(SMALL, max_memory=one), [2], SAMPLES).micro_batch == 1
    last = fit(change(SMALL, max_memory=one - 1), [2], SAMPLES)
    assert (last.micro_batch, last.checkpointing) == (1, True)
    least = predict(last.applied(SMALL), [2], SAMPLES).peak
    assert least == last.footprint.peak < one
    with pytest.raises(WillNotFit, match=r"module 2 in micro-batches of 1 with .* What would fit: --max-memory"):
        fit(change(SMALL, max_memory=least - 1), [2], SAMPLES)


def test_what_a_refusal_advises_fits() -> None:
    with pytest.raises(WillNotFit) as refused:
        fit(change(SMALL, max_memory=1000), [1, 2, 3], SAMPLES)
    assert refused.value.exit_code == 3
    advised = int(str(refused.value).split("--max-memory ")[1].split("MB")[0]) * 10**6
    assert fit(change(SMALL, max_memory=advised), [1, 2, 3], SAMPLES).footprint.peak <= advised


def test_a_budget_goes_below_the_recipes_own_micro_batch() -> None:
    four, one = (predict(change(SMALL, micro_batch=m), [2], SAMPLES).peak for m in (4, 1))
    assert one < four
    assert fit(change(SMALL, micro_batch=4, max_memory=four), [2], SAMPLES).micro_batch == 4
    assert fit(change(SMALL, micro_batch=4, max_memory=one), [2], SAMPLES).micro_batch == 1


def test_a_refusal_advises_only_what_was_predicted_to_fit() -> None:
    hopeless = change(SMALL, micro_batch=4, max_memory=1000)
    with pytest.raises(WillNotFit, match=r"What would fit: --max-memory \d+MB$"):
        fit(hopeless, [1, 2, 3], SAMPLES)
    together = change(SMALL.model_copy(update={"schedule": "simultaneous"}), micro_batch=1)
    least = fit(change(together, checkpointing=True), [1, 2, 3], SAMPLES).footprint.peak
    with pytest.raises(WillNotFit) as refused:
        fit(change(together, max_memory=least - 1), [1, 2, 3], SAMPLES)
    told = str(refused.value)
    assert "--schedule iterative" in told
    assert "--micro-batch" not in told
    if "training.batch_size=" in told:
        smaller = int(told.split("training.batch_size=")[1])
        assert fit(change(together, batch_size=smaller, max_memory=least - 1), [1, 2, 3], SAMPLES)
    for number in (1, 2, 3):
        assert fit(change(SMALL, micro_batch=1, max_memory=least - 1), [number], SAMPLES)


def test_a_refusal_advises_no_batch_that_the_objective_refuses() -> None:
    recipe = resolve_recipe("digits", ["method=dim", "training.batch_size=2", "training.max_memory=1000"])
    with pytest.raises(WillNotFit, match=r"What would fit: --max-memory \d+MB$"):
        fit(recipe, [1], Samples(*recipe.dataset.expects()))


class Strange(NetworkSettings):
    """One linear module, with batch statistics where asked for."""

    statistics: bool = False

    def modules(self, sample_shape: Shape) -> list[Module]:
        return [Flat(self.statistics)]


class Flat(Module):
    channels = 4

    def __init__(self, statistics: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(256, 4)
        self.norm = nn.BatchNorm1d(4) if statistics else nn.Identity()

    def forward(self, x: Tensor) -> Encoded:
        z = self.norm(self.linear(x.flatten(1)))[..., None]
        return Encoded(z, z, z)


class Picky(ObjectiveSettings):
    """Takes the samples whose first feature is positive: a shape that depends on values, where asked for."""

    by_value: bool = False

    def build(self, module: Module, sample_shape: Shape, classes: Mapping[str, int]) -> Objective:
        return PickyLoss(self.by_value)


class PickyLoss(Objective):
    def __init__(self, by_value: bool) -> None:
        super().__init__()
        self.by_value = by_value

    def loss(self, representations: tuple[Tensor, ...], context: Context) -> Tensor:
        z = representations[0]
        return (z[z[:, 0, 0] > 0] if self.by_value else z).square().mean()


def strange(statistics: bool = False, by_value: bool = False, **training: Any) -> Recipe:
    parts = {"network": Strange(statistics=statistics), "objective": Picky(by_value=by_value)}
    return change(TINY.model_copy(update=parts), **training)


def test_batch_statistics_leave_the_whole_batch_or_nothing() -> None:
    whole = fit(strange(statistics=True), [1], SAMPLES).footprint.peak
    assert fit(strange(statistics=True, max_memory=whole), [1], SAMPLES).micro_batch is None
    with pytest.raises(WillNotFit, match=r"module 1 in whole batches .*\(batch 16\)"):
        fit(strange(statistics=True, max_memory=whole - 1), [1], SAMPLES)
    with pytest.raises(RecipeError, match="BatchNorm1d"):
        fit(strange(statistics=True, micro_batch=2), [1], SAMPLES)


def test_shapes_that_depend_on_values_are_said_to_be_unpredictable() -> None:
    with pytest.raises(Unpredictable, match="depends on values"):
        predict(strange(by_value=True), [1], SAMPLES)


def test_what_would_fit_several_modules_is_said_once():
    refusals = [f"module {number} needs{WAYS}--max-memory {number}1MB, or --set a=1" for number in (1, 2)]
    assert without_ways(refusals) == (["module 1 needs", "module 2 needs"], 21)
    assert without_ways(refusals[:1]) == (refusals[:1], None)
    assert without_ways([refusals[0], "another"]) == ([refusals[0], "another"], None)
