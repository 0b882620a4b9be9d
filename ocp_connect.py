#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# ///
"""ocp_connect configures the tools of this machine to use an OCP server, and can undo it.

    curl -fsSL http://HOST:3456/connect | python3 - HOST
    python3 ocp_connect.py HOST [--key KEY] [--only TOOL,...] [--primary | --backup] [--dry-run]
    python3 ocp_connect.py list          list the tools, and where they are found here
    python3 ocp_connect.py undo          restore every file
    python3 ocp_connect.py --sync HOST   update the list of models in OpenClaw

It asks the server for its version and models, shows each file that would change and why, and asks
before it writes. Your comments, order and settings are kept. Where a file cannot be edited safely,
the lines are printed for you to add. A record of the changes and a copy of each original file are
in ~/.config/ocp. `undo` restores them byte for byte; in a file that you have edited since, it only
removes what was added.

A server with a certificate of its own is known by --fingerprint: its operator's `ocp tls --show`
prints the whole command. The certificate is saved here, and your tools are told to trust it.

The key is taken from --key, then OCP_CONNECT_KEY in the environment, then the key saved for this
server, then the server's anonymous key. Otherwise you are asked.

Exit codes: 0 done; 1 failed, the message says why; 2 wrong usage; 3 no OCP server found; 4 the key
is missing or refused; 130 interrupted.
"""
# Sections (search for "==== 8" to jump to the eighth):
#
#      1. Basics            exit codes, errors, masking of keys
#      2. Machine           what a plan may depend on of this computer
#      3. JSON text         edit JSON and keep every comment
#      4. TOML text         edit keys before the first table
#      5. YAML text         edit keys of the outermost level
#      6. Changes           apply changes to a text of any format, and remove them
#      7. Server            what the server says about itself
#      8. Tools             for each tool, the files and values that it needs
#      9. OpenClaw          its provider, its default model and its list of models
#     10. Tool table        every tool that is known
#     11. Record            what was changed, for --undo and for the next run
#     12. Plan              the files that would change, and how
#     13. Writing           the only section that changes anything
#     14. Output            plans, tools and results as text and as JSON
#     15. Command line      arguments, questions, main
from __future__ import annotations  # OCP needs Python 3.9 or later; Python 3.6 shows this line.

import sys

if sys.version_info < (3, 9):
    sys.exit("ocp_connect needs Python 3.9 or later; this is Python %d.%d." % sys.version_info[:2])
if sys.platform == "win32":
    sys.exit(
        "ocp_connect runs on Linux and macOS. On Windows run it in WSL, or give your tools the "
        "address http://HOST:3456/v1 and your key by hand."
    )

import argparse
import base64
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

VERSION = "1.0.0"

#: Python's name for a script that comes through a pipe, which has no folder.
_PIPE = "<stdin>"
#: The folder of this script, empty if it came through a pipe.
HERE = "" if globals().get("__file__", _PIPE) == _PIPE else os.path.dirname(
    os.path.abspath(__file__))

#: A JSON value, parsed or to be written.
Json = Any


# ==== 1. Basics ==============================================================
# A failure is a Problem, one sentence that says what to do; main returns its exit code.


class Exit(enum.IntEnum):
    """The exit codes. OK means that everything was done."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    DENIED = 4
    INTERRUPTED = 130


class Problem(Exception):
    """A failure that ends the run, explained to the user."""

    def __init__(self, code: Exit, message: str) -> None:
        super().__init__(message)
        self.code = code


class UnsafeEdit(Exception):
    """A file cannot be edited safely. The message follows the path in a sentence."""


def clean(text: object) -> str:
    """Return `text` in one line, without the control characters that could command a terminal."""
    line = re.sub(r"\s*[\r\n]+\s*", " ", str(text).strip("\r\n"))
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", "?", line)


#: The value after a name that says that it is secret.
_SECRET_VALUE = re.compile(
    r"((?:key|token|secret|password)[\"']?\s*[:= ]\s*[\"']?)([^\s\"',}]{4,})", re.I
)
_PLAIN_VALUE = re.compile(r"true|false|null|\d+|manual|unused|[{$].*|.*\.\.\..*")
_SECRET_SHAPE = re.compile(r"\b(?:sk-|ocp_)[\w-]{8,}")
#: The key for tools that insist on one where the server needs none.
NO_KEY = "unused"


def mask(key: str) -> str:
    """Return enough of a key to recognise it."""
    return f"{key[:8]}...{key[-4:]}" if len(key) >= 24 else f"{key[:2]}..."


def masked(text: str, key: str) -> str:
    """Return `text` with this key, and everything that looks like one, masked."""
    text = text.replace(key, mask(key)) if key else text
    text = _SECRET_SHAPE.sub(lambda match: mask(match.group()), text)

    def hidden(match: re.Match[str]) -> str:
        return match[1] + (match[2] if _PLAIN_VALUE.fullmatch(match[2]) else mask(match[2]))

    return _SECRET_VALUE.sub(hidden, text)


def fish_quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def csh_quoted(value: str) -> str:
    """Quote a word for csh and tcsh, which expand history even inside quotes."""
    return "'" + value.replace("'", "'\\''").replace("!", "\\!") + "'"


def digest(content: bytes | None) -> str:
    """Return the hash of a file's content; empty for a missing file."""
    return "" if content is None else hashlib.sha256(content).hexdigest()


def newline_of(text: str) -> str:
    """Return the line ending of the first line of a text."""
    return "\r\n" if "\r\n" in text.partition("\n")[0] + "\n" and "\r\n" in text else "\n"


def counted(number: int, noun: str) -> str:
    """Return "1 file" or "2 files"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# ==== 2. Machine =============================================================
# What a plan may depend on of this computer, and how files are read and replaced. Tests use another
# home folder.


class Ran(NamedTuple):
    """The result of a command. A code of None: it could not be run."""

    code: int | None
    output: str
    error: str

    @property
    def complaint(self) -> str:
        """Return its first line of output, errors first."""
        lines = [line for line in (self.error + "\n" + self.output).splitlines() if line.strip()]
        return clean(lines[0].strip()) if lines else f"it ended with {self.code}"


def run_command(
    command: Sequence[str], environ: Mapping[str, str], stdin: str = "", timeout_s: float = 60
) -> Ran:
    """Run a command to its end. Do not raise for a program that is missing or too slow."""
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
    """This computer, as far as a plan depends on it."""

    home: str
    environ: Mapping[str, str]
    platform: str
    #: Whether systemd passes ~/.config/environment.d to desktop programs.
    has_systemd: bool

    @property
    def is_mac(self) -> bool:
        return self.platform == "darwin"

    def in_home(self, *parts: str) -> str:
        return os.path.join(self.home, *parts)

    def expanded(self, path: str) -> str:
        """Return a path with a leading ~ replaced."""
        return self.in_home(path[2:]) if path.startswith("~/") else path

    def folder_from(self, variable: str, *default: str) -> str:
        """Return the folder that a variable names, else the default below the home folder."""
        value = self.expanded(self.environ.get(variable, ""))
        return value if os.path.isabs(value) else self.in_home(*default)

    @property
    def config_home(self) -> str:
        return self.folder_from("XDG_CONFIG_HOME", ".config")

    @property
    def state_folder(self) -> str:
        """Return the folder of the saved key, the record and the copies."""
        return os.path.join(self.config_home, "ocp")

    @property
    def key_file(self) -> str:
        return os.path.join(self.state_folder, "key")

    @property
    def certificate_file(self) -> str:
        """Return the file of the server's certificate."""
        return os.path.join(self.state_folder, "server.pem")

    @property
    def bundle_file(self) -> str:
        """Return the file of the system's certificates and the server's."""
        return os.path.join(self.state_folder, "ca-bundle.pem")

    @property
    def shell(self) -> str:
        """Return the name of the login shell, empty if unknown."""
        return os.path.basename(self.environ.get("SHELL", ""))

    def program(self, name: str) -> str | None:
        """Return the path of a program, None if it is not on the PATH."""
        return shutil.which(name, path=self.environ.get("PATH", os.defpath))

    def run(self, *command: str, stdin: str = "", timeout_s: float = 60) -> Ran:
        """Run a command with the user's environment."""
        return run_command(command, self.environ, stdin, timeout_s)

    def saved_key(self) -> str:
        """Return the key of the last run, empty if there is none."""
        try:
            return read_text(self.key_file).strip()
        except UnsafeEdit:
            return ""

    def shown_path(self, path: str) -> str:
        """Return a path with ~ for the home folder."""
        inside = path.startswith(self.home + os.sep)
        return "~" + path[len(self.home):] if inside else path


def this_machine() -> Machine:
    environ = dict(os.environ)
    home = environ.get("HOME") or os.path.expanduser("~")
    return Machine(
        os.path.abspath(home), environ, sys.platform, os.path.isdir("/run/systemd/system")
    )


def read_bytes(path: str) -> bytes | None:
    """Return the content of a file, None if it does not exist. Raises UnsafeEdit if it cannot be
    read."""
    try:
        with open(path, "rb", opener=_open_nonblocking) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnsafeEdit("is not a regular file")
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise UnsafeEdit(f"cannot be read ({problem.strerror})") from None


def _open_nonblocking(path: str, flags: int) -> int:
    """Open without waiting for the writer of a named pipe, which may never come."""
    return os.open(path, flags | os.O_NONBLOCK)


def decoded(content: bytes | None) -> str:
    """Return the text of a file, empty for a missing one. Raises UnsafeEdit if it is not UTF-8."""
    try:
        return (content or b"").decode("utf-8")
    except UnicodeDecodeError:
        raise UnsafeEdit("is not UTF-8 text") from None


def read_text(path: str) -> str:
    """Return the text of a file, empty for a missing one. Raises UnsafeEdit."""
    return decoded(read_bytes(path))


def make_private(folder: str) -> None:
    """Make a folder that only this user can read. Raises OSError."""
    os.makedirs(folder, mode=0o700, exist_ok=True)


def write_whole(path: str, content: bytes, mode: int) -> None:
    """Replace a file in one step, and where possible keep its owner. Raises OSError."""
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


