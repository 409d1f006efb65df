"""Structured edits of a run that a stranger made: any JSON of it and of its caches, with checksums that fit again."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

RAW = "@raw "
"""How a string begins that is written into the JSON as it is, without its quotes."""

TEXTS = (
    "",
    "x",
    "1",
    "null",
    "..",
    "../../bystander/notes.txt",
    "/etc/passwd",
    "/dev/zero",
    "a\0b",
    "\ud800",
    "é" * 5000,
)
NUMBERS = (0, 1, -1, 2, 255, 2**31, 2**63, 2**64, 10**15, 10**30, 0.5, -0.0, 1e-300, 1e300)
RAWS = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000)


class Edit:
    """One edit of a copy of a run, drawn by `rng`; `said` tells what it was. `evil`: a stranger's recipe file."""

    def __init__(self, run: Path, rng: random.Random, evil: Path) -> None:
        self._run, self._rng = run, rng
        self._texts = (*TEXTS, str(evil), str(evil.parent), os.path.relpath(evil, run))
        documents = [p for p in run.rglob("*") if p.suffix in (".json", ".jsonl")]
        of_caches = [p for p in documents if "caches" in p.relative_to(run).parts]
        of_the_run = [p for p in documents if p not in of_caches]
        self.path = rng.choice(sorted(rng.choice([of_caches, of_the_run])))
        self.sealed = rng.random() < 0.8
        how = rng.random()
        if how < 0.08:
            self.said, self.sealed = self._replace_file(), False
        elif how < 0.16:
            self.said, self.sealed = self._spoil_text(), False
        elif self.path.suffix == ".jsonl":
            lines = [json.loads(line) for line in self.path.read_text().splitlines()]
            self.said = self._change(lines)
            self.path.write_bytes(b"".join(self._bytes(line) + b"\n" for line in lines))
        else:
            document = json.loads(self.path.read_bytes())
            self.said = self._change(document)
            self.path.write_bytes(self._bytes(document))
            if self.sealed:
                self._follow_up(document)
        self.said = f"{self.path.relative_to(run)}{' (sealed)' if self.sealed else ''}: {self.said}"

    def _replace_file(self) -> str:
        """Something else in the file's place, which a careless reader or writer follows, waits for or trips over."""
        self.path.unlink()
        victim = self._run.parent.parent / "bystander"
        ways: list[tuple[str, Callable[[], None]]] = [
            ("a link to a file of the user's", lambda: self.path.symlink_to(victim / "notes.txt")),
            ("a link to a folder of the user's", lambda: self.path.symlink_to(victim)),
            ("a link to nothing", lambda: self.path.symlink_to(victim / "nothing")),
            ("a link to itself", lambda: self.path.symlink_to(self.path)),
            ("a pipe", lambda: os.mkfifo(self.path)),
            ("a folder", self.path.mkdir),
            ("nothing", lambda: None),
            ("/dev/zero", lambda: self.path.symlink_to("/dev/zero")),
        ]
        said, make = self._rng.choice(ways)
        make()
        return said

    def _spoil_text(self) -> str:
        content = self.path.read_bytes()
        half = len(content) // 2
        ways = {
            "empty": b"",
            "half": content[:half],
            "twice": content * 2,
            "not UTF-8": content[:half] + b"\xff\xfe" + content[half:],
            "a mark of byte order": b"\xef\xbb\xbf" + content,
            "as UTF-16": content.decode().encode("utf-16"),
            "zeros": b"\0" * len(content),
            "a number": b"1",
            "a list": b"[]",
            "an empty object": b"{}",
            "deep": b'{"a":' * 200_000,
        }
        said = self._rng.choice(list(ways))
        self.path.write_bytes(ways[said])
        return said

    def _junk(self) -> Any:
        kind = self._rng.randrange(6)
        if kind == 0:
            return self._rng.choice(self._texts)
        if kind == 1:
            return self._rng.choice(NUMBERS)
        if kind == 2:
            return RAW + self._rng.choice(RAWS)
        if kind == 3:
            return self._rng.choice([None, True, False, [], {}, [[]], [None], {"": {}}])
        if kind == 4:
            return [self._rng.choice(NUMBERS)] * self._rng.choice([1, 2, 1000])
        return {self._rng.choice(self._texts): self._rng.choice(NUMBERS)}

    def _change(self, document: Any) -> str:
        """Change one to three places of a document, never the seals themselves; returns what was done."""
        said = []
        for _ in range(self._rng.choice([1, 1, 1, 2, 3])):
            places = list(_places(document))
            if not places:
                break
            parent, key, where = self._rng.choice(places)
            old = parent[key]
            action = self._rng.randrange(9)
            if action <= 2:
                parent[key] = self._junk()
            elif action == 3:
                parent[key] = self._near(old)
            elif action == 4:
                del parent[key]
            elif action == 5 and isinstance(parent, dict):
                parent[self._rng.choice(self._texts)] = parent.pop(key)
            elif action == 6:
                other, elsewhere, _ = self._rng.choice(places)
                parent[key] = copy.deepcopy(other[elsewhere])
            elif action == 7:
                parent[key] = self._rng.choice([[old], {"x": old}, [old, old]])
            elif isinstance(old, list):
                parent[key] = self._rng.choice([old[:-1], old * 2, old[::-1], [*old, self._junk()]])
            elif isinstance(old, dict):
                old[self._rng.choice(self._texts)] = self._junk()
            else:
                parent[key] = self._junk()
            new = repr(parent[key])[:60] if (key in parent if isinstance(parent, dict) else key < len(parent)) else "-"
            said.append(f"{where}: {repr(old)[:60]} -> {new}")
        return "; ".join(said)

    def _near(self, old: Any) -> Any:
        """A value of the same type that is wrong."""
        if isinstance(old, bool):
            return not old
        if isinstance(old, int | float):
            return self._rng.choice([old + 1, old - 1, -old, old * 1000, float(old), str(old)])
        if isinstance(old, str):
            return self._rng.choice([old + "x", old[:-1], old.upper(), f"../{old}", old * 100])
        return self._junk()

    def _bytes(self, document: Any) -> bytes:
        """As it is written, with the seal that fits where it has one."""
        if self.sealed and isinstance(document, dict):
            seal(document)
        canonical = isinstance(document, dict) and "sha256" in document and "seal" not in document
        return _text(document, canonical)

    def _follow_up(self, document: Any) -> None:
        """Make the other records of a cache agree with the file that was changed."""
        cache = next((p for p in self.path.parents if (p / "record/commit.json").exists()), None)
        if cache is None:
            return
        commit_path, plan_path = cache / "record/commit.json", cache / "record/plan.json"
        commit = document if self.path == commit_path else json.loads(commit_path.read_bytes())
        if not isinstance(commit, dict) or not isinstance(commit.get("files"), dict):
            return
        if self.path == plan_path and isinstance(document, dict) and "plan" in document:
            commit["plan"] = document["plan"]
        elif self.path == commit_path and "plan" in commit and self._rng.random() < 0.5:
            plan = json.loads(plan_path.read_bytes())
            plan["plan"] = commit["plan"]
            seal(plan)
            plan_path.write_bytes(_text(plan, True))
        for path in (self.path, plan_path):
            name = path.relative_to(cache).as_posix()
            if name in commit["files"] and path != commit_path:
                content = path.read_bytes()
                commit["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
        seal(commit)
        commit_path.write_bytes(_text(commit, True))


def seal(document: dict[str, Any]) -> None:
    """The checksum that belongs to a document, whichever of the two kinds it has."""
    if "seal" in document:
        try:
            body = json.loads(_text({k: v for k, v in document.items() if k != "seal"}, False), parse_int=_int)
        except RecursionError:  # nobody can tell whether the seal fits
            return
        document["seal"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    elif "sha256" in document:
        body = {k: v for k, v in document.items() if k != "sha256"}
        document["sha256"] = hashlib.sha256(_text(body, True)).hexdigest()


def _int(digits: str) -> float:
    return int(digits) if len(digits) < 4000 else float("inf")


def _text(document: Any, canonical: bool) -> bytes:
    if canonical:
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    else:
        text = json.dumps(document, indent=2 if isinstance(document, dict) and "seal" in document else None)
    for raw in RAWS:
        text = text.replace(json.dumps(RAW + raw), raw)
    return text.encode()


def _places(document: Any, where: str = "") -> Any:
    """(parent, key, path) of each value below a document; not of the seals, which follow."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in list(items):
        if where == "" and key in ("seal", "sha256") and isinstance(document, dict):
            continue
        yield document, key, f"{where}/{key}"
        yield from _places(value, f"{where}/{key}")
