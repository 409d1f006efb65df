"""SIGINT and SIGTERM in the middle of whatever takes long: exit 75, how to go on, and the same command does."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from layerwise.cli import main
from layerwise.cli.common import stop_on_signal
from layerwise.errors import StoppedEarly
from layerwise.stopping import Stopping

RECIPE = str(Path(__file__).parents[1] / "tiny_recipe.py")
TINY = ("--recipe", RECIPE, "--set", "training.epochs=1", "--set", "cache.dtype=uint8")
FIRST = ("stage", "1", *TINY)


def call(*arguments: str) -> Result:
    # Hypothesis watches the garbage collector, and Python drops an interruption that arrives in such a callback.
    watching, gc.callbacks[:] = list(gc.callbacks), []
    try:
        return CliRunner().invoke(main, arguments, catch_exceptions=False)
    finally:
        gc.callbacks[:] = watching


def interrupt(monkeypatch: pytest.MonkeyPatch, module: str, name: str, number: int, at: int = 1) -> None:
    """The signal arrives in the call number `at` of that function."""
    place = importlib.import_module(f"layerwise.{module}")
    original, calls = getattr(place, name), []

    def signalled(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, signalled)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("where", "before", "command"),
    [
        (("pipeline.probe", "_train_linear"), [FIRST], ("probe", "--module", "1")),
        (("pipeline.probe", "features"), [FIRST], ("probe", "--module", "1")),
        (("pipeline.caching", "_calibration"), [FIRST], ("cache", "--module", "1")),
        (("pipeline.caching", "as_stored", 3), [FIRST], ("cache", "--module", "1")),
        (("pipeline.schedule", "_fit"), [], FIRST),
        (("training.checkpoint", "save_tensors"), [], FIRST),
    ],
)
def test_a_signal_ends_it_and_the_same_command_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    where: tuple[Any, ...],
    before: list[tuple[str, ...]],
    command: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(number)
    for earlier in before:
        assert call(*earlier).exit_code == 0
    with monkeypatch.context() as patch:
        interrupt(patch, *where[:2], number, *where[2:])
        stopped = call(*command)
    assert stopped.exit_code == 75
    assert "resumes" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert signal.getsignal(number) is handler
    assert call(*command).exit_code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_callback_of_the_interpreter_is_not_lost(capfd: pytest.CaptureFixture[str], number: int) -> None:
    class Referred:
        pass

    referred = Referred()
    reference = weakref.ref(referred, lambda _: os.kill(os.getpid(), number))
    hook = sys.unraisablehook

    def work() -> None:
        nonlocal referred
        with stop_on_signal():
            referred = Referred()  # the first one goes, and Python drops what the callback raises
            for _ in range(1000):
                time.sleep(0.01)

    with pytest.raises(StoppedEarly):
        work()
    assert reference() is None
    assert "Exception ignored" not in capfd.readouterr().err
    assert sys.unraisablehook is hook


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_a_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """torch calls Python for fake tensors where C++ can take no exception: one there would end the process."""
    monkeypatch.chdir(tmp_path)
    behind = []
    place = importlib.import_module("layerwise.memory.count").LiveBytes
    original = place.__torch_dispatch__

    def signalled(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not behind:
            os.kill(os.getpid(), number)
        behind.append(args[0])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(place, "__torch_dispatch__", signalled)
    stopped = call("plan", *TINY)
    assert stopped.exit_code == 75
    assert len(behind) > 100


def test_a_second_signal_does_not_wait() -> None:
    code = (
        "import os, signal\nfrom layerwise.stopping import signals_wait\n"
        "with signals_wait():\n    for _ in range(2):\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "    while True:\n        pass"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGINT


def test_looking_through_the_files_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for speaker in ("a", "b"):
        (tmp_path / "data" / speaker).mkdir(parents=True)
        for number in range(40):
            soundfile.write(tmp_path / "data" / speaker / f"{number}.wav", draw.normal(0, 0.1, 4_000), 16_000)
    command = ("plan", "--recipe", "speech", "--data-dir", "data", "--set", "dataset.window=2000", "--json")
    with monkeypatch.context() as patch:
        interrupt(patch, "data.recordings", "_look", signal.SIGINT, at=30)
        stopped = call(*command)
    assert json.loads(stopped.stdout)["exit_code"] == stopped.exit_code == 75
    seen = []
    recordings = importlib.import_module("layerwise.data.recordings")
    look = recordings._look
    monkeypatch.setattr(recordings, "_look", lambda content: seen.append(1) or look(content))
    call(*command)
    assert len(seen) <= 80 - 29 + 4  # four were under way; none is left if they were quicker than the signal


def test_a_download_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    interrupt(monkeypatch, "data.librispeech", "fetch", signal.SIGTERM)
    stopped = call("stage", "1", "--recipe", "librispeech", "--download", "--data-dir", str(tmp_path / "data"))
    assert stopped.exit_code == 75
    assert list((tmp_path / "data").glob("*")) == []


def test_a_figure_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    interrupt(monkeypatch, "pipeline.probe", "_train_linear", signal.SIGTERM)
    asked = ("reproduce", "figure4", "--recipe", RECIPE, "--set", "training.epochs=1")
    assert call(*asked).exit_code == 75


def test_a_wish_is_heard_behind_the_last_step_too() -> None:
    stopping = Stopping()
    with pytest.raises(KeyboardInterrupt), stopping.at_steps():  # noqa: PT012 - raised behind the block
        assert stopping.ask()
        assert stopping()
    with pytest.raises(KeyboardInterrupt):
        stopping.ask()
