"""What is taken over from the database of the original OCP, and that nothing of it is lost."""
from __future__ import annotations

import errno
import json
import random
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from depth import by_depth
from original_home import OriginalHome, original_content, original_key, original_time
from project import load_script

ocp = load_script("ocp_server.py")

Json = Any


class Opened:
    """The database of a home, opened by a start."""

    def __init__(self, path: Path) -> None:
        self.store, self.report = ocp.open_with_original(str(path))
        self.keys = ocp.Keys(self.store)
        self.ledger = ocp.Ledger(self.store)

    def names(self) -> list[str]:
        return [key.name for key in reversed(self.keys.all())]

    def content(self) -> dict[str, Json]:
        """Everything that was taken over."""
        tables = ("keys", "usage", "original")
        return {name: [tuple(row) for row in self.store.rows(f"SELECT * FROM {name}")]
                for name in tables}


@contextmanager
def opened(home: OriginalHome) -> Iterator[Opened]:
    found = Opened(home.database)
    try:
        yield found
    finally:
        found.store.close()


@pytest.fixture
def home(tmp_path: Path) -> OriginalHome:
    return OriginalHome(tmp_path / "ocp")


# ---------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------

def test_keys_come_with_their_names_limits_and_times(home: OriginalHome) -> None:
    laptop = home.key("laptop", quota_daily=5, quota_monthly=0, created_at="2026-03-01 12:00:00")
    home.key("phone", quota_weekly=7)
    with opened(home) as here:
        assert here.report == {"keys": 2, "usageRows": 0, "renamed": [], "leftOut": {}}
        first, second = reversed(here.keys.all())
        assert (first.name, second.name) == ("laptop", "phone")
        assert first.quota == {"daily": 5, "monthly": 0} and second.quota == {"weekly": 7}
        assert first.created_s == 1_772_366_400
        assert first.preview == f"{laptop[:8]}...{laptop[-4:]}"
        assert here.keys.verify(laptop).name == "laptop"
        assert not here.keys.verify(laptop).web_search


def test_no_key_stands_in_plain_text_in_a_table_of_ours(home: OriginalHome) -> None:
    secret = home.key("laptop")
    with opened(home) as here:
        assert secret not in repr(here.content())


def test_a_revoked_key_stays_revoked(home: OriginalHome) -> None:
    secret = home.key("lost", revoked=1)
    with opened(home) as here, pytest.raises(ocp.RevokedKey):
        here.keys.verify(secret)


@pytest.mark.parametrize(("names", "wanted"), [
    (["Laptop", "laptop", "LAPTOP"], ["Laptop", "laptop-2", "LAPTOP-3"]),
    (["a", "a-2", "a"], ["a", "a-2", "a-3"]),
    (["x" * 64, "X" * 64], ["x" * 64, "X" * 56 + "-2"]),
    (["123", "admin", "Local"], ["key-123", "key-admin", "key-Local"]),
    (["", " ", ".", ".."], ["key-1", "key-2", "key-.", "key-.."]),
    ([" office ", "a/b", "tab\there"], ["office", "a-b", "tabhere"]),
    (["y" * 200, "\u200b", "1" * 64], ["y" * 64, "key-2", "key-3"]),
    (["key-7", "7"], ["key-7", "key-7-2"]),
])
def test_a_name_that_cannot_stay_becomes_the_most_similar_one(
    names: list[str], wanted: list[str], home: OriginalHome
) -> None:
    secrets = [home.key(name, original_key(at)) for at, name in enumerate(names)]
    with opened(home) as here:
        assert here.names() == wanted
        assert [here.keys.verify(secret).name for secret in secrets] == wanted
        changed = [(there, name) for there, name in zip(names, wanted) if there != name]
        assert len(here.report["renamed"]) == len(changed)
        notes = {key.name: key.note for key in here.keys.all()}
        assert all(bool(notes[name]) is (there != name) for there, name in zip(names, wanted))


