"""The client's tools: from its request to claude and back. No server, no processes."""
from __future__ import annotations

import json
from typing import Any

import pytest

from claude_lines import START, lines_of, stream
from project import TRANSCRIPTS, load_script
from rendering import PNG, USER, block, parsing, refusal_of, steps_for, stream_bytes, whole

ocp = load_script("ocp_server.py")

Json = dict[str, Any]

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def function(name: str = "weather", **fields: object) -> Json:
    """A tool as chat completions have it."""
    return {"type": "function", "function": {"name": name, **fields}}


TOOLS = [function("weather", description="Tells it.", parameters=SCHEMA), function("clock")]


def turn(*messages: object, **fields: object) -> Any:
    """The Turn of a chat request with these messages, or with one from the user."""
    return ocp.CHAT.parse({"messages": list(messages) or [USER], **fields}, parsing())


def refusal(*messages: object, **fields: object) -> Any:
    """The error of such a request."""
    return refusal_of(ocp.CHAT, {"messages": list(messages) or [USER], **fields})


def names(found: Any) -> list[str]:
    return [tool.name for tool in found.tools]


# -- tools --------------------------------------------------------------------


def test_a_tool_is_a_name_a_description_and_a_schema() -> None:
    weather, clock = turn(tools=TOOLS).tools

    assert weather == ocp.Tool("weather", "Tells it.", SCHEMA)
    assert clock == ocp.Tool("clock", "", {"type": "object", "properties": {}})


@pytest.mark.parametrize(
    ("schema", "sent"),
    [
        ({}, {"type": "object", "properties": {}}),
        (None, {"type": "object", "properties": {}}),
        ({"type": "object"}, {"type": "object", "properties": {}}),
        ({"type": ["object", "null"], "properties": {"a": {}}},
         {"type": "object", "properties": {"a": {}}}),
        ({"$defs": {"a": {}}, "strict": True}, {"type": "object", "properties": {}}),
        ({"properties": None, "required": None, "description": None},
         {"type": "object", "properties": {}}),
        ({"properties": {"any": True, "none": False, "null": None}, "required": ["any"]},
         {"type": "object", "properties": {"any": {}, "none": {"not": {}}, "null": {}},
          "required": ["any"]}),
    ],
    ids=str,
)
def test_the_schema_of_a_tool_is_an_object_s(schema: object, sent: Json) -> None:
    [tool] = turn(tools=[function(parameters=schema)]).tools

    assert tool.schema == sent


def test_the_client_s_own_schema_is_left_alone() -> None:
    schema = {"type": ["object", "null"]}

    turn(tools=[function(parameters=schema)])

    assert schema == {"type": ["object", "null"]}


def test_tools_may_be_described_as_anthropic_does() -> None:
    found = turn(tools=[
        {"name": "weather", "description": "Tells it.", "input_schema": SCHEMA},
        {"type": "custom", "name": "clock", "input_schema": {"type": "object"}},
        {"type": "function", "name": "news", "parameters": SCHEMA},
        {"type": "bash_20250124", "name": "bash"}], tool_choice={"type": "auto"})

    assert found.tools == (
        ocp.Tool("weather", "Tells it.", SCHEMA),
        ocp.Tool("clock", "", {"type": "object", "properties": {}}),
        ocp.Tool("news", "", SCHEMA))
    assert (found.ignored, found.tool_choice) == (("tools[3]",), ocp.ToolChoice())


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [({"type": "any"}, ("any",)), ({"type": "none"}, ("none",)),
     ({"type": "tool", "name": "clock"}, ("tool", "clock"))],
)
def test_a_tool_may_be_chosen_as_anthropic_does(choice: Json, wanted: tuple[str, ...]) -> None:
    assert turn(tools=TOOLS, tool_choice=choice).tool_choice == ocp.ToolChoice(*wanted)


def test_legacy_functions_are_tools_too() -> None:
    found = turn(functions=[{"name": "clock", "parameters": SCHEMA}])

    assert found.tools == (ocp.Tool("clock", "", SCHEMA),)
    assert found.reply_format.has_functions is True


@pytest.mark.parametrize("functions", [[], [{"name": "clock"}], [{"name": "other"}]], ids=str)
def test_beside_tools_functions_do_not_bring_the_old_shape_back(functions: Json) -> None:
    found = turn(tools=TOOLS, functions=functions)

    assert names(found)[:2] == ["weather", "clock"]
    assert (found.reply_format.has_functions, found.tool_choice.parallel) == (False, True)


def test_two_tools_that_are_equal_are_one() -> None:
    assert names(turn(tools=[*TOOLS, TOOLS[0]])) == ["weather", "clock"]


@pytest.mark.parametrize(
    "choice",
    [{"type": "file_search"}, {"type": "mcp", "server_label": "x"}],
    ids=str,
)
def test_a_choice_of_what_nobody_runs_here_is_auto_and_named(choice: Json) -> None:
    found = turn(tools=TOOLS, tool_choice=choice)

    assert (found.tool_choice, found.ignored) == (ocp.ToolChoice(), ("tool_choice",))


