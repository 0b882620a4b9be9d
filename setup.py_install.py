#!/usr/bin/env python3
"""Installs OCP as a service of this machine, from the folder that this file is in.

    python3 setup.py_install.py              look, show the plan, ask, act, verify
    python3 setup.py_install.py --dry-run    look and show the plan, change nothing
    python3 setup.py_install.py --help       everything else

What it touches: ~/.ocp (settings, the record of the installation), one unit of the service
manager, and the launcher ~/.local/bin/ocp. With --system instead: /etc/ocp, /var/lib/ocp,
/etc/systemd/system/ocp.service, /usr/local/bin/ocp and a user `ocp`. Whatever is there already
and is not ours is backed up first. Every step is written down in ~/.ocp/install.json before it is
taken, and uninstall.py walks that record backwards, also after an interrupted installation.
A second run changes only what differs.

Sections (search for "==== 8" to jump to the eighth):

     1. Host              the machine and the session that the program runs in
     2. Small tools       whole files, checksums, paths as people write them
     3. Settings file     ocp.env: read, edited line by line, quoted
     4. Services          service managers, and the services of the original
     5. Installation      what is to be installed, and the texts of its files
     6. Actions           one step: done already? shown, recorded, performed
     7. Looking           what is there: record, settings, services, python, claude
     8. Settings          where each value comes from, and whether the server takes it
     9. Planning          the table of steps
    10. Record            install.json, written ahead of every action
    11. Verifying         the health of the service, and one real answer
    12. OpenClaw          made to know the service, by ocp_connect.py
    13. Command line      arguments, the order of the phases, exit codes
"""
from __future__ import annotations

import os
import sys

if sys.version_info < (3, 9):
    sys.exit("OCP needs Python 3.9 or later; this is Python %d.%d." % sys.version_info[:2])
if os.name != "posix":
    sys.exit("OCP runs on Linux and macOS. On Windows, install it inside WSL.")

import argparse
import enum
import functools
import hashlib
import http.client
import ipaddress
import json
import platform
import plistlib
import pwd
import re
import secrets
import shlex
import shutil
import socket
import ssl
import stat
import subprocess
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Optional, Union

#: A JSON object as the record has it.
Json = dict[str, Any]
Command = tuple[str, ...]


class Exit(enum.IntEnum):
    """The exit codes."""

    #: Installed, running and, unless told otherwise, seen to answer.
    OK = 0
    #: A step failed, or the service did not come up.
    FAILED = 1
    #: Nothing was done: wrong arguments or settings, or nobody to ask.
    REFUSED = 2
    #: Installed and running, but claude is missing, not logged in or not answering.
    NOT_READY = 3
    INTERRUPTED = 130


class Refused(Exception):
    """Why nothing is done, and what to do about it."""


class Failed(Exception):
    """Why a step could not be taken, and what to do about it."""


# ==== 1. Host ================================================================
# The machine and the session that the program runs in. All that differs between a real run and
# a tried one is in here.


class Host(NamedTuple):
    """Where the program runs, and for whom."""

    environ: Mapping[str, str]
    #: "Linux", "Darwin", ...
    system: str
    home: str
    user: str
    uid: int
    #: The folder with ocp_server.py.
    here: str
    is_terminal: bool

    def which(self, name: str) -> Optional[str]:
        """The program of this name on the PATH of this session."""
        return shutil.which(name, path=self.environ.get("PATH"))

    def run(
        self, command: Iterable[str], env: Optional[Mapping[str, str]] = None, timeout_s: float = 90
    ) -> subprocess.CompletedProcess[str]:
        """The command, once it has ended. A program that is not there ends with 127."""
        words = list(command)
        environ = {**(self.environ if env is None else env), "LC_ALL": "C"}
        try:
            return subprocess.run(
                words, env=environ, stdin=subprocess.DEVNULL, capture_output=True,
                encoding="utf-8", errors="replace", timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(words, 124, "", f"no end after {timeout_s:.0f} s")
        except OSError as problem:
            return subprocess.CompletedProcess(words, 127, "", f"{words[0]}: {problem.strerror}")

    def succeeds(self, command: Iterable[str]) -> bool:
        """Whether the command ends with 0."""
        return self.run(command).returncode == 0


def this_host(environ: Mapping[str, str]) -> Host:
    """The machine as it is."""
    account = pwd.getpwuid(os.getuid())
    runtime_dir = f"/run/user/{os.getuid()}"
    if "XDG_RUNTIME_DIR" not in environ and os.path.isdir(runtime_dir):
        # Shells of su and of some ssh servers lack it; systemctl --user needs it.
        environ = {**environ, "XDG_RUNTIME_DIR": runtime_dir}
    return Host(
        environ=environ,
        system=platform.system(),
        home=os.path.abspath(environ.get("HOME") or account.pw_dir),
        user=account.pw_name,
        uid=os.getuid(),
        here=os.path.dirname(os.path.abspath(__file__)),
        # Whoever starts this may have closed it.
        is_terminal=sys.stdin is not None and sys.stdin.isatty(),
    )


# ==== 2. Small tools =========================================================
# Files are written whole or not at all. Drafts and backups stand beside their file under names
# that uninstall.py knows, so that it can clear up after an interruption at any point.

DRAFT = ".ocp-draft"
BACKUP = ".ocp-backup"


def write_whole(path: str, content: bytes, mode: int) -> None:
    """The file has this content and mode, or is untouched. Raises OSError."""
    draft = path + DRAFT
    if os.path.lexists(draft):
        os.unlink(draft)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(draft, mode)
    os.replace(draft, path)


def read_bytes(path: str) -> Optional[bytes]:
    """The content of a file, None if there is no such file. Raises OSError."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_text(path: str) -> str:
    """The content of a UTF-8 file, empty if there is no such file. Raises OSError."""
    return (read_bytes(path) or b"").decode("utf-8", "surrogateescape")


def checksum(content: bytes) -> str:
    """What tells whether a file is still as it was written."""
    return hashlib.sha256(content).hexdigest()


def mode_of(path: str) -> int:
    """The permission bits of a file that exists."""
    return stat.S_IMODE(os.stat(path).st_mode)


def shown_path(path: str, home: str) -> str:
    """A path as people write it."""
    return "~" + path[len(home):] if path.startswith(home + os.sep) else path


def is_unwritable(text: str) -> bool:
    """Whether a text has what no line of a unit or a settings file can hold: control characters,
    or bytes that are no UTF-8."""
    return bool(re.search("[\\x00-\\x1f\\x7f\\ud800-\\udfff]", text))


def iso_now() -> str:
    """The time in UTC as ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# ==== 3. Settings file =======================================================
# ocp.env has one NAME=value in a line. systemd reads it, and so does /bin/sh for launchd; what is
# written here means the same to both. The file belongs to the user: only the lines of settings
# that change are replaced, everything else stays as it is.

SETTINGS_HEADER = """\
# Settings of the OCP service, one NAME=value in a line; README.md lists them all.
# A value with spaces or other special characters stands in "double quotes".
# The service reads this file when it starts. Keep it to yourself: there are keys in it.
"""
_ASSIGNMENT = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)=(.*)")
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]*")


def unquoted(text: str) -> str:
    """The value that stands behind the = of a line."""
    found = []
    quote = ""
    characters = iter(text.strip())
    for character in characters:
        if character == quote:
            quote = ""
        elif quote == "'":
            found.append(character)
        elif character == "\\":
            following = next(characters, "")
            keeps = quote == '"' and following not in ('"', "\\", "$", "`")
            found.append("\\" + following if keeps else following)
        elif not quote and character in "'\"":
            quote = character
        else:
            found.append(character)
    return "".join(found)


def quoted(value: str) -> str:
    """`value` as it has to stand behind the = of a line."""
    if _PLAIN.fullmatch(value):
        return value
    return '"' + re.sub(r'(["\\$`])', r"\\\1", value) + '"'


def settings_of(text: str) -> dict[str, str]:
    """The settings in the text of a settings file."""
    matches = (_ASSIGNMENT.fullmatch(line) for line in text.split("\n"))
    return {match[1]: unquoted(match[2]) for match in matches if match}