def delete_if_possible(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def is_this_machine(host: str) -> bool:
    """Return whether a host name or address belongs to this computer."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, _, _, address in found:
        # Only an address of this computer can be bound.
        with contextlib.suppress(OSError), socket.socket(family, kind) as attempt:
            attempt.bind(address)
            return True
    return False


def has_claude_login(machine: Machine) -> bool:
    """Return whether claude is logged in here, as it is on a server's machine."""
    folder = machine.folder_from("CLAUDE_CONFIG_DIR", ".claude")
    if os.path.exists(os.path.join(folder, ".credentials.json")):
        return True
    if machine.environ.get("CLAUDE_CODE_OAUTH_TOKEN"):
        return True
    for path in (machine.in_home(".claude.json"), os.path.join(folder, ".claude.json")):
        with contextlib.suppress(UnsafeEdit):
            if b'"oauthAccount"' in (read_bytes(path) or b""):
                return True
    return False


# ==== 3. JSON text ===========================================================
# JSON with comments, trailing commas, bare keys and single quotes, as editors and agents accept it.
# An edit changes only the text of one member.


class Member(NamedTuple):
    """One member of an object. `comma` is the position of its comma, None if it has none."""

    key: str
    start: int
    node: Node
    comma: int | None


class Node(NamedTuple):
    """A value and its position. `members` is None unless it is an object."""

    value: Json
    start: int
    end: int
    members: list[Member] | None = None

    def member(self, key: str) -> Member | None:
        return next((each for each in self.members or () if each.key == key), None)


def as_written(text: str) -> tuple[str, str]:
    """Return the stand-in for a value that is not parsed and is kept as its source text."""
    return ("as written", text)


#: A value of null in the text, as opposed to no value.
NULL = as_written("null")


def rendered(value: Json) -> str:
    """Return a value on one line."""
    return value[1] if isinstance(value, tuple) else json.dumps(value, ensure_ascii=False)


class JsonReader:
    """A parser of one text. Raises UnsafeEdit for text that it does not understand."""

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
        self.comments: list[str] = []

    def document(self) -> Node:
        """Return the whole text as one object."""
        try:
            self._skip()
            node = self._value()
            self._skip()
        except RecursionError:
            raise UnsafeEdit("is nested too deeply") from None
        if self.at != len(self.text):
            raise self._syntax_error()
        if node.members is None:
            raise UnsafeEdit("does not hold an object")
        return node

    def _syntax_error(self) -> UnsafeEdit:
        line = self.text.count("\n", 0, self.at) + 1
        return UnsafeEdit(f"is not understood at line {line}")

    def _skip(self) -> None:
        match = self._SPACE.match(self.text, self.at)
        assert match is not None
        self.comments += self._COMMENT.findall(match.group())
        self.at = match.end()

    def _accept(self, character: str) -> bool:
        found = self.text.startswith(character, self.at)
        self.at += len(character) if found else 0
        return found

    def _value(self) -> Node:
        start = self.at
        if self._accept("{"):
            members = self._members()
            return Node({m.key: m.node.value for m in members}, start, self.at, members)
        value = self._items() if self._accept("[") else self._scalar()
        return Node(value, start, self.at)

    def _members(self) -> list[Member]:
        found: list[Member] = []
        self._skip()
        while not self._accept("}"):
            start, key = self.at, self._key()
            if any(each.key == key for each in found):
                raise UnsafeEdit(f"names {key} twice")
            self._skip()
            if not self._accept(":"):
                raise self._syntax_error()
            self._skip()
            node = self._value()
            found.append(Member(key, start, node, self._separator("}")))
        return found

    def _items(self) -> list[Json]:
        found: list[Json] = []
        self._skip()
        while not self._accept("]"):
            found.append(self._value().value)
            self._separator("]")
        return found

    def _separator(self, closing: str) -> int | None:
        """Return the position of the comma after a value; without one, `closing` must follow."""
        self._skip()
        place = self.at
        comma = self._accept(",")
        self._skip()
        if not comma and not self.text.startswith(closing, self.at):
            raise self._syntax_error()
        return place if comma else None

    def _key(self) -> str:
        match = self._WORD.match(self.text, self.at)
        if match is not None:
            self.at = match.end()
            return match.group()
        key = self._scalar()
        if not isinstance(key, str):
            raise self._syntax_error()
        return key

    def _scalar(self) -> Json:
        match = self._STRING.match(self.text, self.at) or self._SCALAR.match(self.text, self.at)
        if match is None:
            raise self._syntax_error()
        self.at, word = match.end(), match.group()
        if word[0] == "'":
            inner = word[1:-1].replace("\\'", "'")
            word = '"' + re.sub(r'(?<!\\)"', r"\"", inner) + '"'
        try:
            return json.loads(word)
        except ValueError:
            # A number or an escape that only JSON5 has: it is compared and kept as text.
            return as_written(match.group())


def is_blank(text: str) -> bool:
    return not text.strip("\ufeff \t\r\n")


def json_load(text: str) -> Json:
    """Return the value of a text. Raises UnsafeEdit."""
    return {} if is_blank(text) else JsonReader(text).document().value


def json_comments(text: str) -> list[str]:
    """Return the comments of a text in their order. Raises UnsafeEdit."""
    reader = JsonReader(text)
    if not is_blank(text):
        reader.document()
    return reader.comments


def json_find(text: str, path: tuple[str, ...]) -> Json:
    """Return the value at a path, None where there is none. Raises UnsafeEdit."""
    value = json_load(text)
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
    return NULL if value is None else value


def line_start(text: str, at: int) -> int:
    """Return the position at which the line of a position begins."""
    return text.rfind("\n", 0, at) + 1


def line_end(text: str, at: int) -> int:
    """Return the position after the line of a position, its newline included."""
    return text.find("\n", at) + 1 or len(text)


def indent_at(text: str, at: int) -> str:
    """Return the white space at the beginning of the line of a position."""
    lead = text[line_start(text, at):at]
    return lead[: len(lead) - len(lead.lstrip(" \t"))]


def json_unit(text: str, root: Node) -> str:
    """Return the indentation of one level."""
    for member in root.members or ():
        lead = text[line_start(text, member.start):member.start]
        if lead and not lead.strip():
            return lead
    return "  "


def json_render(value: Json, unit: str, indent: str, newline: str) -> str:
    """Return a value as text. All lines but the first begin with `indent`."""
    if isinstance(value, tuple):
        return rendered(value)
    lines = json.dumps(value, indent=unit, ensure_ascii=False).split("\n")
    return (newline + indent).join(lines)


def json_put(text: str, path: tuple[str, ...], value: Json) -> str:
    """Return a text with the value at a path. Raises UnsafeEdit."""
    newline = newline_of(text)
    if is_blank(text):
        text += "{" + newline + "}" + newline
    root = node = JsonReader(text).document()
    unit, depth = json_unit(text, root), 0
    for name in path:
        member = node.member(name)
        if member is None:
            break
        node, depth = member.node, depth + 1
        if depth < len(path) and node.members is None:
            raise UnsafeEdit(f"has something other than an object at {'.'.join(path[:depth])}")
    if depth == len(path):
        if node.value == value:
            return text
        fresh = json_render(value, unit, indent_at(text, node.start), newline)
        return text[:node.start] + fresh + text[node.end:]
    for name in reversed(path[depth + 1:]):
        value = {name: value}
    return _json_insert(text, node, path[depth], value, unit)


def _json_insert(text: str, node: Node, key: str, value: Json, unit: str) -> str:
    """Return a text with one more member at the end of an object."""
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
    at, comma = (last.node.end, ",") if last.comma is None else (last.comma + 1, "")
    if not brace_alone:
        return f"{text[:at]}{comma} {json.dumps(key)}: {rendered(value)}{text[at:]}"
    tail = "" if comma else ","
    return text[:at] + comma + text[at:start] + indent + piece + tail + newline + text[start:]


def json_drop(text: str, path: tuple[str, ...]) -> str:
    """Return a text without the member at a path, which must exist. Raises UnsafeEdit."""
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
# Only keys before the first table are written or removed. The rest is parsed to find their places.


class Statement(NamedTuple):
    """A key with its value, or the header of a table, whose path ends in "[]"."""

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
_TOML_TOKEN = re.compile(rf"{_TOML_STRING.pattern}|#[^\n]*|[\[\]{{}}\n]|[^\[\]{{}}\n\"'#]+", re.S)
_TOML_BLANK = re.compile(r"[ \t]*(?:#[^\n]*)?\r?(?:\n|\Z)")


def _toml_names(text: str) -> tuple[str, ...]:
    """Split a dotted key."""
    found = re.findall(_TOML_KEY, text)
    return tuple(name[1:-1] if name[0] in "\"'" else name for name in found)


def _toml_value_end(text: str, at: int) -> int:
    """Return the end of a value, which is that of its line outside of strings and brackets."""
    depth = 0
    while at < len(text):
        token = _TOML_TOKEN.match(text, at)
        if token is None:
            raise UnsafeEdit("has a string that does not end")
        if text[at] in "#\n" and not depth:
            return at
        depth += (text[at] in "[{") - (text[at] in "]}")
        at = token.end()
    if depth:
        raise UnsafeEdit("has a bracket that does not close")
    return at


def toml_statements(text: str) -> list[Statement]:
    """Return the statements of a text in their order. Raises UnsafeEdit."""
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
        header, pair = _TOML_HEADER.match(text, at), _TOML_PAIR.match(text, at)
        if header is not None:
            table = _toml_table(_toml_names(header[2]), counts, header[1] == "[[")
            found.append(Statement((*table, "[]"), "", at, header.end()))
            at = header.end()
        elif pair is not None:
            start, end = pair.end(), _toml_value_end(text, pair.end())
            value = text[start:end].rstrip()
            path = table + _toml_names(pair[1])
            found.append(Statement(path, value, start, start + len(value)))
            at = line_end(text, end)
        else:
            line = text.count("\n", 0, at) + 1
            raise UnsafeEdit(f"is not understood at line {line}")
    return found


def _toml_table(
    names: tuple[str, ...], counts: dict[tuple[str, ...], int], is_array: bool
) -> tuple[str, ...]:
    """Return the path of a table, with the number of its element for each array of tables."""
    if is_array:
        counts[names] = counts.get(names, -1) + 1
    path: tuple[str, ...] = ()
    for length, name in enumerate(names, 1):
        count = counts.get(names[:length])
        path += (name,) if count is None else (name, f"#{count}")
    return path


def toml_load(text: str) -> Json:
    """Return every value by its full dotted path. Raises UnsafeEdit."""
    found: dict[str, Json] = {}
    statements = toml_statements(text)
    values = {each.path for each in statements if each.path[-1] != "[]"}
    for each in statements:
        name = ".".join(each.path)
        if name in found or any(each.path[:n] in values for n in range(1, len(each.path))):
            raise UnsafeEdit(f"defines {name.replace('.[]', '')} twice")
        found[name] = _toml_plain(each.value)
    return found


def _toml_plain(source: str) -> Json:
    """Return the value of a simple string, number or boolean; anything else as written."""
    if re.fullmatch(r"'[^'\n]*'", source):
        return source[1:-1]
    try:
        return json.loads(source)
    except ValueError:
        return as_written(source)


def toml_put(text: str, path: tuple[str, ...], value: Json) -> str:
    """Return a text with this value for a key before the first table. Raises UnsafeEdit."""
    newline, top = newline_of(text), len(text) - len(text.lstrip("\ufeff"))
    for each in toml_statements(text):
        if each.path[-1] == "[]":
            break
        if each.path == path:
            same = _toml_plain(each.value) == value
            return text if same else text[:each.start] + rendered(value) + text[each.end:]
        top = line_end(text, each.end)
    lead = "" if not top or text[top - 1] in "\n\ufeff" else newline
    return f"{text[:top]}{lead}{path[0]} = {rendered(value)}{newline}{text[top:]}"


def toml_drop(text: str, path: tuple[str, ...]) -> str:
    """Return a text without a key before the first table, which must exist. Raises UnsafeEdit."""
    (found,) = (each for each in toml_statements(text) if each.path == path)
    return text[:line_start(text, found.start)] + text[line_end(text, found.end):]


# ==== 5. YAML text ===========================================================
# The outermost level only: "key: value" lines, and lists of items. Indented lines belong to the
# line above them. Anything else at the beginning of a line makes the file unsafe to edit.


class Entry(NamedTuple):
    """A key of the outermost level. `rest` is the text after its colon and starts at `value_at`;
    `end` is where the next key begins."""

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
_YAML_KEPT_NEWLINES = re.compile(r"[|>]\+")


def yaml_entries(text: str) -> list[Entry]:
    """Return the keys of the outermost level in their order. Raises UnsafeEdit."""
    starts: list[tuple[str, str, int, int]] = []
    at = 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        body = line.rstrip("\r\n").lstrip("\ufeff")
        match = _YAML_KEY.match(body)
        if match is not None:
            value_at = at + len(line.rstrip("\r\n")) - len(body) + match.end()
            starts.append((match[1].strip("\"'"), body[match.end():].rstrip(), at, value_at))
        elif not _yaml_belongs(body, bool(starts)):
            raise UnsafeEdit(f"is not understood at line {number}")
        at += len(line)
    ends = [each[2] for each in starts[1:]] + [len(text)]
    if len({each[0] for each in starts}) != len(starts):
        raise UnsafeEdit("has a key twice")
    return [Entry(*start, end) for start, end in zip(starts, ends)]


def yaml_entry(text: str, key: str) -> Entry | None:
    return next((each for each in yaml_entries(text) if each.key == key), None)


def _yaml_belongs(line: str, inside: bool) -> bool:
    """Return whether a line that begins no key may stand where it does."""
    if not line.strip() or line.startswith("#"):
        return True
    if line.rstrip() == "---":
        return not inside
    return line.startswith(" ") and "\t" not in line[: len(line) - len(line.lstrip())] or (
        line.startswith("- "))


def yaml_load(text: str) -> Json:
    """Return the value of each key; the items of a list without keys as "". Raises UnsafeEdit."""
    entries = yaml_entries(text)
    found = {each.key: _yaml_body(text, each) for each in entries}
    items = _yaml_significant(text[: entries[0].start] if entries else text)
    return {**found, **({"": items} if items else {})}


def _yaml_significant(text: str) -> str:
    """Return a text without empty lines and comment lines."""
    lines = (line.rstrip() for line in text.lstrip("\ufeff").splitlines())
    kept = (line for line in lines if line.strip() and not line.lstrip().startswith("#"))
    return "\n".join(line for line in kept if line != "---")


def _yaml_body(text: str, entry: Entry) -> Json:
    """Return the simple value of a key, else everything that belongs to it as written."""
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


def yaml_put(text: str, path: tuple[str, ...], value: Json) -> str:
    """Return a text with this value for a key of the outermost level. Raises UnsafeEdit."""
    (name,) = path
    check_has_keys(text)
    entry = yaml_entry(text, name)
    if entry is None:
        return f"{text}{yaml_end(text)}{name}: {rendered(value)}{newline_of(text)}"
    body = _yaml_body(text, entry)
    if body == value:
        return text
    match = _YAML_SCALAR.fullmatch(entry.rest)
    if isinstance(body, tuple) and body[1] or match is None and entry.rest:
        raise UnsafeEdit(f"has a value for {name} that is more than one word")
    old = match.end(1) if match is not None else 0
    lead = "" if text[entry.value_at - 1] in " \t" else " "
    return text[:entry.value_at] + lead + rendered(value) + text[entry.value_at + old:]


def yaml_end(text: str) -> str:
    """Return the newline that a text needs before another line. Raises UnsafeEdit where it would
    become part of a value."""
    if not text or text.endswith("\n"):
        return ""
    entries = yaml_entries(text)
    last = text[entries[-1].start:] if entries else text
    if re.search(r"[|>][-+0-9]*[ \t]*(#[^\n]*)?\r?$", last, re.M):
        raise UnsafeEdit("ends in a text of several lines without a newline")
    return newline_of(text)


def check_has_keys(text: str) -> None:
    """Raise UnsafeEdit for a YAML text that is a list, where no key can stand."""
    if "" in yaml_load(text):
        raise UnsafeEdit("is a list and not a set of keys")


def yaml_drop(text: str, path: tuple[str, ...]) -> str:
    """Return a text without the line of a key, which must exist. Raises UnsafeEdit."""
    found = yaml_entry(text, path[0])
    assert found is not None
    return text[:found.start] + text[line_end(text, found.value_at):]


# ==== 6. Changes =============================================================
# The changes of a file are SetValues, and at most one Block of lines between two markers. They can
# be applied to a text, and removed from a text that was edited since.

BEGIN, END = "# >>> ocp >>>", "# <<< ocp <<<"
_BLOCK = re.compile(
    rf"^[ \t]*{re.escape(BEGIN)}[^\n]*\n.*?^[ \t]*{re.escape(END)}[^\n]*(?:\n|\Z)", re.M | re.S
)


class SetValue(NamedTuple):
    """A value at a path."""

    path: tuple[str, ...]
    value: Json
    #: Whether it makes OCP the default of a tool, rather than one of its choices.
    is_default: bool = False
    #: Whether another value at this path is kept.
    if_missing: bool = False
    #: Whether the path belongs to OCP by its name, whatever value it has.
    owned: bool = False


class Block(NamedTuple):
    """Lines between markers, at the end of the file; or as items of the YAML list of key `under`,
    where "" is a file that is itself a list; or, `in_shell`, where a shell reads them."""

    lines: tuple[str, ...]
    under: str | None = None
    in_shell: bool = False


class WholeFile(NamedTuple):
    """A file that belongs to OCP altogether."""

    content: str
    is_default: bool = False


Change = Union[SetValue, Block, WholeFile]


class Format(NamedTuple):
    """The operations on a text of one kind."""

    load: Callable[[str], Json]
    put: Callable[[str, tuple[str, ...], Json], str]
    drop: Callable[[str, tuple[str, ...]], str]
    #: Whether load returns objects within objects, or one flat object with dotted keys.
    nested: bool = False
    #: Whether added lines end as the others of the file do. A shell would read a CR as a part of
    #: the last word.
    keeps_line_ends: bool = True

    def find(self, text: str, path: tuple[str, ...]) -> Json:
        """Return the value at a path, None where there is none. Raises UnsafeEdit."""
        return json_find(text, path) if self.nested else self.load(text).get(".".join(path))


def _without_keys(*_: Json) -> Json:
    raise UnsafeEdit("has no keys")


FORMATS = {
    "json": Format(json_load, json_put, json_drop, nested=True),
    "toml": Format(toml_load, toml_put, toml_drop),
    "yaml": Format(yaml_load, yaml_put, yaml_drop),
    "lines": Format(lambda text: {}, _without_keys, _without_keys, keeps_line_ends=False),
}


def block_of(text: str) -> re.Match[str] | None:
    """Return the block of OCP. Raises UnsafeEdit when its markers are damaged."""
    begins, ends = text.count(BEGIN), text.count(END)
    match = _BLOCK.search(text)
    if (begins, ends) != ((1, 1) if match else (0, 0)):
        raise UnsafeEdit(f"has damaged markers ({BEGIN})")
    return match


#: Words that end the reading of a start file: at the beginning of a line for every shell, elsewhere
#: perhaps for some.
_STOP = re.compile(r"^(?:(?:return|exit|logout)(?![\w=./-])|exec[ \t]+[^\s0-9{<>&])", re.M)
_MAY_STOP = re.compile(r"^[^#\n]*(?<![\w$./-])(?:return|exit|logout|exec)(?![\w=./-])", re.M)


def must_stand_first(text: str) -> bool:
    """Return whether a block has to stand first in a start file to be read by its shell: a later
    place may follow what ends the reading, or a statement that CRs leave open. The end is better
    where the file sets the same variables itself, because the last setting wins."""
    if is_cut_off(text) or text.rstrip("\n").endswith("\\"):
        return True
    return bool(_MAY_STOP.search(text)) and not variable_lines(text)


def is_cut_off(text: str) -> bool:
    """Return whether a shell that reads this may not reach its end."""
    return "\r\n" in text or bool(_STOP.search(text))


def variable_lines(text: str) -> list[tuple[int, str]]:
    """Return the numbers of the lines that set one of OCP's variables, each with the variable."""
    lines = enumerate(text.splitlines(), 1)
    found = ((number, _SETTING.match(line)) for number, line in lines)
    return [(number, match[1]) for number, match in found if match]


def put_block(text: str, block: Block, newline: str) -> str:
    """Return a text with this block: where it was, else where it belongs. Raises UnsafeEdit."""

    def lines(indent: str) -> str:
        inner = (BEGIN, *block.lines, END)
        return "".join((indent + line if line else "") + newline for line in inner)

    found = block_of(text)
    if found and block.in_shell and is_cut_off(text[:found.start()]):
        text, found = text[:found.start()] + text[found.end():], None
    if found is not None:
        indent = indent_at(text, text.index(BEGIN))
        return text[:found.start()] + lines(indent) + text[found.end():]
    if block.under:
        return _put_items(text, block.under, lines)
    if block.under == "":
        _check_is_list(text)
        return text + yaml_end(text) + lines("")
    if block.in_shell and must_stand_first(text):
        return lines("") + text
    lead = "" if not text or text.endswith("\n") else newline
    return text + lead + lines("")


def _check_is_list(text: str) -> None:
    """Raise UnsafeEdit unless another item can be added at the end of this YAML text."""
    if yaml_entries(text):
        raise UnsafeEdit("is not a list")
    items = _yaml_significant(text)
    if items and not items.startswith("- ") or _YAML_KEPT_NEWLINES.search(items):
        raise UnsafeEdit("is not a list of items that is understood")


def _put_items(text: str, key: str, lines: Callable[[str], str]) -> str:
    """Return a YAML text with more items in the list of a key. Raises UnsafeEdit."""
    newline = newline_of(text)
    check_has_keys(text)
    found = yaml_entry(text, key)
    if found is None:
        return f"{text}{yaml_end(text)}{key}:{newline}{lines('  ')}"
    body = text[found.value_at:found.end]
    empty_list = re.match(r"\[[ \t]*\](?=[ \t]*(?:#[^\n]*)?\r?(?:\n|\Z))", body)
    if empty_list is not None:
        text = text[:found.value_at] + text[found.value_at + empty_list.end():]
        end, items = line_end(text, found.value_at), None
    else:
        items = _YAML_ITEM.search(body)
        if found.rest and not found.rest.startswith("#") or _YAML_KEPT_NEWLINES.search(body):
            raise UnsafeEdit(f"has a list of {key} that is not understood")
        if items is None and _yaml_significant(body):
            raise UnsafeEdit(f"has a value for {key} that is not a list")
        end = _items_end(found, body) if items else line_end(text, found.value_at)
    lead = "" if text[:end].endswith("\n") else newline
    return text[:end] + lead + lines(items[1] if items else "  ") + text[end:]


def _items_end(entry: Entry, body: str) -> int:
    """Return the end of a list's last item. Unindented comments below belong to what follows."""
    end = entry.end
    for line in reversed(body.splitlines(keepends=True)):
        if line.strip() and not line.startswith("#"):
            break
        end -= len(line)
    return max(end, entry.value_at)


def drop_block(text: str, under: str | None) -> str:
    """Return a text without OCP's block; a list that it leaves empty becomes []."""
    found = block_of(text)
    if found is None:
        return text
    rest = text[:found.start()] + text[found.end():]
    entry = yaml_entry(rest, under) if under else None
    if entry and not _yaml_significant(rest[entry.value_at:entry.end]):
        space = " " if entry.rest else ""
        return f"{rest[:entry.value_at].rstrip()} []{space}{rest[entry.value_at:]}"
    return rest


def apply_changes(text: str, kind: str, changes: Sequence[Change]) -> str:
    """Return a text with all changes, verified to have them and no other difference. A Block has
    to be the last. Raises UnsafeEdit."""
    form = FORMATS[kind]
    wanted = copy.deepcopy(form.load(text))
    result = text
    for change in changes:
        if isinstance(change, WholeFile):
            return change.content
        if isinstance(change, Block):
            before, newline = result, newline_of(result) if form.keeps_line_ends else "\n"
            result = put_block(before, change, newline)
            form.load(result)
            sides = [_outside_block(each, kind, change.under) for each in (before, result)]
        elif change.if_missing and form.find(result, change.path) is not None:
            continue
        else:
            result = form.put(result, change.path, change.value)
            _set(wanted, change, form.nested)
            sides = [form.load(result), wanted]
        if sides[0] != sides[1]:
            raise UnsafeEdit("would not have the right content after the change")
    if kind == "json" and json_comments(result) != json_comments(text):
        raise UnsafeEdit("has comments inside of what would be replaced")
    return result


def _set(wanted: Json, change: SetValue, nested: bool) -> None:
    """Apply a SetValue to a loaded value."""
    path = change.path if nested else (".".join(change.path),)
    for name in path[:-1]:
        wanted = wanted.setdefault(name, {})
    wanted[path[-1]] = change.value


def _outside_block(text: str, kind: str, under: str | None) -> tuple[Json, str]:
    """Return what a text holds beside its block, in a form that can be compared."""
    rest = drop_block(text, under)
    loaded = FORMATS[kind].load(rest)
    if under and not isinstance(loaded.get(under), str):
        body = loaded.get(under) or as_written("")
        empty = re.fullmatch(r"(\[[ \t]*\])?\s*(#.*)?", body[1])
        loaded = {**loaded, under: "" if empty else body}
    return loaded, rest.rstrip("\r\n") if kind == "lines" else ""


class Applied(NamedTuple):
    """A SetValue that was applied, with what is needed to undo it."""

    path: tuple[str, ...]
    value: Json
    #: The value before, None for none.
    before: Json
    #: How many of the path's objects existed.
    depth: int
    owned: bool


def remove_changes(
    text: str, kind: str, applied: Sequence[Applied], under: str | None, has_block: bool
) -> tuple[str, list[str]]:
    """Return a text without what was added, and the paths that were kept because their value was
    changed since. Raises UnsafeEdit."""
    form, kept = FORMATS[kind], []
    for each in reversed(applied):
        now = form.find(text, each.path)
        if now is None:
            continue
        if now != each.value and not each.owned:
            kept.append(".".join(each.path))
        elif each.before is not None:
            text = form.put(text, each.path, each.before)
        else:
            text = _drop_with_parents(form.drop(text, each.path), form, each)
    if has_block:
        text = drop_block(text, under)
    form.load(text)
    return text, kept


def _drop_with_parents(text: str, form: Format, applied: Applied) -> str:
    """Remove the objects that were made for a value and are empty."""
    for length in range(len(applied.path) - 1, applied.depth, -1):
        if form.nested and form.find(text, applied.path[:length]) == {}:
            text = form.drop(text, applied.path[:length])
    return text


# ==== 7. Server ==============================================================
# What the server says about itself. Every failure is one sentence.

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
    """A model in the server's list."""

    id: str
    name: str
    context_tokens: int
    output_tokens: int
    reasoning: bool
    #: The levels of effort that it takes, least first.
    efforts: tuple[str, ...] = ()


class Server(NamedTuple):
    """A server that can be used. `key` is empty where it needs none."""

    url: str
    version: str
    models: tuple[Model, ...]
    key: str
    #: The certificate (PEM) that tools have to trust, empty where they need none.
    certificate: str = ""

    @property
    def api(self) -> str:
        """Return the base address for OpenAI clients."""
        return f"{self.url}/v1"

    @property
    def key_or_any(self) -> str:
        """Return a key for tools that insist on one."""
        return self.key or NO_KEY

    def _first(self, family: str, default: int) -> Model:
        found = (model for model in self.models if family in model.id)
        return next(found, self.models[default])

    @property
    def main(self) -> Model:
        """Return the model for everyday work."""
        return self._first("sonnet", 0)

    @property
    def cheapest(self) -> Model:
        return self._first("haiku", -1)


def server_address(host: str, port: int | None, https: bool) -> str:
    """Return the address of a server given as a name, HOST:PORT or an address, which may go on with
    a path. Raises Problem."""
    text = host.strip()
    # An https address without a port means what it means in a browser.
    default_port = 443 if text.startswith("https://") else DEFAULT_PORT
    if "://" not in text:
        text = f"[{text}]" if text.count(":") > 1 and not text.startswith("[") else text
        text = f"{'https' if https else 'http'}://{text}"
    try:
        parts = urllib.parse.urlsplit(text)
        name, given_port = parts.hostname or "", parts.port
        # A name that no name server can be asked for, such as a..b, is a ValueError too.
        name.encode("idna")
    except ValueError:
        parts, name, given_port = urllib.parse.urlsplit(""), "", None
    usable = re.fullmatch(r"\w[\w.-]*|[0-9A-Fa-f:.]+(?:%\w+)?", name, re.A)
    if not usable or parts.scheme not in ("http", "https") or "@" in parts.netloc or (
            not re.fullmatch(r"(?:/[\w.~-]+)*/?", parts.path, re.A) or parts.query):
        raise Problem(Exit.USAGE, f"{clean(host)!r} is not a host name or address.")
    scheme = "https" if https else parts.scheme
    shown = f"[{name}]" if ":" in name else name
    return f"{scheme}://{shown}:{port or given_port or default_port}{path_prefix(parts.path)}"


def path_prefix(path: str) -> str:
    """Return the path of a server's address without /v1 and a slash at its end."""
    path = path.rstrip("/")
    return path[:-len("/v1")] if path.endswith("/v1") else path


def checked_key(key: str, source: str) -> str:
    """Return a key that every file and header can carry. Raises Problem for any other."""
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


class HttpProblem(Exception):
    """A request without a useful answer. `kind` is "unreachable" (nobody answered), "denied" (401,
    403), "upstream" (5xx) or "refused"; `status` is 0 where nobody answered."""

    def __init__(self, kind: str, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.kind, self.status = kind, status


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
    method: str, url: str, timeout_s: float, key: str = "", body: object = None,
    certificate: str = "",
) -> Json:
    """Return the JSON value that a server answers, within this time and MAX_ANSWER_BYTES. No
    redirect is followed, so that the key reaches this address only. With a certificate (PEM) the
    server has to have that one. Raises HttpProblem."""
    try:
        with time_limit(timeout_s):
            status, text = _exchange(method, url, timeout_s, key, body, certificate)
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
    method: str, url: str, timeout_s: float, key: str, body: object, certificate: str
) -> tuple[int, bytes]:
    """Return the status and the body of an answer; a body above the limit is not read to its end.
    Raises OSError, HTTPException or ValueError."""
    parts = urllib.parse.urlsplit(url)
    connect: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
    if parts.scheme == "https":
        tls = ssl.create_default_context(cadata=certificate or None)
        connect = functools.partial(http.client.HTTPSConnection, context=tls)
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


