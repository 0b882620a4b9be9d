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

     1. Shared pieces     small functions that other scripts hold too, kept equal by a test
     2. Host              the machine and the session that the program runs in; files
     3. Settings          ocp.env: read, edited line by line; where each value comes from
     4. Services          service managers as data, and the services of the original
     5. Installation      what is to be installed, and the texts of its files
     6. Actions           one step: done already? described, recorded, performed
     7. Inspection        what is there: record, settings, services, python, claude
     8. Planning          the installation, its settings, and the table of steps
     9. Record            install.json, written ahead of every action
    10. Verification      the health of the service, and one real answer
    11. OpenClaw          told about the service, by ocp_connect.py
    12. Command line      arguments, the order of the phases, exit codes
"""
from __future__ import annotations  # OCP needs Python 3.9 or later; Python 3.6 shows this line.

import os
import sys

if sys.version_info < (3, 9):
    sys.exit("OCP needs Python 3.9 or later; this is Python %d.%d." % sys.version_info[:2])
if os.name != "posix":
    sys.exit("OCP runs on Linux and macOS. On Windows, install it inside WSL.")

import argparse
import contextlib
import enum
import fnmatch
import functools
import glob
import hashlib
import http.client
import ipaddress
import json
import math
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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional, TextIO, Union

#: A JSON object as the record has it.
Json = dict[str, Any]
Command = tuple[str, ...]


# ==== 1. Shared pieces =======================================================
# Each script has to work when it is copied alone, so a few functions are in several of them. A
# test compares everything between "--- shared: NAME" and "--- end shared".


# --- shared: exit
class Exit(enum.IntEnum):
    """The exit codes of OCP's scripts. What was not done never ends with OK."""

    OK = 0
    FAILED = 1
    #: Wrong arguments or settings, or nobody to ask.
    USAGE = 2
    #: No server answers; for the installer: installed, but claude does not answer.
    UNREACHABLE = 3
    #: The key is missing or wrong, or the system requires other rights.
    DENIED = 4
    INTERRUPTED = 130


class Problem(Exception):
    """What went wrong, and what the user can do. `body` is the JSON of a server's refusal."""

    def __init__(self, code: Exit, message: str, body: Any = None) -> None:
        super().__init__(message)
        self.code, self.body = code, body
# --- end shared


# --- shared: run_program
def clean(text: object) -> str:
    """Return `text` without the control characters that could command a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", "?", str(text))


class Completed(NamedTuple):
    """How a program ended. A code of None: it did not run to its end, and `error` says why."""

    code: int | None
    output: str
    error: str

    @property
    def complaint(self) -> str:
        """Return its complaint in one line, for a message."""
        lines = [line.strip() for line in f"{self.error}\n{self.output}".splitlines()]
        lines = [clean(line) for line in lines if line] or [f"it ended with {self.code}"]
        if lines[0].startswith("Traceback "):
            return lines[-1]
        # git surrounds its reason with advice.
        reasons = [line for line in lines if line.startswith(("fatal:", "error:"))]
        return (reasons or lines)[0]


def run_program(
    command: Sequence[str], environ: Mapping[str, str], timeout_s: float = 15.0,
    attached: bool = False,
) -> Completed:
    """Run a program to its end. Attached to the terminal, it has no timeout and no output here.

    Otherwise it has no terminal at all, so that it cannot stop there to ask for something. Never
    raises for a program that is missing or too slow.
    """
    pipe, no_input = (None, None) if attached else (subprocess.PIPE, subprocess.DEVNULL)
    try:
        done = subprocess.run(
            list(command), env=dict(environ), stdin=no_input, stdout=pipe, stderr=pipe,
            encoding="utf-8", errors="replace", timeout=None if attached else timeout_s,
            start_new_session=not attached, check=False,
        )
    except subprocess.TimeoutExpired:
        return Completed(None, "", f"{command[0]} took longer than {timeout_s:.0f} s")
    except OSError as error:
        return Completed(None, "", f"{command[0]}: {error.strerror}")
    return Completed(done.returncode, done.stdout or "", done.stderr or "")


def with_user_bus(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` with the variable that systemctl --user needs.

    Shells of su, cron and some ssh servers lack it.
    """
    folder = f"/run/user/{os.getuid()}"
    bus = {"XDG_RUNTIME_DIR": folder} if os.path.isdir(folder) else {}
    return {**bus, **environ}
# --- end shared


# --- shared: write_whole
#: Added to the name of a file while it is written. uninstall.py removes what is left of one.
DRAFT = ".ocp-draft"


def write_whole(path: str, content: bytes, mode: int = 0o600) -> None:
    """Replace a file so that after a crash the old or the new one is there, never a part.

    What root writes gets the owner of its folder: the state of a service of the machine belongs
    to the user that it runs as. Raises OSError.
    """
    draft = path + DRAFT
    with contextlib.suppress(FileNotFoundError):
        os.unlink(draft)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if os.geteuid() == 0:
        folder = os.stat(os.path.dirname(path))
        os.chown(draft, folder.st_uid, folder.st_gid)
    os.chmod(draft, mode)
    os.replace(draft, path)
# --- end shared


# --- shared: read_record
def ocp_home(environ: Mapping[str, str], home: str) -> str:
    """Return the folder of OCP's state: OCP_HOME, or ~/.ocp."""
    named = environ.get("OCP_HOME", "").strip() or "~/.ocp"
    return os.path.abspath(os.path.join(home, named[2:]) if named.startswith("~/") else named)


def read_record(path: str) -> dict[str, Any] | None:
    """Return the installer's record, install.json; None if there is none.

    Raises ValueError with advice for the user if it cannot be used, OSError if it cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("actions"), list):
        raise ValueError(f"{path} is damaged. Move it away, and run setup.py_install.py again.")
    if record.get("version") != 1:
        raise ValueError(f"{path} was written by another version of OCP: use its scripts.")
    return record
# --- end shared


# --- shared: env_file
_ASSIGNMENT = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)=(.*)")


def unquoted(text: str) -> str:
    """Return the value that `text`, what follows the = of a line, means to systemd and sh."""
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
            is_kept = quote == '"' and following not in ('"', "\\", "$", "`")
            found.append("\\" + following if is_kept else following)
        elif not quote and character in "'\"":
            quote = character
        else:
            found.append(character)
    return "".join(found)


def settings_of(text: str) -> dict[str, str]:
    """Return the settings in the text of an environment file, such as ocp.env."""
    matches = (_ASSIGNMENT.fullmatch(line) for line in text.split("\n"))
    return {match[1]: unquoted(match[2]) for match in matches if match}
# --- end shared


# --- shared: wrong_lines
def wrong_lines(path: str, text: str) -> str:
    """Return a sentence for each line of a settings file that sets nothing and is no comment.

    The server could be open to everybody without what such a line was meant to set. The line may
    contain a secret, so only its number is told."""
    wrong = (
        number for number, line in enumerate(text.split("\n"), 1)
        if line.strip() and not line.lstrip().startswith(("#", ";"))
        and not _ASSIGNMENT.fullmatch(line)
    )
    return "\n".join(
        f"{path}, line {number}: write NAME=VALUE, without `export` and without a space before the "
        "=." for number in wrong)
# --- end shared


# --- shared: removed_settings
#: Settings of the original that do not exist here: (name, or prefix with a star, why).
REMOVED_SETTINGS = (
    ("CLAUDE_TUI_*", "there is no terminal mode: warm processes answer faster than it did"),
    ("OCP_TUI_*", "there is no terminal mode: warm processes answer faster than it did"),
    ("CLAUDE_BREAKER_*", "there is no circuit breaker: it blocked healthy clients"),
    ("OCP_LOCAL_TOOLS", "CLAUDE_ALLOWED_TOOLS switches agent mode on"),
    ("OCP_SESSION_HEADER", "OCP_SESSION_ID takes the header, and the field session_id too"),
    ("OCP_SPAWN_REAL_HOME", "claude always runs with its own login and none of its settings"),
    ("CLAUDE_NO_CONTEXT", "CLAUDE.md and memory are never loaded"),
    ("OCP_STRUCTURED_MAX_ATTEMPTS", "claude validates structured output itself"),
    ("CLAUDE_AUTH_CHECK_INTERVAL_MS", "the login is known from real answers, not from probes"),
    ("CLAUDE_AUTH_CHECK_TIMEOUT_MS", "the login is known from real answers, not from probes"),
)
# --- end shared


# --- shared: drain
def drain_s(text: str) -> float:
    """Return the seconds of OCP_DRAIN; the server's default where it is no duration.

    A bare number is milliseconds, as for the server.
    """
    units = {"": 0.001, "ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}
    found = re.fullmatch(r"([0-9]{1,9}) ?(ms|s|m|h|d|)", text.strip().lower())
    return int(found[1]) * units[found[2]] if found else 20.0
# --- end shared


# --- shared: os_reason
def os_reason(error: OSError) -> str:
    """Return an error of the system in words: the file, where it is known, and the reason."""
    where = f"{error.filename}: " if isinstance(error.filename, str) else ""
    return f"{where}{error.strerror}" if error.strerror else str(error)
# --- end shared


# --- shared: confirm
def confirm(question: str, yes: bool, stdin: TextIO | None, stdout: TextIO) -> None:
    """Ask before something is changed, unless the user said --yes.

    Raises Problem for any answer but yes, and where nobody can be asked.
    """
    if yes:
        return
    # Whoever started the program may have closed its standard input.
    if stdin is None or not stdin.isatty():
        raise Problem(Exit.USAGE, "There is no terminal to ask on: say --yes, or --dry-run.")
    stdout.write(f"{question} [y/N] ")
    stdout.flush()
    if stdin.readline().strip().lower() not in ("y", "yes"):
        raise Problem(Exit.FAILED, "Nothing was changed.")
# --- end shared


# --- shared: shown_path
def shown_path(path: str, home: str) -> str:
    """Return a path as people write it."""
    return "~" + path[len(home):] if path.startswith(home + os.sep) else path
# --- end shared


# --- shared: http_json
class HttpProblem(Exception):
    """A request without a useful answer. `kind` is "unreachable" (nobody answered), "denied" (401,
    403), "upstream" (5xx) or "refused"; `status` is 0 where nobody answered, `body` the JSON."""

    def __init__(
        self, kind: str, message: str, status: int = 0, body: Any = None, request_id: str = ""
    ) -> None:
        super().__init__(message)
        self.kind, self.status, self.body = kind, status, body
        self.request_id = request_id


@contextlib.contextmanager
def http_open(
    method: str, url: str, body: object = None, key: str = "", timeout_s: float = 15.0,
    tls: ssl.SSLContext | None = None,
) -> Iterator[http.client.HTTPResponse]:
    """The answer to a request, its body still unread. Raises HttpProblem. No proxy is used and
    no redirection followed, so that the key reaches this address and no other."""
    parts = urllib.parse.urlsplit(url)
    connect: Any = http.client.HTTPConnection
    if parts.scheme == "https":
        connect = functools.partial(http.client.HTTPSConnection, context=tls)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    content = None
    if body is not None:
        headers["Content-Type"], content = "application/json", json.dumps(body).encode()
    with contextlib.closing(connect(parts.hostname or "", parts.port, timeout=timeout_s)) as link:
        try:
            target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            link.request(method, target, content, headers)
            answer = link.getresponse()
            text = b"" if answer.status < 300 else answer.read()
        except (OSError, http.client.HTTPException) as problem:
            reason = getattr(problem, "strerror", None) or str(problem) or "no HTTP came back"
            raise HttpProblem("unreachable", reason) from None
        with contextlib.closing(answer):
            if answer.status >= 300:
                raise http_problem(answer.status, text, answer.headers.get("X-Request-Id", ""))
            yield answer


def http_problem(status: int, text: bytes, request_id: str) -> HttpProblem:
    """The problem that an answer with such a status stands for."""
    kind = "denied" if status in (401, 403) else "upstream" if status >= 500 else "refused"
    body, message = None, text[:200].decode("utf-8", "replace").strip()
    with contextlib.suppress(ValueError):
        body = json.loads(text)
    error = body.get("error") if isinstance(body, dict) else None
    told = error.get("message") if isinstance(error, dict) else error
    return HttpProblem(kind, str(told or message), status, body, request_id)


def http_json(
    method: str, url: str, body: object = None, key: str = "", timeout_s: float = 15.0,
    tls: ssl.SSLContext | None = None,
) -> Any:
    """The JSON value that the server answers. Raises HttpProblem."""
    with http_open(method, url, body, key, timeout_s, tls) as answer:
        try:
            return json.loads(answer.read())
        except (OSError, http.client.HTTPException) as problem:
            raise HttpProblem("unreachable", f"the answer broke off: {problem}") from None
        except ValueError:
            raise HttpProblem("refused", "no JSON came back", answer.status) from None
# --- end shared


# --- shared: any_certificate
def any_certificate() -> ssl.SSLContext:
    """Return a context that accepts every certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
