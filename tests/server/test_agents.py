"""Tenants at level `agent`: how their claudes are started, and when they are not."""
from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chat import error_of
from http_client import Reply
from keys import MULTI, as_admin, ask_as, new_key
from processes import processes_with
from project import load_script
from rig import environment
from server import Server, running_server
from waiting import eventually

ocp = load_script("ocp_server.py")

Json = Any

KEEPING = {**MULTI, "OCP_PARKED_PROCESSES": "8", "OCP_TENANT_LEVEL": "agent"}
CONVERSATION = [{"role": "user", "content": "hi"},
                {"role": "assistant", "content": "You said: hi"},
                {"role": "user", "content": "and now?"}]


def programs(folder: Path) -> Path:
    """A folder for PATH whose bubblewrap and socat do nothing and succeed."""
    found = folder / "programs"
    found.mkdir(parents=True)
    (found / "sh").symlink_to("/bin/sh")
    (found / "env").symlink_to("/usr/bin/env")
    for name in ("bwrap", "socat"):
        replace(found / name, "exit 0")
    return found


def replace(program: Path, text: str) -> None:
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)


@contextmanager
def serving(folder: Path, version: str = "2.1.332", **env: str) -> Iterator[Server]:
    settings = {"PATH": str(programs(folder)), **KEEPING, **env}
    with running_server(folder / "server", {"version": version}, env=settings) as server:
        yield server


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as server:
        yield server


def tenant(server: Server, name: str = "alice", **profile: Json) -> str:
    """The secret of a new tenant at level `agent`."""
    made = new_key(server, name=name)
    path = f"/api/keys/{name}/tenant"
    reply = as_admin(server, "PUT", path, {"level": "agent", **profile})
    assert reply.status == 201, reply.text
    return str(made["key"])


def change(server: Server, name: str, **profile: Json) -> Reply:
    reply = as_admin(server, "PATCH", f"/api/keys/{name}/tenant", profile)
    assert reply.status == 200, reply.text
    return reply


def set_env(server: Server, name: str, **env: Json) -> None:
    reply = as_admin(server, "PATCH", f"/api/keys/{name}/tenant/env", env)
    assert reply.status == 200, reply.text


def ask(server: Server, key: str, **fields: Json) -> int:
    """The pid of the claude that has answered."""
    reply = ask_as(server, key, **fields)
    assert reply.status == 200, reply.text
    return int(server.queries()[-1]["pid"])


def start_of(server: Server, pid: int) -> dict[str, Json]:
    (found,) = [each for each in server.fake_log("start") if each["pid"] == pid]
    return found


def option(argv: list[str], name: str) -> list[str]:
    """The words behind an option, up to the next one."""
    words = argv[argv.index(name) + 1:]
    ends = [index for index, word in enumerate(words) if word.startswith("--")]
    return words[:ends[0]] if ends else words


def folder_of(server: Server, name: str) -> Path:
    return Path(as_admin(server, "GET", f"/api/keys/{name}/tenant").json()["folder"])


# ---------------------------------------------------------------------------
# The start
# ---------------------------------------------------------------------------

def test_a_confined_claude_gets_the_tenants_tools_folders_and_variables(house: Server) -> None:
    key = tenant(house, tools=["Read", "Bash", "Write"])
    set_env(house, "alice", A_SECRET="value-of-alice")
    folder = folder_of(house, "alice")

    started = start_of(house, ask(house, key))
    argv, env = started["argv"], started["env"]

    assert started["cwd"] == str(folder / "work")
    assert [stat.S_IMODE((folder / name).stat().st_mode) for name in ("work", "skills")] == [
        0o700, 0o700]
    assert option(argv, "--tools") == ["Read,Bash,Write"]
    assert {"Bash", f"Edit(/{folder}/work/**)"} <= set(option(argv, "--allowedTools"))
    assert "--dangerously-skip-permissions" not in argv
    assert option(argv, "--setting-sources") == [""]
    (settings,) = option(argv, "--settings")
    sandbox = json.loads(settings)["sandbox"]
    assert sandbox["enabled"] and sandbox["failIfUnavailable"]
    assert not sandbox["allowUnsandboxedCommands"] and not sandbox["network"]["allowedDomains"]
    files = sandbox["filesystem"]
    assert files["denyRead"] == ["/"] and files["allowWrite"] == [str(folder / "work")]
    allowed = [Path(path) for path in files["allowRead"]]
    assert {folder / "skills", folder / "work"} < set(allowed)
    for path in (house.ocp_home, house.home, Path("/run"), Path("/etc/passwd"), Path("/root")):
        assert not [each for each in allowed if each == path or each in path.parents]
    assert env["A_SECRET"] == "value-of-alice" and "value-of-alice" not in " ".join(argv)
    assert env["CLAUDE_CODE_DISABLE_BACKGROUND_TASKS"] == env["CLAUDE_CODE_RESTRICTED"] == "1"
    assert env["CLAUDE_CODE_DISABLE_ATTACHMENTS"] == "1"
    told = "".join(house.queries()[-1]["system"])
    assert str(folder / "work") in told and str(folder / "skills") in told


