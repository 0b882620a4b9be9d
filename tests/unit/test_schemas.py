"""JSON Schemas of tools and answers: in the form that claude gets, and the way back."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from depth import by_depth
from project import load_script
from schemas import Answerer, Sample, corpus, made_up, refusals, spoiled

ocp = load_script("ocp_server.py")

Json = Any
#: The samples one by one, and those that are made up in groups.
GROUPS = [[sample] for sample in corpus()]
MADE_UP = made_up(by_depth(100, 300, 300))
GROUPS += [MADE_UP[start:start + 50] for start in range(0, len(MADE_UP), 50)]
EVERY_GROUP = pytest.mark.parametrize("group", GROUPS, ids=lambda group: str(group[0].name))
USES = pytest.mark.parametrize("is_tool", [True, False], ids=["tool", "answer"])
#: The validator of a draft.
VALIDATORS = {
    4: "Draft4Validator", 6: "Draft6Validator", 7: "Draft7Validator",
    2019: "Draft201909Validator", 2020: "Draft202012Validator"}


def for_model(schema: Json, *, is_tool: bool = False, path: str = "schema") -> Any:
    return ocp.schema_for_model(schema, path, is_tool=is_tool)


def shown(**properties: Json) -> Json:
    """What becomes of the properties of an answer."""
    return for_model({"type": "object", "properties": properties}).schema["properties"]


def refused(schema: Json, *, is_tool: bool = False) -> Any:
    with pytest.raises(ocp.BadRequest) as caught:
        for_model(schema, is_tool=is_tool, path="tools[3].function.parameters")
    return caught.value


# -- every schema -------------------------------------------------------------


def as_client(found: Any, *pieces: str) -> str:
    """The model's JSON as the client gets it."""
    form = ocp.ClientJsonConverter(wrapped=found.wrapped, renamed=found.renamed)
    return "".join([form.feed(piece) for piece in pieces]) + str(form.close())


def understood(sample: Sample, *, is_tool: bool) -> Any:
    """The form of a sample that claude gets; None if it is no object and so no tool's."""
    try:
        return for_model(sample.schema, is_tool=is_tool)
    except ocp.BadRequest as error:
        assert is_tool and error.param == "schema.type", error.message
        return None


@USES
@EVERY_GROUP
def test_claude_and_the_api_accept_the_schema_for_the_model(
    group: list[Sample], is_tool: bool
) -> None:
    for sample in group:
        found = understood(sample, is_tool=is_tool)
        if found is not None:
            assert refusals(found.schema, is_tool=is_tool) == [], sample
            assert json.loads(json.dumps(found.schema)) == found.schema


@USES
@EVERY_GROUP
def test_what_fits_the_model_s_schema_fits_the_client_s_once_it_is_mapped_back(
    group: list[Sample], is_tool: bool
) -> None:
    rs = pytest.importorskip("jsonschema_rs")
    for sample in group:
        found = understood(sample, is_tool=is_tool)
        if found is None or sample.draft is None:
            continue
        own = getattr(rs, VALIDATORS[sample.draft])(sample.schema, validate_formats=False)
        taken = rs.Draft202012Validator(found.schema, validate_formats=False)
        for value in answers(found, random.Random(sample.name)):
            if taken.is_valid(value):
                mapped = json.loads(as_client(found, json.dumps(value)))
                assert own.is_valid(mapped), (sample, value)


def answers(found: Any, chance: random.Random) -> list[Json]:
    """Values that the server would take for an answer of this schema, if claude does."""
    values = [Answerer(found.schema, chance).value() for _ in range(20)]
    exact = found.exact or {}
    return [each for each in values if ocp.fits(each, exact, exact.get("$defs", {}))]


@USES
@pytest.mark.parametrize("start", range(0, 300, 50))
def test_a_broken_schema_is_mended_or_refused_by_its_path(start: int, is_tool: bool) -> None:
    for sample in spoiled(300)[start:start + 50]:
        try:
            found = for_model(sample.schema, is_tool=is_tool)
        except ocp.BadRequest as error:
            assert error.status == 400 and str(error.param).startswith("schema")
            assert str(error.param) in error.message
            continue
        assert refusals(found.schema, is_tool=is_tool) == [], sample


