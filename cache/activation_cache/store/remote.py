"""The byte layer on an object store: s3://, gs://, az:// through obstore (the extra `remote`).

What is written here is written once and whole, which is what object stores do well. Shards are fetched whole when one
of their samples is first wanted, kept in a local folder for the epochs to come, and mapped from there like those of a
local cache; what was used longest ago makes room there. There is no lock: two writers of one key
write the same bytes, two of different keys are told apart by the plan, which only one of them can create, and so is
the commit record.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from activation_cache.errors import StoreError

from .disk import free_bytes, reserve_of
from .files import Bytes

ATTEMPTS = 6  # of a request; every request made here may be repeated
_COPY = re.compile(r"[0-9a-f]{64}(\.\d+\.\d+)?")  # the name of a copy, or of one that is not whole yet
_PART = 5 << 20  # bytes of a part of an upload; what is larger is put in parts
CREDENTIALS = {  # scheme -> what tells who we are, unless `options` do
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or the machine's identity",
}


class RemoteStore:
    """A prefix of a bucket.

    url      s3://bucket/prefix, gs://… or az://…; credentials and endpoint come from the environment, as for the
             provider's own tools, or from `options` (obstore's configuration of that store)
    folder   where fetched shards are kept, of this URL and of others; one in the user's cache directory by default
    limit    bytes that may lie in `folder`; None: what its disk has free, less a reserve. An epoch in random order
             wants all shards: with less room than they take, many are fetched again and again.

    Picklable: connections are made anew in another process.
    """

    def __init__(
        self, url: str, *, folder: str | Path | None = None, limit: int | None = None, options: Mapping[str, Any] = {}
    ) -> None:
        self._url, self._options, self._limit = url.rstrip("/"), dict(options), limit
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "activation_cache"
        self.folder = Path(folder if folder is not None else home) / hashlib.sha256(self._url.encode()).hexdigest()[:16]
        self._connection: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._url, self.folder.parent, self._limit, self._options)

    @property
    def location(self) -> str:
        return self._url

    def size(self, path: str) -> int | None:
        try:
            return int(self._call("looking for", path, lambda ob, store: ob.head(store, path)["size"]))
        except FileNotFoundError:
            return None

    def read(self, path: str) -> bytes:
        data: bytes = self._call("reading", path, lambda ob, store: ob.get(store, path).bytes().to_bytes())
        return data

    def local(self, path: str, version: str = "") -> Path:
        kept = self._kept(path, version)
        try:
            os.utime(kept)  # used just now: others make room first
        except OSError:  # not there, or the folder is none: then `_keep` says so
            self._keep(kept, self.read(path))
        return kept

    @property
    def limit(self) -> int:
        if self._limit is not None:
            return self._limit
        free = free_bytes(self.folder)
        return free - reserve_of(free) + sum(size for _, _, size in self._copies())

    def forget(self, path: str, version: str = "") -> None:
        with suppress(OSError):  # there is none
            self._kept(path, version).unlink()

    def write(self, path: str, parts: Sequence[Bytes | bytes]) -> None:
        self.forget(path)
        data = b"".join(bytes(part) for part in parts)
        put = self._call("writing", path, lambda ob, store: ob.put(store, path, data, chunk_size=_PART))
        self._require_arrived(path, data, put)

    def begin(self, path: str, parts: Sequence[Bytes | bytes]) -> Callable[[], None]:
        return partial(self.write, path, parts)

    def create(self, path: str, data: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            put = self._call("creating", path, lambda ob, store: ob.put(store, path, data, mode="create"))
        except (AlreadyExistsError, PreconditionError):
            # Either somebody was first, or a first attempt of ours arrived and its answer was lost.
            return self.read(path) == data
        try:
            self._require_arrived(path, data, put)
        except BaseException:  # a file that may be damaged holds nobody up: the next writer creates it
            with suppress(StoreError):
                self.delete(path)
            raise
        return True

    def _require_arrived(self, path: str, data: bytes, put: Mapping[str, Any]) -> None:
        """Make sure that what was put at `path` is `data`, putting it again where it is not. Raises StoreError.

        An entity tag that is the MD5 of the content proves it; where it proves nothing (Azure, or a bucket with keys
        of its own), the file is read back.
        """
        for _ in range(ATTEMPTS):
            tag = (put.get("e_tag") or "").strip('"')
            if tag == _tag(data, in_parts="-" in tag) or self._holds(path, data):
                return
            put = self._call("writing", path, lambda ob, store: ob.put(store, path, data, chunk_size=_PART))
        if not self._holds(path, data):
            raise StoreError(
                f"{self._url}/{path} arrives altered, {ATTEMPTS} times in a row; the network or the store is at fault: "
                "write again when it is mended, and it goes on from here"
            )

    def _holds(self, path: str, data: bytes) -> bool:
        try:
            return self.read(path) == data
        except FileNotFoundError:
            return False

    def delete(self, path: str) -> None:
        self.forget(path)
        with suppress(FileNotFoundError):
            self._call("deleting", path, lambda ob, store: ob.delete(store, path))

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        folder = f"{prefix.rstrip('/')}/" if prefix else None
        found = self._call("listing", prefix, lambda ob, store: [x for page in ob.list(store, folder) for x in page])
        yield from ((entry["path"], int(entry["size"])) for entry in found)

    def clear(self, is_ours: Callable[[str], bool]) -> None:
        """Nothing: there are no folders here."""

    def free(self) -> None:
        return None

    def lock(self, rank: int, world_size: int) -> Callable[[], None]:
        return lambda: None

    def _kept(self, path: str, version: str = "") -> Path:
        return self.folder / hashlib.sha256(f"{path} {version}".encode()).hexdigest()

    def _keep(self, kept: Path, data: bytes) -> None:
        """Puts a copy into the folder, and removes from it what was used longest ago, as far as the limit asks."""
        copies = sorted(self._copies())
        excess = sum(size for _, _, size in copies) + len(data) - self.limit
        for _, copy, size in copies:
            if excess <= 0:
                break
            copy.unlink(missing_ok=True)  # whoever has it mapped keeps it mapped
            excess -= size
        temporary = kept.with_name(f"{kept.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            with suppress(FileNotFoundError):  # another process made room already: who maps it fetches it again
                os.replace(temporary, kept)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise StoreError(
                f"a shard of {self._url} ({len(data):,} bytes) cannot be kept in {self.folder.parent}: "
                f"{error.strerror}; make room there"
            ) from error

    def _copies(self) -> Sequence[tuple[float, Path, int]]:
        """(time of last use, file, bytes) of all copies in the folder, of any URL."""
        found = []
        for copy in self.folder.parent.glob("[0-9a-f]" * 16 + "/*"):
            with suppress(FileNotFoundError):  # another process removed it
                known = copy.lstat()
                if not (_COPY.fullmatch(copy.name) and stat.S_ISREG(known.st_mode)):
                    continue  # somebody else's: neither counted nor removed
                found.append((known.st_mtime, copy, known.st_size))
        return found

    def _call(self, doing: str, path: str, request: Callable[[Any, Any], Any]) -> Any:
        """A request, with what can go wrong with it as this package's errors. Raises FileNotFoundError, StoreError."""
        try:
            import obstore
            from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError
        except ImportError as error:
            raise StoreError(f"{self._url} needs obstore; install it with: pip install 'layerwise[remote]'") from error
        try:
            if self._connection is None:
                self._connection = self._connect()
            return request(obstore, self._connection)
        except (NotFoundError, FileNotFoundError) as error:
            raise FileNotFoundError(f"{self._url}/{path}") from error
        except (AlreadyExistsError, PreconditionError):
            raise
        except (BaseError, OSError, ValueError) as error:
            raise StoreError(
                f"{doing} {self._url}/{path} failed after up to {ATTEMPTS} attempts: {_first_line(error)}; "
                "check the network, the address and the credentials, and try again: what was finished is kept"
            ) from error

    def _connect(self) -> Any:
        """The connection, which asks for nothing yet. Raises StoreError for an address or credentials of no use."""
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        backoff = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2}
        retry = {"max_retries": ATTEMPTS - 1, "backoff": backoff, "retry_timeout": timedelta(minutes=3)}
        try:
            return from_url(self._url, **{"retry_config": retry, **self._options})
        except (BaseError, OSError, ValueError) as error:
            known = CREDENTIALS.get(self._url.partition("://")[0])
            todo = f"its credentials come from {known}" if known else f"known are {', '.join(CREDENTIALS)}"
            raise StoreError(f"{self._url} cannot be opened: {_first_line(error)}; {todo}") from error


def _tag(data: bytes, in_parts: bool) -> str:
    """The entity tag that S3 gives this content: put at once, or in parts of _PART bytes."""

    def md5(part: bytes | memoryview) -> Any:
        return hashlib.md5(part, usedforsecurity=False)

    if not in_parts:
        return str(md5(data).hexdigest())
    parts = [md5(memoryview(data)[at : at + _PART]).digest() for at in range(0, len(data), _PART)]
    return f"{md5(b''.join(parts)).hexdigest()}-{len(parts)}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _restore(url: str, folder: Path, limit: int | None, options: Mapping[str, Any]) -> RemoteStore:
    return RemoteStore(url, folder=folder, limit=limit, options=options)
