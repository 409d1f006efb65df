"""Code of the user's own is part of what stages, caches and probes are made from: an edit makes them stale."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from layerwise.cli import main
from layerwise.errors import RecipeError
from layerwise.recipe import Recipe, Settings
from layerwise.recipe.loader import built_in, load_recipe, resolve_recipe
from layerwise.settings.sources import local_files

RECIPE = '''
"""A recipe whose dataset, network and objective are classes of its own."""
import torch
from pathlib import Path
from helpers.scale import times
from layerwise.data.digits import Digits
from layerwise.nets.resnet import Group, PatchResNet
from layerwise.objectives.infonce import PatchInfoNCE, PatchInfoNCELoss
from layerwise.recipe import Optimiser, Probe, Recipe, Training

class Loss(PatchInfoNCELoss):
    def loss(self, representations, context):
        """Scaled."""
        return super().loss(representations, context) * 1.0

class Objective(PatchInfoNCE):
    """Chooses it."""
    def build(self, module, sample_shape, classes):
        return Loss(module.target_channels, module.channels, self.steps, self.skip, self.negatives)

class Network(PatchResNet):
    def modules(self, sample_shape):
        found = super().modules(sample_shape)
        found[0].register_forward_hook(lambda module, inputs, encoded: encoded._replace(output=times(encoded.output)))
        return found

class Data(Digits):
    def open(self, data_dir, **kwargs):
        splits = super().open(data_dir, **kwargs)
        read = splits.train.batch
        splits.train.batch = lambda indices, view: read(indices, view) + 0.0
        return splits

recipe = Recipe(
    name="own",
    dataset=Data(samples=100, side=18, crop=16),
    network=Network(patch=8, patch_stride=4, stem_channels=4, groups=(Group(channels=8, blocks=1),) * 2),
    objective=Objective(steps=1, negatives=4),
    optimiser=Optimiser(learning_rate=1e-2),
    training=Training(batch_size=16, epochs=1),
    probe=Probe(epochs=1),
)
'''
HELPERS = {
    "helpers/__init__.py": "",
    "helpers/scale.py": "from .constants import FACTOR\ndef times(x):\n    return x * FACTOR\n",
    "helpers/constants.py": "import json\nFACTOR = 1.0\n",
    "unused.py": "FACTOR = 1.0\n",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(RECIPE)
    for name, content in HELPERS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return path


def identities(recipe: Recipe) -> list[object]:
    """As JSON: of each of the classes of one's own."""
    found = [recipe.dataset.identity(of_stages=True), recipe.network.through(1), recipe.objective.identity()]
    return [json.loads(json.dumps(one)) for one in found]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("own.py", "context) * 1.0", "context) * 2.0"),
        ("own.py", "return Loss(", "return PatchInfoNCELoss("),
        ("own.py", "found[0].register", "found[1].register"),
        ("own.py", "view) + 0.0", "view) + 0.1"),
        ("own.py", "from helpers.scale import times", "from helpers.scale import times as times"),
        ("helpers/scale.py", "x * FACTOR", "x / FACTOR"),
        ("helpers/constants.py", "1.0", "1"),
        ("helpers/__init__.py", "", "import helpers.scale"),
    ],
)
def test_an_edit_of_code_changes_every_identity_that_may_depend_on_it(file, name, old, new):
    before = identities(load_recipe(str(file)))
    path = file.parent / name
    path.write_text(path.read_text().replace(old, new))
    after = identities(load_recipe(str(file)))
    assert all(one != other for one, other in zip(before, after, strict=True))
    path.write_text(path.read_text().replace(new, old) if old else "")
    assert identities(load_recipe(str(file))) == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("own.py", '"""Scaled."""', '"""By one."""  # as always'),
        ("own.py", '"""Scaled."""', ""),
        ("own.py", '"""A recipe whose', '"""The recipe whose'),
        ("own.py", "representations, context):", "representations,\n        context,\n    ):  # noqa"),
        ("own.py", "Training(batch_size=16, epochs=1)", "Training(batch_size=8, epochs=3)"),
        ("own.py", 'name="own"', 'name="other"'),
        ("helpers/constants.py", "FACTOR", "# one\nFACTOR"),
        ("unused.py", "1.0", "2.0"),
    ],
)
def test_an_edit_of_anything_else_changes_none(file, name, old, new):
    before = identities(load_recipe(str(file)))
    path = file.parent / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert identities(load_recipe(str(file))) == before


