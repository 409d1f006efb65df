"""A run is killed, or asked to stop, at any moment: the same command goes on, to the same bits."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.commands import Commands, Outcome
from tests.faults.conftest import scaled
from tests.faults.runs import VARIANTS, asked, bits, make_bystander, tree

Finished = Callable[[str], Path]


def disturb(
    commands: Commands,
    finished: Finished,
    folder: Path,
    tally: Counter[str],
    variants: list[str],
    times: int,
    numbers: list[int],
    seed: int,
) -> None:
    """Send `times` signals to runs at random moments, and let each run end in between."""
    rng, sent, runs = random.Random(seed), 0, 0
    make_bystander(folder / "bystander")
    untouched = tree(folder / "bystander")
    while sent < times:
        variant, name = variants[runs % len(variants)], f"run{runs}"
        wanted = bits(finished(variant))
        begun = 0
        while True:
            running = commands.start(asked(name, **VARIANTS[variant]), cwd=folder)
            interrupted = sent < times and not running.wait(rng.uniform(0, 1.2))
            number = rng.choice(numbers)
            if interrupted:
                running.kill(number)
                sent += 1
            [outcome] = running.outcomes() or [Outcome((), -number, "", 0)]
            tally[told(outcome, number) if interrupted else "ended undisturbed"] += 1
            if outcome.code == 0:
                break
            assert interrupted, f"{variant}, seed {seed}: {outcome}"
            begun += 1
            assert begun < 500, f"{variant}, seed {seed}: no end after {begun} interruptions\n{outcome}"
        assert bits(folder / name) == wanted, f"{variant}, seed {seed}, {begun} times interrupted"
        looked = commands.call("verify", "--run-dir", name, cwd=folder)
        assert looked.code == 0, looked
        left = [path for path in (folder / name).rglob("*") if path.name.endswith(".tmp") or "scratch" in path.name]
        assert not left, f"{variant}, seed {seed}: {left}"
        tally["runs ended in the same bits"] += 1
        runs += 1
    assert tree(folder / "bystander") == untouched
    assert {path.name for path in folder.iterdir()} == {"bystander", "runs", *(f"run{n}" for n in range(runs))}


def told(outcome: Outcome, number: int) -> str:
    """How a run that was signalled ended, if that is a way in which it may."""
    assert "Traceback" not in outcome.output, outcome
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        assert outcome.code in (-number, 0), outcome
        return f"{name}: killed" if outcome.code else f"{name}: had ended"
    if outcome.code == 75:
        assert "resume" in outcome.output, outcome
        return f"{name}: exit 75"
    if outcome.code == 0:
        return f"{name}: had ended"
    # Before and behind the work the system's own answer to a signal holds, as for any program.
    assert outcome.code in (-number, 1, 130), outcome
    assert "epoch" not in outcome.output or "report:" in outcome.output, outcome
    return f"{name}: before the work began, or behind it"


def test_a_run_killed_at_random(commands: Commands, finished: Finished, tmp_path: Path, tally: Counter[str]) -> None:
    disturb(commands, finished, tmp_path, tally, ["uint8"], 3, [signal.SIGKILL], seed=1)


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_runs_killed_100_times_at_random(
    commands: Commands, finished: Finished, tmp_path: Path, tally: Counter[str], part: int
) -> None:
    variants = list(VARIANTS)[part:] + list(VARIANTS)[:part]
    disturb(commands, finished, tmp_path, tally, variants, scaled(25), [signal.SIGKILL], seed=part)


@pytest.mark.long
@pytest.mark.parametrize("part", range(2))
def test_runs_asked_to_stop_100_times_at_random(
    commands: Commands, finished: Finished, tmp_path: Path, tally: Counter[str], part: int
) -> None:
    variants = list(VARIANTS)[2 * part :] + list(VARIANTS)[: 2 * part]
    disturb(commands, finished, tmp_path, tally, variants, scaled(50), [signal.SIGTERM, signal.SIGINT], seed=part)
