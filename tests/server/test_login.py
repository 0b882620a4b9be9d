"""A login that the operator makes in a browser: the address, the code, and what may go wrong."""
from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from chat import ask
from chat import error_of as error_in
from http_client import Reply
from keys import MULTI, as_admin, bearer
from processes import is_gone
from project import load_script
from server import Server, running_server
from waiting import eventually, in_parallel

ocp = load_script("ocp_server.py")

Json = Any
#: Nothing but the code may be found anywhere afterwards.
CODE = "the-one-time-code"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running_server(tmp_path, {"login": {"code": CODE}}) as started:
        yield started


def begin(server: Server) -> tuple[Json, str]:
    """What the server says of a new login, and the state that the page puts behind the code."""
    reply = server.call("POST", "/api/login")
    assert reply.status == 201, reply.text
    return reply.json(), parse_qs(urlsplit(reply.json()["url"]).query)["state"][0]


def send(server: Server, text: Json) -> Reply:
    return server.call("POST", "/api/login/code", {"code": text})


def error_of(reply: Reply, status: int) -> Json:
    assert reply.status == status, reply.text
    return error_in(reply)


def state_of(server: Server) -> Json:
    return server.call("GET", "/api/login").json()


def login_pids(server: Server) -> list[int]:
    return [each["pid"] for each in server.fake_log("line")
            if each["line"].get("request", {}).get("subtype") == "claude_authenticate"]


def everything_kept(server: Server) -> str:
    """All that the server has written anywhere, and what it tells its operator."""
    files = [path for path in Path(server.ocp_home).rglob("*") if path.is_file()]
    told = [server.call("GET", path).text for path in
            ("/api/login", "/logs?n=1000", "/api/errors", "/health", "/metrics")]
    return server.output + "".join(
        [path.read_bytes().decode("latin-1") for path in files] + told)


def test_a_login_gives_an_address_takes_the_code_and_tells_who_it_is(server: Server) -> None:
    assert state_of(server)["state"] == "none"

    begun, state = begin(server)
    assert begun["state"] == "waiting" and begun["url"].startswith("https://claude.com/")
    left_s = ocp.parse_time(begun["expiresAt"]) - time.time()
    assert 540 < left_s <= 601

    done = send(server, f" {CODE}#\n{state}\n")
    assert done.status == 200, done.text
    assert done.json()["state"] == "finished" and done.json()["url"] is None
    assert done.json()["account"] == {
        "email": "owner@example.com", "organization": "Example", "subscriptionType": "Claude Max"}
    assert state_of(server) == done.json()
    eventually(lambda: all(is_gone(pid) for pid in login_pids(server)))


def test_the_claude_of_a_login_has_the_folder_of_its_owner(server: Server) -> None:
    assert ask(server).status == 200
    begin(server)

    (pid,) = login_pids(server)
    starts = {each["pid"]: each["env"] for each in server.fake_log("start")}
    assert "CLAUDE_CONFIG_DIR" not in starts[pid]
    assert "CLAUDE_SECURESTORAGE_CONFIG_DIR" not in starts[pid]
    (asked, *_) = server.queries()
    assert starts[asked["pid"]]["CLAUDE_CONFIG_DIR"] == str(server.ocp_home / "claude")


def test_after_a_login_idle_processes_are_replaced_and_the_login_is_not_known(
    server: Server,
) -> None:
    assert ask(server).status == 200
    eventually(lambda: server.call("GET", "/health").json()["spares"])
    assert server.call("GET", "/health").json()["auth"]["ok"] is True
    before = {each["pid"] for each in server.queries()}

    _, state = begin(server)
    assert send(server, f"{CODE}#{state}").status == 200

    assert server.call("GET", "/health").json()["auth"]["ok"] is None
    eventually(lambda: all(is_gone(pid) for pid in before))
    assert ask(server).status == 200
    assert state_of(server)["login"]["ok"] is True


@pytest.mark.few_cases
@pytest.mark.parametrize("text, words", [
    ("", "empty"), (" \n", "empty"), ("abc", "cut off"), ("#STATE", "cut off"), ("abc#", "cut off"),
    ("abc#sta", "cut off"), ("abc#another", "another login"), ("a\u00e9#STATE", "no code"),
    ("x" * 5000, "no code"), (None, "not JSON"), (7, "not JSON"),
])
def test_a_code_that_cannot_be_right_leaves_the_login_waiting(
    server: Server, text: Json, words: str
) -> None:
    _, state = begin(server)
    sent = text.replace("STATE", state) if isinstance(text, str) else text
    refused = send(server, sent)

    assert error_of(refused, 400)["code"] == "login_code_refused"
    assert words in refused.json()["error"]["message"]
    assert state_of(server)["state"] == "waiting"
    assert send(server, f"{CODE}#{state}").json()["state"] == "finished"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"the-one-time-code": 1}',
                                  b'{"code": "x", "the-one-time-code": 1}'])
def test_a_malformed_body_is_refused_without_a_word_of_it(server: Server, body: bytes) -> None:
    refused = server.call("POST", "/api/login/code", body)
    assert error_of(refused, 400)["code"] == "login_code_refused"
    assert CODE not in refused.text + everything_kept(server)


