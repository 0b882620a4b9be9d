#!/usr/bin/env python3
"""ocp_channels joins chat platforms to OCP, or to any agent that speaks chat completions.

    python3 ocp_channels.py channels add --channel telegram --botToken TOKEN
    python3 ocp_channels.py start             receive and answer messages, until Ctrl-C
    python3 ocp_channels.py start -d          the same in the background; status, stop, restart
    python3 ocp_channels.py pairing approve CODE
    python3 ocp_channels.py test              check this program with a made-up agent and channel
    python3 ocp_channels.py --help            everything else

Telegram, Discord, WeChat, DingTalk and QQ are built in; each may have several accounts. Nobody may
talk to a bot until its owner approves: a stranger gets a code, and costs no request. A message is
in the database before its platform is told so, and an answer before it is sent, so that no end of
this program loses one.

Exit codes: 0 done; 1 failed, the message says why; 2 wrong usage or settings; 3 nothing runs here;
4 not allowed; 130 interrupted.
"""
# How a message is answered: a channel receives it and calls `accept`, which asks the gate and
# writes the inbox; the lane of its chat runs a turn, which asks the agent and writes the answer's
# parts into the outbox; the account's sender sends them. Wire formats exist only in the channels.
# The database is the queue: threads hold nothing that a kill can lose.
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
#      9. Text              Markdown in, the markup of a platform out, in parts of its size
#     10. Opcode gateway    what Discord and QQ share
#     11. Telegram
#     12. Discord
#     13. QQ
#     14. DingTalk
#     15. WeChat
#     16. Channel table     every channel that is built in
#     17. Access            who may talk: policies, mentions, pairing, limits
#     18. Agent             chat completions, streamed or not, and their failures
#     19. Turns             lanes, previews, commands in the chat, sending
#     20. Callbacks         answers that an agent sends later
#     21. App               owns every long-lived object; supervisors; the control socket
#     22. Plugins           channels in files of the owner's
#     23. Command line      commands, the self-test, main
from __future__ import annotations

import sys

if sys.version_info < (3, 9):
    sys.exit("ocp_channels needs Python 3.9 or later; this is Python %d.%d." % sys.version_info[:2])

import base64
import contextlib
import difflib
import enum
import hashlib
import html
import http.client
import ipaddress
import itertools
import json
import os
import re
import secrets
import select
import socket
import ssl
import threading
import time
import unicodedata
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, NoReturn, Optional, Protocol, Union

VERSION = "0.1.0"

Json = dict[str, Any]


# ==== 1. Small tools =========================================================
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


def clean(text: object) -> str:
    """Return `text` without the control characters that could command a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", "?", str(text))


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine, by its name or address alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def reason_of(problem: Exception) -> str:
    """Return why something failed, in a few words and without an address."""
    if isinstance(problem, TimeoutError):
        return "timed out"
    if isinstance(problem, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {problem.verify_message}"
    return clean(getattr(problem, "strerror", None) or problem or type(problem).__name__)


def new_reference() -> str:
    """Return a short id that a chat and the log show for the same failure."""
    return secrets.token_hex(3)


def compact(value: object) -> str:
    """Return JSON without spaces, ASCII only."""
    return json.dumps(value, separators=(",", ":"))


# ==== 2. Contracts ===========================================================
# The waist of this program. Channels produce a Message, and are given a Part; between the two
# nothing knows a platform. A channel keeps nothing that has to survive, except what it hands over
# as the state of its account.


class Attachment(NamedTuple):
    """A file that came with a message. Its bytes are fetched only when the agent is asked."""

    #: "image" or "file".
    kind: str
    name: str
    mime: str
    size_bytes: int
    #: How the channel finds it; private to the channel, JSON.
    ref: Json


class Message(NamedTuple):
    """A message that somebody wrote to an account."""

    #: Unique for the account: a message with a known id is the same one again.
    id: str
    #: Where an answer goes, such as "12345" or "-100123:topic:7".
    chat: str
    #: "direct", "group" or "channel".
    kind: str
    sender: str
    sender_name: str
    #: Without the mention of the bot.
    text: str
    is_mentioned: bool
    #: The text that the message quotes; empty if it quotes none.
    quoted: str
    attachments: tuple[Attachment, ...]
    at_s: float
    #: What the channel needs to answer it, JSON.
    route: Json
    #: For the limits by place: the group (or guild) and the part of it, empty in direct chats.
    group: str = ""
    place: str = ""


class Part(NamedTuple):
    """A piece of an answer in Markdown, which fits into one message of its platform."""

    text: str
    #: Whether the answer ends with it.
    is_last: bool
    #: Unique for the part, and the same when it is sent again.
    nonce: str
    #: Whether the platform refused its markup: send the bare text.
    is_plain: bool = False


class Fatal(Exception):
    """An account cannot go on until its owner acts. `fix` says what to do."""

    def __init__(self, why: str, fix: str, *, needs_login: bool = False) -> None:
        super().__init__(why)
        self.fix, self.needs_login = fix, needs_login


class Retry(Exception):
    """The connection of an account broke, and is made again after some time. 0 = the usual."""

    def __init__(self, why: str, after_s: float = 0.0) -> None:
        super().__init__(why)
        self.after_s = after_s


class SendFailed(Exception):
    """A part was not sent. What follows depends on the kind:

    wait    the platform asks for a pause of `after_s`; then again
    later   the network or the platform failed; again with growing pauses
    held    the platform takes nothing until the person writes again
    plain   the platform refuses the markup; again as plain text
    never   this will not work (blocked, chat is gone)
    """

    def __init__(self, kind: str, why: str, after_s: float = 0.0) -> None:
        super().__init__(why)
        self.kind, self.after_s = kind, after_s


class Tools(Protocol):
    """What an account's channel is given by the program."""

    #: The settings of the account: keys of the account, else of its channel.
    settings: Mapping[str, Any]
    #: Set when the account has to end. A channel registers with `on_stop` what then wakes it up.
    stop: threading.Event

    def accept(self, message: Optional[Message], state: Optional[Json] = None) -> None:
        """Take over a message and the state of the account in one transaction, and return when
        both are safely on disk. Only then the channel acknowledges. Raises OSError if they are
        not."""

    def state(self) -> Json:
        """Return the state of the account that was last handed over."""

    def on_stop(self, wake: Callable[[], None]) -> None:
        """Call `wake` from another thread when the account has to end; replaces the last one."""

    def note_frame(self) -> None:
        """Note that the platform has been heard, for the status."""

    def note(self, word: str) -> None:
        """Show a word about the account in the status until the next one; empty = well."""

    def log(self, level: str, event: str, **fields: object) -> None:
        """Write an event of this account to the log. Secrets and texts have no place in it."""


class Channel:
    """One account on one platform. `run` has a thread of its own; the other methods are called
    from the threads of turns and of the account's sender."""

    #: What the program knows of the platform before it makes an account of it.
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
        """Show that an answer is being written, or no more. Raises SendFailed."""

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
        """Log in by QR code and return the state of the account. Raises Fatal."""
        raise NotImplementedError


class Console(Protocol):
    """The terminal of a login."""

    def show_link(self, url: str) -> None:
        """Show a link as a QR code, and as text."""

    def say(self, text: str) -> None:
        """Print a line."""

    def ask(self, question: str) -> str:
        """Return a line that the user types."""


