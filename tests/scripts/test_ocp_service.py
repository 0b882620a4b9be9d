"""`ocp start`, `stop`, `restart` through fake service managers, and `ocp doctor`."""
from __future__ import annotations

import ast
import dataclasses
import json
import os
import plistlib
import socket
import sqlite3
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clock import SkippingClock
from ocp_command import (
    DEAD_URL,
    HEALTH,
    Programs,
    StubServer,
    ocp,
    ocp_env,
    run_env,
    stub_server,
    write_record,
)
from original_home import OriginalHome
from processes import Ran
from project import REPO, load_script
from server import running_server

Json = Any
VERSION = ocp.version_of(str(REPO / "ocp_server.py"))
NO_UNIT = "exit 3"


class Manager:
    """A home, a stub of the server, and fake programs that start and stop it."""

    def __init__(self, folder: Path, server: StubServer) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        self.server = server
        self.programs = Programs(folder / "bin")
        self.up = folder / "up"
        #: What the server says of its version, and how much older than its start it claims to be.
        self.version, self.older_s = VERSION, 0.0
        #: Who has the server's port, as Linux would tell.
        self.owner: Any = None
        server.answers["GET /health"] = self.health
        up, down = f"touch {self.up}", f"rm -f {self.up}"
        self.programs.add("systemctl", f'case "$*" in *is-enabled*) echo enabled;; '
                                       f'*stop*) {down};; *) {up};; esac')
        self.programs.add("launchctl", f'case "$1" in bootout) {down};; print) ;; *) {up};; esac')
        self.programs.add("lsof", "exit 1")
        self.programs.add("loginctl", "echo Linger=yes")

    def health(self, _: object) -> tuple[int, Json]:
        if not self.up.exists():
            return 0, None
        uptime_ms = (time.time() - self.up.stat().st_mtime + self.older_s) * 1000
        return 200, {**HEALTH, "version": self.version, "uptime": uptime_ms}

    def record(self, **fields: Json) -> None:
        write_record(self.home, self.server.url, **fields)

    def env(self, *words: str, **more: Any) -> Any:
        environ = {"PATH": self.programs.path, **more.pop("environ", {})}
        return ocp_env(self.home, *words, environ=environ, **more)

    def ocp(self, *words: str, **more: Any) -> Ran:
        return run_env(self.env(*words, **more))


#: What finds the owner of a port in /proc.
IN_PROC = ocp._owner_in_proc


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    with stub_server() as server:
        found = Manager(tmp_path, server)
        # The stub listens in the process of the tests.
        monkeypatch.setattr(ocp, "_owner_in_proc", lambda port: found.owner)
        yield found


PLATFORMS = {
    "systemd-user": {
        "start": ["systemctl --user start ocp.service"],
        "stop": ["systemctl --user stop ocp.service"],
        "restart": ["systemctl --user restart ocp.service"]},
    "systemd-system": {
        "start": ["systemctl start ocp.service"], "stop": ["systemctl stop ocp.service"],
        "restart": ["systemctl restart ocp.service"]},
    "launchd": {
        "start": ["launchctl bootstrap gui/0 UNIT", "launchctl kickstart gui/0/ocp.service"],
        "stop": ["launchctl bootout gui/0/ocp.service"],
        "restart": ["launchctl bootout gui/0/ocp.service", "launchctl bootstrap gui/0 UNIT"]},
}


# ---------------------------------------------------------------------------
# With a record
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
def test_an_agent_is_looked_for_where_the_installer_loaded_it(manager: Manager) -> None:
    manager.record(platform="launchd", domain="user/501")
    manager.up.touch()
    assert manager.ocp("restart", user_id=501).code == 0
    assert manager.ocp("doctor", user_id=501).code in (0, 1)
    calls = [call for call in manager.programs.calls() if call.startswith("launchctl")]
    assert calls and not [call for call in calls if " user/501" not in call]


@pytest.mark.parametrize("verb", ["start", "stop", "restart"])
@pytest.mark.parametrize("platform", sorted(PLATFORMS))
def test_the_recorded_service_is_used(manager: Manager, platform: str, verb: str) -> None:
    manager.record(platform=platform)
    manager.up.touch()
    found = manager.ocp(verb, user_id=0)
    assert found.code == 0, found
    unit = str(manager.home / "Library/LaunchAgents/ocp.service.plist")
    calls = [call.replace(unit, "UNIT") for call in manager.programs.calls()]
    assert calls == PLATFORMS[platform][verb]
    assert ("answers at" in found.stdout) is (verb != "stop")


def test_a_service_of_the_system_wants_its_rights(manager: Manager) -> None:
    manager.record(platform="systemd-system")
    found = manager.ocp("restart", user_id=1000)
    assert found.code == ocp.Exit.DENIED
    assert "sudo systemctl restart ocp.service" in found.stderr
    assert manager.programs.calls() == []


def test_a_restart_that_changes_nothing_is_a_failure(manager: Manager) -> None:
    manager.record()
    manager.older_s = 600
    found = manager.ocp("restart")
    assert found.code == 1 and "older server" in found.stderr
    assert manager.ocp("start").code == 0


def test_another_version_than_the_installed_one_is_a_failure(manager: Manager) -> None:
    manager.record()
    manager.version = "0.0.9"
    found = manager.ocp("restart")
    assert found.code == 1 and f"version 0.0.9 is served, not {VERSION}" in found.stderr


def test_a_server_that_does_not_come_up_is_a_failure_with_the_reason(manager: Manager) -> None:
    manager.record()
    manager.programs.add("systemctl", "echo 'Unit ocp.service not found.' >&2; exit 5")
    found = manager.ocp("start")
    assert found.code == 1 and "Unit ocp.service not found" in found.stderr
    assert "Nobody listens on its port" in found.stderr


def test_success_is_measured_and_not_believed(manager: Manager) -> None:
    manager.record()
    manager.programs.add("systemctl", f"touch {manager.up}; echo odd >&2; exit 1")
    found = manager.ocp("restart")
    assert found.code == 0 and "although this failed" in found.stderr and "odd" in found.stderr


def test_a_server_that_goes_on_after_stop_is_a_failure(manager: Manager) -> None:
    manager.record()
    manager.up.touch()
    manager.programs.add("systemctl")
    found = manager.ocp("stop")
    assert found.code == 1 and "still answers" in found.stderr