@EVERY_GROUP
def test_a_value_in_the_client_s_names_comes_back_as_it_was(group: list[Sample]) -> None:
    for sample in group:
        found = for_model(sample.schema)
        for value in answers(found, random.Random(sample.name)):
            mapped = json.loads(as_client(found, json.dumps(value)))
            names = {own: name for name, own in found.renamed}
            again = ocp.rename_properties(mapped, names)
            assert ({"value": again} if found.wrapped else again) == value


# -- keywords -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "becomes"),
    [
        ({"type": "float"}, {"type": "number"}),
        ({"type": "STRING"}, {"type": "string"}),
        ({"type": ["int", "none"]}, {"type": ["integer", "null"]}),
        ({"type": ["string"]}, {"type": "string"}),
        ({"type": "any"}, {}),
        ({"type": ["string", "any"]}, {}),
        ({"type": "Person"}, {"description": '(type: "Person")'}),
        ("string", {"type": "string"}),
        (None, {}),
        (True, {}),
        (False, {"not": {}}),
        ({"$schema": "x", "$id": "x", "x-order": 1, "xml": {}, "readOnly": True, "$comment": "x"},
         {}),
        ({"type": "string", "nullable": True}, {"type": ["string", "null"]}),
        ({"enum": ["a"], "type": "string", "nullable": True},
         {"enum": ["a", None], "type": ["string", "null"]}),
        ({"anyOf": [{"type": "string"}], "title": "A", "nullable": True},
         {"title": "A", "anyOf": [{"anyOf": [{"type": "string"}]}, {"type": "null"}]}),
        ({"oneOf": [{"type": "string"}], "discriminator": {"propertyName": "a"}},
         {"anyOf": [{"type": "string"}]}),
        ({"oneOf": [{"type": "string"}]}, {"oneOf": [{"type": "string"}]}),
        ({"anyOf": []}, {"description": "(anyOf: [])"}),
        ({"anyOf": [None, {}]}, {"anyOf": [{}]}),
        ({"allOf": {"type": "null"}}, {"allOf": [{"type": "null"}]}),
        ({"minimum": 0, "exclusiveMinimum": True}, {"exclusiveMinimum": 0}),
        ({"maximum": 0, "exclusiveMaximum": False}, {"maximum": 0}),
        ({"minimum": "1", "maximum": None, "multipleOf": 0},
         {"minimum": 1, "description": "(multipleOf: 0)"}),
        ({"minLength": 1.0, "maxLength": -1}, {"minLength": 1, "description": "(maxLength: -1)"}),
        ({"enum": ["a", "a", 1, 1.0, True]}, {"enum": ["a", 1, True]}),
        ({"enum": []}, {"description": "(enum: [])"}),
        ({"enum": "a"}, {"enum": ["a"]}),
        ({"const": None, "default": None}, {"const": None, "default": None}),
        ({"example": 1}, {"examples": [1]}),
        ({"examples": {"one": {"value": 1}, "two": {}}}, {"examples": [1]}),
        ({"description": ["a", "b"], "title": 7}, {"description": "a b (title: 7)"}),
        ({"format": "date"}, {"description": '(format: "date")'}),
        ({"description": "When.", "contentEncoding": "base64"},
         {"description": 'When. (contentEncoding: "base64")'}),
        ({"if": {}, "title": "A"}, {"title": "A"}),
        ({"then": {}}, {}),
        ({"if": {"type": "null"}, "else": {"minimum": 1}},
         {"if": {"type": "null"}, "else": {"minimum": 1}}),
        ({"contains": {}, "minContains": 2}, {"contains": {}, "description": "(minContains: 2)"}),
        ({"type": "object", "unevaluatedProperties": False},
         {"type": "object", "additionalProperties": False}),
        ({"items": [{"type": "string"}, {"type": "null"}], "additionalItems": False},
         {"items": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "minItems": 2,
          "maxItems": 2, "description": "Items in this order: string, null."}),
        ({"prefixItems": [{"title": "X"}], "items": {"type": "null"}, "minItems": 0},
         {"items": {"anyOf": [{"title": "X"}, {"type": "null"}]}, "minItems": 0,
          "description": "Items in this order: X, then any number of: null."}),
        ({"dependencies": {"a": ["b"]}}, {"description": '(dependentRequired: {"a":["b"]})'}),
        ({"properties": []}, {"properties": {}}),
        ({"properties": {"a": {"type": "int", "required": True}}},
         {"properties": {"a": {"type": "integer"}}, "required": ["a"]}),
        ({"required": "a"}, {"required": ["a"]}),
        ({"required": ["a", "a"]}, {"required": ["a"]}),
        ({"patternProperties": {"^x-": {}, "^a": {}}, "properties": {"ab": {}},
          "additionalProperties": False},
         {"patternProperties": {"^x-": {}}, "properties": {"ab": {}},
          "description": '(patternProperties: {"^a":{}})'}),
        ({"pattern": "(?i)a"}, {"description": '(pattern: "(?i)a")'}),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_a_keyword_is_put_into_those_that_all_accept(schema: Json, becomes: Json) -> None:
    assert shown(a=schema)["a"] == becomes


def test_a_tool_keeps_its_formats() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "date"}}}

    assert for_model(schema, is_tool=True).schema == schema


