"""A server that gives answers again: to which requests, to whom, for how long, in which form.

Every test asks something of its own, so that they can share a server.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cached import HOUR, newest, stats_of, word_of
from chat import (
    CHAT_PATH,
    LONG,
    SCHEMA,
    UNLISTED_MODEL,
    ask,
    both_ways,
    encoded,
    question,
    shaped,
)
from dialects import (
    CHAT,
    COMPLETIONS,
    DIALECTS,
    MESSAGES,
    RESPONSES,
    Dialect,
    dialect_name,
)
from keys import ADMIN_KEY, ANONYMOUS_KEY, MULTI, as_admin, ask_as, new_key
from raw_http import RawConnection, post
from server import Server, at_rest, last_entry, running_server
from waiting import eventually

Json = Any


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


def words(server: Server, text: str, times: int = 2, **fields: Json) -> list[str]:
    """What the cache did for the same request, again and again."""
    return [word_of(ask(server, text, **fields)) for _ in range(times)]


def asks(server: Server, text: str) -> int:
    """How often the model was asked this."""
    return sum(text in json.dumps(query["messages"]) for query in server.queries())


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
    "session": {"ocp_session_id": "s1"},
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
each_dialect = pytest.mark.parametrize("dialect", DIALECTS, ids=dialect_name)


@both_ways
@each_dialect
def test_a_hit_says_what_the_answer_said(keeper: Server, dialect: Dialect, stream: bool) -> None:
    keeper.write_scenario([[{**THINKING[0], "usage": SPENT}, THINKING[1]]])
    body = dialect.body(f"Same in {dialect.name}, {stream}", stream=stream)

    first, second = (keeper.call("POST", dialect.path, body) for _ in range(2))

    assert (word_of(first), word_of(second)) == ("miss", "hit")
    assert dialect.read_success(second).content == dialect.read_success(first).content
    assert dialect.read_success(first).text == LONG
    assert "43" in json.dumps(dialect.read_success(first).usage)


@each_dialect
def test_a_hit_streams_in_small_pieces(keeper: Server, dialect: Dialect) -> None:
    keeper.write_scenario([[{"say": LONG, "chunks": 1}]])
    body = dialect.body(f"Pieces in {dialect.name}", stream=True)

    first, second = (
        dialect.read_success(keeper.call("POST", dialect.path, body)) for _ in range(2))

    assert [len(first.pieces), first.pieces[0]] == [1, LONG]
    assert "".join(second.pieces) == LONG
    assert len(second.pieces) > 5 and max(map(len, second.pieces)) <= 80


@each_dialect
def test_whole_and_streamed_share_an_answer(keeper: Server, dialect: Dialect) -> None:
    keeper.write_scenario([THINKING])
    text = f"Both ways in {dialect.name}"

    first = keeper.call("POST", dialect.path, dialect.body(text, stream=True))
    second = keeper.call("POST", dialect.path, dialect.body(text))

    assert word_of(second) == "hit"
    assert dialect.read_success(second).content == dialect.read_success(first).content


def test_one_answer_is_given_in_all_dialects(keeper: Server) -> None:
    keeper.write_scenario([THINKING])

    replies = [keeper.call("POST", dialect.path, dialect.body("In all dialects"))
               for dialect in DIALECTS]

    assert list(map(word_of, replies)) == ["miss", "hit", "hit", "hit"]
    texts = [dialect.read_success(reply).text for dialect, reply in zip(DIALECTS, replies)]
    assert texts == [LONG] * 4


@both_ways
def test_thinking_comes_again_with_its_signature(keeper: Server, stream: bool) -> None:
    keeper.write_scenario([THINKING])
    body = MESSAGES.body(f"Thought over, {stream}", stream=stream)

    replies = [keeper.call("POST", MESSAGES.path, body) for _ in range(2)]

    answer = MESSAGES.read_success(replies[1])
    assert word_of(replies[1]) == "hit"
    assert (answer.thinking, answer.signature) == (THOUGHT, "c2lnbmVk")


@both_ways
def test_all_of_several_answers_come_again_each_in_its_place(
    keeper: Server, stream: bool
) -> None:
    keeper.write_scenario([[{"say": f"Answer {n}."}] for n in range(3)], shared=True)
    body = CHAT.body(f"Three of them, {stream}", n=3, stream=stream)

    first, second = (keeper.call("POST", CHAT_PATH, body) for _ in range(2))

    assert word_of(second) == "hit"
    assert CHAT.read_success(second).content == CHAT.read_success(first).content
    assert sorted(CHAT.read_success(second).texts) == ["Answer 0.", "Answer 1.", "Answer 2."]


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
    replies = [keeper.call("POST", dialect.path, dialect.body("Ids of its own"))
               for dialect in DIALECTS for _ in range(2)]

    ids = [reply.json()["id"] for reply in replies]
    assert len(set(ids)) == len(ids)
    assert len({reply.headers["X-Request-Id"] for reply in replies}) == len(ids)


def test_a_hit_tells_the_model_in_the_words_of_its_own_request(keeper: Server) -> None:
    first = ask(keeper, "By another name", model="sonnet")

    second = ask(keeper, "By another name", model="claude-sonnet-5-5")

    assert word_of(second) == "hit"
    assert (first.json()["model"], second.json()["model"]) == ("claude-sonnet-5-5",) * 2


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
    assert RESPONSES.read_success(reply).text == "You said: And more"
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
    bad = ask(keeper, text, stream=stream, model=UNLISTED_MODEL)
    keeper.write_scenario([[{"say": "Good."}]])

    replies = [ask(keeper, text, model=UNLISTED_MODEL) for _ in range(2)]

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
    with RawConnection(keeper.port) as wire:
        wire.send(post(encoded(question("Abandoned", stream=True))))
        eventually(lambda: keeper.queries()[asked:])
    assert eventually(lambda: at_rest(keeper))
    keeper.write_scenario([[{"say": "Good."}]])

    reply = ask(keeper, "Abandoned")

    assert word_of(reply) == "miss"
    assert reply.json()["choices"][0]["message"]["content"] == "Good."


def test_an_answer_whose_reader_left_when_it_was_complete_is_kept(keeper: Server) -> None:
    keeper.write_scenario([[{"say": LONG * 500, "chunks": 1}]])
    kept = stats_of(keeper)["entries"]
    with RawConnection(keeper.port) as wire:
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
    words(own_keeper, "c", 2, ocp_session_id="s")

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
        "model": "claude-sonnet-5-5", "dialect": "chat", "stream": 1, "stop_reason": "end_turn",
        "prompt_chars": 5, "response_chars": 6, "request_id": reply.headers["X-Request-Id"]}


def test_a_hit_is_one_line_in_the_log(keeper: Server) -> None:
    reply = [ask(keeper, "A line") for _ in range(2)][1]

    lines = [e for e in keeper.log_entries()
             if e.get("request_id") == reply.headers["X-Request-Id"]]

    assert [(e["event"], e["path"], e["outcome"], e["model"]) for e in lines] == [
        ("answer_reused", "cached", "ok", "claude-sonnet-5-5")]


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
