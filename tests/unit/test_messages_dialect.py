"""The dialect of Anthropic's Messages API: JSON into a Turn, events into bytes."""
from __future__ import annotations

import json
from typing import Any

import pytest

from project import load_script
from rendering import (
    CLOCK,
    CUT_OFF,
    GOLDEN,
    LIMITS,
    PDF,
    PNG,
    REASONED,
    REFUSED,
    REQUEST_ID,
    SECOND,
    STARTED,
    TEXT,
    THINKING,
    USER,
    WEATHER,
    block,
    check_golden,
    conversation,
    finished,
    frames,
    golden_name,
    numbered,
    parsing,
    refusal_of,
    stream_bytes,
    whole,
    whole_bytes,
)

ocp = load_script("ocp_server.py")

Json = dict[str, Any]

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"name": "weather", "description": "Tells it.", "input_schema": SCHEMA},
         {"type": "custom", "name": "clock", "input_schema": {"type": "object"}}]


def parse(body: object, limits: Any = LIMITS) -> Any:
    return ocp.MESSAGES.parse(body, parsing(limits))


def turn(*messages: object, **fields: object) -> Any:
    """The Turn of a request with these messages, or with one from the user."""
    return parse({"max_tokens": 64, "messages": list(messages) or [USER], **fields})


def refusal(*messages: object, limits: Any = LIMITS, **fields: object) -> Any:
    """The error of such a request."""
    body = {"messages": list(messages) or [USER], **fields}
    return refusal_of(ocp.MESSAGES, body, parsing(limits))


# -- fields -------------------------------------------------------------------


def test_a_request_becomes_a_turn() -> None:
    found = turn(model="claude-haiku-4-5", system="Be brief.",
                 stop_sequences=["END"], temperature=0.5,
                 top_k=5, stream=True, ocp_session_id="s1")

    assert found.model.id == "claude-haiku-4-5-20251001"
    assert (found.system, found.stream, found.session_id) == ("Be brief.", True, "s1")
    assert conversation(found) == [("user", ["Hello"])]
    assert found.options == ocp.Options(
        max_tokens=64, stop_sequences=("END",), thinking_tokens=0,
        sampling=(("temperature", 0.5), ("top_k", 5)),
    )
    assert (found.choices, found.output_schema, found.ignored) == (1, None, ())


def test_without_a_model_the_default_answers() -> None:
    assert turn().model.id == "claude-sonnet-5-5"


@pytest.mark.parametrize("field", ["container", "context_management", "mcp_servers", "x"])
def test_a_field_that_nobody_reads_is_named(field: str) -> None:
    assert turn(**{field: {"a": 1}}).ignored == (field,)


@pytest.mark.parametrize("field", ["metadata", "service_tier", "cache_control", "betas"])
def test_a_field_that_changes_nothing_here_is_none_of_our_business(field: str) -> None:
    assert turn(**{field: {"a": 1}}).ignored == ()


@pytest.mark.parametrize("max_tokens", [None, 1, 64_000])
def test_the_limit_is_passed_on_where_there_is_one(max_tokens: int) -> None:
    assert turn(max_tokens=max_tokens).options.max_tokens == max_tokens


@pytest.mark.parametrize(
    ("thinking", "tokens"),
    [
        (None, 0),
        ({"type": "disabled"}, 0),
        ({"type": "between_tools"}, 0),
        ({"type": "adaptive"}, None),
        ({"type": "enabled", "budget_tokens": 4_096}, None),
    ],
    ids=str,
)
def test_an_adaptive_model_thinks_when_the_client_expects_it(thinking: object, tokens: int) -> None:
    found = turn(model="claude-opus-4-8", thinking=thinking)

    assert (found.options.thinking_tokens, found.ignored) == (
        tokens, ("thinking.budget_tokens",) if "budget_tokens" in str(thinking) else ())


@pytest.mark.parametrize(
    ("thinking", "named"),
    [(None, ()), ({"type": "disabled"}, ("thinking",)), ({"type": "between_tools"}, ("thinking",))],
    ids=str,
)
def test_a_model_that_always_thinks_does_so_with_the_lowest_effort(
    thinking: object, named: tuple[str, ...]
) -> None:
    found = turn(model="opus", thinking=thinking)

    assert (found.options.thinking_tokens, found.options.effort, found.ignored) == (
        None, "low", named)