def test_launchd_is_asked_again_while_it_refuses(manager: Manager) -> None:
    manager.record(platform="launchd")
    count = manager.home / "count"
    manager.programs.add(
        "launchctl", f'[ "$1" = bootout ] && exit 3; echo x >> {count}; '
        f'[ $(wc -l < {count}) -lt 3 ] && exit 5; touch {manager.up}')
    found = manager.ocp("restart")
    assert found.code == 0, found
    assert [call.split()[1] for call in manager.programs.calls()] == ["bootout"] + [
        "bootstrap"] * 3


def test_a_missing_manager_is_named(manager: Manager) -> None:
    manager.record()
    (manager.programs.folder / "systemctl").unlink()
    found = manager.ocp("restart", environ={"PATH": str(manager.programs.folder)})
    assert found.code == 1 and "systemctl: No such file" in found.stderr


@pytest.mark.parametrize("commands", [
    {}, {"restart": "systemctl restart x"}, {"restart": [{"command": ["systemctl", 1]}]},
    {"restart": [{"words": ["systemctl"]}]}, ["systemctl"], {"restart": [["systemctl"]]}])
def test_a_record_without_usable_commands_runs_nothing_and_says_what_to_do(
    manager: Manager, commands: Json
) -> None:
    manager.record(commands=commands)
    found = manager.ocp("restart")
    assert found.code == 1 and "Run setup.py_install.py again" in found.stderr
    assert not [call for call in manager.programs.calls() if "systemctl" in call]


# ---------------------------------------------------------------------------
# Without one
# ---------------------------------------------------------------------------

def without_record(manager: Manager, verb: str, **more: Any) -> Ran:
    return manager.ocp(verb, environ={"OCP_URL": manager.server.url}, **more)


def listener(manager: Manager, pid: int, path: str = "") -> None:
    manager.owner = ocp.Owner(pid, path)
    manager.programs.add("lsof", f"echo p{pid}; echo f3")
    manager.programs.add("ps", f"echo '{path}'")


def test_nobody_listens(manager: Manager) -> None:
    start, stop = without_record(manager, "start"), without_record(manager, "stop")
    assert start.code == 1 and "ocp_server.py" in start.stderr
    assert "setup.py_install.py" in start.stderr
    assert stop.code == 0 and "Nothing listens" in stop.stdout


def test_a_foreign_process_is_left_alone(manager: Manager) -> None:
    listener(manager, os.getpid(), "/usr/sbin/httpd")
    for verb in ("start", "stop", "restart"):
        found = without_record(manager, verb)
        assert found.code == 1 and "is not an OCP server and is left alone" in found.stderr
        assert str(os.getpid()) in found.stderr


def test_a_server_is_called_by_its_script_however_it_runs() -> None:
    by_hand = "/usr/bin/python3 -u /srv/ocp_server.py --port 4000"
    as_module = "/usr/bin/python3 -u -c import sys\nsys.exit(0) /srv/ocp_server.py --port 4000"

    for command in (by_hand, as_module):
        owner = ocp.Owner(7, command)
        assert owner.is_ocp and owner.words == f"process 7 ({by_hand})"


def test_a_process_that_cannot_be_seen_is_not_judged(manager: Manager) -> None:
    manager.owner = ocp.Owner(None, "")
    found = without_record(manager, "stop")
    assert found.code == 1 and "process of another user, which cannot be identified" in found.stderr


def test_a_server_started_by_hand_gets_the_exact_command(manager: Manager, tmp_path: Path) -> None:
    with running_server(tmp_path / "server", as_program=True) as server:
        manager.owner = IN_PROC(server.port)
        assert manager.owner.pid == server.pid
        for verb in ("stop", "restart"):
            found = without_record(manager, verb)
            assert found.code == 1
            assert f"kill {server.pid}" in found.stderr or "systemctl" in found.stderr
        assert server.process.poll() is None
        assert without_record(manager, "start").code == 0


@pytest.mark.parametrize("command, code", [
    ("/usr/bin/python3 /Users/u/my ocp/ocp_server.py", 1), ("/usr/sbin/httpd", 1)])
def test_on_macos_lsof_is_asked(manager: Manager, command: str, code: int) -> None:
    listener(manager, 99_999_999, command)
    found = without_record(manager, "stop", platform="darwin")
    assert found.code == code
    assert ("kill 99999999" in found.stderr) is command.endswith("ocp_server.py")
    assert any(call.startswith("lsof -nP -iTCP:") for call in manager.programs.calls())


def test_what_cannot_be_found_out_is_not_nobody(manager: Manager) -> None:
    manager.programs.add("lsof", "echo 'lsof: no rights' >&2; exit 1")
    found = without_record(manager, "stop", platform="darwin")
    assert found.code == 1 and "unknown" in found.stderr and "no rights" in found.stderr


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_linux_tells_who_listens(tmp_path: Path, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listening:
        port = listening.getsockname()[1]
        owner = ocp.port_owner(ocp_env(tmp_path), port)
        assert owner.pid == os.getpid() and owner.command and not owner.is_ocp
    assert ocp.port_owner(ocp_env(tmp_path), port) is None


def test_another_users_listener_is_seen_but_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocp, "_listening_sockets", lambda port: {"socket:[0]"})
    owner = ocp.port_owner(ocp_env(tmp_path), 80)
    assert owner.pid is None and owner.words == "a process of another user"


def test_another_machine_is_not_started_from_here(manager: Manager) -> None:
    found = manager.ocp("restart", environ={"OCP_URL": "http://192.0.2.1:3456"})
    assert found.code == 1 and "is another machine" in found.stderr


@pytest.mark.parametrize("script, code", [
    ("echo restarted", 0), ("echo no gateway >&2; exit 1", 1)])
def test_the_gateway_is_restarted_by_openclaw(manager: Manager, script: str, code: int) -> None:
    manager.programs.add("openclaw", script)
    found = manager.ocp("restart", "gateway")
    assert found.code == code and manager.programs.calls() == ["openclaw gateway restart"]
    assert "restarted" in found.stdout if code == 0 else "no gateway" in found.stderr


def test_without_openclaw_there_is_no_gateway(manager: Manager) -> None:
    found = manager.ocp("restart", "gateway", environ={"PATH": str(manager.programs.folder)})
    assert found.code == 1 and "Is OpenClaw installed" in found.stderr


# ---------------------------------------------------------------------------
# Doctor
# ---------------------------------------------------------------------------