def edited_settings(text: str, values: Mapping[str, str]) -> str:
    """The text of the file with these settings in it, all other lines as they were."""
    lines = (text or SETTINGS_HEADER).rstrip("\n").split("\n")
    present = settings_of(text)
    for number, line in enumerate(lines):
        match = _ASSIGNMENT.fullmatch(line)
        if match and match[1] in values and present[match[1]] != values[match[1]]:
            lines[number] = f"{match[1]}={quoted(values[match[1]])}"
    lines += [f"{name}={quoted(value)}" for name, value in values.items() if name not in present]
    return "\n".join(lines) + "\n"


# ==== 4. Services ============================================================
# What differs between service managers, as data: one Service says where its unit stands and which
# commands do what. The original's services are rows of the same kind.

SYSTEMD_LABEL = "ocp.service"
LAUNCHD_LABEL = "dev.ocp.server"


class Service(NamedTuple):
    """How a service manager is told about OCP. An empty command means that none is needed."""

    #: "systemd-user", "systemd-system", "launchd" or "none".
    platform: str
    label: str
    unit_path: str
    #: Makes the manager read units again.
    reload: Command = ()
    #: Makes it start the service whenever the machine or the session starts, and takes that back.
    enable: Command = ()
    disable: Command = ()
    #: Whether that is so, by exit code.
    is_enabled: Command = ()
    #: Whether the service runs, by exit code.
    is_active: Command = ()
    #: Has to run before `start` when the service runs already.
    stop_first: Command = ()
    start: Command = ()
    #: Shows why it does not start; for people.
    logs: str = ""
    #: Starts it again after its settings were edited; for people.
    restart_words: str = ""
    #: Of launchd, the one that the agent is loaded into; empty for systemd.
    domain: str = ""
    #: For ocp, in the record: how to start, stop, restart and enable it, and whether it is enabled.
    commands: Json = {}


def systemd_service(folder: str, label: str, *, is_system: bool) -> Service:
    """The unit `label` of the systemd of the user, or of the machine."""
    base: Command = ("systemctl",) if is_system else ("systemctl", "--user")
    sudo, scope = ("sudo ", "") if is_system else ("", "--user ")
    return Service(
        platform="systemd-system" if is_system else "systemd-user",
        label=label,
        unit_path=os.path.join(folder, label),
        reload=(*base, "daemon-reload"),
        enable=(*base, "enable", label),
        disable=(*base, "disable", "--now", label),
        is_enabled=(*base, "is-enabled", "--quiet", label),
        is_active=(*base, "is-active", "--quiet", label),
        start=(*base, "restart", label),
        logs=f"{sudo}journalctl {scope}-u {label} -n 30",
        restart_words=f"{sudo}systemctl {scope}restart {label}",
        commands={verb: [{"command": [*base, verb, label]}] for verb in (
            "start", "stop", "restart", "enable", "is-enabled")},
    )


def launchd_service(home: str, domain: str, label: str, log_path: str) -> Service:
    """The agent `label` in a domain such as gui/501."""
    unit_path = os.path.join(home, "Library", "LaunchAgents", f"{label}.plist")
    target = f"{domain}/{label}"
    bootout = ("launchctl", "bootout", target)
    bootstrap = ("launchctl", "bootstrap", domain, unit_path)
    # It fails when the agent is loaded already.
    start = [{"command": [*bootstrap], "may_fail": True},
             {"command": ["launchctl", "kickstart", target]}]
    return Service(
        platform="launchd",
        label=label,
        unit_path=unit_path,
        enable=("launchctl", "enable", target),
        disable=bootout,
        is_active=("launchctl", "print", target),
        stop_first=bootout,
        start=bootstrap,
        logs=f"tail -n 30 {shlex.quote(log_path)}",
        restart_words=f"launchctl kickstart -k {target}",
        domain=domain,
        commands={
            "start": start, "enable": start, "stop": [{"command": [*bootout]}],
            # launchd reads a changed agent only at a bootstrap, which fails for a while after a
            # bootout.
            "restart": [{"command": [*bootout], "may_fail": True},
                        {"command": [*bootstrap], "tries": 4}],
            "is-enabled": [{"command": ["launchctl", "print", target]}],
        },
    )


NO_SERVICE = Service(platform="none", label="", unit_path="")

#: What the original's installers called their services, newest first.
LEGACY_UNITS = ("ocp-proxy.service", "openclaw-proxy.service")
LEGACY_AGENTS = ("dev.ocp.proxy", "ai.openclaw.proxy")


def user_unit_folder(host: Host) -> str:
    """Where systemd looks for the units of a user."""
    config = host.environ.get("XDG_CONFIG_HOME") or os.path.join(host.home, ".config")
    return os.path.join(config, "systemd", "user")


def launchd_domain(host: Host) -> str:
    """The session on the screen if there is one; over ssh alone there is only the user's. What
    runs in that one already stays there, whoever has come to the screen since."""
    screen, background = f"gui/{host.uid}", f"user/{host.uid}"
    if host.succeeds(("launchctl", "print", f"{background}/{LAUNCHD_LABEL}")):
        return background
    return screen if host.succeeds(("launchctl", "print", screen)) else background


def legacy_services(host: Host, platform_name: str) -> list[Service]:
    """The services of the original that are installed here."""
    found = []
    if platform_name == "systemd-user":
        folder = user_unit_folder(host)
        found = [systemd_service(folder, label, is_system=False) for label in LEGACY_UNITS]
    elif platform_name == "launchd":
        domain = launchd_domain(host)
        found = [launchd_service(host.home, domain, label, "") for label in LEGACY_AGENTS]
    return [service for service in found if os.path.exists(service.unit_path)]


def unit_settings(path: str) -> dict[str, str]:
    """The environment that a unit or an agent gives its service. Raises OSError."""
    content = read_bytes(path) or b""
    if path.endswith(".plist"):
        try:
            variables = plistlib.loads(content).get("EnvironmentVariables", {})
        except (plistlib.InvalidFileException, ValueError, AttributeError):
            return {}
        return {str(name): str(value) for name, value in variables.items()}
    found = {}
    text = content.decode("utf-8", "replace")
    for assignments in re.findall(r"^\s*Environment=(.*)$", text, re.M):
        try:
            words = shlex.split(assignments)
        except ValueError:
            words = [assignments]
        for word in words:
            name, _, value = word.partition("=")
            found[name] = value.replace("%%", "%")
    return found


# ==== 5. Installation ========================================================
# What is to be installed, and the texts of its files: pure functions, nothing is read or written.
# The units hold no settings. Those are in the settings file, of which no other user sees a byte.


