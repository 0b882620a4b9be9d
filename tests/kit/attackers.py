"""Clients that take more than their share, each as a program of its own:

    python3 attackers.py NAME PORT KEY

Runs until its input ends, so that whoever started it decides how long. The process is not the
innocent client's, whose waits would else be those of its own interpreter. The functions only use
loopback, and each holds a bounded number of connections.
"""
from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

Json = Any

BODY_BYTES = 31_000_000
CHAT = "/v1/chat/completions"
#: Whoever is refused or done waits so long before the next try.
PAUSE_S = 0.02
stopped = threading.Event()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def head(path: str, key: str, *lines: str, method: str = "POST") -> bytes:
    credentials = [f"Authorization: Bearer {key}"] if key else []
    text = [f"{method} {path} HTTP/1.1", "Host: localhost", *credentials, *lines, "", ""]
    return "\r\n".join(text).encode("ascii")


def post(port: int, key: str, body: bytes) -> None:
    """Send a request and read its answer, whatever that is."""
    with contextlib.suppress(OSError), connect(port) as connection:
        connection.sendall(head(CHAT, key, f"Content-Length: {len(body)}"))
        connection.sendall(body)
        while connection.recv(65_536):
            pass


def over_and_over(count: int, attack: Callable[[], None]) -> None:
    """Let so many threads attack until the program is told to stop."""
    def repeat() -> None:
        while not stopped.is_set():
            attack()
            stopped.wait(PAUSE_S)

    for _ in range(count):
        threading.Thread(target=repeat, daemon=True).start()


def question(text: str = "hi", **fields: Json) -> bytes:
    messages = [{"role": "user", "content": text}]
    return json.dumps({"model": "sonnet", "messages": messages, **fields}).encode()


# -- bodies -------------------------------------------------------------------------------------