class Row(NamedTuple):
    """What the program knows of a platform."""

    id: str
    aliases: tuple[str, ...]
    label: str
    make: Callable[[Tools, Http], Channel]
    #: The largest part, in what `Channel.length` counts.
    limit: int
    #: The settings with secrets, and the variables of the environment for the account `default`.
    #: Empty = made by a login.
    credentials: Mapping[str, str]
    #: All further settings, with the kind of value of each.
    settings: Mapping[str, Callable[[object], Any]]
    #: Whether messages can be edited, and how often in direct chats and in groups.
    can_edit: bool = False
    edit_every_s: float = 1.5
    edit_every_in_groups_s: float = 1.5
    #: How long "typing" shows, or 0 if there is none.
    typing_every_s: float = 0.0
    #: How many messages may answer one message, 0 = any number.
    budget: int = 0
    #: The pause between two parts.
    pace_s: float = 0.0
    has_login: bool = False
    #: Where the owner gets the credentials, one sentence.
    help: str = ""


# ==== 3. Settings ============================================================
# One file, in the form of the original gateway's ocg.json. Every setting is a row of a table, and
# one rule holds for all: account, then channel, then top level, then environment, then default.
# All errors are collected and told at once. What only a channel knows is checked by its Row.

DEFAULT_AGENT_URL = "http://127.0.0.1:3456/v1/chat/completions"
_ORIGINAL_FILE = "~/.openclaw-channel-gateway/ocg.json"
_ACCOUNT_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
#: What example files have where a credential belongs.
_PLACEHOLDER = re.compile(r"YOUR_\w*_HERE|<[^>]*>|xxx+", re.IGNORECASE)
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_DM_POLICIES = ("pairing", "allowlist", "open", "disabled")
_GROUP_POLICIES = ("allowlist", "open", "disabled")
_REPLY_MODES = ("off", "first", "all")


class SettingsError(Exception):
    """The settings cannot be used. `errors` has one line for each fault, with its place."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors


# A kind of value: returns the value as the program uses it. Raises ValueError with what is
# expected.


def text_value(value: object) -> str:
    """Return a text; a number counts as one, because ids are often written as numbers."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError("use a text")
    return str(value).strip()


def model_value(value: object) -> str:
    """Return the name of a model, which may be given as {"primary": NAME}."""
    return text_value(value.get("primary") if isinstance(value, dict) else value)


def flag_value(value: object) -> bool:
    """Return a flag; the environment has "1" and "true"."""
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    found = value if isinstance(value, bool) else known.get(str(value).strip().lower())
    if found is None:
        raise ValueError("use true or false")
    return found


def number_between(minimum: int, maximum: int) -> Callable[[object], int]:
    """Return the kind of whole numbers between these two."""
    def number_value(value: object) -> int:
        is_number = isinstance(value, (int, str)) and not isinstance(value, bool)
        text = str(value).strip()
        if not is_number or not text.isdigit() or not minimum <= int(text) <= maximum:
            raise ValueError(f"use a whole number from {minimum} to {maximum}")
        return int(text)
    return number_value


def one_of(*words: str) -> Callable[[object], str]:
    """Return the kind of texts that are one of these words."""
    def word_value(value: object) -> str:
        if value not in words:
            raise ValueError(f"use {', '.join(words[:-1])} or {words[-1]}")
        return str(value)
    return word_value


def texts_value(value: object) -> tuple[str, ...]:
    """Return a list of texts; a single one counts as a list."""
    each = value if isinstance(value, list) else [value]
    return tuple(text_value(item) for item in each)


def mapping_value(value: object) -> Json:
    """Return an object; a list of names counts as one whose values are empty."""
    if isinstance(value, list):
        return {text_value(name): {} for name in value}
    if not isinstance(value, dict):
        raise ValueError("use an object, such as {\"ID\": {\"requireMention\": false}}")
    return value


def agent_url_value(value: object) -> str:
    """Return the address of chat completions; a bare base or one that ends in /v1 is completed."""
    url = text_value(value).rstrip("/")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"use an address such as {DEFAULT_AGENT_URL}")
    if parts.path in ("", "/v1"):
        url += "/chat/completions" if parts.path else "/v1/chat/completions"
    return url


def platform_url_value(value: object) -> str:
    """Return an address of a platform: https or wss, and http or ws on this machine only."""
    url = text_value(value).rstrip("/")
    parts = urllib.parse.urlsplit(url)
    is_local = parts.scheme in ("http", "ws") and is_loopback(parts.hostname or "")
    if not parts.hostname or not (parts.scheme in ("https", "wss") or is_local):
        raise ValueError("use an https address")
    return url


def proxy_value(value: object) -> str:
    """Return the address of an http proxy."""
    url = text_value(value)
    if url and (not url.startswith("http://") or not urllib.parse.urlsplit(url).hostname):
        raise ValueError("use http://[user:password@]host:port; a socks proxy is not supported")
    return url


class Setting(NamedTuple):
    """One setting."""

    key: str
    kind: Callable[[object], Any]
    default: Any
    about: str
    #: The variable of the environment, empty if there is none.
    variable: str = ""
    #: Where it may stand: "top", "any" (top level, channel, account), "channel" (the latter two).
    level: str = "any"


SETTINGS: tuple[Setting, ...] = (
    Setting("agentUrl", agent_url_value, DEFAULT_AGENT_URL, "where the agent answers",
            "OCG_AGENT_URL"),
    Setting("model", model_value, "sonnet", "the model that is asked for", "OCG_MODEL"),
    Setting("apiKey", text_value, "", "the agent's key; it is sent to no other origin than the one "
            "it stands beside", "OCG_API_KEY"),
    Setting("systemPrompt", text_value, "", "a system message in front of every conversation"),
    Setting("models", texts_value, (), "what /model offers; empty = all models of the agent"),
    Setting("memory", one_of("gateway", "session", "agent"), "gateway",
            "who remembers the conversation; agent by default with async"),
    Setting("agentTimeout", number_between(0, 86_400), 900,
            "seconds for a whole answer, 0 = no limit"),
    Setting("historyMessages", number_between(2, 10_000), 60, "messages that are remembered"),
    Setting("historyChars", number_between(1000, 10_000_000), 120_000,
            "characters that are remembered"),
    Setting("perSenderHour", number_between(0, 100_000), 60,
            "answers for one person in an hour, not for the owner; 0 = no limit"),
    Setting("streaming", one_of("edit", "block", "off"), "", "how an answer grows: edited "
            "messages, paragraphs, or whole; by default the best that the platform can"),
    Setting("attachments", flag_value, True, "pass photos and files on to the agent"),
    Setting("notice", flag_value, True, "say once after ten minutes that the agent is working"),
    Setting("replyChunkSize", number_between(500, 20_000), 0, "characters of a message at most; by "
            "default what the platform takes", "OCG_REPLY_CHUNK_SIZE"),
    Setting("async", flag_value, False, "the agent answers later, by a callback"),
    Setting("proxy", proxy_value, "", "http://[user:password@]host:port; by default HTTPS_PROXY"),
    Setting("maxTurns", number_between(1, 100), 4, "questions to agents at once", level="top"),
    Setting("verbose", flag_value, False, "texts of messages in the log", "OCG_VERBOSE", "top"),
    Setting("callbackPort", number_between(0, 65_535), 3457, "the port of callbacks", level="top"),
    Setting("callbackHost", text_value, "127.0.0.1", "the address that callbacks listen on",
            level="top"),
    Setting("callbackPublicHost", text_value, "", "the host in the address given to agents",
            level="top"),
    Setting("callbackPublicPort", number_between(0, 65_535), 0, "the port in that address",
            level="top"),
    Setting("callbackSecret", text_value, "", "signs callbacks (X-OCG-Signature)", level="top"),
    Setting("callbackTokenTTL", number_between(10, 604_800), 1800,
            "seconds in which a callback may come", level="top"),
    Setting("dmPolicy", one_of(*_DM_POLICIES), "pairing", "who may write directly",
            level="channel"),
    Setting("allowFrom", texts_value, (), "ids of people who may write; \"*\" = everybody",
            level="channel"),
    Setting("groupPolicy", one_of(*_GROUP_POLICIES), "allowlist", "in which groups it answers",
            level="channel"),
    Setting("groupAllowFrom", texts_value, None, "ids of people who may write in groups; by "
            "default allowFrom", level="channel"),
    Setting("requireMention", flag_value, True, "answer in groups only when it is mentioned",
            level="channel"),
    Setting("replyToMode", one_of(*_REPLY_MODES), "first", "which parts of an answer quote the "
            "question in groups", level="channel"),
    Setting("textChunkLimit", number_between(500, 20_000), 0, "the same as replyChunkSize, in "
            "OpenClaw's word", level="channel"),
)
#: Settings whose misspelling would open what should be closed: near names are errors.
_SECURITY_KEYS = {key.lower(): key for key in (
    "dmPolicy", "allowFrom", "groupPolicy", "groupAllowFrom", "requireMention", "callbackSecret",
    "callbackHost",
)}


