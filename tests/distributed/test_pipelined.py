"""A pipeline gives the bits of training all modules in one process, whoever is stopped or killed in between."""

from __future__ import annotations

import random
import signal
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layerwise.errors import Diverged, ProcessLost, RecipeError, StoppedEarly
from layerwise.files.metrics import read_metrics
from layerwise.pipeline.dealing import deal
from layerwise.recipe import Recipe
from layerwise.recipe.loader import load_recipe
from layerwise.training.messages import dense
from layerwise.training.ranks import ALONE
from tests.conftest import TINY
from tests.distributed.forked import forked
from tests.distributed.pipelines import Kill, Stop, never, train

CPU = torch.device("cpu")


def of(recipe: Recipe, schedule: str, **training: Any) -> Recipe:
    changed = recipe.training.model_copy(update=training)
    return recipe.model_copy(update={"schedule": schedule, "training": changed})


def weights(folder: Path) -> dict[str, bytes]:
    found = {
        f"{path.parent.name} {name}": tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for path in sorted(folder.glob("run/stages/*/module.safetensors"))
        for name, tensor in load_file(path).items()
    }
    assert found
    return found


def curves(folder: Path) -> list[tuple[list[float], list[float]]]:
    path = next(folder.glob("run/stages/1-*/metrics.jsonl"))
    records = read_metrics(path, int(path.parent.name[2:])).epochs
    return [(record["loss"], record["validation_loss"]) for record in records]


DIGITS = ["method=greedy-supervised", "network.width=0.125", "dataset.samples=128", "training.epochs=1"]
VOICES = [f"dataset.{field}" for field in ("speakers=4", "utterances=6", "words=2", "lexicon=8")]
VOICES += ["network.channels=8", "network.context.hidden=8", "training.batch_size=4", "training.epochs=1"]
CASES = {
    "whole batches": (3, TINY, {}),
    "micro-batches of 5": (2, TINY, {"micro_batch": 5}),
    "groups of 4, micro-batches of 8": (2, TINY, {"loss_group": 4, "micro_batch": 8}),
    "bf16, module 2 every other step": (2, TINY, {"precision": "bf16", "update_every": (1, 2)}),
    "labels": (2, load_recipe("digits", DIGITS), {}),
    "speech, of differing length": (2, load_recipe("voices", VOICES), {}),
}


BRIEFLY = ("whole batches", "groups of 4, micro-batches of 8")


@pytest.mark.parametrize(
    "case", [case if case in BRIEFLY else pytest.param(case, marks=pytest.mark.long) for case in CASES]
)
def test_a_pipeline_gives_the_bits_of_one_process(case: str, tmp_path: Path) -> None:
    world, recipe, training = CASES[case]
    _, alone = train(of(recipe, "simultaneous", **training), tmp_path / "one", never, ALONE)
    piped = of(recipe, "pipelined", **training)
    found = forked(world, tmp_path / "many", partial(train, piped, tmp_path / "many", never))
    assert found[1:] == [0] * (world - 1)
    notes, told = found[0]
    assert any(f"pipeline over {world} processes" in note for note in notes)
    assert told == alone, "losses of every step and module"
    assert curves(tmp_path / "many") == curves(tmp_path / "one")
    assert weights(tmp_path / "many") == weights(tmp_path / "one")


@pytest.mark.long
def test_more_processes_than_modules_share_batches(tmp_path: Path) -> None:
    recipe = of(TINY, "pipelined", micro_batch=3)
    train(of(TINY, "simultaneous", micro_batch=3), tmp_path / "one", never, ALONE)
    found = forked(5, tmp_path / "many", partial(train, recipe, tmp_path / "many", never))
    assert found[1:] == [0] * 4, found
    for alone, many in zip(curves(tmp_path / "one"), curves(tmp_path / "many"), strict=True):
        assert torch.allclose(torch.tensor(alone), torch.tensor(many), atol=1e-4)


