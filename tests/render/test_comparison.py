"""Runs side by side: the page, and the command that writes it."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest
from click.testing import CliRunner

from layerwise.cli import main
from layerwise.errors import UsageError
from layerwise.pipeline.results import trainings
from layerwise.render.comparison import COLOURS, MOST, comparison, write_comparison
from tests.render.test_report import Page, results

RECIPE = str(Path(__file__).parents[1] / "tiny_recipe.py")


def test_outcomes_curves_and_differences_stand_side_by_side() -> None:
    first, second = results(), results(depth=2, epochs=3)
    second["recipe"] = {**second["recipe"], "seed": 5}
    content = comparison({"a": first, "b": second})
    page = Page(content)
    assert page.open == []
    assert "a\n3 of 3\n95.0 ±" in page.text
    assert "b\n2 of 2\n90.0 ±" in page.text
    assert "field\na\nb\nseed\n0\n5\n" in page.text
    assert "training.precision" not in page.text, "the same in both"
    told = [json.loads(unescape(found)) for found in re.findall(r"data-hover='([^']*)'", content)]
    assert len(told) == 3 + 1, "three modules, and the probes"
    assert told[0][0][1] == "epoch 1\na 3.1\nb 3.1"
    assert told[2][0][1] == "epoch 1\na 3.1", "the second run has no third module"


def test_runs_that_came_to_nothing_have_a_place_too() -> None:
    empty = results(stages=[], trainings=trainings([]), caches=[], probes=[])
    text = Page(comparison({"a": results(), "b": empty})).text
    assert "b\n0 of 3\n–\n–\n–\n–\n–" in text
    assert "the runs have the same settings" in text


def test_lines_can_be_told_apart_or_are_refused(tmp_path: Path) -> None:
    names = [f"run{number}" for number in range(MOST)]
    content = comparison({name: results() for name in names})
    chart = content.split("<svg")[1]
    looks = re.findall(r'<polyline [^>]*stroke="(#\w+)"[^/]*?(?:stroke-dasharray="([^"]*)")?/>', chart)
    assert len(set(looks)) == len(names) == 3 * len(COLOURS)
    with pytest.raises(UsageError, match="name fewer"):
        write_comparison({str(number): {} for number in range(MOST + 1)}, tmp_path / "page.html")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, words, catch_exceptions=False)
        return done.exit_code, " ".join(done.output.split())

    for name in ("a", "b"):
        folder = ["--recipe", RECIPE, "--run-dir", name, "--device", "cpu"]
        assert call("stage", "1", *folder, "--set", f"training.epochs={'ab'.index(name) + 1}")[0] == 0
    assert call("report", "--compare", "a", "b", "--out", "pages/both.html") == (0, "comparison: pages/both.html")
    text = Page((tmp_path / "pages/both.html").read_text()).text
    assert "training.epochs\n1\n2" in text
    assert not (tmp_path / "a/report").exists(), "the runs are only read"
    assert call("report", "--compare", "b", "a", "--out", "pages/both.html")[0] == 0, "a page of ours is written over"

    (tmp_path / "mine.html").write_text("mine")
    for words, told in (
        (["--compare", "a", "b", "--out", "mine.html"], "choose another --out"),
        (["--compare", "a"], "needs two runs or more"),
        (["--compare", "a", "c"], "c is no folder of a run"),
        (["--compare", "a", "b", "--recipe", "digits"], "leave out --recipe"),
        (["a"], "--run-dir a"),
        (["--run-dir", "a", "--out", "x.html"], "--out is of --compare"),
    ):
        code, output = call("report", *words)
        assert code in (1, 2), words
        assert told in output


def test_a_run_of_one_stage_has_a_report(tmp_path: Path) -> None:
    words = ["--recipe", RECIPE, "--run-dir", str(tmp_path / "a"), "--set", "training.epochs=1"]
    for command in (["stage", "1", "--device", "cpu"], ["report"]):
        done = CliRunner().invoke(main, [*command, *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    page = Page((tmp_path / "a/report/report.html").read_text())
    assert "1 of 3 modules are trained." in page.text
    assert "Training takes" in page.text, "memory beside end-to-end training"