KEYS = [
    "schema_version", "timestamp", "ready_to_upgrade", "install_dir", "install_dir_source",
    "install_dir_safe_to_replace", "current_version", "latest_version", "from_version_supported",
    "units", "fail_count", "warn_count", "unknown_count", "checks", "next_action",
]


def examined(manager: Manager, **more: Any) -> Json:
    """The doctor's report; its exit code has to fit."""
    found = manager.ocp("doctor", "--json", **more)
    answer = json.loads(found.stdout)
    assert found.code == (1 if answer["fail_count"] else 0)
    answer["levels"] = {check["id"]: check["level"] for check in answer["checks"]}
    answer["messages"] = {check["id"]: check["message"] for check in answer["checks"]}
    return answer


@pytest.fixture
def healthy(manager: Manager) -> Manager:
    """An installation in which nothing is wrong."""
    manager.record()
    manager.up.touch()
    folder = manager.home / ".ocp"
    connection = sqlite3.connect(folder / "ocp.db")
    connection.execute("CREATE TABLE t (x)")
    connection.commit()
    connection.close()
    (folder / "admin-key").write_text("secret")
    for path in (folder / "ocp.db", folder / "admin-key"):
        path.chmod(0o600)
    manager.owner = ocp.Owner(os.getpid(), "python3 -m pytest")
    return manager


def test_a_healthy_installation_passes(healthy: Manager) -> None:
    answer = examined(healthy)
    levels = answer["levels"]
    assert list(answer)[:len(KEYS)] == KEYS
    assert answer["fail_count"] == 0, answer["messages"]
    assert {name for name, level in levels.items() if level == "PASS"} >= {
        "python", "install_dir", "claude_found", "claude_version", "disk_space", "database",
        "file_modes", "service_unit", "service_running", "oauth_ok", "linger", "clock",
        "service_version_matches_tree"}
    assert answer["units"][0]["name"] == "ocp.service"
    assert set(answer["next_action"]) == {"kind", "human_required", "ai_executable", "verify"}
    assert [check.id for check in ocp.CHECKS] == list(levels)


@pytest.mark.parametrize("platform, user_id, sudo, more", [
    ("systemd-user", 1000, "", ""), ("systemd-system", 1000, "sudo ", "--system "),
    ("systemd-system", 0, "", "--system ")])
def test_what_was_installed_is_installed_again_in_the_same_way(
    healthy: Manager, platform: str, user_id: int, sudo: str, more: str
) -> None:
    healthy.record(platform=platform, python="/gone/python3")
    (command,) = examined(healthy, user_id=user_id)["next_action"]["ai_executable"]
    assert command == f"{sudo}python3 {REPO}/setup.py_install.py {more}--yes"


@pytest.mark.exhaustive
def test_a_server_that_is_down_is_started_by_the_platforms_own_command(healthy: Manager) -> None:
    healthy.up.unlink()
    healthy.programs.add("claude", "echo '2.1.329 (Claude Code)'")
    healthy.owner = None
    answer = examined(healthy)
    assert answer["levels"]["service_running"] == "FAIL"
    assert answer["levels"]["oauth_ok"] == answer["levels"]["clock"] == "INFO"
    assert answer["levels"]["claude_version"] == "PASS"
    assert answer["next_action"]["kind"] == "fix_service"
    assert answer["next_action"]["ai_executable"] == ["systemctl --user restart ocp.service"]
    healthy.record(platform="launchd")
    mac = examined(healthy, platform="darwin", user_id=501)
    assert [line.split()[0] for line in mac["next_action"]["ai_executable"]] == ["launchctl"] * 2
    assert mac["levels"]["linger"] == "INFO"


ILL: tuple[tuple[str, Json, str, str], ...] = (
    ("claude_found", {"claudeBinaryOk": False, "fix": "install it"}, "FAIL", "fix_claude"),
    ("claude_version", {"claudeVersion": "2.1.100"}, "FAIL", "fix_claude"),
    ("claude_version", {"claudeVersion": "2.1.400", "promptCacheKept": False}, "WARN",
     "fix_claude"),
    ("claude_version", {"claudeVersion": "2.1.400", "promptCacheKept": True}, "PASS", ""),
    ("oauth_ok", {"auth": {"ok": False, "message": "log in"}}, "FAIL", "fix_oauth"),
    ("oauth_ok", {"auth": {"ok": None}}, "INFO", ""),
    ("oauth_ok", {"auth": {"ok": True}, "ownerHidden": False}, "WARN", "read_log"),
    ("extra_usage", {"extraUsage": "none"}, "PASS", ""),
    ("extra_usage", {"extraUsage": "billed"}, "WARN", "extra_usage"),
    ("extra_usage", {"extraUsage": "stopped", "fix": "wait"}, "WARN", "extra_usage"),
    ("service_version_matches_tree", {"version": "0.0.9"}, "WARN", "restart"),
)


@pytest.mark.few_cases
@pytest.mark.parametrize("check, fields, level, kind", ILL)
def test_what_the_server_says_is_judged(
    healthy: Manager, check: str, fields: Json, level: str, kind: str,
) -> None:
    healthy.server.answers["GET /health"] = (200, {**HEALTH, "version": VERSION, **fields})
    answer = examined(healthy)
    assert answer["levels"][check] == level
    assert not kind or answer["next_action"]["kind"] == kind


_TAKEN, _LOST = {"state": "delivered", "problem": None}, {"state": "lost", "problem": "it is down"}
_WAITING, _FRESH = {"state": "waiting", "problem": "so"}, {"state": "waiting", "problem": None}


@pytest.mark.few_cases
@pytest.mark.parametrize("webhook, rows, level, said", [
    (None, [], "PASS", "no webhook is set"), (None, [_LOST], "PASS", "no webhook is set"),
    ("h (secret)", [], "PASS", "none so far"),
    ("h (secret)", [_TAKEN, _LOST, _WAITING], "PASS", "took the last one"),
    ("h (secret)", [_FRESH, _TAKEN], "PASS", "took the last one"),
    ("h (secret)", [_FRESH, _WAITING, _LOST, _TAKEN], "WARN", "did not take 2 alerts: so"),
    ("h (secret)", [_LOST], "WARN", "did not take 1 alert: it is down"),
])
def test_alerts_that_did_not_arrive_are_a_warning(
    healthy: Manager, webhook: Json, rows: list[Json], level: str, said: str
) -> None:
    answer = {"webhook": webhook, "format": "json", "alerts": rows}
    healthy.server.answers["GET /api/alerts"] = (200, answer)

    found = examined(healthy)

    assert found["levels"]["alerts"] == level
    assert said in found["messages"]["alerts"]
    assert level == "PASS" or found["next_action"]["human_required"] == [
        "look at alertUrl and alertFormat, then try: `ocp alerts test`"]


