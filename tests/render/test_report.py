from __future__ import annotations

import base64
import io
import json
import re
from hashlib import sha256
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from layerwise.errors import UsageError
from layerwise.files.storage import read_json
from layerwise.memory import Samples
from layerwise.memory.timeline import timeline
from layerwise.pipeline.results import trainings
from layerwise.recipe.methods import with_method
from layerwise.render.plots import DARK, LIGHT, pictures
from layerwise.render.report import flatten, margin, summary, write_report
from tests.conftest import TINY

VOID = {"meta", "source", "img"}


def results(depth: int = 3, epochs: int = 5, **changes: Any) -> dict[str, Any]:
    """In the form that `layerwise.pipeline.results.collect` gives."""
    stages = [
        {
            "module": module,
            "weights": f"{module:064x}",
            "epochs": epochs,
            "best_epoch": max(epochs - 1, 1),
            "seconds": 30.0 * module,
            "steps": 18 * epochs,
            "trained_with": [module],
            "peak": {"allocated": None, "reserved": None, "predicted": 3_000_000 * module},
            "curve": [
                {"epoch": epoch, "step": 18 * epoch, "loss": 3 / epoch, "validation_loss": 3.1 / epoch}
                for epoch in range(1, epochs + 1)
            ],
        }
        for module in range(1, depth + 1)
    ]
    outcome = {"train_accuracy": 0.99, "learning_rate": 1e-3, "samples": 100, "test_samples": 40}
    split = {"samples": 10, "views": 1, "shape": [49, 64, 8, 8], "dtype": "float32", "codec": "lz4"}
    found: dict[str, Any] = {
        "run": "runs/one",
        "recipe": {"name": "one", "schedule": "iterative", "seed": 0, "training": {"precision": "fp32", "max": None}},
        "dataset": {"sizes": {"train": 10, "test": 4}, "notes": [], "sample_shape": [1, 32, 32]},
        "machine": {"device": "CPU, 2 threads", "torch": "2.14.1", "python": "3.11.7"},
        "command": {"recipe": "one", "set": ["cache.dtype=float32"]},
        "modules": [{"module": number, "parameters": 1000, "channels": 64} for number in range(1, depth + 1)],
        "stages": stages,
        "trainings": trainings(stages),
        "caches": [
            {
                "module": number,
                "location": "runs/one/caches/1",
                "bytes": 10_000,
                "ratio": 0.4,
                "splits": {"train": split},
            }
            for number in range(1, depth)
        ],
        "probes": [
            {"module": number, "tasks": {"class": {s: {"accuracy": a, **outcome} for s, a in accuracies.items()}}}
            for number, accuracies in (
                (n, {"trained": min(0.8 + 0.05 * n, 1.0), "untrained": 0.7}) for n in range(1, depth + 1)
            )
        ],
    }
    return {**found, **changes}


