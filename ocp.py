#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# ///
"""ocp shows and manages an OCP server: its usage, keys, service and updates.

The address of the server is --url, or OCP_URL, or this machine with the port CLAUDE_PROXY_PORT, or
the one that the installer wrote into ~/.ocp/install.json, or http://127.0.0.1:3456. The admin key
is OCP_ADMIN_KEY, or that of the service's ocp.env, or the content of ~/.ocp/admin-key; the key of a
file is sent to this machine's own server only. OCP_HOME replaces ~/.ocp. Colour and bars appear on
terminals only; NO_COLOR turns colour off.

Every command that reads accepts --json and prints the server's JSON unchanged.

Exit codes: 0 done; 1 failed, the message says why; 2 wrong usage; 3 no server answers;
4 not allowed: the key is missing or wrong, or the system requires other rights; 130 interrupted.
"""
# Sections (search for "==== 8" to jump to the eighth):
#
#      1. Commands         the table of commands: everything that a user can type
#      2. Shared pieces    small functions that other scripts hold too, kept equal by a test
#      3. Environment      the world outside that a command may read and change
#      4. The server       where it is, which key it gets, how it is asked
#      5. Formatting       tables, bars, ages, colour
#      6. Reading          usage, status, health, models, settings, logs, sessions
#      7. Keys             the keys of client devices
#      8. Clients          ask, lan, connect, sync
#      9. Service          start, stop, restart; who owns the port
#     10. Https            the server's own certificate
#     11. Doctor           a table of checks, each with its fix
#     12. Snapshots        git, and what an update saves: database, program, journal
#     13. Update           from release to release, and back
#     14. Command line     parser, help, version, completion
#     15. Main             errors become messages and exit codes
from __future__ import annotations  # OCP needs Python 3.9 or later; Python 3.6 shows this line.

import sys

if sys.version_info < (3, 9):
    sys.exit("OCP needs Python 3.9 or later; this is Python %d.%d." % sys.version_info[:2])
if sys.platform == "win32":
    sys.exit("ocp runs on Linux and macOS; on Windows, run it in WSL.")

import argparse
import base64
import codecs
import contextlib
import dataclasses
import datetime
import difflib
import email.utils
import enum
import errno
import fcntl
import functools
import getpass
import hashlib
import http.client
import ipaddress
import json
import os
import platform
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
import unicodedata
import urllib.parse
import webbrowser
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TextIO, Union

#: The version of this script, which may be copied alone: a test holds it to the server's.
VERSION = "1.0.0"

#: A JSON value.
Json = Any


# ==== 1. Commands ============================================================
# To add a command, add a row here and a function cmd_NAME(env, args) that does it; an action of a
# command, as in `ocp keys add`, is done by cmd_COMMAND_ACTION. The parser, the help texts and the
# completion are made from this table.


class Argument(NamedTuple):
    """One argument: its names, and its options for argparse."""

    names: tuple[str, ...]
    options: Mapping[str, Any]


class Command(NamedTuple):
    """One command."""

    name: str
    #: What it does, as an imperative: the list shows it with a capital.
    help: str
    arguments: tuple[Argument, ...] = ()
    actions: tuple[Command, ...] = ()
    #: What one types after `ocp`, for the command's own help.
    examples: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        return self.help[:1].upper() + self.help[1:]


def argument(*names: str, **options: Any) -> Argument:
    return Argument(names, options)


def flag(*names: str, help: str) -> Argument:
    return argument(*names, action="store_true", help=help)


#: Units of a period, in milliseconds, the longest first.
SPAN_UNITS_MS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}


def span_ms(text: str) -> int:
    """Return a period such as 90s, 1h30m or 7d in milliseconds. Raises ValueError."""
    if not re.fullmatch(r"([0-9]{1,9}(d|h|ms|m|s))+", text):
        raise ValueError(f"takes a period such as 30m, 2h or 7d, not {text!r}")
    parts = re.findall(r"([0-9]+)([a-z]+)", text)
    return sum(int(count) * SPAN_UNITS_MS[unit] for count, unit in parts)


def period(text: str) -> float:
    try:
        return span_ms(text) / 1000
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def day_count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= 400:
        raise argparse.ArgumentTypeError("takes a number from 1 to 400")
    return int(text)


def whole_number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise argparse.ArgumentTypeError("takes a whole number")
    return int(text)


#: What `logs` takes; audit = what the operator changed.
LOG_WORDS = ("all", "audit", "debug", "info", "warn", "error")
#: Option of the command line, and name in the API.
QUOTAS = (
    ("daily", "daily"), ("weekly", "weekly"), ("monthly", "monthly"),
    ("tokens-daily", "tokensDaily"), ("tokens-weekly", "tokensWeekly"),
    ("tokens-monthly", "tokensMonthly"), ("usd-daily", "usdDaily"), ("usd-weekly", "usdWeekly"),
    ("usd-monthly", "usdMonthly"),
)

# A subcommand must not overwrite the value that the command before it got, hence no default.
JSON = argument("--json", action="store_true", default=argparse.SUPPRESS,
                help="print the server's JSON unchanged")
REPORT = argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
#: What every command takes, before its name too.
EVERYWHERE = (
    argument("--url", metavar="URL", default=argparse.SUPPRESS,
             help="the server: host:port or http(s)://host"),
    argument("--debug", action="store_true", default=argparse.SUPPRESS,
             help="show where an error came from"),
)
YES = flag("--yes", "-y", help="do not ask before acting")
# Metavars in capitals are completed: see VALUES.
KEY = argument("key", metavar="KEY", help="a key's name or id")
KEY_FIELDS = (
    argument("--expiry", metavar="WHEN", help="a date (2027-01-31), a period (30d, 12h) or never"),
    argument("--models", metavar="A,B", help="the models that the key may use; empty = all"),
    argument("--max-concurrent", metavar="N", type=whole_number,
             help="answers at the same time; 0 = no limit"),
    argument("--effort", metavar="LEVEL",
             help="effort of requests that ask for none: low, medium, high, xhigh, max, or none = "
             "the server's default"),
    argument("--web-search", metavar="ON|OFF", choices=("on", "off"),
             help="whether its requests may let the model search the web: on or off"),
    argument("--note", metavar="TEXT", help="a note for yourself"),
    argument("--soft-percent", metavar="N", help="warn from so many percent of each quota on, 1 to "
             "100; none = never"),
)
_UNIT_WORDS = {"": "requests", "tokens": "tokens", "usd": "USD at the API's list price"}
_SPANS = {"daily": "day", "weekly": "week", "monthly": "month"}
QUOTA_FIELDS = (
    *(argument(f"--{name}", metavar="USD" if kind == "usd" else "N",
               help=f"{_UNIT_WORDS[kind]} a {_SPANS[span]}; none = no limit")
      for name, _ in QUOTAS for kind, _, span in (name.rpartition("-"),)),
    argument("--model", metavar="MODEL", help="these quotas are for this model only"),
)

ALL_KEYS = flag("--all", help="the revoked ones too")
KEY_ACTIONS = (
    Command("list", "list the keys, newest first", (ALL_KEYS, JSON),
            examples=("keys list", "keys list --all")),
    Command("add", "create a key; its secret is shown only once",
            (argument("name", metavar="NAME", help="its name, such as that of the device"),
             *KEY_FIELDS, *QUOTA_FIELDS, JSON),
            examples=("keys add laptop", "keys add phone --expiry 90d --daily 200",
                      "keys add tv --model opus --daily 20")),
    Command("show", "show one key and its quotas", (KEY, JSON), examples=("keys show laptop",)),
    Command("quota", "show or change the quotas of a key", (KEY, *QUOTA_FIELDS, JSON),
            examples=("keys quota laptop", "keys quota laptop --daily 200 --tokens-weekly none",
                      "keys quota laptop --usd-monthly 20",
                      "keys quota laptop --model opus --usd-daily 1.50")),
    Command("edit", "change what a key may do", (KEY, *KEY_FIELDS, JSON),
            examples=("keys edit laptop --expiry never --models sonnet,haiku",)),
    Command("rename", "give a key another name",
            (KEY, argument("name", metavar="NAME", help="the new name"), JSON),
            examples=("keys rename laptop 'old laptop'",)),
    Command("rotate", "give a key a new secret; the old one stops working at once",
            (KEY, argument("--grace", metavar="TIME",
                           help="how long the old secret still works, such as 24h; none ends it "
                           "now, without a new secret"), YES, JSON),
            examples=("keys rotate laptop", "keys rotate laptop --grace 24h")),
    Command("login", "answer a key's requests with a Claude login of its own", (
        KEY, argument("--folder", metavar="PATH", help="a folder on the server in which somebody "
                      "has logged claude in, in place of a token"),
        flag("--server", help="the server's own login again"), JSON,
    ), examples=("keys login anna", "keys login anna --folder /home/anna/.claude",
                 "keys login anna --server")),
    Command("revoke", "end a key", (KEY, YES, JSON), examples=("keys revoke laptop",)),
)
STOP_ACTION = Command("stop", "end requests that run; their clients get an error", (
    argument("requests", nargs="*", metavar="REQUEST", help="an id, or the beginning of one"),
    flag("--all", help="all that run and wait"), YES, JSON,
), examples=("requests stop req_4f2a", "requests stop --all"))
SESSION = argument("session", nargs="?", metavar="SESSION", help="a session's id; none = all")

COMMANDS = (
    Command("usage", "show plan limits and requests; usage by key, model, tag or day", (
        argument("--by", choices=("key", "model", "tag", "day"), metavar="WHAT",
                 help="the usage of each key, model, tag or day"),
        argument("--since", metavar="PERIOD", type=period,
                 help="how far back, such as 12h or 7d; by default 1d, by day 7d"),
        flag("--by-key", help="the same as --by key"),
        argument("--days", metavar="N", type=day_count, help="the same as --by day --since Nd"),
        flag("--csv", help="as CSV: the sums of --by, else each request"),
        argument("-o", "--output", metavar="FILE", help="write the CSV to this new file"),
        JSON,
    ), examples=("usage", "usage --by key --since 7d", "usage --by day",
                 "usage --csv --since 30d -o usage.csv")),
    Command("requests", "list the requests that run or wait, or stop them", (JSON,),
            (STOP_ACTION,), examples=("requests", *STOP_ACTION.examples)),
    Command("status", "show the server, its requests and the plan on one screen",
            (flag("--watch", help="repeat every 2 s, until Ctrl-C"), JSON),
            examples=("status", "status --watch")),
    Command("dashboard", "show the address of the dashboard, and how to get in",
            (flag("--open", help="open it in the browser of this machine"), JSON),
            examples=("dashboard", "dashboard --open")),
    Command("health", "show the state of the server; exit code 1 when it is not well", (JSON,),
            examples=("health",)),
    Command("models", "list the models that the server offers", (JSON,), examples=("models",)),
    Command("settings", "show, change or reset settings", (
        argument("key", nargs="?", metavar="SETTING", help="a setting"),
        argument("value", nargs="?", metavar="VALUE",
                 help="its new value; a time may have a unit, such as 90s or 1h"),
        argument("--reset", metavar="SETTING", help="back to environment or default"),
        flag("--changed", help="only those that are not at their default"), JSON,
    ), examples=("settings", "settings timeout", "settings timeout 20m",
                 "settings --reset timeout")),
    Command("logs", "show the newest events, by default 20", (
        argument("words", nargs="*", metavar="N|LEVEL", help="the same as -n N and --level LEVEL"),
        argument("-n", "--lines", metavar="N", help="how many events, at most 1000"),
        argument("--level", metavar="LEVEL", choices=LOG_WORDS,
                 help="the lowest level: " + ", ".join(LOG_WORDS)),
        argument("--since", metavar="PERIOD", type=period,
                 help="only events of the last 30m, 2h or 7d"),
        flag("--follow", "-f", help="print new events as they come, until Ctrl-C"),
        argument("--key", metavar="KEY", help="only events of this key"),
        argument("--request", metavar="ID", help="only events of this request"), JSON,
    ), examples=("logs", "logs -n 50 --level warn", "logs --level error --since 1h",
                 "logs --follow")),
    Command("errors", "show failed and refused requests, and what to do about them", (
        argument("about", nargs="?", metavar="KEY|REQUEST",
                 help="only those of a key, or one request, whose id is in its response"),
        argument("--since", metavar="WHEN", help="a time, or a period before now: 30m, 2h, 7d"),
        argument("-n", dest="count", metavar="N", type=whole_number, default=20,
                 help="how many, by default 20"), JSON,
    ), examples=("errors", "errors laptop --since 1h")),
    Command("alerts", "list what the webhook was told, and whether it arrived", (JSON,), (
        Command("test", "send a test to the webhook now", (JSON,), examples=("alerts test",)),
    ), ("alerts", "alerts test")),
    Command("sessions", "list the conversations that the server remembers", (JSON,), (
        Command("clear", "forget all sessions, or one", (SESSION, YES, JSON),
                examples=("sessions clear", "sessions clear chat-1")),
    ), ("sessions", "sessions clear")),
    Command("clear", "forget all sessions, or one: the same as `sessions clear`",
            (SESSION, YES, JSON), examples=("clear", "clear chat-1")),
    Command("cache", "show what the cache of answers holds, and how often it helped", (JSON,), (
        Command("clear", "forget all cached answers", (JSON,), examples=("cache clear",)),
    ), ("cache", "cache clear")),
    Command("keys", "list, create and change the keys of your devices", (ALL_KEYS, JSON),
            KEY_ACTIONS, ("keys", "keys add laptop --expiry 90d --daily 200",
                          "keys quota laptop --tokens-weekly 5000000", "keys revoke laptop")),
    Command("lan", "show the address for other devices, and test it", (JSON,), examples=("lan",)),
    Command("tls", "make a certificate, and let the server speak https", (
        argument("--name", metavar="NAME", action="append", default=[],
                 help="one more name or address of the server; may be repeated"),
        flag("--show", help="only show the certificate"),
        flag("--off", help="let the server speak http again"), REPORT,
    ), examples=("tls", "tls --name ocp.lan", "tls --show", "tls --off")),
    Command("connect", "set up this machine's tools for a server", (
        argument("rest", nargs="+", metavar="HOST",
                 help="HOST and the other arguments of ocp_connect.py, such as --list and --undo"),
    )),
    Command("channels", "talk to OCP from Telegram and other chats", (
        argument("rest", nargs="*", metavar="ARGUMENT",
                 help="arguments of ocp_channels.py; none = its help"),
    )),
    Command("tenants", "give each OpenClaw of this machine a key of its own", (
        argument("rest", nargs="*", metavar="COMMAND",
                 help="discover, setup, list, undo, ... and their arguments: see `ocp tenants "
                      "--help`"),
    ), examples=("tenants discover", "tenants setup --dry-run", "tenants undo")),
    Command("sync", "update the list of models in OpenClaw",
            (flag("--dry-run", help="only show what would change"), REPORT),
            examples=("sync --dry-run", "sync")),
    Command("ask", "ask one question: the quickest proof that everything works", (
        argument("words", nargs="*", metavar="QUESTION",
                 help="the question; what comes through a pipe is put before it"),
        argument("-m", "--model", metavar="MODEL", help="a model or alias"),
        argument("-s", "--system", metavar="TEXT", help="the system prompt"), JSON,
    ), examples=("ask why is the sky blue", "ask -m haiku 'Is 91 a prime?'",
                 "ask -s 'Answer in one word.' the capital of Peru",
                 "ask summarise this < notes.txt")),
    Command("login", "log claude in on the server, with a browser on any device", (
        flag("--cancel", help="end a login that waits for its code"), JSON,
    ), examples=("login", "login --cancel")),
    Command("capture", "write the next requests to files on the server, to find a fault", (
        argument("count", nargs="?", metavar="N", type=whole_number,
                 help="how many requests, at most 100; none = show what is captured"),
        argument("--minutes", metavar="M", type=whole_number,
                 help="end it after so many minutes, at most 60; by default 10"),
        argument("--key", metavar="KEY", help="only requests of this key"),
        flag("--stop", help="end it now"), flag("--list", help="only show what is captured"), JSON,
    ), examples=("capture 5 --minutes 10", "capture 1 --key laptop", "capture --list",
                 "capture --stop")),
    Command("start", "start the service", examples=("start",)),
    Command("stop", "stop the service", examples=("stop",)),
    Command("restart", "restart the service, or OpenClaw's gateway",
            (argument("what", nargs="?", choices=("gateway",), metavar="gateway",
                      help="restart OpenClaw's gateway instead"),),
            examples=("restart", "restart gateway")),
    Command("doctor", "examine the installation and say what to do", (
        flag("--fix", help="carry out what is safe: modes of files, a service that is down"),
        flag("--report", help="write a text file for an issue, without keys, names and addresses"),
        REPORT), examples=("doctor", "doctor --fix", "doctor --report")),
    Command("update", "update a git checkout to a release, or roll back", (
        flag("--check", help="only say whether there is a newer release"),
        flag("--dry-run", help="only say what would be done"),
        argument("--target", metavar="VERSION", help="another release than the newest"),
        flag("--rollback", help="return to the version before the last update"),
        flag("--list", help="with --rollback: list the snapshots"), YES,
    ), examples=("update --check", "update", "update --rollback")),
    Command("version", "show the installed version, the running one and claude's", (REPORT,),
            examples=("version", "--version")),
    Command("completion", "print a completion script: bash, zsh or fish",
            (argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL",
                      help="bash, zsh or fish"),),
            examples=("completion bash", "completion zsh", "completion fish")),
    Command("help", "show this help, or that of a command",
            (argument("words", nargs="*", metavar="COMMAND",
                      help="a command; `environment` = variables and exit codes"),),
            examples=("help keys add", "help environment")),
)

#: The command line without a command.
ROOT = Command("", "", (
    JSON, flag("--version", "-V", help="print the version, and ask no server"),
), COMMANDS)

#: How the help groups the commands; what is named in none comes last.
GROUPS = (
    ("Everyday", ("status", "usage", "ask", "dashboard", "models", "requests", "logs",
                  "errors")),
    ("Devices", ("keys", "lan", "connect", "channels", "tenants", "sync", "tls")),
    ("Server", ("start", "stop", "restart", "health", "settings", "alerts", "sessions", "clear",
                "cache")),
    ("Care", ("login", "doctor", "capture", "update", "version", "completion", "help")),
)


# ==== 2. Shared pieces =======================================================
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


