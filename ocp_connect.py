#!/usr/bin/env python3
"""ocp_connect points the tools of this machine at an OCP server, and takes that back again.

    curl -fsSL http://HOST:3456/connect | python3 - HOST
    python3 ocp_connect.py HOST [--key KEY] [--only TOOL,...] [--primary | --backup] [--dry-run]
    python3 ocp_connect.py --list        which tools it knows, and where they are here
    python3 ocp_connect.py --undo        everything as it was before
    python3 ocp_connect.py --sync HOST   the list of models in OpenClaw brought up to date

It asks the server who it is, plans, shows every file that would change and why, and asks before
it writes. Comments, order and settings of your own stay as they are; where a change cannot be
made safely it is printed for you to make. What was done is written down in ~/.config/ocp with a
copy of each file as it was; --undo gives those back byte for byte, or, where you have changed a
file since, takes out only what was put in.

The key is --key, else OCP_CONNECT_KEY in the environment, else the one given for this server the
last time, else the server's own anonymous key, else you are asked.

Exit codes: 0 done; 1 something failed, the message says what; 2 wrong usage; 3 no OCP server
there; 4 the key is missing or refused; 130 interrupted.
"""
# Sections (search for "==== 8" to jump to the eighth):
#
#      1. Small things      exit codes, problems, hiding keys, HTTP
#      2. Machine           everything of this computer that a plan may depend on
#      3. JSON text         members put into a text and taken out, with all comments kept
#      4. TOML text         the same for keys before the first table
#      5. YAML text         the same for keys of the outermost level
#      6. Changes           one change to a file, whatever its format; and back
#      7. Server            what the other side says about itself
#      8. Tools             one function for each tool: what it needs where
#      9. Record            what was done, for --undo and for the next run
#     10. Plan              which bytes of which file would be others
#     11. Writing           the only section that changes anything
#     12. Showing           plans, tools and results for a person, and as JSON
#     13. Command line      arguments, questions, main
from __future__ import annotations

import sys

if sys.version_info < (3, 9):
    sys.exit("ocp_connect needs Python 3.9 or later; this is Python %d.%d." % sys.version_info[:2])
if sys.platform == "win32":
    sys.exit(
        "ocp_connect runs on Linux and macOS. On Windows run it in WSL, or give your tools the "
        "address http://HOST:3456/v1 and your key by hand."
    )

import argparse
import contextlib
import copy
import dataclasses
import difflib
import enum
import functools
import getpass
import glob
import hashlib
import http.client
import itertools
import json
import os
import plistlib
import re
import shlex
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Union

VERSION = "0.1.0"

#: Python's name for a script that comes through a pipe, which has no folder.
_PIPE = "<stdin>"
#: The folder of this script, empty if it came through a pipe.
HERE = "" if globals().get("__file__", _PIPE) == _PIPE else os.path.dirname(
    os.path.abspath(__file__))

#: A JSON value, parsed or to be written.
Json = Any


# ==== 1. Small things ========================================================
# What goes wrong is a Problem, one sentence that says what to do; main gives it its exit code.


class Exit(enum.IntEnum):
    """The exit codes. Nothing that was not done ends with OK."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    DENIED = 4
    INTERRUPTED = 130


class Problem(Exception):
    """Why it cannot go on, for the user."""

    def __init__(self, code: Exit, message: str) -> None:
        super().__init__(message)
        self.code = code


class Unsafe(Exception):
    """A file cannot be changed with certainty: the reason, to follow its name."""


def clean(text: object) -> str:
    """`text` in one line, without the control characters that could command a terminal."""
    line = re.sub(r"\s*[\r\n]+\s*", " ", str(text).strip("\r\n"))
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", "?", line)


#: A value that belongs to a name which says that it is secret.
_SECRET_VALUE = re.compile(
    r"((?:key|token|secret|password)[\"']?\s*[:= ]\s*[\"']?)([^\s\"',}]{4,})", re.I
)
_PLAIN_VALUE = re.compile(r"true|false|null|\d+|manual|unused|[{$].*|.*\.\.\..*")
_SECRET_SHAPE = re.compile(r"\b(?:sk-|ocp_)[\w-]{8,}")
#: Stands for a key where a tool insists on one and the server does not.
NO_KEY = "unused"


def mask(key: str) -> str:
    """Enough of a key to recognise it."""
    return f"{key[:8]}...{key[-4:]}" if len(key) >= 24 else f"{key[:2]}..."


def fish_quoted(value: str) -> str:
    """A word for fish."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def csh_quoted(value: str) -> str:
    """Return a word for csh and tcsh, which look for history even inside of quotes."""
    return "'" + value.replace("'", "'\\''").replace("!", "\\!") + "'"


def spellings(key: str) -> list[str]:
    """A key as it may stand in a file: in the quotes of JSON, of each shell, and in XML."""
    shell = shlex.quote(key)
    shell = shell[1:-1] if shell != key else key
    xml = shell.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    inside = (shell, xml, json.dumps(key)[1:-1], fish_quoted(key)[1:-1], csh_quoted(key)[1:-1],
              key)
    return list(dict.fromkeys(inside)) if key else []


def holds_key(text: str, key: str) -> bool:
    """Whether a key stands in a text."""
    return any(each in text for each in spellings(key))


def masked(text: str, key: str) -> str:
    """`text` without any key in full: not this one, and nothing else that looks like one."""
    for each in spellings(key):
        text = text.replace(each, mask(key))
    text = _SECRET_SHAPE.sub(lambda match: mask(match.group()), text)

    def hidden(match: re.Match[str]) -> str:
        return match[1] + (match[2] if _PLAIN_VALUE.fullmatch(match[2]) else mask(match[2]))

    return _SECRET_VALUE.sub(hidden, text)


def digest(content: bytes | None) -> str:
    """A file's fingerprint; empty for one that is not there."""
    return "" if content is None else hashlib.sha256(content).hexdigest()


def newline_of(text: str) -> str:
    """The newline that a text uses."""
    return "\r\n" if "\r\n" in text.partition("\n")[0] + "\n" and "\r\n" in text else "\n"


def counted(number: int, noun: str) -> str:
    """"1 file", "2 files"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


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


# ==== 2. Machine =============================================================
# Everything of this computer that a plan may depend on, and how a file is read and replaced. Tests
# give it another home.


class Ran(NamedTuple):
    """What became of a command. A code of None: it could not be run."""

    code: int | None
    output: str
    error: str

    @property
    def complaint(self) -> str:
        """What it had to say, in one line."""
        lines = [line for line in (self.error + "\n" + self.output).splitlines() if line.strip()]
        return clean(lines[0].strip()) if lines else f"it ended with {self.code}"


def run_command(
    command: Sequence[str], environ: Mapping[str, str], stdin: str = "", timeout_s: float = 60
) -> Ran:
    """Runs a command to its end. Never raises for a program that is missing or too slow."""
    try:
        done = subprocess.run(
            list(command), env=dict(environ), input=stdin.encode(), capture_output=True,
            timeout=timeout_s, check=False,
        )
    except subprocess.TimeoutExpired:
        return Ran(None, "", f"{command[0]} took longer than {timeout_s:.0f} s")
    except OSError as problem:
        return Ran(None, "", f"{command[0]}: {problem.strerror}")
    return Ran(done.returncode, *(part.decode("utf-8", "replace")
                                  for part in (done.stdout, done.stderr)))


@dataclasses.dataclass(frozen=True)
class Machine:
    """This computer, as far as it matters."""

    home: str
    environ: Mapping[str, str]
    platform: str
    #: Whether systemd hands ~/.config/environment.d to what the desktop starts.
    has_systemd: bool

    def below(self, *parts: str) -> str:
        """A path in the home folder."""
        return os.path.join(self.home, *parts)

    def named(self, variable: str, *default: str) -> str:
        """The folder that a variable names, else this one in the home folder."""
        value = self.environ.get(variable, "")
        value = os.path.join(self.home, value[2:]) if value.startswith("~/") else value
        return value if os.path.isabs(value) else self.below(*default)

    @property
    def config_home(self) -> str:
        """Where programs keep their settings."""
        return self.named("XDG_CONFIG_HOME", ".config")

    @property
    def own(self) -> str:
        """The folder of our key, record and copies."""
        return os.path.join(self.config_home, "ocp")

    @property
    def shell(self) -> str:
        """The name of the login shell, empty if unknown."""
        return os.path.basename(self.environ.get("SHELL", ""))

    def program(self, name: str) -> str | None:
        """Where a program is, None if it is not on the PATH."""
        return shutil.which(name, path=self.environ.get("PATH", os.defpath))

    def run(self, *command: str, stdin: str = "", timeout_s: float = 60) -> Ran:
        """Runs a command with the user's environment."""
        return run_command(command, self.environ, stdin, timeout_s)

    def short(self, path: str) -> str:
        """A path as people write it."""
        inside = path.startswith(self.home + os.sep)
        return "~" + path[len(self.home):] if inside else path


def this_machine() -> Machine:
    """The computer that this runs on."""
    environ = dict(os.environ)
    home = environ.get("HOME") or os.path.expanduser("~")
    return Machine(
        os.path.abspath(home), environ, sys.platform, os.path.isdir("/run/systemd/system")
    )


def read_bytes(path: str) -> bytes | None:
    """What a file holds, None if there is none. Raises Unsafe if it cannot be read."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Unsafe("is not a regular file")
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise Unsafe(f"cannot be read ({problem.strerror})") from None


def _open_at_once(path: str, flags: int) -> int:
    """Return a descriptor without waiting for a writer, which a pipe with a name may never get."""
    return os.open(path, flags | os.O_NONBLOCK)


def decoded(content: bytes | None) -> str:
    """The text of a file; empty for one that is not there. Raises Unsafe if it is no text."""
    try:
        return (content or b"").decode("utf-8")
    except UnicodeDecodeError:
        raise Unsafe("is not UTF-8 text") from None


def make_private(folder: str) -> None:
    """A folder for our eyes only. Raises OSError."""
    os.makedirs(folder, mode=0o700, exist_ok=True)


def write_whole(path: str, content: bytes, mode: int) -> None:
    """Replaces a file so that there is always the old or the new one, and where possible with
    the owner of the old one. Raises OSError."""
    real = os.path.realpath(path)
    descriptor, draft = tempfile.mkstemp(dir=os.path.dirname(real), prefix=".ocp-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):
            # Only root may give a file to somebody else, and a new one has no owner yet.
            there = os.stat(real)
            os.chown(draft, there.st_uid, there.st_gid)
        os.chmod(draft, mode)
        os.replace(draft, real)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise


def is_this_machine(host: str) -> bool:
    """Whether a host name or address is this computer's own."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, _, _, address in found:
        # Only an address of one's own can be bound to.
        with contextlib.suppress(OSError), socket.socket(family, kind) as attempt:
            attempt.bind(address)
            return True
    return False


def has_claude_login(machine: Machine) -> bool:
    """Whether the claude program is logged in here, as it is where a server runs."""
    folder = machine.named("CLAUDE_CONFIG_DIR", ".claude")
    if os.path.exists(os.path.join(folder, ".credentials.json")):
        return True
    if machine.environ.get("CLAUDE_CODE_OAUTH_TOKEN"):
        return True
    for path in (machine.below(".claude.json"), os.path.join(folder, ".claude.json")):
        with contextlib.suppress(Unsafe):
            if b'"oauthAccount"' in (read_bytes(path) or b""):
                return True
    return False


# ==== 3. JSON text ===========================================================
# JSON with comments, trailing commas, bare keys and single quotes, as editors and agents write it.
# A change is made at the one place where it belongs; every other byte stays.


class Member(NamedTuple):
    """One member of an object. `comma` is where its comma stands, None if it has none."""

    key: str
    start: int
    node: Node
    comma: int | None


class Node:
    """A value and where it stands. `members` is None for whatever is no object."""

    __slots__ = ("end", "members", "start", "value")

    def __init__(
        self, value: Json, start: int, end: int, members: list[Member] | None = None
    ) -> None:
        self.value = value
        self.start, self.end = start, end
        self.members = members

    def member(self, key: str) -> Member | None:
        """The member of this name."""
        return next((each for each in self.members or () if each.key == key), None)


def as_written(text: str) -> tuple[str, str]:
    """Stands for a value that is kept as it is written, because nothing here understands it."""
    return ("as written", text)


#: What is found where somebody wrote null: not the same as nothing.
NULL = as_written("null")


def rendered(value: Json) -> str:
    """A value on one line."""
    return value[1] if isinstance(value, tuple) else json.dumps(value, ensure_ascii=False)


class JsonReader:
    """Reads one text. Raises Unsafe for whatever is not understood."""

    _SPACE = re.compile(r"(?:[\s\ufeff]+|//[^\n]*|/\*.*?\*/)*", re.S)
    _COMMENT = re.compile(r"//[^\n\r]*|/\*.*?\*/", re.S)
    _STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'', re.S)
    _WORD = re.compile(r"[A-Za-z_$][\w$]*")
    _SCALAR = re.compile(
        r"(?:true|false|null|[+-]?(?:Infinity|NaN|0[xX][0-9a-fA-F]+"
        r"|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?))(?![\w$.])"
    )

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        #: The comments, in their order.
        self.comments: list[str] = []

    def document(self) -> Node:
        """The whole text as one object."""
        try:
            self._skip()
            node = self._value()
            self._skip()
        except RecursionError:
            raise Unsafe("is nested too deeply") from None
        if self.at != len(self.text):
            raise self._lost()
        if node.members is None:
            raise Unsafe("does not hold an object")
        return node

    def _lost(self) -> Unsafe:
        line = self.text.count("\n", 0, self.at) + 1
        return Unsafe(f"is not understood at line {line}")

    def _skip(self) -> None:
        match = self._SPACE.match(self.text, self.at)
        assert match is not None
        self.comments += self._COMMENT.findall(match.group())
        self.at = match.end()

    def _takes(self, character: str) -> bool:
        found = self.text.startswith(character, self.at)
        self.at += len(character) if found else 0
        return found

    def _value(self) -> Node:
        start = self.at
        if self._takes("{"):
            members = self._members()
            return Node({m.key: m.node.value for m in members}, start, self.at, members)
        if self._takes("["):
            return Node(self._items(), start, self.at)
        return Node(self._scalar(), start, self.at)

    def _members(self) -> list[Member]:
        found: list[Member] = []
        self._skip()
        while not self._takes("}"):
            start, key = self.at, self._key()
            if any(each.key == key for each in found):
                raise Unsafe(f"names {key} twice")
            self._skip()
            if not self._takes(":"):
                raise self._lost()
            self._skip()
            node = self._value()
            comma = self._separator("}")
            found.append(Member(key, start, node, comma))
        return found

    def _items(self) -> list[Json]:
        found: list[Json] = []
        self._skip()
        while not self._takes("]"):
            found.append(self._value().value)
            self._separator("]")
        return found

    def _separator(self, closing: str) -> int | None:
        """Where the comma after a value is; without one, the end has to come."""
        self._skip()
        place = self.at
        comma = self._takes(",")
        self._skip()
        if not comma and not self.text.startswith(closing, self.at):
            raise self._lost()
        return place if comma else None

    def _key(self) -> str:
        match = self._WORD.match(self.text, self.at)
        if match is None:
            key = self._scalar()
            if not isinstance(key, str):
                raise self._lost()
            return key
        self.at = match.end()
        return match.group()

    def _scalar(self) -> Json:
        match = self._STRING.match(self.text, self.at) or self._SCALAR.match(self.text, self.at)
        if match is None:
            raise self._lost()
        self.at, word = match.end(), match.group()
        if word[0] == "'":
            inner = word[1:-1].replace("\\'", "'")
            word = '"' + re.sub(r'(?<!\\)"', r"\"", inner) + '"'
        try:
            return json.loads(word)
        except ValueError:
            # A number or an escape of JSON5: nothing of ours, it only has to stay the same.
            return as_written(match.group())


def json_load(text: str) -> Json:
    """The value of a text. Raises Unsafe."""
    return JsonReader(text).document().value if text.strip("\ufeff \t\r\n") else {}


def json_comments(text: str) -> list[str]:
    """The comments of a text. Raises Unsafe."""
    reader = JsonReader(text)
    if text.strip("\ufeff \t\r\n"):
        reader.document()
    return reader.comments


def json_find(text: str, path: tuple[str, ...]) -> Json:
    """The value at a path, None where there is none. Raises Unsafe."""
    value = json_load(text)
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
    return NULL if value is None else value


def line_start(text: str, at: int) -> int:
    """Where the line of a place begins."""
    return text.rfind("\n", 0, at) + 1