def test_any_is_another_word_for_required() -> None:
    assert turn(tools=TOOLS, tool_choice="any").tool_choice == ocp.ToolChoice("any")


def test_tools_of_unknown_types_are_named_as_ignored_and_left_out() -> None:
    found = turn(tools=[{"type": "web_search"}, *TOOLS, {"type": "mcp", "name": "x"}])

    assert names(found) == ["weather", "clock"]
    assert found.ignored == ("tools[0]", "tools[3]")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": 7}]}, "tools[0].function"),
        ({"tools": [{"type": 7, "function": {}}]}, "tools[0].type"),
        ({"tools": [function("")]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [function(description=7)]}, "tools[0].function.description"),
        ({"tools": [function(parameters=[7])]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters={"properties": [7]})]},
         "tools[0].function.parameters.properties"),
        ({"tools": [function(parameters={"properties": {"a": 7}})]},
         "tools[0].function.parameters.properties.a"),
        ({"tools": [function(parameters={"required": {}})]},
         "tools[0].function.parameters.required"),
        ({"tools": [function(parameters={"required": [7]})]},
         "tools[0].function.parameters.required"),
        ({"tools": [*TOOLS, function(description="Other.")]}, "tools"),
        ({"tools": TOOLS, "functions": [{"name": "clock", "description": "Other."}]}, "tools"),
        ({"functions": [{"name": 7}]}, "functions[0].name"),
    ],
)
def test_a_tool_that_is_wrong_is_refused_with_its_path(fields: Json, param: str) -> None:
    error = refusal(**fields)

    assert (error.status, error.param) == (400, param)


# -- which tool to call -------------------------------------------------------


def allowed(mode: object, *chosen: str, wrapped: bool = True) -> Json:
    """A choice among some of the tools, in both forms that OpenAI has."""
    entry = {"mode": mode, "tools": [function(name) for name in chosen]}
    return {"type": "allowed_tools", **({"allowed_tools": entry} if wrapped else entry)}


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        (None, ("auto", "")),
        ("auto", ("auto", "")),
        ("none", ("none", "")),
        ("required", ("any", "")),
        (function("clock"), ("tool", "clock")),
        ({"type": "function", "name": "clock"}, ("tool", "clock")),
        (allowed("auto", "weather", "clock"), ("auto", "")),
        (allowed("required", "weather", "clock"), ("any", "")),
        (allowed(None, "weather", "clock", wrapped=False), ("auto", "")),
    ],
    ids=str,
)
@pytest.mark.parametrize("parallel", [True, False])
def test_a_choice_has_its_kind_and_its_tool(
    choice: object, wanted: tuple[str, str], parallel: bool
) -> None:
    found = turn(tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel)

    assert found.tool_choice == ocp.ToolChoice(*wanted, parallel=parallel)
    assert names(found) == ["weather", "clock"]


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_choice_may_leave_only_some_of_the_tools(wrapped: bool) -> None:
    found = turn(tools=TOOLS, tool_choice=allowed("required", "clock", "gone", wrapped=wrapped))

    assert names(found) == ["clock"]
    assert found.tool_choice == ocp.ToolChoice("any")


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [("auto", ("auto", "")), ("none", ("none", "")), ({"name": "clock"}, ("tool", "clock"))],
)
def test_a_legacy_function_may_be_chosen(choice: object, wanted: tuple[str, str]) -> None:
    found = turn(functions=[{"name": "clock"}], function_call=choice)

    assert (found.tool_choice.kind, found.tool_choice.name) == wanted