class Installation(NamedTuple):
    """Everything that the files of an installation depend on."""

    service: Service
    python: str
    install_dir: str
    data_dir: str
    env_file: str
    #: Where `ocp` goes, or None if there is no ocp.py to run.
    launcher: Optional[str]
    record_path: str
    home: str
    #: The user that a service of the machine runs as; empty = who installs it.
    account: str
    port: int
    bind: str
    #: Whether it serves https.
    is_secure: bool = False

    @property
    def server_path(self) -> str:
        """The server's script."""
        return os.path.join(self.install_dir, "ocp_server.py")

    @property
    def url(self) -> str:
        """Where the service is found from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1", "": "127.0.0.1"}.get(
            self.bind, self.bind
        )
        scheme = "https" if self.is_secure else "http"
        return f"{scheme}://[{host}]:{self.port}" if ":" in host else (
            f"{scheme}://{host}:{self.port}")

    @property
    def is_system(self) -> bool:
        """Whether it is a service of the machine rather than of a user."""
        return self.service.platform == "systemd-system"

    @property
    def log_path(self) -> str:
        """Where launchd puts what the server prints."""
        return os.path.join(self.data_dir, "logs", "service.log")


def systemd_word(text: str) -> str:
    """One word of an ExecStart line that means `text` literally."""
    for character in ("\\", '"'):
        text = text.replace(character, "\\" + character)
    return '"' + text.replace("%", "%%").replace("$", "$$") + '"'


def systemd_path(path: str) -> str:
    """A path for EnvironmentFile, which takes no quotes but expands wildcards."""
    return re.sub(r"([\\*?\[\]{}])", r"\\\1", path).replace("%", "%%")


#: What a service of the machine may do. claude compiles code while it runs, so memory that is
#: both written and executed has to stay allowed; it keeps its login in the state folder.
SANDBOX = """\
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
RemoveIPC=yes
"""
#: A service of the machine may get one right of root: ports below this one.
FIRST_FREE_PORT = 1024


def systemd_unit(install: Installation) -> str:
    """The unit, for the user's systemd or for the machine's."""
    waits = "Wants=network-online.target\nAfter=network-online.target\n"
    right = "CAP_NET_BIND_SERVICE" if install.port < FIRST_FREE_PORT else ""
    own_user = (
        f"User={install.account}\n"
        f"StateDirectory={os.path.basename(install.data_dir)}\n"
        "StateDirectoryMode=0700\n"
        f"WorkingDirectory={install.data_dir}\n"
        f"CapabilityBoundingSet={right}\n"
        f"AmbientCapabilities={right}\n{SANDBOX}"
    )
    return (
        "# Written by OCP's setup.py_install.py. Settings are in the EnvironmentFile below.\n"
        "[Unit]\n"
        "Description=OCP, a Claude plan as an API\n"
        f"{waits if install.is_system else ''}"
        "\n[Service]\n"
        f"ExecStart={systemd_word(install.python)} {systemd_word(install.server_path)}\n"
        # No dash before the path: without its settings the server could be open to everybody.
        f"EnvironmentFile={systemd_path(install.env_file)}\n"
        "Restart=always\n"
        "RestartSec=5\n"
        # The server's exit code for settings that it cannot use; trying again would not help.
        "RestartPreventExitStatus=2\n"
        # The server ends its answers and its children by itself.
        "KillMode=mixed\n"
        "TimeoutStopSec=45\n"
        "UMask=0077\n"
        f"{own_user if install.is_system else ''}"
        "\n[Install]\n"
        f"WantedBy={'multi-user.target' if install.is_system else 'default.target'}\n"
    )


#: launchd has no settings files: a shell reads it, and becomes the server. A file that cannot be
#: read ends the shell.
_WITH_SETTINGS = 'set -a; . "$1"; shift; exec "$@"'


def command_with_settings(install: Installation) -> list[str]:
    """The command that starts the server with its settings, without systemd."""
    shell = ["/bin/sh", "-c", _WITH_SETTINGS, "ocp"]
    return [*shell, install.env_file, install.python, install.server_path]


def launchd_plist(install: Installation) -> bytes:
    """The agent for launchd."""
    # Without a word about it, an agent can be loaded into the session on the screen only.
    background = {"LimitLoadToSessionType": "Background"}
    return plistlib.dumps({
        **(background if install.service.domain.startswith("user/") else {}),
        "Label": install.service.label,
        "ProgramArguments": command_with_settings(install),
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": 10,
        "ExitTimeOut": 45,
        "Umask": 0o077,
        "StandardOutPath": install.log_path,
        "StandardErrorPath": install.log_path,
    })


def launcher_script(install: Installation) -> str:
    """The program `ocp`: the right python with the right file."""
    words = [install.python, os.path.join(install.install_dir, "ocp.py")]
    moved = ""
    folder = os.path.dirname(install.record_path)
    if folder != os.path.join(install.home, ".ocp"):
        moved = f'[ -n "$OCP_HOME" ] || export OCP_HOME={shlex.quote(folder)}\n'
    return (
        "#!/bin/sh\n# Runs the ocp command. Written by OCP's setup.py_install.py.\n"
        f'{moved}exec {shlex.join(words)} "$@"\n'
    )


# ==== 6. Actions =============================================================
# A step of a plan, as data: it knows whether it is done, how it is shown, what the record says
# about it, and how it is taken. Nothing is taken that is not in the record first.


class MakeDir(NamedTuple):
    """A folder that has to be there."""

    path: str
    mode: int = 0o755


class WriteFile(NamedTuple):
    """A file that has to have this content and mode."""

    path: str
    content: bytes
    mode: int
    what: str
    #: To be run after each change of the file, its removal included.
    then: Command = ()
    #: Whether it belongs to the user's data, which stays when OCP goes.
    is_data: bool = False


class Run(NamedTuple):
    """A command, and the one that takes it back."""

    command: Command
    what: str
    needed: bool
    undo: Command = ()
    #: Whether `undo` is ours to do even if somebody else ran the command.
    is_ours: bool = False
    attempts: int = 1
    #: What to do by hand when it fails; without this, a failure ends the installation.
    advice: str = ""


Action = Union[MakeDir, WriteFile, Run]


def is_done(action: Action) -> bool:
    """Whether there is nothing to do. Raises OSError."""
    if isinstance(action, MakeDir):
        return os.path.isdir(action.path)
    if isinstance(action, Run):
        return not action.needed
    is_foreign_link = os.path.islink(action.path) and not action.is_data
    if is_foreign_link or read_bytes(action.path) != action.content:
        return False
    return mode_of(action.path) == action.mode


def described(action: Action, home: str) -> str:
    """One line for people."""
    if isinstance(action, MakeDir):
        return f"make the folder {shown_path(action.path, home)}"
    if isinstance(action, WriteFile):
        return f"write {shown_path(action.path, home)} ({action.what}, mode {action.mode:04o})"
    return f"run {shlex.join(action.command)} ({action.what})"


def _free_backup_path(path: str) -> str:
    number = 1
    backup = path + BACKUP
    while os.path.lexists(backup):
        number += 1
        backup = f"{path}{BACKUP}-{number}"
    return backup


def entry_for(action: Action, earlier: Optional[Json]) -> Json:
    """What the record says about an action. `earlier` is what it said so far. Raises OSError."""
    if isinstance(action, MakeDir):
        return {"kind": "make_dir", "path": action.path, "backup": None}
    if isinstance(action, Run):
        return {
            "kind": "run", "path": None, "backup": None,
            "command": list(action.command), "undo": list(action.undo),
        }
    old = earlier or {"sha256": [], "backup": None}
    new_sum = checksum(action.content)
    backup = old["backup"]
    present = read_bytes(action.path)
    # Only what this program wrote itself may be written over without a copy. It writes no links.
    foreign = os.path.islink(action.path) or (
        present is not None and checksum(present) not in (*old["sha256"], new_sum))
    if foreign and not action.is_data:
        backup = _free_backup_path(action.path)
    return {
        "kind": "write_file", "path": action.path, "backup": backup, "data": action.is_data,
        "sha256": [each for each in old["sha256"] if each != new_sum] + [new_sum],
        "then": list(action.then),
    }


def _write(host: Host, action: WriteFile, entry: Json) -> None:
    backup = entry["backup"]
    if backup and not os.path.lexists(backup):
        if os.path.islink(action.path):
            os.symlink(os.readlink(action.path), backup)
        else:
            write_whole(backup, read_bytes(action.path) or b"", mode_of(action.path))
    # Data of the user's may be kept elsewhere, with a link here.
    path = os.path.realpath(action.path) if action.is_data else action.path
    write_whole(path, action.content, action.mode)
    if action.then:
        done = host.run(action.then)
        if done.returncode:
            raise Failed(f"{shlex.join(action.then)}: {done.stderr.strip() or done.returncode}")


def _run(host: Host, action: Run) -> str:
    """What to tell about a failure that does not matter so much, or an empty text."""
    done = host.run(action.command)
    for _ in range(action.attempts - 1):
        if done.returncode == 0:
            break
        # launchd needs a moment after it has stopped a service.
        time.sleep(1)
        done = host.run(action.command)
    if done.returncode == 0:
        return ""
    reason = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
    if action.advice:
        return f"{shlex.join(action.command)} failed: {reason}. {action.advice}"
    raise Failed(f"{shlex.join(action.command)}: {reason}")


def perform(host: Host, action: Action, entry: Json) -> str:
    """Takes the step; what to tell about it, if anything. Raises Failed, OSError."""
    if isinstance(action, MakeDir):
        os.mkdir(action.path, action.mode)
        return ""
    if isinstance(action, WriteFile):
        _write(host, action, entry)
        return ""
    return _run(host, action)


# ==== 7. Looking =============================================================
# What is there before anything changes. Looking runs programs that only tell, and writes nothing.


class Found(NamedTuple):
    """What an installation starts from."""

    #: The record of an earlier installation.
    record: Optional[Json]
    settings_text: str
    #: The environment in the unit that is there now, ours or else the original's.
    unit_settings: dict[str, str]
    legacy: list[Service]
    is_active: bool
    is_enabled: bool
    #: Whether the user's services run without the user; None = it does not matter or is unknown.
    lingers: Optional[bool]


def read_record(path: str) -> Optional[Json]:
    """The record of an earlier installation. Raises Refused if it cannot be read."""
    content = read_bytes(path)
    if content is None:
        return None
    try:
        record = json.loads(content)
        if not isinstance(record, dict) or not isinstance(record["actions"], list):
            raise ValueError
    except (ValueError, KeyError):
        raise Refused(f"{path} is damaged. Move it away and run this again.") from None
    if record.get("version") != 1:
        raise Refused(f"{path} is of another version of OCP. Run that version's uninstall.py.")
    return record


_RUNNING_STATES = ("running", "degraded", "starting", "initializing", "maintenance")


def find_service(host: Host, data_dir: str, *, is_system: bool) -> tuple[Service, str]:
    """The service manager to use, and what there is to say about it. Raises Refused."""
    if is_system:
        if host.system != "Linux" or host.which("systemctl") is None:
            raise Refused("--system needs systemd. Leave it out for a service of your own.")
        if host.uid != 0:
            raise Refused("--system needs root: run it with sudo.")
        if host.run(("systemctl", "is-system-running")).stdout.strip() not in _RUNNING_STATES:
            raise Refused("systemd does not run this machine, so --system cannot work here.")
        return systemd_service("/etc/systemd/system", SYSTEMD_LABEL, is_system=True), ""
    if host.uid == 0 and host.environ.get("SUDO_USER"):
        raise Refused("Run it without sudo for a service of your own, or with --system.")
    if host.system == "Darwin" and host.which("launchctl"):
        log_path = os.path.join(data_dir, "logs", "service.log")
        domain = launchd_domain(host)
        return launchd_service(host.home, domain, LAUNCHD_LABEL, log_path), ""
    if host.which("systemctl") is None:
        return NO_SERVICE, "There is no service manager here that OCP knows (systemd, launchd)."
    if not host.succeeds(("systemctl", "--user", "show-environment")):
        return NO_SERVICE, (
            "The user's systemd cannot be reached. Log in as that user over ssh or on the screen "
            f"(not by su), or run `sudo loginctl enable-linger {shlex.quote(host.user)}`, and run "
            "this again; or use --system."
        )
    return systemd_service(user_unit_folder(host), SYSTEMD_LABEL, is_system=False), ""


def _lingers(host: Host, service: Service) -> Optional[bool]:
    if service.platform != "systemd-user" or host.which("loginctl") is None:
        return None
    shown = host.run(("loginctl", "show-user", host.user, "--property=Linger"))
    if "not logged in or lingering" in shown.stderr:
        return False
    answer = re.fullmatch(r"Linger=(yes|no)", shown.stdout.strip())
    return answer[1] == "yes" if answer else None


def look(host: Host, service: Service, env_file: str, record_path: str) -> Found:
    """Everything that is there. Raises Refused, OSError."""
    legacy = legacy_services(host, service.platform)
    units = [each.unit_path for each in (service, *legacy) if os.path.exists(each.unit_path)]
    return Found(
        record=read_record(record_path),
        settings_text=read_text(env_file),
        unit_settings=unit_settings(units[0]) if units else {},
        legacy=legacy,
        is_active=bool(service.is_active) and host.succeeds(service.is_active),
        is_enabled=bool(service.is_enabled) and host.succeeds(service.is_enabled),
        lingers=_lingers(host, service),
    )


def stable_python() -> str:
    """This interpreter, under a name that outlives virtual environments and small updates."""
    python = sys.executable
    if sys.prefix != sys.base_prefix:
        outside = os.path.join(sys.base_prefix, "bin", "python3")
        python = outside if os.access(outside, os.X_OK) else python
    brewed = re.fullmatch(r"(.*)/Cellar/(python@(\d+\.\d+))/.*", python)
    if brewed:
        kept = f"{brewed[1]}/opt/{brewed[2]}/bin/python{brewed[3]}"
        python = kept if os.access(kept, os.X_OK) else python
    return os.path.abspath(python)


_PRIVATE_FOLDERS = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")


def is_for_everybody(path: str) -> bool:
    """Whether a service of the machine can read this file, sandboxed and as another user."""
    real = os.path.realpath(path)
    if real.startswith(_PRIVATE_FOLDERS) or not os.path.exists(real):
        return False
    folder = os.path.dirname(real)
    while True:
        if not os.stat(folder).st_mode & stat.S_IXOTH:
            return False
        if folder == os.path.dirname(folder):
            return bool(os.stat(real).st_mode & stat.S_IROTH)
        folder = os.path.dirname(folder)


def python_for(here: str, *, is_system: bool) -> str:
    """The interpreter that the service runs on. Raises Refused."""
    python = stable_python()
    if is_system:
        if not is_for_everybody(os.path.join(here, "ocp_server.py")):
            raise Refused(
                f"A service of the machine cannot read {here}. Move this folder to /opt/ocp, "
                "and run setup.py_install.py there."
            )
        if not is_for_everybody(python):
            raise Refused(
                f"A service of the machine cannot run {python}. Use the system's own: "
                "sudo /usr/bin/python3 setup.py_install.py --system"
            )
    # systemd takes the first word of a command as it stands: there is no way to write a dollar.
    if is_unwritable(python + here) or "$" in python:
        raise Refused(f"No unit can name {python!r} or {here!r}: move them to a plainer path.")
    return python


# ==== 8. Settings ============================================================
# Where the value of each setting comes from: the command line first, then the settings file, the
# unit that is there, and this shell. Whether the server takes them is for the server to say: no
# range is known here.

PORT, BIND, AUTH_MODE = "CLAUDE_PROXY_PORT", "CLAUDE_BIND", "CLAUDE_AUTH_MODE"
API_KEY = "PROXY_API_KEY"
TOKEN = "CLAUDE_CODE_OAUTH_TOKEN"
DEFAULTS = {PORT: "3456", BIND: "127.0.0.1"}
#: Settings with an option of their own: (setting, attribute of the parsed arguments).
OPTION_SETTINGS = (
    (PORT, "port"),
    (BIND, "bind"),
    (AUTH_MODE, "auth_mode"),
    ("OCP_DEFAULT_MODEL", "default_model"),
)
SECRETS = (API_KEY, "OCP_ADMIN_KEY", "PROXY_ANONYMOUS_KEY", TOKEN)
#: What claude or the server needs to know of this shell, because a service would not have it.
CARRIED = (
    "CLAUDE_BIN", "CLAUDE_CONFIG_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy",
    "https_proxy", "no_proxy", "NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE", "SSL_CERT_DIR",
)
#: Of the environment in an earlier unit everything is taken over that starts like this ...
_TAKEN_OVER = ("CLAUDE_", "OCP_", "PROXY_")
#: ... except what only the original's own installation needed.
_LEFT_BEHIND = ("OCP_DIR_OVERRIDE", "OCP_HOME", "CLAUDECODE")


class Sources(NamedTuple):
    """Where values come from, first to last."""

    options: dict[str, str]
    file: dict[str, str]
    unit: dict[str, str]
    shell: dict[str, str]


def sources(host: Host, options: argparse.Namespace, found: Found) -> Sources:
    """The values of every place."""
    given = ((name, getattr(options, attribute)) for name, attribute in OPTION_SETTINGS)
    wanted = [*(name for name, _ in OPTION_SETTINGS), *SECRETS, *CARRIED]
    unit = {
        name: value for name, value in found.unit_settings.items()
        if name in wanted or (name.startswith(_TAKEN_OVER) and name not in _LEFT_BEHIND)
    }
    shell = {name: host.environ[name] for name in wanted if host.environ.get(name)}
    return Sources(
        {name: value for name, value in given if value is not None},
        settings_of(found.settings_text), unit, shell,
    )


def merged(places: Sources) -> dict[str, str]:
    """Every setting with its value."""
    return {**DEFAULTS, **places.shell, **places.unit, **places.file, **places.options}


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def check_openness(values: Mapping[str, str]) -> None:
    """Raises Refused for a service that the whole network could use without anybody's decision."""
    if is_loopback(values[BIND]) or values.get(AUTH_MODE) or values.get(API_KEY):
        return
    raise Refused(
        f"On {values[BIND]} others can reach the service, so say who may use it:\n"
        "  --auth-mode shared   whoever has the one key, which is made now\n"
        "  --auth-mode multi    whoever has a key of their own, made later with `ocp keys add`\n"
        "  --auth-mode none     everybody who can connect, at the expense of your plan"
    )


