"""A run that somebody else made runs no code, and a recipe file runs only where, and as, the user named it."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import activation_cache
from activation_cache import StoreError
from layerwise.cli import main
from layerwise.errors import DamagedData
from layerwise.files.records import PLACE, read_record
from layerwise.files.storage import read_json, write_json
from layerwise.pipeline.status import recipe_digest
from layerwise.recipe.as_json import NeedsCode, describe, rebuild
from layerwise.recipe.loader import built_in, resolve_recipe
from tests.conftest import TINY

BUILT_IN_CLASSES = """
from pathlib import Path
from layerwise.recipe import CacheSettings
from layerwise.recipe.loader import load_recipe
from helper import SAMPLES

Path(CANARY).write_text("executed")
recipe = load_recipe("digits", [
    "name=mine", f"dataset.samples={SAMPLES}", "training.epochs=1", "training.batch_size=16", "probe.epochs=1",
    "network.stem_channels=4", "network.width=0.25", "cache.dtype=float32",
])
"""
OWN_CLASS = (
    BUILT_IN_CLASSES
    + """
from layerwise.objectives.infonce import PatchInfoNCE
class Own(PatchInfoNCE):
    pass
recipe = recipe.model_copy(update={"objective": Own()})
"""
)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the recipe file writes whenever it is executed."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "canary"


@pytest.fixture
def make_run(tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`make_run(recipe)`: a run that follows a recipe file of this content, from the machine of somebody else."""

    def make(content: str) -> Path:
        file = tmp_path / "my recipes" / "mine.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(content.replace("CANARY", repr(str(canary))))
        (file.parent / "helper.py").write_text("SAMPLES = 100\n")
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("XDG_STATE_HOME", str(tmp_path / "stranger"))
            assert call("cache", "--prune", "--recipe", str(file), "--set", "seed=3").exit_code == 0
        assert canary.exists()
        canary.unlink()
        return tmp_path / "runs" / "mine"

    return make


def test_no_command_runs_what_a_run_names(make_run, canary):
    folder = make_run(BUILT_IN_CLASSES)
    for command in (["status"], ["plan"], ["cache", "--prune"], ["run"], ["verify"], ["watch", "--once"], ["status"]):
        where = ["--run-dir", str(folder)] if command == ["run"] else []
        result = call(*command, *where)
        assert result.exit_code == 0, result.stderr
        assert not canary.exists(), command
    assert (read_json(folder / "run.json") or {})["set"] == ["seed=3"]


PRUNE = ("cache", "--prune")
COMMANDS = (
    ["plan"],
    ["probe"],
    ["export", "--to", "encoder.pt2"],
    ["cache", "--module", "1"],
    ["cache", "--prune"],
    ["stage", "1"],
    ["grow"],
    ["run"],
)


def test_a_run_that_needs_code_says_which_file_to_name(make_run, canary, tmp_path):
    folder = make_run(OWN_CLASS)
    file = tmp_path / "my recipes" / "mine.py"
    for command in COMMANDS:
        for where in ([], ["--run-dir", str(folder)]):
            result = call(*command, *where)
            assert result.exit_code == 2
            assert shlex.join([f"--recipe={file}", "--set=seed=3"]) in result.stderr
            assert result.stderr.count("\n") == 1
    shutil.rmtree(file.parent)
    assert "--recipe=PATH.py --set=seed=3" in call("plan").stderr
    assert not canary.exists()