class Account(NamedTuple):
    """One account with its settings, as everything below uses them."""

    row: Row
    name: str
    is_enabled: bool
    #: By key: settings of the table, of the channel's row, and credentials.
    settings: Mapping[str, Any]
    #: By key: "account", "channel", "file", "environment" or "default".
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
    """Return the path of the file: as named, else by the environment, else OCP's own, else that of
    the original gateway if only that one is there."""
    chosen = named or environ.get("OCG_CONFIG_PATH", "")
    if chosen:
        return os.path.abspath(os.path.expanduser(chosen))
    own = os.path.join(home, "channels.json")
    original = os.path.expanduser(_ORIGINAL_FILE)
    return original if os.path.exists(original) and not os.path.exists(own) else own


def read_file(path: str) -> Json:
    """Return the object in a file, {} if there is no file. Raises SettingsError."""
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
        raise SettingsError([f"{path}: use an object at the outermost level"])
    return value


def load_settings(path: str, environ: Mapping[str, str], rows: Iterable[Row]) -> Settings:
    """Return the settings of a file. Raises SettingsError with every fault in it."""
    content = read_file(path)
    reader = _Reader(path, environ, list(rows))
    settings = reader.read(content)
    if reader.errors:
        raise SettingsError(list(dict.fromkeys(reader.errors)))
    return settings


class _Level(NamedTuple):
    """One object of the file, in which a setting may stand."""

    name: str
    #: Its path in the file, for messages.
    place: str
    values: Json


class _Reader:
    """Reads one file, and collects what is wrong with it."""

    def __init__(self, path: str, environ: Mapping[str, str], rows: list[Row]) -> None:
        self._path, self._environ, self._rows = path, environ, rows
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def read(self, content: Json) -> Settings:
        """Return the settings."""
        top = _Level("file", "", without_comments(content))
        self._check_mode()
        self._check_names(top, {"channels"} | {row.key for row in SETTINGS})
        channels = top.values.get("channels", {})
        if not isinstance(channels, dict):
            self.errors.append("channels: use an object with a key for each channel")
            channels = {}
        accounts = [
            account for name, values in without_comments(channels).items()
            for account in self._channel(name, values, top)
        ]
        self._check_shared_credentials(accounts)
        values = {
            each.key: self._value(each, [top])[0] for each in SETTINGS if each.level != "channel"
        }
        return Settings(self._path, values, tuple(accounts), tuple(self.warnings))

    def _check_mode(self) -> None:
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_mode & 0o077:
                self.warnings.append(
                    f"{self._path}: others can read it, and it holds credentials: chmod 600"
                )

    def _channel(self, name: str, values: object, top: _Level) -> Iterator[Account]:
        """Yield the accounts of a channel: those that are named, and `default` if keys of an
        account stand in the channel itself or nothing is named."""
        place = f"channels.{name}"
        row = next((row for row in self._rows if name in (row.id, *row.aliases)), None)
        if row is None:
            known = ", ".join(each.id for each in self._rows)
            self.errors.append(f"{place}: no such channel; known are {known}")
            return
        if not isinstance(values, dict):
            self.errors.append(f"{place}: use an object")
            return
        channel = _Level("channel", place, without_comments(values))
        known_names = {*(each.key for each in SETTINGS), *row.settings, *row.credentials}
        self._check_names(channel, {*known_names, "enabled", "accounts", "name"})
        accounts = channel.values.get("accounts", {})
        if not isinstance(accounts, dict):
            self.errors.append(f"{place}.accounts: use an object with a key for each account")
            return
        named = without_comments(accounts)
        if not named or any(channel.values.get(key) for key in row.credentials):
            yield self._account(row, "default", [channel], top)
        for account, own in named.items():
            level = _Level("account", f"{place}.accounts.{account}", {})
            if not _ACCOUNT_NAME.fullmatch(account) or not isinstance(own, dict):
                self.errors.append(
                    f"{level.place}: use an object, and a name of letters, digits, - and _"
                )
                continue
            level = level._replace(values=without_comments(own))
            self._check_names(level, {*known_names, "enabled", "name"})
            shared = {k: v for k, v in channel.values.items() if k not in row.credentials}
            yield self._account(row, account, [level, channel._replace(values=shared)], top)

    def _account(self, row: Row, name: str, levels: list[_Level], top: _Level) -> Account:
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for each in SETTINGS:
            where = levels if each.level == "channel" else [*levels, top]
            if each.level != "top":
                values[each.key], origins[each.key] = self._value(each, where)
        for key, kind in row.settings.items():
            values[key], origins[key] = self._value(Setting(key, kind, None, ""), levels)
        for key, variable in row.credentials.items():
            each = Setting(key, text_value, "", "", variable if name == "default" else "")
            values[key], origins[key] = self._value(each, levels)
        self._settle(values, origins, levels)
        missing = tuple(key for key in row.credentials if not values[key])
        is_enabled = all(level.values.get("enabled", True) is not False for level in levels)
        return Account(row, name, is_enabled, values, origins, missing)

    def _settle(self, values: Json, origins: Json, levels: list[_Level]) -> None:
        """Settle what depends on two settings at once."""
        place = levels[0].place
        if values["dmPolicy"] == "open" and "*" not in values["allowFrom"]:
            self.errors.append(
                f'{place}.dmPolicy: "open" lets everybody spend your plan; if that is meant, add '
                '"*" to allowFrom'
            )
        if values["dmPolicy"] == "allowlist" and not values["allowFrom"]:
            self.errors.append(f"{place}.allowFrom: name somebody, or nobody may write")
        if values["groupAllowFrom"] is None:
            values["groupAllowFrom"] = values["allowFrom"]
        if values["async"] and origins["memory"] == "default":
            values["memory"] = "agent"
        ranks = ("account", "channel", "file", "environment", "default")
        is_key_wider = ranks.index(origins["apiKey"]) > ranks.index(origins["agentUrl"])
        if values["apiKey"] and is_key_wider and origins["agentUrl"] in ranks[:2]:
            self.warnings.append(
                f"{place}.agentUrl: no key is sent there, because apiKey belongs to another level; "
                "write one beside it if the agent needs it"
            )
            values["apiKey"] = ""

    def _value(self, setting: Setting, levels: list[_Level]) -> tuple[Any, str]:
        """Return the value of a setting, and where it comes from."""
        for level in levels:
            value = level.values.get(setting.key)
            if value in (None, ""):
                continue
            place = f"{level.place}.{setting.key}".lstrip(".")
            try:
                value = self._resolved(value)
                if value not in (None, ""):
                    return setting.kind(value), level.name
            except ValueError as problem:
                self.errors.append(f"{place}: {json.dumps(value)[:80]}; {problem}")
                return setting.default, "default"
        value = self._environ.get(setting.variable, "") if setting.variable else ""
        if not value:
            return setting.default, "default"
        try:
            return setting.kind(value), "environment"
        except ValueError as problem:
            self.errors.append(f"{setting.variable}: {problem}")
            return setting.default, "default"

    def _resolved(self, value: object) -> object:
        """Return a value that may name where it stands: a variable or a file. Raises ValueError."""
        if isinstance(value, str):
            variable = _VARIABLE.fullmatch(value.strip())
            if variable is not None:
                return self._environ.get(variable.group(1), "")
            return "" if _PLACEHOLDER.fullmatch(value.strip()) else value
        if isinstance(value, dict) and value.get("source") == "env":
            return self._environ.get(str(value.get("id", "")), "")
        if isinstance(value, dict) and value.get("source") == "file":
            try:
                with open(os.path.expanduser(str(value.get("path", ""))), encoding="utf-8") as file:
                    return file.read(65_536).strip()
            except (OSError, UnicodeDecodeError) as problem:
                raise ValueError(f"the file cannot be read: {reason_of(problem)}") from None
        return value

    def _check_names(self, level: _Level, known: Collection[str]) -> None:
        for key in level.values:
            if key in known:
                continue
            place = f"{level.place}.{key}".lstrip(".")
            near = difflib.get_close_matches(key.lower(), _SECURITY_KEYS, 1, 0.8)
            if near:
                meant = _SECURITY_KEYS[near[0]]
                self.errors.append(f"{place}: no such setting; did you mean {meant}?")
            else:
                self.warnings.append(f"{place}: not used here")

    def _check_shared_credentials(self, accounts: list[Account]) -> None:
        owners: dict[tuple[str, str], str] = {}
        for account in accounts:
            for key in account.row.credentials:
                value = account.settings[key]
                owner = owners.setdefault((account.row.id, f"{key}={value}"), account.id)
                if value and owner != account.id:
                    self.errors.append(f"{account.id}: {key} is that of {owner} too; use it once")


