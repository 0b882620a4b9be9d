"""Custom tools, and the items of a responses history, over the real claude."""

from __future__ import annotations

import json
from typing import Any

import pytest

import stub_api as stub
from conversation import WHOLE_AND_STREAMED, path_of
from dialects import CHAT, RESPONSES, Answer, Dialect
from rig import ANSWER_S, MODEL, Rig
from upstream import UpstreamBlock, upstream_messages

Json = Any

PATCH = '*** Begin Patch\n*** Add File: "caf\u00e9"\n+one \\ two \U0001f600\n*** End Patch\n'
GRAMMAR = "start: begin_patch hunk end_patch"
FORM = {"type": "grammar", "syntax": "lark", "definition": GRAMMAR}
RESPONSES_TOOL = {"type": "custom", "name": "edit", "description": "Edits.", "format": FORM}
CHAT_TOOL = {"type": "custom", "custom": {
    "name": "edit", "description": "Edits.", "format": {"type": "grammar", "grammar": {
        "syntax": "lark", "definition": GRAMMAR}}}}

EITHER = pytest.mark.parametrize("dialect", [CHAT, RESPONSES], ids=["chat", "responses"])


def send(rig: Rig, dialect: Dialect, history: list[Json], **fields: Json) -> Json:
    """The reply to a request with the tool."""
    tool = CHAT_TOOL if dialect is CHAT else RESPONSES_TOOL
    body = {"model": MODEL, dialect.field: history, "tools": [tool], **fields}
    reply = rig.server.call("POST", dialect.path, body, timeout_s=ANSWER_S)
    assert reply.status == 200, reply.text
    return reply


def called(dialect: Dialect, reply: Json) -> tuple[list[Json], str, str]:
    """What a client keeps of a call: its messages or items, the call's id, and its input."""
    if dialect is RESPONSES:
        body = reply.events[-1][1]["response"] if reply.events else reply.json()
        [item] = [item for item in body["output"] if item["type"] == "custom_tool_call"]
        return body["output"], item["call_id"], item["input"]
    if not reply.events:
        message = reply.json()["choices"][0]["message"]
        [call] = message["tool_calls"]
        return [message], call["id"], call["custom"]["input"]
    deltas = [data["choices"][0]["delta"] for _, data in reply.events if data != "[DONE]"]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    text = "".join(call["custom"]["input"] for call in calls)
    custom = {"name": calls[0]["custom"]["name"], "input": text}
    call = {"id": calls[0]["id"], "type": "custom", "custom": custom}
    said = "".join(delta.get("content") or "" for delta in deltas)
    return [{"role": "assistant", "content": said, "tool_calls": [call]}], call["id"], text


def result(dialect: Dialect, call_id: str, text: str) -> Json:
    if dialect is RESPONSES:
        return {"type": "custom_tool_call_output", "call_id": call_id, "output": text}
    return {"role": "tool", "tool_call_id": call_id, "content": text}


@EITHER
@WHOLE_AND_STREAMED
def test_a_custom_tool_gets_its_text_and_the_conversation_goes_on(
    rig: Rig, dialect: Dialect, streams: bool
) -> None:
    rig.script(stub.tool_calls([("edit", {"input": PATCH})], text="I edit."), stub.text("Done."))
    fields = {"stream": True} if streams else {}
    history = [{"role": "user", "content": f"Edit it in {dialect.name}, {streams}."}]

    first = send(rig, dialect, history, **fields)
    kept, call_id, text = called(dialect, first)
    history += [*kept, result(dialect, call_id, "Patched.")]
    second = send(rig, dialect, history, **fields)

    assert text == PATCH
    answers = [Answer(first), Answer(second)]
    assert [path_of(rig, answer) for answer in answers][1] == "continued"
    body = rig.last_body()
    [tool] = body["tools"]
    assert tool["name"] == "edit" and tool["description"].endswith(GRAMMAR)
    assert tool["input_schema"]["required"] == ["input"]
    calls = [block for _, blocks in upstream_messages(body) for block in blocks
             if isinstance(block, UpstreamBlock)]
    assert [(block.kind, block.content) for block in calls] == [
        ("tool_use", {"input": PATCH}), ("tool_result", "Patched.")]


@pytest.mark.exhaustive
@EITHER
def test_a_custom_tool_may_be_forced(rig: Rig, dialect: Dialect) -> None:
    rig.script(stub.tool_calls([("edit", {"input": "x"})]))
    named = {"name": "edit"}
    choice = {"type": "custom", **({"custom": named} if dialect is CHAT else named)}

    reply = send(rig, dialect, [{"role": "user", "content": "Edit."}], tool_choice=choice)

    assert called(dialect, reply)[2] == "x"
    assert rig.only_body()["tool_choice"]["name"] == "edit"


