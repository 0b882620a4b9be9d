"""Schemas of every kind over the real claude: nothing is lost of them, or of what is said in them.

What claude and the API take of schemas is in unit/test_schemas.py for every sample; here are the
classes of it, with the programs that it is about.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest

import stub_api as stub
from conversation import EVERY_DIALECT, WHOLE_AND_STREAMED, Conversation, path_of
from depth import by_depth, rest
from dialects import CHAT, MESSAGES, RESPONSES, Dialect, Result, Tool
from project import load_script
from rig import ANSWER_S, Case, Rig
from schemas import corpus, refusals
from upstream import upstream_messages, upstream_result

ocp = load_script("ocp_server.py")

Json = Any

OUTPUT = "StructuredOutput"
SCHEMAS = {sample.name: sample.schema for sample in corpus()}


def is_object(schema: Json) -> bool:
    """Whether a schema may be a tool's."""
    try:
        ocp.schema_for_model(schema, "schema", is_tool=True)
    except ocp.BadRequest:
        return False
    return True


# ---------------------------------------------------------------------------
# Tools
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("description", ["Sagt es f\u00fcr Z\u00fcrich.", *rest("Tells it.")])
def test_every_tool_reaches_the_api_whatever_its_schema(rig: Rig, description: str) -> None:
    names = [name for name, schema in SCHEMAS.items() if is_object(schema)]
    tools = [
        Tool(f"tool_{number}", SCHEMAS[name], description) for number, name in enumerate(names)]
    said = Conversation(rig, CHAT, tools).ask("Hi.")
    assert said.text == "Hello from the stub."
    sent = {tool["name"]: tool["input_schema"] for tool in rig.only_body()["tools"]}
    for number, name in enumerate(names):
        schema = sent.pop(f"tool_{number}")
        assert schema == ocp.schema_for_model(SCHEMAS[name], "schema", is_tool=True).schema, name
        assert refusals(schema, is_tool=True) == []
    assert sent == {}


ACCOUNT = Tool("account", {
    "type": "object", "required": ["Account Number"], "properties": {
        "Account Number": {"type": "string"}, "filter[id]": {"type": "array", "items": {
            "type": "object", "properties": {"gr\u00f6\u00dfe": {"type": "integer"}}}}}})
#: Arguments as the model writes them, and as the client gets them.
AS_MODEL = {"Account_Number": 'a "{b}', "filter_id": [{"gro_e": 1}, {"other": "Account_Number"}]}
AS_CLIENT = {
    "Account Number": 'a "{b}', "filter[id]": [{"gr\u00f6\u00dfe": 1}, {"other": "Account_Number"}]}
EITHER = Tool("either", {
    "anyOf": [{"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]},
              {"type": "object", "properties": {"my name": {"type": "string"}}}]})


@EVERY_DIALECT
@WHOLE_AND_STREAMED
def test_arguments_have_the_names_of_the_client(
    rig: Rig, dialect: Dialect, streams: bool
) -> None:
    rig.script(stub.tool_calls([("account", AS_MODEL), ("either", {"value": {"my_name": "x"}})]))
    talk = Conversation(rig, dialect, [ACCOUNT, EITHER], streams=streams)
    first, second = talk.ask("Which one?").calls
    assert (first.input, second.input) == (AS_CLIENT, {"my name": "x"})
    last = talk.send_results([(first.id, Result("1")), (second.id, Result("2"))])
    assert (path_of(rig, last), last.text) == ("continued", "Hello from the stub.")


@pytest.mark.exhaustive
@EVERY_DIALECT
def test_earlier_calls_are_told_in_the_names_of_the_model(rig: Rig, dialect: Dialect) -> None:
    rig.script(stub.tool_calls([("account", AS_MODEL), ("either", {"value": {"my_name": "x"}})]))
    talk = Conversation(rig, dialect, [ACCOUNT, EITHER])
    calls = talk.ask("Which one?").calls
    rig.end_parked()
    last = talk.send_results([(call.id, Result("1")) for call in calls])
    assert path_of(rig, last) == "rebuilt"
    (_, asked), (_, results) = upstream_messages(rig.last_body())[1:]
    assert [each.content for each in asked] == [AS_MODEL, {"value": {"my_name": "x"}}]
    assert results == [upstream_result(call, Result("1")) for call in calls]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["__proto__", *rest("constructor", "toString")])
def test_a_tool_may_be_called_like_a_method_of_javascript(rig: Rig, name: str) -> None:
    rig.script(then=stub.text("Nothing."))
    Conversation(rig, CHAT, [Tool(name), Tool("weather")]).ask(f"Is there {name}?")
    (other, _) = sorted(tool["name"] for tool in rig.only_body()["tools"])
    rig.begin()
    rig.script(stub.tool_calls([(other, {"city": "Bern"})]))
    talk = Conversation(rig, CHAT, [Tool(name), Tool("weather")])
    call = talk.ask(f"What does {name} say?").call
    assert (call.name, call.input) == (name, {"city": "Bern"})
    assert talk.send_results([(call.id, Result("warm"))]).text == "Hello from the stub."