def without_comments(values: Json) -> Json:
    """Return an object without the keys that begin with _, which are comments."""
    return {str(key): value for key, value in values.items() if not str(key).startswith("_")}


# ==== 4. Log =================================================================


# ==== 5. Store ===============================================================


# ==== 6. HTTP ================================================================
# One way to the network for calls, long polls and WebSockets: addresses, TLS, proxies. Nothing
# here knows a platform.

#: How long one address of a host may take to accept a connection.
_CONNECT_TIMEOUT_S = 5.0
_MAX_ANSWER_BYTES = 4 * 1024 * 1024
_MAX_HEAD_BYTES = 65_536
#: Not of the internet, yet handed out by proxies that invent an address for each name.
_INVENTED_ADDRESSES = ipaddress.ip_network("198.18.0.0/15")


class NetworkFailed(Exception):
    """A connection could not be made, or broke."""


class HttpAnswer(NamedTuple):
    """An answer that was read to its end."""

    status: int
    #: By lower-case name.
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Json:
        """Return the JSON object of the body, {} if it has none."""
        try:
            value = json.loads(self.body)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def retry_after_s(self) -> float:
        """Return the seconds of Retry-After, 0 without."""
        try:
            return max(0.0, float(self.headers.get("retry-after", "0")))
        except ValueError:
            return 0.0


class Target(NamedTuple):
    """Where a URL leads."""

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
            raise NetworkFailed("not an address of the web") from None
        if not parts.hostname:
            raise NetworkFailed("not an address of the web")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(is_tls, parts.hostname, port, path)

    @property
    def authority(self) -> str:
        """Return host and port as the header Host has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"


class Connector:
    """Makes connections, straight or through a proxy."""

    def __init__(self, proxy: str, environ: Mapping[str, str]) -> None:
        """`proxy` is http://[user:password@]host:port; empty = HTTPS_PROXY of the environment."""
        self._proxy = proxy or environ.get("HTTPS_PROXY", "") or environ.get("https_proxy", "")
        #: Hosts that are reached straight, and the ends of names that are; "*" = all.
        self._straight = [
            each.strip().lower().lstrip(".") for each in
            (environ.get("NO_PROXY", "") or environ.get("no_proxy", "")).split(",") if each.strip()
        ]
        self._tls = ssl.create_default_context()

    def connect(
        self, target: Target, timeout_s: float, *, only_public: bool = False
    ) -> socket.socket:
        """Return a connected socket with this timeout. Raises NetworkFailed, also if `only_public`
        and the host is an address of this machine or of a private network."""
        try:
            sock = self._open(target, only_public)
        except (OSError, ValueError) as problem:
            raise NetworkFailed(f"{target.host}: {reason_of(problem)}") from None
        try:
            sock.settimeout(timeout_s)
            if target.is_tls:
                sock = self._tls.wrap_socket(sock, server_hostname=target.host)
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
            for name in self._straight
        )


def open_socket(host: str, port: int, only_public: bool) -> socket.socket:
    """Return a socket to the first address that answers, IPv4 first: a broken IPv6 is frequent.

    Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    found.sort(key=lambda each: each[0] != socket.AF_INET)
    failure = OSError("no address")
    for family, kind, protocol, _, address in found:
        if only_public and not is_public(str(address[0])):
            failure = OSError("an address of a private network")
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
    """Have a proxy connect to the target. Raises OSError."""
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
    """Return the lines of an HTTP head, and read not one byte more. Raises OSError."""
    head = bytearray()
    while not head.endswith(b"\r\n\r\n"):
        piece = sock.recv(1)
        if not piece or len(head) >= _MAX_HEAD_BYTES:
            raise OSError("the answer broke off")
        head += piece
    return head.decode("latin-1").split("\r\n")[:-2]


def base64_text(data: bytes) -> str:
    """Return bytes in base64."""
    return base64.b64encode(data).decode("ascii")


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the internet."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    parsed = mapped or parsed
    return parsed.is_global or parsed in _INVENTED_ADDRESSES


class _Wire(http.client.HTTPConnection):
    """An HTTP connection over a socket of a Connector."""

    def __init__(self, sock: socket.socket, target: Target) -> None:
        super().__init__(target.host, target.port)
        self.sock = sock


class Exchange:
    """A request that was sent, and its answer, which is read as it comes."""

    def __init__(self, wire: _Wire, answer: http.client.HTTPResponse, sock: socket.socket) -> None:
        self._wire, self._answer, self._socket = wire, answer, sock
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
        body = self._read(lambda: self._answer.read(max_bytes + 1))
        if len(body) > max_bytes:
            raise ValueError(f"larger than {max_bytes} bytes")
        return body

    def cut(self) -> None:
        """Wake up whoever reads, from another thread: nothing more is read."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        self._answer.close()
        self._wire.close()
        self._socket.close()

    def _read(self, read: Callable[[], bytes]) -> bytes:
        try:
            return read()
        except (OSError, http.client.HTTPException, ValueError) as problem:
            raise NetworkFailed(reason_of(problem)) from None


