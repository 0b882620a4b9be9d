"""Plan usage: what claude says of it, and what is remembered of that.

The lines in data/plan.json are those of two versions of claude, word for word.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from clock import FakeClock
from plan_lines import LINES, NEW, OLD, UNKNOWN, UNKNOWN_EXTRA
from project import load_script
from time_zones import zone

ocp = load_script("ocp_server.py")

Json = Any

each_version = pytest.mark.parametrize("version", LINES)
#: When the lines were written.
THEN_S = 1_795_264_453
FIVE_S, WEEK_S = THEN_S + 3_000, THEN_S + 90_000


# ---------------------------------------------------------------------------
# What claude says by itself
# ---------------------------------------------------------------------------

def news_of(lines: dict[str, dict[str, Json]], name: str) -> Any:
    """What the line of this name tells."""
    news = ocp.plan_event(lines["events"][name])
    assert news is not None
    return news


def test_the_old_claude_tells_the_reset_of_the_window_that_decides() -> None:
    news = news_of(OLD, "first")

    assert news == ocp.PlanReport(
        {"five_hour": ocp.PlanWindow(None, FIVE_S, "allowed")}, "allowed", "five_hour", FIVE_S,
        overage_status="rejected", overage_reason="org_level_disabled", is_overage=False)


def test_the_new_claude_tells_all_windows() -> None:
    news = news_of(NEW, "first")

    assert news == ocp.PlanReport(
        {"five_hour": ocp.PlanWindow(0.21, FIVE_S, "allowed"),
         "seven_day": ocp.PlanWindow(0.4, WEEK_S, "allowed")}, "allowed", "five_hour", FIVE_S,
        overage_status="rejected", overage_reason="org_level_disabled", is_overage=False)


#: The name of a line, and the window that decides: its share, or where the two versions differ
#: that of the old one and that of the new one, and the status.
DECIDING = {
    "warning": (0.95, 0.95, "allowed_warning"),
    "threshold": (0.96, 0.96, "allowed_warning"),
    "back": (None, 0.21, "allowed"),
    "rejected": (None, 1, "rejected"),
    "rejected first": (None, 1, "rejected"),
}


@pytest.mark.parametrize("name", DECIDING)
def test_the_share_of_a_window_is_told_when_claude_tells_it(name: str) -> None:
    found = [news_of(lines, name) for lines in (OLD, NEW)]

    *shares, status = DECIDING[name]
    assert [news.windows["five_hour"].utilization for news in found] == shares
    assert [news.status for news in found] == [status] * 2


@each_version
def test_the_week_may_be_the_window_that_decides(version: str) -> None:
    news = news_of(LINES[version], "week decides")

    assert (news.claim, news.status) == ("seven_day", "allowed_warning")
    window = news.windows["seven_day"]
    assert (window.utilization, window.resets_at_s) == (0.8, 1_795_696_453)


@each_version
def test_a_plain_429_is_no_limit_of_the_plan_and_a_rejection_is(version: str) -> None:
    events = LINES[version]["events"]

    plain, rejected = (ocp.plan_event(events[name]) for name in ("plain 429", "rejected"))

    assert (plain.is_limit_reached, rejected.is_limit_reached) == (False, True)


# ---------------------------------------------------------------------------
# What claude says when it is asked
# ---------------------------------------------------------------------------

@each_version
@pytest.mark.parametrize("name", ["bare token", "bare token after a turn"])
def test_a_bare_token_knows_nothing_of_its_plan(version: str, name: str) -> None:
    assert ocp.plan_report(LINES[version]["replies"][name]) == ocp.PlanReport({})


@each_version
def test_a_full_login_knows_every_window_and_its_name(version: str) -> None:
    news = ocp.plan_report(LINES[version]["replies"]["login"])

    assert news == ocp.PlanReport({
        "five_hour": ocp.PlanWindow(0.21, 1_795_284_000.123456, None),
        "seven_day": ocp.PlanWindow(0.4, 1_795_597_200, None),
        "seven_day_sonnet": ocp.PlanWindow(0.03, 1_795_597_200, None)}, subscription="max",
        budget=ocp.ExtraUsageBudget(is_enabled=False))


@each_version
@pytest.mark.parametrize("name", ["login, not asked", "refused", "hanging"])
def test_a_login_whose_question_came_to_nothing_knows_its_name_only(
    version: str, name: str
) -> None:
    news = ocp.plan_report(LINES[version]["replies"][name])

    assert news == ocp.PlanReport({}, subscription="max")


@each_version
def test_after_a_turn_it_tells_what_the_answers_headers_said(version: str) -> None:
    windows = ocp.plan_report(LINES[version]["replies"]["login, after a turn"]).windows

    assert {name: window.utilization for name, window in windows.items()} == {
        "five_hour": 0.21, "seven_day": 0.4}


# -- garbage ------------------------------------------------------------------


#: JSON that is no share of a window, and no moment.
NO_NUMBERS = [
    "null", "true", "false", '""', '"x"', '"21"', "[]", "[0.21]", "{}", '{"a": 1}',
    "1" + "0" * 350, "-" + "9" * 350, "-1", "-0.5", "1e308",
]


def parsed(text: str) -> Json:
    """JSON as the server reads claude's lines."""
    return ocp.from_json(text)


