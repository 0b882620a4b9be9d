"""The search of the web by the API: requests, answers in each dialect, and what claude prints."""
from __future__ import annotations

from typing import Any

import pytest

from project import load_script
from rendering import (
    STARTED,
    USER,
    finished,
    frames,
    gathered,
    parsing,
    refusal_of,
    steps_for,
    stream_bytes,
    whole,
)

ocp = load_script("ocp_server.py")

Json = dict[str, Any]

ALLOWED = parsing()._replace(web_search=True)
OWN_SEARCH = {"type": "web_search_20260209", "name": "web_search", "max_uses": 3,
              "allowed_domains": ["yr.no"], "cache_control": {"type": "ephemeral"}}
SEARCH = {"type": "web_search_20250305", "name": "web_search"}
OSLO = {"city": "Oslo", "country": "NO"}
FUNCTION = {"type": "function", "function": {"name": "web_search", "parameters": {}}}
#: What each dialect calls the messages of a request.
BODIES: dict[Any, Json] = {
    ocp.CHAT: {"messages": [USER]}, ocp.MESSAGES: {"messages": [USER], "max_tokens": 64},
    ocp.RESPONSES: {"input": [USER]},
}


def turn(dialect: Any = ocp.CHAT, about: Any = ALLOWED, **fields: object) -> Any:
    return dialect.parse({**BODIES[dialect], **fields}, about)


# -- requests -------------------------------------------------------------------

REQUESTS: list[tuple[Any, Json, Json, tuple[str, ...]]] = [
    (ocp.CHAT, {"web_search_options": {}}, SEARCH, ()),
    (ocp.CHAT, {"web_search_options": {
        "search_context_size": "high",
        "user_location": {"type": "approximate", "approximate": OSLO}}},
     {**SEARCH, "user_location": {"type": "approximate", **OSLO}},
     ("web_search_options.search_context_size",)),
    (ocp.CHAT, {"tools": [{"type": "web_search"}]}, SEARCH, ()),
    (ocp.CHAT, {"tools": [OWN_SEARCH], "web_search_options": {}},
     {**SEARCH, "type": "web_search_20260209", "max_uses": 3, "allowed_domains": ["yr.no"]},
     ("web_search_options",)),
    (ocp.MESSAGES, {"tools": [OWN_SEARCH]},
     {**SEARCH, "type": "web_search_20260209", "max_uses": 3, "allowed_domains": ["yr.no"]}, ()),
    (ocp.RESPONSES, {"tools": [{"type": "web_search_preview_2025_03_11", "user_location": {
        "type": "approximate", "city": None, "country": "NO"}}]},
     {**SEARCH, "user_location": {"type": "approximate", "country": "NO"}}, ()),
    (ocp.RESPONSES, {"tools": [{"type": "web_search", "external_web_access": True, "filters": {
        "allowed_domains": ["yr.no"], "newest": True}}]},
     {**SEARCH, "allowed_domains": ["yr.no"]},
     ("tools[0].filters.newest", "tools[0].external_web_access")),
]


@pytest.mark.parametrize(("dialect", "fields", "tool", "ignored"), REQUESTS)
def test_a_search_is_the_api_s_own_tool(
    dialect: Any, fields: Json, tool: Json, ignored: tuple[str, ...]
) -> None:
    found = turn(dialect, **fields)

    assert (found.server_tools, found.tools) == ((tool,), ())
    assert found.ignored == ignored


@pytest.mark.parametrize(("dialect", "fields"), [row[:2] for row in REQUESTS])
def test_a_search_that_is_not_allowed_is_named_as_ignored(dialect: Any, fields: Json) -> None:
    found = turn(dialect, parsing(), **fields)

    names = [f"tools[{number}]" for number, _ in enumerate(fields.get("tools", ()))]
    names += ["web_search_options"] * bool(fields.get("web_search_options"))
    assert (found.server_tools, found.ignored[:len(names)]) == ((), tuple(names))


def test_a_tool_of_the_client_with_the_name_wins() -> None:
    found = turn(tools=[FUNCTION], web_search_options={})

    assert [tool.name for tool in found.tools] == ["web_search"]
    assert (found.server_tools, found.ignored) == ((), ("web_search_options",))


