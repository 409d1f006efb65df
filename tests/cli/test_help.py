"""`--help`: options under headings and only those that matter, nothing cut off, and the nearest name for a typo."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner, Result

from layerwise.cli import main

RUN = {"recipe", "method", "set", "run-dir"}
DATA = {"data-dir", "download", "data"}
MEMORY = {"max-memory", "micro-batch"}
CACHE = {"cache-budget", "cache-url", "views"}
OFFERED = {
    "run": {"fresh", "schedule", "feed", "device", "track", *RUN, *DATA, *MEMORY, *CACHE},
    "stage": {"fresh", "device", "track", *RUN, *DATA, *MEMORY, *CACHE},
    "cache": {"module", "repair", "task", "commit", "prune", "yes", "device", *RUN, *DATA, *CACHE},
    "plan": {"schedule", "feed", "device", "data-dir", "data", *RUN, *MEMORY, *CACHE},
    "probe": {"module", "fixed", "fresh", "device", "track", *RUN, *DATA},
    "export": {"module", "to", "overwrite", *RUN},
    "embed": {"module", "to", "positions", "overwrite", "device", *RUN},
    "memreport": {
        *("recipe", "set", "method", "batch", "max-memory", "depth", "device", "csv", "chart"),
        *("timeline", "compare", "module", "real", "snapshot"),
    },
    "reproduce": {"scale", "seeds", "fresh", "recipe", "set", "run-dir", "device", *DATA},
    "grow": {"channels", "blocks", "stride", "device", *RUN, *DATA, *MEMORY},
    "watch": {"once", "every", "recipe", "run-dir"},
    "recipes": set(),
    "report": {"compare", "out", *RUN},
}


def call(*arguments: str, width: int = 80) -> Result:
    return CliRunner(env={"COLUMNS": str(width)}).invoke(main, arguments, catch_exceptions=False)


@pytest.mark.parametrize("command", OFFERED)
def test_a_command_offers_the_options_that_matter_to_it(command: str) -> None:
    shown = set(re.findall(r"^ +(?:-h, )?--([a-z-]+)", call(command, "--help").stdout, re.M))
    assert shown == OFFERED[command] | {"json", "help"}


def test_options_stand_under_headings() -> None:
    sections = dict(re.findall(r"^([A-Z]\w+):\n((?:  .*\n)+)", call("run", "--help").stdout, re.M))
    assert list(sections) == ["Options", "Run", "Data", "Memory", "Cache", "Output"]
    under = {heading: set(re.findall(r"^  (?:-h, )?--([a-z-]+)", text, re.M)) for heading, text in sections.items()}
    assert under["Options"] == {"fresh"}
    assert under["Run"] == {*RUN, "schedule", "feed", "device"}
    assert (under["Data"], under["Memory"], under["Cache"]) == (DATA, MEMORY, CACHE)
    assert under["Output"] == {"track", "json", "help"}


@pytest.mark.parametrize("width", [60, 80, 120])
def test_commands_are_listed_with_their_whole_first_sentence(width: int) -> None:
    listed = call("--help", width=width).stdout.partition("Commands:\n")[2]
    assert "..." not in listed
    assert re.findall(r"^  (\w+) ", listed, re.M) == list(main.commands)
    for command in main.commands.values():
        first = (command.help or "").split("\n\n")[0].split(". ")[0].rstrip(".")
        assert " ".join(first.split()) in " ".join(listed.split())


@pytest.mark.parametrize("command", [[], *([name] for name in main.commands)])
def test_no_line_of_help_is_wider_than_a_terminal(command: list[str]) -> None:
    assert max(map(len, call(*command, "--help").stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        (["statsu"], "there is no command 'statsu': did you mean status?"),
        (["trian"], "there is no command 'trian': "),
        (["xyzzy"], "there is no command 'xyzzy': there are run, stage, "),
        (["run", "--recip", "digits"], "--recipe"),
        (["run", "digits"], "'digits' is one argument too many: did you mean --recipe digits?"),
        (["cache", "1"], "'1' is one argument too many: did you mean --module 1?"),
        (["stage", "1", "2"], "'2' is one argument too many"),
        (["stage", "one"], "'one' is not a valid number"),
        (["run", "--run-dir", __file__], "is a file"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_name(typed: list[str], hint: str) -> None:
    refused = call(*typed, width=200)
    assert refused.exit_code == 2
    assert hint in refused.stderr
    told = json.loads(call(*typed, "--json").stdout)
    assert (told["error"], told["exit_code"]) == ("UsageError", 2)
    assert hint in told["message"]
