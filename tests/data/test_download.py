from __future__ import annotations

import hashlib
import http.server
import io
import ssl
import tarfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerwise.data import download, librispeech, stl10
from layerwise.data.download import Archive, discard, fetch, unpack
from layerwise.errors import DamagedData, NotReady, WillNotFit
from layerwise.progress import SILENT, Silent

CONTENT = bytes(range(256)) * 5000


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` on loopback, and breaks off after `breaks` bytes, each value once."""

    def __init__(self, content: bytes, *, ranges: bool = True, breaks: tuple[int, ...] = ()) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.breaks = content, ranges, list(breaks)
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/a.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        if not self.server.content:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        body = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.breaks:
            body = body[: self.server.breaks.pop(0)]
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def serve() -> Iterator[Any]:
    servers: list[Server] = []

    def start(content: bytes, **options: Any) -> Server:
        server = Server(content, **options)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def archive_of(*servers: Server, content: bytes = CONTENT) -> Archive:
    urls = tuple(server.url for server in servers)
    return Archive(urls, len(content), hashlib.sha256(content).hexdigest(), unpacked=0)


def no_wait(seconds: float) -> None: ...


def test_a_broken_transfer_goes_on_from_where_it_stopped(tmp_path: Path, serve: Any) -> None:
    server = serve(CONTENT, breaks=(300_000, 500_000))

    path = fetch(archive_of(server), tmp_path, SILENT, no_wait)

    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=800000-"]


def test_a_second_command_goes_on_from_the_first(tmp_path: Path, serve: Any) -> None:
    (tmp_path / "a.tar.gz.part").write_bytes(CONTENT[:1000])
    server = serve(CONTENT)

    assert fetch(archive_of(server), tmp_path, SILENT, no_wait).read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-"]
    assert fetch(archive_of(server), tmp_path, SILENT, no_wait).read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-"], "what is there is not fetched again"


def test_a_server_without_ranges_sends_it_all_again(tmp_path: Path, serve: Any) -> None:
    (tmp_path / "a.tar.gz.part").write_bytes(b"x" * 1000)
    server = serve(CONTENT, ranges=False)

    assert fetch(archive_of(server), tmp_path, SILENT, no_wait).read_bytes() == CONTENT


def test_a_wrong_file_is_refused_and_removed(tmp_path: Path, serve: Any) -> None:
    server = serve(CONTENT[:-1] + b"?")

    with pytest.raises(DamagedData, match=r"its sha256 is \w{64}, but it should be \w{64}"):
        fetch(archive_of(server), tmp_path, SILENT, no_wait)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_that_the_user_put_there_is_used_and_stays(tmp_path: Path, serve: Any) -> None:
    server = serve(CONTENT)
    own = tmp_path / "a.tar.gz"
    own.write_bytes(CONTENT)
    discard(fetch(archive_of(server), tmp_path, SILENT, no_wait))
    assert own.read_bytes() == CONTENT
    own.write_bytes(b"mine")
    with pytest.raises(DamagedData, match=r"a\.tar\.gz is not the file .* Move it away"):
        fetch(archive_of(server), tmp_path, SILENT, no_wait)
    assert own.read_bytes() == b"mine"
    assert server.asked == []
    own.unlink()
    discard(fetch(archive_of(server), tmp_path, SILENT, no_wait))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_fetched_through_a_link(tmp_path: Path, serve: Any) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / "a.tar.gz.part").symlink_to(victim)
    with pytest.raises(DamagedData, match="is a link"):
        fetch(archive_of(serve(CONTENT)), tmp_path, SILENT, no_wait)
    assert victim.read_bytes() == b"mine"


def test_too_long_a_file_is_refused(tmp_path: Path, serve: Any) -> None:
    server = serve(CONTENT + b"more")

    with pytest.raises(DamagedData, match="has 1,280,004 bytes, and 1,280,000 were published"):
        fetch(archive_of(server), tmp_path, SILENT, no_wait)


def test_a_refusal_is_not_asked_for_again(tmp_path: Path, serve: Any) -> None:
    server = serve(b"")

    with pytest.raises(NotReady, match="404"):
        fetch(archive_of(server), tmp_path, SILENT, no_wait)
    assert len(server.asked) == 1


def test_another_address_is_tried_where_the_first_brings_nothing(tmp_path: Path, serve: Any) -> None:
    refusing, breaking, good = serve(b""), serve(CONTENT, breaks=(300_000, 0)), serve(CONTENT)

    path = fetch(archive_of(refusing, breaking, good), tmp_path, SILENT, no_wait)

    assert path.read_bytes() == CONTENT
    assert refusing.asked == [None]
    assert breaking.asked == [None, "bytes=300000-"]
    assert good.asked == ["bytes=300000-"]


def test_a_bad_certificate_is_not_tried_again(tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    good, asked = serve(CONTENT), []
    real = urllib.request.urlopen

    def open_url(request: urllib.request.Request, timeout: float) -> Any:
        asked.append(request.full_url)
        if request.full_url.startswith("https"):
            raise urllib.error.URLError(ssl.SSLCertVerificationError("self-signed certificate"))
        return real(request, timeout=timeout)

    monkeypatch.setattr(urllib.request, "urlopen", open_url)
    archive = archive_of(good)
    secure = "https://127.0.0.1/a.tar.gz"
    with pytest.raises(NotReady, match="self-signed certificate"):
        fetch(replace(archive, urls=(secure,)), tmp_path, SILENT, no_wait)
    assert asked == [secure]
    assert fetch(replace(archive, urls=(secure, good.url)), tmp_path, SILENT, no_wait).read_bytes() == CONTENT
    assert asked == [secure, secure, good.url]


@pytest.mark.parametrize("archive", [stl10.ARCHIVE, librispeech.ARCHIVE], ids=lambda archive: archive.name)
def test_archives_are_fetched_encrypted_and_known_by_a_strong_hash(archive: Archive) -> None:
    assert archive.urls[0].startswith("https://")
    assert len(bytes.fromhex(archive.sha256)) == 32
    assert {url.rpartition("/")[2] for url in archive.urls} == {archive.name}


def test_a_server_that_gives_nothing_is_given_up(tmp_path: Path, serve: Any) -> None:
    server = serve(CONTENT, breaks=(70_000, *[0] * 20))

    with pytest.raises(NotReady, match=r"70,000 of 1,280,000 bytes are in .*part; the same command resumes"):
        fetch(archive_of(server), tmp_path, SILENT, no_wait)
    assert (tmp_path / "a.tar.gz.part").stat().st_size == 70_000


def test_the_disk_is_looked_at_first(tmp_path: Path, serve: Any) -> None:
    server = serve(CONTENT)

    with pytest.raises(WillNotFit, match="bytes free"):
        fetch(Archive((server.url,), len(CONTENT), "", unpacked=1 << 60), tmp_path, SILENT, no_wait)
    assert server.asked == []


def test_progress_adds_up_to_the_whole(tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BLOCK", 4096)
    done: dict[str, int] = {}

    class Counting(Silent):
        def begin(self, title: str, total: int, unit: str) -> None:
            self.title = title
            done[title] = -total

        def advance(self, amount: int, samples: int, detail: str) -> None:
            done[self.title] += amount

    server = serve(CONTENT, breaks=(123_456,))
    fetch(archive_of(server), tmp_path, Counting(), no_wait)

    assert done == {"fetch a.tar.gz": 0, "check a.tar.gz": 0}


def make_archive(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def named(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def test_unpacks_beside_what_is_there(tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", (named("in/one"), b"1"), (named("in/two"), b"22"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "mine").write_text("mine")

    unpack(archive, tmp_path, SILENT)

    assert {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()} == {
        "one": b"1",
        "two": b"22",
        "mine": b"mine",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "in"]


@pytest.mark.parametrize(
    "member",
    [
        named("../canary"),
        named("in/../../canary"),
        named("in/link", tarfile.SYMTYPE, "/etc"),
        named("in/link", tarfile.SYMTYPE, "../../.."),
        named("in/link", tarfile.LNKTYPE, "../../canary"),
        named("in/device", tarfile.CHRTYPE),
    ],
    ids=lambda member: f"{member.name}-{member.linkname}",
)
def test_an_archive_that_points_outside_is_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    (tmp_path / "into").mkdir()
    archive = make_archive(tmp_path / "a.tar.gz", (named("fine"), b"1"), (member, b""))

    with pytest.raises(DamagedData, match=r"a\.tar\.gz cannot be unpacked"):
        unpack(archive, tmp_path / "into", SILENT)
    assert list((tmp_path / "into").iterdir()) == []
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("kept", [0, 10, 300, 900])
def test_an_archive_cut_short_leaves_nothing(tmp_path: Path, kept: int) -> None:
    noise = hashlib.shake_128(b"noise").digest(2000)
    archive = make_archive(tmp_path / "a.tar.gz", (named("one"), noise))
    archive.write_bytes(archive.read_bytes()[:kept])

    with pytest.raises(DamagedData, match="cannot be unpacked"):
        unpack(archive, tmp_path / "into", SILENT)
    assert not list((tmp_path / "into").glob("*"))
