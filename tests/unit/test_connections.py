"""The addresses of the server; what bounds the memory of requests and answers, and who makes room
when connections run out."""
from __future__ import annotations

import io
import json
import re
import socket
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest

from project import load_script
from waiting import eventually

ocp = load_script("ocp_server.py")

Json = Any
MB = 1024 * 1024
CONFIG = ocp.Config(max_body_bytes=16 * MB)


# ---------------------------------------------------------------------------
# The addresses of the server
# ---------------------------------------------------------------------------

def address(bind: str, **fields: Any) -> Any:
    return ocp.ServerAddress(ocp.Config(bind=bind, **fields), bind, 3456)


@pytest.mark.parametrize(("bind", "local"), [
    ("127.0.0.1", "http://127.0.0.1:3456"), ("0.0.0.0", "http://127.0.0.1:3456"),
    ("::", "http://127.0.0.1:3456"), ("::1", "http://[::1]:3456"),
    ("192.168.1.5", "http://192.168.1.5:3456"),
])
def test_a_program_on_this_machine_has_an_address(bind: str, local: str) -> None:
    assert address(bind).local_url == local


@pytest.mark.parametrize(("bind", "network", "expected"), [
    ("0.0.0.0", "192.168.1.5", "http://192.168.1.5:3456"),
    ("::", "fd00::2", "http://[fd00::2]:3456"),
    ("192.168.1.7", "192.168.1.5", "http://192.168.1.7:3456"),
])
def test_a_device_gets_the_address_of_the_network(
    monkeypatch: pytest.MonkeyPatch, bind: str, network: str, expected: str
) -> None:
    monkeypatch.setattr(ocp, "network_address", lambda: network)

    assert address(bind).for_devices() == (expected, "")
    assert address(bind, tls_cert="c.pem").for_devices()[0] == expected.replace("http", "https")


@pytest.mark.parametrize(("fields", "reason"), [
    ({"bind": "127.0.0.1"}, "listens on 127.0.0.1"), ({"bind": "::1"}, "listens on ::1"),
    ({"bind": "0.0.0.0"}, "in no network"),
    ({"bind": "0.0.0.0", "public_url": "none"}, "publishes the server"),
])
def test_a_device_that_reaches_nothing_is_told_why(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, str], reason: str
) -> None:
    monkeypatch.setattr(ocp, "network_address", lambda: "")

    url, note = address(**fields).for_devices()

    assert url == "" and reason in note


def test_the_public_address_of_the_owner_wins() -> None:
    found = address("127.0.0.1", public_url="https://ocp.example.org/x/").for_devices()

    assert found == ("https://ocp.example.org/x", "")


# ---------------------------------------------------------------------------
# The memory budget: 64 MB here
# ---------------------------------------------------------------------------

class Holder:
    """Something that takes memory, and notes when it is cut."""

    def __init__(self, budget: Any, owner: str) -> None:
        self.cuts = 0
        self.budget = budget
        self.hold = ocp.Hold(self.cut)
        self.hold.owner = owner

    def cut(self) -> None:
        self.cuts += 1

    def take(self, megabytes: int) -> None:
        self.budget.resize(self.hold, megabytes * MB, CONFIG)


def test_one_owner_may_hold_half_of_the_memory() -> None:
    budget = ocp.MemoryBudget()
    first, second = Holder(budget, "a"), Holder(budget, "a")

    first.take(20)
    second.take(12)
    with pytest.raises(ocp.MemoryFull):
        second.take(13)

    assert budget.size_bytes == 32 * MB
    assert first.cuts == second.cuts == 0


def test_an_owner_with_too_much_can_still_give_back() -> None:
    budget = ocp.MemoryBudget()
    holder = Holder(budget, "a")

    holder.take(32)
    holder.take(31)
    holder.take(0)

    assert budget.size_bytes == 0


