"""What holds when the database cannot be written, is taken away or was never there; one server to
a home; what a revocation ends; and reports that hold nobody up."""
from __future__ import annotations

import contextlib
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chat import HANG, encoded, error_of, question
from depth import rest
from disks import DISKS
from http_client import Reply
from keys import ADMIN_KEY, MULTI, as_admin, ask_as, bearer, new_key
from project import REPO, load_script
from raw_http import RawConnection, post
from server import (
    Place,
    Process,
    Server,
    asked_process,
    at_rest,
    health,
    output_of,
    running_server,
    start_fork,
)
from waiting import eventually, in_parallel

ocp = load_script("ocp_server.py")

Json = Any


def is_good(server: Server, key: str) -> bool:
    return server.call("GET", "/v1/models", headers=bearer(key)).status == 200


# ---------------------------------------------------------------------------
# A database that cannot be written
# ---------------------------------------------------------------------------

class Lock:
    """Another program that holds the database."""

    code, status, words = "database_locked", 503, "database locked"

    def __init__(self, home: Path) -> None:
        self._path = home / "ocp.db"
        self._other: Any = None

    def fill(self, server: Server) -> None:
        self._other = sqlite3.connect(self._path, isolation_level=None)
        self._other.execute("BEGIN IMMEDIATE")

    def free(self, server: Server) -> None:
        self._other.execute("ROLLBACK")

    def close(self) -> None:
        if self._other is not None:
            self._other.close()


@pytest.fixture(params=[*DISKS, pytest.param(Lock, marks=pytest.mark.slow)],
                ids=lambda kind: str(kind.__name__))