def indent_at(text: str, at: int) -> str:
    """The white space at the beginning of the line of a place."""
    start = line_start(text, at)
    return text[start:at][: len(text[start:at]) - len(text[start:at].lstrip(" \t"))]


def json_unit(text: str, root: Node) -> str:
    """By what a text indents."""
    for member in root.members or ():
        lead = text[line_start(text, member.start):member.start]
        if lead and not lead.strip():
            return lead
    return "  "


def json_render(value: Json, unit: str, indent: str, newline: str) -> str:
    """A value as text whose later lines stand at `indent`."""
    if isinstance(value, tuple):
        return rendered(value)
    lines = json.dumps(value, indent=unit, ensure_ascii=False).split("\n")
    return (newline + indent).join(lines)


def json_put(text: str, path: tuple[str, ...], value: Json) -> str:
    """A text with the value at a path. Raises Unsafe."""
    newline = newline_of(text)
    if not text.strip("\ufeff \t\r\n"):
        text += "{" + newline + "}" + newline
    root = node = JsonReader(text).document()
    unit, depth = json_unit(text, root), 0
    for name in path:
        member = node.member(name)
        if member is None:
            break
        node, depth = member.node, depth + 1
        if depth < len(path) and node.members is None:
            raise Unsafe(f"has something else than an object at {'.'.join(path[:depth])}")
    if depth == len(path):
        if node.value == value:
            return text
        fresh = json_render(value, unit, indent_at(text, node.start), newline)
        return text[:node.start] + fresh + text[node.end:]
    for name in reversed(path[depth + 1:]):
        value = {name: value}
    return _json_insert(text, node, path[depth], value, unit)


def _json_insert(text: str, node: Node, key: str, value: Json, unit: str) -> str:
    """A text with one more member at the end of an object."""
    assert node.members is not None
    newline, outer, close = newline_of(text), indent_at(text, node.start), node.end - 1
    start = line_start(text, close)
    brace_alone = start > node.start and not text[start:close].strip()
    first = node.members[0].start if node.members else None
    indent = outer + unit
    if first is not None and not text[line_start(text, first):first].strip():
        indent = indent_at(text, first)
    piece = f"{json.dumps(key)}: {json_render(value, unit, indent, newline)}"
    if not node.members:
        if brace_alone:
            return text[:start] + indent + piece + newline + text[start:]
        inner = text[node.start + 1:close].rstrip(" \t")
        return (text[:node.start + 1] + inner + newline + indent + piece + newline + outer
                + text[close:])
    last = node.members[-1]
    if not brace_alone:
        at = last.node.end if last.comma is None else last.comma + 1
        comma = "," if last.comma is None else ""
        return f"{text[:at]}{comma} {json.dumps(key)}: {rendered(value)}{text[at:]}"
    if last.comma is None:
        text = text[:last.node.end] + "," + text[last.node.end:]
        start += 1
    tail = "" if last.comma is None else ","
    return text[:start] + indent + piece + tail + newline + text[start:]


def json_drop(text: str, path: tuple[str, ...]) -> str:
    """A text without the member at a path; it has to be there. Raises Unsafe."""
    parent = JsonReader(text).document()
    for name in path[:-1]:
        found = parent.member(name)
        assert found is not None
        parent = found.node
    assert parent.members is not None
    index = [each.key for each in parent.members].index(path[-1])
    member = parent.members[index]
    before = parent.members[index - 1].comma if index and member.comma is None else None
    start, end = member.start, member.node.end if member.comma is None else member.comma + 1
    begin, stop = line_start(text, start), text.find("\n", end) + 1
    if not text[begin:start].strip() and stop and not text[end:stop].strip():
        start, end = begin, stop
    elif before is not None and not text[before + 1:start].strip():
        start = before + 1
    elif before is None:
        end += len(text[end:]) - len(text[end:].lstrip(" \t"))
    cut = text[:start] + text[end:]
    if before is not None:
        cut = cut[:before] + cut[before + 1:]
    emptied = re.compile(r"\{\s*\}").match(cut, parent.start)
    return cut[:parent.start] + "{}" + cut[emptied.end():] if emptied else cut


# ==== 4. TOML text ===========================================================
# Only keys before the first table are put or taken out; the rest is read to be sure of the places.


class Statement(NamedTuple):
    """A key with its value, or a table's header, whose value is empty."""

    path: tuple[str, ...]
    value: str
    start: int
    end: int


_TOML_KEY = r"(?:[A-Za-z0-9_-]+|\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*')"
_TOML_KEYS = rf"{_TOML_KEY}(?:[ \t]*\.[ \t]*{_TOML_KEY})*"
_TOML_HEADER = re.compile(
    rf"(\[\[?)[ \t]*({_TOML_KEYS})[ \t]*\]\]?[ \t]*(?:#[^\n]*)?\r?(?=\n|\Z)"
)
_TOML_PAIR = re.compile(rf"({_TOML_KEYS})[ \t]*=[ \t]*")
_TOML_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'', re.S
)
_TOML_BLANK = re.compile(r"[ \t]*(?:#[^\n]*)?\r?(?:\n|\Z)")


def _toml_names(text: str) -> tuple[str, ...]:
    """The names of a dotted key."""
    found = re.findall(_TOML_KEY, text)
    return tuple(name[1:-1] if name[0] in "\"'" else name for name in found)


def _toml_value_end(text: str, at: int) -> int:
    """Where a value ends: at its line's end, outside of strings and brackets."""
    depth = 0
    while at < len(text):
        character = text[at]
        if character in "\"'":
            match = _TOML_STRING.match(text, at)
            if match is None:
                raise Unsafe("has a string that does not end")
            at = match.end()
            continue
        if character == "#":
            if not depth:
                return at
            at = (text.find("\n", at) + 1 or len(text)) - 1
        elif character == "\n" and not depth:
            return at
        depth += (character in "[{") - (character in "]}")
        at += 1
    if depth:
        raise Unsafe("has a bracket that does not close")
    return at


def toml_statements(text: str) -> list[Statement]:
    """Every statement in its order. Raises Unsafe."""
    found: list[Statement] = []
    table: tuple[str, ...] = ()
    counts: dict[tuple[str, ...], int] = {}
    at = len(text) - len(text.lstrip("\ufeff"))
    while at < len(text):
        blank = _TOML_BLANK.match(text, at)
        if blank is not None:
            at = max(blank.end(), at + 1)
            continue
        at += len(text[at:]) - len(text[at:].lstrip(" \t"))
        header = _TOML_HEADER.match(text, at)
        if header is not None:
            table = _toml_table(_toml_names(header[2]), counts, header[1] == "[[")
            found.append(Statement((*table, "[]"), "", at, header.end()))
            at = header.end()
            continue
        pair = _TOML_PAIR.match(text, at)
        if pair is None:
            line = text.count("\n", 0, at) + 1
            raise Unsafe(f"is not understood at line {line}")
        end = _toml_value_end(text, pair.end())
        value = text[pair.end():end].rstrip()
        found.append(
            Statement(table + _toml_names(pair[1]), value, pair.end(), pair.end() + len(value))
        )
        at = text.find("\n", end) + 1 or len(text)
    return found


def _toml_table(
    names: tuple[str, ...], counts: dict[tuple[str, ...], int], is_array: bool
) -> tuple[str, ...]:
    """The path of a table, with the number of each array's element that it lies in."""
    if is_array:
        counts[names] = counts.get(names, -1) + 1
    path: tuple[str, ...] = ()
    for length, name in enumerate(names, 1):
        count = counts.get(names[:length])
        path += (name,) if count is None else (name, f"#{count}")
    return path


def toml_load(text: str) -> Json:
    """Every value as it is written, by its full path. Raises Unsafe."""
    found: dict[str, Json] = {}
    statements = toml_statements(text)
    values = {each.path for each in statements if each.path[-1] != "[]"}
    for each in statements:
        name = ".".join(each.path)
        if name in found or any(each.path[:n] in values for n in range(1, len(each.path))):
            raise Unsafe(f"defines {name.replace('.[]', '')} twice")
        found[name] = _toml_plain(each.value)
    return found


def _toml_plain(written: str) -> Json:
    """The value of a simple string, number or truth value; anything else as it is written."""
    if re.fullmatch(r"'[^'\n]*'", written):
        return written[1:-1]
    try:
        return json.loads(written)
    except ValueError:
        return as_written(written)


def toml_find(text: str, path: tuple[str, ...]) -> Json:
    """The value of a key, None where there is none. Raises Unsafe."""
    return toml_load(text).get(".".join(path))


def toml_put(text: str, path: tuple[str, ...], value: Json) -> str:
    """A text with this value for a key before the first table. Raises Unsafe."""
    (name,) = path
    newline, top = newline_of(text), 0
    for each in toml_statements(text):
        if each.path[-1] == "[]":
            break
        if each.path == path:
            same = _toml_plain(each.value) == value
            fresh = text[:each.start] + rendered(value) + text[each.end:]
            return text if same else fresh
        top = text.find("\n", each.end) + 1 or len(text)
    top = top or len(text) - len(text.lstrip("\ufeff"))
    lead = "" if not top or text[top - 1] in "\n\ufeff" else newline
    return f"{text[:top]}{lead}{name} = {rendered(value)}{newline}{text[top:]}"


def toml_drop(text: str, path: tuple[str, ...]) -> str:
    """A text without a key before the first table; it has to be there. Raises Unsafe."""
    (found,) = (each for each in toml_statements(text) if each.path == path)
    stop = text.find("\n", found.end) + 1 or len(text)
    return text[:line_start(text, found.start)] + text[stop:]


# ==== 5. YAML text ===========================================================
# The outermost level only: "key: value" lines, and lists of items. What is indented belongs to the
# line above it. Whatever else stands at the beginning of a line makes the file unsafe to change.


class Entry(NamedTuple):
    """A key of the outermost level. `rest` is what follows its colon; `end` is where the next key
    begins, and `value_at` where `rest` does."""

    key: str
    rest: str
    start: int
    value_at: int
    end: int


_YAML_KEY = re.compile(r"([A-Za-z_][\w.-]*|\"[\w. -]+\"|'[\w. -]+')[ \t]*:(?=[ \t\r\n]|$)[ \t]*")
_YAML_SCALAR = re.compile(
    r"(\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\n]|'')*'|[^\s\"'#&*!|>%@`\[\]{},?:-][^\n#]*?|-?[\w.]+)"
    r"([ \t]+#[^\n\r]*|[ \t]*)"
)
_YAML_ITEM = re.compile(r"^([ \t]*)- ", re.M)


def yaml_entries(text: str) -> list[Entry]:
    """The keys of the outermost level in their order. Raises Unsafe."""
    starts: list[tuple[str, int, int, str]] = []
    at = 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        body = line.rstrip("\r\n").lstrip("\ufeff")
        match = _YAML_KEY.match(body)
        if match is not None:
            value_at = at + len(line.rstrip("\r\n")) - len(body) + match.end()
            starts.append((match[1].strip("\"'"), at, value_at, body[match.end():].rstrip()))
        elif not _yaml_belongs(body, number, bool(starts)):
            raise Unsafe(f"is not understood at line {number}")
        at += len(line)
    ends = [each[1] for each in starts[1:]] + [len(text)]
    names = [each[0] for each in starts]
    if len(set(names)) != len(names):
        raise Unsafe("has a key twice")
    return [Entry(key, rest, start, value_at, end)
            for (key, start, value_at, rest), end in zip(starts, ends)]


def _yaml_belongs(line: str, number: int, inside: bool) -> bool:
    """Whether a line that begins no key may stand where it does."""
    if not line.strip() or line.startswith("#"):
        return True
    if line.rstrip() == "---":
        return not inside
    return line.startswith(" ") and "\t" not in line[: len(line) - len(line.lstrip())] or (
        line.startswith("- "))


def yaml_load(text: str) -> Json:
    """What belongs to each key, as it is written; the items of a list without keys as "". Raises
    Unsafe."""
    entries = yaml_entries(text)
    found = {each.key: _yaml_body(text, each) for each in entries}
    head = text[: entries[0].start] if entries else text
    items = _yaml_significant(head)
    return {**found, **({"": items} if items else {})}


def _yaml_significant(text: str) -> str:
    """A text without empty lines and comment lines."""
    lines = (line.rstrip() for line in text.lstrip("\ufeff").splitlines())
    kept = (line for line in lines if line.strip() and not line.lstrip().startswith("#"))
    return "\n".join(line for line in kept if line != "---")


def _yaml_body(text: str, entry: Entry) -> Json:
    """The simple value of a key, else all that belongs to it as it is written."""
    body = text[entry.value_at:entry.end]
    match = _YAML_SCALAR.fullmatch(entry.rest)
    if match is None or _yaml_significant(body[len(entry.rest):]):
        return as_written(_yaml_significant(body))
    word = match[1]
    if word[0] == "'":
        return word[1:-1].replace("''", "'")
    if word in ("true", "false") or word[0] == '"':
        with contextlib.suppress(ValueError):
            return json.loads(word)
    return word


def yaml_find(text: str, path: tuple[str, ...]) -> Json:
    """The value of a key, None where there is none. Raises Unsafe."""
    return yaml_load(text).get(path[0])


def yaml_put(text: str, path: tuple[str, ...], value: Json) -> str:
    """A text with this value for a key of the outermost level. Raises Unsafe."""
    (name,) = path
    newline = newline_of(text)
    check_has_keys(text)
    for each in yaml_entries(text):
        if each.key != name:
            continue
        body = _yaml_body(text, each)
        if body == value:
            return text
        match = _YAML_SCALAR.fullmatch(each.rest)
        if isinstance(body, tuple) and body[1] or match is None and each.rest:
            raise Unsafe(f"has a value for {name} that is more than one word")
        old = match.end(1) if match is not None else 0
        lead = "" if text[each.value_at - 1] in " \t" else " "
        return text[:each.value_at] + lead + rendered(value) + text[each.value_at + old:]
    return f"{text}{yaml_end(text)}{name}: {rendered(value)}{newline}"


def yaml_end(text: str) -> str:
    """The newline that a text wants before another line. Raises Unsafe where one would become
    part of a value."""
    if not text or text.endswith("\n"):
        return ""
    last = text[yaml_entries(text)[-1].start:] if yaml_entries(text) else text
    if re.search(r"[|>][-+0-9]*[ \t]*(#[^\n]*)?\r?$", last, re.M):
        raise Unsafe("ends in a text of several lines without a newline")
    return newline_of(text)


def check_has_keys(text: str) -> None:
    """Raises Unsafe for a YAML text that is a list, where no key can stand."""
    if "" in yaml_load(text):
        raise Unsafe("is a list and not a set of keys")


def yaml_drop(text: str, path: tuple[str, ...]) -> str:
    """A text without the line of a key; it has to be there. Raises Unsafe."""
    (found,) = (each for each in yaml_entries(text) if each.key == path[0])
    stop = text.find("\n", found.value_at) + 1 or len(text)
    return text[:found.start] + text[stop:]


# ==== 6. Changes =============================================================
# A file's changes are a list of Puts, and at most one Block of lines between two markers. They can
# be applied to a text, and what was applied can be taken out of a text that has gone on since.

BEGIN, END = "# >>> ocp >>>", "# <<< ocp <<<"
_BLOCK = re.compile(
    rf"^[ \t]*{re.escape(BEGIN)}[^\n]*\n.*?^[ \t]*{re.escape(END)}[^\n]*(?:\n|\Z)", re.M | re.S
)


class Put(NamedTuple):
    """A value at a path. `default` marks what makes OCP the choice of a tool rather than one of
    its choices; `absent` leaves any other value alone; `owned` marks what is ours by its name,
    whatever it holds."""

    path: tuple[str, ...]
    value: Json
    default: bool = False
    absent: bool = False
    owned: bool = False


class Block(NamedTuple):
    """Lines between markers, at the end of the file; or as items of the YAML list of key `under`,
    where "" is a file that is itself a list; or, `in_shell`, where a shell reads them."""

    lines: tuple[str, ...]
    under: str | None = None
    in_shell: bool = False


class Whole(NamedTuple):
    """A file that is ours altogether."""

    content: str
    default: bool = False


Change = Union[Put, Block, Whole]


class Format(NamedTuple):
    """What can be done with a text of some kind."""

    load: Callable[[str], Json]
    find: Callable[[str, tuple[str, ...]], Json]
    put: Callable[[str, tuple[str, ...], Json], str]
    drop: Callable[[str, tuple[str, ...]], str]
    #: Whether what load gives is one object in the other, or flat.
    nested: bool = False
    #: Whether our lines end as the others of the file do. A shell would take a CR for a part of the
    #: last word.
    keeps_line_ends: bool = True


def _no_value(text: str, path: tuple[str, ...]) -> Json:
    raise Unsafe("has no keys")