def path_for(host: Host, values: Mapping[str, str], data_dir: str, *, is_system: bool) -> str:
    """The PATH of the service: where claude and node are now, and the usual places."""
    usual = ["/usr/local/bin", "/usr/bin", "/bin"]
    if host.system == "Darwin":
        usual.insert(0, "/opt/homebrew/bin")
    home = data_dir if is_system else host.home
    programs = [values.get("CLAUDE_BIN") or host.which("claude"), host.which("node")]
    found = [os.path.dirname(each) for each in programs if each and os.path.isabs(each)]
    if is_system:
        found = [each for each in found if not (each + "/").startswith(_PRIVATE_FOLDERS)]
    folders = dict.fromkeys([*found, os.path.join(home, ".local", "bin"), *usual])
    # A PATH has no way to write a colon that is part of a name.
    return ":".join(each for each in folders if ":" not in each)


class Verdict(NamedTuple):
    """What the server says about settings."""

    #: Why it would not start with them; empty if it would.
    problem: str
    #: Why it could not use claude; empty if it could.
    claude_problem: str


def judged(host: Host, install: Installation, values: Mapping[str, str]) -> Verdict:
    """What `ocp_server.py --check` says. It gets a state folder of its own, and writes nothing
    elsewhere."""
    kept = ("LANG", "LD_LIBRARY_PATH", "TMPDIR")
    inherited = {name: host.environ[name] for name in kept if name in host.environ}
    home = install.data_dir if install.is_system else install.home
    with tempfile.TemporaryDirectory(prefix="ocp-check-") as scratch:
        env = {**inherited, **values, "HOME": home, "OCP_HOME": scratch}
        command = [install.python, install.server_path, "--check"]
        whole = host.run(command, env)
        if whole.returncode == 0:
            return Verdict("", "")
        # The stand-in needs no claude, so that all that is left to complain about is settings.
        settings = host.run([*command, "--demo"], env)
    if settings.returncode:
        return Verdict(_complaint(settings), "")
    return Verdict("", _complaint(whole))


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line[5:] if line.startswith("ocp: ") else line for line in done.stderr.splitlines()]
    return "\n".join(lines) or f"{shlex.join(done.args)} ended with {done.returncode}"