@pytest.mark.parametrize("text", NO_NUMBERS, ids=lambda text: text[:8])
def test_a_share_that_is_none_is_unknown(text: str) -> None:
    event = '{"type": "rate_limit_event", "rate_limit_info": {"rateLimitType": "five_hour", '
    lines = [event + f'"utilization": {text}}}}}',
             event + f'"unifiedWindows": {{"five_hour": {{"utilization": {text}}}}}}}}}']
    reply = ('{"response": {"response": {"rate_limits": {"five_hour": '
             f'{{"utilization": {text}, "resets_at": null}}}}}}}}}}')

    found = [ocp.plan_event(parsed(line)) for line in lines] + [ocp.plan_report(parsed(reply))]

    assert [news.windows["five_hour"].utilization for news in found] == [None] * 3


@pytest.mark.parametrize("text", [
    *NO_NUMBERS, '"2026-13-01T00:00:00Z"', '"0001-01-01"', '"9999-12-31T23:59:59-23:59"',
    '"yesterday"', "0"], ids=lambda text: text[:8])
def test_a_moment_that_is_none_is_unknown(text: str) -> None:
    event = ('{"type": "rate_limit_event", "rate_limit_info": '
             f'{{"rateLimitType": "five_hour", "resetsAt": {text}}}}}')
    reply = ('{"response": {"response": {"rate_limits": {"five_hour": '
             f'{{"utilization": 21, "resets_at": {text}}}}}}}}}}}')

    found = [ocp.plan_event(parsed(event)), ocp.plan_report(parsed(reply))]

    assert [news.windows["five_hour"].resets_at_s for news in found] == [None] * 2


@pytest.mark.parametrize("value", [None, True, 7, "x", [], ["x"], {}, {"five_hour": 3},
                                   {"five_hour": None}, {"": {}}, {"five_hour": []}])
def test_windows_that_are_none_are_left_out(value: Json) -> None:
    info = {"rateLimitType": "five_hour", "status": "allowed", "unifiedWindows": value}

    news = ocp.plan_event({"type": "rate_limit_event", "rate_limit_info": info})
    told = ocp.plan_report({"response": {"response": {"rate_limits": value}}})

    assert news.windows["five_hour"] == ocp.PlanWindow(None, None, "allowed")
    assert told.windows == {}


@pytest.mark.parametrize("line", [
    {}, {"type": "rate_limit_event"}, {"type": "rate_limit_event", "rate_limit_info": None},
    {"type": "rate_limit_event", "rate_limit_info": ["five_hour"]},
    {"type": "system", "rate_limit_info": {"rateLimitType": "five_hour"}}])
def test_other_lines_are_no_news(line: Json) -> None:
    assert ocp.plan_event(line) is None


@pytest.mark.parametrize("reply", [
    {}, {"response": None}, {"response": {"response": 7}}, {"response": {"response": []}},
    {"response": {"response": {"rate_limits": "x", "subscription_type": 7}}}])
def test_a_reply_of_another_shape_tells_nothing(reply: Json) -> None:
    assert ocp.plan_report(reply) == ocp.PlanReport({})


