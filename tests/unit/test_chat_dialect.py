"""The dialect of chat completions: JSON into a Turn, events into bytes.

Tools have a file of their own, and so has structured output.
"""
from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from project import load_script
from rendering import (
    CLOCK,
    CREATED_S,
    CUT_OFF,
    GOLDEN,
    LIMITS,
    PNG,
    REASONED,
    REFUSED,
    SECOND,
    STARTED,
    TEXT,
    THINKING,
    USAGE,
    USER,
    WEATHER,
    block,
    check_golden,
    conversation,
    finished,
    frames,
    gathered,
    golden_name,
    parsing,
    refusal_of,
    stream_bytes,
    whole,
    whole_bytes,
)

ocp = load_script("ocp_server.py")

Json = dict[str, Any]


def parse(body: object, limits: Any = LIMITS) -> Any:
    """The Turn of a body."""
    return ocp.CHAT.parse(body, parsing(limits))


def turn(*messages: object, **fields: object) -> Any:
    """The Turn of a request with these messages, or with one from the user."""
    return parse({"messages": list(messages) or [USER], **fields})


def refusal(body: object, limits: Any = LIMITS) -> Any:
    """The error that a body gives."""
    return refusal_of(ocp.CHAT, body, parsing(limits))


# -- the forms of content -----------------------------------------------------


@pytest.mark.parametrize(
    ("content", "blocks"),
    [
        ("Hello", [block("Hello")]),
        ("  Hello\n", [block("  Hello\n")]),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], [block("a"), block("b")]),
        ([{"type": "text", "text": ""}, {"type": "text", "text": "b"}], [block("b")]),
        ([{"type": "input_text", "text": "a"}], [block("a")]),
        ([{"type": "output_text", "text": "a", "annotations": []}], [block("a")]),
        ([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}], [block("a")]),
        ("\U0001f600 \u00e9 \ud83d", [block("\U0001f600 \u00e9 \ud83d")]),
    ],
    ids=["text", "outer white space", "parts", "an empty part", "input_text", "output_text",
         "unknown fields", "a lone surrogate"],
)
def test_content_becomes_text_blocks(content: object, blocks: list[Json]) -> None:
    assert turn({"role": "user", "content": content}).messages == [ocp.Message("user", blocks)]


@pytest.mark.parametrize("content", [None, "", " \n\t", [], [{"type": "text", "text": " "}]])
def test_a_message_without_a_word_is_left_out(content: object) -> None:
    found = turn({"role": "user", "content": content}, USER)

    assert conversation(found) == [("user", ["Hello"])]


def test_a_message_without_content_at_all_is_left_out() -> None:
    assert conversation(turn({"role": "assistant"}, USER)) == [("user", ["Hello"])]


