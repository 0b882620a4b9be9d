"""Alerts: what a webhook is told, in which form, how often, and what becomes of it if it fails."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chat import CHAT_PATH, NO_IDLE, ask, question
from clock import FakeClock
from http_client import Reply
from keys import ADMIN_KEY, MULTI, bearer
from project import free_port, load_script
from server import Server, run_server, running_server
from tls_files import write_tls_files
from waiting import eventually
from webhook import Manner, Webhook, running_webhook

ocp = load_script("ocp_server.py")

Json = Any

ADMIN = bearer(ADMIN_KEY)
NOW_S = 1_800_000_000.0
HOUR_S = 3_600.0


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with running_webhook() as running:
        yield running


# ---------------------------------------------------------------------------
# In this process, with a clock that the test sets
# ---------------------------------------------------------------------------


class Desk:
    """Alerts on a database, an account and a clock of their own."""

    def __init__(self, database: Path, url: str, now_s: float = NOW_S, **settings: str) -> None:
        self.clock = FakeClock(now_s)
        self.store = ocp.Store(str(database))
        self.log = ocp.Log(io.StringIO(), "debug")
        config = ocp.Config(alert_url=url, **settings)
        self.settings = ocp.Settings(self.store, config, ocp.Environment({}, "", {}))
        self.account = ocp.Account(self.clock)
        self.alerts = ocp.Alerts(self.store, self.log, self.settings, self.clock)

    def look(self, is_claude_gone: Any = None) -> None:
        """What the housekeeper does once in a while; waits for the deliveries."""
        self.alerts.watch(self.account, is_claude_gone)
        self.alerts.tend()
        eventually(lambda: not self.alerts._is_sending)

    def set_window(self, name: str, used: float, resets_s: Any = NOW_S + HOUR_S) -> None:
        window = ocp.PlanWindow(used, resets_s)
        self.account.update_plan(ocp.PlanReport({name: window}, "allowed", name))

    def told(self) -> list[str]:
        """The titles of the alerts, oldest first."""
        return [each["title"] for each in reversed(self.alerts.report())]

    @property
    def last(self) -> Json:
        return self.alerts.report()[0]


@pytest.fixture
def desk(tmp_path: Path, webhook: Webhook) -> Iterator[Desk]:
    made = Desk(tmp_path / "ocp.db", webhook.url)
    yield made
    made.store.close()


# -- when ---------------------------------------------------------------------


def test_a_window_is_told_once_from_80_and_once_from_95_percent(desk: Desk) -> None:
    for used in (0.5, 0.79, 0.8, 0.81, 0.94, 0.95, 0.99, 1.0, 1.2):
        desk.set_window("five_hour", used)
        desk.look()

    assert desk.told() == [
        "80 % of the plan's five hours is used", "95 % of the plan's five hours is used"]


def test_a_window_that_fills_at_once_is_told_once(desk: Desk) -> None:
    for used in (0.97, 0.949, 0.98):
        desk.set_window("seven_day", used)
        desk.look()

    assert desk.told() == ["97 % of the plan's week is used"]


def test_each_window_is_told_by_its_name(desk: Desk) -> None:
    for name in ("five_hour", "seven_day", "seven_day_opus", "seven_day_sonnet_5_5"):
        desk.set_window(name, 0.85)
        desk.look()

    assert desk.told() == [f"85 % of the plan's {words} is used" for words in (
        "five hours", "week", "week of opus", "week of sonnet 5 5")]


def test_the_next_window_is_told_anew(desk: Desk) -> None:
    desk.set_window("five_hour", 0.9)
    desk.look()
    desk.clock.advance(HOUR_S + 61)
    desk.set_window("five_hour", 0.85, desk.clock.now_s + 5 * HOUR_S)
    desk.look()

    assert len(desk.told()) == 2


@pytest.mark.parametrize("shift_s", [-59, 59])
def test_a_reset_that_is_reported_a_little_differently_is_the_same(
    desk: Desk, shift_s: float
) -> None:
    desk.set_window("five_hour", 0.9)
    desk.look()
    desk.set_window("five_hour", 0.91, NOW_S + HOUR_S + shift_s)
    desk.look()
    desk.clock.advance(HOUR_S + shift_s - 1)
    desk.look()

    assert len(desk.told()) == 1


def test_a_window_that_was_reset_early_is_told_anew(desk: Desk) -> None:
    for used in (0.9, 0.1, 0.85):
        desk.set_window("seven_day", used, NOW_S + 100 * HOUR_S)
        desk.look()

    assert len(desk.told()) == 2


def test_a_window_without_a_known_reset_is_told_once_until_it_is_used_less(desk: Desk) -> None:
    for used in (0.9, 0.9, 0.91, 0.1, 0.9):
        desk.clock.advance(24 * HOUR_S)
        desk.set_window("five_hour", used, None)
        desk.look()

    assert len(desk.told()) == 2
    assert "It is not known when that resets." in desk.last["text"]


def test_a_lost_login_is_told_once_and_so_is_its_return(desk: Desk) -> None:
    for state in (None, False, False, None, False, True, True, False):
        desk.account.set_login(state)
        desk.look()

    assert [each["event"] for each in desk.alerts.report()] == [
        "login_lost", "login_back", "login_lost"]


def test_a_lost_login_of_keys_is_told_by_their_names_and_beside_the_servers(desk: Desk) -> None:
    own = ocp.Account(desk.clock)
    for state in (None, False, False, True, False):
        own.set_login(state)
        desk.alerts.watch_login("0123", ["anna's phone", "anna"], own)
        desk.look()
    desk.account.set_login(False)
    desk.look()

    told = list(reversed(desk.alerts.report()))
    assert [each["event"] for each in told] == [
        "key_login_lost", "key_login_back", "key_login_lost", "login_lost"]
    assert "`ocp keys login 'anna'\"'\"'s phone'`" in told[0]["text"]
    assert told[1]["details"] == {"login": "0123", "keys": ["anna's phone", "anna"]}


def test_a_missing_claude_is_told_once_and_so_is_its_return(desk: Desk) -> None:
    for is_gone in (None, True, True, None, True, False, False):
        desk.look(is_gone)

    assert [each["event"] for each in desk.alerts.report()] == ["claude_back", "claude_missing"]


def test_what_was_well_from_the_start_is_not_told(desk: Desk) -> None:
    desk.account.set_login(True)
    desk.look(False)

    assert desk.told() == []


def bill(desk: Desk, claim: str, resets_s: Any) -> None:
    desk.account.update_plan(ocp.PlanReport(
        {}, "rejected", claim, resets_s, "allowed", is_overage=True), "claude-opus-4-7")


def test_billed_answers_are_told_once_for_each_window(desk: Desk) -> None:
    for claim in ("five_hour", "five_hour", "seven_day"):
        bill(desk, claim, NOW_S + HOUR_S)
        desk.clock.advance(10)
        desk.look()
    desk.clock.advance(2 * HOUR_S)
    bill(desk, "five_hour", desk.clock.now_s + HOUR_S)
    desk.look()

    assert [each["details"]["window"] for each in reversed(desk.alerts.report())] == [
        "five_hour", "seven_day", "five_hour"]


def test_billed_answers_whose_window_is_not_known_are_told_once(desk: Desk) -> None:
    for _ in range(3):
        bill(desk, "five_hour", None)
        desk.look()
        desk.clock.advance(HOUR_S)

    assert len(desk.told()) == 1


def level(word: str, **fields: Any) -> Any:
    return ocp.QuotaLevel(**{
        "key_id": 3, "quota": "daily", "model": "", "level": word, "used": 161, "limit": 200,
        "resets_s": NOW_S + HOUR_S, "key_name": "laptop", **fields})


def test_a_key_is_told_at_its_warning_level_and_at_its_limit(desk: Desk) -> None:
    for found in (level("soft"), level("soft"), level("limit", used=200), level("limit")):
        desk.alerts.take_level(found)
        desk.look()

    first, second = reversed(desk.alerts.report())
    assert first["title"] == "the key laptop has reached its warning level (daily requests)"
    assert "has used 161 of its 200 requests (daily)" in first["text"]
    assert second["title"] == "the key laptop has reached its limit (daily requests)"
    assert "Its requests are refused until then." in second["text"]
    assert second["details"] == {
        "key": "laptop", "keyId": 3, "quota": "daily", "model": None, "level": "limit",
        "used": 200, "limit": 200, "resetsAt": ocp.iso_time(NOW_S + HOUR_S)}


def test_a_request_that_may_use_more_than_is_left_is_no_limit_that_is_reached(
    desk: Desk,
) -> None:
    desk.alerts.take_level(level(
        "limit", quota="usdDaily", model="claude-opus-5-5", used=0.0123, limit=0.5,
        key_name="Anna's laptop"))
    desk.look()

    assert desk.last["title"] == (
        "the key Anna's laptop has reached its limit for a request (daily USD at list price with "
        "claude-opus-5-5)")
    text = desk.last["text"]
    assert "has used 0.0123 of its 0.5000 USD at list price (daily) with" in text
    assert "A request that may use more was refused." in text
    assert "Its requests are refused" not in text
    command = re.findall("`(.*)`", text)[0]
    assert shlex.split(command) == ["ocp", "keys", "quota", "Anna's laptop"]


def test_a_budget_is_told_in_money_and_of_its_model(desk: Desk) -> None:
    desk.alerts.take_level(level(
        "soft", quota="usdWeekly", model="claude-opus-4-7", used=2.412345, limit=2.5))
    desk.look()

    assert desk.last["text"].startswith(
        "The key laptop has used 2.41 of its 2.50 USD at list price (weekly) with "
        "claude-opus-4-7. That resets in 1h 0m (")


@pytest.mark.parametrize("other", [
    {"key_id": 4}, {"quota": "weekly"}, {"model": "claude-opus-4-7"}, {"limit": 300},
])
def test_another_limit_is_told_for_itself(desk: Desk, other: dict[str, Any]) -> None:
    for found in (level("soft"), level("soft", **other)):
        desk.alerts.take_level(found)
        desk.look()

    assert len(desk.told()) == 2


def test_the_same_limit_is_told_again_in_its_next_period(desk: Desk) -> None:
    desk.alerts.take_level(level("limit"))
    desk.look()
    desk.clock.advance(HOUR_S + 1)
    desk.alerts.take_level(level("limit", resets_s=desk.clock.now_s + 24 * HOUR_S))
    desk.look()

    assert len(desk.told()) == 2


def test_nothing_is_raised_without_a_webhook_and_what_holds_is_once_there_is_one(
    tmp_path: Path, webhook: Webhook
) -> None:
    desk = Desk(tmp_path / "ocp.db", "")
    desk.set_window("five_hour", 0.9)
    desk.look(True)
    before = desk.told()
    desk.settings.change("alertUrl", webhook.url)
    desk.look(True)
    desk.store.close()

    assert before == []
    assert webhook.events() == ["plan_window", "claude_missing"]


def test_a_restart_repeats_nothing(tmp_path: Path, webhook: Webhook) -> None:
    def live() -> Desk:
        desk = Desk(tmp_path / "ocp.db", webhook.url)
        desk.set_window("five_hour", 0.9)
        desk.account.set_login(False)
        bill(desk, "seven_day", NOW_S + HOUR_S)
        desk.alerts.take_level(level("limit"))
        desk.look(True)
        desk.store.close()
        return desk

    first, second = live(), live()

    assert len(first.told()) == len(webhook.taken) == 5
    assert second.alerts.report() == first.alerts.report()


def test_what_waits_is_sent_at_once_after_a_restart(tmp_path: Path, webhook: Webhook) -> None:
    desk = Desk(tmp_path / "ocp.db", f"http://127.0.0.1:{free_port()}/")
    desk.look(True)
    waiting = desk.last
    desk.store.close()
    again = Desk(tmp_path / "ocp.db", webhook.url)
    again.look(True)
    again.store.close()

    assert (waiting["state"], waiting["problem"]) == ("waiting", "nothing listens at its address")
    assert (again.last["state"], again.last["problem"], again.last["attempts"]) == (
        "delivered", None, 2)
    assert webhook.events() == ["claude_missing"]


# -- how it is delivered ------------------------------------------------------


def test_a_delivery_that_fails_is_tried_five_times_in_an_hour(
    desk: Desk, webhook: Webhook
) -> None:
    webhook.manners = [500]
    tries_s = []
    for _ in range(75):
        before = len(webhook.taken)
        desk.look(True)
        tries_s += [desk.clock.now_s - NOW_S] * (len(webhook.taken) - before)
        desk.clock.advance(60)

    assert tries_s == [0, 60, 360, 1260, 3660]
    assert (desk.last["state"], desk.last["attempts"], desk.last["nextTryAt"]) == ("lost", 5, None)
    assert desk.last["problem"] == "it failed itself (status 500)"
    logged = [each["event"] for each in desk.log.recent(20, "all")]
    assert logged == ["alert_raised", *["alert_not_delivered"] * 4, "alert_lost"]


def test_a_delivery_that_succeeds_later_is_over(desk: Desk, webhook: Webhook) -> None:
    webhook.manners = [503, "close", 200]
    for _ in range(12):
        desk.look(True)
        desk.clock.advance(60)

    assert len(webhook.taken) == 3
    assert (desk.last["state"], desk.last["attempts"], desk.last["problem"]) == (
        "delivered", 3, None)


def test_a_clock_that_is_set_back_does_not_hold_an_alert_back(
    desk: Desk, webhook: Webhook
) -> None:
    webhook.manners = [503, 204]
    desk.look(True)
    desk.clock.advance(-24 * HOUR_S)
    desk.look(True)

    assert (desk.last["state"], len(webhook.taken)) == ("delivered", 2)


def test_a_webhook_may_ask_for_a_longer_pause(desk: Desk, webhook: Webhook) -> None:
    webhook.manners, webhook.headers = [429, 204], {"Retry-After": "200.5"}
    desk.look(True)
    waits = desk.last
    desk.clock.advance(199)
    desk.look(True)
    too_early = len(webhook.taken)
    desk.clock.advance(2)
    desk.look(True)

    assert waits["nextTryAt"] == ocp.iso_time(NOW_S + 200.5)
    assert (too_early, len(webhook.taken)) == (1, 2)


@pytest.mark.parametrize(("manner", "words"), [
    (400, "it does not take the message: is alertFormat right, and the chat_id of Telegram? "
     "(status 400)"),
    (401, "it refuses the address: is its token right? (status 401)"),
    (403, "it refuses the address: is its token right? (status 403)"),
    (404, "it does not know the address: was the webhook deleted? (status 404)"),
    (410, "it does not know the address: was the webhook deleted? (status 410)"),
    (415, "it does not take the message (status 415)"),
    (429, "it takes no more for a while (status 429)"),
    (500, "it failed itself (status 500)"), (599, "it failed itself (status 599)"),
    ("redirect", "it redirects, which is not followed because the address may hold a secret: set "
     "the final address (status 307)"),
    ("close", "it ended the connection without an answer"),
    ("garbage", "it ended the connection without an answer"),
    ("hang", "it did not answer in time"), ("drip", "it did not answer in time"),
])
def test_a_failure_is_told_in_words(
    webhook: Webhook, manner: Manner, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocp, "_DELIVERY_TIMEOUT_S", 0.5 if isinstance(manner, str) else 20.0)
    webhook.manners = [manner]

    assert ocp.deliver(webhook.url, "json", BODY).problem == words
    # A redirect in particular is not followed.
    assert [each.method for each in webhook.taken] == ["POST"]


@pytest.mark.parametrize(("url", "words"), [
    ("http://127.0.0.1:{port}/", "nothing listens at its address"),
    ("http://nowhere.invalid/", "the name of its host is not known"),
    (f"http://{'x' * 70}/", "the name of its host is not known"),
])
def test_a_webhook_that_cannot_be_reached_is_told_in_words(url: str, words: str) -> None:
    assert ocp.deliver(url.format(port=free_port()), "json", BODY) == (None, words, 0.0)


def test_an_address_of_ipv6_is_one() -> None:
    assert ocp.deliver("http://[::1]/", "json", BODY).problem in (
        "nothing listens at its address", "it cannot be reached")


def test_a_certificate_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_tls_files(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["OCP_TLS_CERT"], files["OCP_TLS_KEY"])
    with running_webhook(tls=context) as webhook:
        url = webhook.url.replace("http://", "https://")
        refused = ocp.deliver(url, "json", BODY)
        monkeypatch.setenv("SSL_CERT_FILE", files["OCP_TLS_CERT"])
        taken = ocp.deliver(url, "json", BODY)

    assert refused.problem == "its certificate cannot be verified"
    assert (taken.status, taken.problem) == (204, "")


def test_a_webhook_without_tls_is_no_https_one(webhook: Webhook) -> None:
    url = webhook.url.replace("http://", "https://")

    assert ocp.deliver(url, "json", BODY).problem == "it does not speak https"


def test_the_address_is_used_as_it_is_and_a_login_in_it_becomes_a_header(
    webhook: Webhook
) -> None:
    ocp.deliver(webhook.url.replace("//", "//me%40home:pass@", 1), "json", BODY)

    [taken] = webhook.taken
    assert taken.path == "/hooks/s3cret-path?token=s3cret-query"
    assert taken.headers["Authorization"] == "Basic " + base64.b64encode(
        b"me@home:pass").decode()
    assert "me" not in taken.headers["Host"]


def test_a_webhook_that_hangs_keeps_nobody_waiting(desk: Desk, webhook: Webhook) -> None:
    webhook.manners = ["hang"]
    desk.alerts.watch(desk.account, True)
    begun_s = time.monotonic()
    for _ in range(100):
        desk.alerts.tend()
        desk.alerts.watch(desk.account, True)
    eventually(lambda: webhook.taken)

    assert time.monotonic() - begun_s < ocp._DELIVERY_TIMEOUT_S / 2
    assert len(webhook.taken) == 1, "one thread delivers"
    webhook.is_over.set()
    eventually(lambda: not desk.alerts._is_sending)


def test_only_so_many_alerts_wait_and_are_kept(desk: Desk, webhook: Webhook) -> None:
    webhook.manners = [500]
    for number in range(600):
        desk.alerts.take_level(level("soft", key_id=number))
        desk.alerts.watch(desk.account, None)
    rows = desk.store.rows("SELECT state, problem FROM alerts")

    assert sum(row["state"] == "waiting" for row in rows) == 50
    assert {row["problem"] for row in rows} == {"", "too many alerts were waiting"}
    assert len(rows) <= 501
    assert len(desk.alerts.report()) == 50


def test_alerts_that_nobody_takes_are_bounded(desk: Desk) -> None:
    for number in range(1000):
        desk.alerts.take_level(level("soft", key_id=number))
    desk.alerts.watch(desk.account, None)

    assert len(desk.told()) == 50


def test_a_database_that_is_locked_stops_no_alert(
    desk: Desk, webhook: Webhook, tmp_path: Path
) -> None:
    other = ocp.Store(str(tmp_path / "ocp.db"))
    with other.transaction():
        desk.look(True)
        sent = list(webhook.events())
    other.close()
    desk.store.write_queued()

    assert sent == ["claude_missing"]
    [row] = desk.store.rows("SELECT state FROM alerts")
    assert row["state"] == "delivered"


def test_of_two_changes_at_once_the_row_has_both(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.alerts.watch(desk.account, True)
    is_first, other_wrote = threading.Event(), threading.Event()
    write = desk.store.write_or_queue

    def slow_at_first(*statement: Any, **more: Any) -> None:
        if not is_first.is_set():
            is_first.set()
            other_wrote.wait(0.5)
            write(*statement, **more)
        else:
            write(*statement, **more)
            other_wrote.set()

    monkeypatch.setattr(desk.store, "write_or_queue", slow_at_first)
    slow = threading.Thread(target=desk.alerts._change, args=(1,), kwargs={"until_s": NOW_S})
    slow.start()
    is_first.wait(10)
    desk.alerts._change(1, state="delivered")
    slow.join()

    [row] = desk.store.rows("SELECT state, until_s FROM alerts")
    assert tuple(row) == ("delivered", NOW_S)


def test_a_flaw_of_a_form_ends_no_thread_and_tells_no_address(
    desk: Desk, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(alert: Json) -> Json:
        raise RuntimeError(webhook.url)

    monkeypatch.setitem(ocp._FORMATS, "json", fail)
    desk.look(True)
    monkeypatch.undo()
    desk.clock.advance(60)
    desk.look(True)

    assert desk.last["state"] == "delivered"
    [logged] = [each for each in desk.log.recent(9, "all") if each["event"] == "alert_failed"]
    assert logged["error"] == "RuntimeError"


# -- the forms ----------------------------------------------------------------

BODY = {
    "event": "claude_missing", "instance": "K\u00fcche & <Bad>",
    "at": "2026-12-01T00:00:00.000Z", "title": "claude cannot be started",
    "text": "Run `ocp doctor` & wait. @everyone", "details": {},
}


class Form(NamedTuple):
    """What a service documents of the request that it takes."""

    content_type: str
    body: Json
    headers: dict[str, str] = {}


FORMS = {
    "json": Form("application/json", BODY),
    "slack": Form("application/json", {
        "text": "*K\u00fcche &amp; &lt;Bad&gt;: claude cannot be started*\n"
        "Run `ocp doctor` &amp; wait. @everyone"}),
    "discord": Form("application/json", {
        "content": "**K\u00fcche & <Bad>: claude cannot be started**\n"
        "Run `ocp doctor` & wait. @everyone", "allowed_mentions": {"parse": []}}),
    "ntfy": Form(
        "text/plain; charset=utf-8", "Run `ocp doctor` & wait. @everyone",
        {"Priority": "high", "Tags": "warning", "Title": "=?UTF-8?B?" + base64.b64encode(
            "K\u00fcche & <Bad>: claude cannot be started".encode()).decode() + "?="}),
    "telegram": Form("application/json", {
        "text": "K\u00fcche & <Bad>: claude cannot be started\nRun `ocp doctor` & wait. @everyone",
        "link_preview_options": {"is_disabled": True}}),
}


@pytest.mark.parametrize("name", FORMS)
def test_an_alert_has_the_form_that_the_service_documents(webhook: Webhook, name: str) -> None:
    form = FORMS[name]

    assert ocp.deliver(webhook.url, name, BODY).problem == ""

    [taken] = webhook.taken
    text = taken.body.decode()
    assert taken.headers["Content-Type"] == form.content_type
    assert (json.loads(text) if "json" in form.content_type else text) == form.body
    assert {name: taken.headers[name] for name in form.headers} == form.headers
    assert taken.headers["User-Agent"] == f"OCP/{ocp.VERSION}"


def test_every_format_that_can_be_set_has_a_form() -> None:
    [row] = [row for name, row in ocp.live_settings().items() if name == "alertFormat"]

    assert set(row.metadata["choices"]) == set(ocp._FORMATS) == set(FORMS)


@pytest.mark.parametrize(("name", "field", "most"), [
    ("discord", "content", 2000), ("telegram", "text", 4096),
])
def test_a_long_alert_is_cut_to_what_the_service_takes(
    webhook: Webhook, name: str, field: str, most: int
) -> None:
    ocp.deliver(webhook.url, name, {**BODY, "text": "x" * 5000})

    assert len(webhook.taken[0].json()[field]) == most


def test_ntfy_gets_a_plain_title_as_it_is_and_good_news_without_haste(webhook: Webhook) -> None:
    ocp.deliver(webhook.url, "ntfy", {**BODY, "event": "claude_back", "instance": "OCP"})

    headers = webhook.taken[0].headers
    assert (headers["Title"], headers["Priority"], headers["Tags"]) == (
        "OCP: claude cannot be started", "default", "white_check_mark")


# ---------------------------------------------------------------------------
# A whole server
# ---------------------------------------------------------------------------


def env_of(webhook: Webhook, **more: str) -> dict[str, str]:
    return {**NO_IDLE, "OCP_ALERT_URL": webhook.url, **more}


def alerts_of(server: Server) -> Json:
    reply = server.call("GET", "/api/alerts", headers=ADMIN)
    assert reply.status == 200, reply
    return reply.json()


def test_a_plan_that_fills_up_is_told(tmp_path: Path, webhook: Webhook) -> None:
    resets_s = int(time.time()) + 7_000
    windows = {"five_hour": {"utilization": 0.83, "resetsAt": resets_s, "status": "allowed"},
               "seven_day_opus": {"utilization": 0.96, "resetsAt": resets_s + 100_000}}
    turns = [[{"say": "Hello."}, {"finish": "end_turn",
                                  "rate_limit_info": {"unifiedWindows": windows}}]]
    env = env_of(webhook, OCP_INSTANCE_NAME="kitchen")
    with running_server(tmp_path, turns, env=env) as server:
        assert ask(server).status == 200
        eventually(lambda: len(webhook.taken) == 2)
        alerts = eventually(lambda: all(
            each["state"] == "delivered" for each in alerts_of(server)["alerts"]
        ) and alerts_of(server)["alerts"])

    first, second = (taken.json() for taken in webhook.taken)
    assert list(first) == ["event", "instance", "at", "title", "text", "details"]
    assert (first["event"], first["instance"], first["details"]) == ("plan_window", "kitchen", {
        "window": "five_hour", "percent": 83, "level": 80, "resetsAt": ocp.iso_time(resets_s)})
    assert first["text"].startswith("83 % of the plan's five hours is used. That resets in 1h ")
    assert second["details"]["level"] == 95
    assert [{name: each[name] for name in first} for each in alerts] == [second, first]


def test_extra_usage_is_told_when_it_begins(tmp_path: Path, webhook: Webhook) -> None:
    billed = {"status": "rejected", "overageStatus": "allowed", "isUsingOverage": True}
    turns = [[{"say": "Hello."}, {"finish": "end_turn", "rate_limit_info": billed}]]
    with running_server(tmp_path, turns, env=env_of(webhook)) as server:
        for _ in range(2):
            assert ask(server).status == 200
            eventually(lambda: webhook.taken)

    assert webhook.events() == ["extra_usage"]
    assert "`ocp settings extraUsage stop`" in webhook.taken[0].json()["text"]


def test_a_login_that_is_lost_and_comes_back_is_told(tmp_path: Path, webhook: Webhook) -> None:
    refused = [{"api_error": {"status": 401, "word": "authentication_failed", "text": "no"}}]
    with running_server(tmp_path, [refused], env=env_of(webhook)) as server:
        assert ask(server).status == 401
        eventually(lambda: webhook.events() == ["login_lost"])
        server.write_scenario([[{"say": "back"}]])
        assert ask(server).status == 200
        eventually(lambda: webhook.events() == ["login_lost", "login_back"])

    assert "claude auth login" in webhook.taken[0].json()["text"]


def test_a_missing_claude_and_its_return_are_told(tmp_path: Path, webhook: Webhook) -> None:
    program = tmp_path / "not-yet" / "claude"
    with running_server(tmp_path / "server", claude=program, env=env_of(webhook)) as server:
        eventually(lambda: webhook.events() == ["claude_missing"])
        program.parent.mkdir()
        shutil.copy2(server.place.claude, program)
        assert eventually(lambda: webhook.events() == ["claude_missing", "claude_back"], 60)


def test_a_key_that_reaches_its_levels_is_told_once(tmp_path: Path, webhook: Webhook) -> None:
    env = env_of(webhook, **MULTI)
    with running_server(tmp_path, env=env) as server:
        made = server.call("POST", "/api/keys", {
            "name": "laptop", "softPercent": 50, "quota": {"daily": 3}}, ADMIN).json()
        asked = [server.call("POST", CHAT_PATH, question(str(number)), bearer(made["key"])).status
                 for number in range(5)]
        eventually(lambda: len(webhook.taken) == 2)
    with running_server(tmp_path, env=env) as server:
        asked.append(server.call("POST", CHAT_PATH, question(), bearer(made["key"])).status)
        server.call("POST", "/api/alerts/test", headers=ADMIN)

    assert asked == [200, 200, 200, 429, 429, 429]
    first, second, test = (taken.json() for taken in webhook.taken)
    assert [each["details"]["level"] for each in (first, second)] == ["soft", "limit"]
    assert (second["details"]["key"], second["details"]["used"]) == ("laptop", 3)
    assert test["event"] == "test"


@pytest.mark.parametrize("manner", ["hang", "drip"])
def test_no_request_and_no_housekeeping_waits_for_a_slow_webhook(
    tmp_path: Path, webhook: Webhook, manner: str
) -> None:
    webhook.manners = [manner]
    refused = [{"api_error": {"status": 401, "word": "authentication_failed", "text": "no"}}]
    with running_server(tmp_path, [refused], env=env_of(webhook)) as server:
        assert ask(server).status == 401
        eventually(lambda: webhook.taken)
        server.write_scenario([[{"say": "back"}]])
        begun_s = time.monotonic()
        assert ask(server).status == 200
        # The housekeeper still looks: it has raised the next alert.
        eventually(lambda: len(alerts_of(server)["alerts"]) == 2)
        took_s = time.monotonic() - begun_s

    assert took_s < ocp._DELIVERY_TIMEOUT_S * 0.8
    assert len(webhook.taken) == 1


def test_an_alert_between_two_servers_is_delivered_by_the_second(tmp_path: Path) -> None:
    port = free_port()
    env = {**NO_IDLE, "OCP_ALERT_URL": f"http://127.0.0.1:{port}/hook"}
    refused = [{"api_error": {"status": 401, "word": "authentication_failed", "text": "no"}}]
    with running_server(tmp_path, [refused], env=env) as server:
        assert ask(server).status == 401
        eventually(lambda: [each["attempts"] for each in alerts_of(server)["alerts"]] == [1])
        server.kill()
    with running_webhook(port) as webhook, running_server(tmp_path, [refused], env=env) as server:
        eventually(lambda: webhook.events() == ["login_lost"])
        assert ask(server).status == 401
        eventually(lambda: alerts_of(server)["alerts"][0]["state"] == "delivered")
        health = server.call("GET", "/health").json()

    assert health["auth"]["ok"] is False
    assert webhook.events() == ["login_lost"]


def test_a_test_tells_how_it_went(tmp_path: Path, webhook: Webhook) -> None:
    webhook.manners = [204, 404]
    with running_server(tmp_path, env=env_of(webhook)) as server:
        replies = [server.call("POST", "/api/alerts/test") for _ in range(2)]
        listed = alerts_of(server)

    assert [reply.json() for reply in replies] == [
        {"delivered": True, "status": 204, "problem": None},
        {"delivered": False, "status": 404, "problem": "it does not know the address: was the "
         "webhook deleted? (status 404)"}]
    assert webhook.events() == ["test", "test"]
    assert (listed["webhook"], listed["format"]) == (f"127.0.0.1:{webhook.port} (secret)", "json")
    assert [each["state"] for each in listed["alerts"]] == ["lost", "delivered"]
    assert len(webhook.taken) == 2, "a test is not repeated"


def test_a_test_without_a_webhook_is_refused(shared_server: Server) -> None:
    reply = shared_server.call("POST", "/api/alerts/test")

    assert reply.status == 400
    assert "`ocp settings alertUrl ADDRESS`" in reply.json()["error"]["message"]


def test_the_alerts_are_the_operators(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        made = server.call("POST", "/api/keys", {"name": "laptop"}, ADMIN).json()
        headers = bearer(made["key"])
        replies = [server.call("GET", "/api/alerts", headers=headers),
                   server.call("POST", "/api/alerts/test", headers=headers)]

    assert [reply.status for reply in replies] == [403, 403]


# -- the address is a secret --------------------------------------------------

WRONG_ADDRESSES = (
    "hooks.example.org/s3cret", "ftp://example.org/s3cret", "https://", "https:///s3cret",
    "https://example.org/with space/s3cret", "https://example.org:0/s3cret",
    "https://example.org:99999/s3cret", "https://[::1/s3cret", "https://ex\u00e4mple.org/s3cret",
    "https://example.org/s3cret\x00", "127.0.0.1:3456 (secret)", f"https://x/{'s3cret' * 400}",
)


@pytest.mark.parametrize("wrong", WRONG_ADDRESSES, ids=range(len(WRONG_ADDRESSES)))
def test_what_is_no_address_is_refused_and_not_repeated(
    shared_server: Server, wrong: str
) -> None:
    reply = shared_server.call("PATCH", "/settings", {"alertUrl": wrong})

    assert reply.status == 400
    assert "OCP_ALERT_URL takes the address of a webhook" in reply.json()["errors"][0]
    assert b"s3cret" not in reply.body


def everything_told(server: Server) -> bytes:
    """What the server says to its operator anywhere, and what it has written."""
    paths = ["/health", "/settings", "/status", "/usage", "/logs?n=1000", "/logs?level=audit",
             "/api/alerts", "/api/errors", "/api/usage?all=true", "/metrics", "/openapi.json"]
    replies: list[Reply] = [server.call("GET", path, headers=ADMIN) for path in paths]
    logs = [path.read_bytes() for path in sorted(server.ocp_home.glob("logs/*"))]
    assert all(reply.status == 200 for reply in replies) and len(logs) == 2
    return b"\n".join([*(reply.body for reply in replies), *logs, server.output.encode()])


@pytest.mark.parametrize("manner", [204, 404, "redirect", "close", "garbage"])
def test_the_address_is_shown_nowhere(tmp_path: Path, webhook: Webhook, manner: Manner) -> None:
    webhook.manners = [manner]
    url = webhook.url.replace("//", "//s3cret-name:s3cret-pass@", 1)
    refused = [{"api_error": {"status": 401, "word": "authentication_failed", "text": "no"}}]
    with running_server(tmp_path, [refused], env=MULTI) as server:
        reply = server.call("PATCH", "/settings", {"alertUrl": url}, ADMIN)
        ask_reply = server.call("POST", "/v1/chat/completions", {"messages": [
            {"role": "user", "content": "a s3cret prompt"}]}, ADMIN)
        eventually(lambda: webhook.taken)
        tested = server.call("POST", "/api/alerts/test", headers=ADMIN)
        told = everything_told(server) + reply.body + ask_reply.body + tested.body
        children = json.dumps(server.fake_log("start")).encode()
        modes = [path.stat().st_mode & 0o777 for path in server.ocp_home.glob("ocp.db*")]

    assert reply.status == 200
    shown = f"127.0.0.1:{webhook.port} (secret)"
    assert reply.json()["results"]["alertUrl"]["value"] == shown
    assert reply.json()["current"]["alertUrl"]["value"] == shown
    assert b"s3cret" not in told + children
    assert set(modes) == {0o600}
    assert b"prompt" not in b"".join(taken.body for taken in webhook.taken)


def test_an_address_in_the_environment_is_neither_printed_nor_given_to_claude(
    tmp_path: Path, webhook: Webhook
) -> None:
    # The name of a variable that claude may have, with the address in it.
    env = env_of(webhook, LC_ALL=webhook.url)
    printed = [run_server(tmp_path / "ran", option, env=env)
               for option in ("--check", "--print-settings")]
    with running_server(tmp_path / "server", env=env) as server:
        assert ask(server).status == 200
        started = json.dumps(server.fake_log("start"))

    for ran in printed:
        assert ran.code == 0 and "OCP_ALERT_URL=(secret)" in ran.stdout
        assert "s3cret" not in ran.stdout + ran.stderr
    assert "LANG" in started and "s3cret" not in started


def test_no_alert_has_what_a_failure_says(tmp_path: Path, webhook: Webhook) -> None:
    prose = "no login for owner@example.org with sk-ant-oat01-s3cretS3cret in /home/owner"
    refused = [{"api_error": {"status": 401, "word": "authentication_failed", "text": prose}}]
    with running_server(tmp_path, [refused], env=env_of(webhook)) as server:
        assert ask(server).status == 401
        eventually(lambda: webhook.taken)

    sent = webhook.taken[0].body
    assert b"owner" not in sent and b"sk-ant" not in sent and b"/home" not in sent
