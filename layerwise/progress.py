"""Who is told how the work goes. The trainer calls; `render` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Progress(Protocol):
    def note(self, text: str) -> None:
        """One line that a person should see."""

    def begin(self, title: str, total: int, unit: str) -> None:
        """A piece of work begins: so many `unit` (updates, samples)."""

    def advance(self, amount: int, samples: int, detail: str) -> None:
        """So many more units done, and samples gone through in doing so; `detail` says what the last one gave."""

    def epoch(self, numbers: Sequence[int], record: Mapping[str, Any]) -> None:
        """An epoch of these modules is over."""

    def end(self) -> None:
        """The piece of work is done."""


class Silent:
    """Tells nobody."""

    def note(self, text: str) -> None: ...

    def begin(self, title: str, total: int, unit: str) -> None: ...

    def advance(self, amount: int, samples: int, detail: str) -> None: ...

    def epoch(self, numbers: Sequence[int], record: Mapping[str, Any]) -> None: ...

    def end(self) -> None: ...


SILENT = Silent()
