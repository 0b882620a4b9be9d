"""HTTP that is not what it should be, byte by byte: each kind has its status, and what two readers
could take for two different requests is refused and ends its connection."""
from __future__ import annotations

from collections.abc import Iterator

import pytest

from chat import CHAT_PATH, encoded, question
from processes import peak_memory
from raw_http import RawConnection, chunked, exchange, head, post, raw_http
from server import Server, running_server

HELLO = encoded(question("hello"))
LENGTH = f"Content-Length: {len(HELLO)}"
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("raw"), env={"OCP_WARM_PROCESSES": "0"}) as running:
        yield running


def get(*lines: bytes, version: bytes = b"HTTP/1.1", host: bytes = b"Host: localhost\r\n") -> bytes:
    """A GET whose header lines are given with their ends."""
    return b"GET /v1/models " + version + b"\r\n" + host + b"".join(lines) + b"\r\n"


def sent_as(*lines: str, body: bytes = HELLO, version: str = "HTTP/1.1") -> bytes:
    """A chat request with these header lines."""
    return head("POST", CHAT_PATH, *lines, version=version) + body


def in_chunks(body: bytes) -> bytes:
    return sent_as("Transfer-Encoding: chunked", body=body)


SIZE = b"%x" % len(HELLO)

#: What is refused with 400 wherever it comes from, by its kind.
BROKEN: dict[str, bytes] = {
    # -- the request line
    "http/0.9": b"GET /v1/models\r\n",
    "http/0.9 with headers": b"GET /v1/models\r\nHost: localhost\r\n\r\n",
    "http/0.8": get(version=b"HTTP/0.8"),
    "http/1.2": get(version=b"HTTP/1.2"),
    "http/1.10": get(version=b"HTTP/1.10"),
    "http/01.1": get(version=b"HTTP/01.1"),
    "small http": get(version=b"http/1.1"),
    "version of other digits": get(version="HTTP/1.\u0661".encode()),
    "http/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "two spaces": b"GET  /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "tab": b"GET\t/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "space at the end": b"GET /v1/models HTTP/1.1 \r\nHost: localhost\r\n\r\n",
    "space at the start": b" GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "space in the path": b"GET /v1/mo dels HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "c1 control in the path": b"GET /v1/\x9b HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "bidi mark in the path": "GET /v1/\u202e HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
    "nbsp in the request line": b"GET\xa0/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "bare cr in the request line": b"GET /v1/models HTTP/1.1\rX: 1\r\nHost: localhost\r\n\r\n",
    "bare lf in the request line": b"GET /v1/models HTTP/1.1\nHost: localhost\r\n\r\n",
    "zero in the path": b"GET /v1/\0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "method that is none": b"G(T /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    # -- header lines
    "bare cr in a header": get(b"X: a\rContent-Length: 5\r\n"),
    "cr cr lf": get(b"X: a\r\r\n"),
    "bare lf behind a header": get(b"X: a\n"),
    "bare lf behind the head": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\n",
    "zero in a header": get(b"X: a\0b\r\n"),
    "vt in a header": get(b"X: a\x0bb\r\n"),
    "delete in a header": get(b"X: a\x7fb\r\n"),
    "folded header": get(b"X: a\r\n b\r\n"),
    "folded first header": get(host=b" Host: localhost\r\n"),
    "space before the colon": get(b"X : a\r\n"),
    "no colon": get(b"nonsense\r\n"),
    "no name": get(b": a\r\n"),
    "name in quotes": get(b'"X": a\r\n'),
    "name of other letters": get("\u00dc: a\r\n".encode()),
    "head that ends early": b"GET /v1/models HTTP/1.1\r\nHost: localh",
    # -- one header twice
    "two hosts": get(b"Host: evil.example\r\n"),
    "the same host twice": get(b"Host: localhost\r\n"),
    "two hosts in other letters": get(b"HOST: localhost\r\n"),
    "two origins": get(b"Origin: http://localhost\r\nOrigin: http://evil.example\r\n"),
    "two authorizations": get(b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n"),
    "two api keys": get(b"x-api-key: a\r\nx-api-key: b\r\n"),
    "two types": post(HELLO, "Content-Type: application/json", "Content-Type: text/plain"),
    "two lengths": sent_as(LENGTH, "Content-Length: 3"),
    "the same length twice": sent_as(LENGTH, LENGTH),
    "two codings": sent_as("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
    "two encodings": post(HELLO, "Content-Encoding: identity", "Content-Encoding: gzip"),
    "two expectations": post(HELLO, "Expect: 100-continue", "Expect: 100-continue"),
    # -- Host
    "no host": get(host=b""),
    "empty host": get(host=b"Host:\r\n"),
    "no host, but an origin": get(b"Origin: http://evil.example\r\n", host=b""),
    "host with a path": get(host=b"Host: localhost/x\r\n"),
    "host with a user": get(host=b"Host: evil@localhost\r\n"),
    "host with a space": get(host=b"Host: localhost evil\r\n"),
    "host with a broken port": get(host=b"Host: localhost:x\r\n"),
    "host with half a bracket": get(host=b"Host: [::1\r\n"),
    "host of other letters": get(host="Host: localh\u00f6st\r\n".encode()),
    # -- the length of a body
    "nbsp in the length": sent_as(f"Content-Length: \xa0{len(HELLO)}"),
    "nbsp behind the length": sent_as(f"Content-Length: {len(HELLO)}\xa0"),
    "vt in the length": sent_as(f"Content-Length: \x0b{len(HELLO)}"),
    "length of other digits": sent_as("Content-Length: \xb2"),
    "list of lengths": sent_as("Content-Length: 5, 5"),
    "signed length": sent_as("Content-Length: +5"),
    "length with an underscore": sent_as("Content-Length: 1_0"),
    "no length in the length": sent_as("Content-Length:"),
    "bad length where no body is wanted": head("GET", "/health", "Content-Length: x"),
    "length and coding": sent_as(LENGTH, "Transfer-Encoding: chunked"),
    "length and coding where no body is wanted": head(
        "GET", "/health", "Content-Length: 0", "Transfer-Encoding: chunked"),
    # -- codings
    "nbsp in the coding": sent_as("Transfer-Encoding: \xa0chunked"),
    "nbsp behind the coding": sent_as("Transfer-Encoding: chunked\xa0"),
    "vt in the coding": sent_as("Transfer-Encoding: \x0bchunked"),
    "other coding": sent_as("Transfer-Encoding: gzip"),
    "other coding before chunked": sent_as("Transfer-Encoding: gzip, chunked"),
    "chunked twice": sent_as("Transfer-Encoding: chunked, chunked"),
    "coding in quotes": sent_as('Transfer-Encoding: "chunked"'),
    "empty coding": sent_as("Transfer-Encoding:"),
    "chunks in http/1.0": sent_as(
        "Transfer-Encoding: chunked", body=chunked(HELLO), version="HTTP/1.0"),
    "coding and length in http/1.0": sent_as(
        LENGTH, "Transfer-Encoding: chunked", version="HTTP/1.0"),
    # -- chunks
    "bare lf behind a chunk size": in_chunks(SIZE + b"\n" + HELLO + b"\r\n0\r\n\r\n"),
    "bare lf behind a chunk": in_chunks(SIZE + b"\r\n" + HELLO + b"\n0\r\n\r\n"),
    "bare lf behind the last chunk": in_chunks(SIZE + b"\r\n" + HELLO + b"\r\n0\n\r\n"),
    "bare lf at the end of the chunks": in_chunks(SIZE + b"\r\n" + HELLO + b"\r\n0\r\n\n"),
    "bare lf in a trailer": in_chunks(SIZE + b"\r\n" + HELLO + b"\r\n0\r\nX: 1\n\r\n"),
    "bare cr in a chunk extension": in_chunks(SIZE + b";a\rb\r\n" + HELLO + b"\r\n0\r\n\r\n"),
    "vt behind a chunk size": in_chunks(SIZE + b"\x0b\r\n" + HELLO + b"\r\n0\r\n\r\n"),
    "nbsp behind a chunk size": in_chunks(SIZE + b"\xa0\r\n" + HELLO + b"\r\n0\r\n\r\n"),
    "space before a chunk size": in_chunks(b" " + SIZE + b"\r\n" + HELLO + b"\r\n0\r\n\r\n"),
    "signed chunk size": in_chunks(b"+" + SIZE + b"\r\n" + HELLO + b"\r\n0\r\n\r\n"),
    "chunk size with an underscore": in_chunks(b"1_0\r\n" + HELLO + b"\r\n0\r\n\r\n"),
    "chunk extension without end": in_chunks(SIZE + b";" + b"a" * 5_000),
    "chunk extensions without end": in_chunks((b"1;" + b"a" * 900 + b"\r\n{\r\n") * 100),
    "trailer without end": in_chunks(b"0\r\n" + b"X: a\r\n" * 20_000),
    "long line in a trailer": in_chunks(b"0\r\nX: " + b"a" * 70_000),
    "broken line in a trailer": in_chunks(b"0\r\nnonsense\r\n\r\n"),
    # -- other protocols
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
    "smtp": b"EHLO localhost\r\n",
    "zeros": b"\0\0\0\0\r\n\r\n",
}

#: What is refused with another status, and why it is another.
REFUSED: dict[str, tuple[bytes, int]] = {
    "long request line": (head("GET", "/" + "a" * 70_000), 431),
    "long header": (get(b"X: " + b"a" * 70_000 + b"\r\n"), 431),
    "long head of short lines": (get(*[b"X: " + b"a" * 900 + b"\r\n"] * 80), 431),
    "many headers": (get(*[b"X: 1\r\n"] * 100), 431),
    "many empty lines": (b"\r\n" * 40_000, 431),
    "connect": (head("CONNECT", "example.com:443"), 404),
    "host with a name and a dot alone": (get(host=b"Host: evil.\r\n"), 403),
    "host of another domain, with a dot at its end": (get(host=b"Host: evil.example.\r\n"), 403),
    "address of another host": (head("GET", "http://evil.example/v1/models"), 403),
    "origin that says nothing": (get(b"Origin: null\r\n"), 403),
    "origin without a host to compare it with": (
        get(b"Origin: null\r\n", host=b"", version=b"HTTP/1.0"), 403),
    "origin of another kind": (get(b"Origin: ftp://localhost\r\n"), 403),
}

#: What is odd, and allowed.
TAKEN: dict[str, bytes] = {
    "http/1.0 without host": get(host=b"", version=b"HTTP/1.0"),
    "empty line before the request": b"\r\n" + get(),
    "ninety-nine headers": get(*[b"X: 1\r\n"] * 99),
    "head of almost 64 KiB": get(b"X: " + b"a" * 65_000 + b"\r\n"),
    "spaces and tabs around a value": get(host=b"Host: \t localhost \t \r\n"),
    "no space before a value": get(host=b"Host:localhost\r\n"),
    "utf-8 in a value": get("X: \u00fc\u2026\r\n".encode()),
    "empty value": get(b"X:\r\n"),
    "host with a dot at its end": get(host=b"Host: localhost.:3456\r\n"),
    "host in capitals, with an empty port": get(host=b"Host: LocalHost:\r\n"),
    "no content coding": sent_as(LENGTH, "Content-Encoding:"),
    "content coding in capitals": sent_as(LENGTH, "Content-Encoding: IDENTITY"),
    "upgrade to http/2 that Java asks for": sent_as(
        LENGTH, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAA"),
    "whole address": head("GET", "http://localhost/v1/models"),
    "slashes too many": head("GET", "///v1//models"),
    "length": post(HELLO),
    "length with zeros": sent_as(f"Content-Length: 000{len(HELLO)}"),
    "chunks": in_chunks(chunked(HELLO)),
    "coding in capitals": sent_as("Transfer-Encoding: CHUNKED", body=chunked(HELLO)),
    "chunk extension": in_chunks(SIZE + b' ; a="b"\r\n' + HELLO + b"\r\n0;c\r\n\r\n"),
    "trailer": in_chunks(chunked(HELLO, trailer=b"X-Sum: 1\r\n")),
}


def status_and_end(server: Server, request: bytes) -> tuple[int, bool]:
    """The status of the answer to all that will come, and whether the connection ends with it."""
    with RawConnection(server.port) as wire:
        wire.send(request)
        wire.end_sending()
        reply = wire.reply()
        return reply.status, reply.headers["Connection"] == "close" and wire.is_closed()


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_clear_request_is_refused_and_ends_its_connection(
    server: Server, name: str
) -> None:
    before = len(server.queries())

    assert status_and_end(server, BROKEN[name]) == (400, True)

    assert len(server.queries()) == before


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_for_another_reason_has_another_status(server: Server, name: str) -> None:
    request, status = REFUSED[name]

    assert status_and_end(server, request)[0] == status


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_only_odd_is_taken(server: Server, name: str) -> None:
    assert exchange(server, TAKEN[name]).status == 200


@pytest.mark.parametrize("name", ["http/0.9", "http/2 preface", "smtp", "tls"])
def test_another_protocol_is_refused_at_once_and_told_what_is_spoken(
    server: Server, name: str
) -> None:
    with RawConnection(server.port) as wire:
        wire.send(BROKEN[name])
        body = wire.reply().body

    assert b"HTTP/1.1" in body or b"http" in body


@pytest.mark.parametrize("request_head", [
    b"HEAD /\xff HTTP/1.1\r\n", b"HEAD / HTTP/2.0\r\n", head("HEAD", "/health", "no colon"),
    head("HEAD", "/health", "Content-Length: x"), head("HEAD", "/health", "X: " + "a" * 70_000),
], ids=["target", "version", "header", "length", "large"])
def test_whoever_asks_for_a_head_gets_no_body_with_a_refusal(
    server: Server, request_head: bytes
) -> None:
    answer = raw_http(server.port, request_head)

    assert answer.startswith(b"HTTP/1.1 4") and answer.endswith(b"\r\n\r\n")


def test_nothing_behind_a_broken_head_is_answered(server: Server) -> None:
    answers = raw_http(server.port, get(b"X: a\n") + get())

    assert answers.count(b"HTTP/1.1 ") == 1


def test_heads_that_never_end_take_no_memory(server: Server) -> None:
    lines = b"X: " + b"a" * 60_000 + b"\r\n"
    wires = [RawConnection(server.port) for _ in range(64)]
    for wire in wires:
        wire.send(get()[:-2])
    assert server.call("GET", "/health").status == 200
    before = peak_memory(server.pid)

    for wire in wires:
        wire.send(lines * 60)
    grown = peak_memory(server.pid) - before
    statuses = [wire.reply().status for wire in wires]
    for wire in wires:
        wire.hang_up()

    # All of them would be 220 MiB.
    assert statuses == [431] * 64
    assert grown < 80 * MEBIBYTE
