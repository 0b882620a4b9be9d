"""Strangers who are refused again and again: they fill no log, push out nothing that the operator
did, and wait longer and longer for the answer to a wrong key, while a right key never waits."""
from __future__ import annotations

import json
import select
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chat import CHAT_PATH, NO_IDLE, content_of, question
from keys import ADMIN_KEY, MULTI, as_admin, ask_as, bearer, new_key
from raw_http import RawConnection, head
from server import Server, running_server
from waiting import eventually

Json = Any

WRONG = "Authorization: Bearer ocp_" + "A" * 32


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that tells wrong keys at once."""
    with running_server(tmp_path_factory.mktemp("house"), env=MULTI) as server:
        yield server


def knock(server: Server, count: int, *requests: bytes) -> list[int]:
    """The statuses of these requests, sent so many times on one connection."""
    statuses = []
    with RawConnection(server.port) as wire:
        for _ in range(count):
            wire.send(b"".join(requests))
            statuses += [wire.reply().status for _ in requests]
    return statuses


def names(entries: list[Json]) -> list[str]:
    return [entry["event"] for entry in entries]


def audited(server: Server) -> list[str]:
    """The names of the events in the file of what the operator changed."""
    path = server.ocp_home / "logs" / "audit.log"
    return names([json.loads(line) for line in path.read_text("utf-8").splitlines()])


# -- the log ------------------------------------------------------------------


@pytest.mark.exhaustive
def test_thousands_of_refusals_push_nothing_out_of_the_log(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        made = new_key(server, name="phone")
        strangers = head("GET", "/nothing"), head("GET", "/v1/models"), head("GET", "/logs", WRONG)
        statuses = knock(server, 1_000, *strangers)
        told = as_admin(server, "GET", "/logs?n=1000").json()["entries"]
        changed = as_admin(server, "GET", "/logs?n=1000&level=audit").json()["entries"]
        assert server.stop() == 0
        lines = server.log_entries()

    assert sorted(set(statuses)) == [401, 404]
    assert "key_created" in names(told) and "server_started" in names(told)
    assert names(changed)[-1] == "key_created" and changed[-1]["id"] == made["id"]
    assert names(lines).count("request_refused") <= 10
    sums = [entry["statuses"] for entry in lines if entry["event"] == "requests_refused"]
    assert sum(each.get("404", 0) for each in sums) >= 900
    assert sum(each.get("401", 0) for each in sums) >= 1_800
    assert "key_created" in audited(server)


@pytest.mark.slow
def test_a_flood_of_a_key_holder_pushes_out_nothing_that_the_operator_did(house: Server) -> None:
    made = new_key(house, name="flooder")
    bad = head("GET", "/v1/models?limit=x", f"Authorization: Bearer {made['key']}")

    statuses = knock(house, 1_000, bad)

    entries = as_admin(house, "GET", "/logs?n=1000").json()["entries"]
    assert set(statuses) == {400}
    assert [entry["id"] for entry in entries if entry["event"] == "key_created"] == [made["id"]]


def test_whatever_the_operator_changes_is_in_the_file_of_changes(tmp_path: Path) -> None:
    env = {name: value for name, value in MULTI.items() if name != "OCP_ADMIN_KEY"}
    with running_server(tmp_path, env=env) as server:
        key = (server.ocp_home / "admin-key").read_text().strip()
        for method, path, body in (
            ("POST", "/api/keys", {"name": "phone"}), ("PATCH", "/api/keys/phone", {"note": "a"}),
            ("PATCH", "/api/keys/phone/quota", {"daily": 5}),
            ("POST", "/api/keys/phone/rotate", None), ("DELETE", "/api/keys/phone", None),
            ("PATCH", "/settings", {"maxConcurrent": 3}), ("DELETE", "/cache", None),
        ):
            assert as_admin(server, method, path, body, key).status in (200, 201), path
        found = audited(server)

    assert found == [
        "admin_key_made", "key_created", "key_changed", "quota_updated", "key_rotated",
        "key_revoked", "setting_changed", "cache_cleared",
    ]


def test_a_broken_head_leaves_a_line(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        with RawConnection(server.port) as wire:
            wire.send(b"GET / HTTP/1.1\r\nno colon\r\n\r\n")
            request_id = wire.reply().headers["X-Request-Id"]
        entry = eventually(lambda: server.log_entries("request_refused"))[0]

    assert (entry["request_id"], entry["status"], entry["peer"]) == (request_id, 400, "127.0.0.1")


def test_no_text_of_a_request_commands_whoever_reads_the_log(tmp_path: Path) -> None:
    odd = "\x1b[31m\u202e\u009b2J\u2066"
    with running_server(tmp_path, env=MULTI) as server:
        key = str(new_key(server, note=odd)["key"])
        ask_as(server, key, model=odd)
        ask_as(server, key, **{odd: odd, "temperature": odd})
        server.call("GET", "/v1/models/%1b[31m%E2%80%AE%C2%9B", headers=bearer(key))
        server.call("GET", "/api/usage?since=%1b%E2%80%AE", headers=bearer(key))
        as_admin(server, "PATCH", "/settings", {odd: odd, "maxConcurrent": odd})
        as_admin(server, "DELETE", "/api/keys/%1b%E2%80%AE")
        told = as_admin(server, "GET", "/logs?n=1000").json()
        assert server.stop() == 0
        logged = (server.ocp_home / "logs" / "ocp.log").read_text("utf-8")

    for text in (logged, server.output, json.dumps(told, ensure_ascii=False)):
        assert text.replace("\n", "").isprintable()
    assert "request_refused" in logged


# -- wrong keys ---------------------------------------------------------------


def is_silent(wire: RawConnection, wait_s: float = 0.0) -> bool:
    """Whether nothing has come from the server yet."""
    return not select.select([wire.socket], [], [], wait_s)[0]


@pytest.mark.slow
def test_a_right_key_does_not_wait_for_the_wrong_ones_of_its_address(tmp_path: Path) -> None:
    env = {**MULTI, "OCP_WRONG_KEY_DELAY": "60000", "CLAUDE_MAX_CONCURRENT": "1"}
    with running_server(tmp_path, env=env) as server:
        key = str(new_key(server)["key"])
        # The next one waits 3.2 s, and each behind it twice as long.
        assert set(knock(server, 10, head("GET", "/v1/models", WRONG))) == {401}
        guesses = [RawConnection(server.port) for _ in range(4)]
        for guess in guesses:
            guess.send(head("GET", "/v1/models", WRONG))
        answers = [ask_as(server, key) for _ in range(3)]
        health, admin = server.call("GET", "/health"), as_admin(server, "GET", "/settings")
        silent = [is_silent(guess) for guess in guesses]
        for guess in guesses:
            guess.hang_up()

    assert [content_of(answer) for answer in answers] == ["You said: hi"] * 3
    assert (health.status, admin.status) == (200, 200)
    # The last of them waits 25 s.
    assert any(silent)


@pytest.mark.slow
def test_wrong_keys_without_number_hold_only_a_few_connections(tmp_path: Path) -> None:
    env = {**MULTI, "OCP_WRONG_KEY_DELAY": "60000"}
    with running_server(tmp_path, env=env) as server:
        knock(server, 10, head("GET", "/v1/models", WRONG))
        guesses = [RawConnection(server.port) for _ in range(40)]
        for guess in guesses:
            guess.send(head("GET", "/v1/models", WRONG))
        answered = [guess for guess in guesses if not is_silent(guess, 1)]
        statuses = {guess.reply().status for guess in answered}
        for guess in guesses:
            guess.hang_up()

    assert len(answered) >= 36 and statuses == {401}


def test_whoever_sends_no_key_is_told_at_once(tmp_path: Path) -> None:
    env = {**MULTI, "OCP_WRONG_KEY_DELAY": "60000"}
    with running_server(tmp_path, env=env) as server:
        statuses = knock(server, 100, head("GET", "/v1/models"))

    assert set(statuses) == {401}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["Authorization: Bearer", "x-api-key:"])
@pytest.mark.parametrize("path", ["/v1/models", "/api/keys"])
def test_wrong_admin_keys_wait_wherever_they_are_sent(
    tmp_path: Path, where: str, path: str
) -> None:
    env = {**MULTI, "OCP_WRONG_KEY_DELAY": "60000"}
    guess = head("GET", path, f"{where} {ADMIN_KEY}x")
    with running_server(tmp_path, env=env) as server:
        knock(server, 10, guess)
        with RawConnection(server.port) as wire:
            wire.send(guess)
            assert is_silent(wire, 0.5)


def test_in_mode_none_a_key_of_another_service_waits_for_nothing(tmp_path: Path) -> None:
    env = {**NO_IDLE, "OCP_WRONG_KEY_DELAY": "60000"}
    with running_server(tmp_path, env=env) as server:
        statuses = knock(server, 50, head("GET", "/v1/models", WRONG))
        reply = server.call("POST", CHAT_PATH, question(), bearer("sk-something"))

    assert set(statuses) == {200} and reply.status == 200


@pytest.mark.slow
def test_a_server_stops_while_answers_are_held_back(tmp_path: Path) -> None:
    env = {**MULTI, "OCP_WRONG_KEY_DELAY": "60000"}
    with running_server(tmp_path, env=env) as server:
        knock(server, 10, head("GET", "/v1/models", WRONG))
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(head("GET", "/v1/models", WRONG))
            assert server.stop() == 0