@pytest.mark.parametrize(
    ("thinking", "tokens"),
    [
        (None, 0),
        ({"type": "disabled"}, 0),
        ({"type": "adaptive"}, 8_000),
        ({"type": "enabled", "budget_tokens": 1_024}, 1_024),
        ({"type": "enabled", "budget_tokens": 10_000}, 10_000),
        ({"type": "enabled", "budget_tokens": 16_000}, 8_000),
    ],
    ids=str,
)
def test_a_model_with_a_budget_gets_the_client_s(thinking: object, tokens: int) -> None:
    found = turn(model="claude-haiku-4-5", max_tokens=16_000, thinking=thinking)

    assert found.options.thinking_tokens == tokens


def test_a_budget_that_leaves_no_room_for_an_answer_is_lowered_and_named() -> None:
    thinking = {"type": "enabled", "budget_tokens": 5_000}

    found = turn(model="claude-haiku-4-5", max_tokens=4_096, thinking=thinking)

    assert (found.options.thinking_tokens, found.options.max_tokens) == (2_048, 4_096)
    assert found.ignored == ("thinking.budget_tokens",)


@pytest.mark.parametrize(
    ("display", "hides"), [(None, False), ("summarized", False), ("omitted", True)]
)
def test_the_display_of_thinking_is_the_client_s(display: str | None, hides: bool) -> None:
    found = turn(model="opus", thinking={"type": "adaptive", "display": display})

    assert (found.options.hides_thinking, found.ignored) == (hides, ())


def test_a_limit_of_no_tokens_is_one() -> None:
    assert turn(model="claude-opus-4-8", max_tokens=0).options == ocp.Options(
        max_tokens=0, thinking_tokens=0)


def test_an_effort_is_passed_on() -> None:
    found = turn(model="opus", output_config={"effort": "low"}, thinking={"type": "adaptive"})

    assert (found.options.effort, found.options.thinking_tokens) == ("low", None)


def test_sampling_that_the_model_does_not_take_is_named_as_ignored() -> None:
    assert turn(model="opus", temperature=0.5, top_k=3).ignored == ("temperature", "top_k")


@pytest.mark.parametrize(
    ("system", "prompt"),
    [
        (None, ""), ("", ""), ("Be brief.", "Be brief."), ([], ""),
        ([block("One."), block("Two.")], "One.\n\nTwo."),
        ([{**block("One."), "cache_control": {"type": "ephemeral"}}], "One."),
    ],
)
def test_the_system_prompt_is_a_text_or_blocks(system: object, prompt: str) -> None:
    assert turn(system=system).system == prompt


def test_messages_of_the_system_go_into_its_prompt_before_all_others() -> None:
    found = turn({"role": "system", "content": "Two."}, USER, system="One.")

    assert found.system == "One.\n\nTwo."
    assert conversation(found) == [("user", ["Hello"])]


def test_later_messages_of_the_system_stay_where_they_are() -> None:
    found = turn(USER, {"role": "system", "content": "Two."}, USER, system="One.")

    reminder = "<system-reminder>\nTwo.\n</system-reminder>"
    assert found.system == "One."
    assert conversation(found) == [("user", ["Hello", reminder, "Hello"])]


def test_a_billing_header_of_another_claude_is_left_out() -> None:
    header = {"type": "text", "text": "x-anthropic-billing-header: cc_version=1;"}
    found = turn(USER, system=[header, {"type": "text", "text": "One."}])

    assert found.system == "One."


