from __future__ import annotations

import pytest

from layerwise.render.units import duration, size, unit_of_bytes, unit_of_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "–"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (2**20, "1.0 MiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (642e9, "597.9 GiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_size(count: float | None, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (61.4, "1 min 01 s"), (3599.6, "1 h 00 min")],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_units_of_axes() -> None:
    assert unit_of_bytes([None, 3 * 2**20, 100]) == ("MiB", 2.0**20)
    assert unit_of_bytes([]) == ("B", 1.0)
    assert unit_of_seconds([119, 3]) == ("seconds", 1.0)
    assert unit_of_seconds([None, 7300]) == ("hours", 3600.0)
