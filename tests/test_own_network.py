"""A network that somebody brings along, with batch statistics and layers that write over their input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from layerwise.errors import LayerwiseError, RecipeError, Unpredictable
from layerwise.files.storage import read_json
from layerwise.memory import Samples, predict
from layerwise.nets.checkpointing import checkpoint_blocks
from layerwise.nets.module import Encoded, Module
from layerwise.pipeline.plan import make_plan
from layerwise.recipe import NetworkSettings
from tests.conftest import TINY
from tests.suggested import message_of, typed

RECIPE = Path(__file__).parent / "resnet18_recipe.py"


@pytest.fixture
def resnet18(tmp_path):
    """Arguments that choose torchvision's ResNet-18 as modules, in a run of the test's own."""
    return ["--recipe", str(RECIPE), "--run-dir", str(tmp_path / "run"), "--device", "cpu"]


def plan_of(arguments):
    told = typed(["plan", *arguments, "--json"])
    return told.exit_code, json.loads(told.stdout)


def test_a_stock_resnet18_is_planned(resnet18) -> None:
    code, plan = plan_of(resnet18)
    assert code == 0
    assert [stage["output"] for stage in plan["stages"]] == [
        [64, 8, 8],
        [64, 8, 8],
        [128, 4, 4],
        [256, 2, 2],
        [512, 1, 1],
    ]
    code, plan = plan_of([*resnet18, "--max-memory", "500MB"])
    assert code == 0
    assert all(stage["fit"]["micro_batch"] is None for stage in plan["stages"]), "batch statistics need whole batches"


def test_under_a_budget_that_is_too_small_every_figure_is_told(resnet18) -> None:
    """Even with activation checkpointing, through layers that write over their input."""
    code, plan = plan_of([*resnet18, "--max-memory", "1MB"])
    assert code == 3
    assert all(stage["fit"]["footprint"]["peak"] > 10**6 for stage in plan["stages"])
    assert len(plan["problems"]) == 5


def test_it_trains_the_same_with_and_without_checkpointing(resnet18, tmp_path) -> None:
    weights = []
    for checkpointing in ("false", "true"):
        again = [*resnet18, f"--set=training.checkpointing={checkpointing}"]
        assert typed(["stage", "1", "--fresh", *again]).exit_code == 0
        weights.append(read_json(tmp_path / "run/stages/1/stage.json")["weights"])
    assert weights[0] == weights[1]
    assert typed(["cache", "--module", "1", *resnet18]).exit_code == 0
    assert typed(["stage", "2", *resnet18]).exit_code == 0


def test_micro_batches_of_batch_statistics_are_refused_with_the_way_out(resnet18) -> None:
    for command in (["plan"], ["stage", "1"]):
        code, message = message_of([*command, *resnet18, "--micro-batch", "4"])
        assert code == 2
        assert "BatchNorm2d" in message
        assert "leave out --micro-batch and --max-memory: whole batches work" in message


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)],
        [nn.Conv2d(1, 4, 3), nn.Identity(), nn.Dropout(0.5, inplace=True), nn.Conv2d(4, 4, 3), nn.ELU(inplace=True)],
    ],
)
def test_blocks_that_write_over_their_input_are_checkpointed_to_the_same_bits(layers) -> None:
    module, x, gradients = nn.ModuleList([nn.Sequential(*layers)]), torch.randn(4, 1, 12, 12), []
    for step in range(4):
        module.zero_grad()
        if step == 2:
            checkpoint_blocks(module)
        torch.manual_seed(step % 2)
        module[0](x).square().sum().backward()
        gradients.append([weight.grad.clone() for weight in module.parameters()])
    for plain, held in ((gradients[0], gradients[2]), (gradients[1], gradients[3])):
        assert all(torch.equal(a, b) for a, b in zip(plain, held, strict=True))


class Failing(Module):
    """`wrong` for real; `odd` only where there are shapes and no values."""

    channels = target_channels = 1

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> Encoded:
        if self.how == "wrong":
            raise KeyError("no such\nlayer")
        made = torch.from_numpy(x.detach().numpy().copy()) * self.weight
        return Encoded(made, made, made)


class Network(NetworkSettings):
    how: str

    def modules(self, sample_shape):
        return [*TINY.network.modules(sample_shape)[:1], Failing(self.how)]


def test_a_module_that_fails_is_named_with_its_error_in_one_line(make_setup) -> None:
    recipe = TINY.model_copy(update={"network": Network(how="wrong")})
    one_line = r"^module 2 \(Failing\) fails on an input of shape \(1, 9, 8, 8, 8\): KeyError: 'no such\\nlayer'$"
    with pytest.raises(RecipeError, match=one_line):
        make_plan(make_setup(recipe))
    with pytest.raises(RecipeError, match=one_line):
        _ = make_setup(recipe).output_shapes
    with pytest.raises(Unpredictable, match=r"module 2 \(Failing\) fails on an input of shape"):
        predict(recipe, [2], Samples((1, 16, 16), {}))


def test_a_module_that_only_prediction_fails_on_is_trained_all_the_same(make_setup) -> None:
    recipe = TINY.model_copy(update={"network": Network(how="odd")})
    plan = make_plan(make_setup(recipe))
    assert plan.fits
    assert plan.stages[1].output == (9, 8, 8, 8)
    assert plan.stages[1].fit is None
    tight = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_memory": 10**9})})
    refused = make_plan(make_setup(tight, "tight"))
    assert not refused.fits
    assert any("module 2 (Failing)" in problem and "\n" not in problem for problem in refused.problems)
    with pytest.raises(LayerwiseError):
        predict(tight, [2], Samples((1, 16, 16), {}))