# --- shared: certificate
class DerValue(NamedTuple):
    """One value of DER, the encoding of certificates."""

    tag: int
    content: bytes
    #: With its tag and its length.
    whole: bytes


def der_values(text: bytes) -> list[DerValue]:
    """Return the values that stand one after the other. Raises ValueError for what is no DER."""
    found, start = [], 0
    while start < len(text):
        length_at = start + 1
        size, at = int.from_bytes(text[length_at:length_at + 1], "big"), length_at + 1
        if size & 0x80:
            at += size & 0x7F
            size = int.from_bytes(text[length_at + 1:at], "big")
        if at + size > len(text):
            raise ValueError("not a certificate")
        found.append(DerValue(text[start], text[at:at + size], text[start:at + size]))
        start = at + size
    return found


def certificate_fields(certificate: bytes) -> list[DerValue]:
    """Return serial number, algorithm, issuer, validity, subject, public key, and extensions.

    Takes a certificate in DER. Raises ValueError for anything else.
    """
    try:
        fields = der_values(der_values(der_values(certificate)[0].content)[0].content)
        fields = fields[1:] if fields[0].tag == 0xA0 else fields
        if len(fields) >= 6 and fields[5].tag == 0x30:
            return fields
    except IndexError:
        pass
    raise ValueError("not a certificate")


def fingerprint_of(certificate: bytes) -> str:
    """Return the fingerprint of the public key in a certificate (DER). Raises ValueError.

    It is SHA256: and the base64 of the digest that curl's --pinnedpubkey takes. A certificate
    that is renewed with the same key has the same.
    """
    key = certificate_fields(certificate)[5].whole
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode()
# --- end shared


#: One certificate in PEM.
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")


def pinned_certificate(url: str, fingerprint: str) -> str:
    """Return the certificate (PEM) of a server, whose key has to have this fingerprint. Raises
    Problem."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https":
        raise Problem(Exit.USAGE, f"{url} has no certificate: write https:// in front of the host.")
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    try:
        with time_limit(FETCH_TIMEOUT_S), socket.create_connection(
                (parts.hostname or "", parts.port or 443)) as link:
            with unverified.wrap_socket(link, server_hostname=parts.hostname) as secure:
                certificate = secure.getpeercert(True) or b""
        found = fingerprint_of(certificate)
    except OutOfTime:
        raise Problem(Exit.UNREACHABLE, f"{url} does not answer.") from None
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise Problem(Exit.UNREACHABLE, f"Cannot reach {url} by https: {quoted(reason)}.") from None
    if found != fingerprint:
        raise Problem(
            Exit.FAILED,
            f"What answers at {url} has the fingerprint {found}, not {fingerprint}. Nothing was "
            "sent to it. Compare with `ocp tls --show` on the server's machine: either its key is "
            "a new one, which --fingerprint tells, or something else answers in its place.")
    return ssl.DER_cert_to_PEM_cert(certificate)


def fingerprint(text: str) -> str:
    """Return a fingerprint as fingerprint_of does, from that or from what curl takes."""
    match = re.fullmatch(r"(?:SHA256:|sha256//)([A-Za-z0-9+/]{43})=?", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no fingerprint: it is SHA256: and 44 characters, see `ocp tls --show`")
    return f"SHA256:{match[1]}="


def _refusal(status: int, text: bytes) -> HttpProblem:
    """Return the problem that a status stands for. Raises RecursionError."""
    if status < 400:
        return HttpProblem("refused", f"it redirects to another address ({status})", status)
    kind = "denied" if status in (401, 403) else "upstream" if status >= 500 else "refused"
    error = None
    with contextlib.suppress(ValueError):
        body = json.loads(text)
        error = body.get("error") if isinstance(body, dict) else None
    told = error.get("message") if isinstance(error, dict) else error
    return HttpProblem(kind, str(told or f"the status is {status}"), status)


def _bounded_number(digits: str) -> int | float:
    """Return an integer of JSON. One of a million digits would take Python minutes."""
    return int(digits) if len(digits) <= 18 else float(digits)


def ask_health(url: str, certificate: str = "") -> Mapping[str, Json]:
    """Return what GET /health says. Raises Problem."""
    reason = "its /health is not that of OCP"
    try:
        health = fetch_json("GET", f"{url}/health", FETCH_TIMEOUT_S, certificate=certificate)
    except HttpProblem as problem:
        if "CERTIFICATE_VERIFY_FAILED" in str(problem):
            raise untrusted(url, str(problem), certificate) from None
        if problem.kind == "unreachable":
            raise Problem(
                Exit.UNREACHABLE,
                f"Cannot reach {url} ({quoted(problem)}): is the server running, and does it "
                "listen where this machine can reach it (CLAUDE_BIND, firewall)?",
            ) from None
        if url.startswith("http:") and "uses https" in str(problem):
            raise Problem(
                Exit.UNREACHABLE, f"The server at {url} speaks https. Run the command that "
                "`ocp lan` prints on its machine, or write https:// in its address.") from None
        health, reason = None, quoted(problem)
    if not isinstance(health, dict) or health.get("authMode") not in AUTH_MODES or not isinstance(
            health.get("version"), str):
        secure = "" if url.startswith("https") else "; for a server with https add --https"
        raise Problem(
            Exit.UNREACHABLE, f"What answers at {url} is not an OCP server ({reason}){secure}.")
    return health


def untrusted(url: str, reason: str, certificate: str) -> Problem:
    """Return the problem that a certificate is not accepted, with what to do."""
    host = urllib.parse.urlsplit(url).hostname
    if "mismatch" in reason:
        advice = f"is not for {host}: on the server's machine run `ocp tls --name {host}`"
    elif certificate:
        advice = f"cannot be used ({quoted(reason)}): on the server's machine run `ocp tls`"
    else:
        advice = ("is not trusted here: run the command that `ocp tls --show` prints on the "
                  "server's machine, which has its --fingerprint; or set SSL_CERT_FILE to the file "
                  "of its authority, for this script and for your tools")
    return Problem(Exit.UNREACHABLE, f"The certificate of {url} {advice}.")


def ask_models(url: str, key: str, certificate: str = "") -> tuple[Model, ...]:
    """Return the models that a key may use. Raises HttpProblem."""
    listed = fetch_json(
        "GET", f"{url}/v1/models", FETCH_TIMEOUT_S, key, certificate=certificate)
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
    """Return the model of a row, given the names of the fields that differ between lists. Raises
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
    """Return a number of tokens, the default where there is none. Raises ValueError."""
    value = row.get(name)
    if value is None:
        return default
    if type(value) is not int or not 0 < value <= MAX_TOKENS:
        shown = clean(json.dumps(value))[:40]
        raise ValueError(f"the {name} of {row['id']} is {shown}, which is not a number of tokens")
    return value


