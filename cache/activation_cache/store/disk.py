"""What a disk has free, and how much of that is left alone."""

from __future__ import annotations

import shutil
from pathlib import Path

MOST_RESERVED = 10 * 10**9


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk where a folder is, or would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def reserve_of(free: int) -> int:
    """Of so many free bytes, those that nobody asked to fill and that stay free: a twentieth, at most 10 GB."""
    return min(free // 20, MOST_RESERVED)


def free_needed(usable: int) -> int:
    """Free bytes that leave `usable` above the reserve."""
    return min(usable * 20 // 19 + 1, usable + MOST_RESERVED)
