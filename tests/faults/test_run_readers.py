"""Each reader of a file of a run, on files that somebody else has sealed: it answers with a record of the right form or
with `DamagedData` that names the file, in bounded time, whatever was edited in a valid file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerwise.errors import DamagedData, NotReady, UsageError
from layerwise.files.metrics import METRICS, keep_metrics, read_metrics, sealed_line
from layerwise.files.records import RECIPE, REPORT, RUN, read_record
from layerwise.files.storage import SEAL, write_json
from layerwise.files.window import Rolling
from layerwise.pipeline.frozen import frozen_digests
from layerwise.pipeline.probe import probe_record
from layerwise.pipeline.rolling import read_rolling, settle_rolling
from layerwise.pipeline.run import RUNS, Run, last_run, open_run, remember_last, run_source
from layerwise.pipeline.setup import Setup
from layerwise.pipeline.verification import verify_run
from layerwise.recipe.learner import make_learner
from layerwise.recipe.loader import load_recipe, resolve_recipe
from layerwise.training.checkpoint import load_checkpoint, save_checkpoint
from layerwise.training.step import Learner
from tests.conftest import TINY
from tests.faults.small_run import copy_of_a_run

SECONDS = 1.0
RAW = "@raw "
"""How a string begins that stands in the file without its quotes."""

JUNK = st.one_of(
    st.sampled_from([None, True, False, [], {}, [[]], {"": {}}, [None] * 1000]),
    st.sampled_from(["", "x", "..", "../../x", "/dev/zero", "a\0b", "\ud800", "x" * 10_000, "1" * 64]),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 10**15, 10**30, 10**400, 0.5, -0.0, 1e-300, 1e300]),
    st.sampled_from(
        ["NaN", "-Infinity", "1e999", "9" * 5000, "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000]
    ).map(RAW.__add__),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=5
    ),
)


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """(parent, key) of everything in a document."""
    for key in list(document) if isinstance(document, dict) else range(len(document)):
        yield document, key
        if isinstance(document[key], (dict, list)):
            yield from places(document[key])


@st.composite
def edits(draw: st.DrawFn) -> Callable[[Any], None]:
    """Changes of one to three places of a document."""
    chosen = draw(st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from("sdkwn"), JUNK), min_size=1, max_size=3))

    def edit(document: Any) -> None:
        for at, how, junk in chosen:
            found = list(places(document))
            if not found:
                return
            parent, key = found[at % len(found)]
            if how == "d":
                del parent[key]
            elif how == "k" and isinstance(parent, dict) and isinstance(junk, str) and not junk.startswith(RAW):
                parent[junk] = parent.pop(key)
            elif how == "w":
                parent[key] = [parent[key]]
            elif how == "n" and isinstance(parent[key], (int, float)):
                parent[key] = -1000 * parent[key] - 1
            else:
                parent[key] = copy.deepcopy(junk)  # the strategy hands out the same objects again

    return edit


def text(document: Any) -> str:
    """JSON in which raw texts stand without their quotes."""
    found = json.dumps(document, sort_keys=True)
    for key, value in [*places([document])]:
        junk = key[value]
        if isinstance(junk, str) and junk.startswith(RAW):
            found = found.replace(json.dumps(junk), junk.removeprefix(RAW))
    return found


def write_sealed(path: Path, document: dict[str, Any]) -> None:
    """As a stranger would who knows how a seal is made; where it cannot be made, any."""
    content = text(document)
    with suppress(ValueError, RecursionError):
        content = json.dumps(json.loads(content), sort_keys=True)
    seal = hashlib.sha256(content.encode()).hexdigest()
    path.write_text(f'{content[:-1]}{", " if document else ""}"{SEAL}": "{seal}"}}')


def attack(path: Path, edit: Callable[[Any], None], read: Callable[[], object], *others: type[Exception]) -> None:
    """Edit the file, read it, and put it back."""
    before = path.read_bytes()
    document = json.loads(before)
    document.pop(SEAL)
    edit(document)
    write_sealed(path, document)
    began = time.process_time()
    try:
        read()
    except DamagedData as error:
        assert str(path) in str(error)  # noqa: PT017
    except others:
        pass
    finally:
        path.write_bytes(before)
    assert time.process_time() - began < SECONDS


def fuzz(examples: int) -> Callable[[Any], Any]:
    """So many examples, times ATTACKS from the environment."""

    def decorate(test: Any) -> Any:
        suppressed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        return settings(
            max_examples=round(examples * float(os.environ.get("ATTACKS", "1"))),
            deadline=None,
            suppress_health_check=suppressed,
        )(test)

    return decorate


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return copy_of_a_run(tmp_path / "run")


def opened(run: Path) -> Run:
    """The run with its own recipe."""
    source, overrides = run_source(run)
    return open_run(run, resolve_recipe(load_recipe(source), overrides))


def test_the_attack_itself(run: Path) -> None:
    """What is sealed again without an edit is read, so that it is the edits which are refused."""
    path = run / "run.json"
    document = json.loads(path.read_bytes())
    document.pop(SEAL)
    write_sealed(path, document)
    assert read_record(path, RUN) == document
    for raw in ("NaN", "1e999", "[" * 3000 + "]" * 3000):
        write_sealed(path, {**copy.deepcopy(document), "extra": RAW + raw})
        with pytest.raises(DamagedData, match=r"run\.json"):
            read_record(path, RUN)


@fuzz(60)
@given(edits())
def test_run_json(run: Path, edit: Callable[[Any], None]) -> None:
    path = run / "run.json"
    attack(path, edit, lambda: run_source(run))
    attack(path, edit, lambda: open_run(run, TINY).data_dir, UsageError)


@fuzz(30)
@given(edits())
def test_the_run_that_was_used_last(run: Path, edit: Callable[[Any], None]) -> None:
    remember_last(run)
    attack(RUNS / ".last.json", edit, last_run)


@fuzz(60)
@given(edits())
def test_recipe_json(run: Path, edit: Callable[[Any], None]) -> None:
    attack(run / "recipe.json", edit, lambda: open_run(run, TINY), UsageError)
    attack(run / "recipe.json", edit, lambda: read_record(run / "recipe.json", RECIPE))


@fuzz(60)
@given(edits())
def test_stage_json(run: Path, edit: Callable[[Any], None]) -> None:
    setup = Setup(opened(run), torch.device("cpu"))
    attack(run / "stages/2/stage.json", edit, lambda: frozen_digests(setup, 2))


@fuzz(60)
@given(edits())
def test_probes(run: Path, edit: Callable[[Any], None]) -> None:
    setup = Setup(opened(run), torch.device("cpu"))
    setup.__dict__["module_facts"] = [{"module": number, "parts": 1} for number in (1, 2, 3)]
    attack(run / "probes/2.json", edit, lambda: probe_record(setup, 2))


@fuzz(60)
@given(edits())
def test_dataset_json(run: Path, edit: Callable[[Any], None]) -> None:
    def facts() -> None:
        setup = Setup(opened(run), torch.device("cpu"), writes=False)
        assert setup.recipe.network.modules(setup.facts.sample_shape)
        assert setup.output_shapes

    attack(run / "dataset.json", edit, facts, NotReady)


@fuzz(60)
@given(edits())
def test_the_note_of_a_window(run: Path, edit: Callable[[Any], None]) -> None:
    setup = Setup(opened(run), torch.device("cpu"))
    settle_rolling(setup, 1, Rolling(4, 20, 5))
    attack(run / "caches/1.window.json", edit, lambda: read_rolling(setup, 1))


@fuzz(40)
@given(edits())
def test_the_manifest_of_the_report(run: Path, edit: Callable[[Any], None]) -> None:
    attack(run / "report/manifest.json", edit, lambda: read_record(run / "report/manifest.json", REPORT))


@pytest.fixture
def learner(tmp_path: Path) -> Learner:
    """With a checkpoint in `tmp_path`/stage."""
    module = TINY.network.modules((1, 16, 16))[0]
    made = make_learner(TINY, 1, module, (1, 16, 16), {}, torch.device("cpu"))
    made.objective.loss  # noqa: B018
    for weight in (*made.module.parameters(), *made.objective.parameters()):
        weight.grad = torch.ones_like(weight)
    made.optimiser.step()
    place = {"epoch": 1, "batch": 2, "step": 8, "sums": [1.0], "best_loss": 2.0, "best_epoch": 1, "seconds": 1.0}
    save_checkpoint(tmp_path / "stage", [made], {"training": {"epochs": 5}}, place, best=True)
    return made


@fuzz(60)
@given(edits())
def test_checkpoint_json(tmp_path: Path, learner: Learner, edit: Callable[[Any], None]) -> None:
    made_from = {"training": {"epochs": 5}}
    path = tmp_path / "stage/checkpoint.json"
    attack(path, edit, lambda: named_after(path, lambda: load_checkpoint(path.parent, [learner], made_from)), NotReady)


def named_after(path: Path, read: Callable[[], object]) -> None:
    """An error that names the tensors beside a record is as good: one of the two was altered."""
    try:
        read()
    except DamagedData as error:
        assert str(path.parent) in str(error)  # noqa: PT017
        raise DamagedData(f"{path}: {error}") from error


@fuzz(60)
@given(edits(), st.integers(0, 2))
def test_metrics(tmp_path: Path, edit: Callable[[Any], None], at: int) -> None:
    lines = [
        {"epoch": epoch, "step": 6 * epoch, "loss": [1.5], "validation_loss": [1.25], "seconds": 0.5}
        for epoch in (1, 2, 3)
    ]
    edited = copy.deepcopy(lines)
    edit(edited[at])
    content = b""
    for line in edited:
        body = text(line)
        with suppress(ValueError, RecursionError):
            content += sealed_line(json.loads(body))
            continue
        content += body.encode() + b"\n"
    (tmp_path / METRICS).write_bytes(content)
    began = time.process_time()
    found = read_metrics(tmp_path / METRICS, 1)
    assert [epoch for epoch in found.epochs if epoch["epoch"] == lines[at - 1]["epoch"]] or at == 0 or found.damaged
    keep_metrics(tmp_path / METRICS, 2, 1)
    assert time.process_time() - began < SECONDS


@pytest.mark.parametrize("path", ["run.json", "stages/1/stage.json", "probes/1.json", "report/manifest.json"])
@fuzz(15)
@given(edits())
def test_verify(run: Path, path: str, edit: Callable[[Any], None]) -> None:
    """What is not byte for byte what `write_json` leaves is damage, whatever it means."""
    if (run / "caches").exists():  # which take most of the time
        (run / "caches").rename(run.parent / "caches")

    def read() -> None:
        found = verify_run(run).damaged
        raise DamagedData(", ".join(found))

    attack(run / path, edit, read)


def test_what_was_edited_and_sealed_by_our_own_hand(run: Path) -> None:
    """Records whose fields have the right types, and which contradict what lies beside them."""
    document = json.loads((run / "stages/2/stage.json").read_bytes())
    document.pop(SEAL)
    write_json(run / "stages/2/stage.json", {**document, "trained_with": [5]})
    with pytest.raises(DamagedData, match=r"stages/2/stage\.json is damaged: it is of the modules \[5\]"):
        frozen_digests(Setup(opened(run), torch.device("cpu")), 2)
