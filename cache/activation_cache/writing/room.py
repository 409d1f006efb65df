"""What a writer may still take: of the disk all but a reserve, and of a budget what its cache leaves."""

from __future__ import annotations

import threading

from activation_cache.errors import DoesNotFit
from activation_cache.store.base import Store


class Room:
    """Counts the bytes of a cache while it is written. Safe to use from several threads.

    reserve   bytes of the disk to leave free
    budget    bytes that all files of the cache together may take; None: as many as the disk has. Each of several
              ranks may add an equal share of what the budget leaves when it begins.
    """

    def __init__(self, store: Store, reserve: int, budget: int | None, world_size: int) -> None:
        self._store, self._reserve, self._budget = store, reserve, budget
        self._left = 0 if budget is None else (budget - sum(size for _, size in store.list())) // world_size
        self._counting = threading.Lock()

    def take(self, path: str, needed: int) -> None:
        """Count a file that is about to be written, or to replace another. Raises DoesNotFit, and counts nothing."""
        where, free = self._store.location, self._store.free()
        if free is not None and free < needed + self._reserve:
            raise DoesNotFit(
                f"{where}: {path} takes {needed:,} bytes, and {free:,} are free, of which {self._reserve:,} are to "
                "stay free; make room and write again, and it goes on from here",
                path,
                needed,
                free,
            )
        if self._budget is None:
            return
        more = needed - (self._store.size(path) or 0)
        with self._counting:
            if more > self._left:
                raise DoesNotFit(
                    f"{where}: {path} takes {needed:,} bytes, and of the budget of {self._budget:,} bytes "
                    f"{max(0, self._left):,} are left; raise the budget and write again, and it goes on from here, "
                    "or store less: fewer samples, a smaller dtype, a codec",
                    path,
                    needed,
                    max(0, self._left),
                )
            self._left -= more
