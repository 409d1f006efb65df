"""Many files, one stretch of memory: maps the shards of an array into slots of equal size.

With every shard at `slot * number`, the address of any sample is a multiplication away, and one vectorised gather
reaches samples of all shards at once. Python's own mmap cannot place a map, so the C library's is called; the slots
lie inside an anonymous reservation that Python's mmap owns, and that takes them along when the last array on it goes.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

import numpy as np

from activation_cache.errors import DoesNotFit, StoreError
from activation_cache.store.files import Bytes, open_regular

# Where the page cache holds a file in pages of this size, and its map begins at a multiple of it, the kernel maps them
# as they are, and a gather misses the TLB far less often.
HUGE_PAGE = 2 << 20

_MAP_FIXED = 0x10  # on Linux and macOS alike
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)


class Region:
    """`slots` read-only slots of `slot_bytes` each; `bytes` shows them all as uint8 of shape (slots * slot_bytes,).

    Only what was mapped may be read: touching the rest ends the process. So does a file that is truncated while it is
    mapped, which no writer of this package does.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        assert slot_bytes % mmap.PAGESIZE == 0
        self.slot_bytes = slot_bytes
        size, spare = max(1, slots) * slot_bytes, HUGE_PAGE if slot_bytes >= HUGE_PAGE else 0
        reserve = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            reserved = np.frombuffer(mmap.mmap(-1, size + spare, flags=reserve, prot=0), np.uint8)
        except (OSError, OverflowError, MemoryError) as error:
            raise DoesNotFit(
                f"mapping {size:,} bytes of shards failed: {error}; raise the limit on the address space of this "
                "process (ulimit -v), or read fewer caches at a time in it",
                needed=size,
            ) from error
        start = -reserved.ctypes.data % HUGE_PAGE if spare else 0
        self.bytes: Bytes = reserved[start : start + size]

    def map(self, slot: int, path: Path) -> Bytes:
        """Maps a file into a slot and returns its bytes.

        Raises FileNotFoundError, NotARegularFile, ValueError if it is too large, DoesNotFit or StoreError.
        """
        descriptor = open_regular(path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            if size > self.slot_bytes:
                raise ValueError(f"{path} has {size} bytes, more than the {self.slot_bytes} of its slot")
            start = slot * self.slot_bytes
            if size:
                address = self.bytes.ctypes.data + start
                # The whole slot, though the file ends before: a system allows only so many maps, and gaps count.
                whole, flags = self.slot_bytes, mmap.MAP_SHARED | _MAP_FIXED
                if _libc.mmap(address, whole, mmap.PROT_READ, flags, descriptor, 0) != address:
                    code = ctypes.get_errno()
                    if code == errno.ENOMEM:
                        raise DoesNotFit(
                            f"mapping {path} ({size:,} bytes) failed: {os.strerror(code)}; raise the limit on the maps "
                            "of a process (on Linux, vm.max_map_count), or read fewer caches at a time in it",
                            str(path),
                            size,
                        )
                    raise StoreError(f"{path} cannot be mapped: {os.strerror(code)}")
            return self.bytes[start : start + size]
        finally:
            os.close(descriptor)


def whole_pages(size: int, multiple_of: int = 1) -> int:
    """The least size that holds `size` bytes, in whole pages and in whole items of `multiple_of` bytes. The pages are
    huge ones where `size` reaches one and there are no items: a common multiple of both would be too large.
    """
    page = HUGE_PAGE if size >= HUGE_PAGE and multiple_of == 1 else mmap.PAGESIZE
    step = int(np.lcm(page, multiple_of))
    return max(1, -(-size // step)) * step
