"""Answers that are given again: to which requests, to whom, for how long, and in which form.

The first two parts are pure: the key of a request, and the cache with a clock that tests set.
The others ask a running server; every test asks something of its own, so that they can share it.
"""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from asking import CHAT, Wire, ask, encoded, is_gone, last_entry, post, question
from dialects import MODELS, parsing
from keyed import ADMIN_KEY, ANONYMOUS_KEY, MULTI, as_admin, ask_as, new_key
from support import Reply, Server, eventually, load_script, running_server
from tongues import CHAT as CHAT_TONGUE
from tongues import COMPLETIONS, MESSAGES, RESPONSES, TONGUES, Tongue, named

ocp = load_script("ocp_server.py")

Json = Any

HOUR = {"CLAUDE_CACHE_TTL": "3600000"}
LONG = "Gr\u00fc\u00dfe aus K\u00f6ln \U0001f642 \u4f60\u597d, " * 40


# ---------------------------------------------------------------------------
# The key of a request
# ---------------------------------------------------------------------------

SOMEBODY = ocp.Caller("laptop", key_id=1)
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "number"}}}


def shaped(schema: Json) -> dict[str, Json]:
    """The fields that ask for an answer of this schema."""
    return {"response_format": {
        "type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


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
    "top_p": {"top_p": 0.5},
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


def test_a_key_does_not_tell_what_was_asked() -> None:
    assert len(key_of(plain())) == 64 and set(key_of(plain())) <= set("0123456789abcdef")


@pytest.mark.parametrize("thinking", [{"type": "disabled"}, {"type": "enabled"}, None],
                         ids=["off", "on", "unsaid"])
def test_thinking_that_is_asked_for_otherwise_gives_another_key(thinking: Json) -> None:
    budget = {"budget_tokens": 2_000} if (thinking or {}).get("type") == "enabled" else {}
    fields = {} if thinking is None else {"thinking": {**thinking, **budget}}

    body = plain(max_tokens=9_000, model="haiku", **fields)
    other = plain(max_tokens=9_000, model="haiku",
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
    dialects = (ocp.CHAT, ocp.MESSAGES, ocp.RESPONSES, ocp.COMPLETIONS)

    keys = {key_of(tongue.body("hi"), dialect) for tongue, dialect in zip(TONGUES, dialects)}

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

class FakeClock:
    """Time, as far as the cache can tell."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


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
        return self.cache.find(key, self.config.cache_ttl_ms / 1000)

    def put(self, key: str, *texts: str) -> None:
        """An answer that was asked for, came, and is kept; none without texts."""
        place = self.find(key)
        assert place.word == "miss"
        self.cache.settle(place.flight, tuple(map(answer_of, texts)), self.config)
        self.cache.leave(place.flight)

    def has(self, key: str) -> bool:
        """Whether there is an answer, without any effect but on the numbers."""
        place = self.find(key)
        if place.flight is not None:
            self.cache.settle(place.flight, (), self.config)
            self.cache.leave(place.flight)
        return bool(place.word == "hit")


def test_an_answer_is_there_until_its_time_is_up_and_not_a_moment_longer() -> None:
    shelf = Shelf(ttl_ms=60_000)
    shelf.put("a", "Hello.")

    shelf.clock.now_s += 59.999
    before = shelf.has("a")
    shelf.clock.now_s += 0.001

    assert (before, shelf.has("a")) == (True, False)


def test_a_hit_does_not_make_an_answer_younger() -> None:
    shelf = Shelf(ttl_ms=60_000)
    shelf.put("a", "Hello.")
    shelf.clock.now_s += 59

    assert shelf.has("a")
    shelf.clock.now_s += 1

    assert not shelf.has("a")


def test_housekeeping_drops_what_is_too_old_and_nothing_else() -> None:
    shelf = Shelf(ttl_ms=60_000)
    shelf.put("old", "Hello.")
    shelf.clock.now_s += 30
    shelf.put("young", "Hello.")
    shelf.clock.now_s += 30

    shelf.cache.tend(shelf.config)

    assert repr(shelf.cache) == "<cache kept=1 flights=0>" and shelf.has("young")


def test_of_too_much_the_oldest_goes_first() -> None:
    shelf = Shelf(most_bytes=5_000)
    for number in range(8):
        shelf.put(str(number), "x" * 1_000)
        shelf.clock.now_s += 1

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
    shelf.clock.now_s += 60

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
    events = list(ocp.replayed(answer))
    return [e.text for e in events if isinstance(e, ocp.Delta) and e.kind == kind]


def test_an_answer_is_told_again_in_small_pieces_of_whole_characters() -> None:
    pieces = deltas(answer_of(LONG), "text")

    assert "".join(pieces) == LONG
    assert len(pieces) > 5 and max(map(len, pieces)) <= 80
    assert all(piece.encode() for piece in pieces)


def test_an_answer_told_again_adds_up_to_the_same_answer() -> None:
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

    *events, last = ocp.replayed(answer)
    for event in events:
        builder.note(event)

    assert builder.answer(last) == answer


def test_a_signature_is_told_in_one_piece() -> None:
    block = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln" * 100}

    assert deltas(answer_of("")._replace(blocks=[block]), "signature") == ["c2ln" * 100]


# ---------------------------------------------------------------------------
# A server with a cache
# ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shared_keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that keeps answers, for tests that ask different things."""
    with running_server(tmp_path_factory.mktemp("keeper"), env=HOUR) as running:
        yield running


@pytest.fixture
def keeper(shared_keeper: Server) -> Server:
    """That server, with claude as it is without a script."""
    shared_keeper.write_scenario([])
    return shared_keeper


@pytest.fixture
def own_keeper(tmp_path: Path) -> Iterator[Server]:
    """One for tests that change its settings, or count."""
    with running_server(tmp_path / "keeper", env=HOUR) as running:
        yield running


def word_of(reply: Reply) -> str:
    """What the cache did for it."""
    return str(reply.headers["X-OCP-Cache"])


def words(server: Server, text: str, times: int = 2, **fields: Json) -> list[str]:
    """What the cache did for the same request, again and again."""
    return [word_of(ask(server, text, **fields)) for _ in range(times)]


def asks(server: Server, text: str) -> int:
    """How often the model was asked this."""
    return sum(text in json.dumps(query["messages"]) for query in server.queries())


def stats_of(server: Server) -> dict[str, Json]:
    found: dict[str, Json] = server.call("GET", "/cache/stats").json()
    return found


def changed(server: Server, **settings: Json) -> None:
    """Changes settings while the server runs."""
    assert server.call("PATCH", "/settings", settings).status == 200


def test_without_a_time_to_live_nothing_is_kept(shared_server: Server) -> None:
    assert words(shared_server, "Never kept") == ["bypass", "bypass"]
    assert asks(shared_server, "Never kept") == 2


def test_the_second_time_is_a_hit_and_the_model_is_not_asked(keeper: Server) -> None:
    assert words(keeper, "Twice", 3) == ["miss", "hit", "hit"]
    assert asks(keeper, "Twice") == 1


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
MARK = {"cache_control": {"type": "ephemeral"}}
BYPASSING: dict[str, dict[str, Json]] = {
    "session": {"session_id": "s1"},
    "tools": {"tools": [TOOL]},
    "functions": {"functions": [TOOL["function"]]},
    "mark on a message": {"messages": [{"role": "user", "content": "marked", **MARK}]},
    "mark on a part": {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "marked", **MARK}]}]},
    "mark on the system prompt": {"messages": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief.", **MARK}]},
        {"role": "user", "content": "marked"}]},
    "mark at the top": MARK,
}


