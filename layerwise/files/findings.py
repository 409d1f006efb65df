"""What verifying a run finds, and how a file of it is read for that."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from layerwise.errors import DamagedData
from layerwise.files.records import check_record, read_record
from layerwise.files.storage import JSON_BYTES, file_sha256, read_file, sealed_json, unseal_json

Form = TypeVar("Form")
SHOWN = 20
LAST = 10**6


def _place(mend: str) -> tuple[int, int]:
    """Of a command among others."""
    found = re.search(r"layerwise (?:(stage) (\d+)|(cache) --module (\d+))", mend)
    if found is None:
        return (0, 0) if "layerwise" not in mend else (LAST, 0)
    return (int(found[2]), 0) if found[1] else (int(found[4]), 1)


@dataclass
class Verification:
    """What was found in a run. Paths begin with that of the run, or are those of a cache elsewhere."""

    run: Path
    files: int = 0
    bytes: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    """Path to what is wrong with the file, missing ones among them."""
    unfinished: dict[str, str] = field(default_factory=dict)
    """Path to what is still to be done there, and is done by the command that was interrupted."""
    unexpected: list[str] = field(default_factory=list)
    """Files that no command put there."""
    caches: list[dict[str, Any]] = field(default_factory=list)
    """`module`, `location`, `bytes`, `files`, and what is `damaged` and `unexpected` by paths within the cache."""
    mends: list[str] = field(default_factory=list)
    """Commands that make the damaged parts again, in this order."""
    known: set[Path] = field(default_factory=set)
    """Every path where a file of the run belongs."""

    def expect(self, path: Path) -> None:
        self.known.add(path)

    def damage(self, path: Path | str, reason: str, mend: str = "") -> None:
        self.damaged.setdefault(str(path), reason)
        for command in self._with_room(path, mend):
            if command and command not in self.mends:
                self.mends.append(command)

    def _with_room(self, path: Path | str, mend: str) -> list[str]:
        """What makes a file again, behind a command that moves away a folder that lies in its place."""
        if not mend or isinstance(path, str) or path.is_symlink() or not path.is_dir():
            return [mend]
        name = shlex.quote(str(path))
        return [f"mv {name} {shlex.quote(f'{path}.mine')}", mend.removeprefix(f"rm {name}").removeprefix("; ")]

    def order_mends(self) -> None:
        """Each command after those whose results it reads: a module, its cache, the module above; then the rest."""
        self.mends.sort(key=_place)

    def as_json(self) -> dict[str, Any]:
        found = {name: value for name, value in vars(self).items() if name != "known"}
        return {**found, "run": str(self.run)}

    def command(self, *words: str) -> str:
        """A command on this run, to be suggested."""
        return shlex.join(["layerwise", *words, "--run-dir", str(self.run)])

    def read(self, path: Path, form: TypeAdapter[Form], mend: str) -> Form | None:
        """The record in the file, if it is byte for byte what was written; None where it is not, or is not there."""
        self.expect(path)
        try:
            raw = read_file(path, JSON_BYTES)
            if raw is None:
                return None
            content = unseal_json(path, raw)
            if sealed_json(content) != raw:  # another white space or escape, which means the same
                raise DamagedData(f"{path} is damaged: it is not byte for byte what was written.")
            record = check_record(path, content, form)
        except DamagedData as error:
            self.damage(path, reason_of(path, error), mend)
            return None
        self.files += 1
        self.bytes += len(raw)
        return record

    def check_sha256(self, path: Path, sha256: str, mend: str) -> None:
        self.expect(path)
        try:
            actual = file_sha256(path)
        except DamagedData as error:
            self.damage(path, reason_of(path, error), mend)
            return
        if actual is None:
            self.damage(path, "is missing", mend)
        elif actual != sha256:
            self.damage(path, "was altered", mend)
        else:
            self.files += 1
            self.bytes += path.stat().st_size


def intact(path: Path, form: TypeAdapter[Form]) -> Form | None:
    with suppress(DamagedData):
        return read_record(path, form)
    return None


def reason_of(path: Path, error: DamagedData) -> str:
    """What is wrong, without the path in front and the advice behind it."""
    return str(error).removeprefix(f"{path} ").removeprefix("is damaged: ").split(". ")[0].rstrip(".")


def listed(numbers: Iterable[int]) -> str:
    shown = [str(number) for number in numbers]
    return ", ".join(shown[:SHOWN]) + (" …" if shown[SHOWN:] else "")
