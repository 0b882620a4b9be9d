"""Answers of a wanted form over the real claude: JSON objects, schemas, and refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

import stub_api as stub
from conversation import EVERY_DIALECT, WHOLE_AND_STREAMED, Conversation, path_of
from depth import rest
from dialects import CHAT, MESSAGES, RESPONSES, Answer, Dialect, Result, Tool
from rig import ANSWER_S, Rig
from upstream import upstream_call, upstream_messages, upstream_result

Json = Any

RIG_SETTINGS = {"OCP_WARM_PROCESSES": "2"}
#: Whole answers are much the same in every dialect, streams are not.
EVERY_RENDERER = pytest.mark.parametrize(
    ("dialect", "streams"),
    [(CHAT, False), (CHAT, True), (MESSAGES, True), (RESPONSES, True)],
    ids=["chat-whole", "chat-stream", "messages-stream", "responses-stream"])

CITY: dict[str, Json] = {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
    "additionalProperties": False}
#: How claude names the tool by which the model answers.
OUTPUT = "StructuredOutput"


def output(value: Json, text: str | None = None) -> stub.Reply:
    return stub.tool_calls([(OUTPUT, value)], text=text)


def ask_for_city(
    rig: Rig, dialect: Dialect, schema: Json, streams: bool = False, **more: Json
) -> Answer:
    talk = Conversation(rig, dialect, streams=streams, **dialect.schema_fields(schema), **more)
    return talk.ask("Which city?")


@pytest.mark.exhaustive
def test_one_process_fits_answer_after_answer_into_the_schema(rig: Rig) -> None:
    """Those before 2.1.329 cannot forget the only question that they were asked."""
    values = [{"city": f"City {number}"} for number in range(10)]
    rig.script(*map(output, values))
    answers = [
        Conversation(rig, CHAT, **CHAT.schema_fields(CITY)).ask(f"Which is number {number}?")
        for number in range(10)]
    assert [json.loads(said.text) for said in answers] == values
    assert [upstream_messages(body) for body in rig.bodies()] == [
        [("user", [f"Which is number {number}?"])] for number in range(10)]
    assert all([tool["name"] for tool in body["tools"]] == [OUTPUT] for body in rig.bodies())
    later = {path_of(rig, said) for said in answers[5:]}
    assert later == ({"fresh"} if rig.claude.version == "2.1.197" else {"rewound"})


# ---------------------------------------------------------------------------
# Roots
# ---------------------------------------------------------------------------

@EVERY_DIALECT
@WHOLE_AND_STREAMED
def test_an_answer_fits_its_schema(rig: Rig, dialect: Dialect, streams: bool) -> None:
    rig.script(output({"city": "Z\u00fcrich \"{}\""}))
    said = ask_for_city(rig, dialect, CITY, streams)
    assert json.loads(said.text) == {"city": "Z\u00fcrich \"{}\""}
    assert (said.finish, said.calls, len(rig.bodies())) == ("stop", [], 1)
    (tool,) = [tool for tool in rig.only_body()["tools"] if tool["name"] == OUTPUT]
    assert tool["input_schema"] == CITY
    if streams:
        assert len(said.pieces) > 1


class Root(NamedTuple):
    """A schema whose root is no plain object, and a value that fits."""
    schema: Json
    value: Json


ROOTS = {
    "array": Root({"type": "array", "items": {"type": "integer"}}, [1, 2, 3]),
    "empty array": Root({"type": "array"}, []),
    "nested arrays": Root({"type": "array"}, [[{"a": "}"}], {}]),
    "number": Root({"type": "number"}, -1.5),
    "string": Root({"type": "string"}, "a } b \" c\n } "),
    "enum": Root({"enum": ["red", "green"]}, "green"),
    "null": Root({"type": "null"}, None),
    "either": Root({"anyOf": [{"type": "object"}, {"type": "boolean"}]}, {"value": {"b": {}}}),
    "reference": Root(
        {"$ref": "#/$defs/tree", "$defs": {"tree": {
            "type": "array", "items": {"$ref": "#/$defs/tree"}}}}, [[], [[]]]),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [
    "array", "null", *rest(*[name for name in ROOTS if name not in ("array", "null")])])
def test_a_root_of_another_kind_is_wrapped_and_unwrapped(rig: Rig, name: str) -> None:
    schema, value = ROOTS[name]
    rig.script(*[output({"value": value})] * 3)
    told = [ask_for_city(rig, CHAT, schema), ask_for_city(rig, CHAT, schema, streams=True)]
    if name in ("array", "enum"):
        told += [ask_for_city(rig, MESSAGES if name == "array" else RESPONSES, schema)]
    assert [json.loads(said.text) for said in told] == [value] * len(told)
    assert {said.finish for said in told} == {"stop"}
    assert len(rig.bodies()) == len(told)


@pytest.mark.exhaustive
def test_definitions_stay_where_they_can_be_found(rig: Rig) -> None:
    rig.script(output({"place": {"x": 1}}))
    schema = {
        "type": "object", "properties": {"place": {"$ref": "#/$defs/place"}},
        "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}}}}
    assert json.loads(ask_for_city(rig, CHAT, schema).text) == {"place": {"x": 1}}
    (tool,) = rig.only_body()["tools"]
    assert tool["input_schema"] == schema


@pytest.mark.exhaustive
@WHOLE_AND_STREAMED
def test_any_object_will_do_for_json_object(rig: Rig, streams: bool) -> None:
    rig.script(output({"a": [1, {"b": None}]}), output({}))
    chat = {"response_format": {"type": "json_object"}}
    responses = {"text": {"format": {"type": "json_object"}}}
    first = Conversation(rig, CHAT, streams=streams, **chat).ask("Some JSON.")
    second = Conversation(rig, RESPONSES, streams=streams, **responses).ask("Some JSON.")
    assert json.loads(first.text) == {"a": [1, {"b": None}]}
    assert json.loads(second.text) == {}


@pytest.mark.exhaustive
def test_text_is_no_shape(rig: Rig) -> None:
    rig.script(stub.text("Paris."), stub.text("Paris."))
    chat = Conversation(rig, CHAT, response_format={"type": "text"}).ask("Which city?")
    responses = Conversation(rig, RESPONSES, text={"format": {"type": "text"}}).ask("Which city?")
    assert chat.text == responses.text == "Paris."


# ---------------------------------------------------------------------------
# Beside the answer
# ---------------------------------------------------------------------------

@EVERY_RENDERER
def test_prose_before_the_answer_is_held_back(
    rig: Rig, dialect: Dialect, streams: bool
) -> None:
    rig.script(output({"city": "Bern"}, text="Let me think about it."))
    said = ask_for_city(rig, dialect, CITY, streams)
    assert json.loads(said.text) == {"city": "Bern"}
    assert (said.refusal, said.finish) == ("", "stop")


@EVERY_RENDERER
def test_prose_alone_is_asked_about_again(rig: Rig, dialect: Dialect, streams: bool) -> None:
    rig.script(stub.text("It is Bern."), output({"city": "Bern"}))
    said = ask_for_city(rig, dialect, CITY, streams)
    assert json.loads(said.text) == {"city": "Bern"}
    assert (said.refusal, said.finish, len(rig.bodies())) == ("", "stop", 2)


@EVERY_RENDERER
def test_a_model_that_never_complies_refuses(rig: Rig, dialect: Dialect, streams: bool) -> None:
    rig.script(then=stub.text("I would rather not."))
    said = ask_for_city(rig, dialect, CITY, streams)
    assert (said.text, said.refusal) == ("", "I would rather not.")
    assert said.finish == "refusal"
    if dialect is CHAT:
        assert '"finish_reason":"stop"' in said.reply.text


def test_an_answer_that_does_not_fit_is_asked_for_again(rig: Rig) -> None:
    rig.script(output({"town": "Bern"}), output({"city": "Bern"}))
    said = ask_for_city(rig, CHAT, CITY)
    assert json.loads(said.text) == {"city": "Bern"}
    assert len(rig.bodies()) == 2


def test_a_stream_never_holds_two_attempts(rig: Rig) -> None:
    rig.script(output({"town": "Bern"}), output({"city": "Bern"}))
    body = Conversation(rig, CHAT, streams=True, **CHAT.schema_fields(CITY)).body(
        messages=[{"role": "user", "content": "Which city?"}])
    reply = rig.server.call("POST", CHAT.path, body, timeout_s=ANSWER_S)
    chunks = [data for _, data in reply.events if data != "[DONE]"]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks
                   for choice in chunk.get("choices", ()))
    failed = "error" in chunks[-1]
    assert failed or json.loads(text) == {"city": "Bern"}
    assert failed != ("[DONE]" in reply.text)


@WHOLE_AND_STREAMED
def test_an_answer_that_is_cut_off_says_so(rig: Rig, streams: bool) -> None:
    *others, last = output({"city": "Bern and more"}).blocks
    half = last._replace(deltas=last.deltas[:-1])
    rig.script(then=stub.Reply((*others, half), stop_reason="max_tokens"))
    said = ask_for_city(rig, CHAT, CITY, streams, max_tokens=20)
    assert said.finish == "length"
    assert "Bern and more" not in said.text
    # On a busy machine claude may ask once more before it hears that it is over: not the next test.
    rig.settle()
    assert len(rig.bodies()) <= 2


# ---------------------------------------------------------------------------
# With tools
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
@EVERY_RENDERER
def test_tools_may_be_called_before_the_answer(
    rig: Rig, dialect: Dialect, streams: bool
) -> None:
    rig.script(stub.tool_calls([("weather", {"city": "Bern"})]), output({"city": "Bern"}))
    talk = Conversation(
        rig, dialect, [Tool("weather")], streams=streams, **dialect.schema_fields(CITY))
    said = talk.ask("Which city?")
    assert (said.call.name, said.finish) == ("weather", "tool_calls")
    last = talk.send_results([(said.call.id, Result("warm"))])
    assert (json.loads(last.text), last.finish) == ({"city": "Bern"}, "stop")
    body = rig.last_body()
    assert sorted(tool["name"] for tool in body["tools"]) == [OUTPUT, "weather"]
    assert upstream_messages(body)[1:] == [
        ("assistant", [upstream_call(said.call)]),
        ("user", [upstream_result(said.call, Result("warm"))])]
    assert len(rig.bodies()) == 2


@pytest.mark.parametrize("calls", [
    [("weather", {"city": "Bern"}), (OUTPUT, {"city": "Bern"})],
    *rest([(OUTPUT, {"city": "Bern"}), ("weather", {"city": "Bern"})])], ids=["after", "before"])
def test_an_answer_beside_a_call_ends_the_turn(
    rig: Rig, calls: Sequence[tuple[str, Json]]
) -> None:
    rig.script(stub.tool_calls(calls))
    talk = Conversation(rig, CHAT, [Tool("weather")], **CHAT.schema_fields(CITY))
    body = talk.body(messages=[{"role": "user", "content": "Which city?"}])
    reply = rig.server.call("POST", CHAT.path, body, timeout_s=ANSWER_S)
    said = CHAT.read_answer(reply)
    assert said.finish in ("stop", "tool_calls")
    assert (said.finish == "tool_calls") == bool(said.calls)
    assert len(rig.bodies()) == 1


@pytest.mark.each_case
@pytest.mark.parametrize("format", [
    {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "a"}},
    {"type": "yaml"}, {"type": "json_schema", "json_schema": {"name": "a", "schema": 5}}])
def test_a_format_that_is_none_is_a_bad_request(rig: Rig, format: Json) -> None:
    said = Conversation(rig, CHAT, response_format=format).ask("Which city?")
    assert said.reply.status == 400
    assert said.reply.json()["error"]["param"].startswith("response_format")
    assert rig.bodies() == []
