"""https: answers, streams and ends of connections behind TLS, and files that cannot be used."""
from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest

from chat import CHAT_PATH, HANG, NO_IDLE, content_of, encoded, finish_reasons, pieces, question
from http_client import Body, Reply, Stream
from processes import is_gone
from project import load_script
from raw_http import RawConnection, head, post, raw_http
from server import Place, Server, asked_process, run_server, running_server
from tls_files import CERT, KEY, write_tls_files
from waiting import SOON_S, eventually

ocp = load_script("ocp_server.py")

Json = Any


#: A key of another certificate, and the key above behind a password.
OTHER_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgAwJrz5QS6c/5SllU
J6wTuaPo5lVzEgddf6D28D1bIoyhRANCAAR86HFMErLneDsom0lvx1HW8bzJdDw9
jXjBlw2RUmV3/k77MFSB2RQelJb1B05j+EpJ5LDm3+cSSd13+7dZfghf
-----END PRIVATE KEY-----
"""
LOCKED_KEY = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAhzVNgwzJFlFgICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEM0Hiw8eZfXvvwXLd0qvw9sEgZCW
uoOfEDzi/E2cw/ru1dAalMz3jPe7x3kGSibNfkZGwvTrnNyOm8z2Z8gy2KQ8vMI5
Iid95komXyBGMzqpfDO8SEZdHdbdinx8PdmtQ6k6oOmTnXcaFcPB+3a6gfj6AR49
2UoD45lIbU7t0FXrOPgoFNS/KyoUw1XetaAms9eB8SygjxLfcjEOKSo8ej0+x7Q=
-----END ENCRYPTED PRIVATE KEY-----
"""


def trusting(folder: Path) -> ssl.SSLContext:
    """What a client needs that trusts the certificate and nothing else."""
    context = ssl.create_default_context(cafile=str(folder / "cert.pem"))
    context.check_hostname = True
    return context


class Secure:
    """A server that speaks https, and its clients."""

    def __init__(self, server: Server, context: ssl.SSLContext) -> None:
        self.server = server
        self.context = context

    def connection(self, host: str = "localhost") -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(
            host, self.server.port, timeout=60, context=self.context)

    def sent(self, path: str, body: Json) -> http.client.HTTPSConnection:
        connection = self.connection()
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def call(self, method: str, path: str, body: Body = None, **headers: str) -> Reply:
        content = body if body is None or isinstance(body, (bytes, str)) else json.dumps(body)
        with contextlib.closing(self.connection()) as connection:
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())

    def told(self, text: Json = "hi", **fields: Json) -> Stream:
        """A chat request whose answer is read as it comes; to be used in a `with`."""
        return Stream(self.sent(CHAT_PATH, question(text, stream=True, **fields)))

    def wire(self) -> TlsConnection:
        return TlsConnection(self.server.port, context=self.context)

    def health(self) -> Json:
        return self.call("GET", "/health").json()

    def at_rest(self) -> bool:
        found = self.health()["concurrency"]
        return (found["inflight"], found["queued"]) == (0, 0)


class TlsConnection(RawConnection):
    """A connection behind TLS."""

    def say_goodbye(self) -> None:
        """Ends TLS, and not the connection below it."""
        self.socket.settimeout(0.2)
        with contextlib.suppress(OSError):
            self.socket.unwrap()

    def until(self, words: bytes) -> None:
        """Reads on until something has been said."""
        line = b""
        while words not in line:
            line = self._file.readline()
            assert line


@pytest.fixture(scope="module")
def shared_secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    folder = tmp_path_factory.mktemp("secure")
    with running_server(folder, env=write_tls_files(folder)) as server:
        yield Secure(server, trusting(folder))


@pytest.fixture
def secure(shared_secure: Secure) -> Secure:
    """A server behind TLS, with a claude that repeats what it hears."""
    shared_secure.server.write_scenario([])
    return shared_secure


# ---------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------

def test_an_answer_that_is_read_late_is_whole(secure: Secure) -> None:
    secure.server.write_scenario([[{"say": "x" * 6_000_000, "chunks": 64}]])

    with secure.wire() as wire:
        wire.send(post(encoded(question(stream=True))))
        assert eventually(lambda: len(secure.server.queries()) and secure.at_rest())
        body = wire.reply().body

    assert body.count(b"x" * 90_000) >= 64 and body.endswith(b"data: [DONE]\n\n")


