"""How many processors a container allows, from the files that Linux tells it by."""

from __future__ import annotations

import os

import pytest

from activation_cache.reading import processors
from activation_cache.reading.processors import allowed_processors, processor_quota


def process(tmp_path, groups, mounts):
    folder = tmp_path / "process"
    folder.mkdir()
    (folder / "cgroup").write_text("".join(f"{line}\n" for line in groups))
    (folder / "mountinfo").write_text("".join(f"{line}\n" for line in mounts))
    return folder


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content + "\n")
    return folder


def test_version_2_in_a_container_that_sees_its_own_group_as_the_root(tmp_path):
    point = group(tmp_path / "cgroup", cpu__max="150000 100000")
    found = process(tmp_path, ["0::/"], [f"30 20 0:26 / {point} rw,nosuid shared:4 - cgroup2 cgroup rw"])
    assert processor_quota(found) == 1.5


def test_version_2_takes_the_least_of_the_groups_around(tmp_path):
    point = group(tmp_path / "cgroup with space")
    group(point / "slice", cpu__max="200000 100000")
    group(point / "slice/job", cpu__max="max 100000")
    mount = f"30 20 0:26 / {str(point).replace(' ', chr(92) + '040')} rw - cgroup2 cgroup2 rw"
    assert processor_quota(process(tmp_path, ["0::/slice/job"], [mount])) == 2.0


@pytest.mark.parametrize(("quota", "expected"), [("-1", None), ("50000", 0.5), ("300000", 3.0)])
def test_version_1_as_docker_mounts_it(tmp_path, quota, expected):
    point = group(tmp_path / "cpu", cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
    groups = ["5:memory:/docker/abc", "3:cpu,cpuacct:/docker/abc", "0::/elsewhere"]
    mounts = [
        f"31 30 0:28 /docker/abc {tmp_path}/memory ro - cgroup cgroup rw,memory",
        f"32 30 0:29 /docker/abc {point} ro master:11 - cgroup cgroup rw,cpu,cpuacct",
    ]
    assert processor_quota(process(tmp_path, groups, mounts)) == expected


def test_files_that_say_something_else_are_no_limit(tmp_path):
    point = group(tmp_path / "cgroup", cpu__max="many")
    lines = ["", "nonsense", f"30 20 0:26 / {point} rw - cgroup2 cgroup2 rw", "1 2 3 4 5 6 - cgroup"]
    assert processor_quota(process(tmp_path, ["", "0::/", "x"], lines)) is None
    assert processor_quota(tmp_path / "absent") is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (0.5, 1), (2.9, 2), (64.0, 8)])
def test_no_more_than_affinity_and_quota(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(processors, "_own_quota", lambda: quota)
    assert allowed_processors() == expected
