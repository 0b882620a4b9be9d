"""Money over HTTP: the list price of answers, budgets in it, limits for single models, and the
level from which on a key is warned."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from chat import CHAT_PATH, NO_IDLE, ask, question
from dialects import DIALECTS, Dialect, dialect_name
from keys import MULTI, as_admin, ask_as, bearer, new_key
from project import load_script
from server import Server, running_server
from waiting import in_parallel

ocp = load_script("ocp_server.py")

Json = Any

OPUS, SONNET = "claude-opus-5-5", "claude-sonnet-5-5"
SPENT = {"input_tokens": 1_000, "output_tokens": 2_000, "cache_read_input_tokens": 5_000,
         "cache_creation_input_tokens": 300,
         "cache_creation": {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 200}}
ANSWER = [[{"say": "Hello.", "usage": SPENT}]]
#: What SPENT costs on Sonnet 5.5: 2 USD for a million tokens read, 10 written, 0.10 out of the
#: cache, 2.50 into it for 5 minutes, 4 for an hour.
PRICE = 0.002 + 0.02 + 0.0005 + 0.00025 + 0.0008
PRICE_TEXT = "0.02355"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of mode multi, whose claude spends the same on each answer."""
    env = {**MULTI, "CLAUDE_MAX_QUEUE": "100", "CLAUDE_MAX_CONCURRENT": "4"}
    with running_server(tmp_path_factory.mktemp("house"), env=env) as server:
        yield server


@pytest.fixture(autouse=True)
def same_answers(house: Server) -> None:
    house.write_scenario(ANSWER)


def shown(server: Server, made: Json) -> Json:
    return as_admin(server, "GET", f"/api/keys/{made['id']}").json()


def usage_of(server: Server, made: Json) -> Json:
    return server.call("GET", "/api/usage", headers=bearer(made["key"])).json()


def told(reply: Any) -> Json:
    """The error in a reply, in the shape of any dialect."""
    return reply.json()["error"]


# -- list prices --------------------------------------------------------------

@pytest.mark.parametrize("dialect", DIALECTS, ids=dialect_name)
def test_a_whole_answer_tells_its_list_price_and_its_row_has_it(
    house: Server, dialect: Dialect
) -> None:
    made = new_key(house)
    body = dialect.body("What is it?", model="sonnet")

    reply = house.call("POST", dialect.path, body, bearer(made["key"]))

    assert reply.headers["X-OCP-List-Price"] == PRICE_TEXT
    (row,) = usage_of(house, made)["recent"]
    assert row["list_price_usd"] == float(PRICE_TEXT)
    assert (row["cache_write_tokens"], row["cache_write_1h_tokens"]) == (300, 200)


def test_a_stream_has_begun_before_its_price_is_known(house: Server) -> None:
    made = new_key(house)
    with house.stream(CHAT_PATH, question("hi"), bearer(made["key"])) as stream:
        list(stream)
        assert "X-OCP-List-Price" not in stream.headers

    assert usage_of(house, made)["totals"]["list_price_usd"] == float(PRICE_TEXT)


def test_every_sum_has_the_price_of_its_rows(house: Server) -> None:
    made = new_key(house, name="sums")
    ask_as(house, made["key"], model="sonnet")
    ask_as(house, made["key"], model="opus")
    ask_as(house, made["key"], model="sonnet", n=2)

    found = usage_of(house, made)

    opus = round(2 * PRICE, 9)
    assert found["totals"]["list_price_usd"] == round(3 * PRICE + opus, 9)
    assert {row["model"]: row["list_price_usd"] for row in found["byModel"]} == {
        OPUS: opus, SONNET: round(3 * PRICE, 9)}
    for part in ("byKey", "byPath", "daily", "timeline", "series"):
        total = sum(row["list_price_usd"] for row in found[part])
        assert total == pytest.approx(found["totals"]["list_price_usd"])
        assert sum(row["cache_write_1h_tokens"] for row in found[part]) == 800
    assert [row["list_price_usd"] for row in found["recent"]] == [
        round(2 * PRICE, 9), opus, float(PRICE_TEXT)]


def test_an_answer_that_is_given_again_costs_nothing(tmp_path: Any) -> None:
    with running_server(tmp_path, env={**NO_IDLE, "CLAUDE_CACHE_TTL": "3600000"}) as server:
        server.write_scenario(ANSWER)
        replies = [ask(server, "Same", model="sonnet") for _ in range(2)]
        prices = [reply.headers["X-OCP-List-Price"] for reply in replies]
        found = server.call("GET", "/api/usage").json()

    assert [reply.headers["X-OCP-Cache"] for reply in replies] == ["miss", "hit"]
    assert prices == [PRICE_TEXT, "0"]
    assert found["totals"]["list_price_usd"] == float(PRICE_TEXT)
    assert {row["path"]: row["list_price_usd"] for row in found["recent"]}["cached"] == 0


