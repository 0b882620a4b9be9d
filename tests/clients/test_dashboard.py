"""The dashboard: what a real browser makes of it. The page as text: test_pages.py.

Index: 3 in a browser: panels   4 the key   5 coming and going   6 dialogs
       7 hostile names, widths   8 trying it   9 devices and codes   10 errors
       11 the login of claude, and captures
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Iterator, Mapping

import pytest

import browser
from chat import question
from depth import rest
from fake_agent import FakeAgent
from fake_telegram import FakeTelegram
from gateway import Gateway
from http_client import Reply, http_request
from programs import client_folders, how_to_install
from project import clean_env, free_port, load_script
from server import Server, running_server
from waiting import eventually
from webhook import running_webhook

Json = Any
ocp = load_script("ocp_server")
ADMIN_KEY = "the-admin-key"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
VIEWS = ("overview", "requests", "errors", "try", "keys", "sessions", "settings", "log")

needs_browser = pytest.mark.skipif(
    browser.browser_program() is None, reason=browser.HOW_TO_INSTALL)


# ---------------------------------------------------------------------------
# 3 In a browser: panels
# ---------------------------------------------------------------------------

class BusyServer:
    """A server with something to show, in mode multi."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.secrets: dict[str, str] = {}

    def admin(self, method: str, path: str, body: Json = None) -> Json:
        return self.server.call(method, path, body, ADMIN).json()

    def key(self, name: str, **fields: Json) -> None:
        self.secrets[name] = self.admin("POST", "/api/keys", {"name": name, **fields})["key"]

    def chat(self, name: str, text: str, **fields: Json) -> Reply:
        return self.server.call("POST", "/v1/chat/completions", question(text, **fields),
                                {"Authorization": f"Bearer {self.secrets[name]}"})


def in_hours(hours: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + hours * 3600))


def plan() -> dict[str, Json]:
    """What claude tells about the plan, its times counted from now."""
    return {"rate_limits_available": True, "subscription_type": "max", "rate_limits": {
        "five_hour": {"utilization": 37, "resets_at": in_hours(2.5)},
        "seven_day": {"utilization": 81, "resets_at": in_hours(70)},
        "model_scoped": [
            {"display_name": "Fable", "utilization": 59, "resets_at": in_hours(70)}],
        "extra_usage": {"is_enabled": True, "used_credits": 1234, "monthly_limit": 5000,
                        "utilization": 24.7, "currency": "USD"}}}


ANSWER = [[{"say": "Hello."}]]
MULTI = {"CLAUDE_AUTH_MODE": "multi", "OCP_ADMIN_KEY": ADMIN_KEY, "CLAUDE_CACHE_TTL": "60000",
         "OCP_INSTANCE_NAME": "attic"}


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BusyServer]:
    folder = tmp_path_factory.mktemp("busy")
    with running_server(folder, {"turns": ANSWER, "usage": plan()}, env=MULTI) as server:
        made = BusyServer(server)
        made.key("laptop", quota={"daily": 50, "tokensMonthly": 90000}, note="the grey one")
        made.key("phone", models=["haiku"], expiry="30d", maxConcurrent=2)
        for text in ("one", "two", "two"):
            assert made.chat("laptop", text).status == 200
        assert made.chat("phone", "three", model="haiku").status == 200
        assert made.chat("laptop", "four", ocp_session_id="diary").status == 200
        yield made


@contextmanager
def opened(
    chrome: browser.Browser, server: Server, view: str = "overview", width: int = 1280,
    dark: bool = False, key: str = ADMIN_KEY, expected: tuple[str, ...] = ("401",),
) -> Iterator[browser.Page]:
    """The page after its key was typed in; at the end nothing else may be in the console."""
    with chrome.page(f"{server.url}/dashboard#{view}", width, dark) as page:
        if key:
            page.until("document.querySelector('#gate').open")
            page.until("document.activeElement.id === 'gate-key'")
            page.write(key)
            page.press("Enter")
        page.sees("Live", "#link")
        yield page
        unexpected = [each for each in page.complaints
                      if not any(word in each for word in expected)]
        assert unexpected == []


@needs_browser
def test_the_overview_shows_state_plan_and_usage(chrome: browser.Browser, busy: BusyServer) -> None:
    with opened(chrome, busy.server) as page:
        page.sees("Running", "#state")
        assert f"attic, {ocp.VERSION}" in page.text("#version")
        page.sees("37 % used", "#plan")
        page.sees("81 % used", "#plan")
        page.sees("7 days, fable", "#plan")
        page.sees("59 % used", "#plan")
        # It is enabled, and claude refuses it beside each answer.
        page.sees("Extra usage is off. 12.34 USD used of 50.00 USD.", "#plan")
        page.sees("Resets in 2 h 2", "#plan")
        page.sees("laptop", "#shares")
        for place, words in (
            ("#now", "of 8 answers"), ("#now", "Parked"), ("#facts", "logged in, seen"),
            ("#facts", "max"), ("#facts", "1 of 4 look-ups hit"), ("#totals", "Requests"),
        ):
            page.sees(words, place)
        totals = " ".join(page.text("#totals").split())
        assert "Requests 5" in totals and "Failed 0 %" in totals and "Cache hits 20 %" in totals
        page.until("document.querySelectorAll('#chart .s0, #chart .s1').length >= 2")
        page.sees("claude-haiku", "#speeds")
        page.click("#speeds-by input[value=byDialect]")
        page.sees("chat", "#speeds")


@pytest.mark.exhaustive
@needs_browser
def test_the_chart_is_redrawn_by_model_and_read_with_the_arrow_keys(
    chrome: browser.Browser, busy: BusyServer
) -> None:
    with opened(chrome, busy.server) as page:
        page.sees("laptop", "#shares")
        page.click("#choices input[value=model]")
        page.sees("claude-haiku", "#shares")
        page.click("#choices input[value=tokens]")
        page.click("#choices input[value=week]")
        page.until("document.querySelector('#chart').getAttribute('aria-label') === "
                   "'Tokens by model, last 7 days'")
        page.tab_to("chart")
        page.press("End")
        page.sees("one day:", "#readout")
        assert "tokens (claude-" in page.text("#readout")
        page.press("ArrowLeft")
        page.sees("one day: 0 tokens", "#readout")


@pytest.mark.exhaustive
@needs_browser
def test_recent_requests_are_filtered(chrome: browser.Browser, busy: BusyServer) -> None:
    with opened(chrome, busy.server, "requests") as page:
        page.sees("phone", "#requests")
        page.evaluate("""(() => { const select = document.querySelector('#filter-outcome');
            select.value = 'cached'; select.dispatchEvent(new Event('change')); })()""")
        page.until("document.querySelectorAll('#requests tbody tr').length === 1")
        page.sees("cached", "#requests")
        page.evaluate("""(() => { const select = document.querySelector('#filter-key_name');
            select.value = 'phone'; select.dispatchEvent(new Event('change')); })()""")
        page.sees("No request is like this", "#requests")
        assert "cached" not in page.text("#requests tbody")


