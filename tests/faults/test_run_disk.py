"""A disk that is full, too small or broken in the middle of a run: the message says what to do, and once that is done
the run goes on, to the same bits.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from activation_cache.store.local import LocalStore
from layerwise.files.metrics import append_metrics
from layerwise.files.storage import write_file
from tests.faults.commands import Commands, Outcome
from tests.faults.conftest import scaled
from tests.faults.runs import VARIANTS, advised, asked, bits

Finished = Callable[[str], Path]
MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 64 MiB, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={64 * MIB}", "tmpfs", place], check=False).returncode:
        pytest.skip("this machine lets nobody mount a disk in memory")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def fill_up(disk: Path) -> None:
    with (disk / "ballast").open("wb") as ballast:
        size = 256 * MIB
        while size:
            try:
                os.posix_fallocate(ballast.fileno(), os.fstat(ballast.fileno()).st_size, size)
            except OSError:
                size //= 2


def told(outcome: Outcome, *codes: int) -> str:
    assert outcome.typed, outcome
    assert outcome.code in codes, outcome
    return f"exit {outcome.code}"


def finish(commands: Commands, cwd: Path, name: str, command: list[str], stopped: Outcome, tally: Counter[str]) -> None:
    """Do what the message says until the run ends."""
    for _ in range(6):
        for step in advised(stopped.output):
            tally["advice followed"] += 1
            told(commands.call(*step, "--run-dir", name, cwd=cwd), 0)
        stopped = commands.call(*command, cwd=cwd)
        if told(stopped, 0, 3, 65) == "exit 0":
            break
    assert stopped.code == 0, stopped
    looked = commands.call("verify", "--run-dir", name, cwd=cwd)
    assert looked.code == 0, looked
    assert not [path for path in (cwd / name).rglob("*") if path.name.endswith(".tmp")]


def fail_at_random(
    commands: Commands,
    finished: Finished,
    folder: Path,
    tally: Counter[str],
    variants: list[str],
    times: int,
    seed: int,
) -> None:
    """The n-th call of the system that changes a file fails."""
    rng = random.Random(seed)
    for number in range(times):
        variant, name = rng.choice(variants), f"run{number}"
        code, count = rng.choice(["ENOSPC", "EIO", "EDQUOT"]), int(10 ** rng.uniform(0, 2.6))
        before = f"""
import errno, itertools, os
calls = itertools.count(1)
def failing(real):
    def call(*arguments, **options):
        if next(calls) == {count}:
            names = [name for name in arguments[:1] if not isinstance(name, int)]  # of a descriptor there is none
            raise OSError(errno.{code}, os.strerror(errno.{code}), *names)
        return real(*arguments, **options)
    return call
for name in ("fsync", "replace", "link", "writev", "mkdir"):
    setattr(os, name, failing(getattr(os, name)))
"""
        command = asked(name, **VARIANTS[variant])
        stopped = commands.call(*command, cwd=folder, before=before)
        tally[f"{code}: {told(stopped, 0, 1, 3)}"] += 1
        if stopped.code:
            finish(commands, folder, name, command, stopped, tally)
        assert bits(folder / name) == bits(finished(variant)), f"seed {seed}, run {number}: {code} at call {count}"


def limit_at_random(
    commands: Commands,
    finished: Finished,
    folder: Path,
    tally: Counter[str],
    variants: list[str],
    times: int,
    seed: int,
) -> None:
    """No file may be larger than so many bytes: as on a full disk, writing stops in the middle of a file."""
    rng = random.Random(seed)
    for number in range(times):
        variant, name, limit = rng.choice(variants), f"limited{number}", int(10 ** rng.uniform(4, 5.8))
        command = asked(name, **VARIANTS[variant])
        stopped = commands.call(*command, cwd=folder, limits={"RLIMIT_FSIZE": limit})
        tally[told(stopped, 0, 3)] += 1
        if stopped.code:
            finish(commands, folder, name, command, stopped, tally)
        assert bits(folder / name) == bits(finished(variant)), f"seed {seed}, run {number}: {limit:,} bytes"


def test_a_disk_that_cannot_write_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    ways: dict[str, Callable[[Path], object]] = {
        "a": lambda path: write_file(path, b"a"),
        "b": lambda path: append_metrics(path, {"epoch": 1}),
        "c": lambda path: LocalStore(path.parent).write(path.name, [b"c"]),
    }
    for name, write in ways.items():
        with pytest.raises(OSError, match="Input/output error") as caught:
            write(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name)


def test_a_disk_that_fails(commands: Commands, finished: Finished, tmp_path: Path, tally: Counter[str]) -> None:
    limit_at_random(commands, finished, tmp_path, tally, ["uint8"], 1, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("part", range(2))
def test_disks_that_fail_60_times(
    commands: Commands, finished: Finished, tmp_path: Path, tally: Counter[str], part: int
) -> None:
    fail_at_random(commands, finished, tmp_path, tally, list(VARIANTS), scaled(20), seed=1 + part)
    limit_at_random(commands, finished, tmp_path, tally, list(VARIANTS), scaled(10), seed=1 + part)


@pytest.mark.long
@pytest.mark.parametrize("part", range(2))
def test_disks_of_40_sizes_enlarged_afterwards(commands: Commands, disk: Path, tally: Counter[str], part: int) -> None:
    rng = random.Random(part)
    for number in range(scaled(20)):
        variant, name, size = rng.choice(list(VARIANTS)), f"run{number}", int(2 ** rng.uniform(15, 22.5))
        used = sum(path.lstat().st_blocks * 512 for path in disk.rglob("*"))
        resize(disk, used + size)
        command = asked(name, **VARIANTS[variant])
        stopped = commands.call(*command, cwd=disk)
        tally[told(stopped, 0, 3)] += 1
        resize(disk, 256 * MIB)
        if stopped.code:
            finish(commands, disk, name, command, stopped, tally)


@pytest.mark.long
@pytest.mark.parametrize("part", range(2))
def test_a_disk_that_others_fill_100_times(
    commands: Commands, finished: Finished, disk: Path, tally: Counter[str], part: int
) -> None:
    """Another process takes all the room at a random moment, and gives it back when the run has ended."""
    rng, filled, runs = random.Random(part), 0, 0
    resize(disk, 256 * MIB)
    while filled < scaled(50):
        variant, name = rng.choice(list(VARIANTS)), f"run{runs}"
        command = asked(name, **VARIANTS[variant])
        rolled = False
        while True:
            running = commands.start(command, cwd=disk)
            if full := filled < scaled(50) and not running.wait(rng.uniform(0, 1)):
                fill_up(disk)
                filled += 1
            [outcome] = running.outcomes()
            rolled = rolled or (variant != "rolling" and bool(list((disk / name).glob("caches/*.window.json"))))
            (disk / "ballast").unlink(missing_ok=True)
            tally[told(outcome, 0, 3) + (" on a full disk" if full else "")] += 1
            if outcome.code == 0:
                break
            assert full, outcome
        if rolled:  # there was no room for all when the cache was begun, and a window was settled
            tally["runs ended with a window"] += 1
        else:
            assert bits(disk / name) == bits(finished(variant)), f"part {part}, {name}"
            tally["runs ended in the same bits"] += 1
        assert commands.call("verify", "--run-dir", name, cwd=disk).code == 0
        runs += 1