def test_usage_since_the_start_has_the_price_of_each_model(house: Server) -> None:
    ask_as(house, new_key(house)["key"], model="haiku")

    models = as_admin(house, "GET", "/usage").json()["models"]

    # Haiku 5.5: 0.10 USD read, 0.50 written, 0.01 cached, 0.125 and 0.20 into the cache.
    price = (1_000 * 0.1 + 2_000 * 0.5 + 5_000 * 0.01 + 100 * 0.125 + 200 * 0.2) / 1e6
    assert models["claude-haiku-5-5"]["listPriceUsd"] == pytest.approx(price)


# -- budgets ------------------------------------------------------------------

@pytest.mark.parametrize("dialect", DIALECTS, ids=dialect_name)
def test_a_key_whose_budget_is_used_up_is_refused(house: Server, dialect: Dialect) -> None:
    made = new_key(house, quota={"usdDaily": 0.03})
    assert [ask_as(house, made["key"]).status for _ in range(2)] == [200, 200]

    reply = house.call("POST", dialect.path, dialect.body("Once more?"), bearer(made["key"]))

    assert reply.status == 429
    message = told(reply)["message"]
    assert message.startswith("This key has used 0.0471 of its 0.03 USD at list price (daily).")
    assert reply.headers["x-should-retry"] == "false"


def test_a_request_is_refused_that_may_take_more_than_the_budget(house: Server) -> None:
    made = new_key(house, quota={"usdMonthly": 0.05})

    reply = ask_as(house, made["key"], max_tokens=20_000)

    assert reply.status == 429 and "reduce max_tokens" in told(reply)["message"]
    assert told(reply)["quota"]["unit"] == "usd"
    assert told(reply)["quota"]["limit"] == 0.05
    assert ask_as(house, made["key"], max_tokens=4_000).status == 200


@pytest.mark.parametrize("fields", [{}, {"modelQuotas": True}], ids=["of the key", "of a model"])
def test_many_at_once_stay_within_a_budget(house: Server, fields: Json) -> None:
    # Each takes 0.02355 USD, and may take 0.03 and a little for its prompt.
    limit = {"usdDaily": 0.2}
    made = new_key(house, **({"modelQuotas": {"sonnet": limit}} if fields else {"quota": limit}))

    replies = in_parallel([
        lambda: ask_as(house, made["key"], max_tokens=3_000, model="sonnet")] * 30)

    good = sum(reply.status == 200 for reply in replies)
    assert 0 < good * PRICE <= 0.2
    assert {reply.status for reply in replies} <= {200, 429}
    assert usage_of(house, made)["totals"]["list_price_usd"] == pytest.approx(good * PRICE)


@pytest.mark.parametrize("limit", [-0.01, "2.5", True, [], {}, 1_000_001, 0.0000001, 1.2345678])
@pytest.mark.parametrize("name", ["usdDaily", "usdWeekly", "usdMonthly"])
def test_a_budget_that_is_none_is_refused_and_changes_nothing(
    house: Server, name: str, limit: Json
) -> None:
    made = new_key(house, quota={name: 3})

    reply = as_admin(house, "PATCH", f"/api/keys/{made['id']}/quota", {name: limit})

    assert (reply.status, told(reply)["param"]) == (400, name)
    assert shown(house, made)["quota"][name]["limit"] == 3


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999", "-1e999"])
def test_a_budget_that_is_no_number_is_refused(house: Server, text: str) -> None:
    made = new_key(house)
    body = f'{{"usdDaily": {text}}}'.encode()

    assert as_admin(house, "PATCH", f"/api/keys/{made['id']}/quota", body).status == 400


# -- single models ------------------------------------------------------------

def test_a_limit_for_a_model_is_kept_by_its_name_and_told_with_its_use(house: Server) -> None:
    limits = {"opus": {"daily": 2, "usdWeekly": 1.5, "weekly": None}, "claude-3-5-haiku": {}}
    made = new_key(house, modelQuotas={**limits, "Claude-Sonnet-5.5": {"tokensDaily": 10**6}})
    ask_as(house, made["key"], model="opus")

    kept = {"opus": {"daily": 2, "usdWeekly": 1.5}, SONNET: {"tokensDaily": 10**6}}
    found = shown(house, made)
    assert found["modelQuotas"] == kept
    opus = found["modelQuotaUse"]["opus"]
    assert (opus["daily"]["used"], opus["usdWeekly"]["limit"]) == (1, 1.5)
    assert opus["usdWeekly"]["used"] == pytest.approx(2 * PRICE)
    assert found["modelQuotaUse"][SONNET]["tokensDaily"]["used"] == 0
    quota = as_admin(house, "GET", f"/api/keys/{made['id']}/quota").json()
    assert quota["modelQuotaUse"] == found["modelQuotaUse"]


