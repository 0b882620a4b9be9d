"""Clients that leave while claude answers: what becomes of the process, and of its conversation.

A process that forgets the question waits for another one in its place. In test_leaving.py no
process waits for anything."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chat import HANG, ask, both_ways, content_of, encoded, question, shaped
from keys import MULTI, as_admin, new_key
from processes import is_gone
from raw_http import RawConnection, post
from server import Server, asked_process, at_rest, health, last_entry, running_server
from shell_claude import ShellClaude, lines_of_an_answer
from waiting import SOON_S, eventually, in_parallel

Json = Any

#: No spares, so that every process is one that a test has asked.
NO_SPARES = {"OCP_WARM_PROCESSES": "0", "OCP_PARKED_PROCESSES": "4"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running_server(tmp_path, env=NO_SPARES) as running_one:
        yield running_one


def said(role: str, text: str) -> dict[str, Json]:
    return {"role": role, "content": text}


def words(query: dict[str, Json]) -> list[str]:
    """What the model was given, message by message."""
    return ["".join(block.get("text", "") for block in message["content"])
            for message in query["messages"]]


def rows(server: Server) -> list[dict[str, Json]]:
    """The rows of usage, the oldest first."""
    found = server.call("GET", "/api/usage?limit=100").json()["recent"]
    return list(reversed(found))


def cancel(server: Server, text: Json = "secret", **fields: Json) -> int:
    """A question whose client leaves once claude is asked; the pid of that claude."""
    count = len(server.queries())
    with RawConnection(server.port) as wire:
        wire.send(post(encoded(question(text, **fields))))
        pid = asked_process(server, count + 1)
        time.sleep(0.05)
    eventually(lambda: at_rest(server))
    return pid


def is_kept(server: Server) -> bool:
    """Whether the process of the last answer that was abandoned waits for another question."""
    return bool(last_entry(server, "answer_abandoned")["process_kept"])


def check_ended(server: Server, pid: int) -> None:
    """Asserts that the process got the signal that ends it, and nothing waits in its place."""
    assert not is_kept(server)
    assert eventually(lambda: is_gone(pid), SOON_S)
    assert [each["why"] for each in server.fake_log("exit") if each["pid"] == pid] == ["SIGINT"]


def event(kind: str, **fields: Json) -> dict[str, Json]:
    return {"raw": {"type": "stream_event", "event": {"type": kind, **fields}}}


#: A call whose arguments have begun.
HALF_CALL = [
    event("content_block_start", index=1, content_block={
        "type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}}),
    event("content_block_delta", index=1, delta={
        "type": "input_json_delta", "partial_json": '{"ci'}),
]

#: What claude has done by the time at which the client leaves.
MOMENTS: dict[str, list[Json]] = {
    "before the first token": [HANG],
    "in the text": [{"say": "so far"}, HANG],
    "in its thoughts": [event("message_start", message={"id": "m"}), event(
        "content_block_start", index=0, content_block={"type": "thinking", "thinking": ""}), event(
        "content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "Hm"}), HANG],
    "after its thoughts": [{"think": "Hm."}, HANG],
    "in the arguments of a call": [{"say": "Let me see."}, *HALF_CALL, HANG],
    "after a call, before the next": [{"tool": {"name": "weather", "input": {}}}, HANG],
    "while it waits to ask the API again": [{"raw": {
        "type": "system", "subtype": "api_retry", "attempt": 1, "max_retries": 2,
        "retry_delay_ms": 60_000, "error_status": 529, "error": "overloaded"}}, HANG],
}


@pytest.mark.few_cases
@both_ways
@pytest.mark.parametrize("moment", MOMENTS)
def test_the_first_question_is_forgotten_and_its_process_takes_the_next(
    server: Server, moment: str, stream: bool
) -> None:
    server.write_scenario([MOMENTS[moment]])
    pid = cancel(server, stream=stream, tools=TOOLS)
    assert is_kept(server)
    server.write_scenario([])

    reply = ask(server, "And now?", tools=TOOLS)

    assert content_of(reply) == "You said: And now?"
    last = server.queries()[-1]
    assert (last["pid"], words(last)) == (pid, ["And now?"])
    assert [(row["outcome"], row["path"]) for row in rows(server)] == [
        ("abandoned", "fresh"), ("ok", "continued")]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_conversation_is_as_it_was_before_the_question(server: Server, moment: str) -> None:
    first = ask(server, "One", tools=TOOLS)
    before = [said("user", "One"), said("assistant", content_of(first))]
    server.write_scenario([MOMENTS[moment]])
    pid = cancel(server, messages=[*before, said("user", "secret")], tools=TOOLS)
    server.write_scenario([])

    ask(server, messages=[*before, said("user", "Two")], tools=TOOLS)

    assert {query["pid"] for query in server.queries()} == {pid}
    assert words(server.queries()[-1]) == ["One", "You said: One", "Two"]
    assert [row["path"] for row in rows(server)] == ["fresh", "continued", "continued"]


def test_the_question_before_a_cancelled_one_can_still_be_edited(tmp_path: Path) -> None:
    with running_server(tmp_path, env={**NO_SPARES, "OCP_PARKED_PROCESSES": "1"}) as server:
        before = [said("user", "One"), said("assistant", content_of(ask(server, "One")))]
        server.write_scenario([[{"say": "so far"}, HANG]])
        pid = cancel(server, messages=[*before, said("user", "secret")])
        server.write_scenario([])

        ask(server, "Uno")

        assert words(server.queries()[-1]) == ["Uno"]
        assert {query["pid"] for query in server.queries()} == {pid}
        assert [row["path"] for row in rows(server)] == ["fresh", "continued", "rewound"]


def test_a_question_in_place_of_another_one_is_forgotten_too(server: Server) -> None:
    before = [said("user", "One"), said("assistant", content_of(ask(server, "One")))]
    ask(server, messages=[*before, said("user", "Two")])
    server.write_scenario([[{"say": "so far"}, HANG]])
    cancel(server, messages=[*before, said("user", "secret")])
    server.write_scenario([])
    ask(server, messages=[*before, said("user", "Three")])

    assert words(server.queries()[-1]) == ["One", "You said: One", "Three"]
    assert len({query["pid"] for query in server.queries()}) == 1
    assert [row["path"] for row in rows(server)] == [
        "fresh", "continued", "rewound", "continued"]


def test_a_conversation_that_was_rebuilt_is_kept_without_the_question(server: Server) -> None:
    before = [said("user", "One"), said("assistant", "Uno"), said("user", "Two"),
              said("assistant", "Due")]
    server.write_scenario([[HANG]])
    pid = cancel(server, messages=[*before, said("user", "secret")])
    server.write_scenario([])
    ask(server, messages=[*before, said("user", "Three")])

    last = server.queries()[-1]
    assert (last["pid"], words(last)) == (pid, ["One", "Uno", "Two", "Due", "Three"])
    assert [row["path"] for row in rows(server)] == ["rebuilt", "continued"]


def test_an_answer_of_a_shape_is_forgotten_too(server: Server) -> None:
    server.write_scenario([[{"say": "Let me see."}, HANG]])
    pid = cancel(server, **shaped({"type": "object"}))
    server.write_scenario([[{"tool": {"name": "StructuredOutput", "input": {"a": 1}}}]])

    assert content_of(ask(server, "And now?", **shaped({"type": "object"}))) == '{"a": 1}'
    last = server.queries()[-1]
    assert (last["pid"], words(last)) == (pid, ["And now?"])


def test_an_abandoned_answer_counts_as_before(server: Server) -> None:
    server.write_scenario([[{"say": "x" * 70}, HANG]])
    cancel(server)
    (row,) = rows(server)

    assert (row["outcome"], row["status"]) == ("abandoned", 499)
    assert row["response_chars"] == 70 and row["output_tokens"] == 20 and row["input_tokens"] == 10


def test_calls_of_tools_work_after_one_that_was_cancelled(server: Server) -> None:
    call = [{"tool": {"name": "weather", "input": {"city": "Bern"}}}]
    server.write_scenario([[*call, HANG]])
    pid = cancel(server, tools=TOOLS)
    server.write_scenario([call, [{"say": "Warm."}]])
    first = ask(server, "Weather?", tools=TOOLS).json()["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "20"}
    last = ask(server, messages=[said("user", "Weather?"), first, result], tools=TOOLS)

    assert content_of(last) == "Warm."
    assert {query["pid"] for query in server.queries()} == {pid}


# ---------------------------------------------------------------------------
# Processes that end
# ---------------------------------------------------------------------------

class Ending(NamedTuple):
    """A process that cannot be kept, or that nobody could use."""

    env: dict[str, str] = {}
    scenario: dict[str, Json] = {}


ENDINGS = {
    "a version that cannot forget its only question": Ending(scenario={"version": "2.1.197"}),
    "an interrupt that is refused": Ending(scenario={"unsupported": ["interrupt"]}),
    "a rewind that is refused": Ending(scenario={"unsupported": ["rewind_conversation"]}),
    "agent mode": Ending(env={"CLAUDE_ALLOWED_TOOLS": "default"}),
    "no places for processes that wait": Ending(env={"OCP_PARKED_PROCESSES": "0"}),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_process_that_cannot_be_kept_is_ended(tmp_path: Path, name: str) -> None:
    ending = ENDINGS[name]
    scenario = {"turns": [[{"say": "so far"}, HANG]], **ending.scenario}
    with running_server(tmp_path, scenario, env={**NO_SPARES, **ending.env}) as server:
        pid = cancel(server)

        check_ended(server, pid)
        assert health(server)["parked"] == 0


def test_a_turn_that_goes_on_after_results_is_ended(server: Server) -> None:
    server.write_scenario([[{"tool": {"name": "weather", "input": {}}}], [HANG]])
    first = ask(server, "Weather?", tools=TOOLS).json()["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "20"}
    pid = cancel(server, messages=[said("user", "Weather?"), first, result], tools=TOOLS)

    check_ended(server, pid)


def test_a_history_that_is_still_being_told_is_ended_with_its_process(tmp_path: Path) -> None:
    scenario = {"turns": [], "start_delay_ms": 60_000}
    with running_server(tmp_path, scenario, env=NO_SPARES) as server:
        messages = [said("user", "One"), said("assistant", "Uno"), said("user", "secret")]
        with RawConnection(server.port) as wire:
            wire.send(post(encoded(question(messages=messages))))
            pid = eventually(lambda: [
                each for each in server.fake_log("start") if "-p" in each["argv"]])[-1]["pid"]
        check_ended(server, pid)


@pytest.mark.slow
def test_a_claude_that_says_nothing_more_is_ended_after_a_second(tmp_path: Path) -> None:
    player = ShellClaude(tmp_path)
    player.play([])
    env = {**NO_SPARES, "CLAUDE_MAX_CONCURRENT": "1"}
    with running_server(tmp_path / "server", claude=player.program, env=env) as server:
        with RawConnection(server.port) as wire:
            wire.send(post(encoded(question())))
            eventually(lambda: not at_rest(server))
            time.sleep(0.3)

        assert eventually(lambda: at_rest(server), SOON_S)
        assert not is_kept(server)
        assert health(server)["parked"] == 0


def test_a_claude_that_dies_of_the_interrupt_leaves_nothing_and_nobody_without_an_answer(
    tmp_path: Path
) -> None:
    player = ShellClaude(tmp_path)
    player.play(lines_of_an_answer("Hi.")[:3], "read -r line; echo unknown option >&2; exit 1")
    with running_server(tmp_path / "server", claude=player.program, env=NO_SPARES) as server:
        with RawConnection(server.port) as wire:
            wire.send(post(encoded(question())))
            (pid,) = eventually(player.asked)
        eventually(lambda: at_rest(server))
        assert not is_kept(server)
        assert eventually(lambda: is_gone(pid), SOON_S)
        player.play(lines_of_an_answer("Hi."))
        assert content_of(ask(server)) == "Hi."


def test_the_process_of_a_key_that_is_revoked_is_ended(tmp_path: Path) -> None:
    env = {**MULTI, **NO_SPARES}
    with running_server(tmp_path, [[{"say": "so far"}, HANG]], env=env) as server:
        key = new_key(server, name="ann")
        with RawConnection(server.port) as wire:
            wire.send(post(encoded(question()), f"Authorization: Bearer {key['key']}"))
            pid = asked_process(server)
            assert as_admin(server, "DELETE", f"/api/keys/{key['id']}").status == 200
            assert wire.reply().status == 401
        check_ended(server, pid)


def test_a_server_that_stops_keeps_no_process(tmp_path: Path) -> None:
    with running_server(tmp_path, [[{"say": "so far"}, HANG]], env=NO_SPARES) as server:
        with RawConnection(server.port) as wire:
            wire.send(post(encoded(question())))
            pid = asked_process(server)
            server.process.terminate()
            eventually(lambda: server.log_entries("server_stopping"))
        server.process.wait(20)
        assert not is_kept(server)
        assert is_gone(pid)


# ---------------------------------------------------------------------------
# Many
# ---------------------------------------------------------------------------

def test_clients_that_leave_at_any_moment_leave_no_process_and_no_word_behind(
    tmp_path: Path
) -> None:
    steps = [{"think": "Hm."}, *[{"sleep_ms": 2}, {"say": "word "}] * 5,
             {"tool": {"name": "weather", "input": {"city": "Bern"}}}]
    source, count = random.Random(7), 60
    with running_server(tmp_path, [steps], env={**NO_SPARES, "CLAUDE_MAX_QUEUE": "64"}) as server:
        def leave(number: int, pause_s: float) -> None:
            with RawConnection(server.port) as wire:
                wire.send(post(encoded(question(
                    f"secret {number}", stream=number % 2 == 0, tools=TOOLS))))
                time.sleep(pause_s)

        pauses_s = [source.choice([0, 0.005, 0.02, 0.05, 0.1]) for _ in range(count)]
        in_parallel([lambda n=n, pause_s=pause_s: leave(n, pause_s)
                     for n, pause_s in enumerate(pauses_s)])
        eventually(lambda: at_rest(server))
        server.write_scenario([])
        for number in range(6):
            assert content_of(ask(server, f"Number {number}", tools=TOOLS)) == (
                f"You said: Number {number}")

        assert [words(query) for query in server.queries()[-6:]] == [
            [f"Number {number}"] for number in range(6)]
        assert all(len(query["messages"]) == 1 for query in server.queries())
        assert eventually(lambda: len(server.children()) == health(server)["parked"] + 1)
        assert eventually(lambda: server.zombies() == [])