# ==== 9. Planning ============================================================
# A plan is a list of actions. STEPS is the table of what an installation consists of, in order; a
# step looks at the situation and yields its actions, also those that are done already.


class Situation(NamedTuple):
    """Everything that a step may look at."""

    host: Host
    install: Installation
    found: Found
    #: What the settings file has to say.
    values: dict[str, str]
    should_start: bool
    #: Whether the service that runs is not the version in the folder.
    is_outdated: bool


def missing_folders(path: str, mode: int = 0o755) -> Iterator[MakeDir]:
    """The folders that `path` needs, outermost first."""
    missing = []
    while not os.path.isdir(path):
        missing.append(MakeDir(path, mode))
        path = os.path.dirname(path)
    yield from reversed(missing)


def plan_settings(situation: Situation) -> Iterator[Action]:
    """The settings file."""
    env_file = situation.install.env_file
    text = edited_settings(situation.found.settings_text, situation.values)
    yield from missing_folders(os.path.dirname(env_file), 0o700)
    content = text.encode("utf-8", "surrogateescape")
    yield WriteFile(env_file, content, 0o600, "settings", is_data=True)


def plan_unit(situation: Situation) -> Iterator[Action]:
    """The unit, which names the settings file."""
    install = situation.install
    service = install.service
    if service.platform == "none":
        return
    content = systemd_unit(install).encode("utf-8", "surrogateescape")
    if service.platform == "launchd":
        content = launchd_plist(install)
        yield from missing_folders(os.path.dirname(install.log_path), 0o700)
    yield from missing_folders(os.path.dirname(service.unit_path))
    yield WriteFile(service.unit_path, content, 0o644, "unit", then=service.reload)


def plan_launcher(situation: Situation) -> Iterator[Action]:
    """The program `ocp`."""
    install = situation.install
    if install.launcher is None:
        return
    content = launcher_script(install).encode("utf-8", "surrogateescape")
    yield from missing_folders(os.path.dirname(install.launcher))
    yield WriteFile(install.launcher, content, 0o755, "the ocp command")


def plan_account(situation: Situation) -> Iterator[Action]:
    """The user that a service of the machine runs as. It stays, because it owns files."""
    install = situation.install
    if not install.account:
        return
    try:
        pwd.getpwnam(install.account)
        needed = False
    except KeyError:
        needed = True
    yield Run(
        ("useradd", "--system", "--user-group", "--home-dir", install.data_dir, "--no-create-home",
         "--shell", "/usr/sbin/nologin", install.account),
        "a user for the service", needed,
    )


def legacy_port(service: Service) -> str:
    """The port that a service of the original was given."""
    return unit_settings(service.unit_path).get(PORT) or DEFAULTS[PORT]


def plan_legacy(situation: Situation) -> Iterator[Action]:
    """Services of the original give way if they want the same port. Their files stay."""
    host, values = situation.host, situation.values
    for old in situation.found.legacy:
        if legacy_port(old) != values[PORT]:
            continue
        is_active = host.succeeds(old.is_active)
        what = "the original's service gives way"
        if old.platform == "launchd":
            target = old.disable[-1]
            # Taken back in the other order, because a disabled agent does not start.
            yield Run(old.disable, what, is_active, old.start)
            yield Run(("launchctl", "disable", target), what, is_active, old.enable)
        else:
            needed = is_active or host.succeeds(old.is_enabled)
            undo = (*old.enable[:-1], *(("--now",) if is_active else ()), old.label)
            yield Run(old.disable, what, needed, undo)


def plan_enable(situation: Situation) -> Iterator[Action]:
    """The service starts with the machine or the session."""
    service = situation.install.service
    if service.enable:
        recorded = any(
            entry.get("command") == list(service.enable)
            for entry in (situation.found.record or {"actions": []})["actions"]
        )
        needed = not (situation.found.is_enabled if service.is_enabled else recorded)
        when = "start it with the machine" if situation.install.is_system else "start it at login"
        yield Run(service.enable, when, needed, service.disable, is_ours=True)


def plan_linger(situation: Situation) -> Iterator[Action]:
    """The service runs without its user being logged in."""
    if situation.install.service.platform == "systemd-user":
        user = situation.host.user
        yield Run(
            ("loginctl", "--no-ask-password", "enable-linger", user),
            "run it also while you are not logged in", situation.found.lingers is False,
            ("loginctl", "--no-ask-password", "disable-linger", user),
            advice=f"Until somebody runs `sudo loginctl enable-linger {shlex.quote(user)}`, the "
            "service stops when you log out.",
        )


def is_unfinished(record: Optional[Json]) -> bool:
    """Whether an earlier run was interrupted, so that a running service may not know its files."""
    return record is not None and not record.get("complete", True)


def plan_start(situation: Situation) -> Iterator[Action]:
    """The service runs, with the files as they are planned."""
    service, found = situation.install.service, situation.found
    if service.reload and is_unfinished(found.record):
        yield Run(service.reload, "after an interrupted installation", True)
    if not service.start or not situation.should_start:
        return
    pending = [
        action for step in (plan_settings, plan_unit) for action in step(situation)
        if not is_done(action)
    ]
    stale = bool(pending) or situation.is_outdated or is_unfinished(found.record)
    needed = stale or not found.is_active
    if service.stop_first:
        yield Run(service.stop_first, "stop it", needed and found.is_active)
    attempts = 5 if service.platform == "launchd" else 1
    yield Run(service.start, "start it", needed, attempts=attempts)


STEPS: tuple[Callable[[Situation], Iterable[Action]], ...] = (
    plan_settings,
    plan_account,
    plan_unit,
    plan_launcher,
    plan_legacy,
    plan_enable,
    plan_linger,
    plan_start,
)


def plan(situation: Situation) -> list[Action]:
    """All actions, in order; a folder that several need comes once."""
    actions = [action for step in STEPS for action in step(situation)]
    return [action for at, action in enumerate(actions) if action not in actions[:at]]


# ==== 10. Record =============================================================
# install.json says what is installed, and everything that was done for it. It is on disk before
# the action is, so that whatever an interruption leaves behind is in it.


def written_entry(entries: Iterable[Json], action: Action) -> Optional[Json]:
    """What is said already about the file of an action."""
    for entry in entries:
        if isinstance(action, WriteFile) and entry.get("kind") == "write_file" \
                and entry.get("path") == action.path:
            return entry
    return None


