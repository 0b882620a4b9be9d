"""Fast mode, and the lifetime in the API's prompt cache: what requests ask for, what claude is
told, and what answers say of it."""
from __future__ import annotations

import json
from typing import Any

import pytest

from project import load_script
from rendering import (
    MODELS,
    STARTED,
    TEXT,
    USAGE,
    USER,
    finished,
    frames,
    parsing,
    refusal_of,
    steps_for,
    stream_bytes,
    whole,
)

ocp = load_script("ocp_server.py")

Json = dict[str, Any]

#: A model with fast mode, and one without.
OPUS, SONNET = "claude-opus-5-5", "claude-sonnet-5-5"
FAST = parsing()._replace(fast_mode=True)
#: The rest of a request in each dialect.
BODIES: dict[Any, Json] = {
    ocp.CHAT: {"messages": [USER]}, ocp.MESSAGES: {"messages": [USER], "max_tokens": 4_096},
    ocp.RESPONSES: {"input": [USER]}, ocp.COMPLETIONS: {"prompt": "Hello"},
}
EACH_DIALECT = pytest.mark.parametrize("dialect", list(BODIES), ids=lambda each: each.name)
OF_OPENAI = pytest.mark.parametrize(
    "dialect", [ocp.CHAT, ocp.RESPONSES, ocp.COMPLETIONS], ids=lambda each: each.name)


def turn(dialect: Any = ocp.CHAT, about: Any = FAST, **fields: object) -> Any:
    return dialect.parse({"model": OPUS, **BODIES[dialect], **fields}, about)


def settings_of(found: Any) -> list[Json]:
    """The settings that claude is told for a fresh conversation."""
    (step,) = steps_for(found)
    requests = [json.loads(line).get("request", {}) for line in step.splitlines()]
    return [each["settings"] for each in requests if each.get("subtype") == "apply_flag_settings"]


# -- fast mode: requests ----------------------------------------------------------

WISHES = [
    (ocp.MESSAGES, {"speed": "fast"}),
    *((dialect, {"service_tier": tier})
      for dialect in (ocp.CHAT, ocp.RESPONSES, ocp.COMPLETIONS) for tier in ("priority", "fast")),
    (ocp.CHAT, {"speed": "fast"}),
    (ocp.CHAT, {"speed": "fast", "service_tier": "Priority"}),
]


@pytest.mark.parametrize(("dialect", "wish"), WISHES)
def test_a_request_can_ask_for_fast_mode(dialect: Any, wish: Json) -> None:
    found = turn(dialect, **wish)

    assert (found.options.fast_mode, found.ignored) == (True, ())
    assert [each["fastMode"] for each in settings_of(found)] == [True]


@pytest.mark.parametrize(
    ("about", "model"), [(parsing(), OPUS), (FAST, SONNET), (FAST, "claude-opus-9")],
    ids=["not allowed", "another model", "an unknown model"])
@pytest.mark.parametrize(("dialect", "wish"), WISHES[:3])
def test_fast_mode_that_cannot_be_had_is_named_as_ignored(
    dialect: Any, wish: Json, about: Any, model: str
) -> None:
    found = turn(dialect, about, model=model, **wish)

    assert (found.options.fast_mode, found.ignored) == (False, tuple(wish))
    assert not any("fastMode" in each for each in settings_of(found))


@pytest.mark.parametrize(
    ("dialect", "fields", "ignored"),
    [
        (ocp.MESSAGES, {"speed": "standard", "service_tier": "standard_only"}, ()),
        (ocp.MESSAGES, {"speed": None}, ()),
        (ocp.MESSAGES, {"service_tier": "priority"}, ()),
        (ocp.CHAT, {"service_tier": "auto", "speed": "standard"}, ()),
        (ocp.CHAT, {"service_tier": "default"}, ()),
        (ocp.CHAT, {"service_tier": None}, ()),
        (ocp.CHAT, {"service_tier": "flex", "speed": "slow"}, ("service_tier", "speed")),
        (ocp.RESPONSES, {"service_tier": "ultrafast"}, ("service_tier",)),
    ],
)
def test_other_tiers_have_the_usual_speed(dialect: Any, fields: Json, ignored: Any) -> None:
    found = turn(dialect, **fields)

    assert (found.options.fast_mode, found.ignored) == (False, ignored)


