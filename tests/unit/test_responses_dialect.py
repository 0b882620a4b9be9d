"""The dialect of OpenAI's responses: items into a Turn, events into the ladder of events."""
from __future__ import annotations

import json
from typing import Any

import pytest

from project import load_script
from rendering import (
    CREATED_S,
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
    call,
    check_golden,
    conversation,
    finished,
    frames,
    golden_name,
    numbered,
    parsing,
    refusal_of,
    steps_for,
    stream_bytes,
    whole,
    whole_bytes,
)

ocp = load_script("ocp_server.py")

Json = dict[str, Any]

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "name": "weather", "description": "Tells it.", "parameters": SCHEMA},
         {"type": "function", "name": "clock", "parameters": None, "strict": True}]


def turn(given: object = "Hello", **fields: object) -> Any:
    """The Turn of a request with this input."""
    return ocp.RESPONSES.parse({"input": given, **fields}, parsing())


def refusal(given: object = "Hello", **fields: object) -> Any:
    """The error of such a request."""
    return refusal_of(ocp.RESPONSES, {"input": given, **fields})


# -- fields -------------------------------------------------------------------


def test_a_request_becomes_a_turn() -> None:
    found = turn(model="claude-haiku-4-5", instructions="Be brief.",
                 max_output_tokens=64, temperature=0.5,
                 stream=True)

    assert (found.model.id, found.system) == ("claude-haiku-4-5-20251001", "Be brief.")
    assert (found.stream, found.choices, found.ignored) == (True, 1, ())
    assert conversation(found) == [("user", ["Hello"])]
    assert found.options == ocp.Options(
        max_tokens=64, sampling=(("temperature", 0.5),), thinking_tokens=0
    )


@pytest.mark.parametrize(
    ("reasoning", "effort", "tokens", "summary"),
    [
        (None, None, None, False),
        ({"effort": "low"}, "low", None, False),
        ({"effort": "minimal", "summary": "auto"}, "low", None, True),
        ({"effort": "none"}, None, 0, False),
        ({"summary": "none"}, None, None, False),
        ({"summary": "detailed"}, None, None, True),
    ],
    ids=str,
)
def test_reasoning_has_an_effort_and_maybe_a_summary(
    reasoning: object, effort: str, tokens: int, summary: bool
) -> None:
    found = turn(model="claude-opus-4-8", reasoning=reasoning)

    assert (found.options.effort, found.options.thinking_tokens) == (effort, tokens)
    assert found.reply_format.has_summary is summary


@pytest.mark.parametrize(("store", "kept"), [(None, True), (True, True), (False, False)])
def test_a_response_is_stored_unless_the_client_does_not_want_that(
    store: object, kept: bool
) -> None:
    found = turn(store=store)

    assert ocp.RESPONSES.stores(found) is kept
    assert found.reply_format.echo["store"] is kept


@pytest.mark.parametrize(
    ("name", "value"),
    [("background", True), ("max_tool_calls", 3), ("top_logprobs", 2), ("metadata", {"a": "b"}),
     ("user", "me"), ("service_tier", "flex"), ("prompt_cache_key", "k")],
)
def test_a_harmless_parameter_is_named_as_ignored(name: str, value: object) -> None:
    assert turn(**{name: value}).ignored == (name,)


@pytest.mark.parametrize("name", ["frobnicate", "modalities", "max_tokens"])
def test_a_field_that_nobody_reads_is_named(name: str) -> None:
    assert turn(**{name: ["x"]}).ignored == (name,)


@pytest.mark.parametrize(
    ("fields", "effort", "ignored"),
    [
        ({"reasoning_effort": "low"}, "low", ()),
        ({"reasoning": {"effort": "high"}, "reasoning_effort": "low"}, "low", ()),
        ({"thinking": {"type": "enabled", "budget_tokens": 2_000}}, None,
         ("thinking.budget_tokens",)),
        ({"output_config": {"effort": "medium"}}, "medium", ()),
    ],
    ids=str,
)
def test_thinking_is_asked_for_wherever_clients_say_it(
    fields: Json, effort: str | None, ignored: tuple[str, ...]
) -> None:
    found = turn(model="opus", **fields)

    assert (found.options.effort, found.ignored) == (effort, ignored)


def test_the_form_of_an_answer_is_taken_in_the_words_of_chat_too() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}

    found = turn(response_format=form)

    assert (found.output_schema, found.ignored) == (ocp.read_output_schema(ocp.Fields(schema)), ())


@pytest.mark.parametrize("value", [0, -1, None])
def test_a_limit_that_is_none_is_not_there(value: int | None) -> None:
    assert turn(max_output_tokens=value).options.max_tokens is None


def test_a_stop_text_is_taken_as_in_chat() -> None:
    assert turn(stop=["END", "\n"]).options.stop_sequences == ("END", "\n")


@pytest.mark.parametrize("name", ["include", "truncation", "client_metadata"])
def test_a_field_that_changes_nothing_is_none_of_our_business(name: str) -> None:
    assert turn(**{name: ["x"]}).ignored == ()


@pytest.mark.parametrize("name", ["conversation", "prompt"])
def test_what_would_have_to_be_stored_here_is_refused(name: str) -> None:
    error = refusal(**{name: {"id": "x"}})

    assert (error.status, error.error_code) == (400, "unsupported_parameter")
    assert error.param == name


@pytest.mark.parametrize("text", [{"verbosity": "low"}, {"verbosity": "low", "format": None}])
def test_a_response_always_tells_the_form_of_its_text(text: Json) -> None:
    echo = turn(text=text).reply_format.echo

    assert echo["text"] == {"verbosity": "low", "format": {"type": "text"}}


