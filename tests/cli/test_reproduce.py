"""`layerwise reproduce`: every row trained once, ours beside the paper's, and loud about what is not comparable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from layerwise.cli import main
from layerwise.paper.numbers import GIM
from layerwise.paper.reproduce import Ground
from layerwise.progress import SILENT
from layerwise.stopping import Stopping

RECIPE = Path(__file__).parents[1] / "tiny_recipe.py"
TITLES = [
    "Deep InfoMax",
    "Predsim",
    "Randomly initialized",
    "Supervised",
    "Greedy Supervised",
    "CPC",
    "Greedy InfoMax (GIM)",
    "GIM, iterative",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reproduce")


def reproduce(root: Path, *arguments: str) -> Result:
    given = ["reproduce", *arguments, "--recipe", str(RECIPE), "--run-dir", str(root), "--set", "training.epochs=1"]
    return CliRunner().invoke(main, [*given, "--json"], catch_exceptions=False)


@pytest.fixture(scope="module")
def table1(root: Path) -> Result:
    return reproduce(root, "table1", "--seeds", "2")


def test_every_row_is_filled_over_all_seeds(table1: Result, root: Path) -> None:
    result = json.loads(table1.stdout)
    assert [row["title"] for row in result["rows"]] == TITLES
    for row in result["rows"]:
        cell = row["cells"]["class"]
        assert len(cell["ours"]) == 2
        assert cell["mean"] == pytest.approx(sum(cell["ours"]) / 2)
        assert cell["deviation"] == pytest.approx(abs(cell["ours"][0] - cell["ours"][1]) / 2**0.5)
        assert cell["difference"] == pytest.approx(cell["mean"] - cell["paper"])
    page = (root / "table1.md").read_text()
    assert all(title in page for title in TITLES)
    assert "OTHER DATA" in page
    assert "81.9 ± 0.3" in page
    assert Image.open(root / "table1.png").size[0] > 1000


def test_what_is_finished_is_skipped(table1: Result, root: Path) -> None:
    records = sorted(root.glob("*/stages/*/stage.json"))
    before = {record: record.stat().st_mtime_ns for record in records}
    assert len(before) == 2 * (3 * 5 + 3)  # five stacks of three modules, three merged ones, two seeds
    again = reproduce(root, "table1", "--seeds", "2")
    assert json.loads(again.stdout)["rows"] == json.loads(table1.stdout)["rows"]
    assert {record: record.stat().st_mtime_ns for record in sorted(root.glob("*/stages/*/stage.json"))} == before


@pytest.mark.parametrize("figure", ["figure2", "figure3", "figure4"])
def test_figures_take_the_tables_trainings(figure: str, table1: Result, root: Path) -> None:
    runs = sorted(path.name for path in root.iterdir() if path.is_dir())
    result = json.loads(reproduce(root, figure, "--seeds", "2").stdout)
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == runs
    assert Image.open(root / f"{figure}.png").size[0] > 1000
    page = (root / f"{figure}.md").read_text()
    assert page.startswith("# Figure")
    assert "OTHER DATA" in page  # the paper's figures are of STL-10 and LibriSpeech
    if figure == "figure3":
        first = result["modules"][0]
        assert first["simultaneous"] == first["iterative"]  # nothing differs for the first module, to the bit
        assert result["modules"][2]["simultaneous"] != result["modules"][2]["iterative"]
    if figure == "figure4":
        assert [line["method"] for line in result["methods"]] == ["gim", "cpc", "supervised"]
        assert [point["module"] for point in result["methods"][1]["points"]] == [1, 2, 3]
    if figure == "figure2":
        for module in result["modules"]:
            for neuron in module["neurons"]:
                assert len({patch["sample"] for patch in neuron["patches"]}) == 4
                strengths = [patch["activation"] for patch in neuron["patches"]]
                assert strengths == sorted(strengths, reverse=True)


def test_what_cells_share_is_trained_again_once(tmp_path: Path) -> None:
    def ground(fresh: bool) -> Ground:
        shared = {"data_dir": None, "download": False, "progress": SILENT, "stopping": Stopping()}
        changes = ("training.epochs=1", "feed=recompute")
        return Ground(str(RECIPE), changes, tmp_path, 1, torch.device("cpu"), fresh=fresh, **shared)

    def frozen(ground: Ground) -> int:
        with ground.trained(GIM, 0) as setup:
            return (setup.run.stage(1) / "stage.json").stat().st_mtime_ns

    first, again = frozen(ground(False)), ground(True)
    second = frozen(again)
    assert second != first
    assert frozen(again) == second


def test_a_scale_is_said_loudly(tmp_path: Path) -> None:
    result = json.loads(reproduce(tmp_path, "figure3", "--scale", "0.5").stdout)
    assert result["scale"] == 0.5
    assert "SCALED DOWN to 0.5" in (tmp_path / "figure3.md").read_text()


def test_a_table_of_speech_asks_for_a_recipe_of_speech(tmp_path: Path) -> None:
    result = reproduce(tmp_path, "table3")
    assert not any(path.is_dir() for path in tmp_path.iterdir())  # nothing was trained first
    assert result.exit_code == 2
    assert "phone" in json.loads(result.stdout)["message"]


@pytest.mark.parametrize("field", ["method=cpc", "schedule=iterative"])
def test_what_the_rows_choose_cannot_be_chosen(field: str, tmp_path: Path) -> None:
    result = reproduce(tmp_path, "table1", "--set", field)
    assert result.exit_code == 2
    assert f"leave out --set {field.split('=')[0]}" in json.loads(result.stdout)["message"]


def test_a_row_that_cannot_be_trained_is_said_before_the_first_is(tmp_path: Path) -> None:
    given = ["reproduce", "table4", "--recipe", "voices", "--run-dir", str(tmp_path), "--set", "network.context=null"]
    result = CliRunner().invoke(main, [*given, "--json"], catch_exceptions=False)
    assert result.exit_code == 2
    assert "network.context" in json.loads(result.stdout)["message"]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(10):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((80, 80), 60).convert("RGB").save(path)
    return tmp_path / "pictures"


def small(what: str, pictures: Path, root: Path) -> Result:
    given = ["reproduce", what, "--recipe", "images", "--data-dir", str(pictures), "--run-dir", str(root), "--json"]
    sizes = ["training.epochs=1", "training.batch_size=4", "network.width=0.1", "dataset.resize=80"]
    changes = [argument for size in sizes for argument in ("--set", size)]
    return CliRunner().invoke(main, [*given, *changes], catch_exceptions=False)


def test_labels_that_only_the_files_tell_are_asked_for_before_training(pictures: Path, tmp_path: Path) -> None:
    for path in sorted(pictures.glob("*/*")):
        path.rename(pictures / path.name)
    result = small("figure4", pictures, tmp_path / "root")
    assert result.exit_code == 2
    assert "labels for some task" in json.loads(result.stdout)["message"]
    assert not list(tmp_path.glob("root/*/stages"))


def test_fewer_pictures_than_patches_to_show(pictures: Path, tmp_path: Path) -> None:
    result = small("figure2", pictures, tmp_path / "root")
    assert result.exit_code == 0
    assert {len(one["patches"]) for module in json.loads(result.stdout)["modules"] for one in module["neurons"]} == {2}
    assert "the 2 patches" in (tmp_path / "root" / "figure2.md").read_text()
