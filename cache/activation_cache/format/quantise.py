"""Numbers as they are stored: float32, float16, bfloat16 (in uint16), and uint8 with a scale per channel."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from activation_cache.errors import InvalidSamples

Array = npt.NDArray[Any]

CALIBRATED = ("scale", "offset", "bend")  # the arrays of a calibration, by the names under which they are kept

BEND = np.float32(1 / 510)  # steps from a half to twice the width of even ones

_BLOCK = 1 << 18  # elements converted at a time, so that temporaries stay in the processor's caches


@dataclass(frozen=True, eq=False)
class Calibration:
    """How uint8 stands for real numbers, for channel c of `axis`:

        value = scale[c] * stored / (1 - bend[c] * stored) + offset[c]

    `axis` counts within one sample's shape. `scale` (above 0), `offset` and `bend` are float32 of shape (channels,).
    `offset` is 0 where no calibration value was negative, as after a ReLU, so that zero is stored exactly. With a
    `bend` of 0 steps are even; with BEND they widen from half of an even step at zero to twice one at the maximum.
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
    Its steps are bent where that leaves less error on the values seen: where no value is negative and most are small.
    Values outside the range seen here saturate when they are written, and the writer counts them: take samples from
    all over the data, and several hundred where a sample has but one number a channel (of pooled features, 64 samples
    leave more than twice the error of 1024).

    Raises InvalidSamples without batches, on values that are not finite, or on a range wider than float32.
    """
    low: Array | None = None
    high: Array | None = None
    powers: Array = np.zeros(())
    for batch in batches:
        if batch.size == 0:
            continue
        axes = tuple(axis for axis in range(batch.ndim) if axis != 1 + channel_axis)
        least, most = batch.min(axis=axes).astype(np.float32), batch.max(axis=axes).astype(np.float32)
        if not (np.isfinite(least).all() and np.isfinite(most).all()):
            raise InvalidSamples("calibration met values that are not finite; uint8 cannot hold them")
        low = least if low is None else np.minimum(low, least)
        high = most if high is None else np.maximum(high, most)
        powers = powers + _powers(batch, channel_axis, most)
    if low is None or high is None:
        raise InvalidSamples("calibration needs at least one batch, and got none")
    offset = np.minimum(low, 0).astype(np.float32)
    with np.errstate(over="ignore"):
        width = np.maximum(high, 0) - offset
    if not np.isfinite(width).all():
        raise InvalidSamples(
            "calibration met values that lie further apart than float32 reaches; uint8 cannot hold them"
        )
    # At the fraction t of the range a bent step is (1 + t)^2 / 2 of an even one; squared errors go with its square.
    with np.errstate(divide="ignore", invalid="ignore"):  # of channels that are always zero
        squared = np.tensordot([1, 4, 6, 4, 1], powers / high.astype(np.float64) ** np.arange(5)[:, None], 1) / 4
    bend = np.where((offset == 0) & (squared < powers[0]), BEND, np.float32(0))
    scale = width / np.float32(255) * (np.float32(1) - np.float32(255) * bend)
    # Of a channel that is always zero, or too small to divide by: what is not zero saturates, and is counted.
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    return Calibration(channel_axis, scale, offset, bend)


def _powers(batch: Array, channel_axis: int, most: Array) -> Array:
    """Sums over some thousand positive numbers of each channel, of their powers 0 to 4: float64 (5, channels)."""
    channels = batch.shape[1 + channel_axis]
    split = batch.reshape(math.prod(batch.shape[: 1 + channel_axis]), channels, -1)
    # An odd step, or all would be of one column of a picture.
    some = split[:: len(split) // 64 + 1, :, :: split.shape[2] // 64 | 1].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # where `most` is 0 there is nothing positive
        fractions = np.where(some > 0, some / most.astype(np.float64)[:, None], 0)
    sums = [np.count_nonzero(fractions, axis=(0, 2)), *((fractions**power).sum(axis=(0, 2)) for power in range(1, 5))]
    return np.stack(sums) * most.astype(np.float64) ** np.arange(5)[:, None]


def quantise(values: Array, calibration: Calibration, out: npt.NDArray[np.uint8]) -> int:
    """Writes `values` (B, *sample) as uint8 into `out` (same shape, C-contiguous); returns how many saturated."""
    if values.size == 0:
        return 0
    if not out.flags.c_contiguous:
        raise ValueError("`out` is not C-contiguous")
    channels = values.shape[1 + calibration.axis]
    apart = (math.prod(values.shape[: 1 + calibration.axis]), channels, -1)
    values, out = values.reshape(apart), out.reshape(apart)
    scale, offset, bend = (array[:, None] for array in (calibration.scale, calibration.offset, calibration.bend))
    inverse = (np.float32(1) / scale).astype(np.float32)
    plain, even = not offset.any(), not bend.any()
    saturated = 0
    rows = max(1, _BLOCK // math.prod(values.shape[1:]))
    for start in range(0, len(values), rows):
        with np.errstate(over="ignore"):  # what lies so far outside saturates
            block = values[start : start + rows].astype(np.float32)  # a copy: worked on in place
            least, most = block.min(), block.max()
            if not (np.isfinite(least) and np.isfinite(most)):
                raise InvalidSamples("values that are not finite cannot be stored as uint8")
            if not plain:
                block -= offset
            block *= inverse
        if not even:
            np.clip(block, -1, 1023, out=block)  # beyond the ends the curve turns back
            block /= block * bend + np.float32(1)
        np.rint(block, out=block)
        least, most = block.min(), block.max()
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
        nan = (block & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        if nan.any():  # rounding up would carry some into the sign
            rounded[nan] = 0x7FC0
        np.copyto(flat[start : start + _BLOCK], rounded, casting="unsafe")


def from_bfloat16(stored: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The float32 values of bfloat16 kept in uint16, exactly."""
    return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)


def first_not_finite(stored: Array, dtype: str) -> int | None:
    """The row of the first sample in `stored` (N, ..., C-contiguous) with NaN or infinity in it, or None. `dtype`: as
    stored.
    """
    if dtype == "uint8" or stored.size == 0:
        return None
    signed, unsigned, infinity, sign = {
        "float32": (np.int32, np.uint32, 0x7F800000, 1 << 31),
        "float16": (np.int16, np.uint16, 0x7C00, 1 << 15),
        "bfloat16": (np.int16, np.uint16, 0x7F80, 1 << 15),
    }[dtype]
    # The bits of what is not finite are the largest of their sign: as signed numbers where they are positive, as
    # unsigned ones where they are negative. Maxima need no temporary, and where nothing is negative one is enough.
    positives, negatives = stored.view(signed), stored.view(unsigned)
    largest = negatives.max()
    if largest < infinity or (largest < sign + infinity and positives.max() < infinity):
        return None
    bad = (positives >= infinity) | (negatives >= sign + infinity)
    return int(np.argmax(bad.reshape(len(stored), -1).any(axis=1)))