def test_a_process_has_a_temporary_folder_that_ends_with_it(house: Server) -> None:
    key = tenant(house)
    paths = [Path(start_of(house, ask(house, key))["env"]["TMPDIR"]) for _ in range(2)]
    assert len(set(paths)) == 2
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o700, 0o700]
    (paths[0] / "link").symlink_to(house.home)

    change(house, "alice", tools=["Read"])

    eventually(lambda: not any(path.exists() for path in paths))
    assert house.home.exists()


def test_temporary_folders_that_a_killed_server_left_are_removed_at_the_next_start(
        tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        left = Path(start_of(server, ask(server, tenant(server)))["env"]["TMPDIR"])
        (left / "link").symlink_to(server.home)
        (left / "closed").mkdir(0)
        server.kill()
    assert eventually(lambda: not processes_with(server.place.folder))
    assert left.is_dir()
    prefix = left.name.rpartition("-")[0]
    with foreign_folders(prefix, tmp_path) as foreign, used_folder(prefix) as used, \
            running_server(tmp_path / "server", env=KEEPING):
        assert not left.exists()
        assert [path for path in [*foreign, used] if not path.exists()] == []
        assert (tmp_path / "server" / "home").is_dir()


@contextmanager
def foreign_folders(prefix: str, target: Path) -> Iterator[list[Path]]:
    """What is not the server's beside its temporary folders: a link, a file, and a folder of a
    server with another state folder."""
    link, file, other = (Path(f"/tmp/{name}-{os.getpid()}") for name in (
        f"{prefix}-link", f"{prefix}-file", "ocp-0badbeef-other"))
    link.symlink_to(target)
    file.touch()
    other.mkdir(0o700)
    try:
        yield [link, file, other]
    finally:
        link.unlink()
        file.unlink()
        other.rmdir()


@contextmanager
def used_folder(prefix: str) -> Iterator[Path]:
    """A temporary folder of the server that a process still uses."""
    path = Path(f"/tmp/{prefix}-used-{os.getpid()}")
    path.mkdir(0o700)
    env = {**os.environ, "TMPDIR": str(path)}
    try:
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, env=env):
            yield path
    finally:
        path.rmdir()


def test_a_private_path_below_the_systems_is_hidden_by_name() -> None:
    agent = ocp.Agent("/usr/local/ocp/tenants/alice", ("Bash",), True)
    settings = ocp.sandbox_settings(agent, ["/usr/local/ocp", "/home/olga"])
    files = settings["sandbox"]["filesystem"]
    # Others are not told to the model.
    assert files["denyRead"] == ["/", "/usr/local/ocp"]


def test_without_the_sandbox_all_tools_are_allowed_whole(tmp_path: Path) -> None:
    # An older claude, and no bubblewrap.
    with serving(tmp_path, "2.1.197", PATH="/usr/bin:/bin") as server:
        key = tenant(server, tools=["Bash", "WebFetch"], sandbox=False)
        started = start_of(server, ask(server, key))
        argv, env = started["argv"], started["env"]
        assert "--settings" not in argv and option(argv, "--tools") == ["Bash,WebFetch"]
        assert {"Bash", "WebFetch"} <= set(option(argv, "--allowedTools"))
        assert started["cwd"] == str(folder_of(server, "alice") / "work")
        assert env["CLAUDE_CODE_RESTRICTED"] == ""

        proxy = as_admin(server, "GET", "/status").json()["proxy"]
        assert proxy["unconfinedTenants"] == ["alice"]


# ---------------------------------------------------------------------------
# Whom a process serves
# ---------------------------------------------------------------------------

def test_processes_of_an_agent_serve_no_other_and_none_of_before_a_change(house: Server) -> None:
    keys = {name: tenant(house, name) for name in ("alice", "bob")}
    set_env(house, "alice", A_SECRET="before")
    first = ask(house, keys["alice"], messages=CONVERSATION[:1])
    assert ask(house, keys["alice"], messages=CONVERSATION) == first
    assert ask(house, keys["bob"], messages=CONVERSATION) != first

    set_env(house, "alice", A_SECRET="after")
    after = ask(house, keys["alice"], messages=CONVERSATION)
    assert after != first and environment(after)["A_SECRET"] == "after"
    # What knows the old value is ended.
    eventually(lambda: first not in house.children())