class Http:
    """Calls over one Connector. Each has a connection of its own."""

    def __init__(self, connector: Connector) -> None:
        self.connector = connector

    def open(
        self, method: str, url: str, body: Optional[bytes] = None,
        headers: Optional[Mapping[str, str]] = None, timeout_s: float = 30.0,
        on_open: Callable[[Exchange], None] = lambda exchange: None, only_public: bool = False,
    ) -> Exchange:
        """Send a request and return its exchange once the head of the answer is there.

        `timeout_s` bounds each wait for bytes. Raises NetworkFailed."""
        target = Target.of(url)
        sock = self.connector.connect(target, timeout_s, only_public=only_public)
        wire = _Wire(sock, target)
        try:
            wire.request(method, target.path, body, {"Host": target.authority, **(headers or {})})
            exchange = Exchange(wire, wire.getresponse(), sock)
        except (OSError, http.client.HTTPException, ValueError) as problem:
            sock.close()
            raise NetworkFailed(f"{target.host}: {reason_of(problem)}") from None
        on_open(exchange)
        return exchange

    def call(
        self, method: str, url: str, body: Union[None, bytes, Json] = None,
        headers: Optional[Mapping[str, str]] = None, timeout_s: float = 30.0,
        max_bytes: int = _MAX_ANSWER_BYTES, only_public: bool = False,
    ) -> HttpAnswer:
        """Return the answer to a request; a body that is no bytes is sent as JSON.

        Raises NetworkFailed, ValueError if the answer is larger than `max_bytes`."""
        sent = dict(headers or {})
        if isinstance(body, dict):
            sent.setdefault("Content-Type", "application/json")
            body = compact(body).encode("ascii")
        exchange = self.open(method, url, body, sent, timeout_s, only_public=only_public)
        try:
            return HttpAnswer(exchange.status, exchange.headers, exchange.read(max_bytes))
        finally:
            exchange.close()


# ==== 7. WebSocket ===========================================================
# A client of RFC 6455. No extension is offered, so every frame is as the RFC has it.

_ACCEPT_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_MAX_CONTROL_BYTES = 125
#: Opcodes, section 5.2.
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
#: Close codes, section 7.4.1. The last two are never sent: they say how an end looked from here.
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
        # One frame is sent at a time. Guards `_is_closing` too.
        self._lock = threading.Lock()
        self._is_closing = False

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
        """Return the next message, None if none came in time. Pings are answered on the way.

        Raises WebSocketClosed, also for what breaks the RFC; the connection is closed then."""
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
        """Send a ping; the answer shows in `receive` as nothing. Raises WebSocketClosed."""
        self._send_frame(_PING, b"")

    def close(self, code: int = 1000) -> None:
        """Close the connection and wake up the thread that receives."""
        with contextlib.suppress(WebSocketClosed):
            self._send_frame(_CLOSE, code.to_bytes(2, "big"))
        self.cut()

    def cut(self) -> None:
        """End the connection at once, without a word to the other side."""
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
        return True

    def _next_frame(self) -> Optional[tuple[int, bool, bytes]]:
        """Return opcode, whether it is final, and payload of a frame that is there in full."""
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
            self._raise_close(payload)
        elif opcode in (_TEXT, _BINARY, _CONTINUATION):
            if (opcode == _CONTINUATION) != bool(self._opcode):
                raise WebSocketClosed(_PROTOCOL_ERROR, "fragments out of order")
            self._opcode = self._opcode or opcode
            self._message += payload
            if is_final:
                return self._finish_message()
        elif opcode != _PONG:
            raise WebSocketClosed(_PROTOCOL_ERROR, "an unknown opcode")
        return None

    def _finish_message(self) -> str:
        data, self._opcode = bytes(self._message), 0
        self._message.clear()
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise WebSocketClosed(_NOT_UTF8) from None

    def _raise_close(self, payload: bytes) -> NoReturn:
        code = int.from_bytes(payload[:2], "big") if len(payload) >= 2 else _NO_CODE
        with contextlib.suppress(WebSocketClosed):
            self._send_frame(_CLOSE, payload[:2])
        raise WebSocketClosed(code, clean(payload[2:].decode(errors="replace")))

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
    """Return a payload with its mask, section 5.3: one XOR of two large numbers."""
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
        raise ValueError(f"no WebSocket here: the answer is {' '.join(words[1:]) or 'empty'}")
    digest = hashlib.sha1((key + _ACCEPT_GUID).encode("ascii")).digest()
    if headers.get("sec-websocket-accept") != base64_text(digest):
        raise ValueError("no WebSocket here: the key of the answer is wrong")


# ==== 8. QR code =============================================================
# ISO/IEC 18004, as much as a link needs: byte mode, level L, versions 1 to 10, mask 0 throughout.
# Coordinates are (row, column).

#: For each version: the data bytes of each block, and the bytes for correction of each.
_QR_BLOCKS: tuple[tuple[tuple[int, ...], int], ...] = (
    ((19,), 7), ((34,), 10), ((55,), 15), ((80,), 20), ((108,), 26),
    ((68, 68), 18), ((78, 78), 20), ((97, 97), 24), ((116, 116), 30), ((68, 68, 69, 69), 18),
)
#: For each version: the centres of its alignment patterns, besides 6.
_QR_CENTRES: tuple[tuple[int, ...], ...] = (
    (), (18,), (22,), (26,), (30,), (34,), (22, 38), (24, 42), (26, 46), (28, 50),
)
#: Level L and mask 0, as the format information has them.
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
        # A few cells remain behind the last bit; they hold zeros.
        bit = place < bits and bool(number >> (bits - 1 - place) & 1)
        grid[row][column] = bit ^ ((row + column) % 2 == 0)
    return [[bool(module) for module in line] for line in grid]


def qr_message(data: bytes) -> tuple[int, list[int]]:
    """Return the smallest version for the data, and its blocks with their corrections."""
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
    """Draw everything that is no data."""
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
    """Return the cells for data in their order: pairs of columns from the right, up and down."""
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
    """Return a QR code as lines for a terminal with so many columns, [] if it is too narrow.

    Two rows are one line of half blocks, black on white also where the theme is dark."""
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


# ==== 9. Text ================================================================
# Answers are Markdown. A reader for what models write turns them into the markup of a platform by
# a table of its forms, and the source is split so that each part fits after it was rendered.

