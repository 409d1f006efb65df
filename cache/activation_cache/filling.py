"""Samples on their way into shards: which are still to come, whether they are in order, and the shard being filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidSamples
from .layout import Grid, SplitSpec, Storage

Array = npt.NDArray[Any]


@dataclass
class Filling:
    """A shard being filled: rows in `buffer`, raw bytes that `dtype` says how to read."""

    shard: int
    samples: range
    grid: Grid
    buffer: npt.NDArray[np.uint8]
    dtype: np.dtype[Any]
    used: int = 0
    ids: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    labels: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return len(self.ids) == len(self.samples)

    def rows(self) -> Array:
        """What was added so far, (rows, *row_shape), in `dtype`; a view."""
        return self._rows(0, self.used)

    def add(self, samples: Array | list[Array], ids: Sequence[str], labels: Mapping[str, list[Any]]) -> None:
        """Copies samples behind the others: rows (B, *row_shape), or for ragged samples the rows of each."""
        with np.errstate(over="ignore"):  # what overflows becomes infinite, and is refused before it is written
            for rows in [samples] if isinstance(samples, np.ndarray) else samples:
                np.copyto(self._rows(self.used, self.used + len(rows)), rows, casting="same_kind")
                self.used += len(rows)
                if not isinstance(samples, np.ndarray):
                    self.lengths.append(len(rows))
        self.ids += ids
        for name, values in labels.items():
            self.labels.setdefault(name, []).extend(values)

    def sample_of_row(self, row: int) -> str:
        """The id of the sample to which a row belongs."""
        ragged = self.grid.ragged_axis is not None
        return self.ids[int(np.searchsorted(np.cumsum(self.lengths), row, "right")) if ragged else row]

    def _rows(self, start: int, stop: int) -> Array:
        row = int(np.prod(self.grid.row_shape, dtype=np.int64))
        usable = len(self.buffer) // self.dtype.itemsize * self.dtype.itemsize
        flat = self.buffer[:usable].view(self.dtype)
        return flat[start * row : stop * row].reshape(stop - start, *self.grid.row_shape)


@dataclass
class Track:
    """One view of one split: which of this rank's shards are still to come, and the one being filled."""

    spec: SplitSpec
    view: int
    grid: Grid
    shards: list[int]
    seen: set[str]
    open: Filling | None = None

    def pending(self) -> list[range]:
        """The samples still to be appended, as ranges in order."""
        ranges: list[range] = []
        start = self.open.samples.start + len(self.open.ids) if self.open else None
        for shard in ([self.open.shard] if self.open else []) + self.shards:
            samples = self.grid.shard_range(shard)
            if start is not None:
                samples, start = range(start, samples.stop), None
            if ranges and ranges[-1].stop == samples.start:
                ranges[-1] = range(ranges[-1].start, samples.stop)
            else:
                ranges.append(samples)
        return ranges

    def rows_of(
        self, values: Array | Sequence[Array], ids: Sequence[str], labels: Mapping[str, Any], storage: Storage
    ) -> Array | list[Array]:
        """The next samples as rows that can be copied into a shard, and their ids as seen.

        Raises InvalidSamples unless everything about them is in order.
        """
        spec, name = self.spec, f"split {self.spec.name!r}, view {self.view}"
        left = sum(map(len, self.pending()))
        if len(ids) > left:
            raise InvalidSamples(f"{name}: {len(ids)} samples were appended, and only {left} are still to come")
        wanted = set(spec.labels) if self.view == 0 else set()
        if (set(labels) != wanted and self.view == 0) or not set(labels) <= set(spec.labels):
            raise InvalidSamples(f"{name}: labels {sorted(labels)} were given, {sorted(spec.labels)} are wanted")
        for what, given in (("values", values), *labels.items()):
            if len(given) != len(ids):
                raise InvalidSamples(f"{name}: {len(ids)} ids were given, and {len(given)} {what}")
        for one in ids:
            if one in self.seen:
                raise InvalidSamples(f"{name}: the id {one!r} was appended before; is the position right?")
            self.seen.add(one)
        rows: Array | list[Array]
        if self.grid.ragged_axis is None:
            rows = np.asarray(values)
            if rows.shape[1:] != spec.shape:
                raise InvalidSamples(f"{name}: samples have shape {spec.shape}, got {rows.shape[1:]}")
            dtypes = {rows.dtype}
        else:
            rows = []
            for one, value in zip(ids, values, strict=True):
                array = np.asarray(value)
                fits = array.ndim == len(spec.shape) and all(
                    have == want if want is not None else have <= (spec.longest or 0)
                    for have, want in zip(array.shape, spec.shape, strict=True)
                )
                if not fits:
                    raise InvalidSamples(
                        f"{name}: sample {one!r} has shape {array.shape}; planned is {spec.shape} with at most "
                        f"{spec.longest} on the ragged axis"
                    )
                rows.append(np.moveaxis(array, self.grid.ragged_axis, 0))
            dtypes = {row.dtype for row in rows}
        for dtype in dtypes:
            if dtype.kind != "f" and dtype != storage.stored:
                raise InvalidSamples(f"{name}: {dtype} cannot be stored as {storage.dtype}")
        return rows


def plain_labels(values: Any, dtype: str) -> list[Any]:
    """Labels as plain numbers for the journal, exactly as `dtype` holds them. Raises InvalidSamples where it cannot."""

    def convert(value: Any, ndim: int) -> list[Any]:
        given = np.asarray(value)
        kept = given.astype(dtype.removesuffix("[]"))
        exact = kept.dtype.kind == "f" or np.array_equal(given, kept)  # floats may round, integers may not wrap
        if given.ndim != ndim or not exact:
            raise InvalidSamples(f"labels {given.ravel()[:8]}… of shape {given.shape} are not what {dtype} holds")
        plain: list[Any] = kept.tolist()
        return plain

    return [convert(value, 1) for value in values] if dtype.endswith("[]") else convert(values, 1)