def test_a_limit_for_a_model_holds_by_any_name_of_it_and_for_no_other(house: Server) -> None:
    made = new_key(house, modelQuotas={"opus": {"daily": 1}})
    statuses = [ask_as(house, made["key"], model=name).status
                for name in ("opus", "claude-opus-5-5", "best", "sonnet", "anthropic/opus")]

    assert statuses == [200, 429, 429, 200, 429]
    reply = ask_as(house, made["key"], model="opus")
    assert told(reply)["quota"]["model"] == OPUS
    assert f"1 of its 1 requests (daily, {OPUS})" in told(reply)["message"]


def test_limits_for_models_are_replaced_together(house: Server) -> None:
    made = new_key(house, modelQuotas={"opus": {"daily": 1}})
    path = f"/api/keys/{made['id']}"

    as_admin(house, "PATCH", path, {"modelQuotas": {"haiku": {"daily": 5}}})
    assert shown(house, made)["modelQuotas"] == {"haiku": {"daily": 5}}
    as_admin(house, "PATCH", path, {"note": "unchanged"})
    assert shown(house, made)["modelQuotas"] == {"haiku": {"daily": 5}}
    as_admin(house, "PATCH", path, {"modelQuotas": None})
    assert shown(house, made)["modelQuotas"] == {}


@pytest.mark.parametrize(("value", "param"), [
    ({"gpt-4": {"daily": 1}}, "modelQuotas.gpt-4"), ({"opus": 5}, "modelQuotas.opus"),
    ({"opus": {"hourly": 5}}, "modelQuotas.opus.hourly"),
    ({"opus": {"usdDaily": -1}}, "modelQuotas.opus.usdDaily"),
    ({"opus": {"daily": 1.5}}, "modelQuotas.opus.daily"),
    ({"opus": {"daily": 1}, "OPUS": {"daily": 2}}, "modelQuotas.OPUS"), ([], "modelQuotas"),
    ({f"claude-opus-{n}": {"daily": 1} for n in range(60)}, "modelQuotas.claude-opus-50"),
], ids=[*"abcdefgh"])
def test_a_wrong_limit_for_a_model_is_named(house: Server, value: Json, param: str) -> None:
    made = new_key(house)

    replies = [as_admin(house, "POST", "/api/keys", {"modelQuotas": value}),
               as_admin(house, "PATCH", f"/api/keys/{made['id']}", {"modelQuotas": value})]

    assert [(reply.status, told(reply)["param"]) for reply in replies] == [(400, param)] * 2


def test_limits_for_models_survive_a_restart(tmp_path: Any) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        made = new_key(server, softPercent=70, modelQuotas={"opus": {"usdDaily": 2.5}})
    with running_server(tmp_path, env=MULTI) as server:
        found = shown(server, made)

    assert (found["softPercent"], found["modelQuotas"]) == (70, {"opus": {"usdDaily": 2.5}})


# -- the warning level --------------------------------------------------------

def test_a_key_over_its_warning_level_is_told_and_served(house: Server) -> None:
    made = new_key(house, name="warned", softPercent=50, quota={"daily": 4, "usdDaily": 100},
                   modelQuotas={"opus": {"daily": 2}})
    warnings = [ask_as(house, made["key"], model="opus").headers.get("X-OCP-Quota-Warning")
                for _ in range(2)]
    warnings.append(ask_as(house, made["key"], model="haiku").headers.get("X-OCP-Quota-Warning"))
    with house.stream(CHAT_PATH, question("hi"), bearer(made["key"])) as stream:
        warnings.append(stream.headers["X-OCP-Quota-Warning"])

    assert warnings == [None, f"{OPUS} daily 50%", "daily 50%", "daily 75%"]
    found = shown(house, made)
    assert found["quota"]["daily"]["soft"] is True
    assert found["modelQuotaUse"]["opus"]["daily"]["soft"] is True
    assert "soft" not in found["quota"]["usdDaily"]


def test_the_log_has_each_level_once(house: Server) -> None:
    made = new_key(house, name="logged", softPercent=50, quota={"daily": 2, "weekly": 4})
    for _ in range(4):
        ask_as(house, made["key"])

    entries = as_admin(house, "GET", "/logs?n=200&key=logged").json()["entries"]
    levels = [(entry["quota"], entry["passed"], entry["used"]) for entry in entries
              if entry["event"] == "quota_level_passed"]
    assert levels == [("daily", "soft", 1), ("daily", "limit", 2), ("weekly", "soft", 2)]


def test_a_key_without_a_warning_level_is_not_warned(house: Server) -> None:
    made = new_key(house, quota={"daily": 5})
    replies = [ask_as(house, made["key"]) for _ in range(5)]

    assert not any("X-OCP-Quota-Warning" in reply.headers for reply in replies)
    assert shown(house, made)["softPercent"] is None