@pytest.mark.parametrize("asking", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_stop_of_any_process_stops_all_after_one_step_and_another_number_goes_on(asking: int, tmp_path: Path) -> None:
    recipe = of(TINY, "pipelined", checkpoint_every=100)
    train(of(TINY, "simultaneous"), tmp_path / "one", never, ALONE)
    many = tmp_path / "many"
    found = forked(2, many, partial(train, recipe, many, Stop(asking, 1)))
    assert [type(error) for error in found] == [StoppedEarly, StoppedEarly], found
    assert str(found[0]) == str(found[1])
    assert not list(many.glob("run/stages/*/module.safetensors"))
    found = forked(3, many, partial(train, recipe, many, Stop(2, 2)))
    assert [type(error) for error in found] == [StoppedEarly] * 3, found
    train(of(TINY, "simultaneous"), many, never, ALONE)
    assert weights(many) == weights(tmp_path / "one")


@pytest.mark.parametrize("dying", [pytest.param(0, marks=pytest.mark.long), 1, pytest.param(2, marks=pytest.mark.long)])
def test_a_killed_process_ends_the_others_and_the_same_command_goes_on(dying: int, tmp_path: Path) -> None:
    recipe = of(TINY, "pipelined", checkpoint_every=2)
    train(of(TINY, "simultaneous"), tmp_path / "one", never, ALONE)
    found = forked(3, tmp_path / "many", partial(train, recipe, tmp_path / "many", Kill(dying, 4)))
    assert found.pop(dying) == -signal.SIGKILL
    assert [type(error) for error in found] == [ProcessLost] * 2, found
    found = forked(3, tmp_path / "many", partial(train, recipe, tmp_path / "many", never))
    assert found[1:] == [0, 0]
    assert weights(tmp_path / "many") == weights(tmp_path / "one")


@pytest.mark.long
def test_a_loss_that_is_not_finite_ends_all_and_is_named_by_the_first_process(tmp_path: Path) -> None:
    recipe = of(TINY, "pipelined")
    rates = {1: {"optimiser": recipe.optimiser.model_copy(update={"learning_rate": 1e30})}}
    recipe = recipe.model_copy(update={"stages": rates})
    found = forked(3, tmp_path, partial(train, recipe, tmp_path, never))
    assert all(isinstance(error, Diverged | ProcessLost) for error in found), found
    assert "the loss of module 1 is nan at step" in str(found[0])


def test_modules_are_dealt_so_that_the_slowest_process_has_least_to_do() -> None:
    found = deal([1, 2, 3, 4], [1, 1, 1, 3], 2)
    assert (found.modules, found.processes) == ([(1, 2, 3), (4,)], (1, 1))
    assert [found.position(rank) for rank in (0, 1)] == [1, 0]  # the first process has the last modules
    assert deal([1, 2, 3], [5, 1, 1], 3).modules == [(1,), (2,), (3,)]
    found = deal([1, 2], [3, 1], 5)
    assert (found.modules, found.processes) == ([(1,), (2,)], (4, 1))
    assert [found.position(rank) for rank in range(5)] == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_no_other_division_is_faster(seed: int) -> None:
    rng = random.Random(seed)
    seconds = [rng.uniform(0.1, 3) for _ in range(7)]
    for processes in range(1, 8):
        found = deal(range(1, 8), seconds, processes)
        assert [number for own in found.modules for number in own] == list(range(1, 8))
        slowest = max(sum(seconds[number - 1] for number in own) for own in found.modules)
        others = (
            max(sum(seconds[begin:end]) for begin, end in zip((0, *cuts), (*cuts, 7), strict=True))
            for cuts in combinations(range(1, 7), processes - 1)
        )
        assert slowest == pytest.approx(min(others))


def test_what_a_pipeline_cannot_do_is_said_before_it_begins(tmp_path: Path) -> None:
    found = forked(5, tmp_path, partial(train, of(TINY, "pipelined", batch_size=1), tmp_path, never))
    assert isinstance(found[0], RecipeError)
    assert "training.batch_size is 1, and 2 processes share each batch" in str(found[0])
    assert found[1:] == [2] * 4


@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (1, 4, 1, 1), (6, 3)], ids=lambda shape: "x".join(map(str, shape)))
def test_a_layout_in_memory_stays_where_it_can(shape: tuple[int, ...]) -> None:
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    layouts = {"contiguous": x, "transposed": x.transpose(0, 1).contiguous().transpose(0, 1)}
    if len(shape) == 4:
        layouts["channels last"] = x.contiguous(memory_format=torch.channels_last)
    for name, tensor in layouts.items():
        for whole in (True, False):
            found = dense(tensor, whole=whole)
            assert torch.equal(found, x), name
            flat = found.as_strided((found.numel(),), (1,), found.storage_offset())
            assert torch.equal(flat.sort().values, x.flatten()), name
            if whole or name != "transposed":
                assert found.stride() == tensor.stride(), name
            else:
                assert torch.equal(flat[: x[0].numel()].sort().values, x[0].flatten()), name
    assert torch.equal(dense(x[:, ::2], whole=True), x[:, ::2])