def test_a_recipe_may_be_moved_and_renamed_with_its_helpers(file, tmp_path):
    before = identities(load_recipe(str(file)))
    moved = tmp_path / "elsewhere" / "other.py"
    moved.parent.mkdir()
    file.rename(moved)
    (tmp_path / "helpers").rename(moved.parent / "helpers")
    assert identities(load_recipe(str(moved))) == before


def test_the_identity_is_of_the_code_that_was_loaded(file):
    recipe = load_recipe(str(file))
    before = identities(recipe)
    file.write_text(RECIPE.replace("context) * 1.0", "context) * 2.0"))
    assert identities(recipe) == before
    assert identities(load_recipe(str(file))) != before
    assert identities(recipe) == before


@pytest.mark.parametrize("name", sorted(built_in()))
def test_settings_of_layerwise_hold_no_digest(name):
    for overrides in ([], ["method=cpc"], ["method=supervised", "scale=0.5"]):
        try:
            recipe = resolve_recipe(name, overrides)
        except RecipeError:
            continue
        own = type(recipe.objective).__name__ == "VICReg"  # in a file that is there to be copied and changed
        found = [recipe.dataset.identity(), recipe.network.through(1), recipe.probe.identity()]
        found += [] if own else [recipe.objective.identity()]
        assert '"code"' not in json.dumps(found)
        assert recipe.network.through(1) == recipe.network.identity_through(1)


def test_a_class_without_a_file_states_a_version():
    def typed(**fields: object) -> Any:
        """A class as a shell or a notebook makes it."""
        return type(Settings)("Mine", (Settings,), {"__module__": "typed", **fields})()

    with pytest.raises(RecipeError, match=r"the class Mine was not defined in a file.*version = 1"):
        typed().identity()
    assert typed(version=1).identity() == {"kind": "Mine", "version": 1}
    assert typed(version=2).identity() == {"kind": "Mine", "version": 2}


def test_a_class_of_an_installed_package_is_its_file_and_the_packages_version(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    (site / "theirs").mkdir(parents=True)
    (site / "theirs-1.5.dist-info").mkdir()
    metadata = site / "theirs-1.5.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.5\n")
    (site / "theirs" / "other.py").write_text("A = 1\n")
    code = site / "theirs" / "__init__.py"
    code.write_text("from layerwise.recipe import Settings\nfrom . import other\nclass Theirs(Settings):\n    pass\n")
    monkeypatch.syspath_prepend(str(site))

    def identity() -> object:
        for name in [name for name in sys.modules if name.partition(".")[0] == "theirs"]:
            del sys.modules[name]
        import theirs  # type: ignore[import-not-found]

        return theirs.Theirs().identity()

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = identity()
    (site / "theirs" / "other.py").write_text("A = 2\n")
    assert identity() == before
    metadata.write_text(metadata.read_text().replace("1.5", "1.6"))
    upgraded = identity()
    assert upgraded != before
    code.write_text(code.read_text() + "B = 1\n")
    assert identity() not in (before, upgraded)


def test_what_is_not_local(file):
    """Python's own, installed packages and layerwise itself are not looked into."""
    assert list(local_files(file)) == ["", "helpers", "helpers.constants", "helpers.scale"]
    assert Settings.code() == {}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_a_stage_whose_loss_was_edited_is_stale(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = ("--recipe", str(file))
    for command in (["stage", "1"], ["cache", "--module", "1"], ["probe", "--module", "1"]):
        assert call(*command, *named).exit_code == 0
    weights = (tmp_path / "runs" / "own" / "stages" / "1" / "module.safetensors").read_bytes()
    file.write_text(file.read_text().replace("Scaled", "By one"))
    assert "already trained and frozen" in call("stage", "1", *named).stdout

    file.write_text(file.read_text().replace("context) * 1.0", "context) * 2.0"))
    for command in (["stage", "1"], ["stage", "2"], ["probe", "--module", "1", "--fresh"], ["run"]):
        refused = call(*command, *named)
        assert refused.exit_code == 1, command
        assert "objective: its code was edited" in refused.stderr
    told = json.loads(call("status", "--json", *named).stdout)["modules"][0]
    assert told["stage"]["state"] == "stale"
    assert told["cache"]["state"] == "stale"
    assert call("stage", "1", "--fresh", *named).exit_code == 0
    assert (tmp_path / "runs" / "own" / "stages" / "1" / "module.safetensors").read_bytes() != weights
    assert "its code" not in call("stage", "1", *named).stderr