@needs_browser
def test_keys_sessions_settings_and_log_show_what_there_is(
    chrome: browser.Browser, busy: BusyServer
) -> None:
    with opened(chrome, busy.server, "keys") as page:
        page.until("/\\d of 50/.test(document.querySelector('#keys').innerText)")
        assert "the grey one" in page.text("#keys") and "tokens a month" in page.text("#keys")
        assert "2 answers at a time" in page.text("#keys")
        page.evaluate("location.hash = 'sessions'")
        page.sees("diary", "#sessions")
        page.evaluate("location.hash = 'settings'")
        page.sees("60,000 ms", "#settings")
        assert "environment" in page.text("#settings") and "1 to 64" in page.text("#settings")
        page.evaluate("location.hash = 'log'")
        page.sees("answer_finished", "#log")
        assert "by=admin" in page.text("#log")


@pytest.mark.exhaustive
@needs_browser
def test_a_key_shows_the_state_of_its_own_login(chrome: browser.Browser, busy: BusyServer) -> None:
    busy.key("anna")
    token = {"token": "sk-ant-oat01-of-another-account"}
    assert busy.admin("PUT", "/api/keys/anna/login", token)["login"]["kind"] == "token"
    try:
        with opened(chrome, busy.server, "keys") as page:
            page.sees("own login: not known yet", "#keys")
            assert busy.chat("anna", "Hi?").status == 200
            page.evaluate("load('keys')")
            page.sees("own login: logged in", "#keys")
            assert page.text("#keys").count("own login") == 1
            busy.admin("PUT", "/api/keys/anna/tenant", {})
            page.evaluate("load('health')")
            page.sees("tenant, level api", "#keys")
            assert page.text("#keys").count("tenant, level") == 1
    finally:
        busy.admin("DELETE", "/api/keys/anna")


@pytest.mark.exhaustive
@needs_browser
def test_the_log_can_be_paused_and_cut_to_a_level(
    chrome: browser.Browser, busy: BusyServer
) -> None:
    with opened(chrome, busy.server, "log") as page:
        page.sees("answer_finished", "#log")
        page.tab_to("log-pause")
        page.press(" ")
        busy.admin("POST", "/api/keys", {"name": "later"})
        busy.admin("DELETE", "/api/keys/later")
        page.sees("Resume (2 new)", "#log-pause")
        assert "later" not in page.text("#log")
        page.press(" ")
        page.sees("key=later", "#log")
        page.evaluate("""(() => { const select = document.querySelector('#log-level');
            select.value = 'error'; select.dispatchEvent(new Event('change')); })()""")
        page.sees("choose a lower one", "#log-count")


@needs_browser
def test_a_turn_shows_while_it_runs_and_counts_when_it_ends(
    chrome: browser.Browser, tmp_path: Path
) -> None:
    door = tmp_path / "door"
    slow: list[list[Json]] = [
        [{"say": "To begin with, "}, {"wait_for": str(door)}, {"say": "the end."}],
        [{"hang": True}]]
    one_at_a_time = {"CLAUDE_MAX_CONCURRENT": "1"}
    with running_server(
            tmp_path / "s", {"turns": slow, "shared": True}, env=one_at_a_time) as server, \
            opened(chrome, server, key="") as page:
        page.sees("Nothing is running", "#running")
        page.sees("No request in this span", "#shares")
        with server.stream("/v1/chat/completions", question("Go on.")) as stream:
            page.sees("answering (fresh)", "#running")
            page.until("/after \\d/.test(document.querySelector('#running').innerText)")
            page.sees("1", "#now .figure")
            second = http_request(
                server.port, "POST", "/v1/chat/completions", question("And now?"))
            page.sees("waiting for its turn", "#running")
            door.touch()
            list(stream)
        second.close()
        page.sees("Nothing is running", "#running")
        page.sees("claude-sonnet", "#now")
        page.until("/Requests\\s+2\\b/.test(document.querySelector('#totals').innerText)")
        page.sees("1 left by their clients", "#totals")
        assert "waiting for its turn" not in page.text("#running")


@needs_browser
def test_a_request_that_runs_is_stopped_after_a_question(
    chrome: browser.Browser, tmp_path: Path
) -> None:
    turns: list[list[Json]] = [[{"say": "On and on"}, {"hang": True}]]
    tagged = {"OCP_TAG_FROM": "body"}
    with running_server(tmp_path, {"turns": turns}, env=tagged) as server, \
            opened(chrome, server, key="") as page:
        asked = question("Go on.", user="<i>anna</i>")
        with server.stream("/v1/chat/completions", asked) as stream:
            page.sees("local, <i>anna</i>", "#running")
            page.click("#running button")
            page.sees("Its client (local, <i>anna</i>) gets an error", "#asking-text")
            page.click("#asking-submit")
            page.sees("The request is stopped", "#toast")
            events = [data for _, data in stream]
        assert events[-1]["error"]["code"] == "request_stopped"
        page.sees("Nothing is running", "#running")
        page.sees("<i>anna</i>", "#tags")


@needs_browser
def test_all_requests_of_the_span_are_saved_as_a_file(
    chrome: browser.Browser, busy: BusyServer
) -> None:
    with opened(chrome, busy.server, "requests") as page:
        page.evaluate("""(() => {
            URL.createObjectURL = (blob) => {
              blob.text().then((text) => { window.saved = text; });
              return "about:blank";
            };
            HTMLAnchorElement.prototype.click = function () { window.savedAs = this.download; };
        })()""")
        page.click("#save-csv")
        page.until("window.saved && window.savedAs")
        assert re.fullmatch(r"ocp-usage-rows-[\d-]+-to-[\d-]+\.csv", page.evaluate("savedAs"))
        lines = page.evaluate("saved").split("\r\n")
        rows = busy.admin("GET", "/api/usage?all=true")["recent"]
        assert lines[0].startswith("at,request_id,model,") and lines[-1] == ""
        assert len(lines) - 2 == len(rows) >= 5
        # Nobody is tagged here.
        page.until("document.querySelector('#tags').hidden")


# ---------------------------------------------------------------------------
# 4 The key
# ---------------------------------------------------------------------------

@needs_browser
def test_a_wrong_key_is_refused_and_a_right_one_is_kept_in_the_tab_only(
    chrome: browser.Browser, busy: BusyServer
) -> None:
    with chrome.page(f"{busy.server.url}/dashboard") as page:
        page.until("document.activeElement.id === 'gate-key'")
        assert "does not accept" not in page.text("#gate")
        page.write("wrong")
        page.press("Enter")
        page.sees("does not accept this key", "#gate-error")
        page.press("Escape", times=3)
        page.until("document.querySelector('#gate').open")
        page.evaluate("document.querySelector('#gate-key').select()")
        page.write(ADMIN_KEY)
        page.press("Enter")
        page.sees("Live", "#link")
        kept = "[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]"
        assert page.evaluate(kept) == [f'{{"ocp-admin-key":"{ADMIN_KEY}"}}', "{}", ""]
        page.call("Page.reload")
        page.sees("Live", "#link")
        page.click("#forget-key")
        page.until("document.querySelector('#gate')?.open")
        assert page.evaluate("sessionStorage.length") == 0


@needs_browser
def test_a_key_of_a_device_is_told_that_it_is_not_the_admin_key(
    chrome: browser.Browser, busy: BusyServer
) -> None:
    with chrome.page(f"{busy.server.url}/dashboard") as page:
        page.until("document.activeElement.id === 'gate-key'")
        page.write(busy.secrets["laptop"])
        page.press("Enter")
        page.sees("requires the admin key", "#gate-error")
        assert page.evaluate("sessionStorage.length") == 0