def _no_put(text: str, path: tuple[str, ...], value: Json) -> str:
    raise Unsafe("has no keys")


FORMATS = {
    "json": Format(json_load, json_find, json_put, json_drop, nested=True),
    "toml": Format(toml_load, toml_find, toml_put, toml_drop),
    "yaml": Format(yaml_load, yaml_find, yaml_put, yaml_drop),
    "lines": Format(lambda text: {}, _no_value, _no_put, _no_value, keeps_line_ends=False),
}


def block_of(text: str) -> re.Match[str] | None:
    """Our block. Raises Unsafe when its markers are damaged."""
    begins, ends = text.count(BEGIN), text.count(END)
    match = _BLOCK.search(text)
    if (begins, ends) != ((1, 1) if match else (0, 0)):
        raise Unsafe(f"has damaged markers ({BEGIN})")
    return match


#: Words that end the reading of a start file: at the beginning of a line for every shell, elsewhere
#: perhaps for some.
_STOP = re.compile(r"^(?:(?:return|exit|logout)(?![\w=./-])|exec[ \t]+[^\s0-9{<>&])", re.M)
_MAY_STOP = re.compile(r"^[^#\n]*(?<![\w$./-])(?:return|exit|logout|exec)(?![\w=./-])", re.M)


def begins_block(text: str) -> bool:
    """Return whether lines of ours have to stand first in a start file to be read by its shell: a
    later place may follow what ends the reading, or a statement that CRs leave open. The end is
    better where the file sets the same variables itself, because the last one wins."""
    if is_cut_off(text) or text.rstrip("\n").endswith("\\"):
        return True
    return bool(_MAY_STOP.search(text)) and not own_settings(text)


def is_cut_off(text: str) -> bool:
    """Return whether a shell that reads this may not come to its end."""
    return "\r\n" in text or bool(_STOP.search(text))


def own_settings(text: str) -> list[tuple[int, str]]:
    """Return the numbers of the lines that set one of our variables, each with its variable."""
    lines = enumerate(text.splitlines(), 1)
    found = ((number, _SETTING.match(line)) for number, line in lines)
    return [(number, match[1]) for number, match in found if match]


def put_block(text: str, block: Block, newline: str) -> str:
    """A text with this block: where it was, else where it belongs. Raises Unsafe."""

    def lines(indent: str) -> str:
        inner = (BEGIN, *block.lines, END)
        return "".join((indent + line if line else "") + newline for line in inner)

    found = block_of(text)
    if found and block.in_shell and is_cut_off(text[:found.start()]):
        text, found = text[:found.start()] + text[found.end():], None
    if found is not None:
        indent = re.match(r"[ \t]*", found.group())
        assert indent is not None
        return text[:found.start()] + lines(indent.group()) + text[found.end():]
    if block.under:
        return _put_items(text, block.under, lines)
    if block.under == "":
        _check_is_list(text)
        return text + yaml_end(text) + lines("")
    if block.in_shell and begins_block(text):
        return lines("") + text
    lead = "" if not text or text.endswith("\n") else newline
    return text + lead + lines("")


def _check_is_list(text: str) -> None:
    """Raises Unsafe unless another item can stand at the end of this YAML text."""
    if yaml_entries(text):
        raise Unsafe("is not a list")
    items = _yaml_significant(text)
    if items and not items.startswith("- ") or re.search(r"[|>]\+", items):
        raise Unsafe("is not a list of items that is understood")


def _put_items(text: str, key: str, lines: Callable[[str], str]) -> str:
    """A YAML text with more items in the list of a key. Raises Unsafe."""
    newline = newline_of(text)
    check_has_keys(text)
    found = next((each for each in yaml_entries(text) if each.key == key), None)
    if found is None:
        return f"{text}{yaml_end(text)}{key}:{newline}{lines('  ')}"
    body = text[found.value_at:found.end]
    empty_list = re.match(r"\[[ \t]*\](?=[ \t]*(?:#[^\n]*)?\r?(?:\n|\Z))", body)
    if empty_list is not None:
        stop = text.find("\n", found.value_at) + 1
        text = text[:found.value_at] + text[found.value_at + empty_list.end():]
        stop = stop - empty_list.end() if stop else len(text)
        lead = "" if text[:stop].endswith("\n") else newline
        return text[:stop] + lead + lines("  ") + text[stop:]
    items = _YAML_ITEM.search(body)
    if found.rest and not found.rest.startswith("#") or re.search(r"[|>]\+", body):
        raise Unsafe(f"has a list of {key} that is not understood")
    if items is None and _yaml_significant(body):
        raise Unsafe(f"has {key} that are no list")
    # Comments at the beginning of a line after the last item belong to what follows.
    end = found.end
    for line in reversed(body.splitlines(keepends=True)):
        if line.strip() and not line.startswith("#"):
            break
        end -= len(line)
    end = max(end, found.value_at)
    if items is None:
        end = text.find("\n", found.value_at) + 1 or len(text)
    lead = "" if text[:end].endswith("\n") else newline
    return text[:end] + lead + lines(items[1] if items else "  ") + text[end:]


def drop_block(text: str, under: str | None) -> str:
    """A text without our block, and with a list that it leaves empty written as such."""
    found = block_of(text)
    if found is None:
        return text
    rest = text[:found.start()] + text[found.end():]
    for each in yaml_entries(rest) if under else ():
        if each.key == under and not _yaml_significant(rest[each.value_at:each.end]):
            space = " " if each.rest else ""
            return f"{rest[:each.value_at].rstrip()} []{space}{rest[each.value_at:]}"
    return rest


def apply_changes(text: str, kind: str, changes: Sequence[Change]) -> str:
    """A text with all changes, proved to hold them and nothing else that is new. Raises Unsafe."""
    form = FORMATS[kind]
    wanted = copy.deepcopy(form.load(text))
    result = text
    for change in changes:
        if isinstance(change, Whole):
            return change.content
        if isinstance(change, Block):
            newline = newline_of(result) if form.keeps_line_ends else "\n"
            result = put_block(result, change, newline)
        elif not (change.absent and form.find(result, change.path) is not None):
            result = form.put(result, change.path, change.value)
            _set(wanted, change, form.nested)
    if any(isinstance(change, Block) for change in changes):
        _prove_block(text, result, kind, changes)
    elif form.load(result) != wanted:
        raise Unsafe("would not hold what it should after the change")
    if kind == "json" and json_comments(result) != json_comments(text):
        raise Unsafe("has comments inside of what would be replaced")
    return result


def _set(wanted: Json, put: Put, nested: bool) -> None:
    """Does to a loaded value what a Put does to its text."""
    path = put.path if nested else (".".join(put.path),)
    for name in path[:-1]:
        wanted = wanted.setdefault(name, {})
    wanted[path[-1]] = put.value


def _prove_block(
    before: str, after: str, kind: str, changes: Sequence[Change]
) -> None:
    """Raises Unsafe unless the block is the only difference, beside the Puts."""
    form = FORMATS[kind]
    form.load(after)
    under = next((each.under for each in changes if isinstance(each, Block)), None)
    puts = [each for each in changes if isinstance(each, Put)]
    sides = []
    for text in (before, after):
        rest = drop_block(text, under)
        for put in puts:
            if not (put.absent and form.find(before, put.path) is not None):
                rest = form.put(rest, put.path, put.value)
        loaded = form.load(rest)
        if under and not isinstance(loaded.get(under), str):
            body = loaded.get(under) or as_written("")
            empty = re.fullmatch(r"(\[[ \t]*\])?\s*(#.*)?", body[1])
            loaded = {**loaded, under: "" if empty else body}
        sides.append((loaded, "" if kind != "lines" else rest.rstrip("\r\n")))
    if sides[0] != sides[1]:
        raise Unsafe("would not hold what it should after the change")


class Done(NamedTuple):
    """A change that was made: what a later undo has to know."""

    path: tuple[str, ...]
    value: Json
    #: What was there, None for nothing.
    before: Json
    #: How many of the path's objects were there already.
    depth: int
    owned: bool


def take_out(
    text: str, kind: str, done: Sequence[Done], under: str | None, has_block: bool
) -> tuple[str, list[str]]:
    """A text without what was put in, and the paths that were left because they hold something
    else by now. Raises Unsafe."""
    form, kept = FORMATS[kind], []
    for each in reversed(done):
        now = form.find(text, each.path)
        if now is None:
            continue
        if now != each.value and not each.owned:
            kept.append(".".join(each.path))
        elif each.before is not None:
            text = form.put(text, each.path, each.before)
        else:
            text = form.drop(text, each.path)
            text = _prune(text, form, each)
    if has_block:
        text = drop_block(text, under)
    form.load(text)
    return text, kept


def _prune(text: str, form: Format, done: Done) -> str:
    """Takes out the objects that were made for a value and that hold nothing any more."""
    for length in range(len(done.path) - 1, done.depth, -1):
        if form.nested and form.find(text, done.path[:length]) == {}:
            text = form.drop(text, done.path[:length])
    return text


# ==== 7. Server ==============================================================
# What the other side says about itself. Every way in which this can fail is one sentence.

DEFAULT_PORT = 3456
AUTH_MODES = ("none", "shared", "multi")

#: What is accepted of a server, which may be a wrong or a hostile one.
MAX_ANSWER_BYTES = 8_000_000
MAX_ERROR_BYTES = 64_000
MAX_MODELS = 500
MAX_TOKENS = 100_000_000
MAX_SHOWN_CHARACTERS = 300
#: The longest that one request may take, from looking up the name to the last byte.
FETCH_TIMEOUT_S = 10.0
TRIAL_TIMEOUT_S = 90.0
#: What may stand in a key. Other characters mean something in some file that the key goes to, such
#: as `${{secrets.X}}` in Continue's and `{env:X}` in OpenCode's.
KEY_PATTERN = re.compile(r"[A-Za-z0-9._~+/=-]{1,1000}")
_MODEL_ID = re.compile(r"[A-Za-z](?:[A-Za-z0-9_.:-]{0,98}[A-Za-z0-9_])?")
_EFFORT = re.compile(r"[a-z][a-z0-9_-]{0,31}")


class Model(NamedTuple):
    """A model as the server lists it."""

    id: str
    name: str
    context_tokens: int
    output_tokens: int
    reasoning: bool
    #: The levels of effort that it knows, least first.
    efforts: tuple[str, ...] = ()


class Server(NamedTuple):
    """A server that can be used. `key` is empty where it wants none."""

    url: str
    version: str
    auth_mode: str
    models: tuple[Model, ...]
    key: str

    @property
    def api(self) -> str:
        """The address that OpenAI's clients want."""
        return f"{self.url}/v1"

    @property
    def key_or_any(self) -> str:
        """A key for tools that insist on one."""
        return self.key or NO_KEY

    def _first(self, family: str, default: int) -> Model:
        named = (model for model in self.models if family in model.id)
        return next(named, self.models[default])

    @property
    def main(self) -> Model:
        """The model for everyday work."""
        return self._first("sonnet", 0)

    @property
    def cheapest(self) -> Model:
        """The model for small things."""
        return self._first("haiku", -1)


def server_address(host: str, port: int | None, https: bool) -> str:
    """The server's address out of a host name, HOST:PORT or a whole address. Raises Problem."""
    text = host.strip()
    if "://" not in text:
        text = f"[{text}]" if text.count(":") > 1 and not text.startswith("[") else text
        text = f"{'https' if https else 'http'}://{text}"
    try:
        parts = urllib.parse.urlsplit(text)
        name, named_port = parts.hostname or "", parts.port
        # What no name server could be asked for, such as two dots in a row, is a ValueError too.
        name.encode("idna")
    except ValueError:
        name, named_port = "", None
    usable = re.fullmatch(r"\w[\w.-]*|[0-9A-Fa-f:.]+(?:%\w+)?", name, re.A)
    if not usable or parts.scheme not in ("http", "https") or "@" in parts.netloc or (
            parts.path.rstrip("/") not in ("", "/v1")):
        raise Problem(Exit.USAGE, f"{clean(host)!r} is no host name or address.")
    scheme = "https" if https else parts.scheme
    shown = f"[{name}]" if ":" in name else name
    return f"{scheme}://{shown}:{port or named_port or DEFAULT_PORT}"


def checked_key(key: str, source: str) -> str:
    """Return a key that every file and header can carry. Raise Problem for any other."""
    key = key.strip()
    if not KEY_PATTERN.fullmatch(key):
        raise Problem(
            Exit.USAGE,
            f"{source} is empty or has characters that no key may have: letters, digits and any of "
            "._~+/=- are allowed.")
    return key


def quoted(text: object) -> str:
    """Return what a server says as one line of limited length."""
    return clean(text)[:MAX_SHOWN_CHARACTERS]


class OutOfTime(Exception):
    """The time limit has passed. Not an OSError, after which http.client tries the next address."""