@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_without_tools_there_is_nothing_to_choose(choice: object) -> None:
    found = turn(tool_choice=choice, parallel_tool_calls=False)

    assert (found.tools, found.tool_choice) == ((), ocp.ToolChoice())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": function("clock")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": function("gone")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": function("web_search")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("auto", "web_search", "gone")},
         "tool_choice.allowed_tools.tools[0]"),
        ({"tools": TOOLS, "tool_choice": allowed("required", "gone")},
         "tool_choice.allowed_tools.tools[0]"),
        ({"tools": TOOLS, "tool_choice": "most"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": 7}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}},
         "tool_choice.function.name"),
        ({"tools": TOOLS, "tool_choice": allowed("all", "clock")},
         "tool_choice.allowed_tools.mode"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(fields: Json, param: str) -> None:
    error = refusal(**fields)

    assert (error.status, error.param) == (400, param)


def test_a_forced_call_turns_thinking_off_for_the_api_refuses_both() -> None:
    model = "claude-opus-4-8"
    forced = turn(model=model, tools=TOOLS, tool_choice="required", reasoning_effort="high")
    free = turn(model=model, tools=TOOLS, reasoning_effort="high")

    assert (forced.options.thinking_tokens, free.options.thinking_tokens) == (0, None)


# -- calls and their results --------------------------------------------------


def calling(*call_ids: str, arguments: str = '{"city": "Paris"}', **fields: object) -> Json:
    """An earlier answer that calls a tool once for each id."""
    calls = [
        {"id": call_id, "type": "function",
         "function": {"name": "weather", "arguments": arguments}}
        for call_id in call_ids
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls, **fields}


def result(call_id: str, content: object = "Sunny.") -> Json:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def last(found: Any) -> list[Json]:
    """The content of a Turn's last message."""
    blocks: list[Json] = found.messages[-1].content
    return blocks


def tool_result(call_id: str, *content: Json) -> Json:
    return {"type": "tool_result", "tool_use_id": call_id, "content": list(content)}


def test_a_call_and_its_result_become_blocks() -> None:
    found = turn(USER, calling("c1", content="Let me look."), result("c1"))

    use = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Paris"}}
    assert found.messages[1] == ocp.Message("assistant", [block("Let me look."), use])
    assert found.messages[2] == ocp.Message("user", [tool_result("c1", block("Sunny."))])


def test_calls_and_results_may_be_blocks_as_anthropic_has_them() -> None:
    use = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}}
    image = {"type": "base64", "media_type": "image/png", "data": PNG.split(",")[1]}
    given = {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True,
             "content": [block("Rain."), {"type": "image", "source": image}]}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}

    found = turn(
        USER, {"role": "assistant", "content": [thought, block("I look."), use]},
        {"role": "user", "content": [given, block("So?")]}, system=[block("Be kind.")])

    assert found.system == "Be kind."
    assert found.messages[1:] == [
        ocp.Message("assistant", [block("I look."), {**use, "id": "toolu1"}]),
        ocp.Message("user", [{**given, "tool_use_id": "toolu1"}, block("So?")]),
    ]


@pytest.mark.parametrize(
    ("role", "kind"), [("user", "tool_use"), ("assistant", "tool_result")]
)
def test_such_a_block_of_the_other_s_is_refused(role: str, kind: str) -> None:
    error = refusal(USER, {"role": role, "content": [{"type": kind}]})

    assert (error.status, error.param) == (400, "messages[1].content[0].type")


def test_results_stand_first_and_in_the_order_of_their_calls() -> None:
    found = turn(
        USER, calling("c1", "c2", "c3"), result("c3", "3"), {"role": "user", "content": "So?"},
        result("c1", "1"), result("c2", "2"),
    )

    assert last(found) == [
        tool_result("c1", block("1")), tool_result("c2", block("2")),
        tool_result("c3", block("3")), block("So?"),
    ]


def test_two_results_of_one_call_are_told_as_one() -> None:
    found = turn(USER, calling("c1"), result("c1", "old"), result("c1", "new"))

    assert last(found) == [tool_result("c1", block("old"), block("new"))]
    assert found.adjusted == (("repeated_tool_result", 1),)


def test_a_result_may_be_an_image_or_nothing_at_all() -> None:
    picture = {"type": "image_url", "image_url": {"url": PNG}}

    found = turn(USER, calling("c1", "c2"), result("c1", [picture]), result("c2", ""))

    assert [part["type"] for part in last(found)[0]["content"]] == ["image"]
    assert last(found)[1] == tool_result("c2")


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ('{"a": 1}', {"a": 1}), ("", {}), ("{}", {}), ("[1]", {"arguments": "[1]"}),
        ('{"a"', {"arguments": '{"a"'}), ("null", {"arguments": "null"}),
        ('{"a": NaN}', {"arguments": '{"a": NaN}'}), ({"a": 1}, {"a": 1}), ([], {}), (None, {}),
        (7, {"arguments": "7"}), (["a"], {"arguments": '["a"]'}),
    ],
)
def test_arguments_of_earlier_calls_are_kept_whatever_they_are(sent: str, kept: Json) -> None:
    found = turn(USER, calling("c1", arguments=sent), result("c1"))

    assert found.messages[1].content[0]["input"] == kept


def named_calls(call_id: str, *tools: str) -> Json:
    """An earlier answer that calls these tools under one id."""
    calls = [{"id": call_id, "name": tool, "arguments": "{}"} for tool in tools]
    return {"role": "assistant", "tool_calls": calls}


@pytest.mark.parametrize(("call_id", "result_id"), [("", ""), ("call", ""), ("call", "call")])
@pytest.mark.parametrize("role", ["tool", "function"])
def test_of_equal_ids_the_call_of_the_named_tool_gets_the_result(
    call_id: str, result_id: str, role: str
) -> None:
    results = [{"role": role, "tool_call_id": result_id, "name": name, "content": text}
               for name, text in (("b", "B"), ("a", "A"), ("gone", "C"))]

    found = turn(USER, named_calls(call_id, "a", "b", "c"), *results)

    assert [each["content"] for each in last(found)] == [[block("A")], [block("B")], [block("C")]]
    assert all("name" not in each for each in last(found))


