"""Forced tool calls with the SDKs on a model that refuses them, over the real claude.

The API answers 400 to a request that forces a call of this model. So a test here fails as soon as
the server passes the choice on as it is.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

import stub_api as stub
from depth import rest
from rig import ANSWER_S, Rig, each_claude
from waiting import eventually

openai = pytest.importorskip("openai", reason="the openai package is not installed")
anthropic = pytest.importorskip("anthropic", reason="the anthropic package is not installed")

Json = Any

pytestmark = pytest.mark.parametrize("claude", each_claude()[-1:], indirect=True)

#: An alias, as users write it, and what it stands for.
MODEL, MODEL_ID = "sonnet", "claude-sonnet-5-5"
QUESTION = "How warm is it in Rome?"
ROME = ("weather", {"city": "Rome"})
SCHEMA: Json = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION: Json = {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}
TOOL: Json = {"name": "weather", "description": "Tells it.", "input_schema": SCHEMA}
HEADER = "X-OCP-Tool-Choice"


@pytest.fixture
def openai_client(rig: Rig) -> Iterator[Any]:
    with openai.OpenAI(
        api_key="any", base_url=f"{rig.server.url}/v1", timeout=ANSWER_S, max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as found:
        yield found


@pytest.fixture
def anthropic_client(rig: Rig) -> Iterator[Any]:
    with anthropic.Anthropic(
        api_key="any", base_url=rig.server.url, timeout=ANSWER_S, max_retries=0,
        http_client=anthropic.DefaultHttpxClient(trust_env=False),
    ) as found:
        yield found


# ---------------------------------------------------------------------------
# The ways to ask
# ---------------------------------------------------------------------------

class Got(NamedTuple):
    """What an SDK makes of an answer."""
    text: str
    #: Name and input of each call.
    calls: list[tuple[str, Json]]
    #: What the server says of the choice.
    note: str | None


class Way(NamedTuple):
    """A method of an SDK, and how its API writes "any tool" and "this tool"."""
    name: str
    #: Takes a client, the choice, and whether to stream.
    ask: Callable[[Any, Json, bool], Got]
    any_tool: Json
    this_tool: Json


def by_chat(client: Any, choice: Json, streams: bool) -> Got:
    answered = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], stream=streams,
        tools=[{"type": "function", "function": FUNCTION}], tool_choice=choice)
    note = answered.headers.get(HEADER)
    if not streams:
        message = answered.parse().choices[0].message
        calls = [(each.function.name, each.function.arguments) for each in message.tool_calls or ()]
        return Got(message.content or "", decoded(calls), note)
    deltas = [each.choices[0].delta for each in answered.parse() if each.choices]
    pieces = [piece.function for delta in deltas for piece in delta.tool_calls or ()]
    names = [piece.name for piece in pieces if piece.name]
    arguments = "".join(piece.arguments or "" for piece in pieces)
    calls = [(name, arguments) for name in names]
    return Got("".join(delta.content or "" for delta in deltas), decoded(calls), note)


def by_responses(client: Any, choice: Json, streams: bool) -> Got:
    answered = client.responses.with_raw_response.create(
        model=MODEL, input=QUESTION, stream=streams, tools=[{"type": "function", **FUNCTION}],
        tool_choice=choice)
    note = answered.headers.get(HEADER)
    found = answered.parse()
    if streams:
        found = list(found)[-1].response
    calls = [(each.name, each.arguments) for each in found.output if each.type == "function_call"]
    return Got(found.output_text, decoded(calls), note)


def by_messages(client: Any, choice: Json, streams: bool) -> Got:
    fields: Json = {
        "model": MODEL, "max_tokens": 3000, "messages": [{"role": "user", "content": QUESTION}],
        "tools": [TOOL], "tool_choice": choice}
    if streams:
        with client.messages.stream(**fields) as stream:
            found, note = stream.get_final_message(), stream.response.headers.get(HEADER)
    else:
        answered = client.messages.with_raw_response.create(**fields)
        found, note = answered.parse(), answered.headers.get(HEADER)
    calls = [(each.name, each.input) for each in found.content if each.type == "tool_use"]
    text = "".join(each.text for each in found.content if each.type == "text")
    return Got(text, calls, note)


def decoded(calls: list[tuple[str, str]]) -> list[tuple[str, Json]]:
    return [(name, json.loads(arguments)) for name, arguments in calls]


CHAT = Way("chat", by_chat, "required",
           {"type": "function", "function": {"name": "weather"}})
RESPONSES = Way("responses", by_responses, "required", {"type": "function", "name": "weather"})
MESSAGES = Way("messages", by_messages, {"type": "any"}, {"type": "tool", "name": "weather"})
WAYS = (CHAT, RESPONSES, MESSAGES)


def way_name(value: object) -> str | None:
    return value.name if isinstance(value, Way) else None


@pytest.fixture
def ask(request: pytest.FixtureRequest) -> Callable[[Way, Json, bool], Got]:
    """Ask by a way, with the client that it is a method of."""
    def asked(way: Way, choice: Json, streams: bool) -> Got:
        name = "anthropic_client" if way is MESSAGES else "openai_client"
        return way.ask(request.getfixturevalue(name), choice, streams)

    return asked


# ---------------------------------------------------------------------------
# Forced calls
# ---------------------------------------------------------------------------

def manners(*in_gate: tuple[Way, bool]) -> pytest.MarkDecorator:
    """Run a test with every way, whole and streamed; all but `in_gate` with --all."""
    others = [(way, streams) for way in WAYS for streams in (False, True)]
    return pytest.mark.parametrize(("way", "streams"), [
        *in_gate, *rest(*(each for each in others if each not in in_gate))], ids=way_name)


EVERY_CASE = [(way, choice, streams) for way in WAYS
              for choice in (way.any_tool, way.this_tool) for streams in (False, True)]
GATE_CASES = [(CHAT, CHAT.any_tool, False), (RESPONSES, RESPONSES.this_tool, True),
              (MESSAGES, MESSAGES.any_tool, True)]


@pytest.mark.parametrize(
    ("way", "choice", "streams"),
    [*GATE_CASES, *rest(*(case for case in EVERY_CASE if case not in GATE_CASES))], ids=way_name)
def test_a_call_that_the_model_lets_nobody_force_comes_in_one_request(
    rig: Rig, ask: Callable[..., Got], way: Way, choice: Json, streams: bool
) -> None:
    rig.script(stub.tool_calls([ROME], text="Let me see."))

    assert ask(way, choice, streams) == Got("Let me see.", [ROME], None)

    body = rig.only_body()
    assert (body["model"], body.get("tool_choice")) == (MODEL_ID, None)


@pytest.mark.exhaustive
@manners((MESSAGES, False))
def test_an_answer_without_the_call_never_reaches_the_client(
    rig: Rig, ask: Callable[..., Got], way: Way, streams: bool
) -> None:
    rig.script(stub.text("It is warm."), stub.tool_calls([ROME]))

    assert ask(way, way.this_tool, streams) == Got("", [ROME], None)

    assert len(rig.bodies()) == 2


@pytest.mark.exhaustive
@manners((CHAT, True))
def test_a_client_can_read_that_its_choice_was_not_honoured(
    rig: Rig, ask: Callable[..., Got], way: Way, streams: bool
) -> None:
    rig.script(stub.text("It is warm."), stub.text("It is very warm."))

    assert ask(way, way.any_tool, streams) == Got("It is very warm.", [], "not-honoured")


# ---------------------------------------------------------------------------
# Helpers of the anthropic package
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
@pytest.mark.parametrize("streams", [False, *rest(True)], ids=["whole", "stream"])
def test_the_runner_of_tools_goes_on_without_a_thread(
    rig: Rig, anthropic_client: Any, streams: bool
) -> None:
    rig.script(stub.tool_calls([ROME]), stub.text("It is warm."))
    logged, asked = len(rig.server.log_entries()), []

    @anthropic.beta_tool  # type: ignore[untyped-decorator]
    def weather(city: str) -> str:
        """Tells how warm it is.

        Args:
            city: where
        """
        asked.append(city)
        return "30 degrees"

    last = anthropic_client.beta.messages.tool_runner(
        model=MODEL, max_tokens=3000, messages=[{"role": "user", "content": QUESTION}],
        tools=[weather], stream=streams,
    ).until_done()

    assert (asked, last.content[0].text) == (["Rome"], "It is warm.")
    # The package asks for a thread once, and then sends the whole conversation each time.
    entries = eventually(lambda: requests_since(rig, logged, 3))
    assert [(entry["event"], entry.get("status", 200)) for entry in entries] == [
        ("request_refused", 400), ("answer_finished", 200), ("answer_finished", 200)]
    assert [entry.get("path") for entry in entries[1:]] == ["fresh", "continued"]


def requests_since(rig: Rig, logged: int, count: int) -> list[dict[str, Json]]:
    """Return the entries of requests after the first `logged`; none before there are `count`."""
    found = [entry for entry in rig.server.log_entries()[logged:] if "request_id" in entry]
    return found if len(found) >= count else []