def many_values(port: int, key: str) -> None:
    """Four clients send bodies of millions of empty arrays."""
    body = b'{"model":"sonnet","messages":[' + b"[]," * (BODY_BYTES // 3) + b"[]]}"
    over_and_over(4, lambda: post(port, key, body))


def many_messages(port: int, key: str) -> None:
    """Four clients send as many messages as are taken."""
    message = b'{"role":"user","content":"a"},'
    body = b'{"model":"sonnet","messages":[' + message * 19_999 + message[:-1] + b"]}"
    over_and_over(4, lambda: post(port, key, body))


def long_texts(port: int, key: str) -> None:
    """Eight clients send one text of the size of the largest body."""
    body = question("word " * (BODY_BYTES // 5))
    over_and_over(8, lambda: post(port, key, body))


def dripping_bodies(port: int, key: str) -> None:
    """Sixty-four clients send nearly all of a large body and then a byte now and then."""
    def drip() -> None:
        with contextlib.suppress(OSError), connect(port) as connection:
            connection.sendall(head(CHAT, key, f"Content-Length: {BODY_BYTES}"))
            connection.sendall(b" " * (BODY_BYTES // 4))
            while not stopped.wait(0.5):
                connection.sendall(b" ")

    over_and_over(64, drip)


# -- connections ----------------------------------------------------------------------------------

def idle_connections(port: int, key: str) -> None:
    """Three hundred connections stay open and ask for /health every few seconds."""
    def stay() -> None:
        with contextlib.suppress(OSError), connect(port) as connection:
            while not stopped.is_set():
                connection.sendall(head("/health", "", method="GET"))
                if not connection.recv(65_536):
                    return
                stopped.wait(2)

    over_and_over(300, stay)


def unfinished_heads(port: int, key: str) -> None:
    """Sixty-four clients send megabytes of header lines and no end of them."""
    lines = b"".join(b"X-Padding-%d: %b\r\n" % (number, b"a" * 60_000) for number in range(100))

    def send() -> None:
        with contextlib.suppress(OSError), connect(port) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + lines)
            stopped.wait(10)

    over_and_over(64, send)


def unknown_paths(port: int, key: str) -> None:
    """Eight clients without a key ask for paths that do not exist, as fast as they can."""
    def ask() -> None:
        with contextlib.suppress(OSError), connect(port) as connection:
            while not stopped.is_set():
                connection.sendall(head(f"/nowhere/{time.monotonic_ns()}", "", method="GET"))
                if not connection.recv(65_536):
                    return

    over_and_over(8, ask)


# -- answers --------------------------------------------------------------------------------------

def unread_streams(port: int, key: str) -> None:
    """Twelve clients ask for a long stream and read nothing of it. The model of the tests repeats
    what it hears."""
    body = question(("x" * 999 + " ") * 2_900, stream=True)

    def ask() -> None:
        with contextlib.suppress(OSError), connect(port) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(head(CHAT, key, f"Content-Length: {len(body)}") + body)
            stopped.wait(30)

    over_and_over(12, ask)


def open_ends(port: int, key: str) -> None:
    """Eight clients ask with Connection: close and keep their end open."""
    body = question()

    def ask() -> None:
        with contextlib.suppress(OSError), connect(port) as connection:
            lines = (f"Content-Length: {len(body)}", "Connection: close")
            connection.sendall(head(CHAT, key, *lines) + body)
            while connection.recv(65_536):
                pass
            stopped.wait(5)

    over_and_over(8, ask)


def reports(port: int, key: str) -> None:
    """Six clients ask for all of their usage of a year."""
    def ask() -> None:
        with contextlib.suppress(OSError), connect(port) as connection:
            lines = ("Connection: close",)
            connection.sendall(head("/api/usage?hours=9600", key, *lines, method="GET"))
            while connection.recv(65_536):
                pass

    over_and_over(6, ask)


ATTACKS: dict[str, Callable[[int, str], None]] = {
    attack.__name__: attack for attack in (
        many_values, many_messages, long_texts, dripping_bodies, idle_connections,
        unfinished_heads, unknown_paths, unread_streams, open_ends, reports,
    )
}


# -- the innocent ------------------------------------------------------------------------------

class Wait:
    """What an innocent client with a key of its own goes through: the seconds of its worst wait,
    and how often its requests ended with each status (0 = with a broken connection)."""

    def __init__(self) -> None:
        self.worst_s = 0.0
        self.statuses: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"<worst {self.worst_s:.2f} s, {self.statuses}>"

    def note(self, status: int, seconds: float) -> None:
        self.worst_s = max(self.worst_s, seconds)
        self.statuses[status] = self.statuses.get(status, 0) + 1


def ask_once(port: int, key: str, timeout_s: float = 60) -> int:
    """Return the status of a small question, 0 when there was no answer."""
    body = question()
    with contextlib.suppress(OSError), connect(port) as connection:
        connection.settimeout(timeout_s)
        lines = (f"Content-Length: {len(body)}", "Connection: close")
        connection.sendall(head(CHAT, key, *lines) + body)
        answer = b""
        while True:
            piece = connection.recv(65_536)
            if not piece:
                break
            answer += piece
        return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0
    return 0


def wait_beside(port: int, key: str, seconds: float, timeout_s: float = 60) -> Wait:
    """Ask over and over for so long, and return how that went."""
    wait, until_s = Wait(), time.monotonic() + seconds
    while time.monotonic() < until_s:
        began_s = time.monotonic()
        status = ask_once(port, key, timeout_s)
        wait.note(status, time.monotonic() - began_s)
        time.sleep(0.1)
    return wait


def memory_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) * 1024


@contextlib.contextmanager
def highest_memory(pid: int) -> Iterator[list[int]]:
    """Measure the memory of a process; the list holds its peak when the block is over."""
    peak, is_over = [memory_bytes(pid)], threading.Event()

    def look() -> None:
        while not is_over.wait(0.05):
            with contextlib.suppress(OSError):
                peak[0] = max(peak[0], memory_bytes(pid))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        is_over.set()
        thread.join()


def main() -> int:
    name, port, key = sys.argv[1:]
    ATTACKS[name](int(port), key)
    while sys.stdin.buffer.read(4096):
        pass
    stopped.set()
    return 0


if __name__ == "__main__":
    sys.exit(main())
