"""`layerwise status` shows what is damaged or missing, and goes on."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from layerwise.cli import main
from layerwise.files.storage import read_json, write_json
from layerwise.pipeline.run import remember_last

RECIPE = str(Path(__file__).parents[1] / "tiny_recipe.py")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        here.setenv("XDG_STATE_HOME", str(folder / "state"))
        assert call("stage", "1", "--recipe", RECIPE, "--set", "training.epochs=1").exit_code == 0
        for words in ("cache --module 1", "stage 2", "probe --module 1", "probe --module 2"):
            assert call(*words.split()).exit_code == 0
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two modules trained, one cache, a probe of each; the recipe was named on this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    shutil.copytree(made / "state", tmp_path / "state")
    shutil.copytree(made / "runs", tmp_path / "runs")
    folder = tmp_path / "runs" / "tiny"
    remember_last(folder)
    return folder


def states(kind: str) -> list[str]:
    result = call("status", "--json")
    assert result.exit_code == 0
    assert call("status").exit_code == 0
    return [
        (module[kind] or {"state": "none"}).get("state", "measured") for module in json.loads(result.stdout)["modules"]
    ]


def test_whole(run: Path) -> None:
    assert states("stage") == ["trained", "trained", "not trained"]
    assert states("cache") == ["valid", "absent", "absent"]
    assert states("probe") == ["measured", "measured", "none"]


def test_a_damaged_record(run: Path) -> None:
    path = run / "stages" / "1" / "stage.json"
    path.write_text(path.read_text().replace('"epochs": 1', '"epochs": 2', 1))
    assert states("stage") == ["damaged", "unknown", "not trained"]
    assert states("cache") == ["unknown", "absent", "absent"]
    assert states("probe") == ["none", "none", "none"]
    told = " ".join(call("status").stdout.split())
    assert told.count("its fields differ from those that were written") == 1


def test_missing_weights(run: Path) -> None:
    (run / "stages" / "2" / "module.safetensors").unlink()
    assert states("stage") == ["trained", "damaged", "not trained"]
    assert "layerwise stage 2 --fresh" in call("status").stdout
    refused = call("stage", "2")
    assert refused.exit_code == 65
    assert "layerwise stage 2 --fresh" in refused.stderr
    assert call("stage", "2", "--fresh").exit_code == 0
    assert states("stage") == ["trained", "trained", "not trained"]


def test_a_damaged_probe_or_checkpoint(run: Path) -> None:
    (run / "probes" / "1.json").write_text("{")
    (run / "stages" / "3").mkdir()
    (run / "stages" / "3" / "checkpoint.json").write_text("[]")
    assert states("probe") == ["damaged", "measured", "none"]
    assert states("stage") == ["trained", "trained", "damaged"]


def test_a_stale_stage_names_hashes_by_their_first_digits(run: Path) -> None:
    assert call("stage", "1", "--fresh", "--set", "seed=1").exit_code == 0
    reason = json.loads(call("status", "--json").stdout)["modules"][1]["stage"]["reason"]
    assert "inputs.weights: ['" in reason
    assert max(map(len, reason.replace("'", " ").replace("…", " ").split())) < 64


def test_neither_torch_nor_the_recipe_is_needed(run: Path) -> None:
    """A recipe of the user's own may be gone, or a stranger's; and torch takes seconds to import."""
    code = "import sys; from layerwise.cli import main; main(['status'], standalone_mode=False); "
    code += "sys.exit(any(name == 'torch' or name.startswith('layerwise_recipe') for name in sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=run.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trained, 1 epoch" in done.stdout


def test_it_shows_losses_bytes_and_the_next_command_until_all_is_done(run: Path) -> None:
    told = json.loads(call("status", "--json").stdout)
    assert told["modules"][0]["stage"]["loss"] > 0
    assert told["modules"][1]["stage"]["validation_loss"] > 0
    files = [path.stat().st_size for path in run.rglob("*") if path.is_file()]
    assert told["bytes"] == sum(files)
    typed = []
    while (command := json.loads(call("status", "--json").stdout)["next"]) is not None:
        assert command not in typed
        typed.append(command)
        assert f"Next: {command}" in call("status").stdout
        assert call(*shlex.split(command)[1:]).exit_code == 0
    assert [shlex.split(command)[1] for command in typed] == ["cache", "stage", "run"]
    assert "Every module is trained and probed." in call("status").stdout


def test_settings_that_a_command_follows_are_compared_with(run: Path) -> None:
    assert call("cache", "--module", "1", "--set", "cache.dtype=float16").exit_code == 0
    assert states("cache") == ["valid", "absent", "absent"]
    assert states("stage") == ["trained", "stale", "not trained"]
    refused = call("stage", "1", "--set", "seed=3")
    assert refused.exit_code == 1
    assert states("stage") == ["trained", "stale", "not trained"]
    other = json.loads(call("status", "--json", "--set", "seed=3").stdout)["modules"]
    assert other[0]["stage"]["state"] == "stale"
    assert "seed: 0 -> 3" in other[0]["stage"]["reason"]


def told() -> Any:
    result = call("status", "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_files_of_the_user_in_the_folder_are_not_counted(run: Path) -> None:
    before = told()["bytes"]
    (run / "notes.txt").write_text("mine" * 1000)
    (run / "stages" / "1" / "link").symlink_to(run / "notes.txt")
    assert before < told()["bytes"] < before + 1000, "the link itself"


def test_a_note_of_another_recipe_is_not_believed(run: Path) -> None:
    """As after a command that was killed, or refused, before it noted its own."""
    kept = (run / "expected.json").read_bytes()
    assert call("stage", "2", "--fresh", "--set", "training.batch_size=100000").exit_code != 0
    assert states("stage") == ["trained", "trained", "not trained"], "a refused command changes nothing"
    assert call("stage", "1", "--fresh", "--set", "seed=1").exit_code == 0
    (run / "expected.json").write_bytes(kept)
    assert states("stage") == ["trained", "stale", "not trained"]


@pytest.mark.parametrize(
    "change",
    [
        {"group": [1, 3]},
        {"group": [2]},
        {"group": [1, 2, 3, 4]},
        {"stage": {"inputs": 3}},
        {"stage": {"inputs": {"weights": {}}}},
        {"cache": {"a": [[]]}},
    ],
)
def test_a_note_that_makes_no_sense_is_no_traceback(run: Path, change: dict[str, Any]) -> None:
    note = read_json(run / "expected.json") or {}
    note["modules"][0].update(change)
    write_json(run / "expected.json", note)
    told()


def test_what_damage_or_no_labels_leave_to_do(run: Path) -> None:
    while shlex.split(command := told()["next"])[1] != "run":
        assert call(*shlex.split(command)[1:]).exit_code == 0
    note = read_json(run / "expected.json") or {}
    write_json(run / "expected.json", {**note, "labelled": False})
    assert told()["next"] is None, "there is nothing to probe with"
    write_json(run / "expected.json", note)
    (run / "probes" / "1.json").write_text("{")
    assert shlex.split(told()["next"])[1] == "verify"
    assert call("verify").exit_code == 65


def test_budgets_of_any_size(run: Path) -> None:
    assert call("cache", "--module", "1", "--cache-budget", "20TB").exit_code == 0
    assert states("cache")[0] == "valid"


def test_an_edited_recipe_file_is_told_and_not_run(run: Path, tmp_path: Path) -> None:
    canary, mine = tmp_path / "canary", tmp_path / "mine here.py"
    mine.write_text(Path(RECIPE).read_text() + "recipe = recipe.model_copy(update={'name': 'mine'})\n")
    assert call("stage", "1", "--recipe", str(mine)).exit_code == 0
    assert told()["edited"] is None
    mine.write_text(mine.read_text() + f"open({str(canary)!r}, 'w')\n")
    edited = told()["edited"]
    assert f"was edited since you named it ({mine})" in edited
    assert not canary.exists()
    assert call(*shlex.split(edited.rpartition("with: layerwise ")[2])).exit_code == 0
    assert canary.exists()
    assert told()["edited"] is None
