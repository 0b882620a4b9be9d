"""Spares that have run once what a first question needs: the API gets what it gets from others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

import stub_api as stub
from conversation import Conversation, path_of
from depth import rest
from dialects import CHAT, MESSAGES, Result, Tool
from rig import MODEL, NEWEST_MODEL, Rig, claude_pids
from waiting import eventually

Json = Any
Body = dict[str, Json]

RIG_SETTINGS = {"OCP_LOG_LEVEL": "debug"}
WEATHER = Tool("weather")

#: What the first question of a process can bring.
CASES: Mapping[str, Json] = {
    "a bare question": {},
    "a system prompt, tools and options": {
        "system": "Be kind.", "tools": [WEATHER], "max_tokens": 99, "reasoning_effort": "low"},
    "a system prompt": {"system": "Be kind."},
    "tools": {"tools": [WEATHER, Tool("alpha")]},
    "the newest model": {"system": "Be kind.", "model": NEWEST_MODEL},
}


def sent_of(rig: Rig) -> Body:
    """What the API got last, without what names the process."""
    body: Body = json.loads(json.dumps(rig.last_body()))
    del body["metadata"]
    return body


def set_spares(rig: Rig, count: int) -> None:
    rig.server.call("PATCH", "/settings", {"warmProcesses": count})


def prime(rig: Rig, model: str = MODEL) -> int:
    """Wait until a spare of this model is primed, or ready if it is too old for that; its pid."""
    set_spares(rig, 1)
    rig.ask("Who needs one?", model)
    rig.end_parked()
    rig.settle()
    name = "claude_spawned" if rig.is_old else "spare_primed"

    def ready() -> list[int]:
        running, health = claude_pids(rig.server), rig.server.call("GET", "/health").json()
        entries = [each for each in rig.server.log_entries(name) if each["model"] == model]
        return [entry["pid"] for entry in entries if entry["pid"] in running and health["spares"]]

    return eventually(ready)[-1]


def two_turns(rig: Rig, case: Mapping[str, Json]) -> list[Body]:
    """What the API got in two turns of a conversation that begins like this."""
    fields = {"dialect": CHAT, **case}
    talk = Conversation(rig, **fields)
    bodies = []
    for words in ("One?", "Two?"):
        paths = {path_of(rig, talk.ask(words))}
        bodies.append(sent_of(rig))
    assert paths == {"continued"}
    rig.end_parked()
    return bodies


@pytest.mark.parametrize("name", ["a system prompt, tools and options", *rest(
    *(name for name in CASES if name != "a system prompt, tools and options"))])
def test_a_primed_process_sends_what_another_would(rig: Rig, name: str) -> None:
    set_spares(rig, 0)
    case = CASES[name]
    expected = two_turns(rig, case)
    prime(rig, case.get("model", MODEL))
    assert two_turns(rig, case) == expected
    assert len(rig.bodies()) == 5


@pytest.mark.exhaustive
def test_a_primed_process_takes_a_history_with_calls_and_tells_what_the_api_says(rig: Rig) -> None:
    set_spares(rig, 0)
    rig.script(stub.thinking("Hm.", "Yes."), stub.tool_calls([("weather", {"city": "Bern"})]),
               then=stub.text("Sun."))
    talk = Conversation(
        rig, MESSAGES, [WEATHER], "Be brief.", thinking={"type": "adaptive"})
    talk.ask("One?")
    call = talk.ask("Weather?").call
    rig.end_parked()
    talk.messages += MESSAGES.results([(call.id, Result("Sun."))])
    talk.branch().send()
    expected = sent_of(rig)
    rig.end_parked()
    pid = prime(rig)
    assert path_of(rig, talk.send()) == "rebuilt"
    assert sent_of(rig) == expected and pid in claude_pids(rig.server)

    refusal = "prompt is too long: 210000 tokens > 200000 maximum"
    rig.script(stub.error(400, refusal))
    assert refusal in str(talk.ask("And now?").error)
    rig.settle()


@pytest.mark.exhaustive
def test_an_output_schema_needs_a_process_that_is_not_primed(rig: Rig) -> None:
    set_spares(rig, 0)
    schema = {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]}
    fields = {"response_format": {
        "type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}
    rig.script()
    pid = prime(rig)
    rig.script(then=stub.tool_calls([("StructuredOutput", {"a": 1})]))
    assert rig.ask("One?", **fields).text == '{"a": 1}'
    # The spare of this model that waits from now on can take one.
    if not rig.is_old:
        eventually(lambda: pid not in claude_pids(rig.server))
    rig.settle()
    primed = len(rig.server.log_entries("spare_primed"))
    rig.end_parked()
    assert rig.ask("Two?", **fields).text == '{"a": 1}'
    assert len(rig.server.log_entries("spare_primed")) == primed