def test_a_server_with_a_certificate_says_so(secure: Secure) -> None:
    assert secure.health()["tls"] is True
    assert f"https://127.0.0.1:{secure.server.port}/v1" in secure.server.output
    assert "http://" not in secure.server.output


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_the_certificate_is_the_one_that_was_given(secure: Secure, host: str) -> None:
    with contextlib.closing(secure.connection(host)) as connection:
        connection.connect()
        seen = connection.sock.getpeercert(binary_form=True)

    assert seen == ssl.PEM_cert_to_DER_cert(CERT)


def test_nothing_older_than_tls_1_2_is_spoken(tmp_path: Path) -> None:
    context = ocp.tls_context(ocp.load_config(write_tls_files(tmp_path)))

    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_without_a_certificate_there_is_no_tls() -> None:
    assert ocp.tls_context(ocp.Config()) is None


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_answer_comes_over_either_version(
    secure: Secure, version: ssl.TLSVersion, tmp_path: Path
) -> None:
    write_tls_files(tmp_path)
    context = trusting(tmp_path)
    context.minimum_version = context.maximum_version = version

    reply = Secure(secure.server, context).call("POST", CHAT_PATH, question("over TLS"))

    assert content_of(reply) == "You said: over TLS"


def test_a_client_that_offers_other_protocols_gets_http_1_1(
    secure: Secure, tmp_path: Path
) -> None:
    write_tls_files(tmp_path)
    context = trusting(tmp_path)
    context.set_alpn_protocols(["h2", "http/1.1"])

    with TlsConnection(secure.server.port, context=context) as wire:
        assert wire.socket.selected_alpn_protocol() == "http/1.1"


def test_a_stream_comes_piece_by_piece(secure: Secure) -> None:
    secure.server.write_scenario([[{"say": "one "}, HANG]])

    with secure.told() as stream:
        events = iter(stream)
        said = [pieces([next(events)]) for _ in range(2)]

    assert ["one "] in said


