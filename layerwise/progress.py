"""Who is told how the work goes. The trainer calls; `render` draws, and writes to trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

RESUMED = "resumed"
"""What `advance` says of units that an earlier sitting did: they tell nothing of speed."""


@dataclass(frozen=True)
class Step:
    """One update of modules that are trained together."""

    modules: Sequence[int]
    step: int
    """Updates done, this one included."""
    epoch: int
    """From 1."""
    losses: Sequence[float]
    """Of each module, nats."""
    samples: int
    """In the batch."""

    def told(self) -> str:
        return f"epoch {self.epoch}, loss {' '.join(f'{loss:.3f}' for loss in self.losses)}"


class Progress(Protocol):
    def note(self, text: str) -> None:
        """One line that a person should see."""

    def begin(self, title: str, total: int, unit: str) -> None:
        """A piece of work begins: so many `unit` (updates, samples)."""

    def advance(self, amount: int, samples: int, detail: str) -> None:
        """So many more units done, and samples gone through in doing so; `detail` says what the last one gave."""

    def training(self, modules: Sequence[int], step: int, whole: int) -> None:
        """A training of these modules begins, or resumes behind `step` updates, of which `whole` make whole epochs.
        What was told of later updates, and of later epochs, is told again.
        """

    def step(self, done: Step) -> None:
        """An update is done."""

    def flush(self) -> None:
        """What was told so far will not be told again: it must outlast a kill. Called before each checkpoint."""

    def epoch(self, numbers: Sequence[int], record: Mapping[str, Any]) -> None:
        """An epoch of these modules is over."""

    def measured(self, of: str, number: int, values: Mapping[str, float]) -> None:
        """Results `of` a piece of work ("probe", "memory") on module `number`; they replace earlier ones."""

    def picture(self, name: str, png: bytes) -> None:
        """A picture of the whole run, which replaces an earlier one of this name."""

    def end(self) -> None:
        """The piece of work is done."""


class Silent:
    """Tells nobody."""

    def note(self, text: str) -> None: ...

    def begin(self, title: str, total: int, unit: str) -> None: ...

    def advance(self, amount: int, samples: int, detail: str) -> None: ...

    def training(self, modules: Sequence[int], step: int, whole: int) -> None:
        if step:
            self.advance(step, 0, RESUMED)

    def step(self, done: Step) -> None:
        self.advance(1, done.samples, done.told())

    def flush(self) -> None: ...

    def epoch(self, numbers: Sequence[int], record: Mapping[str, Any]) -> None: ...

    def measured(self, of: str, number: int, values: Mapping[str, float]) -> None: ...

    def picture(self, name: str, png: bytes) -> None: ...

    def end(self) -> None: ...


SILENT = Silent()
