"""A stage under a budget: what is chosen, recorded and refused."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from layerwise import memory
from layerwise.cli import main
from layerwise.errors import WillNotFit
from layerwise.memory import Fit, Footprint, check_first_step, explain_exhaustion
from layerwise.pipeline.frozen import load_frozen, stage_record
from layerwise.pipeline.schedule import run_stage, run_together
from layerwise.recipe.loader import apply_overrides
from layerwise.settings.units import parse_bytes
from layerwise.training import stage
from tests.conftest import TINY

CPU = torch.device("cpu")
FIT = Fit(4, Footprint(10 * 2**20, 2**20, 2**20, 2**21, 0, 6 * 2**20))


def test_a_stage_under_a_budget_learns_what_the_whole_batch_teaches(make_setup) -> None:
    whole, limited = make_setup(TINY, "whole"), make_setup(apply_overrides(TINY, ["training.max_memory=500kB"]), "less")
    run_stage(whole, 1)
    record = run_stage(limited, 1)
    assert record["peak"]["micro_batch"] == 4
    assert record["peak"]["predicted"] < 500_000 < stage_record(whole, 1)["peak"]["predicted"]
    for found, expected in zip(
        load_frozen(limited, 1)[0].parameters(), load_frozen(whole, 1)[0].parameters(), strict=True
    ):
        assert torch.allclose(found, expected, atol=1e-4)


def test_all_modules_together_under_a_budget(make_setup) -> None:
    records = run_together(make_setup(apply_overrides(TINY, ["schedule=simultaneous", "training.max_memory=600kB"])))
    assert all(record["peak"]["micro_batch"] is not None for record in records)


def test_a_budget_below_the_floor_ends_with_3_before_anything_is_trained(make_setup) -> None:
    setup = make_setup(apply_overrides(TINY, ["training.max_memory=10kB"]))
    with pytest.raises(WillNotFit, match=r"module 1 in micro-batches of 1 .*\(batch 16\) need"):
        run_stage(setup, 1)
    assert not (setup.run.folder / "stages" / "1" / "metrics.jsonl").exists()


def test_so_says_the_command(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = f"{__file__.rpartition('/memory/')[0]}/tiny_recipe.py"
    asked = ["stage", "1", "--recipe", recipe, "--device", "cpu", "--json"]
    refused = CliRunner().invoke(main, [*asked, "--max-memory", "10kB"])
    assert refused.exit_code == 3
    assert json.loads(refused.stdout.splitlines()[-1])["error"] == "WillNotFit"
    assert CliRunner().invoke(main, [*asked, "--max-memory", "lots"]).exit_code == 2
    chosen = CliRunner().invoke(main, [*asked, "--micro-batch", "3"])
    assert json.loads(chosen.stdout)["peak"]["micro_batch"] == 3


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_running_out_of_memory_says_what_was_asked_and_what_to_do(make_setup, monkeypatch, micro_batch) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stage, "train_step", exhausted)
    setup = make_setup(
        TINY.model_copy(update={"training": TINY.training.model_copy(update={"micro_batch": micro_batch})})
    )
    how = "in micro-batches of 4: .* Try --micro-batch 2" if micro_batch else ": .* Try --micro-batch 8"
    with pytest.raises(WillNotFit, match=f"while training module 1 with a batch of 16.*{how}, or --max-memory"):
        run_stage(setup, 1)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ZeroDivisionError), explain_exhaustion(CPU, FIT, 16, "module 1"):
        _ = 1 // 0


def test_the_first_step_is_held_to_the_budget(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 20 * 2**20)
    device = torch.device("cuda")
    check_first_step(device, FIT, 20 * 2**20, "module 1")
    check_first_step(device, FIT, None, "module 1")
    with pytest.raises(WillNotFit, match=r"held 20\.0 MiB, over the budget of 16\.0 MiB .*--max-memory 8MB"):
        check_first_step(device, FIT, 16 * 2**20, "module 1")


def test_a_cpu_measures_nothing_and_keeps_the_prediction() -> None:
    with memory.peak(CPU, FIT) as peak:
        torch.zeros(1000)
    assert (peak.allocated, peak.reserved, peak.predicted, peak.micro_batch) == (None, None, 10 * 2**20, 4)
    assert memory.process_bytes(CPU) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("500MB", 500_000_000), ("2GiB", 2**31), ("1.5 kB", 1500), ("123", 123), ("4g", 4 * 10**9), ("1 B", 1)],
)
def test_bytes_as_people_write_them(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "five", "5 parsecs", "-3MB", "1iB", "9" * 400 + "GB"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number of bytes"):
        parse_bytes(text)