def models_in(path: str) -> tuple[Model, ...] | None:
    """Return the models of a models.json; None if there is no such file. Raises Problem."""
    try:
        content = read_bytes(path)
        rows = json.loads(content)["models"] if content is not None else None
        return rows and tuple(
            model_of(row, "displayName", "contextWindow", "maxTokens") for row in rows)
    except (UnsafeEdit, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Problem(Exit.FAILED, f"{path} cannot be used as a list of models.") from None


def probe(
    url: str, key: str, saved_key: str, ask_key: Callable[[str], str | None],
    certificate: str = "",
) -> tuple[Server, Mapping[str, Json]]:
    """Return the server and what its /health says. `key` is the one on the command line; without
    one `saved_key` is tried, then others, then `ask_key` asks the user. Raises Problem."""
    health = ask_health(url, certificate)
    keys = [key] if key else [saved_key, anonymous_key(url, health), ""]
    # A server that wants a key would list a request without one among its failures.
    keys = [each for each in dict.fromkeys(keys) if each or health["authMode"] == "none"]
    refused = ""
    for each in keys:
        try:
            models = ask_models(url, each, certificate)
            return Server(url, quoted(health["version"]), models, each, certificate), health
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
        raise Problem(Exit.USAGE, f"{url} needs a key: add --key KEY.")
    if not entered.strip():
        raise Problem(Exit.DENIED, f"{url} needs a key, and none was given.")
    return probe(url, checked_key(entered, "That key"), "", ask_key, certificate)


def anonymous_key(url: str, health: Mapping[str, Json]) -> str:
    """Return the key that a server gives to everybody, empty if none. Raises Problem."""
    shown = health.get("anonymousKey") or ""
    if shown and not (isinstance(shown, str) and KEY_PATTERN.fullmatch(shown)):
        raise Problem(
            Exit.FAILED,
            f"{url} advertises a key with characters that no key may have, so nothing is written. "
            "Name a key of your own with --key.")
    return shown


def try_request(server: Server) -> str:
    """Return the text of one real answer from the cheapest model. Raises HttpProblem."""
    body = {
        "model": server.cheapest.id, "max_tokens": 32,
        "messages": [{"role": "user", "content": "Reply with the word OK."}],
    }
    answer = fetch_json(
        "POST", f"{server.api}/chat/completions", TRIAL_TIMEOUT_S, server.key, body,
        server.certificate)
    try:
        return str(answer["choices"][0]["message"]["content"])
    except (TypeError, KeyError, IndexError):
        raise HttpProblem("refused", "the answer is not a chat completion") from None


# ==== 8. Tools ===============================================================
# One function for each tool returns its steps; it reads files but changes nothing. A new tool is
# one function and one row of TOOLS.


class Role(enum.Enum):
    """Whether OCP becomes a tool's default: where it has none yet, always, or never."""

    AUTO = "auto"
    PRIMARY = "primary"
    BACKUP = "backup"


class FileStep(NamedTuple):
    """Changes to one file. A command, if given, gets them as a JSON object and makes them."""

    path: str
    kind: str
    changes: tuple[Change, ...]
    why: str
    command: tuple[str, ...] = ()
    #: Remarks for the plan.
    notes: tuple[str, ...] = ()


class SessionStep(NamedTuple):
    """A variable of the macOS session to set with launchctl."""

    name: str
    value: str


class Hint(NamedTuple):
    """Something for the user to read or to do."""

    text: str


Step = Union[FileStep, SessionStep, Hint]


@dataclasses.dataclass(frozen=True)
class Context:
    """What a tool's function works with. `original_text` returns a file's text without OCP's
    changes."""

    machine: Machine
    server: Server
    role: Role
    allow_fallback: bool
    anthropic: bool
    original_text: Callable[[str], str]
    #: The name of OCP's provider, empty for the default one; and the name of an earlier run.
    #: with_name sets both for one tool.
    provider: str = ""
    earlier: str = ""
    #: The tools that the user named.
    asked: Sequence[str] = ()
    #: Whether shells get nothing new but the certificate.
    certificate_only: bool = False
    #: For an OpenClaw that sees another machine, such as one in a container: the address of the
    #: server there, and the file there that holds the key, which is then not saved here.
    openclaw_url: str = ""
    openclaw_key_path: str = ""

    @property
    def key_words(self) -> str:
        """Return what to enter in a field for a key, without showing one."""
        if not self.server.key:
            return f"anything, for example {NO_KEY}"
        return f"the output of `cat {shlex.quote(self.machine.key_file)}`"

    def lines_of(self, *words: str) -> str:
        """Return a hint of several lines with the address, key and model filled in."""
        return "\n".join(words).format(
            api=self.server.api, url=self.server.url, key=self.key_words,
            model=self.server.main.id)


#: Returns the providers in a text, each with its entry.
Providers = Callable[[str], Mapping[str, Json]]


def providers_at(*place: str) -> Providers:
    """Return a function that reads the providers at this place of a JSON text."""
    def found(text: str) -> Mapping[str, Json]:
        value = json_find(text, place)
        return value if isinstance(value, dict) else {}

    return found


def text_at(entry: Json, *path: str) -> str:
    """Return the text at a path of a JSON value, empty where there is none."""
    for name in path:
        entry = entry.get(name) if isinstance(entry, dict) else None
    return entry if isinstance(entry, str) else ""


def with_name(
    context: Context, title: str, default: str, path: str, providers: Providers,
    address: Callable[[Json], str],
) -> tuple[Context, tuple[str, ...]]:
    """Return the context with OCP's name among the providers of a file, and the notes about it. The
    name is the given one, else that of an earlier run, else the first of NAME, NAME-2 and so on
    that is not the user's. `address` returns the server of an entry, "" if unknown: an entry for
    this server belongs to OCP. Raises Problem if the given name is taken."""
    now, original = _providers_of(context, path, providers)

    def is_taken(name: str) -> bool:
        return name in original and not same_server(address(original[name]), context.server.url)

    earlier = next((name for name in now if now[name] != original.get(name)), "")
    if context.provider and is_taken(context.provider):
        place = address(original[context.provider])
        raise Problem(
            Exit.USAGE, f"{title} already has your own provider {context.provider}"
            f"{place and ', for ' + clean(place)}: choose another name with --provider-name.")
    numbered = (f"{default}-{number}" for number in itertools.count(2))
    names = filter(None, itertools.chain((context.provider, earlier, default), numbered))
    name = next(each for each in names if not is_taken(each))
    note = (f"your own provider {default} is kept: OCP is called {name}; --provider-name changes "
            "that")
    return (dataclasses.replace(context, provider=name, earlier=earlier),
            (note,) if is_taken(default) else ())


def _providers_of(
    context: Context, path: str, providers: Providers
) -> tuple[Mapping[str, Json], Mapping[str, Json]]:
    """Return the providers of a file and of its original; none where it cannot be read."""
    with contextlib.suppress(UnsafeEdit):
        return providers(read_text(path)), providers(context.original_text(path))
    return {}, {}


def same_server(url: str, other: str) -> bool:
    """Return whether two addresses lead to one server, as far as can be told from here."""
    try:
        sides = [urllib.parse.urlsplit(each) for each in (url, other)]
        ports = [side.port or (443 if side.scheme == "https" else 80) for side in sides]
    except ValueError:
        return False
    hosts = [side.hostname or "" for side in sides]
    paths = [path_prefix(side.path) for side in sides]
    # Names are looked up last: most providers are elsewhere, and name servers need not learn them.
    return ports[0] == ports[1] and paths[0] == paths[1] and all(hosts) and (
        hosts[0] == hosts[1] or all(map(is_this_machine, hosts)))


#: The environment variables that programs read, each with the property of Server that it gets.
VARIABLES = {
    "OPENAI_BASE_URL": "api", "OPENAI_API_BASE": "api", "OPENAI_API_KEY": "key_or_any",
    "OCP_API_KEY": "key_or_any", "ANTHROPIC_BASE_URL": "url", "ANTHROPIC_AUTH_TOKEN": "key_or_any",
}
#: Those that say which certificates programs trust, each with the property of Machine that it gets.
#: Node adds that file to what it trusts; OpenSSL, Python and Rust trust that file instead.
CERTIFICATE_VARIABLES = {"NODE_EXTRA_CA_CERTS": "certificate_file", "SSL_CERT_FILE": "bundle_file"}
#: Where systems keep the certificates that they trust: Debian, Red Hat, SUSE, macOS and Alpine.
SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem", "/etc/ssl/cert.pem",
)


def system_certificates() -> str:
    """Return the certificates (PEM) that this system trusts, empty if they are not found."""
    for path in SYSTEM_BUNDLES:
        with contextlib.suppress(UnsafeEdit):
            found = _PEM.findall((read_bytes(path) or b"").decode("utf-8", "replace"))
            if found:
                return "".join(f"{each}\n" for each in found)
    return ""


def certificate_steps(context: Context) -> list[Step]:
    """Save the server's certificate, alone and with those of the system."""
    machine, own, others = context.machine, context.server.certificate, system_certificates()
    steps: list[Step] = [FileStep(
        machine.certificate_file, "lines", (WholeFile(own),), "the certificate of the server")]
    if not others:
        return [*steps, Hint(
            "The certificates of this system were not found: programs other than Node's do not "
            f"trust the server until you name {machine.shown_path(machine.certificate_file)} to "
            "them.")]
    return [*steps, FileStep(machine.bundle_file, "lines", (WholeFile(others + own),),
                             "the certificates of this system, and the server's")]


def variables(context: Context) -> dict[str, str]:
    """Return the variables to set, with their values."""
    found = {name: getattr(context.server, value) for name, value in VARIABLES.items()
             if context.anthropic or not name.startswith("ANTHROPIC_")}
    if context.server.certificate:
        names = list(CERTIFICATE_VARIABLES)[:2 if system_certificates() else 1]
        found.update((name, getattr(context.machine, CERTIFICATE_VARIABLES[name]))
                     for name in names)
    return found


_SETTING = re.compile(
    r"[ \t]*(?:(?:export|setenv|typeset|declare|set)[ \t]+)?(?:-\w+[ \t]+)*"
    rf"({'|'.join([*VARIABLES, *CERTIFICATE_VARIABLES])})(?![\w])[ \t]*[= \t]")


class Shell(NamedTuple):
    """A family of shells. The variables are set in `script`, a file of OCP. The user's
    `start_files` read it with the line `reads`; a shell without them finds it by itself."""

    script: str
    setting: str
    quoted: Callable[[str], str]
    reads: str = ""
    start_files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    #: Start files that are not changed.
    others: tuple[str, ...] = ()

    def line(self, name: str, value: str) -> str:
        """Return the line that sets a variable."""
        return self.setting.format(name, self.quoted(value))

    def sets(self, name: str, value: str | None = None) -> bool:
        """Return whether the script, as it is, sets a variable; with a value, to that."""
        with contextlib.suppress(UnsafeEdit):
            lines = read_text(self.script).splitlines()
            start = self.setting.partition("{}")[0] + name
            return any(line.startswith(start) if value is None else line == self.line(name, value)
                       for line in lines)
        return False


def shells(machine: Machine) -> list[Shell]:
    """Return the families of shells that are used here; the one of sh is always the first."""
    found = [Shell(os.path.join(machine.state_folder, "env.sh"), "export {}={}", shlex.quote,
                   "if [ -r {0} ]; then . {0}; fi", tuple(shell_files(machine)))]
    csh = csh_files(machine)
    if csh:
        found.append(Shell(os.path.join(machine.state_folder, "env.csh"), "setenv {} {}",
                           csh_quoted, "if ( -r {0} ) source {0}", tuple(csh)))
    fish = os.path.join(machine.config_home, "fish")
    if machine.shell == "fish" or os.path.isdir(fish):
        # fish reads its own file last.
        found.append(Shell(os.path.join(fish, "conf.d", "ocp.fish"), "set -gx {} {}", fish_quoted,
                           others=(os.path.join(fish, "config.fish"),)))
    nushell = nushell_folder(machine)
    if machine.shell == "nu" or os.path.isdir(nushell):
        found.append(Shell(os.path.join(nushell, "autoload", "ocp.nu"), "$env.{} = {}", json.dumps,
                           notes=("Nushell reads this folder from 0.101 on",)))
    return found


#: How long zsh may take to print its folder.
ZSH_TIMEOUT_S = 10.0


def zsh_folder(machine: Machine) -> str:
    """Return the folder of .zshrc. Only zsh itself knows what its .zshenv makes of ZDOTDIR."""
    if os.path.lexists(machine.in_home(".zshenv")) and machine.program("zsh"):
        ran = machine.run("zsh", "-c", 'print -r -- "=$ZDOTDIR"', timeout_s=ZSH_TIMEOUT_S)
        said = [line[1:] for line in ran.output.splitlines() if line.startswith("=")]
        if said and os.path.isabs(said[-1]):
            return said[-1]
    return machine.folder_from("ZDOTDIR")


def shell_files(machine: Machine) -> list[str]:
    """Return the start files of the shells of sh's family that are used here."""
    zsh = os.path.join(zsh_folder(machine), ".zshrc")
    bash, found = machine.in_home(".bashrc"), []
    if machine.shell == "bash" or os.path.lexists(bash):
        found.append(bash)
        if machine.is_mac:
            # A login shell, which is what Terminal opens, reads the first of these instead.
            login = [machine.in_home(name) for name in (".bash_profile", ".bash_login", ".profile")]
            found.append(next(filter(os.path.lexists, login), login[0]))
    if machine.shell == "zsh" or os.path.lexists(zsh) or machine.is_mac:
        found.append(zsh)
    if not found and machine.shell not in OTHER_SHELLS:
        found.append(machine.in_home(".profile"))
    return found


#: Shells that do not read the files of sh.
OTHER_SHELLS = ("fish", "nu", "csh", "tcsh", "elvish", "xonsh", "pwsh")


def csh_files(machine: Machine) -> list[str]:
    """Return the start files of csh and tcsh, if one of them is used here. tcsh reads .cshrc only
    where there is no .tcshrc."""
    names = [machine.in_home(name) for name in (".tcshrc", ".cshrc")]
    found = [path for path in names if os.path.lexists(path)]
    return found or names[1:] * (machine.shell in ("csh", "tcsh"))


def support_folder(machine: Machine, name: str) -> str:
    """Return a program's folder below Application Support on macOS, else below .config."""
    mac = machine.in_home("Library", "Application Support")
    return os.path.join(mac if machine.is_mac else machine.config_home, name)


def nushell_folder(machine: Machine) -> str:
    if machine.environ.get("XDG_CONFIG_HOME"):
        return os.path.join(machine.config_home, "nushell")
    return support_folder(machine, "nushell")


def users_variables(
    context: Context, found: Sequence[Shell], names: Mapping[str, str]
) -> dict[str, str]:
    """Return where the user has set variables of these names to something of their own."""
    machine = context.machine
    places: dict[str, str] = {}
    for path in [path for shell in found for path in (*shell.start_files, *shell.others)]:
        with contextlib.suppress(UnsafeEdit):
            for number, name in variable_lines(context.original_text(path)):
                places.setdefault(name, f"line {number} of {machine.shown_path(path)}")
    for name, value in names.items():
        told = machine.environ.get(name, "")
        if told not in ("", value) and not any(shell.sets(name, told) for shell in found):
            places.setdefault(name, "in your environment")
    return {name: place for name, place in places.items() if name in names}


def shell_variables(
    context: Context, found: Sequence[Shell]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the variables to set in shells, and notes about those that the user has. Nothing of
    the user's is hidden unless that was asked for, and certificates never are."""
    names = variables(context)
    own = users_variables(context, found, names)
    openai = [name for name in names if name.startswith("OPENAI_")]
    left_out = {name for name in CERTIFICATE_VARIABLES if name in own}
    shown = {name: f"your {name} ({place})" for name, place in own.items()}
    notes: list[str] = []
    if context.certificate_only:
        left_out |= {name for name in VARIABLES if not found[0].sets(name)}
    elif context.role is Role.BACKUP:
        left_out |= set(openai)
        notes.append("with --backup, programs of OpenAI are not pointed at OCP")
    elif context.role is Role.AUTO and "shell" not in context.asked and set(openai) & set(own):
        left_out |= set(openai)
        kept = ", ".join(shown.pop(name) for name in openai if name in own)
        notes.append(f"{kept} stays, so programs of OpenAI do not use OCP; --primary or --only "
                     "shell changes that")
    # What is read after OCP's lines is not hidden.
    last = tuple(f" {context.machine.shown_path(path)}" for shell in found for path in shell.others)
    notes += [f"hides {text}" for name, text in shown.items()
              if name not in left_out and not own[name].endswith(last)]
    return {name: value for name, value in names.items() if name not in left_out}, tuple(notes)


def own_certificate_hints(context: Context, found: Sequence[Shell]) -> list[Step]:
    """Say what to do where the user has a file of certificates of their own."""
    machine = context.machine
    names = {name: value for name, value in variables(context).items()
             if name in CERTIFICATE_VARIABLES}
    source = shlex.quote(machine.certificate_file)
    return [Hint(f"Your {name} ({place}) is kept. So that programs which read it trust the server, "
                 f"add its certificate: cat {source} >> "
                 f"{shlex.quote(machine.environ.get(name) or 'the file that it names')}")
            for name, place in users_variables(context, found, names).items()]


def shell_steps(context: Context) -> list[Step]:
    """Set the variables for shells and for desktop programs."""
    machine, found = context.machine, shells(context.machine)
    names, notes = shell_variables(context, found)
    steps = own_certificate_hints(context, found)
    if not names:
        return steps
    for shell in found:
        sets = tuple(shell.line(name, value) for name, value in names.items())
        why = "the variables" if shell.reads else "new shells have the variables"
        more = [note for path in shell.others for note in overriding_notes(path, names)]
        steps.append(FileStep(shell.script, "lines", (Block(sets),), why,
                              notes=(*notes, *shell.notes, *more)))
        notes = ()
        line = shell.reads.format(shell.quoted(shell.script))
        steps += [start_file_step(path, line, names) for path in shell.start_files]
    if machine.shell in OTHER_SHELLS and not any(shell.start_files for shell in found):
        steps.append(Hint(f"{machine.shell} reads no file that is written here: set the variables "
                          f"of {machine.shown_path(found[0].script)} in its own start file."))
    return steps + session_steps(machine, names)


def start_file_step(path: str, line: str, names: Mapping[str, str]) -> FileStep:
    """Return the step that makes a start file of the user's read a script of OCP."""
    change, notes = Block((line,), in_shell=True), []
    with contextlib.suppress(UnsafeEdit):
        text = put_block(read_text(path), change, "\n")
        block = block_of(text)
        assert block is not None
        notes = start_file_notes(path, text, text[:block.end()].count("\n"), names)
    return FileStep(path, "lines", (change,), "new shells read the variables", notes=tuple(notes))


def start_file_notes(
    path: str, text: str, last_line: int, names: Mapping[str, str]
) -> list[str]:
    """Return what is wrong with a start file in which OCP's block ends with this line and sets
    these variables."""
    found = []
    if "\r\n" in text:
        found.append("it has lines that end with CR LF, which shells do not read correctly: OCP's "
                     "lines come first and end with LF; convert the others with "
                     f"`perl -pi -e 's/\\r$//' {shlex.quote(path)}`")
    if "# OCP LAN (added by ocp connect)" in text:
        found.append("it has an older block of OCP's (# OCP LAN): remove it")
    return found + overriding_lines(text, names, last_line)


def overriding_lines(
    text: str, names: Mapping[str, str], last_line: int = 0, place: str = ""
) -> list[str]:
    """Return a sentence for each setting after this line of a text, which `place` names."""
    return [f"line {number}{place} sets {variable} after OCP's lines and overrides them: remove it"
            for number, variable in variable_lines(text)
            if number > last_line and variable in names]


def overriding_notes(path: str, names: Mapping[str, str]) -> list[str]:
    """Return what overrides OCP's variables in a file that is read after OCP's."""
    with contextlib.suppress(UnsafeEdit):
        return overriding_lines(read_text(path), names, place=f" of {os.path.basename(path)}")
    return []


#: The login agent that sets the variables after each login on macOS.
AGENT_LABEL = "dev.ocp.environment"


def session_steps(machine: Machine, names: Mapping[str, str]) -> list[Step]:
    """Set the variables for programs that no shell has started."""
    if machine.is_mac:
        path = machine.in_home("Library", "LaunchAgents", f"{AGENT_LABEL}.plist")
        agent = WholeFile(login_agent(names))
        return [FileStep(path, "lines", (agent,), "sets the variables at each login"),
                *(SessionStep(name, value) for name, value in names.items())]
    if not machine.has_systemd:
        return []
    if not all(re.fullmatch(r"[\w.:/@%+=-]+", value) for value in names.values()):
        return [Hint("The key or address has characters that environment.d may read differently: "
                     "desktop programs do not get the variables.")]
    path = os.path.join(machine.config_home, "environment.d", "ocp.conf")
    lines = tuple(f"{name}={value}" for name, value in names.items())
    return [FileStep(path, "lines", (Block(lines),), "desktop programs have the variables")]


def login_agent(names: Mapping[str, str]) -> str:
    """Return the property list of a login agent that sets these variables."""
    script = "; ".join(
        f"launchctl setenv {name} {shlex.quote(value)}" for name, value in names.items())
    return plistlib.dumps({
        "Label": AGENT_LABEL, "RunAtLoad": True, "ProgramArguments": ["/bin/sh", "-c", script],
    }).decode()


def continue_steps(context: Context) -> list[Step]:
    """Add an entry for each model."""
    machine, server = context.machine, context.server
    folder = machine.folder_from("CONTINUE_GLOBAL_DIR", ".continue")
    path, old = os.path.join(folder, "config.yaml"), os.path.join(folder, "config.json")
    lines: list[str] = []
    trust = ["  requestOptions:", f"    caBundlePath: {json.dumps(machine.certificate_file)}"]
    trust = trust if server.certificate else []
    for model in sorted(server.models, key=lambda each: each is not server.main):
        lines += [
            f"- name: {json.dumps(model.name + ' (OCP)')}",
            "  provider: openai",
            f"  model: {model.id}",
            f"  apiBase: {json.dumps(server.api)}",
            f"  apiKey: {json.dumps(server.key_or_any)}",
            *trust,
            "  roles: [chat, edit, apply]",
            "  capabilities: [tool_use, image_input]",
            "  defaultCompletionOptions:",
            f"    contextLength: {model.context_tokens}",
        ]
    head = (("name", "Local"), ("version", "1.0.0"), ("schema", "v1"))
    changes: tuple[Change, ...] = (
        *(SetValue((name,), value, if_missing=True) for name, value in head),
        Block(tuple(lines), under="models"))
    steps: list[Step] = [FileStep(path, "yaml", changes, "an entry for each model")]
    if os.path.exists(old) and not os.path.exists(path):
        steps.append(Hint(f"Continue: {machine.shown_path(old)} has the older format; Continue "
                          "ignores it once there is a config.yaml."))
    return steps


def opencode_config(machine: Machine) -> str:
    """Return the file that OpenCode reads last."""
    named = machine.environ.get("OPENCODE_CONFIG", "")
    folder = os.path.join(machine.config_home, "opencode")
    found = [os.path.join(folder, name) for name in ("opencode.jsonc", "opencode.json")]
    return named if os.path.isabs(named) else next(filter(os.path.exists, found), found[-1])


def opencode_steps(context: Context) -> list[Step]:
    """Add a provider, and the two default models of OpenCode."""
    server, path = context.server, opencode_config(context.machine)
    context, notes = with_name(context, "OpenCode", "ocp", path, providers_at("provider"),
                               lambda entry: text_at(entry, "options", "baseURL"))
    models = {model.id: {
        "name": model.name, "attachment": True, "reasoning": model.reasoning, "tool_call": True,
        "limit": {"context": model.context_tokens, "output": model.output_tokens},
    } for model in server.models}
    # The file is often kept in a repository: the key stays out of it.
    key = f"{{file:{context.machine.key_file}}}" if server.key else NO_KEY
    name = context.provider
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "OCP",
                "options": {"baseURL": server.api, "apiKey": key}, "models": models}
    return [FileStep(path, "json", (
        SetValue(("$schema",), "https://opencode.ai/config.json", if_missing=True),
        SetValue(("model",), f"{name}/{server.main.id}", is_default=True),
        SetValue(("small_model",), f"{name}/{server.cheapest.id}", is_default=True),
        SetValue(("provider", name), provider, owned=True),
    ), f"provider {name} with every model", notes=notes)]