def test_a_response_repeats_its_request() -> None:
    echo = turn(model="opus", instructions="Be brief.", tools=TOOLS, tool_choice="none",
                metadata={"a": "b"}, top_p=0.5, parallel_tool_calls=False).reply_format.echo

    assert (echo["object"], echo["model"]) == ("response", "claude-opus-5-5")
    assert (echo["instructions"], echo["tools"]) == ("Be brief.", TOOLS)
    assert (echo["tool_choice"], echo["parallel_tool_calls"]) == ("none", False)
    assert (echo["metadata"], echo["top_p"], echo["temperature"]) == ({"a": "b"}, 0.5, None)
    assert echo["text"] == {"format": {"type": "text"}}
    assert echo["id"].startswith("resp_")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 7}, "model"),
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": 7}, "input"),
        ({"input": [7]}, "input[0]"),
        ({"input": [{"content": "Hello"}]}, "input[0].role"),
        ({"input": [{"role": "robot", "content": "Hello"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": 7}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "video"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "item_reference"}]}, "input[0].id"),
        ({"instructions": 7}, "instructions"),
        ({"max_output_tokens": -2}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"stream": 1}, "stream"),
        ({"reasoning": "high"}, "reasoning"),
        ({"reasoning": {"effort": "extreme"}}, "reasoning.effort"),
        ({"previous_response_id": 7}, "previous_response_id"),
        ({"text": 7}, "text"),
    ],
    ids=str,
)
def test_a_field_that_is_wrong_is_refused_with_its_path(fields: Json, param: str) -> None:
    error = refusal(**fields) if "input" not in fields else refusal(fields["input"])

    assert (error.status, error.param) == (400, param)


# -- items --------------------------------------------------------------------


def test_instructions_come_before_messages_of_the_system() -> None:
    given = [{"role": "developer", "content": "Two."},
             {"type": "message", "role": "system", "content": [block("Three.")]}, USER]

    found = turn(given, instructions="One.")

    assert found.system == "One.\n\nTwo.\n\nThree."
    assert conversation(found) == [("user", ["Hello"])]


def test_a_later_message_of_the_developer_stays_where_it_stands() -> None:
    late = {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]}

    found = turn([USER, {"role": "assistant", "content": "Hi."}, late, USER], instructions="One.")

    assert found.system == "One."
    assert conversation(found)[-1] == (
        "user", ["<system-reminder>\nBe brief.\n</system-reminder>", "Hello"])


def test_a_conversation_that_ends_with_an_answer_is_asked_to_go_on() -> None:
    found = turn([USER, {"role": "assistant", "content": "Hel"}])

    assert conversation(found)[-1] == ("user", ["Continue exactly where your last message ends."])
    assert found.adjusted == (("assistant_last", 1),)


def test_a_request_that_is_all_instructions_asks_them() -> None:
    found = turn([{"role": "developer", "content": "Say hello."}])

    assert (found.system, conversation(found)) == ("", [("user", ["Say hello."])])
    assert ocp.RESPONSES.stored_input(found)[0] == []


def test_an_instruction_after_an_answer_is_there_to_be_answered() -> None:
    found = turn([USER, {"role": "assistant", "content": "Hi."},
                  {"role": "developer", "content": "Sum up."}], instructions="Be kind.")

    assert (found.system, conversation(found)[2:]) == ("Be kind.", [("user", ["Sum up."])])
    assert ocp.RESPONSES.stored_input(found)[0] == []


def test_messages_of_the_system_last_and_instructions_do_not() -> None:
    first = turn([{"role": "developer", "content": "Two."}, USER], instructions="One.")
    told = ocp.RESPONSES.stored_input(first)[0]
    said = [*told, *first.messages, ocp.Message("assistant", [block("b")])]
    about = parsing(recall=lambda response_id: said)

    given = [{"role": "system", "content": "Four."}, USER]
    second = ocp.RESPONSES.parse(
        {"input": given, "instructions": "Three.", "previous_response_id": "r"}, about)

    assert (first.system, second.system) == ("One.\n\nTwo.", "Three.\n\nTwo.")
    assert conversation(second) == [
        ("user", ["Hello"]), ("assistant", ["b"]),
        ("user", ["<system-reminder>\nFour.\n</system-reminder>", "Hello"])]
    told = ocp.RESPONSES.stored_input(second)[0]
    assert [each.content for each in told] == [[block("Two.")]]


def test_parts_of_a_message_become_blocks() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": PNG},
             {"type": "input_file", "filename": "b.pdf", "file_data": PDF}]

    found = turn([{"type": "message", "role": "user", "content": parts}])

    assert conversation(found) == [("user", ["a", "image", "document"])]


def test_an_answer_of_before_may_come_back_as_it_was_given() -> None:
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": "Hi.", "annotations": []},
                        {"type": "refusal", "refusal": "No."}]}
    reasoning = {"id": "rs_1", "type": "reasoning", "summary": []}

    found = turn([USER, reasoning, item, USER])

    assert conversation(found)[1] == ("assistant", ["Hi.", "No."])


CALLED = {"type": "function_call", "call_id": "call_1", "name": "weather",
          "arguments": '{"city": "Rome"}'}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "Sunny."}


def test_calls_and_their_outputs_become_blocks_with_plain_ids() -> None:
    found = turn([USER, CALLED, RESULT, {"role": "user", "content": "So?"}])

    use = {"type": "tool_use", "id": "call1", "name": "weather", "input": {"city": "Rome"}}
    result = {"type": "tool_result", "tool_use_id": "call1", "content": [block("Sunny.")]}
    assert found.messages[1:] == [
        ocp.Message("assistant", [use]), ocp.Message("user", [result, block("So?")]),
    ]


def test_several_calls_side_by_side_are_one_message() -> None:
    second = {**CALLED, "call_id": "call_2"}

    found = turn([USER, CALLED, second, {**RESULT, "call_id": "call_2"}, RESULT])

    assert [part["id"] for part in found.messages[1].content] == ["call1", "call2"]
    assert [part["tool_use_id"] for part in found.messages[2].content] == ["call1", "call2"]


def test_an_output_may_hold_an_image() -> None:
    output = [{"type": "input_image", "image_url": PNG}]

    found = turn([USER, CALLED, {**RESULT, "output": output}])

    assert found.messages[2].content[0]["content"][0]["type"] == "image"


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([{"type": "function_call", "call_id": 7, "name": "a"}], "input[0].call_id"),
        ([{"type": "function_call", "call_id": "a", "arguments": ""}], "input[0].name"),
        ([{"type": "function_call_output", "call_id": 7, "output": "x"}], "input[0].call_id"),
        ([{"type": "function_call_output", "output": "x"}], "input"),
        ([RESULT], "input"),
    ],
    ids=str,
)
def test_an_item_that_is_wrong_is_refused_with_its_path(items: list[Json], param: str) -> None:
    error = refusal(items)

    assert (error.status, error.param) == (400, param)