# --- shared: drain
def drain_s(text: str) -> float:
    """Return the seconds of OCP_DRAIN; the server's default where it is no duration.

    A bare number is milliseconds, as for the server.
    """
    units = {"": 0.001, "ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}
    found = re.fullmatch(r"([0-9]{1,9}) ?(ms|s|m|h|d|)", text.strip().lower())
    return int(found[1]) * units[found[2]] if found else 20.0
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


# ==== 3. Environment =========================================================
# Everything that a command may know and change of the world is in one Env, so that tests give it
# another world.


def failed(message: str) -> Problem:
    """Return the error of a command that was not able to do its work."""
    return Problem(Exit.FAILED, message)


def lan_addresses() -> list[str]:
    """Return the IPv4 address by which this machine reaches others, if any. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # A documentation address: connecting a UDP socket only chooses the route.
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
    #: The folder of this script, with ocp_server.py beside it.
    tree: str
    platform: str = sys.platform
    user_id: int = dataclasses.field(default_factory=os.getuid)
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    #: Takes what run_program takes.
    run: Callable[..., Completed] = run_program
    addresses: Callable[[], list[str]] = lan_addresses
    #: Shows an address in a browser; returns whether there is one.
    browse: Callable[[str], bool] = webbrowser.open

    @property
    def ocp_home(self) -> str:
        return ocp_home(self.environ, self.home)

    def beside(self, name: str) -> str:
        return os.path.join(self.tree, name)

    def say(self, text: str) -> None:
        print(text, file=self.stdout, flush=True)

    def note(self, text: str) -> None:
        print(text, file=self.stderr, flush=True)

    def command(
        self, *words: str, timeout_s: float = 15.0, more: Mapping[str, str] | None = None,
    ) -> Completed:
        """Run a program of the system with the user's environment, and `more` in it."""
        with progress(self, f"waiting for {os.path.basename(words[0])}"):
            return self.run(words, environ={**self.environ, **(more or {})}, timeout_s=timeout_s)


@contextlib.contextmanager
def progress(env: Env, text: str) -> Iterator[None]:
    """Show `text` on a terminal if the block takes more than a second."""
    if not env.stderr.isatty():
        yield
        return
    timer = threading.Timer(1.0, env.note, [f"{text} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def text_of(path: str) -> str:
    """Return the content of a file, empty if it is none that can be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError):
        return ""


def utc_time(at_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(at_s, datetime.timezone.utc)


def iso_time(at_s: float) -> str:
    """Return epoch seconds as the API writes times: 2027-01-31T14:00:00Z."""
    return utc_time(at_s).strftime("%Y-%m-%dT%H:%M:%SZ")


# ==== 4. The server ==========================================================
# Where the server is, and how it is asked. A server that cannot be reached, one that refuses the
# key and one with trouble of its own are three different errors, here and for the user.

DEFAULT_PORT = 3456
DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_PORT}"


class Step(NamedTuple):
    """One command of the service manager, as the installer wrote it down."""

    command: list[str]
    may_fail: bool = False
    tries: int = 1

    @property
    def line(self) -> str:
        return shlex.join(self.command)


class Record(NamedTuple):
    """The installation as install.json has it; empty fields where it says nothing."""

    platform: str = ""
    label: str = ""
    unit_path: str = ""
    python: str = ""
    server_path: str = ""
    data_dir: str = ""
    env_file: str = ""
    bind: str = ""
    url: str = ""
    port: int = DEFAULT_PORT
    #: What starts, stops, restarts and enables the service, and tells whether it is enabled.
    commands: Mapping[str, list[Step]] = {}

    @property
    def needs_root(self) -> bool:
        return self.platform == "systemd-system"


def record_path(env: Env) -> str:
    return os.path.join(env.ocp_home, "install.json")


def installation(env: Env) -> Record | None:
    """Return the installation, None if there is none. Raises Problem for a broken record."""
    try:
        found = read_record(record_path(env))
        return None if found is None else record_of(found)
    except (OSError, ValueError) as error:
        raise failed(f"{error}\nOr name the server in OCP_URL.") from None


def local_server(env: Env) -> Record:
    """Return the installation, with what it does not say filled in: all of it, if there is none
    or its record is broken."""
    found = Record()
    with contextlib.suppress(Problem):
        found = installation(env) or found
    return found._replace(
        python=found.python or sys.executable, data_dir=found.data_dir or env.ocp_home,
        server_path=found.server_path or env.beside("ocp_server.py"))


def record_of(found: dict[str, Json]) -> Record:
    """Return the fields of a record. Raises ValueError if one has a wrong type."""
    kept = {name: found[name] for name in Record._fields if found.get(name)}
    texts = [text for name, text in kept.items() if name not in ("port", "commands")]
    try:
        kept["commands"] = {verb: [Step(**step) for step in steps]
                            for verb, steps in kept.get("commands", {}).items()}
        texts += [word for steps in kept["commands"].values() for step in steps
                  for word in step.command]
    except (AttributeError, TypeError):
        texts = [None]
    record = Record(**kept)
    if not isinstance(record.port, int) or not all(isinstance(text, str) for text in texts):
        raise ValueError("install.json is damaged. Run setup.py_install.py again.")
    return record._replace(url=record.url or f"http://127.0.0.1:{record.port}")


def parse_url(text: str, source: str) -> str:
    """Return a server's address without a trailing slash or /v1. Raises Problem if it is none. A
    name alone, with or without a port, is that of an http server."""
    if re.fullmatch(r"\s*(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:[0-9]+)?/?\s*", text):
        has_port = re.search(r":[0-9]+/?\s*$", text) and not text.rstrip(" /").endswith("]")
        text = f"http://{text.strip().rstrip('/')}" + ("" if has_port else f":{DEFAULT_PORT}")
    try:
        parts = urllib.parse.urlsplit(text.strip())
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        usable = usable and "@" not in parts.netloc
        # Characters that no host has would fail only later, with a less clear message.
        (parts.hostname or "").encode("idna")
    except ValueError:
        usable = False
    if not usable or re.search(r"[\x00-\x20\x7f]", text.strip()):
        raise Problem(
            Exit.USAGE, f"{source}: {clean(text)!r} is not an address such as {DEFAULT_URL}."
        )
    path = parts.path.rstrip("/")
    path = path[: -len("/v1")] if path.endswith("/v1") else path
    return f"{parts.scheme}://{parts.netloc}{path}"


def is_loopback(url: str) -> bool:
    """Return whether an address leads to this machine by its loopback name."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def port_of(url: str) -> int:
    parts = urllib.parse.urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


def tls_for(url: str) -> ssl.SSLContext | None:
    """Return how to verify the certificate at this address; None for the usual way. The certificate
    of this machine's own server names the address that other devices use."""
    return any_certificate() if is_loopback(url) else None


def server_url(env: Env) -> str:
    named = env.environ.get("OCP_URL", "")
    if named.strip():
        return parse_url(named, "OCP_URL")
    port = env.environ.get("CLAUDE_PROXY_PORT", "").strip()
    if port:
        if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65_536:
            raise Problem(Exit.USAGE, f"CLAUDE_PROXY_PORT: {clean(port)!r} is not a port.")
        return f"http://127.0.0.1:{int(port)}"
    record = installation(env)
    return parse_url(record.url, record_path(env)) if record else DEFAULT_URL


def admin_key_path(env: Env) -> str:
    """Return where the server of this machine keeps its admin key."""
    return os.path.join(local_server(env).data_dir, "admin-key")


def service_admin_key(env: Env) -> str:
    """Return the admin key in the settings of this machine's service, empty if there is none."""
    return settings_of(text_of(local_server(env).env_file)).get("OCP_ADMIN_KEY", "").strip()


def admin_key(env: Env, url: str) -> str:
    """Return the admin key for this address, empty if there is none. Raises Problem. The key in a
    file belongs to the server of this machine, and is sent to no other."""
    key, source = env.environ.get("OCP_ADMIN_KEY", "").strip(), "OCP_ADMIN_KEY"
    if not key:
        if not is_loopback(url):
            record = installation(env)
            if record is None or parse_url(record.url, record_path(env)) != url:
                return ""
        key, source = service_admin_key(env), local_server(env).env_file
    if not key:
        source = admin_key_path(env)
        try:
            with open(source, encoding="utf-8") as file:
                key = file.read(10_000).strip()
        except (FileNotFoundError, PermissionError):
            return ""
        except (OSError, ValueError) as error:
            raise failed(f"{source} cannot be read: {error}") from None
    if key and not re.fullmatch(r"[!-~]+", key):
        raise Problem(Exit.USAGE, f"{source} contains characters that no key has.")
    return key


def is_ocp_server(url: str) -> bool:
    """Return whether an OCP server answers there. No key is sent, so no certificate is verified."""
    try:
        return "version" in http_json("GET", url + "/health", timeout_s=2.0, tls=any_certificate())
    except (HttpProblem, TypeError):
        return False


def other_scheme(url: str) -> str:
    """Return the address with the other one of http and https if an OCP server answers there,
    empty if none does."""
    scheme, _, place = url.partition("://")
    other = f"{'http' if scheme == 'https' else 'https'}://{place}"
    return other if is_ocp_server(other) else ""


def scheme_of(url: str) -> str:
    """Return http or https."""
    return url.partition("://")[0]


def not_ocp(url: str, status: int = 0) -> Problem:
    """Return what to say when another program answers at the server's address."""
    told = f" (it answered {status})" if status else ""
    return failed(f"What answers at {url} is not an OCP server{told}. Name another address with "
                  f"--url or OCP_URL, or find out who owns port {port_of(url)} with `ocp doctor`.")


def errors_hint(request_id: str) -> str:
    """Return a further line of an error message: the command that tells more about it."""
    return f"\nMore: `{f'ocp errors {clean(request_id)}'.rstrip()}`"


class Answer(NamedTuple):
    """What the server answered."""

    url: str
    #: The JSON as the server wrote it.
    text: str

    @property
    def value(self) -> Json:
        """Return the JSON object. Raises Problem if it is none."""
        with contextlib.suppress(ValueError):
            value = json.loads(self.text)
            if isinstance(value, dict):
                return value
        raise not_ocp(self.url)


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Raise HttpProblem if a connection breaks off while the block reads an answer."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise HttpProblem("unreachable", f"the answer broke off: {error}") from None


class Server(NamedTuple):
    """The server that commands talk to."""

    env: Env
    url: str
    key: str

    def ask(self, method: str, path: str, body: object = None, timeout_s: float = 15.0) -> Answer:
        """Return the answer to a request. Raises Problem."""
        with progress(self.env, f"waiting for {self.url}"):
            with self.open(method, path, body, timeout_s) as response, reading():
                return Answer(self.url, response.read().decode("utf-8", "replace"))

    def health(self) -> Answer:
        """Return the answer of /health. Raises Problem, also for another program's."""
        answer = self.ask("GET", "/health", timeout_s=5.0)
        if "version" not in answer.value or "status" not in answer.value:
            raise not_ocp(self.url)
        return answer

    @contextlib.contextmanager
    def open(
        self, method: str, path: str, body: object, timeout_s: float
    ) -> Iterator[http.client.HTTPResponse]:
        """Yield a response whose body is still unread. Raises Problem."""
        url = self.url + path
        try:
            with http_open(method, url, body, self.key, timeout_s, tls_for(url)) as response:
                yield response
        except HttpProblem as problem:
            raise self._explained(problem) from None

    def _explained(self, problem: HttpProblem) -> Problem:
        """Return the same problem in the user's terms, with advice."""
        message, url = clean(problem).rstrip("."), self.url
        is_ocp_error = isinstance(problem.body, dict) and "error" in problem.body
        if problem.kind != "unreachable" and not is_ocp_error and not is_ocp_server(url):
            return not_ocp(url, problem.status)
        if "CERTIFICATE_VERIFY_FAILED" in message:
            return Problem(
                Exit.UNREACHABLE, f"The certificate of {url} is not trusted here: name the file "
                "of its authority in SSL_CERT_FILE.")
        # Only then: a server takes the greeting of the other scheme for a wrong request.
        is_other = "SSL" in message or "uses https" in message
        other = other_scheme(url) if is_other else ""
        if other:
            return Problem(
                Exit.UNREACHABLE, f"The server there speaks {scheme_of(other)}, not "
                f"{scheme_of(url)}.\nIf its settings have changed, `ocp restart` lets it use them; "
                f"otherwise: --url {other}")
        error = problem.body.get("error") if isinstance(problem.body, dict) else None
        code = str((error.get("code") if isinstance(error, dict) else "") or "")
        # A failure of claude's account may have the status of a refused key.
        kind = "upstream" if code.startswith("upstream_") else problem.kind
        has_failed = problem.status == 429 or problem.status >= 500 or kind == "upstream"
        hint = errors_hint(problem.request_id) if has_failed else ""
        exit_code, text = {
            "unreachable": (
                Exit.UNREACHABLE, f"Cannot connect to {url}: {message}.\n" + (
                    "Start the server with `ocp start`, or find the cause with `ocp doctor`."
                    if is_loopback(url) else
                    "Compare the address with what `ocp lan` prints on the server's machine.")),
            "denied": (Exit.DENIED, f"{url} refused: {message}.\n{self._key_advice()}"),
            "upstream": (
                Exit.FAILED, f"{url} is running but has upstream trouble ({problem.status}): "
                f"{message}.{hint}"),
        }.get(kind, (Exit.FAILED, f"{url} answered {problem.status}: {message}.{hint}"))
        return Problem(exit_code, text, problem.body)

    def _key_advice(self) -> str:
        if self.key:
            return "The admin key that was sent is not this server's: see OCP_ADMIN_KEY."
        if is_loopback(self.url):
            path = admin_key_path(self.env)
            demo = os.path.join(os.path.dirname(path), "demo")
            return f"No admin key was sent: set OCP_ADMIN_KEY; there is none to read in {path}." + (
                f" That of a demo is used with OCP_HOME={demo}."
                if os.path.exists(os.path.join(demo, "admin-key")) else "")
        return "No admin key was sent to this other machine: set OCP_ADMIN_KEY to its key."


def find_server(env: Env) -> Server:
    url = server_url(env)
    return Server(env, url, admin_key(env, url))


def health_and_date(url: str) -> tuple[Json, str]:
    """Return the answer of /health, and its Date. Raises HttpProblem, also for another program."""
    with http_open("GET", url + "/health", timeout_s=3.0, tls=tls_for(url)) as response, reading():
        text, date = response.read(), response.headers.get("Date", "")
    with contextlib.suppress(ValueError):
        health = json.loads(text)
        if isinstance(health, dict) and "version" in health and "status" in health:
            return health, date
    raise HttpProblem("refused", f"what answers at {url} is not an OCP server")


def health_of(url: str) -> Json | None:
    """Return the answer of /health, None if nobody answers. Raises Problem for another program."""
    try:
        return health_and_date(url)[0]
    except HttpProblem as problem:
        if problem.kind == "unreachable":
            return None
        raise not_ocp(url) from None


def lan_url(env: Env, url: str) -> str:
    """Return a server's address for other devices, empty if there is no network."""
    if not is_loopback(url):
        return url
    parts = urllib.parse.urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return next((f"{parts.scheme}://{host}{port}" for host in env.addresses()), "")


def device_url(env: Env, url: str) -> str:
    """Return the address for other devices if they can reach it, else the address unchanged."""
    found = lan_url(env, url)
    return found if found and is_ocp_server(found) else url


def with_port(url: str) -> str:
    """Return an address with its port: without one, ocp_connect.py takes 3456."""
    parts = urllib.parse.urlsplit(url)
    port = "" if parts.port else f":{port_of(url)}"
    return f"{parts.scheme}://{parts.netloc.rstrip(':')}{port}{parts.path}"


class Certificate(NamedTuple):
    """What a certificate of a server says."""

    fingerprint: str
    #: Host names in lower case, and addresses.
    names: tuple[str, ...]
    #: Whether it claims to be an authority, which some clients take from no server.
    is_authority: bool
    #: Whether nobody else vouches for it.
    is_self_signed: bool
    expires_s: float

    def covers(self, host: str) -> bool:
        """Return whether it is for this host name or address."""
        host = plain_host(host)
        return host in self.names or f"*.{host.partition('.')[2]}" in self.names


def plain_host(host: str) -> str:
    """Return a host name or address in the form that two of them can be compared in."""
    try:
        return ipaddress.ip_address(host.strip("[]")).compressed
    except ValueError:
        return host.lower().rstrip(".")


#: Extensions of a certificate, by the content of their object identifier.
_ALTERNATIVE_NAMES, _BASIC_CONSTRAINTS = b"\x55\x1d\x11", b"\x55\x1d\x13"


def certificate_of(text: bytes) -> Certificate:
    """Return what a certificate in DER says. Raises ValueError for anything else."""
    fields = certificate_fields(text)
    rows = [der_values(each.content) for field in fields[6:] if field.tag == 0xA3
            for row in der_values(field.content) for each in der_values(row.content)]
    extensions = {row[0].content: der_values(row[-1].content)[0].content for row in rows}
    names = der_values(extensions.get(_ALTERNATIVE_NAMES, b""))
    return Certificate(
        fingerprint_of(text), tuple(filter(None, map(_name_of, names))),
        any(each.tag == 1 and each.content != b"\0"
            for each in der_values(extensions.get(_BASIC_CONSTRAINTS, b""))),
        fields[2].whole == fields[4].whole, _der_time_s(der_values(fields[3].content)[1]))


def _name_of(value: DerValue) -> str:
    """Return the host name or address of a subjectAltName, empty for what is neither."""
    if value.tag == 0x82:
        return plain_host(value.content.decode("ascii", "replace"))
    is_address = value.tag == 0x87 and len(value.content) in (4, 16)
    return ipaddress.ip_address(value.content).compressed if is_address else ""


def _der_time_s(value: DerValue) -> float:
    """Return a time of DER in epoch seconds. Raises ValueError."""
    text = value.content.decode("ascii", "replace")
    if value.tag == 0x17:
        # A UTCTime has two digits of a year from 1950 to 2049.
        text = ("19" if text[:2] >= "50" else "20") + text
    found = datetime.datetime.strptime(text, "%Y%m%d%H%M%SZ")
    return found.replace(tzinfo=datetime.timezone.utc).timestamp()


def served_certificate(url: str, timeout_s: float = 3.0) -> Certificate | None:
    """Return the certificate of the server at an https address, None if none can be had."""
    host = urllib.parse.urlsplit(url).hostname or ""
    if not url.startswith("https://"):
        return None
    with contextlib.suppress(OSError, ValueError):
        with socket.create_connection((host, port_of(url)), timeout_s) as link:
            with any_certificate().wrap_socket(link, server_hostname=host) as secure:
                return certificate_of(secure.getpeercert(True) or b"")
    return None


def pin_of(url: str) -> str:
    """Return the fingerprint by which devices can know the server at this address. Empty where they
    need none: for http, and for a certificate of an authority."""
    found = served_certificate(url)
    return found.fingerprint if found and found.is_self_signed else ""


def connect_line(url: str, fingerprint: str = "") -> str:
    """Return the command that sets up the tools of another machine.

    With a fingerprint, curl takes the script from the server with that key only: --insecure
    leaves out who vouches for the certificate, and the pin says which one it has to be.
    """
    is_default = url.startswith("http://") and url.endswith(f":{DEFAULT_PORT}")
    host = url[len("http://"):-len(f":{DEFAULT_PORT}")] if is_default else with_port(url)
    if not fingerprint:
        return f"curl -fsSL {url}/connect | python3 - {host}"
    pin = fingerprint.replace("SHA256:", "sha256//", 1)
    return (f"curl -fsS --insecure --pinnedpubkey {pin} {url}/connect "
            f"| python3 - {host} --fingerprint {fingerprint}")


# ==== 5. Formatting ==========================================================
# Pure functions from values to text. A Style says for whom: a person at a terminal sees colour
# and bars, a pipe gets the same words plain.

_COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}


class Style(NamedTuple):
    """How output looks. The default is plain, in UTC, at the beginning of the epoch."""

    color: bool = False
    bars: bool = False
    now_s: float = 0.0
    zone: datetime.tzinfo | None = datetime.timezone.utc
    #: Columns of the terminal; 0 = no limit, as in a pipe.
    width: int = 0

    def paint(self, color: str, text: str) -> str:
        return f"\x1b[{_COLOURS[color]}m{text}\x1b[0m" if self.color and text else text


def style_of(env: Env) -> Style:
    terminal = env.stdout.isatty()
    plain = bool(env.environ.get("NO_COLOR")) or env.environ.get("TERM") == "dumb"
    width = shutil.get_terminal_size().columns if terminal else 0
    return Style(terminal and not plain, terminal, env.clock(), None, width)


#: What turns the server's JSON into text.
Show = Callable[[Any, Style], Any]


class Column(NamedTuple):
    """One column of a table: its head, the field that it shows or what finds it in a row, how that
    is written, and its side, < or >."""

    head: str
    field: Union[str, Callable[[Any], object]]
    write: Show = lambda value, style: value or "-"
    side: str = "<"
    #: Whether it is cut at the end of the terminal's line. Only for the last column.
    is_prose: bool = False

    def text(self, row: Json, style: Style) -> str:
        """Return its text for a row."""
        found = row.get(self.field) if isinstance(self.field, str) else self.field(row)
        return clean(self.write(found, style))


def width_of(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    return sum(0 if unicodedata.combining(char) else
               1 + (unicodedata.east_asian_width(char) in "WF") for char in text)


def table(
    columns: Sequence[Column], rows: Iterable[Json] | None, style: Style, total: Sequence[str] = (),
    empty: str = "",
) -> str:
    """Return rows as aligned lines below their heads; `empty` where there are none. `total` are the
    first cells of a last line."""
    cells = [[column.text(row, style) for column in columns] for row in rows or ()]
    if not cells and empty:
        return empty
    cells.insert(0, [column.head for column in columns])
    if total:
        cells.append([*total, *[""] * (len(columns) - len(total))])
    widths = [max(width_of(line[at]) for line in cells) for at in range(len(columns))]
    lines = []
    for line in cells:
        spaces = [" " * (width - width_of(cell)) for cell, width in zip(line, widths)]
        padded = [space + cell if column.side == ">" else cell + space
                  for cell, column, space in zip(line, columns, spaces)]
        text = ("  " + "  ".join(padded)).rstrip()
        is_cut = columns[-1].is_prose and 0 < style.width < len(text)
        lines.append(text[:style.width - 3] + "..." if is_cut else text)
    return "\n".join([style.paint("bold", lines[0]), *lines[1:]])


def field_list(rows: Iterable[tuple[str, object]]) -> str:
    """Return names and values, one pair in a line; values of None are left out."""
    kept = [(name, clean(value)) for name, value in rows if value is not None]
    width = max((len(name) for name, _ in kept), default=0)
    return "\n".join(f"  {name:<{width}}  {value}".rstrip() for name, value in kept)


def bar(share: float, style: Style, width: int = 20) -> str:
    """Return a share from 0 to 1 as a bar, empty where there are no bars."""
    if not style.bars:
        return ""
    full = round(min(max(share, 0.0), 1.0) * width)
    color = "red" if share >= 0.9 else "yellow" if share >= 0.7 else "green"
    return "[" + style.paint(color, "#" * full) + "." * (width - full) + "]"


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def short_number(value: Json) -> str:
    """Return a count for people: 950, 36K, 1.2M; a dash if it is unknown."""
    if not is_number(value):
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.1f}".removesuffix(".0") + unit
    text = f"{value:g}"
    return text if "e" not in text else f"{value:.9f}".rstrip("0").rstrip(".")


def usd(value: Json) -> str:
    """Return an amount of money for people: $12.30, $0.0047; a dash if it is unknown."""
    if not is_number(value):
        return "-"
    if 0 < value < 0.00005:
        return "<$0.0001"
    return f"${value:,.2f}" if not value or value >= 1 else f"${value:.4f}"


def number(
    head: str, field: Union[str, Callable[[Any], object]],
    write: Callable[[Any], object] = short_number,
) -> Column:
    return Column(head, field, lambda value, style: write(value), ">")


def as_it_is(value: object, style: Style) -> object:
    return value


def counted(count: Json, noun: str) -> str:
    """Return a count with its noun, in the plural where it needs one: "1 error", "2 errors"."""
    return f"{short_number(count)} {noun}{'' if count == 1 else 's'}"


def file_size(size_bytes: float) -> str:
    return f"{short_number(size_bytes)}B" if size_bytes >= 1000 else f"{size_bytes:.0f} bytes"


def duration(ms: Json) -> str:
    """Return milliseconds for people: 420ms, 4.2s, 2m 5s, 3h 12m, 5d 2h."""
    if not is_number(ms) or ms < 59_950:
        return "-" if not is_number(ms) else f"{ms:.0f}ms" if ms < 1000 else (
            f"{ms / 1000:.1f}".removesuffix(".0") + "s")
    whole = round(ms / 1000)
    size, big, small, unit = next(row for row in (
        (86_400, "d", "h", 3600), (3600, "h", "m", 60), (60, "m", "s", 1)) if whole >= row[0])
    return f"{whole // size}{big} {whole % size // unit}{small}"


def span(ms: int) -> str:
    """Return milliseconds as people write a period, exactly: 10m, 90s, 1500ms."""
    return next(f"{ms // size}{unit}" for unit, size in SPAN_UNITS_MS.items()
                if ms and ms % size == 0 or size == 1)


def parse_time(text: object) -> float | None:
    """Return epoch seconds of an ISO time, by default in UTC; None for anything else."""
    if not isinstance(text, str):
        return None
    try:
        moment = datetime.datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text.strip()))
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.timezone.utc)
    return moment.timestamp()


def age(text: object, style: Style) -> str:
    """Return how far an ISO time is from now: "5m ago", "in 2d"; a dash for none."""
    at_s = parse_time(text)
    if at_s is None:
        return "-"
    away_ms = abs(style.now_s - at_s) * 1000
    if away_ms < 5000:
        return "now"
    words = next(f"{int(away_ms // size)}{unit}" for unit, size in SPAN_UNITS_MS.items()
                 if away_ms >= size)
    return f"in {words}" if at_s > style.now_s else f"{words} ago"


def local_time(text: object, style: Style) -> str:
    """Return an ISO time as date and time of day in the user's zone; a dash for none."""
    at_s = parse_time(text)
    if at_s is None:
        return "-"
    return utc_time(at_s).astimezone(style.zone).strftime("%Y-%m-%d %H:%M:%S")


def on_off(value: object) -> str:
    if value is None:
        return "-"
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


# ==== 6. Reading =============================================================
# A command that only reads is made of one pure show_NAME(answer, style), from the server's JSON
# to text, and a cmd_NAME(env, args) that asks.


def answer_text(env: Env, args: argparse.Namespace, found: Union[Answer, Json], show: Show) -> str:
    """Return what is printed of an answer, or of a value found out here. Raises Problem."""
    value = found.value if isinstance(found, Answer) else found
    if not args.json:
        return str(show(value, style_of(env)))
    return found.text.rstrip("\n") if isinstance(found, Answer) else json.dumps(value)


def print_answer(
    env: Env, args: argparse.Namespace, found: Union[Answer, Json], show: Show,
) -> Exit:
    env.say(answer_text(env, args, found, show))
    return Exit.OK


def query(path: str, **wanted: object) -> str:
    """Return a path with a query; what is None is left out."""
    kept = {name: value for name, value in wanted.items() if value is not None}
    return f"{path}?{urllib.parse.urlencode(kept)}"


def read(env: Env, args: argparse.Namespace, path: str, show: Show) -> Exit:
    """Ask the server for `path` and print the answer."""
    return print_answer(env, args, find_server(env).ask("GET", path), show)


def reader(path: str, show: Show) -> Callable[[Env, argparse.Namespace], Exit]:
    """Return the function of a command that only reads `path`."""
    return lambda env, args: read(env, args, path, show)


def _window_line(name: str, window: Json, style: Style) -> str:
    window = window or {}
    share, percent = window.get("utilization"), window.get("percent")
    if share is None and percent is None:
        state = window.get("status")
        return f"  {name:<20} {clean(state) if state else 'not known yet'}"
    drawn = bar(float(share or 0), style)
    used = clean(percent if percent is not None else f"{share:.0%}") + " used"
    line = f"  {name:<20} {used:<10}" + (f" {drawn}" if drawn else "")
    if window.get("resetsIn"):
        line += f"  resets in {clean(window['resetsIn'])}"
        moment = f" ({clean(window['resetsAtHuman'])})" if window.get("resetsAtHuman") else ""
        has_room = not 0 < style.width < len(line) + len(moment)
        line += moment if has_room else ""
    return line.rstrip()


def _extra_usage_words(extra: Json) -> str:
    state, reason = extra.get("state"), extra.get("disabledReason")
    words = {"billed": "answers are billed as extra usage", None: "not known yet"}
    parts = [clean(words.get(state, state))]
    if extra.get("used") is not None:
        limit = extra.get("limit")
        of_limit = f" of {limit:.2f}" if limit is not None else ""
        currency = clean(extra.get("currency") or "")
        parts.append(f"{extra['used']:.2f}{of_limit} {currency}".rstrip() + " used")
    return ", ".join(parts) + (f" ({clean(reason)})" if reason else "")


#: Numbers of the plan that are older than this are shown with their age.
_PLAN_IS_OLD_S = 600.0


def _plan_age(plan: Json, style: Style) -> str:
    """Return how old the newest number of the plan is, empty if it is fresh or there is none."""
    windows = [plan.get("currentSession"), *(plan.get("weeklyLimits") or {}).values()]
    told = max((str((window or {}).get("observedAt") or "") for window in windows), default="")
    is_old = style.now_s - (parse_time(told) or style.now_s) > _PLAN_IS_OLD_S
    return f"  as of {age(told, style)}" if is_old else ""


def show_plan(plan: Json, style: Style) -> str:
    plan = plan if isinstance(plan, dict) else {}
    weekly = plan.get("weeklyLimits") or {}
    windows = {"Current session": plan.get("currentSession"),
               "Weekly (all models)": weekly.get("allModels"),
               **{f"Weekly ({clean(name)})": weekly[name]
                  for name in sorted(set(weekly) - {"allModels"})}}
    lines = [style.paint("bold", "Plan Usage Limits") + _plan_age(plan, style),
             *(_window_line(name, window, style) for name, window in windows.items()),
             f"  {'Extra usage':<20} {_extra_usage_words(plan.get('extraUsage') or {})}"]
    if not any((window or {}).get("observedAt") or (window or {}).get("percent")
               for window in windows.values()):
        lines.append("  (claude reports the limits of a plan with its answers)")
    return "\n".join(lines)


def _counts_line(title: str, row: Json) -> str:
    return (f"{title} | {short_number(row.get('activeRequests'))} active | "
            f"{counted(row.get('errors'), 'error')} | {counted(row.get('timeouts'), 'timeout')}")


TOKEN_COLUMNS = (
    number("Tokens in", lambda row: sum(row.get(f"{name}_tokens") or 0 for name in (
        "input", "cache_read", "cache_write"))),
    Column("Cached", "cache_read_share",
           lambda share, style: "-" if share is None else f"{share:.0%}", ">"),
    number("Tokens out", "output_tokens"),
)
LIST_PRICE = number("List price", "list_price_usd", usd)
#: Within 80 columns.
COUNT_COLUMNS = (number("Requests", "requests"), number("Err", "errors"))
MODEL_COLUMNS = (
    Column("Model", "name"), *COUNT_COLUMNS, TOKEN_COLUMNS[0], TOKEN_COLUMNS[2],
    number("Avg time", "avg_elapsed", duration),
)


def show_usage(answer: Json, style: Style) -> str:
    """Return the plan, what each model did since the start, and one line about the server."""
    models, proxy = answer.get("models") or {}, answer.get("proxy") or {}
    total = short_number(sum(row.get("requests") or 0 for row in models.values()))
    price = sum(row.get("listPriceUsd") or 0 for row in models.values())
    # The fields of a period's usage have their words divided by "_", these by capitals.
    rows = [{"name": name, **{re.sub("([A-Z])", r"_\1", field).lower(): value
                              for field, value in row.items()}} for name, row in models.items()]
    lead = f"Proxy: up {clean(proxy.get('uptime', '?'))} | " + counted(
        proxy.get("totalRequests"), "request")
    return "\n".join([show_plan(answer.get("plan"), style), "",
                      style.paint("bold", "Models since the server started"),
                      table(MODEL_COLUMNS, rows, style, ("Total", total), "  no requests yet"),
                      f"  List price of the API: {usd(price)}", "",
                      _counts_line(lead, proxy)])


USAGE_COLUMNS = (
    COUNT_COLUMNS[0], number("OK", "successes"), COUNT_COLUMNS[1], *TOKEN_COLUMNS, LIST_PRICE,
    number("Searches", "web_search_requests"),
    number("Avg time", "avg_elapsed_ms", duration), Column("Last", "last_request", age, ">"),
)
DAY_COLUMNS = (Column("Day", "day"), *COUNT_COLUMNS, *TOKEN_COLUMNS, LIST_PRICE)


def _show_usage_by(answer: Json, style: Style, part: str, title: str, field: str) -> str:
    columns = (Column(title, field), *USAGE_COLUMNS)
    return (f"Since {local_time(answer.get('since'), style)}\n"
            + table(columns, answer.get(part), style, empty="  nothing"))


show_usage_by_key = functools.partial(_show_usage_by, part="byKey", title="Key", field="key_name")
show_usage_by_model = functools.partial(
    _show_usage_by, part="byModel", title="Model", field="model")


def show_usage_by_tag(answer: Json, style: Style) -> str:
    """Return the usage of each tag, and how to have some."""
    shown = _show_usage_by(answer, style, "byTag", "Tag", "tag")
    return shown if answer.get("byTag") else (
        f"{shown}\nNo request has a tag: `ocp settings tagFrom` says what tags them.")


def show_usage_days(answer: Json, style: Style) -> str:
    """Return what each day, each model and each way to a process used in the period."""
    days = answer.get("daily")
    if not days:
        return _show_usage_by(answer, style, "daily", "Day", "day")
    most = max(day.get("requests") or 0 for day in days) or 1
    marks = Column("", lambda day: "#" * round(8 * (day.get("requests") or 0) / most), as_it_is)
    totals = {"day": "Total", **(answer.get("totals") or {})}
    total = [column.text(totals, style) for column in DAY_COLUMNS]
    parts = [table([*DAY_COLUMNS, *[marks] * style.bars], days, style, total)]
    for title, name, part in (("Model", "model", "byModel"), ("Path", "path", "byPath")):
        if answer.get(part):
            parts.append(table((Column(title, name), *USAGE_COLUMNS), answer[part], style))
    return "\n\n".join(parts)


#: What `usage --by` takes: what shows it, and how many days it goes back by default.
USAGE_BY: dict[str, tuple[Show, int]] = {
    "key": (show_usage_by_key, 1), "model": (show_usage_by_model, 1),
    "tag": (show_usage_by_tag, 1), "day": (show_usage_days, 7)}


def _new_file(path: str) -> TextIO:
    """Return a new file with mode 0600. Raises Problem; a file that is there is not replaced."""
    try:
        return open(path, "x", encoding="utf-8", newline="",
                    opener=lambda name, flags: os.open(name, flags, 0o600))
    except OSError as error:
        what = "is there already: name another one, or remove it" if isinstance(
            error, FileExistsError) else f"cannot be written: {error.strerror}"
        raise failed(f"The file {clean(path)} {what}.") from None


def _pieces(answer: http.client.HTTPResponse) -> Iterator[str]:
    """Yield the text of an answer. Raises HttpProblem if it breaks off."""
    reader = codecs.getreader("utf-8")(answer)
    while True:
        with reading():
            piece = reader.read(65_536)
        if not piece:
            return
        yield piece


def _save_csv(env: Env, args: argparse.Namespace, path: str) -> Exit:
    """Print the CSV that the server answers with, or write it to a new file, piece by piece."""
    if args.json:
        raise Problem(Exit.USAGE, "--csv and --json exclude each other: say one of them.")
    with find_server(env).open("GET", path, None, 60.0) as answer:
        if answer.headers.get_content_type() != "text/csv":
            raise failed("The server is too old for CSV: `ocp update` on its machine helps.")
        with contextlib.ExitStack() as files:
            file = files.enter_context(_new_file(args.output)) if args.output else env.stdout
            try:
                file.writelines(_pieces(answer))
                file.flush()
            except (HttpProblem, OSError) as problem:
                if args.output:
                    os.unlink(args.output)
                elif isinstance(problem, BrokenPipeError):
                    raise
                why = problem.strerror if isinstance(problem, OSError) else clean(problem)
                raise failed(f"The CSV is not complete: {why}.") from None
    if args.output:
        env.say(f"written to {clean(args.output)}")
    return Exit.OK


def cmd_usage(env: Env, args: argparse.Namespace) -> Exit:
    is_csv = args.csv or args.output is not None
    is_by_day = args.days or (args.since and not is_csv)
    by = args.by or ("key" if args.by_key else "day" if is_by_day else "")
    if not by and not is_csv:
        return read(env, args, "/usage", show_usage)
    show, days = USAGE_BY[by or "key"]
    back_s = args.since or 86_400 * (args.days or days)
    since_s = env.clock() - back_s
    if by == "day":
        # Whole days: the first one begins at a midnight.
        first = datetime.timedelta(days=max(1, round(back_s / 86_400)) - 1)
        since_s = time.mktime((datetime.date.fromtimestamp(env.clock()) - first).timetuple())
    if is_csv:
        table = {"day": "daily", "": "rows"}.get(by, by)
        return _save_csv(env, args, query(
            "/api/usage", since=iso_time(since_s), all="true", format="csv", table=table))
    path = query("/api/usage", since=iso_time(since_s), all="true")
    return read(env, args, path, show)