# --- end shared


# ==== 2. Host ================================================================
# The machine and the session that the program runs in, and its files. Everything that differs
# between a real run and a test is in a Host.

BACKUP = ".ocp-backup"


class StepFailed(Exception):
    """Why a step of the installation failed, and what to do about it."""


def refused(message: str) -> Problem:
    """Return the problem for which nothing is done."""
    return Problem(Exit.USAGE, message)


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
    #: None if whoever started the program has closed it.
    stdin: Optional[TextIO]

    def which(self, name: str) -> Optional[str]:
        """Return the path of a program of this session, None if there is none."""
        return shutil.which(name, path=self.environ.get("PATH"))

    def run(
        self, command: Iterable[str], env: Optional[Mapping[str, str]] = None, timeout_s: float = 90
    ) -> Completed:
        """Run a program to its end, by default with the environment of this session."""
        environ = self.environ if env is None else env
        return run_program(list(command), {**environ, "LC_ALL": "C"}, timeout_s)

    def succeeds(self, command: Iterable[str]) -> bool:
        """Return whether a program ends with 0."""
        return self.run(command).code == 0


def this_host(environ: Mapping[str, str]) -> Host:
    """Return the machine as it is."""
    account = pwd.getpwuid(os.getuid())
    return Host(
        environ=with_user_bus(environ),
        system=platform.system(),
        home=os.path.abspath(environ.get("HOME") or account.pw_dir),
        user=account.pw_name,
        uid=os.getuid(),
        here=os.path.dirname(os.path.abspath(__file__)),
        stdin=sys.stdin,
    )


def read_bytes(path: str) -> Optional[bytes]:
    """Return the content of a file, None if there is none. Raises OSError."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_text(path: str) -> str:
    """Return the content of a UTF-8 file, empty if there is none. Raises OSError."""
    return (read_bytes(path) or b"").decode("utf-8", "surrogateescape")


def checksum(content: bytes) -> str:
    """Return what tells later whether a file was changed."""
    return hashlib.sha256(content).hexdigest()


def mode_of(path: str) -> int:
    """Return the permission bits of a file that exists."""
    return stat.S_IMODE(os.stat(path).st_mode)


def is_unwritable(text: str) -> bool:
    """Return whether no line of a unit or of a settings file can hold this text.

    That is so for control characters and for bytes that are not UTF-8.
    """
    return bool(re.search("[\\x00-\\x1f\\x7f\\ud800-\\udfff]", text))


def iso_now() -> str:
    """Return the time in UTC as ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# ==== 3. Settings ============================================================
# ocp.env has one NAME=value in a line. systemd reads it, and so does /bin/sh for launchd; what is
# written here means the same to both. The file belongs to the user: only the lines of settings
# that change are replaced. The value of a setting comes from the command line, else from the
# file, the unit that is there, or this shell. No range is known here: the server checks values.

SETTINGS_HEADER = """\
# Settings of the OCP service, one NAME=value in a line; docs/settings.md lists them.
# A value with spaces or other special characters stands in "double quotes".
# The service reads this file when it starts. Keep it to yourself: there are keys in it.
"""
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
#: What claude or the server needs of this shell, because a service would not have it.
CARRIED = (
    "CLAUDE_BIN", "CLAUDE_CONFIG_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy",
    "https_proxy", "no_proxy", "NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE", "SSL_CERT_DIR",
)
#: What ocp_connect.py lets this shell trust. Its undo removes the files: no service may need them.
_OF_CONNECT = ("/ocp/server.pem", "/ocp/ca-bundle.pem")
SHELL_SETTINGS = (*(name for name, _ in OPTION_SETTINGS), *SECRETS, *CARRIED)
#: Of the environment in an earlier unit everything is taken over that starts like this ...
_TAKEN_OVER = ("CLAUDE_", "OCP_", "PROXY_")
#: ... except what only the original's own installation needed.
_LEFT_BEHIND = ("OCP_DIR_OVERRIDE", "OCP_HOME", "CLAUDECODE")
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]*")


def quoted(value: str) -> str:
    """Return a value as it has to stand behind the = of a line."""
    if _PLAIN.fullmatch(value):
        return value
    return '"' + re.sub(r'(["\\$`])', r"\\\1", value) + '"'


def edited_settings(text: str, values: Mapping[str, str]) -> str:
    """Return the text of the file with these settings in it, and all other lines unchanged."""
    lines = (text or SETTINGS_HEADER).rstrip("\n").split("\n")
    present = settings_of(text)
    for number, line in enumerate(lines):
        match = _ASSIGNMENT.fullmatch(line)
        if match and match[1] in values and present[match[1]] != values[match[1]]:
            lines[number] = f"{match[1]}={quoted(values[match[1]])}"
    lines += [f"{name}={quoted(value)}" for name, value in values.items() if name not in present]
    return "\n".join(lines) + "\n"


def shell_settings(host: Host) -> dict[str, str]:
    """Return the settings that this shell has."""
    return {name: host.environ[name] for name in SHELL_SETTINGS
            if host.environ.get(name) and not host.environ[name].endswith(_OF_CONNECT)}


def merged_settings(
    host: Host, options: argparse.Namespace, file: Mapping[str, str], unit: Mapping[str, str]
) -> dict[str, str]:
    """Return every setting with its value, from the place that comes first."""
    given = {name: getattr(options, attribute) for name, attribute in OPTION_SETTINGS}
    taken_over = {
        name: value for name, value in unit.items() if name in SHELL_SETTINGS
        or (name.startswith(_TAKEN_OVER) and name not in _LEFT_BEHIND)
    }
    return {
        **DEFAULTS, **shell_settings(host), **taken_over, **file,
        **{name: value for name, value in given.items() if value is not None},
    }


