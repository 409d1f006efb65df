"""The byte layer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from activation_cache import Locked
from activation_cache.store.base import LocalStore
from activation_cache.testing import check_store


def test_a_directory_conforms(tmp_path: Path) -> None:
    check_store(lambda: LocalStore(tmp_path / "deep" / "below"))


def test_a_file_is_synced_before_its_name_and_its_name_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def fsync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def replace(old: Path, new: Path) -> None:
        events.append("named")
        os.rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    LocalStore(tmp_path / "cache").write("a/b", [b"content"])
    assert re.fullmatch(r"\.activation_cache-\d+-\d+\.tmp", Path(events[0]).name)
    assert Path(events[0]).parent == tmp_path / "cache/a"
    assert events[1] == "named"
    assert set(events[2:]) == {str(tmp_path / "cache/a"), str(tmp_path / "cache"), str(tmp_path)}


def test_a_lock_dies_with_its_process_and_names_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from activation_cache.store.base import LocalStore; "
        f"held = LocalStore({str(tmp_path)!r}).lock(0, 1); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(Locked, match=str(holder.pid)):
            LocalStore(tmp_path).lock(0, 1)
        holder.kill()
        holder.wait()
        LocalStore(tmp_path).lock(0, 1)()


def test_a_forked_child_does_not_keep_a_lock(tmp_path: Path) -> None:
    release = LocalStore(tmp_path).lock(0, 1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    release()
    LocalStore(tmp_path).lock(0, 1)()
    os.close(write)
    os.waitpid(child, 0)
    os.close(read)


def test_a_file_that_goes_while_others_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    for name in ("kept", "going", "kept too"):
        store.write(name, [b"1"])
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    look = os.scandir

    def going(root: Path) -> Iterator[os.DirEntry[str]]:
        for found in look(root):
            (tmp_path / "going").unlink(missing_ok=True)
            yield found

    monkeypatch.setattr(os, "scandir", going)
    assert dict(store.list()) == {"kept": 1, "kept too": 1, "dangling": 0}