class Record:
    """The record of this installation."""

    def __init__(self, install: Installation, earlier: Optional[Json]) -> None:
        self._path = install.record_path
        self._entries: list[Json] = list((earlier or {"actions": []})["actions"])
        self._earlier = earlier
        self.fields: Json = {
            "version": 1,
            "installed_at": (earlier or {}).get("installed_at") or iso_now(),
            "platform": install.service.platform,
            "label": install.service.label,
            "unit_path": install.service.unit_path,
            "commands": install.service.commands,
            "python": install.python,
            "server_path": install.server_path,
            "install_dir": install.install_dir,
            "data_dir": install.data_dir,
            "env_file": install.env_file,
            "port": install.port,
            "bind": install.bind,
            "url": install.url,
            "launcher": install.launcher,
        }

    def _index(self, entry: Json) -> int:
        """Where the same thing stands already, or the end."""
        for at, known in enumerate(self._entries):
            if all(known.get(name) == entry.get(name) for name in ("kind", "path", "command")):
                return at
        return len(self._entries)

    def entry_of(self, action: Action) -> Json:
        """What would be said about an action now. Raises OSError."""
        return entry_for(action, written_entry(self._entries, action))

    def note(self, action: Action) -> Json:
        """The entry for an action, which replaces what was said about the same thing."""
        entry = self.entry_of(action)
        at = self._index(entry)
        self._entries[at:at + 1] = [entry]
        return entry

    def adopt(self, actions: Iterable[Action]) -> None:
        """Notes what is already as planned, and ours to take away."""
        for action in actions:
            ours = isinstance(action, WriteFile) or (isinstance(action, Run) and action.is_ours)
            if ours and is_done(action):
                self.note(action)

    def as_json(self, *, complete: bool) -> Json:
        """What the file says."""
        return {**self.fields, "complete": complete, "actions": self._entries}

    def is_current(self) -> bool:
        """Whether the file says all that already."""
        return self._earlier == self.as_json(complete=True)

    def save(self, *, complete: bool) -> None:
        """Puts it on disk. Raises OSError."""
        os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
        text = json.dumps(self.as_json(complete=complete), indent=2) + "\n"
        write_whole(self._path, text.encode("ascii"), 0o600)


Performer = Callable[[Host, Action, Json], str]


def apply(
    host: Host, actions: Iterable[Action], record: Record, say: Callable[[str], None],
    performer: Performer = perform,
) -> None:
    """Does what is not done, each step recorded ahead. Raises Failed, OSError."""
    planned = list(actions)
    record.adopt(planned)
    record.save(complete=False)
    for action in planned:
        if is_done(action):
            continue
        entry = record.note(action)
        record.save(complete=False)
        say(f"  {described(action, host.home)}")
        complaint = performer(host, action, entry)
        if complaint:
            say(f"    {complaint}")
    record.save(complete=True)


# ==== 11. Verifying ==========================================================
# What was measured, never what was hoped: the service has to answer as the version that was
# installed, and, unless told otherwise, to answer one question of a few words.

_QUESTION = "Say hello in one word."
_START_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 120.0


def http_json(
    url: str, body: Optional[Json] = None, key: str = "", timeout_s: float = 5
) -> tuple[int, Json]:
    """Status and JSON of an answer of the service. Never through a proxy. Raises OSError."""
    parts = urllib.parse.urlsplit(url)
    connect: Any = http.client.HTTPConnection
    if parts.scheme == "https":
        # It is this machine's own, whatever name its certificate is for.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connect = functools.partial(http.client.HTTPSConnection, context=context)
    connection = connect(parts.hostname or "", parts.port, timeout=timeout_s)
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        content = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", parts.path, content, headers)
        response = connection.getresponse()
        answer = json.loads(response.read(1 << 20))
    except (http.client.HTTPException, ValueError) as problem:
        raise OSError(f"no OCP answers there ({problem})") from None
    finally:
        connection.close()
    return response.status, answer if isinstance(answer, dict) else {}


def served_version(url: str) -> str:
    """The version of the OCP that answers there, or an empty text."""
    try:
        return str(http_json(f"{url}/health")[1].get("version", ""))
    except OSError:
        return ""


def installed_version(server_path: str) -> str:
    """The version of the server in this file. Raises Refused if it is none."""
    match = re.search(r'^VERSION = "([^"]+)"$', read_text(server_path), re.M)
    if match is None:
        raise Refused(f"{server_path} is not the server of OCP: run this from its own folder.")
    return match[1]