#: A part is cut in the last two fifths of what fits, at the best of these places.
_CUT_AFTER = (
    re.compile(r"\n(?=```)|```\n"), re.compile(r"\n\n"), re.compile(r"\n"),
    re.compile("[.!?\u2026] |[\u3002\uff01\uff1f]"), re.compile(r"\s"),
)
_SEARCHED_SHARE = 0.6
#: The longest first line of a fence that is repeated in the next part.
_MAX_OPENER_CHARS = 30
_MAX_LISTED_COLUMNS = 4
_FENCE = re.compile(r"(?m)^(`{3,}|~{3,})([^`\n]*)$")
_TABLE_RULE = re.compile(r"^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$")
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*$")
_ITEM = re.compile(r"(\s*)[-*+]\s+(.*)$")
_INLINE = re.compile(
    r"(?P<ticks>`+)(?P<code>[^`](?:.*?[^`])?)(?P=ticks)(?!`)"
    r"|(?P<picture>!?)\[(?P<label>[^\]\n]*)\]\((?P<url>[^\s()]*(?:\([^\s()]*\)[^\s()]*)*)[^)\n]*\)"
    r"|(?P<bold>\*\*|__)(?=\S)(?P<strong>[^\n]+?)(?<=\S)(?P=bold)"
    r"|~~(?=\S)(?P<strike>[^\n]+?)(?<=\S)~~"
    r"|(?<![\w*])(?P<slant>[*_])(?=[^\s*_])(?P<italic>[^\n]*?[^\s*_])(?P=slant)(?![\w*])"
    r"|(?P<address>https?://[^\s<>]+)",
    re.DOTALL,
)


def _as_it_is(text: str) -> str:
    return text


def _quoted(lines: list[str]) -> str:
    return "\n".join(f"> {line}" for line in lines)


class Markup(NamedTuple):
    """How a platform writes each element. The defaults are Markdown."""

    escape: Callable[[str], str] = _as_it_is
    bold: tuple[str, str] = ("**", "**")
    italic: tuple[str, str] = ("*", "*")
    strike: tuple[str, str] = ("~~", "~~")
    code: tuple[str, str] = ("`", "`")
    #: From the language, which may be empty, and the text.
    fence: Callable[[str, str], str] = lambda language, text: f"```{language}\n{text}\n```"
    link: Callable[[str, str], str] = lambda label, url: f"[{label}]({url})"
    heading: Callable[[int, str], str] = lambda level, text: f"{'#' * level} {text}"
    #: From lines that are rendered.
    quote: Callable[[list[str]], str] = _quoted
    item: str = "- "
    line_end: str = "\n"