def test_tenants_that_are_not_at_their_level_confined_are_a_warning(healthy: Manager) -> None:
    fine = {"name": "alice", "level": "agent", "levelInForce": "agent", "sandbox": True,
            "obstacle": None}
    rows = [fine, {**fine, "name": "bob", "levelInForce": "tools"},
            {**fine, "name": "carol", "sandbox": False}, {**fine, "obstacle": "install it"}]
    healthy.server.answers["GET /api/tenants"] = (200, {"tenants": rows[:1]})
    assert examined(healthy)["levels"]["tenant_level"] == "PASS"
    healthy.server.answers["GET /api/tenants"] = (200, {"tenants": rows[1:]})

    found = examined(healthy)

    assert found["levels"]["tenant_level"] == "WARN"
    assert [line.split()[0] for line in found["next_action"]["human_required"]] == [
        "alice", "bob", "carol"]
    told = " ".join(found["next_action"]["human_required"])
    assert "install it" in told and "OCP_TENANT_LEVEL=agent" in told and "not confined" in told


@pytest.mark.few_cases
@pytest.mark.parametrize("kinds, level, said", [
    ([], "PASS", "no request failed"),
    ([("replaced_api_key", 401)], "INFO", "2 replaced_api_key"),
    ([("quota_exceeded", 429), ("model_not_found", 404)], "INFO", "`ocp errors --since 1h`"),
    ([("replaced_api_key", 401), ("overloaded", 529)], "WARN", "2 overloaded"),
    ([("upstream_login_required", 401)], "WARN", "2 upstream_login_required"),
])
def test_what_failed_lately_is_counted_and_clients_are_no_fault_of_the_server(
    healthy: Manager, kinds: list[tuple[str, int]], level: str, said: str
) -> None:
    by_kind = [{"kind": kind, "status": status, "count": 2, "action": f"Mend {kind}."}
               for kind, status in kinds]
    healthy.server.answers["GET /api/errors"] = (200, {"byKind": by_kind})

    answer = examined(healthy)

    assert answer["levels"]["recent_failures"] == level
    assert said in answer["messages"]["recent_failures"]
    if level == "WARN":
        kind = kinds[-1][0]
        assert f"{kind}: Mend {kind}." in answer["next_action"]["human_required"]


@pytest.mark.few_cases
@pytest.mark.parametrize("node, claude, level, said", [
    ("v20.20.2", "2.1.197", "WARN", "claude 2.1.197 is old: under Node 20.20.2"),
    ("v18.19.0", "2.1.197", "WARN", "npm installs no newer one"),
    ("v20.20.2", "2.1.198", "PASS", "only by @latest"), ("v20.20.2", None, "PASS", "@latest"),
    ("v22.0.0", "2.1.197", "PASS", "Node 22.0.0"), ("v24.11.1", "2.1.329", "PASS", "Node 24.11.1"),
    ("", "2.1.197", "INFO", "no Node"), ("nonsense", "2.1.197", "INFO", "no Node")])
def test_a_node_under_which_npm_installs_an_old_claude_is_named(
    healthy: Manager, node: str, claude: str | None, level: str, said: str
) -> None:
    healthy.programs.add("node", f"echo '{node}'" if node else "exit 127")
    healthy.programs.add("claude", "exit 1")
    healthy.server.answers["GET /health"] = (
        200, {**HEALTH, "version": VERSION, "claudeVersion": claude})

    answer = examined(healthy)

    assert answer["levels"]["node"] == level and said in answer["messages"]["node"]
    assert level != "WARN" or answer["next_action"]["ai_executable"] == [
        "npm install -g @anthropic-ai/claude-code@latest"]


def test_requests_that_are_stopped_may_be_those_of_some_models(healthy: Manager) -> None:
    # The fix is that of another problem.
    health = {**HEALTH, "version": VERSION, "extraUsage": "stopped", "fix": "log in"}
    healthy.server.answers["GET /health"] = (200, health)

    answer = examined(healthy)

    told = answer["messages"]["extra_usage"]
    assert "for all models or for some" in told and "log in" not in told
    assert any("extraUsage allow" in step for step in answer["next_action"]["human_required"])


def test_files_that_others_may_read_are_named_with_their_fix(healthy: Manager) -> None:
    key = healthy.home / ".ocp" / "admin-key"
    key.chmod(0o644)
    answer = examined(healthy)
    assert answer["levels"]["file_modes"] == "FAIL"
    assert answer["next_action"]["ai_executable"] == [f"chmod 600 {key}"]
    os.system(answer["next_action"]["ai_executable"][0])
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert examined(healthy)["levels"]["file_modes"] == "PASS"


@pytest.mark.few_cases
@pytest.mark.parametrize(("state", "level"), [
    ("memory", "FAIL"), ("lost", "FAIL"), ("damaged", "FAIL"), ("behind", "WARN")])
def test_a_server_that_does_not_write_to_its_database_is_told_with_its_advice(
    healthy: Manager, state: str, level: str
) -> None:
    healthy.server.answers["GET /health"] = (
        200, {**HEALTH, "version": VERSION, "storage": state, "storageFix": "move ocp.db away"})

    answer = examined(healthy)

    assert answer["levels"]["database"] == level
    assert "move ocp.db away" in answer["messages"]["database"]


def test_a_damaged_database_is_not_a_locked_one(healthy: Manager) -> None:
    path = healthy.home / ".ocp" / "ocp.db"
    path.write_bytes(b"SQLite format 3\0" + b"\1" * 8000)
    assert examined(healthy)["levels"]["database"] == "FAIL"
    path.unlink()
    path.mkdir()
    answer = examined(healthy)
    assert answer["levels"]["database"] == "INFO"
    assert "could not check" in answer["messages"]["database"]