@pytest.mark.parametrize("kind", ["easy_input_message", "input_message"])
def test_an_item_with_role_and_content_is_a_message_whatever_its_type(kind: str) -> None:
    found = turn([{"type": kind, "role": "user", "content": "hey"}])

    assert (conversation(found), found.ignored) == ([("user", ["hey"])], ())


def test_a_part_without_a_message_is_the_user_s() -> None:
    image = {"type": "input_image", "image_url": PNG}

    found = turn([USER, {"type": "input_text", "text": "bare"}, image, USER])

    assert conversation(found) == [("user", ["Hello", "bare", "image", "Hello"])]
    assert found.ignored == ()


def test_a_hosted_call_without_an_id_leaves_the_results_of_others_alone() -> None:
    hosted = {"type": "mcp_call", "name": "m", "server_label": "s", "arguments": "{}",
              "output": "MCP"}
    own = {"type": "function_call", "call_id": "f1", "name": "f", "arguments": "{}"}

    found = turn([USER, own, hosted, {
        "type": "function_call_output", "call_id": "f1", "output": "F"}])

    results = [each for message in found.messages for each in message.content
               if each["type"] == "tool_result"]
    assert [each["content"] for each in results] == [[block("F")], [block("MCP")]]


def test_a_result_may_name_its_call_by_the_id_of_the_item() -> None:
    call = {"type": "local_shell_call", "id": "lsh_1", "call_id": "c1",
            "action": {"type": "exec", "command": ["ls"]}}

    found = turn([USER, call, {"type": "local_shell_call_output", "id": "lsh_1", "output": "a"}])

    assert "item_id" not in found.messages[1].content[0]
    assert found.messages[2].content == [
        {"type": "tool_result", "tool_use_id": "c1", "content": [block("a")]}]


def test_an_id_that_is_no_text_is_replaced_where_items_are_listed() -> None:
    item = ocp.stored_item(ocp.Fields({"role": "user", "content": "q", "id": 5}, "input[0]"))

    assert item["id"].startswith("msg_")


NAMESPACED = [{"type": "namespace", "name": "ns", "tools": [{"type": "function", "name": "f"}]}]
CHOSEN = {"type": "function", "name": "f", "namespace": "ns"}


@pytest.mark.parametrize(("choice", "kind"), [
    (CHOSEN, "tool"), ({"type": "allowed_tools", "mode": "auto", "tools": [CHOSEN]}, "auto"),
])
def test_a_choice_names_the_namespace_of_its_tool_apart(choice: Json, kind: str) -> None:
    found = turn(tools=NAMESPACED, tool_choice=choice)

    assert [tool.name for tool in found.tools] == ["ns__f"]
    assert found.tool_choice.kind == kind


def test_an_allowed_tool_that_there_is_not_is_named_or_refused() -> None:
    def allowed(*names: str) -> Json:
        tools = [{"type": "function", "name": name} for name in names]
        return {"tools": TOOLS[:1], "tool_choice": {"type": "allowed_tools", "tools": tools}}

    assert turn(**allowed("weather", "gone")).ignored == ("tool_choice.tools[1]",)
    assert refusal(**allowed("gone")).param == "tool_choice.tools[0]"


def test_settings_of_the_text_that_nobody_reads_are_named() -> None:
    assert turn(text={"verbosity": "low"}).ignored == ("text.verbosity",)


def test_reasoning_is_left_to_claude() -> None:
    found = turn([{"type": "reasoning", "id": "rs_1"}, USER])

    assert (conversation(found), found.ignored) == ([("user", ["Hello"])], ())


THOUGHT = {"type": "thinking", "thinking": "Hm: \u00fc.", "signature": "c2ln"}
SEALED = {"type": "redacted_thinking", "data": "c2VhbGVk"}


def reasoning_item(thought: Json) -> Json:
    return {"type": "reasoning", "id": "rs_1", "summary": [], **ocp.sealed_thinking(thought)}


def test_thinking_that_was_sealed_here_belongs_to_the_answer_behind_it() -> None:
    said = {"type": "message", "role": "assistant", "content": "I look."}

    found = turn([USER, reasoning_item(THOUGHT), said, reasoning_item(SEALED), CALLED, RESULT])

    assert [message.role for message in found.messages] == ["user", "assistant", "user"]
    thought, text, sealed, call = found.messages[1].content
    assert (thought, text, sealed) == (THOUGHT, block("I look."), SEALED)
    assert call["type"] == "tool_use"


@pytest.mark.parametrize("content", [
    None, "", "gAAAAAB", "ocp1.", "ocp1.!", "ocp1.bm90IEpTT04=", ocp.encoded_content("[]"),
    ocp.encoded_content('{"type":"text","text":"a","signature":"s"}'),
    ocp.encoded_content('{"type":"thinking","thinking":"a"}'), ocp.encoded_content("A summary."),
])
def test_what_seals_no_thinking_is_left_out(content: object) -> None:
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": content}
    said = {"type": "message", "role": "assistant", "content": "Hi."}

    found = turn([USER, reasoning, said, USER])

    assert (conversation(found)[1], found.ignored) == (("assistant", ["Hi."]), ())


@pytest.mark.parametrize(
    "item",
    [
        {"type": "item_of_next_year", "text": "x"},
        {"type": "mcp_list_tools", "server_label": "birds", "tools": []},
        {"type": "compaction", "encrypted_content": "gAAAAABo"},
        {"type": "compaction", "encrypted_content": "ocp1.no base64"},
        {"type": "additional_tools", "role": "developer", "tools": []},
        {"type": "compaction_trigger"},
    ],
    ids=str,
)
def test_items_that_nobody_here_reads_are_named(item: Json) -> None:
    found = turn([USER, item, item])

    assert conversation(found) == [("user", ["Hello"])]
    assert found.ignored == ("input[1]", "input[2]")


