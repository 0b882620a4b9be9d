"""A server in the home of the original OCP: every device's key works, and the way back stays."""
from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from chat import error_of
from keys import MULTI, as_admin, ask_as, bearer
from original_home import OriginalHome, original_content, original_key
from server import Place, health, run_server, running_server, start_fork
from waiting import eventually

Json = Any
NAMES = ("laptop", "phone", "Laptop", "admin", "old")


def original_at(folder: Path) -> OriginalHome:
    """The home of an original whose keys are those of five devices."""
    home = OriginalHome(folder / "ocp")
    for at, name in enumerate(NAMES):
        home.key(name, original_key(at), quota_daily=4, revoked=int(name == "old"))
    home.usage(3, 1, "laptop")
    home.usage(1, None, "local", success=0)
    return home


def test_the_key_of_every_device_goes_on_working_with_what_is_left_of_its_quota(
    tmp_path: Path
) -> None:
    home = original_at(tmp_path)
    before = home.tables()
    with running_server(tmp_path, env=MULTI) as server:
        answers = [ask_as(server, original_key(at)) for at in range(5)]
        assert [answer.status for answer in answers] == [200, 200, 200, 200, 401]
        assert error_of(answers[4])["code"] == "revoked_api_key"
        # Three of its four requests of the day were of the original.
        assert ask_as(server, original_key(0)).status == 429
        assert ask_as(server, original_key(1)).status == 200
        # Its name gave a key the rights of the admin there.
        assert server.call("GET", "/api/keys", headers=bearer(original_key(3))).status == 403
        named = [key["name"] for key in as_admin(server, "GET", "/api/keys").json()["keys"]]
        assert sorted(named) == ["Laptop-2", "key-admin", "laptop", "old", "phone"]
        usage = as_admin(server, "GET", "/api/usage?all=true").json()
        assert usage["totals"]["requests"] == 9 and usage["totals"]["errors"] == 1
    assert original_content(home.database) == before


def test_it_is_told_in_the_log_and_on_the_terminal_and_only_once_that_it_was_done(
    tmp_path: Path
) -> None:
    original_at(tmp_path)
    for start in range(2):
        with running_server(tmp_path, env=MULTI) as server:
            told = [each["what"] for each in server.log_entries("original_taken_over")]
            assert told == ["5 keys and 4 rows of usage from the original OCP; renamed: 'Laptop' "
                            "to 'Laptop-2', 'admin' to 'key-admin'"]
            assert (f"TAKEN OVER: {told[0]}" in server.output) is (start == 0)
            # The keys in plain text are told at every start.
            assert len(server.log_entries("original_keys_in_plain_text")) == start + 1
            assert "--forget-original" in server.output
            listed = as_admin(server, "GET", "/api/keys").json()["keys"]
            assert len(listed) == len(NAMES)


def test_files_of_the_original_are_for_their_owner_only(tmp_path: Path) -> None:
    home = original_at(tmp_path)
    (home.folder / "admin-key").write_text("of the original")
    (home.folder / "admin-key").chmod(0o644)
    with running_server(tmp_path, env={**MULTI, "OCP_ADMIN_KEY": None}) as server:
        for name in ("ocp.db", "ocp.db-wal", "ocp.db.original", "admin-key"):
            assert stat.S_IMODE(os.stat(home.folder / name).st_mode) == 0o600, name
        assert as_admin(server, "GET", "/api/keys", key="of the original").status == 200


def test_what_is_left_is_removed_once_the_server_is_stopped(tmp_path: Path) -> None:
    home = original_at(tmp_path)
    (home.folder / "upgrade-snapshot-2026").mkdir()
    early = run_server(tmp_path, "--forget-original", env=MULTI)
    assert (early.code, "start the server once" in early.stderr) == (1, True)
    with running_server(tmp_path, env=MULTI) as server:
        refused = run_server(tmp_path / "other", "--forget-original",
                             env={**MULTI, "OCP_HOME": str(home.folder)})
        assert refused.code == 1 and "uses" in refused.stderr
        assert ask_as(server, original_key(0)).status == 200
    done = run_server(tmp_path, "--forget-original", env=MULTI)
    assert done.code == 0 and "api_keys" in done.stdout and "upgrade-snapshot-2026" in done.stdout
    with running_server(tmp_path, env=MULTI) as server:
        assert ask_as(server, original_key(1)).status == 200
        assert "original" not in server.output
    assert not [path for path in home.folder.glob("ocp.db*")
                if original_key(1).encode() in path.read_bytes()]


def test_the_original_can_go_on_with_the_database_and_what_it_adds_stays_its_own(
    tmp_path: Path
) -> None:
    home = original_at(tmp_path)
    with running_server(tmp_path, env=MULTI):
        pass
    later = home.key("later")
    home.usage(1, 6, "later")
    with running_server(tmp_path, env=MULTI) as server:
        assert ask_as(server, later).status == 401
        assert ask_as(server, original_key(1)).status == 200
    assert len(home.tables()["api_keys"]) == 6


@pytest.mark.exhaustive
def test_a_server_that_is_killed_while_it_takes_over_leaves_all_to_the_next(tmp_path: Path) -> None:
    for at in range(6):
        folder = tmp_path / str(at)
        home = original_at(folder)
        home.usage(20_000, 2, "phone", created_at="2026-01-01 00:00:00")
        before = home.tables()
        place = Place(folder)
        place.prepare()
        process = start_fork(place, Path(__file__).parents[2] / "ocp_server.py", (),
                             place.env(MULTI, ()))
        # During the copy, between the first tables, amid the rows, or after all.
        begun = ["ocp.db.original.new"] if at == 0 else []
        eventually(lambda: any((home.folder / name).exists()  # noqa: B023
                               for name in (*begun, "ocp.db.original")))  # noqa: B023
        time.sleep(0.04 * at)
        process.kill()
        process.wait()
        assert home.tables() == before
        with running_server(folder, env=MULTI) as server:
            assert [ask_as(server, original_key(key)).status for key in range(4)] == [200] * 4
            usage = as_admin(server, "GET", "/api/usage?all=true&hours=720").json()
            assert usage["totals"]["requests"] == 8
        assert original_content(home.folder / "ocp.db.original") == before


def test_while_the_database_cannot_be_written_the_keys_work_from_memory(tmp_path: Path) -> None:
    home = original_at(tmp_path)
    before = home.tables()
    with contextlib.closing(sqlite3.connect(home.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with running_server(tmp_path, env=MULTI) as server:
            assert health(server)["storage"] == "memory"
            assert ask_as(server, original_key(1)).status == 200
            assert ask_as(server, original_key(0)).status == 200
            assert ask_as(server, original_key(0)).status == 429
    assert home.tables() == before
    with running_server(tmp_path, env=MULTI) as server:
        assert health(server)["storage"] == "disk"
        assert ask_as(server, original_key(1)).status == 200
        assert len(server.log_entries("original_taken_over")) == 2


def test_a_damaged_table_of_keys_stops_no_server_and_is_copied_first(tmp_path: Path) -> None:
    home = original_at(tmp_path)
    with contextlib.closing(sqlite3.connect(home.database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        page_bytes = connection.execute("PRAGMA page_size").fetchone()[0]
    with open(home.database, "r+b") as file:
        file.seek(page_bytes)
        file.write(b"\x55" * page_bytes)
    with running_server(tmp_path, env=MULTI) as server:
        assert health(server)["status"] == "degraded"
        assert server.log_entries("database_unusable")
    assert (home.folder / "ocp.db.original").exists()
