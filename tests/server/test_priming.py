"""Spares that run once, before they are needed, what a first question needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chat import ask, content_of
from server import Server, health, running_server
from waiting import eventually

Json = Any

DEBUG = {"OCP_LOG_LEVEL": "debug"}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}


def primed(server: Server) -> set[int]:
    """The processes that were primed."""
    return {entry["pid"] for entry in server.log_entries("spare_primed")}


def subtypes(server: Server, pid: int) -> list[str]:
    """The control requests that a process got."""
    lines = [each["line"] for each in server.fake_log("line") if each["pid"] == pid]
    return [line["request"]["subtype"] for line in lines if line["type"] == "control_request"]


def test_a_spare_is_primed_and_then_told_what_the_request_brings(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    with running_server(tmp_path, env=DEBUG) as server:
        (pid,) = eventually(lambda: primed(server))
        assert server.queries() == []
        reply = ask(server, tools=tools, messages=[
            {"role": "system", "content": "Be kind."}, {"role": "user", "content": "One"},
            {"role": "assistant", "content": "Eins."}, {"role": "user", "content": "Two"}])

        assert content_of(reply) == "You said: Two"
        (query,) = server.queries()
        assert (query["pid"], query["system"], query["reminded"]) == (pid, ["Be kind."], 0)
        assert [tool["name"] for tool in query["tools"]] == ["weather"]
        assert [message["content"][0]["text"] for message in query["messages"]] == [
            "One", "Eins.", "Two"]
        assert subtypes(server, pid).count("initialize") == 1


def test_a_first_question_without_any_of_it_is_all_that_a_primed_claude_gets(
    tmp_path: Path
) -> None:
    with running_server(tmp_path, env=DEBUG) as server:
        (pid,) = eventually(lambda: primed(server))
        before = len(subtypes(server, pid))
        ask(server, "One")

        assert len(subtypes(server, pid)) == before
        assert (server.queries()[0]["pid"], server.queries()[0]["system"]) == (pid, [])


def test_an_output_schema_is_never_told_to_a_primed_claude(tmp_path: Path) -> None:
    with running_server(tmp_path, env=DEBUG) as server:
        (first,) = eventually(lambda: primed(server))
        server.write_scenario([[{"tool": {"name": "StructuredOutput", "input": {"a": 1}}}]])
        for number in range(2):
            assert content_of(ask(server, f"{number}", response_format=SCHEMA)) == '{"a": 1}'
            eventually(lambda: health(server)["spares"])

        assert all(query["schema"] for query in server.queries())
        assert not primed(server) & {query["pid"] for query in server.queries()}
        assert primed(server) == {first}
        eventually(lambda: first in [each["pid"] for each in server.fake_log("exit")])


@pytest.mark.slow
def test_a_claude_that_would_ask_the_api_is_primed_once(tmp_path: Path) -> None:
    scenario = {"turns": [[{"say": "Hello"}, {"hang": True}]], "unlimited": True}
    with running_server(tmp_path, scenario, env=DEBUG) as server:
        eventually(lambda: server.log_entries("spare_not_primed"))
        server.write_scenario([])
        eventually(lambda: health(server)["spares"])

        assert content_of(ask(server, "One")) == "You said: One"
        assert health(server)["promptCacheKept"] is False and not primed(server)
        assert len(server.log_entries("prompt_cache_not_kept")) == 1
        assert len(server.queries()) == 2


@pytest.mark.slow
def test_one_that_cannot_forget_makes_room_for_one_that_is_not_primed(tmp_path: Path) -> None:
    scenario = {"turns": [], "unsupported": ["rewind_conversation"]}
    with running_server(tmp_path, scenario, env=DEBUG) as server:
        eventually(lambda: server.log_entries("spare_not_primed"))
        eventually(lambda: health(server)["spares"])

        assert content_of(ask(server, "One")) == "You said: One"
        assert health(server)["promptCacheKept"] is True
        assert len(server.log_entries("spare_not_primed")) == 1


def test_old_claudes_and_agents_are_not_primed(tmp_path: Path) -> None:
    cases: dict[str, Json] = {
        "old": ({"turns": [], "version": "2.1.197"}, {}),
        "agent": ({"turns": []}, {"CLAUDE_ALLOWED_TOOLS": "default"})}
    for name, (scenario, env) in cases.items():
        with running_server(tmp_path / name, scenario, env={**DEBUG, **env}) as server:
            eventually(lambda: health(server)["spares"])
            ask(server, "One")
            eventually(lambda: len(server.log_entries("claude_spawned")) == 2)

            assert not server.log_entries("spare_not_primed") and not primed(server)
