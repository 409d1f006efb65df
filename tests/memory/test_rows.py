"""The memory table: which rows there are, what they say, and how they are shown."""

from __future__ import annotations

import csv
import io
import json
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from layerwise.cli import main
from layerwise.paper.memory_report import _spread, depth_chart, memory_chart, memory_csv, memory_json, memory_table
from layerwise.paper.memory_rows import PAPER, Asked, Found, Row, depth_rows, table_rows, work_out, work_out_apart
from layerwise.recipe.methods import METHODS

RECIPE = str(Path(__file__).parents[1] / "tiny_recipe.py")
MEASURED = {"allocated": 1000, "reserved": 2000, "process": None, "device": "Some GPU"}


def test_the_papers_figures_stand_beside_its_rows() -> None:
    rows = table_rows(3, ["supervised", "cpc", "gim"], "500MB", PAPER)
    assert {row.name: row.paper for row in rows if row.paper is not None} == {
        "supervised": 6.3,
        "cpc": 7.7,
        "gim all, losses summed": 7.0,
        "gim module 1": 2.5,
    }
    assert len({row.name for row in rows}) == len(rows)


def test_a_row_is_the_same_in_a_process_of_its_own() -> None:
    asked, row = Asked(RECIPE), Row("gim module 2", "gim", (2,))
    here = work_out(asked, row)
    [apart] = work_out_apart([(asked, row)])
    assert apart == here
    assert here.peak == here.predicted["peak"] > 0


def test_eager_needs_less_than_the_sum_and_a_budget_is_kept() -> None:
    asked = Asked(RECIPE)
    summed = work_out(asked, Row("", "gim", step="summed"))
    eager = work_out(asked, Row("", "gim"))
    under = work_out(asked, Row("", "gim", training=("max_memory=600kB",)))
    assert summed.peak > eager.peak > 600_000 > under.peak
    assert under.micro_batch is not None


@pytest.mark.parametrize("recipe", ["digits", pytest.param("voices", marks=pytest.mark.long)])
def test_the_memory_of_every_method_can_be_predicted(recipe) -> None:
    asked = Asked(recipe, overrides=("scale=0.1",), batch=4)
    found = {method: work_out(asked, Row(method, method)) for method in METHODS}
    assert {method: row.problem for method, row in found.items() if row.problem} == {}
    assert all(row.peak for row in found.values())


def test_what_cannot_be_done_is_said_and_not_left_out() -> None:
    found = work_out(Asked(RECIPE), Row("", "gim", training=("max_memory=1kB",)))
    assert found.peak is None
    assert found.problem is not None
    assert "--max-memory" in found.problem
    [broken] = work_out_apart([(Asked("no-such-recipe"), Row("", "gim"))])
    assert broken.problem is not None
    assert "no-such-recipe" in broken.problem


def test_the_deepest_stage_takes_what_it_takes_in_a_shallow_network() -> None:
    """Within 1% at 12 modules of that at 3, where end-to-end and the summed loss grow with the depth."""
    peaks = {
        (row.name, depth): work_out(Asked("stl10", depth=depth), row).peak
        for depth in (3, 12)
        for row in depth_rows(depth)
    }
    assert peaks["gim, deepest stage", 12] == pytest.approx(peaks["gim, deepest stage", 3], rel=0.01)
    for name in ("gim all, losses summed", "cpc", "supervised"):
        assert peaks[name, 12] > 2.5 * peaks[name, 3]
    assert peaks["gim all, eager", 12] < 1.2 * peaks["gim all, eager", 3]


FOUND = [
    Found(
        Row("gim all, losses summed", "gim", step="summed", paper=7.0), 3, {"peak": 1100, "parameters": 100}, MEASURED
    ),
    Found(Row("gim module 1", "gim", (1,), paper=2.5), 3, {"peak": 500, "parameters": 50}),
    Found(Row("cpc", "cpc"), 3, problem="it will not fit"),
]


def test_prediction_and_measurement_stand_side_by_side_with_the_error() -> None:
    rows = memory_json(FOUND, Asked("stl10"))["rows"]
    assert [row["kind"] for row in rows] == ["measured", "predicted", None]
    assert rows[0]["peak"] == 1000
    assert rows[0]["error"] == pytest.approx(0.1)
    assert rows[1]["ratio"] == pytest.approx(0.5)
    assert rows[1]["paper_ratio"] == pytest.approx(2.5 / 7)


def test_the_csv_holds_every_row() -> None:
    lines = list(csv.DictReader(io.StringIO(memory_csv(FOUND, Asked("stl10")).decode())))
    assert [line["name"] for line in lines] == [one.row.name for one in FOUND]
    assert lines[0]["allocated"] == "1000"
    assert lines[2]["problem"] == "it will not fit"


def test_the_table_says_what_was_measured_and_what_went_wrong(capsys) -> None:
    memory_table(FOUND, Asked("stl10", device="cuda"))
    shown = " ".join(capsys.readouterr().out.split())  # a title may be folded
    assert "measured on Some GPU" in shown
    assert "+10.0%" in shown
    assert "cpc: it will not fit" in shown
    memory_table(FOUND[1:2], Asked("stl10"))
    assert "predicted, no GPU was used" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("chart", [memory_chart, depth_chart])
def test_charts_are_pictures(chart) -> None:
    assert chart(FOUND, Asked("stl10")).startswith(b"\x89PNG")


def test_the_command(tmp_path) -> None:
    asked = ["memreport", "--recipe", RECIPE, "--method", "supervised", "--device", "cpu"]
    files = ["--csv", str(tmp_path / "m.csv"), "--chart", str(tmp_path / "m.png")]
    result = CliRunner().invoke(main, [*asked, *files, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    names = [row["name"] for row in json.loads(result.stdout)["rows"]]
    assert names == ["supervised", "supervised, checkpointed"]
    assert (tmp_path / "m.csv").read_text().count("\n") == 3
    assert (tmp_path / "m.png").stat().st_size > 1000
    for depths in ("3,x", "²", ""):
        assert CliRunner().invoke(main, ["memreport", "--depth", depths]).exit_code == 2
    refused = CliRunner().invoke(main, ["memreport", "--depth", "3", "--method", "predsim"])
    assert refused.exit_code == 2
    assert "--depth compares gim, cpc, supervised" in refused.stderr
    assert CliRunner().invoke(main, ["memreport", "--max-memory", "much"]).exit_code == 2


def test_labels_of_lines_that_end_together_do_not_overlap() -> None:
    ends = [(48.0, height, str(height), "") for height in (42.6, 1.6, 42.1, 42.0, 28.0, 1.9)]
    placed = _spread(ends, 2.5)
    heights = [height for _, height in placed]
    assert [end[1] for end, _ in placed] == sorted(end[1] for end in ends), "in the order of their lines"
    assert all(above - below >= 2.5 - 1e-9 for below, above in pairwise(heights))
    assert all(abs(height - end[1]) <= 2.6 for end, height in placed), "near their lines"
