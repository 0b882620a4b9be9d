"""Requests that share one answer while it is on its way: to all of them, live, whoever leaves.

Claude waits at doors that the tests open, so that what happens while an answer is on its way
happens in the order that a test says.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest

from cached import HOUR, newest, stats_of, word_of
from chat import (
    CHAT_PATH,
    NO_IDLE,
    ask,
    both_ways,
    encoded,
    error_of,
    pieces,
    question,
    stream_chat,
    stream_error,
)
from dialects import CHAT, DIALECTS, MESSAGES, RESPONSES, Dialect, dialect_name
from http_client import Reply
from keys import MULTI, as_admin, ask_as, new_key
from processes import descriptors, is_gone
from raw_http import RawConnection, post
from server import Server, at_rest, running, running_server, waiting
from shell_claude import ShellClaude, lines_of_an_answer
from waiting import SOON_S, eventually, in_parallel, stays

Json = Any


# ---------------------------------------------------------------------------
# A server, and claude behind doors
# ---------------------------------------------------------------------------

class Doors:
    """Places in an answer where claude waits until the test lets it go on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def door(self, name: str) -> Json:
        """The step at which it waits."""
        return {"wait_for": str(self._folder / name)}

    def open(self, name: str) -> None:
        (self._folder / name).touch()

    def told_in_parts(self, *texts: str) -> list[Json]:
        """The steps of an answer with a door behind each part but the last, "0", "1", ..."""
        steps: list[Json] = []
        for number, text in enumerate(texts):
            steps += [{"say": text, "chunks": 1}, self.door(str(number))]
        return steps[:-1]


@pytest.fixture
def doors(tmp_path: Path) -> Doors:
    return Doors(tmp_path)


