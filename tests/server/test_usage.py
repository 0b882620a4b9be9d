"""Accounting: one row for each request with what it was and cost, and what the rows add up to.

The first part asks a running server, the second puts rows with times of its own into a ledger,
the third takes the disk away, and the last one kills the server again and again.
"""
from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import random
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from chat import (
    CHAT_PATH,
    NO_IDLE,
    ask,
    both_ways,
    content_of,
    encoded,
    error_of,
    pieces,
    question,
    stream_chat,
)
from clock import FakeClock
from depth import by_depth
from dialects import DIALECTS, MESSAGES, Dialect, dialect_name
from disks import DISKS, SmallDisk, may_mount
from http_client import http_call
from keys import ADMIN_KEY, ANONYMOUS_KEY, MULTI, as_admin, ask_as, bearer, new_key
from project import REPO, load_script, read_json_lines
from raw_http import RawConnection, post
from server import Place, Server, asked_process, running, running_server
from shell_claude import ShellClaude, lines_of_an_answer
from time_zones import zone
from waiting import eventually, in_parallel

ocp = load_script("ocp_server.py")

Json = Any

SONNET = "claude-sonnet-5-5"
SPENT = {"input_tokens": 21, "output_tokens": 43, "cache_read_input_tokens": 65,
         "cache_creation_input_tokens": 87}
#: The columns for tokens, and what SPENT puts into them.
TOKENS = {"input_tokens": 21, "output_tokens": 43, "cache_read_tokens": 65,
          "cache_write_tokens": 87}
NOTHING = dict.fromkeys(TOKENS, 0)


@pytest.fixture(scope="module")
def shared_books(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for tests that ask as themselves and find their rows by the id of the request."""
    with running_server(tmp_path_factory.mktemp("books")) as running_one:
        yield running_one


@pytest.fixture
def books(shared_books: Server) -> Server:
    """That server, with claude as it is without a script."""
    shared_books.write_scenario([])
    return shared_books


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Server]:
    """A server of mode multi for one test alone."""
    env = {**MULTI, "PROXY_ANONYMOUS_KEY": ANONYMOUS_KEY}
    with running_server(tmp_path / "own", env=env) as running_one:
        yield running_one


def usage(server: Server, query: str = "", key: str = "") -> Json:
    """The report; it has to be there."""
    reply = server.call("GET", f"/api/usage?{query}", headers=bearer(key))
    assert reply.status == 200, reply
    return reply.json()


def rows_of(server: Server, reply: Any) -> list[Json]:
    """All rows that there are of this answer's request."""
    request_id = reply.headers["X-Request-Id"]
    recent = usage(server, "limit=500")["recent"]
    return [row for row in recent if row["request_id"] == request_id]


def row_of(server: Server, reply: Any) -> Json:
    """The one row of this answer's request."""
    (row,) = rows_of(server, reply)
    return row


def tokens_of(row: Mapping[str, Json]) -> dict[str, int]:
    return {name: row[name] for name in TOKENS}


# ---------------------------------------------------------------------------
# One row for each request
# ---------------------------------------------------------------------------

ANSWER = [{"think": "Hm.", "signature": "c2ln", "usage": SPENT}, {"say": "Hello there."}]


@both_ways
@pytest.mark.parametrize("dialect", DIALECTS, ids=dialect_name)
def test_an_answer_is_one_row(books: Server, dialect: Dialect, stream: bool) -> None:
    books.write_scenario([ANSWER])
    body = dialect.body(f"Row of {dialect.name}", stream=stream, model="sonnet")

    row = row_of(books, books.call("POST", dialect.path, body))

    assert tokens_of(row) == TOKENS
    assert row["first_token_ms"] <= row["elapsed_ms"]
    assert row["path"] in ("fresh", "rewound")
    assert {name: row[name] for name in (
        "key_name", "model", "dialect", "outcome", "status", "success", "stop_reason", "stream",
        "prompt_chars", "response_chars")} == {
        "key_name": "local", "model": SONNET, "dialect": dialect.name, "outcome": "ok",
        "status": 200, "success": 1, "stop_reason": "end_turn", "stream": int(stream),
        "prompt_chars": len(f"Row of {dialect.name}"), "response_chars": 15}


def test_a_row_tells_when_in_both_forms(books: Server) -> None:
    before_s = time.time()

    row = row_of(books, ask(books))

    at_s = ocp.parse_time(row["at"])
    assert before_s - 0.002 <= at_s <= time.time()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row["at"])
    assert row["created_at"] == row["at"][:19].replace("T", " ")