def test_when_all_is_taken_the_owner_with_the_most_loses_the_largest() -> None:
    budget = ocp.MemoryBudget()
    holders = [Holder(budget, owner) for owner in ("a", "a", "a", "b", "c")]
    large, larger, small, other, innocent = holders

    for holder, megabytes in zip(holders, (10, 14, 8, 28, 3)):
        holder.take(megabytes)
    assert not any(holder.cuts for holder in holders)
    innocent.take(5)

    assert [holder.cuts for holder in holders] == [0, 1, 0, 0, 0]


def test_a_larger_body_means_more_memory() -> None:
    budget = ocp.MemoryBudget()
    hold = ocp.Hold(lambda: None)

    budget.resize(hold, 400 * MB, ocp.Config(max_body_bytes=200 * MB))

    assert budget.size_bytes == 400 * MB


# ---------------------------------------------------------------------------
# Connections
# ---------------------------------------------------------------------------

@pytest.fixture
def pair() -> Iterator[tuple[Any, socket.socket]]:
    """A connection of the server's, and its client's end."""
    ours, theirs = socket.socketpair()
    connection = ocp.Connection(ours, "127.0.0.1", ocp.MemoryBudget())
    connection.config = ocp.Config(write_timeout_ms=60_000)
    yield connection, theirs
    connection.cut()
    ours.close()
    theirs.close()