@pytest.fixture(scope="module")
def shared_common(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that keeps answers, with one place at work."""
    env = {**HOUR, **NO_IDLE, "CLAUDE_MAX_CONCURRENT": "1"}
    with running_server(tmp_path_factory.mktemp("common"), env=env) as running_one:
        yield running_one
        assert eventually(lambda: at_rest(running_one) and stats_of(running_one)["inflight"] == 0)


@pytest.fixture
def common(shared_common: Server) -> Server:
    """That server, with claude as it is without a script."""
    shared_common.write_scenario([])
    return shared_common


def waits(server: Server, count: int) -> None:
    """Returns when so many requests wait for a flight."""
    eventually(lambda: stats_of(server)["requesters"] == count)


def rows_of(server: Server, replies: Iterable[Any]) -> list[Json]:
    """The rows of usage of these answers, in this order."""
    rows = {row["request_id"]: row for row in newest(server, 100)}
    return [rows[str(reply.headers["X-Request-Id"])] for reply in replies]


@contextlib.contextmanager
def joined(
    server: Server, jobs: Iterable[Callable[[], Reply]], already: int = 0
) -> Iterator[list[Future[Reply]]]:
    """These requests, once all of them wait for the same flight with those that do already."""
    todo = list(jobs)
    with ThreadPoolExecutor(len(todo)) as pool:
        futures = [pool.submit(job) for job in todo]
        waits(server, already + len(todo))
        yield futures


def text_of(reply: Reply) -> str:
    """The text of a chat answer, whole or streamed; it has to be a good one."""
    assert reply.status == 200, reply
    if "event-stream" in str(reply.headers["Content-Type"]):
        assert reply.events[-1][1] == "[DONE]", reply.text[-300:]
        return "".join(pieces(reply.events))
    return str(reply.json()["choices"][0]["message"]["content"])


def asked(server: Server, text: str) -> list[int]:
    """The processes that were asked this."""
    return [q["pid"] for q in server.queries() if text in json.dumps(q["messages"])]


# ---------------------------------------------------------------------------
# Sharing
# ---------------------------------------------------------------------------

@both_ways
def test_twenty_who_ask_the_same_at_once_ask_the_model_once(
    common: Server, doors: Doors, stream: bool
) -> None:
    common.write_scenario([doors.told_in_parts("Hello ", "all.")])
    text = f"Twenty, {stream}"
    before = stats_of(common)

    with joined(common, [lambda: ask(common, text, stream=stream)] * 20) as futures:
        doors.open("0")
        replies = [each.result(120) for each in futures]

    assert list(map(text_of, replies)) == ["Hello all."] * 20
    assert sorted(map(word_of, replies)) == ["miss", *["shared"] * 19]
    assert len(asked(common, text)) == 1
    assert stats_of(common)["shared"] == before["shared"] + 19


def test_a_follower_hears_the_answer_live_and_from_its_first_token(
    common: Server, doors: Doors
) -> None:
    common.write_scenario([doors.told_in_parts("One ", "two ", "three.")])

    with stream_chat(common, "Live") as leader:
        first = [next_text(leader)]
        with stream_chat(common, "Live") as follower:
            second = [next_text(follower)]
            for name in ("0", "1"):
                doors.open(name)
                first.append(next_text(leader))
                second.append(next_text(follower))
            ends = [list(leader)[-1][1], list(follower)[-1][1]]

    assert first == second == ["One ", "two ", "three."]
    assert ends == ["[DONE]"] * 2
    assert [word_of(leader), word_of(follower)] == ["miss", "shared"]


def next_text(stream: Any) -> str:
    """The next piece of text; waits for it."""
    return next(text for event in stream for text in pieces([event]))


def test_all_dialects_whole_and_streamed_share_one_answer(common: Server, doors: Doors) -> None:
    common.write_scenario([[
        {"think": "Hm.", "signature": "c2ln"}, *doors.told_in_parts("Hello ", "all.")]])

    def request(dialect: Dialect, stream: bool) -> Callable[[], Reply]:
        body = dialect.body("Babel", stream=stream)
        return lambda: common.call("POST", dialect.path, body)

    ways = [(dialect, stream) for dialect in DIALECTS for stream in (False, True)]
    with joined(common, [request(*way) for way in ways]) as futures:
        doors.open("0")
        answers = [dialect.read_success(each.result(120))
                   for (dialect, _), each in zip(ways, futures)]

    assert [each.text for each in answers] == ["Hello all."] * 8
    assert [answers[at].content for at in range(0, 8, 2)] == [
        answers[at].content for at in range(1, 8, 2)]
    assert [answers[2].thinking, answers[2].signature] == ["Hm.", "c2ln"]
    assert len(asked(common, "Babel")) == 1


def test_several_answers_to_one_request_are_shared_too(tmp_path: Path) -> None:
    doors = Doors(tmp_path)
    turns = [[doors.door("0"), {"say": f"Answer {number}."}] for number in range(2)]

    with running_server(tmp_path, {"turns": turns, "shared": True}, env=HOUR) as server:
        body = CHAT.body("Two", n=2, stream=True)
        with joined(server, [lambda: server.call("POST", CHAT_PATH, body)] * 3) as futures:
            doors.open("0")
            found = [CHAT.read_success(each.result(120)).content for each in futures]

        assert found[0] == found[1] == found[2]
        assert sorted(found[0]["texts"]) == ["Answer 0.", "Answer 1."]
        assert len(server.queries()) == 2


def test_what_is_shared_is_kept(common: Server, doors: Doors) -> None:
    common.write_scenario([doors.told_in_parts("Hello ", "all.")])

    with joined(common, [lambda: ask(common, "Kept")] * 2):
        doors.open("0")

    assert word_of(ask(common, "Kept")) == "hit"


def test_other_requests_and_other_callers_share_nothing(tmp_path: Path) -> None:
    doors = Doors(tmp_path)
    scenario = [doors.told_in_parts("Hello ", "all.")]

    with running_server(tmp_path, scenario, env={**HOUR, **MULTI}) as server:
        keys = [new_key(server, name=name)["key"] for name in ("one", "two")]
        jobs = [lambda key=key, text=text: ask_as(server, key, text)
                for key in keys for text in ("Here", "There")]
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(job) for job in jobs]
            eventually(lambda: len(server.queries()) == 4)
            doors.open("0")
            replies = [each.result(120) for each in futures]

    assert list(map(word_of, replies)) == ["miss"] * 4


def test_followers_take_no_place_at_work_nor_in_line(common: Server, doors: Doors) -> None:
    common.write_scenario([doors.told_in_parts("Hello ", "all.")])

    with joined(common, [lambda: ask(common, "No place")] * 5):
        found = running(common), waiting(common)
        doors.open("0")

    assert found == (1, 0)


def test_followers_give_their_place_in_a_quota_back(tmp_path: Path) -> None:
    doors = Doors(tmp_path)
    scenario = [doors.told_in_parts("Hello ", "all.")]

    with running_server(tmp_path, scenario, env={**HOUR, **MULTI}) as server:
        key = new_key(server, name="frugal", quota={"daily": 3})["key"]

        def all_wait() -> bool:
            return bool(as_admin(server, "GET", "/cache/stats").json()["requesters"] == 3)

        with ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(ask_as, server, key) for _ in range(3)]
            eventually(lambda: all_wait() or any(each.done() for each in futures))
            doors.open("0")
            statuses = [each.result(120).status for each in futures]

        used = as_admin(server, "GET", "/api/keys/frugal/quota").json()["quota"]["daily"]
        assert statuses == [200, 200, 200]
        assert (used["used"], used["inFlight"]) == (1, 0)


# ---------------------------------------------------------------------------
# Leaving
# ---------------------------------------------------------------------------

@both_ways
def test_a_leader_that_leaves_does_not_hurt_its_followers(
    common: Server, doors: Doors, stream: bool
) -> None:
    common.write_scenario([doors.told_in_parts("Hello ", "all.")])
    text = f"Leader leaves, {stream}"

    with stream_chat(common, text) as leader:
        next_text(leader)
        leader_id = leader.headers["X-Request-Id"]
        with joined(common, [lambda: ask(common, text, stream=stream)] * 3, 1) as futures:
            leader.close()
            waits(common, 3)
            doors.open("0")
            replies = [each.result(120) for each in futures]

    assert list(map(text_of, replies)) == ["Hello all."] * 3
    assert len(asked(common, text)) == 1
    rows = {row["request_id"]: row for row in newest(common, 4)}
    spent = [request_id for request_id, row in rows.items() if row["output_tokens"]]
    assert spent == [leader_id]
    assert sorted(str(row["path"]) for row in rows.values()) == ["fresh", *["shared"] * 3]


def test_an_answer_whose_leader_left_is_kept(common: Server, doors: Doors) -> None:
    common.write_scenario([doors.told_in_parts("Hello ", "all.")])

    with stream_chat(common, "Left and kept") as leader:
        next_text(leader)
        with joined(common, [lambda: ask(common, "Left and kept")], 1):
            leader.close()
            waits(common, 1)
            doors.open("0")

    assert word_of(ask(common, "Left and kept")) == "hit"


@both_ways
@pytest.mark.parametrize("spoke", [False, True], ids=["before", "behind"])
def test_when_all_have_left_the_process_ends_at_once_and_the_row_says_so(
    common: Server, stream: bool, spoke: bool
) -> None:
    common.write_scenario([[*([{"say": "Hello "}] if spoke else []), {"hang": True}]])
    text = f"All leave, {stream}, {spoke}"
    count = len(common.queries())
    before = {row["request_id"] for row in newest(common, 100)}
    wires = [RawConnection(common.port) for _ in range(3)]
    for wire in wires:
        wire.send(post(encoded(question(text, stream=stream))))
    waits(common, 3)
    (query,) = eventually(lambda: common.queries()[count:])
    if spoke:
        with stream_chat(common, text) as listener:
            next_text(listener)
        before.add(listener.headers["X-Request-Id"])
        waits(common, 3)

    for wire in wires:
        wire.hang_up()

    assert eventually(lambda: is_gone(query["pid"]) and at_rest(common), SOON_S)

    def all_rows() -> list[Json]:
        rows = [row for row in newest(common, 4) if row["request_id"] not in before]
        assert [row["outcome"] for row in rows] == ["abandoned"] * 3
        return rows

    rows = eventually(all_rows)
    made = [row for row in rows if row["path"] == "fresh"]
    # claude was asked, so it counts, whether anything of the answer came or not.
    assert [(row["status"], row["counted"]) for row in made] == [(499, 1)]
    assert [row["input_tokens"] for row in rows if row["path"] == "shared"] == [0, 0]


def test_after_all_have_left_the_next_one_asks_anew(common: Server) -> None:
    common.write_scenario([[{"hang": True}]])
    count = len(common.queries())
    with RawConnection(common.port) as wire:
        wire.send(post(encoded(question("Anew"))))
        (query,) = eventually(lambda: common.queries()[count:])
    eventually(lambda: is_gone(query["pid"]))
    common.write_scenario([])

    reply = ask(common, "Anew")

    assert (text_of(reply), word_of(reply)) == ("You said: Anew", "miss")


def test_a_flight_that_waits_in_line_ends_when_all_have_left(tmp_path: Path) -> None:
    doors = Doors(tmp_path)
    env = {**HOUR, **NO_IDLE, "CLAUDE_MAX_CONCURRENT": "1"}

    with running_server(tmp_path, [[doors.door("0"), {"say": "Hello."}]], env=env) as server:
        with joined(server, [lambda: ask(server, "In front")]):
            eventually(lambda: asked(server, "In front"))
            wires = [RawConnection(server.port) for _ in range(2)]
            for wire in wires:
                wire.send(post(encoded(question("In line"))))
            waits(server, 3)
            for wire in wires:
                wire.hang_up()
            waits(server, 1)
            eventually(lambda: [r["outcome"] for r in newest(server, 5)] == ["abandoned"] * 2)
            doors.open("0")

        assert asked(server, "In line") == []


def test_a_follower_that_leaves_hurts_nobody(common: Server, doors: Doors) -> None:
    common.write_scenario([doors.told_in_parts("Hello ", "all.")])

    with stream_chat(common, "One leaves") as leaving:
        next_text(leaving)
        with joined(common, [lambda: ask(common, "One leaves", stream=True)] * 2, 1) as futures:
            with stream_chat(common, "One leaves") as follower:
                next_text(follower)
            waits(common, 3)
            left_id = follower.headers["X-Request-Id"]
            doors.open("0")
            replies = [each.result(120) for each in futures]
        rest = list(leaving)

    assert list(map(text_of, replies)) == ["Hello all."] * 2
    assert rest[-1][1] == "[DONE]"
    (row,) = eventually(
        lambda: [row for row in newest(common, 4) if row["request_id"] == left_id])
    assert (row["outcome"], row["path"], row["output_tokens"]) == ("abandoned", "shared", 0)


@pytest.mark.exhaustive
def test_one_that_does_not_read_holds_up_nobody(common: Server, doors: Doors) -> None:
    # More than the buffers between server and client take.
    common.write_scenario([[doors.door("0"), {"say": "x" * 16_000_000, "chunks": 40}]])

    with RawConnection(common.port) as idle:
        idle.send(post(encoded(question("Slow", stream=True))))
        waits(common, 1)
        doors.open("0")
        bodies = [question("Slow", stream=stream) for stream in (False, True)]
        replies = in_parallel([lambda body=body: common.call(  # type: ignore[misc]
            "POST", CHAT_PATH, body) for body in bodies])
        lengths = [len(text_of(reply)) for reply in replies]
        late = idle.reply()

    assert lengths == [16_000_000] * 2
    assert len(text_of(late)) == 16_000_000


# ---------------------------------------------------------------------------
# Failures and silence
# ---------------------------------------------------------------------------

FAILURE = {"api_error": {"status": 529, "word": "overloaded", "text": "Overloaded"}}


def test_a_failure_is_shared_and_the_next_one_tries_anew(common: Server, doors: Doors) -> None:
    common.write_scenario([[doors.door("0"), FAILURE]])
    jobs = [lambda stream=stream: ask(common, "Fails", stream=stream)
            for stream in (False, True, False, True)]

    with joined(common, jobs) as futures:
        doors.open("0")
        replies = [each.result(120) for each in futures]
    common.write_scenario([])
    later = ask(common, "Fails")

    assert [(reply.status, error_of(reply)["code"]) for reply in replies] == [
        (529, "overloaded")] * 4
    assert len({reply.headers["X-Request-Id"] for reply in replies}) == 4
    assert (text_of(later), word_of(later)) == ("You said: Fails", "miss")
    rows = rows_of(common, replies)
    assert sorted(str(row["path"]) for row in rows) == ["fresh", *["shared"] * 3]
    assert {(row["outcome"], row["status"]) for row in rows} == {("overloaded", 529)}


def test_a_failure_behind_the_first_token_ends_every_stream(common: Server, doors: Doors) -> None:
    common.write_scenario([[{"say": "Half "}, doors.door("0"), {"exit": 1}]])

    with joined(common, [lambda: ask(common, "Breaks", stream=True)] * 3) as futures:
        doors.open("0")
        replies = [each.result(120) for each in futures]

    assert [stream_error(reply.events)["code"] for reply in replies] == ["upstream_failed"] * 3
    assert ["".join(pieces(reply.events)) for reply in replies] == ["Half "] * 3


def test_a_failure_reaches_each_in_the_shape_of_its_dialect(common: Server, doors: Doors) -> None:
    common.write_scenario([[doors.door("0"), FAILURE]])
    jobs = [lambda dialect=dialect: common.call("POST", dialect.path, dialect.body("In shape"))
            for dialect in DIALECTS]

    with joined(common, jobs) as futures:
        doors.open("0")
        bodies = [each.result(120).json() for each in futures]

    types = {dialect.name: body["error"]["type"] for dialect, body in zip(DIALECTS, bodies)}
    assert types == {"chat": "server_error", "messages": "overloaded_error",
                     "responses": "server_error", "completions": "server_error"}


def test_a_full_queue_refuses_a_flight_and_keeps_nothing_of_it(tmp_path: Path) -> None:
    doors = Doors(tmp_path)
    env = {**HOUR, **NO_IDLE, "CLAUDE_MAX_CONCURRENT": "1", "CLAUDE_MAX_QUEUE": "0"}

    with running_server(tmp_path, [[doors.door("0"), {"say": "Hello."}]], env=env) as server:
        with joined(server, [lambda: ask(server, "At work")]):
            # It waits already before its process has a place.
            eventually(lambda: asked(server, "At work"))
            refused = ask(server, "Refused")
            doors.open("0")
        eventually(lambda: at_rest(server))
        later = ask(server, "Refused")

        assert (refused.status, error_of(refused)["code"]) == (429, "rate_limit_exceeded")
        assert (text_of(later), word_of(later)) == ("Hello.", "miss")
        ids = [row["request_id"] for row in newest(server, 5)]
        assert len(ids) == 2 and refused.headers["X-Request-Id"] not in ids


def test_a_stream_that_began_anew_is_whole_for_those_who_came_later(
    common: Server, doors: Doors
) -> None:
    common.write_scenario([[
        {"say": "Half "}, {"restart": True}, {"say": "All "}, doors.door("0"), {"say": "of it."}]])

    def begin_of_follower() -> str:
        with stream_chat(common, "Began anew") as follower:
            return next_text(follower)

    with joined(common, [lambda: ask(common, "Began anew")]) as leading:
        # One that came before the restart would have heard what was taken back.
        assert eventually(lambda: begin_of_follower() == "All ")
        with stream_chat(common, "Began anew") as follower:
            first = next_text(follower)
            doors.open("0")
            rest = list(follower)
        whole = leading[0].result(120)

    assert text_of(whole) == "All of it."
    assert (first, rest[-1][1]) == ("All ", "[DONE]")


@pytest.fixture(scope="module")
def shared_ticking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that does not bear silence for long."""
    env = {**HOUR, "CLAUDE_HEARTBEAT_INTERVAL": "200", "OCP_WHOLE_SILENCE": "200"}
    with running_server(tmp_path_factory.mktemp("ticking"), env=env) as running_one:
        yield running_one


@pytest.fixture
def ticking(shared_ticking: Server) -> Server:
    """That server, with claude as it is without a script."""
    shared_ticking.write_scenario([])
    return shared_ticking


@pytest.mark.parametrize("dialect", DIALECTS, ids=dialect_name)
def test_followers_are_told_in_silence_that_somebody_is_there(
    ticking: Server, doors: Doors, dialect: Dialect
) -> None:
    ticking.write_scenario([doors.told_in_parts("Hello ", "all.")])
    text = f"Silence in {dialect.name}"

    with joined(ticking, [lambda: ticking.call("POST", dialect.path, dialect.body(text))]):
        with RawConnection(ticking.port) as follower:
            follower.send(post(encoded(dialect.body(text, stream=True)), path=dialect.path))
            silence_of = {MESSAGES: b"ping", RESPONSES: b"keepalive"}
            seen = read_until(follower, silence_of.get(dialect, b": keepalive"), 2)
            doors.open("0")
            seen += read_until(follower, b"0\r\n\r\n", 1)

    assert b"all." in seen


def read_until(wire: RawConnection, needle: bytes, times: int) -> bytes:
    """What comes until this has come so often. Raises socket.timeout."""
    seen = b""
    while seen.count(needle) < times:
        piece = wire.socket.recv(65_536)
        assert piece, seen
        seen += piece
    return seen


def test_a_whole_answer_that_is_followed_gets_white_space_in_silence(
    ticking: Server, doors: Doors
) -> None:
    ticking.write_scenario([[doors.door("0"), {"say": "Hello."}]])

    with joined(ticking, [lambda: ask(ticking, "White space")]):
        with RawConnection(ticking.port) as follower:
            follower.send(post(encoded(question("White space"))))
            seen = read_until(follower, b" \n", 2)
            doors.open("0")
            seen += read_until(follower, b"0\r\n\r\n", 1)

    assert b"Hello." in seen


# ---------------------------------------------------------------------------
# Ends
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
def test_a_server_that_stops_lets_everybody_have_a_shared_answer(tmp_path: Path) -> None:
    doors = Doors(tmp_path)
    scenario = [[doors.door("0"), {"say": "x" * 16_000_000, "chunks": 40}]]

    with running_server(tmp_path, scenario, env={**HOUR, "OCP_DRAIN": "120000"}) as server:
        with RawConnection(server.port) as idle:
            idle.send(post(encoded(question("Slow", stream=True))))
            waits(server, 1)
            doors.open("0")
            reader = server.call("POST", CHAT_PATH, question("Slow"))
            server.process.terminate()
            eventually(lambda: server.log_entries("server_stopping"))
            late = idle.reply()
        assert server.process.wait(120) == 0

    assert len(text_of(reader)) == 16_000_000
    assert len(text_of(late)) == 16_000_000


@pytest.mark.slow
def test_flights_leak_no_descriptors_however_they_end(tmp_path: Path) -> None:
    ways: list[list[Json]] = [[{"say": "Hello."}], [FAILURE], [{"say": "Half "}, {"exit": 1}]]

    with running_server(tmp_path, env={**HOUR, **NO_IDLE}) as server:
        def round_of(number: int) -> None:
            server.write_scenario([ways[number % 3]])
            in_parallel([lambda: ask(server, f"Round {number}", stream=True)] * 4)

        def at_the_end() -> int:
            """How many there are when nothing more is to be closed."""
            eventually(lambda: at_rest(server) and stats_of(server)["inflight"] == 0)
            return stays(lambda: descriptors(server.pid), 0.5)

        round_of(0)
        before = at_the_end()
        for number in range(1, 7):
            round_of(number)

        # A process may take its time to end.
        assert eventually(lambda: at_the_end() <= before)


# ---------------------------------------------------------------------------
# Races
# ---------------------------------------------------------------------------

TEXTS = ("Hello ", "all ", "of ", "you.")
ROUNDS = 40
#: How long an answer takes, about; a process of the player's is there at once.
ANSWER_S = 0.04


class Crowd:
    """Clients that ask the same at about the same time; some of them leave."""

    def __init__(self, server: Server, seed: int) -> None:
        self._server = server
        self._dice = random.Random(seed)
        #: What those who stayed did not get as they should have.
        self.wrong: list[str] = []

    def round(self, number: int) -> None:
        """A leader that leaves when the answer has come about as far as `moment_s`, and others
        that come just then."""
        moment_s = self._dice.random() * ANSWER_S * 1.5
        plans = [(0.0, True, moment_s)]
        for _ in range(3):
            comes_s = max(0.0, moment_s + self._dice.uniform(-0.01, 0.01))
            plans.append((comes_s, self._dice.random() < 0.3, self._dice.random() * ANSWER_S))
        began_s = time.monotonic()
        in_parallel([lambda plan=plan: self._one(number, began_s, *plan) for plan in plans])

    def _one(
        self, number: int, began_s: float, comes_s: float, leaves: bool, after_s: float
    ) -> None:
        stream = bool(number % 3)
        time.sleep(max(0.0, began_s + comes_s - time.monotonic()))
        with RawConnection(self._server.port) as wire:
            wire.send(post(encoded(question(f"Round {number}", stream=stream))))
            if leaves:
                time.sleep(after_s)
                return
            try:
                found = text_of(wire.reply())
            except Exception as problem:
                found = repr(problem)
        if found != "".join(TEXTS):
            self.wrong.append(f"round {number}: {found}")


@pytest.mark.exhaustive
def test_nobody_who_stays_ever_loses_an_answer(tmp_path: Path) -> None:
    player = ShellClaude(tmp_path)
    lines = lines_of_an_answer(*TEXTS)
    (tmp_path / "rest").write_bytes(b"".join(encoded(line) + b"\n" for line in lines[4:]))
    player.play(lines[:4], f"sleep {ANSWER_S}; cat {tmp_path / 'rest'}")

    env = {**HOUR, **NO_IDLE}
    with running_server(tmp_path / "server", claude=player.program, env=env) as server:
        before = stays(lambda: descriptors(server.pid), 0.2)
        crowd = Crowd(server, seed=20_261_121)
        for number in range(ROUNDS):
            crowd.round(number)

        assert crowd.wrong == []
        eventually(lambda: at_rest(server) and stats_of(server)["inflight"] == 0)
        assert stats_of(server)["requesters"] == 0 and stats_of(server)["shared"] > ROUNDS / 2
        # The process that watches the others has come since, with a pipe.
        assert eventually(lambda: descriptors(server.pid) <= before + 1)
        rows = server.call("GET", "/api/usage?limit=500").json()["recent"]
        assert {row["outcome"] for row in rows} <= {"ok", "abandoned"}
        assert len({row["request_id"] for row in rows}) == len(rows)