@contextlib.contextmanager
def time_limit(limit_s: float) -> Iterator[None]:
    """Raise OutOfTime in the block once so much time has passed, whatever it waits for. Works in
    the main thread only."""
    def expire(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fetch_json(
    method: str, url: str, timeout_s: float, key: str = "", body: object = None
) -> Json:
    """Return the JSON value that a server answers, within this time and MAX_ANSWER_BYTES. No
    redirect is followed, so that the key reaches this address only. Raise HttpProblem."""
    try:
        with time_limit(timeout_s):
            status, text = _exchange(method, url, timeout_s, key, body)
    except OutOfTime:
        reason = f"no complete answer came within {timeout_s:.0f} s"
        raise HttpProblem("unreachable", reason) from None
    except (OSError, http.client.HTTPException, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem) or "no HTTP came back"
        raise HttpProblem("unreachable", quoted(reason)) from None
    if len(text) > MAX_ANSWER_BYTES:
        size = f"{MAX_ANSWER_BYTES // 1_000_000} MB"
        raise HttpProblem("refused", f"the answer is longer than {size}", status)
    try:
        if status >= 300:
            raise _refusal(status, text[:MAX_ERROR_BYTES])
        return json.loads(text, parse_int=_bounded_number)
    except RecursionError:
        raise HttpProblem("refused", "the answer is nested too deeply", status) from None
    except ValueError:
        raise HttpProblem("refused", "the answer is not JSON", status) from None


def _exchange(
    method: str, url: str, timeout_s: float, key: str, body: object
) -> tuple[int, bytes]:
    """Return the status and the body of an answer; a body above the limit is not read to its end.
    Raise OSError, HTTPException or ValueError."""
    parts = urllib.parse.urlsplit(url)
    is_secure = parts.scheme == "https"
    connect = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    content = None
    if body is not None:
        headers["Content-Type"], content = "application/json", json.dumps(body).encode()
    with contextlib.closing(connect(parts.hostname or "", parts.port, timeout=timeout_s)) as link:
        link.request(method, parts.path, content, headers)
        with contextlib.closing(link.getresponse()) as answer:
            text, piece = bytearray(), b" "
            while piece and len(text) <= MAX_ANSWER_BYTES:
                # read() would read a chunk of -1 bytes without a limit.
                piece = answer.read1(1_000_000)
                text += piece
            return answer.status, bytes(text)


def _refusal(status: int, text: bytes) -> HttpProblem:
    """Return the problem that a status stands for. Raise RecursionError."""
    problem = http_problem(status, text)
    if status < 400:
        return HttpProblem("refused", f"it redirects to another address ({status})", status)
    if problem.body is None:
        return HttpProblem(problem.kind, f"the status is {status}", status)
    return problem


def _bounded_number(digits: str) -> int | float:
    """Return an integer of JSON. One of a million digits would take Python minutes."""
    return int(digits) if len(digits) <= 18 else float(digits)


def ask_health(url: str) -> Mapping[str, Json]:
    """Return what GET /health says. Raise Problem."""
    reason = "its /health is not that of OCP"
    try:
        health = fetch_json("GET", f"{url}/health", FETCH_TIMEOUT_S)
    except HttpProblem as problem:
        if "CERTIFICATE_VERIFY_FAILED" in str(problem):
            raise Problem(
                Exit.UNREACHABLE,
                f"The certificate of {url} is not trusted here: name the file of its authority in "
                "SSL_CERT_FILE, for this script and for your tools.",
            ) from None
        if problem.kind == "unreachable":
            raise Problem(
                Exit.UNREACHABLE,
                f"Cannot reach {url} ({quoted(problem)}): is the server running, and does it "
                "listen where this machine can reach it (CLAUDE_BIND, firewall)?",
            ) from None
        health, reason = None, quoted(problem)
    if not isinstance(health, dict) or health.get("authMode") not in AUTH_MODES or not isinstance(
            health.get("version"), str):
        secure = "" if url.startswith("https") else "; if it speaks https, say --https"
        raise Problem(
            Exit.UNREACHABLE, f"What answers at {url} is not an OCP server ({reason}){secure}.")
    return health


def ask_models(url: str, key: str) -> tuple[Model, ...]:
    """Return the models that a key may use. Raise HttpProblem."""
    listed = fetch_json("GET", f"{url}/v1/models", FETCH_TIMEOUT_S, key)
    rows = listed.get("data") if isinstance(listed, dict) else None
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if len(rows) > MAX_MODELS:
        raise HttpProblem("refused", f"it lists more than {MAX_MODELS} models")
    try:
        found = {
            str(row["id"]): model_of(row, "display_name", "context_window", "max_output_tokens")
            for row in rows if _MODEL_ID.fullmatch(str(row.get("id")))}
    except ValueError as problem:
        raise HttpProblem("refused", str(problem)) from None
    if not found:
        raise HttpProblem("refused", "it lists no models")
    return tuple(found.values())


def model_of(row: Mapping[str, Json], name: str, context: str, output: str) -> Model:
    """Return the model of a row that has these names for what differs from list to list. Raise
    ValueError for a size that is not a number of tokens."""
    efforts = row.get("efforts")
    efforts = efforts if isinstance(efforts, list) else []
    return Model(
        str(row["id"]), model_name(str(row.get(name) or row["id"])),
        token_count(row, context, 200_000), token_count(row, output, 8_192),
        bool(row.get("reasoning")),
        tuple(each for each in efforts if isinstance(each, str) and _EFFORT.fullmatch(each))[:20])


def model_name(text: str) -> str:
    """Return a model's name without the characters that mean something to a terminal, or to a tool
    that finds it in its settings, such as `{env:X}`."""
    return re.sub(r"[^\w .,:()+/-]", "?", text)[:100]


def token_count(row: Mapping[str, Json], name: str, default: int) -> int:
    """Return a number of tokens, the default where there is none. Raise ValueError."""
    value = row.get(name)
    if value is None:
        return default
    if type(value) is not int or not 0 < value <= MAX_TOKENS:
        shown = clean(json.dumps(value))[:40]
        raise ValueError(f"the {name} of {row['id']} is {shown}, which is not a number of tokens")
    return value


def models_in(path: str) -> tuple[Model, ...] | None:
    """Return the models of a models.json; None if there is no such file. Raise Problem."""
    try:
        content = read_bytes(path)
        rows = json.loads(content)["models"] if content is not None else None
        return rows and tuple(
            model_of(row, "displayName", "contextWindow", "maxTokens") for row in rows)
    except (Unsafe, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Problem(Exit.FAILED, f"{path} cannot be used as a list of models.") from None


def probe(
    url: str, key: str, known_key: str, ask_key: Callable[[str], str | None]
) -> tuple[Server, Mapping[str, Json]]:
    """The server and what its /health said. `key` is the one on the command line, `known_key` the
    one of last time; `ask_key` asks the user. Raises Problem."""
    health = ask_health(url)
    keys = [key] if key else [known_key, anonymous_key(url, health), ""]
    refused = ""
    for each in dict.fromkeys(keys):
        try:
            return Server(url, quoted(health["version"]), str(health["authMode"]),
                          ask_models(url, each), each), health
        except HttpProblem as problem:
            if problem.kind != "denied":
                raise Problem(
                    Exit.FAILED, f"{url} does not list its models as OCP does: {quoted(problem)}."
                ) from None
            refused = str(problem)
    if key:
        raise Problem(Exit.DENIED, f"The key was refused: {quoted(refused)}")
    entered = ask_key(f"Key for {url}: ")
    if entered is None:
        raise Problem(Exit.USAGE, f"{url} wants a key: name it with --key.")
    if not entered.strip():
        raise Problem(Exit.DENIED, f"{url} wants a key, and none was given.")
    return probe(url, checked_key(entered, "That key"), "", ask_key)


def anonymous_key(url: str, health: Mapping[str, Json]) -> str:
    """Return the key that a server gives to everybody, empty if none. Raise Problem."""
    shown = health.get("anonymousKey") or ""
    if shown and not (isinstance(shown, str) and KEY_PATTERN.fullmatch(shown)):
        raise Problem(
            Exit.FAILED,
            f"{url} advertises a key with characters that no key may have, so nothing is written. "
            "Name a key of your own with --key.")
    return shown


def try_request(server: Server) -> str:
    """The text of one real answer from the cheapest model. Raises HttpProblem."""
    body = {
        "model": server.cheapest.id, "max_tokens": 32,
        "messages": [{"role": "user", "content": "Reply with the word OK."}],
    }
    answer = fetch_json(
        "POST", f"{server.api}/chat/completions", TRIAL_TIMEOUT_S, server.key, body)
    try:
        return str(answer["choices"][0]["message"]["content"])
    except (TypeError, KeyError, IndexError):
        raise HttpProblem("refused", "its answer is no chat completion") from None


# ==== 8. Tools ===============================================================
# One function for each tool says which steps it takes; it reads files but changes nothing. A new
# tool is one function and one row of TOOLS.


#: What OCP is called among OpenClaw's providers, unless another name is chosen.
OPENCLAW_PROVIDER = "claude-local"


class Role(enum.Enum):
    """Whether OCP becomes a tool's choice: where it has none yet, always, or never."""

    AUTO = "auto"
    PRIMARY = "primary"
    BACKUP = "backup"


class FileStep(NamedTuple):
    """Changes to one file. With a command, that makes them; it is given them as one object."""

    path: str
    kind: str
    changes: tuple[Change, ...]
    why: str
    command: tuple[str, ...] = ()
    #: What the plan has to say about the file.
    notes: tuple[str, ...] = ()


class RunStep(NamedTuple):
    """A command that sets a variable of the session, on macOS."""

    name: str
    value: str


class Hint(NamedTuple):
    """Something for the user to read or to do."""

    text: str


Step = Union[FileStep, RunStep, Hint]


@dataclasses.dataclass(frozen=True)
class Desk:
    """What a tool's function has before it. `look` gives a file's text as it is without us."""

    machine: Machine
    server: Server
    role: Role
    allow_fallback: bool
    anthropic: bool
    look: Callable[[str], str]
    #: What OCP is to be called among a tool's providers, empty if nothing was asked for; and what
    #: an earlier run has called it there. with_name fills both in for one tool.
    provider: str = ""
    earlier: str = ""

    @property
    def key_words(self) -> str:
        """What to type into a field for a key, without showing one."""
        if not self.server.key:
            return f"anything, for example {NO_KEY}"
        return "what `cat " + shlex.quote(os.path.join(self.machine.own, "key")) + "` prints"

    def lines_of(self, *words: str) -> str:
        """A hint of several lines, with address, key and model filled in."""
        return "\n".join(words).format(
            api=self.server.api, url=self.server.url, key=self.key_words,
            model=self.server.main.id)


#: The providers that a text names, each with what stands there.
Providers = Callable[[str], Mapping[str, Json]]


def providers_at(*place: str) -> Providers:
    """Return what finds the providers of a JSON text at this place."""
    def found(text: str) -> Mapping[str, Json]:
        value = json_find(text, place)
        return value if isinstance(value, dict) else {}

    return found


def value_at(entry: Json, *path: str) -> str:
    """Return the text at a path of a JSON value, empty where there is none."""
    for name in path:
        entry = entry.get(name) if isinstance(entry, dict) else None
    return entry if isinstance(entry, str) else ""


def with_name(
    desk: Desk, title: str, default: str, path: str, providers: Providers,
    address: Callable[[Json], str],
) -> tuple[Desk, tuple[str, ...]]:
    """Return the desk with OCP's name among the providers of a file, and what to say about it. It
    is the name that was asked for, else that of an earlier run, else the first of NAME, NAME-2 and
    so on that is not the user's. `address` says where a provider leads, "" where that is not
    known: one that leads to this server is ours. Raises Problem if the user has the name that was
    asked for."""
    now, base = _providers_of(desk, path, providers)

    def is_theirs(name: str) -> bool:
        return name in base and not same_server(address(base[name]), desk.server.url)

    earlier = next((name for name in now if now[name] != base.get(name)), "")
    if desk.provider and is_theirs(desk.provider):
        place = address(base[desk.provider])
        raise Problem(Exit.USAGE, f"{title} has a provider {desk.provider} of your own already"
                                  f"{place and ', for ' + clean(place)}: choose another name with "
                                  "--provider-name.")
    numbered = (f"{default}-{number}" for number in itertools.count(2))
    names = filter(None, itertools.chain((desk.provider, earlier, default), numbered))
    name = next(each for each in names if not is_theirs(each))
    note = (f"{default} in it is a provider of your own and stays: OCP is called {name}, or what "
            "--provider-name says")
    return (dataclasses.replace(desk, provider=name, earlier=earlier),
            (note,) if is_theirs(default) else ())


def _providers_of(
    desk: Desk, path: str, providers: Providers
) -> tuple[Mapping[str, Json], Mapping[str, Json]]:
    """The providers of a file as it is, and without us; none where it cannot be read."""
    with contextlib.suppress(Unsafe):
        return providers(decoded(read_bytes(path))), providers(desk.look(path))
    return {}, {}


def own_files(desk: Desk) -> list[Step]:
    """The key, where tools can read it."""
    path = os.path.join(desk.machine.own, "key")
    return [FileStep(path, "lines", (Whole(desk.server.key),), "the key, for your eyes only")]


def variables(desk: Desk) -> dict[str, str]:
    """What programs find in their environment."""
    server = desk.server
    found = {
        "OPENAI_BASE_URL": server.api, "OPENAI_API_BASE": server.api,
        "OPENAI_API_KEY": server.key_or_any, "OCP_API_KEY": server.key_or_any,
    }
    if desk.anthropic:
        found.update(ANTHROPIC_BASE_URL=server.url, ANTHROPIC_AUTH_TOKEN=server.key_or_any)
    return found


#: The variables that are set, whatever is chosen.
VARIABLES = ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_API_KEY", "OCP_API_KEY",
             "ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN")
_SETTING = re.compile(
    rf"[ \t]*(?:(?:export|setenv|typeset|declare|set)[ \t]+)?(?:-\w+[ \t]+)*({'|'.join(VARIABLES)})"
    r"(?![\w])[ \t]*[= \t]")


class Shell(NamedTuple):
    """How a family of shells learns the variables: from `script`, which is ours. `start_files` of
    the user's read it with the line `reads`; a shell without them finds it by itself."""

    script: str
    setting: str
    quoted: Callable[[str], str]
    reads: str = ""
    start_files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def shells(machine: Machine) -> list[Shell]:
    """Return the families of shells that are used here, the one of sh always first."""
    found = [Shell(os.path.join(machine.own, "env.sh"), "export {}={}", shlex.quote,
                   "if [ -r {0} ]; then . {0}; fi", tuple(shell_files(machine)))]
    csh = csh_files(machine)
    if csh:
        found.append(Shell(os.path.join(machine.own, "env.csh"), "setenv {} {}", csh_quoted,
                           "if ( -r {0} ) source {0}", tuple(csh)))
    fish = os.path.join(machine.config_home, "fish")
    if machine.shell == "fish" or os.path.isdir(fish):
        found.append(Shell(os.path.join(fish, "conf.d", "ocp.fish"), "set -gx {} {}", fish_quoted,
                           notes=tuple(fish_notes(os.path.join(fish, "config.fish")))))
    nushell = nushell_folder(machine)
    if machine.shell == "nu" or os.path.isdir(nushell):
        found.append(Shell(os.path.join(nushell, "autoload", "ocp.nu"), "$env.{} = {}", json.dumps,
                           notes=("Nushell reads this folder from 0.101 on",)))
    return found


#: How long zsh may take to say where it looks.
ZSH_TIMEOUT_S = 10.0


def zsh_folder(machine: Machine) -> str:
    """Return the folder of .zshrc. Only zsh itself knows what its .zshenv makes of ZDOTDIR."""
    if os.path.lexists(machine.below(".zshenv")) and machine.program("zsh"):
        ran = machine.run("zsh", "-c", 'print -r -- "=$ZDOTDIR"', timeout_s=ZSH_TIMEOUT_S)
        said = [line[1:] for line in ran.output.splitlines() if line.startswith("=")]
        if said and os.path.isabs(said[-1]):
            return said[-1]
    return machine.named("ZDOTDIR")


def shell_files(machine: Machine) -> list[str]:
    """The start files of the shells of sh's family that are used here."""
    zsh = os.path.join(zsh_folder(machine), ".zshrc")
    bash, found = machine.below(".bashrc"), []
    if machine.shell == "bash" or os.path.lexists(bash):
        found.append(bash)
        if machine.platform == "darwin":
            # A login shell, which is what Terminal opens, reads the first of these instead.
            login = [machine.below(name) for name in (".bash_profile", ".bash_login", ".profile")]
            found.append(next(filter(os.path.lexists, login), login[0]))
    if machine.shell == "zsh" or os.path.lexists(zsh) or machine.platform == "darwin":
        found.append(zsh)
    if not found and machine.shell not in OTHER_SHELLS:
        found.append(machine.below(".profile"))
    return found


#: Shells that read nothing of what is written for sh.
OTHER_SHELLS = ("fish", "nu", "csh", "tcsh", "elvish", "xonsh", "pwsh")


def csh_files(machine: Machine) -> list[str]:
    """Return the start files of csh and tcsh, if one of them is used here. tcsh reads .cshrc only
    where there is no .tcshrc."""
    names = [machine.below(name) for name in (".tcshrc", ".cshrc")]
    found = [path for path in names if os.path.lexists(path)]
    return found or names[1:] * (machine.shell in ("csh", "tcsh"))


def nushell_folder(machine: Machine) -> str:
    """Return where Nushell keeps its settings."""
    mac = machine.platform == "darwin" and not machine.environ.get("XDG_CONFIG_HOME")
    folder = machine.below("Library", "Application Support") if mac else machine.config_home
    return os.path.join(folder, "nushell")


def shell_steps(desk: Desk) -> list[Step]:
    """Variables for shells, and for what the desktop starts."""
    machine, names, found = desk.machine, variables(desk), shells(desk.machine)
    steps: list[Step] = []
    for shell in found:
        sets = tuple(shell.setting.format(name, shell.quoted(value))
                     for name, value in names.items())
        why = "the variables" if shell.reads else "new shells have the variables"
        steps.append(FileStep(shell.script, "lines", (Block(sets),), why, notes=shell.notes))
        line = shell.reads.format(shell.quoted(shell.script))
        steps += [start_file_step(machine, path, line) for path in shell.start_files]
    if machine.shell in OTHER_SHELLS and len(steps) == 1:
        steps.append(Hint(f"{machine.shell} reads no file that is written here: set in its own "
                          f"start file what stands in {machine.short(found[0].script)}."))
    return steps + session_steps(desk, names)


def start_file_step(machine: Machine, path: str, line: str) -> FileStep:
    """Return the step that has a start file of the user's read a script of ours."""
    change, notes = Block((line,), in_shell=True), []
    with contextlib.suppress(Unsafe):
        text = put_block(decoded(read_bytes(path)), change, "\n")
        block = block_of(text)
        assert block is not None
        notes = start_file_notes(path, text, text[:block.end()].count("\n"))
    return FileStep(path, "lines", (change,), "new shells read the variables", notes=tuple(notes))


def start_file_notes(path: str, text: str, last_line: int) -> list[str]:
    """Return what is wrong with a start file that has our lines up to this one."""
    found = []
    if "\r\n" in text:
        found.append("it has lines that end with CR LF, which no shell reads right: OCP's stand "
                     "first and end with LF; mend the others with "
                     f"`perl -pi -e 's/\\r$//' {shlex.quote(path)}`")
    if "# OCP LAN (added by ocp connect)" in text:
        found.append("it has an older block of OCP's (# OCP LAN): remove it")
    return found + winning_lines(text, last_line)


def winning_lines(text: str, last_line: int = 0, place: str = "") -> list[str]:
    """Return a sentence for each setting after this line of a text, which `place` names."""
    return [f"line {number}{place} sets {variable} after OCP's lines, and wins: remove it there"
            for number, variable in own_settings(text) if number > last_line]


def fish_notes(path: str) -> list[str]:
    """Return what wins over our file in fish, which reads this file of the user's last."""
    with contextlib.suppress(Unsafe):
        return winning_lines(decoded(read_bytes(path)), place=" of config.fish")
    return []


#: The login agent that sets the variables again after each login on macOS.
AGENT_LABEL = "dev.ocp.environment"


def session_steps(desk: Desk, names: Mapping[str, str]) -> list[Step]:
    """Variables for programs that no shell has started."""
    machine = desk.machine
    if machine.platform == "darwin":
        path = machine.below("Library", "LaunchAgents", f"{AGENT_LABEL}.plist")
        agent = login_agent(names)
        return [FileStep(path, "lines", (Whole(agent),), "sets the variables at each login"),
                *(RunStep(name, value) for name, value in names.items())]
    if not machine.has_systemd:
        return []
    if not all(re.fullmatch(r"[\w.:/@%+=-]+", value) for value in names.values()):
        return [Hint("The key has characters that environment.d may read differently: programs "
                     "that the desktop starts do not get the variables.")]
    path = os.path.join(machine.config_home, "environment.d", "ocp.conf")
    lines = tuple(f"{name}={value}" for name, value in names.items())
    return [FileStep(path, "lines", (Block(lines),), "the desktop's programs have the variables")]


def login_agent(names: Mapping[str, str]) -> str:
    """The property list of a login agent that sets these variables."""
    script = "; ".join(
        f"launchctl setenv {name} {shlex.quote(value)}" for name, value in names.items())
    return plistlib.dumps({
        "Label": AGENT_LABEL, "RunAtLoad": True, "ProgramArguments": ["/bin/sh", "-c", script],
    }).decode()


def openclaw_folder(machine: Machine) -> str:
    """OpenClaw's state folder, by its own variables."""
    home = machine.named("OPENCLAW_HOME")
    return machine.named("OPENCLAW_STATE_DIR", os.path.join(home, ".openclaw"))


def openclaw_config(machine: Machine) -> str:
    """OpenClaw's configuration file: what OpenClaw says, else by its rules."""
    if machine.program("openclaw"):
        said = machine.run("openclaw", "config", "file").output.strip().splitlines()
        path = said[-1].strip() if said else ""
        path = os.path.join(machine.home, path[2:]) if path.startswith("~/") else path
        if os.path.isabs(path):
            return path
    named = machine.environ.get("OPENCLAW_CONFIG_PATH", "")
    return named if os.path.isabs(named) else os.path.join(
        openclaw_folder(machine), "openclaw.json")


#: OpenClaw's own word for a provider that wants no key. Any other is taken for a secret, which its
#: doctor copies into a store that wins over the configuration from then on.
OPENCLAW_NO_KEY = "custom-local"
#: Above the server's own limit of 600 s, so that its words arrive before OpenClaw gives up.
OPENCLAW_TIMEOUT_S = 660
#: How the models of a provider end that OCP has listed.
OPENCLAW_SUFFIX = " (via CLI)"
_OPENCLAW_PROVIDERS = ("models", "providers")
_OPENCLAW_SECRETS = ("secrets", "providers")


def openclaw_row(model: Model) -> dict[str, Json]:
    """One model as OpenClaw lists it."""
    compat: dict[str, Json] = {
        "supportsPromptCacheKey": True, "supportsReasoningEffort": model.reasoning}
    if model.efforts:
        # Without "none", OpenClaw's "off" would be the model's own default.
        compat["supportedReasoningEfforts"] = ["none", *model.efforts]
    return {
        "id": model.id, "name": model.name + OPENCLAW_SUFFIX, "reasoning": model.reasoning,
        "input": ["text", "image"],
        # The plan pays, not the token.
        "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
        "contextWindow": model.context_tokens, "maxTokens": model.output_tokens,
        "compat": compat,
    }


def openclaw_provider(desk: Desk, secret: str, present: Json) -> list[Change]:
    """The provider, with what the user has added to its present list of models. The key is read
    from our own file, which OpenClaw calls `secret`: what stands in OpenClaw's configuration is
    shown to its agents, and a key there would be copied by its doctor."""
    server = desk.server
    key: Json = OPENCLAW_NO_KEY
    changes: list[Change] = []
    if server.key:
        path = os.path.join(desk.machine.own, "key")
        changes.append(Put((*_OPENCLAW_SECRETS, secret), {
            "source": "file", "path": path, "mode": "singleValue"}, owned=True))
        key = {"source": "file", "provider": secret, "id": "value"}
    entry = {"baseUrl": server.api, "apiKey": key, "api": "openai-completions",
             "timeoutSeconds": OPENCLAW_TIMEOUT_S,
             "models": openclaw_list(present, server.models)}
    return [*changes, Put((*_OPENCLAW_PROVIDERS, desk.provider), entry, owned=True)]


def _openclaw_rows(desk: Desk, path: str) -> Json:
    """The list of models that we have here already, None if there is none."""
    with contextlib.suppress(Unsafe):
        text = decoded(read_bytes(path))
        for name in (desk.provider, desk.earlier):
            entry = json_find(text, (*_OPENCLAW_PROVIDERS, name))
            url = entry.get("baseUrl") if isinstance(entry, dict) else None
            if url and (name == desk.earlier or same_server(str(url), desk.server.url)):
                return entry.get("models")
    return None


def openclaw_steps(desk: Desk) -> list[Step]:
    """The provider, and the place of its models among the others. Raises Problem."""
    machine, path = desk.machine, openclaw_config(desk.machine)
    key_file = os.path.join(machine.own, "key")
    secret, _ = with_name(
        dataclasses.replace(desk, provider=""), "OpenClaw", "ocp", path,
        providers_at(*_OPENCLAW_SECRETS),
        lambda entry: desk.server.url if value_at(entry, "path") == key_file else "")
    desk, notes = with_name(
        desk, "OpenClaw", OPENCLAW_PROVIDER, path, providers_at(*_OPENCLAW_PROVIDERS),
        lambda entry: value_at(entry, "baseUrl"))
    place, hints = _openclaw_place(desk, path)
    rows = _openclaw_rows(desk, path)
    changes = (*openclaw_provider(desk, secret.provider, rows), *place)
    why = f"provider {desk.provider} with every model"
    command = openclaw_command(machine, [desk.provider])
    return [FileStep(path, "json", changes, why, command, notes), *hints, *_openclaw_hints(desk)]


def _openclaw_place(desk: Desk, path: str) -> tuple[list[Change], list[Step]]:
    """Which model OpenClaw asks first, and whom it asks when that fails; and what to say."""
    ours = f"{desk.provider}/{desk.server.main.id}"
    base, now = _openclaw_choice(desk.look, path), _openclaw_present(desk, path)
    # What was chosen in OpenClaw since the last run stays, unless a place is asked for now.
    is_asked = desk.role is not Role.AUTO
    role = desk.role if is_asked else _openclaw_role(now, f"{desk.provider}/")
    if role is Role.BACKUP:
        others = [each for each in base.fallbacks if each != ours]
        return _openclaw_backup(base, [*others, ours] if is_asked else now.fallbacks), []
    if role is Role.AUTO and base.primary:
        return [], [Hint(
            f"OpenClaw: your primary model stays {base.primary}; `/model {ours}` uses OCP in a "
            "chat, --primary makes it the first, --backup a fallback.")]
    first, fallbacks = ours, base.fallbacks if desk.allow_fallback else []
    if role is Role.PRIMARY and not is_asked:
        listed = [f"{desk.provider}/{model.id}" for model in desk.server.models]
        first = now.primary if now.primary in listed else ours
        fallbacks = base.fallbacks if desk.allow_fallback else now.fallbacks
    hint = Hint(
        "OpenClaw: as primary model OCP has no fallback: when it cannot answer, OpenClaw says so "
        "instead of quietly spending another provider. --allow-fallback keeps the fallbacks that "
        "you have.")
    change = Put(_OPENCLAW_MODEL, {"primary": first, "fallbacks": fallbacks})
    return [change], [] if fallbacks else [hint]


def openclaw_command(machine: Machine, names: Sequence[str]) -> tuple[str, ...]:
    """What changes OpenClaw's configuration, if it is installed. Of the lists of models of these
    providers, rows may go."""
    if not machine.program("openclaw"):
        return ()
    lists = (("--replace-path", f"models.providers[{json.dumps(name)}].models") for name in names)
    return ("openclaw", "config", "patch", "--stdin", *(word for pair in lists for word in pair))


def same_server(url: str, other: str) -> bool:
    """Whether two addresses lead to one server, as far as can be told from here."""
    try:
        sides = [urllib.parse.urlsplit(each) for each in (url, other)]
        ports = [side.port or (443 if side.scheme == "https" else 80) for side in sides]
    except ValueError:
        return False
    hosts = [side.hostname or "" for side in sides]
    # Names are looked up last: most providers are elsewhere, and need not hear of this.
    return ports[0] == ports[1] and all(hosts) and (
        hosts[0] == hosts[1] or all(map(is_this_machine, hosts)))


def openclaw_names(text: str, url: str) -> list[str]:
    """The providers of a configuration that lead to this server. Raises Unsafe."""
    providers = json_find(text, _OPENCLAW_PROVIDERS)
    found = providers.items() if isinstance(providers, dict) else ()
    return [name for name, entry in found if isinstance(entry, dict)
            and same_server(str(entry.get("baseUrl")), url)]


def openclaw_list(present: Json, models: Sequence[Model]) -> list[Json]:
    """A provider's list of models brought up to date: what the user has added to a row, and rows
    that are no work of OCP, stay."""
    rows = [row for row in present if isinstance(row, dict)] if isinstance(present, list) else []
    by_id = {str(row.get("id")): row for row in rows}
    found: list[Json] = []
    for model in models:
        row, before = openclaw_row(model), by_id.get(model.id, {})
        compat = before.get("compat")
        compat = {**(compat if isinstance(compat, dict) else {}), **row["compat"]}
        found.append({**before, **row, "compat": compat})
    known = {model.id for model in models}
    return found + [row for row in rows if str(row.get("id")) not in known
                    and not str(row.get("name")).endswith(OPENCLAW_SUFFIX)]


_OPENCLAW_MODEL = ("agents", "defaults", "model")


class Choice(NamedTuple):
    """OpenClaw's default model and its fallbacks, and whether it is written as an object."""

    primary: str
    fallbacks: list[str]
    is_object: bool


def _openclaw_choice(look: Callable[[str], str], path: str) -> Choice:
    """What a configuration chooses; nothing where it cannot be read."""
    try:
        now = json_find(look(path), _OPENCLAW_MODEL)
    except Unsafe:
        now = None
    if not isinstance(now, dict):
        return Choice(now if isinstance(now, str) else "", [], False)
    listed = now.get("fallbacks")
    fallbacks = [each for each in listed if isinstance(each, str)] if isinstance(
        listed, list) else []
    return Choice(str(now.get("primary") or ""), fallbacks, True)


def _openclaw_present(desk: Desk, path: str) -> Choice:
    """What the configuration chooses as it is, with us under the name that we are to have."""
    now = _openclaw_choice(lambda name: decoded(read_bytes(name)), path)

    def renamed(ref: str) -> str:
        mine = desk.earlier and ref.startswith(f"{desk.earlier}/")
        return desk.provider + ref[len(desk.earlier):] if mine else ref

    return now._replace(
        primary=renamed(now.primary), fallbacks=[renamed(each) for each in now.fallbacks])


def _openclaw_role(now: Choice, mine: str) -> Role:
    """The place that OCP, whose models begin with `mine`, has already."""
    if now.primary.startswith(mine):
        return Role.PRIMARY
    return Role.BACKUP if any(each.startswith(mine) for each in now.fallbacks) else Role.AUTO


def _openclaw_backup(base: Choice, fallbacks: list[str]) -> list[Change]:
    """The change that makes these the fallbacks; none where there is nothing to back up."""
    if base.is_object:
        # The rest is not written again: OpenClaw would ask the other provider whether it is right.
        return [Put((*_OPENCLAW_MODEL, "fallbacks"), fallbacks)]
    return [Put(_OPENCLAW_MODEL, {"primary": base.primary, "fallbacks": fallbacks})
            ] if base.primary else []


def _openclaw_hints(desk: Desk) -> list[Step]:
    """What is left to say about OpenClaw."""
    machine = desk.machine
    hints: list[Step] = [Hint(
        "OpenClaw: a running gateway starts a turn every 30 minutes by itself, which spends your "
        "plan. `openclaw config set agents.defaults.heartbeat.every 0m` stops that.")]
    with contextlib.suppress(Unsafe):
        known = decoded(read_bytes(os.path.join(machine.own, "key"))).strip()
        if desk.server.key and known not in ("", desk.server.key):
            hints.append(Hint("OpenClaw: a running gateway knows the earlier key until you run "
                              "`openclaw secrets reload`."))
    pattern = os.path.join(
        glob.escape(openclaw_folder(machine)), "agents", "*", "agent", "auth-profiles.json")
    for path in sorted(glob.glob(pattern)):
        with contextlib.suppress(Unsafe):
            if f'"{desk.provider}'.encode() in (read_bytes(path) or b""):
                hints.append(Hint(
                    f"OpenClaw: {machine.short(path)} is of a retired format and names "
                    f"{desk.provider}, which makes turns fail: run `openclaw doctor --fix`."))
    return hints


def continue_steps(desk: Desk) -> list[Step]:
    """A model entry for each model."""
    folder = desk.machine.named("CONTINUE_GLOBAL_DIR", ".continue")
    path, old = os.path.join(folder, "config.yaml"), os.path.join(folder, "config.json")
    lines: list[str] = []
    for model in sorted(desk.server.models, key=lambda each: each is not desk.server.main):
        lines += [
            f"- name: {json.dumps(model.name + ' (OCP)')}",
            "  provider: openai",
            f"  model: {model.id}",
            f"  apiBase: {json.dumps(desk.server.api)}",
            f"  apiKey: {json.dumps(desk.server.key_or_any)}",
            "  roles: [chat, edit, apply]",
            "  capabilities: [tool_use, image_input]",
            "  defaultCompletionOptions:",
            f"    contextLength: {model.context_tokens}",
        ]
    changes: tuple[Change, ...] = (
        *(Put((name,), value, absent=True)
          for name, value in (("name", "Local"), ("version", "1.0.0"), ("schema", "v1"))),
        Block(tuple(lines), under="models"),
    )
    steps: list[Step] = [FileStep(path, "yaml", changes, "an entry for each model")]
    if os.path.exists(old) and not os.path.exists(path):
        steps.append(Hint(f"Continue: {desk.machine.short(old)} is of the older format; Continue "
                          "reads only config.yaml once there is one."))
    return steps


def opencode_config(machine: Machine) -> str:
    """The file that OpenCode reads last."""
    named = machine.environ.get("OPENCODE_CONFIG", "")
    folder = os.path.join(machine.config_home, "opencode")
    names = ("opencode.jsonc", "opencode.json")
    found = [os.path.join(folder, name) for name in names]
    return named if os.path.isabs(named) else next(filter(os.path.exists, found), found[-1])


def opencode_steps(desk: Desk) -> list[Step]:
    """A provider, and the two models that OpenCode wants to know."""
    server, path = desk.server, opencode_config(desk.machine)
    desk, notes = with_name(desk, "OpenCode", "ocp", path, providers_at("provider"),
                            lambda entry: value_at(entry, "options", "baseURL"))
    models = {model.id: {
        "name": model.name, "attachment": True, "reasoning": model.reasoning, "tool_call": True,
        "limit": {"context": model.context_tokens, "output": model.output_tokens},
    } for model in server.models}
    # The file is often kept in a repository: the key stays out of it.
    key = f"{{file:{os.path.join(desk.machine.own, 'key')}}}" if server.key else NO_KEY
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "OCP",
                "options": {"baseURL": server.api, "apiKey": key}, "models": models}
    return [FileStep(path, "json", (
        Put(("$schema",), "https://opencode.ai/config.json", absent=True),
        Put(("model",), f"{desk.provider}/{server.main.id}", default=True),
        Put(("small_model",), f"{desk.provider}/{server.cheapest.id}", default=True),
        Put(("provider", desk.provider), provider, owned=True),
    ), f"provider {desk.provider} with every model", notes=notes)]