def test_a_session_comes_before_what_is_new() -> None:
    said = [ocp.Message("user", [block("a")]), ocp.Message("assistant", [block("b")])]
    about = parsing(session=lambda session_id, system: said if session_id == "s1" else [])

    found = ocp.MESSAGES.parse({"messages": [USER], "ocp_session_id": "s1"}, about)

    assert conversation(found) == [("user", ["a"]), ("assistant", ["b"]), ("user", ["Hello"])]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 7}, "model"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": "64"}, "max_tokens"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [7]}, "messages[0]"),
        ({"messages": [{"content": "Hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "Hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [USER, {"role": "assistant", "content": "Hel"}]}, "messages"),
        ({"system": 7}, "system"),
        ({"system": [7]}, "system[0]"),
        ({"stop_sequences": [7]}, "stop_sequences"),
        ({"temperature": 1.1}, "temperature"),
        ({"top_p": -0.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"stream": 1}, "stream"),
        ({"thinking": "on"}, "thinking"),
        ({"thinking": {}}, "thinking.type"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1_023}}, "thinking.budget_tokens"),
        ({"output_config": {"effort": "extreme"}}, "output_config.effort"),
        ({"ocp_session_id": 7}, "ocp_session_id"),
    ],
)
def test_a_field_that_is_wrong_is_refused_with_its_path(fields: Json, param: str) -> None:
    error = refusal(**fields)

    assert (error.status, error.param) == (400, param)
    assert param in error.message


# -- tools --------------------------------------------------------------------


def test_a_tool_is_a_name_a_description_and_a_schema() -> None:
    weather, clock = turn(tools=TOOLS).tools

    assert weather == ocp.Tool("weather", "Tells it.", SCHEMA)
    assert clock == ocp.Tool("clock", "", {"type": "object", "properties": {}})


def changed(*changes: Json) -> Json:
    """A message of the system with these changes of the tools."""
    return {"role": "system", "content": list(changes)}


def added(name: str, **definition: object) -> Json:
    """The change that gives a tool to the model; without a definition, one that it had before."""
    tool = {"type": "tool_definition", "definition": {"name": name, **definition}} \
        if definition else {"type": "tool_reference", "name": name}
    return {"type": "tool_addition", "tool": tool}


def removed(name: str) -> Json:
    return {"type": "tool_removal", "tool": {"type": "tool_reference", "name": name}}


@pytest.mark.parametrize(("changes", "names"), [
    ([added("map", input_schema=SCHEMA)], ["weather", "clock", "map"]),
    ([removed("weather")], ["clock"]),
    ([removed("weather"), removed("clock"), added("weather")], ["weather"]),
    ([added("map", input_schema=SCHEMA), removed("map")], ["weather", "clock"]),
    ([added("weather", input_schema=SCHEMA)], ["clock", "weather"]),
])
def test_tools_may_come_and_go_in_the_middle_of_a_conversation(
    changes: list[Json], names: list[str]
) -> None:
    together = turn(USER, changed(*changes), tools=TOOLS)
    one_by_one = turn(*[part for each in changes for part in (changed(each), USER)], tools=TOOLS)

    for found in (together, one_by_one):
        assert [tool.name for tool in found.tools] == names
        assert found.ignored == ()
    assert conversation(together) == conversation(turn(USER))


def test_a_tool_that_was_added_may_be_forced_and_one_that_was_removed_may_not() -> None:
    change = changed(added("map", input_schema=SCHEMA), removed("clock"))

    found = turn(USER, change, tools=TOOLS, tool_choice={"type": "tool", "name": "map"})
    error = refusal(USER, change, tools=TOOLS, tool_choice={"type": "tool", "name": "clock"})

    assert (found.tool_choice.kind, found.tool_choice.name) == ("tool", "map")
    assert error.param == "tool_choice"


@pytest.mark.parametrize("tool", [
    {"type": "mcp_tool_reference", "server_name": "a", "name": "b"}, {"type": "tool_reference"},
    None])
def test_a_change_of_what_is_no_tool_of_the_client_is_named_as_ignored(tool: object) -> None:
    found = turn(USER, changed({"type": "tool_removal", "tool": tool}), tools=TOOLS)

    assert len(found.tools) == 2
    assert found.ignored == ("messages[1].content[0]",)


