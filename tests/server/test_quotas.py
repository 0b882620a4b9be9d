"""Quotas over HTTP: what counts, what is refused, and that nobody gets more."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chat import CHAT_PATH, HANG, content_of, encoded, error_of, question
from http_client import Reply
from keys import ADMIN_KEY, ANONYMOUS_KEY, MULTI, as_admin, ask_as, bearer, new_key
from project import load_script
from raw_http import RawConnection, post
from server import Server, asked_process, at_rest, running_server
from time_zones import ZONES, zone
from waiting import eventually, in_parallel

ocp = load_script("ocp_server.py")

Json = Any

PERIODS = ("daily", "weekly", "monthly")


# ---------------------------------------------------------------------------
# Over HTTP
# ---------------------------------------------------------------------------

#: What the fake claude says that an answer took.
TOKENS_EACH = 25
#: What Sonnet 5.5 would have cost: 10 tokens read, 7 written, 5 out of the cache, 3 into it.
USD_EACH = (10 * 2 + 7 * 10 + 5 * 0.1 + 3 * 4) / 1e6
NEW_YORK = {"TZ": ZONES["America/New_York"]}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of mode multi in New York; every test makes keys of its own."""
    env = {**MULTI, **NEW_YORK, "PROXY_ANONYMOUS_KEY": ANONYMOUS_KEY,
           "CLAUDE_MAX_QUEUE": "100", "CLAUDE_MAX_CONCURRENT": "4"}
    with running_server(tmp_path_factory.mktemp("house"), env=env) as server:
        yield server


@pytest.fixture(autouse=True)
def default_answers(request: pytest.FixtureRequest) -> None:
    """Every test over HTTP begins with a claude that repeats what it hears."""
    if "house" in request.fixturenames:
        request.getfixturevalue("house").write_scenario([])


def quota_of(server: Server, made: dict[str, Json]) -> Json:
    reply = as_admin(server, "GET", f"/api/keys/{made['id']}/quota")
    assert reply.status == 200, reply
    return reply.json()["quota"]


def used_of(server: Server, made: dict[str, Json]) -> tuple[int, int]:
    """Requests and tokens of today."""
    found = quota_of(server, made)
    return found["daily"]["used"], found["tokensDaily"]["used"]


def set_quota(server: Server, id_or_name: object, **limits: Json) -> Reply:
    return as_admin(server, "PATCH", f"/api/keys/{id_or_name}/quota", limits)


def requests_for(text: str) -> dict[str, dict[str, Json]]:
    """The same question in each dialect, by its path."""
    messages = question(text)["messages"]
    return {
        CHAT_PATH: {"messages": messages},
        "/v1/messages": {"messages": messages, "max_tokens": 9},
        "/v1/responses": {"input": text},
        "/v1/completions": {"prompt": text},
    }


def wanted_quota(period: str, **fields: Json) -> dict[str, Json]:
    """The quota of a refusal in New York, without the words for the time to its reset."""
    with zone("America/New_York"):
        resets_at = ocp.iso_time(ocp.period_bounds(period, time.time())[1])
    return {"period": period, "unit": "requests", "limit": 1, "used": 1, "resetsAt": resets_at,
            **fields}


def without_words(quota: dict[str, Json]) -> dict[str, Json]:
    """A quota of a refusal, after a look at its words."""
    ahead_s = ocp.parse_time(quota["resetsAt"]) - time.time()
    words = [ocp.format_span(ahead_s + late_s) for late_s in (0, 1, 5)]
    assert quota["resetsIn"] in words
    return {name: value for name, value in quota.items() if name != "resetsIn"}


