"""Thousands of broken and odd requests, after which the server is as it was: see fuzz.py."""
from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import fuzz
from depth import by_depth
from fuzz import Case, Flaw, Played, Reply, State
from project import REPO
from server import Server

Json = Any

SEED = 20_261_121
REQUESTS = by_depth(200, 200, 12_000)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> fuzz.Report:
    """What came of sending them all. No process outlives the server, or this fails."""
    return fuzz.run(tmp_path_factory.mktemp("fuzz"), SEED, REQUESTS)


# ---------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------

def test_every_connection_is_answered_or_closed_and_every_answer_is_well_formed(
    report: fuzz.Report,
) -> None:
    assert sum(report.kinds.values()) == REQUESTS
    assert report.flaws == []


def test_nothing_breaks_inside_the_server(report: fuzz.Report) -> None:
    assert report.log_flaws == []


def test_no_process_thread_or_descriptor_stays(report: fuzz.Report) -> None:
    assert fuzz.grown(report.before, report.after) == []


def test_memory_is_flat(report: fuzz.Report) -> None:
    assert report.grown_bytes < fuzz.MOST_GROWTH_BYTES, report.memory


def test_a_normal_request_is_answered_afterwards(report: fuzz.Report) -> None:
    assert report.last_answer == f"You said: {fuzz.GREETING}"


@pytest.mark.exhaustive
def test_every_route_was_reached_with_requests_good_and_bad(report: fuzz.Report) -> None:
    # They say where to look instead, or that there is nothing to cancel, stop, test or log in.
    always_refused = {
        ("POST", "/v1/embeddings"), ("POST", "/v1/responses/{id}/cancel"),
        ("DELETE", "/api/requests/{id}"), ("POST", "/api/alerts/test"),
        ("POST", "/api/login/code"),
    }
    routes = set(report.statuses) - {("", "")}

    unserved = [route for route in routes if min(report.statuses[route], default=999) >= 300]
    unrefused = [route for route in routes if max(report.statuses[route], default=0) < 400]

    assert set(unserved) == always_refused
    assert unrefused == []


def test_every_kind_of_request_was_sent(report: fuzz.Report) -> None:
    # One kind more than those that are thrown: the fields.
    assert len(report.kinds) == len(fuzz.KINDS) + 1
    assert min(report.kinds.values()) >= REQUESTS // 200


# ---------------------------------------------------------------------------
# What is sent
# ---------------------------------------------------------------------------

WORLD = fuzz.World([("GET", "/health"), *fuzz.BODIES], "admin-key", "user-key", "resp_1")


def test_a_number_always_stands_for_the_same_request() -> None:
    numbers = range(2 * len(fuzz.FIELDS) - 100, 2 * len(fuzz.FIELDS) + 200)
    first = [fuzz.case_of(7, number, WORLD) for number in numbers]
    again = [fuzz.case_of(7, number, WORLD) for number in numbers]
    other = [fuzz.case_of(8, number, WORLD) for number in numbers]

    assert first == again
    assert first != other


def test_every_route_with_a_body_has_one_to_change(shared_server: Server) -> None:
    paths = shared_server.call("GET", "/openapi.json").json()["paths"]

    takes_body = {(method.upper(), path) for path, operations in paths.items()
                  for method, operation in operations.items() if "requestBody" in operation}

    assert takes_body == set(fuzz.BODIES)


def test_every_field_of_every_body_gets_a_value_of_every_type() -> None:
    cases = [fuzz.case_of(1, 2 * number, WORLD) for number in range(len(fuzz.FIELDS))]

    bodies = {(case.route, case.data.partition(b"\r\n\r\n")[2]) for case in cases}
    # One value is what stands in a field already, or is the same as one further up.
    assert len(bodies) > 0.9 * len(cases)
    for route, templates in fuzz.BODIES.items():
        fields = [len(list(fuzz.places(template))) for template in templates]
        sent = [case for case in cases if case.route == route]
        assert len(sent) == sum(fields) * len(fuzz.OF_EACH_TYPE) > 0


def test_a_field_is_all_that_differs_from_a_good_body() -> None:
    number = next(number for number, field in enumerate(fuzz.FIELDS)
                  if field[0] == ("POST", "/api/keys") and field[2:] == (("note",), True))

    case = fuzz.case_of(1, 2 * number, WORLD)

    sent = json.loads(case.data.partition(b"\r\n\r\n")[2])
    good = fuzz.BODIES["POST", "/api/keys"][0]
    assert sent == {**good, "note": True}
    assert b"Authorization: Bearer admin-key\r\n" in case.data


def test_dice_change_bodies_in_many_ways() -> None:
    dice = random.Random(1)
    template = fuzz.BODIES["POST", "/v1/chat/completions"][0]

    bodies = {fuzz.odd_body(dice, template) for _ in range(500)}

    assert len(bodies) > 400
    assert json.dumps(template).encode() not in bodies


