"""How a command ends: its result for people or for machines, and errors as one message and an exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import click

from layerwise.render.words import terminal_width, wrapped


class ChoosesOutput(Protocol):
    """Options of a command, `--json` among them."""

    @property
    def json(self) -> bool: ...


def emit(options: ChoosesOutput, result: dict[str, Any], people: Callable[[], None]) -> None:
    """Print the result: for machines with --json, else for people."""
    if options.json:
        click.echo(json.dumps(result, allow_nan=False))
    else:
        people()


def say(note: str) -> None:
    """Print a note for people."""
    click.echo(wrapped(note, terminal_width(sys.stderr)), err=True)


def emit_error(kind: str, message: str, code: int) -> None:
    """Print an error for machines."""
    click.echo(json.dumps({"error": kind, "message": message, "exit_code": code}))


@contextmanager
def errors_to_exit_codes(as_json: bool) -> Iterator[None]:
    """One message for an error that a user can act on; our own mistakes keep their traceback."""
    try:
        with interruption_as_error():
            yield
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        message = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            message = f"{os.fsdecode(error.filename)}: {error.strerror}"
        if as_json:
            emit_error(type(error).__name__, message, code)
        else:
            begun = "layerwise:"
            text = wrapped(message, terminal_width(sys.stderr), begun=len(begun) + 1)
            click.echo(f"{click.style(begun, fg='red', bold=True)} {text}", err=True)
        sys.exit(code)


@contextmanager
def interruption_as_error() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        from layerwise.errors import StoppedEarly

        raise StoppedEarly(
            "stopped; finished work is saved, and the same command, without --fresh, resumes from there"
        ) from None


def exit_code(error: Exception) -> int | None:
    from layerwise.errors import DamagedData, LayerwiseError

    if isinstance(error, LayerwiseError):
        return error.exit_code

    from activation_cache import CacheError, Damaged
    from activation_cache.store.files import NotARegularFile

    if isinstance(error, (Damaged, NotARegularFile)):
        return DamagedData.exit_code
    if isinstance(error, OSError):
        return 1 if error.filename is not None else None
    return 1 if isinstance(error, CacheError) else None  # looking at a cache, such as on a store that is not reached
