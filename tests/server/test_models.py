"""Which models there are: what claude says of them, the operator's names, and efforts."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chat import NO_IDLE, ask, error_of
from dialects import DIALECTS, Dialect, dialect_name
from keys import MULTI, as_admin, ask_as, new_key
from project import REPO, load_script
from server import Server, running_server

ocp = load_script("ocp_server.py")

Json = Any

LEVELS = ["low", "medium", "high", "xhigh", "max"]


def offer(value: str, model_id: str, **fields: Json) -> Json:
    """A row of what claude lists."""
    return {"value": value, "resolvedModel": model_id, "displayName": value.title(),
            "supportedEffortLevels": LEVELS, **fields}


def model_asked(server: Server) -> str:
    return str(server.queries()[-1]["model"])


def effort_asked(server: Server) -> Json:
    return server.queries()[-1]["settings"].get("effortLevel")


def listed(server: Server) -> list[str]:
    return [entry["id"] for entry in server.call("GET", "/v1/models").json()["data"]]


# ---------------------------------------------------------------------------
# What claude says
# ---------------------------------------------------------------------------

def test_aliases_and_the_list_follow_what_claude_says(tmp_path: Path) -> None:
    models = [offer("default", "claude-opus-6", supportedEffortLevels=["low", "max"]),
              offer("sonnet", "claude-sonnet-5"),
              offer("opus", "claude-opus-6", supportedEffortLevels=["low", "max"])]
    with running_server(tmp_path, {"turns": [], "models": models}, env=NO_IDLE) as server:
        before = listed(server)
        ask(server, model="sonnet")
        first = model_asked(server)

        second = ask(server, model="sonnet")

        assert (first, model_asked(server)) == ("claude-sonnet-5-5", "claude-sonnet-5")
        assert second.json()["model"] == "claude-sonnet-5"
        found = listed(server)
        assert found[0] == "claude-opus-6" and "claude-sonnet-5-5" in found
        assert {name for name in before if "fable" in name or "haiku" in name} & set(found) == set()
        entry = server.call("GET", "/v1/models/best").json()
        assert (entry["id"], entry["display_name"]) == ("claude-opus-6", "Claude Opus 6")
        assert (entry["efforts"], entry["aliases"]) == (["low", "max"], ["opus", "best", "default"])
        is_default = server.call("GET", "/v1/models/sonnet").json()["default"]
        assert (entry["default"], is_default) == (False, True)
        rows = server.call("GET", "/api/usage?all=true").json()["byModel"]
        assert {row["model"] for row in rows} == {"claude-sonnet-5-5", "claude-sonnet-5"}


def test_an_old_claude_gets_its_own_newest_models(tmp_path: Path) -> None:
    scenario = {"turns": [], "version": "2.1.197"}
    with running_server(tmp_path, scenario, env=NO_IDLE) as server:
        found = listed(server)
        assert "claude-sonnet-5" in found and "claude-fable-5" in found
        assert not [name for name in found if name.endswith("-5-5") or name == "claude-opus-5"]

        for alias, model_id in (("opus", "claude-opus-4-8"), ("sonnet", "claude-sonnet-5"),
                                ("haiku", "claude-haiku-4-5-20251001")):
            reply = ask(server, model=alias)

            assert reply.json()["model"] == model_id == model_asked(server)


@pytest.mark.parametrize("dialect", DIALECTS, ids=dialect_name)
def test_a_model_that_needs_a_newer_claude_says_which_one(
    tmp_path: Path, dialect: Dialect
) -> None:
    scenario = {"turns": [], "version": "2.1.250"}
    with running_server(tmp_path, scenario, env=NO_IDLE) as server:
        reply = server.call("POST", dialect.path, dialect.body("hi", model="claude-opus-5.5"))

        assert reply.status == 404 and reply.headers["x-should-retry"] == "false"
        message = reply.json()["error"]["message"]
        assert "2.1.280" in message and "2.1.250" in message and "claude update" in message
        assert server.queries() == []
        looked_up = server.call("GET", "/v1/models/claude-opus-5-5")
        assert error_of(looked_up)["code"] == "model_needs_newer_claude"


def test_a_key_for_an_alias_may_use_what_it_stands_for_later(tmp_path: Path) -> None:
    scenario = {"turns": [], "models": [offer("haiku", "claude-haiku-6")]}
    with running_server(tmp_path, scenario, env=MULTI) as server:
        key = new_key(server, models=["haiku", "claude-opus-4.7"])

        assert key["models"] == ["haiku", "claude-opus-4-7"]
        assert ask_as(server, key["key"], model="haiku").status == 200
        reply = ask_as(server, key["key"], model="haiku")

        assert (reply.status, reply.json()["model"]) == (200, "claude-haiku-6")
        assert ask_as(server, key["key"], model="claude-haiku-5-5").status == 403


# ---------------------------------------------------------------------------
# The operator's names
# ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with names of the operator's and an effort."""
    env = {**MULTI, "OCP_MODEL_ALIASES": "gpt-4o=sonnet,fast=haiku:low",
           "OCP_DEFAULT_MODEL": "gpt-4o", "OCP_DEFAULT_EFFORT": "high"}
    with running_server(tmp_path_factory.mktemp("names"), env=env) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    shared_server.write_scenario([])
    yield shared_server
    as_admin(shared_server, "PATCH", "/settings", {"modelAliases": None, "defaultEffort": None})


