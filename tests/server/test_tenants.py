"""Tenants: keys that an instance such as OpenClaw uses, with a prompt, variables and a login."""
from __future__ import annotations

import json
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from chat import CHAT_PATH, error_of, question
from depth import by_depth
from http_client import Reply
from keys import MULTI, as_admin, ask_as, bearer, new_key
from project import load_script
from rig import environment
from server import Server, running, running_server, waiting
from waiting import eventually, in_parallel

ocp = load_script("ocp_server.py")

Json = Any

KEEPING = {**MULTI, "OCP_PARKED_PROCESSES": "8"}
CANARY = "canary-value-of-a-tenant"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Server]:
    with running_server(tmp_path, env=KEEPING) as server:
        yield server


def put(server: Server, key: Json, **profile: Json) -> Reply:
    return as_admin(server, "PUT", f"/api/keys/{key}/tenant", profile)


def tenant(server: Server, name: str, **profile: Json) -> dict[str, Json]:
    """A new key that is a tenant's, its secret under "key"."""
    made = new_key(server, name=name, maxConcurrent=1)
    reply = put(server, name, **profile)
    assert reply.status == 201, reply.text
    return made


def shown(server: Server, name: str) -> dict[str, Json]:
    reply = as_admin(server, "GET", f"/api/keys/{name}/tenant")
    assert reply.status == 200, reply.text
    return dict(reply.json())


def set_env(server: Server, name: str, **env: Json) -> Reply:
    return as_admin(server, "PATCH", f"/api/keys/{name}/tenant/env", env)


def prompt_of(server: Server, number: int = -1) -> str:
    """The system prompt of a question that was asked."""
    return "".join(server.queries()[number]["system"])


# ---------------------------------------------------------------------------
# The row beside a key
# ---------------------------------------------------------------------------

def test_a_key_becomes_a_tenants_once(house: Server) -> None:
    new_key(house, name="alice", maxConcurrent=1)

    first = put(house, "alice", prompt="Be Alice's.", instance={"container": "alice-1"})
    again = put(house, "alice", prompt="Be Alice's.", instance={"container": "alice-1"})

    assert [(r.status, r.json()["changed"]) for r in (first, again)] == [(201, True), (200, False)]
    found = shown(house, "alice")
    folder = Path(found["folder"])
    assert {name: found[name] for name in found if name not in ("keyId", "folder")} == {
        **ocp.TENANT_PROFILE, "name": "alice", "levelInForce": "api", "prompt": "Be Alice's.",
        "obstacle": None,
        "instance": {"container": "alice-1"}, "env": [], "login": None,
        "skills": {"enabled": True, "count": 0, "skipped": 0}, "maxConcurrent": 1,
        "running": 0, "waiting": 0, "parked": 0, "spares": 0, "lastUsed": None}
    assert folder == house.ocp_home / "tenants" / "alice"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert as_admin(house, "GET", "/api/tenants").json()["tenants"] == [found]


def test_a_key_without_a_tenant_has_none(house: Server) -> None:
    new_key(house, name="plain")

    for method, more in (("GET", ""), ("PATCH", ""), ("PATCH", "/env"), ("PUT", "/login"),
                         ("DELETE", "/login")):
        body = None if method in ("GET", "DELETE") else {}
        reply = as_admin(house, method, f"/api/keys/plain/tenant{more}", body)
        assert (reply.status, error_of(reply)["code"]) == (404, "not_found")
    assert as_admin(house, "DELETE", "/api/keys/plain/tenant").json()["removed"] is False
    assert as_admin(house, "GET", "/api/tenants").json() == {"tenants": []}


def test_fields_of_a_profile_are_changed_one_by_one_and_null_is_the_default(house: Server) -> None:
    tenant(house, "alice", prompt="One.", instance={"stateDir": "/x"})

    for changes, wanted in (({"prompt": "Two."}, ("Two.", {"stateDir": "/x"}, True)),
                            ({"prompt": "Two."}, ("Two.", {"stateDir": "/x"}, False)),
                            ({"prompt": None}, ("", {"stateDir": "/x"}, True)),
                            ({"instance": None, "level": "api"}, ("", None, True))):
        found = as_admin(house, "PATCH", "/api/keys/alice/tenant", changes).json()
        assert (found["prompt"], found["instance"], found["changed"]) == wanted


