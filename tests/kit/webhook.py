"""A webhook that takes alerts, or fails in the ways of real ones."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Optional, Union

Json = Any
#: What a webhook does with a request: answers with a status, or "hang", "drip" (an answer whose
#: bytes come one by one, without an end), "close" (no answer), "redirect" (to its own /taken),
#: "garbage" (no HTTP).
Manner = Union[int, str]


class Taken(NamedTuple):
    """One request to a webhook."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Json:
        return json.loads(self.body)


class Webhook:
    """A running webhook, from running_webhook()."""

    def __init__(self, port: int) -> None:
        #: How it meets the next requests, one after the other; the last one goes on for ever.
        self.manners: list[Manner] = [204]
        #: Headers of its answers.
        self.headers: dict[str, str] = {}
        #: All requests so far.
        self.taken: list[Taken] = []
        self.is_over = threading.Event()
        self.port = port
        #: An address with secrets in every part that may have some.
        self.secrets = ("s3cret-path", "s3cret-query")
        self.url = f"http://127.0.0.1:{port}/hooks/s3cret-path?token=s3cret-query"

    def next_manner(self) -> Manner:
        return self.manners.pop(0) if len(self.manners) > 1 else self.manners[0]

    def events(self) -> list[str]:
        """The events of the alerts in the format `json`."""
        return [each.json()["event"] for each in self.taken]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    webhook: Webhook

    def do_GET(self) -> None:
        self._take()

    def do_POST(self) -> None:
        self._take()

    def _take(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        manner = self.webhook.next_manner()
        self.webhook.taken.append(
            Taken(self.command, self.path, dict(self.headers.items()), body))
        self.close_connection = True
        if manner == "hang":
            self.webhook.is_over.wait(60)
        elif manner == "drip":
            self._drip()
        elif manner == "garbage":
            self.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")
        elif manner != "close":
            self._answer(307 if manner == "redirect" else int(manner))

    def _answer(self, status: int) -> None:
        # Real ones repeat the address in the page that says so.
        page = f"cannot {self.command} {self.path}".encode() if status != 204 else b""
        self.send_response(status)
        if status == 307:
            self.send_header("Location", f"http://127.0.0.1:{self.webhook.port}/taken")
        for name, value in self.webhook.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def _drip(self) -> None:
        deadline_s = time.monotonic() + 60
        try:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            while time.monotonic() < deadline_s and not self.webhook.is_over.wait(0.05):
                self.wfile.write(b"x")
        except OSError:
            pass  # The client has had enough.

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # Clients that leave, or that do not trust the certificate.


@contextmanager
def running_webhook(
    port: int = 0, tls: Optional[ssl.SSLContext] = None
) -> Iterator[Webhook]:
    """A webhook on this port, or a free one, which is gone at the end of the block."""
    server = _Server(("127.0.0.1", port), _Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    webhook = Webhook(server.server_address[1])
    server.RequestHandlerClass = type("Handler", (_Handler,), {"webhook": webhook})
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield webhook
    finally:
        webhook.is_over.set()
        server.shutdown()
        server.server_close()
        thread.join()
