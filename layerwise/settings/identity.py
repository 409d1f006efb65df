"""What differs between two identities, as settings and records hold them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`field: old -> new` for every field that differs between two identities, in their order."""
    return [
        f"{name.removesuffix('.code')}: its code was edited"
        if name.endswith(".code")
        else f"{name}: {_short(old)} -> {_short(new)}"
        for name, old, new in changes(before, after)
    ]


def changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every field that differs between two identities, with its old and its new value; None where there is none."""
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping) and name != "code":
            yield from changes(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}", old, new


def changes_within(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The differences between two identities of a stage, but for those that only let it end later or earlier.

    From where a training stands, another number of epochs leads to the same bits as if it had been asked for at the
    start, if it is not passed yet; and so does more patience.
    """
    only_end = {"training.epochs"}
    if _patience(before) <= _patience(after):
        only_end.add("training.patience")
    return [line for line in differences(before, after) if line.partition(":")[0] not in only_end]


def _patience(identity: Mapping[str, Any]) -> float:
    training = identity.get("training")
    found = training.get("patience") if isinstance(training, Mapping) else None
    return found if isinstance(found, int) else math.inf


def _short(value: Any) -> str:
    """Hashes by their first 12 digits."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", str(value))
