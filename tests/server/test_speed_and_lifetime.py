"""Fast mode and the lifetime in the prompt cache over the whole server: settings, and processes
that go from one request to another."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chat import ask
from http_client import Reply
from server import Server, running_server

Json = Any

OPUS = "claude-opus-5-5"
USER = {"role": "user", "content": "hi"}
AGAIN = {"role": "user", "content": "And now?"}
CALL = [{"tool": {"name": "clock", "input": {}}}]
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {"OCP_WARM_PROCESSES": "0", "OCP_PARKED_PROCESSES": "2"}
    with running_server(tmp_path_factory.mktemp("server"), {"turns": []}, env=env) as found:
        yield found


def change(server: Server, **settings: Json) -> None:
    reply = server.call("PATCH", "/settings", settings)
    assert reply.status == 200, reply.text


def settings_in_use(server: Server) -> Json:
    """The settings of claude at the last question."""
    return server.queries()[-1]["settings"]


def path_of(server: Server) -> str:
    return str(server.log_entries("answer_finished")[-1]["path"])


def ignored_in(reply: Reply) -> str:
    assert reply.status == 200, reply.text
    return reply.headers.get("X-OCP-Ignored-Params") or ""


def said_twice(first: Reply) -> Json:
    """The messages of a conversation that goes on after its first answer."""
    return [USER, first.json()["choices"][0]["message"], AGAIN]


def marked(ttl: str, text: str = "hi") -> Json:
    part = {"type": "text", "text": text, "cache_control": {"type": "ephemeral", "ttl": ttl}}
    return {"role": "user", "content": [part]}


def lifetime_in_use(server: Server) -> str:
    env = settings_in_use(server).get("env", {})
    switches = (env.get("FORCE_PROMPT_CACHING_5M"), env.get("ENABLE_PROMPT_CACHING_1H"))
    return {("1", ""): "5m", ("", "1"): "1h"}.get(switches, "")


def test_fast_mode_is_for_those_whom_the_owner_allows_it(server: Server) -> None:
    seen = []
    for value in (None, True, False, True, None):
        change(server, fastMode=value)
        reply = ask(server, f"hi {value}", model=OPUS, service_tier="priority")
        is_fast = settings_in_use(server).get("fastMode") is True
        assert is_fast is not ("service_tier" in ignored_in(reply))
        seen.append(is_fast)

    assert seen == [False, True, False, True, False]


def test_no_process_takes_fast_mode_into_a_request_that_did_not_ask(server: Server) -> None:
    change(server, fastMode=True)
    first = ask(server, model=OPUS, service_tier="fast")
    assert settings_in_use(server)["fastMode"] is True
    ask(server, messages=said_twice(first), model=OPUS)
    assert path_of(server) != "continued" and "fastMode" not in settings_in_use(server)
    ask(server, messages=said_twice(first), model=OPUS, service_tier="fast")
    assert (path_of(server), settings_in_use(server)["fastMode"]) == ("continued", True)
    change(server, fastMode=None)


def test_the_setting_says_whose_lifetime_counts(server: Server) -> None:
    seen = []
    for setting in ("client", "5m", "1h", None):
        change(server, cacheLifetime=setting)
        reply = ask(server, messages=[marked("1h", f"hi {setting}")])
        seen.append((lifetime_in_use(server), ignored_in(reply)))

    assert seen == [("1h", ""), ("5m", "cache_control.ttl"), ("1h", ""), ("", "cache_control.ttl")]
    assert server.call("PATCH", "/settings", {"cacheLifetime": "10m"}).status == 400


def test_a_conversation_keeps_its_process_when_its_lifetime_changes(server: Server) -> None:
    change(server, cacheLifetime="client")
    seen, messages = [], []
    for ttl in ("5m", "5m", "1h", None):
        messages += [USER if ttl is None else marked(ttl)]
        reply = ask(server, messages=messages)
        seen.append((path_of(server), lifetime_in_use(server)))
        answer = reply.json()["choices"][0]["message"]
        messages = [*({"role": each["role"], "content": "hi"} if each["role"] == "user" else each
                      for each in messages), answer]
    change(server, cacheLifetime=None)

    assert [lifetime for _, lifetime in seen] == ["5m", "5m", "1h", ""]
    assert [path for path, _ in seen[1:]] == ["continued"] * 3


def test_a_process_that_forgets_a_question_forgets_its_lifetime(server: Server) -> None:
    change(server, cacheLifetime="client")
    for text in ("One?", "Two?"):
        ask(server, messages=[marked("1h", text)])
    ask(server, "Three?")
    change(server, cacheLifetime=None)

    assert (path_of(server), lifetime_in_use(server)) == ("rewound", "")


def test_a_lifetime_changes_in_the_middle_of_a_turn(tmp_path: Path) -> None:
    env = {"OCP_WARM_PROCESSES": "0", "OCP_CACHE_LIFETIME": "client"}
    scenario = {"turns": [CALL, [{"say": "Noon."}]]}
    with running_server(tmp_path, scenario, env=env) as server:
        first = ask(server, messages=[marked("5m")], tools=TOOLS)
        called = first.json()["choices"][0]["message"]
        result = {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": "noon"}
        assert lifetime_in_use(server) == "5m"
        ask(server, messages=[USER, called, result], tools=TOOLS)
        assert path_of(server) == "continued"

        lines = [each for each in server.lines() if each.get("type") in (
            "control_request", "control_response")]
        last = [each for each in lines if "apply_flag_settings" in str(each)
                or "noon" in str(each)][-2:]
        assert last[0]["request"]["settings"]["env"]["FORCE_PROMPT_CACHING_5M"] == ""
        assert "noon" in str(last[1])