@pytest.mark.parametrize(
    "said",
    [
        {"content": [{"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}}],
         "tool_calls": [{"id": "toolu1", "function": {"name": "weather", "arguments": "{}"}}]},
        {"tool_calls": [{"id": "toolu1", "function": {"name": "weather", "arguments": "{}"}}],
         "function_call": {"name": "weather", "arguments": "{}"}},
        {"content": [{"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}}],
         "function_call": {"name": "weather", "arguments": "{}"}},
    ],
    ids=["blocks", "legacy", "blocks and legacy"],
)
def test_a_call_that_is_written_in_two_forms_is_one(said: Json) -> None:
    found = turn(USER, {"role": "assistant", **said}, result("toolu1"))

    assert [each["type"] for each in found.messages[1].content] == ["tool_use"]
    assert last(found) == [tool_result("toolu1", block("Sunny."))]
    assert found.adjusted == ()


@pytest.mark.parametrize(
    "output",
    [
        {"type": "error", "message": "boom"},
        [{"type": "dir", "name": "src"}, {"type": "file", "name": "a.txt"}],
        [{"type": "resource", "resource": {"uri": "a", "text": "HELLO"}}],
        {"type": "text", "value": "v"},
        {"type": "tool_use", "name": "a"},
        {"type": ["a"]},
        ["a", "b"],
    ],
    ids=str,
)
def test_an_output_that_only_looks_like_parts_is_told_as_json(output: object) -> None:
    told = json.dumps(output, separators=(",", ":"))

    assert last(turn(USER, calling("c1"), result("c1", output))) == [
        tool_result("c1", block(told))]


def test_data_beside_parts_is_told_as_json_in_its_place() -> None:
    image = {"type": "image", "data": PNG.split(",")[1], "mimeType": "image/png"}

    found = last(turn(USER, calling("c1"), result("c1", [
        block("a"), {"type": "dir", "name": "src"}, image])))

    source = {"type": "base64", "media_type": "image/png", "data": image["data"]}
    assert found == [tool_result(
        "c1", block("a"), block('{"type":"dir","name":"src"}'),
        {"type": "image", "source": source})]


def test_parameters_may_come_as_json_text() -> None:
    found = turn(tools=[function(parameters=json.dumps(SCHEMA)), function("b", parameters="")])

    assert [tool.schema for tool in found.tools] == [
        SCHEMA, {"type": "object", "properties": {}}]


@pytest.mark.parametrize("kind", ["auto", "any", "tool"])
def test_a_choice_in_anthropic_s_form_may_ask_for_one_call(kind: str) -> None:
    choice = {"type": kind, "name": "weather", "disable_parallel_tool_use": True}

    assert not turn(tools=TOOLS, tool_choice=choice).tool_choice.parallel


def test_a_legacy_call_and_its_result_find_each_other_without_an_id() -> None:
    legacy = {"role": "assistant", "function_call": {"name": "clock", "arguments": "{}"}}
    answered = {"role": "function", "name": "clock", "content": "Noon."}

    found = turn(USER, legacy, answered, {"role": "assistant", "content": "ok"}, USER, legacy,
                 answered)

    uses = [part for m in found.messages for part in m.content if part["type"] == "tool_use"]
    results = [part for m in found.messages for part in m.content if part["type"] == "tool_result"]
    assert [use["id"] for use in uses] == [part["tool_use_id"] for part in results]
    assert len({use["id"] for use in uses}) == 2


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([USER, calling("c1"), result("c1"), result("c9"), result("c8")], "the id 'c9'"),
        ([result("c1")], "the id 'c1'"),
        ([result("c1"), calling("c1"), USER], "the id 'c1'"),
        ([{"role": "function", "name": "clock", "content": "Noon."}], "the id ''"),
    ],
)
def test_a_result_without_a_call_before_it_is_refused(messages: list[Json], words: str) -> None:
    error = refusal(*messages)

    assert (error.status, error.param) == (400, "messages")
    assert words in error.message


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "tool", "tool_call_id": 7, "content": "x"}], "messages[0].tool_call_id"),
        ([{"role": "tool", "content": "x"}], "messages"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": "c1"}]}],
         "messages[1].tool_calls[0].function"),
        ([USER, {"role": "assistant", "tool_calls": {}}], "messages[1].tool_calls"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": "c1", "function": {}}]}],
         "messages[1].tool_calls[0].function.name"),
    ],
)
def test_a_call_or_result_that_is_wrong_is_refused_with_its_path(
    messages: list[Json], param: str
) -> None:
    error = refusal(*messages)

    assert (error.status, error.param) == (400, param)


# -- names and ids ------------------------------------------------------------


@pytest.mark.parametrize(
    ("call_id", "plain"),
    [("toolu_01-aB", "toolu01aB"), ("c1", "c1"), ("call_\u00e9:1", "call1"), ("", "")],
)
def test_an_id_is_letters_and_digits(call_id: str, plain: str) -> None:
    assert ocp.plain_id(call_id) == plain


