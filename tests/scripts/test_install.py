"""The installer: its texts, its plan, what it does on stand-ins of the service managers.

The HOME of most tests has a space, a percent sign, quotes and a dollar in its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import plistlib
import pwd
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Iterator, Mapping, Optional

import pytest

import fake_services
from depth import rest
from fake_services import FakeServices
from http_client import http_call
from ocp_command import Stream
from original_home import OriginalHome
from project import REPO, clean_env, free_port, load_script, run_compiled
from server import FAKE_CLAUDE, running_server
from tls_files import CERT, KEY, write_tls_files
from waiting import eventually

Json = Any
OPENCLAW = "{\n  // mine\n  agents: { defaults: { workspace: '~/w' } },\n}\n"
NASTY = "it's 100% \"mine\" $HOME"
SYSTEM_PROGRAMS = ("sh", "env")
USER = pwd.getpwuid(os.getuid()).pw_name

setup: ModuleType = load_script("setup.py_install.py")
uninstall: ModuleType = load_script("uninstall")


class InstallMachine:
    """A HOME, a checkout in it, stand-ins of the service managers, a claude."""

    def __init__(self, folder: Path, *programs: str, home: str = NASTY) -> None:
        self.folder = folder
        self.home = folder / home
        self.home.mkdir()
        self.checkout = self.home / "a checkout"
        self.checkout.mkdir()
        for name in ("ocp_server.py", "models.json", "setup.py_install.py", "uninstall.py"):
            shutil.copy(REPO / name, self.checkout / name)
        # It only has to be there for the launcher to be of use.
        (self.checkout / "ocp.py").write_text("import sys\nprint('ocp', *sys.argv[1:])\n")
        self.services = FakeServices(folder, programs)
        for name in SYSTEM_PROGRAMS:
            os.symlink(str(shutil.which(name)), self.services.bin / name)
        self.scenario = folder / "scenario.json"
        self.claude = self.services.bin / "claude"
        self.write_claude()
        self.port = free_port()
        self.ocp = self.home / ".ocp"
        self.env_file = self.ocp / "ocp.env"
        self.unit = self.home / ".config/systemd/user/ocp.service"
        self.launcher = self.home / ".local/bin/ocp"
        self.openclaw = self.home / ".openclaw/openclaw.json"
        self.before = self.files()
        #: Whether programs are called in this process.
        self.is_quick = False

    def write_claude(self, **scenario: Json) -> None:
        self.scenario.write_text(json.dumps({"turns": [], **scenario}))
        words = [sys.executable, "-I", "-S", *run_compiled(FAKE_CLAUDE)]
        self.claude.write_text(
            f"#!/bin/sh\nexport FAKE_CLAUDE={shlex.quote(str(self.scenario))}\n"
            f'exec {shlex.join(words)} "$@"\n')
        self.claude.chmod(0o755)

    def env(self, more: Optional[Mapping[str, str]] = None) -> dict[str, str]:
        return {
            "HOME": str(self.home), "PATH": str(self.services.bin), "LANG": "C.UTF-8",
            "FAKE_SERVICES": str(self.services.state), **(more or {}),
        }

    def run(
        self, script: str, *args: str, env: Optional[Mapping[str, str]] = None, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        if self.is_quick:
            return self.run_here(script, list(args), self.env(env))
        command = [sys.executable, "-W", "error::ResourceWarning", str(self.checkout / script)]
        return subprocess.run(
            [*command, *args], env=self.env(env), input=stdin, capture_output=True, text=True,
            timeout=300, cwd="/")

    def run_here(
        self, script: str, args: list[str], env: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """The same in this process."""
        output, complaints = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(complaints):
            if script == "uninstall.py":
                code = uninstall.main(args, env, "Linux")
            else:
                code = setup.main(args, self.host("Linux", uid=os.getuid(), environ=env))
        return subprocess.CompletedProcess(args, code, output.getvalue(), complaints.getvalue())

    def install(
        self, *args: str, env: Optional[Mapping[str, str]] = None
    ) -> subprocess.CompletedProcess[str]:
        """Without a start, unless it is a whole one; on a free port, unless there is one."""
        known = ("--port", str(self.port)) if not self.env_file.exists() else ()
        return self.run("setup.py_install.py", "--yes", *known, *args, env=env)

    def uninstall(self, *args: str) -> subprocess.CompletedProcess[str]:
        return self.run("uninstall.py", "--yes", *args)

    def record(self) -> dict[str, Json]:
        return dict(json.loads((self.ocp / "install.json").read_text()))

    def settings(self) -> dict[str, str]:
        return fake_services.environment_file(self.env_file.read_text())

    def files(self) -> dict[str, Json]:
        """Everything below HOME: modes, contents, and when it was written."""
        found = {}
        for path in sorted(self.home.rglob("*")):
            state = path.lstat()
            content = path.read_bytes() if path.is_file() else b""
            found[str(path.relative_to(self.home))] = (
                stat.S_IMODE(state.st_mode), content, state.st_mtime_ns if content else 0)
        return found

    def host(self, system: str, **fields: Json) -> Json:
        """The machine as a program would see it that runs in this process."""
        values = {
            "environ": self.env(), "system": system, "home": str(self.home), "user": USER,
            "uid": 501, "here": str(self.checkout), "stdin": None, **fields}
        return setup.Host(**values)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def linux(tmp_path: Path) -> Iterator[InstallMachine]:
    machine = InstallMachine(tmp_path, "systemctl", "loginctl")
    yield machine
    machine.services.stop()


@pytest.fixture
def quick(linux: InstallMachine, monkeypatch: pytest.MonkeyPatch) -> InstallMachine:
    """The same where no real server is needed: programs run in this process, the stand-ins
    answer without one, and the server has nothing against any settings."""
    monkeypatch.setattr(fake_services, "STATE", linux.services.state)
    monkeypatch.setattr(subprocess, "run", linux.services.answer)
    linux.is_quick = True
    return linux


@pytest.fixture
def bare(tmp_path: Path) -> InstallMachine:
    """A machine without a service manager."""
    return InstallMachine(tmp_path)


@pytest.fixture
def openclaw(linux: InstallMachine) -> InstallMachine:
    """A machine whose services run, with a configuration of OpenClaw."""
    linux.services.set("run")
    shutil.copy(REPO / "ocp_connect.py", linux.checkout)
    linux.openclaw.parent.mkdir()
    linux.openclaw.write_text(OPENCLAW)
    return linux


# ---------------------------------------------------------------------------
# Settings files, units, agents, launchers: texts
# ---------------------------------------------------------------------------

VALUES = (
    "", "plain", "two words", "it's", 'say "hi"', "$HOME", "`id`", "back\\slash", "a#b", "50%",
    "~", "trailing ", " leading", "a=b", "{x,y}*?[z]", "gr\u00fcn", ";", "\\", "'", '"', "$$",
    "a\\nb",
)


@pytest.mark.parametrize("value", VALUES)
def test_a_quoted_value_means_the_same_to_us_to_systemd_and_to_a_shell(
    value: str, tmp_path: Path
) -> None:
    text = setup.edited_settings("", {"X": value})
    file = tmp_path / "ocp.env"
    file.write_text(text, "utf-8")
    shown = subprocess.run(
        ["/bin/sh", "-c", '. "$1"; printf %s "$X"', "sh", str(file)], capture_output=True,
        check=True).stdout.decode()
    assert setup.settings_of(text) == fake_services.environment_file(text) == {"X": value}
    assert shown == value


def test_only_lines_of_changed_settings_are_touched() -> None:
    text = "# mine\nA = no setting\nB='two words'\n\nC=1 \n# C=2\nD=\"x\"\n"
    edited = setup.edited_settings(text, {"B": "two words", "C": "2", "E": "new one"})
    assert edited == text.replace("C=1 \n", "C=2\n") + 'E="new one"\n'
    assert setup.edited_settings(edited, {"E": "new one"}) == edited


def installation(folder: Path, service: Json, **fields: Json) -> Json:
    values = {
        "service": service, "python": sys.executable,
        "install_dir": str(folder / "a checkout"), "data_dir": str(folder / ".ocp"),
        "env_file": str(folder / ".ocp/ocp.env"), "launcher": None,
        "record_path": str(folder / ".ocp/install.json"), "home": str(folder), "account": "",
        "port": 3456, "bind": "127.0.0.1", **fields}
    return setup.Installation(**values)


@pytest.mark.parametrize("home", ["plain", NASTY, "a[b]{c,d}*?", "back\\slash %h $$ %%"])
def test_a_unit_names_its_files_whatever_they_are_called(home: str, tmp_path: Path) -> None:
    folder = tmp_path / home
    (folder / ".ocp").mkdir(parents=True)
    (folder / ".ocp/ocp.env").write_text("A=1\n")
    service = setup.systemd_service(str(folder), "ocp.service", is_system=False)
    install = installation(folder, service)
    unit = tmp_path / "ocp.service"
    unit.write_text(setup.systemd_unit(install))
    command, env = fake_services.unit_command(unit)
    assert command == [sys.executable, str(folder / "a checkout/ocp_server.py")]
    assert env == {"A": "1"}


def system_installation(folder: Path, **fields: Json) -> Json:
    """A service of the machine with all its files below `folder`."""
    service = setup.systemd_service(str(folder / "units"), "ocp.service", is_system=True)
    values = {
        "data_dir": str(folder / "lib/ocp"), "env_file": str(folder / "etc/ocp/ocp.env"),
        "launcher": str(folder / "bin/ocp"), "account": "nobody", **fields}
    return installation(folder, service, **values)


@pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
@pytest.mark.parametrize("is_system", [False, True])
def test_systemd_itself_finds_nothing_wrong_with_the_unit(is_system: bool, tmp_path: Path) -> None:
    folder = tmp_path / NASTY
    (folder / "a checkout").mkdir(parents=True)
    service = setup.systemd_service(str(folder), "ocp.service", is_system=False)
    install = installation(folder, service)
    if is_system:
        install = system_installation(folder, data_dir="/var/lib/ocp", port=80, account="ocp")
    unit = tmp_path / "ocp.service"
    unit.write_text(setup.systemd_unit(install))
    verify = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_agent_is_read_back_as_it_was_meant(tmp_path: Path) -> None:
    service = setup.launchd_service(str(tmp_path), "gui/501", "dev.ocp.server", "/log")
    install = installation(tmp_path / NASTY, service)
    agent = plistlib.loads(setup.launchd_plist(install))
    assert agent["Label"] == "dev.ocp.server"
    assert agent["ProgramArguments"][-3:] == [
        install.env_file, install.python, install.server_path]
    assert agent["RunAtLoad"] is True and agent["KeepAlive"] is True
    assert "EnvironmentVariables" not in agent


def test_the_machine_s_unit_is_shut_in_but_leaves_claude_what_it_needs(tmp_path: Path) -> None:
    text = setup.systemd_unit(system_installation(tmp_path, data_dir="/var/lib/ocp"))
    for line in ("User=nobody", "StateDirectory=ocp", "NoNewPrivileges=yes",
                 "ProtectSystem=strict", "ProtectHome=yes", "CapabilityBoundingSet="):
        assert f"\n{line}\n" in text
    assert "MemoryDenyWriteExecute" not in text and "PrivateNetwork" not in text
    low = setup.systemd_unit(system_installation(tmp_path, port=443))
    assert "AmbientCapabilities=CAP_NET_BIND_SERVICE\n" in low


@pytest.mark.parametrize("bind, url", [
    ("127.0.0.1", "http://127.0.0.1:3456"), ("0.0.0.0", "http://127.0.0.1:3456"),
    ("::", "http://127.0.0.1:3456"), ("::1", "http://[::1]:3456"),
    ("192.168.1.5", "http://192.168.1.5:3456"),
])
def test_the_service_has_an_address_that_this_machine_can_use(
    bind: str, url: str, tmp_path: Path
) -> None:
    assert installation(tmp_path, setup.NO_SERVICE, bind=bind).url == url


# ---------------------------------------------------------------------------
# A whole installation
# ---------------------------------------------------------------------------

@pytest.mark.slow
def test_a_service_is_installed_runs_and_answers_and_a_second_run_changes_nothing(
    linux: InstallMachine
) -> None:
    linux.services.set("run")
    done = linux.install()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "It answered 'You said: Say hello in one word.'" in done.stdout
    health = http_call(linux.port, "GET", "/health").json()
    assert health["claudeBinaryOk"] is True
    assert linux.services.get("enabled") == linux.services.get("active") == {"ocp.service"}
    assert linux.services.get("lingers") == {USER}

    record = linux.record()
    assert record["actions"] and {**record, "actions": [], "installed_at": ""} == {
        "version": 1, "installed_at": "", "platform": "systemd-user", "label": "ocp.service",
        "unit_path": str(linux.unit), "python": setup.stable_python(),
        "server_path": str(linux.checkout / "ocp_server.py"), "install_dir": str(linux.checkout),
        "data_dir": str(linux.ocp), "env_file": str(linux.env_file), "port": linux.port,
        "bind": "127.0.0.1", "url": f"http://127.0.0.1:{linux.port}",
        "commands": {verb: [{"command": ["systemctl", "--user", verb, "ocp.service"]}]
                     for verb in ("start", "stop", "restart", "enable", "is-enabled")},
        "launcher": str(linux.launcher), "complete": True, "actions": []}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["installed_at"])
    assert all(entry.keys() >= {"kind", "path", "backup"} for entry in record["actions"])

    files, calls = linux.files(), linux.services.calls()
    again = linux.install()
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing to change" in again.stdout
    changed = {name for name, state in linux.files().items() if files.get(name) != state}
    assert not {name for name in changed if not name.startswith(".ocp/logs/")}
    new_calls = linux.services.calls()[len(calls):]
    assert not [call for call in new_calls if re.search("enable-|restart|reload| enable ", call)]


def test_the_gateway_to_chats_is_a_second_service_that_the_uninstaller_removes(
    quick: InstallMachine
) -> None:
    refused = quick.install("--channels", "--no-start")
    assert refused.returncode == 2 and "ocp_channels.py is not there" in refused.stderr
    (quick.checkout / "ocp_channels.py").write_text("")
    refused = quick.install("--channels", "--no-start")
    assert refused.returncode == 2 and "No chat is joined yet" in refused.stderr
    quick.ocp.mkdir(exist_ok=True)
    (quick.ocp / "channels.json").write_text("{}")
    done = quick.install("--channels", "--no-start")
    assert done.returncode == 0, done
    unit = quick.unit.with_name("ocp-channels.service")
    text = unit.read_text()
    assert f'{quick.checkout}/ocp_channels.py'.replace("%", "%%").replace('"', '\\"').replace(
        "$", "$$") in text and text.count('" "start"') == 1
    assert "RestartPreventExitStatus=2" in text and "OCP_HOME=" in text
    assert quick.services.get("enabled") == {"ocp.service", "ocp-channels.service"}
    again = quick.install("--channels", "--no-start")
    assert again.returncode == 0 and "nothing to change" in again.stdout, again
    assert quick.uninstall().returncode == 0
    assert not unit.exists() and quick.services.get("enabled") == set()


@pytest.mark.parametrize("words", [["--system"], []])
def test_the_gateway_to_chats_needs_a_service_manager_of_the_user(words: list[str]) -> None:
    service = setup.systemd_service("/etc/systemd/system", "ocp.service", is_system=bool(words))
    if not words:
        service = setup.NO_SERVICE
    with pytest.raises(setup.Problem, match="--channels needs a service of your own"):
        setup.channels_service(service, "/home/me", "")


def test_the_agent_of_the_chats_for_launchd_starts_again_only_after_a_failure(
    tmp_path: Path
) -> None:
    service = setup.launchd_service("/Users/me", "gui/501", "dev.ocp.server", "")
    install = installation(tmp_path, service)
    agent = setup.channels_service(service, "/Users/me", "")
    found = plistlib.loads(setup.channels_plist(install, agent))
    assert found["Label"] == "dev.ocp.channels" and found["KeepAlive"] == {"SuccessfulExit": False}
    assert found["ProgramArguments"][-1] == "start"
    assert agent.unit_path.endswith("dev.ocp.channels.plist")


@pytest.mark.exhaustive
def test_a_service_with_a_certificate_is_asked_over_https(linux: InstallMachine) -> None:
    linux.services.set("run")
    linux.ocp.mkdir()
    for name, text in (("cert.pem", CERT), ("key.pem", KEY)):
        (linux.ocp / name).write_text(text)
    linux.env_file.write_text("".join(
        f"{variable}={setup.quoted(str(linux.ocp / name))}\n"
        for variable, name in (("OCP_TLS_CERT", "cert.pem"), ("OCP_TLS_KEY", "key.pem"))))

    done = linux.install("--port", str(linux.port))

    assert done.returncode == 0 and "It answered" in done.stdout, done
    assert linux.record()["url"] == f"https://127.0.0.1:{linux.port}"
    # Nobody here trusts that certificate, and it is the server's own machine.
    status = subprocess.run(
        [sys.executable, str(REPO / "ocp.py"), "health"], env=linux.env(), text=True,
        capture_output=True, timeout=120)
    assert status.returncode == 0 and "OCP is ok" in status.stdout, status


@pytest.mark.exhaustive
def test_openclaw_is_told_and_the_uninstaller_takes_that_back(openclaw: InstallMachine) -> None:
    done = openclaw.install("--skip-answer")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "make OCP a provider of OpenClaw (--no-openclaw" in done.stdout
    assert "OCP is a provider of OpenClaw now." in done.stdout
    assert "there is no fallback" in done.stdout and "every 30 minutes" in done.stdout
    text = openclaw.openclaw.read_text()
    assert "// mine" in text and f"http://127.0.0.1:{openclaw.port}/v1" in text
    assert '"custom-local"' in text and '"claude-local/claude-sonnet-5-5"' in text

    again = openclaw.install("--skip-answer")
    assert again.returncode == 0 and "nothing to change" in again.stdout
    assert "OpenClaw" not in again.stdout and openclaw.openclaw.read_text() == text

    gone = openclaw.uninstall()
    assert gone.returncode == 0 and "--undo --only openclaw" in gone.stdout, gone
    assert openclaw.openclaw.read_text() == OPENCLAW
    assert not (openclaw.home / ".config/ocp").exists()


@pytest.mark.exhaustive
def test_openclaw_may_be_left_out(openclaw: InstallMachine) -> None:
    done = openclaw.install("--skip-answer", "--no-openclaw")
    assert done.returncode == 0 and "OpenClaw" not in done.stdout
    assert openclaw.openclaw.read_text() == OPENCLAW


@pytest.mark.exhaustive
def test_openclaw_is_told_the_shared_key_under_a_chosen_name(openclaw: InstallMachine) -> None:
    done = openclaw.install(
        "--skip-answer", "--auth-mode", "shared", "--provider-name", "my-claude")
    assert "OCP is a provider of OpenClaw now." in done.stdout, done
    key = openclaw.settings()["PROXY_API_KEY"]
    assert key not in done.stdout + openclaw.openclaw.read_text()
    assert (openclaw.home / ".config/ocp/key").read_text() == key
    assert '"my-claude/claude-sonnet-5-5"' in openclaw.openclaw.read_text()


@pytest.mark.exhaustive
def test_with_keys_for_devices_the_commands_are_named(openclaw: InstallMachine) -> None:
    done = openclaw.install("--skip-answer", "--auth-mode", "multi")
    assert done.returncode == 0 and "ocp keys add openclaw" in done.stdout, done
    assert f"ocp connect http://127.0.0.1:{openclaw.port} --only openclaw --key" in done.stdout
    assert openclaw.openclaw.read_text() == OPENCLAW


@pytest.mark.exhaustive
def test_what_openclaw_cannot_be_told_is_said_and_ends_nothing(openclaw: InstallMachine) -> None:
    openclaw.openclaw.write_text("{ broken")
    done = openclaw.install("--skip-answer")
    assert done.returncode == 0 and re.search("OpenClaw: .*openclaw.json", done.stdout), done
    assert openclaw.openclaw.read_text() == "{ broken"


@pytest.mark.exhaustive
def test_without_a_start_the_command_for_openclaw_is_named(openclaw: InstallMachine) -> None:
    done = openclaw.install("--no-start")
    assert f"ocp connect http://127.0.0.1:{openclaw.port} --only openclaw" in done.stdout
    assert openclaw.openclaw.read_text() == OPENCLAW


def test_files_are_for_the_right_eyes_only(quick: InstallMachine) -> None:
    assert quick.install("--no-start").returncode == 0
    assert mode(quick.ocp) == 0o700
    assert mode(quick.env_file) == mode(quick.ocp / "install.json") == 0o600
    assert mode(quick.unit) == 0o644
    assert mode(quick.launcher) == 0o755


@pytest.mark.exhaustive
def test_the_launcher_runs_ocp_with_its_arguments(linux: InstallMachine) -> None:
    assert linux.install("--no-start", env={"OCP_HOME": f"{linux.home}/else where"}).returncode == 0
    done = subprocess.run(
        [linux.launcher, "two words", "$x"], env=linux.env(), capture_output=True, text=True,
        check=True)
    assert done.stdout == "ocp two words $x\n"
    assert f"{NASTY.partition(chr(39))[0]}" in linux.launcher.read_text()
    assert (linux.home / "else where/install.json").exists() and not linux.ocp.exists()


def test_no_start_installs_and_starts_nothing(quick: InstallMachine) -> None:
    done = quick.install("--no-start")
    assert done.returncode == 0, done.stderr
    assert quick.services.get("enabled") == {"ocp.service"}
    assert not quick.services.get("active")
    assert "systemctl --user restart ocp.service" in done.stdout
    assert "nothing to change" in quick.install("--no-start").stdout


@pytest.mark.slow
def test_a_dry_run_shows_the_plan_and_writes_nothing(linux: InstallMachine) -> None:
    done = linux.install("--dry-run", "--auth-mode", "shared")
    assert done.returncode == 0
    for line in ("write ~/.ocp/ocp.env", "PROXY_API_KEY=(secret)", "enable ocp.service",
                 "write ~/.local/bin/ocp", "Nothing was changed."):
        assert line in done.stdout
    assert linux.files() == linux.before
    changing = re.compile(" (enable|disable|restart|daemon-reload|enable-linger)( |$)")
    assert not [call for call in linux.services.calls() if changing.search(call)]


def test_a_closed_standard_input_is_no_terminal(
    linux: InstallMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    host = setup.this_host(linux.env())
    with pytest.raises(setup.Problem, match="--yes"):
        setup.confirm("Go on?", False, host.stdin, sys.stdout)


def test_without_a_terminal_nothing_is_done_unasked(quick: InstallMachine) -> None:
    done = quick.run("setup.py_install.py", "--port", str(quick.port), stdin="y\n")
    assert done.returncode == 2 and "--yes" in done.stderr
    assert quick.files() == quick.before


def test_a_no_on_the_terminal_changes_nothing(
    quick: InstallMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    host = quick.host("Linux", uid=os.getuid(), stdin=Stream("n\n", terminal=True))
    assert setup.main(["--port", str(quick.port)], host) == 1
    assert "Nothing was changed" in capsys.readouterr().err and quick.files() == quick.before


# ---------------------------------------------------------------------------
# Settings: where they come from, and which are refused
# ---------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("args, words", [
    (("--bind", "0.0.0.0"), ("--auth-mode shared", "--auth-mode multi", "--auth-mode none")),
    (("--port", "0"), ("CLAUDE_PROXY_PORT", "rely on")),
    (("--default-model", "a\nb"), ("OCP_DEFAULT_MODEL", "line break")),
    *rest(
        (("--port", "70000"), ("CLAUDE_PROXY_PORT", "65535")),
        (("--port", "many"), ("CLAUDE_PROXY_PORT", "whole number")),
        (("--auth-mode", "open"), ("CLAUDE_AUTH_MODE", "shared")),
        (("--default-model", "gpt"), ("OCP_DEFAULT_MODEL",))),
])
def test_what_cannot_work_is_refused_before_anything_is_done(
    args: tuple[str, ...], words: tuple[str, ...], linux: InstallMachine
) -> None:
    done = linux.install(*args)
    assert done.returncode == 2, done.stdout
    assert all(word in done.stderr for word in words), done.stderr
    assert linux.files() == linux.before


def test_a_port_in_use_is_refused(linux: InstallMachine) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", linux.port))
        other.listen()
        done = linux.install()
    assert done.returncode == 2 and "--port" in done.stderr
    assert linux.files() == linux.before


def test_mode_shared_without_a_key_gets_one_that_only_the_owner_sees(quick: InstallMachine) -> None:
    done = quick.install("--no-start", "--auth-mode", "shared", "--bind", "0.0.0.0")
    assert done.returncode == 0, done.stderr
    key = quick.settings()["PROXY_API_KEY"]
    assert re.fullmatch(r"ocp_[\w-]{32}", key)
    assert key not in done.stdout + quick.unit.read_text() + json.dumps(quick.record())
    assert "PROXY_API_KEY in ~/.ocp/ocp.env" in done.stdout
    assert quick.install("--no-start").returncode == 0
    assert quick.settings()["PROXY_API_KEY"] == key


def test_secrets_of_the_shell_go_into_the_settings_file_and_nowhere_else(
    quick: InstallMachine
) -> None:
    secrets = {
        "PROXY_API_KEY": "shared-key-1234", "OCP_ADMIN_KEY": "admin key $1",
        "CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-x", "HTTPS_PROXY": "http://u:p@proxy:1"}
    done = quick.install("--no-start", env=secrets)
    assert done.returncode == 0, done.stderr
    assert secrets.items() <= quick.settings().items()
    shown = quick.unit.read_text() + quick.launcher.read_text() + json.dumps(quick.record())
    assert not [name for name, value in secrets.items() if value in shown]
    assert not [name for name in setup.SECRETS if name in secrets and secrets[name] in done.stdout]


def test_a_service_does_not_depend_on_files_that_undo_of_ocp_connect_removes(
    quick: InstallMachine
) -> None:
    done = quick.install("--no-start", env={
        "SSL_CERT_FILE": "/home/u/.config/ocp/ca-bundle.pem",
        "NODE_EXTRA_CA_CERTS": "/etc/corp.pem"})
    assert done.returncode == 0, done.stderr
    assert quick.settings()["NODE_EXTRA_CA_CERTS"] == "/etc/corp.pem"
    assert "SSL_CERT_FILE" not in quick.settings()


def test_what_the_user_put_into_the_file_stays_and_options_change_only_theirs(
    quick: InstallMachine
) -> None:
    quick.install("--no-start", "--default-model", "opus")
    text = quick.env_file.read_text() + "# my own\nCLAUDE_TIMEOUT=5000\nPROXY_API_KEY='its key'\n"
    quick.env_file.write_text(text)
    done = quick.install("--no-start", "--default-model", "haiku",
                         env={"PROXY_API_KEY": "another-key"})
    assert done.returncode == 0, done.stderr
    assert quick.env_file.read_text() == text.replace("OPENAI", "").replace("=opus", "=haiku")
    assert "PROXY_API_KEY of this shell is not the service's" in done.stdout


@pytest.mark.exhaustive
def test_a_changed_setting_restarts_the_service(linux: InstallMachine) -> None:
    linux.services.set("run")
    assert linux.install("--skip-answer").returncode == 0
    done = linux.install("--skip-answer", "--default-model", "haiku")
    assert done.returncode == 0, done.stdout + done.stderr
    assert linux.services.calls().count("systemctl --user restart ocp.service") == 2
    assert "It answered" not in done.stdout


def original_unit(machine: InstallMachine, *lines: str, name: str = "ocp-proxy.service") -> Path:
    """A service of the original on the port of this machine, with more lines in its unit; it is
    enabled and runs."""
    machine.unit.parent.mkdir(parents=True, exist_ok=True)
    unit = machine.unit.with_name(name)
    unit.write_text("\n".join([
        "[Service]", "ExecStart=node server.mjs", "Environment=NODE_ENV=production",
        f"Environment=CLAUDE_PROXY_PORT={machine.port}", *lines, ""]))
    unit.chmod(0o600)
    machine.services.set("enabled", name)
    machine.services.set("active", name)
    return unit


@pytest.mark.parametrize("name", setup.LEGACY_UNITS)
def test_the_original_s_service_gives_way_and_its_settings_are_taken_over(
    name: str, quick: InstallMachine
) -> None:
    old = original_unit(
        quick, "Environment=OCP_ADMIN_KEY=old-admin%%key",
        'Environment="CLAUDE_SYSTEM_PROMPT=be brief"', name=name)
    before = quick.files()
    shown = quick.run("setup.py_install.py", "--dry-run", "--no-start").stdout
    assert f"disable --now {name}" in shown and f"{name} away, and keep it" in shown
    assert "old-admin" not in shown and quick.files() == before
    done = quick.run("setup.py_install.py", "--yes", "--no-start")
    assert done.returncode == 0, done.stderr
    settings = quick.settings()
    assert settings["CLAUDE_PROXY_PORT"] == str(quick.port)
    assert settings["OCP_ADMIN_KEY"] == "old-admin%key"
    assert settings["CLAUDE_SYSTEM_PROMPT"] == "be brief" and "NODE_ENV" not in settings
    assert not old.exists() and quick.services.get("enabled") == {"ocp.service"}
    assert {"kind": "move_file", "path": str(old), "backup": f"{old}.ocp-backup",
            "then": ["systemctl", "--user", "daemon-reload"]} in quick.record()["actions"]
    assert "nothing to change" in quick.run("setup.py_install.py", "--yes", "--no-start").stdout
    assert quick.uninstall().returncode == 0
    assert quick.services.get("enabled") == quick.services.get("active") == {name}
    place = str(old.relative_to(quick.home))
    assert quick.files()[place] == before[place]
    assert not old.with_name(f"{name}.ocp-backup").exists()


def test_both_generations_of_the_original_give_way_and_the_newer_one_has_the_settings(
    quick: InstallMachine
) -> None:
    units = [original_unit(quick, f"Environment=OCP_INSTANCE_NAME={name}", name=name)
             for name in setup.LEGACY_UNITS]
    for kind in ("enabled", "active"):
        quick.services.set(kind, "\n".join(setup.LEGACY_UNITS))
    before = [unit.read_bytes() for unit in units]
    assert quick.install("--no-start").returncode == 0
    assert quick.settings()["OCP_INSTANCE_NAME"] == "ocp-proxy.service"
    assert quick.services.get("enabled") == {"ocp.service"}
    assert quick.uninstall().returncode == 0
    assert [unit.read_bytes() for unit in units] == before
    assert quick.services.get("enabled") == quick.services.get("active") == set(setup.LEGACY_UNITS)


def test_an_original_that_did_not_run_is_not_started_by_the_way_back(quick: InstallMachine) -> None:
    old = original_unit(quick)
    quick.services.set("active", "")
    assert quick.install("--no-start").returncode == 0 and not old.exists()
    assert quick.uninstall().returncode == 0
    assert quick.services.get("enabled") == {old.name} and not quick.services.get("active")
    assert old.exists()


def test_an_original_that_was_installed_again_gives_way_again_and_comes_back_as_it_is_then(
    quick: InstallMachine
) -> None:
    old = original_unit(quick)
    assert quick.install("--no-start").returncode == 0
    newer = original_unit(quick, "# newer").read_bytes()
    assert quick.install("--no-start").returncode == 0
    assert not old.exists() and quick.services.get("active") == set()
    assert quick.uninstall().returncode == 0
    assert old.read_bytes() == newer and quick.services.get("enabled") == {old.name}
    assert [path.name for path in old.parent.iterdir()] == [old.name]


def test_an_installation_over_the_original_interrupted_anywhere_gives_it_back(
    quick: InstallMachine
) -> None:
    old = original_unit(quick)
    before = contents(quick)
    for after in (False, True):
        at = 1
        while install_files(quick, at, after=after):
            assert uninstall.main(["--yes", "--purge"], quick.env(), "Linux") == 0
            assert contents(quick) == before, at
            assert quick.services.get("enabled") == quick.services.get("active") == {old.name}
            at += 1
        assert at > 7
        assert uninstall.main(["--yes", "--purge"], quick.env(), "Linux") == 0
        assert contents(quick) == before
        assert quick.services.get("enabled") == quick.services.get("active") == {old.name}


def test_who_wants_the_original_gone_too_says_so(quick: InstallMachine) -> None:
    old = original_unit(quick)
    assert quick.install("--no-start").returncode == 0
    assert "ocp-proxy.service" in quick.run("uninstall.py", "--dry-run", "--legacy").stdout
    assert quick.uninstall("--legacy").returncode == 0
    assert not old.exists() and not list(old.parent.iterdir())
    assert not quick.services.get("enabled") | quick.services.get("active")


def test_what_was_added_to_a_unit_of_the_original_is_taken_over_too(quick: InstallMachine) -> None:
    added = original_unit(quick, "Environment=CLAUDE_TIMEOUT=7000").with_name("ocp-proxy.service.d")
    added.mkdir()
    (added / "override.conf").write_text("[Service]\nEnvironment=CLAUDE_TIMEOUT=9000\n")
    assert quick.run("setup.py_install.py", "--yes", "--no-start").returncode == 0
    assert quick.settings()["CLAUDE_TIMEOUT"] == "9000"


@pytest.mark.exhaustive
def test_the_way_from_the_original_and_back_is_that_of_the_page(linux: InstallMachine) -> None:
    page = (REPO / "docs" / "migration.md").read_text("utf-8")
    for command in ("setup.py_install.py --dry-run", "setup.py_install.py", "uninstall.py",
                    "ocp_server.py --forget-original"):
        assert f"python3 {command}\n" in page
    linux.services.set("run")
    home = OriginalHome(linux.ocp)
    laptop, phone = home.key("laptop"), home.key("phone", quota_daily=0)
    home.usage(2, 1, "laptop")
    tables = home.tables()
    unit = original_unit(linux, "Environment=CLAUDE_AUTH_MODE=multi",
                         "Environment=OCP_ADMIN_KEY=of-the-original")
    before = linux.files()[str(unit.relative_to(linux.home))]

    shown = linux.run("setup.py_install.py", "--dry-run")
    assert shown.returncode == 0 and "every client needs a key" in shown.stdout
    done = linux.run("setup.py_install.py", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr

    def status(key: str, method: str = "POST", path: str = "/v1/chat/completions") -> int:
        body = {"messages": [{"role": "user", "content": "hi"}]} if method == "POST" else None
        return http_call(
            linux.port, method, path, body, {"Authorization": f"Bearer {key}"}).status

    assert [status(key) for key in (laptop, phone, "ocp_another")] == [200, 429, 401]
    assert status("of-the-original", "GET", "/api/keys") == 200
    assert "ORIGINAL" in linux.run("uninstall.py", "--dry-run", "--purge").stdout
    assert linux.uninstall().returncode == 0
    assert linux.files()[str(unit.relative_to(linux.home))] == before
    assert linux.services.get("enabled") == linux.services.get("active") == {unit.name}
    assert home.tables() == tables


#: What a service of the original has, what becomes of it, and a word of the sentence about it.
CHANGED_SETTINGS = (
    ({"CLAUDE_TUI_MODE": "true"}, {}, "warm processes"),
    ({"CLAUDE_BREAKER_WINDOW": "1"}, {}, "circuit breaker"),
    ({"OCP_LOCAL_TOOLS": "1"}, {}, "agent mode"),
    ({"OCP_SKIP_AUTH_TEST": "1"}, {}, "own scripts"),
    ({"CLAUDE_AUTH_MODE": "none", "PROXY_API_KEY": "k"}, {"CLAUDE_AUTH_MODE": "none"}, "ignored"),
    ({"CLAUDE_AUTH_MODE": "multi", "PROXY_API_KEY": "k"}, {"CLAUDE_AUTH_MODE": "multi"}, "ignored"),
    ({"PROXY_API_KEY": "k"}, {"PROXY_API_KEY": "k"}, "every client needs a key"),
    ({"PROXY_ANONYMOUS_KEY": "a"}, {}, "ignored"),
    ({"CLAUDE_AUTH_MODE": "multi", "PROXY_ANONYMOUS_KEY": "a"},
     {"CLAUDE_AUTH_MODE": "multi", "PROXY_ANONYMOUS_KEY": "a", "PROXY_ADVERTISE_ANON_KEY": "0"},
     "shown to nobody"),
    ({"CLAUDE_AUTH_MODE": "multi", "PROXY_ANONYMOUS_KEY": "a", "PROXY_ADVERTISE_ANON_KEY": "1"},
     {"CLAUDE_AUTH_MODE": "multi", "PROXY_ANONYMOUS_KEY": "a", "PROXY_ADVERTISE_ANON_KEY": "1"},
     "those on this machine too"),
    ({"CLAUDE_AUTH_MODE": "multi", "CLAUDE_ALLOWED_TOOLS": "Bash"}, {"CLAUDE_AUTH_MODE": "multi"},
     "gave claude no tools"),
    ({"CLAUDE_BIND": "0.0.0.0", "CLAUDE_MCP_CONFIG": "/m"}, {"CLAUDE_BIND": "0.0.0.0"},
     "whoever can connect"),
    ({"CLAUDE_SKIP_PERMISSIONS": "1"}, {}, "only the word true"),
    ({"CLAUDE_SKIP_PERMISSIONS": "true"}, {"CLAUDE_SKIP_PERMISSIONS": "true"}, ""),
    ({"CLAUDE_ALLOWED_TOOLS": "Read", "CLAUDE_TIMEOUT": "9000", "OCP_INSTANCE_NAME": "attic"},
     {"CLAUDE_ALLOWED_TOOLS": "Read", "CLAUDE_TIMEOUT": "9000", "OCP_INSTANCE_NAME": "attic"}, ""),
)


@pytest.mark.parametrize(("theirs", "ours", "why"), CHANGED_SETTINGS)
def test_a_setting_of_the_original_with_another_effect_here_is_told(
    theirs: dict[str, str], ours: dict[str, str], why: str
) -> None:
    values, notes = setup.settings_of_original(theirs)
    assert values == ours
    assert why in " ".join(notes) and bool(notes) is bool(why)


@pytest.mark.exhaustive
def test_settings_of_the_original_that_the_server_refuses_are_left_out_and_told(
    linux: InstallMachine
) -> None:
    original_unit(
        linux, "Environment=CLAUDE_TIMEOUT=7200000", "Environment=CLAUDE_MAX_QUEUE=many",
        "Environment=CLAUDE_CACHE_TTL=5000", "Environment=CLAUDE_TUI_MODE=true")
    done = linux.run("setup.py_install.py", "--yes", "--no-start")
    assert done.returncode == 0, done.stderr
    for name in ("CLAUDE_TIMEOUT", "CLAUDE_MAX_QUEUE", "CLAUDE_TUI_MODE"):
        assert name not in linux.settings() and name in done.stdout
    assert linux.settings()["CLAUDE_CACHE_TTL"] == "5000"


@pytest.mark.exhaustive
def test_a_mode_of_the_original_that_does_not_exist_is_no_open_door(linux: InstallMachine) -> None:
    original_unit(linux, "Environment=CLAUDE_AUTH_MODE=everybody")
    refused = linux.run("setup.py_install.py", "--yes", "--no-start")
    assert refused.returncode == 2 and "CLAUDE_AUTH_MODE" in refused.stderr
    assert "ocp.env comes before" in refused.stderr
    done = linux.run("setup.py_install.py", "--yes", "--no-start", "--auth-mode", "none")
    assert done.returncode == 0, done.stderr


def test_an_original_on_another_port_is_left_alone(quick: InstallMachine) -> None:
    quick.unit.parent.mkdir(parents=True)
    old = quick.unit.with_name("ocp-proxy.service")
    old.write_text("[Service]\nEnvironment=CLAUDE_PROXY_PORT=1\n")
    quick.services.set("enabled", old.name)
    assert quick.install("--no-start").returncode == 0
    assert quick.services.get("enabled") == {old.name, "ocp.service"}


# ---------------------------------------------------------------------------
# When something is missing or fails
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
def test_without_claude_all_is_installed_and_the_commands_are_named(linux: InstallMachine) -> None:
    linux.services.set("run")
    done = linux.install(env={"CLAUDE_BIN": "/nowhere/claude"})
    assert done.returncode == 3, done.stderr
    for words in ("npm install -g @anthropic-ai/claude-code", "claude auth login",
                  "claude setup-token", "CLAUDE_CODE_OAUTH_TOKEN", "~/.ocp/ocp.env"):
        assert words in done.stdout
    assert http_call(linux.port, "GET", "/health").json()["claudeBinaryOk"] is False


@pytest.mark.exhaustive
def test_a_lost_login_is_told_with_the_commands_that_mend_it(linux: InstallMachine) -> None:
    linux.services.set("run")
    refused = {"status": 401, "word": "authentication_failed", "text": "Please run /login"}
    linux.write_claude(turns=[[{"api_error": refused}]])
    done = linux.install()
    assert done.returncode == 3, done.stdout + done.stderr
    assert "claude setup-token" in done.stdout and "claude auth login" in done.stdout


@pytest.mark.exhaustive
def test_a_service_that_does_not_come_up_is_a_failure_that_says_where_to_look(
    linux: InstallMachine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "_START_TIMEOUT_S", 0.1)
    monkeypatch.setattr(setup.wait_for_version, "__defaults__", (0.1,))
    arguments = ["--yes", "--port", str(linux.port)]
    assert setup.main(arguments, linux.host("Linux")) == 1
    assert "journalctl --user -u ocp.service" in capsys.readouterr().err


def test_a_step_that_fails_ends_it_and_a_second_run_goes_on(quick: InstallMachine) -> None:
    quick.services.set("fail", "enable ocp.service")
    done = quick.install("--no-start")
    assert done.returncode == 1 and "it was told to fail" in done.stderr
    assert quick.record()["complete"] is False
    quick.services.set("fail", None)
    assert quick.install("--no-start").returncode == 0
    assert quick.record()["complete"] is True


def test_lingering_that_is_not_allowed_is_told_and_does_not_end_it(quick: InstallMachine) -> None:
    quick.services.set("fail", "enable-linger")
    done = quick.install("--no-start")
    assert done.returncode == 0
    assert f"sudo loginctl enable-linger {USER}" in done.stdout


def test_an_original_s_service_that_cannot_be_reached_is_told_and_its_settings_are_taken_over(
    quick: InstallMachine
) -> None:
    old = original_unit(quick, "Environment=CLAUDE_TIMEOUT=7000")
    quick.services.set("unreachable")
    done = quick.install("--no-start")

    assert done.returncode == 0, done.stderr
    assert "`systemctl --user disable --now ocp-proxy.service`" in done.stdout
    assert quick.settings()["CLAUDE_TIMEOUT"] == "7000" and old.exists()
    assert "disable" not in quick.services.calls()


def test_an_unreachable_systemd_is_told_and_files_are_installed_all_the_same(
    quick: InstallMachine
) -> None:
    quick.services.set("unreachable")
    done = quick.install()
    assert done.returncode == 0 and "enable-linger" in done.stdout
    assert quick.record()["platform"] == "none" and quick.env_file.exists()
    assert not quick.unit.exists()


@pytest.mark.exhaustive
def test_without_a_service_manager_the_command_to_start_by_hand_works(bare: InstallMachine) -> None:
    done = bare.install("--auth-mode", "multi", "--bind", "0.0.0.0")
    assert done.returncode == 0, done.stderr
    command = re.search(r"Start it by hand: (.*)", done.stdout)
    assert command
    again = subprocess.run(
        [sys.executable, str(REPO / "ocp.py"), "start"], env={"HOME": str(bare.home)}, text=True,
        capture_output=True, timeout=120)
    assert f"by hand: {command[1]}\n" in again.stderr
    with open(bare.folder / "output.txt", "wb") as output:
        process = subprocess.Popen(
            ["/bin/sh", "-c", f"exec {command[1]}"], stdout=output, stderr=output,
            env={"HOME": str(bare.home)}, start_new_session=True)
    try:
        eventually(lambda: is_up(bare.port))
        assert http_call(bare.port, "GET", "/health").json()["authMode"] == "multi"
        eventually(lambda: "Other devices: " in (bare.folder / "output.txt").read_text())
    finally:
        process.terminate()
        process.wait(120)


def is_up(port: int) -> bool:
    try:
        return http_call(port, "GET", "/health").status == 200
    except OSError:
        return False


def test_what_cannot_be_looked_at_is_said_before_anything_is_done(quick: InstallMachine) -> None:
    (quick.ocp / "install.json").mkdir(parents=True)
    done = quick.install("--no-start")
    assert done.returncode == 2 and "install.json" in done.stderr
    assert "Nothing was changed" in done.stderr and "run this again" not in done.stderr


def test_where_nothing_can_be_recorded_nothing_is_done_and_it_says_so(
    quick: InstallMachine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: str, *_: Json) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(setup, "write_whole", refuse)
    arguments = ["--yes", "--no-start", "--port", str(quick.port)]

    assert setup.main(arguments, quick.host("Linux", uid=os.getuid())) == 1

    said = capsys.readouterr().err
    assert f"setup: {quick.ocp}/install.json: Permission denied\nNothing was changed." in said
    assert "done so far" not in said and not [
        path for path in quick.ocp.rglob("*") if path.is_file()]


def test_a_line_that_sets_nothing_is_told_before_anything_is_done(quick: InstallMachine) -> None:
    quick.ocp.mkdir()
    (quick.ocp / "ocp.env").write_text("CLAUDE_BIND=127.0.0.1\nCLAUDE_AUTH_MODE multi\n")
    done = quick.install("--no-start")
    assert done.returncode == 2 and "ocp.env, line 2: write NAME=VALUE" in done.stderr, done
    assert "multi" not in done.stderr


def test_without_a_service_manager_a_port_in_use_is_told(bare: InstallMachine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = bare.run("setup.py_install.py", "--dry-run", "--port", str(port))
    assert f"Note: Nothing can listen on 127.0.0.1 port {port} now" in done.stdout, done


@pytest.mark.parametrize("name", ["a..b", "a" * 70])
def test_a_name_that_no_host_has_is_refused(quick: InstallMachine, name: str) -> None:
    done = quick.run("setup.py_install.py", "--yes", "--bind", name, "--auth-mode", "none")
    assert done.returncode == 2 and f"Nothing can listen on {name}" in done.stderr
    assert quick.files() == quick.before


def test_a_foreign_launcher_is_kept_and_comes_back(quick: InstallMachine) -> None:
    quick.launcher.parent.mkdir(parents=True)
    quick.launcher.write_text("somebody else's\n")
    quick.launcher.chmod(0o711)
    before = quick.files()
    assert "kept beside it" in quick.install("--no-start").stdout
    assert (quick.launcher.parent / "ocp.ocp-backup").read_text() == "somebody else's\n"
    assert "nothing to change" in quick.install("--no-start").stdout
    assert quick.uninstall("--purge").returncode == 0
    after = quick.files()
    assert {name: state[:2] for name, state in after.items()} == {
        name: state[:2] for name, state in before.items()}


@pytest.mark.parametrize("target", ["../../a checkout/ocp.py", "nowhere"])
def test_a_launcher_that_is_a_link_comes_back_as_one(quick: InstallMachine, target: str) -> None:
    quick.launcher.parent.mkdir(parents=True)
    quick.launcher.symlink_to(target)
    assert quick.install("--no-start").returncode == 0
    assert not quick.launcher.is_symlink() and "exec" in quick.launcher.read_text()
    assert (quick.checkout / "ocp.py").read_text().startswith("import sys")
    assert quick.uninstall("--purge").returncode == 0
    assert os.readlink(quick.launcher) == target


def test_settings_that_are_a_link_are_changed_where_it_leads(quick: InstallMachine) -> None:
    kept = quick.home / "dotfiles.env"
    kept.write_text("# mine\n")
    quick.ocp.mkdir()
    quick.env_file.symlink_to(kept)
    assert quick.run("setup.py_install.py", "--yes", "--no-start").returncode == 0
    assert quick.env_file.is_symlink() and "CLAUDE_PROXY_PORT" in kept.read_text()
    assert "nothing to change" in quick.install("--no-start").stdout


def test_a_unit_that_its_owner_changed_is_not_lost(quick: InstallMachine) -> None:
    quick.install("--no-start")
    mine = quick.unit.read_text() + "Environment=CLAUDE_TIMEOUT=7000\n"
    quick.unit.write_text(mine)
    assert quick.install("--no-start").returncode == 0
    assert quick.unit.with_name("ocp.service.ocp-backup").read_text() == mine
    assert quick.settings()["CLAUDE_TIMEOUT"] == "7000"


# ---------------------------------------------------------------------------
# Interruptions
# ---------------------------------------------------------------------------

class PowerCut(BaseException):
    """The machine is off: nothing more is done."""


def install_files(machine: InstallMachine, at: int = 0, *, after: bool = False) -> bool:
    """Installs without a start, on settings that nobody judges. Ends before, or after, action
    number `at`; whether it did."""
    host = machine.host("Linux", uid=os.getuid())
    options = setup.argument_parser().parse_args(["--port", str(machine.port)])
    service, _ = setup.find_service(host, str(machine.ocp), is_system=False)
    install = setup.planned_installation(host, options, service)
    found = setup.inspect(host, service, install.env_file, install.record_path)
    values = setup.planned_values(host, options, install, found)
    install = setup.with_address(install, values)
    done = 0

    def performer(host: Json, action: Json, entry: Json) -> str:
        nonlocal done
        done += 1
        if done == at and not after:
            raise PowerCut
        words: str = setup.perform(host, action, entry)
        if done == at:
            raise PowerCut
        return words

    situation = setup.Situation(host, install, found, values, False, False)
    record = setup.Record(install, found.record)
    try:
        setup.apply(host, setup.plan(situation), record, lambda line: None, performer)
    except PowerCut:
        return True
    return False


def contents(machine: InstallMachine) -> dict[str, Json]:
    """What is below HOME, without times and without the record."""
    return {
        name: state[:2] for name, state in machine.files().items() if name != ".ocp/install.json"}


@pytest.mark.parametrize("after", [False, True])
def test_an_installation_interrupted_anywhere_is_undone_by_uninstall(
    after: bool, quick: InstallMachine
) -> None:
    quick.launcher.parent.mkdir(parents=True)
    quick.launcher.write_text("somebody else's\n")
    before = contents(quick)
    at = 1
    while install_files(quick, at, after=after):
        assert uninstall.main(["--yes", "--purge"], quick.env(), "Linux") == 0
        assert contents(quick) == before, at
        assert not quick.services.get("enabled") | quick.services.get("lingers")
        at += 1
    assert at > 6


def test_an_installation_interrupted_anywhere_is_finished_by_a_second_run(
    quick: InstallMachine
) -> None:
    assert not install_files(quick)
    whole = contents(quick)
    at = 0
    while True:
        assert uninstall.main(["--yes", "--purge"], quick.env(), "Linux") == 0
        at += 1
        if not install_files(quick, at, after=True):
            break
        assert quick.record()["complete"] is False
        assert not install_files(quick)
        assert contents(quick) == whole
        assert quick.record()["complete"] is True
    assert at > 6


def test_a_write_interrupted_anywhere_leaves_nothing_half_done(quick: InstallMachine) -> None:
    quick.launcher.parent.mkdir(parents=True)
    quick.launcher.write_text("somebody else's\n")
    before = contents(quick)
    for name in ("fsync", "chmod", "replace"):
        at = 1
        while install_until(quick, name, at):
            assert uninstall.main(["--yes", "--purge"], quick.env(), "Linux") == 0
            assert contents(quick) == before, (name, at)
            at += 1
        assert at > 6
        assert uninstall.main(["--yes", "--purge"], quick.env(), "Linux") == 0


def install_until(machine: InstallMachine, name: str, at: int) -> bool:
    """An installation in which call number `at` of os.NAME never comes back; whether it did."""
    real, calls = getattr(os, name), 0

    def failing(*arguments: Json) -> Json:
        nonlocal calls
        calls += 1
        if calls == at:
            raise PowerCut
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup.os, name, failing)
        return install_files(machine)


@pytest.mark.slow
def test_a_killed_installer_leaves_a_record_that_undoes_everything(linux: InstallMachine) -> None:
    linux.services.set("kill", "enable ocp.service")
    assert linux.install("--no-start").returncode == -signal.SIGKILL
    linux.services.set("kill", None)
    assert linux.unit.exists()
    assert linux.uninstall("--purge").returncode == 0
    assert linux.files() == linux.before


# ---------------------------------------------------------------------------
# launchd, and services of the machine
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
def test_an_agent_is_installed_started_and_taken_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mac = InstallMachine(tmp_path, "launchctl")
    mac.services.set("run")
    host = mac.host("Darwin")
    agent = mac.home / "Library/LaunchAgents/dev.ocp.server.plist"
    arguments = ["--yes", "--port", str(mac.port)]
    try:
        assert setup.main(arguments, host) == 0, capsys.readouterr()
        assert "It answered" in capsys.readouterr().out
        assert mac.record()["platform"] == "launchd" and mac.record()["unit_path"] == str(agent)
        assert setup.main(["--yes"], host) == 0
        assert "nothing to change" in capsys.readouterr().out
        assert setup.main(["--yes", "--skip-answer", "--default-model", "haiku"], host) == 0
        steps = [call for call in mac.services.calls() if " print " not in call]
        assert [call.split()[1] for call in steps] == [
            "enable", "bootstrap", "bootout", "bootstrap"]
        assert mac.uninstall("--purge").returncode == 0
    finally:
        mac.services.stop()
    assert mac.files() == mac.before and not mac.services.get("active")


@pytest.mark.exhaustive
def test_an_agent_that_was_installed_over_ssh_alone_stays_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mac = InstallMachine(tmp_path, "launchctl")
    mac.services.set("run")
    mac.services.set("headless")
    host = mac.host("Darwin")
    try:
        arguments = ["--yes", "--port", str(mac.port), "--skip-answer"]
        assert setup.main(arguments, host) == 0, capsys.readouterr()
        (step,) = mac.record()["commands"]["is-enabled"]
        assert step["command"] == ["launchctl", "print", "user/501/dev.ocp.server"]
        # Somebody logs in on the screen.
        mac.services.set("headless", None)
        assert setup.main(["--yes", "--skip-answer"], host) == 0
        assert "nothing to change" in capsys.readouterr().out
        assert mac.uninstall("--purge").returncode == 0
    finally:
        mac.services.stop()
    assert mac.files() == mac.before and not mac.services.get("active")


@pytest.mark.exhaustive
def test_an_agent_of_the_original_gives_way_and_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mac = InstallMachine(tmp_path, "launchctl")
    agents = mac.home / "Library/LaunchAgents"
    agents.mkdir(parents=True)
    variables = {"CLAUDE_PROXY_PORT": str(mac.port), "OCP_ADMIN_KEY": "old"}
    old = {"Label": "dev.ocp.proxy", "EnvironmentVariables": variables}
    (agents / "dev.ocp.proxy.plist").write_bytes(plistlib.dumps(old))
    mac.services.set("active", "dev.ocp.proxy")
    assert setup.main(["--yes", "--no-start"], mac.host("Darwin")) == 0
    assert variables.items() <= mac.settings().items()
    assert not mac.services.get("active") and not (agents / "dev.ocp.proxy.plist").exists()
    assert mac.uninstall().returncode == 0
    assert mac.services.get("active") == {"dev.ocp.proxy"}
    assert (agents / "dev.ocp.proxy.plist").read_bytes() == plistlib.dumps(old)


def test_a_service_of_the_machine_has_its_settings_and_state_outside_of_any_home(
    tmp_path: Path
) -> None:
    machine = InstallMachine(tmp_path, "systemctl", "useradd", home="plain")
    folder = tmp_path / "root"
    folder.mkdir()
    install = system_installation(
        folder, account="ocp-that-is-not-there", install_dir=str(machine.checkout),
        record_path=str(folder / "record/install.json"), port=machine.port)
    host = machine.host("Linux", uid=0)
    found = setup.inspect(host, install.service, install.env_file, install.record_path)
    options = setup.argument_parser().parse_args(["--system", "--port", str(machine.port)])
    values = setup.planned_values(host, options, install, found)
    situation = setup.Situation(host, install, found, values, True, False)
    record = setup.Record(install, None)
    setup.apply(host, setup.plan(situation), record, lambda line: None)
    assert mode(folder / "etc/ocp/ocp.env") == 0o600
    assert values["OCP_HOME"] == str(folder / "lib/ocp")
    assert not values["PATH"].startswith(str(machine.home))
    calls = machine.services.calls()
    assert any(call.startswith("useradd --system") for call in calls)
    assert "systemctl enable ocp.service" in calls and "systemctl restart ocp.service" in calls
    assert machine.files() == machine.before


@pytest.mark.parametrize("fields, words", [
    ({"uid": 501}, "sudo"), ({"system": "Darwin"}, "needs systemd"), ({"uid": 0}, "/opt/ocp"),
])
def test_a_service_of_the_machine_is_refused_where_it_cannot_work(
    fields: dict[str, Json], words: str, linux: InstallMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    host = linux.host(**{"system": "Linux", **fields})
    # Never without --dry-run: these tests may run as root.
    assert setup.main(["--system", "--dry-run"], host) == 2
    assert words in capsys.readouterr().err
    assert linux.files() == linux.before


@pytest.mark.parametrize("name, mode", [
    ("opt", 0o777), ("opt/ocp", 0o775), ("opt/ocp/ocp.py", 0o664), ("opt/ocp/.git/config", 0o666),
    ("opt/ocp/ocp-plugin", 0o757)])
def test_root_is_not_made_to_run_what_others_may_write(
    name: str, mode: int, tmp_path: Path
) -> None:
    here = tmp_path / "opt" / "ocp"
    (here / ".git").mkdir(parents=True)
    (here / "ocp-plugin").mkdir()
    for file in ("ocp.py", ".git/config"):
        (here / file).touch()
    for path in (tmp_path, tmp_path / "opt", here, *here.rglob("*")):
        path.chmod(0o755)
    owners = (0, os.getuid())
    assert setup.writable_by_others(str(here), owners) == ""
    # A file of a user is as bad as one that everybody may write.
    assert setup.writable_by_others(str(here), (os.getuid() + 1,)) != ""
    if os.getuid() == 0:
        # What the group of root may write is root's.
        os.chown(tmp_path / name, -1, 65534)

    (tmp_path / name).chmod(mode)

    assert setup.writable_by_others(str(here), owners) == str(tmp_path / name)
    # In a folder like /tmp nobody can replace the files of another.
    if (tmp_path / name).is_dir():
        (tmp_path / name).chmod(mode | stat.S_ISVTX)
        assert setup.writable_by_others(str(here), owners) == ""


def test_the_refusal_of_a_folder_that_others_may_write_says_how_to_mend_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "is_readable_by_all", lambda path: True)
    monkeypatch.setattr(setup, "writable_by_others", lambda here: f"{here}/ocp.py")
    with pytest.raises(setup.Problem, match="chown -R root:root"):
        setup.python_for(str(tmp_path), is_system=True)
    assert setup.python_for(str(tmp_path), is_system=False)


@pytest.mark.parametrize("drain, stop_s", [
    ("", 45), ("120000", 145), ("1", 26), ("600000", 625), ("2m", 145), ("90 S", 115)])
def test_the_service_manager_waits_as_long_as_answers_may_take(
    drain: str, stop_s: int, tmp_path: Path
) -> None:
    values = {"CLAUDE_PROXY_PORT": "3456", "CLAUDE_BIND": "127.0.0.1", "OCP_DRAIN": drain}
    install = setup.with_address(
        installation(tmp_path, setup.systemd_service(str(tmp_path), "x", is_system=False)), values)
    assert f"TimeoutStopSec={stop_s}\n" in setup.systemd_unit(install)
    assert plistlib.loads(setup.launchd_plist(install))["ExitTimeOut"] == stop_s


def test_sudo_without_system_is_refused(
    linux: InstallMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    host = linux.host("Linux", uid=0, environ=linux.env({"SUDO_USER": "alice"}))
    assert setup.main(["--yes"], host) == 2
    assert "--system" in capsys.readouterr().err


# ---------------------------------------------------------------------------
# The container, and the page about installing
# ---------------------------------------------------------------------------

def dockerfile() -> str:
    return (REPO / "Dockerfile").read_text().replace("\\\n", " ")


def test_the_health_check_of_the_image_tells_up_from_down(tmp_path: Path) -> None:
    check = re.search(r"^HEALTHCHECK .*CMD (\[.*\])$", dockerfile(), re.M)
    assert check
    command = [sys.executable, *json.loads(check[1])[1:]]
    for number, settings in enumerate(({}, write_tls_files(tmp_path))):
        with running_server(tmp_path / str(number), env=settings) as server:
            env = clean_env(CLAUDE_PROXY_PORT=str(server.port))
            asked = subprocess.run(command, env=env, capture_output=True, timeout=120)
            assert asked.returncode == 0, asked
    assert subprocess.run(command, env=env, capture_output=True, timeout=120).returncode == 1


def test_the_image_has_what_it_runs_and_runs_it_as_nobody_special() -> None:
    text = dockerfile()
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", text, re.M)
    assert entry and json.loads(entry[1])[-1] == "/opt/ocp/ocp_server.py"
    users = re.findall(r"^USER (.*)$", text, re.M)
    assert users and users[-1] not in ("root", "0")
    assert all(":" in image and "latest" not in image
               for image in re.findall(r"^FROM (\S+)", text, re.M))
    copied = re.findall(r"^!(.*)$", (REPO / ".dockerignore").read_text(), re.M)
    assert {"ocp_server.py", "models.json"} <= set(copied)


@pytest.mark.parametrize(("settings", "mode"), [
    ({"PROXY_API_KEY": "a-long-text"}, "shared"),
    ({}, ""),
    *rest(({"CLAUDE_AUTH_MODE": "multi"}, "multi"), ({"CLAUDE_AUTH_MODE": "none"}, "none")),
])
def test_the_container_serves_in_each_mode_and_says_which_key_it_needs(
    tmp_path: Path, settings: dict[str, str], mode: str
) -> None:
    image = re.search(r"^ENV (.*)$", dockerfile(), re.M)
    assert image
    env = dict(word.split("=", 1) for word in image[1].split())
    text = (REPO / "compose.yaml").read_text().partition("    ports:")[0]
    for name, value in re.findall(r"^      ([A-Z_]+): (.*)$", text, re.M):
        # What compose does with ${NAME:-default}.
        env[name] = re.sub(
            r"\$\{(\w+):-(.*?)\}", lambda found: settings.get(found[1]) or found[2],
            value.strip('"'))
    env = {**settings, **env, "OCP_HOME": str(tmp_path), "HOME": str(tmp_path),
           "CLAUDE_AUTH_MODE": settings.get("CLAUDE_AUTH_MODE") or env["CLAUDE_AUTH_MODE"]}

    done = subprocess.run(
        [sys.executable, str(REPO / "ocp_server.py"), "--check", "--demo"], env=clean_env(**env),
        capture_output=True, text=True, timeout=120)

    if mode:
        assert f"listens on 0.0.0.0 port 3456, access mode {mode}" in done.stdout, done
        assert "is not a setting" not in done.stdout
    else:
        assert done.returncode == 2 and "PROXY_API_KEY" in done.stderr


def test_the_container_has_the_time_that_the_longest_drain_takes() -> None:
    found = re.search(r"stop_grace_period: (\d+)s", (REPO / "compose.yaml").read_text())
    server = load_script("ocp_server.py")
    (row,) = (row for row in dataclasses.fields(server.Config) if row.name == "drain_ms")
    assert found and int(found[1]) > row.metadata["maximum"] / 1000 + 20


def test_the_compose_file_publishes_to_this_machine_only() -> None:
    text = (REPO / "compose.yaml").read_text()
    assert re.search(r'- "\$\{OCP_PUBLISH:-127\.0\.0\.1\}:\$\{OCP_PORT:-3456\}:3456"', text)
    volumes = set(re.findall(r"^      - (\w+):/", text, re.M))
    assert volumes == set(re.findall(r"^  (\w+):$", text.partition("\nvolumes:")[2], re.M))
    assert set(re.findall(r"^      - \w+:(/\w+)$", text, re.M)) == set(
        re.findall(r"(?:OCP_HOME|CLAUDE_CONFIG_DIR)=(/\w+)", dockerfile()))


def test_the_page_about_installing_knows_every_option_and_names_only_files_that_exist() -> None:
    page = (REPO / "docs/install.md").read_text("utf-8")
    for options in (setup.argument_parser(), uninstall.argument_parser()):
        for name in re.findall(r"--[a-z-]+", options.format_help()):
            assert name == "--help" or f"`{name}" in page, name
    blocks = "".join(re.findall(r"```sh\n(.*?)```", page, re.S))
    for script in re.findall(r"python3 ([\w./]+\.py)", blocks):
        assert (REPO / script).exists(), script
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page):
        assert (REPO / "docs" / target).exists(), target