class Change(NamedTuple):
    """What becomes of settings of the original that have another effect here."""

    #: Names, or prefixes with a star.
    names: tuple[str, ...]
    why: str
    #: Whether that is so with its settings and in its mode.
    applies: Callable[[Mapping[str, str], str], bool] = lambda values, mode: True


_AGENT_MODE = ("CLAUDE_ALLOWED_TOOLS", "CLAUDE_SKIP_PERMISSIONS", "CLAUDE_MCP_CONFIG")
#: Settings in a service of the original that are not taken over. All others have the same name and
#: the same meaning here.
ORIGINAL_CHANGES = (
    *(Change((name,), why) for name, why in REMOVED_SETTINGS),
    Change(("OCP_DIR", "OCP_NO_SIBLING_EXEC", "OCP_SKIP_AUTH_TEST", "OCP_PROXY_URL"),
           "it was for the original's own scripts"),
    Change((API_KEY,), "the original ignored it in its mode of access",
           lambda values, mode: mode != "shared"),
    Change(("PROXY_ANONYMOUS_KEY", "PROXY_ADVERTISE_ANON_KEY"),
           "the original ignored it in its mode of access", lambda values, mode: mode != "multi"),
    Change(("CLAUDE_SKIP_PERMISSIONS",), "to the original only the word true meant yes",
           lambda values, mode: values["CLAUDE_SKIP_PERMISSIONS"] != "true"),
    Change(_AGENT_MODE, "in mode multi the original gave claude no tools; here every key could "
           "use them on this machine", lambda values, mode: mode == "multi"),
    Change(_AGENT_MODE, "whoever can connect could use tools on this machine",
           lambda values, mode: mode == "none" and not is_loopback(values.get(BIND, "127.0.0.1"))),
)


def settings_of_original(values: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the settings of a service of the original as they have to be here, and a sentence for
    each one that changes."""
    mode = values.get(AUTH_MODE) or ("shared" if values.get(API_KEY) else "none")
    kept, notes = dict(values), []
    for change in ORIGINAL_CHANGES:
        for name in sorted(kept):
            is_meant = any(fnmatch.fnmatchcase(name, pattern) for pattern in change.names)
            if is_meant and change.applies(values, mode):
                del kept[name]
                notes.append(f"{name} of the original is not taken over: {change.why}.")
    if kept.get("PROXY_ANONYMOUS_KEY") and kept.get("PROXY_ADVERTISE_ANON_KEY") != "1":
        kept["PROXY_ADVERTISE_ANON_KEY"] = "0"
        notes.append("PROXY_ADVERTISE_ANON_KEY=0, as in the original by default: its anonymous key "
                     "is shown to nobody.")
    if mode != "none":
        notes.append(f"In mode {mode} every client needs a key here, those on this machine too: "
                     "`ocp connect` sets tools up.")
    return kept, notes


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def check_exposure(values: Mapping[str, str]) -> None:
    """Raise Problem for a service that the whole network could use without a decision."""
    if is_loopback(values[BIND]) or values.get(AUTH_MODE) or values.get(API_KEY):
        return
    raise refused(
        f"On {values[BIND]} others can reach the service, so say who may use it:\n"
        "  --auth-mode shared   whoever has the one key, which is created now\n"
        "  --auth-mode multi    whoever has a key of their own, created later with `ocp keys add`\n"
        "  --auth-mode none     everybody who can connect, at the expense of your plan"
    )


# ==== 4. Services ============================================================
# What differs between service managers, as data: a Service says where its unit is and which
# commands do what. The services of the original are rows of the same kind.

SYSTEMD_LABEL = "ocp.service"
LAUNCHD_LABEL = "dev.ocp.server"
#: The second service, with --channels.
CHANNELS_UNIT, CHANNELS_AGENT = "ocp-channels.service", "dev.ocp.channels"


class Service(NamedTuple):
    """How a service manager is told about OCP. An empty command means that none is needed."""

    #: "systemd-user", "systemd-system", "launchd" or "none".
    platform: str
    label: str
    unit_path: str
    #: Makes the manager read units again.
    reload: Command = ()
    #: Makes it start the service whenever the machine or the session starts, and the reverse.
    enable: Command = ()
    disable: Command = ()
    #: Tell by their exit codes whether it is enabled, and whether it runs.
    is_enabled: Command = ()
    is_active: Command = ()
    #: Has to run before `start` when the service runs already.
    stop_first: Command = ()
    start: Command = ()
    #: For people: shows why it does not start.
    logs: str = ""
    #: For people: starts it again after its settings were edited.
    restart_words: str = ""
    #: Of launchd, such as gui/501.
    domain: str = ""
    #: For ocp: {verb: [{command, may_fail, tries}]}.
    commands: Json = {}


def systemd_service(folder: str, label: str, *, is_system: bool) -> Service:
    """Return the unit `label` of the user's systemd, or of the machine's."""
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
    """Return the agent `label` of launchd in a domain such as gui/501."""
    unit_path = os.path.join(home, "Library", "LaunchAgents", f"{label}.plist")
    target = f"{domain}/{label}"
    bootout = ("launchctl", "bootout", target)
    bootstrap = ("launchctl", "bootstrap", domain, unit_path)
    # A bootstrap fails when the agent is loaded already.
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
    """Return where systemd looks for the units of a user."""
    config = host.environ.get("XDG_CONFIG_HOME") or os.path.join(host.home, ".config")
    return os.path.join(config, "systemd", "user")


def launchd_domain(host: Host) -> str:
    """Return the domain of launchd for the service.

    It is the graphical session if there is one; over ssh alone there is only the user's. An agent
    that runs in the user's stays there, also when somebody has logged in on the screen since.
    """
    graphical, background = f"gui/{host.uid}", f"user/{host.uid}"
    if host.succeeds(("launchctl", "print", f"{background}/{LAUNCHD_LABEL}")):
        return background
    return graphical if host.succeeds(("launchctl", "print", graphical)) else background


_RUNNING_STATES = ("running", "degraded", "starting", "initializing", "maintenance")


def _system_service(host: Host) -> Service:
    """Return the service of the machine. Raises Problem."""
    if host.system != "Linux" or host.which("systemctl") is None:
        raise refused("--system needs systemd. Leave it out for a service of your own.")
    if host.uid != 0:
        raise refused("--system needs root: run it with sudo.")
    if host.run(("systemctl", "is-system-running")).output.strip() not in _RUNNING_STATES:
        raise refused("systemd does not run this machine, so --system cannot work here.")
    return systemd_service("/etc/systemd/system", SYSTEMD_LABEL, is_system=True)


def find_service(host: Host, data_dir: str, *, is_system: bool) -> tuple[Service, str]:
    """Return the service to install, and a note about it. Raises Problem."""
    if is_system:
        return _system_service(host), ""
    if host.uid == 0 and host.environ.get("SUDO_USER"):
        raise refused("Run it without sudo for a service of your own, or with --system.")
    if host.system == "Darwin" and host.which("launchctl"):
        log_path = os.path.join(data_dir, "logs", "service.log")
        return launchd_service(host.home, launchd_domain(host), LAUNCHD_LABEL, log_path), ""
    if host.which("systemctl") is None:
        return NO_SERVICE, "There is no service manager here that OCP knows (systemd, launchd)."
    if not host.succeeds(("systemctl", "--user", "show-environment")):
        return NO_SERVICE, (
            "The user's systemd cannot be reached. Log in as that user over ssh or on the screen "
            f"(not by su), or run `sudo loginctl enable-linger {shlex.quote(host.user)}`, and run "
            "this again; or use --system."
        )
    return systemd_service(user_unit_folder(host), SYSTEMD_LABEL, is_system=False), ""


def channels_service(service: Service, home: str, log_path: str) -> Service:
    """Return the service of the gateway to chats, beside that of the server. Raises Problem."""
    if service.platform == "systemd-user":
        folder = os.path.dirname(service.unit_path)
        return systemd_service(folder, CHANNELS_UNIT, is_system=False)
    if service.platform == "launchd":
        return launchd_service(home, service.domain, CHANNELS_AGENT, log_path)
    raise refused("--channels needs a service of your own: leave out --system, or start it by "
                  "hand: ocp channels start -d")


def legacy_services(host: Host, platform_name: str) -> list[Service]:
    """Return the services of the original that are installed here, also where the user's systemd
    cannot be reached."""
    found = []
    if platform_name == "systemd-user" or (platform_name == "none" and host.which("systemctl")):
        folder = user_unit_folder(host)
        found = [systemd_service(folder, label, is_system=False) for label in LEGACY_UNITS]
    elif platform_name == "launchd":
        domain = launchd_domain(host)
        found = [launchd_service(host.home, domain, label, "") for label in LEGACY_AGENTS]
    return [service for service in found if os.path.exists(service.unit_path)]


def unit_settings(path: str) -> dict[str, str]:
    """Return the environment that a unit, with what was added to it, or an agent gives its service.
    Raises OSError."""
    added = sorted(glob.glob(os.path.join(glob.escape(path + ".d"), "*.conf")))
    return {name: value for each in (path, *added) for name, value in _settings_in(each).items()}


def _settings_in(path: str) -> dict[str, str]:
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


def legacy_port(service: Service) -> str:
    """Return the port that a service of the original was given."""
    return unit_settings(service.unit_path).get(PORT) or DEFAULTS[PORT]


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
    #: How long running answers get to finish when the service is stopped.
    drain_s: int = 20

    @property
    def server_path(self) -> str:
        """Return the path of the server's script."""
        return os.path.join(self.install_dir, "ocp_server.py")

    @property
    def url(self) -> str:
        """Return the address of the service for this machine."""
        host = "127.0.0.1" if self.bind in ("0.0.0.0", "::", "") else self.bind
        host = f"[{host}]" if ":" in host else host
        return f"{'https' if self.is_secure else 'http'}://{host}:{self.port}"

    @property
    def is_system(self) -> bool:
        """Return whether it is a service of the machine rather than of a user."""
        return self.service.platform == "systemd-system"

    @property
    def stop_timeout_s(self) -> int:
        """Return how long the service manager waits before it kills the server."""
        return self.drain_s + 25

    @property
    def log_path(self) -> str:
        """Return where launchd puts what the server prints."""
        return os.path.join(self.data_dir, "logs", "service.log")


def systemd_word(text: str) -> str:
    """Return a word of an ExecStart line that means `text` literally."""
    for character in ("\\", '"'):
        text = text.replace(character, "\\" + character)
    return '"' + text.replace("%", "%%").replace("$", "$$") + '"'


def systemd_path(path: str) -> str:
    """Return a path for EnvironmentFile, which takes no quotes but expands wildcards."""
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
    """Return the unit, for the user's systemd or for the machine's."""
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
        f"TimeoutStopSec={install.stop_timeout_s}\n"
        "UMask=0077\n"
        f"{own_user if install.is_system else ''}"
        "\n[Install]\n"
        f"WantedBy={'multi-user.target' if install.is_system else 'default.target'}\n"
    )