def test_revoked_keys_may_share_a_name_and_take_none_from_others(home: OriginalHome) -> None:
    for at in range(2):
        home.key("laptop", original_key(at), revoked=1)
    home.key("laptop")
    with opened(home) as here:
        assert here.names() == ["laptop"] * 3 and not here.report["renamed"]


def test_keys_of_ours_keep_their_names(home: OriginalHome) -> None:
    secret = home.key("laptop")
    with closing(ocp.Store(str(home.database))) as store:
        _, ours = ocp.Keys(store).create("Laptop", {})
    with opened(home) as here:
        assert (here.keys.verify(ours).name, here.keys.verify(secret).name) == (
            "Laptop", "laptop-2")


def test_a_key_that_is_here_already_keeps_what_it_has(home: OriginalHome) -> None:
    secret = home.key("laptop", quota_daily=1)
    home.usage(2, 1, "laptop")
    with closing(ocp.Store(str(home.database))) as store, store.transaction() as connection:
        connection.execute(
            "INSERT INTO keys (name, hash, preview, created_s, models, max_concurrent, note, quota)"
            " VALUES ('mine', ?, '', 1, '[]', 0, '', '{}')", (ocp.hash_of_key(secret),))
    with opened(home) as here:
        assert here.names() == ["mine"]
        assert here.report["leftOut"] == {"keys that are here already": 1}
        assert here.ledger.quota_report(here.keys.find("mine"))["daily"]["used"] == 2


@pytest.mark.parametrize("secret", ["", "  ", b"\xff\xfe", "broken \ufffd"])
def test_a_key_without_a_usable_secret_is_counted_and_stops_no_other(
    secret: object, home: OriginalHome
) -> None:
    home.key("broken", secret)
    good = home.key("good")
    with opened(home) as here:
        assert here.report["leftOut"] == {"keys without a usable secret": 1}
        assert here.keys.verify(good).name == "good"


@pytest.mark.parametrize(("limit", "wanted"), [
    ("many", {}), (b"\xff", {}), (-5, {"daily": 0}), (2.5, {"daily": 2}), ("3", {"daily": 3}),
    (2**62, {"daily": 10**12}), (1e300, {"daily": 10**12}),
])
def test_limits_that_are_no_numbers_are_counted(
    limit: object, wanted: dict[str, int], home: OriginalHome
) -> None:
    home.key("laptop", quota_daily=limit)
    with opened(home) as here:
        assert here.keys.find("laptop").quota == wanted
        assert here.report["leftOut"] == (
            {} if wanted else {"limits that are no numbers": 1})


@pytest.mark.parametrize("revoked", [2, -1, "x", b"\xff"])
def test_only_a_key_that_the_original_takes_is_valid(revoked: object, home: OriginalHome) -> None:
    home.key("laptop", revoked=revoked)
    with opened(home) as here:
        assert here.keys.find("laptop").revoked_s is not None


def test_a_name_that_is_no_text_is_no_obstacle(home: OriginalHome) -> None:
    secret = original_key("bytes")
    home.execute("INSERT INTO api_keys (key, name, created_at) VALUES (?, CAST(? AS TEXT), ?)",
                 secret, b"caf\xff\x00\x1b[31m", b"\xff")
    with opened(home) as here:
        assert here.keys.verify(secret).name == "caf[31m"


# ---------------------------------------------------------------------------
# Usage
# ---------------------------------------------------------------------------

