"""Speech through the same stages, caches, probes and runs as pictures: whole recordings differ in length."""

from __future__ import annotations

import json
import resource

import numpy as np
import pytest
import torch

import activation_cache
from layerwise.data.dataset import UNKNOWN
from layerwise.data.voices import Voices
from layerwise.errors import RecipeError, StoppedEarly, WillNotFit
from layerwise.nets.speech import Convolution, GRUContext, SpeechEncoder
from layerwise.objectives.frame_infonce import FrameInfoNCE
from layerwise.objectives.objective import Context
from layerwise.pipeline.caching import write_cache
from layerwise.pipeline.frozen import load_frozen
from layerwise.pipeline.inputs import nearest_inputs, stage_inputs
from layerwise.pipeline.module_cache import open_cache
from layerwise.pipeline.plan import make_plan
from layerwise.pipeline.probe import Labelled, features, fit_probe, probe_fixed, probe_module
from layerwise.pipeline.run import open_run
from layerwise.pipeline.schedule import run_all, run_stage
from layerwise.pipeline.setup import Setup
from layerwise.recipe import CacheSettings, Optimiser, Probe, Recipe, SpeechProbes, Training
from layerwise.recipe.loader import apply_overrides
from layerwise.recipe.methods import with_method

TINY = Recipe(
    name="tiny-voices",
    dataset=Voices(speakers=3, utterances=5, words=3, window=8000, validation=0.2),
    network=SpeechEncoder(channels=8, context=GRUContext(hidden=6)),
    objective=FrameInfoNCE(steps=3, negatives=4, window=32),
    optimiser=Optimiser(learning_rate=1e-2),
    training=Training(batch_size=4, epochs=2),
    probe=SpeechProbes(
        phone=Probe(learning_rates=(1e-2,), epochs=2, batch_size=256, initial="xavier", standardise=True),
        speaker=Probe(learning_rates=(1e-2,), epochs=5, standardise=True),
    ),
    cache=CacheSettings(dtype="float32"),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voices")
    TINY.dataset.open(folder, download=False, seed=0)
    return folder


@pytest.fixture
def make(tmp_path, corpus):
    def setup(*overrides, name="run", recipe=TINY):
        return Setup(open_run(tmp_path / name, apply_overrides(recipe, overrides)), torch.device("cpu"), corpus)

    return setup


def test_a_run_probes_both_tasks_after_every_module(make):
    setup = make("training.epochs=1")
    run_all(setup)
    for number in range(1, 7):
        found = probe_module(setup, number)
        assert set(found["tasks"]) == {"speaker", "phone"}
        for task, states in found["tasks"].items():
            for state in ("trained", "untrained"):
                assert 0 <= states[state]["accuracy"] <= 1
                assert states[state]["test_samples"] == (3 if task == "speaker" else states["trained"]["test_samples"])
                assert (states[state]["samples"] > 500) == (task == "phone")
    (mfcc,) = probe_fixed(setup)
    assert mfcc["module"] == "mfcc"
    assert set(mfcc["tasks"]["phone"]) == {"fixed"}


@pytest.mark.parametrize("probe_splits", [True, False])
def test_a_cache_takes_what_was_planned_whole_recordings_included(make, probe_splits):
    setup = make(f"cache.probe_splits={json.dumps(probe_splits)}")
    planned = make_plan(setup).stages[0].cache["float32"]
    run_stage(setup, 1)
    write_cache(setup, 1)
    feed = stage_inputs(setup, 2)
    values = sum(batch.inputs.numel() for split in feed.splits() for batch in feed.in_order(split))
    assert planned == pytest.approx(4 * values, rel=0.002)


def test_whole_recordings_are_stored_without_padding(make):
    setup = make()
    run_stage(setup, 1)
    write_cache(setup, 1)
    cached = open_cache(setup, 1).splits
    assert cached["probe"].shape == (8, None)
    assert cached["train"].shape == (8, 1599)
    samples = [recording.samples for recording in setup.splits.probe.recordings]
    assert len(set(samples)) == len(samples)
    frames = [values.shape for values in cached["probe"].read(np.arange(len(samples)))]
    assert frames == [(8, (count + 4 - 10) // 5 + 1) for count in samples]

    feed = nearest_inputs(setup, 2, ("probe", "test"))
    module = load_frozen(setup, 1)[0]
    for index, batch in enumerate(feed.in_order("probe")):
        assert list(batch.ids) == [setup.splits.probe.ids[index]]
        whole = setup.splits.probe.batch(np.array([index]), None)
        with torch.no_grad():
            torch.testing.assert_close(batch.inputs_on(setup.device), module(whole).output, rtol=0, atol=0)
        for task, labels in setup.splits.probe.labels_of(np.array([index]), None).items():
            assert torch.equal(batch.labels[task], torch.from_numpy(labels))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8"])
def test_every_dtype_holds_them_to_its_precision(make, dtype):
    setup = make(f"cache.dtype={dtype}")
    run_stage(setup, 1)
    write_cache(setup, 1)
    module = load_frozen(setup, 1)[0]
    error = {"float16": 1e-3, "bfloat16": 1e-2, "uint8": 3e-2}[dtype]
    for split in ("train", "test"):
        batch = next(nearest_inputs(setup, 2, (split,)).in_order(split, 0 if split == "train" else None))
        with torch.no_grad():
            exact = module(setup.splits.named()[split].batch(np.arange(len(batch)), 0 if split == "train" else None)).c
        assert (batch.inputs_on(setup.device) - exact).norm() < error * exact.norm()


def test_labelled_splits_may_stay_out_of_the_cache(make):
    setup = make("cache.probe_splits=false")
    for number in (1, 2):
        run_stage(setup, number)
        write_cache(setup, number)
    assert set(open_cache(setup, 2).splits) == {"train", "validation"}
    stored = make(name="stored")
    for number in (1, 2):
        run_stage(stored, number)
        write_cache(stored, number)
    found = probe_module(setup, 2)["tasks"]
    assert found == probe_module(stored, 2)["tasks"]


def test_a_stage_gives_the_same_bits_from_the_cache_and_recomputed(make):
    digests = []
    for feed in ("cache", "recompute"):
        setup = make(f"feed={feed}", name=feed)
        run_all(setup)
        digests.append([run_stage(setup, number)["weights"] for number in range(1, 7)])
    assert digests[0] == digests[1]


def test_a_stopped_stage_goes_on_to_the_same_bits(make):
    straight = [run_stage(make(name="straight"), 1)["weights"]]
    steps = 0

    def stop():
        nonlocal steps
        steps += 1
        return steps == 3

    setup = make(name="stopped")
    setup.should_stop = stop
    with pytest.raises(StoppedEarly):
        run_stage(setup, 1)
    assert [run_stage(make(name="stopped"), 1)["weights"]] == straight


@pytest.mark.parametrize("number", [1, 3, 6])
@pytest.mark.parametrize("bptt", [True, False])
def test_chunked_gradients_are_the_whole_batchs(number, bptt):
    """Forward without a graph, the loss's gradient on the representations, forward again slice by slice: in float64."""
    network = SpeechEncoder(channels=6, context=GRUContext(hidden=5, bptt=bptt))
    torch.manual_seed(0)
    modules = [module.double() for module in network.modules((1, 8000))]
    x = torch.randn(4, 1, 8000, dtype=torch.float64)
    with torch.no_grad():
        for below in modules[: number - 1]:
            x = below(x).output
    module = modules[number - 1]
    objective = FrameInfoNCE(steps=3, window=32).build(module, (1, 8000), {}).double()
    learned = [*module.parameters(), *objective.parameters()]

    def context():
        return Context(torch.Generator().manual_seed(5))

    whole = torch.autograd.grad(objective.loss(objective.represent(module(x)), context()), learned)
    with torch.no_grad():
        parts = [objective.represent(module(x[i : i + 1])) for i in range(4)]
    together = [torch.cat(pieces).requires_grad_() for pieces in zip(*parts, strict=True)]
    objective.loss(tuple(together), context()).backward()
    for i in range(4):
        again = objective.represent(module(x[i : i + 1]))
        pairs = [(part, all_.grad[i : i + 1]) for part, all_ in zip(again, together, strict=True) if part.requires_grad]
        torch.autograd.backward([part for part, _ in pairs], [gradient for _, gradient in pairs])
    for parameter, expected in zip(learned, whole, strict=True):
        assert (parameter.grad - expected).norm() <= 1e-12 * max(expected.norm(), 1e-12)


def test_a_micro_batch_trains_speech_too(make):
    whole, chunked = (run_stage(make(f"training.micro_batch={size}", name=size), 1) for size in ("null", "1"))
    weights = [load_frozen(make(name=size), 1)[0].state_dict() for size in ("null", "1")]
    for name, one in weights[0].items():
        torch.testing.assert_close(one, weights[1][name], rtol=1e-3, atol=1e-4)
    assert whole["steps"] == chunked["steps"]


@pytest.mark.parametrize("method", ["cpc", "supervised", "greedy-supervised"])
def test_the_papers_methods_train_on_speech(make, method):
    setup = make(recipe=with_method(apply_overrides(TINY, ["training.epochs=1"]), method), name=method)
    run_all(setup)
    assert set(probe_module(setup, 6)["tasks"]) == {"speaker", "phone"}


def test_training_windows_keep_their_phones_in_a_cache_of_one_view(make):
    setup = make()
    run_stage(setup, 1)
    write_cache(setup, 1)
    batch = next(stage_inputs(setup, 2).in_order("train", 0))
    expected = setup.splits.train.labels_of(np.arange(4), 0)
    assert torch.equal(batch.labels["phone"], torch.from_numpy(expected["phone"]))
    several = make("cache.views=2", name="several")
    run_stage(several, 1)
    write_cache(several, 1)
    assert set(next(stage_inputs(several, 2).in_order("train", 1)).labels) == {"speaker"}


def test_a_probe_ignores_what_has_no_label(make, tmp_path):
    setup = make()
    split = setup.splits.probe
    split.phones = {name: labels for name, labels in split.phones.items() if name != split.ids[0]}
    module = setup.untrained()[0].eval()
    found = features(nearest_inputs(setup, 1, ()), module, "probe", setup.device, tmp_path / "new")
    assert len(found["speaker"]) == len(split)
    assert len(found["phone"]) == sum(recording.labels for recording in split.recordings[1:])
    assert (found["phone"].labels != UNKNOWN).all()
    assert found["phone"].features.shape[1] == 8
    assert not list((tmp_path / "new").iterdir())


def test_a_probe_that_fills_the_disk_says_so(make, tmp_path):
    setup = make()
    feed, module = nearest_inputs(setup, 1, ()), setup.untrained()[0].eval()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(WillNotFit, match=f"features of the split 'probe' to {tmp_path / 'new'}: File too large"):
            features(feed, module, "probe", setup.device, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "new").iterdir())


def test_standardising_makes_small_features_as_good_as_large_ones():
    torch.manual_seed(0)
    x, labels = torch.randn(400, 5), torch.randint(0, 2, (400,))
    x[:, 0] += 3 * labels
    settings = Probe(learning_rates=(1e-2,), epochs=20, standardise=True)
    small, large = (
        fit_probe(
            Labelled(scale * x[:300] + 7, labels[:300]), Labelled(scale * x[300:] + 7, labels[300:]), 2, settings, 0
        )
        for scale in (1e-3, 1.0)
    )
    assert small.accuracy == pytest.approx(large.accuracy, abs=0.011)
    assert small.accuracy > 0.85
    plain = settings.model_copy(update={"standardise": False})
    poor = fit_probe(Labelled(1e-3 * x[:300], labels[:300]), Labelled(1e-3 * x[300:], labels[300:]), 2, plain, 0)
    assert poor.accuracy < small.accuracy


def test_a_context_without_bptt_is_one_override_and_leaves_the_modules_below_valid(make):
    setup = make("training.epochs=1")
    run_all(setup)
    before = [run_stage(setup, number)["weights"] for number in range(1, 6)]
    other = make("training.epochs=1", "network.context.bptt=false")
    assert [run_stage(other, number)["weights"] for number in range(1, 6)] == before
    assert activation_cache.inspect(other.run.cache(5)).state == "valid"
    without = make("training.epochs=1", "network.context=null")
    assert without.depth == 5
    assert run_stage(without, 5)["weights"] == before[4]


def test_a_stride_that_no_probe_can_use_is_refused_before_anything_is_trained(make):
    layers = tuple(Convolution(kernel=10, stride=stride, padding=4) for stride in (5, 3))
    setup = make(recipe=TINY.model_copy(update={"network": SpeechEncoder(channels=8, layers=layers, context=None)}))
    with pytest.raises(RecipeError, match=r"module 2 cannot be probed for phones: .* every 15: choose strides"):
        run_all(setup)
    assert not (setup.run.folder / "stages").exists()
    unpadded = tuple(Convolution(kernel=20, stride=stride) for stride in (40, 4))
    setup = make(recipe=TINY.model_copy(update={"network": SpeechEncoder(channels=8, layers=unpadded, context=None)}))
    with pytest.raises(RecipeError, match=r"module 2 cannot be probed for phones: .*add padding"):
        make_plan(setup)
