#!/usr/bin/env python3
"""OCP serves your Claude plan to the tools that speak the OpenAI or the Anthropic API.

It drives the official `claude` program, installed and logged in by you, and answers requests of
both kinds from it: one file, Python 3.9 or later, nothing to install.

    python3 ocp_server.py              serve on http://127.0.0.1:3456
    python3 ocp_server.py --demo       the same without an account, with canned answers
    python3 ocp_server.py --check      validate settings and environment, exit 0 or 2
    python3 ocp_server.py --help       everything else

A request is a straight line down this file: the HTTP server finds its route, a dialect parses
the body into a Turn, the gate lets it in, a claude process answers it with a stream of Events,
and the dialect renders those. Wire formats exist only in the dialects; the claude protocol
exists only in its own two sections. Each section uses only names from the sections above it.

Sections (search for "==== 8" to jump to the eighth):

     1. Small tools        clocks, compact JSON, ids, redaction; no input or output
     2. Settings           the table of settings, and how the environment is read
     3. Errors             every failure that a client can be told about
     4. Log                JSON lines in a rotated file, plain lines on the terminal, a ring
     5. Models             which models there are and what each one takes
     6. Turns and events   the narrow waist: one request, one stream of events
     7. Store              the SQLite file, and the settings changed at run time
     8. Keys and callers   who may use which route, and the keys of devices
     9. Usage and quotas   one row for each request, and what keys may use
    10. Patterns           regular expressions of clients, for JavaScript and for Python
    11. JSON Schema        schemas of clients, parsed into plain 2020-12
    12. Model schemas      what claude and the API accept of a schema, and the way back
    13. Request fields     typed access to JSON; messages become a prompt
    14. Attachments        images and files of requests, and their limits
    15. Tools and options  tools, output schemas, thinking and sampling
    16. Dialects           wire formats: a body becomes a Turn, events become an answer
    17. Claude protocol    what is said to claude and what its lines mean; pure
    18. Claude process     the program on disk, one child, its pipes, and its end
    19. Gate and spares    who may run now; idle processes that wait for work
    20. Parking            what is kept of a conversation for its next message
    21. Cache              answers given again, and shared while they come
    22. Account            what is known about login and plan, learned from answers
    23. Metrics            counters and histograms since the start
    24. Connections        sockets, and the bounds of what they take together
    25. State folder       the database, the modes of files, the admin key
    26. Answering          one request: quota, cache, claude, row of usage
    27. App                owns every long-lived object; the housekeeper
    28. API description    what a route is, and the OpenAPI document of them all
    29. Dashboard          the page for the operator, and what it may do
    30. Endpoints          one function for each route
    31. Routes             the table of routes
    32. HTTP server        sockets, bodies, one thread for each connection
    33. Demo claude        the stand-in behind --demo
    34. Command line       arguments, signals, main
"""
from __future__ import annotations

import sys

if sys.version_info < (3, 9):
    sys.exit("OCP needs Python 3.9 or later; this is Python %d.%d." % sys.version_info[:2])

import argparse
import base64
import binascii
import bisect
import codecs
import collections
import contextlib
import dataclasses
import datetime
import enum
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import http.client
import io
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import os
import queue
import re
import resource
import secrets
import select
import selectors
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
import traceback
import unicodedata
import urllib.parse
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from types import MappingProxyType
from typing import (
    Any,
    BinaryIO,
    ClassVar,
    Literal,
    NamedTuple,
    NoReturn,
    Protocol,
    TextIO,
    Union,
)

VERSION = "0.1.0"

#: A JSON object as the wire has it. Inside the waist, values are typed.
Json = dict[str, Any]
Clock = Callable[[], float]


# ==== 1. Small tools =========================================================
# Helpers that know nothing of HTTP, of claude or of settings.


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def to_json(value: object) -> bytes:
    """Compact UTF-8 JSON without a newline.

    Text with a lone surrogate, which JSON may carry and UTF-8 may not, is escaped instead.
    """
    try:
        return _ENCODER.encode(value).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode("ascii")


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _parse_int(digits: str) -> int:
    """Turning very many digits into a number takes quadratic time."""
    if len(digits) > 400:
        raise ValueError("a number has too many digits")
    return int(digits)


def _parse_float(text: str) -> float:
    """What is too large for a number would be written again as Infinity, which is not JSON."""
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value


_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_int=_parse_int, parse_float=_parse_float
)


#: The most values in one body: each takes hundreds of bytes and some microseconds. The longest
#: prompts hold some ten thousand.
_MAX_JSON_VALUES = 300_000


#: How much of a text is counted at a time, so that counting takes no memory to speak of.
_COUNTED_BYTES = 1_048_576


def has_many_values(data: bytes | bytearray) -> bool:
    """Return whether a JSON text holds more values than are read. Takes some milliseconds for each
    megabyte, and ends early where there are too many."""
    if sum(map(data.count, (b"[", b"{", b","))) <= _MAX_JSON_VALUES:
        return False
    # Most of them may stand in strings. Without escapes, every second piece is a string.
    count, is_in_string, rest = 0, False, b""
    for start in range(0, len(data), _COUNTED_BYTES):
        text = rest + data[start:start + _COUNTED_BYTES]
        backslashes = len(text) - len(text.rstrip(b"\\"))
        # The last of an odd number escapes what comes next.
        rest = b"\\" if backslashes % 2 else b""
        bare = text[:len(text) - len(rest)].replace(b"\\\\", b"").replace(b'\\"', b"")
        pieces = bare.split(b'"')
        outside = b"".join(pieces[int(is_in_string)::2])
        is_in_string ^= len(pieces) % 2 == 0
        count += sum(map(outside.count, (b"[", b"{", b",")))
        if count > _MAX_JSON_VALUES:
            return True
    return False


def from_json(data: bytes | bytearray | str) -> object:
    """The value of a JSON text. Raises ValueError for anything else, however deep or odd."""
    try:
        return _DECODER.decode(data if isinstance(data, str) else data.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def new_id(prefix: str) -> str:
    """`prefix` and 24 random characters, letters and digits only: some clients strip the rest."""
    return prefix + secrets.token_hex(12)


_SECRET = re.compile(r"(sk-ant-|ocp_(?=[\w-]{32})|Bearer\s+)[A-Za-z0-9_.\-]{6,}")


def redacted(text: str) -> str:
    """`text` with whatever looks like a token or a key blotted out."""
    return _SECRET.sub(lambda match: match.group(1) + "[redacted]", text)


def is_key(text: str) -> bool:
    """Whether it has the form of a key that this program gives out."""
    return re.fullmatch(r"ocp_[A-Za-z0-9_-]{32}", text) is not None


_PATH = re.compile(
    r"(?:file://|\b[A-Za-z]:|(?<![\w./]))/"
    r"(?:(?:root|home|etc|tmp|var|usr|opt|mnt|srv|Users|private|Volumes)\b[^\s'\"),;]*"
    r"|[\w.@+-]+(?:/[\w.@+-]+)+/?)"
)


def without_paths(text: str) -> str:
    """`text` with absolute paths of this machine replaced, fit for a client's eyes."""
    return _PATH.sub("[path]", text)


def one_line(text: str, most_chars: int = 300) -> str:
    """`text` with its white space run together, cut to `most_chars`."""
    line = " ".join(text.split())
    return line if len(line) <= most_chars else line[: most_chars - 3] + "..."


def printable(text: str) -> str:
    """`text` with escapes, such as \\x1b, for what cannot be seen or commands a terminal: controls,
    marks of direction, lone surrogates."""
    if text.isprintable():
        return text
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return "".join(shown)


def peer_group(address: str) -> str:
    """Whom an address stands for: in IPv6 one machine may have all of a network."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    mapped = getattr(parsed, "ipv4_mapped", None)
    if mapped or parsed.version == 4 or parsed.is_loopback:
        return str(mapped or parsed)
    return str(ipaddress.ip_network((parsed, 64), strict=False))


#: A header that lists names ends after so many characters: clients refuse longer heads.
_HEADER_LIST_MAX_CHARS = 1_000


def header_list(names: Iterable[str]) -> str:
    """Return `names` as the value of a header: each once, and where there is no room for all, how
    many more there are. What a header may not hold becomes a question mark."""
    # A comma separates; it can be part of a name that a client made up.
    known = {re.sub(r"[^ -+\--~]", "?", one_line(name, 80)): None for name in names}
    told: list[str] = []
    left = _HEADER_LIST_MAX_CHARS
    for name in known:
        left -= len(name) + 2
        if left < 0:
            return ", ".join([*told, f"{len(known) - len(told)} more"])
        told.append(name)
    return ", ".join(told)


def format_failure(error: BaseException) -> str:
    """An exception and where it came from, for the log."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames))
    return f"{error!r} in {places}"


def format_uptime(seconds: float) -> str:
    """How long something has lasted: "0h 4m"."""
    minutes = int(seconds // 60)
    return f"{minutes // 60}h {minutes % 60}m"


def format_span(seconds: float) -> str:
    """How long something takes yet: "2d 3h", "3h 12m", "5m", or "now"."""
    minutes = math.ceil(seconds / 60)
    if minutes <= 0:
        return "now"
    if minutes > 24 * 60:
        return f"{minutes // 1440}d {minutes % 1440 // 60}h"
    return f"{minutes // 60}h {minutes % 60}m" if minutes >= 60 else f"{minutes}m"


def iso_time(epoch_s: float) -> str:
    """Epoch seconds as ISO 8601 in UTC with milliseconds, for logs and JSON."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(epoch_s))
    return f"{whole}.{int(epoch_s % 1 * 1000):03d}Z"


_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?)?"
    r"(Z|[+-]\d\d:?\d\d)?"
)


def epoch_of(text: str) -> float:
    """Epoch seconds of an ISO 8601 date or time; one without a zone is in the machine's own.

    Raises ValueError.
    """
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError("is no time such as 2027-01-31 or 2027-01-31T12:00:00Z")
    year, month, day, hour, minute, second = (int(part or 0) for part in match.groups()[:6])
    zone = (match[8] or "").replace(":", "")
    found = datetime.datetime(
        year, month, day, hour, minute, second, tzinfo=datetime.timezone.utc if zone else None
    )
    seconds = found.timestamp() + float(f"0.{match[7] or 0}")
    if len(zone) == 5:
        ahead_s = int(zone[1:3]) * 3600 + int(zone[3:]) * 60
        seconds -= ahead_s if zone[0] == "+" else -ahead_s
    return seconds


def write_private(path: str, text: str) -> None:
    """Writes a file that only its owner may read, whole or not at all. Raises OSError."""
    aside = f"{path}.{secrets.token_hex(4)}.new"
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


# ==== 2. Settings ============================================================
# The class body of Config is the table of settings: attribute, default, environment variable,
# range, unit and help stand in one row, and everything else that knows settings walks it. A
# Config is an immutable snapshot. A value that cannot be used stops the start; nothing is
# guessed. Durations are milliseconds in the environment and are read as seconds by the code.


def setting(
    default: int | str | bool,
    env: str,
    help_text: str,
    *,
    unit: str = "",
    minimum: int | None = None,
    maximum: int | None = None,
    choices: tuple[str, ...] = (),
    secret: bool = False,
    live: str = "",
) -> Any:
    """One row of the table. The type of the value is the type of `default`.

    `live` is the name under which the setting can be changed while the server runs; empty = it is
    read at the start only.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "env": env,
            "help": help_text,
            "unit": unit,
            "minimum": minimum,
            "maximum": maximum,
            "choices": choices,
            "secret": secret,
            "live": live,
        },
        repr=not secret,
    )


_LOOPBACK_NAMES = ("127.0.0.1", "::1", "localhost")

#: What CLAUDE_ALLOWED_TOOLS=default stands for.
DEFAULT_AGENT_TOOLS = (
    "Bash", "Read", "Write", "Edit", "Glob", "Grep", "WebSearch", "WebFetch", "Agent",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, with its value. The rows are documented by their help texts."""

    # -- listening ----------------------------------------------------------------------------
    port: int = setting(
        3456, "CLAUDE_PROXY_PORT", "TCP port; 0 = any free one", minimum=0, maximum=65_535
    )
    bind: str = setting("127.0.0.1", "CLAUDE_BIND", "address to listen on; 0.0.0.0 or :: = all")
    allowed_origins: str = setting(
        "", "OCP_ALLOWED_ORIGINS",
        "web origins whose pages may call the API, comma separated, with * for a part of the name, "
        "such as vscode-webview://*; empty = none",
    )
    allowed_hosts: str = setting(
        "", "OCP_ALLOWED_HOSTS",
        "host names, besides local ones, under which the server may be called, comma separated",
    )
    tls_cert: str = setting("", "OCP_TLS_CERT", "certificate chain (PEM) to serve https with")
    tls_key: str = setting("", "OCP_TLS_KEY", "private key (PEM) of the certificate")
    instance_name: str = setting("", "OCP_INSTANCE_NAME", "a label for /health")
    # -- access -------------------------------------------------------------------------------
    auth_mode: str = setting(
        "", "CLAUDE_AUTH_MODE",
        "who may use the API: none (whoever can connect), shared (holders of PROXY_API_KEY) or "
        "multi (holders of keys made at /api/keys); empty = shared if PROXY_API_KEY is set, else "
        "none",
        choices=("", "none", "shared", "multi"),
    )
    api_key: str = setting("", "PROXY_API_KEY", "the shared key of the API", secret=True)
    admin_key: str = setting(
        "", "OCP_ADMIN_KEY",
        "the key of the admin routes; empty = generated into the file admin-key of OCP_HOME",
        secret=True,
    )
    anonymous_key: str = setting(
        "", "PROXY_ANONYMOUS_KEY", "mode multi: a key for everybody, without quota", secret=True
    )
    advertise_anonymous_key: bool = setting(
        True, "PROXY_ADVERTISE_ANON_KEY", "/health tells the anonymous key to whoever asks"
    )
    wrong_key_delay_ms: int = setting(
        2_000, "OCP_WRONG_KEY_DELAY",
        "longest delay of the answer to a wrong key, after several from one address; 0 = none",
        unit="ms", minimum=0, maximum=60_000,
    )
    # -- claude -------------------------------------------------------------------------------
    claude_bin: str = setting(
        "", "CLAUDE_BIN", "path of the claude program; empty = looked for on PATH and usual places"
    )
    default_model: str = setting(
        "sonnet", "OCP_DEFAULT_MODEL",
        "model of a request that names none; kept warm from the start",
    )
    system_prompt: str = setting(
        "", "CLAUDE_SYSTEM_PROMPT", "text appended to the system prompt of every request"
    )
    max_retries: int = setting(
        2, "CLAUDE_MAX_RETRIES", "how often claude itself retries a failed API call",
        minimum=0, maximum=10,
    )
    pass_env: str = setting(
        "", "OCP_PASS_ENV",
        "environment variables that claude gets besides the usual ones, comma separated",
    )
    # -- spares -------------------------------------------------------------------------------
    warm_processes: int = setting(
        1, "OCP_WARM_PROCESSES", "idle claude processes kept for each model in use; 0 = none",
        minimum=0, maximum=8, live="warmProcesses",
    )
    warm_total: int = setting(
        4, "OCP_WARM_TOTAL", "idle claude processes over all models", minimum=0, maximum=32,
        live="warmTotal",
    )
    warm_idle_ms: int = setting(
        900_000, "OCP_WARM_IDLE", "how long an idle process waits before it is dropped",
        unit="ms", minimum=1_000, maximum=86_400_000, live="warmIdleMs",
    )
    # -- agent mode ---------------------------------------------------------------------------
    allowed_tools: str = setting(
        "", "CLAUDE_ALLOWED_TOOLS",
        "agent mode: tools that claude may use on the server by itself, comma separated; "
        "`default` = " + ", ".join(DEFAULT_AGENT_TOOLS),
    )
    skip_permissions: bool = setting(
        False, "CLAUDE_SKIP_PERMISSIONS", "agent mode: claude may use every tool it has"
    )
    mcp_config: str = setting(
        "", "CLAUDE_MCP_CONFIG", "agent mode: file with MCP servers for claude"
    )
    agent_folder: str = setting(
        "", "OCP_AGENT_FOLDER", "agent mode: folder that claude works in; empty = an empty one"
    )
    agent_text: str = setting(
        "all", "OCP_AGENT_TEXT",
        "agent mode: `all` = the text of every round, `final` = of the last round only",
        choices=("all", "final"),
    )
    # -- conversations ------------------------------------------------------------------------
    parked_processes: int = setting(
        4, "OCP_PARKED_PROCESSES",
        "processes that wait with their conversation for its next message; 0 = none",
        minimum=0, maximum=64, live="parkedProcesses",
    )
    session_ttl_ms: int = setting(
        3_600_000, "CLAUDE_SESSION_TTL", "how long a conversation is kept for its next message",
        unit="ms", minimum=1_000, maximum=86_400_000, live="sessionTTL",
    )
    session_id: bool = setting(
        False, "OCP_SESSION_ID",
        "take the field session_id and the header X-Session-Id for ocp_session_id; not where "
        "clients only group requests by them", live="sessionId",
    )
    max_prompt_chars: int = setting(
        0, "CLAUDE_MAX_PROMPT_CHARS",
        "longest prompt, of which the oldest messages are dropped; 0 = three for each token of "
        "the model's window",
        unit="characters", minimum=0, maximum=100_000_000, live="maxPromptChars",
    )
    # -- cache --------------------------------------------------------------------------------
    cache_ttl_ms: int = setting(
        0, "CLAUDE_CACHE_TTL", "how long an answer is served again to the same request; 0 = never",
        unit="ms", minimum=0, maximum=86_400_000, live="cacheTTL",
    )
    cache_max_bytes: int = setting(
        33_554_432, "OCP_CACHE_MAX_BYTES", "what all cached answers may take in memory",
        unit="bytes", minimum=65_536, maximum=4_294_967_296, live="cacheMaxBytes",
    )
    cache_sampled: bool = setting(
        True, "OCP_CACHE_SAMPLED", "cache the answers to requests with a temperature above 0 too",
        live="cacheSampled",
    )
    # -- limits -------------------------------------------------------------------------------
    max_concurrent: int = setting(
        8, "CLAUDE_MAX_CONCURRENT", "answers at the same time", minimum=1, maximum=64,
        live="maxConcurrent",
    )
    max_queue: int = setting(
        16, "CLAUDE_MAX_QUEUE", "requests that may wait for their turn", minimum=0, maximum=1000,
        live="maxQueue",
    )
    queue_retry_after_s: int = setting(
        5, "CLAUDE_QUEUE_RETRY_AFTER", "Retry-After of a refusal for a full queue",
        unit="s", minimum=1, maximum=60, live="queueRetryAfter",
    )
    max_connections: int = setting(
        256, "OCP_MAX_CONNECTIONS", "open client connections", minimum=4, maximum=10_000,
    )
    max_body_bytes: int = setting(
        33_554_432, "CLAUDE_MAX_BODY_SIZE", "largest request body",
        unit="bytes", minimum=1_024, maximum=1_073_741_824, live="maxBodySize",
    )
    image_allow_url: bool = setting(
        False, "CLAUDE_IMAGE_ALLOW_URL",
        "pass http(s) image addresses on to the API, which fetches them; OCP never does",
    )
    max_image_bytes: int = setting(
        10_485_760, "CLAUDE_MAX_IMAGE_BYTES", "largest image, decoded", unit="bytes", minimum=1
    )
    max_images: int = setting(
        600, "CLAUDE_MAX_IMAGES",
        "images and files in one request; 100 at most where the window is 200,000 tokens",
        minimum=0,
    )
    max_image_total_bytes: int = setting(
        23_068_672, "CLAUDE_MAX_IMAGE_TOTAL_BYTES",
        "images and files of one request together, decoded", unit="bytes", minimum=1,
    )
    # -- time ---------------------------------------------------------------------------------
    timeout_ms: int = setting(
        600_000, "CLAUDE_TIMEOUT", "longest time for one answer, waiting included",
        unit="ms", minimum=1_000, maximum=3_600_000, live="timeout",
    )
    heartbeat_ms: int = setting(
        15_000, "CLAUDE_HEARTBEAT_INTERVAL", "silence before a comment in a stream; 0 = never",
        unit="ms", minimum=0, maximum=600_000, live="heartbeatInterval",
    )
    whole_silence_ms: int = setting(
        120_000, "OCP_WHOLE_SILENCE",
        "silence before an answer that is not streamed gets its headers and white space; 0 = never",
        unit="ms", minimum=0, maximum=600_000, live="wholeSilence",
    )
    header_timeout_ms: int = setting(
        30_000, "OCP_HEADER_TIMEOUT", "longest time for a request's head to arrive",
        unit="ms", minimum=100, maximum=600_000,
    )
    body_timeout_ms: int = setting(
        120_000, "OCP_BODY_TIMEOUT", "longest time for a request's body to arrive",
        unit="ms", minimum=100, maximum=3_600_000,
    )
    write_timeout_ms: int = setting(
        60_000, "OCP_WRITE_TIMEOUT", "how long a client may leave its answer unread",
        unit="ms", minimum=100, maximum=3_600_000, live="writeTimeout",
    )
    drain_ms: int = setting(
        20_000, "OCP_DRAIN", "how long running answers get to finish at a shutdown",
        unit="ms", minimum=0, maximum=600_000,
    )
    # -- files --------------------------------------------------------------------------------
    home: str = setting("~/.ocp", "OCP_HOME", "folder of the log and all other state")
    usage_days: int = setting(
        400, "OCP_USAGE_DAYS", "how long the rows of /api/usage are kept",
        unit="days", minimum=1, maximum=3650, live="usageDays",
    )
    log_level: str = setting(
        "info", "OCP_LOG_LEVEL", "least level that is logged",
        choices=("debug", "info", "warn", "error"),
    )

    @property
    def mode(self) -> str:
        """The access mode in force: "none", "shared" or "multi"."""
        return self.auth_mode or ("shared" if self.api_key else "none")

    @property
    def is_agent(self) -> bool:
        """Whether claude may use tools of its own on the server."""
        return bool(self.allowed_tools or self.skip_permissions or self.mcp_config)

    @property
    def is_usable_without_key(self) -> bool:
        """Whether others than this machine can use the API without having been given a key."""
        keyless = self.mode == "none" or bool(self.advertised_key)
        return keyless and self.bind not in _LOOPBACK_NAMES

    @property
    def advertised_key(self) -> str:
        """The key that /health tells to whoever asks, or an empty string."""
        shown = self.mode == "multi" and self.advertise_anonymous_key
        return self.anonymous_key if shown else ""

    @property
    def secrets(self) -> frozenset[str]:
        """The keys of this server itself."""
        return frozenset({self.api_key, self.admin_key, self.anonymous_key} - {""})

    @property
    def home_path(self) -> str:
        """The state folder as an absolute path."""
        return os.path.abspath(os.path.expanduser(self.home))


#: An origin, or a pattern of origins that no site of somebody else's fits.
_ORIGIN = re.compile(
    r"[^*]*|https?://(\*\.)?[^*/:]+(:(\*|\d+))?/?|(?!https?:)[a-z][a-z0-9+.-]*://[^/]*/?",
    re.IGNORECASE,
)

#: Rules across settings: (is broken, what to do about it).
CONFIG_RULES: tuple[tuple[Callable[[Config], bool], str], ...] = (
    (
        lambda config: config.mode == "shared" and not config.api_key,
        "CLAUDE_AUTH_MODE=shared needs PROXY_API_KEY: set the key that clients will send",
    ),
    (
        lambda config: config.mode == "none" and bool(config.api_key),
        "PROXY_API_KEY is set but CLAUDE_AUTH_MODE=none would ignore it: unset one of them",
    ),
    (
        lambda config: config.mode == "multi" and bool(config.api_key),
        "PROXY_API_KEY is set but CLAUDE_AUTH_MODE=multi would ignore it: unset it, and make a "
        "key for each device at /api/keys",
    ),
    (
        lambda config: config.mode != "multi" and bool(config.anonymous_key),
        "PROXY_ANONYMOUS_KEY means something with CLAUDE_AUTH_MODE=multi only",
    ),
    (
        lambda config: bool(config.admin_key)
        and config.admin_key in (config.api_key, config.anonymous_key),
        "OCP_ADMIN_KEY is also the key of clients: every one of them would be an admin",
    ),
    (
        lambda config: bool(config.tls_cert) != bool(config.tls_key),
        "OCP_TLS_CERT and OCP_TLS_KEY belong together: set both or none",
    ),
    (
        lambda config: config.is_agent and config.is_usable_without_key,
        "agent mode (CLAUDE_ALLOWED_TOOLS, CLAUDE_SKIP_PERMISSIONS, CLAUDE_MCP_CONFIG) lets "
        "requests run tools on this machine: set PROXY_API_KEY, bind to 127.0.0.1, or keep the "
        "anonymous key to yourself with PROXY_ADVERTISE_ANON_KEY=0",
    ),
    (
        lambda config: not all(map(_ORIGIN.fullmatch, listed(config.allowed_origins))),
        "OCP_ALLOWED_ORIGINS takes origins, such as https://app.example.org; a * may stand for "
        "what comes before a domain, for a port, or behind a scheme that is not of the web, as "
        "in https://*.example.org, http://localhost:*, vscode-webview://*",
    ),
)

#: What JSON calls the types of settings.
_JSON_TYPES = {int: "integer", bool: "boolean", str: "string"}

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

_TRUE_WORDS = ("1", "true", "yes", "on")
_FALSE_WORDS = ("0", "false", "no", "off")


class ConfigError(Exception):
    """Settings that cannot be used. `args[0]` has one line for each problem."""


def _parse_integer(row: dataclasses.Field[Any], text: str) -> int:
    value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,400}", text) else None
    minimum, maximum = row.metadata["minimum"], row.metadata["maximum"]
    if value is None:
        raise ValueError("is not a whole number")
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        span = f"{minimum} or more" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"is out of range: it takes {span}")
    return value


def parse_setting(row: dataclasses.Field[Any], text: str) -> int | str | bool:
    """The value that `text` stands for in this row. Raises ValueError saying what is wrong."""
    text = text.strip()
    if isinstance(row.default, bool):
        if text.lower() not in _TRUE_WORDS + _FALSE_WORDS:
            raise ValueError("is neither 1 nor 0")
        return text.lower() in _TRUE_WORDS
    if isinstance(row.default, int):
        return _parse_integer(row, text)
    choices = row.metadata["choices"]
    if choices and text not in choices:
        raise ValueError("is none of " + ", ".join(choice for choice in choices if choice))
    return text


def checked_setting(row: dataclasses.Field[Any], value: object) -> int | str | bool:
    """The value that JSON gives for this row. Raises ValueError saying what is wrong."""
    kind = type(row.default)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not kind:
        words = {int: "a whole number", bool: "true or false", str: "a string"}
        raise ValueError(f"must be {words[kind]}")
    return parse_setting(row, str(value))


def live_settings() -> dict[str, dataclasses.Field[Any]]:
    """The rows that can be changed while the server runs, by their names there."""
    rows = dataclasses.fields(Config)
    return {row.metadata["live"]: row for row in rows if row.metadata["live"]}


def load_config(environ: Mapping[str, str]) -> Config:
    """The settings of this environment. An empty variable counts as not set.

    Raises ConfigError with every problem at once, never only the first.
    """
    values: dict[str, int | str | bool] = {}
    problems: list[str] = []
    for row in dataclasses.fields(Config):
        name = row.metadata["env"]
        text = environ.get(name, "")
        if not text.strip():
            continue
        try:
            values[row.name] = parse_setting(row, text)
        except ValueError as problem:
            shown = "its value" if row.metadata["secret"] else repr(text)
            problems.append(f"{name}: {shown} {problem}")
    config = Config(**values)  # type: ignore[arg-type]  # each row checked its own value
    problems += [message for is_broken, message in CONFIG_RULES if is_broken(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def removed_settings(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """The variables of this environment that no longer mean anything: (name, why)."""
    found = []
    for name in sorted(environ):
        for pattern, why in REMOVED_SETTINGS:
            if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
                found.append((name, why))
    return found


def listed(text: str) -> tuple[str, ...]:
    """The items of a comma-separated setting."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


def settings_markdown() -> str:
    """The settings table as it stands in the README."""
    lines = [
        "| variable | default | range | at run time | what it is |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in dataclasses.fields(Config):
        minimum, maximum = row.metadata["minimum"], row.metadata["maximum"]
        span = "" if minimum is None else f"{minimum} up" if maximum is None else (
            f"{minimum} to {maximum}")
        if isinstance(row.default, bool):
            default = "1" if row.default else "0"
        else:
            default = str(row.default)
        unit = f" {row.metadata['unit']}" if row.metadata["unit"] and default else ""
        shown = f"{default}{unit}" or "empty"
        live = f"`{row.metadata['live']}`" if row.metadata["live"] else ""
        cells = (f"`{row.metadata['env']}`", shown, span, live, row.metadata["help"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ==== 3. Errors ==============================================================
# One class for each failure that a client can be told about. A class is a row: status, type
# and code in the OpenAI shape, type in the Anthropic shape. An instance adds the message, which
# says what to do next. Nothing outside this section and the dialects knows a status code.
# ClientGone is apart: nobody is left to be told. ConfigError belongs to the operator.


class OcpError(Exception):
    """A failure of ours, and the base of all others."""

    status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"
    anthropic_type: ClassVar[str] = "api_error"
    code: ClassVar[str | None] = None
    #: Whether the same request may succeed later without anybody doing anything.
    retryable: ClassVar[bool] = True
    #: Whether the request was turned away before anything was done for it.
    rejected_before_work: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """`param` names the field that is wrong; `retry_after_s` says when to come back."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code or self.code
        self.retry_after_s = retry_after_s
        #: More for programs that read the error, beside the message.
        self.details: Json = {}
        #: Whether the log has it already.
        self.logged = False
        #: Whether the API turned the request away by itself: quotas do not count that.
        self.refused_upstream = False

    def headers(self) -> dict[str, str]:
        """The response headers that belong to this failure."""
        found = {}
        if self.retry_after_s is not None:
            found["Retry-After"] = str(max(1, round(self.retry_after_s)))
        if not self.retryable:
            found["x-should-retry"] = "false"
        return found


class BadRequest(OcpError):
    """The request is malformed; `param` says where."""

    status = 400
    openai_type = "invalid_request_error"
    anthropic_type = "invalid_request_error"
    retryable = False


class Unsupported(BadRequest):
    """The request asks for something that cannot be had here."""

    code = "unsupported_parameter"


class ContextTooLong(BadRequest):
    """The prompt does not fit the model."""

    code = "context_length_exceeded"


class Unauthorized(OcpError):
    """No key, or not the right one."""

    status = 401
    openai_type = "authentication_error"
    anthropic_type = "authentication_error"
    code = "invalid_api_key"
    retryable = False
    rejected_before_work = True

    def headers(self) -> dict[str, str]:
        """Names the scheme, as HTTP wants with a 401."""
        return {**super().headers(), "WWW-Authenticate": 'Bearer realm="ocp"'}


class Forbidden(OcpError):
    """The caller is known, or does not matter, and may not do this."""

    status = 403
    openai_type = "permission_error"
    anthropic_type = "permission_error"
    retryable = False


class NotFound(OcpError):
    """There is no such thing here."""

    status = 404
    openai_type = "invalid_request_error"
    anthropic_type = "not_found_error"
    retryable = False


class UnknownModel(NotFound):
    """The model is not one of ours."""

    code = "model_not_found"


class MethodNotAllowed(OcpError):
    """The path exists, but not for this method."""

    status = 405
    openai_type = "invalid_request_error"
    anthropic_type = "invalid_request_error"
    retryable = False

    def __init__(self, message: str, allowed: Iterable[str]) -> None:
        super().__init__(message)
        self.allowed = tuple(allowed)

    def headers(self) -> dict[str, str]:
        """Names the methods that the path takes."""
        return {**super().headers(), "Allow": ", ".join(self.allowed)}


class Conflict(OcpError):
    """Something of this name is there already."""

    status = 409
    openai_type = "invalid_request_error"
    anthropic_type = "invalid_request_error"
    code = "name_taken"
    retryable = False


class RequestTimeout(OcpError):
    """The request did not arrive in time."""

    status = 408
    openai_type = "invalid_request_error"
    anthropic_type = "invalid_request_error"


class TooLarge(OcpError):
    """The body, or an image in it, is larger than this server takes."""

    status = 413
    openai_type = "invalid_request_error"
    anthropic_type = "request_too_large"
    retryable = False


class HeadTooLarge(OcpError):
    """The request line or a header is longer than this server takes."""

    status = 431
    openai_type = "invalid_request_error"
    anthropic_type = "invalid_request_error"
    retryable = False


class QueueFull(OcpError):
    """Too many requests wait already."""

    status = 429
    openai_type = "rate_limit_error"
    anthropic_type = "rate_limit_error"
    code = "rate_limit_exceeded"
    rejected_before_work = True


class RateLimited(QueueFull):
    """The API itself asks for fewer requests for a moment."""

    rejected_before_work = False


class QuotaExceeded(OcpError):
    """A key has used up what the operator allows it until a reset."""

    status = 429
    openai_type = "quota_exceeded"
    anthropic_type = "rate_limit_error"
    code = "insufficient_quota"
    retryable = False
    rejected_before_work = True


class PlanLimit(OcpError):
    """A limit of the plan is used up until its reset."""

    status = 429
    openai_type = "insufficient_quota"
    anthropic_type = "rate_limit_error"
    code = "insufficient_quota"
    retryable = False


class LoginLost(OcpError):
    """claude is not logged in, or its login was refused."""

    status = 401
    openai_type = "authentication_error"
    anthropic_type = "authentication_error"
    code = "upstream_login_required"
    retryable = False


class ClaudeUnavailable(OcpError):
    """There is no claude program that could be used."""

    status = 503
    code = "claude_unavailable"
    retryable = False
    rejected_before_work = True


class ClaudeMissing(ClaudeUnavailable):
    """The program was not found."""


class ClaudeAway(ClaudeUnavailable):
    """The program was there a moment ago; updating it takes it away for seconds."""

    retryable = True


class ClaudeTooOld(ClaudeUnavailable):
    """The program is older than what OCP was tested with."""


class UpstreamFailed(OcpError):
    """claude or the API behind it failed."""

    status = 502
    code = "upstream_failed"


class EmptyAnswer(BadRequest):
    """The model said nothing. 400 because clients ask again and again after any other status."""

    code = "empty_answer"


class UpstreamForbidden(Forbidden):
    """The API refused this account, or this model to it."""

    code = "upstream_forbidden"


class Overloaded(OcpError):
    """The API is overloaded."""

    status = 529
    anthropic_type = "overloaded_error"
    code = "overloaded"


class UpstreamTimeout(OcpError):
    """The answer took longer than the time-out allows."""

    status = 504
    anthropic_type = "timeout_error"
    code = "timeout"


class Busy(OcpError):
    """Too many connections are open."""

    status = 503
    anthropic_type = "overloaded_error"
    code = "too_many_connections"


class MemoryFull(OcpError):
    """A caller's requests and unread answers take too much memory."""

    status = 503
    anthropic_type = "overloaded_error"
    code = "memory_full"


class Draining(OcpError):
    """The server is about to stop."""

    status = 503
    anthropic_type = "overloaded_error"
    code = "shutting_down"
    rejected_before_work = True


class NotReady(OcpError):
    """The server runs, but a request would not be answered."""

    status = 503
    anthropic_type = "overloaded_error"
    code = "not_ready"


class StorageFailed(OcpError):
    """The database cannot be read or written."""

    status = 503
    code = "database_failed"


class StorageLocked(StorageFailed):
    """Another program holds the database."""

    code = "database_locked"


class StorageFull(StorageFailed):
    """The disk has no room for what has to be kept."""

    status = 507
    code = "disk_full"


class ClientGone(Exception):
    """The client closed its connection: there is nobody to tell anything. What its row of usage
    says instead is here."""

    status: ClassVar[int] = 499
    word: ClassVar[str] = "abandoned"


# ==== 4. Log =================================================================
# One event is one flat record with a fixed name in the past tense. It goes to a rotated file as
# a JSON line, to the terminal as a plain line, and into a ring for GET /logs. Never a prompt,
# never a secret: callers pass names, counts and durations, and text is redacted here. What the
# operator changes goes into a ring and a file of its own too, out of which nothing else pushes it.

LEVELS = ("debug", "info", "warn", "error")
#: How many events GET /logs can tell, and how many more of what the operator changed.
_RING_EVENTS = 800
_RING_AUDITS = 200
#: What of a line is printed: in UTF-8 never more than a pipe takes at once.
_MAX_SHOWN_CHARS = 1_000


class _LogFile(logging.handlers.RotatingFileHandler):
    """A rotated file that is private from birth and whose failures stay its own."""

    def _open(self) -> io.TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return open(descriptor, "a", encoding="utf-8", errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk must not stop an answer; the terminal and the ring still have the event."""


def _log_value(value: object) -> object:
    """A value as the log may hold it: text on one line, redacted, short and printable."""
    if isinstance(value, (bool, int, float)) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(_log_value(str(key))): _log_value(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_log_value(each) for each in value]
    return printable(one_line(redacted(str(value)), 500))


class Log:
    """Where events go. `event` and `audit` never raise."""

    def __init__(self, stream: TextIO | None, least_level: str, clock: Clock = time.time) -> None:
        """`stream` is None where the server was started without one."""
        self._stream = stream
        self._least = LEVELS.index(least_level)
        self._clock = clock
        # Guards the rings, the files and the order of lines on the stream. Held for one event.
        self._lock = threading.Lock()
        #: Events with their numbers: what the operator changed, and all others.
        self._audits: collections.deque[tuple[int, Json]] = collections.deque(maxlen=_RING_AUDITS)
        self._ring: collections.deque[tuple[int, Json]] = collections.deque(maxlen=_RING_EVENTS)
        #: How many events there were.
        self._count = 0
        self._file: _LogFile | None = None
        self._audit_file: _LogFile | None = None

    def to_file(self, path: str) -> None:
        """From now on also to `path`, rotated at 10 MB, and what is audited to audit.log beside it,
        rotated at 1 MB; three old ones of each are kept. Raises OSError."""
        folder = os.path.dirname(path)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        handler = _LogFile(path, maxBytes=10_000_000, backupCount=3, encoding="utf-8")
        audits = _LogFile(
            os.path.join(folder, "audit.log"), maxBytes=1_000_000, backupCount=3,
            encoding="utf-8", delay=True,
        )
        with self._lock:
            self._file, self._audit_file = handler, audits

    def event(self, level: str, name: str, **fields: object) -> None:
        """Records one event. Text is redacted, cut to one line and made printable."""
        if LEVELS.index(level) >= self._least:
            self._record(level, name, fields, is_audit=False)

    def audit(self, name: str, **fields: object) -> None:
        """Records what the operator changed, whatever the least level is."""
        self._record("info", name, fields, is_audit=True)

    def _record(
        self, level: str, name: str, fields: Mapping[str, object], *, is_audit: bool
    ) -> None:
        entry: Json = {"ts": iso_time(self._clock()), "level": level, "event": name}
        entry.update((key, _log_value(each)) for key, each in fields.items() if each is not None)
        with self._lock:
            (self._audits if is_audit else self._ring).append((self._count, entry))
            self._count += 1
            self._write(entry, is_audit)

    def _write(self, entry: Json, is_audit: bool) -> None:
        line = logging.makeLogRecord({"msg": json.dumps(entry, ensure_ascii=False)})
        if self._file is not None:
            self._file.handle(line)
        if self._audit_file is not None and is_audit:
            self._audit_file.handle(line)
        fields = " ".join(f"{k}={v}" for k, v in entry.items() if k not in ("ts", "level", "event"))
        clock = time.strftime("%H:%M:%S", time.localtime(self._clock()))
        self._show(f"{clock} {entry['level']:5} {entry['event']} {fields}")

    def _show(self, line: str) -> None:
        """Prints a line, unless nobody reads: a pipe that is full must not stop the server. The
        event is in the file and in the ring all the same."""
        with contextlib.suppress(OSError, ValueError):
            if self._stream is not None and self._takes_more(self._stream):
                print(line[:_MAX_SHOWN_CHARS], file=self._stream, flush=True)

    def _takes_more(self, stream: TextIO) -> bool:
        """Whether the stream takes a line without waiting for its reader. Raises OSError."""
        try:
            descriptor = stream.fileno()
        except io.UnsupportedOperation:
            return True
        # A pipe is ready for writing when it takes PIPE_BUF bytes at once.
        ready = select.poll()
        ready.register(descriptor, select.POLLOUT)
        return bool(ready.poll(0))

    def recent(self, count: int, level: str) -> list[Json]:
        """The newest `count` events of this level or worse, oldest first; "all" = every level,
        "audit" = what the operator changed."""
        minimum = LEVELS.index(level) if level in LEVELS else 0
        with self._lock:
            kept = list(self._audits) if level == "audit" else self._kept()
        found = [entry for _, entry in kept if LEVELS.index(entry["level"]) >= minimum]
        return found[-count:] if count else []

    def _kept(self) -> list[tuple[int, Json]]:
        """What both rings hold, oldest first. To be called with the lock."""
        return sorted([*self._audits, *self._ring], key=lambda numbered: numbered[0])

    def since(self, seen: int) -> tuple[list[Json], int]:
        """The events behind the first `seen`, as far as they are still there, and how many there
        are now."""
        with self._lock:
            return [entry for number, entry in self._kept() if number >= seen], self._count

    def close(self) -> None:
        """Closes the files; later events go to the stream and the rings only."""
        with self._lock:
            handlers = (self._file, self._audit_file)
            self._file = self._audit_file = None
        for handler in handlers:
            if handler is not None:
                handler.close()


#: How many refusals of one peer have a line of their own in a minute, and how many peers.
_REFUSALS_TOLD = 5
_MAX_REFUSED_PEERS = 32
_REFUSALS_EVERY_S = 60.0


class Refusals:
    """Logs what strangers are refused: a few lines for each peer and minute, and then their sum,
    so that nobody without a key can fill the log."""

    def __init__(self, log: Log, clock: Clock = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        # Guards the next fields; never held for a line of the log.
        self._lock = threading.Lock()
        self._since_s = clock()
        #: How often each status was told to each peer of this minute; "others" beyond so many.
        self._counts: dict[str, collections.Counter[int]] = {}

    def note(self, peer: str, status: int, **fields: object) -> None:
        """Records one refusal."""
        group = peer_group(peer)
        with self._lock:
            is_listed = group in self._counts or len(self._counts) < _MAX_REFUSED_PEERS
            counts = self._counts.setdefault(
                group if is_listed else "others", collections.Counter()
            )
            told = is_listed and sum(counts.values()) < _REFUSALS_TOLD
            counts[status] += 1
        if told:
            self._log.event("info", "request_refused", peer=peer, status=status, **fields)

    def tend(self, *, at_once: bool = False) -> None:
        """Logs the sums of a minute that is over, or `at_once`."""
        with self._lock:
            if not at_once and self._clock() - self._since_s < _REFUSALS_EVERY_S:
                return
            counted, self._counts, self._since_s = self._counts, {}, self._clock()
        for peer, counts in counted.items():
            if peer == "others" or sum(counts.values()) > _REFUSALS_TOLD:
                statuses = {str(status): count for status, count in sorted(counts.items())}
                self._log.event(
                    "warn", "requests_refused", peer=peer, count=sum(counts.values()),
                    statuses=statuses,
                )


# ==== 5. Models ==============================================================
# models.json beside this file is the source; BUILTIN_MODELS is the same, so that this file works
# when copied alone (a test holds the two equal). A model says what its API takes: whether it
# accepts sampling parameters, how it thinks, and which levels of effort it knows. Older models
# are served by their names and listed nowhere. A name is compared in one spelling; one without a
# row gets the facts of the row that its family and version are nearest to.

BUILTIN_MODELS: Json = {
    "version": 1,
    "models": [
        {
            "id": "claude-opus-5", "displayName": "Claude Opus 5",
            "openclawName": "Claude Opus 5 (via CLI)", "reasoning": True,
            "contextWindow": 1000000, "maxTokens": 64000, "thinking": "adaptive",
            "sampling": False, "efforts": ["low", "medium", "high", "xhigh", "max"],
        },
        {
            "id": "claude-opus-4-8", "displayName": "Claude Opus 4.8",
            "openclawName": "Claude Opus 4.8 (via CLI)", "reasoning": True,
            "contextWindow": 1000000, "maxTokens": 64000, "thinking": "adaptive",
            "sampling": False, "efforts": ["low", "medium", "high", "xhigh", "max"],
        },
        {
            "id": "claude-opus-4-7", "displayName": "Claude Opus 4.7",
            "openclawName": "Claude Opus 4.7 (via CLI)", "reasoning": True,
            "contextWindow": 1000000, "maxTokens": 64000, "thinking": "adaptive",
            "sampling": False, "efforts": ["low", "medium", "high", "xhigh", "max"],
        },
        {
            "id": "claude-opus-4-6", "displayName": "Claude Opus 4.6",
            "openclawName": "Claude Opus 4.6 (via CLI)", "reasoning": True,
            "contextWindow": 200000, "longContext": True, "maxTokens": 64000,
            "thinking": "adaptive", "sampling": True, "efforts": ["low", "medium", "high", "max"],
        },
        {
            "id": "claude-sonnet-5", "displayName": "Claude Sonnet 5",
            "openclawName": "Claude Sonnet 5 (via CLI)", "reasoning": True,
            "contextWindow": 1000000, "maxTokens": 64000, "thinking": "adaptive",
            "sampling": False, "efforts": ["low", "medium", "high", "xhigh", "max"],
        },
        {
            "id": "claude-sonnet-4-6", "displayName": "Claude Sonnet 4.6",
            "openclawName": "Claude Sonnet 4.6 (via CLI)", "reasoning": True,
            "contextWindow": 200000, "longContext": True, "maxTokens": 32000,
            "thinking": "adaptive", "sampling": True, "efforts": ["low", "medium", "high", "max"],
        },
        {
            "id": "claude-haiku-4-5-20251001", "displayName": "Claude Haiku 4.5",
            "openclawName": "Claude Haiku 4.5 (via CLI)", "reasoning": False,
            "contextWindow": 200000, "maxTokens": 32000, "thinking": "budget",
            "sampling": True, "efforts": [],
        },
    ],
    "olderModels": [
        {
            "id": "claude-opus-4-5-20251101", "displayName": "Claude Opus 4.5",
            "openclawName": "Claude Opus 4.5 (via CLI)", "reasoning": False,
            "contextWindow": 200000, "maxTokens": 32000, "thinking": "budget",
            "sampling": True, "efforts": ["low", "medium", "high"],
        },
        {
            "id": "claude-opus-4-1-20250805", "displayName": "Claude Opus 4.1",
            "openclawName": "Claude Opus 4.1 (via CLI)", "reasoning": False,
            "contextWindow": 200000, "maxTokens": 32000, "thinking": "budget",
            "sampling": True, "efforts": [],
        },
        {
            "id": "claude-opus-4-20250514", "displayName": "Claude Opus 4",
            "openclawName": "Claude Opus 4 (via CLI)", "reasoning": False,
            "contextWindow": 200000, "maxTokens": 32000, "thinking": "budget",
            "sampling": True, "efforts": [],
        },
        {
            "id": "claude-sonnet-4-5-20250929", "displayName": "Claude Sonnet 4.5",
            "openclawName": "Claude Sonnet 4.5 (via CLI)", "reasoning": False,
            "contextWindow": 200000, "longContext": True, "maxTokens": 32000,
            "thinking": "budget", "sampling": True, "efforts": [],
        },
        {
            "id": "claude-sonnet-4-20250514", "displayName": "Claude Sonnet 4",
            "openclawName": "Claude Sonnet 4 (via CLI)", "reasoning": False,
            "contextWindow": 200000, "longContext": True, "maxTokens": 32000,
            "thinking": "budget", "sampling": True, "efforts": [],
        },
    ],
    "aliases": {
        "opus": "claude-opus-5",
        "sonnet": "claude-sonnet-5",
        "haiku": "claude-haiku-4-5-20251001",
    },
    "legacyAliases": {
        "claude-opus-4": "claude-opus-4-7",
        "claude-haiku-4": "claude-haiku-4-5-20251001",
        "claude-haiku-4-5": "claude-haiku-4-5-20251001",
    },
}


class Model(NamedTuple):
    """One model and what its API takes."""

    id: str
    display_name: str
    #: Whether it thinks unless told otherwise.
    reasoning: bool
    context_window: int
    max_tokens: int
    #: "adaptive" (the model decides, effort steers it) or "budget" (so many tokens).
    thinking: str
    #: Whether the API takes temperature and top_p for it.
    sampling: bool
    #: Levels of effort, least first; empty = it knows none.
    efforts: tuple[str, ...]
    #: Whether claude takes it with a window of LONG_CONTEXT_TOKENS too, when asked to.
    long_context: bool = False
    #: Whether it is one of those that clients are told about.
    listed: bool = True
    #: False for a name that models.json does not have.
    known: bool = True
    #: The name that claude is started with: the id, or more exact than it.
    argument: str = ""

    @property
    def lineage(self) -> tuple[str, tuple[int, ...]]:
        """Family and version as the id tells them."""
        return lineage_of(self.id)


_THINKING = ("adaptive", "budget")
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
#: The fields of a model in models.json and their types.
_MODEL_FIELDS: tuple[tuple[str, type], ...] = (
    ("id", str), ("displayName", str), ("reasoning", bool), ("contextWindow", int),
    ("maxTokens", int), ("thinking", str), ("sampling", bool), ("efforts", list),
)


def _model(row: Json, *, listed: bool) -> Model:
    """The model of a row. Raises ValueError, KeyError, TypeError."""
    for name, kind in _MODEL_FIELDS:
        if type(row[name]) is not kind:
            raise ValueError(f"{row.get('id')}: {name} is no {kind.__name__}")
    if row["thinking"] not in _THINKING or not set(row["efforts"]) <= set(_EFFORTS):
        raise ValueError(f"{row['id']}: thinking or efforts is none that is known")
    return Model(
        id=row["id"],
        display_name=row["displayName"],
        reasoning=row["reasoning"],
        context_window=row["contextWindow"],
        max_tokens=row["maxTokens"],
        thinking=row["thinking"],
        sampling=row["sampling"],
        efforts=tuple(row["efforts"]),
        long_context=row.get("longContext") is True,
        listed=listed,
        argument=row["id"],
    )


#: How claude is told to give a model its long window, and how long that is.
LONG_CONTEXT_SUFFIX = "[1m]"
LONG_CONTEXT_TOKENS = 1_000_000
#: How clients write that, before what other endings a name may have.
_LONG_CONTEXT = re.compile(r"(?:\[1m\]|[-_ ]1m)(?=(?:[-:]thinking)?$)")

_FAMILIES = "opus|sonnet|haiku|fable|mythos"
#: From this major version on a name says its family before its version.
_FAMILY_FIRST_SINCE = 4
_DATE = re.compile(r"-\d{8}$")
#: What leads to the one spelling of a name, in this order: what providers put around it
#: (us.anthropic.X-v1:0, anthropic:X, X:thinking, X@20250929, X-latest), separators, and names such
#: as "sonnet-4-6" and "claude-4-5-sonnet".
_SPELLINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^.*/", ""),
        (r"^(?:[a-z-]+\.)?anthropic\.", ""),
        (r"-v\d+(?::\d+)?$", ""),
        (r":(?:thinking|beta|free|online|latest)$", ""),
        (r"^\w+:", ""),
        (r"[\s_.@]+", "-"),
        (r"-(?:latest|default|thinking)$", ""),
        (rf"^(?=(?:{_FAMILIES})-\d)", "claude-"),
        (rf"^claude-([{_FAMILY_FIRST_SINCE}-9](?:-\d\d?)?)-({_FAMILIES})\b", r"claude-\2-\1"),
    )
)


def spelled(name: str) -> str:
    """Return a model's name in the one spelling in which names are compared."""
    text = name.strip().lower()
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


def lineage_of(model_id: str) -> tuple[str, tuple[int, ...]]:
    """Return the family and the version in an id; empty where it tells none."""
    words = _DATE.sub("", model_id).split("-")[1:]
    version = tuple(int(word) for word in words if re.fullmatch(r"\d{1,2}", word))
    family = next((word for word in words if word.isalpha()), "")
    return family, version


class Models:
    """The models by name. Immutable."""

    def __init__(self, source: Json) -> None:
        """`source` has the shape of models.json. Raises ValueError, KeyError or TypeError if it
        does not."""
        listed = [_model(row, listed=True) for row in source["models"]]
        older = [_model(row, listed=False) for row in source.get("olderModels", ())]
        self._by_id = {model.id: model for model in (*listed, *older)}
        self._aliases: dict[str, str] = {**source["legacyAliases"], **source["aliases"]}
        lost = [name for name, model_id in self._aliases.items() if model_id not in self._by_id]
        if lost or not listed:
            raise ValueError(f"aliases without a model: {lost}" if lost else "no models")
        self._ids: dict[str, str] = {}
        for model_id in self._by_id:
            undated = _DATE.sub("", model_id)
            major_only = len(lineage_of(model_id)[1]) == 1
            for name in (model_id, undated, undated + "-0" if major_only else undated):
                self._ids[spelled(name)] = model_id
        for name, model_id in self._aliases.items():
            self._ids[spelled(name)] = model_id
            self._ids.setdefault(spelled("claude-" + name), model_id)

    def all(self) -> list[Model]:
        """Every model, in the file's order, which is newest first; the older ones last."""
        return list(self._by_id.values())

    def names(self) -> list[str]:
        """Every name that clients are told about."""
        return [*(model.id for model in self.all() if model.listed), *self._aliases]

    def find(self, name: str, *, long_context: bool = False) -> Model:
        """Return the model of this name or alias, however it is spelled.

        An unlisted name that starts with "claude-" is believed to be a model that behaves as the
        nearest of its family does. The suffix [1m], or -1m, asks for the long window, and so does
        `long_context`; a model that is known to have none keeps its own. Raises UnknownModel for
        any other name.
        """
        text, wants_long = _LONG_CONTEXT.subn("", name.strip().lower())
        model = self._found(spelled(text))
        if model is None:
            raise UnknownModel(
                f"There is no model {one_line(name, 80)!r} here. "
                f"Use one of: {', '.join(self.names())}.",
                param="model",
            )
        # A name that is not in models.json may have a window that nobody knows of here.
        has_long = model.long_context or not model.known
        if not (has_long and (wants_long or (long_context and model.long_context))):
            return model
        return model._replace(
            context_window=LONG_CONTEXT_TOKENS, argument=model.argument + LONG_CONTEXT_SUFFIX
        )

    def same(self, names: Iterable[str]) -> set[str]:
        """Return the ids of the models that these names stand for now."""
        found = ((name, self._found(spelled(name))) for name in names)
        return {name if model is None else model.id for name, model in found}

    def _found(self, name: str) -> Model | None:
        """The model of a name in its one spelling."""
        model_id = self._ids.get(name)
        if model_id is not None:
            return self._by_id[model_id]
        dated = self._by_id.get(self._ids.get(_DATE.sub("", name), ""))
        if dated is not None:
            # A model whose own id has no date has no versions by date either.
            other = _DATE.search(dated.id) is not None
            return dated._replace(argument=name, known=False) if other else dated
        if re.fullmatch(r"claude-[a-z0-9][a-z0-9.\-]{0,99}", name):
            like = self._nearest(*lineage_of(name))
            return like._replace(
                id=name, argument=name, display_name=name, known=False, listed=False
            )
        return None

    def _nearest(self, family: str, version: tuple[int, ...]) -> Model:
        """The model that one of this family and version is most like: the newest one of its
        family that is not newer. What is of a newer generation than its family has yet, and what
        has no family here, is like the newest model there is; what is older, like the oldest."""
        rows = sorted(
            (model for model in self.all() if model.lineage[1]), key=lambda model: model.lineage[1]
        )
        newest = self.all()[0]
        generation = newest.lineage[1][:1]
        kin = [model for model in rows if model.lineage[0] == family]
        if not version or (not kin and version >= (_FAMILY_FIRST_SINCE,)):
            return newest
        if kin and kin[-1].lineage[1] < version and kin[-1].lineage[1] < generation <= version:
            return newest
        older = [model for model in kin if model.lineage[1] <= version]
        return (older[-1:] or kin[:1] or rows[:1] or [newest])[0]


def load_models(folder: str) -> Models:
    """The models of `folder`/models.json, or the built-in ones where there is no such file.

    Raises ConfigError when the file is there and cannot be used.
    """
    path = os.path.join(folder, "models.json")
    try:
        with open(path, encoding="utf-8") as file:
            source = from_json(file.read())
        if not isinstance(source, dict):
            raise ValueError("is not a JSON object")
        return Models(source)
    except FileNotFoundError:
        return Models(BUILTIN_MODELS)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ConfigError(f"models.json cannot be used: {problem!r}") from problem


# ==== 6. Turns and events ====================================================
# The narrow waist. A Turn is one request to a model, in no wire format; an answer is a stream of
# Events with the meaning of the Messages API's own stream. Content blocks are that API's blocks,
# as dictionaries, because claude takes and gives them as they are. Pure data.

#: One content block: {"type": "text", "text": ...}, {"type": "image", "source": ...}, ...
Block = dict[str, Any]


class Message(NamedTuple):
    """One message of the conversation. `role` is "user" or "assistant"; "system" too where a
    request is read and where a response is stored, but never in a Turn."""

    role: str
    content: list[Block]

    @property
    def has_results(self) -> bool:
        """Whether results of tool calls are in it."""
        return any(block["type"] == "tool_result" for block in self.content)


class Tool(NamedTuple):
    """A tool of the client's, which the client runs itself."""

    name: str
    description: str
    #: The JSON schema of its arguments, as claude is told it.
    schema: Json
    #: Whether the arguments stand in an object of their own there, and the properties that have
    #: another name there than with the client: the one there, the client's.
    wrapped: bool = False
    renamed: tuple[tuple[str, str], ...] = ()


class ToolChoice(NamedTuple):
    """Which tools the model may call. `kind` is "auto", "any" (at least one), "tool" (the one
    called `name`) or "none"."""

    kind: str = "auto"
    name: str = ""
    #: Whether it may call several at once.
    parallel: bool = True

    @property
    def forces(self) -> bool:
        """Whether the model has no choice but to call a tool."""
        return self.kind in ("any", "tool")


class OutputSchema(NamedTuple):
    """The JSON schema that an answer has to fit.

    claude wants an object at its root; another root is `wrapped` as {"value": ...}.
    """

    schema: Json
    wrapped: bool
    #: Properties that have another name in it than with the client: the one in it, the client's.
    renamed: tuple[tuple[str, str], ...] = ()
    #: A schema that says more, which the answer has to fit too.
    exact: Json | None = None


#: So many stop sequences the API is given.
_MAX_STOPS = 16


class Options(NamedTuple):
    """What the client asked of the API, cut down to what the model takes.

    None and empty mean: claude's own default. With 0 for `max_tokens` the prompt is read, and
    the answer ends before it begins.
    """

    max_tokens: int | None = None
    stop_sequences: tuple[str, ...] = ()
    #: temperature, top_p and top_k, as far as they were given: (name, value), sorted.
    sampling: tuple[tuple[str, float], ...] = ()
    effort: str | None = None
    #: None = the model's default, 0 = no thinking, else a budget in tokens.
    thinking_tokens: int | None = None
    #: Whether the text of the thinking is to be left out of the answer.
    hides_thinking: bool = False

    @property
    def sent_stops(self) -> tuple[str, ...]:
        """The stop sequences that the API takes: not too many, and none of white space only."""
        return tuple(text for text in self.stop_sequences if text.strip())[:_MAX_STOPS]

    @property
    def own_stops(self) -> tuple[str, ...]:
        """The others, at which the answer is ended here."""
        sent = self.sent_stops
        return tuple(text for text in self.stop_sequences if text not in sent)


class Turn(NamedTuple):
    """One request to a model. The last message is always the user's, unless it is only counted."""

    model: Model
    messages: list[Message]
    options: Options
    system: str = ""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    #: None = an answer in plain text.
    output_schema: OutputSchema | None = None
    #: How many answers are wanted, and the messages of all but the first where they differ.
    choices: int = 1
    others: tuple[list[Message], ...] = ()
    #: The client's name for a conversation that the server remembers; empty = none.
    session_id: str = ""
    stream: bool = False
    #: Whether an answer that was given before will not do.
    fresh: bool = False
    #: Paths of what the request holds and nobody reads.
    ignored: tuple[str, ...] = ()
    #: Repairs of the request, each with how often it was made.
    adjusted: tuple[tuple[str, int], ...] = ()
    #: What the dialect needs again to render the answer; nobody else looks inside.
    wire: Mapping[str, Any] = MappingProxyType({})

    @property
    def offered(self) -> tuple[tuple[Tool, ...], ToolChoice]:
        """The tools that the model is told of, and the choice among them. An answer that has to
        fit a shape is a tool call to the model: "none" would forbid that too."""
        if self.output_schema is not None and self.tool_choice.kind == "none":
            return (), ToolChoice()
        return self.tools, self.tool_choice

    def choice(self, index: int) -> Turn:
        """The turn of one of several answers."""
        return self._replace(messages=self.others[index - 1]) if index and self.others else self


class Usage(NamedTuple):
    """Tokens of one answer, as the API counts them."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    #: None = not known.
    reasoning_tokens: int | None = None
    #: The API's own tables of counts, as it gives them: by time in the cache, by server tool.
    tables: Mapping[str, Json] = MappingProxyType({})

    @property
    def prompt_tokens(self) -> int:
        """Everything that the model read, from the cache or not."""
        return self.input_tokens + self.cache_read_tokens + self.cache_write_tokens


NO_USAGE = Usage()


class Started(NamedTuple):
    """The model began a message. A second one replaces what came before, if that was no answer."""

    message_id: str
    model: str
    usage: Usage


class BlockStarted(NamedTuple):
    """A content block began; `block` is its empty form."""

    block_index: int
    block: Block


class Delta(NamedTuple):
    """A piece of a block. `kind` is "text", "thinking", "signature", "arguments", or "refusal"
    where the answer does not fit its Shape."""

    block_index: int
    kind: str
    text: str


class BlockStopped(NamedTuple):
    """A content block is complete."""

    block_index: int


class Restarted(NamedTuple):
    """claude dropped the message and asks the API again: all deltas so far are void."""


class Finished(NamedTuple):
    """The answer is complete. Always the last event, and never missing from an answer."""

    #: The API's word: end_turn, max_tokens, stop_sequence, tool_use, refusal, ...
    stop_reason: str
    stop_sequence: str | None
    usage: Usage
    #: What the API says about a refusal.
    stop_details: Json | None = None


class Tick(NamedTuple):
    """Nothing happened for a heartbeat's time."""


Event = Union[Started, BlockStarted, Delta, BlockStopped, Restarted, Finished, Tick]
#: An event of one of the answers to a turn: which one, counted from 0.
Choice = tuple[int, Event]


class Answer(NamedTuple):
    """A whole answer."""

    message_id: str
    model: str
    #: Text, thinking and tool_use blocks in the model's order.
    blocks: list[Block]
    #: What the model said instead of an answer that fits its Shape.
    refusal: str
    stop_reason: str
    stop_sequence: str | None
    usage: Usage
    stop_details: Json | None = None

    def joined(self, kind: str) -> str:
        """The "text" or the "thinking" of all blocks."""
        return "".join(str(b.get(kind, "")) for b in self.blocks if b["type"] == kind)

    @property
    def calls(self) -> list[Block]:
        """The tool_use blocks."""
        return [block for block in self.blocks if block["type"] == "tool_use"]


#: The field of a block that the deltas of a kind add up to.
_BLOCK_FIELDS = {"text": "text", "thinking": "thinking", "signature": "signature"}


def arguments_of(given: object) -> Json:
    """Return the arguments of a tool call, which come as an object or as its JSON text.

    Models are not always exact, and clients repeat what they said: anything else is kept as
    {"arguments": its text}, so that the conversation goes on.
    """
    found = given
    with contextlib.suppress(ValueError):
        found = from_json(given) if isinstance(given, str) else given
    if isinstance(found, dict):
        return found
    # An empty array is how PHP writes an empty object.
    if given in (None, "", []):
        return {}
    return {"arguments": given if isinstance(given, str) else to_json(given).decode("utf-8")}


class AnswerBuilder:
    """Puts an answer together from its events."""

    def __init__(self) -> None:
        self._started = Started("", "", NO_USAGE)
        self._blocks: dict[int, Block] = {}
        self._pieces: dict[tuple[int, str], list[str]] = {}

    def note(self, event: Event) -> None:
        """Takes the next event."""
        if isinstance(event, Delta):
            self._pieces.setdefault((event.block_index, event.kind), []).append(event.text)
        elif isinstance(event, BlockStarted):
            self._blocks[event.block_index] = dict(event.block)
        elif isinstance(event, Started):
            self._started = event
        elif isinstance(event, Restarted):
            self._blocks.clear()
            self._pieces.clear()

    def answer(self, finished: Finished) -> Answer:
        """The answer. A tool call that was cut off is left out: it must not run."""
        whole = finished.stop_reason == "tool_use"
        found = sorted(self._blocks.items())
        blocks = [self._block(index, block, whole) for index, block in found]
        refusals = [piece for (_, kind), piece in self._pieces.items() if kind == "refusal"]
        return Answer(
            message_id=self._started.message_id,
            model=self._started.model,
            blocks=[block for block in blocks if block is not None],
            refusal="".join("".join(pieces) for pieces in refusals),
            stop_reason=finished.stop_reason,
            stop_sequence=finished.stop_sequence,
            usage=finished.usage,
            stop_details=finished.stop_details,
        )

    def _block(self, index: int, block: Block, whole: bool) -> Block | None:
        if block.get("type") == "tool_use":
            arguments = "".join(self._pieces.get((index, "arguments"), ()))
            if whole:
                return {**block, "input": arguments_of(arguments)}
            with contextlib.suppress(ValueError):
                return {**block, "input": from_json(arguments)}
            return None
        filled = dict(block)
        for kind, field in _BLOCK_FIELDS.items():
            if (index, kind) in self._pieces:
                filled[field] = "".join(self._pieces[index, kind])
        return filled


class Bounds:
    """Ends an answer where the client wants it to end and the API cannot be told: at own stop
    texts, or before it begins. Leaves the text of thinking out where that is not wanted."""

    def __init__(self, options: Options, output_schema: OutputSchema | None) -> None:
        # What stands in the strings of a JSON answer is no text that could stop it.
        self._stops = options.own_stops if output_schema is None else ()
        self._empty = options.max_tokens == 0
        self._hides_thinking = options.hides_thinking
        #: The beginning of a block that nothing has followed yet: its process may be dead.
        self._begun: list[Event] = []
        #: The end of the text so far that may be the beginning of a stop text.
        self._held = ""
        #: Whether the answer was ended here, while claude goes on.
        self.ended = False

    def events(self, event: Event) -> list[Event]:
        """Return what the client gets of this event, and of what was held back before it."""
        if isinstance(event, Tick):
            return [event]
        if self._empty and isinstance(event, BlockStarted):
            return self._end("max_tokens", None)
        begun, self._begun = self._begun, []
        if isinstance(event, BlockStarted):
            self._begun = [event]
            return begun
        if isinstance(event, Restarted):
            self._held = ""
            return [event]
        return [*begun, *self._followed(event)]

    def _followed(self, event: Event) -> list[Event]:
        if isinstance(event, Delta) and event.kind == "thinking" and self._hides_thinking:
            return [event._replace(text="")]
        if isinstance(event, Delta) and event.kind == "text" and self._stops:
            return self._text(event)
        if isinstance(event, BlockStopped) and self._held:
            held, self._held = self._held, ""
            return [Delta(event.block_index, "text", held), event]
        return [event]

    def _text(self, event: Delta) -> list[Event]:
        text = self._held + event.text
        ends = [(text.find(stop) + len(stop), stop) for stop in self._stops if stop in text]
        if ends:
            # The one that is complete first; of two, the longer one.
            end, stop = min(ends, key=lambda found: (found[0], -len(found[1])))
            told = text[: end - len(stop)]
            before: list[Event] = [event._replace(text=told)] if told else []
            return [*before, BlockStopped(event.block_index), *self._end("stop_sequence", stop)]
        longest = min(len(text), max(map(len, self._stops)) - 1)
        starts = (size for size in range(longest, 0, -1) if self._begins(text[-size:]))
        kept = next(starts, 0)
        self._held = text[len(text) - kept:]
        given = text[: len(text) - kept]
        return [event._replace(text=given)] if given else []

    def _begins(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)

    def _end(self, reason: str, stop: str | None) -> list[Event]:
        self.ended = True
        return [Finished(reason, stop, NO_USAGE)]


#: The pieces in which a stored answer is told again.
_REPLAY_CHARS = 80


def replayed(answer: Answer) -> Iterator[Event]:
    """The events of an answer that is there already. It must hold no tool call and no refusal."""
    yield Started(answer.message_id, answer.model, answer.usage._replace(output_tokens=0))
    for index, block in enumerate(answer.blocks):
        kinds = [kind for kind, field in _BLOCK_FIELDS.items() if field in block]
        yield BlockStarted(index, {**block, **{_BLOCK_FIELDS[kind]: "" for kind in kinds}})
        for kind in kinds:
            text = str(block[_BLOCK_FIELDS[kind]])
            # A signature is one piece: clients keep it, they do not show it.
            step = len(text) or 1 if kind == "signature" else _REPLAY_CHARS
            for start in range(0, len(text), step):
                yield Delta(index, kind, text[start: start + step])
        yield BlockStopped(index)
    yield Finished(
        answer.stop_reason, answer.stop_sequence, answer.usage, answer.stop_details
    )


#: Blocks with data that is no text.
_ATTACHMENT_BLOCKS = ("image", "document")


def attachments_of(blocks: Iterable[Block]) -> Iterator[Block]:
    """Return the images and documents in their order, those in results of tools included."""
    for block in blocks:
        if block["type"] == "tool_result":
            yield from attachments_of(block["content"])
        elif block["type"] in _ATTACHMENT_BLOCKS:
            yield block


def json_chars(value: object) -> int:
    """Return the length of the value's compact JSON; a letter counts one in every script."""
    return len(_ENCODER.encode(value))


def message_chars(message: Message) -> int:
    """Return the characters of a message: of texts and names as they are, of arguments as JSON.
    Images and documents have none."""
    chars, rest = 0, list(message.content)
    while rest:
        block = rest.pop()
        if block["type"] == "text":
            chars += len(block["text"])
        elif block["type"] == "tool_result":
            rest += block["content"]
        elif block["type"] == "tool_use":
            chars += len(block["name"]) + json_chars(block["input"])
        elif block["type"] not in _ATTACHMENT_BLOCKS:
            chars += json_chars(block)
    return chars


def _fixed_chars(turn: Turn) -> int:
    """The characters of what is the same for all messages: system prompt, tools and schema."""
    schema_chars = json_chars(turn.output_schema.schema) if turn.output_schema is not None else 0
    return len(turn.system) + schema_chars + sum(
        len(tool.name) + len(tool.description) + json_chars(tool.schema) for tool in turn.tools
    )


def prompt_chars(turn: Turn) -> int:
    """Return the characters of everything that the model reads."""
    return _fixed_chars(turn) + sum(message_chars(message) for message in turn.messages)


#: How many characters stand for a token when a prompt is measured against a window.
BUDGET_CHARS_PER_TOKEN = 3


def _first_kept(messages: list[Message], sizes: list[int], most_chars: int) -> int:
    """Return the place of the first message that stays.

    Over the bound the oldest go until four fifths of it are left, or what fits if that cannot be.
    Where this happens depends on no later message, so that a conversation that grows keeps its
    head for many turns.
    """
    starts: list[int] = []
    before: list[int] = []
    first = total = dropped = 0
    for place, (message, size) in enumerate(zip(messages, sizes)):
        if _begins(message):
            starts.append(place)
            before.append(total)
        total += size
        if total - dropped <= most_chars or not starts:
            continue
        index = bisect.bisect_left(before, total - most_chars * 4 // 5)
        if index == len(starts):
            index = min(bisect.bisect_left(before, total - most_chars), len(starts) - 1)
        first, dropped = starts[index], before[index]
    return first


def truncate_to_budget(turn: Turn, most_chars: int) -> tuple[Turn, int]:
    """Return the turn without its oldest messages if it does not fit, and how many they were.

    The system prompt and the newest message stay, and a tool call stays with its result. 0 for
    `most_chars` takes the model's window. Raises ContextTooLong when even the rest is too long,
    in the words by which agents know that they have to shorten their history.
    """
    most_chars = most_chars or turn.model.context_window * BUDGET_CHARS_PER_TOKEN
    newest = max(message_chars(turn.choice(index).messages[-1]) for index in range(turn.choices))
    left = most_chars - _fixed_chars(turn) - newest
    if left < 0:
        raise ContextTooLong(
            f"prompt is too long: {(most_chars - left) // BUDGET_CHARS_PER_TOKEN} tokens > "
            f"{most_chars // BUDGET_CHARS_PER_TOKEN} maximum",
            param="messages",
        )
    sizes = [*map(message_chars, turn.messages[:-1]), newest]
    first = _first_kept(turn.messages, sizes, left + newest)
    if sum(sizes[first:]) > left + newest:
        raise ContextTooLong(
            f"prompt is too long: its last tool exchange needs more than "
            f"{most_chars // BUDGET_CHARS_PER_TOKEN} tokens",
            param="messages",
        )
    if not first:
        return turn, 0
    return turn._replace(messages=turn.messages[first:]), first


#: How many characters a token has, about, when tokens are estimated.
ESTIMATE_CHARS_PER_TOKEN = 3.5
#: What an image or a document is taken for in an estimate.
_ATTACHMENT_TOKENS = 1_500


def estimated_tokens(turn: Turn) -> int:
    """Return about how many tokens the prompt has."""
    attachments = sum(1 for message in turn.messages for _ in attachments_of(message.content))
    chars = prompt_chars(turn)
    return max(1, round(chars / ESTIMATE_CHARS_PER_TOKEN)) + _ATTACHMENT_TOKENS * attachments


def _begins(message: Message) -> bool:
    """Whether a conversation can begin with this message."""
    return message.role == "user" and not message.has_results


# ==== 7. Store ===============================================================
# One SQLite file for what has to survive a restart. One connection and one lock: a transaction
# takes a fraction of a millisecond. Reports read through connections of their own. What holds in
# memory already may be written later: a full disk or a lock puts it off. Without a folder to write
# to the database lives in memory. The settings that were changed at run time are kept here too.

#: Appended to, never changed: the n-th brings a database from version n to n + 1.
MIGRATIONS = (
    """
    CREATE TABLE sessions (
        key TEXT PRIMARY KEY,
        caller TEXT NOT NULL,
        id TEXT NOT NULL,
        model TEXT NOT NULL,
        messages TEXT NOT NULL,
        message_count INTEGER NOT NULL,
        created_s INTEGER NOT NULL,
        used_s INTEGER NOT NULL
    )
    """,
    """
    CREATE TABLE keys (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL COLLATE NOCASE,
        hash TEXT NOT NULL UNIQUE,
        preview TEXT NOT NULL,
        created_s INTEGER NOT NULL,
        expiry_s INTEGER,
        revoked_s INTEGER,
        used_s INTEGER,
        models TEXT NOT NULL,
        max_concurrent INTEGER NOT NULL,
        note TEXT NOT NULL,
        quota TEXT NOT NULL
    )
    """,
    "CREATE UNIQUE INDEX keys_by_name ON keys (name) WHERE revoked_s IS NULL",
    """
    CREATE TABLE usage (
        id INTEGER PRIMARY KEY,
        at_s REAL NOT NULL,
        request_id TEXT NOT NULL,
        key_id INTEGER,
        caller TEXT NOT NULL,
        model TEXT NOT NULL,
        dialect TEXT NOT NULL,
        outcome TEXT NOT NULL,
        status INTEGER NOT NULL,
        counted INTEGER NOT NULL,
        stop_reason TEXT,
        stream INTEGER NOT NULL,
        warm INTEGER,
        path TEXT,
        prompt_chars INTEGER NOT NULL,
        response_chars INTEGER NOT NULL,
        input_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        cache_read_tokens INTEGER NOT NULL,
        cache_write_tokens INTEGER NOT NULL,
        first_token_ms INTEGER,
        total_ms INTEGER NOT NULL
    )
    """,
    "CREATE INDEX usage_by_time ON usage (at_s)",
    "CREATE INDEX usage_by_key ON usage (key_id, at_s)",
    "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
)


def storage_failure(problem: sqlite3.Error, more: str) -> StorageFailed:
    """Return what to tell a client about a failure of SQLite; `more` says what follows from it."""
    text = str(problem)
    if "disk is full" in text or "disk I/O error" in text:
        return StorageFull(f"disk full: the database cannot be written ({text}). {more}")
    if "locked" in text:
        return StorageLocked(f"database locked: another program holds ocp.db. {more}")
    return StorageFailed(f"The database cannot be used: {without_paths(text)}. {more}")


class HomeInUse(Exception):
    """Another server works in this home."""


#: What a server that only finishes what runs writes into its lock.
_STOPPING = "stopping"


class HomeLock:
    """Keeps a second server out of a home, as long as this process lives."""

    def __init__(self, home: str, patience_s: float) -> None:
        """Waits so long for a server that is stopping. Raises HomeInUse, OSError."""
        self._file = os.open(os.path.join(home, "server.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        give_up_s = time.monotonic() + patience_s
        while not self._taken():
            holder = os.pread(self._file, 40, 0).decode("ascii", "replace").split() or ["?"]
            if holder[-1] != _STOPPING or time.monotonic() >= give_up_s:
                self.close()
                raise HomeInUse(
                    f"another OCP server (process {holder[0]}) works in {home}: stop it, or set "
                    "OCP_HOME to another folder for this one"
                )
            time.sleep(0.05)
        self._tell(str(os.getpid()))

    def _taken(self) -> bool:
        """Whether the lock is ours. Where the file system knows no locks there is none to take."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            return problem.errno not in (errno.EACCES, errno.EAGAIN)
        return True

    def _tell(self, words: str) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, words.encode("ascii") + b"\n", 0)

    def tell_stopping(self) -> None:
        """Lets the next server wait for the end of this one."""
        self._tell(f"{os.getpid()} {_STOPPING}")

    def close(self) -> None:
        """Lets the next server in."""
        os.close(self._file)


#: How many writes of rows of usage may wait for the database.
_MAX_WAITING = 10_000
#: How long after a time-out at a locked database writes are put off without trying again.
_LOCKED_PAUSE_S = 1.0
#: How long a report waits for the one before it.
_REPORT_PATIENCE_S = 30.0


class Store:
    """The database."""

    def __init__(self, path: str) -> None:
        """Opens or creates it, private from birth. Raises OSError, sqlite3.Error."""
        #: None = in memory.
        self._path = None if path == ":memory:" else path
        self._identity: tuple[int, int] | None = None
        if self._path is not None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            found = os.fstat(descriptor)
            os.close(descriptor)
            self._identity = (found.st_dev, found.st_ino)
        # Guards the connection, what waits to be written, and what its users decide while they
        # hold it. Held for a transaction or a decision, never while anything else is waited for,
        # and never for a report.
        self._lock = threading.RLock()
        self._waiting: collections.deque[tuple[str, tuple[object, ...]]] = collections.deque()
        #: Why the last write failed; None = it did not.
        self.failure: sqlite3.DatabaseError | None = None
        #: Whether SQLite has found the file damaged.
        self.is_damaged = False
        self._locked_until_s = -math.inf
        # Held for a whole report: there is one at a time, so that many leave the others some time.
        self._report_lock = threading.Lock()
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        try:
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=1000"):
                self._connection.execute(f"PRAGMA {pragma}")
            self._migrate()
            for table in ("settings", "keys"):
                # Without these nothing works, so damage to them has to show now.
                self._connection.execute(f"SELECT * FROM {table}").fetchall()
        except sqlite3.Error:
            self._connection.close()
            raise

    def load(self, path: str) -> None:
        """Takes over what another database holds, which is only read. Raises sqlite3.Error."""
        place = urllib.parse.quote(path)
        with self._lock:
            try:
                source = sqlite3.connect(f"file:{place}?mode=ro", uri=True)
                source.execute("SELECT COUNT(*) FROM sqlite_master")
            except sqlite3.Error:
                # A log of writes cannot be opened where nothing can be written.
                source = sqlite3.connect(f"file:{place}?immutable=1", uri=True)
            with contextlib.closing(source):
                source.backup(self._connection)
            self._migrate()

    def _migrate(self) -> None:
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise sqlite3.NotSupportedError("the database belongs to a newer version of OCP")
        for number, statement in enumerate(MIGRATIONS[version:], version + 1):
            with self.transaction() as connection:
                connection.execute(statement)
                connection.execute(f"PRAGMA user_version={number}")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The connection, for a block that happens whole or not at all, and after all writes that
        wait. Raises sqlite3.Error."""
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                written = self._write_waiting()
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException as problem:
                # After some failures, such as a full disk, SQLite has done that by itself.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if isinstance(problem, sqlite3.DatabaseError):
                    self._note(problem)
                raise
            for _ in range(written):
                self._waiting.popleft()
            self.failure, self._locked_until_s = None, -math.inf

    def _write_waiting(self) -> int:
        """Carries out the writes that wait, in their order; how many they are."""
        for statement, values in self._waiting:
            # One that can never succeed must not hold up the others.
            with contextlib.suppress(sqlite3.IntegrityError):
                self._connection.execute(statement, values)
        return len(self._waiting)

    def _note(self, problem: sqlite3.DatabaseError) -> None:
        if isinstance(problem, (sqlite3.IntegrityError, sqlite3.ProgrammingError)):
            return
        # Not the one that was raised: all that its traceback leads to would be kept with it.
        self.failure = type(problem)(str(problem))
        self.is_damaged = self.is_damaged or type(problem) is sqlite3.DatabaseError
        if "locked" in str(problem):
            self._locked_until_s = time.monotonic() + _LOCKED_PAUSE_S

    def keep(self, statement: str, *values: object, must: bool = True) -> None:
        """Carries out a write now, or else as soon as that is possible.

        Raises sqlite3.Error when it has to wait. One that is not a `must` is lost when too many
        wait already, and any is lost that the database would never take.
        """
        with self._lock:
            try:
                if self.failure is not None and time.monotonic() < self._locked_until_s:
                    raise type(self.failure)(str(self.failure))
                with self.transaction() as connection:
                    connection.execute(statement, values)
            except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
                raise
            except sqlite3.Error:
                if must or len(self._waiting) < _MAX_WAITING:
                    self._waiting.append((statement, values))
                raise

    def catch_up(self) -> None:
        """Carries out the writes that wait. Raises sqlite3.Error while that is impossible."""
        with self._lock:
            if self._waiting or self.failure is not None:
                with self.transaction():
                    pass

    def is_in_place(self) -> bool:
        """Whether the file that was opened is the one that its path names. True in memory."""
        if self._path is None:
            return True
        try:
            found = os.stat(self._path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps everybody else off the database, for a decision and what follows from it."""
        with self._lock:
            yield

    def rows(self, statement: str, *values: object) -> list[sqlite3.Row]:
        """What a query finds. Raises sqlite3.Error."""
        with self._lock:
            try:
                return self._connection.execute(statement, values).fetchall()
            except sqlite3.DatabaseError as problem:
                self._note(problem)
                raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection for the queries of one report, which all see the same moment. It cannot
        write, and holds up nobody but other reports. Raises QueueFull, sqlite3.Error."""
        if not self._report_lock.acquire(timeout=_REPORT_PATIENCE_S):
            raise QueueFull("Other reports are being made; try again in a moment.", retry_after_s=5)
        try:
            with contextlib.closing(self._reader()) as connection:
                connection.row_factory = sqlite3.Row
                connection.execute("BEGIN")
                yield connection
        finally:
            self._report_lock.release()

    def _reader(self) -> sqlite3.Connection:
        if self._path is not None:
            place = urllib.parse.quote(self._path)
            return sqlite3.connect(f"file:{place}?mode=ro", uri=True, isolation_level=None)
        # What is in memory has one connection; a copy of it takes little of its time.
        copy = sqlite3.connect(":memory:", isolation_level=None)
        with self._lock:
            self._connection.backup(copy)
        return copy

    def close(self) -> None:
        """Closes it."""
        with self._lock:
            self._connection.close()


class Settings:
    """The configuration in force: what was changed at run time, over what the start gave.

    Precedence: stored, then environment, then default.
    """

    def __init__(self, store: Store, base: Config, environ: Mapping[str, str]) -> None:
        """`base` is the configuration of `environ`."""
        self._store = store
        self._base = base
        self._environ = environ
        # Guards writers only: readers take the reference, and keep it for a whole request.
        self._lock = threading.Lock()
        self._stored: dict[str, int | str | bool] = {}
        #: What is stored and cannot be used: (name, why).
        self.problems: list[tuple[str, str]] = []
        self.config = base
        wanted: dict[str, int | str | bool] = {}
        for row in store.rows("SELECT name, value FROM settings"):
            try:
                wanted[row["name"]] = self._checked(row["name"], json.loads(row["value"]))
            except KeyError:
                self.problems.append((row["name"], "there is no such setting any more"))
            except ValueError as problem:
                self.problems.append((row["name"], str(problem)))
        try:
            self._adopt(wanted)
        except ValueError:
            # Together they break a rule: those go that break it.
            for name, value in wanted.items():
                try:
                    self._adopt({**self._stored, name: value})
                except ValueError as problem:
                    self.problems.append((name, str(problem)))

    def _checked(self, name: str, value: object) -> int | str | bool:
        """The value, if this setting takes it. Raises KeyError, ValueError."""
        return checked_setting(live_settings()[name], value)

    def _adopt(self, stored: dict[str, int | str | bool]) -> None:
        """Makes these what is stored. Raises ValueError when they break a rule."""
        changes = {live_settings()[name].name: value for name, value in stored.items()}
        config = dataclasses.replace(self._base, **changes)  # type: ignore[arg-type]  # checked
        broken = [message for is_broken, message in CONFIG_RULES if is_broken(config)]
        if broken:
            raise ValueError("; ".join(broken))
        self._stored, self.config = stored, config

    def change(self, name: str, value: object) -> object:
        """Stores a value, None for the one of the start; what is in force then.

        Raises KeyError for a name that there is not, ValueError saying what is wrong with the
        value, and sqlite3.Error when it cannot be stored; then nothing has changed.
        """
        with self._lock:
            before = self._stored, self.config
            row = live_settings()[name]
            stored = {kept: self._stored[kept] for kept in self._stored if kept != name}
            if value is not None:
                stored[name] = self._checked(name, value)
            self._adopt(stored)
            try:
                with self._store.transaction() as connection:
                    connection.execute("DELETE FROM settings WHERE name = ?", (name,))
                    if value is not None:
                        text = json.dumps(self._stored[name])
                        connection.execute("INSERT INTO settings VALUES (?, ?)", (name, text))
            except sqlite3.Error:
                self._stored, self.config = before
                raise
            return getattr(self.config, row.name)

    def report(self) -> Json:
        """Every setting that can be changed: value, range, unit, help, and where it comes from."""
        kinds = {int: "number", bool: "boolean", str: "string"}
        return {
            name: {
                "value": getattr(self.config, row.name),
                "type": kinds[type(row.default)],
                "min": row.metadata["minimum"],
                "max": row.metadata["maximum"],
                "unit": row.metadata["unit"],
                "desc": row.metadata["help"],
                "source": self._source(name, row.metadata["env"]),
                "default": row.default,
                "env": row.metadata["env"],
            }
            for name, row in live_settings().items()
        }

    def _source(self, name: str, variable: str) -> str:
        if name in self._stored:
            return "stored"
        return "environment" if self._environ.get(variable, "").strip() else "default"


# ==== 8. Keys and callers ====================================================
# Who may use which route. A route names its kind of access; this section decides, in one place,
# so that a new route cannot forget to ask. Keys are stored as hashes: whoever reads the database
# can use none of them.


class Headers(Protocol):
    """The headers of a request, looked up without regard to case."""

    def get(self, name: str, default: str) -> str:
        """The value, or `default`."""

    def __iter__(self) -> Iterator[str]:
        """The names, as they were sent."""


class Access(enum.Enum):
    """Who may use a route."""

    PUBLIC = "anybody"
    CALLER = "whoever may use the API"
    ADMIN = "the operator"


class Quota(NamedTuple):
    """A limit that a key can have. `unit` is "requests" or "tokens"."""

    name: str
    period: str
    unit: str


#: In the order in which they are checked.
QUOTAS = (
    Quota("daily", "daily", "requests"),
    Quota("weekly", "weekly", "requests"),
    Quota("monthly", "monthly", "requests"),
    Quota("tokensDaily", "daily", "tokens"),
    Quota("tokensWeekly", "weekly", "tokens"),
    Quota("tokensMonthly", "monthly", "tokens"),
)


class Caller(NamedTuple):
    """Who is asking, and what is allowed to them."""

    name: str
    is_admin: bool = False
    #: The key that was used; None = it is none of those in the database.
    key_id: int | None = None
    #: Ids of the models that may be used; empty = all.
    models: tuple[str, ...] = ()
    #: Answers at the same time; 0 = as many as the server gives.
    max_concurrent: int = 0
    #: The limits by their names in QUOTAS; a limit that is not there does not exist.
    quota: Mapping[str, int] = MappingProxyType({})

    @property
    def scope(self) -> str:
        """What belongs to this caller alone is kept under this. It outlives a change of name."""
        return self.name if self.key_id is None else f"key-{self.key_id}"


class Key(NamedTuple):
    """A key as the database has it, without its secret."""

    id: int
    name: str
    #: Enough of the secret to recognise it by.
    preview: str
    created_s: int
    #: None = never, for each of the three.
    expiry_s: int | None
    revoked_s: int | None
    used_s: int | None
    models: tuple[str, ...]
    max_concurrent: int
    note: str
    quota: Mapping[str, int]

    @property
    def caller(self) -> Caller:
        """The caller that the key stands for."""
        return Caller(
            self.name, key_id=self.id, models=self.models,
            max_concurrent=self.max_concurrent, quota=self.quota,
        )

    def expired(self, now_s: float) -> bool:
        """Whether its time is up."""
        return self.expiry_s is not None and now_s >= self.expiry_s


#: Names of callers that have no key in the database.
_RESERVED_NAMES = ("admin", "anonymous", "local", "public", "remote", "shared")
#: How often the time of a key's last use is written down.
_USED_EVERY_S = 60.0


def key_name(name: str) -> str:
    """The name, if a key may have it. Raises BadRequest."""
    if not re.fullmatch(r"[A-Za-z0-9 ._-]{1,64}", name) or name != name.strip():
        raise BadRequest(
            "name: takes 1 to 64 letters, digits, spaces, dots, underscores and hyphens.",
            param="name",
        )
    if name.isdigit() or name.lower() in _RESERVED_NAMES:
        raise BadRequest(
            f"name: must not be a number, nor one of {', '.join(_RESERVED_NAMES)}.", param="name"
        )
    return name


def _key(row: sqlite3.Row) -> Key:
    fields = {name: row[name] for name in Key._fields}
    models, quota = json.loads(fields.pop("models")), json.loads(fields.pop("quota"))
    return Key(**fields, models=tuple(models), quota=quota)


def _column(value: object) -> object:
    """A value as its column in the table of keys has it."""
    return json.dumps(value) if isinstance(value, (dict, tuple, list)) else value


#: What follows from a change that could not be written.
_HOLDS_IN_MEMORY = (
    "The change holds already, in memory, and will be written as soon as that is possible; until "
    "then a restart would undo it."
)
_NOTHING_CHANGED = "Nothing was changed; try again when that is mended."


class Keys:
    """The keys of mode multi.

    All are in memory, where requests look them up: whether a key is good depends on no file. What
    is taken from a key or changed of it holds there first; what is given out, a key or its new
    secret, has to be in the database before.
    """

    def __init__(self, store: Store, clock: Clock = time.time) -> None:
        self._store = store
        self._clock = clock
        # Guards writers of the fields below. Readers need no lock: entries are never changed, only
        # replaced.
        self._lock = threading.Lock()
        self._keys: dict[int, Key] = {}
        self._ids: dict[str, int] = {}
        #: When keys were used last, and which of these times the database does not have.
        self._used_s: dict[int, int] = {}
        self._unwritten: dict[int, int] = {}
        #: What is stored and cannot be used: (id, why).
        self.problems: list[tuple[int, str]] = []
        for row in store.rows("SELECT * FROM keys"):
            try:
                self._keys[row["id"]] = _key(row)
                self._ids[row["hash"]] = row["id"]
            except (ValueError, TypeError) as problem:
                self.problems.append((row["id"], str(problem)))

    def create(self, name: str, fields: Mapping[str, object]) -> tuple[Key, str]:
        """A new key and its secret, which is told once. `fields`: see `change`.

        Raises BadRequest, Conflict, StorageFailed.
        """
        now_s = self._clock()
        secret, hidden = self._new_secret()
        columns = {
            "name": key_name(name or self._some_name(now_s)), "created_s": int(now_s),
            "expiry_s": None, "models": (), "max_concurrent": 0, "note": "", "quota": {},
            **hidden, **fields,
        }
        names = ", ".join(columns)
        marks = ", ".join("?" * len(columns))
        with self._lock:
            self._check_free(str(columns["name"]), None)
            statement = f"INSERT INTO keys ({names}) VALUES ({marks})"
            key_id = self._written(statement, *map(_column, columns.values()))
            (row,) = self._store.rows("SELECT * FROM keys WHERE id = ?", key_id)
            self._keys[key_id] = _key(row)
            self._ids[hidden["hash"]] = key_id
        return self._keys[key_id], secret

    def _some_name(self, now_s: float) -> str:
        return f"key-{round(now_s * 1000)}-{secrets.token_hex(3)}"

    def _new_secret(self) -> tuple[str, dict[str, str]]:
        """A secret, and the columns that know it."""
        secret = "ocp_" + secrets.token_urlsafe(24)
        preview = f"{secret[:8]}...{secret[-4:]}"
        return secret, {"hash": self._hash(secret), "preview": preview}

    def _hash(self, secret: str) -> str:
        # Of 192 random bits: there is nothing that salt or a slow hash would protect.
        return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()

    def _check_free(self, name: str, key_id: int | None) -> None:
        """Raises Conflict when another key that is not revoked has this name."""
        if any(
            key.revoked_s is None and key.id != key_id and key.name.lower() == name.lower()
            for key in self._keys.values()
        ):
            raise Conflict(
                f"There is a key called {name!r} already: revoke or rename it.", param="name"
            )

    def _written(self, statement: str, *values: object) -> int:
        """Writes what has to be in the database first; the id of a new row."""
        try:
            with self._store.transaction() as connection:
                return connection.execute(statement, values).lastrowid or 0
        except sqlite3.Error as problem:
            raise storage_failure(problem, _NOTHING_CHANGED) from None

    def all(self) -> list[Key]:
        """Every key, revoked ones too, newest first."""
        newest_first = sorted(self._keys.copy().values(), reverse=True, key=lambda key: key.id)
        return [self._with_use(key) for key in newest_first]

    def _with_use(self, key: Key) -> Key:
        return key._replace(used_s=self._used_s.get(key.id, key.used_s))

    def find(self, id_or_name: str) -> Key:
        """The key of this id or name; of several of one name, the one that is not revoked, or the
        newest. Raises NotFound."""
        if re.fullmatch("[0-9]{1,15}", id_or_name):
            found = [key for key in self.all() if key.id == int(id_or_name)]
        else:
            found = [key for key in self.all() if key.name.lower() == id_or_name.lower()]
            found.sort(key=lambda key: key.revoked_s is not None)
        if not found:
            raise NotFound(f"There is no key {one_line(id_or_name, 80)!r}.")
        return found[0]

    def change(self, key: Key, fields: Mapping[str, object]) -> Key:
        """The key with columns changed: name, expiry_s, models, max_concurrent, note, quota.

        Raises BadRequest, Conflict, and StorageFailed when that is not written yet.
        """
        with self._lock:
            key = self._unrevoked(key)
            if "name" in fields:
                self._check_free(key_name(str(fields["name"])), key.id)
            values = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in fields.items()
            }
            changed = self._keys[key.id] = key._replace(**values)  # type: ignore[arg-type]
            if fields:
                self._keep(key.id, fields)
        return self._with_use(changed)

    def _unrevoked(self, key: Key) -> Key:
        """The key as it is now. Raises BadRequest when it is revoked."""
        found = self._keys[key.id]
        if found.revoked_s is not None:
            raise BadRequest(f"The key {found.name!r} is revoked; make a new one.")
        return found

    def _keep(self, key_id: int, fields: Mapping[str, object]) -> None:
        """Writes columns that hold in memory already. Raises StorageFailed when that is late."""
        places = ", ".join(f"{name} = ?" for name in fields)
        values = map(_column, fields.values())
        try:
            self._store.keep(f"UPDATE keys SET {places} WHERE id = ?", *values, key_id)
        except sqlite3.Error as problem:
            raise storage_failure(problem, _HOLDS_IN_MEMORY) from None

    def rotate(self, key: Key) -> str:
        """A new secret for the key; the old one is worth nothing from now on.

        Raises BadRequest, and StorageFailed, after which the old one is still good.
        """
        secret, hidden = self._new_secret()
        with self._lock:
            key = self._unrevoked(key)
            statement = "UPDATE keys SET hash = ?, preview = ? WHERE id = ?"
            self._written(statement, hidden["hash"], hidden["preview"], key.id)
            self._ids = {
                **{known: key_id for known, key_id in self._ids.items() if key_id != key.id},
                hidden["hash"]: key.id,
            }
            self._keys[key.id] = key._replace(preview=hidden["preview"])
        return secret

    def revoke(self, key: Key) -> bool:
        """Whether the key was still good; it is not any more. Raises StorageFailed when that is
        not written yet."""
        with self._lock:
            found = self._keys[key.id]
            if found.revoked_s is not None:
                return False
            now_s = int(self._clock())
            self._keys[key.id] = found._replace(revoked_s=now_s)
            self._keep(key.id, {"revoked_s": now_s})
        return True

    def verify(self, secret: str) -> Caller:
        """The caller of this secret. Raises Unauthorized."""
        key = self._good(self._keys.get(self._ids.get(self._hash(secret), 0)))
        now_s = int(self._clock())
        if now_s - (self._with_use(key).used_s or 0) >= _USED_EVERY_S:
            self._used_s[key.id] = self._unwritten[key.id] = now_s
        return key.caller

    def current(self, caller: Caller) -> Caller:
        """The caller as their key has it now. Raises Unauthorized when it is not good any more."""
        if caller.key_id is None:
            return caller
        return self._good(self._keys.get(caller.key_id)).caller

    def _good(self, key: Key | None) -> Key:
        if key is None:
            raise Unauthorized(_NEEDS_KEY)
        if key.revoked_s is not None or key.expired(self._clock()):
            what = "was revoked" if key.revoked_s is not None else "has expired"
            raise Unauthorized(f"This key {what}: ask the operator of this server for a new one.")
        return key

    def write_use(self) -> None:
        """Writes down when keys were used. Raises sqlite3.Error."""
        used_s, self._unwritten = self._unwritten, {}
        if used_s:
            with self._store.transaction() as connection:
                connection.executemany(
                    "UPDATE keys SET used_s = ? WHERE id = ?",
                    [(at_s, key_id) for key_id, at_s in used_s.copy().items()],
                )


#: So many wrong keys of one peer are told so at once; each one more waits twice as long as the one
#: before it. A peer is forgiven when it has sent none for so long.
_WRONG_KEYS_FREE = 5
_FIRST_DELAY_S = 0.1
_FORGIVEN_S = 600.0
#: How many peers are remembered, and how many answers are held back at a time.
_MAX_WRONG_PEERS = 1024
_MAX_HELD_BACK = 32
_HELD_BACK_PER_PEER = 4


class WrongKeys:
    """Holds back the answers to wrong keys, longer each time. A right key never waits, whoever
    else comes from its address: it is let in before anything here is asked."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        # Guards the next fields.
        self._lock = threading.Lock()
        #: How many wrong keys a group of peers has sent, and when the last one came; the newest
        #: group last.
        self._groups: collections.OrderedDict[str, tuple[int, float]] = collections.OrderedDict()
        #: Whose answers are held back, a group once for each.
        self._held_back: list[str] = []

    def _noted(self, group: str) -> int:
        """How many wrong keys this group has sent, with the one of this moment."""
        now_s = self._clock()
        count, last_s = self._groups.pop(group, (0, now_s))
        count = 1 if now_s - last_s > _FORGIVEN_S else count + 1
        self._groups[group] = (count, now_s)
        while len(self._groups) > _MAX_WRONG_PEERS:
            self._groups.popitem(last=False)
        return count

    @contextlib.contextmanager
    def noting(self, peer: str, most_s: float) -> Iterator[float]:
        """Counts a wrong key, and gives the seconds to wait before the peer is told, `most_s` at
        most. Nobody waits where too many do: they hold a connection each."""
        group = peer_group(peer)
        with self._lock:
            over = self._noted(group) - _WRONG_KEYS_FREE
            wait_s = min(most_s, _FIRST_DELAY_S * 2.0 ** min(over - 1, 20)) if over > 0 else 0.0
            if (
                len(self._held_back) >= _MAX_HELD_BACK
                or self._held_back.count(group) >= _HELD_BACK_PER_PEER
            ):
                wait_s = 0.0
            if wait_s:
                self._held_back.append(group)
        try:
            yield wait_s
        finally:
            with self._lock:
                if wait_s:
                    self._held_back.remove(group)


_NEEDS_KEY = "This server wants its key: send it as `Authorization: Bearer KEY` or `x-api-key`."


def presented_keys(headers: Headers) -> list[str]:
    """The keys in `Authorization: Bearer` (in any case) and `x-api-key`; clients put one of
    another service's beside ours. An empty one if there is none."""
    scheme, _, bearer = headers.get("Authorization", "").strip().partition(" ")
    given = [bearer if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
    return [_as_utf8(key).strip() for key in given if key.strip()] or [""]


def _as_utf8(text: str) -> str:
    """A header as it was meant: the parser takes it for Latin-1, and it is UTF-8 today."""
    with contextlib.suppress(UnicodeError):
        return text.encode("latin-1").decode("utf-8")
    return text


def same_secret(given: str, wanted: str) -> bool:
    """Whether the two are equal, taking as long for a near miss as for a far one."""
    hashes = (hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in (given, wanted))
    return bool(wanted) and hmac.compare_digest(*hashes)


def is_loopback(address: str) -> bool:
    """Whether this IP address is the machine itself."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)


#: Headers that only proxies, load balancers and tunnels add.
_PROXY_HEADER = re.compile(
    r"forwarded|via|cdn-loop|(x-)?(forwarded|original|envoy|azure|arr|proxy|proxyuser)-.+"
    r"|x-forwarded|x-amz(n|-cf)-.+|(cf|fly|tailscale)-.+|x-remote-(ip|addr|host)"
    r"|(.+-)?(client|real|connecting|source|peer)-?(ip|addr)",
    re.IGNORECASE,
)


def is_forwarded(headers: Headers) -> bool:
    """Whether a proxy has passed the request on, as far as its headers tell."""
    return any(_PROXY_HEADER.fullmatch(name.replace("_", "-")) for name in headers)


def authorize(config: Config, keys: Keys, access: Access, headers: Headers, peer: str) -> Caller:
    """The caller, if this access is theirs. Raises Unauthorized or Forbidden."""
    if access is Access.PUBLIC:
        return Caller("public")
    if config.mode == "none":
        # Behind a reverse proxy everybody comes from this machine.
        is_local = is_loopback(peer) and not is_forwarded(headers)
        if access is Access.ADMIN and not is_local:
            raise Forbidden("This route is served to the machine itself only.")
        return Caller("local" if is_local else "remote", is_admin=is_local)
    caller = _presenter(config, keys, headers, access)
    if access is Access.ADMIN and not caller.is_admin:
        raise Forbidden(
            "This route wants the admin key: OCP_ADMIN_KEY of the server, or what is in its file "
            "admin-key."
        )
    return caller


def _presenter(config: Config, keys: Keys, headers: Headers, access: Access) -> Caller:
    """Who holds one of the keys of a request. Raises Unauthorized when all are wrong."""
    found: list[Caller] = []
    failures: list[Unauthorized] = []
    for key in presented_keys(headers):
        try:
            found.append(_authenticate(config, keys, key))
        except Unauthorized as failure:
            failures.append(failure)
    if not found:
        raise failures[0]
    return next((c for c in found if c.is_admin and access is Access.ADMIN), found[0])


def _authenticate(config: Config, keys: Keys, key: str) -> Caller:
    """Who holds this key. Raises Unauthorized."""
    if same_secret(key, config.admin_key):
        return Caller("admin", is_admin=True)
    if config.mode == "multi" and same_secret(key, config.anonymous_key):
        return Caller("anonymous")
    if config.mode == "multi":
        return keys.verify(key)
    if same_secret(key, config.api_key):
        return Caller("shared")
    raise Unauthorized(_NEEDS_KEY)


_LOCAL_SUFFIXES = (".local", ".lan", ".home.arpa", ".internal")


_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._~-]+))(?::[0-9]{0,5})?")


def host_name(host: str) -> str:
    """The name in a Host header, without its port, in small letters. Raises BadRequest."""
    found = _HOST.fullmatch(host)
    if found is None:
        raise BadRequest("The Host of the request is missing or broken.")
    return (found[1] or found[2]).lower()


def machine_names() -> frozenset[str]:
    """The name of this machine, with its domain and without."""
    name = socket.gethostname().lower()
    return frozenset({name, name.partition(".")[0]} - {""})


def is_own_host(config: Config, host: str, peer: str) -> bool:
    """Whether a Host header names this server. Raises BadRequest for one that is broken.

    A name that somebody else's DNS points at this machine does not count: that is how a web page
    would talk to a server that listens on loopback only. Where loopback makes the operator, the
    names of a local network do not count either: whoever is in the network may hand them out.
    """
    name = host_name(host)
    if name in machine_names() or name in (own.lower() for own in listed(config.allowed_hosts)):
        return True
    if name == "localhost" or name.endswith(".localhost") or is_loopback(name):
        return True
    if config.mode == "none" and is_loopback(peer):
        return False
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return "." not in name or name.endswith(_LOCAL_SUFFIXES)


def check_origin(config: Config, origin: str, host: str, content_type: str, peer: str) -> None:
    """Refuses web pages of other origins. Raises Forbidden, BadRequest."""
    if host and not is_own_host(config, host, peer):
        raise Forbidden(
            f"This server is not known as {one_line(host, 80)!r} here: use localhost, or name it "
            "in OCP_ALLOWED_HOSTS."
        )
    if not origin:
        return
    # What a browser sends without asking first, such as a form, is never JSON.
    if content_type and content_type.partition(";")[0].strip().lower() != "application/json":
        raise Forbidden("Web pages have to send application/json.")
    if is_allowed_origin(config, origin) or origin in (f"http://{host}", f"https://{host}"):
        return
    raise Forbidden(
        f"Web pages of {one_line(origin, 80)!r} may not call this server: "
        "name the origin in OCP_ALLOWED_ORIGINS."
    )


@functools.lru_cache(maxsize=64)
def is_allowed_origin(config: Config, origin: str) -> bool:
    """Return whether the operator has named this origin; a * of his stands for a part of it."""
    return any(
        re.fullmatch(re.escape(name.rstrip("/")).replace(r"\*", "[^/]*"), origin, re.IGNORECASE)
        for name in listed(config.allowed_origins)
    )


# ==== 9. Usage and quotas ====================================================
# One row for each request, what the rows add up to, and the quotas that they count against. A
# request reserves its place before it runs and gives it back with its row, so that requests at
# the same time never go over a quota together. What quotas count is in memory, once it was added
# up from the rows.


class UsageRow(NamedTuple):
    """What one request was and cost; a row of the table `usage`, in the order of its columns."""

    at_s: float
    request_id: str
    key_id: int | None
    caller: str
    model: str
    dialect: str
    #: "ok", "abandoned" when the client left, else the code or the type of the error.
    outcome: str
    status: int
    #: As how many requests quotas count it: one for each answer that claude was asked for, unless
    #: the API turned it away. Its tokens count in any case.
    counted: int
    stop_reason: str | None
    stream: bool
    warm: bool | None
    #: "fresh", "rebuilt", "rewound", "continued"; "cached" and "shared" ones cost no tokens.
    path: str | None
    prompt_chars: int
    response_chars: int
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    first_token_ms: int | None
    total_ms: int

    @property
    def tokens(self) -> int:
        """What token quotas count."""
        written = self.cache_read_tokens + self.cache_write_tokens
        return self.input_tokens + self.output_tokens + written


_TOKENS = "input_tokens + output_tokens + cache_read_tokens + cache_write_tokens"
#: What is added up over rows: (name, SQL). The names with total_ are those of older clients.
_SUMS = (
    ("requests", "COUNT(*)"),
    ("successes", "SUM(outcome = 'ok')"),
    ("abandoned", "SUM(outcome = 'abandoned')"),
    ("errors", "SUM(outcome NOT IN ('ok', 'abandoned'))"),
    ("cached", "SUM(path IN ('cached', 'shared'))"),
    ("input_tokens", "SUM(input_tokens)"),
    ("output_tokens", "SUM(output_tokens)"),
    ("cache_read_tokens", "SUM(cache_read_tokens)"),
    ("cache_write_tokens", "SUM(cache_write_tokens)"),
    ("avg_elapsed_ms", "CAST(ROUND(AVG(total_ms)) AS INTEGER)"),
    ("avg_first_token_ms", "CAST(ROUND(AVG(first_token_ms)) AS INTEGER)"),
)
_TIMELINE_SUMS = (
    *_SUMS, ("prompt_chars", "SUM(prompt_chars)"), ("response_chars", "SUM(response_chars)"),
)
_GROUP_SUMS = (
    *_SUMS, ("total_prompt_chars", "SUM(prompt_chars)"),
    ("total_response_chars", "SUM(response_chars)"), ("total_elapsed_ms", "SUM(total_ms)"),
    ("max_elapsed_ms", "MAX(total_ms)"), ("max_prompt_chars", "MAX(prompt_chars)"),
    ("avg_prompt_chars", "CAST(ROUND(AVG(prompt_chars)) AS INTEGER)"),
    ("first_request", "strftime('%Y-%m-%dT%H:%M:%fZ', MIN(at_s), 'unixepoch')"),
    ("last_request", "strftime('%Y-%m-%dT%H:%M:%fZ', MAX(at_s), 'unixepoch')"),
)
_Columns = tuple[tuple[str, str], ...]


def period_bounds(period: str, now_s: float) -> tuple[float, float]:
    """When the "daily", "weekly" or "monthly" period began that holds this moment, and when it
    ends: calendar days of the machine's time zone, weeks from Monday, both in epoch seconds."""
    today = datetime.datetime.fromtimestamp(now_s).replace(
        hour=0, minute=0, second=0, microsecond=0, fold=0
    )
    day = datetime.timedelta(days=1)
    if period == "daily":
        first, after = today, today + day
    elif period == "weekly":
        first = today - today.weekday() * day
        after = first + 7 * day
    else:
        first = today.replace(day=1)
        after = (first + 32 * day).replace(day=1)
    return first.timestamp(), after.timestamp()


class Reservation:
    """The place of one running request in the quotas of its key. `tokens` is what it may take:
    at most, if it is `bounded`, else as far as can be guessed. It counts as so many `requests`."""

    def __init__(
        self, key_id: int | None, tokens: int, *, requests: int = 1, bounded: bool = False
    ) -> None:
        self.key_id = key_id
        self.tokens = tokens
        self.requests = requests
        self.bounded = bounded


class PeriodUsage:
    """What a key has used of a period."""

    def __init__(self, begins_s: float, requests: int, tokens: int) -> None:
        self.begins_s = begins_s
        self.requests = requests
        self.tokens = tokens


class Ledger:
    """The rows and what they add up to."""

    def __init__(self, store: Store, clock: Clock = time.time) -> None:
        self._store = store
        self._clock = clock
        # Guards both: what is used is in the rows, and added up only once. Held for a decision.
        self._lock = threading.RLock()
        self._used: dict[tuple[int, str], PeriodUsage] = {}
        self._in_flight: dict[int, list[Reservation]] = {}

    # -- quotas -------------------------------------------------------------------------------

    def check(self, caller: Caller) -> None:
        """Raises what `reserve` would raise for the smallest request."""
        with self._lock:
            self.release(self.reserve(caller, 0))

    def reserve(
        self, caller: Caller, tokens: int, *, requests: int = 1, bounded: bool = False
    ) -> Reservation:
        """A place for a request (see Reservation); end it with `record` or `release`.

        Raises QuotaExceeded, and QueueFull while requests that run may take all that is left.
        """
        reservation = Reservation(caller.key_id, tokens, requests=requests, bounded=bounded)
        if caller.key_id is None:
            return reservation
        with self._lock:
            now_s = self._clock()
            flying = self._in_flight.setdefault(caller.key_id, [])
            for quota in QUOTAS:
                if quota.name in caller.quota:
                    used = self._used_in(caller.key_id, quota.period, now_s)
                    check = self._check_requests if quota.unit == "requests" else self._check_tokens
                    check(quota, caller.quota[quota.name], used, flying, reservation)
            flying.append(reservation)
        return reservation

    def _check_requests(
        self, quota: Quota, limit: int, used: PeriodUsage, flying: list[Reservation],
        reservation: Reservation,
    ) -> None:
        taken = used.requests + sum(r.requests for r in flying)
        if taken >= limit:
            raise self._exceeded(quota, limit, taken, "")
        if taken + reservation.requests > limit:
            more = f"This request asks for {reservation.requests} answers: ask for fewer. "
            raise self._exceeded(quota, limit, taken, more)

    def _check_tokens(
        self, quota: Quota, limit: int, used: PeriodUsage, flying: list[Reservation],
        reservation: Reservation,
    ) -> None:
        left = limit - used.tokens
        if left <= 0:
            raise self._exceeded(quota, limit, used.tokens, "")
        if reservation.bounded and reservation.tokens > left:
            more = f"This request may take {reservation.tokens}: ask for fewer max_tokens. "
            raise self._exceeded(quota, limit, used.tokens, more)
        if flying and sum(r.tokens for r in flying) + reservation.tokens > left:
            raise QueueFull(
                f"The {quota.period} tokens of this key that are left ({left}) may be taken by "
                "its requests that run now; try again when they are done.",
                retry_after_s=5,
            )

    def _exceeded(self, quota: Quota, limit: int, taken: int, more: str) -> QuotaExceeded:
        now_s = self._clock()
        resets_s = period_bounds(quota.period, now_s)[1]
        resets_in = format_span(resets_s - now_s)
        error = QuotaExceeded(
            f"This key has used {taken} of its {limit} {quota.unit} ({quota.period}). {more}"
            f"Resets in {resets_in}.",
            retry_after_s=resets_s - now_s,
        )
        error.details = {
            "quota": {
                "period": quota.period, "unit": quota.unit, "limit": limit, "used": taken,
                "resetsIn": resets_in, "resetsAt": iso_time(resets_s),
            }
        }
        return error

    def _used_in(self, key_id: int, period: str, now_s: float) -> PeriodUsage:
        """What the key has used of the period that is now. The lock is held by the caller."""
        begins_s = period_bounds(period, now_s)[0]
        used = self._used.get((key_id, period))
        if used is None or used.begins_s != begins_s:
            row = self._store.rows(
                f"SELECT TOTAL(counted), TOTAL({_TOKENS}) FROM usage "
                "WHERE key_id = ? AND at_s >= ?", key_id, begins_s,
            )[0]
            used = self._used[key_id, period] = PeriodUsage(begins_s, int(row[0]), int(row[1]))
        return used

    def release(self, reservation: Reservation) -> None:
        """Gives a place back that was not used. Harmless when it was given back before."""
        with self._lock:
            flying = self._in_flight.get(reservation.key_id or 0, [])
            if reservation in flying:
                flying.remove(reservation)

    def quota_report(self, key: Key) -> Json:
        """Each quota of a key: limit (None = no limit), used, in flight, and its reset."""
        report: Json = {}
        with self._lock:
            now_s = self._clock()
            flying = self._in_flight.get(key.id, [])
            for quota in QUOTAS:
                used = self._used_in(key.id, quota.period, now_s)
                requests = quota.unit == "requests"
                resets_s = period_bounds(quota.period, now_s)[1]
                report[quota.name] = {
                    "limit": key.quota.get(quota.name),
                    "used": used.requests if requests else used.tokens,
                    "inFlight": sum(r.requests if requests else r.tokens for r in flying),
                    "resetsAt": iso_time(resets_s),
                    "resetsIn": format_span(resets_s - now_s),
                }
        return report

    # -- rows ---------------------------------------------------------------------------------

    def record(self, row: UsageRow, reservation: Reservation) -> None:
        """Writes a row down, and makes its reservation what was really used.

        Raises sqlite3.Error when it is not written yet; quotas count it all the same.
        """
        with self._lock:
            self.release(reservation)
            if row.key_id is not None:
                self._count(row.key_id, row)
        marks = ", ".join("?" * len(row))
        statement = f"INSERT INTO usage ({', '.join(row._fields)}) VALUES ({marks})"
        self._store.keep(statement, *row, must=False)

    def _count(self, key_id: int, row: UsageRow) -> None:
        """Adds a row, before it is among those that are added up, to what its key has used."""
        for period in {quota.period for quota in QUOTAS}:
            # A database that cannot be read has the row when it can be read again.
            with contextlib.suppress(sqlite3.Error):
                used = self._used_in(key_id, period, self._clock())
                if used.begins_s <= row.at_s:
                    used.requests += row.counted
                    used.tokens += row.tokens

    def prune(self, days: int) -> int:
        """Deletes the rows that are older, but for those that a quota may still count; how many
        there were. Raises sqlite3.Error."""
        now_s = self._clock()
        counted_s = min(period_bounds(quota.period, now_s)[0] for quota in QUOTAS)
        with self._store.transaction() as connection:
            return connection.execute(
                "DELETE FROM usage WHERE at_s < ?", (min(now_s - days * 86_400, counted_s),)
            ).rowcount

    # -- reports ------------------------------------------------------------------------------

    def report(self, since_s: float, until_s: float, limit: int, caller: Caller | None) -> Json:
        """What was used in a span of time, by everybody or by one caller; see /api/usage.

        Raises QueueFull, sqlite3.Error.
        """
        where = "at_s >= ? AND at_s < ?"
        values: list[object] = [since_s, until_s]
        if caller is not None and caller.key_id is not None:
            where, values = where + " AND key_id = ?", [*values, caller.key_id]
        elif caller is not None:
            where, values = where + " AND key_id IS NULL AND caller = ?", [*values, caller.name]
        with self._store.reading() as connection:
            rows = Rows(connection, where, values)
            unit = "hour" if rows.span_s() <= _MAX_HOURLY_S else "day"
            step = ("hour", _STEPS[unit])
            series = rows.sums(
                _TIMELINE_SUMS, step, ("key_name", _NAME_NOW), ("model", "model"),
                maximum=_MAX_SERIES + 1,
            )
            return {
                "totals": rows.sums(_GROUP_SUMS)[0],
                "byKey": rows.sums(_GROUP_SUMS, ("key_name", _NAME_NOW)),
                "byModel": rows.sums(_GROUP_SUMS, ("model", "model")),
                "timeline": rows.sums(_TIMELINE_SUMS, step),
                "timelineUnit": unit,
                "daily": rows.sums(_TIMELINE_SUMS, ("day", _DAY)),
                "series": series[-_MAX_SERIES:],
                "seriesComplete": len(series) <= _MAX_SERIES,
                "recent": rows.recent(limit),
            }

    def by_model(self, since_s: float) -> list[Json]:
        """The sums of each model since then, its time-outs among them. Raises as `report` does."""
        columns = (*_GROUP_SUMS, ("timeouts", "SUM(outcome = 'timeout')"))
        with self._store.reading() as connection:
            return Rows(connection, "at_s >= ?", [since_s]).sums(columns, ("model", "model"))


class Rows:
    """Those rows of usage that a report is about."""

    def __init__(self, connection: sqlite3.Connection, where: str, values: list[object]) -> None:
        self._connection = connection
        self._where = where
        self._values = values

    def span_s(self) -> float:
        """The time from the first to the last of them."""
        # Two queries: the index answers each at once, and both together not.
        ends = [
            self._connection.execute(
                f"SELECT {end}(at_s) FROM usage WHERE {self._where}", self._values
            ).fetchone()[0] for end in ("MIN", "MAX")
        ]
        return 0.0 if None in ends else float(ends[1] - ends[0])

    def sums(
        self, columns: _Columns, *groups: tuple[str, str], maximum: int = -1
    ) -> list[Json]:
        """The columns over all rows, or over those that are alike in all groups, (name, SQL), in
        their order. Of more than `most` groups the last ones; -1 = all."""
        sums = [(n, f"COALESCE({sql}, 0)" if "SUM" in sql else sql) for n, sql in columns]
        selected = ", ".join(f"{sql} AS {name}" for name, sql in (*groups, *sums))
        names = ", ".join(name for name, _ in groups)
        backwards = ", ".join(f"{name} DESC" for name, _ in groups)
        grouped = f" GROUP BY {names} ORDER BY {backwards} LIMIT ?" if groups else " LIMIT ?"
        query = f"SELECT {selected} FROM usage WHERE {self._where}{grouped}"
        found = self._connection.execute(query, (*self._values, maximum)).fetchall()
        return [dict(row) for row in reversed(found)]

    def recent(self, limit: int) -> list[Json]:
        """The newest of them, newest first."""
        found = self._connection.execute(
            f"SELECT *, {_NAME_NOW} AS key_name, outcome = 'ok' AS success, "
            "total_ms AS elapsed_ms, datetime(CAST(at_s AS INTEGER), 'unixepoch') AS created_at "
            f"FROM usage WHERE {self._where} ORDER BY id DESC LIMIT ?", (*self._values, limit),
        )
        entries = [{"at": iso_time(row["at_s"]), **dict(row)} for row in found]
        for entry in entries:
            for name in ("id", "at_s", "key_id", "caller", "total_ms"):
                del entry[name]
        return entries


#: The name that a row's key has today, or the caller's.
_NAME_NOW = "COALESCE((SELECT name FROM keys WHERE keys.id = usage.key_id), caller)"
#: The hour or the day of a row, in UTC, as the timeline has it.
_STEPS = {
    "hour": "strftime('%Y-%m-%dT%H:00:00', at_s, 'unixepoch')",
    "day": "strftime('%Y-%m-%dT00:00:00', at_s, 'unixepoch')",
}
#: The day of a row on the machine's calendar.
_DAY = "date(at_s, 'unixepoch', 'localtime')"
#: A timeline of more than so much goes by days.
_MAX_HOURLY_S = 32 * 86_400.0
#: How many entries the series of a report has at most.
_MAX_SERIES = 10_000


# ==== 10. Patterns ===========================================================
# Regular expressions in schemas. Clients write those of their own language; claude's validator is
# JavaScript and rejects a whole schema because of one invalid pattern.

#: How to translate one piece of a regular expression: a pattern of the piece, its template for
#: JavaScript (None if JavaScript rejects it), and its template for Python (None if the same).
_PatternRule = tuple["re.Pattern[str]", "str | None", "str | None"]


def _pattern_rules(*rules: tuple[str, str | None, str | None]) -> tuple[_PatternRule, ...]:
    return tuple((re.compile(text, re.DOTALL), script, python) for text, script, python in rules)


_KNOWN_ESCAPES = r"\\(?:[dDwWsStnvfr^$\\.*+?()\[\]{}|/]|0(?!\d)|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4})"
_CATEGORY = r"\\p\{(?:L[ultmo]?|M[nce]?|N[dlo]?|P[cdseifo]?|S[mcko]?|Z[slp]?)\}"
_IN_CLASS_RULES = _pattern_rules(
    (_KNOWN_ESCAPES, r"\g<0>", None),
    (_CATEGORY, r"\g<0>", r"\\w"),
    (r"\\-|(?<=\\[dDwWsS])-|-(?=\\[dDwWsS])", r"\\-", None),
    (r"\\([^A-Za-z0-9])", r"\1", None),
    (r"\\", None, None),
    (r"\[", r"\\[", None),
    (r".", r"\g<0>", None),
)
_PATTERN_RULES = _pattern_rules(
    (r"[A-Za-z0-9 _,:;@#%&=~'\"<>!/-]+", r"\g<0>", None),
    (_KNOWN_ESCAPES, r"\g<0>", None),
    (_CATEGORY, r"\g<0>", r"\\w"),
    (r"\\[bB]|\\[1-9]", r"\g<0>", None),
    (r"\\k<(\w+)>", r"\g<0>", r"(?P=\1)"),
    (r"\\A", "^", None),
    (r"\\[Zz]", "$", None),
    (r"\\([^A-Za-z0-9])", r"\1", None),
    (r"\\", None, None),
    (r"\(\?P?<([A-Za-z_]\w*)>", r"(?<\1>", r"(?P<\1>"),
    (r"\(\?(?:[:=!]|<[=!])", r"\g<0>", None),
    (r"\(\?", None, None),
    (r"(?:[*+?]|\{\d+(?:,\d*)?\})\??(?![*+?])", r"\g<0>", None),
    (r"[*+?]", None, None),
    (r"[{}\]]", r"\\\g<0>", None),
    (r".", r"\g<0>", None),
)
_CLASS = re.compile(r"(\[\^?)((?:[^\]\\]|\\.)+)\]", re.DOTALL)
#: What may take exponential time to match: a repeated group, a back reference; and more than a
#: few repetitions.
_SLOW_PATTERN = re.compile(r"\)[*+?{]|\\[1-9]|\(\?P=")
_MAX_PATTERN_REPETITIONS = 3
#: The longest pattern: parsing takes time.
_MAX_PATTERN_CHARS = 2_000


class Pattern(NamedTuple):
    """A client's regular expression."""

    #: In the syntax of JavaScript with its `u` flag.
    javascript: str
    #: For Python; None if matching may take exponential time.
    compiled: re.Pattern[str] | None

    def may_match(self, name: str) -> bool:
        """Return True if the pattern matches, or is too slow to find out."""
        return self.compiled is None or self.compiled.search(name) is not None


def _translate_pattern(text: str, rules: tuple[_PatternRule, ...]) -> tuple[str, str]:
    """Return a regular expression in the syntax of JavaScript and in that of Python.

    Raises ValueError if JavaScript rejects it.
    """
    javascript, python, at = "", "", 0
    while at < len(text):
        match = _CLASS.match(text, at) if rules is _PATTERN_RULES else None
        if match is not None:
            inner = _translate_pattern(match[2], _IN_CLASS_RULES)
            pieces = tuple(f"{match[1]}{piece}]" for piece in inner)
        else:
            matches = ((pattern.match(text, at), form, other) for pattern, form, other in rules)
            match, form, other = next(each for each in matches if each[0] is not None)
            if match is None or form is None:
                raise ValueError(text)
            is_same = form == r"\g<0>" and other is None
            forms = () if is_same else (form, other or form)
            pieces = tuple(map(match.expand, forms)) or (match[0], match[0])
        javascript, python, at = javascript + pieces[0], python + pieces[1], match.end()
    return javascript, python


@functools.lru_cache(maxsize=1024)
def strict_pattern(text: str) -> Pattern | None:
    """Return a regular expression that JavaScript accepts; None if there is none."""
    if len(text) > _MAX_PATTERN_CHARS:
        return None
    try:
        javascript, python = _translate_pattern(text, _PATTERN_RULES)
        compiled = re.compile(python)
    except (ValueError, re.error, OverflowError, RecursionError):
        return None
    repetitions = sum(map(python.count, "*+?{"))
    is_slow = repetitions > _MAX_PATTERN_REPETITIONS or _SLOW_PATTERN.search(python)
    return Pattern(javascript, None if is_slow else compiled)


# ==== 11. JSON Schema ========================================================
# The schemas of tools and of structured answers. Clients send every draft of JSON Schema, OpenAPI
# schemas, and near misses. claude's validator implements draft-07 and rejects a whole schema
# because of one unknown keyword; the API implements 2020-12 and restricts the root schema and
# property names. A schema is therefore parsed into plain 2020-12 here, and reduced to the
# keywords that both accept in the next section.

#: Names of members of every JavaScript object. claude is written in JavaScript and mistakes them
#: for a property or tool that was defined.
PROTOTYPE_NAMES = (
    "__defineGetter__", "__defineSetter__", "__lookupGetter__", "__lookupSetter__", "__proto__",
    "constructor", "hasOwnProperty", "isPrototypeOf", "propertyIsEnumerable", "toLocaleString",
    "toString", "valueOf",
)
#: The deepest nesting of a schema, and the most JSON values in it: claude's own limit.
MAX_SCHEMA_LEVELS = 100
MAX_SCHEMA_VALUES = 100_000
#: The property that holds an answer whose schema does not describe a plain object.
WRAPPER_NAME = "value"
#: Schemas up to this size are cached from one request to the next.
_MAX_CACHED_BYTES = 64 * 1024
#: The longest note in a description about keywords that were removed.
_MAX_NOTE_CHARS = 300

#: Types by the lower-case names that clients use.
_TYPE_NAMES = {
    **{name: name for name in (
        "null", "boolean", "integer", "number", "string", "array", "object"
    )},
    "none": "null", "nil": "null", "nonetype": "null", "bool": "boolean", "int": "integer",
    "int32": "integer", "int64": "integer", "long": "integer", "float": "number",
    "double": "number", "decimal": "number", "str": "string", "text": "string",
    "file": "string", "list": "array", "tuple": "array", "set": "array", "dict": "object",
    "map": "object", "record": "object",
}
#: Type names that allow any value.
_ANY_TYPE = ("any", "mixed", "unknown", "")

#: The kind of each keyword's value: SchemaParser reads it with the method `_<kind>`. Other
#: keywords do not constrain a value and are removed.
_KEYWORDS = {
    **dict.fromkeys(("title", "description", "format"), "text"),
    **dict.fromkeys(
        ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), "number"
    ),
    **dict.fromkeys(
        ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties",
         "minContains", "maxContains"), "count"
    ),
    **dict.fromkeys(
        ("items", "contains", "propertyNames", "not", "if", "then", "else",
         "additionalProperties", "unevaluatedProperties", "unevaluatedItems"), "schema"
    ),
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), "schemas"),
    **dict.fromkeys(("const", "default"), "value"),
    "properties": "properties", "patternProperties": "patterns", "dependentSchemas": "by_name",
    "required": "names", "dependentRequired": "names_by_name", "type": "types",
    "enum": "choices", "examples": "examples", "pattern": "pattern", "uniqueItems": "flag",
    "$ref": "reference",
}
#: Keywords of 2020-12 that draft-07 cannot express.
_BEYOND_DRAFT_07 = (
    "prefixItems", "dependentRequired", "dependentSchemas", "minContains", "maxContains",
    "unevaluatedProperties", "unevaluatedItems",
)
#: Keywords whose subschemas apply to the same value as the schema around them.
_IN_PLACE_KEYWORDS = ("$ref", "allOf", "anyOf", "oneOf", "not", "if", "then", "else")
#: Keywords that the API rejects at the root of a tool's schema.
_NOT_AT_ROOT = ("$ref", "allOf", "anyOf", "oneOf")
#: Constraints that no validator here implements; the model can follow them from a description.
_NOTE_KEYWORDS = ("contentEncoding", "contentMediaType", "divisibleBy")
#: Object schemas with only these keywords can be merged into one.
_MERGEABLE = {"type", "title", "description", "default", "examples", "properties", "required"}
#: The most characters of all patterns of one schema: parsing takes time.
_MAX_PATTERNS_CHARS = 20_000
#: The most pairs of a pattern and a property name that are compared.
_MAX_OVERLAPS = 2_000
#: Marks a keyword's value that cannot be parsed.
_UNREADABLE = object()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


#: How to test a value for each type.
_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and value == int(value),
    "number": _is_number,
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


class ModelSchema(NamedTuple):
    """A schema as the model gets it, and how to convert its values to the client's form."""

    schema: Json
    #: Whether `schema` is an object that holds the value under WRAPPER_NAME.
    wrapped: bool = False
    #: Renamed properties: the model's name, the client's name.
    renamed: tuple[tuple[str, str], ...] = ()
    #: The schema in 2020-12, with the model's names, if `schema` is less strict; else None.
    exact: Json | None = None


def _equality_key(value: object) -> str:
    """Return a key that is the same for values that JSON Schema considers equal."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return "[" + ",".join(map(_equality_key, value)) + "]"
    if isinstance(value, dict):
        items = sorted(value.items())
        return "{" + ",".join(f"{key!r}:{_equality_key(item)}" for key, item in items) + "}"
    return json.dumps(value)


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Return the values in order, without duplicates."""
    unique: dict[str, Any] = {}
    for value in values:
        unique.setdefault(_equality_key(value), value)
    return list(unique.values())


#: Keywords of older drafts and of OpenAPI, or whose meaning depends on other keywords.
_LEGACY_KEYWORDS = {
    "items", "dependencies", "exclusiveMinimum", "exclusiveMaximum", "$dynamicRef",
    "$recursiveRef", "discriminator", "example", "if", "then", "else", "unevaluatedProperties",
    "unevaluatedItems",
}


def _modernized(schema: Json) -> Json:
    """Return the schema with the keywords of older drafts and of OpenAPI in those of 2020-12."""
    if _LEGACY_KEYWORDS.isdisjoint(schema):
        return schema
    modern = dict(schema)
    if isinstance(modern.get("items"), list):
        modern["prefixItems"] = modern.pop("items")
        if "additionalItems" in modern:
            modern["items"] = modern.pop("additionalItems")
    dependencies = modern.pop("dependencies", None)
    if isinstance(dependencies, dict):
        lists = {k: v for k, v in dependencies.items() if isinstance(v, (list, str))}
        others = {k: v for k, v in dependencies.items() if k not in lists}
        modern.update({k: v for k, v in (
            ("dependentRequired", lists), ("dependentSchemas", others)) if v})
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(modern.get(exclusive), bool):
            if modern.pop(exclusive) and bound in modern:
                modern[exclusive] = modern.pop(bound)
    for keyword in ("$dynamicRef", "$recursiveRef"):
        if keyword in modern:
            modern.setdefault("$ref", modern.pop(keyword))
    if "discriminator" in modern and "oneOf" in modern and "anyOf" not in modern:
        modern["anyOf"] = modern.pop("oneOf")
    if "example" in modern and "examples" not in modern:
        modern["examples"] = [modern["example"]]
    if "if" not in modern or not {"then", "else"} & set(modern):
        modern = {k: v for k, v in modern.items() if k not in ("if", "then", "else")}
    return _without_unevaluated(modern)


def _without_unevaluated(schema: Json) -> Json:
    """Replace `unevaluated...` by the older keyword where both mean the same; return `schema`."""
    blockers = {*_IN_PLACE_KEYWORDS, "dependentSchemas", "contains"}
    pairs = (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items"))
    for keyword, plain in pairs:
        if keyword in schema and blockers.isdisjoint(schema):
            schema.setdefault(plain, schema.pop(keyword))
    return schema


class SchemaParser:
    """Parses one schema of a client into plain 2020-12.

    The results are `root`, the schema; `definitions`, the targets of its references by name; and
    `renamed`, the client's names of renamed properties by their new names. The constructor raises
    BadRequest, naming the place below `path`, for a schema that cannot be repaired.
    """

    def __init__(self, document: Json, path: str) -> None:
        self._document = document
        #: The targets of references: by URI, and by the name of their definition.
        self._resources: dict[str, object] = {}
        self._named: dict[str, object] = {}
        #: The base URI of the references in a schema, by the schema's id().
        self._base_uris: dict[int, str] = {}
        #: The client's property names by the model's, the reverse, and all names in use.
        self.renamed: dict[str, str] = {}
        self._new_names: dict[str, str] = {}
        self._used_names: set[str] = set(PROTOTYPE_NAMES)
        self._index_document(path)
        self.definitions: Json = {}
        self._definition_names: dict[int, str] = {}
        self._used_definition_names: set[str] = set()
        self._pattern_chars = 0
        #: Definitions to parse: name, schema, path.
        self._pending: list[tuple[str, Json, str]] = []
        self.root = self.schema(document, path, 0)
        while self._pending:
            name, target, target_path = self._pending.pop()
            self.definitions[name] = self.schema(target, target_path, 0)
        self._check_cycles(path)

    def _index_document(self, path: str) -> None:
        """Collect the names and the targets of references. Raises BadRequest if the document is
        too large."""
        pending: list[tuple[object, str, int]] = [(self._document, "", 0)]
        count = 0
        while pending:
            value, base, level = pending.pop()
            count += 1
            # One level of schemas is two levels of JSON in most places.
            self._check_level(level // 2, path)
            if count > MAX_SCHEMA_VALUES:
                raise BadRequest(
                    f"{path}: a schema may hold {MAX_SCHEMA_VALUES} values.", param=path
                )
            if isinstance(value, list):
                pending += [(item, base, level + 1) for item in value]
            if not isinstance(value, dict):
                continue
            base = self._register_identifiers(value, base)
            self._used_names.update(value)
            pending += [(item, base, level + 1) for item in value.values()]
            for keyword in ("$defs", "definitions", "schemas"):
                schemas = value.get(keyword)
                for name, schema in schemas.items() if isinstance(schemas, dict) else ():
                    self._named.setdefault(name, schema)

    def _check_level(self, level: int, path: str) -> None:
        if level > MAX_SCHEMA_LEVELS:
            raise BadRequest(
                f"{path[:200]}: a schema may be nested {MAX_SCHEMA_LEVELS} levels deep.",
                param=path[:200],
            )

    def _register_identifiers(self, value: Json, base: str) -> str:
        """Register the URIs and anchors of a schema; return the base URI of its references."""
        for keyword in ("$id", "id"):
            identity = value.get(keyword)
            if isinstance(identity, str) and identity:
                uri = urllib.parse.urljoin(base, identity) if base else identity
                self._resources.setdefault(uri.rstrip("#"), value)
                base = uri.partition("#")[0] or base
        for keyword in ("$anchor", "$dynamicAnchor"):
            if isinstance(value.get(keyword), str):
                self._resources.setdefault(f"{base}#{value[keyword]}", value)
        self._base_uris[id(value)] = base
        return base

    # -- schemas ------------------------------------------------------------------------------

    def schema(self, value: object, path: str, level: int) -> Json:
        """Return the parsed schema. Raises BadRequest if `value` cannot be meant as a schema."""
        self._check_level(level, path)
        if isinstance(value, bool) or value is None:
            return {"not": {}} if value is False else {}
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, dict):
            raise BadRequest(f"{path}: must be a JSON schema, an object.", param=path)
        plain: Json = {}
        notes = {k: value[k] for k in _NOTE_KEYWORDS if isinstance(value.get(k), (str, int, float))}
        for keyword, operand in _modernized(value).items():
            kind = _KEYWORDS.get(keyword)
            if kind is None or (operand is None and kind != "value"):
                continue
            if kind == "reference":
                parsed: object = self._reference(operand, self._base_uris.get(id(value), ""), path)
            else:
                parsed = getattr(self, "_" + kind)(operand, f"{path}.{keyword}", level)
            if parsed is _UNREADABLE:
                notes[keyword] = operand
            else:
                plain[keyword] = parsed
        self._require_flagged(value.get("properties"), plain)
        if "patternProperties" in notes:
            # Properties that matched a pattern would otherwise be refused as additional.
            plain.pop("additionalProperties", None)
        if "propertyNames" in plain and set(plain.get("properties", ())) & set(self.renamed):
            notes["propertyNames"] = plain.pop("propertyNames")
        plain = _without_orphan_keywords(plain)
        if value.get("nullable") is True or value.get("x-nullable") is True:
            plain = _nullable(plain)
        return _with_notes(plain, notes)

    def _schema(self, value: object, path: str, level: int) -> object:
        return value if isinstance(value, bool) else self.schema(value, path, level + 1)

    def _schemas(self, value: object, path: str, level: int) -> object:
        items = value if isinstance(value, list) else [value]
        return [
            self.schema(item, f"{path}[{index}]", level + 1)
            for index, item in enumerate(items) if item is not None
        ] or _UNREADABLE

    def _by_name(self, value: object, path: str, level: int) -> Json:
        if value == []:
            # PHP encodes an empty object as an empty array.
            return {}
        if not isinstance(value, dict):
            raise BadRequest(f"{path}: must be an object of JSON schemas.", param=path)
        return {
            self._name(key): self.schema(item, f"{path}.{key}", level + 1)
            for key, item in value.items()
        }

    def _properties(self, value: object, path: str, level: int) -> object:
        schemas = self._by_name(value, path, level)
        for name, schema in schemas.items():
            client_name = self.renamed.get(name)
            if client_name is not None:
                schemas[name] = _with_preface(schema, f"Called {client_name!r}.")
        return schemas

    def _patterns(self, value: object, path: str, level: int) -> object:
        if not isinstance(value, dict):
            return _UNREADABLE
        schemas: Json = {}
        for key, item in value.items():
            pattern = self._read_pattern(key)
            if pattern is None:
                return _UNREADABLE
            schemas[pattern.javascript] = self.schema(item, f"{path}.{key}", level + 1)
        return schemas

    def _require_flagged(self, properties: object, plain: Json) -> None:
        """Add the properties with `required: true`, as in draft-03, to `required`."""
        if isinstance(properties, dict):
            flagged = [
                self._name(key) for key, item in properties.items()
                if isinstance(item, dict) and item.get("required") is True
            ]
            if flagged:
                plain["required"] = _distinct([*plain.get("required", ()), *flagged])

    # -- names and references -----------------------------------------------------------------

    def _name(self, client_name: str) -> str:
        """Return the model's name of a property."""
        is_valid = re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", client_name)
        if is_valid and client_name not in PROTOTYPE_NAMES:
            return client_name
        if client_name not in self._new_names:
            name = _new_name(client_name, "property", self._used_names)
            self._new_names[client_name] = name
            self.renamed[name] = client_name
        return self._new_names[client_name]

    def _reference(self, value: object, base: str, path: str) -> object:
        target = self._resolve(value, base) if isinstance(value, str) else _UNREADABLE
        if not isinstance(target, (dict, bool)):
            raise BadRequest(
                f"{path}.$ref: {str(value)[:100]!r} refers to no schema in this document.",
                param=f"{path}.$ref",
            )
        key = id(target) if isinstance(target, dict) else int(target)
        if key not in self._definition_names:
            last = urllib.parse.unquote(str(value).rpartition("/")[2])
            name = _new_name(last, "schema", self._used_definition_names)
            self._definition_names[key] = name
            schema = target if isinstance(target, dict) else ({} if target else {"not": {}})
            self._pending.append((name, schema, f"{path}.$ref"))
        return f"#/$defs/{self._definition_names[key]}"

    def _resolve(self, reference: str, base: str) -> object:
        """Return the target of a reference; _UNREADABLE if there is none."""
        uri, _, fragment = urllib.parse.urljoin(base, reference).partition("#")
        resource = self._resources.get(uri, self._document if uri == base else _UNREADABLE)
        if not fragment:
            return resource
        whole = self._resources.get(f"{uri}#{fragment}")
        if whole is not None:
            return whole
        tokens = urllib.parse.unquote(fragment).split("/")[1:]
        tokens = [token.replace("~1", "/").replace("~0", "~") for token in tokens]
        for start in (resource, self._document):
            target = _resolve_pointer(start, tokens)
            if target is not _UNREADABLE:
                return target
        # A schema that was embedded in another one often keeps references to its former root.
        return self._named.get(tokens[-1], _UNREADABLE) if tokens else _UNREADABLE

    def _check_cycles(self, path: str) -> None:
        """Raise BadRequest for a cycle of definitions that never reaches another value."""
        checked: set[str] = set()
        for start in self.definitions:
            stack = [(start, iter(_in_place_references(self.definitions[start])))]
            open_names = {start}
            while stack:
                name, others = stack[-1]
                other = next((each for each in others if each not in checked), None)
                if other in open_names:
                    raise BadRequest(
                        f"{path}: the definition {other!r} refers only to itself.", param=path
                    )
                if other is None:
                    stack.pop()
                    open_names.discard(name)
                    checked.add(name)
                else:
                    stack.append((other, iter(_in_place_references(self.definitions[other]))))
                    open_names.add(other)

    # -- other keywords -----------------------------------------------------------------------

    def _text(self, value: object, path: str, level: int) -> object:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return " ".join(value)
        return value if isinstance(value, str) else _UNREADABLE

    def _number(self, value: object, path: str, level: int) -> object:
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = from_json(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return _UNREADABLE
        return value if value > 0 or not path.endswith("multipleOf") else _UNREADABLE

    def _count(self, value: object, path: str, level: int) -> object:
        number = self._number(value, path, level)
        if not isinstance(number, (int, float)) or number < 0 or number != int(number):
            return _UNREADABLE
        return int(number)

    def _flag(self, value: object, path: str, level: int) -> object:
        return value if isinstance(value, bool) else _UNREADABLE

    def _pattern(self, value: object, path: str, level: int) -> object:
        pattern = self._read_pattern(value) if isinstance(value, str) else None
        return _UNREADABLE if pattern is None else pattern.javascript

    def _read_pattern(self, text: str) -> Pattern | None:
        """Return a pattern; None if it is invalid or the schema has too many characters of
        patterns."""
        self._pattern_chars += len(text)
        return strict_pattern(text) if self._pattern_chars <= _MAX_PATTERNS_CHARS else None

    def _names(self, value: object, path: str, level: int) -> object:
        if isinstance(value, bool):
            return []
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise BadRequest(f"{path}: must be an array of strings.", param=path)
        return _distinct(map(self._name, items))

    def _names_by_name(self, value: object, path: str, level: int) -> object:
        if not isinstance(value, dict):
            return _UNREADABLE
        return {
            self._name(key): self._names(item, f"{path}.{key}", level)
            for key, item in value.items()
        }

    def _types(self, value: object, path: str, level: int) -> object:
        if isinstance(value, str) and value in _TYPES:
            return value
        items = value if isinstance(value, list) else [value]
        names = [item.strip().lower() if isinstance(item, str) else item for item in items]
        if any(name in _ANY_TYPE for name in names if isinstance(name, str)):
            return []
        known = [_TYPE_NAMES.get(name) if isinstance(name, str) else None for name in names]
        if not known or None in known:
            return _UNREADABLE
        types = _distinct(known)
        return types if isinstance(value, list) and len(types) > 1 else types[0]

    def _choices(self, value: object, path: str, level: int) -> object:
        items = value if isinstance(value, list) else [value]
        return [self._value(item, path, level) for item in _distinct(items)] or _UNREADABLE

    def _examples(self, value: object, path: str, level: int) -> object:
        if isinstance(value, dict):
            # OpenAPI has an object of named examples.
            value = [e["value"] for e in value.values() if isinstance(e, dict) and "value" in e]
        items = value if isinstance(value, list) else [value]
        return [self._value(item, path, level) for item in items]

    def _value(self, value: object, path: str, level: int) -> object:
        """Return a client's value with the model's property names."""
        if isinstance(value, dict):
            items = value.items()
            return {self._name(k): self._value(each, path, level) for k, each in items}
        if isinstance(value, list):
            return [self._value(item, path, level) for item in value]
        return value


def _new_name(client_name: str, fallback: str, used: set[str]) -> str:
    """Return a readable unused name that the API accepts, and add it to `used`. It is based on
    `fallback` if the client's name has no ASCII letter."""
    decomposed = unicodedata.normalize("NFKD", client_name)
    letters = "".join(each for each in decomposed if not unicodedata.combining(each))
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", letters).strip("_")[:48] or fallback
    # Starting at the number of used names keeps the search short when many names are equal.
    numbers = itertools.chain(["", "_2", "_3"], (f"_{n}" for n in itertools.count(len(used))))
    name = next(readable + number for number in numbers if readable + number not in used)
    used.add(name)
    return name


def _resolve_pointer(value: object, tokens: list[str]) -> object:
    """Return the target of a JSON pointer, given as its tokens; _UNREADABLE if there is none."""
    for token in tokens:
        if isinstance(value, dict) and token in value:
            value = value[token]
        elif isinstance(value, list) and token.isdigit() and int(token) < len(value):
            value = value[int(token)]
        else:
            return _UNREADABLE
    return value


def _in_place_references(schema: Json) -> Iterator[str]:
    """Yield the names of the definitions that apply to the same value as this schema."""
    if "$ref" in schema:
        yield schema["$ref"].rpartition("/")[2]
    for keyword in _IN_PLACE_KEYWORDS[1:]:
        operand = schema.get(keyword, ())
        for each in [operand] if isinstance(operand, dict) else operand:
            yield from _in_place_references(each)


def _without_orphan_keywords(schema: Json) -> Json:
    """Remove keywords that have no effect without another one; return `schema`."""
    if schema.get("type") == []:
        del schema["type"]
    if schema.get("required") == [] and "properties" not in schema:
        del schema["required"]
    if "contains" not in schema or schema.get("minContains") == 0:
        for keyword in ("minContains", "maxContains"):
            schema.pop(keyword, None)
    if "examples" in schema and not schema["examples"]:
        del schema["examples"]
    return schema


def _nullable(schema: Json) -> Json:
    """Return a schema that also allows null."""
    types = schema.get("type")
    if types is None or set(_IN_PLACE_KEYWORDS) & set(schema) or "const" in schema:
        labels: Json = {k: schema.pop(k) for k in ("title", "description") if k in schema}
        return {**labels, "anyOf": [schema, {"type": "null"}]}
    both = _distinct([*(types if isinstance(types, list) else [types]), "null"])
    nullable = {**schema, "type": both}
    if "enum" in nullable:
        nullable["enum"] = _distinct([*nullable["enum"], None])
    return nullable


def _with_preface(schema: Json, preface: str) -> Json:
    """Return the schema with `preface` in front of its description."""
    return {**schema, "description": " ".join(filter(None, (preface, schema.get("description"))))}


def _with_notes(schema: Json, notes: Mapping[str, object]) -> Json:
    """Return the schema with these keywords and their values added to its description."""
    texts = [f"{keyword}: {to_json(value).decode('utf-8')}" for keyword, value in notes.items()]
    if not texts:
        return schema
    note = f"({one_line('; '.join(texts), _MAX_NOTE_CHARS)})"
    return {**schema, "description": " ".join(filter(None, (schema.get("description"), note)))}


# ==== 12. Model schemas ======================================================
# A parsed schema is reduced to the keywords that claude and the API accept. The rest becomes part
# of descriptions, and is checked here. The JSON that the model writes is converted back into the
# client's form, also while it streams.

def schema_for_model(document: Json, path: str, *, is_tool: bool) -> ModelSchema:
    """Return the schema of a tool's arguments, or of an answer, in the form that claude accepts.

    Raises BadRequest, naming the place below `path`, for an invalid schema. In the schema of an
    answer `format` becomes part of the description, because older versions of claude reject it.
    The result is cached, because clients repeat their schemas in every request: never modify it.
    """
    try:
        text = to_json(document)
    except RecursionError:
        text = b""
    if 0 < len(text) <= _MAX_CACHED_BYTES:
        return _cached_schema_for_model(text, path, is_tool)
    return _build_schema_for_model(document, path, is_tool)


@functools.lru_cache(maxsize=256)
def _cached_schema_for_model(text: bytes, path: str, is_tool: bool) -> ModelSchema:
    document: Any = from_json(text)
    return _build_schema_for_model(document, path, is_tool)


def _build_schema_for_model(document: Json, path: str, is_tool: bool) -> ModelSchema:
    parser = SchemaParser(document, path)
    root = _flattened_root(parser.root, parser.definitions)
    if is_tool:
        root = _arguments_root(root, path)
    wrapped = root.get("type") != "object" or any(keyword in root for keyword in _NOT_AT_ROOT)
    if wrapped:
        root = {
            "type": "object",
            "properties": {WRAPPER_NAME: root},
            "required": [WRAPPER_NAME],
            "additionalProperties": False,
        }
    elif is_tool:
        root = {"properties": {}, **root}
    definitions = {"$defs": parser.definitions} if parser.definitions else {}
    exact = {**root, **definitions}
    removed: list[str] = []
    schema = _to_draft_07(exact, removed, formats=is_tool)
    renamed = tuple(parser.renamed.items())
    return ModelSchema(schema, wrapped, renamed, exact if removed else None)


def _flattened_root(root: Json, definitions: Json) -> Json:
    """Return the root with `$ref` and `allOf` resolved, if that is possible."""
    for _ in definitions:
        siblings = {key: value for key, value in root.items() if key != "$ref"}
        if "$ref" not in root or not set(siblings) <= {"title", "description", "default", "type"}:
            break
        target = _dereferenced({"$ref": root["$ref"]}, definitions)
        if target.get("type", "object") != siblings.get("type", target.get("type", "object")):
            break
        root = {**target, **siblings}
    if "allOf" not in root:
        return root
    siblings = {key: value for key, value in root.items() if key != "allOf"}
    parts = [_dereferenced(part, definitions) for part in root["allOf"]]
    return _merged_object([siblings, *parts]) or root


def _dereferenced(schema: Json, definitions: Json) -> Json:
    """Return the target of a schema that is only a reference, else the schema itself."""
    if set(schema) != {"$ref"}:
        return schema
    target: Json = definitions[schema["$ref"].rpartition("/")[2]]
    return target


def _merged_object(schemas: list[Json]) -> Json | None:
    """Return one object schema that is equivalent to all of these; None if they do not merge."""
    # additionalProperties that allow everything are the default.
    parts = [
        {k: v for k, v in each.items() if k != "additionalProperties" or v not in (True, {})}
        for each in schemas
    ]
    types = {each.get("type", "object") for each in parts if isinstance(each.get("type", ""), str)}
    if types != {"object"} or not all(set(each) <= _MERGEABLE for each in parts):
        return None
    properties: dict[str, list[Json]] = {}
    for each in parts:
        for name, schema in each.get("properties", {}).items():
            properties.setdefault(name, []).append(schema)
    merged: Json = {}
    for each in reversed(parts):
        merged.update(each)
    merged["type"] = "object"
    merged["properties"] = {
        name: same[0] if len(_distinct(same)) == 1 else {"allOf": same}
        for name, same in properties.items()
    }
    required = _distinct(name for each in parts for name in each.get("required", ()))
    return {**merged, "required": required} if required else merged


def _arguments_root(root: Json, path: str) -> Json:
    """Return the root of a tool's schema. Raises BadRequest if it does not describe an object."""
    types = root.get("type", "object")
    if "object" not in (types if isinstance(types, list) else [types]):
        raise BadRequest(
            f"{path}.type: must be object: the tool's arguments by name.",
            param=f"{path}.type",
        )
    if "type" not in root and any(keyword in root for keyword in _NOT_AT_ROOT):
        return root
    return {**root, "type": "object"}


def _to_draft_07(schema: Json, removed: list[str], *, formats: bool) -> Json:
    """Return the schema with the keywords of draft-07 only. The others are appended to `removed`
    and become part of the description, for the model."""
    plain: Json = {}
    notes: Json = {}
    for keyword, value in schema.items():
        if keyword in _BEYOND_DRAFT_07:
            removed.append(keyword)
            notes[keyword] = value
        elif keyword == "format" and not formats:
            notes[keyword] = value
        else:
            plain[keyword] = _draft_07_value(keyword, value, removed, formats)
    if "prefixItems" in notes:
        first = notes.pop("prefixItems")
        plain = _uniform_array(plain, [_to_draft_07(each, removed, formats=formats)
                                       for each in first])
    _drop_overlapping_patterns(plain, removed, notes)
    return _with_notes(plain, notes)


def _draft_07_value(keyword: str, value: Any, removed: list[str], formats: bool) -> object:
    """Return the value of a keyword with the schemas in it converted by _to_draft_07."""
    kind = "by_name" if keyword == "$defs" else _KEYWORDS[keyword]
    if kind == "schema" and isinstance(value, dict):
        return _to_draft_07(value, removed, formats=formats)
    if kind == "schemas":
        return [_to_draft_07(each, removed, formats=formats) for each in value]
    if kind in ("by_name", "properties", "patterns"):
        return {name: _to_draft_07(each, removed, formats=formats) for name, each in value.items()}
    return value


def _uniform_array(schema: Json, first: list[Json]) -> Json:
    """Return an array schema with one schema for all items, and the order of the `first` items,
    which have schemas of their own, in its description.

    Clients that specify no further items mean that there are none.
    """
    rest = schema.get("items", False)
    minimum, maximum = schema.get("minItems", len(first)), schema.get("maxItems", math.inf)
    if rest is False and "items" not in schema and maximum > len(first) and maximum < math.inf:
        rest = {}
    preface = "Items in this order: " + ", ".join(map(_summary, first))
    bounds = {"minItems": minimum}
    kinds = list(first)
    if rest is False:
        bounds = {"minItems": min(minimum, len(first)), "maxItems": min(maximum, len(first))}
    else:
        kinds.append(rest if isinstance(rest, dict) else {})
        preface += ", then any number of: " + _summary(kinds[-1])
    kinds = [{}] if {} in kinds else _distinct(kinds)
    items = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    return _with_preface({**schema, "items": items, **bounds}, preface + ".")


def _summary(schema: Json) -> str:
    """Return a few words about the values of a schema."""
    if "title" in schema:
        return str(schema["title"])
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(map(_summary, schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(to_json(value).decode("utf-8") for value in values)
    types = schema.get("type", "anything")
    return types if isinstance(types, str) else " or ".join(types)


def _drop_overlapping_patterns(schema: Json, removed: list[str], notes: Json) -> None:
    """Remove patternProperties that match a named property, because claude rejects them."""
    patterns = schema.get("patternProperties", {})
    names = schema.get("properties", ())
    too_many = len(patterns) * len(names) > _MAX_OVERLAPS
    for text in list(patterns):
        pattern = None if too_many else strict_pattern(text)
        if pattern is None or any(map(pattern.may_match, names)):
            notes.setdefault("patternProperties", {})[text] = patterns.pop(text)
            removed.append("patternProperties")
            schema.pop("additionalProperties", None)
    if not patterns:
        schema.pop("patternProperties", None)


# -- validation -----------------------------------------------------------------------------------

#: Returns whether a value fits a schema.
_Fits = Callable[[Any, Any], bool]


def _check_type(value: Any, types: Any, schema: Json, fits: _Fits) -> bool:
    return any(_TYPES[name](value) for name in (types if isinstance(types, list) else [types]))


def _check_enum(value: Any, choices: Any, schema: Json, fits: _Fits) -> bool:
    return _equality_key(value) in map(_equality_key, choices)


def _check_items(value: Any, rest: Any, schema: Json, fits: _Fits) -> bool:
    return all(fits(item, rest) for item in value[len(schema.get("prefixItems", ())):])


def _check_contains(value: Any, operand: Any, schema: Json, fits: _Fits) -> bool:
    count = sum(fits(item, operand) for item in value)
    return bool(schema.get("minContains", 1) <= count <= schema.get("maxContains", math.inf))


def _check_additional(value: Any, rest: Any, schema: Json, fits: _Fits) -> bool:
    known, texts = schema.get("properties", ()), schema.get("patternProperties", ())
    patterns = [each for each in map(strict_pattern, texts) if each is not None]
    return all(
        fits(item, rest) for name, item in value.items()
        if name not in known and not any(each.may_match(name) for each in patterns)
    )


def _check_patterns(value: Any, schemas: Any, schema: Json, fits: _Fits) -> bool:
    pairs = [(strict_pattern(text), item_schema) for text, item_schema in schemas.items()]
    return all(
        fits(item, item_schema) for name, item in value.items() for pattern, item_schema in pairs
        if pattern is not None and pattern.compiled is not None and pattern.compiled.search(name)
    )


def _check_condition(value: Any, condition: Any, schema: Json, fits: _Fits) -> bool:
    return fits(value, schema.get("then" if fits(value, condition) else "else", True))


#: How each keyword is checked: the type of the values that it applies to (empty: all types), and
#: a function of the value, the keyword's operand, the schema, and `fits` for parts of the value.
_CHECKS: dict[str, tuple[str, Callable[[Any, Any, Json, _Fits], bool]]] = {
    "type": ("", _check_type),
    "enum": ("", _check_enum),
    "const": ("", lambda v, operand, _s, _f: _equality_key(v) == _equality_key(operand)),
    "minimum": ("number", lambda v, minimum, _s, _f: bool(v >= minimum)),
    "maximum": ("number", lambda v, maximum, _s, _f: bool(v <= maximum)),
    "exclusiveMinimum": ("number", lambda v, minimum, _s, _f: bool(v > minimum)),
    "exclusiveMaximum": ("number", lambda v, maximum, _s, _f: bool(v < maximum)),
    "minLength": ("string", lambda v, minimum, _s, _f: len(v) >= minimum),
    "maxLength": ("string", lambda v, maximum, _s, _f: len(v) <= maximum),
    "minItems": ("array", lambda v, minimum, _s, _f: len(v) >= minimum),
    "maxItems": ("array", lambda v, maximum, _s, _f: len(v) <= maximum),
    "uniqueItems": ("array", lambda v, on, _s, _f: not on or len(_distinct(v)) == len(v)),
    "items": ("array", _check_items),
    "prefixItems": ("array", lambda v, each, _s, f: all(map(f, v, each))),
    "contains": ("array", _check_contains),
    "minProperties": ("object", lambda v, minimum, _s, _f: len(v) >= minimum),
    "maxProperties": ("object", lambda v, maximum, _s, _f: len(v) <= maximum),
    "required": ("object", lambda v, names, _s, _f: set(names) <= set(v)),
    "properties": (
        "object", lambda v, each, _s, f: all(f(v[name], each[name]) for name in v if name in each)
    ),
    "patternProperties": ("object", _check_patterns),
    "additionalProperties": ("object", _check_additional),
    "propertyNames": ("object", lambda v, operand, _s, f: all(f(name, operand) for name in v)),
    "dependentRequired": (
        "object", lambda v, more, _s, _f: all(set(more[n]) <= set(v) for n in v if n in more)
    ),
    "dependentSchemas": (
        "object", lambda v, more, _s, f: all(f(v, more[name]) for name in v if name in more)
    ),
    "allOf": ("", lambda v, each, _s, f: all(f(v, one) for one in each)),
    "anyOf": ("", lambda v, each, _s, f: any(f(v, one) for one in each)),
    "oneOf": ("", lambda v, each, _s, f: sum(f(v, one) for one in each) == 1),
    "not": ("", lambda v, operand, _s, f: not f(v, operand)),
    "if": ("", _check_condition),
}


def fits(value: object, schema: Json | bool, definitions: Json) -> bool:
    """Return whether a value fits a schema such as ModelSchema.exact. `pattern`, `multipleOf`,
    `format` and `unevaluated...` are not checked."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and not fits(value, _dereferenced({"$ref": schema["$ref"]}, definitions),
                                     definitions):
        return False
    for keyword, operand in schema.items():
        kind, check = _CHECKS.get(keyword, ("", None))
        if check is None or (kind and not _TYPES[kind](value)):
            continue
        if not check(value, operand, schema, lambda part, one: fits(part, one, definitions)):
            return False
    return True


# -- between the model's form and the client's ----------------------------------------------------

def rename_properties(value: object, names: Mapping[str, str]) -> object:
    """Return a copy of a value with its properties, at every depth, renamed by `names`."""
    if isinstance(value, dict):
        return {
            names.get(key, key): rename_properties(item, names) for key, item in value.items()
        }
    if isinstance(value, list):
        return [rename_properties(item, names) for item in value]
    return value


_IN_STRING = re.compile(r'[^"\\]+')
_BETWEEN = re.compile(r'[^"{}\[\],:]+')

# ClientJsonConverter is a tokenizer over a stream of JSON that may be cut anywhere. It reads, in
# turn: structure (brackets, commas, numbers ...); a string, which passes through; a property name,
# which is held back until its closing quote, because it may have to be renamed.
#
# Around that, a wrapped answer goes through these states:
#   undecided     Everything is collected in `_head` until the first property name shows whether
#                 there is a wrapper at all. If not, everything passes through.
#   before value  The wrapper's brace and WRAPPER_NAME are dropped; a colon starts the value.
#   in value      Passes through.
#   after value   A comma or the last brace of the wrapper ends the value; the rest is dropped.


class ClientJsonConverter:
    """Converts JSON of the model, which arrives in pieces, to the client's form: without the
    wrapper and with the client's property names.

    Each piece is returned as soon as it is certain. An answer that lacks its wrapper is returned
    unchanged: rejecting it is up to claude.
    """

    def __init__(self, *, wrapped: bool, renamed: Iterable[tuple[str, str]] = ()) -> None:
        self._names = dict(renamed)
        self._wrapped = wrapped
        #: The text before the first property name.
        self._head = ""
        self._is_decided = not wrapped
        self._in_value = not wrapped
        self._value_ended = False
        self._open_brackets: list[str] = []
        #: The property name that is being read, with its quotes.
        self._name: str | None = None
        self._name_is_next = False
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> str:
        """Process a piece; return the output that became certain with it."""
        output: list[str] = []
        at = 0
        while at < len(text):
            in_string = self._in_string or self._name is not None
            run = None
            if not self._escaped:
                run = (_IN_STRING if in_string else _BETWEEN).match(text, at)
            piece = run.group() if run is not None else text[at]
            at += len(piece)
            output.append(self._string(piece) if in_string else self._structure(piece))
        return "".join(output)

    def close(self) -> str:
        """Return the pending output of JSON that was cut off."""
        rest, self._head = self._head + (self._name or ""), ""
        self._name = None
        return rest if self._in_value or not self._is_decided else ""

    def _string(self, piece: str) -> str:
        ends = piece == '"' and not self._escaped
        self._escaped = piece == "\\" and not self._escaped
        if self._name is None:
            self._in_string = not ends
            return self._emit(piece)
        self._name += piece
        if not ends:
            return ""
        name, self._name, self._name_is_next = self._name, None, False
        return self._property_name(name)

    def _property_name(self, text: str) -> str:
        try:
            name = from_json(text)
        except ValueError:
            return self._emit(text)
        if not self._is_decided:
            self._is_decided = True
            self._wrapped = name == WRAPPER_NAME
            self._in_value = not self._wrapped
            head, self._head = self._head, ""
            if self._in_value:
                return head + self._client_name(name, text)
        return self._emit(self._client_name(name, text))

    def _client_name(self, name: object, text: str) -> str:
        client_name = self._names.get(str(name))
        return text if client_name is None else to_json(client_name).decode("utf-8")

    def _structure(self, piece: str) -> str:
        if piece == '"':
            if self._name_is_next:
                self._name = piece
                return ""
            self._in_string = True
        elif piece in ("{", "["):
            output = self._emit(piece)
            self._open_brackets.append(piece)
            self._name_is_next = piece == "{"
            return output
        elif piece in ("}", "]"):
            del self._open_brackets[-1:]
            self._name_is_next = False
        elif piece == ",":
            self._name_is_next = self._open_brackets[-1:] == ["{"]
        return self._separator(piece)

    def _separator(self, piece: str) -> str:
        """Return a piece between values, unless it belongs to the wrapper."""
        depth = len(self._open_brackets)
        if self._wrapped and self._is_decided and depth <= 1:
            if piece == ":" and depth == 1 and not (self._in_value or self._value_ended):
                self._in_value = True
                return ""
            if piece == "," or (piece == "}" and depth == 0):
                self._in_value, self._value_ended = False, True
            return self._emit(piece.strip())
        return self._emit(piece)

    def _emit(self, piece: str) -> str:
        if not self._is_decided:
            self._head += piece
            return ""
        return piece if self._in_value else ""


# ==== 13. Request fields =====================================================
# Fields reads the JSON of a request with types and names the field that is invalid. The
# functions after it, shared by all dialects, turn messages, tool calls and tool results of
# clients into a prompt that the API accepts.


class Limits(NamedTuple):
    """The operator's limits for images and files in a request."""

    image_allow_url: bool
    max_image_bytes: int
    max_images: int
    max_image_total_bytes: int


class ParseEnvironment(NamedTuple):
    """What a dialect needs from the server to parse a body."""

    models: Models
    default_model: str
    limits: Limits
    #: Returns the messages of an earlier response of this caller by its id. Raises BadRequest.
    recall: Callable[[str], list[Message]]
    #: Returns an item of such a response by its id. Raises NotFound.
    item: Callable[[str], Json]
    #: Returns the messages of this caller's session by its id and the system prompt.
    session: Callable[[str, str], list[Message]]
    #: True if only the tokens are counted: the prompt may end with an assistant message then.
    count_only: bool = False
    #: True if a header requests the long context window.
    long_context: bool = False

    def model(self, fields: Fields) -> tuple[str, Model]:
        """Return the name in the request, or the default one, and its model.

        Raises UnknownModel.
        """
        name = fields.text("model") or self.default_model
        return name, self.models.find(name, long_context=self.long_context)


#: Larger token limits count as this one: no model writes that many.
_MAX_TOKEN_LIMIT = 10**9


#: The longest array of messages, items, parts or tools. More do not fit the window of any model,
#: and parsing each takes time.
_MAX_OBJECTS = 20_000


def is_non_default(value: object) -> bool:
    """Return whether the value of an optional field differs from the usual defaults."""
    return value not in (None, False, 0, "", "none", [], {})


class Fields:
    """One JSON object of a request, read with types.

    The getters return None for a field that is absent or null, and raise BadRequest with the
    field's full path as `param` if its type is wrong. Fields that no getter read are reported by
    `ignored_paths`.
    """

    __slots__ = ("_marked", "_read", "_settings", "object", "path")

    def __init__(self, value: object, path: str = "") -> None:
        """Raises BadRequest if `value` is not a JSON object."""
        if not isinstance(value, dict):
            where = f"{path}: must be" if path else "The body must be"
            raise BadRequest(f"{where} a JSON object.", param=path or None)
        self.object: Json = value
        self.path = path
        self._read: set[str] = set()
        self._marked: list[str] = []
        self._settings: dict[str, Fields] = {}

    def value(self, name: str) -> Any:
        """Return a field unchecked, and count it as read; every getter calls this."""
        self._read.add(name)
        return self.object.get(name)

    def mark_ignored(self, name: str) -> None:
        """Report a field in `ignored_paths` although it was read."""
        self._marked.append(self.path_of(name))

    def ignored_paths(self, silent: Iterable[str] = ()) -> tuple[str, ...]:
        """Return the paths of marked fields and of unread ones that are not at their default,
        also in `settings`. Fields in `silent` are not reported. Call this after all getters."""
        unread = [
            one_line(self.path_of(name), 80) for name, value in self.object.items()
            if name not in self._read and name not in silent and is_non_default(value)
        ]
        nested = [path for each in self._settings.values() for path in each.ignored_paths()]
        return (*self._marked, *nested, *unread)

    def path_of(self, name: str) -> str:
        """Return the full path of a field, for error messages."""
        return f"{self.path}.{name}" if self.path else name

    def invalid(self, name: str, what: str) -> BadRequest:
        """Return the error that says what the field must be."""
        return BadRequest(f"{self.path_of(name)}: must be {what}.", param=self.path_of(name))

    def has(self, name: str) -> bool:
        """Return whether the field is present and not null."""
        return self.value(name) is not None

    def text(self, name: str) -> str | None:
        """Return a string."""
        value = self.value(name)
        if value is not None and not isinstance(value, str):
            raise self.invalid(name, "a string")
        return value

    def required_text(self, name: str) -> str:
        """Return a string. Raises BadRequest also if it is absent or empty."""
        value = self.text(name)
        if not value:
            raise self.invalid(name, "a string that is not empty")
        return value

    def flag(self, name: str) -> bool:
        """Return a boolean; False if absent."""
        value = self.value(name)
        if value is not None and not isinstance(value, bool):
            raise self.invalid(name, "true or false")
        return bool(value)

    def number(self, name: str, minimum: float, maximum: float) -> float | None:
        """Return a number within a range."""
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.invalid(name, "a number")
        if not minimum <= value <= maximum:
            unbounded = value < minimum and maximum >= 10**9
            span = f"{minimum:g} or more" if unbounded else f"from {minimum:g} to {maximum:g}"
            raise self.invalid(name, span)
        return float(value)

    def integer(self, name: str, minimum: int, maximum: int = 10**9) -> int | None:
        """Return a whole number within a range; 16.0 counts as one."""
        value = self.number(name, minimum, maximum)
        if value is not None and value != int(value):
            raise self.invalid(name, "a whole number")
        return None if value is None else int(value)

    def token_limit(self, name: str, *, zero: bool = False) -> int | None:
        """Return a number of tokens; None for no limit.

        For "no limit" some clients send -1, others 0 (unless `zero` is a valid limit), others a
        very large number.
        """
        value = self.value(name)
        if value == -1 or (not zero and value == 0):
            return None
        if isinstance(value, (int, float)) and _MAX_TOKEN_LIMIT < value <= 2**64:
            return _MAX_TOKEN_LIMIT
        return self.integer(name, 0 if zero else 1)

    def top_k(self) -> int | None:
        """Return how many of the likeliest tokens to choose from; None for all (0 and -1)."""
        return self.token_limit("top_k")

    def sampling_value(self, name: str, maximum: float) -> float | None:
        """Return a number from 0 to `maximum`; None also for -1, which some clients send for
        "not set"."""
        if self.value(name) == -1:
            return None
        return self.number(name, 0, maximum)

    def items(self, name: str) -> list[object] | None:
        """Return an array."""
        value = self.value(name)
        if value is not None and not isinstance(value, list):
            raise self.invalid(name, "an array")
        return value

    def objects(self, name: str) -> list[Fields]:
        """Return an array of objects; empty if absent."""
        items = self.items(name) or []
        if len(items) > _MAX_OBJECTS:
            raise self.invalid(name, f"an array of at most {_MAX_OBJECTS} objects")
        return [Fields(item, f"{self.path_of(name)}[{index}]") for index, item in enumerate(items)]

    def texts(self, name: str) -> tuple[str, ...]:
        """Return the strings of a string or an array of strings; empty if absent."""
        value = self.value(name)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, str) for item in items):
            raise self.invalid(name, "a string or an array of strings")
        return tuple(items)

    def child(self, name: str) -> Fields | None:
        """Return an object."""
        value = self.value(name)
        return None if value is None else Fields(value, self.path_of(name))

    def settings(self, name: str, *, foreign: bool = False) -> Fields:
        """Return an object of settings, empty if absent. Every call returns the same Fields, and
        `ignored_paths` includes its unread fields.

        A `foreign` field belongs to another API: if it is not an object, it is ignored.
        """
        if name not in self._settings:
            value = self.value(name)
            if foreign and not isinstance(value, dict):
                if is_non_default(value):
                    self.mark_ignored(name)
                value = None
            self._settings[name] = Fields({} if value is None else value, self.path_of(name))
        return self._settings[name]

    def one_of(self, name: str, values: tuple[str, ...]) -> str | None:
        """Return one of the given strings; None also for an empty string."""
        value = self.text(name) or None
        if value is not None and value not in values:
            raise self.invalid(name, "one of " + ", ".join(values))
        return value


def text_blocks(text: str) -> list[Block]:
    """Return a text block, or nothing for blank text, which the API rejects."""
    return [{"type": "text", "text": text}] if text.strip() else []


def text_of(blocks: Iterable[Block]) -> str:
    """Return the text of the text blocks, separated by blank lines."""
    return "\n\n".join(str(block["text"]) for block in blocks if block.get("type") == "text")


#: A line that Claude Code, as a client, sends at the head of its system prompt. The claude behind
#: this server would mistake a whole prompt that begins with it for such a line.
_BILLING_HEADER = re.compile(r"\A\s*x-anthropic-billing-header:[^\n]*\n?")


def system_text(blocks: Iterable[Block]) -> str:
    """Return the text of a system prompt's blocks, without billing headers."""
    texts = (_BILLING_HEADER.sub("", block["text"], count=1)
             for block in blocks if block["type"] == "text")
    return "\n\n".join(text for text in texts if text.strip())


def merge_adjacent(messages: Iterable[Message]) -> list[Message]:
    """Join adjacent messages of the same role, and drop empty ones; return the new list.

    For the API this is the same; claude reads each message separately, which takes time.
    """
    result: list[Message] = []
    for message in messages:
        if result and result[-1].role == message.role:
            result[-1].content.extend(message.content)
        elif message.content:
            result.append(Message(message.role, list(message.content)))
    return result


def plain_id(call_id: str) -> str:
    """Return the letters and digits of a tool call's id.

    Ids are sent to clients and compared in this form, because some clients drop the rest.
    """
    return re.sub(r"[^A-Za-z0-9]", "", call_id)


@dataclasses.dataclass
class ToolCall:
    """One tool call of a history, with its results."""

    #: The tool_use block, with an id that is unique in the history.
    block: Block
    message_index: int
    results: list[Block] = dataclasses.field(default_factory=list)


#: A key to find a call by: how the ids are compared, the id in the result, the tool's name or "".
_CallKey = tuple[str, str, str]


class ToolExchanges:
    """Makes the ids of the tool calls of a history unique, and finds the call of each result.

    Clients may repeat an id in every turn or even in one message, may send an empty id, and may
    have dropped punctuation from it. A result therefore belongs to the first call with its id and
    without a result in the newest message that has one; among calls of that message, the tool
    that the result names wins. A result without an id matches calls with any id. If every call
    has its result, it is appended to those of the newest call.

    Calls and results may have two fields that are not the API's and are removed here: a call's
    `item_id`, a second id that results may use, and a result's `name`.
    """

    def __init__(self, context: ParseContext, param: str) -> None:
        self._context = context
        self._param = param
        self._calls: dict[int, list[ToolCall]] = {}
        self._used_ids: set[str] = set()
        #: The number of the last suffix that made an id unique, by id.
        self._numbers: dict[str, int] = {}
        #: Calls without a result by key: one queue for each message with such calls.
        self._waiting: dict[_CallKey, list[collections.deque[ToolCall]]] = {}
        self._newest: dict[_CallKey, ToolCall] = {}

    def add_call(self, block: Block, message_index: int) -> Block:
        """Add a tool_use block; return it with its unique id."""
        unique = {name: value for name, value in block.items() if name != "item_id"}
        call = ToolCall({**unique, "id": self._unique_id(str(block["id"]))}, message_index)
        self._calls.setdefault(message_index, []).append(call)
        ids = self._comparisons(str(block["id"]), any_id=True)
        if block.get("item_id"):
            ids.append(("item", str(block["item_id"])))
        for compared_id, name in itertools.product(ids, ("", str(block["name"]))):
            key = (*compared_id, name)
            queues = self._waiting.setdefault(key, [])
            if not queues or queues[-1][0].message_index != message_index:
                queues.append(collections.deque())
            queues[-1].append(call)
            self._newest[key] = call
        return call.block

    def _unique_id(self, sent_id: str) -> str:
        """Return a unique id that the API accepts: close to the client's, and the same in every
        request that repeats the history up to here."""
        plain = plain_id(sent_id) or "call"
        if len(plain) > _CALL_ID_MAX_CHARS:
            tail = hashlib.sha256(sent_id.encode("utf-8", "replace")).hexdigest()[:16]
            plain = plain[: _CALL_ID_MAX_CHARS - len(tail)] + tail
        unique, number = plain, self._numbers.get(plain, 1)
        while unique in self._used_ids:
            number += 1
            unique = f"{plain}r{number}"
        self._numbers[plain] = number
        self._used_ids.add(unique)
        return unique

    def _comparisons(self, sent_id: str, *, any_id: bool) -> list[tuple[str, str]]:
        """Return the first two parts of the keys for an id, the strictest comparison first."""
        keys = [("sent", sent_id), ("plain", plain_id(sent_id))] if sent_id else []
        return [*keys, ("any", "")] if any_id else keys

    def add_result(self, block: Block, message_index: int) -> None:
        """Add a tool_result block to its call. Raises BadRequest if there is no such call."""
        sent_id = str(block["tool_use_id"])
        ids = [*self._comparisons(sent_id, any_id=not sent_id), ("item", sent_id)]
        call = self._call_for(ids, str(block.get("name") or ""))
        if call is None:
            raise BadRequest(
                f"{self._param}: no tool was called with the id {one_line(sent_id, 80)!r} before "
                "its result.", param=self._param,
            )
        if call.results:
            self._context.adjust("repeated_tool_result")
        elif message_index > call.message_index + 1:
            self._context.adjust("late_tool_result")
        call.results.append(block)

    def _call_for(self, ids: list[tuple[str, str]], name: str) -> ToolCall | None:
        for compared_id in ids:
            for find in (self._first_waiting, self._newest.get):
                call, named = (find((*compared_id, each)) for each in ("", name))
                if call is not None:
                    is_near = named is not None and named.message_index == call.message_index
                    return named if is_near else call
        return None

    def _first_waiting(self, key: _CallKey) -> ToolCall | None:
        queues = self._waiting.get(key, [])
        while queues:
            while queues[-1]:
                if not queues[-1][0].results:
                    return queues[-1][0]
                queues[-1].popleft()
            queues.pop()
        return None

    def results_after(self, message_index: int) -> list[Block]:
        """Return one tool_result for each call of that message, in the order of the calls."""
        return [self._result_of(call) for call in self._calls.get(message_index, ())]

    def _result_of(self, call: ToolCall) -> Block:
        if not call.results:
            self._context.adjust("missing_tool_result")
        content = [block for result in call.results for block in result["content"]]
        joined: Block = {
            "type": "tool_result", "tool_use_id": call.block["id"],
            "content": content if call.results else text_blocks(_NO_RESULT),
        }
        failed = any(result.get("is_error") for result in call.results)
        return {**joined, "is_error": True} if failed else joined


#: Longer ids are shortened: some clients store kilobytes in them. With the number that makes it
#: unique, an id stays below the API's limit of 64.
_CALL_ID_MAX_CHARS = 48
#: The result of a call for which the client sent none.
_NO_RESULT = "No result was given."


def with_paired_results(
    messages: list[Message], context: ParseContext, param: str
) -> list[Message]:
    """Return the messages with exactly one tool result for each call, where the API requires it:
    at the head of the user message after the call, in the order of the calls.

    The roles of `messages` alternate. Raises BadRequest for a result without a call. See
    ToolExchanges for the repairs.
    """
    exchanges = ToolExchanges(context, param)
    rest: list[list[Block]] = []
    for index, message in enumerate(messages):
        rest.append([])
        for block in message.content:
            if block["type"] == "tool_result":
                exchanges.add_result(block, index)
            elif block["type"] == "tool_use":
                rest[-1].append(exchanges.add_call(block, index))
            else:
                rest[-1].append(block)
    return merge_adjacent(
        Message(message.role, exchanges.results_after(index - 1) + rest[index])
        for index, message in enumerate(messages)
    )


#: The field that names a session. The common name `session_id` is avoided: other programs only
#: group requests by it, and the requests of a group must not see each other's messages.
SESSION_FIELD = "ocp_session_id"


def with_session_messages(
    fields: Fields, parsing: ParseEnvironment, system: str, messages: list[Message]
) -> list[Message]:
    """Return the messages of the session that the request names, followed by `messages`.

    A request that already contains assistant messages is returned as it is.
    """
    session_id = fields.text(SESSION_FIELD)
    if session_id and not re.fullmatch(r"[\x20-\x7e]{1,256}", session_id):
        raise fields.invalid(SESSION_FIELD, "up to 256 plain characters")
    if not session_id or any(message.role == "assistant" for message in messages):
        return messages
    return [*parsing.session(session_id, system), *messages]


def with_reminders(messages: list[Message]) -> list[Message]:
    """Return the messages with system messages turned into reminders in user messages.

    They keep their place: moved to the system prompt, they would change the head of the
    conversation, and invalidate the prompt cache, at every step. System messages without a user
    message beside them become plain user messages.
    """
    result: list[Message] = []
    for _, group in itertools.groupby(messages, key=lambda each: each.role == "assistant"):
        neighbours = list(group)
        if all(message.role == "system" for message in neighbours):
            texts = (system_text(message.content) for message in neighbours)
            result += [Message("user", text_blocks(text)) for text in texts]
        else:
            result += _place_reminders(neighbours)
    return result


def _place_reminders(neighbours: list[Message]) -> list[Message]:
    """Return the messages between two answers with each system message turned into a reminder.

    Beside tool results it becomes a part of the last one, as Claude Code does: in the middle of a
    turn claude reads nothing but tool results.
    """
    last_results = max((i for i, each in enumerate(neighbours) if each.has_results), default=-1)
    reminders: dict[int, list[Block]] = {}
    kept: dict[int, Message] = {}
    results_before = -1
    for index, message in enumerate(neighbours):
        if message.role != "system":
            kept[index] = message
            results_before = index if message.content[-1]["type"] == "tool_result" else -1
            continue
        text = system_text(message.content)
        if not text:
            continue
        reminder = {"type": "text", "text": f"<system-reminder>\n{text}\n</system-reminder>"}
        if results_before >= 0:
            reminders.setdefault(results_before, []).append(reminder)
        elif last_results > index:
            reminders.setdefault(last_results, []).append(reminder)
        else:
            kept[index] = Message("user", [reminder])
    return [_with_reminders(each, reminders.get(index, [])) for index, each in kept.items()]


def _with_reminders(message: Message, reminders: list[Block]) -> Message:
    """Return the message with the reminders at the end of its last tool result."""
    if not reminders:
        return message
    content = list(message.content)
    last = max(i for i, block in enumerate(content) if block["type"] == "tool_result")
    content[last] = {**content[last], "content": [*content[last]["content"], *reminders]}
    return Message(message.role, content)


class Prompt(NamedTuple):
    """A system prompt and the messages after it."""

    system: str
    messages: list[Message]
    #: The client's system messages that make up `system`.
    opening: list[Message] = []


#: The user message to add if a conversation ends with an assistant message: to continue it, to
#: process a tool result that arrived late, or to put its content into the required form.
_CONTINUE = "Continue exactly where your last message ends."
_GO_ON = "The result of an earlier tool call is there now; go on with it."
_REFORMAT = "Give the answer of this conversation in the required form."


def build_prompt(
    messages: list[Message], fields: Fields, parsing: ParseEnvironment, context: ParseContext,
    param: str, *, instructions: str = "", after_assistant: str = "",
) -> Prompt:
    """Return the prompt of a request's messages, including system messages.

    `after_assistant` is the user message to add if the last message is the assistant's. If it is
    empty, such a request is refused, unless its tokens are only counted. Raises BadRequest also
    if there is nothing to answer.
    """
    messages = [message for message in messages if message.content]
    opening = list(itertools.takewhile(lambda each: each.role == "system", messages))
    texts = [instructions, *(system_text(message.content) for message in opening)]
    system = "\n\n".join(filter(None, texts))
    later = with_session_messages(fields, parsing, system, with_reminders(messages[len(opening):]))
    if not later and system:
        # The API needs a user message, so instructions alone become one.
        return Prompt("", [Message("user", text_blocks(system))])
    if not later:
        raise BadRequest(f"{param}: there is nothing to answer.", param=param)
    later = _with_user_last(merge_adjacent(later), parsing, context, param, after_assistant)
    later = with_paired_results(later, context, param)
    # All tool results of the last message may have moved up to earlier calls.
    later = _with_user_last(later, parsing, context, param, _GO_ON)
    later = context.attachments.within_bounds(later, param, count_only=parsing.count_only)
    return Prompt(system, later, opening)


def _with_user_last(
    messages: list[Message], parsing: ParseEnvironment, context: ParseContext, param: str,
    after_assistant: str,
) -> list[Message]:
    """Return the messages with a user message at the end. Raises BadRequest if the last one is
    the assistant's and `after_assistant` is empty."""
    if messages[-1].role == "user" or parsing.count_only:
        return messages
    if not after_assistant:
        raise BadRequest(
            f"{param}: the last message must have the role user; prefilling an answer is not "
            "supported.", param=param,
        )
    context.adjust("assistant_last")
    return [*messages, Message("user", text_blocks(after_assistant))]


# ==== 14. Attachments ========================================================
# Images and files of requests become blocks that the API accepts. Their data decides about their
# type. ParseContext collects what one request needs while it is parsed.

#: Image types, and a pattern of their first bytes.
_IMAGE_TYPES = {
    "image/jpeg": rb"\xff\xd8\xff",
    "image/png": rb"\x89PNG",
    "image/gif": rb"GIF8",
    "image/webp": rb"RIFF....WEBP",
}
_PDF = "application/pdf"
#: The header of a PDF may be anywhere within its first bytes.
_PDF_HEAD_BYTES = 1024
#: Byte order marks of encodings other than UTF-8. UTF-32 precedes UTF-16, whose mark it contains.
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
}
#: Encodings that a file may name. Python's others take quadratic time or do not decode text.
_CHARSET = re.compile(
    "charset=[\"']?((?:utf|ascii|us-ascii|latin|iso|windows|cp|gb|big5|euc|shift|koi8|mac)[\\w.-]*)"
)
#: Control characters that only binary data has. Text may contain terminal sequences and the DOS
#: end-of-file mark.
_BINARY = re.compile("[\0-\x06\x0e-\x19\x1c-\x1f]")
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]{0,30}):")
_FROM_URL_ALPHABET = str.maketrans("-_", "+/")


def _exact_base64(data: str) -> bytes | None:
    """Return the bytes of base64 data; None if it is empty or not exactly as it has to be.

    The decoder is fast and skips invalid characters, which shows in the number of bytes.
    """
    try:
        content = binascii.a2b_base64(data)
    except (binascii.Error, ValueError):
        return None
    whole = len(data) % 4 == 0 and len(content) == base64_bytes(data)
    return content if content and whole else None


def base64_bytes(data: str) -> int:
    """Return the decoded size of base64 data that is valid and padded."""
    return len(data) // 4 * 3 - data[-2:].count("=")


def normalized_base64(data: str) -> tuple[str, bytes]:
    """Return base64 data in the form that the API accepts, and its bytes, empty if it is invalid.

    White space, the URL-safe alphabet, percent-encoding and missing padding are accepted.
    """
    content = _exact_base64(data)
    if content is None:
        plain = urllib.parse.unquote(data) if "%" in data else data
        plain = "".join(plain.split()).translate(_FROM_URL_ALPHABET).rstrip("=")
        data = plain + "=" * (-len(plain) % 4)
        content = _exact_base64(data)
    return data, content or b""


def _data_type(content: bytes, sent_type: str) -> str:
    """Return the type of an image or PDF by its first bytes, not by the client's word; else ""."""
    for media_type, first_bytes in _IMAGE_TYPES.items():
        if re.match(first_bytes, content, re.DOTALL):
            return media_type
    head = content[:_PDF_HEAD_BYTES]
    is_pdf = b"%PDF-" in head if sent_type == _PDF else head.lstrip().startswith(b"%PDF-")
    return _PDF if is_pdf else ""


def caption_blocks(labels: Mapping[str, str]) -> list[Block]:
    """Return a client's labels of a file as a text to put before its content."""
    return text_blocks("\n".join(f"{name.title()}: {text}" for name, text in labels.items()))


class Attachment(NamedTuple):
    """An image or a file as a request sends it."""

    #: Base64 data, a data: URI, or an http(s) URL.
    data: str
    #: The path of that field.
    param: str
    #: The type that the client declares.
    media_type: str = ""
    #: The client's title and context.
    labels: Mapping[str, str] = MappingProxyType({})
    #: Whether files other than images and PDF are refused.
    image_only: bool = False


class Attachments:
    """Turns the images and files of one request into blocks, and enforces their limits."""

    def __init__(self, limits: Limits, adjust: Callable[[str], None]) -> None:
        self._limits = limits
        self._adjust = adjust
        #: Every block and the path of its field, by the block's id(). The reference to the block
        #: keeps that id valid.
        self._paths: dict[int, tuple[Block, str]] = {}

    def blocks(self, sent: Attachment) -> list[Block]:
        """Return the blocks of an image or a file, whose data tells its type: an image, a PDF, or
        text, which becomes a text block. Raises BadRequest, Unsupported."""
        match = _SCHEME.match(sent.data)
        scheme = match[1].lower() if match else "data"
        if scheme not in ("data", "http", "https"):
            raise BadRequest(
                f"{sent.param}: must be a data: URI or an http(s) URL.",
                param=sent.param, code="unsupported_url_scheme",
            )
        blocks = self._inline(sent) if scheme == "data" else [self._remote(sent)]
        self._paths.update((id(block), (block, sent.param)) for block in attachments_of(blocks))
        return blocks

    def _remote(self, sent: Attachment) -> Block:
        if not self._limits.image_allow_url:
            raise BadRequest(
                f"{sent.param}: this server does not accept URLs of images and files; send the "
                "data as a data: URI, or have the operator set CLAUDE_IMAGE_ALLOW_URL=1.",
                param=sent.param, code="remote_url_disabled",
            )
        source = {"type": "url", "url": sent.data.strip()}
        if sent.image_only:
            return {"type": "image", "source": source}
        return {"type": "document", "source": source, **sent.labels}

    def _inline(self, sent: Attachment) -> list[Block]:
        head, comma, data = "", ",", sent.data
        if _SCHEME.match(data):
            head, comma, data = data.partition(",")
        declared = (head.partition(":")[2] or sent.media_type).lower().split(";")
        media_type, *parameters = map(str.strip, declared)
        if head and comma and media_type.startswith("text/") and "base64" not in parameters:
            content = urllib.parse.unquote_to_bytes(data)
            return caption_blocks(sent.labels) + self._text(sent, content, media_type, parameters)
        if not comma or (head and "base64" not in parameters):
            raise BadRequest(
                f"{sent.param}: must be a base64 data URI, data:image/png;base64,...",
                param=sent.param, code="invalid_data_uri",
            )
        data, content = normalized_base64(data)
        if not content:
            raise BadRequest(
                f"{sent.param}: the base64 data is invalid or empty.",
                param=sent.param, code="invalid_data_uri",
            )
        actual_type = _data_type(content, media_type)
        source = {"type": "base64", "media_type": actual_type, "data": data}
        if actual_type == _PDF:
            return [{"type": "document", "source": source, **sent.labels}]
        if actual_type:
            return [*caption_blocks(sent.labels), {"type": "image", "source": source}]
        return caption_blocks(sent.labels) + self._text(sent, content, media_type, parameters)

    def _text(
        self, sent: Attachment, content: bytes, media_type: str, parameters: list[str]
    ) -> list[Block]:
        text = None if sent.image_only else self._decoded(content, media_type, parameters)
        if text is None or _BINARY.search(text):
            what = "images must be" if sent.image_only else "files must be text in UTF-8, PDF or"
            is_other = media_type and media_type not in _IMAGE_TYPES
            declared = f", not {one_line(media_type, 60)}" if is_other else ""
            raise BadRequest(
                f"{sent.param}: {what} one of {', '.join(_IMAGE_TYPES)}{declared}; "
                "the data is none of these. Convert it first.",
                param=sent.param,
                code="unsupported_image_type" if sent.image_only else "unsupported_file_type",
            )
        return text_blocks(text)

    def _decoded(self, content: bytes, media_type: str, parameters: list[str]) -> str | None:
        """Return the text of a file, decoded by its byte order mark, its declared charset, UTF-8
        or, for a declared text type, Windows-1252; None if it does not decode."""
        marked = [name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark)]
        declared = [match[1] for match in map(_CHARSET.match, parameters) if match]
        for encoding in marked[:1] or [*declared, "utf-8-sig"]:
            with contextlib.suppress(UnicodeError, LookupError):
                return content.decode(encoding)
        if media_type.startswith("text/") and not marked:
            with contextlib.suppress(UnicodeError):
                text = content.decode("cp1252")
                self._adjust("text_encoding_guessed")
                return text
        return None

    def within_bounds(
        self, messages: list[Message], param: str, *, count_only: bool
    ) -> list[Message]:
        """Return the messages, with the oldest attachments replaced by a text if there are too
        many for a request.

        Raises TooLarge if the last message alone has too many, unless `count_only`.
        """
        maximum = self._limits.max_image_bytes
        sizes = [
            [_size_bytes(block, maximum) for block in attachments_of(message.content)]
            for message in messages
        ]
        if not count_only:
            self._check_newest(messages[-1], sizes[-1], param)
        dropped = surplus_attachments(sizes, self._limits)
        for _ in dropped:
            self._adjust("images_dropped")
        return _without(messages, dropped) if dropped else messages

    def _check_newest(self, message: Message, sizes: list[int | None], param: str) -> None:
        total_bytes = 0
        for number, (block, size_bytes) in enumerate(zip(attachments_of(message.content), sizes)):
            total_bytes += size_bytes or 0
            _, param = self._paths.get(id(block), (block, param))
            if size_bytes is None:
                raise TooLarge(
                    f"{param}: an image may have at most {self._limits.max_image_bytes} bytes.",
                    param=param, code="image_too_large",
                )
            if number >= self._limits.max_images:
                raise TooLarge(
                    f"{param}: a request may have at most {self._limits.max_images} images and "
                    "files.", param=param, code="too_many_images",
                )
            if total_bytes > self._limits.max_image_total_bytes:
                raise TooLarge(
                    f"{param}: the images and files of a request may have at most "
                    f"{self._limits.max_image_total_bytes} bytes in total.",
                    param=param, code="images_too_large",
                )


def _size_bytes(block: Block, max_image_bytes: int) -> int | None:
    """Return the decoded size of an attachment, 0 for a URL; None if an image is too large."""
    size_bytes = base64_bytes(block["source"].get("data") or "")
    too_large = block["type"] == "image" and size_bytes > max_image_bytes
    return None if too_large else size_bytes


def _max_attachments(model: Model) -> int:
    """Return how many images and documents the API accepts in a request."""
    return 100 if model.context_window <= 200_000 else 600


def surplus_attachments(sizes: list[list[int | None]], limits: Limits) -> set[int]:
    """Return the numbers of the attachments to drop, counted from 0 over all messages.

    `sizes` has their bytes, message by message; None is always dropped. Over a limit the oldest
    are dropped until four fifths of it are left, so that the head of a growing conversation, and
    with it the prompt cache, changes only once in many messages. The result for one message
    depends on later messages only through the one that exceeded the limit, whose own attachments
    are dropped last.
    """
    maximum = (limits.max_images, limits.max_image_total_bytes)
    kept: collections.deque[tuple[int, int]] = collections.deque()
    dropped: set[int] = set()
    numbers = itertools.count()
    total_bytes = 0

    def exceeds(fifths: int) -> bool:
        totals = (len(kept), total_bytes)
        return any(total * 5 > bound * fifths for total, bound in zip(totals, maximum))

    for message_sizes in sizes:
        earlier = len(kept)
        for size_bytes, number in zip(message_sizes, numbers):
            if size_bytes is None:
                dropped.add(number)
            else:
                kept.append((number, size_bytes))
                total_bytes += size_bytes
        target_fifths = 4 if exceeds(5) else 5
        while exceeds(target_fifths) and (earlier > 0 or exceeds(5)):
            number, size_bytes = kept.popleft()
            dropped.add(number)
            total_bytes -= size_bytes
            earlier -= 1
    return dropped


def _without(messages: list[Message], dropped: set[int]) -> list[Message]:
    """Return the messages with a text in place of each dropped attachment."""
    numbers = itertools.count()

    def replaced(blocks: Iterable[Block]) -> Iterator[Block]:
        for block in blocks:
            if block["type"] == "tool_result":
                yield {**block, "content": list(replaced(block["content"]))}
            elif block["type"] in _ATTACHMENT_BLOCKS and next(numbers) in dropped:
                yield {"type": "text", "text": f"[An older {block['type']} was left out here.]"}
            else:
                yield block

    return [Message(message.role, list(replaced(message.content))) for message in messages]


class ParseContext:
    """The state of parsing one request: its attachments, and the fields that were ignored and the
    repairs that were made, which the response headers report."""

    def __init__(self, limits: Limits, model: Model) -> None:
        max_images = min(limits.max_images, _max_attachments(model))
        self.attachments = Attachments(limits._replace(max_images=max_images), self.adjust)
        self._ignored: list[str] = []
        self._adjusted: collections.Counter[str] = collections.Counter()

    def ignore(self, *paths: str) -> None:
        """Record the paths of fields that have no effect."""
        self._ignored += paths

    def adjust(self, repair: str, count: int = 1) -> None:
        """Record a repair of the request by its name in docs/api.md."""
        self._adjusted[repair] += count

    @property
    def ignored(self) -> tuple[str, ...]:
        """The paths of ignored fields, in the order of the request."""
        return tuple(self._ignored)

    @property
    def adjusted(self) -> tuple[tuple[str, int], ...]:
        """The repairs and how often each was made."""
        return tuple(self._adjusted.items())


def labels_of(part: Fields, *names: str) -> dict[str, str]:
    """Return the named fields of a document, such as its title, that are not empty."""
    return {name: part.text(name) or "" for name in names if part.text(name)}


def _refuse_stored(source: Fields, name: str) -> NoReturn:
    """Raise Unsupported for a file that is referred to by an id."""
    raise Unsupported(
        f"{source.path_of(name)}: this server stores no files; send the file itself, as base64 "
        "data.", param=source.path_of(name),
    )


def _source_blocks(source: Fields, context: ParseContext, sent: Attachment) -> list[Block]:
    """Return the blocks of an Anthropic `source` object, which completes `sent`."""
    kind = source.text("type") or ("url" if source.has("url") else "base64")
    if kind == "file":
        _refuse_stored(source, "file_id" if source.has("file_id") else "type")
    if kind not in ("base64", "url"):
        raise source.invalid(
            "type", "base64 or url" + ("" if sent.image_only else ", text or content")
        )
    name = "url" if kind == "url" else "data"
    return context.attachments.blocks(sent._replace(
        data=source.required_text(name), param=source.path_of(name),
        media_type=source.text("media_type") or "",
    ))


def image_blocks(part: Fields, context: ParseContext) -> list[Block]:
    """Return the blocks of an image in the format of Anthropic or of MCP."""
    source = part.child("source")
    if source is None and part.has("data"):
        media_type = part.text("mimeType") or part.text("mime_type") or ""
        return context.attachments.blocks(
            Attachment(part.required_text("data"), part.path_of("data"),
                       media_type, image_only=True)
        )
    if source is None:
        raise part.invalid("source", "an object with the image")
    return _source_blocks(source, context, Attachment("", "", image_only=True))


def document_blocks(
    part: Fields, context: ParseContext, read: Callable[[Fields], list[Block]]
) -> list[Block]:
    """Return the blocks of a document in Anthropic's format. `read` returns the blocks of a
    source with the type "content"."""
    source = part.child("source")
    if source is None:
        raise part.invalid("source", "an object with the document")
    labels = labels_of(part, "title", "context")
    if source.text("type") == "text":
        return caption_blocks(labels) + text_blocks(source.text("data") or "")
    if source.text("type") == "content":
        return caption_blocks(labels) + read(source)
    return _source_blocks(source, context, Attachment("", "", labels=labels))


# ==== 15. Tools and options ==================================================
# The tools, output schema and options of a request, in the form that the model's API accepts.


def tool_use_block(part: Fields) -> Block:
    """Return the block of a tool call in Anthropic's format."""
    return {
        "type": "tool_use",
        "id": part.text("id") or "",
        "name": part.required_text("name"),
        "input": arguments_of(part.object.get("input")),
    }


def tool_result_block(part: Fields, content: list[Block]) -> Block:
    """Return the block of a tool result in Anthropic's format, with the parsed content."""
    call_id = part.text("tool_use_id") or ""
    result: Block = {"type": "tool_result", "tool_use_id": call_id, "content": content}
    return {**result, "is_error": True} if part.flag("is_error") else result


#: Fields of a tool that have an effect, or that claude sets itself.
_TOOL_FIELDS = (
    "type", "name", "description", "parameters", "input_schema", "function", "cache_control"
)


def read_tool(entry: Fields, name: str, schema_field: str) -> Tool:
    """Return a client's tool. Raises BadRequest for an invalid schema, because claude would
    silently drop the tool, or all tools."""
    value = entry.value(schema_field)
    with contextlib.suppress(ValueError):
        # Some clients send the schema as its JSON text.
        value = from_json(value) if isinstance(value, str) and value else value
    # PHP encodes an empty object as an empty array.
    schema = Fields({} if value in (None, [], "") else value, entry.path_of(schema_field))
    parsed = schema_for_model(schema.object, schema.path, is_tool=True)
    description = entry.text("description") or ""
    return Tool(name, description, parsed.schema, parsed.wrapped, parsed.renamed)


def unsupported_tool_fields(tools: Iterable[Fields]) -> list[str]:
    """Return the paths of fields of tools that have no effect and are not at their default."""
    return list(dict.fromkeys(
        f"tools[].{name}" for tool in tools for name, value in tool.object.items()
        if name not in _TOOL_FIELDS and is_non_default(value)
    ))


def unique_tools(tools: Iterable[Tool], param: str) -> tuple[Tool, ...]:
    """Return the tools without duplicates. Raises BadRequest if different tools share a name."""
    by_name: dict[str, Tool] = {}
    for tool in tools:
        if by_name.setdefault(tool.name, tool) != tool:
            raise BadRequest(f"{param}: two tools are named {tool.name!r}.", param=param)
    return tuple(by_name.values())


def checked_tool_choice(tools: tuple[Tool, ...], choice: ToolChoice, param: str) -> ToolChoice:
    """Return the choice; without tools, the default one. Raises BadRequest if it requires a tool
    that is not there."""
    if not tools and choice.forces:
        raise BadRequest(f"{param}: there are no tools to call.", param=param)
    if choice.kind == "tool" and choice.name not in [tool.name for tool in tools]:
        raise BadRequest(f"{param}: no tool is named {choice.name!r}.", param=param)
    return choice if tools else ToolChoice()


def read_output_schema(schema: Fields) -> OutputSchema:
    """Return the output schema of a structured answer. Raises BadRequest if it is invalid."""
    return OutputSchema(*schema_for_model(schema.object, schema.path, is_tool=False))


_ANY_OBJECT = OutputSchema({"type": "object", "additionalProperties": True}, wrapped=False)


#: Effort levels, lowest first, and the thinking budget in tokens for models that take a budget
#: instead of a level. "minimal" is OpenAI's name for the lowest.
EFFORT_BUDGETS = {
    "minimal": 1_024,
    "low": 2_048,
    "medium": 8_192,
    "high": 16_384,
    "xhigh": 24_576,
    "max": 31_999,
}
_MIN_BUDGET_TOKENS = 1_024


def nearest_effort(model: Model, level: str) -> str | None:
    """Return the highest level of the model up to `level`, or else its lowest; None if it has no
    levels."""
    order = list(EFFORT_BUDGETS)
    allowed = [each for each in model.efforts if order.index(each) <= order.index(level)]
    return allowed[-1] if allowed else (model.efforts[0] if model.efforts else None)


class Thinking(NamedTuple):
    """A client's wishes for thinking, not yet adapted to the model."""

    #: A level of EFFORT_BUDGETS, "none", or None if not set.
    effort: str | None = None
    #: 0 turns thinking off; None leaves it to the effort.
    budget_tokens: int | None = None
    #: The path of the field with the budget.
    budget_field: str = "thinking.budget_tokens"
    #: Whether thinking is switched on without an effort or budget.
    enabled: bool = False
    #: Whether the answer leaves out the text of the thinking.
    hidden: bool = False

    @property
    def is_requested(self) -> bool:
        """Whether the client requests thinking."""
        return self.effort not in (None, "none") or bool(self.budget_tokens) or self.enabled


class RequestedOptions(NamedTuple):
    """A client's options, not yet adapted to the model."""

    max_tokens: int | None = None
    stop_sequences: tuple[str, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    thinking: Thinking = Thinking()
    #: Whether a tool call is forced: the API rejects that together with thinking.
    forces_tool: bool = False


#: The effort if a client requests thinking without an effort or budget.
_DEFAULT_EFFORT = "medium"


def _thinking_tokens(model: Model, requested: RequestedOptions) -> int | None:
    """Return the value for Options.thinking_tokens, unless sampling options rule thinking out."""
    effort, budget = requested.thinking.effort, requested.thinking.budget_tokens
    if requested.forces_tool or effort == "none" or budget == 0 or requested.max_tokens == 0:
        return 0
    if not model.known and (requested.max_tokens or math.inf) < 2 * _MIN_BUDGET_TOKENS:
        # An unknown model may take a budget, which would not fit.
        return 0
    if model.thinking == "adaptive":
        return None
    maximum = requested.max_tokens or model.max_tokens
    if budget is not None and _MIN_BUDGET_TOKENS <= budget < maximum:
        return budget
    if budget is None and effort is None and not requested.thinking.enabled:
        return None if model.reasoning else 0
    if budget is None:
        budget = EFFORT_BUDGETS[effort or _DEFAULT_EFFORT]
    # Half is left for the answer.
    budget = min(max(budget, _MIN_BUDGET_TOKENS), maximum // 2)
    return budget if budget >= _MIN_BUDGET_TOKENS else 0


#: The lowest top_p that the API accepts together with thinking.
_MIN_TOP_P_WITH_THINKING = 0.95


def options_for(model: Model, requested: RequestedOptions) -> tuple[Options, tuple[str, ...]]:
    """Return the options that the model's API accepts, and the parameters that are ignored.

    The API rejects thinking together with a temperature other than 1 or a low top_p, and a
    temperature together with top_p; without thinking claude always sends a temperature. The
    API's maximum temperature is 1, OpenAI's is 2. An effort or a budget takes precedence over
    sampling; a temperature alone turns thinking off.
    """
    values = {
        "temperature": requested.temperature, "top_p": requested.top_p, "top_k": requested.top_k
    }
    # Both temperature and top_p default to 1; sent explicitly, one would rule out the other.
    changed = {n: v for n, v in values.items() if v is not None and (v != 1 or n == "top_k")}
    sampling = {n: v for n, v in changed.items() if n == "top_k" or (n == "temperature" and v < 1)}
    thinking = _thinking_tokens(model, requested)
    if not model.sampling or (requested.thinking.is_requested and thinking != 0):
        sampling = {}
    if sampling:
        thinking = 0
    if model.sampling and thinking != 0 and changed.get("top_p", 0) >= _MIN_TOP_P_WITH_THINKING:
        sampling["top_p"] = changed["top_p"]
    ignored = [name for name in changed if name not in sampling]
    budget = requested.thinking.budget_tokens
    if budget and thinking != budget:
        ignored.append(requested.thinking.budget_field)
    effort = requested.thinking.effort
    options = Options(
        max_tokens=requested.max_tokens,
        stop_sequences=requested.stop_sequences,
        sampling=tuple(sorted(sampling.items())),
        effort=None if effort in (None, "none") else nearest_effort(model, str(effort)),
        thinking_tokens=thinking,
        hides_thinking=requested.thinking.hidden,
    )
    return options, tuple(ignored)


_MAX_STOP_SEQUENCES = 256


def stop_sequences(fields: Fields, *names: str) -> tuple[str, ...]:
    """Return the distinct stop sequences of a request. Raises BadRequest for too many, because
    each one is searched for in every piece of the answer."""
    texts = [text for name in names for text in fields.texts(name) if text]
    distinct = tuple(dict.fromkeys(texts))
    if len(distinct) > _MAX_STOP_SEQUENCES:
        raise fields.invalid(names[0], f"at most {_MAX_STOP_SEQUENCES} texts")
    return distinct


_EFFORT_LEVELS = ("none", *EFFORT_BUDGETS)


def _effort(fields: Fields, name: str) -> str | None:
    """Return an effort level, ignoring case; None if it is left to the model."""
    level = (fields.text(name) or "").strip().lower()
    if level in ("", "auto", "default"):
        return None
    if level not in _EFFORT_LEVELS:
        raise fields.invalid(name, "one of " + ", ".join(_EFFORT_LEVELS))
    return level


#: Values of Anthropic's `thinking.type`, also in APIs that copy it, and whether they request it.
_THINKING_TYPES = {
    "enabled": True, "adaptive": True, "auto": True, "disabled": False, "between_tools": False,
}


def openai_thinking(fields: Fields) -> Thinking:
    """Return the thinking that an OpenAI client requests, from OpenAI's own fields, OpenRouter's
    `reasoning`, or Anthropic's `thinking` and `output_config`."""
    reasoning, thinking, output = (
        fields.settings(name, foreign=True) for name in ("reasoning", "thinking", "output_config")
    )
    efforts = [
        _effort(fields, "reasoning_effort"), _effort(reasoning, "effort"), _effort(output, "effort")
    ]
    kind = (thinking.text("type") or "").lower()
    if kind not in ("", *_THINKING_TYPES):
        thinking.mark_ignored("type")
    switches = [
        each.flag("enabled") if each.has("enabled") else None for each in (reasoning, thinking)
    ]
    switches.append(_THINKING_TYPES.get(kind))
    off = False in switches
    budgets = {
        each.path_of(name): each.token_limit(name)
        for each, name in ((reasoning, "max_tokens"), (thinking, "budget_tokens"))
    }
    field, budget = next(
        ((field, budget) for field, budget in budgets.items() if budget), ("", None)
    )
    # Mark it as read: Responses request a summary with it, and chat always shows the thinking.
    reasoning.value("summary")
    hidden = [reasoning.flag("exclude"), thinking.text("display") == "omitted"]
    return Thinking(
        effort=next((each for each in efforts if each), "none" if off else None),
        budget_tokens=budget,
        budget_field=field,
        enabled=not off and True in switches,
        hidden=any(hidden),
    )


def wants_cache_bypass(body: object, *, sampled_too: bool) -> bool:
    """Return whether a request must not be answered from the cache.

    True with `cache_control` anywhere, which shows that the client manages the API's cache, and,
    unless `sampled_too`, with a temperature above 0.
    """
    if not isinstance(body, dict):
        return False
    temperature = body.get("temperature")
    if not sampled_too and isinstance(temperature, (int, float)) and temperature > 0:
        return True
    pending: list[object] = [body]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if "cache_control" in value:
                return True
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return False


# ==== 16. Dialects ===========================================================
# Wire formats. A dialect parses a body into a Turn and renders Events; it does no input or
# output, and does not depend on claude.


class Dialect:
    """A wire format: parses request bodies and renders answers. Error bodies here are OpenAI's."""

    #: The name in logs and metrics.
    name = ""

    def parse(self, body: object, parsing: ParseEnvironment) -> Turn:
        """Return the Turn of a JSON body. Raise BadRequest, UnknownModel or TooLarge."""
        raise NotImplementedError

    def answer_body(self, turn: Turn, answers: list[Answer]) -> Json:
        """Return the body of an unstreamed answer; one Answer for each of `turn.choices`."""
        raise NotImplementedError

    def renderer(self, turn: Turn) -> Renderer:
        """Return the renderer of a streamed answer."""
        raise NotImplementedError

    def stores(self, turn: Turn) -> bool:
        """Return True if the client can refer to the answer later by its id."""
        return False

    def stored_system_messages(self, turn: Turn) -> list[Message]:
        """Return the system messages to store with the conversation of a stored answer."""
        return []

    def error_body(self, error: OcpError, request_id: str) -> Json:
        """Return the body of a failed request."""
        return {
            "error": {
                "message": error.message,
                "type": error.openai_type,
                "param": error.param,
                "code": error.error_code,
                **error.details,
            }
        }


class Renderer:
    """The rendering of one streamed answer, event by event. Methods return the bytes to send.

    Subclasses implement `_render`, and `_opening` and `end` if the stream has such frames.
    """

    def __init__(self, dialect: Dialect, turn: Turn) -> None:
        self._dialect = dialect
        self._turn = turn
        self._began = False
        #: The choices whose answer the client has begun to receive. Subclasses add to it.
        #: Thinking does not count: it may be repeated.
        self._answered: set[int] = set()
        self._usages: list[Usage] = []
        #: The complete answer, after its last event, in dialects that store it.
        self.body: Json = {}

    def event(self, index: int, event: Event) -> bytes:
        """Return the frames of one event of choice `index`; never called with a Tick.

        Return nothing before the first content: an error before it can still have its own HTTP
        status. Raise UpstreamFailed if claude starts the answer again after content was sent,
        because sent content cannot be taken back.
        """
        if isinstance(event, Restarted) and index in self._answered:
            raise UpstreamFailed("The connection to the API broke in the middle of the answer.")
        if isinstance(event, Finished):
            self._usages.append(event.usage)
        return self._render(index, event)

    def _render(self, index: int, event: Event) -> bytes:
        raise NotImplementedError

    def _begin(self) -> bytes:
        """Return the opening frames at the first call, nothing at later calls."""
        opening = b"" if self._began else self._opening()
        self._began = True
        return opening

    def _opening(self) -> bytes:
        """Return the first frames of the stream, which come with the first content."""
        return b""

    def keepalive(self) -> bytes:
        """Return a frame that clients skip, sent while there is nothing else to send."""
        return b": keepalive\n\n"

    def end(self) -> bytes:
        """Return the last frames of a complete answer."""
        return b""

    def failure(self, error: OcpError, request_id: str) -> bytes:
        """Return the last frame of a failed answer. No finish reason and no [DONE] follow it."""
        return sse_event(self._dialect.error_body(error, request_id))


_LINE_ENDS = ("\u2028", "\u2029", "\x85")


def sse_event(data: Json, name: str = "") -> bytes:
    """Return one server-sent event."""
    head = f"event: {name}\n".encode("ascii") if name else b""
    text = to_json(data)
    for character in _LINE_ENDS:
        # Some clients split the stream at every Unicode line end, even inside the JSON.
        text = text.replace(character.encode("utf-8"), b"\\u%04x" % ord(character))
    return head + b"data: " + text + b"\n\n"


#: OpenAI's finish reason for each stop reason of the API. Clients loop on unknown reasons.
FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
}


def openai_usage(usages: Iterable[Usage], *, one_prompt: bool = True) -> Json:
    """Return the usage object of chat and legacy completions, from the usage of each choice.

    With `one_prompt` all choices answer the same prompt, whose tokens are counted once.
    """
    choices = list(usages)
    prompts = [usage.prompt_tokens for usage in choices]
    prompt_tokens = max(prompts) if one_prompt else sum(prompts)
    output_tokens = sum(usage.output_tokens for usage in choices)
    body: Json = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": max(u.cache_read_tokens for u in choices)},
    }
    reasoning = [usage.reasoning_tokens for usage in choices if usage.reasoning_tokens is not None]
    if reasoning:
        body["completion_tokens_details"] = {"reasoning_tokens": sum(reasoning)}
    return body


def requested_options(
    fields: Fields, max_tokens: int | None, stop_fields: tuple[str, ...], thinking: Thinking,
    *, max_temperature: int = 2, forces_tool: bool = False,
) -> RequestedOptions:
    """Return the options of a request. The sampling fields have the same names in every API."""
    return RequestedOptions(
        max_tokens=max_tokens,
        stop_sequences=stop_sequences(fields, *stop_fields),
        temperature=fields.sampling_value("temperature", max_temperature),
        top_p=fields.sampling_value("top_p", 1),
        top_k=fields.top_k(),
        thinking=thinking,
        forces_tool=forces_tool,
    )


def refuse_parameters(fields: Fields, reasons: Mapping[str, str]) -> None:
    """Raise Unsupported for the first field of `reasons` that requests something."""
    for name, reason in reasons.items():
        if is_non_default(fields.value(name)):
            raise Unsupported(f"{name}: {reason}.", param=name)


def json_text(value: object) -> str:
    """Return the JSON of a value as text."""
    return to_json(value).decode("utf-8")


def uses_functions(fields: Fields) -> bool:
    """Return True for a chat request with `functions`, the form that preceded `tools`."""
    return bool(fields.value("functions")) and not fields.value("tools")


def _object_schema(required: tuple[str, ...], **properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(required)}


_STRING: Json = {"type": "string"}
_STRINGS: Json = {"type": "array", "items": {"type": "string"}}
_INTEGER: Json = {"type": "integer"}

#: Tools that OpenAI defines and the client runs, by the type in the request.
CLIENT_TOOLS = {
    tool.name: tool
    for tool in (
        Tool(
            "local_shell",
            "Runs a command on the user's computer and returns its output.",
            _object_schema(
                ("command",),
                command={**_STRINGS, "description": "The program and its arguments."},
                working_directory=_STRING, timeout_ms=_INTEGER,
                env={"type": "object", "additionalProperties": _STRING},
            ),
        ),
        Tool(
            "shell",
            "Runs shell commands on the user's computer and returns the output of each.",
            _object_schema(
                ("commands",), commands=_STRINGS, timeout_ms=_INTEGER, max_output_length=_INTEGER
            ),
        ),
        Tool(
            "apply_patch",
            "Creates, updates or deletes one file. The diff of update_file has sections that "
            "begin with a line @@ and hold lines that begin with a space (context), - (removed) "
            "or + (added), without line numbers and without names of files. In the diff of "
            "create_file every line begins with +. delete_file has no diff.",
            _object_schema(
                ("type", "path"),
                type={"type": "string", "enum": ["create_file", "update_file", "delete_file"]},
                path=_STRING, diff=_STRING,
            ),
        ),
    )
}


def _tool_name(entry: Fields) -> str:
    """Return the tool's name in an entry of a tool choice; tools without a name have their type."""
    if entry.text("type") in CLIENT_TOOLS:
        return str(entry.text("type"))
    named = entry.child("function") or entry.child("custom") or entry
    return qualified_name(entry.text("namespace") or "", named.required_text("name"))


def qualified_name(space: str, name: str) -> str:
    """Return a tool's name for the model; `space` is its namespace, empty if it has none."""
    return f"{space.rstrip('_')}__{name}" if space else name


def only_allowed(
    tools: tuple[Tool, ...], allowed: Mapping[str, str] | None, context: ParseContext
) -> tuple[Tool, ...]:
    """Return the tools whose names are in `allowed`, all of them if it is None.

    `allowed` maps names to their paths in the request. An unknown name is ignored; raise
    BadRequest if all names are unknown.
    """
    if allowed is None:
        return tools
    kept = tuple(tool for tool in tools if tool.name in allowed)
    known = {tool.name for tool in kept}
    unknown = {name: path for name, path in allowed.items() if name not in known}
    if unknown and not kept:
        name, path = next(iter(unknown.items()))
        raise BadRequest(f"{path}: no tool is called {one_line(name, 80)!r}.", param=path)
    context.ignore(*unknown.values())
    return kept


def openai_tool_choice(fields: Fields, field: str) -> tuple[ToolChoice, dict[str, str] | None]:
    """Return the tool choice of an OpenAI request, and the names of the allowed tools with their
    paths in the request, None if all tools are allowed."""
    # The answer format of `functions` has room for one call only.
    one_only = fields.has("parallel_tool_calls") and not fields.flag("parallel_tool_calls")
    parallel = not one_only and not uses_functions(fields)
    value = fields.value(field)
    if value is None or isinstance(value, str):
        word = fields.one_of(field, ("auto", "none", "required", "any"))
        kinds = {None: "auto", "required": "any"}
        return ToolChoice(kinds.get(word, str(word)), parallel=parallel), None
    entry = Fields(value, field)
    parallel = parallel and not entry.flag("disable_parallel_tool_use")
    kind = entry.text("type")
    if kind in ("auto", "any", "none"):
        # Anthropic's form.
        return ToolChoice(kind, parallel=parallel), None
    if kind == "allowed_tools":
        allowed = entry.child("allowed_tools") or entry
        mode = allowed.one_of("mode", ("auto", "required")) or "auto"
        served = (None, "function", "custom", *CLIENT_TOOLS)
        tools = [tool for tool in allowed.objects("tools") if tool.text("type") in served]
        names = {_tool_name(tool): tool.path for tool in tools}
        return ToolChoice("any" if mode == "required" else "auto", parallel=parallel), names
    named_kinds = (None, "function", "tool", "custom", *CLIENT_TOOLS)
    if not entry.has("name") and kind not in named_kinds:
        # A tool that OpenAI runs.
        fields.mark_ignored(field)
        return ToolChoice(parallel=parallel), None
    return ToolChoice("tool", _tool_name(entry), parallel=parallel), None


#: The schema of a custom tool for claude: one field that holds the whole input as text.
_FREEFORM_SCHEMA: Json = {
    "type": "object",
    "properties": {
        "input": {
            "type": "string",
            "description": "The whole input of the tool as plain text, just as it wants it.",
        },
    },
    "required": ["input"],
    "additionalProperties": False,
}
#: The grammar syntaxes of custom tools, and their names in the tool's description.
_GRAMMARS = {"lark": "Lark grammar", "regex": "regular expression"}


def freeform_tool(entry: Fields, name: str) -> Tool:
    """Return the Tool for a custom tool, with one field for its input text.

    A grammar becomes part of the description. Raise BadRequest for an unknown format.
    """
    description = [entry.text("description") or ""]
    form = entry.child("format") or Fields({})
    if form.one_of("type", ("text", "grammar")) == "grammar":
        # Chat nests it one level deeper than responses.
        grammar = form.child("grammar") or form
        syntax = grammar.one_of("syntax", tuple(_GRAMMARS))
        if syntax is None:
            raise grammar.invalid("syntax", "one of " + ", ".join(_GRAMMARS))
        definition = grammar.required_text("definition")
        description.append(f"The input must match this {_GRAMMARS[syntax]}:\n\n{definition}")
    return Tool(name, "\n\n".join(filter(None, description)), _FREEFORM_SCHEMA)


#: The JSON before the input text in the arguments of a custom tool, and the same without white
#: space.
_FREEFORM_HEAD = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_FREEFORM_HEAD_PLAIN = '{"input":"'
#: The longest start of a JSON string that later pieces cannot change: it ends with a complete
#: escape. The first half of a surrogate pair counts only with its second half, or when something
#: else follows it.
_COMPLETE_TEXT = re.compile(
    r"""(?: [^"\\]+ | \\[^u] | \\u(?![dD][89abAB])[0-9a-fA-F]{4}
      | \\u[dD][89abAB][0-9a-fA-F]{2}
        (?: \\u[dD][c-fC-F][0-9a-fA-F]{2} | (?= [^\\] | \\[^u] | \\u[^dD] | \\u[dD][^c-fC-F] ) )
    )*""",
    re.VERBOSE,
)


class FreeformReader:
    """An incremental reader of a custom tool's input text.

    The model writes the call as JSON arguments {"input": "..."}, which arrive in pieces. `feed`
    returns the text as soon as it is certain. States:

    head  before the text: the pieces do not yet complete {"input":"
    text  inside the JSON string
    end   after its closing quote: the rest is discarded
    raw   the arguments have another form: they are returned unchanged
    """

    def __init__(self) -> None:
        self._state = "head"
        self._buffer = ""

    def feed(self, piece: str) -> str:
        """Return the text that this piece completes."""
        self._buffer += piece
        if self._state == "head":
            self._read_head()
        if self._state == "raw":
            text, self._buffer = self._buffer, ""
            return text
        return self._read_text() if self._state == "text" else ""

    def close(self) -> str:
        """Return the rest of the text. Arguments without a text, {}, are an empty text."""
        is_empty = re.sub(r"\s", "", self._buffer) == "{}"
        return "" if self._state != "head" or is_empty else self._buffer

    def _read_head(self) -> None:
        head = _FREEFORM_HEAD.match(self._buffer)
        plain = re.sub(r"\s", "", self._buffer)
        if head:
            self._state, self._buffer = "text", self._buffer[head.end():]
        elif plain != "{}" and not _FREEFORM_HEAD_PLAIN.startswith(plain):
            self._state = "raw"
        else:
            # The buffer is matched again with each piece: keep it short however much white
            # space arrives.
            self._buffer = re.sub(r"(\s)\s+", r"\1", self._buffer)

    def _read_text(self) -> str:
        complete = _COMPLETE_TEXT.match(self._buffer)
        text = complete.group() if complete else ""
        self._buffer = self._buffer[len(text):]
        if self._buffer.startswith('"'):
            self._state = "end"
        try:
            return str(json.loads(f'"{text}"', strict=False))
        except ValueError:
            # It has an escape that is not JSON.
            return text


def freeform_text(arguments: Json) -> str:
    """Return the input text of a custom tool's call; arguments of another form as JSON text."""
    if set(arguments) == {"arguments"} and isinstance(arguments["arguments"], str):
        # The arguments were not JSON: see arguments_of.
        return arguments["arguments"]
    reader = FreeformReader()
    return reader.feed(json_text(arguments)) + reader.close()


def openai_content(
    entry: Fields, context: ParseContext, role: str, name: str = "content"
) -> list[Block]:
    """Return the blocks of the content of a message or of a tool's output.

    `role` is "system", "user", "assistant" or "tool". Parts that no model can read are recorded
    as ignored. Raise BadRequest if that leaves nothing of a user's message.
    """
    content = entry.value(name)
    if content is None:
        return []
    if isinstance(content, str):
        return text_blocks(content)
    if role == "tool" and not _has_content_parts(content):
        # Some frameworks send the return value of a function unchanged.
        return json_block(content)
    if isinstance(content, dict) and "type" in content:
        return _openai_part(Fields(content, entry.path_of(name)), context, role)
    if not isinstance(content, list):
        raise entry.invalid(name, "a string or an array of parts")
    parts: list[Fields] = []
    blocks: list[Block] = []
    for index, each in enumerate(content):
        if isinstance(each, str):
            blocks += text_blocks(each)
        elif role == "tool" and not is_content_part(each):
            blocks += json_block(each)
        else:
            parts.append(Fields(each, f"{entry.path_of(name)}[{index}]"))
            blocks += _openai_part(parts[-1], context, role)
    if role == "user" and not blocks:
        refuse_unreadable(parts, _READABLE_PARTS)
    return blocks


def json_block(value: object) -> list[Block]:
    """Return a text block with the JSON of a value."""
    return text_blocks(json_text(value))


def refuse_unreadable(parts: list[Fields], readable: Iterable[str]) -> None:
    """Raise BadRequest for the first part whose type is not in `readable`.

    Call it for a user's message with no other content: if the message were dropped, the model
    would answer an earlier one.
    """
    for part in parts:
        if part.text("type") not in (None, *readable):
            raise part.invalid("type", "a type that a model can read: text, an image or a file")


def _has_content_parts(content: object) -> bool:
    """Return True if a tool's output is a content part or an array with parts, not plain data."""
    entries = content if isinstance(content, list) else [content]
    return not entries or any(is_content_part(entry) for entry in entries)


def is_content_part(value: object) -> bool:
    """Return True if `value` has the type of a content part and a field of that type.

    Tools also return plain data with a `type`.
    """
    if not isinstance(value, dict):
        return False
    fields = _PART_FIELDS.get(str(value.get("type")), {})
    return any(isinstance(value.get(name), kinds) for name, kinds in fields.items())


_TEXT_PARTS = ("text", "input_text", "output_text", "summary_text", "reasoning_text")
#: Parts that hold an image or a file. Some clients send Anthropic's blocks, tools and system
#: prompt to any model with "claude" in its name.
_ATTACHMENT_PARTS = ("image", "image_url", "input_image", "document", "file", "input_file")
_THINKING_PARTS = ("thinking", "redacted_thinking", "reasoning")
_READABLE_PARTS = (*_TEXT_PARTS, *_ATTACHMENT_PARTS, *_THINKING_PARTS, "refusal", "tool_result")
_AUDIO_PARTS = ("input_audio", "audio", "input_video", "video_url")
_IMAGE_FIELDS: dict[str, tuple[type, ...]] = {"image_url": (str, dict), "file_id": (str,)}
_FILE_FIELDS: dict[str, tuple[type, ...]] = {
    "file": (dict,), "file_data": (str,), "file_url": (str,), "file_id": (str,)
}
#: Parts in a tool's output: a part has at least one of these fields, with a value of these types.
_PART_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    **{kind: {"text": (str,)} for kind in _TEXT_PARTS},
    **{kind: {kind: (dict,), "data": (str,)} for kind in _AUDIO_PARTS},
    "refusal": {"refusal": (str,)},
    "image": {"source": (dict,), "data": (str,)},
    "document": {"source": (dict,)},
    "image_url": _IMAGE_FIELDS, "input_image": _IMAGE_FIELDS,
    "file": _FILE_FIELDS, "input_file": _FILE_FIELDS,
}


def _openai_part(part: Fields, context: ParseContext, role: str) -> list[Block]:
    kind = part.text("type")
    if kind in _TEXT_PARTS or (kind is None and part.has("text")):
        text = part.text("text")
        if text is None:
            raise part.invalid("text", "a string")
        return text_blocks(text)
    if kind == "refusal":
        return text_blocks(part.text("refusal") or "")
    if kind in _ATTACHMENT_PARTS and role in ("user", "tool"):
        return _openai_attachment(part, context)
    if kind in _ATTACHMENT_PARTS and role == "system":
        raise BadRequest(
            f"{part.path}: images and files belong in user messages.",
            param=part.path, code="images_unsupported_in_system_messages",
        )
    if kind == "tool_use" and role == "assistant":
        return [tool_use_block(part)]
    if kind == "tool_result" and role == "user":
        return [tool_result_block(part, openai_content(part, context, "tool"))]
    if kind in _AUDIO_PARTS and role == "user":
        raise Unsupported(
            f"{part.path}: {kind} is not supported; send its content as text.",
            param=part.path_of("type"),
        )
    if kind is None or kind in ("tool_use", "tool_result"):
        raise part.invalid("type", "text, image_url or file")
    if kind not in _THINKING_PARTS:
        context.ignore(part.path)
    return []


def _openai_attachment(part: Fields, context: ParseContext) -> list[Block]:
    kind = part.text("type")
    if kind == "image":
        return image_blocks(part, context)
    if kind == "document":
        return document_blocks(
            part, context, lambda source: openai_content(source, context, "tool")
        )
    if kind in ("image_url", "input_image"):
        return _openai_image(part, context)
    file = part.child("file") or part
    title = file.text("filename")
    labels = {"title": title} if title else {}
    for name in ("file_data", "file_url"):
        if file.has(name):
            sent = Attachment(file.required_text(name), file.path_of(name), labels=labels)
            return context.attachments.blocks(sent)
    _refuse_stored(file, "file_id" if file.has("file_id") else "file_data")


def _openai_image(part: Fields, context: ParseContext) -> list[Block]:
    value = part.object.get("image_url")
    entry = Fields(value, part.path_of("image_url")) if isinstance(value, dict) else None
    url = entry.text("url") if entry is not None else value
    if not url and part.has("file_id"):
        _refuse_stored(part, "file_id")
    if not isinstance(url, str) or not url:
        raise BadRequest(
            f"{part.path_of('image_url')}: must hold the address of an image.",
            param=part.path_of("image_url"), code="invalid_image_url",
        )
    return context.attachments.blocks(Attachment(url, part.path_of("image_url"), image_only=True))


_NO_LOG_PROBABILITIES = "log probabilities are not supported"
#: Unsupported parameters that would change the meaning of the answer, each with the reason.
_UNSUPPORTED_CHAT_PARAMETERS = {
    "logprobs": _NO_LOG_PROBABILITIES,
    "top_logprobs": _NO_LOG_PROBABILITIES,
    "audio": "audio output is not supported",
}

#: The largest `n` of a request.
MAX_CHOICES = 8
#: The largest number of answers to one legacy completions request.
MAX_PROMPTS = 128


def schema_of_format(entry: Fields | None, schema_field: str = "schema") -> OutputSchema | None:
    """Return the schema of an answer's format, as any of the APIs writes it; None for plain text.

    Raise BadRequest, with the path of `schema_field`, if the schema is missing.
    """
    if entry is None:
        return None
    kind = entry.one_of("type", ("text", "json_object", "json_schema"))
    schema = (entry.child("json_schema") or entry).child("schema")
    if kind == "text" or (kind is None and schema is None):
        return None
    if schema is None and kind == "json_object":
        return _ANY_OBJECT
    if schema is None:
        raise entry.invalid(schema_field, "a JSON schema")
    return read_output_schema(schema)


def chat_output_schema(fields: Fields) -> OutputSchema | None:
    """Return the schema in `response_format`, or else in Anthropic's `output_config`."""
    own = schema_of_format(fields.child("response_format"), "json_schema.schema")
    output = fields.settings("output_config", foreign=True)
    return own or schema_of_format(output.child("format"))


#: Fields of a message, besides `content`, that hold media.
_MEDIA_FIELDS = ("images", "audio", "videos", "files", "attachments")


def completion_head(fields: Fields, prefix: str, name: str) -> Json:
    """Return the fields that all chunks of a completion repeat, and `include_usage`."""
    stream_options = fields.child("stream_options") or Fields({})
    return {
        "id": new_id(prefix),
        "created": int(time.time()),
        "model": name,
        "include_usage": stream_options.flag("include_usage"),
    }


class ChatDialect(Dialect):
    """POST /v1/chat/completions."""

    name = "chat"

    # -- parsing ------------------------------------------------------------------------------

    def parse(self, body: object, parsing: ParseEnvironment) -> Turn:
        fields = Fields(body)
        name, model = parsing.model(fields)
        refuse_parameters(fields, _UNSUPPORTED_CHAT_PARAMETERS)
        if any(item != "text" for item in fields.items("modalities") or []):
            raise Unsupported("modalities: answers are text only.", param="modalities")
        head = completion_head(fields, "chatcmpl-", name)
        context = ParseContext(parsing.limits, model)
        tools, choice, custom = self._tools(fields, context)
        output_schema = chat_output_schema(fields)
        prompt = build_prompt(
            self._messages(fields, context), fields, parsing, context, "messages",
            after_assistant=_REFORMAT if output_schema else _CONTINUE,
        )
        options, ignored = options_for(model, self._requested_options(fields, choice))
        return Turn(
            model=model,
            system=prompt.system,
            messages=prompt.messages,
            options=options,
            tools=tools,
            tool_choice=choice,
            output_schema=output_schema,
            choices=fields.integer("n", 1, MAX_CHOICES) or 1,
            session_id=fields.text(SESSION_FIELD) or "",
            stream=fields.flag("stream"),
            ignored=(*ignored, *context.ignored, *fields.ignored_paths()),
            adjusted=context.adjusted,
            wire={**head, "legacy_functions": uses_functions(fields), "custom": custom},
        )

    def _requested_options(self, fields: Fields, choice: ToolChoice) -> RequestedOptions:
        names = ("max_completion_tokens", "max_tokens", "max_output_tokens")
        limits = [fields.token_limit(name) for name in names]
        return requested_options(
            fields, next(filter(None, limits), None), ("stop", "stop_sequences"),
            openai_thinking(fields), forces_tool=choice.forces,
        )

    def _tools(
        self, fields: Fields, context: ParseContext
    ) -> tuple[tuple[Tool, ...], ToolChoice, frozenset[str]]:
        """Return the tools, the tool choice, and the names of the custom tools."""
        tools: list[Tool] = []
        served: list[Fields] = []
        custom: set[str] = set()
        for entry in fields.objects("tools"):
            freeform = entry.child("custom")
            definition = entry.child("function") or entry
            # Cursor sends Anthropic's form: type "custom" with a schema in `input_schema`.
            schema = "input_schema" if entry.has("input_schema") else "parameters"
            if entry.text("type") == "custom" and schema == "parameters":
                freeform = freeform or entry
                tools.append(freeform_tool(freeform, freeform.required_text("name")))
                custom.add(tools[-1].name)
            elif entry.text("type") not in (None, "function") and schema == "parameters":
                context.ignore(entry.path)
            elif definition is entry and not entry.has("name"):
                raise entry.invalid("function", "an object")
            else:
                tools.append(read_tool(definition, definition.required_text("name"), schema))
                served += [entry] if definition is entry else [entry, definition]
        for entry in fields.objects("functions"):
            tools.append(read_tool(entry, entry.required_text("name"), "parameters"))
        field = "tool_choice" if fields.has("tool_choice") else "function_call"
        choice, allowed = openai_tool_choice(fields, field)
        usable = only_allowed(unique_tools(tools, "tools"), allowed, context)
        context.ignore(*unsupported_tool_fields(served))
        return usable, checked_tool_choice(usable, choice, "tool_choice"), frozenset(custom)

    def _messages(self, fields: Fields, context: ParseContext) -> list[Message]:
        entries = fields.objects("messages")
        if not entries:
            raise fields.invalid("messages", "an array with at least one message")
        messages = [Message("system", openai_content(fields, context, "system", "system"))]
        for entry in entries:
            messages.append(self._parse_message(entry, context))
            context.ignore(*entry.ignored_paths(entry.object.keys() - set(_MEDIA_FIELDS)))
        return messages

    def _parse_message(self, entry: Fields, context: ParseContext) -> Message:
        role = entry.text("role")
        if role in ("system", "developer"):
            return Message("system", openai_content(entry, context, "system"))
        if role == "user":
            content = openai_content(entry, context, "user")
            return Message("user", content + self._image_blocks(entry, context))
        if role == "assistant":
            content = openai_content(entry, context, "assistant")
            content += text_blocks(entry.text("refusal") or "")
            return Message("assistant", content + self._call_blocks(entry, content))
        if role not in ("tool", "function"):
            raise entry.invalid("role", "system, developer, user, assistant or tool")
        result: Block = {
            "type": "tool_result",
            # The result of a function has no id: it belongs to the call before it.
            "tool_use_id": entry.text("tool_call_id") or "",
            "content": openai_content(entry, context, "tool"),
            "name": entry.text("name"),
        }
        return Message("user", [result])

    def _image_blocks(self, entry: Fields, context: ParseContext) -> list[Block]:
        """Return the images in the field `images`, each base64 data or a content part."""
        blocks: list[Block] = []
        for index, each in enumerate(entry.items("images") or ()):
            path = f"{entry.path_of('images')}[{index}]"
            if isinstance(each, str):
                blocks += context.attachments.blocks(Attachment(each, path, image_only=True))
            else:
                blocks += _openai_part(Fields(each, path), context, "user")
        return blocks

    def _call_blocks(self, entry: Fields, content: list[Block]) -> list[Block]:
        """Return the tool calls of an assistant's message that are not in its `content`.

        Some clients send a call in both places. A call in `function_call` has no id.
        """
        in_content = [block for block in content if block["type"] == "tool_use"]
        known = {(plain_id(block["id"]), block["name"]) for block in in_content}
        calls = [self._call_block(call) for call in entry.objects("tool_calls")]
        calls = [each for each in calls if (plain_id(each["id"]), each["name"]) not in known]
        legacy = entry.child("function_call")
        if legacy is not None:
            call = self._function_call_block("", legacy)
            if call["name"] not in [each["name"] for each in (*in_content, *calls)]:
                calls.append(call)
        return calls

    def _call_block(self, call: Fields) -> Block:
        call_id, custom = call.text("id") or "", call.child("custom")
        if custom is not None:
            return {
                "type": "tool_use", "id": call_id, "name": custom.required_text("name"),
                "input": {"input": custom.text("input") or ""},
            }
        function = call.child("function") or (call if call.has("name") else None)
        if function is None:
            raise call.invalid("function", "an object")
        return self._function_call_block(call_id, function)

    def _function_call_block(self, call_id: str, function: Fields) -> Block:
        return {
            "type": "tool_use", "id": call_id, "name": function.required_text("name"),
            "input": arguments_of(function.object.get("arguments")),
        }

    # -- rendering ----------------------------------------------------------------------------

    def answer_body(self, turn: Turn, answers: list[Answer]) -> Json:
        return {
            "id": turn.wire["id"],
            "object": "chat.completion",
            "created": turn.wire["created"],
            "model": turn.wire["model"],
            "choices": [
                {
                    "index": index,
                    "message": self._message(turn, answer),
                    "logprobs": None,
                    "finish_reason": self.finish_reason(turn, answer.stop_reason),
                }
                for index, answer in enumerate(answers)
            ],
            "usage": openai_usage(answer.usage for answer in answers),
            "system_fingerprint": None,
        }

    def _message(self, turn: Turn, answer: Answer) -> Json:
        text = answer.joined("text")
        message: Json = {
            "role": "assistant",
            "content": None if (answer.calls or answer.refusal) and not text else text,
            "refusal": answer.refusal or None,
        }
        thinking = answer.joined("thinking")
        if thinking:
            message["reasoning_content"] = thinking
        calls = [self._call(turn, call) for call in answer.calls]
        if calls and turn.wire["legacy_functions"]:
            message["function_call"] = calls[0]["function"]
        elif calls:
            message["tool_calls"] = calls
        return message

    def _call(self, turn: Turn, call: Block) -> Json:
        name = call["name"]
        if name in turn.wire["custom"]:
            custom = {"name": name, "input": freeform_text(call["input"])}
            return {"id": call["id"], "type": "custom", "custom": custom}
        function = {"name": name, "arguments": json_text(call["input"])}
        return {"id": call["id"], "type": "function", "function": function}

    def finish_reason(self, turn: Turn, stop_reason: str) -> str:
        """Return OpenAI's finish reason for a stop reason of the API."""
        if stop_reason == "tool_use" and turn.wire["legacy_functions"]:
            return "function_call"
        return FINISH_REASONS.get(stop_reason, "stop")

    def renderer(self, turn: Turn) -> Renderer:
        return ChatRenderer(self, turn)


class ChunkRenderer(Renderer):
    """Base of the renderers of chat and legacy completions: streams that end with [DONE]."""

    def _chunk(self, choices: list[Json]) -> Json:
        """Return the body of a chunk with these choices."""
        raise NotImplementedError

    def end(self) -> bytes:
        done = b"data: [DONE]\n\n"
        if not self._turn.wire["include_usage"]:
            return done
        usage = openai_usage(self._usages, one_prompt=not self._turn.others)
        return sse_event({**self._chunk([]), "usage": usage}) + done


class ChatRenderer(ChunkRenderer):
    """Renderer of a streamed chat completion: one chunk for each delta."""

    def __init__(self, dialect: ChatDialect, turn: Turn) -> None:
        super().__init__(dialect, turn)
        self._choices = [ChatChoice(dialect, turn) for _ in range(turn.choices)]

    def _render(self, index: int, event: Event) -> bytes:
        choice = self._choices[index]
        chunks = [
            self._chunk([{
                "index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason,
            }])
            for delta, finish_reason in choice.deltas(event)
        ]
        if choice.answered:
            self._answered.add(index)
        return b"".join(map(sse_event, chunks))

    def _chunk(self, choices: list[Json]) -> Json:
        chunk: Json = {
            "id": self._turn.wire["id"],
            "object": "chat.completion.chunk",
            "created": self._turn.wire["created"],
            "model": self._turn.wire["model"],
            "system_fingerprint": None,
            "choices": choices,
        }
        if self._turn.wire["include_usage"]:
            chunk["usage"] = None
        return chunk


class ChatChoice:
    """State of one choice of a streamed chat completion.

    A function call without arguments is ambiguous: its empty arguments stand for {} if the model
    finished the call, and are incomplete if the token limit cut it off. {} is therefore sent only
    with the stop reason "tool_use".
    """

    def __init__(self, dialect: ChatDialect, turn: Turn) -> None:
        self._dialect = dialect
        self._turn = turn
        self._began = False
        #: True once anything but thinking was sent.
        self.answered = False
        #: The index of each tool call by its block, and the blocks of calls without arguments yet.
        self._calls: dict[int, int] = {}
        self._empty_calls: list[int] = []
        #: The readers of custom tools' calls, by block.
        self._readers: dict[int, FreeformReader] = {}

    def deltas(self, event: Event) -> Iterator[tuple[Json, str | None]]:
        """Yield the deltas of an event with their finish reasons. The first has the role."""
        for delta, finish_reason in self._deltas_for(event):
            if not self._began:
                self._began = True
                yield {"role": "assistant", "content": ""}, None
            yield delta, finish_reason

    def _deltas_for(self, event: Event) -> Iterator[tuple[Json, str | None]]:
        if isinstance(event, BlockStarted) and event.block.get("type") == "tool_use":
            self.answered = True
            if self._calls and self._turn.wire["legacy_functions"]:
                # `function_call` has room for one call.
                return
            call = event.block
            yield self._call_began(event.block_index, call["id"], call["name"]), None
        elif isinstance(event, Finished):
            for block_index in self._empty_calls if event.stop_reason == "tool_use" else ():
                yield self._call(block_index, function={"arguments": "{}"}), None
            for block_index, reader in self._readers.items():
                yield from self._input(block_index, reader.close())
            yield {}, self._dialect.finish_reason(self._turn, event.stop_reason)
        elif isinstance(event, Delta):
            self.answered = self.answered or event.kind in ("text", "arguments", "refusal")
            if event.block_index in self._readers:
                text = self._readers[event.block_index].feed(event.text)
                yield from self._input(event.block_index, text)
            elif event.kind == "arguments" and event.text and event.block_index in self._calls:
                if event.block_index in self._empty_calls:
                    self._empty_calls.remove(event.block_index)
                yield self._call(event.block_index, function={"arguments": event.text}), None
            if event.kind in _CHAT_FIELDS and (event.text or event.kind != "thinking"):
                yield {_CHAT_FIELDS[event.kind]: event.text}, None

    def _call_began(self, block_index: int, call_id: str, name: str) -> Json:
        self._calls.setdefault(block_index, len(self._calls))
        if name in self._turn.wire["custom"]:
            self._readers[block_index] = FreeformReader()
            custom = {"name": name, "input": ""}
            return self._call(block_index, id=call_id, type="custom", custom=custom)
        self._empty_calls.append(block_index)
        function = {"name": name, "arguments": ""}
        return self._call(block_index, id=call_id, type="function", function=function)

    def _input(self, block_index: int, text: str) -> Iterator[tuple[Json, str | None]]:
        """Yield the delta of a custom tool's call, unless the text is empty."""
        if text:
            yield self._call(block_index, custom={"input": text}), None

    def _call(self, block_index: int, **fields: object) -> Json:
        """Return the delta of a call, as `function_call` if the request has `functions`."""
        if self._turn.wire["legacy_functions"]:
            return {"function_call": fields["function"]}
        return {"tool_calls": [{"index": self._calls[block_index], **fields}]}


#: The field of a chat chunk for each kind of Delta.
_CHAT_FIELDS = {"text": "content", "thinking": "reasoning_content", "refusal": "refusal"}

CHAT = ChatDialect()


_UNSUPPORTED_COMPLETIONS_PARAMETERS = {
    "suffix": "insertion before a suffix is not supported",
    "logprobs": _NO_LOG_PROBABILITIES,
}


class CompletionsDialect(Dialect):
    """POST /v1/completions: each prompt is the user's only message; each answer is a choice."""

    name = "completions"

    def parse(self, body: object, parsing: ParseEnvironment) -> Turn:
        fields = Fields(body)
        name, model = parsing.model(fields)
        refuse_parameters(fields, _UNSUPPORTED_COMPLETIONS_PARAMETERS)
        prompts = self._prompts(fields)
        conversations = [[Message("user", text_blocks(prompt))] for prompt in prompts]
        options, ignored = options_for(model, self._requested_options(fields))
        wire = {
            **completion_head(fields, "cmpl-", name),
            "echo": prompts if fields.flag("echo") else [""] * len(prompts),
        }
        return Turn(
            model=model,
            messages=conversations[0],
            others=tuple(conversations[1:]),
            options=options,
            choices=len(prompts),
            stream=fields.flag("stream"),
            ignored=(*ignored, *fields.ignored_paths()),
            wire=wire,
        )

    def _prompts(self, fields: Fields) -> list[str]:
        """Return the prompt of each choice: every prompt `n` times."""
        prompts = fields.texts("prompt")
        each = fields.integer("n", 1, MAX_CHOICES) or 1
        if not 0 < each * len(prompts) <= MAX_PROMPTS or not all(map(str.strip, prompts)):
            raise fields.invalid(
                "prompt", f"text, or an array of texts, with at most {MAX_PROMPTS} answers in all"
            )
        return [prompt for prompt in prompts for _ in range(each)]

    def _requested_options(self, fields: Fields) -> RequestedOptions:
        max_tokens = fields.token_limit("max_tokens", zero=True)
        return requested_options(fields, max_tokens, ("stop",), openai_thinking(fields))

    def body(self, turn: Turn, choices: list[Json]) -> Json:
        """Return the body of an answer or of a chunk."""
        return {
            "id": turn.wire["id"],
            "object": "text_completion",
            "created": turn.wire["created"],
            "model": turn.wire["model"],
            "choices": choices,
        }

    def choice(self, index: int, text: str, stop_reason: str | None) -> Json:
        """Return a choice, or a piece of one if `stop_reason` is None."""
        reason = None if stop_reason is None else FINISH_REASONS.get(stop_reason, "stop")
        return {"text": text, "index": index, "logprobs": None, "finish_reason": reason}

    def answer_body(self, turn: Turn, answers: list[Answer]) -> Json:
        choices = [
            self.choice(index, turn.wire["echo"][index] + answer.joined("text"), answer.stop_reason)
            for index, answer in enumerate(answers)
        ]
        usage = openai_usage((answer.usage for answer in answers), one_prompt=not turn.others)
        return {**self.body(turn, choices), "usage": usage}

    def renderer(self, turn: Turn) -> Renderer:
        return CompletionsRenderer(self, turn)


class CompletionsRenderer(ChunkRenderer):
    """Renderer of a streamed legacy completion."""

    def __init__(self, dialect: CompletionsDialect, turn: Turn) -> None:
        super().__init__(dialect, turn)
        self._completions = dialect
        self._echo = dict(enumerate(turn.wire["echo"]))

    def _render(self, index: int, event: Event) -> bytes:
        text, reason = "", None
        if isinstance(event, Delta) and event.kind == "text":
            self._answered.add(index)
            text = event.text
        elif isinstance(event, Finished):
            reason = event.stop_reason
        else:
            return b""
        choice = self._completions.choice(index, self._echo.pop(index, "") + text, reason)
        return sse_event(self._chunk([choice]))

    def _chunk(self, choices: list[Json]) -> Json:
        return self._completions.body(self._turn, choices)


COMPLETIONS = CompletionsDialect()


#: Blocks of a history that are dropped. claude accepts no thinking from outside; the results of
#: the API's own tools are passed on without the calls.
_OMITTED_BLOCKS = ("thinking", "redacted_thinking", "server_tool_use", "mcp_tool_use")
#: Types of blocks that are read, whatever they hold.
_READABLE_BLOCKS = (*_OMITTED_BLOCKS, "text", "image", "document", "search_result", "tool_result")


def is_block_in_result(block: Json) -> bool:
    """Return True if an object in a tool's result is a content block, False if it is plain data
    that happens to have a `type`, such as an entry of a listing."""
    kind = block.get("type")
    if not isinstance(kind, str):
        return True
    if kind in _PART_FIELDS:
        return is_content_part(block)
    known = (*_READABLE_BLOCKS, "tool_use", "tool_reference", "compaction")
    return kind in known or kind.endswith("_tool_result")


#: Fields in the results of the API's own tools that mean nothing to a model.
_API_ONLY_FIELDS = ("encrypted_content", "encrypted_index", "encrypted_stdout", "cache_control")


def server_tool_result(block: Fields) -> list[Block]:
    """Return the result of a tool that the API or another server ran as a text block, because
    claude accepts no such blocks in a history."""
    name = str(block.text("type"))
    content = _without_api_fields(block.object.get("content"))
    if isinstance(content, str):
        text = content
    elif isinstance(content, list) and all(is_text_block(entry) for entry in content):
        text = "\n".join(entry["text"] for entry in content)
    else:
        text = json_text(content)
    return text_blocks(f"[{name}]\n{text}")


def is_text_block(value: object) -> bool:
    """Return True if `value` is a text block of the API."""
    return isinstance(value, dict) and isinstance(value.get("text"), str)


def _without_api_fields(value: object) -> object:
    if isinstance(value, dict):
        return {k: _without_api_fields(v) for k, v in value.items() if k not in _API_ONLY_FIELDS}
    return [_without_api_fields(entry) for entry in value] if isinstance(value, list) else value


#: Places of blocks: a message's role, or a tool's result. For each its name in error messages and
#: the types of blocks that are not allowed there.
_PLACES = {
    "user": ("a user's message", ("tool_use",)),
    "assistant": ("an assistant's message", ("tool_result", "image", "document")),
    "system": ("a system prompt", ("tool_use", "tool_result", "image", "document")),
    "result": ("the result of a tool", ("tool_use", "tool_result")),
}


#: Unused parameters that do not change the meaning of the answer: not reported as ignored.
_HARMLESS_MESSAGES_PARAMETERS = (
    "anthropic_beta", "anthropic_version", "betas", "cache_control", "metadata", "service_tier",
)


class MessagesDialect(Dialect):
    """POST /v1/messages: Anthropic's API."""

    name = "messages"

    # -- parsing ------------------------------------------------------------------------------

    def parse(self, body: object, parsing: ParseEnvironment) -> Turn:
        fields = Fields(body)
        self._refuse_thread(fields)
        _, model = parsing.model(fields)
        context = ParseContext(parsing.limits, model)
        tools = self._tools(fields, context)
        choice = checked_tool_choice(tools, self._tool_choice(fields), "tool_choice")
        messages = self._messages(fields, context)
        output_schema = self._output_schema(fields)
        prompt = build_prompt(messages, fields, parsing, context, "messages")
        options, ignored = options_for(model, self._requested_options(fields, choice))
        return Turn(
            model=model,
            system=prompt.system,
            messages=prompt.messages,
            options=options,
            tools=tools,
            tool_choice=choice,
            output_schema=output_schema,
            session_id=fields.text(SESSION_FIELD) or "",
            stream=fields.flag("stream"),
            ignored=(
                *ignored, *context.ignored, *fields.ignored_paths(_HARMLESS_MESSAGES_PARAMETERS)
            ),
            adjusted=context.adjusted,
            wire={"id": new_id("msg_")},
        )

    def _refuse_thread(self, fields: Fields) -> None:
        """Raise Unsupported for a thread, with the error code after which SDKs send the messages
        themselves: threads are not stored here."""
        if fields.has("thread"):
            error = Unsupported(
                "thread: threads are not stored here; send the messages.", param="thread"
            )
            error.details = {
                "details": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
            }
            raise error

    def _requested_options(self, fields: Fields, choice: ToolChoice) -> RequestedOptions:
        return requested_options(
            fields, fields.token_limit("max_tokens", zero=True), ("stop_sequences",),
            self._thinking(fields), max_temperature=1, forces_tool=choice.forces,
        )

    def _thinking(self, fields: Fields) -> Thinking:
        """Return the requested thinking, none by default: without `thinking`, clients expect the
        first block to be text."""
        effort = fields.settings("output_config").one_of("effort", tuple(EFFORT_BUDGETS))
        is_set = fields.has("thinking")
        thinking = fields.settings("thinking") if is_set else Fields({"type": "disabled"})
        kind = thinking.text("type")
        hidden = thinking.one_of("display", ("summarized", "omitted")) == "omitted"
        if kind == "enabled":
            budget = thinking.integer("budget_tokens", _MIN_BUDGET_TOKENS)
            if budget is None:
                raise thinking.invalid("budget_tokens", f"{_MIN_BUDGET_TOKENS} or more")
            return Thinking(effort, budget, hidden=hidden)
        if kind == "adaptive":
            return Thinking(effort, enabled=True, hidden=hidden)
        # "between_tools" turns thinking before the answer off in the newest models.
        if kind not in ("disabled", "between_tools"):
            raise thinking.invalid("type", "enabled, adaptive, between_tools or disabled")
        return Thinking(effort, 0)

    def _output_schema(self, fields: Fields) -> OutputSchema | None:
        output = fields.settings("output_config")
        older = schema_of_format(fields.child("output_format"))
        return schema_of_format(output.child("format")) or older

    def _tools(self, fields: Fields, context: ParseContext) -> tuple[Tool, ...]:
        """Return the client's own tools; those that Anthropic defines are recorded as ignored."""
        tools: list[Tool] = []
        served: list[Fields] = []
        for entry in fields.objects("tools"):
            if entry.text("type") not in (None, "custom"):
                context.ignore(entry.path)
            else:
                tools.append(read_tool(entry, entry.required_text("name"), "input_schema"))
                served.append(entry)
        context.ignore(*unsupported_tool_fields(served))
        return unique_tools(tools, "tools")

    def _tool_choice(self, fields: Fields) -> ToolChoice:
        entry = fields.child("tool_choice")
        if entry is None:
            return ToolChoice()
        kind = entry.one_of("type", ("auto", "any", "tool", "none")) or "auto"
        name = entry.required_text("name") if kind == "tool" else ""
        return ToolChoice(kind, name, parallel=not entry.flag("disable_parallel_tool_use"))

    def _messages(self, fields: Fields, context: ParseContext) -> list[Message]:
        messages = [Message("system", self._blocks(fields, "system", context, "system"))]
        for entry in fields.objects("messages"):
            role = entry.one_of("role", ("user", "assistant", "system"))
            if role is None:
                raise entry.invalid("role", "user or assistant")
            blocks = self._blocks(entry, "content", context, role)
            if role == "user" and not blocks and isinstance(entry.object.get("content"), list):
                refuse_unreadable(entry.objects("content"), _READABLE_BLOCKS)
            messages.append(Message(role, blocks))
        return messages

    def _blocks(
        self, entry: Fields, name: str, context: ParseContext, place: str
    ) -> list[Block]:
        """Return the blocks of a string or an array; `place` is a key of _PLACES.

        Raise BadRequest for a block that is not allowed in that place.
        """
        value = entry.value(name)
        if value is None:
            return []
        if isinstance(value, str):
            return text_blocks(value)
        if not isinstance(value, list):
            raise entry.invalid(name, "a string or an array of blocks")
        blocks: list[Block] = []
        place_name, refused_types = _PLACES[place]
        for block in entry.objects(name):
            parsed = self._block(block, context, place)
            for kind in (each["type"] for each in parsed):
                if kind in refused_types:
                    raise BadRequest(
                        f"{block.path}: {kind} blocks are not allowed in {place_name}; remove it.",
                        param=block.path,
                    )
            blocks += parsed
        return blocks

    def _block(self, block: Fields, context: ParseContext, place: str) -> list[Block]:
        kind = block.text("type")
        if place == "result" and not is_block_in_result(block.object):
            return json_block(block.object)
        if kind == "text":
            text = block.text("text")
            if text is None:
                raise block.invalid("text", "a string")
            return text_blocks(text)
        if kind == "image":
            return image_blocks(block, context)
        if kind == "document":
            return document_blocks(
                block, context, lambda source: self._blocks(source, "content", context, "result")
            )
        if kind == "search_result":
            named = labels_of(block, "title", "source")
            return caption_blocks(named) + self._blocks(block, "content", context, "result")
        if kind == "tool_use":
            return [tool_use_block(block)]
        if kind == "tool_result":
            return [tool_result_block(block, self._blocks(block, "content", context, "result"))]
        if kind == "tool_reference":
            # A result of the client's tool search; the tool itself is in `tools`.
            return text_blocks(f"The tool {block.required_text('tool_name')} is loaded.")
        if kind is not None and kind.endswith("_tool_result"):
            return server_tool_result(block)
        if kind == "compaction":
            return text_blocks(block.text("content") or "")
        if kind is None:
            raise block.invalid("type", "text, image, document, tool_use or tool_result")
        if kind not in _OMITTED_BLOCKS:
            context.ignore(block.path)
        return []

    # -- rendering ----------------------------------------------------------------------------

    def message(self, turn: Turn, model: str, **fields: object) -> Json:
        """Return the message object; an empty `model` stands for the turn's model."""
        return {
            "id": turn.wire["id"], "type": "message", "role": "assistant",
            "model": model or turn.model.id, **fields,
        }

    def usage(self, usage: Usage) -> Json:
        """Return the usage object."""
        thinking = usage.reasoning_tokens
        details: Json = {"output_tokens_details": {"thinking_tokens": thinking}}
        return {
            "input_tokens": usage.input_tokens,
            "cache_creation_input_tokens": usage.cache_write_tokens,
            "cache_read_input_tokens": usage.cache_read_tokens,
            "output_tokens": usage.output_tokens,
            **usage.tables,
            **(details if thinking is not None else {}),
        }

    def stop_details(self, stop_details: Json | None) -> Json:
        """Return the field `stop_details`, or no field if there are none."""
        return {"stop_details": stop_details} if stop_details is not None else {}

    def answer_body(self, turn: Turn, answers: list[Answer]) -> Json:
        answer = answers[0]
        refused = [{"type": "text", "text": answer.refusal}] if answer.refusal else []
        return self.message(
            turn, answer.model,
            content=answer.blocks + refused,
            stop_reason="refusal" if refused else answer.stop_reason,
            stop_sequence=answer.stop_sequence,
            usage=self.usage(answer.usage),
            **self.stop_details(answer.stop_details),
        )

    def renderer(self, turn: Turn) -> Renderer:
        return MessagesRenderer(self, turn)

    def error_body(self, error: OcpError, request_id: str) -> Json:
        body = {"type": error.anthropic_type, "message": error.message, **error.details}
        return {"type": "error", "error": body, "request_id": request_id}


#: The type and the text field of a content_block_delta, for each kind of Delta.
_MESSAGES_DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "signature": ("signature_delta", "signature"),
    "arguments": ("input_json_delta", "partial_json"),
}


class MessagesRenderer(Renderer):
    """Renderer of a streamed message.

    Blocks are numbered as claude numbers them, plus an offset: after a restart claude counts from
    0 again, while the client continues after the blocks that it has already received. A refusal
    becomes a text block of its own.
    """

    def __init__(self, dialect: MessagesDialect, turn: Turn) -> None:
        super().__init__(dialect, turn)
        self._messages = dialect
        self._started = Started("", "", NO_USAGE)
        self._refused = False
        #: The index of the open block, if any, and of the block after it.
        self._open: int | None = None
        self._next = 0
        self._offset = 0

    def _render(self, index: int, event: Event) -> bytes:
        if isinstance(event, Started):
            # message_start is sent together with the first block.
            self._started = event
            return b""
        if isinstance(event, Restarted):
            self._offset = self._next
            return self._close_block()
        return self._begin() + self._frames_of(event)

    def _opening(self) -> bytes:
        message = self._messages.message(
            self._turn, self._started.model, content=[], stop_reason=None, stop_sequence=None,
            usage=self._messages.usage(self._started.usage),
        )
        return self._frame("message_start", message=message)

    def _frames_of(self, event: Event) -> bytes:
        if isinstance(event, BlockStarted):
            if "thinking" not in event.block["type"]:
                self._answered.add(0)
            self._open = event.block_index + self._offset
            self._next = self._open + 1
            return self._frame("content_block_start", index=self._open, content_block=event.block)
        if isinstance(event, Delta):
            return self._delta(event)
        if isinstance(event, BlockStopped):
            return self._close_block()
        if isinstance(event, Finished):
            return self._finish(event)
        return b""

    def _delta(self, event: Delta) -> bytes:
        if event.kind == "refusal":
            self._refused = True
            block = {"type": "text", "text": ""}
            opened = self._frames_of(BlockStarted(self._next - self._offset, block))
            return opened + self._delta(event._replace(kind="text")) + self._close_block()
        if event.kind == "thinking" and not event.text:
            return b""
        kind, field = _MESSAGES_DELTAS[event.kind]
        index = self._open if self._open is not None else event.block_index + self._offset
        delta = {"type": kind, field: event.text}
        return self._frame("content_block_delta", index=index, delta=delta)

    def _close_block(self) -> bytes:
        if self._open is None:
            return b""
        index, self._open = self._open, None
        return self._frame("content_block_stop", index=index)

    def _finish(self, event: Finished) -> bytes:
        reason = "refusal" if self._refused else event.stop_reason
        delta = {
            "stop_reason": reason, "stop_sequence": event.stop_sequence,
            **self._messages.stop_details(event.stop_details),
        }
        usage = self._messages.usage(event.usage)
        closed = self._close_block()
        return closed + self._frame("message_delta", delta=delta, usage=usage)

    def keepalive(self) -> bytes:
        return self._frame("ping")

    def end(self) -> bytes:
        return self._frame("message_stop")

    def failure(self, error: OcpError, request_id: str) -> bytes:
        return sse_event(self._messages.error_body(error, request_id), "error")

    def _frame(self, kind: str, **fields: object) -> bytes:
        return sse_event({"type": kind, **fields}, kind)


MESSAGES = MessagesDialect()


#: Unused parameters that do not change the meaning of the answer: not reported as ignored.
_HARMLESS_RESPONSES_PARAMETERS = (
    "client_metadata", "include", "stream_options", "truncation",
)


class ResponsesDialect(Dialect):
    """POST /v1/responses: OpenAI's API in which prompts and answers are lists of items."""

    name = "responses"

    # -- parsing ------------------------------------------------------------------------------

    def parse(self, body: object, parsing: ParseEnvironment) -> Turn:
        fields = Fields(body)
        name, model = parsing.model(fields)
        for field in ("conversation", "prompt"):
            if fields.has(field):
                raise Unsupported(
                    f"{field}: no {field}s are stored here; send the items in input.", param=field
                )
        context = ParseContext(parsing.limits, model)
        tools, choice, forms = self._tools(fields, context)
        output_schema = self._output_schema(fields)
        prompt = build_prompt(
            self._messages(fields, parsing, context), Fields({}), parsing, context, "input",
            instructions=fields.text("instructions") or "",
            after_assistant=_REFORMAT if output_schema else _CONTINUE,
        )
        wire = self._wire(fields, name, prompt, forms, parsing)
        options, ignored = options_for(model, self._requested_options(fields, choice))
        return Turn(
            model=model,
            system=prompt.system,
            messages=prompt.messages,
            options=options,
            tools=tools,
            tool_choice=choice,
            output_schema=output_schema,
            stream=fields.flag("stream"),
            ignored=(
                *ignored, *context.ignored, *fields.ignored_paths(_HARMLESS_RESPONSES_PARAMETERS)
            ),
            adjusted=context.adjusted,
            wire=wire,
        )

    def _wire(
        self, fields: Fields, name: str, prompt: Prompt, forms: Mapping[str, object],
        parsing: ParseEnvironment,
    ) -> Json:
        """Return the values of `Turn.wire`, used to render and to store the answer."""
        reasoning = fields.settings("reasoning")
        stored = fields.value("store") is not False
        return {
            "echo": self._echo(fields, name, reasoning),
            "store": stored,
            "summary": is_non_default(reasoning.value("summary")),
            "forms": forms,
            "opening": prompt.opening,
            "items": input_items(fields, parsing) if stored else [],
        }

    def _echo(self, fields: Fields, name: str, reasoning: Fields) -> Json:
        """Return the response's id and time, and the request's fields that it repeats."""
        sent = fields.object
        text: Json = sent["text"] if isinstance(sent.get("text"), dict) else {}
        return {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "model": name,
            "instructions": sent.get("instructions"),
            "max_output_tokens": sent.get("max_output_tokens"),
            "metadata": sent.get("metadata") or {},
            "parallel_tool_calls": sent.get("parallel_tool_calls") is not False,
            "previous_response_id": sent.get("previous_response_id"),
            "reasoning": {
                "effort": reasoning.object.get("effort"),
                "summary": reasoning.object.get("summary"),
            },
            "store": sent.get("store") is not False,
            "temperature": sent.get("temperature"),
            "text": {**text, "format": text.get("format") or {"type": "text"}},
            "tool_choice": sent.get("tool_choice") or "auto",
            "tools": sent.get("tools") or [],
            "top_p": sent.get("top_p"),
            "truncation": "disabled",
        }

    def _requested_options(self, fields: Fields, choice: ToolChoice) -> RequestedOptions:
        return requested_options(
            fields, fields.token_limit("max_output_tokens"), ("stop",), openai_thinking(fields),
            forces_tool=choice.forces,
        )

    def _output_schema(self, fields: Fields) -> OutputSchema | None:
        own = schema_of_format(fields.settings("text").child("format"))
        return own or chat_output_schema(fields)

    def _tools(
        self, fields: Fields, context: ParseContext
    ) -> tuple[tuple[Tool, ...], ToolChoice, dict[str, tuple[CallForm, Json]]]:
        """Return the tools, the tool choice, and for each tool's name how its calls are written:
        the form, and the fields of the item that name the tool."""
        tools: list[Tool] = []
        served: list[Fields] = []
        forms: dict[str, tuple[CallForm, Json]] = {}
        for entry, space in self._tool_entries(fields):
            kind = entry.text("type") or ""
            tool = self._tool(entry, kind, space)
            if tool is None:
                context.ignore(entry.path)
                continue
            tools.append(tool)
            if kind == "function":
                served.append(entry)
            name_fields: Json = {} if kind in CLIENT_TOOLS else {"name": entry.text("name")}
            if space:
                name_fields["namespace"] = space
            forms[tool.name] = (_CALL_FORMS[kind], name_fields)
        choice, allowed = openai_tool_choice(fields, "tool_choice")
        usable = only_allowed(unique_tools(tools, "tools"), allowed, context)
        context.ignore(*unsupported_tool_fields(served))
        return usable, checked_tool_choice(usable, choice, "tool_choice"), forms

    def _tool(self, entry: Fields, kind: str, space: str) -> Tool | None:
        """Return the tool of an entry, None for a tool that only OpenAI can run."""
        if kind in CLIENT_TOOLS:
            environment = (entry.child("environment") or Fields({})).text("type") or "local"
            return CLIENT_TOOLS[kind] if environment == "local" else None
        if kind == "custom":
            return freeform_tool(entry, qualified_name(space, entry.required_text("name")))
        if kind == "function":
            name = qualified_name(space, entry.required_text("name"))
            return read_tool(entry, name, "parameters")
        return None

    def _tool_entries(self, fields: Fields) -> Iterator[tuple[Fields, str]]:
        """Yield the entries of `tools`, each with its namespace, empty if it has none. Codex sends
        the tools of an MCP server as one namespace."""
        for entry in fields.objects("tools"):
            if entry.text("type") == "namespace":
                space = entry.required_text("name")
                yield from ((tool, space) for tool in entry.objects("tools"))
            else:
                yield entry, ""

    def _messages(
        self, fields: Fields, parsing: ParseEnvironment, context: ParseContext
    ) -> list[Message]:
        """Return the stored messages of the previous response, followed by the new ones."""
        previous_id = fields.text("previous_response_id")
        earlier = parsing.recall(previous_id) if previous_id else []
        messages = [Message(message.role, list(message.content)) for message in earlier]
        for item in input_items(fields, parsing):
            messages += self._item_messages(item, item.text("type") or "message", context)
        return messages

    def _item_messages(self, item: Fields, kind: str, context: ParseContext) -> list[Message]:
        """Return the messages of an input item; items that mean nothing to a model are dropped."""
        if kind == "message":
            role = item.one_of("role", ("system", "developer", "user", "assistant"))
            if role is None:
                raise item.invalid("role", "system, developer, user or assistant")
            role = "system" if role == "developer" else role
            return [Message(role, openai_content(item, context, role))]
        if kind in _PARTS_AS_ITEMS:
            return [Message("user", _openai_part(item, context, "user"))]
        if kind in _FORMS_BY_ITEM:
            return [Message("assistant", [_FORMS_BY_ITEM[kind].block(item)])]
        if kind in _RESULT_READERS:
            content = _RESULT_READERS[kind](item, context)
            return [_result_message(item, item.text("call_id") or item.text("id") or "", content)]
        if kind in _HOSTED_CALLS:
            return hosted_call_messages(item, kind)
        if kind in _ITEMS_AS_TEXT:
            role, names = _ITEMS_AS_TEXT[kind]
            values = {name: item.object[name] for name in names if item.has(name)}
            return [Message(role, text_blocks(f"[{kind}]\n{json_text(values)}"))]
        if item.has("role") and item.has("content") and kind != "reasoning":
            return self._item_messages(item, "message", context)
        summary = compaction_text(item) if kind in ("compaction", "compaction_summary") else ""
        if not summary and kind != "reasoning":
            context.ignore(item.path)
        return [Message("user", text_blocks(summary))]

    # -- rendering ----------------------------------------------------------------------------

    def body(self, turn: Turn, status: str, output: list[Json], **more: object) -> Json:
        """Return the response object."""
        return {
            **turn.wire["echo"], "status": status, "output": output, "usage": None,
            "error": None, "incomplete_details": None, **more,
        }

    def partial_body(self, turn: Turn, status: str, output: list[Json], **more: object) -> Json:
        """Return the response object of an unfinished stream, without the long fields. SDKs
        require `tools` in each."""
        return self.body(turn, status, output, **{**_OMITTED_UNTIL_END, **more})

    def final_body(self, turn: Turn, output: list[Json], stop_reason: str, usage: Usage) -> Json:
        """Return the response object of a finished answer."""
        reasons = {"length": "max_output_tokens", "content_filter": "content_filter"}
        reason = reasons.get(FINISH_REASONS.get(stop_reason, "stop"))
        counted = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cache_read_tokens},
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
            "total_tokens": usage.prompt_tokens + usage.output_tokens,
        }
        return self.body(
            turn, "incomplete" if reason else "completed", output, usage=counted,
            incomplete_details={"reason": reason} if reason else None,
        )

    def answer_body(self, turn: Turn, answers: list[Answer]) -> Json:
        answer = answers[0]
        blocks = [
            block
            for block in answer.blocks
            if block["type"] in ("text", "tool_use")
            or (block["type"] == "thinking" and turn.wire["summary"])
        ]
        if answer.refusal:
            blocks.append({"type": "refusal", "text": answer.refusal})
        output = [finished_item(new_item(turn, block), block) for block in blocks]
        return self.final_body(turn, output, answer.stop_reason, answer.usage)

    def renderer(self, turn: Turn) -> Renderer:
        return ResponsesRenderer(self, turn)

    def stores(self, turn: Turn) -> bool:
        return bool(turn.wire["store"])

    def stored_system_messages(self, turn: Turn) -> list[Message]:
        """Return the system messages of the input. `instructions` are for one response only."""
        return list(turn.wire["opening"])


def input_items(fields: Fields, parsing: ParseEnvironment) -> list[Fields]:
    """Return the items of a request, with references replaced by the stored items. A string is
    one user message. Raise BadRequest or NotFound."""
    value = fields.value("input")
    if isinstance(value, str):
        return [Fields({"role": "user", "content": value}, "input")]
    return [
        Fields(parsing.item(item.required_text("id")), item.path)
        if item.text("type") == "item_reference" else item
        for item in fields.objects("input")
    ]


def stored_item(item: Fields) -> Json:
    """Return an input item as GET input_items lists it: with an id, and with content parts."""
    kind = item.text("type") or "message"
    form = _FORMS_BY_ITEM.get(kind)
    prefix = "msg_" if kind == "message" else form.id_prefix if form else "item_"
    stored: Json = {"status": "completed", **item.object, "type": kind}
    own_id = item.object.get("id")
    stored["id"] = own_id if own_id and isinstance(own_id, str) else new_id(prefix)
    if kind == "message" and isinstance(stored.get("content"), str):
        part = "output_text" if stored.get("role") == "assistant" else "input_text"
        stored["content"] = [{"type": part, "text": stored["content"]}]
    return stored


#: Values in responses of unfinished streams, in place of the request's, which may be long.
_OMITTED_UNTIL_END: Json = {"instructions": None, "tools": []}


class CallForm(NamedTuple):
    """The item that represents calls of one kind of tool."""

    #: The item's type, and the prefix of its ids.
    item_type: str
    id_prefix: str
    #: The field with the arguments, and the functions from arguments to its value and back.
    field: str
    write: Callable[[Json], object]
    read: Callable[[object], Json]
    #: The name of the tool; empty = the item has a field `name`.
    tool: str = ""
    #: The stem of the names of its delta events; empty = the item is sent only when complete.
    event: str = ""

    def block(self, item: Fields) -> Block:
        """Return the tool_use block of a call item."""
        space = item.text("namespace") or ""
        name = self.tool or qualified_name(space, item.required_text("name"))
        return {
            "type": "tool_use",
            "id": item.text("call_id") or item.text("id") or "",
            "item_id": item.text("id") or "",
            "name": name,
            # Newer computer calls have `actions` instead of `action`.
            "input": self.read(item.object.get(self.field, item.object.get(self.field + "s"))),
        }

    def new_item(self, call_id: str, name_fields: Json) -> Json:
        """Return the item of a new call, without arguments; `name_fields` name its tool."""
        return {
            "id": new_id(self.id_prefix), "type": self.item_type, "status": "in_progress",
            self.field: "" if self.event else self.write({}), "call_id": call_id, **name_fields,
        }


def _without_nulls(value: object) -> Json:
    """Return the arguments in an action or operation, without null values."""
    return {key: each for key, each in arguments_of(value).items() if each is not None}


def _exec_action(arguments: Json) -> Json:
    return {"type": "exec", "env": {}, **arguments}


def _exec_arguments(action: object) -> Json:
    arguments = _without_nulls(action)
    return {k: v for k, v in arguments.items() if k != "type" and (k != "env" or v)}


#: The call form of each type of tool. The last three occur only in histories.
_CALL_FORMS = {
    "function": CallForm(
        "function_call", "fc_", "arguments", json_text, arguments_of,
        event="function_call_arguments",
    ),
    "custom": CallForm(
        "custom_tool_call", "ctc_", "input", freeform_text, lambda text: {"input": text or ""},
        event="custom_tool_call_input",
    ),
    "local_shell": CallForm(
        "local_shell_call", "lsh_", "action", _exec_action, _exec_arguments, "local_shell"
    ),
    "shell": CallForm("shell_call", "sh_", "action", dict, _without_nulls, "shell"),
    "apply_patch": CallForm(
        "apply_patch_call", "apc_", "operation", dict, _without_nulls, "apply_patch"
    ),
    "computer": CallForm("computer_call", "cu_", "action", dict, _without_nulls, "computer"),
    "tool_search": CallForm(
        "tool_search_call", "tsc_", "arguments", dict, _without_nulls, "tool_search"
    ),
    "program": CallForm("program", "prog_", "code", dict, lambda code: {"code": code}, "program"),
}
#: The same by the type of the item.
_FORMS_BY_ITEM = {form.item_type: form for form in _CALL_FORMS.values()}


def _output_blocks(item: Fields, context: ParseContext) -> list[Block]:
    return openai_content(item, context, "tool", "output")


def _patch_result_blocks(item: Fields, context: ParseContext) -> list[Block]:
    return _output_blocks(item, context) or text_blocks(item.text("status") or "")


def _screenshot_blocks(item: Fields, context: ParseContext) -> list[Block]:
    output = item.object.get("output")
    if not isinstance(output, dict) or not output.get("image_url"):
        return _output_blocks(item, context)
    image = Fields({**output, "type": "input_image"}, item.path_of("output"))
    return _openai_part(image, context, "tool")


def _found_tools_blocks(item: Fields, context: ParseContext) -> list[Block]:
    return json_block(item.items("tools") or [])


def _program_result_blocks(item: Fields, context: ParseContext) -> list[Block]:
    return openai_content(item, context, "tool", "result")


#: Content parts of the user that some clients send as items, without a message around them.
_PARTS_AS_ITEMS = ("text", "input_text", "input_image", "input_file", "input_audio", "input_video")
#: The functions that read results which clients send, by the type of the item.
_RESULT_READERS: dict[str, Callable[[Fields, ParseContext], list[Block]]] = {
    "function_call_output": _output_blocks,
    "custom_tool_call_output": _output_blocks,
    "local_shell_call_output": _output_blocks,
    "shell_call_output": _output_blocks,
    "apply_patch_call_output": _patch_result_blocks,
    "computer_call_output": _screenshot_blocks,
    "tool_search_output": _found_tools_blocks,
    "program_output": _program_result_blocks,
}

#: Items of calls that another server ran: the fields with the arguments and with the results.
_HOSTED_CALLS = {
    "mcp_call": ("arguments", ("output", "error")),
    "code_interpreter_call": ("code", ("outputs",)),
}

#: Items that become a text block: the role of the message, and the fields in the text.
_ITEMS_AS_TEXT = {
    "web_search_call": ("assistant", ("action",)),
    "file_search_call": ("assistant", ("queries", "results")),
    "image_generation_call": ("assistant", ("revised_prompt", "error")),
    "mcp_approval_request": ("assistant", ("server_label", "name", "arguments")),
    "mcp_approval_response": ("user", ("approve", "reason")),
}


def _result_message(
    item: Fields, call_id: str, content: list[Block], *, failed: bool = False
) -> Message:
    result: Block = {
        "type": "tool_result", "tool_use_id": call_id, "content": content,
        "name": item.object.get("name"),
    }
    failed = failed or item.object.get("status") == "failed"
    return Message("user", [{**result, "is_error": True} if failed else result])


def hosted_call_messages(item: Fields, kind: str) -> list[Message]:
    """Return the messages with the call and the result of a tool that another server ran."""
    argument_field, result_fields = _HOSTED_CALLS[kind]
    name, value = item.text("name") or kind[:-len("_call")], item.object.get(argument_field)
    is_arguments = argument_field == "arguments"
    call: Block = {
        # Without an id, its result could be matched with another call.
        "type": "tool_use", "id": item.text("id") or f"hosted {item.path}",
        "name": qualified_name(item.text("server_label") or "", name),
        "input": arguments_of(value) if is_arguments else {argument_field: value},
    }
    results = [item.object[field] for field in result_fields if item.has(field)]
    texts = [each if isinstance(each, str) else json_text(each) for each in results]
    content = text_blocks("\n".join(texts))
    failed = item.has("error")
    return [
        Message("assistant", [call]),
        _result_message(item, str(call["id"]), content, failed=failed),
    ]


#: The start of the encrypted_content of compaction items that this server made.
_SUMMARY_MARK = "ocp1."


def encoded_summary(summary: str) -> str:
    """Return the encrypted_content of a compaction item with this summary."""
    return _SUMMARY_MARK + base64.b64encode(summary.encode("utf-8", "replace")).decode("ascii")


def compaction_text(item: Fields) -> str:
    """Return the text of a compaction item for the model, "" if another server made the item."""
    mark, _, content = (item.text("encrypted_content") or "").partition(".")
    with contextlib.suppress(ValueError):
        if mark + "." == _SUMMARY_MARK:
            summary = base64.b64decode(content, validate=True).decode("utf-8")
            return f"[Summary of the conversation up to here]\n{summary}"
    return ""


def new_item(turn: Turn, block: Block) -> Json:
    """Return the output item of a block that has just started."""
    if block["type"] == "thinking":
        return {"id": new_id("rs_"), "type": "reasoning", "summary": []}
    if block["type"] == "tool_use":
        plain = (_CALL_FORMS["function"], {"name": block["name"]})
        form, name_fields = turn.wire["forms"].get(block["name"], plain)
        return dict(form.new_item(block["id"], name_fields))
    return {
        "id": new_id("msg_"), "type": "message", "status": "in_progress", "role": "assistant",
        "content": [],
    }


def content_part(kind: str, text: str) -> Json:
    """Return the part of an item with the text of a block of this kind."""
    if kind == "thinking":
        return {"type": "summary_text", "text": text}
    if kind == "refusal":
        return {"type": "refusal", "refusal": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def finished_item(item: Json, block: Block) -> Json:
    """Return the item of a complete block."""
    kind = block["type"]
    if kind == "tool_use":
        form = _FORMS_BY_ITEM[item["type"]]
        return {**item, "status": "completed", form.field: form.write(block["input"])}
    if kind == "thinking":
        return {**item, "summary": [content_part(kind, block.get("thinking", ""))]}
    return {**item, "status": "completed", "content": [content_part(kind, block["text"])]}


#: For each kind of block the stem of its event names, and the field of the item that holds its
#: part; calls have no part.
_RESPONSES_EVENTS = {
    "text": ("output_text", "content"),
    "refusal": ("refusal", "content"),
    "thinking": ("reasoning_summary_text", "summary"),
    "tool_use": ("", ""),
}


#: Error codes, besides invalid_prompt, after which Codex does not retry.
_FINAL_CODES = ("context_length_exceeded", "insufficient_quota")


class ResponsesRenderer(Renderer):
    """Renderer of a streamed response.

    The stream is response.created and .in_progress, then the items one after another, then
    response.completed, .incomplete or .failed. Each item has output_item.added, the events of its
    part or arguments, and output_item.done.

    At most one item is open. It is closed as late as possible:

    - BlockStopped does not close it: claude sends one also for a block cut off by the token limit.
    - The next block, or a stop reason "tool_use", proves that the item is complete.
    - At any other end, a text is closed as it is; a call is closed only if its arguments are valid
      JSON and not empty. An incomplete call gets no output_item.done: Codex would run it.
    """

    def __init__(self, dialect: ResponsesDialect, turn: Turn) -> None:
        super().__init__(dialect, turn)
        self._responses = dialect
        self._sequence_number = 0
        self._output: list[Json] = []
        #: The open item, its kind of block, and the pieces of its text or arguments.
        self._item: Json | None = None
        self._kind = ""
        self._pieces: list[str] = []
        #: For the call of a custom tool: the reader of its input, and the pieces it returned.
        self._reader: FreeformReader | None = None
        self._input_pieces: list[str] = []

    def _frame(self, kind: str, **fields: object) -> bytes:
        number, self._sequence_number = self._sequence_number, self._sequence_number + 1
        return sse_event({"type": kind, "sequence_number": number, **fields}, kind)

    def _opening(self) -> bytes:
        body = self._responses.partial_body(self._turn, "in_progress", [])
        created = self._frame("response.created", response=body)
        return created + self._frame("response.in_progress", response=body)

    def _render(self, index: int, event: Event) -> bytes:
        if isinstance(event, Restarted):
            return self._close()
        if isinstance(event, BlockStarted):
            return self._close(is_complete=True) + self._open(event.block)
        if isinstance(event, Delta):
            return self._delta(event)
        return self._finish(event) if isinstance(event, Finished) else b""

    def _position(self) -> Json:
        """Return the fields of an event that refer to the open item and its part."""
        position: Json = {"output_index": len(self._output)}
        if self._item is not None:
            position["item_id"] = self._item["id"]
        field = _RESPONSES_EVENTS[self._kind][1]
        return {**position, f"{field}_index": 0} if field else position

    def _open(self, block: Block) -> bytes:
        kind = block["type"]
        if kind not in _RESPONSES_EVENTS or (kind == "thinking" and not self._turn.wire["summary"]):
            return b""
        if kind != "thinking":
            self._answered.add(0)
        self._item, self._kind, self._pieces = new_item(self._turn, block), kind, []
        custom = self._item["type"] == _CALL_FORMS["custom"].item_type
        self._reader, self._input_pieces = FreeformReader() if custom else None, []
        if kind == "tool_use" and not self._form_of(self._item).event:
            return self._begin()
        return self._begin() + self._item_added(self._item) + self._part_event("added", "")

    def _item_added(self, item: Json) -> bytes:
        index = len(self._output)
        return self._frame("response.output_item.added", output_index=index, item=item)

    def _form_of(self, item: Json) -> CallForm:
        return _FORMS_BY_ITEM[item["type"]]

    def _part_event(self, step: str, text: str) -> bytes:
        """Return the event of the open item's part, nothing for a call. `step` is "added" or
        "done"."""
        field = _RESPONSES_EVENTS[self._kind][1]
        if not field:
            return b""
        kind = "reasoning_summary_part" if field == "summary" else "content_part"
        part = content_part(self._kind, text)
        return self._frame(f"response.{kind}.{step}", **self._position(), part=part)

    def _delta(self, event: Delta) -> bytes:
        opened = b""
        if event.kind == "refusal":
            opened = self._open({"type": "refusal"})
        if self._item is None or event.kind == "signature" or not event.text:
            return opened
        self._pieces.append(event.text)
        if self._kind == "tool_use":
            return self._call_delta(self._item, event.text)
        name = _RESPONSES_EVENTS[self._kind][0]
        more: Json = {"logprobs": []} if self._kind == "text" else {}
        return opened + self._frame(
            f"response.{name}.delta", **self._position(), delta=event.text, **more
        )

    def _call_delta(self, item: Json, piece: str) -> bytes:
        """Return the event of a piece of a call's arguments, or of the input text in it."""
        text = piece if self._reader is None else self._reader.feed(piece)
        self._input_pieces.append(text)
        name = self._form_of(item).event
        if not name or not text:
            return b""
        return self._frame(f"response.{name}.delta", **self._position(), delta=text)

    def _close(self, *, is_complete: bool = False) -> bytes:
        """Return the events that close the open item, none for a call that may be incomplete."""
        item, text = self._item, "".join(self._pieces)
        is_call = self._kind == "tool_use"
        if item is None or (is_call and not text and not is_complete):
            return b""
        if is_call:
            frames, done = self._end_call(item, text, is_complete)
        else:
            frames, done = self._end_text(item, text)
        if done is not None:
            frames += self._frame(
                "response.output_item.done", output_index=len(self._output), item=done
            )
            self._output.append(done)
        self._item = None
        return frames

    def _end_text(self, item: Json, text: str) -> tuple[bytes, Json | None]:
        """Return the events that end the part of an item, and the finished item."""
        name = _RESPONSES_EVENTS[self._kind][0]
        field = "refusal" if self._kind == "refusal" else "text"
        more: Json = {"logprobs": []} if self._kind == "text" else {}
        frames = self._frame(f"response.{name}.done", **self._position(), **{field: text}, **more)
        frames += self._part_event("done", text)
        return frames, finished_item(item, {"type": self._kind, "text": text, "thinking": text})

    def _end_call(
        self, item: Json, arguments: str, is_complete: bool
    ) -> tuple[bytes, Json | None]:
        """Return the events that end a call, and the finished item, None if it is incomplete.

        Arguments that are complete but invalid JSON are sent unchanged: the agent reports them to
        the model, which tries again.
        """
        try:
            from_json(arguments or "{}")
        except ValueError:
            if not is_complete:
                return b"", None
        block = {"type": "tool_use", "input": arguments_of(arguments)}
        done, form = finished_item(item, block), self._form_of(item)
        if not form.event:
            return self._item_added(item), done
        frames, value = b"", arguments or "{}"
        if self._reader is not None:
            rest = self._reader.close()
            value = "".join(self._input_pieces) + rest
            done = {**done, form.field: value}
            if rest:
                frames = self._frame(f"response.{form.event}.delta", **self._position(), delta=rest)
        frames += self._frame(
            f"response.{form.event}.done", **self._position(), name=item["name"],
            **{form.field: value},
        )
        return frames, done

    def _finish(self, event: Finished) -> bytes:
        if event.stop_reason == "refusal":
            # Codex retries every answer that looks incomplete, but not this error.
            error = BadRequest("The model declined to answer.", code="content_filter")
            return self.failure(error, "")
        closed = self._begin() + self._close(is_complete=event.stop_reason == "tool_use")
        self.body = self._responses.final_body(
            self._turn, self._output, event.stop_reason, event.usage
        )
        return closed + self._frame(f"response.{self.body['status']}", response=self.body)

    def keepalive(self) -> bytes:
        # Codex ignores comments, and openai-js requires response.created first.
        return self._begin() + self._frame("keepalive")

    def failure(self, error: OcpError, request_id: str) -> bytes:
        code = error.error_code or error.openai_type
        if isinstance(error, Overloaded):
            code = "server_is_overloaded"
        elif not error.retryable and code not in _FINAL_CODES:
            code = "invalid_prompt"
        details = {"code": code, "message": error.message}
        body = self._responses.partial_body(self._turn, "failed", self._output, error=details)
        return self._begin() + self._frame("response.failed", response=body)


RESPONSES = ResponsesDialect()

#: The user message after which the model writes the summary of a conversation.
_COMPACTION_PROMPT = (
    "The conversation is cut here, and goes on in another one that holds only the messages of the "
    "user and your summary. Write that summary: what the user wants, decisions and constraints, "
    "what was done and found (names of files, commands, results), what is unfinished, and the "
    "next step. Give the summary only."
)


class CompactionDialect(ResponsesDialect):
    """POST /v1/responses/compact: replaces a conversation by the user's messages and a summary."""

    name = "compaction"

    def parse(self, body: object, parsing: ParseEnvironment) -> Turn:
        """Return a Turn that requests the summary. It keeps the tools, because the history may
        contain calls, and forbids new calls."""
        fields = Fields(body)
        prompt: Json = {"type": "message", "role": "user", "content": _COMPACTION_PROMPT}
        items = input_items(fields, parsing)
        more: Json = {
            "input": [*(item.object for item in items), prompt],
            "stream": False, "store": False, "text": None,
            "tool_choice": "none" if fields.has("tools") else None,
        }
        turn = super().parse({**fields.object, **more}, parsing)
        previous_id = fields.text("previous_response_id")
        earlier = parsing.recall(previous_id) if previous_id else []
        user_items = [*map(user_message_item, filter(is_user_message, earlier))]
        user_items += [stored_item(item) for item in items if item.text("role") == "user"]
        return turn._replace(wire={**turn.wire, "user_items": user_items})

    def answer_body(self, turn: Turn, answers: list[Answer]) -> Json:
        summary = answers[0].joined("text")
        if not summary.strip():
            raise UpstreamFailed("The model gave no summary of the conversation.")
        done = super().answer_body(turn, answers)
        item: Json = {
            "id": new_id("cmp_"), "type": "compaction",
            "encrypted_content": encoded_summary(summary),
        }
        return {
            "id": done["id"], "object": "response.compaction", "created_at": done["created_at"],
            "output": [*turn.wire["user_items"], item], "usage": done["usage"],
        }


def is_user_message(message: Message) -> bool:
    """Return True for a message that the user wrote, not one with tool results."""
    return message.role == "user" and not message.has_results


def user_message_item(message: Message) -> Json:
    """Return the input item of a user's message, without its images."""
    texts = [block["text"] for block in message.content if block["type"] == "text"]
    parts = [{"type": "input_text", "text": text} for text in texts]
    return {"id": new_id("msg_"), "type": "message", "role": "user", "content": parts}


COMPACTION = CompactionDialect()


# ==== 17. Claude protocol ====================================================
# What is said to claude and what its lines mean. Pure: no pipes, no processes. Facts about the
# protocol were measured on the versions that the contract tests run (2.1.197 and the newest).

#: The oldest claude that the contract tests have run against.
OLDEST_CLAUDE = (2, 1, 197)
#: The first tested claude on which "client_composed" keeps slash commands from being run.
CLIENT_COMPOSED_SINCE = (2, 1, 329)
#: The first tested claude that can forget the only question it was asked; older ones need an
#: answer in front of the question that they are to forget.
REWINDS_ALL_SINCE = (2, 1, 329)

Version = tuple[int, ...]

#: The tool that claude gives the model when an answer has to fit a schema.
STRUCTURED_OUTPUT = "StructuredOutput"
#: Names that claude gives a meaning of its own: with a tool called ToolSearch it would hold back
#: all other tools of the client.
_TAKEN_NAMES = (STRUCTURED_OUTPUT, "ToolSearch", *PROTOTYPE_NAMES)
#: The longest result that claude takes for a call; above, it keeps a preview only.
MAX_RESULT_CHARS = 400_000
#: The name under which claude knows the client's tools.
TOOL_SERVER = "client"

#: Variables of the server's environment that claude gets; a name may end in a star. Nothing else
#: is passed on: what is not listed cannot point claude back at this server or leak a key.
CHILD_ENVIRONMENT = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "TERM",
    "TMPDIR", "XDG_*", "DBUS_SESSION_BUS_ADDRESS", "CLAUDE_CONFIG_DIR",
    "CLAUDE_CODE_OAUTH_TOKEN", "SSL_CERT_FILE", "SSL_CERT_DIR", "NODE_EXTRA_CA_CERTS",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)

#: Variables that every claude gets. They keep it from reading files that a message names, from
#: loading memory, from asking the API again in its own ways, from updating itself, and from
#: writing down what is said: it logs failed tool calls word for word below XDG_CACHE_HOME, which
#: cannot be made where this one is.
FIXED_ENVIRONMENT = {
    "CLAUDE_AGENT_SDK_MCP_NO_PREFIX": "1",
    # claude would refuse some 90 small images, which it takes for 2,000 tokens each: the API knows.
    "CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE": "1000000000",
    "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1",
    "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
    "CLAUDE_CODE_DISABLE_CLAUDE_MDS": "1",
    "CLAUDE_CODE_DISABLE_LEGACY_MODEL_REMAP": "1",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "1",
    "CLAUDE_CODE_DISABLE_REFUSAL_FALLBACK": "1",
    "CLAUDE_CODE_DISABLE_REFUSAL_RETRY": "1",
    "CLAUDE_CODE_DISABLE_TERMINAL_TITLE": "1",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_AUTO_COMPACT": "1",
    "DISABLE_COMPACT": "1",
    "ENABLE_MCP_LARGE_OUTPUT_FILES": "0",
    "MAX_MCP_OUTPUT_TOKENS": "100000000",
    "MAX_STRUCTURED_OUTPUT_RETRIES": "2",
    "XDG_CACHE_HOME": "/dev/null/none",
}
#: Outside agent mode: claude does not listen for other sessions of the same user.
_RESTRICTED = {"CLAUDE_CODE_RESTRICTED": "1"}


def _is_named(name: str, patterns: Iterable[str]) -> bool:
    return any(
        name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1]))
        for pattern in patterns
    )


def child_environment(environ: Mapping[str, str], config: Config) -> dict[str, str]:
    """The environment of a claude process: the allow-list, what the operator names, the fixed.

    A variable that holds one of the server's own keys is left out unless the operator names it,
    because claude reads text of strangers.
    """
    named = listed(config.pass_env)
    keys = {key for key in config.secrets if len(key) >= 8}
    passed = {
        name: value
        for name, value in environ.items()
        if _is_named(name, named)
        or (_is_named(name, CHILD_ENVIRONMENT) and value not in keys and not is_key(value))
    }
    return {
        **passed, **FIXED_ENVIRONMENT, **({} if config.is_agent else _RESTRICTED),
        "CLAUDE_CODE_MAX_RETRIES": str(config.max_retries),
    }


def _tool_arguments(config: Config) -> list[str]:
    """Which tools claude has: none of its own, or in agent mode those of the operator."""
    if not config.is_agent:
        return ["--tools", "", "--strict-mcp-config", "--allowedTools", f"mcp__{TOOL_SERVER}"]
    allowed: tuple[str, ...] = DEFAULT_AGENT_TOOLS
    if config.allowed_tools != "default":
        allowed = listed(config.allowed_tools)
    arguments = ["--strict-mcp-config", "--allowedTools", f"mcp__{TOOL_SERVER}", *allowed]
    if config.skip_permissions:
        arguments.append("--dangerously-skip-permissions")
    else:
        arguments += ["--tools", ",".join(allowed)]
    if config.mcp_config:
        arguments += ["--mcp-config", os.path.expanduser(config.mcp_config)]
    return arguments


def claude_arguments(model_id: str, config: Config) -> list[str]:
    """The arguments of a process that idles until it is told what to do.

    Outside agent mode it has no tools; it never has settings of its user, slash commands or
    memory on disk.
    """
    return [
        "-p",
        "--input-format", "stream-json",
        "--output-format", "stream-json",
        "--verbose",
        "--include-partial-messages",
        "--model", model_id,
        "--setting-sources", "",
        "--disable-slash-commands",
        "--no-session-persistence",
        "--thinking-display", "summarized",
        *_tool_arguments(config),
    ]


def _line(value: Json) -> bytes:
    return to_json(value) + b"\n"


def _object(value: object) -> Json:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def control_line(subtype: str, **fields: object) -> bytes:
    """A control request. claude answers each one by its id."""
    request = {"subtype": subtype, **fields}
    return _line({"type": "control_request", "request_id": new_id("r"), "request": request})


def _reply_line(request_id: object, response: Json) -> bytes:
    success = {"subtype": "success", "request_id": request_id, "response": response}
    return _line({"type": "control_response", "response": success})


def _refusal_line(request_id: object) -> bytes:
    """The answer to a control request of claude's own that asks for what is not served here."""
    response = {"subtype": "error", "request_id": request_id, "error": "not supported"}
    return _line({"type": "control_response", "response": response})


def wire_name(name: str) -> str:
    """The name of a tool as the API takes it: most are, others get an equivalent."""
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) and name not in _TAKEN_NAMES:
        return name
    tail = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:50] + "_" + tail


def earlier_call(block: Block, tools: Mapping[str, Tool]) -> Block:
    """Return a call of the history with its arguments as the model wrote them; `tools` has the
    tools by name."""
    tool = tools.get(block["name"])
    if tool is None or not (tool.wrapped or tool.renamed):
        return block
    own_names = {own: name for name, own in tool.renamed}
    arguments = rename_properties(block["input"], own_names)
    return {**block, "input": {WRAPPER_NAME: arguments} if tool.wrapped else arguments}


def mcp_content(blocks: list[Block]) -> list[Json] | None:
    """A tool result as MCP has it; None when it has no form there, or is too long for it."""
    content: list[Json] = []
    if sum(len(str(block.get("text", ""))) for block in blocks) > MAX_RESULT_CHARS:
        return None
    for block in blocks:
        source = block.get("source", {})
        if block["type"] == "text":
            content.append({"type": "text", "text": block["text"]})
        elif block["type"] == "image" and source.get("type") == "base64":
            media_type = source["media_type"]
            content.append({"type": "image", "data": source["data"], "mimeType": media_type})
        else:
            return None
    return content


class ToolServer:
    """The client's tools as claude sees them: an MCP server, spoken to in control requests.

    Pure: lines in, lines out. A call is left unanswered until the client brings its result, maybe
    much later; claude asks for one call at a time, so results may come before their calls.
    """

    def __init__(self, tools: tuple[Tool, ...]) -> None:
        self._tools = tools
        self._calls: dict[str, tuple[object, object]] = {}
        self._results: dict[str, Json] = {}

    def reply(self, line: Json) -> bytes:
        """The answer to a control request of claude's; empty when it has to wait."""
        message = _object(_object(line.get("request")).get("message"))
        if not message:
            return _refusal_line(line.get("request_id"))
        if message.get("method") == "tools/call":
            return self._call(line.get("request_id"), message)
        result = self._results_by_method(message)
        answer: Json = {"jsonrpc": "2.0", "id": message.get("id", 0)}
        if result is None:
            answer["error"] = {"code": -32601, "message": "not served here"}
        else:
            answer["result"] = result
        return _reply_line(line.get("request_id"), {"mcp_response": answer})

    def _results_by_method(self, message: Json) -> Json | None:
        method = message.get("method")
        if method == "initialize":
            return {
                "protocolVersion": _object(message.get("params")).get("protocolVersion"),
                "capabilities": {"tools": {}},
                "serverInfo": {"name": TOOL_SERVER, "version": "1"},
            }
        if method == "tools/list":
            return {
                "tools": [
                    {
                        "name": wire_name(tool.name),
                        "description": tool.description,
                        "inputSchema": tool.schema,
                        # Longer results would go to a file, and a preview to the model.
                        "_meta": {"anthropic/maxResultSizeChars": MAX_RESULT_CHARS},
                    }
                    for tool in self._tools
                ]
            }
        return {} if str(method).startswith("notifications/") or method == "ping" else None

    def _call(self, request_id: object, message: Json) -> bytes:
        meta = _object(_object(message.get("params")).get("_meta"))
        call_id = plain_id(str(meta.get("claudecode/toolUseId", "")))
        self._calls[call_id] = (request_id, message.get("id"))
        return self._answers()

    def deliver(self, results: Iterable[Block]) -> bytes:
        """Takes the client's results; what can be told to claude now."""
        for block in results:
            content = mcp_content(block["content"]) or []
            result = {"content": content, "isError": bool(block.get("is_error"))}
            self._results[block["tool_use_id"]] = result
        return self._answers()

    def _answers(self) -> bytes:
        lines = b""
        for call_id in [call_id for call_id in self._calls if call_id in self._results]:
            request_id, rpc_id = self._calls.pop(call_id)
            result = self._results.pop(call_id)
            response = {"jsonrpc": "2.0", "id": rpc_id, "result": result}
            lines += _reply_line(request_id, {"mcp_response": response})
        return lines


def escape_slash_command(content: list[Block], version: Version) -> list[Block]:
    """The content such that no version takes its last text for a slash command.

    Versions before CLIENT_COMPOSED_SINCE do so unless a space comes first.
    """
    last = content[-1] if content else {}
    text = last.get("text")
    if version >= CLIENT_COMPOSED_SINCE or not isinstance(text, str) or text[:1] != "/":
        return content
    return [*content[:-1], {**last, "text": " " + text}]


class RewindPoint(NamedTuple):
    """The last question that a claude was asked. It can be made to forget it."""

    #: A UUID, by which claude knows the line that asked.
    id: str
    #: How many messages of the conversation came before it.
    place: int


def rewind_point_of(turn: Turn) -> RewindPoint | None:
    """The question that a turn asks. Results of tool calls are none: claude cannot forget them
    by themselves."""
    if turn.messages[-1].has_results:
        return None
    return RewindPoint(str(uuid.uuid4()), len(turn.messages) - 1)


#: claude scales an image of a longer side, or of more bytes, but not in results of tools that it is
#: told about. The API refuses it there, the longer side at least where there are many images.
_MAX_UNSCALED_SIDE = 2_000
_MAX_UNSCALED_BYTES = 3_932_160
#: The head of an image, in which its sides stand, as base64.
_HEAD_CHARS = 349_524
#: Where a format has its sides: how it begins, the offsets, the bytes of each, their order, and
#: what is missing in the number.
_SIDES_AT: tuple[tuple[bytes, tuple[int, int], int, Literal["big", "little"], int], ...] = (
    (rb"\x89PNG", (16, 20), 4, "big", 0),
    (rb"GIF8", (6, 8), 2, "little", 0),
    (rb"RIFF....WEBPVP8X", (24, 27), 3, "little", 1),
    (rb"RIFF....WEBPVP8 ", (26, 28), 2, "little", 0),
)
#: The markers of JPEG that begin a frame.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def largest_side(head: bytes) -> int:
    """Return the longer side of an image in pixels, by how it begins; 0 when that does not say."""
    if head.startswith(b"\xff\xd8"):
        return _largest_jpeg_side(head)
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return max(bits & 0x3FFF, bits >> 14 & 0x3FFF) + 1
    for begin, offsets, width, order, missing in _SIDES_AT:
        if re.match(begin, head, re.DOTALL):
            return max(int.from_bytes(head[at: at + width], order) for at in offsets) + missing
    return 0


def _largest_jpeg_side(head: bytes) -> int:
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        if head[at + 1] in _JPEG_FRAMES:
            return max(int.from_bytes(head[place: place + 2], "big") for place in (at + 5, at + 7))
        # A marker may have more of its first byte in front.
        at += 1 if head[at + 1] == 0xFF else 2 + int.from_bytes(head[at + 2: at + 4], "big")
    return 0


def _needs_scaling(block: Block) -> bool:
    data = block["source"].get("data") or ""
    head = binascii.a2b_base64(data[:_HEAD_CHARS])
    return base64_bytes(data) > _MAX_UNSCALED_BYTES or largest_side(head) > _MAX_UNSCALED_SIDE


def beside_results(content: list[Block]) -> list[Block]:
    """Return a user's content with the images that need scaling behind the results that hold
    them, where claude scales them; a text tells which is which."""
    behind: list[Block] = []

    def kept(block: Block) -> Block:
        if block["type"] != "image" or not _needs_scaling(block):
            return block
        name = f"Image {len(behind) // 2 + 1} of the results"
        behind.extend([{"type": "text", "text": f"{name}:"}, block])
        return {"type": "text", "text": f"[{name} is below.]"}

    results = [
        {**block, "content": [kept(inner) for inner in block["content"]]}
        for block in content if block["type"] == "tool_result"
    ]
    rest = [block for block in content if block["type"] != "tool_result"]
    return [*results, *behind, *rest] if behind else content


def message_line(
    message: Message, version: Version, *, ask: bool, question: RewindPoint | None = None
) -> bytes:
    """One message of the conversation. With `ask`, claude answers it; else it is history."""
    body: Json = {"role": message.role, "content": message.content}
    line: Json = {
        "type": message.role,
        "message": body,
        "parent_tool_use_id": None,
        "session_id": "default",
    }
    if message.role == "assistant":
        # 2.1.197 joins answers without an id, even across the results between them.
        body["id"] = new_id("msg_")
        body["content"] = [
            {**block, "name": wire_name(block["name"])} if block["type"] == "tool_use" else block
            for block in message.content
        ]
    else:
        body["content"] = escape_slash_command(beside_results(message.content), version)
        # Without this the newer versions run slash commands and read files named with an @.
        line["client_composed"] = True
        if not ask:
            line["shouldQuery"] = False
        if question is not None:
            line["uuid"] = question.id
    return _line(line)


def _choice_body(choice: ToolChoice) -> Json | None:
    """The API's tool_choice; None where it is the default."""
    if choice.kind == "auto" and choice.parallel:
        return None
    body: Json = {"type": choice.kind}
    if choice.kind == "tool":
        body["name"] = wire_name(choice.name)
    if not choice.parallel and choice.kind != "none":
        body["disable_parallel_tool_use"] = True
    return body


#: Descriptions of tools above this length are cut by claude.
_MAX_DESCRIPTION_CHARS = 2_000


def tools_body(tools: tuple[Tool, ...]) -> list[Json]:
    """The tools as the API has them, if claude would not pass them on as they are; else nothing."""
    texts = [tool.description for tool in tools]
    if all(text.isascii() and len(text) <= _MAX_DESCRIPTION_CHARS for text in texts):
        return []
    return [
        {
            "name": wire_name(tool.name),
            "description": tool.description,
            "input_schema": tool.schema,
        }
        for tool in sorted(tools, key=lambda tool: wire_name(tool.name))
    ]


def settings_lines(
    options: Options, choice: ToolChoice, tools: tuple[Tool, ...] = ()
) -> bytes:
    """The control requests that carry the options of one request; nothing when there are none.

    `tools` are given if they are all that the model gets: then they can be passed untouched.
    """
    extra: Json = dict(options.sampling)
    body = tools_body(tools)
    if body:
        extra["tools"] = body
    if options.sent_stops:
        extra["stop_sequences"] = list(options.sent_stops)
    choice_body = _choice_body(choice)
    if choice_body is not None:
        extra["tool_choice"] = choice_body
    env: dict[str, str] = {}
    if options.max_tokens is not None:
        env["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(max(1, options.max_tokens))
    if extra:
        env["CLAUDE_CODE_EXTRA_BODY"] = to_json(extra).decode("utf-8")
    settings: Json = {}
    if env:
        settings["env"] = env
    if options.effort is not None:
        settings["effortLevel"] = options.effort
    lines = control_line("apply_flag_settings", settings=settings) if settings else b""
    if options.thinking_tokens is not None:
        lines += _thinking_line(options)
    return lines


def _thinking_line(options: Options) -> bytes:
    """The control request that says how much to think."""
    return control_line("set_max_thinking_tokens", max_thinking_tokens=options.thinking_tokens)


def _without_thinking_in_a_loop(turn: Turn) -> Options:
    """The options of a conversation that is told anew. A model that thinks by budget has to get
    the thinking behind a call back together with its result, and that cannot be told."""
    if turn.messages[-1].has_results and turn.model.thinking == "budget":
        return turn.options._replace(thinking_tokens=0)
    return turn.options


#: What stands for the user's part before a conversation that the assistant opens.
_OPENING = "(The user opens the conversation.)"


def conversation(
    turn: Turn, operator_prompt: str, version: Version, *, agent: bool = False,
    question: RewindPoint | None = None,
) -> list[bytes]:
    """What to write to a fresh process: steps, each to be followed by waiting for a `result`.

    The last step asks. Earlier ones lay down the history, one user message each: sent without
    waiting, claude would lose their order. Assistant messages get no reply of their own.
    """
    system = "\n\n".join(text for text in (turn.system, operator_prompt.strip()) if text)
    fields: Json = {"systemPrompt": [system] if system else [], "hooks": None}
    tools, choice = turn.offered
    if tools:
        fields["sdkMcpServers"] = [TOOL_SERVER]
    if turn.output_schema is not None:
        fields["jsonSchema"] = turn.output_schema.schema
    alone = not agent and turn.output_schema is None
    pending = control_line("initialize", **fields)
    options = _without_thinking_in_a_loop(turn)
    pending += settings_lines(options, choice, tools if alone else ())
    steps = []
    by_name = {tool.name: tool for tool in turn.tools}
    earlier = turn.messages[:-1]
    if earlier and earlier[0].role == "assistant":
        # claude loses an answer that nothing comes before.
        earlier = [Message("user", text_blocks(_OPENING)), *earlier]
    for message in earlier:
        # Thinking of earlier answers is dropped by claude in any case.
        kept = [
            earlier_call(block, by_name) if block["type"] == "tool_use" else block
            for block in message.content if "thinking" not in block["type"]
        ]
        pending += message_line(Message(message.role, kept), version, ask=False)
        if message.role == "user":
            steps.append(pending)
            pending = b""
    asked = message_line(turn.messages[-1], version, ask=True, question=question)
    return [*steps, pending + asked]


def continuation(turn: Turn, version: Version, question: RewindPoint | None = None) -> bytes:
    """What to write to a process that holds everything but the last message. It may have been
    told the rest in the middle of a loop, without thinking."""
    thinks = turn.model.thinking == "budget" and turn.options.thinking_tokens
    again = _thinking_line(turn.options) if thinks else b""
    return again + message_line(turn.messages[-1], version, ask=True, question=question)


def rewind_line(question: RewindPoint) -> bytes:
    """What makes an idle claude forget the last question and all that came of it."""
    return control_line("rewind_conversation", target_message_uuid=question.id)


def was_rewound(reply: Json) -> bool:
    """Whether claude has forgotten, by its answer to `rewind_line`."""
    return _object(_object(reply.get("response")).get("response")).get("rewound") is True


class ReportedWindow(NamedTuple):
    """What claude last said about a limit of the plan."""

    rejected: bool
    resets_at_s: float | None


class ReportedFailure(NamedTuple):
    """A failure as claude reports it: prose, a word for its kind, the API's status if any."""

    text: str
    word: str
    status: int | None


LOGIN_ADVICE = (
    "claude on the server is not logged in: run `claude auth login` there, or on a machine "
    "without a browser `claude setup-token` and set CLAUDE_CODE_OAUTH_TOKEN for the server."
)

_BY_STATUS: dict[int, type[OcpError]] = {
    400: BadRequest, 401: LoginLost, 402: PlanLimit, 403: UpstreamForbidden, 404: UnknownModel,
    408: UpstreamTimeout, 413: TooLarge, 429: RateLimited, 504: UpstreamTimeout,
    529: Overloaded,
}
#: Words that say more than the status beside them.
_BEFORE_STATUS: dict[str, type[OcpError]] = {
    "account_on_hold": UpstreamForbidden,
    "billing_error": PlanLimit,
    "cloud_credential_error": UpstreamForbidden,
    "verification_required": UpstreamForbidden,
}
#: Failures of the account that come with a status of the request's, by their prose. As a 400 an
#: agent would take them for a fault of its history and cut that.
_ACCOUNT_FAILURES: tuple[tuple[re.Pattern[str], type[OcpError]], ...] = (
    (
        re.compile(
            r"out of (?:extra )?usage|(?:usage )?credits? (?:are |is )?required|credits_required"
            r"|extra usage is required|credit balance is too low|spend(?:ing)?[ _]limit",
            re.IGNORECASE,
        ),
        PlanLimit,
    ),
    (
        re.compile(
            r"(?:organi[sz]ation|account|workspace) (?:has been|is|was) "
            r"(?:disabled|suspended|deactivated|banned|on hold)"
            r"|disabled organi[sz]ation|account_on_hold|verification_required",
            re.IGNORECASE,
        ),
        UpstreamForbidden,
    ),
)
#: The statuses that such a failure may have; without one it counts too.
_ACCOUNT_STATUSES = (None, 400, 402, 403, 429)
_BY_WORD: dict[str, type[OcpError]] = {
    "authentication_failed": LoginLost,
    "oauth_org_not_allowed": LoginLost,
    "rate_limit": RateLimited,
    "invalid_request": BadRequest,
    "model_not_found": UnknownModel,
    "overloaded": Overloaded,
}
#: What claude adds to the API's own message: how it heard it, and advice for its own terminal.
_ADDED_PROSE = re.compile(
    r"^(?:Failed to authenticate\. )?(?:API Error: )?(?:\d{3} )?"
    r"|\.? This is a server-side issue.*$|\.? Run --model to pick.*$"
)
#: A login that was taken back comes as a 403.
_LOST = re.compile(r"token.*(?:revoked|expired)", re.IGNORECASE)
_RATE_LIMIT_PAUSE_S = 20.0
_OVERLOAD_PAUSE_S = 10.0


def upstream_error(
    complaint: ReportedFailure, window: ReportedWindow | None, now_s: float
) -> OcpError:
    """The error that a client is told for a failure that claude reports.

    The API's status decides, then claude's word for it; prose only makes the message.
    """
    kind = (
        _BEFORE_STATUS.get(complaint.word)
        or _BY_STATUS.get(complaint.status or 0)
        or _BY_WORD.get(complaint.word, UpstreamFailed)
    )
    message = without_paths(redacted(_ADDED_PROSE.sub("", one_line(complaint.text, 1000))))
    message = message or "claude reported a failure without a word about it."
    for words, what in _ACCOUNT_FAILURES if complaint.status in _ACCOUNT_STATUSES else ():
        kind = what if words.search(message) else kind
    if kind is RateLimited and window is not None and window.rejected:
        kind = PlanLimit
    if kind is PlanLimit:
        resets_at_s = window.resets_at_s if window else None
        if resets_at_s is None:
            return PlanLimit(message)
        # Some clients show nothing but the message.
        resets = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(resets_at_s))
        told = f"{message.rstrip('.')}. The limit resets at {resets}."
        return PlanLimit(told, retry_after_s=resets_at_s - now_s)
    if kind is LoginLost or (kind is UpstreamForbidden and _LOST.search(message)):
        return LoginLost(f"{LOGIN_ADVICE} (It said: {message})")
    if kind is BadRequest and "prompt is too long" in message.lower():
        return ContextTooLong(message, param="messages")
    if kind is UnknownModel:
        return UnknownModel(message, param="model")
    pauses = {RateLimited: _RATE_LIMIT_PAUSE_S, Overloaded: _OVERLOAD_PAUSE_S}
    return kind(message, retry_after_s=pauses.get(kind))


def _count(usage: Json, name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) else 0


#: Tables in the API's usage object that Anthropic's clients get as they are.
_USAGE_TABLES = ("cache_creation", "server_tool_use")


def usage_of(found: object, before: Usage = NO_USAGE) -> Usage:
    """The API's usage object; counts that it leaves out are taken from `before`."""
    if not isinstance(found, dict):
        return before
    details = found.get("output_tokens_details")
    thinking = details.get("thinking_tokens") if isinstance(details, dict) else None
    return Usage(
        input_tokens=_count(found, "input_tokens") or before.input_tokens,
        output_tokens=_count(found, "output_tokens") or before.output_tokens,
        cache_read_tokens=_count(found, "cache_read_input_tokens") or before.cache_read_tokens,
        cache_write_tokens=(
            _count(found, "cache_creation_input_tokens") or before.cache_write_tokens
        ),
        reasoning_tokens=thinking if isinstance(thinking, int) else before.reasoning_tokens,
        tables={
            **before.tables,
            **{name: found[name] for name in _USAGE_TABLES if isinstance(found.get(name), dict)},
        },
    )


def added_usage(usages: Iterable[Usage]) -> Usage:
    """Return what several answers took together, in the four kinds of tokens that there are."""
    added = NO_USAGE
    for usage in usages:
        added = Usage(
            added.input_tokens + usage.input_tokens, added.output_tokens + usage.output_tokens,
            added.cache_read_tokens + usage.cache_read_tokens,
            added.cache_write_tokens + usage.cache_write_tokens,
        )
    return added


#: No reset is later than this.
_LATEST_S = 10**11


class PlanReport(NamedTuple):
    """What claude says about the plan at one time. Everything in it may be unknown."""

    #: By the API's names for them: five_hour, seven_day, seven_day_opus, ...
    windows: Mapping[str, PlanWindow]
    status: str | None = None
    #: The window that decides.
    claim: str | None = None
    overage_status: str | None = None
    overage_reason: str | None = None
    subscription: str | None = None


class PlanWindow(NamedTuple):
    """A window of the plan."""

    #: The used share, 0 to 1.
    utilization: float | None
    resets_at_s: float | None
    status: str | None


def _text_in(found: Json, name: str) -> str | None:
    value = found.get(name)
    return value if isinstance(value, str) else None


def _reset_in(found: Json, name: str) -> float | None:
    """A moment that is given in epoch seconds or in ISO 8601."""
    value = found.get(name)
    with contextlib.suppress(ValueError):
        value = epoch_of(value) if isinstance(value, str) else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 < value < _LATEST_S else None


def _share_in(found: Json, whole: float) -> float | None:
    value = found.get("utilization")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # More than the whole is possible where more can be bought.
    return round(value / whole, 4) if 0 <= value <= 10 * whole else None


def plan_window(line: Json) -> ReportedWindow | None:
    """What a rate_limit_event says of the limit that decides; None for any other line."""
    found = line.get("rate_limit_info")
    if line.get("type") != "rate_limit_event" or not isinstance(found, dict):
        return None
    resets_at_s = _reset_in(found, "resetsAt")
    # A plain 429, which is no limit of a plan, is "rejected" too, but names no window.
    names_window = "rateLimitType" in found or resets_at_s is not None
    return ReportedWindow(found.get("status") == "rejected" and names_window, resets_at_s)


def plan_event(line: Json) -> PlanReport | None:
    """What a rate_limit_event tells; None for any other line, and for one that names no window,
    such as that of a plain 429."""
    found = line.get("rate_limit_info")
    if line.get("type") != "rate_limit_event" or not isinstance(found, dict):
        return None
    claim = _text_in(found, "rateLimitType")
    if claim is None:
        return None
    told = found.get("unifiedWindows")
    windows = {
        name: PlanWindow(
            _share_in(entry, 1), _reset_in(entry, "resetsAt"), _text_in(entry, "status")
        )
        for name, entry in (told.items() if isinstance(told, dict) else ())
        if isinstance(entry, dict)
    }
    status = _text_in(found, "status")
    windows.setdefault(claim, PlanWindow(_share_in(found, 1), _reset_in(found, "resetsAt"), status))
    return PlanReport(
        windows, status, claim,
        overage_status=_text_in(found, "overageStatus"),
        overage_reason=_text_in(found, "overageDisabledReason"),
    )


#: What lets claude ask the API how much of the plan is used, which its fixed environment forbids,
#: and what forbids it again.
_MAY_READ_USAGE = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": ""}
_MUST_NOT_READ_USAGE = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}


def usage_lines() -> list[bytes]:
    """What asks an idle process about the plan, and leaves it as it was: three requests, with an
    answer each. The second answer is the one that `plan_report` reads."""
    return [
        control_line("apply_flag_settings", settings={"env": _MAY_READ_USAGE}),
        control_line("get_usage", skip_behaviors=True),
        control_line("apply_flag_settings", settings={"env": _MUST_NOT_READ_USAGE}),
    ]


def plan_report(reply: Json) -> PlanReport:
    """What the answer to get_usage tells. A login by a bare token knows nothing."""
    found = _object(_object(reply.get("response")).get("response"))
    limits = _object(found.get("rate_limits"))
    windows = {
        name: PlanWindow(_share_in(entry, 100), _reset_in(entry, "resets_at"), None)
        for name, entry in limits.items()
        if isinstance(entry, dict) and "resets_at" in entry
    }
    return PlanReport(windows, subscription=_text_in(found, "subscription_type"))


#: Delta types of the API's stream: the kind of our Delta, and the field with the text.
_DELTA_KINDS = {
    "text_delta": ("text", "text"),
    "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("signature", "signature"),
    "input_json_delta": ("arguments", "partial_json"),
}
#: Types of blocks that clients get to see as they are.
_PLAIN_BLOCKS = ("text", "thinking", "redacted_thinking")


#: Tools that claude lists in its `init` line under another name than the model gets.
_UNLISTED_NAMES = {"Task": "Agent"}


class StructuredAnswer:
    """What one message says of an answer that has to fit a shape: a call of claude's own tool,
    which claude accepts or not."""

    def __init__(self, output_schema: OutputSchema | None) -> None:
        self._exact = output_schema.exact if output_schema is not None else None
        #: The block of the call, and its arguments in pieces.
        self.block_index: int | None = None
        self.pieces: list[str] = []
        #: Whether the message ended with the call, and whether claude took it. Either comes first.
        self.stopped = False
        self.accepted = False

    @property
    def is_complete(self) -> bool:
        """Whether the call is there and claude has accepted it."""
        return self.stopped and self.accepted

    def check(self) -> None:
        """Raise UpstreamFailed for an answer that claude accepts and the client could not."""
        if self._exact is None:
            return
        try:
            value = from_json("".join(self.pieces))
            fit = fits(value, self._exact, self._exact.get("$defs", {}))
        except (ValueError, RecursionError):
            fit = False
        if not fit:
            raise UpstreamFailed("The model's answer does not fit the schema; ask again.")


class TurnReader:
    """Reads the lines of one running turn: `events` turns each into what it means.

    The turn is over for the client when the API gives a stop reason, not when claude prints its
    `result`: in between, claude may ask the API again by itself (after max_tokens it does), which
    nobody wants. Types of lines that are not known are skipped; new ones will come. Blocks are
    numbered anew, without those that no client should see.
    """

    def __init__(
        self,
        tools: tuple[Tool, ...] = (),
        shape: OutputSchema | None = None,
        *,
        final_only: bool = False,
        clock: Clock = time.time,
    ) -> None:
        """`final_only`: of several rounds that claude goes by itself, only the last is told."""
        self._clock = clock
        self._final_only = final_only
        #: What the current round said, while it may not be the last.
        self._round: list[Event] = []
        self._tools = {wire_name(tool.name): tool for tool in tools}
        self._shape = shape
        self._shaped = StructuredAnswer(shape)
        self._usage = NO_USAGE
        #: What the API took for messages before the current one.
        self._usages: list[Usage] = []
        #: The numbers that blocks of the current message go out under; others stay hidden.
        self._numbers: dict[int, int] = {}
        self._next_number = 0
        #: Whether the message had a delta: then a new message voids it. And whether it had one
        #: that is part of an answer, which thinking is not.
        self._spoken = False
        self._answered = False
        #: Whether the model called a tool of the client's, and whether claude goes on by itself
        #: because it called only others: its own in agent mode, or none that there are.
        self._called = False
        self._goes_on = False
        #: Whether the text of an earlier round ended in the middle of a line.
        self._mid_line = False
        self._line_ended = False
        #: What takes the JSON of a block to the client's form, where the two differ.
        self._forms: dict[int, ClientJsonConverter] = {}
        self._prose: list[str] = []
        self._complaint: ReportedFailure | None = None
        self.window: ReportedWindow | None = None
        self.finished = False
        #: How often claude said that it asks the API again.
        self.retries = 0

    def events(self, line: Json) -> list[Event]:
        """What this line means. Raises the OcpError of a failure that it reports."""
        found = self._meaning(line)
        if not self._final_only:
            return found
        self._round += found
        if not self.finished:
            return []
        told, self._round = self._round, []
        return told

    @property
    def spent(self) -> Usage:
        """What the API says that it took so far, for messages that came to nothing too."""
        return added_usage([*self._usages, self._usage])

    def _meaning(self, line: Json) -> list[Event]:
        kind = line.get("type")
        if kind == "stream_event":
            event = line.get("event")
            return self._stream_event(event) if isinstance(event, dict) else []
        if kind == "assistant":
            self._note_synthetic_error(line)
        elif kind == "user":
            return self._tool_outcome(line.get("message"))
        elif kind == "rate_limit_event":
            self.window = plan_window(line) or self.window
        elif kind == "system" and line.get("subtype") == "init":
            self._check_offered(line)
        elif kind == "system" and line.get("subtype") == "api_retry":
            self.retries += 1
        elif kind == "control_response":
            check_control_response(line)
        elif kind == "result":
            return self._ending(line)
        return []

    def _stream_event(self, event: Json) -> list[Event]:
        kind = event.get("type")
        index = _count(event, "index")
        if kind == "message_start":
            return self._start(event.get("message"))
        if kind == "content_block_start":
            return self._block_start(index, event.get("content_block"))
        if kind == "content_block_delta":
            return self._delta(index, event.get("delta"))
        if kind == "content_block_stop":
            return self._block_stop(index)
        if kind == "message_delta":
            return self._stop(event)
        return []

    def _start(self, message: object) -> list[Event]:
        found = message if isinstance(message, dict) else {}
        self._usages.append(self._usage)
        self._usage = usage_of(found.get("usage"))
        self._numbers = {}
        self._prose.clear()
        self._shaped = StructuredAnswer(self._shape)
        self._forms.clear()
        started = Started(str(found.get("id", "")), str(found.get("model", "")), self._usage)
        if self._goes_on:
            self._goes_on = False
            return self._next_round(started)
        again = self._spoken
        self._next_number = 0
        self._spoken = self._answered = self._called = False
        return [Restarted(), started] if again else [started]

    def _next_round(self, started: Started) -> list[Event]:
        """Claude goes on after tools that no client sees: one answer, in the same message."""
        if self._final_only:
            self._round.clear()
            self._next_number = 0
            return [started]
        return []

    # -- blocks -------------------------------------------------------------------------------

    def _block_start(self, index: int, block: object) -> list[Event]:
        found = block if isinstance(block, dict) else {}
        shown = self._shown(index, found)
        if shown is None:
            return []
        number = self._numbers[index] = self._next_number
        self._next_number += 1
        began: list[Event] = [BlockStarted(number, shown)]
        if shown["type"] == "text" and self._mid_line:
            # Rounds are paragraphs of one answer.
            began.append(Delta(number, "text", "\n\n"))
        self._mid_line = False
        return began

    def _shown(self, index: int, block: Json) -> Block | None:
        """The block as clients see it; None for one that they do not."""
        kind, name = block.get("type"), str(block.get("name"))
        if kind == "tool_use" and self._shape is not None and name == STRUCTURED_OUTPUT:
            self._shaped.block_index = index
            self._note_form(index, self._shape)
            return {"type": "text", "text": ""}
        if kind == "tool_use" and name in self._tools:
            self._spoken = self._answered = self._called = True
            tool, call_id = self._tools[name], plain_id(str(block.get("id")))
            self._note_form(index, tool)
            return {"type": "tool_use", "id": call_id, "name": tool.name, "input": {}}
        if kind == "text" and self._shape is not None:
            # Prose beside a shaped answer; kept in case that it is all there is.
            return None
        return dict(block) if kind in _PLAIN_BLOCKS else None

    def _note_form(self, index: int, told: Tool | OutputSchema) -> None:
        if told.wrapped or told.renamed:
            self._forms[index] = ClientJsonConverter(wrapped=told.wrapped, renamed=told.renamed)

    def _delta(self, index: int, delta: object) -> list[Event]:
        found = delta if isinstance(delta, dict) else {}
        kind, field = _DELTA_KINDS.get(str(found.get("type")), ("", ""))
        text = found.get(field)
        if not kind or not isinstance(text, str):
            return []
        number = self._numbers.get(index)
        if number is None:
            if kind == "text":
                self._prose.append(text)
            return []
        is_shaped = index == self._shaped.block_index
        if is_shaped:
            kind = "text"
            self._shaped.pieces.append(text)
        if index in self._forms:
            text = self._forms[index].feed(text)
        if not text and (is_shaped or index in self._forms):
            return []
        self._spoken = True
        self._answered = self._answered or (bool(text) and kind in ("text", "arguments"))
        self._line_ended = text.endswith("\n")
        return [Delta(number, kind, text)]

    def _block_stop(self, index: int) -> list[Event]:
        number = self._numbers.get(index)
        if number is None:
            return []
        rest = self._forms[index].close() if index in self._forms else ""
        kind = "text" if index == self._shaped.block_index else "arguments"
        stopped = BlockStopped(number)
        return [Delta(number, kind, rest), stopped] if rest else [stopped]

    # -- endings ------------------------------------------------------------------------------

    def _stop(self, event: Json) -> list[Event]:
        found = event.get("delta")
        delta = found if isinstance(found, dict) else {}
        self._usage = usage_of(event.get("usage"), self._usage)
        reason = delta.get("stop_reason")
        if not isinstance(reason, str):
            return []
        if reason == "tool_use" and self._called:
            return self._finish(reason)
        if reason == "tool_use" and self._shaped.block_index is not None:
            self._shaped.stopped = True
            return self._shaped_end()
        if reason == "tool_use":
            # claude runs its own tools, or says that there is no such tool, and asks again.
            self._goes_on = True
            self._mid_line = self._answered and not self._final_only and not self._line_ended
            return []
        if reason == "end_turn" and not self._answered:
            # An answer without a word is none: claude asks again by itself, or its result tells.
            return []
        details = delta.get("stop_details")
        return self._finish(
            reason, _text_in(delta, "stop_sequence"), details if isinstance(details, dict) else None
        )

    def _finish(
        self, reason: str, sequence: str | None = None, details: Json | None = None
    ) -> list[Event]:
        self.finished = True
        return [Finished(reason, sequence, self._usage, details)]

    def _tool_outcome(self, message: object) -> list[Event]:
        """Whether claude accepted a shaped answer; it may say so before or after the stop."""
        found = message if isinstance(message, dict) else {}
        content = found.get("content")
        for block in content if isinstance(content, list) else ():
            if isinstance(block, dict) and block.get("type") == "tool_result":
                called = self._shaped.block_index is not None
                self._shaped.accepted = called and not block.get("is_error")
        return self._shaped_end()

    def _shaped_end(self) -> list[Event]:
        if not self._shaped.is_complete:
            return []
        self._shaped.check()
        return self._finish("end_turn")

    def _check_offered(self, line: Json) -> None:
        """Raises BadRequest when claude does not offer the model what it was told to, and
        UpstreamFailed when it has not asked for the tools. It says so before it asks the API."""
        names, servers = line.get("tools"), line.get("mcp_servers")
        if not isinstance(names, list):
            return
        listed = {_UNLISTED_NAMES.get(name, name) for name in names if isinstance(name, str)}
        missing = [tool.name for name, tool in self._tools.items() if name not in {*names, *listed}]
        found = servers if isinstance(servers, list) else []
        states = [_object(each).get("status") for each in found
                  if _object(each).get("name") == TOOL_SERVER]
        if missing and states not in ([], ["connected"]):
            raise UpstreamFailed("claude did not ask for the client's tools; try again.")
        if missing:
            raise BadRequest(
                f"tools: claude does not take {', '.join(missing)}; simplify the schema.",
                param="tools",
            )
        if self._shape is not None and STRUCTURED_OUTPUT not in names:
            raise BadRequest(
                "response_format: claude does not take the schema of the answer; simplify it.",
                param="response_format",
            )

    def _note_synthetic_error(self, line: Json) -> None:
        """Failures come as a message of a model called <synthetic>: prose, never content."""
        found = line.get("message")
        message = found if isinstance(found, dict) else {}
        if message.get("model") != "<synthetic>" and not line.get("error"):
            return
        content = message.get("content")
        blocks = content if isinstance(content, list) else [{"text": content}]
        texts = [block.get("text") for block in blocks if isinstance(block, dict)]
        status = line.get("api_error_status")
        self._complaint = ReportedFailure(
            text=" ".join(text for text in texts if isinstance(text, str)),
            word=str(line.get("error") or ""),
            status=status if isinstance(status, int) else None,
        )

    def _ending(self, line: Json) -> list[Event]:
        """What a `result` before the end of an answer means: a refusal to fit the shape, or a
        failure, which is raised."""
        complaint = self._complaint or ReportedFailure("", "", None)
        status = line.get("api_error_status")
        if isinstance(status, int):
            complaint = complaint._replace(status=status)
        unfit = not line.get("is_error") or "structured_output" in str(line.get("subtype"))
        if self._shape is not None and unfit and not complaint.text and complaint.status is None:
            return self._refusal()
        if not complaint.text and line.get("is_error"):
            errors = line.get("errors")
            reasons = errors if isinstance(errors, list) else []
            text = str(line.get("result") or "; ".join(str(reason) for reason in reasons))
            complaint = complaint._replace(text=text or f"claude ended: {line.get('subtype')}")
        if complaint.text or complaint.status:
            error = upstream_error(complaint, self.window, self._clock())
            status = complaint.status or error.status
            error.refused_upstream = status in (401, 429) or status >= 500
            raise error
        raise EmptyAnswer("The model ended its turn without an answer.")

    def _refusal(self) -> list[Event]:
        """The model gave no answer of the wanted shape: what it said instead."""
        said = "".join(self._prose).strip()
        words = said or "The model did not give an answer of the wanted form."
        again: list[Event] = [Restarted()] if self._spoken else []
        return [*again, Delta(0, "refusal", words), *self._finish("end_turn")]


def check_control_response(line: Json) -> None:
    """Raises UpstreamFailed when claude refused a control request."""
    found = line.get("response")
    response = found if isinstance(found, dict) else {}
    if response.get("subtype") == "error":
        reason = without_paths(redacted(one_line(str(response.get("error")))))
        raise UpstreamFailed(f"claude refused a request of its protocol: {reason}")


def check_history_result(line: Json) -> None:
    """Raises UpstreamFailed when claude did not take a message of the history."""
    if line.get("is_error"):
        reason = without_paths(redacted(one_line(str(line.get("result")))))
        raise UpstreamFailed(f"claude did not take the conversation: {reason}")


# ==== 18. Claude process =====================================================
# The program on disk, one child of it, its pipes, and its end. A ClaudeProcess belongs to the
# thread that uses it; that thread waits for the pipes and for the client's socket in one
# selector, so a client that leaves, a silence and an answer are all noticed at once. Children
# live in process groups of their own and die with the server, even when it is killed.


class Client(Protocol):
    """The far end of a request, as far as waiting is concerned."""

    def fileno(self) -> int:
        """The descriptor to wait on."""

    def gone(self) -> bool:
        """Whether it has hung up. Keeps what it sent ahead of time. Never blocks."""

    def can_detect_hangup(self) -> bool:
        """Whether it can still be seen to hang up."""

    def leave(self) -> None:
        """Makes it seem to have hung up, to who waits for it too."""


class WaitLimits(NamedTuple):
    """What a wait looks out for, besides what it waits for."""

    client: Client
    #: When the whole request has to be over, on the monotonic clock.
    deadline_s: float
    #: Silence after which a Tick is due; 0 = never.
    tick_s: float


class TurnInput(NamedTuple):
    """What to tell a process: lines to write in steps (see `conversation`), and the results of
    the tool calls that its last answer ended with."""

    steps: list[bytes]
    results: Iterable[Block] = ()


class Program(NamedTuple):
    """A claude program that can be used."""

    #: How to start it: the first words of its command line.
    command: tuple[str, ...]
    version: Version

    @property
    def version_text(self) -> str:
        """The version as people write it."""
        return ".".join(str(part) for part in self.version)


INSTALL_ADVICE = (
    "install it on the server with `npm install -g @anthropic-ai/claude-code@latest`, "
    "or name it in CLAUDE_BIN"
)
_USUAL_PLACES = (
    "~/.local/bin/claude", "~/.claude/local/claude", "/opt/homebrew/bin/claude",
    "/usr/local/bin/claude", "/usr/bin/claude", "~/.npm-global/bin/claude", "~/.bun/bin/claude",
)
_VERSION_PROBE_TIMEOUT_S = 20
#: More than this is not read of what a command prints.
_MAX_SHOWN_BYTES = 256 * 1024
#: After a version that could not be told, or was too old, this long without asking again.
_VERSION_RETRY_S = 30.0
#: A program that is missing for less than this may be on its way back. Until then it is asked for
#: its version more often, and clients are told to come back so soon.
_MAX_AWAY_S = 60.0
_AWAY_RETRY_S = 5.0
#: Where a version stands in what `--version` prints, the surest place first: notices come with it,
#: and may name versions of other things.
_VERSION_PLACES = tuple(
    re.compile(pattern, re.MULTILINE) for pattern in (
        r"(\d+)\.(\d+)\.(\d+)\S* \(Claude Code\)",
        r"^\s*v?(\d+)\.(\d+)\.(\d+)",
        r"\b(\d+)\.(\d+)\.(\d+)",
    )
)


def version_in(text: str) -> Version | None:
    """Return the version of claude in what it prints; None if there is none."""
    for place in _VERSION_PLACES:
        found = place.search(text)
        if found is not None:
            return tuple(int(part) for part in found.groups())
    return None


def _check_age(version: Version) -> None:
    """Raises ClaudeTooOld."""
    if version < OLDEST_CLAUDE:
        raise ClaudeTooOld(
            f"claude {'.'.join(map(str, version))} on the server is older than "
            f"{'.'.join(map(str, OLDEST_CLAUDE))}: run `claude update` there."
        )


def cannot_start(problem: OSError) -> OcpError:
    """The error of a program that the system did not start: is it no program, or is the machine
    short of something?"""
    if problem.errno in (errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR):
        return ClaudeMissing(
            f"The claude program does not start ({problem.strerror}): {INSTALL_ADVICE}."
        )
    return UpstreamFailed(
        f"The server could not start claude ({problem.strerror}).", retry_after_s=5
    )


class ProbeResult(NamedTuple):
    """What was found out about a program file, and until when that holds."""

    command: tuple[str, ...]
    stamp: object
    program: Program | None
    error: OcpError | None
    until_s: float


_NO_VARIABLES: Mapping[str, str] = MappingProxyType({})


class ClaudeProgram:
    """Finds claude and its version. Asks for the version again when the file changes."""

    def __init__(
        self, config: Config, environ: Mapping[str, str], command: tuple[str, ...],
        clock: Clock = time.monotonic,
    ) -> None:
        """`command` replaces the search: the demo's own command line."""
        self._config = config
        self._environ = environ
        self._command = command
        self._clock = clock
        # Held while a version is asked for, so that it is done once. The field below is replaced
        # as a whole, and may be read without it.
        self._asking = threading.Lock()
        self._verdict: ProbeResult | None = None
        #: When it was last seen to be there.
        self._seen_s = -math.inf

    def resolve(self) -> Program:
        """The program. Raises ClaudeMissing, ClaudeAway or ClaudeTooOld. Blocks for a version's
        time when the file is new, or when the last failure is a while ago."""
        verdict = self._known()
        if verdict is None:
            with self._asking:
                verdict = self._known() or self._probe()
                self._verdict = verdict
        if verdict.error is not None:
            raise self.tempered(verdict.error)
        assert verdict.program is not None
        self._seen_s = self._clock()
        return verdict.program

    def tempered(self, error: OcpError) -> OcpError:
        """Return the error to raise for this one: of a program that was there within the last
        minute, that it will be back."""
        if not isinstance(error, ClaudeMissing) or not self._is_away():
            return error
        return ClaudeAway(
            "The claude program is away at the moment, as while it is updated; try again soon.",
            retry_after_s=_AWAY_RETRY_S,
        )

    def _is_away(self) -> bool:
        return self._clock() - self._seen_s < _MAX_AWAY_S

    def correct(self, version: Version) -> None:
        """Take the word of a process for its version: the file behind a script that starts claude
        can be exchanged without a change of the script."""
        with self._asking:
            verdict = self._verdict
            if verdict is None or verdict.program in (None, Program(verdict.command, version)):
                return
            try:
                _check_age(version)
                program = Program(verdict.command, version)
                self._verdict = verdict._replace(program=program)
            except ClaudeTooOld as error:
                until_s = self._clock() + _VERSION_RETRY_S
                self._verdict = verdict._replace(program=None, error=error, until_s=until_s)

    def glance(self) -> tuple[Program | None, OcpError | None]:
        """What is known without asking: the program, or why there is none, or neither yet."""
        try:
            command = self._command or (self._path(),)
            self._stamp_of(command)
        except OcpError as error:
            return None, error
        verdict = self._verdict
        return (verdict.program, verdict.error) if verdict is not None else (None, None)

    def _known(self) -> ProbeResult | None:
        """The last verdict, as long as it holds."""
        verdict = self._verdict
        if verdict is None or self._clock() >= verdict.until_s:
            return None
        with contextlib.suppress(OcpError):
            return verdict if self._stamp_of(verdict.command) == verdict.stamp else None
        return None

    def _probe(self) -> ProbeResult:
        command: tuple[str, ...] = ()
        stamp: object = None
        try:
            command = self._command or (self._path(),)
            stamp = self._stamp_of(command)
            program = Program(command, self._ask_version(command))
        except OcpError as error:
            # A failure may heal by itself; a program that is missing is looked for each time.
            pause_s = _AWAY_RETRY_S if self._is_away() else _VERSION_RETRY_S
            until_s = self._clock() + (pause_s if command else 0)
            return ProbeResult(command, stamp, None, error, until_s)
        return ProbeResult(command, stamp, program, None, math.inf)

    def _path(self) -> str:
        named = os.path.expanduser(self._config.claude_bin)
        if named:
            path = shutil.which(named, path=self._environ.get("PATH"))
            if path is None:
                raise ClaudeMissing(f"CLAUDE_BIN does not name a program: {INSTALL_ADVICE}.")
            # claude runs in another folder than the server.
            return os.path.abspath(path)
        found = shutil.which("claude", path=self._environ.get("PATH"))
        for place in () if found else _USUAL_PLACES:
            found = found or shutil.which(os.path.expanduser(place))
        if not found:
            raise ClaudeMissing(f"The claude program was not found: {INSTALL_ADVICE}.")
        return os.path.abspath(found)

    def _stamp_of(self, command: tuple[str, ...]) -> object:
        try:
            status = os.stat(command[0])
        except OSError:
            raise ClaudeMissing(f"The claude program was not found: {INSTALL_ADVICE}.") from None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _ask_version(self, command: tuple[str, ...]) -> Version:
        try:
            shown = self._shown_by([*command, "--version"])
        except OSError as problem:
            raise cannot_start(problem) from None
        except subprocess.TimeoutExpired:
            raise ClaudeMissing(
                f"The claude program does not answer `--version`: {INSTALL_ADVICE}."
            ) from None
        version = version_in(shown.decode("utf-8", "replace"))
        if version is None:
            raise ClaudeMissing(
                f"The claude program does not tell its version: {INSTALL_ADVICE}."
            )
        _check_age(version)
        return version

    def has_login(self, variables: Mapping[str, str]) -> bool:
        """Return whether claude says that it is logged in, with these variables besides its
        others. Blocks as long as the question takes. False when it cannot be asked."""
        with contextlib.suppress(OcpError, OSError, subprocess.TimeoutExpired, ValueError):
            command = [*self.resolve().command, "auth", "status"]
            return _object(from_json(self._shown_by(command, variables))).get("loggedIn") is True
        return False

    def _shown_by(self, command: list[str], variables: Mapping[str, str] = _NO_VARIABLES) -> bytes:
        """What a command prints, or the beginning of it. Raises OSError, and TimeoutExpired when
        it takes too long. It is ended then, and with it all that it started: it may be a script
        around claude."""
        env = {**child_environment(self._environ, self._config), **variables}
        with subprocess.Popen(
            command, env=env, start_new_session=True, bufsize=0,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        ) as popen:
            assert popen.stdout is not None
            try:
                shown = _read_some(popen.stdout.fileno(), _VERSION_PROBE_TIMEOUT_S)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    popen.wait(_END_GRACE_S)
                return shown
            finally:
                with contextlib.suppress(OSError):
                    os.killpg(popen.pid, signal.SIGKILL)


def _read_some(descriptor: int, timeout_s: float) -> bytes:
    """What can be read up to the end, or to as much as is wanted. Raises TimeoutExpired."""
    give_up_s = time.monotonic() + timeout_s
    waiting, shown = select.poll(), b""
    waiting.register(descriptor, select.POLLIN)
    while len(shown) < _MAX_SHOWN_BYTES:
        left_s = give_up_s - time.monotonic()
        if left_s <= 0 or not waiting.poll(left_s * 1000):
            raise subprocess.TimeoutExpired("claude", timeout_s)
        piece = os.read(descriptor, 65_536)
        if not piece:
            break
        shown += piece
    return shown


def work_folder(config: Config, environ: Mapping[str, str]) -> str:
    """Return the folder that claude runs in, which is there now.

    claude tells every model its path: outside agent mode it says nothing of the owner, is empty,
    and stays the same, so that the API's prompt cache goes on working. Not the root folder:
    2.1.197 lists all files below.
    """
    if config.is_agent:
        folder = os.path.expanduser(config.agent_folder) or os.path.join(config.home_path, "empty")
        with contextlib.suppress(OSError):
            os.makedirs(folder, mode=0o700, exist_ok=True)
        return folder
    home = os.path.realpath(environ.get("HOME") or os.path.expanduser("~"))
    parent = os.path.realpath(environ.get("TMPDIR") or tempfile.gettempdir())
    if os.path.commonpath([home, parent]) == home != "/":
        parent = "/tmp"
    folder = os.path.join(parent, f"ocp-{os.getuid()}")
    with contextlib.suppress(OSError):
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if os.lstat(folder).st_uid != os.getuid() or os.path.islink(folder):
            # It is somebody else's, who would choose what claude finds there.
            return tempfile.mkdtemp(prefix="ocp-", dir=parent)
    return folder


def left_files(
    pid: int, env: Mapping[str, str], folder: str, platform: str = sys.platform
) -> list[str]:
    """Return what a claude that was killed may leave behind: the socket on which it listens for
    other sessions, and on macOS the folder of its logs, which hold failed tool calls word for
    word; `folder` is where it ran."""
    runtime = env.get("XDG_RUNTIME_DIR") or env.get("CLAUDE_CODE_TMPDIR") or env.get("TMPDIR")
    sockets = (os.path.join(runtime or "/tmp", "cc-socks"), f"/tmp/cc-socks-{os.getuid()}")
    left = [os.path.join(sockets_of, f"{pid}.sock") for sockets_of in sockets]
    if platform == "darwin" and env.get("HOME"):
        # Elsewhere XDG_CACHE_HOME says where they go.
        caches = os.path.join(env["HOME"], "Library", "Caches", "claude-cli-nodejs")
        name = re.sub(r"[^a-zA-Z0-9]", "-", os.path.realpath(folder))
        left.append(os.path.join(caches, name))
    return left


#: What claude needs to know of the account; nothing of it says who the owner is.
_ACCOUNT_FIELDS = (
    "accountUuid", "organizationUuid", "organizationType", "billingType", "accountCreatedAt",
    "subscriptionCreatedAt", "hasExtraUsageEnabled", "ccOnboardingFlags", "userRateLimitTier",
    "organizationRateLimitTier", "seatTier",
)
#: As if the profile had been fetched in 2100: claude then does not ask for it, and so does not
#: learn the address anew.
_NEVER_FETCH_MS = 4_102_444_800_000


class ClaudeFolder:
    """The configuration folder of the claudes that the server starts.

    From its owner's own folder, claude takes the owner's e-mail address into the first message of
    every conversation (2.1.197 to 2.1.332). In this folder it finds the account without address
    and names. The login stays where it is, and only claude reads it: an empty
    CLAUDE_SECURESTORAGE_CONFIG_DIR means the place of old.

    Where claude finds no login that way but does with the owner's folder, that one is used after
    all: seen nowhere, but the keychain of macOS was not tried. `is_private` says which.
    """

    def __init__(
        self, path: str, environ: Mapping[str, str], log: Log,
        logged_in: Callable[[Mapping[str, str]], bool] | None = None,
    ) -> None:
        """`logged_in` says whether claude has a login with more variables; None = it always has
        the same one, whatever its folder."""
        self._path = path
        self._log = log
        self._logged_in = logged_in
        own = environ.get("CLAUDE_CONFIG_DIR", "")
        home = environ.get("HOME") or os.path.expanduser("~")
        self._source = os.path.join(own or home, ".claude.json")
        self._credentials = os.path.join(
            own or os.path.join(home, ".claude"), ".credentials.json"
        )
        self._variables = {"CLAUDE_CONFIG_DIR": path, "CLAUDE_SECURESTORAGE_CONFIG_DIR": own}
        # Guards the two fields below and the file. Held while claude is asked for its login, once.
        self._lock = threading.Lock()
        self._checked = logged_in is None
        self.is_private = True

    def environment(self) -> dict[str, str]:
        """Return the variables that lead a claude to the folder, which is made ready; none where
        the owner's folder has to do."""
        with self._lock:
            try:
                self._prepare()
            except OSError as problem:
                self._give_up(f"{self._path} cannot be written: {problem}")
            if not self._checked:
                self._check()
            return dict(self._variables) if self.is_private else {}

    def login_stamp(self) -> object:
        """Return what changes whenever claude's credentials do, where they are in a file."""
        try:
            status = os.stat(self._credentials)
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def login_changed(self) -> None:
        """Look at the next start again where claude has its login."""
        with self._lock:
            self._checked, self.is_private = self._logged_in is None, True

    def _check(self) -> None:
        assert self._logged_in is not None
        self._checked = True
        if not self._logged_in(self._variables) and self._logged_in({}):
            self._give_up("claude has its login in its own folder only")

    def _give_up(self, why: str) -> None:
        if self.is_private:
            self._log.event(
                "warn", "owner_not_hidden", error=why,
                help="claude tells the e-mail address of its login to whoever asks",
            )
        self.is_private = False

    def _prepare(self) -> None:
        """Brings the file of the folder up to date. Raises OSError."""
        os.makedirs(self._path, mode=0o700, exist_ok=True)
        path = os.path.join(self._path, ".claude.json")
        found = _json_object_of(path)
        account = _object(_json_object_of(self._source).get("oauthAccount"))
        wanted: Json = {name: account[name] for name in _ACCOUNT_FIELDS if name in account}
        wanted["profileFetchedAt"] = _NEVER_FETCH_MS
        if found.get("oauthAccount") != wanted or not found.get("hasCompletedOnboarding"):
            told = {**found, "hasCompletedOnboarding": True, "oauthAccount": wanted}
            write_private(path, to_json(told).decode("utf-8"))


def _json_object_of(path: str) -> Json:
    """The JSON object in a file of claude's; empty if there is none to be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return _object(from_json(file.read()))
    except (OSError, ValueError):
        return {}


#: Kills the process groups that are left when the server's end of the pipe closes.
_GUARDIAN_SOURCE = """
import os, signal, sys, time
left = set()
for line in sys.stdin:
    (left.add if line[0] == "+" else left.discard)(int(line[1:]))
for number in (signal.SIGINT, signal.SIGKILL):
    for group in left:
        try:
            os.killpg(group, number)
        except OSError:
            pass
    time.sleep(0.5 if left else 0)
"""


class Watchdog:
    """A tiny process that outlives the server by a moment and ends the children left behind.

    A claude that is answering does not notice that the server was killed; this one does.
    """

    def __init__(self) -> None:
        # Guards everything below. Held for a write of a few bytes or for starting the process.
        self._lock = threading.Lock()
        self._groups: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None

    def watch(self, group: int) -> None:
        """From now on this process group must not outlive the server. Raises OSError."""
        with self._lock:
            self._groups.add(group)
            if self._process is None or not self._told(f"+{group}\n"):
                self._restart()

    def forget(self, group: int) -> None:
        """This process group is gone."""
        with self._lock:
            self._groups.discard(group)
            self._told(f"-{group}\n")

    def _told(self, text: str) -> bool:
        """Whether the guardian is there and took this."""
        if self._process is None or self._process.stdin is None:
            return False
        try:
            self._process.stdin.write(text.encode("ascii"))
        except (OSError, ValueError):
            return False
        return True

    def _restart(self) -> None:
        """Starts one that knows every group. Raises OSError."""
        self._end()
        # Its interpreter may need to find its library; nothing else of the environment is its.
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARDIAN_SOURCE],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            bufsize=0, start_new_session=True, cwd="/", env=kept,
        )
        self._told("".join(f"+{group}\n" for group in self._groups))

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                process.wait(_END_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def close(self) -> None:
        """Ends it, and with it whatever it still watches. Blocks for two seconds at most."""
        with self._lock:
            self._end()


#: How long a process gets to end by itself before it is killed.
_END_GRACE_S = 2.0
#: How long claude may take to answer a control request, and how long it may say nothing.
_ANSWER_TIMEOUT_S = 20.0
#: A claude that still works at its start may take longer: many may start at once on a slow machine.
_MAX_START_S = 60.0
#: A line longer than this is no line of claude's, and who prints so much between two of claude's
#: lines is not claude. Each line that means nothing counts as some more bytes than it has.
_MAX_CLAUDE_LINE_BYTES = 64 * 1024 * 1024
_LINE_COST_BYTES = 100
_STDERR_KEPT_BYTES = 4096
#: Lines that claude prints in a turn: what it was told before has arrived.
_TURN_LINES = ("assistant", "result", "stream_event", "system", "user")
_CONTROL_REQUEST = b'{"type":"control_request"'
_PRESENCE_ID = "presence"


def presence_line() -> bytes:
    """What asks claude whether it is there: in the middle of a turn too, and without effect."""
    request = {"subtype": "mcp_status"}
    return _line({"type": "control_request", "request_id": _PRESENCE_ID, "request": request})


def _answers_presence(line: Json) -> bool:
    return _object(line.get("response")).get("request_id") == _PRESENCE_ID


def processor_s(pid: int) -> float:
    """Return how long a process has worked; 0 where the system does not say."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Patience:
    """How long a claude is waited for that may hang: it answers control requests in time, and it
    is never silent for long. While the API makes it wait, it is asked whether it is there."""

    def __init__(self, now_s: float) -> None:
        #: When it last said something, or was first waited for.
        self._heard_s = now_s
        #: Control requests without an answer, and since when.
        self._owed = 0
        self._owed_since_s = now_s
        self._was_asked = False

    def told(self, data: bytes, now_s: float) -> None:
        """Notes what claude is told."""
        count = data.startswith(_CONTROL_REQUEST) + data.count(b"\n" + _CONTROL_REQUEST)
        if count and not self._owed:
            self._owed_since_s = now_s
        self._owed += count

    def asked(self) -> None:
        """Notes that claude was asked whether it is there."""
        self._was_asked = True

    def heard(self, line: Json, now_s: float) -> bool:
        """Notes a line, and returns whether it is one of those that show that claude is there."""
        kind = line.get("type")
        if kind in _TURN_LINES:
            self._owed = 0
        elif kind != "control_response":
            return False
        elif not _answers_presence(line):
            self._owed = max(0, self._owed - 1)
        self._heard_s, self._was_asked = now_s, False
        return True

    def excuse(self, span_s: float) -> None:
        """Leaves a time out of account in which nobody listened to claude."""
        self._heard_s += span_s
        self._owed_since_s += span_s

    def ask_at_s(self) -> float:
        """When to ask claude whether it is there; never twice for one silence."""
        return math.inf if self._was_asked else self._heard_s + _ANSWER_TIMEOUT_S / 2

    def ends_at_s(self) -> float:
        """When claude has to be taken for one that hangs."""
        silent_s = self._heard_s if self._was_asked else math.inf
        owed_s = self._owed_since_s if self._owed else math.inf
        return min(silent_s, owed_s) + _ANSWER_TIMEOUT_S


class ClaudeProcess:
    """One child. It serves one caller, one conversation at a time, and is then dismissed."""

    def __init__(
        self,
        command: Iterable[str],
        model_id: str,
        config: Config,
        *,
        env: Mapping[str, str],
        cwd: str,
        version: Version = OLDEST_CLAUDE,
        watchdog: Watchdog | None = None,
        notice: Callable[[Json], None] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Starts it. `notice` gets what it says about the plan, whenever it says it, and about
        its version if that is not `version`; it must not block. Raises ClaudeMissing,
        UpstreamFailed when it cannot be started."""
        self.model_id = model_id
        self.version = version
        self.born_s = clock()
        self._clock = clock
        self._watchdog = watchdog
        self._notice = notice
        #: The client's tools, for whoever asks for them in claude.
        self.tools = ToolServer(())
        #: Whether it hangs, or prints what is not claude's: it is of no use any more.
        self.broken = False
        #: Whether it says that it is of another version than it was started as.
        self.misjudged = False
        #: How many questions it was made to forget.
        self.rewinds = 0
        #: How many messages it was told before its first question: others may begin with the same.
        self.told = 0
        self._unread = bytearray()
        #: How much of it is known to hold no end of a line.
        self._searched = 0
        #: What it printed since the last line that shows that it is there.
        self._noise_bytes = 0
        self._patience = Patience(clock())
        #: Whether it ever said anything, and how long it had worked when it was last looked at.
        self._spoke = False
        self._worked_s = 0.0
        self._unsent = bytearray()
        self._stderr_tail = bytearray()
        #: When the client last got something; silence is counted from there.
        self._spoke_s = 0.0
        #: Whether claude has said that what it was last asked is over.
        self._settled = True
        self._ended = False
        self._kill_at_s: float | None = None
        self._popen = self._started([*command, *claude_arguments(model_id, config)], env, cwd)
        self._left_files = left_files(self._popen.pid, env, cwd)
        if config.is_agent:
            # The folder, and so its logs, may be the owner's too.
            del self._left_files[2:]
        pipes = (self._popen.stdin, self._popen.stdout, self._popen.stderr)
        self._stdin, self._stdout, self._stderr = (
            pipe.fileno() for pipe in pipes if pipe is not None
        )
        for descriptor in (self._stdin, self._stdout, self._stderr):
            os.set_blocking(descriptor, False)

    def _started(
        self, command: list[str], env: Mapping[str, str], cwd: str
    ) -> subprocess.Popen[bytes]:
        """The child, watched by the guardian. Raises ClaudeMissing, UpstreamFailed."""
        try:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                bufsize=0, start_new_session=True, cwd=cwd, env=dict(env),
            )
        except OSError as problem:
            raise cannot_start(problem) from None
        try:
            if self._watchdog is not None:
                self._watchdog.watch(popen.pid)
        except OSError as problem:
            with popen:
                popen.kill()
            raise cannot_start(problem) from None
        return popen

    def __repr__(self) -> str:
        state = "leaving" if self._kill_at_s else "ended" if self._ended else "alive"
        return f"<claude {self.model_id} pid={self._popen.pid} {state}>"

    @property
    def pid(self) -> int:
        """Its process id, which is its process group's too."""
        return self._popen.pid

    def alive(self) -> bool:
        """Whether it still runs and is of use."""
        return not self.broken and self._popen.poll() is None

    # -- talking ------------------------------------------------------------------------------

    def converse(self, script: TurnInput, watch: WaitLimits, reader: TurnReader) -> Iterator[Event]:
        """The events of the answer, Ticks among them.

        With results of tool calls the turn that asked for them goes on, and no step is needed.
        Ends after Finished. Raises what went wrong: an error that claude reports, its death,
        UpstreamTimeout at the deadline, ClientGone. One that hangs is `broken` then.
        """
        self._spoke_s = self._clock()
        self._patience = Patience(self._spoke_s)
        # A failure may be kept, and with it all that its traceback leads to.
        with contextlib.closing(self._lines(watch)) as lines:
            if not script.results and not self._settled:
                yield from self._until_result(lines)
            for step in script.steps[:-1]:
                self._tell(step)
                yield from self._until_result(lines)
            self._tell(self.tools.deliver(script.results) + b"".join(script.steps[-1:]))
            self._settled = False
            for line in lines:
                events = [Tick()] if line is None else reader.events(line)
                if events:
                    yield from events
                    self._spoke_s = self._clock()
                if reader.finished:
                    return

    def control(self, requests: list[bytes], watch: WaitLimits) -> list[Json]:
        """The answers to control requests, in their order, after what it was asked before is over.
        Raises what `converse` raises."""
        self._patience = Patience(self._clock())
        answers: list[Json] = []
        with contextlib.closing(self._lines(watch)) as lines:
            if not self._settled:
                # An answer may be complete before claude says that its turn is over.
                for _ in self._until_result(lines):
                    pass
            self._tell(b"".join(requests))
            for line in lines:
                if line is not None and line.get("type") == "control_response":
                    check_control_response(line)
                    answers.append(line)
                if len(answers) == len(requests):
                    break
        return answers

    def _tell(self, data: bytes) -> None:
        self._unsent += data
        self._patience.told(data, self._clock())

    def _until_result(self, lines: Iterator[Json | None]) -> Iterator[Event]:
        """Waits until claude has taken a message of the history."""
        for line in lines:
            if line is None:
                yield Tick()
            elif line.get("type") == "control_response":
                check_control_response(line)
            elif line.get("type") == "result":
                check_history_result(line)
                return

    def _lines(self, watch: WaitLimits) -> Generator[Json | None, None, None]:
        """Each line that claude prints, and None whenever the client has had nothing for `tick_s`:
        there are lines that mean nothing to it. Raises UpstreamFailed when claude hangs."""
        if watch.client.gone():
            # One that was made to leave shows nothing on its socket.
            raise ClientGone
        with self._selector(watch.client) as selector:
            while True:
                yield from self._heard_lines()
                if self._ended:
                    if watch.client.gone():
                        raise ClientGone
                    raise self._death()
                until_s = min(watch.deadline_s, self._wait_until_s())
                self._flush(selector)
                if watch.tick_s:
                    until_s = min(until_s, self._spoke_s + watch.tick_s)
                for key, _ in selector.select(max(0.0, until_s - self._clock())):
                    key.data(selector)
                now_s = self._clock()
                if now_s >= watch.deadline_s:
                    raise UpstreamTimeout("The answer took longer than CLAUDE_TIMEOUT allows.")
                if watch.tick_s and now_s - self._spoke_s >= watch.tick_s:
                    self._spoke_s = now_s
                    # Something that it started may hold its pipes open after its end.
                    self._ended = self._ended or not self.alive()
                    yield None
                    self._patience.excuse(self._clock() - now_s)

    def _heard_lines(self) -> Iterator[Json]:
        """The complete lines read so far, but for what is no business of who asks."""
        for line in self._take_lines():
            if not _answers_presence(line):
                yield line
            # Only now: the time that the client takes for a line is not claude's.
            if self._patience.heard(line, self._clock()):
                self._noise_bytes, self._spoke = 0, True

    def _wait_until_s(self) -> float:
        """Until when to wait for claude, which is asked whether it is there when it is silent.
        Raises UpstreamFailed when it hangs."""
        now_s = self._clock()
        if now_s >= self._patience.ends_at_s() and not self._still_starts():
            self.broken = True
            raise UpstreamFailed(
                f"claude on the server hung: it gave no answer for {_ANSWER_TIMEOUT_S:.0f} s."
            )
        if now_s >= self._patience.ask_at_s():
            self._unsent += presence_line()
            self._patience.asked()
            self._worked_s = processor_s(self.pid)
        return min(self._patience.ask_at_s(), self._patience.ends_at_s())

    def _still_starts(self) -> bool:
        """Whether it has not said anything yet, but is at work; it gets more time then."""
        worked_s, self._worked_s = self._worked_s, processor_s(self.pid)
        is_young = self._clock() - self.born_s < _MAX_START_S
        if self._spoke or not is_young or self._worked_s <= worked_s:
            return False
        self._patience.excuse(_ANSWER_TIMEOUT_S / 2)
        return True

    def _selector(self, client: Client) -> selectors.BaseSelector:
        def client_speaks(selector: selectors.BaseSelector) -> None:
            if client.gone():
                raise ClientGone
            if not client.can_detect_hangup():
                # It sent more than is kept for later: from now on its end cannot be seen.
                selector.unregister(client.fileno())

        selector = selectors.DefaultSelector()
        selector.register(self._stdout, selectors.EVENT_READ, self._read_stdout)
        selector.register(self._stderr, selectors.EVENT_READ, self._read_stderr)
        selector.register(client.fileno(), selectors.EVENT_READ, client_speaks)
        return selector

    def _read_stdout(self, _selector: object) -> None:
        piece = self._read(self._stdout)
        self._ended = self._ended or piece == b""
        self._unread += piece or b""
        self._check_noise(len(self._unread))

    def _read_stderr(self, selector: selectors.BaseSelector | None) -> None:
        piece = self._read(self._stderr)
        if piece == b"" and selector is not None:
            selector.unregister(self._stderr)
        self._stderr_tail += piece or b""
        del self._stderr_tail[:-_STDERR_KEPT_BYTES]
        self._noise_bytes += len(piece or b"")
        self._check_noise(self._noise_bytes)

    def _check_noise(self, size_bytes: int) -> None:
        """Raises UpstreamFailed when this is more than claude can have printed."""
        if size_bytes > _MAX_CLAUDE_LINE_BYTES:
            self.broken = True
            self._unread.clear()
            self._searched = 0
            raise UpstreamFailed("claude on the server printed too much that means nothing.")

    def _read(self, descriptor: int) -> bytes | None:
        """What is there to read: empty at the end, None when there is nothing yet."""
        try:
            return os.read(descriptor, 262_144)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _flush(self, selector: selectors.BaseSelector) -> None:
        """Writes what the pipe takes, and waits for room only while something is left."""
        left = self._write_some()
        waits = self._stdin in selector.get_map()
        if left and not waits:
            selector.register(self._stdin, selectors.EVENT_WRITE, self._flush)
        elif waits and not left:
            selector.unregister(self._stdin)

    def _write_some(self) -> bool:
        """Writes what the pipe takes; whether something is left."""
        try:
            while self._unsent:
                written = os.write(self._stdin, self._unsent[:262_144])
                del self._unsent[:written]
        except BlockingIOError:
            return True
        except OSError:
            # It is ending; what it has to say about that is on its other pipes.
            self._unsent.clear()
        return False

    def _take_lines(self) -> Iterator[Json]:
        """The complete lines read so far, parsed. What is no JSON object is no line of claude's:
        a plugin's print, say. Half an object is worse: something of the answer is lost."""
        while True:
            end = self._unread.find(b"\n", self._searched)
            if end < 0:
                self._searched = len(self._unread)
                return
            raw = bytes(self._unread[:end]).strip()
            del self._unread[: end + 1]
            self._searched = 0
            self._noise_bytes += len(raw) + _LINE_COST_BYTES
            self._check_noise(self._noise_bytes)
            if not raw.startswith(b"{"):
                continue
            try:
                line = from_json(raw)
            except ValueError:
                raise UpstreamFailed("claude printed a line that is broken.") from None
            if isinstance(line, dict):
                self._note(line)
                yield line

    def _note(self, line: Json) -> None:
        """Does what a line asks for, whoever listens."""
        kind = line.get("type")
        if kind == "control_request":
            self._unsent += self.tools.reply(line)
        self._settled = self._settled or kind == "result"
        # It comes behind the end of an answer, when nobody listens any more.
        is_news = kind == "rate_limit_event"
        if kind == "system" and line.get("subtype") == "init":
            told = version_in(str(line.get("claude_code_version")))
            is_news = self.misjudged = told not in (None, self.version)
        if is_news and self._notice is not None:
            self._notice(line)

    def idle(self) -> None:
        """Reads and answers what claude says by itself while nobody uses it, or its pipes would
        fill up. Blocks on nothing."""
        self._last_lines()
        self._write_some()

    def _death(self) -> OcpError:
        """What to say about a process that ended in the middle of its work."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(1)
        rest = self._read(self._stderr)
        self._stderr_tail += rest or b""
        words = self._stderr_tail.decode("utf-8", "replace").strip()
        last = words.splitlines()[-1] if words else "it said nothing"
        last = without_paths(redacted(one_line(last)))
        if "unknown option" in last:
            return ClaudeTooOld(f"claude on the server is too old, run `claude update`: {last}")
        code = self._popen.returncode
        how = "is closing" if code is None else f"signal {-code}" if code < 0 else f"exit {code}"
        return UpstreamFailed(f"claude ended before its answer was complete ({how}): {last}")

    # -- ending -------------------------------------------------------------------------------

    def stop(self, *, graceful: bool) -> None:
        """Begins its end and returns at once; `is_gone` tells when it has come.

        Kindly: it may finish what it does, which is nothing after a complete answer. Otherwise
        SIGINT: claude then drops its request to the API at once and asks for nothing more; with
        SIGTERM it was seen to send another request first, and SIGKILL leaves files behind.
        """
        if self._kill_at_s is not None:
            return
        self._kill_at_s = self._clock() + _END_GRACE_S
        if not graceful:
            self._signal(signal.SIGINT)
        if self._popen.stdin is not None:
            with contextlib.suppress(OSError):
                self._popen.stdin.close()

    def interrupt(self) -> None:
        """Makes it end, from a thread that does not own it; its owner hears of that."""
        self._signal(signal.SIGINT)

    def is_gone(self) -> bool:
        """Whether it has ended and left nothing behind. Kills it when its time is up."""
        if self._popen.stdout is None or self._popen.stdout.closed:
            return True
        self._last_lines()
        if self._popen.poll() is None:
            if self._kill_at_s is not None and self._clock() >= self._kill_at_s:
                self._signal(signal.SIGKILL)
            return False
        # Whatever it started itself shares its group.
        self._signal(signal.SIGKILL)
        for pipe in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        for path in self._left_files:
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
                continue
            with contextlib.suppress(OSError):
                os.unlink(path)
        if self._watchdog is not None:
            self._watchdog.forget(self._popen.pid)
        return True

    def _last_lines(self) -> None:
        with contextlib.suppress(OcpError):
            self._read_stderr(None)
            self._read_stdout(None)
            for _ in self._take_lines():
                pass

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self._popen.pid, number)


# ==== 19. Gate and spares ====================================================
# Who may run now, and the idle processes that make a start cost nothing. Both decide under their
# lock and act outside it. Neither knows what a request is about.

#: How often a waiting request looks whether its client is still there.
_QUEUE_GLANCE_S = 0.2


class Gate:
    """Lets so many requests run at a time. The others wait: those of one caller in line, and the
    callers take turns, so that nobody's fifty requests keep another's one waiting."""

    def __init__(self, config: Config) -> None:
        # Guards the fields below. Never held while anything is waited for.
        self._lock = threading.Lock()
        self._config = config
        #: How many requests run, by the scope of their callers.
        self._running: collections.Counter[str] = collections.Counter()
        #: Who waits, by scope; the scopes in the order of their turns.
        self._lines: dict[str, collections.deque[Slot]] = {}
        self._refused = 0

    def __repr__(self) -> str:
        return f"<gate running={self.running} waiting={self.waiting} refused={self.refused}>"

    @property
    def running(self) -> int:
        """How many requests run now."""
        with self._lock:
            return sum(self._running.values())

    @property
    def waiting(self) -> int:
        """How many wait in line."""
        with self._lock:
            return sum(map(len, self._lines.values()))

    @property
    def refused(self) -> int:
        """How many were turned away so far."""
        return self._refused

    def configure(self, config: Config) -> None:
        """Works with these limits from now on."""
        with self._lock:
            self._config = config
            self._fill()

    def slot(self, caller: Caller) -> Slot:
        """A place to enter `with`; call its `wait` inside the block."""
        return Slot(self, caller)

    def join(self, slot: Slot) -> None:
        """Puts a slot in line, and tells it at once if it may run or is refused."""
        with self._lock:
            self._lines.setdefault(slot.scope, collections.deque()).append(slot)
            self._fill()
            waiting = sum(map(len, self._lines.values()))
            if waiting <= self._config.max_queue:
                return
            # The longest line gives way, so that a full queue is nobody's alone.
            longest = max(self._lines, key=lambda s: (len(self._lines[s]), s == slot.scope))
            refused = self._lines[longest].pop()
            if not self._lines[longest]:
                del self._lines[longest]
            self._refused += 1
            running = sum(self._running.values())
            refused.tell(
                QueueFull(
                    f"{running} answers are running and {waiting - 1} requests wait; "
                    "try again in a moment.",
                    retry_after_s=self._config.queue_retry_after_s,
                )
            )

    def _fill(self) -> None:
        """Lets those run whose turn it is. The lock is held by the caller."""
        while sum(self._running.values()) < self._config.max_concurrent:
            scope = next((s for s, line in self._lines.items() if self._has_room(line[0])), None)
            if scope is None:
                return
            line = self._lines.pop(scope)
            slot = line.popleft()
            if line:
                # Behind everybody else who waits.
                self._lines[scope] = line
            self._running[scope] += 1
            slot.tell(None)

    def _has_room(self, slot: Slot) -> bool:
        """Whether its caller may have one more answer at the same time. One key never takes the
        last place, so that another's request does not wait for the end of a long answer."""
        running = self._running[slot.scope]
        if slot.has_key and running and running >= self._config.max_concurrent - 1:
            return False
        return not slot.maximum or running < slot.maximum

    def leave(self, slot: Slot) -> None:
        """Frees what a slot holds: its place at work or its place in line."""
        with self._lock:
            line = self._lines.get(slot.scope, ())
            if slot in line:
                self._lines[slot.scope].remove(slot)
                if not self._lines[slot.scope]:
                    del self._lines[slot.scope]
            elif slot.runs:
                self._running[slot.scope] -= 1
                if not self._running[slot.scope]:
                    del self._running[slot.scope]
            self._fill()


class Slot:
    """The right to run, from `wait` until the block ends."""

    def __init__(self, gate: Gate, caller: Caller) -> None:
        self._gate = gate
        self.scope = caller.scope
        self.maximum = caller.max_concurrent
        self.has_key = caller.key_id is not None
        #: Whether it may run; true from `tell` on.
        self.runs = False
        self.refusal: QueueFull | None = None
        self._told = threading.Event()

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, *_: object) -> None:
        self._gate.leave(self)

    def tell(self, refusal: QueueFull | None) -> None:
        """Ends the wait: it may run, or is refused. Called by the gate, under its lock."""
        self.runs, self.refusal = refusal is None, refusal
        self._told.set()

    def wait(self, watch: WaitLimits, clock: Clock = time.monotonic) -> Iterator[Event]:
        """Ends when the request may run, with Ticks while it may not.

        Raises QueueFull, UpstreamTimeout at the deadline, ClientGone.
        """
        self._gate.join(self)
        heard_s = clock()
        if watch.client.gone():
            raise ClientGone
        while not self._told.wait(_QUEUE_GLANCE_S):
            if watch.client.gone():
                raise ClientGone
            now_s = clock()
            if now_s >= watch.deadline_s:
                raise UpstreamTimeout("The request waited for its turn until its time was up.")
            if watch.tick_s and now_s - heard_s >= watch.tick_s:
                heard_s = now_s
                yield Tick()
        if self.refusal is not None:
            raise self.refusal


#: A refill starts this long after a spare was taken: the taker's first moments need the machine.
_REFILL_PAUSE_S = 0.2
#: After spares that died young, or could not be started, this long without new ones.
_FAILURE_PAUSE_S = 30.0
_YOUNG_S = 5.0


class Spares:
    """Idle processes by model, for models that were wanted lately.

    Taking one costs nothing; new ones are started by `tend`, on the housekeeper's time. It also
    sees dismissed processes to their end.
    """

    def __init__(
        self, spawn: Callable[[str], ClaudeProcess], clock: Clock = time.monotonic
    ) -> None:
        self._spawn = spawn
        self._clock = clock
        # Guards the fields below. Never held while a process is started or ended.
        self._lock = threading.Lock()
        self._idle: dict[str, list[ClaudeProcess]] = {}
        #: When a model was last wanted, and from when on a process of it may be started.
        self._wanted_s: dict[str, float] = {}
        self._refill_s: dict[str, float] = {}
        self._leaving: list[ClaudeProcess] = []
        #: Those that somebody borrowed.
        self._lent: list[ClaudeProcess] = []
        self._pause_until_s = 0.0
        self.spawned = 0

    def __repr__(self) -> str:
        idle = ", ".join(f"{model}={count}" for model, count in sorted(self.idle().items()))
        return f"<spares {idle or 'none'} leaving={len(self._leaving)}>"

    def idle(self) -> dict[str, int]:
        """How many processes wait, by model."""
        with self._lock:
            return {model: len(waiting) for model, waiting in self._idle.items() if waiting}

    def want(self, model_id: str) -> None:
        """This model is in use: keep processes for it."""
        with self._lock:
            now_s = self._clock()
            self._wanted_s[model_id] = now_s
            self._refill_s.setdefault(model_id, now_s + _REFILL_PAUSE_S)

    def take(self, model_id: str) -> tuple[ClaudeProcess, bool]:
        """A process of this model, and whether it was waiting. Raises what its start raises."""
        while True:
            with self._lock:
                waiting = self._idle.get(model_id)
                process = waiting.pop(0) if waiting else None
            if process is None:
                return self._start(model_id), False
            if process.alive():
                return process, True
            self.stop(process, graceful=False)

    def borrow(self) -> ClaudeProcess | None:
        """Any idle process, to be given back with `put_back`; None when there is none."""
        with self._lock:
            for waiting in self._idle.values():
                if waiting:
                    self._lent.append(waiting.pop())
                    return self._lent[-1]
        return None

    def put_back(self, process: ClaudeProcess) -> None:
        """Takes a process back that is as it was; it ends if all were dropped meanwhile."""
        with self._lock:
            stays = process in self._lent
            if stays:
                self._lent.remove(process)
                self._idle.setdefault(process.model_id, []).append(process)
        if not stays:
            self.stop(process, graceful=True)

    def _start(self, model_id: str) -> ClaudeProcess:
        process = self._spawn(model_id)
        with self._lock:
            self.spawned += 1
        return process

    def stop(self, process: ClaudeProcess, *, graceful: bool) -> None:
        """Ends a process without waiting for it."""
        process.stop(graceful=graceful)
        with self._lock:
            if process in self._lent:
                self._lent.remove(process)
            self._leaving.append(process)

    def drop(self) -> None:
        """Ends all that wait: the program or its login has changed."""
        with self._lock:
            dropped = [process for waiting in self._idle.values() for process in waiting]
            self._idle.clear()
            self._lent.clear()
            for model_id in self._wanted_s:
                self._refill_s.setdefault(model_id, self._clock() + _REFILL_PAUSE_S)
        for process in dropped:
            self.stop(process, graceful=True)

    def plan(self, config: Config) -> tuple[list[ClaudeProcess], list[str]]:
        """What should change: processes to end, taken out already, and models to start one of."""
        now_s, idle_s = self._clock(), config.warm_idle_ms / 1000
        with self._lock:
            self._wanted_s = {
                model_id: at for model_id, at in self._wanted_s.items() if now_s - at <= idle_s
            }
            refills = self._refill_s.items()
            self._refill_s = {m: at for m, at in refills if m in self._wanted_s}
            retire = self._outdated(now_s, idle_s) + self._surplus(config)
            grow: list[str] = []
            if now_s < self._pause_until_s:
                return retire, grow
            total = sum(len(waiting) for waiting in self._idle.values())
            for model_id in sorted(self._wanted_s, key=lambda m: -self._wanted_s[m]):
                missing = config.warm_processes - len(self._idle.get(model_id, ()))
                if now_s < self._refill_s.get(model_id, math.inf):
                    continue
                for _ in range(missing):
                    if total >= config.warm_total:
                        evicted = self._least_wanted(model_id)
                        if evicted is None:
                            break
                        retire.append(evicted)
                        total -= 1
                    grow.append(model_id)
                    total += 1
                self._refill_s.pop(model_id, None)
        return retire, grow

    def _outdated(self, now_s: float, idle_s: float) -> list[ClaudeProcess]:
        """Takes out the processes that ended or waited too long."""
        retire: list[ClaudeProcess] = []
        for model_id, waiting in list(self._idle.items()):
            ended = [process for process in waiting if not process.alive()]
            if any(now_s - process.born_s < _YOUNG_S for process in ended):
                self._pause_until_s = now_s + _FAILURE_PAUSE_S
            old = [p for p in waiting if now_s - p.born_s > idle_s and p not in ended]
            if (ended or old) and model_id in self._wanted_s:
                self._refill_s.setdefault(model_id, now_s)
            retire += ended + old
            self._idle[model_id] = [p for p in waiting if p not in ended and p not in old]
        return retire

    def _surplus(self, config: Config) -> list[ClaudeProcess]:
        """Takes out what is more than the limits allow, which can be lowered at any time."""
        retire: list[ClaudeProcess] = []
        for model_id, waiting in self._idle.items():
            retire += waiting[config.warm_processes:]
            self._idle[model_id] = waiting[:config.warm_processes]
        by_want = sorted(self._idle, key=lambda m: self._wanted_s.get(m, 0.0))
        left = sum(len(waiting) for waiting in self._idle.values())
        for waiting in (self._idle[model_id] for model_id in by_want):
            while waiting and left > config.warm_total:
                retire.append(waiting.pop())
                left -= 1
        return retire

    def _least_wanted(self, than: str) -> ClaudeProcess | None:
        """Takes out a process of the model that was wanted longest ago, before `than` was."""
        models = [model_id for model_id, waiting in self._idle.items() if waiting]
        oldest = min(models, key=lambda m: self._wanted_s.get(m, 0.0), default=than)
        if self._wanted_s.get(oldest, 0.0) >= self._wanted_s[than]:
            return None
        return self._idle[oldest].pop(0)

    def tend(self, config: Config) -> None:
        """Ends and starts what is due. Raises what a start raises."""
        retire, grow = self.plan(config)
        for process in retire:
            self.stop(process, graceful=False)
        try:
            for model_id in grow:
                process = self._start(model_id)
                with self._lock:
                    self._idle.setdefault(model_id, []).append(process)
        except OcpError:
            with self._lock:
                self._pause_until_s = self._clock() + _FAILURE_PAUSE_S
                for model_id in grow:
                    self._refill_s.setdefault(model_id, self._pause_until_s)
            raise
        finally:
            self.reap()

    def has_work_soon(self) -> bool:
        """Whether something is due within a moment: an end to see to, or a refill."""
        with self._lock:
            soon_s = self._clock() + 2 * _REFILL_PAUSE_S
            refills = self._pause_until_s < soon_s
            due = refills and any(at < soon_s for at in self._refill_s.values())
            return due or bool(self._leaving)

    def reap(self) -> int:
        """Sees to those that are leaving; how many are left."""
        with self._lock:
            leaving, self._leaving = self._leaving, []
        left = [process for process in leaving if not process.is_gone()]
        with self._lock:
            self._leaving += left
            return len(self._leaving)

    def close(self) -> None:
        """Ends everything and waits for it; a few seconds at most."""
        self.drop()
        give_up_s = self._clock() + 2 * _END_GRACE_S
        while self.reap() and self._clock() < give_up_s:
            time.sleep(0.01)


# ==== 20. Parking ============================================================
# What is kept of a conversation for its next message, or for another last one: sessions on disk,
# responses by their ids, and processes that wait, each with the conversation that it holds. What
# a process holds is known by digests: one of everything that is no message, and one of each
# message in a form in which it does not matter how a client writes the same thing. No answer
# depends on a process being here: what is not found is rebuilt from the client's own history.


class History(NamedTuple):
    """What a conversation is known by."""

    #: Of the caller, the model, the system prompt, the tools and the options.
    base: str
    #: Of each message.
    digests: tuple[str, ...]
    #: The context in the last message that no later request will have in this place.
    context: str = ""


def _plain_number(text: str) -> float:
    """Return a number with a point as JavaScript has it: 1.0 is the integer 1."""
    return int(text[:-2]) if text.endswith(".0") else float(text)


def digest(value: object) -> str:
    """The same for equal JSON values, whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    if ".0" in text:
        value = json.loads(text, parse_float=_plain_number)
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _normal_block(block: Block) -> object:
    """A block without what clients change or leave out."""
    kind = block["type"]
    if kind == "tool_use":
        # Clients leave out arguments that are null, and so do some kinds of calls.
        said = {name: value for name, value in block["input"].items() if value is not None}
        return [kind, plain_id(block["id"]), block["name"], said]
    if kind == "tool_result":
        content = _normal_blocks(block["content"])
        return [kind, block["tool_use_id"], bool(block.get("is_error")), content]
    return [kind, block.get("source")]


def _normal_blocks(blocks: Iterable[Block]) -> object:
    """Blocks as they are compared: the text together, the rest one by one, no thinking."""
    found = list(blocks)
    text = "".join(str(block["text"]) for block in found if block["type"] == "text").strip()
    skipped = ("text", "thinking", "redacted_thinking")
    return [text, [_normal_block(block) for block in found if block["type"] not in skipped]]


#: OpenClaw keeps what it knows of the moment in a text of its own at the end of the conversation,
#: where each request moves it to. It is never part of the history before.
_CONTEXT = re.compile(
    r"\s*<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>.*<<<END_OPENCLAW_INTERNAL_CONTEXT>>>\s*", re.DOTALL
)


def _is_context(block: Block) -> bool:
    return block["type"] == "text" and _CONTEXT.fullmatch(str(block["text"])) is not None


def context_of(message: Message) -> str:
    """What stands in a message only as long as it is the last one; empty for nothing."""
    return "\n".join(str(block["text"]) for block in message.content if _is_context(block))


def message_digest(message: Message) -> str:
    """The digest of one message, without what moves on to the end."""
    if message.role == "user":
        message = Message("user", [b for b in message.content if not _is_context(b)])
    # Chat clients give the text and the calls of an answer apart; all else has its order.
    order = [] if message.role == "assistant" else _kinds(message.content)
    return digest([message.role, order, _normal_blocks(message.content)])


def _kinds(blocks: Iterable[Block]) -> list[str]:
    """The types of the blocks in order, neighbours of one type taken together."""
    return [kind for kind, _ in itertools.groupby(block["type"] for block in blocks)]


def history_of(turn: Turn, caller: str, operator_prompt: str) -> History:
    """What the conversation of this turn is known by."""
    base = [
        caller, turn.model.argument, turn.system, operator_prompt, list(turn.tools),
        list(turn.tool_choice), list(turn.options), turn.output_schema,
    ]
    digests = tuple(message_digest(message) for message in turn.messages)
    return History(digest(base), digests, context_of(turn.messages[-1]))


def results_to_tell(message: Message, known_context: str) -> list[Block]:
    """The tool results of a message. Context that is not known yet comes with the last of them,
    because claude, in the middle of its turn, takes nothing else."""
    results = [block for block in message.content if block["type"] == "tool_result"]
    context = context_of(message)
    if results and context not in ("", known_context):
        content = [*results[-1]["content"], {"type": "text", "text": context}]
        results[-1] = {**results[-1], "content": content}
    return results


class Sessions:
    """Conversations that the server remembers for clients that send only what is new. A session
    belongs to its caller and to one system prompt."""

    def __init__(self, store: Store, clock: Clock = time.time) -> None:
        self._store = store
        self._clock = clock

    def _key(self, caller: str, session_id: str, system: str) -> str:
        return digest([caller, session_id, system])

    def messages(self, caller: str, session_id: str, system: str, ttl_s: float) -> list[Message]:
        """What was said so far; empty for a session that is new, or whose time is up."""
        rows = self._store.rows(
            "SELECT messages FROM sessions WHERE key = ? AND used_s >= ?",
            self._key(caller, session_id, system), self._clock() - ttl_s,
        )
        found = json.loads(rows[0]["messages"]) if rows else []
        return [Message(role, content) for role, content in found]

    def put(self, caller: str, turn: Turn, messages: list[Message], ttl_s: float) -> None:
        """Remembers a conversation, its last answer included, and forgets those out of time."""
        now_s = int(self._clock())
        key = self._key(caller, turn.session_id, turn.system)
        text = json.dumps([list(message) for message in messages])
        with self._store.transaction() as connection:
            connection.execute("DELETE FROM sessions WHERE used_s < ?", (now_s - ttl_s,))
            connection.execute(
                "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE "
                "SET model = excluded.model, messages = excluded.messages, "
                "message_count = excluded.message_count, used_s = excluded.used_s",
                (
                    key, caller, turn.session_id, turn.model.id, text, len(messages),
                    now_s, now_s,
                ),
            )

    def all(self, ttl_s: float) -> list[Json]:
        """The sessions, the one used last first; nothing of what was said in them."""
        rows = self._store.rows(
            "SELECT * FROM sessions WHERE used_s >= ? ORDER BY used_s DESC",
            self._clock() - ttl_s,
        )
        return [
            {
                "id": row["id"],
                "caller": row["caller"],
                "model": row["model"],
                "messages": row["message_count"],
                "created": iso_time(row["created_s"]),
                "lastUsed": iso_time(row["used_s"]),
            }
            for row in rows
        ]

    def clear(self, session_id: str | None = None) -> int:
        """Forgets the sessions of this id, or all; how many there were."""
        with self._store.transaction() as connection:
            if session_id is None:
                return connection.execute("DELETE FROM sessions").rowcount
            return connection.execute(
                "DELETE FROM sessions WHERE id = ?", (session_id,)
            ).rowcount


#: A claude grows with the questions that it forgets: from 202 to 307 MB with so many of 20 KB
#: (2.1.330). Then another one takes over.
_MAX_REWINDS = 500
#: Stands for the digest of an answer that no conversation goes on from.
_DEAD_END = ""


class Parked(NamedTuple):
    """A process and the conversation that it holds, its last answer included."""

    process: ClaudeProcess
    history: History
    #: The ids of the tool calls that wait for their results.
    awaiting: frozenset[str]
    since_s: float
    #: The last question it was asked, if it can forget that.
    question: RewindPoint | None = None

    def takes(self, history: History, message: Message) -> bool:
        """Whether the conversation is this one and `message`, its last, all that is new."""
        held = len(self.history.digests)
        if self.history.base != history.base or self.history.digests != history.digests[:held]:
            return False
        if len(history.digests) != held + 1:
            return False
        results = results_to_tell(message, self.history.context)
        if not self.awaiting:
            return not results
        fit = all(mcp_content(block["content"]) is not None for block in results)
        ids = {block["tool_use_id"] for block in results}
        more = [b for b in message.content if b["type"] != "tool_result" and not _is_context(b)]
        return fit and ids == self.awaiting and len(results) == len(ids) and not more

    def can_forget(self, history: History) -> bool:
        """Whether the conversation is this one with another last question."""
        if self.question is None or self.awaiting or self.history.base != history.base:
            return False
        place = self.question.place
        if len(history.digests) != place + 1 or self.process.rewinds >= _MAX_REWINDS:
            return False
        if place == 0:
            return self.process.version >= REWINDS_ALL_SINCE
        return self.history.digests[:place] == history.digests[:place]

    def is_superseded_by(self, history: History) -> bool:
        """Whether a conversation with another last question is this one asked again, or edited:
        they share more than what both were told to begin with."""
        return len(history.digests) > 1 and self.common(history) > self.process.told

    @property
    def is_dead_end(self) -> bool:
        """Whether no conversation can go on from here."""
        return self.history.digests[-1:] == (_DEAD_END,)

    def common(self, history: History) -> int:
        """How many first messages are the same."""
        pairs = list(zip(self.history.digests, history.digests))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


class Parking:
    """The parked processes. One that is taken is nobody else's, so that retries and branches of
    one conversation run side by side."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        # Guards the list. Held while pipes are read that do not block, so that a process is
        # either here or somebody's, never both.
        self._lock = threading.Lock()
        self._parked: list[Parked] = []
        #: Before that none is asked to forget anything.
        self._forgetting_from_s = -math.inf
        #: When all were dropped: what was started before, and was at work then, is outdated.
        self._dropped_s = -math.inf

    def __repr__(self) -> str:
        return f"<parking {len(self._parked)}>"

    def __len__(self) -> int:
        return len(self._parked)

    def take(self, history: History, message: Message) -> tuple[Parked | None, int | None]:
        """The process that holds all but `message`, the last one, with what it holds.

        When there is none: None, and the index of the message at which the nearest conversation
        parts from this one, if any comes near.
        """
        with self._lock:
            parked = self._authenticate(history, message)
            if parked is not None:
                self._parked.remove(parked)
                return parked, None
            near = [p.common(history) for p in self._parked if p.history.base == history.base]
            return None, max(near, default=0) or None

    def holds(self, history: History, message: Message) -> bool:
        """Whether there is a process to go on with: one that holds all but `message`."""
        with self._lock:
            return self._authenticate(history, message) is not None

    def _authenticate(self, history: History, message: Message) -> Parked | None:
        """The lock is held by the caller."""
        able = (p for p in reversed(self._parked) if p.takes(history, message))
        return next((parked for parked in able if parked.process.alive()), None)

    def take_rewindable(self, history: History, config: Config, running: int) -> Parked | None:
        """A process that holds this conversation but for the last question and what came of it.

        One that has nothing in common with it but the base, or what both were told to begin with,
        serves as well as a spare does, and sooner. But its own conversation may go on: then it is
        taken only if it will be pushed out in any case when the requests that are `running` now,
        this one among them, have parked theirs.
        """
        now_s = self._clock()
        with self._lock:
            if now_s < self._forgetting_from_s:
                return None
            oldest_s = max(now_s - config.session_ttl_ms / 1000, self._dropped_s)
            surplus = len(self._parked) + running - config.parked_processes
            able = [
                p for p in self._parked
                if p.can_forget(history) and p.process.born_s >= oldest_s and p.process.alive()
            ]
            left = [p for p in able if p.is_superseded_by(history)]
            others = [p for p in able if p.is_dead_end or p in self._parked[: max(0, surplus)]]
            found = [*left[-1:], *others[:1]]
            if not found:
                return None
            self._parked.remove(found[0])
            return found[0]

    def pause_rewinds(self, for_s: float) -> None:
        """None is asked to forget anything for so long: one could not."""
        with self._lock:
            self._forgetting_from_s = self._clock() + for_s

    def put(
        self, process: ClaudeProcess, history: History, awaiting: frozenset[str],
        question: RewindPoint | None = None,
    ) -> None:
        """Parks a process."""
        with self._lock:
            parked = Parked(process, history, awaiting, self._clock(), question)
            if parked.is_dead_end:
                # One may push out a conversation. More of them push out each other.
                self._parked.sort(key=lambda other: not other.is_dead_end)
            self._parked.append(parked)

    def tend(self, config: Config) -> list[ClaudeProcess]:
        """Keeps the pipes of all empty; the processes whose time is up, which are out now."""
        oldest_s = self._clock() - config.session_ttl_ms / 1000
        with self._lock:
            for parked in self._parked:
                parked.process.idle()
            alive = [p for p in self._parked if p.since_s >= oldest_s and p.process.alive()]
            kept = alive[max(0, len(alive) - config.parked_processes):]
            gone = [parked.process for parked in self._parked if parked not in kept]
            self._parked = kept
        return gone

    def drop(self) -> list[ClaudeProcess]:
        """All of them, out now."""
        with self._lock:
            self._dropped_s = self._clock()
            parked, self._parked = self._parked, []
        return [one.process for one in parked]


class Stored(NamedTuple):
    """A response that can be asked for, and gone on from."""

    caller: str
    body: Json
    #: The whole conversation, this answer included; those of the role "system" come first.
    messages: list[Message]
    #: The items that it came of, those before the response that it follows included.
    items: list[Json]
    size_bytes: int
    #: How long it is kept after the last reference to it, and until when that is.
    ttl_s: float
    until_s: float


#: Why something of a response may be missing.
_NOT_STORED = "it was not stored, or its time is up"
#: What all stored responses together may take.
_MAX_STORED_BYTES = 64 * 1024 * 1024


class Responses:
    """The stored responses, in memory. Each belongs to its caller."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        # Guards the fields below.
        self._lock = threading.Lock()
        self._stored: dict[str, Stored] = {}
        #: The response that an item belongs to, by their ids.
        self._items: dict[str, str] = {}
        self._size_bytes = 0

    def put(
        self, caller: str, body: Json, messages: list[Message], items: list[Json], config: Config
    ) -> None:
        """Stores a response; the oldest go when there are too many or their time is up.

        `items` are those of its own request. What came before them is shared with the response
        that it follows.
        """
        contents = [message.content for message in messages]
        size_bytes = sum(len(to_json(value)) for value in (contents, items, body))
        now_s, ttl_s = self._clock(), config.session_ttl_ms / 1000
        with contextlib.suppress(NotFound):
            before = self.get(caller, body.get("previous_response_id") or "")
            items = [*before.items, *before.body["output"], *items]
        stored = Stored(caller, body, messages, items, size_bytes, ttl_s, now_s + ttl_s)
        with self._lock:
            self._forget(body["id"])
            self._stored[body["id"]] = stored
            self._items.update((item["id"], body["id"]) for item in body["output"])
            self._size_bytes += size_bytes
            for response_id, other in list(self._stored.items()):
                if self._size_bytes <= _MAX_STORED_BYTES and other.until_s > now_s:
                    break
                self._forget(response_id)

    def _forget(self, response_id: str) -> None:
        """The lock is held by the caller."""
        stored = self._stored.pop(response_id, None)
        if stored is not None:
            self._size_bytes -= stored.size_bytes
            for item in stored.body["output"]:
                self._items.pop(item["id"], None)

    def get(self, caller: str, response_id: str) -> Stored:
        """The response of this id. Raises NotFound, also for somebody else's."""
        with self._lock:
            stored = self._stored.get(response_id)
        if stored is None or stored.caller != caller or stored.until_s <= self._clock():
            raise NotFound(f"There is no response {one_line(response_id, 80)!r}: {_NOT_STORED}.")
        return stored

    def messages(self, caller: str, response_id: str) -> list[Message]:
        """The conversation of a response. Raises BadRequest, with the code by which clients know
        that they have to send it themselves."""
        try:
            return self.get(caller, response_id).messages
        except NotFound as error:
            raise BadRequest(
                f"{error.message} Send the conversation itself.",
                param="previous_response_id", code="previous_response_not_found",
            ) from None

    def item(self, caller: str, item_id: str) -> Json:
        """An output item of a response. Raises NotFound. Its response is kept on: a conversation
        that goes by references needs all of them at each of its steps."""
        with self._lock:
            response_id = self._items.get(item_id, "")
        with contextlib.suppress(NotFound):
            stored = self.get(caller, response_id)
            with self._lock:
                # The oldest stand first.
                if self._stored.pop(response_id, None) is not None:
                    until_s = self._clock() + stored.ttl_s
                    self._stored[response_id] = stored._replace(until_s=until_s)
            return next(dict(item) for item in stored.body["output"] if item["id"] == item_id)
        raise NotFound(
            f"There is no item {one_line(item_id, 80)!r}: {_NOT_STORED}. Send the item itself.",
            param="input",
        )

    def remove(self, caller: str, response_id: str) -> None:
        """Forgets a response. Raises NotFound."""
        self.get(caller, response_id)
        with self._lock:
            self._forget(response_id)


# ==== 21. Cache ==============================================================
# Answers that are given again to the same request of the same caller, and answers on their way
# that several requests wait for. Off unless the operator gives answers a time to live. In memory
# only: what was said is never written to the disk for this.


def cache_key(turn: Turn, caller: Caller, operator_prompt: str) -> str:
    """The same for requests that may have the same answer: a digest of all that shapes it."""
    shaping = [
        caller.scope, turn.model.argument, turn.system, operator_prompt,
        [list(message) for message in turn.messages], list(turn.options), turn.output_schema,
        turn.choices, [[list(message) for message in other] for other in turn.others],
    ]
    return digest(shaping)


def is_cacheable(turn: Turn, config: Config) -> bool:
    """Whether the answer to this turn may be one that was given before."""
    repeatable = not (turn.session_id or turn.tools or turn.fresh or config.is_agent)
    return bool(config.cache_ttl_ms) and repeatable


class FlightClient:
    """The Client of an answer that several requests wait for. It leaves when all of them have."""

    def __init__(self) -> None:
        """Raises OSError when the system has no descriptors left."""
        self._reader, self._writer = os.pipe()
        self._left = False

    def fileno(self) -> int:
        """See Client."""
        return self._reader

    def gone(self) -> bool:
        """See Client."""
        return self._left

    def can_detect_hangup(self) -> bool:
        """See Client."""
        return True

    def leave(self) -> None:
        """See Client."""
        self._left = True
        with contextlib.suppress(OSError):
            os.write(self._writer, b".")

    def close(self) -> None:
        """Frees its descriptors."""
        os.close(self._reader)
        os.close(self._writer)


class Flight:
    """An answer on its way to everybody who asked for the same. Its producer adds the events;
    each follower gets them all, from the first on."""

    def __init__(self, key: str) -> None:
        """Raises OSError when the system has no descriptors left."""
        self.key = key
        self.client = FlightClient()
        #: How many requests wait for it. Guarded by the cache that it belongs to.
        self.followers = 1
        # Guards the fields below; followers are woken when one of them changes.
        self._changed = threading.Condition()
        self._events: list[Choice] = []
        #: For each choice that began anew, where its events that still count begin.
        self._begins: dict[int, int] = {}
        self._over = False
        self._error: OcpError | None = None

    def add(self, choice: Choice) -> None:
        """The next event."""
        with self._changed:
            self._events.append(choice)
            if isinstance(choice[1], Restarted):
                self._begins[choice[0]] = len(self._events)
            self._changed.notify_all()

    def end(self, error: OcpError | None) -> None:
        """There are no more events; with an error, which all followers share."""
        with self._changed:
            self._over, self._error = True, error
            self._changed.notify_all()

    def follow(self, client: Client, tick_s: float, clock: Clock) -> Iterator[Choice]:
        """Each event as it comes, and Ticks; who comes late is spared what is void by then.
        Raises the error of the answer, and ClientGone."""
        told, heard_s = 0, clock()
        glanced_s = heard_s
        with self._changed:
            begins = dict(self._begins)
        while True:
            with self._changed:
                if told == len(self._events) and not self._over:
                    self._changed.wait(_QUEUE_GLANCE_S)
                events, over = self._events[told:], self._over
            for index, choice in enumerate(events, told):
                if index >= begins.get(choice[0], 0):
                    yield choice
            told += len(events)
            now_s = clock()
            if over and not events:
                break
            if now_s - glanced_s >= _QUEUE_GLANCE_S:
                glanced_s = now_s
                if client.gone():
                    raise ClientGone
            if events:
                heard_s = now_s
            elif tick_s and now_s - heard_s >= tick_s:
                heard_s = now_s
                yield 0, Tick()
        if self._error is not None:
            raise self._error


class Cached(NamedTuple):
    """What is kept of one request."""

    #: One for each choice.
    answers: tuple[Answer, ...]
    size_bytes: int
    since_s: float


class Place(NamedTuple):
    """Where an answer comes from. `word` is what the client is told: "hit" has answers, "miss"
    has a flight that the request has to produce, "shared" one that somebody else does."""

    word: str
    answers: tuple[Answer, ...] = ()
    flight: Flight | None = None


#: What an answer takes beside its text.
_CACHED_EXTRA_BYTES = 1_000


class Cache:
    """The answers that are kept, and those on their way."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        # Guards the fields below: an answer is either on its way or kept, never both or neither.
        self._lock = threading.Lock()
        #: In the order of their ages, oldest first.
        self._kept: dict[str, Cached] = {}
        self._flights: dict[str, Flight] = {}
        self._size_bytes = 0
        self._counts: collections.Counter[str] = collections.Counter()

    def __repr__(self) -> str:
        return f"<cache kept={len(self._kept)} flights={len(self._flights)}>"

    def find(self, key: str, ttl_s: float) -> Place:
        """Where the answer to this key comes from. A flight has to be left with `leave`, a missed
        one also ended with `settle`. Raises OSError when the system has no descriptors left."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None and self._clock() - kept.since_s < ttl_s:
                place = Place("hit", answers=kept.answers)
            elif key in self._flights:
                flight = self._flights[key]
                flight.followers += 1
                place = Place("shared", flight=flight)
            else:
                self._flights[key] = Flight(key)
                place = Place("miss", flight=self._flights[key])
            self._counts[place.word] += 1
            return place

    def leave(self, flight: Flight) -> None:
        """One of those that waited for it does not any more; the last one ends it."""
        with self._lock:
            flight.followers -= 1
            # From here on nobody can join a flight that is about to end for nothing.
            abandoned = not flight.followers and self._flights.get(flight.key) is flight
            if abandoned:
                del self._flights[flight.key]
                flight.client.leave()

    def settle(self, flight: Flight, answers: tuple[Answer, ...], config: Config) -> None:
        """The flight is over, with answers to keep, or without."""
        with self._lock:
            if self._flights.get(flight.key) is flight:
                del self._flights[flight.key]
            flight.client.close()
            size_bytes = len(to_json([answer.blocks for answer in answers]))
            size_bytes += _CACHED_EXTRA_BYTES * len(answers)
            if answers and size_bytes <= config.cache_max_bytes:
                self._forget(flight.key)
                self._kept[flight.key] = Cached(answers, size_bytes, self._clock())
                self._size_bytes += size_bytes
        self.tend(config)

    def bypassed(self) -> None:
        """A request went past the cache."""
        with self._lock:
            self._counts["bypass"] += 1

    def _forget(self, key: str) -> None:
        """The lock is held by the caller."""
        kept = self._kept.pop(key, None)
        self._size_bytes -= kept.size_bytes if kept is not None else 0

    def tend(self, config: Config) -> None:
        """Drops what is too old, and the oldest of what is too much."""
        with self._lock:
            oldest_s = self._clock() - config.cache_ttl_ms / 1000
            for key, kept in list(self._kept.items()):
                if self._size_bytes <= config.cache_max_bytes and kept.since_s > oldest_s:
                    break
                self._forget(key)

    def clear(self) -> int:
        """Drops everything that is kept; how many answers there were."""
        with self._lock:
            cleared = len(self._kept)
            self._kept.clear()
            self._size_bytes = 0
            return cleared

    def stats(self) -> Json:
        """Numbers for /cache/stats."""
        with self._lock:
            return {
                "entries": len(self._kept),
                "totalHits": self._counts["hit"],
                "sizeBytes": self._size_bytes,
                "inflight": len(self._flights),
                "requesters": sum(flight.followers for flight in self._flights.values()),
                "hits": self._counts["hit"],
                "misses": self._counts["miss"],
                "shared": self._counts["shared"],
                "bypassed": self._counts["bypass"],
            }


# ==== 22. Account ============================================================
# What is known about claude's login and about the plan, learned from what claude says of itself
# beside its answers. OCP never reads a token and never spends a message to find out.

#: What the API's names for windows are called here.
_WINDOW_NAMES = {"five_hour": "currentSession", "seven_day": "allModels"}


class ObservedWindow(NamedTuple):
    """A window and when its utilization was last told."""

    window: PlanWindow
    observed_s: float


class Account:
    """The last verdict about the login, and the last news of the plan."""

    def __init__(self, clock: Clock = time.time) -> None:
        self._clock = clock
        # Guards the fields below.
        self._lock = threading.Lock()
        self._logged_in: bool | None = None
        self._since_s: float | None = None
        self._windows: dict[str, ObservedWindow] = {}
        self._news = PlanReport({})
        self._subscription: str | None = None
        self._heard_s: float | None = None
        self._asked_s = -math.inf

    # -- login --------------------------------------------------------------------------------

    def answered(self) -> None:
        """The API answered a request."""
        with self._lock:
            self._logged_in, self._since_s = True, self._clock()

    def refused(self) -> None:
        """The API, or claude itself, refused the login."""
        with self._lock:
            self._logged_in, self._since_s = False, self._clock()

    def doubt(self) -> None:
        """The login may be good again."""
        with self._lock:
            self._logged_in = self._since_s = None

    @property
    def is_refused(self) -> bool:
        """Whether the login was refused, as far as is known."""
        return self._logged_in is False

    def verdict(self) -> Json:
        """What /health says: ok is true, false, or null while nothing is known."""
        with self._lock:
            since = None if self._since_s is None else iso_time(self._since_s)
            source = "none" if self._since_s is None else "request"
            message = LOGIN_ADVICE if self._logged_in is False else None
            return {"ok": self._logged_in, "okSource": source, "okAt": since, "message": message}

    # -- plan ---------------------------------------------------------------------------------

    def hear(self, news: PlanReport) -> None:
        """Takes over what is new. A window without its utilization keeps the one that was told
        before, as long as it has not been reset since."""
        now_s = self._clock()
        with self._lock:
            self._heard_s = now_s if news.windows else self._heard_s
            self._subscription = news.subscription or self._subscription
            for name, window in news.windows.items():
                self._windows[name] = self._merged(self._windows.get(name), window, now_s)
            if news.status is not None:
                self._news = news

    def _merged(
        self, before: ObservedWindow | None, window: PlanWindow, now_s: float
    ) -> ObservedWindow:
        if before is None or self._parted(before.window, window):
            return ObservedWindow(window, now_s)
        if window.utilization is not None:
            status = window.status or before.window.status
            return ObservedWindow(window._replace(status=status), now_s)
        known = before.window.utilization
        return ObservedWindow(window._replace(utilization=known), before.observed_s)

    def _parted(self, before: PlanWindow, now: PlanWindow) -> bool:
        """Whether they end at different times; some tell whole seconds, some do not."""
        if before.resets_at_s is None or now.resets_at_s is None:
            return before.resets_at_s is not now.resets_at_s
        return abs(before.resets_at_s - now.resets_at_s) > _SAME_RESET_S

    def may_ask(self) -> bool:
        """Whether it is time to ask claude itself; counts as asked then."""
        with self._lock:
            due = self._clock() - self._asked_s >= _ASK_EVERY_S
            self._asked_s = self._clock() if due else self._asked_s
            return due

    def windows(self) -> dict[str, PlanWindow]:
        """What is known of each window now: after its reset, nothing."""
        now_s = self._clock()
        with self._lock:
            return {
                name: sighting.window for name, sighting in self._windows.items()
                if sighting.window.resets_at_s is None or sighting.window.resets_at_s > now_s
            }

    def plan(self) -> Json:
        """The plan as /usage tells it; null is unknown, `observedAt` is when it was told."""
        known = self.windows()
        with self._lock:
            news, sightings = self._news, dict(self._windows)
            subscription = self._subscription
        shown = {
            name: self._window(known.get(name), sightings.get(name))
            for name in (*_WINDOW_NAMES, *known)
        }
        extra: Json = {"status": news.overage_status}
        if news.overage_reason:
            extra["disabledReason"] = news.overage_reason
        others = {
            name.replace("seven_day_", ""): shown[name] for name in known
            if name not in _WINDOW_NAMES
        }
        return {
            "currentSession": shown["five_hour"],
            "weeklyLimits": {"allModels": shown["seven_day"], **others},
            "extraUsage": extra,
            "representativeClaim": news.claim,
            "fallbackPercentage": None,
            "subscription": subscription,
        }

    def _window(self, window: PlanWindow | None, sighting: ObservedWindow | None) -> Json:
        window = window or PlanWindow(None, None, None)
        share, resets_s = window.utilization, window.resets_at_s
        human = None
        if resets_s is not None:
            human = time.strftime("%a, %b %d, %I:%M %p", time.localtime(resets_s))
        return {
            "utilization": share,
            "percent": None if share is None else f"{share:.0%}",
            "resetsIn": None if resets_s is None else format_span(resets_s - self._clock()),
            "resetsAt": None if resets_s is None else iso_time(resets_s),
            "resetsAtHuman": human,
            "status": window.status,
            "observedAt": None if sighting is None else iso_time(sighting.observed_s),
        }

    def report(self) -> Json:
        """What /usage says about the plan, with what claude last said word for word."""
        plan = self.plan()
        with self._lock:
            raw = {
                name: {**sighting.window._asdict(), "observed_s": sighting.observed_s}
                for name, sighting in self._windows.items()
            }
            heard = None if self._heard_s is None else iso_time(self._heard_s)
            return {"status": self._news.status, "fetchedAt": heard, "plan": plan, "_raw": raw}


#: Ends of a window that are nearer to each other than this are one.
_SAME_RESET_S = 60.0
#: How often claude itself is asked about the plan, at most.
_ASK_EVERY_S = 60.0


# ==== 23. Metrics ============================================================
# Numbers since the start, for /health and for /metrics. A metric is a row of the table; labels
# take values out of small sets only, so that no client can make the memory grow.


class Metric(NamedTuple):
    """A row: `kind` is Prometheus' word for it. Histograms have bounds, in seconds."""

    name: str
    kind: str
    help: str
    bounds: tuple[float, ...] = ()


_FIRST_TOKEN_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_DURATION_BOUNDS_S = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

METRICS = (
    Metric("ocp_build_info", "gauge", "Always 1; the labels say what runs."),
    Metric("ocp_uptime_seconds", "gauge", "How long the server has run."),
    Metric("ocp_requests_started_total", "counter", "Requests for an answer that came in."),
    Metric("ocp_requests_total", "counter", "Requests for an answer that are over."),
    Metric("ocp_tokens_total", "counter", "Tokens that answers took of the plan, by kind."),
    Metric(
        "ocp_first_token_seconds", "histogram", "Time to the first token.", _FIRST_TOKEN_BOUNDS_S
    ),
    Metric("ocp_request_seconds", "histogram", "Time to the end.", _DURATION_BOUNDS_S),
    Metric("ocp_answers_total", "counter", "Answers by how claude got the conversation."),
    Metric("ocp_running", "gauge", "Answers that are being made."),
    Metric("ocp_queued", "gauge", "Requests that wait for their turn."),
    Metric("ocp_queue_refusals_total", "counter", "Requests refused because the queue was full."),
    Metric("ocp_connections", "gauge", "Open client connections."),
    Metric("ocp_spawns_total", "counter", "claude processes started."),
    Metric("ocp_spares", "gauge", "Idle claude processes, by model."),
    Metric("ocp_parked", "gauge", "claude processes that wait with their conversation."),
    Metric("ocp_cache_requests_total", "counter", "Requests by what the cache did for them."),
    Metric("ocp_cache_entries", "gauge", "Answers in the cache."),
    Metric("ocp_cache_bytes", "gauge", "What they take."),
    Metric("ocp_plan_utilization", "gauge", "Used share of a plan window, as last told; 0 to 1."),
    Metric("ocp_plan_resets_timestamp_seconds", "gauge", "When a plan window ends."),
    Metric("ocp_logged_in", "gauge", "1 = the login works, 0 = it was refused; absent = unknown."),
)

Labels = tuple[tuple[str, str], ...]


class Histogram:
    """How many values were below each bound, how many in all, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.below = [0] * len(bounds)
        self.count = 0
        self.total = 0.0

    def add(self, value: float) -> None:
        """One more value."""
        self.count += 1
        self.total += value
        for index, bound in enumerate(self.bounds):
            self.below[index] += value <= bound


def _label_text(labels: Labels) -> str:
    def escaped(text: str) -> str:
        return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    inside = ",".join(f'{name}="{escaped(value)}"' for name, value in labels)
    return f"{{{inside}}}" if inside else ""


def _number(value: float) -> str:
    """A number as Prometheus reads it; counts are exact."""
    return str(value) if isinstance(value, int) else f"{value:.10g}"


class Metrics:
    """The counters and histograms."""

    def __init__(self) -> None:
        # Guards the fields below.
        self._lock = threading.Lock()
        self._counts: dict[str, collections.Counter[Labels]] = {
            metric.name: collections.Counter() for metric in METRICS if metric.kind == "counter"
        }
        self._histograms: dict[str, dict[Labels, Histogram]] = {
            metric.name: {} for metric in METRICS if metric.kind == "histogram"
        }
        self._bounds = {metric.name: metric.bounds for metric in METRICS}

    def add(self, name: str, count: int = 1, **labels: str) -> None:
        """So many more of a counter."""
        with self._lock:
            self._counts[name][tuple(labels.items())] += count

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """One more value of a histogram."""
        with self._lock:
            found = self._histograms[name]
            key = tuple(labels.items())
            found.setdefault(key, Histogram(self._bounds[name])).add(seconds)

    def total(self, name: str, **labels: str) -> int:
        """A counter, over all that have these labels."""
        wanted = set(labels.items())
        with self._lock:
            return sum(n for key, n in self._counts[name].items() if wanted <= set(key))

    def text(self, gauges: Mapping[str, Mapping[Labels, float]]) -> str:
        """Everything in Prometheus' text format, with the gauges of this moment, and counters that
        somebody else counts."""
        with self._lock:
            lines: list[str] = []
            for metric in METRICS:
                values: dict[Labels, float] = {**self._counts.get(metric.name, {})}
                values.update(gauges.get(metric.name, {}))
                samples = [
                    f"{metric.name}{_label_text(labels)} {_number(value)}"
                    for labels, value in values.items()
                ]
                for labels, histogram in self._histograms.get(metric.name, {}).items():
                    samples += self._samples(metric.name, labels, histogram)
                head = f"# HELP {metric.name} {metric.help}\n# TYPE {metric.name} {metric.kind}"
                lines += [head, *samples]
        return "\n".join(lines) + "\n"

    def _samples(self, name: str, labels: Labels, histogram: Histogram) -> Iterator[str]:
        for bound, below in zip(histogram.bounds, histogram.below):
            yield f"{name}_bucket{_label_text((*labels, ('le', f'{bound:g}')))} {below}"
        yield f"{name}_bucket{_label_text((*labels, ('le', '+Inf')))} {histogram.count}"
        yield f"{name}_sum{_label_text(labels)} {histogram.total:.6f}"
        yield f"{name}_count{_label_text(labels)} {histogram.count}"


# ==== 24. Connections ========================================================
# Sockets, and what all of them together may take: which connections stay open, and how many bytes
# of bodies and of unread answers lie in memory. Nothing here knows HTTP.

#: How long a client that is refused early may go on sending before its connection is cut, so
#: that it reads the refusal instead of a reset.
_LINGER_S = 2.0
#: What is kept of a request that comes before the one before it is answered.
_MAX_AHEAD_BYTES = 65_536
#: How many of the largest bodies may lie in memory, in all bodies and unread answers together; and
#: the least that there is for them.
_MEMORY_BODIES = 4
_MIN_MEMORY_BYTES = 64 * 1024 * 1024
#: What is read from, and written to, a socket at a time. A record of TLS holds as much.
_MAX_READ_BYTES = 262_144
_MAX_SENT_BYTES = 16_384
#: What a socket that never blocks raises when it can do nothing now.
_NOT_NOW = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Hold:
    """What one request or one unread answer takes of the memory budget."""

    def __init__(self, cut: Callable[[], None]) -> None:
        """`cut` ends the connection that it belongs to; it must not block."""
        self.cut = cut
        #: Whose memory it is: a caller's scope, or the address of a client without a key.
        self.owner = ""
        #: Guarded by the budget.
        self.size_bytes = 0


class MemoryBudget:
    """The bound for the bytes of all request bodies and all unread answers together.

    One owner may hold half of it. When all together hold more than there is, the owner with the
    most gives way: its largest hold is cut. So nobody pays for the memory of another.
    """

    def __init__(self) -> None:
        # Guards the set and the sizes of all holds. Never held while anything is cut.
        self._lock = threading.Lock()
        self._holds: set[Hold] = set()

    @property
    def size_bytes(self) -> int:
        """How many bytes are held now."""
        with self._lock:
            return sum(hold.size_bytes for hold in self._holds)

    def resize(self, hold: Hold, size_bytes: int, config: Config) -> None:
        """Let a hold grow or shrink to this size. Raises MemoryFull when its owner has too much."""
        total_bytes = max(_MIN_MEMORY_BYTES, _MEMORY_BODIES * config.max_body_bytes)
        with self._lock:
            owned_bytes: collections.Counter[str] = collections.Counter()
            for each in self._holds:
                owned_bytes[each.owner] += each.size_bytes
            owned_bytes[hold.owner] += size_bytes - hold.size_bytes
            if size_bytes > hold.size_bytes and owned_bytes[hold.owner] > total_bytes // 2:
                raise MemoryFull(
                    "This key's requests and unread answers take all the memory that one caller "
                    "may have; try again when one of them is over.", retry_after_s=1,
                )
            hold.size_bytes = size_bytes
            if size_bytes:
                self._holds.add(hold)
            else:
                self._holds.discard(hold)
            if sum(owned_bytes.values()) <= total_bytes:
                return
            owner = max(owned_bytes, key=lambda name: owned_bytes[name])
            largest = max(
                (each for each in self._holds if each.owner == owner),
                key=lambda each: each.size_bytes,
            )
        largest.cut()


class Connection:
    """A client's connection: a Client for those who wait, a socket for its Exchange, and what the
    server has to know to choose which connection makes room for another.

    The socket never blocks. What a client does not take at once is kept, and a thread of its own
    sends it when the client reads: whoever makes the answer is not held up.
    """

    def __init__(self, sock: socket.socket, peer: str, budget: MemoryBudget) -> None:
        self.peer = peer
        #: Whether an answer is being made for it.
        self.is_busy = False
        #: Whether it has brought a request of a caller that may use the API.
        self.is_trusted = False
        #: When it last sent or took anything, or its request was over.
        self.quiet_since_s = time.monotonic()
        #: The config of the request that it is used for.
        self.config: Config | None = None
        self._socket = sock
        sock.setblocking(False)
        self._budget = budget
        self.unread = Hold(self.cut)
        # Guards the fields below and the socket: a TLS socket must not be read and written at the
        # same time, and several choices of one answer watch one client.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        #: What the client sent before it was asked for.
        self._ahead = bytearray()
        #: What the client has not taken yet.
        self._unsent = bytearray()
        self._is_sending_later = False
        self._has_left = False
        self._is_broken = False

    def fileno(self) -> int:
        """See Client."""
        return self._socket.fileno()

    @property
    def is_tls(self) -> bool:
        """Whether TLS is spoken on it."""
        return isinstance(self._socket, ssl.SSLSocket)

    # -- reading --------------------------------------------------------------------------------

    def gone(self) -> bool:
        """See Client."""
        with self._lock:
            if not self._has_left and not self._is_broken and self._room():
                try:
                    piece = self._socket.recv(self._room())
                    self._has_left = not piece
                    self._ahead += piece
                except _NOT_NOW:
                    pass
                except OSError:
                    self._has_left = True
            return self._has_left or self._is_broken

    def can_detect_hangup(self) -> bool:
        """See Client."""
        return bool(self._room())

    def leave(self) -> None:
        """See Client. What is said to it still arrives."""
        self._has_left = True
        with contextlib.suppress(OSError):
            # Not SSLSocket.shutdown, which would end the encryption too.
            socket.socket.shutdown(self._socket, socket.SHUT_RD)

    def _room(self) -> int:
        return _MAX_AHEAD_BYTES - len(self._ahead)

    def receive_into(self, buffer: Any) -> int | None:
        """Read what is there; return how many bytes, or None when there is nothing yet."""
        with self._lock:
            count = min(len(buffer), len(self._ahead))
            if count:
                buffer[:count] = self._ahead[:count]
                del self._ahead[:count]
                return count
            try:
                count = self._socket.recv_into(buffer)
            except _NOT_NOW:
                return None
        self.quiet_since_s = time.monotonic()
        return count

    def wait_readable(self, timeout_s: float) -> None:
        """Wait until there may be something to read."""
        self._poll(select.POLLIN, timeout_s)

    def peek(self, timeout_s: float) -> bytes:
        """Return the first byte that comes, without taking it; nothing at the end. For a socket
        without TLS. Raises OSError, also when nothing comes in time."""
        self.wait_readable(timeout_s)
        return self._socket.recv(1, socket.MSG_PEEK)

    def start_tls(self, context: ssl.SSLContext, timeout_s: float) -> None:
        """Make it a TLS connection. Raises OSError."""
        self._socket.settimeout(timeout_s)
        self._socket = context.wrap_socket(self._socket, server_side=True)
        self._socket.setblocking(False)

    # -- writing --------------------------------------------------------------------------------

    @property
    def has_unread(self) -> bool:
        """Whether the client has not taken all yet."""
        return bool(self._unsent)

    def send(self, data: bytes) -> None:
        """Send what the client takes now and keep the rest for it. Raises ClientGone when it has
        left, has read nothing for too long, or has left too much unread."""
        with self._lock:
            if self._is_broken:
                raise ClientGone
            if not self._unsent:
                data = data[self._push(data):]
            if not data:
                return
            self._unsent += data
            is_first = not self._is_sending_later
            self._is_sending_later = True
        self._account()
        if is_first:
            try:
                threading.Thread(target=self._send_later, daemon=True).start()
            except RuntimeError:
                self._break()
                raise ClientGone from None

    def flush(self) -> None:
        """Wait until the client has taken everything. Raises ClientGone when it does not."""
        with self._lock:
            self._changed.wait_for(lambda: self._is_broken or not self._unsent)
            if self._is_broken:
                raise ClientGone

    def _push(self, data: bytes | bytearray) -> int:
        """Return how much of it the socket takes now. Raises ClientGone. Needs the lock."""
        sent = 0
        try:
            with memoryview(data) as view:
                while sent < len(data):
                    # Over TLS a piece is tried again with at least the same bytes.
                    sent += self._socket.send(view[sent:sent + _MAX_SENT_BYTES])
        except _NOT_NOW:
            pass
        except OSError:
            self._is_broken = True
            raise ClientGone from None
        self.quiet_since_s = time.monotonic()
        return sent

    def _send_later(self) -> None:
        """Send what is kept as the client takes it, until all is sent or it stands still."""
        while True:
            standstill_s = self.config.write_timeout_ms / 1000 if self.config else _LINGER_S
            can_write = self._poll(select.POLLOUT, standstill_s)
            with self._lock:
                if not can_write:
                    self._is_broken = True
                try:
                    if not self._is_broken:
                        del self._unsent[:self._push(self._unsent)]
                except ClientGone:
                    pass
                if self._is_broken:
                    self._unsent.clear()
                is_over = not self._unsent
                self._is_sending_later = not is_over
                self._changed.notify_all()
            self._account()
            if is_over:
                if self._is_broken:
                    self.cut()
                return

    def _account(self) -> None:
        """Tell the budget how much is unread; a client that leaves too much so is cut off."""
        if self.config is None:
            return
        try:
            self._budget.resize(self.unread, len(self._unsent), self.config)
        except MemoryFull:
            self._break()

    def _poll(self, event: int, timeout_s: float) -> bool:
        """Wait for the socket; return whether it is ready, or broken, before the time is up."""
        try:
            waiting = select.poll()
            waiting.register(self._socket, event)
            return bool(waiting.poll(max(0.0, timeout_s) * 1000))
        except (OSError, ValueError):
            # It was closed.
            return True

    # -- its end --------------------------------------------------------------------------------

    def cut(self) -> None:
        """End it from any thread: whoever reads or writes on it finds it broken."""
        self._is_broken = True
        with contextlib.suppress(OSError):
            # Not SSLSocket.shutdown, which takes the TLS state away from those who use it.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _break(self) -> None:
        self.cut()
        with self._lock:
            self._unsent.clear()
            self._changed.notify_all()

    def linger(self, timeout_s: float) -> None:
        """Say that nothing more comes, and read on for a moment: a client that is still sending
        would lose the answer to a reset."""
        until_s = time.monotonic() + timeout_s
        buffer = bytearray(_MAX_SENT_BYTES)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            while time.monotonic() < until_s:
                count = self.receive_into(memoryview(buffer))
                if count is None:
                    self.wait_readable(until_s - time.monotonic())
                elif not count:
                    return

    def close(self) -> None:
        """Close it; over TLS with the word that this was all."""
        if isinstance(self._socket, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                self._socket.unwrap()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_WR)
        self._socket.close()


class DeadlineReader(io.RawIOBase):
    """Reads a connection until a deadline over all reads together, not for each."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._deadline_s = 0.0
        self.received_bytes = 0

    def allow(self, seconds: float) -> None:
        """Make everything from now on arrive within so many seconds."""
        self._deadline_s = time.monotonic() + seconds

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what is there. Raises socket.timeout at the deadline."""
        count = self._connection.receive_into(buffer)
        while count is None:
            left_s = self._deadline_s - time.monotonic()
            if left_s <= 0:
                raise socket.timeout("deadline")
            self._connection.wait_readable(left_s)
            count = self._connection.receive_into(buffer)
        self.received_bytes += count
        return count


class Connections:
    """The open connections. When there are too many, one that waits for its client makes room: so
    nobody is shut out by clients that hold connections and ask for nothing."""

    def __init__(self) -> None:
        # Guards the set.
        self._lock = threading.Lock()
        self._open: set[Connection] = set()

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, newcomer: Connection, maximum: int) -> Connection | None:
        """Add a connection; return the one that had to go for it. Raises Busy when all of them
        are being answered."""
        with self._lock:
            leaving = self._next_to_leave() if len(self._open) >= maximum else None
            if leaving is not None:
                self._open.remove(leaving)
            elif len(self._open) >= maximum:
                raise Busy("Too many connections are open.", retry_after_s=5)
            self._open.add(newcomer)
        if leaving is not None:
            leaving.cut()
        return leaving

    def leave(self, connection: Connection) -> None:
        """Remove a connection."""
        with self._lock:
            self._open.discard(connection)

    def is_any_unread(self) -> bool:
        """Return whether a client has not read all of its answer yet."""
        with self._lock:
            return any(each.has_unread for each in self._open)

    def _next_to_leave(self) -> Connection | None:
        """Return who goes first: a stranger, from the address with the most connections, the one
        that has been quiet the longest. Needs the lock."""
        crowds = collections.Counter(each.peer for each in self._open)
        return max(
            (each for each in self._open if not each.is_busy),
            key=lambda each: (not each.is_trusted, crowds[each.peer], -each.quiet_since_s),
            default=None,
        )


# ==== 25. State folder =======================================================
# OCP_HOME: which server has it, the database in it, the modes of its files, and the admin key.
# Without a folder that can be written everything is kept in memory, and the server says so.

_MOVE_HOME = "set OCP_HOME to a folder that can be written"
_REPLACE_DATABASE = "move ocp.db away or put a copy of it back, and start again"
_UPDATE_OCP = "update OCP, or set OCP_HOME to another folder"
_RETURN_DATABASE = (
    "The database was taken away or replaced while the server ran: what changes since then is lost "
    "at its end. Put ocp.db back where it was, or start again."
)
_FREE_DATABASE = "see to it that ocp.db can be written, and start again"

#: How much longer than its drain a start waits for a server that is stopping.
_STOP_PATIENCE_S = 10.0
#: How often the place of the database is looked at.
_LOOK_EVERY_S = 10.0


class StateFolder:
    """The folder of the database, the log and the admin key."""

    def __init__(self, config: Config, log: Log, clock: Clock, *, is_demo: bool) -> None:
        """Open the database; the log goes to the folder from now on. A demo beside a server keeps
        everything in memory. Raises HomeInUse."""
        self._path = config.home_path
        self._log = log
        self._clock = clock
        self._lock: HomeLock | None = None
        #: What to do about a folder that cannot be used; empty when it can be.
        self._memory_fix = ""
        #: Whether the database is not where it was.
        self._is_lost = False
        self.store = self._open_store(config, is_demo)
        self._logged_state = self.status[0]
        self._look_at_s = clock()

    @property
    def status(self) -> tuple[str, str]:
        """Return where the state that has to survive a restart is kept, and what to do about it:

        "disk"; "memory" without a usable folder; "lost" when the database was taken away;
        "damaged"; "behind" while writes wait for a database that is full or locked.
        """
        if self._memory_fix or self._lock is None:
            return "memory", self._memory_fix
        if self._is_lost:
            return "lost", _RETURN_DATABASE
        if self.store.is_damaged:
            return "damaged", _REPLACE_DATABASE
        failure = self.store.failure
        return ("disk", "") if failure is None else ("behind", storage_failure(
            failure, "What was changed holds in memory and will be written when that is possible."
        ).message)

    def check(self) -> None:
        """Look whether the database is where it was, now and then, and log what changes."""
        if self._clock() >= self._look_at_s:
            self._look_at_s = self._clock() + _LOOK_EVERY_S
            self._is_lost = not self.store.is_in_place()
        state, advice = self.status
        if state != self._logged_state:
            self._logged_state = state
            level, name = ("info", "storage_well") if state == "disk" else ("error", "storage_bad")
            self._log.event(level, name, storage=state, help=advice or None)

    def with_admin_key(self, config: Config) -> Config:
        """Return the configuration with the admin key, which the first start creates."""
        if config.admin_key or config.mode == "none":
            return config
        path = os.path.join(self._path, "admin-key")
        try:
            with open(path, encoding="ascii") as file:
                found = file.read().strip()
        except (OSError, ValueError):
            found = ""
        key = found or "ocp_admin_" + secrets.token_urlsafe(24)
        if not found:
            try:
                write_private(path, key + "\n")
                self._log.audit("admin_key_made", path=path)
            except OSError as problem:
                self._log.event(
                    "error", "admin_key_not_kept", error=str(problem),
                    help="set OCP_ADMIN_KEY: nobody knows the admin key now",
                )
        return dataclasses.replace(config, admin_key=key)

    def announce_stop(self) -> None:
        """Let a server that starts in this folder wait for this one."""
        if self._lock is not None:
            self._lock.tell_stopping()

    def close(self) -> None:
        """Close the database and leave the folder to the next server."""
        self.store.close()
        self._log.close()
        if self._lock is not None:
            self._lock.close()

    def _open_store(self, config: Config, is_demo: bool) -> Store:
        path = os.path.join(self._path, "ocp.db")
        try:
            os.makedirs(self._path, mode=0o700, exist_ok=True)
            self._lock = HomeLock(self._path, config.drain_ms / 1000 + _STOP_PATIENCE_S)
            logs = os.path.join(self._path, "logs")
            self._log.to_file(os.path.join(logs, "ocp.log"))
            self._make_private(self._path, *_entries(self._path), *_entries(logs))
            return Store(path)
        except HomeInUse:
            if not is_demo:
                raise
            return Store(":memory:")
        except (OSError, sqlite3.Error) as problem:
            store = Store(":memory:")
            with contextlib.suppress(sqlite3.Error):
                # Where it can be read, the keys of devices go on working. A DatabaseError that is
                # none of its subclasses says that the file is damaged.
                if os.path.exists(path) and type(problem) is not sqlite3.DatabaseError:
                    store.load(path)
            self._log_unusable(problem)
            return store

    def _log_unusable(self, problem: Exception) -> None:
        """Log why everything is kept in memory, and what to do about it."""
        level, name, advice = "error", "database_unusable", _REPLACE_DATABASE
        if isinstance(problem, OSError):
            level, name, advice = "warn", "home_not_writable", _MOVE_HOME
        elif isinstance(problem, sqlite3.NotSupportedError):
            advice = _UPDATE_OCP
        elif isinstance(problem, sqlite3.OperationalError):
            # Full, locked or read-only: the contents of the file are good.
            advice = _FREE_DATABASE
        self._memory_fix = f"{advice}; all is kept in memory now"
        self._log.event(level, name, error=str(problem), help=self._memory_fix)

    def _make_private(self, *paths: str) -> None:
        """Remove the rights of other users from these files."""
        for path in paths:
            with contextlib.suppress(FileNotFoundError, PermissionError):
                mode = os.stat(path).st_mode & 0o777
                if mode & 0o077:
                    os.chmod(path, mode & 0o700)
                    self._log.event("warn", "file_modes_tightened", path=path, mode=oct(mode))


def _entries(folder: str) -> list[str]:
    """Return the paths in a folder; none if it does not exist."""
    try:
        return [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    except FileNotFoundError:
        return []


# ==== 26. Answering ==========================================================
# One request from its quota to its row of usage. `Requests` has all that are being answered and
# decides where an answer comes from; a `TurnRunner` gets one answer from a claude process; a `Job`
# and its `AnswerRecord`s hold what is known of them meanwhile.


class AnswerRecord:
    """What is noted about one answer while it comes."""

    def __init__(self, turn: Turn, started_s: float) -> None:
        self.turn = turn
        self.started_s = started_s
        #: The process that works on it, until it is parked or dismissed.
        self.process: ClaudeProcess | None = None
        #: What it was asked last, where it can forget that.
        self.question: RewindPoint | None = None
        self.first_token_s: float | None = None
        #: Whether a process was waiting, and how it got the conversation: "continued", "rewound"
        #: to another last question, "rebuilt" from its history, or "fresh" because there was none.
        self.warm: bool | None = None
        self.path: str | None = None
        self.parted_at: int | None = None
        self.finished: Finished | None = None
        #: What reads each question that was put to claude for it; there can be more than one.
        self.readers: list[TurnReader] = []
        #: Whether the API turned it away before an answer began.
        self.refused = False
        self.response_chars = 0
        self._begun: Usage | None = None
        #: Whether a block of it was passed on.
        self.has_output = False
        #: Whether the log has it.
        self.is_logged = False
        self._builder = AnswerBuilder()

    def add(self, event: Event, now_s: float) -> None:
        """Takes from an event what is wanted of it later."""
        self._builder.note(event)
        self.has_output = self.has_output or isinstance(event, BlockStarted)
        if isinstance(event, Delta):
            if self.first_token_s is None:
                self.first_token_s = now_s
            self.response_chars += len(event.text) if event.kind != "signature" else 0
        elif isinstance(event, Started):
            self._begun = event.usage
        elif isinstance(event, Finished):
            self.finished = event

    @property
    def lost_its_process(self) -> bool:
        """Whether its process died or broke through no fault of the request, so that another may
        do: it died while it waited, maybe, or it hangs."""
        process = self.process
        return process is not None and (
            process.broken or (bool(self.warm) and not process.alive())
        )

    @property
    def usage(self) -> Usage:
        """What the answer took so far; the output of one that is not finished is estimated."""
        if self.finished is not None:
            return self.finished.usage
        begun = self._begun or NO_USAGE
        return begun._replace(output_tokens=round(self.response_chars / ESTIMATE_CHARS_PER_TOKEN))

    @property
    def spent(self) -> Usage:
        """What the API took for it, for attempts that came to nothing too. What it did not report
        is estimated, but for what it refused."""
        if not self.readers or self.refused:
            return NO_USAGE
        spent = added_usage(reader.spent for reader in self.readers)
        if not spent.prompt_tokens:
            spent = spent._replace(input_tokens=estimated_tokens(self.turn))
        if not self.readers[-1].finished:
            estimate = round(self.response_chars / ESTIMATE_CHARS_PER_TOKEN)
            spent = spent._replace(output_tokens=max(spent.output_tokens, estimate))
        return spent

    def fail(self, error: OcpError) -> None:
        """Notes why there is no answer."""
        self.refused = error.refused_upstream and self._begun is None

    def answer(self) -> Answer:
        """The whole answer. Raises UpstreamFailed when it did not come to its end."""
        if self.finished is None:
            raise UpstreamFailed("The answer ended before it was complete.")
        return self._builder.answer(self.finished)

    def fields(self, now_s: float) -> Json:
        """The log's fields."""
        usage = self.finished.usage if self.finished else NO_USAGE
        first_s = self.first_token_s
        return {
            "model": self.turn.model.id,
            "stream": self.turn.stream,
            "stop_reason": self.finished.stop_reason if self.finished else None,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cache_read_tokens,
            "output_tokens": usage.output_tokens,
            "first_token_ms": None if first_s is None else round((first_s - self.started_s) * 1000),
            "total_ms": round((now_s - self.started_s) * 1000),
            "warm": self.warm,
            "path": self.path,
            "parted_at": self.parted_at,
        }


class Request(NamedTuple):
    """A turn, who asked for it, and how."""

    turn: Turn
    caller: Caller
    client: Client
    request_id: str
    #: The name of the dialect.
    dialect: str


class Job:
    """A request that is being answered, up to its one row of usage."""

    def __init__(
        self, request: Request, now_s: float, reservation: Reservation, path: str | None = None
    ) -> None:
        """`path` is what the row says instead of how claude got the conversation."""
        self.request = request
        self.started_s = now_s
        self.reservation = reservation
        self.path = path
        #: Why it is ended though its client waits.
        self.ended_by: OcpError | None = None
        turn = request.turn
        self.outcomes = [AnswerRecord(turn.choice(index), now_s) for index in range(turn.choices)]
        # Guards what follows: the choices of one request finish in threads of their own.
        self._lock = threading.Lock()
        self._settled = False

    @property
    def finished(self) -> bool:
        """Whether all answers are complete."""
        return all(outcome.finished is not None for outcome in self.outcomes)

    def glance(self, now_s: float) -> Json:
        """What can be seen of it while it goes on."""
        request, first = self.request, self.outcomes[0]
        first_s = first.first_token_s
        return {
            "request_id": request.request_id,
            "key_name": request.caller.name,
            "model": request.turn.model.id,
            "dialect": request.dialect,
            "stream": request.turn.stream,
            "state": "running" if first.path or self.path or first_s is not None else "queued",
            "path": self.path or first.path,
            "first_token_ms": None if first_s is None else round((first_s - self.started_s) * 1000),
            "elapsed_ms": round((now_s - self.started_s) * 1000),
            "response_chars": sum(outcome.response_chars for outcome in self.outcomes),
        }

    @property
    def counted(self) -> int:
        """As how many requests quotas count it."""
        asked = [outcome for outcome in self.outcomes if outcome.readers and not outcome.refused]
        return 0 if self.path else len(asked)

    @property
    def was_asked(self) -> bool:
        """Whether claude was asked for any of the answers."""
        return any(outcome.readers for outcome in self.outcomes)

    def settles(self) -> bool:
        """True once: the row is written by whoever gets it."""
        with self._lock:
            settled, self._settled = self._settled, True
            return not settled

    def answers(self) -> tuple[Answer, ...]:
        """The whole answers. Raises UpstreamFailed when they did not come to their end."""
        return tuple(outcome.answer() for outcome in self.outcomes)

    def row(self, word: str, status: int, at_s: float, now_s: float) -> UsageRow:
        """The row of usage, if this is how it ended."""
        request, first = self.request, self.outcomes[0]
        usages = [NO_USAGE if self.path else outcome.spent for outcome in self.outcomes]
        firsts = [
            outcome.first_token_s for outcome in self.outcomes
            # What was there already says nothing about how fast claude is.
            if outcome.first_token_s is not None and self.path != "cached"
        ]
        return UsageRow(
            at_s=at_s,
            request_id=request.request_id,
            key_id=request.caller.key_id,
            caller=request.caller.name,
            model=request.turn.model.id,
            dialect=request.dialect,
            outcome=word,
            status=status,
            counted=self.counted,
            stop_reason=first.finished.stop_reason if first.finished else None,
            stream=request.turn.stream,
            warm=first.warm,
            path=self.path or first.path,
            prompt_chars=prompt_chars(request.turn),
            response_chars=sum(outcome.response_chars for outcome in self.outcomes),
            input_tokens=sum(usage.input_tokens for usage in usages),
            output_tokens=sum(usage.output_tokens for usage in usages),
            cache_read_tokens=sum(usage.cache_read_tokens for usage in usages),
            cache_write_tokens=sum(usage.cache_write_tokens for usage in usages),
            first_token_ms=round((min(firsts) - self.started_s) * 1000) if firsts else None,
            total_ms=round((now_s - self.started_s) * 1000),
        )


class Answering(NamedTuple):
    """A request that is being answered."""

    job: Job
    #: What happens, in all of the answers, as it comes.
    events: Iterator[Choice]
    #: What the cache did for it: "hit", "miss", "shared" or "bypass".
    cache: str = "bypass"

    def answers(self) -> tuple[Answer, ...]:
        """The whole answers, once the events are over. Raises UpstreamFailed."""
        return self.job.answers()


class CancellableClient:
    """A Client that can be made to leave: for answers that nobody waits for any more."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.left = False

    def fileno(self) -> int:
        """See Client."""
        return self._client.fileno()

    def gone(self) -> bool:
        """See Client."""
        return self.left or self._client.gone()

    def can_detect_hangup(self) -> bool:
        """See Client."""
        return self._client.can_detect_hangup()

    def leave(self) -> None:
        """See Client."""
        self.left = True


#: Stop reasons after which claude waits for the client and does nothing by itself.
_PARKABLE = ("end_turn", "stop_sequence", "tool_use")
#: How long claude may take to rewind, which is a matter of milliseconds; and the pause after a
#: process that could not.
_REWIND_TIMEOUT_S = 2.0
_REWIND_PAUSE_S = 60.0


def tick_s_of(config: Config, turn: Turn) -> float:
    """Return the silence after which a client needs a sign of life; 0 = never."""
    return (config.heartbeat_ms if turn.stream else config.whole_silence_ms) / 1000


class TurnRunner:
    """Gets one answer from claude: waits for a place, takes a process, converses with it, and puts
    it away.

    The ways to an answer are tried from the quickest to the slowest: a parked process that holds
    the conversation is continued; one that holds another last question is rewound; else a fresh
    process is given the whole conversation (rebuilt). A process that dies before any text was sent
    is replaced by a fresh one.
    """

    def __init__(self, app: App, request: Request, record: AnswerRecord, client: Client) -> None:
        self._app = app
        self._request = request
        self._record = record
        self._turn = record.turn
        config = self._config = app.config
        self._history = history_of(self._turn, request.caller.scope, config.system_prompt)
        self._limits = WaitLimits(
            client=client,
            deadline_s=record.started_s + config.timeout_ms / 1000,
            tick_s=tick_s_of(config, self._turn),
        )

    @contextlib.contextmanager
    def answering(self) -> Iterator[Iterator[Event]]:
        """Give the events of the answer; leaving the block frees its place and its process. The
        log has its line before the last event, or before the failure, is passed on."""
        record = self._record
        try:
            with contextlib.ExitStack() as stack:
                yield self._logged(self._events(stack))
        except ClientGone:
            self._log("info", "answer_abandoned")
            raise
        except OcpError as error:
            record.fail(error)
            if isinstance(error, UnknownModel):
                error.message += self._other_models()
            if isinstance(error, LoginLost):
                self._app.login_lost()
            error.logged = True
            detail = error.message if error.status >= 500 or isinstance(error, LoginLost) else None
            self._log(
                "warn", "answer_failed", status=error.status, error=type(error).__name__,
                detail=detail,
            )
            raise

    def _logged(self, events: Iterator[Event]) -> Iterator[Event]:
        for event in events:
            if isinstance(event, Finished):
                self._log("info", "answer_finished")
            yield event

    def _log(self, level: str, name: str, **more: object) -> None:
        record, request = self._record, self._request
        if record.is_logged:
            return
        record.is_logged = True
        self._app.log.event(
            level, name, request_id=request.request_id, caller=request.caller.name,
            dialect=request.dialect, **record.fields(self._app.clock()), **more,
        )

    def _other_models(self) -> str:
        """Return what to tell a client whose model the API does not know."""
        models = self._app.models
        others = [name for name in models.names() if models.find(name).id != self._turn.model.id]
        return f" Use one of: {', '.join(others)}." if others else ""

    # -- acquire ----------------------------------------------------------------------------------

    def _events(self, stack: contextlib.ExitStack) -> Iterator[Event]:
        app, record = self._app, self._record
        if not app.parking.holds(self._history, self._turn.messages[-1]):
            # A process that holds the conversation continues it also while claude is updated.
            app.check_program()
        slot = stack.enter_context(app.gate.slot(self._request.caller))
        yield from slot.wait(self._limits, app.clock)
        stack.callback(self._give_up)
        for events in self._attempts():
            try:
                yield from events
                return
            except UpstreamFailed:
                if record.first_token_s is not None or not record.lost_its_process:
                    raise
                self._give_up()
                if record.has_output:
                    record.add(Restarted(), app.clock())
                    yield Restarted()
        yield from self._rebuild()

    def _attempts(self) -> Iterator[Iterator[Event]]:
        """Give the ways to the answer, the quickest first: the events of each."""
        record, last = self._record, self._turn.messages[-1]
        parked, record.parted_at = self._app.parking.take(self._history, last)
        path = "continued"
        if parked is None:
            parked, path = self._take_rewound(), "rewound"
        if parked is not None:
            yield self._continue(parked, path)
        yield self._rebuild()

    def _take_rewound(self) -> Parked | None:
        """Return a process that held the question of another turn and has forgotten it.

        Not in agent mode: what claude's own tools have begun would not be forgotten."""
        app = self._app
        if self._config.is_agent or self._turn.messages[-1].has_results:
            return None
        parked = app.parking.take_rewindable(self._history, self._config, app.gate.running)
        if parked is None:
            return None
        self._record.process = parked.process
        if self._rewind(parked):
            return parked
        app.parking.pause_rewinds(_REWIND_PAUSE_S)
        self._give_up()
        return None

    def _rewind(self, parked: Parked) -> bool:
        """Make a process forget its last question; return whether it did. One that fails counts
        as one that refuses: another process is used."""
        if parked.question is None:
            return False
        deadline_s = self._app.clock() + _REWIND_TIMEOUT_S
        limits = self._limits._replace(deadline_s=deadline_s, tick_s=0.0)
        try:
            (reply,) = parked.process.control([rewind_line(parked.question)], limits)
        except (UpstreamFailed, UpstreamTimeout):
            return False
        parked.process.rewinds += 1
        return was_rewound(reply)

    # -- converse ---------------------------------------------------------------------------------

    def _continue(self, parked: Parked, path: str) -> Iterator[Event]:
        """Send a process the one message that it does not hold yet."""
        record, process, message = self._record, parked.process, self._turn.messages[-1]
        record.process, record.warm, record.path = process, True, path
        results, steps = results_to_tell(message, parked.history.context), []
        record.question = parked.question
        if not results:
            record.question = rewind_point_of(self._turn)
            steps = [continuation(self._turn, process.version, record.question)]
        yield from self._converse(process, TurnInput(steps, results))

    def _rebuild(self) -> Iterator[Event]:
        """Send the whole conversation to a fresh process."""
        app, record, turn = self._app, self._record, self._turn
        record.path = "rebuilt" if len(turn.messages) > 1 else "fresh"
        if turn.model.known:
            # Other models have to prove that they exist before processes wait for them.
            app.spares.want(turn.model.argument)
        process, record.warm = app.spares.take(turn.model.argument)
        record.process, record.question = process, rewind_point_of(turn)
        app.wakeups.put("tend")
        process.tools, process.told = ToolServer(turn.tools), len(turn.messages) - 1
        steps = conversation(
            turn, app.config.system_prompt, process.version, agent=app.config.is_agent,
            question=record.question,
        )
        yield from self._converse(process, TurnInput(steps))

    def _converse(self, process: ClaudeProcess, given: TurnInput) -> Iterator[Event]:
        """Give the events of the answer. The process is parked before the last of them is passed
        on, so that the client's next message finds it."""
        record, turn = self._record, self._turn
        final_only = self._config.is_agent and self._config.agent_text == "final"
        offered, _ = turn.offered
        reader = TurnReader(offered, turn.output_schema, final_only=final_only)
        record.readers.append(reader)
        bounds = Bounds(turn.options, turn.output_schema)
        for heard in process.converse(given, self._limits, reader):
            for event in bounds.events(heard):
                if bounds.ended and isinstance(event, Finished):
                    event = event._replace(usage=record.usage)
                record.add(event, self._app.clock())
                if isinstance(event, Finished):
                    self._put_away(process, event, is_cut=bounds.ended)
                yield event
            if bounds.ended:
                return

    # -- release ----------------------------------------------------------------------------------

    def _put_away(self, process: ClaudeProcess, finished: Finished, *, is_cut: bool) -> None:
        """Park the process of a complete answer if it can serve again, else stop it. `is_cut`
        means that claude still writes an answer that was ended here."""
        app, record = self._app, self._record
        app.account.answered()
        app.spares.want(process.model_id)
        record.process = None
        if finished.stop_reason in _PARKABLE and not is_cut and self._may_serve_again(process):
            answer = record.answer()
            last = message_digest(Message("assistant", answer.blocks))
            if self._turn.output_schema is not None:
                # It ended in a call of claude's own.
                last = _DEAD_END
            awaiting = frozenset(call["id"] for call in answer.calls)
            history = self._history._replace(digests=(*self._history.digests, last))
            app.parking.put(process, history, awaiting, record.question)
        else:
            # With a call unanswered, or after a limit, claude would send another request on its
            # own.
            is_complete = finished.stop_reason in ("end_turn", "stop_sequence") and not is_cut
            app.spares.stop(process, graceful=is_complete)
        app.wakeups.put("tend")

    def _may_serve_again(self, process: ClaudeProcess) -> bool:
        """Return whether a process is worth parking after a complete answer."""
        if process.misjudged or not self._app.is_current(process):
            return False
        if self._turn.output_schema is None or not self._config.parked_processes:
            return self._config.parked_processes > 0
        can_rewind = process.version >= REWINDS_ALL_SINCE and not self._config.is_agent
        # Tool results go to a fresh process, and a call without its result cannot be rewound past.
        is_rewindable = can_rewind and self._record.question is not None
        return is_rewindable and not self._record.answer().calls

    def _give_up(self) -> None:
        """Stop the process of an answer that is not complete."""
        process, self._record.process = self._record.process, None
        if process is not None:
            self._app.spares.stop(process, graceful=False)
            self._app.wakeups.put("tend")


# -- all requests ---------------------------------------------------------------------------------

#: Stop reasons of answers that are cached for the same request.
_CACHEABLE = ("end_turn", "stop_sequence")
#: The tokens that quotas reserve for the answer of a client that sets no limit.
_LIKELY_ANSWER_TOKENS = 4_096


class Requests:
    """The requests that are being answered: their quotas, the cache, several answers to one
    request, and one row of usage for each."""

    def __init__(self, app: App) -> None:
        self._app = app
        # Guards the list.
        self._lock = threading.Lock()
        self._jobs: list[Job] = []

    def __len__(self) -> int:
        return len(self._jobs)

    @contextlib.contextmanager
    def answering(self, request: Request) -> Iterator[Answering]:
        """Give the answer to a request. Nothing but a place in the quotas is acquired before the
        events are read; leaving the block frees everything, and by then the row of usage is
        written."""
        app = self._app
        app.metrics.add("ocp_requests_started_total")
        job = Job(request, app.clock(), Reservation(None, 0))
        with self._lock:
            self._jobs.append(job)
        try:
            if app.draining:
                raise Draining("The server is stopping; try again in a moment.", retry_after_s=5)
            # Only now that it can be seen among those that run: a key that ends now ends it.
            app.keys.current(request.caller)
            job.reservation = app.ledger.reserve(
                request.caller, self._likely_tokens(request), requests=request.turn.choices,
                bounded=request.turn.options.max_tokens is not None,
            )
            if is_cacheable(request.turn, app.config):
                with self._from_cache(job) as answering:
                    yield answering
            else:
                app.cache.bypassed()
                with self._produced(job) as choices:
                    yield Answering(job, choices)
        except ClientGone as left:
            self._settle(job, job.ended_by or left)
            if job.ended_by is not None:
                raise job.ended_by from None
            raise
        except Exception as error:
            self._settle(job, error if isinstance(error, OcpError) else OcpError(str(error)))
            raise
        finally:
            app.ledger.release(job.reservation)
            with self._lock:
                self._jobs.remove(job)

    def end_unwanted(self) -> None:
        """End the requests whose keys were revoked or have expired, and tell their clients."""
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            try:
                self._app.keys.current(job.request.caller)
            except Unauthorized as ended:
                job.ended_by = job.ended_by or ended
                job.request.client.leave()

    def check_quota(self, caller: Caller, dialect: Dialect) -> None:
        """Refuse, before its body is read, a request whose quota is used up. Raises
        QuotaExceeded, QueueFull, sqlite3.Error."""
        metrics = self._app.metrics
        try:
            self._app.ledger.check(caller)
        except OcpError as error:
            metrics.add("ocp_requests_started_total")
            word = error.error_code or error.openai_type
            metrics.add("ocp_requests_total", dialect=dialect.name, model="other", outcome=word)
            raise

    def running(self) -> list[Json]:
        """Return what can be seen of each request, oldest first."""
        with self._lock:
            jobs = list(self._jobs)
        return [job.glance(self._app.clock()) for job in jobs]

    def _likely_tokens(self, request: Request) -> int:
        """Return the tokens that the request is likely to take of its key's quotas."""
        turn = request.turn
        if request.caller.key_id is None:
            return 0
        maximum = min(turn.options.max_tokens or _LIKELY_ANSWER_TOKENS, turn.model.max_tokens)
        return sum(estimated_tokens(turn.choice(i)) + maximum for i in range(turn.choices))

    # -- cached and shared answers ----------------------------------------------------------------

    @contextlib.contextmanager
    def _from_cache(self, job: Job) -> Iterator[Answering]:
        """Give the cached answer, or the one that is on its way to all who sent the same."""
        app, config, request = self._app, self._app.config, job.request
        key = cache_key(request.turn, request.caller, config.system_prompt)
        try:
            place = app.cache.find(key, config.cache_ttl_ms / 1000)
        except OSError as problem:
            raise cannot_start(problem) from None
        flight = place.flight
        if flight is None:
            job.path = "cached"
            stored = enumerate(place.answers)
            events = ((index, event) for index, answer in stored for event in replayed(answer))
            yield Answering(job, self._recorded(job, events), place.word)
            return
        try:
            if place.word == "miss":
                self._start_producer(job, flight, config)
            else:
                job.path = "shared"
            tick_s = tick_s_of(config, request.turn)
            followed = flight.follow(request.client, tick_s, app.clock)
            yield Answering(job, self._recorded(job, followed), place.word)
        finally:
            app.cache.leave(flight)

    def _recorded(self, job: Job, choices: Iterator[Choice]) -> Iterator[Choice]:
        """Record events that another request's process made."""
        for index, event in choices:
            job.outcomes[index].add(event, self._app.clock())
            if isinstance(event, Finished) and job.finished:
                self._settle(job)
            yield index, event

    def _start_producer(self, job: Job, flight: Flight, config: Config) -> None:
        """Start a thread that produces the answer, so that it outlives the client that sent the
        request first. The row of usage and the reservation are the producer's from now on."""
        produced = Job(
            job.request._replace(client=flight.client), job.started_s, job.reservation
        )
        thread = threading.Thread(
            target=self._produce, args=(produced, flight, config), daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            failure = UpstreamFailed("The server is short of threads.", retry_after_s=5)
            self._app.cache.settle(flight, (), config)
            flight.end(failure)
            raise failure from None
        job.settles()
        job.reservation = Reservation(None, 0)

    def _produce(self, job: Job, flight: Flight, config: Config) -> None:
        app = self._app
        answers: tuple[Answer, ...] = ()
        failure: OcpError | None = OcpError("OCP failed; its log has the details.")
        try:
            with self._produced(job) as choices:
                for choice in choices:
                    if not isinstance(choice[1], Tick):
                        flight.add(choice)
            failure = None
            if all(a.stop_reason in _CACHEABLE and not a.refusal for a in job.answers()):
                answers = job.answers()
        except ClientGone as left:
            self._settle(job, left)
        except OcpError as error:
            failure = error
            self._settle(job, error)
        except Exception as error:
            self._settle(job, failure)
            app.log.event(
                "error", "request_broke", request_id=job.request.request_id,
                error=format_failure(error),
            )
        finally:
            app.cache.settle(flight, answers, config)
            flight.end(failure)
            app.ledger.release(job.reservation)

    # -- produced answers -------------------------------------------------------------------------

    @contextlib.contextmanager
    def _produced(self, job: Job) -> Iterator[Iterator[Choice]]:
        """Give claude's answers, with the row of usage written before the last event."""
        if len(job.outcomes) > 1:
            with contextlib.closing(self._side_by_side(job)) as choices:
                yield choices
            return
        with self._answer(job, job.outcomes[0], job.request.client) as events:
            yield ((0, event) for event in events)

    @contextlib.contextmanager
    def _answer(
        self, job: Job, record: AnswerRecord, client: Client
    ) -> Iterator[Iterator[Event]]:
        def settled(events: Iterator[Event]) -> Iterator[Event]:
            for event in events:
                if isinstance(event, Finished) and job.finished:
                    self._settle(job)
                yield event

        runner = TurnRunner(self._app, job.request, record, client)
        with runner.answering() as events:
            yield settled(events)

    def _side_by_side(self, job: Job) -> Generator[Choice, None, None]:
        """Give the events of several answers, as they come. Each answer has a thread, a slot and
        a process of its own; the first failure fails all of them and ends the others."""
        arrivals: queue.SimpleQueue[tuple[int, Event | BaseException | None]] = queue.SimpleQueue()
        leaving = CancellableClient(job.request.client)

        def run(index: int, record: AnswerRecord) -> None:
            try:
                with self._answer(job, record, leaving) as events:
                    for event in events:
                        arrivals.put((index, event))
                arrivals.put((index, None))
            except BaseException as error:
                arrivals.put((index, error))

        waiting = enumerate(job.outcomes)
        running: set[int] = set()

        def begin(count: int) -> None:
            for index, record in itertools.islice(waiting, count):
                running.add(index)
                record.started_s = self._app.clock()
                threading.Thread(target=run, args=(index, record), daemon=True).start()

        try:
            begin(MAX_CHOICES)
            while running:
                index, arrived = arrivals.get()
                if isinstance(arrived, BaseException):
                    raise arrived
                if arrived is None:
                    running.remove(index)
                    begin(1)
                elif index == min(running) or not isinstance(arrived, Tick):
                    yield index, arrived
        finally:
            leaving.left = True
            for process in [record.process for record in job.outcomes]:
                if process is not None:
                    process.interrupt()

    # -- usage ------------------------------------------------------------------------------------

    def _settle(self, job: Job, error: OcpError | ClientGone | None = None) -> None:
        """Write the row of usage of a request that is over, once. One that was refused before
        any work is counted and logged only, or refusals could fill the disk."""
        app = self._app
        if not job.settles():
            return
        word, status = "ok", 200
        if isinstance(error, OcpError):
            word, status = error.error_code or error.openai_type, error.status
        elif error is not None:
            word, status = error.word, error.status
        row = job.row(word, status, time.time(), app.clock())
        self._count(row, known=job.request.turn.model.known)
        if job.path:
            app.log.event(
                "info", "answer_reused", request_id=row.request_id, caller=row.caller,
                dialect=row.dialect, path=job.path, model=row.model, stream=row.stream,
                total_ms=row.total_ms, outcome=word,
            )
        if isinstance(error, OcpError) and error.rejected_before_work and not job.was_asked:
            return
        try:
            app.ledger.record(row, job.reservation)
        except sqlite3.Error as problem:
            # On a full disk, for example. Answers go on; the row is written when there is room.
            app.log.event("error", "usage_not_kept", error=str(problem))

    def _count(self, row: UsageRow, *, known: bool) -> None:
        metrics = self._app.metrics
        # Clients choose names that models.json does not list: they are not label values.
        model = row.model if known else "other"
        metrics.add("ocp_requests_total", dialect=row.dialect, model=model, outcome=row.outcome)
        metrics.observe("ocp_request_seconds", row.total_ms / 1000, dialect=row.dialect)
        if row.first_token_ms is not None:
            metrics.observe("ocp_first_token_seconds", row.first_token_ms / 1000, model=model)
        for kind in ("input", "output", "cache_read", "cache_write"):
            count = getattr(row, f"{kind}_tokens")
            if count:
                metrics.add("ocp_tokens_total", count, model=model, kind=kind)
        if row.path is not None:
            metrics.add("ocp_answers_total", path=row.path)


# ==== 27. App ================================================================
# Owns every long-lived object. The main thread is the housekeeper: it sleeps until a wakeup, then
# does what is due.

#: How often old rows of usage are deleted.
_PRUNE_EVERY_S = 3600.0
#: How long claude may take to say how much of the plan is used; it gives up itself before that.
_USAGE_TIMEOUT_S = 8.0
#: How often a login that was refused is looked at again, by asking claude for it.
_LOGIN_LOOK_S = 45.0

#: How long a start waits for claude to tell its version.
_FIRST_LOOK_S = 2.0

#: Smaller bodies are parsed side by side.
_LARGE_BODY_BYTES = 262_144

#: How often the housekeeper looks around, and how often while something is due.
_TEND_EVERY_S = 1.0
_TEND_SOON_S = 0.05


class App:
    """The server without its sockets."""

    def __init__(
        self,
        config: Config,
        *,
        environ: Mapping[str, str],
        log: Log,
        models: Models,
        demo_command: tuple[str, ...] = (),
        clock: Clock = time.monotonic,
    ) -> None:
        """Create the state folder. `demo_command` starts the stand-in instead of claude. Raises
        HomeInUse."""
        self.log = log
        self.models = models
        self.demo = bool(demo_command)
        self.started_s = clock()
        self.started_at_s = time.time()
        self.clock = clock
        self._environ = dict(environ)
        self._open_state(config)
        self._work_folder = work_folder(config, environ)
        self.metrics = Metrics()
        self.refusals = Refusals(log)
        self.wrong_keys = WrongKeys(clock)
        self.account = Account()
        self.gate = Gate(self.config)
        self.program = ClaudeProgram(config, environ, demo_command)
        self.claude_folder = ClaudeFolder(
            os.path.join(config.home_path, "claude"), environ, log,
            # Only there the login may depend on the folder.
            self._has_login if sys.platform == "darwin" else None,
        )
        self.spares = Spares(self._spawn, clock)
        self.parking = Parking(clock)
        self.responses = Responses(clock)
        self.cache = Cache(clock)
        self.draining = False
        # Held while a large body is parsed.
        self._parsing_lock = threading.Lock()
        self.requests = Requests(self)
        # Guards the next field.
        self._pauses_lock = threading.Lock()
        self._pauses_until_s: dict[str, float] = {}
        #: Open client connections.
        self.connections = Connections()
        #: Wakes the housekeeper: "tend" or "stop". Signal handlers may put into it.
        self.wakeups: queue.SimpleQueue[str] = queue.SimpleQueue()
        #: What processes said about the plan, until somebody takes it to the account.
        self._notices: queue.SimpleQueue[Json] = queue.SimpleQueue()
        self._watchdog = Watchdog()
        # Guards the two fields below: the program that processes are of, and the kind of failure
        # that the log has of it, until there is one again.
        self._program_lock = threading.Lock()
        self._seen_program: Program | None = None
        self._told_unavailable: type[OcpError] | None = None
        #: What stood for claude's credentials when the login was looked at, and when that was.
        self._login_stamp: object = None
        self._login_look_s = -math.inf

    @property
    def config(self) -> Config:
        """Return the settings of this moment. Read them once where they have to be consistent."""
        return self.settings.config

    def _open_state(self, config: Config) -> None:
        """Open the database and read what the first request needs."""
        self.state_folder = StateFolder(config, self.log, self.clock, is_demo=self.demo)
        self.store = self.state_folder.store
        config = self.state_folder.with_admin_key(config)
        self.settings = Settings(self.store, config, self._environ)
        for name, why in self.settings.problems:
            self.log.event("warn", "stored_setting_ignored", setting=name, why=why)
        self.keys = Keys(self.store)
        for key_id, why in self.keys.problems:
            self.log.event("error", "stored_key_ignored", id=key_id, why=why)
        self.ledger = Ledger(self.store)
        self.sessions = Sessions(self.store)
        self._prune_at_s = self._write_use_at_s = self.clock()

    def _tend_storage(self) -> None:
        """Write what had to wait for the database, and look where it is."""
        with contextlib.suppress(sqlite3.Error):
            self.store.catch_up()
            if self.clock() >= self._write_use_at_s:
                self._write_use_at_s = self.clock() + _USED_EVERY_S
                self.keys.write_use()
        self.state_folder.check()

    def _spawn(self, model_id: str) -> ClaudeProcess:
        program = self.program.resolve()
        with contextlib.suppress(OSError):
            # Whoever cleans up temporary files may have taken it away.
            os.makedirs(self._work_folder, mode=0o700, exist_ok=True)
        env = {
            **child_environment(self._environ, self.config), **self.claude_folder.environment()
        }
        try:
            process = ClaudeProcess(
                program.command, model_id, self.config, env=env, cwd=self._work_folder,
                version=program.version, watchdog=self._watchdog, notice=self._notices.put,
                clock=self.clock,
            )
        except ClaudeMissing as error:
            raise self.program.tempered(error) from None
        self.log.event("debug", "claude_spawned", pid=process.pid, model=model_id)
        return process

    # -- claude -------------------------------------------------------------------------------

    def check_program(self) -> None:
        """Notice a claude that was installed, updated or removed. Raises ClaudeUnavailable."""
        self._take_notices()
        self._watch_program()

    def is_current(self, process: ClaudeProcess) -> bool:
        """Return whether a process is of the claude that was seen last."""
        seen = self._seen_program
        return seen is None or process.version == seen.version

    def login_lost(self) -> None:
        """Stop using processes whose login the API has refused."""
        self.account.refused()
        self._login_stamp, self._login_look_s = self.claude_folder.login_stamp(), self.clock()
        self.claude_folder.login_changed()
        self._drop_idle()

    # -- housekeeping -------------------------------------------------------------------------

    def run(self) -> None:
        """Do the housekeeping until a wakeup says stop. For the main thread."""
        self.spares.want(self.models.find(self.config.default_model).argument)
        wakeup = ""
        while wakeup != "stop":
            wait_s = self.tend()
            try:
                wakeup = self.wakeups.get(timeout=wait_s)
            except queue.Empty:
                wakeup = ""

    def look(self) -> None:
        """Find claude before the first request, so that /health knows it from the start. Do not
        wait for a program that does not answer."""
        first = threading.Thread(target=self._look, daemon=True)
        first.start()
        first.join(_FIRST_LOOK_S)

    def _look(self) -> None:
        with contextlib.suppress(OcpError):
            self.program.resolve()

    def tend(self) -> float:
        """Do what is due; return the seconds until the next call. Never raises."""
        try:
            for process in self.parking.tend(self.config):
                self.spares.stop(process, graceful=False)
            self.requests.end_unwanted()
            self._tend_storage()
            self._take_notices()
            self.cache.tend(self.config)
            self._prune()
            self.refusals.tend()
            self._watch_login()
            self._watch_program()
            self.spares.tend(self.config)
        except OcpError as error:
            self._log_unavailable(error)
            # Without claude no spares are started, but stopping processes have to be reaped.
            return _TEND_SOON_S if self.spares.reap() else _TEND_EVERY_S
        except Exception as error:
            self.log.event("error", "housekeeping_failed", error=format_failure(error))
        return _TEND_SOON_S if self.spares.has_work_soon() else _TEND_EVERY_S

    def _watch_program(self) -> None:
        """Notice a claude that was installed, updated or removed, and stop offering processes of
        another one. Raises ClaudeUnavailable."""
        try:
            program = self.program.resolve()
        except ClaudeAway:
            # Running processes do not need the file to go on.
            raise
        except OcpError:
            self._drop_idle()
            raise
        with self._program_lock:
            before, self._seen_program = self._seen_program, program
            is_news = program != before or self._told_unavailable is not None
            self._told_unavailable = None
        if before not in (None, program):
            self._drop_idle()
        if is_news:
            self.log.event("info", "claude_found", version=program.version_text)

    def _log_unavailable(self, error: OcpError) -> None:
        """Log why no process can be started, once for each kind of reason."""
        with self._program_lock:
            is_news = self._told_unavailable is not type(error)
            self._told_unavailable = type(error)
        if is_news:
            level = "warn" if error.retryable else "error"
            self.log.event(level, "claude_unavailable", detail=error.message)

    def _watch_login(self) -> None:
        """Check a login that was refused again: when claude's credentials have changed, and from
        time to time, because they are not always in a file."""
        if not self.account.is_refused:
            return
        stamp, now_s = self.claude_folder.login_stamp(), self.clock()
        if stamp != self._login_stamp or now_s - self._login_look_s >= _LOGIN_LOOK_S:
            self._login_stamp, self._login_look_s = stamp, now_s
            # claude takes seconds to answer; the housekeeper must not wait for it.
            threading.Thread(target=self._look_at_login, daemon=True).start()

    def _look_at_login(self) -> None:
        if self._has_login(self.claude_folder.environment()):
            self.claude_folder.login_changed()
            # Idle processes may still hold the login that was refused.
            self._drop_idle()
            self.account.doubt()
            self.log.event("info", "login_found")

    def _take_notices(self) -> None:
        """Process what claude processes have reported about the plan and their version."""
        while True:
            try:
                notice = self._notices.get_nowait()
            except queue.Empty:
                return
            version = version_in(str(notice.get("claude_code_version", "")))
            news = plan_event(notice)
            if version is not None:
                self.program.correct(version)
            elif news is not None:
                self.account.hear(news)

    def _prune(self) -> None:
        """Delete rows of usage that are too old, once an hour."""
        if self.clock() < self._prune_at_s:
            return
        self._prune_at_s = self.clock() + _PRUNE_EVERY_S
        try:
            self.ledger.prune(self.config.usage_days)
        except sqlite3.Error as problem:
            self.log.event("error", "usage_not_pruned", error=str(problem))

    def learn_plan(self, client: Client) -> None:
        """Refresh what is known about the plan, without spending anything: ask an idle process, if
        there is one, at most once a minute. Raises ClientGone."""
        self._take_notices()
        process = self.spares.borrow()
        if process is None:
            return
        if not self.account.may_ask():
            self.spares.put_back(process)
            return
        try:
            watch = WaitLimits(client, self.clock() + _USAGE_TIMEOUT_S, 0.0)
            answers = process.control(usage_lines(), watch)
        except OcpError as error:
            self.log.event("warn", "plan_not_learned", detail=error.message)
        else:
            self.spares.put_back(process)
            process = None
            self.account.hear(plan_report(answers[1]))
        finally:
            if process is not None:
                self.spares.stop(process, graceful=False)

    def claim_interval(self, what: str, pause_s: float) -> bool:
        """Return whether this was not done for so long, and count it as done now."""
        now_s = self.clock()
        with self._pauses_lock:
            self._pauses_until_s = {w: at for w, at in self._pauses_until_s.items() if at > now_s}
            is_due = what not in self._pauses_until_s
            if is_due:
                self._pauses_until_s[what] = now_s + pause_s
            return is_due

    @contextlib.contextmanager
    def parsing(self, size_bytes: int) -> Iterator[None]:
        """Enter while a body of this size is parsed. Large bodies are parsed one at a time, because
        they would multiply each other's memory, and without the garbage collector, which would
        scan all the new objects again and again."""
        if size_bytes < _LARGE_BODY_BYTES:
            yield
            return
        with self._parsing_lock:
            gc.disable()
            try:
                yield
            finally:
                gc.enable()

    def change_setting(self, name: str, value: object) -> object:
        """Change a setting for good; see Settings.change."""
        value = self.settings.change(name, value)
        self.gate.configure(self.config)
        self.cache.tend(self.config)
        self.wakeups.put("tend")
        return value

    def _has_login(self, variables: Mapping[str, str]) -> bool:
        """Return whether claude is logged in with these variables."""
        return self.program.has_login(variables)

    def _drop_idle(self) -> None:
        """Stop all idle processes: the program or its login has changed."""
        self.spares.drop()
        for process in self.parking.drop():
            self.spares.stop(process, graceful=False)

    def drain(self) -> None:
        """Refuse new requests and wait, `drain_ms` at most, for those that run and for clients
        that have not read their answers yet."""
        self.draining = True
        self.state_folder.announce_stop()
        give_up_s = self.clock() + self.config.drain_ms / 1000
        while (self.requests or self.connections.is_any_unread()) and self.clock() < give_up_s:
            self.spares.reap()
            try:
                if self.wakeups.get(timeout=0.02) == "stop":
                    # The second signal stops the server at once.
                    return
            except queue.Empty:
                pass

    def close(self) -> None:
        """Stop every child and close the database and the log."""
        self.refusals.tend(at_once=True)
        self._drop_idle()
        self.spares.close()
        self._watchdog.close()
        with contextlib.suppress(sqlite3.Error):
            self.store.catch_up()
            self.keys.write_use()
        self.state_folder.close()


# ==== 28. API description ====================================================
# What a route is, and the OpenAPI document that describes all of them. The table of routes is the
# source of the document; only bodies and query strings are described here.


class Route(NamedTuple):
    """One row. A name in braces in the path is passed to the endpoint, percent-decoded."""

    method: str
    path: str
    access: Access
    dialect: Dialect
    endpoint: Callable[..., None]

    @property
    def operation(self) -> str:
        """A name for what the route does."""
        name = self.endpoint.__name__
        return f"{name}_{self.dialect.name}" if name == "answer" else name


def _shape(required: Iterable[str] = (), **properties: object) -> Json:
    """The schema of an object."""
    return {"type": "object", "properties": properties, "required": list(required)}


_TEXT: Json = {"type": "string"}
_NAME: Json = {"type": "string", "minLength": 1}
_FLAG: Json = {"type": ["boolean", "null"]}
_TOKENS_LIMIT: Json = {"type": ["integer", "null"], "minimum": 1, "maximum": 1_000_000}
_SHARE: Json = {"type": ["number", "null"], "minimum": 0, "maximum": 1}
_STOP: Json = {
    "anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": _TEXT, "maxItems": 4}]
}


def _content(*kinds: str) -> Json:
    """The content of a message: text, or parts of these types."""
    parts = [_shape(["type", "text"], type={"const": kind}, text=_NAME) for kind in kinds]
    return {"anyOf": [_NAME, {"type": "array", "minItems": 1, "items": {"anyOf": parts}}]}


def _messages(roles: Iterable[str], content: Json) -> Json:
    message = _shape(["role", "content"], role={"enum": list(roles)}, content=content)
    return {"type": "array", "minItems": 1, "items": message}


_TOOLS: Json = {"type": ["array", "null"], "items": {"type": "object"}}
#: The input of responses.
_ITEMS: Json = {
    "anyOf": [
        _NAME,
        _messages(("system", "developer", "user", "assistant"), _content("input_text")),
    ]
}
_LIMIT: Json = {"type": ["integer", "null"], "minimum": 0, "maximum": 10**15}
_KEY_PROPERTIES: Json = {
    "name": {"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9 ._-]{0,62}[A-Za-z0-9._-]$"},
    "expiry": {"type": ["string", "null"], "description": "2027-01-31, an ISO time, 30d, 12h"},
    "models": {"type": ["array", "null"], "items": _NAME},
    "maxConcurrent": {"type": ["integer", "null"], "minimum": 0, "maximum": 1000},
    "note": {"type": ["string", "null"], "maxLength": 500},
}
_QUOTA_SHAPE = {
    **_shape(**{quota.name: _LIMIT for quota in QUOTAS}), "additionalProperties": False
}

#: The bodies of requests, by operation.
_BODIES: dict[str, Json] = {
    "answer_chat": _shape(
        ["messages"],
        model=_NAME,
        messages=_messages(("system", "developer", "user", "assistant"), _content("text")),
        stream=_FLAG, max_tokens=_TOKENS_LIMIT, max_completion_tokens=_TOKENS_LIMIT,
        temperature={"type": ["number", "null"], "minimum": 0, "maximum": 2}, top_p=_SHARE,
        stop=_STOP, n={"type": ["integer", "null"], "minimum": 1, "maximum": MAX_CHOICES},
        tools=_TOOLS, ocp_session_id={"type": ["string", "null"], "maxLength": 256},
        reasoning_effort={"enum": [None, "none", *EFFORT_BUDGETS]},
        response_format={"type": ["object", "null"]},
    ),
    "answer_messages": _shape(
        ["messages", "max_tokens"],
        model=_NAME, max_tokens={"type": "integer", "minimum": 1, "maximum": 1_000_000},
        messages=_messages(("user", "assistant"), _content("text")), system=_content("text"),
        stream=_FLAG, temperature=_SHARE, top_p=_SHARE, tools=_TOOLS,
        stop_sequences={"type": ["array", "null"], "items": _TEXT},
    ),
    "count_tokens": _shape(
        ["messages"], model=_NAME, system=_content("text"), tools=_TOOLS,
        messages=_messages(("user", "assistant"), _content("text")),
    ),
    "answer_responses": _shape(
        ["input"],
        model=_NAME,
        input=_ITEMS,
        instructions={"type": ["string", "null"]}, stream=_FLAG, store=_FLAG,
        max_output_tokens=_TOKENS_LIMIT, top_p=_SHARE, tools=_TOOLS,
        temperature={"type": ["number", "null"], "minimum": 0, "maximum": 2},
        previous_response_id={"type": ["string", "null"]},
    ),
    "answer_compaction": _shape(
        ["input"], model=_NAME, input=_ITEMS, instructions={"type": ["string", "null"]},
        previous_response_id={"type": ["string", "null"]},
    ),
    "count_input_tokens": _shape(
        ["input"], model=_NAME, input=_ITEMS, instructions={"type": ["string", "null"]},
        tools=_TOOLS, previous_response_id={"type": ["string", "null"]},
    ),
    "answer_completions": _shape(
        ["prompt"], model=_NAME, prompt=_NAME, stream=_FLAG, max_tokens=_TOKENS_LIMIT,
        temperature={"type": ["number", "null"], "minimum": 0, "maximum": 2}, top_p=_SHARE,
        stop=_STOP, echo=_FLAG, n={"type": ["integer", "null"], "minimum": 1, "maximum": 8},
    ),
    "no_embeddings": _shape(["input"], model=_NAME, input=_TEXT),
    "create_key": {
        **_shape(**_KEY_PROPERTIES, quota=_QUOTA_SHAPE), "additionalProperties": False
    },
    "change_key": {**_shape(**_KEY_PROPERTIES), "additionalProperties": False},
    "change_quota": {**_QUOTA_SHAPE, "minProperties": 1},
    "change_settings": {
        "type": "object", "additionalProperties": False,
        "properties": {
            name: {"type": [_JSON_TYPES[type(row.default)], "null"]}
            for name, row in live_settings().items()
        },
    },
}
#: What may stand in the query string, by operation.
_QUERIES: dict[str, dict[str, Json]] = {
    "get_models": {
        "limit": {"type": "integer", "minimum": 0, "maximum": 1000},
        "after_id": {"type": "string"},
        "before_id": {"type": "string"},
    },
    "get_logs": {
        "n": {"type": "integer", "minimum": 0, "maximum": 1000},
        "level": {"enum": ["all", "audit", *LEVELS]},
    },
    "get_response": {"stream": {"type": "boolean"}},
    "get_input_items": {
        "limit": {"type": "integer", "minimum": 1, "maximum": 100},
        "order": {"enum": ["asc", "desc"]},
        "after": _NAME,
    },
    "get_api_usage": {
        "since": {"type": "string", "format": "date-time"},
        "until": {"type": "string", "format": "date-time"},
        "hours": {"type": "integer", "minimum": 0, "maximum": 9600},
        "limit": {"type": "integer", "minimum": 0, "maximum": 500},
        "all": {"type": "boolean"},
    },
}
#: The statuses of answers that are no errors in form, by operation; 200 where it is not here.
_STATUSES = {"create_key": ("201",), "change_settings": ("200", "207", "400")}
#: Types of answers besides JSON, by operation.
_MEDIA = {
    "get_metrics": "text/plain", "get_events": "text/event-stream", "get_dashboard": "text/html",
    "get_connect": "text/plain",
}


def _operation(route: Route) -> Json:
    """The description of one route."""
    name = route.operation
    summary = " ".join((route.endpoint.__doc__ or "").split()).partition(". ")[0].rstrip(".") + "."
    placed = [("path", part, True, _NAME) for part in re.findall(r"{(\w+)}", route.path)]
    placed += [("query", part, False, shape) for part, shape in _QUERIES.get(name, {}).items()]
    media = _MEDIA.get(name, "application/json")
    good: Json = {"description": "Done.", "content": {media: {"schema": {}}}}
    if "stream" in _BODIES.get(name, {}).get("properties", {}):
        good["content"]["text/event-stream"] = {"schema": {}}
    failed = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    found: Json = {
        "operationId": name,
        "summary": summary,
        "parameters": [
            {"in": place, "name": part, "required": required, "schema": shape}
            for place, part, required, shape in placed
        ],
        "responses": {
            **dict.fromkeys(_STATUSES.get(name, ("200",)), good),
            "4XX": {"description": "The request cannot be answered.", "content": failed},
            "5XX": {"description": "The server or claude failed.", "content": failed},
        },
        "security": [] if route.access is Access.PUBLIC else [{"bearer": []}, {"x-api-key": []}],
        "tags": [route.access.value],
    }
    if name in _BODIES:
        body = {"application/json": {"schema": _BODIES[name]}}
        found["requestBody"] = {"required": True, "content": body}
    return found


def openapi(routes: Iterable[Route]) -> Json:
    """The OpenAPI 3.1 document of these routes."""
    paths: Json = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    error = _shape(["error"], error=_shape(["message", "type"], message=_TEXT, type=_TEXT))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "OCP",
            "version": VERSION,
            "description": "Your Claude plan, through the official claude program, as an API.",
        },
        "paths": paths,
        "components": {
            "schemas": {"Error": error},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


# ==== 29. Dashboard ==========================================================
# One static page, dashboard.html beside this file, in which no value of the server is ever
# written: it fetches JSON and sets text. Its policy allows exactly its own style and script, by
# their hashes, and nothing from outside.

DASHBOARD_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "dashboard.html")

#: What is shown where this file was copied without the dashboard.
_PAGE_WITHOUT_DASHBOARD = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>OCP</title>
<style>body { font: 1rem/1.5 system-ui, sans-serif; max-width: 40rem; margin: 2rem auto; }</style>
</head>
<body>
<h1>OCP</h1>
<p>The file dashboard.html does not lie beside this server's ocp_server.py. Put it there from the
same version of OCP and load this page again, or use <code>ocp status</code>.</p>
<p id="state">Asking /health ...</p>
<script>
const state = document.getElementById("state");
fetch("health").then((reply) => reply.json()).then((health) => {
  state.textContent = `OCP ${health.version}: ${health.status}` +
    (health.fix ? `. ${health.fix}` : `, up for ${health.uptimeHuman}.`);
}).catch(() => { state.textContent = "The server does not answer /health."; });
</script>
</body>
</html>
"""


class Page(NamedTuple):
    """An HTML page and the headers that it is sent with."""

    html: str
    headers: Mapping[str, str]


def _hash_of(tag: str, html: str) -> str:
    """Return what a policy calls the one element of this name in a page."""
    inside = html.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    found = base64.b64encode(hashlib.sha256(inside.encode("utf-8")).digest())
    return f"'sha256-{found.decode('ascii')}'"


@functools.lru_cache(maxsize=2)
def _page_of(html: str) -> Page:
    policy = (
        "default-src 'none'", f"style-src {_hash_of('style', html)}",
        f"script-src {_hash_of('script', html)}", "connect-src 'self'", "img-src data:",
        "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    )
    return Page(html, {
        "Content-Security-Policy": "; ".join(policy),
        "Referrer-Policy": "no-referrer",
        "ETag": f'"{hashlib.sha256(html.encode("utf-8")).hexdigest()[:32]}"',
        "Cache-Control": "no-cache",
    })


def dashboard_page() -> Page:
    """Return the dashboard, or a page that says where it belongs."""
    try:
        with open(DASHBOARD_FILE, encoding="utf-8", newline="") as file:
            return _page_of(file.read())
    except (OSError, UnicodeDecodeError):
        return _page_of(_PAGE_WITHOUT_DASHBOARD)


# ==== 30. Endpoints ==========================================================
# One function for each route: (app, exchange, **names in the path). They read the request from
# the exchange, answer through it, and raise what goes wrong.


class HttpExchange(Protocol):
    """What an endpoint sees of a request."""

    client: Client
    dialect: Dialect
    request_id: str
    caller: Caller
    #: The IP address of the client.
    peer: str
    headers: http.client.HTTPMessage
    query: Mapping[str, str]
    headers_out: dict[str, str]
    #: All that there is to ask for.
    routes: tuple[Route, ...]

    def body(self) -> bytearray:
        """Read the body. Raises BadRequest, TooLarge, MemoryFull, RequestTimeout."""

    def send_json(self, value: object, status: int = 200) -> None:
        """Answers with JSON."""

    def send_text(self, text: str, content_type: str) -> None:
        """Answers 200 with text."""

    def send_nothing(self, status: int) -> None:
        """Answers without a body."""

    def send_events(self, frames: Iterator[bytes]) -> None:
        """Answers 200 with server-sent events that are rendered already."""

    def send_stream(
        self, renderer: Renderer, events: Iterator[Choice], finished: Callable[[Json], None]
    ) -> None:
        """Answers 200 with server-sent events; the status goes out with the first of them.
        `finished` gets what the renderer put together, before the end of an answer is sent."""

    def keep_alive(self, events: Iterator[Choice], silence_s: float) -> None:
        """Waits for the end of the events; white space goes into a silence that grows too long."""


def json_of(data: bytearray) -> object:
    """Return the value of a request's body. Raises BadRequest."""
    if data.startswith(codecs.BOM_UTF8):
        del data[:len(codecs.BOM_UTF8)]
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4]:
        raise BadRequest("The body is not UTF-8: send the JSON in UTF-8.")
    if not data or data.isspace():
        raise BadRequest("The body is empty; it has to be a JSON object.")
    if has_many_values(data):
        raise BadRequest("The body holds too many arrays, objects and values.")
    try:
        return from_json(data)
    except ValueError as problem:
        reason = one_line(str(problem), 120)
        raise BadRequest(f"The body is not JSON: {reason}.") from None


#: How a beta of the API begins that asks for the long window.
_LONG_CONTEXT_BETA = "context-1m-"


def _check_allowed(app: App, caller: Caller, model: Model) -> None:
    """Raises Forbidden when the caller may not use this model."""
    if caller.models and model.id not in app.models.same(caller.models):
        raise Forbidden(
            f"This key may use {', '.join(caller.models)} only.",
            param="model", code="model_not_allowed",
        )


def _parsing_for(app: App, exchange: HttpExchange, *, counted: bool) -> ParseEnvironment:
    """What the dialect has to know of the server and of this caller."""
    config, scope = app.config, exchange.caller.scope
    limits = Limits(
        config.image_allow_url, config.max_image_bytes,
        config.max_images, config.max_image_total_bytes,
    )
    return ParseEnvironment(
        app.models, config.default_model, limits,
        recall=lambda response_id: app.responses.messages(scope, response_id),
        item=lambda item_id: app.responses.item(scope, item_id),
        session=lambda session_id, system: app.sessions.messages(
            scope, session_id, system, config.session_ttl_ms / 1000
        ),
        count_only=counted,
        long_context=_LONG_CONTEXT_BETA in exchange.headers.get("anthropic-beta", ""),
    )


def _parsed(app: App, exchange: HttpExchange, *, counted: bool = False) -> Turn:
    """The Turn of the request's body; all of it when it is only `counted`, however long."""
    if not counted:
        app.requests.check_quota(exchange.caller, exchange.dialect)
    data = exchange.body()
    # While it came the key may have got other limits, or its end.
    exchange.caller = app.keys.current(exchange.caller)
    with app.parsing(len(data)):
        turn = _turn_of(app, exchange, json_of(data), counted=counted)
    if not turn.model.known:
        app.log.event(
            "warn", "model_not_listed", model=turn.model.id, request_id=exchange.request_id
        )
    _tell_changes(exchange, turn)
    return turn


def _turn_of(app: App, exchange: HttpExchange, body: object, *, counted: bool) -> Turn:
    config = app.config
    if config.session_id and isinstance(body, dict):
        named = body.pop("session_id", None) or exchange.headers.get("X-Session-Id")
        body.setdefault(SESSION_FIELD, named)
    turn = exchange.dialect.parse(body, _parsing_for(app, exchange, counted=counted))
    _check_allowed(app, exchange.caller, turn.model)
    turn, dropped = (turn, 0) if counted else truncate_to_budget(turn, config.max_prompt_chars)
    if dropped:
        turn = turn._replace(adjusted=(*turn.adjusted, ("messages_dropped", dropped)))
        app.log.event(
            "warn", "prompt_truncated", dropped_messages=dropped, request_id=exchange.request_id
        )
    if config.cache_ttl_ms:
        turn = turn._replace(fresh=wants_cache_bypass(body, sampled_too=config.cache_sampled))
    return turn


def _tell_changes(exchange: HttpExchange, turn: Turn) -> None:
    """Names in the response's headers what was left out of the request and what was repaired."""
    if turn.ignored:
        exchange.headers_out["X-OCP-Ignored-Params"] = header_list(turn.ignored)
    if turn.adjusted:
        words = (f"{word}={count}" for word, count in turn.adjusted)
        exchange.headers_out["X-OCP-Adjusted"] = header_list(words)


def answer(app: App, exchange: HttpExchange) -> None:
    """Every route that asks a model."""
    dialect, turn = exchange.dialect, _parsed(app, exchange)
    request = Request(turn, exchange.caller, exchange.client, exchange.request_id, dialect.name)
    with app.requests.answering(request) as answering:
        def remember(body: Json) -> None:
            # Before the client has its last byte: its next request may name this answer.
            if answering.job.finished and (dialect.stores(turn) or turn.session_id):
                _remember(app, exchange, turn, answering.answers()[0], body)

        exchange.headers_out["X-OCP-Cache"] = answering.cache
        if turn.stream:
            exchange.send_stream(dialect.renderer(turn), answering.events, remember)
        else:
            exchange.keep_alive(answering.events, app.config.whole_silence_ms / 1000)
            body = dialect.answer_body(turn, list(answering.answers()))
            remember(body)
            exchange.send_json(body)


def _remember(app: App, exchange: HttpExchange, turn: Turn, answer: Answer, body: Json) -> None:
    """Keeps the conversation under the name that the client will use for it."""
    blocks = [block for block in answer.blocks if block["type"] in ("text", "tool_use")]
    messages = [*turn.messages, Message("assistant", blocks)]
    if exchange.dialect.stores(turn) and body:
        told = exchange.dialect.stored_system_messages(turn)
        items = [stored_item(item) for item in turn.wire["items"]]
        app.responses.put(exchange.caller.scope, body, [*told, *messages], items, app.config)
    if not turn.session_id:
        return
    try:
        app.sessions.put(exchange.caller.scope, turn, messages, app.config.session_ttl_ms / 1000)
    except sqlite3.Error as problem:
        # The answer is out; only its memory is lost, to a full disk for example.
        app.log.event("error", "session_not_kept", error=str(problem))


def get_sessions(app: App, exchange: HttpExchange) -> None:
    """GET /sessions: the conversations that the server remembers."""
    found = app.sessions.all(app.config.session_ttl_ms / 1000)
    names = {key.caller.scope: key.name for key in app.keys.all()}
    sessions = [{**entry, "caller": names.get(entry["caller"], entry["caller"])} for entry in found]
    exchange.send_json({"sessions": sessions})


def clear_sessions(app: App, exchange: HttpExchange) -> None:
    """DELETE /sessions: forgets all of them."""
    exchange.send_json({"cleared": app.sessions.clear()})


def clear_session(app: App, exchange: HttpExchange, id: str) -> None:
    """DELETE /sessions/{id}."""
    cleared = app.sessions.clear(id)
    if not cleared:
        raise NotFound(f"There is no session {one_line(id, 80)!r}.", param="id")
    exchange.send_json({"cleared": cleared})


def count_tokens(app: App, exchange: HttpExchange) -> None:
    """POST /v1/messages/count_tokens: an estimate, and it says so in a header."""
    turn = _parsed(app, exchange, counted=True)
    exchange.headers_out["X-OCP-Estimate"] = "true"
    exchange.send_json({"input_tokens": estimated_tokens(turn)})


def count_input_tokens(app: App, exchange: HttpExchange) -> None:
    """POST /v1/responses/input_tokens: the same estimate for a request for a response."""
    turn = _parsed(app, exchange, counted=True)
    exchange.headers_out["X-OCP-Estimate"] = "true"
    tokens = estimated_tokens(turn)
    exchange.send_json({"object": "response.input_tokens", "input_tokens": tokens})


def get_response(app: App, exchange: HttpExchange, id: str) -> None:
    """GET /v1/responses/{id}: a response that was stored."""
    found = app.responses.get(exchange.caller.scope, id)
    if exchange.query.get("stream", "").lower() not in ("", "false", "0"):
        raise Unsupported(
            "stream: a response is not streamed a second time; ask for it without `stream`.",
            param="stream",
        )
    exchange.send_json(found.body)


def cancel_response(app: App, exchange: HttpExchange, id: str) -> None:
    """POST /v1/responses/{id}/cancel: refused, since no response runs in the background."""
    app.responses.get(exchange.caller.scope, id)
    raise BadRequest(
        "This response is complete and cannot be cancelled. To stop one that is running, close "
        "its connection."
    )


#: How many input items are listed at once, unless the client says otherwise, and at most.
_ITEMS_EACH, _MAX_ITEMS = 20, 100


def get_input_items(app: App, exchange: HttpExchange, id: str) -> None:
    """GET /v1/responses/{id}/input_items: the items that a response came of."""
    query = Fields(dict(exchange.query))
    order = query.one_of("order", ("asc", "desc")) or "desc"
    limit = whole_number(exchange.query, "limit", _ITEMS_EACH, _MAX_ITEMS)
    if not limit:
        raise query.invalid("limit", f"a whole number from 1 to {_MAX_ITEMS}")
    items = app.responses.get(exchange.caller.scope, id).items
    items = items[::-1] if order == "desc" else items
    after = query.text("after")
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise BadRequest(f"after: there is no item {one_line(after, 80)!r}.", param="after")
        items = items[places[0] + 1:]
    page = items[:limit]
    exchange.send_json({
        "object": "list", "data": page, "has_more": len(items) > len(page),
        "first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None,
    })


def delete_response(app: App, exchange: HttpExchange, id: str) -> None:
    """DELETE /v1/responses/{id}."""
    app.responses.remove(exchange.caller.scope, id)
    exchange.send_json({"id": id, "object": "response", "deleted": True})


def no_embeddings(app: App, exchange: HttpExchange) -> None:
    """POST /v1/embeddings: says where to look instead."""
    raise NotFound(
        "There are no embeddings here: the models behind this server make none. Use a local "
        "embedding model, such as Ollama's nomic-embed-text, for this part of your tool."
    )


#: A fixed moment for "created", which clients want and nothing tells.
_MODELS_CREATED_S = 1_750_000_000


def _model_entry(model: Model) -> Json:
    """A model as OpenAI's clients know it and as Anthropic's do, and what neither tells."""
    return {
        "id": model.id,
        "object": "model",
        "created": _MODELS_CREATED_S,
        "owned_by": "anthropic",
        "type": "model",
        "created_at": iso_time(_MODELS_CREATED_S),
        "display_name": model.display_name,
        "max_input_tokens": model.context_window,
        "max_tokens": model.max_tokens,
        "lifecycle": "active",
        "context_window": model.context_window,
        "max_output_tokens": model.max_tokens,
        "reasoning": model.reasoning,
        "efforts": list(model.efforts),
    }


#: The longest page of the list of models.
_MAX_PAGE = 1000


def _page(query: Mapping[str, str], ids: list[str]) -> tuple[slice, bool]:
    """Return which of these ids belong to the page that is asked for in Anthropic's form, and
    whether the list goes on in its direction. Raises BadRequest."""
    def place(name: str, otherwise: int) -> int:
        if not query.get(name):
            return otherwise
        if query[name] not in ids:
            raise BadRequest(f"{name}: must be the id of an entry of this list.", param=name)
        return ids.index(query[name])

    first, end = place("after_id", -1) + 1, place("before_id", len(ids))
    limit = whole_number(query, "limit", 0, _MAX_PAGE) or _MAX_PAGE
    has_more = limit < end - first
    if query.get("before_id") and not query.get("after_id"):
        return slice(max(first, end - limit), end), has_more
    return slice(first, min(end, first + limit)), has_more


def get_models(app: App, exchange: HttpExchange) -> None:
    """GET /v1/models: those that the caller may use, or a page of them."""
    allowed = app.models.same(exchange.caller.models)
    models = [m for m in app.models.all() if (m.id in allowed if allowed else m.listed)]
    page, has_more = _page(exchange.query, [model.id for model in models])
    entries = [_model_entry(model) for model in models[page]]
    ends = [entries[0]["id"], entries[-1]["id"]] if entries else [None, None]
    exchange.send_json({
        "object": "list", "data": entries, "has_more": has_more,
        "first_id": ends[0], "last_id": ends[1],
    })


def get_model(app: App, exchange: HttpExchange, model: str) -> None:
    """GET /v1/models/{model}; an alias gives the model that it stands for."""
    found = app.models.find(model)
    _check_allowed(app, exchange.caller, found)
    exchange.send_json(_model_entry(found))


def _errors(app: App) -> int:
    """How many requests failed since the start."""
    over = app.metrics.total("ocp_requests_total")
    fine = sum(app.metrics.total("ocp_requests_total", outcome=w) for w in ("ok", "abandoned"))
    return over - fine


def _stats(app: App) -> Json:
    paths = ("continued", "rewound", "rebuilt", "fresh", "cached", "shared")
    return {
        "totalRequests": app.metrics.total("ocp_requests_started_total"),
        "activeRequests": app.gate.running,
        "queued": app.gate.waiting,
        "queueRejections": app.gate.refused,
        "spawned": app.spares.spawned,
        "errors": _errors(app),
        "timeouts": app.metrics.total("ocp_requests_total", outcome=str(UpstreamTimeout.code)),
        **{path: app.metrics.total("ocp_answers_total", path=path) for path in paths},
    }


def _condition(app: App) -> tuple[str, str]:
    """How the server is, "ok", "degraded" or "draining", and what to do about it."""
    problem = app.program.glance()[1]
    auth = app.account.verdict()
    if app.draining:
        return "draining", "The server is stopping."
    if problem is not None or auth["ok"] is False:
        return "degraded", problem.message if problem is not None else str(auth["message"])
    _, advice = app.state_folder.status
    return ("degraded", advice) if advice else ("ok", "")


def get_health(app: App, exchange: HttpExchange) -> None:
    """GET /health: public, so it tells no path, no prompt and no error text."""
    shown = app.config.advertised_key
    exchange.send_json({**_health(app), **({"anonymousKey": shown} if shown else {})})


def _health(app: App) -> Json:
    config, uptime_s = app.config, app.clock() - app.started_s
    program, problem = app.program.glance()
    status, fix = _condition(app)
    return {
        "status": status,
        "version": VERSION,
        "architecture": "warm processes",
        "demo": app.demo,
        "instanceName": config.instance_name,
        "uptime": round(uptime_s * 1000),
        "uptimeHuman": format_uptime(uptime_s),
        "authMode": config.mode,
        "tls": bool(config.tls_cert),
        "auth": app.account.verdict(),
        # Whether what claude tells its models leaves out who is logged in.
        "ownerHidden": app.claude_folder.is_private,
        # Where keys, settings and usage are kept: "disk", or what is wrong with that.
        "storage": app.state_folder.status[0],
        "storageFix": app.state_folder.status[1] or None,
        "claudeBinaryOk": problem is None,
        "claudeVersion": program.version_text if program is not None else None,
        "fix": fix or None,
        "stats": _stats(app),
        "concurrency": {
            "maxConcurrent": config.max_concurrent,
            "maxQueue": config.max_queue,
            "inflight": app.gate.running,
            "queued": app.gate.waiting,
            "queueRejections": app.gate.refused,
        },
        "spares": app.spares.idle(),
        "parked": len(app.parking),
    }


def get_ready(app: App, exchange: HttpExchange) -> None:
    """GET /ready: 200 if a request would be answered, as far as that is known, else 503."""
    status, fix = _condition(app)
    if status != "ok":
        raise NotReady(fix)
    exchange.send_json({"ready": True})


#: How often /api/events looks for news, and how long it is silent at most.
_EVENTS_EVERY_S = 0.5
_EVENTS_SILENCE_S = 15.0


def get_events(app: App, exchange: HttpExchange) -> None:
    """GET /api/events: what goes on, as server-sent events: `state` when it changes, `log` for new
    lines of the log."""
    exchange.send_events(_live(app, exchange.client))


def _live(app: App, client: Client) -> Iterator[bytes]:
    """The frames of /api/events, until the client or the server goes. Raises ClientGone."""
    seen, state = 0, b""
    spoken_s = app.clock()
    while not app.draining:
        frames = b""
        entries, seen = app.log.since(seen)
        if entries:
            frames += sse_event({"entries": entries}, "log")
        before, state = state, sse_event(_state(app), "state")
        frames += state if state != before else b""
        if not frames and app.clock() - spoken_s >= _EVENTS_SILENCE_S:
            frames = b": keepalive\n\n"
        if frames:
            spoken_s = app.clock()
            yield frames
        waiting = select.poll()
        if client.can_detect_hangup():
            waiting.register(client.fileno(), select.POLLIN)
        waiting.poll(_EVENTS_EVERY_S * 1000)
        if client.gone():
            raise ClientGone


def _state(app: App) -> Json:
    """What /api/events tells about the server: nothing that changes by itself all the time."""
    health = _health(app)
    for name in ("uptime", "uptimeHuman"):
        del health[name]
    return {
        "startedAt": iso_time(app.started_at_s),
        "health": health,
        "running": app.requests.running(),
        "plan": app.account.plan(),
        "cache": {**app.cache.stats(), "ttl": app.config.cache_ttl_ms},
        "connections": len(app.connections),
        "finished": app.metrics.total("ocp_requests_total"),
    }


_MAX_LOG_LINES = 1000


def get_logs(app: App, exchange: HttpExchange) -> None:
    """GET /logs?n=30&level=all: the newest events of that level or worse, oldest first; level=audit
    tells what the operator changed."""
    level = exchange.query.get("level", "all").lower()
    level = "warn" if level == "warning" else level
    if level not in ("all", "audit", *LEVELS):
        raise BadRequest(f"level: must be one of all, audit, {', '.join(LEVELS)}.", param="level")
    count = whole_number(exchange.query, "n", 30, _MAX_LOG_LINES)
    entries = app.log.recent(count, level)
    exchange.send_json({"count": len(entries), "level": level, "entries": entries})


def whole_number(query: Mapping[str, str], name: str, default: int, maximum: int) -> int:
    """A number of the query string, from 0 or 1 on. Raises BadRequest."""
    text = query.get(name, "") or str(default)
    if not re.fullmatch(r"[0-9]{1,9}", text) or not int(text) <= maximum:
        raise BadRequest(f"{name}: must be a whole number up to {maximum}.", param=name)
    return int(text)


# -- keys -------------------------------------------------------------------------------------


def _known_fields(fields: Fields, names: Iterable[str]) -> Fields:
    """The object, if it holds nothing but these fields. Raises BadRequest."""
    known = tuple(names)
    for name in fields.object:
        if name not in known:
            place = one_line(fields.path_of(name), 80)
            raise BadRequest(
                f"{place}: is not known here; there is {', '.join(known)}.", param=place
            )
    return fields


_SPAN = re.compile(r"([0-9]{1,6})([mhd])")
_SPAN_S = {"m": 60, "h": 3600, "d": 86_400}


def _expiry(fields: Fields) -> int | None:
    """When a key ends, in epoch seconds; None = never."""
    text = fields.text("expiry")
    if text is None:
        return None
    span = _SPAN.fullmatch(text.strip())
    try:
        at_s = time.time() + int(span[1]) * _SPAN_S[span[2]] if span else epoch_of(text)
    except (ValueError, OverflowError, OSError):
        what = "a time such as 2027-01-31 or 2027-01-31T12:00:00Z, or a span such as 30d or 12h"
        raise fields.invalid("expiry", what) from None
    if at_s <= time.time():
        raise fields.invalid("expiry", "in the future")
    return int(at_s)


def _allowed_models(app: App, fields: Fields) -> list[str]:
    """The ids of models that a key may use; empty = all."""
    found = []
    for name in fields.texts("models"):
        try:
            found.append(app.models.find(name).id)
        except UnknownModel as problem:
            raise BadRequest(problem.message, param="models") from None
    return list(dict.fromkeys(found))


def _note(fields: Fields) -> str:
    """The operator's note on a key; what is no UTF-8 cannot be kept."""
    text = one_line(fields.text("note") or "", _MAX_NOTE_CHARS)
    return text.encode("utf-8", "replace").decode("utf-8")


def _limits(fields: Fields) -> dict[str, int | None]:
    """The quotas that a body sets; None takes one away."""
    return {name: fields.integer(name, 0, 10**15) for name in fields.object}


_QUOTA_NAMES = tuple(quota.name for quota in QUOTAS)
_MAX_NOTE_CHARS = 500

#: The fields of a key that can be set: the name in JSON, the column, and how it is read.
_KEY_FIELDS: tuple[tuple[str, str, Callable[[App, Fields], object]], ...] = (
    ("name", "name", lambda app, fields: fields.required_text("name")),
    ("expiry", "expiry_s", lambda app, fields: _expiry(fields)),
    ("models", "models", _allowed_models),
    (
        "maxConcurrent", "max_concurrent",
        lambda app, fields: fields.integer("maxConcurrent", 0, 1000) or 0,
    ),
    ("note", "note", lambda app, fields: _note(fields)),
)


def _key_columns(app: App, fields: Fields) -> dict[str, object]:
    """The columns that a body sets."""
    return {
        column: read(app, fields) for name, column, read in _KEY_FIELDS if name in fields.object
    }


def _key_entry(key: Key) -> Json:
    def iso(epoch_s: int | None) -> str | None:
        return None if epoch_s is None else iso_time(epoch_s)

    limits = {
        "quota_" + re.sub("([A-Z])", r"_\1", name).lower(): key.quota.get(name)
        for name in _QUOTA_NAMES
    }
    return {
        "id": key.id,
        "keyPreview": key.preview,
        "name": key.name,
        "created_at": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(key.created_s)),
        "revoked": int(key.revoked_s is not None),
        **limits,
        "expiry": iso(key.expiry_s),
        "expired": key.expired(time.time()),
        "models": list(key.models),
        "maxConcurrent": key.max_concurrent,
        "note": key.note,
        "lastUsed": iso(key.used_s),
        "createdAt": iso(key.created_s),
        "revokedAt": iso(key.revoked_s),
    }


def _audit(app: App, exchange: HttpExchange, event: str, **fields: object) -> None:
    """A line in the log for whatever the operator changes."""
    app.log.audit(event, **fields, by=exchange.caller.name, peer=exchange.peer)


def get_keys(app: App, exchange: HttpExchange) -> None:
    """GET /api/keys: all keys, revoked ones too, newest first, with what they used of their
    quotas; never a secret."""
    keys = app.keys.all()
    reports = [app.ledger.quota_report(k) if k.revoked_s is None else None for k in keys]
    entries = [{**_key_entry(key), "quota": report} for key, report in zip(keys, reports)]
    exchange.send_json({"keys": entries})


def _told_warned(app: App, answer: Json) -> Json:
    """An answer about a change, with a warning where a restart would undo it."""
    _, advice = app.state_folder.status
    return {**answer, **({"warning": f"Not kept safely: {advice}"} if advice else {})}


@contextlib.contextmanager
def _audited_change(
    app: App, exchange: HttpExchange, event: str, key: Key, **fields: object
) -> Iterator[None]:
    """A change of a key that may hold in memory only, and ends what runs for it if need be."""
    late: StorageFailed | None = None
    try:
        yield
    except StorageFailed as failure:
        late = failure
    app.requests.end_unwanted()
    _audit(app, exchange, event, key=key.name, id=key.id, **fields, late=late and late.error_code)
    if late is not None:
        raise late


def create_key(app: App, exchange: HttpExchange) -> None:
    """POST /api/keys: a new key; its secret is in this answer and nowhere else."""
    known = [name for name, _, _ in _KEY_FIELDS]
    fields = _known_fields(Fields(json_of(exchange.body())), [*known, "quota"])
    columns = _key_columns(app, fields)
    quota = fields.child("quota")
    if quota is not None:
        limits = _limits(_known_fields(quota, _QUOTA_NAMES))
        columns["quota"] = {name: limit for name, limit in limits.items() if limit is not None}
    key, secret = app.keys.create(str(columns.pop("name", "")), columns)
    _audit(app, exchange, "key_created", key=key.name, id=key.id)
    made = {"id": key.id, "key": secret, **_key_entry(key)}
    exchange.send_json(_told_warned(app, made), status=201)


def get_key(app: App, exchange: HttpExchange, key: str) -> None:
    """GET /api/keys/{key}: one key, by its id or its name."""
    exchange.send_json(_key_entry(app.keys.find(key)))


def change_key(app: App, exchange: HttpExchange, key: str) -> None:
    """PATCH /api/keys/{key}: changes its name, expiry, models, maxConcurrent or note."""
    found = app.keys.find(key)
    fields = _known_fields(Fields(json_of(exchange.body())), [name for name, _, _ in _KEY_FIELDS])
    columns = _key_columns(app, fields)
    with _audited_change(app, exchange, "key_changed", found, fields=list(fields.object)):
        app.keys.change(found, columns)
    exchange.send_json(_told_warned(app, _key_entry(app.keys.find(str(found.id)))))


def revoke_key(app: App, exchange: HttpExchange, key: str) -> None:
    """DELETE /api/keys/{key}: the key is worth nothing from now on, and what runs for it ends; its
    usage is kept."""
    revoked = False
    with contextlib.suppress(NotFound):
        found = app.keys.find(key)
        with _audited_change(app, exchange, "key_revoked", found):
            revoked = app.keys.revoke(found)
    exchange.send_json(_told_warned(app, {"revoked": revoked, "idOrName": key}))


def rotate_key(app: App, exchange: HttpExchange, key: str) -> None:
    """POST /api/keys/{key}/rotate: a new secret for the key; the old one ends at once."""
    found = app.keys.find(key)
    secret = app.keys.rotate(found)
    _audit(app, exchange, "key_rotated", key=found.name, id=found.id)
    answer = {"id": found.id, "name": found.name, "key": secret}
    exchange.send_json(_told_warned(app, answer))


def get_quota(app: App, exchange: HttpExchange, key: str) -> None:
    """GET /api/keys/{key}/quota: each limit, what is used of it, and its reset."""
    found = app.keys.find(key)
    report = app.ledger.quota_report(found)
    exchange.send_json({"keyId": found.id, "name": found.name, "quota": report})


def change_quota(app: App, exchange: HttpExchange, key: str) -> None:
    """PATCH /api/keys/{key}/quota: sets limits, null takes one away; the others stay."""
    found = app.keys.find(key)
    limits = _limits(_known_fields(Fields(json_of(exchange.body())), _QUOTA_NAMES))
    if not limits:
        raise BadRequest(f"Name at least one of {', '.join(_QUOTA_NAMES)}.")
    quota = {n: limit for n, limit in {**found.quota, **limits}.items() if limit is not None}
    with _audited_change(app, exchange, "quota_updated", found, quota=limits):
        app.keys.change(found, {"quota": quota})
    exchange.send_json(_told_warned(app, {"ok": True, "idOrName": key, "quota": limits}))


# -- usage ------------------------------------------------------------------------------------

_MAX_RECENT = 500
#: How long one line of the log stands for whoever looks at everybody's usage.
_AUDIT_AGAIN_S = 60.0
_MAX_HOURS = 24 * 400


def _moment(query: Mapping[str, str], name: str, default_s: float) -> float:
    """A time of the query string: ISO 8601 or epoch seconds. Raises BadRequest."""
    text = query.get(name, "")
    try:
        if re.fullmatch(r"[0-9]{1,11}(\.[0-9]+)?", text):
            return float(text)
        # A plus in a query string means a space.
        return epoch_of(re.sub(r" (?=\d\d:?\d\d$)", "+", text)) if text else default_s
    except (ValueError, OverflowError, OSError):
        raise BadRequest(
            f"{name}: must be a time such as 2026-11-20T14:00:00Z, or epoch seconds.", param=name
        ) from None


def get_api_usage(app: App, exchange: HttpExchange) -> None:
    """GET /api/usage?since=&until=&hours=24&limit=50&all=true: what was used; one's own, or with
    `all` everybody's, which only the operator gets."""
    query, caller = exchange.query, exchange.caller
    limit = whole_number(query, "limit", 50, _MAX_RECENT)
    hours = whole_number(query, "hours", 24, _MAX_HOURS)
    until_s = _moment(query, "until", time.time() + 1)
    since_s = _moment(query, "since", until_s - hours * 3600)
    everybody = caller.is_admin and query.get("all", "").lower() in _TRUE_WORDS
    if everybody and app.claim_interval(f"usage {caller.name} {exchange.peer}", _AUDIT_AGAIN_S):
        # A dashboard that is open asks again and again.
        app.log.event("info", "admin_usage_full_scope", by=caller.name, peer=exchange.peer)
    report = app.ledger.report(since_s, until_s, limit, None if everybody else caller)
    exchange.send_json(
        {
            "since": iso_time(since_s),
            "until": iso_time(until_s),
            "scope": {"self": None if everybody else caller.name, "all": everybody},
            **report,
        }
    )


def _totals(app: App) -> Json:
    """The numbers that /usage and /status share."""
    stats = _stats(app)
    return {
        "totalRequests": stats["totalRequests"],
        "activeRequests": stats["activeRequests"],
        "errors": stats["errors"],
        "timeouts": stats["timeouts"],
        "uptime": format_uptime(app.clock() - app.started_s),
    }


#: The numbers of one model in /usage, and what they are called among the sums.
_MODEL_NUMBERS = (
    ("requests", "requests"), ("successes", "successes"), ("errors", "errors"),
    ("timeouts", "timeouts"), ("avgElapsed", "avg_elapsed_ms"), ("maxElapsed", "max_elapsed_ms"),
    ("avgPromptChars", "avg_prompt_chars"), ("maxPromptChars", "max_prompt_chars"),
)


def get_usage(app: App, exchange: HttpExchange) -> None:
    """GET /usage: how much of the plan is used, as far as claude told, and this run's numbers."""
    app.learn_plan(exchange.client)
    models = {
        row["model"]: {name: row[column] for name, column in _MODEL_NUMBERS}
        for row in app.ledger.by_model(app.started_at_s)
    }
    exchange.send_json({**app.account.report(), "proxy": _totals(app), "models": models})


def get_status(app: App, exchange: HttpExchange) -> None:
    """GET /status: the same in short, with the last errors."""
    app.learn_plan(exchange.client)
    status, _ = _condition(app)
    auth, totals = app.account.verdict(), _totals(app)
    words = {True: "ok", None: "unknown", False: auth["message"]}
    failed = [e for e in app.log.recent(1000, "warn") if e["event"] in _FAILURES]
    exchange.send_json(
        {
            "proxy": {
                "status": status, "version": VERSION, "uptime": totals["uptime"],
                "auth": words[auth["ok"]],
            },
            "requests": {
                "total": totals["totalRequests"], "active": totals["activeRequests"],
                "errors": totals["errors"], "timeouts": totals["timeouts"],
            },
            "plan": app.account.plan(),
            "recentErrors": [
                {"time": e["ts"], "message": without_paths(str(e.get("detail") or e.get("error")))}
                for e in failed[-3:]
            ],
        }
    )


#: Events of the log that are failures of requests.
_FAILURES = ("answer_failed", "request_broke")


# -- settings, cache, metrics -----------------------------------------------------------------


def get_settings(app: App, exchange: HttpExchange) -> None:
    """GET /settings: what can be changed while the server runs, with ranges and sources."""
    exchange.send_json(app.settings.report())


def change_settings(app: App, exchange: HttpExchange) -> None:
    """PATCH /settings {name: value}: changes each for good; null gives the start's value back.

    200 if all were taken, 207 for some; for none 400, or 503 or 507 if the database is to blame.
    """
    results: Json = {}
    errors = []
    refused = BadRequest.status
    for name, value in Fields(json_of(exchange.body())).object.items():
        try:
            results[name] = {"ok": True, "value": app.change_setting(name, value)}
            _audit(app, exchange, "setting_changed", setting=name, value=value)
        except KeyError:
            reason = f"unknown setting; there is {', '.join(live_settings())}"
        except ValueError as problem:
            reason = str(problem)
        except sqlite3.Error as problem:
            failure = storage_failure(problem, _NOTHING_CHANGED)
            reason, refused = f"could not be stored: {failure.message}", failure.status
        if name not in results:
            results[name] = {"error": reason}
            errors.append(f"{one_line(name, 80)}: {reason}")
    taken = len(results) - len(errors)
    status = 200 if not errors else 207 if taken else refused
    more = {"errors": errors} if errors else {}
    exchange.send_json({"results": results, **more, "current": app.settings.report()}, status)


def get_cache_stats(app: App, exchange: HttpExchange) -> None:
    """GET /cache/stats."""
    limits = {"maxBytes": app.config.cache_max_bytes, "ttl": app.config.cache_ttl_ms}
    exchange.send_json({**app.cache.stats(), **limits})


def clear_cache(app: App, exchange: HttpExchange) -> None:
    """DELETE /cache: forgets all answers that are kept."""
    cleared = app.cache.clear()
    _audit(app, exchange, "cache_cleared", cleared=cleared)
    exchange.send_json({"cleared": cleared})


def _gauges(app: App) -> dict[str, dict[Labels, float]]:
    """The metrics that are looked up at the moment of asking."""
    cache, program = app.cache.stats(), app.program.glance()[0]
    windows = app.account.windows()
    words = {"hit": "hits", "miss": "misses", "shared": "shared", "bypass": "bypassed"}
    login = app.account.verdict()["ok"]
    claude = program.version_text if program is not None else ""
    return {
        "ocp_build_info": {(("version", VERSION), ("claude", claude)): 1},
        "ocp_uptime_seconds": {(): app.clock() - app.started_s},
        "ocp_running": {(): app.gate.running},
        "ocp_queued": {(): app.gate.waiting},
        "ocp_queue_refusals_total": {(): app.gate.refused},
        "ocp_connections": {(): len(app.connections)},
        "ocp_spawns_total": {(): app.spares.spawned},
        "ocp_spares": {(("model", m),): count for m, count in app.spares.idle().items()},
        "ocp_parked": {(): len(app.parking)},
        "ocp_cache_requests_total": {(("result", w),): cache[n] for w, n in words.items()},
        "ocp_cache_entries": {(): cache["entries"]},
        "ocp_cache_bytes": {(): cache["sizeBytes"]},
        "ocp_plan_utilization": {
            (("window", name),): window.utilization for name, window in windows.items()
            if window.utilization is not None
        },
        "ocp_plan_resets_timestamp_seconds": {
            (("window", name),): window.resets_at_s for name, window in windows.items()
            if window.resets_at_s is not None
        },
        "ocp_logged_in": {} if login is None else {(): int(login)},
    }


def get_dashboard(app: App, exchange: HttpExchange) -> None:
    """GET /dashboard: the page for the operator; what it shows it asks for with their key."""
    page = dashboard_page()
    exchange.headers_out.update(page.headers)
    if exchange.headers.get("If-None-Match") == page.headers["ETag"]:
        exchange.send_nothing(304)
        return
    exchange.send_text(page.html, "text/html; charset=utf-8")


#: The client set-up, which this file can do without.
CONNECT_SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ocp_connect.py")


def get_connect(app: App, exchange: HttpExchange) -> None:
    """GET /connect: ocp_connect.py, to be piped into python3 on a client."""
    try:
        with open(CONNECT_SCRIPT, encoding="utf-8") as file:
            script = file.read()
    except (OSError, UnicodeDecodeError):
        raise NotFound(
            "ocp_connect.py does not lie beside this server's ocp_server.py. Put it there, or "
            "copy it to the client and run: python3 ocp_connect.py HOST"
        ) from None
    exchange.headers_out["X-OCP-Version"] = VERSION
    exchange.send_text(script, "text/plain; charset=utf-8")


def get_openapi(app: App, exchange: HttpExchange) -> None:
    """GET /openapi.json: this API, described for programs."""
    exchange.send_json(openapi(exchange.routes))


def get_metrics(app: App, exchange: HttpExchange) -> None:
    """GET /metrics: Prometheus' text format."""
    text = app.metrics.text(_gauges(app))
    exchange.send_text(text, "text/plain; version=0.0.4; charset=utf-8")


# ==== 31. Routes =============================================================
# The table of routes. Paths match exactly, after slashes too many are dropped; those below /v1
# are served without it too, and with it twice, because users write base addresses both ways.


ROUTES = (
    #     method    path                         access         dialect      endpoint
    Route("POST",   "/v1/chat/completions",      Access.CALLER, CHAT,        answer),
    Route("POST",   "/v1/messages",              Access.CALLER, MESSAGES,    answer),
    Route("POST",   "/v1/messages/count_tokens", Access.CALLER, MESSAGES,    count_tokens),
    Route("POST",   "/v1/responses",             Access.CALLER, RESPONSES,   answer),
    Route("POST",   "/v1/responses/compact",     Access.CALLER, COMPACTION,  answer),
    Route("POST",   "/v1/responses/input_tokens", Access.CALLER, RESPONSES,  count_input_tokens),
    Route("GET",    "/v1/responses/{id}",        Access.CALLER, RESPONSES,   get_response),
    Route("DELETE", "/v1/responses/{id}",        Access.CALLER, RESPONSES,   delete_response),
    Route("GET",    "/v1/responses/{id}/input_items", Access.CALLER, RESPONSES, get_input_items),
    Route("POST",   "/v1/responses/{id}/cancel", Access.CALLER, RESPONSES,   cancel_response),
    Route("POST",   "/v1/completions",           Access.CALLER, COMPLETIONS, answer),
    Route("POST",   "/v1/embeddings",            Access.CALLER, CHAT,        no_embeddings),
    Route("GET",    "/v1/models",                Access.CALLER, CHAT,        get_models),
    Route("GET",    "/v1/models/{model}",        Access.CALLER, CHAT,        get_model),
    Route("GET",    "/sessions",                 Access.ADMIN,  CHAT,        get_sessions),
    Route("DELETE", "/sessions",                 Access.ADMIN,  CHAT,        clear_sessions),
    Route("DELETE", "/sessions/{id}",            Access.ADMIN,  CHAT,        clear_session),
    Route("GET",    "/api/keys",                 Access.ADMIN,  CHAT,        get_keys),
    Route("POST",   "/api/keys",                 Access.ADMIN,  CHAT,        create_key),
    Route("GET",    "/api/keys/{key}",           Access.ADMIN,  CHAT,        get_key),
    Route("PATCH",  "/api/keys/{key}",           Access.ADMIN,  CHAT,        change_key),
    Route("DELETE", "/api/keys/{key}",           Access.ADMIN,  CHAT,        revoke_key),
    Route("POST",   "/api/keys/{key}/rotate",    Access.ADMIN,  CHAT,        rotate_key),
    Route("GET",    "/api/keys/{key}/quota",     Access.ADMIN,  CHAT,        get_quota),
    Route("PATCH",  "/api/keys/{key}/quota",     Access.ADMIN,  CHAT,        change_quota),
    Route("GET",    "/api/usage",                Access.CALLER, CHAT,        get_api_usage),
    Route("GET",    "/api/events",               Access.ADMIN,  CHAT,        get_events),
    Route("GET",    "/usage",                    Access.ADMIN,  CHAT,        get_usage),
    Route("GET",    "/status",                   Access.ADMIN,  CHAT,        get_status),
    Route("GET",    "/settings",                 Access.ADMIN,  CHAT,        get_settings),
    Route("PATCH",  "/settings",                 Access.ADMIN,  CHAT,        change_settings),
    Route("GET",    "/cache/stats",              Access.ADMIN,  CHAT,        get_cache_stats),
    Route("DELETE", "/cache",                    Access.ADMIN,  CHAT,        clear_cache),
    Route("GET",    "/logs",                     Access.ADMIN,  CHAT,        get_logs),
    Route("GET",    "/metrics",                  Access.ADMIN,  CHAT,        get_metrics),
    Route("GET",    "/health",                   Access.PUBLIC, CHAT,        get_health),
    Route("GET",    "/ready",                    Access.PUBLIC, CHAT,        get_ready),
    Route("GET",    "/dashboard",                Access.PUBLIC, CHAT,        get_dashboard),
    Route("GET",    "/connect",                  Access.PUBLIC, CHAT,        get_connect),
    Route("GET",    "/openapi.json",             Access.PUBLIC, CHAT,        get_openapi),
)


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(path)))


#: A route, and the names in a path that it fits.
Match = tuple[Route, dict[str, str]]


class Router:
    """Finds the route of a request."""

    def __init__(self, routes: tuple[Route, ...]) -> None:
        self._routes = [(_pattern(route.path), route) for route in routes]

    def matches(self, path: str) -> list[Match]:
        """The routes of a path, whatever their methods; a path that the table spells out holds no
        id. Raises BadRequest."""
        path = re.sub("/+", "/", path).rstrip("/") or "/"
        while path.startswith("/v1/v1/"):
            path = path[len("/v1"):]
        found = []
        for pattern, route in self._routes:
            match = pattern.fullmatch(path) or pattern.fullmatch("/v1" + path)
            if match:
                names = {key: _decoded(value) for key, value in match.groupdict().items()}
                found.append((route, names))
        return [match for match in found if not match[1]] or found

    def choose(self, method: str, path: str, matches: list[Match]) -> Match:
        """The one of a path's routes that takes this method. Raises NotFound,
        MethodNotAllowed."""
        wanted = "GET" if method == "HEAD" else method
        for route, names in matches:
            if route.method == wanted:
                return route, names
        if matches:
            allowed = methods_of(matches)
            raise MethodNotAllowed(f"{path} takes {', '.join(allowed)}.", allowed)
        raise NotFound(f"There is no {one_line(path, 80)} here; /openapi.json lists what there is.")


def methods_of(matches: list[Match]) -> list[str]:
    """The methods that a path takes; empty when there is no such path."""
    found = [route.method for route, _ in matches]
    if "GET" in found:
        found.append("HEAD")
    return [*found, "OPTIONS"] if found else []


def _decoded(text: str) -> str:
    try:
        return urllib.parse.unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise BadRequest("The path holds percent escapes that are no UTF-8.") from None


# ==== 32. HTTP server ========================================================
# One thread for each connection; a head and a body arrive in time and in bounds or are
# refused; every error is rendered in one place. Tells nobody what software runs here beyond its
# name, and keeps nothing of a connection when it ends.

#: What a whole head may take, its request line included, and how many headers it may have.
_MAX_HEAD_BYTES = 65_536
_MAX_HEADERS = 100
#: What the extensions and the trailer of a chunked body may take together.
_MAX_CHUNK_EXTRA_BYTES = 65_536
#: How long a connection may rest between two requests, and how long one that has shown no key.
_REST_S = 120.0
_STRANGER_REST_S = 10.0


#: The headers of a stream; the last one keeps reverse proxies from holding it back.
_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(%b) ([\x21-\x7e]+) (HTTP/1\.[01])" % _TOKEN)
_HEADER_LINE = re.compile(rb"(%b):([\t\x20-\x7e\x80-\xff]*)" % _TOKEN)
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})([ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?)\r\n")

#: Headers of which a request has one at most: of two, a proxy and OCP could go by different ones.
_SINGLE_HEADERS = (
    "Host", "Origin", "Authorization", "x-api-key", "Content-Type", "Content-Length",
    "Content-Encoding", "Transfer-Encoding", "Expect",
)


def head_lines(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a head as they arrive, without their ends; none if nothing comes. Raises
    HeadTooLarge, BadRequest."""
    left, count = _MAX_HEAD_BYTES, 0
    while True:
        line = stream.readline(left + 1)
        left -= len(line)
        if line == (b"\r\n" if count else b""):
            return
        if left < 0 or count > _MAX_HEADERS:
            raise HeadTooLarge(
                f"The head of the request has more than {_MAX_HEAD_BYTES} bytes or "
                f"{_MAX_HEADERS} headers."
            )
        if line == b"\r\n":
            # Some clients end a body with one line end too many.
            continue
        if not line.endswith(b"\r\n"):
            raise BadRequest("The head of the request is broken: each line has to end with CR LF.")
        count += 1
        yield line[:-2]


def parsed_request_line(line: bytes) -> tuple[str, str, str]:
    """Return the method, the target and the version. Raises BadRequest."""
    found = _REQUEST_LINE.fullmatch(line)
    if found is None:
        raise BadRequest(
            "The request line is broken: it has to be METHOD PATH HTTP/1.1, with percent escapes "
            "for what is not ASCII; HTTP/0.9 and HTTP/2 are not spoken here."
        )
    method, target, version = (part.decode("ascii") for part in found.groups())
    # A second slash at the start would make a host of what comes behind it.
    return method, re.sub("^/+", "/", target), version


def parsed_headers(lines: Iterable[bytes]) -> http.client.HTTPMessage:
    """Return the headers in these lines. Raises BadRequest."""
    headers = http.client.HTTPMessage()
    for line in lines:
        found = _HEADER_LINE.fullmatch(line)
        if found is None:
            raise BadRequest(
                "A header line of the request is broken: it has to be NAME: VALUE on one line, "
                "without control characters."
            )
        name, value = found.groups()
        headers[name.decode("ascii")] = value.strip(b" \t").decode("latin-1")
    for single in _SINGLE_HEADERS:
        if len(headers.get_all(single, [])) > 1:
            raise BadRequest(f"The request has more than one {single}.")
    return headers


def body_length(headers: http.client.HTTPMessage, version: str) -> int | None:
    """Return the length of the body; None if it comes in chunks. Raises BadRequest when that is
    not clear."""
    length, coding = headers.get("Content-Length"), headers.get("Transfer-Encoding")
    if coding is not None and length is not None:
        raise BadRequest("Content-Length and Transfer-Encoding exclude each other.")
    if coding is not None and version == "HTTP/1.0":
        raise BadRequest("HTTP/1.0 has no Transfer-Encoding: send a Content-Length, or HTTP/1.1.")
    if coding is not None and coding.lower() != "chunked":
        raise BadRequest("Transfer-Encoding: only chunked is taken.")
    if length is not None and not re.fullmatch("[0-9]{1,15}", length):
        raise BadRequest("Content-Length is not one number.")
    return None if coding is not None else int(length or 0)


class Exchange(BaseHTTPRequestHandler):
    """One connection, and on it one request at a time. See HttpExchange."""

    protocol_version = "HTTP/1.1"
    server: Server

    # -- a connection -------------------------------------------------------------------------

    def setup(self) -> None:
        """Puts a reader with a deadline in front of the socket."""
        self.client: Connection = self.request
        self._reader = DeadlineReader(self.client)
        self.rfile = self._buffered = io.BufferedReader(self._reader, _MAX_HEAD_BYTES)
        #: Lines of a head that the base class puts together.
        self._headers_buffer: list[bytes] = []
        self.app = self.server.app
        self.peer = self.client.peer
        self.routes = ROUTES
        #: Whether the connection has brought a request already.
        self._served = False
        self._body_hold = Hold(self.client.cut)
        self._forget()

    def finish(self) -> None:
        """Close the reader; the server closes the connection."""
        self.rfile.close()

    def _forget(self) -> None:
        """Makes ready for the next request."""
        self._received_before = self._reader.received_bytes
        self.command, self.path, self.requestline, self._path = "", "", "", ""
        self.request_version = "HTTP/1.1"
        self.headers = http.client.HTTPMessage()
        self.dialect: Dialect = CHAT
        self.caller = Caller("public")
        self.request_id = new_id("req_")
        self.query: Mapping[str, str] = {}
        self.headers_out: dict[str, str] = {}
        #: The length of the body; None = it comes in chunks.
        self._length: int | None = 0
        self._body_taken = False
        self._renderer: Renderer | None = None
        self._chunked = False
        #: The status that went out, 0 = none yet; and whether the whole answer did.
        self._status = 0
        self._over = False
        #: Whether what came is no request, so that nothing behind it can be one.
        self._is_broken = False

    def handle_one_request(self) -> None:
        """Reads one head, in time or not at all, and answers it."""
        self._forget()
        head_timeout_s = self.app.config.header_timeout_ms / 1000
        rest_s = _REST_S if self.client.is_trusted else _STRANGER_REST_S
        try:
            # A connection may rest between requests; a head that began has to go on.
            self._reader.allow(rest_s if self._served else head_timeout_s)
            first = self._buffered.peek(1)[:1]
            self._reader.allow(head_timeout_s)
            if first == _TLS_HANDSHAKE and not self.client.is_tls:
                self._refuse_tls()
            elif first and self._read_head():
                self._served = True
                self._dispatch()
                return
        except socket.timeout:
            if self._reader.received_bytes > self._received_before:
                self._refuse_head(RequestTimeout("The head of the request did not arrive in time."))
        except (ClientGone, OSError):
            pass
        self.close_connection = True
        self._end_request()

    def _read_head(self) -> bool:
        """Whether there is a request; one that is broken has been answered."""
        lines = head_lines(self._buffered)
        try:
            line = next(lines, b"")
            if line:
                self._take_head(line, lines)
            return bool(line)
        except OcpError as error:
            return self._refuse_head(error)

    def _take_head(self, line: bytes, lines: Iterator[bytes]) -> None:
        """Takes the request out of a head. Raises BadRequest, HeadTooLarge."""
        # A client that asked for a head takes a body for the next answer, of a refusal too.
        self.command = "HEAD" if line.startswith(b"HEAD ") else ""
        self.command, self.path, self.request_version = parsed_request_line(line)
        self.headers = parsed_headers(lines)
        if self.request_version == "HTTP/1.1" or "Host" in self.headers:
            host_name(self.headers.get("Host", ""))
        self._length = body_length(self.headers, self.request_version)
        wishes = ",".join(self.headers.get_all("Connection", [])).lower().split(",")
        self.close_connection = "close" in (wish.strip() for wish in wishes)

    def _refuse_tls(self) -> None:
        """Answers a client that speaks https to a server of http, which waits for the word of a
        server of its own kind: whatever comes makes it give up."""
        self.server.note_tls(self.peer)
        self._is_broken = True
        self.client.send(_NOT_HTTPS)

    def _refuse_head(self, error: OcpError) -> bool:
        """Answers what is no request, and nothing that comes behind it; False."""
        self.close_connection = self._is_broken = True
        self._fail(error)
        self._log_refusal(error)
        return False

    def version_string(self) -> str:
        """What the Server header says."""
        return f"ocp/{VERSION}"

    def log_message(self, format: str, *args: object) -> None:
        """The base class's own log lines are not wanted; see _dispatch."""

    # -- a request ----------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Finds the route, lets its endpoint answer, and renders whatever goes wrong."""
        started_s = time.monotonic()
        try:
            self._route()
        except ClientGone:
            self.close_connection = True
        except OcpError as error:
            self._refuse(error)
        except sqlite3.Error as problem:
            self._refuse(storage_failure(problem, _NOTHING_CHANGED))
        except RecursionError:
            # JSON may be nested so deeply that it can just be read and not be written again.
            self._refuse(BadRequest("The body is nested too deeply."))
        except Exception as error:
            self.app.log.event(
                "error", "request_broke", request_id=self.request_id,
                method=self.command, error=format_failure(error),
            )
            self._fail(OcpError(f"OCP failed; its log has the details under {self.request_id}."))
        self._end_request()
        self.app.log.event(
            "debug", "request_answered", request_id=self.request_id, method=self.command,
            status=self._status, total_ms=round((time.monotonic() - started_s) * 1000),
        )

    def _end_request(self) -> None:
        """See the answer on its way to its client, when nothing else waits for that any more."""
        self.client.is_busy = False
        self.server.memory.resize(self._body_hold, 0, self.app.config)
        try:
            self.client.flush()
        except ClientGone:
            self.close_connection = True
        if self._is_broken or (self.close_connection and self._must_close()):
            self.client.linger(_LINGER_S)

    def _refuse(self, error: OcpError) -> None:
        """Tells client and log about a failure; the log has it already if a turn failed."""
        self._fail(error)
        if not error.logged:
            self._log_refusal(error)

    def _log_refusal(self, error: OcpError) -> None:
        """Logs a refusal; those of strangers are summed up when there are many."""
        fields = {
            "request_id": self.request_id, "method": self.command, "path": self._path,
            "caller": self.caller.name, "error": type(error).__name__, "param": error.param,
        }
        if self.caller.name == "public":
            self.app.refusals.note(self.peer, error.status, **fields)
        else:
            self.app.log.event(
                "info", "request_refused", peer=self.peer, status=error.status, **fields
            )

    def _route(self) -> None:
        try:
            target = urllib.parse.urlsplit(self.path)
        except ValueError:
            raise BadRequest("The path of the request is broken.") from None
        self._path = target.path
        self.query = dict(urllib.parse.parse_qsl(target.query))
        matches = self.server.router.matches(target.path)
        if matches:
            # Whatever is refused from here on is refused in the words of that path.
            self.dialect = matches[0][0].dialect
        for_both = not matches or matches[0][0].endpoint in (get_models, get_model)
        if for_both and "anthropic-version" in self.headers:
            # The SDKs of both kinds ask here, and each knows failures in its own words.
            self.dialect = MESSAGES
        config = self.app.config
        origin = self.headers.get("Origin", "")
        content_type = self.headers.get("Content-Type", "")
        # The host of a whole address counts, whatever Host says.
        host = target.netloc or self.headers.get("Host", "")
        check_origin(config, origin, host, content_type, self.peer)
        if is_allowed_origin(config, origin):
            self.headers_out.update({"Access-Control-Allow-Origin": origin, "Vary": "Origin"})
        if self.command == "OPTIONS":
            self._answer_options(target.path, matches)
            return
        route, names = self.server.router.choose(self.command, target.path, matches)
        self.caller = self._admitted(config, route.access)
        if route.access is not Access.PUBLIC:
            self.client.is_trusted = self.client.is_busy = True
        self.client.config = config
        owner = self.peer if self.caller.key_id is None else self.caller.scope
        self.client.unread.owner = self._body_hold.owner = owner
        route.endpoint(self.app, self, **names)

    def _admitted(self, config: Config, access: Access) -> Caller:
        """The caller. Raises Forbidden, and Unauthorized, the later the more wrong keys came."""
        try:
            return authorize(config, self.app.keys, access, self.headers, self.peer)
        except Unauthorized:
            if any(presented_keys(self.headers)):
                most_s = config.wrong_key_delay_ms / 1000
                with self.app.wrong_keys.noting(self.peer, most_s) as wait_s:
                    time.sleep(wait_s)
            raise

    def _answer_options(self, path: str, matches: list[Match]) -> None:
        allowed = ", ".join(methods_of(matches))
        if not allowed:
            raise NotFound(f"There is no {one_line(path, 80)} here.")
        self.headers_out["Allow"] = allowed
        if "Access-Control-Allow-Origin" in self.headers_out:
            asked = self.headers.get("Access-Control-Request-Headers", "")
            self.headers_out.update(
                {
                    "Access-Control-Allow-Methods": allowed,
                    "Access-Control-Allow-Headers": one_line(asked, 1000) or "*",
                    "Access-Control-Max-Age": "600",
                }
            )
        self._head(204, {})

    def _fail(self, error: OcpError) -> None:
        """Tells the client about a failure, in whatever way is still open."""
        try:
            if self._over:
                self.close_connection = True
            elif not self._status:
                body = to_json(self.dialect.error_body(error, self.request_id)) + b"\n"
                headers = {"Content-Type": "application/json", **error.headers()}
                self._send_body(error.status, body, headers)
            elif self._renderer is not None:
                self._send(self._renderer.failure(error, self.request_id))
                self._end_chunks()
            else:
                # A whole answer whose 200 is out: only a cut connection says that it failed.
                self.close_connection = True
        except ClientGone:
            self.close_connection = True

    # -- reading ------------------------------------------------------------------------------

    def body(self) -> bytearray:
        """See HttpExchange. While it is on its way, the connection counts as one that rests."""
        config = self.app.config
        length = self._length
        if length is not None and length > config.max_body_bytes:
            raise self._too_large()
        if self.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise BadRequest("Compressed bodies are not taken: send it plain.")
        expects = self.headers.get("Expect", "").lower() == "100-continue"
        if expects and self.request_version == "HTTP/1.1":
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._reader.allow(config.body_timeout_ms / 1000)
        is_busy, self.client.is_busy = self.client.is_busy, False
        try:
            data = self._chunks() if length is None else self._exactly(length)
        except socket.timeout:
            raise RequestTimeout("The body of the request did not arrive in time.") from None
        except OSError:
            raise ClientGone from None
        self._body_taken, self.client.is_busy = True, is_busy
        return data

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"The body is larger than {self.app.config.max_body_bytes} bytes "
            "(CLAUDE_MAX_BODY_SIZE of the server)."
        )

    def _exactly(self, count: int) -> bytearray:
        data = bytearray()
        self._read_more(data, count)
        if len(data) < count:
            self.close_connection = True
            raise BadRequest("The body ended before its Content-Length was reached.")
        return data

    def _read_more(self, data: bytearray, count: int) -> None:
        """Add so many bytes to the body, or less at the end of the connection."""
        until = len(data) + count
        while len(data) < until:
            piece = self.rfile.read(min(until - len(data), _MAX_READ_BYTES))
            if not piece:
                return
            self.server.memory.resize(
                self._body_hold, len(data) + len(piece), self.app.config
            )
            data += piece

    def _chunks(self) -> bytearray:
        """A chunked body. Its trailer is read and dropped."""
        data = bytearray()
        extra_bytes = 0
        while True:
            found = _CHUNK_LINE.fullmatch(self.rfile.readline(1024))
            if found is None:
                raise self._broken_chunks()
            size, extra_bytes = int(found[1], 16), extra_bytes + len(found[2])
            if extra_bytes > _MAX_CHUNK_EXTRA_BYTES:
                raise self._broken_chunks()
            if size == 0:
                break
            if len(data) + size > self.app.config.max_body_bytes:
                raise self._too_large()
            self._read_more(data, size)
            if self.rfile.readline(2) != b"\r\n":
                raise self._broken_chunks()
        self._drop_trailer(_MAX_CHUNK_EXTRA_BYTES - extra_bytes)
        return data

    def _drop_trailer(self, left_bytes: int) -> None:
        """Reads what may come behind the last chunk. Raises BadRequest."""
        line = b""
        while line != b"\r\n":
            line = self.rfile.readline(left_bytes + 1)
            left_bytes -= len(line)
            whole = left_bytes >= 0 and line.endswith(b"\r\n")
            if not whole or not (line == b"\r\n" or _HEADER_LINE.fullmatch(line[:-2])):
                raise self._broken_chunks()

    def _broken_chunks(self) -> BadRequest:
        self.close_connection = True
        return BadRequest("The chunked body is broken, or ended early.")

    # -- writing ------------------------------------------------------------------------------

    def send_json(self, value: object, status: int = 200) -> None:
        """See HttpExchange."""
        if not self._status:
            self._send_body(status, to_json(value) + b"\n", {"Content-Type": "application/json"})
        else:
            self._send(to_json(value))
            self._end_chunks()

    def send_text(self, text: str, content_type: str) -> None:
        """See HttpExchange."""
        self._send_body(200, text.encode("utf-8"), {"Content-Type": content_type})

    def send_stream(
        self, renderer: Renderer, events: Iterator[Choice], finished: Callable[[Json], None]
    ) -> None:
        """See HttpExchange. Events that a dialect does not show are silence too."""
        heartbeat_s = self.app.config.heartbeat_ms / 1000
        sent_s = time.monotonic()
        for index, event in events:
            silent = isinstance(event, Tick)
            data = b"" if silent else renderer.event(index, event)
            if isinstance(event, Finished):
                finished(renderer.body)
            now_s = time.monotonic()
            if silent or (not data and heartbeat_s and now_s - sent_s >= heartbeat_s):
                data = renderer.keepalive()
            if data:
                sent_s = now_s
            if data and self._renderer is None:
                # Whatever failed before this had a status of its own.
                self._renderer = renderer
                self._begin_chunks(_STREAM_HEADERS)
            if data:
                self._send(data)
        self._send(renderer.end())
        self._end_chunks()

    def send_nothing(self, status: int) -> None:
        """See HttpExchange."""
        self._head(status, {})
        self._over = True

    def send_events(self, frames: Iterator[bytes]) -> None:
        """See HttpExchange."""
        self._begin_chunks(_STREAM_HEADERS)
        if self.command == "HEAD":
            self._over = True
            return
        for frame in frames:
            self._send(frame)
        self._end_chunks()

    def keep_alive(self, events: Iterator[Choice], silence_s: float) -> None:
        """See HttpExchange. Node clients hang up after 300 s without a byte."""
        silent_since_s = time.monotonic()
        for _ in events:
            if silence_s and time.monotonic() - silent_since_s >= silence_s:
                silent_since_s = time.monotonic()
                if not self._status:
                    self._begin_chunks({"Content-Type": "application/json"})
                self._send(b" \n")

    def _send_body(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self._head(status, {"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.client.send(body)
        self._over = True

    def _must_close(self) -> bool:
        """Whether a body is on its way that nobody read: the next head cannot be found then."""
        return self._length != 0 and not self._body_taken

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        """Sends the status line and the headers at once."""
        if self._must_close() or self.request_version == "HTTP/1.0":
            self.close_connection = True
        self._status = status
        self.send_response(status)
        common = {
            "X-Request-Id": self.request_id, "request-id": self.request_id,
            "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
        }
        for name, value in {**common, **self.headers_out, **headers}.items():
            # A line break in a value would be a header of somebody else's.
            self.send_header(name, re.sub(r"[^\x20-\x7e]", "?", value))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def flush_headers(self) -> None:
        """Send what the base class has put together. Raises ClientGone."""
        self.client.send(b"".join(self._headers_buffer))
        self._headers_buffer.clear()

    def _begin_chunks(self, headers: Mapping[str, str]) -> None:
        """Starts an answer of unknown length: chunked, or up to the close for old clients."""
        self._chunked = self.request_version == "HTTP/1.1"
        more = {"Transfer-Encoding": "chunked"} if self._chunked else {}
        self._head(200, {**headers, **more})

    def _send(self, data: bytes) -> None:
        """Sends a piece of the answer."""
        if not data:
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self.client.send(data)

    def _end_chunks(self) -> None:
        self._over = True
        if self._chunked:
            self.client.send(b"0\r\n\r\n")
        else:
            self.close_connection = True

def tls_context(config: Config) -> ssl.SSLContext | None:
    """What serves https, or None. Raises ConfigError when certificate and key cannot be used."""
    if not config.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    paths = [os.path.expanduser(path) for path in (config.tls_cert, config.tls_key)]
    try:
        for path in paths:
            with open(path, "rb"):
                pass
        context.load_cert_chain(paths[0], paths[1], password=lambda: "")
    except (OSError, ValueError) as problem:
        where = "" if getattr(problem, "filename", None) else f" ({' and '.join(paths)})"
        raise ConfigError(
            f"OCP_TLS_CERT and OCP_TLS_KEY cannot be used: {problem}{where}; they have to be PEM "
            "files, and the key without a password"
        ) from None
    return context


#: The first byte of a TLS connection.
_TLS_HANDSHAKE = b"\x16"
_NOT_TLS = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    b"This server speaks https: write https:// in the address.\n"
)
_NOT_HTTPS = _NOT_TLS.replace(b"https", b"http")
#: How often the log says that somebody speaks https to a server of http, or that connections are
#: closed to make room.
_NOTED_EVERY_S = 60.0
_CONNECTIONS_HELP = "raise OCP_MAX_CONNECTIONS if so many are meant to be open"
#: How many connections above the limit are told so at a time; others are just closed.
_MAX_TURNED_AWAY = 32


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Accepts connections, so many at a time."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, app: App, tls: ssl.SSLContext | None = None) -> None:
        """Listens. Raises OSError when it cannot."""
        self.app = app
        self.router = Router(ROUTES)
        self.memory = MemoryBudget()
        self._tls = tls
        # Guards the next field.
        self._lock = threading.Lock()
        self._turned_away = 0
        host = app.config.bind
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, app.config.port), Exchange)

    @property
    def url(self) -> str:
        """Where clients on this machine find the server."""
        host, port = self.server_address[:2]
        shown = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(str(host), str(host))
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://[{shown}]:{port}" if ":" in shown else f"{scheme}://{shown}:{port}"

    def server_bind(self) -> None:
        """Binds; the address :: takes IPv4 too."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def get_request(self) -> tuple[Any, Any]:
        """Return the next connection and its address. Short of descriptors, wait instead of trying
        all the time."""
        try:
            sock, address = super().get_request()
        except OSError as problem:
            if problem.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.05)
            raise
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        return Connection(sock, str(address[0]), self.memory), address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread, or turn it away when all that are open are busy."""
        connection: Connection = request
        try:
            left = self.app.connections.enter(connection, self.app.config.max_connections)
        except Busy as error:
            self._turn_away(connection, error)
            return
        if left is not None and self.app.claim_interval("connections_full", _NOTED_EVERY_S):
            self.app.log.event("warn", "connections_full", peer=left.peer, help=_CONNECTIONS_HELP)
        try:
            super().process_request(request, client_address)
        except BaseException:
            self.app.connections.leave(connection)
            raise

    def note_tls(self, peer: str) -> None:
        """Logs, now and then, that a client speaks https where http is served."""
        if self.app.claim_interval("https_on_http_port", _NOTED_EVERY_S):
            self.app.log.event("warn", "https_on_http_port", peer=peer)

    def _turn_away(self, connection: Connection, error: Busy) -> None:
        """Refuse a connection, in a thread of its own as long as there are few of these."""
        with self._lock:
            is_told = self._turned_away < _MAX_TURNED_AWAY and self._tls is None
            self._turned_away += int(is_told)
        if is_told:
            threading.Thread(target=self._refuse, args=(connection, error), daemon=True).start()
        else:
            connection.close()

    def _refuse(self, connection: Connection, error: Busy) -> None:
        body = to_json(CHAT.error_body(error, ""))
        head = f"HTTP/1.1 {error.status} Busy\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\nRetry-After: 5\r\nConnection: close\r\n\r\n"
        try:
            self._say_and_linger(connection, head.encode("ascii") + body)
        finally:
            connection.close()
            with self._lock:
                self._turned_away -= 1

    def _say_and_linger(self, connection: Connection, data: bytes) -> None:
        """Send something to a client that may be in the middle of a request of its own."""
        with contextlib.suppress(ClientGone):
            connection.send(data)
            connection.flush()
            connection.linger(_LINGER_S)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Live the life of one connection, in its thread."""
        connection: Connection = request
        if self._is_secured(connection):
            super().finish_request(request, client_address)

    def _is_secured(self, connection: Connection) -> bool:
        """Speak TLS where it is spoken; return whether the connection can be used."""
        if self._tls is None:
            return True
        timeout_s = self.app.config.header_timeout_ms / 1000
        try:
            if connection.peek(timeout_s) not in (_TLS_HANDSHAKE, b""):
                self._say_and_linger(connection, _NOT_TLS)
                return False
            connection.start_tls(self._tls, timeout_s)
        except OSError as problem:
            self.app.log.event("debug", "tls_failed", error=str(problem))
            return False
        return True

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        connection: Connection = request
        self.app.connections.leave(connection)
        connection.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke outside any request."""
        error = sys.exc_info()[1] or RuntimeError("unknown")
        level = "debug" if isinstance(error, OSError) else "error"
        self.app.log.event(level, "connection_broke", error=format_failure(error))


# ==== 33. Demo claude ========================================================
# The stand-in behind --demo: a process that speaks claude's protocol and answers by itself, so
# that everything around the model can be tried without an account. Says so in every answer.

_DEMO_WORD_PAUSE_S = 0.03


class DemoClaude:
    """Reads lines as claude does and prints what claude would."""

    def __init__(self, model_id: str, write: Callable[[bytes], object]) -> None:
        self._model_id = model_id
        self._write = write
        self._max_tokens = 10**9

    def read(self, line: Json) -> None:
        """Answers one line."""
        if line.get("type") == "control_request":
            settings = line.get("request", {}).get("settings", {})
            limit = settings.get("env", {}).get("CLAUDE_CODE_MAX_OUTPUT_TOKENS")
            self._max_tokens = int(limit) if limit else self._max_tokens
            response = {"subtype": "success", "request_id": line.get("request_id")}
            # It remembers nothing, so it has forgotten whatever it is told to forget.
            self._print("control_response", response={**response, "response": {"rewound": True}})
        elif line.get("type") == "user" and line.get("shouldQuery") is False:
            self._result(num_turns=0)
        elif line.get("type") == "user":
            self._answer(line.get("message", {}).get("content"))

    def _answer(self, content: object) -> None:
        blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
        asked = " ".join(str(block.get("text", "")) for block in blocks if "text" in block)
        reply = (
            "This is the demo of OCP: no model was asked and no account is used. "
            f"You wrote: {one_line(asked, 200)}"
        )
        words = re.findall(r"\S+\s*", reply)
        spoken = words[: self._max_tokens]
        usage = {"input_tokens": len(asked.split()), "output_tokens": len(spoken)}
        message = {"id": new_id("msg_"), "model": self._model_id, "usage": usage}
        self._event("message_start", message=message)
        self._event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        for word in spoken:
            time.sleep(_DEMO_WORD_PAUSE_S)
            self._event("content_block_delta", index=0, delta={"type": "text_delta", "text": word})
        self._event("content_block_stop", index=0)
        reason = "end_turn" if len(spoken) == len(words) else "max_tokens"
        self._event("message_delta", delta={"stop_reason": reason}, usage=usage)
        self._event("message_stop")
        self._result(num_turns=1)

    def _result(self, num_turns: int) -> None:
        self._print("result", subtype="success", is_error=False, num_turns=num_turns)

    def _event(self, kind: str, **fields: object) -> None:
        self._print("stream_event", event={"type": kind, **fields})

    def _print(self, kind: str, **fields: object) -> None:
        self._write(to_json({"type": kind, **fields}) + b"\n")


def demo_claude(arguments: list[str]) -> int:
    """The demo process: what `claude` is for a server started with --demo."""
    if "--version" in arguments:
        print(".".join(str(part) for part in CLIENT_COMPOSED_SINCE), "(OCP demo)")
        return 0
    model_id = arguments[arguments.index("--model") + 1]
    claude = DemoClaude(model_id, lambda data: os.write(1, data))
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        for raw in sys.stdin.buffer:
            line = from_json(raw)
            if isinstance(line, dict):
                claude.read(line)
    return 0


# ==== 34. Command line =======================================================
# Arguments, signals, the banner, and the order in which everything starts and stops.

_DEMO_FLAG = "--demo-claude"


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="ocp_server.py",
        description="Serves your Claude plan, through the official claude program, to tools "
        "that speak the OpenAI or the Anthropic API. Settings are environment variables: see "
        "--print-settings.",
    )
    parser.add_argument("--demo", action="store_true", help="answer from a stand-in, no account")
    parser.add_argument(
        "--check", action="store_true", help="validate settings and environment; exit 0 or 2"
    )
    parser.add_argument(
        "--print-settings", action="store_true", help="print the settings table as Markdown"
    )
    parser.add_argument("--version", action="version", version=f"ocp {VERSION}")
    return parser


def _is_own(host: str) -> bool:
    """Whether an address or name is this machine's."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, _, _, address in found:
        # Only an address of one's own can be bound to.
        with contextlib.suppress(OSError), socket.socket(family, kind) as attempt:
            attempt.bind(address)
            return True
    return False


def check_no_loop(config: Config, environ: Mapping[str, str]) -> None:
    """Raises ConfigError if claude would ask this server instead of the API."""
    url = child_environment(environ, config).get("ANTHROPIC_BASE_URL", "")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return
    if parts.hostname and port == config.port and _is_own(parts.hostname):
        raise ConfigError(
            f"ANTHROPIC_BASE_URL={url}, which OCP_PASS_ENV hands to claude, leads back to this "
            "server: each request would ask itself. Take it out of OCP_PASS_ENV."
        )


def _fail_start(problem: object) -> int:
    for line in str(problem).splitlines():
        print(f"ocp: {line}", file=sys.stderr)
    return 2


def check(config: Config, environ: Mapping[str, str], demo_command: tuple[str, ...]) -> int:
    """Says what a start would use; 0 when it would work, else 2."""
    print(f"ocp {VERSION}, Python {sys.version.split()[0]}")
    print(f"listens on {config.bind} port {config.port}, access mode {config.mode}")
    print(f"keeps its log in {os.path.join(config.home_path, 'logs')}")
    if config.tls_cert:
        print(f"serves https with {config.tls_cert}")
    for name, why in removed_settings(environ):
        print(f"{name} means nothing any more: {why}")
    try:
        program = ClaudeProgram(config, environ, demo_command).resolve()
    except OcpError as error:
        return _fail_start(error.message)
    print(f"uses claude {program.version_text}: {' '.join(program.command)}")
    print("all good")
    return 0


def _banner(server: Server) -> str:
    app = server.app
    lines = [f"OCP {VERSION} serves {server.url}/v1"]
    if app.demo:
        lines.append("DEMO: answers come from a stand-in; no account is used, no model is asked")
    if app.config.is_agent:
        lines.append("AGENT MODE: claude uses tools of its own on this machine")
    if app.config.is_usable_without_key:
        remedy = "PROXY_API_KEY" if app.config.mode == "none" else "PROXY_ADVERTISE_ANON_KEY=0"
        lines.append(f"ATTENTION: whoever can connect may use your plan; set {remedy}")
    lines += [
        "try it:",
        f"  curl {server.url}/v1/chat/completions -d "
        '\'{"messages": [{"role": "user", "content": "Hello"}]}\'',
    ]
    return "\n".join(lines)


def allow_descriptors(config: Config) -> None:
    """Raises the limit of open files to what full load takes, as far as the system lets it."""
    wanted = 2 * config.max_connections + 8 * config.max_concurrent + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        maximum = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, hard))


def serve(app: App, tls: ssl.SSLContext | None) -> int:
    """Serves until a signal says stop; the exit code."""
    allow_descriptors(app.config)
    try:
        server = Server(app, tls)
    except OSError as problem:
        app.close()
        print(
            f"ocp: cannot listen on {app.config.bind} port {app.config.port}: {problem.strerror}; "
            "is it running already? CLAUDE_PROXY_PORT takes another port.",
            file=sys.stderr,
        )
        return 1
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # nohup and shells leave signals ignored that are not meant for the server.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: app.wakeups.put("stop"))
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    app.look()
    with contextlib.suppress(OSError):
        # A service may print to a file, and the disk may be full.
        print(_banner(server), flush=True)
    app.log.event(
        "info", "server_started", version=VERSION, url=server.url, mode=app.config.mode,
        demo=app.demo, pid=os.getpid(),
    )
    app.run()
    app.log.event("info", "server_stopping", running=app.gate.running)
    app.draining = True
    server.shutdown()
    server.server_close()
    app.drain()
    app.log.event("info", "server_stopped")
    app.close()
    return 0


def main(arguments: list[str], environ: Mapping[str, str]) -> int:
    """Runs the program; the exit code: 0 fine, 1 could not listen, 2 wrong settings."""
    if arguments[:1] == [_DEMO_FLAG]:
        return demo_claude(arguments)
    options = argument_parser().parse_args(arguments)
    if options.print_settings:
        print(settings_markdown())
        return 0
    here = os.path.abspath(__file__)
    demo_command = (sys.executable, "-I", "-S", here, _DEMO_FLAG) if options.demo else ()
    try:
        config = load_config(environ)
        models = load_models(os.path.dirname(here))
        models.find(config.default_model)
        check_no_loop(config, environ)
        tls = tls_context(config)
    except ConfigError as problem:
        return _fail_start(problem)
    except UnknownModel as problem:
        return _fail_start(f"OCP_DEFAULT_MODEL: {problem.message}")
    if options.check:
        return check(config, environ, demo_command)
    log = Log(sys.stderr, config.log_level)
    for name, why in removed_settings(environ):
        log.event("warn", "setting_removed", setting=name, why=why)
    try:
        app = App(config, environ=environ, log=log, models=models, demo_command=demo_command)
    except HomeInUse as problem:
        print(f"ocp: {problem}", file=sys.stderr)
        return 1
    return serve(app, tls)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
