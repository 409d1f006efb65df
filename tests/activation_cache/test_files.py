"""Files are opened only where they are regular ones; what a stranger may have put in their place is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from activation_cache.store.files import NotARegularFile, open_regular, read_regular, require_real_folders

WAYS = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_APPEND)


@pytest.mark.parametrize("flags", WAYS)
@pytest.mark.parametrize("kind", ["link", "dangling link", "loop", "folder", "pipe"])
def test_what_is_no_regular_file_is_refused_and_left_as_it_is(tmp_path: Path, kind: str, flags: int) -> None:
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("precious")
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(NotARegularFile) as found:
        os.close(open_regular(path, flags))
    assert found.value.filename == str(path)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


def test_regular_files_are_read_written_and_emptied(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with open(open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
        file.write(b"before")
    with open(open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
        file.write(b"now")
    assert read_regular(path) == b"now"
    assert read_regular(path, limit=3) == b"now"
    with pytest.raises(OSError, match="3 bytes, more than the 2"):
        read_regular(path, limit=2)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none")


def test_folders_on_the_way_may_not_be_links_but_the_root_may(tmp_path: Path) -> None:
    (tmp_path / "real/inner").mkdir(parents=True)
    (tmp_path / "root").symlink_to(tmp_path / "real")
    (tmp_path / "real/link").symlink_to(tmp_path / "real/inner")
    require_real_folders(tmp_path / "root", "inner/file")
    require_real_folders(tmp_path / "root", "absent/deeper/file")
    with pytest.raises(NotARegularFile, match="is a link"):
        require_real_folders(tmp_path / "root", "link/file")