def aider_steps(desk: Desk) -> list[Step]:
    """The address, and the models that Aider starts with."""
    server = desk.server
    puts = (
        ("openai-api-base", server.api), ("openai-api-key", server.key_or_any),
        ("model", f"openai/{server.main.id}"), ("weak-model", f"openai/{server.cheapest.id}"),
        ("show-model-warnings", False),
    )
    changes = tuple(Put((name,), value, default=True) for name, value in puts)
    return [FileStep(desk.machine.below(".aider.conf.yml"), "yaml", changes,
                     "address, key and models")]


def codex_providers(text: str) -> Mapping[str, Json]:
    """Return the providers of Codex's configuration: of each its statements, and whether they stand
    in our block. Raises Unsafe."""
    block = block_of(text)
    start, end = block.span() if block else (0, 0)
    found: dict[str, Json] = {}
    for each in toml_statements(text):
        if each.path[0] == "model_providers" and each.path[1:2] not in ((), ("[]",)):
            row = (each.path, each.value, start <= each.start < end)
            found.setdefault(each.path[1], []).append(row)
    return found


def codex_steps(desk: Desk) -> list[Step]:
    """A provider of the responses API, and the choice of it."""
    server = desk.server
    path = os.path.join(desk.machine.named("CODEX_HOME", ".codex"), "config.toml")
    # A table of the user's stays also where it leads here: nothing can be put into it.
    desk, notes = with_name(desk, "Codex", "ocp", path, codex_providers,
                            lambda rows: server.url if all(row[2] for row in rows) else "")
    name, window = desk.provider, server.main.context_tokens
    lines = [f"[model_providers.{name}]", 'name = "OCP"', f"base_url = {json.dumps(server.api)}",
             'wire_api = "responses"']
    if server.key:
        lines.append(f"experimental_bearer_token = {json.dumps(server.key)}")
    return [FileStep(path, "toml", (
        Put(("model",), server.main.id, default=True),
        Put(("model_provider",), name, default=True),
        # Else Codex takes 272,000 tokens for every model that it does not know.
        Put(("model_context_window",), window, default=True),
        Block(tuple(lines)),
    ), f"provider {name}", notes=notes), Hint(
        f"Codex: `codex -c model_provider={name} -c model_context_window={window} "
        f"-m {server.main.id}` uses OCP whatever the default is.")]


