"""A stand-in for the Anthropic Messages API on loopback, for tests and benchmarks.

In a test:

    with StubApi() as stub:
        stub.enqueue(text("Paris."), error(529, "Overloaded"))
        ...                                  # point the client at stub.url
        sent = stub.wait_for_requests(2, timeout_s=5)

As a program, `python3 tests/kit/stub_api.py --port 8800` prints its URL and answers until it
is killed. The words found in the last user text choose the answer, see WORDS.

Index: 1 replies   2 wire format   3 server   4 program
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import select
import socket
import sys
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import (
    Any,
    Callable,
    Deque,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    TextIO,
    Union,
)

from api_rules import violation

Json = Any
Body = Mapping[str, Json]


# ---------------------------------------------------------------------------
# 1 Replies: what one request is answered with
# ---------------------------------------------------------------------------

class Block(NamedTuple):
    """One content block: as the message holds it, and the deltas that stream it."""
    content: dict[str, Json]
    deltas: tuple[dict[str, Json], ...]


class Reply(NamedTuple):
    """One scripted answer. Build it with the functions below; their **options are
    the fields from `stop_reason` on, by name."""
    blocks: tuple[Block, ...] = ()
    #: HTTP status; from 400 on, `failure` is the body and `blocks` are not sent.
    status: int = 200
    #: The API's error object, {"type": ..., "message": ...}.
    failure: Optional[dict[str, str]] = None
    #: What follows the blocks: "complete", "error" (an SSE error event), "cut" (the
    #: connection drops) or "hang" (silence for `hang_s` seconds, then complete).
    ending: str = "complete"
    hang_s: float = 0.0
    stop_reason: str = "end_turn"
    stop_sequence: Optional[str] = None
    #: The API's {"type": "refusal", ...} object; sent only if given.
    stop_details: Optional[dict[str, Json]] = None
    #: Seconds before the first byte; and before each delta and a bad ending.
    delay_s: float = 0.0
    gap_s: float = 0.0
    #: Each delta takes one of it, and waits until there is one; None holds nothing up.
    gate: Optional[threading.Semaphore] = None
    input_tokens: int = 10
    cache_read: int = 5
    cache_creation: int = 3
    output_tokens: int = 7
    #: None leaves `output_tokens_details` out of the usage.
    thinking_tokens: Optional[int] = None
    #: How many searches the usage counts; 0 leaves `server_tool_use` out of it.
    web_search_requests: int = 0
    #: HTTP headers; they win over the rate-limit headers that every success carries.
    headers: Mapping[str, str] = {}


ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def text(answer: Union[str, Sequence[str]], chunks: int = 3, **options: Any) -> Reply:
    """A text answer in `chunks` deltas, or, given a list of strings, in exactly these."""
    return Reply(blocks=(_text_block(answer, chunks),))._replace(**options)


def thinking(thought: str, then: str, **options: Any) -> Reply:
    """A thinking block with its signature, and then a text answer."""
    deltas = [{"type": "thinking_delta", "thinking": piece} for piece in _pieces(thought, 3)]
    deltas.append({"type": "signature_delta", "signature": "c3R1YiBzaWduYXR1cmU="})
    content = {"type": "thinking", "thinking": thought, "signature": "c3R1YiBzaWduYXR1cmU="}
    blocks = (Block(content, tuple(deltas)), _text_block(then, 3))
    return Reply(blocks=blocks)._replace(**options)


def tool_calls(
    calls: Sequence[tuple[str, Mapping[str, Json]]],
    text: Optional[str] = None,
    **options: Any,
) -> Reply:
    """Parallel tool calls, (name, input) each, after an optional text.

    The ids are given out when the reply is sent, toolu_01stubREQUESTxBLOCK, because a client
    may not see the same id twice. They have the form of the API's."""
    blocks = [_text_block(text, 3)] if text else []
    blocks += [_tool_block(name, arguments) for name, arguments in calls]
    return Reply(blocks=tuple(blocks), stop_reason="tool_use")._replace(**options)


def error(
    status: int,
    message: str,
    type: Optional[str] = None,
    headers: Mapping[str, str] = {},
    **options: Any,
) -> Reply:
    """An HTTP error; `type` is by default the one the API uses with this status."""
    failure = {"type": type or ERROR_TYPES.get(status, "api_error"), "message": message}
    return Reply(status=status, failure=failure, headers=headers)._replace(**options)


