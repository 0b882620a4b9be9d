"""The list price of an answer, and what claude itself counts for the same one: in its report of a
session's cost, and in the rows of a server."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

import stub_api as stub
from claude_driver import CLAUDE_ARGS, ClaudeDriver
from depth import rest
from dialects import MESSAGES
from programs import clean_env, real_claude_env
from project import load_script
from rig import Claude, Rig, each_claude
from stub_api import StubApi

ocp = load_script("ocp_server.py")

Json = Any

MODELS = ocp.Models(ocp.BUILTIN_MODELS)


def iteration(read: int, written: int, cached: int = 0) -> Json:
    return {"type": "message", "input_tokens": read, "output_tokens": written,
            "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0}


#: Answers by what is special about their price.
ANSWERS: dict[str, Json] = {
    "both lifetimes": {"input_tokens": 1_234, "output_tokens": 567, "cache_read": 8_900,
                       "cache_creation": 3_400, "more_usage": {"cache_creation": {
                           "ephemeral_5m_input_tokens": 400, "ephemeral_1h_input_tokens": 3_000}}},
    "searches": {"web_search_requests": 3, "cache_creation": 0},
    "the longest short prompt": {"input_tokens": 90_000, "cache_read": 10_000, "cache_creation": 0},
    "a long prompt": {"input_tokens": 90_001, "cache_read": 10_000, "cache_creation": 0},
    "long in two rounds": {
        "input_tokens": 120_000, "cache_read": 70_000, "cache_creation": 0, "output_tokens": 30,
        "more_usage": {"iterations": [iteration(99_000, 10), iteration(21_000, 20, 70_000)]}},
    "rounds of something else": {
        "input_tokens": 120_000, "cache_read": 0, "cache_creation": 0,
        "more_usage": {"iterations": [iteration(9_000, 7)]}},
    "fast": {"cache_creation": 0, "web_search_requests": 1, "more_usage": {"speed": "fast"}},
}


# An older claude does not know these models.
@pytest.mark.parametrize("newest", each_claude()[-1:])
@pytest.mark.parametrize(("model_id", "names"), [
    ("claude-haiku-5-5", [name for name in ANSWERS if name != "fast"]),
    *rest(("claude-opus-5-5", ["both lifetimes", "a long prompt", "searches", "fast"]),
          ("claude-fable-5-2", ["both lifetimes", "fast"]),
          ("claude-opus-5", ["both lifetimes", "fast"]),
          ("claude-sonnet-5-5", ["both lifetimes", "searches"]),
          ("claude-haiku-4-5-20251001", ["both lifetimes"])),
])
def test_a_list_price_is_what_claude_counts(
    newest: Claude, model_id: str, names: list[str]
) -> None:
    args = [model_id if each == "claude-sonnet-4-6" else each for each in CLAUDE_ARGS]
    counted = [0.0]
    priced = [0.0]
    with tempfile.TemporaryDirectory(prefix="ocp") as folder, StubApi() as api:
        env = clean_env(HOME=folder, **real_claude_env(api.url))
        with ClaudeDriver([str(newest.path), *args], env, Path(folder)) as driver:
            for name in names:
                api.enqueue(stub.text("Yes.", **ANSWERS[name]))
                lines = driver.turn(f"Is it {name}?")
                usage = ocp.NO_USAGE
                for line in lines:
                    event = line.get("event") or {}
                    found = event.get("usage") or event.get("message", {}).get("usage")
                    usage = ocp.usage_of(found, usage) if found else usage
                counted.append(lines[-1]["total_cost_usd"])
                price = ocp.list_price(MODELS.find(model_id), usage, "")
                priced.append(priced[-1] + price / 1e9)

    assert counted == pytest.approx(priced, abs=1e-9)


def test_an_answer_tells_the_price_of_what_the_api_reports(rig: Rig) -> None:
    rig.script(stub.text("Yes.", **ANSWERS["both lifetimes"]))

    headers = rig.ask("What does it cost?", "claude-sonnet-4-6").reply.headers

    # 1,234 tokens for 3 USD a million, 567 for 15, 8,900 for 0.30, 400 for 3.75, 3,000 for 6.
    assert headers["X-OCP-List-Price"] == "0.034377"


@pytest.mark.exhaustive
def test_what_goes_into_the_cache_is_there_for_an_hour_unless_somebody_says_otherwise(
    rig: Rig
) -> None:
    body = MESSAGES.body("And now?", model="claude-sonnet-4-6")
    reply = rig.server.call("POST", MESSAGES.path, body, timeout_s=60)

    # 10 tokens read, 7 written, 5 out of the cache, 3 into it.
    wanted = (10 * 3 + 7 * 15 + 5 * 0.3 + 3 * 6) / 1e6
    assert float(reply.headers["X-OCP-List-Price"]) == pytest.approx(wanted)