def cline_steps(desk: Desk) -> list[Step]:
    """The provider settings of Cline's command line program, which keeps them in a file."""
    server = desk.server
    path = desk.machine.below(".cline", "data", "settings", "providers.json")
    place = ("providers", "openai-compatible")
    settings = {"provider": "openai-compatible", "apiKey": server.key_or_any,
                "model": server.main.id, "baseUrl": server.api}
    return [FileStep(path, "json", (
        Put(("version",), 1, absent=True),
        Put(("modes",), {}, absent=True),
        Put(("lastUsedProvider",), "openai-compatible", default=True),
        Put((*place, "settings"), settings, default=True),
        Put((*place, "updatedAt"), "2025-01-01T00:00:00.000Z", absent=True),
        Put((*place, "tokenSource"), "manual", absent=True),
    ), "its openai-compatible provider")]


def llm_folder(machine: Machine) -> str:
    """Where llm keeps its settings."""
    mac = machine.below("Library", "Application Support", "io.datasette.llm")
    usual = mac if machine.platform == "darwin" else os.path.join(
        machine.config_home, "io.datasette.llm")
    return machine.named("LLM_USER_PATH", usual)


def llm_steps(desk: Desk) -> list[Step]:
    """The models, their key, and the one that is meant when none is named."""
    folder, server, lines = llm_folder(desk.machine), desk.server, []
    keys = os.path.join(folder, "keys.json")
    desk, notes = with_name(desk, "llm", "ocp", keys, providers_at(),
                            lambda key: server.url if key == server.key_or_any else "")
    name = desk.provider
    for model in server.models:
        lines += [
            f"- model_id: {name}/{model.id}", f"  model_name: {model.id}",
            f"  api_base: {json.dumps(server.api)}", f"  api_key_name: {name}",
            "  supports_tools: true", "  supports_schema: true", "  vision: true",
        ]
    return [
        FileStep(os.path.join(folder, "extra-openai-models.yaml"), "yaml",
                 (Block(tuple(lines), under=""),), f"every model, as {name}/MODEL"),
        FileStep(keys, "json", (Put((name,), server.key_or_any, owned=True),),
                 "the key for them", notes=notes),
        FileStep(os.path.join(folder, "default_model.txt"), "lines",
                 (Whole(f"{name}/{server.main.id}", default=True),), "the default model"),
    ]


def claude_code_file(machine: Machine) -> str:
    """Claude Code's settings of this user."""
    return os.path.join(machine.named("CLAUDE_CONFIG_DIR", ".claude"), "settings.json")


def claude_code_steps(desk: Desk) -> list[Step]:
    """Address and key for Claude Code; only when that was asked for."""
    if not desk.anthropic:
        return [Hint("Claude Code is left alone. --anthropic points it at OCP, on a machine other "
                     "than the server's.")]
    return [FileStep(claude_code_file(desk.machine), "json", (
        Put(("env", "ANTHROPIC_BASE_URL"), desk.server.url),
        Put(("env", "ANTHROPIC_AUTH_TOKEN"), desk.server.key_or_any),
    ), "address and key for Claude Code")]


def zed_file(machine: Machine) -> str:
    """Zed's settings."""
    folder = machine.below(".config") if machine.platform == "darwin" else machine.config_home
    return os.path.join(folder, "zed", "settings.json")


def zed_steps(desk: Desk) -> list[Step]:
    """A provider and the agent's default model. Zed takes the key from its environment."""
    path, place = zed_file(desk.machine), ("language_models", "openai_compatible")
    desk, notes = with_name(desk, "Zed", "OCP", path, providers_at(*place),
                            lambda entry: value_at(entry, "api_url"))
    models = [{
        "name": model.id, "display_name": f"{model.name} (OCP)",
        "max_tokens": model.context_tokens, "max_output_tokens": model.output_tokens,
        "capabilities": {"tools": True, "images": True, "parallel_tool_calls": True,
                         "prompt_cache_key": False},
    } for model in desk.server.models]
    name, provider = desk.provider, {"api_url": desk.server.api, "available_models": models}
    return [FileStep(path, "json", (
        Put((*place, name), provider, owned=True),
        Put(("agent", "default_model"), {"provider": name, "model": desk.server.main.id},
            default=True),
    ), f"provider {name} with every model", notes=notes), zed_hint(name)]


def zed_hint(name: str) -> Hint:
    """Return where Zed takes the key of a provider from: a variable with the provider's name."""
    settings = f"enter the key in Agent Settings, LLM Providers, {name}."
    if name.upper() != "OCP":
        return Hint(f"Zed: {settings}")
    return Hint("Zed takes the key from OCP_API_KEY in its environment: log in again, or start it "
                f"from a new shell; or {settings}")


def hint_steps(*lines: str) -> Callable[[Desk], list[Step]]:
    """The steps of a tool that keeps its settings where no script can put them."""
    return lambda desk: [Hint(desk.lines_of(*lines))]


class Tool(NamedTuple):
    """A program that can use the server. It is here if one of `programs` is on the PATH, or one of
    `places` (patterns in the home folder) is there."""

    name: str
    title: str
    programs: tuple[str, ...]
    places: tuple[str, ...]
    steps: Callable[[Desk], list[Step]]
    #: What to do afterwards, for the change to be seen.
    after: str = ""
    #: A command of the tool itself that fails when it cannot read what was written. One that
    #: writes its file by a command of its own has judged it then.
    check: tuple[str, ...] = ()

    def is_here(self, machine: Machine) -> bool:
        """Whether it seems to be installed."""
        if any(machine.program(each) for each in self.programs):
            return True
        for place in self.places:
            inside = place.startswith(".config/")
            folder = machine.config_home if inside else machine.home
            place = place[len(".config/"):] if inside else place
            if glob.glob(os.path.join(glob.escape(folder), place)):
                return True
        return False


TOOLS = (
    Tool("shell", "Shells and SDKs", ("sh",), (), shell_steps, "open a new terminal"),
    Tool("openclaw", "OpenClaw", ("openclaw",), (".openclaw/openclaw.json",), openclaw_steps,
         "a running gateway reads the change by itself"),
    Tool("opencode", "OpenCode", ("opencode",), (".config/opencode", ".opencode/bin/opencode"),
         opencode_steps, "restart OpenCode", ("opencode", "debug", "config")),
    Tool("codex", "Codex", ("codex",), (".codex",), codex_steps, "restart Codex",
         ("codex", "features", "list")),
    Tool("continue", "Continue", ("cn",),
         (".continue", ".vscode/extensions/continue.continue-*"), continue_steps,
         "reload the editor's window, and pick a model of OCP"),
    Tool("aider", "Aider", ("aider",), (".aider.conf.yml", ".aider"), aider_steps,
         "restart Aider"),
    Tool("cline", "Cline (command line)", ("cline",), (".cline",), cline_steps, "restart Cline"),
    Tool("llm", "llm", ("llm",),
         (".config/io.datasette.llm", "Library/Application Support/io.datasette.llm"),
         llm_steps, "", ("llm", "models", "list")),
    Tool("zed", "Zed", ("zed", "zeditor"), (".config/zed",), zed_steps,
         "it reads the change by itself"),
    Tool("claude-code", "Claude Code", ("claude",), (".claude",), claude_code_steps,
         "restart Claude Code"),
    Tool("cursor", "Cursor", ("cursor",), (".cursor", "../../Applications/Cursor.app"), hint_steps(
        "Cursor: Settings, Models, API Keys: enter as OpenAI API Key {key};",
        "  switch Override OpenAI Base URL on and enter {api}; add the model {model}.",
        "  Cursor's own servers make the requests: the address has to be one that they reach, so",
        "  a local one works only through a tunnel, with https and a key.")),
    Tool("cline-vscode", "Cline (VS Code)", (), (".vscode/extensions/saoudrizwan.claude-dev-*",),
         hint_steps(
        "Cline in VS Code: its settings, API Provider: OpenAI Compatible; Base URL {api};",
        "  API Key {key}; Model ID {model}.")),
    Tool("open-webui", "Open WebUI", ("open-webui",), (), hint_steps(
        "Open WebUI: Admin Panel, Settings, Connections, OpenAI API, +: URL {api}; Key {key}.",
        "  In Docker 127.0.0.1 is the container: use the server's address on the network there.")),
    Tool("home-assistant", "Home Assistant", ("hass",), (".homeassistant",), hint_steps(
        "Home Assistant: install Extended OpenAI Conversation with HACS; Settings, Devices &",
        "  Services, Add Integration: API Key {key}; Base Url {api}; then the model {model}.")),
    Tool("sdk", "SDKs and libraries", (), (), hint_steps(
        "OpenAI SDKs, LangChain, LiteLLM: OPENAI_BASE_URL or base_url {api};",
        "  API key {key}. Anthropic SDKs: ANTHROPIC_BASE_URL or base_url {url}, without /v1.",
        "  LiteLLM: model openai/{model} with api_base {api}.",
        "  Vercel AI SDK: createOpenAICompatible with name ocp, baseURL {api}, includeUsage.")),
)
TOOL_NAMES = tuple(tool.name for tool in TOOLS)
#: Where our own files are filed in the record.
OWN = "ocp"


def tool_title(name: str) -> str:
    """What a tool is called."""
    return next((tool.title for tool in TOOLS if tool.name == name), "OCP")


def is_loop(machine: Machine, server: Server) -> bool:
    """Whether Claude Code of this machine would ask the server that drives it."""
    host = urllib.parse.urlsplit(server.url).hostname or ""
    return is_this_machine(host) and has_claude_login(machine)


def refuse_loop(machine: Machine, server: Server) -> None:
    """Raises Problem where --anthropic would make claude ask itself."""
    if is_loop(machine, server):
        raise Problem(
            Exit.FAILED,
            "Refused: this is the server's own machine and claude is logged in here; with "
            "--anthropic Claude Code would be pointed at the server that drives it, which would "
            "ask itself. Use --anthropic on other machines.")


def present_loop(desk: Desk) -> list[Hint]:
    """A warning if Claude Code is pointed at this server on the server's own machine already."""
    machine, found = desk.machine, []
    path = claude_code_file(machine)
    with contextlib.suppress(Unsafe):
        value = json_find(decoded(read_bytes(path)), ("env", "ANTHROPIC_BASE_URL"))
        found.append((machine.short(path), value))
    found.append(("your environment", machine.environ.get("ANTHROPIC_BASE_URL")))
    hints = []
    for place, value in found:
        try:
            parts = urllib.parse.urlsplit(str(value or ""))
            same_port = parts.port == urllib.parse.urlsplit(desk.server.url).port
        except ValueError:
            continue
        if same_port and is_this_machine(parts.hostname or "") and is_loop(machine, desk.server):
            hints.append(Hint(
                f"ANTHROPIC_BASE_URL in {place} points Claude Code at the server that drives it. "
                "The server keeps this variable from its own claude, but remove it: your own "
                "sessions would go round through the server."))
    return hints


# ==== 9. Record ==============================================================
# What was done to which file. It is written before each change, so that one that was interrupted
# can be taken back too.


@dataclasses.dataclass
class FileRecord:
    """One file that was changed. `base` is how it was without us: the name of a copy, empty where
    there was no file; the fingerprints tell whether somebody has changed it since."""

    tool: str
    kind: str
    base: str
    base_digest: str
    after_digest: str
    done: list[Done]
    under: str | None
    has_block: bool
    #: Whether the whole file is ours.
    whole: bool
    #: The folders that were made for it, innermost first.
    folders: list[str]


@dataclasses.dataclass
class Record:
    """Everything that was done here and not taken back."""

    folder: str
    url: str = ""
    #: The server that the saved key is for; it is sent to no other.
    key_url: str = ""
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    #: Variables of the macOS session: name, value set, and what was there before.
    session: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def path(self) -> str:
        return os.path.join(self.folder, "connect.json")

    def copy_of(self, entry: FileRecord) -> bytes | None:
        """The file as it was without us. Raises Unsafe if the copy is gone."""
        if not entry.base:
            return None
        content = read_bytes(os.path.join(self.folder, entry.base))
        if digest(content) != entry.base_digest:
            raise Unsafe(f"has lost its copy {entry.base}")
        return content

    def save(self) -> None:
        """Writes the record down. Raises OSError."""
        shown = {
            "version": 1, "url": self.url, "keyUrl": self.key_url, "session": self.session,
            "files": {path: {**dataclasses.asdict(entry),
                             "done": [done._asdict() for done in entry.done]}
                      for path, entry in self.files.items()},
        }
        make_private(self.folder)
        write_whole(self.path, (json.dumps(shown, indent=1) + "\n").encode(), 0o600)