# ---------------------------------------------------------------------------
# What is remembered of it
# ---------------------------------------------------------------------------

@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(THEN_S)


@pytest.fixture
def account(clock: FakeClock) -> Any:
    return ocp.Account(clock)


def shown(account: Any) -> tuple[Json, Json]:
    """The two windows that are always there."""
    plan = account.plan()
    return plan["currentSession"], plan["weeklyLimits"]["allModels"]


@pytest.mark.parametrize("result", [True, None])
def test_a_result_that_was_asked_for_before_a_refusal_does_not_overrule_it(
    account: Any, result: bool | None
) -> None:
    since = account.refusals
    account.set_login(False)

    assert not account.set_login(result, since) and account.login_report()["ok"] is False
    assert account.set_login(result, account.refusals) and account.login_report()["ok"] is result


def test_a_look_at_the_login_that_a_refusal_overtakes_finds_nothing(account: Any) -> None:
    def has_login(_: object) -> bool:
        if not refused:
            refused.append(account.set_login(False))
        return True

    refused: list[bool] = []
    found: list[str] = []
    app = mock.MagicMock(account=account)
    app.program.has_login = has_login
    app.log.event = lambda _level, name: found.append(name)
    app._login_renewed = lambda since: ocp.App._login_renewed(app, since)

    ocp.App._look_at_login(app)
    assert (found, account.login_report()["ok"]) == ([], False)
    ocp.App._look_at_login(app)
    assert (found, account.login_report()["ok"]) == (["login_found"], None)


def test_a_refusal_is_not_followed_by_a_look_at_the_login_at_once() -> None:
    """The look can come between any two steps of noting the refusal."""
    folder = mock.MagicMock()
    folder.login_stamp.return_value = None
    monitor = ocp.LoginMonitor(folder, lambda: 1000.0)
    state = mock.MagicMock(folder=folder)
    due = []
    state.account.set_login.side_effect = lambda _: due.append(monitor.is_due())
    app = mock.MagicMock(_login_monitor=monitor)
    app.logins.state.return_value = state

    ocp.App.login_lost(app, ocp.SERVER_LOGIN)
    assert due == [False] and not monitor.is_due()


def test_at_first_everything_is_unknown(account: Any) -> None:
    report = account.report()

    assert shown(account) == (UNKNOWN, UNKNOWN)
    assert (report["status"], report["fetchedAt"]) == (None, None)
    assert report["plan"] == {
        "currentSession": UNKNOWN, "weeklyLimits": {"allModels": UNKNOWN},
        "extraUsage": UNKNOWN_EXTRA, "representativeClaim": None,
        "subscription": None}


def test_the_new_claudes_line_fills_the_plan(account: Any) -> None:
    account.update_plan(news_of(NEW, "first"))

    session, week = shown(account)
    assert {name: session[name] for name in UNKNOWN if name != "resetsAtHuman"} == {
        "utilization": 0.21, "percent": "21%", "resetsIn": "50m",
        "resetsAt": "2026-11-21T13:24:13.000Z", "status": "allowed",
        "observedAt": "2026-11-21T12:34:13.000Z"}
    assert (week["utilization"], week["percent"], week["resetsIn"]) == (0.4, "40%", "1d 1h")
    assert account.plan()["extraUsage"] == {
        **UNKNOWN_EXTRA, "state": "off", "status": "rejected",
        "disabledReason": "org_level_disabled"}
    assert account.report()["status"] == "allowed"


def test_the_old_claudes_line_tells_a_reset_and_no_share(account: Any) -> None:
    account.update_plan(news_of(OLD, "first"))

    session, week = shown(account)
    assert (session["resetsIn"], session["utilization"], session["percent"]) == ("50m", None, None)
    assert week == UNKNOWN


def test_a_moment_is_shown_in_the_time_of_the_machine(account: Any) -> None:
    with zone("America/New_York"):
        account.update_plan(news_of(NEW, "first"))
        human = shown(account)[0]["resetsAtHuman"]

    assert human == "Sat, Nov 21, 08:24 AM"


