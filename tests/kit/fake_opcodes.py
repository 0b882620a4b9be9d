"""What Discord and QQ have in common, on loopback: a gateway, and an API of JSON calls.

    gateway.emit("MESSAGE_CREATE", {...})    # to the newest session, now or when it is resumed
    gateway.ask_to_reconnect(); gateway.invalidate(True); gateway.close(4009); gateway.drop()
    assert gateway.sent(2)                   # what clients have sent with this opcode
"""

from __future__ import annotations

import json
import time
from typing import Any, Callable, NamedTuple, Optional, TypeVar

from fake_api import FakeApi
from websocket_server import Gone, Peer, WebSocketServer

Json = Any
Self = TypeVar("Self", bound="FakeOpcodes")
DISPATCH, HEARTBEAT, IDENTIFY, RESUME, RECONNECT, INVALID, HELLO, ACK = 0, 1, 2, 6, 7, 9, 10, 11


class Sent(NamedTuple):
    op: int
    d: Json


class Session:
    """The events of a session, by their number minus one."""

    def __init__(self, session_id: str) -> None:
        self.id = session_id
        self.events: list[Json] = []
        self.peer: Optional[Peer] = None


class FakeOpcodes(FakeApi):
    """A platform for one bot. A subclass adds what a session begins with, and the calls."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self.interval_ms = 41_250
        #: Every frame that clients have sent, and each code that they closed with.
        self.frames: list[Sent] = []
        self.closes: list[int] = []
        #: Whether heartbeats stay without an answer.
        self.is_deaf = False
        #: The codes that the next sessions are refused with.
        self.refusals: list[int] = []
        #: A peer gets its events in the order of the session.
        self.sessions: dict[str, Session] = {}
        self.newest: Optional[Session] = None
        #: Each connection in order.
        self.connections: list[Peer] = []
        self.gateway = WebSocketServer(self._serve)

    def __enter__(self: Self) -> Self:
        self.gateway.__enter__()
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
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

    # -- what a test does ---------------------------------------------------------------------

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
