"""Nothing silent: whatever byte of a run or of its caches changes, `layerwise verify` exits 65 and names the file."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from layerwise.cli import main
from tests.faults.commands import Commands
from tests.faults.conftest import scaled
from tests.faults.runs import VARIANTS, asked


@pytest.fixture(scope="module")
def stopped(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped while it trained."""
    folder = tmp_path_factory.mktemp("stopped")
    running = commands.start(asked("stopped", **VARIANTS["simultaneous"], **{"training.epochs": 10**6}), cwd=folder)
    until = time.monotonic() + 60
    while not list((folder / "stopped").glob("stages/*/checkpoint.json")):
        assert time.monotonic() < until
        time.sleep(0.01)
    running.kill(signal.SIGTERM)
    [outcome] = running.outcomes()
    assert outcome.code == 75, outcome
    return folder / "stopped"


def verify(run: Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["verify", "--run-dir", str(run), "--json"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def files(run: Path) -> list[str]:
    """All but locks, whose content is for people and is forgotten."""
    found = (path for path in run.rglob("*") if path.is_file() and "lock" not in path.name)
    return sorted(path.relative_to(run).as_posix() for path in found)


def flip(runs: list[Path], tally: Counter[str], times: int, seed: int) -> None:
    rng = random.Random(seed)
    for run in runs:
        assert verify(run)[0] == 0, verify(run)
    known = {run: files(run) for run in runs}
    missed: Counter[str] = Counter()
    for _ in range(times):
        run = rng.choice(runs)
        path = rng.choice(known[run])
        content = (run / path).read_bytes()
        changed = bytearray(content)
        at = rng.randrange(len(content))
        changed[at] ^= 1 << rng.randrange(8)
        (run / path).write_bytes(changed)
        code, output = verify(run)
        (run / path).write_bytes(content)
        place = path.split("/", 2)[-1] if path.startswith("caches/") else path  # a cache names its files below itself
        if code == 65 and place in output:
            tally["found"] += 1
        else:
            tally["missed"] += 1
            missed[f"{run.name}/{path} (exit {code})"] += 1
    for run in runs:
        assert verify(run)[0] == 0
    assert not missed, missed


def test_flips_in_a_run_are_found(finished: Callable[[str], Path], tally: Counter[str]) -> None:
    flip([finished("uint8")], tally, 60, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_20000_flips_in_runs_are_found(
    finished: Callable[[str], Path], stopped: Path, tally: Counter[str], part: int
) -> None:
    flip([finished("uint8"), finished("rolling"), stopped], tally, scaled(5000), seed=1 + part)
