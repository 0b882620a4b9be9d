"""Keys with a login of their own: what goes upstream, and what stays with each account."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import stub_api
from chat import NO_IDLE
from http_client import Reply
from keys import MULTI, as_admin, ask_as, new_key
from rig import Claude, Rig, assistant, claude_pids, environment, running_rig, user
from waiting import eventually

Json = Any

OWNER_TOKEN = "sk-ant-oat01-test"
TOKEN = "sk-ant-oat01-of-a-token-of-another-account"
FOLDER_TOKEN = "sk-ant-oat01-of-a-folder-of-a-third-account"


def account(name: str) -> dict[str, Json]:
    """What `.claude.json` has of an account."""
    return {"hasCompletedOnboarding": True, "oauthAccount": {
        "accountUuid": f"uuid-of-{name}", "emailAddress": f"{name}@example.com",
        "organizationUuid": f"org-of-{name}"}}


def logged_in_folder(folder: Path) -> Path:
    """A configuration folder as `claude auth login` leaves it."""
    folder.mkdir()
    (folder / ".claude.json").write_text(json.dumps(account("guest")))
    (folder / ".credentials.json").write_text(json.dumps({"claudeAiOauth": {
        "accessToken": FOLDER_TOKEN, "refreshToken": "sk-ant-ort01-x",
        "expiresAt": 4102444800000, "scopes": ["user:inference", "user:profile"],
        "subscriptionType": "max"}}))
    return folder


@contextmanager
def house(folder: Path, claude: Claude) -> Iterator[Rig]:
    """A server of mode multi whose owner's claude knows an account."""
    settings = {name: value for name, value in MULTI.items() if name not in NO_IDLE}
    with running_rig(folder, claude, **settings) as rig:
        (rig.server.home / ".claude.json").write_text(json.dumps(account("owner")))
        yield rig


def key_with(rig: Rig, **login: str) -> str:
    """The secret of a new key with this login; without one, with the server's."""
    made = new_key(rig.server)
    if login:
        reply = as_admin(rig.server, "PUT", f"/api/keys/{made['id']}/login", login)
        assert reply.status == 200, reply.text
    return str(made["key"])


def owners_session(rig: Rig) -> Json:
    """What is known of the owner's five hours."""
    return as_admin(rig.server, "GET", "/usage").json()["plan"]["currentSession"]


def others_session(rig: Rig) -> Json:
    """The same of the login of a key."""
    (login,) = as_admin(rig.server, "GET", "/api/keys").json()["logins"]
    return login["plan"]["currentSession"]


def tokens_sent(rig: Rig) -> list[str]:
    return [each.headers["authorization"][len("Bearer "):] for each in rig.stub.requests]


def ask(rig: Rig, key: str, *messages: Json) -> Reply:
    return ask_as(rig.server, key, messages=list(messages))


def test_each_key_is_answered_with_its_own_login_and_tells_nothing_of_the_others(
    claude: Claude, tmp_path: Path
) -> None:
    with house(tmp_path / "house", claude) as rig:
        folder = logged_in_folder(tmp_path / "guest")
        logins: list[dict[str, str]] = [{}, {"token": TOKEN}, {"folder": str(folder)}]
        wanted = [OWNER_TOKEN, TOKEN, FOLDER_TOKEN]

        for login in logins:
            assert ask(rig, key_with(rig, **login), user("Who am I?")).status == 200

        assert tokens_sent(rig) == wanted
        bodies = [json.dumps(body) for body in rig.bodies()]
        assert not [body for body in bodies if "@example.com" in body]
        assert ["uuid-of-owner" in body for body in bodies] == [True, False, False]
        assert ["uuid-of-guest" in body for body in bodies] == [False, False, True]
        # Of another account's claude the server has no login, and that one has nothing of another.
        pids = claude_pids(rig.server)
        assert len(pids) == 3
        for found in map(environment, pids):
            if found.get("CLAUDE_CODE_OAUTH_TOKEN") != OWNER_TOKEN:
                assert str(rig.server.home) not in found["CLAUDE_SECURESTORAGE_CONFIG_DIR"]
        kept = [path.name for path in folder.iterdir()]
        assert set(kept) >= {".claude.json", ".credentials.json"}


@pytest.mark.exhaustive
def test_limits_and_a_lost_login_of_one_account_stay_with_it(
    claude: Claude, tmp_path: Path
) -> None:
    with house(tmp_path / "house", claude) as rig:
        owners, others = key_with(rig), key_with(rig, token=TOKEN)
        rig.stub.enqueue(
            stub_api.text("one", headers=stub_api.rate_limit_headers(five_hour=0.1)),
            stub_api.text("two", headers=stub_api.rate_limit_headers(0.93, resets_in_s=1000)))
        assert ask(rig, owners, user("One?")).status == 200
        assert ask(rig, others, user("Two?")).status == 200
        (pid,) = [each for each in claude_pids(rig.server)
                  if environment(each)["CLAUDE_CODE_OAUTH_TOKEN"] == OWNER_TOKEN]

        # Older versions tell when a window resets, and not always how much of it is used.
        found = eventually(lambda: others_session(rig)["resetsAt"] and others_session(rig))
        assert found["utilization"] in (None, 0.93)
        assert owners_session(rig)["utilization"] in (None, 0.1)
        assert owners_session(rig)["resetsAt"] > found["resetsAt"]

        # claude asks twice.
        rig.stub.enqueue(*[stub_api.error(401, "Invalid bearer token")] * 2)
        refused = ask(rig, others, user("Another?"))
        assert refused.json()["error"]["code"] == "upstream_login_required"
        assert "ocp keys login" in refused.json()["error"]["message"]
        health = rig.server.call("GET", "/health").json()
        assert (health["status"], health["auth"]["ok"]) == ("ok", True)
        found = as_admin(rig.server, "GET", "/api/keys").json()["logins"]
        assert found[0]["state"] == "not logged in"

        again = ask(rig, owners, user("One?"), assistant("one"), user("And?"))
        assert again.status == 200
        assert pid in claude_pids(rig.server)
        assert tokens_sent(rig) == [OWNER_TOKEN, TOKEN, TOKEN, TOKEN, OWNER_TOKEN]


def test_a_folder_without_a_login_is_never_answered_with_the_servers(
    claude: Claude, tmp_path: Path
) -> None:
    with house(tmp_path / "house", claude) as rig:
        folder = logged_in_folder(tmp_path / "guest")
        key = key_with(rig, folder=str(folder))
        (folder / ".credentials.json").unlink()

        refused = ask(rig, key, user("Hello?"))

        assert refused.status == 401, refused.text
        assert refused.json()["error"]["code"] == "upstream_login_required"
        assert rig.stub.requests == []
        found = as_admin(rig.server, "GET", "/api/keys").json()["logins"]
        assert found[0]["state"] == "not logged in"