@pytest.mark.exhaustive
@needs_browser
def test_mode_none_from_another_machine_explains_itself(
    chrome: browser.Browser, shared_server: Server
) -> None:
    with chrome.page("about:blank") as page:
        page.call("Network.enable")
        page.call("Network.setExtraHTTPHeaders", headers={"X-Forwarded-For": "192.0.2.7"})
        page.go(f"{shared_server.url}/dashboard")
        page.sees("runs in mode none", "#gate")
        page.sees(f"ssh -L {shared_server.port}:127.0.0.1:{shared_server.port}", "#gate")
        assert not page.evaluate("document.querySelector('#gate-key').checkVisibility()")
        page.call("Network.setExtraHTTPHeaders", headers={})
        page.click("#gate-submit")
        page.sees("Live", "#link")


# ---------------------------------------------------------------------------
# 5 Coming and going
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
@needs_browser
def test_the_page_survives_a_restart_and_asks_again_when_the_key_has_changed(
    chrome: browser.Browser, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        # It comes back at the same place, which nobody else is to get meanwhile.
        port = str(free_port())
        server = stack.enter_context(running_server(
            tmp_path, ANSWER, env={**MULTI, "CLAUDE_PROXY_PORT": port}))
        lost = ("401", "ERR_")
        page = stack.enter_context(opened(chrome, server, "keys", expected=lost))
        page.sees("There is no key yet", "#keys")
        page.click("#create-key")
        page.write("half-typed")

        server.stop()
        page.sees("trying again in", "#link")
        page.sees("Not reachable", "#state")
        page.sees("No connection to the server", "#notices")

        with again(tmp_path, server.port, MULTI):
            page.sees("Live", "#link")
            assert page.evaluate("document.activeElement.value") == "half-typed"
            page.press("Enter")
            page.sees("shown once", "#device")
            page.press("Enter")
            page.tab_to("device-done")
            page.press("Enter")
            page.sees("half-typed", "#keys")

        with again(tmp_path, server.port, {**MULTI, "OCP_ADMIN_KEY": "another"}):
            page.until("document.querySelector('#gate').open")
            page.sees("does not accept this key", "#gate-error")
            assert "half-typed" not in page.text("main")
            page.until("document.activeElement.id === 'gate-key'")
            page.write("another")
            page.press("Enter")
            page.sees("Live", "#link")
            page.sees("half-typed", "#keys")


@contextmanager
def again(folder: Path, port: int, env: Mapping[str, str]) -> Iterator[Server]:
    """The server once more at the same place."""
    with running_server(
            folder, ANSWER, env={**env, "CLAUDE_PROXY_PORT": str(port)}) as server:
        yield server


@pytest.mark.exhaustive
@needs_browser
def test_a_key_that_ends_while_an_action_is_under_way_asks_for_the_key(
    chrome: browser.Browser, busy: BusyServer
) -> None:
    with opened(chrome, busy.server, "settings") as page:
        page.sees("maxQueue", "#settings")
        page.evaluate("store.adminKey = 'stale'")
        page.click("[aria-label='Edit maxQueue']")
        page.click("#asking-submit")
        page.until("document.querySelector('#gate').open")
        page.evaluate("document.querySelector('#gate-key').select()")
        page.write(ADMIN_KEY)
        page.press("Enter")
        page.sees("Live", "#link")
        assert page.evaluate("document.querySelector('#asking').open")


@pytest.mark.exhaustive
@needs_browser
def test_a_hidden_page_rests_and_goes_on_when_it_is_seen_again(
    chrome: browser.Browser, busy: BusyServer
) -> None:
    with opened(chrome, busy.server) as page:
        page.sees("laptop", "#shares")
        with chrome.page("about:blank"):
            # The page itself is not drawn meanwhile.
            page.until("document.hidden && store.link.status === 'paused'")
            page.evaluate("window.calls = 0; window.old = fetch; "
                          "window.fetch = (...all) => { calls++; return old(...all); }")
            assert busy.chat("laptop", "behind its back").status == 200
            time.sleep(1.5)
            assert page.evaluate("calls") == 0
        page.call("Page.bringToFront")
        page.until("calls > 0 && !document.hidden")
        page.sees("Live", "#link")


@pytest.mark.exhaustive
@needs_browser
def test_a_key_that_expires_soon_has_the_time_too(
    chrome: browser.Browser, busy: BusyServer
) -> None:
    busy.key("guest", expiry="2h")
    try:
        with opened(chrome, busy.server, "keys") as page:
            assert page.until("/^guest[^]*\\d\\d:\\d\\d/.test(["
                       "...document.querySelectorAll('#keys tbody tr')].find("
                       "(row) => row.innerText.startsWith('guest'))?.innerText || '')")
    finally:
        busy.admin("DELETE", "/api/keys/guest")


@pytest.mark.exhaustive
@needs_browser
def test_updates_keep_rows_focus_and_selection(chrome: browser.Browser, busy: BusyServer) -> None:
    with opened(chrome, busy.server, "keys") as page:
        page.sees("laptop", "#keys")
        page.evaluate("window.row = document.querySelector('#keys tbody tr:last-child'); "
                      "document.querySelector('[aria-label=\"Edit laptop\"]').focus()")
        busy.key("newcomer")
        try:
            page.evaluate("load('keys')")
            page.sees("newcomer", "#keys")
            assert page.focused() == "Edit laptop"
            assert page.evaluate("row === document.querySelector('#keys tbody tr:last-child')")
        finally:
            busy.admin("DELETE", "/api/keys/newcomer")


# ---------------------------------------------------------------------------
# 6 Dialogs
# ---------------------------------------------------------------------------

@needs_browser
def test_a_key_is_made_rotated_limited_and_revoked_by_keyboard(
    chrome: browser.Browser, busy: BusyServer
) -> None:
    refused = ("401", "400", "409")
    with opened(chrome, busy.server, "keys", expected=refused) as page:
        page.sees("laptop", "#keys")
        page.tab_to("create-key")
        page.press("Enter")
        page.until("document.activeElement.id === 'field-name'")
        page.write("laptop")
        page.press("Enter")
        page.sees("already", "#asking-error")
        page.until("document.activeElement.id === 'field-name'")
        page.evaluate("document.activeElement.select()")
        page.write("tablet")
        page.tab_to("field-expiry")
        page.write("7d")
        page.press("Enter")
        page.until("document.querySelector('#device').open")
        secret = page.evaluate("document.querySelector('#device-key').textContent")
        command = page.evaluate("document.querySelector('#device-command').textContent")
        assert command == f"curl -fsSL {busy.server.url}/connect | python3 - {busy.server.url}"
        assert busy.server.call("GET", "/v1/models", headers=bearer(secret)).status == 200
        page.tab_to("device-done")
        page.press("Enter")
        page.until("!document.querySelector('#device-key')")
        page.sees("tablet", "#keys")

        page.tab_to("Quotas tablet")
        page.press("Enter")
        page.write("many")
        page.press("Enter")
        page.sees("daily", "#asking-error")
        page.evaluate("document.activeElement.select()")
        page.write("7")
        page.press("Enter")
        page.sees("0 of 7", "#keys")
        assert page.focused() == "Quotas tablet"

        page.tab_to("Rotate tablet")
        page.press("Enter")
        page.until("document.activeElement.id === 'field-grace'")
        page.write("soon")
        page.press("Enter")
        page.sees("such as 24h", "#asking-error")
        page.evaluate("document.activeElement.value = ''")
        page.press("Enter")
        page.until("document.querySelector('#device').open")
        rotated = page.evaluate("document.querySelector('#device-key').textContent")
        assert busy.server.call("GET", "/v1/models", headers=bearer(secret)).status == 401
        assert busy.server.call("GET", "/v1/models", headers=bearer(rotated)).status == 200
        page.press("Escape")

        page.tab_to("Revoke tablet")
        page.press("Enter")
        page.press("Escape")
        page.until("!document.querySelector('#asking').open")
        assert busy.server.call("GET", "/v1/models", headers=bearer(rotated)).status == 200
        page.press("Enter")
        page.until("document.activeElement.id === 'asking-cancel'")
        page.press("Tab")
        page.press("Enter")
        page.sees("The key is revoked", "#toast")
        page.until("!document.querySelector('#keys').innerText.includes('tablet')")
        assert busy.server.call("GET", "/v1/models", headers=bearer(rotated)).status == 401
        page.until("document.activeElement.id === 'title-keys'")


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@pytest.mark.exhaustive
@needs_browser
def test_a_key_is_edited_and_only_what_changed_is_sent(
    chrome: browser.Browser, busy: BusyServer
) -> None:
    with opened(chrome, busy.server, "keys") as page:
        page.sees("phone", "#keys")
        page.click("[aria-label='Edit phone']")
        before = busy.admin("GET", "/api/keys/phone")
        page.evaluate("document.querySelector('#field-note').value = 'the old one'")
        page.click("#asking-submit")
        page.sees("the old one", "#keys")
        assert busy.admin("GET", "/api/keys/phone") == {**before, "note": "the old one"}


@needs_browser
def test_a_setting_out_of_range_is_explained_and_a_good_one_can_be_reset(
    chrome: browser.Browser, busy: BusyServer
) -> None:
    with opened(chrome, busy.server, "settings", expected=("401", "400")) as page:
        page.sees("maxQueue", "#settings")
        page.click("[aria-label='Edit maxQueue']")
        assert "0 to 1,000" in page.text("#asking")
        for wrong, word in (("100000", "from 0 to 1000"), ("", "whole number"),
                            ("x", "whole number")):
            page.evaluate("document.querySelector('#field-value').select()")
            page.write(wrong) if wrong else page.evaluate(
                "document.querySelector('#field-value').value = ''")
            page.press("Enter")
            page.sees(word, "#asking-error")
        page.evaluate("document.querySelector('#field-value').select()")
        page.write("33")
        page.press("Enter")
        page.until("!!document.querySelector('[aria-label=\"Reset maxQueue\"]')")
        assert busy.admin("GET", "/settings")["maxQueue"]["value"] == 33
        page.click("[aria-label='Reset maxQueue']")
        page.click("#asking-submit")
        page.until("!document.querySelector('[aria-label=\"Reset maxQueue\"]')")
        assert busy.admin("GET", "/settings")["maxQueue"]["source"] == "default"
        page.click("[aria-label='Edit cacheSampled']")
        page.evaluate("document.querySelector('#field-value').value = 'off'")
        page.click("#asking-submit")
        page.until("!!document.querySelector('[aria-label=\"Reset cacheSampled\"]')")
        assert busy.admin("PATCH", "/settings", {"cacheSampled": None})["results"]


@pytest.mark.exhaustive
@needs_browser
def test_a_source_that_fails_says_so_and_can_be_tried_again(
    chrome: browser.Browser, busy: BusyServer
) -> None:
    with opened(chrome, busy.server) as page:
        page.sees("laptop", "#shares")
        page.evaluate("window.old = fetch; window.fetch = (path, ...rest) => path === '/api/keys' ?"
                      "Promise.reject(new TypeError('cut')) : old(path, ...rest)")
        page.evaluate("location.hash = 'keys'")
        page.sees("Could not load the keys: The server does not answer (cut).", "#notices")
        page.evaluate("window.fetch = old")
        page.tab_to("Try again")
        page.press("Enter")
        page.sees("laptop", "#keys")
        page.until("document.querySelector('#notices').innerText === ''")
        assert "phone" in page.text("#keys")


@pytest.mark.exhaustive
@needs_browser
def test_a_session_is_cleared_after_a_question(chrome: browser.Browser, tmp_path: Path) -> None:
    with running_server(tmp_path, ANSWER) as server:
        name = "<b>notes</b> & more"
        server.call("POST", "/v1/chat/completions", question("Hi", ocp_session_id=name))
        server.call("POST", "/v1/chat/completions", question("Hi", ocp_session_id="other"))
        with opened(chrome, server, "sessions", key="") as page:
            page.sees(name, "#sessions")
            page.evaluate(f"document.querySelector('[aria-label=\"Clear {name}\"]').click()")
            page.sees(f"Clear the session {name}?", "#asking-title")
            page.click("#asking-submit")
            page.sees("1 session cleared", "#toast")
            page.until("document.querySelectorAll('#sessions tbody tr').length === 1")
            page.click("#clear-sessions")
            page.click("#asking-submit")
            page.sees("No session is remembered", "#sessions")
        assert server.call("GET", "/sessions").json() == {"sessions": []}


# ---------------------------------------------------------------------------
# 7 Hostile names, widths
# ---------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=window.broken=1>\"'`${broken}</script>"


@needs_browser
def test_hostile_names_are_text(chrome: browser.Browser, tmp_path: Path) -> None:
    env = {**MULTI, "OCP_INSTANCE_NAME": HOSTILE}
    with running_server(tmp_path, ANSWER, env=env) as server:
        busy = BusyServer(server)
        busy.key("victim", quota={"daily": 5}, note=HOSTILE)
        busy.chat("victim", "hello")
        database = sqlite3.connect(server.ocp_home / "ocp.db")
        with database:
            database.execute("UPDATE keys SET name = ?", (HOSTILE,))
            database.execute("UPDATE usage SET model = ?, outcome = ?, request_id = ?",
                             (HOSTILE, HOSTILE, HOSTILE))
        database.close()
    # The server reads the names of keys when it starts.
    with running_server(tmp_path, ANSWER, env=env) as server:
        with opened(chrome, server) as page:
            for view, place in (("overview", "#shares"), ("requests", "#requests"),
                                ("keys", "#keys")):
                page.evaluate(f"location.hash = '{view}'")
                page.sees(HOSTILE, place)
            page.evaluate("document.querySelector('#keys button').click()")
            page.sees(HOSTILE, "#asking-title")
            assert page.evaluate("[window.broken, document.images.length]") == [None, 0]
            assert HOSTILE in page.text("#version")


@pytest.mark.exhaustive
@needs_browser
@pytest.mark.parametrize("width", [320, *rest(768, 1440)])
def test_no_view_is_wider_than_the_page(
    chrome: browser.Browser, busy: BusyServer, width: int
) -> None:
    with opened(chrome, busy.server, width=width, dark=width == 320) as page:
        for view in VIEWS:
            page.evaluate(f"location.hash = '{view}'")
            page.until(f"!document.querySelector('#view-{view}').hidden")
            page.until(f"!document.querySelector('#view-{view}').innerText.includes('Loading')")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, view
        page.evaluate("location.hash = 'keys'")
        page.click("#create-key")
        box = page.evaluate("(({left, right}) => [left, right])("
                            "document.querySelector('#asking').getBoundingClientRect())")
        assert box[0] >= 0 and box[1] <= width


@pytest.mark.exhaustive
@needs_browser
def test_headings_landmarks_and_names_are_there(chrome: browser.Browser, busy: BusyServer) -> None:
    with opened(chrome, busy.server) as page:
        page.sees("laptop", "#shares")
        page.call("Accessibility.enable")
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        named = {(node.get("role", {}).get("value"), node.get("name", {}).get("value"))
                 for node in nodes if not node.get("ignored")}
        assert {("heading", "OCP"), ("heading", "Plan"), ("navigation", "Views"),
                ("meter", "5-hour session"), ("table", "Usage by name"),
                ("slider", "Requests by key, last 24 hours")} <= named
        roles = {role for role, _ in named}
        assert {"main", "banner", "status", "region"} <= roles
        assert not [pair for pair in named
                    if pair[0] in ("button", "link", "textbox", "combobox", "radio", "slider")
                    and not pair[1]]


# ---------------------------------------------------------------------------
# 8 Trying it
# ---------------------------------------------------------------------------

NO_KEY = {"OCP_INSTANCE_NAME": "attic"}


def chosen(page: browser.Page, select: str, value: str) -> None:
    """Choose a value of a select, as a user does."""
    page.evaluate(f"""(() => {{ const select = document.querySelector('#{select}');
        select.value = '{value}'; select.dispatchEvent(new Event('change')); }})()""")


@needs_browser
def test_a_conversation_is_streamed_and_goes_on_with_what_was_said(
    chrome: browser.Browser, tmp_path: Path
) -> None:
    turns = [[{"say": "Good day."}], [{"say": "Rain, mostly."}]]
    with running_server(tmp_path, turns, env=NO_KEY) as server, \
            opened(chrome, server, "try", key="") as page:
        page.until("document.querySelector('#try-model').value !== ''")
        assert not page.evaluate("document.querySelector('#try-access').checkVisibility()")
        page.evaluate("document.querySelector('#try-system').value = 'Be brief.'")
        page.tab_to("try-text")
        page.write("Hello")
        page.press("Enter")
        page.sees("Good day.", "#talk")
        page.until("/first token after .*in all, .*written/.test("
                   "document.querySelector('#talk').innerText)")
        page.until("document.querySelector('#try-text').value === ''")
        page.write("And the weather?")
        page.press("Enter")
        page.sees("Rain, mostly.", "#talk")
        # An answer belongs to the conversation when its stream has ended.
        page.until("tryBody('next').messages.length === 6")
        assert page.evaluate("tryBody('next').messages.map(({content}) => content)") == [
            "Be brief.", "Hello", "Good day.", "And the weather?", "Rain, mostly.", "next"]
        page.tab_to("Copy the answer", shift=True)
        page.click("#try-clear")
        page.until("document.querySelector('#talk').children.length === 0")


@pytest.mark.exhaustive
@needs_browser
def test_an_answer_that_is_stopped_ends_on_the_server_too(
    chrome: browser.Browser, tmp_path: Path
) -> None:
    turns = [[{"say": "To begin with, "}, {"hang": True}]]
    with running_server(tmp_path, turns, env=NO_KEY) as server, \
            opened(chrome, server, "try", key="") as page:
        page.until("document.querySelector('#try-model').value !== ''")
        page.evaluate("document.querySelector('#try-text').focus()")
        page.write("Go on.")
        page.press("Enter")
        page.sees("To begin with,", "#talk")
        page.tab_to("try-stop")
        page.press("Enter")
        page.sees("stopped, first token after", "#talk")
        assert page.focused() == "try-text"
        page.until("store.live.running.length === 0")
        assert page.evaluate("document.querySelector('#try-send').checkVisibility()")


@pytest.mark.exhaustive
@needs_browser
def test_a_refusal_shows_in_the_conversation_and_locks_nothing(
    chrome: browser.Browser, busy: BusyServer
) -> None:
    with opened(chrome, busy.server, "try") as page:
        page.until("document.querySelector('#try-as').value === 'operator'")
        chosen(page, "try-as", "typed")
        page.until("document.querySelector('#try-key').checkVisibility()")
        page.evaluate("document.querySelector('#try-key').value = 'ocp_not-a-key'")
        page.evaluate("document.querySelector('#try-text').focus()")
        page.write("Who am I?")
        page.press("Enter")
        page.until("document.querySelector('#talk .error').innerText !== ''")
        page.until("document.querySelector('#try-text').value === 'Who am I?'")
        assert not page.evaluate("document.querySelector('#gate').open")
        key = busy.secrets["laptop"]
        page.evaluate(f"document.querySelector('#try-key').value = '{key}'")
        page.press("Enter")
        page.sees("Hello.", "#talk")
        kept = page.evaluate("JSON.stringify([{...sessionStorage}, {...localStorage}])")
        assert key not in kept


@pytest.mark.exhaustive
@needs_browser
def test_the_anonymous_key_can_be_tried(chrome: browser.Browser, tmp_path: Path) -> None:
    env = {**MULTI, "PROXY_ANONYMOUS_KEY": "guests", "PROXY_ADVERTISE_ANON_KEY": "1"}
    with running_server(tmp_path, ANSWER, env=env) as server, opened(chrome, server, "try") as page:
        page.until("document.querySelector('#try-as').options.length === 3")
        chosen(page, "try-as", "anonymous")
        page.evaluate("document.querySelector('#try-text').focus()")
        page.write("Hello")
        page.press("Enter")
        page.sees("Hello.", "#talk")
        page.until("!store.talk.abort")
        (row,) = BusyServer(server).admin("GET", "/api/usage?all=1")["byKey"]
        assert row["key_name"] == "anonymous"


SNIPPETS = {"curl": ["bash", "-c"], "python": [sys.executable, "-c"],
            "javascript": ["node", "--input-type=module", "-e"]}
HARD_QUESTION = "It's \"quoted\" $HOME `id` \\n \u00fc and\na second line"


@pytest.mark.exhaustive
@needs_browser
@pytest.mark.parametrize("form", ["python", *rest("curl", "javascript")])
def test_the_code_to_copy_asks_the_same(
    chrome: browser.Browser, busy: BusyServer, form: str
) -> None:
    program, *options = SNIPPETS[form]
    if form == "python":
        pytest.importorskip("openai")
    if not shutil.which(program):
        pytest.skip(f"no {program}")
    with opened(chrome, busy.server, "try") as page:
        page.until("document.querySelector('#try-model').value !== ''")
        page.evaluate("document.querySelector('#try-text').focus()")
        page.write(HARD_QUESTION)
        page.click(f"#try-forms input[value={form}]")
        page.sees({"curl": "curl ", "python": "openai", "javascript": "fetch("}[form], "#try-code")
        page.sees("a second line", "#try-code")
        code = page.evaluate("document.querySelector('#try-code').textContent")
        assert page.evaluate("tryBody(document.querySelector('#try-text').value).messages") == [
            {"role": "user", "content": HARD_QUESTION}]
    key = busy.secrets["laptop"]
    assert key not in code and ADMIN_KEY not in code
    done = subprocess.run(
        [program, *options, code], stdin=subprocess.DEVNULL, capture_output=True, timeout=120,
        env=clean_env(OCP_KEY=key))
    assert "Hello." in done.stdout.decode(), done.stderr.decode()
    asked = busy.server.queries()[-1]["messages"][-1]["content"]
    assert HARD_QUESTION in "".join(block.get("text", "") for block in asked)


# ---------------------------------------------------------------------------
# 9 Devices and codes
# ---------------------------------------------------------------------------

#: A decoder of QR codes that runs in the page, if it is installed.
DECODERS = [path for folder in client_folders()
            for path in folder.glob("node_modules/jsqr/dist/jsQR.js")]
#: How many bytes the versions of a code from 1 to 20 hold at level L: ISO/IEC 18004, table 7.
CAPACITIES = (17, 32, 53, 78, 106, 134, 154, 192, 230, 271,
              321, 367, 425, 458, 520, 586, 644, 718, 792, 858)
#: What a camera sees of a code: `decoded(code)` draws it, four points for a module.
DRAW_AND_DECODE = """window.decoded = (code) => {
  const side = 4 * (code.length + 8);
  const points = new Uint8ClampedArray(4 * side * side).fill(255);
  for (let y = 0; y < side; y++) for (let x = 0; x < side; x++) {
    const at = 4 * (y * side + x);
    if (code[(y >> 2) - 4]?.[(x >> 2) - 4]) points.fill(0, at, at + 3);
  }
  return jsQR(points, side, side)?.data ?? null;
}"""
needs_decoder = pytest.mark.skipif(
    not DECODERS, reason=how_to_install("jsqr"))


@pytest.mark.exhaustive
@needs_browser
@needs_decoder
def test_a_decoder_reads_codes_of_every_size_and_mask(
    chrome: browser.Browser, busy: BusyServer
) -> None:
    lengths = [1, *CAPACITIES, *(most + 1 for most in CAPACITIES[:-1])]
    texts = [("http://[fd00::1]:3456/dashboard/" * 27)[:length] for length in lengths]
    with opened(chrome, busy.server) as page:
        page.evaluate(DECODERS[0].read_text() + ";" + DRAW_AND_DECODE)
        for text in texts:
            version = 1 + sum(most < len(text) for most in CAPACITIES)
            code = f"qrCode({json.dumps(text)})"
            assert page.evaluate(f"[decoded({code}), {code}.length]") == [text, 17 + 4 * version]
        for version in (2, 7, 20):
            masks = page.evaluate(
                f"[0, 1, 2, 3, 4, 5, 6, 7].map((mask) => decoded(qrModules({version}, qrCodewords("
                f"[...new TextEncoder().encode('http://10.0.0.7:3456')], {version}), mask)))")
            assert masks == ["http://10.0.0.7:3456"] * 8
        assert page.evaluate("qrCode('x'.repeat(859))") is None


@needs_browser
@needs_decoder
def test_the_code_on_the_screen_is_the_address_of_the_dashboard_and_no_key(
    chrome: browser.Browser, tmp_path: Path
) -> None:
    env = {**MULTI, "OCP_PUBLIC_URL": "https://ocp.example.org"}
    with running_server(tmp_path, ANSWER, env=env) as server, opened(chrome, server) as page:
        page.sees("No request in this span", "#shares")
        page.tab_to("connect")
        page.press("Enter")
        page.write("phone")
        page.press("Enter")
        page.until("document.querySelector('#device').open")
        key = page.evaluate("document.querySelector('#device-key').textContent")
        command = page.evaluate("document.querySelector('#device-command').textContent")
        assert command == ("curl -fsSL https://ocp.example.org/connect | "
                           "python3 - https://ocp.example.org:443")
        page.sees("https://ocp.example.org/me", "#device-page")
        page.evaluate(DECODERS[0].read_text() + ";" + DRAW_AND_DECODE)
        # From the path that is drawn: one square for each dark module.
        shown = page.evaluate("""(() => {
            const svg = document.querySelector('.qr'), side = svg.viewBox.baseVal.width - 8;
            const rows = Array.from({length: side}, () => new Array(side).fill(false));
            for (const [, x, y] of svg.firstChild.getAttribute('d').matchAll(/M(\\d+) (\\d+)/g)) {
                rows[y - 4][x - 4] = true;
            }
            return decoded(rows); })()""")
        assert shown == "https://ocp.example.org/dashboard"
        assert key not in page.evaluate("location.href")
        assert server.call("GET", "/v1/models", headers=bearer(key)).status == 200
        page.press("Escape")
        page.until("document.activeElement.id === 'connect'")
        # The key goes with the event of closing, which comes behind the focus.
        page.until(f"!document.documentElement.outerHTML.includes('{key}')")


@pytest.mark.exhaustive
@needs_browser
def test_a_server_without_keys_shows_the_command_at_once_and_keeps_the_focus_inside(
    chrome: browser.Browser, tmp_path: Path
) -> None:
    with running_server(tmp_path, ANSWER, env=NO_KEY) as server, \
            opened(chrome, server, key="") as page:
        page.sees("No request in this span", "#shares")
        page.tab_to("connect")
        page.press("Enter")
        page.sees("Only this machine can reach the server", "#device")
        page.sees("This server wants no key", "#device")
        assert page.evaluate(
            "getComputedStyle(document.querySelector('#device .warn code')).display") == "inline"
        assert not page.evaluate("Boolean(document.querySelector('.qr, #device-key'))")
        for _ in range(8):
            page.press("Tab")
            assert page.evaluate("document.activeElement === document.body || "
                                 "document.querySelector('#device').contains("
                                 "document.activeElement)")
        page.press("Escape")
        page.until("document.activeElement.id === 'connect'")


@pytest.mark.exhaustive
@needs_browser
def test_arrow_keys_go_from_tab_to_tab(chrome: browser.Browser, busy: BusyServer) -> None:
    with opened(chrome, busy.server) as page:
        page.sees("laptop", "#shares")
        page.tab_to("Overview")
        page.press("ArrowLeft")
        assert page.focused() == "Log"
        page.press("Home")
        page.press("ArrowRight", times=3)
        assert page.focused() == "Try it"
        page.press("Enter")
        page.until("document.activeElement.id === 'title-try'")


#: Share used, share of the window passed when it was told, hours of the window, and the words.
FORECASTS = (
    (0.0, 0.5, 5, "Nothing used yet"),
    (0.3, 0.02, 5, "Too early to say how long it lasts"),
    (0.3, 0.5, 5, "At this pace it lasts until the reset"),
    (0.6, 0.5, 5, "At this pace empty at 14:10"),
    (0.8, 0.4, 168, "At this pace empty on Tuesday 03:00"),
    (1.0, 0.9, 168, "Used up until Fri 15:00"),
)


@pytest.mark.exhaustive
@needs_browser
def test_the_pace_of_a_window_is_told_in_words(chrome: browser.Browser, busy: BusyServer) -> None:
    with opened(chrome, busy.server) as page:
        # A Friday, in the browser's time zone.
        page.evaluate("window.reset = new Date(2026, 10, 27, 15).toISOString()")
        told = [page.evaluate(f"forecast({used}, {passed}, reset, {hours} * 3600e3)[0]")
                for used, passed, hours, _ in FORECASTS]
        assert told == [words for *_, words in FORECASTS]


@pytest.mark.exhaustive
@needs_browser
def test_the_command_names_the_fingerprint_of_a_certificate_that_nobody_vouches_for(
    chrome: browser.Browser, busy: BusyServer
) -> None:
    with opened(chrome, busy.server) as page:
        told = page.evaluate("""(() => {
            store.live.health.tlsFingerprint = 'SHA256:c29tZQ==';
            return ['https://10.0.0.7:3456', 'http://10.0.0.7:3456'].map(connectCommand); })()""")
        assert told == [
            "curl -fsS --insecure --pinnedpubkey sha256//c29tZQ== https://10.0.0.7:3456/connect "
            "| python3 - https://10.0.0.7:3456 --fingerprint SHA256:c29tZQ==",
            "curl -fsSL http://10.0.0.7:3456/connect | python3 - 10.0.0.7"]


@needs_browser
def test_alerts_show_with_their_delivery_and_a_test_can_be_sent(
    chrome: browser.Browser, tmp_path: Path
) -> None:
    filling = {"unifiedWindows": {
        "five_hour": {"utilization": 0.83, "resetsAt": int(time.time()) + 7000}}}
    turns = [[{"say": "Hello."}, {"finish": "end_turn", "rate_limit_info": filling}]]
    with running_server(tmp_path, turns, env=MULTI) as server, running_webhook() as webhook, opened(
            chrome, server) as page:
        page.sees("not known yet", "#facts")
        assert page.evaluate("document.querySelector('#alerts-card').hidden")
        server.call("PATCH", "/settings", {"alertUrl": webhook.url}, ADMIN)
        page.evaluate("location.reload()")
        page.sees(f"To 127.0.0.1:{webhook.port} (secret), format json.", "#alerts-hint")
        page.sees("None so far.", "#alerts")
        page.click("#test-alert")
        page.sees("The webhook took the test.", "#toast")
        page.sees("delivered", "#alerts")
        webhook.manners = [500]
        server.call("POST", "/v1/chat/completions", question("one"), ADMIN)
        page.sees("83 % of the plan's five hours is used", "#alerts")
        page.sees("it failed itself (status 500), sent 1 time", "#alerts")
        page.click("#test-alert")
        page.sees("Not delivered: it failed itself (status 500).", "#toast")
        page.evaluate("location.hash = 'settings'")
        page.sees(f"127.0.0.1:{webhook.port} (secret)", "#settings")
        page.click("[aria-label='Edit alertUrl']")
        assert page.evaluate("document.querySelector('#field-value').value") == ""
        assert "s3cret" not in page.evaluate("document.documentElement.outerHTML")


@needs_browser
def test_chats_show_with_their_accounts_and_who_waits_for_approval(
    chrome: browser.Browser, tmp_path: Path
) -> None:
    with FakeTelegram() as telegram, FakeAgent() as agent, Gateway(telegram, agent) as gateway:
        with running_server(tmp_path, ANSWER, env=MULTI) as server, opened(chrome, server) as page:
            page.sees("not known yet", "#facts")
            assert page.evaluate("document.querySelector('#channels-card').hidden")
            # The server looks in its own OCP_HOME; the path of a socket has to be short.
            for name in ("channels.json", "channels.sock"):
                (server.ocp_home / name).symlink_to(gateway.home / name)
            telegram.say("hello", sender=7)
            telegram.say("hello", sender=1000)
            eventually(lambda: telegram.screen(7) and telegram.screen(1000))
            page.evaluate("location.reload()")
            page.sees("Waiting for approval: 1. ocp channels pairing list", "#channels-hint")
            page.sees("telegram:default", "#channels")
            page.sees("running", "#channels")
            page.sees("0 parts", "#channels")
            telegram.fail("getMe", 401, "Unauthorized", times=99)
            gateway.kill()
            gateway.start()
            page.evaluate("location.reload()")
            page.sees("the token is refused: get a new one from @BotFather", "#channels")
            gateway.kill()
            page.evaluate("location.reload()")
            page.sees("The gateway does not run: ocp channels start -d", "#channels-hint")
            page.sees("No account runs.", "#channels")


@pytest.mark.exhaustive
@needs_browser
def test_a_newer_release_that_was_found_is_told(chrome: browser.Browser, tmp_path: Path) -> None:
    with running_server(tmp_path, ANSWER) as server, opened(chrome, server, key="") as page:
        note = server.ocp_home / "newest-release"
        told = []
        for words, is_newer in (
            ("99.0.1\n", True), ("0.0.1\n", False), ("99.0.2\n", True), ("soon\n", False)
        ):
            note.write_text(words)
            # The page asks again by itself; what it shows changes with every round.
            is_told = "document.querySelector('#notices').innerText !== ''"
            page.until(is_told if is_newer else f"!({is_told})")
            told.append(page.evaluate("document.querySelector('#notices').innerText"))

    assert "OCP 99.0.1 is available" in told[0] and "OCP 99.0.2 is available" in told[2]
    assert (told[1], told[3]) == ("", "")


@pytest.mark.exhaustive
@needs_browser
def test_copying_works_without_a_clipboard_too(chrome: browser.Browser, tmp_path: Path) -> None:
    with running_server(tmp_path, ANSWER) as server, opened(chrome, server, key="") as page:
        # As on http from another machine.
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined}); "
                      "addEventListener('copy', ({target}) => { window.taken = target.value; })")
        page.sees("No request in this span", "#shares")
        page.click("#connect")
        page.until("document.activeElement.getAttribute('aria-label') === 'Copy the command'")
        page.press("Enter")
        page.until("document.activeElement.innerText === 'Copied'")
        assert page.evaluate("taken === document.querySelector('#device-command').textContent")


