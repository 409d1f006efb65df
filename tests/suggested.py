"""The commands that a message suggests, found and run: advice that cannot be followed is a fault."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Sequence

from click.testing import CliRunner, Result

from layerwise.cli import main

BEGINS = re.compile(rf"\blayerwise (?=(?:{'|'.join(main.commands)})\b)")
ENDS = (";", "&&")


def commands(message: str) -> list[list[str]]:
    """The arguments of each `layerwise COMMAND …` in a message, without the program's name.

    A command ends where the message does, where a shell would end it, or with a full stop.
    """
    found = []
    for begin in BEGINS.finditer(message):
        words = shlex.shlex(message[begin.end() :], posix=True, punctuation_chars=";&")
        words.whitespace_split, words.commenters = True, ""
        arguments = list(itertools.takewhile(lambda word: word not in ENDS, words))
        ends = next((index for index, word in enumerate(arguments) if word.endswith(".")), None)
        if ends is not None:  # a full stop, and what comes after it
            arguments = [*arguments[:ends], arguments[ends].removesuffix(".")]
        found.append(arguments)
    return found


def typed(arguments: Sequence[str]) -> Result:
    """What a command does, typed by a user; our own mistakes are raised."""
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def message_of(arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code of a command, and the message of its error, empty where there is none."""
    done = typed([*arguments, "--json"])
    lines = done.stdout.strip().splitlines()
    return done.exit_code, json.loads(lines[-1]).get("message", "") if done.exit_code else ""
