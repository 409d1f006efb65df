"""What a run will take, told before it runs."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import activation_cache
from activation_cache import Status
from layerwise.cli import main
from layerwise.errors import WillNotFit
from layerwise.nets.module import Encoded, Module
from layerwise.pipeline.plan import make_plan, require_fit
from layerwise.pipeline.schedule import run_all, run_stage
from layerwise.recipe import NetworkSettings, Shape
from layerwise.recipe.loader import apply_overrides, load_recipe, resolve_recipe
from layerwise.render.plan import plan_table
from layerwise.settings.units import size
from tests.conftest import TINY
from tests.suggested import commands

RECIPE = str(Path(__file__).parent / "tiny_recipe.py")
Disk = namedtuple("Disk", "total used free")


def plan_of(make_setup, *overrides):
    return make_plan(make_setup(apply_overrides(TINY, list(overrides))))


def test_every_stage_is_told(make_setup) -> None:
    plan = plan_of(make_setup)
    assert [stage.modules for stage in plan.stages] == [(1,), (2,), (3,)]
    assert [stage.output for stage in plan.stages] == [(9, 8, 8, 8), (9, 16, 4, 4), (9, 16, 2, 2)]
    modules = TINY.network.modules((1, 16, 16))
    assert [stage.parameters for stage in plan.stages] == [sum(p.numel() for p in m.parameters()) for m in modules]
    assert plan.fits
    assert str(plan).startswith("fits: at most ")
    # 160 digits: 48 for the test, 11 for validation and 101 to train on, and both of these again for the probe
    assert plan.stages[0].cache["float32"] == (48 + 11 + 101 + 112) * 9 * 8 * 8 * 8 * 4
    assert plan.stages[2].cache is None  # nobody reads the last module's outputs


def test_a_stage_takes_what_was_planned(make_setup) -> None:
    setup = make_setup()
    planned = make_plan(setup).stages[0].fit.footprint.peak
    assert run_stage(setup, 1)["peak"]["predicted"] == planned


def test_all_together_is_one_stage_without_a_cache(make_setup) -> None:
    plan = plan_of(make_setup, "schedule=simultaneous")
    assert [stage.modules for stage in plan.stages] == [(1, 2, 3)]
    assert plan.disk_needed == 0


def test_nothing_begins_where_memory_is_short(make_setup) -> None:
    setup = make_setup(apply_overrides(TINY, ["training.max_memory=10kB"]))
    with pytest.raises(WillNotFit, match=r"(?s)module 1 in .*Every stage fits with: "):
        run_all(setup)
    assert not (setup.run.folder / "stages").exists()


def test_nor_where_the_disk_is(make_setup, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**9, 10**9 - 1000, 1000))
    with pytest.raises(
        WillNotFit, match=r"the cache of module 1 takes .* room for 1,000\n.*\nThese would fit: .*recompute"
    ) as no:
        require_fit(make_setup())
    assert "dtype=uint8" not in str(no.value), "that would not fit either"
    assert plan_of(make_setup, "feed=recompute").fits


def test_the_disk_is_the_one_where_caches_lie(make_setup, monkeypatch, tmp_path) -> None:
    def usage(place):
        return Disk(10**9, 0, 10**8 if "elsewhere" in str(place) else 1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    (tmp_path / "elsewhere").mkdir()
    assert not plan_of(make_setup).fits
    assert plan_of(make_setup, f"cache.url=file://{tmp_path}/elsewhere").disk_free == 10**8
    monkeypatch.setattr(activation_cache, "inspect", lambda location: Status("absent", "", 0, {}, None))
    remote = plan_of(make_setup, "cache.url=s3://bucket/prefix")
    assert remote.fits
    assert "on an object store, and rolling windows on this machine for caches" in str(remote)
    assert not plan_of(make_setup, "cache.url=s3://bucket/prefix", "cache.budget=1000").fits


def test_which_memory_is_meant_is_said(make_setup, monkeypatch) -> None:
    assert f"of the {size(50_000_000)} that the budget allows" in str(plan_of(make_setup, "training.max_memory=50MB"))
    assert "that this machine has in all" in str(plan_of(make_setup))
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}[name])
    with pytest.raises(WillNotFit, match=r"stage 1 takes .* more than the 40.0 KiB that this machine has in all"):
        require_fit(make_setup())


def test_what_more_than_fills_the_disk_rolls(make_setup, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**9, 0, 2_000_000))
    plan = plan_of(make_setup)
    assert plan.fits
    assert plan.disk_needed > plan.disk_free
    assert "as rolling windows" in str(plan)


def test_without_the_dataset_memory_is_still_told(make_setup, capsys) -> None:
    recipe = load_recipe("stl10", ["training.batch_size=2"])
    plan = make_plan(make_setup(recipe))
    assert [stage.output for stage in plan.stages] == [(49, 256, 16, 16), (49, 512, 8, 8), (49, 1024, 4, 4)]
    values = 49 * 256 * 16 * 16
    assert plan.stages[0].cache["float16"] == (100_000 + 5_000 + 8_000) * values * 2, "as the dataset is published"
    assert plan.stages[1].cache["uint8"] == 113_000 * values // 2
    plan_table(plan, recipe)
    shown = capsys.readouterr().out
    assert "as its authors publish them" in shown
    assert "1.3 TiB" in shown
    speech = make_plan(make_setup(load_recipe("speech"), "speech"))
    assert speech.disk_needed is None
    plan_table(speech, load_recipe("speech"))
    assert "is not known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "train", "validation"),
    [([], 95_000, 5_000), (["dataset.max_train=1000"], 950, 50), (["method=supervised"], 4_000, 1_000)],
)
def test_published_sizes_are_those_that_opening_gives(overrides, train, validation) -> None:
    sizes = resolve_recipe("stl10", overrides).dataset.published_sizes()
    assert (sizes["train"], sizes["validation"]) == (train, validation)
    assert (sizes["probe"], sizes["test"]) == (5_000, 8_000)


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_of_the_table_is_cut_off(make_setup, capsys, monkeypatch, terminal) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if terminal:
        monkeypatch.setenv("COLUMNS", "40")
        monkeypatch.setenv("FORCE_COLOR", "1")
    plan = plan_of(make_setup)
    plan_table(plan, TINY)
    shown = capsys.readouterr().out
    assert "…" not in shown
    if not terminal:  # each row on a line of its own
        for stage in plan.stages:
            cells = [f"{stage.parameters:,}", "x".join(map(str, stage.output)), size(stage.fit.footprint.peak)]
            assert any(all(cell in line for cell in cells) for line in shown.splitlines())
        assert str(plan) in shown.splitlines()


def test_a_batch_larger_than_the_dataset_is_refused_before_anything_is_predicted(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("layerwise.memory.find", lambda *_, **__: pytest.fail("predicted"))
    asked = ["plan", "--recipe", RECIPE, "--device", "cpu", "--set", "training.batch_size=100000"]
    refused = CliRunner().invoke(main, asked, catch_exceptions=False)
    assert refused.exit_code == 2
    assert "batch_size is 100000, but there are only 101 training samples: choose 101 or fewer" in refused.stderr


def test_the_command(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["plan", "--recipe", RECIPE, "--device", "cpu", "--json"]
    told = CliRunner().invoke(main, asked, catch_exceptions=False)
    assert told.exit_code == 0
    assert json.loads(told.stdout)["fits"] is True
    refused = CliRunner().invoke(main, [*asked, "--max-memory", "10kB"], catch_exceptions=False)
    assert refused.exit_code == 3
    assert json.loads(refused.stdout)["fits"] is False
    refused = CliRunner().invoke(main, [*asked, "--cache-budget", "10kB"], catch_exceptions=False)
    assert refused.exit_code == 3
    told = json.loads(refused.stdout)
    assert "1 takes" in told["problems"][0]
    larger, without = commands(told["advice"])
    assert any("cache.budget=" in word for word in larger)
    assert "--set=feed=recompute" in without
    for advised in (larger, without):
        again = CliRunner().invoke(main, ["plan", *advised[1:]], catch_exceptions=False)
        assert again.exit_code == 0, again.output
    assert not list(tmp_path.glob("runs/*/stages"))


@pytest.mark.parametrize("recipe", ["images", "speech"])
def test_classes_that_only_folders_tell_are_asked_for(recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["plan", "--recipe", recipe, "--device", "cpu", "--method", "supervised"]
    refused = CliRunner().invoke(main, asked, catch_exceptions=False)
    assert refused.exit_code == 2
    assert "--data-dir" in refused.stderr


def test_what_does_not_fit_is_told_a_line_a_module_with_its_figure(make_setup, capsys) -> None:
    recipe = apply_overrides(TINY, ["training.max_memory=10kB"])
    plan = make_plan(make_setup(recipe))
    plan_table(plan, recipe)
    shown = capsys.readouterr().out
    assert "?" not in shown
    for stage in plan.stages:
        figure = size(stage.fit.footprint.peak)
        number = stage.modules[0]
        assert sum(line.startswith(f"module {number} ") and figure in line for line in shown.splitlines()) == 1
        assert any(line.split()[:1] == [str(number)] and figure in line for line in shown.splitlines())
    (advised,) = commands(plan.advice)
    enough = next(word for word in advised if "max_memory" in word).removeprefix("--set=")
    assert make_plan(make_setup(apply_overrides(TINY, [enough]))).fits


def test_what_cannot_be_predicted_is_told_with_the_reason(make_setup, capsys) -> None:
    recipe = TINY.model_copy(update={"network": Odd()})
    plan = make_plan(make_setup(recipe))
    assert plan.fits
    plan_table(plan, recipe)
    assert "?: the memory of this training cannot be predicted: module 1 (OddModule) fails" in capsys.readouterr().out


class OddModule(Module):
    """Leaves torch, as a module that calls another library does."""

    channels = target_channels = 1

    def forward(self, x: Tensor) -> Encoded:
        made = torch.from_numpy(x.numpy() + 1)
        return Encoded(made, made, made)


class Odd(NetworkSettings):
    def modules(self, sample_shape: Shape) -> list[Module]:
        return [OddModule()]


def test_what_would_fit_is_said_once_for_all_stages(make_setup):
    plan = plan_of(make_setup, "training.max_memory=1000")
    assert len(plan.problems) > 1
    assert not any("What would fit" in problem for problem in plan.problems)
    assert str(plan).count("fits with") == 1