# ---------------------------------------------------------------------------
# 10 Errors
# ---------------------------------------------------------------------------

@needs_browser
def test_a_failed_request_opens_and_says_what_to_do(
    chrome: browser.Browser, tmp_path: Path
) -> None:
    failing = [[{"api_error": {"status": 529, "word": "overloaded", "text": "Overloaded"}}]]
    with running_server(tmp_path, failing, env=MULTI) as server:
        made = BusyServer(server)
        made.key("laptop")
        failed = made.chat("laptop", "one")
        server.call("POST", "/v1/chat/completions", question("two"), bearer("ocp_mistyped"))
        with opened(chrome, server, "requests") as page:
            request = failed.headers["X-Request-Id"]
            page.sees(request, "#requests")
            page.tab_to(f"Why {request} failed")
            page.press("Enter")
            page.sees(f"Only request {request}", "#errors-hint")
            page.until("document.querySelectorAll('#errors details').length === 1")
            page.tab_to("filter-kind")
            page.press("Tab")
            page.press("Enter")
            page.until("document.querySelector('#errors details').open")
            for words in ("laptop", "What to do", request, str(failed.status)):
                page.sees(words, "#errors")
            page.click("#all-errors")
            page.sees("invalid_api_key", "#refusals")
            page.sees("What to do", "#kinds")
            chosen(page, "filter-kind", "invalid_api_key")
            page.sees("No request has failed", "#errors")
            # Opening the page itself is none of them.
            refused = made.admin("GET", "/api/errors")["refusals"]
            assert [each["kind"] for each in refused] == ["invalid_api_key"]