# ---------------------------------------------------------------------------
# What is noticed
# ---------------------------------------------------------------------------

def answer(body: bytes, status: int = 200, kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nX-Request-Id: req_1\r\nContent-Type: {kind}\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def checked(received: bytes, *, closed: bool = True, exact: bool = True) -> None:
    """Raises Flaw for what is wrong with these bytes as the answer to one whole request."""
    case = Case("plain", [b"GET /health HTTP/1.1\r\n\r\n"], ["GET"], exact, "read")
    replies, rest = fuzz.replies_in(case, received, ended=closed)
    assert not rest
    fuzz.check(case, Played(received, closed, hung=False, replies=replies))


ERROR = b'{"error":{"message":"no","type":"t","param":null,"code":null}}'


def test_a_good_answer_and_a_refusal_are_not_complained_about() -> None:
    checked(answer(b'{"a":1}'))
    checked(answer(ERROR, 404))
    checked(answer(b'data: {"a":1}\n\n: hm\n\ndata: [DONE]\n\n', kind="text/event-stream"))
    checked(b"HTTP/1.1 100 Continue\r\n\r\n" + answer(b"{}"))


@pytest.mark.parametrize("received, word", [
    (answer(ERROR, 500), "status 500"),
    (answer(ERROR, 502), "status 502"),
    (answer(b'{"a":Infinity}'), "not JSON"),
    (answer(b'{"a":'), "not JSON"),
    (answer(b'{"a":"\xff"}'), "not JSON"),
    (answer(b"[]", 404), "without a message"),
    (answer(b"no", 400, "text/html"), "an error of type"),
    (answer(b"data: {\n\n", kind="text/event-stream"), "not JSON"),
    (answer(b"hello\n\n", kind="text/event-stream"), "a line in a stream"),
    (answer(b"{}").replace(b"X-Request-Id: req_1\r\n", b""), "no X-Request-Id"),
    (answer(b"{}").replace(b"X-Request", b"X Request"), "header line"),
    (answer(b"{}").replace(b"HTTP/1.1 200", b"HTTP/1.1 2000"), "status line"),
    (answer(b"{}").replace(b"X-Req", b"Content-Length: 2\r\nX-Req"), "twice"),
    (answer(b"{}") + answer(b"{}"), "2 answers to 1"),
    (b"", "without an answer"),
])
def test_a_bad_answer_is_complained_about(received: bytes, word: str) -> None:
    with pytest.raises(Flaw, match=word):
        checked(received)


def test_an_answer_is_put_together_from_chunks() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

    found = fuzz.first_reply(head + b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\nrest")

    assert found == (Reply(200, {"transfer-encoding": "chunked"}, b"abc"), b"rest")
    assert fuzz.first_reply(head + b"2\r\nab\r\n1\r\n") is None
    with pytest.raises(Flaw, match="longer than it says"):
        fuzz.first_reply(head + b"1\r\nab\r\n0\r\n\r\n")


@contextmanager
def listener(said: bytes) -> Iterator[int]:
    """The port of a server that says the same to everybody, and then nothing any more."""
    held = []
    with socket.create_server(("127.0.0.1", 0)) as waiting:
        def serve() -> None:
            try:
                connection, _ = waiting.accept()
            except OSError:
                return
            held.append(connection)
            connection.sendall(said)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield waiting.getsockname()[1]
        finally:
            thread.join()
            for connection in held:
                connection.close()


def test_a_server_that_says_nothing_hangs() -> None:
    case = Case("plain", [b"GET / HTTP/1.1\r\n\r\n"], ["GET"], True, "read")
    with listener(b"HTTP/1.1 200 OK\r\nContent-Le") as port:
        played = fuzz.play(port, case, patience_s=0.2)

    with pytest.raises(Flaw, match="neither answered nor closed"):
        fuzz.check(case, played)


def test_what_is_left_behind_is_counted() -> None:
    before = State(children=1, zombies=0, threads=2, descriptors=9)
    after = State(children=1, zombies=1, threads=3, descriptors=8)

    assert fuzz.grown(before, before) == []
    assert fuzz.grown(before, after) == ["zombies: 0 before, 1 after", "threads: 2 before, 3 after"]


@pytest.mark.exhaustive
def test_the_script_says_what_it_found() -> None:
    script = str(REPO / "tools" / "fuzz.py")

    done = subprocess.run(
        [sys.executable, script, "--seed", "5", "--requests", "40"], capture_output=True,
        timeout=300)

    assert done.returncode == 0, done.stdout + done.stderr
    assert b"seed 5: " in done.stdout and b" 0 complaints" in done.stdout