REQUEST_COLUMNS = (
    Column("Request", "request_id"), Column("Key", "key_name"), Column("Tag", "tag"),
    Column("Model", "model"), Column("State", "state"), number("Since", "elapsed_ms", duration),
    number("Tokens out", "output_tokens"),
)


def show_requests(answer: Json, style: Style) -> str:
    rows = answer.get("requests") or []
    columns = [column for column in REQUEST_COLUMNS
               if column.head != "Tag" or any(row.get("tag") for row in rows)]
    return table(columns, rows, style, empty="nothing runs")


cmd_requests = reader("/api/requests", show_requests)


def _requests_to_stop(args: argparse.Namespace, running: Sequence[str]) -> list[str]:
    """Return the ids of the running requests that are meant. Raises Problem."""
    if bool(args.requests) == args.all:
        raise Problem(Exit.USAGE, "Say which request, or --all: `ocp requests` lists them.")
    if args.all:
        return list(running)
    wanted = []
    for word in args.requests:
        found = [each for each in running if word in (each, each.partition("_")[2])] or [
            each for each in running if each.startswith((word, f"req_{word}"))]
        if len(found) != 1:
            raise failed(
                f"{len(found)} running requests begin with {clean(word)}: say more of the id."
                if found else
                f"No running request begins with {clean(word)}: `ocp requests` lists them, and "
                "`ocp errors ID` shows one that failed.")
        wanted += found
    return list(dict.fromkeys(wanted))


def cmd_requests_stop(env: Env, args: argparse.Namespace) -> Exit:
    server = find_server(env)
    rows = server.ask("GET", "/api/requests").value.get("requests") or []
    wanted = _requests_to_stop(args, [str(row.get("request_id")) for row in rows])
    if args.all and wanted:
        ask_first(env, args, f"Stop {counted(len(wanted), 'request')} on {server.url}?")
    stopped = []
    for request_id in wanted:
        path = "/api/requests/" + urllib.parse.quote(request_id, "")
        try:
            server.ask("DELETE", path)
            stopped.append(request_id)
        except Problem as problem:
            # It has ended meanwhile.
            code = ((problem.body or {}).get("error") or {}).get("code")
            if code != "not_found":
                raise
    return print_answer(env, args, {"stopped": stopped}, lambda answer, style: (
        "stopped " + ", ".join(answer["stopped"]) if answer["stopped"] else "nothing runs"))


def _state_word(state: object, style: Style) -> str:
    colours = {"ok": "green", "degraded": "yellow", "draining": "yellow"}
    return style.paint(colours.get(str(state), "red"), clean(state))


def show_status(answer: Json, style: Style) -> str:
    proxy, requests = answer.get("proxy") or {}, answer.get("requests") or {}
    counts = {**requests, "activeRequests": requests.get("active")}
    login = proxy.get("auth") or "not known yet"
    lines = [
        f"OCP {clean(proxy.get('version', '?'))}{' (demo)' if proxy.get('demo') else ''}: "
        f"{_state_word(proxy.get('status'), style)}, "
        f"up {clean(proxy.get('uptime', '?'))}, "
        + ("login not known yet" if login == "not known yet" else clean(login)),
        *([f"To do: {clean(proxy['fix'])}"] if proxy.get("fix") else []),
        _counts_line(f"Requests: {short_number(requests.get('total'))}", counts),
        "", show_plan(answer.get("plan"), style),
    ]
    errors = answer.get("recentErrors") or []
    if errors:
        lines += ["", style.paint("bold", "Recent Errors")]
    # The newest first, as in `ocp errors`.
    for error in reversed(errors):
        about = [local_time(error.get("time"), style), error.get("key"), error.get("kind"),
                 error.get("message")]
        # A failure without a message of its own repeats its kind.
        words = dict.fromkeys(str(each) for each in about if each)
        lines.append("  " + clean("  ".join(words)))
    if errors:
        lines.append("  More: `ocp errors`")
    return "\n".join(lines)


_WATCH_EVERY_S = 2.0


def cmd_status(env: Env, args: argparse.Namespace) -> Exit:
    clear_screen = "\x1b[H\x1b[2J" if env.stdout.isatty() else ""
    while args.watch:
        try:
            answer = find_server(env).ask("GET", "/status")
            shown = answer_text(env, args, answer, show_status)
        except Problem as problem:
            # People watch a restart, too.
            if problem.code is not Exit.UNREACHABLE:
                raise
            shown = str(problem)
        env.say(clear_screen + shown + ("" if clear_screen or args.json else "\n"))
        env.sleep(_WATCH_EVERY_S)
    return read(env, args, "/status", show_status)


def show_health(answer: Json, style: Style) -> str:
    auth, stats = answer.get("auth") or {}, answer.get("stats") or {}
    login = {True: "logged in", False: "not logged in", None: "not known yet"}
    load, extra_usage = answer.get("concurrency") or {}, answer.get("extraUsage")
    capture = answer.get("capture")
    spares = [f"{model} {count}" for model, count in (answer.get("spares") or {}).items()]
    rows = [
        ("version", answer.get("version")),
        ("demo", "no model is asked" if answer.get("demo") else None),
        ("instance", answer.get("instanceName") or None), ("up", answer.get("uptimeHuman")),
        ("access mode", answer.get("authMode")), ("login", login.get(auth.get("ok"), "?")),
        ("claude", answer.get("claudeVersion") or "not usable"),
        ("requests", f"{short_number(stats.get('totalRequests'))}, "
                     f"{short_number(stats.get('errors'))} failed"),
        ("running", f"{short_number(load.get('inflight'))} of "
                    f"{short_number(load.get('maxConcurrent'))}, "
                    f"{short_number(load.get('queued'))} waiting"),
        ("spare processes", ", ".join(spares) or "none"), ("parked", answer.get("parked")),
        ("extra usage", extra_usage if extra_usage != "none" else None),
        ("capture", capture and (
            f"writes the next {counted(capture.get('remaining'), 'request')} to files, until "
            f"{local_time(capture.get('endsAt'), style)}")),
        ("what to do", answer.get("fix")),
    ]
    return f"OCP is {_state_word(answer.get('status'), style)}\n" + field_list(rows)


def cmd_health(env: Env, args: argparse.Namespace) -> Exit:
    """Show the state of the server. FAILED when it is not well, for scripts."""
    answer = find_server(env).health()
    is_ok = answer.value.get("status") == "ok"
    print_answer(env, args, answer, show_health)
    return Exit.OK if is_ok else Exit.FAILED


MODEL_LIST_COLUMNS = (
    Column("Model", "id"), number("Window", "context_window"),
    number("Max output", "max_output_tokens"),
    Column("Reasoning", lambda row: {True: "yes", False: "no"}.get(row.get("reasoning"))),
    Column("Aliases", lambda row: ", ".join(map(str, row.get("aliases") or [])), as_it_is),
)


def show_models(answer: Json, style: Style) -> str:
    """Return the models, newest first, with the default one marked."""
    rows = [{**row, "id": f"{row.get('id')}{' *' if row.get('default') else ''}"}
            for row in answer.get("data") or []]
    is_marked = any(row.get("default") for row in rows)
    return table(MODEL_LIST_COLUMNS, rows, style) + (
        "\n\n  * for requests that name no model" if is_marked else "")


cmd_models = reader("/v1/models", show_models)


#: Units of settings that are times.
TIME_UNITS_MS = {**SPAN_UNITS_MS, "days": 86_400_000}


def _setting_value(value: object, row: Json) -> str:
    """Return a value of a setting as people write it: 10m, on, 8."""
    unit = row.get("unit") or ""
    if unit in TIME_UNITS_MS and isinstance(value, int):
        return span(value * TIME_UNITS_MS[unit]) if value else "0"
    if unit == "bytes" and isinstance(value, int) and value and value % 2**20 == 0:
        return f"{value // 2**20} MiB"
    return f"{on_off(value)} {unit}".rstrip()


def is_changed(row: Json) -> bool:
    return row.get("source") not in (None, "default", "follows memory")


def _range(row: Json) -> str | None:
    ends, unit = [row.get("min"), row.get("max")], row.get("unit") or ""
    is_time = unit in TIME_UNITS_MS
    words = ["" if end is None else _setting_value(end, row if is_time else {}) for end in ends]
    if not any(words):
        return None
    return "..".join(words) + ("" if is_time else f" {unit}".rstrip())


SETTING_COLUMNS = (
    Column("Setting", "name"),
    Column("Value", lambda row: _setting_value(row.get("value"), row), side=">"),
    Column("From", lambda row: row.get("source") if is_changed(row) else "", as_it_is),
    Column("What it is", lambda row: row.get("desc") or "", as_it_is, is_prose=True),
)


def show_settings(answer: Json, style: Style) -> str:
    rows = [{**row, "name": name} for name, row in answer.items()]
    if not rows:
        return "every setting is at its default"
    return table(SETTING_COLUMNS, rows, style) + (
        "\n\n  ocp settings SETTING shows one in full" if style.width else "")


def show_setting(name: str, row: Json, style: Style) -> str:
    return style.paint("bold", clean(name)) + "\n" + field_list([
        ("value", _setting_value(row.get("value"), row)), ("from", row.get("source")),
        ("default", _setting_value(row.get("default"), row)),
        ("range", _range(row)), ("environment", row.get("env")), ("what it is", row.get("desc")),
    ])


def parse_value(name: str, row: Json, text: str) -> object:
    """Return what the user wrote as the type that the setting has. Raises Problem."""
    kind, unit, lowered = row.get("type"), row.get("unit") or "", text.lower()
    if kind == "boolean":
        if lowered in ("1", "true", "yes", "on", "0", "false", "no", "off"):
            return lowered in ("1", "true", "yes", "on")
        raise Problem(Exit.USAGE, f"{name} takes on or off, not {clean(text)!r}.")
    if kind == "number" and re.fullmatch(r"[+-]?[0-9]{1,18}(\.[0-9]{1,9})?", text):
        return float(text) if "." in text else int(text)
    if unit in TIME_UNITS_MS:
        with contextlib.suppress(ValueError):
            ms, unit_ms = span_ms(text), TIME_UNITS_MS[unit]
            return ms // unit_ms if ms % unit_ms == 0 else ms / unit_ms
    if kind == "number":
        wanted = "a number" + (f" of {unit}" if unit else "")
        wanted += ", or a time such as 90s or 1h" if unit in TIME_UNITS_MS else ""
        raise Problem(Exit.USAGE, f"{name} takes {wanted}, not {clean(text)!r}.")
    return text


def start_settings(env: Env) -> dict[str, str]:
    """Return the variables of all settings by their names in the server beside this script."""
    pattern = r'^    (\w+): \w+ = setting\([^()]*?"([A-Z]+_[A-Z0-9_]+)"'
    return dict(re.findall(pattern, text_of(env.beside("ocp_server.py")), re.M))


def _find_setting(env: Env, settings: Json, name: str) -> tuple[str, Json]:
    """Return the name and the row of a setting, in any case, also by its variable. Raises
    Problem."""
    plain = name.replace("_", "").lower()
    for known, row in settings.items():
        if name == row.get("env") or plain == known.lower():
            return known, row
    at_start = start_settings(env)
    for field, variable in at_start.items():
        if name == variable or plain == field.replace("_", ""):
            file = local_server(env).env_file or os.path.join(env.ocp_home, "ocp.env")
            raise Problem(
                Exit.USAGE, f"{clean(name)} is read at the start of the server only. Set "
                f"{variable} in {file}, and restart with `ocp restart`.")
    hint = did_you_mean(name, settings) or did_you_mean(name, at_start) or (
        " `ocp settings` lists them.")
    raise Problem(Exit.USAGE, f"There is no setting {clean(name)!r}.{hint}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a sentence that names the word that was begun, else the most similar one; empty if
    there is none."""
    lowered = {name.lower(): name for name in known}
    begun = [each for each in lowered if len(word) > 1 and each.startswith(word.lower())]
    near = begun or difflib.get_close_matches(word.lower(), lowered, 1, 0.6)
    return f" Did you mean {lowered[near[0]]}?" if near else ""


def _change_setting(server: Server, name: str, value: object) -> Answer:
    try:
        answer = server.ask("PATCH", "/settings", {name: value})
    except Problem as problem:
        # The refusal of a value is an answer like the others.
        if not isinstance(problem.body, dict) or "results" not in problem.body:
            raise
        answer = Answer(server.url, json.dumps(problem.body))
    result = (answer.value.get("results") or {}).get(name) or {}
    if not result.get("ok"):
        raise failed(f"{name} was not changed: {clean(result.get('error'))}")
    return answer


def cmd_settings(env: Env, args: argparse.Namespace) -> Exit:
    if args.reset and args.key:
        raise Problem(Exit.USAGE, "--reset takes the only name: ocp settings --reset SETTING")
    if args.changed and (args.key or args.reset):
        raise Problem(Exit.USAGE, "--changed lists settings, and takes no name.")
    server = find_server(env)
    answer = server.ask("GET", "/settings")
    if args.changed:
        kept = {name: row for name, row in answer.value.items() if is_changed(row)}
        return print_answer(env, args, kept, show_settings)
    if not args.key and not args.reset:
        return print_answer(env, args, answer, show_settings)
    name, row = _find_setting(env, answer.value, args.reset or args.key)
    if not args.reset and args.value is None:
        return print_answer(env, args, {name: row}, lambda value, style: (
            show_setting(name, row, style)))
    answer = _change_setting(
        server, name, None if args.reset else parse_value(name, row, args.value))

    def show(value: Json, style: Style) -> str:
        changed = (value["results"])[name].get("value")
        current = (value.get("current") or {}).get(name) or {"value": changed}
        source = f" (from {clean(current['source'])})" if args.reset and "source" in current else ""
        return f"{name} = {clean(_setting_value(current.get('value'), row))}{source}"

    return print_answer(env, args, answer, show)


def show_log_entry(entry: Json, style: Style) -> str:
    if "raw" in entry:
        return clean(entry["raw"])
    level = str(entry.get("level", ""))
    rest = [f"{key}={value}" for key, value in entry.items() if key not in ("ts", "level", "event")]
    colour = {"debug": "dim", "warn": "yellow", "error": "red"}.get(level)
    word = f"{clean(level).upper():5}"
    word = style.paint(colour, word) if colour else word
    event = clean(" ".join([str(entry.get("event", "")), *rest]))
    return f"{local_time(entry.get('ts'), style)} {word} {event}"


def show_logs(answer: Json, style: Style) -> str:
    entries = answer.get("entries") or []
    return "\n".join(show_log_entry(entry, style) for entry in entries) or "no such events"


def new_entries(seen: Sequence[Json], entries: Sequence[Json]) -> Sequence[Json]:
    """Return the entries after those that were seen: the server sends again what it still has."""
    known = 0
    for entry in seen:
        known += entry in entries[known:known + 1]
    return entries[known:]


#: As many events as the server keeps.
_MOST_EVENTS = 1000


def _log_arguments(args: argparse.Namespace) -> tuple[int, str]:
    """Return the number of events and the level, by options or words in any order. Raises Problem.
    A period without a number has all of its events."""
    count, level = _MOST_EVENTS if args.since else 20, args.level or "all"
    for word in [*args.words, *([args.lines] if args.lines else [])]:
        lowered = "warn" if word.lower() == "warning" else word.lower()
        if re.fullmatch(r"[0-9]{1,4}", word) and 0 < int(word) <= _MOST_EVENTS:
            count = int(word)
        elif lowered in LOG_WORDS and word != args.lines:
            level = lowered
        else:
            raise Problem(
                Exit.USAGE, "logs takes a number from 1 to 1000 and one of "
                f"{', '.join(LOG_WORDS)}; not {clean(word)!r}.")
    return count, level


_FOLLOW_EVERY_S = 1.0


def _events_since(entries: Iterable[Json], since_s: float) -> list[Json]:
    return [entry for entry in entries if (parse_time(entry.get("ts")) or since_s) >= since_s]


def _logs_path(args: argparse.Namespace, count: int, level: str) -> str:
    return query("/logs", n=count, level=level, key=args.key, request=args.request)


def _follow_logs(env: Env, args: argparse.Namespace, count: int, level: str) -> NoReturn:
    """Print events as they come, for ever, also across a restart of the server."""
    server, seen, was_there = find_server(env), None, True
    since_s = env.clock() - args.since if args.since else 0.0
    while True:
        try:
            answer = server.ask("GET", _logs_path(args, _MOST_EVENTS, level)).value
            entries = _events_since(answer.get("entries") or [], since_s)
            for entry in entries[-count:] if seen is None else new_entries(seen, entries):
                shown = json.dumps(entry) if args.json else show_log_entry(entry, style_of(env))
                env.say(shown)
            seen, was_there = entries, True
        except Problem as problem:
            if problem.code is not Exit.UNREACHABLE or seen is None:
                raise
            if was_there:
                env.note(f"{server.url} does not answer; waiting for it")
            was_there = False
        env.sleep(_FOLLOW_EVERY_S)


def log_path(env: Env) -> str:
    """Return the log of this machine's own server."""
    return os.path.join(local_server(env).data_dir, "logs", "ocp.log")


def cmd_logs(env: Env, args: argparse.Namespace) -> Exit:
    count, level = _log_arguments(args)
    if args.follow:
        _follow_logs(env, args, count, level)
    server = find_server(env)
    try:
        answer = server.ask("GET", _logs_path(args, count, level))
    except Problem as problem:
        path = log_path(env)
        if problem.code != Exit.UNREACHABLE or not is_loopback(server.url) or (
                not os.path.exists(path)):
            raise
        raise Problem(problem.code, f"{problem}\nWhat it wrote before is in {path}") from None
    if args.since:
        value = answer.value
        kept = _events_since(value.get("entries") or [], env.clock() - args.since)
        return print_answer(env, args, {**value, "count": len(kept), "entries": kept}, show_logs)
    return print_answer(env, args, answer, show_logs)


ERROR_COLUMNS = (
    Column("When", "lastAt", age), Column("Who", lambda row: row.get("key") or row.get("preview")),
    Column("From", "peer"), Column("Kind", "kind"),
    Column("Times", lambda row: row.get("count") or 1, side=">"), Column("Request", "id"),
)


def _all_errors(answer: Json) -> list[Json]:
    rows = [{**row, "lastAt": row.get("at")} for row in answer.get("errors") or []]
    rows += answer.get("refusals") or []
    return sorted(rows, key=lambda row: str(row.get("lastAt")), reverse=True)


def show_errors(answer: Json, style: Style, limit: int | None = None) -> str:
    """Return the newest failures and refusals, `limit` of them, and what to do about each kind."""
    rows = _all_errors(answer)[:limit]
    if not rows:
        return "no failed requests"
    lines = [table(ERROR_COLUMNS, rows, style), "", style.paint("bold", "What to do")]
    for kind in answer.get("byKind") or []:
        lines += [
            f"  {clean(kind.get('kind'))} ({clean(kind.get('count'))}, the last one "
            f"{age(kind.get('lastAt'), style)})",
            f"    {clean(kind.get('message') or '')}", f"    {clean(kind.get('action') or '')}",
        ]
    return "\n".join(line for line in lines if line.strip() or not line)


def show_error(row: Json, style: Style) -> str:
    count = row.get("count")
    return field_list((
        ("request", row.get("id")),
        ("when", f"{local_time(row.get('lastAt'), style)} ({age(row.get('lastAt'), style)})"),
        ("times", f"{count}, since {local_time(row.get('at'), style)}" if count else None),
        ("key", row.get("key")), ("key shown", row.get("preview")),
        ("from", row.get("peer")), ("program", row.get("userAgent")),
        *((name, row.get(name)) for name in ("path", "model", "status", "kind")),
        ("took", duration(row["totalMs"]) if row.get("totalMs") is not None else None),
        ("message", row.get("message") or None), ("what to do", row.get("action") or None),
        # Of many refusals only the first ones have a line each.
        ("its log", f"ocp logs --request {row.get('id')}" if not count else None),
    ))


def cmd_errors(env: Env, args: argparse.Namespace) -> Exit:
    request = args.about if re.fullmatch(r"req_\w+", args.about or "") else None
    answer = find_server(env).ask("GET", query(
        "/api/errors", limit=args.count, since=args.since, request=request,
        key=None if request else args.about))
    if request is None or args.json:
        return print_answer(env, args, answer, lambda value, style: (
            show_errors(value, style, args.count)))
    rows = _all_errors(answer.value)
    if not rows:
        raise failed(f"No failure of {request} is known: it succeeded, or it was refused before "
                     f"the server's last start.\nMore: `ocp logs 1000 --request {request}`")
    env.say("\n\n".join(show_error(row, style_of(env)) for row in rows))
    return Exit.OK


def _alert_state(row: Json) -> str:
    attempts = row.get("attempts") or 0
    return f"{row.get('state')}" + (f", sent {attempts} times" if attempts > 1 else "")


ALERT_COLUMNS = (
    Column("When", "at", age), Column("State", _alert_state),
    Column("Alert", lambda row: ": ".join(filter(None, (row.get("title"), row.get("problem")))),
           is_prose=True),
)


def show_alerts(answer: Json, style: Style) -> str:
    webhook = answer.get("webhook")
    head = f"  to {clean(webhook)}, format {clean(answer.get('format'))}" if webhook else (
        "  no alerts are sent: `ocp settings alertUrl ADDRESS` names a webhook")
    rows = answer.get("alerts")
    return f"{head}\n\n{table(ALERT_COLUMNS, rows, style, empty='  none so far')}"


cmd_alerts = reader("/api/alerts", show_alerts)


def cmd_alerts_test(env: Env, args: argparse.Namespace) -> Exit:
    """Send a test. FAILED when the webhook did not take it."""
    answer = find_server(env).ask("POST", "/api/alerts/test", timeout_s=60.0)
    words = "the webhook took it" if answer.value.get("delivered") else (
        f"not delivered: {clean(answer.value.get('problem'))}")
    print_answer(env, args, answer, lambda value, style: words)
    return Exit.OK if answer.value.get("delivered") else Exit.FAILED


SESSION_COLUMNS = (
    Column("Session", "id"), Column("Caller", "caller"), Column("Model", "model"),
    number("Messages", "messages"), Column("Last used", "lastUsed", age),
)


def show_sessions(answer: Json, style: Style) -> str:
    return table(SESSION_COLUMNS, answer.get("sessions"), style, empty="no sessions")


cmd_sessions = reader("/sessions", show_sessions)


def ask_first(env: Env, args: argparse.Namespace, question: str) -> None:
    """Ask before something is lost for good. Raises Problem for any answer but yes. The question is
    no part of the result, which may go into a file or a variable."""
    if not args.yes and not env.stdin.isatty():
        raise Problem(Exit.USAGE, "There is no terminal to ask on: say --yes.")
    confirm(question, args.yes, env.stdin, env.stderr)


def cleared(noun: str) -> Show:
    """Return what shows how many were forgotten."""
    return lambda answer, style: f"cleared {counted(answer.get('cleared'), noun)}"


def cmd_sessions_clear(env: Env, args: argparse.Namespace) -> Exit:
    server = find_server(env)
    if not args.session:
        ask_first(env, args, f"Forget all sessions of {server.url}?")
    path = "/sessions" + ("/" + urllib.parse.quote(args.session, "") if args.session else "")
    return print_answer(env, args, server.ask("DELETE", path), cleared("session"))


cmd_clear = cmd_sessions_clear


def show_cache(answer: Json, style: Style) -> str:
    ttl_ms, hits, misses = (answer.get(name) or 0 for name in ("ttl", "hits", "misses"))
    asked = hits + misses
    return field_list([
        ("kept for", span(ttl_ms) if ttl_ms else "off: `ocp settings cacheTTL 1h` switches it on"),
        ("answers", short_number(answer.get("entries"))),
        ("size", f"{file_size(answer.get('sizeBytes') or 0)} of "
                 f"{file_size(answer.get('maxBytes') or 0)}"),
        ("hits", f"{short_number(hits)} of {short_number(asked)}"
                 + (f" ({hits / asked:.0%})" if asked else "")),
        ("shared", f"{short_number(answer.get('shared'))} with the same request at the same time"),
    ])


cmd_cache = reader("/cache/stats", show_cache)


def cmd_cache_clear(env: Env, args: argparse.Namespace) -> Exit:
    return print_answer(env, args, find_server(env).ask("DELETE", "/cache"), cleared("answer"))


#: How long claude may take to start, or to exchange a code.
_LOGIN_TIMEOUT_S = 90.0
#: How often a code is asked for that is obviously incomplete.
_CODE_TRIES = 3
_LOGIN_WAITS = (
    "The login waits: `ocp login` goes on with it, and `ocp login --cancel` ends it.")


def show_login(answer: Json, style: Style) -> str:
    account = answer.get("account") or {}
    who = ", ".join(clean(account[name]) for name in ("email", "organization") if account.get(name))
    plan = account.get("subscriptionType")
    return f"logged in: {who or 'claude does not say who'}" + (f" ({clean(plan)})" if plan else "")


def _login_code(env: Env) -> str:
    """Return the code that the user types, or that comes through a pipe. Raises Problem."""
    env.stderr.write("Code: ")
    env.stderr.flush()
    try:
        line = env.stdin.readline()
    except UnicodeDecodeError:
        line = "?"
    except KeyboardInterrupt:
        env.note("")
        raise Problem(Exit.INTERRUPTED, _LOGIN_WAITS) from None
    if not line:
        env.note("")
        raise Problem(Exit.USAGE, f"No code came. {_LOGIN_WAITS}")
    return line.strip()


def _finish_login(env: Env, server: Server) -> Answer:
    """Send the code, and ask for it again while the login still waits. Raises Problem."""
    for left in reversed(range(_CODE_TRIES)):
        try:
            return server.ask(
                "POST", "/api/login/code", {"code": _login_code(env)}, _LOGIN_TIMEOUT_S)
        except Problem as problem:
            waits = server.ask("GET", "/api/login").value.get("state") == "waiting"
            if waits and not (left and env.stdin.isatty()):
                raise Problem(problem.code, f"{problem}\n{_LOGIN_WAITS}", problem.body) from None
            if not waits:
                raise
            env.note(str(problem))
    raise AssertionError("the last try returns or raises")


def cmd_login(env: Env, args: argparse.Namespace) -> Exit:
    """Log claude in. The address and the question are no part of the result."""
    server = find_server(env)
    if args.cancel:
        return print_answer(env, args, server.ask("DELETE", "/api/login"), lambda answer, style: (
            "The login has been ended." if answer.get("cancelled") else "No login was waiting."))
    login = server.ask("GET", "/api/login").value
    if login.get("state") != "waiting":
        login = server.ask("POST", "/api/login", timeout_s=_LOGIN_TIMEOUT_S).value
    env.note("Open this address in a browser, on any device, and log in there:\n\n"
             f"{clean(login.get('url'))}\n\nThen paste the code that the page shows, CODE#STATE, "
             "whole. The login expires at "
             f" {local_time(login.get('expiresAt'), style_of(env))}.")
    return print_answer(env, args, _finish_login(env, server), show_login)


_CAPTURE_MINUTES = 10
CAPTURE_COLUMNS = (
    Column("Started", "startedAt", local_time), number("Files", "files"),
    number("Size", "bytes", file_size), Column("Folder on the server", "folder"),
)


def show_capture(answer: Json, style: Style) -> str:
    words = "No capture runs."
    if answer.get("active"):
        of_key = f" of {clean(answer['key'])}" if answer.get("key") else ""
        words = (f"The next {counted(answer.get('remaining'), 'request')}{of_key} will be written "
                 f"to files, until {local_time(answer.get('endsAt'), style)}.\n"
                 "They hold what was asked and answered. `ocp capture --stop` ends it.")
    kept = answer.get("captures")
    return words + ("\n\n" + table(CAPTURE_COLUMNS, kept, style) if kept else "")


def cmd_capture(env: Env, args: argparse.Namespace) -> Exit:
    server, path = find_server(env), "/api/capture"
    if args.stop:
        return print_answer(env, args, server.ask("DELETE", path), show_capture)
    if args.count is None and (args.key or args.minutes is not None) and not args.list:
        raise Problem(Exit.USAGE, "Say how many requests, such as `ocp capture 5 --minutes 10`.")
    if args.count is None or args.list:
        return read(env, args, path, show_capture)
    minutes = _CAPTURE_MINUTES if args.minutes is None else args.minutes
    body = {"requests": args.count, "minutes": minutes, "key": args.key}
    return print_answer(env, args, server.ask("POST", path, body), show_capture)


# ==== 7. Keys ================================================================
# The keys of an operator's devices. A new secret is printed first and alone, so that no other
# trouble can lose it.


def _key_state(key: Json) -> str:
    return "revoked" if key.get("revoked") else "expired" if key.get("expired") else "active"


def _quota_rows(key: Json) -> list[Json]:
    """Return the quotas of a key, then those of single models, each with its `option`."""
    of_models = (key.get("modelQuotaUse") or {}).items()
    return [
        {**row, "option": f"{model} {option}".strip()}
        for model, quotas in (("", key.get("quota") or {}), *of_models)
        for option, name in QUOTAS for row in (quotas.get(name) or {},) if row or not model
    ]


def _quota_words(key: Json) -> str:
    return ", ".join(
        f"{row['option']} {short_number(row.get('used') or 0)}/{short_number(row['limit'])}"
        f"{'!' * bool(row.get('soft'))}"
        for row in _quota_rows(key) if row.get("limit") is not None) or "-"


KEY_COLUMNS = (
    Column("Id", "id", side=">"), Column("Name", "name"), Column("Key", "keyPreview"),
    Column("State", _key_state), Column("Last used", "lastUsed", age),
    Column("Expires", "expiry", lambda time, style: age(time, style) if time else "never"),
    Column("Quotas", _quota_words),
)


def _share_used(row: Json, *names: str) -> object:
    """Return how much of a window of the plan of a login is used, None if that is not known."""
    found: Any = row.get("plan") or {}
    for name in names:
        found = found.get(name) or {}
    return found.get("percent")


#: The logins that keys have of their own.
LOGIN_COLUMNS = (
    Column("Own login of", lambda row: ", ".join(map(str, row.get("keys") or []))),
    Column("By", "kind"), Column("State", "state"),
    Column("Session", lambda row: _share_used(row, "currentSession"), side=">"),
    Column("Week", lambda row: _share_used(row, "weeklyLimits", "allModels"), side=">"),
    number("Requests today", lambda row: (row.get("used") or {}).get("daily") or 0),
    number("Tokens today", lambda row: (row.get("used") or {}).get("tokensDaily") or 0),
)


def show_all_keys(answer: Json, style: Style) -> str:
    keys, logins = answer.get("keys"), answer.get("logins")
    shown = table(KEY_COLUMNS, keys, style, empty="no keys yet: ocp keys add NAME")
    return shown + ("\n\n" + table(LOGIN_COLUMNS, logins, style) if logins else "")


def show_keys(answer: Json, style: Style) -> str:
    """Return the keys that are not revoked, newest first, and how many others there are."""
    keys = answer.get("keys") or []
    kept = [key for key in keys if not key.get("revoked")]
    hidden = len(keys) - len(kept)
    more = f"\n\n  {hidden} revoked: ocp keys list --all" if hidden else ""
    return show_all_keys({**answer, "keys": kept}, style) + more


def show_key(answer: Json, style: Style) -> str:
    limit, old = answer.get("maxConcurrent") or 0, answer.get("oldSecret")
    return style.paint("bold", clean(answer.get("name"))) + "\n" + field_list([
        ("id", answer.get("id")), ("key", answer.get("keyPreview")), ("state", _key_state(answer)),
        ("old key", old and f"{old.get('keyPreview')}, works until "
         f"{local_time(old.get('until'), style)}"),
        ("created", local_time(answer.get("createdAt") or answer.get("created_at"), style)),
        ("last used", age(answer.get("lastUsed"), style)),
        ("expires", local_time(answer["expiry"], style) if answer.get("expiry") else "never"),
        ("models", ", ".join(map(str, answer.get("models") or [])) or "all"),
        ("at the same time", limit or "no limit of its own"),
        ("effort", answer.get("effort") or None),
        ("web search", "on" if answer.get("webSearch") else None),
        ("note", answer.get("note") or None),
        ("warned from", answer.get("softPercent") and f"{answer['softPercent']}% of a quota on"),
        ("claude login", _own_login_words(answer.get("login"))),
    ])


def _own_login_words(login: Json | None) -> str | None:
    """Return a key's own login in words, None for that of the server."""
    return login and f"its own, by {login.get('folder') or 'token'}: {login.get('state')}"


QUOTA_COLUMNS = (
    Column("Quota", "option"), number("Used", lambda row: row.get("used") or 0),
    Column("Limit", "limit", lambda limit, _: "none" if limit is None else short_number(limit),
           ">"),
    Column("Resets in", "resetsIn", side=">"),
)


def show_key_and_quota(answer: Json, style: Style) -> str:
    return f"{show_key(answer, style)}\n\n{show_quota(answer, style)}"


def show_quota(answer: Json, style: Style) -> str:
    rows = _quota_rows(answer)
    # Colour would be counted as width by the table.
    plain = style._replace(color=False)
    bars = Column("", lambda row: "" if row.get("limit") is None else bar(
        (row.get("used") or 0) / row["limit"] if row["limit"] else 1.0, plain), as_it_is)
    head, *lines = table([*QUOTA_COLUMNS, *[bars] * style.bars], rows, style).split("\n")
    # The amber of a warning is for the whole line.
    return "\n".join([head, *(
        style.paint("yellow", line) if row.get("soft") else line for line, row in zip(lines, rows)
    )])


def _key_path(name: str) -> str:
    return "/api/keys/" + urllib.parse.quote(name, "")


def _key_fields(args: argparse.Namespace) -> dict[str, object]:
    """Return the fields of a key that the user named."""
    return {field: read(text) for field, text, read in (
        ("expiry", args.expiry, lambda text: None if text == "never" else text),
        ("models", args.models, lambda text: [
            name.strip() for name in text.split(",") if name.strip()]),
        ("maxConcurrent", args.max_concurrent, int),
        ("effort", args.effort, lambda text: None if text == "none" else text),
        ("webSearch", args.web_search, lambda text: text == "on"), ("note", args.note, str),
        ("softPercent", args.soft_percent, _percent),
    ) if text is not None}


def _percent(text: str) -> int | None:
    if text != "none" and not re.fullmatch("0*([1-9][0-9]?|100)", text):
        message = f"--soft-percent takes a number from 1 to 100 or none, not {clean(text)!r}."
        raise Problem(Exit.USAGE, message)
    return None if text == "none" else int(text)


def _quota_fields(args: argparse.Namespace) -> dict[str, float | None]:
    """Return the quotas that the user named; None removes one. Raises Problem."""
    found: dict[str, float | None] = {}
    for option, name in QUOTAS:
        text = getattr(args, option.replace("-", "_"))
        if text is None:
            continue
        pattern, read, what = (
            (r"[0-9]{1,7}(\.[0-9]{1,6})?", float, "an amount such as 2.50 (6 decimals at most)")
            if option.startswith("usd") else (r"[0-9]{1,15}", int, "a whole number"))
        if text != "none" and not re.fullmatch(pattern, text):
            raise Problem(Exit.USAGE, f"--{option} takes {what} or none, not {clean(text)!r}.")
        found[name] = None if text == "none" else read(text)
    return found


def _quota_model(args: argparse.Namespace) -> str:
    """Return the model that the quotas are for; empty = all. Raises Problem."""
    if args.model is None:
        return ""
    model: str = args.model.strip().lower()
    if not model or not _quota_fields(args):
        raise Problem(Exit.USAGE, "--model needs a model and a quota, such as "
                      "--model opus --usd-daily 1.50.")
    return model


def cmd_keys(env: Env, args: argparse.Namespace) -> Exit:
    return read(env, args, "/api/keys", show_all_keys if args.all else show_keys)


cmd_keys_list = cmd_keys


def key_advice(answer: Answer, secret: str) -> Iterator[str]:
    url, note = clean(answer.value.get("connectUrl") or ""), answer.value.get("connectNote")
    if note:
        yield f"ATTENTION: {clean(note)}"
    if url:
        pin = pin_of(url)
        tool = "a tool that trusts the certificate" if pin else "one tool"
        yield (f"On its device run\n  {connect_line(url, pin)}\nwhich asks for it; or, for "
               f"{tool}:")
    else:
        yield "For one tool on this machine:"
    yield f"  export OPENAI_API_KEY={clean(secret)} OPENAI_BASE_URL={url or answer.url}/v1"
    if url:
        yield f"For its holder, what is used and what is left:\n  {url}/me"


def _print_secret(env: Env, args: argparse.Namespace, answer: Answer) -> Exit:
    try:
        secret, name = answer.value["key"], answer.value["name"]
    except (Problem, KeyError):
        if not is_ocp_server(answer.url):
            raise not_ocp(answer.url) from None
        # Better shown raw than lost: nobody can ask for it again.
        env.say(answer.text)
        raise failed("The server's answer, above, is not as expected.") from None
    if args.json:
        env.say(answer.text.rstrip("\n"))
        return Exit.OK
    env.say(clean(secret))
    if answer.value.get("warning"):
        env.note(f"ATTENTION: {clean(answer.value['warning'])}")
    env.note(f"This is the key {clean(name)!r}. It is shown only now.")
    for line in key_advice(answer, secret):
        env.note(line)
    return Exit.OK


def cmd_keys_add(env: Env, args: argparse.Namespace) -> Exit:
    body = {"name": args.name, **_key_fields(args)}
    quotas, model = _quota_fields(args), _quota_model(args)
    if quotas:
        body.update({"modelQuotas": {model: quotas}} if model else {"quota": quotas})
    return _print_secret(env, args, find_server(env).ask("POST", "/api/keys", body))


def cmd_keys_rotate(env: Env, args: argparse.Namespace) -> Exit:
    path, server = _key_path(args.key), find_server(env)
    if args.grace == "none":
        return print_answer(env, args, server.ask("DELETE", path + "/grace"), lambda value, style: (
            f"The old secret of {clean(value.get('name'))!r} stopped working." if value.get("ended")
            else f"{clean(value.get('name'))!r} has no old secret that works."))
    if not args.grace:
        ask_first(
            env, args, f"Give {clean(args.key)} a new secret? The old one stops working at once.")
    body = {"grace": args.grace} if args.grace else None
    answer = server.ask("POST", path + "/rotate", body)
    code = _print_secret(env, args, answer)
    old = answer.value.get("oldSecret")
    if old and not args.json:
        env.note(f"The old secret {clean(old.get('keyPreview'))} works until "
                 f"{local_time(old.get('until'), style_of(env))}.")
    return code


def cmd_keys_show(env: Env, args: argparse.Namespace) -> Exit:
    return read(env, args, _key_path(args.key), show_key_and_quota)


def cmd_keys_quota(env: Env, args: argparse.Namespace) -> Exit:
    path, quotas, model = _key_path(args.key) + "/quota", _quota_fields(args), _quota_model(args)
    if model:
        server = find_server(env)
        limits = server.ask("GET", _key_path(args.key)).value.get("modelQuotas") or {}
        limits[model] = {name: limit for name, limit in {
            **(limits.get(model) or {}), **quotas}.items() if limit is not None}
        server.ask("PATCH", _key_path(args.key), {"modelQuotas": limits})
    elif quotas:
        find_server(env).ask("PATCH", path, quotas)
    return read(env, args, path, show_quota)


def _edit_key(env: Env, args: argparse.Namespace, changes: Mapping[str, object]) -> Exit:
    answer = find_server(env).ask("PATCH", _key_path(args.key), changes)
    return print_answer(env, args, answer, show_key)


def cmd_keys_rename(env: Env, args: argparse.Namespace) -> Exit:
    return _edit_key(env, args, {"name": args.name})


def cmd_keys_edit(env: Env, args: argparse.Namespace) -> Exit:
    changes = _key_fields(args)
    if not changes:
        raise Problem(Exit.USAGE, "Nothing to change: see `ocp keys edit --help`.")
    return _edit_key(env, args, changes)


def _token(env: Env) -> str:
    """Return the token that comes through a pipe, or that the user types unseen. It is no argument,
    because all users of a machine see these. Raises Problem."""
    typed = env.stdin.isatty()
    token = getpass.getpass("Token: ", env.stderr) if typed else env.stdin.read(_MAX_TOKEN_CHARS)
    if not token.strip():
        raise Problem(Exit.USAGE, "No token came. `claude setup-token` prints one, on any machine "
                      "with a browser; then: ocp keys login NAME < FILE")
    return token


#: More than any token has.
_MAX_TOKEN_CHARS = 10_000


def cmd_keys_login(env: Env, args: argparse.Namespace) -> Exit:
    path = _key_path(args.key) + "/login"
    if args.server and args.folder:
        raise Problem(Exit.USAGE, "Either --folder or --server.")
    if args.server:
        answer = find_server(env).ask("DELETE", path)
    else:
        body = {"folder": args.folder} if args.folder else {"token": _token(env)}
        answer = find_server(env).ask("PUT", path, body)
    return print_answer(env, args, answer, show_key)


def cmd_keys_revoke(env: Env, args: argparse.Namespace) -> Exit:
    """End a key. FAILED when there was none to end."""
    server = find_server(env)
    ask_first(env, args, f"Revoke {clean(args.key)}? Its device is refused at once, for good.")
    answer = server.ask("DELETE", _key_path(args.key))
    if not answer.value.get("revoked"):
        hint = did_you_mean(args.key, _server_names(env, "KEY"))
        raise failed(f"No active key has the name or id {clean(args.key)!r}.{hint}")
    return print_answer(env, args, answer, lambda value, style: f"revoked {clean(args.key)}")


# ==== 8. Clients =============================================================
# One question from here, and what other devices and OpenClaw need to know.

_ANSWER_TIMEOUT_S = 660.0


def sse_data(lines: Iterable[bytes]) -> Iterator[str]:
    data: list[str] = []
    for line in lines:
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if text.startswith("data:"):
            data.append(text[5:].removeprefix(" "))
        elif not text and data:
            yield "\n".join(data)
            data = []


class StreamEnd(NamedTuple):
    """How a streamed answer ended."""

    model: str = ""
    finish_reason: str = ""
    first_token_s: float | None = None
    answer_tokens: int | None = None


def print_stream(env: Env, events: Iterable[str], started_s: float, hint: str = "") -> StreamEnd:
    """Print the text of a streamed answer as it comes, and end its line. Raises Problem for an
    error in it, with `hint` behind its message. `started_s` is when it was asked for."""
    end, terminal = StreamEnd(), env.stdout.isatty()
    try:
        for data in events:
            if data == "[DONE]":
                break
            chunk = json.loads(data)
            if "error" in chunk:
                message = clean(chunk["error"].get("message"))
                raise failed(f"The answer failed: {message}{hint}")
            tokens = (chunk.get("usage") or {}).get("completion_tokens")
            end = end._replace(
                model=chunk.get("model") or end.model, answer_tokens=tokens or end.answer_tokens)
            for choice in chunk.get("choices") or []:
                end = end._replace(finish_reason=choice.get("finish_reason") or end.finish_reason)
                text = (choice.get("delta") or {}).get("content") or ""
                if text and end.first_token_s is None:
                    end = end._replace(first_token_s=env.clock() - started_s)
                # A model may be made to write what would command a terminal.
                shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "?", text) if terminal else text
                env.stdout.write(shown)
                env.stdout.flush()
    finally:
        # Also before the message of an error.
        env.stdout.write("\n" if end != StreamEnd() else "")
        env.stdout.flush()
    return end


