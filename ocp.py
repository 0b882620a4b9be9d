#!/usr/bin/env python3
"""ocp runs and watches an OCP server: what it has used, how it is, and what to do about it.

    ocp COMMAND [ARGUMENTS]        ocp COMMAND --help says more about one command

The server is found through OCP_URL, else CLAUDE_PROXY_PORT, else ~/.ocp/install.json, which the
installer writes, else it is http://127.0.0.1:3456. The admin key is OCP_ADMIN_KEY, else what
stands in ~/.ocp/admin-key; the file's key is sent to this machine's own server only. OCP_HOME
moves ~/.ocp. Colour and bars are for terminals; NO_COLOR turns colour off.

Every command that reads takes --json and prints the server's own JSON.

Exit codes: 0 done; 1 it failed, the message says how; 2 wrong usage; 3 no server answers;
4 not allowed: the key is missing or wrong, or the system wants other rights; 130 interrupted.
"""
# Sections (search for "==== 8" to jump to the eighth):
#
#      1. Surroundings     exit codes, problems, everything outside that a command touches
#      2. The server       HTTP, where the server is, which key it gets
#      3. Formatting       tables, bars, ages, colour
#      4. Reading          usage, status, health, models, settings, logs, sessions
#      5. Keys             the keys of an operator's devices
#      6. Using it         ask, lan, connect, sync
#      7. Service          who owns the port; start, stop, restart
#      8. Checkout and snapshots   git; what an update saves; the journal that survives it
#      9. Doctor           a table of checks, each with its fix
#     10. Update           from tag to tag, and back
#     11. Commands         the table of commands; arguments, help and completion come from it
#     12. Main             errors become exit codes
from __future__ import annotations

import sys

if sys.version_info < (3, 9):
    sys.exit("OCP needs Python 3.9 or later; this is Python %d.%d." % sys.version_info[:2])
if sys.platform == "win32":
    sys.exit("ocp runs on Linux and macOS; on Windows, run it in WSL.")

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import email.utils
import enum
import fcntl
import functools
import http.client
import ipaddress
import json
import os
import plistlib
import re
import shlex
import shutil
import socket
import sqlite3
import ssl
import stat
import subprocess
import tempfile
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol, TextIO

#: A JSON value as it came over the wire.
Json = Any


# ==== 1. Surroundings ========================================================
# What a command may know and touch of the world stands in one Env, so that tests give it another
# world. What goes wrong is a Problem, which knows its exit code; main turns it into one line.


class Exit(enum.IntEnum):
    """The exit codes. A command that did not do what it was asked to never ends with OK."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    DENIED = 4
    INTERRUPTED = 130


class Problem(Exception):
    """What went wrong, where, and what to do next, in one or a few lines for the user.

    `body` is the JSON with which a server refused, where that says more.
    """

    def __init__(self, code: Exit, message: str, body: Json = None) -> None:
        super().__init__(message)
        self.code = code
        self.body = body


class Ran(NamedTuple):
    """What became of a command. A code of None: it could not be run, and `error` says why."""

    code: int | None
    output: str
    error: str

    @property
    def complaint(self) -> str:
        """The last line that it had to say, for a message."""
        lines = (self.error.strip() or self.output.strip()).splitlines()
        return clean(lines[-1]) if lines else f"it ended with {self.code}"


class Runner(Protocol):
    """How commands are run."""

    def __call__(
        self, command: Sequence[str], *, environ: Mapping[str, str], folder: str | None = None,
        timeout_s: float = 15.0, attached: bool = False,
    ) -> Ran:
        """Runs it to its end; attached to the terminal, it prints for itself."""


def run_command(
    command: Sequence[str], *, environ: Mapping[str, str], folder: str | None = None,
    timeout_s: float = 15.0, attached: bool = False,
) -> Ran:
    """Runs a command. Never raises for a program that is missing or too slow."""
    pipe = None if attached else subprocess.PIPE
    try:
        done = subprocess.run(
            list(command), env=dict(environ), cwd=folder, stdout=pipe, stderr=pipe,
            stdin=None if attached else subprocess.DEVNULL,
            timeout=None if attached else timeout_s, check=False,
        )
    except subprocess.TimeoutExpired:
        return Ran(None, "", f"{command[0]} took longer than {timeout_s:.0f} s")
    except OSError as problem:
        return Ran(None, "", f"{command[0]}: {problem.strerror}")
    texts = [(part or b"").decode("utf-8", "replace") for part in (done.stdout, done.stderr)]
    return Ran(done.returncode, *texts)


def own_addresses() -> list[str]:
    """The IPv4 address by which this machine goes out, if any. Nothing is sent for that."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # A documentation address: connecting a UDP socket only chooses the way.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return []
        address = str(probe.getsockname()[0])
    return [] if ipaddress.ip_address(address).is_loopback else [address]


@dataclasses.dataclass
class Env:
    """The world around a command."""

    argv: list[str]
    environ: Mapping[str, str]
    stdin: TextIO
    stdout: TextIO
    stderr: TextIO
    #: The user's home folder.
    home: str
    #: The folder that this script belongs to, where ocp_server.py lies beside it.
    tree: str
    platform: str = sys.platform
    user_id: int = dataclasses.field(default_factory=os.getuid)
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    run: Runner = run_command
    addresses: Callable[[], list[str]] = own_addresses

    @property
    def ocp_home(self) -> str:
        """The folder of OCP's state."""
        named = self.environ.get("OCP_HOME", "").strip()
        if named.startswith("~/"):
            named = os.path.join(self.home, named[2:])
        return os.path.abspath(named) if named else os.path.join(self.home, ".ocp")

    def say(self, text: str) -> None:
        """Prints what was asked for."""
        print(text, file=self.stdout, flush=True)

    def note(self, text: str) -> None:
        """Prints a remark beside the result."""
        print(text, file=self.stderr, flush=True)

    def command(
        self, *words: str, timeout_s: float = 15.0, more: Mapping[str, str] | None = None,
    ) -> Ran:
        """Runs a program of the system with the user's environment."""
        with working(self, f"waiting for {os.path.basename(words[0])}"):
            return self.run(words, environ={**self.environ, **(more or {})}, timeout_s=timeout_s)


def is_terminal(stream: TextIO) -> bool:
    """Whether a person is looking at this stream."""
    return stream.isatty()


