"""Nothing silent: whatever becomes of any file of a run, `layerwise verify` exits 65 and names the file."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from layerwise.errors import NotReady, StoppedEarly
from layerwise.files.storage import read_json, write_json
from layerwise.pipeline.schedule import run_stage
from layerwise.pipeline.setup import Setup
from layerwise.pipeline.verification import verify_run
from layerwise.recipe.loader import apply_overrides
from tests.conftest import TINY
from tests.faults.small_run import call, copy_of_a_run, files

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return copy_of_a_run(tmp_path / "run")


@pytest.fixture
def bare(run: Path) -> Path:
    """The same without its caches, which take most of the time to verify."""
    shutil.rmtree(run / "caches")
    return run


def named(run: Path, path: str) -> bool:
    """Whether `verify` names exactly this file."""
    found = verify_run(run)
    return str(run / path) in found.damaged


def test_a_whole_run_is_intact_and_every_file_of_it_is_looked_at(run: Path) -> None:
    found = verify_run(run)
    assert (found.damaged, found.unexpected, found.unfinished, found.mends) == ({}, [], {}, [])
    assert found.files == len(files(run))
    assert {str(path.relative_to(run)) for path in run.rglob("*.safetensors")} <= set(files(run))


def flip(run: Path, path: str, at: int, bit: int) -> None:
    data = bytearray((run / path).read_bytes())
    data[at] ^= 1 << bit
    (run / path).write_bytes(data)


def flip_each(run: Path, paths: list[str], times: int) -> None:
    rng = np.random.default_rng(0)
    for path in paths:
        data = (run / path).read_bytes()
        for _ in range(times):
            at, bit = int(rng.integers(len(data))), int(rng.integers(8))
            flip(run, path, at, bit)
            assert named(run, path), f"bit {bit} of byte {at} of {path}"
            (run / path).write_bytes(data)
    assert verify_run(run).damaged == {}


def test_every_flip_in_a_run_is_found(bare: Path) -> None:
    flip_each(bare, files(bare), 8)


def test_every_flip_in_its_caches_is_found(run: Path) -> None:
    flip_each(run, [path for path in files(run) if path.startswith("caches/")][::20], 1)


@pytest.mark.long
def test_every_flip_is_found(run: Path) -> None:
    flip_each(run, files(run), 40)


@pytest.mark.parametrize("path", ["run.json", "stages/1/metrics.jsonl", "report/manifest.json"])
def test_every_byte_of_the_small_files_counts(bare: Path, path: str) -> None:
    """White space and the case of an escape change nothing that a reader of JSON sees."""
    data = (bare / path).read_bytes()
    for at in range(0, len(data), 3):
        flip(bare, path, at, at % 8)
        assert named(bare, path), f"bit {at % 8} of byte {at} of {path}"
        (bare / path).write_bytes(data)


def test_every_file_removed_emptied_shortened_or_lengthened(bare: Path) -> None:
    damage_each(bare, files(bare))


def test_every_file_of_its_caches_removed_emptied_shortened_or_lengthened(run: Path) -> None:
    inside = ("record/commit.json", "record/plan.json", "zarr.json", "train/values/0/c/0/0/0/0/0")
    found = [f"caches/1/{path}" for path in inside]
    damage_each(run, [path for path in found if (run / path).exists()])


def damage_each(run: Path, paths: list[str]) -> None:
    for path in paths:
        data = (run / path).read_bytes()
        for changed in (None, b"", data[:-1], data + b"\0", data + data):
            (run / path).unlink()
            if changed is not None:
                (run / path).write_bytes(changed)
            if changed is None and path.endswith("record/commit.json"):  # as of a cache that is still being written
                assert str((run / path).parents[1]) in verify_run(run).unfinished
            else:
                assert named(run, path), f"{path} with {changed and len(changed)} bytes"
            (run / path).write_bytes(data)


def test_a_folder_a_pipe_or_a_link_in_the_place_of_a_file(bare: Path) -> None:
    run = bare
    for path in files(run):
        (run / path).rename(run / "kept")
        for make in (os.mkdir, os.mkfifo, lambda at: os.symlink(run / "kept", at), lambda at: os.symlink(at, at)):
            make(run / path)
            assert named(run, path), path
            (os.rmdir if (run / path).is_dir() and not (run / path).is_symlink() else os.unlink)(run / path)
        (run / "kept").rename(run / path)


@pytest.mark.parametrize("folder", ["stages", "stages/2", "caches", "caches/1", "probes", "report"])
def test_a_link_in_the_place_of_a_folder(run: Path, folder: str, tmp_path: Path) -> None:
    (run / folder).rename(tmp_path / "elsewhere")
    (run / folder).symlink_to(tmp_path / "elsewhere")
    found = verify_run(run)
    assert "is a link" in found.damaged[str(run / folder.partition("/")[0])]


def test_files_in_each_others_places(run: Path) -> None:
    for one, other in (("probes/1.json", "probes/2.json"), ("stages/1/stage.json", "stages/2/stage.json")):
        pair = [(run / path).read_bytes() for path in (one, other)]
        (run / one).write_bytes(pair[1])
        (run / other).write_bytes(pair[0])
        assert named(run, one)
        assert named(run, other)
        (run / one).write_bytes(pair[0])
        (run / other).write_bytes(pair[1])


def test_a_stage_or_a_probe_that_is_gone_as_a_whole(run: Path) -> None:
    shutil.rmtree(run / "stages/1")
    (run / "probes/2.json").unlink()
    found = verify_run(run).damaged
    assert found[str(run / "stages/1/stage.json")] == "is missing, and module 3 was trained on it or with it"
    assert found[str(run / "probes/2.json")] == "is missing, and the report shows it"


def test_files_of_others_are_listed_and_are_no_damage(run: Path) -> None:
    for path in ("notes.txt", "mine/deep/a", "stages/1/notes", "stages/x/y", "probes/a.txt", "report/b", "caches/1/c"):
        (run / path).parent.mkdir(parents=True, exist_ok=True)
        (run / path).write_text("mine")
    found = verify_run(run)
    assert found.damaged == {}
    expected = {"notes.txt", "mine", "stages/1/notes", "stages/x/y", "probes/a.txt", "report/b", "caches/1/c"}
    assert set(found.unexpected) == {str(run / path) for path in expected}


def test_a_checkpoint_and_its_tensors(make_setup: Callable[..., Setup]) -> None:
    setup = make_setup(apply_overrides(TINY, ["schedule=simultaneous"]))
    asked: list[bool] = []
    setup.should_stop = lambda: bool(list(setup.run.folder.glob("stages/1-3/metrics.jsonl"))) and not asked.append(True)
    setup.run.follow("digits", [], None, TINY)
    with pytest.raises(StoppedEarly):
        run_stage(setup, 1)
    run = setup.run.folder
    assert verify_run(run).damaged == {}
    assert list(verify_run(run).unfinished) == [str(run / "stages/1-3")]
    for path in files(run):
        size = (run / path).stat().st_size
        for at in (0, size // 2, size - 1):
            data = (run / path).read_bytes()
            flip(run, path, at, 0)
            assert named(run, path), f"byte {at} of {path}"
            (run / path).write_bytes(data)


def test_a_training_from_the_beginning_is_under_way(bare: Path) -> None:
    """Its stages are gone and the report still shows them."""
    made_from = {"module": 3}
    checkpoint = {"file": "checkpoint-1-0.safetensors", "sha256": sha256(b"tensors").hexdigest()}
    place = {"epoch": 0, "batch": 1, "step": 1, "sums": [], "best_loss": None, "best_epoch": 0, "seconds": 1.0}
    for number in (1, 2, 3):
        shutil.rmtree(bare / f"stages/{number}")
    (bare / "stages/1-3").mkdir()
    (bare / "stages/1-3" / checkpoint["file"]).write_bytes(b"tensors")
    files = {"latest": checkpoint, "best": checkpoint}
    write_json(bare / "stages/1-3/checkpoint.json", {"made_from": made_from, "place": place, "files": files})
    found = verify_run(bare)
    assert (found.damaged, list(found.unfinished)) == ({}, [str(bare / "stages/1-3")])


def test_a_report_that_was_killed_half_way_is_unfinished(run: Path) -> None:
    manifest = read_json(run / "report/manifest.json")
    assert manifest is not None
    write_json(run / "report/manifest.json", {**manifest, "finished": False})
    (run / "report/report.html").unlink()
    found = verify_run(run)
    assert found.damaged == {}
    assert list(found.unfinished) == [str(run / "report")]


def test_each_damage_can_be_mended_as_it_says(run: Path, tmp_path: Path) -> None:
    spaced = tmp_path / "a run"
    run.rename(spaced)
    for path in (
        "probes/1.json",
        "report/report.html",
        "stages/3/stage.json",
        "stages/3/metrics.jsonl",
        "dataset.json",
    ):
        flip(spaced, path, 30, 1)
        refused = call("verify", "--run-dir", str(spaced))
        assert refused.exit_code == 65
        commands = refused.stderr.partition("Repair them with: ")[2].strip()
        for command in commands.split("; "):
            words = shlex.split(command)
            if words[0] == "rm":
                Path(words[1]).unlink()
            else:
                assert call(*words[1:]).exit_code == 0, command
        assert call("verify", "--run-dir", str(spaced)).exit_code == 0, path


def test_a_folder_in_the_place_of_a_file_is_moved_away_as_verify_says(run: Path) -> None:
    paths = ["dataset.json", "probes/1.json", "stages/3/module.safetensors", "stages/3/metrics.jsonl", "place.json"]
    for path in map(run.joinpath, paths):
        path.unlink(missing_ok=True)
        path.mkdir()
        (path / "note.txt").write_text("the user's")
    for command in call("verify", "--run-dir", str(run)).stderr.partition("Repair them with: ")[2].split("; "):
        words = shlex.split(command)
        if words[0] == "layerwise":
            assert call(*words[1:]).exit_code == 0, command
        else:
            subprocess.run(words, check=True)
    assert call("verify", "--run-dir", str(run)).exit_code == 0
    assert all((run / f"{path}.mine" / "note.txt").exists() for path in paths)


def test_the_command_for_people_and_for_machines(run: Path) -> None:
    assert "files" in call("verify", "--run-dir", str(run)).stdout
    flip(run, "stages/2/module.safetensors", 1000, 3)
    told = call("verify", "--run-dir", str(run), "--json")
    document = json.loads(told.stdout)
    assert (told.exit_code, document["exit_code"], document["error"]) == (65, 65, "DamagedData")
    assert document["damaged"] == {str(run / "stages/2/module.safetensors"): "was altered"}
    people = call("verify", "--run-dir", str(run))
    assert people.exit_code == 65
    assert re.search(r"module\.safetensors +was altered", people.stdout)


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match="is not a run"):
        verify_run(tmp_path)


def test_neither_torch_nor_the_code_of_a_recipe_is_needed(run: Path, tmp_path: Path) -> None:
    known = read_json(run / "run.json")
    assert known is not None
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    write_json(run / "run.json", {**known, "recipe": str(tmp_path / "evil.py")})
    program = (
        "import sys\nfrom layerwise.cli import main\n"
        f"try: main(['verify', '--run-dir', {str(run)!r}])\nexcept SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "cache")])
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths}, check=True, cwd=tmp_path)
    assert not (tmp_path / "canary").exists()
