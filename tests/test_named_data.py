"""Datasets of one's own from the shell: by the name of a function, and in a recipe that Python objects make."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from layerwise.cli import main
from layerwise.files.storage import read_json, write_json
from layerwise.recipe.loader import load_recipe
from layerwise.recipe.named_data import _called

DATA = """
import torch
from torch.utils.data import TensorDataset

def split(count, seed):
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(count) % 3
    return TensorDataset(torch.rand(count, 1, 32, 32, generator=generator) + classes.view(-1, 1, 1, 1), classes)

def datasets():
    return {"train": split(40, 0), "validation": split(16, 1), "probe": split(30, 2), "test": split(30, 3)}

def alone():
    return split(40, 0)

def wrong():
    return {"train": split(40, 0), "held_out": split(9, 1)}

def stream():
    return iter([1])

def fails():
    raise OSError("no such disk")
"""
SMALL = [
    "--set=training.batch_size=16", "--set=training.epochs=1", "--set=training.micro_batch=null",
    "--set=network.width=0.25", "--set=probe.epochs=2", "--set=objective.negatives=4",
]  # fmt: skip

RECIPE = """
import torch
from torch import nn
import layerwise as lw
from mine import split

modules = [nn.Sequential(nn.Flatten(), nn.Linear(1024, 8), nn.ReLU()), nn.Linear(8, 6)]
recipe = lw.describe(
    modules, lw.CrossEntropy(), split(40, 0), split(16, 1), labelled=(split(30, 2), split(30, 3)),
    name="mine", batch_size=16, epochs=1,
)
"""


@pytest.fixture(autouse=True)
def _in_a_folder_with_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # what a command adds to the path goes again
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(DATA)


def layerwise(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def ended(*words: str) -> Result:
    result = layerwise(*words)
    assert result.exit_code == 0, result.output
    return result


def test_every_command_takes_the_data_of_a_function() -> None:
    ended("stage", "1", "--recipe=digits", "--data=mine.py:datasets", *SMALL)
    ended("cache", "--module=1")
    ended("stage", "2")
    probed = json.loads(ended("probe", "--module=2", "--json").stdout)
    assert set(probed["tasks"]) == {"class"}
    again = ended("stage", "1")
    assert "already trained and frozen" in again.output


def test_a_module_is_found_where_the_command_runs() -> None:
    ended("plan", "--recipe=digits", "--data=mine:alone", *SMALL)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mine.py:nothing", "has no attribute 'nothing'"),
        ("nowhere.py:datasets", "there is no file 'nowhere.py'"),
        ("no.such.module:datasets", "there is no module 'no'"),
        ("mine.py:", "does not name a function"),
        ("mine.py:wrong", "has held_out"),
        ("mine.py:stream", "is a list_iterator, and not a map-style dataset"),
        ("mine.py:fails", "OSError: no such disk"),
    ],
)
def test_what_is_no_dataset_is_refused_in_a_line(name: str, says: str) -> None:
    result = layerwise("plan", "--recipe=digits", f"--data={name}", *SMALL)
    assert result.exit_code == 2, result.output
    assert says in " ".join(result.output.split())
    assert not Path("runs").exists()


def test_a_function_that_was_not_named_here_or_was_edited_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ended("stage", "1", "--recipe=digits", "--data=mine.py:datasets", *SMALL)
    Path("mine.py").write_text("open('executed', 'w')\n" + DATA)
    for reason in ("was edited", "was not named on this machine"):
        result = layerwise("plan")
        assert result.exit_code == 2, result.output
        assert reason in " ".join(result.output.split())
        assert not Path("executed").exists()
        ended("status")
        monkeypatch.setenv("XDG_STATE_HOME", str(Path("another user").absolute()))
    ended("plan", "--data=mine.py:datasets")
    assert Path("executed").exists()
    ended("plan")


@pytest.mark.parametrize("field", [" dataset=", "dataset =", "\n dataset\t= ", "\u00a0dataset="])
def test_no_spelling_of_an_override_runs_a_function_that_was_not_named(field: str) -> None:
    folder = Path("runs/theirs")
    ended("plan", "--recipe=digits", *SMALL, f"--run-dir={folder}")
    ended("cache", "--prune", "--recipe=digits", *SMALL, f"--run-dir={folder}")
    Path("mine.py").write_text("open('executed', 'w')\n" + DATA)
    run = read_json(folder / "run.json") or {}
    write_json(folder / "run.json", {**run, "set": [*run["set"], f"{field}mine.py:datasets"]})
    result = layerwise("plan", f"--run-dir={folder}")
    assert not Path("executed").exists()
    assert result.exit_code == 2, result.output
    assert "was not named on this machine" in " ".join(result.output.split())
    ended("plan", f"--run-dir={folder}", "--set", f"{field}mine.py:datasets")


@pytest.mark.parametrize("edited", ["__init__", "helper"])
def test_what_a_function_s_package_runs_is_not_run_once_edited(edited: str) -> None:
    package = Path("theirs")
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text(DATA)
    (package / "given.py").write_text("from .helper import datasets\n")
    ended("cache", "--prune", "--recipe=digits", "--data=theirs.given:datasets", *SMALL)
    file = package / f"{edited}.py"
    file.write_text("open('executed', 'w')\n" + file.read_text())
    for name in [name for name in sys.modules if name.partition(".")[0] == "theirs"]:
        del sys.modules[name]
    _called.cache_clear()
    result = layerwise("plan")
    assert not Path("executed").exists()
    assert result.exit_code == 2, result.output
    assert "was edited" in " ".join(result.output.split())


def test_a_recipe_made_of_objects_works_with_every_command() -> None:
    Path("recipe.py").write_text(RECIPE)
    ended("run", "--recipe=recipe.py")
    ended("stage", "2", "--set=stages.2.training.epochs=2")  # overrides leave the objects in their places
    probed = json.loads(ended("probe", "--module=2", "--json").stdout)
    assert probed["module"] == 2
    ended("cache", "--module=1")
    ended("verify")


def test_a_run_of_a_script_is_looked_at_from_the_shell() -> None:
    script = RECIPE.replace("recipe = lw.describe(", "lw.train(").replace('name="mine"', 'to="runs/script"')
    sys.path.append(".")
    exec(script, {"__name__": "script"})  # noqa: S102
    page = Path(json.loads(ended("report", "--run-dir=runs/script", "--json").stdout)["report"])
    assert "module 2" in page.read_text().lower()
    told = json.loads(ended("status", "--run-dir=runs/script", "--json").stdout)
    assert len(told["modules"]) == 2
    ended("verify", "--run-dir=runs/script")
    refused = layerwise("cache", "--module=2", "--run-dir=runs/script")
    assert refused.exit_code == 1
    assert "was passed in as Python objects" in " ".join(refused.output.split())


def test_its_first_weights_are_the_same_each_time() -> None:
    Path("recipe.py").write_text(RECIPE)
    first, again = (load_recipe("recipe.py").network.identity() for _ in range(2))
    assert first == again
    assert len(set(first["fingerprints"])) == 2
