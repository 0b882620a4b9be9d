"""What the holder of a key is told of it: /v1/key, and the headers that say what is left."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chat import CHAT_PATH, HANG, both_ways, question
from http_client import Reply
from keys import (
    ADMIN_KEY,
    ANONYMOUS_KEY,
    MULTI,
    SHARED,
    SHARED_KEY,
    as_admin,
    ask_as,
    bearer,
    new_key,
)
from project import load_script
from server import Server, running_server
from time_zones import ZONES

ocp = load_script("ocp_server.py")

Json = Any
#: What the fake claude says that an answer took.
TOKENS_EACH = 25
UTC = {"TZ": ZONES["UTC"]}
#: The paths of the dialects with OpenAI's headers, with a body for each.
OPENAI_BODIES: dict[str, dict[str, Json]] = {
    CHAT_PATH: question("hi"), "/v1/responses": {"input": "hi"},
    "/v1/completions": {"prompt": "hi"},
}
MESSAGES_BODY = {"messages": question("hi")["messages"], "max_tokens": 9}
#: Every field of OpenRouter's key information, and OCP's own.
FIELDS = {
    "label", "limit", "limit_reset", "limit_remaining", "include_byok_in_limit", "usage",
    "usage_daily", "usage_weekly", "usage_monthly", "byok_usage", "byok_usage_daily",
    "byok_usage_weekly", "byok_usage_monthly", "is_free_tier", "is_management_key",
    "is_provisioning_key", "creator_user_id", "expires_at", "rate_limit", "ocp",
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of mode multi; every test makes keys of its own."""
    env = {**MULTI, **UTC, "PROXY_ANONYMOUS_KEY": ANONYMOUS_KEY}
    with running_server(tmp_path_factory.mktemp("house"), env=env) as server:
        yield server


@pytest.fixture(autouse=True)
def default_answers(request: pytest.FixtureRequest) -> None:
    if "house" in request.fixturenames:
        request.getfixturevalue("house").write_scenario([])


def own_key(server: Server, key: str = "", path: str = "/v1/key") -> dict[str, Json]:
    reply = server.call("GET", path, headers=bearer(key))
    assert reply.status == 200, reply
    found: dict[str, Json] = reply.json()["data"]
    return found


# ---------------------------------------------------------------------------
# /v1/key
# ---------------------------------------------------------------------------

def test_a_key_is_told_in_openrouters_shape_with_its_own_quotas(house: Server) -> None:
    made = new_key(house, name="laptop", quota={"daily": 5, "tokensMonthly": 900}, expiry="30d",
                   models=["haiku"], maxConcurrent=2, note="the grey one")
    assert ask_as(house, made["key"], model="haiku").status == 200

    told = own_key(house, made["key"])

    assert set(told) == FIELDS
    assert (told["label"], told["expires_at"]) == ("laptop", made["expiry"])
    assert [told[f"limit{end}"] for end in ("", "_reset", "_remaining")] == [None] * 3
    assert not told["is_management_key"] and not told["is_free_tier"]
    numbers = [told[name] for name in FIELDS if "usage" in name]
    assert all(isinstance(number, float) for number in numbers)
    own = told["ocp"]
    assert (own["name"], own["keyPreview"]) == ("laptop", made["keyPreview"])
    assert (own["models"], own["maxConcurrent"], own["expiry"]) == (["haiku"], 2, made["expiry"])
    assert own["quota"] == as_admin(house, "GET", f"/api/keys/{made['id']}/quota").json()["quota"]
    assert (own["quota"]["daily"]["limit"], own["quota"]["daily"]["used"]) == (5, 1)
    assert (own["softPercent"], own["modelQuotaUse"]) == (None, {})
    assert "grey" not in str(told), "the operator's note is the operator's"


def test_a_budget_in_money_is_the_limit_that_meters_show(house: Server) -> None:
    made = new_key(house, quota={"usdWeekly": 2.5, "usdMonthly": 9, "daily": 1}, softPercent=80,
                   modelQuotas={"haiku": {"daily": 3}})
    reply = ask_as(house, made["key"])
    price = float(reply.headers["X-OCP-List-Price"])

    told = own_key(house, made["key"])

    assert price > 0
    assert (told["limit"], told["limit_reset"]) == (2.5, "weekly")
    assert told["limit_remaining"] == pytest.approx(2.5 - price, abs=1e-9)
    used = [told[f"usage{period}"] for period in ("", "_daily", "_weekly", "_monthly")]
    assert used == pytest.approx([price] * 4, abs=1e-9)
    assert told["ocp"]["softPercent"] == 80
    assert told["ocp"]["modelQuotaUse"]["haiku"]["daily"]["limit"] == 3


@pytest.mark.parametrize("path", ["/key", "/v1/auth/key", "/auth/key", "/v1/v1/key"])
def test_every_path_of_meters_tells_the_same(house: Server, path: str) -> None:
    made = new_key(house)

    assert own_key(house, made["key"], path) == own_key(house, made["key"])


@pytest.mark.parametrize("key, name", [(ADMIN_KEY, "admin"), (ANONYMOUS_KEY, "anonymous")])
def test_a_caller_without_a_key_of_its_own_has_no_limits(
    house: Server, key: str, name: str
) -> None:
    told = own_key(house, key)

    assert set(told) == FIELDS
    assert (told["label"], told["limit"], told["expires_at"]) == (name, None, None)
    assert told["is_management_key"] is (name == "admin")
    assert (told["ocp"]["name"], told["ocp"]["isKey"], told["ocp"]["quota"]) == (name, False, None)


