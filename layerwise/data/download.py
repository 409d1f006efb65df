"""Fetch a dataset's archive, so that an interrupted transfer goes on, and unpack it without trusting its names."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import shutil
import ssl
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from activation_cache.store.files import open_regular
from layerwise.errors import DamagedData, NotReady, WillNotFit
from layerwise.progress import Progress

BLOCK = 1 << 20  # bytes
FETCHED = ".part"
"""How the name of an archive ends that was fetched, or begun to be."""
TRIES = 5  # attempts in a row that brought no byte


@dataclass(frozen=True)
class Archive:
    """A published file, and the hash that tells it from any other."""

    urls: tuple[str, ...]
    """Addresses of the same file, in the order in which they are tried; whichever answers, `sha256` decides."""
    size: int
    """Bytes."""
    sha256: str
    unpacked: int
    """Bytes that its contents take, about."""

    @property
    def name(self) -> str:
        return self.urls[0].rpartition("/")[2]


def fetch(archive: Archive, folder: Path, progress: Progress, wait: Callable[[float], None] = time.sleep) -> Path:
    """The archive in `folder`, checked: the one that the user put there, or else one that is fetched, or what is
    missing of it. `discard` removes it once it is unpacked.

    Raises:
        WillNotFit: the disk has no room for it and its contents.
        NotReady: no server could be reached; what came is kept.
        DamagedData: what came is not what was published.
    """
    target = folder / archive.name
    part = target.with_name(target.name + FETCHED)
    if part.is_symlink():
        raise DamagedData(f"{part} is a link, and downloads never go through links: move it away")
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        have = _bytes_in(part)
        _require_space(folder, archive.size - have + archive.unpacked)
        progress.begin(f"fetch {archive.name}", archive.size, "bytes")
        progress.advance(have, 0, "")
        try:
            _fetch_rest(archive, part, progress, wait)
        finally:
            progress.end()
    source = target if target.exists() else part
    _check(archive, source, progress)
    return source


def discard(archive: Path) -> None:
    """Remove an archive that `fetch` has fetched; one that the user put there stays."""
    if archive.name.endswith(FETCHED):
        archive.unlink()


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WillNotFit(f"{folder} has {free:,} bytes free, and the archive and its contents take {needed:,} more")


def _fetch_rest(archive: Archive, part: Path, progress: Progress, wait: Callable[[float], None]) -> None:
    urls, errors, failures = list(archive.urls), {}, 0
    while (have := _bytes_in(part)) < archive.size:
        try:
            _transfer(urls[0], archive.size, part, have, progress)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise WillNotFit(
                    f"the disk is full: {part} has {_bytes_in(part):,} of {archive.size:,} bytes"
                ) from error
            now = _bytes_in(part)
            failures = failures + 1 if now == have else 1
            if now == have:  # the next address is tried after it, and this one again unless it refused
                url = urls.pop(0)
                errors[url] = error
                urls += [] if _is_refusal(error) else [url]
            if failures >= TRIES or not urls:
                tried = "; ".join(f"{url} could not be fetched: {error}" for url, error in errors.items())
                raise NotReady(
                    f"{tried}. {now:,} of {archive.size:,} bytes are in {part}; the same command resumes from there"
                ) from error
            wait(2.0**failures)


def _is_refusal(error: Exception) -> bool:
    """Whether the same address would answer the same again: it refused, or its certificate is bad."""
    if isinstance(error, urllib.error.HTTPError):
        return 400 <= error.code < 500
    return isinstance(error, urllib.error.URLError) and isinstance(error.reason, ssl.SSLCertVerificationError)


def _bytes_in(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _transfer(url: str, size: int, part: Path, have: int, progress: Progress) -> None:
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        resumes = response.status == 206
        if have and not resumes:  # the server gives the whole file: begin again
            progress.advance(-have, 0, "")
        begin = os.O_APPEND if resumes else os.O_TRUNC
        with open(open_regular(part, os.O_WRONLY | os.O_CREAT | begin), "ab") as file:
            while block := response.read(BLOCK):
                file.write(block)
                progress.advance(len(block), 0, "")
    if part.stat().st_size < size:  # http.client does not mind
        raise ConnectionError("the connection closed too early")


def _check(archive: Archive, path: Path, progress: Progress) -> None:
    size = path.stat().st_size
    if size == archive.size:
        digest = hashlib.sha256()
        progress.begin(f"check {archive.name}", size, "bytes")
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                progress.advance(len(block), 0, "")
        progress.end()
        if digest.hexdigest() == archive.sha256:
            return
        found = f"its sha256 is {digest.hexdigest()}, but it should be {archive.sha256}"
    else:
        found = f"it has {size:,} bytes, and {archive.size:,} were published"
    advice = "Move it away, and it is fetched; or replace it by the right file"
    if path.name.endswith(FETCHED):
        path.unlink()
        advice = "It is deleted; the same command fetches it again"
    raise DamagedData(f"{path} is not the file that {archive.urls[0]} should give: {found}. {advice}")


def unpack(path: Path, folder: Path, progress: Progress) -> None:
    """Unpack a .tar.gz into `folder`, each file whole or absent.

    Raises:
        DamagedData: it is cut short, is no archive, or holds names or kinds of files that point out of the folder.
        WillNotFit: the disk is full.
    """
    staging = folder / f".{path.name}.unpacking"
    if staging.is_symlink():  # nothing is unpacked through it
        staging.unlink()
    shutil.rmtree(staging, ignore_errors=True)
    progress.begin(f"unpack {path.name}", path.stat().st_size, "bytes")
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:gz") as archive:
            read = 0
            for member in archive:
                archive.extract(member, staging, filter="data")
                read, before = file.tell(), read
                progress.advance(read - before, 0, member.name)
        for unpacked in sorted(staging.rglob("*")):
            if unpacked.is_file():
                place = folder / unpacked.relative_to(staging)
                place.parent.mkdir(parents=True, exist_ok=True)
                unpacked.replace(place)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise WillNotFit(f"the disk is full while {path} was unpacked into {folder}") from error
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedData(f"{path} cannot be unpacked: {error}. Delete it and fetch it again") from error
    finally:
        progress.end()
        shutil.rmtree(staging, ignore_errors=True)
