from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.cli import main
from layerwise.render.words import COMMANDS, terminal_width, wrapped
from layerwise.settings.units import counted

ADVICE = (
    "module 1 is not trained yet, so there is nothing that its cache could be written from. Run: "
    "layerwise stage 1 --run-dir 'runs/my digits' --set training.epochs=3. Or leave it to layerwise run."
)


def test_the_commands_are_those_of_the_command_line() -> None:
    assert set(COMMANDS) == set(main.commands)


def test_lines_end_between_words_and_a_command_has_a_line_of_its_own() -> None:
    assert wrapped(ADVICE, 60).splitlines() == [
        "module 1 is not trained yet, so there is nothing that its",
        "cache could be written from. Run:",
        "  layerwise stage 1 --run-dir 'runs/my digits' --set training.epochs=3",
        "Or leave it to layerwise run.",
    ]


def test_a_command_that_fits_stays_in_its_line() -> None:
    assert wrapped("x" * 30 + " " + "y" * 30 + " run: layerwise stage 1.", 60).splitlines() == [
        "x" * 30,
        "y" * 30 + " run: layerwise stage 1.",
    ]


def test_an_option_and_its_value_stay_together() -> None:
    text = "train the modules one after another with --schedule iterative, or without noise"
    for width in range(20, 80):
        assert "--schedule iterative" in wrapped(text, width)


def test_columns_that_are_taken_count() -> None:
    assert wrapped("one two three four five", 20, begun=11).splitlines() == ["one two", "three four five"]


def test_short_lines_and_text_without_a_width_stay_as_they_are() -> None:
    assert wrapped(ADVICE, None) == ADVICE
    assert wrapped("a  b\n\n    c", 60) == "a  b\n\n    c"


@given(st.lists(st.from_regex(r"\A[a-z0-9=./-]{1,30}\Z"), min_size=1), st.integers(20, 90))
def test_no_word_is_lost_and_no_line_is_too_long(words: list[str], width: int) -> None:
    lines = wrapped(" ".join(words), width).splitlines()
    assert " ".join(lines).split() == words
    if not any(word.startswith("--") for word in words):
        assert all(len(line) <= width or " " not in line for line in lines)


def test_a_pipe_has_no_width_unless_columns_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal_width(io.StringIO()) is None
    monkeypatch.setenv("COLUMNS", "70")
    assert terminal_width(io.StringIO()) == 70


def test_counts_agree_with_their_noun() -> None:
    assert [counted(n, "epoch") for n in (0, 1, 2, 1200)] == ["0 epochs", "1 epoch", "2 epochs", "1,200 epochs"]