def _stream_lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield the lines of a response. Raises HttpProblem if it breaks off."""
    while True:
        with reading():
            line = response.readline()
        if not line:
            return
        yield line


def _question(env: Env, args: argparse.Namespace) -> str:
    """Return what the user wants to ask: what came through a pipe, and the words. Raises Problem.
    The word - alone reads standard input, on a terminal too."""
    is_dash = args.words == ["-"]
    try:
        piped = env.stdin.read() if is_dash or not env.stdin.isatty() else ""
    except UnicodeDecodeError as error:
        raise Problem(
            Exit.USAGE, f"Standard input is not text in {error.encoding}: see LANG.") from None
    words = "" if is_dash else " ".join(args.words)
    question = "\n\n".join(part for part in (piped, words) if part.strip())
    if not question:
        raise Problem(Exit.USAGE, "Ask something: ocp ask why is the sky blue")
    return question


def _answer_note(server: Server, end: StreamEnd) -> str:
    health: Json = {}
    with contextlib.suppress(Problem):
        health = health_of(server.url) or {}
    who = "the demo, no model was asked" if health.get("demo") else clean(end.model)
    tokens = f", {counted(end.answer_tokens, 'token')}" if end.answer_tokens else ""
    return f"({who}; first token after {end.first_token_s or 0:.2f} s{tokens})"


def cmd_ask(env: Env, args: argparse.Namespace) -> Exit:
    server, path = find_server(env), "/v1/chat/completions"
    system = [{"role": "system", "content": args.system}] if args.system else []
    body = {"messages": [*system, {"role": "user", "content": _question(env, args)}],
            **({"model": args.model} if args.model else {})}
    if args.json:
        answer = server.ask("POST", path, body, _ANSWER_TIMEOUT_S)
        if "choices" not in answer.value:
            raise not_ocp(server.url)
        env.say(answer.text.rstrip("\n"))
        return Exit.OK
    body.update(stream=True, stream_options={"include_usage": True})
    started_s = env.clock()
    try:
        with contextlib.ExitStack() as stack:
            with progress(env, f"waiting for {server.url}"):
                response = stack.enter_context(server.open("POST", path, body, _ANSWER_TIMEOUT_S))
            hint = errors_hint(response.headers.get("X-Request-Id", ""))
            end = print_stream(env, sse_data(_stream_lines(response)), started_s, hint)
    except ValueError:
        raise failed(f"{server.url}{path} sent something that is no answer.") from None
    if end == StreamEnd() and not is_ocp_server(server.url):
        raise not_ocp(server.url)
    if not end.finish_reason:
        raise failed("The answer broke off before its end.")
    if end.finish_reason != "stop":
        env.note(f"(the answer ended early: {clean(end.finish_reason)})")
    if env.stderr.isatty() and end.first_token_s is not None:
        env.note(_answer_note(server, end))
    return Exit.OK


def show_dashboard(answer: Json, style: Style) -> str:
    return field_list([
        ("dashboard", answer["url"]), ("on a device", answer.get("deviceUrl")),
        ("key", answer["key"]),
    ])


def _dashboard_key(env: Env, url: str, mode: object) -> str:
    if mode == "none":
        port = port_of(url)
        return "none needed on this machine" if is_loopback(url) else (
            f"only from the server's machine: ssh -L {port}:127.0.0.1:{port} HOST")
    if not is_loopback(url):
        return "the admin key of that server"
    if env.environ.get("OCP_ADMIN_KEY", "").strip():
        return "the admin key: what OCP_ADMIN_KEY has"
    return "the admin key: " + (
        f"OCP_ADMIN_KEY in {clean(local_server(env).env_file)}" if service_admin_key(env)
        else f"cat {shlex.quote(admin_key_path(env))}")


def cmd_dashboard(env: Env, args: argparse.Namespace) -> Exit:
    server = find_server(env)
    health = server.health().value
    mode, device = health.get("authMode"), device_url(env, server.url)
    found = {"url": f"{server.url}/dashboard", "key": _dashboard_key(env, server.url, mode)}
    if device != server.url and mode != "none":
        found["deviceUrl"] = f"{device}/dashboard"
    print_answer(env, args, found, show_dashboard)
    if args.open and not env.browse(found["url"]):
        raise failed("No browser was found here: open the address yourself.")
    return Exit.OK


#: The installer's options for a server that other devices may use, each with a key of its own.
_FOR_OTHERS = ("--bind", "0.0.0.0", "--auth-mode", "multi")


def show_lan(answer: Json, style: Style) -> str:
    rows = [
        ("API", f"{answer['url']}/v1"), ("dashboard", f"{answer['url']}/dashboard"),
        ("access mode", answer.get("authMode")),
        ("reachable", "yes" if answer["reachable"] else "no"),
    ]
    if not answer["reachable"]:
        rows += [("to change that", answer["install"]),
                 ("without a service", "set CLAUDE_BIND=0.0.0.0 and CLAUDE_AUTH_MODE=multi in "
                  "~/.ocp/ocp.env, and start the server again")]
    elif answer.get("authMode") == "none":
        rows += [("attention", "whoever can connect may use your plan"),
                 ("to change that", answer["install"])]
    else:
        rows.append(("on a device", connect_line(answer["url"], answer.get("fingerprint") or "")))
    for fault in answer.get("certificateFaults") or []:
        rows.append(("certificate", f"{fault}: run `ocp tls`"))
    return field_list(rows)


#: A certificate of our own is renewed when no more than this is left of its life. Authorities
#: renew theirs by themselves, but later.
RENEW_DAYS, AUTHORITY_RENEW_DAYS = 60, 7


def faults_of(certificate: Certificate, host: str, now_s: float) -> list[str]:
    """Return what keeps clients from taking this certificate from a host, or soon will."""
    days = (certificate.expires_s - now_s) / 86_400
    soon_days = RENEW_DAYS if certificate.is_self_signed else AUTHORITY_RENEW_DAYS
    return [text for is_so, text in (
        (days <= 0, "it has expired"),
        (0 < days <= soon_days, f"it expires in {days:.0f} days"),
        (not certificate.covers(host), f"it is not for {host}"),
        (certificate.is_authority,
         "it says CA:TRUE, and Codex and others take no such certificate from a server"),
    ) if is_so]


def is_fatal(fault: str) -> bool:
    """Return whether clients refuse a certificate with this fault today."""
    return not fault.startswith("it expires in")


def certificate_faults(env: Env, url: str) -> list[str]:
    """Return what is wrong with the certificate at an address for others; nothing for http."""
    if not url.startswith("https://"):
        return []
    found = served_certificate(url)
    host = urllib.parse.urlsplit(url).hostname or ""
    return faults_of(found, host, env.clock()) if found else ["it cannot be read"]


def cmd_lan(env: Env, args: argparse.Namespace) -> Exit:
    """Show the address for other devices. FAILED when they cannot reach it."""
    server = find_server(env)
    health = server.health().value
    url = lan_url(env, server.url)
    if not url:
        raise failed("This machine has no address in a network.")
    is_reachable = is_ocp_server(url)
    found = {
        "host": urllib.parse.urlsplit(url).hostname, "url": url,
        "authMode": health.get("authMode"), "reachable": is_reachable,
        "fingerprint": pin_of(url),
        "certificateFaults": certificate_faults(env, url) if is_reachable else [],
        "install": shlex.join(["python3", env.beside("setup.py_install.py"), *_FOR_OTHERS]),
    }
    print_answer(env, args, found, show_lan)
    is_good = found["reachable"] and not any(map(is_fatal, found["certificateFaults"]))
    return Exit.OK if is_good else Exit.FAILED


def script_command(env: Env, name: str, *words: str) -> list[str]:
    """Return the command that runs another script. Raises Problem if it is not there."""
    script = env.beside(name)
    if not os.path.exists(script):
        raise failed(f"{script} is not there. Copy {name} from the server's checkout of OCP beside "
                     f"this ocp.py, or run it alone: python3 {name}")
    return [sys.executable, script, *words]


def connect_command(env: Env, *words: str) -> list[str]:
    """Return the command that runs ocp_connect.py. Raises Problem if it is not there."""
    return script_command(env, "ocp_connect.py", *words)


def connect_options(env: Env) -> list[str]:
    """Return the long options of ocp_connect.py, none if it is not there."""
    pattern = r'\b(?:flag|add|add_argument)\("(--[a-z-]+)"'
    return re.findall(pattern, text_of(env.beside("ocp_connect.py")))


def _run_attached(env: Env, command: Sequence[str]) -> Exit:
    """Run a command that talks to the user itself; return its exit code. Raises Problem."""
    done = env.run(command, environ=env.environ, attached=True)
    if done.code is None:
        raise failed(done.complaint)
    return Exit(done.code) if done.code in set(Exit) else Exit.FAILED


def cmd_connect(env: Env, args: argparse.Namespace) -> Exit:
    return _run_attached(env, connect_command(env, *args.rest))


def cmd_channels(env: Env, args: argparse.Namespace) -> Exit:
    """Become ocp_channels.py, which joins chat platforms to the server.

    It may run for long, and ends in good order only if signals reach it alone.
    """
    command = script_command(env, "ocp_channels.py", *(args.rest or ["--help"]))
    env.stdout.flush()
    os.execve(command[0], command, dict(env.environ))


def cmd_tenants(env: Env, args: argparse.Namespace) -> Exit:
    return _run_attached(env, script_command(env, "ocp_tenants.py", *args.rest))


def tenants_commands(env: Env) -> list[str]:
    """Return the commands of ocp_tenants.py, none if it is not there."""
    found = re.findall(r'\n    Command\("([a-z-]+)[" ]', text_of(env.beside("ocp_tenants.py")))
    return list(dict.fromkeys(found))


def cmd_sync(env: Env, args: argparse.Namespace) -> Exit:
    more = ["--dry-run"] * args.dry_run + ["--json"] * args.json
    return _run_attached(env, connect_command(env, "--sync", with_port(server_url(env)), *more))


_OPENCLAW_FIELDS = {"openclaw", "providers", "diff", "written", "failures"}


def sync_openclaw(env: Env, url: str, *more: str) -> Json:
    """Update OpenClaw's list of models, or with --dry-run only compare it. Raises Problem. Returns
    {openclaw: whether it is installed here, providers, diff, written, failures}."""
    command = connect_command(env, "--sync", with_port(url), "--json", *more)
    with progress(env, "waiting for ocp_connect.py"):
        done = env.run(command, environ=env.environ, timeout_s=180.0)
    with contextlib.suppress(ValueError):
        found = json.loads(done.output)
        if isinstance(found, dict) and found.keys() >= _OPENCLAW_FIELDS:
            return found
    raise failed(done.complaint)


# ==== 9. Service =============================================================
# install.json has the commands that start and stop the service. Success is measured: the server
# that answers afterwards must be younger than the restart. A server that was not installed is
# left alone; the user is told the command.


def service_of(env: Env) -> Record | None:
    """Return the installation if it has a service. Raises Problem."""
    record = installation(env)
    if record is None or not record.label:
        return None
    if not record.commands:
        raise failed(f"{record_path(env)} does not say how the service is started. Run "
                     "setup.py_install.py again.")
    return record


def service_here(env: Env, verb: str) -> Record | None:
    """Return the service, None if the server has none. Raises Problem for another machine."""
    record, url = service_of(env), server_url(env)
    if not is_loopback(url) and (record is None or url != record.url):
        raise failed(f"{url} is another machine: run `ocp {verb}` there.")
    return record


def service_environ(env: Env) -> dict[str, str]:
    """Return the environment of the server, as far as the installer and ocp.env tell it."""
    record = None
    with contextlib.suppress(Problem):
        record = installation(env)
    if record is None:
        return dict(env.environ)
    ours = ("CLAUDE_", "OCP_", "PROXY_")
    inherited = {name: text for name, text in env.environ.items() if not name.startswith(ours)}
    known = {"CLAUDE_PROXY_PORT": str(record.port), "CLAUDE_BIND": record.bind,
             "OCP_HOME": record.data_dir}
    return {**inherited, **{name: text for name, text in known.items() if text},
            **settings_of(text_of(record.env_file))}


#: How long the server may take to end after it has drained.
_END_S = 10.0


def drain_of(env: Env) -> float:
    """Return how many seconds the server lets running answers finish when it is stopped."""
    return drain_s(service_environ(env).get("OCP_DRAIN", ""))


def service_lines(env: Env, record: Record, verb: str) -> list[str]:
    """Return the commands that start, stop, restart or enable the service, for a shell."""
    sudo = "sudo " if record.needs_root and env.user_id != 0 else ""
    return [sudo + step.line for step in record.commands.get(verb, [])]


def run_service(env: Env, record: Record, verb: str) -> str:
    """Start, stop or restart the service. Returns the complaint of what failed, or "". Raises
    Problem if this user may not do that."""
    if record.needs_root and env.user_id != 0:
        line = service_lines(env, record, verb)[0]
        raise Problem(Exit.DENIED, f"The service belongs to the system. Run: {line}")
    timeout_s = 70 + drain_of(env)
    for step in record.commands.get(verb, []):
        for attempt in range(step.tries):
            # launchd refuses for a while after it has stopped a service.
            env.sleep(float(attempt))
            done = env.command(*step.command, timeout_s=timeout_s, more=with_user_bus(env.environ))
            if done.code == 0:
                break
        if done.code != 0 and not step.may_fail:
            return f"{step.line}: {done.complaint}"
    return ""


class Owner(NamedTuple):
    """The process that listens on a port. No pid: only another user may see it."""

    pid: int | None
    command: str

    @property
    def is_ocp(self) -> bool:
        return bool(re.search(r"(^|[/\s])ocp_server\.py(\s|$)", self.command))

    @property
    def words(self) -> str:
        """Return how a message calls it."""
        if self.pid is None:
            return "a process of another user"
        # The server starts itself again as `python3 -c PROGRAM .../ocp_server.py`.
        command = re.sub(r" -c .*(?= /\S*ocp_server\.py)", "", self.command, flags=re.S)
        return f"process {self.pid} ({clean(command)[:80] or 'name unknown'})"


def _listening_sockets(port: int) -> set[str]:
    """Return the sockets that listen on a port, as links in /proc name them."""
    found = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            with open(f"/proc/net/{name}", encoding="ascii") as file:
                for words in (line.split() for line in list(file)[1:]):
                    # 0A is the state of a socket that listens.
                    if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port:
                        found.add(f"socket:[{words[9]}]")
    return found


def _owner_in_proc(port: int) -> Owner | None:
    sockets = _listening_sockets(port)
    if not sockets:
        return None
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    if os.readlink(f"/proc/{pid}/fd/{name}") in sockets:
                        with open(f"/proc/{pid}/cmdline", "rb") as file:
                            command = file.read().rstrip(b"\0").replace(b"\0", b" ")
                        return Owner(int(pid), command.decode("utf-8", "replace"))
    return Owner(None, "")


def _owner_by_lsof(env: Env, port: int) -> Owner | None:
    """Find the owner of a port as macOS tells it. Raises OSError."""
    # It is where a service's PATH does not lead.
    path = env.environ.get("PATH", os.defpath) + ":/usr/sbin"
    words = ("lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fp")
    done = env.command(*words, more={"PATH": path})
    # lsof ends with 1 for "nobody" and for "not allowed"; only the first says nothing.
    if done.code == 1 and not done.output.strip() and not done.error.strip():
        return None
    found = re.search(r"^p(\d+)$", done.output, re.M)
    if not found:
        raise OSError(f"lsof: {done.complaint}")
    shown = env.command("ps", "-o", "command=", "-p", found[1])
    return Owner(int(found[1]), shown.output.strip() if shown.code == 0 else "")


def port_owner(env: Env, port: int) -> Owner | None:
    """Return who listens on a TCP port of this machine, None for nobody. Raises OSError if that
    cannot be found out, which is not the same as nobody."""
    return _owner_in_proc(port) if env.platform.startswith("linux") else _owner_by_lsof(env, port)


def _systemd_unit(pid: int) -> tuple[str, str] | None:
    """Return the systemd unit of a process: ("--user " or "", name)."""
    path = text_of(f"/proc/{pid}/cgroup").strip().rpartition(":")[2]
    name = path.rpartition("/")[2]
    is_unit = re.fullmatch(r"[A-Za-z0-9_.@:][A-Za-z0-9_.@:-]*\.service", name)
    return ("--user " if "/user@" in path else "", name) if is_unit else None


def command_by_hand(env: Env) -> str:
    """Return the line that starts the server in a shell, as the installer prints it. The server
    itself reads the settings in its folder."""
    here = local_server(env)
    line = shlex.join([here.python, here.server_path])
    is_usual = here.data_dir == os.path.join(env.home, ".ocp")
    return line if is_usual else f"OCP_HOME={shlex.quote(here.data_dir)} {line}"


def _without_service(env: Env, verb: str) -> Exit:
    url = server_url(env)
    port = port_of(url)
    try:
        owner = port_owner(env, port)
    except OSError as error:
        raise failed(f"No service is installed, and the owner of port {port} is unknown: "
                     f"{error}.") from None
    if owner is None and verb == "stop":
        env.say(f"Nothing listens on port {port}.")
        return Exit.OK
    if owner is None:
        install = [sys.executable, env.beside("setup.py_install.py")]
        raise failed(f"No service is installed. Run the server by hand: {command_by_hand(env)}\nor "
                     f"make it a service: {shlex.join(install)}")
    if not owner.is_ocp:
        kind = "is not an OCP server" if owner.command else "cannot be identified"
        raise failed(f"Port {port} belongs to {owner.words}, which {kind} and is left alone.\nGive "
                     "OCP another port with CLAUDE_PROXY_PORT.")
    if verb == "start":
        env.say(f"Already running: {owner.words} owns port {port}.")
        return Exit.OK
    again = f", and then {command_by_hand(env)}" if verb == "restart" else ""
    user, unit = (_systemd_unit(owner.pid) if owner.pid else None) or ("", "")
    line = f"systemctl {user}{verb} {unit}" if unit else f"kill {owner.pid}{again}"
    raise failed(f"No service is installed; {owner.words} serves port {port} and was started in "
                 f"another way.\nTo {verb} it: {line}")


def version_of(server_path: str) -> str:
    """Return the version of an ocp_server.py on disk, empty if unknown."""
    found = re.search(r'^VERSION = "([^"]+)"', text_of(server_path), re.M)
    return found[1] if found else ""


def version_tuple(text: object) -> tuple[int, ...]:
    """Return a version as numbers, for comparing; empty if it is none."""
    found = re.fullmatch(r"v?(\d{1,6})\.(\d{1,6})\.(\d{1,6})", str(text).strip())
    return tuple(int(part) for part in found.groups()) if found else ()


_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.2


def wait_for_server(env: Env, url: str, version: str, since_s: float | None) -> str:
    """Wait until a server of this version answers that is not older than `since_s`. Returns "", or
    what is wrong at the end."""
    deadline_s = env.clock() + _START_TIMEOUT_S
    with progress(env, f"waiting for the server at {url}"):
        while True:
            wrong, may_change = _what_is_wrong(env, url, version, since_s)
            if not wrong or not may_change or env.clock() >= deadline_s:
                return wrong
            env.sleep(_POLL_S)


def _what_is_wrong(env: Env, url: str, version: str, since_s: float | None) -> tuple[str, bool]:
    """Return what is wrong with a server at this moment, and whether that may still change."""
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


def restart_and_ask(env: Env, record: Record, version: str) -> str:
    """Restart the service and wait for this version. Returns "", or what is wrong."""
    since_s = env.clock()
    complaint = run_service(env, record, "restart")
    wrong = wait_for_server(env, record.url, version, since_s)
    return f"{wrong} {complaint}".rstrip() if wrong else ""


def _owner_sentence(env: Env, url: str) -> str:
    """Return one more sentence about the port, where it helps."""
    try:
        owner = port_owner(env, port_of(url))
    except OSError:
        return ""
    return f" The port belongs to {owner.words}." if owner else " Nobody listens on its port."


def _start(env: Env, verb: str) -> Exit:
    record = service_here(env, verb)
    if record is None:
        return _without_service(env, verb)
    since_s = env.clock() if verb == "restart" else None
    complaint = run_service(env, record, verb)
    wrong = wait_for_server(env, record.url, version_of(record.server_path), since_s)
    if wrong:
        raise failed("The server did not come up as it should: "
                     f"{complaint or wrong}.{_owner_sentence(env, record.url)}\nSee `ocp doctor`.")
    if complaint:
        env.note(f"The server answers, although this failed: {complaint}")
    health = health_of(record.url) or {}
    env.say(f"OCP {clean(health.get('version', '?'))} answers at {record.url}")
    return Exit.OK


def cmd_start(env: Env, args: argparse.Namespace) -> Exit:
    return _start(env, "start")


def cmd_stop(env: Env, args: argparse.Namespace) -> Exit:
    record = service_here(env, "stop")
    if record is None:
        return _without_service(env, "stop")
    complaint = run_service(env, record, "stop")
    deadline_s = env.clock() + _STOP_TIMEOUT_S
    with progress(env, "waiting for the server to end"):
        while health_of(record.url) is not None:
            if complaint or env.clock() >= deadline_s:
                raise failed(f"A server still answers at {record.url}."
                             f"{_owner_sentence(env, record.url)} {complaint}".rstrip())
            env.sleep(_POLL_S)
    env.say("stopped")
    return Exit.OK


def cmd_restart(env: Env, args: argparse.Namespace) -> Exit:
    if args.what != "gateway":
        return _start(env, "restart")
    done = env.command("openclaw", "gateway", "restart", timeout_s=120)
    if done.code is None:
        raise failed(f"{done.complaint}. Is OpenClaw installed, and on PATH?")
    if done.output.strip():
        env.say("\n".join(clean(line) for line in done.output.strip().splitlines()))
    if done.code != 0:
        raise failed(f"openclaw gateway restart: {done.complaint}")
    return Exit.OK


# ==== 10. Https ==============================================================
# The server's own certificate: made by the program openssl, whole or not at all, and named in the
# settings of the service. Its key stays when it is renewed, so a device that knows the key's
# fingerprint knows the next certificate too.

#: Programs of Apple take no certificate that is valid for more than 825 days.
_VALID_DAYS = 820
_HOST_NAME = re.compile(r"(?:\*\.)?[a-z0-9_](?:[a-z0-9_.-]{0,251}[a-z0-9_])?")
_TLS_SETTINGS = ("OCP_TLS_CERT", "OCP_TLS_KEY")
# Without keyUsage: a client that is built with BoringSSL, such as OpenCode, trusts no certificate
# whose key may not sign certificates, and that of a server must not say that it may.
_OPENSSL_SETTINGS = """\
[req]
distinguished_name = subject
prompt = no
x509_extensions = extensions
[subject]
CN = {title}
[extensions]
basicConstraints = critical,CA:FALSE
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
subjectAltName = @names
[names]
"""


class TlsFiles(NamedTuple):
    """Where `ocp tls` keeps the certificate and its private key."""

    cert: str
    key: str


def tls_files(env: Env) -> TlsFiles:
    """Return the paths of the certificate and the key, which may not be there."""
    folder = os.path.join(local_server(env).data_dir, "tls")
    return TlsFiles(os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem"))


def named_certificate(env: Env) -> str:
    """Return what OCP_TLS_CERT is for the server, empty if it names nothing."""
    return service_environ(env).get("OCP_TLS_CERT", "")


def read_certificate(path: str) -> Certificate | None:
    """Return the first certificate in a PEM file, None if there is none. Raises Problem."""
    try:
        with open(path, encoding="ascii") as file:
            text = file.read(1_000_000)
        end = "-----END CERTIFICATE-----"
        start = text.index("-----BEGIN CERTIFICATE-----")
        pem = text[start:text.index(end, start) + len(end)]
        return certificate_of(ssl.PEM_cert_to_DER_cert(pem))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise failed(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise failed(f"{path} is not a certificate: move it away.") from None


def is_pair(files: TlsFiles) -> bool:
    """Return whether a server can use these files: the certificate is for the key."""
    try:
        # Without a function for the password, it would be asked for on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*files, password=lambda: "")
    except (OSError, ValueError):
        return False
    return True


def interface_addresses(env: Env) -> list[str]:
    """Return the IPv4 addresses of this machine, without those that reach nobody else."""
    path = env.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    found = list(env.addresses())
    for words in (("ip", "-o", "-4", "addr"), ("ifconfig", "-a")):
        done = env.command(*words, more={"PATH": path})
        if done.code == 0:
            found += re.findall(r"\binet (?:addr:)?(\d+\.\d+\.\d+\.\d+)", done.output)
            break
    usable = [each for each in found if not (
        ipaddress.ip_address(each).is_loopback or ipaddress.ip_address(each).is_link_local)]
    return list(dict.fromkeys(usable))


def machine_names(env: Env) -> list[str]:
    host = plain_host(socket.gethostname())
    first = host.partition(".")[0]
    names = ["localhost", "127.0.0.1", "::1", host, f"{first}.local", *interface_addresses(env)]
    return list(dict.fromkeys(name for name in names if is_server_name(name)))


def is_server_name(text: str) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(text)
        return True
    return bool(_HOST_NAME.fullmatch(text)) and ".." not in text


def _openssl(env: Env, *words: str) -> None:
    done = env.command("openssl", *words, timeout_s=60)
    if done.code is None:
        raise failed(f"A certificate is made by the program openssl: {done.complaint}. Install it "
                     "(for example `sudo apt-get install openssl`), and run this again.")
    if done.code != 0:
        raise failed(f"openssl {words[0]} failed: {done.complaint}.")


def _drafted(env: Env, folder: str, key: str, names: Sequence[str]) -> bytes:
    """Return a certificate for this key file, made with the help of a folder. Raises Problem."""
    settings, draft = os.path.join(folder, "settings"), os.path.join(folder, "cert.pem")
    title = "OCP on " + re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:50]
    addresses = [each for each in names if ":" in each or each.rpartition(".")[2].isdigit()]
    lines = [f"{'IP' if name in addresses else 'DNS'}.{number} = {name}\n"
             for number, name in enumerate(names, 1)]
    with open(settings, "w", encoding="ascii") as file:
        file.write(_OPENSSL_SETTINGS.format(title=title) + "".join(lines))
    _openssl(env, "req", "-x509", "-new", "-sha256", "-key", key, "-days", str(_VALID_DAYS),
             "-config", settings, "-out", draft)
    made = read_certificate(draft) if is_pair(TlsFiles(draft, key)) else None
    if made is None or made.is_authority or set(made.names) != set(names):
        version = env.command("openssl", "version").output.strip() or "this openssl"
        raise failed(f"{clean(version)} did not make the certificate that was asked for: it is too "
                     "old. Install OpenSSL 1.1 or LibreSSL 3.3, or a later one.")
    with open(draft, "rb") as file:
        return file.read()


def make_certificate(env: Env, files: TlsFiles, names: Sequence[str]) -> None:
    """Write a certificate for these names, with the key that is there or a new one. Raises Problem,
    OSError."""
    folder = os.path.dirname(files.cert)
    os.makedirs(os.path.dirname(folder), 0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(folder), prefix=".ocp-tls-") as drafts:
        key = files.key
        is_new = not os.path.exists(key)
        if is_new:
            key = os.path.join(drafts, "key.pem")
            _openssl(env, "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key)
        cert = _drafted(env, drafts, key, names)
        if not os.path.isdir(folder):
            os.mkdir(folder, 0o700)
            if env.user_id == 0:
                owner = os.stat(os.path.dirname(folder))
                os.chown(folder, owner.st_uid, owner.st_gid)
        if is_new:
            with open(key, "rb") as file:
                write_whole(files.key, file.read())
        write_whole(files.cert, cert, 0o644)


def renew_certificate(env: Env, files: TlsFiles, more: Sequence[str]) -> tuple[Certificate, bool]:
    """Return the certificate, and whether it was made anew. Raises Problem, OSError.

    It is made where there is none, where a name of this machine or of `more` is missing, and
    before it expires. Names of the one that is there are kept.
    """
    there, names = read_certificate(files.cert), machine_names(env)
    for text in more:
        if not is_server_name(plain_host(text)):
            raise Problem(Exit.USAGE, f"--name: {clean(text)!r} is not a host name or address.")
        names.append(plain_host(text))
    if there is not None and is_pair(files):
        is_fresh = (there.expires_s - env.clock()) / 86_400 > RENEW_DAYS
        if is_fresh and not there.is_authority and set(names) <= set(there.names):
            return there, False
        names += there.names
    make_certificate(env, files, list(dict.fromkeys(names)))
    made = read_certificate(files.cert)
    assert made is not None
    return made, True


def edited_settings(text: str, values: Mapping[str, str], gone: Iterable[str]) -> str:
    """Return the text of ocp.env with these settings, and without those that are `gone`. All other
    lines stay as they are."""
    names = {*values, *gone}
    found = ((line, _ASSIGNMENT.fullmatch(line)) for line in text.split("\n"))
    lines = [line for line, match in found if not match or match[1] not in names]
    while lines and not lines[-1].strip():
        lines.pop()
    plain = re.compile(r"[A-Za-z0-9_@%+=:,./-]*")
    for name, value in values.items():
        escaped = re.sub(r'(["\\$`])', r"\\\1", value)
        lines.append(f"{name}={value}" if plain.fullmatch(value) else f'{name}="{escaped}"')
    return "\n".join(lines) + "\n"


def _write_settings(env: Env, record: Record, values: Mapping[str, str]) -> str:
    """Set OCP_TLS_CERT and OCP_TLS_KEY for the service, or take them back with no values. Let
    install.json say whether the server speaks https.

    Returns the copy of the settings file as it was, empty if nothing had to change. Raises OSError.
    """
    with open(record.env_file, encoding="utf-8", errors="surrogateescape", newline="") as file:
        text = file.read()
    present = {name: value for name, value in settings_of(text).items() if name in _TLS_SETTINGS}
    copy = ""
    if present != values:
        copy = record.env_file + utc_time(env.clock()).strftime(".ocp-%Y%m%d-%H%M%S")
        write_whole(copy, text.encode("utf-8", "surrogateescape"))
        changed = edited_settings(text, values, _TLS_SETTINGS)
        write_whole(record.env_file, changed.encode("utf-8", "surrogateescape"))
    url = f"{'https' if values else 'http'}://{record.url.partition('://')[2]}"
    found = read_record(record_path(env))
    if found is not None and url != record.url:
        write_whole(record_path(env), json.dumps({**found, "url": url}, indent=2).encode() + b"\n")
    return copy


def _service_settings(env: Env) -> Record | None:
    """Return the installation if it has a settings file that this user may change. Raises Problem
    if somebody else owns it."""
    record = installation(env)
    if record is None or not record.env_file:
        return None
    if record.needs_root and env.user_id != 0:
        raise Problem(Exit.DENIED, "The service belongs to the system. Run: sudo ocp tls")
    return record if os.path.exists(record.env_file) else None


def _secure_url(env: Env) -> str:
    """Return the server's address once it speaks https. Raises Problem."""
    return "https://" + with_port(server_url(env)).partition("://")[2]


