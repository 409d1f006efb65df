"""A method is a change of the recipe; the stage runner, the cache and the probes are those of any recipe."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from layerwise.data.parts import Labelled
from layerwise.errors import RecipeError, UsageError
from layerwise.files.tensors import weights_digest
from layerwise.nets.merged import Merged
from layerwise.objectives.cross_entropy import CrossEntropy
from layerwise.pipeline.caching import write_cache
from layerwise.pipeline.probe import probe_module
from layerwise.pipeline.run import run_name
from layerwise.pipeline.schedule import run_stage
from layerwise.pipeline.setup import Setup
from layerwise.progress import SILENT
from layerwise.recipe import MethodName
from layerwise.recipe.loader import heeded, resolve_recipe
from layerwise.recipe.methods import METHODS, with_method
from layerwise.training.feeds import Batch
from layerwise.training.step import train_step
from tests.conftest import TINY


def test_every_method_that_a_recipe_can_name_is_there() -> None:
    assert list(METHODS) == list(get_args(MethodName))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_through_the_stage_runner_and_is_probed_part_by_part(
    name: MethodName, make_setup: Callable[..., Setup]
) -> None:
    setup = make_setup(with_method(TINY, name))
    assert len(setup.holders) == 3
    for number in range(1, setup.depth + 1):
        record = run_stage(setup, number)
        assert record["epochs"] == (0 if name == "random" else 2)
        untouched = weights_digest(setup.untrained()[number - 1]) == record["weights"]
        assert untouched == (name == "random")
        if number < setup.depth and setup.recipe.feed == "cache":
            write_cache(setup, number)
    for part in (1, 3):
        found = probe_module(setup, part)
        assert found["module"] == part
        assert set(found["tasks"]["class"]) == {"trained", "untrained"}
    with pytest.raises(UsageError, match="modules 1 to 3"):
        probe_module(setup, 4)


@pytest.mark.parametrize("name", ["cpc", "supervised", "greedy-supervised", "predsim", "dim"])
@pytest.mark.parametrize("micro_batch", [1, 5])
def test_micro_batches_give_the_gradients_of_the_whole_batch(
    name: MethodName, micro_batch: int, make_setup: Callable[..., Setup]
) -> None:
    """Both halves of an objective, in float64; plain descent, since Adam would magnify the last bit."""
    setup = make_setup(with_method(TINY, name))
    samples = setup.splits.train
    labels = {task: torch.from_numpy(values[:12]) for task, values in samples.labels.items()}
    batch = Batch(samples.batch(np.arange(12), 0).double(), labels)
    trained = []
    for size in (None, micro_batch):
        learner = setup.learner(1, setup.untrained()[0])
        learner.module.double()
        learner.objective.double()
        weights = [*learner.module.parameters(), *learner.objective.parameters()]
        descent = torch.optim.SGD(weights, lr=1.0)
        train_step([replace(learner, optimiser=descent)], batch, 0, replace(setup.arithmetic, micro_batch=size))
        trained.append([weight.detach() for weight in weights])
    # Weight by weight; Deep InfoMax's scores run to thousands, and lose a digit of small weights to it.
    tolerance = 1e-11 if name == "dim" else 1e-12
    for whole, chunked in zip(*trained, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=tolerance, atol=tolerance)


def test_end_to_end_starts_from_the_weights_of_the_stack(make_setup: Callable[..., Setup]) -> None:
    stack = make_setup(TINY).untrained()
    (merged,) = make_setup(with_method(TINY, "cpc"), "cpc").untrained()
    for apart, part in zip(stack, merged.parts(), strict=True):
        for one, other in zip(apart.parameters(), part.parameters(), strict=True):
            assert torch.equal(one, other)


def test_the_supervised_train_on_four_fifths_of_the_labelled_samples_in_augmented_views() -> None:
    plain = TINY.dataset.open(None, download=False, seed=0, progress=SILENT)
    splits = Labelled(dataset=TINY.dataset).open(None, download=False, seed=0, progress=SILENT)
    assert plain.probe is not None
    train, held = set(splits.train.ids), set(splits.validation.ids)
    assert not train & held
    assert train | held == set(plain.probe.ids)
    assert len(held) == len(plain.probe) // 5
    assert not (train | held) & set(splits.test.ids if splits.test else ())
    position = plain.probe.ids.index(splits.train.ids[3])
    for view in (None, 7):
        ours = splits.train.batch(np.array([3]), view)
        assert torch.equal(ours, plain.probe.batch(np.array([position]), view))
    assert splits.train.labels["class"][3] == plain.probe.labels["class"][position]


def test_an_override_reaches_the_recipe_or_what_the_method_brings() -> None:
    recipe = resolve_recipe("digits", ["method=cpc", "network.context.layers=2", "objective.negatives=3"])
    assert isinstance(recipe.network, Merged)
    assert recipe.network.context is not None
    assert (recipe.network.context.layers, recipe.objective.negatives) == (2, 3)  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match=r"network\.context"):
        resolve_recipe("digits", ["network.context.layers=2"])


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            ["method=supervised", "objective.negatives=4"],
            "objective.negatives=4 would have no effect: the method supervised replaces the objective PatchInfoNCE "
            "by CrossEntropy. Leave it out, or choose another method",
        ),
        (
            ["schedule=simultaneous", "method=cpc"],
            "schedule=simultaneous would have no effect: the method cpc sets schedule to 'iterative'",
        ),
        (
            ["method=random", "training.epochs=3"],
            "training.epochs=3 would have no effect: the method random sets training.epochs to 0",
        ),
    ],
)
def test_an_override_of_what_the_method_replaces_is_refused(overrides: list[str], reason: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(reason)):
        resolve_recipe("digits", overrides)
    kept = heeded("digits", [*overrides, "training.batch_size=8", "network.stem_channels=12"])
    assert [entry.partition("=")[0] for entry in kept] == ["method", "training.batch_size", "network.stem_channels"]
    assert resolve_recipe("digits", kept).training.batch_size == 8


def test_an_override_that_the_method_has_no_reason_to_change_is_heeded() -> None:
    recipe = resolve_recipe("digits", ["method=random", "feed=recompute", "training.batch_size=8"])
    assert (recipe.feed, recipe.training.batch_size, recipe.training.epochs) == ("recompute", 8, 0)
    labelled = resolve_recipe("digits", ["dataset.samples=200", "method=greedy-supervised", "schedule=simultaneous"])
    assert labelled.dataset.dataset.samples == 200  # type: ignore[attr-defined]
    assert labelled.schedule == "simultaneous"


def test_of_the_objective_that_both_have_the_fields_of_the_method_s_own_are_set(tmp_path: Path) -> None:
    path = tmp_path / "labels.py"
    path.write_text(
        "from layerwise.objectives.cross_entropy import CrossEntropy\n"
        "from layerwise.recipe.loader import load_recipe\n"
        "recipe = load_recipe('digits').model_copy(update={'objective': CrossEntropy(pooled=False)})\n"
    )
    objective = resolve_recipe(str(path), ["method=supervised", "objective.task=class"]).objective
    assert objective == CrossEntropy(task="class")


def test_each_method_and_schedule_has_a_run_of_its_own() -> None:
    assert run_name(TINY) == "tiny"
    assert run_name(with_method(TINY, "cpc")) == "tiny-cpc"
    assert run_name(TINY.model_copy(update={"schedule": "simultaneous"})) == "tiny-simultaneous"


def test_a_network_is_not_merged_twice() -> None:
    with pytest.raises(RecipeError, match="already merged into one module"):
        with_method(with_method(TINY, "cpc"), "supervised")