@pytest.mark.parametrize(
    "refused",
    [{"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]},
     {"role": "assistant", "content": None, "refusal": "I cannot."}],
    ids=["a part", "a field"],
)
def test_an_earlier_refusal_is_part_of_the_conversation(refused: Json) -> None:
    found = turn(USER, refused, USER)

    assert conversation(found)[1] == ("assistant", ["I cannot."])


@pytest.mark.parametrize("content", [None, "", "  ", []])
def test_a_request_without_a_word_is_refused(content: object) -> None:
    error = refusal({"messages": [{"role": "user", "content": content}]})

    assert (error.status, error.param) == (400, "messages")


# -- roles and their order ----------------------------------------------------


def test_system_and_developer_messages_at_the_start_become_the_system_prompt() -> None:
    found = turn(
        {"role": "system", "content": "One."},
        {"role": "system", "content": ""},
        {"role": "developer", "content": [block("Two."), block("Three.")]},
        USER,
    )

    assert found.system == "One.\n\nTwo.\n\nThree."
    assert conversation(found) == [("user", ["Hello"])]


def reminder(text: str) -> str:
    """What a later message of the system looks like among the user's."""
    return f"<system-reminder>\n{text}\n</system-reminder>"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_later_message_of_the_system_stays_where_it_stands(role: str) -> None:
    late = {"role": role, "content": [block("Be brief."), block(" ")]}
    answer = {"role": "assistant", "content": "Hi."}

    found = turn({"role": "system", "content": "One."}, USER, late, answer, late, USER, late)

    assert found.system == "One."
    assert conversation(found) == [
        ("user", ["Hello", reminder("Be brief.")]),
        ("assistant", ["Hi."]),
        ("user", [reminder("Be brief."), "Hello", reminder("Be brief.")]),
    ]


def test_a_message_of_the_system_between_call_and_result_goes_into_the_last_result() -> None:
    calls = [{"id": call_id, "type": "function", "function": {"name": "f", "arguments": "{}"}}
             for call_id in ("t1", "t2")]
    late = {"role": "system", "content": "Be brief."}
    first, last = [{"role": "tool", "tool_call_id": call_id, "content": call_id}
                   for call_id in ("t1", "t2")]

    found = turn(USER, {"role": "assistant", "tool_calls": calls}, late, first, late, last, late)

    results = found.messages[-1].content
    assert [[part["text"] for part in each["content"]] for each in results] == [
        ["t1", reminder("Be brief.")], ["t2", *[reminder("Be brief.")] * 2]]


def test_a_later_message_of_the_system_beside_results_goes_into_the_last_of_them() -> None:
    call = {"role": "assistant", "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "Noon."}

    found = turn(USER, call, result, {"role": "developer", "content": "Be brief."})

    assert found.messages[-1].content == [{
        "type": "tool_result", "tool_use_id": "c1",
        "content": [block("Noon."), block(reminder("Be brief."))]}]


def test_without_instructions_there_is_no_system_prompt() -> None:
    assert turn().system == ""


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_request_that_is_all_instructions_asks_them(role: str) -> None:
    found = turn({"role": role, "content": "Say hello."})

    assert (found.system, conversation(found)) == ("", [("user", ["Say hello."])])


def test_an_instruction_after_an_answer_is_there_to_be_answered() -> None:
    answer = {"role": "assistant", "content": "Hi."}
    rule, task = {"role": "system", "content": "Be kind."}, {"role": "system", "content": "Sum up."}

    asked = turn(rule, USER, answer, task, {"role": "user", "content": ""})
    later = turn(rule, USER, answer, task, answer, USER)

    assert (asked.system, conversation(asked)[2:]) == ("Be kind.", [("user", ["Sum up."])])
    assert conversation(later)[:3] == conversation(asked)


def test_neighbours_of_one_role_become_one_message() -> None:
    found = turn(
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    )

    assert conversation(found) == [
        ("user", ["a", "b"]), ("assistant", ["c", "d"]), ("user", ["e"]),
    ]


def test_messages_around_an_empty_one_are_neighbours() -> None:
    found = turn(USER, {"role": "assistant", "content": ""}, USER)

    assert conversation(found) == [("user", ["Hello", "Hello"])]


@pytest.mark.parametrize(
    "messages",
    [
        [USER, {"role": "assistant", "content": "Hel"}],
        [{"role": "assistant", "content": "Hel"}],
        [USER, {"role": "assistant", "content": "Hel"}, {"role": "user", "content": " "}],
    ],
)
def test_a_conversation_that_ends_with_an_answer_is_asked_to_go_on(messages: list[Json]) -> None:
    found = turn(*messages)

    assert conversation(found)[-2:] == [
        ("assistant", ["Hel"]), ("user", ["Continue exactly where your last message ends."])]
    assert found.adjusted == (("assistant_last", 1),)


def test_after_an_answer_a_form_is_asked_for_where_one_is_wanted() -> None:
    found = turn(USER, {"role": "assistant", "content": "Paris."},
                 response_format={"type": "json_object"})

    assert conversation(found)[-1] == (
        "user", ["Give the answer of this conversation in the required form."])


def test_an_empty_answer_at_the_end_is_no_answer() -> None:
    found = turn(USER, {"role": "assistant", "content": ""})

    assert (conversation(found), found.adjusted) == ([("user", ["Hello"])], ())


# -- parameters ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "model_id"),
    [({}, "claude-sonnet-5-5"), ({"model": ""}, "claude-sonnet-5-5"), ({"model": None},
     "claude-sonnet-5-5"), ({"model": "opus"}, "claude-opus-5-5"),
     ({"model": "claude-of-2030"}, "claude-of-2030")],
)
def test_the_model_is_the_named_one_or_the_default(fields: Json, model_id: str) -> None:
    assert turn(**fields).model.id == model_id


def test_an_unknown_model_is_not_found() -> None:
    error = refusal({"model": "gpt-4o", "messages": [USER]})

    assert (error.status, error.error_code) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, None),
        ({"max_tokens": 16}, 16),
        ({"max_tokens": 16.0}, 16),
        ({"max_completion_tokens": 32}, 32),
        ({"max_completion_tokens": 32, "max_tokens": 16}, 32),
        ({"max_completion_tokens": None, "max_tokens": 16}, 16),
    ],
)
def test_the_newer_name_of_the_limit_wins(fields: Json, limit: int) -> None:
    assert turn(**fields).options.max_tokens == limit


@pytest.mark.parametrize(
    ("stop", "sequences"),
    [(None, ()), ("END", ("END",)), (["a", "b"], ("a", "b")), ("", ()), ([], ()), (["", "a"],
     ("a",)), (" a\n", (" a\n",))],
)
def test_stop_is_one_sequence_or_several(stop: object, sequences: tuple[str, ...]) -> None:
    assert turn(stop=stop).options.stop_sequences == sequences


def test_very_many_stop_sequences_are_refused() -> None:
    texts = [str(number) for number in range(257)]

    assert turn(stop=texts[:256]).options.local_stops == tuple(texts[16:256])
    with pytest.raises(ocp.BadRequest) as caught:
        turn(stop=texts)
    assert (caught.value.param, caught.value.message) == (
        "stop", "stop: must be at most 256 texts.")


@pytest.mark.parametrize(
    ("stop", "sent", "own"),
    [
        ("\n", (), ("\n",)),
        (["\n\n", "END", " "], ("END",), ("\n\n", " ")),
        (["END", "END", ""], ("END",), ()),
        ([f"s{n}" for n in range(20)], tuple(f"s{n}" for n in range(16)),
         ("s16", "s17", "s18", "s19")),
    ],
    ids=str,
)
def test_the_api_gets_the_stop_sequences_that_it_takes(
    stop: object, sent: tuple[str, ...], own: tuple[str, ...]
) -> None:
    options = turn(stop=stop).options

    assert (options.api_stops, options.local_stops) == (sent, own)


@pytest.mark.parametrize(
    "fields",
    [{"max_tokens": -1}, {"max_tokens": 0}, {"max_completion_tokens": -1}, {"top_p": -1},
     {"top_k": -1}, {"top_k": 0}, {"temperature": -1}, {"reasoning_effort": ""},
     {"tool_choice": ""}, {"response_format": {"type": ""}}, {"functions": []}],
    ids=str,
)
def test_values_that_stand_for_nothing_are_as_if_they_were_not_there(fields: Json) -> None:
    plain, found = turn(model="claude-haiku-4-5"), turn(model="claude-haiku-4-5", **fields)

    assert (found.options, found.ignored) == (plain.options, ())
    assert (found.tool_choice, found.output_schema) == (plain.tool_choice, None)
    assert found.reply_format.has_functions is False


