"""Pictures of the paper's figures, from the numbers alone."""

from __future__ import annotations

import pytest

from layerwise.errors import UsageError
from layerwise.files.storage import write_json
from layerwise.paper.rendering import PICTURES, require_own_files
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
    assert shown.shape == (5, 5)
    assert shown.mask.sum() == 5 + 4 + 2 * 4  # the lines between, and no third and fourth patch


def test_the_papers_memory_is_named_after_its_data():
    row = {"title": "GIM", "ours": 1.0, "kind": "predicted", "paper": 7.0, "difference": -6.0, "problem": None}
    figure = PICTURES["table2"](result(rows=[row])).draw(LIGHT)
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert "the paper's (STL-10), measured" in labels


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