@pytest.mark.parametrize(
    ("pattern", "becomes"),
    [
        (r"^[\w-.]+@x\.ch$", r"^[\w\-.]+@x\.ch$"),
        (r"\Aa\Z", "^a$"),
        (r"(?P<year>\d{4})\-\d", r"(?<year>\d{4})-\d"),
        (r"a{,3}}]", r"a\{,3\}\}\]"),
        (r"\_\@\/\$", r"_@\/\$"),
        (r"[[\]\-a-z]", r"[\[\]\-a-z]"),
        (r"^\p{L}+(?!\s)(?:a|b)*?$", None),
        (r"\u00e4[\x00-\x1f]", None),
        (r"(?i)a", ""), (r"[", ""), (r"(", ""), (r"a++", ""), (r"[]a]", ""), (r"\h", ""),
        (r"(?>a)", ""), (r"[z-a]", ""), (r"\p{Foo}", ""), (r"*", ""), ("a" * 5000, ""),
    ],
)
def test_a_pattern_is_one_of_javascript_s_or_words(pattern: str, becomes: str | None) -> None:
    """"" for a pattern that becomes part of the description, None for one that stays as it is."""
    found = shown(a={"pattern": pattern})["a"]

    assert found.get("pattern", "") == (pattern if becomes is None else becomes)
    assert ("description" in found) == (becomes == "")


def test_patterns_that_are_too_many_become_part_of_the_description() -> None:
    patterns = ["^" + "a.b" * 600 + str(number) for number in range(20)]

    found = for_model({"anyOf": [{"pattern": pattern} for pattern in patterns]}).schema

    each = found["properties"]["value"]["anyOf"]
    assert [part.get("pattern") for part in each[:11]] == patterns[:11]
    assert all("pattern" in part["description"] and "pattern" not in part for part in each[11:])


def test_patterns_of_very_many_names_become_part_of_the_description() -> None:
    def schema(count: int) -> Json:
        return {"type": "object", "properties": {f"p{n}": {} for n in range(count)},
                "patternProperties": {f"^x{n}$": {"type": "string"} for n in range(count)}}

    few, many = for_model(schema(40)).schema, for_model(schema(50)).schema
    assert len(few["patternProperties"]) == 40
    assert "patternProperties" not in many and "^x0$" in many["description"]


# -- references ---------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "reference to the root", "reference to a property", "reference with escapes", "anchors",
    "identified", "draft-06 identified", "dynamic tree", "recursive 2019-09",
    "nested definitions"])
def test_a_reference_leads_to_a_definition_at_the_root(name: str) -> None:
    [sample] = [sample for sample in corpus() if sample.name == name]

    found = for_model(sample.schema)

    assert found.schema["$defs"] and refusals(found.schema, is_tool=False) == []


