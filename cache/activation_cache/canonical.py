"""JSON as it is written here: one spelling of a value, so that equal values have equal hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"


def canonical(value: Json) -> bytes:
    """The one spelling of a JSON value: sorted keys, no white space, ASCII. NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest(fields: Mapping[str, Json]) -> str:
    """The sha256 (64 hex digits) of a mapping's canonical JSON."""
    return hashlib.sha256(canonical(fields)).hexdigest()
