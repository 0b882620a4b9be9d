"""Failures behind the server: each is told as what it is, in both modes, early and late.

Early means that nothing has been sent yet: then a stream, too, fails with a status."""
from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chat import (
    CHAT_PATH,
    NO_IDLE,
    UNLISTED_MODEL,
    ask,
    both_ways,
    content_of,
    encoded,
    error_of,
    finish_reasons,
    pieces,
    question,
    stream_error,
)
from dialects import DIALECTS, MESSAGES, Dialect, dialect_name
from http_client import Reply
from processes import is_gone, kill_all, processes_with
from project import TRANSCRIPTS, load_script
from raw_http import RawConnection, post
from server import Server, at_rest, health, last_entry, running_server, spares
from waiting import eventually, in_parallel, seconds_of, stays

Json = Any

PROSE = "API Error: prose that is no answer"


@pytest.fixture
def chat(shared_server: Server) -> Server:
    """A server with default settings, to be given a script."""
    return shared_server


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that gives an answer a second, and one request at a time."""
    env = {"CLAUDE_TIMEOUT": "1000", "CLAUDE_MAX_CONCURRENT": "1"}
    with running_server(tmp_path_factory.mktemp("brief"), env=env) as running:
        yield running


class Failure(NamedTuple):
    """What the API says, and what the client is told then."""

    status: int
    word: str
    told_status: int
    told_type: str
    code: Json
    retry_after_s: Json
    #: Whether clients are told not to try again.
    is_final: bool

    @property
    def step(self) -> dict[str, Json]:
        return {"api_error": {"status": self.status, "word": self.word, "text": PROSE}}


FAILURES = [
    Failure(400, "invalid_request", 400, "invalid_request_error", None, None, True),
    Failure(401, "authentication_failed", 401, "authentication_error",
            "upstream_login_required", None, True),
    Failure(403, "unknown", 403, "permission_error", "upstream_forbidden", None, True),
    Failure(404, "model_not_found", 404, "invalid_request_error", "model_not_found", None, True),
    Failure(429, "rate_limit", 429, "rate_limit_error", "rate_limit_exceeded", 20, False),
    Failure(500, "server_error", 502, "server_error", "upstream_failed", None, False),
    Failure(529, "overloaded", 529, "server_error", "overloaded", 10, False),
    Failure(599, "a_word_of_the_future", 502, "server_error", "upstream_failed", None, False),
]
each_failure = pytest.mark.parametrize("failure", FAILURES, ids=lambda each: str(each.status))


def check_headers(reply: Reply, failure: Failure) -> None:
    assert reply.headers["x-should-retry"] == ("false" if failure.is_final else None)
    pause = failure.retry_after_s
    assert reply.headers["Retry-After"] == (None if pause is None else str(pause))


def check_error(error: dict[str, Json], failure: Failure) -> None:
    assert (error["type"], error["code"]) == (failure.told_type, failure.code)
    assert "prose that is no answer" in error["message"]


# ---------------------------------------------------------------------------
# Errors of the API
# ---------------------------------------------------------------------------

@both_ways
@each_failure
def test_an_early_error_of_the_api_has_a_status_and_a_type_of_its_own(
    chat: Server, failure: Failure, stream: bool
) -> None:
    chat.write_scenario([[failure.step]])

    reply = ask(chat, stream=stream)

    assert reply.status == failure.told_status
    check_error(error_of(reply), failure)
    check_headers(reply, failure)


@each_failure
def test_an_error_of_the_api_in_the_middle_of_a_stream_is_its_last_frame(
    chat: Server, failure: Failure
) -> None:
    chat.write_scenario([[{"say": "so far"}, failure.step]])

    reply = ask(chat, stream=True)

    assert reply.status == 200
    check_error(stream_error(reply.events), failure)
    assert "".join(pieces(reply.events)) == "so far"


@each_failure
def test_an_error_of_the_api_in_the_middle_of_a_whole_answer_is_its_status(
    chat: Server, failure: Failure
) -> None:
    chat.write_scenario([[{"say": "so far"}, failure.step]])

    reply = ask(chat)

    assert reply.status == failure.told_status
    check_error(error_of(reply), failure)
    check_headers(reply, failure)


@both_ways
def test_a_limit_of_the_plan_says_when_it_ends(chat: Server, stream: bool) -> None:
    error = {"status": 429, "word": "rate_limit", "text": "You've hit your limit"}
    chat.write_scenario([[{"api_error": error, "resets_at": int(time.time()) + 5000}]])

    reply = ask(chat, stream=stream, model="opus")

    assert (reply.status, error_of(reply)["type"]) == (429, "insufficient_quota")
    assert error_of(reply)["code"] == "insufficient_quota"
    assert 4900 <= int(reply.headers["Retry-After"]) <= 5000
    assert reply.headers["x-should-retry"] == "false"


#: A prompt that is too long: the API's words, which claude tells to a hook only.
TOO_LONG = "prompt is too long: 250123 tokens > 200000 maximum"
TOO_LONG_STEP = {"api_error": {
    "status": 400, "word": "invalid_request", "text": "Prompt is too long", "details": TOO_LONG}}


@both_ways
@pytest.mark.parametrize("dialect", DIALECTS, ids=dialect_name)
def test_a_prompt_that_is_too_long_is_told_in_the_api_s_words(
    chat: Server, dialect: Dialect, stream: bool
) -> None:
    chat.write_scenario([[TOO_LONG_STEP]])
    count = len(chat.queries())

    reply = chat.call("POST", dialect.path, dialect.body("Long?", stream=stream))

    found = reply.json()["error"]
    assert (reply.status, found["type"]) == (400, "invalid_request_error")
    assert found["message"] == TOO_LONG
    assert dialect is MESSAGES or (found["code"], found["param"]) == (
        "context_length_exceeded", "messages")
    assert reply.headers["x-should-retry"] == "false"
    assert len(chat.queries()) - count == 1


@pytest.mark.parametrize("dialect", DIALECTS, ids=dialect_name)
def test_a_prompt_that_no_window_could_hold_is_refused_without_claude(
    chat: Server, dialect: Dialect
) -> None:
    count = len(chat.queries())

    # The window of this model has 200,000 tokens.
    body = dialect.body("word " * 1_300_000, model="claude-haiku-4-5")
    reply = chat.call("POST", dialect.path, body)

    found = reply.json()["error"]
    assert (reply.status, found["type"]) == (400, "invalid_request_error")
    assert re.fullmatch(r"prompt is too long: \d{7} tokens > 200000 maximum", found["message"])
    assert dialect is MESSAGES or found["code"] == "context_length_exceeded"
    assert len(chat.queries()) == count


def test_what_the_api_might_take_is_passed_on_whole(chat: Server) -> None:
    chat.write_scenario([[{"say": "Read."}]])
    words = "word " * 300_000

    reply = ask(chat, words, model="claude-haiku-4-5")

    assert reply.status == 200 and reply.headers["X-OCP-Adjusted"] is None
    assert chat.queries()[-1]["messages"][-1]["content"][0]["text"] == words


def test_claude_retries_and_the_client_gets_the_answer(chat: Server) -> None:
    retry = {"type": "system", "subtype": "api_retry", "attempt": 1, "max_retries": 2,
             "retry_delay_ms": 1, "error_status": 529, "error": "overloaded"}
    chat.write_scenario([[{"raw": retry}, {"raw": retry}, {"say": "third time lucky"}]])

    whole, streamed = ask(chat), ask(chat, stream=True)

    assert content_of(whole) == "third time lucky" == "".join(pieces(streamed.events))


@both_ways
def test_retries_that_are_used_up_are_an_error(chat: Server, stream: bool) -> None:
    chat.write_scenario([[{**FAILURES[6].step, "retries": 2}]])

    assert ask(chat, stream=stream).status == 529


RECORDED = {
    "error_400": 400, "error_400_too_long": 400, "error_401": 401, "error_403": 403,
    "error_404": 404, "error_413": 413, "error_429_plain": 429, "error_429_plan_limit": 429,
    "error_500": 502, "error_529": 529, "not_logged_in": 401, "network_down": 502,
}


@pytest.mark.few_cases
@pytest.mark.parametrize("version", ["2.1.197", "2.1.329"])
@pytest.mark.parametrize("name", RECORDED)
def test_what_the_real_program_printed_for_a_failure_is_that_failure(
    chat: Server, name: str, version: str
) -> None:
    recorded = TRANSCRIPTS / f"{version}-{name}.jsonl"
    chat.write_scenario([[{"replay": str(recorded), "skip": ["control_response"]}]])

    whole = ask(chat, model=UNLISTED_MODEL)
    streamed = ask(chat, stream=True, model=UNLISTED_MODEL)

    assert whole.status == streamed.status == RECORDED[name]
    first, second = error_of(whole), error_of(streamed)
    # The first process says which claude it is, and so which other models there are.
    for error in (first, second):
        error["message"] = error["message"].partition(" Use one of: ")[0]
    assert first == second


@pytest.mark.parametrize("version", ["2.1.197", "2.1.329"])
def test_an_answer_whose_connection_broke_is_an_error_that_shows_what_came(
    chat: Server, version: str
) -> None:
    recorded = TRANSCRIPTS / f"{version}-cut.jsonl"
    chat.write_scenario([[{"replay": str(recorded), "skip": ["control_response"]}]])

    whole, streamed = ask(chat), ask(chat, stream=True)

    assert (whole.status, error_of(whole)["type"]) == (502, "server_error")
    assert stream_error(streamed.events)["type"] == "server_error"
    assert "".join(pieces(streamed.events)) == "Paris is"


def test_an_answer_that_claude_began_again_is_whole_but_no_stream(chat: Server) -> None:
    recorded = TRANSCRIPTS / "2.1.329-cut_then_text.jsonl"
    chat.write_scenario([[{"replay": str(recorded), "skip": ["control_response"]}]])

    whole, streamed = ask(chat), ask(chat, stream=True)

    assert content_of(whole) == "Paris is the capital."
    assert stream_error(streamed.events)["code"] == "upstream_failed"


def test_a_beginning_that_showed_no_text_is_forgotten(chat: Server) -> None:
    recorded = TRANSCRIPTS / "2.1.329-stream_error_at_once_then_text.jsonl"
    chat.write_scenario([[{"replay": str(recorded), "skip": ["control_response"]}]])

    whole, streamed = ask(chat), ask(chat, stream=True)

    assert content_of(whole) == "Paris is the capital." == "".join(pieces(streamed.events))


# ---------------------------------------------------------------------------
# Results that are none
# ---------------------------------------------------------------------------

def result(**fields: Json) -> dict[str, Json]:
    return {"raw": {"type": "result", "subtype": "success", "is_error": False, **fields}}


BAD_RESULTS = {
    "error called a success": (result(is_error=True, result="it broke"), "it broke"),
    "during execution": (
        result(subtype="error_during_execution", is_error=True, errors=["first", "second"]),
        "first; second"),
    "no more turns": (result(subtype="error_max_turns", is_error=True), "error_max_turns"),
    "status only": (result(is_error=True, api_error_status=500), ""),
    "not even text": (result(is_error=True, result={"odd": 1}, errors="odd"), ""),
}
#: A success that says nothing. Clients would ask for ever if it was no fault of theirs.
EMPTY = {
    "result": result(result=PROSE), "bare result": result(), "message": {"finish": "end_turn"},
}


@both_ways
@pytest.mark.parametrize("name", BAD_RESULTS)
def test_a_result_without_an_answer_is_an_error(chat: Server, name: str, stream: bool) -> None:
    step, words = BAD_RESULTS[name]
    chat.write_scenario([[step]])

    reply = ask(chat, stream=stream)

    assert (reply.status, error_of(reply)["type"]) == (502, "server_error")
    assert words in error_of(reply)["message"]


@pytest.mark.parametrize("name", BAD_RESULTS)
def test_a_result_in_the_middle_of_an_answer_is_an_error(chat: Server, name: str) -> None:
    step, _ = BAD_RESULTS[name]
    chat.write_scenario([[{"say": "so far"}, step]])

    whole, streamed = ask(chat), ask(chat, stream=True)

    assert whole.status == 502
    assert stream_error(streamed.events)["code"] == "upstream_failed"
    assert "".join(pieces(streamed.events)) == "so far"


@both_ways
@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_answer_is_an_error_that_is_not_tried_again(
    chat: Server, name: str, stream: bool
) -> None:
    chat.write_scenario([[EMPTY[name]]])

    reply = ask(chat, stream=stream)

    assert (reply.status, error_of(reply)["code"]) == (400, "empty_answer")
    assert reply.headers["x-should-retry"] == "false"
    assert PROSE not in error_of(reply)["message"]


def test_a_stop_sequence_at_once_is_an_empty_success(chat: Server) -> None:
    chat.write_scenario([[{"finish": "stop_sequence", "stop_sequence": "END"}]])

    reply = ask(chat, stop="END")

    assert content_of(reply) == ""
    assert reply.json()["choices"][0]["finish_reason"] == "stop"


def test_text_of_a_synthetic_message_is_never_content(chat: Server) -> None:
    synthetic = {"type": "assistant", "error": "unknown", "message": {
        "model": "<synthetic>", "content": [{"type": "text", "text": PROSE}]}}
    chat.write_scenario([[{"say": "so far"}, {"raw": synthetic}, {"say": "and on"}]])

    whole, streamed = ask(chat), ask(chat, stream=True)

    assert PROSE not in whole.text
    assert PROSE not in "".join(pieces(streamed.events))


def test_a_refused_control_request_is_an_error(chat: Server) -> None:
    refusal = {"type": "control_response", "response": {
        "subtype": "error", "request_id": "r", "error": "unknown setting at /home/me/x"}}
    chat.write_scenario([[{"raw": refusal}, {"say": "an answer without its options"}]])

    error = error_of(ask(chat))

    assert error["code"] == "upstream_failed"
    assert "unknown setting" in error["message"] and "/home/me" not in error["message"]


# ---------------------------------------------------------------------------
# Deaths
# ---------------------------------------------------------------------------

DEATHS = {
    "exit 1": ({"exit": 1}, "exit 1"), "exit 0": ({"exit": 0}, "exit 0"),
    "SIGKILL": ({"kill": 9}, "signal 9"), "SIGSEGV": ({"kill": 11}, "signal 11"),
    "SIGTERM": ({"kill": 15}, "signal 15"),
}


@both_ways
@pytest.mark.parametrize("name", DEATHS)
def test_an_early_death_is_502_in_both_modes(chat: Server, name: str, stream: bool) -> None:
    step, words = DEATHS[name]
    chat.write_scenario([[step]])

    reply = ask(chat, stream=stream)

    assert (reply.status, error_of(reply)["code"]) == (502, "upstream_failed")
    assert words in error_of(reply)["message"]


@pytest.mark.parametrize("name", DEATHS)
def test_a_death_in_the_middle_of_an_answer_is_no_success(chat: Server, name: str) -> None:
    step, words = DEATHS[name]
    chat.write_scenario([[{"say": "so far"}, step]])

    whole, streamed = ask(chat), ask(chat, stream=True)

    assert whole.status == 502
    assert words in stream_error(streamed.events)["message"]
    assert pieces(streamed.events) == ["so ", "far"]


def test_a_death_between_the_turns_of_the_history_is_502(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
                {"role": "user", "content": "three"}]

    with running_server(tmp_path, {"startup": [{"exit": 3}]}, env=NO_IDLE) as server:
        reply = ask(server, messages=messages)

    assert (reply.status, error_of(reply)["code"]) == (502, "upstream_failed")
    assert "exit 3" in error_of(reply)["message"]


def test_the_last_words_of_claude_are_told_without_paths_and_tokens(chat: Server) -> None:
    words = "cannot read /home/me/.claude/x with sk-ant-oat01-abcdefghijkl"
    chat.write_scenario([[{"stderr": "first words"}, {"stderr": words}, {"exit": 1}]])

    message = error_of(ask(chat))["message"]

    assert "cannot read" in message and "first words" not in message
    assert "/home/me" not in message and "abcdefghijkl" not in message


def test_a_lot_of_last_words_does_not_block_claude(chat: Server) -> None:
    chat.write_scenario([[{"stderr": "x" * 1000}] * 300 + [{"say": "fine"}]])

    assert content_of(ask(chat)) == "fine"


def test_an_option_that_claude_does_not_know_means_that_it_is_too_old(chat: Server) -> None:
    chat.write_scenario([[{"stderr": "error: unknown option '--tools'"}, {"exit": 1}]])

    reply = ask(chat)

    assert (reply.status, error_of(reply)["code"]) == (503, "claude_unavailable")
    assert "claude update" in error_of(reply)["message"]


# ---------------------------------------------------------------------------
# Odd lines
# ---------------------------------------------------------------------------

HARMLESS_LINES: dict[str, Json] = {
    "prose": "a plugin says hello", "empty": "", "spaces": "   ", "number": "42",
    "array": '["type", "result"]', "null": "null", "string": '"result"',
    "unknown type": {"type": "a_type_of_the_future", "result": PROSE},
    "unknown event": {"type": "stream_event", "event": {"type": "ping"}},
    "unknown delta": {"type": "stream_event", "event": {
        "type": "content_block_delta", "index": 0, "delta": {"type": "new", "text": PROSE}}},
    "no type": {"result": PROSE}, "type is a list": {"type": ["result"]},
    "event is null": {"type": "stream_event", "event": None},
    "event is text": {"type": "stream_event", "event": PROSE},
    "delta is a number": {"type": "stream_event", "event": {
        "type": "content_block_delta", "index": "x", "delta": 5}},
    "delta without text": {"type": "stream_event", "event": {
        "type": "content_block_delta", "delta": {"type": "text_delta", "text": None}}},
    "stop reason is null": {"type": "stream_event", "event": {
        "type": "message_delta", "delta": {"stop_reason": None}, "usage": [1]}},
    "message is null": {"type": "assistant", "message": None},
    "content is null": {"type": "assistant", "message": {"content": None}},
    "limit is odd": {"type": "rate_limit_event", "rate_limit_info": {"resetsAt": "soon"}},
    "error with odd content": {"type": "assistant", "error": "x", "message": {"content": 5}},
    "odd prose": {"type": "assistant", "message": {"model": "<synthetic>", "content": True}},
    "limit is null": {"type": "rate_limit_event", "rate_limit_info": None},
    "answer to nothing": {"type": "control_response", "response": None},
    "question": {"type": "control_request", "request_id": "x", "request": {"subtype": "hi"}},
}


@pytest.mark.parametrize("name", HARMLESS_LINES)
def test_an_odd_line_does_not_change_the_answer(chat: Server, name: str) -> None:
    odd = {"raw": HARMLESS_LINES[name]}
    chat.write_scenario([[odd, {"say": "an answer"}, odd, {"say": " in peace"}, odd]])

    assert content_of(ask(chat)) == "an answer in peace"


def test_odd_lines_do_not_change_a_stream(chat: Server) -> None:
    odd = [{"raw": line} for line in HARMLESS_LINES.values()]
    chat.write_scenario([[*odd, {"say": "an answer"}, *odd, {"say": " in peace"}, *odd]])

    reply = ask(chat, stream=True)

    assert pieces(reply.events) == ["an ", "answer", " ", "in ", "peace"]
    assert finish_reasons(reply.events) == ["stop"]


@pytest.mark.parametrize("line", [
    '{"type":"stream_event","event":{"ty', '{"type":"result",}', '{"a":NaN}', "{" * 200_000,
], ids=["half", "comma", "nan", "deep"])
def test_a_broken_line_is_an_error_because_something_is_lost(chat: Server, line: str) -> None:
    chat.write_scenario([[{"say": "so far"}, {"raw": line}, {"say": "on"}]])

    whole, streamed = ask(chat), ask(chat, stream=True)

    assert (whole.status, error_of(whole)["code"]) == (502, "upstream_failed")
    assert stream_error(streamed.events)["code"] == "upstream_failed"


def test_bytes_that_are_no_text_are_skipped(chat: Server) -> None:
    noise = {"raw_bytes_hex": (b"\x00\xff\xfe\x80noise\r\n").hex()}
    chat.write_scenario([[noise, {"say": "signal"}, noise]])

    assert content_of(ask(chat)) == "signal"


def test_half_a_line_before_a_death_is_no_answer(chat: Server) -> None:
    half = {"raw_bytes_hex": b'{"type":"stream_event","event"'.hex()}
    chat.write_scenario([[{"say": "so far"}, half, {"exit": 0}]])

    whole, streamed = ask(chat), ask(chat, stream=True)

    assert whole.status == 502
    assert stream_error(streamed.events)["code"] == "upstream_failed"


def test_a_line_of_5_mb_is_read(chat: Server) -> None:
    large = "abcdefgh" * 625_000
    chat.write_scenario([[{"raw": {"type": "noise", "pad": large}}, {"say": large, "chunks": 1}]])

    whole = ask(chat)

    assert content_of(whole) == large


TEXT = "\U0001f600 na\u00efve \u6f22\u5b57 \U0001f468\u200d\U0001f469\u200d\U0001f467 end"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_output_cut_anywhere_gives_the_same_answer(chat: Server, size: int) -> None:
    chat.write_scenario([[{"split": size}, {"say": TEXT, "chunks": len(TEXT)}]])

    whole, streamed = ask(chat), ask(chat, stream=True)

    assert content_of(whole) == TEXT
    assert pieces(streamed.events) == list(TEXT)


def test_half_a_character_does_not_break_the_json(chat: Server) -> None:
    delta = {"type": "text_delta", "text": "\ud83d"}
    event = {"type": "content_block_delta", "index": 0, "delta": delta}
    line = {"raw": {"type": "stream_event", "event": event}}
    chat.write_scenario([[{"say": "a"}, line, {"say": "b"}]])

    whole, streamed = ask(chat), ask(chat, stream=True)

    assert content_of(whole) == "a\ud83db" == "".join(pieces(streamed.events))


# ---------------------------------------------------------------------------
# After the first byte of a whole answer
# ---------------------------------------------------------------------------

def test_a_whole_answer_that_fails_after_its_headers_is_cut(tmp_path: Path) -> None:
    script = [[{"sleep_ms": 250}, FAILURES[5].step]]

    env = {"OCP_WHOLE_SILENCE": "60"}
    with running_server(tmp_path, script, env=env) as server, RawConnection(server.port) as wire:
        wire.send(post(encoded(question())))

        with pytest.raises(ValueError, match="invalid literal"):
            wire.reply()


# ---------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------

def test_an_answer_that_takes_too_long_is_504(brief: Server) -> None:
    brief.write_scenario([[{"hang": True}]])
    results = []

    def both() -> None:
        # The second one spends all of its time in the queue.
        results.extend(in_parallel([lambda: ask(brief), lambda: ask(brief, stream=True)]))

    taken_s = seconds_of(both)

    for reply in results:
        assert (reply.status, error_of(reply)["code"]) == (504, "timeout")
    assert 0.9 < taken_s < 20
    assert eventually(lambda: at_rest(brief))
    assert health(brief)["stats"]["timeouts"] == 2


def test_a_stream_that_takes_too_long_ends_with_an_error(brief: Server) -> None:
    brief.write_scenario([[{"say": "so far"}, {"hang": True}]])

    def begun() -> Reply:
        """A stream for which a second was enough to begin."""
        found = ask(brief, stream=True)
        assert found.status == 200, found
        return found

    reply = eventually(begun)

    assert stream_error(reply.events)["code"] == "timeout"
    assert eventually(lambda: is_gone(brief.queries()[-1]["pid"]))


# ---------------------------------------------------------------------------
# The login
# ---------------------------------------------------------------------------

def test_a_lost_login_shows_in_health_and_heals_with_the_next_answer(chat: Server) -> None:
    chat.write_scenario([[FAILURES[1].step]])
    reply = ask(chat)
    lost = health(chat)
    chat.write_scenario([[{"say": "back"}]])
    answer = ask(chat)
    healed = health(chat)

    assert "claude auth login" in error_of(reply)["message"]
    assert (lost["status"], lost["auth"]["ok"]) == ("degraded", False)
    assert "claude auth login" in lost["fix"]
    assert content_of(answer) == "back"
    assert (healed["status"], healed["auth"]["ok"], healed["fix"]) == ("ok", True, None)


def test_processes_that_knew_the_lost_login_are_not_used_again(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        eventually(lambda: spares(server) == {"claude-sonnet-5-5": 1})
        before = eventually(lambda: {
            each["pid"] for each in server.fake_log("start") if each["argv"][:1] == ["-p"]})
        server.write_scenario([[FAILURES[1].step]])
        # This model has no spare, so the one of the other is there when the login is lost.
        ask(server, model="claude-opus-4-7")
        server.write_scenario([])
        reply = ask(server)

        assert content_of(reply) == "You said: hi"
        assert server.queries()[-1]["pid"] not in before


def test_a_failure_is_one_warning_in_the_log(chat: Server) -> None:
    chat.write_scenario([[FAILURES[6].step]])

    reply = ask(chat)

    entry = eventually(lambda: [
        each for each in chat.log_entries("answer_failed")
        if each["request_id"] == reply.headers["X-Request-Id"]])
    assert [(each["level"], each["status"]) for each in entry] == [("warn", 529)]


# ---------------------------------------------------------------------------
# No claude
# ---------------------------------------------------------------------------

def check_unavailable(server: Server, advice: str) -> None:
    """It runs, says what to do in /health, and refuses questions in the same words."""
    state = eventually(lambda: [found for found in [health(server)] if found["fix"]])[0]
    replies = ask(server), ask(server, stream=True)

    assert state["status"] == "degraded" and advice in state["fix"]
    assert (state["claudeBinaryOk"], state["claudeVersion"]) == (False, None)
    assert server.call("GET", "/v1/models").status == 200
    for reply in replies:
        assert (reply.status, error_of(reply)["code"]) == (503, "claude_unavailable")
        assert advice in error_of(reply)["message"]
        assert reply.headers["x-should-retry"] == "false"
    assert last_entry(server, "claude_unavailable")["level"] == "error"


INSTALL = "npm install -g @anthropic-ai/claude-code"


def test_a_claude_that_is_named_and_not_there_is_503(tmp_path: Path) -> None:
    with running_server(tmp_path, claude=tmp_path / "nothing") as server:
        check_unavailable(server, INSTALL)


USUAL_PLACES = ("/opt/homebrew/bin/claude", "/usr/local/bin/claude", "/usr/bin/claude")
lucky_place = [place for place in USUAL_PLACES if os.path.exists(place)]


@pytest.mark.skipif(bool(lucky_place), reason=f"there is a claude at {lucky_place}")
def test_a_claude_that_is_not_on_the_path_is_503(tmp_path: Path) -> None:
    env = {"CLAUDE_BIN": None, "PATH": "/nonexistent"}

    with running_server(tmp_path, env=env) as server:
        check_unavailable(server, INSTALL)


def test_a_claude_that_is_too_old_is_503(tmp_path: Path) -> None:
    with running_server(tmp_path, {"version": "2.1.196"}) as server:
        check_unavailable(server, "claude update")


@pytest.mark.slow
def test_a_claude_that_cannot_be_used_is_not_asked_all_the_time(tmp_path: Path) -> None:
    with running_server(tmp_path, {"version": "2.1.196"}) as server:
        for _ in range(3):
            ask(server)

        assert stays(lambda: len(server.fake_log("start")), 1.2) == 1


@pytest.mark.slow
def test_a_claude_that_never_tells_its_version_does_not_hold_up_health(tmp_path: Path) -> None:
    program = tmp_path / "silent"
    program.write_text("#!/bin/sh\nexec sleep 30\n")
    program.chmod(0o755)

    with running_server(tmp_path, claude=program) as server:
        # It is given up on after 20 seconds.
        assert seconds_of(lambda: in_parallel([lambda: health(server)] * 3)) < 10
        kill_all(server.children())


def test_a_claude_that_never_tells_its_version_leaves_nothing_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ocp = load_script("ocp_server.py")
    monkeypatch.setattr(ocp, "_VERSION_PROBE_TIMEOUT_S", 0.5)
    program = tmp_path / "around"
    program.write_text("#!/bin/sh\nsleep 600\nexit\n")
    program.chmod(0o755)
    environ = {"PATH": os.environ["PATH"], "HOME": f"{tmp_path}/", "CLAUDE_BIN": str(program)}

    with pytest.raises(ocp.ClaudeMissing):
        ocp.ClaudeProgram(ocp.load_config(environ), environ, ()).resolve()

    # By themselves they would go on for ten minutes.
    assert eventually(lambda: not processes_with(tmp_path))


@pytest.mark.parametrize("script", [
    "#!/nonexistent/interpreter\n", "#!/bin/sh\nexit 1\n", "#!/bin/sh\necho hello\n",
    "\x7fELF not really a program\n",
], ids=["no interpreter", "fails", "no version", "no program"])
def test_a_claude_that_does_not_start_is_503(tmp_path: Path, script: str) -> None:
    program = tmp_path / "broken"
    program.write_text(script)
    program.chmod(0o755)

    with running_server(tmp_path, claude=program) as server:
        check_unavailable(server, INSTALL)


def test_a_claude_that_may_not_be_executed_is_503(tmp_path: Path) -> None:
    program = tmp_path / "plain"
    program.write_text("#!/bin/sh\n")

    with running_server(tmp_path, claude=program) as server:
        check_unavailable(server, INSTALL)


def test_a_claude_that_is_installed_later_is_found(tmp_path: Path) -> None:
    program = tmp_path / "later"

    with running_server(tmp_path, claude=program) as server:
        before = ask(server)
        # The server may look at any moment, and is to see a whole program.
        shutil.copy(server.place.claude, tmp_path / "draft")
        os.replace(tmp_path / "draft", program)
        after = ask(server)
        state = health(server)

    assert before.status == 503
    assert content_of(after) == "You said: hi"
    assert (state["status"], state["fix"]) == ("ok", None)


def test_a_claude_that_is_removed_is_missed_at_once(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        before = ask(server)
        server.place.claude.unlink()
        after = ask(server)

    assert content_of(before) == "You said: hi"
    assert (after.status, error_of(after)["code"]) == (503, "claude_unavailable")


# ---------------------------------------------------------------------------
# After all that
# ---------------------------------------------------------------------------

def test_failures_leave_nothing_behind(chat: Server) -> None:
    for step in (FAILURES[1].step, {"exit": 1}, {"kill": 9}, {"raw": "{broken"}):
        chat.write_scenario([[{"say": "so far"}, step]])
        ask(chat, stream=True)
    asked = {query["pid"] for query in chat.queries()}
    chat.write_scenario([])

    assert eventually(lambda: at_rest(chat))
    assert eventually(lambda: all(is_gone(pid) for pid in asked))
    assert eventually(lambda: chat.zombies() == [])
    assert content_of(ask(chat)) == "You said: hi"
    assert "Traceback" not in chat.output and chat.log_entries("request_broke") == []


def test_an_error_of_claude_is_json_for_a_client_of_http_1_0(chat: Server) -> None:
    chat.write_scenario([[FAILURES[6].step]])

    with RawConnection(chat.port) as wire:
        wire.send(post(encoded(question()), path=CHAT_PATH, version="HTTP/1.0"))
        reply = wire.reply()

    assert reply.status == 529
    assert json.loads(reply.body)["error"]["code"] == "overloaded"