def plan_limit(resets_in_s: float = 3600.0, **options: Any) -> Reply:
    """The 429 of a subscription whose five-hour window is used up."""
    headers = rate_limit_headers(five_hour=1.0, rejected=True, resets_in_s=resets_in_s)
    headers["retry-after"] = str(int(resets_in_s))
    message = "This request would exceed your account's rate limit. Please try again later."
    return error(429, message, headers=headers, **options)


def billed(answer: str, claim: str = "five_hour", resets_in_s: float = 3000.0) -> Reply:
    """An answer that is billed as extra usage, because the plan's window `claim` is used up."""
    headers = rate_limit_headers(five_hour=1.0, rejected=True, resets_in_s=resets_in_s)
    prefix = "anthropic-ratelimit-unified-"
    headers[prefix + "representative-claim"] = claim
    headers[prefix + "overage-status"] = "allowed"
    headers[prefix + "overage-in-use"] = "true"
    return text(answer, headers=headers)


def stream_error(
    after: str = "",
    type: str = "overloaded_error",
    message: str = "Overloaded",
    **options: Any,
) -> Reply:
    """An answer that turns into an SSE `error` event after the text `after`."""
    failure = {"type": type, "message": message}
    return Reply(_started(after), failure=failure, ending="error")._replace(**options)


def cut(after: str = "", **options: Any) -> Reply:
    """An answer whose connection is dropped after the text `after`."""
    return Reply(_started(after), ending="cut")._replace(**options)


def hang(after: str = "", seconds: float = 60.0, **options: Any) -> Reply:
    """An answer that falls silent for `seconds` after the text `after`, then completes."""
    return Reply(_started(after), ending="hang", hang_s=seconds)._replace(**options)


def rate_limit_headers(
    five_hour: float = 0.21,
    seven_day: float = 0.4,
    rejected: bool = False,
    resets_in_s: float = 3000.0,
) -> dict[str, str]:
    """The plan-usage headers of one response; the windows are used shares from 0 to 1."""
    status = "rejected" if rejected else "allowed"
    reset = str(int(time.time() + resets_in_s))
    values = {
        "status": status,
        "representative-claim": "five_hour",
        "reset": reset,
        "5h-status": status,
        "5h-utilization": str(five_hour),
        "5h-reset": reset,
        "7d-status": "allowed",
        "7d-utilization": str(seven_day),
        "7d-reset": str(int(time.time() + 30 * resets_in_s)),
        "overage-status": "rejected",
    }
    return {f"anthropic-ratelimit-unified-{name}": value for name, value in values.items()}


def _started(after: str) -> tuple[Block, ...]:
    return (_text_block(after, 1),) if after else ()


def _text_block(answer: Union[str, Sequence[str]], chunks: int) -> Block:
    pieces = _pieces(answer, chunks) if isinstance(answer, str) else list(answer)
    deltas = tuple({"type": "text_delta", "text": piece} for piece in pieces)
    return Block({"type": "text", "text": "".join(pieces)}, deltas)


def _tool_block(name: str, arguments: Mapping[str, Json]) -> Block:
    # The API starts every tool input with an empty piece; clients have to bear it.
    pieces = [""] + _pieces(json.dumps(arguments), 3)
    deltas = tuple({"type": "input_json_delta", "partial_json": piece} for piece in pieces)
    return Block({"type": "tool_use", "id": "", "name": name, "input": dict(arguments)}, deltas)