def test_the_shared_key_and_nobodys_are_told_under_their_names(
    tmp_path: Path, shared_server: Server
) -> None:
    with running_server(tmp_path, env=SHARED) as server:
        assert own_key(server, SHARED_KEY)["label"] == "shared"
        assert server.call("GET", "/v1/key").status == 401
    assert own_key(shared_server)["label"] == "local"


def test_a_key_that_has_ended_is_told_why(house: Server) -> None:
    made = new_key(house)
    as_admin(house, "DELETE", f"/api/keys/{made['id']}")

    reply = house.call("GET", "/v1/key", headers=bearer(made["key"]))

    assert (reply.status, reply.json()["error"]["code"]) == (401, "revoked_api_key")


# ---------------------------------------------------------------------------
# Headers
# ---------------------------------------------------------------------------

def limits_in(reply: Any) -> dict[str, str]:
    """The headers of a reply that tell limits."""
    return {name.lower(): value for name, value in reply.headers.items()
            if "ratelimit" in name.lower()}


def sent(server: Server, path: str, body: dict[str, Json], key: str, *, stream: bool) -> Reply:
    return server.call("POST", path, {**body, "stream": stream}, bearer(key))


@both_ways
@pytest.mark.parametrize("path", OPENAI_BODIES)
def test_an_answer_tells_what_is_left_as_openai_does(
    house: Server, path: str, stream: bool
) -> None:
    made = new_key(house, quota={"daily": 3, "monthly": 50, "tokensWeekly": 90_000})

    told = limits_in(sent(house, path, OPENAI_BODIES[path], made["key"], stream=stream))

    left_tokens = int(told.pop("x-ratelimit-remaining-tokens"))
    resets = [told.pop(f"x-ratelimit-reset-{unit}") for unit in ("requests", "tokens")]
    assert told == {
        "x-ratelimit-limit-requests": "3", "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-limit-tokens": "90000"}
    # A stream begins before it is known what the answer takes.
    assert left_tokens == 90_000 - TOKENS_EACH or (stream and 80_000 < left_tokens < 90_000)
    assert all(re.fullmatch(r"(\d+h)?(\d+m)?\d+s", reset) for reset in resets)


@both_ways
def test_an_answer_tells_what_is_left_as_anthropic_does(house: Server, stream: bool) -> None:
    made = new_key(house, quota={"daily": 3, "tokensMonthly": 90_000})

    told = limits_in(sent(house, "/v1/messages", MESSAGES_BODY, made["key"], stream=stream))

    head = "anthropic-ratelimit"
    assert set(told) == {f"{head}-{unit}-{what}" for unit in ("requests", "tokens")
                         for what in ("limit", "remaining", "reset")}
    assert [told[f"{head}-requests-{what}"] for what in ("limit", "remaining")] == ["3", "2"]
    reset = told[f"{head}-requests-reset"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT00:00:00Z", reset)
    assert 0 < ocp.parse_time(reset) - time.time() <= 86_400


@pytest.mark.parametrize("path", [*OPENAI_BODIES, "/v1/messages"])
def test_a_refusal_for_a_quota_tells_it_too(house: Server, path: str) -> None:
    made = new_key(house, quota={"daily": 1, "tokensDaily": 900})
    bodies = {**OPENAI_BODIES, "/v1/messages": MESSAGES_BODY}
    assert sent(house, path, bodies[path], made["key"], stream=False).status == 200

    refused = sent(house, path, bodies[path], made["key"], stream=True)

    told = limits_in(refused)
    names = {"/v1/messages": "anthropic-ratelimit-{}-remaining"}
    name = names.get(path, "x-ratelimit-remaining-{}")
    assert refused.status == 429
    assert told[name.format("requests")] == "0"
    assert told[name.format("tokens")] == str(900 - TOKENS_EACH)


@both_ways
def test_the_limits_of_the_model_are_told_where_they_leave_less(
    house: Server, stream: bool
) -> None:
    made = new_key(house, quota={"daily": 9}, modelQuotas={"haiku": {"daily": 1}})

    def left(model: str) -> list[str]:
        reply = ask_as(house, made["key"], model=model, stream=stream)
        return [limits_in(reply)[f"x-ratelimit-{what}-requests"] for what in ("limit", "remaining")]

    assert left("sonnet") == ["9", "8"]
    assert left("haiku") == ["1", "0"]
    # This one is refused.
    assert left("haiku") == ["1", "0"]
    assert left("sonnet") == ["9", "6"]


def test_requests_that_run_are_not_left(house: Server) -> None:
    house.write_scenario([[{"say": "To begin with, "}, HANG]])
    made = new_key(house, quota={"daily": 5})
    with house.stream(CHAT_PATH, question(), bearer(made["key"])) as first, \
            house.stream(CHAT_PATH, question(), bearer(made["key"])) as second:
        left = [limits_in(each)["x-ratelimit-remaining-requests"] for each in (first, second)]
    assert left == ["4", "3"]


def test_only_units_with_a_quota_are_told_and_without_one_nothing_is(house: Server) -> None:
    tokens_only = new_key(house, quota={"tokensDaily": 9_000})
    free = new_key(house)

    told = limits_in(ask_as(house, tokens_only["key"]))

    assert set(told) == {f"x-ratelimit-{what}-tokens" for what in ("limit", "remaining", "reset")}
    for key in (free["key"], ADMIN_KEY, ANONYMOUS_KEY):
        assert limits_in(ask_as(house, key)) == {}


def test_a_quota_that_was_set_a_moment_ago_is_told(house: Server) -> None:
    made = new_key(house)
    ask_as(house, made["key"])
    as_admin(house, "PATCH", f"/api/keys/{made['id']}/quota", {"daily": 7})

    told = limits_in(ask_as(house, made["key"]))

    assert told["x-ratelimit-remaining-requests"] == "5"