def load_record(folder: str) -> Record:
    """The record of this user, an empty one if there is none. Raises Problem."""
    record = Record(folder)
    try:
        content = read_bytes(record.path)
        if content is None:
            return record
        found = json.loads(content)
        record.url, record.key_url = str(found["url"]), str(found["keyUrl"])
        record.session = {name: (pair[0], pair[1]) for name, pair in found["session"].items()}
        for path, fields in found["files"].items():
            done = [Done(tuple(each.pop("path")), **each) for each in fields.pop("done")]
            record.files[path] = FileRecord(done=[_as_loaded(each) for each in done], **fields)
    except (Unsafe, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise Problem(
            Exit.FAILED,
            f"{record.path} cannot be read, so what was done here is not known: move it away and "
            "go on, or mend it for --undo.") from None
    return record


def _as_loaded(done: Done) -> Done:
    """A value that JSON made a list of, as the readers of texts give it."""
    before = done.before
    marked = isinstance(before, list) and len(before) == 2 and before[0] == "as written"
    return done._replace(before=tuple(before)) if marked else done


def without_us(
    content: bytes | None, entry: FileRecord | None, record: Record
) -> tuple[bytes | None, list[str]]:
    """A file as it is, or was, without what was put in; and what was left in it because it holds
    something else by now. Raises Unsafe."""
    if entry is None or content is None or digest(content) == entry.base_digest:
        return content, []
    if digest(content) == entry.after_digest:
        return record.copy_of(entry), []
    if entry.whole:
        return content, ["the file, which you have changed"]
    text, kept = take_out(
        decoded(content), entry.kind, entry.done, entry.under, entry.has_block)
    empty = not text.strip() or entry.kind == "json" and not json_comments(text) and (
        json_load(text) == {})
    return (None if empty and not entry.base else text.encode()), kept


# ==== 10. Plan ===============================================================
# Which bytes of which file would be others. Nothing is changed here.


class Edit(NamedTuple):
    """A file with other content. `after` is None for one that goes."""

    tool: str
    path: str
    before: bytes | None
    after: bytes | None
    why: str
    notes: tuple[str, ...]
    #: How the record will have it; None takes it out of the record.
    entry: FileRecord | None
    #: What the file is without us, to be copied.
    base: bytes | None
    command: tuple[str, ...] = ()


class ByHand(NamedTuple):
    """A file that cannot be changed with certainty."""

    tool: str
    path: str
    reason: str
    #: What should stand there.
    snippet: str


@dataclasses.dataclass
class Plan:
    """All that a run would do."""

    edits: list[Edit] = dataclasses.field(default_factory=list)
    session: list[RunStep] = dataclasses.field(default_factory=list)
    by_hand: list[ByHand] = dataclasses.field(default_factory=list)
    hints: list[str] = dataclasses.field(default_factory=list)
    #: Files that are as they should be.
    settled: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    tools: list[Tool] = dataclasses.field(default_factory=list)

    def add_hint(self, text: str) -> None:
        """A hint, once."""
        if text not in self.hints:
            self.hints.append(text)


def make_plan(desk: Desk, tools: Sequence[Tool], record: Record) -> Plan:
    """What the tools need that is not there yet."""
    plan = Plan(tools=list(tools))
    steps = [(OWN, step) for step in own_files(desk) if desk.server.key]
    steps += [(tool.name, step) for tool in tools for step in tool.steps(desk)]
    for name, step in steps:
        if isinstance(step, FileStep):
            _plan_file(plan, desk, name, step, record)
        elif isinstance(step, RunStep):
            was = record.session.get(step.name)
            if was is None or was[0] != step.value:
                plan.session.append(step)
        else:
            plan.add_hint(step.text)
    for hint in present_loop(desk):
        plan.add_hint(hint.text)
    return plan


def _plan_file(plan: Plan, desk: Desk, tool: str, step: FileStep, record: Record) -> None:
    """Adds what one file needs to a plan."""
    try:
        edit = plan_edit(step, tool, desk, record)
    except Unsafe as problem:
        try:
            snippet = apply_changes("", step.kind, step.changes)
        except Unsafe:
            snippet = ""
        plan.by_hand.append(ByHand(tool, step.path, str(problem), snippet))
        return
    if edit is None:
        plan.settled.append((tool, step.path))
    else:
        plan.edits.append(edit)


def plan_edit(step: FileStep, tool: str, desk: Desk, record: Record) -> Edit | None:
    """The change of one file, None if there is none to make. Raises Unsafe."""
    entry = record.files.get(step.path)
    content = read_bytes(step.path)
    text = decoded(content)
    changes, note = chosen(step, text, content, entry, desk.role)
    if not changes:
        return None
    notes = [*step.notes, *([note] if note else [])]
    if step.command and json_comments(text):
        notes.append("OpenClaw writes its file anew, without the comments; --undo brings them back")
    stale = entry is not None and _stale(entry, text, changes)
    fitting = apply_changes(text, step.kind, changes)
    if content is not None and fitting == text and not stale:
        return None
    check_writable(step.path)
    base, _ = without_us(content, entry, record)
    if step.command:
        # What the tool itself has written into its file since stays there.
        rest = take_out(text, entry.kind, entry.done, None, False)[0] if entry else text
        after = apply_changes(rest, step.kind, changes)
    else:
        after = apply_changes(decoded(base), step.kind, changes)
    if after.encode() == content:
        return None
    if base is not None and holds_key(after, desk.server.key) and (
            os.stat(step.path).st_mode & 0o077):
        notes.append(f"others on this machine can read it: chmod 600 {shlex.quote(step.path)}")
    return Edit(
        tool, step.path, content, after.encode(), step.why, tuple(notes),
        record_entry(step, tool, changes, base, after, entry), base, step.command)


def chosen(
    step: FileStep, text: str, content: bytes | None, entry: FileRecord | None, role: Role
) -> tuple[tuple[Change, ...], str]:
    """The changes to make, and what to say about those that are left out. Raises Unsafe."""
    own = [change for change in step.changes if isinstance(change, (Put, Whole))
           and change.default]
    if not own or role is Role.PRIMARY:
        return step.changes, ""
    rest = tuple(change for change in step.changes if change not in own)
    if role is Role.BACKUP:
        return rest, ""
    for change in own:
        kept = _foreign(step.kind, change, text, content, entry)
        if kept:
            return rest, f"your {kept} stays; --primary changes it"
    return step.changes, ""


def _foreign(
    kind: str, change: Put | Whole, text: str, content: bytes | None, entry: FileRecord | None
) -> str:
    """What the user has chosen where a change would choose OCP; empty if nothing. Raises Unsafe."""
    if isinstance(change, Whole):
        mine = entry is not None and digest(content) == entry.after_digest
        other = content is not None and text.strip() not in ("", change.content) and not mine
        return f"choice {text.strip()}" if other else ""
    now = FORMATS[kind].find(text, change.path)
    if now in (None, NULL, change.value):
        return ""
    done = next((each for each in entry.done if each.path == change.path), None) if entry else None
    if done is not None and done.value == now:
        return ""
    secret = re.search("key|token", change.path[-1], re.I)
    shown = "" if secret or not isinstance(now, (str, int)) else f" = {now}"
    return ".".join(change.path) + shown


def _stale(entry: FileRecord, text: str, changes: Sequence[Change]) -> bool:
    """Whether something of an earlier run is still there that is not wanted any more."""
    wanted = {each.path for each in changes if isinstance(each, Put)}
    find = FORMATS[entry.kind].find
    return any(each.path not in wanted and find(text, each.path) == each.value
               for each in entry.done)


def record_entry(
    step: FileStep, tool: str, changes: Sequence[Change], base: bytes | None, after: str,
    earlier: FileRecord | None,
) -> FileRecord:
    """What the record will say about a file. Raises Unsafe."""
    form, text = FORMATS[step.kind], decoded(base)
    done = []
    for change in changes:
        if not isinstance(change, Put):
            continue
        before = form.find(text, change.path)
        if change.absent and before is not None:
            continue
        lengths = range(len(change.path) - 1, 0, -1) if form.nested else ()
        depth = next((n for n in lengths if form.find(text, change.path[:n]) is not None), 0)
        done.append(Done(change.path, change.value, before, depth, change.owned))
    blocks = [change for change in changes if isinstance(change, Block)]
    # The same content of two files has two copies, and so have two states of one file.
    name = f"{digest(step.path.encode())[:8]}-{digest(base)[:8]}"
    return FileRecord(
        tool=tool, kind=step.kind, done=done,
        base="" if base is None else f"copies/{name}-{os.path.basename(step.path)}",
        base_digest=digest(base), after_digest=digest(after.encode()),
        under=blocks[0].under if blocks else None, has_block=bool(blocks),
        whole=any(isinstance(change, Whole) for change in changes),
        folders=earlier.folders if earlier else [])


def check_writable(path: str) -> None:
    """Raises Unsafe for a file that its owner has closed, or a folder that is not ours."""
    real = os.path.realpath(path)
    if os.path.lexists(real) and not os.path.isfile(real):
        raise Unsafe("is not a file")
    if os.path.exists(real) and not os.stat(real).st_mode & stat.S_IWUSR:
        raise Unsafe("is read-only")
    folder = os.path.dirname(real)
    while not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Unsafe("lies in a folder that cannot be written to")


def plan_sync(machine: Machine, url: str, models: Sequence[Model]) -> tuple[list[str], Edit | None]:
    """The providers in OpenClaw that lead to this server, and the change that gives them the list
    of models as it is now, None if there is none to make. Raises Unsafe."""
    path = openclaw_config(machine)
    content = read_bytes(path)
    text = decoded(content)
    names = openclaw_names(text, url)
    changes = []
    for name in names:
        place = (*_OPENCLAW_PROVIDERS, name, "models")
        changes.append(Put(place, openclaw_list(json_find(text, place), models)))
    after = apply_changes(text, "json", changes).encode()
    if after == content or content is None:
        return names, None
    check_writable(path)
    why = "the models of " + ", ".join(names)
    return names, Edit("openclaw", path, content, after, why, (), None, None,
                       openclaw_command(machine, names))


def plan_undo(record: Record, tools: Sequence[str]) -> Plan:
    """What gives every file of these tools back as it was without us; all of them if none is
    named."""
    plan = Plan()
    left = {entry.tool for entry in record.files.values()} - {OWN}
    everything = not tools or bool(left) and left <= set(tools)
    for path, entry in sorted(record.files.items(), key=lambda pair: pair[1].tool == OWN):
        if not everything and entry.tool not in tools:
            continue
        try:
            content = read_bytes(path)
            after, kept = without_us(content, entry, record)
            if after != content:
                check_writable(path)
        except Unsafe as problem:
            plan.by_hand.append(ByHand(entry.tool, path, str(problem), ""))
            continue
        exact = digest(after) == entry.base_digest
        why = "as it was" if exact else "you have changed it since: only what was put in goes"
        notes = tuple(f"stays, as it is not what was put in: {each}" for each in kept)
        plan.edits.append(Edit(entry.tool, path, content, after, why, notes, None, None))
    if everything or "shell" in tools:
        plan.session = [RunStep(name, before) for name, (_, before) in record.session.items()]
    return plan


# ==== 11. Writing ============================================================
# Only this section changes anything. A file is written whole or not at all, with its mode, and
# through a link to where it leads; the record is written first.


def make_folders(folder: str) -> list[str]:
    """Makes a folder and those above it; the ones that were missing, innermost first. Raises
    OSError."""
    missing: list[str] = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    for each in reversed(missing):
        os.mkdir(each, 0o700)
    return missing


class Writer:
    """Carries plans out, and writes down what it does."""

    def __init__(self, machine: Machine, record: Record, key: str) -> None:
        self._machine = machine
        self._record = record
        self._key = key
        #: Sentences about what could not be done.
        self.failures: list[str] = []
        #: The files that are others now.
        self.written: list[str] = []
        #: What the record said of a file before this run changed it.
        self._earlier: dict[str, FileRecord | None] = {}
        #: Folders that were made and may be empty now.
        self._folders: list[str] = []

    def connect(self, plan: Plan, url: str) -> None:
        """Makes every change of a plan."""
        self._record.url = url
        self._record.key_url = url if self._key else self._record.key_url
        for edit in plan.edits:
            self._attempt(edit, self._change)
        for step in plan.session:
            self._set_variable(step)
        for tool in plan.tools:
            self._check(tool, [each for each in plan.edits if each.tool == tool.name])

    def sync(self, edit: Edit, stamp: str) -> str:
        """Makes one change that the record does not keep; the path of the copy that it leaves
        beside the file, empty where nothing was changed."""
        copy_path = f"{edit.path}.ocp-{stamp}"
        entry = self._record.files.get(edit.path)

        def change(edit: Edit) -> None:
            assert edit.before is not None
            write_whole(copy_path, edit.before, 0o600)
            self._replace(edit)
            self.written.append(edit.path)

        self._attempt(edit, change)
        if edit.path not in self.written:
            with contextlib.suppress(OSError):
                os.unlink(copy_path)
            return ""
        if entry is not None and entry.after_digest == digest(edit.before):
            # Nobody has changed it: --undo may still give the copy of then back.
            entry.after_digest = digest(read_bytes(edit.path))
            self._record.save()
        return copy_path

    def undo(self, plan: Plan) -> None:
        """Takes every change of a plan back, and forgets it."""
        for edit in plan.edits:
            self._attempt(edit, self._restore)
        for step in plan.session:
            verb = ("setenv", step.name, step.value) if step.value else ("unsetenv", step.name)
            ran = self._machine.run("launchctl", *verb)
            if ran.code:
                self.failures.append(f"launchctl {verb[0]} {step.name}: {ran.complaint}")
            self._record.session.pop(step.name, None)
        self._tidy()

    def _attempt(self, edit: Edit, action: Callable[[Edit], None]) -> None:
        shown = self._machine.short(edit.path)
        try:
            if read_bytes(edit.path) != edit.before:
                raise Unsafe("was changed just now by somebody else: run this again")
            action(edit)
        except Unsafe as problem:
            self.failures.append(f"{shown} {problem}")
        except OSError as problem:
            self.failures.append(f"{shown} cannot be written: {problem.strerror}")

    def _change(self, edit: Edit) -> None:
        entry = edit.entry
        assert entry is not None
        if edit.base is not None:
            copy_path = os.path.join(self._record.folder, entry.base)
            make_private(os.path.dirname(copy_path))
            write_whole(copy_path, edit.base, 0o600)
        folder = os.path.dirname(os.path.realpath(edit.path))
        entry.folders = entry.folders or make_folders(folder)
        earlier = self._earlier[edit.path] = self._record.files.get(edit.path)
        self._record.files[edit.path] = entry
        self._record.save()
        try:
            self._replace(edit)
            if edit.command:
                entry.after_digest = digest(read_bytes(edit.path))
                self._record.save()
        except (OSError, Unsafe):
            self._forget(edit.path, earlier)
            raise
        if earlier is not None and earlier.base not in ("", entry.base):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self._record.folder, earlier.base))
        self.written.append(edit.path)

    def _forget(self, path: str, earlier: FileRecord | None) -> None:
        """The record as it was before a change that did not happen."""
        self._record.files.pop(path)
        if earlier is not None:
            self._record.files[path] = earlier
        self._record.save()

    def _mode(self, edit: Edit) -> int:
        assert edit.after is not None
        has_key = holds_key(edit.after.decode("utf-8", "replace"), self._key)
        # A file that is ours alone may hold a key for the first time.
        if edit.before is not None and not (has_key and edit.base is None):
            return stat.S_IMODE(os.stat(edit.path).st_mode)
        return 0o600 if has_key or edit.tool == OWN else 0o644

    def _replace(self, edit: Edit) -> None:
        """Gives a file its new content. Raises Unsafe, OSError."""
        assert edit.after is not None
        if edit.command:
            self._by_command(edit)
        else:
            write_whole(edit.path, edit.after, self._mode(edit))

    def _by_command(self, edit: Edit) -> None:
        """Lets the tool make the change itself. Raises Unsafe."""
        sides = [json_load(decoded(side)) for side in (edit.before, edit.after)]
        patch = json.dumps(merge_patch(*sides))
        ran = self._machine.run(*edit.command, stdin=patch, timeout_s=120)
        if ran.code != 0 or read_bytes(edit.path) is None:
            raise Unsafe(f"was not changed: {edit.command[0]} says: {ran.complaint}")

    def _set_variable(self, step: RunStep) -> None:
        before = self._machine.run("launchctl", "getenv", step.name)
        known = self._record.session.get(step.name)
        was = known[1] if known else before.output.strip() if before.code == 0 else ""
        ran = self._machine.run("launchctl", "setenv", step.name, step.value)
        if ran.code != 0:
            self.failures.append(f"launchctl setenv {step.name}: {ran.complaint}")
            return
        self._record.session[step.name] = (step.value, was)
        self._record.save()

    def _check(self, tool: Tool, edits: Sequence[Edit]) -> None:
        """Asks a tool whether it can read what was written; if not, gives the files back."""
        done = [edit for edit in edits if edit.path in self.written]
        if not done or not tool.check or not self._machine.program(tool.check[0]):
            return
        ran = self._machine.run(*tool.check)
        if ran.code in (0, None):
            return
        for edit in done:
            earlier = self._earlier[edit.path]
            self._restore(edit._replace(before=read_bytes(edit.path), after=edit.before))
            if earlier is not None:
                self._record.files[edit.path] = earlier
                self._record.save()
            self.written = [path for path in self.written if path != edit.path]
        self.failures.append(
            f"{tool.title} does not accept the change, which was taken back: {ran.complaint}")

    def _restore(self, edit: Edit) -> None:
        """Gives a file back and forgets it. Raises OSError."""
        entry = self._record.files.get(edit.path)
        if edit.after is None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.realpath(edit.path))
        elif edit.after != edit.before:
            mode = 0o600 if edit.before is None else stat.S_IMODE(os.stat(edit.path).st_mode)
            write_whole(edit.path, edit.after, mode)
        if edit.after != edit.before:
            self.written.append(edit.path)
        if entry is None:
            return
        del self._record.files[edit.path]
        self._record.save()
        if entry.base and self._earlier.get(edit.path) is None:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self._record.folder, entry.base))
        self._folders += entry.folders

    def _tidy(self) -> None:
        """Removes the record when it says nothing any more, and the folders that are empty."""
        folders = [*self._folders, os.path.join(self._record.folder, "copies")]
        if not self._record.files and not self._record.session:
            with contextlib.suppress(OSError):
                os.unlink(self._record.path)
            folders.append(self._record.folder)
        for folder in sorted(set(folders), key=len, reverse=True):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def merge_patch(before: Json, after: Json) -> Json:
    """What makes one JSON value the other, as RFC 7396 has it: null takes a member out."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return after
    gone = {name: None for name in before if name not in after}
    changed = {name: merge_patch(before.get(name), value) for name, value in after.items()
               if name not in before or before[name] != value}
    return {**gone, **changed}


# ==== 12. Showing ============================================================
# Plans, tools and results for a person, and as JSON. No key is ever shown in full.

#: Of a file's new lines, this many are shown unless it is a dry run.
SHOWN_LINES = 12


def show_server(server: Server, health: Mapping[str, Json]) -> str:
    """Who is there, in a few lines."""
    key = f"key {mask(server.key)} accepted" if server.key else "no key needed"
    lines = [f"OCP {server.version} at {server.url}: {counted(len(server.models), 'model')}, {key}"]
    if health.get("status") not in ("ok", None):
        lines.append(f"It says that it is {quoted(health['status'])}: {quoted(health.get('fix'))}")
    return "\n".join(lines)


def new_lines(edit: Edit) -> list[str]:
    """The lines that differ, as a diff without what surrounds them."""
    sides = [(content or b"").decode("utf-8", "replace").splitlines()
             for content in (edit.before, edit.after)]
    shown = difflib.unified_diff(sides[0], sides[1], n=0, lineterm="")
    return [line for line in shown if not line.startswith(("---", "+++", "@@"))]


def show_edit(edit: Edit, machine: Machine, key: str, most: int) -> str:
    """One file and what would be other in it."""
    how = "new" if edit.before is None else "removed" if edit.after is None else "changed"
    lines = [f"  {machine.short(edit.path)}  ({tool_title(edit.tool)}; {how}) {edit.why}"]
    if edit.command:
        lines.append(f"      through: {shlex.join(edit.command)}")
    lines += [f"      {note}" for note in edit.notes]
    differing = [] if edit.after is None else new_lines(edit)
    if edit.tool == OWN:
        differing = []
    lines += [f"      {clean(masked(line, key))}" for line in differing[:most]]
    if len(differing) > most:
        lines.append(f"      ... {counted(len(differing) - most, 'more line')}; --dry-run shows "
                     "them")
    return "\n".join(lines)


def show_plan(plan: Plan, machine: Machine, key: str, all_lines: bool) -> str:
    """A plan for a person."""
    most = 10_000 if all_lines else SHOWN_LINES
    parts = [show_edit(edit, machine, key, most) for edit in plan.edits]
    if plan.session:
        parts.append("  launchctl: " + " ".join(step.name for step in plan.session))
    for tool, path in plan.settled:
        parts.append(f"  {machine.short(path)}  ({tool_title(tool)}; as it should be)")
    for each in plan.by_hand:
        parts.append(f"  {machine.short(each.path)}  ({tool_title(each.tool)}) is left alone: it "
                     f"{each.reason}.")
        if each.snippet:
            body = masked(each.snippet, key).splitlines()
            where = machine.short(os.path.join(machine.own, "key"))
            known = f" (the whole key is in {where})" if key else ""
            parts.append(f"      Put this in by hand{known}:\n"
                         + "\n".join(f"        {clean(line)}" for line in body))
    return "\n".join(parts)


def show_hints(hints: Sequence[str]) -> str:
    """What is left to read."""
    return "\n".join("- " + hint for hint in hints)


def plan_json(plan: Plan, machine: Machine, key: str) -> dict[str, Json]:
    """A plan for a program."""
    return {
        "edits": [{
            "tool": edit.tool, "path": edit.path, "why": edit.why, "notes": list(edit.notes),
            "action": ("create" if edit.before is None else
                       "remove" if edit.after is None else "change"),
            "command": list(edit.command),
            "diff": [] if edit.tool == OWN else [masked(line, key) for line in new_lines(edit)],
        } for edit in plan.edits],
        "session": [step.name for step in plan.session],
        "settled": [{"tool": tool, "path": path} for tool, path in plan.settled],
        "byHand": [{"tool": each.tool, "path": each.path, "reason": each.reason,
                    "snippet": masked(each.snippet, key)} for each in plan.by_hand],
        "hints": plan.hints,
    }


def tools_json(machine: Machine, record: Record) -> list[dict[str, Json]]:
    """The tools, whether they are here, and which of their files were changed."""
    return [{
        "name": tool.name, "title": tool.title, "here": tool.is_here(machine),
        "connected": sorted(
            path for path, entry in record.files.items() if entry.tool == tool.name),
        "server": record.url,
    } for tool in TOOLS]


def show_tools(machine: Machine, record: Record) -> str:
    """The tools as a table."""
    lines = []
    for row in tools_json(machine, record):
        files = ", ".join(machine.short(path) for path in row["connected"])
        state = files or ("found" if row["here"] else "-")
        lines.append(f"{row['name']:15} {row['title']:21} {state}")
    url = [f"connected to {record.url}"] if record.files else []
    return "\n".join([*url, *lines])


# ==== 13. Command line =======================================================
# Questions are asked on /dev/tty, because standard input may be this script itself.


class Terminal:
    """The person at the keyboard, if there is one."""

    def __init__(self, path: str = "/dev/tty") -> None:
        self._path = path

    def ask(self, question: str) -> str | None:
        """The answer, None if nobody can be asked."""
        try:
            with open(self._path, errors="replace") as source, open(self._path, "w") as target:
                target.write(question)
                target.flush()
                line = source.readline()
                # Ctrl-D, and a terminal that is gone, are no answer; Enter is one.
                return line.strip() if line else None
        except OSError:
            return None

    def ask_secret(self, question: str) -> str | None:
        """The same without showing what is typed."""
        try:
            with open(self._path):
                pass
        except OSError:
            return None
        try:
            return getpass.getpass(question)
        except EOFError:
            return ""


def build_parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    parser = argparse.ArgumentParser(
        prog="ocp_connect", description="Points the tools of this machine at an OCP server.",
        epilog="tools: " + ", ".join(TOOL_NAMES))
    add = parser.add_argument
    add("host", nargs="?", help="the server: a name, an address, HOST:PORT or http://HOST:PORT")
    add("--key", help="the key that the server's operator gave you")
    add("--port", type=port_number, help=f"the server's port (default {DEFAULT_PORT})")
    add("--https", action="store_true", help="the server speaks https")
    add("--only", metavar="TOOL,...", type=tool_list, default=[], help="these tools and no others")
    add("--all", action="store_true", help="all tools, also those not found here")
    role = parser.add_mutually_exclusive_group()
    role.add_argument("--primary", dest="role", action="store_const", const=Role.PRIMARY,
                      help="OCP becomes the default also of tools that have another one")
    role.add_argument("--backup", dest="role", action="store_const", const=Role.BACKUP,
                      help="OCP becomes no tool's default; in OpenClaw, the last fallback")
    add("--allow-fallback", action="store_true",
        help="OpenClaw: keep the fallbacks that are there when OCP is primary")
    add("--provider-name", metavar="NAME", type=provider_name,
        help=f"what OCP is called among the providers of a tool (default: {OPENCLAW_PROVIDER} in "
             "OpenClaw, OCP in Zed, else ocp)")
    add("--anthropic", action="store_true",
        help="point Claude Code and Anthropic SDKs at OCP too; not on the server's own machine")
    add("--skip-answer", action="store_true", help="make no real request at the end")
    add("--dry-run", action="store_true", help="show everything and change nothing")
    add("--undo", action="store_true", help="take back what was done, all or --only TOOL,...")
    add("--list", action="store_true", help="list the tools")
    add("--sync", action="store_true",
        help="only bring the list of models in OpenClaw up to date, from models.json beside this "
             "script, else from the server; says nothing where there is no OpenClaw")
    add("--yes", "-y", action="store_true", help="do not ask")
    add("--json", action="store_true", help="say it as JSON")
    add("--version", action="version", version=f"ocp_connect {VERSION}")
    parser.set_defaults(role=Role.AUTO)
    return parser


def port_number(text: str) -> int:
    """A port. Raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65_536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port")
    return int(text)