def test_a_share_is_kept_while_later_lines_do_not_tell_it(account: Any, clock: FakeClock) -> None:
    account.update_plan(news_of(OLD, "warning"))
    clock.advance(60)

    account.update_plan(news_of(OLD, "back"))

    session = shown(account)[0]
    assert (session["utilization"], session["status"]) == (0.95, "allowed")
    assert session["observedAt"] == "2026-11-21T12:34:13.000Z"


def test_a_share_is_not_kept_for_the_next_window(account: Any) -> None:
    warning = news_of(OLD, "warning")
    account.update_plan(warning)

    window = ocp.PlanWindow(None, warning.windows["five_hour"].resets_at_s + 5 * 3_600, "allowed")
    account.update_plan(warning._replace(windows={"five_hour": window}))

    assert shown(account)[0]["utilization"] is None


@pytest.mark.parametrize("resets_at", [
    "2026-11-21T18:00:00.123456+00:00", "2026-11-21T17:59:59.871234+00:00"])
def test_a_share_that_was_asked_for_is_kept_when_a_line_tells_the_same_window(
    account: Any, resets_at: str
) -> None:
    limits = {"five_hour": {"utilization": 21.0, "resets_at": resets_at}}
    account.update_plan(ocp.plan_report({"response": {"response": {"rate_limits": limits}}}))

    # Lines of answers tell whole seconds.
    info = {"status": "allowed", "rateLimitType": "five_hour", "resetsAt": 1_795_284_000}
    account.update_plan(ocp.plan_event({"type": "rate_limit_event", "rate_limit_info": info}))

    assert (shown(account)[0]["utilization"], shown(account)[0]["status"]) == (0.21, "allowed")


def test_a_report_does_not_take_back_what_lines_told_of_the_status(account: Any) -> None:
    account.update_plan(news_of(NEW, "week decides"))
    reply = {"rate_limits": {"seven_day": {
        "utilization": 81, "resets_at": ocp.iso_time(1_795_696_453)}}}

    account.update_plan(ocp.plan_report({"response": {"response": reply}}))

    week = shown(account)[1]
    assert (week["utilization"], week["status"]) == (0.81, "allowed_warning")
    assert account.report()["status"] == "allowed_warning"


@each_version
def test_a_report_adds_the_windows_of_models_and_the_name(account: Any, version: str) -> None:
    account.update_plan(ocp.plan_report(LINES[version]["replies"]["login"]))

    plan = account.plan()
    assert set(plan["weeklyLimits"]) == {"allModels", "sonnet"}
    assert plan["weeklyLimits"]["sonnet"]["percent"] == "3%"
    assert plan["subscription"] == "max"


@each_version
def test_a_reply_that_knows_nothing_takes_nothing_back(account: Any, version: str) -> None:
    account.update_plan(ocp.plan_report(LINES[version]["replies"]["login"]))
    before = account.report()

    for name in ("bare token", "refused"):
        account.update_plan(ocp.plan_report(LINES[version]["replies"][name]))

    assert account.report() == before


@each_version
@pytest.mark.parametrize("name", ["no headers", "plain 429"])
def test_a_line_that_names_no_window_changes_nothing(
    account: Any, version: str, name: str
) -> None:
    account.update_plan(news_of(LINES[version], "first"))
    before = account.report()

    account.update_plan(news_of(LINES[version], name))

    assert account.report() == before


@pytest.mark.parametrize("claim", [5, None, ["five_hour"]])
def test_a_window_whose_name_is_no_text_changes_nothing(account: Any, claim: Json) -> None:
    info = {"status": "allowed", "rateLimitType": claim, "unifiedWindows": {"five_hour": {}}}
    before = account.report()

    account.update_plan(ocp.plan_event({"type": "rate_limit_event", "rate_limit_info": info}))

    assert account.report() == before


def test_after_its_reset_a_window_is_unknown_and_says_since_when(
    account: Any, clock: FakeClock
) -> None:
    account.update_plan(news_of(NEW, "first"))

    clock.now_s = FIVE_S - 1
    before = shown(account)[0]["utilization"]
    clock.now_s = FIVE_S
    session, week = shown(account)

    assert (before, week["utilization"]) == (0.21, 0.4)
    assert session == {**UNKNOWN, "observedAt": "2026-11-21T12:34:13.000Z"}


