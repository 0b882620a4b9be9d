#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# ///
"""ocp_channels joins chat platforms to OCP, or to any agent that speaks chat completions.

    python3 ocp_channels.py channels add --channel telegram --botToken TOKEN
    python3 ocp_channels.py start             receive and answer messages, until Ctrl-C
    python3 ocp_channels.py start -d          the same in the background; status, stop, restart
    python3 ocp_channels.py pairing approve CODE
    python3 ocp_channels.py test              check this program with a fake agent and channel
    python3 ocp_channels.py --help            everything else

Telegram, Discord, WeChat, DingTalk and QQ are built in; each may have several accounts. Nobody may
talk to a bot until its owner approves: a stranger only gets a code, and the agent is not asked.
Messages are saved before they are acknowledged to the platform, and answers before they are sent,
so that a crash or a kill loses neither.

Exit codes: 0 done; 1 failed, the message says why; 2 wrong usage or settings; 3 not running;
4 not allowed; 130 interrupted.
"""
# How a message is answered: a channel receives it and calls `accept`, which checks access and
# writes the inbox; the lane of its chat runs a turn, which asks the agent and writes the answer's
# parts into the outbox; the account's sender sends them. Wire formats exist only in the channels.
# The database is the queue: no state that must survive a kill is held only in memory.
#
# Each section uses only names from the sections above it.
#
# Sections (search for "==== 8" to jump to the eighth):
#
#      1. Small tools       exit codes, files, ids, text without control characters
#      2. Contracts         messages, parts, channels, and how a channel fails
#      3. Settings          the file, its tables, and every error in it at once
#      4. Log               a file and the terminal, without secrets
#      5. Store             the database: inbox, outbox, history, pairing, state of accounts
#      6. HTTP              connections, proxies, JSON calls, server-sent events
#      7. WebSocket         a client of RFC 6455
#      8. QR code           a link as a square on a terminal
#      9. Text              Markdown to a platform's markup, in parts that fit its limit
#     10. Opcode gateway    what Discord and QQ share
#     11. Telegram
#     12. Discord
#     13. QQ
#     14. DingTalk
#     15. WeChat
#     16. Channel table     the built-in channels
#     17. Access            who may talk: policies, mentions, pairing, limits
#     18. Agent             chat completions, streamed or not, and their failures
#     19. Callbacks         answers that an agent sends later
#     20. Turns             lanes, previews, commands in the chat, sending
#     21. App               owns every long-lived object; supervisors; the control socket
#     22. Plugins           channels from the owner's own files
#     23. Command line      commands, the self-test, main
from __future__ import annotations  # OCP needs Python 3.9 or later; Python 3.6 shows this line.

import sys

if sys.version_info < (3, 9):
    sys.exit("ocp_channels needs Python 3.9 or later; this is Python %d.%d." % sys.version_info[:2])

import argparse
import base64
import collections
import contextlib
import difflib
import enum
import fcntl
import functools
import hashlib
import hmac
import html
import http.client
import http.server
import ipaddress
import itertools
import json
import math
import operator
import os
import queue
import re
import secrets
import select
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import subprocess
import tempfile
import threading
import time
import types
import unicodedata
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, NoReturn, Optional, TextIO, Union, cast

VERSION = "1.0.0"

Json = dict[str, Any]


# ==== 1. Small tools =========================================================
# Each script has to work when it is copied alone, so a few functions are repeated in several of
# them. A test keeps the copies between "--- shared: NAME" and "--- end shared" identical.


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


#: The command that starts this program, for messages.
PROGRAM = "ocp channels" if os.path.exists(os.path.join(os.path.dirname(os.path.abspath(
    __file__)), "ocp.py")) else "python3 ocp_channels.py"


_DAY_S, _MONTH_S = 86_400.0, 31 * 86_400.0


def clean(text: object) -> str:
    """Return `text` with "?" for control characters, which could steer a terminal, and for
    surrogates, which cannot be stored."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", "?", str(text))


def encodable(text: str, alone: str = "replace") -> str:
    """Return a text with surrogate pairs joined. Lone surrogates are replaced, or kept with
    "surrogatepass"."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", alone)


def is_loopback(host: str) -> bool:
    """Return whether a host is "localhost" or a loopback address, without a DNS lookup."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def reason_of(problem: Exception) -> str:
    """Return why something failed, in a few words and without a URL."""
    if isinstance(problem, TimeoutError):
        return "timed out"
    if isinstance(problem, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {problem.verify_message}"
    return clean(getattr(problem, "strerror", None) or problem or type(problem).__name__)


def compact(value: object) -> str:
    """Return JSON without spaces, ASCII only."""
    return json.dumps(value, separators=(",", ":"))


def json_object(data: Union[str, bytes]) -> Json:
    """Return the JSON object in a text, {} if it is anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def base64_text(data: bytes) -> str:
    """Return bytes in base64."""
    return base64.b64encode(data).decode("ascii")


# ==== 2. Contracts ===========================================================
# The interface between the channels and the rest of the program. A channel produces Messages and
# sends Parts; nothing in between depends on a platform. A channel keeps nothing that has to survive
# a restart, except the account state that it passes to `accept`.


class Attachment(NamedTuple):
    """A file that came with a message. Its bytes are fetched only when the agent is asked."""

    #: "image" or "file".
    kind: str
    name: str
    mime: str
    size_bytes: int
    #: How the channel fetches it; private to the channel, JSON.
    ref: Json


class Message(NamedTuple):
    """A message that a person wrote to an account."""

    #: Unique for the account: a message with a known id is a duplicate.
    id: str
    #: The chat, to which the answer goes, such as "12345" or "-100123:topic:7".
    chat: str
    #: "direct", "group" or "channel".
    kind: str
    sender: str
    sender_name: str
    #: The text without the mention of the bot.
    text: str
    is_mentioned: bool
    #: The text that the message quotes; empty if it quotes none.
    quoted: str
    attachments: tuple[Attachment, ...]
    at_s: float
    #: What the channel needs to answer it, JSON.
    route: Json
    #: For access rules: the group (or guild), and the channel or topic; empty in direct chats.
    group: str = ""
    place: str = ""


class Part(NamedTuple):
    """A piece of an answer in Markdown that fits into one message of its platform."""

    text: str
    #: Whether it is the last part of the answer.
    is_last: bool
    #: Unique for the part, and the same when it is sent again.
    nonce: str
    #: Whether to send plain text, because the platform refused the markup.
    is_plain: bool = False


class Fatal(Exception):
    """An account cannot go on until its owner acts. `fix` says what to do."""

    def __init__(self, why: str, fix: str, *, needs_login: bool = False) -> None:
        super().__init__(why)
        self.fix, self.needs_login = fix, needs_login


class Retry(Exception):
    """The connection of an account broke. Reconnect after `after_s`, 0 = the default backoff."""

    def __init__(self, why: str, after_s: float = 0.0) -> None:
        super().__init__(why)
        self.after_s = after_s


class SendFailed(Exception):
    """A part was not sent. The kind says what to do next:

    wait    the platform asks for a pause of `after_s`: retry after it
    later   the network or the platform failed: retry with growing pauses
    held    the platform accepts nothing until the person writes again: hold the part
    plain   the platform refuses the markup: retry as plain text
    never   permanent (the bot is blocked, the chat is gone): give up
    """

    def __init__(self, kind: str, why: str, after_s: float = 0.0) -> None:
        super().__init__(why)
        self.kind, self.after_s = kind, after_s


class Tools:
    """What the program offers to an account's channel. The methods of this base class do nothing:
    it serves a channel that is only probed or logged in."""

    def __init__(self, settings: Mapping[str, Any], state: Json) -> None:
        #: The settings of the account, with those of its channel where it has none.
        self.settings = settings
        #: Set when the account has to stop. With `on_stop` a channel registers what wakes it up.
        self.stop = threading.Event()
        self._state = state

    def accept(self, message: Optional[Message], state: Optional[Json] = None) -> None:
        """Save a message and the state of the account in one transaction, and return when both are
        on disk. Only then may the channel acknowledge the message. Raises OSError if the saving
        failed."""

    def state(self) -> Json:
        """Return the account state that was last saved by `accept`."""
        return self._state

    def on_stop(self, wake: Callable[[], None]) -> None:
        """Call `wake` from another thread when the account has to stop. Replaces the previous
        `wake`."""

    def note_frame(self) -> None:
        """Record, for the status, that the platform has sent something."""

    def note(self, word: str) -> None:
        """Show a note about the account in the status until the next note; empty = all is well."""

    def log(self, level: str, event: str, **fields: object) -> None:
        """Write an event of this account to the log, without secrets or texts of messages."""


class Channel:
    """One account on one platform. `run` has a thread of its own; the other methods are called
    from the threads of turns and of the account's sender."""

    #: The platform's row in the channel table.
    row: ClassVar[Row]

    def __init__(self, tools: Tools, http: Http) -> None:
        self.tools, self.http = tools, http

    def probe(self) -> str:
        """Return who the bot is, such as "@name". Raises Fatal, Retry."""
        raise NotImplementedError

    def run(self) -> None:
        """Receive messages until `tools.stop` is set. Raises Fatal, Retry."""
        raise NotImplementedError

    def send(self, route: Json, part: Part) -> str:
        """Send a part and return the platform's id of the message. Raises SendFailed."""
        raise NotImplementedError

    def edit(self, route: Json, message_id: str, part: Part) -> None:
        """Replace the text of a message that was sent. Raises SendFailed."""
        raise NotImplementedError

    def type(self, route: Json, is_over: bool = False) -> None:
        """Show "typing", or end it if `is_over`. Raises SendFailed."""

    def fetch(self, attachment: Attachment, max_bytes: int) -> bytes:
        """Return the bytes of an attachment. Raises SendFailed, ValueError if it is larger."""
        raise NotImplementedError

    def render(self, markdown: str) -> str:
        """Return the text in the markup of the platform."""
        return markdown

    def length(self, rendered: str) -> int:
        """Return the length of a text as the platform counts it."""
        return len(rendered)

    def login(self, console: Console) -> Json:
        """Log in by QR code and return the changes to the account's state. Raises Fatal."""
        raise NotImplementedError

    def understood(self, read: Callable[..., Optional[Message]], *received: Any
                   ) -> Optional[Message]:
        """Return `read(*received)`, None if it fails on an unknown format: such a message must be
        acknowledged, or it would come again forever. Raises Fatal, Retry."""
        try:
            return read(*received)
        except (Fatal, Retry):
            raise
        except Exception as problem:  # Whatever the fault, the next message may be fine.
            self.tools.log("warning", "a message was not understood", why=type(problem).__name__)
            return None


class Row(NamedTuple):
    """A platform: its names, limits and settings."""

    id: str
    aliases: tuple[str, ...]
    label: str
    make: Callable[[Tools, Http], Channel]
    #: The maximum length of a part, as counted by `Channel.length`.
    limit: int
    #: Settings that hold credentials, each with its environment variable for the account
    #: `default`. Empty if a login creates the credentials.
    credentials: Mapping[str, str]
    #: The platform's other settings, each with the function that parses its value.
    settings: Mapping[str, Callable[[object], Any]]
    #: Whether messages can be edited, and the interval in direct chats and in groups.
    can_edit: bool = False
    edit_every_s: float = 1.5
    edit_every_in_groups_s: float = 1.5
    #: How often to repeat "typing"; 0 if the platform has none.
    typing_every_s: float = 0.0
    #: How many messages may answer one message; 0 = no limit.
    budget: int = 0
    #: The pause between two parts of an answer.
    pace_s: float = 0.0
    has_login: bool = False
    #: Where the owner gets the credentials, in one sentence.
    help: str = ""
    #: OpenClaw's names of settings, each with the name used here.
    synonyms: Mapping[str, str] = {}


# ==== 3. Settings ============================================================
# One file, in the format of the original gateway's ocg.json. Every setting is a row of a table, and
# all have one precedence: account, then channel, then top level, then environment, then default.
# All errors are collected and reported at once.

DEFAULT_AGENT_URL = "http://127.0.0.1:3456/v1/chat/completions"
_ORIGINAL_FILE = "~/.openclaw-channel-gateway/ocg.json"
_ACCOUNT_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
#: Placeholders for credentials in example files.
_PLACEHOLDER = re.compile(r"YOUR_\w*_HERE|<[^>]*>|xxx+", re.IGNORECASE)
_VARIABLE = re.compile(r"\$\{(\w+)\}")


class SettingsError(Exception):
    """The settings cannot be used. `errors` has one line for each fault, with its place."""

    def __init__(self, errors: Iterable[str]) -> None:
        self.errors = list(dict.fromkeys(errors))
        super().__init__("\n".join(self.errors))


# Parsers of values. Each returns the value as the program uses it, and raises ValueError with what
# is expected.


def text_value(value: object) -> str:
    """Return a string; a number is accepted, because ids are often written as numbers."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError("use a text")
    return str(value).strip()


def model_value(value: object) -> str:
    """Return the name of a model, which may be given as {"primary": NAME}."""
    return text_value(value.get("primary") if isinstance(value, dict) else value)


def flag_value(value: object) -> bool:
    """Return a boolean, also from "1", "true" and the like in the environment."""
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    found = known.get(str(value).strip().lower())
    if found is None:
        raise ValueError("use true or false")
    return found


def number_between(minimum: int, maximum: int) -> Callable[[object], int]:
    """Return a parser of whole numbers in a range."""
    def number_value(value: object) -> int:
        text = "" if isinstance(value, bool) else str(value).strip()
        if not text.isdigit() or not minimum <= int(text) <= maximum:
            raise ValueError(f"use a whole number from {minimum} to {maximum}")
        return int(text)
    return number_value


def one_of(*words: str) -> Callable[[object], str]:
    """Return a parser that accepts one of these words."""
    def word_value(value: object) -> str:
        if value not in words:
            raise ValueError(f"use {', '.join(words[:-1])} or {words[-1]}")
        return str(value)
    return word_value


def texts_value(value: object) -> tuple[str, ...]:
    """Return a list of strings; a single string counts as a list."""
    return tuple(text_value(item) for item in (value if isinstance(value, list) else [value]))


def mapping_value(value: object) -> Json:
    """Return an object; a list of names becomes an object with empty values."""
    if isinstance(value, list):
        return {text_value(name): {} for name in value}
    if not isinstance(value, dict):
        raise ValueError("use an object, such as {\"ID\": {\"requireMention\": false}}")
    return value


#: The settings of a group, a guild or a guild's channel, by lower-case name.
_PLACE_KEYS = {key.lower(): key for key in (
    "allowFrom", "users", "requireMention", "enabled", "allow", "channels")}


def places_value(value: object) -> Json:
    """Return groups or guilds with the settings of each. A misspelled setting is an error, because
    ignoring it would open what it should close."""
    places = without_comments(mapping_value(value))
    for name, place in places.items():
        if not isinstance(place, (dict, bool)):
            raise ValueError(f"{name}: use an object, true or false")
        for key in without_comments(place) if isinstance(place, dict) else ():
            near = difflib.get_close_matches(key.lower(), _PLACE_KEYS, 1, 0.8)
            if near and key != _PLACE_KEYS[near[0]]:
                raise ValueError(f"{name}.{key}: did you mean {_PLACE_KEYS[near[0]]}?")
        if isinstance(place, dict) and "channels" in place:
            places_value(place["channels"])
    return places


def agent_url_value(value: object) -> str:
    """Return the URL of chat completions, completed if it has no path or ends in /v1."""
    url = text_value(value).rstrip("/")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise ValueError(f"use an address such as {DEFAULT_AGENT_URL}; a key belongs in apiKey")
    return url + {"": "/v1/chat/completions", "/v1": "/chat/completions"}.get(parts.path, "")


def platform_url_value(value: object) -> str:
    """Return a platform's URL: https or wss; http or ws only on this machine."""
    url = text_value(value).rstrip("/")
    parts = urllib.parse.urlsplit(url)
    is_local = parts.scheme in ("http", "ws") and is_loopback(parts.hostname or "")
    if not parts.hostname or not (parts.scheme in ("https", "wss") or is_local):
        raise ValueError("use an https address")
    return url


def proxy_value(value: object) -> str:
    """Return the address of an http proxy."""
    url = text_value(value)
    if not url.startswith("http://") or not urllib.parse.urlsplit(url).hostname:
        raise ValueError("use http://[user:password@]host:port; a socks proxy is not supported")
    return url


class Setting(NamedTuple):
    """One setting."""

    key: str
    #: Where it is allowed: "top" (top level), "channel" (channel and account), "any" (all three).
    level: str
    kind: Callable[[object], Any]
    default: Any
    about: str
    #: The environment variable, empty if there is none.
    variable: str = ""
    #: Whether error messages must not show its value.
    is_secret: bool = False


SETTINGS: tuple[Setting, ...] = (
    Setting("agentUrl", "any", agent_url_value, DEFAULT_AGENT_URL, "the URL of the agent",
            "OCG_AGENT_URL"),
    Setting("model", "any", model_value, "sonnet", "the model to use", "OCG_MODEL"),
    Setting("apiKey", "any", text_value, "", "the agent's key; an agentUrl set for a channel or "
            "account gets no key from a wider level", "OCG_API_KEY", is_secret=True),
    Setting("systemPrompt", "any", text_value, "", "a system message before each conversation"),
    Setting("models", "any", texts_value, (), "what /model offers; by default all of the agent's"),
    Setting("memory", "any", one_of("gateway", "session", "agent"), "gateway",
            "who remembers the conversation; by default `agent` with async"),
    Setting("agentTimeout", "any", number_between(0, 86_400), 900,
            "seconds for a whole answer, 0 = no limit"),
    Setting("historyMessages", "any", number_between(2, 10_000), 60, "messages to remember"),
    Setting("historyChars", "any", number_between(1000, 10_000_000), 120_000,
            "characters to remember"),
    Setting("perSenderHour", "any", number_between(0, 100_000), 60,
            "messages per person and hour, except for the owner; 0 = no limit"),
    Setting("streaming", "any", one_of("edit", "block", "off"), "", "an answer comes as a growing "
            "message, as paragraphs, or whole; by default what suits the platform"),
    Setting("attachments", "any", flag_value, True, "pass photos and files to the agent"),
    Setting("notice", "any", flag_value, True, "say once after ten minutes: still working"),
    Setting("replyChunkSize", "any", number_between(500, 20_000), 0, "maximum characters of a "
            "message; by default the platform's limit", "OCG_REPLY_CHUNK_SIZE"),
    Setting("async", "any", flag_value, False, "the agent answers later, by a callback"),
    Setting("proxy", "any", proxy_value, "", "http://[user:password@]host:port; by default "
            "HTTPS_PROXY", is_secret=True),
    Setting("maxTurns", "top", number_between(1, 100), 4, "questions to agents at the same time"),
    Setting("verbose", "top", flag_value, False, "log the texts of messages", "OCG_VERBOSE"),
    Setting("callbackPort", "top", number_between(0, 65_535), 3457, "the port for callbacks"),
    Setting("callbackHost", "top", text_value, "127.0.0.1", "the address to listen on for them"),
    Setting("callbackPublicHost", "top", text_value, "", "the host in the callback URL"),
    Setting("callbackPublicPort", "top", number_between(0, 65_535), 0, "the port in that URL"),
    Setting("callbackSecret", "top", text_value, "", "the secret that signs callbacks "
            "(X-OCG-Signature)", is_secret=True),
    Setting("callbackTokenTTL", "top", number_between(10, 604_800), 1800,
            "seconds within which a callback may arrive"),
    Setting("dmPolicy", "channel", one_of("pairing", "allowlist", "open", "disabled"), "pairing",
            "who may write in direct chats"),
    Setting("allowFrom", "channel", texts_value, (), "ids of people who may write; \"*\" = all"),
    Setting("groupPolicy", "channel", one_of("allowlist", "open", "disabled"), "allowlist",
            "the groups in which the bot answers"),
    Setting("groupAllowFrom", "channel", texts_value, None,
            "ids of people who may write in groups; by default allowFrom"),
    Setting("requireMention", "channel", flag_value, True,
            "answer in groups only when mentioned"),
    Setting("replyToMode", "channel", one_of("off", "first", "all"), "first",
            "which parts of an answer quote the question in groups"),
    Setting("textChunkLimit", "channel", number_between(500, 20_000), 0,
            "OpenClaw's name for replyChunkSize"),
)
#: Settings whose misspelling would open what should be closed: similar names are errors.
_SECURITY_KEYS = {key.lower(): key for key in (
    "dmPolicy", "allowFrom", "groupPolicy", "groupAllowFrom", "requireMention", "callbackSecret",
    "callbackHost",
)}
_LEVELS = {each.key: each.level for each in SETTINGS}


_ENABLED = Setting("enabled", "channel", flag_value, True, "")


class Account(NamedTuple):
    """One account with its settings in force."""

    row: Row
    name: str
    is_enabled: bool
    #: By key: the settings of SETTINGS and of the channel's row, and the credentials.
    settings: Mapping[str, Any]
    #: The source of each value: "account", "channel", "file", "environment" or "default".
    origins: Mapping[str, str]
    #: The credentials that are missing.
    missing: tuple[str, ...]

    @property
    def id(self) -> str:
        """Return its name in sessions and in the log, such as telegram:default."""
        return f"{self.row.id}:{self.name}"


class Settings(NamedTuple):
    """The settings of the whole program."""

    path: str
    top: Mapping[str, Any]
    accounts: tuple[Account, ...]
    warnings: tuple[str, ...]


def settings_path(named: str, environ: Mapping[str, str], home: str) -> str:
    """Return the path of the file: `named`, else OCG_CONFIG_PATH, else OCP's own; the original
    gateway's if that is the only one that exists."""
    chosen = named or environ.get("OCG_CONFIG_PATH", "")
    if chosen:
        return os.path.abspath(os.path.expanduser(chosen))
    own, original = os.path.join(home, "channels.json"), os.path.expanduser(_ORIGINAL_FILE)
    return original if os.path.exists(original) and not os.path.exists(own) else own


def read_file(path: str) -> Json:
    """Return the JSON object in a file, {} if the file does not exist. Raises SettingsError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            value = json.load(file)
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as problem:
        where = f"line {problem.lineno}, column {problem.colno}"
        raise SettingsError([f"{path}: not JSON at {where}: {problem.msg}"]) from None
    except (OSError, UnicodeDecodeError) as problem:
        raise SettingsError([f"{path}: cannot be read: {reason_of(problem)}"]) from None
    if not isinstance(value, dict):
        raise SettingsError([f"{path}: the file must contain a JSON object"])
    return value


def parse_settings(
    content: Json, path: str, environ: Mapping[str, str], rows: Iterable[Row]
) -> Settings:
    """Return the settings in a file's content. Raises SettingsError with every fault."""
    reader = _Reader(environ, {name: row for row in rows for name in (row.id, *row.aliases)})
    top = _Level("file", "", without_comments(content))
    reader.check_names(top, {"channels", *(key for key in _LEVELS if _LEVELS[key] != "channel")})
    accounts = tuple(reader.accounts(top))
    values = {each.key: reader.value(each, [top])[0] for each in SETTINGS
              if each.level != "channel"}
    with contextlib.suppress(OSError):
        if os.stat(path).st_mode & 0o077:
            reader.warnings.append(
                f"{path}: other users can read it, and it holds credentials: run chmod 600")
    if reader.errors:
        raise SettingsError(reader.errors)
    return Settings(path, values, accounts, tuple(reader.warnings))


class _Level(NamedTuple):
    """One object of the file that may contain settings."""

    name: str
    #: Its path in the file, for messages.
    place: str
    values: Json

    def of(self, key: str) -> str:
        return f"{self.place}.{key}".lstrip(".")

    def renamed(self, words: Mapping[str, str]) -> _Level:
        """Return it with synonyms of settings replaced by their names here."""
        other = {words[key]: value for key, value in self.values.items() if key in words}
        own = {key: value for key, value in self.values.items() if key not in words}
        return self._replace(values={**other, **own})


class _Reader:
    """Reads one file, and collects its errors."""

    def __init__(self, environ: Mapping[str, str], rows: Mapping[str, Row]) -> None:
        self._environ, self._rows = environ, rows
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def accounts(self, top: _Level) -> Iterator[Account]:
        """Yield the accounts of all channels."""
        owners: dict[tuple[str, str, str], str] = {}
        for name, values in self._objects(top, "channels"):
            row = self._rows.get(name)
            if row is None:
                known = ", ".join(dict.fromkeys(each.id for each in self._rows.values()))
                self.errors.append(f"channels.{name}: no such channel; known are {known}")
                continue
            for account in self._channel(row, _Level("channel", f"channels.{name}", values), top):
                yield account
                for key in row.credentials:
                    value = account.settings[key]
                    owner = owners.setdefault((row.id, key, value), account.id)
                    if value and owner != account.id:
                        self.errors.append(f"{account.id}: {owner} has the same {key}; use it for "
                                           "one account")

    def _objects(self, level: _Level, key: str) -> Iterator[tuple[str, Json]]:
        """Yield names and values of an object of objects."""
        found = level.values.get(key) or {}
        if not isinstance(found, dict):
            self.errors.append(f"{level.of(key)}: use an object")
            return
        for name, values in without_comments(found).items():
            if isinstance(values, dict):
                yield name, without_comments(values)
            else:
                self.errors.append(f"{level.of(key)}.{name}: use an object")

    def _channel(self, row: Row, channel: _Level, top: _Level) -> Iterator[Account]:
        """Yield the accounts of a channel: the named ones, and `default` if the channel itself has
        credentials or no account is named."""
        known = {*(key for key in _LEVELS if _LEVELS[key] != "top"), *row.settings,
                 *row.credentials, "enabled", "name"}
        channel = channel.renamed(row.synonyms)
        self.check_names(channel, {*known, "accounts"})
        named = dict(self._objects(channel, "accounts"))
        if not named or any(channel.values.get(key) for key in row.credentials):
            if "default" in named:
                self.errors.append(f"{channel.place}: its credentials define the account "
                                   "`default`, and so does accounts.default; keep one of the two")
            yield self._account(row, "default", [channel], top)
        shared = {k: v for k, v in channel.values.items() if k not in row.credentials}
        for name, own in named.items():
            level = _Level("account", f"{channel.place}.accounts.{name}", own).renamed(row.synonyms)
            if not _ACCOUNT_NAME.fullmatch(name):
                self.errors.append(f"{level.place}: use a name of letters, digits, - and _")
            self.check_names(level, known)
            yield self._account(row, name, [level, channel._replace(values=shared)], top)

    def _account(self, row: Row, name: str, levels: list[_Level], top: _Level) -> Account:
        found = {each.key: self.value(each, levels if each.level == "channel" else [*levels, top])
                 for each in SETTINGS if each.level != "top"}
        for key, kind in row.settings.items():
            found[key] = self.value(Setting(key, "channel", kind, None, ""), levels)
        for number, (key, variable) in enumerate(row.credentials.items()):
            each = Setting(key, "channel", text_value, "", "", variable * (name == "default"),
                           is_secret=True)
            path = found.get("tokenFile", (None, ""))[0]
            if path and not number:
                # OpenClaw's setting for a credential in a file.
                file = {"source": "file", "path": path}
                levels = [levels[0]._replace(values={key: file, **levels[0].values}), *levels[1:]]
            found[key] = self.value(each, levels)
        values = {key: value for key, (value, _) in found.items()}
        origins = {key: origin for key, (_, origin) in found.items()}
        self._settle(values, origins, levels[0])
        missing = tuple(key for key in row.credentials if not values[key])
        is_enabled = all(self.value(_ENABLED, [level])[0] for level in levels)
        return Account(row, name, is_enabled, values, origins, missing)

    def _settle(self, values: Json, origins: Json, level: _Level) -> None:
        """Check and complete settings that depend on each other."""
        if values["dmPolicy"] == "open" and "*" not in values["allowFrom"]:
            self.errors.append(f'{level.of("dmPolicy")}: "open" lets everybody spend your plan; '
                               'if that is meant, add "*" to allowFrom')
        if values["dmPolicy"] == "allowlist" and not values["allowFrom"]:
            self.errors.append(f"{level.of('allowFrom')}: name at least one person")
        if values["groupAllowFrom"] is None:
            values["groupAllowFrom"] = values["allowFrom"]
        if values["async"] and origins["memory"] == "default":
            values["memory"] = "agent"
        values["replyChunkSize"] = values["replyChunkSize"] or values["textChunkLimit"]
        ranks = ("account", "channel", "file", "environment", "default")
        is_key_wider = ranks.index(origins["apiKey"]) > ranks.index(origins["agentUrl"])
        if values["apiKey"] and is_key_wider and origins["agentUrl"] in ranks[:2]:
            values["apiKey"] = ""
            self.warnings.append(
                f"{level.of('agentUrl')}: no key is sent there, because apiKey is set at another "
                "level; if the agent needs a key, write apiKey beside agentUrl")

    def value(self, setting: Setting, levels: Iterable[_Level]) -> tuple[Any, str]:
        """Return the value of a setting, and where it comes from."""
        found = [(level.name, level.of(setting.key), level.values.get(setting.key))
                 for level in levels]
        variable = setting.variable
        found.append(("environment", variable, self._environ.get(variable) if variable else None))
        for origin, place, value in found:
            try:
                value = self._resolved(value)
                if value not in (None, ""):
                    return setting.kind(value), origin
            except ValueError as problem:
                is_shown = not setting.is_secret and "@" not in str(value)
                shown = f"{json.dumps(value)[:80]}; " if is_shown else ""
                self.errors.append(f"{place}: {shown}{problem}")
        return setting.default, "default"

    def _resolved(self, value: Any) -> object:
        """Return a value, read from a variable or a file if it refers to one. Raises ValueError."""
        if isinstance(value, str):
            variable = _VARIABLE.fullmatch(value.strip())
            if variable is not None:
                return self._environ.get(variable.group(1), "")
            return "" if _PLACEHOLDER.fullmatch(value.strip()) else value
        source = value.get("source") if isinstance(value, dict) else ""
        if source == "env":
            return self._environ.get(str(value.get("id", "")), "")
        if source == "file":
            try:
                with open(os.path.expanduser(str(value.get("path", ""))), encoding="utf-8") as file:
                    return file.read(65_536).strip()
            except (OSError, UnicodeDecodeError) as problem:
                raise ValueError(f"the file cannot be read: {reason_of(problem)}") from None
        return value

    def check_names(self, level: _Level, known: Collection[str]) -> None:
        """Report keys that are not settings of this level."""
        for key in [each for each in level.values if each not in known]:
            near = difflib.get_close_matches(key.lower(), _SECURITY_KEYS, 1, 0.8)
            fault = f"{level.of(key)}: not used here"
            if key in _LEVELS:
                place = "at the top level" if _LEVELS[key] == "top" else "in a channel"
                fault = f"{fault}; it belongs {place}"
            elif near:
                fault = f"{level.of(key)}: no such setting; did you mean {_SECURITY_KEYS[near[0]]}?"
            (self.errors if near else self.warnings).append(fault)


def without_comments(values: Json) -> Json:
    """Return an object without keys that begin with "_", which are comments."""
    return {str(key): value for key, value in values.items() if not str(key).startswith("_")}


# ==== 4. Log =================================================================
# One line for each event, in a file and, in the foreground, on the terminal. Texts of messages are
# logged only with `verbose`, secrets never.

_MAX_LOG_BYTES = 10_000_000
_MAX_LINE_CHARS = 2000
_MIN_SECRET_CHARS = 6
_HIDDEN = "***"


