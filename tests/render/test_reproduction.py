"""Pictures of the paper's figures, from the numbers alone."""

from __future__ import annotations

import pytest

from layerwise.errors import UsageError
from layerwise.files.storage import write_json
from layerwise.paper.rendering import FINE, PICTURES, require_own_files
from layerwise.render.plots import LIGHT


def result(**fields):
    return {"title": "A title", "recipe": "tiny", "scale": 1.0, "seeds": [0], "paper_dataset": "STL-10", **fields}


def test_the_curve_of_one_epoch_is_seen():
    line = [{"epoch": 1, "step": 7, "loss": 2.0, "validation_loss": 2.5}]
    module = {"module": 1, "simultaneous": [line], "iterative": [line]}
    figure = PICTURES["figure3"](result(modules=[module])).draw(LIGHT)
    (axes,) = figure.axes
    assert [drawn.get_marker() for drawn in axes.lines] == ["o"] * 4
    figure.canvas.draw()
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_two_patches_leave_room_for_two():
    patches = [{"pixels": [[0.0, 1.0], [1.0, 0.0]]}] * 2
    module = {"module": 1, "neurons": [{"neuron": 3, "patches": patches}]}
    picture = PICTURES["figure2"](result(modules=[module]))
    assert "the 2 patches (2x2 pixels" in picture.words
    (image,) = picture.draw(LIGHT).axes[0].images
    shown = image.get_array()
    side = 2 * FINE
    line = FINE // 4
    assert shown.shape == (2 * side + line, 2 * side + line)
    nothing = side * line + line * (2 * side + line) + side * (2 * side + line)
    assert shown.mask.sum() == nothing, "the lines between, and no third and fourth patch"
    assert shown[FINE - 1, FINE - 1] == 0
    assert shown[FINE - 1, FINE] == 1


def test_the_papers_memory_is_named_after_its_data():
    row = {"title": "GIM", "ours": 1.0, "kind": "predicted", "paper": 7.0, "difference": -6.0, "problem": None}
    figure = PICTURES["table2"](result(rows=[row])).draw(LIGHT)
    ours, theirs = figure.axes
    assert ours.get_title() == "ours: in tensors, predicted"
    assert theirs.get_title() == "the paper's (STL-10): whole GPU, 2019"
    assert [[bar.get_width() for bar in axes.patches] for axes in figure.axes] == [[1.0], [7.0]]


def test_figures_on_other_data_have_an_axis_of_their_own():
    cell = {"mean": 92.9, "deviation": None, "paper": 81.9, "paper_deviation": 0.3}
    rows = [{"title": "GIM", "cells": {"class": cell}}]
    same = PICTURES["table1"](result(rows=rows)).draw(LIGHT)
    assert len(same.axes) == 1
    assert same.axes[0].lines[-1].get_xdata() == [81.9]
    other = PICTURES["table1"](result(rows=rows, paper_recipe="stl10")).draw(LIGHT)
    assert [axes.get_title() for axes in other.axes] == ["ours", "the paper's"]
    assert [axes.patches[0].get_width() for axes in other.axes] == [92.9, 81.9]
    lines = [
        {"method": name, "points": [{"module": 1, "mean": 20.0, "deviation": None}], "paper_last": 0.6}
        for name in ("gim", "cpc", "supervised")
    ]
    picture = PICTURES["figure4"](result(methods=lines, task="speaker", paper_recipe="librispeech"))
    (axes,) = picture.draw(LIGHT).axes
    assert axes.get_ylim()[0] > 1, "our errors fill the axis"
    assert "GIM 0.6 %" in axes.get_legend().get_title().get_text()


def test_numbers_stand_beside_bars_marks_and_deviations():
    cell = {"mean": 5.0, "deviation": 30.0, "paper": 99.4, "paper_deviation": None}
    figure = PICTURES["table3"](result(rows=[{"title": "GIM", "cells": {"phone": cell, "speaker": cell}}])).draw(LIGHT)
    figure.canvas.draw()
    for axes in figure.axes:
        (number,) = axes.texts
        assert number.get_text() == "5.0 ± 30.0"
        extent = number.get_window_extent()
        assert extent.x0 > max(axes.get_window_extent().x1, axes.lines[-1].get_window_extent().x1)
        assert extent.x1 < figure.bbox.x1


def test_no_error_at_all_is_said_where_it_is_drawn():
    def labels(mean: float) -> str:
        points = [{"module": 1, "mean": mean, "deviation": None}]
        lines = [{"method": name, "points": points, "paper_last": 0.6} for name in ("gim", "cpc", "supervised")]
        return PICTURES["figure4"](result(methods=lines, task="speaker")).draw(LIGHT).axes[0].get_ylabel()

    assert labels(0.0).endswith("log scale; 0 at 0.02")
    assert labels(1.0).endswith("log scale")


def test_files_of_the_user_are_not_written_over(tmp_path):
    for name in ("table1.md", "table1.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UsageError, match=name):
            require_own_files("table1", tmp_path)
    write_json(tmp_path / "table1.json", {"title": "ours"})
    assert require_own_files("table1", tmp_path)[1].read_text() == "mine"
    assert require_own_files("table2", tmp_path)
