"""An S3 server on loopback (moto, in a process of its own), and a proxy before it that spoils requests on demand."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote

Fault = Callable[[int, str, str], str | None]
"""(number of the request, method, path) -> what goes wrong with it:

busy         answered 503 without reaching the server
drop         the connection is closed without an answer, and the server never sees the request
reset        likewise, but the connection is reset
lost reply   the server does as asked, and the connection is closed without an answer
truncate     the answer's body ends half way
flip         a bit of the answer's body is another, if there is one
flip upload  a bit of what is sent is another: a server that checks no signatures, as this one, stores it so
deny         answered 403
flip         the server gets the request with one byte of its body changed
"""


class Proxy(ThreadingHTTPServer):
    """Passes requests on, unless `fault` says otherwise; `requests` counts them."""

    daemon_threads = True

    def __init__(self, server: Server) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server, self.behind, self.requests = server, server.port, 0
        self.fault: Fault = lambda number, method, path: None
        self.tags = True  # whether answers tell the entity tags
        self.counting = threading.Lock()
        self.restarts, self.down = 0, False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def restart(self) -> None:
        """Kill the server, whatever it is at, and start another that has the same objects: all whose writing was
        acknowledged, and perhaps others.
        """
        self.restarts, self.down = self.restarts + 1, True  # from here on nothing is acknowledged
        kept = self.server.objects()
        self.server.kill()
        self.server = Server()
        for name, content in kept.items():
            assert self.server.ask("PUT", f"/bucket/{quote(name)}", content)[0] == 200
        self.behind, self.down = self.server.port, False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement
    server: Proxy

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.counting:
            number, self.server.requests = self.server.requests, self.server.requests + 1
        restarts = self.server.restarts
        if self.server.down:
            self._hang_up(reset=True)
            return
        fault = self.server.fault(number, self.command, self.path)
        if fault in ("drop", "reset"):
            self._hang_up(reset=fault == "reset")
            return
        if fault in ("busy", "deny"):
            self.send_response(503 if fault == "busy" else 403)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "flip upload":
            body = _flipped(body)
        if fault == "flip" and body:
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):  # the server was killed
            self._hang_up(reset=True)
            return
        finally:
            connection.close()
        if self.server.down or self.server.restarts != restarts:
            self._hang_up(reset=True)
            return
        if fault == "lost reply":
            self._hang_up(reset=False)
            return
        if fault == "flip":
            content = _flipped(content)
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() == "etag" and not self.server.tags:
                value = '"opaque"'
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fault == "truncate":
            self.close_connection = True
            content = content[: len(content) // 2]
        self.wfile.write(content)

    def _hang_up(self, reset: bool) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve


def _flipped(content: bytes) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[len(changed) // 2] ^= 1
    return bytes(changed)


SIGNED = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
"""Without a signature the server denies objects; it does not look at what the signature is."""


class Server:
    """An S3 server in a process of its own, with an empty bucket `bucket`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        out = self._process.stdout
        assert out is not None
        self.port = next(int(found[1]) for line in out if (found := re.search(r"127\.0\.0\.1:(\d+)", line)))
        threading.Thread(target=lambda: [None for _ in out], daemon=True).start()
        assert self.ask("PUT", "/bucket")[0] == 200

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request(method, path, body, {"Authorization": SIGNED})
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def objects(self) -> dict[str, bytes]:
        """Path to content, of all objects in the bucket."""
        found: dict[str, bytes] = {}
        after = ""
        while True:
            listed = self.ask("GET", f"/bucket?list-type=2&start-after={quote(after, safe='')}")[1].decode()
            names = [unescape(name) for name in re.findall(r"<Key>(.*?)</Key>", listed)]
            for name in names:
                status, found[name] = self.ask("GET", f"/bucket/{quote(name)}")
                assert status == 200, f"{name}: {status}"
            if not names or "<IsTruncated>true" not in listed:
                return found
            after = names[-1]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def faulty_s3() -> Iterator[Proxy]:
    """A server with an empty bucket `bucket`, behind a proxy."""
    proxy = Proxy(Server())
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        proxy.server.kill()