COMMAND = {"type": "exec", "command": ["ls", "-l"], "env": {}, "timeout_ms": None}
PATCH = {"type": "update_file", "path": "a.txt", "diff": "@@\n-a\n+b"}
#: A call, its result, and what the model reads of both: name, arguments, text, whether it failed.
ITEM_PAIRS = {
    "function": (CALLED, RESULT, ("weather", {"city": "Rome"}, "Sunny.", False)),
    "custom": (
        {"type": "custom_tool_call", "call_id": "c", "name": "edit", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "c", "output": "Done."},
        ("edit", {"input": "x"}, "Done.", False)),
    "local shell": (
        {"type": "local_shell_call", "id": "l", "call_id": "c", "action": COMMAND},
        {"type": "local_shell_call_output", "id": "c", "output": "a b"},
        ("local_shell", {"command": ["ls", "-l"]}, "a b", False)),
    "shell": (
        {"type": "shell_call", "call_id": "c", "action": {"commands": ["ls"], "timeout_ms": 5}},
        {"type": "shell_call_output", "call_id": "c",
         "output": [{"stdout": "a", "stderr": "", "outcome": {"type": "timeout"}}]},
        ("shell", {"commands": ["ls"], "timeout_ms": 5},
         '[{"stdout":"a","stderr":"","outcome":{"type":"timeout"}}]', False)),
    "patch": (
        {"type": "apply_patch_call", "call_id": "c", "operation": PATCH},
        {"type": "apply_patch_call_output", "call_id": "c", "status": "completed"},
        ("apply_patch", PATCH, "completed", False)),
    "failed patch": (
        {"type": "apply_patch_call", "call_id": "c", "operation": PATCH},
        {"type": "apply_patch_call_output", "call_id": "c", "status": "failed", "output": "No."},
        ("apply_patch", PATCH, "No.", True)),
    "tool search": (
        {"type": "tool_search_call", "call_id": "c", "arguments": {"query": "birds"}},
        {"type": "tool_search_output", "call_id": "c", "tools": [{"name": "find"}]},
        ("tool_search", {"query": "birds"}, '[{"name":"find"}]', False)),
    "program": (
        {"type": "program", "call_id": "c", "code": "1 + 1"},
        {"type": "program_output", "call_id": "c", "result": "2"},
        ("program", {"code": "1 + 1"}, "2", False)),
    "computer": (
        {"type": "computer_call", "call_id": "c", "action": {"type": "wait"}},
        {"type": "computer_call_output", "call_id": "c", "output": "Waited."},
        ("computer", {"type": "wait"}, "Waited.", False)),
    "several actions": (
        {"type": "computer_call", "call_id": "c", "actions": [{"type": "wait"}]},
        {"type": "computer_call_output", "call_id": "c", "output": "Waited."},
        ("computer", {"arguments": '[{"type":"wait"}]'}, "Waited.", False)),
}


def pair_of(found: Any) -> tuple[str, Json, str, bool]:
    """What the model reads of the only call of a conversation, and of its result."""
    [use] = found.messages[1].content
    result, *_ = found.messages[2].content
    assert use["id"] == result["tool_use_id"]
    [told] = result["content"]
    return use["name"], use["input"], told["text"], result.get("is_error", False)


@pytest.mark.parametrize("name", sorted(ITEM_PAIRS))
def test_a_call_and_its_result_are_told_as_such(name: str) -> None:
    called, result, told = ITEM_PAIRS[name]

    found = turn([USER, called, result])

    assert pair_of(found) == told
    assert (found.ignored, found.adjusted) == ((), ())


def test_a_screenshot_is_an_image_of_the_result() -> None:
    called, result, _ = ITEM_PAIRS["computer"]
    shot = {"type": "computer_screenshot", "image_url": PNG}

    found = turn([USER, called, {**result, "output": shot}])

    [image] = found.messages[2].content[0]["content"]
    assert image["type"] == "image"


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ({"type": "mcp_call", "id": "m", "server_label": "birds", "name": "find",
          "arguments": '{"bird": "owl"}', "output": "On the roof."},
         ("birds__find", {"bird": "owl"}, "On the roof.", False)),
        ({"type": "mcp_call", "id": "m", "server_label": "birds", "name": "find",
          "arguments": "{}", "error": {"type": "http_error", "code": 500}},
         ("birds__find", {}, '{"type":"http_error","code":500}', True)),
        ({"type": "code_interpreter_call", "id": "m", "code": "print(1)", "container_id": "x",
          "outputs": [{"type": "logs", "logs": "1"}]},
         ("code_interpreter", {"code": "print(1)"}, '[{"type":"logs","logs":"1"}]', False)),
    ],
    ids=str,
)
def test_a_call_that_holds_its_result_is_told_with_it(item: Json, told: Any) -> None:
    found = turn([USER, item, {"role": "user", "content": "So?"}])

    assert pair_of(found) == told
    assert found.messages[2].content[1] == block("So?")