def provider_name(text: str) -> str:
    """A name for a provider. Raises ArgumentTypeError."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name: small letters, digits and hyphens")
    return text


def tool_list(text: str) -> list[str]:
    """Names of tools. Raises ArgumentTypeError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("no tool is named")
    for name in names:
        if name not in TOOL_NAMES:
            near = difflib.get_close_matches(name, TOOL_NAMES, 1)
            did = f", did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentTypeError(
                f"no tool is called {name!r}{did} There are: {', '.join(TOOL_NAMES)}")
    return names


class Run:
    """One invocation, with its machine, its terminal and its output."""

    def __init__(
        self, args: argparse.Namespace, machine: Machine, terminal: Terminal
    ) -> None:
        self.args = args
        self.machine = machine
        self.terminal = terminal
        self.record = load_record(machine.own)

    def say(self, text: str) -> None:
        """A line for a person; a program that asked for JSON gets none."""
        if text and not self.args.json:
            print(text, flush=True)

    def print_json(self, value: Json) -> None:
        """The one JSON value of a run that was asked for it."""
        if self.args.json:
            print(json.dumps(value, indent=2))

    def confirm(self, question: str) -> bool:
        """Whether to go on. Raises Problem if nobody can be asked."""
        if self.args.yes:
            return True
        answer = self.terminal.ask(f"{question} [Y/n] ")
        if answer is None:
            raise Problem(Exit.USAGE, "There is no terminal to ask on: say --yes, or --dry-run.")
        return answer.lower() in ("", "y", "yes")

    # -- the four things that can be asked for -----------------------------------------------

    def list_tools(self) -> Exit:
        """The tools."""
        self.say(show_tools(self.machine, self.record))
        self.print_json(tools_json(self.machine, self.record))
        return Exit.OK

    def undo(self) -> Exit:
        """Everything as it was."""
        plan = plan_undo(self.record, self.args.only)
        self.say(show_plan(plan, self.machine, self._known_key(), self.args.dry_run)
                 or "There is nothing to take back.")
        if self.args.dry_run or not plan.edits + plan.by_hand and not plan.session:
            self.print_json(plan_json(plan, self.machine, self._known_key()))
            return Exit.OK
        if not self.confirm("Take this back?"):
            self.say("Nothing was changed.")
            return Exit.FAILED
        writer = Writer(self.machine, self.record, self._known_key())
        shown = plan_json(plan, self.machine, self._known_key())
        writer.undo(plan)
        for failure in writer.failures:
            self.say(f"FAILED: {failure}")
        self.print_json({**shown, "written": writer.written, "failures": writer.failures})
        complete = not writer.failures and not plan.by_hand
        self.say(f"Done: {counted(len(writer.written), 'file')} given back."
                 if complete else "Not all could be taken back, see above.")
        return Exit.OK if complete else Exit.FAILED

    def sync(self) -> Exit:
        """The list of models in OpenClaw as it is here. Raises Problem."""
        machine, args = self.machine, self.args
        url = server_address(args.host or "127.0.0.1", args.port, args.https)
        writer = Writer(machine, self.record, "")
        is_here = next(tool for tool in TOOLS if tool.name == "openclaw").is_here(machine)
        names, edit = self._plan_sync(url) if is_here else ([], None)
        if edit is not None:
            self.say(show_edit(edit, machine, "", 10_000))
            copy_path = "" if args.dry_run else writer.sync(edit, time.strftime("%Y%m%d-%H%M%S"))
            self.say(f"The file as it was: {machine.short(copy_path)}" if copy_path else "")
        elif is_here:
            self.say(f"OpenClaw has the models of {url}." if names else
                     f"OpenClaw does not use {url}: `ocp connect {url} --only openclaw` adds it.")
        for failure in writer.failures:
            print(f"ocp_connect: {failure}", file=sys.stderr)
        self.print_json({
            "openclaw": is_here, "providers": names, "written": writer.written,
            "diff": [masked(line, "") for line in new_lines(edit)] if edit else [],
            "failures": writer.failures})
        return Exit.FAILED if writer.failures else Exit.OK

    def _plan_sync(self, url: str) -> tuple[list[str], Edit | None]:
        """What plan_sync says. Raises Problem."""
        try:
            return plan_sync(self.machine, url, self._current_models(url))
        except Unsafe as problem:
            path = self.machine.short(openclaw_config(self.machine))
            raise Problem(Exit.FAILED, f"{path} {problem}.") from None

    def connect(self) -> Exit:
        """Probe, plan, show, confirm, write, verify."""
        args = self.args
        url = server_address(args.host, args.port, args.https)
        server, health = self._probe(url)
        self.say(show_server(server, health))
        if args.anthropic:
            refuse_loop(self.machine, server)
        desk = Desk(self.machine, server, args.role, args.allow_fallback, args.anthropic,
                    self._look, args.provider_name or "")
        plan = make_plan(desk, self._tools(), self.record)
        self.say(show_plan(plan, self.machine, server.key, args.dry_run))
        if args.dry_run:
            self.say(show_hints(plan.hints))
            self.print_json({**plan_json(plan, self.machine, server.key), "server": url})
            return Exit.OK
        if (plan.edits or plan.session) and not self.confirm("Make these changes?"):
            self.say("Nothing was changed.")
            return Exit.FAILED
        writer = Writer(self.machine, self.record, server.key)
        shown = plan_json(plan, self.machine, server.key)
        writer.connect(plan, url)
        return self._finish(plan, writer, server, shown)

    def _finish(
        self, plan: Plan, writer: Writer, server: Server, shown: dict[str, Json]
    ) -> Exit:
        """The real request, and what is left to say."""
        for failure in writer.failures:
            self.say(f"FAILED: {failure}")
        complaint = "" if self.args.skip_answer else self._verify(server)
        changed = {edit.tool for edit in plan.edits if edit.path in writer.written}
        for tool in plan.tools:
            if tool.name in changed and tool.after:
                self.say(f"{tool.title}: {tool.after}.")
        if plan.by_hand:
            self.say(f"Left for you to do: {counted(len(plan.by_hand), 'file')}, see above.")
        elif not plan.edits and not plan.session:
            self.say("Everything is as it should be; nothing was changed.")
        self.say(show_hints(plan.hints))
        if writer.written:
            self.say("To take this back, run this again with --undo.")
        self.print_json({
            **shown, "server": server.url, "written": writer.written,
            "failures": writer.failures, "verified": not complaint and not self.args.skip_answer,
            "answer": complaint or "ok"})
        return Exit.FAILED if writer.failures or complaint or plan.by_hand else Exit.OK

    def _verify(self, server: Server) -> str:
        """Makes one real request; why it got no answer, empty if it did."""
        try:
            answer = try_request(server)
        except HttpProblem as problem:
            self.say(f"FAILED: {server.cheapest.id} does not answer: {quoted(problem)}")
            return quoted(problem)
        self.say(f"{server.cheapest.id} answers: {clean(answer.strip())[:60]}")
        return ""

    # -- what they need ----------------------------------------------------------------------

    def _given_key(self) -> str:
        if self.args.key is not None:
            return checked_key(self.args.key, "--key")
        named = self.machine.environ.get("OCP_CONNECT_KEY", "")
        return checked_key(named, "OCP_CONNECT_KEY") if named else ""

    def _known_key(self) -> str:
        """The key that was given the last time, empty if none was."""
        try:
            return decoded(read_bytes(os.path.join(self.machine.own, "key"))).strip()
        except Unsafe:
            return ""

    def _current_models(self, url: str) -> tuple[Model, ...]:
        """The models of the file beside this script, if the server runs here too, else those that
        it lists. Raises Problem."""
        is_here = is_this_machine(urllib.parse.urlsplit(url).hostname or "")
        found = models_in(os.path.join(HERE, "models.json")) if HERE and is_here else None
        return found or self._probe(url)[0].models

    def _probe(self, url: str) -> tuple[Server, Mapping[str, Json]]:
        """The server with a key that it takes, and what its /health said. Raises Problem."""
        known = self._known_key() if self.record.key_url == url else ""
        known = known if KEY_PATTERN.fullmatch(known) else ""
        return probe(url, self._given_key(), known, self.terminal.ask_secret)

    def _tools(self) -> list[Tool]:
        """The tools to set up."""
        if self.args.only:
            return [tool for tool in TOOLS if tool.name in self.args.only]
        return [tool for tool in TOOLS if self.args.all or tool.is_here(self.machine)]

    def _look(self, path: str) -> str:
        """A file's text as it is without us. Raises Unsafe."""
        base, _ = without_us(read_bytes(path), self.record.files.get(path), self.record)
        return decoded(base)


def program(argv: Sequence[str], machine: Machine, terminal: Terminal) -> Exit:
    """Does what was asked for. Raises Problem."""
    args = build_parser().parse_args(argv)
    run = Run(args, machine, terminal)
    if args.list:
        return run.list_tools()
    if args.undo:
        return run.undo()
    if args.sync:
        return run.sync()
    if not args.host:
        raise Problem(Exit.USAGE, "Which server? ocp_connect HOST, for example 192.168.1.10.")
    return run.connect()


def main(argv: Sequence[str]) -> int:
    """The exit code; every failure is a sentence on standard error."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        # What it can show of a text is more than nothing; a stream that is closed is None.
        stream.reconfigure(errors="replace")
    try:
        return int(program(argv, this_machine(), Terminal()))
    except Problem as problem:
        print(f"ocp_connect: {problem}", file=sys.stderr)
        return int(problem.code)
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has had enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return int(Exit.FAILED)
    except OSError as problem:
        print(f"ocp_connect: {clean(problem)}", file=sys.stderr)
        return int(Exit.FAILED)
    except KeyboardInterrupt:
        print("\nInterrupted: --undo takes back what was done.", file=sys.stderr)
        return int(Exit.INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