def test_what_claude_said_last_is_in_the_windows(account: Any) -> None:
    account.update_plan(news_of(NEW, "first"))

    window = account.windows()["five_hour"]
    assert window[:3] == (0.21, FIVE_S, "allowed")
    assert account.report()["plan"]["currentSession"]["observedAt"] == "2026-11-21T12:34:13.000Z"


def test_it_is_asked_once_a_minute_at_most(account: Any, clock: FakeClock) -> None:
    asked = [account.claim_plan_query()]
    # The last time the clock is set back.
    for seconds in (0, 59.9, 0.1, 30, 30, -86_400):
        clock.advance(seconds)
        asked.append(account.claim_plan_query())

    assert asked == [True, False, False, True, False, True, True]


# ---------------------------------------------------------------------------
# Extra usage
# ---------------------------------------------------------------------------

def event(**fields: Json) -> Any:
    """The report of an event whose five-hour window decides."""
    info = {"status": "rejected", "rateLimitType": "five_hour", "resetsAt": FIVE_S,
            "isUsingOverage": False, **fields}
    return ocp.plan_event({"type": "rate_limit_event", "rate_limit_info": info})


BILLED = {"overageStatus": "allowed", "isUsingOverage": True}


@pytest.mark.parametrize("name", ["isUsingOverage", "overageInUse"])
def test_an_answer_that_is_billed_as_extra_usage_is_no_limit(name: str) -> None:
    report = event(**{name: True})

    assert (report.is_overage, report.is_limit_reached, report.blocked_until_s) == (
        True, False, None)


@pytest.mark.parametrize("value", ["true", 1, None, {}])
def test_only_a_true_says_that_answers_are_billed(value: Json) -> None:
    assert event(isUsingOverage=value).is_overage is False


@pytest.mark.parametrize(("fields", "until_s"), [
    ({}, FIVE_S), ({"overageResetsAt": FIVE_S - 60}, FIVE_S - 60),
    ({"overageResetsAt": WEEK_S}, FIVE_S), ({"resetsAt": None, "overageResetsAt": WEEK_S}, WEEK_S),
    ({"dailyCapPaused": True}, None), ({"errorCode": "credits_required"}, None),
    ({"status": "allowed"}, None)])
def test_a_limit_ends_at_the_first_reset_unless_no_reset_ends_it(
    fields: Json, until_s: float | None
) -> None:
    assert event(**fields).blocked_until_s == until_s


@pytest.mark.parametrize("fields", [{"dailyCapPaused": True}, {"errorCode": "credits_required"}])
def test_a_pause_or_missing_credits_are_a_limit_even_without_a_window(fields: Json) -> None:
    assert event(rateLimitType=None, resetsAt=None, **fields).is_limit_reached


def asked(**limits: Json) -> Any:
    """The report of an answer to get_usage."""
    return ocp.plan_report({"response": {"response": {"rate_limits": limits}}})


@pytest.mark.parametrize(("currency", "used", "limit", "shown"), [
    ("USD", 1_234, 5_000, (12.34, 50.0, "USD")), ("eur", 1_234.5, None, (12.35, None, "EUR")),
    ("JPY", 1_234, 5_000, (1_234, 5_000, "JPY")), (None, 150, 200, (1.5, 2.0, None)),
    ("$$", "1", True, (None, None, None)), (7, -1, 10**350, (None, None, None))])
def test_the_budget_is_told_in_units_of_its_currency(
    account: Any, currency: Json, used: Json, limit: Json, shown: Json
) -> None:
    account.update_plan(asked(extra_usage={
        "is_enabled": True, "used_credits": used, "monthly_limit": limit, "utilization": 24.7,
        "currency": currency}))

    extra = account.plan()["extraUsage"]
    assert (extra["used"], extra["limit"], extra["currency"]) == shown
    assert (extra["enabled"], extra["utilization"]) == (True, 0.247)


def test_a_reply_without_a_budget_keeps_the_known_one(account: Any) -> None:
    account.update_plan(asked(extra_usage={"is_enabled": True, "used_credits": 100}))

    account.update_plan(asked(extra_usage=None))
    account.update_plan(event())

    assert account.plan()["extraUsage"]["used"] == 1.0


