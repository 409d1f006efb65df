"""The wish to stop, on its way from a signal to the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Stopping:
    """Asked whether to stop, answers; outside of `at_steps` it does not wait to be asked.

    Nearly all work may end anywhere: files appear whole or not at all, and what is finished is found again. A
    training may too, but saves more if it ends between two steps.
    """

    def __init__(self) -> None:
        self.asked = False
        self._waits = False

    def __call__(self) -> bool:
        return self.asked

    def ask(self) -> bool:
        """Stop here, or at the next step; whether it is the latter.

        Raises:
            KeyboardInterrupt: here.
        """
        self.asked = True
        if not self._waits:
            raise KeyboardInterrupt
        return True

    @contextmanager
    def at_steps(self) -> Iterator[None]:
        """Within the block the work itself asks, after each step."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        if self.asked:  # behind the last step
            raise KeyboardInterrupt
