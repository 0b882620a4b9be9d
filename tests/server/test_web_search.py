"""The search of the web over the whole server: who may search, the answers, and what is counted."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chat import NO_IDLE, ask, chunks
from http_client import Reply
from keys import ANONYMOUS_KEY, MULTI, SHARED, SHARED_KEY, as_admin, ask_as, new_key
from server import Server, running_server

Json = Any

FOUND = [{"type": "web_search_result", "url": "https://yr.no", "title": "Yr",
          "encrypted_content": "abc", "page_age": None}]
CITED = {"type": "web_search_result_location", "cited_text": "It rains", "url": "https://yr.no",
         "title": "Yr", "encrypted_index": "xx"}
TURN = [{"search": "oslo", "found": FOUND}, {"say": "Well: "},
        {"cite": "it rains.", "citations": [CITED]}]
ANNOTATION = {"start_index": 6, "end_index": 15, "title": "Yr", "url": "https://yr.no"}
WISH: Json = {"web_search_options": {}}
USER = {"role": "user", "content": "Does it rain?"}
AGAIN = {"role": "user", "content": "And now?"}
OWN = {"type": "web_search_20250305", "name": "web_search"}


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of mode none."""
    env = {"OCP_WARM_PROCESSES": "0"}
    with running_server(tmp_path_factory.mktemp("owner"), {"turns": [TURN]}, env=env) as found:
        yield found


def tools_asked(server: Server) -> list[str]:
    """The tools that claude was told to send in place of its own, by name."""
    extra = server.queries()[-1]["settings"].get("env", {}).get("CLAUDE_CODE_EXTRA_BODY", "")
    return [name for name in ("web_search", "clock") if f'"name":"{name}"' in extra]


def may_search(server: Server, reply: Reply) -> bool:
    """Whether the search of a request reached claude; else it was named as ignored."""
    assert reply.status == 200, reply.text
    is_named = "web_search_options" in (reply.headers.get("X-OCP-Ignored-Params") or "")
    reached = tools_asked(server) == ["web_search"]
    assert is_named is not reached
    return reached


# ---------------------------------------------------------------------------
# Who may search
# ---------------------------------------------------------------------------

def test_the_owner_may_search_until_the_setting_forbids_it(owner: Server) -> None:
    seen = []
    for value in (None, False, True, None):
        assert owner.call("PATCH", "/settings", {"webSearch": value}).status == 200
        seen.append(may_search(owner, ask(owner, **WISH)))

    assert seen == [True, False, True, True]


def test_a_key_may_search_when_it_has_the_permission(tmp_path: Path) -> None:
    env = {**MULTI, "PROXY_ANONYMOUS_KEY": ANONYMOUS_KEY}
    with running_server(tmp_path, {"turns": [TURN]}, env=env) as server:
        made, allowed = new_key(server, name="plain"), new_key(server, name="web", webSearch=True)
        path = f"/api/keys/{made['id']}"

        seen = [may_search(server, ask_as(server, key, **WISH)) for key in (
            made["key"], allowed["key"], ANONYMOUS_KEY, MULTI["OCP_ADMIN_KEY"])]
        for value in (True, None):
            told = as_admin(server, "PATCH", path, {"webSearch": value}).json()["webSearch"]
            assert told is bool(value)
            seen.append(may_search(server, ask_as(server, made["key"], **WISH)))

        assert seen == [False, True, False, True, True, False]
        assert (made["webSearch"], allowed["webSearch"]) == (False, True)
        assert as_admin(server, "PATCH", path, {"webSearch": "yes"}).status == 400


def test_the_permission_of_a_key_outlives_a_restart(tmp_path: Path) -> None:
    with running_server(tmp_path, {"turns": [TURN]}, env=MULTI) as server:
        secret = new_key(server, name="web", webSearch=True)["key"]
    with running_server(tmp_path, {"turns": [TURN]}, env=MULTI) as server:
        assert may_search(server, ask_as(server, secret, **WISH))


def test_the_holder_of_the_shared_key_may_search(tmp_path: Path) -> None:
    with running_server(tmp_path, {"turns": [TURN]}, env=SHARED) as server:
        assert may_search(server, ask_as(server, SHARED_KEY, **WISH))


def test_in_agent_mode_the_search_is_ignored(tmp_path: Path) -> None:
    env = {**NO_IDLE, "CLAUDE_ALLOWED_TOOLS": "Read"}
    with running_server(tmp_path, {"turns": []}, env=env) as server:
        assert not may_search(server, ask(server, **WISH))


# ---------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------

def paths(server: Server) -> list[str]:
    return [str(entry["path"]) for entry in server.log_entries("answer_finished")]


