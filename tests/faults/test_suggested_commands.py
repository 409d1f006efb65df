"""Every command that a message suggests can be typed as it stands, in a run whose name a shell would take apart, and
leads on: what was refused before is done afterwards.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from layerwise.cli import main
from tests.suggested import commands, message_of, typed

RECIPE = str(Path(__file__).parent.parent / "tiny_recipe.py")
SHORT = ["--set=training.epochs=1", "--set=dataset.samples=120"]
NAME = 'it\'s a "run" of $mine; really'


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Two modules trained, each with its cache."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    for command in (["stage", "1"], ["cache", "--module", "1"], ["stage", "2"], ["cache", "--module", "2"]):
        assert typed([*command, "--recipe", RECIPE, "--run-dir", str(folder), "--device", "cpu", *SHORT]).exit_code == 0
    return folder


def chunk(run: Path) -> Path:
    return next(path for path in sorted((run / "caches/1/train/values").rglob("*")) if path.stat().st_size > 10_000)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def forget_stage(run: Path, number: int) -> None:
    shutil.rmtree(run / f"stages/{number}")


def forget_cache(run: Path) -> None:
    shutil.rmtree(run / "caches/1")


def nothing(run: Path) -> None: ...


def window(run: Path) -> None:
    done = typed(["cache", "--module", "1", "--run-dir", str(run), "--cache-budget=3MB"])
    assert done.exit_code == 0, done.output


CASES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "a module below is not trained": (lambda run: forget_stage(run, 1), ["stage", "2"]),
    "a probe's module is not trained": (lambda run: forget_stage(run, 2), ["probe", "--module", "2"]),
    "a cache is missing": (lambda run: (forget_stage(run, 2), forget_cache(run)), ["stage", "2"]),
    "a cache to repair is missing": (forget_cache, ["cache", "--module", "1", "--repair"]),
    "a cache is damaged": (lambda run: (forget_stage(run, 2), flip(chunk(run))), ["stage", "2"]),
    "weights are missing": (lambda run: (run / "stages/2/module.safetensors").unlink(), ["stage", "2"]),
    "other settings": (nothing, ["stage", "2", "--set=optimiser.learning_rate=0.02"]),
    "other settings below": (nothing, ["stage", "1", "--set=optimiser.learning_rate=0.02"]),
    "a budget below a window": (nothing, ["cache", "--module", "1", "--cache-budget=20kB"]),
    "a whole cache over the budget": (lambda run: forget_stage(run, 2), ["stage", "2", "--cache-budget=3MB"]),
    "a window for another budget": (
        lambda run: (forget_stage(run, 2), window(run)),
        ["stage", "2", "--cache-budget=2900kB"],
    ),
    "trained on all, and a budget for less": (nothing, ["run", "--cache-budget=3MB"]),
    "memory is too small": (lambda run: forget_stage(run, 2), ["run", "--max-memory=10kB"]),
    "a budget below the floor": (lambda run: forget_stage(run, 2), ["run", "--cache-budget=10kB"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_advice_of_an_error_leads_on(whole, tmp_path, case) -> None:
    prepare, refused = CASES[case]
    run = Path(shutil.copytree(whole, tmp_path / NAME))
    prepare(run)
    code, message = message_of([*refused, "--run-dir", str(run)])
    assert code in (1, 2, 3, 65), message
    advised = commands(message)
    assert advised, f"nothing to type in: {message}"
    for arguments in advised:
        assert str(run) in arguments, f"{arguments}: another run"
        main.commands[arguments[0]].make_context(arguments[0], arguments[1:])  # parses
    done = typed(advised[0])
    assert done.exit_code == 0, f"{message}\n{advised[0]}\n{done.output}"


def test_what_verify_names_to_type_mends_the_run(whole, tmp_path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / NAME))
    flip(chunk(run))
    flip(run / "stages/2/module.safetensors")
    code, message = message_of(["verify", "--run-dir", str(run)])
    assert code == 65
    for arguments in commands(message):
        assert typed(arguments).exit_code == 0, arguments
    assert typed(["verify", "--run-dir", str(run)]).exit_code == 0


def test_what_status_says_comes_next_leads_to_the_end(whole, tmp_path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / NAME))
    forget_cache(run)
    forget_stage(run, 2)
    typed_before: list[str] = []
    while (said := json.loads(typed(["status", "--run-dir", str(run), "--json"]).stdout)["next"]) is not None:
        assert said not in typed_before, "it says the same again"
        typed_before.append(said)
        (arguments,) = commands(said)
        assert typed(arguments).exit_code == 0, said
    assert len(typed_before) >= 3