def aider_steps(context: Context) -> list[Step]:
    """Set the address, the key and the default models."""
    server = context.server
    values = {
        "openai-api-base": server.api, "openai-api-key": server.key_or_any,
        "model": f"openai/{server.main.id}", "weak-model": f"openai/{server.cheapest.id}",
        "show-model-warnings": False,
    }
    changes = tuple(SetValue((name,), value, is_default=True) for name, value in values.items())
    return [FileStep(context.machine.in_home(".aider.conf.yml"), "yaml", changes,
                     "address, key and models")]


def codex_providers(text: str) -> Mapping[str, Json]:
    """Return the providers of Codex's configuration: for each its statements, and whether they
    stand in OCP's block. Raises UnsafeEdit."""
    block = block_of(text)
    start, end = block.span() if block else (0, 0)
    found: dict[str, Json] = {}
    for each in toml_statements(text):
        if each.path[0] == "model_providers" and each.path[1:2] not in ((), ("[]",)):
            row = (each.path, each.value, start <= each.start < end)
            found.setdefault(each.path[1], []).append(row)
    return found


def codex_steps(context: Context) -> list[Step]:
    """Add a provider of the responses API, and make it the default."""
    server = context.server
    path = os.path.join(context.machine.folder_from("CODEX_HOME", ".codex"), "config.toml")
    # A table of the user's is kept even if it is for this server: nothing can be added to it.
    context, notes = with_name(context, "Codex", "ocp", path, codex_providers,
                               lambda rows: server.url if all(row[2] for row in rows) else "")
    name, window = context.provider, server.main.context_tokens
    lines = [f"[model_providers.{name}]", 'name = "OCP"', f"base_url = {json.dumps(server.api)}",
             'wire_api = "responses"']
    if server.key:
        lines.append(f"experimental_bearer_token = {json.dumps(server.key)}")
    return [FileStep(path, "toml", (
        SetValue(("model",), server.main.id, is_default=True),
        SetValue(("model_provider",), name, is_default=True),
        # Otherwise Codex assumes 272,000 tokens for every model that it does not know.
        SetValue(("model_context_window",), window, is_default=True),
        Block(tuple(lines)),
    ), f"provider {name}", notes=notes), Hint(
        f"Codex: `codex -c model_provider={name} -c model_context_window={window} "
        f"-m {server.main.id}` uses OCP whatever the default is.")]


def cline_steps(context: Context) -> list[Step]:
    """Set the provider of Cline's command line program, which keeps it in a file."""
    server, name = context.server, "openai-compatible"
    path = context.machine.in_home(".cline", "data", "settings", "providers.json")
    settings = {"provider": name, "apiKey": server.key_or_any, "model": server.main.id,
                "baseUrl": server.api}
    return [FileStep(path, "json", (
        SetValue(("version",), 1, if_missing=True),
        SetValue(("modes",), {}, if_missing=True),
        SetValue(("lastUsedProvider",), name, is_default=True),
        SetValue(("providers", name, "settings"), settings, is_default=True),
        SetValue(("providers", name, "updatedAt"), "2025-01-01T00:00:00.000Z", if_missing=True),
        SetValue(("providers", name, "tokenSource"), "manual", if_missing=True),
    ), f"its {name} provider")]


def llm_steps(context: Context) -> list[Step]:
    """Add the models and their key, and set the default model."""
    machine, server, lines = context.machine, context.server, []
    folder = machine.folder_from("LLM_USER_PATH", support_folder(machine, "io.datasette.llm"))
    keys = os.path.join(folder, "keys.json")
    context, notes = with_name(context, "llm", "ocp", keys, providers_at(),
                               lambda key: server.url if key == server.key_or_any else "")
    name = context.provider
    for model in server.models:
        lines += [
            f"- model_id: {name}/{model.id}", f"  model_name: {model.id}",
            f"  api_base: {json.dumps(server.api)}", f"  api_key_name: {name}",
            "  supports_tools: true", "  supports_schema: true", "  vision: true",
        ]
    default = WholeFile(f"{name}/{server.main.id}", is_default=True)
    return [
        FileStep(os.path.join(folder, "extra-openai-models.yaml"), "yaml",
                 (Block(tuple(lines), under=""),), f"every model, as {name}/MODEL"),
        FileStep(keys, "json", (SetValue((name,), server.key_or_any, owned=True),),
                 "the key for them", notes=notes),
        FileStep(os.path.join(folder, "default_model.txt"), "lines", (default,),
                 "the default model"),
    ]


def claude_code_file(machine: Machine) -> str:
    return os.path.join(machine.folder_from("CLAUDE_CONFIG_DIR", ".claude"), "settings.json")


def claude_code_steps(context: Context) -> list[Step]:
    """Set the address and key of Claude Code, only with --anthropic."""
    if not context.anthropic:
        return [Hint("Claude Code is not changed. On a machine other than the server's, "
                     "--anthropic points it at OCP.")]
    values = {"ANTHROPIC_BASE_URL": context.server.url,
              "ANTHROPIC_AUTH_TOKEN": context.server.key_or_any}
    changes = [SetValue(("env", name), value) for name, value in values.items()]
    if context.server.certificate:
        # Where the user has a file of certificates there, it stays.
        changes.append(SetValue(("env", "NODE_EXTRA_CA_CERTS"), context.machine.certificate_file,
                                if_missing=True))
    return [FileStep(claude_code_file(context.machine), "json", tuple(changes),
                     "address and key for Claude Code")]


def zed_steps(context: Context) -> list[Step]:
    """Add a provider, and set the agent's default model. Zed reads the key from its environment."""
    machine, place = context.machine, ("language_models", "openai_compatible")
    folder = machine.in_home(".config") if machine.is_mac else machine.config_home
    path = os.path.join(folder, "zed", "settings.json")
    context, notes = with_name(context, "Zed", "OCP", path, providers_at(*place),
                               lambda entry: text_at(entry, "api_url"))
    models = [{
        "name": model.id, "display_name": f"{model.name} (OCP)",
        "max_tokens": model.context_tokens, "max_output_tokens": model.output_tokens,
        "capabilities": {"tools": True, "images": True, "parallel_tool_calls": True,
                         "prompt_cache_key": False},
    } for model in context.server.models]
    name, server = context.provider, context.server
    provider = {"api_url": server.api, "available_models": models}
    default = {"provider": name, "model": server.main.id}
    return [FileStep(path, "json", (
        SetValue((*place, name), provider, owned=True),
        SetValue(("agent", "default_model"), default, is_default=True),
    ), f"provider {name} with every model", notes=notes), zed_hint(name)]


def zed_hint(name: str) -> Hint:
    """Explain where Zed finds the key of a provider: in a variable with the provider's name."""
    settings = f"enter the key in Agent Settings, LLM Providers, {name}."
    if name.upper() != "OCP":
        return Hint(f"Zed: {settings}")
    return Hint("Zed reads the key from OCP_API_KEY in its environment: log in again, or start it "
                f"from a new shell; or {settings}")


def hint_steps(*lines: str) -> Callable[[Context], list[Step]]:
    """Return the steps of a tool that has no file for its settings."""
    return lambda context: [Hint(context.lines_of(*lines))]


def is_loop(machine: Machine, server: Server) -> bool:
    """Return whether Claude Code of this machine would ask the server that drives it."""
    host = urllib.parse.urlsplit(server.url).hostname or ""
    return is_this_machine(host) and has_claude_login(machine)


def refuse_loop(machine: Machine, server: Server) -> None:
    """Raise Problem where --anthropic would make claude ask itself."""
    if is_loop(machine, server):
        raise Problem(
            Exit.FAILED,
            "Refused: the server runs on this machine and claude is logged in here. With "
            "--anthropic, Claude Code would use the server that drives it, in a loop. Use "
            "--anthropic on other machines.")


def existing_loop_hints(context: Context) -> list[Hint]:
    """Warn if Claude Code already points at this server on the server's own machine."""
    machine, name = context.machine, "ANTHROPIC_BASE_URL"
    path, found = claude_code_file(machine), {"your environment": machine.environ.get(name)}
    with contextlib.suppress(UnsafeEdit):
        found[machine.shown_path(path)] = json_find(read_text(path), ("env", name))
    return [
        Hint(f"{name} in {place} points Claude Code at the server that drives it. The server hides "
             "this variable from its own claude, but remove it: your own sessions would go round "
             "through the server.")
        for place, url in found.items()
        if same_server(str(url or ""), context.server.url) and is_loop(machine, context.server)]


# ==== 9. OpenClaw ============================================================
# OpenClaw has one provider of OCP. Its configuration is changed by its own command, or as a file
# where the program is missing.

#: The default name of OCP's provider.
OPENCLAW_PROVIDER = "claude-local"
#: OpenClaw's own key for a provider that needs none. It takes any other for a secret, which its
#: doctor copies into a store that then overrides the configuration.
OPENCLAW_NO_KEY = "custom-local"
#: Above the server's own limit of 600 s, so that its message arrives before OpenClaw gives up.
OPENCLAW_TIMEOUT_S = 660
#: The end of the names of models that OCP has listed.
OPENCLAW_SUFFIX = " (via CLI)"
_OPENCLAW_PROVIDERS = ("models", "providers")
_OPENCLAW_SECRETS = ("secrets", "providers")
_OPENCLAW_MODEL = ("agents", "defaults", "model")


def openclaw_folder(machine: Machine) -> str:
    """Return OpenClaw's state folder."""
    home = machine.folder_from("OPENCLAW_HOME")
    return machine.folder_from("OPENCLAW_STATE_DIR", os.path.join(home, ".openclaw"))


def openclaw_config(machine: Machine) -> str:
    """Return OpenClaw's configuration file, as OpenClaw says or else by its rules."""
    if machine.program("openclaw"):
        said = machine.run("openclaw", "config", "file").output.strip().splitlines()
        path = machine.expanded(said[-1].strip()) if said else ""
        if os.path.isabs(path):
            return path
    named = machine.environ.get("OPENCLAW_CONFIG_PATH", "")
    return named if os.path.isabs(named) else os.path.join(
        openclaw_folder(machine), "openclaw.json")


def openclaw_command(machine: Machine, names: Sequence[str]) -> tuple[str, ...]:
    """Return the command that changes OpenClaw's configuration and may remove models of these
    providers; empty if OpenClaw is not installed."""
    if not machine.program("openclaw"):
        return ()
    lists = (("--replace-path", f"models.providers[{json.dumps(name)}].models") for name in names)
    return ("openclaw", "config", "patch", "--stdin", *itertools.chain(*lists))


def openclaw_row(model: Model) -> dict[str, Json]:
    """Return a model as OpenClaw lists it."""
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


def openclaw_list(present: Json, models: Sequence[Model]) -> list[Json]:
    """Return an updated list of models. It keeps what the user added to a row, and the rows that
    OCP did not write."""
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


def openclaw_provider(context: Context, secret: str, present: Json) -> list[Change]:
    """Return the provider with an updated list of models. OpenClaw shows its configuration to its
    agents and its doctor copies keys in it: the key stays in OCP's own file, named as `secret`."""
    server = context.server
    key: Json = OPENCLAW_NO_KEY
    changes: list[Change] = []
    if server.key:
        path = context.openclaw_key_path or context.machine.key_file
        source = {"source": "file", "path": path, "mode": "singleValue"}
        changes.append(SetValue((*_OPENCLAW_SECRETS, secret), source, owned=True))
        key = {"source": "file", "provider": secret, "id": "value"}
    entry = {"baseUrl": server.api, "apiKey": key, "api": "openai-completions",
             "timeoutSeconds": OPENCLAW_TIMEOUT_S,
             "models": openclaw_list(present, server.models)}
    if server.certificate:
        entry["request"] = {"tls": {"ca": server.certificate}}
    return [*changes, SetValue((*_OPENCLAW_PROVIDERS, context.provider), entry, owned=True)]


def openclaw_steps(context: Context) -> list[Step]:
    """Add the provider, and choose the default model. Raises Problem."""
    machine, path = context.machine, openclaw_config(context.machine)
    url = context.openclaw_url or context.server.url
    context = dataclasses.replace(context, server=context.server._replace(url=url))
    key_path = context.openclaw_key_path or machine.key_file
    secret, _ = with_name(
        dataclasses.replace(context, provider=""), "OpenClaw", "ocp", path,
        providers_at(*_OPENCLAW_SECRETS),
        lambda entry: url if text_at(entry, "path") == key_path else "")
    context, notes = with_name(
        context, "OpenClaw", OPENCLAW_PROVIDER, path, providers_at(*_OPENCLAW_PROVIDERS),
        lambda entry: text_at(entry, "baseUrl"))
    place, hints = _openclaw_place(context, path)
    rows = _openclaw_rows(context, path)
    changes = (*openclaw_provider(context, secret.provider, rows), *place)
    why = f"provider {context.provider} with every model"
    command = openclaw_command(machine, [context.provider])
    return [FileStep(path, "json", changes, why, command, notes), *hints, *_openclaw_hints(context)]


def _openclaw_rows(context: Context, path: str) -> Json:
    """Return OCP's present list of models, None if there is none."""
    with contextlib.suppress(UnsafeEdit):
        text = read_text(path)
        for name in (context.provider, context.earlier):
            entry = json_find(text, (*_OPENCLAW_PROVIDERS, name))
            url = entry.get("baseUrl") if isinstance(entry, dict) else None
            if url and (name == context.earlier or same_server(str(url), context.server.url)):
                return entry.get("models")
    return None


class ModelChoice(NamedTuple):
    """OpenClaw's default model and its fallbacks, and whether they are written as an object."""

    primary: str
    fallbacks: list[str]
    is_object: bool = False