class Page(HTMLParser):
    """Tags that open and close in their order, what they refer to, and the text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + "\n"


def read(path: Path) -> Page:
    page = Page(path.read_text())
    assert page.open == []
    return page


def test_one_file_with_everything_in_it(tmp_path: Path) -> None:
    path = write_report(results(), tmp_path)
    page, content = read(path), path.read_text()

    assert path == tmp_path / "report.html"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["manifest.json", "report.html"]
    assert page.references == []
    beside_names = content.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|url\(|@import|<link|<iframe|<script[^>]", beside_names)
    script = content.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in content, "the one script that a browser may run"
    assert page.tags.count("svg") == 3 + 1, "a chart a module, and one of the probes"


def test_charts_tell_their_numbers_and_can_be_hidden(tmp_path: Path) -> None:
    content = write_report(results(), tmp_path).read_text()
    told = [json.loads(unescape(found)) for found in re.findall(r"data-hover='([^']*)'", content)]
    assert [len(points) for points in told] == [5, 5, 5, 3]
    assert told[0][0][1] == "epoch 1\ntraining 3.0000\nvalidation 3.1000"
    assert "weights taken from here" in told[0][3][1]
    assert told[-1][2][1].startswith("module 3\nuntrained 70.0 ±")
    for module in ("1", "2", "3"):
        assert content.count(f'data-toggle="{module}"') == content.count(f'data-module="{module}"') == 1


def test_the_first_sentence_says_what_came_out() -> None:
    assert "95.0 % of class right, 25.0 points above the untrained network" in summary(results())
    found = results()
    found["probes"][-1]["tasks"]["class"]["untrained"]["accuracy"] = 0.94
    assert "40 test samples cannot tell from the untrained network's 94.0 %" in summary(found)
    assert summary(results(probes=[])) == "3 of 3 modules are trained."
    assert summary(results(probes=[], stages=[])) == "Nothing is trained yet."


@pytest.mark.parametrize(
    ("right", "of", "low", "high"), [(40, 40, 0.912, 1.0), (20, 40, 0.352, 0.648), (0, 10, 0.0, 0.278)]
)
def test_the_uncertainty_is_wilsons(right: int, of: int, low: float, high: float) -> None:
    """Against the intervals of Wilson (1927), whose width the margin halves."""
    half = margin({"accuracy": right / of, "test_samples": of})
    assert half == pytest.approx((high - low) / 2, abs=1e-3)


def test_memory_stands_beside_end_to_end_training(tmp_path: Path) -> None:
    samples = Samples((1, 16, 16), {"class": 10})
    ours = timeline(TINY, [1], samples).as_json()
    whole = timeline(with_method(TINY, "cpc"), [1], samples).as_json()
    found = results(memory={"title": "module 1", "stage": ours, "end_to_end": whole})
    page = read(write_report(found, tmp_path))
    ratio = f"{ours['peak'] / whole['peak']:.2f}"
    assert f"Training takes {ratio} times the memory that end-to-end training would." in page.text
    assert f"The peak is {ratio} of that of end-to-end training" in page.text
    for held in ours["largest"]:
        assert held["layer"] in page.text
    told = write_report(results(memory={"title": "", "stage": None, "problem": "not known"}), tmp_path).read_text()
    assert "not known" in told


def test_time_is_shown_by_stage_with_the_probes(tmp_path: Path) -> None:
    found = results()
    found["probes"][1]["seconds"] = 7.0
    text = read(write_report(found, tmp_path)).text
    assert "Time\n3 min 07 s in all." in text
    assert "training module 1\n30.0 s\n" in text
    assert "probe of module 2\n7.0 s\n" in text
    assert "probe of module 1" not in text, "of an earlier version, which did not note it"


def test_settings_are_shown_as_they_differ_from_the_recipe(tmp_path: Path) -> None:
    recipe = results()["recipe"]
    same = read(write_report(results(defaults=recipe), tmp_path)).text
    assert "All as the recipe one has them" in same
    other = {**recipe, "seed": 7}
    text = read(write_report(results(defaults=other), tmp_path)).text
    assert "the recipe's default\nseed\n0\n7\nAll settings" in text


def test_the_numbers_that_a_reader_looks_for(tmp_path: Path) -> None:
    text = read(write_report(results(), tmp_path)).text

    for wanted in ("95.0 ± ", "class, module 3, linear probe; untrained 70.0 %", "8.6 MiB", "3 min 00 s", "19.5 KiB"):
        assert wanted in text
    assert "highest peak memory, module 3 (predicted)" in text
    assert "0.7500\n0.7750" in text, "losses of the epoch whose weights the module has"
    assert "layerwise run --recipe one --set=cache.dtype=float32" in text
    assert "training.precision\nfp32" in text


def test_measured_memory_is_called_measured(tmp_path: Path) -> None:
    stages = results()["stages"]
    for stage in stages:
        stage["peak"] = {"allocated": 5_000_000, "reserved": 6_000_000}
    text = read(write_report(results(stages=stages, trainings=trainings(stages)), tmp_path)).text

    assert "highest peak memory, module 1 (measured)" in text
    assert "predicted" not in text


def test_a_training_of_all_modules_together_is_counted_once(tmp_path: Path) -> None:
    stages = results()["stages"]
    for stage in stages:
        stage.update(trained_with=[1, 2, 3], seconds=90.0)
    text = read(write_report(results(stages=stages, trainings=trainings(stages)), tmp_path)).text

    assert "1 min 30 s\ntraining, all stages" in text
    assert "modules 1-3" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": [], "trainings": [], "caches": [], "probes": []},
        {"probes": []},
        {"caches": []},
        {"stages": results(1)["stages"], "trainings": results(1)["trainings"]},
    ],
    ids=["nothing", "no probes", "no caches", "one stage"],
)
def test_a_run_that_is_not_done_has_a_page_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    read(write_report(results(**changes), tmp_path))


def test_unknown_memory_is_not_shown_as_nothing(tmp_path: Path) -> None:
    stages = results()["stages"]
    for stage in stages:
        stage["peak"] = {"allocated": None, "reserved": None}
    page = read(write_report(results(stages=stages, trainings=trainings(stages)), tmp_path))

    assert "peak memory, module" not in page.text
    assert " 0 B" not in page.text


def test_many_modules_and_tasks(tmp_path: Path) -> None:
    many = results(depth=14, epochs=1)
    for probe in many["probes"]:
        probe["tasks"]["speaker"] = probe["tasks"]["class"]
    page = read(write_report(many, tmp_path))

    assert "speaker, module 14, linear probe; untrained 70.0 %" in page.text
    assert page.tags.count("svg") == 14 + 2


@given(st.text())
def test_no_name_gets_out_of_its_place(text: str) -> None:
    from layerwise.render.report import _page

    hostile = results(0)
    hostile["recipe"]["name"] = hostile["command"]["set"][0] = text
    hostile["dataset"] = {"sizes": {text: 1}, "notes": [text], "sample_shape": [1]}
    harmless = results(0)
    harmless["dataset"] = {"sizes": {"a": 1}, "notes": ["a"], "sample_shape": [1]}

    assert Page(_page(hostile)).tags == Page(_page(harmless)).tags


def test_features_by_hand_are_beside_the_modules(tmp_path: Path) -> None:
    outcome = {"accuracy": 0.397, "train_accuracy": 0.5, "learning_rate": 1e-4, "samples": 9, "test_samples": 4}
    fixed = [{"module": "mfcc", "tasks": {"class": {"fixed": outcome}}}]
    text = read(write_report(results(fixed_features=fixed), tmp_path)).text
    assert f"mfcc\nclass\n39.7 ± {100 * margin(outcome):.1f}\n50.0\n9\n4\n0.0001" in text


def test_settings_are_named_as_set_names_them() -> None:
    nested = {
        "name": "one",
        "network": {"cuts": [1, 2], "groups": [{"channels": 8}, {"channels": 16}], "on": True, "no": None},
    }
    assert flatten(nested) == [
        ("name", "one"),
        ("network.cuts", "[1, 2]"),
        ("network.groups.0.channels", "8"),
        ("network.groups.1.channels", "16"),
        ("network.on", "true"),
        ("network.no", "not set"),
    ]


def test_pictures_are_the_same_bytes_for_the_same_numbers() -> None:
    first, second = pictures(results()), pictures(results())
    assert [picture.png(LIGHT) for picture in first] == [picture.png(LIGHT) for picture in second]


def test_dark_pictures_are_dark() -> None:
    for picture in pictures(results()):
        light, dark = (Image.open(io.BytesIO(picture.png(theme))).convert("L") for theme in (LIGHT, DARK))
        assert light.size == dark.size
        assert light.getpixel((0, 0)) == 255
        assert isinstance(corner := dark.getpixel((0, 0)), int)
        assert corner < 40


def test_files_of_the_user_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(UsageError, match=r"report\.html, which layerwise did not write"):
        write_report(results(), tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_report_whose_manifest_is_damaged_is_written_again(tmp_path: Path) -> None:
    write_report(results(), tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    write_report(results(), tmp_path)
    assert read_json(tmp_path / "manifest.json")["finished"]


def test_gaps_in_a_curve_are_said(tmp_path: Path) -> None:
    found = results()
    found["stages"][1] |= {"curve": [], "lost_epochs": [1, 2, 3, 4, 5]}
    text = read(write_report(found, tmp_path)).text
    assert "The curves of module 2 lack 5 of 5 epochs" in text
    assert "The curves of module 1" not in text
