"""Usage as CSV: the same numbers as in the JSON, whole, harmless in a spreadsheet, and with bounded
memory."""

from __future__ import annotations

import contextlib
import csv
import io
import sqlite3
import time
from collections.abc import Iterator
from decimal import Decimal
from typing import Any
from urllib.parse import quote

import pytest

from chat import HANG, ask, encoded, error_of, question
from http_client import Reply
from keys import MULTI, as_admin, ask_as, bearer, new_key
from project import load_script
from raw_http import RawConnection, head, post
from server import Server, running_server
from waiting import eventually

ocp = load_script("ocp_server.py")

Json = Any

TABLES = {"daily": "daily", "key": "byKey", "model": "byModel", "path": "byPath", "tag": "byTag"}
NAMES = ("phone", "=1+2", "Z\u00fcrich, \"desk\"")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with requests of several keys, users and models, and a failed one."""
    env = {**MULTI, "OCP_TAG_FROM": "body"}
    with running_server(tmp_path_factory.mktemp("house"), env=env) as server:
        keys = [new_key(server, name=name)["key"] for name in NAMES]
        for key in keys:
            ask_as(server, key, "hi", user="@anna")
            ask_as(server, key, "hi", model="haiku")
        server.write_scenario([[{"api_error": {
            "status": 529, "word": "overloaded", "text": "API Error: too\nbusy, \"sorry\""}}]])
        ask_as(server, keys[0], "hi", user="ben")
        server.write_scenario([])
        yield server


def test_a_database_in_memory_is_not_copied_for_each_part(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocp, "_CSV_PAGE_ROWS", 2)
    store = ocp.Store(":memory:")
    ledger = ocp.Ledger(store)
    for number in range(5):
        store.write_later(
            "INSERT INTO usage (at_s, request_id, caller, model, dialect, outcome, status, counted,"
            " stream, prompt_chars, response_chars, input_tokens, output_tokens, cache_read_tokens,"
            " cache_write_tokens, total_ms) VALUES (?, 'r', 'local', 'm', 'chat', 'ok', 200, 1, 0,"
            " 0, 0, 0, 0, 0, 0, 0)", number)
    store.write_queued()
    monkeypatch.setattr(store, "_read_connection", lambda: pytest.fail("copied"))

    parts = [part.decode() for part in ledger.csv("rows", 0, 9, None)]
    assert [part.count("\r\n") for part in parts] == [3, 2, 1]


def table_of(reply: Reply) -> list[dict[str, str]]:
    assert reply.status == 200, reply
    assert reply.headers["Content-Type"] == "text/csv; charset=utf-8"
    return list(csv.DictReader(io.StringIO(reply.body.decode("utf-8"), newline="")))


def as_csv(server: Server, query: str = "") -> Reply:
    return as_admin(server, "GET", f"/api/usage?all=true&format=csv{query}")


def as_json(server: Server, query: str = "") -> dict[str, Json]:
    found: dict[str, Json] = as_admin(
        server, "GET", f"/api/usage?all=true&limit=500{query}").json()
    return found


def field(value: Json) -> str:
    """How a value of the JSON stands in a field."""
    text = "" if value is None else str(value)
    if isinstance(value, float):
        return format(Decimal(text).normalize(), "f")
    return f"'{text}" if isinstance(value, str) and text[:1] in ("=", "+", "-", "@") else text


@pytest.mark.parametrize("table", TABLES)
def test_the_sums_are_those_of_the_json(house: Server, table: str) -> None:
    expected = as_json(house)[TABLES[table]]

    found = table_of(as_csv(house, f"&table={table}"))

    assert len(found) > 0
    assert found == [{name: field(value) for name, value in entry.items()} for entry in expected]


def test_all_requests_stand_in_it_oldest_first(house: Server) -> None:
    expected = list(reversed(as_json(house)["recent"]))

    found = table_of(as_csv(house))

    assert len(found) == 7
    assert found == [{name: field(value) for name, value in row.items()} for row in expected]
    assert found == table_of(as_csv(house, "&table=rows&limit=1"))


@pytest.mark.parametrize(("number", "text"), [
    (0.0, "0"), (9.25e-05, "0.0000925"), (1e-09, "0.000000001"), (12.5, "12.5"), (100.0, "100"),
    (3, "3")])
def test_a_number_has_no_exponent(number: float, text: str) -> None:
    assert ocp.csv_text([[number]]) == f"{text}\r\n".encode()


def test_no_field_begins_like_a_formula(house: Server) -> None:
    rows = table_of(as_csv(house))

    assert "'=1+2" in {row["key_name"] for row in rows}
    assert "'@anna" in {row["tag"] for row in rows}
    assert not [value for row in rows for value in row.values() if value[:1] in ("=", "+", "@")]


@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20"])
def test_a_formula_in_wide_letters_is_none_either(sign: str) -> None:
    assert ocp.csv_text([[f"{sign}1+2", f"1{sign}2", "", None, -1]]).decode() == (
        f"'{sign}1+2,1{sign}2,,,-1\r\n")


def test_texts_with_commas_quotes_and_other_letters_are_whole(house: Server) -> None:
    reply = as_csv(house)

    assert {row["key_name"] for row in table_of(reply)} == {"phone", "'=1+2", NAMES[2]}
    assert b'"Z\xc3\xbcrich, ""desk"""' in reply.body
    assert reply.body.endswith(b"\r\n") and b"\r\n\r\n" not in reply.body


def test_a_browser_saves_it_under_a_name_with_its_table_and_days(house: Server) -> None:
    reply = as_csv(house, "&table=daily&since=2026-01-02T00:00:00Z&until=2026-01-03T00:00:00Z")

    assert reply.headers["Content-Disposition"] == (
        'attachment; filename="ocp-usage-daily-2026-01-02-to-2026-01-03.csv"')


