"""Keys with a Claude login of their own: how it is set, shown and forgotten."""
from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from chat import error_of
from http_client import Reply
from keys import MULTI, as_admin, ask_as, new_key
from processes import is_gone
from project import load_script
from rig import environment
from server import Server, running_server
from waiting import eventually

ocp = load_script("ocp_server.py")

Json = Any

TOKEN = "sk-ant-oat01-canary-of-another-account"
#: Processes are kept, none is started ahead.
KEEPING = {**MULTI, "OCP_PARKED_PROCESSES": "8"}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Server]:
    with running_server(tmp_path / "house", env=KEEPING) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which somebody has logged in."""
    made = tmp_path / "anna"
    made.mkdir()
    (made / ".credentials.json").write_text("{}")
    return made


def set_login(server: Server, key: Json, **login: Json) -> Reply:
    return as_admin(server, "PUT", f"/api/keys/{key}/login", login)


def shown(server: Server, key: Json) -> Json:
    return as_admin(server, "GET", f"/api/keys/{key}").json()


def session_of(server: Server, key: Json) -> Json:
    """What is known of the five hours of a key's own login."""
    return shown(server, key["id"])["login"]["plan"]["currentSession"]


def child(server: Server) -> dict[str, str]:
    """The environment of the process that was asked last."""
    return environment(server.queries()[-1]["pid"])


def test_a_key_with_a_token_runs_claude_with_it_and_with_no_other_login(
    tmp_path: Path
) -> None:
    env = {**KEEPING, "CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-of-the-owner",
           "ANTHROPIC_AUTH_TOKEN": "of-the-owner-too", "OCP_PASS_ENV": "ANTHROPIC_AUTH_TOKEN"}
    with running_server(tmp_path, env=env) as house:
        made, plain = new_key(house), new_key(house)
        assert set_login(house, made["id"], token=TOKEN).status == 200

        assert ask_as(house, made["key"]).status == 200
        own = child(house)
        assert ask_as(house, plain["key"]).status == 200
        owners = child(house)

        assert own["CLAUDE_CODE_OAUTH_TOKEN"] == TOKEN
        assert "ANTHROPIC_AUTH_TOKEN" not in own
        place = house.ocp_home / "logins" / shown(house, made["id"])["login"]["id"]
        assert own["CLAUDE_CONFIG_DIR"] == str(place)
        assert not Path(own["CLAUDE_SECURESTORAGE_CONFIG_DIR"]).exists()
        assert owners["CLAUDE_CODE_OAUTH_TOKEN"] == "sk-ant-oat01-of-the-owner"
        assert owners["ANTHROPIC_AUTH_TOKEN"] == "of-the-owner-too"
        assert owners["CLAUDE_CONFIG_DIR"] == str(house.ocp_home / "claude")


def test_a_key_with_a_folder_runs_claude_with_its_credentials(
    house: Server, folder: Path
) -> None:
    made = new_key(house)
    set_login(house, made["id"], folder=str(folder))

    assert ask_as(house, made["key"]).status == 200

    own = child(house)
    assert "CLAUDE_CODE_OAUTH_TOKEN" not in own
    assert own["CLAUDE_SECURESTORAGE_CONFIG_DIR"] == str(folder)
    login = shown(house, made["id"])["login"]
    assert (login["kind"], login["folder"]) == ("folder", str(folder))
    assert login["state"] == "logged in"


def test_a_token_is_shown_nowhere(house: Server) -> None:
    made = new_key(house)
    replies = [set_login(house, made["id"], token=TOKEN), ask_as(house, made["key"]),
               set_login(house, made["id"], token=f"{TOKEN} ocp_"),
               set_login(house, made["id"], token=TOKEN, folder="/x")]
    paths = ("/api/keys", f"/api/keys/{made['id']}", "/logs?n=1000&level=all", "/health",
             "/metrics", "/status", "/api/usage", "/settings", "/api/errors", "/logs?level=audit")
    replies += [as_admin(house, "GET", path) for path in paths]

    assert not [reply for reply in replies if TOKEN in reply.text]
    assert TOKEN not in house.output
    files = [path for path in house.ocp_home.rglob("*") if path.is_file()]
    held = [path.name for path in files if TOKEN.encode() in path.read_bytes()]
    # The database and its log, which only their owner can read.
    assert {name[:6] for name in held} == {"ocp.db"}
    assert not [path for path in files if path.name in held and path.stat().st_mode & 0o077]


def test_keys_with_the_same_login_share_its_account(house: Server) -> None:
    names = ("anna", "anna-phone")
    made = [new_key(house, name=name) for name in names]
    for each in made:
        set_login(house, each["id"], token=TOKEN)
        assert ask_as(house, each["key"]).status == 200

    (login,) = as_admin(house, "GET", "/api/keys").json()["logins"]

    assert sorted(login["keys"]) == sorted(names)
    assert (login["state"], login["used"]["daily"]) == ("logged in", 2)
    assert login["plan"]["currentSession"]["utilization"] == 0.21


def test_a_login_that_is_taken_away_leaves_the_servers_and_nothing_else(house: Server) -> None:
    made = new_key(house)
    set_login(house, made["id"], token=TOKEN)
    assert ask_as(house, made["key"]).status == 200
    pid = house.queries()[-1]["pid"]
    assert list((house.ocp_home / "logins").iterdir())

    reply = as_admin(house, "DELETE", f"/api/keys/{made['id']}/login")

    assert (reply.status, reply.json()["login"]) == (200, None)
    eventually(lambda: is_gone(pid))
    assert not list((house.ocp_home / "logins").iterdir())
    assert ask_as(house, made["key"]).status == 200
    assert child(house)["CLAUDE_CONFIG_DIR"] == str(house.ocp_home / "claude")


