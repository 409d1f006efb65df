"""How a rolling window on a module's outputs rolls, as the run notes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerwise.files.records import WINDOW, read_record


@dataclass(frozen=True)
class Rolling:
    """How a window rolls. Its size is settled when it is first written, so that a training can be resumed to the bit:
    what is free on the disk changes.
    """

    slots: int
    slot_samples: int
    epochs: int
    """epochs between two turns"""

    @property
    def identity(self) -> dict[str, int]:
        return asdict(self)

    @property
    def samples(self) -> int:
        """In the window at any time."""
        return self.slots * self.slot_samples

    def same_size(self, window: Mapping[str, Any] | None) -> bool:
        """Whether a window of this `identity` is as large."""
        return window is not None and (window.get("slots"), window.get("slot_samples")) == (
            self.slots,
            self.slot_samples,
        )


def note_of(caches: Path, number: int) -> Path:
    """The file that says how the window on module `number`'s outputs rolls, if there is one."""
    return caches / f"{number}.window.json"


def rolling_at(note: Path, budget: int | None, renew: bool, epochs: int, least: int) -> Rolling | None:
    """How the window of this note rolls for a recipe of such settings; None where there is none, or where it was
    settled for another budget or `renew`, or holds fewer than `least` samples.
    """
    known = read_record(note, WINDOW)
    if known is None or (known["budget"], known.get("renew", False)) != (budget, renew):
        return None
    rolling = Rolling(known["slots"], known["slot_samples"], epochs)
    return rolling if rolling.samples >= least else None
