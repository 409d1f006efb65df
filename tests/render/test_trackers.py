"""Trackers: TensorBoard's own reader finds every number once, also after kills; and what the others are told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from layerwise.errors import DamagedData, NotReady
from layerwise.files.metrics import read_metrics
from layerwise.files.run_files import CURVES
from layerwise.pipeline.probe import probe_module
from layerwise.pipeline.schedule import run_stage
from layerwise.pipeline.setup import Setup
from layerwise.pipeline.verification import verify_run
from layerwise.progress import SILENT, Silent, Step
from layerwise.recipe.loader import apply_overrides
from layerwise.render import trackers
from layerwise.render.trackers import Tracked, tracked
from tests.conftest import TINY
from tests.test_train import small


class Told(Silent):
    """Keeps the steps that it is told."""

    def __init__(self) -> None:
        self.steps: dict[int, Step] = {}

    def step(self, done: Step) -> None:
        self.steps[done.step] = done


def read(log: Path) -> EventAccumulator:
    found = EventAccumulator(str(log), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def curve(log: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(log).Scalars(tag)]


@pytest.mark.parametrize("schedule", ["iterative", "simultaneous"])
def test_tensorboards_reader_finds_every_scalar(schedule: str, make_setup: Callable[..., Setup]) -> None:
    setup, told = make_setup(apply_overrides(TINY, [f"schedule={schedule}"])), Told()
    with tracked(told, "tensorboard", setup.run.folder) as setup.progress:
        run_stage(setup, 1)
        accuracy = probe_module(setup, 1)["tasks"]["class"]["trained"]["accuracy"]
    modules, name = ((1,), "module-1") if schedule == "iterative" else ((1, 2, 3), "modules-1-3")
    log, by_epoch = (setup.run.folder / CURVES / f"{name}-{kind}" for kind in ("train", "validation"))
    assert len(told.steps) > 10
    for index, number in enumerate(modules):
        wanted = [(step, pytest.approx(done.losses[index], rel=1e-6)) for step, done in told.steps.items()]
        assert curve(log, f"loss/module {number}") == wanted
        epochs = read_metrics(setup.run.training(modules) / "metrics.jsonl", len(modules)).epochs
        for tag, name in (("loss", "validation_loss"), ("mean training loss", "loss")):
            values = [(line["step"], pytest.approx(line[name][index], rel=1e-6)) for line in epochs]  # type: ignore[literal-required]
            assert curve(by_epoch, f"{tag}/module {number}") == values
    steps = [step for step, _ in curve(log, "memory/bytes of the process")]
    assert steps == list(told.steps)
    assert all(value > 1e7 for _, value in curve(log, "memory/bytes of the process"))
    speeds = dict(curve(log, "throughput/samples per second"))
    assert set(told.steps) - set(speeds) == {1, epochs[0]["step"] + 1}  # nothing is known of what went before these
    assert min(speeds.values()) > 0
    assert curve(setup.run.folder / CURVES / "probe-1", "probe/class, trained") == [(1, pytest.approx(accuracy))]
    peak = curve(setup.run.folder / CURVES / f"memory-{modules[-1]}", "memory/peak bytes, predicted")
    assert [step for step, _ in peak] == [modules[-1]]
    assert peak[0][1] > 0
    assert verify_run(setup.run.folder).unexpected == []


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import layerwise.training.stage as stage
from layerwise.pipeline.run import open_run
from layerwise.pipeline.schedule import run_stage
from layerwise.pipeline.setup import Setup
from layerwise.progress import SILENT
from layerwise.render import trackers
from tests.conftest import TINY

trackers.SEND_EVERY = float(sys.argv[4])
where, count = sys.argv[2], int(sys.argv[3])
function = getattr(stage, where)
def killing(*arguments, **named):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **named)
setattr(stage, where, killing)
setup = Setup(open_run(Path(sys.argv[1]), TINY), torch.device("cpu"))
with trackers.tracked(SILENT, "tensorboard", setup.run.folder) as setup.progress:
    run_stage(setup, 1)
"""