def test_a_run_whose_recipe_file_is_gone_goes_on_by_its_settings(make_run, tmp_path):
    make_run(BUILT_IN_CLASSES)
    shutil.rmtree(tmp_path / "my recipes")
    result = call("cache", "--prune")
    assert result.exit_code == 0
    assert "was not named on this machine: using the settings in runs/mine/recipe.json" in result.stderr


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        ({"class": "os.system"}, NeedsCode),
        ({"class": "builtins.exec"}, NeedsCode),
        ({"class": "canary.Own"}, NeedsCode),
        ({"class": "layerwise..recipe.Recipe"}, NeedsCode),
        ({"class": "layerwise_canary.Own"}, NeedsCode),
        ({"class": "layerwise.objectives.infonce.PatchInfoNCE", "negatives": [{"class": "canary.Own"}]}, NeedsCode),
        ({"class": "layerwise.recipe.loader.load_recipe"}, DamagedData),
        ({"class": "layerwise.cli.common.os"}, DamagedData),
        ({"class": "layerwise.objectives.objective.Objective"}, DamagedData),
        ({"class": "layerwise.objectives.infonce.ObjectiveSettings"}, DamagedData),
        ({"class": "layerwise.recipe.ObjectiveSettings"}, DamagedData),
        ({"class": "layerwise.nowhere.Own"}, DamagedData),
        ({"class": 3}, DamagedData),
        ({}, DamagedData),
        (3, DamagedData),
        ({"class": "layerwise.recipe.Training", "batch_size": -1}, DamagedData),
    ],
)
def test_a_recipe_in_json_chooses_settings_of_layerwise_and_nothing_else(tmp_path, monkeypatch, edit, error):
    canary = tmp_path / "canary"
    for name in ("canary", "layerwise_canary"):
        (tmp_path / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    described = describe(TINY)
    assert rebuild(described) == TINY
    with pytest.raises(error):
        rebuild({**described, "objective": edit})
    assert not canary.exists()


@pytest.mark.parametrize("name", sorted(built_in()))
def test_every_recipe_of_built_in_classes_is_rebuilt_from_json(name):
    recipe = resolve_recipe(name, ["method=cpc"] if name == "stl10" else [])
    described = json.loads(json.dumps(describe(recipe)))
    if name == "own_objective":
        with pytest.raises(NeedsCode):
            rebuild(described)
    else:
        assert describe(rebuild(described)) == described
        assert rebuild(described) == recipe


def test_overrides_of_a_run_are_data(make_run, tmp_path, canary):
    folder = make_run(BUILT_IN_CLASSES)
    run = read_json(folder / "run.json") or {}
    for override in (
        "objective=__import__('os')",
        'objective={"class":"canary.Own"}',
        "dataset=!!python/object:os.system",
    ):
        write_json(folder / "run.json", {**run, "set": [override]})
        assert call(*PRUNE).exit_code == 2
    assert not canary.exists()


@pytest.mark.parametrize("scheme", ["file", "s3"])
def test_no_cache_outside_a_run_is_written_or_replaced_because_the_run_says_so(make_run, tmp_path, scheme):
    folder = make_run(BUILT_IN_CLASSES)
    run, url = read_json(folder / "run.json") or {}, f"{scheme}://{tmp_path}/elsewhere".replace("s3:///", "s3://")
    write_json(folder / "run.json", {**run, "set": [*run["set"], f" cache.url={url}"]})
    write_json(folder / "place.json", {"name": "mine"})
    for command in (["cache", "--prune", "--yes"], ["run", "--fresh"], ["stage", "1"]):
        refused = call(*command, "--run-dir", str(folder))
        assert refused.exit_code == 2, refused.output
        assert "not named on this machine, so nothing is written or replaced there" in refused.stderr
        assert not (tmp_path / "elsewhere").exists()
    if scheme == "file":
        assert call(*shlex.split(refused.stderr.strip().rpartition("name it with: layerwise ")[2])).exit_code == 0
        assert f"keeps its caches at {url}" in call(*PRUNE, "--run-dir", str(folder)).stderr


@pytest.mark.parametrize("name", [".", "..", "a/b", ""])
def test_the_folder_of_a_run_s_caches_lies_below_the_address(tmp_path, name):
    write_json(tmp_path / "place.json", {"name": name})
    with pytest.raises(DamagedData, match=r"place\.json"):
        read_record(tmp_path / "place.json", PLACE)


def test_a_file_runs_where_it_was_named_and_as_it_was(make_run, tmp_path, canary):
    folder = make_run(OWN_CLASS)
    file, helper = tmp_path / "my recipes" / "mine.py", tmp_path / "my recipes" / "helper.py"
    assert call(*PRUNE).exit_code == 2

    def executed(*command: str) -> bool:
        canary.unlink(missing_ok=True)
        result = call(*command)
        assert (result.exit_code == 0) == canary.exists(), result.stderr
        return canary.exists()

    assert executed(*PRUNE, "--recipe", str(file), "--set", "seed=3", "--run-dir", str(folder))
    assert executed(*PRUNE), "named by now"
    for path in (file, helper):
        path.write_text(path.read_text() + "\n# an edit\n")
        refused = call(*PRUNE)
        assert refused.exit_code == 2
        assert f"was edited since you named it ({path})" in refused.stderr
        words = shlex.split(refused.stderr.strip().rpartition("with: layerwise ")[2])
        assert executed(*words), "the command that the message gives"
        assert executed(*PRUNE)
    moved = shutil.move(file, tmp_path / "my recipes" / "other.py")
    shutil.copy(moved, file)
    assert executed(*PRUNE), "the same content at the same place"
    assert not executed(*PRUNE, "--run-dir", str(_following(folder, Path(moved)))), "the same content elsewhere"


def _following(folder: Path, file: Path) -> Path:
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    write_json(other / "run.json", {**(read_json(other / "run.json") or {}), "recipe": str(file)})
    return other


def test_a_look_at_a_run_contacts_no_address_that_nobody_named(make_run, monkeypatch):
    pytest.importorskip("obstore")
    folder, url = make_run(BUILT_IN_CLASSES), "s3://bucket/prefix"
    recipe, run = read_json(folder / "recipe.json") or {}, read_json(folder / "run.json") or {}
    write_json(folder / "recipe.json", {**recipe, "cache": {**recipe["cache"], "url": url}})
    write_json(folder / "run.json", {**run, "set": [*run["set"], f"cache.url={url}"]})
    expected = {**(read_json(folder / "expected.json") or {}), "recipe": recipe_digest(folder)}
    write_json(folder / "expected.json", expected)
    (folder / "stages" / "1").mkdir(parents=True)
    asked: list[str] = []
    for name in ("inspect", "verify", "free"):
        found = getattr(activation_cache, name)

        def noting(location: Path | str, *rest: object, found: Callable[..., object] = found) -> object:
            if str(location).startswith("s3://"):
                asked.append(str(location))
                raise StoreError("not reached")
            return found(location, *rest)

        monkeypatch.setattr(activation_cache, name, noting)
    for command, code in (("status", 0), ("verify", 0), ("plan", 2)):
        result = call(command, "--run-dir", str(folder))
        assert result.exit_code == code, result.output
        told = " ".join((result.stdout + result.stderr).split())
        unnamed = f"its caches are at {url}, an address that was not named on this machine"
        assert f"{unnamed}, so it was not contacted" in told
        assert not asked, command
    words = shlex.split(result.stderr.strip().rpartition("name it with: layerwise ")[2])
    assert call(*words).exit_code == 0
    for command in ("status", "verify", "plan"):
        asked.clear()
        call(command, "--run-dir", str(folder))
        assert asked, command


@pytest.mark.parametrize("damage", ["flip", "link", "folder link", "json", "other path", "absent"])
def test_a_damaged_note_counts_as_none(make_run, tmp_path, canary, monkeypatch, damage):
    make_run(OWN_CLASS)
    state = tmp_path / "state"
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    assert call(*PRUNE, "--recipe", str(tmp_path / "my recipes" / "mine.py")).exit_code == 0
    (note,) = (state / "layerwise" / "recipes").iterdir()
    content = note.read_bytes()
    match damage:
        case "flip":
            note.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
        case "link":
            note.rename(tmp_path / "note")
            note.symlink_to(tmp_path / "note")
        case "folder link":
            note.parent.rename(tmp_path / "notes")
            note.parent.symlink_to(tmp_path / "notes")
        case "json":
            write_json(note, {"path": 3, "files": []})
        case "other path":
            write_json(note, {**json.loads(content), "path": "/elsewhere"})
        case "absent":
            note.unlink()
    canary.unlink()
    assert call(*PRUNE).exit_code == 2
    assert not canary.exists()
    assert call(*PRUNE, "--recipe", str(tmp_path / "my recipes" / "mine.py")).exit_code == 0, "named again"
    assert call(*PRUNE).exit_code == (2 if damage == "folder link" else 0)


def test_a_state_folder_that_cannot_be_written_stops_nothing(make_run, tmp_path, monkeypatch):
    make_run(OWN_CLASS)
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    result = call(*PRUNE, "--recipe", str(tmp_path / "my recipes" / "mine.py"))
    assert result.exit_code == 0
    assert "could not remember that you named" in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_a_relative_state_folder_counts_as_none(tmp_path, monkeypatch):
    """A working directory made by a stranger must not bring its own list."""
    from layerwise.pipeline.trust import _note

    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("", ".", "state"):
        monkeypatch.setenv("XDG_STATE_HOME", given)
        assert _note(Path("/recipe.py"))[0] == tmp_path / ".local" / "state"