def test_usage_comes_as_rows_without_tokens(home: OriginalHome) -> None:
    home.key("laptop")
    now_s = int(time.time())
    home.usage(3, 1, "laptop", created_at=original_time(now_s - 60))
    home.usage(1, 1, "laptop", success=0)
    home.usage(2, None, "local")
    with opened(home) as here:
        assert here.report["usageRows"] == 6
        report = here.ledger.report(0, now_s + 90, 50, None)
        by_key = {row["key_name"]: row for row in report["byKey"]}
        assert (by_key["laptop"]["successes"], by_key["laptop"]["errors"]) == (3, 1)
        assert by_key["local"]["requests"] == 2
        assert report["totals"]["input_tokens"] == report["totals"]["output_tokens"] == 0
        assert report["totals"]["total_prompt_chars"] == 600
        assert report["totals"]["total_elapsed_ms"] == 9000
        failed, _ = here.ledger.failures(ocp.FailureFilter(), 10)
        assert "original" in failed[0]["message"]
        assert here.keys.find("laptop").used_s == now_s - 60 or now_s - 60 < (
            here.keys.find("laptop").used_s or 0)


def test_limits_count_what_the_original_had_counted(home: OriginalHome) -> None:
    secret = home.key("laptop", quota_daily=4)
    home.usage(3, 1, "laptop")
    home.usage(5, 1, "laptop", success=0)
    home.usage(9, 1, "laptop", created_at=original_time(time.time() - 40 * 86_400))
    with opened(home) as here:
        caller = here.keys.verify(secret)
        here.ledger.reserve(caller, ocp.Amounts(requests=1))
        with pytest.raises(ocp.QuotaExceeded):
            here.ledger.reserve(caller, ocp.Amounts(requests=1))


@pytest.mark.parametrize("created_at", [
    "", "yesterday", b"\xff", "0001-01-01 00:00:00", "9999-12-31 23:59:59", "1e99", -1,
])
def test_rows_without_a_usable_time_are_counted(created_at: object, home: OriginalHome) -> None:
    home.usage(2, None, "local", created_at=created_at)
    home.usage(1, None, "local")
    with opened(home) as here:
        assert here.report["usageRows"] == 1
        assert here.report["leftOut"] == {"rows of usage without a usable time": 2}


@pytest.mark.parametrize("value", [None, "many", b"\xff", -5, 2**62, 1e300])
def test_numbers_that_are_none_spoil_no_sum(value: object, home: OriginalHome) -> None:
    home.usage(20, None, "local", prompt_chars=value, elapsed_ms=value, success=value)
    with opened(home) as here:
        totals = here.ledger.report(0, time.time() + 9, 5, None)["totals"]
        assert (totals["requests"], totals["successes"]) == (20, 0)
        assert 0 <= totals["total_prompt_chars"] <= 20 * 10**12


def test_a_caller_that_is_no_text_is_no_obstacle(home: OriginalHome) -> None:
    as_text = "CAST(? AS TEXT)"
    home.execute(f"INSERT INTO usage_log (key_name, model) VALUES ({as_text}, {as_text})",
                 b"\xff\x1b[31m" + b"x" * 999, b"\xfe")
    home.usage(1, 77, "gone", model=None)
    with opened(home) as here:
        rows = here.ledger.report(0, time.time() + 9, 5, None)["recent"]
        assert all(row["key_name"].isprintable() and len(row["key_name"]) <= 100 for row in rows)
        assert {row["key_name"] for row in rows} >= {"gone"}


# ---------------------------------------------------------------------------
# Versions of the original, and damage
# ---------------------------------------------------------------------------

def test_an_older_database_lacks_the_limits(tmp_path: Path) -> None:
    home = OriginalHome(tmp_path / "ocp", has_limits=False)
    secret = home.key("laptop")
    home.usage(1, 1, "laptop")
    with opened(home) as here:
        assert here.keys.verify(secret).quota == {}
        assert here.report["usageRows"] == 1


@pytest.mark.parametrize("column", ["revoked", "created_at"])
def test_a_column_that_is_missing_has_its_default(column: str, home: OriginalHome) -> None:
    home.execute(f"ALTER TABLE api_keys DROP COLUMN {column}") if sqlite3.sqlite_version_info >= (
        3, 35) else pytest.skip("this SQLite drops no columns")
    secret = home.key("laptop")
    with opened(home) as here:
        assert here.keys.verify(secret).name == "laptop"