# ---------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------

class Shaped(NamedTuple):
    """A sample, an answer as the model writes it, and as the client gets it."""
    sample: str
    said: Json
    got: Json


SHAPED = (
    Shaped("zod 4: union", {"pet": {"kind": "cat", "lives": 9}, "tags": []}, None),
    Shaped("zod 4: tuple", {"point": [1, "a"], "rest": [True, 2, 3]}, None),
    Shaped("zod 3: formats", {
        "when": "2026-01-01T00:00:00Z", "id": "0b6f2f4e-3c6f-4a55-8b12-5d7cbe0c5f10",
        "mail": "a@b.ch", "site": "https://a.ch", "n": None, "e": "a"}, None),
    Shaped("pydantic: union", {"value": {"kind": "dog", "name": None}}, {
        "kind": "dog", "name": None}),
    Shaped("openapi 3.0: pet", {"id": 1, "name": None, "owner": None}, None),
    Shaped("dynamic tree", {"data": 1, "children": [{"children": []}]}, None),
    Shaped("root of alternatives", {"value": {"id": "1"}}, {"id": "1"}),
    Shaped("patterns", {"name": "n", "x-a": "b"}, None),
    Shaped("pattern dialects", {"a": "a-b@c.de", "f": "\u00e4", "g": "a{,3}_/}"}, None),
    Shaped("by hand: wrong values", {"a": "abc", "b": 1, "c": [1]}, None),
    Shaped("names: german", {"Gro_e": 1, "Stra_e_Nr.": "2", "gro_e": {"Uber_uns": "3"}}, {
        "Gr\u00f6\u00dfe": 1, "Stra\u00dfe Nr.": "2", "gr\u00f6\u00dfe": {"\u00dcber uns": "3"}}),
)


@pytest.mark.exhaustive
def test_answers_of_every_kind_of_schema_are_taken_at_once(rig: Rig) -> None:
    samples = by_depth(SHAPED[::3], SHAPED[::3], SHAPED)
    found = rig.run({
        shaped.sample: Case(
            fields=CHAT.schema_fields(SCHEMAS[shaped.sample]), streams=index % 2 == 1,
            replies=[stub.tool_calls([(OUTPUT, shaped.said)])])
        for index, shaped in enumerate(samples)})
    for shaped in samples:
        answer, bodies = found[shaped.sample]
        assert answer.error is None, (shaped.sample, answer.error)
        assert json.loads(answer.text) == (shaped.got or shaped.said), shaped.sample
        assert [tool["name"] for tool in bodies[0]["tools"]] == [OUTPUT]
        assert refusals(bodies[0]["tools"][0]["input_schema"], is_tool=False) == []
        assert len(bodies) == 1, shaped.sample


@pytest.mark.parametrize("dialect", [MESSAGES, RESPONSES], ids=["messages", "responses"])
@WHOLE_AND_STREAMED
def test_an_answer_has_the_names_of_the_client(
    rig: Rig, dialect: Dialect, streams: bool
) -> None:
    rig.script(stub.tool_calls([(OUTPUT, AS_MODEL)]))
    talk = Conversation(rig, dialect, streams=streams, **dialect.schema_fields(ACCOUNT.schema))
    assert json.loads(talk.ask("Which one?").text) == AS_CLIENT


@pytest.mark.exhaustive
@EVERY_DIALECT
@WHOLE_AND_STREAMED
def test_an_answer_that_the_client_could_not_take_is_an_error(
    rig: Rig, dialect: Dialect, streams: bool
) -> None:
    """claude's validator cannot tell the order of a tuple."""
    rig.script(then=stub.tool_calls([(OUTPUT, {"point": ["a", 1], "rest": [True]})]))
    fields = dialect.schema_fields(SCHEMAS["zod 4: tuple"])
    body = Conversation(rig, dialect, streams=streams, **fields).body(
        **{dialect.field: [{"role": "user", "content": "Which point?"}]})
    reply = rig.server.call("POST", dialect.path, body, timeout_s=ANSWER_S)
    said = dialect.read_answer(reply)
    assert said.error is not None and "does not fit the schema" in said.error["message"]
    assert not said.is_complete


@pytest.mark.exhaustive
def test_a_schema_beside_json_object_counts(rig: Rig) -> None:
    rig.script(*[stub.tool_calls([(OUTPUT, {"city": "Bern"})])] * 2)
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    wanted = {"type": "json_object", "schema": schema}
    Conversation(rig, CHAT, response_format=wanted).ask("Which city?")
    Conversation(rig, RESPONSES, text={"format": wanted}).ask("Which city?")
    assert [body["tools"][0]["input_schema"] for body in rig.bodies()] == [schema, schema]
