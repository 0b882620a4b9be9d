#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# ///
"""ocp_tenants sets up OpenClaw instances for one OCP server, each with a key of its own.

    ocp tenants discover        find OpenClaw containers and folders on this machine
    ocp tenants setup           make a key for each, and write the server into its openclaw.json
    ocp tenants                 list the tenants
    ocp tenants undo            restore every openclaw.json as it was

It runs on the server's machine, also directly as `python3 ocp_tenants.py`. It needs ocp_connect.py
beside it to edit openclaw.json, and the program `docker` for containers. Commands
that change something accept --dry-run; all accept --json.

The server is --server, or OCP_URL, or this machine with the port CLAUDE_PROXY_PORT, or the one
that the installer wrote into ~/.ocp/install.json, or http://127.0.0.1:3456. The admin key is
OCP_ADMIN_KEY, or that of the service's ocp.env, or the content of ~/.ocp/admin-key. OCP_HOME
replaces ~/.ocp. OCP_DOCKER names another client, such as podman.

Exit codes: 0 done; 1 failed, the message says why; 2 wrong usage; 3 no server answers;
4 the admin key is missing or wrong; 130 interrupted.
"""
# Sections (search for "==== 8" to jump to the eighth):
#
#      1. Small tools      shared pieces, environment, programs, names and keys
#      2. The server       its address, the admin key, and its list of tenants
#      3. Files            files of this machine, and the folder of each tenant
#      4. Docker           calls of the docker client, containers
#      5. Instances        OpenClaw containers and folders: their files, how they are found
#      6. Tenants          set up, apply, undo
#      7. Skills           compare, pull and push skills
#      8. Import           the configuration of another gateway
#      9. Command line     arguments, output, main
from __future__ import annotations  # OCP needs Python 3.9 or later; Python 3.6 shows this line.

import sys

if sys.version_info < (3, 9):
    sys.exit("OCP needs Python 3.9 or later; this is Python %d.%d." % sys.version_info[:2])
if sys.platform == "win32":
    sys.exit("ocp_tenants runs on Linux and macOS; on Windows, run it in WSL.")

import argparse
import calendar
import contextlib
import dataclasses
import enum
import errno
import fcntl
import functools
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import ssl
import stat
import subprocess
import tarfile
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import IO, Any, NamedTuple, TextIO, TypeVar

VERSION = "1.0.0"

#: A JSON value.
Json = Any


# ==== 1. Small tools =========================================================
# Code between "--- shared: NAME" and "--- end shared" is repeated in other scripts; a test keeps
# the copies identical. Then the environment, child programs, and the formats of names.


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


def failed(message: str) -> Problem:
    """Return the error for a command that failed (exit code 1)."""
    return Problem(Exit.FAILED, message)


def clean(text: object) -> str:
    """Return `text` with "?" for control characters, which could steer the user's terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", "?", str(text))


def counted(number: int, noun: str) -> str:
    """Return "1 file" or "2 files"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def as_dict(value: Json) -> dict[str, Json]:
    """Return `value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def dicts_in(value: Json) -> list[dict[str, Json]]:
    """Return a JSON list with each member as by `as_dict`; an empty list for any other value."""
    return [as_dict(row) for row in value] if isinstance(value, list) else []


def reason_of(problem: Exception) -> str:
    """Return why an item failed, in a form to print after the item's name."""
    return (os_reason(problem) if isinstance(problem, OSError) else str(problem)).rstrip(".")


#: Variables withheld from every child program, which no file of an instance can name either: the
#: keys and the login of this server.
_OWN_SECRETS = (
    "OCP_ADMIN_KEY", "OCP_CONNECT_KEY", "PROXY_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN",
    "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")


@dataclasses.dataclass
class World:
    """The environment of a command: variables, home folder, streams, clock."""

    environ: Mapping[str, str]
    #: The user's home folder.
    home: str
    stdin: TextIO
    stdout: TextIO
    stderr: TextIO
    #: The folder of this script, with ocp_connect.py beside it.
    tree: str
    clock: Callable[[], float] = time.time

    @property
    def ocp_home(self) -> str:
        return ocp_home(self.environ, self.home)

    @property
    def tenants_folder(self) -> str:
        """Return the folder that holds one folder for each tenant."""
        return os.path.join(self.ocp_home, "tenants")

    @property
    def child_environ(self) -> dict[str, str]:
        """Return the environment for child programs."""
        return {name: value for name, value in self.environ.items() if name not in _OWN_SECRETS}

    def say(self, text: str) -> None:
        print(text, file=self.stdout, flush=True)

    def note(self, text: str) -> None:
        print(text, file=self.stderr, flush=True)

    def shown_path(self, path: str) -> str:
        """Return a path with ~ for the home folder."""
        is_in_home = path.startswith(self.home + os.sep)
        return "~" + path[len(self.home):] if is_in_home else path


class Ran(NamedTuple):
    """The result of a program. If `code` is None, it did not complete, and `error` says why."""

    code: int | None
    output: bytes
    error: str

    @property
    def text(self) -> str:
        return self.output.decode("utf-8", "replace")

    @property
    def json(self) -> Json:
        """Return the JSON value that it printed, None if it printed no JSON."""
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(self.text)
        return None

    @property
    def first_error(self) -> str:
        """Return its first line of error output (else of output), for a message."""
        lines = [line.strip() for line in f"{self.error}\n{self.text}".splitlines()]
        return next((clean(line)[:300] for line in lines if line), f"it ended with {self.code}")


class Running:
    """A running program with its output as a stream. Its process group is killed at the time limit,
    and at the end of a `with` that did not reach finish(). Raises OSError if it cannot be
    started."""

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], stdin: bytes, timeout_s: float
    ) -> None:
        self._name, self._reason = command[0], ""
        self._error = tempfile.TemporaryFile()  # noqa: SIM115 - finish() closes it
        try:
            self._process = subprocess.Popen(
                list(command), env=dict(environ), cwd="/", stdout=subprocess.PIPE,
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL, stderr=self._error,
                start_new_session=True)
        except BaseException:
            self._error.close()
            raise
        assert self._process.stdout
        self.output: IO[bytes] = self._process.stdout
        self._timer = threading.Timer(timeout_s, self.kill, [f"took longer than {timeout_s:.0f} s"])
        self._timer.daemon = True
        self._timer.start()
        if stdin:
            threading.Thread(target=self._feed, args=[stdin], daemon=True).start()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self.kill("was interrupted")
            self.finish()

    def _feed(self, stdin: bytes) -> None:
        assert self._process.stdin
        with contextlib.suppress(OSError), self._process.stdin as pipe:
            pipe.write(stdin)

    def kill(self, reason: str) -> None:
        """Kill the program and its children. `reason` goes into the error message."""
        self._reason = self._reason or reason
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def finish(self, output: bytes = b"") -> Ran:
        """Wait for the program to end, and return its result with the output read so far."""
        try:
            code = self._process.wait()
        finally:
            self._timer.cancel()
            self.output.close()
        self._error.seek(0)
        with self._error as file:
            error = file.read(10_000).decode("utf-8", "replace")
        return Ran(None, output, f"{self._name} {self._reason}") if self._reason else Ran(
            code, output, error)


def run_words(
    command: Sequence[str], environ: Mapping[str, str], stdin: bytes = b"",
    timeout_s: float = 15.0, limit_bytes: int = 20_000_000,
) -> Ran:
    """Run a program to its end, without a terminal. Never raises: a program that cannot be started,
    is too slow or prints too much has a result with code None."""
    try:
        running = Running(command, environ, stdin, timeout_s)
    except (OSError, ValueError) as error:
        return Ran(None, b"", f"{command[0]}: {getattr(error, 'strerror', None) or error}")
    with running:
        output = running.output.read(limit_bytes + 1)
        if len(output) > limit_bytes:
            running.kill(f"printed more than {limit_bytes} bytes")
        return running.finish(output[:limit_bytes])


#: A valid tenant name, which is also safe as part of a path.
TENANT_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")
#: Names that the server does not accept for a key.
_RESERVED = re.compile(r"admin|anonymous|local|public|remote|shared|[0-9]+|")


def fitted_name(text: str) -> str:
    """Return `text` turned into a valid tenant name."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()[:200]).strip("-")[:30].strip("-")
    return f"openclaw-{words or 'instance'}" if _RESERVED.fullmatch(words) else words


def checked_name(text: str) -> str:
    """Return `text` if it is a valid tenant name. Raises Problem."""
    if not TENANT_NAME.fullmatch(text):
        raise Problem(Exit.USAGE, f"{clean(text)[:80]!r} is not a valid tenant name: use up to 40 "
                                  "lowercase letters, digits and hyphens.")
    return text


#: The format of a key that the server accepts.
SECRET = re.compile(r"[A-Za-z0-9_-]{32,128}")


def new_secret() -> str:
    """Return a new key: "ocp_" and 32 characters."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    return "ocp_" + "".join(secrets.choice(alphabet) for _ in range(32))


def stamp_of(at_s: float) -> str:
    """Return epoch seconds as a folder name: 20270131T140000Z."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(at_s))


# ==== 2. The server ==========================================================
# The server's address, the admin key, and requests to the admin API.


DEFAULT_URL = "http://127.0.0.1:3456"


def parse_url(text: str, source: str) -> str:
    """Return a server's URL without a trailing slash or /v1. Raises Problem for an invalid URL."""
    text = text.strip() if "://" in text else f"http://{text.strip()}"
    try:
        parts = urllib.parse.urlsplit(text)
        is_usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable or re.search(r"[\x00-\x20\x7f@]", text):
        raise Problem(
            Exit.USAGE, f"{source}: {clean(text)!r} is not an address such as {DEFAULT_URL}.")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path[:-3] if path.endswith('/v1') else path}"


def is_loopback(url: str) -> bool:
    """Return whether a URL has a loopback host."""
    host = urllib.parse.urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def port_of(url: str) -> int:
    parts = urllib.parse.urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


class Server(NamedTuple):
    """The OCP server, and requests to it."""

    url: str
    #: The admin key, and where it would be read on this machine; empty where there is none.
    key: str
    key_source: str = ""

    def ask(
        self, method: str, path: str, body: object = None, key: str = "", timeout_s: float = 15.0
    ) -> Json:
        """Return the JSON of an answer. `key` replaces the admin key. Raises Problem with the body
        of the error response."""
        tls = any_certificate() if is_loopback(self.url) else None
        try:
            return http_json(method, self.url + path, body, key or self.key, timeout_s, tls)
        except HttpProblem as problem:
            message = clean(problem).rstrip(".")
            if problem.kind == "unreachable":
                raise Problem(Exit.UNREACHABLE, f"Cannot connect to {self.url}: {message}.\n"
                              "Start the server with `ocp start`.") from None
            if problem.kind == "denied":
                advice = "" if key else f"\n{self._key_advice}"
                raise Problem(Exit.DENIED, f"{self.url} refused: {message}.{advice}",
                              problem.body) from None
            raise Problem(Exit.FAILED, f"{self.url} answered {problem.status}: {message}.",
                          problem.body) from None

    @property
    def _key_advice(self) -> str:
        if self.key:
            return "The admin key that was sent is not this server's: see OCP_ADMIN_KEY."
        return "No admin key was sent: set OCP_ADMIN_KEY" + (
            f"; there is none to read in {self.key_source}." if self.key_source else
            ", because the server is another machine.")

    def certificate(self) -> str:
        """Return the certificate (PEM) that the server presents. Raises Problem."""
        parts = urllib.parse.urlsplit(self.url)
        try:
            return ssl.get_server_certificate((parts.hostname or "", port_of(self.url)))
        except OSError as error:
            raise Problem(Exit.UNREACHABLE, f"Cannot connect to {self.url}: {error}.") from None

    def keys(self) -> dict[str, dict[str, Json]]:
        """Return the active keys by name. Raises Problem."""
        rows = dicts_in(as_dict(self.ask("GET", "/api/keys")).get("keys"))
        return {str(row.get("name")): row for row in rows if not row.get("revokedAt")}

    def tenants(self) -> dict[str, dict[str, Json]]:
        """Return the tenants by name. Raises Problem."""
        rows = dicts_in(as_dict(self.ask("GET", "/api/tenants")).get("tenants"))
        return {str(row.get("name")): row for row in rows}

    def key_path(self, name: str, more: str = "") -> str:
        return f"/api/keys/{urllib.parse.quote(name, safe='')}{more}"

    def tenant(self, name: str, method: str = "GET", body: object = None, more: str = "") -> Json:
        """Return the answer to a request about one tenant. Raises Problem."""
        return self.ask(method, self.key_path(name, f"/tenant{more}"), body)


def find_server(world: World, named: str = "") -> Server:
    """Return the server to use, without connecting. Raises Problem for an invalid address."""
    record: dict[str, Json] = {}
    with contextlib.suppress(OSError, ValueError):
        record = read_record(os.path.join(world.ocp_home, "install.json")) or {}
    port = world.environ.get("CLAUDE_PROXY_PORT", "").strip()
    given = (("--server", named), ("OCP_URL", world.environ.get("OCP_URL", "")),
             ("CLAUDE_PROXY_PORT", f"http://127.0.0.1:{port}" if port else ""),
             ("install.json", str(record.get("url") or "")))
    source, text = next((pair for pair in given if pair[1].strip()), ("", DEFAULT_URL))
    url = parse_url(text, source)
    key = world.environ.get("OCP_ADMIN_KEY", "").strip()
    key_source = ""
    if not key and (is_loopback(url) or source == "install.json"):
        # The admin key in the file belongs to this machine's server: never send it elsewhere.
        key_source = os.path.join(str(record.get("data_dir") or world.ocp_home), "admin-key")
        settings = settings_of(text_at(str(record.get("env_file") or "")))
        key = settings.get("OCP_ADMIN_KEY", "").strip() or text_at(key_source).strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise Problem(Exit.USAGE, "The admin key contains spaces or characters outside ASCII.")
    return Server(url, key, key_source)


def text_at(path: str) -> str:
    """Return the text of a small file, empty if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        with open(path, encoding="utf-8") as file:
            return file.read(1_000_000)
    return ""


# ==== 3. Files ===============================================================
# Local files, read and replaced as a whole, and the folder of each tenant.


#: Flags that open a folder, and fail for a link to one.
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def opened_folder(base: str | int, *parts: str, makes: bool = False) -> Iterator[int]:
    """Yield the descriptor of a folder below `base`, a path or a descriptor. None of `parts` may be
    a link; with `makes`, missing ones are created: private, owned like their parent. Raises
    OSError."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    at = os.dup(base) if isinstance(base, int) else os.open(base, flags)
    try:
        for part in parts:
            if makes:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=at)
                    _own_below(at, part)
            below = os.open(part, _FOLDER_FLAGS, dir_fd=at)
            os.close(at)
            at = below
        yield at
    finally:
        os.close(at)


def _own_below(at: int, name: str) -> None:
    """If running as root, give an entry to the owner of its folder. Raises OSError."""
    if os.geteuid() == 0:
        owner = os.fstat(at)
        os.chown(name, owner.st_uid, owner.st_gid, dir_fd=at, follow_symlinks=False)


def write_below(at: int, path: str, content: bytes, is_executable: bool) -> None:
    """Write a new private file below an open folder, and create its folders. Raises OSError."""
    *folders, name = path.split("/")
    with opened_folder(at, *folders, makes=True) as folder:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(name, flags, 0o600, dir_fd=folder), "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o700 if is_executable else 0o600)
            os.fsync(file.fileno())
        _own_below(folder, name)


def move_below(at: int, source: str, target: str) -> None:
    """Rename an entry below an open folder, and create the target's folders. Raises OSError."""
    (*sources, old), (*targets, new) = source.split("/"), target.split("/")
    with opened_folder(at, *sources) as out, opened_folder(at, *targets, makes=True) as into:
        os.rename(old, new, src_dir_fd=out, dst_dir_fd=into)