@contextlib.contextmanager
def working(env: Env, text: str) -> Iterator[None]:
    """A block that may take long: on a terminal, `text` appears when it takes over a second."""
    if not is_terminal(env.stderr):
        yield
        return
    timer = threading.Timer(1.0, env.note, [f"{text} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def clean(text: object) -> str:
    """`text` without the control characters that could command a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", "?", str(text))


def write_whole(path: str, content: bytes, mode: int = 0o600) -> None:
    """Writes a file so that after a power cut the old or the new one is there, never a part."""
    folder = os.path.dirname(path)
    descriptor, draft = tempfile.mkstemp(dir=folder, prefix=".ocp-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if os.geteuid() == 0:
            # The state of a service of the machine belongs to the user that it runs as.
            above = os.stat(folder)
            os.chown(draft, above.st_uid, above.st_gid)
        os.chmod(draft, mode)
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise


# ==== 2. The server ==========================================================
# Where the server is, and how it is asked. A server that cannot be reached, one that refuses the
# key and one that has trouble of its own are three different things, here and for the user.


# --- shared: http_json
class HttpProblem(Exception):
    """A request without a useful answer. `kind` is "unreachable" (nobody answered), "denied" (401,
    403), "upstream" (5xx) or "refused"; `status` is 0 where nobody answered, `body` the JSON."""

    def __init__(self, kind: str, message: str, status: int = 0, body: Any = None) -> None:
        super().__init__(message)
        self.kind, self.status, self.body = kind, status, body


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
                raise http_problem(answer.status, text)
            yield answer


def http_problem(status: int, text: bytes) -> HttpProblem:
    """The problem that an answer with such a status stands for."""
    kind = "denied" if status in (401, 403) else "upstream" if status >= 500 else "refused"
    body, message = None, text[:200].decode("utf-8", "replace").strip()
    with contextlib.suppress(ValueError):
        body = json.loads(text)
    error = body.get("error") if isinstance(body, dict) else None
    told = error.get("message") if isinstance(error, dict) else error
    return HttpProblem(kind, str(told or message), status, body)


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


DEFAULT_PORT = 3456
DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_PORT}"


class Record(NamedTuple):
    """What the installer wrote down in install.json; empty fields where it is silent."""

    platform: str
    label: str
    unit_path: str
    #: Of launchd, such as gui/501.
    domain: str
    python: str
    server_path: str
    data_dir: str
    env_file: str
    port: int
    bind: str
    url: str


def record_path(env: Env) -> str:
    """Where the installer writes down what it did."""
    return os.path.join(env.ocp_home, "install.json")


def read_record(env: Env) -> Record | None:
    """The installation, None when nothing was installed. Raises Problem for a broken record."""
    path = record_path(env)
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        port = found.get("port") or DEFAULT_PORT
        texts = {name: found.get(name) or "" for name in Record._fields if name != "port"}
        if not isinstance(port, int) or not all(isinstance(t, str) for t in texts.values()):
            raise ValueError("a field has another type than the installer writes")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as problem:
        raise Problem(
            Exit.FAILED,
            f"{path} cannot be read ({problem}). Run setup.py_install.py again, or name the "
            "server in OCP_URL.",
        ) from None
    record = Record(port=port, **texts)
    return record._replace(url=record.url or f"http://127.0.0.1:{port}")


def parse_url(text: str, source: str) -> str:
    """A server's address without a trailing slash or /v1. Raises Problem for anything else."""
    try:
        parts = urllib.parse.urlsplit(text.strip())
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        usable = usable and "@" not in parts.netloc
        # Characters that no address has would only fail later, and less clearly.
        (parts.hostname or "").encode("idna")
    except ValueError:
        usable = False
    if not usable or re.search(r"[\x00-\x20\x7f]", text.strip()):
        raise Problem(
            Exit.USAGE, f"{source}: {clean(text)!r} is no address such as {DEFAULT_URL}."
        )
    path = parts.path.rstrip("/")
    path = path[: -len("/v1")] if path.endswith("/v1") else path
    return f"{parts.scheme}://{parts.netloc}{path}"


def is_this_machine(url: str) -> bool:
    """Whether an address is this machine by its loopback name."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def tls_for(url: str) -> ssl.SSLContext | None:
    """How the certificate of a server is judged; None for the usual way. That of this machine's
    own server names the address that other devices use, not the one that is asked here."""
    return any_certificate() if is_this_machine(url) else None


def any_certificate() -> ssl.SSLContext:
    """A context that takes whatever certificate a server has."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def server_url(env: Env) -> str:
    """The address of the server that commands talk to. Raises Problem."""
    named = env.environ.get("OCP_URL", "")
    if named.strip():
        return parse_url(named, "OCP_URL")
    port = env.environ.get("CLAUDE_PROXY_PORT", "").strip()
    if port:
        if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65_536:
            raise Problem(Exit.USAGE, f"CLAUDE_PROXY_PORT: {clean(port)!r} is no port.")
        return f"http://127.0.0.1:{int(port)}"
    record = read_record(env)
    return parse_url(record.url, record_path(env)) if record else DEFAULT_URL


def admin_key_path(env: Env) -> str:
    """Where the server of this machine keeps its key. That of a service of the machine has a
    folder of its own."""
    with contextlib.suppress(Problem):
        record = read_record(env)
        return os.path.join((record.data_dir if record else "") or env.ocp_home, "admin-key")
    return os.path.join(env.ocp_home, "admin-key")


def admin_key(env: Env, url: str) -> str:
    """The key for this address, empty if there is none for it. Raises Problem.

    The key in the file belongs to the server of this machine, and is sent to no other.
    """
    key, source = env.environ.get("OCP_ADMIN_KEY", "").strip(), "OCP_ADMIN_KEY"
    if not key:
        source = admin_key_path(env)
        if not is_this_machine(url):
            record = read_record(env)
            if record is None or parse_url(record.url, record_path(env)) != url:
                return ""
        try:
            with open(source, encoding="utf-8") as file:
                key = file.read(10_000).strip()
        except (FileNotFoundError, PermissionError):
            return ""
        except (OSError, ValueError) as problem:
            raise Problem(Exit.FAILED, f"{source} cannot be read: {problem}") from None
    if key and not re.fullmatch(r"[!-~]+", key):
        raise Problem(Exit.USAGE, f"{source} holds characters that no key has.")
    return key


class Server(NamedTuple):
    """The server that is asked. Each method raises Problem."""

    env: Env
    url: str
    key: str

    def text(self, method: str, path: str, body: object = None, timeout_s: float = 15.0) -> str:
        """An answer's JSON as the server wrote it."""
        with working(self.env, f"waiting for {self.url}"):
            try:
                with self.open(method, path, body, timeout_s) as answer:
                    return answer.read().decode("utf-8", "replace")
            except HttpProblem as problem:
                raise self.explained(problem) from None
            except (OSError, http.client.HTTPException) as problem:
                raise self.explained(HttpProblem("unreachable", str(problem))) from None

    def open(
        self, method: str, path: str, body: object, timeout_s: float
    ) -> contextlib.AbstractContextManager[http.client.HTTPResponse]:
        """An answer, its body still unread. Raises HttpProblem."""
        url = self.url + path
        return http_open(method, url, body, self.key, timeout_s, tls_for(url))

    def json(self, method: str, path: str, body: object = None, timeout_s: float = 15.0) -> Json:
        """An answer's JSON value."""
        return self.parsed(self.text(method, path, body, timeout_s))

    def parsed(self, text: str) -> Json:
        """The value of an answer's JSON, which is always an object."""
        try:
            value = json.loads(text)
            if isinstance(value, dict):
                return value
        except ValueError:
            pass
        raise Problem(Exit.FAILED, f"{self.url} answers, but not as an OCP server does.")

    def explained(self, problem: HttpProblem) -> Problem:
        """The same problem in the user's terms, with what to do about it."""
        message = clean(problem).rstrip(".")
        if "CERTIFICATE_VERIFY_FAILED" in message:
            return Problem(
                Exit.UNREACHABLE,
                f"The certificate of {self.url} is not trusted here: name the file of its "
                "authority in SSL_CERT_FILE.",
            )
        if problem.kind == "unreachable":
            return Problem(
                Exit.UNREACHABLE,
                f"Cannot connect to {self.url}: {message}.\n"
                "Start the server with `ocp start`, or find out more with `ocp doctor`.",
            )
        if problem.kind == "denied":
            return Problem(Exit.DENIED, f"{self.url} refused: {message}.\n{self._key_advice()}")
        if problem.kind == "upstream":
            return Problem(
                Exit.FAILED,
                f"{self.url} is running but has upstream trouble ({problem.status}): {message}.\n"
                "See `ocp logs 20 error`.", problem.body,
            )
        return Problem(
            Exit.FAILED, f"{self.url} answered {problem.status}: {message}.", problem.body
        )

    def _key_advice(self) -> str:
        if self.key:
            return "The admin key that was sent is not this server's: see OCP_ADMIN_KEY."
        if is_this_machine(self.url):
            return ("No admin key was sent: set OCP_ADMIN_KEY; there is none to read in "
                    f"{admin_key_path(self.env)}.")
        return "No admin key was sent to this other machine: set OCP_ADMIN_KEY to its key."


def find_server(env: Env) -> Server:
    """The server that commands talk to, and its key. Raises Problem."""
    url = server_url(env)
    return Server(env, url, admin_key(env, url))


def answers(url: str) -> bool:
    """Whether an OCP server answers there; it gets no key, so its certificate does not matter."""
    try:
        return "version" in http_json("GET", url + "/health", timeout_s=2.0, tls=any_certificate())
    except (HttpProblem, TypeError):
        return False


def lan_url(env: Env, url: str) -> str:
    """A server's address as other devices have it, empty if there is no network."""
    if not is_this_machine(url):
        return url
    parts = urllib.parse.urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return next((f"{parts.scheme}://{host}{port}" for host in env.addresses()), "")


def device_url(env: Env, url: str) -> str:
    """The address for another device, if one can reach it; else the address as it is."""
    found = lan_url(env, url)
    return found if found and answers(found) else url


def with_port(url: str) -> str:
    """A server's address as ocp_connect.py takes it, where an address without a port means 3456."""
    parts = urllib.parse.urlsplit(url)
    port = "" if parts.port else ":443" if parts.scheme == "https" else ":80"
    return f"{parts.scheme}://{parts.netloc.rstrip(':')}{port}{parts.path}"


def connect_words(url: str) -> str:
    """The one command that sets up the tools of another machine."""
    default = url.startswith("http://") and url.endswith(":3456")
    host = url[len("http://"):-len(":3456")] if default else with_port(url)
    return f"curl -fsSL {url}/connect | python3 - {host}"


# ==== 3. Formatting ==========================================================
# Pure functions from values to text. A Look says for whom: a person at a terminal sees colour
# and bars, a pipe gets the same words plainly.

_COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}


class Look(NamedTuple):
    """How output looks. The default is plain, in UTC, at the beginning of the epoch."""

    color: bool = False
    bars: bool = False
    now_s: float = 0.0
    zone: datetime.tzinfo | None = datetime.timezone.utc

    def paint(self, color: str, text: str) -> str:
        """The text in a colour, where there is colour."""
        return f"\x1b[{_COLOURS[color]}m{text}\x1b[0m" if self.color and text else text


def look_of(env: Env) -> Look:
    """The look for where the output goes."""
    terminal = is_terminal(env.stdout)
    plain = bool(env.environ.get("NO_COLOR")) or env.environ.get("TERM") == "dumb"
    return Look(terminal and not plain, terminal, env.clock(), None)


def table(aligned: str, rows: Iterable[Sequence[object]], look: Look) -> str:
    """Rows in columns, the first row being the heads. `aligned` has < or > for each column."""
    cells = [[clean(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(aligned))]
    lines = []
    for row in cells:
        padded = [f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths)]
        lines.append(("  " + "  ".join(padded)).rstrip())
    return "\n".join([look.paint("bold", lines[0]), *lines[1:]])


def fields(rows: Iterable[tuple[str, object]]) -> str:
    """Names and values, one to a line; values of None are left out."""
    kept = [(name, clean(value)) for name, value in rows if value is not None]
    width = max((len(name) for name, _ in kept), default=0)
    return "\n".join(f"  {name:<{width}}  {value}".rstrip() for name, value in kept)


def bar(share: float, look: Look, width: int = 20) -> str:
    """A share from 0 to 1 as a bar; nothing where there are no bars."""
    if not look.bars:
        return ""
    full = round(min(max(share, 0.0), 1.0) * width)
    color = "red" if share >= 0.9 else "yellow" if share >= 0.7 else "green"
    return "[" + look.paint(color, "#" * full) + "." * (width - full) + "]"


def number(value: object) -> str:
    """A count for people: 950, 36K, 1.2M; a dash for what is not known."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.1f}".removesuffix(".0") + unit
    return f"{value:g}"


def size_words(count_bytes: float) -> str:
    """A size for people."""
    return f"{number(count_bytes)}B" if count_bytes >= 1000 else f"{count_bytes:.0f} bytes"


def duration(ms: object) -> str:
    """Milliseconds for people: 420ms, 4.2s, 2m 5s, 3h 12m, 5d 2h."""
    if not isinstance(ms, (int, float)) or isinstance(ms, bool):
        return "-"
    seconds = ms / 1000
    if seconds < 1:
        return f"{ms:.0f}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    whole = round(seconds)
    for size, big, small, unit in ((86_400, "d", "h", 3600), (3600, "h", "m", 60)):
        if whole >= size:
            return f"{whole // size}{big} {whole % size // unit}{small}"
    return f"{whole // 60}m {whole % 60}s"


def parse_time(text: object) -> float | None:
    """Epoch seconds of an ISO time, which is UTC unless it says otherwise; None for anything else.
    """
    if not isinstance(text, str):
        return None
    try:
        moment = datetime.datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text.strip()))
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.timezone.utc)
    return moment.timestamp()


def age(text: object, look: Look) -> str:
    """How far an ISO time is from now: "5m ago", "in 2d"; a dash for none."""
    at_s = parse_time(text)
    if at_s is None:
        return "-"
    away_s = abs(look.now_s - at_s)
    if away_s < 5:
        return "now"
    units = (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1))
    unit, size = next(each for each in units if away_s >= each[1])
    words = f"{int(away_s // size)}{unit}"
    return f"in {words}" if at_s > look.now_s else f"{words} ago"


def moment_words(text: object, look: Look) -> str:
    """An ISO time as a date and a time of day where the user is; a dash for none."""
    at_s = parse_time(text)
    if at_s is None:
        return "-"
    moment = datetime.datetime.fromtimestamp(at_s, datetime.timezone.utc).astimezone(look.zone)
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def switch_word(value: object) -> str:
    """A boolean setting as people write it; any other value as it is."""
    if value is None:
        return "-"
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


# ==== 4. Reading =============================================================
# One cmd_x(env, args) that asks, and one pure show_x(answer, look) that shows, for each command.


def printed(env: Env, args: argparse.Namespace, path: str, show: Callable[..., str]) -> Exit:
    """What every plain reading command does: ask, then show, or print the JSON as it came."""
    server = find_server(env)
    text = server.text("GET", path)
    env.say(text.rstrip("\n") if args.json else show(server.parsed(text), look_of(env)))
    return Exit.OK


def _window_line(name: str, window: Json, look: Look) -> str:
    """One plan window: how much of it is used, and when it begins anew."""
    window = window or {}
    share, percent = window.get("utilization"), window.get("percent")
    if share is None and percent is None:
        state = window.get("status")
        return f"  {name:<20} {clean(state) if state else 'not known yet'}"
    drawn = bar(float(share or 0), look)
    used = clean(percent if percent is not None else f"{share:.0%}") + " used"
    line = f"  {name:<20} {used:<10}" + (f" {drawn}" if drawn else "")
    if window.get("resetsIn"):
        line += f"  resets in {clean(window['resetsIn'])}"
        line += f" ({clean(window['resetsAtHuman'])})" if window.get("resetsAtHuman") else ""
    return line.rstrip()


def show_plan(plan: Json, look: Look) -> str:
    """The windows of the plan."""
    plan = plan if isinstance(plan, dict) else {}
    weekly = plan.get("weeklyLimits") or {}
    extra = plan.get("extraUsage") or {}
    lines = [look.paint("bold", "Plan Usage Limits")]
    lines.append(_window_line("Current session", plan.get("currentSession"), look))
    lines.append(_window_line("Weekly (all models)", weekly.get("allModels"), look))
    for name in sorted(set(weekly) - {"allModels"}):
        lines.append(_window_line(f"Weekly ({clean(name)})", weekly[name], look))
    status, reason = extra.get("status"), extra.get("disabledReason")
    words = {"allowed": "on", "rejected": "off", None: "not known yet"}.get(status, status)
    because = f" ({clean(reason)})" if reason else ""
    lines.append(f"  {'Extra usage':<20} {clean(words)}{because}")
    return "\n".join(lines)


def show_usage(answer: Json, look: Look) -> str:
    """The plan, what each model did since the server started, and one line about the server."""
    models, proxy = answer.get("models") or {}, answer.get("proxy") or {}
    heads = ("Model", "Requests", "OK", "Err", "Avg Time", "Max Time", "Avg Prompt", "Max Prompt")
    rows: list[Sequence[object]] = [heads]
    for name, row in models.items():
        rows.append((
            name, number(row.get("requests")), number(row.get("successes")),
            number(row.get("errors")),
            duration(row.get("avgElapsed")), duration(row.get("maxElapsed")),
            number(row.get("avgPromptChars")), number(row.get("maxPromptChars")),
        ))
    total = sum(row.get("requests") or 0 for row in models.values())
    rows.append(("Total", number(total), "", "", "", "", "", ""))
    stats = table("<>>>>>>>", rows, look) if models else "  no requests yet"
    footer = (
        f"Proxy: up {clean(proxy.get('uptime', '?'))}"
        f" | {number(proxy.get('totalRequests'))} requests"
        f" | {number(proxy.get('activeRequests'))} active | {number(proxy.get('errors'))} errors"
        f" | {number(proxy.get('timeouts'))} timeouts"
    )
    return "\n".join([
        show_plan(answer.get("plan"), look), "", look.paint("bold", "Model Stats"), stats, "",
        footer,
    ])


def _prompt_tokens(row: Json) -> int:
    names = ("input_tokens", "cache_read_tokens", "cache_write_tokens")
    return sum(row.get(name) or 0 for name in names)


def _usage_table(title: str, column: str, rows: Sequence[Json], look: Look) -> str:
    heads = (title, "Requests", "OK", "Err", "Prompt tokens", "Answer tokens", "Avg Time", "Last")
    shown: list[Sequence[object]] = [heads]
    for row in rows:
        shown.append((
            row.get(column) or "-", number(row.get("requests")), number(row.get("successes")),
            number(row.get("errors")), number(_prompt_tokens(row)),
            number(row.get("output_tokens")), duration(row.get("avg_elapsed_ms")),
            age(row.get("last_request"), look),
        ))
    return table("<>>>>>>>", shown, look)


def show_usage_by_key(answer: Json, look: Look) -> str:
    """What each key used in the period."""
    rows = answer.get("byKey") or []
    lead = f"Since {moment_words(answer.get('since'), look)}"
    return "\n".join([lead, _usage_table("Key", "key_name", rows, look) if rows else "  nothing"])


def show_usage_days(answer: Json, look: Look) -> str:
    """What each day and each model of the period used."""
    days, models = answer.get("daily") or [], answer.get("byModel") or []
    totals = answer.get("totals") or {}
    if not days:
        return f"Since {moment_words(answer.get('since'), look)}\n  nothing"
    most = max(day.get("requests") or 0 for day in days) or 1
    heads = ("Day", "Requests", "Err", "Prompt tokens", "Answer tokens", *([""] * look.bars))
    rows: list[Sequence[object]] = [heads]
    for day in days:
        drawn = ["#" * round(20 * (day.get("requests") or 0) / most)] * look.bars
        rows.append((
            day.get("day"), number(day.get("requests")), number(day.get("errors")),
            number(_prompt_tokens(day)), number(day.get("output_tokens")), *drawn,
        ))
    rows.append((
        "Total", number(totals.get("requests")), number(totals.get("errors")),
        number(_prompt_tokens(totals)), number(totals.get("output_tokens")), *([""] * look.bars),
    ))
    parts = [table("<>>>>" + "<" * look.bars, rows, look)]
    if models:
        parts.append(_usage_table("Model", "model", models, look))
    return "\n\n".join(parts)


def cmd_usage(env: Env, args: argparse.Namespace) -> Exit:
    """The plan and the models; with --days or --by-key what was used in a period."""
    if not args.by_key and args.days is None:
        return printed(env, args, "/usage", show_usage)
    since_s = env.clock() - 86_400 * (args.days or 1)
    since = datetime.datetime.fromtimestamp(since_s, datetime.timezone.utc)
    query = urllib.parse.urlencode({"since": since.strftime("%Y-%m-%dT%H:%M:%SZ"), "all": "true"})
    show = show_usage_by_key if args.by_key else show_usage_days
    return printed(env, args, f"/api/usage?{query}", show)


_STATE_COLOURS = {"ok": "green", "degraded": "yellow", "draining": "yellow"}


def _state_word(state: object, look: Look) -> str:
    return look.paint(_STATE_COLOURS.get(str(state), "red"), clean(state))


def show_status(answer: Json, look: Look) -> str:
    """The server on one screen: its state, its requests, the plan, the last errors."""
    proxy, requests = answer.get("proxy") or {}, answer.get("requests") or {}
    lines = [
        f"OCP {clean(proxy.get('version', '?'))}: {_state_word(proxy.get('status'), look)}, "
        f"up {clean(proxy.get('uptime', '?'))}, login {clean(proxy.get('auth', 'unknown'))}",
        f"Requests: {number(requests.get('total'))} | {number(requests.get('active'))} active | "
        f"{number(requests.get('errors'))} errors | {number(requests.get('timeouts'))} timeouts",
        "", show_plan(answer.get("plan"), look),
    ]
    errors = answer.get("recentErrors") or []
    if errors:
        lines += ["", look.paint("bold", "Recent Errors")]
        for error in errors:
            moment = moment_words(error.get("time"), look)
            lines.append(f"  {moment}  {clean(error.get('message'))}")
    return "\n".join(lines)


_WATCH_EVERY_S = 2.0


def cmd_status(env: Env, args: argparse.Namespace) -> Exit:
    """The server on one screen, again and again with --watch, until Ctrl-C."""
    while args.watch:
        try:
            server = find_server(env)
            text = server.text("GET", "/status")
            answer = server.parsed(text)
            shown = text.rstrip("\n") if args.json else show_status(answer, look_of(env))
        except Problem as problem:
            if problem.code is not Exit.UNREACHABLE:
                raise
            # A restart is among what people watch for.
            shown = str(problem)
        start = "\x1b[H\x1b[2J" if is_terminal(env.stdout) else ""
        env.say(start + shown + ("" if start or args.json else "\n"))
        env.sleep(_WATCH_EVERY_S)
    return printed(env, args, "/status", show_status)


def show_health(answer: Json, look: Look) -> str:
    """What the server says about itself to anybody."""
    auth, stats = answer.get("auth") or {}, answer.get("stats") or {}
    login = {True: "works", False: "refused", None: "not known before the first answer"}
    load = answer.get("concurrency") or {}
    spares = answer.get("spares")
    names = [f"{model} {count}" for model, count in spares.items()] if spares else ["none"]
    rows = [
        ("version", answer.get("version")),
        ("instance", answer.get("instanceName") or None), ("up", answer.get("uptimeHuman")),
        ("access mode", answer.get("authMode")), ("login", login.get(auth.get("ok"), "?")),
        ("claude", answer.get("claudeVersion") or "not usable"),
        ("requests", f"{number(stats.get('totalRequests'))}, {number(stats.get('errors'))} failed"),
        ("running", f"{number(load.get('inflight'))} of {number(load.get('maxConcurrent'))}, "
                    f"{number(load.get('queued'))} waiting"),
        ("spare processes", ", ".join(names)), ("parked", answer.get("parked")),
        ("what to do", answer.get("fix")),
    ]
    return f"OCP is {_state_word(answer.get('status'), look)}\n" + fields(rows)


def cmd_health(env: Env, args: argparse.Namespace) -> Exit:
    """How the server is. FAILED when it is there but not well, for scripts."""
    server = find_server(env)
    text = server.text("GET", "/health")
    answer = server.parsed(text)
    env.say(text.rstrip("\n") if args.json else show_health(answer, look_of(env)))
    return Exit.OK if answer.get("status") == "ok" else Exit.FAILED


def show_models(answer: Json, look: Look) -> str:
    """The models, newest first."""
    rows: list[Sequence[object]] = [("Model", "Name", "Window", "Answer", "Reasoning")]
    for model in answer.get("data") or []:
        reasoning = model.get("reasoning")
        rows.append((
            model.get("id"), model.get("display_name") or "-", number(model.get("context_window")),
            number(model.get("max_output_tokens")),
            {True: "yes", False: "no"}.get(reasoning, "-"),
        ))
    return table("<<>><", rows, look)


def cmd_models(env: Env, args: argparse.Namespace) -> Exit:
    """The models that the server offers."""
    return printed(env, args, "/v1/models", show_models)


def _span(row: Json) -> str:
    """The range of a setting."""
    least, most = row.get("min"), row.get("max")
    if least is None and most is None:
        return ""
    return f"{'' if least is None else least}..{'' if most is None else most}"


def show_settings(answer: Json, look: Look) -> str:
    """Every setting with its value, its range and where the value comes from."""
    rows: list[Sequence[object]] = [("Setting", "Value", "Unit", "Range", "From", "What it is")]
    for name, row in answer.items():
        rows.append((
            name, switch_word(row.get("value")), row.get("unit") or "", _span(row),
            row.get("source") or "", row.get("desc") or "",
        ))
    return table("<><<<<", rows, look)


def show_setting(name: str, row: Json, look: Look) -> str:
    """One setting, in full."""
    unit = f" {row['unit']}" if row.get("unit") else ""
    return look.paint("bold", clean(name)) + "\n" + fields([
        ("value", f"{switch_word(row.get('value'))}{unit}"), ("from", row.get("source")),
        ("default", f"{switch_word(row.get('default'))}{unit}"), ("range", _span(row) or None),
        ("environment", row.get("env")), ("what it is", row.get("desc")),
    ])


def parse_value(name: str, row: Json, text: str) -> object:
    """What the user wrote, as the type that the setting has. Raises Problem."""
    kind = row.get("type")
    words = {"1": True, "true": True, "yes": True, "on": True,
             "0": False, "false": False, "no": False, "off": False}
    if kind == "boolean" and text.lower() in words:
        return words[text.lower()]
    if kind == "number" and re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)
    if kind == "number" and re.fullmatch(r"[+-]?[0-9]{1,18}\.[0-9]{1,9}", text):
        return float(text)
    if kind in ("boolean", "number"):
        wanted = "on or off" if kind == "boolean" else "a number" + (
            f" of {row['unit']}" if row.get("unit") else "")
        raise Problem(Exit.USAGE, f"{name} takes {wanted}, not {clean(text)!r}.")
    return text


def _known_setting(settings: Json, name: str) -> Json:
    if name in settings:
        return settings[name]
    near = difflib.get_close_matches(name, settings, 1, 0.5)
    hint = f" Did you mean {near[0]}?" if near else " `ocp settings` lists them."
    raise Problem(Exit.USAGE, f"There is no setting {clean(name)!r}.{hint}")


def cmd_settings(env: Env, args: argparse.Namespace) -> Exit:
    """Shows all settings or one; changes one; gives one back to environment or default."""
    if args.reset and args.key:
        raise Problem(Exit.USAGE, "--reset takes the only name: ocp settings --reset KEY")
    if not args.key and not args.reset:
        return printed(env, args, "/settings", show_settings)
    server, name = find_server(env), args.reset or args.key
    settings = server.json("GET", "/settings")
    row = _known_setting(settings, name)
    if not args.reset and args.value is None:
        env.say(json.dumps({name: row}) if args.json else show_setting(name, row, look_of(env)))
        return Exit.OK
    value = None if args.reset else parse_value(name, row, args.value)
    try:
        text = server.text("PATCH", "/settings", {name: value})
        answer = server.parsed(text)
    except Problem as problem:
        if not isinstance(problem.body, dict) or "results" not in problem.body:
            raise
        answer, text = problem.body, json.dumps(problem.body)
    result = (answer.get("results") or {}).get(name) or {}
    if not result.get("ok"):
        raise Problem(Exit.FAILED, f"{name} was not changed: {clean(result.get('error'))}")
    if args.json:
        env.say(text.rstrip("\n"))
        return Exit.OK
    current = (answer.get("current") or {}).get(name) or {**row, "value": result.get("value")}
    unit = f" {row['unit']}" if row.get("unit") else ""
    source = f" (from {clean(current['source'])})" if args.reset and "source" in current else ""
    env.say(f"{name} = {clean(switch_word(current.get('value')))}{unit}{source}")
    return Exit.OK


LEVELS = ("debug", "info", "warn", "error")
#: What `logs` takes; audit = what the operator changed.
LOG_WORDS = ("all", "audit", *LEVELS)
_LEVEL_COLOURS = {"debug": "dim", "warn": "yellow", "error": "red"}


def show_log_entry(entry: Json, look: Look) -> str:
    """One event: when, how bad, what, and its fields."""
    if "raw" in entry:
        return clean(entry["raw"])
    level = str(entry.get("level", ""))
    rest = [f"{key}={value}" for key, value in entry.items() if key not in ("ts", "level", "event")]
    head = f"{moment_words(entry.get('ts'), look)} "
    colour = _LEVEL_COLOURS.get(level)
    word = f"{clean(level).upper():5}"
    word = look.paint(colour, word) if colour else word
    return f"{head}{word} " + clean(" ".join([str(entry.get("event", "")), *rest]))


def show_logs(answer: Json, look: Look) -> str:
    """The newest events, oldest first."""
    entries = answer.get("entries") or []
    return "\n".join(show_log_entry(entry, look) for entry in entries) or "no such events"


def fresh_entries(seen: Sequence[Json], entries: Sequence[Json]) -> Sequence[Json]:
    """The entries that come after what was seen: the server sends again what it still has of it."""
    known = 0
    for entry in seen:
        if known < len(entries) and entries[known] == entry:
            known += 1
    return entries[known:]


def _log_arguments(words: Sequence[str]) -> tuple[int, str]:
    """The number of lines and the level, given in any order. Raises Problem."""
    count, level = 20, "all"
    for word in words:
        lowered = "warn" if word.lower() == "warning" else word.lower()
        if re.fullmatch(r"[0-9]{1,4}", word) and 0 < int(word) <= 1000:
            count = int(word)
        elif lowered in LOG_WORDS:
            level = lowered
        else:
            raise Problem(
                Exit.USAGE,
                f"logs takes a number from 1 to 1000 and one of {', '.join(LOG_WORDS)}; "
                f"not {clean(word)!r}.",
            )
    return count, level


_FOLLOW_EVERY_S = 1.0


def _follow_logs(env: Env, args: argparse.Namespace, count: int, level: str) -> NoReturn:
    """Prints events as they come, for ever; a server that restarts is waited for."""
    server, seen, was_there = find_server(env), None, True
    while True:
        try:
            answer = server.json("GET", f"/logs?n=1000&level={level}")
            entries = answer.get("entries") or []
            fresh = entries[-count:] if seen is None else fresh_entries(seen, entries)
            for entry in fresh:
                shown = json.dumps(entry) if args.json else show_log_entry(entry, look_of(env))
                env.say(shown)
            seen, was_there = entries, True
        except Problem as problem:
            if problem.code is not Exit.UNREACHABLE or seen is None:
                raise
            if was_there:
                env.note(f"{server.url} does not answer; waiting for it")
            was_there = False
        env.sleep(_FOLLOW_EVERY_S)


def cmd_logs(env: Env, args: argparse.Namespace) -> Exit:
    """The newest events of the server's log."""
    count, level = _log_arguments(args.words)
    if args.follow:
        _follow_logs(env, args, count, level)
    return printed(env, args, f"/logs?n={count}&level={level}", show_logs)


def show_sessions(answer: Json, look: Look) -> str:
    """The conversations that the server remembers, the one used last first."""
    sessions = answer.get("sessions") or []
    rows: list[Sequence[object]] = [("Session", "Caller", "Model", "Messages", "Last used")]
    for session in sessions:
        rows.append((
            session.get("id"), session.get("caller"), session.get("model"),
            number(session.get("messages")), age(session.get("lastUsed"), look),
        ))
    return table("<<<><", rows, look) if sessions else "no sessions"


def cmd_sessions(env: Env, args: argparse.Namespace) -> Exit:
    """The conversations that the server remembers."""
    return printed(env, args, "/sessions", show_sessions)


def cmd_clear(env: Env, args: argparse.Namespace) -> Exit:
    """Forgets all sessions, or one."""
    path = "/sessions" + ("/" + urllib.parse.quote(args.session, "") if args.session else "")
    server = find_server(env)
    text = server.text("DELETE", path)
    cleared = server.parsed(text).get("cleared")
    env.say(text.rstrip("\n") if args.json else f"cleared {number(cleared)} sessions")
    return Exit.OK


# ==== 5. Keys ================================================================
# The keys of an operator's devices. A new secret is printed first and alone, so that no trouble
# with anything else can lose it.

#: Option of the command line, name in the API.
QUOTAS = (
    ("daily", "daily"), ("weekly", "weekly"), ("monthly", "monthly"),
    ("tokens-daily", "tokensDaily"), ("tokens-weekly", "tokensWeekly"),
    ("tokens-monthly", "tokensMonthly"),
)


def _key_state(key: Json) -> str:
    return "revoked" if key.get("revoked") else "expired" if key.get("expired") else "active"


def show_keys(answer: Json, look: Look) -> str:
    """All keys, newest first."""
    keys = answer.get("keys") or []
    heads = ("Id", "Name", "Key", "State", "Created", "Last used", "Expires")
    rows: list[Sequence[object]] = [heads]
    for key in keys:
        created = key.get("createdAt") or key.get("created_at")
        rows.append((
            key.get("id"), key.get("name"), key.get("keyPreview"), _key_state(key),
            age(created, look), age(key.get("lastUsed"), look),
            age(key["expiry"], look) if key.get("expiry") else "never",
        ))
    return table(">" + "<" * 6, rows, look) if keys else "no keys yet: ocp keys add NAME"


def show_key(answer: Json, look: Look) -> str:
    """One key, in full."""
    limit = answer.get("maxConcurrent") or 0
    return look.paint("bold", clean(answer.get("name"))) + "\n" + fields([
        ("id", answer.get("id")), ("key", answer.get("keyPreview")), ("state", _key_state(answer)),
        ("created", moment_words(answer.get("createdAt") or answer.get("created_at"), look)),
        ("last used", age(answer.get("lastUsed"), look)),
        ("expires", moment_words(answer["expiry"], look) if answer.get("expiry") else "never"),
        ("models", ", ".join(map(str, answer.get("models") or [])) or "all"),
        ("at the same time", limit or "no limit of its own"), ("note", answer.get("note") or None),
    ])


def show_quota(answer: Json, look: Look) -> str:
    """What a key may use and has used, for each period."""
    rows: list[Sequence[object]] = [("Quota", "Used", "Limit", "Resets in", *([""] * look.bars))]
    for option, name in QUOTAS:
        row = (answer.get("quota") or {}).get(name) or {}
        limit, used = row.get("limit"), row.get("used") or 0
        share = 1.0 if limit == 0 else used / limit if limit else 0.0
        # Colour would be counted as width by the table.
        drawn = [bar(share, look._replace(color=False)) if limit is not None else ""] * look.bars
        rows.append((
            option, number(used), "none" if limit is None else number(limit),
            row.get("resetsIn") or "-", *drawn,
        ))
    return table("<>>>" + "<" * look.bars, rows, look)


def _key_path(name: str) -> str:
    return "/api/keys/" + urllib.parse.quote(name, "")


def _key_fields(args: argparse.Namespace) -> dict[str, object]:
    """The fields of a key that the user named."""
    found: dict[str, object] = {}
    if args.expiry is not None:
        found["expiry"] = None if args.expiry == "never" else args.expiry
    if args.models is not None:
        found["models"] = [name.strip() for name in args.models.split(",") if name.strip()]
    if args.max_concurrent is not None:
        found["maxConcurrent"] = args.max_concurrent
    if args.note is not None:
        found["note"] = args.note
    return found


def _quota_fields(args: argparse.Namespace) -> dict[str, int | None]:
    """The quotas that the user named; None takes one away. Raises Problem."""
    found: dict[str, int | None] = {}
    for option, name in QUOTAS:
        text = getattr(args, option.replace("-", "_"))
        if text is None:
            continue
        if text != "none" and not re.fullmatch(r"[0-9]{1,15}", text):
            message = f"--{option} takes a whole number or none, not {clean(text)!r}."
            raise Problem(Exit.USAGE, message)
        found[name] = None if text == "none" else int(text)
    return found


def cmd_keys_list(env: Env, args: argparse.Namespace) -> Exit:
    """All keys."""
    return printed(env, args, "/api/keys", show_keys)


def _print_secret(env: Env, args: argparse.Namespace, text: str) -> Exit:
    """Prints an answer that holds a new secret."""
    if args.json:
        env.say(text.rstrip("\n"))
        return Exit.OK
    try:
        answer = json.loads(text)
        secret, name = answer["key"], answer["name"]
    except (ValueError, KeyError, TypeError):
        # Better shown raw than lost: nobody can ask for it again.
        env.say(text)
        raise Problem(Exit.FAILED, "The server's answer, above, is not as expected.") from None
    env.say(clean(secret))
    url = device_url(env, server_url(env))
    if answer.get("warning"):
        env.note(f"ATTENTION: {clean(answer['warning'])}")
    env.note(f"This is the key {clean(name)!r}. It is shown only now. On its device run")
    env.note(f"  {connect_words(url)}\nwhich asks for it; or, for one tool:")
    env.note(f"  export OPENAI_API_KEY={clean(secret)} OPENAI_BASE_URL={url}/v1")
    return Exit.OK


def cmd_keys_add(env: Env, args: argparse.Namespace) -> Exit:
    """Makes a key and prints it."""
    body = {"name": args.name, **_key_fields(args)}
    quotas = _quota_fields(args)
    if quotas:
        body["quota"] = quotas
    return _print_secret(env, args, find_server(env).text("POST", "/api/keys", body))


def cmd_keys_rotate(env: Env, args: argparse.Namespace) -> Exit:
    """Gives a key a new secret; the old one is dead at once."""
    path = _key_path(args.key) + "/rotate"
    return _print_secret(env, args, find_server(env).text("POST", path))


def cmd_keys_show(env: Env, args: argparse.Namespace) -> Exit:
    """One key with its quotas."""
    if args.json:
        return printed(env, args, _key_path(args.key), show_key)
    printed(env, args, _key_path(args.key), show_key)
    return printed(env, args, _key_path(args.key) + "/quota", show_quota)


def cmd_keys_quota(env: Env, args: argparse.Namespace) -> Exit:
    """Shows the quotas of a key, after changing those that were named."""
    path, quotas = _key_path(args.key) + "/quota", _quota_fields(args)
    if quotas:
        find_server(env).json("PATCH", path, quotas)
    return printed(env, args, path, show_quota)


def _edit_key(env: Env, args: argparse.Namespace, fields_: Mapping[str, object]) -> Exit:
    server = find_server(env)
    text = server.text("PATCH", _key_path(args.key), fields_)
    env.say(text.rstrip("\n") if args.json else show_key(server.parsed(text), look_of(env)))
    return Exit.OK


def cmd_keys_rename(env: Env, args: argparse.Namespace) -> Exit:
    """Gives a key another name."""
    return _edit_key(env, args, {"name": args.name})


def cmd_keys_edit(env: Env, args: argparse.Namespace) -> Exit:
    """Changes what a key may do."""
    changes = _key_fields(args)
    if not changes:
        raise Problem(Exit.USAGE, "Nothing to change: see `ocp keys edit --help`.")
    return _edit_key(env, args, changes)


def cmd_keys_revoke(env: Env, args: argparse.Namespace) -> Exit:
    """Ends a key. FAILED when there was none to end."""
    server = find_server(env)
    text = server.text("DELETE", _key_path(args.key))
    if not server.parsed(text).get("revoked"):
        raise Problem(Exit.FAILED, f"No active key has the name or id {clean(args.key)!r}.")
    env.say(text.rstrip("\n") if args.json else f"revoked {clean(args.key)}")
    return Exit.OK


# ==== 6. Using it ============================================================
# One question from here, and what other devices need to know.

_ANSWER_TIMEOUT_S = 660.0


def sse_data(lines: Iterable[bytes]) -> Iterator[str]:
    """The data of a stream of server-sent events, one value for each event."""
    data: list[str] = []
    for line in lines:
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if text.startswith("data:"):
            data.append(text[5:].removeprefix(" "))
        elif not text and data:
            yield "\n".join(data)
            data = []


class Told(NamedTuple):
    """How a streamed answer ended."""

    model: str = ""
    finish: str = ""
    first_token_s: float | None = None
    answer_tokens: int | None = None


def tell(env: Env, events: Iterable[str]) -> Told:
    """Prints the text of a streamed answer as it comes. Raises Problem for an error in it."""
    started_s, told, terminal = env.clock(), Told(), is_terminal(env.stdout)
    for data in events:
        if data == "[DONE]":
            break
        chunk = json.loads(data)
        if "error" in chunk:
            raise Problem(Exit.FAILED, f"The answer failed: {clean(chunk['error'].get('message'))}")
        told = told._replace(model=chunk.get("model") or told.model)
        tokens = (chunk.get("usage") or {}).get("completion_tokens")
        told = told._replace(answer_tokens=tokens or told.answer_tokens)
        for choice in chunk.get("choices") or []:
            told = told._replace(finish=choice.get("finish_reason") or told.finish)
            text = (choice.get("delta") or {}).get("content") or ""
            if text and told.first_token_s is None:
                told = told._replace(first_token_s=env.clock() - started_s)
            # A model may be made to write what would command a terminal.
            shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "?", text) if terminal else text
            env.stdout.write(shown)
            env.stdout.flush()
    return told