def _tls_report(env: Env, certificate: Certificate, files: TlsFiles, **more: Json) -> Json:
    here = _secure_url(env)
    url, served = lan_url(env, here) or here, served_certificate(here)
    return {
        "certificate": files.cert, "key": files.key, "names": list(certificate.names),
        "fingerprint": certificate.fingerprint, "expires": iso_time(certificate.expires_s),
        "url": url, "served": bool(served and served == certificate),
        "faults": faults_of(certificate, urllib.parse.urlsplit(url).hostname or "", env.clock()),
        **more,
    }


def _next_steps(found: Json, start: Sequence[str]) -> list[str]:
    """Return what is left to do until devices use https; `start` lets the server use it."""
    line = connect_line(found["url"], found["fingerprint"])
    steps = [] if found["served"] else list(start)
    return [*steps, f"on each device, and on this machine for its own tools:\n    {line}"]


def show_tls(found: Json, style: Style) -> str:
    made = {True: "made anew", False: "in order, and kept"}.get(found.get("made"))
    text = field_list([
        ("certificate", found["certificate"] + (f" ({made})" if made else "")),
        ("for", ", ".join(found["names"])), ("fingerprint", found["fingerprint"]),
        ("expires", local_time(found["expires"], style)),
        ("in use", "yes" if found["served"] else "not yet"),
        ("settings", found.get("settings") or None),
        ("copy of them", found.get("settingsCopy") or None),
        *(("attention", f"{fault}: run `ocp tls`") for fault in found["faults"]),
    ])
    steps = [f"  {number}. {step}" for number, step in enumerate(found.get("next") or [], 1)]
    return "\n".join([text, *(["What to do next:", *steps] if steps else [])])


def _show_certificate(env: Env, args: argparse.Namespace, files: TlsFiles) -> Exit:
    named = named_certificate(env)
    cert = os.path.expanduser(named) or files.cert
    certificate = read_certificate(cert)
    if certificate is None:
        raise failed(f"There is no certificate in {cert}: `ocp tls` makes one.")
    found = _tls_report(env, certificate, files._replace(cert=cert))
    start = ["ocp restart"] if named else ["ocp tls"]
    steps = _next_steps(found, start) if certificate.is_self_signed else []
    print_answer(env, args, {**found, "next": steps}, show_tls)
    return Exit.FAILED if any(map(is_fatal, found["faults"])) else Exit.OK


def _end_tls(env: Env) -> Exit:
    record = _service_settings(env)
    if record is None:
        raise failed("No service is installed: start the server without OCP_TLS_CERT and "
                     "OCP_TLS_KEY.")
    copy = _write_settings(env, record, {})
    env.say(f"{record.env_file} has no certificate any more; a copy of it as it was is {copy}.\n"
            "What to do next: ocp restart" if copy else f"{record.env_file} has no certificate.")
    return Exit.OK


def cmd_tls(env: Env, args: argparse.Namespace) -> Exit:
    files = tls_files(env)
    try:
        if args.show:
            return _show_certificate(env, args, files)
        if args.off:
            return _end_tls(env)
        named = named_certificate(env)
        if named and os.path.expanduser(named) != files.cert:
            raise failed(f"OCP_TLS_CERT names a certificate of your own, {clean(named)}, which "
                         "stays. To have another one made, remove OCP_TLS_CERT and OCP_TLS_KEY "
                         "first.")
        record = _service_settings(env)
        certificate, is_new = renew_certificate(env, files, args.name)
        copy = _write_settings(env, record, dict(zip(_TLS_SETTINGS, files))) if record else ""
    except OSError as error:
        raise failed(f"{error.filename}: {error.strerror}.") from None
    found = _tls_report(
        env, certificate, files, made=is_new, settings=record.env_file if record else None,
        settingsCopy=copy or None)
    values = [f"{name}={path}" for name, path in zip(_TLS_SETTINGS, files)]
    by_hand = shlex.join(["env", *values, "python3", env.beside("ocp_server.py")])
    start = ["ocp restart"] if record else [
        f"end the server, and start it with its certificate:\n    {by_hand}",
        f"tell `ocp` the new address:\n    export OCP_URL={_secure_url(env)}"]
    return print_answer(env, args, {**found, "next": _next_steps(found, start)}, show_tls)


# ==== 11. Doctor =============================================================
# A table of checks. Each probe looks at one thing and returns PASS, WARN, FAIL or INFO, and with
# WARN and FAIL what to do. A probe that cannot look raises Unknown, which is INFO and never a
# failure. The first failed check gives the next action: the table is in the order of repairs.

OLDEST_CLAUDE = "2.1.197"
#: From this version on claude-code needs Node 22. Under an older Node, npm silently installs the
#: newest version before it.
_NODE_22_SINCE = (2, 1, 198)
_CLAUDE_PLACES = (
    "~/.local/bin", "~/.claude/local", "/opt/homebrew/bin", "/usr/local/bin", "/usr/bin",
    "~/.npm-global/bin", "~/.bun/bin",
)
_LEAST_FREE_BYTES = 100_000_000
_LOW_FREE_BYTES = 1_000_000_000
_CLOCK_SKEW_S = 120.0


class Unknown(Exception):
    """Why a check could not be made."""


class Fix(NamedTuple):
    """What to do about a finding: steps for a person, and commands that may run unattended."""

    kind: str = "noop"
    human: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    def report(self, **more: Json) -> Json:
        """Return it as JSON."""
        return {"kind": self.kind, "human_required": list(self.human),
                "ai_executable": list(self.commands), **more}


class Finding(NamedTuple):
    """What a check found. A WARN or FAIL has its fix."""

    level: str
    message: str
    fix: Fix = Fix()
    #: Whether the check could be made at all.
    is_known: bool = True


class Check(NamedTuple):
    """One row of the table."""

    id: str
    #: What people call it.
    title: str
    #: What it looks at, for the documentation.
    about: str
    probe: Callable[[Facts], Finding]
    #: Carries the fix out, and returns "" or why not. Only where that interrupts no answer and
    #: changes nothing but this user's own files and service. Raises Problem, OSError.
    mend: Union[Callable[[Facts], str], None] = None


#: Fixes of checks that can be mended which are more than that, or a person's.
_BY_HAND = ("noop", "fix_install", "fix_elsewhere", "fix_port", "start_server", "restart")


class Result(NamedTuple):
    """A check and what it found."""

    check: Check
    finding: Finding

    @property
    def is_safe(self) -> bool:
        """Return whether `ocp doctor --fix` carries its fix out."""
        fix = self.finding.fix
        return self.check.mend is not None and not (
            fix.kind in _BY_HAND
            or any(each.startswith("sudo ") for each in fix.commands))

    def report(self) -> Json:
        """Return it as JSON, with the fix if it needs one."""
        level, message, fix, is_known = self.finding
        row = {"id": self.check.id, "title": self.check.title, "level": level,
               "message": clean(message), "checked": is_known}
        return {**row, "fix": fix.report(safe=self.is_safe)} if fix.kind != "noop" else row


#: How the sentence about another program at the server's address ends.
_NOT_OCP = "is not an OCP server"