@pytest.mark.parametrize(
    ("item", "role", "text"),
    [
        ({"type": "file_search_call", "id": "f", "queries": ["owls"], "results": [{"text": "x"}]},
         "assistant", '[file_search_call]\n{"queries":["owls"],"results":[{"text":"x"}]}'),
        ({"type": "image_generation_call", "id": "i", "result": "iVBO", "revised_prompt": "An owl"},
         "assistant", '[image_generation_call]\n{"revised_prompt":"An owl"}'),
        ({"type": "mcp_approval_request", "id": "a", "server_label": "birds", "name": "find",
          "arguments": "{}"},
         "assistant",
         '[mcp_approval_request]\n{"server_label":"birds","name":"find","arguments":"{}"}'),
        ({"type": "mcp_approval_response", "approval_request_id": "a", "approve": True},
         "user", '[mcp_approval_response]\n{"approve":true}'),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_what_has_no_result_is_told_as_text(item: Json, role: str, text: str) -> None:
    found = turn([{"role": "assistant", "content": "Hm."}, item, USER])

    assert text in [part for told_by, parts in conversation(found) if told_by == role
                    for part in parts]


def test_a_search_of_the_history_is_told_as_text_and_not_compared() -> None:
    item = {"type": "web_search_call", "id": "w", "status": "completed",
            "action": {"type": "search", "query": "owls"}}
    said = {"role": "assistant", "content": "Hoot."}

    found = turn([USER, item, said, USER])

    plain = turn([USER, said, USER])
    assert [each.digest for each in found.messages] == [each.digest for each in plain.messages]
    lines = b"".join(steps_for(found, "", ocp.OLDEST_CLAUDE)).splitlines()
    [answer] = [line["message"] for line in map(json.loads, lines) if line["type"] == "assistant"]
    assert answer["content"] == [
        block('[web_search_call]\n{"action":{"type":"search","query":"owls"}}'), block("Hoot.")]


def test_a_compaction_that_was_made_here_is_told_as_its_summary() -> None:
    sealed = ocp.encoded_content("Owls: \u00fc, \U0001f989.")

    found = turn([USER, {"type": "compaction", "encrypted_content": sealed}, USER])

    [(role, texts)] = conversation(found)
    assert (role, texts[0], texts[2]) == ("user", "Hello", "Hello")
    assert texts[1].endswith("\nOwls: \u00fc, \U0001f989.")


def test_an_earlier_response_is_gone_on_from() -> None:
    said = [ocp.Message("user", [block("a")]), ocp.Message("assistant", [block("b")])]
    about = parsing(recall=lambda response_id: said if response_id == "resp_1" else [])

    found = ocp.RESPONSES.parse({"input": "Hello", "previous_response_id": "resp_1"}, about)

    assert conversation(found) == [("user", ["a"]), ("assistant", ["b"]), ("user", ["Hello"])]
    assert found.reply_format.echo["previous_response_id"] == "resp_1"
    assert conversation(ocp.Turn(found.model, said, found.options)) == [
        ("user", ["a"]), ("assistant", ["b"]),
    ]


def test_a_stored_conversation_is_left_alone() -> None:
    said = [ocp.Message("user", [block("a")])]

    ocp.RESPONSES.parse(
        {"input": "Hello", "previous_response_id": "r"}, parsing(recall=lambda response_id: said)
    )

    assert said == [ocp.Message("user", [block("a")])]


def test_a_response_that_is_not_there_is_refused() -> None:
    assert refusal(previous_response_id="resp_9").param == "previous_response_id"


def test_a_reference_stands_for_its_item() -> None:
    stored = {
        "msg_1": {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
                  "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        "rs_1": {"id": "rs_1", "type": "reasoning", "summary": []},
        "fc_1": {"id": "fc_1", **CALLED},
    }
    # The API's types leave out the type, or let it be null.
    given: Json = [{"type": "item_reference", "id": "rs_1"}, {"id": "msg_1"},
                   {"type": None, "id": "fc_1"}]

    read: list[str] = []

    def item(item_id: str) -> Json:
        read.append(item_id)
        return stored[item_id]

    found = ocp.RESPONSES.parse({"input": [USER, *given, RESULT]}, parsing(item=item))

    assert conversation(found) == [
        ("user", ["Hello"]), ("assistant", ["I look.", "tool_use"]), ("user", ["tool_result"]),
    ]
    # What the prompt and the stored items have is read once, and cannot differ.
    assert read == ["rs_1", "msg_1", "fc_1"]


def test_a_reference_to_what_is_not_there_is_not_found() -> None:
    error = refusal([USER, {"type": "item_reference", "id": "msg_9"}, USER])

    assert (error.status, error.param) == (404, "input")


# -- tools --------------------------------------------------------------------


def test_a_tool_is_a_name_a_description_and_a_schema() -> None:
    weather, clock = turn(tools=TOOLS).tools

    assert weather == ocp.Tool("weather", "Tells it.", SCHEMA)
    assert clock == ocp.Tool("clock", "", {"type": "object", "properties": {}})


@pytest.mark.parametrize(
    ("tool", "arguments", "item"),
    [
        ({"type": "local_shell"}, {"command": ["ls"], "timeout_ms": 5},
         {"type": "local_shell_call",
          "action": {"type": "exec", "env": {}, "command": ["ls"], "timeout_ms": 5}}),
        ({"type": "shell"}, {"commands": ["ls", "pwd"]},
         {"type": "shell_call", "action": {"commands": ["ls", "pwd"]}}),
        ({"type": "shell", "environment": {"type": "local"}}, {"commands": []},
         {"type": "shell_call", "action": {"commands": []}}),
        ({"type": "apply_patch"}, PATCH, {"type": "apply_patch_call", "operation": PATCH}),
    ],
    ids=str,
)
@pytest.mark.parametrize("render", [whole_bytes, stream_bytes])
def test_a_tool_that_the_client_runs_is_called_by_an_item_of_its_own(
    render: Any, tool: Json, arguments: Json, item: Json
) -> None:
    found = turn(tools=[tool], tool_choice={"type": tool["type"]})
    pieces = json.dumps(arguments)[:9], json.dumps(arguments)[9:]
    events = numbered([STARTED, *call(0, "toolu1", tool["type"], *pieces), finished("tool_use")])

    sent = render(ocp.RESPONSES, found, events)

    body = json.loads(sent) if render is whole_bytes else frames(sent)[-1][1]["response"]
    [made] = body["output"]
    assert {**item, "id": made["id"], "call_id": "toolu1", "status": "completed"} == made
    assert found.tool_choice == ocp.ToolChoice("tool", tool["type"])
    kinds = [kind for kind, _ in frames(sent)] if render is stream_bytes else []
    assert kinds[2:-1] in ([], ["response.output_item.added", "response.output_item.done"])
    again = turn([USER, made], tools=[tool])
    assert again.messages[1].content[0]["input"] == arguments


def test_a_shell_in_a_container_of_openai_s_is_not_offered() -> None:
    found = turn(tools=[{"type": "shell", "environment": {"type": "container_auto"}}, *TOOLS])

    assert [tool.name for tool in found.tools] == ["weather", "clock"]
    assert found.ignored == ("tools[0]", "tools[].strict")


@pytest.mark.parametrize("tool", [
    {"type": "function", "function": TOOLS[0]}, {"function": TOOLS[0]},
    {"type": "function", "name": "weather", "function": TOOLS[0]},
    {key: value for key, value in TOOLS[0].items() if key != "type"},
    {"name": "weather", "description": "Tells it.", "input_schema": SCHEMA},
    {"type": "custom", "name": "weather", "description": "Tells it.", "input_schema": SCHEMA},
], ids=str)
def test_a_tool_in_the_form_of_another_api_is_the_same_tool(tool: Json) -> None:
    found = turn(tools=[tool])

    assert found.tools == (ocp.Tool("weather", "Tells it.", SCHEMA),)
    assert not [path for path in found.ignored if path.startswith("tools")]


def test_a_custom_tool_in_the_form_of_chat_completions_is_the_same_tool() -> None:
    plain = {"name": "patch", "description": "Changes files.", "format": {"type": "text"}}
    nested, flat = ({"type": "custom", "custom": plain}, {"type": "custom", **plain})

    assert turn(tools=[nested]).tools == turn(tools=[flat]).tools != ()


def test_tools_of_other_types_are_named_as_ignored() -> None:
    found = turn(tools=[{"type": "web_search"}, *TOOLS, {"type": "mcp", "server_label": "x"}])

    assert [tool.name for tool in found.tools] == ["weather", "clock"]
    assert found.ignored == ("tools[0]", "tools[3]", "tools[].strict")


#: Tools as Codex sends those of an MCP server.
NAMESPACE = {"type": "namespace", "name": "mcp__birds", "description": "Tools about birds.",
             "tools": [{**TOOLS[0], "name": "find"}, {"type": "web_search"}]}


def test_tools_of_a_namespace_are_offered_under_their_full_names() -> None:
    found = turn(tools=[NAMESPACE, {**NAMESPACE, "name": "fish__"}, *TOOLS])

    names = [tool.name for tool in found.tools]
    assert names == ["mcp__birds__find", "fish__find", "weather", "clock"]
    assert found.tools[0].schema == SCHEMA
    assert found.ignored == ("tools[0].tools[1]", "tools[1].tools[1]", "tools[].strict")


@pytest.mark.parametrize("render", [whole_bytes, stream_bytes])
def test_a_call_of_such_a_tool_names_its_namespace_apart(render: Any) -> None:
    events = numbered([STARTED, *call(0, "toolu1", "mcp__birds__find", "{}"), finished("tool_use")])

    sent = render(ocp.RESPONSES, turn(tools=[NAMESPACE]), events)

    body = json.loads(sent) if render is whole_bytes else frames(sent)[-1][1]["response"]
    [item] = body["output"]
    assert (item["namespace"], item["name"]) == ("mcp__birds", "find")
    assert b'"name":"mcp__birds__find"' not in sent


def test_such_a_call_comes_back_under_its_full_name() -> None:
    made = {**CALLED, "namespace": "mcp__birds", "name": "find"}

    found = turn([USER, made, RESULT], tools=[NAMESPACE])

    assert found.messages[1].content[0]["name"] == "mcp__birds__find"


@pytest.mark.parametrize(
    ("choice", "wanted", "left"),
    [
        (None, ("auto", ""), 2),
        ("required", ("any", ""), 2),
        ({"type": "function", "name": "clock"}, ("tool", "clock"), 2),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"name": "clock"}]},
         ("any", ""), 1),
        ({"type": "allowed_tools", "mode": "auto", "tools": [
            {"type": "mcp", "server_label": "birds"}, {"type": "function", "name": "clock"}]},
         ("auto", ""), 1),
    ],
    ids=str,
)
def test_a_choice_has_its_kind_and_its_tool(choice: object, wanted: Any, left: int) -> None:
    found = turn(tools=TOOLS, tool_choice=choice)

    assert (found.tool_choice, len(found.tools)) == (ocp.ToolChoice(*wanted), left)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "namespace", "tools": []}]}, "tools[0].name"),
        ({"tools": [{"type": "namespace", "name": "a", "tools": [7]}]}, "tools[0].tools[0]"),
        ({"tools": [{"type": "function", "name": "a", "parameters": 7}]}, "tools[0].parameters"),
        ({"tools": [TOOLS[0], {**TOOLS[0], "description": "Other."}]}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "gone"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
    ids=str,
)
def test_tools_that_are_wrong_are_refused(fields: Json, param: str) -> None:
    error = refusal(**fields)

    assert (error.status, error.param) == (400, param)


