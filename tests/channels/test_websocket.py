"""The WebSocket client, against a server that is written from the RFC."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import struct
import tracemalloc
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from channel_tools import channels
from depth import by_depth
from tls_files import write_tls_files
from websocket_server import (
    CLOSE,
    PING,
    PONG,
    TEXT,
    Gone,
    Peer,
    WebSocketServer,
    close_payload,
    frame,
)

CONTINUATION, BINARY = 0, 2


@contextlib.contextmanager
def connected(serve: Callable[[Peer], None]) -> Iterator[tuple[Any, WebSocketServer]]:
    """A connection to a server that does this."""
    with WebSocketServer(serve) as server:
        socket = channels.WebSocket.connect(channels.Connector("", {}), server.url + "/path?q=1")
        try:
            yield socket, server
        finally:
            socket.cut()
        assert server.peers[0].path == "/path?q=1"


def echo(peer: Peer) -> None:
    """Say what was heard."""
    while True:
        peer.send(peer.receive())


def sends(*pieces: bytes) -> Callable[[Peer], None]:
    """A server that sends these bytes, and then waits for the client to go."""
    def serve(peer: Peer) -> None:
        for piece in pieces:
            peer.send_bytes(piece)
        peer.receive()
    return serve


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 300_000])
def test_messages_of_every_size_come_back(size: int) -> None:
    text = "\u00e9" * (size // 2) + "x" * (size % 2)
    with connected(echo) as (socket, server):
        socket.send(text)
        assert socket.receive(20) == text
        socket.close()
    assert not server.faults


def test_a_message_in_fragments_is_one_and_pings_between_them_are_answered() -> None:
    heard: list[str] = []

    def serve(peer: Peer) -> None:
        peer.send_bytes(frame(TEXT, b"one ", is_final=False) + frame(PING, b"are you there")
                        + frame(CONTINUATION, b"two ", is_final=False) + frame(PONG, b"")
                        + frame(CONTINUATION, b"three"))
        opcode, _, payload = peer._read_frame()
        heard.append(f"{opcode} {payload.decode()}")
        peer.receive()

    with connected(serve) as (socket, _):
        assert socket.receive(5) == "one two three"
    assert heard == [f"{PONG} are you there"]


def test_a_frame_that_comes_byte_by_byte_is_read() -> None:
    with connected(sends(*(bytes([each]) for each in frame(TEXT, b"hello")))) as (socket, _):
        assert socket.receive(5) == "hello"


def test_frames_that_come_with_the_answer_to_the_upgrade_are_read() -> None:
    def serve(peer: Peer) -> None:
        peer.shake_hands(extra=frame(TEXT, b"early") + frame(TEXT, b"next"))
        peer.receive()

    with WebSocketServer(serve, shakes_hands=False) as server:
        socket = channels.WebSocket.connect(channels.Connector("", {}), server.url)
        assert [socket.receive(5), socket.receive(5)] == ["early", "next"]
        socket.close()


def test_nothing_in_time_is_none() -> None:
    with connected(sends()) as (socket, _):
        assert socket.receive(0.0) is None
        assert socket.receive(-1.0) is None


@pytest.mark.parametrize(("sent", "code"), [
    (frame(CLOSE, close_payload(4014, "no intents")), 4014),
    (frame(CLOSE, b""), 1005),
    (frame(TEXT, b"a", reserved=4), 1002),
    (b"\x81\x81" + b"mask" + b"a", 1002),
    (frame(CONTINUATION, b"a"), 1002),
    (frame(TEXT, b"a", is_final=False) + frame(TEXT, b"b"), 1002),
    (frame(PING, b"a" * 126), 1002),
    (frame(PING, b"a", is_final=False), 1002),
    (frame(3, b"a"), 1002),
    (frame(TEXT, b"\xff"), 1007),
    (struct.pack("!BBQ", 0x81, 127, 1 << 40), 1009),
])
def test_the_end_of_a_connection_has_a_code(sent: bytes, code: int) -> None:
    codes: list[int] = []

    def serve(peer: Peer) -> None:
        peer.send_bytes(sent)
        try:
            peer.receive()
        except Gone as gone:
            codes.append(gone.code)

    with connected(serve) as (socket, _):
        with pytest.raises(channels.WebSocketClosed) as closed:
            socket.receive(5)
        assert closed.value.code == code
        with pytest.raises(channels.WebSocketClosed):
            socket.send("too late")
    assert codes == [code]


def test_an_end_without_a_word_is_1006() -> None:
    with connected(lambda peer: peer.drop()) as (socket, _):
        with pytest.raises(channels.WebSocketClosed) as closed:
            socket.receive(5)
    assert closed.value.code == 1006


def test_the_code_of_a_close_reaches_the_server() -> None:
    codes: list[int] = []

    def serve(peer: Peer) -> None:
        try:
            peer.receive()
        except Gone as gone:
            codes.append(gone.code)

    with connected(serve) as (socket, _):
        socket.close(4000)
    assert codes == [4000]


@pytest.mark.parametrize(("answer", "why"), [
    (b"HTTP/1.1 403 Forbidden\r\n\r\n", "403 Forbidden"),
    (b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: AAAA\r\n\r\n", "wrong Sec-"),
    (b"HTTP/1.1 101", "broke off"),
])
def test_an_answer_that_is_no_websocket_is_told(answer: bytes, why: str) -> None:
    def serve(peer: Peer) -> None:
        peer._read_head()
        peer.send_bytes(answer)

    with WebSocketServer(serve, shakes_hands=False) as server:
        with pytest.raises(channels.NetworkFailed, match=why):
            channels.WebSocket.connect(channels.Connector("", {}), server.url)


def test_it_goes_through_a_proxy() -> None:
    with WebSocketServer(echo) as server:
        connector = channels.Connector(f"http://127.0.0.1:{server.port}", {})
        socket = channels.WebSocket.connect(connector, "ws://gateway.example:8080")
        socket.send("hello")
        assert socket.receive(5) == "hello"
        socket.close()
    assert server.peers[0].proxied == "gateway.example:8080"
    assert server.peers[0].headers["host"] == "gateway.example:8080"


def test_messages_come_whole_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_tls_files(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["OCP_TLS_CERT"], files["OCP_TLS_KEY"])
    trusting = ssl.create_default_context(cafile=files["OCP_TLS_CERT"])
    monkeypatch.setattr(channels, "trusted_servers", lambda: trusting)
    server = WebSocketServer(echo)
    server._socket = context.wrap_socket(server._socket, server_side=True)
    with server:
        client = channels.WebSocket.connect(
            channels.Connector("", {}), f"wss://localhost:{server.port}")
        # Several in one record of TLS: select does not see those behind the first.
        for size in (1, 20, 300_000):
            client.send("x" * size)
        assert [len(client.receive(20)) for _ in range(3)] == [1, 20, 300_000]
        client.close()
    assert not server.faults


def test_no_bytes_of_any_form_do_more_than_end_the_connection_and_nothing_stays_of_them() -> None:
    chance, sizes = random.Random(17), []
    tracemalloc.start()
    try:
        for number in range(by_depth(300, 1000, 10_000)):
            ours, theirs = socket.socketpair()
            client = channels.WebSocket(ours)
            with theirs:
                theirs.sendall(odd_bytes(chance))
                theirs.shutdown(socket.SHUT_WR)
                with pytest.raises(channels.WebSocketClosed):
                    while client.receive(5) is not None:
                        pass
            client.cut()
            if number % 100 == 99:
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[-1] - sizes[1] < 200_000, sizes


def odd_bytes(chance: random.Random) -> bytes:
    """Frames of which some are good, some have other lengths or bits, and some are no frames."""
    whole = bytearray()
    # No more than a socket holds until somebody reads it.
    sizes = [chance.choice([0, 1, 2, 125, 126, 200]) for _ in range(chance.randint(1, 6))]
    for size in [*sizes, *[66_000] * (chance.random() < 0.1)]:
        payload = chance.randbytes(size) if chance.random() < 0.5 else b"x" * size
        whole += frame(chance.choice([CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG, 3, 15]),
                       payload, is_final=chance.random() < 0.7,
                       reserved=chance.choice([0, 0, 0, 0, 4]))
    for _ in range(chance.choice([0, 0, 1, 3])):
        whole[chance.randrange(min(len(whole), 12))] = chance.randrange(256)
    return bytes(whole[:chance.randint(1, len(whole))])
