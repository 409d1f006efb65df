"""An S3 server on loopback (moto, in a process of its own), and a proxy before it that spoils requests on demand."""

from __future__ import annotations

import http.client
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[[int, str, str], str | None]
"""(number of the request, method, path) -> what goes wrong with it:

busy         answered 503 without reaching the server
drop         the connection is closed without an answer, and the server never sees the request
lost reply   the server does as asked, and the connection is closed without an answer
truncate     the answer's body ends half way
deny         answered 403
"""


class Proxy(ThreadingHTTPServer):
    """Passes requests on, unless `fault` says otherwise; `requests` counts them."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind, self.requests = port, 0
        self.fault: Fault = lambda number, method, path: None
        self.counting = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.counting:
            number, self.server.requests = self.server.requests, self.server.requests + 1
        fault = self.server.fault(number, self.command, self.path)
        if fault == "drop":
            self.close_connection = True
            return
        if fault in ("busy", "deny"):
            self.send_response(503 if fault == "busy" else 403)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault == "lost reply":
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fault == "truncate":
            self.close_connection = True
            content = content[: len(content) // 2]
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve


@contextmanager
def faulty_s3() -> Iterator[Proxy]:
    """A server with an empty bucket `bucket`, behind a proxy."""
    with subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        assert server.stdout is not None
        port = next(int(found[1]) for line in server.stdout if (found := re.search(r"127\.0\.0\.1:(\d+)", line)))
        threading.Thread(target=lambda out=server.stdout: [None for _ in out], daemon=True).start()
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("PUT", "/bucket")
        assert connection.getresponse().status == 200
        proxy = Proxy(port)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            proxy.server_close()
            server.terminate()