def _stream_lines(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """The lines of an answer. Raises HttpProblem if it breaks off."""
    while True:
        try:
            line = answer.readline()
        except (OSError, http.client.HTTPException) as problem:
            raise HttpProblem("unreachable", f"the answer broke off: {problem}") from None
        if not line:
            return
        yield line


def cmd_ask(env: Env, args: argparse.Namespace) -> Exit:
    """Asks one question and prints the answer as it comes."""
    try:
        question = env.stdin.read() if args.question == "-" else args.question
    except UnicodeDecodeError as problem:
        raise Problem(
            Exit.USAGE, f"Standard input is no text in {problem.encoding}: see LANG.") from None
    if not question.strip():
        raise Problem(Exit.USAGE, 'Ask something: ocp ask "Why is the sky blue?"')
    body = {
        "messages": [{"role": "user", "content": question}], "stream": True,
        "stream_options": {"include_usage": True}, **({"model": args.model} if args.model else {}),
    }
    server = find_server(env)
    path = "/v1/chat/completions"
    try:
        with server.open("POST", path, body, _ANSWER_TIMEOUT_S) as answer:
            told = tell(env, sse_data(_stream_lines(answer)))
    except HttpProblem as problem:
        raise server.explained(problem) from None
    except ValueError:
        raise Problem(
            Exit.FAILED, f"{server.url}{path} sent something that is no answer.") from None
    env.stdout.write("\n")
    if not told.finish:
        raise Problem(Exit.FAILED, "The answer broke off before its end.")
    if told.finish != "stop":
        env.note(f"(the answer ended early: {clean(told.finish)})")
    if is_terminal(env.stderr) and told.first_token_s is not None:
        tokens = f", {told.answer_tokens} tokens" if told.answer_tokens else ""
        env.note(f"({clean(told.model)}, first token after {told.first_token_s:.2f} s{tokens})")
    return Exit.OK


def show_lan(answer: Json, look: Look) -> str:
    """Where other devices find the server, and whether they reach it."""
    rows = [
        ("API", f"{answer['url']}/v1"), ("dashboard", f"{answer['url']}/dashboard"),
        ("access mode", answer.get("authMode")),
        ("reachable", "yes" if answer["reachable"] else "no"),
    ]
    if not answer["reachable"]:
        rows.append(("to change that", "install again with --bind 0.0.0.0 and --auth-mode multi"))
    elif answer.get("authMode") == "none":
        rows.append(("attention", "whoever can connect may use your plan: set --auth-mode multi"))
    else:
        rows.append(("on a device", connect_words(answer["url"])))
    return fields(rows)


def cmd_lan(env: Env, args: argparse.Namespace) -> Exit:
    """The address for other devices. FAILED when they cannot reach it."""
    server = find_server(env)
    health = server.json("GET", "/health", timeout_s=5.0)
    url = lan_url(env, server.url)
    if not url:
        raise Problem(Exit.FAILED, "This machine has no address in a network.")
    found = {
        "host": urllib.parse.urlsplit(url).hostname, "url": url,
        "authMode": health.get("authMode"), "reachable": answers(url),
    }
    env.say(json.dumps(found) if args.json else show_lan(found, look_of(env)))
    return Exit.OK if found["reachable"] else Exit.FAILED


def connect_command(env: Env, *words: str) -> list[str]:
    """What runs ocp_connect.py. Raises Problem where it is not."""
    script = os.path.join(env.tree, "ocp_connect.py")
    if not os.path.exists(script):
        raise Problem(
            Exit.FAILED,
            f"{script} is not there. Copy ocp_connect.py from the server's checkout of OCP beside "
            "this ocp.py, or run it by itself: python3 ocp_connect.py HOST",
        )
    return [sys.executable, script, *words]


def _attached(env: Env, command: Sequence[str]) -> Exit:
    """The exit code of a command that speaks for itself. Raises Problem."""
    ran = env.run(command, environ=env.environ, attached=True)
    if ran.code is None:
        raise Problem(Exit.FAILED, ran.complaint)
    return Exit(ran.code) if ran.code in set(Exit) else Exit.FAILED


def cmd_connect(env: Env, args: argparse.Namespace) -> Exit:
    """Runs ocp_connect.py, which sets up the tools of this machine for a server."""
    return _attached(env, connect_command(env, *args.rest))


def cmd_sync(env: Env, args: argparse.Namespace) -> Exit:
    """Brings the models that OpenClaw lists for the server up to date."""
    more = ["--dry-run"] if args.dry_run else []
    more += ["--json"] if args.json else []
    return _attached(env, connect_command(env, "--sync", with_port(server_url(env)), *more))


_OPENCLAW_FIELDS = {"openclaw", "providers", "diff", "written", "failures"}


def openclaw_state(env: Env, url: str, *more: str) -> Json:
    """What OpenClaw knows of the server: {openclaw, providers, diff, written, failures}, where
    `openclaw` is whether it is here. Its list of models is brought up to date unless `more` says
    --dry-run. Raises Problem."""
    command = connect_command(env, "--sync", with_port(url), "--json", *more)
    ran = env.run(command, environ=env.environ, timeout_s=180.0)
    with contextlib.suppress(ValueError):
        found = json.loads(ran.output)
        if isinstance(found, dict) and found.keys() >= _OPENCLAW_FIELDS:
            return found
    raise Problem(Exit.FAILED, ran.complaint)


# ==== 7. Service =============================================================
# Starting and stopping go through the service that the installer recorded. Whether it worked is
# measured, never believed: the server that answers afterwards must be younger than the restart.
# A process that nobody recorded is left alone; the user is told the command.


class Step(NamedTuple):
    """One command of a service manager, with {label}, {unit} and {domain} to be filled in."""

    words: tuple[str, ...]
    may_fail: bool = False
    tries: int = 1


def _systemctl(*options: str) -> dict[str, tuple[Step, ...]]:
    verbs = ("start", "stop", "restart")
    return {verb: (Step(("systemctl", *options, verb, "--", "{label}")),) for verb in verbs}


_BOOTSTRAP = ("launchctl", "bootstrap", "{domain}", "{unit}")
_BOOTOUT = ("launchctl", "bootout", "{domain}/{label}")
#: Platform of the record, verb, steps. launchd reads a changed agent only at a bootstrap, which
#: fails for a while after a bootout, and always when the agent is loaded already.
SERVICE_STEPS: dict[str, dict[str, tuple[Step, ...]]] = {
    "systemd-user": _systemctl("--user"),
    "systemd-system": _systemctl(),
    "launchd": {
        "start": (
            Step(_BOOTSTRAP, may_fail=True),
            Step(("launchctl", "kickstart", "{domain}/{label}")),
        ),
        "stop": (Step(_BOOTOUT),),
        "restart": (Step(_BOOTOUT, may_fail=True), Step(_BOOTSTRAP, tries=4)),
    },
}


def launchd_domain(record: Record, user_id: int) -> str:
    """Where launchd has the service of a record: the session on the screen, or the user's."""
    return record.domain or f"gui/{user_id}"


def service_steps(record: Record, verb: str, user_id: int) -> list[Step]:
    """The steps of start, stop or restart for a recorded service; none if there is none."""
    if not re.fullmatch(r"[A-Za-z0-9_.@:][A-Za-z0-9_.@:-]*", record.label):
        return []
    domain = launchd_domain(record, user_id)
    values = {"label": record.label, "unit": record.unit_path, "domain": domain}
    steps = SERVICE_STEPS.get(record.platform, {}).get(verb, ())
    return [s._replace(words=tuple(word.format(**values) for word in s.words)) for s in steps]


def service_words(record: Record, verb: str, user_id: int) -> list[str]:
    """The same steps as lines for a shell."""
    sudo = "sudo " if record.platform == "systemd-system" and user_id != 0 else ""
    return [sudo + shlex.join(step.words) for step in service_steps(record, verb, user_id)]


class Owner(NamedTuple):
    """Who listens on a port. No pid: somebody whom only another user may see."""

    pid: int | None
    command: str

    @property
    def is_ocp(self) -> bool:
        """Whether it is an OCP server."""
        return bool(re.search(r"(^|[/\s])ocp_server\.py(\s|$)", self.command))

    @property
    def words(self) -> str:
        """What it is called in a message."""
        if self.pid is None:
            return "a process of another user"
        return f"process {self.pid} ({clean(self.command)[:80] or 'which hides its name'})"


def _command_of(env: Env, pid: int) -> str:
    """The command line of a process, empty if it cannot be seen."""
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().rstrip(b"\0").replace(b"\0", b" ").decode("utf-8", "replace")
    ran = env.command("ps", "-o", "command=", "-p", str(pid))
    return ran.output.strip() if ran.code == 0 else ""


def _listeners_in_proc(port: int) -> set[str]:
    """The inodes of the sockets that listen on a port, as Linux lists them."""
    inodes = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            with open(f"/proc/net/{name}", encoding="ascii") as file:
                for words in (line.split() for line in list(file)[1:]):
                    # 0A is the state of a socket that listens.
                    if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port:
                        inodes.add(words[9])
    return inodes


def _owner_in_proc(env: Env, port: int) -> Owner | None:
    links = {f"socket:[{inode}]" for inode in _listeners_in_proc(port)}
    if not links:
        return None
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{name}") in links:
                        return Owner(int(pid), _command_of(env, int(pid)))
    return Owner(None, "")


def port_owner(env: Env, port: int) -> Owner | None:
    """Who listens on a TCP port of this machine; None for nobody. Raises OSError if that cannot
    be found out, which is not the same."""
    if env.platform.startswith("linux"):
        ran = env.command("ss", "-H", "-ltnp", f"sport = :{port}")
        if ran.code != 0:
            return _owner_in_proc(env, port)
        found = re.search(r"pid=(\d+)", ran.output)
        if not ran.output.strip():
            return None
    else:
        # macOS keeps it where a service's PATH does not lead.
        where = env.environ.get("PATH", os.defpath) + ":/usr/sbin"
        words = ("lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fp")
        ran = env.command(*words, more={"PATH": where})
        # lsof ends with 1 for "nobody" and for "not allowed"; only the first says nothing.
        if ran.code == 1 and not ran.output.strip() and not ran.error.strip():
            return None
        found = re.search(r"^p(\d+)$", ran.output, re.M)
        if ran.code != 0 and not found:
            raise OSError(f"lsof: {ran.complaint}")
    pid = int(found[1]) if found else None
    return Owner(pid, _command_of(env, pid) if pid else "")


def _unit_of(pid: int) -> tuple[str, str] | None:
    """The systemd unit that a process belongs to: ("--user " or "", name)."""
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
            path = file.read().strip().rpartition(":")[2]
        name = path.rpartition("/")[2]
        if re.fullmatch(r"[A-Za-z0-9_.@:][A-Za-z0-9_.@:-]*\.service", name):
            return ("--user " if "/user@" in path else "", name)
    return None


def _by_hand(env: Env, verb: str, owner: Owner) -> str:
    """The command that does to an unrecorded server what the user wants."""
    unit = _unit_of(owner.pid) if owner.pid else None
    if unit:
        return f"systemctl {unit[0]}{verb} {unit[1]}"
    again = f"{shlex.quote(sys.executable)} {shlex.quote(os.path.join(env.tree, 'ocp_server.py'))}"
    return f"kill {owner.pid}" + (f", and then {again}" if verb == "restart" else "")


def _without_record(env: Env, verb: str) -> Exit:
    """What start, stop and restart come to when no service is recorded: words, and no deed."""
    url = server_url(env)
    if not is_this_machine(url):
        raise Problem(Exit.FAILED, f"{url} is another machine: run `ocp {verb}` there.")
    port = urllib.parse.urlsplit(url).port or 80
    try:
        owner = port_owner(env, port)
    except OSError as problem:
        raise Problem(
            Exit.FAILED, f"No service is recorded, and who owns port {port} is unknown: {problem}."
        ) from None
    if owner is None and verb == "stop":
        env.say(f"Nothing listens on port {port}.")
        return Exit.OK
    script = shlex.quote(os.path.join(env.tree, "ocp_server.py"))
    if owner is None:
        raise Problem(
            Exit.FAILED,
            f"No service is installed. Run the server by hand: {sys.executable} {script}\n"
            f"or make it a service: {sys.executable} "
            f"{shlex.quote(os.path.join(env.tree, 'setup.py_install.py'))}",
        )
    if not owner.is_ocp:
        raise Problem(
            Exit.FAILED,
            f"Port {port} belongs to {owner.words}, which is no OCP server and is left alone.\n"
            "Give OCP another port with CLAUDE_PROXY_PORT.",
        )
    if verb == "start":
        env.say(f"Already running: {owner.words} owns port {port}.")
        return Exit.OK
    raise Problem(
        Exit.FAILED,
        f"No service is recorded; {owner.words} serves port {port} and was started otherwise.\n"
        f"To {verb} it: {_by_hand(env, verb, owner)}",
    )


def run_service(env: Env, record: Record, verb: str) -> str:
    """Runs the steps of a recorded service; what the last failing one complained of, or "".

    Raises Problem if this user may not do that.
    """
    lines = service_words(record, verb, env.user_id)
    if record.platform == "systemd-system" and env.user_id != 0:
        raise Problem(Exit.DENIED, f"The service belongs to the system. Run: {lines[0]}")
    more = {}
    bus = f"/run/user/{env.user_id}"
    # A login through su or cron has no such variable, and systemctl finds no bus without it.
    if "XDG_RUNTIME_DIR" not in env.environ and os.path.isdir(bus):
        more["XDG_RUNTIME_DIR"] = bus
    for step in service_steps(record, verb, env.user_id):
        for attempt in range(step.tries):
            if attempt:
                env.sleep(float(attempt))
            ran = env.command(*step.words, timeout_s=90, more=more)
            if ran.code == 0:
                break
        if ran.code != 0 and not step.may_fail:
            return f"{shlex.join(step.words)}: {ran.complaint}"
    return ""


def health_of(url: str) -> Json | None:
    """What /health says; None if nobody answers there. Raises Problem for another program."""
    try:
        health = http_json("GET", url + "/health", timeout_s=3.0, tls=tls_for(url))
    except HttpProblem as problem:
        if problem.kind == "unreachable":
            return None
        health = None
    if not isinstance(health, dict) or "version" not in health or "status" not in health:
        raise Problem(Exit.FAILED, f"What answers at {url} is no OCP server.")
    return health


def tree_version(server_path: str) -> str:
    """The version of an ocp_server.py on disk; empty if it cannot be told."""
    try:
        with open(server_path, encoding="utf-8") as file:
            found = re.search(r'^VERSION = "([^"]+)"', file.read(), re.M)
    except (OSError, ValueError):
        return ""
    return found[1] if found else ""


def version_tuple(text: object) -> tuple[int, ...]:
    """A version as numbers, for comparing; empty for what is none."""
    found = re.fullmatch(r"v?(\d{1,6})\.(\d{1,6})\.(\d{1,6})", str(text).strip())
    return tuple(int(part) for part in found.groups()) if found else ()


_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.2


def await_server(env: Env, url: str, version: str, since_s: float | None) -> str:
    """Waits until a server of this version, not older than `since_s`, answers; "" if one does,
    else what is wrong."""
    deadline_s = env.clock() + _START_TIMEOUT_S
    with working(env, f"waiting for the server at {url}"):
        while True:
            wrong, may_change = _look_at_server(env, url, version, since_s)
            if not wrong or not may_change or env.clock() >= deadline_s:
                return wrong
            env.sleep(_POLL_S)


def _look_at_server(
    env: Env, url: str, version: str, since_s: float | None
) -> tuple[str, bool]:
    """What is wrong at this moment, and whether it may be otherwise at the next."""
    try:
        health = health_of(url)
    except Problem as problem:
        return str(problem), True
    if health is None:
        return "it does not answer", True
    born_s = env.clock() - (health.get("uptime") or 0) / 1000
    if since_s is not None and born_s < since_s - 2:
        return "an older server than the one that was started answers", True
    if version and health["version"] != version:
        return f"version {clean(health['version'])} is served, not {version}", False
    return "", False


def _owner_words(env: Env, url: str) -> str:
    """One more sentence about the port, where it helps."""
    try:
        owner = port_owner(env, urllib.parse.urlsplit(url).port or 80)
    except OSError:
        return ""
    return f" The port belongs to {owner.words}." if owner else " Nobody listens on its port."


def _recorded(env: Env) -> Record | None:
    """The record, if there is a service in it."""
    record = read_record(env)
    return record if record and service_steps(record, "start", env.user_id) else None


def _start(env: Env, record: Record, verb: str) -> Exit:
    since_s = env.clock() if verb == "restart" else None
    complaint = run_service(env, record, verb)
    wrong = await_server(env, record.url, tree_version(record.server_path), since_s)
    if wrong:
        raise Problem(
            Exit.FAILED,
            f"The server did not come up as it should: {complaint or wrong}."
            f"{_owner_words(env, record.url)}\nSee `ocp doctor`.",
        )
    if complaint:
        env.note(f"The server answers, although this failed: {complaint}")
    health = health_of(record.url) or {}
    env.say(f"OCP {clean(health.get('version', '?'))} answers at {record.url}")
    return Exit.OK


def cmd_start(env: Env, args: argparse.Namespace) -> Exit:
    """Starts the service and waits until it answers."""
    record = _recorded(env)
    return _start(env, record, "start") if record else _without_record(env, "start")


def cmd_stop(env: Env, args: argparse.Namespace) -> Exit:
    """Stops the service and waits until nobody answers."""
    record = _recorded(env)
    if record is None:
        return _without_record(env, "stop")
    complaint = run_service(env, record, "stop")
    deadline_s = env.clock() + _STOP_TIMEOUT_S
    with working(env, "waiting for the server to end"):
        while health_of(record.url) is not None:
            if complaint or env.clock() >= deadline_s:
                raise Problem(
                    Exit.FAILED,
                    f"A server still answers at {record.url}."
                    f"{_owner_words(env, record.url)} {complaint}".rstrip(),
                )
            env.sleep(_POLL_S)
    env.say("stopped")
    return Exit.OK


def _restart_gateway(env: Env) -> Exit:
    """Restarts OpenClaw's gateway by its own command."""
    ran = env.command("openclaw", "gateway", "restart", timeout_s=120)
    if ran.code is None:
        raise Problem(Exit.FAILED, f"{ran.complaint}. Is OpenClaw installed, and on PATH?")
    if ran.output.strip():
        env.say("\n".join(clean(line) for line in ran.output.strip().splitlines()))
    if ran.code != 0:
        raise Problem(Exit.FAILED, f"openclaw gateway restart: {ran.complaint}")
    return Exit.OK


def cmd_restart(env: Env, args: argparse.Namespace) -> Exit:
    """Restarts the service, or OpenClaw's gateway."""
    if args.what == "gateway":
        return _restart_gateway(env)
    record = _recorded(env)
    return _start(env, record, "restart") if record else _without_record(env, "restart")


# ==== 8. Checkout and snapshots ==============================================
# What an update stands on: git, asked without hooks and without questions; copies of all that an
# update could harm; and a journal, written before each step, by which the next call knows what
# an interrupted one had come to.

_RELEASE = re.compile(r"v\d{1,6}\.\d{1,6}\.\d{1,6}")


def _git_environ(env: Env) -> dict[str, str]:
    """The user's environment without what would lead git elsewhere, or make it ask."""
    elsewhere = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY")
    kept = {name: value for name, value in env.environ.items() if name not in elsewhere}
    ssh = kept.get("GIT_SSH_COMMAND", "ssh") + " -oBatchMode=yes"
    return {**kept, "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_SSH_COMMAND": ssh}


def git(env: Env, tree: str, *words: str, timeout_s: float = 60.0) -> str:
    """What git prints. Raises Problem with what it complains of."""
    command = ["git", "-C", tree, "-c", "core.hooksPath=/dev/null", "-c",
               "advice.detachedHead=false", *words]
    with working(env, f"waiting for git {words[0]}"):
        ran = env.run(command, environ=_git_environ(env), timeout_s=timeout_s)
    if ran.code != 0:
        raise Problem(Exit.FAILED, f"git {words[0]} in {tree} failed: {ran.complaint}")
    return ran.output.strip()


def git_tree(env: Env) -> str:
    """The checkout that this script belongs to. Raises Problem if it is none."""
    tree = os.path.realpath(env.tree)
    try:
        top = git(env, tree, "rev-parse", "--show-toplevel")
    except Problem as problem:
        top, reason = "", str(problem)
    else:
        reason = f"it is part of {top}"
    if not top or os.path.realpath(top) != tree:
        raise Problem(
            Exit.FAILED,
            f"{tree} is no git checkout of OCP ({reason}), so it has to be updated by hand:\n"
            "put the files of the new release in its place, then run\n"
            f"  python3 {shlex.quote(os.path.join(tree, 'ocp_server.py'))} --check && ocp restart",
        )
    return tree


def local_changes(env: Env, tree: str) -> list[str]:
    """The tracked files that were changed here. Raises Problem."""
    lines = git(env, tree, "status", "--porcelain", "--untracked-files=no").splitlines()
    return [line[3:] if line[2:3] == " " else line.split(None, 1)[-1] for line in lines]


def remote_tags(env: Env, tree: str) -> dict[str, str]:
    """The releases that the remote offers now: tag and commit. Raises Problem.

    The remote is asked each time: a release that was withdrawn must not be offered.
    """
    listed = git(env, tree, "ls-remote", "--tags", "origin", timeout_s=15)
    found: dict[str, str] = {}
    for line in listed.splitlines():
        commit, _, name = line.partition("\t")
        name, _, peeled = name.removeprefix("refs/tags/").partition("^")
        # An annotated tag is listed twice, the second time with the commit that it stands for.
        if _RELEASE.fullmatch(name) and (peeled or name not in found):
            found[name] = commit
    return found


def _unit_environ(path: str) -> dict[str, str]:
    """The variables that a unit file or a launch agent sets."""
    if path.endswith(".plist"):
        with open(path, "rb") as file:
            values = plistlib.load(file).get("EnvironmentVariables") or {}
        return {str(name): str(value) for name, value in values.items()}
    found: dict[str, str] = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.startswith("Environment="):
                words = shlex.split(line.partition("=")[2])
                pairs = (each.replace("%%", "%").partition("=") for each in words)
                found.update({name: value for name, equals, value in pairs if equals})
    return found


def _file_environ(path: str) -> dict[str, str]:
    """The variables of an environment file."""
    found: dict[str, str] = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            name, equals, value = line.strip().partition("=")
            if equals and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                with contextlib.suppress(ValueError):
                    value = " ".join(shlex.split(value))
                found[name] = value
    return found


def service_environ(env: Env, record: Record | None) -> dict[str, str]:
    """The environment in which the server runs, as far as it is written down."""
    if record is None:
        return dict(env.environ)
    ours = ("CLAUDE_", "OCP_", "PROXY_")
    found = {name: value for name, value in env.environ.items() if not name.startswith(ours)}
    for path, read in ((record.unit_path, _unit_environ), (record.env_file, _file_environ)):
        with contextlib.suppress(OSError, ValueError, plistlib.InvalidFileException):
            found.update(read(path) if path else {})
    known = {"CLAUDE_PROXY_PORT": str(record.port), "CLAUDE_BIND": record.bind,
             "OCP_HOME": record.data_dir}
    return {**{name: value for name, value in known.items() if value}, **found}


#: For a database that nobody else has open: reading it leaves no other files beside it.
_READ_COPY = "ro&immutable=1"


def open_database(path: str, mode: str) -> sqlite3.Connection:
    """A connection in mode ro, rw or _READ_COPY. Raises sqlite3.Error."""
    address = f"file:{urllib.parse.quote(path)}?mode={mode}"
    return sqlite3.connect(address, uri=True, timeout=5)


def database_version(path: str, mode: str = "ro") -> int | None:
    """The number of the last migration that a database has seen; None if it cannot be told."""
    try:
        with contextlib.closing(open_database(path, mode)) as connection:
            return int(connection.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.Error:
        return None


def save_database(source: str, target: str) -> None:
    """Copies a database that may be in use, as it is at one moment. Raises Problem."""
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with contextlib.closing(open_database(source, "ro")) as opened:
            with contextlib.closing(open_database(target, "rw")) as copy:
                opened.backup(copy)
    except sqlite3.Error as problem:
        raise Problem(
            Exit.FAILED, f"{source} cannot be saved ({problem}), so nothing was changed. "
            "See `ocp doctor`.",
        ) from None


class Journal(NamedTuple):
    """What an update is about and how far it has come."""

    #: The step that has begun: see OPEN_STATES and CLOSED_STATES.
    state: str
    tree: str
    data_dir: str
    from_commit: str
    #: The branch that was checked out; empty for none.
    from_branch: str
    from_version: str
    to_commit: str
    to_version: str
    started_at: str
    #: Whether undoing has to overwrite files, because a checkout was cut off half-way.
    is_torn: bool = False
    #: Whether undoing has to put the database back, because the new version changed its form.
    restore_database: bool = False


#: prepared: nothing is changed yet. switching: the checkout may be half done. switched: the new
#: version is there, and not yet seen at work. undoing: on the way back.
OPEN_STATES = ("prepared", "switching", "switched", "undoing")
#: done: the new version answered. refused: nothing was changed. undone: the old one is back.
CLOSED_STATES = ("done", "refused", "undone")
_SNAPSHOTS_KEPT = 5
_JOURNAL = "journal.json"


class Snapshot(NamedTuple):
    """A folder with copies, and its journal."""

    folder: str
    journal: Journal

    def at(self, state: str, **changes: Any) -> Snapshot:
        """The same in another state, which is written down before this returns."""
        journal = self.journal._replace(state=state, **changes)
        text = json.dumps(journal._asdict(), indent=2) + "\n"
        write_whole(os.path.join(self.folder, _JOURNAL), text.encode())
        return self._replace(journal=journal)

    def path(self, name: str) -> str:
        """Where a copy lies."""
        return os.path.join(self.folder, name)


def snapshots_folder(env: Env) -> str:
    """Where snapshots are kept."""
    return os.path.join(env.ocp_home, "snapshots")


def read_snapshots(env: Env) -> list[Snapshot]:
    """All snapshots, the newest first; folders without a readable journal are none."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(snapshots_folder(env)), reverse=True):
            folder = os.path.join(snapshots_folder(env), name)
            with contextlib.suppress(OSError, ValueError, TypeError):
                with open(os.path.join(folder, _JOURNAL), encoding="utf-8") as file:
                    journal = Journal(**json.load(file))
                if not name.endswith(".partial"):
                    found.append(Snapshot(folder, journal))
    return found


def saved_files(env: Env, record: Record | None) -> dict[str, str]:
    """Name in the snapshot, and path of the file, for all that is copied as it is."""
    found = {
        "install.json": record_path(env), "models.json": os.path.join(env.tree, "models.json"),
        "ocp.py": os.path.join(env.tree, "ocp.py"),
        "admin-key": os.path.join(record.data_dir if record else env.ocp_home, "admin-key"),
    }
    if record:
        found.update({"unit": record.unit_path, "environment": record.env_file})
    return {name: path for name, path in found.items() if path}


def take_snapshot(env: Env, journal: Journal, record: Record | None) -> Snapshot:
    """Copies all that an update could harm. Until it is complete it has another name, so that a
    cut-off one is never taken for a snapshot. Raises Problem, OSError."""
    moment = datetime.datetime.fromtimestamp(env.clock(), datetime.timezone.utc)
    folder = os.path.join(snapshots_folder(env), moment.strftime("%Y%m%dT%H%M%S.%fZ"))
    draft = Snapshot(folder + ".partial", journal)
    os.makedirs(draft.folder, mode=0o700)
    database = os.path.join(journal.data_dir, "ocp.db")
    if os.path.exists(database):
        save_database(database, draft.path("ocp.db"))
    for name, path in saved_files(env, record).items():
        if os.path.isfile(path):
            with open(path, "rb") as file:
                write_whole(draft.path(name), file.read())
    with contextlib.suppress(Problem):
        settings = find_server(env).text("GET", "/settings", timeout_s=5)
        write_whole(draft.path("settings.json"), settings.encode())
    draft.at(journal.state)
    os.rename(draft.folder, folder)
    return Snapshot(folder, journal)


def prune_snapshots(env: Env) -> None:
    """Removes old snapshots, and what a power cut left of unfinished ones."""
    closed = [s for s in read_snapshots(env) if s.journal.state in CLOSED_STATES]
    unfinished = []
    with contextlib.suppress(FileNotFoundError):
        names = os.listdir(snapshots_folder(env))
        unfinished = [name for name in names if name.endswith(".partial")]
    for folder in [s.folder for s in closed[_SNAPSHOTS_KEPT:]] + [
            os.path.join(snapshots_folder(env), name) for name in unfinished]:
        shutil.rmtree(folder, ignore_errors=True)


def put_back_database(snapshot: Snapshot) -> None:
    """Puts the saved database in the place of the present one, which is kept in the snapshot.

    The server must not be running. The order matters: a write-ahead log that is left beside
    another database would be played into it. Where none was saved there was none.
    """
    database = os.path.join(snapshot.journal.data_dir, "ocp.db")
    for suffix in ("", "-wal", "-shm"):
        kept = snapshot.path("newer-ocp.db" + suffix)
        if os.path.exists(database + suffix):
            # What an interrupted call has put away is the one to keep.
            if os.path.exists(kept):
                os.unlink(database + suffix)
            else:
                os.replace(database + suffix, kept)
    if os.path.exists(snapshot.path("ocp.db")):
        with open(snapshot.path("ocp.db"), "rb") as file:
            write_whole(database, file.read())


def put_back_files(env: Env, snapshot: Snapshot, record: Record | None) -> None:
    """Puts back what has gone missing since; a file that is there is newer, and stays."""
    for name, path in saved_files(env, record).items():
        if os.path.exists(snapshot.path(name)) and not os.path.exists(path):
            if os.path.isdir(os.path.dirname(path)):
                with open(snapshot.path(name), "rb") as file:
                    write_whole(path, file.read())


# ==== 9. Doctor ==============================================================
# A table of checks. Each looks at one thing and says PASS, WARN, FAIL, or INFO, which is also
# what it says when it could not look: that is never a failure. The first check with something
# to do gives the next action, so the order of the table is the order of repairs.

OLDEST_CLAUDE = (2, 1, 197)
#: From this version on claude-code asks for Node 22. Under an older Node npm says nothing and
#: installs the newest one before it.
_NODE_22_SINCE = (2, 1, 198)
_CLAUDE_PLACES = (
    "~/.local/bin", "~/.claude/local", "/opt/homebrew/bin", "/usr/local/bin", "/usr/bin",
    "~/.npm-global/bin", "~/.bun/bin",
)
_LEAST_FREE_BYTES = 100_000_000
_LOW_FREE_BYTES = 1_000_000_000
_CLOCK_SKEW_S = 120.0


class Finding(NamedTuple):
    """What a check found."""

    level: str
    message: str


class Fix(NamedTuple):
    """What to do about a finding: by a person, and by commands that may run unattended."""

    kind: str
    human: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


class Check(NamedTuple):
    """One row of the table. What it looks at is the probe's docstring."""

    id: str
    probe: Callable[[Facts], Finding]
    fix: Callable[[Facts], Fix]


class Facts:
    """What the checks look at, each thing looked up once and only when it is wanted."""

    def __init__(self, env: Env) -> None:
        self.env = env

    @functools.cached_property
    def record(self) -> Record | None:
        """The installation. Raises Problem."""
        return read_record(self.env)

    @property
    def known(self) -> Record | None:
        """The installation, None also when its record is broken."""
        with contextlib.suppress(Problem):
            return self.record
        return None

    @property
    def service(self) -> Record | None:
        """The installation, if it has a service."""
        record = self.known
        has_service = record and service_steps(record, "start", self.env.user_id)
        return record if has_service else None

    @functools.cached_property
    def url(self) -> str:
        """The server's address, the usual one when nothing readable says otherwise."""
        with contextlib.suppress(Problem):
            return server_url(self.env)
        return DEFAULT_URL

    @functools.cached_property
    def answer(self) -> tuple[Json | None, float | None, str]:
        """From /health: the answer, the server's clock as epoch seconds, and what went wrong."""
        try:
            tls = tls_for(self.url)
            with http_open("GET", self.url + "/health", timeout_s=3.0, tls=tls) as answer:
                value = json.loads(answer.read())
                date = answer.headers.get("Date", "")
        except HttpProblem as problem:
            if problem.kind == "unreachable":
                return None, None, f"nobody answers at {self.url}: {problem}"
            return None, None, f"{self.url} answered {problem.status}"
        except (OSError, http.client.HTTPException, ValueError):
            value, date = None, ""
        if not isinstance(value, dict) or "version" not in value:
            return None, None, f"what answers at {self.url} is no OCP server"
        try:
            clock_s: float | None = email.utils.parsedate_to_datetime(date).timestamp()
        except (TypeError, ValueError):
            clock_s = None
        return value, clock_s, ""

    @property
    def health(self) -> Json:
        """What /health says, {} if it says nothing."""
        return self.answer[0] or {}

    @property
    def server_path(self) -> str:
        """The server that should be running."""
        record = self.known
        path = record.server_path if record else ""
        return path or os.path.join(self.env.tree, "ocp_server.py")

    @property
    def data_dir(self) -> str:
        """The folder of the server's state."""
        record = self.known
        return (record.data_dir if record else "") or self.env.ocp_home

    @functools.cached_property
    def version(self) -> str:
        """The version on disk."""
        return tree_version(self.server_path)

    @functools.cached_property
    def latest(self) -> tuple[str, str]:
        """The newest version that the remote offers, and if there is none, why."""
        try:
            tags = remote_tags(self.env, git_tree(self.env))
        except Problem as problem:
            return "", str(problem).splitlines()[0]
        return max(tags, key=version_tuple, default=""), "the remote has no release"

    @functools.cached_property
    def claude_version(self) -> str:
        """Return what claude says that its version is, "" where it says nothing of use."""
        text = self.health.get("claudeVersion")
        if not text and self.claude:
            environ = {"DISABLE_AUTOUPDATER": "1"}
            ran = self.env.command(self.claude, "--version", timeout_s=20, more=environ)
            text = ran.output.split()[0] if ran.code == 0 and ran.output.split() else None
        return str(text) if version_tuple(text) else ""

    @functools.cached_property
    def claude(self) -> str | None:
        """Where the claude program is, as far as this user's surroundings tell."""
        environ = service_environ(self.env, self.known)
        named = environ.get("CLAUDE_BIN", "").strip()
        if named:
            return named if os.access(named, os.X_OK) else None
        places = [place.replace("~", self.env.home, 1) for place in _CLAUDE_PLACES]
        return shutil.which("claude", path=os.pathsep.join([environ.get("PATH", ""), *places]))


def _check_python(facts: Facts) -> Finding:
    """The Python that runs this, and the one of the service."""
    version = sys.version.split()[0]
    python = facts.known.python if facts.known else ""
    if python and not os.access(python, os.X_OK):
        return Finding("FAIL", f"the service's Python is gone: {python}")
    return Finding("PASS", f"Python {version}")


def _check_record(facts: Facts) -> Finding:
    """The installer's record and the server that it names."""
    try:
        record = facts.record
    except Problem as problem:
        return Finding("FAIL", str(problem))
    if record is None:
        return Finding("INFO", "nothing was installed; the server is run by hand")
    if record.server_path and not os.path.exists(record.server_path):
        return Finding("FAIL", f"the installed server is gone: {record.server_path}")
    return Finding("PASS", f"installed in {os.path.dirname(record.server_path) or '?'}")


def _check_claude(facts: Facts) -> Finding:
    """Whether the server finds the claude program."""
    usable = facts.health.get("claudeBinaryOk")
    if usable:
        return Finding("PASS", "the server can run claude")
    if usable is False:
        return Finding("FAIL", f"the server cannot run claude: {facts.health.get('fix') or ''}")
    if not is_this_machine(facts.url):
        return Finding("INFO", f"could not check: {facts.url} is another machine")
    if facts.claude is None:
        return Finding("FAIL", "the claude program is not installed where the server looks")
    return Finding("PASS", facts.claude)


def _check_claude_version(facts: Facts) -> Finding:
    """Whether claude is new enough."""
    text = facts.claude_version
    if not text:
        return Finding("INFO", "could not check: claude did not tell its version")
    if version_tuple(text) < OLDEST_CLAUDE:
        return Finding("FAIL", f"claude {text} is older than {_dotted(OLDEST_CLAUDE)}")
    return Finding("PASS", f"claude {text}")


def _check_node(facts: Facts) -> Finding:
    """Whether Node is too old for npm to install a new claude."""
    if not is_this_machine(facts.url):
        return Finding("INFO", f"could not check: {facts.url} is another machine")
    ran = facts.env.command("node", "--version")
    text = ran.output.strip()
    if ran.code != 0 or not version_tuple(text):
        return Finding("INFO", "does not apply: there is no Node on the PATH")
    if version_tuple(text) >= (22,):
        return Finding("PASS", f"Node {text[1:]}")
    claude = version_tuple(facts.claude_version)
    if claude and claude < _NODE_22_SINCE:
        return Finding("WARN", f"claude {_dotted(claude)} is old: under Node {text[1:]}, which is "
                               "older than 22, npm installs no newer one and does not say so")
    return Finding("PASS", f"Node {text[1:]}; npm installs a new claude only by @latest")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)


def _check_service(facts: Facts) -> Finding:
    """Whether an OCP server answers."""
    health, _, wrong = facts.answer
    if health is None:
        return Finding("FAIL", wrong)
    if health.get("status") == "draining":
        return Finding("WARN", "the server is shutting down")
    return Finding("PASS", f"OCP {health['version']} answers at {facts.url}")


def _check_login(facts: Facts) -> Finding:
    """What the last answer told about the login."""
    if not facts.health:
        return Finding("INFO", "could not check: the server does not run")
    auth = facts.health.get("auth") or {}
    if auth.get("ok") is True and facts.health.get("ownerHidden") is not False:
        return Finding("PASS", "the last answer proved the login")
    if auth.get("ok") is False:
        return Finding("FAIL", f"the login was refused: {auth.get('message') or ''}".rstrip(": "))
    if facts.health.get("ownerHidden") is False:
        return Finding("WARN", "claude tells its models the owner's e-mail address: see the log")
    return Finding("INFO", "not known before the first answer; `ocp ask hello` gets one")


def _check_port(facts: Facts) -> Finding:
    """Who owns the server's port."""
    if not is_this_machine(facts.url):
        return Finding("INFO", f"could not check: {facts.url} is another machine")
    port = urllib.parse.urlsplit(facts.url).port or 80
    owner = port_owner(facts.env, port)
    if owner is None:
        return Finding("INFO", f"nobody listens on port {port}")
    if owner.pid is None or not owner.command:
        return Finding("INFO", f"could not check: port {port} belongs to {owner.words}")
    if not owner.is_ocp:
        # What forwards a port, as containers do, is somebody else and all the same in order.
        level = "INFO" if facts.health else "FAIL"
        return Finding(level, f"port {port} belongs to {owner.words}")
    return Finding("PASS", f"port {port} belongs to process {owner.pid}")


def _check_served_version(facts: Facts) -> Finding:
    """Whether the installed version is the one that runs."""
    served = facts.health.get("version")
    if not served or not facts.version:
        return Finding("INFO", "could not check: " + (
            "the server does not run" if facts.version else f"no version in {facts.server_path}"))
    if served != facts.version:
        return Finding("WARN", f"{served} is running, {facts.version} is installed")
    return Finding("PASS", f"{served} is installed and running")


def _check_unit(facts: Facts) -> Finding:
    """Whether the service is there and starts by itself."""
    record = facts.service
    if record is None:
        return Finding("INFO", "no service is recorded")
    if record.unit_path and not os.path.exists(record.unit_path):
        return Finding("FAIL", f"the service's file is gone: {record.unit_path}")
    if record.platform == "launchd":
        domain = launchd_domain(record, facts.env.user_id)
        ran = facts.env.command("launchctl", "print", f"{domain}/{record.label}")
        if ran.code is None:
            return Finding("INFO", f"could not check: {ran.complaint}")
        return Finding("PASS" if ran.code == 0 else "WARN",
                       f"{record.label} is {'' if ran.code == 0 else 'not '}loaded")
    scope = ("--user",) if record.platform == "systemd-user" else ()
    ran = facts.env.command("systemctl", *scope, "is-enabled", "--", record.label)
    state = ran.output.strip()
    if not state:
        return Finding("INFO", f"could not check: {ran.complaint}")
    return Finding("PASS" if state == "enabled" else "WARN", f"{record.label} is {clean(state)}")


def _check_linger(facts: Facts) -> Finding:
    """Whether a service of a user outlives the login (systemd)."""
    record = facts.service
    if record is None or record.platform != "systemd-user":
        return Finding("INFO", "does not apply: no service of a user's systemd")
    ran = facts.env.command("loginctl", "show-user", str(facts.env.user_id), "-p", "Linger")
    state = ran.output.strip().rpartition("=")[2]
    if ran.code != 0 or state not in ("yes", "no"):
        return Finding("INFO", f"could not check: {ran.complaint}")
    if state == "no":
        return Finding("WARN", "the server stops when you log out, and does not start at boot")
    return Finding("PASS", "the server runs without a login session")


def _private_paths(facts: Facts) -> list[tuple[str, int]]:
    """Everything that nobody else may read, with its right mode."""
    folder, record = facts.data_dir, facts.known
    files = [os.path.join(folder, name) for name in (
        "ocp.db", "ocp.db-wal", "ocp.db-shm", "admin-key")]
    if record and record.env_file:
        files.append(record.env_file)
    return [(path, mode) for path, mode in [(folder, 0o700), *((file, 0o600) for file in files)]
            if os.path.exists(path)]


def _loose_paths(facts: Facts) -> list[tuple[str, int]]:
    return [(path, mode) for path, mode in _private_paths(facts)
            if stat.S_IMODE(os.stat(path).st_mode) & 0o077]


def _check_modes(facts: Facts) -> Finding:
    """Whether others may read the database, the keys or the environment file."""
    paths = _private_paths(facts)
    loose = [path for path, _ in _loose_paths(facts)]
    if loose:
        return Finding("FAIL", "others may read " + ", ".join(loose))
    return Finding("PASS" if paths else "INFO", f"{len(paths)} private files and folders looked at")


def _check_disk(facts: Facts) -> Finding:
    """How much room is left for the server's files."""
    folder = facts.data_dir
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    free_bytes = shutil.disk_usage(folder).free
    level = "FAIL" if free_bytes < _LEAST_FREE_BYTES else (
        "WARN" if free_bytes < _LOW_FREE_BYTES else "PASS")
    return Finding(level, f"{size_words(free_bytes)} free for {facts.data_dir}")


def _check_database(facts: Facts) -> Finding:
    """Whether the server writes to its database, and whether that is in order."""
    state, advice = facts.health.get("storage"), facts.health.get("storageFix")
    if advice:
        level = "WARN" if state == "behind" else "FAIL"
        return Finding(level, f"the server's storage is {state!r}, not 'disk': {advice}")
    path = os.path.join(facts.data_dir, "ocp.db")
    if not os.path.exists(path):
        return Finding("INFO", "there is no database yet")
    try:
        with contextlib.closing(open_database(path, "ro")) as connection:
            verdict = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.OperationalError as problem:
        return Finding("INFO", f"could not check: {problem}")
    except sqlite3.DatabaseError as problem:
        verdict = str(problem)
    if verdict != "ok":
        return Finding("FAIL", f"{path} is damaged: {verdict}")
    return Finding("PASS", f"{path} is in order, {size_words(os.path.getsize(path))}")


def _check_openclaw(facts: Facts) -> Finding:
    """Whether OpenClaw, if it is here, knows the same models."""
    try:
        found = openclaw_state(facts.env, facts.url, "--dry-run")
    except Problem as problem:
        return Finding("INFO", f"could not check: {problem}")
    if not found["openclaw"]:
        return Finding("INFO", "OpenClaw is not here")
    if not found["providers"]:
        return Finding("INFO", "OpenClaw is here, but does not use this server")
    if found["diff"]:
        return Finding("WARN", "OpenClaw's list of models is not that of models.json")
    return Finding("PASS", "OpenClaw knows the same models")


def _check_clock(facts: Facts) -> Finding:
    """Whether the server's clock and this one agree."""
    served_s = facts.answer[1]
    if served_s is None:
        return Finding("INFO", "could not check: the server told no time")
    skew_s = abs(served_s - facts.env.clock())
    level = "PASS" if skew_s <= _CLOCK_SKEW_S else "WARN"
    return Finding(level, f"{skew_s:.0f} s between the server's clock and this one")


def _check_latest(facts: Facts) -> Finding:
    """Whether there is a newer release."""
    latest, why_not = facts.latest
    if not latest:
        return Finding("INFO", f"could not check: {why_not}")
    if version_tuple(latest) > version_tuple(facts.version):
        return Finding("WARN", f"{latest} is there, {facts.version or '?'} is installed")
    return Finding("PASS", f"{facts.version} is the newest")


def _script(facts: Facts, name: str, *words: str) -> str:
    return shlex.join(["python3", os.path.join(facts.env.tree, name), *words])


def _fix_install(facts: Facts) -> Fix:
    script = "setup.py_install.py"
    if facts.known is None or facts.known.platform != "systemd-system":
        return Fix("fix_install", (), (_script(facts, script, "--yes"),))
    sudo = "sudo " if facts.env.user_id != 0 else ""
    return Fix("fix_install", (), (sudo + _script(facts, script, "--system", "--yes"),))


def _fix_claude(facts: Facts) -> Fix:
    return Fix(
        "fix_claude", ("then log in: run `claude auth login`",),
        ("npm install -g @anthropic-ai/claude-code@latest",),
    )


def _fix_claude_version(facts: Facts) -> Fix:
    return Fix("fix_claude", (), (shlex.join([facts.claude or "claude", "update"]),))


def _fix_node(facts: Facts) -> Fix:
    return Fix("fix_claude", ("or install Node 22 or later",),
               ("npm install -g @anthropic-ai/claude-code@latest",))


def _fix_login(facts: Facts) -> Fix:
    if (facts.health.get("auth") or {}).get("ok") is not False:
        return Fix("read_log", ("look for owner_not_hidden in `ocp logs 500`",), ())
    return Fix("fix_oauth", ("run `claude auth login` as the user of the server",), ())


def _fix_service(facts: Facts) -> Fix:
    record = facts.service
    if record is None:
        server = _script(facts, "ocp_server.py")
        return Fix("fix_service", (f"run it by hand: {server}",), _fix_install(facts).commands)
    return Fix("fix_service", (), tuple(service_words(record, "restart", facts.env.user_id)))


def _fix_restart(facts: Facts) -> Fix:
    if facts.service is None:
        return Fix("restart", ("end the server and start it again, as you started it",), ())
    return Fix("restart", (), tuple(service_words(facts.service, "restart", facts.env.user_id)))


def _fix_port(facts: Facts) -> Fix:
    return Fix("fix_port", (
        "end the other program, or install again with another --port",), ())


def _fix_linger(facts: Facts) -> Fix:
    return Fix("fix_linger", (), ("loginctl enable-linger",))


def _fix_modes(facts: Facts) -> Fix:
    commands = [shlex.join(["chmod", f"{mode:o}", path]) for path, mode in _loose_paths(facts)]
    return Fix("fix_modes", (), tuple(commands))


def _fix_disk(facts: Facts) -> Fix:
    return Fix("fix_disk", (f"make room on the disk of {facts.data_dir}",), ())


def _fix_database(facts: Facts) -> Fix:
    advice = facts.health.get("storageFix")
    if advice:
        return Fix("fix_database", (str(advice),), ())
    return Fix("fix_database", (
        f"stop the server and put back a copy of ocp.db from {snapshots_folder(facts.env)}, "
        "or move the damaged one away",), ())


def _fix_unit(facts: Facts) -> Fix:
    record = facts.service
    if record is None or not os.path.exists(record.unit_path):
        return _fix_install(facts)
    if record.platform == "launchd":
        return Fix("fix_unit", (), tuple(service_words(record, "start", facts.env.user_id)))
    scope = ["--user"] if record.platform == "systemd-user" else []
    words = shlex.join(["systemctl", *scope, "enable", "--", record.label])
    return Fix("fix_unit", (), (words if scope else f"sudo {words}",))


def _fix_openclaw(facts: Facts) -> Fix:
    return Fix("fix_openclaw", (), (_script(facts, "ocp.py", "sync"),))


def _fix_clock(facts: Facts) -> Fix:
    return Fix("fix_clock", ("set the clocks of both machines by the network",), ())


def _fix_update(facts: Facts) -> Fix:
    return Fix("update", (), (_script(facts, "ocp.py", "update", "--yes"),))


CHECKS = (
    Check("python", _check_python, _fix_install),
    Check("install_dir", _check_record, _fix_install),
    Check("claude_found", _check_claude, _fix_claude),
    Check("claude_version", _check_claude_version, _fix_claude_version),
    Check("node", _check_node, _fix_node),
    Check("disk_space", _check_disk, _fix_disk),
    Check("database", _check_database, _fix_database),
    Check("file_modes", _check_modes, _fix_modes),
    Check("port_owner", _check_port, _fix_port),
    Check("service_unit", _check_unit, _fix_unit),
    Check("service_running", _check_service, _fix_service),
    Check("oauth_ok", _check_login, _fix_login),
    Check("service_version_matches_tree", _check_served_version, _fix_restart),
    Check("linger", _check_linger, _fix_linger),
    Check("clock", _check_clock, _fix_clock),
    Check("openclaw_models", _check_openclaw, _fix_openclaw),
    Check("current_version", _check_latest, _fix_update),
)


def examine(check: Check, facts: Facts) -> Finding:
    """What a check finds. A check that cannot be made is INFO, whatever the reason."""
    try:
        return check.probe(facts)
    except (Problem, OSError) as problem:
        return Finding("INFO", f"could not check: {problem}".splitlines()[0])


def next_action(facts: Facts, findings: Sequence[tuple[Check, Finding]]) -> Json:
    """What to do first: about the first failure, else about the first warning, else nothing."""
    verify = _script(facts, "ocp.py", "doctor")
    for level in ("FAIL", "WARN"):
        for check, finding in findings:
            if finding.level == level:
                fix = check.fix(facts)
                return {
                    "kind": fix.kind, "human_required": list(fix.human),
                    "ai_executable": list(fix.commands), "verify": verify,
                }
    return {"kind": "noop", "human_required": [], "ai_executable": [], "verify": verify}


def _units(facts: Facts) -> list[Json] | None:
    record = facts.service
    if record is None:
        return None
    return [{
        "name": record.label, "scope": "system" if "-system" in record.platform else "user",
        "platform": record.platform, "port": record.port,
        "workingTree": os.path.dirname(record.server_path), "bind": record.bind,
        "user": None, "instanceName": facts.health.get("instanceName", ""),
    }]


def report(facts: Facts, findings: Sequence[tuple[Check, Finding]]) -> Json:
    """The whole examination as JSON."""
    levels = [finding.level for _, finding in findings]
    current = facts.version
    latest = max(facts.latest[0], f"v{current}", key=version_tuple)
    try:
        is_clean = not local_changes(facts.env, git_tree(facts.env))
    except Problem:
        is_clean = False
    now = datetime.datetime.fromtimestamp(facts.env.clock(), datetime.timezone.utc)
    return {
        "schema_version": "1", "timestamp": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "ready_to_upgrade": "FAIL" not in levels and is_clean,
        "install_dir": facts.env.tree, "install_dir_source": "script",
        "install_dir_safe_to_replace": is_clean,
        "current_version": f"v{current}" if current else None,
        "latest_version": latest if current else None,
        "from_version_supported": bool(current), "units": _units(facts),
        "fail_count": levels.count("FAIL"), "warn_count": levels.count("WARN"),
        "checks": [
            {"id": check.id, "level": finding.level, "message": clean(finding.message)}
            for check, finding in findings
        ],
        "next_action": next_action(facts, findings),
    }


_CHECK_COLOURS = {"PASS": "green", "WARN": "yellow", "FAIL": "red", "INFO": "dim"}


def show_doctor(answer: Json, look: Look) -> str:
    """The examination for people."""
    current, latest = answer["current_version"] or "unknown", answer["latest_version"] or "unknown"
    lines = [look.paint("bold", f"OCP {current}") + (
        "" if latest == current else f" -> {latest} is there")]
    for check in answer["checks"]:
        level = look.paint(_CHECK_COLOURS[check["level"]], f"[{check['level']}]")
        lines.append(f"  {level} {check['id']}: {check['message']}")
    lines += ["", f"{answer['fail_count']} failed, {answer['warn_count']} warnings"]
    action = answer["next_action"]
    if action["kind"] != "noop":
        lines.append(look.paint("bold", f"What to do next ({action['kind']}):"))
        lines += [f"  {line}" for line in [*action["ai_executable"], *action["human_required"]]]
        lines.append(f"and then: {action['verify']}")
    return "\n".join(lines)


def cmd_doctor(env: Env, args: argparse.Namespace) -> Exit:
    """Examines the installation. FAILED when a check fails."""
    facts = Facts(env)
    findings = [(check, examine(check, facts)) for check in CHECKS]
    answer = report(facts, findings)
    env.say(json.dumps(answer, indent=2) if args.json else show_doctor(answer, look_of(env)))
    return Exit.FAILED if answer["fail_count"] else Exit.OK


# ==== 10. Update =============================================================
# From one release to another and back. The order is the safety: save, test the new version where
# it harms nobody, switch, restart, ask what is served. Whatever goes wrong after the switch leads
# back by itself; whatever is interrupted is finished or undone by the next call.


@contextlib.contextmanager
def only_one(env: Env) -> Iterator[None]:
    """A block that one process at a time can be in. Raises Problem for a second one."""
    for folder in (env.ocp_home, snapshots_folder(env)):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    path = os.path.join(snapshots_folder(env), "lock")
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Problem(Exit.FAILED, "Another `ocp update` is running.") from None
        yield


def confirm(env: Env, args: argparse.Namespace, question: str) -> None:
    """Asks, unless --yes. Raises Problem for a no, and where nobody could be asked."""
    if args.yes:
        return
    if not is_terminal(env.stdin):
        raise Problem(Exit.USAGE, "Nobody is here to be asked: say --yes.")
    env.stdout.write(f"{question} [y/N] ")
    env.stdout.flush()
    if env.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Problem(Exit.FAILED, "Nothing was changed.")


def check_service(env: Env, tree: str) -> Record | None:
    """The service that has to be restarted. Raises Problem if this update could not do that."""
    record = _recorded(env)
    if record is None:
        return None
    if os.path.realpath(os.path.dirname(record.server_path)) != tree:
        raise Problem(
            Exit.FAILED,
            f"The service runs {record.server_path}, which is not in {tree}.\n"
            f"Update that one: python3 "
            f"{shlex.quote(os.path.join(os.path.dirname(record.server_path), 'ocp.py'))} update",
        )
    if record.platform == "systemd-system" and env.user_id != 0:
        words = ["sudo", f"OCP_HOME={env.ocp_home}", "python3", os.path.join(tree, "ocp.py")]
        raise Problem(
            Exit.DENIED, f"The service belongs to the system. Run: {shlex.join(words)} update"
        )
    return record


def make_plan(env: Env, tree: str, target: str | None) -> Journal | None:
    """From what to what; None when there is nothing newer. Raises Problem."""
    tags = remote_tags(env, tree)
    current = tree_version(os.path.join(tree, "ocp_server.py"))
    if not version_tuple(current):
        raise Problem(Exit.FAILED, f"The version of {tree} cannot be told.")
    if target is not None and not _RELEASE.fullmatch("v" + target.removeprefix("v")):
        raise Problem(Exit.USAGE, f"{clean(target)!r} is no version such as v1.2.3.")
    wanted = max(tags, key=version_tuple, default="")
    if target is not None:
        wanted = "v" + target.removeprefix("v")
        if wanted not in tags:
            raise Problem(Exit.FAILED, f"There is no release {wanted}: see `ocp update --check`.")
        if version_tuple(wanted) < version_tuple(current):
            raise Problem(
                Exit.FAILED, f"{wanted} is older than {current}; `ocp update --rollback` goes back."
            )
    if version_tuple(wanted) <= version_tuple(current):
        return None
    branch = git(env, tree, "rev-parse", "--abbrev-ref", "HEAD")
    record = _recorded(env)
    moment = datetime.datetime.fromtimestamp(env.clock(), datetime.timezone.utc)
    return Journal(
        "prepared", tree, (record.data_dir if record else "") or env.ocp_home,
        git(env, tree, "rev-parse", "HEAD"), "" if branch == "HEAD" else branch, current,
        tags[wanted], wanted[1:], moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def refuse_own_work(env: Env, plan: Journal) -> None:
    """Raises Problem when the checkout holds work of its owner, which an update would put aside."""
    changed = local_changes(env, plan.tree)
    if changed:
        raise Problem(
            Exit.FAILED,
            f"{plan.tree} has local changes: {clean(', '.join(changed[:5]))}.\n"
            "Nothing was changed. Save them with "
            f"`git -C {shlex.quote(plan.tree)} stash`, or commit them elsewhere.",
        )
    known = git(env, plan.tree, "for-each-ref", "--count=1", "--contains", plan.from_commit,
                "refs/tags", "refs/remotes")
    if not known:
        raise Problem(
            Exit.FAILED,
            f"{plan.tree} has commits of its own, which no release holds. Nothing was changed.\n"
            f"Merge the release yourself: git -C {shlex.quote(plan.tree)} merge v{plan.to_version}",
        )


def show_plan_of(plan: Journal, record: Record | None) -> str:
    """What an update is going to do."""
    restart = f"restart {record.label} and ask its version" if record else (
        "no service is recorded: you restart the server yourself")
    return fields([
        ("update", f"v{plan.from_version} -> v{plan.to_version}"), ("in", plan.tree),
        ("1", f"save commit, database, settings, keys and unit below {plan.data_dir}"),
        ("2", "test the new version in a folder of its own: ocp_server.py --check"),
        ("3", f"git checkout v{plan.to_version}"), ("4", restart),
        ("if not", "go back to where it was, by itself"),
    ])


def remove_worktree(env: Env, snapshot: Snapshot) -> None:
    """Removes the folder in which a new version was tested, also what is left of it."""
    shutil.rmtree(snapshot.path("tree"), ignore_errors=True)
    git(env, snapshot.journal.tree, "worktree", "prune")


def test_new_version(env: Env, snapshot: Snapshot, record: Record | None) -> None:
    """Raises Problem unless the new version says that it would start here."""
    plan, folder = snapshot.journal, snapshot.path("tree")
    git(env, plan.tree, "worktree", "add", "--quiet", "--detach", folder, plan.to_commit)
    try:
        server = os.path.join(folder, "ocp_server.py")
        found = tree_version(server)
        if found != plan.to_version:
            raise Problem(Exit.FAILED, f"The release holds version {found or '?'} instead.")
        python = (record.python if record else "") or sys.executable
        with working(env, "testing the new version"):
            ran = env.run([python, "-B", server, "--check"], timeout_s=60,
                          environ=service_environ(env, record))
        if ran.code != 0:
            raise Problem(Exit.FAILED, f"It would not start here: {ran.complaint}")
    finally:
        remove_worktree(env, snapshot)


def remove_stale_lock(env: Env, tree: str) -> None:
    """Removes the lock of a git that a power cut ended; a young one may belong to a live git."""
    path = os.path.join(tree, git(env, tree, "rev-parse", "--git-path", "index.lock"))
    with contextlib.suppress(FileNotFoundError):
        if env.clock() - os.stat(path).st_mtime > 10:
            os.unlink(path)


def switch_back(env: Env, journal: Journal) -> None:
    """Checks out what was checked out before. Raises Problem."""
    words = ["checkout", "--quiet", *(["--force"] if journal.is_torn else [])]
    tip = ""
    if journal.from_branch:
        with contextlib.suppress(Problem):
            tip = git(env, journal.tree, "rev-parse", f"refs/heads/{journal.from_branch}")
    if tip == journal.from_commit:
        git(env, journal.tree, *words, journal.from_branch, "--")
    else:
        git(env, journal.tree, *words, "--detach", journal.from_commit, "--")


def stop_for_database(env: Env, record: Record | None) -> None:
    """Makes sure that no server has the database open. Raises Problem."""
    complaint = run_service(env, record, "stop") if record else ""
    if health_of(record.url if record else server_url(env)) is not None:
        raise Problem(
            Exit.FAILED, "The database has to be put back, but a server is still running: stop it, "
            f"then run `ocp update --rollback --yes`. {complaint}".rstrip(),
        )


def undo(env: Env, snapshot: Snapshot, record: Record | None) -> str:
    """Brings the old version back; "" or why its server does not answer. Every step may be done
    twice, so that an interrupted undo can be begun again. Raises Problem."""
    journal, copy = snapshot.journal, snapshot.path("ocp.db")
    saved = database_version(copy, _READ_COPY) if os.path.exists(copy) else 0
    present = database_version(os.path.join(journal.data_dir, "ocp.db"))
    changed = saved is not None and present is not None and present > saved
    snapshot = snapshot.at("undoing", restore_database=journal.restore_database or changed)
    remove_stale_lock(env, journal.tree)
    if snapshot.journal.restore_database:
        stop_for_database(env, record)
    switch_back(env, snapshot.journal)
    put_back_files(env, snapshot, record)
    if snapshot.journal.restore_database:
        put_back_database(snapshot)
        # From here on it is in use again, and must not be put back a second time.
        snapshot = snapshot.at("undoing", restore_database=False)
        env.note("The database is the saved one again; what came after the update is kept in "
                 + snapshot.path("newer-ocp.db"))
    wrong = ""
    if record:
        since_s = env.clock()
        complaint = run_service(env, record, "restart")
        wrong = await_server(env, record.url, journal.from_version, since_s)
        wrong = wrong and f"{wrong} {complaint}".rstrip()
    snapshot.at("undone")
    return wrong


def tell_openclaw(env: Env, tree: str, record: Record | None) -> None:
    """Gives OpenClaw the list of models of the version that is there now. Nothing is undone if
    that fails."""
    env = dataclasses.replace(env, tree=tree)
    if not os.path.exists(os.path.join(tree, "ocp_connect.py")):
        return
    try:
        found = openclaw_state(env, record.url if record else DEFAULT_URL)
    except Problem as problem:
        env.note(f"OpenClaw's list of models was not looked at: {problem}")
        return
    if found["written"]:
        env.say("OpenClaw has the models of this version now")
    for failure in found["failures"]:
        env.note(f"OpenClaw's list of models: {failure}. Try again with: ocp sync")


def roll_back(env: Env, snapshot: Snapshot, record: Record | None) -> Exit:
    """Undoes, and says how that went. Raises Problem if the server does not answer after it."""
    journal = snapshot.journal
    wrong = undo(env, snapshot, record)
    if wrong:
        raise Problem(
            Exit.FAILED,
            f"v{journal.from_version} is checked out again, but its server is not well: {wrong}."
            "\nSee `ocp doctor`.",
        )
    env.say(f"rolled back to v{journal.from_version}")
    tell_openclaw(env, journal.tree, record)
    return Exit.OK


def finish(env: Env, snapshot: Snapshot, record: Record | None) -> Exit:
    """From the checked-out new version to the one that answers, or back."""
    journal = snapshot.journal
    if record:
        env.say(f"restarting {record.label}")
        since_s = env.clock()
        complaint = run_service(env, record, "restart")
        wrong = await_server(env, record.url, journal.to_version, since_s)
        if wrong:
            env.note(f"v{journal.to_version} does not work here: {complaint or wrong}.")
            env.note("Rolling back.")
            roll_back(env, snapshot, record)
            return Exit.FAILED
    snapshot.at("done")
    prune_snapshots(env)
    env.say(f"updated to v{journal.to_version}; `ocp update --rollback` goes back")
    if record is None:
        env.say("No service is recorded: if a server is running, restart it yourself.")
    tell_openclaw(env, journal.tree, record)
    return Exit.OK


def switch(env: Env, snapshot: Snapshot, record: Record | None) -> Exit:
    """From the snapshot to the new version, or to where nothing was changed."""
    plan = snapshot.journal
    env.say(f"testing v{plan.to_version}")
    try:
        test_new_version(env, snapshot, record)
    except Problem as problem:
        snapshot.at("refused")
        raise Problem(
            Exit.FAILED, f"v{plan.to_version} was not installed, and nothing was changed. {problem}"
        ) from None
    snapshot = snapshot.at("switching", is_torn=True)
    try:
        git(env, plan.tree, "checkout", "--quiet", "--no-overwrite-ignore", "--detach",
            plan.to_commit, "--")
    except Problem as problem:
        if is_at(env, plan.tree, plan.from_commit):
            snapshot.at("refused", is_torn=False)
            raise Problem(Exit.FAILED, f"{problem}\nNothing was changed.") from None
        env.note(f"{problem} Rolling back.")
        roll_back(env, snapshot, record)
        return Exit.FAILED
    return finish(env, snapshot.at("switched", is_torn=False), record)


def is_at(env: Env, tree: str, commit: str) -> bool:
    """Whether this commit is checked out, whole and unchanged."""
    return git(env, tree, "rev-parse", "HEAD") == commit and not local_changes(env, tree)


def recover(env: Env, snapshot: Snapshot, back: bool) -> Exit | None:
    """Finishes or undoes what was interrupted; None when it had changed nothing."""
    journal = snapshot.journal
    env.note(f"The update to v{journal.to_version} was interrupted ({journal.state}).")
    record = check_service(env, os.path.realpath(journal.tree))
    if journal.state == "prepared":
        remove_worktree(env, snapshot)
        snapshot.at("refused")
        env.note("It had changed nothing.")
        return None
    if journal.state == "switching" and is_at(env, journal.tree, journal.to_commit):
        snapshot = snapshot.at("switched", is_torn=False)
    if snapshot.journal.state == "switched" and not back:
        env.note("Finishing it.")
        return finish(env, snapshot, record)
    env.note("Undoing it.")
    code = roll_back(env, snapshot, record)
    return code if back else Exit.FAILED


def _open_snapshot(env: Env) -> Snapshot | None:
    return next((s for s in read_snapshots(env) if s.journal.state in OPEN_STATES), None)


def show_snapshots(snapshots: Sequence[Snapshot], look: Look) -> str:
    """All snapshots, the newest first."""
    rows: list[Sequence[object]] = [("Snapshot", "From", "To", "State", "Taken")]
    for folder, journal in snapshots:
        rows.append((
            os.path.basename(folder), "v" + journal.from_version, "v" + journal.to_version,
            journal.state, age(journal.started_at, look),
        ))
    return table("<<<<<", rows, look) if snapshots else "no snapshots"


def _rollback(env: Env, args: argparse.Namespace) -> Exit:
    """Back to where the last finished update came from."""
    done = next((s for s in read_snapshots(env) if s.journal.state == "done"), None)
    if done is None:
        raise Problem(Exit.FAILED, "There is no finished update to roll back.")
    journal = done.journal
    record = check_service(env, os.path.realpath(journal.tree))
    if not is_at(env, journal.tree, journal.to_commit):
        raise Problem(
            Exit.FAILED,
            f"{journal.tree} is not as the update left it (v{journal.to_version}, unchanged), so "
            f"it is left alone. By hand: git checkout {journal.from_commit[:12]}, and a restart.",
        )
    words = f"v{journal.to_version} -> v{journal.from_version} in {journal.tree}"
    if args.dry_run:
        env.say(f"would roll back {words}")
        return Exit.OK
    confirm(env, args, f"Roll back {words}?")
    return roll_back(env, done, record)


def _check_for_update(env: Env, args: argparse.Namespace) -> Exit:
    plan = make_plan(env, git_tree(env), args.target)
    current = tree_version(os.path.join(env.tree, "ocp_server.py"))
    env.say(f"installed v{current}, " + (f"v{plan.to_version} is there" if plan else "the newest"))
    return Exit.OK


def _update(env: Env, args: argparse.Namespace) -> Exit:
    tree = git_tree(env)
    plan = make_plan(env, tree, args.target)
    if plan is None:
        version = tree_version(os.path.join(tree, "ocp_server.py"))
        env.say(f"v{version} is installed, and there is nothing newer")
        return Exit.OK
    refuse_own_work(env, plan)
    record = check_service(env, tree)
    env.say(show_plan_of(plan, record))
    if args.dry_run:
        return Exit.OK
    confirm(env, args, "Do this?")
    tag = f"refs/tags/v{plan.to_version}"
    git(env, tree, "fetch", "--quiet", "--no-tags", "origin", f"{tag}:{tag}", timeout_s=300)
    snapshot = take_snapshot(env, plan, record)
    env.say(f"saved {snapshot.folder}")
    return switch(env, snapshot, record)


def cmd_update(env: Env, args: argparse.Namespace) -> Exit:
    """Updates a git checkout to the newest release, or rolls the last update back."""
    if args.list:
        if not args.rollback:
            raise Problem(Exit.USAGE, "--list goes with --rollback.")
        env.say(show_snapshots(read_snapshots(env), look_of(env)))
        return Exit.OK
    if args.rollback and (args.check or args.target):
        raise Problem(Exit.USAGE, "--rollback goes back by one update: no --check and no --target.")
    if args.check:
        return _check_for_update(env, args)
    with only_one(env):
        interrupted = _open_snapshot(env)
        if interrupted and args.dry_run:
            raise Problem(Exit.FAILED, "An update was interrupted: `ocp update` ends it.")
        if interrupted:
            code = recover(env, interrupted, args.rollback)
            if code is not None or args.rollback:
                return Exit.OK if code is None else code
        return _rollback(env, args) if args.rollback else _update(env, args)


# ==== 11. Commands ===========================================================
# The table of commands. The parser, the help texts and the completions are made from it.


class Argument(NamedTuple):
    """One argument: its names and how argparse takes it. `words` are what completion offers."""

    names: tuple[str, ...]
    options: Mapping[str, Any] = {}
    words: tuple[str, ...] = ()


class Command(NamedTuple):
    """One command. Its help is the first thing that is seen of it."""

    name: str
    run: Callable[[Env, argparse.Namespace], Exit]
    help: str
    arguments: tuple[Argument, ...] = ()
    actions: tuple[Command, ...] = ()


def flag(*names: str, help: str, **options: Any) -> Argument:
    """An argument that is there or not."""
    return Argument(names, {"action": "store_true", "help": help, **options})


def option(name: str, metavar: str, help: str, **options: Any) -> Argument:
    """An argument with a value."""
    return Argument((name,), {"metavar": metavar, "help": help, **options})


def word(name: str, help: str, words: tuple[str, ...] = (), **options: Any) -> Argument:
    """An argument by its place."""
    return Argument((name,), {"help": help, **options}, words)


def _days(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= 400:
        raise argparse.ArgumentTypeError("takes a number from 1 to 400")
    return int(text)


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise argparse.ArgumentTypeError("takes a whole number")
    return int(text)


JSON = flag("--json", help="print the server's JSON as it came", default=argparse.SUPPRESS)
KEY = word("key", "a key's name or id", metavar="KEY")
KEY_FIELDS = (
    option("--expiry", "WHEN", "a date (2027-01-31), a span (30d, 12h) or never"),
    option("--models", "A,B", "the models that the key may use; empty = all"),
    option("--max-concurrent", "N", "answers at the same time; 0 = no limit", type=_whole),
    option("--note", "TEXT", "a note for yourself"),
)
QUOTA_FIELDS = tuple(
    option(f"--{name}", "N", f"{'tokens' if 'tokens' in name else 'requests'} "
           f"{name.rpartition('-')[2]}; none = no limit")
    for name, _ in QUOTAS
)

KEY_ACTIONS = (
    Command("list", cmd_keys_list, "all keys, newest first", (JSON,)),
    Command("add", cmd_keys_add, "make a key; its secret is shown this once",
            (word("name", "what it is for", metavar="NAME"), *KEY_FIELDS, *QUOTA_FIELDS, JSON)),
    Command("show", cmd_keys_show, "one key and its quotas", (KEY, JSON)),
    Command("quota", cmd_keys_quota, "show or change the quotas of a key",
            (KEY, *QUOTA_FIELDS, JSON)),
    Command("edit", cmd_keys_edit, "change what a key may do", (KEY, *KEY_FIELDS, JSON)),
    Command("rename", cmd_keys_rename, "give a key another name",
            (KEY, word("name", "the new name", metavar="NAME"), JSON)),
    Command("rotate", cmd_keys_rotate, "new secret for a key; the old one is dead at once",
            (KEY, JSON)),
    Command("revoke", cmd_keys_revoke, "end a key", (KEY, JSON)),
)


def cmd_version(env: Env, args: argparse.Namespace) -> Exit:
    """The versions: on disk, served, and claude's."""
    installed = tree_version(os.path.join(env.tree, "ocp_server.py")) or None
    health: Json = None
    with contextlib.suppress(Problem):
        health = health_of(server_url(env))
    health = health or {}
    found = {
        "installed": installed, "served": health.get("version"),
        "claude": health.get("claudeVersion"),
    }
    if args.json:
        env.say(json.dumps(found))
    else:
        env.say(fields([
            ("installed", installed or "no ocp_server.py beside ocp.py"),
            ("served", found["served"] or "no server answers"),
            ("claude", found["claude"] or "not known"),
        ]))
    return Exit.OK


def cmd_help(env: Env, args: argparse.Namespace) -> Exit:
    """The help of the whole, or of one command."""
    words = [args.command_name] if args.command_name else []
    parser(env).parse_args([*words, "--help"])
    return Exit.OK


def cmd_completion(env: Env, args: argparse.Namespace) -> Exit:
    """A script that teaches a shell the commands."""
    env.say(COMPLETIONS[args.shell]())
    return Exit.OK


COMMANDS = (
    Command("usage", cmd_usage, "plan limits and requests; what each day or key used", (
        flag("--by-key", help="what each key used, in the last day or so many days"),
        option("--days", "N", "what each of the last N days used", type=_days), JSON,
    )),
    Command("status", cmd_status, "the server, its requests and the plan on one screen",
            (flag("--watch", help="again every 2 s, until Ctrl-C"), JSON)),
    Command("health", cmd_health, "how the server is; exit code 1 when it is not well", (JSON,)),
    Command("models", cmd_models, "the models that the server offers", (JSON,)),
    Command("settings", cmd_settings, "show settings, change one, give one back its default", (
        word("key", "a setting", nargs="?", metavar="KEY"),
        word("value", "its new value", nargs="?", metavar="VALUE"),
        option("--reset", "KEY", "back to environment or default"), JSON,
    )),
    Command("logs", cmd_logs, "the newest events, 20 unless told otherwise", (
        word("words", "how many, and the least level: " + ", ".join(LOG_WORDS),
             LOG_WORDS, nargs="*", metavar="N|LEVEL"),
        flag("--follow", "-f", help="go on as events come, until Ctrl-C"), JSON,
    )),
    Command("sessions", cmd_sessions, "the conversations that the server remembers", (JSON,)),
    Command("clear", cmd_clear, "forget all sessions, or one",
            (word("session", "a session's id", nargs="?", metavar="SESSION"), JSON)),
    Command("keys", cmd_keys_list, "the keys of your devices", (JSON,), KEY_ACTIONS),
    Command("lan", cmd_lan, "the address for other devices, and whether they reach it", (JSON,)),
    Command("connect", cmd_connect, "set up this machine's tools for a server", (
        word("rest", "HOST and what else ocp_connect.py takes, such as --list and --undo",
             nargs="+", metavar="HOST"),
    )),
    Command("sync", cmd_sync, "bring the list of models in OpenClaw up to date",
            (flag("--dry-run", help="only show what would change"),
             flag("--json", help="print JSON", default=argparse.SUPPRESS))),
    Command("ask", cmd_ask, "ask one question: the quickest proof that all works", (
        word("question", "the question; - reads it from standard input", metavar="QUESTION"),
        option("--model", "MODEL", "a model or alias"),
    )),
    Command("start", cmd_start, "start the service"),
    Command("stop", cmd_stop, "stop the service"),
    Command("restart", cmd_restart, "restart the service, or OpenClaw's gateway",
            (word("what", "gateway restarts OpenClaw's", ("gateway",), nargs="?",
                  choices=("gateway",), metavar="gateway"),)),
    Command("doctor", cmd_doctor, "examine the installation and say what to do",
            (flag("--json", help="print the report as JSON", default=argparse.SUPPRESS),)),
    Command("update", cmd_update, "update a git checkout to a release, or roll that back", (
        flag("--check", help="only say whether there is a newer release"),
        flag("--dry-run", help="only say what would be done"),
        option("--target", "VERSION", "another release than the newest"),
        flag("--rollback", help="back to where the last update came from"),
        flag("--list", help="with --rollback: the snapshots"),
        flag("--yes", "-y", help="do not ask"),
    )),
    Command("version", cmd_version, "the installed, the served and claude's version",
            (flag("--json", help="print JSON", default=argparse.SUPPRESS),)),
    Command("completion", cmd_completion, "print a completion script: bash, zsh or fish",
            (word("shell", "the shell", ("bash", "zsh", "fish"),
                  choices=("bash", "zsh", "fish"), metavar="SHELL"),)),
    Command("help", cmd_help, "this help, or that of a command",
            (word("command_name", "a command", nargs="?", metavar="COMMAND"),)),
)


def commands_text() -> str:
    """The list of commands."""
    return "Commands:\n" + fields((command.name, command.help) for command in COMMANDS)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are Problems, and whose help goes to a stream of the Env."""

    stream: TextIO

    def print_help(self, file: Any = None) -> None:
        """Prints the help where results go."""
        self.stream.write(self.format_help())

    def error(self, message: str) -> NoReturn:
        """Raises the problem."""
        usage = self.format_usage().removeprefix("usage: ").strip()
        raise Problem(Exit.USAGE, f"{message}\nUsage: {usage}\nMore: {self.prog} --help")


def _add_commands(
    parent: argparse.ArgumentParser, commands: Iterable[Command], kind: type[Parser]
) -> None:
    below = parent.add_subparsers(metavar="COMMAND", title="commands", parser_class=kind)
    for command in commands:
        # argparse would take a lone percent sign for one of its own.
        text = command.help.replace("%", "%%")
        added = below.add_parser(
            command.name, help=text, description=command.help, allow_abbrev=False
        )
        for argument in command.arguments:
            added.add_argument(*argument.names, **argument.options)
        added.set_defaults(run=command.run)
        if command.actions:
            _add_commands(added, command.actions, kind)


def parser(env: Env) -> argparse.ArgumentParser:
    """The whole command line. Its help is this script's own text and the list of commands."""

    class Here(Parser):
        stream = env.stdout

    class Whole(Here):
        def format_help(self) -> str:
            return f"{(__doc__ or '').strip()}\n\n{commands_text()}\n"

        def format_usage(self) -> str:
            return "ocp COMMAND [ARGUMENTS]"

    whole = Whole(prog="ocp", allow_abbrev=False)
    version = tree_version(os.path.join(env.tree, "ocp_server.py"))
    whole.add_argument("--version", action="store_true", help=f"ocp {version}")
    whole.add_argument("--debug", action="store_true", help="show where an error came from")
    whole.set_defaults(json=False, run=None)
    _add_commands(whole, COMMANDS, Here)
    return whole


def completion_words(command: Command) -> list[str]:
    """What may come after a command."""
    found = [action.name for action in command.actions]
    for argument in command.arguments:
        found += [*argument.words, *(name for name in argument.names if name.startswith("--"))]
    if command.name == "help":
        found += [other.name for other in COMMANDS]
    return [*found, "--help"]


def _paths() -> list[tuple[str, Command]]:
    """Every command and every action of one: ("keys add", its row)."""
    found = []
    for command in COMMANDS:
        found.append((command.name, command))
        found += [(f"{command.name} {action.name}", action) for action in command.actions]
    return found


def bash_completion() -> str:
    """For bash: source <(ocp completion bash)."""
    names = " ".join(command.name for command in COMMANDS)
    lines = ["_ocp() {", '    local words="" path="${COMP_WORDS[1]}"',
             '    if [ "$COMP_CWORD" -ge 3 ]; then',
             '        case "$path ${COMP_WORDS[2]}" in']
    nested = [path for path, _ in _paths() if " " in path]
    lines.append("            " + "|".join(f'"{path}"' for path in nested)
                 + ') path="$path ${COMP_WORDS[2]}" ;;')
    lines += ["        esac", "    fi", '    if [ "$COMP_CWORD" -eq 1 ]; then',
              f'        words="{names} --help"', "    else", '        case "$path" in']
    for path, command in _paths():
        lines.append(f'            "{path}") words="{" ".join(completion_words(command))}" ;;')
    lines += ["        esac", "    fi",
              '    COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))', "}",
              "complete -F _ocp ocp"]
    return "\n".join(lines)


def zsh_completion() -> str:
    """For zsh: ocp completion zsh > a file _ocp in a folder of $fpath."""
    lines = ["#compdef ocp", "_ocp() {", "    local -a commands", "    commands=("]
    lines += [f"        {shlex.quote(f'{c.name}:{c.help}')}" for c in COMMANDS]
    lines += ["    )", "    if (( CURRENT == 2 )); then", "        _describe command commands",
              "        return", "    fi", '    local path="$words[2]"']
    nested = "|".join(shlex.quote(path) for path, _ in _paths() if " " in path)
    lines += ["    if (( CURRENT >= 4 )); then", '        case "$path $words[3]" in',
              f'            {nested}) path="$path $words[3]" ;;', "        esac", "    fi",
              '    case "$path" in']
    for path, command in _paths():
        words = " ".join(completion_words(command))
        lines.append(f"        {shlex.quote(path)}) compadd -- {words} ;;")
    return "\n".join([*lines, "    esac", "}", '_ocp "$@"'])


def fish_completion() -> str:
    """For fish: ocp completion fish > ~/.config/fish/completions/ocp.fish."""
    lines = ["complete -c ocp -f"]
    for path, command in _paths():
        above, _, name = path.rpartition(" ")
        when = f"__fish_seen_subcommand_from {above}" if above else "__fish_use_subcommand"
        lines.append(f"complete -c ocp -n '{when}' -a {name} -d {shlex.quote(command.help)}")
        if above:
            continue
        options = [word for word in completion_words(command) if word.startswith("--")]
        for action in command.actions:
            options += [word for word in completion_words(action) if word.startswith("--")]
        for text in dict.fromkeys(options):
            seen = f"__fish_seen_subcommand_from {name}"
            lines.append(f"complete -c ocp -n '{seen}' -l {text[2:]}")
        for argument in command.arguments:
            lines += [f"complete -c ocp -n '__fish_seen_subcommand_from {name}' -a {text}"
                      for text in argument.words]
    return "\n".join(lines)


COMPLETIONS = {"bash": bash_completion, "zsh": zsh_completion, "fish": fish_completion}


# ==== 12. Main ===============================================================
# The program, and the program with its errors turned into lines and exit codes.


def program(env: Env) -> Exit:
    """Runs the command of `env`. Raises Problem, and SystemExit(0) after a --help."""
    whole = parser(env)
    words = env.argv
    if words[:1] == ["connect"] and words[1:] and words[1] not in ("-h", "--help"):
        # The options behind it are another program's.
        words = ["connect", "--", *words[1:]]
    args = whole.parse_args(words)
    if args.version:
        return cmd_version(env, args)
    if args.run is None:
        whole.print_help()
        return Exit.OK
    code: Exit = args.run(env, args)
    return code


def main(env: Env) -> Exit:
    """Runs the command of `env`; the exit code. Whatever goes wrong is said in few words."""
    try:
        return program(env)
    except Problem as problem:
        env.note(f"ocp: {problem}")
        if "--debug" in env.argv:
            traceback.print_exc(file=env.stderr)
        return problem.code
    except SystemExit:
        return Exit.OK
    except KeyboardInterrupt:
        env.note("")
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has had enough.
        return Exit.OK
    except Exception as error:
        env.note(f"ocp: this should not have happened: {type(error).__name__}: {clean(error)}")
        env.note("Run it again with --debug to see where, and report it.")
        if "--debug" in env.argv:
            traceback.print_exc(file=env.stderr)
        return Exit.FAILED


def real_env() -> Env:
    """The world as it is."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Whoever started this has closed it, as `>&-` does.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
        if mode == "w":
            # A terminal that knows few characters still gets the rest of an answer.
            getattr(sys, name).reconfigure(errors="replace")
    tree = os.path.dirname(os.path.realpath(__file__))
    home = os.path.expanduser("~")
    return Env(sys.argv[1:], dict(os.environ), sys.stdin, sys.stdout, sys.stderr, home, tree)


if __name__ == "__main__":
    exit_code = main(real_env())
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Else the interpreter complains about it while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(exit_code)