def test_a_limit_that_is_none_leaves_room_for_the_older_one() -> None:
    assert turn(max_completion_tokens=-1, max_tokens=50).options.max_tokens == 50


def test_of_two_limits_the_newer_one_counts_and_neither_is_named() -> None:
    found = turn(max_completion_tokens=78, max_tokens=5)

    assert (found.options.max_tokens, found.ignored) == (78, ())


@pytest.mark.parametrize(
    ("fields", "tokens", "ignored"),
    [
        ({"reasoning": {"effort": "low"}}, 2_048, ()),
        ({"reasoning": {"max_tokens": 3_000}}, 3_000, ()),
        ({"reasoning": {"enabled": True}}, 8_192, ()),
        ({"reasoning": {"enabled": False}}, 0, ()),
        ({"reasoning": {"effort": "none"}}, 0, ()),
        ({"thinking": {"type": "enabled", "budget_tokens": 4_096}}, 4_096, ()),
        ({"thinking": {"type": "enabled", "budget_tokens": 10}}, 1_024,
         ("thinking.budget_tokens",)),
        ({"thinking": {"type": "adaptive"}}, 8_192, ()),
        ({"thinking": {"type": "disabled"}}, 0, ()),
        ({"output_config": {"effort": "high"}}, 16_000, ()),
        ({"reasoning_effort": "minimal", "reasoning": {"effort": "high"}}, 1_024, ()),
        ({"reasoning": True}, 0, ("reasoning",)),
        ({"thinking": "on"}, 0, ("thinking",)),
    ],
    ids=str,
)
def test_thinking_is_asked_for_wherever_clients_say_it(
    fields: Json, tokens: int, ignored: tuple[str, ...]
) -> None:
    found = turn(model="claude-haiku-4-5", **fields)

    assert (found.options.thinking_tokens, found.ignored) == (tokens, ignored)


def test_a_budget_for_a_model_that_decides_by_itself_is_named() -> None:
    found = turn(model="opus", reasoning={"max_tokens": 3_000})

    assert (found.options.thinking_tokens, found.ignored) == (None, ("reasoning.max_tokens",))


@pytest.mark.parametrize(
    "fields", [{"reasoning": {"exclude": True}}, {"thinking": {"display": "omitted"}}], ids=str
)
def test_thinking_can_be_left_out_of_the_answer(fields: Json) -> None:
    assert turn(**fields).options.hides_thinking is True


@pytest.mark.parametrize(
    ("asked", "sent", "ignored"),
    [(0, (("temperature", 0.0),), ()), (0.7, (("temperature", 0.7),), ()), (1, (), ()),
     (1.3, (), ("temperature",)), (2, (), ("temperature",))],
)
def test_a_temperature_beyond_the_api_s_scale_is_named_as_ignored(
    asked: float, sent: Any, ignored: Any
) -> None:
    found = turn(model="claude-haiku-4-5", temperature=asked)

    assert (found.options.sampling, found.ignored) == (sent, ignored)


@pytest.mark.parametrize(("asked", "choices"), [(None, 1), (1, 1), (2, 2), (8, 8), (3.0, 3)])
def test_several_answers_may_be_asked_for(asked: object, choices: int) -> None:
    found = turn(n=asked)

    assert (found.choices, found.other_prompts) == (choices, ())


@pytest.mark.parametrize(
    ("fields", "session_id"),
    [({}, ""), ({"ocp_session_id": "s1"}, "s1"), ({"session_id": "s1"}, "")],
)
def test_a_session_may_be_named(fields: Json, session_id: str) -> None:
    assert turn(**fields).session_id == session_id


def test_a_session_comes_before_what_is_new() -> None:
    asked: list[tuple[str, str]] = []

    def session(session_id: str, system: str) -> list[Any]:
        asked.append((session_id, system))
        return [ocp.Message("user", [block("a")]), ocp.Message("assistant", [block("b")])]

    body = {"ocp_session_id": "s1", "messages": [{"role": "system", "content": "Be brief."}, USER]}
    found = ocp.CHAT.parse(body, parsing(session=session))

    assert asked == [("s1", "Be brief.")]
    assert conversation(found) == [("user", ["a"]), ("assistant", ["b"]), ("user", ["Hello"])]


def test_a_request_with_answers_of_its_own_knows_its_history_better() -> None:
    body = {"ocp_session_id": "s1", "messages": [USER, {"role": "assistant", "content": "b"}, USER]}

    found = ocp.CHAT.parse(body, parsing(session=lambda session_id, system: [1 / 0]))

    assert len(found.messages) == 3


def test_an_effort_is_passed_on() -> None:
    assert turn(model="opus", reasoning_effort="low").options.effort == "low"


@pytest.mark.parametrize(("stream", "wanted"), [(True, True), (False, False), (None, False)])
def test_an_answer_is_streamed_when_asked(stream: object, wanted: bool) -> None:
    assert turn(stream=stream).stream is wanted


@pytest.mark.parametrize(
    ("options", "wanted"),
    [(None, False), ({}, False), ({"include_usage": True}, True), ({"include_usage": None}, False)],
)
def test_usage_in_a_stream_is_included_when_asked(options: object, wanted: bool) -> None:
    assert turn(stream_options=options).reply_format.include_usage is wanted


