"""The lines of an answer, with the variables that shorten their way through claude and without."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import stub_api as stub
from claude_driver import ClaudeDriver
from programs import real_claude_env
from project import clean_env, load_script
from rig import MODEL, Claude
from stub_api import Block, Reply

Json = Any

ocp = load_script("ocp_server.py")

SHORTCUTS = ("CLAUDE_CODE_PLAIN_DELTA_DIRECT_WRITE", "CLAUDE_CODE_PLAIN_DELTA_FAST_PATH")
WEATHER = {"name": "weather", "description": "Tells the weather.", "inputSchema": {
    "type": "object", "properties": {"city": {"type": "string"}}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]}
CITATION = {"type": "web_search_result_location", "cited_text": "It rains", "url": "https://yr.no",
            "title": "Yr", "encrypted_index": "xx"}
CITED = Block(
    {"type": "text", "text": "It rains.", "citations": [CITATION]},
    ({"type": "citations_delta", "citation": CITATION},
     {"type": "text_delta", "text": "It rains."}))
#: More than a pipe holds, so that claude has to wait for its reader.
LONG = [f"word{number} \u4e2d\U0001f600\n" for number in range(2_000)]
#: Fields that differ from run to run, beside those in milliseconds.
VOLATILE = ("uuid", "session_id", "request_id", "timestamp")


def plain(value: Json) -> Json:
    """Return a line without what differs from run to run."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {name: plain(each) for name, each in value.items()
            if name not in VOLATILE and not name.endswith("_ms")}


def lines_of(came: Sequence[Mapping[str, Json]]) -> list[Json]:
    """Return the lines of an answer: what the API's stream became, in its order."""
    return [plain(line) for line in came if line["type"] in ("stream_event", "assistant", "user")]


def started(claude: Claude, folder: Path, api_url: str, *, is_short: bool) -> ClaudeDriver:
    """Start claude as the server does, or without the shortcuts."""
    config = ocp.Config()
    env = {**ocp.child_environment(clean_env(HOME=str(folder)), config), **real_claude_env(api_url)}
    for name in SHORTCUTS:
        assert env[name] == "1"
        if not is_short:
            del env[name]
    command = [str(claude.path), *ocp.claude_arguments(MODEL, config)]
    return ClaudeDriver(command, env, folder, [WEATHER])


def conversation(process: ClaudeDriver, api: stub.StubApi) -> Iterator[list[Json]]:
    """Yield the lines of each answer of a conversation that has blocks of every kind."""
    process.control(
        "initialize", systemPrompt=["Be brief."], hooks=None, sdkMcpServers=["client"])
    calls = [("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})]
    api.enqueue(
        stub.thinking("Let me see. " * 20, "Well. " * 20), stub.text(LONG),
        stub.tool_calls(calls, text="I look."), stub.text(["So ", "it ", "is."], gap_s=0.01),
        Reply(blocks=(CITED, *stub.text("Bye.").blocks)))
    yield lines_of(process.turn("One?"))
    process.send_user("Two?")
    # Nobody reads for a while.
    time.sleep(0.5)
    yield lines_of(process.until_result())
    process.send_user("Three?")
    came = process.until_event("message_stop")
    for _ in calls:
        if not process.calls:
            came += process.until(lambda line: line["type"] == "control_request")
        process.answer_call([{"type": "text", "text": "sunny"}])
    yield lines_of(came + process.until_result())
    yield lines_of(process.turn("Four?"))


def structured(process: ClaudeDriver, api: stub.StubApi) -> Iterator[list[Json]]:
    """Yield the lines of an answer in the shape of a schema."""
    process.control("initialize", systemPrompt=[], hooks=None, jsonSchema=SCHEMA)
    api.enqueue(stub.tool_calls([("StructuredOutput", {"a": 1})]))
    yield lines_of(process.turn("One?"))


#: The deltas that the answers of each have.
KINDS = {
    conversation: {
        "text_delta", "thinking_delta", "signature_delta", "input_json_delta", "citations_delta"},
    structured: {"input_json_delta"},
}


def kinds_of(answers: Sequence[Sequence[Json]]) -> set[str]:
    """Return the kinds of deltas in these lines."""
    events = [line["event"] for answer in answers for line in answer
              if line["type"] == "stream_event"]
    return {event["delta"]["type"] for event in events if event["type"] == "content_block_delta"}


def in_order(lines: Sequence[Json]) -> list[Json]:
    """Return the lines with the events of the stream first. claude runs its own tool for a shape
    while the message still ends, so either may be told first."""
    return sorted(lines, key=lambda line: line["type"] != "stream_event")


@pytest.mark.exhaustive
def test_the_lines_are_the_same_on_the_short_way(claude: Claude, tmp_path: Path) -> None:
    for play in (conversation, structured):
        found = []
        for is_short in (True, False):
            with stub.StubApi() as api:
                with started(claude, tmp_path, api.url, is_short=is_short) as process:
                    found.append(list(play(process, api)))
        short, usual = found
        for answer, expected in zip(short, usual):
            assert in_order(answer) == in_order(expected)
        assert len(short) == len(usual)
        assert kinds_of(short) >= KINDS[play]
