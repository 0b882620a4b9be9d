"""A login through claude's own control requests, against a stand-in for the hosts of the login.

The exchange with the real hosts needs an account, and is not part of these tests."""
from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from chat import CHAT_PATH, question
from depth import rest
from http_client import Reply
from rig import Claude, Rig, running_rig
from tls_proxy import Tunnel

Json = Any

TOKEN_PATH = "/v1/oauth/token"
CODE = "the-one-time-code"
ACCOUNT = {"uuid": "22222222-2222-4222-8222-222222222222", "email_address": "owner@example.com"}
ORGANIZATION = {"uuid": "11111111-1111-4111-8111-111111111111", "name": "Example"}
TOKENS = {
    "token_type": "Bearer", "access_token": "sk-ant-oat01-new", "refresh_token": "sk-ant-ort01-new",
    "expires_in": 28_800, "scope": "user:inference user:profile",
    "organization": ORGANIZATION, "account": ACCOUNT,
}
PROFILE = {
    "account": {"uuid": ACCOUNT["uuid"], "full_name": "The Owner", "display_name": "Owner",
                "email": ACCOUNT["email_address"], "has_claude_max": True, "has_claude_pro": False},
    "organization": {**ORGANIZATION, "organization_type": "claude_max",
                     "rate_limit_tier": "default_claude_max_5x",
                     "billing_type": "stripe_subscription"},
}
PROFILE_URL = "https://api.anthropic.com/api/oauth/profile"
ROLES = {"organization_role": "admin", "workspace_role": None, "organization_name": "Example"}


@contextmanager
def logged_out(folder: Path, claude: Claude, answer: Json) -> Iterator[tuple[Rig, Tunnel]]:
    """A rig whose claude has no login, and the hosts of the login, which answer a code like
    this."""
    with Tunnel({TOKEN_PATH: answer, "/api/oauth/profile": PROFILE,
                 "/api/oauth/claude_cli/roles": ROLES}) as tunnel:
        with running_rig(folder, claude, CLAUDE_CODE_OAUTH_TOKEN=None, **tunnel.env()) as rig:
            yield rig, tunnel


def log_in(rig: Rig, code: str = CODE) -> Reply:
    begun = rig.server.call("POST", "/api/login")
    assert begun.status == 201, begun.text
    address = urlsplit(begun.json()["url"])
    asked = parse_qs(address.query)
    assert (address.scheme, address.netloc) == ("https", "claude.com")
    assert asked["code"] == ["true"] and asked["redirect_uri"][0].endswith("/oauth/code/callback")
    return rig.server.call("POST", "/api/login/code", {"code": f"{code}#{asked['state'][0]}"})


def test_a_login_lands_where_its_owner_has_it_and_is_used_from_then_on(
    claude: Claude, tmp_path: Path
) -> None:
    with logged_out(tmp_path, claude, TOKENS) as (rig, tunnel):
        refused = rig.server.call("POST", CHAT_PATH, question())
        assert refused.json()["error"]["code"] == "upstream_login_required"

        done = log_in(rig)
        assert done.status == 200, done.text
        assert done.json()["account"] == {
            "email": "owner@example.com", "organization": "Example",
            "subscriptionType": "Claude Max"}
        assert f"POST https://platform.claude.com{TOKEN_PATH}" in tunnel.asked

        home = rig.server.home
        kept = json.loads((home / ".claude" / ".credentials.json").read_text())
        assert kept["claudeAiOauth"]["accessToken"] == TOKENS["access_token"]
        account = json.loads((home / ".claude.json").read_text())["oauthAccount"]
        assert account["emailAddress"] == "owner@example.com"

        before = len(tunnel.asked)
        for text in ("Hello.", "What is my e-mail address?"):
            answered = rig.server.call("POST", CHAT_PATH, question(text))
            assert answered.status == 200, answered.text
        own = json.loads((rig.server.ocp_home / "claude" / ".claude.json").read_text())
        assert own["oauthAccount"]["accountUuid"] == ACCOUNT["uuid"]
        assert "emailAddress" not in own["oauthAccount"]
        assert f"GET {PROFILE_URL}" not in tunnel.asked[before:]
        assert all("owner@example.com" not in json.dumps(body) for body in rig.bodies())
        # The server has nothing of the token, nor of the code.
        files = [path for path in rig.server.ocp_home.rglob("*") if path.is_file()]
        texts = rig.server.output + "".join(path.read_text(errors="replace") for path in files)
        assert TOKENS["access_token"] not in texts and CODE not in texts


@pytest.mark.parametrize("expires_at_ms", [4_102_444_800_000, *rest(1_700_000_000_000)])
def test_a_login_that_was_copied_without_its_account_fetches_no_address(
    claude: Claude, tmp_path: Path, expires_at_ms: int
) -> None:
    with logged_out(tmp_path, claude, TOKENS) as (rig, tunnel):
        (rig.server.home / ".claude").mkdir(exist_ok=True)
        login = {"accessToken": "sk-ant-oat01-old", "refreshToken": "sk-ant-ort01-old",
                 "expiresAt": expires_at_ms, "scopes": ["user:inference", "user:profile"]}
        (rig.server.home / ".claude" / ".credentials.json").write_text(
            json.dumps({"claudeAiOauth": login}))
        for text in ("Hello.", "What is my e-mail address?", "And now?"):
            answered = rig.server.call("POST", CHAT_PATH, question(text))
            assert answered.status == 200, answered.text
        assert all("owner@example.com" not in json.dumps(body) for body in rig.bodies())
        # claude fetches the profile when it renews a login, and keeps no address of it.
        is_renewed = f"POST https://platform.claude.com{TOKEN_PATH}" in tunnel.asked
        assert is_renewed or f"GET {PROFILE_URL}" not in tunnel.asked
        own = json.loads((rig.server.ocp_home / "claude" / ".claude.json").read_text())
        assert "emailAddress" not in own["oauthAccount"]


@pytest.mark.exhaustive
def test_a_code_that_the_hosts_refuse_is_not_a_failure_of_the_network(
    claude: Claude, tmp_path: Path
) -> None:
    with logged_out(tmp_path, claude, 400) as (rig, tunnel):
        refused = log_in(rig)
        assert (refused.status, refused.json()["error"]["code"]) == (400, "login_code_refused")
        tunnel.answers[TOKEN_PATH] = 503
        failed = log_in(rig)
        assert (failed.status, failed.json()["error"]["code"]) == (502, "upstream_failed")
        assert rig.server.call("GET", "/api/login").json()["state"] == "failed"
        assert not (rig.server.home / ".claude" / ".credentials.json").exists()


@pytest.mark.exhaustive
def test_a_login_without_a_network_says_so(claude: Claude, tmp_path: Path) -> None:
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:1", "CLAUDE_CODE_OAUTH_TOKEN": None}
    with running_rig(tmp_path, claude, **nowhere) as rig:
        failed = log_in(rig)
        assert (failed.status, failed.json()["error"]["code"]) == (502, "upstream_failed")
        assert "ECONNREFUSED" in failed.json()["error"]["message"]