def test_a_row_tells_how_long_the_first_token_and_the_whole_took(
    books: Server, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    books.write_scenario([[
        {"sleep_ms": 120}, {"say": "One "}, {"wait_for": str(go)}, {"say": "two"}]])

    with stream_chat(books) as stream:
        while not pieces([next(iter(stream))]):
            pass
        # The server has had the first token by now.
        time.sleep(0.12)
        go.touch()
        assert list(stream)[-1][1] == "[DONE]"

    row = row_of(books, stream)
    assert row["first_token_ms"] >= 120
    assert row["elapsed_ms"] - row["first_token_ms"] >= 115


def test_a_row_has_no_word_of_what_was_said(books: Server) -> None:
    books.write_scenario([[{"say": "swordfish"}]])

    row = row_of(books, ask(books, "What is the password?", user="somebody@example.org"))

    shown = json.dumps(row)
    assert "swordfish" not in shown and "password" not in shown and "somebody" not in shown


def test_rows_tell_warm_from_cold_and_how_claude_got_the_conversation(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        eventually(lambda: server.call("GET", "/health").json()["spares"])
        first = ask(server)
        messages = [{"role": "user", "content": "hi"},
                    {"role": "assistant", "content": content_of(first)},
                    {"role": "user", "content": "and now?"}]
        other = {"role": "user", "content": "and then?"}
        replies = [first, *(ask(server, messages=each) for each in (
            messages, [*messages[:2], other],
            [*messages[:1], {"role": "assistant", "content": "Edited."}, other]))]

        found = [(row_of(server, reply)["path"]) for reply in replies]
        assert found == ["fresh", "continued", "rewound", "rebuilt"]
        assert [row_of(server, reply)["warm"] for reply in replies[:2]] == [1, 1]

    with running_server(tmp_path / "cold", env=NO_IDLE) as server:
        assert row_of(server, ask(server))["warm"] == 0


@both_ways
def test_several_answers_are_one_row_with_what_all_of_them_cost(
    books: Server, stream: bool
) -> None:
    books.write_scenario([ANSWER])

    row = row_of(books, ask(books, "Three", n=3, stream=stream))

    assert tokens_of(row) == {name: 3 * count for name, count in TOKENS.items()}
    assert (row["prompt_chars"], row["response_chars"]) == (5, 45)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def test_every_step_of_a_tool_loop_is_a_row(books: Server) -> None:
    books.write_scenario([[{"tool": {"name": "f", "input": {}}}], [{"say": "Done."}]])
    first = ask(books, "Call it", tools=[TOOL])
    message = first.json()["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "42"}

    second = ask(books, tools=[TOOL], messages=[
        {"role": "user", "content": "Call it"}, message, result])

    rows = [row_of(books, reply) for reply in (first, second)]
    assert [row["stop_reason"] for row in rows] == ["tool_use", "end_turn"]
    assert [row["path"] for row in rows] == ["fresh", "continued"]
    assert [row["input_tokens"] for row in rows] == [10, 10]
    # Tools, calls and results are part of the prompt too.
    question = len("Call it" + "f" + '{"type":"object","properties":{}}')
    answered = question + len("f" + "{}" + "42")
    assert [row["prompt_chars"] for row in rows] == [question, answered]


def test_an_answer_that_met_its_limit_is_a_success(books: Server) -> None:
    books.write_scenario([[{"say": "Half an ans"}, {"finish": "max_tokens"}]])

    row = row_of(books, ask(books))

    assert (row["outcome"], row["success"], row["stop_reason"]) == ("ok", 1, "max_tokens")


def api_error(status: int, word: str, **more: Json) -> list[Json]:
    return [{"api_error": {"status": status, "word": word, "text": "It says no."}, **more}]


FAILURES: dict[str, tuple[list[Json], str, int]] = {
    "overloaded": (api_error(529, "overloaded"), "overloaded", 529),
    "plan limit": (api_error(429, "rate_limit", resets_at=4_000_000_000),
                   "insufficient_quota", 429),
    "rate limit": (api_error(429, "rate_limit"), "rate_limit_exceeded", 429),
    "bad request": (api_error(400, "invalid_request"), "invalid_request_error", 400),
    "unknown model": (api_error(404, "model_not_found"), "model_not_found", 404),
    "death": ([{"exit": 1}], "upstream_failed", 502),
    "silence": ([{"finish": "end_turn"}], "empty_answer", 400),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_a_row_with_its_code(books: Server, name: str) -> None:
    steps, word, status = FAILURES[name]
    books.write_scenario([steps])

    reply = ask(books, name)

    row = row_of(books, reply)
    assert (reply.status, row["status"], row["outcome"]) == (status, status, word)
    assert (row["success"], row["stop_reason"]) == (0, None)
    # What the API refused costs nothing; else the prompt was read.
    refused = status in (429, 529)
    assert (row["counted"], row["input_tokens"] == 0) == (1 - refused, refused)


def test_a_lost_login_is_a_row(tmp_path: Path) -> None:
    with running_server(tmp_path, [api_error(401, "authentication_failed")]) as server:
        row = row_of(server, ask(server))

        assert (row["outcome"], row["status"]) == ("upstream_login_required", 401)


def test_an_answer_that_takes_too_long_is_a_row(tmp_path: Path) -> None:
    env = {"CLAUDE_TIMEOUT": "1000"}

    with running_server(tmp_path, [[{"say": "Half "}, {"hang": True}]], env=env) as server:
        row = row_of(server, ask(server))

        assert (row["outcome"], row["status"], row["counted"]) == ("timeout", 504, 1)


@both_ways
def test_a_failure_behind_the_first_token_says_what_was_used_so_far(
    books: Server, stream: bool
) -> None:
    books.write_scenario([[{"say": "x" * 400, "usage": SPENT}, {"exit": 1}]])

    row = row_of(books, ask(books, "Breaks", stream=stream))

    assert (row["outcome"], row["status"], row["response_chars"]) == ("upstream_failed", 502, 400)
    assert (row["input_tokens"], row["cache_read_tokens"]) == (21, 65)
    assert 80 <= row["output_tokens"] <= 200, "four characters are about a token"


@pytest.mark.parametrize("spoke", [False, True], ids=["before", "behind"])
def test_an_abandoned_answer_is_a_row(books: Server, spoke: bool) -> None:
    steps = [{"say": "x" * 400, "usage": SPENT}] if spoke else []
    books.write_scenario([[*steps, {"hang": True}]])
    count = len(books.queries())
    before = {row["request_id"] for row in usage(books, "limit=500")["recent"]}

    with RawConnection(books.port) as wire:
        wire.send(post(encoded(question("Leaves", stream=True))))
        asked_process(books, count + 1)
        if spoke:
            wire.hear(b"x" * 400)

    (row,) = eventually(lambda: [
        row for row in usage(books, "limit=3")["recent"] if row["request_id"] not in before])
    assert row["outcome"] == "abandoned"
    assert (row["status"], row["success"], row["counted"]) == (499, 0, 1)
    assert (row["input_tokens"], row["response_chars"]) == ((21, 400) if spoke else (2, 0))


def test_a_client_that_leaves_with_its_answer_complete_had_a_success(books: Server) -> None:
    # More than fits between server and client, so that the server still writes when it is over.
    books.write_scenario([[{"say": "x" * 12_000_000, "chunks": 4}]])
    with RawConnection(books.port) as wire:
        wire.send(post(encoded(question("Leaves late"))))
        last_of = eventually(lambda: [r for r in usage(books, "limit=1")["recent"]
                                      if r["response_chars"] == 12_000_000])

    assert last_of[0]["outcome"] == "ok"


def test_an_answer_that_was_told_live_is_a_row_before_its_end_is_told(books: Server) -> None:
    books.write_scenario([[{"say": "Hello."}]])

    with stream_chat(books, "Live") as stream:
        for _, data in stream:
            if data != "[DONE]" and data["choices"][0]["finish_reason"]:
                break
        row = row_of(books, stream)

    assert row["outcome"] == "ok"


REFUSED: dict[str, tuple[str, Json]] = {
    "no model of that name": (CHAT_PATH, question(model="gpt-9")),
    "a broken field": (CHAT_PATH, question(max_tokens="many")),
    "no JSON": (CHAT_PATH, "{"),
    "no messages": (MESSAGES.path, {"model": "sonnet"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_cannot_be_answered_is_no_row(books: Server, name: str) -> None:
    path, body = REFUSED[name]

    reply = books.call("POST", path, body)

    assert 400 <= reply.status < 500 and rows_of(books, reply) == []


def test_refusals_for_a_full_queue_are_no_rows_but_are_counted(tmp_path: Path) -> None:
    env = {**NO_IDLE, "CLAUDE_MAX_CONCURRENT": "1", "CLAUDE_MAX_QUEUE": "0"}

    with running_server(tmp_path, [[{"hang": True}]], env=env) as server:
        with RawConnection(server.port) as wire:
            wire.send(post(encoded(question())))
            eventually(lambda: running(server) == 1)
            refused = [ask(server) for _ in range(3)]
        eventually(lambda: running(server) == 0)

        assert [error_of(reply)["code"] for reply in refused] == ["rate_limit_exceeded"] * 3
        assert [rows_of(server, reply) for reply in refused] == [[], [], []]
        metrics = server.call("GET", "/metrics").text
        assert 'outcome="rate_limit_exceeded"} 3' in metrics
        assert "ocp_queue_refusals_total 3" in metrics


def test_refusals_for_a_quota_are_no_rows_but_are_counted(own: Server) -> None:
    key = new_key(own, name="frugal", quota={"daily": 1})["key"]

    replies = [ask_as(own, key) for _ in range(4)]

    assert [reply.status for reply in replies] == [200, 429, 429, 429]
    assert len(usage(own, "all=true", ADMIN_KEY)["recent"]) == 1
    assert 'outcome="quota_exceeded"} 3' in as_admin(own, "GET", "/metrics").text


# ---------------------------------------------------------------------------
# Whose rows, and which
# ---------------------------------------------------------------------------

def names(report: Json) -> list[str]:
    return [str(row["key_name"]) for row in report["recent"]]


def test_everybody_sees_their_own_rows_and_the_operator_all(own: Server) -> None:
    keys = {name: new_key(own, name=name)["key"] for name in ("laptop", "phone")}
    keys |= {"admin": ADMIN_KEY, "anonymous": ANONYMOUS_KEY}
    for number, key in enumerate(keys.values()):
        for _ in range(number + 1):
            ask_as(own, key)

    mine = {name: usage(own, key=key) for name, key in keys.items()}
    all_of_them = usage(own, "all=true", ADMIN_KEY)

    for number, (name, report) in enumerate(mine.items()):
        assert report["scope"] == {"self": name, "all": False}
        assert names(report) == [name] * (number + 1) and len(report["byKey"]) == 1
        assert report["totals"]["requests"] == number + 1
    assert all_of_them["scope"] == {"self": None, "all": True}
    assert all_of_them["totals"]["requests"] == 10
    assert {row["key_name"]: row["requests"] for row in all_of_them["byKey"]} == {
        "laptop": 1, "phone": 2, "admin": 3, "anonymous": 4}


@pytest.mark.parametrize("word", ["true", "1", "TRUE", "yes", "on"])
def test_a_device_that_asks_for_all_gets_its_own(own: Server, word: str) -> None:
    key = new_key(own, name="laptop")["key"]
    ask_as(own, ADMIN_KEY)
    ask_as(own, key)

    report = usage(own, f"all={word}", key)

    assert (report["scope"], names(report)) == ({"self": "laptop", "all": False}, ["laptop"])


def test_looking_at_everybodys_rows_leaves_a_line_in_the_log(own: Server) -> None:
    usage(own, "all=false", ADMIN_KEY)
    usage(own, "all=true", ADMIN_KEY)
    usage(own, "all=true", ANONYMOUS_KEY)

    entries = own.log_entries("admin_usage_full_scope")

    assert [(entry["by"], entry["peer"]) for entry in entries] == [("admin", "127.0.0.1")]


def test_a_key_that_was_renamed_is_one_line_under_its_new_name(own: Server) -> None:
    key = new_key(own, name="before")["key"]
    ask_as(own, key)
    as_admin(own, "PATCH", "/api/keys/before", {"name": "after"})
    ask_as(own, key)

    report = usage(own, "all=true", ADMIN_KEY)

    assert [(row["key_name"], row["requests"]) for row in report["byKey"]] == [("after", 2)]
    assert names(report) == ["after", "after"]
    assert usage(own, key=key)["totals"]["requests"] == 2


def test_a_key_that_was_revoked_keeps_its_line(own: Server) -> None:
    ask_as(own, new_key(own, name="gone")["key"])

    as_admin(own, "DELETE", "/api/keys/gone")

    report = usage(own, "all=true", ADMIN_KEY)
    assert [(row["key_name"], row["requests"]) for row in report["byKey"]] == [("gone", 1)]


def test_a_new_key_of_an_old_name_does_not_see_the_old_rows(own: Server) -> None:
    ask_as(own, new_key(own, name="again")["key"])
    as_admin(own, "DELETE", "/api/keys/again")

    report = usage(own, key=new_key(own, name="again")["key"])

    assert report["totals"]["requests"] == 0 and report["recent"] == []


def test_models_are_told_apart_and_aliases_are_not(own: Server) -> None:
    for model in ("sonnet", SONNET, "opus", "claude-haiku-4.5", "claude-haiku-4-5"):
        ask_as(own, ADMIN_KEY, model=model)

    report = usage(own, key=ADMIN_KEY)

    assert {row["model"]: row["requests"] for row in report["byModel"]} == {
        SONNET: 2, "claude-opus-5-5": 1, "claude-haiku-4-5-20251001": 2}


def test_a_span_of_time_begins_with_its_first_moment_and_ends_before_its_last(
    own: Server,
) -> None:
    at = []
    for _ in range(3):
        ask_as(own, ADMIN_KEY)
        at.append(usage(own, "limit=1", ADMIN_KEY)["recent"][0]["at"])
        # The next one is in another millisecond.
        eventually(lambda: time.time() > ocp.parse_time(at[-1]) + 0.002)

    def count(query: str) -> int:
        return int(usage(own, query, ADMIN_KEY)["totals"]["requests"])

    assert [count(f"since={each}") for each in at] == [3, 2, 1]
    assert [count(f"until={each}") for each in at] == [0, 1, 2]
    assert count(f"since={at[1]}&until={at[2]}") == 1
    assert count(f"since={at[2]}&until={at[1]}") == 0
    assert count("hours=1") == 3 and count("hours=0") == 0


def test_a_time_may_be_given_in_every_usual_form(own: Server) -> None:
    ask_as(own, ADMIN_KEY)
    forms = ("2020-01-01", "2020-01-01T00:00:00Z", "2020-01-01T00:00:00.5+02:00",
             "2020-01-01T00:00:00%2B0200", "1577836800", "1577836800.25")

    counts = [usage(own, f"since={form}", ADMIN_KEY)["totals"]["requests"] for form in forms]

    assert counts == [1] * len(forms)


def test_only_so_many_rows_are_shown_newest_first_and_all_are_added_up(own: Server) -> None:
    for number in range(4):
        ask_as(own, ADMIN_KEY, "x" * (number + 1))

    report = usage(own, "limit=2", ADMIN_KEY)

    assert [row["prompt_chars"] for row in report["recent"]] == [4, 3]
    assert report["totals"]["requests"] == 4
    assert usage(own, "limit=0", ADMIN_KEY)["recent"] == []


GARBAGE = {
    "limit": ["-1", "501", "x", "1.5", "%00", "99999999999999", "1e2", "%D9%A3"],
    "hours": ["-1", "9601", "x", "1.5", "%F0%9F%98%80", "null"],
    "since": ["yesterday", "2026-13-01", "2026-02-30", "2026-01-01T25:00:00Z", "NaN", "Infinity",
              "-1", "1e5", "2026-01-01T00:00:00+99:99Z", "%00", "9" * 30, "0x10"],
    "until": ["tomorrow", "2026-00-00", "[]", "2026-01-01T00:00", "now", "%D9%A1%D9%A2"],
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_in_the_query_is_refused_by_name(books: Server, name: str) -> None:
    # Times without a zone or seconds are fine.
    words = [word for word in GARBAGE[name] if word != "2026-01-01T00:00"]

    replies = [books.call("GET", f"/api/usage?{name}={word}") for word in words]

    assert [(word, reply.status) for word, reply in zip(words, replies)] == [
        (word, 400) for word in words]
    assert {error_of(reply)["param"] for reply in replies} == {name}


def test_times_at_the_ends_of_the_calendar_do_no_harm(books: Server) -> None:
    words = ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "0", "99999999999",
             "9999-12-31T23:59:59-23:59")

    found = [books.call("GET", f"/api/usage?{name}={word}&hours=9600").status
             for name in ("since", "until") for word in words]

    assert set(found) <= {200, 400}


# ---------------------------------------------------------------------------
# What rows add up to
# ---------------------------------------------------------------------------

NOON_S = 1_794_916_800.0
DAY_S = 86_400


def usage_row(at_s: float, **fields: Json) -> Any:
    """A row of an answer that was a success."""
    usual: dict[str, Json] = {
        "at_s": at_s, "request_id": "req_1", "key_id": None, "caller": "local", "model": SONNET,
        "dialect": "chat", "outcome": "ok", "status": 200, "counted": 1,
        "stop_reason": "end_turn", "stream": False, "warm": True, "path": "fresh",
        "prompt_chars": 11, "response_chars": 13, "input_tokens": 10, "output_tokens": 7,
        "cache_read_tokens": 5, "cache_write_tokens": 3, "first_token_ms": 100, "total_ms": 200,
    }
    return ocp.UsageRow(**{**usual, **fields})


def ledger_of(store: Any, rows: Iterable[Any], now_s: float = NOON_S) -> Any:
    """A ledger with these rows."""
    ledger = ocp.Ledger(store, FakeClock(now_s))
    for row in rows:
        ledger.record(row, ocp.Reservation(None))
    return ledger


def report_of(ledger: Any, since_s: float = 0, until_s: float = 2e9, limit: int = 50) -> Json:
    return ledger.report(since_s, until_s, limit, None)


def test_successes_errors_abandoned_and_cached_ones_are_counted_apart(store: Any) -> None:
    rows = [usage_row(NOON_S), usage_row(NOON_S, path="cached"), usage_row(NOON_S, path="shared"),
            usage_row(NOON_S, outcome="timeout", status=504),
            usage_row(NOON_S, outcome="timeout", path="shared", status=504),
            usage_row(NOON_S, outcome="abandoned", status=499)]

    totals = report_of(ledger_of(store, rows))["totals"]

    counts = ("requests", "successes", "errors", "abandoned", "cached")
    assert [totals[name] for name in counts] == [6, 3, 2, 1, 3]


def test_the_first_moment_of_a_span_is_in_it_and_its_last_is_not(store: Any) -> None:
    ledger = ledger_of(store, [usage_row(NOON_S), usage_row(NOON_S + 60)])

    spans = [(NOON_S, NOON_S + 60), (NOON_S, NOON_S + 60.001), (NOON_S + 0.001, NOON_S + 61)]

    assert [report_of(ledger, *span)["totals"]["requests"] for span in spans] == [1, 2, 1]


def test_without_rows_the_sums_are_zero_and_the_averages_unknown(store: Any) -> None:
    report = report_of(ledger_of(store, []))

    totals = report["totals"]
    assert [totals[name] for name in ("requests", "successes", "input_tokens")] == [0, 0, 0]
    assert [totals[name] for name in ("avg_elapsed_ms", "avg_first_token_ms", "last_request")] == [
        None, None, None]
    assert [report[name] for name in ("byKey", "byModel", "byPath", "timeline", "daily",
                                           "recent")] == [[], [], [], [], [], []]


def test_a_group_has_every_field_that_older_clients_know(store: Any) -> None:
    rows = [usage_row(NOON_S, total_ms=100, first_token_ms=50),
            usage_row(NOON_S + 1, total_ms=301, first_token_ms=None)]

    (group,) = report_of(ledger_of(store, rows))["byKey"]

    assert {name: group[name] for name in (
        "key_name", "total_prompt_chars", "total_response_chars", "total_elapsed_ms",
        "avg_elapsed_ms", "avg_first_token_ms", "first_request", "last_request")} == {
        "key_name": "local", "total_prompt_chars": 22, "total_response_chars": 26,
        "total_elapsed_ms": 401, "avg_elapsed_ms": 201, "avg_first_token_ms": 50,
        "first_request": "2026-11-17T12:00:00.000Z", "last_request": "2026-11-17T12:00:01.000Z"}


def test_the_share_read_from_the_prompt_cache_is_that_of_all_prompt_tokens(store: Any) -> None:
    cold = usage_row(NOON_S, path="rebuilt", input_tokens=10, cache_read_tokens=0,
                     cache_write_tokens=90)
    warm = cold._replace(path="continued", cache_read_tokens=270, cache_write_tokens=20)
    empty = usage_row(NOON_S, path=None, input_tokens=0, cache_read_tokens=0, cache_write_tokens=0)

    report = report_of(ledger_of(store, [cold, warm, empty]))

    assert report["totals"]["cache_read_share"] == 0.675
    assert {row["path"]: row["cache_read_share"] for row in report["byPath"]} == {
        "continued": 0.9, "none": None, "rebuilt": 0.0}


def test_percentiles_of_the_first_token_are_times_that_were_measured(store: Any) -> None:
    rows = [usage_row(NOON_S + number, model="quick", first_token_ms=number)
            for number in range(1, 201)]
    rows += [usage_row(NOON_S, model="slow", dialect="messages", first_token_ms=9000),
             usage_row(NOON_S, model="slow", dialect="messages", first_token_ms=None)]

    told = report_of(ledger_of(store, reversed(rows)))["firstToken"]

    assert told["all"] == {"answers": 201, "p50_ms": 101, "p90_ms": 181, "p99_ms": 199}
    assert told["byModel"] == [
        {"model": "quick", "answers": 200, "p50_ms": 100, "p90_ms": 180, "p99_ms": 198},
        {"model": "slow", "answers": 1, "p50_ms": 9000, "p90_ms": 9000, "p99_ms": 9000}]
    assert [row["dialect"] for row in told["byDialect"]] == [rows[0].dialect, "messages"]


def test_without_a_first_token_there_is_no_percentile(store: Any) -> None:
    told = report_of(ledger_of(store, [usage_row(NOON_S, first_token_ms=None)]))["firstToken"]

    assert told == {"all": {"answers": 0, "p50_ms": None, "p90_ms": None, "p99_ms": None},
                    "byModel": [], "byDialect": []}


@pytest.mark.parametrize("share,is_logged", [(0.0, True), (0.49, True), (0.5, False)])
def test_a_long_rebuilt_conversation_that_misses_the_prompt_cache_is_in_the_log(
    books: Server, share: float, is_logged: bool
) -> None:
    cached = round(10_000 * share)
    usage = {"input_tokens": 10_000 - cached, "cache_read_input_tokens": cached,
             "cache_creation_input_tokens": 0}
    books.write_scenario([[{"say": "Yes.", "usage": usage}]] * 2)
    before = len(books.log_entries("prompt_cache_missed"))
    # Only a conversation that claude has to get anew can miss; a first message has nothing there.
    ask(books, f"Is {share} enough?")
    history = [{"role": "system", "content": f"Be {share}."},
               {"role": "user", "content": f"Is {share} much?"},
               {"role": "assistant", "content": "No."}, {"role": "user", "content": "Sure?"}]

    reply = ask(books, messages=history)

    entries = books.log_entries("prompt_cache_missed")[before:]
    assert row_of(books, reply)["path"] == "rebuilt"
    assert [(entry["prompt_tokens"], entry["cached_tokens"]) for entry in entries] == [
        (10_000, cached)] * is_logged


def test_hours_are_in_utc_and_empty_ones_are_left_out(store: Any) -> None:
    rows = [usage_row(NOON_S + offset_s) for offset_s in (-0.001, 0, 3_599.999, 7_200)]

    with zone("Asia/Kolkata"):
        timeline = report_of(ledger_of(store, rows))["timeline"]

    assert [(entry["hour"], entry["requests"]) for entry in timeline] == [
        ("2026-11-17T11:00:00", 1), ("2026-11-17T12:00:00", 2), ("2026-11-17T14:00:00", 1)]


def at(text: str) -> float:
    return float(ocp.parse_time(text))


#: Zone, moments, and the days that they are on there.
DAYS = [
    ("UTC", ["2026-11-17T00:00:00Z", "2026-11-17T23:59:59.999Z", "2026-11-18T00:00:00Z"],
     {"2026-11-17": 2, "2026-11-18": 1}),
    ("Asia/Kolkata", ["2026-11-17T18:29:59Z", "2026-11-17T18:30:00Z"],
     {"2026-11-17": 1, "2026-11-18": 1}),
    ("America/New_York", ["2026-11-18T04:59:59Z", "2026-11-18T05:00:00Z"],
     {"2026-11-17": 1, "2026-11-18": 1}),
    # The day on which clocks go back has 25 hours, and the one on which they go on 23.
    ("Europe/Berlin", ["2026-10-24T22:00:00Z", "2026-10-25T22:59:59Z", "2026-10-25T23:00:00Z"],
     {"2026-10-25": 2, "2026-10-26": 1}),
    ("Europe/Berlin", ["2026-03-28T23:00:00Z", "2026-03-29T21:59:59Z", "2026-03-29T22:00:00Z"],
     {"2026-03-29": 2, "2026-03-30": 1}),
]


@pytest.mark.parametrize(("name", "moments", "wanted"), DAYS)
def test_days_are_those_of_the_machine(
    store: Any, name: str, moments: list[str], wanted: Json
) -> None:
    rows = [usage_row(at(text)) for text in moments]

    with zone(name):
        daily = report_of(ledger_of(store, rows))["daily"]

    assert {entry["day"]: entry["requests"] for entry in daily} == wanted


def test_every_way_of_adding_up_adds_up_to_the_same(store: Any) -> None:
    dice = random.Random(7)
    rows = [usage_row(
        NOON_S - dice.random() * 5 * DAY_S, model=dice.choice(["a", "b", "c"]),
        caller=dice.choice(["local", "admin", "anonymous"]),
        outcome=dice.choice(["ok", "ok", "timeout", "abandoned"]),
        path=dice.choice(["fresh", "cached", None]), input_tokens=dice.randrange(10_000),
        output_tokens=dice.randrange(10_000), cache_read_tokens=dice.randrange(10**12),
    ) for _ in range(300)]

    report = report_of(ledger_of(store, rows))

    for name in ("requests", "successes", "errors", "abandoned", "cached", "input_tokens",
                 "output_tokens", "cache_read_tokens", "cache_write_tokens"):
        sums = {sum(entry[name] for entry in report[part])
                for part in ("byKey", "byModel", "timeline", "daily", "series")}
        assert sums == {report["totals"][name]}, name
    assert report["totals"]["input_tokens"] == sum(row.input_tokens for row in rows)


def test_the_hours_and_days_come_in_order(store: Any) -> None:
    rows = [usage_row(NOON_S + offset * 3_600) for offset in (40, -3, 17, 0, -30)]

    report = report_of(ledger_of(store, rows))

    for part, name in (("timeline", "hour"), ("daily", "day")):
        found = [entry[name] for entry in report[part]]
        assert found == sorted(found) and len(found) > 2


def test_old_rows_are_deleted_and_younger_ones_are_not(store: Any) -> None:
    ledger = ledger_of(store, [usage_row(NOON_S - 30 * DAY_S - 1), usage_row(NOON_S - 30 * DAY_S),
                               usage_row(NOON_S)])

    deleted = [ledger.prune(30), ledger.prune(30)]

    assert deleted == [1, 0]
    assert report_of(ledger)["totals"]["requests"] == 2


def test_a_row_that_grew_old_goes_with_the_time(store: Any) -> None:
    clock = FakeClock(NOON_S)
    ledger = ocp.Ledger(store, clock)
    ledger.record(usage_row(NOON_S), ocp.Reservation(None))

    clock.advance(40 * DAY_S)
    before = ledger.prune(40)
    clock.advance(1)

    assert (before, ledger.prune(40)) == (0, 1)


def test_a_server_deletes_old_rows_when_it_starts(tmp_path: Path) -> None:
    home = tmp_path / "ocp"
    home.mkdir(mode=0o700)
    with contextlib.closing(ocp.Store(str(home / "ocp.db"))) as store:
        now_s = time.time()
        ledger_of(store, [usage_row(now_s - days * DAY_S, request_id=f"req_{days}")
                          for days in (1, 39, 41, 400)])

    with running_server(tmp_path, env={"OCP_USAGE_DAYS": "40"}) as server:
        def left() -> list[str]:
            rows = usage(server, "since=2020-01-01")["recent"]
            return [row["request_id"] for row in rows]

        assert eventually(lambda: left() == ["req_39", "req_1"] and left()) == ["req_39", "req_1"]


# ---------------------------------------------------------------------------
# Without a disk
# ---------------------------------------------------------------------------

@pytest.fixture(params=DISKS, ids=lambda kind: str(kind.__name__))
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """What the server's state is kept on, in tmp_path / "server" / "ocp"."""
    (tmp_path / "server").mkdir()
    found = request.param(tmp_path / "server" / "ocp")
    yield found
    found.close()


def heard(server: Server, name: str) -> list[Json]:
    """The log's entries of this name, as the server still tells them."""
    entries = as_admin(server, "GET", "/logs?n=1000").json()["entries"]
    return [entry for entry in entries if entry["event"] == name]


def test_on_a_full_disk_answers_go_on_and_the_log_says_so(disk: Any, tmp_path: Path) -> None:
    with running_server(tmp_path / "server", env=MULTI) as server:
        ask_as(server, ADMIN_KEY)
        disk.fill(server)

        replies = in_parallel([lambda: ask_as(server, ADMIN_KEY, stream=True)] * 6)

        assert [reply.status for reply in replies] == [200] * 6
        problems = heard(server, "usage_not_kept")
        assert len(problems) == 6
        assert {entry["level"] for entry in problems} == {"error"}
        assert "usage_not_kept" in server.output


def test_when_there_is_room_again_no_row_is_missing(disk: Any, tmp_path: Path) -> None:
    with running_server(tmp_path / "server", env=MULTI) as server:
        asked = [ask_as(server, ADMIN_KEY)]
        disk.fill(server)
        asked += [ask_as(server, ADMIN_KEY) for _ in range(3)]

        disk.free(server)
        asked += [ask_as(server, ADMIN_KEY) for _ in range(3)]

        rows = usage(server, key=ADMIN_KEY)["recent"]
        assert [row["request_id"] for row in reversed(rows)] == [
            reply.headers["X-Request-Id"] for reply in asked]


def test_a_full_disk_lifts_no_quota_and_changes_no_setting(disk: Any, tmp_path: Path) -> None:
    with running_server(tmp_path / "server", env=MULTI) as server:
        key = new_key(server, name="frugal", quota={"daily": 2})["key"]
        disk.fill(server)

        statuses = [ask_as(server, key).status for _ in range(3)]
        changed = as_admin(server, "PATCH", "/settings", {"timeout": 5_000})
        made = as_admin(server, "POST", "/api/keys", {"name": "another"})

        assert statuses == [200, 200, 429]
        assert changed.status == 507
        assert as_admin(server, "GET", "/settings").json()["timeout"]["value"] == 600_000
        assert (made.status, error_of(made)["code"]) == (507, "disk_full")
        assert "Nothing was changed" in error_of(made)["message"]


def test_a_home_that_cannot_be_made_is_kept_in_memory(tmp_path: Path) -> None:
    # A file where a folder should be stops the superuser as well.
    (tmp_path / "file").write_text("")
    env = {**MULTI, "OCP_HOME": str(tmp_path / "file" / "ocp")}

    with running_server(tmp_path / "server", env=env) as server:
        key = new_key(server, name="laptop")["key"]
        replies = [ask_as(server, key) for _ in range(2)]

        assert [reply.status for reply in replies] == [200, 200]
        assert usage(server, key=key)["totals"]["requests"] == 2
        assert "OCP_HOME" in heard(server, "home_not_writable")[0]["help"]
        assert "home_not_writable" in server.output


def test_where_nothing_can_be_printed_the_server_starts_all_the_same(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.prepare()

    def started() -> str:
        entries = read_json_lines(place.ocp_home / "logs" / "ocp.log")
        return next((each["url"] for each in entries if each["event"] == "server_started"), "")

    with open("/dev/full", "wb") as full, subprocess.Popen(
            [sys.executable, str(REPO / "ocp_server.py")], env=place.env({}, ()),
            stdin=subprocess.DEVNULL, stdout=full, stderr=full) as process:
        try:
            port = int(eventually(started).rpartition(":")[2])
            assert http_call(port, "GET", "/health").status == 200
        finally:
            process.terminate()


def told_about_the_database(server: Server) -> str:
    (entry,) = heard(server, "database_unusable")
    assert entry["level"] == "error" and "database_unusable" in server.output
    return str(entry["help"])


def test_a_damaged_database_is_told_and_does_not_stop_the_start(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        path = server.ocp_home / "ocp.db"
    # Its first page, which says what it is, is as it was.
    whole = path.read_bytes()
    path.write_bytes(whole[:4_096] + b"\xa5" * (len(whole) - 4_096))

    with running_server(tmp_path, env=MULTI) as server:
        key = new_key(server, name="laptop")["key"]

        assert ask_as(server, key).status == 200
        assert "move ocp.db away" in told_about_the_database(server)


@pytest.mark.exhaustive
def test_nobody_is_told_to_move_a_database_away_that_is_only_locked(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        key = new_key(server, name="laptop")["key"]
    with contextlib.closing(sqlite3.connect(server.ocp_home / "ocp.db")) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")

        with running_server(tmp_path, env=MULTI) as server:
            assert ask_as(server, key).status == 200
            assert "start again" in told_about_the_database(server)


if may_mount():
    def test_with_a_read_only_home_devices_go_on_with_their_keys(tmp_path: Path) -> None:
        (tmp_path / "server").mkdir()
        disk = SmallDisk(tmp_path / "server" / "ocp")
        with contextlib.closing(disk):
            with running_server(tmp_path / "server", env=MULTI) as server:
                key = new_key(server, name="laptop")["key"]
            disk.lock()

            with running_server(tmp_path / "server", env=MULTI) as server:
                statuses = [ask_as(server, key).status, ask_as(server, key + "x").status]
                told_so = heard(server, "home_not_writable")

        assert statuses == [200, 401]
        assert "OCP_HOME" in told_so[0]["help"]


# ---------------------------------------------------------------------------
# Without a warning
# ---------------------------------------------------------------------------

KILLS = by_depth(2, 8, 50)


class Clients:
    """Clients that ask without a pause, until there is nobody to ask, and note what they got."""

    def __init__(self) -> None:
        # Appending to a list takes no lock.
        self.finished: list[str] = []

    def ask_until_the_end(self, port: int) -> None:
        """Four kinds of requests at once: whole, streamed, twice in one, and cached ones."""
        bodies = [question("whole"), question("stream", stream=True), question("two", n=2),
                  {**question("cached"), "temperature": 0}]
        in_parallel([lambda body=body: self._ask(port, body)  # type: ignore[misc]
                 for body in bodies])

    def _ask(self, port: int, body: Json) -> None:
        numbers = itertools.count()
        # The cached one is asked word for word again and again.
        said = body["messages"][0]["content"]
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                if said != "cached":
                    text = f"{said} {next(numbers)}"
                    body = {**body, "messages": [{"role": "user", "content": text}]}
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                with contextlib.closing(connection):
                    connection.request("POST", CHAT_PATH, encoded(body))
                    reply = connection.getresponse()
                    content = reply.read()
                assert reply.status == 200, content
                if not body.get("stream") or b"[DONE]" in content:
                    self.finished.append(str(reply.headers["X-Request-Id"]))


# A reply that breaks off leaves its socket to the collector.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_killing_the_server_in_the_middle_loses_no_row_of_an_answer(tmp_path: Path) -> None:
    claude = ShellClaude(tmp_path)
    claude.play(lines_of_an_answer("Hello ", "there."))
    env = {**NO_IDLE, "CLAUDE_CACHE_TTL": "3600000"}
    dice, clients, database = random.Random(9), Clients(), tmp_path / "server" / "ocp" / "ocp.db"

    for number in range(KILLS):
        with running_server(tmp_path / "server", claude=claude.program, env=env) as server:
            asking = threading.Thread(target=clients.ask_until_the_end, args=(server.port,))
            asking.start()
            before = len(clients.finished)
            eventually(lambda: len(clients.finished) > before + 4)  # noqa: B023 - at once
            time.sleep(dice.random() * 0.1)
            server.kill()
            asking.join()
        with contextlib.closing(sqlite3.connect(database)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)], number
            kept = [row[0] for row in connection.execute("SELECT request_id FROM usage")]
        assert set(clients.finished) - set(kept) == set(), number
        assert len(set(kept)) == len(kept), number

    assert len(clients.finished) > 4 * KILLS