#: launchd has no settings files: a shell reads the file, and becomes the server. If it cannot read
#: the file, it ends.
_WITH_SETTINGS = 'set -a; . "$1"; shift; exec "$@"'


def command_with_settings(install: Installation) -> list[str]:
    """Return the command that starts the server with its settings, without systemd."""
    shell = ["/bin/sh", "-c", _WITH_SETTINGS, "ocp"]
    return [*shell, install.env_file, install.python, install.server_path]


def command_by_hand(install: Installation) -> str:
    """Return the line that starts the server in a shell. The server itself reads the settings in
    its folder."""
    if install.env_file != os.path.join(install.data_dir, "ocp.env"):
        return shlex.join(command_with_settings(install))
    line = shlex.join([install.python, install.server_path])
    if install.data_dir == os.path.join(install.home, ".ocp"):
        return line
    return f"OCP_HOME={shlex.quote(install.data_dir)} {line}"


def launchd_plist(install: Installation) -> bytes:
    """Return the agent for launchd."""
    # Without this, an agent can be loaded into the graphical session only.
    background = {"LimitLoadToSessionType": "Background"}
    return plistlib.dumps({
        **(background if install.service.domain.startswith("user/") else {}),
        "Label": install.service.label,
        "ProgramArguments": command_with_settings(install),
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": 10,
        "ExitTimeOut": install.stop_timeout_s,
        "Umask": 0o077,
        "StandardOutPath": install.log_path,
        "StandardErrorPath": install.log_path,
    })


def channels_command(install: Installation) -> list[str]:
    """Return the command that runs the gateway to chats."""
    return [install.python, os.path.join(install.install_dir, "ocp_channels.py"), "start"]


#: How long the gateway gets to end the answers that are being written.
CHANNELS_STOP_S = 45


def channels_systemd_unit(install: Installation) -> str:
    """Return the unit of the gateway to chats. Its settings are in a file of its own."""
    command = " ".join(map(systemd_word, channels_command(install)))
    return (
        "# Written by OCP's setup.py_install.py.\n"
        "[Unit]\nDescription=OCP in chats\nAfter=ocp.service\n"
        f"\n[Service]\nExecStart={command}\n"
        f"Environment={systemd_word('OCP_HOME=' + install.data_dir).replace('$$', '$')}\n"
        # The exit code for settings that cannot be used; trying again would not help.
        "Restart=on-failure\nRestartSec=5\nRestartPreventExitStatus=2\n"
        f"TimeoutStopSec={CHANNELS_STOP_S}\nUMask=0077\n"
        "\n[Install]\nWantedBy=default.target\n"
    )


def channels_plist(install: Installation, service: Service) -> bytes:
    """Return the agent of the gateway to chats."""
    log_path = os.path.join(install.data_dir, "logs", "channels.log")
    return plistlib.dumps({
        "Label": service.label, "ProgramArguments": channels_command(install),
        "EnvironmentVariables": {"OCP_HOME": install.data_dir}, "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False}, "ThrottleInterval": 10,
        "ExitTimeOut": CHANNELS_STOP_S, "Umask": 0o077,
        "StandardOutPath": log_path, "StandardErrorPath": log_path,
    })


def launcher_script(install: Installation) -> str:
    """Return the program `ocp`: the right python with the right file."""
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
# A step of a plan is data; the functions here tell whether it is done, how it is described and
# recorded, and perform it. Nothing is performed that is not in the record first.


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
    #: Has to run after each change of the file, its removal included.
    then: Command = ()
    #: Whether it is the user's data, which stays when OCP is removed.
    is_data: bool = False


class MoveAway(NamedTuple):
    """A file that has to be elsewhere, until OCP is removed."""

    path: str
    what: str
    #: Has to run after the file was moved, and after it was put back.
    then: Command = ()


class Run(NamedTuple):
    """A command, and the one that undoes it."""

    command: Command
    what: str
    needed: bool
    undo: Command = ()
    #: Whether uninstall.py runs `undo` also when somebody else ran the command.
    is_ours: bool = False
    attempts: int = 1
    #: What to do by hand when it fails; without this, a failure ends the installation.
    advice: str = ""


Action = Union[MakeDir, WriteFile, MoveAway, Run]


def is_done(action: Action) -> bool:
    """Return whether there is nothing to do. Raises OSError."""
    if isinstance(action, MakeDir):
        return os.path.isdir(action.path)
    if isinstance(action, Run):
        return not action.needed
    if isinstance(action, MoveAway):
        return not os.path.lexists(action.path)
    is_foreign_link = os.path.islink(action.path) and not action.is_data
    if is_foreign_link or read_bytes(action.path) != action.content:
        return False
    return mode_of(action.path) == action.mode


def describe(action: Action, home: str) -> str:
    """Return one line for people."""
    if isinstance(action, MakeDir):
        return f"make the folder {shown_path(action.path, home)}"
    if isinstance(action, WriteFile):
        return f"write {shown_path(action.path, home)} ({action.what}, mode {action.mode:04o})"
    if isinstance(action, MoveAway):
        return f"move {shown_path(action.path, home)} away, and keep it ({action.what})"
    return f"run {shlex.join(action.command)} ({action.what})"


def _free_backup_path(path: str) -> str:
    number = 1
    backup = path + BACKUP
    while os.path.lexists(backup):
        number += 1
        backup = f"{path}{BACKUP}-{number}"
    return backup


def entry_for(action: Action, earlier: Optional[Json]) -> Json:
    """Return the record's entry for an action, after the `earlier` one. Raises OSError."""
    if isinstance(action, MakeDir):
        return {"kind": "make_dir", "path": action.path, "backup": None}
    if isinstance(action, Run):
        return {
            "kind": "run", "path": None, "backup": None,
            "command": list(action.command), "undo": list(action.undo),
        }
    if isinstance(action, MoveAway):
        # Of several that were there one after the other, the last one comes back.
        backup = earlier["backup"] if earlier else _free_backup_path(action.path)
        return {"kind": "move_file", "path": action.path, "backup": backup,
                "then": list(action.then)}
    old = earlier or {"sha256": [], "backup": None}
    new_sum = checksum(action.content)
    backup = old["backup"]
    present = read_bytes(action.path)
    # Only what this program wrote may be overwritten without a backup. It writes no links.
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
    # The user may keep data elsewhere, with a link here.
    path = os.path.realpath(action.path) if action.is_data else action.path
    write_whole(path, action.content, action.mode)
    _run_after(host, action.then)


def _run_after(host: Host, command: Command) -> None:
    done = host.run(command) if command else None
    if done is not None and done.code != 0:
        raise StepFailed(f"{shlex.join(command)}: {done.complaint}")


def _run(host: Host, action: Run) -> str:
    """Run a command; return what to tell about a failure that is not the end."""
    done = host.run(action.command)
    for _ in range(action.attempts - 1):
        if done.code == 0:
            break
        # launchd refuses for a moment after it has stopped a service.
        time.sleep(1)
        done = host.run(action.command)
    if done.code == 0:
        return ""
    if action.advice:
        return f"{shlex.join(action.command)} failed: {done.complaint}. {action.advice}"
    raise StepFailed(f"{shlex.join(action.command)}: {done.complaint}")