#: Without any markup, for platforms that refuse the other form.
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
    """Take a fenced block off the lines and return it rendered; None if none begins here."""
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
    """Take a table off the lines: `Header: cell` lines if it is narrow, else aligned text."""
    if "|" not in lines[0] or len(lines) < 2 or not _TABLE_RULE.match(lines[1]):
        return None
    size = 2 + sum(1 for _ in itertools.takewhile(lambda line: "|" in line, lines[2:]))
    rows = [_cells(line) for number, line in enumerate(lines[:size]) if number != 1]
    del lines[:size]
    head, body = rows[0], rows[1:]
    if len(head) > _MAX_LISTED_COLUMNS or not body:
        return markup.fence("", markup.escape(_aligned(rows)))
    blocks = [
        "\n".join(
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
    """Take quoted lines off the lines."""
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
    """Return text within a line with its markup."""
    done, end = [], 0
    for found in _INLINE.finditer(text):
        done += [markup.escape(text[end:found.start()]), _element(found, markup)]
        end = found.end()
    return "".join([*done, markup.escape(text[end:])])


def _element(found: re.Match[str], markup: Markup) -> str:
    """Return an element within a line."""
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
    """Return Markdown in parts that each fit; a fence that is cut is closed and opened again."""
    parts, rest = [], text.strip("\n")
    while rest and not fits(rest):
        head, rest = _cut(rest, fits)
        parts.append(head)
    return [*parts, rest] if rest.strip() else parts


def _cut(text: str, fits: Callable[[str], bool]) -> tuple[str, str]:
    """Return the first part of a text that is too long, and what is left."""
    low, high = 1, len(text)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(_closed(text[:middle])) else (low, middle)
    end = _best_cut(text, low)
    while end > 1 and not fits(_closed(text[:end])):
        end //= 2
    # Never between the halves of a character, nor before a mark that belongs to the one before.
    while 1 < end < len(text) and (unicodedata.combining(text[end]) or text[end] in "\u200d\ufe0f"):
        end -= 1
    head, tail = text[:end], text[end:]
    opener = _open_fence(head)
    if opener is None:
        return head.rstrip("\n"), tail.lstrip("\n")
    fence, line = opener
    return _closed(head), f"{line if len(line) <= _MAX_OPENER_CHARS else fence}\n{tail}"


def _best_cut(text: str, end: int) -> int:
    """Return the best place for a cut at `end` or shortly before."""
    start = int(end * _SEARCHED_SHARE)
    for pattern in _CUT_AFTER:
        places = [found.end() for found in pattern.finditer(text, start, end)]
        places = [each for each in places if not _is_in_link(text, each)]
        if places:
            return places[-1]
    return end


def _is_in_link(text: str, place: int) -> bool:
    line_start = text.rfind("\n", 0, place) + 1
    return any(
        found.start() < place < found.end()
        for found in _INLINE.finditer(text, line_start, min(len(text), place + 500))
    )


def _open_fence(text: str) -> Optional[tuple[str, str]]:
    """Return the fence that is open at the end of a text, and its first line."""
    opener: Optional[tuple[str, str]] = None
    for found in _FENCE.finditer(text):
        if opener is None:
            opener = found.group(1), found.group(0)
        elif found.group(1).startswith(opener[0]) and not found.group(2).strip():
            opener = None
    return opener


def _closed(text: str) -> str:
    opener = _open_fence(text)
    return text if opener is None else f"{text.rstrip(chr(10))}\n{opener[0]}"


# ==== 10. Opcode gateway =====================================================


# ==== 11. Telegram ===========================================================
# The Bot API by long polls. The next offset is the acknowledgement of everything before it, so it
# is asked for only after the messages before it are safe. https://core.telegram.org/bots/api

#: How long the server holds a poll; the connection may be silent for a little longer.
_TELEGRAM_HOLD_S = 30
_TELEGRAM_SLACK_S = 15
#: How long the parts of an album may be apart.
_TELEGRAM_ALBUM_S = 0.5
_TELEGRAM_COMMANDS = (
    ("new", "begin a new conversation"), ("stop", "stop the answer"),
    ("model", "show or choose the model"), ("more", "the rest of the last answer"),
    ("status", "show how things are"), ("help", "show what can be said"),
)
#: Texts in the description of a refusal, and the kind of failure that each one is.
_TELEGRAM_REFUSALS = (
    ("can't parse entities", "plain"), ("bot was blocked", "never"), ("chat not found", "never"),
    ("user is deactivated", "never"), ("bot was kicked", "never"), ("not enough rights", "never"),
)
_TELEGRAM_MISSING = ("message to be replied not found", "message thread not found")


def _telegram_fence(language: str, text: str) -> str:
    label = html.escape(language, quote=True)
    inner = f'<code class="language-{label}">{text}</code>' if label else text
    return f"<pre>{inner}</pre>"


def _telegram_link(label: str, url: str) -> str:
    is_link = urllib.parse.urlsplit(html.unescape(url)).scheme in ("http", "https", "tg", "mailto")
    address = url.replace('"', "%22")
    return f'<a href="{address}">{label or url}</a>' if is_link else f"{label} ({url})"


#: The HTML that Telegram takes.
TELEGRAM_HTML = Markup(
    escape=lambda text: html.escape(text, quote=False),
    bold=("<b>", "</b>"), italic=("<i>", "</i>"), strike=("<s>", "</s>"),
    code=("<code>", "</code>"), fence=_telegram_fence, link=_telegram_link,
    heading=lambda level, text: f"<b>{text}</b>",
    quote=lambda lines: "<blockquote>" + "\n".join(lines) + "</blockquote>",
    item="\u2022 ",
)


class TelegramRefused(Exception):
    """The Bot API refused a call."""

    def __init__(self, answer: HttpAnswer) -> None:
        content = answer.json()
        #: The error's code, which is the HTTP status too.
        self.code = int(content.get("error_code") or answer.status)
        self.description = str(content.get("description") or f"status {answer.status}")
        self.parameters: Json = content.get("parameters") or {}
        super().__init__(self.description)

    @property
    def wait_s(self) -> float:
        """Return the pause that the platform asks for."""
        return float(self.parameters.get("retry_after") or 1) + 0.5


class Telegram(Channel):
    """A bot of Telegram."""

    def __init__(self, tools: Tools, http: Http) -> None:
        super().__init__(tools, http)
        root = tools.settings.get("apiRoot") or "https://api.telegram.org"
        self._base = f"{root}/bot{tools.settings['botToken']}"
        self._files = f"{root}/file/bot{tools.settings['botToken']}"
        self._bot: Json = {}

    # -- calls ----------------------------------------------------------------------------------

    def _call(self, method: str, body: Json, timeout_s: float = 30.0) -> Any:
        """Return the result of a method. Raises NetworkFailed, TelegramRefused."""
        return self._result(self.http.call("POST", f"{self._base}/{method}", body, {}, timeout_s))

    def _result(self, answer: HttpAnswer) -> Any:
        content = answer.json()
        if not content.get("ok"):
            raise TelegramRefused(answer)
        return content.get("result")

    def probe(self) -> str:
        """Return the name of the bot. Raises Fatal, Retry."""
        try:
            self._bot = self._call("getMe", {})
        except NetworkFailed as problem:
            raise Retry(str(problem)) from None
        except TelegramRefused as refused:
            if refused.code in (401, 404):
                raise Fatal("the token is refused", "take a new one from @BotFather") from None
            raise Retry(refused.description, refused.wait_s) from None
        return f"@{self._bot.get('username', '?')}"

    # -- receiving ------------------------------------------------------------------------------

    def run(self) -> None:
        """Receive messages until the account has to stop. Raises Fatal, Retry."""
        self.probe()
        state = self.tools.state()
        # An offset belongs to one bot: the numbers of another one may be smaller.
        if state.get("bot_id") != self._bot.get("id"):
            state = {"bot_id": self._bot.get("id"), "offset": 0}
        commands = [{"command": name, "description": about} for name, about in _TELEGRAM_COMMANDS]
        with contextlib.suppress(NetworkFailed, TelegramRefused):
            self._call("setMyCommands", {"commands": commands})
        self._warn_of_privacy()
        while not self.tools.stop.is_set():
            try:
                state = self._take(self._poll(state["offset"], _TELEGRAM_HOLD_S), state)
            except NetworkFailed as problem:
                raise Retry(str(problem)) from None
            except TelegramRefused as refused:
                self._recover(refused)

    def _warn_of_privacy(self) -> None:
        if not self.tools.settings["requireMention"] and not self._bot.get(
            "can_read_all_group_messages"
        ):
            self.tools.note(
                "in groups Telegram shows it only mentions and commands: switch privacy mode off "
                "at @BotFather, or leave requireMention on"
            )

    def _poll(self, offset: int, hold_s: int) -> list[Json]:
        """Return the updates from `offset` on; empty if none came in time, or at the end."""
        body = {"offset": offset, "timeout": hold_s, "limit": 100, "allowed_updates": ["message"]}
        try:
            exchange = self.http.open(
                "POST", f"{self._base}/getUpdates", compact(body).encode(),
                {"Content-Type": "application/json"}, hold_s + _TELEGRAM_SLACK_S,
                on_open=lambda opened: self.tools.on_stop(opened.cut),
            )
            try:
                answer = HttpAnswer(exchange.status, exchange.headers, exchange.read())
            finally:
                exchange.close()
        except NetworkFailed:
            if self.tools.stop.is_set():
                return []
            raise
        self.tools.note_frame()
        return list(self._result(answer) or [])

    def _take(self, updates: list[Json], state: Json) -> Json:
        """Hand the messages of updates over and return the state after them."""
        if updates and _album_of(updates[-1]):
            # The rest of an album may still be on its way. Asked from the same offset, because a
            # larger one would acknowledge messages that are not safe yet.
            self.tools.stop.wait(_TELEGRAM_ALBUM_S)
            updates = self._poll(state["offset"], 0) or updates
        for _, group in itertools.groupby(updates, key=lambda each: _album_of(each) or id(each)):
            album = list(group)
            state = {**state, "offset": int(album[-1]["update_id"]) + 1}
            self.tools.accept(self._message(album), state)
        return state

    def _recover(self, refused: TelegramRefused) -> None:
        """Deal with the refusal of a poll. Raises Fatal, Retry."""
        if refused.code in (401, 404):
            raise Fatal("the token is refused", "take a new one from @BotFather") from None
        if refused.code == 409:
            self.tools.note("somebody else polls this bot, or it has a webhook")
            with contextlib.suppress(NetworkFailed, TelegramRefused):
                self._call("deleteWebhook", {"drop_pending_updates": False})
            raise Retry("somebody else polls this bot", 5.0) from None
        raise Retry(refused.description, refused.wait_s if refused.code == 429 else 0.0) from None

    def _message(self, album: list[Json]) -> Optional[Message]:
        """Return the message of an update, or of the updates of an album; None for what is no
        message of a person."""
        each = [update.get("message") or {} for update in album]
        message = next((one for one in each if one.get("text") or one.get("caption")), each[0])
        sender, chat = message.get("from") or {}, message.get("chat") or {}
        attachments = tuple(found for one in each for found in _telegram_attachments(one))
        text, is_mentioned = self._without_mention(message)
        if sender.get("is_bot", True) or chat.get("type") == "channel" or not (text or attachments):
            return None
        thread = message.get("message_thread_id") if message.get("is_topic_message") else None
        quoted = message.get("reply_to_message") or {}
        place = f"{chat['id']}" + (f":topic:{thread}" if thread else "")
        is_direct = chat.get("type") == "private"
        return Message(
            id=str(album[0]["update_id"]), chat=place, kind="direct" if is_direct else "group",
            sender=str(sender["id"]),
            sender_name=str(sender.get("first_name") or sender.get("username") or sender["id"]),
            text=text, is_mentioned=is_mentioned or is_direct,
            quoted=str(quoted.get("text") or quoted.get("caption") or ""),
            attachments=attachments, at_s=float(message.get("date") or 0),
            route={"chat_id": chat["id"], "thread": thread, "message_id": message["message_id"],
                   "is_group": not is_direct},
            group="" if is_direct else str(chat["id"]), place="" if is_direct else place,
        )

    def _without_mention(self, message: Json) -> tuple[str, bool]:
        """Return the text without the bot's own name, and whether the message is for the bot."""
        text = str(message.get("text") or message.get("caption") or "")
        entities = message.get("entities") or message.get("caption_entities") or []
        name = f"@{self._bot.get('username', '')}".lower()
        # Offsets count UTF-16 units.
        units = text.encode("utf-16-le")
        is_mentioned = (message.get("reply_to_message") or {}).get("from", {}).get(
            "id") == self._bot.get("id")
        for entity in sorted(entities, key=lambda each: -int(each.get("offset", 0))):
            start = 2 * int(entity.get("offset", 0))
            end = start + 2 * int(entity.get("length", 0))
            word = units[start:end].decode("utf-16-le", "replace")
            kind = entity.get("type")
            if kind == "bot_command" and word.lower().endswith(name):
                units, is_mentioned = units[:end - 2 * len(name)] + units[end:], True
            elif kind == "mention" and word.lower() == name or (
                kind == "text_mention" and entity.get("user", {}).get("id") == self._bot.get("id")
            ):
                units, is_mentioned = units[:start] + units[end:], True
        return units.decode("utf-16-le", "replace").strip(), is_mentioned

    # -- sending --------------------------------------------------------------------------------

    def send(self, route: Json, part: Part) -> str:
        """Send a part and return the id of its message. Raises SendFailed."""
        body: Json = {"chat_id": route["chat_id"], **self._text(part)}
        if route.get("thread"):
            body["message_thread_id"] = route["thread"]
        if route.get("is_reply"):
            body["reply_parameters"] = {
                "message_id": route["message_id"], "allow_sending_without_reply": True,
            }
        if not self.tools.settings.get("linkPreview"):
            body["link_preview_options"] = {"is_disabled": True}
        return str((self._deliver("sendMessage", body) or {}).get("message_id", ""))

    def edit(self, route: Json, message_id: str, part: Part) -> None:
        """Replace the text of a message. Raises SendFailed."""
        body = {"chat_id": route["chat_id"], "message_id": int(message_id), **self._text(part)}
        self._deliver("editMessageText", body)

    def type(self, route: Json, is_over: bool = False) -> None:
        """Show "typing" for five seconds. Raises SendFailed."""
        if not is_over:
            thread = {"message_thread_id": route["thread"]} if route.get("thread") else {}
            body = {"chat_id": route["chat_id"], "action": "typing", **thread}
            self._deliver("sendChatAction", body)

    def _text(self, part: Part) -> Json:
        if part.is_plain:
            return {"text": render(part.text, PLAIN)}
        return {"text": self.render(part.text), "parse_mode": "HTML"}

    def _deliver(self, method: str, body: Json) -> Any:
        """Return the result of a method that a chat sees. Raises SendFailed."""
        try:
            return self._call(method, body)
        except NetworkFailed as problem:
            raise SendFailed("later", str(problem)) from None
        except TelegramRefused as refused:
            return self._retried(method, body, refused)

    def _retried(self, method: str, body: Json, refused: TelegramRefused) -> Any:
        """Return the result of a call in another form, if that helps. Raises SendFailed."""
        told = refused.description.lower()
        if "message is not modified" in told:
            return None
        if "migrate_to_chat_id" in refused.parameters:
            moved = {**body, "chat_id": refused.parameters["migrate_to_chat_id"]}
            return self._deliver(method, moved)
        optional = {"reply_parameters", "message_thread_id"}
        if any(each in told for each in _TELEGRAM_MISSING) and optional & set(body):
            bare = {key: value for key, value in body.items() if key not in optional}
            return self._deliver(method, bare)
        kind = next((kind for words, kind in _TELEGRAM_REFUSALS if words in told), "")
        if refused.code == 429:
            raise SendFailed("wait", refused.description, refused.wait_s) from None
        if not kind:
            kind = "later" if refused.code >= 500 else "never"
        raise SendFailed(kind, refused.description) from None

    def render(self, markdown: str) -> str:
        """Return the text as the HTML that Telegram takes."""
        return render(markdown, TELEGRAM_HTML)

    def length(self, rendered: str) -> int:
        """Return the length in UTF-16 units. Telegram counts without tags; this is never less."""
        return len(rendered.encode("utf-16-le")) // 2

    # -- files ----------------------------------------------------------------------------------

    def fetch(self, attachment: Attachment, max_bytes: int) -> bytes:
        """Return the bytes of a file. Raises SendFailed, ValueError."""
        found = self._deliver("getFile", {"file_id": attachment.ref["file_id"]}) or {}
        path = urllib.parse.quote(str(found.get("file_path", "")))
        try:
            answer = self.http.call("GET", f"{self._files}/{path}", max_bytes=max_bytes)
        except NetworkFailed as problem:
            raise SendFailed("later", str(problem)) from None
        if answer.status != 200:
            raise SendFailed("never", f"status {answer.status}")
        return answer.body


def _album_of(update: Json) -> str:
    return str((update.get("message") or {}).get("media_group_id") or "")


def _telegram_attachments(message: Json) -> Iterator[Attachment]:
    """Yield the photo and the files of a message."""
    if message.get("photo"):
        photo = message["photo"][-1]
        yield Attachment("image", "photo.jpg", "image/jpeg", int(photo.get("file_size") or 0),
                         {"file_id": photo.get("file_id")})
    for name in ("document", "voice", "audio", "video"):
        found = message.get(name)
        if found:
            mime = str(found.get("mime_type") or "")
            yield Attachment(
                "image" if mime.startswith("image/") else "file",
                clean(found.get("file_name") or name), mime, int(found.get("file_size") or 0),
                {"file_id": found.get("file_id")},
            )


Telegram.row = Row(
    "telegram", (), "Telegram", Telegram, limit=4096,
    credentials={"botToken": "TELEGRAM_BOT_TOKEN"},
    settings={"apiRoot": platform_url_value, "groups": mapping_value, "linkPreview": flag_value,
              "tokenFile": text_value},
    can_edit=True, edit_every_s=1.5, edit_every_in_groups_s=4.0, typing_every_s=4.0,
    help="Talk to @BotFather in Telegram, send /newbot, and copy the token that it gives.",
)


# ==== 12. Discord ============================================================


# ==== 13. QQ =================================================================


# ==== 14. DingTalk ===========================================================


# ==== 15. WeChat =============================================================


# ==== 16. Channel table ======================================================
#: Each channel that is built in; plugins add rows of their own.
ROWS: tuple[Row, ...] = (Telegram.row,)


# ==== 17. Access =============================================================


# ==== 18. Agent ==============================================================


# ==== 19. Turns ==============================================================


# ==== 20. Callbacks ==========================================================


# ==== 21. App ================================================================


# ==== 22. Plugins ============================================================


# ==== 23. Command line =======================================================