@pytest.mark.parametrize("table", ["api_keys", "usage_log", "response_cache"])
def test_a_table_that_is_missing_is_no_obstacle(table: str, home: OriginalHome) -> None:
    home.key("laptop")
    home.usage(1, 1, "laptop")
    home.execute(f"DROP TABLE {table}")
    with opened(home) as here:
        assert (here.report["keys"], here.report["usageRows"]) == (
            int(table != "api_keys"), int(table != "usage_log"))


def test_damaged_usage_costs_no_key(home: OriginalHome) -> None:
    secret = home.key("laptop")
    home.usage(3000, 1, "laptop")
    with closing(sqlite3.connect(home.database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        page_bytes = connection.execute("PRAGMA page_size").fetchone()[0]
        root = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'usage_log'").fetchone()[0]
    with open(home.database, "r+b") as file:
        file.seek((root - 1) * page_bytes)
        file.write(b"\x55" * page_bytes)
    with opened(home) as here:
        assert here.keys.verify(secret).name == "laptop"
        assert here.report["leftOut"]["damaged table usage_log"] == 1
        assert here.report["usageRows"] == 0


#: What stands in columns of a database that nobody has looked after.
JUNK: list[object] = [
    None, "", " ", 0, 1, -1, 7, 2**63 - 1, 0.5, 1e300, float("inf"), b"", b"\xff\xfe", "x" * 5000,
    "caf\u00e9", "cafe\u0301", "\u202e", "a\x00b", "admin", "123", "..", "a/b", "now",
    "2026-11-30 10:00:00", "2026-13-45", "0",
]


@pytest.mark.parametrize("seed", range(by_depth(4, 8, 100)))
def test_whatever_stands_in_the_tables_each_row_is_taken_or_counted(
    seed: int, home: OriginalHome
) -> None:
    chance = random.Random(seed)
    home.loosen()
    good = [original_key(f"{seed}-{at}") for at in range(10)]
    for at in range(40):
        secret = good[at // 4] if at % 4 == 0 else chance.choice(JUNK)
        home.insert(
            "api_keys", id=at, key=secret, name=chance.choice(JUNK),
            **{name: chance.choice(JUNK) for name in (
                "created_at", "quota_daily", "quota_weekly", "quota_monthly")},
            revoked=0 if at % 4 == 0 else chance.choice(JUNK))
        home.insert("usage_log", id=at, key_id=chance.choice([*JUNK, at]), **{
            name: chance.choice(JUNK) for name in (
                "key_name", "model", "prompt_chars", "response_chars", "elapsed_ms", "success",
                "created_at")})
    before = home.tables()
    with opened(home) as here:
        left = here.report["leftOut"]
        assert here.report["keys"] + left.get("keys without a usable secret", 0) + left.get(
            "keys that are here already", 0) == 40
        assert here.report["usageRows"] + left.get("rows of usage without a usable time", 0) == 40
        assert not here.keys.problems
        names = [here.keys.verify(secret).name for secret in good]
        assert len({name.casefold() for name in names}) == len(good)
        assert all(ocp.key_name(key.name) == key.name for key in here.keys.all())
        report = here.ledger.report(0, time.time() + 90_000, 500, None)
        assert json.loads(json.dumps(report))["totals"]["requests"] == here.report["usageRows"]
        for key in here.keys.all():
            here.ledger.quota_report(key)
            ocp.iso_time(key.created_s)
    assert home.tables() == before


def test_a_table_of_somebody_else_with_a_name_of_ours_stays_as_it_is(home: OriginalHome) -> None:
    home.key("laptop")
    home.execute("CREATE TABLE keys (mine TEXT)")
    home.execute("INSERT INTO keys VALUES ('precious')")
    before = home.tables()
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError):
            ocp.open_with_original(str(home.database))
    with closing(sqlite3.connect(home.database)) as connection:
        assert connection.execute("SELECT * FROM keys").fetchall() == [("precious",)]
    assert home.tables() == before


def test_a_home_without_an_original_gets_no_copy_and_no_report(tmp_path: Path) -> None:
    store, report = ocp.open_with_original(str(tmp_path / "ocp.db"))
    store.close()
    assert report == {} and not (tmp_path / "ocp.db.original").exists()


# ---------------------------------------------------------------------------
# Once, whole, and with a way back
# ---------------------------------------------------------------------------

def filled(folder: Path) -> OriginalHome:
    home = OriginalHome(folder)
    for at, name in enumerate(["laptop", "Laptop", "admin", "phone"]):
        home.key(name, original_key(at), quota_daily=at, revoked=int(name == "phone"))
    home.usage(3, 1, "laptop")
    home.usage(2, None, "local", created_at="never")
    return home


def test_a_second_start_takes_nothing_new(tmp_path: Path) -> None:
    home = filled(tmp_path)
    with opened(home) as here:
        first = here.content()
    home.key("later")
    home.usage(4, 1, "laptop")
    with opened(home) as here:
        assert here.report == {} and here.content() == first


def test_the_tables_of_the_original_stay_as_they_are(tmp_path: Path) -> None:
    home = filled(tmp_path)
    before = home.tables()
    for _ in range(2):
        with opened(home):
            pass
    assert home.tables() == before
    copy = tmp_path / "ocp.db.original"
    assert original_content(copy) == before and copy.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(copy)) as connection:
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    assert not names & {"keys", "usage", "original"}


class PowerCut(BaseException):
    """The machine is off: nothing more is done."""


class Power:
    """What counts the steps of a start and cuts the power before one of them."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps >= self.at:
            raise PowerCut

    def connection(self, *arguments: Json, **fields: Json) -> sqlite3.Connection:
        power = self

        class Connection(sqlite3.Connection):
            def execute(self, *given: Json) -> sqlite3.Cursor:
                power.step()
                return super().execute(*given)

            def executemany(self, statement: str, rows: Json) -> sqlite3.Cursor:
                power.step()

                def each() -> Iterator[Json]:
                    for row in rows:
                        power.step()
                        yield row

                return super().executemany(statement, each())

            def close(self) -> None:
                power.step()
                super().close()

            def backup(self, *given: Json, **more: Json) -> None:
                power.step()
                super().backup(*given, **more)

        return sqlite3.connect(*arguments, factory=Connection, **fields)


def started_until(home: OriginalHome, at: int, left: Path) -> None:
    """A start that loses its power before step `at`. What the disk then has is copied to `left`,
    if it came so far."""
    power = Power(at)

    class Sqlite:
        def __getattr__(self, name: str) -> Json:
            return power.connection if name == "connect" else getattr(sqlite3, name)

    def stepping(function: Json) -> Json:
        def call(*given: Json, **more: Json) -> Json:
            power.step()
            return function(*given, **more)
        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ocp, "sqlite3", Sqlite())
        for name in ("replace", "unlink", "open"):
            patch.setattr(ocp.os, name, stepping(getattr(ocp.os, name)))
        try:
            ocp.open_with_original(str(home.database))[0].close()
        except PowerCut as cut:
            patch.undo()
            # The open connections are in the traceback: nothing has closed them.
            shutil.copytree(home.folder, left)
            assert cut.__traceback__ is not None


@pytest.mark.slow
def test_a_power_cut_before_any_step_leaves_all_or_nothing_and_the_next_start_completes_it(
    tmp_path: Path
) -> None:
    template = filled(tmp_path / "template")
    before = template.tables()
    whole = OriginalHome(shutil.copytree(template.folder, tmp_path / "whole"))
    with opened(whole) as here:
        wanted = comparable(here.content())
    at, seen = 1, set()
    while True:
        home = OriginalHome(shutil.copytree(template.folder, tmp_path / f"cut-{at}"))
        left = tmp_path / f"left-{at}"
        started_until(home, at, left)
        if not left.exists():
            break
        after_cut = OriginalHome(left)
        assert after_cut.tables() == before, at
        counts = rows_of_ours(after_cut.database)
        assert counts in ([], [0], [0, 0], [0, 0, 0], [4, 3, 1]), at
        seen.add(tuple(counts))
        with opened(after_cut) as here:
            assert comparable(here.content()) == wanted, at
        assert original_content(left / "ocp.db.original") == before, at
        assert not list(left.glob("ocp.db.original.new*")), at
        at += 1
    assert at > 40 and seen >= {(), (0, 0, 0), (4, 3, 1)}


def rows_of_ours(database: Path) -> list[int]:
    """How many rows there are in the tables of ours that there are."""
    with closing(sqlite3.connect(database)) as connection:
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
        return [connection.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0]
                for name in ("keys", "usage", "original") if name in names]


def comparable(content: dict[str, Json]) -> Json:
    """What is the same in every start: no times of the start."""
    keys = [row[:6] + row[7:] for row in content["keys"]]
    return keys, content["usage"], [json.loads(row[2]) for row in content["original"]]


def test_a_copy_that_fails_leaves_no_part_of_it_on_a_full_disk(tmp_path: Path) -> None:
    home = filled(tmp_path)
    path = str(home.database)

    def full(*names: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ocp.os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            ocp.copy_original(path)
    assert list(home.folder.glob("ocp.db.original*")) == []

    ocp.copy_original(path)
    assert original_content(home.folder / "ocp.db.original") == home.tables()


def test_what_the_original_left_in_its_write_ahead_log_comes_too(home: OriginalHome) -> None:
    secret = original_key("in the log")
    with closing(sqlite3.connect(home.database)) as connection:
        connection.execute("INSERT INTO api_keys (key, name) VALUES (?, 'laptop')", (secret,))
        connection.commit()
        # An original that is killed leaves the log behind.
        left = OriginalHome(shutil.copytree(home.folder, home.folder.with_name("left")))
    assert secret.encode() not in left.database.read_bytes()
    with opened(left) as here:
        assert here.keys.verify(secret).name == "laptop"


def test_what_is_left_of_the_original_is_removed_on_demand(tmp_path: Path) -> None:
    home = filled(tmp_path)
    secret = original_key(0).encode()
    with opened(home):
        pass
    assert secret in home.database.read_bytes()
    # Of a copy that was interrupted.
    (tmp_path / "ocp.db.original.new").write_bytes(secret)

    gone = ocp.forget_original(str(tmp_path))

    assert set(gone) == {"api_keys", "usage_log", "response_cache", "ocp.db.original",
                         "ocp.db.original.new"}
    assert not [path for path in tmp_path.iterdir() if secret in path.read_bytes()]
    with opened(home) as here:
        assert here.report == {} and here.keys.verify(secret.decode()).name == "laptop"
    assert ocp.forget_original(str(tmp_path)) == []


def test_what_was_not_taken_over_is_never_removed(tmp_path: Path) -> None:
    home = filled(tmp_path)
    before = home.tables()
    with pytest.raises(ValueError, match="were not taken over"):
        ocp.forget_original(str(tmp_path))
    assert home.tables() == before


def test_nothing_is_removed_while_a_server_uses_the_home(tmp_path: Path) -> None:
    home = filled(tmp_path)
    with opened(home):
        pass
    (tmp_path / "server.lock").touch()
    before = home.tables()
    with pytest.MonkeyPatch.context() as patch:
        # Locks are of processes: this one cannot keep itself out.
        patch.setattr(ocp.HomeLock, "_try_lock", lambda self: False)
        with pytest.raises(ocp.HomeInUse):
            ocp.forget_original(str(tmp_path))
    assert home.tables() == before