def _openclaw_choice(text: Callable[[str], str], path: str) -> ModelChoice:
    """Return the choice of a configuration, an empty one where it cannot be read."""
    try:
        now = json_find(text(path), _OPENCLAW_MODEL)
    except UnsafeEdit:
        return ModelChoice("", [])
    if not isinstance(now, dict):
        return ModelChoice(now if isinstance(now, str) else "", [])
    listed = now.get("fallbacks")
    listed = listed if isinstance(listed, list) else []
    return ModelChoice(
        str(now.get("primary") or ""), [each for each in listed if isinstance(each, str)], True)


def _openclaw_present(context: Context, path: str) -> ModelChoice:
    """Return the present choice, with the name that OCP's provider gets in this run."""
    now = _openclaw_choice(read_text, path)

    def renamed(ref: str) -> str:
        is_ours = context.earlier and ref.startswith(f"{context.earlier}/")
        return context.provider + ref[len(context.earlier):] if is_ours else ref

    return now._replace(
        primary=renamed(now.primary), fallbacks=[renamed(each) for each in now.fallbacks])


def _openclaw_place(context: Context, path: str) -> tuple[list[Change], list[Step]]:
    """Return the changes of the default model and its fallbacks, and hints about them."""
    prefix = f"{context.provider}/"
    ours = prefix + context.server.main.id
    original = _openclaw_choice(context.original_text, path)
    now = _openclaw_present(context, path)
    # Without an option, what was chosen in OpenClaw since the last run is kept.
    is_asked = context.role is not Role.AUTO
    role = context.role if is_asked else _openclaw_role(now, prefix)
    if role is Role.BACKUP:
        others = [each for each in original.fallbacks if each != ours]
        return _openclaw_backup(original, [*others, ours] if is_asked else now.fallbacks), []
    if role is Role.AUTO and original.primary:
        return [], [Hint(
            f"OpenClaw: your primary model stays {original.primary}. `/model {ours}` uses OCP in a "
            "chat; --primary makes it the primary model, --backup a fallback.")]
    first, fallbacks = ours, original.fallbacks if context.allow_fallback else []
    if role is Role.PRIMARY and not is_asked:
        listed = [prefix + model.id for model in context.server.models]
        first = now.primary if now.primary in listed else ours
        fallbacks = original.fallbacks if context.allow_fallback else now.fallbacks
    hint = Hint(
        "OpenClaw: with OCP as primary model there is no fallback: when it cannot answer, OpenClaw "
        "says so instead of quietly paying another provider. --allow-fallback keeps your "
        "fallbacks.")
    change = SetValue(_OPENCLAW_MODEL, {"primary": first, "fallbacks": fallbacks})
    return [change], [] if fallbacks else [hint]


def _openclaw_role(now: ModelChoice, prefix: str) -> Role:
    """Return the place that models with this prefix have already."""
    if now.primary.startswith(prefix):
        return Role.PRIMARY
    return Role.BACKUP if any(each.startswith(prefix) for each in now.fallbacks) else Role.AUTO


def _openclaw_backup(original: ModelChoice, fallbacks: list[str]) -> list[Change]:
    """Return the change that sets these fallbacks; none where there is no primary model."""
    if original.is_object:
        # The primary is not written again, because OpenClaw would then verify it online.
        return [SetValue((*_OPENCLAW_MODEL, "fallbacks"), fallbacks)]
    choice = {"primary": original.primary, "fallbacks": fallbacks}
    return [SetValue(_OPENCLAW_MODEL, choice)] if original.primary else []


def _openclaw_hints(context: Context) -> list[Step]:
    machine = context.machine
    hints: list[Step] = [Hint(
        "OpenClaw: a running gateway starts a turn every 30 minutes, which uses your plan. "
        "`openclaw config set agents.defaults.heartbeat.every 0m` stops that.")]
    if context.server.key and machine.saved_key() not in ("", context.server.key):
        hints.append(Hint("OpenClaw: a running gateway keeps the earlier key until you run "
                          "`openclaw secrets reload`."))
    pattern = os.path.join(
        glob.escape(openclaw_folder(machine)), "agents", "*", "agent", "auth-profiles.json")
    for path in sorted(glob.glob(pattern)):
        with contextlib.suppress(UnsafeEdit):
            if f'"{context.provider}'.encode() in (read_bytes(path) or b""):
                hints.append(Hint(
                    f"OpenClaw: {machine.shown_path(path)} has a retired format and names "
                    f"{context.provider}, which makes turns fail: run `openclaw doctor --fix`."))
    return hints


def openclaw_names(text: str, url: str) -> list[str]:
    """Return the providers of a configuration that lead to this server. Raises UnsafeEdit."""
    providers = providers_at(*_OPENCLAW_PROVIDERS)(text)
    return [name for name, entry in providers.items() if isinstance(entry, dict)
            and same_server(str(entry.get("baseUrl")), url)]


# ==== 10. Tool table =========================================================
# Every tool that is known. A tool without a file for its settings has a hint instead.


class Tool(NamedTuple):
    """A program that can use the server. It is found if one of `programs` is on the PATH, or one of
    `places` (patterns in the home folder) exists."""

    name: str
    title: str
    programs: tuple[str, ...]
    places: tuple[str, ...]
    steps: Callable[[Context], list[Step]]
    #: What to do for the change to take effect.
    after: str = ""
    #: A command of the tool that fails when it cannot read its configuration. It is not needed
    #: where the tool's own command writes the file.
    check: tuple[str, ...] = ()
    #: Whether it learns of the server's certificate by variables of its environment.
    needs_variables: bool = False

    def is_here(self, machine: Machine) -> bool:
        """Return whether it seems to be installed."""
        if any(machine.program(each) for each in self.programs):
            return True
        for place in self.places:
            inside = place.startswith(".config/")
            folder = machine.config_home if inside else machine.home
            pattern = place[len(".config/"):] if inside else place
            if glob.glob(os.path.join(glob.escape(folder), pattern)):
                return True
        return False


