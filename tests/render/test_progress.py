from __future__ import annotations

import io
import re

import pytest

from layerwise.render import progress
from layerwise.render.progress import console_progress

RECORD = {"epoch": 3, "loss": [1.5, 2.5], "validation_loss": [1.25, 2.75], "seconds": 61.2}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock says, to be moved by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_say_how_far_how_fast_and_how_long(clock: list[float]) -> None:
    stream = io.StringIO()
    with console_progress(stream) as told:
        told.begin("module 1", 1000, "updates")
        for _ in range(20):
            clock[0] += 1
            told.advance(1, 16, "loss 2.5")
        told.epoch([1, 2], RECORD)
        told.end()
    assert stream.getvalue().splitlines() == [
        "module 1: up to 1,000 updates",
        "module 1: 10 of 1,000 updates  loss 2.5  16 samples/s  16 min 30 s left",
        "module 1: 20 of 1,000 updates  loss 2.5  16 samples/s  16 min 20 s left",
        "epoch   3  module 1: loss 1.5000, validation 1.2500  module 2: loss 2.5000, validation 2.7500  (1 min 01 s)",
    ]


def test_what_an_earlier_sitting_did_is_not_taken_for_speed(clock: list[float]) -> None:
    stream = io.StringIO()
    with console_progress(stream) as told:
        told.begin("fetch a", 4 * 2**20, "bytes")
        told.advance(2 * 2**20, 0, "")
        clock[0] += 10
        told.advance(2**20, 0, "")
    assert stream.getvalue().splitlines() == [
        "fetch a: 4.0 MiB",
        "fetch a: 3.0 MiB of 4.0 MiB  102.4 KiB/s  10.0 s left",
    ]


def test_a_transfer_that_begins_again_has_no_speed_yet(clock: list[float]) -> None:
    stream = io.StringIO()
    with console_progress(stream) as told:
        told.begin("fetch a", 100, "bytes")
        told.advance(50, 0, "")
        clock[0] += 20
        told.advance(-50, 0, "")
    assert stream.getvalue().splitlines()[-1] == "fetch a: 0 B of 100 B"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_brackets_are_not_markup(stream: io.StringIO) -> None:
    with console_progress(stream) as told:
        told.note("/data/[bold]x[/bold]")
        told.begin("look at [/]", 2, "pictures")
        told.advance(1, 1, "[nonsense")
    assert "/data/[bold]x[/bold]" in stream.getvalue()


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with console_progress(stream) as told:
        told.begin("cache 1", 300, "samples")
        told.advance(100, 0, "")
        told.advance(50, 50, "train")
        told._bar.refresh()  # type: ignore[attr-defined]
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "cache 1" in text
    assert "150 of 300 samples" in text
    assert "train" in text