@needs_browser
def test_a_budget_is_set_in_dollars_and_shows_amber_from_the_warning_level(
    chrome: browser.Browser, tmp_path: Path
) -> None:
    with running_server(tmp_path, {"turns": ANSWER}, env=MULTI) as server:
        busy = BusyServer(server)
        busy.key("saver", softPercent=50, quota={"daily": 2}, modelQuotas={"opus": {
            "usdWeekly": 1.5}})
        assert busy.chat("saver", "one").status == 200
        with opened(chrome, server, "keys", expected=("401", "400")) as page:
            page.sees("1 of 2", "#keys strong.warn")
            page.sees("opus: USD a week", "#keys")
            page.sees("$0.00 of $1.50", "#keys")
            page.click("[aria-label='Quotas saver']")
            page.evaluate("document.querySelector('#field-usdMonthly').value = '20.25'")
            page.click("#asking-submit")
            page.sees("USD a month", "#keys")
            assert busy.admin("GET", "/api/keys/saver")["quota"]["usdMonthly"]["limit"] == 20.25
            page.click("[aria-label='Edit saver']")
            page.evaluate("document.querySelector('#field-softPercent').value = ''")
            assert page.evaluate("document.querySelector('#field-modelQuotas').value") == (
                "opus usdWeekly 1.5")
            page.evaluate("document.querySelector('#field-modelQuotas').value = "
                          "'opus usdWeekly 2 daily; haiku daily 9'")
            page.click("#asking-submit")
            page.sees("modelQuotas.opus.daily", "#asking-error")
            page.evaluate("document.querySelector('#field-modelQuotas').value = "
                          "'opus usdWeekly 2.5 daily 7;  haiku daily 9;'")
            page.click("#asking-submit")
            page.sees("haiku: requests a day", "#keys")
            assert busy.admin("GET", "/api/keys/saver")["modelQuotas"] == {
                "opus": {"usdWeekly": 2.5, "daily": 7}, "haiku": {"daily": 9}}
            page.until("!document.querySelector('#keys strong.warn')")
            page.evaluate("location.hash = 'overview'")
            page.sees("List price", "#totals")
            page.sees("List price", "#shares")


