"""JSON as it is written here: one spelling of a value, so that equal values have equal hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"


KEY_DEPTH = 32  # of lists and mappings in a cache's key; more deeply, parsing might end in a RecursionError


def canonical(value: Json) -> bytes:
    """The one spelling of a JSON value: sorted keys, no white space, ASCII. NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest(fields: Mapping[str, Json]) -> str:
    """The sha256 (64 hex digits) of a mapping's canonical JSON."""
    return hashlib.sha256(canonical(fields)).hexdigest()


def depth(value: Json, most: int) -> int:
    """How deep lists and mappings lie in each other (0 of a plain value), counted up to one more than `most`."""
    level: list[Json] = [value]
    for found in range(most + 1):
        level = [
            inner
            for one in level
            if isinstance(one, list | tuple | Mapping)
            for inner in (one.values() if isinstance(one, Mapping) else one)
        ]
        if not level:
            return found
    return most + 1
