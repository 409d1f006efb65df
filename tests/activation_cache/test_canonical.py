"""The spelling of JSON that README.md states for readers in other languages."""

from __future__ import annotations

import numpy as np
import pytest

from activation_cache.format.canonical import Json, canonical


@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        (3, b"3"),
        (3.0, b"3.0"),
        (-0.0, b"-0.0"),
        (0.0001, b"0.0001"),
        (1e-05, b"1e-05"),
        (1.5e-07, b"1.5e-07"),
        (123456789012345.0, b"123456789012345.0"),
        (9999999999999998.0, b"9999999999999998.0"),
        (1e16, b"1e+16"),
        (1e100, b"1e+100"),
        (float(np.float32(0.1)), b"0.10000000149011612"),
        ('"\\\n/é\x01\x7f\U0001f600', rb'"\"\\\n/\u00e9\u0001\u007f\ud83d\ude00"'),
        ({"b": [True, None], "a": {"é": 1, "z": 2}}, rb'{"a":{"z":2,"\u00e9":1},"b":[true,null]}'),
    ],
)
def test_one_spelling(value: Json, spelled: bytes) -> None:
    assert canonical(value) == spelled


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_has_no_spelling(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical(value)
