"""What a model refuses, through the real claude: to stop thinking, and to be forced to a call."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import stub_api as stub
from conversation import WHOLE_AND_STREAMED, Conversation, path_of
from depth import rest
from dialects import (
    CHAT,
    MESSAGES,
    RESPONSES,
    TOOL_DIALECTS,
    Dialect,
    ForcedTool,
    Result,
    Tool,
    dialect_name,
)
from rig import ANSWER_S, Claude, Rig, running_rig

Json = Any

RIG_SETTINGS = {
    "CLAUDE_MAX_RETRIES": "1"}
#: One that only knows older models leaves nothing to see here.
FIRST_WITH_5_5 = (2, 1, 293)
ALWAYS, BETWEEN, SWITCHED, OLDER = (
    "claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5", "claude-opus-4-8")
CLOCK, WEATHER = Tool("clock"), Tool("weather")
NOON, PARIS = ("clock", {}), ("weather", {"city": "Paris"})
HEADER = "X-OCP-Tool-Choice"


def version_of(claude: Claude) -> tuple[int, ...]:
    return tuple(map(int, claude.version.split(".")))


@pytest.fixture
def new_rig(rig: Rig) -> Rig:
    """A rig whose claude knows the models."""
    if version_of(rig.claude) < FIRST_WITH_5_5:
        pytest.skip("not for this claude: it does not know the models")
    return rig


@pytest.fixture
def own_rig(claude: Claude, tmp_path: Path) -> Iterator[Rig]:
    """A rig that has learned nothing."""
    with running_rig(tmp_path, claude, **RIG_SETTINGS) as found:
        found.begin()
        yield found


# ---------------------------------------------------------------------------
# Thinking off
# ---------------------------------------------------------------------------

#: How a client asks for no thinking, in which dialect, and what the server names as ignored where
#: that cannot be had.
WISHES: dict[str, tuple[Dialect, dict[str, Json], str | None]] = {
    "effort none": (CHAT, {"reasoning_effort": "none"}, "reasoning_effort"),
    "limit": (CHAT, {"max_tokens": 100}, None),
    "disabled": (MESSAGES, {"thinking": {"type": "disabled"}}, "thinking"),
    "left out": (MESSAGES, {"thinking": None, "max_tokens": 100}, None),
    "responses": (RESPONSES, {"reasoning": {"effort": "none"}}, "reasoning.effort"),
}
#: What the API gets: thinking.type and the effort.
SENT = {
    ALWAYS: ("adaptive", "low"), "claude-fable-5-2": ("adaptive", "low"),
    BETWEEN: ("between_tools", "medium"), SWITCHED: ("disabled", "medium"),
    OLDER: ("disabled", "high"),
}


@pytest.mark.parametrize(("model", "way"), [
    (ALWAYS, "effort none"), (BETWEEN, "left out"), (SWITCHED, "limit"), (BETWEEN, "responses"),
    *rest(*((model, way) for model in SENT for way in WISHES))])
def test_thinking_is_switched_off_as_far_as_the_model_lets(
    new_rig: Rig, model: str, way: str
) -> None:
    dialect, fields, named = WISHES[way]
    body = dialect.body("Hi there?", model=model, **fields)

    reply = new_rig.server.call("POST", dialect.path, body, timeout_s=ANSWER_S)

    assert reply.status == 200, reply.text
    sent = new_rig.only_body()
    assert (sent["thinking"]["type"], sent["output_config"]["effort"]) == SENT[model]
    ignored = named if SENT[model][0] == "adaptive" else None
    assert reply.headers["X-OCP-Ignored-Params"] == ignored


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", [BETWEEN, SWITCHED])
def test_an_effort_is_lowered_where_thinking_is_off(new_rig: Rig, model: str) -> None:
    body = MESSAGES.body(
        "Hi there?", model=model, thinking={"type": "disabled"}, output_config={"effort": "max"})

    assert new_rig.server.call("POST", MESSAGES.path, body, timeout_s=ANSWER_S).status == 200

    sent = new_rig.only_body()
    assert (sent["thinking"]["type"], sent["output_config"]["effort"]) == (SENT[model][0], "high")


FORCING_REFUSED = stub.error(
    400, "tool_choice forces tool use is not compatible with this model.")
DISABLED_REFUSED = stub.error(400, (
    '"thinking.type.disabled" is not supported for this model. Use "thinking.type.adaptive" and '
    '"output_config.effort" to control thinking behavior.'))


@pytest.mark.exhaustive
def test_a_model_that_refuses_to_stop_thinking_is_remembered(own_rig: Rig) -> None:
    is_new = version_of(own_rig.claude) >= FIRST_WITH_5_5
    model = SWITCHED if is_new else OLDER
    refusals = 0

    def answer(body: Mapping[str, Json]) -> stub.Reply:
        nonlocal refusals
        is_off = body["thinking"]["type"] == "disabled"
        refusals += is_off
        return DISABLED_REFUSED if is_off else stub.text("Hello.")

    own_rig.stub.default = answer
    first = own_rig.ask("One?", model, reasoning_effort="none")
    refused = refusals
    second = own_rig.ask("Two?", model, reasoning_effort="none")

    assert (first.text, second.text) == ("Hello.", "Hello.")
    assert refused >= 1 and refusals == refused
    assert own_rig.last_body()["output_config"]["effort"] == "low"
    assert second.headers["X-OCP-Ignored-Params"] == "reasoning_effort"
    (entry,) = own_rig.server.log_entries("model_refuses")
    assert (entry["model"], entry["refused"]) == (model, "thinking_off")


# ---------------------------------------------------------------------------
# Forced calls
# ---------------------------------------------------------------------------

def asked(
    rig: Rig, dialect: Dialect, streams: bool, choice: str | ForcedTool, model: str = ALWAYS
) -> Conversation:
    counts = {"stream_options": {"include_usage": True}} if streams and dialect is CHAT else {}
    return Conversation(
        rig, dialect, (CLOCK, WEATHER), streams=streams, model=model,
        tool_choice=dialect.choice(choice), **counts)


@pytest.mark.exhaustive
@pytest.mark.parametrize("choice", ["required", ForcedTool("clock")], ids=str)
@pytest.mark.parametrize("dialect", [CHAT, *rest(MESSAGES, RESPONSES)], ids=dialect_name)
@WHOLE_AND_STREAMED
def test_a_call_that_cannot_be_forced_is_asked_for_in_one_request(
    new_rig: Rig, dialect: Dialect, streams: bool, choice: str | ForcedTool
) -> None:
    new_rig.script(stub.tool_calls([NOON], text="Let me see."))

    said = asked(new_rig, dialect, streams, choice).ask("What time is it?")

    assert (said.call.name, said.finish, said.text) == ("clock", "tool_calls", "Let me see.")
    assert said.headers[HEADER] is None
    sent = new_rig.only_body()
    assert sent.get("tool_choice") is None and sent["thinking"]["type"] == "adaptive"
    wanted = "Call one of the tools" if choice == "required" else "Call the tool clock"
    assert wanted in str(sent["system"])


@pytest.mark.parametrize("dialect", TOOL_DIALECTS, ids=dialect_name)
@WHOLE_AND_STREAMED
def test_an_answer_without_the_call_is_asked_for_again(
    new_rig: Rig, dialect: Dialect, streams: bool
) -> None:
    new_rig.script(
        stub.text("It is noon.", input_tokens=100), stub.tool_calls([NOON], input_tokens=200),
        stub.tool_calls([PARIS]))
    talk = asked(new_rig, dialect, streams, "required", BETWEEN)

    said = talk.ask("What time is it?")

    assert (said.call.name, said.finish, said.text) == ("clock", "tool_calls", "")
    assert said.headers[HEADER] is None
    assert said.prompt_tokens >= 300
    first, second = new_rig.bodies()
    reminder = "Your answer must begin with a tool call."
    assert reminder in str(second["messages"]) and reminder not in str(first["messages"])
    assert "It is noon." not in str(second["messages"])
    # The process that called the tool goes on.
    after = talk.send_results([(said.call.id, Result("12:00"))])
    assert (path_of(new_rig, after), after.call.name) == ("continued", "weather")
    assert len(new_rig.bodies()) == 3
    (entry,) = [each for each in new_rig.server.log_entries("call_missing")
                if each["request_id"] == said.request_id]
    assert entry["model"] == BETWEEN


@pytest.mark.exhaustive
@pytest.mark.parametrize("dialect", [CHAT, *rest(MESSAGES, RESPONSES)], ids=dialect_name)
@WHOLE_AND_STREAMED
def test_after_two_answers_without_the_call_the_client_gets_the_second(
    new_rig: Rig, dialect: Dialect, streams: bool
) -> None:
    new_rig.script(stub.text("It is noon."), stub.tool_calls([PARIS], text="It is late."))

    said = asked(new_rig, dialect, streams, ForcedTool("clock")).ask("What time is it?")

    assert (said.text, said.call.name, said.finish) == ("It is late.", "weather", "tool_calls")
    assert said.headers[HEADER] == "not-honoured"
    assert len(new_rig.bodies()) == 2


@pytest.mark.exhaustive
@WHOLE_AND_STREAMED
def test_an_answer_that_reached_its_limit_is_not_asked_for_again(
    new_rig: Rig, streams: bool
) -> None:
    new_rig.script(stub.text("It is", stop_reason="max_tokens"))

    said = asked(new_rig, CHAT, streams, "required").ask("What time is it?")

    assert (said.text, said.finish, said.headers[HEADER]) == ("It is", "length", "not-honoured")
    assert len(new_rig.bodies()) == 1


def test_a_model_that_lets_no_call_be_forced_is_remembered(own_rig: Rig) -> None:
    refusals = 0

    def answer(body: Mapping[str, Json]) -> stub.Reply:
        nonlocal refusals
        is_forced = body.get("tool_choice", {}).get("type") in ("any", "tool")
        refusals += is_forced
        return FORCING_REFUSED if is_forced else stub.tool_calls([NOON])

    own_rig.stub.default = answer
    first = asked(own_rig, CHAT, True, "required", OLDER).ask("What time is it?")
    refused = refusals
    second = asked(own_rig, MESSAGES, False, ForcedTool("clock"), OLDER).ask("And now?")

    assert (first.call.name, second.call.name) == ("clock", "clock")
    assert refused >= 1 and refusals == refused
    assert [each.headers[HEADER] for each in (first, second)] == [None, None]
    (entry,) = own_rig.server.log_entries("model_refuses")
    assert (entry["model"], entry["refused"]) == (OLDER, "forced_tools")


@pytest.mark.exhaustive
def test_another_bad_request_teaches_nothing(own_rig: Rig) -> None:
    own_rig.script(then=stub.error(400, "tools.0.custom.name: String should match pattern"))

    said = asked(own_rig, CHAT, False, "required", OLDER).ask("What time is it?")

    assert (said.status, own_rig.server.log_entries("model_refuses")) == (400, [])
