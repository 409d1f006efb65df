"""Bytes and counts as people read and write them."""

from __future__ import annotations

import math
import re

BYTES = (("B", 1.0), ("KiB", 2.0**10), ("MiB", 2.0**20), ("GiB", 2.0**30), ("TiB", 2.0**40))
WRITTEN = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def size(count: float | None) -> str:
    """Bytes, in powers of 1024."""
    if count is None:
        return "–"
    name, scale = next(((name, scale) for name, scale in BYTES if count < 1023.95 * scale), BYTES[-1])
    return f"{count:.0f} B" if name == "B" else f"{count / scale:.1f} {name}"


def counted(count: int, noun: str) -> str:
    """`1 epoch`, `1,200 epochs`: for nouns whose plural ends in s."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def parse_bytes(text: str) -> int:
    """`500MB` (powers of 1000), `2 GiB` (powers of 1024) or a plain number, to bytes.

    Raises:
        ValueError: the text is none of these.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    count = float(found[1]) * WRITTEN[found[2]] if found is not None and found[2] in WRITTEN else math.inf
    if count == math.inf:
        raise ValueError(f"{text[:40]!r} is not a number of bytes: write 500MB, 2GiB or 500000000")
    return int(count)