def test_every_field_of_a_profile_is_kept_and_null_is_its_default(house: Server) -> None:
    state = house.ocp_home.parent / "state"
    state.mkdir()
    profile = {
        "level": "agent", "prompt": "One.", "clientTools": "drop", "skills": False,
        "relay": {"stateDir": str(state)}, "commands": "act", "tools": ["Read", "WebFetch"],
        "sandbox": False, "text": "final", "instance": {"a": 1},
    }
    assert profile.keys() == ocp.TENANT_PROFILE.keys()
    tenant(house, "alice", **profile)

    def told(found: dict[str, Json]) -> dict[str, Json]:
        found["skills"] = found["skills"]["enabled"]
        return {name: found[name] for name in profile}

    assert told(shown(house, "alice")) == profile
    other = as_admin(house, "PATCH", "/api/keys/alice/tenant", {"relay": {"container": "a_1.b"}})
    assert other.json()["relay"] == {"container": "a_1.b"}
    reset = as_admin(house, "PATCH", "/api/keys/alice/tenant", dict.fromkeys(profile)).json()
    assert told(reset) == dict(ocp.TENANT_PROFILE)


@pytest.mark.parametrize("bound", ocp.TENANT_LEVELS)
def test_a_level_above_that_of_the_server_is_kept_and_works_as_the_servers(
    tmp_path: Path, bound: str
) -> None:
    with running_server(tmp_path, env={**MULTI, "OCP_TENANT_LEVEL": bound}) as server:
        for level in ocp.TENANT_LEVELS:
            tenant(server, f"of-{level}", level=level)
            found = shown(server, f"of-{level}")
            in_force = min(level, bound, key=ocp.TENANT_LEVELS.index)
            assert (found["level"], found["levelInForce"]) == (level, in_force)
        told = as_admin(server, "GET", "/health").json()["tenants"]
        assert {(each["level"], each["levelInForce"]) for each in told} == {
            (each, min(each, bound, key=ocp.TENANT_LEVELS.index)) for each in ocp.TENANT_LEVELS}
        status = as_admin(server, "GET", "/status").json()
        assert status["proxy"]["tenantLevel"] == bound
        assert (f"TENANT LEVEL {bound}" in server.output) == (bound != "api")
        # Nobody raises it over the wire.
        settings = as_admin(server, "PATCH", "/settings", {"tenantLevel": "agent"})
        assert settings.status == 400


@pytest.mark.few_cases
@pytest.mark.parametrize(("field", "value"), [
    ("level", "admin"), ("level", 1),
    ("prompt", 5), ("prompt", "x" * 32_001), ("instance", "x"), ("instance", {"a": "x" * 16_384}),
    ("clientTools", "some"), ("skills", "yes"), ("commands", "all"), ("sandbox", 0),
    ("text", "last"), ("tools", "Read"), ("tools", ["Bash(docker:*)"]), ("tools", [True]),
    ("tools", ["Read,Bash"]), ("tools", ["T"] * 41), ("relay", {}), ("relay", "a-1"),
    ("relay", {"container": "a", "stateDir": "/tmp"}), ("relay", {"command": ["sh"]}),
    ("relay", {"container": "a", "more": 1}),
    *(("relay.container", name) for name in (
        "--help", "$(touch x)", "a;b", "../../x", "x" * 129, "a\nb", "\U0001f600", "", "-a")),
    *(("relay.stateDir", path) for path in (
        "state", "~/state", "/nowhere/at/all", "/etc/passwd", "a\0b", "")),
    ("command", ["sh"]), ("env", {"A": "b"}),
])
def test_what_no_profile_has_is_refused_by_its_name(
    house: Server, field: str, value: Json
) -> None:
    new_key(house, name="plain")
    tenant(house, "alice", prompt="One.")
    name, _, inner = field.partition(".")
    body = {name: {inner: value} if inner else value}

    for reply in (put(house, "plain", **body),
                  as_admin(house, "PATCH", "/api/keys/alice/tenant", body)):
        assert (reply.status, error_of(reply)["param"]) == (400, field)
    assert shown(house, "alice")["prompt"] == "One."
    assert not (house.ocp_home / "tenants" / "plain").exists()


def test_the_folder_of_another_tenant_is_taken_over_only_when_asked(house: Server) -> None:
    tenant(house, "alice")
    skill = house.ocp_home / "tenants" / "alice" / "skills" / "notes"
    skill.mkdir(parents=True)
    (skill / "SKILL.md").write_text("---\nname: notes\n---\n")
    (skill.parent / "linked").symlink_to(skill)
    assert shown(house, "alice")["skills"] == {"enabled": True, "count": 1, "skipped": 1}
    as_admin(house, "DELETE", "/api/keys/alice/tenant")

    refused = put(house, "alice")
    adopted = put(house, "alice", adopt=True)

    assert (refused.status, error_of(refused)["code"]) == (409, "folder_exists")
    assert (adopted.status, adopted.json()["skills"]["count"]) == (201, 1)