@pytest.mark.exhaustive
def test_a_database_that_is_gone_while_the_server_uses_it(healthy: Manager) -> None:
    (healthy.home / ".ocp/ocp.db").unlink()
    assert examined(healthy)["levels"]["database"] == "INFO"
    health = {**HEALTH, "version": VERSION, "storage": "disk"}
    healthy.server.answers["GET /health"] = (200, health)
    answer = examined(healthy)
    assert answer["levels"]["database"] == "WARN"
    check = next(each for each in answer["checks"] if each["id"] == "database")
    assert "a start makes a new one" in json.dumps(check["fix"])
    healthy.server.answers["GET /health"] = (200, {**health, "demo": True})
    assert examined(healthy)["levels"]["database"] == "INFO"


def test_what_was_taken_over_of_the_original_is_told_until_nothing_of_it_is_left(
    healthy: Manager
) -> None:
    folder = healthy.home / ".ocp"
    assert examined(healthy)["levels"]["original"] == "INFO"
    (folder / "ocp.db").unlink()
    home = OriginalHome(folder)
    home.key("laptop")
    home.key("Laptop", "ocp_another")
    home.database.chmod(0o600)
    waiting = examined(healthy)
    assert waiting["levels"]["original"] == "WARN"
    assert "not taken over yet" in waiting["messages"]["original"]
    load_script("ocp_server.py").open_with_original(str(home.database))[0].close()

    answer = examined(healthy)
    assert answer["levels"]["original"] == "WARN"
    told = answer["messages"]["original"]
    assert "took over 2 keys and 0 rows of usage; 1 key renamed" in told
    # The message goes into reports: it names nobody's devices.
    assert "every key in plain text" in told and "aptop" not in told
    check = next(each for each in answer["checks"] if each["id"] == "original")
    assert f"OCP_HOME={folder}" in json.dumps(check["fix"])
    assert "--forget-original" in json.dumps(check["fix"])

    load_script("ocp_server.py").forget_original(str(folder))
    assert examined(healthy)["levels"]["original"] == "PASS"
    (folder / "ocp.db.original").write_text("a copy")
    answer = examined(healthy)
    assert (answer["levels"]["original"], answer["levels"]["file_modes"]) == ("WARN", "FAIL")


def test_where_nothing_starts_the_server_doctor_says_how_to(healthy: Manager) -> None:
    path = healthy.home / ".ocp/install.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "label": None}))
    healthy.up.unlink()
    answer = examined(healthy)
    check = next(each for each in answer["checks"] if each["id"] == "service_running")
    assert check["fix"]["ai_executable"] == [] and not check["fix"]["safe"], check
    assert check["fix"]["human_required"] == [
        f"start it: {sys.executable} {REPO}/ocp_server.py"], check


def test_a_port_of_another_program(healthy: Manager) -> None:
    healthy.server.answers["GET /health"] = (200, "hello")
    healthy.programs.add("claude", "echo '2.1.329 (Claude Code)'")
    answer = examined(healthy)
    assert answer["levels"]["port_owner"] == "FAIL"
    assert answer["next_action"]["kind"] == "fix_port"
    assert "not an OCP server" in answer["messages"]["service_running"]
    fixes = {check["id"]: check.get("fix") for check in answer["checks"]}
    assert fixes["service_running"] == fixes["port_owner"], "not another start of the server"
    assert f"--port {ocp.port_of(healthy.server.url) + 1}" in json.dumps(fixes["port_owner"])


@pytest.mark.few_cases
@pytest.mark.parametrize("line, level, words", [
    ("CLAUDE_TIMEOUT=soon", "FAIL", "CLAUDE_TIMEOUT: 'soon'"),
    ("CLAUDE_AUTH_MODE multi", "FAIL", "ocp.env, line 2: write NAME=VALUE"),
    ("OCP_TLS_CERT=/no/cert.pem", "FAIL", "OCP_TLS_CERT"),
    ("OCP_DEFAULT_MODEL=gpt", "FAIL", "OCP_DEFAULT_MODEL"),
    ("CLAUDE_TIMEUOT=20m", "WARN", "Did you mean CLAUDE_TIMEOUT?"),
    ("# CLAUDE_TIMEOUT soon", "PASS", "accepts them"),
])
def test_a_wrong_setting_is_named_with_its_file(
    healthy: Manager, line: str, level: str, words: str,
) -> None:
    path = healthy.home / ".ocp/ocp.env"
    path.write_text(f"CLAUDE_BIND=127.0.0.1\n{line}\n")
    path.chmod(0o600)
    healthy.record(env_file=str(path))

    answer = examined(healthy)

    assert (answer["levels"]["settings"], words in answer["messages"]["settings"]) == (
        level, True), answer["messages"]["settings"]
    if level != "PASS":
        check = next(each for each in answer["checks"] if each["id"] == "settings")
        assert f"correct them in {path}" in json.dumps(check["fix"])


def unit_of(manager: Manager) -> Path:
    found = json.loads((manager.home / ".ocp" / "install.json").read_text())
    return Path(found["unit_path"])


@pytest.mark.few_cases
@pytest.mark.parametrize("drain, unit, level", [
    (None, "TimeoutStopSec=45", "PASS"), ("120000", "TimeoutStopSec=45", "WARN"),
    ("2m", "TimeoutStopSec=45", "WARN"), ("30s", "TimeoutStopSec=45", "PASS"),
    ("120000", "TimeoutStopSec=145", "PASS"), ("120000", "TimeoutStopSec=infinity", "PASS"),
    ("85000", "", "WARN"), ("20000", "", "PASS"), ("20000", "TimeoutStopSec=2min", "INFO")])
def test_answers_get_the_time_to_end_that_the_setting_promises(
    healthy: Manager, drain: str | None, unit: str, level: str
) -> None:
    settings = healthy.home / ".ocp" / "ocp.env"
    settings.write_text(f"OCP_DRAIN={drain}\n" if drain else "")
    settings.chmod(0o600)
    healthy.record(env_file=str(settings))
    unit_of(healthy).write_text(f"[Service]\n{unit}\n")

    answer = examined(healthy)

    assert answer["levels"]["stop_timeout"] == level
    assert level != "WARN" or answer["next_action"]["kind"] == "fix_install"


@pytest.mark.exhaustive
@pytest.mark.parametrize("content, level", [
    (plistlib.dumps({"ExitTimeOut": 45}), "PASS"), (plistlib.dumps({}), "WARN"),
    (b"nonsense", "INFO")])