TOOLS = (
    Tool("shell", "Shells and SDKs", ("sh",), (), shell_steps, "open a new terminal"),
    Tool("openclaw", "OpenClaw", ("openclaw",), (".openclaw/openclaw.json",), openclaw_steps,
         "a running gateway loads the change by itself"),
    Tool("opencode", "OpenCode", ("opencode",), (".config/opencode", ".opencode/bin/opencode"),
         opencode_steps, "restart OpenCode", ("opencode", "debug", "config"), True),
    Tool("codex", "Codex", ("codex",), (".codex",), codex_steps, "restart Codex",
         ("codex", "features", "list"), True),
    Tool("continue", "Continue", ("cn",),
         (".continue", ".vscode/extensions/continue.continue-*"), continue_steps,
         "reload the editor's window, and choose a model of OCP"),
    Tool("aider", "Aider", ("aider",), (".aider.conf.yml", ".aider"), aider_steps,
         "restart Aider", needs_variables=True),
    Tool("cline", "Cline (command line)", ("cline",), (".cline",), cline_steps, "restart Cline",
         needs_variables=True),
    Tool("llm", "llm", ("llm",),
         (".config/io.datasette.llm", "Library/Application Support/io.datasette.llm"),
         llm_steps, "", ("llm", "models", "list"), True),
    Tool("zed", "Zed", ("zed", "zeditor"), (".config/zed",), zed_steps,
         "it loads the change by itself", needs_variables=True),
    Tool("claude-code", "Claude Code", ("claude",), (".claude",), claude_code_steps,
         "restart Claude Code"),
    Tool("cursor", "Cursor", ("cursor",), (".cursor", "../../Applications/Cursor.app"), hint_steps(
        "Cursor: Settings, Models, API Keys: enter as OpenAI API Key {key};",
        "  switch Override OpenAI Base URL on and enter {api}; add the model {model}.",
        "  Cursor's own servers send the requests and must be able to reach the address, so a",
        "  local server needs a tunnel, with https and a key.")),
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
#: The name in the record for OCP's own files.
OWN_FILES = "ocp"


def tool_title(name: str) -> str:
    return next((tool.title for tool in TOOLS if tool.name == name), "OCP")


# ==== 11. Record =============================================================
# What was done to which file. It is saved before each change, so that an interrupted run can be
# undone too.


@dataclasses.dataclass
class FileRecord:
    """One file that was changed. `base` names the copy of the original, empty where there was no
    file; the hashes tell whether somebody has edited it since."""

    tool: str
    kind: str
    base: str
    base_digest: str
    after_digest: str
    done: list[Applied]
    under: str | None
    has_block: bool
    #: Whether the whole file belongs to OCP.
    whole: bool
    #: The folders that were made for it, innermost first.
    folders: list[str]


@dataclasses.dataclass
class Record:
    """Everything that was changed here and not undone."""

    folder: str
    url: str = ""
    #: The server of the saved key, which is sent to no other.
    key_url: str = ""
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    #: For each variable of the macOS session, its value and the value before.
    session: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def path(self) -> str:
        return os.path.join(self.folder, "connect.json")

    def copy_of(self, entry: FileRecord) -> bytes | None:
        """Return the original of a file. Raises UnsafeEdit if the copy is lost."""
        if not entry.base:
            return None
        content = read_bytes(os.path.join(self.folder, entry.base))
        if digest(content) != entry.base_digest:
            raise UnsafeEdit(f"has lost its copy {entry.base}")
        return content

    def delete_copy(self, entry: FileRecord) -> None:
        if entry.base:
            delete_if_possible(os.path.join(self.folder, entry.base))

    def set(self, path: str, entry: FileRecord | None) -> None:
        """Save the entry of a file; None removes it. Raises OSError."""
        self.files.pop(path, None)
        if entry is not None:
            self.files[path] = entry
        self.save()

    def save(self) -> None:
        """Write the record. Raises OSError."""
        shown = {
            "version": 1, "url": self.url, "keyUrl": self.key_url, "session": self.session,
            "files": {path: {**dataclasses.asdict(entry),
                             "done": [each._asdict() for each in entry.done]}
                      for path, entry in self.files.items()},
        }
        make_private(self.folder)
        write_whole(self.path, (json.dumps(shown, indent=1) + "\n").encode(), 0o600)


def load_record(folder: str) -> Record:
    """Return the record of this user, an empty one if there is none. Raises Problem."""
    record = Record(folder)
    try:
        content = read_bytes(record.path)
        if content is None:
            return record
        found = json.loads(content)
        record.url, record.key_url = str(found["url"]), str(found["keyUrl"])
        record.session = {name: (pair[0], pair[1]) for name, pair in found["session"].items()}
        for path, fields in found["files"].items():
            done = [Applied(tuple(each.pop("path")), **each) for each in fields.pop("done")]
            record.files[path] = FileRecord(done=[_as_loaded(each) for each in done], **fields)
    except UnsafeEdit as problem:
        raise Problem(
            Exit.FAILED, f"{record.path} {problem}, so earlier changes are unknown: let "
                         "yourself read it, and run this again.") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise Problem(
            Exit.FAILED,
            f"{record.path} is damaged, so earlier changes are unknown: repair it, or move it away "
            "to go on without --undo.") from None
    return record


def _as_loaded(applied: Applied) -> Applied:
    """Turn a value that JSON stored as a list back into the tuple of as_written."""
    before = applied.before
    marked = isinstance(before, list) and len(before) == 2 and before[0] == "as written"
    return applied._replace(before=tuple(before)) if marked else applied


def original_content(
    content: bytes | None, entry: FileRecord | None, record: Record
) -> tuple[bytes | None, list[str]]:
    """Return a file without OCP's changes, and what was kept in it because it was changed since.
    Raises UnsafeEdit."""
    if entry is None or content is None or digest(content) == entry.base_digest:
        return content, []
    if digest(content) == entry.after_digest:
        return record.copy_of(entry), []
    if entry.whole:
        return content, ["the file, which you have changed"]
    text, kept = remove_changes(
        decoded(content), entry.kind, entry.done, entry.under, entry.has_block)
    empty = not text.strip() or entry.kind == "json" and not json_comments(text) and (
        json_load(text) == {})
    return (None if empty and not entry.base else text.encode()), kept


# ==== 12. Plan ===============================================================
# The files that would change, and how. Nothing is changed here.


class Edit(NamedTuple):
    """New content for a file. `after` is None for a file to delete."""

    tool: str
    path: str
    before: bytes | None
    after: bytes | None
    why: str
    notes: tuple[str, ...] = ()
    #: The new entry of the record; None removes the old one.
    entry: FileRecord | None = None
    #: The original, to be copied.
    base: bytes | None = None
    command: tuple[str, ...] = ()


class ManualEdit(NamedTuple):
    """A file that cannot be edited safely, and the lines for the user to add."""

    tool: str
    path: str
    reason: str
    snippet: str = ""


@dataclasses.dataclass
class Plan:
    """Everything that a run would do."""

    edits: list[Edit] = dataclasses.field(default_factory=list)
    session: list[SessionStep] = dataclasses.field(default_factory=list)
    manual: list[ManualEdit] = dataclasses.field(default_factory=list)
    hints: list[str] = dataclasses.field(default_factory=list)
    #: Tools and files that are up to date.
    settled: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    #: Tools and files that keep what the user has, and why.
    kept: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    tools: list[Tool] = dataclasses.field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Return whether there is nothing to write."""
        return not self.edits and not self.session


def make_plan(context: Context, tools: Sequence[Tool], record: Record) -> Plan:
    """Return what the tools need and do not have yet."""
    server, shell = context.server, TOOLS[0]
    steps: list[tuple[str, Step]] = []
    if server.certificate:
        steps += [(OWN_FILES, step) for step in certificate_steps(context)]
    if server.certificate and shell not in tools and any(tool.needs_variables for tool in tools):
        context, tools = dataclasses.replace(context, certificate_only=True), [shell, *tools]
    plan = Plan(tools=list(tools))
    if server.key and not context.openclaw_key_path:
        key = (WholeFile(server.key),)
        path = context.machine.key_file
        steps.append((OWN_FILES, FileStep(path, "lines", key, "the key, readable by you only")))
    steps += [(tool.name, step) for tool in tools for step in tool.steps(context)]
    steps += [(OWN_FILES, hint) for hint in existing_loop_hints(context)]
    for name, step in steps:
        if isinstance(step, FileStep):
            _plan_file(plan, context, name, step, record)
        elif isinstance(step, SessionStep):
            if record.session.get(step.name, ("", ""))[0] != step.value:
                plan.session.append(step)
        elif step.text not in plan.hints:
            plan.hints.append(step.text)
    return plan


def _plan_file(plan: Plan, context: Context, tool: str, step: FileStep, record: Record) -> None:
    """Add what one file needs to a plan."""
    try:
        reason = why_unchanged(step, context, record)
        edit = None if reason else plan_edit(step, tool, context, record)
    except UnsafeEdit as problem:
        try:
            snippet = apply_changes("", step.kind, step.changes)
        except UnsafeEdit:
            snippet = ""
        plan.manual.append(ManualEdit(tool, step.path, str(problem), snippet))
        return
    if reason:
        plan.kept.append((tool, step.path, reason))
    elif edit is None:
        plan.settled.append((tool, step.path))
    else:
        plan.edits.append(edit)


def why_unchanged(step: FileStep, context: Context, record: Record) -> str:
    """Return why a file gets nothing of OCP, empty if it gets something. Raises UnsafeEdit."""
    content = read_bytes(step.path)
    changes, note = wanted_changes(
        step, decoded(content), content, record.files.get(step.path), context.role)
    if changes:
        return ""
    return note or "it has nothing but defaults, which --backup leaves alone"


def plan_edit(step: FileStep, tool: str, context: Context, record: Record) -> Edit | None:
    """Return the edit of one file, None if it is up to date. Raises UnsafeEdit."""
    entry = record.files.get(step.path)
    content = read_bytes(step.path)
    text = decoded(content)
    changes, note = wanted_changes(step, text, content, entry, context.role)
    if not changes:
        return None
    notes = [*step.notes, *([note] if note else [])]
    if step.command and json_comments(text):
        notes.append("OpenClaw writes its file without the comments; --undo restores them")
    fitting = apply_changes(text, step.kind, changes)
    if content is not None and fitting == text and not _has_leftovers(entry, text, changes):
        return None
    check_writable(step.path)
    check_recordable(record)
    base, _ = original_content(content, entry, record)
    original = decoded(base)
    if step.command and entry:
        # What the tool itself has written into its file since is kept.
        original, _ = remove_changes(text, entry.kind, entry.done, None, False)
    elif step.command:
        original = text
    after = apply_changes(original, step.kind, changes)
    if after.encode() == content:
        return None
    key = context.server.key
    if base is not None and key and key in after and os.stat(step.path).st_mode & 0o077:
        notes.append(f"others on this machine can read it: chmod 600 {shlex.quote(step.path)}")
    return Edit(
        tool, step.path, content, after.encode(), step.why, tuple(notes),
        record_entry(step, tool, changes, base, after, entry), base, step.command)


def wanted_changes(
    step: FileStep, text: str, content: bytes | None, entry: FileRecord | None, role: Role
) -> tuple[tuple[Change, ...], str]:
    """Return the changes to make, and a note about the user's default that stays. Raises
    UnsafeEdit."""
    defaults = [change for change in step.changes if isinstance(change, (SetValue, WholeFile))
                and change.is_default]
    if not defaults or role is Role.PRIMARY:
        return step.changes, ""
    rest = tuple(change for change in step.changes if change not in defaults)
    if role is Role.BACKUP:
        return rest, ""
    for change in defaults:
        kept = _users_choice(step.kind, change, text, content, entry)
        if kept:
            return rest, f"your {kept} stays; --primary changes it"
    return step.changes, ""


def _users_choice(
    kind: str, change: SetValue | WholeFile, text: str, content: bytes | None,
    entry: FileRecord | None,
) -> str:
    """Return what the user has set where a change would set OCP; empty if nothing. Raises
    UnsafeEdit."""
    if isinstance(change, WholeFile):
        is_ours = entry is not None and digest(content) == entry.after_digest
        other = content is not None and text.strip() not in ("", change.content) and not is_ours
        return f"choice {text.strip()}" if other else ""
    now = FORMATS[kind].find(text, change.path)
    if now in (None, NULL, change.value):
        return ""
    if entry and any(each.path == change.path and each.value == now for each in entry.done):
        return ""
    secret = re.search("key|token", change.path[-1], re.I)
    shown = "" if secret or not isinstance(now, (str, int)) else f" = {now}"
    return ".".join(change.path) + shown


def _has_leftovers(entry: FileRecord | None, text: str, changes: Sequence[Change]) -> bool:
    """Return whether a file has values of an earlier run that are not wanted any more."""
    if entry is None:
        return False
    wanted = {each.path for each in changes if isinstance(each, SetValue)}
    find = FORMATS[entry.kind].find
    return any(each.path not in wanted and find(text, each.path) == each.value
               for each in entry.done)


def record_entry(
    step: FileStep, tool: str, changes: Sequence[Change], base: bytes | None, after: str,
    earlier: FileRecord | None,
) -> FileRecord:
    """Return the entry of the record for a file. Raises UnsafeEdit."""
    form, text = FORMATS[step.kind], decoded(base)
    done = []
    for change in changes:
        if not isinstance(change, SetValue):
            continue
        before = form.find(text, change.path)
        if change.if_missing and before is not None:
            continue
        lengths = range(len(change.path) - 1, 0, -1) if form.nested else ()
        depth = next((n for n in lengths if form.find(text, change.path[:n]) is not None), 0)
        done.append(Applied(change.path, change.value, before, depth, change.owned))
    blocks = [change for change in changes if isinstance(change, Block)]
    # Two files with the same content have two copies, and so have two states of one file.
    name = f"{digest(step.path.encode())[:8]}-{digest(base)[:8]}"
    return FileRecord(
        tool=tool, kind=step.kind, done=done,
        base="" if base is None else f"copies/{name}-{os.path.basename(step.path)}",
        base_digest=digest(base), after_digest=digest(after.encode()),
        under=blocks[0].under if blocks else None, has_block=bool(blocks),
        whole=any(isinstance(change, WholeFile) for change in changes),
        folders=earlier.folders if earlier else [])


def check_writable(path: str) -> None:
    """Raise UnsafeEdit for a read-only file, or a folder that cannot be written to."""
    real = os.path.realpath(path)
    if os.path.lexists(real) and not os.path.isfile(real):
        raise UnsafeEdit("is not a file")
    if os.path.exists(real) and not os.stat(real).st_mode & stat.S_IWUSR:
        raise UnsafeEdit("is read-only")
    folder = os.path.dirname(real)
    while not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UnsafeEdit("lies in a folder that cannot be written to")


def check_recordable(record: Record) -> None:
    """Raise UnsafeEdit where a change cannot be recorded, without which nothing could undo it."""
    try:
        check_writable(record.path)
    except UnsafeEdit as problem:
        raise UnsafeEdit(f"could not be undone, because {record.path} {problem}: let yourself "
                         "write there, and run this again") from None


def plan_sync(machine: Machine, url: str, models: Sequence[Model]) -> tuple[list[str], Edit | None]:
    """Return the providers in OpenClaw that lead to this server, and the edit that updates their
    models, None if they are up to date. Raises UnsafeEdit."""
    path = openclaw_config(machine)
    content = read_bytes(path)
    text = decoded(content)
    names = openclaw_names(text, url)
    changes = []
    for name in names:
        place = (*_OPENCLAW_PROVIDERS, name, "models")
        changes.append(SetValue(place, openclaw_list(json_find(text, place), models)))
    after = apply_changes(text, "json", changes).encode()
    if after == content or content is None:
        return names, None
    check_writable(path)
    return names, Edit("openclaw", path, content, after, "the models of " + ", ".join(names),
                       command=openclaw_command(machine, names))


def plan_undo(record: Record, tools: Sequence[str]) -> Plan:
    """Return what restores the files of these tools, of all if none is named."""
    plan = Plan()
    left = {entry.tool for entry in record.files.values()} - {OWN_FILES}
    everything = not tools or bool(left) and left <= set(tools)
    for path, entry in sorted(record.files.items(), key=lambda pair: pair[1].tool == OWN_FILES):
        if not everything and entry.tool not in tools:
            continue
        try:
            content = read_bytes(path)
            after, kept = original_content(content, entry, record)
            if after != content:
                check_writable(path)
        except UnsafeEdit as problem:
            plan.manual.append(ManualEdit(entry.tool, path, str(problem)))
            continue
        exact = digest(after) == entry.base_digest
        why = "restored" if exact else "you have changed it since: only what was added is removed"
        notes = tuple(f"kept, because you have changed it: {each}" for each in kept)
        plan.edits.append(Edit(entry.tool, path, content, after, why, notes))
    if everything or "shell" in tools:
        plan.session = [SessionStep(name, before) for name, (_, before) in record.session.items()]
    return plan


# ==== 13. Writing ============================================================
# Only this section changes anything. A file is replaced whole or not at all, keeps its mode, and a
# link stays a link. The record is saved before the file.


def make_folders(folder: str) -> list[str]:
    """Make a folder and its missing parents; return them, innermost first. Raises OSError."""
    missing: list[str] = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    for each in reversed(missing):
        os.mkdir(each, 0o700)
    return missing


class Writer:
    """Carries out plans and records what it does."""

    def __init__(self, machine: Machine, record: Record, key: str) -> None:
        self._machine = machine
        self._record = record
        self._key = key
        #: Sentences about what could not be done.
        self.failures: list[str] = []
        #: Sentences about what was done otherwise.
        self.notes: list[str] = []
        #: The files that were changed.
        self.written: list[str] = []
        #: The entries of the record before this run.
        self._earlier: dict[str, FileRecord | None] = {}
        #: Folders that OCP made and that may be empty.
        self._folders: list[str] = []

    def connect(self, plan: Plan, url: str) -> None:
        """Make every change of a plan."""
        self._record.url = url
        self._record.key_url = url if self._key else self._record.key_url
        for edit in plan.edits:
            self._attempt(edit, self._change)
        for step in plan.session:
            self._set_variable(step)
        for tool in plan.tools:
            self._check(tool, [each for each in plan.edits if each.tool == tool.name])

    def sync(self, edit: Edit, stamp: str) -> str:
        """Make one change that is not recorded. Return the path of the copy of the original, empty
        where nothing was changed."""
        copy_path = f"{edit.path}.ocp-{stamp}"
        entry = self._record.files.get(edit.path)

        def change(edit: Edit) -> None:
            assert edit.before is not None
            write_whole(copy_path, edit.before, 0o600)
            self._replace(edit)
            self.written.append(edit.path)

        self._attempt(edit, change)
        if edit.path not in self.written:
            delete_if_possible(copy_path)
            return ""
        if entry is not None and entry.after_digest == digest(edit.before):
            # The user has not edited it: --undo may still restore the recorded copy.
            entry.after_digest = digest(read_bytes(edit.path))
            self._record.save()
        return copy_path

    def undo(self, plan: Plan) -> None:
        """Make every change of an undo plan, and remove it from the record."""
        for edit in plan.edits:
            self._attempt(edit, self._restore)
        for step in plan.session:
            if step.value:
                self._launchctl("setenv", step.name, step.value)
            else:
                self._launchctl("unsetenv", step.name)
            self._record.session.pop(step.name, None)
        self._tidy()

    def _attempt(self, edit: Edit, action: Callable[[Edit], None]) -> None:
        shown = self._machine.shown_path(edit.path)
        try:
            if read_bytes(edit.path) != edit.before:
                raise UnsafeEdit("was changed by something else just now: run this again")
            action(edit)
        except UnsafeEdit as problem:
            self.failures.append(f"{shown} {problem}")
        except OSError as problem:
            # It may be the record or a copy that cannot be written, and not the file itself.
            at = problem.filename if isinstance(problem.filename, str) else ""
            where = f"{self._machine.shown_path(at)}: " if at else ""
            self.failures.append(f"{shown} is not changed: {where}{problem.strerror}")

    def _change(self, edit: Edit) -> None:
        entry = edit.entry
        assert entry is not None
        earlier = self._earlier[edit.path] = self._record.files.get(edit.path)
        try:
            if edit.base is not None:
                copy_path = os.path.join(self._record.folder, entry.base)
                make_private(os.path.dirname(copy_path))
                write_whole(copy_path, edit.base, 0o600)
            folder = os.path.dirname(os.path.realpath(edit.path))
            entry.folders = entry.folders or make_folders(folder)
            self._record.set(edit.path, entry)
            self._replace(edit)
            if edit.command:
                entry.after_digest = digest(read_bytes(edit.path))
                self._record.save()
        except (OSError, UnsafeEdit):
            self._forget(edit.path, entry, earlier)
            raise
        if earlier is not None and earlier.base != entry.base:
            self._record.delete_copy(earlier)
        self.written.append(edit.path)

    def _forget(self, path: str, entry: FileRecord, earlier: FileRecord | None) -> None:
        """Take the entry and the copy of a change back that could not be made."""
        # On a full disk the record may not be written either: it then tells of a change that is
        # not in the file, and undo finds nothing to remove.
        with contextlib.suppress(OSError):
            self._record.set(path, earlier)
        if earlier is None or earlier.base != entry.base:
            self._record.delete_copy(entry)

    def _replace(self, edit: Edit) -> None:
        """Write the new content of a file. Raises UnsafeEdit or OSError."""
        assert edit.after is not None
        if edit.command:
            self._run_tool(edit)
        else:
            write_whole(edit.path, edit.after, self._mode(edit))

    def _mode(self, edit: Edit) -> int:
        has_key = bool(self._key) and self._key.encode() in (edit.after or b"")
        # A file that belongs to OCP may get a key for the first time.
        if edit.before is not None and not (has_key and edit.base is None):
            return stat.S_IMODE(os.stat(edit.path).st_mode)
        return 0o600 if has_key else 0o644

    def _run_tool(self, edit: Edit) -> None:
        """Let the tool make the change. Raises UnsafeEdit."""
        sides = [json_load(decoded(side)) for side in (edit.before, edit.after)]
        patch = json.dumps(merge_patch(*sides))
        ran = self._machine.run(*edit.command, stdin=patch, timeout_s=120)
        if ran.code != 0 or read_bytes(edit.path) is None:
            raise UnsafeEdit(f"was not changed: {edit.command[0]} says: {ran.complaint}")

    def _launchctl(self, verb: str, name: str, *value: str) -> bool:
        """Run launchctl; return whether it succeeded."""
        ran = self._machine.run("launchctl", verb, name, *value)
        if ran.code != 0:
            self.failures.append(f"launchctl {verb} {name}: {ran.complaint}")
        return ran.code == 0

    def _set_variable(self, step: SessionStep) -> None:
        before = self._machine.run("launchctl", "getenv", step.name)
        known = self._record.session.get(step.name)
        was = known[1] if known else before.output.strip() if before.code == 0 else ""
        if self._launchctl("setenv", step.name, step.value):
            self._record.session[step.name] = (step.value, was)
            self._record.save()

    def _complaint(self, tool: Tool) -> str:
        """Ask a tool whether it can read its configuration; return what it says if not."""
        if not tool.check or not self._machine.program(tool.check[0]):
            return ""
        ran = self._machine.run(*tool.check)
        return "" if ran.code in (0, None) else ran.complaint

    def _check(self, tool: Tool, edits: Sequence[Edit]) -> None:
        """Restore the files of a tool that cannot read its configuration, unless it could not
        before either."""
        done = [edit for edit in edits if edit.path in self.written]
        complaint = self._complaint(tool) if done else ""
        if not complaint:
            return
        self._take_back(done)
        earlier = self._complaint(tool)
        # Some tools, such as OpenCode, write into their files when they only read them.
        self._take_back(done)
        if not earlier:
            self.failures.append(
                f"{tool.title} does not accept the change, which was undone: {complaint}")
            return
        for edit in done:
            self._attempt(edit, self._change)
        self.notes.append(f"{tool.title} failed before the change too, so whether it accepts it is "
                          f"not known: {earlier}")

    def _take_back(self, edits: Sequence[Edit]) -> None:
        """Give files and record what they had before this run. Raises OSError."""
        for edit in edits:
            earlier = self._earlier[edit.path]
            self._restore(edit._replace(before=read_bytes(edit.path), after=edit.before))
            if earlier is not None:
                self._record.set(edit.path, earlier)
            self.written = [path for path in self.written if path != edit.path]

    def _restore(self, edit: Edit) -> None:
        """Write the original of a file and remove its entry from the record. Raises OSError."""
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
        self._record.set(edit.path, None)
        if self._earlier.get(edit.path) is None:
            self._record.delete_copy(entry)
        self._folders += entry.folders

    def _tidy(self) -> None:
        """Delete the record when it is empty, and the folders that are empty."""
        folders = [*self._folders, os.path.join(self._record.folder, "copies")]
        if not self._record.files and not self._record.session:
            delete_if_possible(self._record.path)
            folders.append(self._record.folder)
        for folder in sorted(set(folders), key=len, reverse=True):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def merge_patch(before: Json, after: Json) -> Json:
    """Return the patch from one JSON value to another by RFC 7396: null removes a member."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return after
    gone = {name: None for name in before if name not in after}
    changed = {name: merge_patch(before.get(name), value) for name, value in after.items()
               if name not in before or before[name] != value}
    return {**gone, **changed}


# ==== 14. Output =============================================================
# Plans, tools and results as text and as JSON. No key is ever shown in full.

#: How many new lines of a file are shown, except in a dry run.
SHOWN_LINES = 12


def show_server(server: Server, health: Mapping[str, Json]) -> str:
    key = f"key {mask(server.key)} accepted" if server.key else "no key needed"
    lines = [f"OCP {server.version} at {server.url}: {counted(len(server.models), 'model')}, {key}"]
    if health.get("demo") is True:
        lines.append("It is a demo: no model answers, all answers are made up.")
    if health.get("status") not in ("ok", None):
        lines.append(f"Its status is {quoted(health['status'])}: {quoted(health.get('fix'))}")
    return "\n".join(lines)


def undo_command(server: Server) -> str:
    """Return the command that restores all files, in the way in which this script came here."""
    if HERE:
        return shlex.join(["python3", os.path.abspath(__file__), "undo"])
    pin = ""
    if server.certificate:
        fingerprint = fingerprint_of(ssl.PEM_cert_to_DER_cert(server.certificate))
        pin = f" --insecure --pinnedpubkey {fingerprint.replace('SHA256:', 'sha256//', 1)}"
    return f"curl -fsSL{pin} {server.url}/connect | python3 - undo"


def action_of(edit: Edit) -> str:
    return "create" if edit.before is None else "remove" if edit.after is None else "change"


def new_lines(edit: Edit) -> list[str]:
    """Return the lines that differ, as a diff without context."""
    sides = [(content or b"").decode("utf-8", "replace").splitlines()
             for content in (edit.before, edit.after)]
    shown = difflib.unified_diff(sides[0], sides[1], n=0, lineterm="")
    return [line for line in shown if not line.startswith(("---", "+++", "@@"))]


def diff_of(edit: Edit, key: str) -> list[str]:
    """Return the differing lines without keys; none for the file that is the key."""
    return [] if edit.tool == OWN_FILES else [masked(line, key) for line in new_lines(edit)]


def shortened(line: str) -> str:
    """Return the beginning of a line, such as that of a file with all in one line."""
    return line if len(line) <= 200 else (
        f"{line[:160]}... ({len(line)} characters; --dry-run shows all)")


def show_edit(edit: Edit, machine: Machine, key: str, all_lines: bool) -> str:
    """Return one file and the lines that would change in it."""
    limit = 10_000 if all_lines else SHOWN_LINES
    how = {"create": "new", "remove": "removed", "change": "changed"}[action_of(edit)]
    lines = [f"  {machine.shown_path(edit.path)}  ({tool_title(edit.tool)}; {how}) {edit.why}"]
    if edit.command:
        lines.append(f"      through: {shlex.join(edit.command)}")
    lines += [f"      {note}" for note in edit.notes]
    diff = [] if edit.after is None else diff_of(edit, key)
    shown = diff[:limit] if all_lines else map(shortened, diff[:limit])
    lines += [f"      {clean(line)}" for line in shown]
    if len(diff) > limit:
        lines.append(f"      ... {counted(len(diff) - limit, 'more line')}; --dry-run shows all")
    return "\n".join(lines)


def show_summary(plan: Plan) -> list[str]:
    """Return a plan in a few lines: what happens to which tools."""
    rows = (
        ("to change", [edit.tool for edit in plan.edits]),
        ("up to date", [tool for tool, _ in plan.settled]),
        ("left alone", [tool for tool, _, _ in plan.kept]),
        ("for you to change", [each.tool for each in plan.manual]),
    )
    return [f"{counted(len(names), 'file')} {word}: "
            + ", ".join(dict.fromkeys(map(tool_title, names))) for word, names in rows if names]


def show_plan(plan: Plan, machine: Machine, key: str, all_lines: bool) -> str:
    """Return a plan as text, the summary first."""
    parts = show_summary(plan) + [show_edit(edit, machine, key, all_lines) for edit in plan.edits]
    has_key = os.path.exists(machine.key_file) or machine.key_file in [
        edit.path for edit in plan.edits]
    known = f" (the key is in {machine.shown_path(machine.key_file)})" if has_key else (
        " (with the whole key)")
    if plan.session:
        parts.append("  launchctl: " + " ".join(step.name for step in plan.session))
    for tool, path in plan.settled:
        parts.append(f"  {machine.shown_path(path)}  ({tool_title(tool)}; up to date)")
    for tool, path, reason in plan.kept:
        parts.append(f"  {machine.shown_path(path)}  ({tool_title(tool)}; unchanged) {reason}")
    for each in plan.manual:
        parts.append(f"  {machine.shown_path(each.path)}  ({tool_title(each.tool)}) "
                     f"is not changed: it {each.reason}.")
        if each.snippet:
            parts.append(f"      Add this by hand{known if key else ''}:")
            parts += [f"        {clean(line)}" for line in masked(each.snippet, key).splitlines()]
    return "\n".join(parts)


def show_hints(hints: Sequence[str]) -> str:
    return "\n".join("- " + hint for hint in hints)


def plan_json(plan: Plan, machine: Machine, key: str) -> dict[str, Json]:
    """Return a plan as a JSON value."""
    return {
        "edits": [{
            "tool": edit.tool, "path": edit.path, "why": edit.why, "notes": list(edit.notes),
            "action": action_of(edit), "command": list(edit.command), "diff": diff_of(edit, key),
        } for edit in plan.edits],
        "session": [step.name for step in plan.session],
        "settled": [{"tool": tool, "path": path} for tool, path in plan.settled],
        "kept": [{"tool": tool, "path": path, "reason": reason}
                 for tool, path, reason in plan.kept],
        "byHand": [{"tool": each.tool, "path": each.path, "reason": each.reason,
                    "snippet": masked(each.snippet, key)} for each in plan.manual],
        "hints": plan.hints,
    }


def tools_json(machine: Machine, record: Record) -> list[dict[str, Json]]:
    """Return the tools, whether they are found here, and which of their files were changed."""
    return [{
        "name": tool.name, "title": tool.title, "here": tool.is_here(machine),
        "connected": sorted(
            path for path, entry in record.files.items() if entry.tool == tool.name),
        "server": record.url,
    } for tool in TOOLS]


def show_tools(machine: Machine, record: Record) -> str:
    """Return the tools as a table."""
    lines = [f"connected to {record.url}"] if record.files else []
    for row in tools_json(machine, record):
        files = ", ".join(machine.shown_path(path) for path in row["connected"])
        state = files or ("found" if row["here"] else "-")
        lines.append(f"{row['name']:15} {row['title']:21} {state}")
    return "\n".join(lines)


# ==== 15. Command line =======================================================
# Questions are asked on /dev/tty, because standard input may be this script itself.


class Terminal:
    """The terminal of the user, if there is one."""

    def __init__(self, path: str = "/dev/tty") -> None:
        self._path = path

    def ask(self, question: str) -> str | None:
        """Return the answer, None if nobody can be asked."""
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
        """Return the answer without showing what is typed, None if nobody can be asked."""
        try:
            with open(self._path):
                pass
        except OSError:
            return None
        try:
            return getpass.getpass(question)
        except EOFError:
            return ""


def port_number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65_536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)