@pytest.mark.few_cases
@pytest.mark.parametrize("scenario, status, words", [
    ({"code": "another"}, 400, "was not accepted"),
    ({"error": "Request failed with status code 400"}, 400, "was not accepted"),
    ({"error": f"{CODE} is no code"}, 400, "[code] is no code"),
    ({"error": "getaddrinfo ENOTFOUND platform.claude.com"}, 502, "could not finish"),
    ({"error": "Request failed with status code 502"}, 502, "could not finish"),
    ({"error": "timeout of 15000ms exceeded"}, 502, "could not finish"),
])
def test_a_login_that_fails_says_why_and_can_begin_again(
    tmp_path: Path, scenario: Json, status: int, words: str
) -> None:
    with running_server(tmp_path, {"login": scenario}) as server:
        _, state = begin(server)
        failed = send(server, f"{CODE}#{state}")

        assert failed.status == status and words in failed.json()["error"]["message"]
        assert "ocp login" in failed.json()["error"]["message"]
        after = state_of(server)
        assert (after["state"], after["url"]) == ("failed", None)
        assert after["message"] == failed.json()["error"]["message"]
        assert error_of(send(server, f"{CODE}#{state}"), 409)["code"] == "login_conflict"
        begin(server)
        assert CODE not in everything_kept(server)


def test_the_code_is_found_nowhere_after_a_login(server: Server) -> None:
    _, state = begin(server)
    assert send(server, f"{CODE}#{state}").status == 200
    assert CODE not in everything_kept(server)
    # It did reach claude.
    assert any(line["request"].get("authorizationCode") == CODE
               for line in server.lines("control_request"))


def test_a_claude_that_dies_over_the_code_fails_the_login(server: Server) -> None:
    begin(server)
    (pid,) = login_pids(server)
    os.kill(pid, 9)
    after = eventually(lambda: [each for each in [state_of(server)] if each["state"] == "failed"])
    assert "ended" in after[0]["message"]
    begin(server)


def test_one_login_at_a_time_and_it_can_be_cancelled(server: Server) -> None:
    replies = in_parallel([lambda: server.call("POST", "/api/login")] * 4)
    assert sorted(each.status for each in replies) == [201, 409, 409, 409]
    (pid,) = login_pids(server)

    cancelled = server.call("DELETE", "/api/login").json()
    assert (cancelled["cancelled"], cancelled["state"]) == (True, "none")
    eventually(lambda: is_gone(pid))
    assert server.call("DELETE", "/api/login").json()["cancelled"] is False
    begin(server)


def test_while_claude_checks_a_code_nothing_else_is_done_with_the_login(tmp_path: Path) -> None:
    with running_server(tmp_path, {"login": {"code": CODE, "delay_ms": 1500}}) as server:
        _, state = begin(server)

        def meanwhile() -> list[int]:
            eventually(lambda: any(
                line["request"]["subtype"] == "claude_oauth_callback"
                for line in server.lines("control_request")))
            return [server.call("DELETE", "/api/login").status,
                    send(server, f"{CODE}#{state}").status,
                    server.call("POST", "/api/login").status]

        done, others = in_parallel([lambda: send(server, f"{CODE}#{state}"), meanwhile])
        assert done.status == 200 and others == [409, 409, 409]


def test_a_login_that_waits_ends_with_the_server(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        begin(server)
        (pid,) = login_pids(server)
    assert is_gone(pid)


def test_an_older_claude_or_a_strange_address_gives_a_clear_error(tmp_path: Path) -> None:
    for number, fields in enumerate([
            {"unsupported": ["claude_authenticate"]}, {"login": {"url": "javascript:?state="}}]):
        with running_server(tmp_path / str(number), fields) as server:
            refused = server.call("POST", "/api/login")
            assert error_of(refused, 502)["code"] == "upstream_failed"
            assert "claude auth login" in refused.json()["error"]["message"]
            assert state_of(server)["state"] == "failed"


def test_a_token_in_the_environment_makes_a_login_pointless(tmp_path: Path) -> None:
    with running_server(tmp_path, env={"CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-x"}) as server:
        refused = server.call("POST", "/api/login")
        assert error_of(refused, 409)["code"] == "login_conflict"
        assert "CLAUDE_CODE_OAUTH_TOKEN" in refused.json()["error"]["message"]


def test_without_claude_a_login_says_so(tmp_path: Path) -> None:
    with running_server(tmp_path, env={"CLAUDE_BIN": "/nowhere/claude"}) as server:
        assert error_of(server.call("POST", "/api/login"), 503)["code"] == "claude_unavailable"


@pytest.mark.parametrize("method, path", [
    ("GET", "/api/login"), ("POST", "/api/login"), ("DELETE", "/api/login"),
    ("POST", "/api/login/code"), ("GET", "/api/capture"), ("POST", "/api/capture"),
    ("DELETE", "/api/capture"),
])
def test_only_the_operator_logs_in_and_captures(tmp_path: Path, method: str, path: str) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        key = as_admin(server, "POST", "/api/keys", {"name": "laptop"}).json()["key"]
        assert server.call(method, path, headers=bearer(key)).status == 403
        assert server.call(method, path).status == 401


def test_a_login_expires_after_ten_minutes() -> None:
    """Without a server, because its clock would have to be moved."""
    class Claude:
        def __init__(self) -> None:
            self.stopped = 0

        def ask(self, subtype: str, limits: Json, **fields: Json) -> Json:
            return {"subtype": "success", "response": {"manualUrl": "https://x/?state=s"}}

        def alive(self) -> bool:
            return not self.stopped

        def drain_output(self) -> None:
            pass

    class Log:
        def event(self, *_: Json, **__: Json) -> None:
            pass

    now_s, claude = [0.0], Claude()

    def stop(process: Claude) -> None:
        process.stopped += 1

    login = ocp.SignIn(lambda: claude, stop, lambda: None, Log(), lambda: now_s[0])
    login.begin()
    now_s[0] = 599.0
    login.tend()
    assert login.report()["state"] == "waiting"

    now_s[0] = 600.0
    with pytest.raises(ocp.LoginConflict, match="expired"):
        login.finish("code#s")
    login.tend()
    assert login.report()["state"] == "failed" and "expired" in login.report()["message"]
    assert claude.stopped == 1
