"""The search of the web by the API, over the real claude: what goes up, and what comes back."""

from __future__ import annotations

from typing import Any

import pytest

import stub_api as stub
from conversation import WHOLE_AND_STREAMED, Conversation, path_of
from dialects import CHAT, MESSAGES, RESPONSES, Dialect, Result, Tool, dialect_name
from rig import MODEL, NEWEST_MODEL, Rig
from stub_api import Block, Reply

Json = Any

SEARCH = {"type": "web_search_20250305", "name": "web_search"}
FOUND = [{"type": "web_search_result", "url": "https://yr.no", "title": "Yr",
          "encrypted_content": "abc", "page_age": None}]
CITED = {"type": "web_search_result_location", "cited_text": "It rains", "url": "https://yr.no",
         "title": "Yr", "encrypted_index": "xx"}
WISHES: dict[Dialect, Json] = {
    CHAT: {"web_search_options": {}}, MESSAGES: {"tools": [SEARCH], "max_tokens": 512},
    RESPONSES: {"tools": [{"type": "web_search"}]},
}
EACH_WISH = pytest.mark.parametrize("dialect", list(WISHES), ids=dialect_name)


def search_blocks(number: int = 1) -> tuple[Block, ...]:
    called = {"type": "server_tool_use", "id": f"srvtoolu_0{number}", "name": "web_search",
              "input": {"query": "oslo"}}
    pieces = ("", '{"query":', '"oslo"}')
    found = {"type": "web_search_tool_result", "tool_use_id": called["id"], "content": FOUND}
    deltas = tuple({"type": "input_json_delta", "partial_json": piece} for piece in pieces)
    return Block(called, deltas), Block(found, ())


def searched(*after: Block, **options: Any) -> Reply:
    """An answer that searches, says what it found, and cites its source."""
    text = {"type": "text", "text": "It rains.", "citations": [CITED]}
    said = Block(text, ({"type": "citations_delta", "citation": CITED},
                        {"type": "text_delta", "text": "It rains."}))
    plain = stub.text("Well: ").blocks
    return Reply(blocks=(*search_blocks(), *plain, said, *after))._replace(**options)


def urls_of(dialect: Dialect, body: Json) -> list[str]:
    """The addresses of the sources in a whole answer."""
    if dialect is CHAT:
        annotations = body["choices"][0]["message"]["annotations"]
        return [each["url_citation"]["url"] for each in annotations]
    if dialect is MESSAGES:
        return [each["url"] for block in body["content"] for each in block.get("citations") or ()]
    return [each["url"] for item in body["output"] if item["type"] == "message"
            for each in item["content"][0]["annotations"]]


@EACH_WISH
@WHOLE_AND_STREAMED
def test_a_search_is_one_request_and_the_conversation_goes_on(
    rig: Rig, dialect: Dialect, streams: bool
) -> None:
    rig.script(searched(), stub.text("Yes."))
    talk = Conversation(rig, dialect, streams=streams)
    first = talk.ask(f"Does it rain, {dialect} {streams}?", **WISHES[dialect])
    second = talk.ask("Still?", **WISHES[dialect])

    bodies = rig.bodies()
    assert [body["tools"] for body in bodies] == [[SEARCH]] * 2
    assert (first.text, second.text) == ("Well: It rains.", "Yes.")
    assert (path_of(rig, first), path_of(rig, second)) == ("fresh", "continued")
    [answer] = [each["content"] for each in bodies[1]["messages"] if each["role"] == "assistant"]
    assert [block["type"] for block in answer] == [
        "server_tool_use", "web_search_tool_result", "text", "text"]
    assert (answer[0]["input"], answer[1]["content"]) == ({"query": "oslo"}, FOUND)


@pytest.mark.exhaustive
@EACH_WISH
@pytest.mark.parametrize("model", [MODEL, NEWEST_MODEL])
def test_the_sources_reach_the_client(rig: Rig, dialect: Dialect, model: str) -> None:
    rig.script(searched())
    body = dialect.body(f"Sources, {dialect} {model}?", **{**WISHES[dialect], "model": model})
    reply = rig.server.call("POST", dialect.path, body)

    assert urls_of(dialect, reply.json()) == ["https://yr.no"]


def test_a_client_s_tool_stands_beside_the_search(rig: Rig) -> None:
    calls = stub.tool_calls([("clock", {})])
    rig.script(Reply(blocks=(*search_blocks(), *calls.blocks), stop_reason="tool_use"),
               stub.text("Noon."))
    talk = Conversation(rig, CHAT, [Tool("clock")], web_search_options={})
    first = talk.ask("What time is it in Oslo?")
    second = talk.send_results([(first.call.id, Result("noon"))])

    for body in rig.bodies():
        assert [tool["name"] for tool in body["tools"]] == ["clock", "web_search"]
    assert (second.text, path_of(rig, second)) == ("Noon.", "continued")


@pytest.mark.exhaustive
@WHOLE_AND_STREAMED
def test_a_structured_answer_can_search(rig: Rig, streams: bool) -> None:
    schema = {"type": "object", "properties": {"rain": {"type": "boolean"}}, "required": ["rain"],
              "additionalProperties": False}
    calls = stub.tool_calls([("StructuredOutput", {"rain": True})])
    rig.script(stub.tool_calls([("StructuredOutput", {"rain": False})]),
               searched(*calls.blocks, stop_reason="tool_use"))
    plain = rig.ask(f"In a form, {streams}?", **CHAT.schema_fields(schema))
    answer = rig.ask(f"In a form, {streams}?", stream=streams, web_search_options={},
                     **CHAT.schema_fields(schema))

    assert (plain.text, answer.text) == ('{"rain": false}', '{"rain": true}')
    before, after = (body["tools"] for body in rig.bodies())
    assert after == [*before, SEARCH]


@pytest.mark.exhaustive
def test_a_pause_ends_the_answer_and_the_client_lets_it_go_on(rig: Rig) -> None:
    rig.script(Reply(blocks=search_blocks(), stop_reason="pause_turn"), stub.text("It rains."))
    body = MESSAGES.body("Does it rain, after a pause?", **WISHES[MESSAGES])
    paused = rig.server.call("POST", MESSAGES.path, body).json()
    assert paused["stop_reason"] == "pause_turn"
    body["messages"] += [{"role": "assistant", "content": paused["content"]}]
    reply = rig.server.call("POST", MESSAGES.path, body)

    assert reply.json()["content"] == [{"type": "text", "text": "It rains."}]
    history = str(rig.last_body()["messages"])
    assert "[web_search_tool_result]" in history and "srvtoolu" not in history


@pytest.mark.exhaustive
def test_what_the_api_counts_is_counted(rig: Rig) -> None:
    rig.script(searched(web_search_requests=2))
    before = rig.server.call("GET", "/api/usage").json()["totals"]["web_search_requests"]
    body = MESSAGES.body("How often?", **WISHES[MESSAGES])
    usage = rig.server.call("POST", MESSAGES.path, body).json()["usage"]

    assert usage["server_tool_use"]["web_search_requests"] == 2
    after = rig.server.call("GET", "/api/usage").json()["totals"]["web_search_requests"]
    assert after == before + 2