# ---------------------------------------------------------------------------
# 11 The login of claude, and captures
# ---------------------------------------------------------------------------

@needs_browser
def test_claude_is_logged_in_from_the_page(chrome: browser.Browser, tmp_path: Path) -> None:
    env = {"CLAUDE_AUTH_MODE": "multi", "OCP_ADMIN_KEY": ADMIN_KEY}
    with running_server(tmp_path, {"login": {"code": "good"}}, env=env) as server:
        with opened(chrome, server, expected=("401", "400")) as page:
            page.evaluate("document.querySelector('#log-in').click()")
            page.until("document.querySelector('#asking').open")
            address = page.evaluate("document.querySelector('#asking-fields code').textContent")
            link = page.evaluate("document.querySelector('#asking-fields a').href")
            assert address == link and address.startswith("https://claude.com/")
            page.until("document.activeElement.id === 'field-code'")
            page.write("good")
            page.press("Enter")
            page.sees("cut off", "#asking-error")
            page.evaluate("document.activeElement.select()")
            page.write("good#" + address.rpartition("=")[2])
            page.press("Enter")
            page.sees("Logged in: owner@example.com", "#toast")
        assert server.call("GET", "/api/login", headers=ADMIN).json()["state"] == "finished"


#: Longer than the addresses of claude 2.1.197 and 2.1.332, which have 450 and 497 characters.
LONG_ADDRESS = ("https://claude.com/cai/oauth/authorize?code=true&" +
                "scope=user%3Aprofile+" * 22 + "&state=")
