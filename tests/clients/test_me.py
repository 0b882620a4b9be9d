"""The page for the holder of a key, /me, in a real browser. The page as text: test_pages.py.

Index: 1 the key   2 what it shows   3 trying it   4 coming and going   5 hostile names, widths
"""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import pytest

import browser
from chat import HANG
from depth import rest
from http_client import Reply
from keys import (
    ADMIN_KEY,
    MULTI,
    SHARED,
    SHARED_KEY,
    as_admin,
    ask_as,
    bearer,
    key_in_place,
    new_key,
)
from project import REPO, free_port, load_script
from server import Place, Server, running_server

Json = Any
ocp = load_script("ocp_server")
needs_browser = pytest.mark.skipif(
    browser.browser_program() is None, reason=browser.HOW_TO_INSTALL)
ANSWER = [[{"say": "Hello."}]]
OVERLOADED = {"api_error": {"status": 529, "word": "overloaded", "text": "Overloaded"}}
ENV = {**MULTI, "OCP_INSTANCE_NAME": "attic"}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of mode multi; every test makes keys of its own."""
    with running_server(tmp_path_factory.mktemp("house"), ANSWER, env=ENV) as server:
        yield server


@pytest.fixture(autouse=True)
def default_answers(request: pytest.FixtureRequest) -> None:
    if "house" in request.fixturenames:
        request.getfixturevalue("house").write_scenario(ANSWER)


def type_key(page: browser.Page, key: str) -> None:
    page.until("!document.querySelector('#gate').hidden")
    page.until("document.activeElement.id === 'gate-key'")
    page.write(key)
    page.press("Enter")


@contextmanager
def opened(
    chrome: browser.Browser, server: Server, key: str = "", width: int = 1280, dark: bool = False,
    expected: tuple[str, ...] = (),
) -> Iterator[browser.Page]:
    """The page after its key was typed in; at the end nothing else may be in the console."""
    with chrome.page(f"{server.url}/me", width, dark) as page:
        if key:
            type_key(page, key)
        page.sees("Running", "#state")
        page.until("!document.querySelector('#own').hidden")
        yield page
        assert [each for each in page.complaints
                if not any(word in each for word in expected)] == []


def asked(server: Server, made: dict[str, Json], text: str = "hi", **fields: Json) -> Reply:
    reply = ask_as(server, made["key"], text, **fields)
    assert reply.status == 200, reply
    return reply


# ---------------------------------------------------------------------------
# 1 The key
# ---------------------------------------------------------------------------

@needs_browser
def test_the_key_is_kept_in_the_tab_only_and_forgotten_when_asked(
    chrome: browser.Browser, house: Server
) -> None:
    made = new_key(house, name="tab")
    with opened(chrome, house, made["key"]) as page:
        page.sees("tab", "#facts")
        kept = page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]")
        assert kept == [1, 0, ""]
        shown = page.evaluate("location.href + document.documentElement.outerHTML")
        assert made["key"] not in shown and page.evaluate("location.href").endswith("/me")
        page.go(f"{house.url}/me")
        page.sees("tab", "#facts")
        page.tab_to("forget-key")
        page.press("Enter")
        page.until("!document.querySelector('#gate')?.hidden")
        assert page.evaluate("sessionStorage.length") == 0
    # Nobody was refused: the page does not ask before it has a key.
    refusals = as_admin(house, "GET", "/api/errors").json()["refusals"]
    assert [each for each in refusals if each["kind"] == "missing_api_key"] == []


@needs_browser
def test_a_key_that_does_not_open_the_page_is_told_why(
    chrome: browser.Browser, tmp_path: Path
) -> None:
    database = Place(tmp_path).ocp_home / "ocp.db"
    keys = {
        "is wrong": "ocp_" + "A" * 32,
        "was revoked": key_in_place(database, "old", revoked=True),
        "has expired": key_in_place(database, "late", columns={"expiry_s": int(time.time()) - 5}),
    }
    with running_server(tmp_path, ANSWER, env=ENV) as server:
        made = new_key(server, name="turned")
        as_admin(server, "POST", f"/api/keys/{made['id']}/rotate")
        keys["was replaced"] = made["key"]
        with chrome.page(f"{server.url}/me") as page:
            for words, key in keys.items():
                type_key(page, key)
                page.sees(f"This key {words}.", "#gate-error")
                page.sees("operator", "#gate-error")
                assert page.evaluate("sessionStorage.length") == 0
                page.evaluate("document.querySelector('#gate-key').value = ''")
            type_key(page, "two words")
            page.sees("has no spaces", "#gate-error")
            assert not page.evaluate("document.querySelector('#own').checkVisibility()")


@needs_browser
def test_a_key_that_ends_while_the_page_is_open_closes_it(
    chrome: browser.Browser, house: Server
) -> None:
    made = new_key(house, name="short")
    with opened(chrome, house, made["key"], expected=("401",)) as page:
        page.sees("short", "#facts")
        as_admin(house, "DELETE", f"/api/keys/{made['id']}")
        page.evaluate("Promise.all([load(), load()])")
        page.sees("This key was revoked.", "#gate-error")
        assert not page.evaluate("document.querySelector('#own').checkVisibility()")
        assert page.evaluate("sessionStorage.length") == 0


@needs_browser
def test_the_operator_is_led_to_the_dashboard(chrome: browser.Browser, house: Server) -> None:
    with opened(chrome, house, ADMIN_KEY) as page:
        page.sees("the dashboard of the operator", "#facts")
        page.sees('of all who come as "admin" together', "#facts")
        assert page.evaluate("document.querySelector('#facts a').href") == f"{house.url}/dashboard"


@pytest.mark.exhaustive
@needs_browser
def test_the_shared_key_opens_it_and_without_keys_it_is_open(
    chrome: browser.Browser, tmp_path: Path, shared_server: Server
) -> None:
    with running_server(tmp_path, ANSWER, env=SHARED) as server, \
            opened(chrome, server, SHARED_KEY) as page:
        page.sees("No limit is set for this key", "#quotas-hint")
        page.sees("shared", "#facts")
    with opened(chrome, shared_server) as page:
        page.sees("This server wants no key", "#quotas-hint")
        page.sees("local", "#facts")
        assert not page.evaluate("document.querySelector('#forget-key').checkVisibility()")


# ---------------------------------------------------------------------------
# 2 What it shows
# ---------------------------------------------------------------------------

def bar_of(page: browser.Page, label: str) -> Json:
    """What a bar says, and the classes of its level."""
    return page.evaluate(f"""(() => {{
        const meter = document.querySelector('[role=meter][aria-label="{label}"]');
        return [meter.getAttribute('aria-valuetext'), meter.firstChild.className]; }})()""")


@needs_browser
def test_quotas_are_bars_with_what_is_left_and_their_resets(
    chrome: browser.Browser, house: Server
) -> None:
    made = new_key(house, quota={"daily": 10, "weekly": 4, "monthly": 3, "tokensMonthly": 90_000},
                   models=["haiku"], maxConcurrent=2, expiry="30d")
    for _ in range(3):
        asked(house, made, model="haiku")
    with opened(chrome, house, made["key"]) as page:
        page.sees("of 10", "#quotas")
        assert bar_of(page, "Requests a day") == ["3 of 10", ""]
        assert bar_of(page, "Requests a week") == ["3 of 4", "warn"]
        assert bar_of(page, "Requests a month") == ["3 of 3", "bad"]
        assert bar_of(page, "Tokens a month") == ["75 of 90K", ""]
        page.sees("7 left, resets ", "#quotas")
        page.sees("Used up, resets ", "#quotas")
        page.sees("haiku", "#facts")
        page.sees("2 answers", "#facts")
        page.sees("claude-haiku", "#models")
        assert "Requests 3 Failed 0 Tokens 75" in " ".join(page.text("#totals").split())
        assert page.evaluate("document.querySelectorAll('#days tbody tr').length") == 1


@pytest.mark.exhaustive
@needs_browser
def test_budgets_in_money_are_at_list_price_and_turn_amber_at_their_warning_level(
    chrome: browser.Browser, house: Server
) -> None:
    made = new_key(house, quota={"usdDaily": 2.5}, softPercent=50,
                   modelQuotas={"haiku": {"daily": 4}})
    asked(house, made, model="haiku")
    with opened(chrome, house, made["key"]) as page:
        page.sees("of $2.50", "#quotas")
        page.sees("List price", "#totals")
        page.sees("nobody pays by the token", "#price-hint")
        page.sees("List price", "#models")
        assert bar_of(page, "haiku: requests a day") == ["1 of 4", ""]
        assert page.evaluate("document.querySelector('#quotas b').title") == "Warning level: 50 %"
        page.sees("The mark on a bar is your warning level: 50 %.", "#quotas-hint")
        # As after more requests.
        told = house.call("GET", "/v1/key", headers=bearer(made["key"])).json()["data"]
        told["ocp"]["quota"]["usdDaily"].update(used=1.4, soft=True)
        page.evaluate(f"showQuotas({json.dumps(told)})")
        assert bar_of(page, "List price a day") == ["$1.40 of $2.50", "warn"]
        page.sees("$1.10 left", "#quotas")


@needs_browser
def test_a_limit_of_nothing_is_a_key_that_is_blocked(
    chrome: browser.Browser, house: Server
) -> None:
    with opened(chrome, house, new_key(house, quota={"daily": 0})["key"]) as page:
        page.sees("The operator has blocked this.", "#quotas")
        assert "resets" not in page.text("#quotas")
        assert page.text("#quotas-hint") == ""


@needs_browser
def test_a_failed_request_is_told_in_plain_words_and_with_what_to_do(
    chrome: browser.Browser, house: Server
) -> None:
    made = new_key(house)
    asked(house, made)
    house.write_scenario([[OVERLOADED]])
    failed = ask_as(house, made["key"])
    with opened(chrome, house, made["key"]) as page:
        page.sees("The API is overloaded", "#recent")
        page.sees("Answered", "#recent")
        page.tab_to(page.evaluate("document.querySelector('#recent summary').innerText"))
        page.press("Enter")
        page.sees("Try again in a few minutes.", "#recent [open]")
        page.sees(str(failed.headers["X-Request-Id"]), "#recent [open]")
        # It stays open when another request comes.
        house.write_scenario(ANSWER)
        asked(house, made)
        page.evaluate("load()")
        page.until("document.querySelectorAll('#recent details').length === 3")
        assert "Try again in a few minutes." in page.text("#recent [open]")


def test_every_fault_that_the_page_explains_is_a_kind_of_the_server() -> None:
    text = (REPO / "me.html").read_text("utf-8")
    table = text.partition("const FAULTS = {")[2].partition("\n};")[0]
    kinds = {line.strip().partition(":")[0] for line in table.splitlines() if ": [" in line}
    assert len(kinds) > 10
    assert kinds - {ocp.ClientGone.outcome} <= set(ocp.ACTIONS)


@needs_browser
def test_the_tools_get_the_address_under_which_the_page_was_opened(
    chrome: browser.Browser, house: Server
) -> None:
    made = new_key(house)
    with opened(chrome, house, made["key"]) as page:
        for text in (f"curl -fsSL {house.url}/connect | python3 - {house.url}",
                     f"{house.url}/v1/key", "works on this machine only"):
            page.sees(text, "#connect")
        page.evaluate("store.health.tlsFingerprint = 'SHA256:c29tZQ=='")
        assert page.evaluate("connectCommand('https://attic.lan:3456')") == (
            "curl -fsS --insecure --pinnedpubkey sha256//c29tZQ== https://attic.lan:3456/connect "
            "| python3 - https://attic.lan:3456 --fingerprint SHA256:c29tZQ==")
        page.tab_to("Copy the base address")
        page.press("Enter")
        page.until("document.querySelector('#toast').innerText !== ''")


# ---------------------------------------------------------------------------
# 3 Trying it
# ---------------------------------------------------------------------------

def say(page: browser.Page, text: str) -> None:
    page.until("document.querySelector('#try-model').value !== ''")
    page.evaluate("document.querySelector('#try-text').focus()")
    page.write(text)
    page.press("Enter")


@needs_browser
def test_a_conversation_goes_on_and_ends_at_the_quota_with_what_to_do(
    chrome: browser.Browser, house: Server
) -> None:
    made = new_key(house, quota={"daily": 2}, models=["haiku"])
    house.write_scenario([[{"say": "Good day."}]])
    with opened(chrome, house, made["key"], expected=("429",)) as page:
        assert "haiku" in page.evaluate("document.querySelector('#try-model').value")
        say(page, "Hello")
        page.sees("Good day.", "#talk")
        page.until("document.querySelector('#try-text').value === ''")
        # The page has seen that the answer counts.
        page.sees("1 of 2", "#quotas")
        assert page.evaluate("tryBody('next').messages.map(({content}) => content)") == [
            "Hello", "Good day.", "next"]
        asked(house, made, model="haiku")
        say(page, "And now?")
        page.sees("has used 2 of its 2 requests", "#talk .error:not(:empty)")
        page.sees("ask the operator for more", "#talk .error:not(:empty)")
        # What was not answered can be sent again.
        assert page.evaluate("document.querySelector('#try-text').value") == "And now?"
        page.sees("2 of 2", "#quotas")
        page.click("#try-clear")
        page.until("document.querySelector('#talk').children.length === 0")


@pytest.mark.exhaustive
@needs_browser
def test_an_answer_can_be_stopped(chrome: browser.Browser, house: Server) -> None:
    made = new_key(house)
    house.write_scenario([[{"say": "To begin with, "}, HANG]])
    with opened(chrome, house, made["key"]) as page:
        say(page, "Go on.")
        page.sees("To begin with,", "#talk")
        page.tab_to("try-stop")
        page.press("Enter")
        page.sees("Stopped.", "#talk")
        page.sees("Stopped before its end", "#recent")
        assert "To begin with," in page.text("#talk"), "what came stays on the screen"


# ---------------------------------------------------------------------------
# 4 Coming and going
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
@needs_browser
def test_a_server_that_is_away_is_told_and_found_again(
    chrome: browser.Browser, tmp_path: Path
) -> None:
    env = {**ENV, "CLAUDE_PROXY_PORT": str(free_port())}
    with running_server(tmp_path, ANSWER, env=env) as server:
        made = new_key(server, name="steady")
        page_of_it = opened(chrome, server, made["key"], expected=("ERR_",))
        page = page_of_it.__enter__()
        page.sees("steady", "#facts")
    page.evaluate("load()")
    page.sees("Disconnected", "#state")
    page.sees("The server does not answer", "#problem")
    with running_server(tmp_path, ANSWER, env=env):
        page.evaluate("load()")
        page.sees("Running", "#state")
        assert not page.evaluate("document.querySelector('#problem').checkVisibility()")
    page_of_it.__exit__(None, None, None)


# ---------------------------------------------------------------------------
# 5 Hostile names, widths
# ---------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=window.broken=1>\"'`${broken}</script>"


@pytest.mark.exhaustive
@needs_browser
def test_hostile_names_are_text(chrome: browser.Browser, tmp_path: Path) -> None:
    env = {**ENV, "OCP_INSTANCE_NAME": HOSTILE}
    with running_server(tmp_path, ANSWER, env=env) as server:
        made = new_key(server, name="victim", quota={"daily": 5})
        asked(server, made)
        database = sqlite3.connect(server.ocp_home / "ocp.db")
        with database:
            database.execute("UPDATE keys SET name = ?", (HOSTILE,))
            database.execute("UPDATE usage SET model = ?, outcome = ?, request_id = ?, message = ?",
                             (HOSTILE,) * 4)
        database.close()
    # The server reads the names of keys when it starts.
    with running_server(tmp_path, ANSWER, env=env) as server, \
            opened(chrome, server, made["key"]) as page:
        for place in ("#facts", "#models", "#recent", "#version"):
            page.sees(HOSTILE, place)
        assert page.evaluate("[window.broken, document.images.length]") == [None, 0]


@pytest.mark.exhaustive
@needs_browser
@pytest.mark.parametrize("width", [320, *rest(360, 768, 1440)])
def test_the_page_is_not_wider_than_its_window(
    chrome: browser.Browser, house: Server, width: int
) -> None:
    made = new_key(house, quota={"daily": 5, "tokensWeekly": 123_456_789}, name=f"{width:W>64}")
    asked(house, made)
    with chrome.page(f"{house.url}/me", width) as page:
        page.until("!document.querySelector('#gate').hidden")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    with opened(chrome, house, made["key"], width=width, dark=width == 360) as page:
        page.sees("of 5", "#quotas")
        page.evaluate("document.querySelector('#recent details').open = true")
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@needs_browser
def test_headings_landmarks_and_names_are_there(chrome: browser.Browser, house: Server) -> None:
    made = new_key(house, quota={"daily": 5})
    asked(house, made)
    with opened(chrome, house, made["key"]) as page:
        page.sees("of 5", "#quotas")
        page.call("Accessibility.enable")
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        named = {(node.get("role", {}).get("value"), node.get("name", {}).get("value"))
                 for node in nodes if not node.get("ignored")}
        assert {("heading", "OCP"), ("heading", "What is left"), ("region", "Try it"),
                ("meter", "Requests a day"), ("table", "Usage by model"),
                ("textbox", "Message"), ("button", "Copy the command")} <= named
        assert {"main", "banner", "status"} <= {role for role, _ in named}
        assert not [pair for pair in named
                    if pair[0] in ("button", "link", "textbox", "combobox") and not pair[1]]