def test_a_stream_comes_whole(secure: Secure) -> None:
    with secure.told("well, well") as stream:
        events = list(stream)

    assert "".join(pieces(events)) == "You said: well, well"
    assert finish_reasons(events) == ["stop"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_long_answer_to_a_long_question_comes_whole(secure: Secure, stream: bool) -> None:
    text = " ".join(str(number) * 1000 for number in range(100, 200))
    sent = secure.sent(CHAT_PATH, question(text, stream=stream))

    with contextlib.closing(sent) as connection:
        response = connection.getresponse()
        reply = Reply(response.status, response.headers, response.read())

    said = "".join(pieces(reply.events)) if stream else content_of(reply)
    assert said == f"You said: {text}"


def test_the_end_of_an_answer_without_a_length_is_told(secure: Secure) -> None:
    body = encoded(question("to the end", stream=True))
    with secure.wire() as wire:
        wire.send(post(body, version="HTTP/1.0"))
        reply = wire.reply()

    assert "".join(pieces(reply.events)) == "You said: to the end"
    assert reply.events[-1][1] == "[DONE]"


def test_a_page_of_the_server_itself_is_let_in_and_others_are_not(secure: Secure) -> None:
    own = {"Origin": f"https://127.0.0.1:{secure.server.port}",
           "Host": f"127.0.0.1:{secure.server.port}"}

    statuses = [secure.call("GET", "/v1/models", **headers).status
                for headers in (own, {**own, "Origin": "https://evil.example"})]

    assert statuses == [200, 403]


# ---------------------------------------------------------------------------
# Several choices
# ---------------------------------------------------------------------------

def test_several_choices_come_whole(secure: Secure) -> None:
    reply = secure.call("POST", CHAT_PATH, question("three times", n=3))

    assert [choice["message"]["content"] for choice in reply.json()["choices"]] == [
        "You said: three times"] * 3


def test_several_choices_come_one_after_another(secure: Secure) -> None:
    words = [f"{number} " for number in range(300)]
    secure.server.write_scenario([[{"say": word} for word in words]])

    with secure.told(n=3) as stream:
        events = list(stream)

    said = {0: "", 1: "", 2: ""}
    order = []
    for _, data in events[:-1]:
        for choice in data["choices"]:
            order.append(choice["index"])
            said[choice["index"]] += choice["delta"].get("content") or ""
    assert said == dict.fromkeys(range(3), "".join(words))
    assert order == sorted(order)
    assert finish_reasons(events) == ["stop"] * 3


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_ends_its_choice_and_gets_no_other(
    secure: Secure, stream: bool
) -> None:
    secure.server.write_scenario([[{"say": "well "}, HANG]])
    count = len(secure.server.queries())

    with secure.wire() as wire:
        wire.send(post(encoded(question(n=3, stream=stream))))
        pid = asked_process(secure.server, count + 1)

    assert eventually(lambda: is_gone(pid) and secure.at_rest(), SOON_S)
    assert len(secure.server.queries()) == count + 1


# ---------------------------------------------------------------------------
# Clients that leave
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("goodbye", [False, True], ids=["cut", "goodbye"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("steps", [[HANG], [{"say": "so-far"}, HANG]], ids=["before", "amid"])
def test_a_client_that_leaves_ends_its_turn(
    secure: Secure, steps: list[Json], stream: bool, goodbye: bool
) -> None:
    secure.server.write_scenario([steps])
    count = len(secure.server.queries())

    with secure.wire() as wire:
        wire.send(post(encoded(question(stream=stream))))
        pid = asked_process(secure.server, count + 1)
        if stream and len(steps) > 1:
            wire.until(b"so-far")
        if goodbye:
            wire.say_goodbye()
            assert eventually(lambda: is_gone(pid) and secure.at_rest(), SOON_S)

    assert eventually(lambda: is_gone(pid) and secure.at_rest(), SOON_S)


def test_a_client_that_leaves_behind_another_request_ends_its_turn_too(secure: Secure) -> None:
    secure.server.write_scenario([[{"say": "so far"}, HANG]])
    count = len(secure.server.queries())

    with secure.wire() as wire:
        wire.send(post(encoded(question(stream=True))))
        pid = asked_process(secure.server, count + 1)
        wire.send(post(encoded(question("x" * 30_000))))

    assert eventually(lambda: is_gone(pid) and secure.at_rest(), SOON_S)


def test_a_client_that_half_speaks_is_not_taken_for_gone(secure: Secure, tmp_path: Path) -> None:
    go = tmp_path / "go"
    secure.server.write_scenario([[{"wait_for": str(go)}, {"say": "done"}]])
    count = len(secure.server.queries())
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = secure.context.wrap_bio(incoming, outgoing, server_hostname="localhost")

    with socket.create_connection(("127.0.0.1", secure.server.port), timeout=60) as plain:
        shake_hands(plain, tls, incoming, outgoing)
        tls.write(post(encoded(question())))
        plain.sendall(outgoing.read())
        asked_process(secure.server, count + 1)
        # A record that has begun and not ended yet.
        tls.write(head("GET", "/v1/models"))
        record = outgoing.read()
        plain.sendall(record[:20])
        go.touch()
        first = heard(plain, tls, incoming, b"done")
        plain.sendall(record[20:])
        second = heard(plain, tls, incoming, b"claude-sonnet-5-5")

    assert first.startswith(b"HTTP/1.1 200") and second.startswith(b"HTTP/1.1 200")


def shake_hands(
    plain: socket.socket, tls: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO
) -> None:
    """TLS up to the first word."""
    while True:
        try:
            tls.do_handshake()
            plain.sendall(outgoing.read())
            return
        except ssl.SSLWantReadError:
            plain.sendall(outgoing.read())
            incoming.write(plain.recv(1 << 16))


def heard(
    plain: socket.socket, tls: ssl.SSLObject, incoming: ssl.MemoryBIO, words: bytes
) -> bytes:
    """What comes, up to some words."""
    received = b""
    while words not in received:
        try:
            received += tls.read(1 << 16)
        except ssl.SSLWantReadError:
            piece = plain.recv(1 << 16)
            assert piece, received
            incoming.write(piece)
    return received


# ---------------------------------------------------------------------------
# Several requests on a connection
# ---------------------------------------------------------------------------

def test_a_connection_takes_one_request_after_another(secure: Secure) -> None:
    with secure.wire() as wire:
        for number in range(3):
            wire.send(post(encoded(question(f"number {number}", stream=number == 1))))
            reply = wire.reply()
            said = "".join(pieces(reply.events)) if number == 1 else content_of(reply)
            assert said == f"You said: number {number}"


def test_requests_that_come_together_are_answered_in_their_order(secure: Secure) -> None:
    with secure.wire() as wire:
        wire.send(b"".join(post(encoded(question(f"number {n}"))) for n in range(3)))
        said = [content_of(wire.reply()) for _ in range(3)]

    assert said == [f"You said: number {number}" for number in range(3)]


@pytest.mark.parametrize("size", [10, 16_000, 40_000, 65_536, 300_000])
def test_a_request_that_comes_during_an_answer_is_answered_after_it(
    secure: Secure, tmp_path: Path, size: int
) -> None:
    go = tmp_path / "go"
    secure.server.write_scenario([[{"wait_for": str(go)}, {"say": "at last"}]])
    count = len(secure.server.queries())

    with secure.wire() as wire:
        wire.send(post(encoded(question("first"))))
        asked_process(secure.server, count + 1)
        wire.send(post(encoded(question("x" * size))))
        go.touch()
        said = [content_of(wire.reply()) for _ in range(2)]

    assert said == ["at last"] * 2
    heard_last = secure.server.queries()[-1]["messages"][0]["content"][0]["text"]
    assert heard_last == "x" * size


def test_a_body_in_many_small_records_arrives(secure: Secure) -> None:
    request = post(encoded(question("bit by bit " * 20)))
    with secure.wire() as wire:
        for at in range(0, len(request), 7):
            wire.send(request[at:at + 7])
        reply = wire.reply()

    assert content_of(reply) == "You said: " + "bit by bit " * 20


# ---------------------------------------------------------------------------
# Clients that speak something else
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("request_", [
    head("GET", "/health"), post(encoded(question())), head("GET", "/health", version="HTTP/1.0"),
    b"hello\r\n", post(b"x" * 500_000),
], ids=["get", "post", "old", "prose", "large"])
def test_whoever_speaks_http_is_told_to_speak_https(secure: Secure, request_: bytes) -> None:
    said = raw_http(secure.server.port, request_)

    assert said.startswith(b"HTTP/1.1 400 ")
    assert b"https://" in said.partition(b"\r\n\r\n")[2]


def test_a_client_may_go_on_sending_before_it_reads_that(secure: Secure) -> None:
    with socket.create_connection(("127.0.0.1", secure.server.port), timeout=60) as plain:
        plain.sendall(head("POST", CHAT_PATH, "Content-Length: 200000"))
        assert select.select([plain], [], [], 30)[0]
        for _ in range(20):
            plain.sendall(b"x" * 10_000)
        said = plain.recv(1 << 16)

    assert said.startswith(b"HTTP/1.1 400 ")


def test_a_client_of_http_reads_that_as_an_answer(secure: Secure) -> None:
    reply = secure.server.call("POST", CHAT_PATH, question())

    assert reply.status == 400
    assert "https://" in reply.text


@pytest.mark.parametrize("garbage", [
    b"", b"\x16", b"\x16\x03\x01\x00\x05hello", b"\x16" + b"\xff" * 300, b"\x00" * 50, b"\x80\x2e",
])
def test_a_handshake_that_comes_to_nothing_harms_nobody(secure: Secure, garbage: bytes) -> None:
    with socket.create_connection(("127.0.0.1", secure.server.port), timeout=60) as plain:
        with contextlib.suppress(OSError):
            # The server may have had enough of it before.
            plain.sendall(garbage)
            plain.shutdown(socket.SHUT_WR)
            while plain.recv(1 << 16):
                pass

    assert secure.health()["status"] == "ok"
    assert not secure.server.log_entries("connection_broke")


@pytest.mark.parametrize("beginning", [b"", b"\x16\x03\x01"])
def test_a_client_that_never_finishes_its_handshake_is_cut_off(
    tmp_path: Path, beginning: bytes
) -> None:
    env = {**write_tls_files(tmp_path), "OCP_HEADER_TIMEOUT": "1000"}
    with running_server(tmp_path, env=env) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=25) as plain:
            plain.sendall(beginning)
            with contextlib.suppress(ConnectionResetError):
                assert plain.recv(1) == b""


def test_a_client_that_trusts_nobody_here_is_told_so_by_its_own_library(secure: Secure) -> None:
    suspicious = Secure(secure.server, ssl.create_default_context())

    with pytest.raises(ssl.SSLCertVerificationError):
        suspicious.health()

    assert secure.health()["status"] == "ok"


# ---------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------

def refused(folder: Path, env: dict[str, str], *args: str) -> str:
    """What a start says that is refused."""
    done = run_server(folder, *args, env=env)
    assert (done.code, done.stdout) == (2, "")
    assert all(line.startswith("ocp: ") for line in done.stderr.splitlines()), done.stderr
    return done.stderr


#: Files that cannot be used: certificate, key, and the setting that is to blame.
BAD_FILES: dict[str, tuple[Optional[str], Optional[str], str]] = {
    "no certificate": (None, KEY, "OCP_TLS_CERT"),
    "no key": (CERT, None, "OCP_TLS_KEY"),
    "neither": (None, None, "OCP_TLS_CERT"),
    "empty certificate": ("", KEY, "OCP_TLS_CERT"),
    "certificate of prose": ("hello", KEY, "OCP_TLS_CERT"),
    "key of prose": (CERT, "hello", "OCP_TLS_KEY"),
    "swapped": (KEY, CERT, "OCP_TLS_CERT"),
    "key of another": (CERT, OTHER_KEY, "OCP_TLS_KEY"),
    "key behind a password": (CERT, LOCKED_KEY, "OCP_TLS_KEY"),
    "cut off": (CERT[:200], KEY, "OCP_TLS_CERT"),
}


@pytest.mark.parametrize("args", [(), ("--check",)], ids=["start", "check"])
@pytest.mark.parametrize("what", BAD_FILES)
def test_files_that_cannot_be_used_stop_the_start(
    tmp_path: Path, what: str, args: tuple[str, ...]
) -> None:
    cert, key, setting = BAD_FILES[what]

    said = refused(tmp_path, write_tls_files(tmp_path, cert, key), *args)

    assert setting in said
    assert "PEM" in said
    assert "PRIVATE KEY" not in said and "Traceback" not in said
    assert not Place(tmp_path).ocp_home.exists()


@pytest.mark.parametrize(("what", "name"), [("no certificate", "cert.pem"), ("no key", "key.pem")])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, what: str, name: str) -> None:
    cert, key, _ = BAD_FILES[what]

    said = refused(tmp_path, write_tls_files(tmp_path, cert, key), "--check")

    assert str(tmp_path / name) in said


def test_a_folder_is_no_certificate(tmp_path: Path) -> None:
    env = {**write_tls_files(tmp_path), "OCP_TLS_CERT": str(tmp_path)}

    said = refused(tmp_path, env, "--check")

    assert "OCP_TLS_CERT" in said and str(tmp_path) in said


@pytest.mark.parametrize("alone", ["OCP_TLS_CERT", "OCP_TLS_KEY"])
def test_a_certificate_and_a_key_belong_together(tmp_path: Path, alone: str) -> None:
    env = {**write_tls_files(tmp_path), alone: ""}

    said = refused(tmp_path, env, "--check")

    assert "OCP_TLS_CERT and OCP_TLS_KEY need each other" in said


def test_a_check_says_that_https_will_be_served(tmp_path: Path) -> None:
    done = run_server(tmp_path, "--check", env=write_tls_files(tmp_path))

    assert done.code == 0, done
    assert f"serves https with {tmp_path / 'cert.pem'}" in done.stdout


def test_files_may_be_named_from_the_home_folder(tmp_path: Path) -> None:
    home = Place(tmp_path).home
    home.mkdir()
    write_tls_files(home)
    env = {**NO_IDLE, "OCP_TLS_CERT": "~/cert.pem", "OCP_TLS_KEY": "~/key.pem"}

    with running_server(tmp_path, env=env) as server:
        assert Secure(server, trusting(home)).health()["tls"] is True


def test_health_tells_the_fingerprint_of_a_certificate_that_nobody_vouches_for(
    secure: Secure, tmp_path: Path
) -> None:
    command = load_script("ocp")
    wanted = command.certificate_of(ssl.PEM_cert_to_DER_cert(CERT)).fingerprint
    assert secure.health()["tlsFingerprint"] == wanted
    assert ocp.certificate_pin("") is None is ocp.certificate_pin(str(tmp_path))


def test_certificate_and_key_may_be_one_file(tmp_path: Path) -> None:
    both = tmp_path / "cert.pem"
    both.write_text(KEY + CERT)
    env = {**NO_IDLE, "OCP_TLS_CERT": str(both), "OCP_TLS_KEY": str(both)}

    with running_server(tmp_path, env=env) as server:
        assert Secure(server, trusting(tmp_path)).health()["tls"] is True
