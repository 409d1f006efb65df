"""Files are looked at once, and again as soon as they may be others."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from layerwise.data import folder, recordings
from layerwise.data.folder import ImageFolder
from layerwise.data.seen import Unreadable, look_through, user_cache
from layerwise.data.speech import Speech
from layerwise.progress import SILENT, Silent


class Looker:
    """Counts what it looks at."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def __call__(self, content: bytes) -> dict[str, Any]:
        if content == b"bad":
            raise Unreadable("is bad")
        self.seen.append(content)
        return {"length": len(content)}

    def through(self, files: list[Path]) -> list[Any]:
        return list(look_through(files, "tests", self, SILENT, "look", "files"))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = [tmp_path / name for name in ("a", "b", "c\udcff")]
    for number, path in enumerate(found):
        path.write_bytes(bytes([number]) * 10)
    return found


def test_what_stays_is_not_read_again(files: list[Path]) -> None:
    first = Looker().through(files)
    assert [facts["length"] for facts in first] == [10, 10, 10]
    assert len({facts["sha256"] for facts in first}) == 3
    again = Looker()
    assert again.through(files) == first
    assert again.seen == []


def other_content(path: Path) -> None:
    path.write_bytes(b"0123456789")


def other_size_same_time(path: Path) -> None:
    before = path.stat()
    path.write_bytes(b"longer than it was")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def other_content_same_size_and_time(path: Path) -> None:
    before = path.stat()
    path.write_bytes(b"9876543210")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def another_file_in_its_place(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"abcdefghij")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize(
    "change", [other_content, other_size_same_time, other_content_same_size_and_time, another_file_in_its_place]
)
def test_what_changed_is(files: list[Path], change: Callable[[Path], None]) -> None:
    first = Looker().through(files)
    change(files[1])
    again = Looker()
    found = again.through(files)
    assert again.seen == [files[1].read_bytes()]
    assert found[1]["sha256"] != first[1]["sha256"]
    assert (found[0], found[2]) == (first[0], first[2])


def test_what_cannot_be_used_is_told_every_time(files: list[Path]) -> None:
    files[0].write_bytes(b"bad")
    files[1].unlink()
    for _ in range(2):
        bad, gone, good = Looker().through(files)
        assert str(bad) == "is bad"
        assert isinstance(gone, FileNotFoundError)
        assert good["length"] == 10


def test_a_look_that_is_given_up_goes_on_where_it_was(files: list[Path]) -> None:
    looking = look_through(files[:2], "tests", Looker(), SILENT, "look", "files")
    list(islice(looking, 1))
    looking.close()
    again = Looker()
    again.through(files)
    assert files[0].read_bytes() not in again.seen
    assert files[2].read_bytes() in again.seen


def test_a_damaged_memory_is_none(files: list[Path]) -> None:
    first = Looker().through(files)
    (memory,) = (user_cache() / "seen").iterdir()
    memory.write_text(memory.read_text().replace('"length": 10', '"length": 11', 1))
    again = Looker()
    assert again.through(files) == first
    assert len(again.seen) == 3


def test_without_a_place_to_remember_it_is_said(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(files[0]))
    notes: list[str] = []

    class Listener(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    assert len(list(look_through(files, "tests", Looker(), Listener(), "look", "files"))) == 3
    assert "read all of these files again" in notes[0]


def test_recordings_and_pictures_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    for speaker in ("a", "b"):
        (tmp_path / "speech" / speaker).mkdir(parents=True)
        (tmp_path / "pictures" / speaker).mkdir(parents=True)
        for number in range(4):
            soundfile.write(tmp_path / "speech" / speaker / f"{number}.wav", draw.normal(0, 0.1, 4_000), 16_000)
            pixels = draw.integers(0, 255, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / speaker / f"{number}.png")

    def open_both() -> list[dict[str, str]]:
        both = (
            Speech(window=2_000).open(tmp_path / "speech", download=False, seed=0),
            ImageFolder(resize=None, crop=16).open(tmp_path / "pictures", download=False, seed=0),
        )
        return [{name: split.manifest() for name, split in splits.named().items()} for splits in both]

    first = open_both()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(recordings.soundfile, "SoundFile", refuse)
    monkeypatch.setattr(folder, "decode", refuse)
    assert open_both() == first
