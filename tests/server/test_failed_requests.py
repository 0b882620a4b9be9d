"""Why a request failed: what a 401 says of the key that came, and what the operator finds at
/api/errors and in the log, by key, by request and by kind, also after a restart."""
from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from chat import CHAT_PATH, ask, both_ways, question
from dialects import DIALECTS, Dialect, dialect_name
from http_client import Reply
from keys import ADMIN_KEY, MULTI, SHARED, SHARED_KEY, as_admin, ask_as, bearer, new_key
from server import Server, running_server
from waiting import eventually

Json = Any

UNKNOWN = "ocp_" + "Qw7_" * 8
GOOD = [[{"say": "Yes."}]]
OVERLOADED = [[{"api_error": {"status": 529, "word": "overloaded", "text": "API Error: too busy"}}]]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of mode multi; every test makes keys of its own."""
    with running_server(tmp_path_factory.mktemp("house"), env=MULTI) as server:
        yield server


def error_in(reply: Reply) -> dict[str, Json]:
    """The error of any dialect."""
    error: dict[str, Json] = reply.json()["error"]
    return error


def report(server: Server, **query: object) -> dict[str, Json]:
    """What /api/errors says."""
    text = "&".join(f"{name}={quote(str(value))}" for name, value in query.items())
    reply = as_admin(server, "GET", f"/api/errors?{text}")
    assert reply.status == 200, reply
    found: dict[str, Json] = reply.json()
    return found


def id_of(reply: Reply) -> str:
    return str(reply.headers["X-Request-Id"])


def refusal_of(server: Server, reply: Reply) -> dict[str, Json]:
    """The only entry that the operator finds by the id of a refused request."""
    found = report(server, request=id_of(reply))
    assert found["errors"] == []
    (entry,) = found["refusals"]
    assert isinstance(entry, dict) and entry["id"] == id_of(reply)
    return entry


def lines_of(server: Server, reply: Reply) -> list[dict[str, Json]]:
    """The events of the log that belong to a request."""
    asked = as_admin(server, "GET", f"/logs?n=100&request={id_of(reply)}")
    entries: list[dict[str, Json]] = asked.json()["entries"]
    return entries


# -- which key, and what is wrong with it -----------------------------------------------------


def rotated(server: Server, name: str) -> str:
    old = str(new_key(server, name=name)["key"])
    assert as_admin(server, "POST", f"/api/keys/{name}/rotate", {}).status == 200
    return old


def revoked(server: Server, name: str) -> str:
    key = str(new_key(server, name=name)["key"])
    assert as_admin(server, "DELETE", f"/api/keys/{name}").status == 200
    return key


def expired(server: Server, name: str) -> str:
    """A key whose time is over."""
    server.write_scenario(GOOD)
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 2))
    key = str(new_key(server, name=name, expiry=at)["key"])
    deadline_s = time.monotonic() + 30
    while ask_as(server, key).status == 200 and time.monotonic() < deadline_s:
        time.sleep(0.2)
    return key


def short(key: str) -> str:
    return f"{key[:8]}...{key[-4:]}"


@pytest.mark.parametrize(("name", "make", "kind", "words"), [
    ("rotated", rotated, "replaced_api_key", "was replaced on 20"),
    ("revoked", revoked, "revoked_api_key", "was revoked on 20"),
    ("expired", expired, "expired_api_key", "expired on 20"),
])
def test_a_key_of_former_days_is_told_what_became_of_it(
    house: Server, name: str, make: Any, kind: str, words: str
) -> None:
    key = make(house, name)

    reply = ask_as(house, key)

    error = error_in(reply)
    assert (reply.status, error["type"], error["code"]) == (401, "authentication_error", kind)
    assert f"The key {short(key)} {words}" in error["message"]
    # Only the operator learns whose key it was.
    assert name not in error["message"].replace("expired on", "").replace("revoked on", "")
    entry = refusal_of(house, reply)
    assert (entry["kind"], entry["key"], entry["preview"]) == (kind, name, short(key))
    (line,) = lines_of(house, reply)
    assert (line["kind"], line["key"], line["preview"]) == (kind, name, short(key))


@pytest.mark.parametrize(("key", "kind", "words", "preview"), [
    ("", "missing_api_key", "No key came", None),
    (UNKNOWN, "invalid_api_key", "is unknown", short(UNKNOWN)),
    (UNKNOWN[:24], "invalid_api_key", "looks cut off: it has 24 characters", short(UNKNOWN[:24])),
    (UNKNOWN[4:], "invalid_api_key", "begin with ocp_", "Qw..."),
    ("unused", "invalid_api_key", "begin with ocp_", "(6 characters)"),
    ("sk-ant-api03-" + "s" * 40, "invalid_api_key", "one of Anthropic", "sk-ant-..."),
    ("sk-proj-" + "s" * 40, "invalid_api_key", "one of OpenAI", "sk-proj-..."),
    ("AIza" + "s" * 35, "invalid_api_key", "one of Google", "AIza..."),
], ids=lambda value: str(value)[:14])
def test_a_key_that_never_was_one_is_told_what_is_odd_about_it(
    house: Server, key: str, kind: str, words: str, preview: str | None
) -> None:
    reply = ask_as(house, key)

    error = error_in(reply)
    assert (reply.status, error["code"]) == (401, kind)
    assert words in error["message"]
    entry = refusal_of(house, reply)
    assert (entry["key"], entry["preview"], entry["kind"]) == (None, preview, kind)
    assert key == "" or key not in str(entry) + str(lines_of(house, reply))


def test_the_real_key_is_of_no_help_to_one_who_guesses(house: Server) -> None:
    real = str(new_key(house, name="guessed")["key"])
    near = real[:-1] + ("A" if real[-1] != "A" else "B")

    error = error_in(ask_as(house, near))

    assert error["code"] == "invalid_api_key" and short(near) in error["message"]
    assert error["message"].replace(short(near), "") == error_in(
        ask_as(house, UNKNOWN))["message"].replace(short(UNKNOWN), "")


@pytest.mark.parametrize("dialect", DIALECTS, ids=dialect_name)
def test_each_dialect_says_it_in_its_own_form(house: Server, dialect: Dialect) -> None:
    body = dialect.body("hi")

    reply = house.call("POST", dialect.path, body, bearer(UNKNOWN))

    value = reply.json()
    assert reply.status == 401 and "is unknown" in value["error"]["message"]
    assert value["error"]["type"] == "authentication_error"
    if "messages" in dialect.path:
        assert value["type"] == "error" and value["request_id"] == id_of(reply)
    else:
        assert value["error"]["code"] == "invalid_api_key"
    assert reply.headers["request-id"] == id_of(reply)


def test_of_two_wrong_keys_the_one_that_is_known_is_told(house: Server) -> None:
    old = rotated(house, "of-two")

    reply = house.call(
        "POST", CHAT_PATH, question(), {**bearer("sk-ant-" + "x" * 30), "x-api-key": old})

    assert error_in(reply)["code"] == "replaced_api_key"


def test_a_replaced_key_is_known_after_a_restart_until_its_rows_are_old(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        first = rotated(server, "phone")
        second = str(as_admin(server, "POST", "/api/keys/phone/rotate", {}).json()["key"])
        third = str(as_admin(server, "POST", "/api/keys/phone/rotate", {}).json()["key"])
        path = server.ocp_home / "ocp.db"
        assert server.stop() == 0
    with running_server(tmp_path, env=MULTI) as server:
        codes = [error_in(ask_as(server, key))["code"] for key in (first, second)]
        assert (codes, ask_as(server, third).status) == (["replaced_api_key"] * 2, 200)
        assert server.stop() == 0
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        stored = [row[0] for row in database.execute("SELECT hash FROM replaced_secrets")]
        database.execute("UPDATE replaced_secrets SET replaced_s = replaced_s - 86400 * 500")
    assert len(stored) == 3 and not any(key in str(stored) for key in (first, second, third))
    with running_server(tmp_path, env=MULTI) as server:
        # They are deleted soon after the start.
        eventually(lambda: error_in(ask_as(server, first))["code"] == "invalid_api_key")
        assert ask_as(server, third).status == 200


def test_in_mode_shared_no_word_about_the_key_is_logged_that_might_be_it(tmp_path: Path) -> None:
    with running_server(tmp_path, env=SHARED) as server:
        reply = ask_as(server, SHARED_KEY[:-1])
        entry = refusal_of(server, reply)

        assert "is unknown" in error_in(reply)["message"]
        assert entry["preview"] == SHARED_KEY[:2] + "..."


# -- what the operator finds ------------------------------------------------------------------


@both_ways
def test_a_failed_request_is_found_with_its_message_and_what_to_do(
    house: Server, stream: bool
) -> None:
    key = new_key(house, name=f"tablet {stream}")
    house.write_scenario(OVERLOADED)

    reply = house.call(
        "POST", CHAT_PATH, question(stream=stream),
        {**bearer(str(key["key"])), "User-Agent": "toaster/1.0"})

    found = report(house, request=id_of(reply))
    (entry,) = found["errors"]
    assert found["refusals"] == []
    assert (entry["id"], entry["key"], entry["status"]) == (id_of(reply), key["name"], 529)
    assert (entry["path"], entry["kind"]) == (CHAT_PATH, "overloaded")
    assert entry["message"] == error_in(reply)["message"] and "too busy" in entry["message"]
    assert entry["model"] == "claude-sonnet-5-5" and entry["action"]
    assert (entry["peer"], entry["userAgent"]) == ("127.0.0.1", "toaster/1.0")
    assert [each["kind"] for each in found["byKind"]] == ["overloaded"]
    (line,) = [each for each in lines_of(house, reply) if each["event"] == "answer_failed"]
    assert (line["kind"], line["message"]) == ("overloaded", entry["message"])


def test_every_failure_has_the_same_name_everywhere(house: Server) -> None:
    key = str(new_key(house, name="names")["key"])
    house.write_scenario(OVERLOADED)
    reply = ask_as(house, key)

    rows = house.call("GET", "/api/usage?limit=1", headers=bearer(key)).json()["recent"]
    status = as_admin(house, "GET", "/status").json()["recentErrors"][-1]

    assert error_in(reply)["code"] == rows[0]["outcome"] == status["kind"] == "overloaded"
    assert rows[0]["message"] == status["message"] == error_in(reply)["message"]
    assert (status["key"], status["id"]) == ("names", id_of(reply))


def test_filters_narrow_what_is_told(house: Server) -> None:
    mine, other = (str(new_key(house, name=name)["key"]) for name in ("mine", "other"))
    house.write_scenario(OVERLOADED)
    failed = ask_as(house, mine)
    ask_as(house, other)
    unknown = ask_as(house, mine, model="gpt-9")

    found = report(house, key="Mine")
    assert [each["id"] for each in found["errors"]] == [id_of(failed)]
    assert [each["id"] for each in found["refusals"]] == [id_of(unknown)]
    assert {each["kind"]: each["count"] for each in found["byKind"]} == {
        "overloaded": 1, "model_not_found": 1}
    assert report(house, key="mine", kind="model_not_found")["errors"] == []
    assert report(house, since="0h") == {"errors": [], "refusals": [], "byKind": []}
    assert report(house, key="mine", limit=0)["errors"] == []
    assert len(report(house, key="mine", limit=0)["byKind"]) == 2


@pytest.mark.parametrize(("query", "status"), [
    ("since=yesterday", 400), ("limit=501", 400), ("limit=x", 400), ("key=nobody", 404),
])
def test_a_filter_that_makes_no_sense_is_refused(house: Server, query: str, status: int) -> None:
    reply = as_admin(house, "GET", f"/api/errors?{query}")

    assert reply.status == status and error_in(reply)["message"]


def test_refusals_of_the_same_kind_are_one_entry(house: Server) -> None:
    old = rotated(house, "often")

    replies = [ask_as(house, old) for _ in range(7)]

    (entry,) = report(house, key="often")["refusals"]
    assert (entry["count"], entry["id"]) == (7, id_of(replies[-1]))
    assert refusal_of(house, replies[0])["count"] == 7
    assert "`ocp keys rotate often`" in entry["action"]


def test_requests_that_are_turned_away_before_they_are_understood_are_listed(
    house: Server
) -> None:
    house.write_scenario(GOOD)
    key = str(new_key(house, name="limited", quota={"daily": 1})["key"])
    assert ask_as(house, key).status == 200
    replies = {
        "quota_exceeded": ask_as(house, key),
        "admin_key_required": house.call("GET", "/api/keys", headers=bearer(key)),
        "host_not_allowed": house.call("GET", "/health", headers={"Host": "evil.example"}),
        "origin_not_allowed": house.call("GET", "/health", headers={"Origin": "http://e.example"}),
        "not_found": house.call("GET", "/nothing"),
        "invalid_request_error": as_admin(house, "POST", CHAT_PATH, b"{"),
    }

    for kind, reply in replies.items():
        entry = refusal_of(house, reply)
        assert (entry["kind"], entry["status"]) == (kind, reply.status)
        assert entry["message"] == error_in(reply)["message"] and entry["action"]
    assert refusal_of(house, replies["admin_key_required"])["key"] == "limited"


def test_a_server_without_claude_lists_whom_it_turned_away(tmp_path: Path) -> None:
    with running_server(tmp_path, claude=tmp_path / "nothing") as server:
        reply = ask(server)
        found = server.call("GET", "/api/errors").json()

    assert [(each["id"], each["kind"]) for each in found["refusals"]] == [
        (id_of(reply), "claude_unavailable")]


def test_after_a_restart_the_log_and_the_refusals_are_still_told(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        new_key(server, name="phone")
        refused = ask_as(server, UNKNOWN)
        server.write_scenario(OVERLOADED)
        failed = ask_as(server, ADMIN_KEY)
        assert server.stop() == 0
    with running_server(tmp_path, env=MULTI) as server:
        events = [
            each["event"] for each in as_admin(server, "GET", "/logs?n=1000").json()["entries"]]
        audits = as_admin(server, "GET", "/logs?level=audit").json()["entries"]

        assert events.count("server_started") == 2 and events.count("key_created") == 1
        assert [each["event"] for each in audits][-1] == "key_created"
        assert [each["event"] for each in lines_of(server, failed)][-1] == "answer_failed"
        assert refusal_of(server, refused)["preview"] == short(UNKNOWN)
        assert report(server, request=id_of(failed))["errors"][0]["kind"] == "overloaded"


def test_the_log_is_found_by_key_and_time(house: Server) -> None:
    house.write_scenario(GOOD)
    key = str(new_key(house, name="logged")["key"])
    ask_as(house, key)

    entries = as_admin(house, "GET", "/logs?n=100&key=LOGGED").json()["entries"]

    assert {each.get("key") or each["caller"] for each in entries} == {"logged"}
    assert {"key_created", "answer_finished"} <= {each["event"] for each in entries}
    assert as_admin(house, "GET", "/logs?n=9&key=logged&since=0m").json()["entries"] == []
    assert as_admin(house, "GET", "/logs?since=soon").status == 400


def test_only_the_operator_reads_what_failed(house: Server) -> None:
    key = str(new_key(house, name="curious")["key"])

    assert house.call("GET", "/api/errors", headers=bearer(key)).status == 403
    assert house.call("GET", "/api/errors").status == 401
