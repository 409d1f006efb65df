"""What makes a stage or a cache stale: everything that can change a value in it, and nothing else.

Every field of every recipe here is changed in turn, with the dataset's contents and the weights below held fixed, and
the identity of each stage and the key of each cache must change exactly where the field concerns them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from typing import Any, get_args

import pytest
import torch
from pydantic.fields import FieldInfo

import activation_cache
from layerwise.errors import RecipeError
from layerwise.files.storage import write_json
from layerwise.files.tensors import weights_digest
from layerwise.files.window import Rolling
from layerwise.nets.resnet import PatchResNet
from layerwise.nets.speech import SpeechEncoder
from layerwise.pipeline import frozen, module_cache
from layerwise.pipeline.frozen import stage_identity
from layerwise.pipeline.module_cache import cache_key
from layerwise.pipeline.rolling import settle_rolling
from layerwise.pipeline.setup import Setup
from layerwise.recipe import Recipe, Settings
from layerwise.recipe.loader import apply_overrides, built_in, load_recipe, resolve_recipe
from tests.conftest import TINY

NUMBERS = (1, 2, 3)
MANIFEST = {"train": "a", "validation": "b", "probe": "c", "test": "d"}

RECIPES = {
    "tiny": TINY,
    **{name: load_recipe(name) for name in built_in()},
    "stl10 by cpc": resolve_recipe("stl10", ["method=cpc"]),
    "librispeech by cpc": resolve_recipe("librispeech", ["method=cpc"]),
}

SAYS_NOTHING = {"name", "together"}
"""Fields outside every identity: a name, and what only a simultaneous training heeds."""


@pytest.fixture
def trained(make_setup) -> Callable[..., Setup]:
    """`trained(recipe, **weights)`: a setup whose stages below are recorded as frozen, whatever the recipe."""

    def make(recipe: Recipe = TINY, manifest=MANIFEST, weights=None) -> Setup:
        setup = make_setup(recipe, recipe.name)
        sizes = dict.fromkeys(manifest, 50)
        shape = list((recipe.dataset.expects() or ((1, 64, 64),))[0])
        facts = {"sample_shape": shape, "sizes": sizes, "classes": {}, "manifest": dict(manifest), "notes": []}
        write_json(setup.run.folder / "dataset.json", {"dataset": recipe.dataset.identity(), **facts})
        for number in NUMBERS:
            digest = sha256((weights or {}).get(number, f"weights {number}").encode()).hexdigest()
            went = {"epochs": 1, "best_epoch": 1, "seconds": 1.0, "steps": 1, "peak": {}, "trained_with": [number]}
            record = {"made_from": {}, "sha256": digest, "weights": digest, **went}
            write_json(setup.run.stage(number) / "stage.json", record)
        # Only their number counts here, and a field may have been given a value that no module can be built with.
        setup.__dict__["module_facts"] = [{} for _ in NUMBERS]
        return setup

    return make


def identities(setup: Setup) -> dict[tuple[str, int], Any]:
    """("stage" or "cache", module) to what its validity rests on, in the form in which it is recorded."""
    found: dict[tuple[str, int], Any] = {("stage", n): stage_identity(setup, n) for n in NUMBERS}
    found.update({("cache", n): cache_key(setup, n) for n in NUMBERS})
    return {of: json.loads(json.dumps(value)) for of, value in found.items()}


def changed(before: dict[tuple[str, int], Any], after: Setup) -> set[tuple[str, int]]:
    """What is stale by now."""
    now = identities(after)
    return {of for of in before if before[of] != now[of]}


STAGES, CACHES = {("stage", n) for n in NUMBERS}, {("cache", n) for n in NUMBERS}


def leaves(settings: Any, path: str = "") -> Iterator[tuple[str, Any, FieldInfo]]:
    """(path, value, field) of every field that is no group of fields itself."""
    if isinstance(settings, tuple):
        for index, item in enumerate(settings):
            yield from leaves(item, f"{path}{index}.")
        return
    for name, info in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Settings) or (isinstance(value, tuple) and value and isinstance(value[0], Settings)):
            assert not is_free(info), f"{path}{name}: a group of fields is not free as a whole"
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value, info


def is_free(field: FieldInfo) -> bool:
    return _says(field, "changes_values") is False


def is_for_probes(field: FieldInfo) -> bool:
    """Of a dataset: whether it only says what probes see. No stage hears of it, but the caches hold their splits."""
    return _says(field, "changes_stages") is False


def _says(field: FieldInfo, what: str) -> Any:
    return field.json_schema_extra.get(what) if isinstance(field.json_schema_extra, dict) else None


def options(annotation: Any) -> Iterator[Any]:
    """The words of a Literal, wherever it stands in an annotation."""
    for inner in get_args(annotation):
        yield from [inner] if isinstance(inner, str) else options(inner)


def others(value: Any, field: FieldInfo) -> Iterator[Any]:
    """Values that a field may have instead, for whatever field it is."""
    yield from options(field.annotation)
    match value:
        case bool():
            yield not value
        case int():
            yield from (value + 1, value + 4, value * 2, value - 1, value // 2)
        case float():
            yield from (value * 0.5, value + 0.125, 0.5)
        case None:
            yield from (100, 3, "s3://bucket/prefix", "word", 0.5, True, ["word"], [1, 1, 2], {})
        case tuple():
            yield from ([*value, *value[-1:]], list(value[:-1]), [2, 1], [1, 2], [0.5], ["word"], ["speaker"], [])
        case str():
            yield f"{value}x"
        case dict():
            yield {"2": {"training": {"epochs": 7}}}


USED_WITH = {
    "optimiser.momentum": ("optimiser.kind=SGD", 0.5),
    "optimiser.arguments": ("optimiser.kind=RMSprop", {"alpha": 0.5}),
    "optimiser.schedule_unit": ("optimiser.warmup=2", "steps"),
    "optimiser.cosine_length": ("optimiser.schedule=cosine", 7),
    "optimiser.cosine_end": ("optimiser.schedule=cosine", 0.5),
    "optimiser.step_every": ("optimiser.schedule=step", 7),
    "optimiser.step_factor": ("optimiser.schedule=step", 0.5),
}
"""Fields that are refused unless another is set, with that one and a value."""


def changes(recipe: Recipe) -> Iterator[tuple[str, FieldInfo, Recipe]]:
    """(path, field, the recipe with that field changed), for every field.

    A field for which nothing was found to change it to fails: none is left untried.
    """
    for path, value, field in leaves(recipe):
        # Which modules there are at all has a test of its own, and what changes the other fields has too.
        if path.endswith(".cuts") or path in ("method", "scale"):
            continue
        if path in USED_WITH:  # has a test of its own
            continue
        for other in others(value, field):
            if other == value or (isinstance(value, tuple) and tuple(other) == value):
                continue
            try:
                yield path, field, apply_overrides(recipe, [f"{path}={json.dumps(other)}"])
            except RecipeError:
                continue
            break
        else:
            raise AssertionError(f"no other value was found for {path} = {value!r}: add one to `others`")


def first_module(recipe: Recipe, path: str) -> int:
    """The lowest module that a field of the network concerns."""
    network, (_, *rest) = recipe.network, path.split(".")
    if isinstance(network, PatchResNet) and rest[0] == "groups":
        # In these recipes a module is a group, but for those that cut groups in parts.
        cuts = network.cuts or tuple(group.blocks for group in network.groups)
        before = sum(group.blocks for group in network.groups[: int(rest[1])])
        return next(n for n in range(1, len(cuts) + 1) if sum(cuts[:n]) > before)
    if isinstance(network, SpeechEncoder) and rest[0] == "layers":
        return int(rest[1]) + 1
    if isinstance(network, SpeechEncoder) and rest[0] == "context":
        return len(network.layers) + 1
    return 1


def concerned(recipe: Recipe, path: str) -> set[tuple[str, int]]:
    """What a change of a field that is not free must make stale, all else equal."""
    group, *rest = path.split(".")
    through_cache = recipe.schedule == "iterative" and recipe.feed == "cache"
    match group:
        case "seed" | "dataset":
            return STAGES | CACHES
        case "network":
            lowest = first_module(recipe, path)
            return {(kind, n) for kind, n in STAGES | CACHES if n >= lowest}
        case "objective" | "optimiser" | "training" | "schedule":
            return STAGES  # caches hear of it by the weights
        case "stages":  # of module 2, as `others` gives it
            return {("stage", 2)}
        case "cache" if rest == ["dtype"]:
            return CACHES | ({("stage", 2), ("stage", 3)} if through_cache else set())
        case "cache" if rest == ["views"]:
            return CACHES | ({("stage", 2), ("stage", 3)} if recipe.schedule == "iterative" else set())
        case "feed":
            rounded = recipe.cache.dtype != "float32"
            above = {(kind, n) for kind, n in STAGES | CACHES if n > 1 and (kind == "cache" or through_cache)}
            return above if rounded else set()
        case "probe":
            return set()
    assert group in SAYS_NOTHING, f"{path}: say in this test what it concerns"
    return set()


@pytest.mark.parametrize("name", RECIPES)
def test_each_field_makes_stale_what_it_concerns_and_no_more(trained, name):
    recipe = RECIPES[name]
    if recipe.schedule == "simultaneous":
        recipe = apply_overrides(recipe, ["schedule=iterative"])
    before = identities(trained(recipe))
    assert changed(before, trained(recipe)) == set()
    for path, field, other in changes(recipe):
        expected = set() if is_free(field) else concerned(recipe, path)
        expected -= STAGES if is_for_probes(field) else set()
        assert changed(before, trained(other)) == expected, path


@pytest.mark.parametrize("path", USED_WITH)
def test_so_does_a_field_that_needs_another(trained, path):
    needed, value = USED_WITH[path]
    with pytest.raises(RecipeError, match=path.rpartition(".")[2]):
        apply_overrides(TINY, [f"{path}={json.dumps(value)}"])
    recipe = apply_overrides(TINY, [needed])
    before = identities(trained(recipe))
    assert changed(before, trained(apply_overrides(recipe, [f"{path}={json.dumps(value)}"]))) == STAGES


def test_adam_is_identified_as_before_there_were_others(trained):
    """So that stages of earlier versions stay valid."""
    assert TINY.optimiser.identity() == {
        "kind": "Optimiser", "learning_rate": 0.01, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.0,
    }  # fmt: skip


def test_a_cosine_over_all_epochs_depends_on_their_number(trained):
    recipe = apply_overrides(TINY, ["optimiser.schedule=cosine"])
    assert stage_identity(trained(recipe), 1)["optimiser"]["cosine_length"] == TINY.training.epochs
    together = apply_overrides(TINY, ["schedule=simultaneous", "stages.2.optimiser.schedule=cosine"])
    assert stage_identity(trained(together), 1)["stages"]["2"]["optimiser"]["cosine_length"] == TINY.training.epochs


def test_fields_that_are_free_are_so_together(trained):
    fields = ["codec=zstd", "probe_splits=false", "url=file:///elsewhere", "budget=1000000000", "window_epochs=7"]
    also = ["checkpoint_every=1", "micro_batch=2", "checkpointing=true", "max_memory=1000000000"]
    overrides = [f"cache.{field}" for field in fields] + [f"training.{field}" for field in also]
    assert changed(identities(trained()), trained(apply_overrides(TINY, overrides))) == set()


def test_where_the_network_is_cut(trained):
    recipe = apply_overrides(TINY, ["network.groups.2.blocks=2"])
    before = identities(trained(recipe))
    assert changed(before, trained(apply_overrides(recipe, ["network.cuts=[1,1,2]"]))) == set(), "as it is by default"
    found = changed(before, trained(apply_overrides(recipe, ["network.cuts=[1,2,1]"])))
    assert found == {of for of in STAGES | CACHES if of[1] >= 2}


def test_what_a_module_hands_on_depends_on_the_block_above(trained):
    """A block with a projection reads relu(x) alone, one without it reads x."""
    found = changed(identities(trained()), trained(apply_overrides(TINY, ["network.groups.2.stride=1"])))
    assert found == {(kind, n) for kind, n in STAGES | CACHES if n >= 2}


@pytest.mark.parametrize("other", ["digits", "speech"])
def test_another_kind_of_dataset_network_or_objective(trained, other):
    for field, concerns in (("dataset", STAGES | CACHES), ("network", STAGES | CACHES), ("objective", STAGES)):
        given = getattr(RECIPES[other], field)
        if given != getattr(TINY, field):
            assert changed(identities(trained()), trained(TINY.model_copy(update={field: given}))) == concerns


@pytest.mark.parametrize("split", MANIFEST)
def test_the_contents_of_the_dataset(trained, split):
    found = changed(identities(trained()), trained(manifest={**MANIFEST, split: "other"}))
    assert found == CACHES | (STAGES if split in ("train", "validation") else set()), "no stage sees the labelled ones"


@pytest.mark.parametrize("number", NUMBERS)
def test_the_weights_below(trained, number):
    found = changed(identities(trained()), trained(weights={number: "other"}))
    assert found == {of for of in CACHES if of[1] >= number} | {of for of in STAGES if of[1] > number}


def test_every_byte_of_the_weights_counts():
    def module() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 2), torch.nn.BatchNorm2d(2))

    digest = weights_digest(module())
    assert weights_digest(module()) == digest
    for name, tensor in module().state_dict().items():
        for byte in range(tensor.nbytes):
            altered = module()
            state = altered.state_dict()
            flat = state[name].reshape(-1).view(torch.uint8)
            flat[byte] ^= 1
            assert weights_digest(altered) != digest, (name, byte)
    swapped = torch.nn.Sequential(*reversed(list(module())))
    assert weights_digest(swapped) != digest


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_a_window_instead_of_the_whole(trained, dtype):
    recipe = apply_overrides(TINY, [f"cache.dtype={dtype}"])
    setup = trained(recipe)
    before = identities(setup)
    window = Rolling(slots=4, slot_samples=10, epochs=2)
    settle_rolling(setup, 2, window)
    found = changed(before, setup)
    # Module 3's outputs are computed from the dataset then: from unrounded values.
    assert found == {("cache", 2), ("stage", 3)} | ({("cache", 3)} if dtype != "float32" else set())
    before = identities(setup)
    for other in (replace(window, slots=5), replace(window, slot_samples=11)):
        settle_rolling(setup, 2, other)
        assert changed(before, setup) == {("stage", 3)}, "what is stored whole stays what it is"
    settle_rolling(setup, 2, window)
    assert changed(before, setup) == set()
    for field in ("window_epochs=7", "budget=1000000000"):
        assert changed(before, trained(apply_overrides(recipe, [f"cache.{field}"]))) == {("stage", 3)}, field


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_the_calibration(trained, monkeypatch, dtype):
    setup = trained(apply_overrides(TINY, [f"cache.dtype={dtype}"]))
    before = identities(setup)
    monkeypatch.setattr(module_cache, "CALIBRATION_SAMPLES", module_cache.CALIBRATION_SAMPLES + 1)
    assert changed(before, setup) == (CACHES if dtype == "uint8" else set())


def test_the_versions_of_the_formats(trained, monkeypatch):
    setup = trained()
    before = identities(setup)
    monkeypatch.setattr("activation_cache.format.key.FORMAT", activation_cache.FORMAT + 1)
    assert changed(before, setup) == CACHES
    monkeypatch.setattr(frozen, "FORMAT", frozen.FORMAT + 1)
    assert changed(before, setup) == CACHES | STAGES


def test_a_simultaneous_training_reads_no_cache(trained):
    recipe = apply_overrides(TINY, ["schedule=simultaneous", "cache.dtype=uint8"])
    before = identities(trained(recipe))
    for field in ("cache.dtype=float16", "cache.views=2", "feed=recompute"):
        found = changed(before, trained(apply_overrides(recipe, [field])))
        assert found & STAGES == set(), field


def test_which_modules_are_trained_together(trained):
    recipe = apply_overrides(TINY, ["schedule=simultaneous"])
    before = identities(trained(recipe))
    assert changed(before, trained(apply_overrides(recipe, ["together=3"]))) == set(), "as it is by default"
    assert changed(before, trained(apply_overrides(recipe, ["together=2"]))) == STAGES
