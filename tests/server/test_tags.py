"""Tags: who is behind a key, as requests say it, and where that shows."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from chat import HANG, NO_IDLE, ask, content_of, encoded, error_of, question
from dialects import DIALECTS, MESSAGES, Dialect, dialect_name
from http_client import Reply
from keys import MULTI, as_admin, ask_as, bearer, new_key
from project import load_script
from raw_http import RawConnection, post
from server import Server, running_server
from waiting import eventually

ocp = load_script("ocp_server.py")

Json = Any
OPEN_WEBUI = "X-OpenWebUI-User-Name"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {**NO_IDLE, "OCP_TAG_FROM": f"{OPEN_WEBUI}, body"}
    with running_server(tmp_path_factory.mktemp("tags"), env=env) as running_one:
        yield running_one


def newest(server: Server) -> dict[str, Json]:
    """The newest row."""
    found: dict[str, Json] = server.call("GET", "/api/usage?limit=1").json()["recent"][0]
    return found


def headed(server: Server, value: str, **fields: Json) -> Reply:
    """A request with this header, one byte for each character."""
    with RawConnection(server.port) as wire:
        body = encoded(question(**fields))
        wire.send(post(body, f"{OPEN_WEBUI}: {value}"))
        return wire.reply()


@pytest.mark.parametrize("dialect", DIALECTS, ids=dialect_name)
def test_every_dialect_takes_the_user_of_its_body(server: Server, dialect: Dialect) -> None:
    user: Json = {"metadata": {"user_id": "anna"}} if dialect is MESSAGES else {"user": "anna"}

    reply = server.call("POST", dialect.path, dialect.body("Hello", **user))

    dialect.read_success(reply)
    assert newest(server)["tag"] == "anna"
    assert "user" not in str(reply.headers["X-OCP-Ignored-Params"])


@pytest.mark.parametrize(("fields", "tag"), [
    ({"user": "a", "safety_identifier": "b", "metadata": {"user_id": "c"}}, "a"),
    ({"safety_identifier": "b", "metadata": {"user_id": "c"}}, "b"),
    ({"user": " ", "metadata": {"user_id": "c"}}, "c"),
    ({"user": None}, None), ({"user": 7, "metadata": ["user_id"]}, None), ({}, None),
    ({"user": {"name": "anna"}, "metadata": {"user_id": None}}, None),
])
def test_the_first_field_that_says_something_counts(
    server: Server, fields: dict[str, Json], tag: str
) -> None:
    assert ask(server, **fields).status == 200

    assert newest(server)["tag"] == tag


@pytest.mark.parametrize(("value", "tag"), [
    ("Anna", "Anna"), (quote("J\u00f6rg M\u00fcller", safe=" "), "J\u00f6rg M\u00fcller"),
    (quote("\u5f20\u4f1f", safe=" "), "\u5f20\u4f1f"), ("100%", "100%"),
    ("J\u00f6rg".encode().decode("latin-1"), "J\u00f6rg"), ("%ff", "\ufffd"),
    ("%0d%0aSet-Cookie:%20a", "Set-Cookie: a"), ("", "from the body"),
])
def test_a_header_that_the_operator_names_comes_first(
    server: Server, value: str, tag: str
) -> None:
    assert headed(server, value, user="from the body").status == 200

    assert newest(server)["tag"] == tag


def test_tags_are_off_unless_they_are_switched_on(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        reply = ask(server, user="anna")
        assert reply.headers["X-OCP-Ignored-Params"] == "user"
        report = server.call("GET", "/api/usage").json()
        assert report["recent"][0]["tag"] is None and report["byTag"] == []

        changed = server.call("PATCH", "/settings", {"tagFrom": "body"})
        assert changed.status == 200
        ask(server, user="anna")
        report = server.call("GET", "/api/usage").json()
        assert [(row["tag"], row["requests"]) for row in report["byTag"]] == [
            ("(none)", 1), ("anna", 1)]


@pytest.mark.parametrize("value", [
    "Authorization", "x-api-key", "body,Cookie", "two words", "X-Name:", "\u00fcser", "a" * 101])
def test_a_header_that_cannot_be_or_has_secrets_is_refused(server: Server, value: str) -> None:
    reply = server.call("PATCH", "/settings", {"tagFrom": value})

    assert reply.status == 400
    assert "OCP_TAG_FROM takes body" in reply.json()["errors"][0]


def test_a_tag_shows_while_a_request_runs_and_in_no_metric(server: Server) -> None:
    server.write_scenario([[HANG]])
    with RawConnection(server.port) as wire:
        wire.send(post(encoded(question(user="visible"))))
        (entry,) = eventually(lambda: server.call("GET", "/api/requests").json()["requests"])
    server.write_scenario([])
    assert entry["tag"] == "visible"
    assert eventually(lambda: newest(server)["tag"] == "visible")
    assert "visible" not in server.call("GET", "/metrics").text
    assert "visible" not in server.call("GET", "/health").text


def test_a_conversation_and_the_cache_do_not_know_tags(tmp_path: Path) -> None:
    env = {"OCP_TAG_FROM": "body", "OCP_WARM_PROCESSES": "0", "CLAUDE_CACHE_TTL": "1h"}
    with running_server(tmp_path, env=env) as server:
        first = content_of(ask(server, "One", user="anna"))
        messages = [{"role": "user", "content": "One"}, {"role": "assistant", "content": first},
                    {"role": "user", "content": "Two"}]
        ask(server, messages=messages, user="ben")
        ask(server, "One", user="ben")

        recent = server.call("GET", "/api/usage").json()["recent"]

        assert [(row["path"], row["tag"]) for row in reversed(recent)] == [
            ("fresh", "anna"), ("continued", "ben"), ("cached", "ben")]


def test_a_key_sees_the_tags_of_its_own_requests(tmp_path: Path) -> None:
    with running_server(tmp_path, env={**MULTI, "OCP_TAG_FROM": "body"}) as server:
        webui, laptop = (new_key(server, name=name)["key"] for name in ("webui", "laptop"))
        ask_as(server, webui, user="anna")
        ask_as(server, laptop, user="ben")

        own = server.call("GET", "/api/usage", headers=bearer(webui)).json()
        every = as_admin(server, "GET", "/api/usage?all=true").json()

        assert [row["tag"] for row in own["byTag"]] == ["anna"]
        assert [row["tag"] for row in every["byTag"]] == ["anna", "ben"]
        assert sum(row["output_tokens"] for row in every["byTag"]) == (
            every["totals"]["output_tokens"])


def test_a_failed_request_has_its_tag(server: Server) -> None:
    server.write_scenario([[{"api_error": {
        "status": 529, "word": "overloaded", "text": "API Error: too busy"}}]])
    reply = ask(server, user="unlucky")
    server.write_scenario([])
    assert error_of(reply)["code"] == "overloaded"
    assert (newest(server)["outcome"], newest(server)["tag"]) == ("overloaded", "unlucky")


# ---------------------------------------------------------------------------
# How many there may be
# ---------------------------------------------------------------------------


def with_rows(folder: Path, tags: list[str]) -> None:
    """Puts rows of this moment into the database of a server that does not run: copies of its
    only row, with these tags."""
    with contextlib.closing(sqlite3.connect(next(folder.rglob("ocp.db")))) as database:
        names = [each[1] for each in database.execute("PRAGMA table_info(usage)")][1:]
        row = dict(zip(names, database.execute(
            f"SELECT {', '.join(names)} FROM usage").fetchone()))
        database.executemany(
            f"INSERT INTO usage ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})",
            ([*{**row, "at_s": time.time(), "tag": tag}.values()] for tag in tags))
        database.commit()


def test_a_caller_has_a_thousand_tags_a_day_also_across_a_restart(tmp_path: Path) -> None:
    env = {**MULTI, "OCP_TAG_FROM": "body"}
    with running_server(tmp_path, env=env) as server:
        webui, laptop = (new_key(server, name=name)["key"] for name in ("webui", "laptop"))
        ask_as(server, webui, user="user 0")
    with_rows(tmp_path, [f"user {number}" for number in range(1, 999)])
    with running_server(tmp_path, env=env) as server:
        for key, user in ((webui, "the last"), (webui, "one more"), (webui, "user 0"),
                          (laptop, "another's")):
            ask_as(server, key, user=user)

        recent = as_admin(server, "GET", "/api/usage?all=true&limit=4").json()["recent"]

        assert [row["tag"] for row in reversed(recent)] == [
            "the last", "(other)", "user 0", "another's"]


def test_nothing_is_summed_by_tag_where_no_request_has_one(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def spoken(self: Any) -> Any:
        connection = quiet(self)
        connection.set_trace_callback(said.append)
        return connection

    quiet = ocp.Store._read_connection
    monkeypatch.setattr(ocp.Store, "_read_connection", spoken)

    assert ocp.Ledger(store).report(0, 1, 1, None)["byTag"] == []
    assert said != [] and [query for query in said if "'(none)'" in query] == []


# ---------------------------------------------------------------------------
# What a text becomes
# ---------------------------------------------------------------------------

ACCOUNT = "9f0c2b1e-1111-4222-8333-444455556666"
DEVICE = "3f2a9c1b0d4e" + "5" * 52
JSON_USER = f'{{"device_id":"{DEVICE}","account_uuid":"{ACCOUNT}","session_id":"{ACCOUNT}"}}'


def tag_of(user: object, tag_from: str = "body") -> Json:
    return ocp.request_tag(tag_from, ocp.Headers(), {"user": user})


@pytest.mark.parametrize(("user", "tag"), [
    ("anna", "anna"), ("  an\tna\n\n", "an na"), ("e\u0301va", "\u00e9va"), ("\u200b\ufeff", None),
    ("a\u202eb\u200dc", "abc"), ("\ud800x", "x"), ("x" * 64, "x" * 64),
    ("x" * 65, "x" * 61 + "..."), ("a\x00b\x1b[31m", "ab[31m"), ("\U0001f600", "\U0001f600"),
    ("x" * 10**6, "x" * 61 + "..."), ("ocp_" + "k" * 32, "ocp_[redacted]"),
])
def test_a_tag_is_one_short_line_of_visible_characters(user: str, tag: str) -> None:
    assert tag_of(user) == tag


@pytest.mark.parametrize("user", [
    JSON_USER, f" {JSON_USER}", f"user_{DEVICE}_account_{ACCOUNT}_session_{ACCOUNT}",
    f"user_{DEVICE}_account__session_{ACCOUNT}"])
def test_of_claude_codes_ids_only_the_beginning_of_the_device_is_kept(user: str) -> None:
    assert tag_of(user) == "device-3f2a9c1b0d4e"


@pytest.mark.parametrize("user", [
    "{}", '{"device_id": 7}', '{"account_uuid": "x"}', '{"device_id"', "{" * 3000])
def test_other_json_is_no_tag(user: str) -> None:
    assert tag_of(user) is None


def test_a_new_day_begins_with_all_tags_again() -> None:
    now_s = [1_790_000_000.0]
    with contextlib.closing(ocp.Store(":memory:")) as store:
        tags = ocp.Tags(store, lambda: now_s[0])
        caller = ocp.Caller("local")
        for number in range(1_000):
            assert tags.bounded(caller, str(number)) == str(number)
        assert tags.bounded(caller, "more") == "(other)"
        assert tags.bounded(ocp.Caller("remote"), "more") == "more"
        now_s[0] += 86_400
        assert tags.bounded(caller, "more") == "more"
