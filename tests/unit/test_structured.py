"""Structured output: the schema that claude is given, and the answer without its wrapper."""
from __future__ import annotations

import json
from typing import Any

import pytest

from claude_lines import RESULT, stream
from project import TRANSCRIPTS, load_script
from rendering import USER, parsing, refusal_of, steps_for, whole

ocp = load_script("ocp_server.py")

Json = dict[str, Any]

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ANYTHING = {"type": "object", "additionalProperties": True}


def parse(dialect: Any, **fields: object) -> Any:
    """The Turn of a request of this dialect."""
    prompt = {"input": "Hello"} if dialect is ocp.RESPONSES else {"messages": [USER]}
    return dialect.parse({**prompt, **fields}, parsing())


# -- the schema ---------------------------------------------------------------


def shape_of(schema: Json) -> Any:
    """The Shape of an answer that has to fit this schema."""
    return ocp.read_output_schema(ocp.Fields(schema, "format.schema"))


@pytest.mark.parametrize("schema", [CITY, {"type": "object"}, ANYTHING])
def test_an_object_s_schema_is_given_as_it_is(schema: Json) -> None:
    assert shape_of(schema) == ocp.OutputSchema(schema, wrapped=False)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": CITY}, {"type": "string", "enum": ["a"]}, {}, {"anyOf": [CITY]},
        {"type": ["object", "null"]}, {"const": 1},
    ],
)
def test_any_other_root_is_wrapped_in_an_object(schema: Json) -> None:
    found = shape_of(schema)

    assert found.wrapped
    assert found.schema == {
        "type": "object", "properties": {"value": schema}, "required": ["value"],
        "additionalProperties": False,
    }


@pytest.mark.parametrize("name", ["$defs", "definitions"])
def test_definitions_stay_at_the_root_where_references_look_for_them(name: str) -> None:
    reference = {"$ref": f"#/{name}/city"}

    found = shape_of({"type": "array", "items": reference, name: {"city": CITY}})

    assert found.schema["$defs"] == {"city": CITY}
    assert found.schema["properties"]["value"] == {
        "type": "array", "items": {"$ref": "#/$defs/city"}}


def test_the_client_s_own_schema_is_left_alone() -> None:
    schema = {"type": "array", "$defs": {"a": CITY}}

    shape_of(schema)

    assert schema == {"type": "array", "$defs": {"a": CITY}}


@pytest.mark.parametrize(
    ("dialect", "fields", "param"),
    [
        (ocp.MESSAGES, {"output_config": {"format": {"type": "json_schema"}}},
         "output_config.format.schema"),
        (ocp.MESSAGES, {"output_format": {"type": "json_schema"}}, "output_format.schema"),
        (ocp.MESSAGES, {"output_config": {"format": {"type": "xml"}}},
         "output_config.format.type"),
        (ocp.CHAT, {"output_config": {"format": {"type": "json_schema"}}},
         "output_config.format.schema"),
    ],
)
def test_a_form_that_cannot_be_had_is_refused(dialect: Any, fields: Json, param: str) -> None:
    with pytest.raises(ocp.BadRequest) as caught:
        parse(dialect, **fields)

    assert caught.value.param == param


NAMED = {"name": "city", "strict": True, "schema": CITY}


