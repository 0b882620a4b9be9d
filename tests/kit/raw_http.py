"""HTTP by hand: connections on which every byte is the test's own."""

from __future__ import annotations

import contextlib
import http.client
import io
import select
import socket
import ssl
import time
from typing import Optional

from chat import CHAT_PATH
from http_client import Reply
from server import Server


def raw_http(port: int, request: bytes, timeout_s: float = 30) -> bytes:
    """Everything that comes back for these bytes until the server closes, or the time is up."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        deadline_s = time.monotonic() + timeout_s
        try:
            connection.sendall(request)
            while time.monotonic() < deadline_s:
                connection.settimeout(max(0.001, deadline_s - time.monotonic()))
                piece = connection.recv(1 << 16)
                if not piece:
                    break
                received += piece
        except (socket.timeout, ConnectionError):
            pass  # What came before is the answer.
    return received


def head(
    method: str = "POST", path: str = CHAT_PATH, *lines: str, version: str = "HTTP/1.1"
) -> bytes:
    """The head of a request; `lines` are header lines besides Host."""
    text = "\r\n".join([f"{method} {path} {version}", "Host: localhost", *lines, "", ""])
    return text.encode("latin-1")


def post(body: bytes, *lines: str, path: str = CHAT_PATH, version: str = "HTTP/1.1") -> bytes:
    """A POST with a Content-Length."""
    sized = f"Content-Length: {len(body)}"
    return head("POST", path, sized, *lines, version=version) + body


def chunked(*parts: bytes, trailer: bytes = b"") -> bytes:
    """A chunked body."""
    framed = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return framed + b"0\r\n" + trailer + b"\r\n"


class RawConnection:
    """A connection on which every byte is the test's own; to be used in a `with`. With a
    `context` it is behind TLS, where an end without the word that it is one is an error."""

    def __init__(
        self, port: int, timeout_s: float = 60, context: Optional[ssl.SSLContext] = None
    ) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        if context:
            self.socket = context.wrap_socket(
                self.socket, server_hostname="localhost", suppress_ragged_eofs=False)
        self._file: io.BufferedReader = self.socket.makefile("rb")
        #: What was heard by hear().
        self.said = b""

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(self, *error: object) -> None:
        self.hang_up()

    def hang_up(self) -> None:
        self._file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Sends; a server that closes meanwhile has answered already."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def dribble(self, data: bytes, pause_s: float) -> None:
        """Sends byte by byte, with pauses, until the server says something."""
        for at in range(len(data)):
            self.send(data[at:at + 1])
            if select.select([self.socket], [], [], pause_s)[0]:
                return

    def hear(self, words: bytes, times: int = 1) -> None:
        """Reads on until these words have been said so often; to be used instead of replies."""
        while self.said.count(words) < times:
            piece = self.socket.recv(1 << 16)
            assert piece, self.said[-1000:]
            self.said += piece

    def end_sending(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def status_line(self) -> str:
        return self._file.readline().decode("latin-1").strip()

    def reply(self, *, bodyless: bool = False) -> Reply:
        """The next answer; "100 Continue" is one too. `bodyless` = it answers a HEAD."""
        status = int(self.status_line().split()[1])
        headers = http.client.parse_headers(self._file)
        has_body = not bodyless and status >= 200 and status != 204
        return Reply(status, headers, self._body(headers) if has_body else b"")

    def _body(self, headers: http.client.HTTPMessage) -> bytes:
        if headers["Transfer-Encoding"] == "chunked":
            return self._chunks()
        length = headers["Content-Length"]
        return self._file.read() if length is None else self._file.read(int(length))

    def _chunks(self) -> bytes:
        """A chunked body. Raises ValueError when it is cut off."""
        body = b""
        while True:
            size = int(self._file.readline(), 16)
            body += self._file.read(size)
            assert self._file.readline() == b"\r\n"
            if not size:
                return body

    def is_closed(self, timeout_s: float = 25) -> bool:
        """Whether the server closes now, without another word."""
        self.socket.settimeout(timeout_s)
        try:
            return self._file.read(1) == b""
        except ConnectionResetError:
            return True
        except socket.timeout:
            return False


def exchange(server: Server, request: bytes) -> Reply:
    """The first answer to these bytes, on a connection of its own."""
    with RawConnection(server.port) as wire:
        wire.send(request)
        return wire.reply()