def wait_for_version(url: str, version: str, timeout_s: float = _START_TIMEOUT_S) -> str:
    """The version that answers: the wanted one as soon as it does, else what is there at last."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        served = served_version(url)
        if served == version or time.monotonic() > deadline_s:
            return served
        time.sleep(0.1)


class Answer(NamedTuple):
    """How the question went."""

    #: Whether there was an answer; None = it could not be asked.
    ok: Optional[bool]
    words: str
    #: What kind of failure it was, in the words of the API.
    code: str = ""


def ask(install: Installation, values: Mapping[str, str]) -> Answer:
    """One real question. Blocks until there is an answer."""
    key = values.get(API_KEY) or values.get("OCP_ADMIN_KEY") or ""
    key = key or read_text(os.path.join(install.data_dir, "admin-key")).strip()
    body = {"messages": [{"role": "user", "content": _QUESTION}], "model": "haiku",
            "max_tokens": 64}
    began_s = time.monotonic()
    try:
        status, answer = http_json(
            f"{install.url}/v1/chat/completions", body, key, _ANSWER_TIMEOUT_S
        )
    except OSError as problem:
        return Answer(False, f"The question was not answered: {problem}")
    took_s = time.monotonic() - began_s
    if status == 200 and answer.get("choices"):
        text = str(answer["choices"][0]["message"]["content"])
        return Answer(True, f"It answered {' '.join(text.split())[:60]!r} in {took_s:.1f} s.")
    error = answer.get("error") or {}
    code = str(error.get("code") or "")
    if code == "invalid_api_key":
        return Answer(None, "No question was asked: no key is known here that the API takes.")
    return Answer(False, f"The question failed: {error.get('message') or status}", code)


def claude_advice(install: Installation, host: Host, problem: str) -> list[str]:
    """The commands that install claude."""
    who = f"sudo -u {install.account} -H " if install.account else ""
    sudo = "sudo " if install.account else ""
    return [
        f"claude cannot be used yet: {problem}",
        f"  install it:      {sudo}npm install -g @anthropic-ai/claude-code@latest",
        f"  then log in:     {who}claude auth login",
        *_headless_login(install, host),
    ]


def login_advice(install: Installation, host: Host) -> list[str]:
    """The commands that log claude in."""
    who = f"sudo -u {install.account} -H " if install.account else ""
    return [
        "claude is not logged in.",
        f"  with a browser:  {who}claude auth login",
        *_headless_login(install, host),
    ]


def _headless_login(install: Installation, host: Host) -> list[str]:
    again = install.service.restart_words
    return [
        "  without one:     claude setup-token      (on any machine that has a browser)",
        f"                   and put its token into {shown_path(install.env_file, host.home)} as",
        f"                   {TOKEN}=the-token",
        *([f"                   then run: {again}"] if again else []),
    ]


# ==== 12. OpenClaw ===========================================================
# ocp_connect.py beside this file is the one that knows how OpenClaw is told about a server. It is
# run after the service answers; an installation is a good one whatever becomes of this.

#: OpenClaw takes seconds for each of its own commands.
_CONNECT_TIMEOUT_S = 240.0


class OpenClaw(NamedTuple):
    """What ocp_connect.py says of OpenClaw."""

    is_here: bool = False
    #: Whether it has been told about a server already.
    is_connected: bool = False


def connect_script(here: str) -> str:
    """The client set-up, which may be missing."""
    return os.path.join(here, "ocp_connect.py")


def look_for_openclaw(host: Host) -> OpenClaw:
    """Whether OpenClaw is here, as far as that can be seen."""
    script = connect_script(host.here)
    if not os.path.exists(script):
        return OpenClaw()
    listed = host.run((sys.executable, script, "--list", "--json"))
    try:
        row = next(row for row in json.loads(listed.stdout) if row["name"] == "openclaw")
        return OpenClaw(bool(row["here"]), bool(row["connected"]))
    except (ValueError, KeyError, TypeError, StopIteration):
        return OpenClaw()


class Job(NamedTuple):
    """An installation that was thought through."""

    situation: Situation
    actions: list[Action]
    version: str
    claude_problem: str
    notes: list[str]
    #: Nothing is done about one that is not here.
    openclaw: OpenClaw


def registration(install: Installation, provider_name: str) -> Run:
    """The command that tells OpenClaw about the service, and the one that takes that back."""
    program = (install.python, connect_script(install.install_dir))
    only = ("--only", "openclaw", "--yes")
    named = ("--provider-name", provider_name) if provider_name else ()
    command = (*program, install.url, *only, "--skip-answer", "--json", *named)
    return Run(command, "OpenClaw", True, (*program, "--undo", *only))


def register_with_openclaw(job: Job, provider_name: str, record: Record) -> Iterator[str]:
    """Makes OCP a provider of OpenClaw; what there is to say about it. Raises OSError."""
    install, values, host = job.situation.install, job.situation.values, job.situation.host
    action = registration(install, provider_name)
    if not job.openclaw.is_connected:
        record.note(action)
        record.save(complete=True)
    key = values.get(API_KEY, "") if values.get(AUTH_MODE) == "shared" else ""
    env = {**host.environ, **({"OCP_CONNECT_KEY": key} if key else {})}
    done = host.run(action.command, env, _CONNECT_TIMEOUT_S)
    try:
        said = json.loads(done.stdout)
        left = [f"{each['path']} {each['reason']}" for each in said["byHand"]]
        if said["written"]:
            yield "OCP is a provider of OpenClaw now."
            yield from (f"- {hint}" for hint in said["hints"])
        yield from (f"OpenClaw: {problem}" for problem in [*said["failures"], *left])
    except (ValueError, KeyError, TypeError):
        again = f"ocp connect {install.url} --only openclaw"
        if values.get(AUTH_MODE) == "multi":
            yield f"OpenClaw needs a key: `ocp keys add openclaw`, then `{again} --key KEY`."
        else:
            yield f"OpenClaw was not told: {done.stderr.strip()} Try again with `{again}`."


# ==== 13. Command line =======================================================
# The phases in their order: look, plan, show, ask, act, verify.


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="setup.py_install.py",
        description="Installs OCP as a service that runs from this folder. An option that is left "
        "out keeps the setting of an earlier installation.",
        epilog="Exit codes: 0 installed and answering, 1 a step failed, 2 nothing was done, "
        "3 installed, but claude is missing, not logged in or not answering.",
    )
    add = parser.add_argument
    add("--port", metavar="N", help=f"TCP port of the service (default {DEFAULTS[PORT]})")
    add("--bind", metavar="ADDRESS", help=f"address to listen on (default {DEFAULTS[BIND]})")
    add("--auth-mode", metavar="MODE", help="who may use the API: none, shared or multi")
    add("--default-model", metavar="NAME", help="model of a request that names none")
    add("--system", action="store_true",
        help="a sandboxed service of the machine, with a user of its own (systemd, as root)")
    add("--no-start", action="store_true", help="install everything, but start nothing now")
    add("--no-openclaw", action="store_true", help="do not touch OpenClaw, if it is here")
    add("--provider-name", metavar="NAME", help="what OCP is called in OpenClaw")
    add("--skip-answer", action="store_true", help="do not ask the plan one question at the end")
    add("--dry-run", action="store_true", help="show the plan and change nothing")
    add("--yes", action="store_true", help="do not ask before acting")
    return parser


def state_folder(host: Host) -> str:
    """Where the record is, and the data of a service of the user. Raises Refused."""
    named = host.environ.get("OCP_HOME") or "~/.ocp"
    folder = os.path.join(host.home, named[2:]) if named.startswith("~/") else named
    for path in (folder, host.home):
        if is_unwritable(path):
            raise Refused(f"No unit can name {path!r}: move it to a plainer path.")
    return os.path.abspath(folder)


def planned_installation(host: Host, options: argparse.Namespace, service: Service) -> Installation:
    """Where everything goes. Port and bind are still to come. Raises Refused."""
    folder = state_folder(host)
    is_system = options.system
    launcher = "/usr/local/bin/ocp" if is_system else os.path.join(host.home, ".local/bin/ocp")
    has_command = os.path.exists(os.path.join(host.here, "ocp.py"))
    return Installation(
        service=service,
        python=python_for(host.here, is_system=is_system),
        install_dir=host.here,
        data_dir="/var/lib/ocp" if is_system else folder,
        env_file="/etc/ocp/ocp.env" if is_system else os.path.join(folder, "ocp.env"),
        launcher=launcher if has_command else None,
        record_path=os.path.join(folder, "install.json"),
        home=host.home,
        account="ocp" if is_system else "",
        port=0,
        bind="",
    )


def planned_values(
    host: Host, options: argparse.Namespace, install: Installation, found: Found
) -> dict[str, str]:
    """The settings of the service. Raises Refused."""
    places = sources(host, options, found)
    values = merged(places)
    for name, value in values.items():
        if is_unwritable(value):
            raise Refused(f"{name} has a line break or another control character in it.")
    check_openness(values)
    if values.get(AUTH_MODE) == "shared" and not values.get(API_KEY):
        values[API_KEY] = "ocp_" + secrets.token_urlsafe(24)
    if install.data_dir != os.path.join(host.home, ".ocp"):
        values["OCP_HOME"] = install.data_dir
    values.setdefault(
        "PATH", path_for(host, values, install.data_dir, is_system=install.is_system)
    )
    return values


def _number(text: str) -> int:
    """The port of a setting; 0 for whatever the server will refuse."""
    return int(text) if re.fullmatch(r"[0-9]{1,5}", text) else 0


def with_address(install: Installation, values: Mapping[str, str]) -> Installation:
    """The installation with its address. Raises Refused."""
    port = _number(values[PORT])
    if port == 0:
        raise Refused(f"{PORT}={values[PORT]}: a service needs a port that clients can rely on.")
    return install._replace(
        port=port, bind=values[BIND], is_secure=bool(values.get("OCP_TLS_CERT")))


def busy_problem(bind: str, port: int) -> str:
    """Why a server could not listen there, or an empty text."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            bind, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as attempt:
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            attempt.bind(address)
    except OSError as problem:
        return problem.strerror or str(problem)
    except UnicodeError:
        return "no host has such a name"
    return ""


def check_port(situation: Situation) -> None:
    """Raises Refused if somebody else has the port."""
    install, found = situation.install, situation.found
    port_before = settings_of(found.settings_text).get(PORT, DEFAULTS[PORT])
    own = found.is_active and port_before == str(install.port)
    makes_way = any(legacy_port(old) == str(install.port) for old in found.legacy)
    if own or makes_way or not situation.should_start:
        return
    problem = busy_problem(install.bind, install.port)
    if problem:
        raise Refused(
            f"Nothing can listen on {install.bind} port {install.port}: {problem}. End what uses "
            "it (an OCP that was started by hand, perhaps), or take another one with --port."
        )


def settled_path(
    host: Host, install: Installation, values: dict[str, str]
) -> tuple[dict[str, str], str]:
    """The settings, with a fresh PATH if claude has moved since the old one was written, and why
    claude cannot be used. Raises Refused for settings that the server does not take."""
    verdict = judged(host, install, values)
    if verdict.problem:
        raise Refused("The server would not start with these settings:\n" + verdict.problem)
    fresh = path_for(host, values, install.data_dir, is_system=install.is_system)
    if verdict.claude_problem and values["PATH"] != fresh:
        moved = {**values, "PATH": fresh}
        if not judged(host, install, moved).claude_problem:
            return moved, ""
    return values, verdict.claude_problem


def check_platform(service: Service, found: Found, note: str) -> None:
    """Raises Refused if OCP is installed here in another way."""
    before = (found.record or {"platform": "none"})["platform"]
    if before in (service.platform, "none"):
        return
    if service.platform == "none":
        raise Refused(note)
    raise Refused(
        f"OCP is installed here as {before} already. "
        "Run uninstall.py first; it keeps your settings and data."
    )


def prepare(host: Host, options: argparse.Namespace) -> Job:
    """Looks and plans; changes nothing. Raises Refused."""
    try:
        return planned_job(host, options)
    except OSError as problem:
        raise Refused(f"{problem}\nNothing was changed.") from None