class Facts:
    """What the checks look at, each looked up once; what takes time, only when it is needed."""

    def __init__(self, env: Env) -> None:
        self.env, self.here, self.url = env, local_server(env), DEFAULT_URL
        with contextlib.suppress(Problem):
            self.url = server_url(env)
        #: The installation, if it has a service.
        self.service = self.here if self.here.label and self.here.commands else None
        #: Whether the server is another than the one that is installed here.
        self.is_elsewhere = not is_loopback(self.url) and self.here.url != self.url
        self.version = version_of(self.here.server_path)

    @functools.cached_property
    def answer(self) -> tuple[Json, float | None, str]:
        """Ask /health: the answer or {}, the server's clock in epoch seconds, what went wrong."""
        try:
            health, date = health_and_date(self.url)
        except HttpProblem as problem:
            if problem.kind == "unreachable":
                return {}, None, f"nobody answers at {self.url}: {problem}"
            is_ocp_error = isinstance(problem.body, dict) and "error" in problem.body
            return {}, None, f"{self.url} answered {problem.status}: {clean(problem)}" if (
                is_ocp_error) else f"what answers at {self.url} {_NOT_OCP}"
        with contextlib.suppress(TypeError, ValueError):
            return health, email.utils.parsedate_to_datetime(date).timestamp(), ""
        return health, None, ""

    @property
    def is_not_ocp(self) -> bool:
        """Return whether another program answers."""
        return self.answer[2].endswith(_NOT_OCP)

    @functools.cached_property
    def other_url(self) -> str:
        """Return the address with the other one of http and https if the server answers only
        there, else empty."""
        return other_scheme(self.url) if self.answer[2] else ""

    @property
    def health(self) -> Json:
        """Return the answer of /health, {} if there is none."""
        return self.answer[0]

    @property
    def running(self) -> Json:
        """Return the answer of /health. Raises Unknown if there is none."""
        if not self.health:
            raise Unknown("the server does not run")
        return self.health

    def ask(self, path: str) -> Json:
        """Return what the server answers, {} if it answers nothing of use."""
        with contextlib.suppress(Problem):
            return find_server(self.env).ask("GET", path, timeout_s=3.0).value
        return {}

    @functools.cached_property
    def latest(self) -> tuple[str, str]:
        """Return the newest release of the remote, and if there is none, why."""
        try:
            tags = remote_tags(self.env, git_tree(self.env))
        except Problem as problem:
            return "", str(problem)
        return max(tags, key=version_tuple, default=""), NO_RELEASE

    @functools.cached_property
    def claude(self) -> str | None:
        """Return the path of claude, as far as this user can tell."""
        environ = service_environ(self.env)
        named = environ.get("CLAUDE_BIN", "").strip()
        if named:
            return named if os.access(named, os.X_OK) else None
        places = [place.replace("~", self.env.home, 1) for place in _CLAUDE_PLACES]
        return shutil.which("claude", path=os.pathsep.join([environ.get("PATH", ""), *places]))

    @functools.cached_property
    def claude_version(self) -> str:
        """Return claude's version as it states it, empty if it states none."""
        text = self.health.get("claudeVersion")
        if not text and self.claude:
            environ = {"DISABLE_AUTOUPDATER": "1"}
            done = self.env.command(self.claude, "--version", timeout_s=20, more=environ)
            text = (done.output.split() or [""])[0] if done.code == 0 else ""
        return str(text) if version_tuple(text) else ""

    def script(self, name: str, *words: str) -> str:
        """Return the command that runs a script beside this one."""
        return shlex.join(["python3", self.env.beside(name), *words])

    def service_fix(self, kind: str, verb: str) -> Fix:
        """Return the fix of a service: what starts, restarts or enables it."""
        lines = service_lines(self.env, self.service, verb) if self.service else []
        return Fix(kind, (), tuple(lines))

    def require_local(self) -> None:
        """Raise Unknown for a server on another machine."""
        if not is_loopback(self.url):
            raise Unknown(f"{self.url} is another machine")


def _install_again(facts: Facts) -> Fix:
    script, is_root = "setup.py_install.py", facts.env.user_id == 0
    if not os.path.exists(facts.env.beside(script)):
        return Fix("fix_install", (
            f"get the whole of OCP {VERSION}, and run {script} there: this ocp.py is alone",))
    words = ["--system", "--yes"] if facts.here.needs_root else ["--yes"]
    sudo = "sudo " if facts.here.needs_root and not is_root else ""
    return Fix("fix_install", commands=(sudo + facts.script(script, *words),))


def _check_python(facts: Facts) -> Finding:
    python = facts.here.python
    if not os.access(python, os.X_OK):
        return Finding("FAIL", f"the service's Python is gone: {python}", _install_again(facts))
    return Finding("PASS", f"Python {sys.version.split()[0]}")


def _check_record(facts: Facts) -> Finding:
    try:
        record = installation(facts.env)
        service_of(facts.env)
    except Problem as problem:
        return Finding("FAIL", str(problem), _install_again(facts))
    if record is None:
        return Finding("INFO", "nothing is installed; the server is run by hand")
    path = record.server_path
    if path and not os.path.exists(path):
        return Finding("FAIL", f"the installed server is gone: {path}", _install_again(facts))
    return Finding("PASS", f"installed in {os.path.dirname(path) or '?'}")


_INSTALL_CLAUDE = ("npm install -g @anthropic-ai/claude-code@latest",)


def _check_claude(facts: Facts) -> Finding:
    usable = facts.health.get("claudeBinaryOk")
    fix = Fix("fix_claude", ("then log in: run `claude auth login`",), _INSTALL_CLAUDE)
    if usable:
        return Finding("PASS", "the server can run claude")
    if usable is False:
        why = facts.health.get("fix") or ""
        return Finding("FAIL", f"the server cannot run claude: {why}", fix)
    facts.require_local()
    if facts.claude is None:
        return Finding("FAIL", "the claude program is not installed where the server looks", fix)
    return Finding("PASS", facts.claude)


def _check_claude_version(facts: Facts) -> Finding:
    text = facts.claude_version
    if not text:
        raise Unknown("claude did not tell its version")
    fix = Fix("fix_claude", (), (f"{shlex.quote(facts.claude or 'claude')} update",))
    if version_tuple(text) < version_tuple(OLDEST_CLAUDE):
        return Finding("FAIL", f"claude {text} is older than {OLDEST_CLAUDE}", fix)
    if facts.health.get("promptCacheKept") is False:
        return Finding("WARN", f"with claude {text}, conversations that move to another process "
                       "miss the API's prompt cache: see prompt_cache_not_kept in the log", fix)
    return Finding("PASS", f"claude {text}")


def _check_node(facts: Facts) -> Finding:
    facts.require_local()
    done = facts.env.command("node", "--version")
    text = done.output.strip()
    if done.code != 0 or not version_tuple(text):
        return Finding("INFO", "does not apply: there is no Node on the PATH")
    if version_tuple(text) >= (22,):
        return Finding("PASS", f"Node {text[1:]}")
    claude = facts.claude_version
    if claude and version_tuple(claude) < _NODE_22_SINCE:
        return Finding("WARN", f"claude {claude} is old: under Node {text[1:]}, which is older "
                       "than 22, npm installs no newer one and does not say so",
                       Fix("fix_claude", ("or install Node 22 or later",), _INSTALL_CLAUDE))
    return Finding("PASS", f"Node {text[1:]}; npm installs a new claude only by @latest")


def _check_disk(facts: Facts) -> Finding:
    folder = asked = facts.here.data_dir
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    free_bytes = shutil.disk_usage(folder).free
    message = f"{file_size(free_bytes)} free for {asked}"
    if free_bytes >= _LOW_FREE_BYTES:
        return Finding("PASS", message)
    return Finding("FAIL" if free_bytes < _LEAST_FREE_BYTES else "WARN", message,
                   Fix("fix_disk", (f"make room on the disk of {asked}",)))


def _start_line(facts: Facts) -> str:
    """Return the line that starts the server, by its service or by hand."""
    if facts.service is None:
        return command_by_hand(facts.env)
    return " && ".join(service_lines(facts.env, facts.service, "restart"))


def _check_database(facts: Facts) -> Finding:
    state, advice = facts.health.get("storage"), facts.health.get("storageFix")
    path = os.path.join(facts.here.data_dir, "ocp.db")

    def fix(advice: str) -> Fix:
        again = f"start the server again: {_start_line(facts)}"
        return Fix("fix_database", (advice.replace("ocp.db", path), again))

    if advice:
        level = "WARN" if state == "behind" else "FAIL"
        return Finding(level, f"the server's storage is {state!r}, not 'disk': {advice}",
                       fix(str(advice)))
    if not os.path.exists(path):
        # A demo keeps its data in memory.
        if state == "disk" and not facts.health.get("demo") and not facts.is_elsewhere:
            return Finding(
                "WARN", f"the server has a database, but {path} is not there: it was removed, or "
                "the server runs with another OCP_HOME", fix(
                    "put it back, or go on without its keys and its usage: a start makes a new "
                    "one"))
        return Finding("INFO", "there is no database yet")
    try:
        with contextlib.closing(open_database(path, "ro")) as connection:
            verdict = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.OperationalError as error:
        raise Unknown(str(error)) from None
    except sqlite3.DatabaseError as error:
        verdict = str(error)
    if verdict != "ok":
        return Finding("FAIL", f"{path} is damaged: {verdict}", fix(
            "stop the server and put back a copy of ocp.db from "
            f"{snapshots_folder(facts.env)}, or move the damaged one away"))
    return Finding("PASS", f"{path} is in order, {file_size(os.path.getsize(path))}")


def _check_original(facts: Facts) -> Finding:
    path = os.path.join(facts.here.data_dir, "ocp.db")
    if not os.path.exists(path):
        return Finding("INFO", "does not apply: there is no database yet")
    with contextlib.closing(open_database(path, "ro")) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
        known = {"original"} & tables
        rows = connection.execute("SELECT at_s, report FROM original").fetchall() if known else []
    is_left = bool({"api_keys", "usage_log"} & tables) or os.path.exists(path + ".original")
    if not rows:
        start = Fix("start_server", (f"start the server: {_start_line(facts)}",))
        return Finding("WARN", f"the original's keys in {path} are not taken over yet", start) if (
            is_left) else Finding("INFO", "does not apply: the original was not here")
    at_s, report = rows[0]
    told = _taken_over_words(at_s, json.loads(report))
    if not is_left:
        return Finding("PASS", f"{told}; nothing of it is left")
    sudo = ["sudo"] if facts.here.needs_root else []
    forget = shlex.join([*sudo, "env", f"OCP_HOME={facts.here.data_dir}", facts.here.python,
                         facts.here.server_path, "--forget-original"])
    return Finding("WARN", f"{told}; its tables still hold every key in plain text", Fix(
        "forget_original", (
            "keep them while you may want to go back; once you are sure, stop the server (`ocp "
            f"stop`), run `{forget}`, and start it (`ocp start`)",)))


def _taken_over_words(at_s: float, report: Json) -> str:
    """Return what the server took over of the original, and what became of the rest."""
    renamed = len(report["renamed"])
    left = [f"{count} {what}" for what, count in report["leftOut"].items()]
    return (f"on {iso_time(at_s)[:10]} the server took over {counted(report['keys'], 'key')} and "
            f"{counted(report['usageRows'], 'row')} of usage"
            + (f"; {counted(renamed, 'key')} renamed, see original_taken_over in the log"
               if renamed else "")
            + (f"; left out: {', '.join(left)}" if left else ""))


def _private_paths(facts: Facts) -> list[tuple[str, int]]:
    """Return everything that nobody else may read, with its right mode."""
    folder = facts.here.data_dir
    names = ("ocp.db", "ocp.db-wal", "ocp.db-shm", "ocp.db.original", "admin-key", "tls/key.pem",
             "channels.json", "channels.db")
    files = [*(os.path.join(folder, name) for name in names), facts.here.env_file]
    # With the folders of tenants closed, nobody gets at what is in them.
    tenants = os.path.join(folder, "tenants")
    inside = os.listdir(tenants) if os.path.isdir(tenants) else []
    folders = [folder, tenants, *(os.path.join(tenants, name) for name in sorted(inside))]
    return [*((each, 0o700) for each in folders if os.path.isdir(each)),
            *((file, 0o600) for file in files if os.path.exists(file))]


def _loose_paths(facts: Facts) -> list[tuple[str, int]]:
    return [(path, mode) for path, mode in _private_paths(facts)
            if stat.S_IMODE(os.stat(path).st_mode) & 0o077]


def _check_modes(facts: Facts) -> Finding:
    loose = _loose_paths(facts)
    if loose:
        commands = [shlex.join(["chmod", f"{mode:o}", path]) for path, mode in loose]
        return Finding("FAIL", "others may read " + ", ".join(path for path, _ in loose),
                       Fix("fix_modes", (), tuple(commands)))
    count = len(_private_paths(facts))
    if not count:
        return Finding("INFO", "there are none yet")
    return Finding("PASS", f"nobody else may read them: {counted(count, 'path')} looked at")


def _mend_modes(facts: Facts) -> str:
    for path, mode in _loose_paths(facts):
        # A link may lead to a file of somebody else.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if os.fstat(descriptor).st_uid != facts.env.user_id:
                return f"{path} belongs to another user"
            os.fchmod(descriptor, mode)
        finally:
            os.close(descriptor)
    return ""


def _check_port(facts: Facts) -> Finding:
    facts.require_local()
    port = port_of(facts.url)
    owner = port_owner(facts.env, port)
    if owner is None:
        return Finding("INFO", f"nobody listens on port {port}")
    if owner.pid is None or not owner.command:
        raise Unknown(f"port {port} belongs to {owner.words}")
    if owner.is_ocp:
        return Finding("PASS", f"port {port} belongs to process {owner.pid}")
    message = f"port {port} belongs to {owner.words}"
    # A program that forwards the port, as for a container, is another one and all right.
    if facts.health:
        return Finding("INFO", message)
    return Finding("FAIL", message, _other_port(facts))


def _other_port(facts: Facts) -> Fix:
    install = shlex.join(["python3", facts.env.beside("setup.py_install.py"), "--port"])
    return Fix("fix_port", (
        f"end that program, and start OCP: {_start_line(facts)}",
        f"or choose another port for OCP: {install} {port_of(facts.url) + 1}"))


def _check_settings(facts: Facts) -> Finding:
    facts.require_local()
    env, file = facts.env, facts.here.env_file
    if os.path.exists(file) and not os.access(file, os.R_OK):
        raise Unknown(f"{file} is readable by root only")
    path = file or os.path.join(env.ocp_home, "ocp.env")
    where = path if os.path.exists(path) else "the environment of the server"
    fix = Fix("fix_settings", (
        f"correct them in {where}, and start the server again: {_start_line(facts)}",))
    done = env.run([facts.here.python, "-B", facts.here.server_path, "--print-settings"],
                   timeout_s=30, environ=service_environ(env))
    lines = [line.partition(": ")[2] for line in done.error.splitlines()
             if line.startswith("ocp: ") and "Settings were read from" not in line]
    if done.code != 0 and not lines:
        raise Unknown(done.complaint)
    if done.code != 0:
        return Finding("FAIL", "the server does not start with them: " + " ".join(lines), fix)
    idle = [line.partition(": ")[2] for line in done.output.splitlines()
            if line.startswith("ATTENTION: ")]
    return Finding("WARN", " ".join(idle), fix) if idle else Finding(
        "PASS", "the server accepts them")


def _check_unit(facts: Facts) -> Finding:
    record = facts.service
    if record is None:
        return Finding("INFO", "no service is installed")
    if record.unit_path and not os.path.exists(record.unit_path):
        return Finding(
            "FAIL", f"the service's file is gone: {record.unit_path}", _install_again(facts))
    (step,) = record.commands["is-enabled"]
    done = facts.env.command(*step.command, more=with_user_bus(facts.env.environ))
    if done.code == 0:
        return Finding("PASS", f"{record.label} is enabled")
    # systemctl prints the state, or complains that it cannot tell; launchctl only complains.
    if done.code is None or not (done.output.strip() or record.platform == "launchd"):
        raise Unknown(done.complaint)
    return Finding("WARN", f"{record.label} is {clean(done.output.strip()) or 'not loaded'}",
                   facts.service_fix("fix_unit", "enable"))


def _mend_unit(facts: Facts) -> str:
    return run_service(facts.env, facts.service, "enable") if facts.service else ""


def _stop_timeout_s(record: Record) -> float:
    """Return how long the service manager lets the server end. Raises Unknown, OSError."""
    if record.platform == "launchd":
        with open(record.unit_path, "rb") as file:
            try:
                return float(plistlib.load(file).get("ExitTimeOut", 20))
            except (ValueError, AttributeError, plistlib.InvalidFileException) as error:
                raise Unknown(f"{record.unit_path}: {error}") from None
    with open(record.unit_path, encoding="utf-8", errors="replace") as file:
        told = re.findall(r"(?m)^TimeoutStopSec=(.*)$", file.read())
    text = told[-1].strip() if told else "90"
    if text != "infinity" and not re.fullmatch(r"[0-9]{1,9}", text):
        raise Unknown(f"TimeoutStopSec={clean(text)} in {record.unit_path}")
    return float(text)


def _check_stop_timeout(facts: Facts) -> Finding:
    record = facts.service
    if record is None or not record.unit_path:
        return Finding("INFO", "no service is installed")
    drain, allowed = drain_of(facts.env), _stop_timeout_s(record)
    if allowed < drain + _END_S:
        return Finding(
            "WARN", f"running answers may take {drain:.0f} s at a stop (OCP_DRAIN), but the "
            f"service ends the server after {allowed:.0f} s", _install_again(facts))
    return Finding("PASS", f"running answers get {drain:.0f} s at a stop")


def _check_service(facts: Facts) -> Finding:
    health, _, wrong = facts.answer
    if facts.other_url:
        return Finding(
            "FAIL", f"the server speaks {scheme_of(facts.other_url)}, but its settings say "
            f"{scheme_of(facts.url)}: it was not restarted since they changed",
            _start_again(facts))
    if wrong or health.get("status") == "draining":
        level, message = ("FAIL", wrong) if wrong else ("WARN", "the server is shutting down")
        return Finding(level, message, _start_again(facts))
    return Finding("PASS", f"OCP {health['version']} answers at {facts.url}")


def _start_again(facts: Facts) -> Fix:
    if facts.is_not_ocp:
        return _other_port(facts)
    if facts.is_elsewhere:
        return Fix("fix_elsewhere", (
            f"look whether {facts.url} is right", "run `ocp doctor` on that machine"))
    if facts.other_url:
        return _restart(facts)
    if facts.service:
        return facts.service_fix("fix_service", "restart")
    if facts.here.url and not facts.here.label:
        # Installed where there is no service manager: to install it again would start nothing.
        return Fix("start_server", (f"start it: {command_by_hand(facts.env)}",))
    by_hand = f"or run it by hand: {command_by_hand(facts.env)}"
    return Fix("fix_install", (by_hand,), _install_again(facts).commands)


def _restart(facts: Facts) -> Fix:
    if facts.service:
        return facts.service_fix("restart", "restart")
    again = f"end the server and start it again: {command_by_hand(facts.env)}"
    return Fix("restart", (again,))


def _mend_service(facts: Facts) -> str:
    if facts.health:
        return "it is shutting down: wait until it has ended"
    owner = None
    with contextlib.suppress(OSError):
        owner = port_owner(facts.env, port_of(facts.url))
    if owner and owner.command and not owner.is_ocp:
        return f"its port belongs to {owner.words}"
    return restart_and_ask(facts.env, facts.service, facts.version) if facts.service else ""


def _check_login(facts: Facts) -> Finding:
    auth = facts.running.get("auth") or {}
    if auth.get("ok") is False:
        return Finding("FAIL", f"not logged in: {auth.get('message') or ''}".rstrip(": "),
                       Fix("fix_oauth", ("run `ocp login`",
                                         "or `claude auth login` as the user of the server")))
    if facts.health.get("ownerHidden") is False:
        return Finding("WARN", "claude tells its models the owner's e-mail address: see the log",
                       Fix("read_log", ("look for owner_not_hidden in `ocp logs 500`",)))
    if auth.get("ok") is True:
        return Finding("PASS", "logged in: the last answer proved it")
    return Finding("INFO", "not known yet: the first answer tells; `ocp ask hello` gets one")


def _check_extra_usage(facts: Facts) -> Finding:
    state = facts.running.get("extraUsage")
    if state == "stopped":
        return Finding("WARN", "the plan is used up for all models or for some, whose requests are "
                       "refused, because extra usage is set to stop", Fix("extra_usage", (
                           "wait until the plan's limit resets: see `ocp usage`",
                           "to go on: `ocp settings extraUsage allow`")))
    if state == "billed":
        return Finding("WARN", "the plan is used up, and answers are billed as extra usage", Fix(
            "extra_usage", ("to stop at the plan's limit: `ocp settings extraUsage stop`",)))
    return Finding("PASS", "no answer is billed as extra usage, as far as claude has told")


def _check_alerts(facts: Facts) -> Finding:
    server: Server = facts.running and find_server(facts.env)
    answer = server.ask("GET", "/api/alerts", timeout_s=3.0).value
    if not answer.get("webhook"):
        return Finding("PASS", "no webhook is set, so none are sent")
    rows = answer.get("alerts") or []
    # Those that the webhook refused before it took the last one are past.
    since = next((at for at, row in enumerate(rows) if row.get("state") == "delivered"), len(rows))
    refused = [row for row in rows[:since] if row.get("problem")]
    if not refused:
        return Finding("PASS", "the webhook took the last one" if rows else "none so far")
    return Finding("WARN", f"the webhook did not take {counted(len(refused), 'alert')}: "
                   f"{refused[0]['problem']}", Fix("alerts", (
                       "look at alertUrl and alertFormat, then try: `ocp alerts test`",)))


def _check_tenants(facts: Facts) -> Finding:
    server: Server = facts.running and find_server(facts.env)
    tenants = server.ask("GET", "/api/tenants", timeout_s=15.0).value.get("tenants") or []
    stuck = [each for each in tenants if each.get("obstacle")]
    above = [each for each in tenants if each.get("levelInForce") != each.get("level")]
    free = [each for each in tenants
            if each.get("levelInForce") == "agent" and each.get("sandbox") is False]
    steps = [f"{each.get('name')} is not answered: {each.get('obstacle')}" for each in stuck]
    steps += [f"{each.get('name')} works at level {each.get('levelInForce')}: set "
              f"OCP_TENANT_LEVEL={each.get('level')} for the server, or lower the tenant's level"
              for each in above]
    steps += [f"{each.get('name')} is not confined: its claude may do all that the server's user "
              "may" for each in free]
    if steps:
        concerned = {each.get("name") for each in (*stuck, *above, *free)}
        return Finding("WARN", f"look at {counted(len(concerned), 'tenant')}", Fix(
            "tenant_level", tuple(map(clean, steps))))
    return Finding("PASS", f"{counted(len(tenants), 'tenant')}, each at its level")


def _check_failures(facts: Facts) -> Finding:
    server: Server = facts.running and find_server(facts.env)
    answer = server.ask("GET", "/api/errors?since=1h&limit=0", timeout_s=3.0)
    kinds = answer.value.get("byKind") or []
    if not kinds:
        return Finding("PASS", "no request failed in the last hour")
    counts = ", ".join(f"{kind.get('count')} {kind.get('kind')}" for kind in kinds)
    message = f"failed in the last hour: {counts}; see `ocp errors --since 1h`"
    # Wrong keys and requests are matters of clients; those of claude and the account are not.
    if not any(int(kind.get("status") or 0) >= 500 or str(kind.get("kind")).startswith("upstream_")
               for kind in kinds):
        return Finding("INFO", message)
    # Of some failures the action is this very command, whose other rows say more.
    actions = ((kind.get("kind"), str(kind.get("action"))) for kind in kinds)
    return Finding("WARN", message, Fix("recent_failures", tuple(clean(
        f"{kind}: " + ("see the rows above" if "`ocp doctor`" in action else action))
        for kind, action in actions)))


def _check_served_version(facts: Facts) -> Finding:
    if facts.is_elsewhere:
        raise Unknown(f"{facts.url} is another machine")
    if not facts.version:
        raise Unknown(f"no version in {facts.here.server_path}")
    served = facts.running["version"]
    if served == facts.version:
        return Finding("PASS", f"{served} is installed and running")
    return Finding(
        "WARN", f"{served} is running, {facts.version} is installed", _restart(facts))


def _check_linger(facts: Facts) -> Finding:
    if facts.service is None or facts.service.platform != "systemd-user":
        return Finding("INFO", "does not apply: no service of a user's systemd")
    done = facts.env.command("loginctl", "show-user", str(facts.env.user_id), "-p", "Linger")
    state = done.output.strip().rpartition("=")[2]
    if done.code != 0 or state not in ("yes", "no"):
        raise Unknown(done.complaint)
    if state == "no":
        return Finding("WARN", "the server stops when you log out, and does not start at boot",
                       Fix("fix_linger", (), ("loginctl enable-linger",)))
    return Finding("PASS", "the server runs without a login session")


def _mend_linger(facts: Facts) -> str:
    done = facts.env.command("loginctl", "enable-linger")
    return "" if done.code == 0 else done.complaint


def _check_certificate(facts: Facts) -> Finding:
    if not facts.health:
        raise Unknown("no server answers")
    if not facts.url.startswith("https://"):
        return Finding("INFO", "the server speaks http; `ocp tls` changes that")
    url = device_url(facts.env, facts.url)
    faults = certificate_faults(facts.env, url)
    if not faults:
        return Finding("PASS", f"the certificate is for {urllib.parse.urlsplit(url).hostname}")
    named, own = named_certificate(facts.env), tls_files(facts.env).cert
    fix = Fix("fix_certificate", ("then the command that it shows, on each device",),
              (facts.script("ocp.py", "tls"), facts.script("ocp.py", "restart")))
    if named and os.path.expanduser(named) != own:
        fix = Fix("fix_certificate", (f"replace {named} and its key, and restart the server",))
    return Finding("FAIL" if any(map(is_fatal, faults)) else "WARN",
                   "the certificate: " + "; ".join(faults), fix)


def _check_clock(facts: Facts) -> Finding:
    served_s = facts.answer[1]
    if served_s is None:
        raise Unknown("the server told no time")
    skew_s = abs(served_s - facts.env.clock())
    message = f"{skew_s:.0f} s between the server's clock and this one"
    return Finding("PASS", message) if skew_s <= _CLOCK_SKEW_S else Finding("WARN", message, Fix(
        "fix_clock", ("let both machines set their clocks from the network",)))


def _check_openclaw(facts: Facts) -> Finding:
    found = sync_openclaw(facts.env, facts.url, "--dry-run")
    if not found["openclaw"]:
        return Finding("INFO", "OpenClaw is not here")
    if not found["providers"]:
        return Finding("INFO", "OpenClaw is here, but does not use this server")
    if found["diff"]:
        return Finding("WARN", "OpenClaw's list of models is not that of models.json",
                       Fix("fix_openclaw", (), (facts.script("ocp.py", "sync"),)))
    return Finding("PASS", "OpenClaw knows the same models")


def _check_instances(facts: Facts) -> Finding:
    if facts.is_elsewhere:
        raise Unknown(f"{facts.url} is another machine")
    if not facts.running.get("tenantCount"):
        return Finding("INFO", "there are no tenants; `ocp tenants setup` makes them")
    words = ("check", "--json", "--server", with_port(facts.url))
    done = facts.env.command(
        *script_command(facts.env, "ocp_tenants.py", *words), timeout_s=120.0)
    if done.code not in (Exit.OK, Exit.FAILED) or not done.output:
        raise Unknown(done.complaint)
    names = {True: list[str](), False: list[str]()}
    for row in json.loads(done.output)["instances"]:
        names[bool(row["ok"])].append(str(row["name"]))
    if not any(names.values()):
        return Finding("INFO", "no tenant has an instance on this machine")
    if names[False]:
        return Finding(
            "WARN", f"not as they should be: {', '.join(names[False])}", Fix("fix_tenants", (
                "`ocp tenants check` says what is the matter",
                f"`ocp tenants apply {shlex.join(names[False])}` writes what is missing")))
    return Finding("PASS", f"{counted(len(names[True]), 'instance')} of tenants: this server is "
                   "configured in each")


def _check_key_logins(facts: Facts) -> Finding:
    server: Server = facts.running and find_server(facts.env)
    logins = server.ask("GET", "/api/keys", timeout_s=3.0).value.get("logins") or []
    if not logins:
        return Finding("INFO", "no key has a login of its own")
    lost = [str(each["keys"][0]) for each in logins if each["state"] == "not logged in"]
    if lost:
        return Finding("WARN", f"refused or missing: the logins of {', '.join(lost)}", Fix(
            "fix_key_logins", tuple(f"`ocp keys login {shlex.quote(name)}`" for name in lost)))
    return Finding("PASS", f"{counted(len(logins), 'login')} of keys, none refused")