@pytest.mark.parametrize("given", ["toolu_01-aB", "toolu01aB", "toolu_01aB"])
def test_a_client_may_give_an_id_back_without_what_is_no_letter(given: str) -> None:
    found = turn(USER, calling("toolu_01-aB"), result(given))

    assert last(found)[0]["tool_use_id"] == "toolu01aB"


USUAL_NAMES = ("weather", "get_weather-2", "A" * 64)
UNUSUAL_NAMES = (
    "mcp.server/tool", "caf\u00e9", "two words", "A" * 65, "", "a.b", "a_b.", "StructuredOutput",
    "\ud83d", "\u5929\u6c17", "\u5929\u6c18",
)


@pytest.mark.parametrize("name", USUAL_NAMES)
def test_a_name_that_the_api_takes_is_left_alone(name: str) -> None:
    assert ocp.wire_name(name) == name


@pytest.mark.parametrize("name", UNUSUAL_NAMES)
def test_any_other_name_gets_one_that_the_api_takes(name: str) -> None:
    found = ocp.wire_name(name)

    assert 1 <= len(found) <= 64
    assert found.replace("_", "").replace("-", "").isalnum() and found.isascii()
    assert ocp.wire_name(found) == found != name


def test_no_two_names_become_one() -> None:
    every = [*USUAL_NAMES, *UNUSUAL_NAMES, "a/b", "a b", "a_b"]

    assert len({ocp.wire_name(name) for name in every}) == len(every)


@pytest.mark.parametrize("name", [*USUAL_NAMES, *UNUSUAL_NAMES[:-3]])
def test_a_call_comes_back_under_the_name_that_the_client_gave(name: str) -> None:
    reader = ocp.TurnReader((ocp.Tool(name, "", {}),))

    [began] = reader.events(block_start(ocp.wire_name(name)))

    assert began.block == {"type": "tool_use", "id": "toolu1", "name": name, "input": {}}


# -- the tool server ----------------------------------------------------------


def block_start(name: str, index: int = 0, call_id: str = "toolu_1") -> Json:
    use = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
    return stream("content_block_start", index=index, content_block=use)


def piece(text: str, index: int = 0) -> Json:
    delta = {"type": "input_json_delta", "partial_json": text}
    return stream("content_block_delta", index=index, delta=delta)


def mcp(method: str, request_id: str = "r1", **fields: object) -> Json:
    """A control request of claude's that carries a message to the tool server."""
    message = {"method": method, **fields}
    request = {"subtype": "mcp_message", "server_name": "client", "message": message}
    return {"type": "control_request", "request_id": request_id, "request": request}


def asked(call_id: str, number: int) -> Json:
    """claude's request to run a tool."""
    params = {"name": "weather", "arguments": {}, "_meta": {"claudecode/toolUseId": call_id}}
    return mcp("tools/call", f"r{number}", id=number, params=params)


def replies(data: bytes) -> list[tuple[str, Json]]:
    """(request_id, MCP message) of each reply."""
    found = [line["response"] for line in lines_of(data)]
    assert all(reply["subtype"] == "success" for reply in found)
    return [(reply["request_id"], reply["response"]["mcp_response"]) for reply in found]


def server(*tool_names: str) -> Any:
    return ocp.ToolServer(tuple(ocp.Tool(name, f"Does {name}.", SCHEMA) for name in tool_names))


def test_the_server_greets_in_the_version_that_claude_speaks() -> None:
    [(request_id, reply)] = replies(
        server().reply(mcp("initialize", id=0, params={"protocolVersion": "2025-11-25"}))
    )

    assert (request_id, reply["id"]) == ("r1", 0)
    assert reply["result"]["protocolVersion"] == "2025-11-25"
    assert reply["result"]["capabilities"] == {"tools": {}}
    assert reply["result"]["serverInfo"]["name"] == "client"


def test_the_server_lists_the_tools_under_names_that_the_api_takes() -> None:
    [(_, reply)] = replies(server("weather", "a.b").reply(mcp("tools/list", id=1)))

    meta = {"_meta": {"anthropic/maxResultSizeChars": ocp.MAX_RESULT_CHARS}}
    rest = {"inputSchema": SCHEMA, **meta}
    assert reply["result"]["tools"] == [
        {"name": "weather", "description": "Does weather.", **rest},
        {"name": ocp.wire_name("a.b"), "description": "Does a.b.", **rest},
    ]


@pytest.mark.parametrize("method", ["notifications/initialized", "ping"])
def test_what_needs_no_answer_gets_an_empty_one(method: str) -> None:
    [(_, reply)] = replies(server().reply(mcp(method)))

    assert reply == {"jsonrpc": "2.0", "id": 0, "result": {}}


@pytest.mark.parametrize("method", ["resources/list", "prompts/list", "", 7])
def test_what_is_not_served_is_refused_as_mcp_does_it(method: Any) -> None:
    [(_, reply)] = replies(server().reply(mcp(method, id=5)))

    assert (reply["id"], reply["error"]["code"]) == (5, -32601)