def test_the_time_to_end_of_an_agent_of_launchd(
    healthy: Manager, content: bytes, level: str
) -> None:
    healthy.record(platform="launchd")
    unit_of(healthy).write_bytes(content)
    found = examined(healthy, platform="darwin", user_id=501)
    assert found["levels"]["stop_timeout"] == level


# -- what doctor does by itself ------------------------------------------------

def fixed(manager: Manager, **more: Any) -> tuple[Json, Json]:
    """What `doctor --fix` did, by check, and the examination after it."""
    answer = json.loads(manager.ocp("doctor", "--fix", "--json", **more).stdout)
    levels = {check["id"]: check["level"] for check in answer["checks"]}
    return {each["id"]: each for each in answer["fixes"]}, levels


def test_fix_does_what_is_safe_and_says_so(healthy: Manager) -> None:
    key = healthy.home / ".ocp" / "admin-key"
    key.chmod(0o644)
    healthy.up.unlink()
    healthy.owner = None
    linger = healthy.home / "linger"
    healthy.programs.add(
        "loginctl", f'case "$1" in enable-linger) touch {linger};; '
                    f'*) [ -e {linger} ] && echo Linger=yes || echo Linger=no;; esac')

    told = healthy.ocp("doctor", "--fix")

    assert told.code == 0, told
    for line in (f"Private files: chmod 600 {key}: done", "Running without you: loginctl enable-",
                 "Server: systemctl --user restart ocp.service: done"):
        assert line in told.stderr
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and linger.exists() and healthy.up.exists()
    assert "0 failed, 0 warnings" in told.stdout


def test_fix_without_anything_to_fix_says_so(healthy: Manager) -> None:
    told = healthy.ocp("doctor", "--fix")
    assert told.code == 0 and "nothing that can be fixed safely" in told.stderr


@pytest.mark.exhaustive
def test_fix_leaves_files_of_others_and_what_links_lead_to(healthy: Manager) -> None:
    key = healthy.home / ".ocp" / "admin-key"
    key.chmod(0o644)
    done, levels = fixed(healthy, user_id=os.getuid() + 1)
    assert not done["file_modes"]["ok"] and "another user" in done["file_modes"]["message"]
    assert levels["file_modes"] == "FAIL" and stat.S_IMODE(key.stat().st_mode) == 0o644

    other = healthy.home / "other"
    key.rename(other)
    key.symlink_to(other)
    done, levels = fixed(healthy)
    assert not done["file_modes"]["ok"] and levels["file_modes"] == "FAIL"
    assert stat.S_IMODE(other.stat().st_mode) == 0o644


@pytest.mark.exhaustive
def test_fix_restarts_no_server_that_answers_or_whose_port_is_taken(healthy: Manager) -> None:
    healthy.version = "0.0.9"
    done, levels = fixed(healthy)
    assert not done and levels["service_version_matches_tree"] == "WARN"

    healthy.server.answers["GET /health"] = (200, "hello")
    healthy.owner = ocp.Owner(os.getpid(), "python3 -m http.server")
    done, _ = fixed(healthy)
    assert "service_running" not in done
    assert not [call for call in healthy.programs.calls() if "restart" in call]


def test_a_server_of_another_machine_is_not_mended_here(healthy: Manager) -> None:
    healthy.up.unlink()
    elsewhere = {"OCP_URL": "http://0.0.0.0:1"}
    answer = examined(healthy, environ=elsewhere)
    (row,) = [row for row in answer["checks"] if row["id"] == "service_running"]
    assert row["fix"]["kind"] == "fix_elsewhere" and not row["fix"]["ai_executable"]
    assert fixed(healthy, environ=elsewhere)[0] == {}
    assert not [call for call in healthy.programs.calls() if "restart" in call]


@pytest.mark.exhaustive
def test_fix_runs_nothing_with_sudo(healthy: Manager) -> None:
    healthy.record(platform="systemd-system")
    healthy.up.unlink()
    healthy.owner = None
    answer = examined(healthy, user_id=1000)
    (row,) = [row for row in answer["checks"] if row["id"] == "service_running"]
    assert row["fix"]["ai_executable"] == ["sudo systemctl restart ocp.service"]
    assert not row["fix"]["safe"] and fixed(healthy, user_id=1000)[0] == {}


def test_every_row_that_is_not_well_has_its_fix_and_every_check_a_title(healthy: Manager) -> None:
    healthy.server.answers["GET /health"] = (200, "hello")
    healthy.programs.add("loginctl", "echo Linger=no")
    answer = examined(healthy)
    for row in answer["checks"]:
        assert row["title"] and ("fix" in row) is (row["level"] in ("FAIL", "WARN")), row
        assert "fix" not in row or row["fix"]["human_required"] or row["fix"]["ai_executable"]
    shown = healthy.ocp("doctor").stdout
    assert "  [WARN] Running without you (linger): " in shown
    assert "         fix: loginctl enable-linger\n" in shown
    assert "[SKIP] Clock (clock): could not check" in shown


