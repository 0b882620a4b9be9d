"""Models that always think, and models whose calls cannot be forced."""
from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chat import both_ways, encoded
from dialects import (
    CHAT,
    MESSAGES,
    RESPONSES,
    TOOL_DIALECTS,
    Answer,
    Dialect,
    ForcedTool,
    Tool,
    dialect_name,
)
from raw_http import RawConnection, post
from server import Server, running_server
from waiting import eventually

Json = Any

#: A call of it cannot be forced, and it always thinks.
MODEL = "claude-opus-5-5"
#: The API documents that it takes both.
HAIKU = "claude-haiku-5-5"
#: The default model, for which a process waits.
SPARE_MODEL = "claude-sonnet-5-5"
TOOLS = (Tool("clock"), Tool("weather"))
HEADER = "X-OCP-Tool-Choice"
CALL = [{"tool": {"name": "clock", "input": {}}}, {"finish": "tool_use"}]
WORDS = [{"say": "It is noon."}, {"finish": "end_turn"}]
BEAT = b": keepalive"


@pytest.fixture
def server(shared_server: Server) -> Server:
    """A server with default settings, to be given a script."""
    return shared_server


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server that has learned nothing."""
    with running_server(tmp_path, env={"CLAUDE_HEARTBEAT_INTERVAL": "50"}) as running:
        yield running


def body_of(dialect: Dialect, **fields: Json) -> dict[str, Json]:
    choice = dialect.choice(fields.pop("choice", "required"))
    return dialect.body(
        "What time is it?",
        **{"model": MODEL, "tools": dialect.tools(TOOLS), "tool_choice": choice, **fields})


def asked(server: Server, dialect: Dialect = CHAT, **fields: Json) -> Answer:
    body = body_of(dialect, **fields)
    return dialect.read_answer(server.call("POST", dialect.path, body))


def refusal(text: str) -> list[dict[str, Json]]:
    word = "invalid_request"
    return [{"api_error": {"status": 400, "word": word, "text": f"API Error: 400 {text}"}}]


FORCING_REFUSED = refusal('tool_choice: type "tool" and "any" are not supported for this model.')
DISABLED_REFUSED = refusal('"thinking.type.disabled" is not supported for this model.')


# ---------------------------------------------------------------------------
# Calls that cannot be forced
# ---------------------------------------------------------------------------

@both_ways
@pytest.mark.parametrize("dialect", TOOL_DIALECTS, ids=dialect_name)
def test_the_model_is_told_to_call_and_the_answer_comes_as_it_is(
    server: Server, dialect: Dialect, stream: bool
) -> None:
    server.write_scenario([[{"say": "Let me see."}, *CALL]], shared=True)
    before = len(server.queries())

    answer = asked(server, dialect, stream=stream, choice=ForcedTool("clock"))

    assert (answer.text, answer.call.name, answer.finish) == ("Let me see.", "clock", "tool_calls")
    assert answer.headers[HEADER] is None
    (query,) = server.queries()[before:]
    assert "Call the tool clock before anything else" in str(query["system"])
    assert "tool_choice" not in json.dumps(query["settings"])


@both_ways
@pytest.mark.parametrize("dialect", TOOL_DIALECTS, ids=dialect_name)
def test_an_answer_without_a_call_is_replaced(
    server: Server, dialect: Dialect, stream: bool
) -> None:
    server.write_scenario([WORDS, CALL], shared=True)
    before = len(server.queries())

    answer = asked(server, dialect, stream=stream)

    assert (answer.text, answer.call.name, answer.finish) == ("", "clock", "tool_calls")
    assert answer.headers[HEADER] is None
    # Both requests count: 18 and 7 tokens each.
    assert answer.prompt_tokens == 36
    first, second = server.queries()[before:]
    assert first["pid"] != second["pid"]
    assert len(str(second["messages"])) > len(str(first["messages"]))
    row = usage_of(server, answer)
    assert (row["input_tokens"], row["cache_read_tokens"], row["output_tokens"]) == (20, 10, 14)
    assert (row["counted"], row["outcome"]) == (1, "ok")


def usage_of(server: Server, answer: Answer) -> dict[str, Json]:
    def row() -> dict[str, Json]:
        rows = server.call("GET", "/api/usage?limit=500").json()["recent"]
        (found,) = [each for each in rows if each["request_id"] == answer.request_id]
        return dict(found)

    return eventually(row)


@pytest.mark.few_cases
@both_ways
@pytest.mark.parametrize("dialect", TOOL_DIALECTS, ids=dialect_name)
@pytest.mark.parametrize("last", [WORDS, [{"tool": {"name": "weather"}}, {"finish": "tool_use"}]])
def test_the_second_answer_is_the_last(
    server: Server, dialect: Dialect, stream: bool, last: list[Json]
) -> None:
    server.write_scenario([[{"say": "No."}], last, CALL], shared=True)
    before = len(server.queries())

    answer = asked(server, dialect, stream=stream, choice=ForcedTool("clock"))

    assert [answer.text, *(call.name for call in answer.calls)] == (
        ["It is noon."] if last is WORDS else ["", "weather"])
    assert answer.headers[HEADER] == "not-honoured"
    assert len(server.queries()) == before + 2


@both_ways
def test_where_no_answer_is_wanted_no_call_is_missing(server: Server, stream: bool) -> None:
    server.write_scenario([WORDS], shared=True)
    before = len(server.queries())

    answer = asked(server, MESSAGES, stream=stream, max_tokens=0)

    assert (answer.text, answer.calls, answer.headers[HEADER]) == ("", [], None)
    assert len(server.queries()) == before + 1


def test_an_answer_that_fits_a_schema_is_no_missing_call(server: Server) -> None:
    answers = {"tool": {"name": "StructuredOutput", "input": {"a": "b"}}}
    server.write_scenario([[answers]], shared=True)
    before = len(server.queries())
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}

    answer = asked(server, **CHAT.schema_fields(schema))

    assert json.loads(answer.text) == {"a": "b"}
    assert (answer.headers[HEADER], len(server.queries())) == (None, before + 1)


def test_words_before_the_call_are_held_back_while_heartbeats_go_out(
    own_server: Server, tmp_path: Path
) -> None:
    doors = [tmp_path / "called", tmp_path / "told"]
    first, second = ({"wait_for": str(door)} for door in doors)
    words = [step for _ in range(200) for step in ({"say": "word "}, {"sleep_ms": 2})]
    own_server.write_scenario([[*words, first, *CALL[:1], second, *CALL[1:]]], shared=True)

    with RawConnection(own_server.port) as wire:
        wire.send(post(encoded(body_of(CHAT, stream=True)), version="HTTP/1.0"))
        wire.hear(BEAT, 4)
        assert b"word" not in wire.said
        doors[0].touch()
        wire.hear(b"word")
        doors[1].touch()
        wire.hear(b"[DONE]")


@both_ways
def test_a_process_that_dies_before_the_call_is_replaced(server: Server, stream: bool) -> None:
    server.write_scenario(
        [[{"say": "Let me"}, {"kill": signal.SIGKILL}], CALL, CALL], shared=True)
    # A process that was idle is replaced; one that was started for the request is not.
    eventually(lambda: server.call("GET", "/health").json()["spares"].get(SPARE_MODEL))

    answer = asked(server, model=SPARE_MODEL, stream=stream)

    assert (answer.text, answer.call.name) == ("", "clock")


# ---------------------------------------------------------------------------
# What the API refuses is remembered
# ---------------------------------------------------------------------------

@both_ways
def test_a_refusal_of_forced_calls_is_remembered(own_server: Server, stream: bool) -> None:
    own_server.write_scenario([FORCING_REFUSED, CALL], shared=True)

    first = asked(own_server, model=HAIKU, stream=stream)
    second = asked(own_server, MESSAGES, model=HAIKU, stream=stream)

    assert (first.call.name, second.call.name) == ("clock", "clock")
    forced = ["tool_choice" in json.dumps(each["settings"]) for each in own_server.queries()]
    assert forced == [True, False, False]
    (entry,) = own_server.log_entries("model_refuses")
    assert (entry["level"], entry["model"], entry["refused"]) == ("warn", HAIKU, "forced_tools")


@both_ways
def test_a_refusal_to_stop_thinking_is_remembered(own_server: Server, stream: bool) -> None:
    own_server.write_scenario([DISABLED_REFUSED, WORDS], shared=True)
    body = CHAT.body("Hi", model=HAIKU, stream=stream, reasoning_effort="none")

    answers = [CHAT.read_answer(own_server.call("POST", CHAT.path, body)) for _ in range(2)]

    assert [answer.text for answer in answers] == ["It is noon."] * 2
    off, *later = [each["settings"] for each in own_server.queries()]
    assert json.loads(off["env"]["CLAUDE_CODE_EXTRA_BODY"]) == {"thinking": {"type": "disabled"}}
    assert [each["effortLevel"] for each in later] == ["low", "low"]
    assert "thinking" not in json.dumps(later)
    assert [each["thinking"] for each in own_server.queries()] == [0, None, None]
    assert answers[1].headers["X-OCP-Ignored-Params"] == "reasoning_effort"


@pytest.mark.parametrize("text", [
    "messages.1.content.0: Invalid `signature` in `thinking` block",
    "output_config.effort 'max' is not supported when thinking is disabled on this model.",
    "tools.0.custom.name: Field required",
])
def test_another_refusal_teaches_nothing(own_server: Server, text: str) -> None:
    own_server.write_scenario([refusal(text), WORDS], shared=True)

    reply = own_server.call("POST", CHAT.path, CHAT.body("Hi", reasoning_effort="none"))

    assert (reply.status, len(own_server.queries())) == (400, 1)


def test_a_second_refusal_reaches_the_client(own_server: Server) -> None:
    own_server.write_scenario([DISABLED_REFUSED], shared=True)

    reply = own_server.call("POST", CHAT.path, CHAT.body("Hi", reasoning_effort="none"))

    assert (reply.status, len(own_server.queries())) == (400, 2)


@pytest.mark.parametrize(
    ("dialect", "fields", "named"),
    [
        (CHAT, {"reasoning_effort": "none"}, "reasoning_effort"),
        (CHAT, {"thinking": {"type": "disabled"}}, "thinking.type"),
        (CHAT, {"reasoning": {"enabled": False}}, "reasoning.enabled"),
        (CHAT, {"max_tokens": 100}, None),
        (MESSAGES, {"thinking": {"type": "disabled"}}, "thinking"),
        (MESSAGES, {"thinking": None}, None),
        (RESPONSES, {"reasoning": {"effort": "none"}}, "reasoning.effort"),
    ],
)
def test_a_model_that_always_thinks_does_so_at_the_lowest_effort(
    server: Server, dialect: Dialect, fields: dict[str, Json], named: str | None
) -> None:
    server.write_scenario([WORDS])

    reply = server.call("POST", dialect.path, dialect.body("Hi", model=MODEL, **fields))

    query = server.queries()[-1]
    assert (query["settings"]["effortLevel"], query["thinking"]) == ("low", None)
    assert reply.headers["X-OCP-Ignored-Params"] == named