@pytest.mark.parametrize(
    ("dialect", "fields"),
    [
        (ocp.CHAT, {"response_format": {"type": "json_schema", "json_schema": NAMED}}),
        (ocp.RESPONSES, {"text": {"format": {"type": "json_schema", **NAMED}}}),
        (ocp.MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": CITY}}}),
        (ocp.MESSAGES, {"output_format": {"type": "json_schema", "schema": CITY}}),
        (ocp.CHAT, {"response_format": {"type": "json_schema", "schema": CITY}}),
        (ocp.CHAT, {"output_config": {"format": {"type": "json_schema", "schema": CITY}}}),
        (ocp.RESPONSES, {"output_config": {"format": {"type": "json_schema", "schema": CITY}}}),
        (ocp.RESPONSES, {"text": {"format": {"type": "json_schema", "json_schema": NAMED}}}),
        (ocp.MESSAGES, {"output_config": {"format": {"type": "json_schema", **NAMED}}}),
    ],
    ids=[
        "chat", "responses", "messages", "messages, as it was", "chat, flat",
        "chat as messages", "responses as messages", "responses as chat", "messages, named",
    ],
)
def test_every_dialect_takes_a_schema(dialect: Any, fields: Json) -> None:
    assert parse(dialect, **fields).output_schema == ocp.OutputSchema(CITY, wrapped=False)


@pytest.mark.parametrize(
    ("dialect", "fields", "shape"),
    [
        (ocp.CHAT, {"response_format": {"type": "json_object"}}, ocp.OutputSchema(ANYTHING, False)),
        (ocp.RESPONSES, {"text": {"format": {"type": "json_object"}}},
         ocp.OutputSchema(ANYTHING, False)),
        (ocp.MESSAGES, {"output_config": {"format": {"type": "json_object"}}},
         ocp.OutputSchema(ANYTHING, False)),
        (ocp.CHAT, {"response_format": {"type": "text"}}, None),
        (ocp.CHAT, {"response_format": {}}, None),
        (ocp.RESPONSES, {"text": {"format": {"type": "text"}}}, None),
        (ocp.RESPONSES, {"text": {"verbosity": "low"}}, None),
        (ocp.MESSAGES, {"output_config": {"effort": "low"}}, None),
        (ocp.MESSAGES, {}, None),
    ],
)
def test_json_without_a_schema_is_an_object_and_text_has_no_shape(
    dialect: Any, fields: Json, shape: Any
) -> None:
    assert parse(dialect, **fields).output_schema == shape


@pytest.mark.parametrize(
    ("dialect", "fields", "param"),
    [
        (ocp.CHAT, {"response_format": {"type": "json_schema"}},
         "response_format.json_schema.schema"),
        (ocp.CHAT, {"response_format": {"type": "json_schema", "json_schema": {}}},
         "response_format.json_schema.schema"),
        (ocp.CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
         "response_format.json_schema.schema"),
        (ocp.CHAT, {"response_format": {"type": "json_schema", "json_schema": 7}},
         "response_format.json_schema"),
        (ocp.RESPONSES, {"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        (ocp.RESPONSES, {"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        (ocp.RESPONSES, {"text": {"format": 7}}, "text.format"),
        (ocp.MESSAGES, {"output_config": {"format": {"schema": 7}}}, "output_config.format.schema"),
        (ocp.MESSAGES, {"output_config": 7}, "output_config"),
    ],
)
def test_a_schema_that_is_wrong_is_refused_with_its_path(
    dialect: Any, fields: Json, param: str
) -> None:
    prompt = {"input": "Hello"} if dialect is ocp.RESPONSES else {"messages": [USER]}

    error = refusal_of(dialect, {**prompt, **fields})

    assert (error.status, error.param) == (400, param)


def test_claude_is_told_the_schema() -> None:
    turn = parse(ocp.CHAT, response_format={"type": "json_schema", "json_schema": NAMED})

    [step] = steps_for(turn, "", (2, 1, 329))

    request = json.loads(step.splitlines()[0])["request"]
    assert request["jsonSchema"] == CITY


# -- the unwrapper ------------------------------------------------------------

VALUES = (
    "[1,2,3]", "{}", '{"a":{"b":{}}}', '"}"', '"a } b"', '" }}\\" }"', "7", "-1.5e3", "true",
    "null", '""', '"\\u007d"', "[{},{}]", '{"value":{"value":1}}', '"  "', '[ { } , "}" ]',
    '"Gr\u00fc\u00dfe \U0001f600"',
)
WRAPPERS = ('{"value":%s}', '{ "value" : %s }', '\n{\n  "value": %s\n}\n')


def unwrapped(*pieces: str) -> str:
    """What a ClientForm gives of these pieces. White space before a value means nothing."""
    unwrapper = ocp.ClientJsonConverter(wrapped=True)
    given = "".join([unwrapper.feed(piece) for piece in pieces]) + str(unwrapper.close())
    return given.lstrip()


def splits(text: str) -> list[list[str]]:
    """The text in one piece, in two at every place, in single characters, and with nothing in
    between."""
    two = [[text[:at], text[at:]] for at in range(len(text) + 1)]
    return [[text], *two, list(text), ["", *text, ""]]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("value", VALUES)
def test_the_value_is_the_same_however_it_comes(value: str, wrapper: str) -> None:
    text = wrapper % value

    assert {unwrapped(*pieces) for pieces in splits(text)} == {value}


@pytest.mark.parametrize("text", [
    '{"value": {"a":1}, "extra": 2}', '{"value": {"a":1}, "value": {"b":2}}',
    '{"value": {"a":1}, "extra": {"c": [3, {"d": ":"}]}, "more": "}"}',
])
def test_only_the_first_value_of_a_wrapper_is_given(text: str) -> None:
    assert {unwrapped(*pieces) for pieces in splits(text)} == {'{"a":1}'}


@pytest.mark.parametrize("value", VALUES)
def test_three_pieces_are_as_good_as_two(value: str) -> None:
    text = WRAPPERS[1] % value
    size = len(text)

    found = {
        unwrapped(text[:one], text[one:two], text[two:])
        for one in range(size) for two in range(one, size)
    }

    assert found == {value}


@pytest.mark.parametrize("value", VALUES)
def test_nothing_is_given_that_has_to_be_taken_back(value: str) -> None:
    unwrapper = ocp.ClientJsonConverter(wrapped=True)
    so_far = ""

    for character in WRAPPERS[1] % value:
        so_far += unwrapper.feed(character)
        assert value.startswith(so_far.lstrip())


def test_a_long_value_is_given_while_it_comes() -> None:
    unwrapper = ocp.ClientJsonConverter(wrapped=True)

    assert unwrapper.feed('{"value":"') == '"'
    assert unwrapper.feed("once upon") == "once upon"
    assert unwrapper.feed(' a time"}') == ' a time"'
    assert unwrapper.close() == ""


# -- the answer ---------------------------------------------------------------

PLAIN = ocp.OutputSchema(CITY, wrapped=False)
WRAPPED = ocp.OutputSchema({}, wrapped=True)
START = {
    "type": "stream_event",
    "event": {"type": "message_start", "message": {"id": "msg_1", "model": "claude-x"}},
}


def shaped(*pieces: str, index: int = 0) -> list[Json]:
    """The lines of a call of claude's own tool for structured output."""
    use = {"type": "tool_use", "id": "t1", "name": "StructuredOutput", "input": {}}
    deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
    return [
        stream("content_block_start", index=index, content_block=use),
        *(stream("content_block_delta", index=index, delta=delta) for delta in deltas),
        stream("content_block_stop", index=index),
    ]


def prose(text: str, index: int = 0) -> list[Json]:
    """The lines of a block of text."""
    block = {"type": "text", "text": ""}
    delta = {"type": "text_delta", "text": text}
    return [
        stream("content_block_start", index=index, content_block=block),
        stream("content_block_delta", index=index, delta=delta),
        stream("content_block_stop", index=index),
    ]


def ending(reason: str) -> Json:
    return stream("message_delta", delta={"stop_reason": reason}, usage={"output_tokens": 2})


def outcome(**fields: object) -> Json:
    """What claude says about its own tool's call."""
    return {"type": "user", "message": {"content": [{"type": "tool_result", **fields}]}}


ACCEPTED, REJECTED = outcome(), outcome(is_error=True)


def told(shape: Any, *lines: Json) -> list[Any]:
    """The events of these lines up to the end of the answer."""
    reader = ocp.TurnReader((), shape)
    events: list[Any] = []
    for line in lines:
        if not reader.finished:
            events += reader.events(line)
    return events


def answered(events: list[Any]) -> Any:
    found = ocp.AnswerRecord(parse(ocp.CHAT), 0.0)
    for event in events:
        found.add(event, 0.0)
    return found.answer()


@pytest.mark.parametrize("order", [(ACCEPTED, ending("tool_use")), (ending("tool_use"), ACCEPTED)])
def test_a_shaped_answer_is_text_and_an_ordinary_end(order: tuple[Json, Json]) -> None:
    found = answered(told(PLAIN, START, *shaped('{"city"', ':"Paris"}'), *order))

    assert (found.joined("text"), found.stop_reason) == ('{"city":"Paris"}', "end_turn")
    assert (found.calls, found.refusal) == ([], "")


def test_a_wrapped_answer_is_told_without_its_wrapper() -> None:
    lines = [START, *shaped('{"val', 'ue": [1,', ' {}]}'), ACCEPTED, ending("tool_use")]

    assert answered(told(WRAPPED, *lines)).joined("text") == "[1, {}]"


@pytest.mark.parametrize("wrapped", [PLAIN, WRAPPED], ids=["plain", "wrapped"])
def test_no_piece_of_a_shaped_answer_comes_outside_its_block(wrapped: Any) -> None:
    events = told(wrapped, START, *shaped('{"value":{}}'), ACCEPTED, ending("tool_use"))

    assert [type(event) for event in events][1::len(events) - 3] == [
        ocp.BlockStarted, ocp.BlockStopped,
    ]


def test_prose_beside_a_shaped_answer_is_not_told() -> None:
    lines = [START, *prose("Here you are:"), *shaped("{}", index=1), ACCEPTED, ending("tool_use")]

    assert answered(told(PLAIN, *lines)).joined("text") == "{}"


def test_prose_instead_of_an_answer_is_followed_by_a_second_attempt() -> None:
    first = [START, *prose("Here you are."), ending("end_turn")]

    events = told(PLAIN, *first, START, *shaped("{}"), ACCEPTED, ending("tool_use"))

    assert answered(events).joined("text") == "{}"


def test_an_answer_that_claude_rejects_is_voided_by_the_next_one() -> None:
    first = [START, *shaped('{"town":1}'), REJECTED, ending("tool_use")]

    events = told(PLAIN, *first, START, *shaped('{"city":"Rome"}'), ACCEPTED, ending("tool_use"))

    assert [type(event) for event in events].count(ocp.Restarted) == 1
    assert answered(events).joined("text") == '{"city":"Rome"}'


def test_an_answer_is_not_over_before_claude_has_accepted_it() -> None:
    assert told(PLAIN, START, *shaped("{}"), ending("tool_use"))[-1] == ocp.BlockStopped(0)
    assert told(PLAIN, START, *shaped("{}"), ACCEPTED)[-1] == ocp.BlockStopped(0)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([*prose(" I would rather not. ")], "I would rather not."),
        ([], "The model did not give an answer that fits the requested schema."),
        ([*prose("  ")], "The model did not give an answer that fits the requested schema."),
    ],
)
def test_no_answer_of_the_wanted_form_is_a_refusal(lines: list[Json], words: str) -> None:
    found = answered(told(PLAIN, START, *lines, ending("end_turn"), RESULT))

    assert (found.refusal, found.joined("text"), found.stop_reason) == (words, "", "end_turn")


def test_a_refusal_after_a_rejected_answer_voids_it() -> None:
    lines = [START, *shaped('{"town":1}'), REJECTED, ending("tool_use"),
             {**RESULT, "is_error": True, "subtype": "error_max_structured_output_retries"}]

    found = answered(told(PLAIN, *lines))

    assert found.refusal and found.joined("text") == ""


def test_a_refusal_is_told_apart_from_an_answer() -> None:
    events = told(PLAIN, START, *prose("No."), ending("end_turn"), RESULT)

    [choice] = whole(ocp.CHAT, parse(ocp.CHAT), events)["choices"]

    assert (choice["message"]["content"], choice["message"]["refusal"]) == (None, "No.")


def test_a_failure_is_a_failure_whatever_the_shape() -> None:
    with pytest.raises(ocp.Overloaded):
        told(PLAIN, START, {**RESULT, "is_error": True, "api_error_status": 529, "result": "Busy"})


@pytest.mark.parametrize("reason", ["max_tokens", "refusal", "model_context_window_exceeded"])
def test_an_answer_that_ends_early_says_why(reason: str) -> None:
    found = answered(told(PLAIN, START, *shaped('{"city":"Pa'), ending(reason)))

    assert (found.joined("text"), found.stop_reason) == ('{"city":"Pa', reason)


def test_without_a_shape_that_tool_is_one_of_claude_s_own() -> None:
    assert told(None, START, *shaped("{}"), ending("tool_use")) == told(None, START)


RECORDED = ("structured", "structured_prose_first")


@pytest.mark.parametrize("version", ["2.1.197", "2.1.329"])
@pytest.mark.parametrize("scenario", RECORDED)
def test_a_recorded_answer_fits_its_schema(version: str, scenario: str) -> None:
    path = TRANSCRIPTS / f"{version}-{scenario}.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]

    events = told(PLAIN, *(row["line"] for row in rows if row["dir"] == "out"))

    found = answered(events)
    assert json.loads(found.joined("text")) == {"city": "Paris"}
    assert (found.refusal, found.stop_reason) == ("", "end_turn")
