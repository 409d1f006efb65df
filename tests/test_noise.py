"""Noise on a stage's inputs: fresh in every epoch, the same however it is read, and on training alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from layerwise.errors import RecipeError
from layerwise.pipeline.caching import write_cache
from layerwise.pipeline.inputs import stage_inputs
from layerwise.pipeline.schedule import run_stage
from layerwise.pipeline.setup import Setup
from layerwise.recipe.loader import require_heeded, resolve_recipe
from layerwise.training.feeds import HOST
from layerwise.training.noise import NoisyFeed
from tests.conftest import TINY


@pytest.fixture
def cached(make_setup: Callable[..., Setup]) -> Setup:
    setup = make_setup(TINY)
    run_stage(setup, 1)
    write_cache(setup, 1)
    return setup


def test_noise_has_the_asked_size_and_is_fresh_in_every_epoch(cached: Setup) -> None:
    plain = stage_inputs(cached, 2)
    noisy = NoisyFeed(plain, 0.5, seed=3)
    added = []
    for epoch in (0, 0, 1):
        clean = next(iter(plain.shuffled(epoch))).inputs_on(HOST)
        disturbed = next(iter(noisy.shuffled(epoch))).inputs_on(HOST)
        deviations = (disturbed - clean).flatten(1).std(1) / clean.flatten(1).std(1)
        torch.testing.assert_close(deviations, torch.full_like(deviations, 0.5), rtol=0.15, atol=0)
        added.append(disturbed - clean)
    assert torch.equal(added[0], added[1])
    assert not torch.equal(added[0], added[2])


def test_micro_batches_and_resumed_epochs_read_the_same_noise(cached: Setup) -> None:
    noisy = NoisyFeed(stage_inputs(cached, 2), 0.5, seed=3)
    batches = list(noisy.shuffled(0))
    whole = batches[1].inputs_on(HOST)
    pieces = [batches[1].inputs_on(HOST, slice(begin, begin + 5)) for begin in range(0, 16, 5)]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(next(iter(noisy.shuffled(0, start=1))).inputs_on(HOST), whole)


def test_validation_is_not_disturbed(cached: Setup) -> None:
    plain = stage_inputs(cached, 2)
    pairs = zip(plain.in_order("validation"), NoisyFeed(plain, 0.5, seed=3).in_order("validation"), strict=True)
    assert all(torch.equal(clean.inputs_on(HOST), noisy.inputs_on(HOST)) for clean, noisy in pairs)


def test_the_first_module_is_not_disturbed_and_the_second_is(make_setup: Callable[..., Setup]) -> None:
    weights = {}
    for noise in (0.0, 0.3):
        training = TINY.training.model_copy(update={"noise": noise})
        setup = make_setup(TINY.model_copy(update={"training": training, "feed": "recompute"}), f"noise-{noise}")
        weights[noise] = [run_stage(setup, number)["weights"] for number in (1, 2)]
    assert weights[0.0][0] == weights[0.3][0]
    assert weights[0.0][1] != weights[0.3][1]


@pytest.mark.parametrize("method", ["cpc", "supervised", "dim", "random"])
def test_noise_that_a_method_would_ignore_is_refused(method):
    require_heeded(resolve_recipe("digits", ["training.noise=0.1"]))
    recipe = resolve_recipe("digits", ["training.noise=0.1", f"method={method}"])
    with pytest.raises(RecipeError, match=rf"noise = 0\.1 would have no effect: .* {method} .*--set training\.noise=0"):
        require_heeded(recipe)
    require_heeded(resolve_recipe("digits", ["training.noise=0", f"method={method}"]))