def planned_job(host: Host, options: argparse.Namespace) -> Job:
    """What `prepare` gives. Raises Refused, OSError."""
    service, note = find_service(host, state_folder(host), is_system=options.system)
    install = planned_installation(host, options, service)
    found = look(host, service, install.env_file, install.record_path)
    check_platform(service, found, note)
    version = installed_version(install.server_path)
    values = planned_values(host, options, install, found)
    # Settings are judged before the port is looked at: a wrong port is not a port in use.
    values, claude_problem = settled_path(host, install, values)
    install = with_address(install, values)
    should_start = service.platform != "none" and not options.no_start
    is_outdated = found.is_active and served_version(install.url) != version
    situation = Situation(host, install, found, values, should_start, is_outdated)
    check_port(situation)
    notes = [each for each in (note, *remarks(host, options, situation)) if each]
    openclaw = OpenClaw() if options.no_openclaw else look_for_openclaw(host)
    return Job(situation, plan(situation), version, claude_problem, notes, openclaw)


def remarks(host: Host, options: argparse.Namespace, situation: Situation) -> Iterator[str]:
    """What somebody might expect and does not happen, or happens and should be known."""
    install, values, found = situation.install, situation.values, situation.found
    shell = sources(host, options, found).shell
    for name in SECRETS:
        if name in shell and shell[name] != values.get(name):
            yield (f"{name} of this shell is not the service's, which stays; "
                   f"edit {install.env_file} to change it.")
    if not is_loopback(install.bind) and values.get(AUTH_MODE) == "none":
        yield f"ATTENTION: whoever can connect to {install.bind} may use your plan."
    if install.service.platform == "systemd-user" and found.lingers is None:
        yield "It could not be seen whether the service keeps running when you log out."
    for old in found.legacy:
        yield (f"The original's {old.label} is installed; its settings are taken over where "
               "nothing else says otherwise. uninstall.py --legacy removes it.")
    folder = os.path.dirname(install.launcher or "")
    if folder and folder not in host.environ.get("PATH", "").split(":"):
        yield (f"`ocp` will not be found, because its folder is not on your PATH. Add this to your "
               f'shell\'s profile: export PATH={shlex.quote(folder)}:"$PATH"')


_SECRET_NAME = re.compile("KEY|TOKEN|SECRET|PASSWORD")


def setting_lines(situation: Situation) -> Iterator[str]:
    """How the settings file changes; secrets are only named."""
    old = settings_of(situation.found.settings_text)
    for name, value in situation.values.items():
        if old.get(name) != value:
            # Addresses of proxies may have a password in them.
            is_secret = name in SECRETS or _SECRET_NAME.search(name) or "@" in value
            shown = "(secret)" if is_secret else quoted(value)
            yield f"      {name}={shown}"


def show(
    job: Job, pending: list[Action], record: Record, options: argparse.Namespace
) -> None:
    """The plan, for people."""
    situation = job.situation
    install, home = situation.install, situation.host.home
    print(f"OCP {job.version} in {shown_path(install.install_dir, home)}, on {install.python}")
    if pending:
        print("This will be done:")
    for action in pending:
        print(f"  {described(action, home)}")
        if isinstance(action, WriteFile) and action.path == install.env_file:
            print("\n".join(setting_lines(situation)))
        if isinstance(action, WriteFile) and record.entry_of(action).get("backup"):
            print("      what was there is kept beside it")
    if pending and situation.should_start and not options.skip_answer and not job.claude_problem:
        print("  ask the plan one question of a few words (--skip-answer leaves it out)")
    if pending and job.openclaw.is_here and situation.should_start:
        print("  make OCP a provider of OpenClaw (--no-openclaw leaves it out)")
    for note in job.notes:
        print(f"Note: {note}")
    if job.claude_problem:
        print("\n".join(claude_advice(install, situation.host, job.claude_problem)))
    sys.stdout.flush()


def confirmed(host: Host, options: argparse.Namespace) -> bool:
    """Whether to go on. Raises Refused when there is nobody to ask."""
    if options.yes:
        return True
    if not host.is_terminal:
        raise Refused("There is no terminal to ask on: --yes goes on, --dry-run only shows.")
    return input("Go on? [y/N] ").strip().lower() in ("y", "yes")


def verify(job: Job, options: argparse.Namespace, *, with_answer: bool) -> Exit:
    """Says what can be seen of the service, if it is meant to run."""
    situation = job.situation
    install, host = situation.install, situation.host
    if not situation.should_start:
        return Exit.NOT_READY if job.claude_problem else Exit.OK
    served = wait_for_version(install.url, job.version)
    if served != job.version:
        state = f"version {served} answers" if served else "nothing answers"
        print(f"The service did not come up: {state} on {install.url}. To see why, run:\n"
              f"  {install.service.logs}", file=sys.stderr)
        return Exit.FAILED
    print(f"OCP {served} runs on {install.url}/v1")
    if job.claude_problem:
        return Exit.NOT_READY
    if not with_answer or options.skip_answer:
        return Exit.OK
    answer = ask(install, situation.values)
    print(answer.words)
    if answer.code == "upstream_login_required":
        print("\n".join(login_advice(install, host)))
    return Exit.NOT_READY if answer.ok is False else Exit.OK


def conclude(
    job: Job, options: argparse.Namespace, record: Record, *, with_answer: bool
) -> Exit:
    """Verifies, and tells OpenClaw of a service that runs. Raises OSError."""
    code = verify(job, options, with_answer=with_answer)
    if code != Exit.FAILED and job.openclaw.is_here and job.situation.should_start:
        for line in register_with_openclaw(job, options.provider_name or "", record):
            print(line, flush=True)
    return code


def closing_words(job: Job) -> Iterator[str]:
    """Where the keys are and what is next."""
    install, values = job.situation.install, job.situation.values
    home = job.situation.host.home
    env_file = shown_path(install.env_file, home)
    if values.get(API_KEY):
        yield f"Clients need the key: it is {API_KEY} in {env_file}"
    if values.get(AUTH_MODE) in ("shared", "multi") and not values.get("OCP_ADMIN_KEY"):
        where = shown_path(os.path.join(install.data_dir, "admin-key"), home)
        yield f"The server makes its admin key at its first start: {where}"
    if values.get(AUTH_MODE) == "multi":
        yield "Make a key for each client with: ocp keys add NAME"
    if install.service.platform == "none":
        yield f"Start it by hand: {shlex.join(command_with_settings(install))}"
    elif not job.situation.should_start:
        yield f"It is not started now. Start it with: {shlex.join(install.service.start)}"
    else:
        yield f"Settings are in {env_file}; after a change run: {install.service.restart_words}"
    if job.openclaw.is_here and not job.situation.should_start:
        yield f"OpenClaw, once OCP runs: ocp connect {install.url} --only openclaw"


def carry_out(job: Job, options: argparse.Namespace) -> Exit:
    """Shows, asks, acts and verifies. Raises Refused, Failed, OSError."""
    situation = job.situation
    pending = [action for action in job.actions if not is_done(action)]
    record = Record(situation.install, situation.found.record)
    record.adopt(job.actions)
    show(job, pending, record, options)
    if not pending and record.is_current():
        print("All is as it should be: nothing to change.")
        return Exit.OK if options.dry_run else conclude(job, options, record, with_answer=False)
    if options.dry_run:
        print("Nothing was changed.")
        return Exit.OK
    if not confirmed(situation.host, options):
        print("Nothing was changed.")
        return Exit.REFUSED
    if not pending:
        print("Only the record of the installation is brought up to date.")
    print("Doing it:")
    apply(situation.host, job.actions, record, print)
    print("\n".join(closing_words(job)))
    return conclude(job, options, record, with_answer=True)


def main(arguments: list[str], host: Host) -> int:
    """Runs the program; the exit code."""
    options = argument_parser().parse_args(arguments)
    try:
        return carry_out(prepare(host, options), options)
    except Refused as problem:
        print(f"setup: {problem}", file=sys.stderr)
        return Exit.REFUSED
    except (Failed, OSError) as problem:
        print(
            f"setup: {problem}\nWhat was done so far is in the record: run this again to go on, "
            "or uninstall.py to take it back.", file=sys.stderr,
        )
        return Exit.FAILED
    except (KeyboardInterrupt, EOFError):
        print("\nsetup: interrupted; run this again to go on, or uninstall.py to take back what "
              "was done.", file=sys.stderr)
        return Exit.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], this_host(os.environ)))