@pytest.mark.parametrize("period", PERIODS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_quota_that_is_used_up_is_told_in_chats_shape(
    house: Server, period: str, stream: bool
) -> None:
    made = new_key(house, quota={period: 1})
    content_of(ask_as(house, made["key"]))

    reply = ask_as(house, made["key"], stream=stream)

    error = reply.json()["error"]
    assert reply.status == 429
    assert set(reply.json()) == {"error"}
    assert set(error) == {"message", "type", "code", "param", "quota"}
    assert (error["type"], error["code"], error["param"]) == (
        "quota_exceeded", "insufficient_quota", None)
    assert without_words(error["quota"]) == wanted_quota(period)
    assert error["message"].startswith(f"This key has used 1 of its 1 requests ({period}).")
    ahead_s = ocp.parse_time(error["quota"]["resetsAt"]) - time.time()
    assert abs(int(reply.headers["Retry-After"]) - ahead_s) < 30
    assert reply.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_quota_that_is_used_up_is_told_in_messages_shape(house: Server, stream: bool) -> None:
    made = new_key(house, quota={"tokensWeekly": 0})
    body = {**requests_for("hi")["/v1/messages"], "stream": stream}

    reply = house.call("POST", "/v1/messages", body, bearer(made["key"]))

    told = reply.json()
    assert reply.status == 429
    assert (told["type"], told["error"]["type"]) == ("error", "rate_limit_error")
    assert set(told) == {"type", "error", "request_id"}
    assert without_words(told["error"]["quota"]) == wanted_quota(
        "weekly", unit="tokens", limit=0, used=0)
    assert told["error"]["message"] == (
        "The operator has blocked this key: its limit is 0 tokens (weekly).")
    assert reply.headers["x-should-retry"] == "false"


def test_a_quota_holds_over_all_dialects_and_spares_what_costs_nothing(house: Server) -> None:
    made = new_key(house, quota={"daily": 4})
    headers = bearer(made["key"])
    before = len(house.queries())

    first = [house.call("POST", path, body, headers).status
             for path, body in requests_for("hi").items()]
    second = [house.call("POST", path, body, headers).status
              for path, body in requests_for("ho").items()]
    counting = house.call("POST", "/v1/messages/count_tokens", question(), headers)
    listing = house.call("GET", "/v1/models", None, headers)

    assert (first, second) == ([200] * 4, [429] * 4)
    assert [counting.status, listing.status] == [200, 200]
    assert len(house.queries()) - before == 4


@pytest.mark.parametrize("key", [ADMIN_KEY, ANONYMOUS_KEY])
def test_the_operator_and_the_anonymous_have_no_quota(house: Server, key: str) -> None:
    replies = [ask_as(house, key) for _ in range(3)]

    assert [reply.status for reply in replies] == [200] * 3
    names = [each["name"] for each in as_admin(house, "GET", "/api/keys").json()["keys"]]
    assert not {"admin", "anonymous"} & set(names)


def test_each_answer_of_a_request_counts_with_all_its_tokens(house: Server) -> None:
    made = new_key(house)

    ask_as(house, made["key"])
    ask_as(house, made["key"], n=3)
    prompts = {"prompt": ["one", "two"]}
    house.call("POST", "/v1/completions", prompts, bearer(made["key"]))

    assert used_of(house, made) == (6, 6 * TOKENS_EACH)


def test_a_request_for_more_answers_than_are_left_is_refused_whole(house: Server) -> None:
    made = new_key(house, quota={"daily": 4})
    count = len(house.queries())

    statuses = [ask_as(house, made["key"], n=n).status for n in (3, 2, 1, 1)]

    assert statuses == [200, 429, 200, 429]
    assert len(house.queries()) - count == used_of(house, made)[0] == 4


REFUSALS = {
    "overloaded": {"status": 529, "word": "overloaded", "text": "Overloaded"},
    "rate limit": {"status": 429, "word": "rate_limit", "text": "Too many requests"},
    "server error": {"status": 500, "word": "server_error", "text": "Internal server error"},
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_api_refused_does_not_count(house: Server, name: str) -> None:
    made = new_key(house, quota={"daily": 1, "tokensDaily": 10_000})
    house.write_scenario([[{"api_error": REFUSALS[name]}]])

    refused = ask_as(house, made["key"])

    assert refused.status >= 429
    assert used_of(house, made) == (0, 0)
    house.write_scenario([])
    assert ask_as(house, made["key"]).status == 200


def test_what_claude_was_never_asked_does_not_count(house: Server) -> None:
    made = new_key(house, quota={"daily": 1})

    statuses = [ask_as(house, made["key"], **fields).status
                for fields in ({"n": 0}, {"model": "gpt-4"}, {"messages": []})]

    assert statuses == [400, 404, 400]
    assert used_of(house, made) == (0, 0)


#: Answers that come to nothing though claude was asked, and their status.
FAILURES: dict[str, tuple[list[Json], int]] = {
    "no words": ([{"finish": "end_turn"}], 400),
    "a death in the middle": ([{"say": "well"}, {"exit": 1}], 502),
    "a death before it began": ([{"exit": 1}], 502),
    "a request that the API finds wrong": (
        [{"api_error": {"status": 400, "word": "invalid_request", "text": "no"}}], 400),
    "a failure after it began": ([{"say": "well"}, {"api_error": REFUSALS["overloaded"]}], 529),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_counts_once_claude_was_asked(house: Server, name: str, stream: bool) -> None:
    made = new_key(house, quota={"daily": 2})
    steps, status = FAILURES[name]
    house.write_scenario([steps])
    count = len(house.queries())

    replies = [ask_as(house, made["key"], stream=stream) for _ in range(5)]

    assert [reply.status for reply in replies][2:] == [429] * 3
    assert replies[0].status in (status, 200 if stream else status)
    assert len(house.queries()) - count <= 4
    requests, tokens = used_of(house, made)
    assert requests == 2 and tokens > 0


def test_a_prompt_that_the_api_finds_too_long_is_a_request_without_tokens(house: Server) -> None:
    made = new_key(house, quota={"daily": 9, "tokensDaily": 100})
    too_long = {"status": 400, "word": "invalid_request", "text": "Prompt is too long"}
    house.write_scenario([[{"api_error": too_long}]])

    statuses = [ask_as(house, made["key"], "x" * 140, max_tokens=9).status for _ in range(4)]

    assert statuses == [400] * 4
    assert used_of(house, made) == (4, 0)


def test_of_a_prompt_no_more_is_reserved_than_the_model_can_read(house: Server) -> None:
    made = new_key(house, quota={"tokensDaily": 210_000})
    house.write_scenario([])

    # By the estimate the first one has 285,714 tokens.
    replies = [ask_as(house, made["key"], "x" * chars, model="claude-haiku-4-5", max_tokens=9)
               for chars in (1_000_000, 700)]

    assert [reply.status for reply in replies] == [200, 200]


def test_failing_requests_use_up_a_quota_of_tokens_too(house: Server) -> None:
    made = new_key(house, quota={"tokensDaily": 100})
    house.write_scenario([[{"exit": 1}]])
    prompt = "x" * 140

    statuses = [ask_as(house, made["key"], prompt, max_tokens=9).status for _ in range(4)]

    assert statuses == [502, 502, 429, 429]
    assert used_of(house, made) == (2, 80)


def is_over(server: Server, made: dict[str, Json]) -> bool:
    """Whether nothing runs any more, and nothing has a place in the quotas of this key."""
    return at_rest(server) and quota_of(server, made)["daily"]["inFlight"] == 0


def leave(
    server: Server, made: dict[str, Json], steps: list[Json], *, after: bytes = b""
) -> None:
    """A client that asks and leaves, once its answer has come so far."""
    server.write_scenario([steps])
    count = len(server.queries())
    with RawConnection(server.port) as wire:
        wire.send(post(encoded(question(stream=True)), f"Authorization: Bearer {made['key']}"))
        asked_process(server, count + 1)
        if after:
            wire.hear(after)
    assert eventually(lambda: is_over(server, made))


def test_an_answer_that_the_client_left_counts_as_far_as_it_had_come(house: Server) -> None:
    made = new_key(house, quota={"daily": 1})

    leave(house, made, [{"say": "the beginning"}, HANG], after=b"beginning")

    requests, tokens = eventually(lambda: used_of(house, made)[0] and used_of(house, made))
    assert requests == 1 and tokens > 10
    assert ask_as(house, made["key"]).status == 429


def test_a_request_that_the_client_left_before_its_answer_began_counts_with_its_prompt(
    house: Server
) -> None:
    made = new_key(house, quota={"daily": 1})

    leave(house, made, [HANG])

    assert used_of(house, made) == (1, 1)
    assert ask_as(house, made["key"]).status == 429


def test_clients_that_leave_together_ask_no_more_than_their_quota(house: Server) -> None:
    made = new_key(house, quota={"daily": 3})
    house.write_scenario([[HANG]])
    count = len(house.queries())

    def ask_and_leave() -> None:
        with RawConnection(house.port) as wire:
            wire.send(post(encoded(question(stream=True)), f"Authorization: Bearer {made['key']}"))
            time.sleep(0.2)

    for _ in range(3):
        in_parallel([ask_and_leave] * 6)
        assert eventually(lambda: is_over(house, made))

    assert len(house.queries()) - count <= used_of(house, made)[0] <= 3


@pytest.mark.parametrize("quota", [{"daily": 0}, {"tokensDaily": 0}], ids=["requests", "tokens"])
def test_a_key_whose_quota_is_used_up_is_refused_before_its_body_is_read(
    house: Server, quota: dict[str, Json]
) -> None:
    made = new_key(house, quota=quota)

    with RawConnection(house.port) as wire:
        wire.send(f"POST {CHAT_PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30000000\r\n"
                  f"Authorization: Bearer {made['key']}\r\n\r\n".encode())
        refusal = wire.status_line()

    assert refusal.startswith("HTTP/1.1 429")


@pytest.fixture(scope="module")
def caching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that gives answers twice."""
    env = {**MULTI, "CLAUDE_CACHE_TTL": "600000"}
    with running_server(tmp_path_factory.mktemp("caching"), env=env) as server:
        yield server


def test_an_answer_out_of_the_cache_does_not_count(caching: Server) -> None:
    made = new_key(caching, quota={"daily": 2})
    caching.write_scenario([])

    replies = [ask_as(caching, made["key"], "again") for _ in range(5)]

    assert [reply.headers["X-OCP-Cache"] for reply in replies] == ["miss"] + ["hit"] * 4
    assert used_of(caching, made) == (1, TOKENS_EACH)


def test_an_answer_that_was_shared_counts_once(caching: Server, tmp_path: Path) -> None:
    made = new_key(caching, quota={"daily": 4})
    go = tmp_path / "go"
    caching.write_scenario([[{"wait_for": str(go)}, {"say": "for all of you"}]])
    asking: Callable[[], Reply] = lambda: ask_as(caching, made["key"], "together")  # noqa: E731

    def start() -> None:
        eventually(lambda: as_admin(caching, "GET", "/cache/stats").json()["requesters"] == 4)
        go.touch()

    *replies, _ = in_parallel([asking, asking, asking, asking, start])

    words = sorted(str(reply.headers["X-OCP-Cache"]) for reply in replies if reply)
    assert words == ["miss", "shared", "shared", "shared"]
    assert used_of(caching, made) == (1, TOKENS_EACH)
    assert quota_of(caching, made)["daily"]["inFlight"] == 0


# -- the routes ---------------------------------------------------------------

def test_the_quota_of_a_key_is_told_whole(house: Server) -> None:
    made = new_key(house, name="told", quota={"weekly": 5})
    ask_as(house, made["key"])

    told = as_admin(house, "GET", "/api/keys/Told/quota").json()

    assert (told["keyId"], told["name"], set(told)) == (
        made["id"], "told", {"keyId", "name", "quota", "modelQuotaUse"})
    assert list(told["quota"]) == [quota.name for quota in ocp.QUOTAS]
    found = {name: (each["limit"], each["used"], each["inFlight"])
             for name, each in told["quota"].items()}
    tokens, usd = (None, TOKENS_EACH, 0), (None, USD_EACH, 0)
    assert found == {
        "daily": (None, 1, 0), "weekly": (5, 1, 0), "monthly": (None, 1, 0),
        "tokensDaily": tokens, "tokensWeekly": tokens, "tokensMonthly": tokens,
        "usdDaily": usd, "usdWeekly": usd, "usdMonthly": usd}
    for name, each in told["quota"].items():
        period = name.replace("tokens", "").replace("usd", "").lower()
        assert each["resetsAt"] == wanted_quota(period)["resetsAt"]
        assert set(each) == {"limit", "used", "inFlight", "resetsAt", "resetsIn"}


@pytest.mark.parametrize("quota", [{}, {"daily": 9, "tokensDaily": 10**9}], ids=["free", "limited"])
def test_what_runs_is_told_while_it_runs(house: Server, quota: dict[str, Json]) -> None:
    made = new_key(house, quota=quota)
    house.write_scenario([[{"say": "well "}, HANG]])

    with house.stream(CHAT_PATH, question("hi", max_tokens=100), bearer(made["key"])):
        found = quota_of(house, made)

    assert found["daily"]["inFlight"] == found["monthly"]["inFlight"] == 1
    assert found["tokensDaily"]["inFlight"] > 100


def expected_tokens(server: Server, made: dict[str, Json], path: str, **body: Json) -> int:
    """What a request is expected to take while it runs."""
    server.write_scenario([[{"say": "well "}, HANG]])
    with server.stream(path, {"max_tokens": 100, **body}, bearer(made["key"])):
        found = int(quota_of(server, made)["tokensDaily"]["inFlight"])
    assert eventually(lambda: is_over(server, made))
    return found


LONG = "word " * 100


def test_a_request_is_expected_to_take_its_prompt_for_each_of_its_choices(house: Server) -> None:
    made = new_key(house, quota={"tokensDaily": 10**9})
    messages = question(LONG)["messages"]

    one = expected_tokens(house, made, CHAT_PATH, messages=messages)
    three = expected_tokens(house, made, CHAT_PATH, messages=messages, n=3)

    assert one > 200
    assert three == 3 * one


def test_a_request_is_expected_to_take_all_of_its_prompts(house: Server) -> None:
    made = new_key(house, quota={"tokensDaily": 10**9})

    one = expected_tokens(house, made, "/v1/completions", prompt=LONG)
    two = expected_tokens(house, made, "/v1/completions", prompt=["hi", LONG + LONG])

    assert two > 2 * one


def test_limits_are_set_one_by_one_and_taken_away_with_null(house: Server) -> None:
    made = new_key(house, quota={"daily": 1, "weekly": 2})

    told = set_quota(house, made["id"], daily=None, tokensDaily=7)

    assert told.json() == {"ok": True, "idOrName": str(made["id"]),
                           "quota": {"daily": None, "tokensDaily": 7}}
    limits = {name: each["limit"] for name, each in quota_of(house, made).items()}
    assert limits == {"daily": None, "weekly": 2, "monthly": None,
                      "tokensDaily": 7, "tokensWeekly": None, "tokensMonthly": None,
                      "usdDaily": None, "usdWeekly": None, "usdMonthly": None}


def test_a_limit_holds_from_the_next_request_on(house: Server) -> None:
    made = new_key(house)
    asked = [ask_as(house, made["key"]).status]

    for limit in (1, 2, 2, None, 0):
        set_quota(house, made["id"], monthly=limit)
        asked.append(ask_as(house, made["key"]).status)

    assert asked == [200, 429, 200, 429, 200, 429]


@pytest.mark.parametrize("limit", [-1, 1.5, "5", True, [], {}, 10**16, "null"])
@pytest.mark.parametrize("name", ["daily", "tokensMonthly"])
def test_a_limit_that_is_none_is_refused_and_changes_nothing(
    house: Server, name: str, limit: Json
) -> None:
    made = new_key(house, quota={"weekly": 3})

    reply = set_quota(house, made["id"], weekly=9, **{name: limit})

    assert (reply.status, error_of(reply)["param"]) == (400, name)
    assert quota_of(house, made)["weekly"]["limit"] == 3


def test_a_change_of_nothing_is_refused_and_says_what_there_is(house: Server) -> None:
    reply = set_quota(house, new_key(house)["id"])

    assert reply.status == 400
    for quota in ocp.QUOTAS:
        assert re.search(rf"\b{quota.name}\b", error_of(reply)["message"])


def test_what_was_used_is_known_to_the_next_start(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        made = new_key(server, quota={"daily": 2, "tokensDaily": 1000})
        ask_as(server, made["key"])
        server.kill()
    with running_server(tmp_path, env=MULTI) as server:
        used = used_of(server, made)
        statuses = [ask_as(server, made["key"]).status for _ in range(2)]

    assert (used, statuses) == ((1, TOKENS_EACH), [200, 429])


# -- many at once -------------------------------------------------------------

def test_of_many_requests_at_once_as_many_as_the_quota_allows_are_answered(
    house: Server
) -> None:
    made = new_key(house, quota={"daily": 7})

    replies = in_parallel([lambda: ask_as(house, made["key"])] * 24)

    assert sorted(reply.status for reply in replies) == [200] * 7 + [429] * 17
    assert used_of(house, made)[0] == 7


def test_failures_among_many_requests_at_once_cost_nobody_a_place(house: Server) -> None:
    made = new_key(house, quota={"daily": 6})
    overloaded = {"status": 529, "word": "overloaded", "text": "Overloaded"}
    answers = [[{"say": "fine"}], [{"api_error": overloaded}]] * 40
    house.write_scenario(answers, shared=True)

    statuses: list[int] = []
    while statuses.count(200) < 6 and len(statuses) < 60:
        statuses += [reply.status for reply in
                     in_parallel([lambda: ask_as(house, made["key"])] * 10)]
        assert used_of(house, made)[0] == statuses.count(200) <= 6

    assert statuses.count(200) == 6
    assert ask_as(house, made["key"]).status == 429


def test_many_requests_at_once_do_not_take_more_tokens_than_there_are(house: Server) -> None:
    made = new_key(house, quota={"tokensDaily": 8 * TOKENS_EACH})
    prompt = "x" * 100

    def insist() -> int:
        """How often one client was answered that comes again when it is told to."""
        give_up_s = time.monotonic() + 60
        while time.monotonic() < give_up_s:
            reply = ask_as(house, made["key"], prompt, max_tokens=9)
            if reply.status == 200 or error_of_any(reply)["type"] == "quota_exceeded":
                return int(reply.status == 200)
            assert error_of_any(reply)["code"] == "rate_limit_exceeded"
            time.sleep(0.01)
        return 0

    answered = sum(in_parallel([insist] * 12))

    assert 7 <= answered <= 8
    assert used_of(house, made) == (answered, answered * TOKENS_EACH)


def error_of_any(reply: Reply) -> dict[str, Json]:
    """The error in a reply, with what there is beside the usual fields."""
    found: dict[str, Json] = reply.json()["error"]
    return found


def test_a_request_that_may_take_more_tokens_than_are_left_is_refused(house: Server) -> None:
    made = new_key(house, quota={"tokensDaily": 2 * TOKENS_EACH})
    assert ask_as(house, made["key"], max_tokens=9).status == 200

    reply = ask_as(house, made["key"], max_tokens=2 * TOKENS_EACH)

    assert reply.status == 429
    assert used_of(house, made) == (1, TOKENS_EACH)