@pytest.mark.parametrize(
    ("where", "count", "every"),
    [
        pytest.param("train_step", 3, 0.0, marks=pytest.mark.long),
        pytest.param("train_step", 5, 0.0, marks=pytest.mark.long),
        ("train_step", 5, 1e9),  # only what a checkpoint holds was sent
        pytest.param("save_checkpoint", 2, 0.0, marks=pytest.mark.long),
        ("save_checkpoint", 3, 0.0),
        pytest.param("save_checkpoint", 4, 1e9, marks=pytest.mark.long),
        pytest.param("append_metrics", 1, 0.0, marks=pytest.mark.long),
    ],
)
def test_after_a_kill_each_step_stands_there_once(
    where: str, count: int, every: float, make_setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, setup = make_setup(TINY, "whole"), make_setup(TINY, "killed")
    monkeypatch.setattr(trackers, "SEND_EVERY", 0.0)
    with tracked(SILENT, "tensorboard", whole.run.folder) as whole.progress:
        run_stage(whole, 1)
    root = Path(__file__).parents[2]
    died = subprocess.run(
        [sys.executable, "-c", KILLED, setup.run.folder, where, str(count), str(every)],
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'cache'}"}, check=False,
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL
    log = setup.run.folder / CURVES / "module-1-train"
    before = read(log).Scalars("loss/module 1")
    assert before
    told = Told()
    with tracked(told, "tensorboard", setup.run.folder) as setup.progress:
        run_stage(setup, 1)
    assert min(told.steps) <= before[-1].step + 1
    assert curve(log, "loss/module 1") == curve(whole.run.folder / CURVES / log.name, "loss/module 1")
    by_epoch = "module-1-validation"
    for tag in ("loss/module 1", "mean training loss/module 1", "epoch"):
        found, wanted = (curve(one.run.folder / CURVES / by_epoch, tag) for one in (setup, whole))
        assert len(wanted) == 2
        assert found == wanted
    steps = [step for step, _ in curve(log, "memory/bytes of the process")]
    assert steps == list(range(1, len(steps) + 1))


def test_a_training_that_begins_anew_replaces_its_curve(make_setup: Callable[..., Setup]) -> None:
    setup = make_setup()
    for seed in ("0", "1"):
        setup = make_setup(apply_overrides(TINY, [f"seed={seed}"]))
        told = Told()
        with tracked(told, "tensorboard", setup.run.folder) as setup.progress:
            run_stage(setup, 1, fresh=True)
    found = curve(setup.run.folder / CURVES / "module-1-train", "loss/module 1")
    assert found == [(step, pytest.approx(done.losses[0], rel=1e-6)) for step, done in told.steps.items()]


class Listing:
    """A tracker that lists what it is given."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def scalars(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        self.calls.append([(step, set(values)) for step, values in rows])

    def picture(self, step: int, name: str, png: bytes) -> None:
        self.calls.append((step, name, png))

    def close(self) -> None:
        self.calls.append("closed")


def test_what_a_tracker_is_told() -> None:
    calls: list[Any] = []

    def opened(log: str, step: int) -> Listing:
        calls.append((log, step))
        return Listing(calls)

    told = Tracked(SILENT, opened)
    told.training([2, 3], 7, 6)
    told.step(Step([2, 3], 8, 1, [1.0, 2.0], 16))
    told.flush()
    told.step(Step([2, 3], 9, 1, [1.0, 2.0], 16))
    told.end()
    told.picture("losses", b"png")
    told.close()
    losses, memory = {"loss/module 2", "loss/module 3"}, {"memory/bytes of the process"}
    speed = {"throughput/samples per second"}
    assert calls == [
        ("modules-2-3-train", 7), ("modules-2-3-validation", 6),
        [(8, losses | memory)], [(9, losses | memory | speed)], "closed", "closed",
        ("picture-losses", 0), (1, "losses", b"png"), "closed",
    ]  # fmt: skip


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("fails", ["scalars", "close", "picture"])
def test_a_tracker_that_fails_does_not_end_the_training(fails: str) -> None:
    calls: list[Any] = []

    class Failing(Listing):
        pass

    def refuse(*_: Any) -> None:
        raise ConnectionError("no route to host")

    setattr(Failing, fails, refuse)
    listener = Notes()
    told = Tracked(listener, lambda log, step: Failing(calls))
    told.training([1], 0, 0)
    for number in range(1, 4):
        told.step(Step([1], number, 1, [2.0], 16))
        told.flush()
    told.end()
    told.picture("losses", b"png")
    assert listener.notes == ["tracking ends here, and the work goes on without it: ConnectionError: no route to host"]


def test_a_missing_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(trackers, "import_module", missing)
    for kind in ("tensorboard", "wandb", "trackio"):
        with (
            pytest.raises(NotReady, match=rf"--track {kind} needs .* pip install 'layerwise\[{kind}\]'"),
            tracked(
                SILENT,
                kind,
                tmp_path,  # type: ignore[arg-type]
            ),
        ):
            pass


WITHOUT_NETWORK = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def test_trackio_has_each_step_once(
    make_setup: Callable[..., Setup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    setup, stopped = make_setup(), Told()
    for wanted in (5, 10**6):
        with tracked(stopped, "trackio", setup.run.folder) as setup.progress:
            setup.should_stop = lambda wanted=wanted: len(stopped.steps) >= wanted  # type: ignore[misc]
            if wanted == 5:
                with pytest.raises(Exception, match="stopped in epoch"):
                    run_stage(setup, 1)
            else:
                run_stage(setup, 1)
    logged = trackio.SQLiteStorage.get_logs("run", "module-1-train")
    losses = [(row["step"], row["loss/module 1"]) for row in logged if "loss/module 1" in row]
    assert losses == [(step, pytest.approx(done.losses[0])) for step, done in stopped.steps.items()]


def test_wandb_keeps_one_run_for_a_resumed_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in WITHOUT_NETWORK.items():
        monkeypatch.setenv(name, value)
    names = []
    for begun in (0, 3, 0):
        with tracked(SILENT, "wandb", tmp_path) as told:
            told.training([1], begun, begun)
            told.step(Step([1], begun + 1, 1, [2.0], 16))
            told.end()
        names.append((tmp_path / CURVES / "module-1-train.wandb-id").read_text())
    assert names[0] == names[1] != names[2]
    kept = {path.name.removeprefix("run-").removesuffix(".wandb") for path in tmp_path.rglob("*.wandb")}
    assert set(names) < kept


def test_a_command_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from layerwise.cli import main

    monkeypatch.chdir(tmp_path)
    recipe = str(Path(__file__).parents[1] / "tiny_recipe.py")
    done = CliRunner().invoke(main, ["run", "--recipe", recipe, "--track", "tensorboard", "--json"])
    assert done.exit_code == 0
    json.loads(done.stdout)
    logs = {path.name for path in Path("runs/tiny", CURVES).iterdir()}
    assert {"module-1-train", "module-2-train", "module-3-validation", "probe-1", "probe-3", "memory-2"} <= logs
    pictures = [name for name in logs if name.startswith("picture-")]
    assert pictures
    for name in pictures:
        (image,) = read(Path("runs/tiny", CURVES, name)).Images(name.removeprefix("picture-"))
        assert image.width > 100
        assert image.encoded_image_string.startswith(b"\x89PNG")
    refused = CliRunner().invoke(main, ["run", "--recipe", recipe, "--track", "paper"])
    assert refused.exit_code == 2


def test_a_training_from_python_tracks(tmp_path: Path) -> None:
    run = small(tmp_path / "run", track="tensorboard")
    for module, curves in enumerate(run.history(), 1):
        found = curve(tmp_path / "run" / CURVES / f"module-{module}-validation", f"loss/module {module}")
        assert found == [(line["step"], pytest.approx(line["validation_loss"], rel=1e-6)) for line in curves["curve"]]


def test_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CURVES).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedData, match="is a link"), tracked(SILENT, "tensorboard", tmp_path / "run"):
        pass
    (tmp_path / "run" / CURVES).unlink()
    (tmp_path / "run" / CURVES).mkdir()
    (tmp_path / "run" / CURVES / "module-1-train").symlink_to(tmp_path / "elsewhere")
    listener = Notes()
    with tracked(listener, "tensorboard", tmp_path / "run") as told:
        told.training([1], 0, 0)
        told.step(Step([1], 1, 1, [2.0], 16))
    assert len(listener.notes) == 1
    assert "is a link" in listener.notes[0]
    assert not list((tmp_path / "elsewhere").iterdir())