@pytest.mark.parametrize("reason", BYPASSING)
def test_some_requests_go_past_the_cache(keeper: Server, reason: str) -> None:
    before = stats_of(keeper)

    found = words(keeper, reason, **BYPASSING[reason])

    after = stats_of(keeper)
    assert found == ["bypass", "bypass"]
    assert after["bypassed"] == before["bypassed"] + 2 and after["entries"] == before["entries"]


def test_a_mark_in_the_system_prompt_of_messages_goes_past_the_cache(keeper: Server) -> None:
    system = [{"type": "text", "text": "Be brief.", **MARK}]

    replies = [keeper.call("POST", MESSAGES.path, MESSAGES.body("Marked system", system=system))
               for _ in range(2)]

    assert list(map(word_of, replies)) == ["bypass", "bypass"]


def test_an_agents_answers_are_never_kept(tmp_path: Path) -> None:
    env = {**HOUR, "CLAUDE_ALLOWED_TOOLS": "Read"}

    with running_server(tmp_path, env=env) as server:
        assert words(server, "hi") == ["bypass", "bypass"]


def test_sampled_answers_are_kept_unless_the_operator_minds(own_keeper: Server) -> None:
    warm = {"temperature": 0.7}
    kept = words(own_keeper, "Warm", **warm)

    changed(own_keeper, cacheSampled=False)

    assert kept == ["miss", "hit"]
    assert words(own_keeper, "Warm", **warm) == ["bypass", "bypass"]
    assert words(own_keeper, "Cold", temperature=0) == ["miss", "hit"]
    assert words(own_keeper, "Unsaid") == ["miss", "hit"]


