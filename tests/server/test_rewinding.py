"""A question of its own, put to a claude that has forgotten the one before."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from chat import ask, content_of
from keys import MULTI, as_admin, ask_as, new_key
from server import Server, at_rest, running_server
from shell_claude import ShellClaude, lines_of_an_answer
from waiting import eventually

Json = Any

#: Every process but one is pushed out.
ONE_PARKED = {"OCP_PARKED_PROCESSES": "1"}


@pytest.fixture
def one_parked(tmp_path: Path) -> Iterator[Server]:
    """A server that keeps one process."""
    with running_server(tmp_path, env=ONE_PARKED) as running:
        yield running


def said(role: str, text: str) -> dict[str, Json]:
    return {"role": role, "content": text}


def words(query: dict[str, Json]) -> list[str]:
    """What the model was given, message by message."""
    return ["".join(block["text"] for block in message["content"]) for message in query["messages"]]


def path_of(server: Server, reply: Any) -> str:
    """How claude got the conversation of this answer."""
    request_id = reply.headers["X-Request-Id"]
    rows = server.call("GET", "/api/usage?limit=100").json()["recent"]
    return str(next(row["path"] for row in rows if row["request_id"] == request_id))


def test_one_process_answers_one_question_after_the_other(one_parked: Server) -> None:
    replies = []
    for number in range(8):
        replies.append(ask(one_parked, f"Number {number}"))
        # It is parked a moment before its place is free.
        eventually(lambda: at_rest(one_parked))

    assert [content_of(reply) for reply in replies] == [f"You said: Number {n}" for n in range(8)]
    assert [path_of(one_parked, reply) for reply in replies] == ["fresh", *["rewound"] * 7]
    assert [words(query) for query in one_parked.queries()] == [[f"Number {n}"] for n in range(8)]
    assert len({query["pid"] for query in one_parked.queries()}) == 1


def test_an_edited_question_finds_the_process_that_knows_what_came_before(
    one_parked: Server
) -> None:
    before = [said("user", "One"), said("assistant", "You said: One")]
    ask(one_parked, "One")
    for question in ("Two", "Three", "Three"):
        reply = ask(one_parked, messages=[*before, said("user", question)])
        assert content_of(reply) == f"You said: {question}"

    assert [words(query)[2:] for query in one_parked.queries()] == [
        [], ["Two"], ["Three"], ["Three"]]
    assert len({query["pid"] for query in one_parked.queries()}) == 1


def test_an_edit_anywhere_finds_the_process_that_knows_what_came_before(server: Server) -> None:
    talk: list[Json] = []
    for number in range(5):
        talk.append(said("user", f"Number {number}"))
        talk.append(said("assistant", content_of(ask(server, messages=talk))))
    edits = [[*talk[:4], said("user", "Third")], [*talk[:2], said("user", "Second"), *talk[3:7]]]
    replies = [ask(server, messages=messages) for messages in edits]
    later = [*edits[1], said("assistant", content_of(replies[1])), said("user", "And?")]

    assert [path_of(server, reply) for reply in replies] == ["rewound"] * 2
    assert path_of(server, ask(server, messages=later)) == "continued"
    assert len({query["pid"] for query in server.queries()}) == 1
    assert [words(query) for query in server.queries()[5:]] == [
        [message["content"] for message in messages] for messages in (*edits, later)]


def test_a_conversation_that_went_on_elsewhere_is_told_the_rest(server: Server) -> None:
    talk = [said("user", "One"), said("assistant", content_of(ask(server, "One")))]
    talk += [said("user", "Two"), said("assistant", "Zwei"), said("user", "Three")]

    assert path_of(server, ask(server, messages=talk)) == "rewound"
    assert words(server.queries()[1]) == [message["content"] for message in talk]
    assert len({query["pid"] for query in server.queries()}) == 1


def test_one_process_has_one_conversation_after_the_other(one_parked: Server) -> None:
    for name in ("Ann", "Bob"):
        talk = [said("user", f"I am {name}")]
        for number in range(3):
            talk.append(said("assistant", content_of(ask(one_parked, messages=talk))))
            talk.append(said("user", f"Number {number}"))
            eventually(lambda: at_rest(one_parked))
    first, second = (words(query) for query in one_parked.queries()[2::3])

    assert len({query["pid"] for query in one_parked.queries()}) == 1
    assert (first[0], second[0], len(first), len(second)) == ("I am Ann", "I am Bob", 5, 5)
    # What claude adds to a conversation stands at the start of each.
    assert {query["reminded"] for query in one_parked.queries()} == {0}


def test_a_greeting_that_many_begin_with_makes_nobody_lose_the_conversation(tmp_path: Path) -> None:
    greeting = said("assistant", "Welcome!")
    with running_server(tmp_path) as server:
        talks = [[greeting, said("user", f"I am {name}")] for name in ("Ann", "Bob")]
        for talk in talks:
            talk.append(said("assistant", content_of(ask(server, messages=talk))))
        replies = [ask(server, messages=[*talk, said("user", "And?")]) for talk in talks]

        assert [path_of(server, reply) for reply in replies] == ["continued"] * 2


def test_answers_of_a_shape_come_from_one_process_which_never_goes_on_from_them(
    one_parked: Server
) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    one_parked.write_scenario([[{"tool": {"name": "StructuredOutput", "input": {"a": 1}}}]])
    for number in range(3):
        reply = ask(one_parked, f"Number {number}", response_format=shape)
        assert content_of(reply) == '{"a": 1}'
        eventually(lambda: at_rest(one_parked))
    later = ask(one_parked, response_format=shape, messages=[
        said("user", "Number 2"), said("assistant", '{"a": 1}'), said("user", "And now?")])

    assert path_of(one_parked, later) == "rewound"
    assert [words(query) for query in one_parked.queries()] == [
        ["Number 0"], ["Number 1"], ["Number 2"], ["Number 2", '{"a": 1}', "And now?"]]
    assert len({query["pid"] for query in one_parked.queries()}) == 1


def test_nobody_waits_with_a_call_of_the_client_s_and_a_shape(one_parked: Server) -> None:
    """The results go to a fresh process, and nothing is forgotten while a call waits for them."""
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    tools = [{"type": "function", "function": {"name": "weather"}}]
    ask(one_parked, "One")
    one_parked.write_scenario([[{"tool": {"name": "weather", "input": {}}}]])
    reply = ask(one_parked, "Weather?", tools=tools, response_format=shape)
    assert reply.json()["choices"][0]["finish_reason"] == "tool_calls"
    one_parked.write_scenario([])
    eventually(lambda: at_rest(one_parked))
    later = ask(one_parked, messages=[
        said("user", "One"), said("assistant", "You said: One"), said("user", "And?")])

    assert path_of(one_parked, later) == "continued"


def test_options_of_the_next_question_are_never_those_of_the_last(one_parked: Server) -> None:
    for most in (10, 20):
        assert ask(one_parked, "Hi", max_tokens=most).status == 200
        eventually(lambda: at_rest(one_parked))

    queries = one_parked.queries()
    assert len({query["pid"] for query in queries}) == 2
    assert [query["settings"]["env"]["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] for query in queries] == [
        "10", "20"]


def test_a_claude_that_cannot_forget_costs_nobody_the_answer(tmp_path: Path) -> None:
    scenario = {"turns": [], "unsupported": ["rewind_conversation"]}
    with running_server(tmp_path, scenario, env=ONE_PARKED) as server:
        replies = [ask(server, f"Number {number}") for number in range(4)]

        answers = [content_of(reply) for reply in replies]
        assert answers == [f"You said: Number {number}" for number in range(4)]
        assert {path_of(server, reply) for reply in replies} == {"fresh"}
        assert server.call("GET", "/health").json()["stats"]["errors"] == 0


@pytest.mark.slow
def test_a_claude_that_does_not_say_whether_it_forgot_is_asked_once(tmp_path: Path) -> None:
    player = ShellClaude(tmp_path)
    player.play(lines_of_an_answer("Hello."))
    with running_server(tmp_path / "server", claude=player.program, env=ONE_PARKED) as server:
        replies = [ask(server, f"Number {number}") for number in range(6)]

        assert [content_of(reply) for reply in replies] == ["Hello."] * 6
        assert {path_of(server, reply) for reply in replies} == {"fresh"}


def test_in_agent_mode_nothing_is_forgotten(tmp_path: Path) -> None:
    env = {**ONE_PARKED, "CLAUDE_ALLOWED_TOOLS": "default"}
    with running_server(tmp_path, env=env) as server:
        for number in range(3):
            ask(server, f"Number {number}")
            eventually(lambda: at_rest(server))

        assert len({query["pid"] for query in server.queries()}) == 3


def test_keys_never_share_a_process(tmp_path: Path) -> None:
    with running_server(tmp_path, env={**MULTI, **ONE_PARKED}) as server:
        keys = [new_key(server, name=name)["key"] for name in ("ann", "bob")]
        for number in range(3):
            for key in keys:
                assert ask_as(server, key, f"Number {number}").status == 200

        pids = [query["pid"] for query in server.queries()]
        assert not set(pids[::2]) & set(pids[1::2])


def test_a_busy_key_pushes_out_its_own_processes_only(tmp_path: Path) -> None:
    with running_server(tmp_path, env={**MULTI, "OCP_PARKED_PROCESSES": "3"}) as server:
        ann, bob, cid = (new_key(server, name=name)["key"] for name in ("ann", "bob", "cid"))
        answers = {key: content_of(ask_as(server, key, "One")) for key in (ann, bob)}
        eventually(lambda: at_rest(server))
        # The settings differ, so none of these can be rewound to another.
        for number in range(8):
            assert ask_as(server, cid, "Hi", max_tokens=100 + number).status == 200
        later = [
            ask_as(server, key, messages=[
                said("user", "One"), said("assistant", answers[key]), said("user", "And?")])
            for key in (ann, bob)]

        # The newest rows come first.
        rows = as_admin(server, "GET", "/api/usage?limit=2&all=true").json()["recent"]
        assert [reply.status for reply in later] == [200, 200]
        assert [row["path"] for row in rows] == ["continued", "continued"]


@pytest.mark.slow
def test_a_hundred_at_once_get_their_own_answers(tmp_path: Path) -> None:
    with running_server(tmp_path, env={"CLAUDE_MAX_QUEUE": "100"}) as server:
        questions = [f"Number {number}." for number in range(100)]
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda question: ask(server, question), questions))

        assert [content_of(reply) for reply in replies] == [f"You said: {q}" for q in questions]
        assert sorted(map(words, server.queries())) == sorted([question] for question in questions)
        stats = server.call("GET", "/health").json()["stats"]
        assert stats["fresh"] + stats["rewound"] == 100 and stats["rewound"] >= 30
