"""One shard file: inner chunks, each followed by its crc32c, then the index with its own (Zarr's sharding_indexed).

    chunk 0 | crc | chunk 1 | crc | … | index: (offset, length) uint64 pairs | crc

Everything here is about bytes in memory; the store writes and maps them. A shard's *seal* is the sha256 of all chunk
checksums in order and the index: 32 bytes in the commit record that tell this shard from every other without reading
its data, so that a good shard in the wrong place is found out too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numcodecs.blosc as blosc
import numcodecs.zstd as zstd
import numpy as np
import numpy.typing as npt

from activation_cache.store.files import Bytes

from .layout import Codec, Storage

# How many times its size an encoded chunk can decode to. Of lz4, a byte stands for at most 255; of zstd, a block of at
# least 4 bytes for at most 128 KiB.
_EXPANSION = {"none": 1, "lz4": 1 << 8, "zstd": 1 << 16}

ABSENT = np.uint64(2**64 - 1)  # both halves of the index entry of a chunk that is not there
CRC_BYTES = 4

# Blosc's own pool of threads is global and does not survive a fork; ours call it from threads of their own.
blosc.use_threads = False


@dataclass(frozen=True)
class Encoded:
    """A shard ready to be written: its bytes in `parts`, their total `size`, and its seal."""

    parts: Sequence[Bytes | bytes]
    size: int
    seal: str


@dataclass(frozen=True)
class Index:
    """Where the chunks of a shard lie: `offsets` and `lengths` (without crc), int64 of shape (chunks present,)."""

    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


class BadShard(Exception):
    """What is wrong with a shard's bytes, for whoever knows its name."""


def crc32c(data: Bytes | bytes) -> int:
    value: int = google_crc32c.value(data)
    return value