def trouble(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """What keeps the database of tmp_path / "server" from being written, from `fill` to `free`."""
    (tmp_path / "server").mkdir()
    found = request.param(tmp_path / "server" / "ocp")
    found.code = getattr(found, "code", "disk_full")
    found.status = getattr(found, "status", 507)
    found.words = getattr(found, "words", "disk full")
    yield found
    found.close()


def exhaust(trouble: Any, server: Server) -> None:
    """Takes the database away, down to the last page that a write might still find."""
    trouble.fill(server)
    assert eventually(
        lambda: as_admin(server, "POST", "/api/keys", {"note": "x" * 400}).status == trouble.status)


def assert_late(reply: Reply, trouble: Any) -> None:
    """That a change holds in memory and is not written yet."""
    assert (reply.status, error_of(reply)["code"]) == (trouble.status, trouble.code), reply
    assert error_of(reply)["message"].startswith(trouble.words)
    assert "in effect in memory" in error_of(reply)["message"]


def storage(server: Server) -> tuple[str, str]:
    state = health(server)
    return state["storage"], state["status"]


@pytest.mark.slow
def test_what_is_taken_from_a_key_holds_at_once_and_is_written_later(
    trouble: Any, tmp_path: Path
) -> None:
    with running_server(tmp_path / "server", env=MULTI) as server:
        revoked, expired, limited, renamed = (
            new_key(server, name=name)["key"] for name in ("lost", "old", "greedy", "plain"))
        exhaust(trouble, server)
        # Each change waits for the locked database first.
        soon = ocp.iso_time(time.time() + 6)

        assert_late(as_admin(server, "DELETE", "/api/keys/lost"), trouble)
        assert_late(as_admin(server, "PATCH", "/api/keys/old", {"expiry": soon}), trouble)
        assert_late(as_admin(server, "PATCH", "/api/keys/greedy/quota", {"daily": 0}), trouble)
        assert_late(as_admin(server, "PATCH", "/api/keys/plain", {"name": "fancy"}), trouble)

        assert not is_good(server, revoked)
        assert ask_as(server, limited).status == 429
        assert as_admin(server, "GET", "/api/keys/fancy").status == 200
        assert eventually(lambda: not is_good(server, expired))
        assert storage(server) == ("behind", "degraded")
        assert server.call("GET", "/ready").status == 503
        trouble.free(server)
        assert eventually(lambda: storage(server) == ("disk", "ok"))
        server.kill()

    with running_server(tmp_path / "server", env=MULTI) as server:
        assert [is_good(server, key) for key in (revoked, expired, limited, renamed)] == [
            False, False, True, True]
        assert ask_as(server, limited).status == 429
        assert as_admin(server, "GET", "/api/keys/fancy").status == 200


def test_what_cannot_be_written_is_not_given_out(trouble: Any, tmp_path: Path) -> None:
    with running_server(tmp_path / "server", env=MULTI) as server:
        key = new_key(server, name="laptop")["key"]
        exhaust(trouble, server)

        replies = [as_admin(server, "POST", "/api/keys", {"name": "another", "note": "x" * 400}),
                   as_admin(server, "POST", "/api/keys/laptop/rotate", {})]

        for reply in replies:
            assert (reply.status, error_of(reply)["code"]) == (trouble.status, trouble.code)
            assert "Nothing was changed" in error_of(reply)["message"]
        assert as_admin(server, "GET", "/api/keys/another").status == 404
        assert is_good(server, key)
        trouble.free(server)


def test_a_used_up_quota_is_known_after_the_trouble_and_a_restart(
    trouble: Any, tmp_path: Path
) -> None:
    with running_server(tmp_path / "server", env=MULTI) as server:
        key = new_key(server, name="laptop", quota={"daily": 3})["key"]
        assert ask_as(server, key).status == 200
        exhaust(trouble, server)
        statuses = [ask_as(server, key).status for _ in range(3)]
        trouble.free(server)

        assert statuses == [200, 200, 429]
        assert eventually(lambda: storage(server) == ("disk", "ok"))
        server.kill()

    with running_server(tmp_path / "server", env=MULTI) as server:
        assert ask_as(server, key).status == 429


# ---------------------------------------------------------------------------
# A database that is not where it was, or never was
# ---------------------------------------------------------------------------

def delete_home(home: Path) -> None:
    shutil.rmtree(home)


def delete_database(home: Path) -> None:
    for path in home.glob("ocp.db*"):
        path.unlink()


def replace_database(home: Path) -> None:
    ocp.Store(str(home / "other.db")).close()
    (home / "other.db").rename(home / "ocp.db")


@pytest.mark.slow
@pytest.mark.parametrize("take_away", [delete_home, *rest(delete_database, replace_database)])
def test_a_database_that_is_taken_away_is_noticed_and_told_everywhere(
    tmp_path: Path, take_away: Callable[[Path], None]
) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        key = new_key(server, name="laptop")["key"]
        take_away(server.ocp_home)

        assert eventually(lambda: storage(server) == ("lost", "degraded"), 60)
        ready = server.call("GET", "/ready")
        assert (ready.status, "ocp.db" in ready.text) == (503, True)
        assert "storage=lost" in server.output
        assert "Not kept safely" in new_key(server, name="phone")["warning"]
        assert "warning" in as_admin(server, "DELETE", "/api/keys/phone").json()
        assert ask_as(server, key).status == 200


@pytest.mark.exhaustive
def test_a_database_that_comes_back_is_well_again(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        server.ocp_home.rename(tmp_path / "aside")
        assert eventually(lambda: storage(server)[0] == "lost", 60)

        (tmp_path / "aside").rename(server.ocp_home)

        assert eventually(lambda: storage(server) == ("disk", "ok"), 60)
        assert "warning" not in new_key(server, name="laptop")


def damaged(home: Path) -> None:
    path = home / "ocp.db"
    whole = path.read_bytes()
    path.write_bytes(whole[:4_096] + b"\xa5" * (len(whole) - 4_096))


def newer(home: Path) -> None:
    with contextlib.closing(sqlite3.connect(home / "ocp.db")) as connection:
        connection.execute("PRAGMA user_version=999")


@pytest.mark.parametrize(("spoil", "advice"), [
    (damaged, "move ocp.db away"), (newer, "update OCP")])
def test_a_server_that_keeps_all_in_memory_never_says_that_it_is_well(
    tmp_path: Path, spoil: Callable[[Path], None], advice: str
) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        home = server.ocp_home
    spoil(home)

    with running_server(tmp_path, env=MULTI) as server:
        made = new_key(server, name="laptop")

        assert storage(server) == ("memory", "degraded")
        assert advice in health(server)["fix"] and advice in made["warning"]
        assert server.call("GET", "/ready").status == 503
        assert ask_as(server, made["key"]).status == 200
        assert as_admin(server, "GET", "/api/usage?all=true").json()["totals"]["requests"] == 1


# ---------------------------------------------------------------------------
# One server to a home
# ---------------------------------------------------------------------------

def start_again(place: Place, folder: Path, *arguments: str) -> Process:
    """Another server with the home of the first, and with output of its own."""
    second = Place(folder)
    second.prepare()
    env = {**place.env(MULTI, ()), "CLAUDE_PROXY_PORT": "0"}
    return start_fork(second, REPO / "ocp_server.py", arguments, env)


def test_a_second_server_on_one_home_says_so_and_ends(tmp_path: Path) -> None:
    with running_server(tmp_path / "first", env=MULTI) as server:
        second = start_again(Place(tmp_path / "first"), tmp_path / "second")

        assert second.wait(60) == 1
        said = output_of(Place(tmp_path / "second"))
        assert said.count("\n") == 1 and "Traceback" not in said
        assert f"another OCP server (process {server.pid}) uses {server.ocp_home}" in said
        assert ask_as(server, ADMIN_KEY).status == 200


def test_a_killed_server_keeps_nobody_out_of_its_home(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        server.kill()

    with running_server(tmp_path, env=MULTI) as server:
        assert health(server)["storage"] == "disk"


@pytest.mark.slow
def test_a_start_waits_for_a_server_that_is_finishing_its_answers(tmp_path: Path) -> None:
    go = tmp_path / "go"
    turns = [[{"say": "begun "}, {"wait_for": str(go)}, {"say": "done"}]]
    with running_server(tmp_path / "first", turns, env=MULTI) as server:
        with RawConnection(server.port) as wire:
            wire.send(post(encoded(question(stream=True)), f"Authorization: Bearer {ADMIN_KEY}"))
            wire.hear(b"begun")
            server.process.send_signal(signal.SIGTERM)
            assert eventually(
                lambda: "stopping" in (server.ocp_home / "server.lock").read_text())
            second = start_again(Place(tmp_path / "first"), tmp_path / "second")
            time.sleep(1)
            waited = second.poll() is None
            go.touch()
            wire.hear(b"done")
        try:
            assert waited
            assert eventually(lambda: "serves" in output_of(Place(tmp_path / "second")))
        finally:
            second.terminate()
            second.wait(60)


def test_a_demo_beside_a_server_keeps_all_in_memory(tmp_path: Path) -> None:
    with running_server(tmp_path / "first", env=MULTI) as server:
        second = start_again(Place(tmp_path / "first"), tmp_path / "second", "--demo")
        try:
            assert eventually(lambda: "serves" in output_of(Place(tmp_path / "second")))
        finally:
            second.terminate()
            second.wait(60)
        assert health(server)["status"] == "ok"


# ---------------------------------------------------------------------------
# The end of a key
# ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {**MULTI, "CLAUDE_MAX_CONCURRENT": "2"}
    with running_server(tmp_path_factory.mktemp("house"), env=env) as server:
        yield server


@contextlib.contextmanager
def asking(server: Server, key: str, *, stream: bool) -> Iterator[RawConnection]:
    """A client whose answer has begun and does not go on."""
    assert eventually(lambda: at_rest(server))
    server.write_scenario([[{"say": "begun"}, HANG]])
    count = len(server.queries())
    with RawConnection(server.port) as wire:
        wire.send(post(encoded(question(stream=stream)), f"Authorization: Bearer {key}"))
        asked_process(server, count + 1)
        if stream:
            wire.hear(b"begun")
        yield wire


def assert_ended(wire: RawConnection, words: str, *, stream: bool) -> None:
    """That a client is told why its answer ends, and then nothing more."""
    if stream:
        wire.hear(words.encode())
        wire.hear(b"0\r\n\r\n")
    else:
        reply = wire.reply()
        assert (reply.status, words in reply.text) == (401, True)
    assert wire.is_closed()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_revoking_a_key_ends_what_runs_for_it_and_nothing_else(
    house: Server, stream: bool
) -> None:
    made, other = new_key(house), new_key(house)
    with asking(house, made["key"], stream=stream) as wire:
        with RawConnection(house.port) as wire_of_another:
            wire_of_another.send(
                post(encoded(question(stream=True)), f"Authorization: Bearer {other['key']}"))
            wire_of_another.hear(b"begun")

            as_admin(house, "DELETE", f"/api/keys/{made['id']}")

            assert_ended(wire, "was revoked", stream=stream)
            assert eventually(lambda: health(house)["concurrency"]["inflight"] == 1)
            quota = as_admin(house, "GET", f"/api/keys/{made['id']}/quota").json()["quota"]
            assert (quota["daily"]["used"], quota["daily"]["inFlight"]) == (1, 0)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_runs_for_a_key_ends_when_it_expires(house: Server, stream: bool) -> None:
    made = new_key(house)
    with asking(house, made["key"], stream=stream) as wire:
        soon = ocp.iso_time(time.time() + 1.2)
        as_admin(house, "PATCH", f"/api/keys/{made['id']}", {"expiry": soon})

        assert_ended(wire, "expired on", stream=stream)
    assert eventually(lambda: at_rest(house))


def test_revoking_a_key_ends_what_waits_for_it(house: Server) -> None:
    made, other, third = new_key(house), new_key(house), new_key(house)
    with asking(house, other["key"], stream=True), RawConnection(house.port) as second:
        second.send(post(encoded(question(stream=True)), f"Authorization: Bearer {third['key']}"))
        second.hear(b"begun")
        count = len(house.queries())
        with RawConnection(house.port) as wire:
            wire.send(post(encoded(question()), f"Authorization: Bearer {made['key']}"))
            eventually(lambda: health(house)["concurrency"]["queued"] == 1)

            as_admin(house, "DELETE", f"/api/keys/{made['id']}")

            reply = wire.reply()
        assert (reply.status, len(house.queries())) == (401, count)
        # A client that has sent its next request already learns that nobody reads it.
        assert reply.headers["connection"] == "close"
        quota = as_admin(house, "GET", f"/api/keys/{made['id']}/quota").json()["quota"]
        assert quota["daily"]["used"] == 0


def test_a_key_that_is_revoked_while_its_body_comes_is_refused(house: Server) -> None:
    made = new_key(house)
    count = len(house.queries())
    request = post(encoded(question()), f"Authorization: Bearer {made['key']}")
    with RawConnection(house.port) as wire:
        wire.send(request[:-5])
        assert eventually(lambda: as_admin(
            house, "GET", f"/api/keys/{made['id']}").json()["lastUsed"])
        as_admin(house, "DELETE", f"/api/keys/{made['id']}")
        wire.send(request[-5:])

        assert wire.reply().status == 401
    assert len(house.queries()) == count


# ---------------------------------------------------------------------------
# Reports
# ---------------------------------------------------------------------------

ROWS = 131_000


def fill(database: Path, count: int) -> None:
    """So many rows of usage over 400 days, of 40 callers and 5 models."""
    database.parent.mkdir(parents=True, mode=0o700)
    now_s = time.time()
    with contextlib.closing(ocp.Store(str(database))) as store:
        row = ocp.UsageRow(
            now_s, "req_1", None, "caller", "model", "chat", "ok", 200, 1, "end_turn", False, True,
            "fresh", 10, 20, 1, 2, 3, 4, 100, 200)
        with store.transaction() as connection:
            connection.executemany(
                f"INSERT INTO usage ({', '.join(row._fields)}) VALUES "
                f"({', '.join('?' * len(row))})",
                (row._replace(at_s=now_s - number * 400 * 86_400 / count,
                              request_id=f"req_{number}", caller=f"caller {number % 40}",
                              model=f"model {number % 5}")
                 for number in range(count)))


@pytest.mark.exhaustive
def test_heavy_reports_hold_nobody_up_and_are_bounded(tmp_path: Path) -> None:
    place = Place(tmp_path)
    fill(place.ocp_home / "ocp.db", ROWS)
    with running_server(tmp_path, env=MULTI) as server:
        key = new_key(server, name="innocent")["key"]
        over = threading.Event()
        waits: list[float] = []

        def ask_on() -> None:
            while not over.is_set():
                began_s = time.monotonic()
                assert ask_as(server, key).status == 200
                waits.append(time.monotonic() - began_s)

        innocent = threading.Thread(target=ask_on)
        innocent.start()
        try:
            path = "/api/usage?hours=9600&all=true"
            began_s = time.monotonic()
            replies = in_parallel([
                lambda: server.call("GET", path, headers=bearer(ADMIN_KEY), timeout_s=240)] * 6)
            reports_s = time.monotonic() - began_s
        finally:
            over.set()
            innocent.join()

    print(f"6 reports: {reports_s:.1f} s; {len(waits)} requests, longest {max(waits):.2f} s")
    # Who waits for others too long is told to come again.
    answered = [reply for reply in replies if reply.status == 200]
    assert answered and {reply.status for reply in replies} <= {200, 429}
    # Not as long as the reports, which it would be if they held a lock that requests need.
    assert max(waits) < max(1.0, reports_s / 3)
    report = answered[0].json()
    assert report["totals"]["requests"] >= ROWS
    assert (report["timelineUnit"], report["seriesComplete"]) == ("day", False)
    assert len(report["timeline"]) <= 402
    assert len(report["series"]) == 10_000
    assert sum(row["requests"] for row in report["timeline"]) == report["totals"]["requests"]
