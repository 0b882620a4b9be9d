"""A WebSocket server on loopback, written from RFC 6455 and not with the client's code.

    def serve(peer):                         # in a thread of its own for each connection
        peer.send("hello")
        text = peer.receive()                # raises Gone when the client closed

    with WebSocketServer(serve) as server:
        ...                                  # server.url; or server.url as an http proxy

It refuses what the RFC forbids to clients, and notes it in `faults`. A client may first ask it to
CONNECT, as it would ask a proxy: the rest of the connection is the same.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import socket
import struct
import threading
from typing import Callable, Optional

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10


class Gone(Exception):
    """The client has closed with this code, 1006 without a word."""

    def __init__(self, code: int) -> None:
        super().__init__(f"closed with {code}")
        self.code = code


def frame(opcode: int, payload: bytes, *, is_final: bool = True, reserved: int = 0) -> bytes:
    """A frame as servers send it, section 5.2."""
    first = (0x80 if is_final else 0) | reserved << 4 | opcode
    size = len(payload)
    if size < 126:
        return bytes([first, size]) + payload
    head = struct.pack("!BBH", first, 126, size) if size < 65_536 else (
        struct.pack("!BBQ", first, 127, size))
    return head + payload


def close_payload(code: int, reason: str = "") -> bytes:
    """What a close frame carries, section 5.5.1."""
    return struct.pack("!H", code) + reason.encode()


class Peer:
    """One connection, as the server sees it."""

    def __init__(self, sock: socket.socket, faults: list[str]) -> None:
        self._socket, self._faults = sock, faults
        self._file = sock.makefile("rb")
        self._lock = threading.Lock()
        self.headers: dict[str, str] = {}
        self.path = ""
        #: Whether it came through CONNECT, and to which host.
        self.proxied = ""

    def shake_hands(self, accept: Optional[str] = None, extra: bytes = b"") -> None:
        """Answer the upgrade, with this key instead of the right one if there is one; `extra`
        comes in the same packet."""
        head = self._read_head()
        if head[0].startswith("CONNECT "):
            self.proxied = head[0].split()[1]
            self._socket.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            head = self._read_head()
        method, self.path, version = head[0].split()
        for line in head[1:]:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()
        key = self.headers.get("sec-websocket-key", "")
        self._expect(method == "GET" and version == "HTTP/1.1", "the request line")
        self._expect(self.headers.get("upgrade", "").lower() == "websocket", "Upgrade")
        self._expect("upgrade" in self.headers.get("connection", "").lower(), "Connection")
        self._expect(self.headers.get("sec-websocket-version") == "13", "the version")
        self._expect(len(base64.b64decode(key)) == 16, "the key")
        digest = base64.b64encode(hashlib.sha1(key.encode() + GUID).digest()).decode()
        self._socket.sendall((
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept or digest}\r\n\r\n").encode() + extra)

    def _read_head(self) -> list[str]:
        lines: list[str] = []
        while True:
            line = self._file.readline().decode().rstrip("\r\n")
            if not line:
                if not lines:
                    raise Gone(1006)
                return lines
            lines.append(line)

    def _expect(self, is_right: bool, what: str) -> None:
        if not is_right:
            self._faults.append(what)

    def receive(self) -> str:
        """The next message. Raises Gone."""
        message = b""
        while True:
            opcode, is_final, payload = self._read_frame()
            if opcode == CLOSE:
                code = struct.unpack("!H", payload[:2])[0] if payload else 1005
                with contextlib.suppress(OSError):
                    self.send_bytes(frame(CLOSE, payload))
                raise Gone(code)
            if opcode == PING:
                self.send_bytes(frame(PONG, payload))
            elif opcode != PONG:
                message += payload
                if is_final:
                    return message.decode()

    def _read_frame(self) -> tuple[int, bool, bytes]:
        try:
            first, second = self._read(2)
            size = second & 0x7F
            if size == 126:
                size = struct.unpack("!H", self._read(2))[0]
            elif size == 127:
                size = struct.unpack("!Q", self._read(8))[0]
            if first & 0x70 or not second & 0x80:
                self._faults.append("reserved bits, or no mask")
                self.close(1002)
            mask = self._read(4)
            payload = bytes(b ^ mask[i % 4] for i, b in enumerate(self._read(size)))
        except (OSError, ValueError):
            raise Gone(1006) from None
        return first & 0x0F, bool(first & 0x80), payload

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise Gone(1006)
        return data

    def send(self, text: str) -> None:
        """Send a message; a client that has gone does not matter."""
        with contextlib.suppress(OSError):
            self.send_bytes(frame(TEXT, text.encode()))

    def send_bytes(self, data: bytes) -> None:
        """Send bytes as they are. Raises OSError."""
        with self._lock:
            self._socket.sendall(data)

    def close(self, code: int, reason: str = "") -> None:
        """Close in good order."""
        with contextlib.suppress(OSError):
            self.send_bytes(frame(CLOSE, close_payload(code, reason)))
        self.drop()

    def drop(self) -> None:
        """End the connection without a word."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Give back what it holds."""
        self.drop()
        self._file.close()
        self._socket.close()


class WebSocketServer:
    """Accepts connections until its end."""

    def __init__(self, serve: Callable[[Peer], None], *, shakes_hands: bool = True) -> None:
        """`serve` runs in a thread for each connection; without `shakes_hands` it also answers the
        upgrade."""
        self._serve, self._shakes_hands = serve, shakes_hands
        #: What clients did that the RFC forbids.
        self.faults: list[str] = []
        self.peers: list[Peer] = []
        self._threads: list[threading.Thread] = []
        self._is_over = False
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"ws://127.0.0.1:{self.port}"

    def __enter__(self) -> WebSocketServer:
        self._spawn(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for peer in self.peers:
            peer.drop()
        for thread in self._threads:
            thread.join()

    def _spawn(self, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            peer = Peer(sock, self.faults)
            self.peers.append(peer)
            self._spawn(lambda peer=peer: self._run(peer))  # type: ignore[misc]

    def _run(self, peer: Peer) -> None:
        try:
            if self._shakes_hands:
                peer.shake_hands()
            self._serve(peer)
        except (Gone, OSError):
            pass
        finally:
            peer.release()