class Log:
    """Writes lines to a file and to a stream. A full file is renamed to FILE.1. Never raises."""

    def __init__(self, path: str, stream: Optional[TextIO], is_verbose: bool = False) -> None:
        """`path` is empty for no file."""
        self._path, self._stream, self.is_verbose = path, stream, is_verbose
        self._secrets: tuple[str, ...] = ()
        # Guards the secrets and the order of lines.
        self._lock = threading.Lock()

    def hide(self, texts: Iterable[str]) -> None:
        """Redact these texts in every later line."""
        with self._lock:
            found = {*self._secrets, *(each for each in texts if len(each) >= _MIN_SECRET_CHARS)}
            self._secrets = tuple(sorted(found, key=len, reverse=True))

    def event(self, level: str, event: str, **fields: object) -> None:
        """Write an event and its fields; a field that is empty or None is left out."""
        shown = [f"{key}={value}" for key, value in fields.items() if value not in (None, "")]
        self.line(level, " ".join([event, *shown]))

    def line(self, level: str, text: str) -> None:
        """Write a line. `level` is "info", "warning" or "error"."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with self._lock:
            for secret in self._secrets:
                text = text.replace(secret, _HIDDEN)
            whole = f"{stamp} {level:7} {clean(text)[:_MAX_LINE_CHARS]}\n"
            with contextlib.suppress(OSError, ValueError):
                self._write(whole)
            if self._stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    self._stream.write(whole)
                    self._stream.flush()

    def message(self, event: str, label: str, text: str) -> None:
        """Log that a message came or was sent; its text only with `verbose`."""
        self.line("info", event)
        if self.is_verbose:
            self.line("info", f"   {label}: {text}")

    def _write(self, whole: str) -> None:
        if not self._path:
            return
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(descriptor, "a", encoding="utf-8", errors="replace") as file:
            file.write(whole)
            is_full = file.tell() > _MAX_LOG_BYTES
        if is_full:
            os.replace(self._path, f"{self._path}.1")


# ==== 5. Store ===============================================================
# The database is the queue: a message exists once its inbox row is committed, and an answer once
# its outbox rows are. Every access is short, holds one lock, and is durable when it returns.

MIGRATIONS = (
    "CREATE TABLE states (account TEXT PRIMARY KEY, state TEXT NOT NULL)",
    "CREATE TABLE seen (account TEXT, id TEXT, at_s REAL NOT NULL, PRIMARY KEY (account, id))"
    " WITHOUT ROWID",
    # `progress` is what the person has seen of an unfinished answer, JSON.
    "CREATE TABLE inbox (id INTEGER PRIMARY KEY AUTOINCREMENT, account TEXT NOT NULL,"
    " lane TEXT NOT NULL, sender TEXT NOT NULL, message TEXT NOT NULL,"
    " is_done INTEGER NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 0,"
    " progress TEXT NOT NULL DEFAULT '{}', at_s REAL NOT NULL)",
    "CREATE INDEX inbox_open ON inbox (lane, id) WHERE NOT is_done",
    "CREATE INDEX inbox_senders ON inbox (account, sender, at_s)",
    # `status`: pending, sending, sent, held, dead. `edit_id`: the message that the text replaces.
    "CREATE TABLE outbox (id INTEGER PRIMARY KEY AUTOINCREMENT, account TEXT NOT NULL,"
    " chat TEXT NOT NULL, answer INTEGER NOT NULL, route TEXT NOT NULL, text TEXT NOT NULL,"
    " is_last INTEGER NOT NULL, nonce TEXT NOT NULL, edit_id TEXT NOT NULL DEFAULT '',"
    " is_plain INTEGER NOT NULL DEFAULT 0, status TEXT NOT NULL, attempts INTEGER NOT NULL"
    " DEFAULT 0, due_s REAL NOT NULL DEFAULT 0, why TEXT NOT NULL DEFAULT '', at_s REAL NOT NULL)",
    "CREATE INDEX outbox_open ON outbox (account, status, id)",
    "CREATE TABLE history (id INTEGER PRIMARY KEY AUTOINCREMENT, session TEXT NOT NULL,"
    " role TEXT NOT NULL, content TEXT NOT NULL)",
    "CREATE INDEX history_sessions ON history (session, id)",
    "CREATE TABLE lanes (lane TEXT PRIMARY KEY, number INTEGER NOT NULL DEFAULT 1,"
    " model TEXT NOT NULL DEFAULT '')",
    # A person with a `code` is waiting for approval.
    "CREATE TABLE people (account TEXT, sender TEXT, name TEXT NOT NULL, route TEXT NOT NULL,"
    " chat TEXT NOT NULL, code TEXT NOT NULL, is_owner INTEGER NOT NULL DEFAULT 0,"
    " at_s REAL NOT NULL, PRIMARY KEY (account, sender))",
    "CREATE TABLE tokens (hash TEXT PRIMARY KEY, account TEXT NOT NULL, inbox INTEGER NOT NULL,"
    " session TEXT NOT NULL, message TEXT NOT NULL, until_s REAL NOT NULL)",
)
#: Tables with a column `account`, and tables keyed by a lane or session of an account.
ACCOUNT_TABLES = ("states", "seen", "inbox", "outbox", "people", "tokens")
LANE_TABLES = (("history", "session"), ("lanes", "lane"))
_MAX_SEEN = 20_000
#: How long a held answer waits for the person's next message.
_HELD_S = 2 * _DAY_S
#: Cleaning statements, each with the age of the rows that it applies to.
_SWEEPS = (
    ("DELETE FROM seen WHERE at_s<?", 30 * _DAY_S),
    ("DELETE FROM inbox WHERE is_done AND at_s<?", _DAY_S),
    ("UPDATE outbox SET status='dead', why='nobody wrote in time' WHERE status='held' AND at_s<?",
     _HELD_S),
    ("DELETE FROM outbox WHERE status='sent' AND at_s<?", _DAY_S),
    ("DELETE FROM outbox WHERE status='dead' AND at_s<?", 7 * _DAY_S),
)


def message_json(message: Message) -> str:
    """Return a message as JSON for the database, with lone surrogates replaced."""
    attachments = [each._asdict() for each in message.attachments]
    return encodable(json.dumps({**message._asdict(), "attachments": attachments},
                                ensure_ascii=False))


def message_of(content: str) -> Message:
    """Return the message in a JSON text of `message_json`."""
    values = json.loads(content)
    values["attachments"] = tuple(Attachment(**each) for each in values["attachments"])
    return Message(**values)


class OutRow(NamedTuple):
    """A part for the outbox."""

    text: str
    route: Json
    edit_id: str = ""
    status: str = "pending"


class Store:
    """The database. Every method raises OSError if the database fails."""

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        """Open or create the file, readable only by its owner."""
        self._clock = clock
        # Guards the connection. Held for a transaction.
        self._lock = threading.RLock()
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        with self._errors():
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.row_factory = sqlite3.Row
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000"):
                self._connection.execute(f"PRAGMA {pragma}")
        with self.transaction():
            version = self.rows("PRAGMA user_version")[0][0]
            if version > len(MIGRATIONS):
                raise OSError("channels.db belongs to a newer version of this program")
            for statement in (*MIGRATIONS[version:], f"PRAGMA user_version={len(MIGRATIONS)}"):
                self._connection.execute(statement)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as problem:
            raise OSError(f"channels.db: {problem}") from None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Run a block as one transaction. A nested one joins the outer one."""
        with self._lock, self._errors():
            if self._connection.in_transaction:
                yield
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, statement: str, *values: object) -> list[sqlite3.Row]:
        """Return the rows of a query."""
        with self._lock, self._errors():
            return self._connection.execute(statement, values).fetchall()

    def run(self, statement: str, *values: object) -> int:
        """Run a change and return how many rows it changed."""
        with self._lock, self._errors():
            return self._connection.execute(statement, values).rowcount

    # -- receiving ------------------------------------------------------------------------------

    def state(self, account: str) -> Json:
        """Return the state of an account, {} if it has none."""
        found = self.rows("SELECT state FROM states WHERE account=?", account)
        return dict(json.loads(found[0][0])) if found else {}

    def put_state(self, account: str, state: Json) -> None:
        """Replace the state of an account."""
        self.run("INSERT OR REPLACE INTO states VALUES (?,?)", account, compact(state))

    def is_new(self, account: str, message_id: str) -> bool:
        """Record a message id, and return whether it is new."""
        return self.run("INSERT OR IGNORE INTO seen VALUES (?,?,?)", account, message_id,
                        self._clock()) > 0

    def put_in(self, account: str, lane: str, message: Message, *, is_done: bool = False) -> None:
        """Put a message into the inbox."""
        self.run("INSERT INTO inbox (account, lane, sender, message, is_done, at_s) VALUES"
                 " (?,?,?,?,?,?)", account, lane, message.sender, message_json(message), is_done,
                 self._clock())

    def open_lanes(self) -> list[tuple[str, str]]:
        """Return (lane, account) of the lanes with unanswered messages, the oldest first."""
        found = self.rows("SELECT lane, account, MIN(id) FROM inbox WHERE NOT is_done"
                          " GROUP BY lane ORDER BY MIN(id)")
        return [(row["lane"], row["account"]) for row in found]

    def waiting(self, lane: str) -> list[sqlite3.Row]:
        """Return the unanswered messages of a lane, in order."""
        return self.rows("SELECT * FROM inbox WHERE lane=? AND NOT is_done ORDER BY id", lane)

    def finish(self, ids: Iterable[int]) -> None:
        """Mark messages as answered."""
        for each in ids:
            self.run("UPDATE inbox SET is_done=1, progress='{}' WHERE id=?", each)

    def finish_asked(self, first: int) -> None:
        """Mark all messages of one question as answered; `first` is the id of its first message."""
        self.run("UPDATE inbox SET is_done=1, progress='{}' WHERE NOT is_done AND attempts>0 AND"
                 " lane=(SELECT lane FROM inbox WHERE id=?) AND id>=?", first, first)

    # -- sending --------------------------------------------------------------------------------

    def put_out(self, account: str, chat: str, answer: int, parts: list[OutRow]) -> None:
        """Put the parts of an answer into the outbox. `answer` is the inbox id of the message that
        it answers, 0 if there is none. No part overtakes a part of the same answer that is held."""
        is_held = bool(answer and self.rows(
            "SELECT 1 FROM outbox WHERE account=? AND chat=? AND answer=? AND status='held'",
            account, chat, answer))
        for number, part in enumerate(parts, 1):
            self.run(
                "INSERT INTO outbox (account, chat, answer, route, text, is_last, nonce, edit_id,"
                " status, at_s) VALUES (?,?,?,?,?,?,?,?,?,?)", account, chat, answer,
                compact(part.route), encodable(part.text), number == len(parts),
                secrets.token_hex(10), part.edit_id, "held" if is_held else part.status,
                self._clock())

    def next_out(self, account: str) -> list[sqlite3.Row]:
        """Return each chat's oldest unsent part."""
        return self.rows("SELECT *, MIN(id) FROM outbox WHERE account=? AND"
                         " status IN ('pending','sending') GROUP BY chat ORDER BY id", account)

    def set_out(self, part_id: int, status: str, due_s: float = 0.0, why: str = "") -> None:
        """Set the status of a part."""
        self.run("UPDATE outbox SET status=?, due_s=?, why=?, attempts=attempts+(?='sending')"
                 " WHERE id=?", status, due_s, clean(why)[:200], status, part_id)

    def counts_out(self, account: str) -> dict[str, int]:
        """Return how many parts of an account have each status."""
        return {row[0]: row[1] for row in self.rows(
            "SELECT status, COUNT(*) FROM outbox WHERE account=? GROUP BY status", account)}

    def release_held(
        self, account: str, chat: str, route: Json, most: int, more: str
    ) -> tuple[int, int]:
        """Release up to `most` held parts of the newest answer to a new route, the oldest first;
        `more` is appended to the last if others stay. Returns how many go, and how many stay."""
        found = self.rows(
            "SELECT id, answer FROM outbox WHERE account=? AND chat=? AND status='held' AND at_s>?"
            " ORDER BY id", account, chat, self._clock() - _HELD_S)
        newest = [row for row in found if row["answer"] == max(each["answer"] for each in found)]
        self.run("UPDATE outbox SET status='dead', why='a newer answer' WHERE account=? AND chat=?"
                 " AND status='held' AND answer<>?", account, chat,
                 newest[0]["answer"] if newest else -1)
        for number, row in enumerate(newest[:most], 1):
            end = more * (number == most < len(newest))
            self.run("UPDATE outbox SET status='pending', due_s=0, attempts=0, route=?, at_s=?,"
                     " text=text||? WHERE id=?", compact(route), self._clock(), end, row["id"])
        return min(most, len(newest)), max(0, len(newest) - most)

    # -- conversations --------------------------------------------------------------------------

    def lane(self, lane: str) -> tuple[str, str]:
        """Return the session of a lane, such as "telegram:default:12345#2", and its chosen
        model."""
        found = self.rows("SELECT number, model FROM lanes WHERE lane=?", lane)
        number, model = tuple(found[0]) if found else (1, "")
        return lane if number == 1 else f"{lane}#{number}", str(model)

    def remember(self, session: str, role: str, content: object) -> None:
        """Append a message of chat completions to a conversation."""
        self.run("INSERT INTO history (session, role, content) VALUES (?,?,?)", session, role,
                 compact(content))

    def remember_question(self, session: str, content: object, *, is_answered: bool) -> None:
        """Append a question to a conversation; with `is_answered`, before the last answer."""
        last = self.rows("SELECT * FROM history WHERE session=? AND role='assistant'"
                         " ORDER BY id DESC LIMIT ?", session, int(is_answered))
        for row in last:
            self.run("DELETE FROM history WHERE id=?", row["id"])
        self.remember(session, "user", content)
        for row in last:
            self.remember(session, "assistant", json.loads(row["content"]))

    def history(self, session: str) -> list[tuple[int, Json]]:
        """Return a conversation, as ids and messages of chat completions."""
        found = self.rows("SELECT id, role, content FROM history WHERE session=? ORDER BY id",
                          session)
        return [(row["id"], {"role": row["role"], "content": json.loads(row["content"])})
                for row in found]

    def sweep(self) -> None:
        """Delete or expire old rows."""
        with self.transaction():
            for statement, age_s in _SWEEPS:
                self.run(statement, self._clock() - age_s)
            for row in self.rows("SELECT account FROM seen GROUP BY account HAVING COUNT(*)>?",
                                 _MAX_SEEN):
                self.run("DELETE FROM seen WHERE account=? AND at_s<=(SELECT at_s FROM seen WHERE"
                         " account=? ORDER BY at_s DESC LIMIT 1 OFFSET ?)", row[0], row[0],
                         _MAX_SEEN)


# ==== 6. HTTP ================================================================
# Network access for calls, long polls and WebSockets: addresses, TLS, proxies. Nothing here
# depends on a platform.

#: The time limit for a connection to one address of a host.
_CONNECT_TIMEOUT_S = 5.0
_MAX_ANSWER_BYTES = 4 * 1024 * 1024
_MAX_HEAD_BYTES = 65_536
#: The time limit for reading a whole body that is not streamed, even if bytes keep arriving.
_MAX_READ_S = 300.0
#: How long an idle connection is kept for the next call; servers keep theirs longer.
_MAX_IDLE_S = 30.0
#: An empty answer to a long poll that comes sooner than this was not really a long poll.
_MIN_POLL_S = 0.1
#: Not public, but local proxies return "fake IP" addresses from this range for every name.
_FAKE_IP_RANGE = ipaddress.ip_network("198.18.0.0/15")


class NetworkFailed(Exception):
    """A connection failed or broke."""


def seconds_of(value: object) -> float:
    """Return a number of seconds from an untrusted value, at most a month; 0 if it is invalid."""
    try:
        seconds = float(cast(Any, value))
    except (TypeError, ValueError):
        return 0.0
    return min(seconds, _MONTH_S) if seconds > 0 else 0.0


@contextlib.contextmanager
def sending() -> Iterator[None]:
    """Turn a failed call into SendFailed of the kind "later"."""
    try:
        yield
    except (NetworkFailed, Fatal, Retry) as problem:
        raise SendFailed("later", str(problem)) from None


class HttpAnswer(NamedTuple):
    """A complete answer."""

    status: int
    #: By lower-case name.
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Json:
        """Return the JSON object of the body, {} if it has none."""
        return json_object(self.body)

    @property
    def retry_after_s(self) -> float:
        """Return the seconds of Retry-After, 0 if it is missing."""
        return seconds_of(self.headers.get("retry-after"))


class Target(NamedTuple):
    """The parsed URL of a request."""

    is_tls: bool
    host: str
    port: int
    #: Path and query.
    path: str

    @classmethod
    def of(cls, url: str) -> Target:
        """Return the target of an http, https, ws or wss URL. Raises NetworkFailed."""
        try:
            parts = urllib.parse.urlsplit(url)
            is_tls = {"https": True, "wss": True, "http": False, "ws": False}[parts.scheme]
            port = parts.port or (443 if is_tls else 80)
        except (KeyError, ValueError):
            raise NetworkFailed("not a valid URL") from None
        if not parts.hostname:
            raise NetworkFailed("not a valid URL")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(is_tls, parts.hostname, port, path)

    @property
    def authority(self) -> str:
        """Return host and port for the header Host."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"


class Connector:
    """Makes connections, directly or through a proxy."""

    def __init__(self, proxy: str, environ: Mapping[str, str]) -> None:
        """`proxy` is http://[user:password@]host:port; empty = HTTPS_PROXY of the environment."""
        self._proxy = proxy or environ.get("HTTPS_PROXY", "") or environ.get("https_proxy", "")
        #: Hosts and domain suffixes that bypass the proxy; "*" = all.
        self._no_proxy = [
            each.strip().lower().lstrip(".") for each in
            (environ.get("NO_PROXY", "") or environ.get("no_proxy", "")).split(",") if each.strip()
        ]

    def connect(
        self, target: Target, timeout_s: float, *, only_public: bool = False
    ) -> socket.socket:
        """Return a connected socket with this timeout. With `only_public`, addresses of this
        machine and of private networks are refused. Raises NetworkFailed."""
        try:
            sock = self._open(target, only_public)
        except (OSError, ValueError) as problem:
            raise NetworkFailed(f"{target.host}: {reason_of(problem)}") from None
        try:
            sock.settimeout(timeout_s)
            if target.is_tls:
                sock = trusted_servers().wrap_socket(sock, server_hostname=target.host)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        except (OSError, ValueError) as problem:
            sock.close()
            raise NetworkFailed(f"{target.host}: {reason_of(problem)}") from None
        return sock

    def _open(self, target: Target, only_public: bool) -> socket.socket:
        if not self._uses_proxy(target):
            return open_socket(target.host, target.port, only_public)
        proxy = urllib.parse.urlsplit(self._proxy)
        sock = open_socket(proxy.hostname or "", proxy.port or 80, False)
        try:
            sock.settimeout(_CONNECT_TIMEOUT_S)
            ask_proxy(sock, target, proxy)
        except BaseException:
            sock.close()
            raise
        return sock

    def _uses_proxy(self, target: Target) -> bool:
        if not self._proxy or is_loopback(target.host):
            return False
        host = target.host.lower()
        return not any(
            name in ("*", host, f"{host}:{target.port}") or host.endswith(f".{name}")
            for name in self._no_proxy
        )


@functools.lru_cache(maxsize=1)
def trusted_servers() -> ssl.SSLContext:
    """Return whom TLS trusts, one for all accounts: to read it takes a while and a megabyte."""
    return ssl.create_default_context()


def open_socket(host: str, port: int, only_public: bool) -> socket.socket:
    """Return a socket to the first address that answers. Raises OSError. IPv4 is tried first,
    because IPv6 is often broken."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    found.sort(key=lambda each: each[0] != socket.AF_INET)
    failure = OSError("no IP address found")
    for family, kind, protocol, _, address in found:
        if only_public and not is_public(str(address[0])):
            failure = OSError("the address is not public")
            continue
        sock = socket.socket(family, kind, protocol)
        sock.settimeout(_CONNECT_TIMEOUT_S)
        try:
            sock.connect(address)
        except OSError as problem:
            failure = problem
            sock.close()
        else:
            return sock
    raise failure


def ask_proxy(sock: socket.socket, target: Target, proxy: urllib.parse.SplitResult) -> None:
    """Ask a proxy to connect to the target. Raises OSError."""
    host = f"[{target.host}]" if ":" in target.host else target.host
    lines = [f"CONNECT {host}:{target.port} HTTP/1.1", f"Host: {host}:{target.port}"]
    if proxy.username:
        user = urllib.parse.unquote(proxy.username)
        password = urllib.parse.unquote(proxy.password or "")
        lines.append(f"Proxy-Authorization: Basic {base64_text(f'{user}:{password}'.encode())}")
    sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
    status = read_head(sock)[0].split(None, 2)[1:2]
    if status != ["200"]:
        raise OSError(f"the proxy answers {' '.join(status) or 'nothing'}")


def read_head(sock: socket.socket) -> list[str]:
    """Return the lines of an HTTP head, without reading beyond it. Raises OSError."""
    head = bytearray()
    while not head.endswith(b"\r\n\r\n"):
        piece = sock.recv(1)
        if not piece or len(head) >= _MAX_HEAD_BYTES:
            raise OSError("the answer broke off")
        head += piece
    return head.decode("latin-1").split("\r\n")[:-2]


def is_public(address: str) -> bool:
    """Return whether an IP address is public, or one of a fake-IP proxy."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return parsed.is_global or parsed in _FAKE_IP_RANGE


class Wire(http.client.HTTPConnection):
    """An HTTP connection over a socket of a Connector."""

    def __init__(self, sock: socket.socket, target: Target) -> None:
        super().__init__(target.host, target.port)
        self.sock = sock
        # http.client drops `sock` after an answer with "Connection: close".
        self._socket = sock
        self._used_s = time.monotonic()

    def set_timeout(self, timeout_s: float) -> None:
        """Bound each wait for bytes."""
        self._socket.settimeout(timeout_s)
        self._used_s = time.monotonic()

    def is_usable(self) -> bool:
        """Return whether another request may be sent. A connection that is readable between two
        requests has ended: a request on it might be lost without notice."""
        if self.sock is None or time.monotonic() - self._used_s > _MAX_IDLE_S:
            return False
        try:
            return not select.select([self._socket], [], [], 0)[0]
        except (OSError, ValueError):
            return False

    def cut(self) -> None:
        """End reading from another thread, and wake up the thread that reads."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def end(self) -> None:
        """Close the connection."""
        self.close()
        self._socket.close()


class Exchange:
    """A sent request, and its answer, read as it arrives."""

    def __init__(self, wire: Wire, answer: http.client.HTTPResponse) -> None:
        self.wire, self._answer = wire, answer
        self.status = answer.status
        self.headers = {name.lower(): value for name, value in answer.getheaders()}

    def lines(self) -> Iterator[bytes]:
        """Yield the lines of the body as they come. Raises NetworkFailed."""
        while True:
            line = self._read(lambda: self._answer.readline(_MAX_ANSWER_BYTES))
            if not line:
                return
            yield line

    def read(self, max_bytes: int = _MAX_ANSWER_BYTES) -> bytes:
        """Return the whole body. Raises NetworkFailed, ValueError if it is larger."""
        body, until_s = bytearray(), time.monotonic() + _MAX_READ_S
        while len(body) <= max_bytes:
            piece = self._read(lambda: self._answer.read1(65_536))
            body += piece
            if not piece and self._answer.length:
                raise NetworkFailed("the answer broke off")
            if not piece:
                # The connection takes another request only after this.
                self._answer.close()
                return bytes(body)
            if time.monotonic() > until_s:
                raise NetworkFailed("the answer took too long")
        raise ValueError(f"larger than {max_bytes} bytes")

    def close(self) -> None:
        """Close the connection."""
        self._answer.close()
        self.wire.end()

    def _read(self, read: Callable[[], bytes]) -> bytes:
        try:
            return read()
        except (OSError, http.client.HTTPException, ValueError) as problem:
            raise NetworkFailed(reason_of(problem)) from None


class Http:
    """Requests over one Connector. `call` keeps the connection to the last host open."""

    def __init__(self, connector: Connector) -> None:
        self.connector = connector
        # Guards `_idle`.
        self._lock = threading.Lock()
        self._idle: Optional[tuple[Target, Wire]] = None

    def open(
        self, method: str, url: str, body: Optional[bytes] = None,
        headers: Optional[Mapping[str, str]] = None, timeout_s: float = 30.0,
        on_open: Optional[Callable[[Wire], None]] = None, only_public: bool = False,
        wire: Optional[Wire] = None,
    ) -> Exchange:
        """Send a request and return its exchange when the head of the answer has arrived.

        `timeout_s` bounds each wait for bytes. `on_open` gets the connection before the request is
        sent, so that another thread can cut it. Raises NetworkFailed."""
        target = Target.of(url)
        if wire is None:
            sock = self.connector.connect(target, timeout_s, only_public=only_public)
            wire = Wire(sock, target)
        if on_open is not None:
            on_open(wire)
        try:
            wire.set_timeout(timeout_s)
            wire.request(method, target.path, body, {"Host": target.authority, **(headers or {})})
            return Exchange(wire, wire.getresponse())
        except (http.client.InvalidURL, ValueError):
            wire.end()
            # These messages quote the URL or a header, and so could leak a token.
            raise NetworkFailed(f"{target.host}: a key or a URL has a character that cannot be "
                                "sent") from None
        except (OSError, http.client.HTTPException) as problem:
            wire.end()
            raise NetworkFailed(f"{target.host}: {reason_of(problem)}") from None

    def call(
        self, method: str, url: str, body: Union[None, bytes, Json] = None,
        headers: Optional[Mapping[str, str]] = None, timeout_s: float = 30.0,
        max_bytes: int = _MAX_ANSWER_BYTES, only_public: bool = False,
        on_open: Optional[Callable[[Wire], None]] = None,
    ) -> HttpAnswer:
        """Return the answer to a request. A dict is sent as JSON. A call with `on_open`, such as a
        long poll, gets its own connection.

        Raises NetworkFailed, ValueError if the answer is larger than `max_bytes`."""
        sent = dict(headers or {})
        if isinstance(body, dict):
            sent.setdefault("Content-Type", "application/json")
            body = compact(body).encode("ascii")
        target = Target.of(url)._replace(path="")
        has_own_connection = only_public or on_open is not None
        wire = None if has_own_connection else self._take_idle(target)
        exchange = self.open(method, url, body, sent, timeout_s, on_open, only_public, wire)
        try:
            answer = HttpAnswer(exchange.status, exchange.headers, exchange.read(max_bytes))
        except BaseException:
            exchange.close()
            raise
        if has_own_connection or not exchange.wire.is_usable():
            exchange.close()
        else:
            self._keep((target, exchange.wire))
        return answer

    def close(self) -> None:
        """Close the idle connection."""
        self._keep(None)

    def _take_idle(self, target: Target) -> Optional[Wire]:
        with self._lock:
            if self._idle is None or self._idle[0] != target:
                return None
            (_, wire), self._idle = self._idle, None
        if wire.is_usable():
            return wire
        wire.end()
        return None

    def _keep(self, idle: Optional[tuple[Target, Wire]]) -> None:
        with self._lock:
            old, self._idle = self._idle, idle
        if old is not None:
            old[1].end()


def pause_after_instant_poll(stop: threading.Event, began_s: float) -> None:
    """Wait a second if a long poll returned nothing at once: polling again would be a busy loop."""
    if time.monotonic() - began_s < _MIN_POLL_S:
        stop.wait(1.0)


def is_local(url: str) -> bool:
    """Return whether a URL is on this machine, which means that the platform is a test server."""
    return is_loopback(urllib.parse.urlsplit(url).hostname or "")


class Token:
    """A token of a platform that expires. Several threads may use it."""

    def __init__(self, fetch: Callable[[], tuple[object, object]], clock: Callable[[], float]
                 ) -> None:
        """`fetch` returns a token and its lifetime in seconds. It and `get` raise Fatal, Retry."""
        self._fetch, self._clock = fetch, clock
        # Guards the fields below. Held while a token is fetched, so that only one thread fetches.
        self._lock = threading.Lock()
        self._token, self._until_s = "", -math.inf

    def get(self) -> str:
        """Return the token; a new one if it expires within minutes."""
        with self._lock:
            if self._clock() >= self._until_s:
                token, life = self._fetch()
                life_s = seconds_of(life)
                if not (token and life_s):
                    raise Retry("the platform sent no token")
                self._token = str(token)
                self._until_s = self._clock() + max(life_s - 300, life_s * 2 / 3)
            return self._token

    def forget(self) -> None:
        """Fetch a new token at the next `get`."""
        with self._lock:
            self._until_s = -math.inf


def leads_to(url: str, domains: tuple[str, ...], root: str) -> bool:
    """Return whether a URL is https and below one of these domains, such as ".qq.com"; or on this
    machine, if the platform's own URL `root` is."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme == "https" and f".{parts.hostname or ''}".endswith(domains) or (
        is_local(root) and is_local(url))


def linked_bytes(http: Http, url: str, max_bytes: int, root: str) -> bytes:
    """Return the bytes at a URL from a message; `root` is the URL of the platform's API. Raises
    SendFailed, ValueError."""
    # A stranger's message must not make this program send requests into its own network.
    if not (url.startswith("https://") or is_local(root)):
        raise SendFailed("never", "not an https URL")
    with sending():
        answer = http.call("GET", url, max_bytes=max_bytes, only_public=not is_local(root))
    if answer.status != 200:
        raise SendFailed("never", f"status {answer.status}")
    return answer.body


# ==== 7. WebSocket ===========================================================
# A client of RFC 6455. It offers no extensions, so every frame follows the RFC itself.

_ACCEPT_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_MAX_CONTROL_BYTES = 125
#: Opcodes, section 5.2.
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
#: Close codes, section 7.4.1. The last two are never sent: they describe how a connection ended.
_PROTOCOL_ERROR, _NOT_UTF8, _TOO_BIG, _NO_CODE, _NO_CLOSE = 1002, 1007, 1009, 1005, 1006
_OWN_CODES = (_PROTOCOL_ERROR, _NOT_UTF8, _TOO_BIG)