def test_the_answer_names_the_model_that_an_alias_stands_for() -> None:
    assert turn(model="opus").reply_format.model == "claude-opus-5-5"


def test_every_answer_has_an_id_of_its_own() -> None:
    first, second = turn().reply_format.id, turn().reply_format.id

    assert first != second
    assert first.startswith("chatcmpl-") and first[len("chatcmpl-"):].isalnum()


# -- what is ignored, and what is refused -------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 7), ("user", "me"), ("presence_penalty", 0.5), ("frequency_penalty", -1),
     ("logit_bias", {"1": 2}), ("store", True), ("metadata", {"a": "b"}),
     ("service_tier", "flex"), ("prediction", {"type": "content"}), ("verbosity", "low"),
     ("prompt_cache_key", "k"), ("safety_identifier", "i"), ("web_search_options", {"a": 1}),
     ("prompt_cache_retention", "24h")],
)
def test_a_harmless_parameter_is_named_as_ignored(name: str, value: object) -> None:
    assert turn(**{name: value}).ignored == (name,)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_a_harmless_parameter_that_asks_for_nothing_is_not_mentioned(value: object) -> None:
    assert turn(seed=value, store=value, metadata=value).ignored == ()


def test_a_parameter_that_the_model_does_not_take_is_named_as_ignored() -> None:
    assert turn(model="opus", temperature=0.3).ignored == ("temperature",)


@pytest.mark.parametrize("name", ["frobnicate", "thread_id", "x" * 500])
def test_a_field_that_nobody_reads_is_named(name: str) -> None:
    (named,) = turn(**{name: {"a": 1}}).ignored

    assert named == name or (len(named) <= 80 and name.startswith(named[:-3]))


@pytest.mark.parametrize("value", [None, False, 0, "", "none", [], {}], ids=str)
def test_a_field_that_asks_for_nothing_is_not_named(value: object) -> None:
    assert turn(frobnicate=value).ignored == ()


def test_what_the_sdks_send_by_themselves_is_not_named() -> None:
    found = turn(
        stream=True, stream_options={"include_usage": True}, n=1, max_tokens=64, stop=None,
        temperature=1, top_p=1, tool_choice="auto", parallel_tool_calls=True,
        tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        response_format={"type": "text"}, reasoning_effort="low", system="Be brief.",
    )

    assert found.ignored == ()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
    ],
)
def test_what_would_change_the_answer_s_meaning_is_refused(fields: Json, param: str) -> None:
    error = refusal({"messages": [USER], **fields})

    assert (error.status, error.error_code) == (400, "unsupported_parameter")
    assert error.param == param


@pytest.mark.parametrize(
    "fields",
    [{"logprobs": False}, {"top_logprobs": 0}, {"audio": None}, {"modalities": ["text"]},
     {"n": 1}, {"n": None}, {"tools": []}, {"functions": None},
     {"response_format": {"type": "text"}}, {"response_format": None}],
)
def test_the_plain_form_of_such_a_parameter_is_fine(fields: Json) -> None:
    assert turn(**fields).ignored == ()


# -- wrong types name their place ---------------------------------------------


@pytest.mark.parametrize("body", [None, [], "text", 7, True])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    error = refusal(body)

    assert (error.status, error.param) == (400, None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 7}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": [USER, "Hello"]}, "messages[1]"),
        ({"messages": [None]}, "messages[0]"),
        ({"messages": [{"content": "Hello"}]}, "messages[0].role"),
        ({"messages": [{"role": 7, "content": "Hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "Hello"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "user", "content": 7}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content"),
        ({"messages": [{"role": "system", "content": 7}]}, "messages[0].content"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"max_tokens": "16"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"max_tokens": float("inf")}, "max_tokens"),
        ({"max_completion_tokens": 0.5}, "max_completion_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": False}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": [1]}, "top_p"),
        ({"stop": 7}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stop": ["a", 7]}, "stop"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"reasoning_effort": 3}, "reasoning_effort"),
        ({"n": "2"}, "n"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": 1.5}, "n"),
        ({"ocp_session_id": 7}, "ocp_session_id"),
        ({"tools": {}}, "tools"),
        ({"tools": [7]}, "tools[0]"),
        ({"functions": "f"}, "functions"),
        ({"modalities": "text"}, "modalities"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": 7}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
    ],
)
def test_a_wrong_type_is_refused_with_the_path_of_the_field(fields: Json, param: str) -> None:
    error = refusal({"messages": [USER], **fields})

    assert (error.status, error.param) == (400, param)
    assert param in error.message


@pytest.mark.parametrize(
    ("part", "below"),
    [
        (7, ""),
        (None, ""),
        ({}, ".type"),
        ({"type": 7}, ".type"),
        ({"type": "tool_use", "id": "a", "name": "b"}, ".type"),
        ({"type": "input_audio"}, ".type"),
        ({"type": "text"}, ".text"),
        ({"type": "text", "text": 7}, ".text"),
        ({"type": "text", "text": None}, ".text"),
        ({"type": "refusal", "refusal": 7}, ".refusal"),
        ({"type": "image_url"}, ".image_url"),
        ({"type": "image_url", "image_url": 7}, ".image_url"),
        ({"type": "image_url", "image_url": {}}, ".image_url"),
        ({"type": "image_url", "image_url": {"url": ""}}, ".image_url"),
        ({"type": "image_url", "image_url": {"url": 7}}, ".image_url.url"),
    ],
)
def test_a_wrong_part_is_refused_with_its_path(part: object, below: str) -> None:
    error = refusal({"messages": [USER, {"role": "user", "content": [block("a"), part]}]})

    assert (error.status, error.param) == (400, "messages[1].content[1]" + below)


def test_texts_in_an_array_are_parts() -> None:
    found = turn({"role": "user", "content": ["a", block("b"), "c"]})

    assert conversation(found) == [("user", ["a", "b", "c"])]


@pytest.mark.parametrize("image", [PNG, PNG.split(",")[1], {
    "type": "image_url", "image_url": {"url": PNG}}], ids=["uri", "base64", "part"])
def test_images_beside_the_content_belong_to_the_message(image: object) -> None:
    found = turn({"role": "user", "content": "What is it?", "images": [image], "name": "Bob"})

    assert [each["type"] for each in found.messages[0].content] == ["text", "image"]
    assert found.ignored == ()


def test_what_an_answer_holds_beside_its_content_is_named() -> None:
    said = {"role": "assistant", "content": "Here.", "audio": {"id": "a"}, "reasoning": "Hm.",
            "images": [{"type": "image_url", "image_url": {"url": PNG}}]}

    assert turn(USER, said, USER).ignored == ("messages[1].audio", "messages[1].images")


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"output_config": {"effort": "low", "task_budget": 7}}, "output_config.task_budget"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"reasoning": {"effort": "low", "depth": 7}}, "reasoning.depth"),
    ],
)
def test_settings_that_nobody_reads_are_named_by_their_path(fields: Json, ignored: str) -> None:
    assert turn(**fields).ignored == (ignored,)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"thinking": {"type": "ENABLED"}}, True),
        ({"thinking": {"enabled": True}}, True),
        ({"thinking": {"type": "auto"}}, True),
        ({"thinking": {"enabled": False}}, False),
        ({"reasoning_effort": "Medium"}, True),
        ({"reasoning_effort": "auto"}, False),
        ({"reasoning_effort": "default"}, False),
    ],
    ids=str,
)
def test_thinking_is_asked_for_in_any_spelling(fields: Json, wanted: bool) -> None:
    found = turn(model="claude-haiku-4-5", **fields)

    assert bool(found.options.thinking_tokens) == wanted
    assert found.ignored == ()


