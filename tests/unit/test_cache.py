"""The answer cache: the key of a request, and the store of answers on a clock that tests set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pytest

from chat import LONG, SCHEMA, question, shaped
from clock import FakeClock
from dialects import DIALECTS
from project import load_script
from rendering import MODELS, parsing

ocp = load_script("ocp_server.py")

Json = Any


# ---------------------------------------------------------------------------
# The key of a request
# ---------------------------------------------------------------------------

SOMEBODY = ocp.Caller("laptop", key_id=1)


def key_of(
    body: Mapping[str, Json], dialect: Any = ocp.CHAT, caller: Any = SOMEBODY, prompt: str = ""
) -> str:
    """What the answer to this body is kept under."""
    return str(ocp.cache_key(dialect.parse(body, parsing()), caller, prompt))


def plain(**fields: Json) -> dict[str, Json]:
    """A body for a model that takes every option."""
    return question("hi", **{"model": "claude-sonnet-4-6", **fields})


SAID = {"role": "assistant", "content": "Hello."}
HI = {"role": "user", "content": "hi"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0="}}
SHAPING: dict[str, dict[str, Json]] = {
    "model": {"model": "claude-opus-4-6"},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, HI]},
    "text": {"messages": [{"role": "user", "content": "Hi"}]},
    "history": {"messages": [HI, SAID, HI]},
    "other history": {"messages": [HI, {**SAID, "content": "Hm."}, HI]},
    "image": {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, IMAGE]}]},
    "max_tokens": {"max_tokens": 100},
    "stop": {"stop": ["."]},
    "other stop": {"stop": ["!"]},
    "temperature": {"temperature": 0.5},
    "temperature of 0": {"temperature": 0},
    "top_p": {"top_p": 0.95},
    "effort": {"reasoning_effort": "high"},
    "no effort": {"reasoning_effort": "none"},
    "n": {"n": 2},
    "schema": shaped(SCHEMA),
    "other schema": shaped({**SCHEMA, "required": ["a"]}),
    "any JSON": {"response_format": {"type": "json_object"}},
}


def test_whatever_shapes_an_answer_gives_it_a_key_of_its_own() -> None:
    keys = {"nothing": key_of(plain())}
    keys |= {name: key_of(plain(**fields)) for name, fields in SHAPING.items()}

    by_key: dict[str, list[str]] = {}
    for name, key in keys.items():
        by_key.setdefault(key, []).append(name)

    assert [names for names in by_key.values() if len(names) > 1] == []


CONTEXT = ("<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\nIt is {}.\n"
           "<<<END_OPENCLAW_INTERNAL_CONTEXT>>>")


@pytest.mark.parametrize("texts", [
    [["hi", CONTEXT.format("noon")], ["hi", CONTEXT.format("one")]], [["hi"], ["hi "]],
    [["h", "i"], ["hi"]],
], ids=["context", "white space", "blocks"])
def test_what_is_one_conversation_may_still_be_two_keys(texts: Json) -> None:
    contents = [[{"type": "text", "text": text} for text in each] for each in texts]
    keys = {key_of(plain(messages=[{"role": "user", "content": each}])) for each in contents}

    assert len(keys) == 2


def test_a_key_does_not_tell_what_was_asked() -> None:
    assert len(key_of(plain())) == 64 and set(key_of(plain())) <= set("0123456789abcdef")


@pytest.mark.parametrize("thinking", [{"type": "disabled"}, {"type": "enabled"}, None],
                         ids=["off", "on", "unsaid"])
def test_thinking_that_is_asked_for_otherwise_gives_another_key(thinking: Json) -> None:
    budget = {"budget_tokens": 2_000} if (thinking or {}).get("type") == "enabled" else {}
    fields = {} if thinking is None else {"thinking": {**thinking, **budget}}

    body = plain(max_tokens=9_000, model="claude-haiku-4-5", **fields)
    other = plain(max_tokens=9_000, model="claude-haiku-4-5",
                  thinking={"type": "enabled", "budget_tokens": 3_000})

    assert key_of(body, ocp.MESSAGES) != key_of(other, ocp.MESSAGES)


def test_every_caller_has_keys_of_their_own() -> None:
    others = [ocp.Caller("laptop", key_id=2), ocp.Caller("laptop"), ocp.Caller("local"),
              ocp.Caller("anonymous"), ocp.Caller("admin", is_admin=True)]

    keys = {key_of(plain(), caller=caller) for caller in (SOMEBODY, *others)}

    assert len(keys) == 6


def test_a_key_that_was_renamed_finds_its_answers_again() -> None:
    renamed = SOMEBODY._replace(name="desk", quota={"daily": 3}, max_concurrent=2)

    assert key_of(plain(), caller=renamed) == key_of(plain())


def test_the_operators_prompt_is_part_of_the_key_and_no_system_prompt() -> None:
    system = [{"role": "system", "content": "Be brief."}, HI]

    keys = {key_of(plain()), key_of(plain(), prompt="Be brief."), key_of(plain(messages=system))}

    assert len(keys) == 3


SAME: dict[str, dict[str, Json]] = {
    "stream": {"stream": True, "stream_options": {"include_usage": True}},
    "blocks": {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
    "harmless": {"user": "me", "seed": 7, "metadata": {"a": "b"}, "store": True},
    "defaults": {"n": 1, "temperature": 1, "top_p": 1, "stop": None, "tools": []},
    "no session": {"session_id": ""},
}


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_shape_an_answer_does_not_change_its_key(name: str) -> None:
    assert key_of(plain(**SAME[name])) == key_of(plain())


def test_an_alias_has_the_key_of_the_model_that_it_stands_for() -> None:
    assert key_of(plain(model="sonnet")) == key_of(plain(model=MODELS.find("sonnet").id))


def turned(value: Json) -> Json:
    """The same JSON with the keys of its objects the other way round."""
    if isinstance(value, dict):
        return {key: turned(value[key]) for key in reversed(list(value))}
    return [turned(each) for each in value] if isinstance(value, list) else value


def test_the_order_of_keys_in_a_body_does_not_matter() -> None:
    body = plain(messages=[HI, SAID, {"role": "user", "content": [IMAGE]}], **shaped(SCHEMA))

    assert json.dumps(turned(body)) != json.dumps(body)
    assert key_of(turned(body)) == key_of(body)


def test_one_question_has_one_key_in_all_dialects() -> None:
    of_server = (ocp.CHAT, ocp.MESSAGES, ocp.RESPONSES, ocp.COMPLETIONS)

    keys = {key_of(client.body("hi"), dialect) for client, dialect in zip(DIALECTS, of_server)}

    assert len(keys) == 1


def test_several_prompts_have_another_key_than_several_answers_to_one() -> None:
    def completion(**fields: Json) -> str:
        return key_of({"model": "sonnet", **fields}, ocp.COMPLETIONS)

    assert completion(prompt="a", n=2) == completion(prompt=["a", "a"])
    assert len({completion(prompt=[*pair]) for pair in ("aa", "ab", "ba", "bb")}) == 4


def test_text_with_half_a_character_has_a_key() -> None:
    assert key_of(plain(messages=[{"role": "user", "content": "\ud83d"}])) != key_of(plain())


# ---------------------------------------------------------------------------
# The cache, on a clock of its own
# ---------------------------------------------------------------------------

def answer_of(text: str) -> Any:
    """A whole answer."""
    return ocp.Answer("msg_1", "claude-sonnet-5", [{"type": "text", "text": text}], "",
                      "end_turn", None, ocp.Usage(10, 7, 5, 3))


class Shelf:
    """A cache with a clock, and what is put into it."""

    def __init__(self, ttl_ms: int = 60_000, most_bytes: int = 1_000_000) -> None:
        self.clock = FakeClock()
        self.config = dataclasses.replace(
            ocp.Config(), cache_ttl_ms=ttl_ms, cache_max_bytes=most_bytes)
        self.cache = ocp.Cache(self.clock)

    def find(self, key: str) -> Any:
        return self.cache.lookup(key, self.config.cache_ttl_ms / 1000)

    def put(self, key: str, *texts: str) -> None:
        """An answer that was asked for, came, and is kept; none without texts."""
        place = self.find(key)
        assert place.status == "miss"
        self.cache.settle(place.flight, tuple(map(answer_of, texts)), self.config)
        self.cache.unfollow(place.flight)

    def has(self, key: str) -> bool:
        """Whether there is an answer, without any effect but on the numbers."""
        place = self.find(key)
        if place.flight is not None:
            self.cache.settle(place.flight, (), self.config)
            self.cache.unfollow(place.flight)
        return bool(place.status == "hit")


def test_an_answer_is_there_until_its_time_is_up_and_not_a_moment_longer() -> None:
    shelf = Shelf(ttl_ms=60_000)
    shelf.put("a", "Hello.")

    shelf.clock.advance(59.999)
    before = shelf.has("a")
    shelf.clock.advance(0.001)

    assert (before, shelf.has("a")) == (True, False)


def test_a_hit_does_not_make_an_answer_younger() -> None:
    shelf = Shelf(ttl_ms=60_000)
    shelf.put("a", "Hello.")
    shelf.clock.advance(59)

    assert shelf.has("a")
    shelf.clock.advance(1)

    assert not shelf.has("a")


def test_housekeeping_drops_what_is_too_old_and_nothing_else() -> None:
    shelf = Shelf(ttl_ms=60_000)
    shelf.put("old", "Hello.")
    shelf.clock.advance(30)
    shelf.put("young", "Hello.")
    shelf.clock.advance(30)

    shelf.cache.tend(shelf.config)

    assert repr(shelf.cache) == "<cache kept=1 flights=0>" and shelf.has("young")


def test_of_too_much_the_oldest_goes_first() -> None:
    shelf = Shelf(most_bytes=5_000)
    for number in range(8):
        shelf.put(str(number), "x" * 1_000)
        shelf.clock.advance(1)

    there = [number for number in range(8) if shelf.has(str(number))]

    assert there == [6, 7] and shelf.cache.stats()["sizeBytes"] <= 5_000


def test_an_answer_that_is_too_large_alone_drives_nobody_out() -> None:
    shelf = Shelf(most_bytes=5_000)
    shelf.put("small", "Hello.")

    shelf.put("large", "x" * 6_000)

    assert shelf.has("small") and not shelf.has("large")


def test_a_smaller_bound_is_kept_at_the_next_look() -> None:
    shelf = Shelf(most_bytes=100_000)
    shelf.put("a", "x" * 3_000)
    shelf.put("b", "x" * 3_000)

    shelf.cache.tend(dataclasses.replace(shelf.config, cache_max_bytes=5_000))

    assert (shelf.has("a"), shelf.has("b")) == (False, True)


def test_what_is_put_again_is_counted_once() -> None:
    shelf = Shelf()
    shelf.put("a", "Hello.")
    size_bytes = shelf.cache.stats()["sizeBytes"]
    shelf.clock.advance(60)

    shelf.put("a", "Hello.")

    assert shelf.cache.stats()["sizeBytes"] == size_bytes > 0
    assert repr(shelf.cache) == "<cache kept=1 flights=0>"


def test_an_answer_weighs_what_it_says_in_bytes_and_something_more() -> None:
    shelf = Shelf()

    shelf.put("a", "\U0001f642" * 1_000, "x" * 500)

    assert 4_500 < shelf.cache.stats()["sizeBytes"] < 8_000


def test_clearing_tells_how_many_there_were_and_leaves_none() -> None:
    shelf = Shelf()
    shelf.put("a", "Hello.")
    shelf.put("b", "Hello.")

    cleared = shelf.cache.clear()

    assert (cleared, shelf.cache.clear(), shelf.has("a")) == (2, 0, False)
    assert shelf.cache.stats()["sizeBytes"] == 0


def test_a_flight_without_an_answer_leaves_nothing() -> None:
    shelf = Shelf()

    shelf.put("a")

    assert repr(shelf.cache) == "<cache kept=0 flights=0>"


# -- told again ---------------------------------------------------------------


def deltas(answer: Any, kind: str) -> list[str]:
    events = list(ocp.replay_events(answer))
    return [e.text for e in events if isinstance(e, ocp.Delta) and e.kind == kind]


def test_an_answer_is_told_again_in_small_pieces_of_whole_characters() -> None:
    pieces = deltas(answer_of(LONG), "text")

    assert "".join(pieces) == LONG
    assert len(pieces) > 5 and max(map(len, pieces)) <= 80
    assert all(piece.encode() for piece in pieces)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_an_answer_told_again_adds_up_to_the_same_answer(is_streamed: bool) -> None:
    blocks = [
        {"type": "thinking", "thinking": LONG, "signature": "c2ln" * 100},
        {"type": "redacted_thinking", "data": "c2VjcmV0"},
        {"type": "text", "text": LONG}, {"type": "text", "text": ""},
        {"type": "text", "text": "Bye."},
    ]
    usage = ocp.Usage(10, 7, 5, 3, reasoning_tokens=4)
    answer = answer_of("")._replace(
        blocks=blocks, usage=usage, stop_reason="stop_sequence", stop_sequence="!")
    builder = ocp.AnswerBuilder()

    *events, last = ocp.replay_events(answer, is_streamed=is_streamed)
    for event in events:
        builder.add(event)

    assert builder.answer(last) == answer
    pieces = [event for event in events if isinstance(event, ocp.Delta)]
    assert (len(pieces) == 4) != is_streamed, "thinking, its signature, and two texts"


def test_a_signature_is_told_in_one_piece() -> None:
    block = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln" * 100}

    assert deltas(answer_of("")._replace(blocks=[block]), "signature") == ["c2ln" * 100]