@pytest.mark.parametrize(
    ("dialect", "field", "value"),
    [(ocp.MESSAGES, "speed", "slow"), (ocp.CHAT, "service_tier", 1), (ocp.RESPONSES, "speed", {})])
def test_a_speed_that_there_is_not_is_refused(dialect: Any, field: str, value: object) -> None:
    error = refusal_of(dialect, {**BODIES[dialect], field: value})

    assert (error.status, error.param) == (400, field)


def test_the_models_with_fast_mode_are_those_of_the_file() -> None:
    fast = {model.id for model in MODELS.all() if model.fast_mode}

    assert fast == {"claude-fable-5-2", OPUS, "claude-opus-5"}


REFUSED = ocp.BadRequest("'claude-opus-5-5' does not support the `speed` parameter.")


def test_a_model_that_is_refused_fast_mode_loses_it_and_nothing_else() -> None:
    asked = turn(service_tier="fast", reasoning_effort="high")

    refusal = ocp.refusal_of_model(asked, REFUSED)
    again = ocp.after_refusal(asked, refusal)

    assert refusal == ocp.ModelRefusal(OPUS, "fast_mode", False)
    assert again.options == asked.options._replace(fast_mode=False)
    models = MODELS.with_claude(ocp.ClaudeModels(refusals=frozenset({refusal})))
    later = turn(about=FAST._replace(models=models), service_tier="fast")
    assert (later.options.fast_mode, later.ignored) == (False, ("service_tier",))


@pytest.mark.parametrize(
    ("error", "fields"),
    [(REFUSED, {}), (ocp.BadRequest("messages.0: no such speed"), {"service_tier": "fast"}),
     (ocp.BadRequest("prompt is too long"), {"service_tier": "fast"})],
    ids=["nobody asked", "of a message", "another"])
def test_other_errors_take_nothing_away(error: Any, fields: Json) -> None:
    assert ocp.refusal_of_model(turn(**fields), error) is None


# -- fast mode: answers -----------------------------------------------------------

def answered(told: str | None, dialect: Any, **fields: object) -> tuple[Any, list[Any]]:
    """A request, and the events of an answer whose speed the API names."""
    usage = USAGE._replace(
        more={} if told is None else {"speed": told, "service_tier": "standard"})
    events = [STARTED._replace(usage=usage), *TEXT, finished(usage=usage)]
    return turn(dialect, **fields), events


@OF_OPENAI
@pytest.mark.parametrize(
    ("speed", "tier"), [("fast", "priority"), ("standard", "default"), (None, None)])
def test_an_answer_names_the_tier_that_it_had(dialect: Any, speed: str, tier: Any) -> None:
    asked, events = answered(speed, dialect, service_tier="fast")

    sent = [data for _, data in frames(stream_bytes(dialect, asked, events)) if data != "[DONE]"]
    if dialect is ocp.RESPONSES:
        sent = [sent[-1]["response"]]
    told = {each.get("service_tier") for each in (whole(dialect, asked, events), *sent)}
    assert told == {tier}


@OF_OPENAI
def test_an_answer_names_no_tier_where_nobody_asked(dialect: Any) -> None:
    asked, events = answered("standard", dialect)

    assert "service_tier" not in whole(dialect, asked, events)
    assert b"service_tier" not in stream_bytes(dialect, asked, events)


def test_the_usage_of_a_message_has_its_speed() -> None:
    asked, events = answered("fast", ocp.MESSAGES, speed="fast")

    usage = whole(ocp.MESSAGES, asked, events)["usage"]
    assert (usage["speed"], usage["service_tier"]) == ("fast", "standard")
    sent = dict(frames(stream_bytes(ocp.MESSAGES, asked, events)))
    assert sent["message_start"]["message"]["usage"]["speed"] == "fast"


# -- lifetime ---------------------------------------------------------------------

def marked(ttl: object = None, **more: object) -> Json:
    """A part with a mark of the cache."""
    control = {"type": "ephemeral", **({} if ttl is None else {"ttl": ttl})}
    return {"type": "text", "text": "Hello", "cache_control": control, **more}


def by(setting: str) -> Any:
    return parsing()._replace(cache_lifetime=setting)


def said(*parts: Json) -> Json:
    return {"messages": [{"role": "user", "content": list(parts)}]}


TOOL = {"name": "clock", "input_schema": {"type": "object"},
        "cache_control": {"type": "ephemeral", "ttl": "5m"}}