def perform(host: Host, action: Action, entry: Json) -> str:
    """Perform a step; return what to tell about it, if anything. Raises StepFailed, OSError."""
    if isinstance(action, MakeDir):
        os.mkdir(action.path, action.mode)
        return ""
    if isinstance(action, WriteFile):
        _write(host, action, entry)
        return ""
    if isinstance(action, MoveAway):
        os.replace(action.path, entry["backup"])
        _run_after(host, action.then)
        return ""
    return _run(host, action)


# ==== 7. Inspection ==========================================================
# What is there before anything changes. The programs that run here only report.


class Found(NamedTuple):
    """What an installation starts from."""

    #: The record of an earlier installation.
    record: Optional[Json]
    settings_text: str
    #: The environment in the unit that is there now, ours or the original's.
    unit_settings: dict[str, str]
    #: A sentence for each setting in a unit of the original that changes.
    changes: list[str]
    legacy: list[Service]
    is_active: bool
    is_enabled: bool
    #: Whether the user's services run while the user is logged out; None = not relevant or unknown.
    lingers: Optional[bool]


def _lingers(host: Host, service: Service) -> Optional[bool]:
    if service.platform != "systemd-user" or host.which("loginctl") is None:
        return None
    shown = host.run(("loginctl", "show-user", host.user, "--property=Linger"))
    if "not logged in or lingering" in shown.error:
        return False
    answer = re.fullmatch(r"Linger=(yes|no)", shown.output.strip())
    return answer[1] == "yes" if answer else None


def inspect(host: Host, service: Service, env_file: str, record_path: str) -> Found:
    """Return everything that is there. Raises Problem, OSError."""
    try:
        record = read_record(record_path)
    except ValueError as error:
        raise refused(str(error)) from None
    legacy = legacy_services(host, service.platform)
    values: dict[str, str] = {}
    changes: list[str] = []
    if os.path.exists(service.unit_path):
        values = unit_settings(service.unit_path)
    elif legacy:
        values, changes = settings_of_original(unit_settings(legacy[0].unit_path))
    return Found(
        record=record,
        settings_text=read_text(env_file),
        unit_settings=values,
        changes=changes,
        legacy=legacy,
        is_active=bool(service.is_active) and host.succeeds(service.is_active),
        is_enabled=bool(service.is_enabled) and host.succeeds(service.is_enabled),
        lingers=_lingers(host, service),
    )


def stable_python() -> str:
    """Return this interpreter by a path that survives virtual environments and small updates."""
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


def is_readable_by_all(path: str) -> bool:
    """Return whether a service of the machine can read this file, sandboxed and as another user."""
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


def writable_by_others(here: str, owners: Collection[int] = (0,)) -> str:
    """Return a file or folder that users other than `owners` may change; "" if there is none.

    Looked at are the folder, those above it, and what is directly in it: what root runs from
    there with `sudo ocp`, and git's settings for `sudo ocp update`.
    """
    above = here = os.path.realpath(here)
    paths = [os.path.join(here, ".git", "config"), *(entry.path for entry in os.scandir(here))]
    while above != os.path.dirname(above):
        paths.append(above)
        above = os.path.dirname(above)
    for path in reversed(paths):
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(path)
            bits = stat.S_IWOTH | (0 if found.st_gid == 0 else stat.S_IWGRP)
            # In a sticky folder nobody can replace the files of another user.
            is_open = found.st_mode & bits and not found.st_mode & stat.S_ISVTX
            if is_open or found.st_uid not in owners:
                return path
    return ""


def check_owner(here: str) -> None:
    """Raise Problem if root would run what another user may change."""
    path = writable_by_others(here)
    if path:
        folder = shlex.quote(here)
        raise refused(
            f"Users other than root may write to {path}, and root would run what is there. Run\n"
            f"  sudo chown -R root:root {folder} && sudo chmod -R go-w {folder}\n"
            "or, if that is not enough, move the folder to /opt/ocp.")


def python_for(here: str, *, is_system: bool) -> str:
    """Return the interpreter that the service runs on. Raises Problem."""
    python = stable_python()
    if is_system and not is_readable_by_all(os.path.join(here, "ocp_server.py")):
        raise refused(
            f"A service of the machine cannot read {here}. Move this folder to /opt/ocp, "
            "and run setup.py_install.py there."
        )
    if is_system and not is_readable_by_all(python):
        raise refused(
            f"A service of the machine cannot run {python}. Use the system's own: "
            "sudo /usr/bin/python3 setup.py_install.py --system"
        )
    if is_system:
        check_owner(here)
    # systemd takes the first word of a command as it stands: there is no way to write a dollar.
    if is_unwritable(python + here) or "$" in python:
        raise refused(f"No unit can name {python!r} or {here!r}: move them to a plainer path.")
    return python


def installed_version(server_path: str) -> str:
    """Return the version of the server in this file. Raises Problem if it is none."""
    match = re.search(r'^VERSION = "([^"]+)"$', read_text(server_path), re.M)
    if match is None:
        raise refused(f"{server_path} is not the server of OCP: run this from its own folder.")
    return match[1]


# ==== 8. Planning ============================================================
# First where everything goes and with which settings; the server says whether it accepts them.
# Then a list of actions: STEPS is the table of what an installation consists of, in order. A step
# looks at the situation and yields its actions, also those that are done already.


def state_folder(host: Host) -> str:
    """Return the folder of the record, and of the data of a user's service. Raises Problem."""
    folder = ocp_home(host.environ, host.home)
    for path in (folder, host.home):
        if is_unwritable(path):
            raise refused(f"No unit can name {path!r}: move it to a plainer path.")
    return folder


def planned_installation(host: Host, options: argparse.Namespace, service: Service) -> Installation:
    """Return where everything goes, still without port and bind. Raises Problem."""
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


def with_address(install: Installation, values: Mapping[str, str]) -> Installation:
    """Return the installation with what its unit needs of the settings. Raises Problem."""
    text = values[PORT]
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) == 0:
        raise refused(f"{PORT}={text}: a service needs a port that clients can rely on.")
    # What the server does not take as a duration, it refuses before anything is installed.
    drain = math.ceil(drain_s(values.get("OCP_DRAIN", "")))
    return install._replace(
        port=int(text), bind=values[BIND], is_secure=bool(values.get("OCP_TLS_CERT")),
        drain_s=drain)


def path_for(host: Host, install: Installation, values: Mapping[str, str]) -> str:
    """Return the PATH of the service: where claude and node are now, and the usual places."""
    usual = ["/usr/local/bin", "/usr/bin", "/bin"]
    if host.system == "Darwin":
        usual.insert(0, "/opt/homebrew/bin")
    home = install.data_dir if install.is_system else host.home
    programs = [values.get("CLAUDE_BIN") or host.which("claude"), host.which("node")]
    found = [os.path.dirname(each) for each in programs if each and os.path.isabs(each)]
    if install.is_system:
        found = [each for each in found if not (each + "/").startswith(_PRIVATE_FOLDERS)]
    folders = dict.fromkeys([*found, os.path.join(home, ".local", "bin"), *usual])
    # A PATH cannot contain a folder with a colon in its name.
    return ":".join(each for each in folders if ":" not in each)


def planned_values(
    host: Host, options: argparse.Namespace, install: Installation, found: Found
) -> dict[str, str]:
    """Return the settings of the service. Raises Problem."""
    values = merged_settings(
        host, options, settings_of(found.settings_text), found.unit_settings)
    for name, value in values.items():
        if is_unwritable(value):
            raise refused(f"{name} contains a line break or another control character.")
    check_exposure(values)
    if values.get(AUTH_MODE) == "shared" and not values.get(API_KEY):
        values[API_KEY] = "ocp_" + secrets.token_urlsafe(24)
    if install.data_dir != os.path.join(host.home, ".ocp"):
        values["OCP_HOME"] = install.data_dir
    values.setdefault("PATH", path_for(host, install, values))
    return values


class Verdict(NamedTuple):
    """What the server says about settings."""

    #: Why it would not start with them; empty if it would.
    problem: str
    #: Why it could not use claude; empty if it could.
    claude_problem: str


def check_settings(host: Host, install: Installation, values: Mapping[str, str]) -> Verdict:
    """Return the verdict of `ocp_server.py --check`, run with an empty state folder."""
    kept = ("LANG", "LD_LIBRARY_PATH", "TMPDIR")
    inherited = {name: host.environ[name] for name in kept if name in host.environ}
    home = install.data_dir if install.is_system else install.home
    with tempfile.TemporaryDirectory(prefix="ocp-check-") as scratch:
        env = {**inherited, **values, "HOME": home, "OCP_HOME": scratch}
        command = [install.python, install.server_path, "--check"]
        whole = host.run(command, env)
        if whole.code == 0:
            return Verdict("", "")
        # The demo needs no claude, so it complains about settings only.
        settings = host.run([*command, "--demo"], env)
    if settings.code != 0:
        return Verdict(_all_complaints(settings), "")
    return Verdict("", _all_complaints(whole))


def _all_complaints(done: Completed) -> str:
    lines = [line[5:] if line.startswith("ocp: ") else line for line in done.error.splitlines()]
    return "\n".join(lines) or done.complaint