@pytest.mark.parametrize(("name", "folder"), [
    ("alice", "alice"), ("Alice B", "Alice-B"), ("\u00e9va", "eva"), ("..x", "x"),
    ("--help", "help"), ("$(touch x)", "touch-x"), ("\u65e5\u672c", "tenant-1"),
])
def test_the_folder_of_a_tenant_has_the_name_of_its_key_made_to_fit(
    house: Server, name: str, folder: str
) -> None:
    made = new_key(house, name=name)

    found = put(house, made["id"]).json()

    assert found["folder"] == str(house.ocp_home / "tenants" / folder)


def test_two_tenants_never_share_a_folder(house: Server) -> None:
    made = [new_key(house, name=name) for name in ("a b", "A-B")]

    folders = {put(house, each["id"]).json()["folder"] for each in made}

    assert len(folders) == 2


def test_a_tenant_survives_a_restart_and_goes_with_its_key(tmp_path: Path) -> None:
    with running_server(tmp_path, env=KEEPING) as server:
        tenant(server, "alice", prompt="Be Alice's.")
        set_env(server, "alice", TOKEN_OF_IT=CANARY)
    with running_server(tmp_path, env=KEEPING) as server:
        found = shown(server, "alice")
        assert (found["prompt"], found["env"]) == ("Be Alice's.", ["TOKEN_OF_IT"])
        as_admin(server, "DELETE", "/api/keys/alice")
        assert as_admin(server, "GET", "/api/tenants").json() == {"tenants": []}
        assert put(server, found["keyId"]).status == 400
    with closing(sqlite3.connect(tmp_path / "ocp" / "ocp.db")) as database:
        assert database.execute("SELECT * FROM tenants").fetchall() == []
    held = [path for path in (tmp_path / "ocp").glob("ocp.db*")
            if CANARY.encode() in path.read_bytes()]
    assert held == []


def test_a_database_from_before_tenants_is_taken_over(tmp_path: Path) -> None:
    before = next(
        number for number, each in enumerate(ocp.MIGRATIONS) if "ADD COLUMN login" in each)
    path = tmp_path / "ocp.db"
    with closing(sqlite3.connect(path)) as database:
        for statement in ocp.MIGRATIONS[:before]:
            database.execute(statement)
        database.execute(f"PRAGMA user_version={before}")
        database.execute(
            "INSERT INTO keys (name, hash, preview, created_s, models, max_concurrent, note, quota)"
            " VALUES ('laptop', 'h', 'p', 1, '[]', 0, '', '{}')")
        database.commit()

    with closing(ocp.Store(str(path))) as store:
        keys = ocp.Keys(store, time.time)
        (key,) = keys.all()

    assert keys.problems == []
    assert (key.login, key.tenant) == (ocp.SERVER_LOGIN, ocp.NO_TENANT)


# ---------------------------------------------------------------------------
# The prompt
# ---------------------------------------------------------------------------

def test_the_prompt_follows_those_of_client_and_operator(tmp_path: Path) -> None:
    env = {**KEEPING, "CLAUDE_SYSTEM_PROMPT": "The operator's."}
    with running_server(tmp_path, env=env) as server:
        made = tenant(server, "alice", prompt="The tenant's.")
        plain = new_key(server)
        messages = [{"role": "system", "content": "The client's."},
                    {"role": "user", "content": "hi"}]
        for key in (made, plain):
            assert ask_as(server, key["key"], messages=messages).status == 200

        assert prompt_of(server, 0).endswith("The client's.\n\nThe operator's.\n\nThe tenant's.")
        assert prompt_of(server, 1).endswith("The client's.\n\nThe operator's.")


