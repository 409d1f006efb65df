"""Text for a terminal: lines end between words, and a command that a reader would copy is never cut."""

from __future__ import annotations

import os
import re
import shutil
from typing import IO

COMMANDS = (
    "run",
    "stage",
    "cache",
    "probe",
    "plan",
    "memreport",
    "status",
    "verify",
    "report",
    "reproduce",
    "recipes",
    "grow",
    "export",
    "embed",
    "watch",
)
_FLAG = r"--(?:fresh|repair|prune|yes|download|json|fixed|overwrite|positions)(?![\w-])"
_OPTION = r"--[a-z][a-z-]*(?:=| +)(?:'[^']*'|\"[^\"]*\"|[^\s'\"])+"
_ARGUMENT = r"(?:\d+|[A-Z]+|table\d|figure\d)(?![\w-])"
COPIED = re.compile(rf"layerwise (?:{'|'.join(COMMANDS)})\b(?: +(?:{_FLAG}|{_OPTION}|{_ARGUMENT}))*|{_OPTION}")
"""A command, or an option with its value."""
HELD = "\N{NO-BREAK SPACE}"


def terminal_width(stream: IO[str]) -> int | None:
    """Columns of the terminal that the stream writes to (COLUMNS, where that is set); None where it has no width."""
    if os.environ.get("COLUMNS", "").isdecimal():
        return int(os.environ["COLUMNS"]) or None
    return shutil.get_terminal_size().columns if stream.isatty() else None


def wrapped(text: str, width: int | None, *, begun: int = 0) -> str:
    """The text in lines of at most `width`, ended between words; only a longer word or command exceeds it.

    A command that does not fit on what is left of a line has a line of its own, without the full stop behind it.

    Args:
        begun: columns of the first line that are taken already.
    """
    if width is None:
        return text
    first, *others = text.split("\n")
    return "\n".join([*_lines(first, width, begun), *(part for line in others for part in _lines(line, width, 0))])


def _lines(line: str, width: int, begun: int) -> list[str]:
    if begun + len(line) <= width:
        return [line]
    words = COPIED.sub(lambda found: found[0].replace(" ", HELD), line.strip()).split(" ")
    indent = " " * (len(line) - len(line.lstrip()))
    done, under_way, room = [], "", width - begun
    for word in words:
        joined = f"{under_way} {word}" if under_way else indent + word
        if len(joined) <= room or not under_way:
            under_way = joined
            continue
        done.append(under_way)
        under_way, room = indent + word, width
        if word.startswith(f"layerwise{HELD}"):
            done.append(f"{indent}  {word.rstrip('.,;:)')}")
            under_way = ""
    return [part.rstrip().replace(HELD, " ") for part in (*done, under_way) if part.strip()]