@pytest.mark.parametrize("request_", [None, 7, {}, {"subtype": "can_use_tool"}, {"message": 7}])
def test_any_other_request_is_refused_by_its_id(request_: object) -> None:
    [line] = lines_of(server().reply({"request_id": "abc", "request": request_}))

    assert (line["response"]["subtype"], line["response"]["request_id"]) == ("error", "abc")


def test_a_call_waits_for_its_result() -> None:
    tools = server("weather")

    assert tools.reply(asked("toolu_1", 1)) == b""
    [(request_id, reply)] = replies(tools.deliver([tool_result("toolu1", block("Sunny."))]))

    assert (request_id, reply["id"]) == ("r1", 1)
    assert reply["result"] == {"content": [block("Sunny.")], "isError": False}


def test_results_may_come_before_their_calls() -> None:
    tools = server("weather")
    results = [tool_result("toolu1", block("1")), tool_result("toolu2", block("2"))]

    told = tools.reply(asked("toolu_1", 1)) + tools.deliver(results)
    later = tools.reply(asked("toolu_2", 2))

    assert [request_id for request_id, _ in replies(told)] == ["r1"]
    assert replies(later)[0][1]["result"]["content"] == [block("2")]


def test_a_result_is_given_once() -> None:
    tools = server("weather")
    tools.reply(asked("toolu_1", 1))
    tools.deliver([tool_result("toolu1", block("1"))])

    assert tools.deliver([]) == tools.reply(asked("toolu_1", 2)) == b""


def test_a_call_that_claude_takes_back_gets_no_result() -> None:
    tools = server("weather")
    tools.reply(asked("toolu_1", 1))
    cancelled = mcp("notifications/cancelled", params={"requestId": 1})

    assert [reply["result"] for _, reply in replies(tools.reply(cancelled))] == [{}]
    assert tools.deliver([tool_result("toolu1", block("1"))]) == b""


def test_a_failed_tool_is_told_as_one() -> None:
    tools = server("weather")
    tools.reply(asked("toolu_1", 1))

    [(_, reply)] = replies(tools.deliver([{**tool_result("toolu1"), "is_error": True}]))

    assert reply["result"] == {"content": [block("(no output)")], "isError": True}


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aaaa"}}


@pytest.mark.parametrize(
    ("blocks", "content"),
    [
        ([], [block("(no output)")]),
        ([block("a"), block("b")], [block("a"), block("b")]),
        ([IMAGE], [{"type": "image", "data": "aaaa", "mimeType": "image/png"}]),
        ([{"type": "image", "source": {"type": "url", "url": "https://a"}}], None),
        ([block("a"), {"type": "document", "source": {}}], None),
    ],
)
def test_a_result_has_its_form_in_mcp_or_none(blocks: list[Json], content: Any) -> None:
    assert ocp.mcp_content(tool_result("c1", *blocks)) == content


@pytest.mark.parametrize(("blocks", "told"), [
    ([block(" a\n")], "a"), ([block("a"), block("b")], "a\nb"), ([], "(no output)"),
    ([block("x" * 10_000)], "x" * 10_000), ([block("x" * 10_001)], None),
    ([block("\U0001f642" * 5_001)], None), ([block("a"), IMAGE], None)])
def test_a_failed_call_is_given_or_told_the_one_text_that_claude_makes_of_it(
    blocks: list[Json], told: str | None
) -> None:
    failed = {**tool_result("toolu01a", *blocks), "is_error": True}
    [line] = lines_of(ocp.message_line(ocp.Message("user", [failed]), (2, 1, 329), ask=True))
    [found] = line["message"]["content"]

    assert ocp.mcp_content(failed) == (None if told is None else [block(told)])
    # What claude would shorten is told whole, which another process can be.
    assert (found["content"], found["is_error"], found["tool_use_id"]) == (
        blocks if told is None else told, True, "toolu_01a")



# -- what is written about tools ----------------------------------------------


def settings(choice: Any) -> Any:
    """The body that this choice adds to each request to the API."""
    [line] = lines_of(ocp.settings_lines(ocp.Options(), choice))
    body = line["request"]["settings"]["env"]["CLAUDE_CODE_EXTRA_BODY"]
    return json.loads(body)["tool_choice"]


@pytest.mark.parametrize(
    ("choice", "body"),
    [
        (("none", "", True), {"type": "none"}),
        (("none", "", False), {"type": "none"}),
        (("any", "", True), {"type": "any"}),
        (("auto", "", False), {"type": "auto", "disable_parallel_tool_use": True}),
        (("tool", "clock", True), {"type": "tool", "name": "clock"}),
        (("tool", "a.b", False), {"type": "tool", "name": ocp.wire_name("a.b"),
                                  "disable_parallel_tool_use": True}),
    ],
)
def test_a_choice_is_told_to_the_api(choice: tuple[str, str, bool], body: Json) -> None:
    assert settings(ocp.ToolChoice(*choice)) == body