@pytest.mark.parametrize(
    ("schema", "param"),
    [
        ({"properties": {"a": {"$ref": "#/$defs/nowhere"}}}, "properties.a.$ref"),
        ({"properties": {"a": {"$ref": "https://example.com/schema"}}}, "properties.a.$ref"),
        ({"properties": {"a": {"$ref": 7}}}, "properties.a.$ref"),
        ({"properties": {"a": {"anyOf": [{}, 7]}}}, "properties.a.anyOf[1]"),
        ({"properties": {"a": {"items": [7]}}}, "properties.a.prefixItems[0]"),
        ({"properties": 7}, "properties"),
        ({"required": [7]}, "required"),
        ({"type": "array"}, "type"),
        ({"$ref": "#"}, ""),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {
            "a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}}, ""),
    ],
)
def test_what_cannot_be_mended_is_refused_by_tool_and_path(schema: Json, param: str) -> None:
    error = refused(schema, is_tool=True)

    path = ".".join(filter(None, ["tools[3].function.parameters", param]))
    assert (error.status, error.param) == (400, path)
    assert path in error.message


def nested(levels: int, word: str) -> Json:
    schema: Json = {}
    for _ in range(levels):
        schema = {word: schema}
    return schema


@pytest.mark.parametrize("schema", [
    nested(5000, "items"), nested(500, "not"), {"const": nested(900, "a")},
    {"enum": list(range(200_000))}], ids=["items", "not", "const", "enum"])
def test_a_schema_that_is_too_deep_or_too_large_is_refused(schema: Json) -> None:
    assert refused(schema).status == 400


def test_a_schema_that_can_just_be_written_but_not_read_again_is_refused_too() -> None:
    """Which depth that is depends on the version of Python and on who calls."""
    schema = nested(850, "items")
    statuses = set()
    for _ in range(150):
        schema = {"items": schema}
        statuses.add(refused(schema).status)

    assert statuses == {400}


def test_a_pattern_that_never_ends_is_not_run() -> None:
    """It would hold up the whole server."""
    schema = {"type": "object", "properties": {"a" * 60: {}}, "patternProperties": {"(a*)*b": {}}}

    assert "patternProperties" not in for_model(schema).schema


# -- roots --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrapped"),
    [("root reference", False), ("root of parts", False), ("root of parts in conflict", True),
     ("root of alternatives", True), ("root of one of", True),
     ("root: enum of objects", False), ("zod 3: merged", False), ("zod 3: tree", False)],
)
def test_a_root_that_says_more_than_an_object_is_wrapped(name: str, wrapped: bool) -> None:
    [sample] = [sample for sample in corpus() if sample.name == name]

    assert for_model(sample.schema).wrapped == wrapped
    assert for_model(sample.schema, is_tool=True).wrapped == wrapped


def test_a_root_reference_with_a_title_is_joined() -> None:
    target = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}

    found = for_model({"title": "Answer", "description": "It.", "$ref": "#/definitions/A",
                  "definitions": {"A": {"title": "A", **target}}})

    assert not found.wrapped
    own = {key: value for key, value in found.schema.items() if key != "$defs"}
    assert own == {**target, "title": "Answer", "description": "It."}


# -- names --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ('{"value": {"a": [1, 2]}, "extra": 2}', {"a": [1, 2]}),
        ('{"value": "x", "extra": {"value": 3, "b": [4]}}', "x"),
        ('{"value": 1, "value": {"b": 2}}', 1),
    ],
)
def test_what_comes_after_a_wrapped_value_is_left_out(written: str, value: object) -> None:
    found = ocp.ModelSchema({}, wrapped=True)

    assert json.loads(as_client(found, written)) == value
    assert json.loads(as_client(found, *written)) == value


def test_a_name_that_the_api_refuses_is_told_by_another() -> None:
    found = for_model({
        "type": "object", "required": ["Account Number"], "properties": {
            "Account Number": {"description": "Which."}, "Account_Number": {}, "\u65e5": {},
            "gr\u00f6\u00dfe": {"enum": [{"Account Number": 1}]}, "__proto__": {}}})

    assert found.renamed == (
        ("Account_Number_2", "Account Number"), ("property", "\u65e5"),
        ("gro_e", "gr\u00f6\u00dfe"), ("proto", "__proto__"))
    assert found.schema["required"] == ["Account_Number_2"]
    assert found.schema["properties"]["gro_e"]["enum"] == [{"Account_Number_2": 1}]
    assert found.schema["properties"]["Account_Number_2"] == {
        "description": "Called 'Account Number'. Which."}