def test_the_week_of_a_single_model_stands_beside_that_of_all(account: Any) -> None:
    resets_at = ocp.iso_time(WEEK_S)
    account.update_plan(asked(
        seven_day={"utilization": 40, "resets_at": resets_at},
        seven_day_opus={"utilization": 93, "resets_at": resets_at},
        model_scoped=[{"display_name": "Fable", "utilization": 55, "resets_at": resets_at},
                      {"display_name": "Opus 5.5 (fast)", "utilization": None, "resets_at": None},
                      {"display_name": "--", "utilization": 1, "resets_at": None}, 7, None]))

    weekly = account.plan()["weeklyLimits"]
    assert {name: window["percent"] for name, window in weekly.items()} == {
        "allModels": "40%", "opus": "93%", "fable": "55%", "opus_5_5_fast": None}


@pytest.mark.parametrize("rows", [None, 7, "x", {"a": 1}, [[]], [{"display_name": 7}]])
def test_windows_of_models_that_are_none_are_left_out(rows: Json) -> None:
    assert asked(model_scoped=rows).windows == {}


def test_a_reply_has_windows_of_sixteen_models_at_most() -> None:
    rows = [{"display_name": f"m{number}", "utilization": 1} for number in range(40)]

    assert len(asked(model_scoped=rows).windows) == 16


@pytest.mark.parametrize(("told", "enabled", "state"), [
    ({"overageStatus": "rejected"}, True, "off"), ({"overageStatus": "allowed"}, False, "on"),
    ({"overageStatus": "allowed_warning"}, None, "on"), ({"overageStatus": None}, True, "on"),
    ({"overageStatus": None}, False, "off"), ({"overageStatus": None}, None, None),
    ({"overageStatus": "rejected", "isUsingOverage": True}, True, "billed")])
def test_one_field_says_whether_there_is_extra_usage(
    account: Any, told: Json, enabled: bool | None, state: str | None
) -> None:
    account.update_plan(event(**told))
    if enabled is not None:
        account.update_plan(asked(extra_usage={"is_enabled": enabled}))

    assert account.plan()["extraUsage"]["state"] == state


def is_stopped(account: Any, model: str | None = "sonnet") -> bool:
    try:
        account.check_not_billed(model)
    except ocp.ExtraUsageStopped:
        return True
    return False


def test_billed_answers_are_told_until_the_window_resets(account: Any, clock: FakeClock) -> None:
    account.update_plan(event(**BILLED), "sonnet")
    before = (account.plan()["extraUsage"]["inUse"], is_stopped(account), is_stopped(account, None))

    clock.now_s = FIVE_S

    assert before == (True, True, True)
    assert (account.plan()["extraUsage"]["inUse"], is_stopped(account)) == (False, False)


def test_a_stopped_request_is_told_why_until_when_and_how_to_go_on(account: Any) -> None:
    account.update_plan(event(**BILLED), "sonnet")

    with pytest.raises(ocp.ExtraUsageStopped) as stopped:
        account.check_not_billed("sonnet")

    message = stopped.value.message
    assert "five_hour" in message and "2026-11-21 13:24 UTC" in message
    assert "`ocp settings extraUsage allow`" in message
    assert stopped.value.headers() == {"Retry-After": "3000", "x-should-retry": "false"}


def test_without_a_known_reset_billed_answers_are_told_for_five_hours(
    account: Any, clock: FakeClock
) -> None:
    account.update_plan(event(rateLimitType=None, resetsAt=None, **BILLED), "sonnet")

    clock.advance(5 * 3_600 - 1)
    before = is_stopped(account)
    clock.advance(1)

    assert (before, is_stopped(account)) == (True, False)


@pytest.mark.parametrize(("later", "still"), [
    ({"status": "allowed"}, False), ({"status": "allowed", "rateLimitType": "seven_day"}, False),
    ({"status": "allowed", "rateLimitType": None, "resetsAt": None}, True),
    ({"status": "allowed", "rateLimitType": "seven_day_opus"}, True)])
def test_a_report_of_the_plan_ends_extra_usage_and_one_of_less_does_not(
    account: Any, later: Json, still: bool
) -> None:
    account.update_plan(event(**BILLED), "sonnet")
    account.update_plan(event(**later), "sonnet")

    assert is_stopped(account) == still


