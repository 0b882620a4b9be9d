"""Custom tools: their input is a text, which claude writes as the one argument of a tool."""
from __future__ import annotations

import json
from typing import Any

import pytest

from project import load_script
from rendering import (
    STARTED,
    TEXT,
    USER,
    call,
    finished,
    frames,
    numbered,
    parsing,
    refusal_of,
    stream_bytes,
    whole,
)

ocp = load_script("ocp_server.py")

Json = dict[str, Any]

PATCH = '*** Begin Patch\n"caf\u00e9" \\ \U0001f600\t{"input": "x"}\n*** End Patch'
#: The same text as models write it: characters as they are, or as escapes.
WRITTEN = [
    json.dumps({"input": PATCH}),
    json.dumps({"input": PATCH}, ensure_ascii=False),
    '{ "input" : ' + json.dumps(PATCH) + ' }\n',
    '{"input":' + json.dumps(PATCH).replace("*", "\\u002A") + "}",
]
GRAMMAR = 'start: "a"+'


def custom_tool(dialect: Any, name: str = "patch", form: Json | None = None) -> Json:
    """The description of a custom tool; `form` is its format as responses have it."""
    if dialect is ocp.RESPONSES:
        more = {} if form is None else {"format": form}
        return {"type": "custom", "name": name, "description": "Edits files.", **more}
    if form is not None and form["type"] == "grammar":
        form = {"type": "grammar", "grammar": {k: v for k, v in form.items() if k != "type"}}
    more = {} if form is None else {"format": form}
    return {"type": "custom", "custom": {"name": name, "description": "Edits files.", **more}}


def turn(dialect: Any, **fields: Any) -> Any:
    """The Turn of a request with a custom tool."""
    field = "input" if dialect is ocp.RESPONSES else "messages"
    body = {field: [USER], "tools": [custom_tool(dialect)], **fields}
    return dialect.parse(body, parsing())


both = pytest.mark.parametrize("dialect", [ocp.CHAT, ocp.RESPONSES], ids=["chat", "responses"])


# -- the tool -----------------------------------------------------------------


@both
@pytest.mark.parametrize("form", [None, {"type": "text"}])
def test_a_custom_tool_is_told_as_one_with_a_text(dialect: Any, form: Json | None) -> None:
    found = turn(dialect, tools=[custom_tool(dialect, form=form)])

    [tool] = found.tools
    assert (tool.name, tool.description, found.ignored) == ("patch", "Edits files.", ())
    assert tool.schema["properties"]["input"]["type"] == "string"
    assert tool.schema["required"] == ["input"]


@both
@pytest.mark.parametrize(
    ("syntax", "said"), [("lark", "Lark grammar"), ("regex", "regular expression")]
)
def test_a_grammar_is_part_of_the_description(dialect: Any, syntax: str, said: str) -> None:
    form = {"type": "grammar", "syntax": syntax, "definition": GRAMMAR}

    [tool] = turn(dialect, tools=[custom_tool(dialect, form=form)]).tools

    assert tool.description.startswith("Edits files.\n\n")
    assert said in tool.description and tool.description.endswith(GRAMMAR)


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ({"type": "custom"}, "tools[0].name"),
        ({"type": "custom", "name": "x", "format": "text"}, "tools[0].format"),
        ({"type": "custom", "name": "x", "format": {"type": "json"}}, "tools[0].format.type"),
        ({"type": "custom", "name": "x", "format": {"type": "grammar", "definition": "a"}},
         "tools[0].format.syntax"),
        ({"type": "custom", "name": "x",
          "format": {"type": "grammar", "syntax": "ebnf", "definition": "a"}},
         "tools[0].format.syntax"),
        ({"type": "custom", "name": "x", "format": {"type": "grammar", "syntax": "lark"}},
         "tools[0].format.definition"),
    ],
    ids=str,
)
def test_a_custom_tool_that_is_wrong_is_refused_with_its_path(tool: Json, param: str) -> None:
    error = refusal_of(ocp.RESPONSES, {"input": "Hello", "tools": [tool]})

    assert (error.status, error.param) == (400, param)


def test_chat_names_the_path_within_its_own_form() -> None:
    tool = {"type": "custom", "custom": {"name": "x", "format": {"type": "grammar"}}}

    error = refusal_of(ocp.CHAT, {"messages": [USER], "tools": [tool]})

    assert error.param == "tools[0].custom.format.syntax"


@pytest.mark.parametrize(
    ("dialect", "choice"),
    [
        (ocp.CHAT, {"type": "custom", "custom": {"name": "patch"}}),
        (ocp.RESPONSES, {"type": "custom", "name": "patch"}),
    ],
    ids=["chat", "responses"],
)
def test_a_custom_tool_can_be_chosen_by_its_name(dialect: Any, choice: Json) -> None:
    assert turn(dialect, tool_choice=choice).tool_choice == ocp.ToolChoice("tool", "patch")