@pytest.mark.parametrize("tool", [
    {"type": "function", "function": {
        "name": "weather", "description": "Tells it.", "parameters": SCHEMA}},
    {"type": "function", "name": "weather", "function": {
        "name": "weather", "description": "Tells it.", "parameters": SCHEMA}},
    {"type": "function", "name": "weather", "description": "Tells it.", "parameters": SCHEMA},
    {"name": "weather", "description": "Tells it.", "parameters": SCHEMA},
], ids=str)
def test_a_tool_in_the_form_of_another_api_is_the_same_tool(tool: Json) -> None:
    found = turn(tools=[tool])

    assert found.tools == (ocp.Tool("weather", "Tells it.", SCHEMA),)
    assert found.ignored == ()


def test_tools_that_anthropic_would_run_are_named_as_ignored() -> None:
    found = turn(tools=[{"type": "web_search_20250305", "name": "web_search"}, *TOOLS])

    assert [tool.name for tool in found.tools] == ["weather", "clock"]
    assert found.ignored == ("tools[0]",)


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        (None, ("auto", "", True)),
        ({"type": "auto"}, ("auto", "", True)),
        ({"type": "any", "disable_parallel_tool_use": True}, ("any", "", False)),
        ({"type": "none"}, ("none", "", True)),
        ({"type": "tool", "name": "clock"}, ("tool", "clock", True)),
    ],
    ids=str,
)
def test_a_choice_has_its_kind_and_its_tool(choice: object, wanted: Any) -> None:
    assert turn(tools=TOOLS, tool_choice=choice).tool_choice == ocp.ToolChoice(*wanted)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "a", "input_schema": 7}]}, "tools[0].input_schema"),
        ({"tools": [TOOLS[0], {**TOOLS[0], "description": "Other."}]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "required"}}, "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "gone"}}, "tool_choice"),
    ],
)
def test_tools_that_are_wrong_are_refused(fields: Json, param: str) -> None:
    error = refusal(**fields)

    assert (error.status, error.param) == (400, param)


# -- blocks -------------------------------------------------------------------

SOURCE = {"type": "base64", "media_type": "image/png", "data": PNG.partition(",")[2]}
PAPER = {"type": "base64", "media_type": "application/pdf", "data": PDF.partition(",")[2]}
ADDRESS = {"type": "url", "url": "https://example.org/a.png"}


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (block("a"), [block("a")]),
        (block(" "), []),
        ({**block("a"), "cache_control": {"type": "ephemeral"}, "citations": []}, [block("a")]),
        ({"type": "image", "source": SOURCE}, [{"type": "image", "source": SOURCE}]),
        ({"type": "document", "source": PAPER, "title": "t", "context": "c", "citations": None},
         [{"type": "document", "source": PAPER, "title": "t", "context": "c"}]),
        ({"type": "document", "source": PAPER, "title": "", "context": None},
         [{"type": "document", "source": PAPER}]),
        ({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a"}},
         [block("a")]),
        ({"type": "document", "source": {"type": "content", "content": [block("a")]}},
         [block("a")]),
        ({"type": "document", "source": {"type": "content", "content": "a"}}, [block("a")]),
        ({"type": "document", "source": {"type": "text", "data": "a"}, "title": "t.txt",
          "context": "c"}, [block("Title: t.txt\nContext: c"), block("a")]),
        ({"type": "document", "source": {"type": "content", "content": "a"}, "title": "t"},
         [block("Title: t"), block("a")]),
        ({"type": "search_result", "source": "https://a", "title": "t", "content": [block("a")]},
         [block("Title: t\nSource: https://a"), block("a")]),
        ({"type": "thinking", "thinking": "Hm.", "signature": "s"}, []),
        ({"type": "redacted_thinking", "data": "x"}, []),
    ],
    ids=str,
)
def test_a_block_becomes_what_claude_takes(sent: Json, kept: list[Json]) -> None:
    [message] = turn({"role": "user", "content": [sent, block("last")]}).messages

    assert message.content == [*kept, block("last")]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ({"type": "thinking", "thinking": "Hm.", "signature": "s", "cache_control": {}},
         [{"type": "thinking", "thinking": "Hm.", "signature": "s"}]),
        ({"type": "thinking", "signature": "s"},
         [{"type": "thinking", "thinking": "", "signature": "s"}]),
        ({"type": "redacted_thinking", "data": "x"}, [{"type": "redacted_thinking", "data": "x"}]),
        ({"type": "thinking", "thinking": "Hm."}, []),
        ({"type": "thinking", "thinking": "Hm.", "signature": ""}, []),
        ({"type": "thinking", "thinking": ["Hm."], "signature": "s"}, []),
        ({"type": "thinking", "thinking": "Hm.", "signature": 7}, []),
        ({"type": "redacted_thinking", "signature": "s"}, []),
    ],
    ids=str,
)
def test_signed_thinking_of_an_answer_is_read(sent: Json, kept: list[Json]) -> None:
    found = turn(USER, {"role": "assistant", "content": [sent, block("Hi.")]}, USER)

    assert found.messages[1].content == [*kept, block("Hi.")]
    assert found.messages[1].chars == len("Hi.")


