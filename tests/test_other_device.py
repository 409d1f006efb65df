"""Every tensor of a training, a cache, a probe and a feed is on the device it should be on; checked without a GPU.

`other_device` stands in for one. That it finds a fault is shown by planting one in each of these places.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layerwise.data.digits import Digits
from layerwise.objectives.barlow_twins import BarlowTwins
from layerwise.objectives.contrast import contrast
from layerwise.objectives.nt_xent import NTXent
from layerwise.pipeline import inputs
from layerwise.pipeline.caching import write_cache
from layerwise.pipeline.frozen import load_frozen
from layerwise.pipeline.inputs import stage_inputs
from layerwise.pipeline.probe import fit_probe, probe_module, probe_record
from layerwise.pipeline.run import open_run
from layerwise.pipeline.schedule import run_all, run_stage
from layerwise.pipeline.setup import Setup
from layerwise.recipe import Recipe
from layerwise.recipe.learner import make_learner
from layerwise.recipe.loader import apply_overrides, resolve_recipe
from layerwise.seeding import seeded
from layerwise.training.feeds import Batch, RecomputeFeed, decoder
from layerwise.training.step import Arithmetic, train_step
from tests.conftest import TINY
from tests.other_device import OTHER, WrongDevice, other_device

HOST = torch.device("cpu")
SMALL = TINY.model_copy(
    update={
        "dataset": Digits(samples=100, side=18, crop=16),
        "training": TINY.training.model_copy(update={"epochs": 1, "batch_size": 16}),
        "probe": TINY.probe.model_copy(update={"epochs": 1, "standardise": True}),
        "network": TINY.network.model_copy(update={"groups": TINY.network.groups[:2]}),
    }
)
QUANTISED = apply_overrides(SMALL, ["cache.dtype=uint8"])
Make = Callable[..., Setup]


def found(setup: Setup) -> tuple[list[str], object]:
    """What a run came to: digests of its weights, and what its probes say."""
    run_all(setup)
    weights = [run_stage(setup, number)["weights"] for number in range(1, setup.depth + 1)]
    return weights, (probe_record(setup, setup.depth) or {})["tasks"]


@pytest.mark.long  # the short form: each kind of work that ends well in `test_a_planted_fault_is_found`
@pytest.mark.parametrize(
    "words", [["cache.dtype=uint8"], ["schedule=simultaneous", "training.micro_batch=3", "optimiser.clip_norm=1"]]
)
def test_a_run_on_another_device_gives_the_bits_of_the_host(make_setup: Make, words: list[str]) -> None:
    recipe = apply_overrides(SMALL, words)
    expected = found(make_setup(recipe, "host"))
    with other_device():
        assert found(replace(make_setup(recipe, "other"), device=OTHER)) == expected


@pytest.mark.parametrize("feed", ["cache", "recompute"])
def test_feeds_give_the_samples_of_the_host(make_setup: Make, feed: str) -> None:
    recipe = apply_overrides(SMALL, [f"feed={feed}", "cache.dtype=uint8"])
    setup = make_setup(recipe)
    run_stage(setup, 1)
    if feed == "cache":
        write_cache(setup, 1)
    expected = [batch.inputs_on(HOST) for batch in stage_inputs(setup, 2).shuffled(0)]
    with other_device():
        given = [batch.inputs_on(OTHER) for batch in stage_inputs(replace(setup, device=OTHER), 2).shuffled(0)]
        assert {part.device for part in given} == {OTHER}
        torch.testing.assert_close([part.cpu() for part in given], expected, rtol=0, atol=1e-6)


TRAININGS = {
    "gim": resolve_recipe("digits", ["training.batch_size=4"]),
    "cpc": resolve_recipe("digits", ["method=cpc", "training.batch_size=4"]),
    "labels": resolve_recipe("digits", ["method=greedy-supervised", "training.batch_size=4"]),
    "predsim": resolve_recipe("digits", ["method=predsim", "training.batch_size=4"]),
    "dim": resolve_recipe("digits", ["method=greedy-dim", "training.batch_size=4"]),
    "speech": resolve_recipe("voices", ["training.batch_size=4"]),
    "two views": SMALL.model_copy(update={"objective": NTXent()}),
    "redundancy": SMALL.model_copy(update={"objective": BarlowTwins(widths=(8, 8))}),
}


@pytest.mark.parametrize("recipe", TRAININGS.values(), ids=list(TRAININGS))
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_each_objective_trains_on_its_device(recipe: Recipe, micro_batch: int | None) -> None:
    losses, expected = (one_step(recipe, device, micro_batch) for device in (OTHER, HOST))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop", "LARS", "NAdam"])
def test_each_optimiser_updates_on_its_device(kind: str) -> None:
    recipe = apply_overrides(SMALL, [f"optimiser.kind={kind}", "optimiser.clip_norm=0.1"])
    losses, expected = (one_step(recipe, device, None, steps=2) for device in (OTHER, HOST))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


def one_step(recipe: Recipe, device: torch.device, micro_batch: int | None, steps: int = 1) -> list[list[float]]:
    """The losses of each step of all modules together, on random images."""
    expected = recipe.dataset.expects()
    assert expected is not None
    (shape, classes), size = expected, recipe.training.batch_size
    views = recipe.views_of(1)
    with seeded(0, "images"):
        images = torch.rand(size, *shape) if views == 1 else torch.rand(size, views, *shape)
    labels = {task: torch.arange(size) % count for task, count in classes.items()}
    with other_device() if device == OTHER else nullcontext():
        with seeded(recipe.seed, "modules"):
            modules = recipe.network.modules(shape)
        learners = [
            make_learner(recipe, number, module, shape, classes, device) for number, module in enumerate(modules, 1)
        ]
        batch, arithmetic = Batch(images, labels, views=views), Arithmetic(device, "fp32", micro_batch, recipe.seed)
        return [train_step(learners, batch, number, arithmetic) for number in range(steps)]


def training(setup: Setup) -> None:
    run_stage(setup, 1, fresh=True)


def feeding(setup: Setup) -> None:
    next(stage_inputs(setup, 2).shuffled(0)).inputs_on(setup.device)


def recomputing(setup: Setup) -> None:
    next(inputs._recomputed(setup, 2).shuffled(0))


def caching_outputs(setup: Setup) -> None:
    shutil.rmtree(setup.run.cache(1), ignore_errors=True)
    write_cache(setup, 1)


def probing(setup: Setup) -> None:
    probe_module(setup, 1)


PLANTED: dict[str, tuple[Callable[[Setup], None], str, object]] = {
    "inputs of a training step": (
        training,
        "layerwise.training.feeds.Batch.inputs_on",
        lambda batch, device, chunk=slice(None): batch.inputs[chunk],
    ),
    "negatives of a loss": (
        training,
        "layerwise.objectives.infonce.contrast",
        lambda c, z, every, drawn: contrast(c, z, every, drawn.new_zeros(drawn.shape, device=HOST)),
    ),
    "scales of a quantised cache": (
        feeding,
        "layerwise.training.feeds.decoder",
        lambda dtype, calibration, dimensions, device: decoder(dtype, calibration, dimensions, HOST),
    ),
    "frozen modules below a stage": (
        recomputing,
        "layerwise.pipeline.inputs.load_frozen",
        lambda setup, number: load_frozen(replace(setup, device=HOST), number),
    ),
    "a feed that computes on the host": (
        recomputing,
        "layerwise.pipeline.inputs.RecomputeFeed",
        lambda source, prefix, device, keep: RecomputeFeed(source, [module.cpu() for module in prefix], HOST),
    ),
    "outputs on their way into a cache": (
        caching_outputs,
        "layerwise.pipeline.caching.as_stored",
        lambda values, storage: values.to(OTHER).numpy(),
    ),
    "a module whose outputs are cached": (
        caching_outputs,
        "layerwise.pipeline.caching.load_frozen",
        lambda setup, number: load_frozen(replace(setup, device=HOST), number),
    ),
    "features of a probe": (
        probing,
        "layerwise.pipeline.probe.load_frozen",
        lambda setup, number: load_frozen(replace(setup, device=HOST), number),
    ),
    "a classifier": (
        probing,
        "layerwise.pipeline.probe.fit_probe",
        lambda train, test, classes, settings, seed, device: fit_probe(train, test, classes, settings, seed, HOST),
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose first module is trained and cached."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained") / "run"
    setup = Setup(open_run(folder, QUANTISED), HOST)
    run_stage(setup, 1)
    write_cache(setup, 1)
    return folder


@pytest.mark.parametrize("place", PLANTED)
def test_a_planted_fault_is_found(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    work, target, fault = PLANTED[place]
    shutil.copytree(trained, tmp_path / "run")
    with other_device():
        setup = Setup(open_run(tmp_path / "run", QUANTISED), OTHER)
        monkeypatch.setattr(target, fault)
        with pytest.raises((WrongDevice, RuntimeError), match=r"on the host|is on cpu|numpy"):
            work(setup)
        monkeypatch.undo()
        work(setup)