def _check_channels(facts: Facts) -> Finding:
    script, channels = facts.env.beside("ocp_channels.py"), facts.script("ocp.py", "channels")
    places = (os.path.join(facts.env.ocp_home, "channels.json"),
              os.path.join(facts.env.home, ".openclaw-channel-gateway", "ocg.json"))
    if not os.path.exists(script) or not any(map(os.path.exists, places)):
        return Finding("INFO", "no chat is joined; `ocp channels add` joins one")
    done = facts.env.command(sys.executable, script, "status", "--json")
    if done.code == Exit.UNREACHABLE:
        return Finding("WARN", "chats are configured, and their gateway does not run", Fix(
            "fix_channels", (), (f"{channels} start -d",)))
    if done.code != 0:
        return Finding("FAIL", done.complaint, Fix("fix_channels", (
            "correct what the message names",), (f"{channels} status",)))
    status = json.loads(done.output)
    faults = [f"{each['id']}:{each['accountId']} is {each['status']} ({each['error']})"
              for each in status["channels"] if each["status"] not in ("running", "starting")
              and each["error"] != "not enabled"]
    dead, held = (sum(each[kind] for each in status["channels"]) for kind in ("dead", "held"))
    faults += [f"{counted(dead, 'part')} of answers could not be sent"] if dead else []
    steps = [f"{channels} pairing approve {code}" for code in status["pairing"]]
    if faults:
        return Finding("WARN", "; ".join(map(clean, faults)), Fix("fix_channels", (
            f"see `{channels} status` and `{channels} outbox`", *steps)))
    if steps:
        return Finding("WARN", "somebody waits for your approval in a chat", Fix(
            "fix_channels", tuple(steps)))
    waiting = f", {counted(held, 'part')} of answers held for the next message" if held else ""
    return Finding("PASS", f"{counted(status['running'], 'account')} running{waiting}")


def _check_latest(facts: Facts) -> Finding:
    latest, why_not = facts.latest
    if not latest:
        raise Unknown(why_not)
    if version_tuple(latest) > version_tuple(facts.version):
        return Finding("WARN", f"{latest} is available, {facts.version or '?'} is installed",
                       Fix("update", (), (facts.script("ocp.py", "update", "--yes"),)))
    return Finding("PASS", f"{facts.version} is the newest")


CHECKS = (
    Check("python", "Python", "The Python that runs this, and the one of the service",
          _check_python),
    Check("install_dir", "Installation", "The installer's record and the server that it names",
          _check_record),
    Check("claude_found", "claude", "Whether the server finds the claude program", _check_claude),
    Check("claude_version", "Version of claude", "Whether claude is new enough",
          _check_claude_version),
    Check("node", "Node", "Whether Node is too old for npm to install a new claude", _check_node),
    Check("disk_space", "Disk", "How much room is left for the server's files", _check_disk),
    Check("database", "Database",
          "Whether the server writes to its database, and whether that is in order",
          _check_database),
    Check("original", "The original OCP",
          "What was taken over from the original, and whether its keys are left in plain text",
          _check_original),
    Check("file_modes", "Private files",
          "Whether others may read the database, the keys, the settings file or tenants' folders",
          _check_modes, _mend_modes),
    Check("port_owner", "Port", "Which process owns the server's port", _check_port),
    Check("settings", "Settings",
          "Whether the server accepts its settings, and which have no effect", _check_settings),
    Check("service_unit", "Service", "Whether the service is there and starts by itself",
          _check_unit, _mend_unit),
    Check("stop_timeout", "Time to stop",
          "Whether the service gives running answers the time that OCP_DRAIN promises",
          _check_stop_timeout),
    Check("service_running", "Server", "Whether an OCP server answers",
          _check_service, _mend_service),
    Check("oauth_ok", "Login", "What the last answer told about the login", _check_login),
    Check("key_logins", "Logins of keys",
          "Whether a key's own Claude login was refused or is missing", _check_key_logins),
    Check("extra_usage", "Extra usage",
          "Whether answers are billed as extra usage, beyond the plan", _check_extra_usage),
    Check("recent_failures", "Failed requests",
          "Which requests failed in the last hour, and why", _check_failures),
    Check("alerts", "Alerts", "Whether the webhook took the last alerts", _check_alerts),
    Check("tenant_level", "Tenants",
          "Which tenants have a level above the server's, are not confined, or cannot be",
          _check_tenants),
    Check("service_version_matches_tree", "Running version",
          "Whether the installed version is the one that runs", _check_served_version),
    Check("linger", "Running without you",
          "Whether a service of a user outlives the login (systemd)", _check_linger, _mend_linger),
    Check("certificate", "Certificate",
          "Whether devices can take the server's certificate, and how long", _check_certificate),
    Check("clock", "Clock", "Whether the server's clock and this one agree", _check_clock),
    Check("openclaw_models", "OpenClaw", "Whether OpenClaw, if it is here, knows the same models",
          _check_openclaw),
    Check("tenant_instances", "Instances of tenants",
          "Whether the OpenClaw of each tenant is configured for this server", _check_instances),
    Check("channels", "Chats", "Whether the gateway to chats runs, and what waits there for you",
          _check_channels),
    Check("current_version", "Release", "Whether there is a newer release", _check_latest),
)


def run_check(check: Check, facts: Facts) -> Finding:
    """Return what a check finds. A check that cannot be made is INFO, whatever the reason."""
    try:
        return check.probe(facts)
    except (Unknown, Problem, OSError) as error:
        reason = str(error)
    except Exception as error:
        # One answer that nobody foresaw must not hide what the other checks find.
        reason = f"{type(error).__name__}: {error}"
    return Finding("INFO", f"could not check: {reason}".splitlines()[0], is_known=False)


def doctor_report(facts: Facts, results: Sequence[Result]) -> Json:
    levels = [each.finding.level for each in results]
    current, record = facts.version, facts.service
    latest = max(facts.latest[0], f"v{current}", key=version_tuple)
    is_clean = False
    with contextlib.suppress(Problem):
        is_clean = not local_changes(facts.env, git_tree(facts.env))
    first = next((each.finding.fix for level in ("FAIL", "WARN") for each in results
                  if each.finding.level == level), Fix())
    return {
        "schema_version": "1", "timestamp": iso_time(facts.env.clock()),
        "ready_to_upgrade": "FAIL" not in levels and is_clean,
        "install_dir": facts.env.tree, "install_dir_source": "script",
        "install_dir_safe_to_replace": is_clean,
        "current_version": f"v{current}" if current else None,
        "latest_version": latest if current else None,
        "from_version_supported": bool(current),
        "units": record and [{
            "name": record.label, "scope": "system" if record.needs_root else "user",
            "platform": record.platform, "port": record.port,
            "workingTree": os.path.dirname(record.server_path), "bind": record.bind,
            "user": None, "instanceName": facts.health.get("instanceName", ""),
        }],
        "fail_count": levels.count("FAIL"), "warn_count": levels.count("WARN"),
        "unknown_count": sum(not each.finding.is_known for each in results),
        "checks": [each.report() for each in results],
        "next_action": first.report(verify=facts.script("ocp.py", "doctor")),
    }


_LEVEL_COLOURS = {"PASS": "green", "WARN": "yellow", "FAIL": "red", "INFO": "dim"}


def show_doctor(answer: Json, style: Style) -> str:
    """Return the examination, with the fix under each row that needs one, and what to do next."""
    current, latest = answer["current_version"] or "unknown", answer["latest_version"] or "unknown"
    lines = [style.paint("bold", f"OCP {current}") + (
        "" if latest == current else f" -> {latest} is available")]
    for row in answer["checks"]:
        level = style.paint(
            _LEVEL_COLOURS[row["level"]], f"[{row['level'] if row['checked'] else 'SKIP'}]")
        lines.append(f"  {level} {row['title']} ({row['id']}): {row['message']}")
        fix = row.get("fix", {"ai_executable": [], "human_required": []})
        lines += [f"         {'    ' if at else 'fix:'} {clean(step)}"
                  for at, step in enumerate([*fix["ai_executable"], *fix["human_required"]])]
    unknown = answer["unknown_count"]
    lines += ["", f"{answer['fail_count']} failed, {counted(answer['warn_count'], 'warning')}" + (
        f", {unknown} could not be checked" if unknown else "")]
    safe = [row["title"] for row in answer["checks"] if row.get("fix", {}).get("safe")]
    if safe:
        lines.append(f"`ocp doctor --fix` does what is safe: {', '.join(safe)}.")
    if answer["next_action"]["kind"] != "noop":
        lines.append("Failures first, from the top down. Then again: "
                     + answer["next_action"]["verify"])
    return "\n".join(lines)


def mend(facts: Facts, results: Sequence[Result]) -> list[Json]:
    """Carry the safe fixes out, and say so. Returns what was done and what failed. No terminal is
    given to what runs here, so nothing can ask."""
    done = []
    for check, finding in (each for each in results if each.is_safe):
        assert check.mend is not None
        try:
            failure = clean(check.mend(facts))
        except (Problem, OSError) as error:
            failure = clean(error)
        facts.env.note(f"{check.title}: {clean(' && '.join(finding.fix.commands))}: "
                       + (f"failed: {failure}" if failure else "done"))
        done.append({"id": check.id, "commands": list(finding.fix.commands), "ok": not failure,
                     "message": failure})
    if not done:
        facts.env.note("There is nothing that can be fixed safely without you.")
    return done


#: How much of the log goes into a report.
_REPORT_LOG_LINES = 60
#: Fields of the log whose words tell what happened. The words of all others may be names.
_TELLING_FIELDS = frozenset((
    "adjusted", "claude", "detail", "dialect", "error", "help", "kind", "message", "method", "mode",
    "model", "outcome", "path", "reason", "request_id", "setting", "status", "stop_reason",
    "storage", "version", "why"))
#: Names of a user or a machine that tell nothing of their owner.
_COMMON_NAMES = frozenset(("root", "ocp", "claude", "user", "localhost", "ubuntu", "debian", "pi"))
_TOKEN = re.compile(r"(?:sk-|ocp_|Bearer )[\w.-]{6,}|(?=[\w-]*[0-9])(?=[\w-]*[A-Za-z])[\w-]{24,}")


#: Variables whose values are names.
_NAMING = ("USER", "LOGNAME", "OCP_INSTANCE_NAME", "OCP_ALLOWED_HOSTS")


class Redactor:
    """Takes out of a text what lets others in and what tells who the owner is. Known secrets and
    names are found wherever they stand; unknown ones by their form."""

    def __init__(self, facts: Facts) -> None:
        env = facts.env
        environ = {**env.environ, **service_environ(env)}
        self._secrets = [text for name, text in environ.items()
                         if re.search("KEY|TOKEN|SECRET|PASSW|ALERT_URL", name) and len(text) > 3]
        with contextlib.suppress(Problem):
            self._secrets += filter(None, [admin_key(env, facts.url)])
        self._home = env.home
        machine = socket.gethostname()
        names = {machine, machine.partition(".")[0], os.path.basename(env.home),
                 *(part for name in _NAMING for part in environ.get(name, "").split(",")),
                 str(facts.health.get("instanceName", "")), *_key_names(facts)}
        self._names = sorted((name for name in names if len(name) > 2
                              and name.lower() not in _COMMON_NAMES), key=len, reverse=True)

    def text(self, text: object) -> str:
        """Return a text without secrets, names, addresses and home folders."""
        found = clean(text)
        for secret in sorted(self._secrets, key=len, reverse=True):
            found = found.replace(secret, "<secret>")
        found = re.sub(r"[\w.+-]+@[\w-]+\.[\w.-]+", "<e-mail>", found)
        found = found.replace(self._home, "~") if len(self._home) > 1 else found
        found = re.sub(r"/(?:home|Users)/[^/\s'\"]+", "~", found)
        found = re.sub(r"(?<=://)\[?[\w.:%-]+\]?", self._host, found)
        found = re.sub(r"[0-9A-Fa-f.:]{3,}", self._address, found)
        for name in self._names:
            found = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "<name>", found, flags=re.I)
        return _TOKEN.sub("<secret>", found)

    @staticmethod
    def _host(found: re.Match[str]) -> str:
        host, colon, port = found[0].rpartition(":")
        host, port = (host, colon + port) if port.isdigit() else (found[0], "")
        is_known = is_loopback(f"http://{host}") or host.endswith(("anthropic.com", "github.com"))
        return found[0] if is_known else f"<host>{port}"

    @staticmethod
    def _address(found: re.Match[str]) -> str:
        text = found[0].strip(".:") if "::" not in found[0] else found[0].rstrip(".")
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return found[0]
        is_plain = address.is_loopback or address.is_unspecified
        return found[0] if is_plain else found[0].replace(text, "<address>")

    def log_line(self, entry: Json) -> str:
        """Return one event of the log: numbers, and the words of fields that tell no names."""
        if not isinstance(entry, dict) or "event" not in entry:
            return "(a line that is no event)"
        words = [str(entry.get(name, "")) for name in ("ts", "level", "event")]
        for name, value in entry.items():
            if name in ("ts", "level", "event"):
                continue
            is_told = is_number(value) or isinstance(value, bool) or (
                isinstance(value, str) and name in _TELLING_FIELDS)
            words.append(f"{name}={self.text(value)[:300] if is_told else '...'}")
        return clean(" ".join(words))


def _key_names(facts: Facts) -> list[str]:
    """Return the names of all keys, from the server or its database, as far as they can be had."""
    with contextlib.suppress(KeyError, TypeError):
        return [str(key["name"]) for key in facts.ask("/api/keys")["keys"]]
    path = os.path.join(facts.here.data_dir, "ocp.db")
    with contextlib.suppress(sqlite3.Error), contextlib.closing(open_database(path, "ro")) as base:
        return [str(name) for (name,) in base.execute("SELECT name FROM keys")]
    return []


def _bundle_versions(facts: Facts, answer: Json) -> Iterator[str]:
    health = facts.health
    yield (f"installed {answer['current_version'] or 'unknown'}, "
           f"runs {health.get('version') or 'no server'}")
    with contextlib.suppress(Problem):
        yield f"commit {git(facts.env, git_tree(facts.env), 'rev-parse', '--short', 'HEAD')}"
    yield f"python {sys.version.split()[0]}, sqlite {sqlite3.sqlite_version}, {ssl.OPENSSL_VERSION}"
    system = platform.system()
    name = settings_of(text_of("/etc/os-release")).get("PRETTY_NAME", system)
    yield f"{name}, {system} {platform.release()}, {platform.machine()}"
    yield f"claude {facts.claude_version or 'unknown'} at {facts.claude or 'unknown'}"
    yield f"service {facts.here.platform if facts.here.label else 'none'}"
    for part in ("status", "authMode", "storage", "stats", "concurrency"):
        if part in health:
            yield f"{part} {json.dumps(health[part])}"


def _bundle_settings(facts: Facts) -> Iterator[str]:
    """Yield settings: numbers, switches and words of a choice; of all others, that they are set."""
    for name, text in sorted(service_environ(facts.env).items()):
        if name.startswith(("CLAUDE_", "OCP_", "PROXY_")) and text:
            yield f"{name}={text if re.fullmatch('[0-9.]{1,12}', text) else '(set)'}"
    for name, row in facts.ask("/settings").items():
        value = row.get("value")
        is_word = isinstance(value, str) and re.fullmatch("[a-z0-9]{0,8}", value)
        shown = json.dumps(value) if is_word or not isinstance(value, str) else "(set)"
        yield f"{name} = {shown}, from {row.get('source')}"


def _log_entries(facts: Facts) -> list[Json]:
    """Return the newest events of the log, from the server, or from its file if it is down."""
    told = facts.ask(f"/logs?n={_REPORT_LOG_LINES}&level=all").get("entries")
    entries = list(told or [])
    path = log_path(facts.env)
    if told is None:
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            for line in file.readlines()[-_REPORT_LOG_LINES:]:
                with contextlib.suppress(ValueError):
                    entries.append(json.loads(line))
    return entries


def bundle(facts: Facts, answer: Json) -> str:
    redactor, kinds = Redactor(facts), facts.ask("/api/errors").get("byKind") or []
    parts = (
        ("Versions", _bundle_versions(facts, answer)),
        ("Checks", (f"[{row['level']}] {row['id']}: {row['message']}" for row in answer["checks"])),
        ("Settings", _bundle_settings(facts)),
        ("Errors by kind", (f"{row.get('kind')}: {row.get('count')}, last at {row.get('lastAt')}"
                            for row in kinds)),
    )
    lines = [f"OCP report of {answer['timestamp']}"]
    for title, rows in parts:
        lines += ["", f"{title}:", *(f"  {redactor.text(row)}" for row in rows)]
    lines += ["", "Log:", *(f"  {redactor.log_line(entry)}" for entry in _log_entries(facts))]
    return "\n".join(lines) + "\n"


def write_bundle(facts: Facts, answer: Json) -> str:
    """Write a report for an issue, which only its owner can read. Returns its path."""
    name = utc_time(facts.env.clock()).strftime("report-%Y%m%dT%H%M%SZ.txt")
    path = os.path.join(facts.env.ocp_home, "logs", name)
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        write_whole(path, bundle(facts, answer).encode("utf-8", "replace"))
    except OSError as error:
        raise failed(f"{path} cannot be written: {error.strerror}.") from None
    return path


def examine(env: Env) -> tuple[Facts, list[Result]]:
    facts = Facts(env)
    return facts, [Result(check, run_check(check, facts)) for check in CHECKS]


def cmd_doctor(env: Env, args: argparse.Namespace) -> Exit:
    """Examine the installation, and mend it if told to. FAILED when a check fails."""
    facts, results = examine(env)
    fixes: dict[str, Json] = {}
    if args.fix:
        fixes = {"fixes": mend(facts, results)}
        facts, results = examine(env)
    answer = {**doctor_report(facts, results), **fixes}
    if args.report:
        path = write_bundle(facts, answer)
        print_answer(env, args, {"report": path}, lambda value, style: path)
        env.note("Read it before you pass it on: keys, names and addresses are left out as far as "
                 "a program can know them.")
        return Exit.OK
    env.say(json.dumps(answer, indent=2) if args.json else show_doctor(answer, style_of(env)))
    return Exit.FAILED if answer["fail_count"] else Exit.OK


# ==== 12. Snapshots ==========================================================
# What an update stands on: git, asked without hooks and without questions; a copy of the database
# and of this program; and a journal, written before each step, from which the next call knows how
# far an interrupted one had come.

#: Why there is nothing to compare an installation with.
NO_RELEASE = "the remote has no release yet: no tag such as v1.2.3"
_RELEASE = re.compile(r"v\d{1,6}\.\d{1,6}\.\d{1,6}")


def git(env: Env, tree: str, *words: str, timeout_s: float = 60.0) -> str:
    """Return what git prints. Raises Problem with its complaint. The environment has nothing that
    would lead git elsewhere, or make it ask."""
    command = ["git", "-C", tree, "-c", "core.hooksPath=/dev/null", "-c",
               "advice.detachedHead=false", *words]
    elsewhere = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY")
    environ = {name: value for name, value in env.environ.items() if name not in elsewhere}
    ssh = environ.get("GIT_SSH_COMMAND", "ssh") + " -oBatchMode=yes"
    environ.update(LC_ALL="C", GIT_TERMINAL_PROMPT="0", GIT_SSH_COMMAND=ssh)
    with progress(env, f"waiting for git {words[0]}"):
        done = env.run(command, environ=environ, timeout_s=timeout_s)
    if done.code != 0:
        raise failed(f"git {words[0]} in {tree} failed: {done.complaint}")
    return done.output.strip()


def git_tree(env: Env) -> str:
    """Return the checkout that this script belongs to. Raises Problem if it is none."""
    tree = os.path.realpath(env.tree)
    try:
        top = git(env, tree, "rev-parse", "--show-toplevel")
        reason = f"it is part of {top}"
    except Problem as problem:
        has_git = os.path.exists(os.path.join(tree, ".git"))
        top, reason = "", str(problem) if has_git else "there is no .git in it"
    if not top or os.path.realpath(top) != tree:
        raise failed(f"{tree} is not a git checkout of OCP ({reason}), so no release can be looked "
                     "for.\nUpdate it by hand: compare the new release with its SHA256SUMS, put "
                     "its files in the place of the old ones, then run\n  python3 "
                     f"{shlex.quote(os.path.join(tree, 'ocp_server.py'))} --check && ocp restart")
    return tree


def local_changes(env: Env, tree: str) -> list[str]:
    """Return the tracked files that were changed here. Raises Problem."""
    lines = git(env, tree, "status", "--porcelain", "--untracked-files=no").splitlines()
    # The first line has lost its leading space.
    return [line[3:] if line[2:3] == " " else line.split(None, 1)[-1] for line in lines]


def is_at(env: Env, tree: str, commit: str) -> bool:
    """Return whether this commit is checked out, complete and unchanged."""
    return git(env, tree, "rev-parse", "HEAD") == commit and not local_changes(env, tree)


def remote_tags(env: Env, tree: str) -> dict[str, str]:
    """Return the releases that the remote offers: tag and commit. Raises Problem. The remote is
    asked each time: a release that was withdrawn must not be offered."""
    if "origin" not in git(env, tree, "remote").splitlines():
        raise failed(f"{tree} has no remote named origin, so no release can be looked for. Name "
                     f"it: git -C {shlex.quote(tree)} remote add origin ADDRESS")
    listed = git(env, tree, "ls-remote", "--tags", "origin", timeout_s=15)
    found: dict[str, str] = {}
    for line in listed.splitlines():
        commit, _, name = line.partition("\t")
        name, _, peeled = name.removeprefix("refs/tags/").partition("^")
        # An annotated tag is listed twice, the second time with the commit that it stands for.
        if _RELEASE.fullmatch(name) and (peeled or name not in found):
            found[name] = commit
    return found


#: Mode for a database that nobody else has open: reading it creates no other files beside it.
_READ_COPY = "ro&immutable=1"


def open_database(path: str, mode: str) -> sqlite3.Connection:
    """Return a connection in mode ro, rw or _READ_COPY. Raises sqlite3.Error."""
    address = f"file:{urllib.parse.quote(path)}?mode={mode}"
    return sqlite3.connect(address, uri=True, timeout=5)


def database_version(path: str, mode: str = "ro") -> int | None:
    """Return the number of a database's last migration, None if it cannot be read."""
    try:
        with contextlib.closing(open_database(path, mode)) as connection:
            return int(connection.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.Error:
        return None


def save_database(source: str, target: str) -> None:
    """Copy a database that may be in use, as it is at one moment. Raises Problem."""
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with contextlib.closing(open_database(source, "ro")) as opened:
            with contextlib.closing(open_database(target, "rw")) as copy:
                opened.backup(copy)
    except sqlite3.Error as error:
        raise failed(f"{source} cannot be saved ({error}), so nothing was changed. See `ocp "
                     "doctor`.") from None


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
    #: Whether undoing has to overwrite files, because a checkout was interrupted.
    is_torn: bool = False
    #: Whether undoing has to put the database back, because the new version migrated it.
    restore_database: bool = False


#: prepared: nothing is changed yet. switching: the checkout may be incomplete. switched: the new
#: version is checked out, and not yet proved. undoing: on the way back.
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
        """Write another state down, and return the snapshot with it."""
        journal = self.journal._replace(state=state, **changes)
        text = json.dumps(journal._asdict(), indent=2) + "\n"
        write_whole(os.path.join(self.folder, _JOURNAL), text.encode())
        return self._replace(journal=journal)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)


def snapshots_folder(env: Env) -> str:
    return os.path.join(env.ocp_home, "snapshots")


def read_snapshots(env: Env) -> list[Snapshot]:
    """Return all complete snapshots with a readable journal, the newest first."""
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


def take_snapshot(env: Env, journal: Journal) -> Snapshot:
    """Copy what an update could harm. Raises Problem, OSError. An incomplete snapshot has another
    name, so that an interrupted one is never taken for whole."""
    name = utc_time(env.clock()).strftime("%Y%m%dT%H%M%S.%fZ")
    folder = os.path.join(snapshots_folder(env), name)
    draft = Snapshot(folder + ".partial", journal)
    os.makedirs(draft.folder, mode=0o700)
    database = os.path.join(journal.data_dir, "ocp.db")
    if os.path.exists(database):
        save_database(database, draft.path("ocp.db"))
    with contextlib.suppress(FileNotFoundError), open(env.beside("ocp.py"), "rb") as file:
        write_whole(draft.path("ocp.py"), file.read())
    draft.at(journal.state)
    os.rename(draft.folder, folder)
    return Snapshot(folder, journal)


def prune_snapshots(env: Env) -> None:
    closed = [each for each in read_snapshots(env) if each.journal.state in CLOSED_STATES]
    folders = [each.folder for each in closed[_SNAPSHOTS_KEPT:]]
    with contextlib.suppress(FileNotFoundError):
        folders += [os.path.join(snapshots_folder(env), name)
                    for name in os.listdir(snapshots_folder(env)) if name.endswith(".partial")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def put_back_database(snapshot: Snapshot) -> None:
    """Put the saved database in the place of the present one, which is kept in the snapshot.

    The server must not be running. The order matters: a write-ahead log that is left beside
    another database would be played into it. If none was saved, there was none.
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


# ==== 13. Update =============================================================
# From one release to another and back. The order is the safety: save, test the new version where
# it harms nobody, switch, restart, ask what is served. Whatever fails after the switch is rolled
# back; whatever is interrupted is finished or undone by the next call.


@contextlib.contextmanager
def update_lock(env: Env) -> Iterator[None]:
    """Hold the lock of updates. Raises Problem if another process has it."""
    for folder in (env.ocp_home, snapshots_folder(env)):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    path = os.path.join(snapshots_folder(env), "lock")
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise failed("Another `ocp update` is running.") from None
        yield


def service_to_update(env: Env, tree: str) -> Record | None:
    """Return the service to restart. Raises Problem if this update could not do that."""
    record = service_of(env)
    if record is None:
        return None
    folder = os.path.dirname(record.server_path)
    if os.path.realpath(folder) != tree:
        raise failed(f"The service runs {record.server_path}, which is not in {tree}.\nUpdate that "
                     f"one: {shlex.join(['python3', os.path.join(folder, 'ocp.py')])} update")
    if record.needs_root and env.user_id != 0:
        words = ["sudo", f"OCP_HOME={env.ocp_home}", "python3", os.path.join(tree, "ocp.py")]
        raise Problem(
            Exit.DENIED, f"The service belongs to the system. Run: {shlex.join(words)} update")
    return record


def _wanted_release(tags: Mapping[str, str], target: str, current: str) -> str:
    """Return the tag that the user named. Raises Problem."""
    wanted = "v" + target.removeprefix("v")
    if not _RELEASE.fullmatch(wanted):
        raise Problem(Exit.USAGE, f"{clean(target)!r} is not a version such as v1.2.3.")
    if wanted not in tags:
        raise failed(f"There is no release {wanted}: see `ocp update --check`.")
    if version_tuple(wanted) < version_tuple(current):
        raise failed(f"{wanted} is older than {current}; `ocp update --rollback` goes back.")
    return wanted


def plan_update(env: Env, tree: str, target: str | None) -> Journal | str:
    """Return what to update, or in words why there is nothing newer. Raises Problem."""
    tags = remote_tags(env, tree)
    current = version_of(os.path.join(tree, "ocp_server.py"))
    if not version_tuple(current):
        raise failed(f"{tree} has no ocp_server.py with a version.")
    newest = max(tags, key=version_tuple, default="")
    wanted = newest if target is None else _wanted_release(tags, target, current)
    if not newest:
        return f"v{current} is installed; {NO_RELEASE}"
    if version_tuple(wanted) <= version_tuple(current):
        return (f"v{current} is installed, and there is nothing newer: the newest release is "
                f"{newest}")
    branch = git(env, tree, "rev-parse", "--abbrev-ref", "HEAD")
    return Journal(
        "prepared", tree, local_server(env).data_dir, git(env, tree, "rev-parse", "HEAD"),
        "" if branch == "HEAD" else branch, current, tags[wanted], wanted[1:],
        iso_time(env.clock()))


def refuse_local_work(env: Env, plan: Journal) -> None:
    """Raise Problem when the checkout holds its owner's work, which an update would put aside."""
    changed, tree = local_changes(env, plan.tree), shlex.quote(plan.tree)
    if changed:
        raise failed(f"{plan.tree} has local changes: {clean(', '.join(changed[:5]))}.\nNothing "
                     f"was changed. Save them with `git -C {tree} stash`, or commit them "
                     "elsewhere.")
    known = git(env, plan.tree, "for-each-ref", "--count=1", "--contains", plan.from_commit,
                "refs/tags", "refs/remotes")
    if not known:
        raise failed(f"{plan.tree} has commits of its own, which no release contains. Nothing was "
                     f"changed.\nMerge the release yourself: git -C {tree} merge "
                     f"v{plan.to_version}")


#: In a checkout: who may sign releases, in the form of ssh-keygen. The file of the version that is
#: installed counts, never that of the new one.
SIGNERS = os.path.join("tools", "allowed_signers")
#: The first git that verifies such signatures.
_VERIFYING_GIT = (2, 34)


def verify_tag(env: Env, plan: Journal) -> str:
    """Return in words whether the fetched tag is signed. Raises Problem if it must not be taken."""
    name, tree = f"v{plan.to_version}", plan.tree
    if git(env, tree, "rev-parse", f"refs/tags/{name}^{{commit}}") != plan.to_commit:
        raise failed(f"{name} has changed while it was fetched: update once more.")
    if not os.path.exists(os.path.join(tree, SIGNERS)):
        return f"{name}: no signature to verify, because this version names no signers ({SIGNERS})"
    found = re.search(r"(\d+)\.(\d+)", git(env, tree, "version"))
    if not found or (int(found[1]), int(found[2])) < _VERIFYING_GIT:
        return f"{name}: its signature was not verified, because git is older than 2.34"
    try:
        # Only keys of that file count: none of the user's own for other kinds of signatures.
        git(env, tree, "-c", f"gpg.ssh.allowedSignersFile={os.path.join(tree, SIGNERS)}",
            "-c", "gpg.program=false", "-c", "gpg.x509.program=false", "verify-tag",
            f"refs/tags/{name}")
    except Problem:
        raise failed(f"{name} is not signed by any key of {os.path.join(tree, SIGNERS)}, so it was "
                     "not installed, and nothing was changed.") from None
    # A signed tag could be offered again under the name of another release.
    if f"\ntag {name}\n" not in git(env, tree, "cat-file", "tag", f"refs/tags/{name}"):
        raise failed(f"What is offered as {name} was signed as another release.")
    return f"{name} is signed by a key of {SIGNERS}"


def compare_sums(env: Env, plan: Journal, folder: str) -> str:
    """Return in words whether files have the SHA-256 sums in the tag's message. Raises Problem."""
    told = git(env, plan.tree, "for-each-ref", "--format=%(contents)",
               f"refs/tags/v{plan.to_version}")
    compared = 0
    for wanted, name in re.findall(r"(?m)^([0-9a-f]{64})  ([\w.-]+)$", told):
        with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, name), "rb") as file:
            if hashlib.sha256(file.read()).hexdigest() != wanted:
                raise failed(f"{name} does not have the sum that the tag names.")
            compared += 1
    if not compared:
        return f"v{plan.to_version} names no sums: its files are taken as git fetched them"
    return f"{counted(compared, 'file')} of v{plan.to_version} compared with the sums in its tag"