def test_thinking_without_an_answer_is_left_out() -> None:
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "s"}

    found = turn(USER, {"role": "assistant", "content": [thought]}, USER)

    assert [message.role for message in found.messages] == ["user"]


def test_an_image_s_address_is_passed_on_where_the_operator_allows_it() -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "image", "source": ADDRESS}]}]}

    [message] = parse(body, LIMITS._replace(image_allow_url=True)).messages

    assert message.content == [{"type": "image", "source": ADDRESS}]


def test_calls_and_results_become_blocks_with_plain_ids() -> None:
    use = {"type": "tool_use", "id": "toolu_01-a", "name": "weather", "input": {"city": "Rome"}}
    failed = {"type": "tool_result", "tool_use_id": "toolu_01-a", "is_error": True,
              "content": [block("No."), {"type": "image", "source": SOURCE}]}

    found = turn(USER, {"role": "assistant", "content": [use]},
                 {"role": "user", "content": [block("So?"), failed]})

    assert found.messages[1].content == [{**use, "id": "toolu01a"}]
    assert found.messages[2].content == [
        {**failed, "tool_use_id": "toolu01a"}, block("So?"),
    ]


@pytest.mark.parametrize("content", ["Sunny.", [block("Sunny.")]])
def test_a_result_is_a_text_or_blocks(content: object) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "weather"}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": content}

    found = turn(USER, {"role": "assistant", "content": [use]}, {"role": "user",
                                                                  "content": [result]})

    assert found.messages[1].content[0]["input"] == {}
    assert found.messages[2].content == [{**result, "content": [block("Sunny.")]}]


@pytest.mark.parametrize(
    ("part", "below"),
    [
        (7, ""),
        ({}, ".type"),
        ({"type": "text"}, ".text"),
        ({"type": "text", "text": 7}, ".text"),
        ({"type": "image"}, ".source"),
        ({"type": "image", "source": {}}, ".source.data"),
        ({"type": "image", "source": {"type": "text", "data": "a"}}, ".source.type"),
        ({"type": "image", "source": 7}, ".source"),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, ".source.file_id"),
        ({"type": "image", "source": ADDRESS}, ".source.url"),
        ({"type": "image", "source": {"type": "url"}}, ".source.url"),
        ({"type": "image", "source": {**SOURCE, "data": ""}}, ".source.data"),
        ({"type": "image", "source": {**SOURCE, "data": "SUkqAA=="}}, ".source.data"),
        ({"type": "document"}, ".source"),
        ({"type": "document", "source": {"type": "file", "file_id": "f"}}, ".source.file_id"),
        ({"type": "document", "source": {"type": "url", "url": "https://a"}}, ".source.url"),
        ({"type": "document", "source": {**PAPER, "data": "SUkqAA=="}}, ".source.data"),
        ({"type": "document", "source": {"type": "content", "content": 7}}, ".source.content"),
        ({"type": "document", "source": PAPER, "title": 7}, ".title"),
        ({"type": "search_result", "content": 7}, ".content"),
        ({"type": "tool_use", "id": "a"}, ".name"),
        ({"type": "tool_use", "id": 7, "name": "a"}, ".id"),
        ({"type": "tool_result", "tool_use_id": 7}, ".tool_use_id"),
        ({"type": "tool_result", "tool_use_id": "a", "content": 7}, ".content"),
        ({"type": "tool_result", "tool_use_id": "a", "is_error": 1}, ".is_error"),
    ],
    ids=str,
)
def test_a_block_that_is_wrong_is_refused_with_its_path(part: object, below: str) -> None:
    error = refusal(USER, {"role": "user", "content": [block("a"), part]})

    assert (error.status, error.param) == (400, "messages[1].content[1]" + below)