# -- answers, byte for byte ---------------------------------------------------

#: Answers by the name of their golden file, which also says how they are asked for.
ANSWERS = {
    "whole": [STARTED, *TEXT, finished()],
    "whole-thinking": [STARTED, *THINKING, *TEXT, REASONED],
    "whole-summary": [STARTED, *THINKING, *TEXT, REASONED],
    "whole-length": [STARTED, *TEXT, finished("max_tokens")],
    "whole-filter": [STARTED, *TEXT, finished("refusal")],
    "whole-empty": [STARTED, finished("max_tokens")],
    "whole-restart": [STARTED, *THINKING, *TEXT, ocp.Restarted(), STARTED, *TEXT, finished()],
    "whole-tools": [STARTED, *TEXT, *WEATHER, *SECOND, finished("tool_use")],
    "whole-tools-cut": [STARTED, *TEXT, *CUT_OFF, finished("max_tokens")],
    "whole-refusal": [STARTED, REFUSED, finished()],
    "stream": [STARTED, *TEXT, finished()],
    "stream-thinking": [STARTED, *THINKING, *TEXT, REASONED],
    "stream-summary": [STARTED, *THINKING, *TEXT, REASONED],
    "stream-length": [STARTED, *TEXT, finished("max_tokens")],
    "stream-filter": [STARTED, *TEXT, finished("refusal")],
    "stream-empty": [STARTED, finished("max_tokens")],
    "stream-ticks": [ocp.Tick(), STARTED, *TEXT[:2], ocp.Tick(), *TEXT[2:], finished()],
    "stream-restart-before-text": [STARTED, ocp.Restarted(), STARTED, *TEXT, finished()],
    "stream-restart-in-text": [STARTED, *TEXT, ocp.Restarted(), STARTED, *TEXT, finished()],
    "stream-restart-in-summary": [
        STARTED, *THINKING[:2], ocp.Restarted(), STARTED, *THINKING, *TEXT, finished(),
    ],
    "stream-error": [STARTED, *TEXT[:2], ocp.Overloaded("Overloaded")],
    "stream-error-after-item": [
        STARTED, *THINKING, *TEXT, ocp.UpstreamTimeout("The time is up."),
    ],
    "stream-tools": [STARTED, *TEXT, *WEATHER, *SECOND, finished("tool_use")],
    "stream-tools-cut": [STARTED, *TEXT, *CUT_OFF, finished("max_tokens")],
    "stream-refusal": [STARTED, REFUSED, finished()],
}
STREAMS = sorted(name for name in ANSWERS if name.startswith("stream"))
BROKEN = ("stream-error", "stream-error-after-item", "stream-filter", "stream-restart-in-text")
COMPLETE = [name for name in STREAMS if name not in BROKEN]


