"""An API of JSON calls on loopback, for stand-ins of platforms: it keeps each call, and fails as a
test wants."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, NamedTuple, TypeVar

Json = Any
Self = TypeVar("Self", bound="FakeApi")


class Refusal(Exception):
    """An answer that is no success; a body that is a text is no JSON."""

    def __init__(self, status: int, body: Json, **headers: str) -> None:
        super().__init__(f"{status} {body}")
        self.status, self.body, self.headers = status, body, headers


class Call(NamedTuple):
    method: str
    path: str
    body: Json
    at_s: float


class FakeApi:
    """A platform. A subclass adds what its calls do."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        #: What clients did that the platform would not take.
        self.faults: list[str] = []
        #: Guards what a subclass keeps.
        self._lock = threading.RLock()
        self.calls: list[Call] = []
        self.files: dict[str, bytes] = {}
        #: Method, end of the path, text, and what is answered.
        self._failures: list[tuple[str, str, str, Refusal]] = []
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self: Self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # -- what a platform adds -----------------------------------------------------------------

    def check(self, call: Call, headers: Json, told: dict[str, str]) -> None:
        """Raise Refusal for a call that is not taken; `told` gets headers of its answer."""
        raise NotImplementedError

    def perform(self, call: Call) -> Json:
        """The content of the answer to a call, None if it has none. Raises Refusal."""
        raise NotImplementedError

    # -- what a test does ---------------------------------------------------------------------

    def fail(self, method: str, path: str, status: int, body: Json = None, times: int = 1,
             when: str = "", **headers: str) -> None:
        """Refuse the next calls whose path ends so, and whose text is `when` if it is given."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        refusal = Refusal(status, {"message": "no", "code": 0} if body is None else body, **named)
        self._failures += [(method, path, when, refusal)] * times

    def called(self, method: str, what: str) -> list[Json]:
        """The bodies of all calls whose path ends so, but for an id."""
        return [call.body for call in list(self.calls)
                if call.method == method and call.path.rstrip("0123456789/").endswith(what)]

    # -- what the platform does ---------------------------------------------------------------

    def answer(self, method: str, path: str, headers: Json, body: Json) -> tuple[int, Json, Json]:
        """Status, headers and content of an answer."""
        told: dict[str, str] = {}
        with self._lock:
            call = Call(method, path, body, self.clock())
            self.calls.append(call)
            try:
                self.check(call, headers, told)
                content = self.perform(call)
            except Refusal as refusal:
                return refusal.status, {**told, **refusal.headers}, refusal.body
        return 204 if content is None else 200, told, content

    def fail_as_told(self, call: Call) -> None:
        """Raise what a test has asked for."""
        for place, (method, end, text, refusal) in enumerate(self._failures):
            if call.method == method and call.path.endswith(end) and (
                    text in ("", call.body.get("content"))):
                del self._failures[place]
                raise refusal


class _Handler(BaseHTTPRequestHandler):
    fake: FakeApi
    protocol_version = "HTTP/1.1"
    # Head and body of an answer are two packets, and the second must not wait.
    disable_nagle_algorithm = True

    def _answer(self) -> None:
        wanted_bytes = int(self.headers.get("Content-Length", "0"))
        data = self.rfile.read(wanted_bytes)
        if len(data) < wanted_bytes:
            # The program ended the connection before its call was whole, so there was no call.
            self.close_connection = True
            return
        body = json.loads(data or b"{}")
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/files/") and name in self.fake.files:
            self._send(200, {}, self.fake.files[name])
            return
        status, headers, content = self.fake.answer(self.command, self.path, self.headers, body)
        if isinstance(content, str):
            self._send(status, {**headers, "Content-Type": "text/html"}, content.encode())
        elif content is None:
            self._send(status, headers, b"")
        else:
            data = json.dumps(content).encode()
            self._send(status, {**headers, "Content-Type": "application/json"}, data)

    do_GET = do_POST = do_PATCH = _answer  # noqa: N815

    def _send(self, status: int, headers: Json, data: bytes) -> None:
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            # The bot has gone.
            self.close_connection = True

    def log_message(self, format: str, *args: Json) -> None:
        pass