def test_a_conversation_does_not_go_on_under_another_login(house: Server) -> None:
    made = new_key(house)
    assert ask_as(house, made["key"]).status == 200
    before = house.queries()[-1]["pid"]
    set_login(house, made["id"], token=TOKEN)

    messages = [{"role": "user", "content": "hi"},
                {"role": "assistant", "content": "You said: hi"},
                {"role": "user", "content": "and now?"}]
    assert ask_as(house, made["key"], messages=messages).status == 200

    assert house.queries()[-1]["pid"] != before
    assert child(house)["CLAUDE_CODE_OAUTH_TOKEN"] == TOKEN


def test_a_revoked_key_keeps_no_login(house: Server) -> None:
    made = new_key(house)
    set_login(house, made["id"], token=TOKEN)

    as_admin(house, "DELETE", f"/api/keys/{made['id']}")

    assert shown(house, made["id"])["login"] is None
    assert as_admin(house, "GET", "/api/keys").json()["logins"] == []
    assert set_login(house, made["id"], token=TOKEN).status == 400
    held = [path for path in house.ocp_home.glob("ocp.db*") if TOKEN.encode() in path.read_bytes()]
    assert held == []
    with closing(sqlite3.connect(house.ocp_home / "ocp.db")) as database:
        assert database.execute("SELECT login FROM keys").fetchall() == [('["", ""]',)]


def test_a_login_survives_a_restart_and_so_does_its_plan(tmp_path: Path) -> None:
    with running_server(tmp_path, env=KEEPING) as server:
        made, other = new_key(server), new_key(server)
        set_login(server, made["id"], token=TOKEN)
        set_login(server, other["id"], token=f"{TOKEN}-2")
        assert ask_as(server, made["key"]).status == 200
        before = eventually(lambda: session_of(server, made)["utilization"] and
                            session_of(server, made))
    with running_server(tmp_path, env=KEEPING) as server:
        assert shown(server, made["id"])["login"]["state"] == "not known yet"
        assert session_of(server, made)["observedAt"] == before["observedAt"]
        assert session_of(server, made)["utilization"] == before["utilization"] == 0.21
        assert session_of(server, other)["utilization"] is None
        owners = as_admin(server, "GET", "/usage").json()["plan"]["currentSession"]
        assert owners["utilization"] is None
        assert ask_as(server, made["key"]).status == 200
        assert child(server)["CLAUDE_CODE_OAUTH_TOKEN"] == TOKEN


@pytest.mark.few_cases
@pytest.mark.parametrize("login", [
    {}, {"token": None}, {"token": "short"}, {"token": 5}, {"token": "sk-ant-api03-" + "x" * 80},
    {"token": "ocp_" + "x" * 32}, {"token": "\u00e9" * 40}, {"folder": "relative"},
    {"folder": "/nowhere/at/all"}, {"folder": "/"}, {"folder": "/tmp\0x"}, {"login": "x"},
    {"token": TOKEN, "folder": "/tmp"},
])
def test_a_login_that_is_none_is_refused_and_changes_nothing(house: Server, login: Json) -> None:
    made = new_key(house)

    refused = set_login(house, made["id"], **login)

    assert (refused.status, TOKEN in refused.text) == (400, False)
    assert error_of(refused)["message"]
    assert shown(house, made["id"])["login"] is None


def test_a_lost_login_ends_the_processes_of_that_login_only_and_is_told(house: Server) -> None:
    made, plain = new_key(house, name="anna"), new_key(house)
    as_admin(house, "PATCH", "/settings", {"alertUrl": "http://127.0.0.1:9/nobody"})
    set_login(house, made["id"], token=TOKEN)
    assert ask_as(house, plain["key"]).status == 200
    assert ask_as(house, made["key"]).status == 200
    others, own = (query["pid"] for query in house.queries())
    house.write_scenario([[{"api_error": {
        "status": 401, "word": "authentication_failed", "text": "Invalid token"}}]])

    refused = ask_as(house, made["key"], "again")

    assert (refused.status, error_of(refused)["code"]) == (401, "upstream_login_required")
    assert "ocp keys login" in error_of(refused)["message"]
    eventually(lambda: is_gone(own))
    assert not is_gone(others)
    assert shown(house, made["id"])["login"]["state"] == "not logged in"
    assert house.call("GET", "/health").json()["auth"]["ok"] is True
    (alert,) = eventually(lambda: as_admin(house, "GET", "/api/alerts").json()["alerts"])
    assert (alert["event"], alert["details"]["keys"]) == ("key_login_lost", ["anna"])


def test_spares_serve_their_own_login_only(tmp_path: Path) -> None:
    env = {**KEEPING, "OCP_WARM_PROCESSES": "1", "OCP_WARM_TOTAL": "2"}
    with running_server(tmp_path, env=env) as house:
        made, plain = new_key(house), new_key(house)
        set_login(house, made["id"], token=TOKEN)
        for _ in range(3):
            for key in (made, plain):
                assert ask_as(house, key["key"]).status == 200
                wanted = TOKEN if key is made else None
                assert child(house).get("CLAUDE_CODE_OAUTH_TOKEN") == wanted
            eventually(lambda: sum(house.call("GET", "/health").json()["spares"].values()) == 2)


def test_what_is_written_of_a_login_has_no_token() -> None:
    login = ocp.Login(token=TOKEN)
    assert TOKEN not in repr(ocp.Caller("anna", login=login))
    assert TOKEN not in f"{login} {ocp.ProcessKind('opus', login)}"