def show_update_plan(plan: Journal, record: Record | None) -> str:
    restart = f"restart {record.label} and ask its version" if record else (
        "no service is installed: you restart the server yourself")
    return field_list([
        ("update", f"v{plan.from_version} -> v{plan.to_version}"), ("in", plan.tree),
        ("1", "save the commit, the database and this program"),
        ("2", "test the new version in a folder of its own: ocp_server.py --check"),
        ("3", f"git checkout v{plan.to_version}"), ("4", restart),
        ("on failure", "roll back to the version before"),
    ])


def _is_migrated(snapshot: Snapshot) -> bool:
    """Return whether the new version has changed the form of the database."""
    copy = snapshot.path("ocp.db")
    saved = database_version(copy, _READ_COPY) if os.path.exists(copy) else 0
    present = database_version(os.path.join(snapshot.journal.data_dir, "ocp.db"))
    return saved is not None and present is not None and present > saved


class Update:
    """An update on its way. How far it has come is written down before each step."""

    def __init__(self, env: Env, snapshot: Snapshot, record: Record | None) -> None:
        self.env, self.snapshot, self.record = env, snapshot, record

    @property
    def plan(self) -> Journal:
        return self.snapshot.journal

    def at(self, state: str, **changes: Any) -> None:
        self.snapshot = self.snapshot.at(state, **changes)

    def git(self, *words: str) -> str:
        return git(self.env, self.plan.tree, *words)

    def switch(self) -> Exit:
        """Test and check out the new version, then finish; or leave everything unchanged."""
        plan = self.plan
        self.env.say(f"testing v{plan.to_version}")
        try:
            self._check_new_version()
        except Problem as problem:
            self.at("refused")
            raise failed(f"v{plan.to_version} was not installed, and nothing was changed. "
                         f"{problem}") from None
        self.at("switching", is_torn=True)
        try:
            self.git("checkout", "--quiet", "--no-overwrite-ignore", "--detach", plan.to_commit,
                     "--")
        except Problem as problem:
            if is_at(self.env, plan.tree, plan.from_commit):
                self.at("refused", is_torn=False)
                raise failed(f"{problem}\nNothing was changed.") from None
            self.env.note(f"{problem} Rolling back.")
            self.roll_back()
            return Exit.FAILED
        self.at("switched", is_torn=False)
        return self._finish()

    def _check_new_version(self) -> None:
        """Raise Problem unless the new version says that it would start here."""
        plan, folder = self.plan, self.snapshot.path("tree")
        self.git("-c", "core.autocrlf=false", "worktree", "add", "--quiet", "--detach", folder,
                 plan.to_commit)
        try:
            self.env.say(compare_sums(self.env, plan, folder))
            found = version_of(os.path.join(folder, "ocp_server.py"))
            if found != plan.to_version:
                raise failed(f"The release holds version {found or '?'} instead.")
            fault = self._fault_of(folder)
            if fault and not self._fault_of(plan.tree):
                raise failed(f"It would not start here: {fault}")
            if fault:
                # What is wrong already, such as a missing claude, is no reason against it.
                self.env.note(f"Not all is well here, before and after the update: {fault}")
        finally:
            self._remove_worktree()

    def _fault_of(self, tree: str) -> str:
        """Return why the version in a folder would not start here, "" if it would."""
        command = [local_server(self.env).python, "-B", os.path.join(tree, "ocp_server.py")]
        with progress(self.env, "testing the new version"):
            done = self.env.run([*command, "--check"], timeout_s=60,
                                environ=service_environ(self.env))
        return "" if done.code == 0 else done.complaint

    def _remove_worktree(self) -> None:
        """Remove the folder in which a new version was tested, also what is left of one."""
        shutil.rmtree(self.snapshot.path("tree"), ignore_errors=True)
        self.git("worktree", "prune")

    def _finish(self) -> Exit:
        """Restart into the version that is checked out, or roll back if it does not answer."""
        version = self.plan.to_version
        if self.record:
            self.env.say(f"restarting {self.record.label}")
            wrong = restart_and_ask(self.env, self.record, version)
            if wrong:
                self.env.note(f"v{version} does not work here: {wrong}.\nRolling back.")
                self.roll_back()
                return Exit.FAILED
        self.at("done")
        prune_snapshots(self.env)
        self.env.say(f"updated to v{version}; `ocp update --rollback` goes back")
        if self.record is None:
            self.env.say("No service is installed: if a server is running, restart it yourself.")
        self._update_openclaw()
        return Exit.OK

    def roll_back(self) -> Exit:
        """Undo, and say how that went. Raises Problem if the server does not answer after it."""
        version, wrong = self.plan.from_version, self._undo()
        if wrong:
            raise failed(f"v{version} is checked out again, but its server is not well: "
                         f"{wrong}.\nSee `ocp doctor`.")
        self.env.say(f"rolled back to v{version}")
        self._update_openclaw()
        return Exit.OK

    def _undo(self) -> str:
        """Bring the old version back. Returns "", or why its server does not answer. Every step may
        be done twice: an interrupted undo can be started again. Raises Problem."""
        self.at("undoing",
                restore_database=self.plan.restore_database or _is_migrated(self.snapshot))
        self._remove_stale_lock()
        if self.plan.restore_database:
            self._stop_for_database()
        self._switch_back()
        if self.plan.restore_database:
            put_back_database(self.snapshot)
            # From here on it is in use again, and must not be put back a second time.
            self.at("undoing", restore_database=False)
            self.env.note("The database is the saved one again; what came after the update is "
                          "kept in " + self.snapshot.path("newer-ocp.db"))
        wrong = ""
        if self.record:
            wrong = restart_and_ask(self.env, self.record, self.plan.from_version)
        self.at("undone")
        return wrong

    def _remove_stale_lock(self) -> None:
        """Remove the lock of a git that a power cut ended; a young one may be a live git's."""
        path = os.path.join(self.plan.tree, self.git("rev-parse", "--git-path", "index.lock"))
        with contextlib.suppress(FileNotFoundError):
            if self.env.clock() - os.stat(path).st_mtime > 10:
                os.unlink(path)

    def _stop_for_database(self) -> None:
        """Make sure that no server has the database open. Raises Problem."""
        complaint = run_service(self.env, self.record, "stop") if self.record else ""
        if health_of(self.record.url if self.record else server_url(self.env)) is not None:
            raise failed("The database has to be put back, but a server is still running: stop "
                         f"it, then run `ocp update --rollback --yes`. {complaint}".rstrip())

    def _switch_back(self) -> None:
        plan, tip = self.plan, ""
        if plan.from_branch:
            with contextlib.suppress(Problem):
                tip = self.git("rev-parse", f"refs/heads/{plan.from_branch}")
        before = [plan.from_branch] if tip == plan.from_commit else ["--detach", plan.from_commit]
        self.git("checkout", "--quiet", *(["--force"] * plan.is_torn), *before, "--")

    def _update_openclaw(self) -> None:
        """Give OpenClaw the models of the version in the checkout. Its failure undoes nothing."""
        env = dataclasses.replace(self.env, tree=self.plan.tree)
        if not os.path.exists(env.beside("ocp_connect.py")):
            return
        try:
            found = sync_openclaw(env, self.record.url if self.record else DEFAULT_URL)
        except Problem as problem:
            env.note(f"OpenClaw's list of models was not checked: {problem}")
            return
        if found["written"]:
            env.say("OpenClaw has the models of this version now")
        for failure in found["failures"]:
            env.note(f"OpenClaw's list of models: {failure}. Try again with: ocp sync")

    def recover(self, back: bool) -> Exit | None:
        """Finish or undo what was interrupted; None when it had changed nothing."""
        plan, note = self.plan, self.env.note
        if plan.state == "prepared":
            self._remove_worktree()
            self.at("refused")
            note("It had changed nothing.")
            return None
        if plan.state == "switching" and is_at(self.env, plan.tree, plan.to_commit):
            self.at("switched", is_torn=False)
        if self.plan.state == "switched" and not back:
            note("Finishing it.")
            return self._finish()
        note("Undoing it.")
        code = self.roll_back()
        return code if back else Exit.FAILED


SNAPSHOT_COLUMNS = (
    Column("Snapshot", lambda each: os.path.basename(each.folder)),
    Column("From", lambda each: "v" + each.journal.from_version),
    Column("To", lambda each: "v" + each.journal.to_version),
    Column("State", lambda each: each.journal.state),
    Column("Taken", lambda each: each.journal.started_at, age),
)


def show_snapshots(snapshots: Sequence[Snapshot], style: Style) -> str:
    return table(SNAPSHOT_COLUMNS, snapshots, style, empty="no snapshots")


def _rollback(env: Env, args: argparse.Namespace) -> Exit:
    done = next((each for each in read_snapshots(env) if each.journal.state == "done"), None)
    if done is None:
        raise failed("There is no finished update to roll back.")
    journal = done.journal
    record = service_to_update(env, os.path.realpath(journal.tree))
    if not is_at(env, journal.tree, journal.to_commit):
        raise failed(f"{journal.tree} is not as the update left it (v{journal.to_version}, "
                     "unchanged), so it is left alone. By hand: git checkout "
                     f"{journal.from_commit[:12]}, and a restart.")
    words = f"v{journal.to_version} -> v{journal.from_version} in {journal.tree}"
    if args.dry_run:
        env.say(f"would roll back {words}")
        return Exit.OK
    confirm(f"Roll back {words}?", args.yes, env.stdin, env.stdout)
    return Update(env, done, record).roll_back()


#: In the server's folder: the newest release that `ocp update --check` found. The server asks
#: nobody by itself; its dashboard says what stands here.
NEWEST_RELEASE_FILE = "newest-release"


def note_newest(env: Env, version: str) -> None:
    """Leave a release for the server's dashboard; an empty version = there is nothing newer."""
    path = os.path.join(env.ocp_home, NEWEST_RELEASE_FILE)
    # A folder that another user owns, or none: then the dashboard says nothing.
    with contextlib.suppress(OSError):
        if version and os.path.isdir(env.ocp_home):
            write_whole(path, f"{version}\n".encode("ascii"))
        elif not version:
            os.remove(path)


def _update(env: Env, args: argparse.Namespace) -> Exit:
    tree = git_tree(env)
    plan = plan_update(env, tree, args.target)
    if args.check and not args.target:
        note_newest(env, "" if isinstance(plan, str) else plan.to_version)
    if isinstance(plan, str) or args.check:
        env.say(plan if isinstance(plan, str)
                else f"installed v{plan.from_version}, v{plan.to_version} is available")
        return Exit.OK
    refuse_local_work(env, plan)
    record = service_to_update(env, tree)
    env.say(show_update_plan(plan, record))
    if args.dry_run:
        return Exit.OK
    confirm("Do this?", args.yes, env.stdin, env.stdout)
    tag = f"refs/tags/v{plan.to_version}"
    git(env, tree, "fetch", "--quiet", "--no-tags", "origin", f"{tag}:{tag}", timeout_s=300)
    env.say(verify_tag(env, plan))
    snapshot = take_snapshot(env, plan)
    env.say(f"saved {snapshot.folder}")
    return Update(env, snapshot, record).switch()


def cmd_update(env: Env, args: argparse.Namespace) -> Exit:
    if args.list and not args.rollback:
        raise Problem(Exit.USAGE, "--list goes with --rollback.")
    if args.list:
        env.say(show_snapshots(read_snapshots(env), style_of(env)))
        return Exit.OK
    if args.rollback and (args.check or args.target):
        raise Problem(Exit.USAGE, "--rollback goes back by one update: no --check and no --target.")
    if args.check:
        return _update(env, args)
    with update_lock(env):
        states = read_snapshots(env)
        interrupted = next((s for s in states if s.journal.state in OPEN_STATES), None)
        if interrupted and args.dry_run:
            raise failed("An update was interrupted: `ocp update` ends it.")
        if interrupted:
            journal = interrupted.journal
            env.note(f"The update to v{journal.to_version} was interrupted ({journal.state}).")
            record = service_to_update(env, os.path.realpath(journal.tree))
            code = Update(env, interrupted, record).recover(args.rollback)
            if code is not None or args.rollback:
                return Exit.OK if code is None else code
        return _rollback(env, args) if args.rollback else _update(env, args)


# ==== 14. Command line =======================================================
# Parser, help texts and completion, all made from the table of commands.


def cmd_version(env: Env, args: argparse.Namespace) -> Exit:
    installed, nobody = version_of(env.beside("ocp_server.py")) or None, "no server answers"
    health: Json = {}
    try:
        health = health_of(server_url(env)) or {}
    except Problem:
        nobody = "another program answers, no OCP server"
    found = {"installed": installed, "served": health.get("version"),
             "claude": health.get("claudeVersion")}
    return print_answer(env, args, found, lambda found, style: field_list([
        ("installed", installed or "no ocp_server.py beside ocp.py"),
        ("served", found["served"] or nobody), ("claude", found["claude"] or "unknown"),
    ]))


def commands_text() -> str:
    named = {name for _, names in GROUPS for name in names}
    rest = tuple(command.name for command in COMMANDS if command.name not in named)
    width = max(len(command.name) for command in COMMANDS)
    parts = []
    for title, names in (*GROUPS, ("Others", rest)):
        rows = [f"  {command.name:<{width}}  {command.summary}" for name in names
                for command in COMMANDS if command.name == name]
        parts += ["\n".join([f"{title}:", *rows])] if rows else []
    return "\n\n".join(parts)


def help_text() -> str:
    first = (__doc__ or "").partition("\n")[0]
    options = field_list([
        (" ".join([", ".join(each.names), each.options.get("metavar", "")]), each.options["help"])
        for each in (*ROOT.arguments, *EVERYWHERE)
    ] + [("--help, -h", "show this help, or that of a command")])
    return f"""{first}

Usage: ocp COMMAND [ARGUMENTS]

{commands_text()}

Options (--json, --url and --debug also after the command):
{options}

Examples:
  ocp ask why is the sky blue
  ocp keys add laptop --expiry 90d --daily 200
  ocp logs --level error --since 1h
  git diff | ocp ask -s 'You review code.' find the mistakes

More: ocp COMMAND --help; ocp help environment for variables and exit codes"""


def cmd_help(env: Env, args: argparse.Namespace) -> Exit:
    if args.words == ["environment"]:
        env.say((__doc__ or "").partition("\n\n")[2].strip())
        return Exit.OK
    asked = parse(env, [*args.words, "--help"])
    # Only what another program explains comes back.
    code: Exit = asked.run(env, asked)
    return code


class Parser(argparse.ArgumentParser):
    """argparse whose errors are Problems."""

    def error(self, message: str) -> NoReturn:
        usage = self.format_usage().removeprefix("usage: ").strip()
        raise Problem(Exit.USAGE, f"{message}\nUsage: {usage}\nMore: {self.prog} --help")


class Whole(Parser):
    """The parser of the whole command line, whose help is in groups."""

    def format_help(self) -> str:
        return help_text() + "\n"

    def format_usage(self) -> str:
        return "ocp COMMAND [ARGUMENTS]"


def filled(parser: argparse.ArgumentParser, row: Command, name: str) -> argparse.ArgumentParser:
    """Return the parser with the arguments and the actions of a row, which the function of this
    name carries out."""
    for each in (*row.arguments, *EVERYWHERE):
        parser.add_argument(*each.names, **each.options)
    parser.set_defaults(run=globals()[name] if row.name else None, parser=parser)
    if row.actions:
        below = parser.add_subparsers(metavar="COMMAND", title="commands", parser_class=Parser)
    for action in row.actions:
        examples = "".join(f"\n  ocp {example}" for example in action.examples)
        filled(below.add_parser(
            action.name, help=action.help, description=f"{action.summary}.", allow_abbrev=False,
            formatter_class=functools.partial(
                argparse.RawDescriptionHelpFormatter, max_help_position=28),
            epilog=f"examples:{examples}" if examples else None), action, f"{name}_{action.name}")
    return parser


def behind_options(words: Sequence[str]) -> Sequence[str]:
    """Return the words from the command on: without the options before it."""
    at = 0
    while at < len(words) and words[at].startswith("-"):
        at += 2 if words[at] == "--url" else 1
    return words[at:]


def find_command(words: Sequence[str]) -> tuple[Command, Sequence[str]]:
    """Return the row that the words name, and the words behind its name."""
    row = ROOT
    for at, word in enumerate(words):
        found = next((each for each in row.actions if each.name == word), None)
        if found is None:
            return row, words[at:]
        row = found
    return row, ()


#: Command without actions -> what others call them -> what to write.
_NO_ACTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "settings": {"set": (), "get": (), "show": (), "list": (), "reset": ("--reset",)},
    "capture": {"start": ("5",), "stop": ("--stop",), "list": ("--list",)},
}


def _refuse_unknown(words: Sequence[str]) -> None:
    row, behind = find_command(words)
    no_actions = _NO_ACTIONS.get(row.name, {})
    if behind[:1] and behind[0] in no_actions:
        line = " ".join(["ocp", row.name, *no_actions[behind[0]], *map(clean, behind[1:])])
        raise Problem(Exit.USAGE, f"There is no action {behind[0]!r} here. Write: {line}")
    if not row.actions or not behind or behind[0].startswith("-"):
        return
    hint = did_you_mean(behind[0], [each.name for each in row.actions])
    kind = "action" if row.name else "command"
    line = " ".join(filter(None, ["ocp", row.name, "--help"]))
    raise Problem(Exit.USAGE, f"There is no {kind} {clean(behind[0])!r}.{hint}\nMore: {line}")


def _hint_for(words: Sequence[str], more: Sequence[str], options: Sequence[str]) -> str:
    """Return what may be meant by arguments that a command line has too many; empty if unknown."""
    row, option = find_command(words)[0], more[0].partition("=")[0]
    if option in options:
        return f" It goes behind `ocp {row.name}`."
    others = [f"`ocp {words[0]} {each.name}`" for each in find_command(words[:1])[0].actions
              if any(option in known.names for known in each.arguments)]
    if others:
        return f" {' and '.join(others)} {'take it' if others[1:] else 'takes it'}."
    hint = did_you_mean(more[0], options)
    has_name = any(known.options.get("metavar") in ("NAME", "KEY") and known.names[0][0] != "-"
                   for known in row.arguments)
    if hint or not has_name or any(word.startswith("-") for word in more):
        return hint
    return " A name with spaces needs quotes."


def parse(env: Env, words: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of a command line. Raises Problem, and SystemExit after a --help."""
    command = behind_options(words)
    _refuse_unknown(command)
    if command[:1] in (["connect"], ["channels"], ["tenants"]):
        # The options behind it, --help too, are another program's.
        words = [*words[:len(words) - len(command)], command[0], "--", *command[1:]]
    whole = filled(Whole(prog="ocp", allow_abbrev=False), ROOT, "cmd")
    whole.set_defaults(url=None, debug=False)
    with contextlib.redirect_stdout(env.stdout):
        args, more = whole.parse_known_args(list(words))
    row = find_command(command)[0]
    options = [name for each in (*row.arguments, *EVERYWHERE) for name in each.names
               if name.startswith("--")]
    if more and hasattr(args, "words") and not any(word.startswith("-") for word in more):
        # Words that an option divides, which argparse does not put together.
        args.words += more
    elif more:
        hint = _hint_for(command, more, options)
        args.parser.error(f"unrecognized arguments: {' '.join(map(clean, more))}.{hint}")
    if hasattr(args, "json") and args.run and "--json" not in options:
        args.parser.error("there is no --json here")
    return argparse.Namespace(**{"json": False, **vars(args)})


#: Metavar of an argument that is completed with names of the server: path, list, field of a row.
#: Without a list, the names are those of the answer's own fields.
VALUES = {
    "KEY": ("/api/keys", "keys", "name"), "MODEL": ("/v1/models", "data", "id"),
    "SESSION": ("/sessions", "sessions", "id"),
    "REQUEST": ("/api/requests", "requests", "request_id"), "SETTING": ("/settings", "", ""),
}


def _server_names(env: Env, metavar: str) -> list[str]:
    """Return names of the server for a metavar; none if they cannot be had quickly."""
    metavar = metavar.partition("|")[0]
    if metavar not in VALUES:
        return []
    path, rows, field = VALUES[metavar]
    try:
        answer = find_server(env).ask("GET", path, timeout_s=2.0).value
        return [str(row[field]) for row in answer[rows]] if rows else list(answer)
    except (Problem, KeyError, TypeError):
        return []


def _argument_words(env: Env, command: Command, before: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield what may be an argument of a command after the words `before`, each with its help."""
    last = before[-1] if before else ""
    if command.name in ("connect", "tenants"):
        found = connect_options if command.name == "connect" else tenants_commands
        yield from ((name, "") for name in found(env))
        return
    arguments = (*command.arguments, *EVERYWHERE)
    expecting = [each for each in arguments if last in each.names and "metavar" in each.options]
    for each in expecting or arguments:
        if each.names[0].startswith("-") and not expecting:
            yield from ((name, each.options["help"]) for name in each.names if name[:2] == "--")
            continue
        words = each.options.get("choices", ()) or _server_names(env, each.options["metavar"])
        yield from ((name, "") for name in words)
    if command.name == "logs" and not expecting:
        yield from ((level, "") for level in LOG_WORDS)
    if not expecting:
        yield "--help", "show the help"


def completions(env: Env, words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield what the last of these words may become, each with its help. Names with characters that
    a shell would have to quote are left out."""
    *before, current = words or [""]
    before = list(behind_options(before))
    row, behind = find_command(before[1:] if before[:1] == ["help"] else before)
    possible = [] if behind else [(each.name, each.summary) for each in row.actions]
    for name, text in [*possible, *_argument_words(env, row, behind)]:
        if name.startswith(current) and re.fullmatch(r"[\w.@%+,/-]+", name):
            yield name, text


#: What asks `ocp __complete` for the words that may come next, for each shell.
COMPLETIONS = {
    "bash": """\
_ocp() {
    local IFS=$'\\n'
    COMPREPLY=($(ocp __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null | cut -f 1))
}
complete -F _ocp ocp""",
    "zsh": """\
#compdef ocp
_ocp() {
    local -a found
    found=("${(@f)$(ocp __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    found=("${(@)found//:/\\\\:}")
    found=("${(@)found/$'\\t'/:}")
    _describe ocp found
}
if [[ $funcstack[1] == _ocp ]]; then _ocp "$@"; else compdef _ocp ocp; fi""",
    "fish": """\
function __ocp_complete
    set -l words (commandline -opc) (commandline -ct)
    ocp __complete $words[2..-1] 2>/dev/null
end
complete -c ocp -f -a '(__ocp_complete)'""",
}


def cmd_completion(env: Env, args: argparse.Namespace) -> Exit:
    env.say(COMPLETIONS[args.shell])
    return Exit.OK


# ==== 15. Main ===============================================================
# The program, and the program with its errors turned into messages and exit codes.


def program(env: Env) -> Exit:
    """Run the command of `env`. Raises Problem, and SystemExit(0) after a --help."""
    words = list(env.argv)
    if words[:1] == ["__complete"]:
        for name, text in completions(env, words[1:]):
            env.say(f"{name}\t{text}")
        return Exit.OK
    args = parse(env, words)
    if args.version:
        env.say(f"ocp {VERSION}")
        return Exit.OK
    if args.run is None:
        env.say(help_text())
        return Exit.OK
    if args.url is not None:
        url = parse_url(args.url, "--url")
        env = dataclasses.replace(env, environ={**env.environ, "OCP_URL": url})
    code: Exit = args.run(env, args)
    return code


def main(env: Env) -> Exit:
    """Run the command of `env` and return the exit code. Errors become messages."""
    try:
        return program(env)
    except SystemExit:
        return Exit.OK
    except KeyboardInterrupt:
        env.note("")
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # The reader of the output, such as `head`, needs no more.
        return Exit.OK
    except Exception as error:
        if "--debug" in env.argv:
            traceback.print_exc(file=env.stderr)
        if isinstance(error, Problem):
            env.note(f"ocp: {error}")
            return error.code
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            env.note(f"ocp: The output could not be written: {error.strerror}. What the command "
                     "has changed stays changed.")
            return Exit.FAILED
        env.note(f"ocp: this should not have happened: {type(error).__name__}: {clean(error)}")
        env.note("Run it again with --debug to see where, and report it.")
        return Exit.FAILED


def real_env() -> Env:
    """Return the world as it is."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Whoever started this has closed it, as `>&-` does.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
        if mode == "w":
            # A terminal with few characters still gets the rest of an answer.
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