def encode(rows: npt.NDArray[Any], storage: Storage, chunk_rows: int, chunks_per_shard: int) -> Encoded:
    """The shard that holds `rows` (n, *row_shape), C-contiguous, in storage.stored. The last chunk is zero-padded.

    Uncompressed parts are views of `rows`: write them before `rows` changes.
    """
    row_bytes = rows.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))
    flat = rows.reshape(-1).view(np.uint8).reshape(len(rows), row_bytes)
    count = -(-len(rows) // chunk_rows)
    whole = chunk_rows * row_bytes
    parts: list[Bytes | bytes] = []
    lengths = np.empty(count, np.int64)
    checksums = np.empty(count, "<u4")
    for i in range(count):
        chunk = flat[i * chunk_rows : (i + 1) * chunk_rows].reshape(-1)
        if len(chunk) < whole:
            chunk = np.concatenate([chunk, np.zeros(whole - len(chunk), np.uint8)])
        data = _compress(chunk, storage)
        checksum = crc32c(data)
        checksums[i] = checksum
        lengths[i] = len(data)
        parts += [data, checksum.to_bytes(CRC_BYTES, "little")]
    index = np.full((chunks_per_shard, 2), ABSENT, "<u8")
    index[:count, 0] = np.concatenate([[0], np.cumsum(lengths + CRC_BYTES)[:-1]]) if count else []
    index[:count, 1] = lengths + CRC_BYTES
    tail = index.tobytes()
    tail += crc32c(tail).to_bytes(CRC_BYTES, "little")
    parts.append(tail)
    return Encoded(parts, int((lengths + CRC_BYTES).sum()) + len(tail), _seal(checksums, tail))


def most_decoded(codec: Codec, encoded: int) -> int:
    """Bytes that so many encoded ones can decode to."""
    return _EXPANSION[codec] * max(0, encoded)


def read_index(image: Bytes, chunks: int, chunks_per_shard: int, seal: str | None) -> Index:
    """The index of a shard whose first `chunks` chunks must be there, lying end to end, and no others.

    `seal`: compare with that of the record; None where there is none to compare with. Raises BadShard.
    """
    tail_bytes = 16 * chunks_per_shard + CRC_BYTES
    if len(image) < tail_bytes:
        raise BadShard(f"{len(image)} bytes are fewer than its index takes ({tail_bytes})")
    tail = image[-tail_bytes:].tobytes()
    if crc32c(tail[:-CRC_BYTES]) != int.from_bytes(tail[-CRC_BYTES:], "little"):
        raise BadShard("the checksum of its index does not match")
    entries = np.frombuffer(tail, "<u8", 2 * chunks_per_shard).reshape(chunks_per_shard, 2)
    ends = np.cumsum(entries[:chunks, 1])
    starts = np.concatenate([np.zeros(1, "<u8"), ends])[:chunks]
    if (
        (entries[chunks:] != ABSENT).any()
        or (entries[:chunks, 1] < CRC_BYTES).any()
        or (entries[:chunks, 1] > len(image)).any()
        or (entries[:chunks, 0] != starts).any()
        or (int(ends[-1]) if chunks else 0) + tail_bytes != len(image)
    ):
        raise BadShard("its index does not describe its chunks")
    offsets = entries[:chunks, 0].astype(np.int64)
    lengths = entries[:chunks, 1].astype(np.int64) - CRC_BYTES
    if seal is not None:
        checksums = image[(offsets + lengths)[:, None] + np.arange(CRC_BYTES)].reshape(-1)
        if _seal(checksums.view("<u4"), tail) != seal:
            raise BadShard("its checksums are not those that were recorded")
    return Index(offsets, lengths)


def check_chunks(index: Index, storage: Storage, chunk_bytes: int) -> None:
    """Make sure that each chunk is one of `chunk_bytes` decoded bytes, as far as its length and its header tell: an
    uncompressed one is read where it must lie, not where the index says. Raises BadShard.
    """
    if storage.codec == "none":
        if (index.lengths != chunk_bytes).any():
            raise BadShard(f"an uncompressed chunk has not the {chunk_bytes} bytes of its samples")
    elif len(index.lengths) and chunk_bytes > most_decoded(storage.codec, int(index.lengths.min())):
        raise BadShard(f"a chunk has too few bytes for the {chunk_bytes} that it decodes to")


def chunk_is_good(image: Bytes, index: Index, chunk: int) -> bool:
    """Whether a chunk's bytes match its crc32c."""
    start = index.offsets[chunk]
    stop = start + index.lengths[chunk]
    return crc32c(image[start:stop]) == int.from_bytes(image[stop : stop + CRC_BYTES].tobytes(), "little")


def decode_chunk(image: Bytes, index: Index, chunk: int, storage: Storage, out: Bytes) -> None:
    """Decodes a chunk into `out`, flat bytes of exactly the chunk's size. Raises BadShard."""
    data = image[index.offsets[chunk] : index.offsets[chunk] + index.lengths[chunk]]
    if storage.codec == "none":
        if len(data) != len(out):
            raise BadShard(f"chunk {chunk} has {len(data)} bytes instead of {len(out)}")
        out[:] = data
        return
    try:
        if storage.codec == "zstd":
            size = _zstd_size(data)
            if size == len(out):  # into a larger buffer it would decode without complaint
                zstd.decompress(data, out)
        elif _blosc_sizes(data) == (len(out), len(data)):  # blosc itself trusts its header
            blosc.decompress(data, out)
            size = len(out)
        else:
            size = _blosc_sizes(data)[0]
    except (RuntimeError, ValueError) as error:
        raise BadShard(f"chunk {chunk} does not decode: {error}") from error
    if size != len(out):
        raise BadShard(f"chunk {chunk} decodes to {size} bytes instead of {len(out)}")


def _zstd_size(data: Bytes) -> int:
    """Decoded bytes as a zstd frame's header gives them (RFC 8878, section 3.1.1.1); -1 where it does not."""
    head = data[:18].tobytes()
    if len(head) < 6 or head[:4] != b"\x28\xb5\x2f\xfd":
        return -1
    single_segment = head[4] >> 5 & 1
    width = (single_segment, 2, 4, 8)[head[4] >> 6]
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[head[4] & 3]
    if width == 0 or len(head) < start + width:
        return -1
    return int.from_bytes(head[start : start + width], "little") + (256 if width == 2 else 0)


def _blosc_sizes(data: Bytes) -> tuple[int, int]:
    """(decoded, encoded) bytes as a blosc header gives them; (-1, -1) where they are wrong."""
    if len(data) < 16:
        return -1, -1
    decoded, _, encoded = np.frombuffer(data[4:16].tobytes(), "<u4").tolist()
    return (decoded, encoded) if encoded == len(data) else (-1, -1)


def _compress(chunk: Bytes, storage: Storage) -> Bytes | bytes:
    if storage.codec == "none":
        return chunk
    if storage.codec == "zstd":
        data: bytes = zstd.compress(chunk, storage.level)
        return data
    typesize = storage.stored.itemsize
    data = blosc.compress(chunk, b"lz4", storage.level, blosc.NOSHUFFLE, 0, typesize)
    return data


def _seal(checksums: npt.NDArray[Any], tail: bytes) -> str:
    return hashlib.sha256(checksums.tobytes() + tail).hexdigest()