def test_a_time_to_live_can_be_given_while_the_server_runs(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        before = words(server, "hi")
        changed(server, cacheTTL=3_600_000)
        during = words(server, "hi")
        changed(server, cacheTTL=None)

        assert [before, during, words(server, "hi")] == [
            ["bypass", "bypass"], ["miss", "hit"], ["bypass", "bypass"]]
        assert eventually(lambda: stats_of(server)["entries"] == 0)


def test_an_answer_is_asked_for_again_when_its_time_is_up(own_keeper: Server) -> None:
    ask(own_keeper, "Old news")

    changed(own_keeper, cacheTTL=1)

    assert word_of(ask(own_keeper, "Old news")) == "miss"
    assert asks(own_keeper, "Old news") == 2


def test_the_bound_on_the_memory_holds_over_http(own_keeper: Server) -> None:
    changed(own_keeper, cacheMaxBytes=65_536)
    own_keeper.write_scenario([[{"say": "x" * 20_000, "chunks": 2}]])

    for number in range(6):
        ask(own_keeper, f"Large {number}")

    assert stats_of(own_keeper)["sizeBytes"] <= 65_536
    assert words(own_keeper, "Large 5", 1) == ["hit"]
    assert words(own_keeper, "Large 0", 1) == ["miss"]


# ---------------------------------------------------------------------------
# Hits in every dialect
# ---------------------------------------------------------------------------

THOUGHT = "Somebody asks something, so something has to be said. " * 3
THINKING = [{"think": THOUGHT, "signature": "c2lnbmVk"}, {"say": LONG, "chunks": 7}]
SPENT = {"input_tokens": 21, "output_tokens": 43, "cache_read_input_tokens": 65,
         "cache_creation_input_tokens": 87}
both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
each_tongue = pytest.mark.parametrize("tongue", TONGUES, ids=named)


@both_ways
@each_tongue
def test_a_hit_says_what_the_answer_said(keeper: Server, tongue: Tongue, stream: bool) -> None:
    keeper.write_scenario([[{**THINKING[0], "usage": SPENT}, THINKING[1]]])
    body = tongue.body(f"Same in {tongue.name}, {stream}", stream=stream)

    first, second = (keeper.call("POST", tongue.path, body) for _ in range(2))

    assert (word_of(first), word_of(second)) == ("miss", "hit")
    assert tongue.told(second).content == tongue.told(first).content
    assert tongue.told(first).text == LONG and "43" in json.dumps(tongue.told(first).usage)


@each_tongue
def test_a_hit_streams_in_small_pieces(keeper: Server, tongue: Tongue) -> None:
    keeper.write_scenario([[{"say": LONG, "chunks": 1}]])
    body = tongue.body(f"Pieces in {tongue.name}", stream=True)

    first, second = (tongue.told(keeper.call("POST", tongue.path, body)) for _ in range(2))

    assert [len(first.pieces), first.pieces[0]] == [1, LONG]
    assert "".join(second.pieces) == LONG
    assert len(second.pieces) > 5 and max(map(len, second.pieces)) <= 80


@each_tongue
def test_whole_and_streamed_share_an_answer(keeper: Server, tongue: Tongue) -> None:
    keeper.write_scenario([THINKING])
    text = f"Both ways in {tongue.name}"

    first = keeper.call("POST", tongue.path, tongue.body(text, stream=True))
    second = keeper.call("POST", tongue.path, tongue.body(text))

    assert word_of(second) == "hit"
    assert tongue.told(second).content == tongue.told(first).content


def test_one_answer_is_given_in_all_dialects(keeper: Server) -> None:
    keeper.write_scenario([THINKING])

    replies = [keeper.call("POST", tongue.path, tongue.body("In all dialects"))
               for tongue in TONGUES]

    assert list(map(word_of, replies)) == ["miss", "hit", "hit", "hit"]
    assert [tongue.told(reply).text for tongue, reply in zip(TONGUES, replies)] == [LONG] * 4


@both_ways
def test_thinking_comes_again_with_its_signature(keeper: Server, stream: bool) -> None:
    keeper.write_scenario([THINKING])
    body = MESSAGES.body(f"Thought over, {stream}", stream=stream)

    replies = [keeper.call("POST", MESSAGES.path, body) for _ in range(2)]

    told = MESSAGES.told(replies[1])
    assert word_of(replies[1]) == "hit"
    assert (told.thinking, told.signature) == (THOUGHT, "c2lnbmVk")


@both_ways
def test_all_of_several_answers_come_again_each_in_its_place(
    keeper: Server, stream: bool
) -> None:
    keeper.write_scenario([[{"say": f"Answer {n}."}] for n in range(3)], shared=True)
    body = CHAT_TONGUE.body(f"Three of them, {stream}", n=3, stream=stream)

    first, second = (keeper.call("POST", CHAT, body) for _ in range(2))

    assert word_of(second) == "hit"
    assert CHAT_TONGUE.told(second).content == CHAT_TONGUE.told(first).content
    assert sorted(CHAT_TONGUE.told(second).texts) == ["Answer 0.", "Answer 1.", "Answer 2."]


@both_ways
def test_a_stop_sequence_is_told_again(keeper: Server, stream: bool) -> None:
    keeper.write_scenario([[{"say": "One "}, {"finish": "stop_sequence", "stop_sequence": "TWO"}]])
    body = MESSAGES.body(f"Until two, {stream}", stop_sequences=["TWO"], stream=stream)

    first, second = (keeper.call("POST", MESSAGES.path, body) for _ in range(2))

    assert word_of(second) == "hit"
    assert '"stop_sequence":"TWO"' in first.text and '"stop_sequence":"TWO"' in second.text


@pytest.mark.parametrize("root", ["object", "array"])
def test_an_answer_of_a_schema_comes_again(keeper: Server, root: str) -> None:
    given = {"a": "x"} if root == "object" else ["x"]
    schema = SCHEMA if root == "object" else {"type": "array", "items": {"type": "string"}}
    spoken = given if root == "object" else {"value": given}
    keeper.write_scenario([[{"tool": {"name": "StructuredOutput", "input": spoken}}]])

    first, second = (ask(keeper, f"As {root}", **shaped(schema)) for _ in range(2))

    assert word_of(second) == "hit"
    assert [json.loads(r.json()["choices"][0]["message"]["content"]) for r in (first, second)] == [
        given, given]


def test_every_prompt_of_a_completion_gets_its_own_answer_again(keeper: Server) -> None:
    keeper.write_scenario([])
    body = {**COMPLETIONS.body(""), "prompt": ["First prompt", "Second prompt"], "echo": True}

    replies = [keeper.call("POST", COMPLETIONS.path, body) for _ in range(2)]

    wanted = [f"{prompt}You said: {prompt}" for prompt in body["prompt"]]
    assert word_of(replies[1]) == "hit"
    assert [choice["text"] for choice in replies[1].json()["choices"]] == wanted


def test_a_hit_is_an_answer_of_its_own(keeper: Server) -> None:
    replies = [keeper.call("POST", tongue.path, tongue.body("Ids of its own"))
               for tongue in TONGUES for _ in range(2)]

    ids = [reply.json()["id"] for reply in replies]
    assert len(set(ids)) == len(ids)
    assert len({reply.headers["X-Request-Id"] for reply in replies}) == len(ids)


def test_a_hit_tells_the_model_in_the_words_of_its_own_request(keeper: Server) -> None:
    first = ask(keeper, "By another name", model="sonnet")

    second = ask(keeper, "By another name", model="claude-sonnet-5")

    assert word_of(second) == "hit"
    assert (first.json()["model"], second.json()["model"]) == ("sonnet", "claude-sonnet-5")


def test_a_conversation_goes_on_from_a_hit(keeper: Server) -> None:
    first = question("Begin")
    said = [ask(keeper, "Begin").json()["choices"][0]["message"]["content"] for _ in range(2)][1]
    messages = [*first["messages"], {"role": "assistant", "content": said},
                {"role": "user", "content": "Go on"}]

    reply = ask(keeper, messages=messages)

    assert reply.json()["choices"][0]["message"]["content"] == "You said: Go on"


def test_a_response_that_was_a_hit_can_be_gone_on_from(keeper: Server) -> None:
    body = RESPONSES.body("A response to keep")
    replies = [keeper.call("POST", RESPONSES.path, body) for _ in range(2)]

    more = RESPONSES.body("And more", previous_response_id=replies[1].json()["id"])
    reply = keeper.call("POST", RESPONSES.path, more)

    assert word_of(replies[1]) == "hit"
    assert RESPONSES.told(reply).text == "You said: And more"
    assert asks(keeper, "A response to keep") == 2


# ---------------------------------------------------------------------------
# What is not kept
# ---------------------------------------------------------------------------

UNKEPT: dict[str, list[Json]] = {
    "an error": [{"api_error": {"status": 529, "word": "overloaded", "text": "Overloaded"}}],
    "a plan limit": [{"api_error": {"status": 429, "word": "rate_limit", "text": "Limit"},
                      "resets_at": 4_000_000_000}],
    "a death": [{"say": "Half an ans"}, {"exit": 1}],
    "silence": [{"finish": "end_turn"}],
    "a refusal": [{"say": "I"}, {"finish": "refusal"}],
    "a limit of tokens": [{"say": "Half an ans"}, {"finish": "max_tokens"}],
    "a full window": [{"say": "Half"}, {"finish": "model_context_window_exceeded"}],
    "a pause": [{"say": "Half"}, {"finish": "pause_turn"}],
}


#: A stream fails in another way than a whole answer, but is kept, or not, in the same.
UNKEPT_CASES = [*((name, False) for name in UNKEPT), ("a death", True), ("a refusal", True)]


@pytest.mark.parametrize(("name", "stream"), UNKEPT_CASES)
def test_what_is_no_good_answer_is_not_kept(keeper: Server, name: str, stream: bool) -> None:
    keeper.write_scenario([UNKEPT[name]])
    text = f"Once {name}, {stream}"
    bad = ask(keeper, text, stream=stream)
    keeper.write_scenario([[{"say": "Good."}]])

    replies = [ask(keeper, text) for _ in range(2)]

    assert [word_of(reply) for reply in (bad, *replies)] == ["miss", "miss", "hit"]
    assert [r.json()["choices"][0]["message"]["content"] for r in replies] == ["Good.", "Good."]


def test_an_answer_that_does_not_fit_its_schema_is_not_kept(keeper: Server) -> None:
    keeper.write_scenario([[{"say": "I cannot."}]])

    found = [ask(keeper, "Unfit", **shaped(SCHEMA)) for _ in range(2)]

    assert [reply.json()["choices"][0]["message"]["refusal"] for reply in found] == [
        "I cannot.", "I cannot."]
    assert list(map(word_of, found)) == ["miss", "miss"]


def test_one_bad_answer_of_several_spoils_them_all(keeper: Server) -> None:
    cut = [{"say": "Half"}, {"finish": "max_tokens"}]
    keeper.write_scenario([[{"say": "Good."}], cut], shared=True)

    assert words(keeper, "One of two", n=2) == ["miss", "miss"]


def test_an_answer_that_nobody_waited_for_is_not_kept(keeper: Server) -> None:
    keeper.write_scenario([[{"say": "Half "}, {"hang": True}]])
    asked = len(keeper.queries())
    with Wire(keeper.port) as wire:
        wire.send(post(encoded(question("Abandoned", stream=True))))
        pid = int(eventually(lambda: keeper.queries()[asked:])[0]["pid"])
    assert eventually(lambda: is_gone(pid))
    keeper.write_scenario([[{"say": "Good."}]])

    reply = ask(keeper, "Abandoned")

    assert word_of(reply) == "miss"
    assert reply.json()["choices"][0]["message"]["content"] == "Good."


def test_an_answer_whose_reader_left_when_it_was_complete_is_kept(keeper: Server) -> None:
    keeper.write_scenario([[{"say": LONG * 500, "chunks": 1}]])
    kept = stats_of(keeper)["entries"]
    with Wire(keeper.port) as wire:
        wire.send(post(encoded(question("Left late", stream=True))))
        eventually(lambda: stats_of(keeper)["entries"] > kept)

    assert word_of(ask(keeper, "Left late")) == "hit"


def test_what_was_said_is_not_on_the_disk(keeper: Server) -> None:
    secret = "The password is swordfish-4711."
    keeper.write_scenario([[{"say": secret}]])
    assert words(keeper, "Say the word") == ["miss", "hit"]

    files = [path for path in keeper.ocp_home.rglob("*") if path.is_file()]

    assert files
    assert [path.name for path in files if b"swordfish" in path.read_bytes()] == []


# ---------------------------------------------------------------------------
# What the operator sees of it
# ---------------------------------------------------------------------------

def test_the_stats_tell_what_the_cache_did(own_keeper: Server) -> None:
    own_keeper.write_scenario([[{"say": "Hello."}]])
    words(own_keeper, "a", 3)
    words(own_keeper, "b", 2)
    words(own_keeper, "c", 2, session_id="s")

    found = stats_of(own_keeper)

    size_bytes = found.pop("sizeBytes")
    assert 2_000 < size_bytes < 4_000
    assert found == {
        "entries": 2, "totalHits": 3, "hits": 3, "misses": 2, "shared": 0, "bypassed": 2,
        "inflight": 0, "requesters": 0, "maxBytes": 33_554_432, "ttl": 3_600_000}


def test_clearing_the_cache_forgets_every_answer_and_is_logged(own_keeper: Server) -> None:
    for text in ("a", "b"):
        words(own_keeper, text)

    reply = own_keeper.call("DELETE", "/cache")

    assert (reply.status, reply.json()) == (200, {"cleared": 2})
    assert words(own_keeper, "a", 1) == ["miss"]
    entry = last_entry(own_keeper, "cache_cleared")
    assert (entry["cleared"], entry["by"]) == (2, "local")


def newest(server: Server, count: int) -> list[Json]:
    """The last rows of usage, oldest first."""
    rows = server.call("GET", f"/api/usage?limit={count}").json()["recent"]
    return list(reversed(rows))


def test_a_hit_is_a_row_that_cost_nothing(keeper: Server) -> None:
    keeper.write_scenario([[{"say": "Hello."}]])
    reply = [ask(keeper, "A row", stream=True) for _ in range(2)][1]

    first, second = newest(keeper, 2)

    spent = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")
    assert [first[name] for name in spent] == [10, 7, 5, 3]
    assert {name: second[name] for name in (
        *spent, "path", "outcome", "success", "status", "warm", "model", "dialect", "stream",
        "stop_reason", "prompt_chars", "response_chars", "request_id")} == {
        "input_tokens": 0, "output_tokens": 0, "cache_read_tokens": 0, "cache_write_tokens": 0,
        "path": "cached", "outcome": "ok", "success": 1, "status": 200, "warm": None,
        "model": "claude-sonnet-5", "dialect": "chat", "stream": 1, "stop_reason": "end_turn",
        "prompt_chars": 5, "response_chars": 6, "request_id": reply.headers["X-Request-Id"]}


def test_a_hit_is_one_line_in_the_log(keeper: Server) -> None:
    reply = [ask(keeper, "A line") for _ in range(2)][1]

    lines = [e for e in keeper.log_entries()
             if e.get("request_id") == reply.headers["X-Request-Id"]]

    assert [(e["event"], e["path"], e["outcome"], e["model"]) for e in lines] == [
        ("answer_reused", "cached", "ok", "claude-sonnet-5")]


# ---------------------------------------------------------------------------
# Whose answers they are
# ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shared_many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys that keeps answers."""
    env = {**MULTI, **HOUR, "PROXY_ANONYMOUS_KEY": ANONYMOUS_KEY}
    with running_server(tmp_path_factory.mktemp("many"), env=env) as running:
        yield running


@pytest.fixture
def many(shared_many: Server) -> Server:
    """That server, with claude as it is without a script."""
    shared_many.write_scenario([])
    return shared_many


def key_of_new(server: Server, name: str, **fields: Json) -> str:
    """The secret of a new key."""
    return str(new_key(server, name=name, **fields)["key"])


def test_nobody_gets_an_answer_that_somebody_else_asked_for(many: Server) -> None:
    callers = [key_of_new(many, "one"), key_of_new(many, "two"), ADMIN_KEY, ANONYMOUS_KEY]

    found = [[word_of(ask_as(many, key, "Whose is it")) for _ in range(2)] for key in callers]

    assert found == [["miss", "hit"]] * 4


def test_a_renamed_and_a_rotated_key_keep_their_answers(many: Server) -> None:
    key = key_of_new(many, "before")
    ask_as(many, key, "Still mine")
    as_admin(many, "PATCH", "/api/keys/before", {"name": "after"}).json()
    renamed = word_of(ask_as(many, key, "Still mine"))

    rotated = as_admin(many, "POST", "/api/keys/after/rotate").json()
    again = ask_as(many, rotated["key"], "Still mine")

    assert (renamed, word_of(again)) == ("hit", "hit")


def test_a_new_key_of_an_old_name_does_not_get_the_old_answers(many: Server) -> None:
    ask_as(many, key_of_new(many, "again"), "Not yours")
    as_admin(many, "DELETE", "/api/keys/again").json()

    assert word_of(ask_as(many, key_of_new(many, "again"), "Not yours")) == "miss"


def test_a_revoked_key_and_one_without_the_model_get_no_hit(many: Server) -> None:
    revoked, narrowed = key_of_new(many, "revoked"), key_of_new(many, "narrowed")
    for key in (revoked, narrowed):
        ask_as(many, key, "No more")

    as_admin(many, "DELETE", "/api/keys/revoked").json()
    as_admin(many, "PATCH", "/api/keys/narrowed", {"models": ["opus"]}).json()

    assert ask_as(many, revoked, "No more").status == 401
    assert ask_as(many, narrowed, "No more").status == 403


def test_hits_do_not_count_in_quotas(many: Server) -> None:
    key = key_of_new(many, "frugal", quota={"daily": 3, "tokensDaily": 100_000})

    found = [word_of(ask_as(many, key, "Cheap")) for _ in range(6)]

    quota = as_admin(many, "GET", "/api/keys/frugal/quota").json()["quota"]
    assert found == ["miss", *["hit"] * 5]
    assert [quota["daily"][name] for name in ("used", "inFlight")] == [1, 0]
    assert [quota["tokensDaily"][name] for name in ("used", "inFlight")] == [25, 0]


def test_a_key_whose_quota_is_used_up_gets_no_hits_either(many: Server) -> None:
    key = key_of_new(many, "spent", quota={"daily": 1})
    ask_as(many, key, "Paid for")

    reply, other = ask_as(many, key, "Paid for"), ask_as(many, key, "Not paid for")

    for refused in (reply, other):
        assert (refused.status, refused.json()["error"]["code"]) == (429, "insufficient_quota")
