"""Samples on their way into shards: which are still to come, whether they are in order, and the shard being filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from activation_cache.errors import InvalidSamples
from activation_cache.format.layout import Grid, SplitSpec, Storage

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


@dataclass(frozen=True)
class Checked:
    """Samples in which everything is in order: their rows, their labels as plain numbers, the dtype of the buffer."""

    rows: Array | list[Array]
    labels: dict[str, list[Any]]
    dtype: np.dtype[Any]


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

    def checked(
        self, values: Array | Sequence[Array], ids: Sequence[str], labels: Mapping[str, Any], storage: Storage
    ) -> Checked:
        """The next samples in the form in which they are put into a shard; their ids count as seen from here on.

        Raises InvalidSamples unless everything about them is in order; then nothing has changed.
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
        new: set[str] = set()
        for one in ids:
            if not isinstance(one, str) or not _is_text(one):
                raise InvalidSamples(f"{name}: the id {one!r} cannot be written as UTF-8; ids are plain text")
            if one in self.seen or one in new:
                raise InvalidSamples(f"{name}: the id {one!r} was appended before; is the position right?")
            new.add(one)
        plain = {label: plain_labels(labels[label], spec.labels[label]) for label in wanted}
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
        # Converted in the background, not while the caller waits; except from float64, which nobody computes in.
        kept = {d if d in (storage.stored, np.float16, np.float32) else np.dtype(np.float32) for d in dtypes}
        if self.open is not None:
            kept.add(self.open.dtype)
        if len(kept) > 1:
            raise InvalidSamples(
                f"{name}: samples of one shard have one dtype, got {', '.join(sorted(map(str, kept)))}"
            )
        self.seen |= new
        return Checked(rows, plain, kept.pop() if kept else np.dtype(np.float32))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as in file names that are not UTF-8
        return False
    return True


def plain_labels(values: Any, dtype: str) -> list[Any]:
    """Labels as plain numbers for the journal, exactly as `dtype` holds them. Raises InvalidSamples where it cannot."""

    def convert(value: Any, ndim: int) -> list[Any]:
        try:
            given = np.asarray(value)
            with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is refused below
                kept = given.astype(dtype.removesuffix("[]"))
        except (ValueError, TypeError, OverflowError) as error:
            raise InvalidSamples(f"labels are not what {dtype} holds: {error}") from error
        # Floats may round but not be NaN or infinite, integers may not wrap.
        exact = np.isfinite(kept).all() if kept.dtype.kind == "f" else np.array_equal(given, kept)
        if given.ndim != ndim or not exact:
            raise InvalidSamples(f"labels {given.ravel()[:8]}… of shape {given.shape} are not what {dtype} holds")
        plain: list[Any] = kept.tolist()
        return plain

    return [convert(value, 1) for value in values] if dtype.endswith("[]") else convert(values, 1)