@pytest.mark.parametrize("limit", [2**31 - 1, 2**63, 1e18])
def test_the_largest_number_is_no_wrong_limit(limit: float) -> None:
    assert turn(max_tokens=limit).options.max_tokens == 10**9


def test_limit_and_stop_texts_are_taken_in_the_words_of_the_others() -> None:
    options = turn(max_output_tokens=7, stop="a", stop_sequences=["b", "a"]).options

    assert (options.max_tokens, options.stop_sequences) == (7, ("a", "b"))


# -- images -------------------------------------------------------------------


BEGINNINGS = {
    "image/png": b"\x89PNG", "image/jpeg": b"\xff\xd8\xff", "image/gif": b"GIF89a",
    "image/webp": b"RIFF\n\0\0\0WEBP", "application/pdf": b"%PDF-",
}


def data_uri(size_bytes: int = 16, media_type: str = "image/png") -> str:
    """A data URI of so many bytes, which begin as those of the type do, or as no type's."""
    content = BEGINNINGS.get(media_type.lower(), b"\x89").ljust(size_bytes, b"\x89")
    payload = base64.b64encode(content).decode("ascii")
    return f"data:{media_type};base64,{payload}"


def image(url: object) -> Json:
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}


def asking_about(*parts: Json) -> Json:
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize("media_type", ["image/png", "image/jpeg", "image/gif", "image/webp"])
def test_an_inline_image_becomes_a_block(media_type: str) -> None:
    sent = data_uri(media_type=media_type)
    [message] = parse(asking_about(image(sent))).messages

    source = {"type": "base64", "media_type": media_type, "data": sent.partition(",")[2]}
    assert message.content == [{"type": "image", "source": source}]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": data_uri()},
        {"type": "input_image", "image_url": data_uri()},
        image(data_uri().replace("data:", "DATA:")),
        image(data_uri(media_type="IMAGE/PNG")),
        image(data_uri().replace(";", ";name=a.png;")),
    ],
)
def test_an_image_may_be_written_in_several_ways(part: Json) -> None:
    [message] = parse(asking_about(part)).messages

    assert message.content[0]["source"]["media_type"] == "image/png"


@pytest.mark.parametrize(
    ("content", "media_type"),
    [
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"GIF89a", "image/gif"),
        (b"RIFF\n\0\0\0WEBPVP8 ", "image/webp"),
    ],
)
def test_an_image_has_the_type_by_which_it_begins(content: bytes, media_type: str) -> None:
    uri = f"data:image/gif;base64,{base64.b64encode(content).decode()}"

    [message] = parse(asking_about(image(uri))).messages

    assert message.content[0]["source"]["media_type"] == media_type


def test_an_image_keeps_its_place_among_the_texts() -> None:
    found = parse(asking_about(block("a"), image(data_uri()), block("b")))

    assert conversation(found) == [("user", ["a", "image", "b"])]