def test_the_answer_to_a_question_about_usage_ends_no_extra_usage(account: Any) -> None:
    account.update_plan(event(**BILLED), "sonnet")
    account.update_plan(asked(five_hour={"utilization": 100, "resets_at": ocp.iso_time(FIVE_S)}))

    assert is_stopped(account)


@pytest.mark.parametrize("claim", ["seven_day_opus", "seven_day_overage_included"])
def test_the_week_of_one_model_stops_that_model_only(account: Any, claim: str) -> None:
    account.update_plan(event(rateLimitType=claim, **BILLED), "opus")
    account.update_plan(event(status="allowed"), "sonnet")

    assert [is_stopped(account, model) for model in ("opus", "sonnet", None)] == [
        True, False, False]
    account.update_plan(event(status="allowed", rateLimitType=claim), "opus")
    assert not is_stopped(account, "opus")


@pytest.mark.parametrize(("claim", "others"), [
    ("seven_day_opus", True), ("seven_day_overage_included", False), ("seven_day_fast", False)])
def test_the_week_of_a_family_stops_all_its_models_and_that_of_one_any_window_of_it(
    account: Any, claim: str, others: bool
) -> None:
    account.update_plan(event(rateLimitType=claim, **BILLED), "claude-opus-5-5[1m]")

    names = ("claude-opus-5-5", "claude-opus-5-5[1m]", "claude-opus-4-8", "claude-sonnet-5-5")
    assert [is_stopped(account, name) for name in names] == [True, True, others, False]


# ---------------------------------------------------------------------------
# The spares that are asked
# ---------------------------------------------------------------------------

class Idle:
    """A process that waits."""

    def __init__(self, model_id: str, born_s: float) -> None:
        self.model_id = self.kind = model_id
        self.login = ocp.SERVER_LOGIN
        self.born_s = born_s
        self.is_primed = False
        self.is_dismissed = False

    def alive(self) -> bool:
        return not self.is_dismissed

    def drain_output(self) -> None:
        """It says nothing."""

    def stop(self, *, graceful: bool) -> None:
        self.is_dismissed = True

    def is_gone(self) -> bool:
        return self.is_dismissed


@pytest.fixture
def pool(clock: FakeClock) -> Any:
    """A pool in which one spare waits."""
    found = ocp.ProcessPool(lambda model_id: Idle(model_id, clock()), clock)
    found.mark_used("sonnet")
    clock.advance(1)
    tend(found)
    assert found.spares() == {"sonnet": 1}
    return found


def tend(pool: Any) -> None:
    """What the housekeeper does."""
    pool.tend(ocp.Config())
    pool.refill(ocp.Config())


def test_no_spare_is_started_for_one_that_is_asked(pool: Any, clock: FakeClock) -> None:
    asked = pool.take_any_spare()
    clock.advance(7)
    tend(pool)
    meanwhile = pool.spares()

    pool.put_spare(asked)
    clock.advance(2)
    tend(pool)

    assert (meanwhile, pool.spares(), pool.spawned) == ({}, {"sonnet": 1}, 1)


def test_a_spare_that_does_not_come_back_is_replaced_after_the_next_use(
    pool: Any, clock: FakeClock
) -> None:
    pool.stop(pool.take_any_spare(), graceful=False)
    pool.mark_used("sonnet")
    clock.advance(1)

    tend(pool)

    assert (pool.spares(), pool.spawned) == ({"sonnet": 1}, 2)


def test_there_are_as_many_spares_as_before_when_one_was_asked(
    pool: Any, clock: FakeClock
) -> None:
    asked = pool.take_any_spare()
    # Meanwhile somebody has an answer of this model.
    pool.mark_used("sonnet")
    clock.advance(1)
    tend(pool)
    assert pool.spares() == {"sonnet": 1}

    pool.put_spare(asked)
    tend(pool)

    assert pool.spares() == {"sonnet": 1}


def test_a_spare_whose_kind_was_dropped_while_it_was_asked_does_not_come_back(
    pool: Any,
) -> None:
    asked = pool.take_any_spare()

    # The program or its login has changed.
    pool.drop()
    pool.put_spare(asked)

    assert pool.spares() == {} and asked.is_dismissed
