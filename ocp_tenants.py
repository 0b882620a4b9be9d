#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# ///
"""ocp_tenants sets up OpenClaw instances for one OCP server, each with a key of its own.

    ocp tenants discover        find OpenClaw containers and folders on this machine
    ocp tenants setup           make a key for each, and write the server into its openclaw.json
    ocp tenants                 list the tenants
    ocp tenants undo            give every openclaw.json back as it was

It runs on the server's machine, alone as `python3 ocp_tenants.py` too. It needs ocp_connect.py
beside it for what it writes into openclaw.json, and the program `docker` for containers. Commands
that change something accept --dry-run; all accept --json.

The server is --server, or OCP_URL, or the one that the installer wrote into ~/.ocp/install.json,
or http://127.0.0.1:3456. The admin key is OCP_ADMIN_KEY, or the content of ~/.ocp/admin-key.
OCP_HOME replaces ~/.ocp. OCP_DOCKER names another client, such as podman.

Exit codes: 0 done; 1 failed, the message says why; 2 wrong usage; 3 no server answers;
4 the admin key is missing or wrong; 130 interrupted.
"""
# Sections (search for "==== 8" to jump to the eighth):
#
#      1. Small tools      shared pieces, the world outside, running programs, names and keys
#      2. The server       where it is, which key it gets, what it knows of tenants
#      3. Docker           its client, by argv only
#      4. Instances        OpenClaw containers and folders of this machine
#      5. OpenClaw files   read and replace the files of an instance, in a container or not
#      6. Tenants          set up, apply, undo
#      7. Skills           compare, fetch and bring skills
#      8. Import           the configuration of another gateway
#      9. Command line     arguments, output, main
from __future__ import annotations  # OCP needs Python 3.9 or later; Python 3.6 shows this line.

import sys

if sys.version_info < (3, 9):
    sys.exit("OCP needs Python 3.9 or later; this is Python %d.%d." % sys.version_info[:2])
if sys.platform == "win32":
    sys.exit("ocp_tenants runs on Linux and macOS; on Windows, run it in WSL.")

import contextlib
import dataclasses
import enum
import functools
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, TextIO

VERSION = "1.0.0"

#: A JSON value.
Json = Any


# ==== 1. Small tools =========================================================
# Pieces between "--- shared: NAME" and "--- end shared" are in other scripts too; a test compares
# them. Then the world outside, programs, and the forms that names have to have.


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
    """Return the error of a command that was not able to do its work."""
    return Problem(Exit.FAILED, message)


def clean(text: object) -> str:
    """Return `text` without the control characters that could command a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", "?", str(text))


def counted(number: int, noun: str) -> str:
    """Return "1 file" or "2 files"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def as_dict(value: Json) -> dict[str, Json]:
    """Return `value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


#: Variables that no program started from here is given: the keys of this server.
_OWN_SECRETS = ("OCP_ADMIN_KEY", "OCP_CONNECT_KEY")


@dataclasses.dataclass
class World:
    """The world around a command."""

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
        """Return the environment for programs that are started."""
        return {name: value for name, value in self.environ.items() if name not in _OWN_SECRETS}

    def say(self, text: str) -> None:
        print(text, file=self.stdout, flush=True)

    def note(self, text: str) -> None:
        print(text, file=self.stderr, flush=True)

    def shown_path(self, path: str) -> str:
        """Return a path with ~ for the home folder."""
        inside = path.startswith(self.home + os.sep)
        return "~" + path[len(self.home):] if inside else path


class Ran(NamedTuple):
    """How a program ended. A code of None: it did not run to its end, and `error` says why."""

    code: int | None
    output: bytes
    error: str

    @property
    def text(self) -> str:
        return self.output.decode("utf-8", "replace")

    @property
    def complaint(self) -> str:
        """Return its complaint in one line, for a message."""
        lines = [line.strip() for line in f"{self.error}\n{self.text}".splitlines()]
        return next((clean(line)[:300] for line in lines if line), f"it ended with {self.code}")


class Running:
    """A program at work, its output a stream. It is killed with its group when its time is over.

    Raises OSError where it cannot be started.
    """

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], stdin: bytes, timeout_s: float
    ) -> None:
        self._name, self._reason = command[0], ""
        self._error = tempfile.TemporaryFile()  # noqa: SIM115 - finish() closes it
        self._process = subprocess.Popen(
            list(command), env=dict(environ), cwd="/", stdout=subprocess.PIPE, stderr=self._error,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL, start_new_session=True)
        assert self._process.stdout
        self.output: IO[bytes] = self._process.stdout
        self._timer = threading.Timer(timeout_s, self.kill, [f"took longer than {timeout_s:.0f} s"])
        self._timer.daemon = True
        self._timer.start()
        if stdin:
            threading.Thread(target=self._feed, args=[stdin], daemon=True).start()

    def _feed(self, stdin: bytes) -> None:
        assert self._process.stdin
        with contextlib.suppress(OSError), self._process.stdin as pipe:
            pipe.write(stdin)

    def kill(self, reason: str) -> None:
        """End the program and all that it started. `reason` goes into the message."""
        self._reason = self._reason or reason
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def finish(self, output: bytes = b"") -> Ran:
        """Wait for the end, and return how it was, with the output that was read."""
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
    """Run a program to its end, without a terminal. Never raises for one that cannot be run, is
    too slow or prints too much."""
    try:
        running = Running(command, environ, stdin, timeout_s)
    except (OSError, ValueError) as error:
        return Ran(None, b"", f"{command[0]}: {getattr(error, 'strerror', None) or error}")
    try:
        output = running.output.read(limit_bytes + 1)
        if len(output) > limit_bytes:
            running.kill(f"printed more than {limit_bytes} bytes")
    except BaseException:
        running.kill("was interrupted")
        raise
    finally:
        ran = running.finish()
    return ran._replace(output=output[:limit_bytes])


#: The form of a tenant's name, also a part of paths.
TENANT_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")


def fitted_name(text: str) -> str:
    """Return `text` made to fit the form of a tenant's name; "instance" where nothing is left."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()[:200]).strip("-")[:40].strip("-")
    return words or "instance"


