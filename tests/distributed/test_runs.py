"""Runs by several processes: the results of one, and whoever is stopped or killed, the same command goes on."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from layerwise.cli import main
from tests.distributed.processes import ROOT, ended, once, started

RECIPE = f"--recipe={ROOT / 'tests' / 'tiny_recipe.py'}"
RUN = ("run", RECIPE, "--run-dir=run")


def weights(folder: Path) -> dict[str, bytes]:
    return {
        f"{path.parent.name} {name}": tensor.numpy().tobytes()
        for path in sorted(folder.glob("run/stages/*/module.safetensors"))
        for name, tensor in load_file(path).items()
    }


def losses(folder: Path) -> list[float]:
    lines = [
        line for path in sorted(folder.glob("run/stages/*/metrics.jsonl")) for line in path.read_text().split("\n")
    ]
    return [json.loads(line)["validation_loss"][0] for line in lines if line]


def run_to_its_end(count: int, folder: Path) -> list[tuple[int, str]]:
    folder.mkdir(exist_ok=True)
    found = ended(started(count, *RUN, folder=folder))
    assert [code for code, _ in found] == [0] * count, [text[-1500:] for _, text in found]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by two processes."""
    folder = tmp_path_factory.mktemp("two")
    (first, others) = run_to_its_end(2, folder)
    assert "linear probes" in first[1]
    assert others[1] == ""
    return folder


def test_two_processes_train_as_one_does(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, RUN).exit_code == 0
    alone, together = losses(tmp_path), losses(undisturbed)
    assert len(alone) == len(together) == 6
    assert max(abs(one - other) for one, other in zip(alone, together, strict=True)) < 1e-4
    assert CliRunner().invoke(main, ["verify", "--run-dir", str(undisturbed / "run")]).exit_code == 0


def test_a_stop_of_one_stops_all_and_the_command_goes_on_to_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    processes = started(2, *RUN, folder=tmp_path)
    assert once(lambda: (tmp_path / "run/stages/1/checkpoint.json").exists(), processes)
    processes[1].send_signal(signal.SIGTERM)
    codes = [code for code, _ in ended(processes)]
    assert codes in ([75, 75], [0, 0])
    processes = started(2, *RUN, folder=tmp_path)
    assert once(lambda: (tmp_path / "run/stages/2/checkpoint.json").exists(), processes)
    processes[0].kill()
    began = time.monotonic()
    _, (code, output) = ended(processes)
    assert time.monotonic() - began < 60
    assert code == 75
    assert "another process of this training has ended" in " ".join(output.split())
    run_to_its_end(2, tmp_path)
    assert weights(tmp_path) == weights(undisturbed)


@pytest.mark.long
def test_who_is_left_says_that_another_process_ended(tmp_path: Path) -> None:
    words = (*RUN, "--set=training.epochs=400", "--set=training.patience=400")
    processes = started(2, *words, folder=tmp_path)
    assert once(lambda: (tmp_path / "run/stages/1/checkpoint.json").exists(), processes)
    processes[1].kill()
    (code, output), _ = ended(processes)
    assert code == 75
    assert "another process of this training has ended" in " ".join(output.split())
    assert "Traceback" not in output


def test_what_the_first_refuses_is_said_once(tmp_path: Path) -> None:
    found = ended(started(2, "run", RECIPE, "--set=training.batch_size=1", "--run-dir=run", folder=tmp_path))
    assert [code for code, _ in found] == [2, 2]
    assert "2 processes share each batch" in " ".join(found[0][1].split())
    assert found[1][1] == ""


def test_what_one_process_does_is_done_once(tmp_path: Path) -> None:
    found = ended(started(2, "recipes", folder=tmp_path))
    assert [code for code, _ in found] == [0, 0]
    assert "digits" in found[0][1]
    assert found[1][1] == ""


def test_half_an_environment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(main, RUN)
    assert result.exit_code == 2
    assert "RANK is not set: start them with torchrun" in " ".join(result.output.split())


SCRIPT = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
import layerwise as lw

torch.manual_seed(0)
classes = torch.arange(40) % 3
data = TensorDataset(torch.rand(40, 4) + classes[:, None], classes)
modules = [nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 6)]
run = lw.train(modules, lw.CrossEntropy(), data, data, to="run", batch_size=10, epochs=2, cache="float32")
print([round(line["validation_loss"], 4) for stage in run.history() for line in stage["curve"]])
"""


@pytest.mark.long
def test_a_script_trains_by_several_processes(tmp_path: Path) -> None:
    found = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "script.py").write_text(SCRIPT)
        for code, text in ended(started(count, "script.py", folder=folder, module=False)):
            assert code == 0, text[-1500:]
            found.append(text.strip().split("\n")[-1])
    assert len(set(found)) == 1, found


@pytest.mark.long
def test_killed_30_times_at_1_to_3_processes_in_turn(tmp_path: Path) -> None:
    rng = random.Random(0)
    for attempt in range(30):
        count = attempt % 3 + 1
        processes = started(count, *RUN, "--set=training.epochs=20", folder=tmp_path)
        time.sleep(rng.uniform(4, 14))
        rng.choice(processes).kill()
        ended(processes)
    words = (*RUN, "--set=training.epochs=20")
    assert [code for code, _ in ended(started(2, *words, folder=tmp_path))] == [0, 0]
    assert CliRunner().invoke(main, ["verify", "--run-dir", str(tmp_path / "run")]).exit_code == 0


@pytest.mark.long
def test_killed_30_times_at_2_processes_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    words = (*RUN, "--set=training.epochs=20")
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    assert [code for code, _ in ended(started(2, *words, folder=tmp_path / "whole"))] == [0, 0]
    rng = random.Random(1)
    for _ in range(30):
        processes = started(2, *words, folder=tmp_path / "killed")
        time.sleep(rng.uniform(4, 14))
        rng.choice(processes).kill()
        ended(processes)
    assert [code for code, _ in ended(started(2, *words, folder=tmp_path / "killed"))] == [0, 0]
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
