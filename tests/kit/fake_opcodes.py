"""What Discord and QQ have in common, on loopback: a gateway, and an API of JSON calls.

    gateway.emit("MESSAGE_CREATE", {...})    # to the newest session, now or when it is resumed
    gateway.ask_to_reconnect(); gateway.invalidate(True); gateway.close(4009); gateway.drop()
    assert gateway.sent(2)                   # what clients have sent with this opcode
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, NamedTuple, Optional, TypeVar

from websocket_server import Gone, Peer, WebSocketServer

Json = Any
Self = TypeVar("Self", bound="FakeOpcodes")
DISPATCH, HEARTBEAT, IDENTIFY, RESUME, RECONNECT, INVALID, HELLO, ACK = 0, 1, 2, 6, 7, 9, 10, 11


class Sent(NamedTuple):
    op: int
    d: Json


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


class Session:
    """The events of a session, by their number minus one."""

    def __init__(self, session_id: str) -> None:
        self.id = session_id
        self.events: list[Json] = []
        self.peer: Optional[Peer] = None


class FakeOpcodes:
    """A platform for one bot. A subclass adds what a session begins with, and the calls."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.interval_ms = 41_250
        #: Every frame that clients have sent, and each code that they closed with.
        self.frames: list[Sent] = []
        self.closes: list[int] = []
        #: What clients did that the platform would not take.
        self.faults: list[str] = []
        #: Whether heartbeats stay without an answer.
        self.is_deaf = False
        #: The codes that the next sessions are refused with.
        self.refusals: list[int] = []
        #: Guards the sessions. A peer gets its events in the order of the session.
        self._lock = threading.RLock()
        self.sessions: dict[str, Session] = {}
        self.newest: Optional[Session] = None
        #: Each connection in order.
        self.connections: list[Peer] = []
        self.gateway = WebSocketServer(self._serve)
        self.calls: list[Call] = []
        self.files: dict[str, bytes] = {}
        #: Method, end of the path, text, and what is answered.
        self._failures: list[tuple[str, str, str, Refusal]] = []
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self: Self) -> Self:
        self.gateway.__enter__()
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.gateway.__exit__()

    # -- what a platform adds -----------------------------------------------------------------

    def is_token(self, token: str) -> bool:
        """Whether the gateway takes a token."""
        raise NotImplementedError

    def check_identity(self, content: Json) -> None:
        """Note what is wrong with how a session begins."""

    def ready(self, session: Session) -> Json:
        """What a session begins with."""
        raise NotImplementedError

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

    def emit(self, event: str, data: Json) -> None:
        """Let something happen."""
        with self._lock:
            assert self.newest is not None, "no session yet"
            self._emit(self.newest, event, data)

    def sent(self, op: int) -> list[Json]:
        """What clients have sent with an opcode."""
        return [each.d for each in list(self.frames) if each.op == op]

    def garbage(self, text: str) -> None:
        """Send a text that is no frame."""
        self.connections[-1].send(text)

    def ask_to_reconnect(self) -> None:
        """Ask for another connection."""
        self._send_frame(self.connections[-1], RECONNECT, None)

    def ask_for_heartbeat(self) -> None:
        """Ask for a heartbeat before its time."""
        self._send_frame(self.connections[-1], HEARTBEAT, None)

    def invalidate(self, can_resume: bool) -> None:
        """Say that the session is not valid."""
        with self._lock:
            if not can_resume:
                self.sessions.clear()
            self._send_frame(self.connections[-1], INVALID, can_resume)

    def close(self, code: int) -> None:
        """Close the connection with a code."""
        self._leave()
        self.connections[-1].close(code)

    def drop(self) -> None:
        """End the connection without a word."""
        self._leave()
        self.connections[-1].drop()

    def _leave(self) -> None:
        """What happens from here on is not sent before the session is resumed."""
        with self._lock:
            if self.newest is not None:
                self.newest.peer = None

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

    def _send_frame(self, peer: Peer, op: int, content: Json, **more: Json) -> None:
        peer.send(json.dumps({"op": op, "d": content, "s": None, "t": None, **more}))

    def _emit(self, session: Session, event: str, data: Json) -> None:
        session.events.append({"op": DISPATCH, "d": data, "s": len(session.events) + 1, "t": event})
        if session.peer is not None:
            session.peer.send(json.dumps(session.events[-1]))

    def _serve(self, peer: Peer) -> None:
        with self._lock:
            self.connections.append(peer)
        self._send_frame(peer, HELLO, {"heartbeat_interval": self.interval_ms})
        try:
            while True:
                self._take(peer, json.loads(peer.receive()))
        except Gone as gone:
            self.closes.append(gone.code)

    def _take(self, peer: Peer, frame: Json) -> None:
        op, content = frame["op"], frame["d"]
        self.frames.append(Sent(op, content))
        with self._lock:
            if op == HEARTBEAT:
                self._check_beat(content)
                if not self.is_deaf:
                    self._send_frame(peer, ACK, None)
            elif op in (IDENTIFY, RESUME):
                self._begin(peer, op, content)
            else:
                self.faults.append(f"opcode {op}")

    def _check_beat(self, seq: Json) -> None:
        known = len(self.newest.events) if self.newest else 0
        if seq is not None and not 0 < seq <= known:
            self.faults.append(f"a heartbeat with {seq}, and {known} events")

    def _begin(self, peer: Peer, op: int, content: Json) -> None:
        if self.refusals or not self.is_token(content["token"]):
            peer.close(self.refusals.pop(0) if self.refusals else 4004)
        elif op == IDENTIFY:
            self.check_identity(content)
            session = self.newest = Session(f"session{len(self.sessions) + 1}")
            self.sessions[session.id] = session
            session.peer = peer
            self._emit(session, "READY", self.ready(session))
        elif content["session_id"] not in self.sessions:
            self._send_frame(peer, INVALID, False)
        else:
            session = self.newest = self.sessions[content["session_id"]]
            session.peer = peer
            for event in session.events[content["seq"]:]:
                peer.send(json.dumps(event))
            self._emit(session, "RESUMED", {})


class _Handler(BaseHTTPRequestHandler):
    fake: FakeOpcodes
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", "0"))) or b"{}")
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