RENAMED = (("a_b", "a b"), ("q", '"q\\'), ("u", "\u00fc"))
MODEL = '{"a_b": {"\\u0061_b": [{"q": "a_b\\"}"}, "q"]}, "x\\\\": {}, "u" : "a_b:", "a_b2": null}'
CLIENT = {"a b": {"a b": [{'"q\\': 'a_b"}'}, "q"]}, "x\\": {}, "\u00fc": "a_b:", "a_b2": None}


def test_names_are_mapped_however_the_pieces_are_cut() -> None:
    found = ocp.ModelSchema({}, renamed=RENAMED)
    wrapped = found._replace(wrapped=True)
    whole = '{"value": ' + MODEL + "}"

    for at in range(len(MODEL) + 1):
        assert json.loads(as_client(found, MODEL[:at], MODEL[at:])) == CLIENT
    for at in range(len(whole) + 1):
        assert json.loads(as_client(wrapped, whole[:at], whole[at:])) == CLIENT
    assert json.loads(as_client(found, *MODEL)) == json.loads(as_client(wrapped, *whole)) == CLIENT


def test_values_are_passed_on_while_they_come_and_names_when_they_are_whole() -> None:
    form = ocp.ClientJsonConverter(wrapped=False, renamed=RENAMED)

    given = [form.feed(piece) for piece in ('{"a', '_b"', ':"once', ' upon', '"', "}")]

    assert given == ["{", '"a b"', ':"once', " upon", '"', "}"]


@pytest.mark.parametrize("text", ['{"id": 1, "value": 2}', "{}", '{"va', '"x"', "[1]"])
def test_arguments_that_are_not_wrapped_are_passed_on_as_they_are(text: str) -> None:
    assert as_client(ocp.ModelSchema({}, wrapped=True), *text) == text


# -- what claude took ---------------------------------------------------------

NAMED = (ocp.Tool("weather", "", {}), ocp.Tool("odd name", "", {}))


def init_line(*tools: str, status: str = "connected") -> Json:
    servers = [{"name": "client", "status": status}]
    return {
        "type": "system", "subtype": "init", "tools": list(tools), "mcp_servers": servers}


def test_a_tool_that_claude_does_not_offer_is_an_error_before_the_api_is_asked() -> None:
    reader = ocp.TurnReader(NAMED)

    with pytest.raises(ocp.BadRequest) as caught:
        reader.events(init_line("weather", "Bash"))

    assert caught.value.param == "tools" and "odd name" in caught.value.message


def test_an_answer_s_schema_that_claude_does_not_take_is_an_error() -> None:
    reader = ocp.TurnReader((), ocp.OutputSchema({}, wrapped=False))

    with pytest.raises(ocp.BadRequest) as caught:
        reader.events(init_line("Bash"))

    assert caught.value.param == "response_format"


def test_tools_that_claude_has_not_heard_of_yet_are_not_the_client_s_fault() -> None:
    with pytest.raises(ocp.UpstreamFailed):
        ocp.TurnReader(NAMED).events(init_line(status="pending"))


def test_more_tools_than_the_client_s_are_no_error() -> None:
    reader = ocp.TurnReader(NAMED, ocp.OutputSchema({}, wrapped=False))

    line = init_line("Bash", "weather", ocp.wire_name("odd name"), "StructuredOutput")
    assert reader.events(line) == []


@pytest.mark.parametrize("more", [{}, {"title": "City"}, {"title": "City", "description": "One."}])
def test_a_root_that_refers_to_a_definition_is_joined_whatever_it_is_called(more: Json) -> None:
    city = {"type": "object", "properties": {"name": {"type": "string"}}}

    found = for_model({"$ref": "#/definitions/City", "definitions": {"City": city}, **more})

    assert not found.wrapped
    assert {name: found.schema[name] for name in (*city, *more)} == {**city, **more}


def test_a_note_about_a_removed_keyword_is_short() -> None:
    schema = {"type": "string", "contentMediaType": "text/" + "x" * 1000}

    note = ocp.SchemaParser(schema, "schema").root["description"]

    assert len(note) == 300 + len("()") and note.endswith("...)")
