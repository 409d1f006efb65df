"""A disk or a budget that is too small: every state that it leaves has a command that leads out, and the message names
it.
"""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

import activation_cache
from layerwise.errors import NotReady, WillNotFit
from layerwise.files.storage import write_json
from layerwise.pipeline.caching import write_cache
from layerwise.pipeline.inputs import stage_inputs
from layerwise.pipeline.rolling import read_rolling, rolls, window_note
from layerwise.pipeline.room import unsettled
from layerwise.pipeline.schedule import run_stage, train_all
from layerwise.recipe.loader import apply_overrides
from tests.conftest import TINY
from tests.suggested import commands, message_of, typed

RECIPE = str(Path(__file__).parent.parent / "tiny_recipe.py")
SHORT = ["--set=training.epochs=1", "--set=training.batch_size=32", "--set=cache.window_epochs=1", "--device=cpu"]
Disk = namedtuple("Disk", "total used free")
LARGE = 10**9


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run whose first module is trained."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert typed(["stage", "1", "--recipe", RECIPE, "--run-dir", str(folder), *SHORT]).exit_code == 0
    return folder


@pytest.fixture
def disk(monkeypatch):
    """A disk of `disk["size"]` bytes for the run at `disk["run"]`."""
    state: dict = {"size": LARGE, "run": None}

    def usage(_):
        free = max(state["size"] - bytes_in(state["run"]), 0)
        return Disk(state["size"], state["size"] - free, free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return state


def begin(trained: Path, folder: Path) -> Path:
    return Path(shutil.copytree(trained, folder))


def leads_out(folder: Path, message: str) -> None:
    """The first command of the message, and then stage 2, end well."""
    advised = commands(message)
    assert advised, f"no command in: {message}"
    done = typed(advised[0])
    assert done.exit_code == 0, f"{message}\n{advised[0]}\n{done.output}"
    done = typed(["stage", "2", "--run-dir", str(folder)])
    assert done.exit_code == 0, f"{message}\n{done.output}"


def sizes_between(least: int, most: int, count: int) -> list[int]:
    return [round(least * (most / least) ** (step / (count - 1))) for step in range(count)]


def on_a_small_disk(trained: Path, folder: Path, disk: dict, bytes_: int) -> None:
    """Cache and stage on a disk with so many bytes for the caches; where that is too small, as the message says on one
    that is enlarged.
    """
    disk["run"] = begin(trained, folder)
    disk["size"] = bytes_in(folder) + bytes_
    for command in (["cache", "--module", "1"], ["stage", "2"]):
        code, message = message_of([*command, "--run-dir", str(folder)])
        if code:
            assert code == 3, f"{bytes_} bytes: {command} ended with {code}: {message}"
            disk["size"] = LARGE
            leads_out(folder, message)
            return


@pytest.mark.parametrize("bytes_", [20_000, 3_600_000, 4_400_000])
def test_small_disks(trained, tmp_path, disk, bytes_) -> None:
    on_a_small_disk(trained, tmp_path / "run", disk, bytes_)


@pytest.mark.long
@pytest.mark.parametrize("bytes_", sizes_between(2_000, 12_000_000, 60))
def test_small_disks_of_many_sizes(trained, tmp_path, disk, bytes_) -> None:
    on_a_small_disk(trained, tmp_path / "run", disk, bytes_)


def test_a_budget_below_a_window_of_one_batch_is_refused_with_the_bytes_that_do(trained, tmp_path) -> None:
    folder = begin(trained, tmp_path / "it's a run")
    code, message = message_of(["cache", "--module", "1", "--run-dir", str(folder), "--cache-budget", "20kB"])
    assert code == 3
    enough = int(re.search(r"or ([\d,]+) bytes for a window of 32 training samples", message)[1].replace(",", ""))
    assert f"--set=cache.budget={enough}" in message
    code, again = message_of(["cache", "--module", "1", "--run-dir", str(folder), f"--cache-budget={enough - 2}"])
    assert code == 3
    assert f"The budget is {enough - 2:,} bytes" in again
    leads_out(folder, message)


def test_without_caches_it_goes_on_where_none_fits(trained, tmp_path, disk) -> None:
    disk["run"] = begin(trained, tmp_path / "run")
    disk["size"] = bytes_in(disk["run"]) + 20_000
    code, message = message_of(["cache", "--module", "1", "--run-dir", str(disk["run"])])
    disk["size"] += 10**7  # no room for caches, and some for weights
    assert code == 3
    assert re.search(r"Free [\d,]+ more on the disk of .*caches/1, then run: layerwise cache --module 1 ", message)
    assert commands(message)[1][0] == "run"
    assert "--set=feed=recompute" in commands(message)[1]


def test_a_window_smaller_than_a_batch_is_settled_again(make_setup) -> None:
    """As earlier versions left it, or after `training.batch_size` was raised."""
    setup = make_setup(TINY.model_copy(update={"training": TINY.training.model_copy(update={"epochs": 1})}))
    run_stage(setup, 1)
    write_json(window_note(setup, 1), {"budget": None, "renew": False, "slots": 4, "slot_samples": 3})
    with pytest.raises(NotReady, match="Write it with"):
        stage_inputs(setup, 2)
    assert unsettled(setup, 1)
    write_cache(setup, 1)
    assert not rolls(setup, 1)
    run_stage(setup, 2)


@pytest.fixture
def small(make_setup, disk):
    """A run with a window on module 1's outputs, on a disk that was small and is large now."""
    setup = make_setup(TINY.model_copy(update={"training": TINY.training.model_copy(update={"epochs": 1})}))
    disk["run"] = setup.run.folder
    run_stage(setup, 1)
    disk["size"] = bytes_in(setup.run.folder) + 4_400_000
    write_cache(setup, 1)
    assert rolls(setup, 1)
    return setup


def test_a_window_is_settled_again_until_a_stage_has_trained_on_it(small, disk) -> None:
    before = read_rolling(small, 1)
    write_cache(small, 1)
    assert read_rolling(small, 1) == before, "on the same disk it stays"
    disk["size"] = LARGE
    assert unsettled(small, 1)
    for _ in train_all(small):
        pass
    assert not rolls(small, 1)
    assert not small.run.window(1).exists()


def test_a_window_that_a_stage_has_trained_on_stays(small, disk) -> None:
    run_stage(small, 2)
    before = read_rolling(small, 1)
    disk["size"] = LARGE
    assert not unsettled(small, 1)
    activation_cache.remove(small.run.cache(1))
    for _ in train_all(small):
        pass
    assert read_rolling(small, 1) == before
    for _ in train_all(small, fresh=True):
        pass
    assert not rolls(small, 1), "everything is trained again, and there is room for all"


def test_a_trained_window_that_no_longer_fits_is_refused_with_its_bytes(small, disk) -> None:
    disk["size"] += 500_000  # for the weights
    run_stage(small, 2)
    activation_cache.remove(small.run.cache(1))
    activation_cache.remove_window(small.run.window(1))
    disk["size"] = bytes_in(small.run.folder) + 3_900_000
    with pytest.raises(WillNotFit, match=r"bytes for a window of .* the fewest for this stage.*Free"):
        write_cache(small, 1, "kept")
    write_cache(small, 1)
    assert rolls(small, 1)


def test_a_whole_cache_is_not_used_under_a_smaller_budget(make_setup) -> None:
    roomy = make_setup(TINY.model_copy(update={"training": TINY.training.model_copy(update={"epochs": 1})}))
    run_stage(roomy, 1)
    write_cache(roomy, 1)
    whole = activation_cache.inspect(roomy.run.cache(1)).bytes
    tight = make_setup(apply_overrides(roomy.recipe, ["cache.budget=4200000"]))
    assert whole > 4_200_000
    with pytest.raises(WillNotFit, match=f"takes {whole:,} bytes, more than the budget of 4,200,000. .*--module 1"):
        stage_inputs(tight, 2)
    run_stage(roomy, 2)
    with pytest.raises(WillNotFit, match=r"stage 2 has trained on all training samples.*--fresh"):
        next(train_all(tight))
    assert activation_cache.inspect(roomy.run.cache(1)).bytes == whole, "nothing was lost"
    write_cache(tight, 1)
    assert rolls(tight, 1)
    run_stage(tight, 2, fresh=True)
    assert bytes_in(tight.run.caches) <= 4_200_000


@pytest.mark.parametrize("renew", ["false", "true"])
def test_a_budget_is_kept_while_writing_and_the_message_leads_to_one_that_is_enough(
    trained, tmp_path, monkeypatch, renew
) -> None:
    """Where samples compress less than those that were measured."""
    folder = begin(trained, tmp_path / "run")
    monkeypatch.setattr(activation_cache, "measured_ratio", lambda *_: 0.5)
    budget, first = 3_000_000, ["cache", "--module", "1"]
    advised = [*first, "--run-dir", str(folder), "--set=cache.codec=none", f"--set=cache.budget={budget}"]
    advised.append(f"--set=cache.renew={renew}")
    for _ in range(12):
        code, message = message_of(advised)
        if not code:
            code, message = message_of(["stage", "2", "--run-dir", str(folder)])
        assert bytes_in(folder / "caches") <= budget
        if not code:
            break
        assert code == 3, message
        (advised, *_) = commands(message)
        budget = int(next(word.partition("budget=")[2] for word in advised if "budget=" in word))
    assert not code