def test_chat_gets_its_sources_and_goes_on(owner: Server) -> None:
    said = ask(owner, **WISH).json()["choices"][0]["message"]
    streamed = ask(owner, stream=True, **WISH)

    assert said["content"] == "Well: it rains."
    assert said["annotations"] == [{"type": "url_citation", "url_citation": ANNOTATION}]
    deltas = [each["choices"][0]["delta"] for each in chunks(streamed.events)]
    assert [each["annotations"] for each in deltas if "annotations" in each] == [
        said["annotations"]]
    messages = [{"role": "user", "content": "hi"}, said, AGAIN]
    owner.call("POST", "/v1/chat/completions", {"messages": messages, "model": "sonnet", **WISH})
    assert paths(owner)[-1] == "continued"


@pytest.mark.parametrize("stream", [False, True])
def test_messages_gets_the_blocks_and_goes_on(owner: Server, stream: bool) -> None:
    body: Json = {"model": "sonnet", "max_tokens": 512, "tools": [OWN], "messages": [
        {"role": "user", "content": f"Does it rain? {stream}"}]}
    reply = owner.call("POST", "/v1/messages", {**body, "stream": stream})

    if stream:
        started = [data["content_block"] for _, data in reply.events
                   if data["type"] == "content_block_start"]
        assert [each["type"] for each in started] == [
            "server_tool_use", "web_search_tool_result", "text", "text"]
        return
    said = reply.json()
    called, found, *texts = said["content"]
    assert (called["input"], found["content"]) == ({"query": "oslo"}, FOUND)
    assert texts[1]["citations"] == [CITED]
    assert said["usage"]["server_tool_use"] == {"web_search_requests": 1}
    body["messages"] += [{"role": "assistant", "content": said["content"]}, AGAIN]
    owner.call("POST", "/v1/messages", body)
    assert paths(owner)[-1] == "continued"


@pytest.mark.parametrize("chained", [False, True], ids=["items", "chain"])
def test_responses_gets_items_and_goes_on(owner: Server, chained: bool) -> None:
    wish: Json = {"model": "sonnet", "tools": [{"type": "web_search"}]}
    question = {"role": "user", "content": f"Does it rain? {chained}"}
    said = owner.call("POST", "/v1/responses", {**wish, "input": [question]}).json()

    called, message = said["output"]
    assert (called["type"], called["action"]["query"]) == ("web_search_call", "oslo")
    assert message["content"][0]["annotations"] == [{"type": "url_citation", **ANNOTATION}]
    next_input = [AGAIN] if chained else [question, *said["output"], AGAIN]
    more = {"previous_response_id": said["id"]} if chained else {}
    owner.call("POST", "/v1/responses", {**wish, **more, "input": next_input})
    assert paths(owner)[-1] == "continued"


def test_a_session_goes_on_and_is_rebuilt_with_the_results_as_text(owner: Server) -> None:
    fields = {**WISH, "ocp_session_id": "weather"}
    ask(owner, "Does it rain in the session?", **fields)
    ask(owner, "And now?", **fields)
    assert paths(owner)[-1] == "continued"

    ask(owner, "And then?", ocp_session_id="weather")

    assert paths(owner)[-1] == "rebuilt"
    told = owner.queries()[-1]["messages"][1]["content"]
    assert [part["text"] for part in told[1:]] == ["Well: ", "it rains."]
    assert told[0]["text"].startswith("[web_search_tool_result]\n") and "abc" not in str(told)
    assert not [part for part in told if "citations" in part]


def test_an_answer_that_paused_goes_on(owner: Server) -> None:
    owner.write_scenario([[*TURN[:1], {"finish": "pause_turn"}], [{"say": "It rains."}]],
                         shared=True)
    body: Json = {"model": "sonnet", "max_tokens": 512, "tools": [OWN], "messages": [
        {"role": "user", "content": "Does it rain, with a pause?"}]}
    paused = owner.call("POST", "/v1/messages", body).json()
    body["messages"].append({"role": "assistant", "content": paused["content"]})

    reply = owner.call("POST", "/v1/messages", body)
    owner.write_scenario([TURN])

    assert paused["stop_reason"] == "pause_turn"
    assert (reply.status, reply.json()["content"][0]["text"]) == (200, "It rains.")
    assert reply.headers["X-OCP-Adjusted"] == "assistant_last=1"


# ---------------------------------------------------------------------------
# Usage
# ---------------------------------------------------------------------------

def test_searches_are_counted(tmp_path: Path) -> None:
    turn = [*TURN[:1], *TURN]
    with running_server(tmp_path, {"turns": [turn]}, env=NO_IDLE) as server:
        ask(server, **WISH)
        ask(server, stream=True, **WISH)

        report = server.call("GET", "/api/usage").json()
        metrics = server.call("GET", "/metrics").text

    assert report["totals"]["web_search_requests"] == 4
    assert [row["web_search_requests"] for row in report["recent"]] == [2, 2]
    assert 'ocp_web_searches_total{model="claude-sonnet-5-5"} 4\n' in metrics