def accepted_values(
    host: Host, install: Installation, values: dict[str, str]
) -> tuple[dict[str, str], str]:
    """Return the settings, and why claude cannot be used with them.

    They get a new PATH if claude has moved since the old one was written. Raises Problem for
    settings that the server does not accept.
    """
    verdict = check_settings(host, install, values)
    if verdict.problem:
        raise refused(
            f"The server would not start with these settings:\n{verdict.problem}\n"
            f"A line in {install.env_file} comes before the settings of this shell and of a "
            "service that is there.")
    moved = {**values, "PATH": path_for(host, install, values)}
    if verdict.claude_problem and moved != values:
        if not check_settings(host, install, moved).claude_problem:
            return moved, ""
    return values, verdict.claude_problem


#: Of these none is left out: the service would be open to others, or not where they look for it.
_NEVER_LEFT_OUT = (PORT, BIND, AUTH_MODE, *SECRETS)


def without_refused(
    host: Host, install: Installation, values: dict[str, str], found: Found
) -> tuple[dict[str, str], list[str]]:
    """Return the settings without those of the original's service whose values the server refuses,
    and a sentence for each of these."""
    theirs = [name for name, value in found.unit_settings.items() if found.legacy
              and values.get(name) == value and name not in _NEVER_LEFT_OUT]
    problem = check_settings(host, install, values).problem if theirs else ""
    refused_lines = {line.partition(": ")[0]: line for line in problem.splitlines()}
    notes = [f"{line}; of the original, it is not taken over."
             for name, line in refused_lines.items() if name in theirs]
    return {name: value for name, value in values.items()
            if name not in theirs or name not in refused_lines}, notes


class Situation(NamedTuple):
    """Everything that a step may look at."""

    host: Host
    install: Installation
    found: Found
    #: The content of the settings file.
    values: dict[str, str]
    should_start: bool
    #: Whether the service that runs is not the version in the folder.
    is_outdated: bool
    #: The service of the gateway to chats, if it is wanted.
    channels: Optional[Service] = None


def missing_folders(path: str, mode: int = 0o755) -> Iterator[MakeDir]:
    """Yield the folders that `path` needs, outermost first."""
    missing = []
    while not os.path.isdir(path):
        missing.append(MakeDir(path, mode))
        path = os.path.dirname(path)
    yield from reversed(missing)


def plan_settings(situation: Situation) -> Iterator[Action]:
    """Plan the settings file."""
    env_file = situation.install.env_file
    text = edited_settings(situation.found.settings_text, situation.values)
    yield from missing_folders(os.path.dirname(env_file), 0o700)
    content = text.encode("utf-8", "surrogateescape")
    yield WriteFile(env_file, content, 0o600, "settings", is_data=True)


def plan_account(situation: Situation) -> Iterator[Action]:
    """Plan the user that a service of the machine runs as. It stays, because it owns files."""
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


def plan_unit(situation: Situation) -> Iterator[Action]:
    """Plan the unit, which names the settings file."""
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
    """Plan the program `ocp`."""
    install = situation.install
    if install.launcher is None:
        return
    content = launcher_script(install).encode("utf-8", "surrogateescape")
    yield from missing_folders(os.path.dirname(install.launcher))
    yield WriteFile(install.launcher, content, 0o755, "the ocp command")


def plan_legacy(situation: Situation) -> Iterator[Action]:
    """Stop services of the original that use the same port, and move their files away."""
    host, values = situation.host, situation.values
    for old in situation.found.legacy:
        if legacy_port(old) != values[PORT] or situation.install.service == NO_SERVICE:
            continue
        is_active = host.succeeds(old.is_active)
        what = "the original's service frees the port"
        if old.platform == "launchd":
            target = old.disable[-1]
            # They are undone in the other order, because a disabled agent does not start.
            yield Run(old.disable, what, is_active, old.start)
            yield Run(("launchctl", "disable", target), what, is_active, old.enable)
        else:
            needed = is_active or host.succeeds(old.is_enabled)
            undo = (*old.enable[:-1], *(("--now",) if is_active else ()), old.label)
            yield Run(old.disable, what, needed, undo)
        yield MoveAway(old.unit_path, "uninstall.py puts it back", old.reload)


def plan_enable(situation: Situation) -> Iterator[Action]:
    """Let the service start with the machine or the session."""
    service, found = situation.install.service, situation.found
    if not service.enable:
        return
    is_recorded = any(entry.get("command") == list(service.enable)
                      for entry in (found.record or {"actions": []})["actions"])
    is_enabled = found.is_enabled if service.is_enabled else is_recorded
    when = "start it with the machine" if situation.install.is_system else "start it at login"
    yield Run(service.enable, when, not is_enabled, service.disable, is_ours=True)


def plan_linger(situation: Situation) -> Iterator[Action]:
    """Let the service run while its user is logged out."""
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
    """Return whether an earlier run was interrupted: a running service may have old files."""
    return record is not None and not record.get("complete", True)


def plan_start(situation: Situation) -> Iterator[Action]:
    """Let the service run with the files as they are planned."""
    service, found = situation.install.service, situation.found
    if service.reload and is_unfinished(found.record):
        yield Run(service.reload, "after an interrupted installation", True)
    if not service.start or not situation.should_start:
        return
    is_changed = any(not is_done(action) for step in (plan_settings, plan_unit)
                     for action in step(situation))
    is_stale = is_changed or situation.is_outdated or is_unfinished(found.record)
    needed = is_stale or not found.is_active
    if service.stop_first:
        yield Run(service.stop_first, "stop it", needed and found.is_active)
    attempts = 5 if service.platform == "launchd" else 1
    yield Run(service.start, "start it", needed, attempts=attempts)


def plan_channels(situation: Situation) -> Iterator[Action]:
    """Plan the service of the gateway to chats."""
    install, host, service = situation.install, situation.host, situation.channels
    if service is None:
        return
    content = channels_systemd_unit(install).encode("utf-8", "surrogateescape")
    if service.platform == "launchd":
        content = channels_plist(install, service)
        yield from missing_folders(os.path.join(install.data_dir, "logs"), 0o700)
    yield from missing_folders(os.path.dirname(service.unit_path))
    unit = WriteFile(service.unit_path, content, 0o644, "unit of the chats", then=service.reload)
    yield unit
    is_active = host.succeeds(service.is_active)
    is_enabled = host.succeeds(service.is_enabled or service.is_active)
    yield Run(service.enable, "start the chats at login", not is_enabled, service.disable,
              is_ours=True)
    if situation.should_start:
        needed = not is_done(unit) or situation.is_outdated or not is_active
        if service.stop_first:
            yield Run(service.stop_first, "stop the chats", needed and is_active)
        yield Run(service.start, "start the chats", needed,
                  attempts=5 if service.platform == "launchd" else 1)


STEPS: tuple[Callable[[Situation], Iterable[Action]], ...] = (
    plan_settings,
    plan_account,
    plan_unit,
    plan_launcher,
    plan_legacy,
    plan_enable,
    plan_linger,
    plan_start,
    plan_channels,
)


def plan(situation: Situation) -> list[Action]:
    """Return all actions, in order; a folder that several need comes once."""
    actions = [action for step in STEPS for action in step(situation)]
    return [action for at, action in enumerate(actions) if action not in actions[:at]]


def busy_problem(bind: str, port: int) -> str:
    """Return why a server could not listen there, empty if it could."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            bind, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as attempt:
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            attempt.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    except UnicodeError:
        return "no host has such a name"
    return ""


def check_port(situation: Situation) -> None:
    """Raise Problem if another program has the port."""
    install, found = situation.install, situation.found
    port_before = settings_of(found.settings_text).get(PORT, DEFAULTS[PORT])
    is_own = found.is_active and port_before == str(install.port)
    becomes_free = install.service != NO_SERVICE and any(
        legacy_port(old) == str(install.port) for old in found.legacy)
    if is_own or becomes_free or not situation.should_start:
        return
    problem = busy_problem(install.bind, install.port)
    if problem:
        raise refused(
            f"Nothing can listen on {install.bind} port {install.port}: {problem}. End what uses "
            "it (an OCP that was started by hand, perhaps), or take another port with --port."
        )


def check_platform(service: Service, found: Found, note: str) -> None:
    """Raise Problem if OCP is installed here in another way."""
    before = (found.record or {"platform": "none"})["platform"]
    if before in (service.platform, "none"):
        return
    if service.platform == "none":
        raise refused(note)
    raise refused(
        f"OCP is installed here as {before} already. "
        "Run uninstall.py first; it keeps your settings and data."
    )


# ==== 9. Record ==============================================================
# install.json says what is installed, and everything that was done for it. An action is in it
# before it is performed, so that whatever an interruption leaves behind is known.


def file_entry(entries: Iterable[Json], action: Action) -> Optional[Json]:
    """Return the entry of an action's file, None if there is none."""
    kinds = {WriteFile: "write_file", MoveAway: "move_file"}
    for entry in entries:
        if isinstance(action, (WriteFile, MoveAway)) and entry.get("path") == action.path \
                and entry.get("kind") == kinds[type(action)]:
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
        """Return where the same thing stands already, or the end."""
        for at, known in enumerate(self._entries):
            if all(known.get(name) == entry.get(name) for name in ("kind", "path", "command")):
                return at
        return len(self._entries)

    def entry_of(self, action: Action) -> Json:
        """Return the entry that an action would get now. Raises OSError."""
        return entry_for(action, file_entry(self._entries, action))

    def note(self, action: Action) -> Json:
        """Enter an action, in the place of an entry about the same thing."""
        entry = self.entry_of(action)
        at = self._index(entry)
        self._entries[at:at + 1] = [entry]
        return entry

    def adopt(self, actions: Iterable[Action]) -> None:
        """Enter what is already as planned and has to go with OCP."""
        for action in actions:
            is_ours = isinstance(action, WriteFile) or (isinstance(action, Run) and action.is_ours)
            if is_ours and is_done(action):
                self.note(action)

    def as_json(self, *, complete: bool) -> Json:
        """Return the content of the file."""
        return {**self.fields, "complete": complete, "actions": self._entries}

    def is_current(self) -> bool:
        """Return whether the file has this content already."""
        return self._earlier == self.as_json(complete=True)

    def save(self, *, complete: bool) -> None:
        """Write the file. Raises OSError."""
        os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
        text = json.dumps(self.as_json(complete=complete), indent=2) + "\n"
        write_whole(self._path, text.encode("ascii"), 0o600)