@pytest.mark.parametrize(
    ("dialect", "choice"),
    [
        (ocp.CHAT, {"type": "allowed_tools", "allowed_tools": {
            "mode": "required", "tools": [{"type": "custom", "custom": {"name": "patch"}}]}}),
        (ocp.RESPONSES, {"type": "allowed_tools", "mode": "required",
                         "tools": [{"type": "custom", "name": "patch"}]}),
    ],
    ids=["chat", "responses"],
)
def test_a_choice_may_be_limited_to_custom_tools(dialect: Any, choice: Json) -> None:
    tools = [custom_tool(dialect), custom_tool(dialect, "other")]

    found = turn(dialect, tools=tools, tool_choice=choice)

    assert [tool.name for tool in found.tools] == ["patch"]
    assert found.tool_choice == ocp.ToolChoice("any")


# -- the text in the arguments ------------------------------------------------


def read(*pieces: str) -> str:
    """The text that a reader gives for arguments in these pieces."""
    reader = ocp.FreeformReader()
    return "".join(reader.feed(piece) for piece in pieces) + str(reader.close())


@pytest.mark.parametrize("written", WRITTEN)
def test_the_text_is_the_same_wherever_the_arguments_are_cut(written: str) -> None:
    for at in range(len(written) + 1):
        assert read(written[:at], written[at:]) == PATCH
    assert read(*written) == PATCH


@pytest.mark.parametrize("written", WRITTEN)
def test_all_that_is_sure_of_the_text_is_given_at_once(written: str) -> None:
    reader = ocp.FreeformReader()

    given = [reader.feed(character) for character in written]

    # Escapes take up to twelve characters, those of a pair.
    assert all("".join(given[at:at + 12]) for at in range(12, len(given) - 24))


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (r'{"input": "\ud83d"}', "\ud83d"),
        (r'{"input": "\ud83d\ud83d\ude00"}', "\ud83d\U0001f600"),
        (r'{"input": "\ud83dx"}', "\ud83dx"),
        (r'{"input": "\ud83d\n"}', "\ud83d\n"),
        (r'{"input": "\ude00"}', "\ude00"),
        ('{"input": "two\nlines"}', "two\nlines"),
        ('{"input": ""}', ""),
        ("", ""),
        ("{}", ""),
        (' { } ', ""),
        ('{"input": "a", "more": 1}', "a"),
        (r'{"input": "a\qb"}', r"a\qb"),
    ],
)
def test_odd_texts_are_read_too(written: str, text: str) -> None:
    assert read(*written) == read(written) == text


@pytest.mark.parametrize(
    "written", ['{"input": 5}', '{"patch": "x"}', '"text"', "plain text", '{"input', "[1]"]
)
def test_arguments_of_another_form_are_given_as_they_are(written: str) -> None:
    assert read(*written) == read(written) == written


@pytest.mark.parametrize(
    ("arguments", "text"),
    [({"input": PATCH}, PATCH), ({}, ""), ({"patch": "x"}, '{"patch":"x"}'),
     ({"arguments": "no {JSON"}, "no {JSON")],
)
def test_whole_arguments_are_read_alike(arguments: Json, text: str) -> None:
    assert ocp.freeform_text(arguments) == text


def test_white_space_before_the_text_is_not_kept() -> None:
    reader = ocp.FreeformReader()
    for piece in ("{", *"\n " * 2_000, '"input"', *" " * 2_000, ":"):
        assert reader.feed(piece) == ""

    assert len(reader._buffer) < 20
    assert reader.feed('  "a  b') + reader.feed('  c"}') == "a  b  c"


# -- answers ------------------------------------------------------------------


def answered(*pieces: str, reason: str = "tool_use") -> list[Any]:
    """An answer that calls the tool with arguments in these pieces."""
    return numbered([STARTED, *TEXT, *call(2, "toolu1", "patch", *pieces), finished(reason)])


def halves(text: str) -> tuple[str, str]:
    return text[:len(text) // 2], text[len(text) // 2:]


@pytest.mark.parametrize("written", WRITTEN)
def test_chat_gives_the_call_back_as_one_of_a_custom_tool(written: str) -> None:
    body = whole(ocp.CHAT, turn(ocp.CHAT), answered(*halves(written)))

    [choice] = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"] == [
        {"id": "toolu1", "type": "custom", "custom": {"name": "patch", "input": PATCH}}]


@pytest.mark.parametrize("pieces", [halves(WRITTEN[0]), tuple(WRITTEN[0])], ids=["two", "many"])
def test_chat_streams_the_text_of_the_call(pieces: tuple[str, ...]) -> None:
    sent = stream_bytes(ocp.CHAT, turn(ocp.CHAT, stream=True), answered(*pieces))

    chunks = [data["choices"][0] for _, data in frames(sent) if data != "[DONE]"]
    calls = [each["delta"]["tool_calls"][0] for each in chunks if "tool_calls" in each["delta"]]
    assert calls[0] == {
        "index": 0, "id": "toolu1", "type": "custom", "custom": {"name": "patch", "input": ""}}
    assert "".join(each["custom"]["input"] for each in calls) == PATCH
    assert all(set(each) == {"index", "custom"} for each in calls[1:])
    assert chunks[-1]["finish_reason"] == "tool_calls"