def checked_name(text: str) -> str:
    """Return a tenant's name. Raises Problem for what none may be."""
    if not TENANT_NAME.fullmatch(text):
        raise Problem(Exit.USAGE, f"{clean(text)[:80]!r} is no name of a tenant: use up to 40 "
                                  "small letters, digits and hyphens.")
    return text


def new_secret() -> str:
    """Return a new key: "ocp_" and 32 characters."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    return "ocp_" + "".join(secrets.choice(alphabet) for _ in range(32))


def stamp_of(at_s: float) -> str:
    """Return epoch seconds as the name of a folder: 20270131T140000Z."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(at_s))


# ==== 2. The server ==========================================================
# Where the server is, and what it knows of tenants.


DEFAULT_URL = "http://127.0.0.1:3456"


def parse_url(text: str, source: str) -> str:
    """Return a server's address without a trailing slash or /v1. Raises Problem if it is none."""
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
    """Return whether an address leads to this machine by its loopback name."""
    host = urllib.parse.urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def port_of(url: str) -> int:
    parts = urllib.parse.urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


class Server(NamedTuple):
    """The server whose keys the instances get."""

    url: str
    #: The admin key.
    key: str

    def ask(self, method: str, path: str, body: object = None, key: str = "") -> Json:
        """Return the JSON of an answer. `key` replaces the admin key. Raises Problem, whose body is
        that of the refusal."""
        tls = any_certificate() if is_loopback(self.url) else None
        try:
            return http_json(method, self.url + path, body, key or self.key, 15.0, tls)
        except HttpProblem as problem:
            message = clean(problem).rstrip(".")
            if problem.kind == "unreachable":
                raise Problem(Exit.UNREACHABLE, f"Cannot connect to {self.url}: {message}.\n"
                              "Start the server with `ocp start`.") from None
            if problem.kind == "denied":
                raise Problem(Exit.DENIED, f"{self.url} refused: {message}.\nIts admin key is "
                              "taken from OCP_ADMIN_KEY, or from ~/.ocp/admin-key.",
                              problem.body) from None
            raise Problem(Exit.FAILED, f"{self.url} answered {problem.status}: {message}.",
                          problem.body) from None

    def keys(self) -> dict[str, dict[str, Json]]:
        """Return the active keys by name. Raises Problem."""
        rows = as_dict(self.ask("GET", "/api/keys")).get("keys")
        rows = [as_dict(row) for row in rows] if isinstance(rows, list) else []
        return {str(row.get("name")): row for row in rows if not row.get("revokedAt")}

    def tenants(self) -> dict[str, dict[str, Json]]:
        """Return the tenants by name. Raises Problem."""
        rows = as_dict(self.ask("GET", "/api/tenants")).get("tenants")
        rows = [as_dict(row) for row in rows] if isinstance(rows, list) else []
        return {str(row.get("name")): row for row in rows}

    def tenant(self, name: str, method: str = "GET", body: object = None, more: str = "") -> Json:
        """Return the answer to a request about one tenant. Raises Problem."""
        return self.ask(method, f"/api/keys/{urllib.parse.quote(name, safe='')}/tenant{more}", body)


def error_code(problem: Problem) -> str:
    """Return the code in a server's refusal, empty if there is none."""
    return str(as_dict(as_dict(problem.body).get("error")).get("code") or "")