Performer = Callable[[Host, Action, Json], str]


def apply(
    host: Host, actions: Iterable[Action], record: Record, say: Callable[[str], None],
    performer: Performer = perform,
) -> None:
    """Perform what is not done, each action recorded before. Raises StepFailed, OSError, and
    Problem where nothing can be recorded."""
    planned = list(actions)
    record.adopt(planned)
    try:
        record.save(complete=False)
    except OSError as error:
        raise Problem(Exit.FAILED, f"{os_reason(error)}\nNothing was changed.") from None
    for action in planned:
        if is_done(action):
            continue
        entry = record.note(action)
        record.save(complete=False)
        say(f"  {describe(action, host.home)}")
        complaint = performer(host, action, entry)
        if complaint:
            say(f"    {complaint}")
    record.save(complete=True)


# ==== 10. Verification =======================================================
# The service has to answer as the version that was installed and, unless --skip-answer was given,
# to answer one question of a few words.

_QUESTION = "Say hello in one word."
_START_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 120.0


def served_version(url: str) -> str:
    """Return the version of the OCP that answers there, empty if there is none."""
    try:
        # It is this machine's own, whatever name its certificate is for.
        health = http_json("GET", f"{url}/health", timeout_s=5, tls=any_certificate())
    except HttpProblem as problem:
        # A server that is not ready says so with 503, and with its version.
        health = problem.body
    return str(health.get("version", "")) if isinstance(health, dict) else ""