def asked(name: str) -> Any:
    """The Turn that a golden answer belongs to, with nothing in it that changes."""
    reasoning = {"summary": "auto"} if "summary" in name else None
    found = turn(stream=name.startswith("stream"), reasoning=reasoning)
    echo = {**found.reply_format.echo, "id": "resp_1", "created_at": CREATED_S}
    return found._replace(reply_format=found.reply_format._replace(echo=echo))


@pytest.fixture(autouse=True)
def counted_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are counted, so that answers are the same each time."""
    count = iter(range(1_000_000))
    monkeypatch.setattr(ocp, "new_id", lambda prefix: f"{prefix}{next(count)}")


def answer(name: str) -> bytes:
    """The bytes of an answer as the server sends them."""
    render = whole_bytes if name.startswith("whole") else stream_bytes
    return render(ocp.RESPONSES, asked(name), numbered(ANSWERS[name]))


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_an_answer_is_the_same_to_the_byte(name: str) -> None:
    check_golden(golden_name("responses", name), answer(name))


def test_every_golden_file_has_its_answer() -> None:
    assert {file.name for file in GOLDEN.glob("responses-*")} == {
        golden_name("responses", name) for name in ANSWERS
    }


# -- answers, in words --------------------------------------------------------


def without_ids(value: Any) -> Any:
    """The same without the ids of items, which every rendering makes anew."""
    if isinstance(value, dict):
        return {key: without_ids(part) for key, part in value.items() if key != "id"}
    return [without_ids(part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", STREAMS)
def test_events_are_named_after_their_type_and_counted(name: str) -> None:
    found = frames(answer(name))

    assert all(kind == data["type"] for kind, data in found)
    assert [data["sequence_number"] for _, data in found] == list(range(len(found)))


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_begins_with_the_response_and_ends_with_it(name: str) -> None:
    kinds = [kind for kind, _ in frames(answer(name))]

    ends = ("response.completed", "response.incomplete", "response.failed")
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert [kind for kind in kinds if kind in ends] == kinds[-1:]
    assert (kinds[-1] == "response.failed") == (name in BROKEN)


SAME = {
    name: name.replace("stream", "whole", 1)
    for name in COMPLETE if name.replace("stream", "whole", 1) in ANSWERS
}


@pytest.mark.parametrize("name", sorted(SAME))
def test_a_stream_ends_with_the_same_response_as_the_whole_answer(name: str) -> None:
    _, last = frames(answer(name))[-1]

    assert without_ids(last["response"]) == without_ids(json.loads(answer(SAME[name])))


@pytest.mark.parametrize("name", COMPLETE)
def test_every_item_is_added_then_filled_then_done(name: str) -> None:
    state: list[str] = []
    output: list[Json] = []
    text = ""
    for kind, data in frames(answer(name)):
        if kind == "response.output_item.added":
            assert (state, data["output_index"]) == ([], len(output))
            state, text = [data["item"]["id"]], ""
        elif kind.endswith(".delta"):
            assert (state, data["output_index"]) == ([data["item_id"]], len(output))
            text += data["delta"]
        elif kind.endswith((".added", ".done")) and "item_id" in data:
            assert (state, data["output_index"]) == ([data["item_id"]], len(output))
            told = data.get("text", data.get("arguments", data.get("refusal", text)))
            assert told == text
        elif kind == "response.output_item.done":
            assert (state, data["output_index"]) == ([data["item"]["id"]], len(output))
            state = []
            output.append(data["item"])
        elif kind in ("response.completed", "response.incomplete"):
            assert data["response"]["output"] == output


def test_a_stream_repeats_tools_and_instructions_once() -> None:
    asked_for = turn(stream=True, tools=TOOLS, instructions="Be very brief.")

    sent = stream_bytes(ocp.RESPONSES, asked_for, numbered([STARTED, *TEXT, finished()]))

    assert sent.count(b"Tells it.") == sent.count(b"Be very brief.") == 1
    created, *_, (_, last) = frames(sent)
    assert created[1]["response"]["tools"] == []
    assert (last["response"]["tools"], last["response"]["instructions"]) == (
        TOOLS, "Be very brief.")


# -- compaction ---------------------------------------------------------------


def compacting(**fields: object) -> Any:
    """The Turn of a request to compact a conversation."""
    return ocp.COMPACTION.parse({"input": [USER, CALLED, RESULT], **fields}, parsing())


def test_to_compact_a_conversation_is_to_ask_for_its_summary() -> None:
    found = compacting(tools=TOOLS, stream=True, instructions="Be brief.")

    assert [message.role for message in found.messages] == ["user", "assistant", "user"]
    assert "summary" in found.messages[-1].content[-1]["text"]
    assert (found.stream, found.tool_choice.kind, found.system) == (False, "none", "Be brief.")
    assert not ocp.COMPACTION.stores(found)


def test_a_compacted_conversation_is_the_user_s_messages_and_a_summary() -> None:
    body = whole(ocp.COMPACTION, compacting(), numbered([STARTED, *TEXT, finished()]))

    message, summary = body["output"]
    assert (body["object"], set(body)) == (
        "response.compaction", {"id", "object", "created_at", "output", "usage"})
    assert message["content"] == [{"type": "input_text", "text": "Hello"}]
    assert summary["type"] == "compaction"
    goes_on = turn([*body["output"], {"role": "user", "content": "Go on."}])
    [(role, texts)] = conversation(goes_on)
    assert (texts[0], texts[2], goes_on.ignored) == ("Hello", "Go on.", ())
    assert 'Gr\u00fc\u00dfe, "du"' in texts[1]


def test_an_earlier_response_is_compacted_too() -> None:
    said = [ocp.Message("user", [block("a")]), ocp.Message("assistant", [block("b")])]

    found = ocp.COMPACTION.parse(
        {"previous_response_id": "resp_1"}, parsing(recall=lambda response_id: said))

    assert conversation(found)[:2] == [("user", ["a"]), ("assistant", ["b"])]
    [kept] = found.reply_format.user_items
    assert kept["content"] == [{"type": "input_text", "text": "a"}]


def test_an_answer_without_a_summary_is_a_failure() -> None:
    with pytest.raises(ocp.UpstreamFailed):
        whole(ocp.COMPACTION, compacting(), numbered([STARTED, *THINKING, finished()]))


@pytest.mark.parametrize("name", ["stream-tools-cut", "whole-tools-cut"])
def test_a_call_that_was_cut_off_is_never_done(name: str) -> None:
    sent = answer(name)

    assert b"function_call_arguments.done" not in sent
    body = json.loads(sent) if name.startswith("whole") else frames(sent)[-1][1]["response"]
    assert [item["type"] for item in body["output"]] == ["message"]
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}


def test_nothing_is_sent_before_the_first_block() -> None:
    renderer = ocp.RESPONSES.renderer(asked("stream"))

    for event in (STARTED, ocp.Restarted(), STARTED, *THINKING):
        assert renderer.event(0, event) == b""


def test_silence_is_an_event_and_never_the_first_one() -> None:
    kinds = [kind for kind, _ in frames(answer("stream-ticks"))]

    assert kinds[:3] == ["response.created", "response.in_progress", "keepalive"]
    assert kinds.count("keepalive") == 2


def test_thinking_is_told_as_a_summary_and_only_when_asked() -> None:
    assert b"greets" not in answer("stream-thinking") + answer("whole-thinking")
    assert b"Someone greets." in answer("whole-summary")


ALL_THINKING = [
    *THINKING, ocp.BlockStarted(0, SEALED), ocp.BlockStopped(0),
]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("summary", [None, "auto"])
def test_thinking_is_sealed_for_a_client_that_asks_for_it(
    is_streamed: bool, summary: str | None
) -> None:
    asked = turn(stream=is_streamed, reasoning={"summary": summary},
                 include=["reasoning.encrypted_content"])
    events = numbered([STARTED, *ALL_THINKING, *TEXT, finished()])
    render = stream_bytes if is_streamed else whole_bytes
    sent = render(ocp.RESPONSES, asked, events)
    if is_streamed:
        done = [data["item"] for kind, data in frames(sent) if kind.endswith("output_item.done")]
        output = frames(sent)[-1][1]["response"]["output"]
        assert done == output
    else:
        output = json.loads(sent)["output"]

    thought, sealed, message = output
    assert [item["type"] for item in output] == ["reasoning", "reasoning", "message"]
    texts = [part["text"] for part in thought["summary"]]
    assert texts == (["Someone greets."] if summary else [])
    again = turn([USER, thought, sealed, message, USER]).messages[1].content
    assert again[0]["thinking"] == "Someone greets." and again[0]["signature"]
    assert again[1] == SEALED


@pytest.mark.parametrize("is_streamed", [False, True])
def test_thinking_that_was_cut_off_is_not_sealed(is_streamed: bool) -> None:
    asked = turn(stream=is_streamed, include=["reasoning.encrypted_content"])
    render = stream_bytes if is_streamed else whole_bytes

    sent = render(ocp.RESPONSES, asked, numbered([STARTED, *THINKING[:2], finished("max_tokens")]))

    assert b'"reasoning"' in sent and b"encrypted_content" not in sent


@pytest.mark.parametrize("include", [None, [], "reasoning.encrypted_content", {"a": 1}, [7]])
def test_thinking_is_not_sealed_for_others(include: object) -> None:
    asked = turn(include=include)

    sent = whole_bytes(ocp.RESPONSES, asked, numbered([STARTED, *THINKING, *TEXT, finished()]))

    assert b'"rs_' not in sent and asked.ignored == ()


def test_an_item_that_a_failure_cut_off_is_never_done() -> None:
    found = frames(answer("stream-error-after-item"))

    assert found[-1][1]["response"]["status"] == "failed"
    assert "response.output_item.done" not in [kind for kind, _ in found]


def test_the_response_of_a_stream_is_kept_for_the_store() -> None:
    renderer = ocp.RESPONSES.renderer(asked("stream"))
    sent = [renderer.event(0, event) for event in numbered(ANSWERS["stream"])]

    assert renderer.body == frames(b"".join(sent))[-1][1]["response"]
    assert renderer.end() == b""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ocp.Overloaded("No."), "server_is_overloaded"),
        (ocp.PlanLimit("No."), "insufficient_quota"),
        (ocp.ContextTooLong("No."), "context_length_exceeded"),
        (ocp.RateLimited("No."), "rate_limit_exceeded"),
        (ocp.BadRequest("No."), "invalid_prompt"),
        (ocp.OcpError("No."), "server_error"),
    ],
)
def test_a_failure_in_a_stream_has_a_code_that_clients_know(error: Any, code: str) -> None:
    *_, (kind, data) = frames(ocp.RESPONSES.renderer(asked("stream")).failure(error, REQUEST_ID))

    assert (kind, data["response"]["status"]) == ("response.failed", "failed")
    assert data["response"]["error"] == {"code": code, "message": "No."}


def test_a_failure_before_a_stream_has_the_shape_of_openai_s() -> None:
    body = ocp.RESPONSES.error_body(ocp.BadRequest("No.", param="input"), REQUEST_ID)

    assert body == {"error": {"message": "No.", "type": "invalid_request_error",
                              "param": "input", "code": None}}


def test_limits_hold_here_too() -> None:
    image = {"type": "input_image", "image_url": PNG}

    error = refusal([{"role": "user", "content": [image] * (LIMITS.max_images + 1)}])

    assert (error.status, error.error_code) == (413, "too_many_images")