@pytest.mark.parametrize("change", ["prompt", "env", "login", "commands"])
def test_a_change_holds_for_the_next_request_and_no_process_of_before_serves_it(
    house: Server, change: str
) -> None:
    made = tenant(house, "alice", prompt="One.")
    assert ask_as(house, made["key"]).status == 200
    conversation = [{"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "You said: hi"},
                    {"role": "user", "content": "and now?"}]
    assert ask_as(house, made["key"], messages=conversation).status == 200
    assert len({query["pid"] for query in house.queries()}) == 1

    if change == "prompt":
        as_admin(house, "PATCH", "/api/keys/alice/tenant", {"prompt": "Two."})
    elif change == "commands":
        as_admin(house, "PATCH", "/api/keys/alice/tenant", {"commands": "act"})
    elif change == "env":
        set_env(house, "alice", A="b")
    else:
        token = {"token": "sk-ant-oat01-of-somebody-else"}
        assert as_admin(house, "PUT", "/api/keys/alice/tenant/login", token).status == 200
    assert ask_as(house, made["key"], messages=conversation).status == 200

    assert len({query["pid"] for query in house.queries()}) == 2
    assert prompt_of(house).endswith("Two." if change == "prompt" else "One.")


def test_a_cached_answer_is_not_one_of_another_prompt(tmp_path: Path) -> None:
    with running_server(tmp_path, env={**MULTI, "CLAUDE_CACHE_TTL": "600000"}) as server:
        made = tenant(server, "alice", prompt="One.")
        assert ask_as(server, made["key"]).status == 200
        as_admin(server, "PATCH", "/api/keys/alice/tenant", {"prompt": "Two."})
        assert ask_as(server, made["key"]).status == 200
        assert ask_as(server, made["key"]).status == 200

        assert len(server.queries()) == 2


# ---------------------------------------------------------------------------
# Variables
# ---------------------------------------------------------------------------

def test_variables_are_set_and_removed_and_only_their_names_come_back(house: Server) -> None:
    tenant(house, "alice")

    first = set_env(house, "alice", A=CANARY, B="two", C="")
    second = set_env(house, "alice", A=CANARY, B=None, NEVER=None, D="x")

    assert first.json() == {"changed": ["A", "B", "C"], "removed": [], "names": ["A", "B", "C"]}
    assert second.json() == {"changed": ["D"], "removed": ["B"], "names": ["A", "C", "D"]}
    paths = ("/api/tenants", "/api/keys", "/api/keys/alice/tenant", "/logs?n=1000", "/health",
             "/metrics", "/status", "/api/errors", "/logs?level=audit")
    replies = [first, second, *(as_admin(house, "GET", path) for path in paths)]
    assert not [reply for reply in replies if CANARY in reply.text]
    assert CANARY not in house.output
    audit = house.log_entries("tenant_env_changed")
    assert (audit[-1]["changed"], audit[-1]["removed"]) == (["D"], ["B"])


BLOCKED = [
    "PATH", "HOME", "SHELL", "USER", "LOGNAME", "TMPDIR", "IFS", "ENV", "BASH_ENV",
    "LD_PRELOAD", "DYLD_X", "NODE_OPTIONS", "BUN_X", "PYTHONPATH", "PERL5LIB", "RUBYOPT",
    "GIT_DIR", "SSH_AUTH_SOCK", "CLAUDE_CONFIG_DIR", "CLAUDECODE", "ANTHROPIC_API_KEY",
    "OPENAI_API_KEY", "OPENCLAW_STATE_DIR", "OCP_HOME", "PROXY_API_KEY", "DOCKER_HOST",
    "DISABLE_TELEMETRY", "ENABLE_X", "MAX_THINKING_TOKENS", "MCP_TIMEOUT", "XDG_RUNTIME_DIR",
    "DBUS_SESSION", "SSL_CERT_FILE", "HTTPS_PROXY", "all_proxy", "path", "Node_Options",
]


@pytest.mark.few_cases
@pytest.mark.parametrize("name", [*BLOCKED, "1A", "A-B", "A B", "", "A\nB", "\u00e9", "A" * 129])
def test_a_variable_that_a_tenant_may_not_set_is_named(house: Server, name: str) -> None:
    tenant(house, "alice")

    reply = set_env(house, "alice", OTHER="x", **{name: CANARY})

    assert (reply.status, CANARY in reply.text) == (400, False)
    assert error_of(reply)["param"] == " ".join(name.split())[:77] + "..." * (len(name) > 80)
    assert shown(house, "alice")["env"] == []


@pytest.mark.parametrize("value", [5, True, ["x"], "a\0b", "x" * 32_769, "\u00e9" * 16_385])
def test_a_value_that_is_none_is_refused_and_not_shown(house: Server, value: Json) -> None:
    tenant(house, "alice")

    reply = set_env(house, "alice", A=value)

    assert (reply.status, error_of(reply)["param"]) == (400, "A")
    assert len(reply.text) < 1000


def test_a_tenant_has_200_variables_at_most(house: Server) -> None:
    tenant(house, "alice")
    assert set_env(house, "alice", **{f"A{number}": "x" for number in range(200)}).status == 200

    assert set_env(house, "alice", B="x").status == 400
    assert set_env(house, "alice", A0=None, B="x").status == 200


def test_variables_do_not_reach_claude_at_level_api(house: Server) -> None:
    made = tenant(house, "alice")
    set_env(house, "alice", A_SECRET=CANARY)

    assert ask_as(house, made["key"]).status == 200

    assert CANARY not in json.dumps(environment(house.queries()[-1]["pid"]))
    sent = "".join(json.dumps(line) for line in house.lines())
    assert CANARY not in sent


# ---------------------------------------------------------------------------
# The login, health, fairness
# ---------------------------------------------------------------------------

def test_a_tenant_can_have_a_login_in_its_own_folder(house: Server) -> None:
    made = tenant(house, "alice")

    reply = as_admin(house, "PUT", "/api/keys/alice/tenant/login", {"folder": True})

    folder = house.ocp_home / "tenants" / "alice" / "claude"
    assert (reply.status, reply.json()["login"]["folder"]) == (200, str(folder))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert shown(house, "alice")["login"]["state"] == "not logged in"
    (folder / ".credentials.json").write_text("{}")
    assert ask_as(house, made["key"]).status == 200
    own = environment(house.queries()[-1]["pid"])
    assert own["CLAUDE_SECURESTORAGE_CONFIG_DIR"] == str(folder)
    assert as_admin(house, "DELETE", "/api/keys/alice/tenant/login").status == 200
    assert shown(house, "alice")["login"] is None
    plain = new_key(house)
    refused = as_admin(house, "PUT", f"/api/keys/{plain['id']}/login", {"folder": True})
    assert (refused.status, error_of(refused)["param"]) == (400, "folder")


def test_health_names_tenants_to_the_operator_only(house: Server) -> None:
    made = tenant(house, "alice-of-the-house")
    tenant(house, "bob-of-the-house")
    assert ask_as(house, made["key"]).status == 200

    told = as_admin(house, "GET", "/health").json()
    strangers = [house.call("GET", "/health"), house.call("GET", "/health", None, bearer("wrong")),
                 house.call("GET", "/health", None, bearer(made["key"]))]

    assert told["tenantCount"] == 2
    assert sorted(told["tenants"], key=lambda each: str(each["name"])) == [
        {"name": f"{name}-of-the-house", "level": "api", "levelInForce": "api", "running": 0,
         "waiting": 0, "parked": parked} for name, parked in (("alice", 1), ("bob", 0))]
    for reply in strangers:
        assert (reply.status, reply.json()["tenantCount"]) == (200, 2)
        assert "of-the-house" not in reply.text


def test_admin_keys_cannot_be_tried_on_health_faster_than_elsewhere(tmp_path: Path) -> None:
    env = {**MULTI, "OCP_WRONG_KEY_DELAY": "300"}
    with running_server(tmp_path, env=env) as server:
        for number in range(8):
            assert server.call("GET", "/health", None, bearer(f"wrong-{number}")).status == 200
        began_s = time.monotonic()
        server.call("GET", "/health", None, bearer("wrong again"))
        assert time.monotonic() - began_s >= 0.3


def test_a_tenant_with_many_requests_delays_another_by_one(tmp_path: Path) -> None:
    many, signal = by_depth(6, 6, 50), tmp_path / "signal"
    env = {**MULTI, "CLAUDE_MAX_CONCURRENT": "1", "CLAUDE_MAX_QUEUE": str(many)}
    turns = {"turns": [[{"wait_for": str(signal)}, {"say": "yes"}]], "shared": True,
             "repeat_last": False}
    with running_server(tmp_path, turns, env=env) as server:
        alice, bob = tenant(server, "alice", prompt="Of alice."), tenant(server, "bob")

        def ask(key: Json) -> Reply:
            return server.call("POST", CHAT_PATH, question(), bearer(key["key"]), timeout_s=600)

        def ask_late() -> Reply:
            eventually(lambda: (running(server), waiting(server)) == (1, many - 1))
            told = as_admin(server, "GET", "/health").json()["tenants"]
            assert {each["name"]: (each["running"], each["waiting"]) for each in told} == {
                "alice": (1, many - 1), "bob": (0, 0)}
            return ask(bob)

        def go_on() -> Reply:
            eventually(lambda: waiting(server) == many)
            signal.touch()
            return server.call("GET", "/ready")

        replies = in_parallel(
            [ask_late, go_on, *[lambda: ask(alice) for _ in range(many)]])

        assert [reply.status for reply in replies] == [200] * (many + 2)
        asked = ["alice" in str(query["system"]) for query in server.queries()]
        # One runs when bob comes, and at most one that waits is admitted before.
        assert asked.index(False) in (1, 2)
        assert len(asked) == many + 1