def test_an_address_is_passed_on_where_the_operator_allows_it() -> None:
    body = asking_about(image("https://example.com/a.png"))

    [message] = parse(body, LIMITS._replace(image_allow_url=True)).messages

    source = {"type": "url", "url": "https://example.com/a.png"}
    assert message.content == [{"type": "image", "source": source}]


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        ("https://example.com/a.png", 400, "remote_url_disabled"),
        ("http://127.0.0.1/a.png", 400, "remote_url_disabled"),
        ("file:///etc/passwd", 400, "unsupported_url_scheme"),
        ("ftp://example.com/a.png", 400, "unsupported_url_scheme"),
        ("a.png", 400, "invalid_data_uri"),
        ("", 400, "invalid_image_url"),
        ("data:image/png;base64", 400, "invalid_data_uri"),
        ("data:image/png,abcd", 400, "invalid_data_uri"),
        ("data:image/png;base64,", 400, "invalid_data_uri"),
        ("data:image/png;base64,a", 400, "invalid_data_uri"),
        ("data:image/png;base64,ab!=", 400, "invalid_data_uri"),
        ("data:image/png;base64,\u00e9", 400, "invalid_data_uri"),
        (data_uri(8, "image/tiff"), 400, "unsupported_image_type"),
        (data_uri(8, "image/svg+xml"), 400, "unsupported_image_type"),
        ("data:image/gif;base64,UklGRgoAAABXQVZFZm10IA==", 400, "unsupported_image_type"),
        ("/etc/passwd", 400, "unsupported_image_type"),
        (data_uri(8, ""), 400, "unsupported_image_type"),
        (data_uri(65), 413, "image_too_large"),
    ],
)
def test_an_image_that_cannot_be_taken_says_why(url: str, status: int, code: str) -> None:
    error = refusal(asking_about(block("a"), image(url)))

    assert (error.status, error.error_code) == (status, code)
    assert error.param == "messages[0].content[1].image_url"


@pytest.mark.parametrize(("uri", "text"), [
    ("data:text/plain,hello%20world", "hello world"),
    ("data:text/plain;charset=latin-1,caf%E9", "caf\u00e9"),
])
def test_a_text_file_may_come_as_a_uri_without_base64(uri: str, text: str) -> None:
    found = turn({"role": "user", "content": [{"type": "file", "file": {"file_data": uri}}]})

    assert conversation(found) == [("user", [text])]


def test_an_image_of_exactly_the_largest_size_is_taken() -> None:
    assert parse(asking_about(image(data_uri(64)))).messages


def test_the_images_of_a_request_have_a_largest_size_together() -> None:
    error = refusal(asking_about(image(data_uri(60)), image(data_uri(41))))

    assert (error.status, error.error_code) == (413, "images_too_large")


def test_the_images_of_a_question_are_counted_over_all_its_messages() -> None:
    asked = asking_about(image(data_uri()), image(data_uri()))["messages"]

    error = refusal({"messages": [*asked, *asked]})

    assert (error.status, error.error_code) == (413, "too_many_images")
    assert error.param == "messages[1].content[1].image_url"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_hold_no_images(role: str) -> None:
    instruction = {"role": role, "content": [image(data_uri())]}

    error = refusal({"messages": [instruction, USER]})

    assert error.error_code == "images_unsupported_in_system_messages"
    assert error.param == "messages[0].content[0]"


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"stop": 7}, "a string or an array of strings"), ({"max_tokens": -2}, "1 or more"),
     ({"temperature": 3}, "from 0 to 2")],
)
def test_a_refusal_says_what_the_field_takes(fields: Json, words: str) -> None:
    assert words in refusal({"messages": [USER], **fields}).message


def test_no_error_about_an_image_repeats_its_data() -> None:
    error = refusal(asking_about(image("data:image/png;base64,c2VjcmV0!")))

    assert "c2Vj" not in error.message


# -- files --------------------------------------------------------------------


def pdf(size_bytes: int = 8, media_type: str = "application/pdf") -> Json:
    """A file of so many bytes."""
    described = {"filename": "a.pdf", "file_data": data_uri(size_bytes, media_type)}
    return {"type": "file", "file": described}


def test_a_pdf_becomes_a_document() -> None:
    [message] = parse(asking_about(pdf())).messages

    data = data_uri(8, "application/pdf").partition(",")[2]
    source = {"type": "base64", "media_type": "application/pdf", "data": data}
    assert message.content == [{"type": "document", "source": source, "title": "a.pdf"}]


@pytest.mark.parametrize(
    ("part", "status", "code", "below"),
    [
        (pdf(8, "application/zip"), 400, "unsupported_file_type", ".file.file_data"),
        (pdf(101), 413, "images_too_large", ".file.file_data"),
        ({"type": "file", "file": {"file_id": "file-1"}}, 400, "unsupported_parameter",
         ".file.file_id"),
        ({"type": "file", "file": {}}, 400, "unsupported_parameter", ".file.file_data"),
        ({"type": "file", "file": {"file_data": "JVBERi0=!"}}, 400, "invalid_data_uri",
         ".file.file_data"),
        ({"type": "file", "file": 7}, 400, None, ".file"),
    ],
    ids=["no text", "too large", "a stored file", "nothing", "no base64", "no object"],
)
def test_a_file_that_cannot_be_taken_says_why(
    part: Json, status: int, code: str | None, below: str
) -> None:
    error = refusal(asking_about(part))

    assert (error.status, error.error_code) == (status, code)
    assert error.param == "messages[0].content[0]" + below


def test_files_count_as_images_do() -> None:
    error = refusal(asking_about(image(data_uri()), pdf(), image(data_uri()), pdf()))

    assert (error.status, error.error_code) == (413, "too_many_images")


@pytest.mark.parametrize(
    "part", [image(data_uri()), pdf(), {"type": "audio", "audio": {"id": "a"}}],
    ids=["image", "file", "audio"])
def test_what_a_model_cannot_say_is_left_out_of_its_answers_and_named(part: Json) -> None:
    found = turn(USER, {"role": "assistant", "content": [block("See."), part]}, USER)

    assert conversation(found)[1] == ("assistant", ["See."])
    assert found.ignored == ("messages[1].content[1]",)


