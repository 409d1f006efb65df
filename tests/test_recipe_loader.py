"""Error texts are part of the interface: one line that says what was asked, what is there, and the nearest good one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from layerwise.errors import RecipeError
from layerwise.recipe import Recipe
from layerwise.recipe.loader import apply_overrides, built_in, load_recipe, summary


def refused(source: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as raised:
        load_recipe(source, overrides)
    return str(raised.value)


FIELDS = ", ".join(Recipe.model_fields)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batchsize=3", "there is no field 'training.batchsize': did you mean training.batch_size?"),
        ("trainin.epochs=3", "there is no field 'trainin.epochs': did you mean training.epochs?"),
        ("epochs=3", "there is no field 'epochs': did you mean training.epochs or probe.epochs?"),
        ("width=2", "there is no field 'width': did you mean network.width?"),
        (
            "cache.url=s3:/x",
            "cache.url = 's3:/x': does not have the required form (address of the caches, if not in the run: "
            "s3://bucket/prefix, gs://, az:// or file://)",
        ),
        ("zzz=3", f"there is no field 'zzz': the recipe has {FIELDS}"),
        ("network.groups.3.blocks=2", "there is no field 'network.groups.3.blocks': network.groups has 0, 1, 2"),
        ("seed.x=3", "there is no field 'seed.x': seed has no fields of its own"),
        (
            "objective=3",
            "objective is a group of fields: set one of them (objective.steps, objective.skip, objective.negatives)",
        ),
        (
            "training.batch_size=0",
            "training.batch_size = 0: should be greater than or equal to 1; the nearest valid value is 1",
        ),
        (
            "training.epochs=3.6",
            "training.epochs = 3.6: should be a valid integer, got a number with a fractional part; "
            "the nearest valid value is 4",
        ),
        (
            "network.groups.0.channels=66",
            "network.groups.0.channels = 66: should be a multiple of 4; the nearest valid value is 64",
        ),
        (
            "cache.dtype=float8",
            "cache.dtype = 'float8': should be 'float32', 'float16', 'bfloat16' or 'uint8'; did you mean float32?",
        ),
        ("optimiser.learning_rate=-1", "optimiser.learning_rate = -1: should be greater than 0"),
        ("optimiser.learning_rate=Infinity", "optimiser.learning_rate = inf: should be a finite number"),
        ("probe.learning_rates=[]", "probe.learning_rates = []: should have at least 1 item after validation, not 0"),
        (
            "name=../x",
            "name = '../x': does not have the required form (name of the runs: letters, digits, - and _, at most 64 "
            "characters)",
        ),
        ("network.cuts=[1]", "network: cuts (1,) must be positive and add up to the network's 3 blocks"),
        (
            'network.groups=[{"chanels":8,"blocks":1}]',
            "there is no field 'network.groups.0.chanels': did you mean network.groups.0.channels?",
        ),
        ('network.groups=[{"channels":8}]', "network.groups.0.blocks is missing"),
        ("seed", "--set takes key=value, as in --set objective.negatives=32; got 'seed'"),
        ("=3", "--set takes key=value, as in --set objective.negatives=32; got '=3'"),
    ],
)
def test_a_bad_override_is_answered_in_one_line(override: str, message: str) -> None:
    assert refused("digits", override) == message


def test_a_group_that_may_be_absent_says_how() -> None:
    assert refused("voices", "network.context=none") == (
        "network.context is a group of fields: set one of them (network.context.hidden, network.context.bptt), "
        "or leave it out with network.context=null"
    )


def test_an_unknown_recipe_names_the_nearest() -> None:
    assert refused("digit") == (
        "there is no recipe 'digit': did you mean digits? To use your own recipe, give a path that ends in .py"
    )
    assert refused("wombat") == (
        f"there is no recipe 'wombat': there are {', '.join(built_in())}. "
        "To use your own recipe, give a path that ends in .py"
    )
    assert refused("mine.py") == "there is no file 'mine.py' to load a recipe from"


def test_overrides_change_what_they_name_and_nothing_else() -> None:
    before = load_recipe("digits")
    after = load_recipe(
        "digits", ["training.epochs=3", " cache.codec = none ", "network.groups.1.channels=32", "seed=7"]
    )

    wanted = before.model_dump()
    wanted["training"]["epochs"] = 3
    wanted["cache"]["codec"] = "none"
    wanted["network"]["groups"][1]["channels"] = 32
    wanted["seed"] = 7
    assert after.model_dump() == wanted
    assert isinstance(after, Recipe)
    assert type(after.dataset) is type(before.dataset)


def test_fields_that_must_agree_may_be_given_in_any_order() -> None:
    overrides = ["dataset.crop=224", "dataset.resize=256"]
    assert load_recipe("images", overrides) == load_recipe("images", overrides[::-1])


def test_the_last_of_two_counts() -> None:
    assert load_recipe("digits", ["seed=1", "seed=2"]).seed == 2


def test_no_overrides_change_nothing() -> None:
    recipe = load_recipe("digits")
    assert apply_overrides(recipe, []) == recipe


@pytest.mark.parametrize("name", sorted(built_in()))
def test_every_built_in_recipe_loads_and_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name)

    assert recipe.name == name
    assert 20 < len(summary(built_in()[name])) < 120
    json.dumps(recipe.model_dump(mode="json"))


MINE = """
from layerwise.recipe.loader import load_recipe
recipe = load_recipe("digits", ["name=mine"])
"""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("recipe = 3", "must define `recipe = Recipe(…)`; it defines a recipe of type int"),
        ("", "must define `recipe = Recipe(…)`; it defines no recipe"),
        ("1 / 0", "could not be run: ZeroDivisionError: division by zero"),
        ("raise ValueError('two\\n  lines')", "could not be run: ValueError: two lines"),
        ("def", "could not be run: SyntaxError: invalid syntax"),
        ("import nowhere_to_be_found", "could not be run: ModuleNotFoundError"),
        (
            "from layerwise.recipe import Training\nTraining(batchsize=3)",
            "there is no field 'batchsize': did you mean batch_size?",
        ),
        (MINE.replace("name=mine", "sed=3"), "there is no field 'sed': did you mean seed?"),
    ],
)
def test_a_bad_file_is_answered_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(content)

    answer = refused(str(path))

    assert message in answer
    assert "\n" not in answer


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "a recipe, mine.py"
    path.write_text(MINE)
    assert load_recipe(str(path), ["seed=3"]).seed == 3


NAMES = st.one_of(
    st.text(),
    st.sampled_from(
        ["..", ".", "/", "../digits", "recipes/digits", "./digits", "digits/", "/etc/passwd", "digits\n", "\0"]
    ),
    st.lists(st.sampled_from(["..", "digits", "/", "\\", "\0", "\n", "\x1b[2J", "é", "~", "$HOME", "%2e"])).map(
        "".join
    ),
)


@given(NAMES)
def test_a_name_is_never_a_path(name: str) -> None:
    assume(name not in built_in() and not name.endswith(".py"))
    answer = refused(name)
    assert answer.isprintable()
    assert repr(name) in answer


@given(NAMES)
def test_a_path_to_nothing_is_answered_in_one_line(name: str) -> None:
    assume(not os.path.exists(name + ".py"))
    assert refused(name + ".py").isprintable()


def test_a_file_beside_the_recipes_is_not_run_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "trap.py").write_text(f"open({str(canary)!r}, 'w')")
    monkeypatch.chdir(tmp_path)

    for name in ("trap", "./trap", "../" + tmp_path.name + "/trap", "trap.py\n", "trap.py/", "trap.txt"):
        refused(name)
    assert not canary.exists()
    refused("trap.py")
    assert canary.exists(), "an explicit path is"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
DIGITS = load_recipe("digits")


def every_field(settings: Any, above: str = "") -> list[str]:
    names: list[str] = []
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        names += every_field(value, f"{above}{name}.") if hasattr(type(value), "model_fields") else [above + name]
    return names


def answer_to(override: str) -> str | None:
    """What is said of an override to `digits`; None where it is taken."""
    try:
        recipe = apply_overrides(DIGITS, [override])
    except RecipeError as error:
        return str(error)
    json.dumps(recipe.model_dump(mode="json"), allow_nan=False)
    return None


@given(st.sampled_from(every_field(DIGITS)), VALUES)
def test_any_value_is_taken_or_answered_in_one_line(field: str, value: object) -> None:
    answer = answer_to(f"{field}={json.dumps(value)}")
    assert answer is None or (answer.isprintable() and field.split(".")[0] in answer and len(answer) < 600)


@given(st.text(), st.text())
def test_any_text_is_taken_or_answered_in_one_line(field: str, text: str) -> None:
    answer = answer_to(f"{field}={text}")
    assert answer is None or answer.isprintable()


def test_nested_beyond_reason() -> None:
    assert "should be" in refused("digits", "seed=" + "[" * 100_000)


def test_a_loaded_file_finds_itself(tmp_path: Path) -> None:
    """Classes defined in a recipe look up their module while it is executed."""
    path = tmp_path / "own.py"
    path.write_text(MINE + "import sys\nassert sys.modules[__name__].recipe is recipe\n")
    load_recipe(str(path))


def test_two_recipes_of_one_name_are_two_modules(tmp_path: Path) -> None:
    """Each with its own helper of one name, too."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.py").write_text(
            "from helper import NAME\nfrom layerwise.recipe import CacheSettings\n"
            "class Mine(CacheSettings):\n    pass\n"
            + MINE.replace('"name=mine"', 'f"name={NAME}"')
            + "recipe = recipe.model_copy(update={'cache': Mine()})\n"
        )
        (tmp_path / name / "helper.py").write_text(f"NAME = {name!r}\n")
    first, second = (load_recipe(str(tmp_path / name / "own.py")) for name in ("a", "b"))
    assert (first.name, second.name) == ("a", "b")
    modules = [type(recipe.cache).__module__ for recipe in (first, second)]
    assert len({*modules}) == 2
    assert all(sys.modules[module].recipe.name == name for module, name in zip(modules, "ab", strict=True))


def test_an_edit_counts_however_soon_it_comes(tmp_path: Path) -> None:
    """Python's cache of compiled files tells edits apart by the second and the size."""
    path, helper = tmp_path / "own.py", tmp_path / "helper.py"
    path.write_text("from helper import SEED\n" + MINE.replace('"name=mine"', 'f"seed={SEED}"'))
    for seed in (1, 2, 3):
        helper.write_text(f"SEED = {seed}\n")
        os.utime(helper, (0, 0))
        assert load_recipe(str(path)).seed == seed


def test_an_optional_group_can_be_left_out() -> None:
    network = load_recipe("voices", ["network.context=null"]).network
    assert not network.has_context
    with pytest.raises(RecipeError, match=r"optimiser"):
        load_recipe("voices", ["optimiser=null"])