class WebSocketClosed(Exception):
    """The connection ended with this close code: 1005 without a code, 1006 without a close."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"closed with {code}{f' ({reason})' if reason else ''}")
        self.code = code


class WebSocket:
    """An open connection. One thread receives; any thread may send or close."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        #: Bytes of the next frames.
        self._buffer = bytearray()
        #: The fragments of an unfinished message, and its opcode, 0 if there is none.
        self._message = bytearray()
        self._opcode = 0
        # Lets one thread send a frame at a time. Guards `_is_closing` too.
        self._lock = threading.Lock()
        self._is_closing = False
        #: When bytes last came, by time.monotonic; those of a pong count too.
        self.heard_s = time.monotonic()

    @classmethod
    def connect(
        cls, connector: Connector, url: str, headers: Optional[Mapping[str, str]] = None,
        timeout_s: float = 15.0,
    ) -> WebSocket:
        """Return an open connection. Raises NetworkFailed."""
        target = Target.of(url)
        sock = connector.connect(target, timeout_s)
        key = base64_text(os.urandom(16))
        sent = {
            "Host": target.authority, "Upgrade": "websocket", "Connection": "Upgrade",
            "Sec-WebSocket-Key": key, "Sec-WebSocket-Version": "13", **(headers or {}),
        }
        lines = [f"GET {target.path} HTTP/1.1", *(f"{name}: {sent[name]}" for name in sent)]
        try:
            sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
            check_upgrade(read_head(sock), key)
        except (OSError, ValueError) as problem:
            sock.close()
            raise NetworkFailed(f"{target.host}: {reason_of(problem)}") from None
        return cls(sock)

    def receive(self, timeout_s: float) -> Optional[str]:
        """Return the next message, None if none came in time. Answers pings meanwhile.

        Raises WebSocketClosed, also after a violation of the RFC, which closes the connection."""
        due_s = time.monotonic() + timeout_s
        try:
            while True:
                frame = self._next_frame()
                if frame is not None:
                    message = self._take(*frame)
                    if message is not None:
                        return message
                elif not self._read_more(due_s - time.monotonic()):
                    return None
        except WebSocketClosed as closed:
            self.close(closed.code if closed.code in _OWN_CODES else 1000)
            raise

    def send(self, text: str) -> None:
        """Send a message. Raises WebSocketClosed."""
        self._send_frame(_TEXT, text.encode())

    def ping(self) -> None:
        """Send a ping. `receive` consumes the pong. Raises WebSocketClosed."""
        self._send_frame(_PING, b"")

    def close(self, code: int = 1000) -> None:
        """Close the connection and wake up the thread that receives."""
        with contextlib.suppress(WebSocketClosed):
            self._send_frame(_CLOSE, code.to_bytes(2, "big"))
        self.cut()

    def cut(self) -> None:
        """End the connection at once, without a close frame."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        self._socket.close()

    def _read_more(self, timeout_s: float) -> bool:
        """Read available bytes; return whether any came in time. Raises WebSocketClosed."""
        try:
            # A TLS socket may hold bytes that select does not see.
            pending = isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()
            if not pending and not select.select([self._socket], [], [], max(0.0, timeout_s))[0]:
                return False
            piece = self._socket.recv(65_536)
        except (OSError, ValueError):
            raise WebSocketClosed(_NO_CLOSE) from None
        if not piece:
            raise WebSocketClosed(_NO_CLOSE)
        self._buffer += piece
        self.heard_s = time.monotonic()
        return True

    def _next_frame(self) -> Optional[tuple[int, bool, bytes]]:
        """Return opcode, is_final and payload of the next frame, None until it is complete."""
        if len(self._buffer) < 2:
            return None
        first, second = self._buffer[:2]
        if first & 0x70 or second & 0x80:
            raise WebSocketClosed(_PROTOCOL_ERROR, "reserved bits or a mask")
        size, start = second & 0x7F, 2
        if size > _MAX_CONTROL_BYTES:
            start += 2 if size == 126 else 8
            if len(self._buffer) < start:
                return None
            size = int.from_bytes(self._buffer[2:start], "big")
        opcode, is_final = first & 0x0F, bool(first & 0x80)
        if opcode >= _CLOSE and (size > _MAX_CONTROL_BYTES or not is_final):
            raise WebSocketClosed(_PROTOCOL_ERROR, "a control frame that is too long or in parts")
        if size + len(self._message) > _MAX_MESSAGE_BYTES:
            raise WebSocketClosed(_TOO_BIG)
        if len(self._buffer) < start + size:
            return None
        payload = bytes(self._buffer[start:start + size])
        del self._buffer[:start + size]
        return opcode, is_final, payload

    def _take(self, opcode: int, is_final: bool, payload: bytes) -> Optional[str]:
        """Return the message that a frame completes, None if it completes none."""
        if opcode == _PING:
            self._send_frame(_PONG, payload)
        elif opcode == _CLOSE:
            with contextlib.suppress(WebSocketClosed):
                self._send_frame(_CLOSE, payload[:2])
            code = int.from_bytes(payload[:2], "big") if len(payload) >= 2 else _NO_CODE
            raise WebSocketClosed(code, clean(payload[2:].decode(errors="replace")))
        elif opcode in (_TEXT, _BINARY, _CONTINUATION):
            if (opcode == _CONTINUATION) != bool(self._opcode):
                raise WebSocketClosed(_PROTOCOL_ERROR, "fragments out of order")
            self._opcode = self._opcode or opcode
            self._message += payload
            if is_final:
                data, self._opcode = bytes(self._message), 0
                self._message.clear()
                try:
                    return data.decode()
                except UnicodeDecodeError:
                    raise WebSocketClosed(_NOT_UTF8) from None
        elif opcode != _PONG:
            raise WebSocketClosed(_PROTOCOL_ERROR, "an unknown opcode")
        return None

    def _send_frame(self, opcode: int, payload: bytes) -> None:
        size = len(payload)
        if size <= _MAX_CONTROL_BYTES:
            head = bytes([0x80 | opcode, 0x80 | size])
        elif size < 1 << 16:
            head = bytes([0x80 | opcode, 0x80 | 126]) + size.to_bytes(2, "big")
        else:
            head = bytes([0x80 | opcode, 0x80 | 127]) + size.to_bytes(8, "big")
        mask = os.urandom(4)
        with self._lock:
            if self._is_closing:
                raise WebSocketClosed(_NO_CLOSE)
            self._is_closing = opcode == _CLOSE
            try:
                self._socket.sendall(head + mask + masked(payload, mask))
            except (OSError, ValueError):
                raise WebSocketClosed(_NO_CLOSE) from None


def masked(payload: bytes, mask: bytes) -> bytes:
    """Return a masked payload, section 5.3, by one XOR of two large numbers."""
    size = len(payload)
    repeated = (mask * (size // 4 + 1))[:size]
    number = int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")
    return number.to_bytes(size, "big")


def check_upgrade(head: list[str], key: str) -> None:
    """Check the answer to an upgrade. Raises ValueError."""
    words = head[0].split(None, 2)
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(":") for line in head[1:])
    }
    if words[1:2] != ["101"]:
        raise ValueError(f"not a WebSocket server: the answer is {' '.join(words[1:]) or 'empty'}")
    digest = hashlib.sha1((key + _ACCEPT_GUID).encode("ascii")).digest()
    if headers.get("sec-websocket-accept") != base64_text(digest):
        raise ValueError("not a WebSocket server: the answer has a wrong Sec-WebSocket-Accept")


# ==== 8. QR code =============================================================
# The subset of ISO/IEC 18004 that a link needs: byte mode, level L, versions 1 to 10, mask 0.
# Coordinates are (row, column).

#: For each version: the data bytes of each block, and the number of correction bytes per block.
_QR_BLOCKS: tuple[tuple[tuple[int, ...], int], ...] = (
    ((19,), 7), ((34,), 10), ((55,), 15), ((80,), 20), ((108,), 26),
    ((68, 68), 18), ((78, 78), 20), ((97, 97), 24), ((116, 116), 30), ((68, 68, 69, 69), 18),
)
#: For each version: the centres of its alignment patterns, except 6.
_QR_CENTRES: tuple[tuple[int, ...], ...] = (
    (), (18,), (22,), (26,), (30,), (34,), (22, 38), (24, 42), (26, 46), (28, 50),
)
#: Level L and mask 0, as encoded in the format information.
_QR_FORMAT = 0b01000
_QR_BLACK_ON_WHITE = "\x1b[30;107m"


def qr_code(data: bytes) -> list[list[bool]]:
    """Return the modules of a QR code, row by row, True = dark. Raises ValueError if `data` has
    more than 271 bytes."""
    version, message = qr_message(data)
    size = 17 + 4 * version
    grid: list[list[Optional[bool]]] = [[None] * size for _ in range(size)]
    draw_patterns(grid, version)
    number, bits = int.from_bytes(message, "big"), 8 * len(message)
    for place, (row, column) in enumerate(free_cells(grid)):
        # The few cells after the last bit hold zeros.
        bit = place < bits and bool(number >> (bits - 1 - place) & 1)
        grid[row][column] = bit ^ ((row + column) % 2 == 0)
    return [[bool(module) for module in line] for line in grid]


def qr_message(data: bytes) -> tuple[int, list[int]]:
    """Return the smallest version for the data, and its blocks with their correction bytes."""
    version = next(
        (each for each, (blocks, _) in enumerate(_QR_BLOCKS, 1)
         if qr_bits(each, len(data)) <= 8 * sum(blocks)), 0,
    )
    if not version:
        raise ValueError("too long for a QR code")
    (blocks, corrections), bits = _QR_BLOCKS[version - 1], qr_bits(version, len(data))
    length_bits = bits - 4 - 8 * len(data)
    # Mode 4 = bytes; then the length, the data, up to four zero bits, and padding.
    number = (4 << length_bits | len(data)) << 8 * len(data) | int.from_bytes(data, "big")
    used = min((bits + 4 + 7) // 8, sum(blocks))
    stream = list((number << (8 * used - bits)).to_bytes(used, "big"))
    padding = itertools.cycle((0xEC, 0x11))
    stream += itertools.islice(padding, sum(blocks) - used)
    rest = iter(stream)
    parts = [list(itertools.islice(rest, length)) for length in blocks]
    checks = [reed_solomon(part, corrections) for part in parts]
    return version, [*interleaved(parts), *interleaved(checks)]


def qr_bits(version: int, size_bytes: int) -> int:
    """Return how many bits the mode, the length and the data take."""
    return 4 + (8 if version < 10 else 16) + 8 * size_bytes


def interleaved(blocks: list[list[int]]) -> list[int]:
    """Return the first of each block, then the second of each, and so on."""
    columns = itertools.zip_longest(*blocks)
    return [value for column in columns for value in column if value is not None]


def reed_solomon(data: list[int], count: int) -> list[int]:
    """Return the correction bytes of a block, over GF(256) with 0x11D."""
    generator = [1]
    for power in range(count):
        root = _QR_POWERS[power]
        shifted = [*generator, 0]
        for place, factor in enumerate(generator):
            shifted[place + 1] ^= gf_multiply(factor, root)
        generator = shifted
    rest = [*data, *([0] * count)]
    for place in range(len(data)):
        factor = rest[place]
        for offset, coefficient in enumerate(generator):
            rest[place + offset] ^= gf_multiply(coefficient, factor)
    return rest[len(data):]


def gf_powers() -> tuple[int, ...]:
    """Return the powers of 2 in GF(256)."""
    powers, value = [], 1
    for _ in range(255):
        powers.append(value)
        value = value << 1 ^ (0x11D if value & 0x80 else 0)
    return tuple(powers)


_QR_POWERS = gf_powers()
_QR_LOGARITHMS = {value: power for power, value in enumerate(_QR_POWERS)}


def gf_multiply(left: int, right: int) -> int:
    """Return a product in GF(256)."""
    if not left or not right:
        return 0
    return _QR_POWERS[(_QR_LOGARITHMS[left] + _QR_LOGARITHMS[right]) % 255]


def draw_patterns(grid: list[list[Optional[bool]]], version: int) -> None:
    """Draw everything except the data."""
    size = len(grid)
    for row, column in ((3, 3), (3, size - 4), (size - 4, 3)):
        draw_rings(grid, row, column, 4, (2, 4))
    centres = (6, *_QR_CENTRES[version - 1]) if version > 1 else ()
    for row, column in itertools.product(centres, centres):
        if grid[row][column] is None:
            draw_rings(grid, row, column, 2, (1,))
    for place in range(8, size - 8):
        grid[6][place] = grid[place][6] = place % 2 == 0
    draw_format(grid)
    if version >= 7:
        code = with_bch(version, 12, 0x1F25)
        for bit in range(18):
            row, column = bit // 3, size - 11 + bit % 3
            grid[row][column] = grid[column][row] = bool(code >> bit & 1)


def draw_rings(
    grid: list[list[Optional[bool]]], row: int, column: int, reach: int, light: tuple[int, ...]
) -> None:
    """Draw a square of rings around a centre; the rings at the distances in `light` are light."""
    for down, right in itertools.product(range(-reach, reach + 1), repeat=2):
        if 0 <= row + down < len(grid) and 0 <= column + right < len(grid):
            grid[row + down][column + right] = max(abs(down), abs(right)) not in light


def draw_format(grid: list[list[Optional[bool]]]) -> None:
    """Draw the format information beside the finders, twice, and the module that is always dark."""
    size = len(grid)
    code = with_bch(_QR_FORMAT, 10, 0x537) ^ 0x5412
    around = [0, 1, 2, 3, 4, 5, 7, 8]
    first = [(row, 8) for row in around] + [(8, column) for column in reversed(around[:-1])]
    second = [(8, size - 1 - place) for place in range(8)]
    second += [(row, 8) for row in range(size - 7, size)]
    for bit, places in enumerate(zip(first, second)):
        for row, column in places:
            grid[row][column] = bool(code >> bit & 1)
    grid[size - 8][8] = True


def with_bch(value: int, count: int, generator: int) -> int:
    """Return a value followed by `count` bits of its BCH code."""
    rest = value << count
    for shift in range(rest.bit_length() - count - 1, -1, -1):
        if rest >> (shift + count) & 1:
            rest ^= generator << shift
    return value << count | rest


def free_cells(grid: list[list[Optional[bool]]]) -> list[tuple[int, int]]:
    """Return the data cells in order: pairs of columns from the right, alternately up and down."""
    size, cells, is_upward = len(grid), [], True
    for right in (*range(size - 1, 6, -2), 5, 3, 1):
        rows = range(size - 1, -1, -1) if is_upward else range(size)
        cells += [
            (row, column) for row in rows for column in (right, right - 1)
            if grid[row][column] is None
        ]
        is_upward = not is_upward
    return cells


def qr_lines(data: bytes, columns: int) -> list[str]:
    """Return a QR code as lines for a terminal, [] if `columns` is too narrow.

    Half blocks put two rows into one line, black on white even with a dark theme."""
    modules = qr_code(data)
    quiet = 4 if len(modules) + 8 <= columns else 2
    width = len(modules) + 2 * quiet
    if width > columns:
        return []
    edge = [False] * quiet
    empty = [[False] * width for _ in range(quiet)]
    rows = [*empty, *([*edge, *line, *edge] for line in modules), *empty, [False] * width]
    blocks = {(False, False): " ", (True, False): "\u2580", (False, True): "\u2584",
              (True, True): "\u2588"}
    return [
        _QR_BLACK_ON_WHITE + "".join(blocks[pair] for pair in zip(upper, lower)) + "\x1b[0m"
        for upper, lower in zip(rows[::2], rows[1::2])
    ]


class Console:
    """The terminal during a login."""

    def show_link(self, url: str) -> None:
        """Show a link as a QR code on a terminal, and as text."""
        if sys.stdout.isatty():
            with contextlib.suppress(ValueError):
                print("\n".join(qr_lines(url.encode(), shutil.get_terminal_size().columns)))
        print(url, flush=True)

    def say(self, text: str) -> None:
        """Print a line."""
        print(clean(text), flush=True)

    def ask(self, question: str) -> str:
        """Return a line that the user types. Raises Fatal without a terminal."""
        try:
            return input(f"{clean(question)} ").strip()
        except EOFError:
            raise Fatal("there is no terminal to ask on", "run it on a terminal") from None


# ==== 9. Text ================================================================
# Answers are Markdown. `render` turns them into the markup of a platform by a table of its
# elements, and `split_markdown` splits the source so that each part fits once it is rendered.

#: Where to cut a part, best first. A cut lies in the last two fifths of what fits.
_CUT_AFTER = (
    re.compile(r"\n(?=```)|```\n"), re.compile(r"\n\n"), re.compile(r"\n"),
    re.compile("[.!?\u2026] |[\u3002\uff01\uff1f]"), re.compile(r"\s"),
)
_SEARCHED_SHARE = 0.6
#: The longest opening line of a fence that is repeated in the next part.
_MAX_OPENER_CHARS = 30
_MAX_LISTED_COLUMNS = 4
#: How many combining marks in a row are kept with their letter.
_MAX_MARKS = 16
_FENCE = re.compile(r"(?m)^(`{3,20}|~{3,20})([^`\n]*)$")
_TABLE_RULE = re.compile(r"^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$")
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*$")
_ITEM = re.compile(r"(\s*)[-*+]\s+(.*)$")
#: Elements within a line. Each has a maximum length, which bounds the time for a long line.
_INLINE = re.compile(
    r"(?<!`)(?P<ticks>`{1,20})(?P<code>[^`](?:.{0,2000}?[^`])?)(?P=ticks)(?!`)"
    r"|(?P<picture>!?)\[(?P<label>[^\]\n]{0,500})\]"
    r"\((?P<url>[^\s()]*(?:\([^\s()]*\)[^\s()]*)*)[^)\n]{0,300}\)"
    r"|(?P<bold>\*\*|__)(?=\S)(?P<strong>[^\n]{1,2000}?)(?<=\S)(?P=bold)"
    r"|~~(?=\S)(?P<strike>[^\n]{1,2000}?)(?<=\S)~~"
    r"|(?<![\w*])(?P<slant>[*_])(?=[^\s*_])(?P<italic>[^\n]{0,2000}?[^\s*_])(?P=slant)(?![\w*])"
    r"|(?P<address>https?://[^\s<>]+)",
    re.DOTALL,
)


def _unchanged(text: str) -> str:
    return text


def _quoted(lines: list[str]) -> str:
    return "\n".join(f"> {line}" for line in lines)


class Markup(NamedTuple):
    """How a platform writes each element of Markdown. The defaults are Markdown itself."""

    escape: Callable[[str], str] = _unchanged
    bold: tuple[str, str] = ("**", "**")
    italic: tuple[str, str] = ("*", "*")
    strike: tuple[str, str] = ("~~", "~~")
    code: tuple[str, str] = ("`", "`")
    #: Takes the language, which may be empty, and the text.
    fence: Callable[[str, str], str] = lambda language, text: f"```{language}\n{text}\n```"
    link: Callable[[str, str], str] = lambda label, url: f"[{label}]({url})"
    heading: Callable[[int, str], str] = lambda level, text: f"{'#' * level} {text}"
    #: Takes rendered lines.
    quote: Callable[[list[str]], str] = _quoted
    item: str = "- "
    line_end: str = "\n"


#: No markup, for parts whose markup a platform refused.
PLAIN = Markup(
    bold=("", ""), italic=("", ""), strike=("", ""), code=("", ""),
    fence=lambda language, text: text,
    link=lambda label, url: url if label in ("", url) else f"{label} ({url})",
    heading=lambda level, text: text,
)


def render(markdown: str, markup: Markup) -> str:
    """Return Markdown in the markup of a platform."""
    lines, done = markdown.split("\n"), []
    while lines:
        for reader in (_read_fence, _read_table, _read_quote):
            block = reader(lines, markup)
            if block is not None:
                done.append(block)
                break
        else:
            done.append(_render_line(lines.pop(0), markup))
    return markup.line_end.join(done)


def _read_fence(lines: list[str], markup: Markup) -> Optional[str]:
    """Remove a fenced block from the lines and return it rendered; None if none begins here."""
    opener = _FENCE.match(lines[0])
    if opener is None:
        return None
    fence, language = opener.group(1), opener.group(2).strip()
    end = next(
        (number for number, line in enumerate(lines[1:], 1)
         if line.startswith(fence) and not line.strip(fence[0] + " ")), len(lines),
    )
    text = "\n".join(lines[1:end])
    del lines[:end + 1]
    return markup.fence(language, markup.escape(text))


def _read_table(lines: list[str], markup: Markup) -> Optional[str]:
    """Remove a table from the lines and return it rendered: `Header: cell` lines if it is narrow,
    else aligned text. None if none begins here."""
    if "|" not in lines[0] or len(lines) < 2 or not _TABLE_RULE.match(lines[1]):
        return None
    size = 2 + sum(1 for _ in itertools.takewhile(lambda line: "|" in line, lines[2:]))
    rows = [_cells(line) for number, line in enumerate(lines[:size]) if number != 1]
    del lines[:size]
    head, body = rows[0], rows[1:]
    if len(head) > _MAX_LISTED_COLUMNS or not body:
        return markup.fence("", markup.escape(_aligned(rows)))
    blocks = [
        markup.line_end.join(
            f"{_inline(name, markup)}: {_inline(cell, markup)}" if name else _inline(cell, markup)
            for name, cell in itertools.zip_longest(head, row[:len(head)], fillvalue="") if cell
        )
        for row in body
    ]
    return "\n\n".join(blocks)


def _cells(line: str) -> list[str]:
    inner = line.strip()
    inner = inner[1:] if inner.startswith("|") else inner
    inner = inner[:-1] if inner.endswith("|") and not inner.endswith("\\|") else inner
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", inner)]


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


def _read_quote(lines: list[str], markup: Markup) -> Optional[str]:
    """Remove a quotation from the lines and return it rendered; None if none begins here."""
    quoted = list(itertools.takewhile(lambda line: line.startswith(">"), lines))
    if not quoted:
        return None
    del lines[:len(quoted)]
    return markup.quote([_render_line(line[1:].lstrip(" "), markup) for line in quoted])


def _render_line(line: str, markup: Markup) -> str:
    heading, item = _HEADING.match(line), _ITEM.match(line)
    if heading is not None:
        return markup.heading(len(heading.group(1)), _inline(heading.group(2), markup))
    if item is not None:
        return f"{item.group(1)}{markup.item}{_inline(item.group(2), markup)}"
    return _inline(line, markup)


def _inline(text: str, markup: Markup) -> str:
    """Return the text of a line with its inline elements rendered."""
    done, end = [], 0
    for found in _INLINE.finditer(text):
        done += [markup.escape(text[end:found.start()]), _element(found, markup)]
        end = found.end()
    return "".join([*done, markup.escape(text[end:])])


def _element(found: re.Match[str], markup: Markup) -> str:
    """Return an inline element, rendered."""
    if found["code"] is not None:
        code = found["code"]
        ticks = found["ticks"] if markup.code[0] == "`" else ""
        return _within((ticks, ticks) if ticks else markup.code, markup.escape(code))
    if found["url"] is not None:
        return markup.link(markup.escape(found["label"]), markup.escape(found["url"]))
    for name, pair in (("strong", markup.bold), ("strike", markup.strike),
                       ("italic", markup.italic)):
        if found[name] is not None:
            return _within(pair, _inline(found[name], markup))
    return markup.escape(found["address"])


def _within(pair: tuple[str, str], text: str) -> str:
    return f"{pair[0]}{text}{pair[1]}"


def split_markdown(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Return Markdown in parts that each fit. A fence is closed at a cut and reopened after it."""
    parts, rest = [], text.strip("\n")
    while rest and not fits(rest):
        head, rest = _cut(rest, fits)
        parts.append(head)
    return [*parts, rest] if rest.strip() else parts