def test_the_server_is_announced_only_where_there_are_tools() -> None:
    [first], [second] = (
        steps_for(turn(**fields), "", (2, 1, 329)) for fields in ({"tools": TOOLS}, {})
    )

    assert lines_of(first)[0]["request"]["sdkMcpServers"] == ["client"]
    assert "sdkMcpServers" not in lines_of(second)[0]["request"]


OWN = (ocp.Tool("openclaw_cli", "Own.", {"type": "object"}),)


@pytest.mark.parametrize(("tools", "wanted"), [
    ((), ["server"]), ((ocp.Tool("clock", "", {"type": "object"}),), ["client", "server"]),
])
def test_own_tools_are_a_server_of_their_own_also_in_a_process_that_was_primed(
    tools: Any, wanted: list[str]
) -> None:
    asked = turn()._replace(tools=tools, own_tools=OWN)

    first, *_ = lines_of(ocp.setup_lines(asked, ""))
    primed, *_ = lines_of(ocp.setup_lines(asked, "", is_primed=True))

    assert first["request"]["sdkMcpServers"] == wanted
    assert primed["request"] == {"subtype": "mcp_set_servers", "servers": {
        name: {"type": "sdk", "name": name} for name in wanted}}


def test_own_tools_are_among_those_that_go_to_the_api_unchanged() -> None:
    tools = (ocp.Tool("openclaw_cli", "Gr\u00fc\u00dfe.", {"type": "object"}),
             ocp.Tool("a", "b", {"type": "object"}))

    asked = turn()._replace(tools=tools, own_tools=OWN)
    lines = lines_of(ocp.setup_lines(asked, ""))

    extra = json.loads(lines[-1]["request"]["settings"]["env"]["CLAUDE_CODE_EXTRA_BODY"])
    assert [(tool["name"], tool["description"]) for tool in extra["tools"]] == [
        ("a", "b"), ("openclaw_cli", "Own."),
        (ocp.wire_name("openclaw_cli"), "Gr\u00fc\u00dfe.")]


def test_a_call_that_is_cancelled_is_one_of_its_own_server() -> None:
    server = ocp.ToolServer((ocp.Tool("clock", "", {}),), OWN)

    def told(name: str, method: str, **message: Json) -> None:
        server.reply({"request_id": "r", "request": {
            "server_name": name, "message": {"method": method, **message}}})

    for name, tool in (("client", "clock"), ("server", "openclaw_cli")):
        told(name, "tools/call", id=2, params={
            "name": tool, "arguments": {}, "_meta": {"claudecode/toolUseId": f"call-{name}"}})
    assert [call.name for call in server.own_calls] == ["openclaw_cli"]
    told("client", "notifications/cancelled", params={"requestId": 2})
    assert [call.name for call in server.own_calls] == ["openclaw_cli"]
    told("server", "notifications/cancelled", params={"requestId": 2})
    assert server.own_calls == []


def test_earlier_calls_are_written_under_the_names_that_the_api_takes() -> None:
    use = {"type": "tool_use", "id": "c1", "name": "a.b", "input": {}}
    message = ocp.Message("assistant", [use])

    [line] = lines_of(ocp.message_line(message, (2, 1, 329), ask=False))

    assert line["message"]["content"] == [{**use, "name": ocp.wire_name("a.b")}]
    assert use["name"] == "a.b"


# -- calls in an answer -------------------------------------------------------

WEATHER = (ocp.Tool("weather", "", {}),)


def ending(reason: str) -> Json:
    return stream("message_delta", delta={"stop_reason": reason}, usage={"output_tokens": 2})


def read(*lines: Json, tools: Any = WEATHER) -> list[Any]:
    """The events of these lines."""
    reader = ocp.TurnReader(tools)
    return [event for line in lines for event in reader.events(line)]


def answered(events: list[Any]) -> Any:
    """The whole answer of these events."""
    outcome = ocp.AnswerRecord(turn(), 0.0)
    for event in events:
        outcome.add(event, 0.0)
    return outcome.answer()


def test_a_call_ends_the_answer() -> None:
    events = read(START, block_start("weather"), piece('{"city": '), piece('"Paris"}'),
                  stream("content_block_stop", index=0), ending("tool_use"))

    [call] = answered(events).calls
    assert call == {
        "type": "tool_use", "id": "toolu1", "name": "weather", "input": {"city": "Paris"},
    }
    assert events[-1].stop_reason == "tool_use"


@pytest.mark.parametrize("cut", range(1, 16))
def test_arguments_that_are_cut_off_never_become_a_call(cut: int) -> None:
    events = read(START, block_start("weather"), piece('{"city":"Paris"}'[:cut]),
                  stream("content_block_stop", index=0), ending("max_tokens"))

    assert answered(events).calls == []
    body = whole(ocp.CHAT, turn(), events)
    assert "tool_calls" not in body["choices"][0]["message"]
    assert body["choices"][0]["finish_reason"] == "length"


BROKEN = '{"city": "Par'


