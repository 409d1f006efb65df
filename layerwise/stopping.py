"""Cooperative cancellation: turns SIGINT and SIGTERM into a clean stop between steps."""

from __future__ import annotations

import signal
import threading
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


@contextmanager
def signals_wait() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM after the block instead of within it; a second one ends the process at once.

    For short work in which C++ code calls Python where it can take no exception, as torch does for fake tensors: a
    KeyboardInterrupt there would end the process with SIGABRT.
    """
    if threading.current_thread() is not threading.main_thread():  # no signal is handled in another
        yield
        return
    waiting: list[int] = []

    def note(number: int, _: object) -> None:
        if waiting:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        waiting.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for late in waiting:
        signal.raise_signal(late)
