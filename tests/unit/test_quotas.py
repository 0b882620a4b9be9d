"""Quotas without a server: periods in odd time zones, and what the ledger counts."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Optional

import pytest

from clock import FakeClock
from depth import by_depth
from project import load_script
from time_zones import ZONES, zone

ocp = load_script("ocp_server.py")

Json = Any

PERIODS = ("daily", "weekly", "monthly")


@pytest.fixture
def utc() -> Iterator[None]:
    with zone("UTC"):
        yield


# ---------------------------------------------------------------------------
# Periods
# ---------------------------------------------------------------------------

FIRST_S = 1_767_225_600  # 2026-01-01
YEARS = 4
HOUR_S = 3600


def clock_changes() -> list[int]:
    """The hours after which the clocks of this zone show another distance to UTC."""
    hours = range(FIRST_S, FIRST_S + YEARS * 366 * 86_400, HOUR_S)
    ahead = [time.localtime(hour).tm_gmtoff for hour in hours]
    return [hours[at] for at in range(1, len(ahead)) if ahead[at] != ahead[at - 1]]


def moments() -> list[float]:
    """Moments close together around each change of the clocks, and some of everywhere else."""
    dice = random.Random(7)
    count, step_s = by_depth((100, 3_600), (1_000, 1_800), (1_000, 900))
    found = [FIRST_S + dice.random() * YEARS * 366 * 86_400 for _ in range(count)]
    for change in clock_changes():
        found += [change + offset for offset in range(-26 * HOUR_S, 50 * HOUR_S, step_s)]
        found += [change + offset for offset in (-0.001, 0.001, -1, 1, 1799.5, 3599.5)]
    return found


def day_of(moment_s: float) -> date:
    """The date that the clocks show."""
    return date(*time.localtime(moment_s)[:3])


@pytest.mark.parametrize("name", ZONES)
def test_a_period_holds_its_moment_and_the_next_one_begins_where_it_ends(name: str) -> None:
    with zone(name):
        for moment_s in moments():
            for period in PERIODS:
                begins_s, ends_s = ocp.period_bounds(period, moment_s)
                assert begins_s <= moment_s < ends_s, (period, moment_s)
                assert ocp.period_bounds(period, begins_s) == (begins_s, ends_s)
                assert ocp.period_bounds(period, ends_s - 0.001) == (begins_s, ends_s)
                assert ocp.period_bounds(period, ends_s)[0] == ends_s


@pytest.mark.parametrize("name", ZONES)
def test_a_period_holds_whole_days_of_the_calendar_and_no_others(name: str) -> None:
    with zone(name):
        for moment_s in moments():
            today = day_of(moment_s)
            month = today.replace(day=1)
            monday = today - timedelta(today.weekday())
            days = {
                "daily": (today, today + timedelta(1)),
                "weekly": (monday, monday + timedelta(7)),
                "monthly": (month, (month + timedelta(32)).replace(day=1)),
            }
            for period in PERIODS:
                begins_s, ends_s = ocp.period_bounds(period, moment_s)
                first, after = days[period]
                assert (day_of(begins_s), day_of(ends_s)) == (first, after), (period, moment_s)
                assert day_of(begins_s - 1) == first - timedelta(1)
                assert day_of(ends_s - 1) == after - timedelta(1)


@pytest.mark.parametrize("name", ["America/New_York", "Asia/Beirut", "America/Havana"])
def test_the_zones_of_these_tests_are_as_odd_as_they_should_be(name: str) -> None:
    with zone(name):
        assert len(clock_changes()) == 2 * YEARS


@pytest.mark.parametrize(("name", "noon", "hours"), [
    ("UTC", (2027, 3, 28), 24), ("Europe/Berlin", (2027, 3, 28), 23),
    ("Europe/Berlin", (2027, 10, 31), 25), ("America/New_York", (2027, 3, 14), 23),
    ("America/New_York", (2027, 11, 7), 25), ("Asia/Beirut", (2027, 3, 28), 23),
    ("Asia/Beirut", (2027, 10, 30), 25), ("America/Havana", (2027, 3, 14), 23),
    ("America/Havana", (2027, 11, 7), 25), ("Asia/Kathmandu", (2027, 3, 28), 24),
])
def test_a_day_is_as_long_as_the_clocks_make_it(
    name: str, noon: tuple[int, int, int], hours: int
) -> None:
    with zone(name):
        begins_s, ends_s = ocp.period_bounds("daily", time.mktime((*noon, 12, 0, 0, 0, 0, -1)))

    assert (ends_s - begins_s) / HOUR_S == hours


def test_a_day_without_a_midnight_begins_at_its_first_moment() -> None:
    with zone("Asia/Beirut"):
        begins_s = ocp.period_bounds("daily", time.mktime((2027, 3, 28, 12, 0, 0, 0, 0, -1)))[0]

        assert time.localtime(begins_s)[:6] == (2027, 3, 28, 1, 0, 0)
        assert time.localtime(begins_s - 1)[:6] == (2027, 3, 27, 23, 59, 59)


def test_a_day_with_two_midnights_begins_at_the_first_of_them() -> None:
    with zone("America/Havana"):
        noon_s = time.mktime((2027, 11, 7, 12, 0, 0, 0, 0, -1))
        begins_s = ocp.period_bounds("daily", noon_s)[0]

        assert time.localtime(begins_s)[:6] == (2027, 11, 7, 0, 0, 0)
        assert time.localtime(begins_s + HOUR_S)[:6] == (2027, 11, 7, 0, 0, 0)
        assert ocp.period_bounds("daily", begins_s + HOUR_S)[0] == begins_s


@pytest.mark.parametrize(("moment", "period", "first", "after"), [
    ("2028-02-29T23:59:59Z", "monthly", "2028-02-01", "2028-03-01"),
    ("2026-12-31T12:00:00Z", "monthly", "2026-12-01", "2027-01-01"),
    ("2027-01-31T12:00:00Z", "monthly", "2027-01-01", "2027-02-01"),
    ("2027-01-01T00:00:00Z", "weekly", "2026-12-28", "2027-01-04"),
    ("2027-01-03T23:59:59Z", "weekly", "2026-12-28", "2027-01-04"),
    ("2027-01-04T00:00:00Z", "weekly", "2027-01-04", "2027-01-11"),
    ("2026-12-31T23:59:59Z", "daily", "2026-12-31", "2027-01-01"),
])
@pytest.mark.usefixtures("utc")
def test_a_period_of_the_calendar(moment: str, period: str, first: str, after: str) -> None:
    bounds = ocp.period_bounds(period, ocp.parse_time(moment))

    assert bounds == (ocp.parse_time(f"{first}T00:00Z"), ocp.parse_time(f"{after}T00:00Z"))


# ---------------------------------------------------------------------------
# The ledger
# ---------------------------------------------------------------------------

KEY_ID = 7
SONNET, OPUS = "claude-sonnet-5-5", "claude-opus-5-5"
MODELS = ocp.Models(ocp.BUILTIN_MODELS)
#: A thousandth of a dollar in the ledger's amounts.
MILLI_USD = 10**6


def clock_at(moment: str = "2027-05-12T09:30:00Z") -> FakeClock:
    return FakeClock(ocp.parse_time(moment))


class Book:
    """A ledger, its clock, and the requests of one key."""

    #: The key's limits for single models, its warning level, and what the ledger tells of levels.
    model_quotas: dict[str, dict[str, float]] = {}
    soft_percent: Optional[int] = None

    def __init__(self, store: Any, clock: Optional[FakeClock] = None, **quota: float) -> None:
        self.store = store
        self.clock = clock or clock_at()
        self.ledger = ocp.Ledger(store, self.clock)
        self.quota = quota
        self.told: list[Any] = []
        self.ledger.on_level = self.told.append

    def caller(self, **quota: float) -> Any:
        return ocp.Caller(
            "laptop", key_id=KEY_ID, quota=quota or self.quota, model_quotas=self.model_quotas,
            soft_percent=self.soft_percent)

    def begin(
        self, tokens: int = 0, *, requests: int = 1, bounded: bool = False, model: str = SONNET
    ) -> Any:
        """A request that runs from now on. `bounded` = it takes so many tokens, and as many
        thousandths of a dollar, at most."""
        return self.ledger.reserve(
            self.caller(), ocp.Amounts(requests, tokens, tokens * MILLI_USD), bounded=bounded,
            model=model, model_limits=ocp.limits_of_model(MODELS, self.model_quotas, model))

    def end(self, reservation: Any, tokens: int = 1, *, counted: int = 1) -> None:
        """The row of a request that is over."""
        self.ledger.record(
            row(self.clock(), tokens, counted=counted)._replace(model=reservation.model),
            reservation)

    def use(
        self, times: int = 1, tokens: int = 1, *, counted: int = 1, model: str = SONNET
    ) -> None:
        """So many whole requests."""
        for _ in range(times):
            self.end(self.begin(model=model), tokens, counted=counted)

    def refusal(self, tokens: int = 0, **more: Any) -> Any:
        """What a request is refused with that comes now."""
        with pytest.raises(ocp.OcpError) as caught:
            self.begin(tokens, **more)
        return caught.value

    @property
    def key(self) -> Any:
        return ocp.Key(
            KEY_ID, "laptop", "", 0, None, None, None, (), 0, "", self.quota,
            model_quotas=self.model_quotas, soft_percent=self.soft_percent)

    def report(self) -> Json:
        return self.ledger.quota_report(self.key)

    def model_report(self) -> Json:
        return self.ledger.model_quota_report(self.key, MODELS)

    def least_left(self, *model: Any) -> list[tuple[str, int, int]]:
        """The quotas with the least left: name, limit, and what is left, in amounts."""
        states = self.ledger.least_left(self.caller(), *model).values()
        return [(state.quota.name, state.limit, state.left) for state in states]


def row(at_s: float, tokens: int, *, counted: int = 1, key_id: int = KEY_ID) -> Any:
    """The row of a request that took so many tokens, of all four kinds if there are enough, each
    for a thousandth of a dollar."""
    parts = [tokens // 4] * 3
    return ocp.UsageRow(
        at_s=at_s, request_id="req_1", key_id=key_id, caller="laptop", model="claude-sonnet-5",
        dialect="chat", outcome="ok" if counted else "upstream_failed",
        status=200 if counted else 502, counted=counted, stop_reason="end_turn", stream=False,
        warm=True, path="fresh", prompt_chars=2, response_chars=3, input_tokens=parts[0],
        output_tokens=tokens - sum(parts), cache_read_tokens=parts[1], cache_write_tokens=parts[2],
        first_token_ms=4, total_ms=5, list_price_usd=tokens * MILLI_USD / 1e9)


@pytest.mark.parametrize("period", PERIODS)
@pytest.mark.usefixtures("utc")
def test_so_many_requests_are_let_in_and_no_more(store: Any, period: str) -> None:
    book = Book(store, **{period: 3})

    book.use(3)

    refused = book.refusal()
    assert isinstance(refused, ocp.QuotaExceeded)
    assert refused.details["quota"]["period"] == period
    assert refused.details["quota"]["used"] == 3


@pytest.mark.parametrize("name", ["tokensDaily", "tokensWeekly", "tokensMonthly"])
@pytest.mark.usefixtures("utc")
def test_tokens_of_every_kind_count(store: Any, name: str) -> None:
    book = Book(store, **{name: 100})
    book.use(9, tokens=11)
    assert book.report()[name]["used"] == 99

    book.use(1, tokens=4)

    refused = book.refusal()
    assert isinstance(refused, ocp.QuotaExceeded)
    told = {key: refused.details["quota"][key] for key in ("unit", "limit", "used")}
    assert told == {"unit": "tokens", "limit": 100, "used": 103}


@pytest.mark.parametrize("unit", ["requests", "tokens", "usd"])
@pytest.mark.parametrize("period", PERIODS)
@pytest.mark.parametrize("name", ["UTC", "America/New_York", "Asia/Beirut", "America/Havana"])
def test_a_quota_is_used_up_until_the_last_moment_of_its_period(
    store: Any, name: str, period: str, unit: str
) -> None:
    quota = period if unit == "requests" else f"{unit}{period.title()}"
    with zone(name):
        for change in clock_changes()[:2] or [FIRST_S]:
            book = Book(store, **{quota: 0.002 if unit == "usd" else 2})
            ends_s = ocp.period_bounds(period, change - 1)[1]
            book.clock.now_s = ocp.period_bounds(period, change - 1)[0]
            book.use(2)
            book.clock.now_s = ends_s - 0.001
            assert isinstance(book.refusal(), ocp.QuotaExceeded)
            book.clock.now_s = ends_s
            assert book.report()[quota]["used"] == 0
            book.end(book.begin())


@pytest.mark.parametrize("name", ["UTC", "America/New_York", "Asia/Kathmandu", "Asia/Beirut"])
@pytest.mark.parametrize("period", PERIODS)
def test_the_reset_that_is_told_is_when_the_next_request_is_let_in(
    store: Any, name: str, period: str
) -> None:
    with zone(name):
        book = Book(store, clock_at("2027-03-27T20:15:30.250Z"), **{period: 1})
        book.use()

        refused = book.refusal()

        told = refused.details["quota"]
        resets_s = ocp.parse_time(told["resetsAt"])
        assert told["resetsIn"] == ocp.format_span(resets_s - book.clock())
        assert abs(int(refused.headers()["Retry-After"]) - (resets_s - book.clock())) <= 0.5
        assert told["resetsAt"] == book.report()[period]["resetsAt"]
        book.clock.now_s = resets_s
        book.use()


@pytest.mark.parametrize(("seconds", "words"), [
    (0, "now"), (1, "1m"), (60, "1m"), (61, "2m"), (3599, "1h 0m"), (35_820, "9h 57m"),
    (86_400, "24h 0m"), (97_200, "1d 3h"), (30 * 86_400, "30d 0h"),
])
def test_the_time_to_a_reset_in_words(seconds: float, words: str) -> None:
    assert ocp.format_span(seconds) == words


@pytest.mark.parametrize(("seconds", "words"), [
    (-5, "0s"), (0, "0s"), (0.2, "1s"), (59.1, "1m0s"), (360, "6m0s"), (3600, "1h0m0s"),
    (3661, "1h1m1s"), (30 * 86_400, "720h0m0s")])
def test_the_time_to_a_reset_in_a_header(seconds: float, words: str) -> None:
    assert ocp.format_reset(seconds) == words


@pytest.mark.parametrize(("seconds", "words"), [
    (0, "0s"), (59.9, "59s"), (60, "1m"), (3599, "59m"), (3780, "1h 3m"), (90_000, "25h 0m")])
def test_the_time_since_the_start_is_rounded_down(seconds: float, words: str) -> None:
    assert ocp.format_uptime(seconds) == words


@pytest.mark.usefixtures("utc")
def test_a_refusal_for_a_quota_says_that_trying_again_is_of_no_use(store: Any) -> None:
    book = Book(store, clock_at("2027-05-12T14:03:00Z"), daily=1)
    book.use()

    refused = book.refusal()

    assert refused.headers() == {"Retry-After": str(9 * 3600 + 57 * 60), "x-should-retry": "false"}
    assert refused.message == (
        "This key has used 1 of its 1 requests (daily). Resets in 9h 57m.")


@pytest.mark.usefixtures("utc")
def test_of_several_quotas_the_first_one_is_told(store: Any) -> None:
    names = tuple(quota.name for quota in ocp.QUOTAS)
    told = []
    for at in range(len(names)):
        quota = Book(store, **dict.fromkeys(names[at:], 0)).refusal().details["quota"]
        told.append((quota["unit"], quota["period"]))

    assert told == [(unit, period) for unit in ("requests", "tokens", "usd")
                    for period in PERIODS]


@pytest.mark.parametrize("name", [quota.name for quota in ocp.QUOTAS])
def test_a_limit_of_nothing_lets_nothing_through(store: Any, name: str) -> None:
    assert isinstance(Book(store, **{name: 0}).refusal(), ocp.QuotaExceeded)


def test_a_request_that_runs_has_its_place(store: Any) -> None:
    book = Book(store, daily=2)
    first = book.begin()
    book.begin()

    assert book.refusal().details["quota"]["used"] == 2
    book.end(first)

    assert (book.report()["daily"]["used"], book.report()["daily"]["inFlight"]) == (1, 1)
    assert isinstance(book.refusal(), ocp.QuotaExceeded)


def test_a_place_that_was_not_used_is_free_again_once(store: Any) -> None:
    book = Book(store, daily=1)
    reservation = book.begin()
    for _ in range(3):
        book.ledger.release(reservation)

    book.begin()

    assert isinstance(book.refusal(), ocp.QuotaExceeded)


def test_a_row_ends_its_reservation_and_no_other(store: Any) -> None:
    book = Book(store, daily=5)
    first, second = book.begin(), book.begin()

    book.end(first)
    book.ledger.release(first)

    assert (book.report()["daily"]["used"], book.report()["daily"]["inFlight"]) == (1, 1)
    book.end(second)
    assert book.report()["daily"]["inFlight"] == 0


def test_tokens_count_of_requests_that_do_not(store: Any) -> None:
    book = Book(store, daily=1, tokensDaily=100)

    book.use(5, tokens=10, counted=0)

    assert {name: book.report()[name]["used"] for name in book.quota} == {
        "daily": 0, "tokensDaily": 50}
    book.use()


def test_a_request_for_several_answers_counts_as_so_many(store: Any) -> None:
    book = Book(store, daily=5)
    running = book.begin(requests=3)
    assert book.report()["daily"]["inFlight"] == 3

    with pytest.raises(ocp.QuotaExceeded, match="asks for 3 answers: ask for fewer"):
        book.begin(requests=3)

    book.ledger.record(row(book.clock(), 1, counted=3), running)
    assert book.report()["daily"]["used"] == 3
    book.begin(requests=2)


def test_a_look_at_a_quota_takes_nothing_of_it(store: Any) -> None:
    book = Book(store, daily=1)

    for _ in range(3):
        book.ledger.check(book.caller())

    book.use()
    with pytest.raises(ocp.QuotaExceeded):
        book.ledger.check(book.caller())


@pytest.mark.usefixtures("utc")
def test_an_answer_counts_in_the_period_in_which_it_ends(store: Any) -> None:
    book = Book(store, clock_at("2027-05-12T23:59:59Z"), daily=1)
    late = book.begin()
    book.clock.now_s = ocp.parse_time("2027-05-13T00:00:01Z")
    assert book.report()["daily"] == {
        "limit": 1, "used": 0, "inFlight": 1, "resetsAt": "2027-05-14T00:00:00.000Z",
        "resetsIn": "24h 0m"}

    book.end(late)

    assert book.refusal().details["quota"]["used"] == 1


def test_what_was_used_is_known_after_a_restart(store: Any) -> None:
    Book(store, weekly=5).use(3, tokens=10)

    report = Book(store, weekly=5, tokensWeekly=50).report()

    assert (report["weekly"]["used"], report["tokensWeekly"]["used"]) == (3, 30)


def test_the_rows_of_others_do_not_count(store: Any) -> None:
    book = Book(store, daily=1)
    nobody = ocp.Reservation(None)
    for key_id in (KEY_ID + 1, None):
        book.ledger.record(row(book.clock(), 10, key_id=key_id), nobody)

    assert book.report()["daily"]["used"] == 0
    book.begin()


@pytest.mark.usefixtures("utc")
def test_what_was_used_while_the_clock_was_ahead_does_not_count_for_today(store: Any) -> None:
    book = Book(store, daily=3)
    book.use(1)
    book.clock.advance(40 * 86_400)
    book.use(3)
    book.clock.advance(-40 * 86_400)

    assert book.report()["daily"]["used"] == 1
    book.use(2)
    assert isinstance(book.refusal(), ocp.QuotaExceeded)


def test_the_list_price_is_that_of_the_kept_rows_whenever_it_is_asked_for(tmp_path: Path) -> None:
    store = ocp.Store(str(tmp_path / "ocp.db"))
    clock, nobody = clock_at(), ocp.Reservation(None)
    ledger, now_s = ocp.Ledger(store, clock), clock()
    callers = [ocp.Caller("laptop", key_id=KEY_ID), ocp.Caller("laptop")]

    def prices(since_s: float) -> list[list[float]]:
        """What the ledger tells, and a ledger that was asked nothing before."""
        begins_s = [0.0, since_s]
        return [[round(price, 6) for caller in callers
                 for price in each.list_prices(caller, begins_s)]
                for each in (ledger, ocp.Ledger(store, clock))]

    def add(at_s: float, *amounts: int) -> None:
        for key_id, tokens in zip((KEY_ID, None, KEY_ID + 1), amounts):
            ledger.record(row(at_s, tokens, key_id=key_id), nobody)

    add(now_s - 900 * 86_400, 8, 80, 800)
    assert prices(now_s) == [[0.008, 0.0, 0.08, 0.0]] * 2
    add(now_s, 1, 2, 3)
    # A row that was written late.
    add(now_s - 5, 10, 20, 30)
    assert prices(now_s) == [[0.019, 0.001, 0.102, 0.002]] * 2
    assert prices(now_s - 5) == [[0.019, 0.011, 0.102, 0.022]] * 2
    ledger.prune(400)
    assert prices(now_s - 5) == [[0.011, 0.011, 0.022, 0.022]] * 2
    assert not ledger.prune(400)
    # Only what is new is read.
    with store.transaction() as connection:
        connection.execute("UPDATE usage SET list_price_usd = 5")
    assert ledger.list_prices(callers[0], [0.0, now_s - 5])[0] == pytest.approx(0.011)
    store.close()


@pytest.mark.parametrize("name", ["admin", "anonymous", "shared", "local"])
def test_whoever_has_no_key_of_the_database_has_no_quota(store: Any, name: str) -> None:
    ledger = ocp.Ledger(store, clock_at())

    places = [ledger.reserve(ocp.Caller(name), ocp.Amounts(1, 10**9)) for _ in range(50)]

    assert {place.key_id for place in places} == {None}


def test_a_key_without_limits_is_let_in_always(store: Any) -> None:
    book = Book(store)

    book.use(50, tokens=10**6)

    assert book.report()["daily"]["used"] == 50


def test_a_limit_that_is_set_later_counts_what_was_used_and_what_runs(store: Any) -> None:
    book = Book(store)
    book.use(1)
    running = book.begin()

    book.quota = {"daily": 2}

    assert book.report()["daily"]["inFlight"] == 1
    assert isinstance(book.refusal(), ocp.QuotaExceeded)
    book.ledger.release(running)
    book.begin()


@pytest.mark.usefixtures("utc")
def test_old_rows_are_forgotten_but_for_those_that_a_quota_counts(store: Any) -> None:
    book = Book(store, clock_at("2027-05-31T12:00:00Z"), monthly=10)
    for moment in ("2027-04-30T23:59:59Z", "2027-05-01T00:00:00Z", "2027-05-29T12:00:00Z"):
        at_s = ocp.parse_time(moment)
        book.ledger.record(row(at_s, 1), ocp.Reservation(None))

    pruned = book.ledger.prune(days=1)

    assert pruned == 1
    assert Book(store, book.clock, monthly=10).report()["monthly"]["used"] == 2


def test_a_row_that_cannot_be_written_counts_all_the_same(store: Any) -> None:
    book = Book(store, daily=2)
    book.use(1)
    with store.transaction() as connection:
        connection.execute("CREATE TRIGGER full BEFORE INSERT ON usage "
                           "BEGIN SELECT RAISE(ABORT, 'the disk is full'); END")

    with pytest.raises(sqlite3.Error):
        book.use(1)

    assert isinstance(book.refusal(), ocp.QuotaExceeded)


# -- what is left -------------------------------------------------------------

@pytest.mark.usefixtures("utc")
def test_of_several_periods_the_one_with_the_least_left_is_told(store: Any) -> None:
    book = Book(store, daily=5, monthly=9, tokensWeekly=100, tokensMonthly=1000)
    book.use(2, tokens=10)
    assert book.least_left() == [("daily", 5, 3), ("tokensWeekly", 100, 80)]

    book.quota = {"daily": 5, "monthly": 4}
    assert book.least_left() == [("monthly", 4, 2)]


@pytest.mark.usefixtures("utc")
def test_of_quotas_with_as_much_left_the_one_that_resets_last_is_told(store: Any) -> None:
    book = Book(store, daily=2, weekly=2, monthly=2)
    book.use(2)

    (state,) = book.ledger.least_left(book.caller()).values()

    assert (state.quota.name, state.left) == ("monthly", 0)
    assert ocp.iso_time(state.resets_s) == "2027-06-01T00:00:00.000Z"


@pytest.mark.usefixtures("utc")
def test_what_runs_is_not_left_and_nothing_is_less_than_nothing(store: Any) -> None:
    book = Book(store, daily=5, tokensDaily=100)
    running = book.begin(tokens=70)
    assert book.least_left() == [("daily", 5, 4), ("tokensDaily", 100, 30)]

    # An estimate may have been too low.
    book.end(running, tokens=130)

    assert book.least_left() == [("daily", 5, 4), ("tokensDaily", 100, 0)]


@pytest.mark.usefixtures("utc")
def test_limits_of_the_model_that_is_asked_count_too(store: Any) -> None:
    book = Book(store, daily=5, usdDaily=2)
    book.use(2)
    both = [("daily", 5, 3), ("usdDaily", 2000 * MILLI_USD, 1998 * MILLI_USD)]
    assert book.least_left(OPUS, {"daily": 4}) == both
    assert book.least_left(SONNET, {"weekly": 2}) == [("weekly", 2, 0), both[1]]


def test_a_key_without_limits_has_nothing_to_tell(store: Any) -> None:
    assert Book(store).least_left() == []


# -- tokens of requests at the same time --------------------------------------

def test_requests_that_run_may_not_take_more_tokens_together_than_are_left(store: Any) -> None:
    book = Book(store, tokensDaily=100)
    book.use(1, tokens=40)
    running = book.begin(tokens=30)
    book.begin(tokens=30)

    refused = book.refusal(tokens=1)

    assert isinstance(refused, ocp.QueueFull) and refused.retryable
    assert refused.headers() == {"Retry-After": "5"}
    assert "60" in refused.message
    book.end(running, tokens=29)
    book.begin(tokens=1)


def test_a_request_that_took_less_than_it_might_leaves_the_rest(store: Any) -> None:
    book = Book(store, tokensDaily=100)

    for _ in range(10):
        book.end(book.begin(tokens=90), tokens=10)

    assert book.report()["tokensDaily"]["used"] == 100


# -- many at once -------------------------------------------------------------

def rush(
    book: Book, dice: random.Random, begun: list[int], seen: list[str], *, bounded: bool
) -> None:
    """Requests of one thread, of all fates. `begun` gets the tokens of those that were counted,
    `seen` whatever should not be."""
    for _ in range(60):
        most = dice.randint(1, 40)
        try:
            reservation = book.begin(most, bounded=bounded)
        except ocp.OcpError:
            continue
        watch(book, seen, bounded=bounded)
        fate = dice.random()
        if fate < 0.2:
            book.ledger.release(reservation)
        else:
            spent = dice.randint(1, most) if fate > 0.4 else 0
            book.end(reservation, spent, counted=fate > 0.4)
            if fate > 0.4:
                begun.append(spent)
        if dice.random() < 0.3:
            time.sleep(0)
        watch(book, seen, bounded=bounded)


def watch(book: Book, seen: list[str], *, bounded: bool) -> None:
    """Whether anybody has more than there is. Only a request that sets itself no limit may go
    over the tokens or the money, and only while it is alone."""
    report = {**book.report(), **book.model_report().get("sonnet", {})}
    requests, amount = report["daily"], report[next(reversed(book.limits))]
    if requests["used"] + requests["inFlight"] > requests["limit"]:
        seen.append(f"requests {requests}")
    # In money, a sum of two floats may be a little more than the limit that it is.
    over = amount["used"] + amount["inFlight"] > amount["limit"] + 1e-9
    if over and (bounded or requests["inFlight"] > 1):
        seen.append(f"{amount} of {requests['inFlight']}")


@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "unbounded"])
@pytest.mark.parametrize("for_model", [False, True], ids=["of the key", "of a model"])
@pytest.mark.parametrize("name", ["tokensDaily", "usdDaily", "usdMonthly"])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.usefixtures("utc")
def test_nobody_overshoots_however_many_come_at_once(
    store: Any, seed: int, name: str, for_model: bool, bounded: bool
) -> None:
    dice = random.Random(seed)
    each = 0.001 if name.startswith("usd") else 1
    book = Book(store, daily=dice.randint(1, 120))
    limit = round(dice.randint(100, 2500) * each, 6)
    book.limits = {**book.quota, name: limit}
    if for_model:
        book.model_quotas = {"sonnet": {name: limit}}
    else:
        book.quota = book.limits
    begun: list[int] = []
    seen: list[str] = []
    threads = [
        threading.Thread(target=rush, args=(book, random.Random(100 * seed + number), begun, seen),
                         kwargs={"bounded": bounded})
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)

    report = {**book.report(), **book.model_report().get("sonnet", {})}
    assert seen == []
    assert [report[quota]["inFlight"] for quota in book.limits] == [0, 0]
    assert report["daily"]["used"] == len(begun) <= book.quota["daily"]
    spare = 0 if bounded else 40 * each
    assert report[name]["used"] == pytest.approx(sum(begun) * each, abs=1e-9)
    assert report[name]["used"] <= limit + spare
    # Who comes alone gets what is left.
    left = book.quota["daily"] - len(begun)
    if sum(begun) * each < limit - 1e-9:
        for _ in range(left):
            book.end(book.begin(1, bounded=bounded), tokens=0)
    assert isinstance(book.refusal(), ocp.QuotaExceeded)


# -- money --------------------------------------------------------------------

@pytest.mark.parametrize("name", ["usdDaily", "usdWeekly", "usdMonthly"])
@pytest.mark.usefixtures("utc")
def test_a_budget_is_used_up_to_the_last_part_of_a_dollar(store: Any, name: str) -> None:
    book = Book(store, **{name: 0.3})
    # A sum of floats would be above 0.3 after three times 0.1.
    book.use(3, tokens=100)

    refused = book.refusal()

    assert refused.details["quota"] == {
        "period": name[3:].lower(), "unit": "usd", "limit": 0.3, "used": 0.3,
        "resetsIn": refused.details["quota"]["resetsIn"],
        "resetsAt": book.report()[name]["resetsAt"]}
    assert "has used 0.3 of its 0.3 USD at list price" in refused.message
    assert book.report()[name]["used"] == 0.3


def test_money_of_requests_that_run_is_held_for_them(store: Any) -> None:
    book = Book(store, usdDaily=0.1)
    book.use(1, tokens=40)
    running = book.begin(tokens=30)
    book.begin(tokens=30)

    refused = book.refusal(tokens=1)

    assert isinstance(refused, ocp.QueueFull) and "USD at list price (0.06)" in refused.message
    assert book.report()["usdDaily"]["inFlight"] == 0.06
    book.end(running, tokens=29)
    book.begin(tokens=1)


def test_a_request_that_may_take_more_money_than_is_left_is_refused(store: Any) -> None:
    book = Book(store, usdWeekly=0.05)

    refused = book.refusal(tokens=51, bounded=True)

    assert isinstance(refused, ocp.QuotaExceeded)
    assert "This request may use 0.051 USD: reduce max_tokens." in refused.message
    book.begin(tokens=50, bounded=True)


def test_money_is_known_after_a_restart_to_the_last_part(store: Any) -> None:
    Book(store).use(7, tokens=100)

    book = Book(store, usdMonthly=0.7)

    assert book.report()["usdMonthly"]["used"] == 0.7
    assert isinstance(book.refusal(), ocp.QuotaExceeded)


# -- single models ------------------------------------------------------------

@pytest.mark.parametrize("name", ["daily", "tokensWeekly", "usdMonthly"])
@pytest.mark.parametrize("named", ["opus", OPUS, "best"])
@pytest.mark.usefixtures("utc")
def test_a_limit_for_a_model_holds_for_it_alone(store: Any, named: str, name: str) -> None:
    book = Book(store)
    book.model_quotas = {named: {name: 0.003 if name.startswith("usd") else 3}}
    book.use(9)
    book.use(3, model=OPUS)

    refused = book.refusal(model=OPUS)

    assert refused.details["quota"]["model"] == OPUS and OPUS in refused.message
    assert book.model_report()[named][name]["used"] == refused.details["quota"]["used"]
    book.use(9)


def test_limits_of_the_key_hold_for_the_model_too(store: Any) -> None:
    book = Book(store, daily=2)
    book.model_quotas = {"opus": {"daily": 5}}
    book.use(1, model=OPUS)
    book.use(1)

    assert "model" not in book.refusal(model=OPUS).details["quota"]


def test_of_two_names_of_a_model_the_lower_limit_holds() -> None:
    limits = ocp.limits_of_model(
        MODELS, {"opus": {"daily": 5, "usdDaily": 1}, OPUS: {"daily": 3, "weekly": 9},
                 "haiku": {"daily": 1}}, OPUS)

    assert limits == {"daily": 3, "usdDaily": 1, "weekly": 9}


def test_what_runs_on_a_model_is_held_for_it(store: Any) -> None:
    book = Book(store)
    book.model_quotas = {"opus": {"daily": 2, "tokensDaily": 100}}
    book.begin(tokens=50, model=OPUS)
    book.begin(tokens=500)

    assert isinstance(book.refusal(51, model=OPUS), ocp.QueueFull)
    book.begin(tokens=50, model=OPUS)
    assert isinstance(book.refusal(model=OPUS), ocp.QuotaExceeded)
    assert book.model_report()["opus"]["tokensDaily"]["inFlight"] == 100


def test_what_a_model_used_is_known_after_a_restart(store: Any) -> None:
    first = Book(store)
    first.use(2, model=OPUS)
    first.use(1)

    book = Book(store)
    book.model_quotas = {"opus": {"monthly": 3}}

    assert book.model_report()["opus"]["monthly"]["used"] == 2
    book.use(1, model=OPUS)
    assert isinstance(book.refusal(model=OPUS), ocp.QuotaExceeded)


def test_models_that_clients_make_up_take_no_memory(store: Any) -> None:
    book = Book(store, daily=1_000)
    for number in range(200):
        book.use(1, model=f"claude-opus-{number}")

    assert len(book.ledger._used) == len(PERIODS)


# -- levels -------------------------------------------------------------------

def levels(book: Book) -> list[tuple[str, str, str]]:
    return [(level.quota, level.model, level.level) for level in book.told]


@pytest.mark.usefixtures("utc")
def test_the_warning_level_and_the_limit_are_told_once_for_each_period(store: Any) -> None:
    book = Book(store, usdDaily=0.01)
    book.soft_percent = 80
    book.use(7)
    assert levels(book) == []

    book.use(1)
    assert levels(book) == [("usdDaily", "", "soft")]
    assert book.told[0] == ocp.QuotaLevel(
        KEY_ID, "usdDaily", "", "soft", 0.008, 0.01, ocp.parse_time("2027-05-13T00:00Z"), "laptop")
    book.use(2)
    for _ in range(3):
        book.refusal()

    assert levels(book)[1:] == [("usdDaily", "", "limit")]
    book.clock.now_s += 86_400
    book.use(8)
    assert levels(book)[2:] == [("usdDaily", "", "soft")]


def test_a_leap_over_both_levels_tells_the_limit_only(store: Any) -> None:
    book = Book(store, tokensDaily=10, tokensWeekly=100)
    book.soft_percent = 50

    book.use(1, tokens=60)

    assert levels(book) == [("tokensDaily", "", "limit"), ("tokensWeekly", "", "soft")]


def test_a_limit_is_told_when_a_request_is_refused_before_it_is_reached(store: Any) -> None:
    book = Book(store, tokensDaily=100)
    book.use(1, tokens=60)
    for _ in range(2):
        book.refusal(tokens=41, bounded=True)

    assert levels(book) == [("tokensDaily", "", "limit")]
    book.quota = {"tokensDaily": 90}
    book.refusal(tokens=41, bounded=True)
    assert len(book.told) == 2


def test_a_request_that_is_larger_than_the_limit_says_nothing_about_the_usage(store: Any) -> None:
    book = Book(store, tokensDaily=100, usdDaily=0.2)
    book.refusal(tokens=101, bounded=True)

    assert book.told == []


def test_a_key_that_is_blocked_on_purpose_is_no_news(store: Any) -> None:
    book = Book(store, daily=0)
    book.soft_percent = 80
    book.refusal()

    assert book.told == []


def test_levels_of_a_model_name_it(store: Any) -> None:
    book = Book(store)
    book.soft_percent, book.model_quotas = 50, {"opus": {"daily": 2}}

    book.use(1, model=OPUS)
    book.use(5)
    book.use(1, model=OPUS)

    assert levels(book) == [("daily", OPUS, "soft"), ("daily", OPUS, "limit")]


def test_nobody_is_told_a_level_while_the_ledger_is_locked(store: Any) -> None:
    book = Book(store, daily=2)
    free: list[bool] = []

    def ask_another_thread(level: Any) -> None:
        other = threading.Thread(target=book.report)
        other.start()
        other.join(10)
        free.append(not other.is_alive())

    book.ledger.on_level = ask_another_thread
    book.use(2)

    assert free == [True]


@pytest.mark.usefixtures("utc")
def test_an_answer_keeps_its_row_where_its_new_period_cannot_be_summed(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*query: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    book = Book(store, clock_at("2027-05-12T23:59:59Z"), daily=2, usdDaily=1)
    running = book.begin()
    book.clock.advance(2)
    with monkeypatch.context() as broken:
        broken.setattr(store, "rows", unreadable)
        book.end(running)

    assert store.rows("SELECT COUNT(*) FROM usage")[0][0] == 1
    assert book.report()["daily"]["used"] == 1
    book.use()
    assert levels(book) == [("daily", "", "limit")]


def test_a_report_says_what_is_over_the_warning_level(store: Any) -> None:
    book = Book(store, daily=10, weekly=100)
    book.soft_percent, book.model_quotas = 80, {"sonnet": {"daily": 9, "weekly": 11}}
    book.use(8)

    soft = {name for name, each in book.report().items() if each.get("soft") is True}
    assert soft == {"daily"}
    assert book.model_report()["sonnet"]["daily"]["soft"] is True
    assert "soft" not in book.model_report()["sonnet"]["weekly"]
    assert book.begin().warnings == ["daily 80%", f"{SONNET} daily 88%"]


def test_without_a_warning_level_nothing_is_soft(store: Any) -> None:
    book = Book(store, daily=10)
    book.use(9)

    assert "soft" not in book.report()["daily"] and book.begin().warnings == []
