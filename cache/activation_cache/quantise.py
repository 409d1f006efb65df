"""Numbers as they are stored: float32, float16, bfloat16 (in uint16), and uint8 with a scale per channel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidSamples

Array = npt.NDArray[Any]

CALIBRATED = ("scale", "offset", "bend")  # the arrays of a calibration, by the names under which they are kept

# After a ReLU most numbers are small: steps half as wide as even ones at zero, and twice as wide at the maximum, leave
# less error. On the outputs of the paper's first module, 0.86 of it.
BEND = np.float32(1 / 510)

_BLOCK = 1 << 18  # elements converted at a time, so that temporaries stay in the processor's caches


@dataclass(frozen=True, eq=False)
class Calibration:
    """How uint8 stands for real numbers, for channel c of `axis`:

        value = offset[c] + scale[c] * stored / (1 - bend[c] * stored)

    `axis` counts within one sample's shape. `scale` (above 0), `offset` and `bend` are float32 of shape (channels,).
    `offset` is 0 where no calibration value was negative, as after a ReLU, so that zero is stored exactly; such a
    channel's steps widen from half of an even step at zero to twice one at its maximum (`bend` is BEND). Elsewhere
    they are even (`bend` is 0).
    """

    axis: int
    scale: npt.NDArray[np.float32]
    offset: npt.NDArray[np.float32]
    bend: npt.NDArray[np.float32]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Calibration)
            and self.axis == other.axis
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.offset, other.offset)
            and np.array_equal(self.bend, other.bend)
        )

    __hash__ = None  # type: ignore[assignment]

    def along(self, ndim: int) -> tuple[Array, Array, Array]:
        """(scale, offset, bend) reshaped to broadcast against a batch of samples of `ndim` dimensions (batch first)."""
        shape = [1] * (ndim + 1)
        shape[1 + self.axis] = -1
        return self.scale.reshape(shape), self.offset.reshape(shape), self.bend.reshape(shape)


def calibrate(batches: Iterable[Array], channel_axis: int = 0) -> Calibration:
    """Scales that cover the range of `batches` (arrays of shape (B, *sample)), one per channel.

    `channel_axis` counts within one sample. A channel covers [0, max], or [min, max] where a negative value was seen.
    Values outside the range seen here saturate when they are written, and
    the writer counts them: take samples from all over the data, and several hundred where a sample has but one number
    a channel (of pooled features, 64 samples leave more than twice the error of 1024).

    Raises InvalidSamples without batches, on values that are not finite, or on a range wider than float32.
    """
    low: Array | None = None
    high: Array | None = None
    for batch in batches:
        if batch.size == 0:
            continue
        axes = tuple(axis for axis in range(batch.ndim) if axis != 1 + channel_axis)
        least, most = batch.min(axis=axes).astype(np.float32), batch.max(axis=axes).astype(np.float32)
        if not (np.isfinite(least).all() and np.isfinite(most).all()):
            raise InvalidSamples("calibration met values that are not finite; uint8 cannot hold them")
        low = least if low is None else np.minimum(low, least)
        high = most if high is None else np.maximum(high, most)
    if low is None or high is None:
        raise InvalidSamples("calibration needs at least one batch, and got none")
    offset = np.minimum(low, 0).astype(np.float32)
    with np.errstate(over="ignore"):
        width = np.maximum(high, 0) - offset
    if not np.isfinite(width).all():
        raise InvalidSamples(
            "calibration met values that lie further apart than float32 reaches; uint8 cannot hold them"
        )
    bend = np.where(offset < 0, np.float32(0), BEND)
    scale = width / np.float32(255) * (np.float32(1) - np.float32(255) * bend)
    scale[scale < np.finfo(np.float32).tiny] = 1  # a channel that is always zero, or too small to divide by
    return Calibration(channel_axis, scale, offset, bend)


def quantise(values: Array, calibration: Calibration, out: npt.NDArray[np.uint8]) -> int:
    """Writes `values` (B, *sample) as uint8 into `out` (same shape); returns how many saturated."""
    scale, offset, bend = calibration.along(values.ndim - 1)
    inverse = (np.float32(1) / scale).astype(np.float32)
    plain, even = not calibration.offset.any(), not calibration.bend.any()
    saturated = 0
    rows = max(1, _BLOCK // max(1, int(np.prod(values.shape[1:]))))
    for start in range(0, len(values), rows):
        block = values[start : start + rows].astype(np.float32)  # a copy: worked on in place
        if not plain:
            block -= offset
        block *= inverse
        least, most = block.min(initial=0), block.max(initial=0)
        if not (np.isfinite(least) and np.isfinite(most)):
            raise InvalidSamples("values that are not finite cannot be stored as uint8")
        if not even:
            if least < -1:
                np.maximum(block, -1, out=block)  # far below, the curve would come back from above
            block /= block * bend + np.float32(1)
        np.rint(block, out=block)
        least, most = block.min(initial=0), block.max(initial=0)
        if least < 0 or most > 255:
            saturated += int(np.count_nonzero((block < 0) | (block > 255)))
            np.clip(block, 0, 255, out=block)
        np.copyto(out[start : start + rows], block, casting="unsafe")
    return saturated


def dequantise(stored: Array, calibration: Calibration, dtype: npt.DTypeLike = np.float32) -> Array:
    """Real numbers for stored uint8 of shape (B, *sample): the reference that any device code must equal."""
    scale, offset, bend = calibration.along(stored.ndim - 1)
    numbers = stored.astype(np.float32)
    return (numbers * scale / (np.float32(1) - numbers * bend) + offset).astype(dtype)


def to_bfloat16(values: Array, out: npt.NDArray[np.uint16]) -> None:
    """The upper halves of float32 `values`, rounded to nearest even, as uint16 into `out` (C-contiguous)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).reshape(-1)
    flat = out.reshape(-1)
    for start in range(0, len(bits), _BLOCK):
        block = bits[start : start + _BLOCK]
        rounded = block >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += block
        rounded >>= np.uint32(16)
        np.copyto(flat[start : start + _BLOCK], rounded, casting="unsafe")


def from_bfloat16(stored: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The float32 values of bfloat16 kept in uint16, exactly."""
    return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)


def first_not_finite(stored: Array, dtype: str) -> int | None:
    """The row of the first sample in `stored` (N, ...) with NaN or infinity in it, or None. `dtype`: as stored."""
    if dtype == "uint8" or stored.size == 0:
        return None
    bits, mask, limit = {
        "float32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
        "float16": (np.uint16, 0x7FFF, 0x7C00),
        "bfloat16": (np.uint16, 0x7FFF, 0x7F80),
    }[dtype]
    flat = stored.view(bits).reshape(len(stored), -1)
    rows = max(1, _BLOCK // flat.shape[1])
    for start in range(0, len(flat), rows):
        block = flat[start : start + rows] & bits(mask)
        if block.max() >= limit:
            return start + int(np.argmax((block >= limit).any(axis=1)))
    return None