#: What a camera reads: a function of the screenshot. It sees a bit more than the code, and has
#: two points for each pixel.
SCAN = """async (shot) => {
  const bytes = Uint8Array.from(atob(shot), (letter) => letter.charCodeAt(0));
  const box = document.querySelector('#asking .qr').getBoundingClientRect();
  const side = 2 * Math.round(box.width + 40);
  const pen = new OffscreenCanvas(side, side).getContext('2d');
  pen.scale(2, 2);
  pen.drawImage(await createImageBitmap(new Blob([bytes])), 20 - box.left, 20 - box.top);
  return jsQR(pen.getImageData(0, 0, side, side).data, side, side)?.data ?? null;
}"""


@pytest.mark.exhaustive
@needs_browser
@needs_decoder
@pytest.mark.parametrize(("width", "dark"), [(360, False), *rest((1280, False), (1280, True))])
def test_the_address_of_a_login_can_be_scanned_from_the_screen(
    chrome: browser.Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    env = {"CLAUDE_AUTH_MODE": "multi", "OCP_ADMIN_KEY": ADMIN_KEY}
    with running_server(tmp_path, {"login": {"url": LONG_ADDRESS}}, env=env) as server, \
            opened(chrome, server, width=width, dark=dark) as page:
        page.click("#log-in")
        page.until("document.querySelector('#asking').open")
        page.evaluate(DECODERS[0].read_text())
        address = page.evaluate("document.querySelector('#asking-fields code').textContent")
        assert address.startswith(LONG_ADDRESS) and 500 < len(address) <= 570
        shot = page.call("Page.captureScreenshot")["data"]
        assert page.evaluate(f"({SCAN})({json.dumps(shot)})") == address
        pixels, paper, is_too_wide = page.evaluate("""(() => {
            const svg = document.querySelector('#asking .qr'), box = svg.getBoundingClientRect();
            const dialog = document.querySelector('#asking');
            return [box.width / svg.viewBox.baseVal.width, getComputedStyle(svg).backgroundColor,
                    dialog.scrollWidth > dialog.clientWidth]; })()""")
        assert (pixels, paper, is_too_wide) == (3, "rgb(255, 255, 255)", False)


@pytest.mark.exhaustive
@needs_browser
def test_a_login_that_waits_shows_its_state_and_is_ended_from_the_page(
    chrome: browser.Browser, tmp_path: Path
) -> None:
    env = {"CLAUDE_AUTH_MODE": "multi", "OCP_ADMIN_KEY": ADMIN_KEY}
    with running_server(tmp_path, {"login": {"code": "good"}}, env=env) as server:
        with opened(chrome, server, expected=("401", "400")) as page:
            page.click("#log-in")
            page.sees("It waits for the code until", "#asking [role=status]")
            page.press("Escape")
            page.until("!document.querySelector('#asking').open")
            assert server.call("GET", "/api/login", headers=ADMIN).json()["state"] == "waiting"
            page.click("#log-in")
            page.until("document.querySelector('#asking').open")
            page.tab_to("End this login")
            page.press("Enter")
            page.sees("The login has been ended.", "#toast")
            assert not page.evaluate("document.querySelector('#asking').open")
            assert server.call("GET", "/api/login", headers=ADMIN).json()["state"] == "none"
            # One that ends elsewhere, or for which claude makes no second try, is told.
            page.click("#log-in")
            page.until("document.querySelector('#asking').open")
            server.call("DELETE", "/api/login", headers=ADMIN)
            page.sees("It has been ended.", "#asking [role=status]")
            assert "End this login" not in page.text("#asking")
            page.press("Escape")
            page.until("!document.querySelector('#asking').open")
            page.click("#log-in")
            page.until("document.querySelector('#asking').open")
            page.write("bad#" + page.evaluate(
                "document.querySelector('#asking-fields code').textContent").rpartition("=")[2])
            page.press("Enter")
            page.sees("The code was not accepted", "#asking [role=status]")


@needs_browser
def test_a_capture_is_seen_and_stopped_on_every_view(
    chrome: browser.Browser, tmp_path: Path
) -> None:
    env = {"CLAUDE_AUTH_MODE": "multi", "OCP_ADMIN_KEY": ADMIN_KEY}
    with running_server(tmp_path, env=env) as server:
        with opened(chrome, server, "keys") as page:
            assert server.call("POST", "/api/capture", {"requests": 3}, ADMIN).status == 201
            page.sees("Requests are written to files", "#notices .alarm")
            page.sees("the next 3 requests, until", "#notices .alarm")
            page.evaluate("document.querySelector('#notices .alarm button').click()")
            page.until("!document.querySelector('#notices .alarm')")
        assert server.call("GET", "/api/capture", headers=ADMIN).json()["active"] is False
