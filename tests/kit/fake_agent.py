"""A stand-in for an agent that speaks chat completions, on loopback.

    with FakeAgent() as agent:
        agent.enqueue(streamed("Hello.", pause_s=0.1), refused(429, "insufficient_quota"))
        ...                                  # agentUrl: agent.url
        assert agent.asked()[-1] == "the last user text"

Without a queued reply it answers "You said: " and the last user text.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, NamedTuple, Optional, Sequence, Union

Json = Any


class Request(NamedTuple):
    headers: dict[str, str]
    body: Json

    @property
    def text(self) -> str:
        """The text of the last message."""
        content = self.body["messages"][-1]["content"]
        return content if isinstance(content, str) else content[0]["text"]


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    #: Sent one after the other, each after its pause.
    pieces: Sequence[tuple[float, bytes]]


def chunk(text: str) -> bytes:
    """One event of a stream."""
    content = json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]})
    return f"data: {content}\n\n".encode()


def streamed(*texts: str, pause_s: float = 0.0, end: bytes = b"data: [DONE]\n\n") -> Reply:
    """A stream of these texts, with a pause before each one but the first."""
    pieces = [(pause_s if place else 0.0, chunk(text)) for place, text in enumerate(texts)]
    return raw_stream([*pieces, (0.0, end)])


def raw_stream(pieces: Sequence[tuple[float, bytes]]) -> Reply:
    """A stream of bytes as they are."""
    return Reply(200, {"Content-Type": "text/event-stream"}, pieces)


def whole(content: Union[Json, bytes], status: int = 200, **headers: str) -> Reply:
    """A body at once; JSON unless it is bytes."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Reply(status, {"Content-Type": "application/json", **headers}, [(0.0, data)])


def refused(status: int, code: str, message: str = "no", **headers: str) -> Reply:
    """A refusal in OpenAI's form."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return whole({"error": {"message": message, "code": code}}, status, **named)


class FakeAgent:
    """The agent."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        #: The headers of every call, also of those that ask for models.
        self.headers: list[dict[str, str]] = []
        #: How many answers are being sent, and the most at once.
        self.running = self.most_running = 0
        #: How many answers the other side cut off.
        self.cut = 0
        self.default: Callable[[Request], Reply] = lambda request: streamed(
            "You said: ", request.text)
        self._replies: deque[Reply] = deque()
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"agent": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.base = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.url = f"{self.base}/v1/chat/completions"
        self.models = ["sonnet", "opus"]

    def __enter__(self) -> FakeAgent:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def enqueue(self, *replies: Reply) -> None:
        with self._lock:
            self._replies += replies

    def asked(self) -> list[str]:
        """The last text of each request."""
        return [request.text for request in list(self.requests)]

    def was_asked(self, count: int) -> bool:
        """Whether so many questions have come."""
        return len(self.requests) == count

    def take(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            reply: Optional[Reply] = self._replies.popleft() if self._replies else None
        return reply or self.default(request)

    def done(self, is_cut: bool) -> None:
        with self._lock:
            self.running -= 1
            self.cut += is_cut


class _Handler(BaseHTTPRequestHandler):
    agent: FakeAgent

    def do_GET(self) -> None:  # noqa: N802
        self.agent.headers.append({name.lower(): text for name, text in self.headers.items()})
        data = json.dumps({"data": [{"id": name} for name in self.agent.models]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.agent.headers.append(headers)
        reply = self.agent.take(Request(headers, body))
        is_cut = False
        try:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            for pause_s, piece in reply.pieces:
                is_cut = is_cut or self._waits_in_vain(pause_s)
                self.wfile.write(piece)
        except OSError:
            is_cut = True
        self.agent.done(is_cut)

    def _waits_in_vain(self, pause_s: float) -> bool:
        """Wait, and return at once whether the other side hangs up meanwhile."""
        self.connection.settimeout(max(pause_s, 0.001))
        try:
            return not self.connection.recv(1)
        except TimeoutError:
            return False
        finally:
            self.connection.settimeout(None)

    def log_message(self, format: str, *args: Json) -> None:
        pass