def wait_for_version(url: str, version: str, timeout_s: float = _START_TIMEOUT_S) -> str:
    """Wait until this version answers; return the version that answers at the end."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        served = served_version(url)
        if served == version or time.monotonic() > deadline_s:
            return served
        time.sleep(0.1)


class Answer(NamedTuple):
    """The result of the question."""

    #: Whether there was an answer; None = it could not be asked.
    ok: Optional[bool]
    words: str
    #: The API's code for the failure.
    code: str = ""


def ask(install: Installation, values: Mapping[str, str]) -> Answer:
    """Ask one real question. Blocks until there is an answer."""
    key = values.get(API_KEY) or values.get("OCP_ADMIN_KEY") or ""
    key = key or read_text(os.path.join(install.data_dir, "admin-key")).strip()
    body = {"messages": [{"role": "user", "content": _QUESTION}], "model": "haiku",
            "max_tokens": 64}
    began_s = time.monotonic()
    try:
        answer = http_json("POST", f"{install.url}/v1/chat/completions", body, key,
                           _ANSWER_TIMEOUT_S, any_certificate())
        text = str(answer["choices"][0]["message"]["content"])
    except HttpProblem as problem:
        error = problem.body.get("error") if isinstance(problem.body, dict) else None
        code = str(error.get("code") or "") if isinstance(error, dict) else ""
        if code.endswith("_api_key"):
            return Answer(None, "No question was asked: no key is known here that the API accepts.")
        more = f" More: `ocp errors {problem.request_id}`" if problem.request_id else ""
        return Answer(False, f"The question failed: {problem}{more}", code)
    except (KeyError, IndexError, TypeError):
        return Answer(False, "The question failed: the answer is not one of OCP.")
    took_s = time.monotonic() - began_s
    return Answer(True, f"It answered {' '.join(text.split())[:60]!r} in {took_s:.1f} s.")


def claude_advice(install: Installation, host: Host, problem: str) -> list[str]:
    """Return the commands that log claude in, and with a `problem` those that install it."""
    who = f"sudo -u {install.account} -H " if install.account else ""
    sudo = "sudo " if install.account else ""
    lead = ["claude is not logged in.", f"  with a browser:  {who}claude auth login"]
    if problem:
        lead = [
            f"claude cannot be used yet: {problem}",
            f"  install it:      {sudo}npm install -g @anthropic-ai/claude-code@latest",
            f"  then log in:     {who}claude auth login",
        ]
    again = install.service.restart_words
    return [
        *lead,
        "  without one:     claude setup-token      (on any machine that has a browser)",
        f"                   and put its token into {shown_path(install.env_file, host.home)} as",
        f"                   {TOKEN}=the-token",
        *([f"                   then run: {again}"] if again else []),
    ]


# ==== 11. OpenClaw ===========================================================
# ocp_connect.py beside this file knows how OpenClaw is told about a server. It runs after the
# service answers, and its failure does not make the installation fail.

#: OpenClaw takes seconds for each of its own commands.
_CONNECT_TIMEOUT_S = 240.0


class OpenClaw(NamedTuple):
    """What ocp_connect.py says of OpenClaw."""

    is_here: bool = False
    #: Whether it has been told about a server already.
    is_connected: bool = False


def connect_script(folder: str) -> str:
    """Return the path of ocp_connect.py, which may be missing."""
    return os.path.join(folder, "ocp_connect.py")


def find_openclaw(host: Host) -> OpenClaw:
    """Return whether OpenClaw is here, as far as that can be seen."""
    script = connect_script(host.here)
    if not os.path.exists(script):
        return OpenClaw()
    listed = host.run((sys.executable, script, "--list", "--json"))
    try:
        row = next(row for row in json.loads(listed.output) if row["name"] == "openclaw")
        return OpenClaw(bool(row["here"]), bool(row["connected"]))
    except (ValueError, KeyError, TypeError, StopIteration):
        return OpenClaw()


class Job(NamedTuple):
    """A whole installation, ready to be shown and done."""

    situation: Situation
    actions: list[Action]
    version: str
    claude_problem: str
    notes: list[str]
    #: Nothing is done about one that is not here.
    openclaw: OpenClaw


def registration(install: Installation, provider_name: str) -> Run:
    """Return the command that tells OpenClaw about the service, and the one that undoes it."""
    program = (install.python, connect_script(install.install_dir))
    only = ("--only", "openclaw", "--yes")
    named = ("--provider-name", provider_name) if provider_name else ()
    command = (*program, install.url, *only, "--skip-answer", "--json", *named)
    return Run(command, "OpenClaw", True, (*program, "--undo", *only))


def register_with_openclaw(job: Job, provider_name: str, record: Record) -> Iterator[str]:
    """Make OCP a provider of OpenClaw; yield what there is to say about it. Raises OSError."""
    install, values, host = job.situation.install, job.situation.values, job.situation.host
    action = registration(install, provider_name)
    if not job.openclaw.is_connected:
        record.note(action)
        record.save(complete=True)
    key = values.get(API_KEY, "") if values.get(AUTH_MODE) == "shared" else ""
    env = {**host.environ, **({"OCP_CONNECT_KEY": key} if key else {})}
    done = host.run(action.command, env, _CONNECT_TIMEOUT_S)
    try:
        said = json.loads(done.output)
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
            yield f"OpenClaw was not told: {done.complaint} Try again with `{again}`."


# ==== 12. Command line =======================================================
# The phases in their order: inspect, plan, show, ask, act, verify.


def argument_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="setup.py_install.py",
        description="Installs OCP as a service that runs from this folder. An option that is left "
        "out keeps the setting of an earlier installation.",
        epilog="Exit codes: 0 installed and answering; 1 a step failed, or you said no; 2 nothing "
        "was done, the message says why; 3 installed, but claude is missing, not logged in or not "
        "answering; 130 interrupted.",
    )
    add = parser.add_argument
    add("--port", metavar="N", help=f"TCP port of the service (default {DEFAULTS[PORT]})")
    add("--bind", metavar="ADDRESS", help=f"address to listen on (default {DEFAULTS[BIND]})")
    add("--auth-mode", metavar="MODE", help="who may use the API: none, shared or multi")
    add("--default-model", metavar="NAME", help="model of a request that names none")
    add("--system", action="store_true",
        help="a sandboxed service of the machine, with a user of its own (systemd, as root)")
    add("--channels", action="store_true",
        help="a second service, for the chats that `ocp channels add` has joined")
    add("--no-start", action="store_true", help="install everything, but start nothing now")
    add("--no-openclaw", action="store_true", help="do not touch OpenClaw, if it is here")
    add("--provider-name", metavar="NAME", help="the name of OCP in OpenClaw")
    add("--skip-answer", action="store_true", help="do not ask the plan one question at the end")
    add("--dry-run", action="store_true", help="show the plan and change nothing")
    add("--yes", action="store_true", help="do not ask before acting")
    return parser


def prepare(host: Host, options: argparse.Namespace) -> Job:
    """Inspect and plan; change nothing. Raises Problem."""
    try:
        return _prepared(host, options)
    except OSError as error:
        raise refused(f"{os_reason(error)}\nNothing was changed.") from None


def _prepared(host: Host, options: argparse.Namespace) -> Job:
    service, note = find_service(host, state_folder(host), is_system=options.system)
    install = planned_installation(host, options, service)
    found = inspect(host, service, install.env_file, install.record_path)
    check_platform(service, found, note)
    wrong = wrong_lines(install.env_file, found.settings_text)
    if wrong:
        raise refused(wrong)
    version = installed_version(install.server_path)
    values = planned_values(host, options, install, found)
    values, left_out = without_refused(host, install, values, found)
    # The settings are checked before the port is: a wrong port is not a port in use.
    values, claude_problem = accepted_values(host, install, values)
    install = with_address(install, values)
    should_start = service.platform != "none" and not options.no_start
    is_outdated = found.is_active and served_version(install.url) != version
    channels = planned_channels(install) if options.channels else None
    situation = Situation(host, install, found, values, should_start, is_outdated, channels)
    check_port(situation)
    notes = [each for each in (note, *notes_about(situation), *left_out) if each]
    openclaw = OpenClaw() if options.no_openclaw else find_openclaw(host)
    return Job(situation, plan(situation), version, claude_problem, notes, openclaw)


def planned_channels(install: Installation) -> Service:
    """Return the service of the gateway to chats. Raises Problem if it would not start."""
    script, folder = channels_command(install)[1], install.data_dir
    service = channels_service(install.service, install.home,
                               os.path.join(folder, "logs", "channels.log"))
    if not os.path.exists(script):
        raise refused(f"{script} is not there: get the whole of OCP.")
    places = (os.path.join(folder, "channels.json"),
              os.path.join(install.home, ".openclaw-channel-gateway", "ocg.json"))
    if not any(map(os.path.exists, places)):
        raise refused("No chat is joined yet. First: python3 ocp_channels.py add --channel "
                      "telegram --botToken TOKEN")
    return service


def notes_about(situation: Situation) -> Iterator[str]:
    """Yield what the user may expect and does not happen, or should know."""
    install, values, found = situation.install, situation.values, situation.found
    shell = shell_settings(situation.host)
    for name in SECRETS:
        if name in shell and shell[name] != values.get(name):
            yield (f"{name} of this shell is not the service's, which stays; "
                   f"edit {install.env_file} to change it.")
    if not is_loopback(install.bind) and values.get(AUTH_MODE) == "none":
        yield f"ATTENTION: whoever can connect to {install.bind} may use your plan."
    if install.service.platform == "systemd-user" and found.lingers is None:
        yield "It is unknown whether the service keeps running when you log out."
    for old in found.legacy:
        yield (f"The original's {old.label} is installed; its settings are taken over where "
               "nothing else says otherwise, its keys and its usage by the first start. See "
               "docs/migration.md.")
        if install.service == NO_SERVICE:
            yield (f"ATTENTION: {old.label} cannot be stopped from here and would start again: as "
                   f"its user, `systemctl --user disable --now {old.label}`.")
    yield from found.changes
    problem = "" if situation.should_start or found.is_active else (
        busy_problem(install.bind, install.port))
    if problem:
        yield (f"Nothing can listen on {install.bind} port {install.port} now: {problem}. End what "
               "uses it before you start OCP, or take another port with --port.")
    folder = os.path.dirname(install.launcher or "")
    if folder and folder not in situation.host.environ.get("PATH", "").split(":"):
        yield (f"`ocp` will not be found, because its folder is not on your PATH. Add this to your "
               f'shell\'s profile: export PATH={shlex.quote(folder)}:"$PATH"')


_SECRET_NAME = re.compile("KEY|TOKEN|SECRET|PASSWORD")


def setting_lines(situation: Situation) -> Iterator[str]:
    """Yield how the settings file changes, without secrets."""
    old = settings_of(situation.found.settings_text)
    for name, value in situation.values.items():
        if old.get(name) != value:
            # The address of a proxy may contain a password.
            is_secret = name in SECRETS or _SECRET_NAME.search(name) or "@" in value
            shown = "(secret)" if is_secret else quoted(value)
            yield f"      {name}={shown}"


def show(
    job: Job, pending: list[Action], record: Record, options: argparse.Namespace
) -> None:
    """Print the plan."""
    situation = job.situation
    install, home = situation.install, situation.host.home
    print(f"OCP {job.version} in {shown_path(install.install_dir, home)}, on {install.python}")
    if pending:
        print("This will be done:")
    for action in pending:
        print(f"  {describe(action, home)}")
        if isinstance(action, WriteFile) and action.path == install.env_file:
            print("\n".join(setting_lines(situation)))
        if isinstance(action, WriteFile) and record.entry_of(action).get("backup"):
            print("      the present file is kept beside it")
    if pending and situation.should_start and not options.skip_answer and not job.claude_problem:
        print("  ask the plan one question of a few words (--skip-answer leaves it out)")
    if pending and job.openclaw.is_here and situation.should_start:
        print("  make OCP a provider of OpenClaw (--no-openclaw leaves it out)")
    for note in job.notes:
        print(f"Note: {note}")
    if job.claude_problem:
        print("\n".join(claude_advice(install, situation.host, job.claude_problem)))
    sys.stdout.flush()


def verify(job: Job, options: argparse.Namespace, *, with_answer: bool) -> Exit:
    """Say what can be seen of the service, if it is meant to run."""
    situation = job.situation
    install, host = situation.install, situation.host
    not_ready = Exit.UNREACHABLE if job.claude_problem else Exit.OK
    if not situation.should_start:
        return not_ready
    served = wait_for_version(install.url, job.version)
    if served != job.version:
        state = f"version {served} answers" if served else "nothing answers"
        print(f"The service did not come up: {state} on {install.url}. To see why, run:\n"
              f"  {install.service.logs}", file=sys.stderr)
        return Exit.FAILED
    print(f"OCP {served} runs on {install.url}/v1")
    if job.claude_problem or not with_answer or options.skip_answer:
        return not_ready
    answer = ask(install, situation.values)
    print(answer.words)
    if answer.code == "upstream_login_required":
        print("\n".join(claude_advice(install, host, "")))
    return Exit.UNREACHABLE if answer.ok is False else Exit.OK


def conclude(
    job: Job, options: argparse.Namespace, record: Record, *, with_answer: bool
) -> Exit:
    """Verify, and tell OpenClaw about a service that runs. Raises OSError."""
    code = verify(job, options, with_answer=with_answer)
    if code != Exit.FAILED and job.openclaw.is_here and job.situation.should_start:
        for line in register_with_openclaw(job, options.provider_name or "", record):
            print(line, flush=True)
    return code


def next_steps(job: Job) -> Iterator[str]:
    """Yield where the keys are and what is next."""
    install, values = job.situation.install, job.situation.values
    home = job.situation.host.home
    env_file = shown_path(install.env_file, home)
    if values.get(API_KEY):
        yield f"Clients need the key: it is {API_KEY} in {env_file}"
    if values.get(AUTH_MODE) in ("shared", "multi") and not values.get("OCP_ADMIN_KEY"):
        where = shown_path(os.path.join(install.data_dir, "admin-key"), home)
        yield f"The server creates its admin key at its first start: {where}"
    if values.get(AUTH_MODE) == "multi":
        yield "Create a key for each client with: ocp keys add NAME"
    if install.service.platform == "none":
        yield f"Start it by hand: {command_by_hand(install)}"
    elif not job.situation.should_start:
        yield f"It is not started now. Start it with: {shlex.join(install.service.start)}"
    else:
        yield f"Settings are in {env_file}; after a change run: {install.service.restart_words}"
    if job.openclaw.is_here and not job.situation.should_start:
        yield f"OpenClaw, once OCP runs: ocp connect {install.url} --only openclaw"


def carry_out(job: Job, options: argparse.Namespace) -> Exit:
    """Show, ask, act and verify. Raises Problem, StepFailed, OSError."""
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
    confirm("Go on?", options.yes, situation.host.stdin, sys.stdout)
    if not pending:
        print("Only the record of the installation is brought up to date.")
    print("Doing it:")
    apply(situation.host, job.actions, record, print)
    print("\n".join(next_steps(job)))
    return conclude(job, options, record, with_answer=True)


def main(arguments: list[str], host: Host) -> int:
    """Run the program and return the exit code."""
    options = argument_parser().parse_args(arguments)
    try:
        return carry_out(prepare(host, options), options)
    except Problem as problem:
        print(f"setup: {problem}", file=sys.stderr)
        return problem.code
    except (StepFailed, OSError) as error:
        reason = os_reason(error) if isinstance(error, OSError) else error
        print(
            f"setup: {reason}\nWhat was done so far is in the record: run this again to go on, "
            "or uninstall.py to undo it.", file=sys.stderr,
        )
        return Exit.FAILED
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run this again to go on, or uninstall.py to undo what was "
              "done.", file=sys.stderr)
        return Exit.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], this_host(os.environ)))
