"""Whole runs whose caches lie on an object store that fails: they go on, to the same bits as on a disk of their own."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from activation_cache import inspect, verify
from tests.faults.commands import Commands
from tests.faults.conftest import scaled
from tests.faults.runs import advised, asked, bits

pytest.importorskip("obstore")
pytest.importorskip("moto")

from activation_cache.store.remote import RemoteStore
from tests.activation_cache.faulty_s3 import Proxy, faulty_s3

KINDS = ("busy", "drop", "reset", "lost reply", "truncate", "flip", "flip upload", "deny")


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    with faulty_s3() as proxy:
        yield proxy


def attack(
    commands: Commands,
    finished: Callable[[str], Path],
    server: Proxy,
    folder: Path,
    tally: Counter[str],
    times: int,
    share: float,
    restarts: bool,
    seed: int,
) -> None:
    """Runs on the store until `times` requests went wrong, a random `share` of them at a time, and `restarts`: the
    server is killed in the middle of each run too.
    """
    rng, wanted, gone_wrong, number = random.Random(seed), bits(finished("uint8")), 0, 0
    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    environment = {**credentials, "AWS_ENDPOINT_URL": server.url, "AWS_ALLOW_HTTP": "true"}

    def fault(_: int, method: str, path: str) -> str | None:
        nonlocal gone_wrong
        if gone_wrong >= times or rng.random() >= share:
            return None
        gone_wrong += 1
        kind = rng.choice(KINDS)
        tally[f"requests: {kind}"] += 1
        return kind

    def run(command: list[str]) -> Any:
        """The command under faults; afterwards, what is committed on the store has to be whole."""
        server.fault = fault
        restarting = threading.Thread(target=server.restart) if restarts and rng.random() < 0.3 else None
        running = commands.start(command, cwd=folder, environment=environment)
        if restarting is not None and not running.wait(rng.uniform(0, 3)):
            restarting.start()
            tally["servers killed"] += 1
        [outcome] = running.outcomes()
        if restarting is not None and restarting.ident is not None:
            restarting.join()
        server.fault = lambda number, method, path: None
        options = {name.lower(): value for name, value in credentials.items()}
        place = RemoteStore(
            f"s3://bucket/{seed}/run{number}/1",
            folder=folder / "copies",
            options={**options, "endpoint": server.url, "client_options": {"allow_http": True}},
        )
        if inspect(place).state == "valid":
            assert verify(place).ok, f"a cache was committed and is damaged: {verify(place)}\n{outcome}"
        return outcome

    while gone_wrong < times:
        name = f"run{number}"
        command = asked(name, **{"cache.url": f"s3://bucket/{seed}"})
        for _ in range(60):
            outcome = run(command)
            tally[f"exit {outcome.code}"] += 1
            if outcome.code == 0:
                break
            assert outcome.typed, f"seed {seed}: {outcome}"
            assert outcome.code in (1, 65), f"seed {seed}: {outcome}"
            for step in advised(outcome.output):
                tally["advice followed"] += 1
                assert run([*step, "--run-dir", name]).typed
        assert outcome.code == 0, f"seed {seed}: {outcome}"
        assert bits(folder / name) == wanted, f"seed {seed}, {name}"
        looked = commands.call("verify", "--run-dir", name, cwd=folder, environment=environment)
        assert looked.code == 0, looked
        tally["runs ended in the same bits"] += 1
        number += 1


def test_a_run_on_a_store_that_fails(
    commands: Commands, finished: Callable[[str], Path], server: Proxy, tmp_path: Path, tally: Counter[str]
) -> None:
    attack(commands, finished, server, tmp_path, tally, 10, 0.05, restarts=False, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_500_faults_of_a_store_with_whole_runs(
    commands: Commands, finished: Callable[[str], Path], server: Proxy, tmp_path: Path, tally: Counter[str], part: int
) -> None:
    attack(commands, finished, server, tmp_path, tally, scaled(125), 0.05, restarts=True, seed=1 + part)
