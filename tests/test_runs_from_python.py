"""Runs that a script makes are what its recipe says, locked, and known to every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import layerwise
from layerwise import load_recipe, open_run, run_all, run_stage, write_cache
from layerwise.cli import main
from layerwise.errors import NotReady, RecipeError, RunLocked, UsageError
from layerwise.files.run_files import lock
from layerwise.nets.merged import Merged
from layerwise.pipeline.setup import Setup
from layerwise.recipe.loader import as_trained, resolve_recipe
from layerwise.settings.base import Settings
from tests.conftest import TINY

SMALL = ["dataset.samples=120", "training.epochs=1", "network.stem_channels=4", "probe.epochs=2", "cache.dtype=float32"]


@pytest.mark.parametrize("method", ["cpc", "supervised", "greedy-supervised", "predsim", "dim", "greedy-dim", "random"])
def test_a_method_is_applied_once_however_it_is_asked_for(method: str) -> None:
    loaded = load_recipe("digits", [f"method={method}"])
    assert loaded == resolve_recipe("digits", [f"method={method}"])
    said = load_recipe("digits").model_copy(update={"method": method})
    assert as_trained(said) == loaded
    assert as_trained(loaded) is loaded
    assert resolve_recipe(loaded, ["seed=3"]) == load_recipe("digits", [f"method={method}", "seed=3"])
    with pytest.raises(RecipeError, match=f"method is {method} already"):
        resolve_recipe(loaded, ["method=gim"])


def test_a_scale_is_applied_once() -> None:
    said = load_recipe("digits").model_copy(update={"scale": 0.5})
    assert as_trained(as_trained(said)) == as_trained(said) == load_recipe("digits", ["scale=0.5"])


def test_a_run_that_says_cpc_is_trained_by_cpc(tmp_path: Path) -> None:
    """And every command knows the run, and goes on with it."""
    recipe = load_recipe("digits", SMALL).model_copy(update={"method": "cpc"})
    setup = Setup(open_run(tmp_path / "run", recipe), torch.device("cpu"))
    assert isinstance(setup.recipe.network, Merged)
    run_all(setup)
    for command in ("status", "verify", "probe --module 3", "stage 1", "run"):
        result = CliRunner().invoke(main, [*command.split(), "--run-dir", str(tmp_path / "run"), "--json"])
        assert result.exit_code == 0, (command, result.output)
        assert "cpc" in result.output or command != "status"


def test_work_from_python_holds_the_run(tmp_path: Path, make_setup: Callable[..., Setup]) -> None:
    setup = make_setup(TINY)
    with setup.held("elsewhere"), pytest.raises(RunLocked):
        run_stage(make_setup(TINY), 1)
    run_stage(setup, 1)
    folder = tmp_path / "run"
    with lock(folder, "another"), pytest.raises(RunLocked):
        write_cache(setup, 1)
    known = json.loads((folder / "run.json").read_text())
    assert known["recipe"] == "(made in Python)"
    assert CliRunner().invoke(main, ["status", "--run-dir", str(folder)]).exit_code == 0


def test_a_field_that_would_be_ignored_is_refused_from_python_too(tmp_path: Path) -> None:
    training: Settings = TINY.training.model_copy(update={"update_every": (2, 1)})
    run = open_run(tmp_path / "run", TINY.model_copy(update={"training": training}))
    with pytest.raises(RecipeError, match="update_every"):
        run_all(Setup(run, torch.device("cpu")))
    assert not run.folder.exists()


def test_a_run_of_a_command_is_opened_in_python(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = [word for override in SMALL for word in ("--set", override)]
    made = CliRunner().invoke(main, ["run", "--recipe", "digits", "--run-dir", str(folder), *settings])
    assert made.exit_code == 0, made.output
    run = layerwise.open(folder, device="cpu", quiet=True)
    assert [stage["module"] for stage in run.history()] == [1, 2, 3]
    assert run.cache(1)["train"][:2][0].shape[0] == 2
    shape, _ = run.recipe.dataset.expects() or ((), {})
    images = torch.zeros(2, *shape)
    assert run.encoder(through=2)(images).shape[0] == 2
    assert set(run.probe(3)["class"]) == {"trained", "untrained"}
    with pytest.raises(UsageError, match="leave out train and test"):
        run.probe(3, train=[], test=[])
    again = CliRunner().invoke(main, ["status", "--run-dir", str(folder), "--json"])
    assert again.exit_code == 0
    assert json.loads((folder / "run.json").read_text())["recipe"] == "digits"
    with pytest.raises(NotReady, match="is not a run"):
        layerwise.open(tmp_path / "nothing")


def test_the_process_is_left_as_it_was(make_setup: Callable[..., Setup]) -> None:
    def state() -> tuple[bool, bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        )

    before, within = state(), []
    setup = make_setup(TINY)
    setup.should_stop = lambda: within.append(state()) or False  # type: ignore[func-returns-value]
    run_stage(setup, 1)
    assert set(within) == {(True, True, False)}
    assert state() == before