def broken_call() -> list[Any]:
    """An answer that ends in a call, with arguments that are no JSON."""
    return read(START, block_start("weather"), piece(BROKEN),
                stream("content_block_stop", index=0), ending("tool_use"))


def test_a_call_whose_arguments_are_no_json_is_still_a_call() -> None:
    chat = whole(ocp.CHAT, turn(tools=TOOLS), broken_call())["choices"][0]
    message = whole(ocp.MESSAGES, ocp.MESSAGES.parse({"messages": [USER]}, parsing()),
                    broken_call())
    response = whole(ocp.RESPONSES, ocp.RESPONSES.parse({"input": "Hi"}, parsing()), broken_call())

    kept = {"arguments": BROKEN}
    [called] = chat["message"]["tool_calls"]
    assert chat["finish_reason"] == "tool_calls"
    assert json.loads(called["function"]["arguments"]) == kept
    assert (message["stop_reason"], message["content"][-1]["input"]) == ("tool_use", kept)
    assert json.loads(response["output"][-1]["arguments"]) == kept


def test_a_streamed_call_whose_arguments_are_no_json_is_done() -> None:
    asked = ocp.RESPONSES.parse({"input": "Hi", "stream": True}, parsing())

    sent = stream_bytes(ocp.RESPONSES, asked, broken_call()).decode()

    done = [json.loads(line[6:]) for line in sent.splitlines() if line.startswith("data: ")]
    [item] = [each["item"] for each in done if each["type"] == "response.output_item.done"]
    assert (item["type"], item["status"]) == ("function_call", "completed")
    assert json.loads(item["arguments"]) == {"arguments": BROKEN}
    assert done[-1]["response"]["output"] == [item]


def test_a_tool_that_there_is_not_is_never_told() -> None:
    unknown = [block_start("gone"), piece("{}"), stream("content_block_stop", index=0)]
    text = stream("content_block_start", index=0, content_block={"type": "text", "text": ""})
    said = stream("content_block_delta", index=0, delta={"type": "text_delta", "text": "Sorry."})

    events = read(START, *unknown, ending("tool_use"), START, text, said, ending("end_turn"))

    found = answered(events)
    assert (found.calls, found.joined("text"), found.stop_reason) == ([], "Sorry.", "end_turn")
    assert not any(isinstance(event, ocp.Restarted) for event in events)


def test_beside_a_known_tool_an_unknown_one_is_hidden() -> None:
    events = read(START, block_start("gone", 0), piece("{}", 0), block_start("weather", 1),
                  piece("{}", 1), ending("tool_use"))

    assert [call["name"] for call in answered(events).calls] == ["weather"]
    assert [e.block_index for e in events if isinstance(e, ocp.BlockStarted)] == [0]


def test_a_call_is_voided_by_a_second_attempt() -> None:
    events = read(START, block_start("weather"), START, block_start("weather", call_id="t2"),
                  ending("tool_use"))

    assert [call["id"] for call in answered(events).calls] == ["t2"]


RECORDED = ("tool_call", "tool_calls_parallel")
CALLS = {
    "tool_call": [("weather", {"city": "Paris"})],
    "tool_calls_parallel": [("weather", {"city": "Paris"}), ("time_of_day", {"city": "Paris"})],
}


def recorded(name: str) -> list[Json]:
    """The rows of a transcript."""
    path = TRANSCRIPTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("version", ["2.1.197", "2.1.329"])
@pytest.mark.parametrize("scenario", RECORDED)
def test_recorded_calls_are_told_as_they_were_made(version: str, scenario: str) -> None:
    reader = ocp.TurnReader((*WEATHER, ocp.Tool("time_of_day", "", {})))
    events: list[Any] = []
    for row in recorded(f"{version}-{scenario}"):
        if row["dir"] == "out" and not reader.finished:
            events += reader.events(row["line"])

    found = answered(events)
    assert [(call["name"], call["input"]) for call in found.calls] == CALLS[scenario]
    assert all(call["id"].isalnum() for call in found.calls)
    assert found.stop_reason == "tool_use"


@pytest.mark.parametrize("version", ["2.1.197", "2.1.329"])
@pytest.mark.parametrize("scenario", RECORDED)
def test_recorded_requests_to_the_server_are_answered_as_they_were(
    version: str, scenario: str
) -> None:
    rows = [row["line"] for row in recorded(f"{version}-{scenario}")]
    answers = {line["response"]["request_id"]: line for line in rows if "response" in line}
    tools = server()
    results = [tool_result(call_id, block("x")) for call_id in ("toolustub00010", "toolustub00011")]

    tools.deliver(results)
    for line in rows:
        if line["type"] == "control_request" and "message" in line["request"]:
            [reply] = lines_of(tools.reply(line))
            told = answers[line["request_id"]]["response"]["response"]["mcp_response"]
            found = reply["response"]["response"]["mcp_response"]
            assert (found["id"], set(found["result"])) == (told["id"], set(found["result"]))
            assert set(told["result"]) <= set(found["result"])