#: Items as agents keep them, with their results.
AGENT_ITEMS = [
    {"type": "local_shell_call", "id": "lsh_1", "call_id": "c1", "status": "completed",
     "action": {"type": "exec", "command": ["ls"], "env": {}}},
    {"type": "local_shell_call_output", "id": "c1", "output": "note.txt"},
    {"type": "shell_call", "call_id": "c2", "action": {"commands": ["pwd"], "timeout_ms": None}},
    {"type": "shell_call_output", "call_id": "c2", "output": [
        {"stdout": "/work", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]},
    {"type": "apply_patch_call", "call_id": "c3", "status": "completed",
     "operation": {"type": "delete_file", "path": "a"}},
    {"type": "apply_patch_call_output", "call_id": "c3", "status": "failed", "output": "No a."},
    {"type": "mcp_call", "id": "mcp_1", "server_label": "birds", "name": "find",
     "arguments": "{}", "output": "On the roof."},
    {"type": "web_search_call", "id": "ws_1", "action": {"type": "search", "query": "owls"}},
]


@pytest.mark.exhaustive
def test_items_of_tools_that_are_not_offered_reach_the_model(rig: Rig) -> None:
    history = [{"role": "user", "content": "Look."}, *AGENT_ITEMS,
               {"role": "user", "content": "And?"}]

    reply = rig.server.call(
        "POST", RESPONSES.path, {"model": MODEL, "input": history}, timeout_s=ANSWER_S)

    assert reply.status == 200, reply.text
    assert reply.headers["x-ocp-ignored-params"] is None
    found = [block for _, blocks in upstream_messages(rig.only_body()) for block in blocks]
    told = [(block.name, block.content) if isinstance(block, UpstreamBlock) else block
            for block in found]
    assert told == [
        "Look.", ("local_shell", {"command": ["ls"]}), ("", "note.txt"),
        ("shell", {"commands": ["pwd"]}),
        ("", json.dumps(AGENT_ITEMS[3]["output"], separators=(",", ":"))),
        ("apply_patch", {"type": "delete_file", "path": "a"}), ("", "No a."),
        ("birds__find", {}), ("", "On the roof."),
        '[web_search_call]\n{"action":{"type":"search","query":"owls"}}', "And?"]


@pytest.mark.exhaustive
@WHOLE_AND_STREAMED
def test_a_shell_that_the_client_runs_is_called_by_its_own_item(
    rig: Rig, streams: bool
) -> None:
    given = {"command": ["ls", "-l"], "timeout_ms": 1000}
    rig.script(stub.tool_calls([("local_shell", given)]), stub.text("Two files."))
    history: list[Json] = [{"role": "user", "content": f"Which files? {streams}"}]
    body = {"model": MODEL, "tools": [{"type": "local_shell"}], "stream": streams}

    first = rig.server.call(
        "POST", RESPONSES.path, {**body, "input": history}, timeout_s=ANSWER_S)
    answer = first.events[-1][1]["response"] if streams else first.json()
    [item] = answer["output"]
    history += [item, {"type": "local_shell_call_output", "id": item["call_id"], "output": "a b"}]
    second = rig.server.call(
        "POST", RESPONSES.path, {**body, "input": history}, timeout_s=ANSWER_S)

    assert (item["type"], item["status"]) == ("local_shell_call", "completed")
    assert item["action"] == {"type": "exec", "env": {}, **given}
    assert path_of(rig, Answer(second)) == "continued"


@pytest.mark.exhaustive
def test_a_call_of_a_custom_tool_is_gone_on_from_by_the_id(rig: Rig) -> None:
    rig.script(stub.tool_calls([("edit", {"input": PATCH})]), stub.text("Done."))
    first = send(rig, RESPONSES, [{"role": "user", "content": "Edit it by the id."}])
    _, call_id, _ = called(RESPONSES, first)

    second = send(rig, RESPONSES, [result(RESPONSES, call_id, "Patched.")],
                  previous_response_id=first.json()["id"])

    assert path_of(rig, Answer(second)) == "continued"
    assert second.json()["output"][0]["content"][0]["text"] == "Done."


@pytest.mark.exhaustive
def test_a_conversation_is_compacted_where_it_is_held(rig: Rig) -> None:
    rig.script(stub.tool_calls([("edit", {"input": PATCH})]), stub.text("Done."),
               stub.text("The file was patched."), stub.text("Nothing is left."))
    history: list[Json] = [{"role": "user", "content": "Edit it, and then compact it."}]
    kept, call_id, _ = called(RESPONSES, send(rig, RESPONSES, history))
    history += [*kept, result(RESPONSES, call_id, "Patched.")]
    history += send(rig, RESPONSES, history).json()["output"]

    compacted = rig.server.call(
        "POST", "/v1/responses/compact",
        {"model": MODEL, "input": history, "tools": [RESPONSES_TOOL]}, timeout_s=ANSWER_S)
    assert compacted.status == 200, compacted.text
    output = compacted.json()["output"]
    goes_on = [*output, {"role": "user", "content": "What is left?"}]
    last = send(rig, RESPONSES, goes_on)

    assert [item["type"] for item in output] == ["message", "compaction"]
    asked = upstream_messages(rig.bodies()[2])
    assert [role for role, _ in asked] == ["user", "assistant", "user", "assistant", "user"]
    assert asked[3] == ("assistant", ["Done."]) and "summary" in asked[4][1][0]
    assert rig.bodies()[2]["tool_choice"] == {"type": "none"}
    told = upstream_messages(rig.last_body())
    assert told == [("user", [
        "Edit it, and then compact it.",
        "[Summary of the conversation up to here]\nThe file was patched.", "What is left?"])]
    assert last.json()["output"][0]["content"][0]["text"] == "Nothing is left."