@pytest.mark.parametrize("kind", ["video", "input_video_frame", "location"])
def test_a_part_of_an_unknown_type_is_left_out_and_named(kind: str) -> None:
    found = turn({"role": "user", "content": [{"type": kind, kind: {}}, block("See?")]})

    assert (conversation(found), found.ignored) == (
        [("user", ["See?"])], ("messages[0].content[0]",))


def test_a_user_s_message_of_which_nothing_can_be_read_is_refused() -> None:
    error = refusal({"messages": [USER, {"role": "user", "content": [{"type": "video"}]}]})

    assert (error.status, error.param) == (400, "messages[1].content[0].type")


# -- answers, byte for byte ---------------------------------------------------

#: Answers by the name of their golden file, which also says how they are asked for.
ANSWERS = {
    "whole": [STARTED, *TEXT, finished()],
    "whole-thinking": [STARTED, *THINKING, *TEXT, REASONED],
    "whole-length": [STARTED, *TEXT, finished("max_tokens")],
    "whole-content_filter": [STARTED, *TEXT, finished("refusal")],
    "whole-empty": [STARTED, finished("stop_sequence")],
    "whole-restart": [STARTED, *THINKING, *TEXT, ocp.Restarted(), STARTED, *TEXT, finished()],
    "whole-tools": [STARTED, *TEXT, *WEATHER, *CLOCK, finished("tool_use")],
    "whole-tools-only": [STARTED, *WEATHER, finished("tool_use")],
    "whole-tools-cut": [STARTED, *CUT_OFF, finished("max_tokens")],
    "whole-legacy": [STARTED, *WEATHER, finished("tool_use")],
    "whole-refusal": [STARTED, REFUSED, finished()],
    "whole-choices": [
        (1, STARTED), (0, STARTED), *((1, event) for event in TEXT), (1, finished()),
        *((0, event) for event in WEATHER), (0, finished("tool_use")),
    ],
    "stream": [STARTED, *TEXT, finished()],
    "stream-usage": [STARTED, *TEXT, REASONED],
    "stream-thinking": [STARTED, *THINKING, *TEXT, REASONED],
    "stream-length": [STARTED, *TEXT, finished("model_context_window_exceeded")],
    "stream-content_filter": [STARTED, *TEXT, finished("refusal")],
    "stream-empty": [STARTED, finished("stop_sequence")],
    "stream-ticks": [ocp.Tick(), STARTED, ocp.Tick(), *TEXT, ocp.Tick(), finished()],
    "stream-restart-before-text": [ocp.Restarted(), STARTED, *TEXT, finished()],
    "stream-restart-in-thinking": [
        STARTED, *THINKING[:3], ocp.Restarted(), STARTED, *TEXT, finished(),
    ],
    "stream-restart-in-text": [STARTED, *TEXT, ocp.Restarted(), STARTED, *TEXT, finished()],
    "stream-restart-in-call": [STARTED, *WEATHER, ocp.Restarted(), STARTED, *TEXT, finished()],
    "stream-error": [STARTED, *TEXT, ocp.UpstreamTimeout("The time is up.")],
    "stream-tools": [STARTED, *TEXT, *WEATHER, *SECOND, finished("tool_use")],
    "stream-legacy": [STARTED, *WEATHER, finished("tool_use")],
    "stream-refusal": [STARTED, REFUSED, finished()],
    "stream-choices-usage": [
        (1, STARTED), (0, STARTED), *((1, event) for event in TEXT), (1, finished()),
        *((0, event) for event in TEXT), (0, finished()),
    ],
}


def asked(name: str) -> Any:
    """The Turn that a golden answer belongs to, with nothing in it that changes."""
    found = turn(stream=name.startswith("stream"), n=2 if "choices" in name else 1)
    form = ocp.CompletionFormat(
        id="chatcmpl-1", created_s=CREATED_S, model="sonnet",
        include_usage=name.endswith("-usage"), has_functions="legacy" in name,
    )
    assert type(found.reply_format) is type(form)
    return found._replace(reply_format=form)


def answer(name: str) -> bytes:
    """The bytes of an answer as the server sends them."""
    render = whole_bytes if name.startswith("whole") else stream_bytes
    return render(ocp.CHAT, asked(name), ANSWERS[name])


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_an_answer_is_the_same_to_the_byte(name: str) -> None:
    check_golden(golden_name("chat", name), answer(name))


def test_every_golden_file_has_its_answer() -> None:
    assert {file.name for file in GOLDEN.glob("chat-*")} == {
        golden_name("chat", name) for name in ANSWERS
    }


# -- answers, in words --------------------------------------------------------

STREAMS = sorted(name for name in ANSWERS if name.startswith("stream"))
BROKEN = ("stream-error", "stream-restart-in-call", "stream-restart-in-text")
#: Streams of other contents than text.
OTHERS = ("stream-empty", "stream-legacy", "stream-refusal", "stream-tools")


def chunks(name: str) -> list[Any]:
    """The parsed data of a stream."""
    return [data for _, data in frames(answer(name))]


def deltas(name: str, field: str) -> str:
    """The text that a client puts together from this field of the first choice's deltas."""
    found = [chunk["choices"] for chunk in chunks(name) if "choices" in chunk]
    choices = [choice for some in found for choice in some if choice["index"] == 0]
    return "".join(choice["delta"].get(field) or "" for choice in choices)


def message_of(name: str) -> Any:
    """The message of a whole answer."""
    return json.loads(answer(name))["choices"][0]["message"]