def _cut(text: str, fits: Callable[[str], bool]) -> tuple[str, str]:
    """Return the first part of a text that is too long, and the rest, which is always shorter."""
    longest = _longest_start(text, fits)
    end = _best_cut(text, longest)
    while end > 1 and not fits(_closed(text[:end])):
        end = _best_cut(text, end // 2)
    end = _before_marks(text, end)
    if len(_opener(text[:end])) >= end:
        # A part that is only the opening line, which the next part repeats, would never end.
        end = longest
    head, tail, opener = text[:end], text[end:], _opener(text[:end])
    if not opener:
        return head.rstrip("\n"), tail.lstrip("\n")
    return _closed(head), (opener if len(opener) < end else "") + tail


def _longest_start(text: str, fits: Callable[[str], bool]) -> int:
    """Return the largest number of leading characters that fit, at least 1."""
    low, high = 1, 256
    while high < len(text) and fits(_closed(text[:high])):
        low, high = high, 2 * high
    high = min(high, len(text))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(_closed(text[:middle])) else (low, middle)
    return low


def _before_marks(text: str, end: int) -> int:
    """Return a place for a cut that does not separate a combining mark from its letter."""
    for place in range(end, max(0, end - _MAX_MARKS), -1):
        follows = text[place:place + 1]
        if not follows or not (unicodedata.combining(follows) or follows in "\u200d\ufe0f"):
            return place
    return end


def _best_cut(text: str, end: int) -> int:
    """Return the best place for a cut at `end` or shortly before."""
    start = int(end * _SEARCHED_SHARE)
    for pattern in _CUT_AFTER:
        places = [found.end() for found in pattern.finditer(text, start, end)]
        best = next((each for each in reversed(places) if _before_link(text, each) == each), 0)
        if best:
            return best
    return _before_link(text, end) or end


def _before_link(text: str, place: int) -> int:
    """Return a place, or the start of the link or other element that a cut there would split."""
    line_start = text.rfind("\n", 0, place) + 1
    return next((
        found.start() for found in _INLINE.finditer(text, line_start, min(len(text), place + 500))
        if found.start() < place < found.end()), place)


def _open_fence(text: str) -> Optional[tuple[str, str]]:
    """Return the fence that is still open at the end of a text, and its opening line."""
    opener: Optional[tuple[str, str]] = None
    for found in _FENCE.finditer(text):
        if opener is None:
            opener = found.group(1), found.group(0)
        elif found.group(1).startswith(opener[0]) and not found.group(2).strip():
            opener = None
    return opener


def _opener(text: str) -> str:
    """Return the line that reopens the fence left open at the end of a text; empty without one."""
    opener = _open_fence(text)
    if opener is None:
        return ""
    fence, line = opener
    return f"{line if len(line) <= _MAX_OPENER_CHARS else fence}\n"


def _closed(text: str) -> str:
    opener = _open_fence(text)
    return text if opener is None else f"{text.rstrip(chr(10))}\n{opener[0]}"


# ==== 10. Opcode gateway =====================================================
# Discord and QQ push events over a WebSocket as {"op", "d", "s", "t"}; `s` numbers the events of a
# session. After a break, a new connection resumes the session after the last saved event, and the
# platform sends the later events again. One `run` is one connection.
# https://discord.com/developers/docs/events/gateway, https://bot.q.qq.com/wiki/develop/api-v2/

_DISPATCH, _HEARTBEAT, _IDENTIFY, _RESUME, _RECONNECT = 0, 1, 2, 6, 7
_INVALID_SESSION, _HELLO, _HEARTBEAT_ACK = 9, 10, 11
#: The time limits for the first frame, and then for the first event.
_HELLO_S, _READY_S = 15.0, 30.0
#: Closes the connection but keeps its session; 1000 and 1001 would end the session too.
_CLOSE_TO_RESUME = 4000
#: The pause before a new session, and the pause after several connections that broke at once.
_NEW_SESSION_S, _CUT_PAUSE_S = 3.0, 60.0
_CUT_WITHIN_S, _MAX_CUTS = 5.0, 3


class Ending(NamedTuple):
    """What to do after the end of a connection. By default, resume its session at once."""

    #: What is wrong, and what the owner has to do before a retry; empty if nothing.
    why: str = ""
    fix: str = ""
    is_session_over: bool = False
    after_s: float = 0.0


_NEW_SESSION = Ending(is_session_over=True, after_s=_NEW_SESSION_S)
_TOO_FAST = Ending(after_s=60.0)


class OpcodeChannel(Channel):
    """A channel that receives through an opcode gateway. The state of its account is the session:
    {"session_id", "seq", "url", "bot_id"}, {} without one."""

    #: What to do after a close code or a call's error code. Other codes: try again.
    endings: ClassVar[Mapping[int, Ending]] = {}
    #: The query string for the gateway's URL.
    query: ClassVar[str] = ""

    def __init__(
        self, tools: Tools, http: Http, root: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`root` is the URL of the platform's API."""
        super().__init__(tools, http)
        self._root, self._clock = root, clock
        self._session: Json = {}
        #: When the connection began, and how many connections in a row ended at once.
        self._began_s, self._cuts = 0.0, 0
        #: The heartbeat's interval, when the next is due, and whether the last was acknowledged.
        self._beat_every_s, self._beat_s, self._is_beat_heard = 0.0, math.inf, True
        #: The deadline for the connection's first event.
        self._ready_by_s = math.inf

    # -- what a subclass provides -----------------------------------------------------------------

    def token(self) -> str:
        """Return the bot's token in the gateway's format. Raises Fatal, Retry."""
        raise NotImplementedError

    def headers(self) -> Mapping[str, str]:
        """Return the headers of each call. Raises Fatal, Retry."""
        return {"Authorization": self.token()}

    def gateway_url(self) -> str:
        """Return the gateway's URL for a new session. Raises Fatal, Retry."""
        raise NotImplementedError

    def identity(self) -> Json:
        """Return the content of an Identify frame, except the token."""
        raise NotImplementedError

    def message(self, event: str, data: Json) -> Optional[Message]:
        """Return the message in an event, None if it is not a person's message."""
        raise NotImplementedError

    def disconnected(self) -> None:
        """Drop cached values, such as a token, that may have caused the end of a connection."""

    # -- calls ------------------------------------------------------------------------------------

    def call(self, method: str, path: str, body: Optional[Json] = None) -> HttpAnswer:
        """Return the answer to a call. Raises Fatal, Retry."""
        try:
            return self.http.call(method, self._root + path, body, self.headers())
        except NetworkFailed as problem:
            raise Retry(str(problem)) from None

    def ask(self, path: str) -> Json:
        """Return the answer to a GET about the bot itself. Raises Fatal, Retry."""
        answer = self.call("GET", path)
        if answer.status != 200:
            usual = Ending(after_s=answer.retry_after_s)
            self._end(f"status {answer.status}", self.endings.get(code_of(answer), usual))
        return answer.json()

    def probe(self) -> str:
        """Return the name of the bot. Raises Fatal, Retry."""
        return f"@{self.ask('/users/@me').get('username', '?')}"

    def fetch(self, attachment: Attachment, max_bytes: int) -> bytes:
        """Return the bytes of a file. Raises SendFailed, ValueError if it is larger."""
        return linked_bytes(self.http, str(attachment.ref["url"]), max_bytes, self._root)

    # -- receiving --------------------------------------------------------------------------------

    def run(self) -> None:
        """Receive over one connection until it ends. Raises Fatal, Retry."""
        self._session, self._began_s = self.tools.state(), self._clock()
        url = str(self._session.get("url") or self.gateway_url())
        try:
            connection = WebSocket.connect(self.http.connector, url.rstrip("/") + self.query)
        except NetworkFailed as problem:
            # The session's URL may be stale while the session itself is still valid.
            self._session = {**self._session, "url": ""}
            self._keep()
            raise Retry(str(problem)) from None
        self.tools.on_stop(lambda: connection.close(_CLOSE_TO_RESUME))
        try:
            self._serve(connection)
        except WebSocketClosed as closed:
            if not self.tools.stop.is_set():
                self._end(str(closed), self.endings.get(closed.code, Ending()))
        finally:
            connection.close(_CLOSE_TO_RESUME)
            self._keep()

    def _keep(self) -> None:
        """Save the session. If that fails, the events since the last save come again."""
        with contextlib.suppress(OSError):
            if self._session != self.tools.state():
                self.tools.accept(None, self._session)

    def _end(self, why: str, ending: Ending) -> NoReturn:
        """Raise Fatal or Retry after the end of a connection. Give the session up if connections
        keep breaking at once."""
        self.disconnected()
        if ending.fix:
            raise Fatal(ending.why, ending.fix)
        self._cuts = self._cuts + 1 if self._clock() - self._began_s < _CUT_WITHIN_S else 0
        if ending.is_session_over or self._cuts > _MAX_CUTS:
            self._session = {}
        raise Retry(why, _CUT_PAUSE_S if self._cuts >= _MAX_CUTS else ending.after_s)

    def _serve(self, connection: WebSocket) -> None:
        """Receive frames, and send heartbeats. Raises Fatal, Retry, WebSocketClosed."""
        self._beat_s, self._is_beat_heard = math.inf, True
        self._ready_by_s = self._clock() + _HELLO_S
        while True:
            now_s = self._clock()
            if now_s >= self._ready_by_s:
                self._end("the gateway sent nothing", Ending())
            if now_s >= self._beat_s:
                if not self._is_beat_heard:
                    self._end("no answer to the heartbeat", Ending())
                self._beat(connection)
                self._keep()
            text = connection.receive(min(self._beat_s, self._ready_by_s) - self._clock())
            if text is not None:
                self._take(connection, json_object(text))

    def _take(self, connection: WebSocket, frame: Json) -> None:
        op = frame.get("op")
        if op == _HELLO:
            self._greet(connection, frame)
        elif op == _DISPATCH:
            self._dispatch(frame)
        elif op == _HEARTBEAT:
            self._beat(connection)
        elif op == _HEARTBEAT_ACK:
            self._is_beat_heard = True
        elif op == _RECONNECT:
            self._end("the platform asks for a new connection", Ending())
        elif op == _INVALID_SESSION:
            is_over = frame.get("d") is not True
            self._end("the session is not valid", _NEW_SESSION._replace(is_session_over=is_over))
        if self._ready_by_s == math.inf:
            self.tools.note_frame()

    def _greet(self, connection: WebSocket, frame: Json) -> None:
        """Answer the first frame: resume the session, or begin one."""
        try:
            self._beat_every_s = max(1.0, float(frame["d"]["heartbeat_interval"]) / 1000)
        except (KeyError, TypeError, ValueError):
            self._end("invalid Hello frame", Ending())
        now_s = self._clock()
        # A random first delay, so that clients do not all send at once after an outage.
        self._beat_s = now_s + self._beat_every_s * secrets.randbelow(1000) / 1000
        self._ready_by_s = now_s + _READY_S
        found = {name: self._session.get(name) for name in ("session_id", "seq")}
        op, content = (_RESUME, found) if found["session_id"] else (_IDENTIFY, self.identity())
        connection.send(compact({"op": op, "d": {"token": self.token(), **content}}))

    def _beat(self, connection: WebSocket) -> None:
        connection.send(compact({"op": _HEARTBEAT, "d": self._session.get("seq")}))
        self._is_beat_heard, self._beat_s = False, self._clock() + self._beat_every_s

    def _dispatch(self, frame: Json) -> None:
        """Handle an event: save its message and its number. Raises OSError."""
        event, seq = str(frame.get("t")), frame.get("s")
        data = frame["d"] if isinstance(frame.get("d"), dict) else {}
        session = {**self._session, "seq": seq} if isinstance(seq, int) else self._session
        user = data.get("user")
        if event == "READY":
            session = {"session_id": str(data.get("session_id") or ""), "seq": seq,
                       "url": str(data.get("resume_gateway_url") or ""),
                       "bot_id": str(user.get("id") if isinstance(user, dict) else "")}
        message = self.understood(self.message, event, data)
        if message is not None or event == "READY":
            self.tools.accept(message, session)
        # Only after the event is saved: a failed event must be requested again.
        self._session, self._ready_by_s = session, math.inf


def code_of(answer: HttpAnswer) -> int:
    """Return the platform's error code, else the HTTP status; 0 for an answer that does not come
    from the platform but from a proxy or the like."""
    content = answer.json()
    code = content.get("err_code") or content.get("code")
    return code if code and isinstance(code, int) else answer.status if content else 0


def size_of(value: object) -> int:
    """Return the size of a file from a platform's field, 0 if it is missing."""
    return value if isinstance(value, int) else 0


def linked_file(found: Json) -> Attachment:
    """Return the attachment for a file of a message; its URL may lack the scheme."""
    mime, url = str(found.get("content_type") or "").partition(";")[0], str(found.get("url") or "")
    url = url if "://" in url else f"https://{url.lstrip('/')}"
    return Attachment("image" if mime.startswith("image/") else "file",
                      clean(found.get("filename") or "file"), mime, size_of(found.get("size")),
                      {"url": url})


# ==== 11. Telegram ===========================================================
# The Bot API by long polls. A poll's offset acknowledges all earlier updates, so it is advanced
# only after the earlier messages are saved. https://core.telegram.org/bots/api

#: How long the server holds a poll, and how much longer the connection may be silent.
_TELEGRAM_HOLD_S = 30
_TELEGRAM_SLACK_S = 15
#: The maximum time between the messages of an album.
_TELEGRAM_ALBUM_S = 0.5
_TELEGRAM_COMMANDS = (
    ("new", "begin a new conversation"), ("stop", "stop the answer"),
    ("model", "show or choose the model"), ("more", "send the rest of the last answer"),
    ("status", "show the status"), ("help", "show the commands"),
)
#: Texts in the description of an error, and the kind of SendFailed for each.
_TELEGRAM_REFUSALS = (
    ("can't parse entities", "plain"), ("bot was blocked", "never"), ("chat not found", "never"),
    ("user is deactivated", "never"), ("bot was kicked", "never"), ("not enough rights", "never"),
)
#: Content that is neither text nor a file: the agent gets its name.
_TELEGRAM_NAMED = ("sticker", "video_note", "location", "contact", "poll", "dice", "story")
_TELEGRAM_MISSING = ("message to be replied not found", "message thread not found")


def _telegram_fence(language: str, text: str) -> str:
    label = html.escape(language, quote=True)
    inner = f'<code class="language-{label}">{text}</code>' if label else text
    return f"<pre>{inner}</pre>"


def _telegram_link(label: str, url: str) -> str:
    is_link = re.match("(?i)(https?|tg|mailto):", url)
    address = url.replace('"', "%22")
    return f'<a href="{address}">{label or url}</a>' if is_link else f"{label} ({url})"


#: The HTML that Telegram accepts.
TELEGRAM_HTML = Markup(
    escape=lambda text: html.escape(text, quote=False),
    bold=("<b>", "</b>"), italic=("<i>", "</i>"), strike=("<s>", "</s>"),
    code=("<code>", "</code>"), fence=_telegram_fence, link=_telegram_link,
    heading=lambda level, text: f"<b>{text}</b>",
    quote=lambda lines: "<blockquote>" + "\n".join(lines) + "</blockquote>",
    item="\u2022 ",
)


class TelegramRefused(Exception):
    """The Bot API answered a call with an error."""

    def __init__(self, answer: HttpAnswer) -> None:
        content = answer.json()
        #: The error's code, which is the HTTP status too.
        self.code = int(content.get("error_code") or answer.status)
        super().__init__(str(content.get("description") or f"status {answer.status}"))
        found = content.get("parameters")
        self.parameters: Json = found if isinstance(found, dict) else {}
        #: The pause that the platform asks for.
        self.wait_s = max(1.0, seconds_of(self.parameters.get("retry_after"))) + 0.5


class Telegram(Channel):
    """A bot of Telegram."""

    def __init__(self, tools: Tools, http: Http) -> None:
        super().__init__(tools, http)
        self._root = tools.settings.get("apiRoot") or "https://api.telegram.org"
        self._token = f"bot{tools.settings['botToken']}"
        self._bot: Json = {}

    def _call(self, method: str, body: Json, timeout_s: float = 30.0,
              on_open: Optional[Callable[[Wire], None]] = None) -> Any:
        """Return the result of a method. Raises NetworkFailed, TelegramRefused."""
        answer = self.http.call("POST", f"{self._root}/{self._token}/{method}", body, {}, timeout_s,
                                on_open=on_open)
        content = answer.json()
        if "ok" not in content:
            # The answer comes from a proxy or the like, not from Telegram.
            raise NetworkFailed(f"status {answer.status}")
        if not content["ok"]:
            raise TelegramRefused(answer)
        return content.get("result")

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn the errors of calls into Fatal or Retry."""
        try:
            yield
        except NetworkFailed as problem:
            raise Retry(str(problem)) from None
        except TelegramRefused as refused:
            if refused.code in (401, 404):
                raise Fatal("the token is refused", "get a new one from @BotFather") from None
            if refused.code == 409:
                self.tools.note("another program polls this bot, or it has a webhook")
                with contextlib.suppress(NetworkFailed, TelegramRefused):
                    self._call("deleteWebhook", {"drop_pending_updates": False})
                raise Retry("another program polls this bot", 5.0) from None
            raise Retry(str(refused), refused.wait_s if refused.code == 429 else 0.0) from None

    def probe(self) -> str:
        """Return the name of the bot. Raises Fatal, Retry."""
        with self._failures():
            self._bot = self._call("getMe", {})
        if not isinstance(self._bot, dict):
            raise Retry("no answer from the Bot API")
        return f"@{self._bot.get('username', '?')}"

    # -- receiving ------------------------------------------------------------------------------

    def run(self) -> None:
        """Receive messages until the account has to stop. Raises Fatal, Retry."""
        self.probe()
        self.tools.note_frame()
        hint, state, bot_id = "", self.tools.state(), self._bot.get("id")
        # An offset is valid for one bot only: another bot's numbers may be smaller.
        if state.get("bot_id") != bot_id:
            state = {"bot_id": bot_id, "offset": 0}
        commands = [{"command": name, "description": about} for name, about in _TELEGRAM_COMMANDS]
        with contextlib.suppress(NetworkFailed, TelegramRefused):
            self._call("setMyCommands", {"commands": commands})
        if not (self.tools.settings["requireMention"]
                or self._bot.get("can_read_all_group_messages")):
            hint = ("in groups Telegram sends it only mentions and commands: switch privacy mode "
                    "off at @BotFather, or leave requireMention on")
        self.tools.note(hint)
        while not self.tools.stop.is_set():
            with self._failures():
                began_s = time.monotonic()
                updates = self._poll(state["offset"], _TELEGRAM_HOLD_S)
                # The poll worked, so no other program polls the bot now.
                self.tools.note(hint)
                if updates:
                    state = self._take(updates, state)
                else:
                    pause_after_instant_poll(self.tools.stop, began_s)

    def _poll(self, offset: int, hold_s: int) -> list[Json]:
        """Return the updates from `offset` on; empty if none came in time, or at the end."""
        body = {"offset": offset, "timeout": hold_s, "limit": 100, "allowed_updates": ["message"]}
        try:
            found = self._call("getUpdates", body, hold_s + _TELEGRAM_SLACK_S,
                               lambda opened: self.tools.on_stop(opened.cut))
        except NetworkFailed:
            if self.tools.stop.is_set():
                return []
            raise
        self.tools.note_frame()
        # An update without a number can be neither answered nor acknowledged.
        return [each for each in found if isinstance(each, dict)
                and isinstance(each.get("update_id"), int)] if isinstance(found, list) else []

    def _take(self, updates: list[Json], state: Json) -> Json:
        """Save the messages of updates and return the state after them."""
        if updates and _album_of(updates[-1]):
            # The rest of an album may still be on its way. Poll from the same offset, because a
            # larger one would acknowledge messages that are not saved yet.
            self.tools.stop.wait(_TELEGRAM_ALBUM_S)
            updates = self._poll(state["offset"], 0) or updates
        for _, group in itertools.groupby(
                updates, key=lambda each: _album_of(each) or each["update_id"]):
            album = list(group)
            state = {**state, "offset": int(album[-1]["update_id"]) + 1}
            self.tools.accept(self.understood(self._message, album), state)
        return state

    def _message(self, album: list[Json]) -> Optional[Message]:
        """Return the message of an update, or of the updates of an album; None if it is not a
        person's message."""
        each = [update.get("message") or {} for update in album]
        message = next((one for one in each if one.get("text") or one.get("caption")), each[0])
        sender, chat = message.get("from") or {}, message.get("chat") or {}
        attachments = tuple(found for one in each for found in _telegram_attachments(one))
        text, is_mentioned = self._without_mention(message)
        text = text or _telegram_name(message) * (not attachments)
        is_of_channel = chat.get("type") == "channel" or message.get("is_automatic_forward")
        if sender.get("is_bot", True) or is_of_channel or not (text or attachments):
            return None
        thread = message.get("message_thread_id") if message.get("is_topic_message") else None
        quoted = message.get("reply_to_message") or {}
        place = f"{chat['id']}" + (f":topic:{thread}" if thread else "")
        is_direct = chat.get("type") == "private"
        return Message(
            id=f"{self._bot.get('id')}:{album[0]['update_id']}", chat=place,
            kind="direct" if is_direct else "group", sender=str(sender["id"]),
            sender_name=str(sender.get("first_name") or sender.get("username") or sender["id"]),
            text=text, is_mentioned=is_mentioned or is_direct,
            quoted=str(quoted.get("text") or quoted.get("caption") or ""),
            attachments=attachments, at_s=float(message.get("date") or 0),
            route={"chat_id": chat["id"], "thread": thread, "message_id": message["message_id"]},
            group="" if is_direct else str(chat["id"]), place="" if is_direct else place,
        )

    def _without_mention(self, message: Json) -> tuple[str, bool]:
        """Return the text without the mention of the bot, and whether the bot was addressed."""
        text = str(message.get("text") or message.get("caption") or "")
        entities = message.get("entities") or message.get("caption_entities") or []
        name, bot_id = f"@{self._bot.get('username', '')}".lower(), self._bot.get("id")
        replied = (message.get("reply_to_message") or {}).get("from") or {}
        is_mentioned = replied.get("id") == bot_id
        # Offsets count UTF-16 units.
        units = text.encode("utf-16-le")
        for entity in sorted(entities, key=lambda each: -int(each.get("offset", 0))):
            start = 2 * int(entity.get("offset", 0))
            end = start + 2 * int(entity.get("length", 0))
            word = units[start:end].decode("utf-16-le", "replace").lower()
            kind = entity.get("type")
            if kind == "bot_command" and word.endswith(name):
                start = end - 2 * len(name)
            elif not (kind == "mention" and word == name or kind == "text_mention"
                      and entity.get("user", {}).get("id") == bot_id):
                continue
            units, is_mentioned = units[:start] + units[end:], True
        return units.decode("utf-16-le", "replace").strip(), is_mentioned

    # -- sending --------------------------------------------------------------------------------

    def send(self, route: Json, part: Part) -> str:
        """Send a part and return the id of its message. Raises SendFailed."""
        body = self._text(route, part)
        if route.get("is_reply"):
            body["reply_parameters"] = {
                "message_id": route["message_id"], "allow_sending_without_reply": True,
            }
        if not self.tools.settings.get("linkPreview"):
            body["link_preview_options"] = {"is_disabled": True}
        return str((self._deliver("sendMessage", body) or {}).get("message_id", ""))

    def edit(self, route: Json, message_id: str, part: Part) -> None:
        """Replace the text of a message. Raises SendFailed."""
        body = {**self._text({"chat_id": route["chat_id"]}, part), "message_id": int(message_id)}
        self._deliver("editMessageText", body)

    def type(self, route: Json, is_over: bool = False) -> None:
        """Show "typing" for five seconds. Raises SendFailed."""
        if not is_over:
            self._deliver("sendChatAction", {**self._place(route), "action": "typing"})

    def _place(self, route: Json) -> Json:
        thread = {"message_thread_id": route["thread"]} if route.get("thread") else {}
        return {"chat_id": route["chat_id"], **thread}

    def _text(self, route: Json, part: Part) -> Json:
        if part.is_plain:
            return {**self._place(route), "text": render(part.text, PLAIN)}
        return {**self._place(route), "text": self.render(part.text), "parse_mode": "HTML"}

    def _deliver(self, method: str, body: Json) -> Any:
        """Return the result of a method on a chat; retry with the new chat id or without a lost
        reply or topic. Raises SendFailed."""
        try:
            with sending():
                return self._call(method, body)
        except TelegramRefused as problem:
            refused, reason = problem, str(problem).lower()
        if "message is not modified" in reason:
            return None
        if "migrate_to_chat_id" in refused.parameters:
            moved = {**body, "chat_id": refused.parameters["migrate_to_chat_id"]}
            return self._deliver(method, moved)
        optional = {"reply_parameters", "message_thread_id"}
        if any(each in reason for each in _TELEGRAM_MISSING) and optional & set(body):
            bare = {key: value for key, value in body.items() if key not in optional}
            return self._deliver(method, bare)
        if refused.code == 429:
            raise SendFailed("wait", str(refused), refused.wait_s)
        is_later = refused.code >= 500 or refused.code in (401, 404)
        raise SendFailed(next((kind for words, kind in _TELEGRAM_REFUSALS if words in reason),
                              "later" if is_later else "never"), str(refused))

    def render(self, markdown: str) -> str:
        """Return the text as the HTML that Telegram accepts."""
        return render(markdown, TELEGRAM_HTML)

    def length(self, rendered: str) -> int:
        """Return the length in UTF-16 units, with tags. Telegram does not count tags, so this is
        never too small."""
        return len(rendered.encode("utf-16-le")) // 2

    def fetch(self, attachment: Attachment, max_bytes: int) -> bytes:
        """Return the bytes of a file. Raises SendFailed, ValueError."""
        found = self._deliver("getFile", {"file_id": attachment.ref["file_id"]}) or {}
        path = urllib.parse.quote(str(found.get("file_path", "")))
        with sending():
            answer = self.http.call("GET", f"{self._root}/file/{self._token}/{path}",
                                    max_bytes=max_bytes)
        if answer.status != 200:
            raise SendFailed("never", f"status {answer.status}")
        return answer.body


def _album_of(update: Json) -> str:
    message = update.get("message")
    return str(message.get("media_group_id") or "") if isinstance(message, dict) else ""


def _telegram_name(message: Json) -> str:
    """Return a description such as "[sticker]" of a message without text and file; empty for a
    service message, such as that a person has joined."""
    kind = next((each for each in _TELEGRAM_NAMED if message.get(each)), "")
    emoji = message[kind].get("emoji", "") if kind == "sticker" else ""
    return f"[{kind.replace('_', ' ')} {emoji}".strip() + "]" if kind else ""


def _telegram_attachments(message: Json) -> Iterator[Attachment]:
    """Yield the photo and the files of a message."""
    photo = {"photo": {**message["photo"][-1], "mime_type": "image/jpeg", "file_name": "photo.jpg"}
             } if message.get("photo") else {}
    for name in ("photo", "document", "voice", "audio", "video"):
        found = {**message, **photo}.get(name)
        if found:
            mime = str(found.get("mime_type") or "")
            kind = "image" if mime.startswith("image/") else "file"
            yield Attachment(kind, clean(found.get("file_name") or name), mime,
                             size_of(found.get("file_size")), {"file_id": found.get("file_id")})


Telegram.row = Row(
    "telegram", (), "Telegram", Telegram, limit=4096,
    credentials={"botToken": "TELEGRAM_BOT_TOKEN"},
    settings={"apiRoot": platform_url_value, "groups": places_value, "linkPreview": flag_value,
              "tokenFile": text_value},
    can_edit=True, edit_every_s=1.5, edit_every_in_groups_s=4.0, typing_every_s=4.0,
    help="Talk to @BotFather in Telegram, send /newbot, and copy the token that it gives.",
)


# ==== 12. Discord ============================================================
# Events through the opcode gateway, everything else by REST. https://discord.com/developers/docs

_DISCORD_API = "https://discord.com/api/v10"
#: Intents: guilds, guild messages, direct messages, message content.
_DISCORD_INTENTS = 1 | 1 << 9 | 1 << 12 | 1 << 15
_DISCORD_TOKEN = Ending("the token is refused", "get a new one at discord.com/developers/"
                        "applications: Bot, Reset Token")
_DISCORD_CLIENT = Ending("the gateway refuses this program", "use a newer version of it")
#: Types of messages that people write: default, and reply.
_DISCORD_TYPES = (0, 19)
#: The channel types of threads, and the size of the cache of threads' parents.
_DISCORD_THREADS, _DISCORD_MAX_PARENTS = (10, 11, 12), 1000
_DISCORD_MENTION = re.compile(r"<@!?(\d+)>")
#: Suppresses the previews of links.
_DISCORD_NO_EMBEDS = 4
#: Error code: the bot may not reply, because it lacks Read Message History in the channel.
_DISCORD_NO_QUOTE = 160_002
#: How many of a day's new sessions are left for other programs of the same bot.
_DISCORD_RESERVED_SESSIONS = 10
#: The pause after a 429 from Cloudflare in front of Discord, which means a ban of the address.
_DISCORD_BANNED_S = 600.0

#: Discord's Markdown: three levels of headings; a link's label may not be a URL.
DISCORD_MARKDOWN = Markup(
    heading=lambda level, text: f"{'#' * level} {text}" if level <= 3 else f"**{text}**",
    link=lambda label, url: url if label in ("", url) else f"[{label}]({url})",
)


class DiscordLimits:
    """Until when calls are rate-limited, by route; the route "" stands for all.
    https://discord.com/developers/docs/topics/rate-limits"""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # Guards the field below.
        self._lock = threading.Lock()
        self._until_s: dict[str, float] = {}

    def check(self, route: str) -> None:
        """Raise SendFailed if a call is not allowed yet."""
        with self._lock:
            until_s = max(self._until_s.get(route, 0.0), self._until_s.get("", 0.0))
        if until_s > self._clock():
            raise SendFailed("wait", "rate limit reached", until_s - self._clock())

    def note(self, route: str, answer: HttpAnswer) -> None:
        """Record the rate limits of an answer. Raises SendFailed if the call was over a limit."""
        is_over = answer.status == 429
        if not is_over and answer.headers.get("x-ratelimit-remaining") != "0":
            return
        content = answer.json()
        wait_s = seconds_of(content.get("retry_after") if is_over else answer.headers.get(
            "x-ratelimit-reset-after")) or 1.0
        is_of_all = is_over and bool(content.get("global"))
        if is_over and ("via" not in answer.headers or not content):
            is_of_all, wait_s = True, _DISCORD_BANNED_S
        now_s = self._clock()
        with self._lock:
            self._until_s = {each: s for each, s in self._until_s.items() if s > now_s}
            self._until_s["" if is_of_all else route] = now_s + wait_s
        if is_over:
            raise SendFailed("wait", "rate limit exceeded", wait_s)


class Discord(OpcodeChannel):
    """A bot of Discord."""

    query = "/?v=10&encoding=json"
    endings = {
        **dict.fromkeys((401, 4004), _DISCORD_TOKEN), 4008: _TOO_FAST,
        **dict.fromkeys((4003, 4007, 4009), _NEW_SESSION),
        **dict.fromkeys((4010, 4011, 4012, 4013), _DISCORD_CLIENT),
        4014: Ending("the bot may not read message content", "switch Message Content Intent on "
                     "at discord.com/developers/applications: Bot, Privileged Gateway Intents"),
    }

    def __init__(
        self, tools: Tools, http: Http, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(tools, http, tools.settings.get("apiRoot") or _DISCORD_API, clock)
        self._limits = DiscordLimits(clock)
        #: The parent channel of each thread; a channel is its own parent.
        self._parents: dict[str, str] = {}

    # -- receiving ------------------------------------------------------------------------------

    def gateway_url(self) -> str:
        """Return the gateway's URL for a new session. Raises Retry if the day's sessions are used
        up, Fatal."""
        found = self.ask("/gateway/bot")
        limit = found.get("session_start_limit") or {}
        if limit.get("remaining", _DISCORD_RESERVED_SESSIONS) < _DISCORD_RESERVED_SESSIONS:
            raise Retry("too many sessions today", limit.get("reset_after", 0) / 1000)
        return str(found.get("url") or "")

    def token(self) -> str:
        """Return the token of the bot."""
        return str(self.tools.settings["token"])

    def headers(self) -> Mapping[str, str]:
        """Return the headers of each call. Discord requires this format of User-Agent."""
        return {"Authorization": f"Bot {self.token()}",
                "User-Agent": f"DiscordBot (https://localhost/ocp, {VERSION})"}

    def identity(self) -> Json:
        """Return the intents, and what this client is."""
        properties = {"os": sys.platform, "browser": "ocp", "device": "ocp"}
        return {"intents": _DISCORD_INTENTS, "properties": properties}

    def message(self, event: str, data: Json) -> Optional[Message]:
        """Return the message in an event, None if it is not a person's message."""
        author = data.get("author") or {}
        is_other = author.get("bot") or data.get("webhook_id") or (
            data.get("type") not in _DISCORD_TYPES)
        if event != "MESSAGE_CREATE" or is_other:
            return None
        text, is_mentioned = self._without_mention(data)
        # A forwarded message is included as a snapshot.
        bodies = [data, *(each["message"] for each in data.get("message_snapshots") or [])]
        attachments = tuple(map(linked_file, (
            file for body in bodies for file in body.get("attachments") or [])))
        texts = [text, *(str(body.get("content") or "") for body in bodies[1:]),
                 *(f"[sticker {each['name']}]" for each in data.get("sticker_items") or [])]
        text = "\n\n".join(filter(None, texts))
        if not (text or attachments):
            return None
        guild, place = str(data.get("guild_id") or ""), str(data["channel_id"])
        return Message(
            id=str(data["id"]), chat=place, kind="group" if guild else "direct",
            sender=str(author["id"]),
            sender_name=str(author.get("global_name") or author.get("username") or author["id"]),
            text=text, is_mentioned=is_mentioned or not guild,
            quoted=str((data.get("referenced_message") or {}).get("content") or ""),
            attachments=attachments, at_s=time.time(),
            route={"channel_id": place, "message_id": str(data["id"])},
            group=guild, place=self._channel_of(guild, place) if guild else "",
        )

    def _channel_of(self, guild: str, place: str) -> str:
        """Return the channel for the access rules: a thread counts as its parent channel. Raises
        Fatal, Retry."""
        guilds = self.tools.settings.get("guilds") or {}
        listed = guilds.get(guild, guilds.get("*"))
        listed = listed.get("channels") if isinstance(listed, dict) else None
        if not isinstance(listed, dict) or place in listed:
            return place
        if place not in self._parents:
            answer = self.call("GET", f"/channels/{place}")
            if answer.status == 429 or answer.status >= 500:
                # The event is not saved yet, so it comes again.
                raise Retry(f"status {answer.status}", answer.retry_after_s)
            found = answer.json()
            is_thread = found.get("type") in _DISCORD_THREADS and found.get("parent_id")
            if len(self._parents) >= _DISCORD_MAX_PARENTS:
                self._parents.clear()
            self._parents[place] = str(found["parent_id"]) if is_thread else place
        return self._parents[place]

    def _without_mention(self, data: Json) -> tuple[str, bool]:
        """Return the text without the mention of the bot, and whether the bot was addressed."""
        own = self._session.get("bot_id")
        names = {str(each["id"]): each.get("global_name") or each.get("username")
                 for each in data.get("mentions") or []}

        def shown(found: re.Match[str]) -> str:
            return "" if found[1] == own else f"@{names.get(found[1]) or found[1]}"

        quoted = (data.get("referenced_message") or {}).get("author") or {}
        text = _DISCORD_MENTION.sub(shown, str(data.get("content") or "")).strip()
        return text, own in names or quoted.get("id") == own

    # -- sending ----------------------------------------------------------------------------------

    def send(self, route: Json, part: Part) -> str:
        """Send a part and return the id of its message. Raises SendFailed."""
        # A repeated call with the same nonce returns the first call's message.
        body: Json = {**self._content(part), "nonce": part.nonce[:25], "enforce_nonce": True}
        if self.tools.settings.get("suppressEmbeds") is not False:
            body["flags"] = _DISCORD_NO_EMBEDS
        if route.get("is_reply"):
            body["message_reference"] = {
                "message_id": route["message_id"], "fail_if_not_exists": False,
            }
        return str(self._deliver("POST", route, "messages", body).get("id", ""))

    def edit(self, route: Json, message_id: str, part: Part) -> None:
        """Replace the text of a message. Raises SendFailed."""
        self._deliver("PATCH", route, f"messages/{message_id}", self._content(part))

    def type(self, route: Json, is_over: bool = False) -> None:
        """Show "typing" for ten seconds. Raises SendFailed."""
        if not is_over:
            self._deliver("POST", route, "typing", {})

    def _content(self, part: Part) -> Json:
        """Return the body for a part's text, with all mentions silenced."""
        text = render(part.text, PLAIN) if part.is_plain else self.render(part.text)
        return {"content": text, "allowed_mentions": {"parse": [], "replied_user": False}}

    def _deliver(self, method: str, route: Json, what: str, body: Json) -> Json:
        """Return the answer to a call on a chat. Raises SendFailed."""
        path = f"/channels/{route['channel_id']}/{what}"
        limit = f"{method} {route['channel_id']} {what.partition('/')[0]}"
        self._limits.check(limit)
        with sending():
            answer = self.call(method, path, body)
        self._limits.note(limit, answer)
        if answer.status < 300:
            return answer.json()
        if code_of(answer) == _DISCORD_NO_QUOTE and "message_reference" in body:
            bare = {name: value for name, value in body.items() if name != "message_reference"}
            return self._deliver(method, route, what, bare)
        # A refused token is reported by the thread that receives.
        kind = "later" if answer.status >= 500 or answer.status == 401 else "never"
        raise SendFailed(kind, str(answer.json().get("message") or f"status {answer.status}"))

    def render(self, markdown: str) -> str:
        """Return the text as Discord's Markdown."""
        return render(markdown, DISCORD_MARKDOWN)


Discord.row = Row(
    "discord", (), "Discord", Discord, limit=2000,
    credentials={"token": "DISCORD_BOT_TOKEN"},
    settings={"apiRoot": platform_url_value, "guilds": places_value, "suppressEmbeds": flag_value,
              "tokenFile": text_value},
    # Five messages in five seconds are allowed in each channel.
    can_edit=True, edit_every_s=1.5, edit_every_in_groups_s=1.5, typing_every_s=8.0, pace_s=1.0,
    help="At discord.com/developers/applications: New Application, Bot, Reset Token; switch on "
         "Message Content Intent there.",
    synonyms={"botToken": "token"},
)


# ==== 13. QQ =================================================================
# The official bot API: events through the opcode gateway, answers by REST. An answer has to be a
# reply to a message: at most five, within a time limit. https://bot.q.qq.com/wiki/develop/api-v2/

_QQ_API, _QQ_TOKENS = "https://api.sgroup.qq.com", "https://bots.qq.com/app/getAppAccessToken"
#: Intents: direct chats and groups; guild mentions, and direct messages in guilds.
_QQ_INTENTS, _QQ_GUILD_INTENTS = 1 << 25, 1 << 30 | 1 << 12
#: Error codes of the token request: too many requests, and wrong credentials.
_QQ_TOKEN_LATER, _QQ_TOKEN_WRONG = 100_001, 100_016
#: The pause after too many requests.
_QQ_WAIT_S = 60.0
#: What to do after each error code of a message. "done": it was sent already; "link": it contains
#: a URL; the others are kinds of SendFailed.
_QQ_REFUSALS = {
    22_009: "held", 40_034_024: "held", 40_034_025: "held", 40_034_102: "held",
    40_034_012: "plain", 304_041: "plain", 40_054_005: "done", 40_054_010: "link", 304_003: "link",
}
#: Message types: text, Markdown, "typing"; and a received message that quotes another one.
_QQ_TEXT, _QQ_MARKED, _QQ_TYPING, _QQ_QUOTING = 0, 2, 6, 103
_QQ_MENTION = re.compile(r"<@!?([\w-]+)>")
_QQ_FACE = re.compile(r'<faceType=[^>]*?ext="([^">]*)"[^>]*>')
_QQ_LINK = re.compile(r"://|(?<=\w)\.(?=[A-Za-z]{2})")
_QQ_MARKDOWN = Markup(link=lambda label, url: f"[{label or url}]({url})")
#: After these letters of a text, what would ring for somebody, or for everybody, is torn.
_QQ_CALLS = re.compile(r"@(?=everyone)|<(?=@|qqbot-at-)")


class QQPlace(NamedTuple):
    """The chat that an event's messages come from, and the path for their answers."""

    kind: str
    #: The field that holds the chat's id, in the event or in its author.
    chat: str
    path: str
    #: Whether this kind of event is always a mention of the bot.
    is_mention: bool = False


_QQ_PLACES = {
    "C2C_MESSAGE_CREATE": QQPlace("direct", "user_openid", "/v2/users/{}/messages"),
    "GROUP_AT_MESSAGE_CREATE": QQPlace("group", "group_openid", "/v2/groups/{}/messages", True),
    "GROUP_MESSAGE_CREATE": QQPlace("group", "group_openid", "/v2/groups/{}/messages"),
    "AT_MESSAGE_CREATE": QQPlace("group", "channel_id", "/channels/{}/messages", True),
    "DIRECT_MESSAGE_CREATE": QQPlace("direct", "guild_id", "/dms/{}/messages"),
}


class QQLinkRefused(SendFailed):
    """A message was refused because it contains a URL."""


class QQ(OpcodeChannel):
    """A bot of QQ."""

    endings = {
        **dict.fromkeys((4006, 4007, *range(4900, 4914)), _NEW_SESSION), 4008: _TOO_FAST,
        11_298: Ending("this machine's public address is not on the bot's IP white list",
                       "add it at q.qq.com: Development, IP white list"),
        4014: Ending("the bot may not receive guild events", "remove guilds from its settings"),
        4914: Ending("the bot is offline, or only in the sandbox", "publish it at q.qq.com, or set "
                     "apiRoot to https://sandbox.api.sgroup.qq.com"),
        4915: Ending("the bot is banned", "see its page at q.qq.com"),
    }

    def __init__(
        self, tools: Tools, http: Http, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(tools, http, tools.settings.get("apiRoot") or _QQ_API, clock)
        self._token_url = tools.settings.get("tokenUrl") or _QQ_TOKENS
        self._is_markdown = tools.settings.get("markdownSupport") is not False
        self._token = Token(self._new_token, clock)

    # -- the token --------------------------------------------------------------------------------

    def token(self) -> str:
        """Return the bot's current token. Raises Fatal, Retry."""
        return f"QQBot {self._token.get()}"

    def _new_token(self) -> tuple[object, object]:
        """Return a new token, and its lifetime in seconds. Raises Fatal, Retry."""
        settings = self.tools.settings
        body = {"appId": settings["appId"], "clientSecret": settings["clientSecret"]}
        try:
            content = self.http.call("POST", self._token_url, body).json()
            if content.get("code") == _QQ_TOKEN_WRONG:
                raise Fatal("appId or clientSecret is wrong", "copy both again at q.qq.com")
            return content["access_token"], content["expires_in"]
        except NetworkFailed as problem:
            raise Retry(str(problem)) from None
        except KeyError:
            is_early = content.get("code") == _QQ_TOKEN_LATER
            raise Retry("the platform sent no token", _QQ_WAIT_S if is_early else 0.0) from None

    def disconnected(self) -> None:
        """Forget the token: an invalid token is a frequent reason."""
        self._token.forget()

    # -- receiving ------------------------------------------------------------------------------

    def gateway_url(self) -> str:
        """Return the gateway's URL, which is the same for every session. Raises Fatal, Retry."""
        return str(self.ask("/gateway").get("url") or "")

    def identity(self) -> Json:
        """Return the intents."""
        has_guilds = bool(self.tools.settings.get("guilds"))
        return {"intents": _QQ_INTENTS | _QQ_GUILD_INTENTS * has_guilds, "shard": [0, 1]}

    def message(self, event: str, data: Json) -> Optional[Message]:
        """Return the message in an event, None if it is not a person's message."""
        place, author = _QQ_PLACES.get(event), data.get("author") or {}
        if place is None or author.get("bot"):
            return None
        text, is_mentioned = self._without_mention(data)
        files = data.get("attachments") or []
        spoken = [str(each["asr_refer_text"]) for each in files if each.get("asr_refer_text")]
        text = "\n".join(filter(None, [text, *spoken]))
        attachments = tuple(linked_file(each) for each in files if not each.get("asr_refer_text"))
        if not (text or attachments):
            return None
        chat = str(data.get(place.chat) or author[place.chat])
        sender = str(author.get("user_openid") or author.get("member_openid") or author["id"])
        is_group = place.kind == "group"
        elements = data.get("msg_elements") if data.get("message_type") == _QQ_QUOTING else None
        return Message(
            id=str(data["id"]), chat=chat, kind=place.kind, sender=sender,
            sender_name=str(author.get("username") or sender), text=text,
            is_mentioned=is_mentioned or place.is_mention or not is_group,
            quoted=str(elements[0].get("content") or "") if elements else "",
            attachments=attachments, at_s=time.time(),
            route={"path": place.path.format(urllib.parse.quote(chat, safe="")),
                   "msg_id": str(data["id"])},
            group=str(data.get("guild_id") or chat) if is_group else "",
            place=chat if is_group else "",
        )

    def _without_mention(self, data: Json) -> tuple[str, bool]:
        """Return the text without the mention of the bot, and whether it had one."""
        names: dict[str, str] = {}
        is_mentioned = False
        for each in data.get("mentions") or []:
            user = str(each.get("member_openid") or each.get("id") or "")
            is_own = bool(each.get("is_you")) or user == self._session.get("bot_id")
            names[user] = "" if is_own else f"@{each.get('nickname') or each.get('username')}"
            is_mentioned = is_mentioned or is_own
        text = _QQ_FACE.sub(_qq_face, str(data.get("content") or ""))
        text = _QQ_MENTION.sub(lambda found: names.get(found[1], found[0]), text)
        return text.strip(), is_mentioned

    # -- sending ----------------------------------------------------------------------------------

    def send(self, route: Json, part: Part) -> str:
        """Send a part and return the id of its message. Raises SendFailed."""
        # Guilds accept Markdown only from some bots, and not in replies.
        is_marked = self._is_markdown and not part.is_plain and route["path"].startswith("/v2/")
        text = self.render(part.text) if is_marked else without_calls(render(part.text, PLAIN))
        # The same number when a part is sent again in the same form, another in another form,
        # because a refused message may count as sent.
        number = int(part.nonce[:6], 16) * 8 + 2 * is_marked
        try:
            return self._reply(route, text, number, is_marked=is_marked)
        except QQLinkRefused as refused:
            self.tools.log("warning", "links were broken up", why=refused)
            broken = _QQ_LINK.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
            return self._reply(route, broken, number + 1, is_marked=is_marked)

    def _reply(self, route: Json, text: str, number: int, *, is_marked: bool) -> str:
        body: Json = {"markdown": {"content": text}} if is_marked else {"content": text}
        if route["path"].startswith("/v2/"):
            body = {**body, "msg_type": _QQ_MARKED if is_marked else _QQ_TEXT, "msg_seq": number}
        return str(self._deliver(route, body).get("id", ""))

    def type(self, route: Json, is_over: bool = False) -> None:
        """Show "typing" for a minute to a person. Counts as an answer. Raises SendFailed."""
        if not is_over and route["path"].startswith("/v2/users/"):
            self._deliver(route, {
                "msg_type": _QQ_TYPING, "input_notify": {"input_type": 1, "input_second": 60},
                "msg_seq": secrets.randbelow(1 << 24) * 8 + 7,
            })

    def _deliver(self, route: Json, body: Json) -> Json:
        """Return the answer to a reply. Raises SendFailed."""
        sent = {**body, "msg_id": route["msg_id"]}
        with sending():
            answer = self.call("POST", route["path"], sent)
            if answer.status == 401:
                self.disconnected()
                answer = self.call("POST", route["path"], sent)
        if answer.status >= 300 and _QQ_REFUSALS.get(code_of(answer)) != "done":
            self._refuse(answer)
        return answer.json()

    def _refuse(self, answer: HttpAnswer) -> NoReturn:
        """Raise the SendFailed for an error answer."""
        content = answer.json()
        why = str(content.get("message") or f"status {answer.status}")
        if answer.status == 429:
            raise SendFailed("wait", why, answer.retry_after_s or _QQ_WAIT_S)
        kind = _QQ_REFUSALS.get(code_of(answer), "")
        if kind == "link":
            raise QQLinkRefused("never", why)
        if kind == "plain":
            self._is_markdown = False
        if not kind and "msg_id" in why:
            # Other error codes too mean that the message can no longer be answered.
            kind = "held"
        # A body that is not JSON comes from a proxy or the like, not from QQ.
        is_passing = answer.status >= 500 or answer.status == 401 or not content
        raise SendFailed(kind or ("later" if is_passing else "never"), why)

    def render(self, markdown: str) -> str:
        """Return the text as Markdown, or as plain text if this bot may not send Markdown."""
        return without_calls(render(markdown, _QQ_MARKDOWN if self._is_markdown else PLAIN))


def without_calls(text: str) -> str:
    """Return a text for QQ that looks the same and notifies nobody."""
    return _QQ_CALLS.sub(lambda found: f"{found[0]}\u200b", text)


def _qq_face(found: re.Match[str]) -> str:
    """Return the name of one of QQ's own emojis."""
    try:
        return f"[{json.loads(base64.b64decode(found[1]))['text']}]"
    except (ValueError, KeyError, TypeError):
        return "[emoji]"


def _qq_guilds_value(value: object) -> Json:
    """Return the guilds to listen to; true means all."""
    return {"*": {}} if value is True else {} if value is False else places_value(value)


QQ.row = Row(
    "qqbot", ("qq",), "QQ", QQ, limit=4000,
    credentials={"appId": "QQBOT_APP_ID", "clientSecret": "QQBOT_CLIENT_SECRET"},
    settings={"apiRoot": platform_url_value, "tokenUrl": platform_url_value,
              "markdownSupport": flag_value, "groups": places_value, "guilds": _qq_guilds_value},
    # "Typing" counts as one of the answers, so it is shown once.
    typing_every_s=3600.0, budget=5,
    help="At q.qq.com: create a bot, and copy AppID and AppSecret under Development.",
)


# ==== 14. DingTalk ===========================================================
# Stream mode: frames come over a WebSocket, and are repeated until they are answered. A reply goes
# to the webhook that came with its message, or to the API when that webhook has expired.
# https://open.dingtalk.com/document/development/introduction-to-stream-mode

_DINGTALK_API, _DINGTALK_LOGIN = "https://api.dingtalk.com", "https://oapi.dingtalk.com"
_DINGTALK_TOPIC = "/v1.0/im/bot/messages/get"
#: The silence after which to ping the server, and after which it counts as gone.
_DINGTALK_PING_S, _DINGTALK_GONE_S = 20.0, 90.0
#: How long a connection is used, because old ones may only get pongs; how long it is still read
#: after it was replaced; and the lifetime below which to pause before the next one.
_DINGTALK_LIFE_S, _DINGTALK_DRAIN_S, _DINGTALK_SHORT_S = 3600.0, 30.0, 5.0
#: Why an app is refused, by HTTP status, and what to do.
_DINGTALK_REFUSED = {
    400: ("the app has no stream mode, is not published, or its credentials are wrong", "at "
          "open-dev.dingtalk.com choose stream mode for the robot, publish the app, and copy "
          "Client ID and Client Secret"),
    401: ("clientId or clientSecret is wrong", "copy both again at open-dev.dingtalk.com"),
}
#: Message types that are read; of other types the agent gets the name.
_DINGTALK_READ = ("text", "richText", "picture", "audio", "video", "file")
#: Texts in the error code of a message, the kind of SendFailed for each, and its pause.
_DINGTALK_FAILURES = (
    ("QpsLimit", "wait", 2.0), ("130101", "later", 60.0), ("460101", "never", 0.0),
)
#: The time limit of a login, the minimum pause between polls, and how long polls may keep failing.
_LOGIN_S, _DINGTALK_POLL_S, _DINGTALK_FAILING_S = 480.0, 3.0, 120.0

#: DingTalk's Markdown: only two spaces end a line.
DINGTALK_MARKDOWN = Markup(
    strike=("", ""), line_end="  \n",
    quote=lambda lines: "  \n".join(f"> {line}" for line in lines),
)


class DingTalk(Channel):
    """A robot of DingTalk."""

    def __init__(
        self, tools: Tools, http: Http, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(tools, http)
        self._clock = clock
        self._root = tools.settings.get("endpoint") or _DINGTALK_API
        self._token = Token(self._new_token, clock)

    # -- calls ------------------------------------------------------------------------------------

    def _post(self, url: str, body: Json, **headers: str) -> HttpAnswer:
        """Return the answer to a call. Raises Retry."""
        # The size limit counts bytes, so characters are not escaped.
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        sent = {"Content-Type": "application/json", "Accept": "application/json", **headers}
        try:
            return self.http.call("POST", url, data, sent)
        except NetworkFailed as problem:
            raise Retry(str(problem)) from None

    def _opened(self, path: str, body: Json) -> Json:
        """Return the answer to a call with the credentials. Raises Fatal, Retry."""
        answer = self._post(self._root + path, body)
        if answer.status in _DINGTALK_REFUSED and answer.json():
            why, fix = _DINGTALK_REFUSED[answer.status]
            raise Fatal(f"{why} ({clean(answer.json().get('message') or answer.status)})", fix)
        if answer.status != 200:
            raise Retry(f"status {answer.status}", answer.retry_after_s)
        return answer.json()

    def _ask(self, path: str, body: Json) -> HttpAnswer:
        """Return the answer to a call of the API. Raises Fatal, Retry."""
        for _ in range(2):
            headers = {"x-acs-dingtalk-access-token": self._token.get()}
            answer = self._post(f"{self._root}/v1.0/robot/{path}", body, **headers)
            if answer.status != 401:
                break
            self._token.forget()
        return answer

    def _new_token(self) -> tuple[object, object]:
        """Return a new token, and its lifetime in seconds. Raises Fatal, Retry."""
        settings = self.tools.settings
        content = self._opened("/v1.0/oauth2/accessToken", {
            "appKey": settings["clientId"], "appSecret": settings["clientSecret"]})
        return content.get("accessToken"), content.get("expireIn")

    def probe(self) -> str:
        """Return the id of the app. Raises Fatal, Retry."""
        self._token.get()
        return f"app {self.tools.settings['clientId']}"

    # -- receiving --------------------------------------------------------------------------------

    def run(self) -> None:
        """Receive messages until the account has to stop. Raises Fatal, Retry."""
        while not self.tools.stop.is_set():
            began_s, connection = self._clock(), self._connect()
            self.tools.on_stop(connection.close)
            try:
                self._serve(connection, _DINGTALK_LIFE_S)
            except WebSocketClosed as closed:
                if not self.tools.stop.is_set():
                    raise Retry(str(closed)) from None
                return
            except BaseException:
                connection.close()
                raise
            # Messages between two connections would be lost, so the old one is read to its end.
            threading.Thread(target=self._drain, args=(connection,), daemon=True).start()
            if self._clock() - began_s < _DINGTALK_SHORT_S:
                raise Retry("the platform asks for a new connection")

    def _connect(self) -> WebSocket:
        """Return a connection with a new ticket. Raises Fatal, Retry."""
        settings = self.tools.settings
        content = self._opened("/v1.0/gateway/connections/open", {
            "clientId": settings["clientId"], "clientSecret": settings["clientSecret"],
            "subscriptions": [{"type": "CALLBACK", "topic": _DINGTALK_TOPIC}],
            "ua": f"ocp/{VERSION}", "localIp": "",
        })
        try:
            ticket = urllib.parse.quote_plus(str(content["ticket"]))
            url = f"{platform_url_value(content['endpoint'])}?ticket={ticket}"
            connection = WebSocket.connect(self.http.connector, url)
        except (NetworkFailed, KeyError, ValueError) as problem:
            raise Retry(f"cannot connect: {problem}") from None
        self.tools.note_frame()
        return connection

    def _serve(self, connection: WebSocket, life_s: float) -> None:
        """Handle frames for `life_s`, or until the platform asks for a new connection. Raises
        Retry, OSError, WebSocketClosed."""
        until_s = self._clock() + life_s
        while self._clock() < until_s:
            text = connection.receive(_DINGTALK_PING_S)
            if text is None:
                if time.monotonic() - connection.heard_s > _DINGTALK_GONE_S:
                    raise Retry("the platform has gone silent")
                connection.ping()
            elif self._take(connection, json_object(text)):
                return

    def _drain(self, connection: WebSocket) -> None:
        # Runs in its own thread. Messages that it fails to save come again.
        with contextlib.suppress(Exception):
            self._serve(connection, _DINGTALK_DRAIN_S)
        connection.close()

    def _take(self, connection: WebSocket, frame: Json) -> bool:
        """Handle a frame and answer it. Return whether the platform asks for a new connection.
        Raises OSError, WebSocketClosed."""
        self.tools.note_frame()
        headers = frame["headers"] if isinstance(frame.get("headers"), dict) else {}
        kind, code, data = (frame.get("type"), headers.get("topic")), 404, "{}"
        if kind == ("CALLBACK", _DINGTALK_TOPIC):
            message = self.understood(self._message, json_object(str(frame.get("data"))))
            if message is not None:
                self.tools.accept(message)
            code, data = 200, compact({"response": "OK"})
        elif kind == ("SYSTEM", "ping"):
            code, data = 200, str(frame.get("data") or data)
        elif kind[0] not in ("CALLBACK", "EVENT"):
            return kind == ("SYSTEM", "disconnect")
        connection.send(compact({
            "code": code, "message": "OK" if code == 200 else "not implement", "data": data,
            "headers": {"contentType": "application/json", "messageId": headers.get("messageId")},
        }))
        return False

    def _message(self, data: Json) -> Optional[Message]:
        robot = str(data.get("robotCode") or self.tools.settings["clientId"])
        text, quoted, attachments = dingtalk_content(data, robot)
        if data["senderId"] == data.get("chatbotUserId") or not (text or attachments):
            return None
        staff, webhook = (str(data.get(key) or "") for key in ("senderStaffId", "sessionWebhook"))
        sender = staff or str(data["senderId"])
        group = "" if str(data["conversationType"]) == "1" else str(data["conversationId"])
        until_s = float(data.get("sessionWebhookExpiredTime") or 0) / 1000
        is_theirs = leads_to(webhook, (".dingtalk.com",), self._root)
        return Message(
            # A repeated frame has the same msgId but another messageId.
            id=str(data["msgId"]), chat=group or sender, kind="group" if group else "direct",
            sender=sender, sender_name=str(data.get("senderNick") or sender), text=text,
            # In a group a robot receives only messages that mention it.
            is_mentioned=not group or data.get("isInAtList") is not False, quoted=quoted,
            attachments=attachments, at_s=float(data.get("createAt") or 0) / 1000,
            route={"webhook": webhook if is_theirs else "", "until_s": until_s,
                   "robot": robot, "staff": staff, "group": group},
            group=group, place=group,
        )

    # -- sending ----------------------------------------------------------------------------------

    def send(self, route: Json, part: Part) -> str:
        """Send a part. Returns "", because the platform gives no id. Raises SendFailed."""
        text, called = self.render(part.text), {}
        title = render(part.text, PLAIN).strip().partition("\n")[0][:20] or "-"
        if route["group"] and route["staff"] and route.get("is_reply"):
            # A mention works only if the id is also in the text.
            text = f"@{route['staff']}  \n{text}"
            called = {"at": {"atUserIds": [route["staff"]]}}
        content = {"title": title, "text": text}
        with sending():
            if route["webhook"] and time.time() < route["until_s"]:
                answer = self._post(route["webhook"], {
                    "msgtype": "markdown", "markdown": content, **called})
                code = answer.json().get("errcode")
                if code == 0:
                    return ""
                check_refusal(answer, str(code))
            self._send_by_api(route, content)
        return ""

    def _send_by_api(self, route: Json, content: Json) -> None:
        """Send by the API. Raises Fatal, Retry, SendFailed."""
        if not (route["group"] or route["staff"]):
            raise SendFailed("held", "only a new message brings a webhook for the answer")
        path, to = "oToMessages/batchSend", {"userIds": [route["staff"]]}
        if route["group"]:
            path, to = "groupMessages/send", {"openConversationId": route["group"]}
        answer = self._ask(path, {
            **to, "robotCode": route["robot"], "msgKey": "sampleMarkdown",
            "msgParam": json.dumps(content, ensure_ascii=False)})
        found = answer.json()
        is_flooded = bool(found.get("flowControlledStaffIdList"))
        if is_flooded or found.get("invalidStaffIdList") or not found.get("processQueryKey"):
            check_refusal(answer, str(found.get("code")))
            raise SendFailed("later" if is_flooded else "never", f"not accepted: {found}"[:200])

    def render(self, markdown: str) -> str:
        """Return the text as DingTalk's Markdown."""
        return render(markdown, DINGTALK_MARKDOWN)

    def fetch(self, attachment: Attachment, max_bytes: int) -> bytes:
        """Return the bytes of a file. Raises SendFailed, ValueError if it is larger."""
        with sending():
            url = self._ask("messageFiles/download", attachment.ref).json().get("downloadUrl")
        url = str(url) if is_local(self._root) else re.sub("^http:", "https:", str(url))
        return linked_bytes(self.http, url, max_bytes, self._root)

    # -- login ------------------------------------------------------------------------------------

    def login(self, console: Console) -> Json:
        """Show a QR code that creates an app when it is scanned, and return the app's credentials.
        Raises Fatal."""
        nonce = self._register("init", source=(
            self.tools.settings.get("loginSource") or "DING_DWS_CLAW")).get("nonce")
        begun = self._register("begin", nonce=nonce)
        pause_s = max(_DINGTALK_POLL_S, float(begun.get("interval") or 0))
        until_s = failing_until_s = self._clock() + _LOGIN_S * bool(begun.get("device_code"))
        if begun.get("device_code"):
            console.show_link(str(begun.get("verification_uri_complete")))
            console.say("Scan it with DingTalk and confirm there.")
        found: Json = {"fail_reason": "DingTalk offers no login"}
        while self._clock() < min(until_s, failing_until_s):
            self.tools.stop.wait(pause_s)
            found = self._register("poll", device_code=begun["device_code"])
            if found.get("status") == "SUCCESS":
                return {"clientId": found.get("client_id"), "clientSecret": found.get(
                    "client_secret")}
            failing_until_s = until_s if found.get("status") == "WAITING" else min(
                failing_until_s, self._clock() + _DINGTALK_FAILING_S)
        raise Fatal(f"login not confirmed ({clean(found.get('fail_reason') or 'timed out')})",
                    "try again, or create the app yourself at open-dev.dingtalk.com, publish it, "
                    "and add its clientId and clientSecret")

    def _register(self, step: str, **body: Any) -> Json:
        """Return the answer to a step of a login, {} if it failed."""
        root = self.tools.settings.get("oapiEndpoint") or _DINGTALK_LOGIN
        with contextlib.suppress(Retry):
            found = self._post(f"{root}/app/registration/{step}", body).json()
            return found if found.get("errcode") == 0 else {}
        return {}


def check_refusal(answer: HttpAnswer, code: str) -> None:
    """Raise SendFailed for an error that sending another way would not avoid."""
    for words, kind, pause_s in _DINGTALK_FAILURES:
        if words in code:
            raise SendFailed(kind, code, pause_s)
    if answer.status >= 500 or answer.status == 429:
        raise SendFailed("later", f"status {answer.status}", answer.retry_after_s)


def dingtalk_content(data: Json, robot: str) -> tuple[str, str, tuple[Attachment, ...]]:
    """Return the text of a message, the text that it quotes, and its files."""
    kind, text, content = data.get("msgtype"), data.get("text") or {}, data.get("content") or {}
    content = json_object(content) if isinstance(content, str) else content
    replied, quoted = text.get("repliedMsg"), ""
    if replied:
        quoted = dingtalk_content({
            "msgtype": replied.get("msgType"), "content": replied.get("content")}, robot)[0]
    items = content["richText"] if kind == "richText" else [
        {"text": text.get("content"), **content, "type": kind}]
    texts, files = [], []
    for item in items:
        said, code = item.get("text") or item.get("recognition"), item.get("downloadCode")
        if said:
            texts.append(str(said))
        elif code:
            name = clean(item.get("fileName") or item.get("type") or "file")
            kind, mime = ("image", "image/jpeg") if name == "picture" else ("file", "")
            files.append(Attachment(kind, name, mime, 0, {"downloadCode": code,
                                                          "robotCode": robot}))
        elif kind not in _DINGTALK_READ:
            # Cards and the like have neither text nor file.
            texts.append(f"[{clean(kind)}]" if kind else "")
    return "".join(texts).strip(), quoted, tuple(files)


DingTalk.row = Row(
    "dingtalk-connector", ("dingtalk",), "DingTalk", DingTalk, limit=3500,
    credentials={"clientId": "DINGTALK_CLIENT_ID", "clientSecret": "DINGTALK_CLIENT_SECRET"},
    settings={"endpoint": platform_url_value, "oapiEndpoint": platform_url_value,
              "loginSource": text_value, "groups": places_value,
              "groupSessionScope": one_of("group", "group_sender")},
    # A group accepts twenty messages per minute.
    pace_s=3.0, has_login=True,
    help=f"Run {PROGRAM} login --channel dingtalk-connector, or at open-dev.dingtalk.com create an "
    "app with a robot in stream mode, publish it, and copy Client ID and Client Secret.",
)


# ==== 15. WeChat =============================================================
# The bot API of the vendor's plugin for OpenClaw (2.4.9), by long polls. A bot belongs to whoever
# scans its QR code. To write to a person it needs the token of that person's newest message,
# and may send ten messages with it. https://www.npmjs.com/package/@tencent-weixin/openclaw-weixin

_WECHAT_API, _WECHAT_CDN = "https://ilinkai.weixin.qq.com", "https://novac2c.cdn.weixin.qq.com/c2c"
_WECHAT_DOMAINS = (".qq.com", ".wechat.com")
#: The protocol's version, as text and, one byte per part, in the headers of each call.
_WECHAT_VERSION = "2.4.9"
_WECHAT_HEADERS = {"iLink-App-Id": "bot", "iLink-App-ClientVersion": str(2 << 16 | 4 << 8 | 9)}
#: How long the server holds a poll, the maximum, and how much longer the connection may be silent.
_WECHAT_HOLD_S, _WECHAT_MAX_HOLD_S, _WECHAT_SLACK_S = 35.0, 120.0, 10.0
#: The pauses after failed polls, repeated in this order.
_WECHAT_PAUSES_S = (2.0, 2.0, 30.0)
#: Error codes: not logged in (bound elsewhere, or idle for too long); cannot send now.
_WECHAT_NOT_LOGGED_IN, _WECHAT_NOT_NOW = -14, -2
_WECHAT_LOGIN = f"run {PROGRAM} login --channel openclaw-weixin"
#: For how many people a token is kept, and the message type of a bot.
_WECHAT_PEOPLE, _WECHAT_BOT = 500, 2
#: A login's pause between polls, how many QR codes it shows, and the statuses that end one.
_WECHAT_POLL_S, _WECHAT_CODES = 1.0, 3
_WECHAT_SCAN_ENDS = ("confirmed", "binded_redirect", "expired", "verify_code_blocked")
#: The item types with text, and those with files: field, kind of attachment, default name.
_WECHAT_TEXTS = {1: "text_item", 3: "voice_item"}
_WECHAT_FILES = {2: ("image_item", "image", "photo.jpg"), 3: ("voice_item", "file", "voice"),
                 4: ("file_item", "file", "file"), 5: ("video_item", "file", "video")}
#: WeChat's Markdown: four levels of headings, and no links.
WECHAT_MARKDOWN = Markup(
    heading=lambda level, text: f"{'#' * level} {text}" if level <= 4 else f"**{text}**",
    link=PLAIN.link,
)


def aes_multiply(one: int, other: int) -> int:
    """Return the product of two bytes in the field of AES, FIPS 197 section 4.2."""
    product = 0
    while other:
        product ^= one * (other & 1)
        one, other = one << 1 ^ 0x11B * (one >> 7), other >> 1
    return product


@functools.lru_cache(maxsize=1)
def aes_s_box() -> bytes:
    """Return the S-box, FIPS 197 section 5.1.1."""
    powers = [1]
    while len(powers) < 255:
        powers.append(aes_multiply(powers[-1], 3))
    inverses = [0, *(powers[-powers.index(byte) % 255] for byte in range(1, 256))]
    twice = [byte * 0x101 for byte in inverses]
    return bytes((each ^ each >> 4 ^ each >> 5 ^ each >> 6 ^ each >> 7) & 0xFF ^ 0x63
                 for each in twice)


def aes_round_keys(key: bytes) -> list[bytes]:
    """Return the eleven round keys of a key of 16 bytes, FIPS 197 section 5.2."""
    words, constant = [key[place:place + 4] for place in range(0, 16, 4)], 1
    for place in range(4, 44):
        word = words[-1]
        if place % 4 == 0:
            word = (word[1:] + word[:1]).translate(aes_s_box())
            word, constant = bytes([word[0] ^ constant]) + word[1:], aes_multiply(constant, 2)
        words.append(bytes(a ^ b for a, b in zip(words[-4], word)))
    return [b"".join(words[place:place + 4]) for place in range(0, 44, 4)]


def aes_decrypted(data: bytes, key: bytes) -> bytes:
    """Return data decrypted by AES-128-ECB with PKCS#7 padding. Raises ValueError.

    Works on all blocks at once: plane 4 * column + row holds that byte of every block."""
    if not data or len(data) % 16 or len(key) != 16:
        raise ValueError("not encrypted as expected")
    keys, every, whole = aes_round_keys(key), range(256), bytearray(len(data))
    inverse = bytes(map(aes_s_box().index, every))
    factors = [bytes(aes_multiply(byte, factor) for byte in every) for factor in (14, 11, 13, 9)]
    planes = [data[place::16].translate(bytes(byte ^ keys[10][place] for byte in every))
              for place in range(16)]
    for number in range(9, -1, -1):
        # InvShiftRows, InvSubBytes and AddRoundKey; InvMixColumns below.
        planes = [planes[(place - 4 * (place % 4)) % 16].translate(bytes(
            byte ^ keys[number][place] for byte in inverse)) for place in range(16)]
        if number:
            terms = [[int.from_bytes(plane.translate(factor), "big") for factor in factors]
                     for plane in planes]
            planes = [functools.reduce(operator.xor, (
                terms[place // 4 * 4 + row][(row - place) % 4] for row in range(4)
            )).to_bytes(len(data) // 16, "big") for place in range(16)]
    for place, plane in enumerate(planes):
        whole[place::16] = plane
    if not 1 <= whole[-1] <= 16 or len(set(whole[-whole[-1]:])) != 1:
        raise ValueError("not encrypted with this key")
    return bytes(whole[:-whole[-1]])


class WeChat(Channel):
    """A bot of WeChat."""

    def __init__(
        self, tools: Tools, http: Http, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(tools, http)
        self._clock = clock
        self._login_root = str(tools.settings.get("loginBaseUrl") or _WECHAT_API)
        self._hold_s = _WECHAT_HOLD_S
        #: How many polls have failed in a row, and whether the last one was "not logged in".
        self._failures, self._is_refused = 0, False
        #: The "typing" ticket of each person who currently sees it.
        self._typing: dict[str, str] = {}

    # -- calls ------------------------------------------------------------------------------------

    def _call(self, name: str, body: Json, timeout_s: float = 15.0,
              on_open: Optional[Callable[[Wire], None]] = None) -> Json:
        """Return the answer to a call. Raises NetworkFailed."""
        state, settings = self.tools.state(), self.tools.settings
        root = state.get("base_url") or settings.get("baseUrl") or _WECHAT_API
        info = {"channel_version": _WECHAT_VERSION,
                "bot_agent": settings.get("botAgent") or f"OCP/{VERSION}"}
        return self._post(f"{root}/ilink/bot/{name}", {**body, "base_info": info}, timeout_s,
                          on_open, Authorization=f"Bearer {state.get('bot_token')}")

    def _post(self, url: str, body: Json, timeout_s: float = 15.0,
              on_open: Optional[Callable[[Wire], None]] = None, **headers: str) -> Json:
        """Return the answer to a call. Raises NetworkFailed."""
        answer = self.http.call("POST", url, body, {
            **_WECHAT_HEADERS, "AuthorizationType": "ilink_bot_token",
            "X-WECHAT-UIN": base64_text(str(secrets.randbits(32)).encode()), **headers,
        }, timeout_s, on_open=on_open)
        if answer.status != 200 or not answer.body.lstrip().startswith(b"{"):
            raise NetworkFailed(f"status {answer.status}")
        return answer.json()

    def _begin(self) -> Json:
        """Notify the platform that the bot is online, and return the state of the account. Raises
        Fatal."""
        state = self.tools.state()
        if not state.get("bot_token"):
            raise Fatal("not logged in", _WECHAT_LOGIN, needs_login=True)
        with contextlib.suppress(NetworkFailed):
            self._call("msg/notifystart", {}, 5.0)
            # The first poll may take long to return.
            self.tools.note_frame()
        return state

    def probe(self) -> str:
        """Return the id of the bot. Raises Fatal."""
        return f"bot {self._begin().get('bot_id')}"

    # -- receiving --------------------------------------------------------------------------------

    def run(self) -> None:
        """Receive messages until the account has to stop. Raises Fatal, Retry."""
        state = self._begin()
        while not self.tools.stop.is_set():
            began_s, answer = time.monotonic(), self._poll(state)
            if not answer.get("msgs"):
                pause_after_instant_poll(self.tools.stop, began_s)
            if self.tools.state().get("bot_token") != state["bot_token"]:
                raise Retry("a new login was made")
            state = self._take(answer, state)
        with contextlib.suppress(NetworkFailed):
            self._call("msg/notifystop", {}, 5.0)

    def _poll(self, state: Json) -> Json:
        """Return the updates since the last poll, {} when stopping. Raises Fatal, Retry."""
        try:
            answer = self._call(
                "getupdates", {"get_updates_buf": state.get("buffer", "")},
                self._hold_s + _WECHAT_SLACK_S, lambda opened: self.tools.on_stop(opened.cut))
            code, why = code_of_wechat(answer), str(answer.get("errmsg") or "refused")
        except NetworkFailed as problem:
            if self.tools.stop.is_set():
                return {}
            code, why = 1, str(problem)
        if code == _WECHAT_NOT_LOGGED_IN and self._is_refused:
            raise Fatal("the login has expired", _WECHAT_LOGIN, needs_login=True)
        # The next run notifies the platform again, which may be enough.
        self._is_refused = code == _WECHAT_NOT_LOGGED_IN
        if code:
            self._failures += 1
            raise Retry(why, _WECHAT_PAUSES_S[(self._failures - 1) % len(_WECHAT_PAUSES_S)])
        self._failures, hold_ms = 0, answer.get("longpolling_timeout_ms")
        if isinstance(hold_ms, int) and hold_ms > 0:
            self._hold_s = min(hold_ms / 1000, _WECHAT_MAX_HOLD_S)
        self.tools.note_frame()
        return answer

    def _take(self, answer: Json, state: Json) -> Json:
        """Save the messages of a poll, and return the state after them. Raises OSError."""
        found = answer.get("msgs")
        for each in found if isinstance(found, list) else []:
            message = self.understood(self._message, each)
            if message is not None and each.get("context_token"):
                tokens = [pair for pair in state.get("tokens", {}).items()
                          if pair[0] != message.chat]
                tokens.append((message.chat, str(each["context_token"])))
                state = {**state, "tokens": dict(tokens[-_WECHAT_PEOPLE:])}
            self.tools.accept(message, state)
        buffer = str(answer.get("get_updates_buf") or state.get("buffer", ""))
        if buffer != state.get("buffer", ""):
            # Only now: messages that come again after a kill are recognized by their ids.
            state = {**state, "buffer": buffer}
            self.tools.accept(None, state)
        return state

    def _message(self, found: Json) -> Optional[Message]:
        """Return the message, None if it is not a person's."""
        items = found.get("item_list") or []
        text, attachments = wechat_text(items), tuple(
            each for item in items for each in self._files(item))
        if found.get("message_type") == _WECHAT_BOT or found.get("group_id") or not (
                text or attachments):
            return None
        sender = str(found["from_user_id"])
        digest = hashlib.sha256(compact(found).encode()).hexdigest()
        ids = [found.get("message_id"), *(item.get("msg_id") for item in items), digest]
        quoted = [words for item in items for quote in [item.get("ref_msg") or {}] for words in (
            str(quote.get("title") or ""), wechat_text([quote.get("message_item") or {}]))]
        return Message(
            id=str(next(filter(None, ids))), chat=sender, kind="direct", sender=sender,
            sender_name=sender.partition("@")[0], text=text, is_mentioned=True,
            quoted="\n".join(filter(None, quoted)), attachments=attachments,
            at_s=float(found.get("create_time_ms") or 0) / 1000,
            route={"to": sender, "run": secrets.token_hex(8)},
        )

    def _files(self, item: Json) -> Iterator[Attachment]:
        """Yield the file of an item, if it has one."""
        field, kind, name = _WECHAT_FILES.get(item.get("type", 0), ("", "", ""))
        found = item.get(field)
        # A voice message with a transcript is taken as text.
        if found and not (field == "voice_item" and found.get("text")):
            media = found.get("media") or {}
            param = urllib.parse.quote(str(media.get("encrypt_query_param") or ""), safe="")
            root = self.tools.settings.get("cdnBaseUrl") or _WECHAT_CDN
            url = media.get("full_url") or f"{root}/download?encrypted_query_param={param}"
            # The base64 encodes the 16 bytes of the key, or their 32 hex digits.
            data = base64.b64decode(str(media.get("aes_key") or ""))
            key = found.get("aeskey") or (data.decode("ascii") if len(data) == 32 else data.hex())
            yield Attachment(kind, clean(found.get("file_name") or name), "",
                             int(found.get("len") or 0), {"url": url, "key": str(key)})

    # -- sending ----------------------------------------------------------------------------------

    def send(self, route: Json, part: Part) -> str:
        """Send a part and return the id of its message. Raises SendFailed."""
        answer = self._deliver("sendmessage", {"msg": {
            "from_user_id": "", "to_user_id": route["to"], "client_id": part.nonce,
            # State 2 = the message is complete.
            "message_type": _WECHAT_BOT, "message_state": 2,
            "item_list": [{"type": 1, "text_item": {"text": self.render(part.text)}}],
            "context_token": self._token(route), "run_id": route["run"],
        }})
        return str(answer.get("message_id") or part.nonce)

    def _token(self, route: Json) -> str:
        """Return the newest token of a person. Raises SendFailed."""
        token = (self.tools.state().get("tokens") or {}).get(route["to"])
        if not token:
            # The platform would accept the message, but show it to nobody.
            raise SendFailed("held", "this person has not written since the login")
        return str(token)

    def _deliver(self, name: str, body: Json) -> Json:
        """Return the answer to a call that sends something. Raises SendFailed."""
        with sending():
            answer = self._call(name, body)
        code = code_of_wechat(answer)
        if code:
            raise SendFailed("held" if code == _WECHAT_NOT_NOW else "later",
                             f"{code} {answer.get('errmsg') or ''}")
        return answer

    def type(self, route: Json, is_over: bool = False) -> None:
        """Show "typing", or end it if `is_over`. Raises SendFailed."""
        person = route["to"]
        ticket = self._typing.pop(person, "")
        if not (ticket or is_over):
            ticket = str(self._deliver("getconfig", {
                "ilink_user_id": person, "context_token": self._token(route),
            }).get("typing_ticket") or "")
        if ticket and not is_over:
            self._typing[person] = ticket
        if ticket:
            self._deliver("sendtyping", {"ilink_user_id": person, "typing_ticket": ticket,
                                         "status": 2 if is_over else 1})

    def render(self, markdown: str) -> str:
        """Return the text as WeChat's Markdown."""
        return render(markdown, WECHAT_MARKDOWN)

    def fetch(self, attachment: Attachment, max_bytes: int) -> bytes:
        """Return the bytes of a file. Raises SendFailed, ValueError if it is larger or cannot be
        decrypted."""
        url, key = str(attachment.ref["url"]), bytes.fromhex(attachment.ref["key"])
        # Padding makes the encrypted file up to 16 bytes larger.
        data = linked_bytes(self.http, url, max_bytes + 16, self._login_root)
        return aes_decrypted(data, key) if key else data

    # -- login ------------------------------------------------------------------------------------

    def login(self, console: Console) -> Json:
        """Log in by QR code, and return the changes to the account's state and "owner", the id of
        its owner. Raises Fatal."""
        state, until_s = self.tools.state(), self._clock() + _LOGIN_S
        for _ in range(_WECHAT_CODES):
            found = self._scanned(console, until_s)
            if found["status"] == "confirmed" and found.get("bot_token"):
                bot, owner = str(found.get("ilink_bot_id")), str(found.get("ilink_user_id") or "")
                # The buffer of another bot would hide this bot's messages.
                kept = {} if bot == state.get("bot_id") else {"buffer": "", "tokens": {}}
                return {**kept, "bot_token": str(found["bot_token"]), "bot_id": bot,
                        "base_url": self._checked(str(found.get("baseurl") or self._login_root)),
                        "user_id": owner, "owner": owner}
            if found["status"] == "binded_redirect" and state.get("bot_token"):
                console.say("It is connected already.")
                return {}
            console.say("The code is not valid any more.")
        raise Fatal("login not confirmed", f"{_WECHAT_LOGIN} again")

    def _scanned(self, console: Console, until_s: float) -> Json:
        """Show a QR code, and return the final status of its scan. Raises Fatal."""
        root, token, is_told = self._login_root, self.tools.state().get("bot_token"), False
        try:
            shown = self._post(f"{root}/ilink/bot/get_bot_qrcode?bot_type=3", {
                "local_token_list": [token] if token else []})
            query, link = {"qrcode": str(shown["qrcode"])}, str(shown["qrcode_img_content"])
        except (NetworkFailed, KeyError) as problem:
            raise Fatal(f"WeChat offers no login ({problem})", f"{_WECHAT_LOGIN} later") from None
        console.show_link(link)
        console.say("Scan it with WeChat.")
        while self._clock() < until_s:
            found: Json = {}
            url = f"{root}/ilink/bot/get_qrcode_status?{urllib.parse.urlencode(query)}"
            with contextlib.suppress(NetworkFailed, ValueError):
                found = self.http.call("GET", url, None, _WECHAT_HEADERS, _WECHAT_HOLD_S).json()
            status = found.get("status")
            if status in _WECHAT_SCAN_ENDS:
                return found
            if status == "need_verifycode":
                again = "That number is wrong. " * ("verify_code" in query)
                query["verify_code"] = console.ask(f"{again}Which number does the phone show?")
                continue
            if status == "scaned" and not is_told:
                is_told = True
                console.say("Scanned; confirm it on the phone.")
            if status == "scaned_but_redirect" and found.get("redirect_host"):
                scheme = urllib.parse.urlsplit(root).scheme
                root = self._checked(f"{scheme}://{found['redirect_host']}")
            self.tools.stop.wait(_WECHAT_POLL_S)
        raise Fatal("login not confirmed in time", f"{_WECHAT_LOGIN} again")

    def _checked(self, url: str) -> str:
        """Return a URL from a login answer. Raises Fatal if it is not WeChat's."""
        if not leads_to(url, _WECHAT_DOMAINS, self._login_root):
            raise Fatal(f"the login leads to {clean(url)}, which is not WeChat",
                        "do not continue; ask whoever runs your network")
        return url.rstrip("/")


def code_of_wechat(answer: Json) -> int:
    """Return the error code of an answer, 0 for success."""
    code = answer.get("ret") or answer.get("errcode") or 0
    return code if isinstance(code, int) else 1


def wechat_text(items: list[Json]) -> str:
    """Return the text of a message's items."""
    said = [(item.get(_WECHAT_TEXTS.get(item.get("type", 0), "")) or {}).get("text")
            for item in items]
    return "\n".join(str(each) for each in said if each).strip()


WeChat.row = Row(
    "openclaw-weixin", ("weixin", "wechat"), "WeChat", WeChat, limit=1800, credentials={},
    settings={"baseUrl": platform_url_value, "cdnBaseUrl": platform_url_value,
              "loginBaseUrl": platform_url_value, "botAgent": text_value},
    typing_every_s=5.0, budget=10, pace_s=1.5, has_login=True,
    help=f"Run {PROGRAM} login --channel openclaw-weixin, and scan the code with WeChat.",
)


# ==== 16. Channel table ======================================================
# The built-in channels; plugins add their own rows.

ROWS: tuple[Row, ...] = (Telegram.row, Discord.row, QQ.row, DingTalk.row, WeChat.row)


# ==== 17. Access =============================================================
# Who may talk to a bot. Everything is closed until the owner opens it: an empty list allows nobody,
# and a stranger in a direct chat gets a code for the owner to approve.

#: Letters and digits that are hard to confuse with each other.
_CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
_CODE_CHARS, _CODE_S, _MAX_WAITING_CODES = 8, 3600.0, 3
_HOUR_S = 3600.0
#: Prefixes that people write before ids.
_ID_PREFIX = re.compile(r"^(telegram|tg|discord|user|qqbot|dingtalk|weixin):", re.IGNORECASE)


class Verdict(NamedTuple):
    """Whether a message is answered, and the reply if it is not."""

    #: Why it is not answered, in a few words for the status; empty if it is.
    reason: str = ""
    #: The reply to a message that is not answered; empty = none.
    reply: str = ""
    #: Whether the message counts toward the hourly limit although it is not answered.
    is_counted: bool = False


def bare_id(text: str) -> str:
    """Return an id without such a prefix."""
    return _ID_PREFIX.sub("", text.strip())


def is_listed(sender: str, listed: Iterable[object]) -> bool:
    """Return whether a list of ids contains this one or "*"."""
    return any(bare_id(str(each)) in ("*", bare_id(sender)) for each in listed)


class Access:
    """Decides which messages are answered. `judge` is called within a transaction of the store."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store, self._clock = store, clock

    def judge(self, account: Account, message: Message) -> Verdict:
        """Return the verdict on a message, from its group, sender, mention and rate."""
        is_direct = message.kind == "direct"
        verdict = self._judge_direct(account, message) if is_direct else judge_group(
            account, message)
        most = account.settings["perSenderHour"]
        if verdict.reason or not most or self.is_owner(account.id, message.sender):
            return verdict
        now_s = self._clock()
        # Rows with a time in the future were written while the clock was wrong.
        count = self._store.rows(
            "SELECT COUNT(*) FROM inbox WHERE account=? AND sender=? AND at_s>? AND at_s<=?",
            account.id, message.sender, now_s - _HOUR_S, now_s)[0][0]
        # The first message over the limit gets a reply and is counted; later ones get no reply.
        reply = f"The limit is {most} messages an hour. Please try again later."
        return verdict if count < most else Verdict(
            "too many in an hour", reply * (count == most), is_counted=count == most)

    def _judge_direct(self, account: Account, message: Message) -> Verdict:
        policy = account.settings["dmPolicy"]
        if policy == "disabled":
            return Verdict("direct messages are off")
        if is_listed(message.sender, account.settings["allowFrom"]):
            return Verdict()
        if policy != "pairing":
            return Verdict("not in allowFrom")
        waiting = [row for row in self.people() if row["account"] == account.id and row["code"]]
        person = self._person(account.id, message.sender)
        if person is not None:
            return Verdict("not approved" if person["code"] else "")
        if len(waiting) >= _MAX_WAITING_CODES:
            return Verdict("not approved")
        code = "".join(secrets.choice(_CODE_LETTERS) for _ in range(_CODE_CHARS))
        self._store.run(
            "INSERT INTO people VALUES (?,?,?,?,?,?,0,?)", account.id, message.sender,
            clean(message.sender_name)[:80], compact(message.route), message.chat, code,
            self._clock())
        return Verdict("not approved", f"This bot is private. Code {code}; your id is "
                       f"{clean(message.sender)}. The owner runs: {PROGRAM} pairing approve {code}")

    def _person(self, account: str, sender: str) -> Optional[sqlite3.Row]:
        found = self._store.rows("SELECT * FROM people WHERE account=? AND sender=?", account,
                                 sender)
        return found[0] if found else None

    def is_owner(self, account: str, sender: str) -> bool:
        """Return whether a person owns an account."""
        person = self._person(account, sender)
        return person is not None and bool(person["is_owner"])

    def people(self) -> list[sqlite3.Row]:
        """Return the approved people, and those who wait for approval, who have a code. Codes
        expire after an hour."""
        self._store.run("DELETE FROM people WHERE code<>'' AND at_s<=?", self._clock() - _CODE_S)
        return self._store.rows("SELECT * FROM people ORDER BY at_s")

    def approve(self, code: str, *, is_owner: bool) -> Optional[sqlite3.Row]:
        """Approve the person with this code and notify them. Return the person, None if the code is
        unknown. The first person approved owns the account."""
        with self._store.transaction():
            people, code = self.people(), code.strip().upper()
            found = next((row for row in people if code and row["code"] == code), None)
            if found is None:
                return None
            account, sender = found["account"], found["sender"]
            has_owner = any(row["is_owner"] for row in people if row["account"] == account)
            self._store.run("UPDATE people SET code='', is_owner=? WHERE account=? AND sender=?",
                            is_owner or not has_owner, account, sender)
            self._store.put_out(account, found["chat"], 0, [OutRow(
                "You may write to me now. /help shows what I understand.",
                json.loads(found["route"]))])
            return self._person(account, sender)

    def revoke(self, account: str, sender: str) -> bool:
        """Remove a person; return whether the person was approved or waiting."""
        return self._store.run("DELETE FROM people WHERE account=? AND sender=?", account,
                               bare_id(sender)) > 0


def is_closed_place(place: object) -> bool:
    """Return whether a group's or channel's settings turn it off; `allow` and `enabled` are
    OpenClaw's names."""
    return place is False or isinstance(place, dict) and False in (
        place.get("allow"), place.get("enabled"))


def judge_group(account: Account, message: Message) -> Verdict:
    """Return the verdict on a message in a group, from its group, sender and mention."""
    settings = account.settings
    if settings["groupPolicy"] == "disabled":
        return Verdict("groups are off")
    places = {**(settings.get("guilds") or {}), **(settings.get("groups") or {})}
    group = places.get(message.group, places.get("*"))
    if group is None and settings["groupPolicy"] == "allowlist":
        return Verdict("the group is not listed")
    levels: list[Any] = [group]
    channels = group.get("channels") if isinstance(group, dict) else None
    if isinstance(channels, dict):
        levels.append(channels.get(message.place, channels.get("*", False)))
    if any(map(is_closed_place, levels)):
        return Verdict("the channel is not listed")
    people, has_to_be_mentioned = settings["groupAllowFrom"], settings["requireMention"]
    for level in levels:
        if isinstance(level, dict):
            # The list of a group, or of a channel in it, replaces the wider list.
            people = level.get("allowFrom", level.get("users", people))
            has_to_be_mentioned = level.get("requireMention", has_to_be_mentioned)
    if not is_listed(message.sender, people if isinstance(people, (list, tuple)) else ()):
        return Verdict("not in groupAllowFrom")
    is_answered = message.is_mentioned or not has_to_be_mentioned
    return Verdict("" if is_answered else "not mentioned")


# ==== 18. Agent ==============================================================
# Chat completions: one question, its answer as it arrives, and the reply to the person if it fails.
# A question is not retried once any text has arrived.

_RETRY_WAITS_S = (1.0, 4.0, 15.0)
_MAX_RETRY_AFTER_S = 60.0
_RETRIED_STATUSES = (502, 503, 504, 529)
_MAX_WHOLE_BYTES, _MAX_ANSWER_CHARS = 1024 * 1024, 1024 * 1024
_MAX_REASON_CHARS = 500
#: The silence limit for an agent without a time limit.
_SILENCE_S = 86_400.0
#: Answers that mean "send no reply".
SILENT_ANSWERS = ("NO_REPLY", "[SKIP]")
_MAX_IMAGES, _MAX_IMAGE_BYTES = 4, 8 * 1024 * 1024
_MAX_PDF_BYTES, _MAX_TEXT_BYTES = 10 * 1024 * 1024, 100_000
#: The first bytes of image files, with the MIME type.
_IMAGE_BEGINNINGS = (
    (b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG\r\n\x1a\n", "image/png"), (b"GIF8", "image/gif"),
    (b"RIFF", "image/webp"),
)


class AgentFailed(Exception):
    """The agent gave no answer, or only a part of one."""

    def __init__(
        self, code: str, message: str, status: int = 0, retry_after_s: float = 0.0,
        *, can_retry: bool = False,
    ) -> None:
        """`code` is the agent's own, or "unreachable", "timeout", "cut_off"."""
        super().__init__(message)
        self.code, self.status, self.retry_after_s = code, status, retry_after_s
        self.can_retry = can_retry


class Failing(NamedTuple):
    """The reply for a kind of failure, a template with {reference}, {model}, {until}, {message}."""

    statuses: tuple[int, ...]
    codes: tuple[str, ...]
    text: str
    #: The additional text for the owner.
    owner: str = ""


#: The first row that matches a failure's code or status is used.
FAILURES = (
    Failing((), ("insufficient_quota",), "The limit is used up{until}."),
    Failing((), ("model_not_found", "model_needs_newer_claude"),
            'There is no model "{model}"; /model lists them.'),
    Failing((), ("context_length_exceeded",),
            "This conversation is too long; /new begins another."),
    Failing((401, 403), ("upstream_login_required", "invalid_api_key", "claude_unavailable"),
            "The assistant needs its owner. ({reference})", "{message}"),
    Failing((400, 404, 413, 422), (), "The assistant cannot process this. ({reference})",
            "{message}"),
    Failing((), (), "The assistant is not reachable right now. ({reference})",
            "{message} Is OCP running? ocp status"),
)


def failure_text(failed: AgentFailed, model: str, reference: str, *, is_owner: bool) -> str:
    """Return the reply for a failure."""
    row = next(each for each in FAILURES if failed.code in each.codes
               or failed.status in each.statuses or not (each.codes or each.statuses))
    # Add the date if it is not today, where the time alone would mislead.
    form = " until %H:%M" if failed.retry_after_s < _DAY_S else " until %d %B, %H:%M"
    until = time.strftime(form, time.localtime(time.time() + failed.retry_after_s)) if (
        failed.retry_after_s) else ""
    text = f"{row.text} {row.owner}".strip() if is_owner else row.text
    return text.format(reference=reference, model=model, until=until, message=failed)


class Question(NamedTuple):
    """A request to the agent."""

    url: str
    key: str
    body: Json
    timeout_s: float
    headers: Mapping[str, str] = {}
    #: Whether the agent may take the question and answer it later.
    is_async: bool = False


class Answering:
    """A question in progress, in its own thread. `next` waits for the texts of the answer."""

    def __init__(self, http: Http, question: Question) -> None:
        self._http, self._question = http, question
        #: The texts, then None at the end or the failure.
        self._events: queue.SimpleQueue[Union[str, None, AgentFailed]] = queue.SimpleQueue()
        self._is_cut = threading.Event()
        self._wake: Callable[[], None] = lambda: None
        threading.Thread(target=self._run, name="agent", daemon=True).start()

    def next(self, timeout_s: float) -> Optional[str]:
        """Return the next text; empty if none came in time, None at the end. Raises AgentFailed."""
        try:
            event = self._events.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return ""
        if isinstance(event, AgentFailed):
            raise event
        return event

    def cut(self) -> None:
        """End it at once, by closing the connection to the agent."""
        self._is_cut.set()
        self._wake()
        # Wake a thread in `next` even if the connection is still being made.
        self._events.put(AgentFailed("cut_off", "It was stopped."))

    def _run(self) -> None:
        for wait_s in (*_RETRY_WAITS_S, None):
            has_text = False
            try:
                for text in self._texts():
                    has_text = has_text or bool(text)
                    self._events.put(text)
                self._events.put(None)
                return
            except Exception as problem:  # The thread that waits for the answer must get an event.
                failed = problem if isinstance(problem, AgentFailed) else AgentFailed(
                    "not_understood", f"The answer was not understood: {problem!r}.")
                can_retry = failed.can_retry and wait_s is not None and not has_text
                pause_s = max(wait_s or 0.0, min(failed.retry_after_s, _MAX_RETRY_AFTER_S))
                if not can_retry or self._is_cut.wait(pause_s):
                    self._events.put(failed)
                    return

    def _texts(self) -> Iterator[str]:
        """Ask once and yield the texts of the answer. Raises AgentFailed."""
        question = self._question
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream",
                   **question.headers}
        if question.key:
            headers["Authorization"] = f"Bearer {question.key}"
        try:
            exchange = self._http.open(
                "POST", question.url, compact(question.body).encode("ascii"), headers,
                question.timeout_s or _SILENCE_S, on_open=self._opened,
            )
        except NetworkFailed as problem:
            raise AgentFailed("unreachable", f"{problem}.", can_retry=True) from None
        try:
            yield from read_answer(exchange, question.is_async)
        except (NetworkFailed, ValueError) as problem:
            raise AgentFailed("cut_off", f"{problem}.", can_retry=True) from None
        finally:
            exchange.close()

    def _opened(self, wire: Wire) -> None:
        self._wake = wire.cut
        # `cut` may have been called while it was connecting.
        if self._is_cut.is_set():
            wire.cut()


def read_answer(exchange: Exchange, is_async: bool) -> Iterator[str]:
    """Yield the texts of an answer. Raises AgentFailed, NetworkFailed, ValueError."""
    if exchange.status != 200 and not (is_async and 200 <= exchange.status < 300):
        raise refusal_of(HttpAnswer(exchange.status, exchange.headers, exchange.read()))
    if "text/event-stream" in exchange.headers.get("content-type", ""):
        yield from stream_texts(exchange.lines())
    else:
        body = exchange.read(_MAX_WHOLE_BYTES)
        # An asynchronous agent acknowledges the question in its own format.
        if not is_async or b'"choices"' in body:
            yield whole_text(body)


def refusal_of(answer: HttpAnswer) -> AgentFailed:
    """Return the failure for an error answer."""
    content = answer.json()
    error = content.get("error", content)
    error = error if isinstance(error, dict) else {"message": error}
    message = clean(error.get("message") or f"status {answer.status}")[:_MAX_REASON_CHARS]
    code = str(error.get("code") or error.get("type") or "")
    if answer.status == 404 and "model" in message.lower():
        code = "model_not_found"
    is_busy = answer.status == 429 and code.startswith("rate_limit")
    is_final = answer.headers.get("x-should-retry", "").lower() == "false"
    can_retry = not is_final and (is_busy or answer.status in _RETRIED_STATUSES)
    return AgentFailed(code, message, answer.status, answer.retry_after_s, can_retry=can_retry)


def stream_texts(lines: Iterable[bytes]) -> Iterator[str]:
    """Yield the texts of server-sent events. Raises AgentFailed."""
    data: list[str] = []
    is_over, size, left = False, 0, _MAX_ANSWER_CHARS
    # Some agents leave the empty line after the last event out.
    for line in itertools.chain(lines, (b"",)):
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if text.startswith("data:"):
            data.append(text[5:])
            size += len(text)
            if size > _MAX_ANSWER_BYTES:
                raise AgentFailed("too_large", "An event of the answer is too large.")
        elif not text and data:
            event, data, size = "\n".join(data), [], 0
            if event.strip() == "[DONE]":
                return
            choice = _choice_of(event)
            is_over = is_over or bool(choice.get("finish_reason"))
            found = text_of((choice.get("delta") or choice.get("message") or {}).get("content"))
            if found:
                yield found[:left]
                left -= len(found)
            if left <= 0:
                raise AgentFailed("too_large", "The answer is too large.")
    if not is_over:
        raise AgentFailed("cut_off", "The answer broke off.", can_retry=True)


def _choice_of(body: Union[str, bytes]) -> Json:
    """Return the first choice of a whole answer or an event, {} if it has none. Raises
    AgentFailed for an error."""
    content = json_object(body)
    if content.get("error"):
        raise refusal_of(HttpAnswer(500, {}, compact(content).encode("ascii")))
    choices = content.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else {}
    return first if isinstance(first, dict) else {}


def whole_text(body: bytes) -> str:
    """Return the text of an answer that is not streamed, in any format that agents use."""
    choice = _choice_of(body)
    if choice:
        return text_of((choice.get("message") or {}).get("content"))
    raw = body.decode("utf-8", "replace")
    with contextlib.suppress(ValueError):
        content = json.loads(raw)
        if isinstance(content, str):
            return content
        for name in ("text", "content", "response", "output"):
            if isinstance(content, dict) and content.get(name):
                return text_of(content[name])
    return raw


def text_of(content: object) -> str:
    """Return the text of a message's content, which may be a list of parts."""
    if isinstance(content, list):
        return "".join(text_of(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def attachment_part(attachment: Attachment, data: bytes) -> Json:
    """Return an attachment's bytes as a content part. Raises ValueError with the reason why an
    agent cannot read it."""
    name = clean(attachment.name.replace("\\", "/").rpartition("/")[2])[:100] or "file"
    mime = next((mime for start, mime in _IMAGE_BEGINNINGS if data.startswith(start)), "")
    if mime and (mime != "image/webp" or data[8:12] == b"WEBP"):
        url = f"data:{mime};base64,{base64_text(data)}"
        return {"type": "image_url", "image_url": {"url": url}}
    if data.startswith(b"%PDF-"):
        url = f"data:application/pdf;base64,{base64_text(data)}"
        return {"type": "file", "file": {"filename": name, "file_data": url}}
    if len(data) > _MAX_TEXT_BYTES or b"\0" in data:
        raise ValueError("not a photo, PDF or short text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not a photo, PDF or short text") from None
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return {"type": "text", "text": f"{name}:\n{fence}\n{text}\n{fence}"}


def models_of(http: Http, url: str, key: str) -> list[str]:
    """Return the names of the agent's models. Raises NetworkFailed, ValueError."""
    base = url[: -len("/chat/completions")] if url.endswith("/chat/completions") else url
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    found = http.call("GET", f"{base}/models", None, headers).json().get("data")
    return [str(each["id"]) for each in (found if isinstance(found, list) else [])
            if isinstance(each, dict) and each.get("id")]


# ==== 19. Callbacks ==========================================================
# With `async` an agent may answer later: it gets a URL with a one-time token, and posts
# {"reply": ..} to it. The database keeps only the token's hash.

CALLBACK_PATH = "/ocg/callback"
_TOKEN_PATH = re.compile(rf"{CALLBACK_PATH}/([0-9a-f]{{64}})")
_MAX_CALLBACK_BYTES = 1024 * 1024
_CALLBACK_READ_S = 30.0
#: The CORS headers of the original gateway.
_CORS = {
    "Access-Control-Allow-Origin": "*", "Access-Control-Allow-Methods": "POST, OPTIONS",
    "Access-Control-Allow-Headers": "Content-Type, X-OCG-Signature",
}


class CallRefused(Exception):
    """A callback is refused, with this HTTP status and reason."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Callbacks:
    """Issues callback tokens, and receives the answers that agents post."""

    def __init__(self, store: Store, log: Log, top: Mapping[str, Any],
                 accounts: Mapping[str, LiveAccount]) -> None:
        self._store, self._log, self._top, self._accounts = store, log, top, accounts
        self._server: Optional[_CallbackServer] = None

    def start(self) -> None:
        """Start listening, unless it already does. Raises Problem if the port is taken."""
        if self._server is not None:
            return
        host, port = self._top["callbackHost"], self._top["callbackPort"]
        try:
            self._server = _CallbackServer(host, port, self)
        except OSError as problem:
            raise Problem(Exit.FAILED, f"callbackPort {port} on {host}: {reason_of(problem)}. Set "
                          "callbackPort to a free port.") from None
        if not is_loopback(host) and not self._top["callbackSecret"]:
            self._log.line("warning", f"callbacks listen on {host} without callbackSecret: anyone "
                                      "who reaches the port and has a token can answer")
        threading.Thread(target=self._server.serve_forever, args=(0.2,), daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def new(self, account: str, inbox: int, session: str, message: Message) -> tuple[str, str]:
        """Return a URL for the answer to a message, and the hash of its token."""
        if self._server is None:
            raise OSError("the callback server is not running: restart the gateway")
        token, top = secrets.token_hex(32), self._top
        digest = _digest_of(token)
        # If the question was asked before, its old token is no longer valid.
        self._store.run("DELETE FROM tokens WHERE inbox=?", inbox)
        self._store.run("INSERT INTO tokens VALUES (?,?,?,?,?,?)", digest, account, inbox, session,
                        message_json(message), time.time() + top["callbackTokenTTL"])
        bound = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(top["callbackHost"], top["callbackHost"])
        host = top["callbackPublicHost"] or bound
        host = f"[{host}]" if ":" in host and not host.startswith("[") else host
        port = top["callbackPublicPort"] or self._server.server_address[1]
        return f"http://{host}:{port}{CALLBACK_PATH}/{token}", digest

    def is_open(self, digest: str) -> bool:
        """Return whether a token is still unused."""
        return bool(self._store.rows("SELECT 1 FROM tokens WHERE hash=?", digest))

    def drop(self, digest: str) -> None:
        """Invalidate a token."""
        self._store.run("DELETE FROM tokens WHERE hash=?", digest)

    def take(self, method: str, path: str, signature: str, body: Optional[bytes]) -> None:
        """Handle a call; `body` is None if it is too large. Raises CallRefused."""
        bare = path.partition("?")[0].rstrip("/")
        found = _TOKEN_PATH.fullmatch(bare)
        if method == "POST" and bare == CALLBACK_PATH:
            raise CallRefused(400, f"the token belongs in the path: POST {CALLBACK_PATH}/{{token}}")
        if found is None:
            raise CallRefused(404, "not found")
        if method != "POST":
            raise CallRefused(405, "use POST")
        if body is None:
            raise CallRefused(413, f"more than {_MAX_CALLBACK_BYTES} bytes")
        secret = self._top["callbackSecret"]
        expected = "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
        given = signature.strip().lower().encode("latin-1", "replace")
        if secret and not hmac.compare_digest(given, expected.encode("ascii")):
            raise CallRefused(401, "signature verification failed")
        try:
            self._deliver(_digest_of(found.group(1)), reply_of(body))
        except ValueError as problem:
            raise CallRefused(400, str(problem)) from None
        except OSError as problem:
            self._log.event("error", "a callback was not stored", why=problem)
            raise CallRefused(500, "the answer could not be stored; call again") from None

    def _deliver(self, digest: str, reply: str) -> None:
        """Save an answer and remove its token in one transaction. Raises CallRefused, OSError."""
        with self._store.transaction():
            found = self._store.rows("SELECT * FROM tokens WHERE hash=? AND until_s>?", digest,
                                     time.time())
            if not found:
                raise CallRefused(404, "unknown or expired callback token")
            live = self._accounts.get(found[0]["account"])
            if live is None:
                raise OSError("the account is not running")
            message = message_of(found[0]["message"])
            self._store.put_out(live.id, message.chat, found[0]["inbox"],
                                live.out_rows(message, live.split(reply)))
            if live.settings["memory"] == "gateway":
                self._store.remember(found[0]["session"], "assistant", reply)
            # After a kill the question may not be marked as answered; do not ask it again.
            self._store.finish_asked(found[0]["inbox"])
            self.drop(digest)
        live.nudge()

    def expire(self) -> None:
        """Notify the people whose answer has not come in time."""
        with self._store.transaction():
            for row in self._store.rows("SELECT * FROM tokens WHERE until_s<=?", time.time()):
                live, reference = self._accounts.get(row["account"]), secrets.token_hex(3)
                self._log.event("error", "no callback came in time", ref=reference,
                                session=row["session"])
                if live is not None:
                    live.say(message_of(row["message"]), f"No answer came in time. ({reference})",
                             row["inbox"])
                    live.nudge()
                self.drop(row["hash"])


def _digest_of(token: str) -> str:
    return hashlib.sha256(token.encode("ascii")).hexdigest()


def reply_of(body: bytes) -> str:
    """Return the answer in a callback's body. Raises ValueError with the fault."""
    content = json_object(body)
    if not content:
        raise ValueError("the body is not a JSON object")
    reply, is_error = content.get("reply"), content.get("isError", False)
    if not isinstance(is_error, bool):
        raise ValueError("isError: use true or false")
    if isinstance(reply, dict):
        reply = reply.get("text") or text_of(reply.get("content")) or compact(reply)
    if not isinstance(reply, str) or not reply.strip():
        raise ValueError("reply: use a text, or an object with text or content")
    return encodable(f"\u26a0\ufe0f {reply}" if is_error else reply)


class _CallbackServer(http.server.ThreadingHTTPServer):
    """The HTTP server for callbacks."""

    daemon_threads = True

    def __init__(self, host: str, port: int, callbacks: Callbacks) -> None:
        self.callbacks = callbacks
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _CallbackHandler)

    def server_bind(self) -> None:
        # HTTPServer's own server_bind makes a reverse DNS lookup.
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: object, client_address: object) -> None:
        """Write nothing: the client hung up, or did not send HTTP."""


class _CallbackHandler(http.server.BaseHTTPRequestHandler):
    """Reads one call and writes its answer."""

    server: _CallbackServer
    timeout = _CALLBACK_READ_S
    server_version, sys_version = "ocp_channels", ""

    def _answer(self) -> None:
        length = self.headers.get("Content-Length", "0")
        size = int(length) if length.isdecimal() else 0
        body = self.rfile.read(size) if size <= _MAX_CALLBACK_BYTES else None
        if body is None:
            # Read the rest, because a client that is still sending would not get the answer. Stop
            # after a limit.
            for left in range(min(size, 16 * _MAX_CALLBACK_BYTES), 0, -65_536):
                self.rfile.read(min(left, 65_536))
            self.close_connection = True
        status, data = 204, b""
        if self.command != "OPTIONS":
            status, data = 200, b'{"ok":true}'
            try:
                if "Transfer-Encoding" in self.headers:
                    raise CallRefused(411, "send the body with Content-Length")
                self.server.callbacks.take(self.command, self.path,
                                           self.headers.get("X-OCG-Signature", ""), body)
            except CallRefused as refused:
                status, data = refused.status, compact({"error": str(refused)}).encode("ascii")
        self.send_response(status)
        for name, value in {**_CORS, "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_OPTIONS = do_GET = do_PUT = do_PATCH = do_DELETE = do_HEAD = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing: the path contains the token."""


# ==== 20. Turns ==============================================================
# A lane is the queue of one conversation: its turns run one at a time, each in its own thread.
# Everything a person reads goes through the outbox, except "typing" and previews of an answer.

_MAX_WAITING, _MAX_MERGED, _MAX_MERGED_CHARS = 20, 12, 50_000
#: How long a lane waits for a following message; longer after a message that the client split.
_QUIET_S, _LONG_QUIET_S, _LONG_CHARS = 0.3, 1.5, 4000
_MAX_ATTEMPTS = 2
_RETRY_TURN_S = 5.0
_PREVIEW_AFTER_S, _PREVIEW_CHARS, _PREVIEW_GROWTH, _MAX_PREVIEW_S = 1.2, 40, 1.3, 10.0
_BLOCK_CHARS, _BLOCK_SILENCE_S = 200, 3.0
_NOTICE_S = 600.0
#: The delay of "typing" on platforms where it counts as a message.
_TYPING_DELAY_S = 3.0
#: How long "typing" is shown while a callback is awaited.
_AWAITED_TYPING_S = 60.0
_RETRY_PAUSES_S = (1.0, 5.0, 30.0, 120.0, 600.0)
#: The minimum for a pause that a platform asks for, and the maximum pause between two tries.
_MIN_HOLD_S, _MAX_RETRY_PAUSE_S = 0.2, 3600.0
#: How much later than the parts of other chats a part is sent for which the platform asked for a
#: pause.
_AFTER_OTHERS_S = 0.2
_GIVE_UP_S = 6 * 3600.0
_MORE = "(more: write anything)"
#: Replaces a message that is no longer part of the answer.
_WITHDRAWN = "(The answer ends above.)"
#: Half of a surrogate pair: JSON can split a character.
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_QUOTED_CHARS = 500
#: How many photos and PDFs stay in a conversation.
_KEPT_FILES = 2
#: Statuses of an account in which its parts are sent.
SENDING_STATES = ("running", "retrying")


class Shared(NamedTuple):
    """The objects that all accounts and turns share."""

    store: Store
    access: Access
    log: Log
    environ: Mapping[str, str]
    callbacks: Callbacks


class LiveAccount(Tools):
    """A running account: the tools of its channel, and its status."""

    def __init__(self, account: Account, shared: Shared, lanes: Lanes) -> None:
        super().__init__(account.settings, {})
        self.account, self.id, self.shared, self._lanes = account, account.id, shared, lanes
        self.http = Http(Connector(self.settings["proxy"], shared.environ))
        self.channel = account.row.make(self, self.http)
        self.sender = Sender(self)
        self._wake: Callable[[], None] = lambda: None
        #: "starting", "running", "retrying", "failed", "login needed", "not configured", "stopped".
        self.status, self.why, self.word = "starting", "", ""
        self.started_s = self.last_frame_s = self.last_inbound_s = 0.0
        #: How many messages were not answered, by reason.
        self.dropped: collections.Counter[str] = collections.Counter()
        #: Full lanes whose people have been told so.
        self._full: set[str] = set()
        #: Until when sending pauses at the platform's request, by time.monotonic.
        self.hold_until_s = 0.0

    # -- the interface for channels (Tools) -------------------------------------------------------

    def accept(self, message: Optional[Message], state: Optional[Json] = None) -> None:
        """Save a message and the state of the account in one transaction. Raises OSError."""
        store, after = self.shared.store, self.sender.nudge
        with store.transaction():
            if message is not None:
                message = message_of(message_json(message))
                if store.is_new(self.id, message.id):
                    after = self._take(message)
            if state is not None:
                store.put_state(self.id, state)
        if message is not None:
            self.last_inbound_s = time.time()
            after()

    def _take(self, message: Message) -> Callable[[], None]:
        """Save a new message, and return what to call after the commit."""
        store, lane = self.shared.store, lane_of(self.account, message)
        self.shared.log.message(
            f"\U0001f4e5 [IN] From: {self.account.row.id}:{message.sender} | Session: {lane} | "
            f"{len(message.text)} chars", "Body", message.text)
        verdict = self.shared.access.judge(self.account, message)
        if verdict.is_counted:
            store.put_in(self.id, lane, message, is_done=True)
        if verdict.reason:
            return self._refuse(message, verdict.reason, verdict.reply)
        waiting, command = store.waiting(lane), command_of(message)
        if command is not None and command[0].is_at_once:
            running = self._lanes.stop(lane)
            store.finish(row["id"] for row in waiting if row["id"] not in running)
            self.say(message, "Stopped." if waiting else "There is nothing to stop.")
            return self.sender.nudge
        if len(waiting) >= _MAX_WAITING:
            is_told = lane in self._full
            self._full.add(lane)
            return self._refuse(message, "too many waiting", "" if is_told else (
                "Too many messages are waiting; please send this one later."))
        self._full.discard(lane)
        store.put_in(self.id, lane, message)
        quiet_s = _LONG_QUIET_S if len(message.text) >= _LONG_CHARS else _QUIET_S
        return lambda: self._lanes.nudge(lane, 0.0 if command else quiet_s)

    def _refuse(self, message: Message, reason: str, reply: str) -> Callable[[], None]:
        self.dropped[reason] += 1
        self.log("info", "not answered", reason=reason)
        if reply:
            self.say(message, reply)
        return self.sender.nudge

    def state(self) -> Json:
        """Return the state that was last saved."""
        return self.shared.store.state(self.id)

    def on_stop(self, wake: Callable[[], None]) -> None:
        """Call `wake` when the account has to stop; at once if it already has to."""
        self._wake = wake
        if self.stop.is_set():
            wake()

    def note_frame(self) -> None:
        """Record that the platform has sent something. A failed account stays failed: an earlier
        connection may still deliver something, and so may a probe."""
        self.last_frame_s = time.time()
        if self.status in ("starting", "retrying") and not self.stop.is_set():
            self.status, self.why = "running", ""
            self.log("info", "running")
            self.sender.nudge()

    def note(self, word: str) -> None:
        """Show a note in the status."""
        self.word = word

    def log(self, level: str, event: str, **fields: object) -> None:
        """Write an event of this account to the log."""
        self.shared.log.event(level, f"{self.id} {event}", **fields)

    # -- what turns need --------------------------------------------------------------------------

    def end(self) -> None:
        """Make the channel return from `run`."""
        self.stop.set()
        self._wake()

    def nudge(self) -> None:
        """Wake the sender of this account; after a restart, the new sender."""
        self._lanes.accounts.get(self.id, self).sender.nudge()

    def say(self, message: Message, text: str, answer: int = 0) -> None:
        """Put a short text for the chat of a message into the outbox."""
        self.shared.store.put_out(self.id, message.chat, answer, self.out_rows(message, [text]))

    def hold(self, seconds: float) -> None:
        """Pause sending. There is a minimum, so that a pause of 0 causes no busy loop."""
        self.hold_until_s = max(self.hold_until_s, time.monotonic() + max(_MIN_HOLD_S, seconds))

    def split(self, text: str) -> list[str]:
        """Return Markdown in parts that fit the platform's limit, and that of the settings."""
        row, channel = self.account.row, self.channel
        limit = min(self.settings["replyChunkSize"] or row.limit, row.limit)
        limit -= len(_MORE) + 2 if row.budget else 0
        # Markup is less than three quarters of a text, so a text above 4 * limit need not be
        # rendered to know that it does not fit.
        parts = split_markdown(text, lambda part: len(part) <= 4 * limit and channel.length(
            channel.render(part)) <= limit)
        # A message in which nothing shows, such as an empty fence, is taken by no platform.
        return [part for part in parts if render(part, PLAIN).strip()]

    def route(self, message: Message, is_first: bool) -> Json:
        """Return the route for a part of an answer, with whether to quote the message."""
        mode = self.settings["replyToMode"]
        is_reply = message.kind != "direct" and (mode == "all" or mode == "first" and is_first)
        return {**message.route, "is_reply": is_reply}

    def out_rows(
        self, message: Message, parts: list[str], used: int = 0, *, is_begun: bool = False
    ) -> list[OutRow]:
        """Return the parts of an answer for the outbox. Parts beyond the platform's budget for one
        message, of which `used` are spent, are held."""
        rows = [OutRow(text, self.route(message, number == 0 and not is_begun))
                for number, text in enumerate(parts)]
        allowed = max(1, self.account.row.budget - 1 - used)
        if not self.account.row.budget or len(rows) <= allowed:
            return rows
        last = rows[allowed - 1]
        held = [row._replace(status="held") for row in rows[allowed:]]
        return [*rows[:allowed - 1], last._replace(text=f"{last.text}\n\n{_MORE}"), *held]


def lane_of(account: Account, message: Message) -> str:
    """Return the lane of a message. It is also the name of the lane's first session."""
    if message.kind == "direct":
        return f"{account.id}:{message.chat}"
    by_sender = account.settings.get("groupSessionScope") == "group_sender"
    return f"{account.id}:{message.kind}:{message.chat}" + f":{message.sender}" * by_sender


class Loop:
    """A loop that does what is due, in the thread that calls `run`."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._wake, self._is_over = threading.Event(), threading.Event()

    def nudge(self) -> None:
        """Check now for what is due."""
        self._wake.set()

    def end(self) -> None:
        """Make `run` return after its current work."""
        self._is_over.set()
        self._wake.set()

    def run(self) -> None:
        """Work until the end."""
        while not self._is_over.is_set():
            try:
                wait_s = self._do_due()
            except Exception as problem:  # Nothing may end a loop on which every answer depends.
                self._log.event("error", f"{type(self).__name__} failed", why=problem)
                wait_s = _RETRY_TURN_S
            self._wake.wait(wait_s)
            self._wake.clear()

    def _do_due(self) -> float:
        """Do what is due, and return the seconds until the next check."""
        raise NotImplementedError


class Sender(Loop):
    """Sends one account's outbox: in order within each chat, at the platform's pace."""

    def __init__(self, live: LiveAccount) -> None:
        super().__init__(live.shared.log)
        self._live, self._store = live, live.shared.store
        #: Parts that were sent but could not be marked as sent yet.
        self._unmarked: set[int] = set()
        #: When the next part may be sent, by chat, in time.monotonic.
        self._pace_s: dict[str, float] = {}

    def _do_due(self) -> float:
        if self._live.status not in SENDING_STATES:
            return 1.0
        wait_s = 60.0
        for row in self._store.next_out(self._live.id):
            now_s = time.monotonic()
            pause_s = row["due_s"] - time.time()
            # A longer pause was set while the clock was wrong.
            due_s = max(pause_s if pause_s <= _MAX_RETRY_PAUSE_S else 0.0,
                        self._live.hold_until_s - now_s,
                        self._pace_s.get(row["chat"], 0.0) - now_s)
            if due_s <= 0 and not self._is_over.is_set():
                self._send(row)
            wait_s = max(0.0, min(wait_s, due_s))
        return wait_s

    def _send(self, row: sqlite3.Row) -> None:
        channel = self._live.channel
        if row["id"] not in self._unmarked:
            self._store.set_out(row["id"], "sending")
            part = Part(row["text"], bool(row["is_last"]), row["nonce"], bool(row["is_plain"]))
            try:
                route = json.loads(row["route"])
                if row["edit_id"]:
                    channel.edit(route, row["edit_id"], part)
                else:
                    channel.send(route, part)
            except Exception as problem:  # A fault of one channel must not end the sender.
                self._failed(row, problem if isinstance(problem, SendFailed) else SendFailed(
                    "later", f"{type(problem).__name__}: {problem}"))
                return
            self._unmarked.add(row["id"])
            now_s = time.monotonic()
            self._pace_s = {chat: s for chat, s in self._pace_s.items() if s > now_s}
            self._pace_s[row["chat"]] = now_s + self._live.account.row.pace_s
        self._store.set_out(row["id"], "sent")
        self._unmarked.discard(row["id"])

    def _failed(self, row: sqlite3.Row, failed: SendFailed) -> None:
        """Reschedule or give up a part that was not sent, by the kind of failure."""
        store, kind = self._store, failed.kind
        self._live.log("warning", "not sent", part=row["id"], kind=kind, why=failed)
        if kind == "wait":
            self._live.hold(failed.after_s)
            # After the others: one chat that always has to wait must not hold them up for good.
            due_s = time.time() + max(_MIN_HOLD_S, failed.after_s) + _AFTER_OTHERS_S
            store.set_out(row["id"], "pending", due_s, str(failed))
        elif kind == "held":
            store.run("UPDATE outbox SET status='held' WHERE account=? AND chat=? AND id>=? AND"
                      " status IN ('pending','sending')", row["account"], row["chat"], row["id"])
        elif kind == "plain" and not row["is_plain"]:
            store.run("UPDATE outbox SET is_plain=1 WHERE id=?", row["id"])
        elif row["edit_id"] and kind == "never":
            # The preview is gone: send the text as a new message.
            store.run("UPDATE outbox SET edit_id='' WHERE id=?", row["id"])
        elif kind == "later" and time.time() - row["at_s"] < _GIVE_UP_S:
            usual_s = _RETRY_PAUSES_S[min(row["attempts"], len(_RETRY_PAUSES_S) - 1)]
            pause_s = min(failed.after_s or usual_s, _MAX_RETRY_PAUSE_S)
            store.set_out(row["id"], "pending", time.time() + pause_s, str(failed))
        else:
            store.set_out(row["id"], "dead", 0.0, str(failed))


class Lanes(Loop):
    """Runs turns: one per lane at a time, at most `most` in all, the oldest message first."""

    def __init__(self, store: Store, log: Log, most: int, accounts: dict[str, LiveAccount]) -> None:
        """`accounts` are the running accounts by id; the app updates the dict."""
        super().__init__(log)
        self._store, self._most, self.accounts = store, most, accounts
        # Guards the fields below. Never held while the store is used.
        self._lock = threading.Lock()
        self._running: dict[str, Turn] = {}
        #: Until when a lane waits for a following message, by time.monotonic.
        self._quiet_s: dict[str, float] = {}

    def nudge(self, lane: str = "", quiet_s: float = 0.0) -> None:
        """Check a lane after it has been quiet for `quiet_s`."""
        with self._lock:
            self._quiet_s[lane] = time.monotonic() + quiet_s
        self._wake.set()

    def stop(self, lane: str) -> set[int]:
        """Stop the turn that runs in a lane, and return the ids of the messages it answers."""
        with self._lock:
            turn = self._running.get(lane)
        if turn is None:
            return set()
        turn.end("stopped")
        return set(turn.ids)

    def count(self) -> int:
        """Return how many turns run."""
        with self._lock:
            return len(self._running)

    def _do_due(self) -> float:
        wait_s, lanes = 60.0, self._store.open_lanes()
        with self._lock:
            # Of a lane in which nothing waits any more nothing has to be known.
            open_now = {lane for lane, _ in lanes}
            now_s = time.monotonic()
            self._quiet_s = {lane: s for lane, s in self._quiet_s.items()
                             if lane in open_now or s > now_s}
        for lane, account in lanes:
            live = self.accounts.get(account)
            with self._lock:
                if self._is_over.is_set() or len(self._running) >= self._most:
                    return wait_s
                if live is None or live.stop.is_set() or lane in self._running:
                    continue
                due_s = self._quiet_s.get(lane, 0.0) - time.monotonic()
            if due_s > 0:
                wait_s = min(wait_s, due_s)
                continue
            try:
                self._begin(live, lane)
            except Exception as problem:  # A fault in one lane must not hold up the others.
                self._failed(lane, problem)
                wait_s = min(wait_s, _RETRY_TURN_S)
        return wait_s

    def _begin(self, live: LiveAccount, lane: str) -> None:
        """Begin the turn that is due in a lane."""
        batch = batch_of(self._store.waiting(lane))
        if not batch:
            return
        turn = Turn(live, lane, batch)
        with self._lock:
            self._running[lane] = turn
            self._quiet_s.pop(lane, None)
        try:
            threading.Thread(target=self._run, args=(lane, turn), name="turn", daemon=True).start()
        except RuntimeError:
            # The machine has no thread left.
            with self._lock:
                del self._running[lane]
            raise

    def _failed(self, lane: str, problem: Exception) -> None:
        """Log that a turn failed, and let the lane be looked at again after a while."""
        self._log.event("error", "a turn failed", lane=lane, kind=type(problem).__name__,
                        why=problem)
        self.nudge(lane, _RETRY_TURN_S)

    def _run(self, lane: str, turn: Turn) -> None:
        try:
            turn.run()
        except Exception as problem:  # A fault in one turn must not end the others.
            self._failed(lane, problem)
        finally:
            with self._lock:
                del self._running[lane]
            self._wake.set()
        turn.type_until_called()

    def close(self, drain_s: float) -> None:
        """Start no more turns, wait `drain_s` for the running ones, and cut the rest: their
        questions are asked again at the next start."""
        self.end()
        self._wait_for_turns(drain_s)
        with self._lock:
            turns = list(self._running.values())
        for turn in turns:
            turn.end("abandoned")
        self._wait_for_turns(2.0)

    def _wait_for_turns(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while self.count() and time.monotonic() < until_s:
            time.sleep(0.02)


def batch_of(rows: list[sqlite3.Row]) -> list[tuple[sqlite3.Row, Message]]:
    """Return the messages that one turn answers: a single command, else all messages before the
    next command. Messages that were asked before are repeated without newer ones."""
    batch: list[tuple[sqlite3.Row, Message]] = []
    size = 0
    for row in rows[:_MAX_MERGED]:
        message = message_of(row["message"])
        is_command = command_of(message) is not None
        size += len(message.text)
        is_other = row["attempts"] != rows[0]["attempts"]
        if batch and (is_command or is_other or size > _MAX_MERGED_CHARS):
            break
        batch.append((row, message))
        if is_command:
            break
    return batch


class Growth:
    """How an unfinished answer is shown. This base class waits until the answer is complete."""

    def __init__(self, turn: Turn) -> None:
        self._turn, self._live = turn, turn.live

    def due_s(self, text: str) -> float:
        """Return when to show the text so far, by time.monotonic."""
        return math.inf

    def show(self, text: str) -> None:
        """Show the text so far."""

    def rest(self, text: str) -> list[OutRow]:
        """Return the parts still to be sent for the whole text."""
        return self._turn.out_rows(self._live.split(text))


class Edits(Growth):
    """An answer in messages that are edited as it grows; the last edit is the final text."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn)
        row = self._live.account.row
        is_direct = turn.message.kind == "direct"
        self._every_s = row.edit_every_s if is_direct else row.edit_every_in_groups_s
        self._due_s = time.monotonic() + _PREVIEW_AFTER_S
        #: Id and text of each message already shown, also from before a restart.
        self._shown: list[list[str]] = turn.progress.get("shown", [])
        self._nonce = secrets.token_hex(10)

    def due_s(self, text: str) -> float:
        """Return when the next edit is allowed."""
        return max(self._due_s, self._live.hold_until_s)

    def show(self, text: str) -> None:
        """Edit the last message, or begin the next one."""
        is_short = len(text) < _PREVIEW_CHARS and not self._shown
        if is_short or self._turn.has_parts_waiting():
            self._due_s = time.monotonic() + 0.1
            return
        self._due_s = time.monotonic() + self._every_s
        self._every_s = min(self._every_s * _PREVIEW_GROWTH, _MAX_PREVIEW_S)
        for place, part in enumerate(self._live.split(text)):
            if place >= len(self._shown) or self._shown[place][1] != part:
                self._show_part(place, part)
                return

    def _show_part(self, place: int, text: str) -> None:
        route = self._live.route(self._turn.message, place == 0)
        part = Part(text, False, f"{self._nonce}{place:x}"[:25])
        try:
            if place < len(self._shown):
                self._live.channel.edit(route, self._shown[place][0], part)
                self._shown[place][1] = text
            else:
                self._shown.append([self._live.channel.send(route, part), text])
                self._turn.keep_progress(shown=self._shown)
        except Exception as problem:
            # Ignore the failure: the outbox sends the final text, with retries.
            if isinstance(problem, SendFailed) and problem.kind == "wait":
                self._live.hold(problem.after_s)
            else:
                self._due_s = math.inf

    def rest(self, text: str) -> list[OutRow]:
        """Return the final edits, and the parts not shown yet."""
        rows = super().rest(text)
        edits = [row._replace(edit_id=shown[0]) for row, shown in zip(rows, self._shown)
                 if shown[1] != row.text]
        # The answer that was begun before a restart may have been longer.
        over = [OutRow(_WITHDRAWN, self._live.route(self._turn.message, False), shown[0])
                for shown in self._shown[len(rows):] if shown[1] != _WITHDRAWN]
        return edits + over + rows[len(self._shown):]


class Blocks(Growth):
    """An answer in paragraphs, for platforms whose messages cannot be edited."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn)
        budget = self._live.account.row.budget
        #: How many messages may be sent before the end of the answer.
        self._left = budget - 2 - turn.released if budget else math.inf
        #: How many characters are in the outbox, and in how many messages.
        self._given = self._sent = 0
        #: How much has arrived, where its last complete paragraph ends, when to send a short one.
        self._seen, self._end, self._old_s = 0, 0, math.inf

    def due_s(self, text: str) -> float:
        """Return when the next block is due: when it is large, or after a silence."""
        if len(text) > self._seen:
            if "\n\n" in text[max(self._given, self._seen - 1):]:
                self._end = self._whole_end(text)
            self._seen, self._old_s = len(text), time.monotonic() + _BLOCK_SILENCE_S
        if self._end == self._given:
            return math.inf
        return 0.0 if self._end - self._given >= _BLOCK_CHARS else self._old_s

    def _whole_end(self, text: str) -> int:
        """Return the end of the last complete paragraph that is not inside a fence."""
        end = text.rfind("\n\n", self._given)
        while end > self._given and _open_fence(text[:end]) is not None:
            end = text.rfind("\n\n", self._given, end)
        return max(end, self._given)

    def show(self, text: str) -> None:
        """Put the complete paragraphs into the outbox."""
        parts = self._live.split(text[self._given:self._end])
        if self._sent + len(parts) <= self._left:
            self._turn.put_block(parts)
            self._given, self._sent = self._end, self._sent + len(parts)
        else:
            self._left, self._end = 0, self._given

    def rest(self, text: str) -> list[OutRow]:
        """Return the parts after the blocks."""
        return self._turn.out_rows(self._live.split(text[self._given:]), self._sent)


class Turn:
    """One turn: the answer to one message, or to several that came together."""

    def __init__(self, live: LiveAccount, lane: str,
                 batch: list[tuple[sqlite3.Row, Message]]) -> None:
        self.live, self.lane, self.store = live, lane, live.shared.store
        self._rows, self._messages = [row for row, _ in batch], [each for _, each in batch]
        self.ids = [row["id"] for row in self._rows]
        #: The newest of the messages, to which the answer is addressed.
        self.message = self._messages[-1]
        #: What the person had seen before a restart.
        self.progress: Json = json.loads(self._rows[0]["progress"])
        self.session, model = self.store.lane(lane)
        self.model = model or str(live.settings["model"])
        self._answering: Optional[Answering] = None
        #: "stopped" by the person, "abandoned" when the program ends, else empty.
        self._ended = ""
        #: A remark before the answer, and the answer.
        self._lead = self._text = ""
        #: How many held parts of an older answer this message has released.
        self.released = 0
        #: The hash of the callback token, and whether a callback is awaited.
        self._token, self._is_awaited = "", False

    def is_owner(self) -> bool:
        """Return whether the account's owner is asking in a direct chat."""
        return self.message.kind == "direct" and self.live.shared.access.is_owner(
            self.live.id, self.message.sender)

    def end(self, how: str) -> None:
        """End it from another thread: "stopped" or "abandoned"."""
        self._ended = how
        if self._answering is not None:
            self._answering.cut()

    def run(self) -> None:
        """Answer. Raises OSError if the database fails."""
        command = command_of(self.message)
        attempts = max(row["attempts"] for row in self._rows)
        if command is not None:
            self._finish(self.out_rows(self.live.split(command[0].run(self, command[1]))))
        elif attempts >= _MAX_ATTEMPTS or self.progress.get("blocks"):
            self._finish(self.out_rows(["I was interrupted; please send that again."]))
        elif sum(self.store.run("UPDATE inbox SET attempts=attempts+1 WHERE id=? AND NOT is_done",
                                each) for each in self.ids):
            self.released, _ = self.release(2)
            try:
                self._answer()
            finally:
                self._type(is_over=True)
        self.live.nudge()

    def release(self, spared: int) -> tuple[int, int]:
        """Release held parts to this message's route, and keep `spared` of its budget. Returns how
        many go, and how many stay held."""
        budget = self.live.account.row.budget
        most = max(1, budget - spared) if budget else 1000
        with self.store.transaction():
            found = self.store.release_held(self.live.id, self.message.chat,
                                            self.live.route(self.message, False), most,
                                            f"\n\n{_MORE}")
        self.live.nudge()
        return found

    def _answer(self) -> None:
        """Ask the agent, and put its answer into the outbox."""
        content = self._content()
        growth = self._growth()
        try:
            content = self._ask(content, growth)
            reply = self._text.rstrip() if render(self._text, PLAIN).strip() else (
                "I have nothing to say to that.")
        except AgentFailed as failed:
            reply = "" if self._ended else self._failure(failed)
            # An unanswered question is not remembered.
            content = content if self._text or self._ended else None
        if self._ended == "abandoned":
            # The messages stay in the inbox, and are asked again at the next start.
            return
        has_failed = content is None
        self._is_awaited = bool(self._token) and not (self._ended or has_failed or self._text)
        is_silent = self._ended or self._is_awaited or self._text.strip() in SILENT_ANSWERS
        self._finish([] if is_silent else growth.rest(self._lead + reply), content)

    def _failure(self, failed: AgentFailed) -> str:
        """Log a failure, and return the reply for the person."""
        reference = secrets.token_hex(3)
        self.live.log("error", "the agent failed", ref=reference, code=failed.code,
                      status=failed.status or "", why=failed)
        if self._text:
            return f"{self._text}\n\n(cut off, {reference})"
        return failure_text(failed, self.model, reference, is_owner=self.is_owner())

    def _growth(self) -> Growth:
        can_edit = self.live.account.row.can_edit
        mode = self.live.settings["streaming"] or "edit"
        if mode == "off" or self.live.settings["async"]:
            return Growth(self)
        return Edits(self) if mode == "edit" and can_edit else Blocks(self)

    def _ask(self, content: object, growth: Growth) -> object:
        """Ask; after a failure retry with a shorter history or without files, if that can help.
        Returns the content that was asked. Raises AgentFailed."""
        tried = {""}
        while True:
            try:
                if not self._ended:
                    self._listen(self._question(content), growth)
                return content
            except AgentFailed as failed:
                is_long = failed.code == "context_length_exceeded"
                has_files = failed.status in (400, 413, 422) and isinstance(content, list)
                form = "shorter" if is_long else "bare" if has_files else ""
                if self._text or self._ended or form in tried:
                    raise
                tried.add(form)
                if form == "shorter":
                    self._forget_half()
                else:
                    self._lead = "(I could not read the attachment.)\n\n"
                    content = text_of(content)

    def _listen(self, question: Question, growth: Growth) -> None:
        """Receive the answer, and meanwhile show it and "typing". Raises AgentFailed."""
        row, now_s, self._text = self.live.account.row, time.monotonic(), ""
        typing_s = now_s + _TYPING_DELAY_S * bool(row.budget) if row.typing_every_s else math.inf
        notice_s = now_s + _NOTICE_S if self.live.settings["notice"] else math.inf
        end_s = now_s + question.timeout_s if question.timeout_s else math.inf
        answering = self._answering = Answering(self.live.http, question)
        while not self._ended:
            now_s = time.monotonic()
            if now_s >= end_s:
                answering.cut()
                raise AgentFailed("timeout", "It took too long.")
            if now_s >= typing_s:
                self._type()
                typing_s = now_s + row.typing_every_s
            if now_s >= notice_s:
                self.live.say(self.message, "I am still working on it.")
                self.live.nudge()
                notice_s = math.inf
            shown = self._lead + self._text
            if self._text and now_s >= growth.due_s(shown):
                growth.show(encodable(shown))
            growth_s = growth.due_s(shown) if self._text else math.inf
            due_s = min(typing_s, notice_s, end_s, growth_s, now_s + 3600.0)
            text = answering.next(due_s - time.monotonic())
            if text is None:
                self._text = encodable(self._text)
                return
            self._text += text
            if _SURROGATE.search(text):
                # Keep a lone surrogate: its other half may be in the next event.
                self._text = encodable(self._text, "surrogatepass")
        answering.cut()

    def _type(self, *, is_over: bool = False) -> None:
        # A failure of "typing" must not prevent the answer.
        with contextlib.suppress(Exception):
            is_held = time.monotonic() < self.live.hold_until_s
            if self.live.account.row.typing_every_s and (is_over or not is_held):
                self._type_or_hold(is_over)

    def _type_or_hold(self, is_over: bool) -> None:
        try:
            self.live.channel.type(self.message.route, is_over)
        except SendFailed as failed:
            if failed.kind == "wait":
                self.live.hold(failed.after_s)

    def type_until_called(self) -> None:
        """Show "typing" while a callback is awaited."""
        row, until_s = self.live.account.row, time.monotonic() + _AWAITED_TYPING_S
        if not row.typing_every_s or row.budget or not self._is_awaited:
            return
        with contextlib.suppress(OSError):
            while time.monotonic() < until_s and self.live.shared.callbacks.is_open(self._token):
                self._type()
                if self.live.stop.wait(row.typing_every_s):
                    return

    # -- the question -----------------------------------------------------------------------------

    def _question(self, content: object) -> Question:
        """Return the request for chat completions."""
        settings, headers = self.live.settings, {}
        messages: list[Json] = []
        if settings["systemPrompt"]:
            messages.append({"role": "system", "content": settings["systemPrompt"]})
        if settings["memory"] == "gateway":
            messages += self._remembered()
        messages.append({"role": "user", "content": content})
        body: Json = {"model": self.model, "messages": messages, "stream": not settings["async"],
                      "user": self.session}
        if settings["memory"] == "session":
            body["session_id"] = self.session
        if settings["async"]:
            headers["X-OCG-Callback"], self._token = self.live.shared.callbacks.new(
                self.live.id, self.ids[0], self.session, self.message)
        self.live.shared.log.line("info", f"   \u2192 {self.model} @ {settings['agentUrl']}")
        return Question(settings["agentUrl"], settings["apiKey"], body,
                        float(settings["agentTimeout"]), headers, bool(settings["async"]))

    def _remembered(self) -> list[Json]:
        """Return the conversation so far, without its older half if it has grown too long."""
        settings, history = self.live.settings, self.store.history(self.session)
        size = sum(len(text_of(message["content"])) for _, message in history)
        if len(history) > settings["historyMessages"] or size > settings["historyChars"]:
            self._forget_half()
            history = self.store.history(self.session)
        keep = _KEPT_FILES
        for number, message in reversed(history):
            content = message["content"]
            if isinstance(content, list):
                message["content"], keep = without_files(content, keep)
                if message["content"] != content:
                    self.store.run("UPDATE history SET content=? WHERE id=?",
                                   compact(message["content"]), number)
        return [message for _, message in history]

    def _forget_half(self) -> None:
        history = self.store.history(self.session)
        later = [number for number, message in history[(len(history) + 1) // 2:]
                 if message["role"] == "user"]
        self.store.run("DELETE FROM history WHERE session=? AND id<?", self.session,
                       later[0] if later else 1 << 62)

    def _content(self) -> object:
        """Return the content of the user message: a string, or content parts if there are files."""
        texts: list[str] = []
        files: list[Json] = []
        for message in self._messages:
            texts += said(message)
            for attachment in message.attachments:
                images = sum(part["type"] == "image_url" for part in files)
                part = self._attached(attachment, images)
                if part["type"] == "text":
                    texts.append(part["text"])
                else:
                    files.append(part)
        text = "\n\n".join(filter(None, texts))
        return [{"type": "text", "text": text or "(no text)"}, *files] if files else text

    def _attached(self, attachment: Attachment, images: int) -> Json:
        """Return an attachment as a content part; a name and reason for one that is not read."""
        most = _MAX_IMAGE_BYTES if attachment.kind == "image" else _MAX_PDF_BYTES
        try:
            if not self.live.settings["attachments"]:
                raise ValueError("attachments are turned off")
            is_one_too_many = attachment.kind == "image" and images >= _MAX_IMAGES
            if attachment.size_bytes > most or is_one_too_many:
                raise ValueError("too large, or too many")
            return attachment_part(attachment, self.live.channel.fetch(attachment, most))
        except Exception as problem:  # A file that cannot be fetched must not block the question.
            size = f"{attachment.size_bytes / 1e6:.1f} MB, " if attachment.size_bytes else ""
            name = clean(attachment.name)[:100]
            text = f"[{attachment.kind}: {name}, {size}not read: {clean(problem)}]"
            return {"type": "text", "text": text}

    # -- the answer -------------------------------------------------------------------------------

    def out_rows(self, parts: list[str], used: int = 0) -> list[OutRow]:
        """Return parts for the outbox; those beyond the platform's budget are held."""
        return self.live.out_rows(self.message, parts, used + self.released, is_begun=used > 0)

    def put_block(self, parts: list[str]) -> None:
        """Put complete paragraphs of an unfinished answer into the outbox."""
        count = self.progress.get("blocks", 0)
        with self.store.transaction():
            rows = [OutRow(text, self.live.route(self.message, not count)) for text in parts]
            self.store.put_out(self.live.id, self.message.chat, self.ids[0], rows)
            self.keep_progress(blocks=count + len(parts))
        self.live.nudge()

    def has_parts_waiting(self) -> bool:
        """Return whether this chat still has unsent parts."""
        return bool(self.store.rows("SELECT 1 FROM outbox WHERE account=? AND chat=? AND status IN"
                                    " ('pending','sending') LIMIT 1", self.live.id,
                                    self.message.chat))

    def keep_progress(self, **progress: object) -> None:
        """Save what the person has seen, for a restart after a kill."""
        self.progress.update(progress)
        self.store.run("UPDATE inbox SET progress=? WHERE id=?", compact(self.progress),
                       self.ids[0])

    def _finish(self, rows: list[OutRow], content: object = None) -> None:
        """Save the parts and the conversation, and finish the messages, in one transaction."""
        answer = f"{self._text} [stopped]".strip() if self._ended else self._text.strip()
        with self.store.transaction():
            self.store.put_out(self.live.id, self.message.chat, self.ids[0], rows)
            if content is not None and self.live.settings["memory"] == "gateway":
                # The callback may arrive before the answer to the request that asked the question.
                is_called = self._is_awaited and not self.live.shared.callbacks.is_open(self._token)
                self.store.remember_question(self.session, content, is_answered=is_called)
                if answer:
                    self.store.remember(self.session, "assistant", answer)
            if self._token and not self._is_awaited:
                self.live.shared.callbacks.drop(self._token)
            self.store.finish(self.ids)
        if rows or self._text:
            self.live.shared.log.message(
                f"\U0001f4e4 [OUT] {len(self._text)} chars, {len(rows)} blocks", "Text", self._text)


def said(message: Message) -> list[str]:
    """Return a message's texts: its quotation, and its text, in a group with the sender's name."""
    quoted = message.quoted.strip()[:_MAX_QUOTED_CHARS]
    quote = "\n".join(f"> {line}" for line in quoted.splitlines())
    name = f"[{clean(message.sender_name)[:80]}]: " if message.kind != "direct" else ""
    return [quote, f"{name}{message.text}" if message.text or name else ""]


def without_files(parts: list[Json], keep: int) -> tuple[list[Json], int]:
    """Return parts with all but the last `keep` files replaced by names, and what is left of
    `keep`."""
    left: list[Json] = []
    for part in reversed(parts):
        is_file = part.get("type") != "text"
        name = "[photo]" if part.get("type") == "image_url" else "[file]"
        left.append({"type": "text", "text": name} if is_file and not keep else part)
        keep -= is_file and keep > 0
    return left[::-1], keep


# -- commands in the chat -------------------------------------------------------------------------


class ChatCommand(NamedTuple):
    """A command in a chat."""

    #: All its names, in several languages.
    names: tuple[str, ...]
    about: str
    #: Takes the turn and the argument, and returns the answer.
    run: Callable[[Turn, str], str]
    takes_argument: bool = False
    #: Whether it runs on arrival instead of waiting in its lane.
    is_at_once: bool = False


def say_new(turn: Turn, argument: str) -> str:
    """Begin a new conversation, and forget the old one."""
    turn.store.run("DELETE FROM history WHERE session=?", turn.session)
    turn.store.run("INSERT INTO lanes (lane, number) VALUES (?,2) ON CONFLICT (lane) DO UPDATE SET"
                   " number=number+1", turn.lane)
    return "A new conversation begins."


def say_model(turn: Turn, argument: str) -> str:
    """Show the models, or choose one."""
    settings, names = turn.live.settings, list(turn.live.settings["models"])
    if not names:
        with contextlib.suppress(NetworkFailed, ValueError):
            names = models_of(turn.live.http, settings["agentUrl"], settings["apiKey"])
    available = f"Available: {', '.join(names) or 'unknown'}"
    if not argument:
        return f"Model: {turn.model}\n\n{available}"
    if names and argument not in names:
        return f'There is no model "{clean(argument)}". {available}'
    turn.store.run("INSERT INTO lanes (lane, model) VALUES (?,?) ON CONFLICT (lane) DO UPDATE SET"
                   " model=excluded.model", turn.lane, argument)
    return f"Model: {argument}"


def say_status(turn: Turn, argument: str) -> str:
    """Show the status of the conversation; to the owner also that of the account."""
    live, store = turn.live, turn.store
    lines = [f"Model: {turn.model}", f"Messages remembered: {len(store.history(turn.session))}"]
    if turn.is_owner():
        counts = store.counts_out(live.id)
        lines += [f"Agent: {live.settings['agentUrl']}", f"Account: {live.id}",
                  *(f"Parts {status}: {counts[status]}" for status in counts if status != "sent"),
                  *(f"Not answered, {reason}: {count}" for reason, count in live.dropped.items())]
    return "\n".join(f"- {line}" for line in lines)


CHAT_COMMANDS: tuple[ChatCommand, ...] = (
    ChatCommand(("/new", "/reset", "/clear", "\u65b0\u5bf9\u8bdd", "\u65b0\u4f1a\u8bdd",
                 "\u91cd\u65b0\u5f00\u59cb", "\u6e05\u7a7a"),
                "begin a new conversation", say_new),
    ChatCommand(("/stop", "\u505c\u6b62"), "stop the answer", lambda turn, argument: "",
                is_at_once=True),
    ChatCommand(("/model",), "show the models, or choose one: /model NAME", say_model, True),
    ChatCommand(("/more",), "send the rest of the last answer", lambda turn, argument: (
        "" if turn.release(1)[0] else "There is nothing more.")),
    ChatCommand(("/status",), "show the status", say_status),
    ChatCommand(("/help", "/start"), "show this list", lambda turn, argument: "\n".join(
        f"{each.names[0]}: {each.about}" for each in CHAT_COMMANDS)),
    ChatCommand(("/whoami",), "show your id, for the owner's settings", lambda turn, argument: (
        f"Your id is {turn.message.sender}. This conversation is {turn.session}.")),
)


def command_of(message: Message) -> Optional[tuple[ChatCommand, str]]:
    """Return the command and its argument if the message is one; in a group only with a mention."""
    if message.attachments or message.kind != "direct" and not message.is_mentioned:
        return None
    name, _, argument = message.text.strip().partition(" ")
    for command in CHAT_COMMANDS:
        if name.lower() in command.names and (command.takes_argument or not argument.strip()):
            return command, argument.strip()
    return None


# ==== 21. App ================================================================
# Owns every long-lived object. Each account has a thread that receives and one that sends; a
# socket in OCP's folder lets commands of other processes control the gateway.

_BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
#: A connection that lasted this long resets the backoff.
_HEALTHY_S = 60.0
_DRAIN_S = 20.0
#: How long to wait for the threads of a stopped account, and for all threads at shutdown.
_JOIN_S, _LAST_JOIN_S = 5.0, 10.0
_TEND_S, _SWEEP_S = 10.0, 3600.0
_SOCKET_TIMEOUT_S = 60.0
#: The gateway's files in OCP's folder.
DATABASE, LOCK, SOCKET, LOG = "channels.db", "channels.lock", "channels.sock", "channels.log"


class App:
    """The gateway."""

    def __init__(
        self, home: str, load: Callable[[], Settings], log: Log, environ: Mapping[str, str]
    ) -> None:
        """`load` reads the settings, also again later. Raises SettingsError, OSError, and Problem
        if a gateway already runs in the folder."""
        self._home, self._load, self._log = home, load, log
        self.settings = load()
        descriptor = os.open(os.path.join(home, LOCK), os.O_RDWR | os.O_CREAT, 0o600)
        self._lock_file = os.fdopen(descriptor, "a")
        if not lock(self._lock_file):
            self._lock_file.close()
            raise Problem(Exit.FAILED, f"A gateway runs already; see `{PROGRAM} status`.")
        try:
            self._store = Store(os.path.join(home, DATABASE))
        except OSError:
            self._lock_file.close()
            raise
        running: dict[str, LiveAccount] = {}
        self.lanes = Lanes(self._store, log, self.settings.top["maxTurns"], running)
        self._callbacks = Callbacks(self._store, log, self.settings.top, running)
        self._shared = Shared(self._store, Access(self._store), log, environ, self._callbacks)
        #: All accounts by id, running or not; and below their threads: receiver, sender.
        self._accounts: dict[str, LiveAccount] = {}
        # Guards starting and stopping of accounts.
        self._change = threading.Lock()
        self._threads: dict[str, list[threading.Thread]] = {}
        self.is_over = threading.Event()
        self._started_s = time.time()

    # -- life -------------------------------------------------------------------------------------

    def run(self, only: str = "") -> None:
        """Serve until `is_over` is set. `only` is the channel to start, empty = all. Raises
        Problem."""
        control = Control(os.path.join(self._home, SOCKET), self.perform)
        try:
            spawn(self.lanes.run)
            self.start_accounts(only, "")
            spawn(control.run)
            self._tend()
        finally:
            control.end()
            self._close()

    def _tend(self) -> None:
        """Do periodic work until the end."""
        sweep_s = 0.0
        while not self.is_over.wait(_TEND_S if sweep_s else 0.0):
            try:
                self._callbacks.expire()
                if time.monotonic() >= sweep_s:
                    sweep_s = time.monotonic() + _SWEEP_S
                    self._store.sweep()
            except Exception as problem:  # Answers do not depend on this work.
                sweep_s = time.monotonic() + _SWEEP_S
                self._log.event("error", "cannot clean up", why=problem)

    def _close(self) -> None:
        """Stop receiving, let turns finish, send what is in the outbox, and close."""
        live_accounts = list(self._accounts.values())
        for live in live_accounts:
            live.end()
        self.lanes.close(_DRAIN_S)
        until_s = time.monotonic() + 3.0
        while time.monotonic() < until_s and any(
                self._store.next_out(live.id) for live in live_accounts
                if live.status in SENDING_STATES):
            time.sleep(0.05)
        for live in live_accounts:
            live.sender.end()
        # A part being sent must be marked as sent, or it is sent again at the next start.
        until_s = time.monotonic() + _LAST_JOIN_S
        for threads in self._threads.values():
            threads[1].join(max(0.0, until_s - time.monotonic()))
        for threads in self._threads.values():
            threads[0].join(2.0)
        self._callbacks.close()
        for live in live_accounts:
            live.http.close()
        self._store.close()
        self._lock_file.close()

    # -- accounts ---------------------------------------------------------------------------------

    def start_accounts(self, channel: str, account: str) -> list[str]:
        """Read the settings again and start the chosen accounts that are not running; empty = all.
        Returns their ids. Raises SettingsError, Problem."""
        with self._change:
            self.settings = self._load()
            known = {each.id for each in self.settings.accounts}
            for name in [each for each in self._accounts if each not in known]:
                if self._accounts[name].stop.is_set():
                    del self._accounts[name]
            self._listen(self.settings)
            return [each.id for each in self.settings.accounts
                    if is_chosen(each, channel, account) and self._start(each)]

    def _listen(self, settings: Settings) -> None:
        """Listen for callbacks if an account wants them. Raises Problem."""
        if any(each.settings["async"] for each in settings.accounts):
            self._callbacks.start()

    def _start(self, account: Account) -> bool:
        old = self._accounts.get(account.id)
        if old is not None and not old.stop.is_set():
            return False
        self._log.hide([str(account.settings[key]) for key in account.row.credentials])
        self._log.hide([account.settings["apiKey"], self.settings.top["callbackSecret"]])
        try:
            live = LiveAccount(account, self._shared, self.lanes)
        except Exception as problem:  # A fault in one channel must not end the others.
            self._log.event("error", f"{account.id} cannot be made", kind=type(problem).__name__,
                            why=problem)
            return False
        self._accounts[account.id] = live
        if account.missing or not account.is_enabled:
            lacking = "login needed" if account.row.has_login else "not configured"
            live.status = lacking if account.missing else "stopped"
            live.why = f"{', '.join(account.missing)} missing" if account.missing else "not enabled"
            live.stop.set()
            self._log.event("warning", f"{account.id} {live.status}", why=live.why)
            return False
        live.started_s = time.time()
        self.lanes.accounts[account.id] = live
        before = self._threads.get(account.id, [])[1:]

        def send() -> None:
            # Wait for the old sender: two senders would send the same part twice.
            for thread in before:
                thread.join()
            live.sender.run()

        self._threads[account.id] = [spawn(lambda: supervise(live)), spawn(send)]
        self.lanes.nudge()
        return True

    def stop_accounts(self, channel: str, account: str) -> list[str]:
        """Stop the chosen accounts that are running, and return their ids."""
        with self._change:
            chosen = [each for each in self._accounts.values()
                      if is_chosen(each.account, channel, account) and not each.stop.is_set()]
            for live in chosen:
                live.end()
                live.sender.end()
                live.status, live.why = "stopped", ""
                self.lanes.accounts.pop(live.id, None)
            for live in chosen:
                for thread in self._threads[live.id]:
                    thread.join(_JOIN_S)
                live.http.close()
            return [live.id for live in chosen]

    # -- requests of the control socket -----------------------------------------------------------

    def perform(self, request: Json) -> Json:
        """Carry out a request of the control socket, and return the answer."""
        action, channel, account = (
            str(request.get(key, "")) for key in ("do", "channel", "account"))
        if action == "status":
            return self.status(is_probing=bool(request.get("probe")))
        if action == "end":
            self.is_over.set()
            return {"pid": os.getpid()}
        if action == "nudge":
            for live in list(self._accounts.values()):
                live.nudge()
            return {}
        if action not in ("start", "stop", "restart"):
            return {"error": "The running gateway does not know this command: restart it."}
        try:
            if action == "restart":
                # Invalid settings must not stop what is running.
                self._listen(self._load())
            stopped = self.stop_accounts(channel, account) if action != "start" else []
            started = self.start_accounts(channel, account) if action != "stop" else []
        except (SettingsError, Problem) as problem:
            return {"error": str(problem)}
        return {"started": started, "stopped": stopped}

    def status(self, *, is_probing: bool = False) -> Json:
        """Return the status of the gateway and its accounts."""
        channels = [self._status_of(live, is_probing) for live in list(self._accounts.values())]
        people = self._shared.access.people()
        return {
            "pid": os.getpid(), "version": VERSION, "settings": self.settings.path,
            "uptime": round(time.time() - self._started_s),
            "agentUrl": self.settings.top["agentUrl"], "model": self.settings.top["model"],
            "configured": len(channels), "turns": self.lanes.count(),
            "running": sum(each["status"] == "running" for each in channels),
            "pairing": [person["code"] for person in people if person["code"]],
            "channels": channels,
        }

    def _status_of(self, live: LiveAccount, is_probing: bool) -> Json:
        account, counts = live.account, self._store.counts_out(live.id)
        found: Json = {
            "id": account.row.id, "accountId": account.name, "status": live.status,
            "uptime": round(time.time() - live.started_s) if live.started_s else 0,
            "error": live.why, "note": live.word, "agentUrl": account.settings["agentUrl"],
            "lastInboundAt": live.last_inbound_s, "lastFrameAt": live.last_frame_s,
            "pending": counts.get("pending", 0) + counts.get("sending", 0),
            "held": counts.get("held", 0), "dead": counts.get("dead", 0),
            "dropped": dict(live.dropped), "origins": dict(account.origins),
        }
        if is_probing and not live.stop.is_set():
            try:
                found["bot"] = live.channel.probe()
            except (Fatal, Retry) as problem:
                found["error"] = found["error"] or str(problem)
        return found


def supervise(live: LiveAccount) -> None:
    """Keep a channel receiving until its account has to stop."""
    failures = 0
    while not live.stop.is_set():
        began_s, after_s, why = time.monotonic(), 0.0, "it ended"
        try:
            live.channel.run()
        except Fatal as fatal:
            live.status = "login needed" if fatal.needs_login else "failed"
            live.why = f"{fatal}: {fatal.fix}"
            live.log("error", live.status, why=live.why)
            live.stop.wait()
        except Retry as retry:
            why, after_s = str(retry), retry.after_s
        except Exception as problem:  # A fault in one channel must not end the others.
            why = f"{type(problem).__name__}: {problem}"
        if live.stop.is_set():
            return
        failures = 0 if time.monotonic() - began_s > _HEALTHY_S else failures
        pause_s = min(after_s or _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)], _DAY_S)
        failures += 1
        live.status, live.why = "retrying", clean(why)
        live.log("warning", "connection lost", why=why, again_in_s=round(pause_s, 1))
        live.stop.wait(pause_s)


def spawn(run: Callable[[], None]) -> threading.Thread:
    """Start a daemon thread, which does not keep the program alive, and return it."""
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def lock(file: TextIO) -> bool:
    """Lock a file until it is closed; return False if another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_chosen(account: Account, channel: str, name: str) -> bool:
    """Return whether an account matches a channel's id and an account's name; empty = any."""
    is_channel = channel in ("", account.row.id, *account.row.aliases)
    return is_channel and name in ("", account.name)


class Control:
    """The control socket of the gateway: one line of JSON in each direction."""

    def __init__(self, path: str, perform: Callable[[Json], Json]) -> None:
        """Listen, for this user only. The caller holds the lock, so an existing socket file is
        stale. Raises Problem."""
        self._path, self._perform = path, perform
        self._is_over = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        # Set the umask before bind: a chmod afterwards would leave a gap.
        mask = os.umask(0o177)
        try:
            self._socket.bind(path)
            self._socket.listen(16)
        except OSError as problem:
            self._socket.close()
            raise Problem(Exit.USAGE, f"{path}: {reason_of(problem)}. Set OCP_HOME to another "
                          "or a shorter path.") from None
        finally:
            os.umask(mask)

    def run(self) -> None:
        """Answer requests until the end."""
        while not self._is_over.is_set():
            try:
                peer = self._socket.accept()[0]
                spawn(functools.partial(self._answer, peer))
            except (OSError, RuntimeError):
                # The machine has no descriptor or no thread left, or this is the end.
                self._is_over.wait(1.0)

    def _answer(self, peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError):
            peer.settimeout(_SOCKET_TIMEOUT_S)
            with peer.makefile("rb") as file:
                request = json_object(file.readline(65_536))
            try:
                answer = self._perform(request)
            except Exception as problem:  # Whoever waits has to be told.
                answer = {"error": f"The gateway cannot do that: {reason_of(problem)}"}
            peer.sendall(compact(answer).encode("ascii") + b"\n")

    def end(self) -> None:
        """Stop answering, and remove the socket."""
        self._is_over.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)


def ask_gateway(home: str, request: Json) -> Optional[Json]:
    """Return the running gateway's answer, None if no gateway is running."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_SOCKET_TIMEOUT_S)
        try:
            sock.connect(os.path.join(home, SOCKET))
            sock.sendall(compact(request).encode("ascii") + b"\n")
            with sock.makefile("rb") as file:
                return json_object(file.readline())
        except OSError:
            pass
    return None


# ==== 22. Plugins ============================================================
# A channel in the owner's own file: `API = 1`, and `def channel(api)` that returns a Row. It runs
# with all rights of this program, so a file is loaded only if its hash is the recorded one.

PLUGIN_API = 1
_PLUGIN_NAME = re.compile(r"([A-Za-z0-9_-]{1,64})\.py")
#: npm packages from the original gateway's instructions, and the built-in channel for each.
BUILT_IN_PACKAGES: Mapping[str, str] = {
    "grammy": "telegram", "@tencent-weixin/openclaw-weixin": "openclaw-weixin",
    "@dingtalk-real-ai/dingtalk-connector": "dingtalk-connector", "@openclaw/qqbot": "qqbot",
    "@tencent-connect/openclaw-qqbot": "qqbot",
}
#: The names of this program that plugins may use.
PLUGIN_TOOLS = types.SimpleNamespace(
    Message=Message, Attachment=Attachment, Part=Part, Row=Row, Channel=Channel, Fatal=Fatal,
    Retry=Retry, SendFailed=SendFailed, NetworkFailed=NetworkFailed, Http=Http, WebSocket=WebSocket,
    WebSocketClosed=WebSocketClosed, render=render, Markup=Markup, PLAIN=PLAIN,
    text_value=text_value, flag_value=flag_value, mapping_value=mapping_value,
    places_value=places_value, platform_url_value=platform_url_value,
)


class Plugins:
    """The folder of plugins, and the file with their hashes."""

    def __init__(self, home: str) -> None:
        self.folder = os.path.join(home, "channels")
        self._record = os.path.join(self.folder, "plugins.json")

    def hashes(self) -> Json:
        """Return the recorded hashes by file name. Raises SettingsError."""
        return read_file(self._record)

    def load(self) -> tuple[list[Row], list[str]]:
        """Return the rows of the plugins, and the reasons for those that were not loaded."""
        rows, refused, hashes = [], [], self.hashes()
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        for name in sorted(filter(_PLUGIN_NAME.fullmatch, names)):
            try:
                rows.append(self._load(name, hashes.get(name)))
            except Exception as problem:  # A fault in one plugin must not stop the others.
                refused.append(f"plugin {name} is not loaded: {clean(problem)}")
        return rows, refused

    def _load(self, name: str, digest: object) -> Row:
        path = os.path.join(self.folder, name)
        with open(path, "rb") as file:
            source = file.read()
        # Check and run the same bytes: the file could change in between.
        if hashlib.sha256(source).hexdigest() != digest:
            raise ValueError("it has changed since it was installed; install it again")
        values: dict[str, Any] = {"__name__": f"ocp_channel_{name[:-3]}", "__file__": path}
        exec(compile(source, path, "exec"), values)
        if values.get("API") != PLUGIN_API:
            raise ValueError(f"it is for another version of this program (API {PLUGIN_API})")
        row = values["channel"](PLUGIN_TOOLS)
        if not isinstance(row, Row):
            raise ValueError("channel(api) has to return a Row")
        return row

    def put(self, name: str, source: Optional[bytes]) -> None:
        """Save a plugin and record its hash; None removes it. Raises OSError."""
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        path, hashes = os.path.join(self.folder, name), self.hashes()
        if source is None:
            del hashes[name]
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        else:
            hashes[name] = hashlib.sha256(source).hexdigest()
            write_whole(path, source)
        write_whole(self._record, json.dumps(hashes, indent=2).encode() + b"\n")


# ==== 23. Command line =======================================================
# The owner's commands. Those for a running gateway use its socket; those that change settings or
# people write the file or the database, and then notify the gateway.

_START_S, _STOP_S = 15.0, 40.0


class Here(NamedTuple):
    """The context of a command: environment, folder, settings file, channels."""

    environ: Mapping[str, str]
    home: str
    settings_path: str
    rows: tuple[Row, ...]
    #: Why plugins were not loaded.
    refused: tuple[str, ...]

    @classmethod
    def of(cls, environ: Mapping[str, str], named: str) -> Here:
        """Return the context for an environment and the value of --config. Raises Problem."""
        home = os.path.abspath(os.path.expanduser(environ.get("OCP_HOME") or "~/.ocp"))
        try:
            os.makedirs(home, mode=0o700, exist_ok=True)
            rows, refused = Plugins(home).load()
        except OSError as problem:
            raise Problem(Exit.FAILED, f"{home}: {reason_of(problem)}") from None
        path = settings_path(named, environ, home)
        return cls(environ, home, path, (*ROWS, *rows), tuple(refused))

    def load(self) -> Settings:
        """Return the settings. Raises SettingsError."""
        return self.parse(read_file(self.settings_path))

    def content(self) -> Json:
        """Return the content of the file, to change it. Raises SettingsError, also if "channels" or
        a channel is not an object."""
        content = read_file(self.settings_path)
        channels = content.get("channels", {})
        places = {"channels": channels, **({} if not isinstance(channels, dict) else channels)}
        faults = [f"{name}: use an object" for name, value in without_comments(places).items()
                  if not isinstance(value, dict)]
        if faults:
            raise SettingsError(faults)
        return content

    def parse(self, content: Json) -> Settings:
        """Return the settings for this content of the file. Raises SettingsError."""
        return parse_settings(content, self.settings_path, self.environ, self.rows)

    def account(self, content: Json, row: Row, name: str) -> Account:
        """Return an account for this content of the file. Raises SettingsError."""
        return next(each for each in self.parse(content).accounts
                    if each.row.id == row.id and each.name == name)

    def row(self, name: str) -> Row:
        """Return a channel by its id or alias. Raises Problem."""
        found = next((row for row in self.rows if name in (row.id, *row.aliases)), None)
        if found is None:
            known = ", ".join(row.id for row in self.rows)
            raise Problem(Exit.FAILED, f'There is no channel "{clean(name)}". Known are: {known}')
        return found

    def ask(self, **request: object) -> Json:
        """Return the running gateway's answer. Raises Problem."""
        answer = ask_gateway(self.home, request)
        if answer is None:
            raise Problem(Exit.UNREACHABLE, f"No gateway is running. Start one: {PROGRAM} start -d")
        if "error" in answer:
            raise Problem(Exit.FAILED, str(answer["error"]))
        return answer

    def nudge(self) -> bool:
        """Make the gateway check its outbox, and return whether one is running."""
        return ask_gateway(self.home, {"do": "nudge"}) is not None

    @contextlib.contextmanager
    def store(self) -> Iterator[Store]:
        """Open the database."""
        with contextlib.closing(Store(os.path.join(self.home, DATABASE))) as store:
            yield store

    @contextlib.contextmanager
    def channel(self, account: Account, state: Json) -> Iterator[Channel]:
        """Yield the channel of an account without running it."""
        with contextlib.closing(Http(Connector(account.settings["proxy"], self.environ))) as web:
            yield account.row.make(Tools(account.settings, state), web)


Arguments = argparse.Namespace


# -- the gateway ----------------------------------------------------------------------------------


def do_start(here: Here, arguments: Arguments) -> None:
    """Start the gateway, in the foreground or in the background."""
    if arguments.channel:
        arguments.channel = here.row(arguments.channel).id
        if here.nudge():
            do_change(here, arguments)
            return
    if arguments.background:
        start_in_background(here, arguments.channel, arguments.log_dir)
        return
    settings = here.load()
    if not any(each.is_enabled and not each.missing for each in settings.accounts):
        lines = [f"{each.id}: not configured ({', '.join(each.missing) or 'not enabled'})"
                 for each in settings.accounts]
        add = f"{PROGRAM} add --channel telegram --botToken TOKEN"
        raise Problem(Exit.USAGE, "\n".join([*lines, f"No channel is configured. Add one: {add}"]))
    has_file = arguments.log_file or arguments.is_child
    path = os.path.join(os.path.abspath(arguments.log_dir or here.home), LOG) if has_file else ""
    log = Log(path, None if arguments.is_child else sys.stderr, bool(settings.top["verbose"]))
    for warning in (*settings.warnings, *here.refused):
        log.line("warning", warning)
    app = App(here.home, here.load, log, here.environ)

    def end(*_: object) -> None:
        if app.is_over.is_set():
            # A second signal: do not wait for the answers that are being written.
            raise KeyboardInterrupt
        app.is_over.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    log.line("info", f"ocp_channels {VERSION}, settings {settings.path}, agent "
                     f"{settings.top['agentUrl']}, model {settings.top['model']}")
    app.run(arguments.channel)


def start_in_background(here: Here, channel: str = "", log_dir: str = "") -> None:
    """Start the gateway in a new process, and return when it answers."""
    if here.nudge():
        raise Problem(Exit.FAILED, f"A gateway runs already; see `{PROGRAM} status`.")
    folder = os.path.abspath(log_dir or here.home)
    command = [sys.executable, os.path.abspath(__file__), "--config", here.settings_path, "start",
               "--is-child", "--log-dir", folder, *(["--channel", channel] if channel else [])]
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            start_new_session=True, env=dict(here.environ), cwd=here.home)
        until_s = time.monotonic() + _START_S
        while not here.nudge():
            if child.poll() is not None or time.monotonic() > until_s:
                errors.seek(0)
                message = errors.read().decode(errors="replace").strip()
                code, child.returncode = child.returncode, 0
                raise Problem(Exit(code) if code in set(Exit) - {Exit.OK} else Exit.FAILED,
                              message or f"The gateway did not start within {_START_S:.0f} s.")
            time.sleep(0.05)
    # The child outlives this process; a set returncode avoids a ResourceWarning.
    child.returncode = 0
    print(f"Started: pid {child.pid}, log {os.path.join(folder, LOG)}")


def do_stop(here: Here, arguments: Arguments) -> None:
    """Stop the gateway, or one channel, after the answers that are being written."""
    if arguments.channel:
        do_change(here, arguments)
        return
    pid, until_s = here.ask(do="end")["pid"], time.monotonic() + _STOP_S
    with open(os.path.join(here.home, LOCK), "a") as file:
        while not lock(file):
            if time.monotonic() > until_s:
                raise Problem(Exit.FAILED, f"Process {pid} does not end. Kill it: kill -9 {pid}")
            time.sleep(0.05)
    print("Stopped.")


def do_restart(here: Here, arguments: Arguments) -> None:
    """Restart the gateway in the background, or restart one channel."""
    if arguments.channel:
        do_change(here, arguments)
        return
    if here.nudge():
        do_stop(here, arguments)
    start_in_background(here)


def do_change(here: Here, arguments: Arguments) -> None:
    """Start, stop or restart the accounts of a channel in the running gateway."""
    print_changes(here.ask(do=arguments.verb, channel=here.row(arguments.channel).id,
                          account=arguments.account))


def print_changes(answer: Json) -> None:
    """Print what a gateway started and stopped."""
    for word in ("stopped", "started"):
        if answer[word]:
            print(f"{word.capitalize()}: {', '.join(answer[word])}")
    if not answer["started"] and not answer["stopped"]:
        print(f"Nothing changed; see `{PROGRAM} status`.")


def do_status(here: Here, arguments: Arguments) -> None:
    """Print the status of the gateway and its accounts."""
    status = here.ask(do="status", probe=arguments.probe)
    if arguments.channel:
        row = here.row(arguments.channel)
        status["channels"] = [each for each in status["channels"] if each["id"] == row.id]
    if arguments.json:
        print(json.dumps(status, indent=2))
        return
    print(f"Agent: {status['agentUrl']}\nModel: {status['model']}")
    print(f"Channels configured: {status['configured']}, running: {status['running']}")
    for each in status["channels"]:
        name = each["id"] + ("" if each["accountId"] == "default" else f" ({each['accountId']})")
        is_running, url = each["status"] == "running", each["agentUrl"]
        words = [f"{name}  {each['status']}", each.get("bot", ""),
                 f"uptime: {each['uptime']}s" if is_running else each["error"],
                 f"agent: {url}" if url != status["agentUrl"] else "",
                 *(f"{each[key]} {key}" for key in ("pending", "held", "dead") if each[key]),
                 *(f"{count} not answered ({why})" for why, count in each["dropped"].items()),
                 each["note"]]
        print("  ".join(clean(word) for word in words if word))
    for code in status["pairing"]:
        print(f"A person is waiting for approval: {PROGRAM} pairing approve {code}")
    for line in here.refused:
        print(line)


def do_version(here: Here, arguments: Arguments) -> None:
    """Print the version."""
    print(f"ocp_channels {VERSION}")


# -- settings -------------------------------------------------------------------------------------


def do_list(here: Here, arguments: Arguments) -> None:
    """Print the configured channels, or all channels."""
    configured = {account.row.id for account in here.load().accounts}
    ids = [row.id for row in here.rows if arguments.all or row.id in configured]
    print(json.dumps(ids) if arguments.json else "\n".join(ids) or "No channel is configured.")


def do_add(here: Here, arguments: Arguments) -> None:
    """Check an account with its platform and save it; any setting is a flag: --KEY VALUE."""
    row, content = here.row(arguments.channel), here.content()
    merge_account(content, row, arguments.account, flag_values(row, arguments.rest))
    account = here.account(content, row, arguments.account)
    if account.missing:
        raise Problem(Exit.USAGE, f"{' and '.join(account.missing)} missing. {row.help}")
    if not arguments.no_probe and row.credentials:
        try:
            with here.channel(account, {}) as channel:
                print(f"The bot is {clean(channel.probe())}.")
        except Fatal as fatal:
            raise Problem(Exit.FAILED, f"Not saved: {fatal}; {fatal.fix}.") from None
        except Retry as problem:
            print(f"Warning: the platform could not be asked ({problem}).")
    save_account(here, content, account)


def save_account(here: Here, content: Json, account: Account) -> None:
    """Write the settings, and restart the account in a running gateway."""
    save_settings(here.settings_path, content)
    print(f"Saved {account.id} in {here.settings_path}.")
    if here.nudge():
        print_changes(here.ask(do="restart", channel=account.row.id, account=account.name))
    else:
        print(f"Start the gateway: {PROGRAM} start -d")


def flag_values(row: Row, rest: list[str]) -> Json:
    """Return settings from flags --KEY VALUE or --KEY=VALUE. Raises Problem."""
    kinds = {**{each.key: each.kind for each in SETTINGS}, **row.settings}
    values: Json = {}
    words = iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise Problem(Exit.USAGE, f"{clean(word)}: write settings as --KEY VALUE.")
        key, has_value, text = word[2:].partition("=")
        text = text if has_value else next(words, "")
        if key == "token" and key not in row.credentials:
            # All credentials in one value, such as AppID:Secret.
            values.update(zip(row.credentials, text.split(":", len(row.credentials) - 1)))
            continue
        values[key] = {"true": True, "false": False}.get(text, text)
        with contextlib.suppress(ValueError):
            if kinds.get(key) in (texts_value, mapping_value, places_value):
                values[key] = [each.strip() for each in text.split(",")]
            if text[:1] in ("{", "["):
                values[key] = json.loads(text)
    return values


def merge_account(content: Json, row: Row, account: str, values: Json) -> None:
    """Merge the settings of an account into its place in the content of the file."""
    channels = content.setdefault("channels", {})
    name = next((each for each in channels if each in (row.id, *row.aliases)), row.id)
    is_new = name not in channels
    place = channels.setdefault(name, {"enabled": True})
    accounts = place.get("accounts") or {}
    has_flat = any(place.get(key) for key in row.credentials)
    if account == "default" and account not in accounts and (has_flat or not accounts):
        place.update(values)
        return
    if not (is_new or accounts or row.credentials):
        # Beside named accounts, an existing account without credentials has to be named too.
        accounts["default"] = {}
    accounts.setdefault(account, {}).update(values)
    place["accounts"] = accounts


def save_settings(path: str, content: Json) -> None:
    """Replace the settings file; the original stays as .bak."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    if os.path.exists(path) and not os.path.exists(f"{path}.bak"):
        with open(path, "rb") as file:
            write_whole(f"{path}.bak", file.read())
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")


def do_remove(here: Here, arguments: Arguments) -> None:
    """Remove a channel or an account from the settings."""
    row, content = here.row(arguments.channel), here.content()
    account: str = arguments.account
    channels = content.get("channels", {})
    name = next((each for each in channels if each in (row.id, *row.aliases)), None)
    accounts = channels[name].get("accounts") or {} if name else {}
    if name is None or account not in ("", "default", *accounts):
        raise Problem(Exit.FAILED, "The settings have no such account.")
    target = f"{row.id}:{account}" if account else f"{row.id} with all accounts"
    confirm(f"Remove {target}?", arguments.yes)
    if not account or not accounts:
        del channels[name]
    elif account in accounts:
        del accounts[account]
    else:
        for key in row.credentials:
            channels[name].pop(key, None)
    save_settings(here.settings_path, content)
    # Without settings the account only stops.
    ask_gateway(here.home, {"do": "restart", "channel": row.id, "account": account})
    if arguments.purge:
        # Not LIKE, which treats "_" as a wildcard and ignores case.
        pattern = f"{row.id}:{account or '*'}"
        with here.store() as store, store.transaction():
            for table in ACCOUNT_TABLES:
                store.run(f"DELETE FROM {table} WHERE account GLOB ?", pattern)
            for table, column in LANE_TABLES:
                store.run(f"DELETE FROM {table} WHERE {column} GLOB ?", f"{pattern}:*")
    print(f"Removed {target}.")


def confirm(question: str, is_yes: bool) -> None:
    """Ask on a terminal. Raises Problem unless the answer is yes."""
    if is_yes:
        return
    if not sys.stdin.isatty():
        raise Problem(Exit.USAGE, "There is no terminal to ask on: add --yes.")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise Problem(Exit.FAILED, "Nothing was changed.")


def do_login(here: Here, arguments: Arguments) -> None:
    """Log an account in with a QR code."""
    row, content = here.row(arguments.channel), here.content()
    if not row.has_login:
        raise Problem(Exit.USAGE, f"{row.label} has no login. {row.help}")
    merge_account(content, row, arguments.account, {})
    account = here.account(content, row, arguments.account)
    with here.store() as store:
        state = {} if arguments.force else store.state(account.id)
        with here.channel(account, state) as channel:
            try:
                found = dict(channel.login(Console()))
            except Fatal as fatal:
                raise Problem(Exit.FAILED, f"{fatal}: {fatal.fix}.") from None
        owner = str(found.pop("owner", ""))
        merge_account(content, row, account.name,
                      {key: found.pop(key) for key in row.credentials if key in found})
        with store.transaction():
            # The gateway may have saved a newer state meanwhile.
            kept = {} if arguments.force else store.state(account.id)
            store.put_state(account.id, {**kept, **found})
            if owner:
                store.run("INSERT OR REPLACE INTO people VALUES (?,?,'','{}','','',1,?)",
                          account.id, owner, time.time())
    save_account(here, content, account)


# -- people and parts -----------------------------------------------------------------------------


def do_pairing_list(here: Here, arguments: Arguments) -> None:
    """Print the people who wait for approval, and those who have it."""
    with here.store() as store:
        people = Access(store).people()
    roles = {1: "owner", 0: "approved"}
    lines = [f"{person['account']}  {clean(person['sender'])}  {person['name']}  " + (
        f"waits: pairing approve {person['code']}" if person["code"] else roles[person["is_owner"]])
        for person in people]
    print("\n".join(lines) or "Nobody has written yet.")


def do_approve(here: Here, arguments: Arguments) -> None:
    """Approve the person who was given this code."""
    with here.store() as store:
        person = Access(store).approve(arguments.code, is_owner=arguments.owner)
    if person is None:
        raise Problem(Exit.FAILED, "Nobody is waiting with this code. Codes expire after an hour.")
    here.nudge()
    role = " and owns the account" if person["is_owner"] else ""
    print(f"{person['name']} ({clean(person['sender'])}) may write to {person['account']}{role}.")


def do_revoke(here: Here, arguments: Arguments) -> None:
    """Revoke a person's approval."""
    row = here.row(arguments.channel)
    with here.store() as store:
        access = Access(store)
        accounts = {person["account"] for person in access.people()}
        done = [access.revoke(account, arguments.sender) for account in accounts
                if account.startswith(f"{row.id}:")]
    if not any(done):
        raise Problem(Exit.FAILED, "Nobody with this id was approved.")
    print("Revoked.")


def do_outbox(here: Here, arguments: Arguments) -> None:
    """Print the unsent parts of answers."""
    with here.store() as store:
        found = store.rows("SELECT id, account, chat, status, attempts, why, at_s, LENGTH(text)"
                           " AS chars FROM outbox WHERE status<>'sent' ORDER BY id")
    lines = [f"{row['id']}  {row['status']}  {row['account']}  {clean(row['chat'])}  "
             f"{row['chars']} chars  {row['why']}" for row in found]
    print(json.dumps([dict(row) for row in found], indent=2) if arguments.json
          else "\n".join(lines) or "Everything has been sent.")


def do_outbox_change(here: Here, arguments: Arguments) -> None:
    """Retry or drop a part."""
    change = "DELETE FROM outbox" if arguments.verb == "drop" else (
        f"UPDATE outbox SET status='pending', due_s=0, attempts=0, at_s={time.time()}")
    with here.store() as store:
        if not store.run(f"{change} WHERE id=? AND status<>'sent'", arguments.id):
            raise Problem(Exit.FAILED, f"There is no unsent part {arguments.id}; see "
                          f"`{PROGRAM} outbox`.")
    here.nudge()
    print("Done.")


# -- plugins --------------------------------------------------------------------------------------


def do_plugins_install(here: Here, arguments: Arguments) -> None:
    """Install a channel from a file."""
    source_path = arguments.source
    if source_path in BUILT_IN_PACKAGES:
        print(f"Built in: {BUILT_IN_PACKAGES[source_path]}. Nothing has to be installed.")
        return
    name = os.path.basename(source_path)
    if "://" in source_path or not _PLUGIN_NAME.fullmatch(name):
        raise Problem(
            Exit.USAGE, f"{clean(source_path)}: name a file of letters, digits, - and _ that ends "
            "in .py; download a URL first. npm packages cannot run here. To use a channel of "
            "OpenClaw, install OpenClaw, run `openclaw plugins install "
            f"{clean(source_path)}`, and make OCP its model provider with `ocp connect openclaw`.")
    with open(source_path, "rb") as file:
        source = file.read()
    print(f"{name}: {len(source)} bytes, sha256 {hashlib.sha256(source).hexdigest()}.\n"
          "It runs with all rights of this program.")
    confirm("Install it?", arguments.yes)
    Plugins(here.home).put(name, source)
    print(f"Installed {name}. Restart the gateway to load it.")


def do_plugins_list(here: Here, arguments: Arguments) -> None:
    """Print the plugins."""
    lines = [f"{name}  sha256 {digest}" for name, digest in Plugins(here.home).hashes().items()]
    print("\n".join([*lines, *here.refused]) or "No plugin is installed; built in are: "
          + ", ".join(row.label for row in ROWS))


def do_plugins_remove(here: Here, arguments: Arguments) -> None:
    """Remove a plugin."""
    name = f"{arguments.name.removesuffix('.py')}.py"
    if name not in Plugins(here.home).hashes():
        raise Problem(Exit.FAILED, f"There is no plugin {clean(arguments.name)}.")
    Plugins(here.home).put(name, None)
    print("Removed.")


# -- the self-test --------------------------------------------------------------------------------

_TEST_DELTAS = ("Every ", "delta ", "comes ", "through.")
_TEST_WAIT_S = 10.0


class _TestAgent(http.server.BaseHTTPRequestHandler):
    """A fake agent that streams, or calls back if the request has a callback URL."""

    def do_POST(self) -> None:  # noqa: N802
        """Answer a question."""
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        later = self.headers.get("X-OCG-Callback", "")
        chunks = [compact({"choices": [{"delta": {"content": text}}]}) for text in _TEST_DELTAS]
        body = "".join(f"data: {chunk}\n\n" for chunk in (*chunks, "[DONE]")).encode()
        self.send_response(202 if later else 200)
        self.send_header("Content-Type", "application/json" if later else "text/event-stream")
        self.send_header("Content-Length", "0" if later else str(len(body)))
        self.end_headers()
        if later:
            with contextlib.closing(Http(Connector("", {}))) as web:
                web.call("POST", later, {"reply": "".join(_TEST_DELTAS)})
        else:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing."""


class _TestChannel(Channel):
    """A fake platform, on which the self-test writes and reads messages."""

    def __init__(self, tools: Tools, http: Http) -> None:
        super().__init__(tools, http)
        self._sent: queue.SimpleQueue[str] = queue.SimpleQueue()

    def run(self) -> None:
        """Report as running, and wait for the end."""
        self.tools.note_frame()
        self.tools.stop.wait()

    def send(self, route: Json, part: Part) -> str:
        """Keep a part."""
        self._sent.put(part.text)
        return "1"

    def exchange(self, sender: str, text: str) -> str:
        """Write a message and return the first part of its answer, empty if none comes."""
        self.tools.accept(Message(secrets.token_hex(8), sender, "direct", sender, sender, text,
                                  True, "", (), time.time(), {}))
        with contextlib.suppress(queue.Empty):
            return self._sent.get(timeout=_TEST_WAIT_S)
        return ""


_TestChannel.row = Row("test", (), "Test", _TestChannel, 4000, {}, {})


def do_test(here: Here, arguments: Arguments) -> None:
    """Check this program with a fake channel, and a fake agent or that of --agent."""
    agent = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _TestAgent)
    spawn(lambda: agent.serve_forever(0.05))
    fake_url = f"http://127.0.0.1:{agent.server_address[1]}/v1/chat/completions"
    accounts = {"friend": {"allowFrom": ["1"], "agentUrl": arguments.agent or fake_url},
                "later": {"allowFrom": ["1"], "async": True}}
    content = {"agentUrl": fake_url, "callbackPort": 0,
               "channels": {"test": {"accounts": accounts}}}
    settings = parse_settings(content, "", {}, [_TestChannel.row])
    with tempfile.TemporaryDirectory(prefix="ocp-test-") as folder:
        app = App(folder, lambda: settings, Log("", None), {})
        gateway = spawn(app.run)
        try:
            failed = list(failed_checks(app.lanes.accounts, is_fake=not arguments.agent))
        finally:
            app.is_over.set()
            gateway.join()
            agent.shutdown()
            agent.server_close()
    if failed:
        raise Problem(Exit.FAILED, f"Failed: {', '.join(failed)}.")


def failed_checks(accounts: Mapping[str, LiveAccount], *, is_fake: bool) -> Iterator[str]:
    """Print a line for each check and yield the names of those that failed."""
    until_s = time.monotonic() + _TEST_WAIT_S
    while len(accounts) < 2 and time.monotonic() < until_s:
        time.sleep(0.02)
    whole, failing = "".join(_TEST_DELTAS), tuple(row.text[:20] for row in FAILURES)
    for name, account, sender, expected in (
        ("the agent's answer arrives", "test:friend", "1", whole if is_fake else ""),
        ("a later answer arrives by callback", "test:later", "1", whole),
        ("a stranger gets a code", "test:friend", "2", "This bot is private."),
    ):
        channel = cast(_TestChannel, accounts[account].channel)
        found = channel.exchange(sender, "Say hello.")
        is_good = bool(found) and found.startswith(expected) and not found.startswith(failing)
        if is_good:
            print(f"ok      {name}")
        else:
            print(f"FAILED  {name}: {clean(found) or 'nothing came'}")
            yield name


# -- reading the command line ---------------------------------------------------------------------


def flag(*names: str, **options: Any) -> tuple[tuple[str, ...], Json]:
    """Return an argument of a command: its names and its options for argparse."""
    return names, options


def switch(*names: str, about: str = argparse.SUPPRESS) -> tuple[tuple[str, ...], Json]:
    """Return a boolean argument."""
    return flag(*names, action="store_true", help=about)


class Command(NamedTuple):
    """A command, by its one or two words."""

    words: tuple[str, ...]
    run: Callable[[Here, Arguments], None]
    flags: tuple[tuple[tuple[str, ...], Json], ...] = ()


_ONE_CHANNEL = flag("--channel", required=True, metavar="ID")
_ANY_CHANNEL = flag("--channel", default="", metavar="ID")
_ACCOUNT = flag("--account", default="default", metavar="NAME")
_ANY_ACCOUNT = flag("--account", default="", metavar="NAME")
_JSON = switch("--json", about="as JSON")
_YES = switch("--yes", "-y", about="do not ask")
COMMANDS = (
    Command(("start",), do_start, (
        switch("-d", "--background", "--bg", "--daemon", about="run in the background"),
        _ANY_CHANNEL, _ANY_ACCOUNT, switch("--log-file", about="write channels.log too"),
        flag("--log-dir", default="", metavar="FOLDER"), switch("--is-child"))),
    Command(("stop",), do_stop, (_ANY_CHANNEL, _ANY_ACCOUNT)),
    Command(("restart",), do_restart, (_ANY_CHANNEL, _ANY_ACCOUNT)),
    Command(("status",), do_status, (
        _ANY_CHANNEL, _JSON, switch("--probe", about="ask the platforms too"))),
    Command(("test",), do_test, (flag("--agent", default="", metavar="URL",
                                      help="check this agent instead of a fake one"),)),
    Command(("version",), do_version),
    Command(("list",), do_list, (switch("--all", about="also those not configured"), _JSON)),
    Command(("add",), do_add, (
        _ONE_CHANNEL, _ACCOUNT, switch("--no-probe", about="do not check with the platform"))),
    Command(("remove",), do_remove, (
        _ONE_CHANNEL, _ANY_ACCOUNT, _YES,
        switch("--purge", about="delete its messages and people too"))),
    Command(("login",), do_login, (
        _ONE_CHANNEL, _ACCOUNT, switch("--force", about="forget the former login first"))),
    Command(("pairing", "list"), do_pairing_list),
    Command(("pairing", "approve"), do_approve, (
        flag("code"), switch("--owner", about="make the person an owner"))),
    Command(("pairing", "revoke"), do_revoke, (flag("channel"), flag("sender"))),
    Command(("outbox", "list"), do_outbox, (_JSON,)),
    Command(("outbox", "retry"), do_outbox_change, (flag("id", type=int),)),
    Command(("outbox", "drop"), do_outbox_change, (flag("id", type=int),)),
    Command(("plugins", "install"), do_plugins_install, (flag("source", metavar="FILE"), _YES)),
    Command(("plugins", "list"), do_plugins_list),
    Command(("plugins", "remove"), do_plugins_remove, (flag("name"),)),
)


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    about = (__doc__ or "").split("\n\n")[0]
    whole = argparse.ArgumentParser(prog="ocp_channels.py", description=about, allow_abbrev=False)
    whole.add_argument("--config", default="", metavar="FILE", help="the settings file")
    places: dict[tuple[str, ...], Any] = {(): whole.add_subparsers(required=True,
                                                                   metavar="COMMAND")}
    for command in COMMANDS:
        group = command.words[:-1]
        if group not in places:
            verbs = ", ".join(each.words[1] for each in COMMANDS if each.words[:-1] == group)
            parent = places[()].add_parser(group[0], help=verbs, allow_abbrev=False)
            places[group] = parent.add_subparsers(required=True, metavar="COMMAND")
        help_text = (command.run.__doc__ or "").partition(".")[0]
        parser = places[group].add_parser(command.words[-1], help=help_text,
                                          description=f"{help_text}.",
                                          allow_abbrev=False)
        for names, options in command.flags:
            parser.add_argument(*names, **options)
        parser.set_defaults(run=command.run, verb=command.words[-1])
    return whole


def read_arguments(argv: list[str]) -> Arguments:
    """Return the arguments of a command; the word "channels" in front of it may be left out."""
    first = next((place for place, word in enumerate(argv) if word == "channels"), -1)
    is_in_front = first >= 0 and all(
        word.startswith("-") or before == "--config"
        for before, word in zip(["", *argv], argv[:first]))
    words = (argv[:first] + argv[first + 1:] if is_in_front else argv) or ["--help"]
    if words in (["outbox"], ["outbox", "--json"]):
        words.insert(1, "list")
    parser = command_parser()
    arguments, rest = parser.parse_known_args(words)
    if rest and arguments.run is not do_add:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    arguments.rest = rest
    return arguments


def main(argv: list[str], environ: Mapping[str, str]) -> int:
    """Run a command and return its exit code."""
    arguments = read_arguments(argv)
    try:
        arguments.run(Here.of(environ, arguments.config), arguments)
        return Exit.OK
    except (SettingsError, Problem) as problem:
        print(problem, file=sys.stderr)
        return problem.code if isinstance(problem, Problem) else Exit.USAGE
    except OSError as problem:
        place = f"{problem.filename}: " if problem.filename else ""
        print(f"{place}{reason_of(problem)}", file=sys.stderr)
        return Exit.FAILED
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