@pytest.mark.parametrize("options", [True, "on", 1])
def test_options_that_are_no_object_are_ignored(options: object) -> None:
    assert turn(web_search_options=options).ignored == ("web_search_options",)


@pytest.mark.parametrize(
    ("search", "param"),
    [
        ({"filters": "yr.no"}, "tools[0].filters"),
        ({"filters": {"allowed_domains": 7}}, "tools[0].filters.allowed_domains"),
        ({"user_location": {"type": "exact"}}, "tools[0].user_location.type"),
        ({"user_location": {"city": 7}}, "tools[0].user_location.city"),
    ],
)
def test_a_search_with_broken_fields_is_refused(search: Json, param: str) -> None:
    body = {"input": "Hi", "tools": [{"type": "web_search", **search}]}

    assert refusal_of(ocp.RESPONSES, body, ALLOWED).param == param


def test_a_search_can_be_forced_and_be_one_of_the_allowed_tools() -> None:
    tools = [{"type": "web_search"}, {"type": "function", "name": "clock", "parameters": {}}]
    allowed = {"type": "allowed_tools", "mode": "auto"}

    forced = turn(ocp.RESPONSES, tools=tools, tool_choice={"type": "web_search"})
    among = turn(ocp.RESPONSES, tools=tools, tool_choice={**allowed, "tools": tools[:1]})
    without = turn(ocp.RESPONSES, tools=tools, tool_choice={**allowed, "tools": tools[1:]})

    assert forced.tool_choice == ocp.ToolChoice("tool", "web_search")
    assert (among.server_tools, among.tools) == ((SEARCH,), ())
    assert (without.server_tools, without.ignored) == ((), ("tools[0]",))


@pytest.mark.parametrize("about", [ALLOWED, parsing()], ids=["allowed", "forbidden"])
def test_allowed_tools_are_refused_only_if_all_of_their_names_are_unknown(about: Any) -> None:
    choice = {"type": "allowed_tools", "mode": "auto",
              "tools": [{"type": "function", "name": "gone"}, {"type": "web_search"}]}

    found = turn(ocp.RESPONSES, about, tools=[{"type": "web_search"}], tool_choice=choice)

    assert "tool_choice.tools[0]" in found.ignored
    assert found.server_tools == ((SEARCH,) if about is ALLOWED else ())


def test_a_search_that_is_not_allowed_cannot_be_forced() -> None:
    choice = {"type": "tool", "name": "web_search"}

    found = turn(ocp.MESSAGES, parsing(), tools=[OWN_SEARCH], tool_choice=choice)

    assert (found.tool_choice, found.ignored) == (ocp.ToolChoice(), ("tools[0]", "tool_choice"))


@pytest.mark.parametrize("kind", ["web_fetch_20250910", "code_execution_20250825", "web_searcher"])
def test_no_other_tool_of_the_api_is_offered(kind: str) -> None:
    found = turn(ocp.MESSAGES, tools=[{"type": kind, "name": kind[:-9]}])

    assert (found.server_tools, found.ignored) == ((), ("tools[0]",))


def extra_body(found: Any) -> Json:
    """What claude is told to add to its request."""
    lines = b"".join(steps_for(found, "", ocp.OLDEST_CLAUDE)).splitlines()
    [settings] = [line["request"]["settings"] for line in map(ocp.from_json, lines)
                  if line.get("request", {}).get("subtype") == "apply_flag_settings"]
    extra: Json = ocp.from_json(settings["env"]["CLAUDE_CODE_EXTRA_BODY"])
    return extra


def test_the_search_goes_up_beside_the_client_s_tools() -> None:
    clock = {"type": "function", "function": {"name": "clock", "parameters": {}}}

    extra = extra_body(turn(tools=[clock], web_search_options={}))

    assert [tool["name"] for tool in extra["tools"]] == ["clock", "web_search"]
    assert extra["tools"][1] == SEARCH