CALL = {"type": "tool_use", "id": "t1", "name": "clock", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": [marked("5m")]}
PLACES: dict[str, tuple[Any, Json]] = {
    "a message": (ocp.MESSAGES, said(marked("5m"))),
    "the system prompt": (ocp.MESSAGES, {"system": [marked("5m")]}),
    "a tool": (ocp.MESSAGES, {"tools": [TOOL]}),
    "the request": (ocp.MESSAGES, {"cache_control": {"type": "ephemeral", "ttl": "5m"}}),
    "a result": (ocp.MESSAGES, {"messages": [
        USER, {"role": "assistant", "content": [CALL]}, {"role": "user", "content": [RESULT]}]}),
    "a part of chat": (ocp.CHAT, said(marked("5m"))),
    "a request of chat": (ocp.CHAT, {"cache_control": {"type": "ephemeral", "ttl": "5m"}}),
    "a tool of chat": (ocp.CHAT, {"tools": [
        {"type": "function", "function": {"name": "clock", "parameters": {}},
         "cache_control": {"type": "ephemeral", "ttl": "5m"}}]}),
    "an item": (ocp.RESPONSES, {"input": [{"role": "user", "content": [
        marked("5m", type="input_text")]}]}),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_lifetime_counts_wherever_it_stands(place: str) -> None:
    dialect, fields = PLACES[place]

    found, ignored = (turn(dialect, by(setting), **fields) for setting in ("client", "plan"))

    assert (found.cache_lifetime, found.ignored) == ("5m", ())
    assert (ignored.cache_lifetime, ignored.ignored) == ("", ("cache_control.ttl",))


@pytest.mark.parametrize(
    ("setting", "ttls", "lifetime", "is_ignored"),
    [
        ("client", ["5m", "1h", "5m"], "1h", False),
        ("client", [None, "5m"], "5m", False),
        ("client", [None], "", False),
        ("client", [], "", False),
        ("client", ["10m"], "", True),
        ("client", ["10m", "5m"], "5m", True),
        ("client", [["5m"], 300], "", True),
        ("plan", [None], "", False),
        ("plan", ["1h"], "", True),
        ("5m", [], "5m", False),
        ("5m", ["5m", None], "5m", False),
        ("5m", ["1h"], "5m", True),
        ("1h", ["5m", "1h"], "1h", False),
        ("1h", ["5m"], "1h", True),
    ],
)
def test_the_owner_s_setting_decides_and_the_longest_wish_counts(
    setting: str, ttls: list[object], lifetime: str, is_ignored: bool
) -> None:
    parts = [marked(ttl) for ttl in ttls] or [{"type": "text", "text": "Hello"}]

    found = turn(ocp.MESSAGES, by(setting), **said(*parts))

    assert found.cache_lifetime == lifetime
    assert found.ignored == (("cache_control.ttl",) if is_ignored else ())


@pytest.mark.parametrize("control", [None, "ephemeral", [], {"type": "ephemeral", "ttl": None}])
def test_a_mark_without_a_lifetime_asks_for_none(control: object) -> None:
    part = {"type": "text", "text": "Hello", "cache_control": control}

    for setting in ("client", "plan"):
        found = turn(ocp.MESSAGES, by(setting), **said(part))
        assert (found.cache_lifetime, found.ignored) == ("", ())


@pytest.mark.parametrize(
    ("lifetime", "environment"),
    [("5m", ("1", "")), ("1h", ("", "1")), ("", ("", ""))])
def test_a_lifetime_is_written_where_every_claude_reads_it(
    lifetime: str, environment: tuple[str, str]
) -> None:
    names = ("FORCE_PROMPT_CACHING_5M", "ENABLE_PROMPT_CACHING_1H")
    wanted = dict(zip(names, environment))
    found = turn(ocp.CHAT)._replace(cache_lifetime=lifetime)

    assert settings_of(found) == ([{"env": wanted}] if lifetime else [])
    line = json.loads(ocp.lifetime_line(lifetime))
    assert line["request"] == {"subtype": "apply_flag_settings", "settings": {"env": wanted}}


@EACH_DIALECT
def test_a_lifetime_of_the_owner_s_is_for_every_request(dialect: Any) -> None:
    assert turn(dialect, by("1h")).cache_lifetime == "1h"