def _pieces(whole: str, count: int) -> list[str]:
    """`whole` in at most `count` pieces of equal length, but for the last one."""
    size = max(1, -(-len(whole) // count))
    return [whole[at:at + size] for at in range(0, len(whole), size)]


# ---------------------------------------------------------------------------
# 2 RawConnection format: a reply as SSE events, or as one JSON message
# ---------------------------------------------------------------------------

def _usage(reply: Reply, output_tokens: int) -> dict[str, Json]:
    return {
        "input_tokens": reply.input_tokens,
        "cache_creation_input_tokens": reply.cache_creation,
        "cache_read_input_tokens": reply.cache_read,
        "output_tokens": output_tokens,
    }


def _final_usage(reply: Reply) -> dict[str, Json]:
    usage = _usage(reply, reply.output_tokens)
    if reply.thinking_tokens is not None:
        usage["output_tokens_details"] = {"thinking_tokens": reply.thinking_tokens}
    if reply.web_search_requests:
        usage["server_tool_use"] = {"web_search_requests": reply.web_search_requests}
    return usage


def _message(body: Body, number: int) -> dict[str, Json]:
    """The message object without content, as it stands when the answer begins."""
    return {
        "id": f"msg_stub_{number:04d}",
        "type": "message",
        "role": "assistant",
        "model": body.get("model", "stub"),
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _contents(reply: Reply, number: int) -> list[dict[str, Json]]:
    """The blocks as the message holds them, tool calls with their ids."""
    contents = []
    for index, block in enumerate(reply.blocks):
        content = dict(block.content)
        if content["type"] == "tool_use":
            content["id"] = f"toolu_01stub{number:04d}x{index}"
        contents.append(content)
    return contents


def _stop(reply: Reply) -> dict[str, Json]:
    stop: dict[str, Json] = {
        "stop_reason": reply.stop_reason,
        "stop_sequence": reply.stop_sequence,
    }
    if reply.stop_details is not None:
        stop["stop_details"] = reply.stop_details
    return stop


def _whole(reply: Reply, body: Body, number: int) -> bytes:
    """The answer to a request without "stream": true."""
    message = _message(body, number)
    message.update(_stop(reply), content=_contents(reply, number), usage=_final_usage(reply))
    return json.dumps(message).encode()


def _failure_body(reply: Reply, number: int) -> bytes:
    answer = {"type": "error", "error": reply.failure, "request_id": f"req_stub_{number:04d}"}
    return json.dumps(answer).encode()


def _opening(reply: Reply, body: Body, number: int) -> dict[str, Json]:
    usage = _usage(reply, 1)
    fresh_tokens = {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0}
    usage["cache_creation"] = dict(fresh_tokens, ephemeral_1h_input_tokens=reply.cache_creation)
    usage["service_tier"] = "standard"
    usage["speed"] = body.get("speed", "standard")
    return {"type": "message_start", "message": dict(_message(body, number), usage=usage)}


def _block_events(content: Body, block: Block, index: int, open_end: bool) -> Iterator[Json]:
    """The events of one block. `open_end` leaves it unfinished."""
    empty = {"text": "", "thinking": "", "signature": "", "input": {}}
    start = {name: empty.get(name, value) for name, value in content.items()}
    yield {"type": "content_block_start", "index": index, "content_block": start}
    if index == 0:
        yield {"type": "ping"}
    for delta in block.deltas:
        yield {"type": "content_block_delta", "index": index, "delta": delta}
    if not open_end:
        yield {"type": "content_block_stop", "index": index}


def _closing(reply: Reply, open_blocks: int) -> Iterator[Json]:
    for index in range(open_blocks):
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": _stop(reply), "usage": _final_usage(reply)}
    yield {"type": "message_stop"}


def _frame(event: Body) -> bytes:
    """One SSE event in one HTTP chunk."""
    sse = b"event: %s\ndata: %s\n\n" % (event["type"].encode(), json.dumps(event).encode())
    return b"%x\r\n%s\r\n" % (len(sse), sse)


# ---------------------------------------------------------------------------
# 3 Server
# ---------------------------------------------------------------------------

class Recorded(NamedTuple):
    """One POST /v1/messages as it arrived."""
    path: str
    #: Names in lower case.
    headers: dict[str, str]
    body: dict[str, Json]
    size_bytes: int
    #: time.monotonic() when the body had been read.
    at_s: float


class Refusal(NamedTuple):
    """A request that broke a rule of the API, and the API's words for it."""
    message: str
    recorded: Recorded


class ClientGone(Exception):
    """The client closed its connection before the reply was complete."""


def hello(body: Body) -> Reply:
    """The answer of a StubApi to which nobody gave another default."""
    return text(["Hello ", "from ", "the stub."])


class StubApi:
    """The server and its script. All methods may be called from any thread.

    default         callable(body) -> Reply, asked when no scripted reply is left
    keep_requests   False lets `requests` stay empty, for benchmarks that run long
    on_request      called with each Recorded, in the thread that answers it
    strict          answers with 400 what breaks a rule of api_rules.py; no reply is used up
    """

    def __init__(
        self,
        default: Callable[[Body], Reply] = hello,
        port: int = 0,
        keep_requests: bool = True,
        on_request: Optional[Callable[[Recorded], None]] = None,
        strict: bool = False,
    ) -> None:
        self.default = default
        #: The rate-limit headers of every success; may be replaced at any time. Computed once,
        #: because a client takes another reset time for news.
        self.limits = rate_limit_headers()
        self.on_request = on_request
        self._keep_requests = keep_requests
        self._strict = strict
        #: Guards the five fields below; never held while a reply is sent.
        self._changed = threading.Condition()
        self._script: Deque[Reply] = deque()
        self._requests: list[Recorded] = []
        self._refusals: list[Refusal] = []
        self._numbers = itertools.count(1)
        self._aborted = 0
        self._server = _Server(("127.0.0.1", port), self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.url = "http://127.0.0.1:%d" % self._server.server_address[1]

    def __repr__(self) -> str:
        with self._changed:
            return (f"<StubApi {self.url} requests={len(self._requests)} "
                    f"scripted={len(self._script)} aborted={self._aborted}>")

    def __enter__(self) -> StubApi:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()

    def enqueue(self, *replies: Reply) -> None:
        """Append replies to the script; each request takes the first one left."""
        with self._changed:
            self._script.extend(replies)

    def reply(self, answer: Union[str, Sequence[str]], **options: Any) -> None:
        """Append one text answer to the script; the options are those of text()."""
        self.enqueue(text(answer, **options))

    @property
    def requests(self) -> list[Recorded]:
        """The requests so far, in order; a copy."""
        with self._changed:
            return list(self._requests)

    def take_refusals(self) -> list[Refusal]:
        """The requests that were refused since this was last asked, in order."""
        with self._changed:
            taken, self._refusals = self._refusals, []
            return taken

    @property
    def aborted(self) -> int:
        """How many requests' clients hung up before the reply was complete."""
        with self._changed:
            return self._aborted

    def wait_for_requests(self, count: int, timeout_s: float = 60.0) -> list[Recorded]:
        """The requests so far, once there are `count`; raises TimeoutError."""
        self._wait(lambda: len(self._requests) >= count, f"{count} requests", timeout_s)
        return self.requests

    def wait_for_aborted(self, count: int, timeout_s: float = 60.0) -> None:
        """Return once `aborted` has reached `count`; raises TimeoutError."""
        self._wait(lambda: self._aborted >= count, f"{count} aborted requests", timeout_s)

    def _wait(self, reached: Callable[[], bool], wanted: str, timeout_s: float) -> None:
        with self._changed:
            if not self._changed.wait_for(reached, timeout_s):
                raise TimeoutError(f"no {wanted} within {timeout_s} s, "
                                   f"but {len(self._requests)} and {self._aborted} aborted")

    def _admit(self, recorded: Recorded) -> tuple[int, Reply]:
        """Record a request; its number and its reply, in the order of arrival."""
        complaint = violation(recorded.body, recorded.headers) if self._strict else None
        with self._changed:
            if self._keep_requests:
                self._requests.append(recorded)
            if complaint:
                self._refusals.append(Refusal(complaint, recorded))
            number = next(self._numbers)
            scripted = self._script.popleft() if self._script and not complaint else None
            self._changed.notify_all()
        if self.on_request:
            self.on_request(recorded)
        if complaint:
            return number, error(400, complaint)
        return number, scripted or self.default(recorded.body)

    def _count_aborted(self) -> None:
        with self._changed:
            self._aborted += 1
            self._changed.notify_all()


class _Server(ThreadingHTTPServer):
    # Joined in server_close, which hang_up() lets happen at once.
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], stub: StubApi) -> None:
        self.stub = stub
        self.closing = False
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        super().__init__(address, _Exchange)

    def server_bind(self) -> None:
        # HTTPServer.server_bind asks the resolver for the host's name, which can take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name = str(self.server_address[0])
        self.server_port = self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def hang_up(self) -> None:
        """End every open connection, so that no handler waits any longer."""
        self.closing = True
        with self._lock:
            for connection in self._connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # The other side was faster.


class _Exchange(BaseHTTPRequestHandler):
    """One connection."""
    protocol_version = "HTTP/1.1"
    # A delta has to leave at once, whatever is still unacknowledged.
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: a benchmark asks thousands of times."""

    def do_GET(self) -> None:
        self._send_whole(404, b"", {})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.path.partition("?")[0] != "/v1/messages":
            self._send_whole(404, b"", {})
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        recorded = Recorded(
            self.path, headers, json.loads(content), len(content), time.monotonic())
        number, reply = self.server.stub._admit(recorded)
        try:
            self._pause(reply.delay_s)
            self._answer(reply, recorded.body, number)
        except (ClientGone, ConnectionError):
            self.close_connection = True
            if not self.server.closing:
                self.server.stub._count_aborted()

    def _answer(self, reply: Reply, body: Body, number: int) -> None:
        headers = {"request-id": f"req_stub_{number:04d}"}
        if reply.status < 400:
            headers.update(self.server.stub.limits)
        headers.update(reply.headers)
        if reply.status >= 400:
            self._send_whole(reply.status, _failure_body(reply, number), headers)
        elif body.get("stream"):
            self._send_head(200, dict(headers, **{
                "content-type": "text/event-stream; charset=utf-8",
                "transfer-encoding": "chunked",
            }))
            self._stream(reply, body, number)
        else:
            self._send_message(reply, body, number, headers)

    def _stream(self, reply: Reply, body: Body, number: int) -> None:
        broken = reply.ending != "complete"
        self._send(_opening(reply, body, number))
        for index, content in enumerate(_contents(reply, number)):
            for event in _block_events(content, reply.blocks[index], index, broken):
                if event["type"] == "content_block_delta":
                    self._pause(reply.gap_s)
                    while reply.gate and not reply.gate.acquire(blocking=False):
                        self._pause(0.01)
                self._send(event)
        if broken:
            # What was sent has to be read, and then understood, before the end overtakes it.
            self._pause(reply.gap_s)
            while reply.gap_s and is_unread(self.client_address[1], self.server.server_port):
                self._pause(0.01)
            self._pause(reply.gap_s)
        if reply.ending == "cut":
            self.close_connection = True
            return
        if reply.ending == "error":
            self._send({"type": "error", "error": reply.failure})
        else:
            self._pause(reply.hang_s)
            for event in _closing(reply, len(reply.blocks) if broken else 0):
                self._send(event)
        self.wfile.write(b"0\r\n\r\n")

    def _send_message(
        self, reply: Reply, body: Body, number: int, headers: Mapping[str, str]
    ) -> None:
        """Answer a request that wanted no stream, broken in the way that suits it best."""
        if reply.ending == "error":
            kind = (reply.failure or {}).get("type")
            status = next((code for code, name in ERROR_TYPES.items() if name == kind), 500)
            self._send_whole(status, _failure_body(reply, number), headers)
            return
        content = _whole(reply, body, number)
        if reply.ending == "cut":
            self._send_head(200, dict(headers, **{"content-length": str(len(content))}))
            self.wfile.write(content[:len(content) // 2])
            self.close_connection = True
            return
        self._pause(reply.hang_s)
        self._send_whole(200, content, headers)

    def _send(self, event: Body) -> None:
        self.wfile.write(_frame(event))

    def _send_whole(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self._send_head(status, dict(headers, **{
            "content-type": "application/json",
            "content-length": str(len(content)),
        }))
        self.wfile.write(content)

    def _send_head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _pause(self, seconds: float) -> None:
        """Wait, but no longer than the client does: raises ClientGone."""
        deadline_s = time.monotonic() + seconds
        left_s = seconds
        while left_s > 0:
            if select.select([self.connection], [], [], left_s)[0]:
                if not self.connection.recv(1, socket.MSG_PEEK):
                    raise ClientGone
                # The next request is already here, and would wake the select for ever.
                time.sleep(min(0.01, left_s))
            left_s = deadline_s - time.monotonic()


def is_unread(port: int, from_port: int) -> bool:
    """Whether the holder of a port on loopback has not read all that came from another one. Only
    Linux tells; elsewhere it has."""
    try:
        with open("/proc/net/tcp", encoding="ascii") as file:
            rows = [line.split() for line in file][1:]
    except OSError:
        return False
    ends = [f"0100007F:{end:04X}" for end in (port, from_port)]
    return any(row[1:3] == ends and int(row[4].partition(":")[2], 16) > 0 for row in rows)


# ---------------------------------------------------------------------------
# 4 Program
# ---------------------------------------------------------------------------

def _long(words: int) -> Reply:
    return text([f"word{number} " for number in range(words)], output_tokens=words)


#: Words of the last user text -> the answer; the first row that is found wins.
WORDS: Sequence[tuple[str, Callable[[re.Match[str]], Reply]]] = (
    (r"\bSTATUS (\d{3})\b", lambda found: error(int(found[1]), f"The stub says {found[1]}.")),
    (r"\bLIMIT\b",          lambda found: plan_limit()),
    (r"\bLONG (\d+)\b",     lambda found: _long(int(found[1]))),
    (r"\bSLOW\b",           lambda found: text("Hello from the slow stub.", 10, gap_s=0.5)),
    (r"\bTOOL\b",           lambda found: tool_calls([("look", {})])),
    (r"\bTHINK\b",          lambda found: thinking("Let me think about it.", "Thought over.")),
    (r"\bMAXTOKENS\b",      lambda found: text("Half an ans", stop_reason="max_tokens")),
    (r"\bREFUSE\b",         lambda found: text("I", stop_reason="refusal")),
    (r"\bSTREAMERROR\b",    lambda found: stream_error(after="Half ")),
    (r"\bCUT\b",            lambda found: cut(after="Half ")),
    (r"\bHANG\b",           lambda found: hang(after="Half ", seconds=3600)),
)


def last_user_text(body: Body) -> str:
    """The last text block of the last user message, "" if there is none."""
    for message in reversed(body.get("messages", ())):
        if message["role"] == "user":
            content = message["content"]
            if isinstance(content, str):
                return content
            texts = [block["text"] for block in content if block["type"] == "text"]
            return texts[-1] if texts else ""
    return ""


def answer_by_words(body: Body) -> Reply:
    """The reply that the words of the last user text ask for, see WORDS."""
    asked = last_user_text(body)
    for pattern, build in WORDS:
        found = re.search(pattern, asked)
        if found:
            return build(found)
    return hello(body)


def thinks_first(body: Body) -> bool:
    """Whether a model such as Sonnet 5.5 thinks before it answers this request: at effort low it
    mostly does not, from medium up it almost always does."""
    effort = body.get("output_config", {}).get("effort")
    return bool(body.get("thinking", {}).get("type") == "adaptive" and effort != "low")


def think_for(thinking_s: float) -> Reply:
    """A thought in equal steps, whose text begins after so many seconds."""
    reply = thinking("Let me think about it.", "Thought over.")
    deltas_before_text = len(reply.blocks[0].deltas)
    return reply._replace(gap_s=thinking_s / (deltas_before_text + 1))


def _log_to(stream: TextIO) -> Callable[[Recorded], None]:
    lock = threading.Lock()

    def write(recorded: Recorded) -> None:
        with lock:
            stream.write(json.dumps(recorded._asdict()) + "\n")
            stream.flush()
    return write


def main(arguments: Optional[Iterable[str]] = None) -> int:
    parser = argparse.ArgumentParser(description="A stand-in for the Anthropic Messages API.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--delay-ms", type=float, default=0, help="before the first byte")
    parser.add_argument(
        "--think-ms", type=float, default=0, help="thinking before the text, above effort low")
    parser.add_argument("--log", type=argparse.FileType("a"), help="append requests as JSON")
    options = parser.parse_args(None if arguments is None else list(arguments))

    def answer(body: Body) -> Reply:
        thinks = options.think_ms and thinks_first(body)
        reply = think_for(options.think_ms / 1000) if thinks else answer_by_words(body)
        return reply._replace(delay_s=options.delay_ms / 1000)

    log = _log_to(options.log) if options.log else None
    with StubApi(answer, options.port, keep_requests=False, on_request=log) as stub:
        print(stub.url, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
