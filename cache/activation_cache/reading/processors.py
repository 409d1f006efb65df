"""How many processors this process may keep busy: fewer than the machine has, in a container or under taskset."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path


def allowed_processors() -> int:
    """Processors that this process may use, at least 1: its affinity, and the whole processors of its quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _own_quota()
    return affinity if quota is None else max(1, min(affinity, int(quota)))


@cache
def _own_quota() -> float | None:
    return processor_quota(Path("/proc/self"))


def processor_quota(process: Path) -> float | None:
    """Processors that the cgroups of a process allow it on average, as 1.5; None where there is no limit.

    Args:
        process: the folder of the process below /proc, with its files `cgroup` and `mountinfo`.
    """
    try:
        groups = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
        mounts = (process / "mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    found: list[float] = []
    for mount in mounts:
        # ID PARENT DEVICE ROOT POINT OPTIONS [TAG …] - TYPE SOURCE OPTIONS
        before, _, after = mount.partition(" - ")
        if not (fields := before.split())[4:] or not (kind := after.split())[2:]:
            continue
        version = {"cgroup2": 2, "cgroup": 1}.get(kind[0])
        if version is None or (version == 1 and "cpu" not in kind[2].split(",")):
            continue
        for _, controllers, path in (group for group in groups if len(group) == 3):
            if "cpu" in controllers.split(",") if version == 1 else controllers == "":
                root, point = _unescaped(fields[3]), Path(_unescaped(fields[4]))
                found += _quotas(point, os.path.relpath(path, root), version)
    return min(found, default=None)


def _quotas(point: Path, below: str, version: int) -> Iterator[float]:
    """The quotas of the group `below` a mount point, and of those around it, each of which holds for it too."""
    parts = [] if below == "." or below.startswith("..") else below.split("/")  # "..": a container sees its own alone
    for depth in range(len(parts), -1, -1):
        folder = point.joinpath(*parts[:depth])
        try:
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):  # the group at the root has no such file
            continue


def _unescaped(field: str) -> str:
    """A path as mountinfo writes it: space, tab, newline and backslash as octal numbers."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field