@pytest.mark.parametrize("table", ["rows", *TABLES])
def test_nothing_is_a_line_of_names(house: Server, table: str) -> None:
    full = as_csv(house, f"&table={table}").text.partition("\r\n")[0]

    empty = as_csv(house, f"&table={table}&until=2020-01-02T00:00:00Z&hours=1")

    assert empty.text == f"{full}\r\n"


def test_a_key_gets_its_own_requests(house: Server) -> None:
    with guest_of(house) as key:
        reply = house.call("GET", "/api/usage?format=csv&all=true", headers=bearer(key))
        assert {row["key_name"] for row in table_of(reply)} == {"guest"}


@contextlib.contextmanager
def guest_of(server: Server) -> Iterator[str]:
    """A key that has asked once, and is revoked at the end."""
    made = new_key(server, name="guest")
    ask_as(server, made["key"])
    yield made["key"]
    as_admin(server, "DELETE", f"/api/keys/{made['id']}")


@pytest.mark.parametrize(("query", "param", "words"), [
    ("format=xlsx", "format", "json, csv"), ("format=CSV", "format", "json, csv"),
    ("format=csv&table=users", "table", "rows, daily, key, model, path, tag"),
    ("table=daily", "table", "format=csv"), ("format=csv&since=soon", "since", "2h"),
])
def test_what_it_does_not_know_is_refused_clearly(
    house: Server, query: str, param: str, words: str
) -> None:
    reply = as_admin(house, "GET", f"/api/usage?{query}")

    assert reply.status == 400
    error = error_of(reply)
    assert error["param"] == param and words in error["message"]


def test_a_head_request_gets_no_body(house: Server) -> None:
    reply = as_admin(house, "HEAD", "/api/usage?format=csv&all=true")

    assert (reply.status, reply.body) == (200, b"")
    assert reply.headers["Content-Type"] == "text/csv; charset=utf-8"


# ---------------------------------------------------------------------------
# Many rows
# ---------------------------------------------------------------------------

MANY = 12_345


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with many rows, some of them of the same moment."""
    folder = tmp_path_factory.mktemp("archive")
    with running_server(folder) as server:
        ask(server)
    begin_s = time.time() - 80_000
    with contextlib.closing(sqlite3.connect(next(folder.rglob("ocp.db")))) as database:
        names = [each[1] for each in database.execute("PRAGMA table_info(usage)")][1:]
        row = dict(zip(names, database.execute(
            f"SELECT {', '.join(names)} FROM usage").fetchone()))
        database.execute("DELETE FROM usage")
        database.executemany(
            f"INSERT INTO usage ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})", (
                [*{**row, "at_s": begin_s + number // 7, "request_id": f"req_{number}"}.values()]
                for number in range(MANY)))
        database.commit()
    with running_server(folder) as server:
        yield server


def test_each_of_many_rows_comes_once(archive: Server) -> None:
    found = table_of(as_csv(archive))

    assert [row["request_id"] for row in found] == [f"req_{number}" for number in range(MANY)]


def test_a_row_takes_the_same_work_among_few_and_among_many(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite must not read all earlier rows again for each part."""
    monkeypatch.setattr(ocp, "_CSV_PAGE_ROWS", 10)
    steps = 0

    def count_step() -> None:
        nonlocal steps
        steps += 1

    def counting(self: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = plain(self)
        connection.set_progress_handler(count_step, 10)
        return connection

    plain = ocp.Store._read_connection
    monkeypatch.setattr(ocp.Store, "_read_connection", counting)
    ledger, work = ocp.Ledger(store), []
    for count in (500, 2_000):
        store.write_or_queue("DELETE FROM usage")
        with store.transaction() as connection:
            connection.executemany(
                "INSERT INTO usage (at_s, request_id, caller, model, dialect, outcome, status, "
                "counted, stream, warm, prompt_chars, response_chars, input_tokens, "
                "output_tokens, cache_read_tokens, cache_write_tokens, total_ms) VALUES "
                "(?, 'req_1', 'local', 'm', 'chat', 'ok', 200, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1)",
                [(at_s,) for at_s in range(count)])
        for caller in (None, ocp.Caller("local")):
            steps = 0
            parts = list(ledger.csv("rows", 0, count + 1, caller))
            assert sum(part.count(b"req_1") for part in parts) == count
            work.append(steps / count)

    assert max(work) < 1.5 * min(work)


def test_a_client_that_reads_nothing_holds_up_no_report(archive: Server) -> None:
    with RawConnection(archive.port) as wire:
        wire.send(head("GET", "/api/usage?format=csv&all=true"))
        wire.hear(b"req_5,")
        began_s = time.monotonic()

        assert as_json(archive)["totals"]["requests"] == MANY
        assert len(table_of(as_csv(archive))) == MANY
        assert time.monotonic() - began_s < 20


def test_a_client_that_leaves_ends_it(archive: Server) -> None:
    with RawConnection(archive.port) as wire:
        wire.send(head("GET", "/api/usage?format=csv&all=true"))
        wire.hear(b"req_5,")
    assert eventually(lambda: archive.call("GET", "/health").json()["status"] == "ok")


def test_rows_of_the_same_span_that_come_meanwhile_do_no_harm(archive: Server) -> None:
    archive.write_scenario([[HANG]])
    with RawConnection(archive.port) as wire:
        wire.send(post(encoded(question())))
        eventually(archive.queries)
        until = quote(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 3600)))
        assert len(table_of(as_csv(archive, f"&until={until}&hours=24"))) == MANY
