"""A run that a stranger made: whatever its JSON says, commands end in a second, with an error that a user can act on,
execute nothing of it, and touch nothing outside.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.commands import Commands
from tests.faults.conftest import scaled
from tests.faults.edits import Edit, seal
from tests.faults.runs import make_bystander, tree

SECONDS = 1.0  # of processor time, beyond what the command takes on the run as it was
MEMORY = 12 << 30  # bytes of address space, most of them libraries
ALWAYS = (["status"], ["verify"])  # which tells of every edit
SOMETIMES = (
    ["plan"],
    ["stage", "1"],
    ["stage", "2"],
    ["cache", "--module", "1", "--repair"],
    ["probe", "--module", "1"],
    ["watch", "--once"],
    ["export", "--module", "1", "--to", "encoder.safetensors"],
)


def attack(
    commands: Commands,
    finished: Callable[[str], Path],
    folder: Path,
    tally: Counter[str],
    variants: list[str],
    times: int,
    seed: int,
) -> None:
    rng, faults = random.Random(seed), []
    make_bystander(folder / "bystander")
    evil, canary = folder / "bystander/evil.py", folder / "canary"
    evil.write_text(f"open({str(canary)!r}, 'w')\nfrom recipes.digits import recipe\n")
    untouched = tree(folder / "bystander")
    usual: dict[tuple[str, ...], float] = {}
    for number in range(-len(variants), times):  # at first nothing is edited
        place = folder / "place"
        variant = variants[number % len(variants)]
        shutil.copytree(finished(variant), place / "run")
        said = "unedited"
        if number >= 0:
            edit = Edit(place / "run", rng, evil)
            said = edit.said
            picked = [*ALWAYS, *rng.sample(SOMETIMES, 2)]
        else:
            picked = [*ALWAYS, *SOMETIMES]
        asked = [[*arguments, "--run-dir", "run"] for arguments in picked]
        outcomes = commands.run(*asked, cwd=place, limits={"RLIMIT_AS": MEMORY})
        for outcome in outcomes:
            key = outcome.arguments[:2]
            if number < 0:
                assert outcome.code == 0, outcome
                usual[key] = max(usual.get(key, 0), outcome.seconds)
                continue
            wrong = ""
            if outcome.code is None:
                wrong = "a hang"
            elif outcome.code < 0:
                wrong = f"ended by signal {-outcome.code}"
            elif not outcome.typed:
                wrong = "a traceback"
            elif outcome.seconds > usual[key] + SECONDS:
                wrong = f"{outcome.seconds:.1f} s instead of {usual[key]:.1f}"
            tally["faults" if wrong else f"exit {outcome.code}"] += 1
            if wrong:
                faults.append(f"{wrong}: seed {seed}, edit {number}, {said}: {outcome}")
        if canary.exists():
            faults.append(f"code was executed: seed {seed}, edit {number}, {said}")
            canary.unlink()
        if tree(folder / "bystander") != untouched:
            faults.append(f"something outside was touched: seed {seed}, edit {number}, {said}")
            shutil.rmtree(folder / "bystander")
            make_bystander(folder / "bystander")
            evil.write_text(f"open({str(canary)!r}, 'w')\nfrom recipes.digits import recipe\n")
            untouched = tree(folder / "bystander")
        if number >= 0 and not edit.sealed and outcomes[1].code == 0:
            faults.append(f"an edit went unnoticed by verify: seed {seed}, edit {number}, {said}")
        tally["edits"] += number >= 0
        shutil.rmtree(place)
    assert {path.name for path in folder.iterdir()} == {"bystander"}
    assert not faults, f"{len(faults)} faults\n\n" + "\n\n".join(faults[:20])


def test_what_cannot_be_shown_is_escaped(commands: Commands, finished: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(finished("uint8"), tmp_path / "run")
    path = tmp_path / "run/stages/2/stage.json"
    record = json.loads(path.read_bytes())
    record["made_from"]["network"]["patch"] = "\ud800"
    seal(record)
    path.write_text(json.dumps(record))
    outcome = commands.call("status", "--run-dir", "run", cwd=tmp_path)
    assert outcome.code == 0, outcome
    assert r"\ud800" in outcome.output


def test_edits_of_a_strangers_run(
    commands: Commands, finished: Callable[[str], Path], tmp_path: Path, tally: Counter[str]
) -> None:
    attack(commands, finished, tmp_path, tally, ["uint8"], 4, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_2000_edits_of_a_strangers_runs(
    commands: Commands, finished: Callable[[str], Path], tmp_path: Path, tally: Counter[str], part: int
) -> None:
    attack(commands, finished, tmp_path, tally, ["uint8", "rolling"], scaled(500), seed=1 + part)