def everything(sock: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        piece = sock.recv(65_536)
        assert piece
        received += piece
    return received


def test_nobody_waits_for_a_client_that_does_not_read(pair: tuple[Any, socket.socket]) -> None:
    connection, client = pair
    pieces = [bytes([number]) * 100_000 for number in range(100)]

    for piece in pieces:
        connection.send(piece)

    assert connection.unread.size_bytes > 5_000_000
    assert everything(client, 10_000_000) == b"".join(pieces)
    connection.flush()
    assert eventually(lambda: connection.unread.size_bytes == 0)


def test_a_client_that_stands_still_too_long_is_given_up(pair: tuple[Any, socket.socket]) -> None:
    connection, _ = pair
    connection.config = ocp.Config(write_timeout_ms=100)

    connection.send(b"x" * 5_000_000)

    with pytest.raises(ocp.ClientGone):
        connection.flush()
    with pytest.raises(ocp.ClientGone):
        connection.send(b"more")
    assert connection.gone()
    assert eventually(lambda: connection.unread.size_bytes == 0)


def test_a_client_that_leaves_ends_what_waits_for_it(pair: tuple[Any, socket.socket]) -> None:
    connection, client = pair
    connection.send(b"x" * 5_000_000)
    waiting = threading.Thread(target=lambda: pytest.raises(ocp.ClientGone, connection.flush))

    waiting.start()
    client.close()
    waiting.join(25)

    assert not waiting.is_alive()
    assert connection.gone()


def test_a_client_that_leaves_more_unread_than_it_may_is_cut_off(
    pair: tuple[Any, socket.socket]
) -> None:
    connection, client = pair

    with pytest.raises(ocp.ClientGone):
        for _ in range(200):
            connection.send(b"x" * 1_000_000)

    assert connection.gone()
    assert eventually(lambda: connection.unread.size_bytes == 0)


def test_what_a_client_sends_ahead_is_kept_for_its_reader(pair: tuple[Any, socket.socket]) -> None:
    connection, client = pair
    client.sendall(b"next request")

    assert not connection.gone()
    buffer = bytearray(4)
    taken = b""
    while len(taken) < 12:
        taken += buffer[:connection.receive_into(memoryview(buffer))]

    assert taken == b"next request"
    assert connection.receive_into(memoryview(buffer)) is None


class Visitor:
    """A connection as the table of connections sees it."""

    def __init__(
        self, peer: str, quiet_since_s: float, *, is_trusted: bool = False, is_busy: bool = False,
        is_new: bool = False,
    ) -> None:
        self.peer, self.quiet_since_s = peer, quiet_since_s
        self.opened_s = float("inf") if is_new else 0.0
        self.is_trusted, self.is_busy = is_trusted, is_busy
        self.cuts = 0

    def cut(self) -> None:
        self.cuts += 1


@pytest.mark.parametrize(("present", "leaving"), [
    # The one that rested longest,
    ([Visitor("a", 2), Visitor("a", 1), Visitor("a", 3)], 1),
    # of the address with the most,
    ([Visitor("b", 1), Visitor("a", 2), Visitor("a", 3)], 1),
    # of those without a key,
    ([Visitor("a", 1, is_trusted=True), Visitor("a", 2, is_trusted=True), Visitor("b", 3)], 2),
    # which do not count as such while they are new,
    ([Visitor("a", 1, is_trusted=True), Visitor("a", 2, is_trusted=True),
      Visitor("a", 3, is_new=True)], 0),
    ([Visitor("a", 1, is_trusted=True), Visitor("a", 2), Visitor("a", 3, is_new=True)], 1),
    # and never one that is being answered.
    ([Visitor("a", 1, is_busy=True), Visitor("a", 2, is_busy=True),
      Visitor("b", 3, is_trusted=True)], 2),
])
def test_one_that_waits_for_its_client_makes_room(present: list[Any], leaving: int) -> None:
    connections, newcomer = ocp.Connections(), Visitor("c", 9)
    for each in present:
        assert connections.add(each, 3) is None

    assert connections.add(newcomer, 3) is present[leaving]

    assert [each.cuts for each in present] == [int(at == leaving) for at in range(3)]
    assert len(connections) == 3


def test_nobody_makes_room_while_all_are_answered() -> None:
    connections = ocp.Connections()
    connections.add(Visitor("a", 1, is_busy=True), 1)

    with pytest.raises(ocp.Busy):
        connections.add(Visitor("b", 2), 1)

    assert len(connections) == 1


# ---------------------------------------------------------------------------
# Refusals before a request is read
# ---------------------------------------------------------------------------

@pytest.fixture
def listening() -> Iterator[Any]:
    """A server that listens and accepts nothing."""
    refusals = ocp.Refusals(ocp.Log(io.StringIO(), "error"))
    log = ocp.Log(io.StringIO(), "error")
    app = types.SimpleNamespace(
        config=ocp.Config(port=0), connections=ocp.Connections(), refusals=refusals, log=log,
        intervals=ocp.Intervals(time.monotonic))
    with ocp.Server(app, ()) as server:
        yield server


def test_a_refused_connection_gets_a_whole_response(
    listening: Any, pair: tuple[Any, socket.socket]
) -> None:
    connection, client = pair

    listening._reject(connection, ocp.Busy("Too many.", retry_after_s=7))

    with client.makefile("rb") as stream:
        client.shutdown(socket.SHUT_WR)
        head, _, body = stream.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nRetry-After: 7\r\n" in head and b"\r\nConnection: close" in head
    assert f"\r\nContent-Length: {len(body)}\r\n".encode() in head
    assert json.loads(body)["error"]["code"] == "too_many_connections"


def test_a_refusal_that_gets_no_thread_keeps_no_place(
    listening: Any, pair: tuple[Any, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    connection, client = pair
    monkeypatch.setattr(threading.Thread, "start", fail)

    listening._reject(connection, ocp.Busy("Too many."))

    assert client.recv(1) == b""
    places = range(ocp._MAX_REJECTIONS)
    assert all(listening._rejections.acquire(blocking=False) for _ in places)


def test_a_client_for_whom_the_machine_has_no_thread_gets_a_whole_response(
    listening: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    for _ in range(3):
        with socket.create_connection(listening.server_address[:2]) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            listening.handle_request()
            with client.makefile("rb") as stream:
                head, _, body = stream.read().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ") and b"\r\nRetry-After: 5\r\n" in head
        assert "no thread left" in json.loads(body)["error"]["message"]
    assert len(listening.app.connections) == 0
    # However many clients come, the log has one line.
    logged = [each["event"] for each in listening.app.log.recent(9, "all")]
    assert logged == ["no_thread_left"]


# ---------------------------------------------------------------------------
# Bodies with too many values
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("value", [
    [[]] * 400_000, [{}] * 400_000, ["ab"] * 400_000, [1] * 400_000, [{"a": "b"}] * 250_000,
    [["\\\"", "\\"]] * 200_000,
])
def test_a_body_of_too_many_values_is_told(value: Json) -> None:
    assert ocp.has_many_values(json.dumps({"messages": value}).encode())


@pytest.mark.parametrize("text", [
    "a, b, [c], {d}\n" * 100_000, '{"a": [1, 2]},\n' * 100_000, '\\"\\\\", [' * 100_000,
    "\\" * 1_000_000 + "[,{" * 200_000,
])
def test_a_body_of_long_texts_is_not(text: str) -> None:
    body = {"messages": [{"role": "user", "content": text}] * 3}

    assert not ocp.has_many_values(json.dumps(body).encode())


@pytest.mark.parametrize("broken", [b"[," * 400_000, b'{"messages":["' + b'\\",["' * 400_000])
def test_text_that_ends_early_is_weighed_too(broken: bytes) -> None:
    assert ocp.has_many_values(broken)


def test_arrays_of_very_many_objects_are_refused_by_name() -> None:
    messages = [{"role": "user", "content": "a"}] * 20_001

    with pytest.raises(ocp.BadRequest) as caught:
        ocp.Fields({"messages": messages}).objects("messages")

    assert caught.value.param == "messages" and "at most 20000" in caught.value.message
    assert len(ocp.Fields({"messages": messages[1:]}).objects("messages")) == 20_000


@pytest.mark.parametrize("counted_bytes", [1, 2, 3, 7, 64])
def test_values_are_counted_alike_in_pieces_of_any_size(
    monkeypatch: pytest.MonkeyPatch, counted_bytes: int
) -> None:
    text = json.dumps([{"a\\": ['\\"[[[', "\\\\", "{,", '"', "\\"]}, ["[", "\\\\\\"]] * 20).encode()
    monkeypatch.setattr(ocp, "_COUNTED_BYTES", counted_bytes)
    verdicts = []
    for maximum in range(150, 400):
        monkeypatch.setattr(ocp, "_MAX_JSON_VALUES", maximum)
        verdicts.append(ocp.has_many_values(text))

    expected = sum(map(bare(text).count, (b"[", b"{", b",")))
    assert verdicts == [maximum < expected for maximum in range(150, 400)]


def bare(text: bytes) -> bytes:
    """The text of a JSON value without its strings."""
    return re.sub(rb'"(?:[^"\\]|\\.)*"', b"", text)


def test_freed_memory_goes_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    ctypes = pytest.importorskip("ctypes")
    calls: list[tuple[object, ...]] = []

    class Library:
        """A C library that notes what it is told."""

        def mallopt(self, parameter: int, value: int) -> None:
            calls.append(("mallopt", parameter, value))

        def malloc_trim(self, kept_bytes: int) -> None:
            calls.append(("malloc_trim", kept_bytes))

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    ocp.return_freed_memory()

    # M_MMAP_THRESHOLD is -3 in glibc's malloc.h.
    assert calls == [("mallopt", -3, 1_048_576), ("malloc_trim", 0)]


def test_a_c_library_without_that_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ctypes = pytest.importorskip("ctypes")
    libraries: list[object] = []

    def load(name: object) -> object:
        libraries.append(object())
        return libraries[-1]

    monkeypatch.setattr(ctypes, "CDLL", load)
    ocp.return_freed_memory()

    assert len(libraries) == 1


@pytest.mark.parametrize("before, options", [
    ("", []),
    ("-u -W error -Xutf8 -uWignore", ["-u", "-W", "error", "-Xutf8", "-uWignore"]),
    ("-m pdb", None),
    ("-um pdb", None),
    ("/usr/bin/coverage run", None),
    ("--", None),
])
def test_only_a_script_that_python_itself_runs_is_started_again(
    before: str, options: list[str] | None
) -> None:
    script = ["/srv/ocp server.py", "--port", "4000"]

    assert ocp.python_options(["/usr/bin/python3", *before.split(), *script], script) == options