IMAGE = {"type": "image", "source": SOURCE}
USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "t1"}


@pytest.mark.parametrize("part", [IMAGE, USE, RESULT], ids=lambda part: str(part["type"]))
def test_a_system_prompt_is_text(part: Json) -> None:
    error = refusal(system=[block("Be kind."), part])

    assert (error.status, error.param) == (400, "system[1]")


@pytest.mark.parametrize("part", [USE, RESULT], ids=lambda part: str(part["type"]))
def test_a_result_holds_no_call_and_no_result(part: Json) -> None:
    given = {"role": "user", "content": [{**RESULT, "content": [block("a"), part]}]}

    error = refusal(USER, {"role": "assistant", "content": [USE]}, given)

    assert (error.status, error.param) == (400, "messages[2].content[0].content[1]")


@pytest.mark.parametrize("part", [
    {"type": "dir", "name": "src"}, {"type": "file", "name": "a.txt"},
    {"type": "resource", "resource": {"text": "HELLO"}}, {"type": "text", "value": "v"},
], ids=str)
def test_data_in_a_result_that_only_looks_like_a_block_is_told_as_json(part: Json) -> None:
    given = {"role": "user", "content": [{**RESULT, "content": [block("a"), part]}]}

    found = turn(USER, {"role": "assistant", "content": [USE]}, given)

    told = json.dumps(part, separators=(",", ":"))
    assert found.messages[2].content[0]["content"] == [block("a"), block(told)]
    assert found.ignored == ()


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"output_config": {"task_budget": {"total": 7}}}, "output_config.task_budget"),
        ({"thinking": {"type": "disabled", "depth": 7}}, "thinking.depth"),
    ],
)
def test_settings_that_nobody_reads_are_named_by_their_path(fields: Json, ignored: str) -> None:
    assert turn(**fields).ignored == (ignored,)


def test_a_result_without_a_call_is_refused() -> None:
    result = {"type": "tool_result", "tool_use_id": "t9", "content": "x"}

    error = refusal({"role": "user", "content": [result]})

    assert "t9" in error.message


def test_images_in_results_count_too() -> None:
    image = {"type": "image", "source": SOURCE}
    call = {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [image] * 3}

    error = refusal(
        USER, {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result, image]},
    )

    assert (error.status, error.error_code) == (413, "too_many_images")
    assert error.param == "messages[2].content[1].source.data"


# -- answers, byte for byte ---------------------------------------------------