def test_chat_streams_calls_of_both_kinds_side_by_side() -> None:
    function = {"type": "function", "function": {"name": "clock"}}
    asked = turn(ocp.CHAT, stream=True, tools=[custom_tool(ocp.CHAT), function])
    events = numbered([STARTED, *call(0, "a", "clock"), *call(1, "b", "patch", '{"input":"x"}'),
                       *call(2, "c", "patch", "plain"), finished("tool_use")])

    sent = stream_bytes(ocp.CHAT, asked, events)

    found: dict[int, str] = {}
    for _, data in frames(sent):
        for part in data["choices"][0]["delta"].get("tool_calls", []) if data != "[DONE]" else []:
            text = part.get("function", {}).get("arguments") or part.get("custom", {}).get("input")
            found[part["index"]] = found.get(part["index"], "") + (text or "")
    assert found == {0: "{}", 1: "x", 2: "plain"}


def test_responses_give_the_call_back_as_an_item_of_its_own() -> None:
    body = whole(ocp.RESPONSES, turn(ocp.RESPONSES), answered(*halves(WRITTEN[0])))

    item = body["output"][1]
    assert item.pop("id").startswith("ctc_")
    assert item == {"type": "custom_tool_call", "status": "completed", "call_id": "toolu1",
                    "name": "patch", "input": PATCH}


@pytest.mark.parametrize("written", [*WRITTEN, '{"patch":"x"}', "no JSON", "{}"])
def test_responses_stream_the_text_of_the_call(written: str) -> None:
    sent = stream_bytes(ocp.RESPONSES, turn(ocp.RESPONSES, stream=True), answered(*written))

    text = read(written)
    found = [(kind, data) for kind, data in frames(sent) if data.get("output_index") == 1]
    kinds = [kind for kind, _ in found]
    deltas = [data["delta"] for kind, data in found if kind.endswith("input.delta")]
    assert kinds[0] == "response.output_item.added"
    assert found[0][1]["item"]["input"] == "" and found[0][1]["item"]["status"] == "in_progress"
    assert set(kinds[1:-2]) <= {"response.custom_tool_call_input.delta"}
    assert kinds[-2:] == ["response.custom_tool_call_input.done", "response.output_item.done"]
    assert "".join(deltas) == found[-2][1]["input"] == found[-1][1]["item"]["input"] == text
    assert frames(sent)[-1][1]["response"]["output"][1] == found[-1][1]["item"]


def test_a_call_of_a_custom_tool_that_was_cut_off_is_never_done() -> None:
    events = answered('{"input": "half', reason="max_tokens")

    sent = stream_bytes(ocp.RESPONSES, turn(ocp.RESPONSES, stream=True), events)
    body = whole(ocp.RESPONSES, turn(ocp.RESPONSES), events)

    assert b"custom_tool_call_input.done" not in sent
    assert [item["type"] for item in body["output"]] == ["message"]


def test_a_custom_tool_of_a_namespace_is_named_with_it() -> None:
    group = {"type": "namespace", "name": "mcp__files", "tools": [custom_tool(ocp.RESPONSES)]}
    asked = turn(ocp.RESPONSES, tools=[group])
    events = numbered([STARTED, *call(0, "t1", "mcp__files__patch", '{"input":"x"}'),
                       finished("tool_use")])

    [item] = whole(ocp.RESPONSES, asked, events)["output"]

    assert (item["type"], item["namespace"], item["name"], item["input"]) == (
        "custom_tool_call", "mcp__files", "patch", "x")


# -- the history --------------------------------------------------------------

CHAT_HISTORY = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "call_1", "type": "custom", "custom": {"name": "patch", "input": PATCH}}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "Done."},
]
ITEMS = [
    USER,
    {"type": "custom_tool_call", "id": "ctc_1", "call_id": "call_1", "name": "patch",
     "input": PATCH},
    {"type": "custom_tool_call_output", "call_id": "call_1", "output": "Done."},
]


@pytest.mark.parametrize(
    ("dialect", "fields"),
    [(ocp.CHAT, {"messages": CHAT_HISTORY}), (ocp.RESPONSES, {"input": ITEMS})],
    ids=["chat", "responses"],
)
def test_a_call_comes_back_with_the_arguments_that_claude_wrote(
    dialect: Any, fields: Json
) -> None:
    found = turn(dialect, **fields)

    use = {"type": "tool_use", "id": "call1", "name": "patch", "input": {"input": PATCH}}
    result = {"type": "tool_result", "tool_use_id": "call1",
              "content": [{"type": "text", "text": "Done."}]}
    assert found.messages[1:] == [ocp.Message("assistant", [use]), ocp.Message("user", [result])]
    assert (found.ignored, found.adjusted) == ((), ())


def test_the_output_of_a_custom_tool_may_be_parts() -> None:
    output = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]

    found = turn(ocp.RESPONSES, input=[*ITEMS[:2], {**ITEMS[2], "output": output}])

    assert [part["text"] for part in found.messages[2].content[0]["content"]] == ["a", "b"]