def test_the_search_goes_up_beside_the_tool_of_a_structured_answer() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    found = turn(web_search_options={}, response_format=wanted)

    names = [tool["name"] for tool in extra_body(found)["tools"]]

    assert names == ["StructuredOutput", "web_search"]
    forbidden = found._replace(tool_choice=ocp.ToolChoice("none"))
    assert forbidden.server_tools_for_model == ()


def test_a_conversation_with_a_search_is_another_one() -> None:
    plain, searching = turn(), turn(web_search_options={})

    bases = {ocp.history_of(found, "me", "").base for found in (plain, searching)}
    config = ocp.load_config({"CLAUDE_CACHE_TTL": "60000"})

    assert len(bases) == 2
    assert ocp.is_cacheable(plain, config) and not ocp.is_cacheable(searching, config)


# -- answers --------------------------------------------------------------------

def citation(url: str, title: str | None = "Yr") -> Json:
    return {"type": "web_search_result_location", "cited_text": "It rains", "url": url,
            "title": title, "encrypted_index": "xx"}


RESULT = [{"type": "web_search_result", "url": "https://yr.no", "title": "Yr",
           "encrypted_content": "abc", "page_age": None}]
FAILED = {"type": "web_search_tool_result_error", "error_code": "unavailable"}
CALL = {"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {}}


def result(content: object = RESULT) -> Json:
    return {"type": "web_search_tool_result", "tool_use_id": "srv_1", "content": content}


def search(content: object = RESULT) -> list[Any]:
    """The events of a search and its result."""
    return [
        ocp.BlockStarted(1, dict(CALL)), ocp.Delta(1, "server_input", '{"query":'),
        ocp.Delta(1, "server_input", '"oslo"}'), ocp.BlockStopped(1),
        ocp.BlockStarted(2, result(content)), ocp.BlockStopped(2),
    ]


def text(index: int, said: str, *citations: Json) -> list[Any]:
    return [
        ocp.BlockStarted(index, {"type": "text", "text": ""}),
        *(ocp.Citation(index, each) for each in citations), ocp.Delta(index, "text", said),
        ocp.BlockStopped(index),
    ]


CITED = citation("https://yr.no")
#: A text, a search, and an answer in three blocks: the second with two sources, one of them twice.
ANSWER = [
    STARTED, *text(0, "I look. "), *search(), *text(3, "Well: "),
    *text(4, "it rains", CITED, CITED, citation("https://b", None)), *text(5, "."), finished(),
]
FOUND = {"type": "url_citation", "start_index": 14, "end_index": 22, "title": "Yr",
         "url": "https://yr.no"}
ALSO_FOUND = {**FOUND, "title": "", "url": "https://b"}


def nested(annotation: Json) -> Json:
    return {"type": "url_citation", "url_citation": {
        name: value for name, value in annotation.items() if name != "type"}}


def moved(annotation: Json, chars: int) -> Json:
    return {**annotation, **{
        name: annotation[name] - chars for name in ("start_index", "end_index")}}


def test_messages_hands_blocks_and_citations_on() -> None:
    asked = turn(ocp.MESSAGES)

    body = whole(ocp.MESSAGES, asked, ANSWER)
    events = [data for _, data in frames(stream_bytes(ocp.MESSAGES, asked, ANSWER))]

    called = {**CALL, "input": {"query": "oslo"}}
    assert body["content"][1:3] == [called, result()]
    assert body["content"][4] == {
        "type": "text", "text": "it rains",
        "citations": [CITED, CITED, citation("https://b", None)]}
    started = [each["content_block"] for each in events if each["type"] == "content_block_start"]
    assert started[1:3] == [CALL, result()]
    deltas = [(each["index"], each["delta"]) for each in events
              if each["type"] == "content_block_delta"]
    assert deltas[1:3] == [
        (1, {"type": "input_json_delta", "partial_json": '{"query":'}),
        (1, {"type": "input_json_delta", "partial_json": '"oslo"}'})]
    assert deltas[4] == (4, {"type": "citations_delta", "citation": CITED})


def test_messages_passes_a_pause_through() -> None:
    body = whole(ocp.MESSAGES, turn(ocp.MESSAGES), [STARTED, *search(), finished("pause_turn")])

    assert body["stop_reason"] == "pause_turn"


def test_chat_gives_annotations() -> None:
    asked = turn()

    [choice] = whole(ocp.CHAT, asked, ANSWER)["choices"]
    chunks = [data for _, data in frames(stream_bytes(ocp.CHAT, asked, ANSWER)) if data != "[DONE]"]

    message = choice["message"]
    assert message["content"] == "I look. Well: it rains."
    assert message["content"][FOUND["start_index"]:FOUND["end_index"]] == "it rains"
    assert message["annotations"] == [nested(FOUND), nested(ALSO_FOUND)]
    deltas = [each["choices"][0]["delta"] for each in chunks]
    assert deltas[4] == {"annotations": message["annotations"]}
    assert [each["content"] for each in deltas if "content" in each] == [
        "", "I look. ", "Well: ", "it rains", "."]


def test_an_answer_without_sources_has_no_annotations() -> None:
    events = [STARTED, *text(0, "Hi", {"type": "char_location", "cited_text": "x"}), finished()]

    assert "annotations" not in whole(ocp.CHAT, turn(), events)["choices"][0]["message"]


def test_a_search_alone_can_be_taken_back_in_chat() -> None:
    events = [STARTED, *search(), ocp.Restarted(), STARTED, *text(0, "Hi"), finished()]

    chunks = [data for _, data in frames(stream_bytes(ocp.CHAT, turn(), events))]

    assert [each["choices"][0]["delta"] for each in chunks[:-1]] == [
        {"role": "assistant", "content": ""}, {"content": "Hi"}, {}]


def responses_of(events: list[Any]) -> tuple[Json, list[tuple[str, Json]]]:
    """The whole response of these events, and the events of its stream."""
    asked = turn(ocp.RESPONSES)
    return whole(ocp.RESPONSES, asked, events), frames(stream_bytes(ocp.RESPONSES, asked, events))


def without_ids(output: list[Json]) -> list[Json]:
    return [{name: value for name, value in item.items() if name != "id"} for item in output]


def test_responses_gives_calls_and_annotations() -> None:
    body, events = responses_of(ANSWER)

    first, called, last = body["output"]
    assert first["content"][0]["text"] == "I look. "
    assert called["id"].startswith("ws_")
    assert without_ids([called]) == [{
        "type": "web_search_call", "status": "completed",
        "action": {"type": "search", "query": "oslo"}}]
    [part] = last["content"]
    assert part["text"] == "Well: it rains."
    assert part["annotations"] == [moved(FOUND, 8), moved(ALSO_FOUND, 8)]
    assert without_ids(events[-1][1]["response"]["output"]) == without_ids(body["output"])


def test_a_streamed_response_tells_each_step_of_a_search() -> None:
    _, events = responses_of(ANSWER)

    names = [name.partition(".")[2] for name, _ in events]
    at = names.index("web_search_call.in_progress")
    assert names[at - 1:at + 5] == [
        "output_item.added", "web_search_call.in_progress", "web_search_call.searching",
        "web_search_call.completed", "output_item.done", "output_item.added"]
    assert {data["output_index"] for _, data in events[at - 1:at + 4]} == {1}
    added = [data for name, data in events if name.endswith("annotation.added")]
    assert [(each["annotation_index"], each["annotation"]) for each in added] == [
        (0, moved(FOUND, 8)), (1, moved(ALSO_FOUND, 8))]
    assert {(each["output_index"], each["content_index"]) for each in added} == {(2, 0)}
    [done] = [data["part"] for name, data in events
              if name == "response.content_part.done" and data["output_index"] == 2]
    assert len(done["annotations"]) == 2


def test_a_failed_search_is_told_as_failed() -> None:
    body, events = responses_of([STARTED, *search(FAILED), *text(3, "Hm."), finished()])

    assert [item.get("status") for item in body["output"]] == ["failed", "completed"]
    assert "response.web_search_call.completed" not in [name for name, _ in events]
    assert without_ids(events[-1][1]["response"]["output"]) == without_ids(body["output"])


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_search_that_was_cut_off_is_never_done(cut: int) -> None:
    events = [STARTED, *text(0, "I look."), *search()[:cut], finished("pause_turn")]

    body, streamed = responses_of(events)

    assert [item["type"] for item in body["output"]] == ["message"]
    assert (body["status"], body["incomplete_details"]) == (
        "incomplete", {"reason": "max_output_tokens"})
    assert without_ids(streamed[-1][1]["response"]["output"]) == without_ids(body["output"])


def test_two_searches_at_once_are_two_items() -> None:
    other = [event._replace(block_index=event.block_index + 5) for event in search()]
    events = [STARTED, *search()[:4], *other, *text(9, "So."), finished()]

    body, streamed = responses_of(events)

    assert [item["type"] for item in body["output"]] == [
        "web_search_call", "web_search_call", "message"]
    assert without_ids(streamed[-1][1]["response"]["output"]) == without_ids(body["output"])


def test_the_answer_that_comes_back_is_the_same_conversation() -> None:
    [answer] = gathered(turn(), ANSWER)
    kept = ocp.Message("assistant", answer.blocks).digest
    native = whole(ocp.MESSAGES, turn(ocp.MESSAGES), ANSWER)
    chat = whole(ocp.CHAT, turn(), ANSWER)["choices"][0]["message"]
    output = whole(ocp.RESPONSES, turn(ocp.RESPONSES), ANSWER)["output"]

    said = {"role": "assistant", "content": native["content"]}
    histories = [
        turn(ocp.MESSAGES, messages=[USER, said, USER]),
        turn(messages=[USER, chat, USER]), turn(ocp.RESPONSES, input=[USER, *output, USER]),
    ]

    assert [found.messages[1].digest for found in histories] == [kept] * 3
    assert [found.ignored for found in histories[:1]] == [()]


# -- what claude prints ---------------------------------------------------------

def line(kind: str, **fields: object) -> Json:
    return {"type": "stream_event", "event": {"type": kind, **fields}}


def delta(index: int, kind: str, **fields: object) -> Json:
    return line("content_block_delta", index=index, delta={"type": kind, **fields})


LINES = [
    line("message_start", message={"id": "msg_1", "model": "m", "usage": {"input_tokens": 1}}),
    line("content_block_start", index=0, content_block=CALL),
    delta(0, "input_json_delta", partial_json='{"query":"oslo"}'),
    line("content_block_stop", index=0),
    line("content_block_start", index=1, content_block=result()),
    line("content_block_stop", index=1),
    line("content_block_start", index=2, content_block={"type": "text", "text": ""}),
    delta(2, "citations_delta", citation=CITED), delta(2, "citations_delta", citation=None),
    delta(2, "text_delta", text="It rains."), line("content_block_stop", index=2),
    line("message_delta", delta={"stop_reason": "end_turn"}, usage={
        "output_tokens": 7, "server_tool_use": {"web_search_requests": 2}}),
]


def test_what_claude_prints_of_a_search_is_events() -> None:
    reader = ocp.TurnReader()

    events = [event for each in LINES for event in reader.events(each)]

    assert events[1:-1] == [
        ocp.BlockStarted(0, CALL), ocp.Delta(0, "server_input", '{"query":"oslo"}'),
        ocp.BlockStopped(0), ocp.BlockStarted(1, result()), ocp.BlockStopped(1),
        ocp.BlockStarted(2, {"type": "text", "text": ""}), ocp.Citation(2, CITED),
        ocp.Delta(2, "text", "It rains."), ocp.BlockStopped(2)]
    spent = ocp.sum_usage(reader.usages)
    assert events[-1].usage.web_search_requests == spent.web_search_requests == 2


def test_a_client_s_tool_of_the_name_is_not_taken_for_the_api_s() -> None:
    reader = ocp.TurnReader((ocp.Tool("web_search", "", {"type": "object"}),))

    events = [event for each in LINES for event in reader.events(each)]

    assert events[1] == ocp.BlockStarted(0, CALL)
    assert (reader.finished, events[-1].stop_reason) == (True, "end_turn")