def provider_name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a name: use lower-case letters, digits and hyphens")
    return text


def tool_list(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("no tool is named")
    for name in names:
        if name not in TOOL_NAMES:
            near = difflib.get_close_matches(name, TOOL_NAMES, 1)
            did = f", did you mean {near[0]}?" if near else "."
            raise argparse.ArgumentTypeError(
                f"no tool is called {name!r}{did} The tools are: {', '.join(TOOL_NAMES)}")
    return names


HOST_HELP = (
    "the server: a name, an address, HOST:PORT, http://HOST:PORT or https://HOST (port 443), with "
    "or without a path; or one of the words undo and list")


def whole_address(text: str) -> str:
    """Return an address without a trailing slash or /v1, for argparse."""
    if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an address such as http://HOST:3456")
    return re.sub(r"(/v1)?/*$", "", text)


def absolute_path(text: str) -> str:
    if not text.startswith("/") or clean(text) != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not an absolute path")
    return text


def _add_role(parser: argparse.ArgumentParser) -> None:
    role = parser.add_mutually_exclusive_group()
    role.add_argument("--primary", dest="role", action="store_const", const=Role.PRIMARY,
                      help="make OCP the default, also of tools that have another one")
    role.add_argument("--backup", dest="role", action="store_const", const=Role.BACKUP,
                      help="do not make OCP the default of any tool; in OpenClaw, add it as the "
                           "last fallback")
    parser.set_defaults(role=Role.AUTO)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ocp_connect", description="Configure the tools of this machine to use an OCP server.",
        epilog="tools: " + ", ".join(TOOL_NAMES))
    add, flag = parser.add_argument, functools.partial(parser.add_argument, action="store_true")
    add("host", nargs="?", help=HOST_HELP)
    add("--key", help="the key that the operator of the server gave you")
    add("--port", type=port_number, help=f"the port of the server (default {DEFAULT_PORT})")
    flag("--https", help="connect to the server with https")
    add("--fingerprint", metavar="SHA256:...", type=fingerprint,
        help="the fingerprint of the server's certificate, which `ocp tls --show` prints")
    add("--only", metavar="TOOL,...", type=tool_list, default=[], help="only these tools")
    add("--skip", metavar="TOOL,...", type=tool_list, default=[], help="all but these tools")
    flag("--all", help="all tools, also those that are not found here")
    _add_role(parser)
    flag("--allow-fallback",
         help="OpenClaw: keep your fallbacks when OCP is the primary model")
    add("--provider-name", metavar="NAME", type=provider_name,
        help=f"the name of OCP among the providers of a tool (default: {OPENCLAW_PROVIDER} in "
             "OpenClaw, OCP in Zed, ocp elsewhere)")
    add("--openclaw-url", metavar="URL", type=whole_address,
        help="OpenClaw: the server's address where OpenClaw runs, such as in a container")
    add("--openclaw-key-path", metavar="PATH", type=absolute_path,
        help="OpenClaw: the file there that holds the key, which is then not saved here")
    flag("--anthropic",
         help="also configure Claude Code and Anthropic SDKs; not on the server's own machine")
    flag("--skip-answer", help="do not send a real request at the end")
    flag("--dry-run", help="show everything and change nothing")
    flag("--undo", help="undo all changes, or those of --only TOOL,...")
    flag("--list", help="list the tools")
    flag("--sync",
         help="only update the list of models in OpenClaw, from models.json beside this script or "
              "else from the server; do nothing where OpenClaw is not installed")
    flag("--yes", "-y", help="do not ask for confirmation")
    flag("--json", help="print JSON")
    add("--version", action="version", version=f"ocp_connect {VERSION}")
    return parser


class Run:
    """One invocation, with its machine, its terminal and its output."""

    def __init__(
        self, args: argparse.Namespace, machine: Machine, terminal: Terminal
    ) -> None:
        self.args = args
        self.machine = machine
        self.terminal = terminal
        self.record = load_record(machine.state_folder)

    def say(self, text: str) -> None:
        """Print text, unless JSON was asked for."""
        if text and not self.args.json:
            print(text, flush=True)

    def print_json(self, value: Json) -> None:
        """Print the one JSON value of a run, if it was asked for."""
        if self.args.json:
            print(json.dumps(value, indent=2))

    def confirm(self, question: str) -> bool:
        """Return whether to go on. Raises Problem if nobody can be asked."""
        if self.args.yes:
            return True
        answer = self.terminal.ask(f"{question} [Y/n] ")
        if answer is None:
            raise Problem(Exit.USAGE, "There is no terminal to ask on: add --yes or --dry-run.")
        return answer.lower() in ("", "y", "yes")

    def list_tools(self) -> Exit:
        self.say(show_tools(self.machine, self.record))
        self.print_json(tools_json(self.machine, self.record))
        return Exit.OK

    def undo(self) -> Exit:
        """Restore every file."""
        plan, key = plan_undo(self.record, self.args.only), self.machine.saved_key()
        shown = plan_json(plan, self.machine, key)
        self.say(show_plan(plan, self.machine, key, self.args.dry_run)
                 or "There is nothing to undo.")
        if self.args.dry_run or plan.is_empty and not plan.manual:
            self.print_json(shown)
            return Exit.OK
        if not self.confirm("Undo these changes?"):
            self.say("Nothing was changed.")
            return Exit.FAILED
        writer = Writer(self.machine, self.record, key)
        writer.undo(plan)
        complete = not writer.failures and not plan.manual
        self._say_failures(writer)
        self.print_json({**shown, "written": writer.written, "failures": writer.failures})
        self.say(f"Done: {counted(len(writer.written), 'file')} restored."
                 if complete else "Not everything could be undone, see above.")
        return Exit.OK if complete else Exit.FAILED

    def sync(self) -> Exit:
        """Update the list of models in OpenClaw. Raises Problem."""
        machine, args = self.machine, self.args
        url = server_address(args.host or "127.0.0.1", args.port, args.https)
        writer = Writer(machine, self.record, "")
        is_here = next(tool for tool in TOOLS if tool.name == "openclaw").is_here(machine)
        names, edit = self._plan_sync(url) if is_here else ([], None)
        if edit is not None:
            self.say(show_edit(edit, machine, "", True))
            copy_path = "" if args.dry_run else writer.sync(edit, time.strftime("%Y%m%d-%H%M%S"))
            self.say(f"Copy of the original: {machine.shown_path(copy_path)}" if copy_path else "")
        elif is_here:
            self.say(f"OpenClaw has the models of {url}." if names else
                     f"OpenClaw does not use {url}: `ocp connect {url} --only openclaw` adds it.")
        else:
            self.say("OpenClaw is not on this machine: there is nothing to update.")
        for failure in writer.failures:
            print(f"ocp_connect: {failure}", file=sys.stderr)
        self.print_json({
            "openclaw": is_here, "providers": names, "written": writer.written,
            "diff": diff_of(edit, "") if edit else [], "failures": writer.failures})
        return Exit.FAILED if writer.failures else Exit.OK

    def _plan_sync(self, url: str) -> tuple[list[str], Edit | None]:
        """Return what plan_sync returns. Raises Problem."""
        try:
            return plan_sync(self.machine, url, self._current_models(url))
        except UnsafeEdit as problem:
            path = self.machine.shown_path(openclaw_config(self.machine))
            raise Problem(Exit.FAILED, f"{path} {problem}.") from None

    def _current_models(self, url: str) -> tuple[Model, ...]:
        """Return the models of the file beside this script if the server is on this machine, else
        those that the server lists. Raises Problem."""
        is_here = is_this_machine(urllib.parse.urlsplit(url).hostname or "")
        found = models_in(os.path.join(HERE, "models.json")) if HERE and is_here else None
        return found or self._probe(url)[0].models

    def connect(self) -> Exit:
        """Probe, plan, show, confirm, write, verify."""
        args, machine = self.args, self.machine
        url = server_address(args.host, args.port, args.https)
        server, health = self._probe(url)
        self.say(show_server(server, health))
        if args.anthropic:
            refuse_loop(machine, server)
        context = Context(machine, server, args.role, args.allow_fallback, args.anthropic,
                          self._original_text, args.provider_name or "", asked=args.only,
                          openclaw_url=args.openclaw_url or "",
                          openclaw_key_path=args.openclaw_key_path or "")
        plan = make_plan(context, self._tools(), self.record)
        shown = {**plan_json(plan, machine, server.key), "server": url}
        self.say(show_plan(plan, machine, server.key, args.dry_run))
        if args.dry_run:
            self.say(show_hints(plan.hints))
            self.print_json(shown)
            return Exit.OK
        if not plan.is_empty and not self.confirm("Make these changes?"):
            self.say("Nothing was changed.")
            return Exit.FAILED
        writer = Writer(machine, self.record, server.key)
        writer.connect(plan, url)
        return self._finish(plan, writer, server, shown)

    def _finish(
        self, plan: Plan, writer: Writer, server: Server, shown: Mapping[str, Json]
    ) -> Exit:
        """Send the real request, and print what is left to say."""
        self._say_failures(writer)
        complaint = "" if self.args.skip_answer else self._verify(server)
        changed = {edit.tool for edit in plan.edits if edit.path in writer.written}
        for tool in plan.tools:
            if tool.name in changed and tool.after:
                self.say(f"{tool.title}: {tool.after}.")
        if plan.manual:
            self.say(f"Left for you to do: {counted(len(plan.manual), 'file')}, see above.")
        elif plan.is_empty:
            self.say("Everything is up to date; nothing was changed.")
        self.say(show_hints(plan.hints))
        if writer.written:
            self.say(f"To undo this: {undo_command(server)}")
        self.print_json({
            **shown, "written": writer.written, "failures": writer.failures,
            "notes": writer.notes, "verified": not complaint and not self.args.skip_answer,
            "answer": complaint or "ok"})
        return Exit.FAILED if writer.failures or complaint or plan.manual else Exit.OK

    def _say_failures(self, writer: Writer) -> None:
        for note in writer.notes:
            self.say(f"Note: {note}")
        for failure in writer.failures:
            self.say(f"FAILED: {failure}")

    def _verify(self, server: Server) -> str:
        """Send one real request. Return why there was no answer, empty if there was one."""
        try:
            answer = try_request(server)
        except HttpProblem as problem:
            self.say(f"FAILED: {server.cheapest.id} does not answer: {quoted(problem)}")
            return quoted(problem)
        self.say(f"{server.cheapest.id} answers: {clean(answer.strip())[:60]}")
        return ""

    def _given_key(self) -> str:
        if self.args.key is not None:
            return checked_key(self.args.key, "--key")
        given = self.machine.environ.get("OCP_CONNECT_KEY", "")
        return checked_key(given, "OCP_CONNECT_KEY") if given else ""

    def _probe(self, url: str) -> tuple[Server, Mapping[str, Json]]:
        """Return the server with a key that it accepts, and what its /health says. Raises
        Problem."""
        saved = self.machine.saved_key() if self.record.key_url == url else ""
        saved = saved if KEY_PATTERN.fullmatch(saved) else ""
        known = self.args.fingerprint or self._saved_fingerprint(url)
        certificate = pinned_certificate(url, known) if known else ""
        return probe(url, self._given_key(), saved, self.terminal.ask_secret, certificate)

    def _saved_fingerprint(self, url: str) -> str:
        """Return the fingerprint of the certificate that was saved for this server, empty if none
        was."""
        path = self.machine.certificate_file
        if self.record.url != url or path not in self.record.files:
            return ""
        try:
            return fingerprint_of(ssl.PEM_cert_to_DER_cert(read_text(path)))
        except (UnsafeEdit, ValueError):
            return ""

    def _tools(self) -> list[Tool]:
        """Return the tools to configure."""
        only, skipped = self.args.only, self.args.skip
        return [tool for tool in TOOLS if tool.name not in skipped and (
            tool.name in only if only else self.args.all or tool.is_here(self.machine))]

    def _original_text(self, path: str) -> str:
        """Return a file's text without OCP's changes. Raises UnsafeEdit."""
        original, _ = original_content(
            read_bytes(path), self.record.files.get(path), self.record)
        return decoded(original)


def program(argv: Sequence[str], machine: Machine, terminal: Terminal) -> Exit:
    """Do what the arguments ask for. Raises Problem."""
    args = build_parser().parse_args(argv)
    if args.host in ("undo", "list"):
        setattr(args, args.host, True)
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
    """Return the exit code; print every failure as a sentence on standard error."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        # Show what the terminal can show of a text; a stream that is closed is None.
        stream.reconfigure(errors="replace")
    try:
        return int(program(argv, this_machine(), Terminal()))
    except Problem as problem:
        print(f"ocp_connect: {problem}", file=sys.stderr)
        return int(problem.code)
    except BrokenPipeError:
        # The reader of the output, such as `head`, has ended.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return int(Exit.FAILED)
    except OSError as problem:
        print(f"ocp_connect: {clean(problem)}", file=sys.stderr)
        return int(Exit.FAILED)
    except KeyboardInterrupt:
        print("\nInterrupted: --undo restores the files.", file=sys.stderr)
        return int(Exit.INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
