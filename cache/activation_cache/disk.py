"""What a disk has free, and how much of that is left alone."""

from __future__ import annotations

import shutil
from pathlib import Path


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk where a folder is, or would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def reserve_of(free: int) -> int:
    """Of so many free bytes, those that nobody asked to fill and that stay free: a twentieth, at most 10 GB."""
    return min(free // 20, 10 * 10**9)
