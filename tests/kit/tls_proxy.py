"""A proxy on loopback that plays the part of the API's hosts for what claude asks beside messages.

claude is led here by HTTPS_PROXY, and trusts the certificate because it is told to. Every host but
the known ones is refused, and nothing leaves the machine."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

Json = Any

#: Key and certificate in one; made for these tests, and trusted by nobody else.
PEM = Path(__file__).resolve().parent / "data" / "tls_proxy.pem"
_HOSTS = ("anthropic.com", "claude.com", "claude.ai")


class Tunnel:
    """The proxy; to be used in a `with`.

    answers   what a path is answered with: JSON, a status alone, or None for silence. Others: 404
    """

    def __init__(self, answers: Mapping[str, Json]) -> None:
        self.answers = dict(answers)
        #: "METHOD https://host/path" of every request, in order; refused hosts too.
        self.asked: list[str] = []
        #: For each request that was met with silence, how long it took the client to hang up.
        self.endured_s: list[float] = []
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(PEM)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self.url = "http://127.0.0.1:%d" % self._listener.getsockname()[1]

    def __enter__(self) -> Tunnel:
        self._threads[0].start()
        return self

    def __exit__(self, *error: object) -> None:
        # Closing alone does not wake the thread that accepts.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)

    def env(self) -> dict[str, str]:
        """What leads claude through it, but for what is on this machine."""
        return {"HTTPS_PROXY": self.url, "NO_PROXY": "127.0.0.1,localhost",
                "NODE_EXTRA_CA_CERTS": str(PEM)}

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(60)
        with connection:
            try:
                self._tunnel(connection)
            except OSError:
                pass  # It hung up, or the test is over.

    def _tunnel(self, connection: socket.socket) -> None:
        # Without a buffer: what comes behind the head is TLS.
        with connection.makefile("rb", buffering=0) as plain:
            line = _head(plain)
        if line is None:
            return
        host = line.split()[1].rpartition(":")[0]
        if not line.startswith("CONNECT") or not host.endswith(_HOSTS):
            self.asked.append(line)
            connection.sendall(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")
            return
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        with self._context.wrap_socket(connection, server_side=True) as secured:
            with secured.makefile("rb") as reader:
                while self._answer(secured, reader, host):
                    pass

    def _answer(self, secured: ssl.SSLSocket, reader: Any, host: str) -> bool:
        """Answers one request; whether there may be another."""
        line = _head(reader)
        if line is None:
            return False
        method, path, _ = line.split(" ", 2)
        self.asked.append(f"{method} https://{host}{path}")
        answer = self.answers.get(path.partition("?")[0], 404)
        if answer is None:
            began_s = time.monotonic()
            with contextlib.suppress(OSError):
                reader.read(1)
            self.endured_s.append(time.monotonic() - began_s)
            return False
        status = answer if isinstance(answer, int) else 200
        body = json.dumps({} if isinstance(answer, int) else answer).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
        secured.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return True


def _head(reader: Any) -> Optional[str]:
    """The first line of a request, whose headers and body are read and dropped; None at the end."""
    first = reader.readline().decode("latin-1").strip()
    length, line = 0, b""
    while first and line not in (b"\r\n", b"\n"):
        line = reader.readline()
        if not line:
            return None
        name, _, value = line.decode("latin-1").partition(":")
        length = int(value) if name.lower() == "content-length" else length
    while length > 0:
        piece = reader.read(length)
        if not piece:
            return None
        length -= len(piece)
    return first or None
