"""Bytes and seconds as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from layerwise.settings.units import BYTES
from layerwise.settings.units import size as size

SECONDS = (("seconds", 1.0), ("minutes", 60.0), ("hours", 3600.0))


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def unit_of_bytes(values: Sequence[float | None]) -> tuple[str, float]:
    """Name and size of the unit for an axis that shows all of these."""
    largest = max((value for value in values if value is not None), default=0.0)
    return next(((name, scale) for name, scale in BYTES if largest < 1024 * scale), BYTES[-1])


def unit_of_seconds(values: Sequence[float | None]) -> tuple[str, float]:
    largest = max((value for value in values if value is not None), default=0.0)
    return SECONDS[0] if largest < 120 else SECONDS[1] if largest < 7200 else SECONDS[2]