def test_no_finding_that_needs_a_fix_is_made_without_one() -> None:
    calls = [node for node in ast.walk(ast.parse(Path(REPO, "ocp.py").read_text("utf-8")))
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding"]
    assert len(calls) > len(ocp.CHECKS)
    for call in calls:
        words = {each.value for each in ast.walk(call.args[0]) if isinstance(each, ast.Constant)}
        may_need_one = not words or bool(words & {"WARN", "FAIL"})
        assert len(call.args) == 3 or not may_need_one, ast.unparse(call)


def test_a_strange_answer_spoils_only_its_own_check(healthy: Manager) -> None:
    healthy.server.answers["GET /health"] = (
        200, {**HEALTH, "version": VERSION, "auth": "ok", "uptime": None})
    answer = examined(healthy)
    assert answer["levels"]["oauth_ok"] == "INFO" and answer["unknown_count"]
    assert answer["levels"]["service_running"] == "PASS"


# -- a report for an issue -----------------------------------------------------

PRIVATE = (
    "kitchen", "s3cret-of-mine", "ocp_" + "a1" * 16, "someone@example.com", "192.0.2.77",
    "2001:db8::7", "attic.example.net", "mums-attic", "sk-ant-oat01-abcdefghijk", "my own prompt",
    "my-s3cret",
)


def report_of(manager: Manager, **more: Any) -> str:
    found = manager.ocp("doctor", "--report", **more)
    assert found.code == 0, found
    path = Path(found.stdout.strip())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return path.read_text()


def private_log(manager: Manager) -> list[Json]:
    """Events that tell more than an issue may have."""
    return [
        {"ts": "2026-11-20T14:00:00Z", "level": "warn", "event": "request_refused", "status": 401,
         "peer": "192.0.2.77", "caller": "kitchen", "path": "/api/keys/kitchen",
         "error": f"{PRIVATE[2]} of someone@example.com, from [2001:db8::7] at 192.0.2.77"},
        {"ts": "2026-11-20T14:00:01Z", "level": "error", "event": "claude_died", "code": 1,
         "detail": f"no {manager.home}/x, /home/somebody/y, https://attic.example.net:8443/v1, "
                   "sk-ant-oat01-abcdefghijk, mums-attic, http://hooks.test/my-s3cret",
         "text": "my own prompt"},
    ]


@pytest.mark.parametrize("is_up", [True, False])
def test_a_report_has_what_helps_and_nothing_private(healthy: Manager, is_up: bool) -> None:
    settings = healthy.home / ".ocp" / "ocp.env"
    settings.write_text("PROXY_API_KEY=s3cret-of-mine\nOCP_INSTANCE_NAME=mums-attic\n"
                        "CLAUDE_SYSTEM_PROMPT='my own prompt'\nCLAUDE_MAX_CONCURRENT=3\n"
                        "OCP_ALERT_URL=http://hooks.test/my-s3cret\n")
    settings.chmod(0o600)
    healthy.record(env_file=str(settings))
    connection = sqlite3.connect(healthy.home / ".ocp" / "ocp.db")
    connection.execute("CREATE TABLE keys (name)")
    connection.execute("INSERT INTO keys VALUES ('kitchen')")
    connection.commit()
    connection.close()
    entries = private_log(healthy)
    if is_up:
        healthy.server.answers.update({
            "GET /logs": (200, {"entries": entries}),
            "GET /api/keys": (200, {"keys": [{"name": "kitchen"}]}),
            "GET /api/errors": (200, {"byKind": [{"kind": "timeout", "count": 4, "lastAt": "T"}]}),
            "GET /settings": (200, {
                "timeout": {"value": 5000, "source": "stored"},
                "modelAliases": {"value": "my own prompt=sonnet", "source": "stored"}})})
    else:
        healthy.up.unlink()
        (healthy.home / ".ocp" / "logs").mkdir()
        (healthy.home / ".ocp" / "logs" / "ocp.log").write_text(
            "".join(json.dumps(entry) + "\n" for entry in [*entries, 5]) + "not JSON\n")

    text = report_of(healthy)

    for word in (*PRIVATE, str(healthy.home), "somebody"):
        assert word not in text, word
    for word in ("installed v", "CLAUDE_MAX_CONCURRENT=3", "PROXY_API_KEY=(set)", "status=401",
                 "claude_died code=1", "https://<host>:8443/v1", "~/x", "[PASS] python: ",
                 *(["timeout = 5000, from stored", "timeout: 4"] if is_up else [])):
        assert word in text, (word, text)


def test_a_report_without_any_server_or_folder(manager: Manager) -> None:
    assert "[FAIL] service_running" in report_of(manager, environ={"OCP_URL": DEAD_URL})


def test_no_linger_is_a_warning(healthy: Manager) -> None:
    healthy.programs.add("loginctl", "echo Linger=no")
    answer = examined(healthy)
    assert answer["levels"]["linger"] == "WARN"
    assert answer["next_action"]["ai_executable"] == ["loginctl enable-linger"]


def test_a_service_that_does_not_start_by_itself_is_a_warning(healthy: Manager) -> None:
    healthy.programs.add("systemctl", "echo disabled; exit 1")
    answer = examined(healthy)
    assert answer["levels"]["service_unit"] == "WARN"
    assert answer["next_action"]["ai_executable"] == ["systemctl --user enable ocp.service"]


def test_a_clock_that_is_wrong_is_a_warning(healthy: Manager) -> None:
    ahead = SkippingClock()
    ahead.ahead_s = 1000
    assert examined(healthy, clock=ahead)["levels"]["clock"] == "WARN"


@pytest.mark.few_cases
@pytest.mark.parametrize("text, level", [
    (None, "INFO"), ("{ // JSON5\n}", "INFO"), ("[]", "INFO"), ("{", "INFO"),
    ('{"models": {"providers": {"mine": {"baseUrl": "http://192.0.2.7/v1"}}}}', "INFO"),
    ('{"models": {"providers": {"mine": {"baseUrl": "URL/v1/", "models": []}}}}', "WARN"),
])
def test_openclaw_is_looked_at_only_if_it_is_there(
    healthy: Manager, text: str, level: str,
) -> None:
    if text is not None:
        (healthy.home / ".openclaw").mkdir()
        config = healthy.home / ".openclaw" / "openclaw.json"
        config.write_text(text.replace("URL", healthy.server.url))
    answer = examined(healthy)
    assert answer["levels"]["openclaw_models"] == level
    assert text is None or config.read_text() == text.replace("URL", healthy.server.url)


ACCOUNT = {"id": "telegram", "accountId": "default", "status": "running", "error": "", "dead": 0,
           "held": 0}


@pytest.mark.parametrize("code, status, level, told", [
    (3, {}, "WARN", "channels start -d"),
    (1, {}, "FAIL", "it is broken"),
    (0, {"channels": [ACCOUNT]}, "PASS", "1 account running"),
    (0, {"channels": [{**ACCOUNT, "held": 2}]}, "PASS", "2 parts of answers held"),
    (0, {"channels": [ACCOUNT, {**ACCOUNT, "status": "stopped", "error": "not enabled"}]}, "PASS",
     "1 account running"),
    (0, {"channels": [{**ACCOUNT, "status": "login needed", "error": "it ended"}]}, "WARN",
     "telegram:default is login needed (it ended)"),
    (0, {"channels": [{**ACCOUNT, "dead": 1}]}, "WARN", "1 part of answers could not be sent"),
    (0, {"channels": [ACCOUNT], "pairing": ["ABCD2345"]}, "WARN",
     "channels pairing approve ABCD2345"),
])
def test_the_gateway_to_chats_is_looked_at_where_chats_are_configured(
    manager: Manager, tmp_path: Path, code: int, status: Json, level: str, told: str
) -> None:
    report = {"running": 1, "pairing": [], **status}
    (tmp_path / "ocp_channels.py").write_text(
        f"import sys\nprint({json.dumps(report)!r})\n"
        f"print('it is broken', file=sys.stderr)\nsys.exit({code})\n")
    env = dataclasses.replace(manager.env("doctor"), tree=str(tmp_path))
    assert ocp._check_channels(ocp.Facts(env)).level == "INFO"
    (manager.home / ".ocp").mkdir(exist_ok=True)
    (manager.home / ".ocp" / "channels.json").write_text("{}")
    found = ocp._check_channels(ocp.Facts(env))
    assert found.level == level and told in str(found), found


@pytest.mark.parametrize("code, rows, level, told", [
    (0, [("anna", True)], "PASS", "1 instance of tenants"),
    (1, [("anna", True), ("bob", False), ("eve", False)], "WARN", "`ocp tenants apply bob eve`"),
    (0, [], "INFO", "no tenant has an instance on this machine"),
    (4, [], "INFO", "could not check: it is broken"),
])
def test_instances_of_tenants_are_looked_at_where_there_are_tenants(
    healthy: Manager, tmp_path: Path, code: int, rows: Json, level: str, told: str
) -> None:
    report = {"instances": [{"name": name, "ok": is_good} for name, is_good in rows]}
    (tmp_path / "ocp_tenants.py").write_text(
        f"import sys\nprint({json.dumps(report)!r})\n"
        f"print('it is broken', file=sys.stderr)\nsys.exit({code})\n")
    env = dataclasses.replace(healthy.env("doctor"), tree=str(tmp_path))
    (check,) = [each for each in ocp.CHECKS if each.id == "tenant_instances"]
    assert "there are no tenants" in ocp.run_check(check, ocp.Facts(env)).message
    healthy.server.answers["GET /health"] = (200, {**HEALTH, "tenantCount": 2})
    found = ocp.run_check(check, ocp.Facts(env))
    assert found.level == level and told in str(found), found


@pytest.mark.parametrize("states, level, told", [
    ([], "INFO", "no key has a login of its own"),
    (["logged in", "not known yet"], "PASS", "2 logins of keys"),
    (["logged in", "not logged in"], "WARN", "`ocp keys login 'key 1'`"),
])
def test_a_lost_login_of_a_key_is_told(
    healthy: Manager, states: list[str], level: str, told: str
) -> None:
    logins = [{"state": state, "keys": [f"key {number}", "other"]}
              for number, state in enumerate(states)]
    healthy.server.answers["GET /api/keys"] = (200, {"keys": [], "logins": logins})
    found = ocp._check_key_logins(ocp.Facts(healthy.env("doctor")))
    assert found.level == level and told in str(found), found


def test_folders_of_tenants_that_others_may_read_are_told_and_closed(healthy: Manager) -> None:
    folder = healthy.home / ".ocp" / "tenants" / "anna"
    folder.mkdir(parents=True)
    folder.parent.chmod(0o700)
    folder.chmod(0o755)

    assert examined(healthy)["messages"]["file_modes"] == f"others may read {folder}"
    assert fixed(healthy)[0]["file_modes"]["ok"]

    assert folder.stat().st_mode & 0o777 == 0o700


def test_what_cannot_be_checked_is_never_wrong(manager: Manager) -> None:
    manager.record()
    (manager.home / ".ocp").chmod(0o700)
    for name in ("systemctl", "loginctl"):
        manager.programs.add(name, "echo broken >&2; exit 1")
    manager.programs.add("claude", "sleep 0; exit 1")
    answer = examined(manager, environ={"OCP_URL": DEAD_URL})
    failed = [name for name, level in answer["levels"].items() if level == "FAIL"]
    assert failed == ["service_running"]
    assert answer["levels"]["service_unit"] == answer["levels"]["linger"] == "INFO"


def test_a_record_that_does_not_say_how_to_start_is_written_again(healthy: Manager) -> None:
    healthy.record(commands={})
    answer = examined(healthy)
    assert "does not say how the service is started" in answer["messages"]["install_dir"]
    assert answer["next_action"]["kind"] == "fix_install"


def test_a_broken_record_does_not_stop_the_doctor(manager: Manager) -> None:
    (manager.home / ".ocp").mkdir(mode=0o700)
    (manager.home / ".ocp" / "install.json").write_text("{")
    answer = examined(manager, environ={"OCP_URL": manager.server.url})
    assert answer["levels"]["install_dir"] == "FAIL"
    assert answer["next_action"]["kind"] == "fix_install"


def test_the_environment_of_the_service_is_read(tmp_path: Path) -> None:
    variables = tmp_path / "env"
    variables.write_text("# secret\nPROXY_API_KEY='se cret'\nBAD LINE=1\nCLAUDE_PROXY_PORT=4000\n"
                         'CLAUDE_BIN="/a b/claude"\nX=50%\n')
    write_record(tmp_path, "http://127.0.0.1:3999", env_file=str(variables))
    env = ocp_env(tmp_path, environ={"CLAUDE_TIMEOUT": "of the shell"})
    found = ocp.service_environ(env)
    assert found["CLAUDE_BIN"] == "/a b/claude" and found["X"] == "50%"
    assert found["PROXY_API_KEY"] == "se cret" and found["CLAUDE_PROXY_PORT"] == "4000"
    assert found["OCP_HOME"] == str(tmp_path / ".ocp") and "CLAUDE_TIMEOUT" not in found


@pytest.mark.slow
def test_doctor_on_a_real_server(tmp_path: Path) -> None:
    with running_server(tmp_path / "server", as_program=True) as server:
        environ = {"OCP_URL": server.url, "OCP_HOME": str(server.ocp_home)}
        env = ocp_env(tmp_path, "doctor", "--json", environ=environ)
        answer = json.loads(run_env(env).stdout)
        shown = run_env(ocp_env(tmp_path, "doctor", environ=environ)).stdout
        told = run_env(ocp_env(tmp_path, "doctor", "--report", environ=environ)).stdout
        report = Path(told.strip()).read_text()
    levels = {check["id"]: check["level"] for check in answer["checks"]}
    for name in ("service_running", "database", "port_owner", "clock", "file_modes",
                 "service_version_matches_tree", "claude_found", "claude_version"):
        assert levels[name] == "PASS", answer
        assert f" ({name}): " in shown
    assert sys.version.split()[0] in shown
    assert "timeout = " in report and "server_started" in report
    assert str(tmp_path) not in report