@pytest.mark.parametrize("name", [name for name in STREAMS if name not in BROKEN])
def test_a_complete_stream_has_one_finish_reason_for_each_choice_and_then_done(name: str) -> None:
    *found, last = chunks(name)

    reasons: dict[int, list[str]] = {}
    for chunk in found:
        for choice in chunk["choices"]:
            reasons.setdefault(choice["index"], []).append(choice["finish_reason"])
    known = ("stop", "length", "content_filter", "tool_calls", "function_call")
    assert last == "[DONE]"
    for told in reasons.values():
        assert [reason for reason in told if reason] == told[-1:]
        assert told[-1] in known


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_stream_ends_with_its_error_and_has_no_finish(name: str) -> None:
    *found, last = chunks(name)

    assert set(last) == {"error"}
    assert all(choice["finish_reason"] is None for chunk in found for choice in chunk["choices"])


@pytest.mark.parametrize("name", STREAMS)
def test_the_first_chunk_tells_the_role_and_no_other_does(name: str) -> None:
    found = [chunk for chunk in chunks(name) if isinstance(chunk, dict) and chunk.get("choices")]

    choices = [choice for chunk in found for choice in chunk["choices"]]
    for index in {choice["index"] for choice in choices}:
        roles = [choice["delta"].get("role") for choice in choices if choice["index"] == index]
        assert roles == ["assistant"] + [None] * (len(roles) - 1)


@pytest.mark.parametrize("name", sorted({*STREAMS} - {*BROKEN, *OTHERS}))
def test_a_stream_holds_the_same_text_as_the_whole_answer(name: str) -> None:
    assert deltas(name, "content") == message_of("whole")["content"]


def test_thinking_comes_in_a_field_of_its_own() -> None:
    assert message_of("whole-thinking")["reasoning_content"] == "Someone greets."
    assert deltas("stream-thinking", "reasoning_content") == "Someone greets."


def test_an_answer_without_thinking_does_not_mention_it() -> None:
    assert b"reasoning" not in answer("whole") + answer("stream")


def test_a_restart_drops_what_a_whole_answer_had_so_far() -> None:
    assert message_of("whole-restart") == message_of("whole")


def test_the_prompt_is_everything_that_the_model_read() -> None:
    usage = json.loads(answer("whole-thinking"))["usage"]

    assert usage["prompt_tokens"] == 10 + 5 + 3
    assert usage["completion_tokens"] == 7
    assert usage["total_tokens"] == 18 + 7
    assert usage["prompt_tokens_details"] == {"cached_tokens": 5}
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 4}


def test_usage_stands_in_a_chunk_of_its_own_before_done() -> None:
    *others, last, _ = chunks("stream-usage")

    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 25)
    assert all(chunk["usage"] is None for chunk in others)


def test_a_stream_that_was_not_asked_for_usage_has_none() -> None:
    assert b"usage" not in answer("stream")


def test_silence_is_a_comment() -> None:
    assert answer("stream-ticks").count(b": keepalive\n\n") == 3


def test_nothing_is_sent_before_the_first_content() -> None:
    renderer = ocp.CHAT.renderer(asked("stream"))

    assert renderer.event(0, STARTED) == renderer.event(0, ocp.Restarted()) == b""


@pytest.mark.parametrize(
    ("reason", "told"), [("a_word_of_next_year", "stop"), ("pause_turn", "length")]
)
def test_a_stop_reason_that_openai_does_not_know(reason: str, told: str) -> None:
    body = whole(ocp.CHAT, asked("whole"), [STARTED, *TEXT, finished(reason)])

    assert body["choices"][0]["finish_reason"] == told


@pytest.mark.parametrize("events", [[], [STARTED, *TEXT], [STARTED, *TEXT, ocp.Restarted()]])
def test_an_answer_without_an_end_is_a_failure(events: list[Any]) -> None:
    with pytest.raises(ocp.UpstreamFailed):
        gathered(turn(), events)


def test_one_of_several_answers_without_an_end_is_a_failure() -> None:
    with pytest.raises(ocp.UpstreamFailed):
        gathered(turn(n=2), [STARTED, *TEXT, finished(), (1, STARTED)])


def test_choices_are_told_apart_and_counted_together() -> None:
    body = json.loads(answer("whole-choices"))

    first, second = body["choices"]
    assert (first["index"], first["finish_reason"]) == (0, "tool_calls")
    assert (second["index"], second["finish_reason"]) == (1, "stop")
    assert body["usage"]["prompt_tokens"] == USAGE.prompt_tokens
    assert body["usage"]["completion_tokens"] == 2 * USAGE.output_tokens


def test_a_restart_of_one_choice_leaves_the_other_one_alone() -> None:
    renderer = ocp.CHAT.renderer(asked("stream-choices-usage"))
    for event in (STARTED, *TEXT):
        renderer.event(0, event)

    assert renderer.event(1, ocp.Restarted()) == b""
    with pytest.raises(ocp.UpstreamFailed):
        renderer.event(0, ocp.Restarted())


def test_text_that_is_no_unicode_is_still_sent() -> None:
    events = [STARTED, ocp.Delta(0, "text", "\ud83d"), finished()]

    assert b'"content":"\\ud83d"' in stream_bytes(ocp.CHAT, asked("stream"), events)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_what_ends_a_line_in_unicode_ends_none_in_a_stream(character: str) -> None:
    events = [STARTED, ocp.Delta(0, "text", f"a{character}b"), finished()]

    sent = stream_bytes(ocp.CHAT, asked("stream"), events)

    assert character.encode("utf-8") not in sent
    assert f"a{character}b" in [
        choice["delta"].get("content")
        for _, chunk in frames(sent) if isinstance(chunk, dict) for choice in chunk["choices"]
    ]
