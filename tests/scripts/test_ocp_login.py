"""`ocp login` and `ocp capture`: what is asked of the server, and what the user is told."""
from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ocp_samples as samples
from ocp_command import DEAD_URL, Request, ocp_env, run, run_env, stub_server
from project import load_script
from server import Server, running_server

ocp = load_script("ocp")

Json = Any
WAITING: Json = {
    "state": "waiting", "url": "https://claude.com/cai/oauth/authorize?state=s",
    "expiresAt": "2026-11-20T15:10:00Z", "message": None, "account": None,
    "login": {"ok": False, "okAt": None, "message": None}}
NONE: Json = {**WAITING, "state": "none", "url": None, "expiresAt": None}
FINISHED: Json = {**NONE, "state": "finished", "account": {
    "email": "owner@example.com", "organization": "Example", "subscriptionType": "Claude Max"}}
REFUSED: Json = {"error": {
    "message": "The code is cut off: copy it whole", "type": "invalid_request_error",
    "param": "code", "code": "login_code_refused"}}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running_server(tmp_path / "server", {"login": {"code": "good"}}) as started:
        yield started


@pytest.mark.parametrize("is_json", [False, True])
def test_a_login_shows_the_address_takes_the_code_and_says_who_it_is(
    tmp_path: Path, is_json: bool
) -> None:
    answers = {"GET /api/login": (200, NONE), "POST /api/login": (201, WAITING),
               "POST /api/login/code": (200, FINISHED)}
    with stub_server(answers) as stub:
        words = ["login", *(["--json"] if is_json else [])]
        found = run(tmp_path, stub.url, *words, stdin="code#s\n")
        sent = [(each.method, each.path, each.body) for each in stub.requests]
    assert found.code == 0, found
    assert WAITING["url"] in found.stderr and "2026-11-20 15:10:00" in found.stderr
    assert ("POST", "/api/login/code", {"code": "code#s"}) in sent
    assert ('"finished"' in found.stdout) if is_json else (
        found.stdout == "logged in: owner@example.com, Example (Claude Max)\n")
    assert "code#s" not in found.stdout + found.stderr


def test_a_login_that_waits_is_gone_on_with(tmp_path: Path) -> None:
    answers = {"GET /api/login": (200, WAITING), "POST /api/login/code": (200, FINISHED)}
    with stub_server(answers) as stub:
        assert run(tmp_path, stub.url, "login", stdin="code#s\n").code == 0
        assert not [each for each in stub.requests if (each.method, each.path) == (
            "POST", "/api/login")]


def test_without_a_code_the_login_waits_and_the_user_is_told(tmp_path: Path) -> None:
    with stub_server({"GET /api/login": (200, WAITING)}) as stub:
        found = run(tmp_path, stub.url, "login", stdin="")
    assert found.code == 2 and "Code: \nocp: No code came." in found.stderr
    assert "goes on with it" in found.stderr


def test_ctrl_c_leaves_the_login_and_says_so(tmp_path: Path) -> None:
    class Leaving(io.StringIO):
        def readline(self, size: Any = -1) -> str:
            raise KeyboardInterrupt

    with stub_server({"GET /api/login": (200, WAITING)}) as stub:
        env = ocp_env(tmp_path, "login", environ={"OCP_URL": stub.url})
        found = run_env(dataclasses.replace(env, stdin=Leaving()))
    assert found.code == 130 and "ocp login --cancel" in found.stderr


def test_a_code_that_is_cut_off_is_asked_for_again_on_a_terminal_only(tmp_path: Path) -> None:
    def answer(request: Request) -> tuple[int, Json]:
        return (200, FINISHED) if request.body["code"] == "whole#s" else (400, REFUSED)

    answers = {"GET /api/login": (200, WAITING), "POST /api/login/code": answer}
    with stub_server(answers) as stub:
        found = run(tmp_path, stub.url, "login", stdin="cut\nwhole#s\n", terminal=True)
        assert found.code == 0 and "cut off" in found.stderr
        found = run(tmp_path, stub.url, "login", stdin="cut\nwhole#s\n")
        assert found.code == 1 and "cut off" in found.stderr
        assert "The login waits" in found.stderr


def test_cancelling_says_whether_there_was_a_login(tmp_path: Path) -> None:
    for was, words in ((True, "has been ended"), (False, "No login was waiting")):
        with stub_server({"DELETE /api/login": (200, {**NONE, "cancelled": was})}) as stub:
            found = run(tmp_path, stub.url, "login", "--cancel")
        assert found.code == 0 and words in found.stdout


@pytest.mark.parametrize("words", [["login"], ["login", "--cancel"], ["capture", "5"]])
def test_without_a_server_the_user_is_told(tmp_path: Path, words: list[str]) -> None:
    found = run(tmp_path, DEAD_URL, *words, stdin="code#s\n")
    assert found.code == 3 and "Cannot connect" in found.stderr


def test_a_login_with_a_real_server(server: Server, tmp_path: Path) -> None:
    begun = server.call("POST", "/api/login").json()
    state = begun["url"].rpartition("=")[2]
    found = run(tmp_path, server.url, "login", stdin=f"wrong#{state}\n")
    assert found.code == 1 and "was not accepted" in found.stderr and "wrong#" not in found.stderr

    state = server.call("POST", "/api/login").json()["url"].rpartition("=")[2]
    found = run(tmp_path, server.url, "login", stdin=f"good#{state}\n")
    assert (found.code, found.stdout) == (
        0, "logged in: owner@example.com, Example (Claude Max)\n")


def test_a_capture_is_started_shown_and_stopped(server: Server, tmp_path: Path) -> None:
    started = run(tmp_path, server.url, "capture", "5", "--minutes", "3")
    assert started.code == 0 and "The next 5 requests will be written" in started.stdout
    assert run(tmp_path, server.url, "capture", "1").code == 1
    for words in (["capture"], ["capture", "--list"]):
        assert "The next 5 requests" in run(tmp_path, server.url, *words).stdout
    stopped = run(tmp_path, server.url, "capture", "--stop")
    assert stopped.code == 0 and stopped.stdout.startswith("No capture runs.")
    assert str(server.ocp_home / "captures") in stopped.stdout


def test_a_capture_asks_for_what_was_said(tmp_path: Path) -> None:
    with stub_server({"POST /api/capture": (201, samples.CAPTURE)}) as stub:
        assert run(tmp_path, stub.url, "capture", "2", "--key", "laptop").code == 0
        assert stub.requests[0].body == {"requests": 2, "minutes": 10, "key": "laptop"}
        found = run(tmp_path, stub.url, "capture", "--key", "laptop")
        assert found.code == 2 and "Say how many" in found.stderr
        found = run(tmp_path, stub.url, "capture", "--minutes", "5")
        assert found.code == 2 and "Say how many" in found.stderr
        assert len(stub.requests) == 1


@pytest.mark.parametrize("word, line", [("stop", "--stop"), ("list", "--list"), ("start", "5")])
def test_an_option_of_capture_that_is_typed_as_an_action(
    tmp_path: Path, word: str, line: str
) -> None:
    found = run(tmp_path, DEAD_URL, "capture", word)
    assert found.code == 2 and f"Write: ocp capture {line}\n" in found.stderr


def test_health_tells_of_a_capture(tmp_path: Path) -> None:
    health = {**samples.HEALTH, "capture": {"remaining": 2, "endsAt": "2026-11-20T15:10:00Z"}}
    with stub_server({"GET /health": (200, health)}) as stub:
        found = run(tmp_path, stub.url, "health")
    assert "writes the next 2 requests to files, until 2026-11-20 15:10:00\n" in found.stdout