def test_the_spares_of_agents_are_their_own(tmp_path: Path) -> None:
    with serving(tmp_path, OCP_WARM_PROCESSES="1", OCP_PARKED_PROCESSES="0") as server:
        keys = {name: tenant(server, name) for name in ("alice", "bob")}
        ask(server, keys["alice"])
        eventually(lambda: [each for each in server.fake_log("start")
                            if each["cwd"] == str(folder_of(server, "alice") / "work")][1:])

        used = {name: start_of(server, ask(server, key))["cwd"] for name, key in keys.items()}

        assert used == {name: str(folder_of(server, name) / "work") for name in keys}
        # None was primed, which would have shown its tools.
        assert server.log_entries("spare_not_primed") == []


def test_a_higher_level_than_the_servers_starts_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, OCP_TENANT_LEVEL="tools") as server:
        argv = start_of(server, ask(server, tenant(server)))["argv"]
        assert option(argv, "--tools") == [""] and "--settings" not in argv


def test_answers_of_an_agent_do_not_come_from_the_cache(tmp_path: Path) -> None:
    with serving(tmp_path, CLAUDE_CACHE_TTL="60000") as server:
        key = tenant(server)
        ask(server, key)
        ask(server, key)
        assert len(server.queries()) == 2


# ---------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------

def refusal(server: Server, key: str) -> str:
    reply = ask_as(server, key)
    assert reply.status == 503 and reply.headers["x-should-retry"] == "false", reply.text
    error = error_of(reply)
    assert error["code"] == "sandbox_unavailable"
    return str(error["message"])


def test_where_it_cannot_be_confined_no_claude_is_started(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        key = tenant(server, tools=["Read", "WebFetch"])
        bubblewrap, socat = (tmp_path / "programs" / name for name in ("bwrap", "socat"))
        bubblewrap.unlink()
        socat.unlink()

        assert "claude cannot confine the tool WebFetch" in refusal(server, key)
        change(server, "alice", tools=["Read"])
        assert "apt-get install bubblewrap socat" in refusal(server, key)
        replace(bubblewrap, "echo 'no namespaces for you' >&2; exit 1")
        assert refusal(server, key).startswith("socat was not found.")
        replace(socat, "exit 0")
        assert "no namespaces for you" in refusal(server, key)

        assert not [each for each in server.fake_log("start") if "stream-json" in each["argv"]]
        assert not (folder_of(server, "alice") / "work").exists()
        # Others are answered, and so is this one as soon as it can be confined.
        assert ask_as(server, new_key(server)["key"]).status == 200
        replace(bubblewrap, "exit 0")
        ask(server, key)


def test_an_older_claude_or_a_login_that_commands_could_read_is_refused(tmp_path: Path) -> None:
    path = {"PATH": str(programs(tmp_path)), "HOME": str(tmp_path)}
    config = ocp.load_config({
        "CLAUDE_AUTH_MODE": "multi", "OCP_TENANT_LEVEL": "agent",
        "OCP_PASS_ENV": "ANTHROPIC_API_KEY"})
    alice = ocp.Tenant("alice", {**ocp.TENANT_PROFILE, "level": "agent"}, {"PS4": "x", "A": "b"})

    class Found(NamedTuple):
        version: tuple[int, ...]

        def last_result(self) -> tuple[Any, None]:
            return self, None

    def obstacle(login: Any, version: tuple[int, ...], **env: str) -> str:
        agents = ocp.Agents(str(tmp_path), {**path, **env}, Found(version), lambda: ())
        return str(agents.obstacle(alice, login, config))

    # A variable that was stored before it was blocked.
    agents = ocp.Agents(str(tmp_path), path, Found((9,)), lambda: ())
    assert agents.of(alice, config).env == (("A", "b"),)
    newest, own = ocp.CONFINES_SINCE, ocp.Login("token-of-alice")
    assert obstacle(ocp.SERVER_LOGIN, newest) == ""
    assert "claude update" in obstacle(ocp.SERVER_LOGIN, (2, 1, 331))
    assert "ANTHROPIC_API_KEY" in obstacle(ocp.SERVER_LOGIN, newest, ANTHROPIC_API_KEY="x")
    assert obstacle(own, newest, ANTHROPIC_API_KEY="x") == ""


def test_a_link_in_place_of_the_working_folder_is_not_followed(house: Server) -> None:
    key = tenant(house)
    (folder_of(house, "alice") / "work").symlink_to(house.home)
    assert ask_as(house, key).status == 503
    assert house.queries() == []


def test_variables_that_reach_programs_outside_of_the_sandbox_are_refused(house: Server) -> None:
    tenant(house)
    for name in ("RIPGREP_CONFIG_PATH", "PS4", "SHELLOPTS", "PROMPT_COMMAND", "GCONV_PATH",
                 "BASH_FUNC_x", "TMP", "SOCAT_DEFAULT_LISTEN_IP"):
        reply = as_admin(house, "PATCH", "/api/keys/alice/tenant/env", {name: "x"})
        assert reply.status == 400 and error_of(reply)["param"] == name
