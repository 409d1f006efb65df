"""Doing the next pieces of work in threads while the current one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(read: Callable[[Item], Result], items: Sequence[Item], readers: int) -> Iterator[Result]:
    """`map` in the same order, with a few results being made by threads ahead of the one that is asked for."""
    with ThreadPoolExecutor(max_workers=readers) as pool:
        pending: deque[Future[Result]] = deque()
        remaining = iter(items)
        try:
            for item in remaining:
                pending.append(pool.submit(read, item))
                if len(pending) > readers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