@pytest.fixture(scope="module")
def key(shared_server: Server) -> str:
    return str(new_key(shared_server)["key"])


@pytest.mark.parametrize("name", ["gpt-4o", "openai/GPT-4o", None])
def test_a_name_of_the_operator_s_is_answered_by_its_model(
    server: Server, key: str, name: str | None
) -> None:
    reply = ask_as(server, key, model=name)

    assert reply.json()["model"] == "claude-sonnet-5-5" == model_asked(server)


def test_names_of_the_operator_s_change_while_the_server_runs(server: Server, key: str) -> None:
    changed = as_admin(server, "PATCH", "/settings", {"modelAliases": "gpt-5=opus, gpt-4o=haiku"})
    replies = {name: ask_as(server, key, model=name) for name in ("gpt-5", "gpt-4o", "fast")}

    assert changed.status == 200
    assert {name: reply.status for name, reply in replies.items()} == {
        "gpt-5": 200, "gpt-4o": 200, "fast": 404}
    assert replies["gpt-4o"].json()["model"] == "claude-haiku-5-5"
    listed = as_admin(server, "GET", "/v1/models").json()["data"]
    assert listed[0]["aliases"] == ["opus", "best", "gpt-5"]


@pytest.mark.parametrize("aliases", ["gpt-5=gpt-4", "gpt-5", "a=b=c", 7])
def test_a_name_of_no_model_is_refused_and_changes_nothing(
    server: Server, key: str, aliases: Json
) -> None:
    reply = as_admin(server, "PATCH", "/settings", {"modelAliases": aliases})

    assert reply.status == 400 and "modelAliases" in reply.text
    assert ask_as(server, key, model="gpt-4o").status == 200


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"OCP_MODEL_ALIASES": "fast=gpt-4"}, "OCP_MODEL_ALIASES: There is no model 'gpt-4'"),
     ({"OCP_DEFAULT_MODEL": "fast"}, "OCP_DEFAULT_MODEL: There is no model 'fast'")],
    ids=["alias", "default"],
)
def test_a_name_of_no_model_stops_the_start(settings: dict[str, str], told: str) -> None:
    with pytest.raises(ocp.ConfigError, match=told):
        ocp._models_of(ocp.load_config(settings), str(REPO))


# ---------------------------------------------------------------------------
# Efforts
# ---------------------------------------------------------------------------

def test_the_effort_is_the_request_s_then_the_name_s_then_the_key_s_then_the_server_s(
    server: Server, key: str
) -> None:
    limited = new_key(server, name="deep", effort="max")["key"]
    seen = []
    for secret, fields in (
        (limited, {"model": "sonnet:low", "reasoning_effort": "medium"}),
        (limited, {"model": "sonnet:low"}), (limited, {"model": "fast"}), (limited, {}), (key, {}),
        (key, {"model": "claude-haiku-4-5"}),
    ):
        assert ask_as(server, secret, **fields).status == 200
        seen.append(effort_asked(server))
    as_admin(server, "PATCH", "/settings", {"defaultEffort": ""})
    ask_as(server, key)
    seen.append(effort_asked(server))

    assert seen == ["medium", "low", "low", "max", "high", None, None]


def test_the_effort_of_a_key_is_changed_and_taken_away(server: Server) -> None:
    made = new_key(server, name="changing")
    path = f"/api/keys/{made['id']}"

    for effort, told in (("low", "low"), (" MAX", "max"), (None, None)):
        reply = as_admin(server, "PATCH", path, {"effort": effort})

        assert (reply.status, reply.json()["effort"]) == (200, told)
        assert as_admin(server, "GET", path).json()["effort"] == told
    refused = as_admin(server, "PATCH", path, {"effort": "utmost"})
    assert error_of(refused)["param"] == "effort"