def find_server(world: World, named: str = "") -> Server:
    """Return the server to use, not asked yet. Raises Problem for an address that is none."""
    record: dict[str, Json] = {}
    with contextlib.suppress(OSError, ValueError):
        record = read_record(os.path.join(world.ocp_home, "install.json")) or {}
    given = (("--server", named), ("OCP_URL", world.environ.get("OCP_URL", "")),
             ("install.json", str(record.get("url") or "")))
    source, text = next((pair for pair in given if pair[1].strip()), ("", DEFAULT_URL))
    url = parse_url(text, source)
    key = world.environ.get("OCP_ADMIN_KEY", "").strip()
    if not key and (is_loopback(url) or source == "install.json"):
        # The key of the file is this machine's own: it is sent to no other.
        folder = str(record.get("data_dir") or world.ocp_home)
        with contextlib.suppress(OSError, ValueError):
            with open(os.path.join(folder, "admin-key"), encoding="utf-8") as file:
                key = file.read(10_000).strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise Problem(Exit.USAGE, "The admin key contains characters that no key has.")
    return Server(url, key)


# ==== 3. Docker ==============================================================
# The program docker, by argv only: no shell, `--` before names, a time limit, bounded output.


#: The form of a container's name.
CONTAINER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
#: For what copies files.
_COPY_S = 120.0


class Docker(NamedTuple):
    """The client of docker, or of what OCP_DOCKER names."""

    world: World

    @property
    def program(self) -> str:
        return self.world.environ.get("OCP_DOCKER", "").strip() or "docker"

    def run(self, *words: str, stdin: bytes = b"", timeout_s: float = 15.0) -> Ran:
        """Run the client. Never raises."""
        return run_words([self.program, *words], self.world.child_environ, stdin, timeout_s)

    def containers(self) -> tuple[list[dict[str, Json]], str]:
        """Return what `docker inspect` says of all containers, and why there is nothing, empty if
        docker answered. `docker ps` with a format would measure the sizes of all of them."""
        listed = self.run("ps", "--no-trunc", "--quiet", "--all")
        if listed.code is None and shutil.which(
                self.program, path=self.world.environ.get("PATH", os.defpath)) is None:
            return [], f"there is no program {clean(self.program)}"
        ids = [word for word in listed.text.split() if re.fullmatch(r"[0-9a-f]{12,64}", word)]
        if listed.code != 0 or not ids:
            return [], "" if listed.code == 0 else listed.complaint
        # One that is gone meanwhile makes it fail, and the others are printed all the same.
        told = self.run("inspect", "--type", "container", *ids)
        found: Json = None
        with contextlib.suppress(ValueError):
            found = json.loads(told.text)
        if not isinstance(found, list):
            return [], told.complaint
        return [row for row in found if isinstance(row, dict)], ""

    def exec(self, container: str, *words: str, stdin: bytes = b"", timeout_s: float = 15.0) -> Ran:
        """Run a program in a container, its words unchanged. Never raises."""
        options = ["--interactive"] if stdin else []
        return self.run("exec", *options, "--", container, *words, stdin=stdin, timeout_s=timeout_s)

    def open_tar(self, container: str, path: str) -> Running:
        """Return `docker cp` at work: its output is a tar of `path`. Works on a stopped container.

        Raises OSError where docker cannot be run. The caller reads, then calls finish().
        """
        command = [self.program, "cp", "--", f"{container}:{path}", "-"]
        return Running(command, self.world.child_environ, b"", _COPY_S)

    def put_tar(self, container: str, folder: str, content: bytes) -> Ran:
        """Unpack a tar into a folder of a container, owners and modes as its entries say."""
        return self.run("cp", "--", "-", f"{container}:{folder}", stdin=content, timeout_s=_COPY_S)


# ==== 4. Instances ===========================================================
# OpenClaw containers and folders of this machine. Nothing here changes anything.


class Instance(NamedTuple):
    """One OpenClaw of this machine."""

    #: What its tenant is called.
    name: str
    #: "container" or "folder".
    kind: str
    #: The name of the container, or the state folder.
    where: str
    #: The state folder, in the container where there is one.
    state_dir: str
    #: The path of openclaw.json.
    config_path: str
    #: Of the container; empty for a folder.
    container_id: str = ""
    #: Whether programs can be run there: False for a stopped container.
    is_running: bool = True
    #: What `docker inspect` says of the container.
    inspected: Mapping[str, Json] = {}

    @property
    def is_container(self) -> bool:
        return self.kind == "container"


# ==== 5. OpenClaw files ======================================================
# The files of one instance, read and replaced alike in a container and in a folder.


# ==== 6. Tenants =============================================================
# Set up, apply, undo.


# ==== 7. Skills ==============================================================
# Compare, fetch and bring skills.


# ==== 8. Import ==============================================================
# The configuration of another gateway.


# ==== 9. Command line ========================================================
# Arguments, output, main.
