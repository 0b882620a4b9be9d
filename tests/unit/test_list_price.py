"""What the API's list price of an answer is: hand-made tables for each model, and exact sums."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import pytest

from project import load_script

ocp = load_script("ocp_server.py")

MODELS = ocp.Models(ocp.BUILTIN_MODELS)
MILLION = 1_000_000

#: USD for a million tokens: read, written, out of the cache, into it for 5 minutes, for an hour;
#: and in nano-dollars what 1,234 tokens read, 567 written, 8,900 out of the cache, 400 into it for
#: 5 minutes and 3,000 for an hour are together.
PRICES: dict[str, tuple[str, str, str, str, str, int]] = {
    "claude-opus-5-5": ("4", "20", "0.2", "5", "8", 44_056_000),
    "claude-sonnet-5-5": ("2", "10", "0.1", "2.5", "4", 22_028_000),
    "claude-fable-5-2": ("8", "40", "0.2", "10", "16", 86_332_000),
    "claude-haiku-5-5": ("0.1", "0.5", "0.01", "0.125", "0.2", 1_145_900),
    "claude-fable-5-1": ("10", "50", "0.25", "12.5", "20", 107_915_000),
    "claude-opus-5": ("5", "25", "0.5", "6.25", "10", 57_295_000),
    "claude-sonnet-5": ("2", "10", "0.2", "2.5", "4", 22_918_000),
    "claude-fable-5": ("10", "50", "1", "12.5", "20", 114_590_000),
    "claude-opus-4-8": ("5", "25", "0.5", "6.25", "10", 57_295_000),
    "claude-opus-4-7": ("5", "25", "0.5", "6.25", "10", 57_295_000),
    "claude-sonnet-4-6": ("3", "15", "0.3", "3.75", "6", 34_377_000),
    "claude-opus-4-6": ("5", "25", "0.5", "6.25", "10", 57_295_000),
    "claude-haiku-4-5-20251001": ("1", "5", "0.1", "1.25", "2", 11_459_000),
    "claude-opus-4-5-20251101": ("5", "25", "0.5", "6.25", "10", 57_295_000),
}
EVERY_MODEL = pytest.mark.parametrize("model_id", PRICES)


def split(short: int, hour: int) -> dict[str, Any]:
    """How the API says what it wrote to its cache."""
    return {"cache_creation": {
        "ephemeral_5m_input_tokens": short, "ephemeral_1h_input_tokens": hour}}


def price(model_id: str, usage: Any, lifetime: str = "") -> int:
    return int(ocp.list_price(MODELS.find(model_id), usage, lifetime))


def usd(text: str, tokens: int = MILLION) -> int:
    """So much for a million tokens, as nano-dollars for so many of them."""
    amount = Fraction(text) * tokens * 1000
    assert amount.denominator == 1
    return int(amount)


def test_the_table_has_every_model() -> None:
    assert list(PRICES) == [model.id for model in MODELS.all()]


@EVERY_MODEL
def test_a_message_costs_what_the_table_says(model_id: str) -> None:
    usage = ocp.Usage(1_234, 567, 8_900, 3_400, more=split(400, 3_000))

    assert price(model_id, usage) == PRICES[model_id][-1]


@EVERY_MODEL
def test_each_kind_of_token_has_its_price(model_id: str) -> None:
    read, written, cached, short, hour, _ = PRICES[model_id]
    # No prompt is so long that it costs more.
    part = 10_000

    assert price(model_id, ocp.Usage(input_tokens=part)) == usd(read, part)
    assert price(model_id, ocp.Usage(output_tokens=part)) == usd(written, part)
    assert price(model_id, ocp.Usage(cache_read_tokens=part)) == usd(cached, part)
    for more, wanted in ((split(part, 0), short), (split(0, part), hour)):
        usage = ocp.Usage(cache_write_tokens=part, more=more)
        assert price(model_id, usage) == usd(wanted, part)


@EVERY_MODEL
def test_only_haiku_5_5_has_a_second_price_for_long_prompts(model_id: str) -> None:
    longest, longer = ocp.Usage(input_tokens=100_000), ocp.Usage(input_tokens=100_001)
    factor = 5 if model_id == "claude-haiku-5-5" else 1

    assert price(model_id, longest) == usd(PRICES[model_id][0], 100_000)
    assert price(model_id, longer) == factor * usd(PRICES[model_id][0], 100_001)


def test_a_long_prompt_of_haiku_5_5_makes_every_token_dearer() -> None:
    usage = ocp.Usage(10, 20, 90_000, 9_991, more=split(1, 9_990))

    # In USD for a million: 0.50 read, 2.50 written, 0.05 cached, 0.625 and 1 into the cache.
    assert price("claude-haiku-5-5", usage) == (
        10 * 500 + 20 * 2_500 + 90_000 * 50 + 1 * 625 + 9_990 * 1_000)


def test_rounds_of_one_message_are_long_or_short_each_by_itself() -> None:
    found = {
        "input_tokens": 150_000, "output_tokens": 30, "cache_read_input_tokens": 40_000,
        "cache_creation_input_tokens": 10, **split(0, 10),
        "iterations": [
            {"type": "message", "input_tokens": 90_000, "output_tokens": 10,
             "cache_creation_input_tokens": 10},
            {"type": "message", "input_tokens": 60_000, "output_tokens": 20,
             "cache_read_input_tokens": 40_001 - 1},
        ],
    }

    whole = price("claude-haiku-5-5", ocp.usage_of(found))

    assert whole == 150_000 * 100 + 30 * 500 + 40_000 * 10 + 10 * 200
    # Rounds that are not the whole are no proof that each was short.
    found["output_tokens"] = 31
    assert price("claude-haiku-5-5", ocp.usage_of(found)) == 5 * (whole + 500)


@pytest.mark.parametrize("found", [
    None, "many", [], [None], [{"type": "message"}], [{"type": "compaction", "input_tokens": 5}],
    [{"type": "message", "input_tokens": "5"}],
], ids=str)
def test_rounds_that_say_nothing_change_nothing(found: Any) -> None:
    usage = ocp.usage_of({"input_tokens": 7, "iterations": found})

    assert price("claude-opus-5-5", usage) == 7 * 4_000


@pytest.mark.parametrize(("lifetime", "hour"), [("", True), ("1h", True), ("5m", False)])
@pytest.mark.parametrize("more", [{}, split(0, 0), {"cache_creation": {"other": 5}}], ids=str)
def test_without_a_word_of_the_api_the_request_decides_how_long_the_cache_keeps_it(
    lifetime: str, hour: bool, more: dict[str, Any]
) -> None:
    usage = ocp.Usage(cache_write_tokens=100, more=more)

    assert usage.cache_write_1h_tokens(lifetime) == (100 if hour else 0)
    assert price("claude-opus-5-5", usage, lifetime) == 100 * (8_000 if hour else 5_000)


@pytest.mark.parametrize(("more", "hour"), [
    (split(40, 60), 60), (split(0, 100), 100), (split(100, 0), 0), (split(0, 999), 100),
    ({"cache_creation": {"ephemeral_5m_input_tokens": 100}}, 0),
    ({"cache_creation": {"ephemeral_1h_input_tokens": "100"}}, 0),
], ids=str)
@pytest.mark.parametrize("lifetime", ["", "5m"])
def test_the_api_s_word_counts_more_than_what_was_asked(
    more: dict[str, Any], hour: int, lifetime: str
) -> None:
    usage = ocp.Usage(cache_write_tokens=100, more=more)

    assert usage.cache_write_1h_tokens(lifetime) == hour


@pytest.mark.parametrize("model_id", ["claude-opus-5-5", "claude-opus-5", "claude-fable-5-2"])
def test_fast_mode_costs_twice_as_much_but_for_searches(model_id: str) -> None:
    usage = ocp.Usage(1_234, 567, 8_900, 3_400, more=split(400, 3_000), web_search_requests=3)
    fast = usage._replace(more={**usage.more, "speed": "fast"})

    searches = 3 * 10_000_000
    assert price(model_id, usage) == PRICES[model_id][-1] + searches
    assert price(model_id, fast) == 2 * PRICES[model_id][-1] + searches
    slow = usage._replace(more={**usage.more, "speed": "standard"})
    assert price(model_id, slow) == price(model_id, usage)


def test_a_thousand_searches_cost_ten_dollars() -> None:
    assert price("haiku", ocp.Usage(web_search_requests=1_000)) == 10 * 10**9


@pytest.mark.parametrize(("name", "like"), [
    ("claude-opus-9", "claude-opus-5-5"), ("claude-haiku-5-6", "claude-haiku-5-5"),
    ("claude-opus-4-1-20250805", "claude-opus-4-5-20251101"),
])
def test_a_model_without_a_price_has_that_of_the_one_it_is_taken_for(name: str, like: str) -> None:
    usage = ocp.Usage(200_000, 567, 8_900, 3_400)

    assert price(name, usage) == price(like, usage) > 0


@pytest.mark.parametrize(("amount", "text"), [
    (0, "0"), (1, "0.000000001"), (1_234_000, "0.001234"), (10**9, "1"), (2_500_000_000, "2.5"),
    (10 * 10**9, "10"), (1_000_000_000_100, "1000.0000001"),
])
def test_an_amount_is_written_with_all_its_decimals(amount: int, text: str) -> None:
    assert ocp.usd_text(amount) == text


def test_every_amount_survives_the_database(store: Any) -> None:
    dice = random.Random(11)
    ledger = ocp.Ledger(store)
    amounts = [dice.randrange(10 ** dice.randint(1, 12)) for _ in range(2_000)]
    for amount in amounts:
        row = row_of(amount / 1e9)
        assert row.amounts.usd == amount
        ledger.record(row, ocp.Reservation(None))

    totals = ledger.report(0, 2, 1, None)["totals"]
    assert totals["list_price_usd"] == sum(amounts) / 1e9


def row_of(usd_: float, **fields: Any) -> Any:
    return ocp.UsageRow(
        at_s=1.0, request_id="req_1", key_id=None, caller="local", model="claude-opus-5-5",
        dialect="chat", outcome="ok", status=200, counted=1, stop_reason="end_turn", stream=False,
        warm=True, path="fresh", prompt_chars=2, response_chars=3,
        **{"input_tokens": 0, "output_tokens": 0, "cache_read_tokens": 0, "cache_write_tokens": 0,
           **fields},
        first_token_ms=4, total_ms=5, list_price_usd=usd_)


# -- rows of an older version -------------------------------------------------

#: The version whose rows have no price.
BEFORE_PRICES = next(
    number for number, statement in enumerate(ocp.MIGRATIONS) if "list_price_usd" in statement)


def migrated(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, rows: list[Any]) -> list[Any]:
    """What becomes of rows of an older version: their prices and hour-long cache writes."""
    path = str(tmp_path / "ocp.db")
    with monkeypatch.context() as older:
        older.setattr(ocp, "MIGRATIONS", ocp.MIGRATIONS[:BEFORE_PRICES])
        # A Store reads the table of keys, whose columns that version has.
        store = ocp.Store(path)
        columns = {column["name"] for column in store.rows("PRAGMA table_info(usage)")}
        names = [name for name in ocp.UsageRow._fields if name in columns]
        with store.transaction() as connection:
            marks = ", ".join("?" * len(names))
            connection.executemany(
                f"INSERT INTO usage ({', '.join(names)}) VALUES ({marks})",
                [[getattr(row, name) for name in names] for row in rows])
        store.close()
    store = ocp.Store(path)
    found = [tuple(row) for row in store.rows(
        "SELECT list_price_usd, cache_write_1h_tokens FROM usage ORDER BY id")]
    store.close()
    return found


def test_old_rows_get_their_price_with_an_hour_in_the_cache(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = [(1_234, 567, 8_900, 3_400), (90_000, 5, 10_000, 1), (0, 0, 0, 0)]
    rows, wanted = [], []
    for model_id in PRICES:
        for each in counts:
            fields = dict(zip(ocp.Usage._fields, each))
            rows.append(row_of(0, web_search_requests=2, **fields)._replace(model=model_id))
            usage = ocp.Usage(**fields, web_search_requests=2)
            wanted.append((pytest.approx(price(model_id, usage) / 1e9, abs=1e-12), each[3]))

    assert migrated(tmp_path, monkeypatch, rows) == wanted


def test_old_rows_of_a_model_without_a_price_have_none(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = row_of(0, input_tokens=5, cache_write_tokens=3)._replace(model="claude-opus-9")

    assert migrated(tmp_path, monkeypatch, [row]) == [(0.0, 3)]
