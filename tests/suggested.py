"""The commands that a message suggests, found and run: advice that cannot be followed is a fault."""

from __future__ import annotations

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

    A command ends where the message does, or at a word of its own that ends commands in a shell.
    """
    found = []
    for begin in BEGINS.finditer(message):
        words = shlex.shlex(message[begin.end() :], posix=True)
        words.whitespace_split, words.commenters = True, ""
        arguments = []
        for word in words:
            if word in ENDS:
                break
            arguments.append(word)
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