#: Answers by the name of their golden file, which also says how they are asked for.
ANSWERS = {
    "whole": [STARTED, *TEXT, finished()],
    "whole-thinking": [STARTED, *THINKING, *TEXT, REASONED],
    "whole-length": [STARTED, *TEXT, finished("max_tokens")],
    "whole-stop": [STARTED, *TEXT, finished("stop_sequence", sequence="END")],
    "whole-empty": [STARTED, finished("stop_sequence", sequence="END")],
    "whole-restart": [STARTED, *THINKING, *TEXT, ocp.Restarted(), STARTED, *TEXT, finished()],
    "whole-tools": [STARTED, *TEXT, *WEATHER, *CLOCK, finished("tool_use")],
    "whole-tools-cut": [STARTED, *TEXT, *CUT_OFF, finished("max_tokens")],
    "whole-refusal": [STARTED, REFUSED, finished()],
    "stream": [STARTED, *TEXT, finished()],
    "stream-thinking": [STARTED, *THINKING, *TEXT, REASONED],
    "stream-length": [STARTED, *TEXT, finished("max_tokens")],
    "stream-stop": [STARTED, *TEXT, finished("stop_sequence", sequence="END")],
    "stream-empty": [STARTED, finished("stop_sequence", sequence="END")],
    "stream-ticks": [STARTED, TEXT[0], ocp.Tick(), *TEXT[1:], ocp.Tick(), finished()],
    "stream-restart-before-text": [STARTED, ocp.Restarted(), STARTED, *TEXT, finished()],
    "stream-restart-in-thinking": [
        STARTED, *THINKING[:2], ocp.Restarted(), STARTED, *THINKING, *TEXT, finished(),
    ],
    "stream-restart-after-thinking": [
        STARTED, *THINKING, ocp.Restarted(), STARTED, *THINKING, *TEXT, finished(),
    ],
    "stream-restart-in-text": [STARTED, *TEXT, ocp.Restarted(), STARTED, *TEXT, finished()],
    "stream-error": [STARTED, *TEXT[:2], ocp.Overloaded("Overloaded")],
    "stream-tools": [STARTED, *TEXT, *WEATHER, *SECOND, finished("tool_use")],
    "stream-tools-cut": [STARTED, *TEXT, *CUT_OFF[:2], finished("max_tokens")],
    "stream-refusal": [STARTED, REFUSED, finished()],
}
STREAMS = sorted(name for name in ANSWERS if name.startswith("stream"))
BROKEN = ("stream-error", "stream-restart-in-text")
COMPLETE = [name for name in STREAMS if name not in BROKEN]


def asked(name: str) -> Any:
    """The Turn that a golden answer belongs to, with nothing in it that changes."""
    found = turn(stream=name.startswith("stream"))
    return found._replace(reply_format="msg_ocp")


def answer(name: str) -> bytes:
    """The bytes of an answer as the server sends them."""
    render = whole_bytes if name.startswith("whole") else stream_bytes
    return render(ocp.MESSAGES, asked(name), numbered(ANSWERS[name]))


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_an_answer_is_the_same_to_the_byte(name: str) -> None:
    check_golden(golden_name("messages", name), answer(name))


def test_every_golden_file_has_its_answer() -> None:
    assert {file.name for file in GOLDEN.glob("messages-*")} == {
        golden_name("messages", name) for name in ANSWERS
    }


# -- answers, in words --------------------------------------------------------


def put_together(name: str) -> Json:
    """The message that Anthropic's own clients make of a stream."""
    message: Json = {}
    pieces: dict[int, str] = {}
    for _, data in frames(answer(name)):
        kind, index = data["type"], data.get("index", 0)
        if kind == "message_start":
            message = data["message"]
        elif kind == "content_block_start":
            assert index == len(message["content"])
            message["content"].append(dict(data["content_block"]))
        elif kind == "content_block_delta":
            [field] = set(data["delta"]) - {"type"}
            if field == "partial_json":
                pieces[index] = pieces.get(index, "") + data["delta"][field]
            else:
                part = message["content"][index]
                part[field] = part.get(field, "") + data["delta"][field]
        elif kind == "message_delta":
            message = {**message, **data["delta"], "usage": data["usage"]}
    for index, text in pieces.items():
        message["content"][index]["input"] = json.loads(text)
    return message


SAME = {
    "stream": "whole", "stream-thinking": "whole-thinking", "stream-length": "whole-length",
    "stream-stop": "whole-stop", "stream-empty": "whole-empty", "stream-refusal": "whole-refusal",
    "stream-ticks": "whole", "stream-restart-before-text": "whole",
}


@pytest.mark.parametrize("name", sorted(SAME))
def test_a_stream_makes_the_same_message_as_the_whole_answer(name: str) -> None:
    assert put_together(name) == json.loads(answer(SAME[name]))


@pytest.mark.parametrize("name", STREAMS)
def test_each_event_is_named_after_its_type(name: str) -> None:
    assert all(kind == data["type"] for kind, data in frames(answer(name)))


