"""Settings of one module alone: what they change, what they leave as it was, and what is refused."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from layerwise import memory
from layerwise.cli import main
from layerwise.errors import NotReady, RecipeError
from layerwise.objectives.cross_entropy import CrossEntropy
from layerwise.objectives.infonce import PatchInfoNCE
from layerwise.pipeline.caching import write_cache
from layerwise.pipeline.frozen import stage_identity, stage_record
from layerwise.pipeline.module_cache import cache_key
from layerwise.pipeline.schedule import run_stage, run_together
from layerwise.recipe import Optimiser
from layerwise.recipe.as_json import describe, rebuild
from layerwise.recipe.loader import require_heeded, resolve_recipe
from layerwise.recipe.overrides import apply_overrides, for_stage
from tests.conftest import TINY
from tests.test_stage import weights

QUICK = apply_overrides(TINY, ["dataset.samples=100", "training.epochs=1"])


def asked(*overrides, recipe=QUICK):
    return apply_overrides(recipe, list(overrides))


def with_stages(stages):
    return apply_overrides(QUICK.model_copy(update={"stages": stages}), [])


def test_a_recipe_says_only_what_differs():
    recipe = with_stages({2: {"optimiser": {"learning_rate": 0.5}, "training": {"epochs": 9, "keep": "last"}}})
    second = for_stage(recipe, 2)
    assert (second.optimiser.learning_rate, second.training.epochs, second.training.keep) == (0.5, 9, "last")
    assert second.optimiser.beta2 == recipe.optimiser.beta2
    assert second.training.batch_size == recipe.training.batch_size
    assert for_stage(recipe, 1) == QUICK
    later = apply_overrides(recipe, ["optimiser.weight_decay=0.25", "stages.2.training.epochs=4"])
    assert for_stage(later, 2).optimiser == Optimiser(learning_rate=0.5, weight_decay=0.25)
    assert for_stage(later, 2).training.epochs == 4


def test_settings_may_stand_there_whole():
    recipe = with_stages({2: {"objective": PatchInfoNCE(steps=1, negatives=7), "optimiser": Optimiser(beta1=0.5)}})
    recipe = apply_overrides(recipe, ["stages.2.objective.negatives=6"])
    assert for_stage(recipe, 2).objective == PatchInfoNCE(steps=1, negatives=6)
    assert for_stage(recipe, 2).optimiser == Optimiser(beta1=0.5)
    assert rebuild(json.loads(json.dumps(describe(recipe)))) == recipe


def test_a_stage_and_its_cache_hear_of_their_own_settings_alone(make_setup):
    setup = make_setup(QUICK)
    for number in (1, 2):
        run_stage(setup, number)
        write_cache(setup, number)
    plain = {number: (stage_identity(setup, number), cache_key(setup, number)) for number in (1, 2)}
    assert all("stages" not in identity for identity, _ in plain.values())
    same = make_setup(asked("stages.2.optimiser.learning_rate=0.01", "stages.3.training.epochs=2"))
    assert {number: (stage_identity(same, number), cache_key(same, number)) for number in (1, 2)} == plain
    other = make_setup(asked("stages.2.optimiser.learning_rate=0.02"))
    assert (stage_identity(other, 1), cache_key(other, 1)) == plain[1]
    with pytest.raises(NotReady, match=r"stage 2 .*optimiser\.learning_rate: 0\.01 -> 0\.02\).*stage 2 --fresh"):
        stage_record(other, 2)


def test_a_stage_trains_by_its_own_settings(make_setup):
    """The same as a recipe in which they hold for all."""
    fields = ["optimiser.learning_rate=0.003", "objective.negatives=6", "training.epochs=2"]
    alone = make_setup(asked(*(f"stages.2.{field}" for field in fields)), "alone")
    run_stage(alone, 1)
    write_cache(alone, 1)
    record = run_stage(alone, 2)
    assert record["epochs"] == 2
    every = make_setup(asked(*fields), "alone")
    assert record["made_from"] == stage_identity(every, 2)
    first = make_setup(QUICK, "first")
    run_stage(first, 1)
    assert weights(alone, 1) == weights(first, 1)


def test_modules_trained_together_have_objective_and_optimiser_of_their_own(make_setup):
    plain = asked("schedule=simultaneous")
    own = asked("stages.2.optimiser.learning_rate=0.003", "stages.3.objective.negatives=6", recipe=plain)
    require_heeded(own)
    found = {}
    for name, recipe in (("plain", plain), ("own", own)):
        setup = make_setup(recipe, name)
        run_together(setup)
        found[name] = [weights(setup, number) for number in (1, 2, 3)]
        identity = stage_identity(setup, 1)
        assert (sorted(identity["stages"]) if name == "own" else identity.get("stages")) in (["2", "3"], None)
    assert [a == b for a, b in zip(found["plain"], found["own"], strict=True)] == [True, False, False]


def test_memory_is_predicted_with_the_objective_of_the_module():
    other = CrossEntropy()
    own, all_ = with_stages({2: {"objective": other}}), QUICK.model_copy(update={"objective": other})
    samples = memory.Samples((1, 16, 16), {"class": 10})
    assert memory.fit(own, (2,), samples) == memory.fit(all_, (2,), samples) != memory.fit(QUICK, (2,), samples)
    assert memory.fit(own, (3,), samples) == memory.fit(QUICK, (3,), samples)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.2.optimiser.learning_rat=1", "did you mean stages.2.optimiser.learning_rate?"),
        ("stages.2.optimizer.learning_rate=1", "did you mean stages.2.optimiser"),
        ("stages.2.network.patch=8", "a single module has objective, optimiser, training"),
        ("stages.2.optimiser.learning_rate=-1", "stages.2.optimiser.learning_rate = -1: should be greater than 0"),
        ("stages.2.objective.negatives=x", "stages.2.objective.negatives = 'x': should be a valid integer"),
        (
            "stages.2.training.batch_size=8",
            "epochs, patience, tolerance, keep, noise can. Set it for all with --set tr",
        ),
        ("stages.two.training.epochs=8", "after `stages` comes the number of a module"),
        ("stages.0.training.epochs=8", "after `stages` comes the number of a module"),
        ("stages.2.training=8", "stages.2.training is a group of fields"),
        ("stages.2=8", "stages.2 is a group of fields: set one of them (stages.2.objective"),
        ("stages=8", "stages = 8: should be a valid dictionary"),
    ],
)
def test_wrong_ones_are_refused_with_the_nearest_good_one(override, message):
    with pytest.raises(RecipeError) as refused:
        resolve_recipe(QUICK, [override])
    assert message in str(refused.value)


def test_what_would_have_no_effect_is_refused(make_setup):
    together = asked("schedule=simultaneous", "stages.2.training.epochs=3")
    with pytest.raises(RecipeError, match=r"stages\.2\.training\.epochs would have no effect.*--schedule iterative"):
        require_heeded(together)
    require_heeded(apply_overrides(together, ["stages.2.training=null"]))
    require_heeded(apply_overrides(together, ["together=1"]))
    with pytest.raises(RecipeError, match=r"stages\.1\.training\.noise would have no effect"):
        require_heeded(asked("stages.1.training.noise=0.1"))
    with pytest.raises(RecipeError, match=r"stages\.4 would have no effect: there are modules 1 to 3.*stages\.4=null"):
        run_stage(make_setup(asked("stages.4.training.epochs=2")), 1)
    with pytest.raises(RecipeError, match="the method cpc has no settings for single modules"):
        resolve_recipe(QUICK, ["method=cpc", "stages.2.optimiser.learning_rate=0.1"])
    with pytest.raises(RecipeError, match="replaces the objective PatchInfoNCE by CrossEntropy"):
        resolve_recipe(QUICK, ["method=greedy-supervised", "stages.2.objective.negatives=8"])


def test_scale_and_methods_keep_what_still_means_something():
    overrides = [
        "stages.2.training.epochs=10",
        "stages.2.optimiser.learning_rate=0.1",
        "stages.3.objective.negatives=8",
    ]
    scaled = resolve_recipe(QUICK, [*overrides, "scale=0.25"])
    assert for_stage(scaled, 2).training.epochs == 3
    greedy = resolve_recipe(with_stages(asked(*overrides).stages), ["method=greedy-supervised"])
    assert for_stage(greedy, 2).optimiser.learning_rate == 0.1
    assert for_stage(greedy, 3).objective == greedy.objective
    assert resolve_recipe(with_stages(asked(*overrides).stages), ["method=supervised"]).stages == {}


def test_settings_that_were_meant_for_one_module_are_suggested_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--set=dataset.samples=100", "--set=training.epochs=1", "--run-dir=run"]

    def layerwise(*words):
        return CliRunner().invoke(main, list(words))

    assert layerwise("stage", "1", "--recipe=digits", *small).exit_code == 0
    assert layerwise("cache", "--module=1", "--run-dir=run").exit_code == 0
    refused = layerwise("stage", "2", "--run-dir=run", "--set=optimiser.learning_rate=0.005")
    assert refused.exit_code == 1
    told, _, command = refused.stderr.strip().partition("If the new settings are for module 2 alone: ")
    assert "optimiser.learning_rate: 0.002 -> 0.005" in told
    assert "--set=stages.2.optimiser.learning_rate=0.005" in command.split()
    done = layerwise(*command.split()[1:], "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["made_from"]["optimiser"]["learning_rate"] == 0.005