def remove_below(at: int, name: str) -> None:
    """Remove an entry of an open folder, recursively, if it exists. Raises OSError."""
    try:
        is_folder = stat.S_ISDIR(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return
    if is_folder:
        with opened_folder(at, name) as folder:
            for each in os.listdir(folder):
                remove_below(folder, each)
        os.rmdir(name, dir_fd=at)
    else:
        os.unlink(name, dir_fd=at)


#: The size limit for an openclaw.json or a key.
_MAX_FILE_BYTES = 2_000_000


class HeldFile(NamedTuple):
    """The content of a file, with its owner and mode."""

    content: bytes
    uid: int
    gid: int
    mode: int


def read_local_file(path: str, at: int | None = None) -> HeldFile | None:
    """Return a file of this machine, None if it does not exist. With `at`, the descriptor of a
    folder, `path` is relative to it and may not be a link. Raises Problem."""
    # O_NONBLOCK: opening a named pipe would wait for a writer, perhaps forever.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if at is None else os.O_NOFOLLOW)
    try:
        with open(os.open(path, flags, dir_fd=at), "rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(_MAX_FILE_BYTES + 1) if stat.S_ISREG(status.st_mode) else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise failed(f"{path} cannot be read: {error.strerror}") from None
    if content is None or len(content) > _MAX_FILE_BYTES:
        raise failed(f"{path} is not a regular file, or too large")
    return HeldFile(content, status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode))


def replace_local_file(path: str, file: HeldFile) -> None:
    """Replace a file of this machine atomically. Raises Problem."""
    try:
        write_whole(path, file.content, file.mode)
        if os.geteuid() == 0:
            os.chown(path, file.uid, file.gid)
    except OSError as error:
        raise failed(f"{path} cannot be written: {error.strerror}") from None


class Folder(NamedTuple):
    """The files of one tenant on this machine. No link in it is followed."""

    world: World
    #: Its name below the folder of the tenants.
    name: str

    @property
    def path(self) -> str:
        return os.path.join(self.world.tenants_folder, self.name)

    @property
    def key_path(self) -> str:
        return self.inside("key")

    @property
    def connect_home(self) -> str:
        """Return the XDG_CONFIG_HOME that ocp_connect.py gets for this tenant."""
        return self.inside("connect")

    def inside(self, *parts: str) -> str:
        return os.path.join(self.path, *parts)

    @contextlib.contextmanager
    def opened(self, *parts: str, makes: bool = False) -> Iterator[int]:
        """Yield the descriptor of a folder in it. Raises FileNotFoundError, and Problem for every
        other OSError in the block."""
        try:
            if makes:
                make_folders(self.world.tenants_folder)
            with opened_folder(self.world.tenants_folder, self.name, *parts, makes=makes) as at:
                yield at
        except FileNotFoundError:
            raise
        except OSError as error:
            path, is_link = self.inside(*parts), error.errno in (errno.ELOOP, errno.ENOTDIR)
            raise failed(f"{path} or a folder above it is a link or a file" if is_link else
                         f"{path} cannot be used: {error.strerror}") from None

    def write(self, content: bytes, *parts: str) -> None:
        """Write a private file atomically, and create its folders. Raises Problem."""
        *folders, name = parts
        with self.opened(*folders, makes=True) as at:
            remove_below(at, name + DRAFT)
            write_below(at, name + DRAFT, content, False)
            move_below(at, name + DRAFT, name)

    def read(self, *parts: str) -> bytes:
        """Return the content of a file, empty if it does not exist. Raises Problem."""
        *folders, name = parts
        with contextlib.suppress(FileNotFoundError), self.opened(*folders) as at:
            held = read_local_file(name, at)
            return held.content if held else b""
        return b""

    def has(self, *parts: str) -> bool:
        """Return whether it has this subfolder. Raises Problem."""
        with contextlib.suppress(FileNotFoundError), self.opened(*parts):
            return True
        return False

    def remove(self, *parts: str) -> None:
        """Remove a file or folder in it, if it exists. Raises Problem."""
        *folders, name = parts
        with contextlib.suppress(FileNotFoundError), self.opened(*folders) as at:
            remove_below(at, name)

    @property
    def is_only_begun(self) -> bool:
        """Return whether it holds nothing but what a run leaves that ended at its first step.
        Raises Problem."""
        for parts in (), ("instance",):
            with contextlib.suppress(FileNotFoundError), self.opened(*parts) as at:
                names = set(os.listdir(at)) - ({"instance"} if not parts else set())
                if not all(name.endswith(DRAFT) for name in names):
                    return False
        return True

    def secret(self) -> str:
        """Return the saved key, empty if there is none."""
        text = self.read("key").decode("utf-8", "replace").strip()
        return text if SECRET.fullmatch(text) else ""

    def write_secret(self, secret: str) -> None:
        """Save the key. Raises Problem."""
        self.write(secret.encode() + b"\n", "key")

    def place(self) -> dict[str, Json]:
        """Return the saved location of the instance, empty if none is saved."""
        with contextlib.suppress(Problem, ValueError):
            return as_dict(json.loads(self.read("instance", "instance.json")))
        return {}

    def write_place(self, place: Mapping[str, Json]) -> None:
        """Merge `place` into the saved location of the instance. Raises Problem."""
        text = json.dumps({**self.place(), **place}, indent=1)
        self.write(text.encode(), "instance", "instance.json")


def make_folders(folder: str) -> None:
    """Create a private folder and its parents, owned like the folder above. Raises OSError."""
    if os.path.isdir(folder):
        return
    above = os.path.dirname(folder)
    make_folders(above)
    os.mkdir(folder, 0o700)
    if os.geteuid() == 0:
        owner = os.stat(above)
        os.chown(folder, owner.st_uid, owner.st_gid)


@contextlib.contextmanager
def exclusive_run(world: World) -> Iterator[None]:
    """Lock the folder of the tenants for this run. Raises Problem if another run holds the lock,
    OSError."""
    with contextlib.ExitStack() as held:
        try:
            make_folders(world.tenants_folder)
            at = held.enter_context(opened_folder(world.tenants_folder))
        except OSError as error:
            raise failed(f"{world.tenants_folder} cannot be used: {reason_of(error)}.") from None
        try:
            fcntl.flock(at, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise failed("Another `ocp tenants` command is changing something on this machine or "
                         "waiting for an answer: run this again when it has ended.") from None
        except OSError as error:
            # Not every file system supports locks.
            if error.errno not in (errno.ENOLCK, errno.EBADF, errno.ENOTSUP):
                raise
        yield


#: The server names a tenant's folder after its key, whose name may not be a TENANT_NAME.
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def tenant_folders(world: World) -> list[Folder]:
    """Return the folders of tenants on this machine."""
    with contextlib.suppress(OSError):
        names = sorted(filter(_FOLDER_NAME.fullmatch, os.listdir(world.tenants_folder)))
        return [Folder(world, name) for name in names]
    return []


# ==== 4. Docker ==============================================================
# Calls of the program docker: no shell, `--` before names, a time limit, bounded output.


#: A valid container name.
CONTAINER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
#: The time limit for copying files.
_COPY_S = 120.0
_COMPOSE = "com.docker.compose."
#: The state folder in OpenClaw's image.
_IMAGE_STATE = "/home/node/.openclaw"
Value = TypeVar("Value")


class Docker(NamedTuple):
    """The docker client, or the one that OCP_DOCKER names."""

    world: World

    @property
    def program(self) -> str:
        return self.world.environ.get("OCP_DOCKER", "").strip() or "docker"

    @property
    def is_there(self) -> bool:
        """Return whether there is such a program."""
        path = self.world.environ.get("PATH", os.defpath)
        return shutil.which(self.program, path=path) is not None

    def run(self, *words: str, stdin: bytes = b"", timeout_s: float = 15.0) -> Ran:
        """Run the client. Never raises."""
        return run_words([self.program, *words], self.world.child_environ, stdin, timeout_s)

    def containers(self) -> tuple[list[Container], str]:
        """Return all containers, and docker's error, empty if docker answered.

        Uses `inspect`, because `docker ps` with a format would compute the size of each."""
        listed = self.run("ps", "--no-trunc", "--quiet", "--all")
        if listed.code is None and not self.is_there:
            return [], f"there is no program {clean(self.program)}"
        ids = [word for word in listed.text.split() if re.fullmatch(r"[0-9a-f]{12,64}", word)]
        if listed.code != 0 or not ids:
            return [], "" if listed.code == 0 else listed.first_error
        # If a container has just been removed, inspect fails but still prints the others.
        inspection = self.run("inspect", "--type", "container", *ids)
        found = inspection.json
        if not isinstance(found, list):
            return [], inspection.first_error
        return [Container(self, row) for row in found if isinstance(row, dict)], ""


class Container(NamedTuple):
    """A container: its `docker inspect` data, and access to its programs and files."""

    docker: Docker
    inspected: Mapping[str, Json]

    @property
    def name(self) -> str:
        return str(self.inspected.get("Name") or "").lstrip("/")

    @property
    def id(self) -> str:
        return str(self.inspected.get("Id") or "")

    @property
    def is_running(self) -> bool:
        """Return whether programs can be run in it."""
        return as_dict(self.inspected.get("State")).get("Running") is True

    @property
    def config(self) -> dict[str, Json]:
        return as_dict(self.inspected.get("Config"))

    @property
    def env(self) -> dict[str, str]:
        return env_rows(self.config.get("Env"))

    def label(self, name: str) -> str:
        """Return its compose label `name`, empty if it has none."""
        return str(as_dict(self.config.get("Labels")).get(_COMPOSE + name) or "")

    @property
    def mounts(self) -> list[tuple[str, str]]:
        """Return (destination, source) of its mounts, the deepest first."""
        return sorted(((str(row.get("Destination")).rstrip("/"),
                        str(row.get("Source") or row.get("Name")))
                       for row in dicts_in(self.inspected.get("Mounts"))), reverse=True)

    def source_of(self, path: str) -> str:
        """Return the path on this machine for a path in it, empty if it is not in a bind mount."""
        for place, source in self.mounts:
            if path == place or path.startswith(place + "/"):
                return source + path[len(place):] if source[:1] == "/" else ""
        return ""

    @property
    def mounted_states(self) -> list[str]:
        return [path for path, _ in self.mounts if path.endswith("/.openclaw")]

    @property
    def state_dir(self) -> str:
        """Return OpenClaw's state folder, as a path in the container."""
        env = self.env
        homes = (env.get("OPENCLAW_HOME", ""), env.get("HOME", ""))
        found = (env.get("OPENCLAW_STATE_DIR", ""),
                 *(f"{home}/.openclaw" for home in homes if home),
                 *self.mounted_states, _IMAGE_STATE)
        return next(path for path in found if is_usable_path(path))

    @property
    def gateways(self) -> list[str]:
        """Return this machine's addresses in the container's networks."""
        networks = as_dict(as_dict(self.inspected.get("NetworkSettings")).get("Networks"))
        found = [str(as_dict(each).get("Gateway") or "") for each in networks.values()]
        return [each for each in found if re.fullmatch(r"[0-9.]{7,15}|[0-9a-f:]{2,39}", each)]

    def exec(self, *words: str, timeout_s: float = 15.0) -> Ran:
        """Run a program in it, without a shell. Never raises."""
        return self.docker.run("exec", "--", self.name, *words, timeout_s=timeout_s)

    def change(self, path: str, *words: str) -> None:
        """Run a program that changes `path`. Raises Problem if it fails."""
        ran = self.exec(*words)
        if ran.code != 0:
            raise failed(f"{path} was not changed: {ran.first_error}")

    def move(self, source: str, target: str) -> None:
        """Rename a file or folder, replacing the target. Raises Problem."""
        self.change(target, "mv", "-T", "--", source, target)

    def run_openclaw(self, *words: str) -> Ran | None:
        """Run the `openclaw` command in it; return None if the container has none."""
        for program in (("openclaw",), ("node", "openclaw.mjs")):
            ran = self.exec(*program, *words, timeout_s=60.0)
            if ran.code not in (126, 127):
                return ran
        return None

    @property
    def uid(self) -> int:
        """Return the id of the user that OpenClaw runs as. Raises Problem."""
        if self.is_running:
            ran = self.exec("id", "-u")
            text = ran.text.strip()
        else:
            text = str(self.config.get("User") or "").partition(":")[0]
        if text.isdecimal() and text.isascii() and len(text) < 10:
            return int(text)
        if self.is_running:
            raise failed(f"`id -u` in {self.name}: {ran.first_error}")
        return 0 if text in ("", "root") else 1000

    def read_tar(self, path: str, use: Callable[[IO[bytes]], Value]) -> Value | None:
        """Return `use` of the tar of a file or folder, None if the path does not exist. Works on a
        stopped container. Raises Problem, and what `use` raises except TarError."""
        command = [self.docker.program, "cp", "--", f"{self.name}:{path}", "-"]
        try:
            running = Running(command, self.docker.world.child_environ, b"", _COPY_S)
        except OSError as error:
            raise failed(f"docker: {error.strerror}") from None
        result = None
        with running:
            with contextlib.suppress(tarfile.TarError):
                result = use(running.output)
            if len(running.output.read(1_000_000)) == 1_000_000:
                running.kill("sent more than a tar")
            ran = running.finish()
        if ran.code != 0 and re.search(r"(?i)could not find the file|no such file", ran.error):
            return None
        # Docker's own error says more than a fault in its tar.
        if ran.code != 0 or result is None:
            raise failed("docker sent an incomplete tar" if ran.code == 0 else ran.first_error)
        return result

    def put_tar(self, folder: str, content: bytes) -> None:
        """Unpack a tar into a folder, with the owners and modes of its entries. Works on a stopped
        container. Raises Problem."""
        ran = self.docker.run("cp", "--", "-", f"{self.name}:{folder}", stdin=content,
                              timeout_s=_COPY_S)
        if ran.code != 0:
            raise failed(f"{folder} was not written: {ran.first_error}")

    def read(self, path: str) -> HeldFile | None:
        """Return a file, None if it does not exist. Raises Problem."""
        def first(output: IO[bytes]) -> HeldFile:
            with tarfile.open(fileobj=output, mode="r|") as tar:
                entry = tar.next()
                file = tar.extractfile(entry) if entry and entry.isreg() else None
                if entry is None or file is None:
                    raise failed(f"{path} is a link, or not a regular file")
                if entry.size > _MAX_FILE_BYTES:
                    raise failed(f"{path} is too large")
                return HeldFile(file.read(), entry.uid, entry.gid, entry.mode & 0o7777)

        return self.read_tar(path, first)

    def put(self, path: str, file: HeldFile) -> None:
        """Write a file; not atomic, an interruption leaves a part. Raises Problem."""
        folder, name = os.path.split(path)
        self.put_tar(folder, tar_of(lambda tar: add_to_tar(tar, name, file)))


def env_rows(rows: Json) -> dict[str, str]:
    """Return variables by name from docker's list of NAME=VALUE."""
    pairs = (str(row).partition("=") for row in (rows if isinstance(rows, list) else ()))
    return {name: value for name, _, value in pairs}


def is_usable_path(path: str) -> bool:
    """Return whether a path from a container's settings is absolute, normal and printable."""
    return path.startswith("/") and clean(path) == path and os.path.normpath(path) == path


def tar_of(fill: Callable[[tarfile.TarFile], None]) -> bytes:
    """Return a tar with the entries that `fill` adds."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        fill(tar)
    return out.getvalue()


def add_to_tar(tar: tarfile.TarFile, path: str, file: HeldFile, is_folder: bool = False) -> None:
    entry = tarfile.TarInfo(path)
    entry.type = tarfile.DIRTYPE if is_folder else tarfile.REGTYPE
    entry.size, entry.uid, entry.gid = len(file.content), file.uid, file.gid
    entry.mode, entry.mtime = file.mode, int(time.time())
    tar.addfile(entry, io.BytesIO(file.content))


# ==== 5. Instances ===========================================================
# OpenClaw instances in containers and folders of this machine: files and discovery.


class Instance(NamedTuple):
    """One OpenClaw instance of this machine, in a container or in a folder, and its files."""

    #: The name of its tenant.
    name: str
    #: The name of the container, or the state folder.
    where: str
    #: The state folder; for a container, its path in the container.
    state_dir: str
    #: The path of openclaw.json.
    config_path: str
    container: Container | None = None
    #: Why it is ambiguous and so left alone, empty if it is not.
    doubt: str = ""

    @property
    def kind(self) -> str:
        return "container" if self.container else "folder"

    @property
    def is_running(self) -> bool:
        """Return whether files can be moved and programs run there; true for a folder."""
        return self.container is None or self.container.is_running

    @property
    def state(self) -> str:
        return "-" if not self.container else "running" if self.is_running else "stopped"

    @property
    def place(self) -> dict[str, Json]:
        """Return its location, in the form that `known_instance` reads."""
        return {"kind": self.kind, "where": self.where,
                "id": self.container.id if self.container else "",
                "stateDir": self.state_dir, "configPath": self.config_path}

    @property
    def host_state_dir(self) -> str:
        """Return the path of its state folder on this machine, empty if it is not mounted."""
        source = self.container.source_of(self.state_dir) if self.container else self.state_dir
        return source and os.path.realpath(source)

    @property
    def key_path(self) -> str:
        """Return the path of the key file in its container."""
        return f"{self.state_dir}/ocp-key"

    def read(self, path: str) -> HeldFile | None:
        """Return a file, None if it does not exist. Raises Problem if it cannot be read, is not a
        regular file, or is too large."""
        return self.container.read(path) if self.container else read_local_file(path)

    def config(self, world: World) -> dict[str, Json]:
        """Return its parsed openclaw.json, empty if the file does not exist. Raises Problem."""
        held = self.read(self.config_path)
        return parsed_config(world, held.content) if held else {}

    def write(self, path: str, file: HeldFile) -> None:
        """Write a file, atomically unless the container is stopped. Raises Problem."""
        if self.container is None:
            replace_local_file(path, file)
        elif self.is_running:
            self.container.put(draft_of(path), file)
            self.container.move(draft_of(path), path)
        else:
            self.container.put(path, file)

    def remove(self, *paths: str) -> None:
        """Remove files, if they exist. Raises Problem."""
        if self.container:
            self.container.change(paths[0], "rm", "-f", "--", *paths)
            return
        for path in paths:
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            except OSError as error:
                raise failed(f"{path} was not removed: {error.strerror}") from None

    def new_file(self, content: bytes) -> HeldFile:
        """Return a private file owned by OpenClaw's user. Raises Problem, OSError."""
        if self.container:
            uid = gid = self.container.uid
        else:
            status = os.stat(self.state_dir)
            uid, gid = status.st_uid, status.st_gid
        return HeldFile(content, uid, gid, 0o600)


def draft_of(path: str) -> str:
    """Return the temporary path of a new file in a container, before it replaces `path`."""
    folder, name = os.path.split(path)
    return f"{folder}/.ocp-{name}"


def connect_script(world: World) -> str:
    """Return the path of ocp_connect.py. Raises Problem if it is missing."""
    script = os.path.join(world.tree, "ocp_connect.py")
    if not os.path.exists(script):
        raise failed(f"{script} is missing. Copy ocp_connect.py from the server's checkout of OCP "
                     "into the folder of this ocp_tenants.py: it edits openclaw.json.")
    return script


@functools.cache
def connect_module(script: str) -> Any:
    """Return ocp_connect.py as a module: its parser accepts comments in openclaw.json."""
    name = "ocp_connect_of_tenants"
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec and spec.loader
    # Dataclasses look up their module in sys.modules while it is being executed.
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed_config(world: World, content: bytes) -> dict[str, Json]:
    """Return the parsed content of an openclaw.json. Raises Problem with the reason."""
    module = connect_module(connect_script(world))
    try:
        return as_dict(module.json_load(module.decoded(content)))
    except module.UnsafeEdit as problem:
        raise failed(f"openclaw.json {problem}") from None


def has_include(value: Json) -> bool:
    """Return whether a configuration has an $include at any depth."""
    if isinstance(value, dict):
        return "$include" in value or any(map(has_include, value.values()))
    return isinstance(value, list) and any(map(has_include, value))


# -- finding them -------------------------------------------------------------


_GATEWAY = re.compile(r"(?:(.+)-)?openclaw-gateway(?:-[0-9]+)?")
_CELL = re.compile(r"openclaw-cell-(.+)")
_CLI = re.compile(r"(?:.+-)?openclaw-cli(?:-.*)?")


def tenant_name_of(container: Container) -> str:
    """Return the tenant name for a container, empty if it is not an OpenClaw gateway."""
    name, service = container.name, container.label("service")
    if service == "openclaw-cli" or not service and _CLI.fullmatch(name):
        return ""
    cell, gateway = _CELL.fullmatch(name), _GATEWAY.fullmatch(name)
    has_state = "OPENCLAW_STATE_DIR" in container.env or bool(container.mounted_states)
    is_image = has_state and "openclaw" in str(container.config.get("Image") or "")
    if not (service == "openclaw-gateway" or cell or gateway or is_image):
        return ""
    project = container.label("project")
    return fitted_name(cell and cell[1] or project or gateway and gateway[1] or name)


def container_with(containers: Sequence[Container], *known: str) -> Container | None:
    """Return the container for the first of these names or ids that matches one."""
    return next((each for word in known for each in containers
                 if word and word in (each.name, each.id)), None)


def container_instance(container: Container, name: str) -> Instance:
    """Return the instance that a container holds."""
    state_dir, config = container.state_dir, container.env.get("OPENCLAW_CONFIG_PATH", "")
    return Instance(
        name, container.name, state_dir,
        config if is_usable_path(config) else f"{state_dir}/openclaw.json", container)


def folder_instance(folder: str, name: str) -> Instance:
    return Instance(name, folder, folder, os.path.join(folder, "openclaw.json"))


def is_state_folder(path: str) -> bool:
    """Return whether a folder is an OpenClaw state folder."""
    return any(os.path.exists(os.path.join(path, each)) for each in ("openclaw.json", "workspace"))


def folder_instances(world: World) -> list[Instance]:
    """Return the instances in ~/.openclaw and ~/.openclaw-NAME. Raises OSError."""
    found: dict[str, Instance] = {}
    folders = [os.path.join(world.home, entry) for entry in sorted(os.listdir(world.home))]
    # A link to another of these folders is no second instance.
    for folder in sorted(folders, key=os.path.islink):
        match = re.fullmatch(r"\.openclaw(?:-([A-Za-z0-9_-]{1,64}))?", os.path.basename(folder))
        if match and is_state_folder(folder):
            found.setdefault(os.path.realpath(folder),
                             folder_instance(folder, fitted_name(match[1] or "local")))
    return list(found.values())


class Discovery(NamedTuple):
    """The result of a search of this machine."""

    instances: list[Instance]
    #: Why containers could not be listed, empty if they were.
    docker_error: str


def discover(world: World, locations: Mapping[str, Json] = MappingProxyType({})) -> Discovery:
    """Return all instances of this machine; those that share a name or a state folder have a
    `doubt`. `locations` is where the server says tenants' instances are, by folder name."""
    rows, error = Docker(world).containers()
    # A saved location identifies a tenant's instance, even where discovery would not find it.
    places = {**locations, **{each.name: each.place() for each in tenant_folders(world)
                              if each.place() or each.name not in locations}}
    tenants = (known_instance(name, as_dict(place), rows) for name, place in places.items())
    known = {each.where: each for each in tenants if each}
    containers = [container_instance(row, tenant_name_of(row)) for row in rows
                  if CONTAINER_NAME.fullmatch(row.name) and tenant_name_of(row)]
    mounted = {each.host_state_dir for each in containers}
    folders = [each for each in folder_instances(world) if each.host_state_dir not in mounted]
    found = {each.where: each for each in (*containers, *folders)}
    return Discovery(with_doubts(list({**found, **known}.values()), set(known)), error)


def known_instance(
    name: str, place: Mapping[str, Json], containers: Sequence[Container]
) -> Instance | None:
    """Return the instance of a tenant at its saved location, None if it is gone."""
    where = str(place.get("where") or "")
    if place.get("kind") == "folder":
        return folder_instance(where, name) if os.path.isdir(where) else None
    row = container_with(containers, where, str(place.get("id") or ""))
    return container_instance(row, name) if row else None


def with_doubts(instances: Sequence[Instance], known: set[str]) -> list[Instance]:
    """Return the instances, with a `doubt` for those that cannot be told apart. `known` are the
    `where` of tenants' instances, which need none."""
    def shared(key: Callable[[Instance], str], each: Instance) -> list[str]:
        return [other.where for other in instances
                if other is not each and key(other) and key(other) == key(each)]

    found = []
    for each in instances:
        names = shared(lambda one: one.name, each)
        states = shared(lambda one: one.host_state_dir, each)
        doubt = f"{names[0]} has the same name" if names else (
            f"{states[0]} has the same state folder" if states else "")
        found.append(each._replace(doubt="" if each.where in known else doubt))
    return found


def choose(found: Discovery, names: Sequence[str]) -> list[Instance]:
    """Return the instances with these names, or all if no name is given. Raises Problem for an
    unknown name."""
    known = {each.name for each in found.instances}
    hidden = f" Containers are not listed: {found.docker_error}." * bool(found.docker_error)
    for name in names:
        if name not in known:
            shown = clean(name)[:80]
            raise failed(f"There is no instance {shown!r} here: see `ocp tenants discover`.{hidden}"
                         " For an instance with another name: ocp tenants add "
                         f"{shown} --apply --container NAME, or --local DIR.")
    return [each for each in found.instances if not names or each.name in names]


def named_instance(
    world: World, name: str, container: str = "", folder: str = ""
) -> Instance | None:
    """Return the instance for --container or --local, None without them. Raises Problem."""
    if folder:
        path = folder[2:] if folder[:2] == "~/" else os.path.abspath(folder)
        path = os.path.join(world.home, path)
        if not os.path.isdir(path):
            raise failed(f"--local: {clean(path)} is not a folder.")
        return folder_instance(path, name)
    if not container:
        return None
    if not CONTAINER_NAME.fullmatch(container):
        raise Problem(Exit.USAGE, f"--container: {clean(container)[:80]!r} is no container name.")
    rows, error = Docker(world).containers()
    row = container_with(rows, container)
    if row is None:
        raise failed(f"There is no container {container}" + (f": {error}." if error else "."))
    return container_instance(row, name)


class InstanceSummary(NamedTuple):
    """What `discover` shows of an instance's files."""

    #: The host of its default model, "this server", or "-".
    leads_to: str
    #: The number of its own skills.
    skills: int
    #: Why its files cannot be used, empty if they can.
    problem: str


def summary_of(world: World, instance: Instance, server_port: int) -> InstanceSummary:
    """Return the summary of an instance's files. Never raises."""
    try:
        skills = skills_there(skill_roots(world, instance)).skills
        return InstanceSummary(leads_to(instance.config(world), server_port), len(skills), "")
    except (Problem, OSError) as problem:
        return InstanceSummary("?", 0, reason_of(problem))


def leads_to(config: Mapping[str, Json], server_port: int) -> str:
    """Return the host that serves the default model of a configuration."""
    model = as_dict(as_dict(config.get("agents")).get("defaults")).get("model")
    primary = model if isinstance(model, str) else as_dict(model).get("primary")
    provider = str(primary or "").partition("/")[0]
    providers = as_dict(as_dict(config.get("models")).get("providers"))
    entry = as_dict(providers.get(provider))
    named = as_dict(as_dict(config.get("env")).get("vars")).get("ANTHROPIC_BASE_URL")
    url = str(entry.get("baseUrl") or (named if provider == "anthropic" else "") or "")
    if not url:
        return {"": "-", "anthropic": "api.anthropic.com"}.get(provider, clean(provider)[:40])
    try:
        parts = urllib.parse.urlsplit(url)
        is_here = (parts.port == server_port and as_dict(entry.get("apiKey")).get("id") == "value")
        return "this server" if is_here else clean(parts.netloc.rpartition("@")[2])[:40]
    except ValueError:
        return "?"


# ==== 6. Tenants =============================================================
# Set up, apply, undo.


#: What may run on the server for a tenant: at `api` nothing, at `tools` commands of its OpenClaw
#: (COMMANDS_TO_RUN), at `agent` claude's own tools too.
LEVELS = ("api", "tools", "agent")
COMMANDS_TO_RUN = ("none", "read", "act")
_BRIDGE = "172.17.0.1"
#: The time limit for the test question at the end of a setup.
_ANSWER_S = 90.0
#: Run by `node -e`: gets /health of a server, or with the path of a key sends one question, and
#: prints the answer. Arguments: URL, certificate to trust or "", optionally the path of the key.
_ASK_SCRIPT = """
const [url, ca, keyPath] = process.argv.slice(1);
const {request} = require(url.startsWith("https:") ? "https" : "http");
const key = keyPath && require("fs").readFileSync(keyPath, "utf8").trim();
const asked = request(url + (key ? "/v1/chat/completions" : "/health"), {
  method: key ? "POST" : "GET", ca: ca || undefined, timeout: key ? 60000 : 3000,
  headers: key ? {"Content-Type": "application/json", Authorization: "Bearer " + key} : {},
}, (answer) => {
  let text = "";
  answer.setEncoding("utf8");
  answer.on("data", (piece) => { text += piece; });
  answer.on("end", () => {
    console.log(text);
    process.exitCode = answer.statusCode < 300 ? 0 : 1;
  });
});
asked.on("timeout", () => asked.destroy(new Error("no answer in time")));
asked.on("error", (error) => { console.error(error.message); process.exit(1); });
asked.end(key ? JSON.stringify(
  {model: "haiku", messages: [{role: "user", content: "Reply: pong"}]}) : "");
"""


def profile_of(place: Mapping[str, Json], level: str, commands: str) -> dict[str, Json]:
    """Return the profile fields for a level and the commands that may run, with the `relay` to the
    instance for a level above `api`. Empty arguments leave their field unchanged."""
    body: dict[str, Json] = {
        name: value for name, value in (("level", level), ("commands", commands)) if value}
    if level not in ("", LEVELS[0]) and place:
        is_container = place.get("kind") == "container"
        body["relay"] = {"container": place.get("where")} if is_container else {
            "stateDir": place.get("stateDir")}
    return body


class Options(NamedTuple):
    """The options of setup and apply."""

    level: str = ""
    #: Which commands of its OpenClaw may run, empty to keep the setting.
    commands: str = ""
    #: "primary", "backup" or empty.
    role: str = ""
    provider_name: str = ""
    #: The server's address as instances see it, empty to find it.
    url: str = ""
    #: Whether an existing key may become a tenant's key.
    existing: bool = False
    #: Whether an existing folder without a tenant may be used.
    adopt: bool = False
    #: Whether to send no test question at the end.
    skip_answer: bool = False
    #: The .env to change, "" for none, "auto" to find it.
    dotenv: str = ""
    #: The secret of a new key, empty to make one.
    secret: str = ""


class Job(NamedTuple):
    """One run of a command, with the server's keys and tenants at the start."""

    world: World
    server: Server
    keys: Mapping[str, Mapping[str, Json]]
    tenants: Mapping[str, Mapping[str, Json]]
    options: Options
    #: The fingerprint of the server's own certificate, and the certificate (PEM); empty without.
    fingerprint: str = ""
    certificate: str = ""

    def folder(self, name: str) -> Folder:
        """Return the folder of a tenant. Raises Problem for an invalid name."""
        folder = os.path.basename(str(self.tenants.get(name, {}).get("folder") or name))
        if not _FOLDER_NAME.fullmatch(folder):
            raise failed(f"{clean(name)[:80]!r} is not a valid folder name.")
        return Folder(self.world, folder)

    def place(self, name: str) -> dict[str, Json]:
        """Return where the instance of a tenant is, as Instance.place; empty if it has none.
        Raises Problem."""
        return self.folder(name).place() or as_dict(self.tenants[name].get("instance"))

    def check_tenant(self, name: str) -> None:
        """Raise Problem if there is no tenant of this name."""
        if name not in self.tenants:
            raise failed(f"There is no tenant {clean(name)[:80]!r}: see `ocp tenants`.")


class Plan(NamedTuple):
    """The changes that one instance needs."""

    instance: Instance
    folder: Folder
    #: "" if its key works, "new", or "new secret".
    key: str
    #: Whether to create the tenant, or to change its level or commands.
    writes_tenant: bool
    level: str
    #: The server's address as the instance sees it, and whether it was tested.
    url: str
    is_proved: bool
    #: Whether to write the key file in the container.
    writes_key: bool
    #: The lines of openclaw.json that change.
    diff: tuple[str, ...]
    #: The .env to change, empty for none.
    dotenv: str = ""

    @property
    def is_empty(self) -> bool:
        return not (self.key or self.writes_tenant or self.writes_key or self.diff or self.dotenv)

    @property
    def summary(self) -> str:
        """Return the planned changes in a few words."""
        parts = []
        if self.key or self.writes_tenant:
            key = {"new": "new key", "new secret": "new secret"}.get(self.key, "its key")
            parts.append(f"{key}, level {self.level}")
        if self.diff:
            parts.append(f"openclaw.json: this server at {self.url}/v1")
        if self.writes_key and not self.key:
            parts.append("its key file")
        if self.dotenv:
            parts.append(self.dotenv)
        parts = ["as it should be"] if self.is_empty else parts
        if not self.is_proved:
            parts.append("stopped: the address cannot be tested")
        return "; ".join(parts)


def is_secret_of(server: Server, secret: str, name: str) -> bool:
    """Return whether a secret is that of the server's key `name`. Raises Problem."""
    if not secret:
        return False
    try:
        scope = as_dict(server.ask("GET", "/api/usage?limit=1&hours=1", key=secret)).get("scope")
    except Problem as problem:
        if problem.code is Exit.DENIED:
            return False
        raise
    return as_dict(scope).get("self") == name


def start_job(world: World, server: Server, options: Options) -> Job:
    """Return a job with the server's current keys and tenants. Raises Problem if the server does
    not answer, refuses the admin key, has no tenant API, is a demo, or is not in mode multi."""
    health = as_dict(server.ask("GET", "/health"))
    if "version" not in health or "authMode" not in health:
        raise failed(f"{server.url} is not an OCP server: name the right address with --server.")
    if health["authMode"] != "multi":
        raise failed(f"{server.url} is in mode {clean(health['authMode'])}, which ignores keys: "
                     "set CLAUDE_AUTH_MODE=multi and restart it.")
    if health.get("demo") is True:
        raise failed(f"{server.url} is a demo, which has no tenants: start it without --demo.")
    try:
        tenants = server.tenants()
    except Problem as problem:
        if problem.code is Exit.FAILED and " 404: " in str(problem):
            raise failed(f"OCP {clean(health['version'])} at {server.url} does not support "
                         "tenants: update it with `ocp update`.") from None
        raise
    pin = str(health.get("tlsFingerprint") or "")
    return Job(world, server, server.keys(), tenants, options, pin,
               server.certificate() if pin else "")


# -- addresses ----------------------------------------------------------------


def inside_urls(job: Job, instance: Instance, container: Container) -> list[str]:
    """Return the addresses to try from a container, the likeliest first."""
    parts = urllib.parse.urlsplit(job.server.url)
    network = str(as_dict(container.inspected.get("HostConfig")).get("NetworkMode") or "")
    if network == "host" or not is_loopback(job.server.url):
        return [job.server.url]
    hosts = ["host.docker.internal", *container.gateways, _BRIDGE]
    suffix = f":{port_of(job.server.url)}{parts.path}"
    known = str(job.folder(instance.name).place().get("url") or "")
    urls = [f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{suffix}" for host in hosts]
    return list(dict.fromkeys([*([known] if known in urls else []), *urls]))


def is_same_server(before: Json, seen: Json, after: Json) -> bool:
    """Return whether three answers of /health come from one server. `before` and `after` were asked
    here: the uptime and the request count of `seen` have to lie between theirs."""
    def numbers(health: Json) -> tuple[Json, Json, Json]:
        fields = as_dict(health)
        stats = as_dict(fields.get("stats"))
        return fields.get("version"), fields.get("uptime"), stats.get("totalRequests")

    versions, uptimes, totals = zip(*map(numbers, (before, seen, after)))
    if len(set(versions)) != 1 or not all(isinstance(each, int) for each in (*uptimes, *totals)):
        return False
    return list(uptimes) == sorted(uptimes) and list(totals) == sorted(totals)


def ask_inside(job: Job, container: Container, url: str, *key_path: str) -> Ran:
    """Get the server's /health from inside a container, or send one question with the key at
    `key_path`. Never raises."""
    return container.exec("node", "-e", _ASK_SCRIPT, url, job.certificate, *key_path,
                          timeout_s=_ANSWER_S if key_path else 6.0)


def answers_inside(job: Job, container: Container, url: str) -> bool:
    """Return whether this server, not another, answers at `url` in a container. Raises Problem."""
    before = job.server.ask("GET", "/health")
    ran = ask_inside(job, container, url)
    if ran.code is None:
        raise failed(ran.first_error)
    after = job.server.ask("GET", "/health")
    return ran.code == 0 and is_same_server(before, ran.json, after)


def address_for(job: Job, instance: Instance) -> tuple[str, bool]:
    """Return the server's address for an instance, and whether it was tested. Raises Problem."""
    container = instance.container
    if job.options.url:
        return parse_url(job.options.url, "--url"), True
    if not container:
        return job.server.url, True
    urls = inside_urls(job, instance, container)
    if not container.is_running:
        known = job.folder(instance.name).place().get("url") == urls[0]
        return (urls[0] if known or len(urls) == 1 else urls[1]), False
    found = next((url for url in urls if answers_inside(job, container, url)), "")
    if not found:
        raise failed(
            f"the container reaches this server at none of {', '.join(urls)}. Set CLAUDE_BIND "
            "to an address that containers reach, such as 0.0.0.0, and restart the server; or name "
            "the address with --url" + (
                ". The server's certificate has to cover that host too: `ocp tls --name HOST`"
                if job.certificate else ""))
    return found, True


# -- openclaw.json ------------------------------------------------------------


def run_connect(world: World, connect_home: str, config_path: str, key: str, *words: str) -> Json:
    """Run ocp_connect.py for one openclaw.json and return its JSON. Raises Problem. The empty PATH
    hides any program `openclaw`, so that the text is edited and its comments stay."""
    environ = {
        "HOME": world.home, "LANG": "C.UTF-8", "PATH": "", "XDG_CONFIG_HOME": connect_home,
        "OPENCLAW_CONFIG_PATH": config_path, "OCP_CONNECT_KEY": key,
        "OPENCLAW_STATE_DIR": os.path.dirname(config_path)}
    ran = run_words([sys.executable, connect_script(world), *words, "--only", "openclaw", "--json"],
                    environ, timeout_s=60.0)
    result = ran.json
    if not isinstance(result, dict):
        raise failed(re.sub(r"^ocp_connect: ", "", ran.first_error))
    problems = [f"openclaw.json {clean(row.get('reason'))}; add this by hand:\n"
                f"{row.get('snippet')}" for row in dicts_in(result.get("byHand"))]
    problems += [clean(row) for row in result.get("failures") or ()]
    if problems:
        raise failed("\n".join(problems))
    return result


def connect_words(job: Job, instance: Instance, folder: Folder, url: str) -> list[str]:
    """Return the arguments of ocp_connect.py for an instance."""
    options = job.options
    words = [job.server.url, "--yes", "--skip-answer", "--openclaw-url", url,
             "--openclaw-key-path", instance.key_path if instance.container else folder.key_path]
    words += ["--fingerprint", job.fingerprint] if job.fingerprint else []
    words += [f"--{options.role}"] if options.role else []
    return words + (["--provider-name", options.provider_name] if options.provider_name else [])


@contextlib.contextmanager
def planning_copy(folder: Folder, held: HeldFile | None) -> Iterator[tuple[str, str]]:
    """Yield the paths of temporary copies of the tenant's ocp_connect.py home and openclaw.json, so
    that planning changes none of the tenant's files."""
    with tempfile.TemporaryDirectory(prefix="ocp-tenants-") as temporary:
        home, staged = os.path.join(temporary, "connect"), os.path.join(temporary, "openclaw.json")
        if folder.has("connect"):
            shutil.copytree(folder.connect_home, home, symlinks=True)
            record = os.path.join(home, "ocp", "connect.json")
            own = folder.inside("instance", "openclaw.json")
            with contextlib.suppress(FileNotFoundError):
                with open(record, encoding="utf-8") as file:
                    text = file.read()
                write_whole(record, text.replace(json.dumps(own), json.dumps(staged)).encode())
        if held is not None:
            write_whole(staged, held.content)
        yield home, staged


def planned_diff(job: Job, instance: Instance, folder: Folder, url: str, key: str) -> list[str]:
    """Return the diff that ocp_connect.py would make in openclaw.json. Raises Problem."""
    words = [*connect_words(job, instance, folder, url), "--dry-run"]
    held = instance.read(instance.config_path)
    if held and has_include(parsed_config(job.world, held.content)):
        raise failed("openclaw.json takes parts from other files ($include): change it by hand")
    with planning_copy(folder, held) as (home, staged):
        result = run_connect(job.world, home, staged, key, *words)
    return [str(line) for edit in dicts_in(result.get("edits")) for line in edit.get("diff", ())]


# -- plans --------------------------------------------------------------------


def refuse_untouchable(job: Job, instance: Instance) -> None:
    """Raise Problem with the reason if an instance must not be changed."""
    if instance.doubt:
        raise failed(f"{instance.doubt}: tell them apart with --container or --local")
    if instance.name not in job.tenants:
        checked_name(instance.name)
    if instance.container:
        if instance.container.env.get("OPENCLAW_CONFIG_READONLY", "") not in ("", "0", "false"):
            raise failed("OPENCLAW_CONFIG_READONLY is set in its container")
        return
    path = instance.config_path
    if os.stat(instance.state_dir).st_uid != os.stat(job.world.ocp_home).st_uid:
        raise failed(f"{instance.state_dir} belongs to another user than {job.world.ocp_home}, "
                     "where its key would be")
    if os.path.islink(path):
        raise failed(f"{path} is a link")
    target = path if os.path.exists(path) else instance.state_dir
    if not os.access(target, os.W_OK):
        raise failed(f"you may not write {target}")


def refuse_foreign(job: Job, name: str) -> None:
    """Raise Problem if a new tenant's folder already exists and no setup has made it."""
    folder = job.folder(name)
    if name not in job.tenants and os.path.isdir(folder.path) and not (
            folder.secret() or folder.place() or job.options.adopt or folder.is_only_begun):
        raise failed(f"{folder.path} exists without a tenant: --adopt uses it")


def refuse_taken(job: Job, name: str, instance: Instance) -> None:
    """Raise Problem if the instance for a tenant of this name is that of another tenant."""
    places = {other: job.place(other) for other in job.tenants if other != name}
    is_in_doubt = any(place.get("kind") == "container" for place in places.values())
    rows = Docker(job.world).containers()[0] if is_in_doubt else []
    for other, place in places.items():
        known = known_instance(other, place, rows)
        if known and (known.where == instance.where or known.host_state_dir and (
                known.host_state_dir == instance.host_state_dir)):
            raise failed(f"{instance.where} is the instance of the tenant {clean(other)}. "
                         f"`ocp tenants remove {clean(other)}` gives it back")


def key_state(job: Job, instance: Instance, folder: Folder) -> str:
    """Return what the key of an instance needs: "", "new" or "new secret". Raises Problem."""
    name = instance.name
    if name not in job.keys:
        return "new"
    if is_secret_of(job.server, folder.secret(), name):
        return ""
    if name not in job.tenants and not job.options.existing:
        raise failed(f"there is a key {name} already, perhaps of a device. --existing gives it to "
                     "this instance, with a new secret")
    return "new secret"


def plan_for(job: Job, instance: Instance) -> Plan:
    """Return what an instance needs, without changing it. Raises Problem for an instance that must
    not be changed, OSError."""
    refuse_untouchable(job, instance)
    refuse_foreign(job, instance.name)
    folder, row = job.folder(instance.name), job.tenants.get(instance.name)
    key = key_state(job, instance, folder)
    url, is_proved = address_for(job, instance)
    secret = folder.secret() if not key else ""
    diff = planned_diff(job, instance, folder, url, secret or job.server.key)
    level = job.options.level or str((row or {}).get("level") or LEVELS[0])
    is_other = row is None or row.get("level") != level or (
        job.options.commands not in ("", row.get("commands")))
    return Plan(
        instance, folder, key, is_other, level, url, is_proved,
        bool(instance.container) and not has_key(instance, secret), tuple(diff),
        planned_dotenv(job, instance, url, secret) if job.options.dotenv else "")


def has_key(instance: Instance, secret: str) -> bool:
    """Return whether the key file in a container holds this key, with an owner and a mode that
    OpenClaw accepts."""
    if not secret:
        return False
    with contextlib.suppress(Problem):
        held, wanted = instance.read(instance.key_path), instance.new_file(b"")
        return held is not None and held.content.strip() == secret.encode() and (
            held.mode & 0o077 == 0 and held.uid == wanted.uid)
    return False


# -- carrying out -------------------------------------------------------------


def carry_out(job: Job, plan: Plan) -> list[str]:
    """Carry out a plan, and return what was done. Raises Problem, OSError. An interruption is safe
    after any step: the next run continues, and undo reverts the steps so far."""
    instance, folder, done = plan.instance, plan.folder, []
    if plan.is_empty:
        return ["nothing to do"]
    place = {**instance.place, "url": plan.url}
    folder.write_place(place)
    if plan.key:
        done.append(make_key(job, plan))
    if plan.writes_tenant:
        body = {**profile_of(place, plan.level, job.options.commands), "instance": place}
        is_there = instance.name in job.tenants
        job.server.tenant(instance.name, *(("PATCH", body) if is_there else (
            "PUT", {**body, "adopt": True})))
    if plan.writes_key:
        instance.write(instance.key_path, instance.new_file(folder.secret().encode() + b"\n"))
    if plan.diff:
        done += change_config(job, plan)
    if plan.dotenv:
        done.append(write_dotenv(plan))
    if plan.writes_key and instance.container and instance.is_running:
        instance.container.run_openclaw("secrets", "reload")
    if plan.key == "new secret" and not instance.container:
        done.append("run `openclaw secrets reload` so that a running gateway reads it")
    if not instance.is_running:
        return [*done, f"start it and run `ocp tenants check {instance.name}`"]
    return done if job.options.skip_answer else [*done, ask_as_instance(job, plan)]


def make_key(job: Job, plan: Plan) -> str:
    """Create an instance's key or rotate its secret; saves the secret here first. Returns what was
    done. Raises Problem."""
    name, secret = plan.instance.name, job.options.secret or new_secret()
    plan.folder.write_secret(secret)
    if plan.key == "new":
        job.server.ask("POST", "/api/keys", {"name": name, "secret": secret, "maxConcurrent": 1})
        return "key made"
    job.server.ask("POST", job.server.key_path(name, "/rotate"), {"secret": secret})
    return "new secret"


def change_config(job: Job, plan: Plan) -> list[str]:
    """Change openclaw.json with ocp_connect.py. Returns what was done. Raises Problem."""
    instance, folder = plan.instance, plan.folder
    words = connect_words(job, instance, folder, plan.url)
    staged = folder.inside("instance", "openclaw.json")
    for _ in range(3):
        before = instance.read(instance.config_path)
        # ocp_connect.py edits this copy.
        folder.remove("instance", "openclaw.json")
        if before is not None:
            folder.write(before.content, "instance", "openclaw.json")
        with folder.opened("connect", makes=True):
            run_connect(job.world, folder.connect_home, staged, folder.secret(), *words)
        after = folder.read("instance", "openclaw.json")
        if before is not None and before.content == after:
            return []
        done = push_config(instance, before, after)
        if done:
            return done
    raise failed("another program kept changing openclaw.json: try again")


def push_config(instance: Instance, before: HeldFile | None, after: bytes) -> list[str]:
    """Replace openclaw.json if it is still as `before`. Returns what was done, nothing if the file
    has changed in the meantime. Raises Problem if OpenClaw does not accept it."""
    path, container = instance.config_path, instance.container
    file = before._replace(content=after) if before else instance.new_file(after)
    if not container or not container.is_running:
        if instance.read(path) != before:
            return []
        instance.write(path, file)
        return ["file changed"]
    try:
        container.put(draft_of(path), file)
        if container.read(path) != before:
            return []
        container.move(draft_of(path), path)
    finally:
        container.exec("rm", "-f", "--", draft_of(path))
    return ["file changed", *validated(instance, container, before, file)]


def validated(
    instance: Instance, container: Container, before: HeldFile | None, file: HeldFile
) -> list[str]:
    """Let OpenClaw validate its new file; restore the old one and raise Problem if it refuses."""
    ran = container.run_openclaw("config", "validate", "--json")
    if ran is None or ran.code is None:
        return ["not validated"]
    if ran.code == 0:
        return ["validated"]
    issues = dicts_in(as_dict(ran.json).get("issues"))
    why = "; ".join(clean(row.get("message") or row) for row in issues) or ran.first_error
    if instance.read(instance.config_path) == file:
        if before is None:
            instance.remove(instance.config_path)
        else:
            instance.write(instance.config_path, before)
    raise failed(f"OpenClaw does not accept the change, which was undone: {why}")


def ask_as_instance(job: Job, plan: Plan) -> str:
    """Send one test question as the instance would. Returns the answer in words. Raises Problem."""
    instance, reason = plan.instance, ""
    if instance.container:
        ran = ask_inside(job, instance.container, plan.url, instance.key_path)
        answer = ran.json
        if ran.code != 0:
            error = as_dict(as_dict(answer).get("error")).get("message")
            reason = clean(error or ran.first_error)
    else:
        question = {"model": "haiku", "messages": [{"role": "user", "content": "Reply: pong"}]}
        try:
            answer = job.server.ask(
                "POST", "/v1/chat/completions", question, plan.folder.secret(), _ANSWER_S)
        except Problem as problem:
            answer, reason = None, str(problem)
    if reason:
        raise failed(f"it is set up, but gets no answer: {reason}")
    choice = next(iter(dicts_in(as_dict(answer).get("choices"))), {})
    return f'answered "{clean(as_dict(choice.get("message")).get("content"))[:40]}"'


# -- undo ---------------------------------------------------------------------


def instance_at(world: World, folder: Folder) -> Instance:
    """Return the instance at a tenant's saved location. Raises Problem if it is gone."""
    place, rows, error = folder.place(), list[Container](), ""
    kind = "container" if place.get("kind") == "container" else "folder"
    if kind == "container":
        rows, error = Docker(world).containers()
    found = known_instance(folder.name, place, rows)
    if error or found is None:
        raise failed(error or f"its {kind} {clean(place.get('where'))} is gone, so its file cannot "
                              "be restored")
    # Use the saved paths, even if the instance's variables name others now.
    return found._replace(
        state_dir=str(place.get("stateDir") or found.state_dir),
        config_path=str(place.get("configPath") or found.config_path))


def undo_changes(folder: Folder, instance: Instance) -> list[str]:
    """Restore the files of an instance. Returns what was done. Raises Problem, OSError."""
    done = restore_dotenv(folder)
    if folder.has("connect"):
        held = instance.read(instance.config_path)
        with planning_copy(folder, held) as (home, staged):
            run_connect(folder.world, home, staged, "", "undo", "--yes")
            back = read_local_file(staged)
        done += restore_config(instance, held, back)
        folder.remove("connect")
    if instance.container:
        done += drop_key(instance)
    else:
        instance.remove(instance.config_path + DRAFT)
    folder.remove("instance")
    return done or ["nothing to restore"]


def drop_key(instance: Instance) -> list[str]:
    """Remove the key and leftover drafts from a container. Returns what could not be removed.
    Raises Problem."""
    key_path = instance.key_path
    if instance.is_running:
        instance.remove(key_path, draft_of(key_path), draft_of(instance.config_path))
        return []
    held = instance.read(key_path)
    if not held:
        return []
    # In a stopped container files can be replaced, but not removed.
    instance.write(key_path, held._replace(content=b""))
    return [f"{key_path} stays there, empty"]


def restore_config(instance: Instance, held: HeldFile | None, back: HeldFile | None) -> list[str]:
    """Restore an openclaw.json from `held` (now) to `back` (before). Raises Problem."""
    if (held and held.content) == (back and back.content):
        return []
    if instance.read(instance.config_path) != held:
        raise failed("openclaw.json was changed just now: run this again")
    if back is None:
        instance.remove(instance.config_path)
    elif held is not None:
        instance.write(instance.config_path, held._replace(content=back.content))
    return ["file restored"]


# -- .env ---------------------------------------------------------------------


_DOTENV_NAMES = (b"ANTHROPIC_BASE_URL", b"ANTHROPIC_API_KEY")


def planned_dotenv(job: Job, instance: Instance, url: str, secret: str) -> str:
    """Return the path of an instance's .env, empty if it needs no change. Raises Problem."""
    path = job.options.dotenv
    if path == "auto":
        found = instance.container and instance.container.label
        listed = found("project.environment_file").split(",")[0] if found else ""
        folder = found("project.working_dir") if found else ""
        guess = os.path.join(job.world.home, "openclaw", ".env")
        named = [listed, folder and os.path.join(folder, ".env"), f"{guess}.{instance.name}", guess]
        path = next((each for each in named if os.path.isabs(each) and os.path.isfile(each)), "")
        if not path:
            raise failed("its .env was not found: name it with --dotenv PATH")
    path = os.path.abspath(path)
    content = dotenv_at(path).content
    return "" if dotenv_text(content, url, secret) == content else path


def dotenv_at(path: str) -> HeldFile:
    """Return a .env to change. Raises Problem."""
    held = read_local_file(path)
    if held is None or os.path.islink(path):
        raise failed(f"--dotenv: {clean(path)} is missing or a link")
    return held


def dotenv_line(name: bytes, end: bytes = b"") -> re.Pattern[bytes]:
    """Return the pattern of a line that sets a variable, followed by `end`."""
    return re.compile(rb"(?m)^" + name + rb"=[^\r\n]*" + end)


def dotenv_text(content: bytes, url: str, secret: str) -> bytes:
    """Return a .env with the address and the key set. Only names at the start of a line count."""
    newline = b"\r\n" if b"\r\n" in content else b"\n"
    for name, value in zip(_DOTENV_NAMES, (url, secret)):
        line = name + b"=" + value.encode()
        content, count = dotenv_line(name).subn(line.replace(b"\\", rb"\\"), content)
        if not count:
            content += newline if content and not content.endswith(b"\n") else b""
            content += line + newline
    return content


def write_dotenv(plan: Plan) -> str:
    """Change a .env, and save a copy first. Returns what was done. Raises Problem."""
    path, folder = plan.dotenv, plan.folder
    if folder.place().get("dotenv") not in (None, path):
        # The saved copy is of another file, which the instance no longer uses.
        restore_dotenv(folder)
    # Read it again: it may have changed while the question was on the screen.
    before, place, kept = dotenv_at(path), folder.place(), folder.read("instance", "dotenv")
    after = dotenv_text(before.content, plan.url, folder.secret())
    if place.get("dotenv") != path:
        kept = before.content
    elif before.content != kept and digest(before.content) != place.get("dotenvDigest"):
        kept = with_lines_of(before.content, kept)
    folder.write(kept, "instance", "dotenv")
    # Save its path before the file is changed, so that undo finds it after an interruption.
    folder.write_place({"dotenv": path, "dotenvDigest": digest(after)})
    replace_local_file(path, before._replace(content=after))
    warning = " Other users can read the key in it: chmod 600" * bool(before.mode & 0o044)
    return f"{path} changed: recreate the container with `docker compose up -d`.{warning}"


def restore_dotenv(folder: Folder) -> list[str]:
    """Restore the .env. If it has changed since, restore only the two lines."""
    place = folder.place()
    path, original = str(place.get("dotenv") or ""), folder.read("instance", "dotenv")
    held = read_local_file(path) if path else None
    if held is not None:
        is_ours = digest(held.content) == place.get("dotenvDigest")
        back = original if is_ours else with_lines_of(held.content, original)
        if back != held.content:
            replace_local_file(path, held._replace(content=back))
            folder.write_place({"dotenv": None})
            return [f"{path} restored"]
    return []


def with_lines_of(content: bytes, original: bytes) -> bytes:
    """Return a .env with the two lines of the original; a line that it lacks is removed."""
    for name in _DOTENV_NAMES:
        was = dotenv_line(name).search(original)
        pattern = dotenv_line(name) if was else dotenv_line(name, rb"(?:\r?\n)?")
        content = pattern.sub((was[0] if was else b"").replace(b"\\", rb"\\"), content)
    return content


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# -- variables of an instance -------------------------------------------------


class FoundEnv(NamedTuple):
    """The variables of an instance, and those left out with the reason, by name."""

    values: dict[str, str]
    left_out: dict[str, str]


_BLOCKED = re.compile(
    r"PATH|HOME|SHELL|USER|LOGNAME|TMPDIR|IFS|ENV|BASH_ENV|(?:LD|DYLD|NODE|BUN|GIT|SSH|ANTHROPIC|"
    r"OPENAI|OPENCLAW|OCP|PROXY|DOCKER|DISABLE|ENABLE|MAX|MCP|XDG|DBUS|SSL)_.*|"
    r"(?:PYTHON|PERL|RUBY|CLAUDE).*|.*_PROXY", re.I)


def variable_rejection(name: str) -> str:
    """Return why the server does not accept a variable of this name, empty if it does."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", name):
        return "not a valid variable name"
    return "could change claude or this server" if _BLOCKED.fullmatch(name) else ""


def env_of(world: World, instance: Instance, with_container: bool) -> FoundEnv:
    """Return the variables from an instance's configuration. Raises Problem."""
    config, container, found = instance.config(world), instance.container, FoundEnv({}, {})
    own = container.env if container else world.child_environ
    rows: list[tuple[str, Json]] = []
    if with_container and container:
        image = image_env(container)
        rows += [pair for pair in own.items() if image.get(pair[0]) != pair[1]]
    env = as_dict(config.get("env"))
    rows += [pair for pair in env.items() if pair[0] not in ("vars", "shellEnv")]
    rows += as_dict(env.get("vars")).items()
    for key, entry in as_dict(as_dict(config.get("skills")).get("entries")).items():
        rows += as_dict(as_dict(entry).get("env")).items()
        if "apiKey" in as_dict(entry):
            found.left_out[f"apiKey of {clean(key)}"] = (
                "set the variable that the skill names as its primaryEnv")
    for name, value in rows:
        reason, text = env_value(value, own)
        reason = reason or variable_rejection(name)
        if reason:
            found.left_out[clean(name)] = reason
        else:
            # In a value that begins with a mounted path, put the path on this machine.
            found.values[name] = container and container.source_of(text) or text
    return found


def env_value(value: Json, own: Mapping[str, str]) -> tuple[str, str]:
    """Return why a value cannot be used (empty if it can), and the value."""
    if isinstance(value, dict):
        name = str(value.get("id"))
        if value.get("source") != "env":
            return f"a reference to {clean(value.get('source'))}", ""
        return ("", own[name]) if name in own else (f"there is no {clean(name)}", "")
    if not isinstance(value, str):
        return "not a string", ""
    missing = [name for name in re.findall(r"\$\{([A-Z_][A-Z0-9_]*)\}", value) if name not in own]
    if missing:
        return f"there is no {missing[0]}", ""
    return "", re.sub(r"\$\{([A-Z_][A-Z0-9_]*)\}", lambda match: own[match[1]], value)


def image_env(container: Container) -> dict[str, str]:
    """Return the variables that a container has from its image. Raises Problem."""
    image = str(container.inspected.get("Image") or container.config.get("Image") or "")
    ran = container.docker.run("inspect", "--type", "image", "--", image)
    rows = dicts_in(ran.json)
    if ran.code != 0 or not rows:
        raise failed(f"its image cannot be inspected: {ran.first_error}")
    return env_rows(as_dict(rows[0].get("Config")).get("Env"))


# ==== 7. Skills ==============================================================
# Compare the skills of a tenant with those of its instance, and copy them in either direction.
# Each entry from an instance is checked before anything of it is written. A skill is replaced as
# a whole, after a copy of the old one went to backup/. No sync deletes a skill.


#: Limits for one file, for one skill, and for all skills in one folder.
_MAX_SKILL_FILE_BYTES, _MAX_SKILL_BYTES, _MAX_ROOT_BYTES = 1_000_000, 10_000_000, 200_000_000
_MAX_SKILL_FILES, _MAX_SKILLS, _MAX_ENTRIES = 500, 200, 20_000
#: Limits: folders between the root and a skill, parts of a path in a skill, length of a path.
_MAX_ABOVE, _MAX_INSIDE, _MAX_PATH_CHARS = 6, 8, 1000
#: The limit for the headers of one entry of a tar.
_MAX_HEADER_BYTES = 100_000
#: Folders beside the skills: for skills being written, and for skills being replaced.
_NEW, _OLD = ".ocp-new", ".ocp-old"
_BUNDLED = "/app"


class Member(NamedTuple):
    """A file, folder or other entry below a folder of skills."""

    path: str
    #: "file", "folder", or the reason why it is neither.
    kind: str
    is_executable: bool = False
    size: int = 0
    file: IO[bytes] | None = None


class LimitedReader:
    """A tar stream that fails when more is read than allow() permits, because tarfile itself has
    no limit for headers."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._left, self._all = file, _MAX_HEADER_BYTES, _MAX_ROOT_BYTES

    def allow(self, count: int) -> None:
        self._left = count

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._left, self._all = self._left - len(content), self._all - len(content)
        if self._all < 0:
            raise failed(f"its skills are more than {_MAX_ROOT_BYTES} bytes")
        if self._left < 0:
            raise failed("docker sent a tar header that is too long")
        return content


def tar_members(output: IO[bytes]) -> Iterator[Member]:
    """Yield the entries below a tar's top folder. Raises Problem, tarfile.TarError, OSError."""
    limited: Any = LimitedReader(output)
    with tarfile.open(fileobj=limited, mode="r|") as tar:
        # tarfile keeps every entry that it has read: clear the list to bound the memory.
        past: list[tarfile.TarInfo] = vars(tar)["members"]
        entry = tar.next()
        while entry is not None:
            first, _, inner = entry.name.partition("/")
            kind = next((word for is_so, word in (
                (entry.issym(), "a link"), (entry.islnk(), "a hard link"),
                (entry.issparse(), "a sparse file"), (entry.isdir(), "folder"),
                (entry.isreg(), "file")) if is_so), "a device")
            limited.allow(entry.size + _MAX_HEADER_BYTES)
            if inner or kind != "folder":
                path = inner if first not in ("", ".", "..") and inner else entry.name
                yield Member(path, kind, bool(entry.mode & 0o111), entry.size,
                             tar.extractfile(entry) if kind == "file" else None)
            past.clear()
            entry = tar.next()


def folder_members(at: int, above: str = "") -> Iterator[Member]:
    """Yield the entries below an open folder, without following links. Raises OSError."""
    for name in sorted(os.listdir(at)):
        path = above + name
        try:
            mode = os.stat(name, dir_fd=at, follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode) and path.count("/") < _MAX_ABOVE + _MAX_INSIDE:
                yield Member(path, "folder")
                with opened_folder(at, name) as below:
                    yield from folder_members(below, f"{path}/")
            elif stat.S_ISREG(mode):
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                with open(os.open(name, flags, dir_fd=at), "rb") as file:
                    found = os.fstat(file.fileno())
                    kind = "file" if stat.S_ISREG(found.st_mode) else "a device"
                    yield Member(path, kind, bool(found.st_mode & 0o111), found.st_size, file)
            else:
                yield Member(path, "a link" if stat.S_ISLNK(mode) else "a device")
        except OSError as error:
            yield Member(path, f"not readable: {error.strerror}")


class File(NamedTuple):
    """A file of a skill."""

    is_executable: bool
    size: int
    digest: str


class Root(NamedTuple):
    """A folder with skills, of a tenant or of an instance."""

    #: The trusted folder above; links are followed in it, but not in `parts`.
    base: str
    parts: tuple[str, ...]
    #: The container that holds it, None for this machine.
    container: Container | None = None
    #: How many folders may be between it and a skill.
    max_above: int = _MAX_ABOVE
    is_bundled: bool = False

    @property
    def path(self) -> str:
        return os.path.join(self.base, *self.parts)

    def read(self, write: Write | None = None) -> Found:
        """Return the skills, and pass each accepted file to `write`. Raises Problem."""
        if self.container:
            return self.container.read_tar(self.path, lambda output: collect(
                self, tar_members(output), write)) or Found({}, {})
        try:
            with opened_folder(self.base, *self.parts) as at:
                return collect(self, folder_members(at), write)
        except FileNotFoundError:
            return Found({}, {})
        except OSError as error:
            raise failed(f"{self.path} cannot be read: {error.strerror}") from None

    def put(self, skills: Sequence[Skill], held: Mapping[str, Skill]) -> None:
        """Copy skills here, each as a whole, in place of those in `held` with the same name. Raises
        Problem."""
        if self.container:
            _put_contained_skills(self, self.container, skills, held)
            return
        try:
            make_folders(self.base)
            with opened_folder(self.base, *self.parts, makes=True) as at:
                _put_skills(at, skills, held)
        except OSError as error:
            raise failed(f"{self.path} cannot be written: {error.strerror}") from None


class Skill(NamedTuple):
    """A folder with a SKILL.md."""

    name: str
    root: Root
    #: The path of its folder below the root.
    home: str
    files: Mapping[str, File]
    #: Whether it is complete: no file of it was left out.
    is_whole: bool

    @property
    def digest(self) -> str:
        rows = (f"{path}\0{each.is_executable}\0{each.digest}\n"
                for path, each in sorted(self.files.items()))
        return digest("".join(rows).encode())


class Found(NamedTuple):
    """The skills of a folder by name, and the reasons for what was left out, by path."""

    skills: dict[str, Skill]
    left_out: dict[str, str]
    #: Whether an interrupted run has left drafts.
    has_drafts: bool = False


#: A function of the path, the content, and whether it is executable.
Write = Callable[[str, bytes, bool], None]


def entry_rejection(member: Member) -> str:
    """Return why an entry cannot be part of a skill, empty if it can."""
    parts = member.path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "a path that leads outside"
    if not member.path.isprintable() or any(len(part.encode()) > 255 for part in parts):
        return "an invalid file name"
    if len(parts) > _MAX_ABOVE + _MAX_INSIDE + 1 or len(member.path) > _MAX_PATH_CHARS:
        return "too deep"
    if member.kind not in ("file", "folder"):
        return member.kind
    return "larger than 1 MB" if member.size > _MAX_SKILL_FILE_BYTES else ""


def path_conflict(path: str, files: Mapping[str, File], spellings: dict[str, str]) -> str:
    """Return why a path conflicts with an earlier one, empty if it does not. `spellings` maps the
    earlier paths by their folded case."""
    for each in (*parents(path), path):
        if each in files:
            return "there twice"
        if spellings.setdefault(each.casefold(), each) != each:
            return "a name that differs from another only in case"
    return ""


def parents(path: str) -> Iterator[str]:
    """Yield the folders of a path, the outermost first."""
    for match in re.finditer("/", path):
        yield path[:match.start()]


def collect(root: Root, members: Iterator[Member], write: Write | None) -> Found:
    """Return the skills among a folder's entries. Raises Problem if there are too many entries."""
    files, left_out, spellings, size = dict[str, File](), dict[str, str](), dict[str, str](), 0
    has_drafts = False
    for number, member in enumerate(members):
        if number >= _MAX_ENTRIES or size > _MAX_ROOT_BYTES:
            raise failed(f"{root.path} has more than {_MAX_ENTRIES} entries, or too large ones")
        first = member.path.partition("/")[0]
        has_drafts = has_drafts or first in (_NEW, _OLD)
        if first == _NEW:
            continue
        reason = entry_rejection(member) or path_conflict(member.path, files, spellings)
        content = b"" if reason or not member.file else member.file.read(_MAX_SKILL_FILE_BYTES + 1)
        if len(content) > _MAX_SKILL_FILE_BYTES:
            reason = "larger than 1 MB"
        if reason:
            left_out[clean(member.path)[:_MAX_PATH_CHARS]] = reason
        elif member.file:
            size += len(content)
            files[member.path] = File(member.is_executable, len(content), digest(content))
            if write:
                write(member.path, content, member.is_executable)
    return Found(group_skills(root, files, left_out), left_out, has_drafts)


def group_skills(
    root: Root, files: Mapping[str, File], left_out: dict[str, str]
) -> dict[str, Skill]:
    """Group files into skills, each a folder with a SKILL.md and everything below it. Rejected
    skills are added to `left_out`."""
    homes = {path.rpartition("/")[0] for path in files if path.endswith("/SKILL.md")}
    contents: dict[str, dict[str, File]] = {}
    for path, file in files.items():
        home = next((each for each in parents(path) if each in homes), "")
        if home and not re.search(r"(?:^|/)(?:\.(?!ocp-old/)|node_modules/)", home):
            contents.setdefault(home, {})[path[len(home) + 1:]] = file
    skills: dict[str, Skill] = {}
    # A skill that an interrupted run has set aside counts if no other has its name.
    for home in sorted(contents, key=lambda each: (each.startswith(_OLD), each.count("/"), each)):
        name, inside = home.rpartition("/")[2], contents[home]
        if home.startswith(_OLD) and name in skills:
            continue
        reason = skill_rejection(root, home, inside, skills)
        if reason:
            left_out[home] = reason
        else:
            is_whole = not any(path.startswith(f"{home}/") for path in left_out)
            skills[name] = Skill(name, root, home, inside, is_whole)
    if not root.max_above:
        # Every folder in a tenant's folder of skills is meant to be a skill.
        firsts = {path.partition("/")[0] for path in (*contents, *left_out)}
        others = (path.partition("/")[0] for path in files if "/" in path)
        left_out.update({each: "no SKILL.md" for each in others
                         if each not in firsts and not each.startswith(".")})
    return skills


def skill_rejection(
    root: Root, home: str, inside: Mapping[str, File], skills: Mapping[str, Skill]
) -> str:
    """Return why a folder with a SKILL.md is not accepted, empty if it is."""
    name = home.rpartition("/")[2]
    if not _FOLDER_NAME.fullmatch(name):
        return "not a valid folder name"
    if name.casefold() in map(str.casefold, skills):
        return "another skill has its name"
    if home.removeprefix(f"{_OLD}/").count("/") > root.max_above:
        return "too deep"
    if any(path.count("/") >= _MAX_INSIDE for path in inside):
        return "its folders are nested too deep"
    if len(inside) > _MAX_SKILL_FILES or sum(e.size for e in inside.values()) > _MAX_SKILL_BYTES:
        return f"more than {_MAX_SKILL_FILES} files or 10 MB"
    return f"more than {_MAX_SKILLS} skills" if len(skills) >= _MAX_SKILLS else ""


def copy_skills(skills: Sequence[Skill], write: Write) -> None:
    """Pass every file of skills to `write`, with the skill's name before its path. Raises Problem
    if a skill has changed since it was read."""
    for root in {skill.root.path: skill.root for skill in skills}.values():
        wanted = {skill.home: skill for skill in skills if skill.root.path == root.path}

        def write_wanted(
            path: str, content: bytes, is_executable: bool, wanted: Mapping[str, Skill] = wanted
        ) -> None:
            home = next((each for each in parents(path) if each in wanted), None)
            if home is not None:
                write(f"{wanted[home].name}{path[len(home):]}", content, is_executable)

        now = root.read(write_wanted).skills
        for skill in wanted.values():
            if skill.name not in now or now[skill.name].digest != skill.digest:
                raise failed(f"{skill.name} was changed just now: run this again")


def swap_in(
    skills: Sequence[Skill], held: Mapping[str, Skill], fill: Callable[[], None],
    move: Callable[[str, str], None], clear: Callable[[], None],
) -> None:
    """Replace the skills in `held` by those of the same name: `fill` writes the drafts, `move`
    renames below the folder, `clear` removes the drafts and the skills set aside."""
    for skill in held.values():
        # First put back what an interrupted run has set aside.
        if skill.home != home_for(skill, held):
            move(skill.home, home_for(skill, held))
    clear()
    if not skills:
        return
    fill()
    for skill in skills:
        home = home_for(skill, held)
        if skill.name in held:
            move(home, f"{_OLD}/{home}")
        move(f"{_NEW}/{skill.name}", home)
    clear()


def home_for(skill: Skill, held: Mapping[str, Skill]) -> str:
    """Return the path for a skill below a folder that has the skills `held`."""
    return held[skill.name].home.removeprefix(f"{_OLD}/") if skill.name in held else skill.name


def _put_skills(at: int, skills: Sequence[Skill], held: Mapping[str, Skill]) -> None:
    """Root.put for an open folder. Raises Problem, OSError."""
    def fill() -> None:
        with opened_folder(at, _NEW, makes=True) as new:
            copy_skills(skills, functools.partial(write_below, new))

    def clear() -> None:
        remove_below(at, _NEW)
        remove_below(at, _OLD)

    swap_in(skills, held, fill, functools.partial(move_below, at), clear)


def _put_contained_skills(
    root: Root, container: Container, skills: Sequence[Skill], held: Mapping[str, Skill]
) -> None:
    """Root.put for a container. In a stopped one nothing can be renamed, so new skills are written
    directly in place. Raises Problem."""
    path = root.path

    def fill(above: str = f"{_NEW}/") -> None:
        container.put_tar(path, tar_of_skills(skills, container.uid, above))

    def move(source: str, target: str) -> None:
        if target.startswith(_OLD):
            container.change(path, "mkdir", "-p", "--", os.path.dirname(f"{path}/{target}"))
        container.move(f"{path}/{source}", f"{path}/{target}")

    def clear() -> None:
        container.change(path, "rm", "-rf", "--", f"{path}/{_NEW}", f"{path}/{_OLD}")

    if container.is_running:
        container.change(path, "mkdir", "-p", "--", path)
        swap_in(skills, held, fill, move, clear)
    elif skills:
        fill("")


def tar_of_skills(skills: Sequence[Skill], uid: int, above: str) -> bytes:
    """Return a tar of skills, owned by user `uid`, with `above` before each path. Raises
    Problem."""
    def fill(tar: tarfile.TarFile) -> None:
        made = set[str]()

        def write(path: str, content: bytes, is_executable: bool) -> None:
            for each in parents(above + path):
                if each not in made:
                    made.add(each)
                    add_to_tar(tar, each, HeldFile(b"", uid, uid, 0o700), is_folder=True)
            mode = 0o700 if is_executable else 0o600
            add_to_tar(tar, above + path, HeldFile(content, uid, uid, mode))

        copy_skills(skills, write)

    return tar_of(fill)


# -- both sides ---------------------------------------------------------------


class Sides(NamedTuple):
    """The skills of a tenant, and those of its instance."""

    folder: Folder
    own: Root
    #: The instance's folder that skills are pushed to.
    target: Root
    here: Found
    there: Found
    #: The skills that were the same on both sides at the last sync, by name: {"digest", "bundled"}.
    record: Mapping[str, Mapping[str, Json]]


def skill_roots(world: World, instance: Instance, with_bundled: bool = False) -> list[Root]:
    """Return an instance's folders of skills, in the order of their precedence. Raises Problem."""
    state, container = instance.state_dir, instance.container
    home = os.path.dirname(state) if container else world.home
    named = as_dict(as_dict(instance.config(world).get("agents")).get("defaults")).get("workspace")
    workspace = str(named or f"{state}/workspace").rstrip("/")
    workspace = home + workspace[1:] if workspace.startswith("~/") else workspace
    if not is_usable_path(workspace):
        raise failed(f"its workspace {clean(workspace)[:80]} is not an absolute, normal path")
    # Only the instance with the default state folder uses the user's skills.
    personal = [f"{home}/.agents"] * (state == f"{home}/.openclaw")
    roots = [Root(base, ("skills",), container)
             for base in (workspace, f"{workspace}/.agents", *personal, state)]
    program = shutil.which("openclaw", path=world.environ.get("PATH", os.defpath))
    bundled = _BUNDLED if container else os.path.dirname(os.path.realpath(program or "/openclaw"))
    return roots + [Root(bundled, ("skills",), container, is_bundled=True)] * with_bundled


def skills_there(roots: Sequence[Root]) -> Found:
    """Return the skills of an instance; of two with one name the first counts. Raises Problem."""
    found = roots[0].read()
    for more in [root.read() for root in roots[1:]]:
        found.skills.update({**more.skills, **found.skills})
        found.left_out.update(more.left_out)
    return found


def tenant_root(folder: Folder) -> Root:
    """Return the folder of a tenant's skills, which the server reads."""
    return Root(folder.world.tenants_folder, (folder.name, "skills"), max_above=0)


def both_sides(folder: Folder, instance: Instance, with_bundled: bool) -> Sides:
    """Return the skills of a tenant and those of its instance. Raises Problem."""
    roots, own = skill_roots(folder.world, instance, with_bundled), tenant_root(folder)
    return Sides(folder, own, roots[0], own.read(), skills_there(roots), sync_record(folder))


def sync_record(folder: Folder) -> dict[str, Json]:
    """Return the skills that were the same at the last sync, by name. Raises Problem."""
    with contextlib.suppress(ValueError):
        rows = as_dict(as_dict(json.loads(folder.read("sync.json") or b"{}")).get("skills"))
        return {name: as_dict(row) for name, row in rows.items()}
    return {}


def write_record(folder: Folder, record: Mapping[str, Json]) -> None:
    """Save the record of a sync, if it has changed. Raises Problem."""
    if record != sync_record(folder):
        folder.write(json.dumps({"skills": record}, indent=1).encode(), "sync.json")


#: The action for each state of a skill under `bisync`, `pull` and `push`. "!" marks an action that
#: needs --overwrite.
DIRECTIONS = ("bisync", "pull", "push")
STATES: Mapping[str, tuple[str, str, str]] = {
    "the same": ("", "", ""),
    "new there": ("pull", "pull", ""),
    "new here": ("push", "", "push"),
    "changed there": ("", "pull", "push!"),
    "changed here": ("", "pull!", "push"),
    "changed on both sides": ("", "pull!", "push!"),
    "gone there": ("", "", "push!"),
    "gone here": ("", "pull!", ""),
}


def state_of(here: str, there: str, known: str) -> str:
    """Return the state of a skill from its digests here, there, and at the last sync. An empty
    digest means no skill."""
    if here == there:
        return "the same"
    if not here or not there:
        word = "gone" if known else "new"
        return f"{word} {'here' if bool(here) != bool(known) else 'there'}"
    changes = {here: "changed there", there: "changed here"}
    return changes.get(known, "changed on both sides")


class Step(NamedTuple):
    """One skill on both sides, and the planned action."""

    name: str
    state: str
    here: Skill | None
    there: Skill | None
    #: "pull", "push", or empty for nothing.
    action: str
    #: Why a difference is left, empty if it is not.
    reason: str

    @property
    def changed_files(self) -> int:
        """Return how many files differ."""
        here, there = (set(each.files.items()) if each else set()
                       for each in (self.here, self.there))
        return len({path for path, _ in here ^ there})


def steps_of(sides: Sides, direction: str, overwrites: bool) -> list[Step]:
    """Return the steps of a sync, in the order of the skills' names."""
    steps = []
    for name in sorted({*sides.here.skills, *sides.there.skills}):
        here, there = sides.here.skills.get(name), sides.there.skills.get(name)
        known = sides.record.get(name, {})
        if known.get("bundled") and not there:
            continue
        state = state_of(here.digest if here else "", there.digest if there else "",
                         str(known.get("digest") or ""))
        cells = dict(zip(DIRECTIONS, STATES[state]))
        action, asks = cells[direction].rstrip("!"), cells[direction].endswith("!")
        if not action or asks and not overwrites:
            action = ""
            reason = " or ".join(cells[each].replace("!", " --overwrite")
                                 for each in ("pull", "push") if cells[each])
        else:
            reason = blocked_reason(sides, name, action)
        steps.append(Step(name, state, here, there, "" if reason else action, reason))
    return steps


def blocked_reason(sides: Sides, name: str, action: str) -> str:
    """Return why a skill cannot be pulled or pushed, empty if it can."""
    found = sides.here if action == "pull" else sides.there
    held = found.skills.get(name)
    if action == "push" and held and held.root.is_bundled:
        return "it comes with OpenClaw"
    if held is None and name.casefold() in (
            path.partition("/")[0].casefold() for path in (*found.skills, *found.left_out)):
        return "something else has its name there" if action == "push" else (
            "something else has its name here")
    if held and not held.is_whole:
        return "it would replace a skill of which a part was left out"
    if action == "push" and held and sides.target.container and (
            not sides.target.container.is_running):
        return "a skill in a stopped container cannot be replaced: start it"
    return ""


def back_up(folder: Folder, skills: Sequence[Skill]) -> str:
    """Copy skills into the tenant's backup/, and return the path of the copy. Raises Problem."""
    stamp = stamp_of(folder.world.clock())
    with folder.opened("backup", makes=True) as at:
        taken = set(os.listdir(at))
        names = (f"{stamp}-{number}" if number else stamp for number in range(len(taken) + 1))
        name = next(each for each in names if each not in taken)
        with opened_folder(at, name, makes=True) as kept:
            copy_skills(skills, functools.partial(write_below, kept))
    return folder.inside("backup", name)


def copy_both_ways(sides: Sides, steps: Sequence[Step]) -> str:
    """Carry out the steps of a sync. Return the path of the backup of replaced skills, empty if
    none was replaced. Raises Problem."""
    pulls = [each.there for each in steps if each.action == "pull" and each.there]
    pushes = [each.here for each in steps if each.action == "push" and each.here]
    held = {name: skill for name, skill in sides.there.skills.items()
            if skill.root.path == sides.target.path}
    replaced = [own[each.name] for skills, own in ((pulls, sides.here.skills), (pushes, held))
                for each in skills if each.name in own]
    kept = back_up(sides.folder, replaced) if replaced else ""
    if pulls or sides.here.has_drafts:
        sides.own.put(pulls, sides.here.skills)
    if pushes or sides.there.has_drafts:
        sides.target.put(pushes, held)
    names = {each.name for each in steps}
    record = {name: row for name, row in sides.record.items()
              if name in names or row.get("bundled")}
    for each in steps:
        source = each.here if each.action == "push" else each.there
        if source and (each.action or each.state == "the same"):
            record[each.name] = {
                "digest": source.digest,
                "bundled": bool(each.there and each.there.root.is_bundled)}
    write_record(sides.folder, record)
    return kept


def clean_skills(
    folder: Folder, overwrites: bool, is_dry: bool
) -> tuple[list[str], list[str], str]:
    """Move the skills that a sync has copied from a tenant's folder to backup/. Returns their
    names, the names of those that stay (changed since or incomplete), and the path of the backup.
    Raises Problem."""
    own, record = tenant_root(folder), sync_record(folder)
    skills = own.read().skills
    known = [skills[name] for name in sorted(skills) if name in record]
    gone = [each for each in known if each.is_whole and (
        overwrites or each.digest == record[each.name].get("digest"))]
    kept = folder.inside("backup")
    if gone and not is_dry:
        kept = back_up(folder, gone)
        with folder.opened("skills") as at:
            _put_skills(at, (), skills)
            for each in gone:
                remove_below(at, each.name)
        write_record(folder, {name: row for name, row in record.items()
                              if name not in {each.name for each in gone}})
    return [each.name for each in gone], [each.name for each in known if each not in gone], kept


# ==== 8. Import ==============================================================
# The config.yaml of cc-gateway. The reader supports the YAML that js-yaml writes for such a file,
# and rejects all other YAML with the line number.


_YAML_QUOTED = r'"(?:[^"\\]|\\.)*"|\'(?:[^\']|\'\')*\''
_YAML_KEY = re.compile(rf'({_YAML_QUOTED}|[^\s\'"#&*!|>%@`{{}}\[\],?:<-][^#]*?)\s*:(?: +(.*)|$)')
_YAML_ESCAPES = {
    "0": "\0", "a": "\a", "b": "\b", "t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r",
    "e": "\x1b", " ": " ", '"': '"', "/": "/", "\\": "\\", "N": "\x85", "_": "\xa0",
    "L": "\u2028", "P": "\u2029"}
#: Patterns that an unquoted scalar may not match, with the reason.
_YAML_REFUSED = (
    (r"[\"'].*", "a quoted string that does not end on its line"),
    (r"[&*!].*", "an anchor, an alias or a tag"),
    (r"[\[{].*", "a list or a mapping on one line"),
    (r"[%@`,\]}|>].*|[?-](?: .*)?|:(?: .*)?|.*: .*|.*:", "not a plain string: put it into quotes"),
    (r"(?i:[-+]?\.(?:inf|nan))|\d{4}-\d\d?-\d\d?(?:[Tt ].*)?", "not a string: put it into quotes"))
_YAML_WORDS: Mapping[str, bool | None] = {
    "~": None, "null": None, "Null": None, "NULL": None, "true": True, "True": True, "TRUE": True,
    "false": False, "False": False, "FALSE": False}


#: How many lists and mappings may be in one another, and how long a number may be; what is longer
#: is a text.
_YAML_DEPTH, _YAML_NUMBER_CHARS = 50, 400


class YamlReader:
    """A reader of YAML with mappings, lists, and strings on one line or in a block."""

    def __init__(self, text: str) -> None:
        self._lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
        if not self._lines[-1]:
            self._lines.pop()
        self._at = self._depth = 0

    def _fault(self, reason: str) -> Problem:
        return failed(f"line {self._at + 1}: {reason}")

    def _next(self) -> tuple[int, str]:
        """Return the indent and the text of the next line with content; -1 at the end."""
        while self._at < len(self._lines):
            line = self._lines[self._at]
            text = line.strip(" ")
            if text and text[0] != "#" and not (text == "---" and not self._at):
                if text[0] == "\t":
                    raise self._fault("a tab before the text")
                return len(line) - len(line.lstrip(" ")), text
            self._at += 1
        return -1, ""

    def document(self) -> Json:
        """Return the value of the document. Raises Problem with the line."""
        value = self._block(self._next()[0])
        if self._next()[0] >= 0:
            raise self._fault("it does not belong to the lines above it")
        return value

    def _block(self, indent: int) -> Json:
        if self._depth >= _YAML_DEPTH:
            raise self._fault("nested too deeply")
        self._depth += 1
        value = self._list(indent) if _is_item(self._next()[1]) else self._mapping(indent)
        self._depth -= 1
        return value

    def _mapping(self, indent: int) -> dict[str, Json]:
        found: dict[str, Json] = {}
        while True:
            at, text = self._next()
            if at > indent:
                raise self._fault("indented deeper than the lines above it")
            if at < indent or _is_item(text):
                return found
            match = _YAML_KEY.fullmatch(text)
            if match is None:
                raise self._fault("expected a name and a colon")
            key = str(self._scalar(match[1])) if match[1][0] in "\"'" else match[1]
            if key in found:
                raise self._fault(f"{clean(key)[:80]} is there twice")
            found[key] = self._value(match[2] or "", indent, False)

    def _list(self, indent: int) -> list[Json]:
        found: list[Json] = []
        while True:
            at, text = self._next()
            if at > indent:
                raise self._fault("indented deeper than the lines above it")
            if at < indent or not _is_item(text):
                return found
            rest = text[1:].lstrip(" ")
            if _is_item(rest) or _YAML_KEY.fullmatch(rest):
                inner = indent + len(text) - len(rest)
                self._lines[self._at] = " " * inner + rest
                found.append(self._block(inner))
            else:
                found.append(self._value(rest, indent, True))

    def _value(self, rest: str, indent: int, in_list: bool) -> Json:
        """Return the value after a name or a hyphen, on its line or below it."""
        if rest[:1] in ("|", ">"):
            return self._text(rest, indent)
        value = self._scalar(rest) if rest and rest[0] != "#" else None
        self._at += 1
        if rest and rest[0] != "#":
            return value
        at, text = self._next()
        is_below = at > indent or at == indent and _is_item(text) and not in_list
        return self._block(at) if is_below else None

    def _scalar(self, rest: str) -> Json:
        quoted = re.fullmatch(rf"({_YAML_QUOTED})\s*(?:\s#.*)?", rest)
        if quoted and rest[0] == "'":
            return quoted[1][1:-1].replace("''", "'")
        if quoted:
            return re.sub(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)",
                          self._escaped, quoted[1][1:-1])
        text = re.split(r"\s+#", rest)[0].rstrip()
        if text in ("[]", "{}"):
            return [] if text == "[]" else {}
        for pattern, reason in _YAML_REFUSED:
            if re.fullmatch(pattern, text):
                raise self._fault(reason)
        return _plain(text)

    def _escaped(self, match: re.Match[str]) -> str:
        word = match[1]
        if len(word) == 1 and word not in _YAML_ESCAPES or int(word[1:] or "0", 16) > 0x10ffff:
            raise self._fault(f"\\{clean(word)} is an unknown escape")
        return chr(int(word[1:], 16)) if len(word) > 1 else _YAML_ESCAPES[word]

    def _text(self, header: str, indent: int) -> str:
        """Return the text of a block scalar (| or >)."""
        match = re.fullmatch(r"([|>])(?:([1-9])([-+]?)|([-+]?)([1-9]?))(?: +#.*)?", header)
        if match is None:
            raise self._fault("an invalid start of a block of text")
        digit, chomp = match[2] or match[5], match[3] or match[4]
        depth, lines = indent + int(digit) if digit else 0, []
        self._at += 1
        while self._at < len(self._lines):
            line = self._lines[self._at]
            own = len(line) - len(line.lstrip(" "))
            depth = depth or (own if line.strip(" ") else 0)
            if line.strip(" ") and own < max(depth, indent + 1):
                break
            lines.append(line[depth:] if depth else "")
            self._at += 1
        return _joined(lines, chomp or "", match[1] == ">")


def _is_item(text: str) -> bool:
    return text == "-" or text.startswith("- ")


def _plain(text: str) -> Json:
    """Return the value of an unquoted scalar by the rules of YAML 1.2."""
    if text in _YAML_WORDS:
        return _YAML_WORDS[text]
    if len(text) > _YAML_NUMBER_CHARS:
        return text
    if re.fullmatch(r"[-+]?(?:0b[01]+|0o[0-7]+|0x[0-9a-fA-F]+)", text):
        return int(text, 0)
    if not re.fullmatch(r"(?:[-+]?[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", text):
        return text
    return float(text) if re.search(r"[.eE]", text) else int(text)


def _joined(lines: Sequence[str], chomp: str, is_folded: bool) -> str:
    """Return the text of a block's lines. Folding joins lines by a space, except around empty and
    deeper lines."""
    text, empty, has_text, is_deeper = "", 0, False, False
    for line in lines:
        if not line:
            empty += 1
            continue
        breaks = empty + has_text
        if is_folded and line[0] not in " \t":
            breaks = empty + 1 if is_deeper else empty
            text += " " if has_text and not breaks else ""
        is_deeper = line[0] in " \t"
        text += "\n" * breaks + line
        empty, has_text = 0, True
    ends = {"": int(has_text), "-": 0, "+": empty + has_text}
    return text + "\n" * ends[chomp]


# -- cc-gateway ---------------------------------------------------------------


class Imported(NamedTuple):
    """A tenant of cc-gateway, in OCP's terms."""

    name: str
    #: Its name in cc-gateway.
    origin: str
    #: Its key, empty if it needs a new one.
    secret: str
    env: Mapping[str, str]
    instance: Instance | None
    #: Messages for the user.
    notes: tuple[str, ...]


#: Settings of cc-gateway with a counterpart in OCP, and the factor between their units.
_SETTINGS = (("cli", "max_concurrent", "maxConcurrent", 1), ("cli", "timeout", "timeout", 1),
             ("session", "ttl", "sessionTTL", 1000))
#: Other settings of the file, and what to do about them; empty for nothing.
_SETTING_ADVICE: Mapping[str, str] = {
    "server.host": "CLAUDE_BIND is the address that OCP listens on",
    "server.docker_host_ip": "`ocp tenants setup` finds it; --url names it",
    "cli.bin": "CLAUDE_BIN names another claude",
    "cli.skill_file": "`ocp tenants edit NAME --prompt FILE` takes such a text",
    "server.port": "", "cli.effort": "", "cli.max_per_tenant": "", "session.cleanup_interval": "",
    "skills.sync": "", "skills.dir": ""}
DIFFERENCES = (
    "OpenClaw's own tools reach the model and run where OpenClaw runs; claude uses none here.",
    "A model that is not known is an error (404), and not sonnet.",
    "Every request needs a key.")


def read_gateway(path: str) -> dict[str, Json]:
    """Return the content of a config.yaml. Raises Problem with the line and commands to type
    instead."""
    held = read_local_file(path)
    if held is None:
        raise failed(f"There is no file {clean(path)}.")
    try:
        config = YamlReader(held.content.decode()).document()
        rows = as_dict(config).get("tenants")
        if not isinstance(rows, list) or not all(
                isinstance(as_dict(row).get("name"), str) for row in rows):
            raise failed("it has no list `tenants` in which each entry has a name")
        return as_dict(config)
    except (Problem, UnicodeDecodeError) as problem:
        reason = problem if isinstance(problem, Problem) else "it is not UTF-8"
        raise failed(
            f"{clean(path)}: {reason}.\nSimplify that line, or make each tenant by hand:"
            "\n  ocp tenants add NAME --secret-stdin < FILE-WITH-ITS-KEY\n"
            "  ocp tenants env NAME --set VARIABLE < FILE-WITH-ITS-VALUE") from None


def env_text(value: Json) -> str | None:
    """Return a string, number or boolean of the file as the value of a variable, else None."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e21 else repr(value)
    return str(value) if isinstance(value, (str, int)) else None


def imported(row: Mapping[str, Json], found: Sequence[Instance]) -> Imported:
    """Return a tenant of a config.yaml, with its instance among those found here."""
    origin = str(row["name"])
    name, notes = fitted_name(origin), []
    if name != origin:
        notes.append(f"its name was {clean(origin)[:80]}")
    secret = str(row.get("api_key") or "")
    if not SECRET.fullmatch(secret):
        secret = ""
        notes.append("its key is not 32 to 128 letters, digits, - and _: `ocp tenants apply "
                     f"{name}` gives its instance a new one")
    env, values = as_dict(row.get("env")), dict[str, str]()
    for each, value in [*env.items(), *as_dict(env.get("vars")).items()]:
        text = env_text(value)
        if text is not None and not variable_rejection(each):
            values[each] = text
        elif each not in ("vars", "shellEnv"):
            notes.append(f"the variable {clean(each)[:80]} is left out")
    working = str(row.get("working_dir") or "")
    # cc-gateway named the compose project `openclaw` dc.
    known = ("openclaw", "dc") if origin == "dc" else (name,)
    instance = next((each for each in found if each.name in known and not each.doubt), None)
    if working and is_state_folder(working):
        instance = folder_instance(os.path.realpath(working), name)
    elif working:
        notes.append(f"its working_dir {clean(working)[:200]} is not an OpenClaw state folder")
    unknown = set(row) - {"name", "api_key", "env", "working_dir"}
    notes += [f"{clean(each)[:80]} is an unknown field" for each in sorted(unknown)]
    return Imported(name, origin, secret, values, instance, tuple(notes))


def doubled(tenant: Imported, others: Sequence[Imported]) -> str:
    """Return what a tenant has in common with an earlier one, empty if nothing."""
    if tenant.name in [each.name for each in others]:
        return "two tenants have this name"
    where = tenant.instance and tenant.instance.where
    return f"two tenants have the instance {where}" if where and where in [
        each.instance.where for each in others if each.instance] else ""


#: One step of an import: its description, and the function that does it.
ImportStep = tuple[str, Callable[[], object]]


def import_steps(
    job: Job, tenant: Imported, key: Mapping[str, Json], skills: str
) -> list[ImportStep]:
    """Return the steps that a tenant still needs. `key` holds fields for a new key, `skills` is
    cc-gateway's folder of skills. Raises Problem for a tenant that must not be changed."""
    name, folder, steps = tenant.name, job.folder(tenant.name), list[ImportStep]()
    secret = tenant.secret or folder.secret() or new_secret()
    if name in job.keys and not is_secret_of(job.server, secret, name):
        raise failed(f"there is a key {name} already, with another secret")
    refuse_foreign(job, name)
    if tenant.instance:
        refuse_taken(job, name, tenant.instance)
    word = "its key" if tenant.secret else "a new key"
    body = {**key, "name": name, "secret": secret}
    if name not in job.keys:
        steps += [(word, lambda: (
            folder.write_secret(secret), job.server.ask("POST", "/api/keys", body)))]
    elif folder.secret() != secret:
        steps += [(word, lambda: folder.write_secret(secret))]
    place = tenant.instance and tenant.instance.place
    if name not in job.tenants:
        profile = {"level": job.options.level or LEVELS[0], "instance": place, "adopt": True}
        steps += [("tenant", lambda: job.server.tenant(name, "PUT", profile))]
    if place and not folder.place():
        steps += [(f"its instance is {place['where']}", lambda: folder.write_place(place))]
    known = job.tenants.get(name, {}).get("env") or []
    env = {each: value for each, value in tenant.env.items() if each not in known}
    if env:
        steps += [(counted(len(env), "variable"), lambda: job.server.tenant(
            name, "PATCH", env, "/env"))]
    return steps + missing_skills(folder, tenant.origin, skills)


def missing_skills(folder: Folder, origin: str, skills: str) -> list[ImportStep]:
    """Return the step that copies the skills a tenant does not have. Raises Problem."""
    if not skills or not _FOLDER_NAME.fullmatch(origin):
        return []
    source, own = Root(skills, (origin,), max_above=0), tenant_root(folder)
    here, there = own.read().skills, source.read().skills
    names = {name.casefold() for name in here}
    new = [skill for name, skill in there.items() if name.casefold() not in names]
    return [(counted(len(new), "skill"), lambda: own.put(new, here))] if new else []


def import_advice(job: Job, config: Mapping[str, Json]) -> list[str]:
    """Return what the user has to do for the settings of a config.yaml."""
    lines, rows = [], as_dict(job.server.ask("GET", "/settings"))
    for section, there, here, factor in _SETTINGS:
        value, row = as_dict(config.get(section)).get(there), as_dict(rows.get(here))
        if type(value) is int and isinstance(row.get("max"), int):
            value = max(row["min"], min(row["max"], value * factor))
            lines += [f"ocp settings {here} {value}"] * (value != row.get("value"))
    port = as_dict(config.get("server")).get("port", 3456)
    if port != port_of(job.server.url):
        lines.append("stop cc-gateway, and start this server on its port: "
                     f"CLAUDE_PROXY_PORT={clean(port)[:80]}")
    for section, fields in config.items():
        for each in as_dict(fields) if section != "tenants" else ():
            name = f"{section}.{each}"
            word = _SETTING_ADVICE.get(name, "" if any(
                (section, each) == row[:2] for row in _SETTINGS) else "OCP has no such setting")
            lines += [f"{clean(name)[:80]}: {word}"] * (bool(word) and fields[each] != "claude")
    return lines


# ==== 9. Command line ========================================================
# Arguments, output, main.


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str]) -> str:
    """Return rows as an aligned table; columns named in `numbers` are aligned to the right."""
    lines = [[clean(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  " + "  ".join(
        cell.rjust(width) if title in numbers else cell.ljust(width)
        for title, cell, width in zip(header, line, widths)).rstrip() for line in lines)


def age(at: Json, now_s: float) -> str:
    """Return how long ago a timestamp of the API was, "-" for none."""
    try:
        then_s = calendar.timegm(time.strptime(str(at)[:19], "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return "-"
    past_s = max(0, int(now_s - then_s))
    for unit, unit_s in (("d", 86_400), ("h", 3600), ("m", 60)):
        if past_s >= unit_s:
            return f"{past_s // unit_s}{unit} ago"
    return f"{past_s}s ago"


class Run(NamedTuple):
    """One invocation: the world and the arguments."""

    world: World
    args: argparse.Namespace

    def say(self, text: str) -> None:
        """Print text, except with --json."""
        if text and not self.args.json:
            self.world.say(text)

    def print_json(self, value: Json) -> None:
        """Print the run's JSON value with --json."""
        if self.args.json:
            self.world.say(json.dumps(value, indent=2))

    def would(self, name: str, *what: str) -> Exit:
        """Print what a command would do to one tenant, for --dry-run."""
        self.say(f"  {name}  {', '.join(what) or 'nothing to change'}")
        self.print_json({"name": name, "dryRun": True, "would": what})
        return Exit.OK

    def server(self) -> Server:
        return find_server(self.world, self.args.server or "")

    def job(self) -> Job:
        """Return the job of these arguments. Raises Problem."""
        args = vars(self.args)
        given = {name: args[name] for name in Options._fields if args.get(name)}
        return start_job(self.world, self.server(), Options(**given))

    def confirm(self, question: str) -> None:
        confirm(question, self.args.yes, self.world.stdin, self.world.stderr)


# -- instances ----------------------------------------------------------------


def cmd_discover(run: Run) -> Exit:
    """List the instances of this machine."""
    world = run.world
    found, port = discover(world), port_of(run.server().url)
    looks = [(each, summary_of(world, each, port)) for each in found.instances]
    rows = [[each.name + "?" * bool(each.doubt), each.kind, world.shown_path(each.where),
             each.state, look.leads_to, str(look.skills)] for each, look in looks]
    run.say(table(("Name", "Kind", "Where", "State", "Leads to", "Skills"), rows, ["Skills"])
            if rows else "No OpenClaw was found here.")
    for each, look in looks:
        for reason in filter(None, (each.doubt, look.problem)):
            run.say(f"  {each.name}: {clean(reason)}")
    run.say(found.docker_error and f"Containers are not listed: {found.docker_error}")
    run.print_json({
        "docker": {"found": not found.docker_error, "error": found.docker_error},
        "instances": [{
            "name": each.name, "kind": each.kind, "where": each.where, "state": each.state,
            "leadsTo": look.leads_to, "skills": look.skills, "doubt": each.doubt,
            "problem": look.problem} for each, look in looks]})
    return Exit.OK


def level_of(row: Mapping[str, Json]) -> str:
    """Return the level in force for a tenant, and the level that was set if it is higher."""
    level = str(row.get("level"))
    in_force = str(row.get("levelInForce") or level)
    return in_force if in_force == level else f"{in_force} (set: {level})"


def level_notes(rows: Iterable[Mapping[str, Json]]) -> list[str]:
    """Return one line of advice for each tenant whose level is above the server's."""
    return [f"{row['name']} works at level {level_of(row)}: set OCP_TENANT_LEVEL={row['level']} "
            "for the server and restart it"
            for row in rows if row.get("levelInForce") not in (None, row.get("level"))]


def instances_of(run: Run, job: Job, only_tenants: bool) -> tuple[list[Instance], list[Result]]:
    """Return the instances that the arguments name, and why those of other tenants are not found.
    Raises Problem."""
    world, names = run.world, run.args.names
    # A key that was renamed keeps the folder of its first name.
    keys = {job.folder(name).name: name for name in job.tenants}
    found = discover(world, {folder: job.place(name) for folder, name in keys.items()})
    instances = [each._replace(name=keys.get(each.name, each.name)) for each in found.instances]
    if only_tenants:
        for name in names:
            job.check_tenant(name)
        instances = [each for each in instances if each.name in job.tenants]
    elif found.docker_error and Docker(world).is_there:
        run.say(f"Containers are not touched: {found.docker_error}")
    lost = lost_instances(job, {each.name for each in instances}, found.docker_error)
    # What is gone for good is no matter of setup.
    lost = [each for each in lost if (not names or each.name in names) and (
        only_tenants or found.docker_error and each.place.get("kind") == "container")]
    wanted = [name for name in names if name not in [each.name for each in lost]]
    found = found._replace(instances=instances)
    return (choose(found, wanted) if wanted or not names else []), lost


def lost_instances(job: Job, found: set[str], docker_error: str) -> list[Result]:
    """Return what to say of tenants that have an instance which is not among those found."""
    lost = []
    for name in sorted(set(job.tenants) - found):
        place = job.place(name)
        is_hidden = docker_error and place.get("kind") == "container"
        reason = f"cannot be looked at: {docker_error}" if is_hidden else "was not found"
        if place.get("where"):
            lost.append(Result(name, place, problem=f"{clean(place['where'])} {reason}"))
    return lost


#: Said where no tenant has an instance on this machine.
NO_INSTANCE = "No tenant has an instance here: see `ocp tenants discover`."


def attempt(do: Callable[[], Value]) -> tuple[Value | None, str]:
    """Return the result of `do` and "", or None and why it failed, so that others go on."""
    try:
        return do(), ""
    except (Problem, OSError) as problem:
        return None, reason_of(problem)


class Result(NamedTuple):
    """The plan for one instance, and the outcome."""

    name: str
    #: Its location, as Instance.place.
    place: Mapping[str, Json]
    plan: Plan | None = None
    done: tuple[str, ...] = ()
    problem: str = ""
    #: The sync of its skills, None if they are left alone.
    skills: Synced | None = None

    def as_json(self) -> dict[str, Json]:
        plan = self.plan
        return {
            "name": self.name, "kind": self.place.get("kind"), "where": self.place.get("where"),
            "plan": plan.summary if plan else None, "url": plan.url if plan else None,
            "diff": list(plan.diff) if plan else [], "done": list(self.done),
            "problem": self.problem, "skills": self.skills and self.skills.as_json()}

    @property
    def is_empty(self) -> bool:
        """Return whether there is nothing to do."""
        return (self.plan is None or self.plan.is_empty) and not (
            self.skills and any(each.action for each in self.skills.steps))

    def words(self, with_diff: bool = False) -> str:
        """Return the planned changes as text, with the diff of openclaw.json for `with_diff`."""
        if not self.plan:
            return ""
        skills = self.skills.summary("to pull") if self.skills else ()
        diff = without_models(self.plan.diff) if with_diff else ()
        return "\n".join(["; ".join([self.plan.summary, *skills]), *diff])


def planned(job: Job, instance: Instance) -> Result:
    """Return the result with an instance's plan, or with the problem that prevents one."""
    plan, problem = attempt(lambda: plan_for(job, instance))
    return Result(instance.name, instance.place, plan, problem=problem)


def carried_out(job: Job, result: Result) -> Result:
    """Carry out a plan, and note a failure instead of raising it."""
    plan = result.plan
    if plan is None:
        return result
    done, problem = attempt(lambda: carry_out(job, plan))
    if done is None or not result.skills:
        return result._replace(done=tuple(done or ()), problem=problem)
    skills = carried(result.skills)
    pulled = skills.summary("pulled")
    said = [] if pulled and plan.is_empty else done
    return result._replace(skills=skills, done=(*said, *pulled))


def without_models(lines: Sequence[str]) -> list[str]:
    """Return the lines of a diff of openclaw.json, with only the ids of models."""
    shown: list[str] = []
    end = ""
    for line in lines:
        if not end or line.rstrip(",") == end or '"id": ' in line:
            shown.append(line)
        if line.endswith('"models": ['):
            end = line.replace('"models": [', "]")
        elif line.rstrip(",") == end:
            end = ""
    return shown


def shortened(line: str) -> str:
    """Return a line, cut if it is very long, as in a file that is all on one line."""
    return line if len(line) <= 200 else f"{line[:160]}... ({len(line)} characters)"


def show(run: Run, rows: Sequence[tuple[str, str, str]]) -> None:
    """Print rows of (name, problem, text), each with its problem if there is one, else its text."""
    width = max((len(name) for name, *_ in rows), default=0)
    for name, problem, text in rows:
        first, *more = (f"FAILED: {problem}" if problem else text).split("\n")
        run.say("\n".join([f"  {name:{width}}  {clean(first)}",
                           *(f"      {shortened(clean(line))}" for line in more)]))


def show_done(run: Run, results: Sequence[Result]) -> None:
    """Print what was done for each instance."""
    show(run, [(each.name, each.problem, ", ".join(each.done)) for each in results])


def cmd_setup(run: Run) -> Exit:
    """Set up instances as tenants, and pull their skills."""
    if run.args.skills:
        return _skills(run, "pull", _show_steps)
    return _set_up(run, only_tenants=False)


def cmd_apply(run: Run) -> Exit:
    """Write the server into the instances of tenants again."""
    return _set_up(run, only_tenants=True)


def _set_up(run: Run, only_tenants: bool) -> Exit:
    job, is_dry = run.job(), run.args.dry_run
    run.say(f"Server {job.server.url}, mode multi")
    found, lost = instances_of(run, job, only_tenants)
    results = [*(planned(job, each) for each in found), *lost]
    if not only_tenants and not run.args.no_skills:
        results = [each._replace(skills=each.plan and synced(job, each.plan.instance, "pull"))
                   for each in results]
    if not results:
        run.say(NO_INSTANCE if only_tenants else
                "No OpenClaw was found here: see `ocp tenants discover`.")
    show(run, [(each.name, each.problem, each.words(is_dry)) for each in results])
    if not is_dry and not all(each.is_empty for each in results):
        run.confirm("Do this?")
        results = [carried_out(job, each) for each in results]
        run.say("Done:")
        show_done(run, results)
        if run.args.level:
            names = [each.name for each in results]
            run.say("\n".join(level_notes(
                row for name, row in job.server.tenants().items() if name in names)))
    if not is_dry and results:
        run.say(_total(results))
    run.print_json({"server": job.server.url, "dryRun": is_dry,
                    "instances": [each.as_json() for each in results]})
    return Exit.FAILED if any(
        each.problem or each.skills and each.skills.problem for each in results) else Exit.OK


def _total(results: Sequence[Result]) -> str:
    """Return the outcome for all instances, in a sentence."""
    good = [each for each in results if each.plan and not each.problem]
    made = [each for each in good if each.plan and not each.plan.is_empty]
    parts = [f"{counted(len(made), 'tenant')} set up"] if made else []
    was, failures = len(good) - len(made), len(results) - len(good)
    if was:
        who = str(was) if made else counted(was, "tenant")
        parts.append(f"{who} {'was' if was == 1 else 'were'} set up before")
    parts += [f"{failures} failed"] if failures else []
    return ", ".join(parts) + "." + (" Undo: ocp tenants undo" if made else "")


def cmd_check(run: Run) -> Exit:
    """Report what each step of apply would do, and do none of it."""
    job = run.job()
    found, lost = instances_of(run, job, only_tenants=True)
    results = [*(planned(job, each) for each in found), *lost]
    show(run, [(each.name, each.problem, each.words()) for each in results])
    run.say("" if results else NO_INSTANCE)
    are_good = [each.plan is not None and each.plan.is_empty for each in results]
    run.print_json({"server": job.server.url, "instances": [
        {**each.as_json(), "ok": is_good} for each, is_good in zip(results, are_good)]})
    return Exit.OK if all(are_good) else Exit.FAILED


def cmd_undo(run: Run) -> Exit:
    """Restore the files of instances. Needs no server."""
    world, names = run.world, run.args.names
    known = [each for each in tenant_folders(world) if each.place()
             and (not names or each.name in names)]
    for name in set(names) - {each.name for each in known}:
        raise failed(f"There is nothing to undo for {clean(name)[:80]!r}.")
    if not known:
        run.say("There is nothing to undo.")
    results = [Result(each.name, each.place()) for each in known]
    show(run, [(each.name, "", world.shown_path(str(each.place.get("where")))) for each in results])
    if known and not run.args.dry_run:
        run.confirm("Restore these?")
        results = [undone(each) for each in known]
        show_done(run, results)
    run.print_json({"dryRun": run.args.dry_run, "instances": [
        each.as_json() for each in results]})
    return Exit.FAILED if any(each.problem for each in results) else Exit.OK


def undone(folder: Folder) -> Result:
    """Restore the files of a tenant's instance, and note a failure instead of raising it."""
    place = folder.place()
    done, problem = attempt(lambda: undo_changes(folder, instance_at(folder.world, folder)))
    return Result(folder.name, place, done=tuple(done or ()), problem=problem)


# -- tenants ------------------------------------------------------------------


def cmd_list(run: Run) -> Exit:
    """List the tenants."""
    world, job = run.world, run.job()
    rows = []
    for name, row in sorted(job.tenants.items()):
        where = str(job.folder(name).place().get("where") or "-")
        env, skills = row.get("env"), as_dict(row.get("skills")).get("count")
        waiting = f" (+{row['waiting']})" if row.get("waiting") else ""
        rows.append([
            name, level_of(row), world.shown_path(where),
            "own" if row.get("login") else "server",
            str(len(env) if isinstance(env, list) else 0), str(skills or 0),
            f"{row['running']}{waiting}" if row.get("running") or waiting else "-",
            age(row.get("lastUsed"), world.clock())])
    header = ("Name", "Level", "Where", "Login", "Env", "Skills", "Now", "Last used")
    run.say(table(header, rows, ["Env", "Skills"]) if rows else
            "There are no tenants: `ocp tenants setup` makes them.")
    run.print_json({"tenants": [
        {**row, "where": job.folder(name).place().get("where")}
        for name, row in sorted(job.tenants.items())]})
    return Exit.OK


def cmd_show(run: Run) -> Exit:
    """Show one tenant."""
    job, name = run.job(), _known(run)
    job.check_tenant(name)
    row = as_dict(job.server.tenant(name))
    place = job.folder(name).place()
    rows = [(label, clean(value)) for label, value in tenant_rows(run.world, row, place) if value]
    width = max(len(label) for label, _ in rows)
    run.say("\n".join([clean(name), *(f"  {label:{width}}  {value}" for label, value in rows)]))
    run.print_json({**row, "place": place or None})
    return Exit.OK


def tenant_rows(
    world: World, row: Mapping[str, Json], place: Mapping[str, Json]
) -> list[tuple[str, str]]:
    """Return the labels and values that `show` prints for a tenant; a value may be empty."""
    skills, env, own_tools = as_dict(row.get("skills")), row.get("env"), row.get("tools")
    login = as_dict(row.get("login"))
    skipped = f", {skills['skipped']} left out" if skills.get("skipped") else ""
    state = skills.get("count", 0) if skills.get("enabled", True) else "off"
    is_agent = row.get("level") == "agent" and isinstance(own_tools, list)
    confined = "in a sandbox" if row.get("sandbox", True) else "NOT confined"
    return [
        ("level", level_of(row)),
        ("instance", world.shown_path(str(place.get("where") or "none here"))),
        ("asks at", str(place.get("url") or as_dict(row.get("instance")).get("url") or "")),
        ("claude login", f"its own: {login.get('state')}" if login else "the server's"),
        ("variables", ", ".join(map(str, env)) if isinstance(env, list) and env else "none"),
        ("skills", f"{state}{skipped}"),
        ("prompt", counted(len(str(row["prompt"])), "character") if row.get("prompt") else ""),
        ("openclaw commands", str(row.get("commands")) if row.get("relay") else ""),
        ("claude's tools", f"{', '.join(map(str, own_tools or ()))}; {confined}" * is_agent),
        ("obstacle", str(row.get("obstacle") or "")),
        ("client's tools", "dropped" if row.get("clientTools") == "drop" else ""),
        ("at the same time", str(row.get("maxConcurrent") or "")),
        ("now", f"{row.get('running', 0)} running, {row.get('waiting', 0)} waiting"),
        ("last used", age(row.get("lastUsed"), world.clock())),
        ("folder", world.shown_path(str(row.get("folder") or ""))),
    ]


def _known(run: Run) -> str:
    """Return the NAME argument; any key name is accepted. Raises Problem."""
    name = str(run.args.name)
    if clean(name) != name or not 0 < len(name) <= 64:
        raise Problem(Exit.USAGE, f"{clean(name)[:80]!r} is not a valid key name.")
    return name


def cmd_add(run: Run) -> Exit:
    """Make a tenant, and print its key."""
    world, args, name = run.world, run.args, checked_name(run.args.name)
    args.secret = _given_secret(run) if args.secret_stdin else ""
    job = run.job()
    if name in job.tenants and not (args.apply and (args.container or args.local)):
        raise failed(f"There is a tenant {name} already: see `ocp tenants show {name}`.")
    if name in job.keys and name not in job.tenants and not args.existing:
        raise failed(f"There is a key {name} already: `ocp tenants add {name} --existing` makes it "
                     "a tenant.")
    instance = named_instance(world, name, args.container or "", args.local or "")
    if instance:
        refuse_taken(job, name, instance)
    if args.apply:
        instance = instance or choose(discover(world), [name])[0]
        result = planned(job, instance)
        if result.problem:
            raise failed(result.problem)
        show(run, [(name, "", result.words())])
        if not args.dry_run:
            run.confirm("Do this?")
            result = carried_out(job, result)
            show_done(run, [result])
        run.print_json(result.as_json())
        return Exit.FAILED if result.problem else Exit.OK
    refuse_foreign(job, name)
    if args.dry_run:
        return run.would(name, "its key" if name in job.keys else "new key",
                         f"level {args.level or LEVELS[0]}")
    return _added(run, job, name, instance)


def _given_secret(run: Run) -> str:
    """Return the key from standard input. Raises Problem."""
    secret = run.world.stdin.readline().strip()
    if not SECRET.fullmatch(secret):
        raise Problem(Exit.USAGE, "--secret-stdin takes a key of 32 to 128 letters, digits, - and "
                                  "_ from standard input.")
    return secret


def _added(run: Run, job: Job, name: str, instance: Instance | None) -> Exit:
    """Make a tenant, without changing an instance."""
    args, world, folder = run.args, run.world, job.folder(name)
    secret = args.secret or new_secret()
    if args.secret and name in job.keys:
        raise Problem(Exit.USAGE, f"There is a key {name} already, and it keeps its secret: leave "
                                  "out --secret-stdin.")
    if name not in job.keys:
        folder.write_secret(secret)
        job.server.ask("POST", "/api/keys", {"name": name, "secret": secret, "maxConcurrent": 1})
    place = instance and instance.place
    job.server.tenant(name, "PUT", {
        **profile_of(place or {}, args.level or LEVELS[0], args.commands or ""), "instance": place,
        "adopt": args.adopt or name not in job.keys})
    run.print_json({"name": name, "key": secret if name not in job.keys else None})
    if not args.json and name not in job.keys:
        world.say(secret)
        world.note(f"This is the key of {name}. It will not be shown again.")
    return Exit.OK


def cmd_edit(run: Run) -> Exit:
    """Change a tenant."""
    args, name, job = run.args, _known(run), run.job()
    body = profile_of(job.folder(name).place(), args.level or "", args.commands or "")
    if args.prompt is not None:
        try:
            # Windows begins a text with a byte order mark, which is none of it.
            with open(args.prompt, encoding="utf-8-sig") as file:
                body["prompt"] = file.read(200_000)
        except (OSError, ValueError) as error:
            raise failed(f"--prompt: {clean(args.prompt)} cannot be read: {error}") from None
    if args.no_prompt:
        body["prompt"] = ""
    if not body:
        raise Problem(Exit.USAGE, "Nothing to change: see `ocp tenants edit --help`.")
    job.check_tenant(name)
    if args.dry_run:
        return run.would(name, *body)
    answer = job.server.tenant(name, "PATCH", body)
    # The user did not name `relay`, so do not report it.
    run.say(f"{name}: {', '.join(each for each in body if each != 'relay')} changed")
    run.say("\n".join(level_notes([as_dict(answer)])))
    run.print_json(answer)
    return Exit.OK


def cmd_remove(run: Run) -> Exit:
    """Undo, revoke the key, and move the tenant's folder to .removed."""
    args, name, job = run.args, _known(run), run.job()
    job.check_tenant(name)
    folder = job.folder(name)
    away = "deletes its folder" if args.purge else "moves its folder to .removed"
    key = "keeps its key" if args.keep_key else "revokes its key"
    if args.dry_run:
        return run.would(name, "restores its files", key, away)
    run.say(f"  {name}  restores its files, {key}, {away}")
    run.confirm(f"Remove {name}?")
    if folder.place():
        result = undone(folder)
        if result.problem and not args.purge:
            raise failed(f"{result.problem}. Nothing was removed; --purge removes it anyway.")
        run.say(result.problem)
    # Revoking the key removes the tenant too: one request, so nothing is left half done.
    job.server.ask("DELETE", job.server.key_path(name, "/tenant" * args.keep_key))
    if os.path.isdir(folder.path):
        put_away(folder, args.purge)
    run.say(f"{name} removed")
    run.print_json({"removed": name, "keyKept": args.keep_key})
    return Exit.OK


def put_away(folder: Folder, is_purged: bool) -> None:
    """Move a tenant's folder to .removed, or delete it. Raises Problem."""
    try:
        with opened_folder(folder.world.tenants_folder) as at:
            if is_purged:
                remove_below(at, folder.name)
            else:
                stamp = stamp_of(folder.world.clock())
                move_below(at, folder.name, f".removed/{folder.name}-{stamp}")
    except OSError as error:
        raise failed(f"{folder.path} cannot be removed: {error.strerror}") from None


def cmd_login(run: Run) -> Exit:
    """Give a tenant a Claude login of its own, by `ocp keys login`."""
    world, args, name = run.world, run.args, _known(run)
    script = os.path.join(world.tree, "ocp.py")
    if not os.path.exists(script):
        raise failed(f"{script} is missing: run `ocp keys login {name}` on the server's machine.")
    words = [sys.executable, script, "keys", "login", name, "--url", run.server().url]
    words += ["--folder", args.folder] if args.folder else []
    words += ["--server"] * args.shared + ["--json"] * args.json
    code = subprocess.call(words, env=dict(world.environ)) or Exit.OK
    return Exit(code) if code in set(Exit) else Exit.FAILED


def cmd_gen_key(run: Run) -> Exit:
    """Print a new key without saving it."""
    secret = new_secret()
    run.say(secret)
    run.print_json({"key": secret})
    return Exit.OK


def cmd_env(run: Run) -> Exit:
    """Show the names of a tenant's variables, or change them."""
    args, name = run.args, _known(run)
    job, changes, left_out = run.job(), _env_changes(run), dict[str, str]()
    job.check_tenant(name)
    if args.take_over:
        found = _found_env(run, job, name)
        changes, left_out = {**found.values, **changes}, found.left_out
    for each, reason in left_out.items():
        run.say(f"  {each} is left out: {reason}")
    if args.dry_run:
        return run.would(name, *sorted(changes))
    names = as_dict(job.tenants[name]).get("env")
    if changes:
        answer = as_dict(job.server.tenant(name, "PATCH", changes, "/env"))
        names = answer.get("names")
        done = (("set", answer.get("changed")), ("removed", answer.get("removed")))
        run.say("; ".join(f"{word}: {', '.join(each)}" for word, each in done
                          if isinstance(each, list) and each) or "Nothing was changed.")
        run.say(f"{name} has:" if names else "")
    elif args.take_over:
        run.say("There is nothing to import.")
    names = names if isinstance(names, list) else []
    run.say("\n".join(f"  {clean(each)}" for each in names) or f"{name} has no variables.")
    run.print_json({"name": name, "names": names, "leftOut": left_out})
    return Exit.OK


def _env_changes(run: Run) -> dict[str, str | None]:
    """Return the changes of --set and --unset. With one --set all of standard input is the value,
    with several each line is one value. Raises Problem."""
    args = run.args
    changes: dict[str, str | None] = dict.fromkeys(args.unset)
    if args.set and run.world.stdin.isatty():
        run.world.note(f"Type {' and '.join(args.set)}, one per line, then press Ctrl-D.")
    text = run.world.stdin.read(10_000_000) if args.set else ""
    if args.set and not text:
        raise Problem(Exit.USAGE, f"Standard input is empty: write the value of {args.set[0]} "
                                  "there, or an empty line for an empty value.")
    text = text[:-1] if text.endswith("\n") else text
    values = text.split("\n") if len(args.set) > 1 else [text]
    if args.set and len(values) != len(args.set):
        raise Problem(Exit.USAGE, f"{counted(len(args.set), 'value')} are needed on standard "
                                  f"input, one per line, but {len(values)} came.")
    return {**changes, **dict(zip(args.set, values))}


def _found_env(run: Run, job: Job, name: str) -> FoundEnv:
    """Return the variables of a tenant's instance. Raises Problem."""
    world, folder = run.world, job.folder(name)
    instance = instance_at(world, folder) if folder.place() else choose(
        discover(world), [name])[0]
    return env_of(world, instance, run.args.container_env)


# -- skills -------------------------------------------------------------------


class Synced(NamedTuple):
    """The sync of one tenant's skills: its steps, and the outcome."""

    name: str
    sides: Sides | None = None
    steps: Sequence[Step] = ()
    kept: str = ""
    problem: str = ""

    def as_json(self) -> dict[str, Json]:
        sides = self.sides
        return {
            "name": self.name, "backup": self.kept, "problem": self.problem,
            "skills": [{"name": each.name, "state": each.state, "action": each.action,
                        "reason": each.reason, "changedFiles": each.changed_files}
                       for each in self.steps],
            "leftOut": {word: found.left_out for word, found in (
                ("here", sides.here), ("there", sides.there))} if sides else {}}

    @property
    def left_out(self) -> list[str]:
        """Return lines that name the files and skills left out."""
        sides, rows = self.sides, []
        for word, found in (("here", sides.here), ("there", sides.there)) if sides else ():
            shown = [f"{path[:100]} ({reason})" for path, reason in sorted(found.left_out.items())]
            more = [f"and {len(shown) - 20} more"] * (len(shown) > 20)
            rows += [f"  left out {word}: {', '.join(shown[:20] + more)}"] * bool(shown)
        return rows

    def summary(self, verb: str) -> list[str]:
        """Return a pull in a few words; an empty list if nothing was pulled."""
        count = sum(bool(each.action) for each in self.steps)
        return [f"skills FAILED: {self.problem}"] if self.problem else (
            [f"{counted(count, 'skill')} {verb}"] * bool(count))


def synced(
    job: Job, instance: Instance, direction: str, with_bundled: bool = False,
    overwrites: bool = False,
) -> Synced:
    """Return the planned sync of an instance, or with the problem that prevents it."""
    if instance.doubt:
        return Synced(instance.name, problem=instance.doubt)
    sides, problem = attempt(
        lambda: both_sides(job.folder(instance.name), instance, with_bundled))
    steps = steps_of(sides, direction, overwrites) if sides else ()
    return Synced(instance.name, sides, steps, problem=problem)


def carried(done: Synced) -> Synced:
    """Carry out a sync, and note a failure instead of raising it."""
    sides = done.sides
    if sides is None:
        return done
    kept, problem = attempt(lambda: copy_both_ways(sides, done.steps))
    return done._replace(kept=kept or "", problem=problem)


def _skills(
    run: Run, direction: str, show: Callable[[Run, Synced], list[str]], writes: bool = True
) -> Exit:
    """Compare the skills of tenants with those of their instances, and copy them if `writes`."""
    job, args, found = run.job(), vars(run.args), list[Synced]()
    instances, lost = instances_of(run, job, only_tenants=True)
    changes = carried if writes and not run.args.dry_run else lambda done: done
    rows = (changes(synced(job, each, direction, args.get("bundled", False),
                           args.get("overwrite", False))) for each in instances)
    unread = (Synced(each.name, problem=each.problem) for each in lost)
    for done in itertools.chain(unread, rows):
        found.append(done)
        lines = [clean(f"  FAILED: {done.problem}")] if done.problem else [
            *show(run, done), *done.left_out] or ["  no skills"]
        run.say("\n".join([f"{done.name}:", *lines]))
    if not found:
        run.say(NO_INSTANCE)
    run.print_json({"tenants": [each.as_json() for each in found]})
    return Exit.FAILED if any(each.problem for each in found) else Exit.OK


def _show_steps(run: Run, done: Synced) -> list[str]:
    """Return lines that tell which skills were copied or, with --dry-run, would be."""
    named: dict[str, list[str]] = {}
    form = "to {}" if run.args.dry_run else "{}ed"
    for each in done.steps:
        word = form.format(each.action) if each.action else (
            f"left, {each.state} ({each.reason})" if each.reason else "the same")
        named.setdefault(word, []).append(each.name)
    same = named.pop("the same", [])
    return [*(f"  {word}: {', '.join(names)}" for word, names in named.items()),
            *([f"  what was replaced: {run.world.shown_path(done.kept)}"] * bool(done.kept)),
            *([f"  {counted(len(same), 'skill')} the same"] * bool(same))]


def _show_states(run: Run, done: Synced) -> list[str]:
    """Return a table of skills."""
    steps = [each for each in done.steps
             if run.args.action == "list" or each.state != "the same"]
    rows = [(each.name, each.state, counted(each.changed_files, "file"),
             run.world.shown_path(each.there.root.path) if each.there else "-") for each in steps]
    same = len(done.steps) - len(rows)
    return [*([table(("Skill", "State", "Differs", "There in"), rows, ())] * bool(rows)),
            *([f"  {counted(same, 'skill')} the same"] * bool(same))]


def cmd_clean(run: Run) -> Exit:
    """Move skills that a sync has copied to backup/."""
    job, args, rows = run.job(), run.args, []
    for name in args.names or sorted(job.tenants):
        job.check_tenant(name)
        gone, left, kept = clean_skills(job.folder(name), args.overwrite, args.dry_run)
        rows.append({"name": name, "cleaned": gone, "left": left, "backup": kept if gone else ""})
        to = f"{'to move' if args.dry_run else 'moved'} to {run.world.shown_path(kept)}"
        lines = [f"  {to}: {', '.join(gone)}"] * bool(gone)
        lines += [f"  left, changed since or incomplete: {', '.join(left)}"] * bool(left)
        run.say("\n".join([f"{name}:", *(lines or ["  nothing to move"])]))
    run.print_json({"tenants": rows})
    return Exit.OK


# -- import -------------------------------------------------------------------


def cmd_import(run: Run) -> Exit:
    """Take over the tenants of a cc-gateway config.yaml."""
    world, args = run.world, run.args
    config, job = read_gateway(args.file), run.job()
    limit, effort = (as_dict(config.get("cli")).get(each) for each in ("max_per_tenant", "effort"))
    key = {"maxConcurrent": min(limit, 1000) if type(limit) is int and limit > 0 else 1,
           **({"effort": effort} if effort in ("low", "medium", "high", "max") else {})}
    skills = os.path.abspath(args.skills) if args.skills else ""
    if skills and not os.path.isdir(skills):
        raise failed(f"--skills: {clean(skills)} is not a folder.")
    found, rows = discover(world).instances, list[Taken]()
    for row in config["tenants"]:
        tenant, steps = imported(row, found), None
        problem = doubled(tenant, [each.tenant for each in rows])
        if not problem:
            steps, problem = attempt(functools.partial(import_steps, job, tenant, key, skills))
        rows.append(Taken(tenant, steps or [], problem))
    show(run, [(each.tenant.name, each.problem, each.words) for each in rows])
    if any(each.steps for each in rows) and not args.dry_run:
        run.confirm("Do this?")
        rows = [each.taken() for each in rows]
        show(run, [(each.tenant.name, each.problem, "") for each in rows if each.problem])
        run.say(f"{counted(sum(not each.problem for each in rows), 'tenant')} taken over.")
    _end_import(run, rows, import_advice(job, config))
    return Exit.FAILED if any(each.problem for each in rows) else Exit.OK


class Taken(NamedTuple):
    """A tenant of cc-gateway, and the steps of its import."""

    tenant: Imported
    steps: Sequence[ImportStep]
    problem: str

    @property
    def words(self) -> str:
        """Return the steps in one line, and a line for each note."""
        what = ", ".join(word for word, _ in self.steps) or "nothing to do"
        return "\n".join([what, *self.tenant.notes])

    def taken(self) -> Taken:
        """Carry out the steps, and note a failure instead of raising it."""
        problem = attempt(lambda: [do() for _, do in self.steps])[1]
        return self._replace(problem=self.problem or problem)


def _end_import(run: Run, rows: Sequence[Taken], advice: list[str]) -> None:
    """Print what the user still has to do, and how OCP differs."""
    beside = os.path.join(os.path.dirname(run.args.file), "skills")
    advice += [f"`--skills {clean(beside)}` copies the skills in that folder"] * (
        not run.args.skills and os.path.isdir(beside))
    run.say("\n".join(["Left to do:", *(f"  {line}" for line in advice)] if advice else []))
    run.say("\n".join(["What is different here:", *(f"  {line}" for line in DIFFERENCES)]))
    run.print_json({"advice": advice, "differences": DIFFERENCES, "tenants": [
        {"name": each.tenant.name, "origin": each.tenant.origin, "notes": each.tenant.notes,
         "problem": each.problem, "steps": [word for word, _ in each.steps]} for each in rows]})


# -- arguments ----------------------------------------------------------------


class Command(NamedTuple):
    """One command."""

    name: str
    help: str
    do: Callable[[Run], Exit]
    #: Its groups of arguments, keys of ARGUMENTS.
    takes: tuple[str, ...] = ()


_SYNC = ("names", "skills", "dry-run", "overwrite")
COMMANDS = (
    Command("list", "list the tenants, also without a command", cmd_list),
    Command("discover", "find OpenClaw containers and folders on this machine", cmd_discover),
    Command("setup", "make a tenant of each instance, or of those named", cmd_setup,
            ("names", "changes", "setup", "setup-skills")),
    Command("apply", "write the server into the instances of tenants again", cmd_apply,
            ("names", "changes", "setup")),
    Command("check", "show what apply would do, and change nothing", cmd_check, ("names",)),
    Command("undo", "restore the files of instances", cmd_undo, ("names", "changes")),
    Command("show", "show one tenant", cmd_show, ("name",)),
    Command("add", "make a tenant, and print its key", cmd_add,
            ("name", "changes", "setup", "add")),
    Command("login", "give a tenant a Claude login of its own", cmd_login, ("name", "login")),
    Command("edit", "change a tenant", cmd_edit, ("name", "changes", "edit")),
    Command("remove", "undo, revoke the key, move the folder to .removed", cmd_remove,
            ("name", "changes", "remove")),
    Command("env", "show the names of a tenant's variables, or change them", cmd_env,
            ("name", "changes", "env")),
    Command("gen-key", "print a new key without saving it", cmd_gen_key),
    Command("import", "take over the tenants of a config.yaml of cc-gateway", cmd_import,
            ("file", "changes", "import")),
    Command("skills list", "list skills, and whether they are the same in the instance",
            lambda run: _skills(run, "bisync", _show_states, False), ("names", "skills")),
    Command("skills diff", "list skills that are not the same",
            lambda run: _skills(run, "bisync", _show_states, False), ("names", "skills")),
    Command("skills pull", "copy skills of instances to their tenants",
            lambda run: _skills(run, "pull", _show_steps), _SYNC),
    Command("skills push", "copy skills of tenants to their instances",
            lambda run: _skills(run, "push", _show_steps), _SYNC),
    Command("skills bisync", "copy what is new on either side to the other",
            lambda run: _skills(run, run.args.direction, _show_steps), (*_SYNC, "bisync")),
    Command("skills clean", "move skills that a sync has copied to backup/", cmd_clean,
            ("names", "dry-run", "overwrite")),
)

#: Groups of commands.
GROUPS = {"skills": "compare the skills of tenants and instances, and copy them"}
_DRY_RUN = (("--dry-run",), {"action": "store_true", "help": "show everything and change nothing"})

#: Groups of arguments. An argument is its names, and its options for argparse.
ARGUMENTS: dict[str, list[tuple[tuple[str, ...], dict[str, Any]]]] = {
    "names": [(("names",), {"nargs": "*", "metavar": "NAME"})],
    "name": [(("name",), {"metavar": "NAME"})],
    "changes": [
        _DRY_RUN, (("--yes", "-y"), {"action": "store_true", "help": "do not ask"})],
    "setup": [
        (("--level",), {"choices": LEVELS, "help": "what may run on the server for it"}),
        (("--commands",), {"choices": COMMANDS_TO_RUN,
                           "help": "which commands of its OpenClaw may run"}),
        (("--primary",), {"dest": "role", "action": "store_const", "const": "primary",
                          "help": "make this server the default model"}),
        (("--backup",), {"dest": "role", "action": "store_const", "const": "backup",
                         "help": "make this server the last fallback"}),
        (("--provider-name",), {"metavar": "NAME", "help": "its name in openclaw.json"}),
        (("--url",), {"metavar": "URL", "help": "the server's address as the instance sees it"}),
        (("--dotenv",), {"nargs": "?", "const": "auto", "metavar": "PATH",
                         "help": "also change the .env of its compose project"}),
        (("--existing",), {"action": "store_true",
                           "help": "a key of that name becomes the tenant's, with a new secret"}),
        (("--adopt",), {"action": "store_true", "help": "use a folder that exists already"}),
        (("--skip-answer",), {"action": "store_true", "help": "send no question at the end"})],
    "dry-run": [_DRY_RUN],
    "file": [(("file",), {"metavar": "FILE"})],
    "import": [
        (("--skills",), {"metavar": "DIR", "help": "its skills: a folder for each tenant"}),
        (("--level",), {"choices": LEVELS, "help": "what may run on the server for them"}),
        (("--adopt",), {"action": "store_true", "help": "use folders that exist already"})],
    "skills": [
        (("--bundled",), {"action": "store_true", "help": "also those that come with OpenClaw"})],
    "overwrite": [
        (("--overwrite",), {"action": "store_true",
                            "help": "also replace skills that were changed on the target side"})],
    "bisync": [
        (("--pull",), {"dest": "direction", "action": "store_const", "const": "pull",
                       "default": "bisync", "help": "only to the tenants"}),
        (("--push",), {"dest": "direction", "action": "store_const", "const": "push",
                       "help": "only to the instances"})],
    "setup-skills": [
        (("--skills",), {"action": "store_true", "help": "pull skills, and do nothing else"}),
        (("--no-skills",), {"action": "store_true", "help": "pull no skills"})],
    "add": [
        (("--apply",), {"action": "store_true", "help": "write it into the instance too"}),
        (("--container",), {"metavar": "NAME", "help": "its container"}),
        (("--local",), {"metavar": "DIR", "help": "its state folder"}),
        (("--secret-stdin",), {"action": "store_true", "help": "read the key on standard input"})],
    "edit": [
        (("--level",), {"choices": LEVELS, "help": "what may run on the server for it"}),
        (("--commands",), {"choices": COMMANDS_TO_RUN,
                           "help": "which commands of its OpenClaw may run"}),
        (("--prompt",), {"metavar": "FILE", "help": "a file with this tenant's system prompt"}),
        (("--no-prompt",), {"action": "store_true", "help": "remove its system prompt"})],
    "login": [
        (("--folder",), {"metavar": "PATH", "help": "a folder in which claude is logged in"}),
        (("--shared",), {"action": "store_true", "help": "go back to the server's login"})],
    "remove": [
        (("--keep-key",), {"action": "store_true", "help": "keep the key, without a tenant"}),
        (("--purge",), {
            "action": "store_true", "help": "delete its folder, even if its instance is gone"})],
    "env": [
        (("--set",), {"metavar": "NAME", "action": "append", "default": [],
                      "help": "set a variable; its value comes from standard input"}),
        (("--unset",), {"metavar": "NAME", "action": "append", "default": [],
                        "help": "remove a variable"}),
        (("--import",), {"dest": "take_over", "action": "store_true",
                         "help": "take those of the instance's openclaw.json"}),
        (("--container-env",), {"action": "store_true",
                                "help": "with --import: also the container's own"})],
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ocp tenants", allow_abbrev=False,
        description="Set up OpenClaw instances, each with a key of its own.")
    parser.add_argument("--version", action="version", version=f"ocp_tenants {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    groups: dict[str, Any] = {}
    for command in COMMANDS:
        above, _, name = command.name.rpartition(" ")
        if above and above not in groups:
            groups[above] = commands.add_parser(
                above, help=GROUPS[above], description=f"{GROUPS[above]}.").add_subparsers(
                    dest="action", metavar="ACTION", title="actions", required=True)
        each = (groups[above] if above else commands).add_parser(
            name, help=command.help, description=f"{command.help}.", allow_abbrev=False)
        for group in command.takes:
            for names, options in ARGUMENTS[group]:
                each.add_argument(*names, **options)
        each.add_argument("--server", metavar="URL", help="the server (default: this machine's)")
        each.add_argument("--json", action="store_true", help="print JSON")
        each.set_defaults(do=command.do)
    return parser


def program(argv: Sequence[str], world: World) -> Exit:
    """Run the command in `argv`. Raises Problem, and SystemExit for wrong arguments."""
    words = list(argv)
    if not words or words[0] in ("--json", "--server"):
        words = ["list", *words]
    with contextlib.redirect_stdout(world.stdout), contextlib.redirect_stderr(world.stderr):
        args = build_parser().parse_args(words)
    do: Callable[[Run], Exit] = args.do
    with exclusive_run(world) if changes_something(args) else contextlib.nullcontext():
        return do(Run(world, args))


def changes_something(args: argparse.Namespace) -> bool:
    """Return whether a command line may change something: with it no other such command runs."""
    if vars(args).get("dry_run") is not False:
        return False
    # Without these, `env` lists names.
    return args.do is not cmd_env or bool(args.set or args.unset or args.take_over)


def main(argv: Sequence[str], world: World) -> int:
    """Return the exit code; print every failure as a sentence on standard error."""
    try:
        return int(program(argv, world))
    except SystemExit as end:
        return int(end.code or 0)
    except Problem as problem:
        world.note(f"ocp tenants: {problem}")
        return int(problem.code)
    except BrokenPipeError:
        # The reader of the output, such as `head`, has ended.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return int(Exit.FAILED)
    except OSError as error:
        world.note(f"ocp tenants: {clean(reason_of(error))}")
        return int(Exit.FAILED)
    except KeyboardInterrupt:
        world.note("\nInterrupted: run it again to continue, or run `ocp tenants undo`.")
        return int(Exit.INTERRUPTED)


def this_world() -> World:
    """Return the world of this process."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The parent process has closed the stream, as `>&-` does.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
        if mode == "w":
            getattr(sys, name).reconfigure(errors="replace")
    return World(dict(os.environ), os.path.expanduser("~"), sys.stdin, sys.stdout, sys.stderr,
                 os.path.dirname(os.path.realpath(__file__)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], this_world()))