@pytest.mark.parametrize("name", STREAMS)
def test_blocks_open_and_close_one_after_the_other(name: str) -> None:
    is_open: int | None = None
    count = 0

    for kind, data in frames(answer(name)):
        if kind == "content_block_start":
            assert (is_open, data["index"]) == (None, count)
            is_open, count = data["index"], count + 1
        elif kind in ("content_block_delta", "content_block_stop"):
            assert data["index"] == is_open
            is_open = None if kind == "content_block_stop" else is_open
        elif kind == "message_delta":
            assert is_open is None


@pytest.mark.parametrize("name", COMPLETE)
def test_a_complete_stream_begins_and_ends_as_the_api_s_own(name: str) -> None:
    kinds = [kind for kind, _ in frames(answer(name)) if kind != "ping"]

    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert all(kinds.count(kind) == 1 for kind in (kinds[0], *kinds[-2:]))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_stream_ends_with_its_error_and_has_no_end(name: str) -> None:
    *found, (kind, data) = frames(answer(name))

    assert (kind, data["type"], data["request_id"]) == ("error", "error", REQUEST_ID)
    assert not {"message_delta", "message_stop"} & {name for name, _ in found}


def test_nothing_is_sent_before_the_first_block() -> None:
    renderer = ocp.MESSAGES.renderer(asked("stream"))

    assert renderer.event(0, STARTED) == renderer.event(0, ocp.Restarted()) == b""


def test_silence_is_a_ping() -> None:
    assert answer("stream-ticks").count(b'event: ping\ndata: {"type":"ping"}\n\n') == 2


def test_the_first_frame_tells_the_prompt_and_the_last_one_the_answer() -> None:
    found = dict(frames(answer("stream")))

    first = found["message_start"]["message"]["usage"]
    last = found["message_delta"]["usage"]
    assert (first["input_tokens"], first["output_tokens"]) == (10, 1)
    assert (last["input_tokens"], last["output_tokens"]) == (10, 7)
    assert first["cache_read_input_tokens"] == last["cache_read_input_tokens"] == 5
    assert first["cache_creation_input_tokens"] == last["cache_creation_input_tokens"] == 3


def test_a_call_that_was_cut_off_is_no_block_of_a_whole_answer() -> None:
    body = json.loads(answer("whole-tools-cut"))

    assert [part["type"] for part in body["content"]] == ["text"]
    assert body["stop_reason"] == "max_tokens"


def test_the_answer_names_the_model_that_answered() -> None:
    unnamed = [ocp.Started("msg_1", "", ocp.Usage()), *TEXT, finished()]

    assert json.loads(answer("whole"))["model"] == "claude-sonnet-5"
    assert whole(ocp.MESSAGES, turn(model="opus"), unnamed)["model"] == "claude-opus-5-5"


def test_every_answer_has_an_id_of_its_own() -> None:
    first, second = turn().reply_format, turn().reply_format

    assert first != second
    assert first.startswith("msg_")


# -- errors -------------------------------------------------------------------

ERRORS = [
    (ocp.BadRequest("No."), "invalid_request_error"),
    (ocp.Unauthorized("No."), "authentication_error"),
    (ocp.Forbidden("No."), "permission_error"),
    (ocp.UnknownModel("No."), "not_found_error"),
    (ocp.TooLarge("No."), "request_too_large"),
    (ocp.RateLimited("No."), "rate_limit_error"),
    (ocp.PlanLimit("No."), "rate_limit_error"),
    (ocp.UpstreamFailed("No."), "api_error"),
    (ocp.UpstreamTimeout("No."), "timeout_error"),
    (ocp.Overloaded("No."), "overloaded_error"),
]


@pytest.mark.parametrize(("error", "kind"), ERRORS, ids=[kind for _, kind in ERRORS])
def test_a_failure_has_the_api_s_own_shape(error: Any, kind: str) -> None:
    body = {
        "type": "error", "error": {"type": kind, "message": "No."}, "request_id": REQUEST_ID,
    }

    assert ocp.MESSAGES.error_body(error, REQUEST_ID) == body
    frame = ocp.MESSAGES.renderer(turn()).failure(error, REQUEST_ID)
    assert frames(frame) == [("error", body)]


def test_nothing_of_an_answer_is_stored() -> None:
    assert not ocp.MESSAGES.stores(turn())
