#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# ///
"""OCP serves your Claude plan to the tools that speak the OpenAI or the Anthropic API.

It drives the official `claude` program, installed and logged in by you, and answers requests of
both kinds from it: one file, Python 3.9 or later, nothing to install.

    python3 ocp_server.py              serve on http://127.0.0.1:3456
    python3 ocp_server.py --demo       the same without an account, with canned answers
    python3 ocp_server.py --check      validate settings and environment, exit 0 or 2
    python3 ocp_server.py --help       everything else

The life of a request: the HTTP server finds its route and authorizes its caller, a dialect parses
the body into a Turn, the gate admits it, a claude process answers it with a stream of Events, and
the dialect renders these events. Wire formats exist only in the dialects; the claude protocol
exists only in its own sections.

Each section uses only names from the sections above it, so the file reads bottom-up: to follow
a request, start with the HTTP server.

Sections (search for "==== 8" to jump to the eighth):

     1. Small tools             compact JSON, ids, redaction, times and text, the machine's memory
     2. Settings                the table of settings, and reading them from the environment
     3. Errors                  every failure that is reported to a client
     4. Log                     a rotated file, the terminal, recent events, refused requests
     5. Models                  the known models and what each one accepts
     6. Turns and events        the internal form of a request and of an answer
     7. Store                   the SQLite database, and the settings changed at run time
     8. Keys and callers        authentication, access to routes, and the keys of devices
     9. Usage and quotas        one row for each request, and the limits of keys
    10. Patterns                regular expressions of clients, for JavaScript and for Python
    11. JSON Schema             schemas of clients, parsed into plain 2020-12
    12. Model schemas           schemas rewritten so that claude and the API accept them, and back
    13. Request fields          typed access to JSON; thinking and sampling
    14. Attachments             images and files of requests, and their limits
    15. Content                 parts and blocks of messages in the formats of all APIs
    16. Tools                   tools, the choice among them, their calls, output schemas
    17. Dialects                messages become a prompt; what every wire format does
    18. Chat completions        /v1/chat/completions and /v1/completions
    19. Messages                /v1/messages
    20. Response items          input items into messages, blocks into output items
    21. Responses               /v1/responses and /v1/responses/compact
    22. Claude protocol         control requests and replies, the client's tools; no I/O
    23. Claude input            messages, options and histories as lines for claude
    24. Plan and failures       reports of claude about the plan; its failures as errors
    25. Claude answers          output of claude to lines; lines of a turn to events of an answer
    26. Claude program          the program on disk, how it is started, and its folders
    27. Claude process          one child process and its pipes
    28. Gate                    admission of requests
    29. Conversations           the identity of conversations; what an idle process can do with them
    30. Process pool            spare, parked and stopping processes
    31. Sessions and responses  what is remembered of conversations: messages, and thinking
    32. Cache                   stored answers, and answers shared while they are generated
    33. Account                 the state of login and plan, learned from answers
    34. Metrics                 counters and histograms since the start
    35. Connections             client sockets, and limits on their number and memory
    36. State folder            the database, the modes of files, the admin key
    37. Answering               one request: quota, cache, claude, row of usage
    38. App                     owns every long-lived object; the housekeeper
    39. Routes                  the choice of a route for a path and a method
    40. HTTP server             sockets, bodies, one thread for each connection
    41. Dashboard               the operator's page, and its content security policy
    42. API endpoints           answers, stored responses, sessions, models
    43. Management endpoints    health, logs, keys, usage, settings, pages, OpenAPI
    44. Table of routes         path, access, dialect and endpoint of each route
    45. Demo claude             the stand-in for claude behind --demo
    46. Command line            arguments, signals, main
"""
from __future__ import annotations  # OCP needs Python 3.9 or later; Python 3.6 shows this line.

import sys

if sys.version_info < (3, 9):
    sys.exit("OCP needs Python 3.9 or later; this is Python %d.%d." % sys.version_info[:2])

import argparse
import array
import base64
import binascii
import bisect
import codecs
import collections
import contextlib
import dataclasses
import datetime
import difflib
import email.utils
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
import random
import re
import resource
import secrets
import select
import selectors
import shlex
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
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from http.server import ThreadingHTTPServer
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

VERSION = "1.0.0"

#: A JSON object as it is sent or received.
Json = dict[str, Any]
#: The headers of a request; names are case-insensitive.
Headers = http.client.HTTPMessage
Clock = Callable[[], float]


# ==== 1. Small tools =========================================================
# Helpers that depend neither on HTTP, nor on claude, nor on settings.

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def to_json(value: object) -> bytes:
    """Return compact UTF-8 JSON without a newline.

    Text with a lone surrogate, which JSON allows and UTF-8 does not, is escaped as ASCII.
    """
    try:
        return _ENCODER.encode(value).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode("ascii")


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _parse_int(digits: str) -> int:
    # The conversion takes quadratic time.
    if len(digits) > 400:
        raise ValueError("a number has too many digits")
    return int(digits)


def _parse_float(text: str) -> float:
    # A number that overflows would be written as Infinity, which is not JSON.
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value


_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_int=_parse_int, parse_float=_parse_float
)


#: The maximum number of values in one body. Each one takes hundreds of bytes and some
#: microseconds; the longest prompts hold about ten thousand.
_MAX_JSON_VALUES = 300_000
#: Values are counted in pieces of this size, which bounds the memory for copies.
_COUNTED_BYTES = 1_048_576


def has_many_values(data: bytes | bytearray) -> bool:
    """Return whether a JSON text holds more values than OCP parses. Takes a few milliseconds per
    megabyte."""
    if sum(map(data.count, (b"[", b"{", b","))) <= _MAX_JSON_VALUES:
        return False
    # Most of these characters may be in strings. Without escapes, every second part between quotes
    # is a string.
    count, is_in_string, rest = 0, False, b""
    for start in range(0, len(data), _COUNTED_BYTES):
        text = rest + data[start:start + _COUNTED_BYTES]
        backslashes = len(text) - len(text.rstrip(b"\\"))
        # The last of an odd number of backslashes escapes a character of the next piece.
        rest = b"\\" if backslashes % 2 else b""
        bare = text[:len(text) - len(rest)].replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = bare.split(b'"')
        outside = b"".join(parts[int(is_in_string)::2])
        is_in_string ^= len(parts) % 2 == 0
        count += sum(map(outside.count, (b"[", b"{", b",")))
        if count > _MAX_JSON_VALUES:
            return True
    return False


def from_json(data: bytes | bytearray | str) -> object:
    """Return the value of a JSON text. Raises ValueError for anything else."""
    try:
        return _DECODER.decode(data if isinstance(data, str) else data.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def new_id(prefix: str) -> str:
    """Return `prefix` and 24 random letters and digits; some clients strip other characters."""
    return prefix + secrets.token_hex(12)


_SECRET = re.compile(r"(sk-ant-|ocp_(?=[\w-]{32})|Bearer\s+)[A-Za-z0-9_.\-]{6,}")


def redact(text: str) -> str:
    """Return `text` with "[redacted]" for everything that looks like a token or a key."""
    return _SECRET.sub(lambda match: match.group(1) + "[redacted]", text)


def has_key_format(text: str) -> bool:
    """Return whether `text` has the form of a key that this server creates."""
    return re.fullmatch(r"ocp_[A-Za-z0-9_-]{32}", text) is not None


_PATH = re.compile(
    r"(?:file://|\b[A-Za-z]:|(?<![\w./]))/"
    r"(?:(?:root|home|etc|tmp|var|usr|opt|mnt|srv|Users|private|Volumes)\b[^\s'\"),;]*"
    r"|[\w.@+-]+(?:/[\w.@+-]+)+/?)"
)


def redact_paths(text: str) -> str:
    """Return `text` with "[path]" for absolute paths of this machine, to be sent to a client."""
    return _PATH.sub("[path]", text)


def one_line(text: str, max_chars: int = 300) -> str:
    """Return `text` on one line, with white space collapsed, cut to `max_chars`."""
    line = " ".join(text.split())
    return line if len(line) <= max_chars else line[: max_chars - 3] + "..."


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a name is one of these; a pattern can end in a star."""
    return any(
        name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1]))
        for pattern in patterns
    )


def printable(text: str) -> str:
    """Return `text` with escapes, such as \\x1b, for control characters, marks of direction and
    lone surrogates, which would be invisible or control a terminal."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def safe_text(text: str, max_chars: int) -> str:
    """Return `text` as it may be logged and kept: without secrets and invisible characters, on one
    line, cut to `max_chars`."""
    return printable(one_line(redact(text), max_chars))


def _parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an IP address, an IPv4-mapped one as IPv4; None if `text` is no address."""
    try:
        parsed = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(parsed, "ipv4_mapped", None) or parsed


def is_loopback(address: str) -> bool:
    """Return whether this is an IP address of the machine itself."""
    parsed = _parse_address(address)
    return parsed is not None and parsed.is_loopback


def peer_group(address: str) -> str:
    """Return the network under which an address is counted.

    That is the address itself for IPv4 and loopback, and the /64 network for IPv6, because one
    machine may own all of it. Text that is no address is returned unchanged.
    """
    parsed = _parse_address(address)
    if parsed is None:
        return address
    if parsed.version == 4 or parsed.is_loopback:
        return str(parsed)
    return str(ipaddress.ip_network((parsed, 64), strict=False))


def network_address() -> str:
    """Return the address by which this machine reaches others, IPv4 if it has one; empty if there
    is no network. Sends nothing."""
    # Documentation addresses: connecting a UDP socket only chooses the route.
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            address = str(probe.getsockname()[0])
            if not is_loopback(address):
                return address
    return ""


#: The length of a header that lists names. Clients reject very long headers.
_HEADER_LIST_MAX_CHARS = 1_000


def header_list(names: Iterable[str]) -> str:
    """Return `names`, without repetitions, as the value of a header.

    Names for which there is no room are replaced by their number. A character that is not
    allowed in a header becomes a question mark.
    """
    # A name that a client chose may contain the separator, so a comma is replaced too.
    unique = {re.sub(r"[^ -+\--~]", "?", one_line(name, 80)): None for name in names}
    shown: list[str] = []
    left = _HEADER_LIST_MAX_CHARS
    for name in unique:
        left -= len(name) + 2
        if left < 0:
            shown.append(f"{len(unique) - len(shown)} more")
            break
        shown.append(name)
    return ", ".join(shown)


def format_failure(error: BaseException) -> str:
    """Return an exception and the innermost functions of its traceback, for the log."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    functions = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames))
    return f"{error!r} in {functions}"


def format_uptime(seconds: float) -> str:
    """Return a duration rounded down to minutes, or to seconds if it is short: "3h 4m", "4m",
    "12s"."""
    minutes = int(seconds // 60)
    if minutes < 1:
        return f"{int(seconds)}s"
    return f"{minutes // 60}h {minutes % 60}m" if minutes >= 60 else f"{minutes}m"


def format_span(seconds: float) -> str:
    """Return a remaining time, rounded up to minutes: "2d 3h", "3h 12m", "5m", or "now"."""
    minutes = math.ceil(seconds / 60)
    if minutes <= 0:
        return "now"
    if minutes > 24 * 60:
        return f"{minutes // 1440}d {minutes % 1440 // 60}h"
    return f"{minutes // 60}h {minutes % 60}m" if minutes >= 60 else f"{minutes}m"


#: The milliseconds of the units of durations, the longest first.
_DURATION_UNITS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
_DURATION = re.compile(r"([0-9]{1,12})\s*(d|h|m|s|ms)", re.IGNORECASE)


def parse_duration_ms(text: str) -> int | None:
    """Return the milliseconds of a duration such as 30s, 90m, 1h or 7d; None for other text."""
    match = _DURATION.fullmatch(text.strip())
    return None if match is None else int(match[1]) * _DURATION_UNITS[match[2].lower()]


def format_duration(duration_ms: int) -> str:
    """Return a duration with the longest unit in which it is a whole number: "90m", "1h", "0s"."""
    if duration_ms == 0:
        return "0s"
    unit = next(unit for unit, size in _DURATION_UNITS.items() if duration_ms % size == 0)
    return f"{duration_ms // _DURATION_UNITS[unit]}{unit}"


def iso_time(epoch_s: float) -> str:
    """Return epoch seconds as ISO 8601 in UTC with milliseconds."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(epoch_s))
    return f"{whole}.{int(epoch_s % 1 * 1000):03d}Z"


_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?)?"
    r"(Z|[+-]\d\d:?\d\d)?"
)


def parse_time(text: str) -> float:
    """Return the epoch seconds of an ISO 8601 date or time. Raises ValueError.

    A time without a zone is taken as local time.
    """
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError("is not a date or time such as 2027-01-31 or 2027-01-31T12:00:00Z")
    year, month, day, hour, minute, second = (int(part or 0) for part in match.groups()[:6])
    zone = (match[8] or "").replace(":", "")
    moment = datetime.datetime(
        year, month, day, hour, minute, second, tzinfo=datetime.timezone.utc if zone else None
    )
    seconds = moment.timestamp() + float(f"0.{match[7] or 0}")
    if len(zone) == 5:
        offset_s = int(zone[1:3]) * 3600 + int(zone[3:]) * 60
        seconds -= offset_s if zone[0] == "+" else -offset_s
    return seconds


def write_private(path: str, text: str) -> None:
    """Write a file atomically, readable only by its owner. Raises OSError."""
    temporary = f"{path}.{secrets.token_hex(4)}.new"
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def control_group_limits(
    listing: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup"
) -> list[int]:
    """Return the limits of memory of the control groups, of both versions, that this process is
    in, in bytes. Inside of a container the root has the limit, whatever the listing says."""
    try:
        with open(listing, encoding="ascii", errors="replace") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return []
    limits: list[int] = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and "memory" not in controllers.split(","):
            continue
        place, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            path = os.path.join(root, place, *parts[:depth], name)
            # A group without a limit says "max", or has no such file.
            with contextlib.suppress(OSError, ValueError), open(path, encoding="ascii") as file:
                limits.append(int(file.read()))
    return limits


@functools.cache
def machine_memory_bytes() -> int | None:
    """Return the memory of this machine, or of the control group that this process may use. Return
    None if the system does not tell."""
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None
    return min([physical, *control_group_limits()]) if physical > 0 else None


# ==== 2. Settings ============================================================
# The class body of Config is the table of settings. A row holds the attribute, default,
# environment variable, range, unit and help text; the parser, the reports and the documentation
# are generated from the rows. A Config is an immutable snapshot. An invalid value stops the
# server at its start. Durations are given in milliseconds; the code converts them to seconds.


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
    from_memory: Callable[[int], int] | None = None,
) -> Any:
    """Return one row of the table. The type of the value is the type of `default`.

    `live` is the name under which the setting can be changed while the server runs; empty = the
    setting is read only at the start. `from_memory` returns the default for a machine with so many
    bytes of memory; `default` is then for a machine that does not tell.
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
            "from_memory": from_memory,
        },
        repr=not secret,
    )


#: The memory of an idle claude (2.1.332: 155 MB, 85 MB of them its own), the part of the machine's
#: memory that all idle ones may take, and their most: there are few models to keep spares for, and
#: each place for a parked process is filled by a start before a process is used again.
_IDLE_CLAUDE_BYTES = 155_000_000
_IDLE_MEMORY_PART = 8
_MAX_SPARE_PLACES = 4
_MAX_PARKED_PLACES = 8


def spare_places(memory_bytes: int) -> int:
    """Return how many spares a machine has room for: a third of its idle processes, 1 to 4."""
    places = memory_bytes // _IDLE_MEMORY_PART // _IDLE_CLAUDE_BYTES
    return min(_MAX_SPARE_PLACES, max(1, places // 3))


def parked_places(memory_bytes: int) -> int:
    """Return how many parked processes a machine has room for beside its spares, 1 to 8."""
    places = memory_bytes // _IDLE_MEMORY_PART // _IDLE_CLAUDE_BYTES
    return min(_MAX_PARKED_PLACES, max(1, places - spare_places(memory_bytes)))


_LOOPBACK_NAMES = ("127.0.0.1", "::1", "localhost")

#: The levels of effort of the API, lowest first.
EFFORTS = ("low", "medium", "high", "xhigh", "max")
#: Lifetimes in the API's prompt cache, the longest first.
CACHE_LIFETIMES = ("1h", "5m")

#: The meaning of CLAUDE_ALLOWED_TOOLS=default.
DEFAULT_AGENT_TOOLS = (
    "Bash", "Read", "Write", "Edit", "Glob", "Grep", "WebSearch", "WebFetch", "Agent",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting and its value. The help texts document the rows."""

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
    public_url: str = setting(
        "", "OCP_PUBLIC_URL",
        "address that other devices use, such as https://ocp.example.org; empty = the one of the "
        "network; `none` = it is not known, as in a container",
    )
    tls_cert: str = setting("", "OCP_TLS_CERT", "certificate chain (PEM) to serve https with")
    tls_key: str = setting("", "OCP_TLS_KEY", "private key (PEM) of the certificate")
    instance_name: str = setting("", "OCP_INSTANCE_NAME", "a label for /health")
    # -- access -------------------------------------------------------------------------------
    auth_mode: str = setting(
        "", "CLAUDE_AUTH_MODE",
        "who may use the API: none (everybody who can connect), shared (holders of PROXY_API_KEY) "
        "or multi (holders of keys made at /api/keys); empty = shared if PROXY_API_KEY is set, "
        "else none",
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
        True, "PROXY_ADVERTISE_ANON_KEY", "/health shows the anonymous key to everybody"
    )
    wrong_key_delay_ms: int = setting(
        2_000, "OCP_WRONG_KEY_DELAY",
        "longest delay of the answer to a wrong key, after several from one address; 0 = none",
        unit="ms", minimum=0, maximum=60_000,
    )
    # -- claude -------------------------------------------------------------------------------
    claude_bin: str = setting(
        "", "CLAUDE_BIN",
        "path of the claude program; empty = searched on PATH and in the usual places",
    )
    default_model: str = setting(
        "sonnet", "OCP_DEFAULT_MODEL",
        "model of a request that names none; kept warm from the start",
    )
    model_aliases: str = setting(
        "", "OCP_MODEL_ALIASES",
        "other names of models, comma separated, such as gpt-4o=sonnet,fast=haiku:low",
        live="modelAliases",
    )
    default_effort: str = setting(
        "", "OCP_DEFAULT_EFFORT",
        "effort of a request that asks for none, for models that have levels of effort; empty = "
        "the model's own",
        choices=("", *EFFORTS), live="defaultEffort",
    )
    web_search: bool = setting(
        True, "OCP_WEB_SEARCH",
        "clients may let the model search the web, with the API's own tool; keys need the "
        "permission too",
        live="webSearch",
    )
    fast_mode: bool = setting(
        False, "OCP_FAST_MODE",
        "clients may ask for fast mode, on models that have it; it is billed as usage credits, "
        "beyond the plan",
        live="fastMode",
    )
    cache_lifetime: str = setting(
        "plan", "OCP_CACHE_LIFETIME",
        "lifetime of the prompt in the API's cache: `plan` = as claude decides, `client` = the "
        "longest `cache_control.ttl` of a request, or as claude decides if it has none; `5m` or "
        "`1h` = for all requests",
        choices=("plan", "client", *CACHE_LIFETIMES), live="cacheLifetime",
    )
    system_prompt: str = setting(
        "", "CLAUDE_SYSTEM_PROMPT", "text appended to the system prompt of every request"
    )
    extra_usage: str = setting(
        "allow", "OCP_EXTRA_USAGE",
        "once the plan is used up and claude's answers are billed as extra usage: `allow` = go on, "
        "`stop` = refuse new requests until the plan's window resets",
        choices=("allow", "stop"), live="extraUsage",
    )
    max_retries: int = setting(
        2, "CLAUDE_MAX_RETRIES", "how often claude itself retries a failed API call",
        minimum=0, maximum=10,
    )
    pass_env: str = setting(
        "", "OCP_PASS_ENV",
        "additional environment variables that are passed to claude, comma separated",
    )
    # -- spares -------------------------------------------------------------------------------
    warm_processes: int = setting(
        1, "OCP_WARM_PROCESSES", "idle claude processes kept for each model in use; 0 = none",
        minimum=0, maximum=8, live="warmProcesses",
    )
    warm_total: int = setting(
        4, "OCP_WARM_TOTAL",
        "idle claude processes of all models; by default a third of the processes that fit into "
        "an eighth of the memory, 1 to 4",
        minimum=0, maximum=32, live="warmTotal", from_memory=spare_places,
    )
    warm_idle_ms: int = setting(
        900_000, "OCP_WARM_IDLE", "how long an idle process waits before it is dropped",
        unit="ms", minimum=1_000, maximum=86_400_000, live="warmIdleMs",
    )
    # -- agent mode ---------------------------------------------------------------------------
    allowed_tools: str = setting(
        "", "CLAUDE_ALLOWED_TOOLS",
        "agent mode: tools of its own that claude may use on the server, comma separated; "
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
        "processes that stay with their conversation and wait for its next message; 0 = none; by "
        "default the rest of the processes that fit into an eighth of the memory, 1 to 8",
        minimum=0, maximum=64, live="parkedProcesses", from_memory=parked_places,
    )
    session_ttl_ms: int = setting(
        3_600_000, "CLAUDE_SESSION_TTL", "how long a conversation is kept for its next message",
        unit="ms", minimum=1_000, maximum=86_400_000, live="sessionTTL",
    )
    session_id: bool = setting(
        False, "OCP_SESSION_ID",
        "accept the field session_id and the header X-Session-Id as ocp_session_id; leave this off "
        "if clients use them only to group requests", live="sessionId",
    )
    max_prompt_chars: int = setting(
        0, "CLAUDE_MAX_PROMPT_CHARS",
        "maximum length of a prompt; beyond it the oldest messages are dropped; 0 = only the "
        "model's own limit",
        unit="characters", minimum=0, maximum=100_000_000, live="maxPromptChars",
    )
    # -- cache --------------------------------------------------------------------------------
    cache_ttl_ms: int = setting(
        0, "CLAUDE_CACHE_TTL",
        "how long a stored answer is served again for the same request; 0 = never",
        unit="ms", minimum=0, maximum=86_400_000, live="cacheTTL",
    )
    cache_max_bytes: int = setting(
        33_554_432, "OCP_CACHE_MAX_BYTES", "memory for all cached answers",
        unit="bytes", minimum=65_536, maximum=4_294_967_296, live="cacheMaxBytes",
    )
    cache_sampled: bool = setting(
        True, "OCP_CACHE_SAMPLED", "cache the answers to requests with a temperature above 0 too",
        live="cacheSampled",
    )
    # -- limits -------------------------------------------------------------------------------
    max_concurrent: int = setting(
        8, "CLAUDE_MAX_CONCURRENT", "answers that may run at the same time",
        minimum=1, maximum=64, live="maxConcurrent",
    )
    max_queue: int = setting(
        16, "CLAUDE_MAX_QUEUE", "requests that may wait for their turn", minimum=0, maximum=1000,
        live="maxQueue",
    )
    queue_retry_after_s: int = setting(
        5, "CLAUDE_QUEUE_RETRY_AFTER", "Retry-After when the queue is full",
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
        "total size of the images and files in one request, decoded", unit="bytes", minimum=1,
    )
    # -- time ---------------------------------------------------------------------------------
    timeout_ms: int = setting(
        600_000, "CLAUDE_TIMEOUT", "longest time for one answer, waiting included",
        unit="ms", minimum=1_000, maximum=3_600_000, live="timeout",
    )
    heartbeat_ms: int = setting(
        15_000, "CLAUDE_HEARTBEAT_INTERVAL",
        "a stream that is silent for this long gets a keep-alive comment; 0 = never",
        unit="ms", minimum=0, maximum=600_000, live="heartbeatInterval",
    )
    whole_silence_ms: int = setting(
        120_000, "OCP_WHOLE_SILENCE",
        "an answer that is not streamed and not ready after this long gets its headers, and then "
        "white space, to keep the connection open; 0 = never",
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
        "info", "OCP_LOG_LEVEL", "minimum level that is logged",
        choices=("debug", "info", "warn", "error"),
    )

    @property
    def mode(self) -> str:
        """The effective access mode: "none", "shared" or "multi"."""
        return self.auth_mode or ("shared" if self.api_key else "none")

    @property
    def is_agent(self) -> bool:
        """Whether claude may run its own tools on the server."""
        return bool(self.allowed_tools or self.skip_permissions or self.mcp_config)

    @property
    def is_usable_without_key(self) -> bool:
        """Whether other machines can use the API without a secret key."""
        keyless = self.mode == "none" or bool(self.advertised_key)
        return keyless and self.bind not in _LOOPBACK_NAMES

    @property
    def advertised_key(self) -> str:
        """The key that /health shows to everybody, or an empty string."""
        is_shown = self.mode == "multi" and self.advertise_anonymous_key
        return self.anonymous_key if is_shown else ""

    @property
    def secrets(self) -> frozenset[str]:
        """The keys that are settings of this server."""
        return frozenset({self.api_key, self.admin_key, self.anonymous_key} - {""})

    @property
    def own_names(self) -> frozenset[str]:
        """Host names of this server that the operator has set, in lower case."""
        public = urllib.parse.urlsplit(self.public_url).hostname or ""
        return frozenset(name.lower() for name in (*split_list(self.allowed_hosts), public)) - {""}

    @property
    def home_path(self) -> str:
        """The state folder as an absolute path."""
        return os.path.abspath(os.path.expanduser(self.home))


#: An origin, or a pattern that cannot match an origin of another owner.
_ORIGIN = re.compile(
    r"[^*]*|https?://(\*\.)?[^*/:]+(:(\*|\d+))?/?|(?!https?:)[a-z][a-z0-9+.-]*://[^/]*/?",
    re.IGNORECASE,
)

#: A value of OCP_PUBLIC_URL.
_PUBLIC_URL = re.compile(r"(none|https?://([\w.-]+|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?(/[\w./~-]*)?)?")

#: An entry of OCP_MODEL_ALIASES, and what to say of another one.
_MODEL_ALIAS = re.compile(r"[^=\s][^=]*=[^=]*[^=\s]")
_MODEL_ALIAS_HELP = "OCP_MODEL_ALIASES takes entries such as gpt-4o=sonnet, separated by commas"

#: Rules across settings: (test that is true if the rule is broken, error message).
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
        "PROXY_ANONYMOUS_KEY has an effect only with CLAUDE_AUTH_MODE=multi: set both or none",
    ),
    (
        lambda config: bool(config.admin_key)
        and config.admin_key in (config.api_key, config.anonymous_key),
        "OCP_ADMIN_KEY is also the key of clients, which would make every client an admin: choose "
        "another one",
    ),
    (
        lambda config: bool(config.tls_cert) != bool(config.tls_key),
        "OCP_TLS_CERT and OCP_TLS_KEY need each other: set both or none",
    ),
    (
        lambda config: config.is_agent and config.is_usable_without_key,
        "agent mode (CLAUDE_ALLOWED_TOOLS, CLAUDE_SKIP_PERMISSIONS, CLAUDE_MCP_CONFIG) lets "
        "requests run tools on this machine: set PROXY_API_KEY, bind to 127.0.0.1, or keep the "
        "anonymous key to yourself with PROXY_ADVERTISE_ANON_KEY=0",
    ),
    (
        lambda config: not all(map(_ORIGIN.fullmatch, split_list(config.allowed_origins))),
        "OCP_ALLOWED_ORIGINS takes origins, such as https://app.example.org; a * may replace the "
        "subdomain, the port, or the name after a scheme other than http and https, as in "
        "https://*.example.org, http://localhost:*, vscode-webview://*",
    ),
    (
        lambda config: not all(map(_MODEL_ALIAS.fullmatch, split_list(config.model_aliases))),
        _MODEL_ALIAS_HELP,
    ),
    (
        lambda config: not _PUBLIC_URL.fullmatch(config.public_url),
        "OCP_PUBLIC_URL takes an address such as https://ocp.example.org or "
        "http://192.168.1.10:3456, or none",
    ),
)

#: The JSON names of the types of settings.
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
    """Invalid settings. `args[0]` has one line for each problem."""


#: The milliseconds of the units of settings that are durations.
_UNIT_MS = {"ms": 1, "s": 1_000, "days": 86_400_000}


def is_duration(row: dataclasses.Field[Any]) -> bool:
    """Return whether this setting is a duration: its value can be written as 30s or 1h too."""
    return row.metadata["unit"] in _UNIT_MS


def _in_unit(row: dataclasses.Field[Any], text: str) -> int | None:
    """Return the number of a row's units that a duration has, rounded down; None if there is no
    duration in `text`, or the row is none."""
    duration_ms = parse_duration_ms(text) if is_duration(row) else None
    return None if duration_ms is None else duration_ms // _UNIT_MS[row.metadata["unit"]]


def setting_text(row: dataclasses.Field[Any], value: int | str | bool) -> str:
    """Return a value as people write it: a duration as 1h, a number with its unit."""
    unit = row.metadata["unit"]
    if is_duration(row) and value:
        return format_duration(int(value) * _UNIT_MS[unit])
    return f"{int(value) if isinstance(value, bool) else value} {unit}".strip()


def _parse_integer(row: dataclasses.Field[Any], text: str) -> int:
    value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,400}", text) else _in_unit(row, text)
    minimum, maximum = row.metadata["minimum"], row.metadata["maximum"]
    if value is None:
        more = ", nor a duration such as 30s, 90m or 1h" if is_duration(row) else ""
        raise ValueError(f"is not a whole number{more}")
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        span = f"{minimum} or more" if maximum is None else f"from {minimum} to {maximum}"
        if is_duration(row):
            ends = (setting_text(row, minimum), setting_text(row, maximum))
            span += f" {row.metadata['unit']} ({ends[0]} to {ends[1]})"
        raise ValueError(f"is out of range: must be {span}")
    return value


def parse_setting(row: dataclasses.Field[Any], text: str) -> int | str | bool:
    """Return the value of `text` for this row. Raises ValueError with the reason."""
    text = text.strip()
    if isinstance(row.default, bool):
        if text.lower() not in _TRUE_WORDS + _FALSE_WORDS:
            raise ValueError("is neither 1 nor 0")
        return text.lower() in _TRUE_WORDS
    if isinstance(row.default, int):
        return _parse_integer(row, text)
    choices = row.metadata["choices"]
    if choices and text not in choices:
        raise ValueError("is not one of " + ", ".join(choice for choice in choices if choice))
    return text


def setting_from_json(row: dataclasses.Field[Any], value: object) -> int | str | bool:
    """Return the value for this row from a JSON value. Raises ValueError with the reason."""
    kind = type(row.default)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if is_duration(row) and isinstance(value, str) and _in_unit(row, value) is not None:
        return parse_setting(row, value)
    if type(value) is not kind:
        words = {int: "a whole number", bool: "true or false", str: "a string"}
        more = " or a duration such as \"1h\"" if is_duration(row) else ""
        raise ValueError(f"must be {words[kind]}{more}")
    return parse_setting(row, str(value))


def live_settings() -> dict[str, dataclasses.Field[Any]]:
    """Return the rows that can be changed while the server runs, by their `live` names."""
    rows = dataclasses.fields(Config)
    return {row.metadata["live"]: row for row in rows if row.metadata["live"]}


def default_of(row: dataclasses.Field[Any], memory_bytes: int | None) -> int | str | bool:
    """Return the default of this row on a machine with so much memory; None = it does not tell."""
    from_memory = row.metadata["from_memory"]
    default: Any = row.default
    if from_memory is not None and memory_bytes is not None:
        default = from_memory(memory_bytes)
    return default  # type: ignore[no-any-return]  # a value of the row's type


def load_config(environ: Mapping[str, str], memory_bytes: int | None = None) -> Config:
    """Return the settings of this environment on a machine with so much memory. An empty variable
    counts as not set.

    Raises ConfigError with all problems, not only the first one.
    """
    values: dict[str, int | str | bool] = {}
    problems: list[str] = []
    for row in dataclasses.fields(Config):
        values[row.name] = default_of(row, memory_bytes)
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
    """Return the variables of this environment that are in REMOVED_SETTINGS: (name, why)."""
    return [
        (name, why) for name in sorted(environ) for pattern, why in REMOVED_SETTINGS
        if matches_any(name, (pattern,))
    ]


#: Variables of claude, of the other scripts of OCP and of what surrounds it, whose names look like
#: those of settings.
_OTHER_VARIABLES = (
    "CLAUDE_CODE_*", "CLAUDE_CONFIG_DIR", "CLAUDE_SESSION_ID", "CLAUDE_API_KEY", "OCP_URL",
    "OCP_API_KEY", "OCP_CONNECT_KEY", "OCP_DIR_OVERRIDE", "OCP_UPDATE_DOCS", "OCP_TEST_*",
)
_SETTING_PREFIX = re.compile("CLAUDE_PROXY_|CLAUDE_|OCP_|PROXY_")
#: Only OCP has variables that begin like this. Of the others, those of claude and of other programs
#: cannot be told from typing errors, except by their likeness to a setting.
_OWN_PREFIXES = ("OCP_*", "CLAUDE_PROXY_*")


def unknown_settings(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the variables that are meant as settings but are none: (name, the setting that is
    probably meant, or an empty string). An empty variable counts as not set."""
    rows = [row.metadata["env"] for row in dataclasses.fields(Config)]
    known = {_SETTING_PREFIX.sub("", name, 1): name for name in rows}
    others = (
        *rows, *_OTHER_VARIABLES, *(pattern for pattern, _ in REMOVED_SETTINGS),
        *split_list(environ.get("OCP_PASS_ENV", "")),
    )
    found = []
    for name in sorted(environ):
        prefix = _SETTING_PREFIX.match(name)
        if not prefix or not environ[name].strip() or matches_any(name, others):
            continue
        near = difflib.get_close_matches(name[prefix.end():], known, 1, 0.75)
        if near or matches_any(name, _OWN_PREFIXES):
            found.append((name, known[near[0]] if near else ""))
    return found


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


#: The settings file in OCP_HOME. The installer writes it.
SETTINGS_FILE = "ocp.env"


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


class Environment(NamedTuple):
    """The variables that the server runs with."""

    variables: dict[str, str]
    #: The path of the settings file; empty = there is none.
    file: str
    #: Where the variables come from that are not in the environment of the process.
    sources: Mapping[str, str]

    def source(self, name: str) -> str:
        """Return where a variable comes from: an option, a file, or "environment"."""
        return self.sources.get(name, "environment")


def read_environment(
    environ: Mapping[str, str], options: Mapping[str, tuple[str, str]]
) -> Environment:
    """Return the variables of the command line, else of `environ`, else of the settings file in
    OCP_HOME. `options` are values and options by variable. An empty variable counts as not set.
    Raises ConfigError if the file cannot be read."""
    given = {name: value for name, value in environ.items() if value.strip()}
    home = Config(home=given.get("OCP_HOME", "~/.ocp").strip()).home_path
    path, text = os.path.join(home, SETTINGS_FILE), ""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read()
    except (FileNotFoundError, NotADirectoryError):
        path = ""
    except OSError as problem:
        # Without its settings the server could be open to everybody.
        raise ConfigError(f"{path} cannot be read: {problem.strerror}") from None
    wrong = wrong_lines(path, text)
    if wrong:
        raise ConfigError(wrong)
    stored = settings_of(text)
    sources = dict.fromkeys(stored.keys() - given.keys(), path)
    sources.update({name: option for name, (_, option) in options.items()})
    values = {name: value for name, (value, _) in options.items()}
    return Environment({**environ, **stored, **given, **values}, path, sources)


def settings_in_use(config: Config, environment: Environment) -> list[tuple[str, str, str]]:
    """Return the settings that are not the default: (variable, value, where it comes from). The
    values of secrets are not shown."""
    memory_bytes, found = machine_memory_bytes(), []
    for row in dataclasses.fields(Config):
        name, value = row.metadata["env"], getattr(config, row.name)
        if environment.variables.get(name, "").strip():
            shown = int(value) if isinstance(value, bool) else value
            text = "(secret)" if row.metadata["secret"] else one_line(str(shown), 200)
            found.append((name, text, environment.source(name)))
        elif row.metadata["from_memory"]:
            size = f"{memory_bytes / 1e9:.1f} GB" if memory_bytes else "of unknown size"
            found.append((name, str(value), f"memory, {size}"))
    return found


def split_list(text: str) -> tuple[str, ...]:
    """Return the items of a comma-separated setting."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


def parse_aliases(text: str) -> dict[str, str]:
    """Return what the names in a value of OCP_MODEL_ALIASES stand for, in lower case. Raises
    ValueError."""
    items = split_list(text.lower())
    if not all(map(_MODEL_ALIAS.fullmatch, items)):
        raise ValueError(_MODEL_ALIAS_HELP)
    pairs = (item.split("=") for item in items)
    return {name.strip(): target.strip() for name, target in pairs}


def settings_markdown() -> str:
    """Return the table of docs/settings.md."""
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
            default = "follows memory" if row.metadata["from_memory"] else str(row.default)
        unit = f" {row.metadata['unit']}" if row.metadata["unit"] and default else ""
        shown = f"{default}{unit}" or "empty"
        if is_duration(row) and row.default:
            shown += f" ({setting_text(row, default_of(row, None))})"
        live = f"`{row.metadata['live']}`" if row.metadata["live"] else ""
        cells = (f"`{row.metadata['env']}`", shown, span, live, row.metadata["help"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ==== 3. Errors ==============================================================
# One class for each failure that is reported to a client, ordered by status. A class is a row of
# a table. An instance adds the message, which says what to do next, and, where the time is known,
# `retry_after_s`. `Response.send_error` is the only place that sends one. ClientGone is separate
# because it is never sent, and ConfigError (see Settings) because only the operator sees it.
# An error has one name everywhere, its `kind`: in the log, in rows of usage, in /api/errors and in
# the documents. ACTIONS says for each kind what the operator can do.

# Error types of both APIs.
_INVALID = "invalid_request_error"
_AUTHENTICATION = "authentication_error"
_PERMISSION = "permission_error"
_RATE_LIMIT = "rate_limit_error"
_OVERLOADED = "overloaded_error"


class OcpError(Exception):
    """An internal failure, and the base class of all errors that clients receive."""

    status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"
    anthropic_type: ClassVar[str] = "api_error"
    code: ClassVar[str | None] = None
    #: Whether simply repeating the request later may succeed.
    retryable: ClassVar[bool] = True
    #: Whether the request was rejected before any work was done for it.
    rejected_before_work: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """`param` names the invalid field; `retry_after_s` becomes the header Retry-After."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code or self.code
        self.retry_after_s = retry_after_s
        #: Additional JSON fields for programs that read the error.
        self.details: Json = {}
        #: Whether the error is in the log already, and whether a row of usage has it.
        self.logged = False
        self.has_row = False
        #: For the log, of a caller that was not let in: a little of the key that came, and whose
        #: key it is or was, if that is known exactly.
        self.preview = ""
        self.key_name = ""
        #: Whether the API itself rejected the request: quotas do not count such requests.
        self.refused_upstream = False

    @property
    def kind(self) -> str:
        """The one name of this failure: its code, or its type if it has no code."""
        return self.error_code or self.openai_type

    def headers(self) -> dict[str, str]:
        """Return the response headers for this error."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after_s)))
        if not self.retryable:
            headers["x-should-retry"] = "false"
        return headers


class BadRequest(OcpError):
    """The request is malformed; `param` names the field."""
    status, openai_type, anthropic_type = 400, _INVALID, _INVALID
    retryable = False


class Unsupported(BadRequest):
    """The request uses a feature that this server does not have."""
    code = "unsupported_parameter"


class ContextTooLong(BadRequest):
    """The prompt does not fit the model."""
    code = "context_length_exceeded"


class EmptyAnswer(BadRequest):
    """The model returned an empty answer. 400, because clients retry after any other status."""
    code = "empty_answer"


class Unauthorized(OcpError):
    """The key is none that this server ever gave out."""
    status, openai_type, anthropic_type = 401, _AUTHENTICATION, _AUTHENTICATION
    code, retryable, rejected_before_work = "invalid_api_key", False, True

    def headers(self) -> dict[str, str]:
        """Return the headers, with the authentication scheme that HTTP requires for a 401."""
        return {**super().headers(), "WWW-Authenticate": 'Bearer realm="ocp"'}


class MissingKey(Unauthorized):
    """No key came."""
    code = "missing_api_key"


class ReplacedKey(Unauthorized):
    """The key was replaced by a newer one."""
    code = "replaced_api_key"


class ExpiredKey(Unauthorized):
    """The key has expired."""
    code = "expired_api_key"


class RevokedKey(Unauthorized):
    """The key was revoked."""
    code = "revoked_api_key"


class LoginLost(OcpError):
    """claude is not logged in, or its login was refused."""
    status, openai_type, anthropic_type = 401, _AUTHENTICATION, _AUTHENTICATION
    code, retryable = "upstream_login_required", False


class Forbidden(OcpError):
    """The caller has no permission for this."""
    status, openai_type, anthropic_type = 403, _PERMISSION, _PERMISSION
    retryable = False


class AdminKeyRequired(Forbidden):
    """Only the operator may do this."""
    code = "admin_key_required"


class LocalOnly(Forbidden):
    """Without keys, only the server's own machine may do this."""
    code = "local_only"


class HostNotAllowed(Forbidden):
    """The server was called under a name that is not its own."""
    code = "host_not_allowed"


class OriginNotAllowed(Forbidden):
    """A web page of another origin called the server."""
    code = "origin_not_allowed"


class ModelNotAllowed(Forbidden):
    """The key may not use this model."""
    code = "model_not_allowed"


class UpstreamForbidden(Forbidden):
    """The API rejected this account, or does not give it this model."""
    code = "upstream_forbidden"


class NotFound(OcpError):
    """The requested object or path does not exist."""
    status, openai_type, anthropic_type = 404, _INVALID, "not_found_error"
    code, retryable = "not_found", False


class UnknownModel(NotFound):
    """No model has this name."""
    code = "model_not_found"


class ModelNeedsNewerClaude(NotFound):
    """The claude on the server is older than the model."""
    code = "model_needs_newer_claude"


class MethodNotAllowed(OcpError):
    """The path exists, but not for this method."""
    status, openai_type, anthropic_type = 405, _INVALID, _INVALID
    code, retryable = "method_not_allowed", False

    def __init__(self, message: str, allowed: Iterable[str]) -> None:
        super().__init__(message)
        self.allowed = tuple(allowed)

    def headers(self) -> dict[str, str]:
        """Return the headers, with the methods that the path accepts."""
        return {**super().headers(), "Allow": ", ".join(self.allowed)}


class RequestTimeout(OcpError):
    """The request did not arrive in time."""
    status, openai_type, anthropic_type = 408, _INVALID, _INVALID
    code = "request_timeout"


class Conflict(OcpError):
    """The name is in use."""
    status, openai_type, anthropic_type = 409, _INVALID, _INVALID
    code, retryable = "name_taken", False


class TooLarge(OcpError):
    """The body, or an image in it, is larger than this server accepts."""
    status, openai_type, anthropic_type = 413, _INVALID, "request_too_large"
    code, retryable = "request_too_large", False


class QueueFull(OcpError):
    """Too many requests are waiting."""
    status, openai_type, anthropic_type = 429, _RATE_LIMIT, _RATE_LIMIT
    code, rejected_before_work = "rate_limit_exceeded", True


class RateLimited(QueueFull):
    """The API applied a rate limit."""
    rejected_before_work = False


class QuotaExceeded(OcpError):
    """A key has used up a quota, until the period ends."""
    status, openai_type, anthropic_type = 429, "quota_exceeded", _RATE_LIMIT
    code, retryable, rejected_before_work = "insufficient_quota", False, True

    @property
    def kind(self) -> str:
        """The type: it shares its code, which OpenAI's clients know, with the plan's limit."""
        return self.openai_type


class PlanLimit(OcpError):
    """A limit of the plan is used up, until it resets."""
    status, openai_type, anthropic_type = 429, "insufficient_quota", _RATE_LIMIT
    code, retryable = "insufficient_quota", False


class ExtraUsageStopped(PlanLimit):
    """The answer would be billed as extra usage, which the operator does not want."""
    rejected_before_work = True


class HeadTooLarge(OcpError):
    """The request line or a header is longer than this server accepts."""
    status, openai_type, anthropic_type = 431, _INVALID, _INVALID
    code, retryable = "head_too_large", False


class UpstreamFailed(OcpError):
    """claude or the API behind it failed."""
    status, code = 502, "upstream_failed"


class ClaudeUnavailable(OcpError):
    """No usable claude program was found."""
    status, code = 503, "claude_unavailable"
    retryable, rejected_before_work = False, True


class ClaudeMissing(ClaudeUnavailable):
    """The claude program was not found."""


class ClaudeAway(ClaudeUnavailable):
    """The claude program has just disappeared, as it does for seconds during an update."""
    retryable = True


class ClaudeTooOld(ClaudeUnavailable):
    """The claude program is older than the oldest version that OCP supports."""


class Busy(OcpError):
    """Too many connections are open."""
    status, anthropic_type, code = 503, _OVERLOADED, "too_many_connections"


class MemoryFull(OcpError):
    """The requests and unread answers of a caller take too much memory."""
    status, anthropic_type, code = 503, _OVERLOADED, "memory_full"


class Draining(OcpError):
    """The server is shutting down."""
    status, anthropic_type, code = 503, _OVERLOADED, "shutting_down"
    rejected_before_work = True


class NotReady(OcpError):
    """The server runs, but cannot answer requests."""
    status, anthropic_type, code = 503, _OVERLOADED, "not_ready"


class StorageFailed(OcpError):
    """The database cannot be read or written."""
    status, code = 503, "database_failed"


class StorageLocked(StorageFailed):
    """Another program has locked the database."""
    code = "database_locked"


class StorageFull(StorageFailed):
    """The disk is full, so the database cannot be written."""
    status, code = 507, "disk_full"


class UpstreamTimeout(OcpError):
    """The answer took longer than the time-out allows."""
    status, anthropic_type, code = 504, "timeout_error", "timeout"


class Overloaded(OcpError):
    """The API is overloaded."""
    status, anthropic_type, code = 529, _OVERLOADED, "overloaded"


class ClientGone(Exception):
    """The client closed its connection, so no error is sent. Status and outcome go into its row of
    usage."""

    status: ClassVar[int] = 499
    outcome: ClassVar[str] = "abandoned"


#: What the operator can do about each kind of failure. KEY stands for the name of a key. Kinds that
#: are not listed are faults of a single request, such as `too_many_images`.
_CORRECT_REQUEST = "Correct the request in the client; the message says what is wrong."
ACTIONS: Mapping[str, str] = MappingProxyType({
    "server_error": "Look at the server's log with `ocp logs --request ID`, and report the error.",
    "invalid_request_error": _CORRECT_REQUEST,
    "context_length_exceeded": (
        "Begin a new conversation, or choose a model with a longer window: `ocp models`."
    ),
    "empty_answer": "Ask in another way, or raise the client's max_tokens.",
    "content_filter": "Ask in another way: the model declined.",
    "missing_api_key": (
        "Give the client a key: `ocp keys add NAME` creates one, `ocp connect` sets up tools."
    ),
    "invalid_api_key": (
        "Give the client a key of this server: compare the preview with those of "
        "`ocp keys list`, or create a key with `ocp keys add NAME`."
    ),
    "replaced_api_key": (
        "Put the newer key of KEY into the client, or create another with `ocp keys rotate KEY`."
    ),
    "expired_api_key": "Give the key more time: `ocp keys edit KEY --expiry 90d`.",
    "revoked_api_key": (
        "If the device may use the server again, create a key with `ocp keys add NAME`; "
        "otherwise remove the key from the device."
    ),
    "upstream_login_required": "Log in on the server: `claude auth login`.",
    "permission_error": "Use a key that is allowed to do this.",
    "admin_key_required": (
        "Send the admin key, which is in the file admin-key of OCP_HOME or in OCP_ADMIN_KEY."
    ),
    "local_only": "Call this route on the server's own machine, or set CLAUDE_AUTH_MODE=multi.",
    "host_not_allowed": "Add the name to OCP_ALLOWED_HOSTS, if you gave it to this server.",
    "origin_not_allowed": "Add the origin to OCP_ALLOWED_ORIGINS, if you trust this web page.",
    "model_not_allowed": "Allow the key this model with `ocp keys edit KEY --models A,B`.",
    "upstream_forbidden": (
        "Look at the account on claude.ai: it may not use this model, or is on hold."
    ),
    "not_found": "Correct the address in the client; `/openapi.json` lists all paths.",
    "previous_response_not_found": (
        "Begin the conversation again: stored responses end after a time and at a restart."
    ),
    "model_not_found": "Choose a model of `ocp models`, or add an alias to modelAliases.",
    "model_needs_newer_claude": "Update claude on the server.",
    "method_not_allowed": "Correct the method in the client; `/openapi.json` lists all paths.",
    "request_timeout": "Look at the network of the client: its request came too slowly.",
    "name_taken": "Choose another name, or give that key a new secret: `ocp keys rotate NAME`.",
    "request_too_large": "Send less, or raise the limit that the message names.",
    "rate_limit_exceeded": (
        "Nothing, if it is rare: the client retries. Else let fewer requests run at a time."
    ),
    "quota_exceeded": (
        "Wait for the reset, or raise the quota: `ocp keys quota KEY` shows it."
    ),
    "insufficient_quota": "Wait for the reset of the plan's window: `ocp usage` shows it.",
    "head_too_large": "Send shorter headers.",
    "upstream_failed": "Retry. If it stays so, run `ocp doctor` and update claude.",
    "claude_unavailable": "Run `ocp doctor`: it says how to install or update claude.",
    "too_many_connections": "Close idle clients, or raise OCP_MAX_CONNECTIONS.",
    "memory_full": "Send fewer large requests at a time.",
    "shutting_down": "Nothing: clients retry, and the next server answers.",
    "not_ready": "Run `ocp doctor`: it says what is missing.",
    "database_failed": "Run `ocp doctor`: it says what is wrong with the database.",
    "database_locked": "End the other program that uses ocp.db.",
    "disk_full": "Free space on the disk of OCP_HOME.",
    "timeout": "Ask for less in one request, or raise CLAUDE_TIMEOUT.",
    "overloaded": "Nothing: the API is overloaded, and clients retry.",
})


def action_for(kind: str, key_name: str = "") -> str:
    """Return what the operator can do about a kind of failure. `key_name` is the name of a key, if
    there is one."""
    action = ACTIONS.get(kind, _CORRECT_REQUEST)
    return re.sub(r"\bKEY\b", lambda _: shlex.quote(key_name), action) if key_name else action


# ==== 4. Log =================================================================
# An event is one flat record with a fixed name in the past tense. It is written as a JSON line to
# a rotated file and as a plain line to the terminal, and kept in a ring buffer for GET /logs. No
# prompts and no secrets: callers pass names, counts and durations, and text is redacted here.
# Changes by the operator are audit events: they have a ring and a file of their own, so that
# other events cannot displace them. What was refused before any work has no row of usage: it is
# summed in memory, so that nobody without a key can fill the log or the disk.

LEVELS = ("debug", "info", "warn", "error")
#: How many events are kept in memory for GET /logs, and how many audit events.
_RING_EVENTS = 800
_RING_AUDITS = 200
#: The length of a printed line: as UTF-8 it never exceeds PIPE_BUF.
_MAX_PRINTED_CHARS = 1_000


class _LogFile(logging.handlers.RotatingFileHandler):
    """A rotated file, created readable only by its owner, that ignores failed writes."""

    def _open(self) -> io.TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return open(descriptor, "a", encoding="utf-8", errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore the error: a full disk must not stop an answer."""


#: How much of the end of a log file is read at the start.
_TAIL_BYTES = 500_000


def _file_tail(path: str, count: int) -> list[Json]:
    """Return the last events of a log file, at most `count`, oldest first. Lines that are no
    events are skipped. Empty if the file cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().splitlines()[-count:]
    except OSError:
        return []
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = from_json(line)
            if isinstance(entry, dict) and entry.get("level") in LEVELS and all(
                isinstance(entry.get(name), str) for name in ("ts", "event")
            ):
                entries.append(entry)
    return entries


def _log_value(value: object) -> object:
    """Return a value for the log, with text redacted, shortened, printable and on one line."""
    if isinstance(value, (bool, int, float)) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(_log_value(str(key))): _log_value(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_log_value(each) for each in value]
    return safe_text(str(value), 500)


class Log:
    """Writes events to files, the terminal and rings. `event` and `audit` never raise."""

    def __init__(self, stream: TextIO | None, minimum_level: str, clock: Clock = time.time) -> None:
        """`stream` is None if the server was started without one."""
        self._stream = stream
        self._minimum = LEVELS.index(minimum_level)
        self._clock = clock
        # Guards the rings, the files and the order of lines on the stream. Held for one event.
        self._lock = threading.Lock()
        #: The latest audit events and other events, each with its sequence number.
        self._audits: collections.deque[tuple[int, Json]] = collections.deque(maxlen=_RING_AUDITS)
        self._ring: collections.deque[tuple[int, Json]] = collections.deque(maxlen=_RING_EVENTS)
        #: The sequence number of the next event.
        self._count = 0
        self._file: _LogFile | None = None
        self._audit_file: _LogFile | None = None

    def to_file(self, path: str) -> None:
        """Write later events to `path` too, and audit events to audit.log beside it. The rings get
        the last events that the files have.

        The files are rotated at 10 MB and 1 MB, with three backups each. Raises OSError.
        """
        folder = os.path.dirname(path)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        audit_path = os.path.join(folder, "audit.log")
        self._load(path, audit_path)
        handler = _LogFile(path, maxBytes=10_000_000, backupCount=3, encoding="utf-8")
        audits = _LogFile(
            audit_path, maxBytes=1_000_000, backupCount=3, encoding="utf-8", delay=True,
        )
        with self._lock:
            self._file, self._audit_file = handler, audits

    def _load(self, path: str, audit_path: str) -> None:
        """Put the ends of the files, and of their newest backups, before the events in memory."""
        audits, events = (
            [*_file_tail(f"{name}.1", maximum), *_file_tail(name, maximum)][-maximum:]
            for name, maximum in ((audit_path, _RING_AUDITS), (path, _RING_EVENTS))
        )
        # The log has the later ones of the audit events too.
        audited, logged = ({(e["ts"], e["event"]) for e in each} for each in (audits, events))
        numbered = [(e, self._audits) for e in audits if (e["ts"], e["event"]) not in logged]
        numbered += [
            (e, self._audits if (e["ts"], e["event"]) in audited else self._ring) for e in events
        ]
        with self._lock:
            rings = (self._audits, self._ring)
            present = [[(number + len(numbered), e) for number, e in ring] for ring in rings]
            for ring in rings:
                ring.clear()
            for number, (entry, ring) in enumerate(numbered):
                ring.append((number, entry))
            for ring, entries in zip(rings, present):
                ring.extend(entries)
            self._count += len(numbered)

    def event(self, level: str, name: str, **fields: object) -> None:
        """Log one event, if its level is logged. Fields that are None are left out."""
        if LEVELS.index(level) >= self._minimum:
            self._record(level, name, fields, is_audit=False)

    def audit(self, name: str, **fields: object) -> None:
        """Log a change by the operator, whatever the minimum level is."""
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
        self._print(f"{clock} {entry['level']:5} {entry['event']} {fields}")

    def _print(self, line: str) -> None:
        """Print a line, unless that would block: a full pipe must not stop the server."""
        with contextlib.suppress(OSError, ValueError):
            if self._stream is not None and self._is_writable(self._stream):
                print(line[:_MAX_PRINTED_CHARS], file=self._stream, flush=True)

    def _is_writable(self, stream: TextIO) -> bool:
        """Return whether a line can be written without blocking. Raises OSError."""
        try:
            descriptor = stream.fileno()
        except io.UnsupportedOperation:
            return True
        # A pipe is reported as writable if it has room for PIPE_BUF bytes.
        ready = select.poll()
        ready.register(descriptor, select.POLLOUT)
        return bool(ready.poll(0))

    def recent(
        self, count: int, level: str, matches: Callable[[Json], bool] = lambda entry: True
    ) -> list[Json]:
        """Return the newest `count` events of at least this level that match, oldest first;
        "all" = every level, "audit" = audit events only."""
        minimum = LEVELS.index(level) if level in LEVELS else 0
        with self._lock:
            numbered = list(self._audits) if level == "audit" else self._numbered_events()
        entries = [
            entry for _, entry in numbered
            if LEVELS.index(entry["level"]) >= minimum and matches(entry)
        ]
        return entries[-count:] if count else []

    def _numbered_events(self) -> list[tuple[int, Json]]:
        """Return the events of both rings, oldest first. The caller holds the lock."""
        return sorted([*self._audits, *self._ring], key=lambda numbered: numbered[0])

    def since(self, first: int) -> tuple[list[Json], int]:
        """Return the events from sequence number `first` on that are still in memory, and the
        number of the next event."""
        with self._lock:
            return [
                entry for number, entry in self._numbered_events() if number >= first
            ], self._count

    def close(self) -> None:
        """Close the files; later events go only to the stream and the rings."""
        with self._lock:
            handlers = (self._file, self._audit_file)
            self._file = self._audit_file = None
        for handler in handlers:
            if handler is not None:
                handler.close()


class Refused(NamedTuple):
    """A request that was refused before any work: it has no row of usage."""

    peer: str
    status: int
    kind: str
    message: str
    #: The name of the key, or of the caller; "" if it is not known.
    key: str = ""
    #: A little of the wrong key that came; "" if none did.
    preview: str = ""
    path: str = ""
    request_id: str = ""
    user_agent: str = ""


class RefusedGroup:
    """Refusals with the same peer, key, preview and kind."""

    def __init__(self, at_s: float) -> None:
        self.at_s = at_s
        self.count = 0
        #: The latest ones, oldest first, with their times.
        self.latest: collections.deque[tuple[float, Refused]] = collections.deque(
            maxlen=_LATEST_REFUSALS
        )

    def add(self, at_s: float, refused: Refused) -> None:
        self.count += 1
        self.latest.append((at_s, refused))

    def copy(self) -> RefusedGroup:
        copied = RefusedGroup(self.at_s)
        copied.count, copied.latest = self.count, self.latest.copy()
        return copied

    @property
    def last_s(self) -> float:
        return self.latest[-1][0]

    @property
    def newest(self) -> Refused:
        return self.latest[-1][1]

    def count_since(self, since_s: float) -> int:
        """Return how many came since then; of a longer list at least the latest ones."""
        if self.at_s >= since_s:
            return self.count
        return sum(at_s >= since_s for at_s, _ in self.latest)

    def with_id(self, request_id: str) -> Refused | None:
        """Return the refusal of this request; None if it is not among the latest ones."""
        found = (each for _, each in self.latest if each.request_id == request_id)
        return next(found, None)


#: How many groups are kept, of callers with a key and of strangers; how many of the latter may be
#: of one peer, and how many refusals of a group are kept one by one. Together they take at most
#: some 5 MB.
_MAX_REFUSED_GROUPS = 100
_MAX_REFUSED_GROUPS_OF_PEER = 20
_LATEST_REFUSALS = 20


class RefusedRequests:
    """The latest refusals for /api/errors, in memory. Strangers displace only strangers."""

    def __init__(self, clock: Clock = time.time) -> None:
        self._clock = clock
        # Guards the two dicts and the groups in them.
        self._lock = threading.Lock()
        #: Groups of callers with a key, and of strangers; least recent first.
        self._known: collections.OrderedDict[tuple[str, ...], RefusedGroup] = (
            collections.OrderedDict()
        )
        self._strangers: collections.OrderedDict[tuple[str, ...], RefusedGroup] = (
            collections.OrderedDict()
        )

    def add(self, refused: Refused, at_s: float | None = None) -> None:
        """Keep a refusal of now, or of an earlier time that is not before the last one. Texts that
        the client wrote are bounded and printable in it."""
        refused = refused._replace(
            message=safe_text(refused.message, 500), path=safe_text(refused.path, 100),
            user_agent=safe_text(refused.user_agent, 120),
        )
        at_s = self._clock() if at_s is None else at_s
        with self._lock:
            groups = self._known if refused.key else self._strangers
            place = self._place(refused)
            group = groups.pop(place, None) or RefusedGroup(at_s)
            group.add(at_s, refused)
            groups[place] = group
            while len(groups) > _MAX_REFUSED_GROUPS:
                groups.popitem(last=False)

    def _place(self, refused: Refused) -> tuple[str, ...]:
        """Return what its group has in common. The caller holds the lock."""
        peer = peer_group(refused.peer)
        place = (peer, refused.key, refused.preview, refused.kind)
        if not refused.key and place not in self._strangers:
            if sum(p == peer for p, *_ in self._strangers) >= _MAX_REFUSED_GROUPS_OF_PEER:
                return (peer, "", "others", refused.kind)
        return place

    def groups(self) -> list[RefusedGroup]:
        """Return copies of all groups, the latest first."""
        with self._lock:
            groups = [*self._known.values(), *self._strangers.values()]
            copies = [group.copy() for group in groups]
        return sorted(copies, key=lambda group: group.last_s, reverse=True)


_REFUSED_EVENT = "request_refused"


def _refused_of(entry: Json) -> Refused | None:
    """Return the refusal that an event of the log tells; None if it tells none."""
    texts = {name: entry.get(name, "") for name in Refused._fields if name != "status"}
    if entry.get("caller") != "public":
        texts["key"] = texts["key"] or entry.get("caller", "")
    status = entry.get("status")
    if entry["event"] != _REFUSED_EVENT or not isinstance(status, int) or not texts["kind"]:
        return None
    is_whole = all(isinstance(text, str) for text in texts.values())
    return Refused(status=status, **texts) if is_whole else None


#: How many refusals of one peer are logged one by one in a period, how many peers are counted
#: separately, and how long a period lasts.
_MAX_LOGGED_REFUSALS = 5
_MAX_REFUSED_PEERS = 32
_REFUSALS_PERIOD_S = 60.0


class Refusals:
    """Keeps refused requests, and logs them so that nobody without a key can fill the log: a few
    events for each peer and minute, then one event with the counts."""

    def __init__(self, log: Log, clock: Clock = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        # Guards the next fields; never held while an event is logged.
        self._lock = threading.Lock()
        self._since_s = clock()
        #: The latest ones, for the operator, with those that the log has from before the start.
        self.kept = RefusedRequests()
        for entry in log.recent(_RING_EVENTS, "all"):
            refused = _refused_of(entry)
            if refused is not None:
                with contextlib.suppress(ValueError):
                    self.kept.add(refused, parse_time(entry["ts"]))
        #: Number of refusals in this period by peer and status; all further peers are "others".
        self._counts: dict[str, collections.Counter[int]] = {}

    def record(self, peer: str, status: int, **fields: object) -> None:
        """Count one refusal, and log it unless this peer has had too many."""
        group = peer_group(peer)
        with self._lock:
            is_listed = group in self._counts or len(self._counts) < _MAX_REFUSED_PEERS
            counts = self._counts.setdefault(
                group if is_listed else "others", collections.Counter()
            )
            is_logged = is_listed and sum(counts.values()) < _MAX_LOGGED_REFUSALS
            counts[status] += 1
        if is_logged:
            self._log.event("info", _REFUSED_EVENT, peer=peer, status=status, **fields)

    def tend(self, *, at_once: bool = False) -> None:
        """Log the counts if the period is over, or `at_once`, and begin a new period."""
        with self._lock:
            if not at_once and self._clock() - self._since_s < _REFUSALS_PERIOD_S:
                return
            finished, self._counts, self._since_s = self._counts, {}, self._clock()
        for peer, counts in finished.items():
            if peer == "others" or sum(counts.values()) > _MAX_LOGGED_REFUSALS:
                statuses = {str(status): count for status, count in sorted(counts.items())}
                self._log.event(
                    "warn", "requests_refused", peer=peer, count=sum(counts.values()),
                    statuses=statuses,
                )


# ==== 5. Models ==============================================================
# The models come from models.json beside this file. BUILTIN_MODELS is a copy of it, so that this
# file works alone (a test compares the two). A model states what the API accepts for it and what
# it costs. Older models are served by name but not listed. Names are compared in a canonical form.
# An unlisted name of a Claude model gets the properties of the listed model that is nearest by
# family and version. claude knows better than the file which models its account has and which
# ones the aliases stand for: each process reports them, and ModelCatalog keeps the last report.

BUILTIN_MODELS: Json = {
    "version": 2,
    "models": [
        {
            "id": "claude-opus-5-5", "displayName": "Claude Opus 5.5",
            "openclawName": "Claude Opus 5.5 (via CLI)",
            "reasoning": True, "contextWindow": 1000000, "maxTokens": 128000,
            "defaultMaxTokens": 128000, "firstCli": "2.1.280",
            "thinking": "adaptive", "thinkingOff": "never", "forcedTools": False,
            "sampling": False, "fastMode": True,
            "efforts": ["low", "medium", "high", "xhigh", "max"], "defaultEffort": "medium",
            "prices": {
                "input": 4, "output": 20, "cacheWrite5m": 5, "cacheWrite1h": 8, "cacheRead": 0.2,
            },
        },
        {
            "id": "claude-sonnet-5-5", "displayName": "Claude Sonnet 5.5",
            "openclawName": "Claude Sonnet 5.5 (via CLI)",
            "reasoning": True, "contextWindow": 1000000, "maxTokens": 128000,
            "defaultMaxTokens": 128000, "firstCli": "2.1.284",
            "thinking": "adaptive", "thinkingOff": "between_tools",
            "thinkingOffMaxEffort": "high", "forcedTools": False, "sampling": False,
            "efforts": ["low", "medium", "high", "xhigh", "max"], "defaultEffort": "medium",
            "prices": {
                "input": 2, "output": 10, "cacheWrite5m": 2.5, "cacheWrite1h": 4, "cacheRead": 0.1,
            },
        },
        {
            "id": "claude-fable-5-2", "displayName": "Claude Fable 5.2",
            "openclawName": "Claude Fable 5.2 (via CLI)",
            "reasoning": True, "contextWindow": 1000000, "maxTokens": 128000,
            "defaultMaxTokens": 128000, "firstCli": "2.1.290",
            "thinking": "adaptive", "thinkingOff": "never", "forcedTools": False,
            "sampling": False, "fastMode": True,
            "efforts": ["low", "medium", "high", "xhigh", "max"], "defaultEffort": "medium",
            "prices": {
                "input": 8, "output": 40, "cacheWrite5m": 10, "cacheWrite1h": 16, "cacheRead": 0.2,
            },
        },
        {
            "id": "claude-haiku-5-5", "displayName": "Claude Haiku 5.5",
            "openclawName": "Claude Haiku 5.5 (via CLI)",
            "reasoning": True, "contextWindow": 1000000, "maxTokens": 128000,
            "defaultMaxTokens": 128000, "firstCli": "2.1.293",
            "thinking": "adaptive", "thinkingOff": "disabled", "thinkingOffMaxEffort": "high",
            "cliThinkingOff": False, "forcedTools": True, "sampling": False,
            "efforts": ["low", "medium", "high", "xhigh", "max"], "defaultEffort": "medium",
            "prices": {
                "input": 0.1, "output": 0.5, "cacheWrite5m": 0.125, "cacheWrite1h": 0.2,
                "cacheRead": 0.01,
                "longPrompt": {
                    "aboveTokens": 100000, "input": 0.5, "output": 2.5, "cacheWrite5m": 0.625,
                    "cacheWrite1h": 1, "cacheRead": 0.05,
                },
            },
        },
        {
            "id": "claude-fable-5-1", "displayName": "Claude Fable 5.1",
            "openclawName": "Claude Fable 5.1 (via CLI)",
            "reasoning": True, "contextWindow": 1000000, "maxTokens": 128000,
            "defaultMaxTokens": 64000, "firstCli": "2.1.251",
            "thinking": "adaptive", "thinkingOff": "never", "forcedTools": False,
            "sampling": False,
            "efforts": ["low", "medium", "high", "xhigh", "max"], "defaultEffort": "high",
            "prices": {
                "input": 10, "output": 50, "cacheWrite5m": 12.5, "cacheWrite1h": 20,
                "cacheRead": 0.25,
            },
        },
        {
            "id": "claude-opus-5", "displayName": "Claude Opus 5",
            "openclawName": "Claude Opus 5 (via CLI)",
            "reasoning": True, "contextWindow": 1000000, "maxTokens": 128000,
            "defaultMaxTokens": 64000, "firstCli": "2.1.219",
            "thinking": "adaptive", "thinkingOff": "disabled", "thinkingOffMaxEffort": "high",
            "forcedTools": True, "sampling": False, "fastMode": True,
            "efforts": ["low", "medium", "high", "xhigh", "max"], "defaultEffort": "high",
            "prices": {
                "input": 5, "output": 25, "cacheWrite5m": 6.25, "cacheWrite1h": 10,
                "cacheRead": 0.5,
            },
        },
        {
            "id": "claude-sonnet-5", "displayName": "Claude Sonnet 5",
            "openclawName": "Claude Sonnet 5 (via CLI)",
            "reasoning": True, "contextWindow": 1000000, "maxTokens": 128000,
            "defaultMaxTokens": 64000,
            "thinking": "adaptive", "thinkingOff": "disabled", "forcedTools": True,
            "sampling": False,
            "efforts": ["low", "medium", "high", "xhigh", "max"], "defaultEffort": "high",
            "prices": {
                "input": 2, "output": 10, "cacheWrite5m": 2.5, "cacheWrite1h": 4, "cacheRead": 0.2,
            },
        },
        {
            "id": "claude-fable-5", "displayName": "Claude Fable 5",
            "openclawName": "Claude Fable 5 (via CLI)",
            "reasoning": True, "contextWindow": 1000000, "maxTokens": 128000,
            "defaultMaxTokens": 64000,
            "thinking": "adaptive", "thinkingOff": "never", "forcedTools": True, "sampling": False,
            "efforts": ["low", "medium", "high", "xhigh", "max"], "defaultEffort": "high",
            "prices": {
                "input": 10, "output": 50, "cacheWrite5m": 12.5, "cacheWrite1h": 20,
                "cacheRead": 1,
            },
        },
        {
            "id": "claude-opus-4-8", "displayName": "Claude Opus 4.8",
            "openclawName": "Claude Opus 4.8 (via CLI)",
            "reasoning": True, "contextWindow": 1000000, "maxTokens": 128000,
            "defaultMaxTokens": 64000,
            "thinking": "adaptive", "thinkingOff": "disabled", "forcedTools": True,
            "sampling": False,
            "efforts": ["low", "medium", "high", "xhigh", "max"], "defaultEffort": "high",
            "prices": {
                "input": 5, "output": 25, "cacheWrite5m": 6.25, "cacheWrite1h": 10,
                "cacheRead": 0.5,
            },
        },
        {
            "id": "claude-opus-4-7", "displayName": "Claude Opus 4.7",
            "openclawName": "Claude Opus 4.7 (via CLI)",
            "reasoning": True, "contextWindow": 1000000, "maxTokens": 128000,
            "defaultMaxTokens": 64000,
            "thinking": "adaptive", "thinkingOff": "disabled", "forcedTools": True,
            "sampling": False,
            "efforts": ["low", "medium", "high", "xhigh", "max"], "defaultEffort": "xhigh",
            "prices": {
                "input": 5, "output": 25, "cacheWrite5m": 6.25, "cacheWrite1h": 10,
                "cacheRead": 0.5,
            },
        },
        {
            "id": "claude-sonnet-4-6", "displayName": "Claude Sonnet 4.6",
            "openclawName": "Claude Sonnet 4.6 (via CLI)",
            "reasoning": True, "contextWindow": 200000, "longContext": True, "maxTokens": 128000,
            "defaultMaxTokens": 32000,
            "thinking": "adaptive", "thinkingOff": "disabled", "forcedTools": True,
            "sampling": True,
            "efforts": ["low", "medium", "high", "max"], "defaultEffort": "high",
            "prices": {
                "input": 3, "output": 15, "cacheWrite5m": 3.75, "cacheWrite1h": 6,
                "cacheRead": 0.3,
            },
        },
        {
            "id": "claude-opus-4-6", "displayName": "Claude Opus 4.6",
            "openclawName": "Claude Opus 4.6 (via CLI)",
            "reasoning": True, "contextWindow": 200000, "longContext": True, "maxTokens": 128000,
            "defaultMaxTokens": 64000,
            "thinking": "adaptive", "thinkingOff": "disabled", "forcedTools": True,
            "sampling": True,
            "efforts": ["low", "medium", "high", "max"], "defaultEffort": "high",
            "prices": {
                "input": 5, "output": 25, "cacheWrite5m": 6.25, "cacheWrite1h": 10,
                "cacheRead": 0.5,
            },
        },
        {
            "id": "claude-haiku-4-5-20251001", "displayName": "Claude Haiku 4.5",
            "openclawName": "Claude Haiku 4.5 (via CLI)",
            "reasoning": False, "contextWindow": 200000, "maxTokens": 64000,
            "defaultMaxTokens": 32000,
            "thinking": "budget", "thinkingOff": "disabled", "forcedTools": True, "sampling": True,
            "efforts": [],
            "prices": {
                "input": 1, "output": 5, "cacheWrite5m": 1.25, "cacheWrite1h": 2, "cacheRead": 0.1,
            },
        },
    ],
    "olderModels": [
        {
            "id": "claude-opus-4-5-20251101", "displayName": "Claude Opus 4.5",
            "openclawName": "Claude Opus 4.5 (via CLI)",
            "reasoning": False, "contextWindow": 200000, "maxTokens": 64000,
            "defaultMaxTokens": 32000,
            "thinking": "budget", "thinkingOff": "disabled", "forcedTools": True, "sampling": True,
            "efforts": ["low", "medium", "high"],
            "prices": {
                "input": 5, "output": 25, "cacheWrite5m": 6.25, "cacheWrite1h": 10,
                "cacheRead": 0.5,
            },
        },
    ],
    "aliases": {
        "opus": "claude-opus-5-5",
        "sonnet": "claude-sonnet-5-5",
        "haiku": "claude-haiku-5-5",
        "fable": "claude-fable-5-2",
        "best": "opus",
        "default": "sonnet",
    },
    "legacyAliases": {
        "claude-opus-4": "claude-opus-4-7",
        "claude-haiku-4": "claude-haiku-4-5-20251001",
        "claude-haiku-4-5": "claude-haiku-4-5-20251001",
    },
}


class Prices(NamedTuple):
    """List prices of the API, in USD for a million tokens."""

    input: float
    output: float
    cache_write_5m: float
    cache_write_1h: float
    cache_read: float


class Model(NamedTuple):
    """One model and what the API accepts for it."""

    id: str
    display_name: str
    #: Whether it thinks by default.
    reasoning: bool
    context_window: int
    #: The most tokens of an answer, and how many claude asks for if nobody sets a limit.
    max_tokens: int
    default_max_tokens: int
    #: "adaptive" (the model decides, guided by the effort) or "budget" (a number of tokens).
    thinking: str
    #: The value of the API's `thinking.type` that switches thinking off, or "never", and the
    #: highest effort with which the API accepts it; empty = any.
    thinking_off: str
    thinking_off_max_effort: str
    #: Whether the API accepts a tool choice that forces a call.
    forced_tools: bool
    #: Whether the API accepts temperature and top_p.
    sampling: bool
    #: The accepted levels of effort, lowest first; empty = none.
    efforts: tuple[str, ...]
    #: The level of effort without a wish; empty = it has none.
    default_effort: str
    #: None = unknown.
    prices: Prices | None
    #: The prices of a request whose prompt has more tokens than this; None = the same ones.
    long_prompt_tokens: int = 0
    long_prompt_prices: Prices | None = None
    #: The first version of claude that knows it; empty = every one that OCP works with.
    first_cli: tuple[int, ...] = ()
    #: Whether claude also offers it with a window of LONG_CONTEXT_TOKENS.
    long_context: bool = False
    #: Whether claude can switch its thinking off by itself; None = nobody has said.
    cli_thinking_off: bool | None = None
    #: Whether the API answers faster for usage credits, if asked to.
    fast_mode: bool = False
    #: Whether it is in the list of models that clients get.
    listed: bool = True
    #: Whether its name is in models.json, or claude offers it.
    known: bool = True
    #: The model name passed to claude: the id, or a more specific name.
    argument: str = ""
    #: The effort in the name that a client used; it counts like one in the request.
    named_effort: str = ""
    #: The operator's effort for requests that ask for none.
    operator_effort: str = ""

    @property
    def lineage(self) -> tuple[str, tuple[int, ...]]:
        """Family and version, see lineage_of."""
        return lineage_of(self.id)

    @property
    def can_stop_thinking(self) -> bool:
        """Whether its thinking can be switched off."""
        return self.thinking_off != "never"

    @property
    def sent_thinking_off(self) -> str:
        """The `thinking.type` to send for no thinking; empty where claude sends it by itself, and
        where the model always thinks."""
        by_claude = self.thinking_off == "disabled" and self.cli_thinking_off is not False
        return self.thinking_off if self.can_stop_thinking and not by_claude else ""


_THINKING = ("adaptive", "budget")
_THINKING_OFF = ("disabled", "between_tools", "never")
#: The fields of a model in models.json and their types.
_MODEL_FIELDS: tuple[tuple[str, type], ...] = (
    ("id", str), ("displayName", str), ("reasoning", bool), ("contextWindow", int),
    ("maxTokens", int), ("defaultMaxTokens", int), ("thinking", str), ("thinkingOff", str),
    ("forcedTools", bool), ("sampling", bool), ("efforts", list), ("prices", dict),
)
#: The fields of `prices`, in the order of Prices.
_PRICE_FIELDS = ("input", "output", "cacheWrite5m", "cacheWrite1h", "cacheRead")


def _check_model_row(row: Json) -> None:
    """Raise ValueError or KeyError if a row of models.json is invalid."""
    for name, kind in _MODEL_FIELDS:
        if type(row[name]) is not kind:
            raise ValueError(f"{row.get('id')}: {name} is not of type {kind.__name__}")
    levels = {row.get("defaultEffort", ""), row.get("thinkingOffMaxEffort", "")}
    for name, values, allowed in (
        ("thinking", {row["thinking"]}, _THINKING),
        ("thinkingOff", {row["thinkingOff"]}, _THINKING_OFF),
        ("efforts", {*row["efforts"]}, EFFORTS),
        ("defaultEffort and thinkingOffMaxEffort", levels - {""}, tuple(row["efforts"])),
    ):
        if not values <= set(allowed):
            raise ValueError(f"{row['id']}: {name} must be of {', '.join(allowed)}")


def _prices(row: Json) -> Prices:
    """Return the prices in a part of models.json. Raises ValueError, KeyError."""
    values = [row[name] for name in _PRICE_FIELDS]
    if not all(type(value) in (int, float) and value >= 0 for value in values):
        raise ValueError(f"prices are numbers from 0 up, not {values}")
    return Prices(*values)


def _model(row: Json, *, listed: bool) -> Model:
    """Return the model of a row of models.json. Raises ValueError, KeyError, TypeError."""
    _check_model_row(row)
    long_prompt = row["prices"].get("longPrompt")
    first_cli = row.get("firstCli", "")
    return Model(
        id=row["id"],
        display_name=row["displayName"],
        reasoning=row["reasoning"],
        context_window=row["contextWindow"],
        max_tokens=row["maxTokens"],
        default_max_tokens=row["defaultMaxTokens"],
        thinking=row["thinking"],
        thinking_off=row["thinkingOff"],
        thinking_off_max_effort=row.get("thinkingOffMaxEffort", ""),
        forced_tools=row["forcedTools"],
        sampling=row["sampling"],
        efforts=tuple(row["efforts"]),
        default_effort=row.get("defaultEffort", ""),
        prices=_prices(row["prices"]),
        long_prompt_tokens=int(long_prompt["aboveTokens"]) if long_prompt else 0,
        long_prompt_prices=_prices(long_prompt) if long_prompt else None,
        first_cli=tuple(map(int, first_cli.split("."))) if first_cli else (),
        long_context=row.get("longContext") is True,
        cli_thinking_off=False if row.get("cliThinkingOff") is False else None,
        fast_mode=row.get("fastMode") is True,
        listed=listed,
        argument=row["id"],
    )


class OfferedModel(NamedTuple):
    """A model that claude offers its account."""

    #: An alias, or an id.
    name: str
    id: str
    efforts: tuple[str, ...]
    #: Whether claude can switch its thinking off by itself; None = it does not say.
    cli_thinking_off: bool | None
    #: Whether it has fast mode; None = claude does not say.
    fast_mode: bool | None = None


class ModelRefusal(NamedTuple):
    """A property of a model that the API's refusal of a request has shown."""

    model_id: str
    #: A field of Model and its value.
    field: str
    value: Any

    def applied_to(self, model: Model) -> Model:
        """Return the model as it is after this refusal; another model is unchanged."""
        return model._replace(**{self.field: self.value}) if model.id == self.model_id else model


class ClaudeModels(NamedTuple):
    """The claude in use, as far as models depend on it."""

    #: Empty = unknown.
    version: tuple[int, ...] = ()
    #: Empty until a process has reported them.
    offered: tuple[OfferedModel, ...] = ()
    refusals: frozenset[ModelRefusal] = frozenset()


def offered_models(rows: object) -> tuple[OfferedModel, ...]:
    """Return the models in claude's answer to `initialize`. Rows of another form are left out."""
    found: list[OfferedModel] = []
    for row in rows if isinstance(rows, list) else ():
        fields = row if isinstance(row, dict) else {}
        name, model_id = (
            each.lower().replace(LONG_CONTEXT_SUFFIX, "") if isinstance(each, str) else ""
            for each in (fields.get("value"), fields.get("resolvedModel"))
        )
        levels = fields.get("supportedEffortLevels")
        switches = (fields.get(field) for field in ("supportsThinkingOff", "supportsFastMode"))
        if name and _CLAUDE_ID.fullmatch(model_id):
            efforts = tuple(e for e in EFFORTS if isinstance(levels, list) and e in levels)
            found.append(OfferedModel(
                name, model_id, efforts,
                *(switch if isinstance(switch, bool) else None for switch in switches),
            ))
    return tuple(found)


#: The suffix by which claude selects the long window of a model, and the size of that window.
LONG_CONTEXT_SUFFIX = "[1m]"
LONG_CONTEXT_TOKENS = 1_000_000
#: The forms of the suffix in names from clients; "thinking" may follow it.
_LONG_CONTEXT = re.compile(r"(?:\[1m\]|[-_ ]1m)(?=(?:[-:]thinking)?$)")

#: A level of effort at the end of a name; "thinking" may follow it.
_NAMED_EFFORT = re.compile(
    r"[:-](none|minimal|" + "|".join(EFFORTS) + r")(?=(?:[-:]thinking)?$)"
)
#: The ids that are passed on to claude although they are not in models.json.
_CLAUDE_ID = re.compile(r"claude-[a-z0-9][a-z0-9.\-]{0,99}")

_FAMILIES = "opus|sonnet|haiku|fable|mythos"
#: From this major version on, the family precedes the version in a name.
_FAMILY_FIRST_SINCE = 4
_DATE = re.compile(r"-\d{8}$")
#: Replacements that make a name canonical, in this order: they remove what providers add
#: (us.anthropic.X-v1:0, anthropic:X, X:thinking, X@20250929, X-latest), unify separators, and
#: complete names such as "sonnet-4-6" and "claude-4-5-sonnet".
_CANONICAL_FORMS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^.*/", ""),
        (r"^(?:[a-z-]+\.)?anthropic\.", ""),
        (r"-v\d+(?::\d+)?$", ""),
        (r":(?:thinking|beta|free|online|latest|nitro|floor|extended|exacto)$", ""),
        (r"^\w+:", ""),
        (r"[\s_.@]+", "-"),
        (r"-(?:latest|default|thinking)$", ""),
        (rf"\b({_FAMILIES})(?=\d)", r"\1-"),
        (rf"^(?=(?:{_FAMILIES})-\d)", "claude-"),
        (rf"^claude-([{_FAMILY_FIRST_SINCE}-9](?:-\d\d?)?)-({_FAMILIES})\b", r"claude-\2-\1"),
    )
)


def canonical_name(name: str) -> str:
    """Return the form of a model's name in which names are compared."""
    text = name.strip().lower()
    for pattern, replacement in _CANONICAL_FORMS:
        text = pattern.sub(replacement, text)
    return text


def lineage_of(model_id: str) -> tuple[str, tuple[int, ...]]:
    """Return the family and the version in an id, such as ("opus", (4, 8)); either may be
    empty."""
    words = _DATE.sub("", model_id).split("-")[1:]
    version = tuple(int(word) for word in words if re.fullmatch(r"\d{1,2}", word))
    family = next((word for word in words if word.isalpha()), "")
    return family, version


class Spelling(NamedTuple):
    """A name of a model as a client wrote it, taken apart."""

    name: str
    #: The effort in it; empty = none.
    effort: str
    wants_long_context: bool


def _spelling(text: str) -> Spelling:
    """Take the effort and the suffix of the long window, in either order, off a name."""
    text, is_long = _LONG_CONTEXT.subn("", text)
    effort = _NAMED_EFFORT.search(text)
    if effort is not None:
        text = text[:effort.start()] + text[effort.end():]
        text, was_before = _LONG_CONTEXT.subn("", text)
        is_long += was_before
    return Spelling(text, effort[1] if effort else "", bool(is_long))


def title_of(model_id: str) -> str:
    """Return a name to show for an id that is not in models.json: "Claude Opus 6.1"."""
    family, version = lineage_of(model_id)
    words = ("Claude", family.title(), ".".join(map(str, version)))
    return " ".join(words) if family and version else model_id


#: What to do about a name that clients use and no model has.
_ALIAS_ADVICE = (
    "The operator can give a model another name: `ocp settings modelAliases NAME=MODEL,...`."
)
_NO_CLAUDE = ClaudeModels()
_NO_ALIASES: Mapping[str, str] = MappingProxyType({})


class Models:
    """All models, found by name. Immutable."""

    def __init__(
        self, source: Json, claude: ClaudeModels = _NO_CLAUDE,
        operator_aliases: Mapping[str, str] = _NO_ALIASES,
    ) -> None:
        """Read the content of models.json. Raises ValueError, KeyError or TypeError if it is
        invalid. `operator_aliases` are other names of models, with an effort or a suffix."""
        listed = [_model(row, listed=True) for row in source["models"]]
        older = [_model(row, listed=False) for row in source.get("olderModels", ())]
        if not listed:
            raise ValueError("no models")
        self.claude = claude
        self._source = source
        self._operator_aliases = operator_aliases
        self._by_id = {model.id: model for model in (*listed, *older)}
        for offered in reversed(claude.offered):
            self._add_offered(offered)
        #: What the aliases stand for by models.json: an id, or another alias.
        self._targets: dict[str, str] = {**source["legacyAliases"], **source["aliases"]}
        new_names = [each.name for each in claude.offered if each.name not in self._by_id]
        #: Ids by alias.
        self._aliases = {name: self._resolve(name) for name in (*self._targets, *new_names)}
        self._ids = self._canonical_ids()

    def _add_offered(self, offered: OfferedModel) -> None:
        """Complete a model, or add one, by what claude says of it."""
        model = self._by_id.get(offered.id)
        if model is None:
            model = self._unlisted(offered.id)._replace(
                display_name=title_of(offered.id), known=True, listed=True
            )
            # The file lists the newest model first, and this one is newer than the file.
            self._by_id = {offered.id: model, **self._by_id}
        stops, is_fast = offered.cli_thinking_off, offered.fast_mode
        self._by_id[offered.id] = model._replace(
            efforts=offered.efforts or model.efforts,
            cli_thinking_off=model.cli_thinking_off if stops is None else stops,
            fast_mode=model.fast_mode if is_fast is None else is_fast,
        )

    def _resolve(self, alias: str) -> str:
        """Return the id that an alias stands for: what claude says, or else the file. Raises
        ValueError if there is no such model."""
        offered = {each.name: each.id for each in reversed(self.claude.offered)}
        name = alias
        for _ in range(len(self._targets) + 1):
            if name in offered:
                return offered[name]
            if name in self._by_id:
                return self._newest_that_runs(self._by_id[name]).id
            name = self._targets.get(name, name)
        raise ValueError(f"the alias {alias} has no model")

    def _newest_that_runs(self, model: Model) -> Model:
        """Return the model, or the newest of its family if claude is too old for it."""
        if self.can_run(model):
            return model
        family = (m for m in self.all() if m.listed and m.lineage[0] == model.lineage[0])
        return next((each for each in family if self.can_run(each)), model)

    def _canonical_ids(self) -> dict[str, str]:
        """Return the ids by canonical name."""
        ids: dict[str, str] = {}
        for model_id in self._by_id:
            undated = _DATE.sub("", model_id)
            major_only = len(lineage_of(model_id)[1]) == 1
            for name in (model_id, undated, undated + "-0" if major_only else undated):
                ids[canonical_name(name)] = model_id
        for name, model_id in self._aliases.items():
            ids[canonical_name(name)] = model_id
            ids.setdefault(canonical_name("claude-" + name), model_id)
        # The canonical form of "claude-default", which nobody means.
        ids.pop("claude", None)
        return ids

    def with_claude(self, claude: ClaudeModels) -> Models:
        """Return the models as they are with this claude."""
        return Models(self._source, claude, self._operator_aliases)

    def with_aliases(self, text: str) -> Models:
        """Return the models with the operator's aliases; see `parse_aliases`. A target need not
        exist."""
        return Models(self._source, self.claude, parse_aliases(text))

    def check_aliases(self, text: str) -> None:
        """Raise ValueError if an alias is malformed, or stands for a model that does not exist. The
        operator's aliases do not stand for each other."""
        plain = self.with_aliases("")
        for target in parse_aliases(text).values():
            if plain._named(target) is None:
                raise ValueError(plain._missing(target))

    def all(self) -> list[Model]:
        """Return every model, newest first, the unlisted ones last."""
        return list(self._by_id.values())

    def can_run(self, model: Model) -> bool:
        """Return whether the claude in use is new enough for a model, or its version unknown."""
        return not self.claude.version or model.first_cli <= self.claude.version

    def check_runs(self, model: Model) -> None:
        """Raise ModelNeedsNewerClaude."""
        if not self.can_run(model):
            first, present = (
                ".".join(map(str, each)) for each in (model.first_cli, self.claude.version)
            )
            raise ModelNeedsNewerClaude(
                f"{model.id} needs claude {first} or newer, and the server has {present}: run "
                "`claude update` there.", param="model",
            )

    def offered(self) -> list[Model]:
        """Return the models that clients get in lists, newest first: those that the claude in use
        knows, of the families that it offers its account. It offers the newest of each family."""
        families = {lineage_of(each.id)[0] for each in self.claude.offered}
        return [
            model for model in self.all() if model.listed and self.can_run(model)
            and (not families or model.lineage[0] in families)
        ]

    def names(self) -> list[str]:
        """Return the ids and aliases that clients get in lists of models."""
        aliases = filter(self._is_usable, (*self._aliases, *self._operator_aliases))
        return list(dict.fromkeys([*(model.id for model in self.offered()), *aliases]))

    def _is_usable(self, alias: str) -> bool:
        """Return whether the claude in use can run the model of an alias."""
        model = self._named(alias)
        return model is not None and self.can_run(model)

    def is_alias(self, name: str) -> bool:
        """Return whether this is an alias, whose model can change with claude or the operator."""
        return name in self._aliases or name in self._operator_aliases

    def aliases_of(self, model: Model) -> list[str]:
        """Return the aliases of a model, the operator's last."""
        aliases = [name for name, model_id in self._aliases.items() if model_id == model.id]
        return aliases + [
            name for name in self._operator_aliases if self.resolve([name]) == {model.id}
        ]

    def find(self, name: str, *, long_context: bool = False) -> Model:
        """Return the model of this name or alias in any spelling. Raises UnknownModel.

        An unknown name that starts with "claude-" gets the properties of the nearest model of its
        family. A level of effort at the end becomes `named_effort`. The suffix [1m] or -1m, or
        `long_context`, selects the long window; a model that is known to have none keeps its own
        window.
        """
        spelling = self._read(name)
        model = self._lookup(spelling.name)
        if model is None:
            raise UnknownModel(f"{self._missing(name)} {_ALIAS_ADVICE}", param="model")
        if spelling.effort:
            model = model._replace(named_effort=spelling.effort)
        for refusal in self.claude.refusals:
            model = refusal.applied_to(model)
        # A model that is not in models.json may have a long window.
        has_long = model.long_context or not model.known
        wants_long = spelling.wants_long_context
        if not (has_long and (wants_long or (long_context and model.long_context))):
            return model
        return model._replace(
            context_window=LONG_CONTEXT_TOKENS, argument=model.argument + LONG_CONTEXT_SUFFIX
        )

    def resolve(self, names: Iterable[str]) -> set[str]:
        """Return the ids of the models with these names; a name without a model stays as it is."""
        pairs = ((name, self._named(name)) for name in names)
        return {name if model is None else model.id for name, model in pairs}

    def _missing(self, name: str) -> str:
        """Return what to say of a name without a model."""
        return (
            f"There is no model {one_line(name, 80)!r}. Use one of: {', '.join(self.names())}."
        )

    def _named(self, name: str) -> Model | None:
        """Return the model of this name without the effort and the window that the name asks
        for."""
        return self._lookup(self._read(name).name)

    def _read(self, name: str) -> Spelling:
        """Take a name apart. An alias of the operator is replaced by its target; an effort that
        the client adds wins over the target's."""
        text = name.strip().lower()
        target = self._target_of(text)
        if target:
            return self._take_apart(target)
        spelling = self._take_apart(text)
        target = self._target_of(spelling.name)
        if not target:
            return spelling
        meant = self._take_apart(target)
        is_long = spelling.wants_long_context or meant.wants_long_context
        return Spelling(meant.name, spelling.effort or meant.effort, is_long)

    def _target_of(self, name: str) -> str | None:
        """Return what the operator's alias stands for, also with a provider before it."""
        aliases = self._operator_aliases
        return aliases.get(name) or aliases.get(name.rpartition("/")[2])

    def _take_apart(self, text: str) -> Spelling:
        """Take a name apart. What looks like an effort is a part of the name if a model has it."""
        whole, is_long = _LONG_CONTEXT.subn("", text)
        if whole in self._ids or canonical_name(whole) in self._ids:
            return Spelling(whole, "", bool(is_long))
        return _spelling(text)

    def _lookup(self, name: str) -> Model | None:
        """Return the model of a name."""
        if name not in self._ids:
            name = canonical_name(name)
        model_id = self._ids.get(name)
        if model_id is not None:
            return self._by_id[model_id]
        dated = self._by_id.get(self._ids.get(_DATE.sub("", name), ""))
        if dated is not None:
            # A model whose id has no date has no dated versions.
            is_other_version = _DATE.search(dated.id) is not None
            return dated._replace(argument=name, known=False) if is_other_version else dated
        return self._unlisted(name) if _CLAUDE_ID.fullmatch(name) else None

    def _unlisted(self, name: str) -> Model:
        """Return a model that the file does not know, with the properties of the nearest one."""
        return self._nearest(*lineage_of(name))._replace(
            id=name, argument=name, display_name=name, known=False, listed=False, first_cli=(),
            prices=None, long_prompt_tokens=0, long_prompt_prices=None, fast_mode=False,
        )

    def _nearest(self, family: str, version: tuple[int, ...]) -> Model:
        """Return the model that a model of this family and version resembles most.

        That is the newest one of its family that is not newer than `version`, or else the oldest
        one of its family. A model of the current generation whose family has no other of that
        generation, and one of an unknown family, resemble the newest of all models; one of an
        unknown family and an old version resembles the oldest.
        """
        by_version = sorted(
            (model for model in self.all() if model.lineage[1]), key=lambda model: model.lineage[1]
        )
        newest = self.all()[0]
        generation = newest.lineage[1][:1]
        relatives = [model for model in by_version if model.lineage[0] == family]
        if not version or (not relatives and version >= (_FAMILY_FIRST_SINCE,)):
            return newest
        if relatives:
            latest = relatives[-1].lineage[1]
            if latest < version and latest < generation <= version:
                return newest
        older = [model for model in relatives if model.lineage[1] <= version]
        return (older[-1:] or relatives[:1] or by_version[:1] or [newest])[0]


def load_models(folder: str) -> Models:
    """Return the models of `folder`/models.json, or the built-in ones if there is no such file.

    Raises ConfigError if the file is invalid.
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


class ModelCatalog:
    """The models as they are known at the moment: models.json, completed by what the claude in use
    reports and by the operator's aliases."""

    def __init__(self, models: Models) -> None:
        # Guards writers only: a reader takes the reference `models`, which is replaced as a whole.
        self._lock = threading.Lock()
        self.models = models

    def set_aliases(self, text: str) -> None:
        """Replace the operator's aliases; see `parse_aliases`."""
        with self._lock:
            self.models = self.models.with_aliases(text)

    def set_version(self, version: tuple[int, ...]) -> None:
        """Forget what another claude reported, and choose by this version until one reports."""
        with self._lock:
            if version != self.models.claude.version:
                self.models = self.models.with_claude(ClaudeModels(version))

    def add_report(
        self, version: tuple[int, ...], argument: str, offered: tuple[OfferedModel, ...]
    ) -> None:
        """Record what a process of this version, started for the model `argument`, offers.

        claude lists the model that it was started for by its id, whether or not the account has it,
        and then leaves out the alias: what an earlier process said of that model stays. Where there
        was none, a model of models.json counts as offered until another process tells.
        """
        own = argument.replace(LONG_CONTEXT_SUFFIX, "")
        with self._lock:
            known = self.models.claude
            if known.version not in ((), version):
                return
            is_unsure = not known.offered and own in (model.id for model in self.models.all())
            rows = [each for each in offered if is_unsure or each.name != own]
            names = {each.name for each in rows}
            rows += [each for each in known.offered
                     if own in (each.name, each.id) and each.name not in names]
            found = known._replace(version=version, offered=tuple(rows))
            if found != known:
                self.models = self.models.with_claude(found)

    def add_refusal(self, refusal: ModelRefusal) -> None:
        """Record what the API refused, until another claude is in use."""
        with self._lock:
            known = self.models.claude
            refusals = known.refusals | {refusal}
            self.models = self.models.with_claude(known._replace(refusals=refusals))


# ==== 6. Turns and events ====================================================
# The internal form of requests and answers, independent of wire formats. A Turn is one request to
# a model; an answer is a stream of Events that mean the same as the events of the Messages API.
# Content blocks are dictionaries in the format of that API, which claude reads and writes. No
# input or output here.

#: One content block: {"type": "text", "text": ...}, {"type": "image", "source": ...}, ...
Block = dict[str, Any]


#: The types of blocks that hold other data than text.
_ATTACHMENT_BLOCKS = ("image", "document")


def attachments_of(blocks: Iterable[Block]) -> Iterator[Block]:
    """Yield the images and documents in order, including those in tool results."""
    for block in blocks:
        if block["type"] == "tool_result":
            yield from attachments_of(block["content"])
        elif block["type"] in _ATTACHMENT_BLOCKS:
            yield block


def plain_id(call_id: str) -> str:
    """Return the letters and digits of a tool call's id.

    Ids are sent to clients and compared in this form, because some clients drop the rest.
    """
    return re.sub(r"[^A-Za-z0-9]", "", call_id)


def _plain_number(text: str) -> float:
    """Return a number with a decimal point as JavaScript reads it: 1.0 is the integer 1."""
    return int(text[:-2]) if text.endswith(".0") else float(text)


_SORTING_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def canonical_json(value: object) -> str:
    """Return the same ASCII text for equal JSON values, whatever the order of their keys."""
    text = _SORTING_ENCODER.encode(value)
    if ".0" in text:
        text = _SORTING_ENCODER.encode(json.loads(text, parse_float=_plain_number))
    return text


def json_chars(value: object, text: str = "") -> int:
    """Return the length of the value's compact JSON in characters. `text` is its canonical JSON, if
    that is at hand."""
    text = text or canonical_json(value)
    # ASCII takes half the time to write; the length is the same unless characters are escaped.
    return len(text) if "\\u" not in text else len(_ENCODER.encode(value))


def _with_whole_characters(text: str) -> str:
    """Return a text in which the two halves of a character, which a client can send as two pieces,
    are the character."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def joined_parts(parts: list[str]) -> bytes:
    """Return different bytes for different lists of texts: their lengths, then the texts."""
    try:
        return "".join([str(list(map(len, parts))), *parts]).encode("utf-8")
    except UnicodeEncodeError:
        parts = list(map(_with_whole_characters, parts))
        text = "".join([str(list(map(len, parts))), *parts])
        return text.encode("utf-8", "surrogatepass")


def digest(parts: list[str]) -> str:
    """Return the same digest for the same texts."""
    return hashlib.sha256(joined_parts(parts)).hexdigest()


def is_thinking(block: Block) -> bool:
    """Return whether a block is the model's thinking, readable or not."""
    return block["type"] in ("thinking", "redacted_thinking")


def thinking_sent_back(sent: Mapping[str, Any]) -> list[Block]:
    """Return the block of thinking that a client sends back, in the API's form; nothing if it has
    neither a signature nor sealed data."""
    kind, text = sent.get("type"), sent.get("thinking") or ""
    seal = sent.get("data" if kind == "redacted_thinking" else "signature")
    if not isinstance(text, str) or not isinstance(seal, str) or not seal:
        return []
    if kind == "redacted_thinking":
        return [{"type": kind, "data": seal}]
    return [{"type": kind, "thinking": text, "signature": seal}] if kind == "thinking" else []


#: The name of the API's own search tool.
WEB_SEARCH = "web_search"
#: The types of calls of tools that the API runs: its own, and the item of a client's history that
#: stands for a search and its result.
_SERVER_CALLS = ("server_tool_use", "web_search_call")
#: Fields in the results of the API's own tools that mean nothing to a model.
_API_ONLY_FIELDS = ("encrypted_content", "encrypted_index", "encrypted_stdout", "cache_control")


def is_server_block(block: Block) -> bool:
    """Return whether a block is a call or a result of a tool that the API runs itself."""
    kind = str(block["type"])
    return kind in _SERVER_CALLS or kind.endswith("_tool_result")


def without_api_fields(value: object) -> object:
    """Return content of a server tool's result without what only the API can read."""
    if isinstance(value, dict):
        return {k: without_api_fields(v) for k, v in value.items() if k not in _API_ONLY_FIELDS}
    return [without_api_fields(entry) for entry in value] if isinstance(value, list) else value


def server_block_text(block: Block) -> str:
    """Return what a model is told of a server block in a history: its result as text, and nothing
    of a call without one. claude accepts no such blocks in a history."""
    kind = block["type"]
    if kind == "server_tool_use":
        return ""
    if kind == "web_search_call":
        action = {"action": block["action"]} if block.get("action") is not None else {}
        return f"[{kind}]\n{to_json(action).decode('utf-8')}"
    content = without_api_fields(block.get("content"))
    entries = content if isinstance(content, list) else [None]
    texts = [entry.get("text") if isinstance(entry, dict) else None for entry in entries]
    if isinstance(content, str):
        text = content
    elif all(isinstance(each, str) for each in texts):
        text = "\n".join(map(str, texts))
    else:
        text = to_json(content).decode("utf-8")
    return f"[{kind}]\n{text}"


def blocks_to_store(blocks: Iterable[Block]) -> list[Block]:
    """Return what is stored of an answer: all but thinking, sources, and what only the API can
    read."""
    stored: list[Block] = []
    for block in blocks:
        if is_server_block(block):
            stored.append({name: without_api_fields(value) for name, value in block.items()})
        elif block["type"] in ("text", "tool_use"):
            stored.append({name: each for name, each in block.items() if name != "citations"})
    return stored


class ContextBlock(dict[str, Any]):
    """A text block that is only in the message while that message is the last one."""


def _is_context(block: Block) -> bool:
    return isinstance(block, ContextBlock)


#: The types of blocks that are not compared, or not one by one.
_NOT_COMPARED = ("text", "thinking", "redacted_thinking")


def _compared_parts(head: str, blocks: Iterable[Block]) -> list[str]:
    """Return what blocks are compared by, behind a head: their joined text, then the other blocks
    without thinking and server blocks: clients leave those out, or change them."""
    texts: list[str] = []
    parts: list[str] = []
    for block in blocks:
        if block["type"] == "text":
            texts.append(block["text"])
        elif block["type"] not in _NOT_COMPARED and not is_server_block(block):
            parts += _parts_of_block(block)
    return [f"{head} {len(parts)}", "".join(texts).strip(), *parts]


def _parts_of_block(block: Block) -> list[str]:
    """Return what a block is compared by, without what clients change or leave out."""
    kind = block["type"]
    if kind == "tool_use":
        # Clients and some kinds of calls leave out arguments that are null.
        arguments = {name: value for name, value in block["input"].items() if value is not None}
        return [kind, plain_id(block["id"]), block["name"], canonical_json(arguments)]
    if kind == "tool_result":
        head = str(bool(block.get("is_error")))
        return [kind, block["tool_use_id"], *_compared_parts(head, block["content"])]
    source = dict(block.get("source") or {})
    data = str(source.pop("data", ""))
    return [kind, data, canonical_json(source)]


class _MessageFields(NamedTuple):
    role: str
    content: list[Block]


class Message(_MessageFields):
    """One message of a conversation.

    `role` is "user" or "assistant"; in parsed requests and stored responses also "system", but
    never in a Turn. What is computed from the content is computed once: a message that was
    measured must not be changed.
    """

    @property
    def has_results(self) -> bool:
        """Whether it contains results of tool calls."""
        return any(block["type"] == "tool_result" for block in self.content)

    @functools.cached_property
    def chars(self) -> int:
        """The size in characters; arguments count as JSON, images and documents as 0. So does
        thinking: clients send it back, and claude gets it only if it is known."""
        chars, rest = 0, list(self.content)
        while rest:
            block = rest.pop()
            if block["type"] == "text":
                chars += len(block["text"])
            elif block["type"] == "tool_result":
                rest += block["content"]
            elif block["type"] == "tool_use":
                chars += len(block["name"]) + json_chars(block["input"])
            elif is_server_block(block):
                chars += len(server_block_text(block))
            elif block["type"] not in _ATTACHMENT_BLOCKS and not is_thinking(block):
                chars += json_chars(block)
        return chars

    @property
    def digest(self) -> str:
        """The same text for the same message, however a client writes it."""
        return self._digest_and_bytes[0]

    @property
    def size_bytes(self) -> int:
        """The size with images and documents, and without thinking."""
        return self._digest_and_bytes[1]

    @functools.cached_property
    def _digest_and_bytes(self) -> tuple[str, int]:
        content = self.content
        if self.role == "user":
            # Without the context that moves to the last message.
            content = [block for block in content if not _is_context(block)]
        # Chat clients send the text and the calls of an answer separately; all other content has an
        # order, in which neighbours of one type count once.
        kinds = itertools.groupby(block["type"] for block in content)
        order = "" if self.role == "assistant" else " ".join(kind for kind, _ in kinds)
        data = joined_parts(_compared_parts(f"{self.role} {order}", content))
        return hashlib.sha256(data).hexdigest(), len(data)


def without_thinking(message: Message) -> Message:
    """Return the message without thinking."""
    kept = [block for block in message.content if not is_thinking(block)]
    return message if len(kept) == len(message.content) else Message(message.role, kept)


def is_user_message(message: Message) -> bool:
    """Return whether the user wrote a message: other messages of the user hold results of tools."""
    return message.role == "user" and not message.has_results


def context_of(message: Message) -> str:
    """Return the context in a message that is only there while the message is the last one; empty
    if there is none."""
    return "\n".join(str(block["text"]) for block in message.content if _is_context(block))


class _ToolFields(NamedTuple):
    name: str
    description: str
    #: The JSON schema of its arguments, as it is sent to claude.
    schema: Json
    #: Whether that schema nests the client's arguments in an object of their own.
    wrapped: bool = False
    #: Properties that are renamed in that schema: (name there, the client's name).
    renamed: tuple[tuple[str, str], ...] = ()


class Tool(_ToolFields):
    """A tool that the client runs itself."""

    @functools.cached_property
    def _schema_json(self) -> str:
        return canonical_json(self.schema)

    @property
    def chars(self) -> int:
        """The size in characters."""
        schema_chars = json_chars(self.schema, self._schema_json)
        return len(self.name) + len(self.description) + schema_chars

    @property
    def digest(self) -> str:
        """The same text for equal tools."""
        form = f"{self.wrapped} {self.renamed}"
        return digest([self.name, self.description, self._schema_json, form])


class ToolChoice(NamedTuple):
    """Which tools the model may call. `kind` is "auto", "any" (at least one), "tool" (the one
    called `name`) or "none"."""

    kind: str = "auto"
    name: str = ""
    #: Whether the model may call several tools at once.
    parallel: bool = True

    @property
    def forces(self) -> bool:
        """Whether the model must call a tool."""
        return self.kind in ("any", "tool")


class OutputSchema(NamedTuple):
    """The JSON schema that an answer must match.

    claude requires an object at the root; any other root is `wrapped` as {"value": ...}.
    """

    schema: Json
    wrapped: bool
    #: Properties that are renamed in the schema: (name there, the client's name).
    renamed: tuple[tuple[str, str], ...] = ()
    #: A stricter schema that the answer must match too.
    exact: Json | None = None


#: The maximum number of stop sequences that are sent to the API.
_MAX_STOPS = 16


class Options(NamedTuple):
    """The generation options of a request, reduced to those that the model accepts.

    None and empty mean claude's default. If `max_tokens` is 0, the prompt is processed and the
    answer is empty.
    """

    max_tokens: int | None = None
    stop_sequences: tuple[str, ...] = ()
    #: Those of temperature, top_p and top_k that were set: (name, value), sorted.
    sampling: tuple[tuple[str, float], ...] = ()
    effort: str | None = None
    #: None = the model's default, 0 = no thinking, else a budget in tokens.
    thinking_tokens: int | None = None
    #: The API's `thinking.type` for no thinking, where claude does not send it by itself.
    thinking_type: str = ""
    #: Whether the text of the thinking is left out of the answer.
    hides_thinking: bool = False
    fast_mode: bool = False

    @property
    def api_stops(self) -> tuple[str, ...]:
        """The stop sequences that are sent to the API, which accepts neither white space alone
        nor more than _MAX_STOPS."""
        return tuple(text for text in self.stop_sequences if text.strip())[:_MAX_STOPS]

    @property
    def local_stops(self) -> tuple[str, ...]:
        """The other stop sequences, at which AnswerFilter ends the answer."""
        sent = self.api_stops
        return tuple(text for text in self.stop_sequences if text not in sent)


class Turn(NamedTuple):
    """One request to a model. The last message is the user's, except in requests that only count
    tokens. Thinking in it is what the client sent: ThinkingMemory says what claude gets."""

    model: Model
    messages: list[Message]
    options: Options
    system: str = ""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    #: The tools that the API runs itself, in its form.
    server_tools: tuple[Json, ...] = ()
    #: One of CACHE_LIFETIMES; empty = as claude decides. A conversation keeps its process when this
    #: changes.
    cache_lifetime: str = ""
    #: None = an answer in plain text.
    output_schema: OutputSchema | None = None
    #: The number of answers, and the messages for answers 1, 2, ... if their prompts differ.
    choices: int = 1
    other_prompts: tuple[list[Message], ...] = ()
    #: The client's name for a conversation that the server stores; empty = none.
    session_id: str = ""
    stream: bool = False
    #: Whether a cached answer must not be used.
    bypass_cache: bool = False
    #: Paths of the fields of the request that are ignored.
    ignored: tuple[str, ...] = ()
    #: Repairs of the request: (name, count).
    adjusted: tuple[tuple[str, int], ...] = ()
    #: What the dialect has to know of the request to write the answer; private to the dialect.
    reply_format: Any = None

    @property
    def _leaves_tools_out(self) -> bool:
        return self.output_schema is not None and self.tool_choice.kind == "none"

    @property
    def tools_for_model(self) -> tuple[tuple[Tool, ...], ToolChoice]:
        """The tools sent to the model, and the choice among them.

        The model returns structured output by a tool call, which the choice "none" would forbid:
        the tools are left out instead.
        """
        if self._leaves_tools_out:
            return (), ToolChoice()
        if self.must_be_told_to_call:
            return self.tools, ToolChoice(parallel=self.tool_choice.parallel)
        return self.tools, self.tool_choice

    @property
    def must_be_told_to_call(self) -> bool:
        """Whether a tool call is forced and the API does not accept that for the model."""
        return self.tool_choice.forces and not self.model.forced_tools

    @property
    def server_tools_for_model(self) -> tuple[Json, ...]:
        """The tools that the API runs itself; see `tools_for_model`."""
        return () if self._leaves_tools_out else self.server_tools

    def choice(self, index: int) -> Turn:
        """Return the turn for answer number `index`, counted from 0."""
        if index and self.other_prompts:
            return self._replace(messages=self.other_prompts[index - 1])
        return self


class Usage(NamedTuple):
    """The tokens of one answer, as counted by the API."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    #: None = not known.
    reasoning_tokens: int | None = None
    #: What else the API says, unchanged: counts by lifetime in the cache and by server tool, the
    #: service tier, the speed.
    more: Mapping[str, Any] = MappingProxyType({})
    web_search_requests: int = 0

    @property
    def prompt_tokens(self) -> int:
        """All tokens of the prompt, cached or not."""
        return self.input_tokens + self.cache_read_tokens + self.cache_write_tokens


NO_USAGE = Usage()


class Started(NamedTuple):
    """The model began a message. A second one in a stream replaces the first, which had no
    content."""

    message_id: str
    model: str
    usage: Usage


class BlockStarted(NamedTuple):
    """A content block began; `block` is its empty form."""

    block_index: int
    block: Block


class Delta(NamedTuple):
    """A piece of a block. `kind` is "text", "thinking", "signature", "arguments", "server_input"
    (the arguments of a tool that the API runs), or "refusal" if the answer does not match its
    OutputSchema."""

    block_index: int
    kind: str
    text: str


class Citation(NamedTuple):
    """A source of a text block, in the API's form."""

    block_index: int
    citation: Json


class BlockStopped(NamedTuple):
    """A content block is complete."""

    block_index: int


class Restarted(NamedTuple):
    """claude discarded the message and sends its API request again: all earlier deltas are
    void."""


class Finished(NamedTuple):
    """The answer is complete. The last event of every answer."""

    #: As in the Messages API: end_turn, max_tokens, stop_sequence, tool_use, refusal, ...
    stop_reason: str
    stop_sequence: str | None
    usage: Usage
    #: The API's description of a refusal.
    stop_details: Json | None = None


class Tick(NamedTuple):
    """No other event occurred for one heartbeat interval."""


class Pause(NamedTuple):
    """The next event is not there yet: what came so far is to be sent."""


Event = Union[
    Started, BlockStarted, Delta, Citation, BlockStopped, Restarted, Finished, Tick, Pause
]
#: The index of an answer to a turn, counted from 0, and one of its events.
Choice = tuple[int, Event]


class Answer(NamedTuple):
    """A complete answer."""

    message_id: str
    model: str
    #: Text, thinking, tool_use and server blocks in the model's order.
    blocks: list[Block]
    #: The text of the model if it did not return an answer that matches its OutputSchema.
    refusal: str
    stop_reason: str
    stop_sequence: str | None
    usage: Usage
    stop_details: Json | None = None

    def joined(self, kind: str) -> str:
        """Return the "text" or the "thinking" of all blocks as one string."""
        return "".join(str(b.get(kind, "")) for b in self.blocks if b["type"] == kind)

    @property
    def calls(self) -> list[Block]:
        """The tool_use blocks."""
        return [block for block in self.blocks if block["type"] == "tool_use"]


#: The field of a block to which deltas of each kind are appended.
_BLOCK_FIELDS = {"text": "text", "thinking": "thinking", "signature": "signature"}


def parse_arguments(value: object) -> Json:
    """Return the arguments of a tool call, given as an object or as its JSON text.

    Models sometimes produce invalid arguments, and clients send them back: anything else becomes
    {"arguments": text}, so that the conversation can continue.
    """
    parsed = value
    with contextlib.suppress(ValueError):
        parsed = from_json(value) if isinstance(value, str) else value
    if isinstance(parsed, dict):
        return parsed
    # PHP writes an empty object as an empty array.
    if value in (None, "", []):
        return {}
    return {"arguments": value if isinstance(value, str) else to_json(value).decode("utf-8")}


class AnswerBuilder:
    """Builds an answer from its events."""

    def __init__(self) -> None:
        self._started = Started("", "", NO_USAGE)
        self._blocks: dict[int, Block] = {}
        self._pieces: dict[tuple[int, str], list[str]] = {}
        self._citations: dict[int, list[Json]] = {}

    def add(self, event: Event) -> None:
        """Add the next event."""
        if isinstance(event, Delta):
            self._pieces.setdefault((event.block_index, event.kind), []).append(event.text)
        elif isinstance(event, Citation):
            self._citations.setdefault(event.block_index, []).append(event.citation)
        elif isinstance(event, BlockStarted):
            self._blocks[event.block_index] = dict(event.block)
        elif isinstance(event, Started):
            self._started = event
        elif isinstance(event, Restarted):
            self._blocks.clear()
            self._pieces.clear()
            self._citations.clear()

    def answer(self, finished: Finished) -> Answer:
        """Return the answer, without a tool call that was cut off: it must not run."""
        is_complete = finished.stop_reason == "tool_use"
        blocks = [
            self._block(index, block, is_complete) for index, block in sorted(self._blocks.items())
        ]
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

    def _block(self, index: int, block: Block, is_complete: bool) -> Block | None:
        if block.get("type") == "tool_use":
            arguments = "".join(self._pieces.get((index, "arguments"), ()))
            if is_complete:
                return {**block, "input": parse_arguments(arguments)}
            with contextlib.suppress(ValueError):
                return {**block, "input": from_json(arguments)}
            return None
        filled = dict(block)
        if block.get("type") == "server_tool_use":
            pieces = self._pieces.get((index, "server_input"), ())
            filled["input"] = parse_arguments("".join(pieces))
        if index in self._citations:
            filled["citations"] = self._citations[index]
        for kind, field in _BLOCK_FIELDS.items():
            if (index, kind) in self._pieces:
                filled[field] = "".join(self._pieces[index, kind])
        return filled


# AnswerFilter holds back two things. A BlockStarted waits for the next event: if the process dies
# in between, the answer can be generated again without the client having seen the block. The end
# of a text waits while it may be the beginning of a stop sequence, at most to the end of its block.


class AnswerFilter:
    """Applies the options of a request that the API does not support.

    Ends the answer at local stop sequences, or before its first block for `max_tokens` 0, and
    removes the text of hidden thinking.
    """

    def __init__(self, options: Options, output_schema: OutputSchema | None) -> None:
        # The text of a JSON answer is not searched for stop sequences.
        self._stops = options.local_stops if output_schema is None else ()
        self._is_empty = options.max_tokens == 0
        self._hides_thinking = options.hides_thinking
        #: The BlockStarted that is held back, if any.
        self._pending_start: list[Event] = []
        #: The text that is held back.
        self._pending_text = ""
        #: Whether the answer was ended here, although claude continues it.
        self.ended = False

    def events(self, event: Event) -> list[Event]:
        """Return the events for the client: this one and those that were held back before it."""
        if isinstance(event, (Tick, Pause)):
            return [event]
        if self._is_empty and isinstance(event, BlockStarted):
            return self._end("max_tokens", None)
        start, self._pending_start = self._pending_start, []
        if isinstance(event, BlockStarted):
            self._pending_start = [event]
            return start
        if isinstance(event, Restarted):
            self._pending_text = ""
            return [event]
        return [*start, *self._filter(event)]

    def _filter(self, event: Event) -> list[Event]:
        if isinstance(event, Delta) and event.kind == "thinking" and self._hides_thinking:
            return [event._replace(text="")]
        if isinstance(event, Delta) and event.kind == "text" and self._stops:
            return self._filter_text(event)
        if isinstance(event, BlockStopped) and self._pending_text:
            text, self._pending_text = self._pending_text, ""
            return [Delta(event.block_index, "text", text), event]
        return [event]

    def _filter_text(self, event: Delta) -> list[Event]:
        text = self._pending_text + event.text
        matches = [(text.find(stop) + len(stop), stop) for stop in self._stops if stop in text]
        if matches:
            # The match that ends first; of two with the same end, the longer one.
            end, stop = min(matches, key=lambda match: (match[0], -len(match[1])))
            return [
                *self._delta(event, text[: end - len(stop)]),
                BlockStopped(event.block_index),
                *self._end("stop_sequence", stop),
            ]
        longest = min(len(text), max(map(len, self._stops)) - 1)
        sizes = (size for size in range(longest, 0, -1) if self._may_stop(text[-size:]))
        cut = len(text) - next(sizes, 0)
        self._pending_text = text[cut:]
        return self._delta(event, text[:cut])

    def _delta(self, event: Delta, text: str) -> list[Event]:
        return [event._replace(text=text)] if text else []

    def _may_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)

    def _end(self, reason: str, stop: str | None) -> list[Event]:
        self.ended = True
        return [Finished(reason, stop, NO_USAGE)]


#: The size of the pieces in which a stored answer is sent.
_REPLAY_CHARS = 80


def replay_events(answer: Answer, *, is_streamed: bool = True) -> Iterator[Event]:
    """Yield the events of a stored answer, which must have no calls of any tool and no refusal. Its
    texts come in pieces if it is streamed."""
    yield Started(answer.message_id, answer.model, answer.usage._replace(output_tokens=0))
    for index, block in enumerate(answer.blocks):
        kinds = [kind for kind, field in _BLOCK_FIELDS.items() if field in block]
        yield BlockStarted(index, {**block, **{_BLOCK_FIELDS[kind]: "" for kind in kinds}})
        for kind in kinds:
            text = str(block[_BLOCK_FIELDS[kind]])
            # Clients store a signature and do not display it.
            is_whole = kind == "signature" or not is_streamed
            step = len(text) or 1 if is_whole else _REPLAY_CHARS
            for start in range(0, len(text), step):
                yield Delta(index, kind, text[start: start + step])
        yield BlockStopped(index)
    yield Finished(
        answer.stop_reason, answer.stop_sequence, answer.usage, answer.stop_details
    )


def _fixed_chars(turn: Turn) -> int:
    """Return the size of system prompt, tools and output schema in characters."""
    schema_chars = json_chars(turn.output_schema.schema) if turn.output_schema is not None else 0
    return len(turn.system) + schema_chars + sum(tool.chars for tool in turn.tools)


def prompt_chars(turn: Turn) -> int:
    """Return the size of the whole prompt in characters."""
    return _fixed_chars(turn) + sum(message.chars for message in turn.messages)


#: How many characters count as a token when tokens are estimated.
ESTIMATE_CHARS_PER_TOKEN = 3.5
#: No text has as many characters for each token: English has 4 to 5, wide tables and rulers some
#: more. A longer prompt is refused here, which saves claude and the API megabytes of work.
_MOST_CHARS_PER_TOKEN = 32


def _first_kept(messages: list[Message], sizes: list[int], max_chars: int) -> int:
    """Return the index of the first message that is kept.

    Whenever the messages exceed `max_chars`, the oldest are dropped until at most four fifths of
    it remain, or else until the rest fits. The decision never depends on later messages, so a
    growing conversation keeps its first message for many turns.
    """
    # The messages at which a conversation can start, and the size of all messages before each.
    starts: list[int] = []
    chars_before: list[int] = []
    first = total = dropped = 0
    for index, (message, size) in enumerate(zip(messages, sizes)):
        if is_user_message(message):
            starts.append(index)
            chars_before.append(total)
        total += size
        if total - dropped <= max_chars or not starts:
            continue
        start = bisect.bisect_left(chars_before, total - max_chars * 4 // 5)
        if start == len(starts):
            start = min(bisect.bisect_left(chars_before, total - max_chars), len(starts) - 1)
        first, dropped = starts[start], chars_before[start]
    return first


def _too_long(chars: int, max_tokens: int) -> ContextTooLong:
    """Return the error in the API's words: agents know by them that they have to shorten their
    history. The number of tokens is an estimate."""
    tokens = math.ceil(chars / ESTIMATE_CHARS_PER_TOKEN)
    return ContextTooLong(
        f"prompt is too long: {tokens} tokens > {max_tokens} maximum", param="messages"
    )


def check_window(turn: Turn) -> None:
    """Raise ContextTooLong if the prompt is certainly too long for the model. Every other prompt
    goes to the API, which alone knows how many tokens it has."""
    chars = max(prompt_chars(turn.choice(index)) for index in range(turn.choices))
    window = turn.model.context_window
    if chars > window * _MOST_CHARS_PER_TOKEN:
        raise _too_long(chars, window)


def truncate_to_budget(turn: Turn, max_chars: int) -> tuple[Turn, int]:
    """Return the turn without its oldest messages if it is longer than `max_chars`, and how many
    were dropped.

    The system prompt and the newest message are kept, and a tool call is kept with its result.
    Raises ContextTooLong if the rest is still too long.
    """
    max_tokens = int(max_chars / ESTIMATE_CHARS_PER_TOKEN)
    newest = max(turn.choice(index).messages[-1].chars for index in range(turn.choices))
    left = max_chars - _fixed_chars(turn) - newest
    if left < 0:
        raise _too_long(max_chars - left, max_tokens)
    sizes = [*(message.chars for message in turn.messages[:-1]), newest]
    first = _first_kept(turn.messages, sizes, left + newest)
    if sum(sizes[first:]) > left + newest:
        raise ContextTooLong(
            f"prompt is too long: its last tool exchange needs more than {max_tokens} tokens",
            param="messages",
        )
    if not first:
        return turn, 0
    return turn._replace(messages=turn.messages[first:]), first


#: The estimate for an image or a document.
_ATTACHMENT_TOKENS = 1_500


def estimate_tokens(turn: Turn) -> int:
    """Return an estimate of the number of tokens in the prompt."""
    attachments = sum(1 for message in turn.messages for _ in attachments_of(message.content))
    chars = prompt_chars(turn)
    return max(1, round(chars / ESTIMATE_CHARS_PER_TOKEN)) + _ATTACHMENT_TOKENS * attachments


# ==== 7. Store ===============================================================
# One SQLite file for all data that must survive a restart. There is one connection and one lock,
# because a transaction takes a fraction of a millisecond; reports use connections of their own.
# A change that is in effect in memory may be written later: if the disk is full or the database is
# locked, the write is queued, and the next transaction carries out the queue first. Without a
# writable folder the database is in memory. Settings changed at run time are stored here too.

#: Append only, never change an entry: entry n, counted from 0, upgrades a database from version n.
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
    "ALTER TABLE keys ADD COLUMN effort TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE keys ADD COLUMN web_search INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE usage ADD COLUMN web_search_requests INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE usage ADD COLUMN message TEXT",
    "ALTER TABLE usage ADD COLUMN peer TEXT",
    "ALTER TABLE usage ADD COLUMN user_agent TEXT",
    "CREATE INDEX usage_failed ON usage (at_s) WHERE outcome NOT IN ('ok', 'abandoned')",
    """
    CREATE TABLE replaced_secrets (
        hash TEXT PRIMARY KEY,
        key_id INTEGER NOT NULL,
        replaced_s INTEGER NOT NULL
    )
    """,
    "ALTER TABLE replaced_secrets ADD COLUMN valid_until_s INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE replaced_secrets ADD COLUMN preview TEXT NOT NULL DEFAULT ''",
    "CREATE TABLE plan (id INTEGER PRIMARY KEY CHECK (id = 1), state TEXT NOT NULL)",
    """
    CREATE TABLE thinking (
        id INTEGER PRIMARY KEY,
        digest BLOB NOT NULL UNIQUE,
        at_s INTEGER NOT NULL
    )
    """,
)


def storage_failure(problem: sqlite3.Error, more: str) -> StorageFailed:
    """Return the error to send for a failure of SQLite; `more` explains the consequences."""
    text = str(problem)
    if "disk is full" in text or "disk I/O error" in text:
        return StorageFull(f"disk full: the database cannot be written ({text}). {more}")
    if "locked" in text:
        return StorageLocked(f"database locked: another program has locked ocp.db. {more}")
    return StorageFailed(f"The database cannot be used: {redact_paths(text)}. {more}")


class HomeInUse(Exception):
    """Another server uses this home folder."""


#: Written into the lock file by a server that is shutting down.
_STOPPING = "stopping"


class HomeLock:
    """Keeps other servers out of a home folder, for the life of this process.

    The lock file contains the process id of its owner, and _STOPPING while the owner shuts down.
    """

    def __init__(self, home: str, patience_s: float) -> None:
        """Lock `home`; if its owner is shutting down, wait up to `patience_s` for its end. Raises
        HomeInUse, OSError."""
        self._file = os.open(os.path.join(home, "server.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        deadline_s = time.monotonic() + patience_s
        while not self._try_lock():
            owner = os.pread(self._file, 40, 0).decode("ascii", "replace").split() or ["?"]
            if owner[-1] != _STOPPING or time.monotonic() >= deadline_s:
                self.close()
                raise HomeInUse(
                    f"another OCP server (process {owner[0]}) uses {home}: stop it, or set "
                    "OCP_HOME to another folder for this one"
                )
            time.sleep(0.05)
        self._write(str(os.getpid()))

    def _try_lock(self) -> bool:
        """Return whether the lock was acquired, or the file system does not support locks."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            return problem.errno not in (errno.EACCES, errno.EAGAIN)
        return True

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, text.encode("ascii") + b"\n", 0)

    def mark_stopping(self) -> None:
        """Let a new server wait for the end of this one."""
        self._write(f"{os.getpid()} {_STOPPING}")

    def close(self) -> None:
        os.close(self._file)


#: The maximum number of queued writes of usage rows.
_MAX_QUEUED_WRITES = 10_000
#: How long writes are queued without an attempt after the database was found locked.
_LOCKED_PAUSE_S = 1.0
#: How long a report waits for another one to finish.
_REPORT_PATIENCE_S = 30.0


class Store:
    """The database."""

    def __init__(self, path: str) -> None:
        """Open or create the database file, readable only by its owner. ":memory:" = no file.

        Raises OSError, sqlite3.Error.
        """
        #: None = in memory.
        self._path = None if path == ":memory:" else path
        self._identity: tuple[int, int] | None = None
        if self._path is not None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            status = os.fstat(descriptor)
            os.close(descriptor)
            self._identity = (status.st_dev, status.st_ino)
        # Guards the connection and the queue. Held for a transaction, never for a report and never
        # while waiting for anything else.
        self._lock = threading.RLock()
        self._queue: collections.deque[tuple[str, tuple[object, ...]]] = collections.deque()
        #: Why the last write failed; None = it succeeded.
        self.failure: sqlite3.DatabaseError | None = None
        #: Whether SQLite has reported that the file is damaged.
        self.is_damaged = False
        self._locked_until_s = -math.inf
        # Held for a whole report. One report runs at a time, so that reports leave processor time
        # for requests.
        self._report_lock = threading.Lock()
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        try:
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=1000"):
                self._connection.execute(f"PRAGMA {pragma}")
            self._migrate()
            for table in ("settings", "keys"):
                # The server cannot work without these tables, so detect damage at the start.
                self._connection.execute(f"SELECT * FROM {table}").fetchall()
        except sqlite3.Error:
            self._connection.close()
            raise

    def load(self, path: str) -> None:
        """Replace the content by that of another database file. Raises sqlite3.Error."""
        quoted = urllib.parse.quote(path)
        with self._lock:
            try:
                source = sqlite3.connect(f"file:{quoted}?mode=ro", uri=True)
                source.execute("SELECT COUNT(*) FROM sqlite_master")
            except sqlite3.Error:
                # In a read-only folder SQLite cannot open the write-ahead log.
                source = sqlite3.connect(f"file:{quoted}?immutable=1", uri=True)
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
        """Run a block as one transaction, after all queued writes. Yields the connection. Raises
        sqlite3.Error."""
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                written = self._execute_queue()
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException as problem:
                # After some failures, such as a full disk, SQLite itself has rolled back.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if isinstance(problem, sqlite3.DatabaseError):
                    self._record_failure(problem)
                raise
            for _ in range(written):
                self._queue.popleft()
            self.failure, self._locked_until_s = None, -math.inf

    def _execute_queue(self) -> int:
        """Execute the queued writes in order and return their number; they stay in the queue until
        the transaction is committed."""
        for statement, values in self._queue:
            # A write that can never succeed must not block the others.
            with contextlib.suppress(sqlite3.IntegrityError):
                self._connection.execute(statement, values)
        return len(self._queue)

    def _record_failure(self, problem: sqlite3.DatabaseError) -> None:
        if isinstance(problem, (sqlite3.IntegrityError, sqlite3.ProgrammingError)):
            return
        # Store a copy: the traceback of the original would keep its frames alive.
        self.failure = type(problem)(str(problem))
        self.is_damaged = self.is_damaged or type(problem) is sqlite3.DatabaseError
        if "locked" in str(problem):
            self._locked_until_s = time.monotonic() + _LOCKED_PAUSE_S

    def write_or_queue(self, statement: str, *values: object, must: bool = True) -> None:
        """Write now, or else queue the write and raise sqlite3.Error.

        A write that is not a `must` is dropped if the queue is full. A write that can never
        succeed (IntegrityError, ProgrammingError) is not queued.
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
                if must or len(self._queue) < _MAX_QUEUED_WRITES:
                    self._queue.append((statement, values))
                raise

    def write_later(self, statement: str, *values: object) -> None:
        """Write with the next transaction. The write is dropped while the database cannot be
        written, when the queue is for what must not be lost."""
        with self._lock:
            if self.failure is None:
                self._queue.append((statement, values))

    def write_queued(self) -> None:
        """Execute the queued writes, if any. Raises sqlite3.Error if that is still impossible."""
        with self._lock:
            if self._queue or self.failure is not None:
                with self.transaction():
                    pass

    @property
    def is_in_memory(self) -> bool:
        return self._path is None

    def is_in_place(self) -> bool:
        """Return whether the path still names the opened file. Always true in memory."""
        if self._path is None:
            return True
        try:
            status = os.stat(self._path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._identity

    def rows(self, statement: str, *values: object) -> list[sqlite3.Row]:
        """Return the rows of a query. Raises sqlite3.Error."""
        with self._lock:
            try:
                return self._connection.execute(statement, values).fetchall()
            except sqlite3.DatabaseError as problem:
                self._record_failure(problem)
                raise

    @contextlib.contextmanager
    def read_transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection for one report, whose queries all see the same state.

        Writes are not blocked meanwhile. Raises QueueFull after a long wait for other reports, and
        sqlite3.Error.
        """
        if not self._report_lock.acquire(timeout=_REPORT_PATIENCE_S):
            raise QueueFull("Other reports are running; try again in a moment.", retry_after_s=5)
        try:
            with contextlib.closing(self._read_connection()) as connection:
                connection.row_factory = sqlite3.Row
                connection.execute("BEGIN")
                yield connection
        finally:
            self._report_lock.release()

    def _read_connection(self) -> sqlite3.Connection:
        if self._path is not None:
            quoted = urllib.parse.quote(self._path)
            return sqlite3.connect(f"file:{quoted}?mode=ro", uri=True, isolation_level=None)
        # A database in memory has only one connection, so copy it, which takes little time.
        copy = sqlite3.connect(":memory:", isolation_level=None)
        with self._lock:
            self._connection.backup(copy)
        return copy

    def close(self) -> None:
        with self._lock:
            self._connection.close()


class Settings:
    """The current configuration. A value stored at run time overrides the environment, which
    overrides the default."""

    def __init__(self, store: Store, base: Config, environ: Mapping[str, str]) -> None:
        """`base` is the configuration of `environ`. Stored values are applied on top of it."""
        self._store = store
        self._base = base
        self._environ = environ
        # Guards writers only: a reader takes the reference `config` and keeps it for a whole
        # request.
        self._lock = threading.Lock()
        self._stored: dict[str, int | str | bool] = {}
        #: Stored settings that are invalid and ignored: (name, reason).
        self.problems: list[tuple[str, str]] = []
        self.config = base
        loaded: dict[str, int | str | bool] = {}
        for row in store.rows("SELECT name, value FROM settings"):
            name = row["name"]
            try:
                loaded[name] = self._validate(name, json.loads(row["value"]))
            except KeyError:
                self.problems.append((name, "there is no such setting"))
            except ValueError as problem:
                self.problems.append((name, str(problem)))
        try:
            self._apply(loaded)
        except ValueError:
            # Together they break a rule: apply them one by one, and skip those that break it.
            for name, value in loaded.items():
                try:
                    self._apply({**self._stored, name: value})
                except ValueError as problem:
                    self.problems.append((name, str(problem)))

    def _validate(self, name: str, value: object) -> int | str | bool:
        """Return the value for a setting from a JSON value. Raises KeyError, ValueError."""
        return setting_from_json(live_settings()[name], value)

    def _apply(self, stored: dict[str, int | str | bool]) -> None:
        """Replace the stored values. Raises ValueError if they break a rule."""
        changes = {live_settings()[name].name: value for name, value in stored.items()}
        config = dataclasses.replace(self._base, **changes)  # type: ignore[arg-type]  # checked
        broken = [message for is_broken, message in CONFIG_RULES if is_broken(config)]
        if broken:
            raise ValueError("; ".join(broken))
        self._stored, self.config = stored, config

    def change(self, name: str, value: object) -> object:
        """Store a value, or remove the stored value if `value` is None, and return the value that
        is then in effect.

        Raises KeyError for an unknown name, ValueError with the reason for an invalid value, and
        sqlite3.Error if it cannot be stored; then nothing has changed.
        """
        with self._lock:
            before = self._stored, self.config
            row = live_settings()[name]
            stored = {other: self._stored[other] for other in self._stored if other != name}
            if value is not None:
                stored[name] = self._validate(name, value)
            self._apply(stored)
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
        """Return each setting that can be changed, with its value, range, unit, help and source."""
        kinds = {int: "number", bool: "boolean", str: "string"}
        return {
            name: {
                "value": getattr(self.config, row.name),
                "text": setting_text(row, getattr(self.config, row.name)),
                "type": kinds[type(row.default)],
                "min": row.metadata["minimum"],
                "max": row.metadata["maximum"],
                "unit": row.metadata["unit"],
                "desc": row.metadata["help"],
                "source": self._source(name, row),
                "default": default_of(row, machine_memory_bytes()),
                "env": row.metadata["env"],
            }
            for name, row in live_settings().items()
        }

    def _source(self, name: str, row: dataclasses.Field[Any]) -> str:
        if name in self._stored:
            return "stored"
        if self._environ.get(row.metadata["env"], "").strip():
            return "environment"
        return "follows memory" if row.metadata["from_memory"] else "default"


# ==== 8. Keys and callers ====================================================
# Authentication and access to routes. A route declares its kind of access, and `authorize` checks
# it in one place, so that a new route cannot miss the check. Keys are stored as hashes, so that a
# copy of the database gives no access.


class Access(enum.Enum):
    """What a caller has to show to use a route; in mode none the API asks for nothing."""

    PUBLIC = "public"
    CALLER = "API key"
    ADMIN = "admin key"


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
    """The sender of a request, and what it may do."""

    name: str
    is_admin: bool = False
    #: The id of the key in the database; None for callers without one.
    key_id: int | None = None
    #: Ids and aliases of the allowed models; empty = all.
    models: tuple[str, ...] = ()
    #: How many answers may run at the same time; 0 = no limit of its own.
    max_concurrent: int = 0
    #: Limits by their names in QUOTAS; without an entry there is no limit.
    quota: Mapping[str, int] = MappingProxyType({})
    #: The effort of its requests that ask for none; empty = the server's default.
    effort: str = ""
    #: Whether its requests may let the API search the web.
    web_search: bool = True

    @property
    def scope(self) -> str:
        """The identifier under which data of this caller is stored. Renaming the key does not
        change it."""
        return self.name if self.key_id is None else f"key-{self.key_id}"


class Key(NamedTuple):
    """A key as it is stored, without its secret."""

    id: int
    name: str
    #: The beginning and the end of the secret.
    preview: str
    created_s: int
    #: For this and the next two, None = never.
    expiry_s: int | None
    revoked_s: int | None
    used_s: int | None
    models: tuple[str, ...]
    max_concurrent: int
    note: str
    quota: Mapping[str, int]
    #: The effort of its requests that ask for none; empty = the server's default.
    effort: str = ""
    web_search: bool = False

    @property
    def caller(self) -> Caller:
        """The caller that is authenticated by this key."""
        return Caller(
            self.name, key_id=self.id, models=self.models,
            max_concurrent=self.max_concurrent, quota=self.quota, effort=self.effort,
            web_search=self.web_search,
        )

    def expired(self, now_s: float) -> bool:
        return self.expiry_s is not None and now_s >= self.expiry_s


#: Names of callers that have no key in the database.
_RESERVED_NAMES = ("admin", "anonymous", "local", "public", "remote", "shared")
#: How often the time of a key's last use is updated and written.
_LAST_USE_EVERY_S = 60.0
_MAX_KEY_NAME_CHARS = 64


def key_name(name: str) -> str:
    """Return the name of a key in its usual Unicode form (NFC). Raises BadRequest if it is not
    valid: every character must be visible, and none may separate parts of a path."""
    name = unicodedata.normalize("NFC", name)
    is_path = bool(re.search(r"[/\\]", name)) or name in (".", "..")
    if not 0 < len(name) <= _MAX_KEY_NAME_CHARS or not name.isprintable() or is_path or (
        name != name.strip()
    ):
        raise BadRequest(
            f"name: takes 1 to {_MAX_KEY_NAME_CHARS} visible characters, spaces only between "
            "them, and no slash or backslash.", param="name",
        )
    if name.isdigit() or name.lower() in _RESERVED_NAMES:
        raise BadRequest(
            f"name: must not be a number, nor one of {', '.join(_RESERVED_NAMES)}.", param="name"
        )
    return name


def _folded(name: str) -> str:
    """Return a name as names are compared: without regard to case and Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _key(row: sqlite3.Row) -> Key:
    fields = {name: row[name] for name in Key._fields}
    models, quota = json.loads(fields.pop("models")), json.loads(fields.pop("quota"))
    web_search = bool(fields.pop("web_search"))
    return Key(**fields, models=tuple(models), quota=quota, web_search=web_search)


def _column_value(value: object) -> object:
    """Return a value as it is stored in its column of the table `keys`."""
    return json.dumps(value) if isinstance(value, (dict, tuple, list)) else value


#: Makes replaced secrets of a key invalid.
_END_GRACE = "UPDATE replaced_secrets SET valid_until_s = 0 WHERE key_id = ?"

#: The consequences of a failed write, for error messages.
_IN_MEMORY_ONLY = (
    "The change is in effect in memory and will be written as soon as possible; until then a "
    "restart would undo it."
)
_NOTHING_CHANGED = "Nothing was changed; try again when the problem is solved."

#: The length of a key that this server creates.
_KEY_CHARS = 36
#: Keys of other services by their prefixes, the longest first where one begins like another.
_VENDOR_PREFIXES = (
    ("sk-ant-", "Anthropic"), ("sk-or-", "OpenRouter"), ("sk-proj-", "OpenAI"), ("sk-", "OpenAI"),
    ("AIza", "Google"), ("gsk_", "Groq"), ("xai-", "xAI"), ("hf_", "Hugging Face"),
    ("github_pat_", "GitHub"), ("ghp_", "GitHub"),
)


def key_preview(secret: str) -> str:
    """Return a little of a wrong key that came, for its sender and for the log.

    A key of this server is shown as in the list of keys. Of anything else, which may be a password
    or the key of another service, no more than a public prefix or two characters are shown.
    """
    for prefix, _ in _VENDOR_PREFIXES:
        if secret.startswith(prefix):
            return f"{prefix}..."
    if secret.startswith("ocp_") and len(secret) >= 20:
        return safe_text(f"{secret[:8]}...{secret[-4:]}", 60)
    return safe_text(f"{secret[:2]}..." if len(secret) >= 8 else f"({len(secret)} characters)", 60)


def _unknown_key(secret: str, *, is_multi: bool) -> Unauthorized:
    """Return the error for a key that never was one of this server. `is_multi` says whether keys
    have the form that the server gives them."""
    if not secret:
        return MissingKey(
            "No key came with the request. This server requires its key: send "
            "`Authorization: Bearer KEY` or `x-api-key`."
        )
    preview = key_preview(secret)
    vendor = next((name for start, name in _VENDOR_PREFIXES if secret.startswith(start)), "")
    advice = "compare it with the one that you got from the operator, or ask for a new one"
    if vendor:
        reason = f"looks like one of {vendor}: send a key of this server"
    elif is_multi and secret.startswith("ocp_") and len(secret) < _KEY_CHARS:
        reason = (
            f"looks cut off: it has {len(secret)} characters and should have {_KEY_CHARS}; "
            "copy it again"
        )
    elif is_multi and not secret.startswith("ocp_"):
        reason = f"has the wrong prefix (keys of this server begin with ocp_): {advice}"
    else:
        reason = f"is unknown to this server: {advice}"
    error = Unauthorized(f"The key {preview} {reason}.")
    error.preview = preview
    return error


class ReplacedSecret(NamedTuple):
    """A secret that was the one of a key before the key was rotated."""

    key_id: int
    replaced_s: int
    #: How long it works nevertheless; 0 = not at all.
    valid_until_s: int = 0
    preview: str = ""


def _day_of(at_s: float) -> str:
    """Return the day in the machine's time zone."""
    return time.strftime("%Y-%m-%d", time.localtime(at_s))


# A lookup of a key needs no file: all keys are in memory. Changes differ in when they are written.
# A change of a key, such as its revocation, takes effect in memory first, and is queued if the
# database cannot be written. A new key or a new secret is written first and takes effect only if
# that succeeds, because the secret is handed out and must survive a restart. The old secret stays
# valid for the time of grace that the operator sets; of each key, one at most.


class Keys:
    """The keys of mode multi, in memory and in the database."""

    def __init__(self, store: Store, clock: Clock = time.time) -> None:
        self._store = store
        self._clock = clock
        # Guards writers of the fields below. Readers need no lock: entries are replaced, never
        # modified.
        self._lock = threading.Lock()
        self._keys: dict[int, Key] = {}
        #: Ids by hash of the secret.
        self._ids: dict[str, int] = {}
        #: Former secrets by their hashes. They explain a refusal, and give access only during the
        #: time of grace that the operator has set.
        self._replaced: dict[str, ReplacedSecret] = {
            row["hash"]: ReplacedSecret(*(row[name] for name in ReplacedSecret._fields))
            for row in store.rows("SELECT * FROM replaced_secrets")
        }
        #: Times of last use by id, and those of them that are not in the database yet.
        self._used_s: dict[int, int] = {}
        self._unwritten: dict[int, int] = {}
        #: Stored keys that are invalid and ignored: (id, reason).
        self.problems: list[tuple[int, str]] = []
        for row in store.rows("SELECT * FROM keys"):
            try:
                self._keys[row["id"]] = _key(row)
                self._ids[row["hash"]] = row["id"]
            except (ValueError, TypeError) as problem:
                self.problems.append((row["id"], str(problem)))

    def create(self, name: str, fields: Mapping[str, object]) -> tuple[Key, str]:
        """Create a key and return it with its secret, which is not stored. `fields`: see `change`.

        An empty name means a generated one. Raises BadRequest, Conflict, StorageFailed.
        """
        now_s = self._clock()
        secret, secret_columns = self._new_secret()
        generated = f"key-{round(now_s * 1000)}-{secrets.token_hex(3)}"
        columns = {
            "name": key_name(name or generated), "created_s": int(now_s),
            "expiry_s": None, "models": (), "max_concurrent": 0, "note": "", "quota": {},
            "effort": "", "web_search": False, **secret_columns, **fields,
        }
        names = ", ".join(columns)
        marks = ", ".join("?" * len(columns))
        with self._lock:
            self._check_free(str(columns["name"]), None)
            statement = f"INSERT INTO keys ({names}) VALUES ({marks})"
            key_id = self._write(statement, *map(_column_value, columns.values()))
            (row,) = self._store.rows("SELECT * FROM keys WHERE id = ?", key_id)
            self._keys[key_id] = _key(row)
            self._ids[secret_columns["hash"]] = key_id
        return self._keys[key_id], secret

    def _new_secret(self) -> tuple[str, dict[str, str]]:
        """Return a new secret, and the columns that are derived from it."""
        secret = "ocp_" + secrets.token_urlsafe(24)
        preview = f"{secret[:8]}...{secret[-4:]}"
        return secret, {"hash": self._hash(secret), "preview": preview}

    def _hash(self, secret: str) -> str:
        # The secret has 192 random bits, so neither salt nor a slow hash is needed.
        return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()

    def _check_free(self, name: str, key_id: int | None) -> None:
        """Raise Conflict if another key that is not revoked has this name."""
        if any(
            key.revoked_s is None and key.id != key_id and _folded(key.name) == _folded(name)
            for key in self._keys.values()
        ):
            raise Conflict(
                f"There is already a key called {name!r}: choose another name, or rotate that "
                "key for a new secret, or revoke it.", param="name",
            )

    def _write(self, statement: str, *values: object) -> int:
        """Execute a write and return the id of a new row. Raises StorageFailed."""
        try:
            with self._store.transaction() as connection:
                return connection.execute(statement, values).lastrowid or 0
        except sqlite3.Error as problem:
            raise storage_failure(problem, _NOTHING_CHANGED) from None

    def all(self) -> list[Key]:
        """Return every key, including revoked ones, newest first."""
        newest_first = sorted(self._keys.copy().values(), reverse=True, key=lambda key: key.id)
        return [self._with_last_use(key) for key in newest_first]

    def _with_last_use(self, key: Key) -> Key:
        return key._replace(used_s=self._used_s.get(key.id, key.used_s))

    def find(self, id_or_name: str) -> Key:
        """Return the key with this id or name. Raises NotFound.

        Of several keys with one name, the one that is not revoked is preferred, then the newest.
        """
        if re.fullmatch("[0-9]{1,15}", id_or_name):
            matches = [key for key in self.all() if key.id == int(id_or_name)]
        else:
            matches = [key for key in self.all() if _folded(key.name) == _folded(id_or_name)]
            matches.sort(key=lambda key: key.revoked_s is not None)
        if not matches:
            raise NotFound(f"There is no key {one_line(id_or_name, 80)!r}.")
        return matches[0]

    def change(self, key: Key, fields: Mapping[str, object]) -> Key:
        """Change columns of a key and return the key.

        The columns are name, expiry_s, models, max_concurrent, note, quota, effort and
        web_search. Raises BadRequest, Conflict, and StorageFailed if the change is in effect but
        not written yet.
        """
        with self._lock:
            key = self._require_unrevoked(key)
            if "name" in fields:
                self._check_free(key_name(str(fields["name"])), key.id)
            values = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in fields.items()
            }
            changed = self._keys[key.id] = key._replace(**values)  # type: ignore[arg-type]
            if fields:
                self._write_or_queue(key.id, fields)
        return self._with_last_use(changed)

    def _require_unrevoked(self, key: Key) -> Key:
        """Return the current version of the key. Raises BadRequest if it is revoked."""
        current = self._keys[key.id]
        if current.revoked_s is not None:
            raise BadRequest(f"The key {current.name!r} is revoked; create a new one.")
        return current

    def _write_or_queue(self, key_id: int, fields: Mapping[str, object]) -> None:
        """Write columns that are changed in memory. Raises StorageFailed if they are queued."""
        assignments = ", ".join(f"{name} = ?" for name in fields)
        statement = f"UPDATE keys SET {assignments} WHERE id = ?"
        try:
            self._store.write_or_queue(statement, *map(_column_value, fields.values()), key_id)
        except sqlite3.Error as problem:
            raise storage_failure(problem, _IN_MEMORY_ONLY) from None

    def rotate(self, key: Key, grace_s: int = 0) -> str:
        """Replace the secret of the key and return the new one. The old one is valid for `grace_s`
        more; one that was replaced before ends at once.

        Raises BadRequest, and StorageFailed, after which the old secret is still valid.
        """
        secret, secret_columns = self._new_secret()
        with self._lock:
            key = self._require_unrevoked(key)
            former = {known for known, key_id in self._ids.items() if key_id == key.id}
            now_s = int(self._clock())
            replaced = ReplacedSecret(key.id, now_s, now_s + grace_s if grace_s else 0, key.preview)
            try:
                with self._store.transaction() as connection:
                    connection.execute(
                        "UPDATE keys SET hash = :hash, preview = :preview WHERE id = :id",
                        {**secret_columns, "id": key.id},
                    )
                    connection.execute(_END_GRACE, (key.id,))
                    connection.executemany(
                        "INSERT OR REPLACE INTO replaced_secrets VALUES (?, ?, ?, ?, ?)",
                        [(known, *replaced) for known in former],
                    )
            except sqlite3.Error as problem:
                raise storage_failure(problem, _NOTHING_CHANGED) from None
            self._end_grace_in_memory(key.id)
            self._replaced.update(dict.fromkeys(former, replaced))
            self._ids = {
                **{known: key_id for known, key_id in self._ids.items() if known not in former},
                secret_columns["hash"]: key.id,
            }
            self._keys[key.id] = key._replace(preview=secret_columns["preview"])
        return secret

    def _end_grace_in_memory(self, key_id: int) -> None:
        for hashed, each in self._replaced.copy().items():
            if each.key_id == key_id and each.valid_until_s:
                self._replaced[hashed] = each._replace(valid_until_s=0)

    def in_grace(self, key: Key) -> ReplacedSecret | None:
        """Return the secret before the last rotation, if it is still valid."""
        now_s = self._clock()
        return next(
            (each for each in self._replaced.copy().values()
             if each.key_id == key.id and each.valid_until_s > now_s and key.revoked_s is None),
            None,
        )

    def _id_in_grace(self, hashed: str) -> int:
        """Return the id of the key whose replaced secret has this hash and is still valid; 0 =
        none."""
        found = self._replaced.get(hashed)
        return found.key_id if found is not None and found.valid_until_s > self._clock() else 0

    def end_grace(self, key: Key) -> bool:
        """Make the replaced secret of a key invalid now; return False if there was none. Raises
        StorageFailed if that is in effect but not written yet."""
        with self._lock:
            was_valid = self.in_grace(key) is not None
            self._end_grace_in_memory(key.id)
            try:
                self._store.write_or_queue(_END_GRACE, key.id)
            except sqlite3.Error as problem:
                raise storage_failure(problem, _IN_MEMORY_ONLY) from None
        return was_valid

    def revoke(self, key: Key) -> bool:
        """Revoke the key; return False if it was revoked already.

        Raises StorageFailed if the revocation is in effect but not written yet.
        """
        with self._lock:
            current = self._keys[key.id]
            if current.revoked_s is not None:
                return False
            now_s = int(self._clock())
            self._keys[key.id] = current._replace(revoked_s=now_s)
            self._write_or_queue(key.id, {"revoked_s": now_s})
        return True

    def verify(self, secret: str) -> Caller:
        """Return the caller with this secret. Raises Unauthorized."""
        hashed = self._hash(secret)
        key = self._keys.get(self._ids.get(hashed) or self._id_in_grace(hashed))
        if key is None:
            raise self._not_a_key(secret, self._replaced.get(hashed))
        self._require_valid(key, key.preview)
        now_s = int(self._clock())
        if now_s - (self._with_last_use(key).used_s or 0) >= _LAST_USE_EVERY_S:
            self._used_s[key.id] = self._unwritten[key.id] = now_s
        return key.caller

    def current(self, caller: Caller) -> Caller:
        """Return the caller with the current limits of its key. Raises Unauthorized if the key is
        not valid any more."""
        if caller.key_id is None:
            return caller
        key = self._keys[caller.key_id]
        # The request may have come with a secret that was replaced since.
        self._require_valid(key, "of this request")
        return key.caller

    def _require_valid(self, key: Key, shown: str) -> None:
        """Raise Unauthorized if a key was revoked or has expired. `shown` is its name for the
        client."""
        if key.revoked_s is not None:
            kind: type[Unauthorized] = RevokedKey
            reason = f"was revoked on {_day_of(key.revoked_s)}"
        elif key.expiry_s is not None and key.expired(self._clock()):
            kind, reason = ExpiredKey, f"expired on {_day_of(key.expiry_s)}"
        else:
            return
        error = kind(f"The key {shown} {reason}: ask the operator of this server for a new one.")
        error.preview, error.key_name = key.preview, key.name
        raise error

    def _not_a_key(self, secret: str, replaced: ReplacedSecret | None) -> Unauthorized:
        """Return the error for a secret that is none of a key, but may have been one."""
        owner = None if replaced is None else self._keys.get(replaced.key_id)
        if replaced is None or owner is None:
            return _unknown_key(secret, is_multi=True)
        preview = key_preview(secret)
        error = ReplacedKey(
            f"The key {preview} was replaced on {_day_of(replaced.replaced_s)}: use the newer one, "
            "or ask the operator of this server for it."
        )
        error.preview, error.key_name = preview, owner.name
        return error

    def prune(self, days: int) -> None:
        """Forget former secrets that were replaced longer ago. Raises sqlite3.Error."""
        before_s = self._clock() - days * 86_400
        with self._lock, self._store.transaction() as connection:
            connection.execute(
                "DELETE FROM replaced_secrets WHERE MAX(replaced_s, valid_until_s) < ?", (before_s,)
            )
            self._replaced = {
                hashed: each for hashed, each in self._replaced.items()
                if max(each.replaced_s, each.valid_until_s) >= before_s
            }

    def write_last_use(self) -> None:
        """Write the times at which keys were last used. Raises sqlite3.Error."""
        used_s, self._unwritten = self._unwritten, {}
        if used_s:
            with self._store.transaction() as connection:
                connection.executemany(
                    "UPDATE keys SET used_s = ? WHERE id = ?",
                    [(at_s, key_id) for key_id, at_s in used_s.copy().items()],
                )


#: How many wrong keys of one peer are answered without delay. Each further one waits twice as long
#: as the one before it.
_UNDELAYED_WRONG_KEYS = 5
_FIRST_DELAY_S = 0.1
#: The count of a peer is reset after this time without a wrong key.
_WRONG_KEYS_RESET_S = 600.0
#: How many peers are remembered.
_MAX_WRONG_PEERS = 1024
#: How many answers may be delayed at the same time, in total and for one peer.
_MAX_DELAYED = 32
_MAX_DELAYED_PER_PEER = 4


class WrongKeys:
    """Delays the answers to wrong keys, longer each time. A request with a right key is never
    delayed, because it is authenticated first."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        # Guards the next fields.
        self._lock = threading.Lock()
        #: Number of wrong keys and time of the last one for each group of peers, see peer_group;
        #: least recent first.
        self._groups: collections.OrderedDict[str, tuple[int, float]] = collections.OrderedDict()
        #: The group of each delayed answer.
        self._delayed: list[str] = []

    def _count(self, group: str) -> int:
        """Count a wrong key, and return how many this group has sent."""
        now_s = self._clock()
        count, last_s = self._groups.pop(group, (0, now_s))
        count = 1 if now_s - last_s > _WRONG_KEYS_RESET_S else count + 1
        self._groups[group] = (count, now_s)
        while len(self._groups) > _MAX_WRONG_PEERS:
            self._groups.popitem(last=False)
        return count

    @contextlib.contextmanager
    def delay_answer(self, peer: str, max_s: float) -> Iterator[float]:
        """Count a wrong key, and yield how long its answer must be delayed, at most `max_s`.

        The answer counts as delayed until the block ends. A delayed answer occupies a connection:
        if there are too many of them, the delay is 0.
        """
        group = peer_group(peer)
        with self._lock:
            over = self._count(group) - _UNDELAYED_WRONG_KEYS
            wait_s = min(max_s, _FIRST_DELAY_S * 2.0 ** min(over - 1, 20)) if over > 0 else 0.0
            if (
                len(self._delayed) >= _MAX_DELAYED
                or self._delayed.count(group) >= _MAX_DELAYED_PER_PEER
            ):
                wait_s = 0.0
            if wait_s:
                self._delayed.append(group)
        try:
            yield wait_s
        finally:
            with self._lock:
                if wait_s:
                    self._delayed.remove(group)


def presented_keys(headers: Headers) -> list[str]:
    """Return the keys in `Authorization: Bearer` and `x-api-key`; [""] if there is none.

    Clients may send the key of this server in one and the key of another service in the other.
    """
    scheme, _, bearer = headers.get("Authorization", "").strip().partition(" ")
    values = [bearer if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
    return [_as_utf8(key).strip() for key in values if key.strip()] or [""]


def _as_utf8(text: str) -> str:
    """Decode a header as UTF-8 if possible; the parser decodes it as Latin-1."""
    with contextlib.suppress(UnicodeError):
        return text.encode("latin-1").decode("utf-8")
    return text


def same_secret(candidate: str, secret: str) -> bool:
    """Return whether the two are equal, in constant time. An empty secret equals nothing."""
    hashes = (hashlib.sha256(t.encode("utf-8", "replace")).digest() for t in (candidate, secret))
    return bool(secret) and hmac.compare_digest(*hashes)


#: Headers that only proxies, load balancers and tunnels add.
_PROXY_HEADER = re.compile(
    r"forwarded|via|cdn-loop|(x-)?(forwarded|original|envoy|azure|arr|proxy|proxyuser)-.+"
    r"|x-forwarded|x-amz(n|-cf)-.+|(cf|fly|tailscale)-.+|x-remote-(ip|addr|host)"
    r"|(.+-)?(client|real|connecting|source|peer)-?(ip|addr)",
    re.IGNORECASE,
)


def is_forwarded(headers: Headers) -> bool:
    """Return whether the headers show that a proxy has forwarded the request."""
    return any(_PROXY_HEADER.fullmatch(name.replace("_", "-")) for name in headers)


def authorize(config: Config, keys: Keys, access: Access, headers: Headers, peer: str) -> Caller:
    """Return the caller if it has this access. Raises Unauthorized or Forbidden."""
    if access is Access.PUBLIC:
        return Caller("public")
    if config.mode == "none":
        # Behind a reverse proxy on this machine every request has a loopback address.
        is_local = is_loopback(peer) and not is_forwarded(headers)
        if access is Access.ADMIN and not is_local:
            raise LocalOnly("This route can be used only on the machine that runs the server.")
        return Caller("local" if is_local else "remote", is_admin=is_local)
    caller = _authenticate_any(config, keys, headers, access)
    if access is Access.ADMIN and not caller.is_admin:
        error = AdminKeyRequired(
            "This route requires the admin key: OCP_ADMIN_KEY of the server, or the content of its "
            "file admin-key."
        )
        error.key_name = caller.name
        raise error
    return caller


def _authenticate_any(config: Config, keys: Keys, headers: Headers, access: Access) -> Caller:
    """Return the caller for one of the keys in the headers, for admin routes preferably the admin.
    Raises Unauthorized if all keys are wrong."""
    callers: list[Caller] = []
    failures: list[Unauthorized] = []
    for key in presented_keys(headers):
        try:
            callers.append(_authenticate(config, keys, key))
        except Unauthorized as failure:
            failures.append(failure)
    if not callers:
        # What is known of a key tells more than that another one is unknown.
        raise next((failure for failure in failures if failure.key_name), failures[0])
    return next((c for c in callers if c.is_admin and access is Access.ADMIN), callers[0])


def _authenticate(config: Config, keys: Keys, key: str) -> Caller:
    """Return the caller with this key. Raises Unauthorized."""
    if same_secret(key, config.admin_key):
        return Caller("admin", is_admin=True)
    if config.mode == "multi" and same_secret(key, config.anonymous_key):
        return Caller("anonymous", web_search=False)
    if config.mode == "multi":
        return keys.verify(key)
    if same_secret(key, config.api_key):
        return Caller("shared")
    raise _unknown_key(key, is_multi=False)


_LOCAL_SUFFIXES = (".local", ".lan", ".home.arpa", ".internal")
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._~-]+))(?::[0-9]{0,5})?")


def host_name(host: str) -> str:
    """Return the name in a Host header, without its port, in lower case. Raises BadRequest."""
    match = _HOST.fullmatch(host)
    if match is None:
        raise BadRequest("The Host header of the request is missing or invalid.")
    return (match[1] or match[2]).lower()


def machine_names() -> frozenset[str]:
    """Return the name of this machine, with and without its domain."""
    name = socket.gethostname().lower()
    return frozenset({name, name.partition(".")[0]} - {""})


def is_own_host(config: Config, host: str, peer: str) -> bool:
    """Return whether a Host header names this server. Raises BadRequest if it is invalid.

    This prevents DNS rebinding: a web page can reach a server on loopback under a name in its own
    domain, so such names are rejected. In mode none, where a request over loopback has admin
    rights, names of the local network are rejected too: any device in it may announce them.
    """
    name = host_name(host)
    if name in machine_names() or name in config.own_names:
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
    """Reject requests from web pages of other origins. Raises Forbidden, BadRequest."""
    if host and not is_own_host(config, host, peer):
        raise HostNotAllowed(
            f"{one_line(host, 80)!r} is not a host name of this server: use localhost, or add the "
            "name to OCP_ALLOWED_HOSTS."
        )
    if not origin:
        return
    # Requests that a browser sends without a CORS preflight, such as forms, are never JSON.
    if content_type and content_type.partition(";")[0].strip().lower() != "application/json":
        raise OriginNotAllowed("Web pages must send application/json.")
    if is_allowed_origin(config, origin) or origin in (f"http://{host}", f"https://{host}"):
        return
    raise OriginNotAllowed(
        f"Web pages of {one_line(origin, 80)!r} may not call this server: "
        "add the origin to OCP_ALLOWED_ORIGINS."
    )


@functools.lru_cache(maxsize=64)
def is_allowed_origin(config: Config, origin: str) -> bool:
    """Return whether OCP_ALLOWED_ORIGINS allows this origin; a * there matches a part of it."""
    return any(
        re.fullmatch(re.escape(name.rstrip("/")).replace(r"\*", "[^/]*"), origin, re.IGNORECASE)
        for name in split_list(config.allowed_origins)
    )


# ==== 9. Usage and quotas ====================================================
# One row for each request, the sums of the rows, and the quotas of keys. A request makes a
# reservation before it runs, and its row replaces the reservation, so that concurrent requests
# cannot exceed a quota together. The usage of a period is summed from the rows once and then
# updated in memory.


class UsageRow(NamedTuple):
    """One request and its cost: a row of the table `usage`, in the order of its columns."""

    at_s: float
    request_id: str
    key_id: int | None
    caller: str
    model: str
    dialect: str
    #: "ok", "abandoned" if the client disconnected, else the kind of the error.
    outcome: str
    status: int
    #: How many requests it counts as for quotas: one for each answer that was requested from
    #: claude and not rejected by the API. Tokens always count.
    counted: int
    stop_reason: str | None
    stream: bool
    warm: bool | None
    #: "fresh", "rebuilt", "rewound" or "continued"; "cached" or "shared" if it cost no tokens. None
    #: for a request that reached no process.
    path: str | None
    prompt_chars: int
    response_chars: int
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    first_token_ms: int | None
    total_ms: int
    web_search_requests: int = 0
    #: Of a failed request only: what the client was told, its address, and its User-Agent.
    message: str | None = None
    peer: str | None = None
    user_agent: str | None = None

    @property
    def tokens(self) -> int:
        """The number of tokens that counts for quotas."""
        cached = self.cache_read_tokens + self.cache_write_tokens
        return self.input_tokens + self.output_tokens + cached


#: The tokens of a row's prompt, and UsageRow.tokens, in SQL.
_PROMPT = "input_tokens + cache_read_tokens + cache_write_tokens"
_TOKENS = f"{_PROMPT} + output_tokens"
#: The condition for failed requests, in the words of the index usage_failed.
_FAILED = "outcome NOT IN ('ok', 'abandoned')"
#: Columns that aggregate rows: (name, SQL). Names with total_ are those of the original OCP.
_SUMS = (
    ("requests", "COUNT(*)"),
    ("successes", "SUM(outcome = 'ok')"),
    ("abandoned", "SUM(outcome = 'abandoned')"),
    ("errors", f"SUM({_FAILED})"),
    ("cached", "SUM(path IN ('cached', 'shared'))"),
    ("input_tokens", "SUM(input_tokens)"),
    ("output_tokens", "SUM(output_tokens)"),
    ("cache_read_tokens", "SUM(cache_read_tokens)"),
    ("cache_write_tokens", "SUM(cache_write_tokens)"),
    ("cache_read_share", f"ROUND(TOTAL(cache_read_tokens) / NULLIF(TOTAL({_PROMPT}), 0), 4)"),
    ("web_search_requests", "SUM(web_search_requests)"),
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
#: The current name of a row's key, or else the name of its caller.
_CURRENT_NAME = "COALESCE((SELECT name FROM keys WHERE keys.id = usage.key_id), caller)"
#: The hour or the day of a row in UTC, for the timeline.
_STEPS = {
    "hour": "strftime('%Y-%m-%dT%H:00:00', at_s, 'unixepoch')",
    "day": "strftime('%Y-%m-%dT00:00:00', at_s, 'unixepoch')",
}
#: The day of a row in the machine's time zone.
_DAY = "date(at_s, 'unixepoch', 'localtime')"
#: The longest span with a timeline by hour; beyond it, by day.
_MAX_HOURLY_S = 32 * 86_400.0
#: The percentiles of a report.
_PERCENTILES = (50, 90, 99)
#: The maximum number of entries in the series of a report.
_MAX_SERIES = 10_000


def period_bounds(period: str, now_s: float) -> tuple[float, float]:
    """Return the begin and end, in epoch seconds, of the period that contains `now_s`.

    `period` is "daily", "weekly" (from Monday) or "monthly", in the machine's time zone.
    """
    today = datetime.datetime.fromtimestamp(now_s).replace(
        hour=0, minute=0, second=0, microsecond=0, fold=0
    )
    day = datetime.timedelta(days=1)
    if period == "daily":
        begin, end = today, today + day
    elif period == "weekly":
        begin = today - today.weekday() * day
        end = begin + 7 * day
    else:
        begin = today.replace(day=1)
        end = (begin + 32 * day).replace(day=1)
    return begin.timestamp(), end.timestamp()


class Reservation:
    """The share of one running request in the quotas of its key.

    `tokens` is the maximum that it can use if it is `bounded`, else an estimate. It counts as
    `requests` requests.
    """

    def __init__(
        self, key_id: int | None, tokens: int, *, requests: int = 1, bounded: bool = False
    ) -> None:
        self.key_id = key_id
        self.tokens = tokens
        self.requests = requests
        self.bounded = bounded


class PeriodUsage:
    """The usage of a key in a period."""

    def __init__(self, begins_s: float, ends_s: float, requests: int, tokens: int) -> None:
        self.begins_s = begins_s
        self.ends_s = ends_s
        self.requests = requests
        self.tokens = tokens


class Ledger:
    """The rows of usage, and the quotas that they count for."""

    def __init__(self, store: Store, clock: Clock = time.time) -> None:
        self._store = store
        self._clock = clock
        # Guards the next two fields. Held for a whole decision, so that no usage is counted twice
        # or missed between a check and its reservation.
        self._lock = threading.RLock()
        #: Usage by key id and period.
        self._used: dict[tuple[int, str], PeriodUsage] = {}
        #: Reservations of running requests by key id.
        self._in_flight: dict[int, list[Reservation]] = {}

    # -- quotas -------------------------------------------------------------------------------

    def check(self, caller: Caller) -> None:
        """Raise the error that `reserve` would raise for the smallest request, if any."""
        with self._lock:
            self.release(self.reserve(caller, 0))

    def reserve(
        self, caller: Caller, tokens: int, *, requests: int = 1, bounded: bool = False
    ) -> Reservation:
        """Return a reservation; end it with `record` or `release`. See Reservation.

        Raises QuotaExceeded, and QueueFull if the running requests may use all remaining tokens.
        """
        reservation = Reservation(caller.key_id, tokens, requests=requests, bounded=bounded)
        if caller.key_id is None:
            return reservation
        with self._lock:
            now_s = self._clock()
            in_flight = self._in_flight.setdefault(caller.key_id, [])
            for quota in QUOTAS:
                if quota.name in caller.quota:
                    used = self._period_usage(caller.key_id, quota.period, now_s)
                    check = self._check_requests if quota.unit == "requests" else self._check_tokens
                    check(quota, caller.quota[quota.name], used, in_flight, reservation)
            in_flight.append(reservation)
        return reservation

    def _check_requests(
        self, quota: Quota, limit: int, used: PeriodUsage, in_flight: list[Reservation],
        reservation: Reservation,
    ) -> None:
        count = used.requests + sum(r.requests for r in in_flight)
        if count >= limit:
            raise self._exceeded(quota, limit, count, "")
        if count + reservation.requests > limit:
            more = f"This request asks for {reservation.requests} answers: ask for fewer. "
            raise self._exceeded(quota, limit, count, more)

    def _check_tokens(
        self, quota: Quota, limit: int, used: PeriodUsage, in_flight: list[Reservation],
        reservation: Reservation,
    ) -> None:
        left = limit - used.tokens
        if left <= 0:
            raise self._exceeded(quota, limit, used.tokens, "")
        if reservation.bounded and reservation.tokens > left:
            more = f"This request may use {reservation.tokens}: reduce max_tokens. "
            raise self._exceeded(quota, limit, used.tokens, more)
        if in_flight and sum(r.tokens for r in in_flight) + reservation.tokens > left:
            raise QueueFull(
                f"The running requests of this key may use its remaining {quota.period} tokens "
                f"({left}); try again when they are done.",
                retry_after_s=5,
            )

    def _exceeded(self, quota: Quota, limit: int, used: int, more: str) -> QuotaExceeded:
        now_s = self._clock()
        resets_s = period_bounds(quota.period, now_s)[1]
        resets_in = format_span(resets_s - now_s)
        error = QuotaExceeded(
            f"This key has used {used} of its {limit} {quota.unit} ({quota.period}). {more}"
            f"Resets in {resets_in}.",
            retry_after_s=resets_s - now_s,
        )
        error.details = {
            "quota": {
                "period": quota.period, "unit": quota.unit, "limit": limit, "used": used,
                "resetsIn": resets_in, "resetsAt": iso_time(resets_s),
            }
        }
        return error

    def _period_usage(self, key_id: int, period: str, now_s: float) -> PeriodUsage:
        """Return the usage of the key in the current period. The caller holds the lock."""
        used = self._used.get((key_id, period))
        if used is None or not used.begins_s <= now_s < used.ends_s:
            begins_s, ends_s = period_bounds(period, now_s)
            row = self._store.rows(
                f"SELECT TOTAL(counted), TOTAL({_TOKENS}) FROM usage "
                "WHERE key_id = ? AND at_s >= ?", key_id, begins_s,
            )[0]
            used = PeriodUsage(begins_s, ends_s, int(row[0]), int(row[1]))
            self._used[key_id, period] = used
        return used

    def release(self, reservation: Reservation) -> None:
        """End a reservation. Does nothing if it has ended already."""
        with self._lock:
            in_flight = self._in_flight.get(reservation.key_id or 0, [])
            if reservation in in_flight:
                in_flight.remove(reservation)

    def quota_report(self, key: Key) -> Json:
        """Return each quota of a key: limit (None = no limit), used, in flight, and reset."""
        report: Json = {}
        with self._lock:
            now_s = self._clock()
            in_flight = self._in_flight.get(key.id, [])
            for quota in QUOTAS:
                used = self._period_usage(key.id, quota.period, now_s)
                requests = quota.unit == "requests"
                resets_s = period_bounds(quota.period, now_s)[1]
                report[quota.name] = {
                    "limit": key.quota.get(quota.name),
                    "used": used.requests if requests else used.tokens,
                    "inFlight": sum(r.requests if requests else r.tokens for r in in_flight),
                    "resetsAt": iso_time(resets_s),
                    "resetsIn": format_span(resets_s - now_s),
                }
        return report

    # -- rows ---------------------------------------------------------------------------------

    def record(self, row: UsageRow, reservation: Reservation) -> None:
        """Write a row, and replace its reservation by the real usage.

        Raises sqlite3.Error if the row is not written yet; quotas count it nevertheless.
        """
        with self._lock:
            self.release(reservation)
            if row.key_id is not None:
                self._count(row.key_id, row)
        marks = ", ".join("?" * len(row))
        statement = f"INSERT INTO usage ({', '.join(row._fields)}) VALUES ({marks})"
        self._store.write_or_queue(statement, *row, must=False)

    def _count(self, key_id: int, row: UsageRow) -> None:
        """Add a row to the usage of its key. Must be called before the row is written, because the
        usage may be summed from the written rows here."""
        for period in {quota.period for quota in QUOTAS}:
            # If the database cannot be read, the row is counted when it is summed later.
            with contextlib.suppress(sqlite3.Error):
                used = self._period_usage(key_id, period, self._clock())
                if used.begins_s <= row.at_s:
                    used.requests += row.counted
                    used.tokens += row.tokens

    def prune(self, days: int) -> int:
        """Delete rows older than `days`, except those that a quota still counts, and return their
        number. Raises sqlite3.Error."""
        now_s = self._clock()
        counted_s = min(period_bounds(quota.period, now_s)[0] for quota in QUOTAS)
        with self._store.transaction() as connection:
            return connection.execute(
                "DELETE FROM usage WHERE at_s < ?", (min(now_s - days * 86_400, counted_s),)
            ).rowcount

    # -- reports ------------------------------------------------------------------------------

    def report(self, since_s: float, until_s: float, limit: int, caller: Caller | None) -> Json:
        """Return the body of /api/usage for a span of time, for one caller or all (None).

        `limit` is the number of recent rows. Raises QueueFull, sqlite3.Error.
        """
        where = "at_s >= ? AND at_s < ?"
        values: list[object] = [since_s, until_s]
        if caller is not None and caller.key_id is not None:
            where, values = where + " AND key_id = ?", [*values, caller.key_id]
        elif caller is not None:
            where, values = where + " AND key_id IS NULL AND caller = ?", [*values, caller.name]
        with self._store.read_transaction() as connection:
            rows = Rows(connection, where, values)
            unit = "hour" if rows.span_s() <= _MAX_HOURLY_S else "day"
            step = ("hour", _STEPS[unit])
            series = rows.sums(
                _TIMELINE_SUMS, step, ("key_name", _CURRENT_NAME), ("model", "model"),
                maximum=_MAX_SERIES + 1,
            )
            return {
                "totals": rows.sums(_GROUP_SUMS)[0],
                "byKey": rows.sums(_GROUP_SUMS, ("key_name", _CURRENT_NAME)),
                "byModel": rows.sums(_GROUP_SUMS, ("model", "model")),
                "byPath": rows.sums(_GROUP_SUMS, ("path", "COALESCE(path, 'none')")),
                "timeline": rows.sums(_TIMELINE_SUMS, step),
                "timelineUnit": unit,
                "daily": rows.sums(_TIMELINE_SUMS, ("day", _DAY)),
                "series": series[-_MAX_SERIES:],
                "seriesComplete": len(series) <= _MAX_SERIES,
                "firstToken": rows.first_tokens(),
                "recent": rows.recent(limit),
            }

    def by_model(self, since_s: float) -> list[Json]:
        """Return the sums for each model since then, with timeouts. Raises as `report` does."""
        columns = (*_GROUP_SUMS, ("timeouts", "SUM(outcome = 'timeout')"))
        with self._store.read_transaction() as connection:
            return Rows(connection, "at_s >= ?", [since_s]).sums(columns, ("model", "model"))


    def failures(self, wanted: FailureFilter, limit: int) -> tuple[list[Json], list[Json]]:
        """Return the newest `limit` failed requests, newest first, and for each kind of failure
        the count and the newest of all that match. Raises as `report` does."""
        where, values = wanted.condition()
        with self._store.read_transaction() as connection:
            newest = connection.execute(
                f"SELECT *, {_CURRENT_NAME} AS key_name FROM usage WHERE {where} "
                "ORDER BY at_s DESC LIMIT ?", (*values, limit),
            ).fetchall()
            # Columns beside MAX() are those of the row with the maximum.
            kinds = connection.execute(
                "SELECT outcome AS kind, COUNT(*) AS count, MAX(at_s) AS last_s, message, status, "
                f"key_id, {_CURRENT_NAME} AS key_name FROM usage WHERE {where} GROUP BY outcome",
                values,
            ).fetchall()
        return [dict(row) for row in newest], [dict(row) for row in kinds]


class FailureFilter(NamedTuple):
    """Which failures are asked for. Empty = any."""

    since_s: float = 0.0
    #: The name of a key or a caller, and the id of the key if it has one.
    key: str = ""
    key_id: int | None = None
    request_id: str = ""
    kind: str = ""

    def condition(self) -> tuple[str, list[object]]:
        """Return the condition in SQL for rows of usage, and its values."""
        parts: list[tuple[str, list[object]]] = [(_FAILED, []), ("at_s >= ?", [self.since_s])]
        if self.key_id is not None:
            parts.append(("key_id = ?", [self.key_id]))
        elif self.key:
            parts.append(("key_id IS NULL AND caller = ?", [self.key]))
        if self.request_id:
            parts.append(("request_id = ?", [self.request_id]))
        if self.kind:
            parts.append(("outcome = ?", [self.kind]))
        return " AND ".join(sql for sql, _ in parts), [v for _, values in parts for v in values]

    def takes(self, refused: Refused) -> bool:
        """Return whether a refusal matches in key and kind."""
        is_of_key = not self.key or refused.key.lower() == self.key.lower()
        return is_of_key and self.kind in ("", refused.kind)


def percentiles(sorted_values: Sequence[int]) -> Json:
    """Return the number of values and their percentiles, `p50_ms` and so on: each one is the lowest
    value that this share of the values does not exceed, None if there are none."""
    count = len(sorted_values)
    found: Json = {"answers": count}
    for percent in _PERCENTILES:
        # The share of the values, rounded up.
        place = -(-count * percent // 100)
        found[f"p{percent}_ms"] = sorted_values[place - 1] if count else None
    return found


def _percentiles_by(name: str, groups: Mapping[str, Sequence[int]]) -> list[Json]:
    entries = [{name: group, **percentiles(values)} for group, values in groups.items()]
    return sorted(entries, key=lambda entry: (-entry["answers"], entry[name]))


class Rows:
    """The rows of usage that match a condition, for a report."""

    def __init__(self, connection: sqlite3.Connection, where: str, values: list[object]) -> None:
        self._connection = connection
        self._where = where
        self._values = values

    def span_s(self) -> float:
        """Return the time between the first and the last row."""
        # Two queries, because SQLite uses the index for MIN or MAX alone, not for both together.
        ends = [
            self._connection.execute(
                f"SELECT {end}(at_s) FROM usage WHERE {self._where}", self._values
            ).fetchone()[0] for end in ("MIN", "MAX")
        ]
        return 0.0 if None in ends else float(ends[1] - ends[0])

    def sums(
        self, columns: _Columns, *groups: tuple[str, str], maximum: int = -1
    ) -> list[Json]:
        """Return the columns aggregated over all rows, or for each group.

        `groups` are expressions (name, SQL) by which rows are grouped and results are sorted. Only
        the last `maximum` groups are returned; -1 = all.
        """
        sums = [(n, f"COALESCE({sql}, 0)" if "SUM" in sql else sql) for n, sql in columns]
        selected = ", ".join(f"{sql} AS {name}" for name, sql in (*groups, *sums))
        names = ", ".join(name for name, _ in groups)
        descending = ", ".join(f"{name} DESC" for name, _ in groups)
        grouped = f" GROUP BY {names} ORDER BY {descending} LIMIT ?" if groups else " LIMIT ?"
        query = f"SELECT {selected} FROM usage WHERE {self._where}{grouped}"
        results = self._connection.execute(query, (*self._values, maximum)).fetchall()
        return [dict(row) for row in reversed(results)]

    def first_tokens(self) -> Json:
        """Return the percentiles of the time to the first token: of all rows, of each model and of
        each dialect, most answers first. Cached answers have no such time and do not count."""
        # Sorted, so that the times of each group are sorted too. Arrays, because there can be many.
        sorted_rows = self._connection.execute(
            "SELECT model, dialect, first_token_ms FROM usage "
            f"WHERE first_token_ms IS NOT NULL AND {self._where} ORDER BY first_token_ms",
            self._values,
        )
        everything = array.array("q")
        by_model: dict[str, array.array[int]] = {}
        by_dialect: dict[str, array.array[int]] = {}
        for model, dialect, time_ms in sorted_rows:
            everything.append(time_ms)
            by_model.setdefault(model, array.array("q")).append(time_ms)
            by_dialect.setdefault(dialect, array.array("q")).append(time_ms)
        return {
            "all": percentiles(everything),
            "byModel": _percentiles_by("model", by_model),
            "byDialect": _percentiles_by("dialect", by_dialect),
        }

    def recent(self, limit: int) -> list[Json]:
        results = self._connection.execute(
            f"SELECT *, {_CURRENT_NAME} AS key_name, outcome = 'ok' AS success, "
            "total_ms AS elapsed_ms, datetime(CAST(at_s AS INTEGER), 'unixepoch') AS created_at "
            f"FROM usage WHERE {self._where} ORDER BY id DESC LIMIT ?", (*self._values, limit),
        )
        entries = [{"at": iso_time(row["at_s"]), **dict(row)} for row in results]
        for entry in entries:
            for name in ("id", "at_s", "key_id", "caller", "total_ms", "peer", "user_agent"):
                del entry[name]
        return entries


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


def _check_schema_level(level: int, path: str) -> None:
    if level > MAX_SCHEMA_LEVELS:
        raise BadRequest(
            f"{path[:200]}: a schema may be nested {MAX_SCHEMA_LEVELS} levels deep.",
            param=path[:200],
        )


class ReferenceIndex:
    """The schemas of one document to which its references lead."""

    def __init__(self, document: Json, path: str) -> None:
        """Collect all targets. Raises BadRequest if the document is too large."""
        self._document = document
        #: Targets by URI, and by the name of their definition.
        self._resources: dict[str, object] = {}
        self._named: dict[str, object] = {}
        #: The base URI of the references in a schema, by the schema's id().
        self._base_uris: dict[int, str] = {}
        #: All names of members in the document.
        self.names: set[str] = set()
        pending: list[tuple[object, str, int]] = [(document, "", 0)]
        count = 0
        while pending:
            value, base, level = pending.pop()
            count += 1
            # One level of schemas is two levels of JSON in most places.
            _check_schema_level(level // 2, path)
            if count > MAX_SCHEMA_VALUES:
                raise BadRequest(
                    f"{path}: a schema may hold {MAX_SCHEMA_VALUES} values.", param=path
                )
            if isinstance(value, list):
                pending += [(item, base, level + 1) for item in value]
            elif isinstance(value, dict):
                base = self._add(value, base)
                pending += [(item, base, level + 1) for item in value.values()]

    def _add(self, value: Json, base: str) -> str:
        """Register the names, URIs and anchors of a schema; return the base URI of its
        references."""
        self.names.update(value)
        for keyword in ("$id", "id"):
            identity = value.get(keyword)
            if isinstance(identity, str) and identity:
                uri = urllib.parse.urljoin(base, identity) if base else identity
                self._resources.setdefault(uri.rstrip("#"), value)
                base = uri.partition("#")[0] or base
        for keyword in ("$anchor", "$dynamicAnchor"):
            if isinstance(value.get(keyword), str):
                self._resources.setdefault(f"{base}#{value[keyword]}", value)
        for keyword in ("$defs", "definitions", "schemas"):
            schemas = value.get(keyword)
            for name, schema in schemas.items() if isinstance(schemas, dict) else ():
                self._named.setdefault(name, schema)
        self._base_uris[id(value)] = base
        return base

    def target(self, reference: object, schema: Json) -> object:
        """Return the target of a reference in `schema`; _UNREADABLE if there is none."""
        if not isinstance(reference, str):
            return _UNREADABLE
        base = self._base_uris.get(id(schema), "")
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


class SchemaParser:
    """Parses one schema of a client into plain 2020-12.

    The results are `root`, the schema; `definitions`, the targets of its references by name; and
    `renamed`, the client's names of renamed properties by their new names. The constructor raises
    BadRequest, naming the place below `path`, for a schema that cannot be repaired.
    """

    def __init__(self, document: Json, path: str) -> None:
        self._references = ReferenceIndex(document, path)
        #: The client's property names by the model's, the reverse, and all names in use.
        self.renamed: dict[str, str] = {}
        self._new_names: dict[str, str] = {}
        self._used_names: set[str] = {*PROTOTYPE_NAMES, *self._references.names}
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

    # -- schemas ------------------------------------------------------------------------------

    def schema(self, value: object, path: str, level: int) -> Json:
        """Return the parsed schema. Raises BadRequest if `value` cannot be meant as a schema."""
        _check_schema_level(level, path)
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
                parsed: object = self._reference(operand, value, path)
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

    def _reference(self, value: object, schema: Json, path: str) -> object:
        target = self._references.target(value, schema)
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
            definition = target if isinstance(target, dict) else ({} if target else {"not": {}})
            self._pending.append((name, definition, f"{path}.$ref"))
        return f"#/$defs/{self._definition_names[key]}"

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
# Fields reads the JSON of a request with types and names the field that is invalid. The functions
# after it read the options, thinking and sampling, and adapt them to the model.

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
        return f"{self.path}.{name}" if self.path else name

    def invalid(self, name: str, what: str) -> BadRequest:
        return BadRequest(f"{self.path_of(name)}: must be {what}.", param=self.path_of(name))

    def has(self, name: str) -> bool:
        """Return whether the field is present and not null."""
        return self.value(name) is not None

    def text(self, name: str) -> str | None:
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

    def sampling_value(self, name: str, maximum: float) -> float | None:
        """Return a number from 0 to `maximum`; None also for -1, which some clients send for
        "not set"."""
        return None if self.value(name) == -1 else self.number(name, 0, maximum)

    def items(self, name: str) -> list[object] | None:
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
#: The effort if a client requests thinking without an effort or budget.
_DEFAULT_EFFORT = "medium"


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
    #: The path of the field that switches thinking off; empty = no field does.
    off_field: str = ""
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
    #: The field that asks for fast mode; empty = none does.
    fast_mode_field: str = ""


def _thinking_tokens(model: Model, requested: RequestedOptions) -> int | None:
    """Return the value for Options.thinking_tokens, unless sampling options rule thinking out."""
    effort, budget = requested.thinking.effort, requested.thinking.budget_tokens
    is_forced = requested.forces_tool and model.forced_tools
    if is_forced or effort == "none" or budget == 0 or requested.max_tokens == 0:
        return 0
    is_short = requested.max_tokens and requested.max_tokens < 2 * _MIN_BUDGET_TOKENS
    # An unknown model may take a budget, which would not fit.
    if is_short and not (model.known and requested.thinking.is_requested):
        return 0
    if effort == "minimal" and model.sent_thinking_off:
        return 0
    if model.thinking == "adaptive":
        return None
    maximum = requested.max_tokens or model.default_max_tokens
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


def _sampling(
    model: Model, requested: RequestedOptions, *, thinks: bool
) -> tuple[dict[str, float], list[str]]:
    """Return the sampling parameters to send, and those that are ignored."""
    values = {
        "temperature": requested.temperature, "top_p": requested.top_p, "top_k": requested.top_k
    }
    # Both temperature and top_p default to 1; sent explicitly, one would rule out the other.
    changed = {n: v for n, v in values.items() if v is not None and (v != 1 or n == "top_k")}
    sampling = {n: v for n, v in changed.items() if n == "top_k" or (n == "temperature" and v < 1)}
    takes_sampling = model.sampling and model.can_stop_thinking
    if not takes_sampling or (requested.thinking.is_requested and thinks):
        sampling = {}
    thinks = thinks and not sampling
    if takes_sampling and thinks and changed.get("top_p", 0) >= _MIN_TOP_P_WITH_THINKING:
        sampling["top_p"] = changed["top_p"]
    return sampling, [name for name in changed if name not in sampling]


def least_thinking(model: Model, options: Options) -> Options:
    """Return the options with thinking switched off. A model that always thinks gets its lowest
    effort instead, unless the options have one."""
    effort = options.effort
    if not model.can_stop_thinking:
        effort = effort or nearest_effort(model, "low")
        return options._replace(thinking_tokens=None, thinking_type="", effort=effort)
    if effort is not None and model.thinking_off_max_effort:
        effort = min(effort, model.thinking_off_max_effort, key=EFFORTS.index)
    return options._replace(
        thinking_tokens=0, thinking_type=model.sent_thinking_off, effort=effort
    )


def options_for(model: Model, requested: RequestedOptions) -> tuple[Options, tuple[str, ...]]:
    """Return the options that the model's API accepts, and the parameters that are ignored.

    The API rejects thinking together with a temperature other than 1 or a low top_p, and a
    temperature together with top_p; without thinking claude always sends a temperature. The
    API's maximum temperature is 1, OpenAI's is 2. An effort or a budget takes precedence over
    sampling; a temperature alone turns thinking off. An effort in the model's name counts like one
    in the request; the operator's is used where thinking is left to the model.
    """
    wish = requested.thinking
    if wish.effort is None and wish.budget_tokens != 0:
        wish = wish._replace(effort=model.named_effort or None)
        requested = requested._replace(thinking=wish)
    thinking = _thinking_tokens(model, requested)
    sampling, ignored = _sampling(model, requested, thinks=thinking != 0)
    if set(sampling) - {"top_p"}:
        thinking = 0
    if wish.budget_tokens and thinking != wish.budget_tokens:
        ignored.append(wish.budget_field)
    if requested.fast_mode_field and not model.fast_mode:
        ignored.append(requested.fast_mode_field)
    effort = wish.effort or (model.operator_effort if thinking != 0 else "")
    options = Options(
        max_tokens=requested.max_tokens,
        stop_sequences=requested.stop_sequences,
        sampling=tuple(sorted(sampling.items())),
        effort=None if effort in ("", "none") else nearest_effort(model, effort),
        thinking_tokens=thinking,
        hides_thinking=wish.hidden,
        fast_mode=bool(requested.fast_mode_field) and model.fast_mode,
    )
    if thinking != 0:
        return options, tuple(ignored)
    if wish.off_field and not model.can_stop_thinking:
        ignored.append(wish.off_field)
    return least_thinking(model, options), tuple(ignored)


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


def _first_set(values: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the path and the value of the first field that says something."""
    return next(((field, value) for field, value in values.items() if value), ("", None))


def openai_thinking(fields: Fields) -> Thinking:
    """Return the thinking that an OpenAI client requests, from OpenAI's own fields, OpenRouter's
    `reasoning`, or Anthropic's `thinking` and `output_config`."""
    reasoning, thinking, output = (
        fields.settings(name, foreign=True) for name in ("reasoning", "thinking", "output_config")
    )
    efforts = {
        each.path_of(name): _effort(each, name)
        for each, name in (
            (fields, "reasoning_effort"), (reasoning, "effort"), (output, "effort")
        )
    }
    kind = (thinking.text("type") or "").lower()
    if kind not in ("", *_THINKING_TYPES):
        thinking.mark_ignored("type")
    switches = {
        each.path_of("enabled"): each.flag("enabled") if each.has("enabled") else None
        for each in (reasoning, thinking)
    }
    switches[thinking.path_of("type")] = _THINKING_TYPES.get(kind)
    off = next((field for field, is_on in switches.items() if is_on is False), "")
    budgets = {
        each.path_of(name): each.token_limit(name)
        for each, name in ((reasoning, "max_tokens"), (thinking, "budget_tokens"))
    }
    budget_field, budget = _first_set(budgets)
    # Mark it as read: Responses request a summary with it, and chat always shows the thinking.
    reasoning.value("summary")
    hidden = [reasoning.flag("exclude"), thinking.text("display") == "omitted"]
    effort_field, effort = _first_set({**efforts, off: "none" if off else None})
    return Thinking(
        effort=effort,
        budget_tokens=budget,
        budget_field=budget_field,
        off_field=effort_field if effort == "none" else "",
        enabled=not off and True in switches.values(),
        hidden=any(hidden),
    )


#: Fields of OpenAI clients that can ask for fast mode: OpenAI's own, and Anthropic's. For each, the
#: values that ask for it, and those that mean the usual speed.
_OPENAI_SPEEDS = (
    ("service_tier", ("fast", "priority"), ("auto", "default")), ("speed", ("fast",), ("standard",))
)


def openai_fast_mode_field(fields: Fields) -> str:
    """Return the field by which an OpenAI client asks for fast mode; empty if none does. Other
    tiers are ignored."""
    asking = ""
    for name, fast, usual in _OPENAI_SPEEDS:
        value = (fields.text(name) or "").lower()
        if value in fast:
            asking = asking or name
        elif value and value not in usual:
            fields.mark_ignored(name)
    return asking


def cache_controls(body: object) -> Iterator[object]:
    """Yield what each `cache_control` in a body says, wherever it stands."""
    pending = [body]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if "cache_control" in value:
                yield value["cache_control"]
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def cache_lifetime(body: object, setting: str) -> tuple[str, bool]:
    """Return the lifetime in the API's prompt cache for a request, see Turn, and whether a
    `cache_control.ttl` of it is ignored. `setting` is Config.cache_lifetime."""
    ttls = [each.get("ttl") for each in cache_controls(body) if isinstance(each, dict)]
    asked = next((lifetime for lifetime in CACHE_LIFETIMES if lifetime in ttls), "")
    lifetime = {"plan": "", "client": asked}.get(setting, setting)
    known = (None, *(CACHE_LIFETIMES if lifetime == asked else ()))
    return lifetime, any(ttl not in known for ttl in ttls)


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
    return any(True for _ in cache_controls(body))


# ==== 14. Attachments ========================================================
# Images and files of requests become blocks that the API accepts. Their data decides about their
# type. ParseContext holds what one request needs while it is parsed.


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
    #: The effort that the key or the server sets for a request that asks for none.
    default_effort: str = ""
    #: Whether the API may search the web for this caller.
    web_search: bool = False
    #: Whether clients may ask for fast mode.
    fast_mode: bool = False
    #: See Config.cache_lifetime.
    cache_lifetime: str = "plan"


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


#: Where image formats store their sides: a pattern for the first bytes, two offsets, the width of
#: each number in bytes, its byte order, and what to add to the number.
_SIDE_FIELDS: tuple[tuple[bytes, tuple[int, int], int, Literal["big", "little"], int], ...] = (
    (rb"\x89PNG", (16, 20), 4, "big", 0),
    (rb"GIF8", (6, 8), 2, "little", 0),
    (rb"RIFF....WEBPVP8X", (24, 27), 3, "little", 1),
    (rb"RIFF....WEBPVP8 ", (26, 28), 2, "little", 0),
)
#: The markers of JPEG that begin a frame.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def largest_side(head: bytes) -> int:
    """Return the longer side of an image in pixels, read from its first bytes; 0 if unknown."""
    if head.startswith(b"\xff\xd8"):
        return _largest_jpeg_side(head)
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return max(bits & 0x3FFF, bits >> 14 & 0x3FFF) + 1
    for magic, offsets, width, order, missing in _SIDE_FIELDS:
        if re.match(magic, head, re.DOTALL):
            return max(int.from_bytes(head[at: at + width], order) for at in offsets) + missing
    return 0


def _largest_jpeg_side(head: bytes) -> int:
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        if head[at + 1] in _JPEG_FRAMES:
            return max(int.from_bytes(head[side: side + 2], "big") for side in (at + 5, at + 7))
        # Fill bytes of value 0xFF can precede a marker.
        at += 1 if head[at + 1] == 0xFF else 2 + int.from_bytes(head[at + 2: at + 4], "big")
    return 0


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

    def invalid(self, problem: str, code: str) -> BadRequest:
        return BadRequest(f"{self.param}: {problem}", param=self.param, code=code)


class Attachments:
    """Turns the images and files of one request into blocks, and enforces their limits."""

    def __init__(self, limits: Limits, adjusted: collections.Counter[str]) -> None:
        """Repairs are counted in `adjusted`."""
        self._limits = limits
        self._adjusted = adjusted
        #: Every block and the path of its field, by the block's id(). The reference to the block
        #: keeps that id valid.
        self._paths: dict[int, tuple[Block, str]] = {}

    def blocks(self, sent: Attachment) -> list[Block]:
        """Return the blocks of an image or a file, whose data tells its type: an image, a PDF, or
        text, which becomes a text block. Raises BadRequest, Unsupported."""
        match = _SCHEME.match(sent.data)
        scheme = match[1].lower() if match else "data"
        if scheme not in ("data", "http", "https"):
            raise sent.invalid("must be a data: URI or an http(s) URL.", "unsupported_url_scheme")
        blocks = self._inline(sent) if scheme == "data" else [self._remote(sent)]
        self._paths.update((id(block), (block, sent.param)) for block in attachments_of(blocks))
        return blocks

    def _remote(self, sent: Attachment) -> Block:
        if not self._limits.image_allow_url:
            raise sent.invalid(
                "this server does not accept URLs of images and files; send the data as a data: "
                "URI, or have the operator set CLAUDE_IMAGE_ALLOW_URL=1.", "remote_url_disabled",
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
            raise sent.invalid(
                "must be a base64 data URI, data:image/png;base64,...", "invalid_data_uri"
            )
        data, content = normalized_base64(data)
        if not content:
            raise sent.invalid("the base64 data is invalid or empty.", "invalid_data_uri")
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
            raise sent.invalid(
                f"{what} one of {', '.join(_IMAGE_TYPES)}{declared}; the data is none of these. "
                "Convert it first.",
                "unsupported_image_type" if sent.image_only else "unsupported_file_type",
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
                self._adjusted["text_encoding_guessed"] += 1
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
            self._adjusted["images_dropped"] += 1
        return _without(messages, dropped) if dropped else messages

    def _check_newest(self, message: Message, sizes: list[int | None], param: str) -> None:
        limits, total_bytes = self._limits, 0
        for number, (block, size_bytes) in enumerate(zip(attachments_of(message.content), sizes)):
            total_bytes += size_bytes or 0
            checks = (
                (size_bytes is None, "image_too_large",
                 f"an image may have at most {limits.max_image_bytes} bytes"),
                (number >= limits.max_images, "too_many_images",
                 f"a request may have at most {limits.max_images} images and files"),
                (total_bytes > limits.max_image_total_bytes, "images_too_large",
                 "the images and files of a request may have at most "
                 f"{limits.max_image_total_bytes} bytes in total"),
            )
            for is_over, code, problem in checks:
                if is_over:
                    _, param = self._paths.get(id(block), (block, param))
                    raise TooLarge(f"{param}: {problem}.", param=param, code=code)


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
    """The state of parsing one request: its fields and attachments, and the fields that were
    ignored and the repairs that were made, which the response headers report."""

    def __init__(self, body: object, parsing: ParseEnvironment) -> None:
        """Raises BadRequest, UnknownModel."""
        self.fields = Fields(body)
        self.parsing = parsing
        name = self.fields.text("model") or parsing.default_model
        found = parsing.models.find(name, long_context=parsing.long_context)
        self.model = found._replace(
            operator_effort=parsing.default_effort,
            fast_mode=found.fast_mode and parsing.fast_mode,
        )
        max_images = min(parsing.limits.max_images, _max_attachments(self.model))
        limits = parsing.limits._replace(max_images=max_images)
        #: The repairs by their names in docs/api.md, and how often each was made.
        self.adjusted: collections.Counter[str] = collections.Counter()
        self.attachments = Attachments(limits, self.adjusted)
        #: The paths of fields that have no effect, in the order of the request.
        self.ignored: list[str] = []
        #: The tools that the API runs itself, once ToolReader has read them.
        self.server_tools: tuple[Json, ...] = ()

    def ignore(self, *paths: str) -> None:
        self.ignored += paths

    def adjust(self, repair: str) -> None:
        self.adjusted[repair] += 1


# ==== 15. Content ============================================================
# The content of messages and of tool results in the formats of all APIs becomes blocks that the
# Messages API accepts.


def json_text(value: object) -> str:
    return to_json(value).decode("utf-8")


def json_block(value: object) -> list[Block]:
    return text_blocks(json_text(value))


def call_block(call_id: str, name: str, arguments: Json) -> Block:
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def result_block(
    call_id: str, content: list[Block], *, name: object = None, failed: bool = False
) -> Block:
    """Return the block of a tool's result. ToolExchanges removes the `name` of the tool."""
    return {
        "type": "tool_result", "tool_use_id": call_id, "content": content, "name": name,
        "is_error": failed,
    }


_TEXT_PARTS = ("text", "input_text", "output_text", "summary_text", "reasoning_text")
_IMAGE_URL_PARTS = ("image_url", "input_image")
_FILE_PARTS = ("file", "input_file")
#: Parts that hold an image or a file. Some clients send Anthropic's blocks, tools and system
#: prompt to any model with "claude" in its name.
_ATTACHMENT_PARTS = ("image", "document", *_IMAGE_URL_PARTS, *_FILE_PARTS)
_AUDIO_PARTS = ("input_audio", "audio", "input_video", "video_url")
_THINKING_PARTS = ("thinking", "redacted_thinking", "reasoning")

_IMAGE_FIELDS: dict[str, tuple[type, ...]] = {"image_url": (str, dict), "file_id": (str,)}
_FILE_FIELDS: dict[str, tuple[type, ...]] = {
    "file": (dict,), "file_data": (str,), "file_url": (str,), "file_id": (str,)
}
#: Parts in a tool's output: a part has at least one of these fields, with a value of these types.
_PART_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    **{kind: {"text": (str,)} for kind in _TEXT_PARTS},
    **{kind: {kind: (dict,), "data": (str,)} for kind in _AUDIO_PARTS},
    **dict.fromkeys(_IMAGE_URL_PARTS, _IMAGE_FIELDS),
    **dict.fromkeys(_FILE_PARTS, _FILE_FIELDS),
    "refusal": {"refusal": (str,)},
    "image": {"source": (dict,), "data": (str,)},
    "document": {"source": (dict,)},
}


def is_content_part(value: object) -> bool:
    """Return True if `value` has the type of a content part and a field of that type.

    Tools also return plain data with a `type`.
    """
    if not isinstance(value, dict):
        return False
    fields = _PART_FIELDS.get(str(value.get("type")), {})
    return any(isinstance(value.get(name), kinds) for name, kinds in fields.items())


class ContentReader:
    """Reads the content of messages and of tool results.

    A place is where content stands: in a message of the role "system", "user" or "assistant", or
    in the result of a "tool". Subclasses read the formats of one API: they add types to the table
    of readers, and decide in `part` what may stand in which place.
    """

    #: The name of the method that reads a part, by the type of the part. No bound methods: in a
    #: cycle of references the body of a request would outlive it.
    readers: ClassVar[Mapping[str, str]] = MappingProxyType({
        "text": "_text", "image": "_image", "document": "_document", "tool_use": "_tool_use",
        "tool_result": "_tool_result",
    })

    #: Types of parts that have content for the model, or are known to have none.
    readable: ClassVar[tuple[str, ...]] = ()
    #: Types of parts that are dropped.
    omitted: ClassVar[tuple[str, ...]] = ()
    #: The types that are named to a client which sends none.
    named_types: ClassVar[str] = ""

    def __init__(self, context: ParseContext) -> None:
        self._context = context

    def blocks(self, entry: Fields, place: str, name: str = "content") -> list[Block]:
        """Return the blocks of a field with content.

        Parts that no model can read are recorded as ignored. Raises BadRequest if that leaves
        nothing of a user's message: without it, the model would answer an earlier one.
        """
        content = entry.value(name)
        if content is None:
            return []
        if isinstance(content, str):
            return text_blocks(content)
        blocks: list[Block] = []
        parts: list[Fields] = []
        for part in self._entries(entry, place, name):
            if isinstance(part, Fields):
                parts.append(part)
                blocks += self.part(part, place)
            else:
                blocks += text_blocks(part)
        must_hold = place == "user" and isinstance(content, list) and not blocks
        for part in parts if must_hold else ():
            if part.text("type") not in (None, *self.readable):
                raise part.invalid(
                    "type", "a type that a model can read: text, an image or a file"
                )
        return blocks

    def _entries(self, entry: Fields, place: str, name: str) -> Iterator[Fields | str]:
        """Yield the parts of content that is not a text, and texts that stand among them."""
        raise NotImplementedError

    def part(self, part: Fields, place: str) -> list[Block]:
        kind = part.text("type")
        if kind is None:
            raise part.invalid("type", self.named_types)
        if kind in self.omitted:
            return []
        if kind not in self.readers:
            self._context.ignore(part.path)
            return []
        blocks: list[Block] = getattr(self, self.readers[kind])(part)
        return blocks

    def _text(self, part: Fields) -> list[Block]:
        text = part.text("text")
        if text is None:
            raise part.invalid("text", "a string")
        return text_blocks(text)

    def _tool_use(self, part: Fields) -> list[Block]:
        call_id, name = part.text("id") or "", part.required_text("name")
        return [call_block(call_id, name, parse_arguments(part.object.get("input")))]

    def _tool_result(self, part: Fields) -> list[Block]:
        call_id, content = part.text("tool_use_id") or "", self.blocks(part, "tool")
        return [result_block(call_id, content, failed=part.flag("is_error"))]

    # -- images and files ---------------------------------------------------------------------

    def _image(self, part: Fields) -> list[Block]:
        """Return the blocks of an image in the format of Anthropic or of MCP."""
        source = part.child("source")
        if source is not None:
            return self._source(source, Attachment("", "", image_only=True))
        if not part.has("data"):
            raise part.invalid("source", "an object with the image")
        media_type = part.text("mimeType") or part.text("mime_type") or ""
        return self._context.attachments.blocks(Attachment(
            part.required_text("data"), part.path_of("data"), media_type, image_only=True
        ))

    def _document(self, part: Fields) -> list[Block]:
        source = part.child("source")
        if source is None:
            raise part.invalid("source", "an object with the document")
        labels = self._labels(part, "title", "context")
        if source.text("type") == "text":
            return caption_blocks(labels) + text_blocks(source.text("data") or "")
        if source.text("type") == "content":
            return caption_blocks(labels) + self.blocks(source, "tool")
        return self._source(source, Attachment("", "", labels=labels))

    def _labels(self, part: Fields, *names: str) -> dict[str, str]:
        return {name: part.text(name) or "" for name in names if part.text(name)}

    def _source(self, source: Fields, sent: Attachment) -> list[Block]:
        """Return the blocks of a `source` object, which completes `sent`."""
        kind = source.text("type") or ("url" if source.has("url") else "base64")
        if kind == "file":
            raise self._not_stored(source, "file_id" if source.has("file_id") else "type")
        if kind not in ("base64", "url"):
            raise source.invalid(
                "type", "base64 or url" + ("" if sent.image_only else ", text or content")
            )
        name = "url" if kind == "url" else "data"
        return self._context.attachments.blocks(sent._replace(
            data=source.required_text(name), param=source.path_of(name),
            media_type=source.text("media_type") or "",
        ))

    def _not_stored(self, source: Fields, name: str) -> Unsupported:
        return Unsupported(
            f"{source.path_of(name)}: this server stores no files; send the file itself, as "
            "base64 data.", param=source.path_of(name),
        )


class OpenAIContent(ContentReader):
    """Reads the content parts of chat and of responses."""

    omitted = _THINKING_PARTS
    readable = (*_TEXT_PARTS, *_ATTACHMENT_PARTS, *_THINKING_PARTS, "refusal", "tool_result")
    named_types = "text, image_url or file"
    #: The places of parts that may not stand everywhere, by type.
    places: ClassVar[dict[str, tuple[str, ...]]] = {
        **dict.fromkeys(_ATTACHMENT_PARTS, ("user", "tool")),
        **dict.fromkeys(_AUDIO_PARTS, ("user",)),
        "tool_use": ("assistant",),
        "tool_result": ("user",),
    }

    readers = MappingProxyType({
        **ContentReader.readers,
        **dict.fromkeys(_TEXT_PARTS, "_text"),
        **dict.fromkeys(_IMAGE_URL_PARTS, "_image_url"),
        **dict.fromkeys(_FILE_PARTS, "_file"),
        **dict.fromkeys(_AUDIO_PARTS, "_audio"),
        "refusal": "_refusal",
    })

    def _entries(self, entry: Fields, place: str, name: str) -> Iterator[Fields | str]:
        content, path = entry.object[name], entry.path_of(name)
        if place == "tool" and not self._has_parts(content):
            # Some frameworks send the return value of a function unchanged.
            yield json_text(content)
        elif isinstance(content, dict) and "type" in content:
            yield Fields(content, path)
        elif not isinstance(content, list):
            raise entry.invalid(name, "a string or an array of parts")
        else:
            for index, each in enumerate(content):
                if isinstance(each, str):
                    yield each
                elif place == "tool" and not is_content_part(each):
                    yield json_text(each)
                else:
                    yield Fields(each, f"{path}[{index}]")

    def _has_parts(self, content: object) -> bool:
        entries = content if isinstance(content, list) else [content]
        return not entries or any(map(is_content_part, entries))

    def part(self, part: Fields, place: str) -> list[Block]:
        kind = part.text("type")
        if kind is None and part.has("text"):
            return self._text(part)
        if place in self.places.get(kind or "", (place,)):
            return super().part(part, place)
        if kind in ("tool_use", "tool_result"):
            raise part.invalid("type", self.named_types)
        if kind in _ATTACHMENT_PARTS and place == "system":
            raise BadRequest(
                f"{part.path}: images and files belong in user messages.",
                param=part.path, code="images_unsupported_in_system_messages",
            )
        self._context.ignore(part.path)
        return []

    def images(self, entry: Fields) -> list[Block]:
        """Return the images in the field `images`, each base64 data or a content part."""
        blocks: list[Block] = []
        for index, each in enumerate(entry.items("images") or ()):
            path = f"{entry.path_of('images')}[{index}]"
            if isinstance(each, str):
                sent = Attachment(each, path, image_only=True)
                blocks += self._context.attachments.blocks(sent)
            else:
                blocks += self.part(Fields(each, path), "user")
        return blocks

    def _refusal(self, part: Fields) -> list[Block]:
        return text_blocks(part.text("refusal") or "")

    def _audio(self, part: Fields) -> list[Block]:
        raise Unsupported(
            f"{part.path}: {part.text('type')} is not supported; send its content as text.",
            param=part.path_of("type"),
        )

    def _image_url(self, part: Fields) -> list[Block]:
        value, path = part.object.get("image_url"), part.path_of("image_url")
        url = Fields(value, path).text("url") if isinstance(value, dict) else value
        if not url and part.has("file_id"):
            raise self._not_stored(part, "file_id")
        if not isinstance(url, str) or not url:
            raise BadRequest(
                f"{path}: must hold the address of an image.", param=path, code="invalid_image_url"
            )
        return self._context.attachments.blocks(Attachment(url, path, image_only=True))

    def _file(self, part: Fields) -> list[Block]:
        file = part.child("file") or part
        title = file.text("filename")
        labels = {"title": title} if title else {}
        for name in ("file_data", "file_url"):
            if file.has(name):
                sent = Attachment(file.required_text(name), file.path_of(name), labels=labels)
                return self._context.attachments.blocks(sent)
        raise self._not_stored(file, "file_id" if file.has("file_id") else "file_data")


#: Blocks in messages of the system with which a tool is given to the model, and taken away again,
#: in the middle of a conversation.
TOOL_CHANGES = ("tool_addition", "tool_removal")


class MessagesContent(ContentReader):
    """Reads the blocks of Anthropic's API."""

    omitted = ("thinking", "redacted_thinking", "server_tool_use", "mcp_tool_use")
    readable = (*omitted, "text", "image", "document", "search_result", "tool_result")
    named_types = "text, image, document, tool_use or tool_result"
    #: For each place its name in error messages and the types of blocks that it may not have.
    places: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {
        "user": ("a user's message", ("tool_use",)),
        "assistant": ("an assistant's message", ("tool_result", "image", "document")),
        "system": ("a system prompt", ("tool_use", "tool_result", "image", "document")),
        "tool": ("the result of a tool", ("tool_use", "tool_result")),
    }

    readers = MappingProxyType({
        **ContentReader.readers, "search_result": "_search_result",
        "tool_reference": "_tool_reference", "compaction": "_compaction",
    })

    def _entries(self, entry: Fields, place: str, name: str) -> Iterator[Fields | str]:
        if not isinstance(entry.object[name], list):
            raise entry.invalid(name, "a string or an array of blocks")
        for part in entry.objects(name):
            is_plain = place == "tool" and not self._is_block(part.object)
            yield json_text(part.object) if is_plain else part

    def _is_block(self, value: Json) -> bool:
        """Return False for an object in a tool's result that is plain data and happens to have a
        `type`, such as an entry of a listing."""
        kind = value.get("type")
        if not isinstance(kind, str):
            return True
        if kind in _PART_FIELDS:
            return is_content_part(value)
        return kind in (*self.omitted, *self.readers) or kind.endswith("_tool_result")

    def part(self, part: Fields, place: str) -> list[Block]:
        kind = part.text("type") or ""
        if kind == "server_tool_use" or kind.endswith("_tool_result"):
            return self._server_block(part, place)
        if place == "assistant" and kind in ("thinking", "redacted_thinking"):
            return thinking_sent_back(part.object)
        if place == "system" and kind in TOOL_CHANGES:
            # What it changes is read together with the tools.
            return []
        blocks = super().part(part, place)
        place_name, refused = self.places[place]
        for block in blocks:
            if block["type"] in refused:
                raise BadRequest(
                    f"{part.path}: {block['type']} blocks are not allowed in {place_name}; "
                    "remove it.", param=part.path,
                )
        return blocks

    def _search_result(self, part: Fields) -> list[Block]:
        labels = self._labels(part, "title", "source")
        return caption_blocks(labels) + self.blocks(part, "tool")

    def _tool_reference(self, part: Fields) -> list[Block]:
        # A result of the client's tool search; the tool itself is in `tools`.
        return text_blocks(f"The tool {part.required_text('tool_name')} is loaded.")

    def _compaction(self, part: Fields) -> list[Block]:
        return text_blocks(part.text("content") or "")

    def _server_block(self, part: Fields, place: str) -> list[Block]:
        """Return a call or a result of a tool that the API ran. It is a block of its own only in an
        answer, where it is not compared."""
        block: Block = {"type": part.text("type")}
        if "content" in part.object:
            block["content"] = without_api_fields(part.object["content"])
        return [block] if place == "assistant" else text_blocks(server_block_text(block))


# ==== 16. Tools ==============================================================
# The tools, the choice among them and the output schema of a request, in the form that the model's
# API accepts. In a history, each call gets exactly one result.

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


#: The types of the API's search tool, which pass as they are, and OpenAI's for the same.
_API_SEARCH = re.compile(r"web_search_\d{8}")
_OPENAI_SEARCH = re.compile(r"web_search(?:_preview)?(?:_\d{4}_\d\d_\d\d)?")
#: The form of the search tool for requests in OpenAI's form.
_SEARCH_TYPE = "web_search_20250305"


def is_web_search(kind: str | None) -> bool:
    """Return whether a tool's type is that of a search of the web."""
    return any(pattern.fullmatch(kind or "") for pattern in (_API_SEARCH, _OPENAI_SEARCH))


def web_search_tool(entry: Fields) -> tuple[Json, tuple[str, ...]]:
    """Return the API's search tool for an entry in its own form or in OpenAI's, and the paths of
    fields that it cannot express."""
    if _API_SEARCH.fullmatch(entry.text("type") or ""):
        # claude sets `cache_control` itself.
        own = {k: v for k, v in entry.object.items() if v is not None and k != "cache_control"}
        return {**own, "name": WEB_SEARCH}, ()
    tool: Json = {"type": _SEARCH_TYPE, "name": WEB_SEARCH}
    filters = entry.settings("filters")
    for name in ("allowed_domains", "blocked_domains"):
        domains = filters.texts(name)
        if domains:
            tool[name] = list(domains)
    location = entry.settings("user_location")
    location.one_of("type", ("approximate",))
    # Chat nests it one level deeper than responses.
    place = location.settings("approximate") if location.has("approximate") else location
    names = ("city", "region", "country", "timezone")
    found = {name: place.text(name) for name in names if place.text(name)}
    if found:
        tool["user_location"] = {"type": "approximate", **found}
    return tool, entry.ignored_paths()


class ToolReader:
    """Collects the tools of a request, and reads the choice among them."""

    def __init__(self, context: ParseContext) -> None:
        self._context = context
        self._tools: list[Tool] = []
        self._entries: list[Fields] = []
        self._searches: list[Fields] = []
        #: Whether the request has a search of the web, even one that the caller may not use.
        self._names_search = False

    def add_web_search(self, entry: Fields) -> None:
        """Add a search of the web by the API. It is recorded as ignored where the caller may not
        use it; and by `chosen`, where the request has another tool of that name."""
        self._names_search = True
        if self._context.parsing.web_search:
            self._searches.append(entry)
        else:
            self._context.ignore(entry.path)

    def add(self, tool: Tool, *entries: Fields) -> None:
        """Add a tool. Fields of `entries` that have no effect are recorded as ignored."""
        self._tools.append(tool)
        self._entries += entries

    def chosen(
        self, choice: ToolChoice, allowed: Mapping[str, str] | None = None
    ) -> tuple[tuple[Tool, ...], ToolChoice]:
        """Return the tools without duplicates, and the choice; without tools, the default one.

        `allowed` maps the names of the allowed tools to their paths in the request; None allows
        all. Raises BadRequest if different tools share a name, no allowed name is known, or the
        choice requires a tool that is not there.
        """
        tools: dict[str, Tool] = {}
        for tool in self._tools:
            if tools.setdefault(tool.name, tool) != tool:
                raise BadRequest(f"tools: two tools are named {tool.name!r}.", param="tools")
        if allowed is not None:
            tools = self._only(tools, allowed)
        self._context.ignore(*dict.fromkeys(
            f"tools[].{name}" for entry in self._entries for name, value in entry.object.items()
            if name not in _TOOL_FIELDS and is_non_default(value)
        ))
        names = {*tools, *self._offer_search(tools, allowed)}
        if choice.name == WEB_SEARCH and WEB_SEARCH not in names and self._names_search:
            self._context.ignore("tool_choice")
            choice = ToolChoice(parallel=choice.parallel)
        problem = ""
        if not names and choice.forces:
            problem = "there are no tools to call"
        elif choice.kind == "tool" and choice.name not in names:
            problem = f"no tool is named {choice.name!r}"
        if problem:
            raise BadRequest(f"tool_choice: {problem}.", param="tool_choice")
        return tuple(tools.values()), choice if names else ToolChoice()

    def _offer_search(
        self, tools: Mapping[str, Tool], allowed: Mapping[str, str] | None
    ) -> tuple[str, ...]:
        """Give the context the search tool of the API if the request may use it. Return the names
        of the tools that were given."""
        is_free = WEB_SEARCH not in tools and (allowed is None or WEB_SEARCH in allowed)
        offered = self._searches[:1] if is_free else []
        self._context.ignore(*(entry.path for entry in self._searches[len(offered):]))
        for entry in offered:
            tool, ignored = web_search_tool(entry)
            self._context.server_tools = (tool,)
            self._context.ignore(*ignored)
        return (WEB_SEARCH,) if offered else ()

    def _only(self, tools: dict[str, Tool], allowed: Mapping[str, str]) -> dict[str, Tool]:
        kept = {name: tool for name, tool in tools.items() if name in allowed}
        known = {*kept, WEB_SEARCH} if self._names_search else kept.keys()
        unknown = {name: path for name, path in allowed.items() if name not in known}
        if unknown and len(unknown) == len(allowed):
            name, path = next(iter(unknown.items()))
            raise BadRequest(f"{path}: no tool is called {one_line(name, 80)!r}.", param=path)
        self._context.ignore(*unknown.values())
        return kept


def read_output_schema(schema: Fields) -> OutputSchema:
    """Return the output schema of a structured answer. Raises BadRequest if it is invalid."""
    return OutputSchema(*schema_for_model(schema.object, schema.path, is_tool=False))


_ANY_OBJECT = OutputSchema({"type": "object", "additionalProperties": True}, wrapped=False)


def schema_of_format(entry: Fields | None, schema_field: str = "schema") -> OutputSchema | None:
    """Return the schema of an answer's format, as any of the APIs writes it; None for plain text.

    Raises BadRequest, with the path of `schema_field`, if the schema is missing.
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


def uses_functions(fields: Fields) -> bool:
    """Return whether a chat request has `functions`, the form that preceded `tools`."""
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


def qualified_name(space: str, name: str) -> str:
    """Return a tool's name for the model; `space` is its namespace, empty if it has none."""
    return f"{space.rstrip('_')}__{name}" if space else name


def _tool_name(entry: Fields) -> str:
    """Return the tool's name in an entry of a tool choice; tools without a name have their type."""
    if is_web_search(entry.text("type")):
        return WEB_SEARCH
    if entry.text("type") in CLIENT_TOOLS:
        return str(entry.text("type"))
    named = entry.child("function") or entry.child("custom") or entry
    return qualified_name(entry.text("namespace") or "", named.required_text("name"))


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
        names = {
            _tool_name(tool): tool.path for tool in allowed.objects("tools")
            if tool.text("type") in served or is_web_search(tool.text("type"))
        }
        return ToolChoice("any" if mode == "required" else "auto", parallel=parallel), names
    named_kinds = (None, "function", "tool", "custom", *CLIENT_TOOLS)
    if not entry.has("name") and kind not in named_kinds and not is_web_search(kind):
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
        # The arguments were not JSON: see parse_arguments.
        return arguments["arguments"]
    reader = FreeformReader()
    return reader.feed(json_text(arguments)) + reader.close()


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


@dataclasses.dataclass
class ToolCall:
    """One tool call of a history, with its results."""

    #: The tool_use block, with an id that is unique in the history.
    block: Block
    message_index: int
    results: list[Block] = dataclasses.field(default_factory=list)


#: A key to find a call by: how the ids are compared, the id in the result, the tool's name or "".
_CallKey = tuple[str, str, str]
#: Longer ids are shortened: some clients store kilobytes in them. With the number that makes it
#: unique, an id stays below the API's limit of 64.
_CALL_ID_MAX_CHARS = 48
#: The result of a call for which the client sent none.
_NO_RESULT = "No result was given."


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


# ==== 17. Dialects ===========================================================
# Wire formats. A dialect parses a body into a Turn and renders Events; it does no input or
# output, and does not depend on claude. The first functions, shared by all dialects, turn the
# messages of clients into a prompt that the API accepts.

#: A line that Claude Code, as a client, sends at the head of its system prompt. The claude behind
#: this server would mistake a whole prompt that begins with it for such a line.
_BILLING_HEADER = re.compile(r"\A\s*x-anthropic-billing-header:[^\n]*\n?")
#: OpenClaw puts its current context into a text block at the end of the conversation and moves this
#: block there with each request. Earlier messages never contain it.
_OPENCLAW_CONTEXT = re.compile(
    r"\s*<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>.*<<<END_OPENCLAW_INTERNAL_CONTEXT>>>\s*", re.DOTALL
)


def with_marked_context(message: Message) -> Message:
    """Return the message with the context of a client in ContextBlocks."""
    if message.role != "user":
        return message
    return Message("user", [
        ContextBlock(block)
        if block["type"] == "text" and _OPENCLAW_CONTEXT.fullmatch(block["text"]) else block
        for block in message.content
    ])


def system_text(blocks: Iterable[Block]) -> str:
    """Return the text of a system prompt's blocks, without billing headers."""
    texts = (_BILLING_HEADER.sub("", block["text"], count=1)
             for block in blocks if block["type"] == "text")
    return "\n\n".join(text for text in texts if text.strip())


#: The field that names a session. The common name `session_id` is avoided: other programs only
#: group requests by it, and the requests of a group must not see each other's messages.
SESSION_FIELD = "ocp_session_id"


def _session_id(fields: Fields) -> str:
    """Return the name of the session that continues, empty if there is none."""
    session_id = fields.text(SESSION_FIELD) or ""
    if session_id and not re.fullmatch(r"[\x20-\x7e]{1,256}", session_id):
        raise fields.invalid(SESSION_FIELD, "up to 256 plain characters")
    return session_id


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


def _with_thinking_joined(messages: Iterable[Message]) -> list[Message]:
    """Return the messages with thinking in the answer that follows it, and without thinking that no
    answer follows, and empty messages: the API accepts neither."""
    result: list[Message] = []
    thinking: list[Block] = []
    for message in messages:
        if all(map(is_thinking, message.content)):
            thinking += message.content
            continue
        if thinking and message.role == "assistant":
            message = Message("assistant", [*thinking, *message.content])
        thinking = []
        result.append(message)
    return result


class Prompt(NamedTuple):
    """A system prompt and the messages after it."""

    system: str
    messages: list[Message]
    #: The client's system messages that make up `system`.
    opening: list[Message] = []
    #: The session to which the messages belong; empty = none.
    session_id: str = ""


#: The user message to add if a conversation ends with an assistant message: to continue it, to
#: process a tool result that arrived late, or to put its content into the required form.
_CONTINUE = "Continue exactly where your last message ends."
_GO_ON = "The result of an earlier tool call is there now; go on with it."
_REFORMAT = "Give the answer of this conversation in the required form."


def build_prompt(
    context: ParseContext, messages: list[Message], param: str, *, instructions: str = "",
    after_assistant: str = "", has_session: bool = True,
) -> Prompt:
    """Return the prompt of a request's messages, including system messages.

    `after_assistant` is the user message to add if the last message is the assistant's. If it is
    empty, such a request is refused, unless its tokens are only counted. A request that already
    contains assistant messages does not get the messages of its session. Raises BadRequest also
    if there is nothing to answer.
    """
    messages = _with_thinking_joined(messages)
    opening = list(itertools.takewhile(lambda each: each.role == "system", messages))
    texts = [instructions, *(system_text(message.content) for message in opening)]
    system = "\n\n".join(filter(None, texts))
    later = with_reminders(messages[len(opening):])
    session_id = _session_id(context.fields) if has_session else ""
    if session_id and not any(message.role == "assistant" for message in later):
        later = [*context.parsing.session(session_id, system), *later]
    if not later and system:
        # The API needs a user message, so instructions alone become one.
        return Prompt("", [Message("user", text_blocks(system))], session_id=session_id)
    if not later:
        raise BadRequest(f"{param}: there is nothing to answer.", param=param)
    later = _with_user_last(context, merge_adjacent(later), param, after_assistant)
    later = with_paired_results(later, context, param)
    # All tool results of the last message may have moved up to earlier calls.
    later = _with_user_last(context, later, param, _GO_ON)
    later = context.attachments.within_bounds(
        later, param, count_only=context.parsing.count_only
    )
    return Prompt(system, [*map(with_marked_context, later)], opening, session_id)


def _with_user_last(
    context: ParseContext, messages: list[Message], param: str, after_assistant: str
) -> list[Message]:
    """Return the messages with a user message at the end. Raises BadRequest if the last one is
    the assistant's and `after_assistant` is empty."""
    if messages[-1].role == "user" or context.parsing.count_only:
        return messages
    if any(map(is_server_block, messages[-1].content)):
        # The client sends an answer back that paused, so that it goes on.
        after_assistant = after_assistant or _CONTINUE
    if not after_assistant:
        raise BadRequest(
            f"{param}: the last message must have the role user; prefilling an answer is not "
            "supported.", param=param,
        )
    context.adjust("assistant_last")
    return [*messages, Message("user", text_blocks(after_assistant))]


class Dialect:
    """A wire format: parses request bodies and renders answers. Error bodies here are OpenAI's."""

    #: The name in logs and metrics.
    name = ""
    #: The fields with the limit of tokens, the preferred one first; whether 0 is a valid limit.
    token_fields: ClassVar[tuple[str, ...]] = ("max_tokens",)
    zero_tokens: ClassVar[bool] = False
    stop_fields: ClassVar[tuple[str, ...]] = ("stop",)
    max_temperature: ClassVar[int] = 2
    #: Unsupported parameters that would change the meaning of the answer, each with the reason.
    unsupported: ClassVar[Mapping[str, str]] = MappingProxyType({})
    #: Unused parameters that do not change the meaning: not reported as ignored.
    harmless: ClassVar[tuple[str, ...]] = ()

    # -- parsing ------------------------------------------------------------------------------

    def parse(self, body: object, parsing: ParseEnvironment) -> Turn:
        """Return the Turn of a JSON body. Raises BadRequest, UnknownModel or TooLarge."""
        context = ParseContext(body, parsing)
        for name, reason in self.unsupported.items():
            if is_non_default(context.fields.value(name)):
                raise Unsupported(f"{name}: {reason}.", param=name)
        return self._turn(context)

    def _turn(self, context: ParseContext) -> Turn:
        raise NotImplementedError

    def _new_turn(
        self, context: ParseContext, prompt: Prompt, reply_format: object, *,
        tools: tuple[Tool, ...] = (), choice: ToolChoice | None = None,
        output_schema: OutputSchema | None = None,
    ) -> Turn:
        """Return the Turn of a request whose other fields are read; read the options."""
        fields = context.fields
        limits = [fields.token_limit(name, zero=self.zero_tokens) for name in self.token_fields]
        options, ignored = options_for(context.model, RequestedOptions(
            max_tokens=next((limit for limit in limits if limit is not None), None),
            stop_sequences=stop_sequences(fields, *self.stop_fields),
            temperature=fields.sampling_value("temperature", self.max_temperature),
            top_p=fields.sampling_value("top_p", 1),
            # For "all tokens" clients send 0 or -1.
            top_k=fields.token_limit("top_k"),
            thinking=self._thinking(fields),
            forces_tool=choice is not None and choice.forces,
            fast_mode_field=self._fast_mode_field(fields),
        ))
        lifetime, is_ignored = cache_lifetime(fields.object, context.parsing.cache_lifetime)
        if is_ignored:
            context.ignore("cache_control.ttl")
        return Turn(
            model=context.model,
            system=prompt.system,
            messages=prompt.messages,
            options=options,
            tools=tools,
            tool_choice=choice or ToolChoice(),
            server_tools=context.server_tools,
            cache_lifetime=lifetime,
            output_schema=output_schema,
            session_id=prompt.session_id,
            stream=fields.flag("stream"),
            ignored=(*ignored, *context.ignored, *fields.ignored_paths(self.harmless)),
            adjusted=tuple(context.adjusted.items()),
            reply_format=reply_format,
        )

    def _thinking(self, fields: Fields) -> Thinking:
        return openai_thinking(fields)

    def _fast_mode_field(self, fields: Fields) -> str:
        """Return the field that asks for fast mode; empty if none does."""
        return openai_fast_mode_field(fields)

    # -- rendering ----------------------------------------------------------------------------

    def answer_body(self, turn: Turn, answers: list[Answer]) -> Json:
        """Return the body of an unstreamed answer; one Answer for each of `turn.choices`."""
        raise NotImplementedError

    def renderer(self, turn: Turn) -> Renderer:
        """Return the renderer of a streamed answer."""
        raise NotImplementedError

    def stores(self, turn: Turn) -> bool:
        """Return whether the client can refer to the answer later by its id."""
        return False

    def stored_input(self, turn: Turn) -> tuple[list[Message], list[Json]]:
        """Return the system messages and the input items to store with an answer."""
        return [], []

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
        #: The choices whose answer the client has begun to receive. Thinking does not count: it
        #: may be repeated.
        self._answered: set[int] = set()
        self._usages: list[Usage] = []
        #: The complete answer, after its last event, in dialects that store it.
        self.body: Json = {}

    def event(self, index: int, event: Event) -> bytes:
        """Return the frames of one event of choice `index`; never called with a Tick or a Pause.

        Return nothing before the first content: an error before it can still have its own HTTP
        status. Raise UpstreamFailed if claude starts the answer again after content was sent,
        because sent content cannot be taken back.
        """
        if isinstance(event, Restarted) and index in self._answered:
            raise UpstreamFailed("The connection to the API broke in the middle of the answer.")
        if isinstance(event, Finished):
            self._usages.append(event.usage)
        elif self._is_answer(event):
            self._answered.add(index)
        return self._render(index, event)

    def _is_answer(self, event: Event) -> bool:
        """Return whether the client receives content other than thinking with an event."""
        if isinstance(event, BlockStarted):
            return "thinking" not in event.block["type"]
        return isinstance(event, Delta) and event.kind in ("text", "arguments", "refusal")

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
    # The API's own tools took too many steps: the answer is not complete.
    "pause_turn": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
}


def service_tier(turn: Turn, usage: Usage) -> Json:
    """Return OpenAI's field for the speed of an answer, if the request has that field too and the
    API names the speed; else no field. OpenAI's answers call fast mode "priority"."""
    speed = usage.more.get("speed")
    if not turn.reply_format.tells_tier or speed is None:
        return {}
    return {"service_tier": "priority" if speed == "fast" else "default"}


def finish_reason(stop_reason: str | None) -> str | None:
    """Return OpenAI's reason for a stop reason of the API; None while the answer continues."""
    return None if stop_reason is None else FINISH_REASONS.get(stop_reason, "stop")


class CitedText:
    """Finds the positions of citations in the joined text of an answer. Each citation counts for
    the whole of its block."""

    def __init__(self) -> None:
        self._chars = 0
        self._block_begin = 0
        #: The citations of the current block, by address.
        self._citations: dict[str, Json] = {}

    def add(self, event: Event) -> list[Json]:
        """Add an event. Return the annotations that it completes, in OpenAI's form."""
        if isinstance(event, BlockStarted):
            self._block_begin = self._chars
            self._citations = {}
        elif isinstance(event, Delta) and event.kind == "text":
            self._chars += len(event.text)
        elif isinstance(event, Citation) and isinstance(event.citation.get("url"), str):
            self._citations[event.citation["url"]] = event.citation
        elif isinstance(event, BlockStopped):
            citations, self._citations = self._citations, {}
            return [
                {
                    "type": "url_citation", "start_index": self._block_begin,
                    "end_index": self._chars, "title": citation.get("title") or "", "url": url,
                }
                for url, citation in citations.items()
            ]
        return []


def text_annotations(blocks: Iterable[Block]) -> list[Json]:
    """Return the annotations of the joined text of an answer's blocks."""
    cited, annotations = CitedText(), []
    for block in blocks:
        if block["type"] == "text":
            cited.add(BlockStarted(0, block))
            cited.add(Delta(0, "text", block["text"]))
            for citation in block.get("citations") or ():
                cited.add(Citation(0, citation))
            annotations += cited.add(BlockStopped(0))
    return annotations


# ==== 18. Chat completions ===================================================
# POST /v1/chat/completions, and the older POST /v1/completions: the same stream with text alone.

_NO_LOG_PROBABILITIES = "log probabilities are not supported"
#: The largest `n` of a request.
MAX_CHOICES = 8
#: The largest number of answers to one legacy completions request.
MAX_PROMPTS = 128
#: Fields of a message, besides `content`, that hold media.
_MEDIA_FIELDS = ("images", "audio", "videos", "files", "attachments")


class CompletionFormat(NamedTuple):
    """What the answer to a chat or completions request repeats of it, and its form."""

    id: str
    created_s: int
    model: str
    #: Whether the stream ends with the usage.
    include_usage: bool
    #: Whether the answer names its service tier.
    tells_tier: bool = False
    #: Whether tools are called in the form that preceded `tools`.
    has_functions: bool = False
    #: The names of the tools whose input is a text.
    custom_tools: frozenset[str] = frozenset()
    #: The text at the head of each answer, in completions.
    echo: tuple[str, ...] = ()


def with_function_call(choice: Json, field: str) -> Json | None:
    """Return a choice with `function_call` in place of `tool_calls`, for requests that have
    `functions`. None for a piece of another call than the first: there is room for one."""
    said, reason = dict(choice[field]), choice["finish_reason"]
    calls = said.pop("tool_calls", ())
    if calls and calls[0].get("index"):
        return None
    if calls:
        said["function_call"] = calls[0]["function"]
    reason = "function_call" if reason == "tool_calls" else reason
    return {**choice, field: said, "finish_reason": reason}


def chat_annotations(annotations: list[Json]) -> list[Json]:
    """Return annotations in the form of chat, which nests their fields."""
    return [
        {"type": each["type"], each["type"]: {k: v for k, v in each.items() if k != "type"}}
        for each in annotations
    ]


class ChatDialect(Dialect):
    """POST /v1/chat/completions."""

    name = "chat"
    id_prefix: ClassVar[str] = "chatcmpl-"
    #: The values of `object` in an answer and in a chunk, and another field that both have.
    answer_kind: ClassVar[str] = "chat.completion"
    chunk_kind: ClassVar[str] = "chat.completion.chunk"
    fingerprint: ClassVar[Json] = {"system_fingerprint": None}
    token_fields: ClassVar[tuple[str, ...]] = (
        "max_completion_tokens", "max_tokens", "max_output_tokens"
    )
    stop_fields: ClassVar[tuple[str, ...]] = ("stop", "stop_sequences")
    harmless = ("cache_control",)
    unsupported = MappingProxyType({
        "logprobs": _NO_LOG_PROBABILITIES,
        "top_logprobs": _NO_LOG_PROBABILITIES,
        "audio": "audio output is not supported",
    })

    # -- parsing ------------------------------------------------------------------------------

    def _turn(self, context: ParseContext) -> Turn:
        fields = context.fields
        if any(item != "text" for item in fields.items("modalities") or []):
            raise Unsupported("modalities: answers are text only.", param="modalities")
        tools, choice, custom = self._tools(context)
        output_schema = chat_output_schema(fields)
        prompt = build_prompt(
            context, self._messages(context), "messages",
            after_assistant=_REFORMAT if output_schema else _CONTINUE,
        )
        form = self._format(
            context, has_functions=uses_functions(fields), custom_tools=custom
        )
        choices = fields.integer("n", 1, MAX_CHOICES) or 1
        turn = self._new_turn(
            context, prompt, form, tools=tools, choice=choice, output_schema=output_schema
        )
        return turn._replace(choices=choices)

    def _format(self, context: ParseContext, **more: Any) -> CompletionFormat:
        stream_options = context.fields.child("stream_options") or Fields({})
        return CompletionFormat(
            new_id(self.id_prefix), int(time.time()), context.model.id,
            stream_options.flag("include_usage"), context.fields.has("service_tier"), **more,
        )

    def _tools(
        self, context: ParseContext
    ) -> tuple[tuple[Tool, ...], ToolChoice, frozenset[str]]:
        """Return the tools, the tool choice, and the names of the custom tools."""
        fields, reader = context.fields, ToolReader(context)
        custom: set[str] = set()
        for entry in fields.objects("tools"):
            freeform = entry.child("custom")
            definition = entry.child("function") or entry
            # Cursor sends Anthropic's form: type "custom" with a schema in `input_schema`.
            schema = "input_schema" if entry.has("input_schema") else "parameters"
            if entry.text("type") == "custom" and schema == "parameters":
                freeform = freeform or entry
                name = freeform.required_text("name")
                reader.add(freeform_tool(freeform, name))
                custom.add(name)
            elif is_web_search(entry.text("type")) and schema == "parameters":
                reader.add_web_search(entry)
            elif entry.text("type") not in (None, "function") and schema == "parameters":
                context.ignore(entry.path)
            elif definition is entry and not entry.has("name"):
                raise entry.invalid("function", "an object")
            else:
                tool = read_tool(definition, definition.required_text("name"), schema)
                reader.add(tool, *([entry] if definition is entry else [entry, definition]))
        for entry in fields.objects("functions"):
            reader.add(read_tool(entry, entry.required_text("name"), "parameters"))
        if isinstance(fields.object.get("web_search_options"), dict):
            options = fields.value("web_search_options")
            reader.add_web_search(Fields(options, "web_search_options"))
        field = "tool_choice" if fields.has("tool_choice") else "function_call"
        return (*reader.chosen(*openai_tool_choice(fields, field)), frozenset(custom))

    def _messages(self, context: ParseContext) -> list[Message]:
        fields, reader = context.fields, OpenAIContent(context)
        entries = fields.objects("messages")
        if not entries:
            raise fields.invalid("messages", "an array with at least one message")
        messages = [Message("system", reader.blocks(fields, "system", "system"))]
        for entry in entries:
            messages.append(self._message(entry, reader))
            context.ignore(*entry.ignored_paths(entry.object.keys() - set(_MEDIA_FIELDS)))
        return messages

    def _message(self, entry: Fields, reader: OpenAIContent) -> Message:
        role = entry.text("role")
        if role in ("system", "developer"):
            return Message("system", reader.blocks(entry, "system"))
        if role == "user":
            return Message("user", reader.blocks(entry, "user") + reader.images(entry))
        if role == "assistant":
            content = reader.blocks(entry, "assistant")
            content += text_blocks(entry.text("refusal") or "")
            return Message("assistant", content + self._calls(entry, content))
        if role not in ("tool", "function"):
            raise entry.invalid("role", "system, developer, user, assistant or tool")
        # The result of a function has no id: it belongs to the call before it.
        call_id, content = entry.text("tool_call_id") or "", reader.blocks(entry, "tool")
        return Message("user", [result_block(call_id, content, name=entry.text("name"))])

    def _calls(self, entry: Fields, content: list[Block]) -> list[Block]:
        """Return the tool calls of an assistant's message that are not in its `content`.

        Some clients send a call in both places. A call in `function_call` has no id.
        """
        in_content = [block for block in content if block["type"] == "tool_use"]
        known = {(plain_id(block["id"]), block["name"]) for block in in_content}
        calls = [self._call(call) for call in entry.objects("tool_calls")]
        calls = [each for each in calls if (plain_id(each["id"]), each["name"]) not in known]
        legacy = entry.child("function_call")
        if legacy is not None:
            call = self._function_call("", legacy)
            if call["name"] not in [each["name"] for each in (*in_content, *calls)]:
                calls.append(call)
        return calls

    def _call(self, call: Fields) -> Block:
        call_id, custom = call.text("id") or "", call.child("custom")
        if custom is not None:
            arguments = {"input": custom.text("input") or ""}
            return call_block(call_id, custom.required_text("name"), arguments)
        function = call.child("function") or (call if call.has("name") else None)
        if function is None:
            raise call.invalid("function", "an object")
        return self._function_call(call_id, function)

    def _function_call(self, call_id: str, function: Fields) -> Block:
        arguments = parse_arguments(function.object.get("arguments"))
        return call_block(call_id, function.required_text("name"), arguments)

    # -- rendering ----------------------------------------------------------------------------

    def body(self, turn: Turn, kind: str, **more: object) -> Json:
        form: CompletionFormat = turn.reply_format
        return {
            "id": form.id, "object": kind, "created": form.created_s, "model": form.model, **more
        }

    def answer_body(self, turn: Turn, answers: list[Answer]) -> Json:
        choices = [
            self.choice(turn, index, "message", self._answer(turn, answer), answer.stop_reason)
            for index, answer in enumerate(answers)
        ]
        usage = self.usage(turn, (answer.usage for answer in answers))
        return self.body(
            turn, self.answer_kind, choices=choices, usage=usage, **self.fingerprint,
            **service_tier(turn, answers[0].usage),
        )

    def chunk(self, turn: Turn, choices: list[Json]) -> Json:
        return self.body(turn, self.chunk_kind, **self.fingerprint, choices=choices)

    def usage(self, turn: Turn, usages: Iterable[Usage]) -> Json:
        """Return the usage object from the usage of each choice. The tokens of a prompt that all
        choices answer are counted once."""
        choices = list(usages)
        prompts = [usage.prompt_tokens for usage in choices]
        prompt_tokens = sum(prompts) if turn.other_prompts else max(prompts)
        output_tokens = sum(usage.output_tokens for usage in choices)
        body: Json = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
            "prompt_tokens_details": {"cached_tokens": max(u.cache_read_tokens for u in choices)},
        }
        reasoning = [u.reasoning_tokens for u in choices if u.reasoning_tokens is not None]
        if reasoning:
            body["completion_tokens_details"] = {"reasoning_tokens": sum(reasoning)}
        return body

    def choice(
        self, turn: Turn, index: int, field: str, said: Json, stop_reason: str | None
    ) -> Json | None:
        """Return a choice with a "message" or a "delta", None if it would hold nothing."""
        choice = {
            "index": index, field: said, "logprobs": None,
            "finish_reason": finish_reason(stop_reason),
        }
        return with_function_call(choice, field) if turn.reply_format.has_functions else choice

    def _answer(self, turn: Turn, answer: Answer) -> Json:
        text, thinking = answer.joined("text"), answer.joined("thinking")
        message: Json = {
            "role": "assistant",
            "content": None if (answer.calls or answer.refusal) and not text else text,
            "refusal": answer.refusal or None,
        }
        if thinking:
            message["reasoning_content"] = thinking
        annotations = text_annotations(answer.blocks)
        if annotations:
            message["annotations"] = chat_annotations(annotations)
        if answer.calls:
            message["tool_calls"] = [self._written_call(turn, call) for call in answer.calls]
        return message

    def _written_call(self, turn: Turn, call: Block) -> Json:
        name = call["name"]
        if name in turn.reply_format.custom_tools:
            custom = {"name": name, "input": freeform_text(call["input"])}
            return {"id": call["id"], "type": "custom", "custom": custom}
        function = {"name": name, "arguments": json_text(call["input"])}
        return {"id": call["id"], "type": "function", "function": function}

    def renderer(self, turn: Turn) -> Renderer:
        return ChatRenderer(self, turn)


class ChatRenderer(Renderer):
    """Renderer of a streamed chat completion: one chunk for each delta."""

    def __init__(self, dialect: ChatDialect, turn: Turn) -> None:
        super().__init__(dialect, turn)
        self._chat = dialect
        self._choices = [ChatChoice(turn.reply_format) for _ in range(turn.choices)]
        #: A field of all chunks but the last, if that has the usage.
        self._no_usage: Json = {"usage": None} if turn.reply_format.include_usage else {}
        #: The field with the service tier, once the API has named the speed.
        self._tier: Json = {}

    def _is_answer(self, event: Event) -> bool:
        # Nothing is sent when a text begins, and of server blocks.
        is_sent = not isinstance(event, BlockStarted) or event.block["type"] == "tool_use"
        return is_sent and super()._is_answer(event)

    def _render(self, index: int, event: Event) -> bytes:
        if isinstance(event, Started):
            self._tier = service_tier(self._turn, event.usage)
        choices = (
            self._chat.choice(self._turn, index, "delta", delta, stop_reason)
            for delta, stop_reason in self._choices[index].deltas(event)
        )
        return b"".join(self._chunk(index, choice) for choice in choices if choice is not None)

    def _chunk(self, index: int, choice: Json) -> bytes:
        chunk = self._chat.chunk(self._turn, [choice])
        return sse_event({**chunk, **self._tier, **self._no_usage})

    def end(self) -> bytes:
        done = b"data: [DONE]\n\n"
        if not self._turn.reply_format.include_usage:
            return done
        usage = self._chat.usage(self._turn, self._usages)
        return sse_event({**self._chat.chunk(self._turn, []), **self._tier, "usage": usage}) + done


#: The field of a chat chunk for each kind of Delta.
_CHAT_FIELDS = {"text": "content", "thinking": "reasoning_content", "refusal": "refusal"}


class ChatChoice:
    """State of one choice of a streamed chat completion.

    A function call without arguments is ambiguous: its empty arguments stand for {} if the model
    finished the call, and are incomplete if the token limit cut it off. {} is therefore sent only
    with the stop reason "tool_use".
    """

    def __init__(self, form: CompletionFormat) -> None:
        self._custom_tools = form.custom_tools
        self._began = False
        self._cited = CitedText()
        #: The index of each tool call by its block, and the blocks of calls without arguments yet.
        self._calls: dict[int, int] = {}
        self._empty_calls: list[int] = []
        #: The readers of custom tools' calls, by block.
        self._readers: dict[int, FreeformReader] = {}

    def deltas(self, event: Event) -> Iterator[tuple[Json, str | None]]:
        """Yield the deltas of an event, with the stop reason of the last. The first has the
        role."""
        for delta in self._deltas(event):
            if not self._began:
                self._began = True
                yield {"role": "assistant", "content": ""}, None
            yield delta, event.stop_reason if isinstance(event, Finished) and not delta else None

    def _deltas(self, event: Event) -> Iterator[Json]:
        annotations = self._cited.add(event)
        if annotations:
            yield {"annotations": chat_annotations(annotations)}
        if isinstance(event, BlockStarted) and event.block.get("type") == "tool_use":
            yield self._call_started(event.block_index, event.block["id"], event.block["name"])
        elif isinstance(event, Delta) and event.kind == "arguments":
            yield from self._arguments(event)
        elif isinstance(event, Delta) and event.kind in _CHAT_FIELDS:
            if event.text or event.kind != "thinking":
                yield {_CHAT_FIELDS[event.kind]: event.text}
        elif isinstance(event, Finished):
            for block_index in self._empty_calls if event.stop_reason == "tool_use" else ():
                yield self._call(block_index, function={"arguments": "{}"})
            for block_index, reader in self._readers.items():
                yield from self._input(block_index, reader.close())
            yield {}

    def _call_started(self, block_index: int, call_id: str, name: str) -> Json:
        self._calls.setdefault(block_index, len(self._calls))
        if name in self._custom_tools:
            self._readers[block_index] = FreeformReader()
            custom = {"name": name, "input": ""}
            return self._call(block_index, id=call_id, type="custom", custom=custom)
        self._empty_calls.append(block_index)
        function = {"name": name, "arguments": ""}
        return self._call(block_index, id=call_id, type="function", function=function)

    def _arguments(self, event: Delta) -> Iterator[Json]:
        index = event.block_index
        if index in self._readers:
            yield from self._input(index, self._readers[index].feed(event.text))
        elif event.text and index in self._calls:
            if index in self._empty_calls:
                self._empty_calls.remove(index)
            yield self._call(index, function={"arguments": event.text})

    def _input(self, block_index: int, text: str) -> Iterator[Json]:
        """Yield the delta of a custom tool's call, unless the text is empty."""
        if text:
            yield self._call(block_index, custom={"input": text})

    def _call(self, block_index: int, **fields: object) -> Json:
        return {"tool_calls": [{"index": self._calls[block_index], **fields}]}


CHAT = ChatDialect()


class CompletionsDialect(ChatDialect):
    """POST /v1/completions: each prompt is the user's only message; each answer is a choice with
    text alone."""

    name = "completions"
    id_prefix = "cmpl-"
    answer_kind = chunk_kind = "text_completion"
    fingerprint: ClassVar[Json] = {}
    token_fields = ("max_tokens",)
    zero_tokens = True
    stop_fields = ("stop",)
    unsupported = MappingProxyType({
        "suffix": "insertion before a suffix is not supported",
        "logprobs": _NO_LOG_PROBABILITIES,
    })

    def _turn(self, context: ParseContext) -> Turn:
        prompts = self._prompts(context.fields)
        messages = [[Message("user", text_blocks(prompt))] for prompt in prompts]
        form = self._format(context, echo=prompts if context.fields.flag("echo") else ())
        turn = self._new_turn(context, Prompt("", messages[0]), form)
        return turn._replace(choices=len(prompts), other_prompts=tuple(messages[1:]))

    def _prompts(self, fields: Fields) -> tuple[str, ...]:
        """Return the prompt of each choice: every prompt `n` times."""
        prompts = fields.texts("prompt")
        each = fields.integer("n", 1, MAX_CHOICES) or 1
        if not 0 < each * len(prompts) <= MAX_PROMPTS or not all(map(str.strip, prompts)):
            raise fields.invalid(
                "prompt", f"text, or an array of texts, with at most {MAX_PROMPTS} answers in all"
            )
        return tuple(prompt for prompt in prompts for _ in range(each))

    def choice(
        self, turn: Turn, index: int, field: str, said: Json, stop_reason: str | None
    ) -> Json | None:
        if stop_reason is None and ("role" in said or "content" not in said):
            return None
        echo = turn.reply_format.echo if field == "message" else ()
        return {
            "text": (echo[index] if echo else "") + (said.get("content") or ""), "index": index,
            "logprobs": None, "finish_reason": finish_reason(stop_reason),
        }

    def renderer(self, turn: Turn) -> Renderer:
        return CompletionsRenderer(self, turn)


class CompletionsRenderer(ChatRenderer):
    """Renderer of a streamed legacy completion, which begins with the prompt to repeat."""

    def __init__(self, dialect: CompletionsDialect, turn: Turn) -> None:
        super().__init__(dialect, turn)
        self._no_usage = {}
        self._echo = dict(enumerate(turn.reply_format.echo))

    def _chunk(self, index: int, choice: Json) -> bytes:
        text = self._echo.pop(index, "") + choice["text"]
        return super()._chunk(index, {**choice, "text": text})


COMPLETIONS = CompletionsDialect()


# ==== 19. Messages ===========================================================
# POST /v1/messages. Its blocks are those of a Turn, so most of them pass as they are.


class MessagesDialect(Dialect):
    """POST /v1/messages: Anthropic's API. The reply_format of its turns is the message's id."""

    name = "messages"
    zero_tokens = True
    stop_fields = ("stop_sequences",)
    max_temperature = 1
    harmless = (
        "anthropic_beta", "anthropic_version", "betas", "cache_control", "metadata",
        "service_tier",
    )

    # -- parsing ------------------------------------------------------------------------------

    def _turn(self, context: ParseContext) -> Turn:
        fields = context.fields
        self._refuse_thread(fields)
        tools, choice = self._tools(context)
        messages = self._messages(context)
        output = fields.settings("output_config")
        older_schema = schema_of_format(fields.child("output_format"))
        output_schema = schema_of_format(output.child("format")) or older_schema
        return self._new_turn(
            context, build_prompt(context, messages, "messages"), new_id("msg_"),
            tools=tools, choice=choice, output_schema=output_schema,
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
        return Thinking(effort, 0, off_field=fields.path_of("thinking") if is_set else "")

    def _fast_mode_field(self, fields: Fields) -> str:
        return "speed" if fields.one_of("speed", ("fast", "standard")) == "fast" else ""

    def _tools(self, context: ParseContext) -> tuple[tuple[Tool, ...], ToolChoice]:
        """Return the client's own tools. Of those that Anthropic defines, the search of the web
        goes to the context; the others are recorded as ignored."""
        reader = ToolReader(context)
        for entry in self._offered(context):
            if entry.text("type") in (None, "custom"):
                name = entry.required_text("name")
                reader.add(read_tool(entry, name, "input_schema"), entry)
            elif is_web_search(entry.text("type")):
                reader.add_web_search(entry)
            else:
                context.ignore(entry.path)
        entry = context.fields.child("tool_choice") or Fields({})
        kind = entry.one_of("type", ("auto", "any", "tool", "none")) or "auto"
        name = entry.required_text("name") if kind == "tool" else ""
        parallel = not entry.flag("disable_parallel_tool_use")
        return reader.chosen(ToolChoice(kind, name, parallel))

    def _offered(self, context: ParseContext) -> list[Fields]:
        """Return the definitions of the tools that the model may use at the end of the
        conversation. A change of what is no tool of the client is recorded as ignored."""
        offered = list(context.fields.objects("tools"))
        removed = set()
        for change in self._tool_changes(context.fields):
            tool = change.child("tool") or Fields({})
            definition = tool.child("definition") or tool
            name = definition.text("name")
            if tool.text("type") not in ("tool_reference", "tool_definition") or name is None:
                context.ignore(change.path)
            elif change.text("type") == "tool_removal":
                removed.add(name)
            else:
                removed.discard(name)
                if definition is not tool:
                    offered = [each for each in offered if each.text("name") != name]
                    offered.append(definition)
        return [each for each in offered if each.text("name") not in removed]

    def _tool_changes(self, fields: Fields) -> Iterator[Fields]:
        for entry in fields.objects("messages"):
            is_listed = isinstance(entry.object.get("content"), list)
            if entry.text("role") == "system" and is_listed:
                for block in entry.objects("content"):
                    if block.text("type") in TOOL_CHANGES:
                        yield block

    def _messages(self, context: ParseContext) -> list[Message]:
        reader = MessagesContent(context)
        messages = [Message("system", reader.blocks(context.fields, "system", "system"))]
        for entry in context.fields.objects("messages"):
            role = entry.one_of("role", ("user", "assistant", "system"))
            if role is None:
                raise entry.invalid("role", "user or assistant")
            messages.append(Message(role, reader.blocks(entry, role)))
        return messages

    # -- rendering ----------------------------------------------------------------------------

    def message(self, turn: Turn, model: str, **fields: object) -> Json:
        """Return the message object; an empty `model` stands for the turn's model."""
        return {
            "id": turn.reply_format, "type": "message", "role": "assistant",
            "model": model or turn.model.id, **fields,
        }

    def usage(self, usage: Usage) -> Json:
        thinking = usage.reasoning_tokens
        details: Json = {"output_tokens_details": {"thinking_tokens": thinking}}
        return {
            "input_tokens": usage.input_tokens,
            "cache_creation_input_tokens": usage.cache_write_tokens,
            "cache_read_input_tokens": usage.cache_read_tokens,
            "output_tokens": usage.output_tokens,
            **usage.more,
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
    "server_input": ("input_json_delta", "partial_json"),
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
            self._open = event.block_index + self._offset
            self._next = self._open + 1
            return self._frame("content_block_start", index=self._open, content_block=event.block)
        if isinstance(event, Delta):
            return self._delta(event)
        if isinstance(event, Citation):
            return self._delta_frame(
                event.block_index, {"type": "citations_delta", "citation": event.citation}
            )
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
        return self._delta_frame(event.block_index, {"type": kind, field: event.text})

    def _delta_frame(self, block_index: int, delta: Json) -> bytes:
        index = self._open if self._open is not None else block_index + self._offset
        return self._frame("content_block_delta", index=index, delta=delta)

    def _close_block(self) -> bytes:
        if self._open is None:
            return b""
        index, self._open = self._open, None
        return self._frame("content_block_stop", index=index)

    def _finish(self, event: Finished) -> bytes:
        delta = {
            "stop_reason": "refusal" if self._refused else event.stop_reason,
            "stop_sequence": event.stop_sequence,
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


# ==== 20. Response items =====================================================
# The items of a response: the input items as messages of a Turn, and the blocks of an answer as
# output items.


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
        item_id, space = item.text("id") or "", item.text("namespace") or ""
        name = self.tool or qualified_name(space, item.required_text("name"))
        # Newer computer calls have `actions` instead of `action`.
        value = item.object.get(self.field, item.object.get(self.field + "s"))
        block = call_block(item.text("call_id") or item_id, name, self.read(value))
        return {**block, "item_id": item_id}

    def new_item(self, call_id: str, name_fields: Json) -> Json:
        """Return the item of a new call, without arguments; `name_fields` name its tool."""
        return {
            "id": new_id(self.id_prefix), "type": self.item_type, "status": "in_progress",
            self.field: "" if self.event else self.write({}), "call_id": call_id, **name_fields,
        }

    def finished(self, item: Json, arguments: Json) -> Json:
        return {**item, "status": "completed", self.field: self.write(arguments)}


def _without_nulls(value: object) -> Json:
    return {key: each for key, each in parse_arguments(value).items() if each is not None}


def _exec_action(arguments: Json) -> Json:
    return {"type": "exec", "env": {}, **arguments}


def _exec_arguments(action: object) -> Json:
    arguments = _without_nulls(action)
    return {k: v for k, v in arguments.items() if k != "type" and (k != "env" or v)}


#: The call form of each type of tool. The last three occur only in histories.
_CALL_FORMS = {
    "function": CallForm(
        "function_call", "fc_", "arguments", json_text, parse_arguments,
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


#: Content parts of the user that some clients send as items, without a message around them.
_PARTS_AS_ITEMS = ("text", "input_text", "input_image", "input_file", "input_audio", "input_video")
#: The types of items with the result of a call, besides "program_output".
_RESULTS = (
    "function_call_output", "custom_tool_call_output", "local_shell_call_output",
    "shell_call_output", "apply_patch_call_output", "computer_call_output", "tool_search_output",
)
#: Items of calls that another server ran: the fields with the arguments and with the results.
_HOSTED_CALLS = {
    "mcp_call": ("arguments", ("output", "error")),
    "code_interpreter_call": ("code", ("outputs",)),
}
#: Items that become a text block: the role of the message, and the fields in the text.
_ITEMS_AS_TEXT = {
    "file_search_call": ("assistant", ("queries", "results")),
    "image_generation_call": ("assistant", ("revised_prompt", "error")),
    "mcp_approval_request": ("assistant", ("server_label", "name", "arguments")),
    "mcp_approval_response": ("user", ("approve", "reason")),
}


class ItemReader:
    """Reads the input items of a request into messages."""

    def __init__(self, context: ParseContext) -> None:
        self._context = context
        self._content = OpenAIContent(context)

    def messages(self, item: Fields) -> list[Message]:
        """Return the messages of an item; items that mean nothing to a model are dropped."""
        kind = item.text("type") or "message"
        if kind in _PARTS_AS_ITEMS:
            return [Message("user", self._content.part(item, "user"))]
        if kind in _FORMS_BY_ITEM:
            return [Message("assistant", [_FORMS_BY_ITEM[kind].block(item)])]
        if kind in (*_RESULTS, "program_output"):
            content = self._result_content(item, kind)
            return [self._result(item, item.text("call_id") or item.text("id") or "", content)]
        if kind in _HOSTED_CALLS:
            return self._hosted_call(item, kind)
        if kind == "web_search_call":
            return [Message("assistant", [{"type": kind, "action": item.object.get("action")}])]
        if kind in _ITEMS_AS_TEXT:
            role, names = _ITEMS_AS_TEXT[kind]
            values = {name: item.object[name] for name in names if item.has(name)}
            return [Message(role, text_blocks(f"[{kind}]\n{json_text(values)}"))]
        is_message = item.has("role") and item.has("content") and kind != "reasoning"
        if kind == "message" or is_message:
            return [self._message(item)]
        if kind == "reasoning":
            return [Message("assistant", unsealed_thinking(item.text("encrypted_content")))]
        summary = compaction_text(item) if kind in ("compaction", "compaction_summary") else ""
        if not summary:
            self._context.ignore(item.path)
        return [Message("user", text_blocks(summary))]

    def _message(self, item: Fields) -> Message:
        role = item.one_of("role", ("system", "developer", "user", "assistant"))
        if role is None:
            raise item.invalid("role", "system, developer, user or assistant")
        role = "system" if role == "developer" else role
        return Message(role, self._content.blocks(item, role))

    def _result_content(self, item: Fields, kind: str) -> list[Block]:
        if kind == "tool_search_output":
            return json_block(item.items("tools") or [])
        output = item.object.get("output")
        if kind == "computer_call_output" and isinstance(output, dict) and output.get("image_url"):
            image = Fields({**output, "type": "input_image"}, item.path_of("output"))
            return self._content.part(image, "tool")
        field = "result" if kind == "program_output" else "output"
        content = self._content.blocks(item, "tool", field)
        if kind == "apply_patch_call_output" and not content:
            return text_blocks(item.text("status") or "")
        return content

    def _result(
        self, item: Fields, call_id: str, content: list[Block], *, failed: bool = False
    ) -> Message:
        failed = failed or item.object.get("status") == "failed"
        name = item.object.get("name")
        return Message("user", [result_block(call_id, content, name=name, failed=failed)])

    def _hosted_call(self, item: Fields, kind: str) -> list[Message]:
        """Return the messages with the call and the result of a tool that another server ran."""
        argument_field, result_fields = _HOSTED_CALLS[kind]
        name, value = item.text("name") or kind[:-len("_call")], item.object.get(argument_field)
        is_arguments = argument_field == "arguments"
        # Without an id, its result could be matched with another call.
        call_id = item.text("id") or f"hosted {item.path}"
        call = call_block(
            call_id, qualified_name(item.text("server_label") or "", name),
            parse_arguments(value) if is_arguments else {argument_field: value},
        )
        results = [item.object[field] for field in result_fields if item.has(field)]
        texts = [each if isinstance(each, str) else json_text(each) for each in results]
        content = text_blocks("\n".join(texts))
        result = self._result(item, call_id, content, failed=item.has("error"))
        return [Message("assistant", [call]), result]


#: The start of every encrypted_content that this server made.
_CONTENT_MARK = "ocp1."


def encoded_content(text: str) -> str:
    """Return the encrypted_content of an item that brings this text back."""
    return _CONTENT_MARK + base64.b64encode(text.encode("utf-8", "replace")).decode("ascii")


def decoded_content(content: str | None) -> str:
    """Return the text of an encrypted_content, "" if another server made it."""
    mark, _, data = (content or "").partition(".")
    with contextlib.suppress(ValueError):
        if mark + "." == _CONTENT_MARK:
            return base64.b64decode(data, validate=True).decode("utf-8")
    return ""


def compaction_text(item: Fields) -> str:
    """Return the text of a compaction item for the model, "" if another server made the item."""
    summary = decoded_content(item.text("encrypted_content"))
    return f"[Summary of the conversation up to here]\n{summary}" if summary else ""


def sealed_thinking(block: Block) -> Json:
    """Return the field of a reasoning item with which the client can send a block of thinking back;
    no field for other blocks, and for thinking that was cut off."""
    whole = thinking_sent_back(block)
    return {"encrypted_content": encoded_content(json_text(whole[0]))} if whole else {}


def unsealed_thinking(content: str | None) -> list[Block]:
    """Return the block of thinking in the encrypted_content of a reasoning item, nothing if another
    server made it."""
    with contextlib.suppress(ValueError):
        sent = from_json(decoded_content(content))
        return thinking_sent_back(sent) if isinstance(sent, dict) else []
    return []


def user_message_item(message: Message) -> Json:
    """Return the input item of a user's message, without its images."""
    texts = [block["text"] for block in message.content if block["type"] == "text"]
    parts = [{"type": "input_text", "text": text} for text in texts]
    return {"id": new_id("msg_"), "type": "message", "role": "user", "content": parts}


class PartForm(NamedTuple):
    """How the text of one kind of block is written: as the only part of an item."""

    #: The stem of the names of the text's events, and that of the part's events.
    event: str
    part_event: str
    #: The field of the item that holds the part.
    field: str
    #: The part without its text, and the field of the text.
    empty: Json
    text_field: str
    #: More fields of the events with the text.
    more: Json

    def part(self, text: str, annotations: Iterable[Json] = ()) -> Json:
        cited = {"annotations": list(annotations)} if annotations else {}
        return {**self.empty, self.text_field: text, **cited}

    def finished(self, item: Json, text: str, annotations: Iterable[Json] = ()) -> Json:
        status = {"status": "completed"} if "status" in item else {}
        return {**item, **status, self.field: [self.part(text, annotations)]}


_PART_FORMS = {
    "text": PartForm(
        "output_text", "content_part", "content",
        {"type": "output_text", "text": "", "annotations": [], "logprobs": []}, "text",
        {"logprobs": []},
    ),
    "refusal": PartForm(
        "refusal", "content_part", "content", {"type": "refusal"}, "refusal", {}
    ),
    "thinking": PartForm(
        "reasoning_summary_text", "reasoning_summary_part", "summary",
        {"type": "summary_text"}, "text", {},
    ),
}


_TEXT_FORM = _PART_FORMS["text"]


def new_item(forms: Mapping[str, tuple[CallForm, Json]], block: Block) -> Json:
    """Return the output item of a block that has just started. `forms` has the form of the calls
    of each tool."""
    if is_thinking(block):
        return {"id": new_id("rs_"), "type": "reasoning", "summary": []}
    if block["type"] == "tool_use":
        plain = (_CALL_FORMS["function"], {"name": block["name"]})
        form, name_fields = forms.get(block["name"], plain)
        return form.new_item(block["id"], name_fields)
    return {
        "id": new_id("msg_"), "type": "message", "status": "in_progress", "role": "assistant",
        "content": [],
    }


def _output_item(forms: Mapping[str, tuple[CallForm, Json]], block: Block) -> Json:
    item, kind = new_item(forms, block), block["type"]
    if kind == "tool_use":
        return _FORMS_BY_ITEM[item["type"]].finished(item, block["input"])
    return _PART_FORMS[kind].finished(item, block.get(kind, ""))


def new_search_item() -> Json:
    """Return the item of a search that has just started."""
    return {
        "id": new_id("ws_"), "type": "web_search_call", "status": "in_progress",
        "action": {"type": "search", "query": ""},
    }


def finished_search_item(item: Json, arguments: Json, result: Block | None) -> Json:
    """Return the item of a search that is over. A result that is no list reports a failure."""
    failed = result is not None and not isinstance(result.get("content"), list)
    action = {**item["action"], "query": str(arguments.get("query") or "")}
    return {**item, "status": "failed" if failed else "completed", "action": action}


def output_items(
    forms: Mapping[str, tuple[CallForm, Json]], blocks: list[Block], *, has_summary: bool,
    is_sealed: bool,
) -> Iterator[Json]:
    """Yield the output items of an answer. Neighbouring texts are one item: the API begins a block
    with each cited piece. A search at the end has no result: the answer was cut off in it."""
    results = {block["tool_use_id"]: block for block in blocks if "tool_use_id" in block}
    for kind, group in itertools.groupby(blocks, key=lambda block: str(block["type"])):
        found = list(group)
        if kind == "text":
            text = "".join(block["text"] for block in found)
            item = new_item(forms, found[0])
            yield _TEXT_FORM.finished(item, text, text_annotations(found))
        elif kind == "server_tool_use":
            for block in found:
                if block["name"] == WEB_SEARCH and block is not blocks[-1]:
                    result = results.get(block["id"])
                    yield finished_search_item(new_search_item(), block["input"], result)
        elif kind in ("tool_use", "refusal") or (kind == "thinking" and has_summary):
            for block in found:
                sealed = sealed_thinking(block) if is_sealed else {}
                yield {**_output_item(forms, block), **sealed}
        elif is_thinking(found[0]) and is_sealed:
            yield from ({**new_item(forms, block), **sealed_thinking(block)} for block in found)


# ==== 21. Responses ==========================================================
# POST /v1/responses and POST /v1/responses/compact.

#: Values in responses of unfinished streams, in place of the request's, which may be long.
_OMITTED_UNTIL_END: Json = {"instructions": None, "tools": []}
_NOT_STORED_INPUT = "no {}s are stored here; send the items in input"


class ResponseFormat(NamedTuple):
    """What is kept of a request to write and to store its response."""

    #: The response's id and time, and the fields of the request that it repeats.
    echo: Json
    is_stored: bool
    #: Whether the answer names its service tier.
    tells_tier: bool
    #: Whether the output has the model's thinking: as text, and sealed for the client to send back.
    has_summary: bool
    has_sealed_thinking: bool
    #: For each tool's name how its calls are written: the form, and the fields that name the tool.
    forms: Mapping[str, tuple[CallForm, Json]]
    #: The system messages of the input.
    opening: list[Message]
    #: The input items to store.
    items: list[Fields]
    #: The user's messages that a compaction keeps.
    user_items: list[Json] = []


class ResponsesDialect(Dialect):
    """POST /v1/responses: OpenAI's API in which prompts and answers are lists of items."""

    name = "responses"
    token_fields = ("max_output_tokens",)
    unsupported = MappingProxyType({
        name: _NOT_STORED_INPUT.format(name) for name in ("conversation", "prompt")
    })
    harmless = ("cache_control", "client_metadata", "include", "stream_options", "truncation")

    # -- parsing ------------------------------------------------------------------------------

    def _turn(self, context: ParseContext) -> Turn:
        fields = context.fields
        tools, choice, forms = self._tools(context)
        schema = schema_of_format(fields.settings("text").child("format"))
        schema = schema or chat_output_schema(fields)
        items = input_items(fields, context.parsing)
        prompt = build_prompt(
            context, self._messages(context, items), "input", has_session=False,
            instructions=fields.text("instructions") or "",
            after_assistant=_REFORMAT if schema else _CONTINUE,
        )
        reasoning, is_stored = fields.settings("reasoning"), fields.value("store") is not False
        include = fields.value("include")
        form = ResponseFormat(
            self._echo(context, reasoning), is_stored, fields.has("service_tier"),
            is_non_default(reasoning.value("summary")),
            isinstance(include, list) and "reasoning.encrypted_content" in include,
            forms, prompt.opening, items if is_stored else [],
        )
        return self._new_turn(
            context, prompt, form, tools=tools, choice=choice, output_schema=schema
        )

    def _echo(self, context: ParseContext, reasoning: Fields) -> Json:
        sent = context.fields.object
        text: Json = sent["text"] if isinstance(sent.get("text"), dict) else {}
        return {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "model": context.model.id,
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

    def _tools(
        self, context: ParseContext
    ) -> tuple[tuple[Tool, ...], ToolChoice, dict[str, tuple[CallForm, Json]]]:
        """Return the tools, the tool choice, and the call forms for ResponseFormat."""
        fields, reader = context.fields, ToolReader(context)
        forms: dict[str, tuple[CallForm, Json]] = {}
        for entry, space in self._tool_entries(fields):
            kind = entry.text("type") or ""
            if is_web_search(kind):
                reader.add_web_search(entry)
                continue
            tool = self._tool(entry, kind, space)
            if tool is None:
                context.ignore(entry.path)
                continue
            reader.add(tool, *([entry] if kind == "function" else []))
            name_fields: Json = {} if kind in CLIENT_TOOLS else {"name": entry.text("name")}
            if space:
                name_fields["namespace"] = space
            forms[tool.name] = (_CALL_FORMS[kind], name_fields)
        return (*reader.chosen(*openai_tool_choice(fields, "tool_choice")), forms)

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

    def _messages(self, context: ParseContext, items: list[Fields]) -> list[Message]:
        """Return the stored messages of the previous response, followed by those of the input."""
        previous_id = context.fields.text("previous_response_id")
        earlier = context.parsing.recall(previous_id) if previous_id else []
        messages = [Message(message.role, list(message.content)) for message in earlier]
        reader = ItemReader(context)
        for item in items:
            messages += reader.messages(item)
        return messages

    # -- rendering ----------------------------------------------------------------------------

    def body(self, turn: Turn, status: str, output: list[Json], **more: object) -> Json:
        return {
            **turn.reply_format.echo, "status": status, "output": output, "usage": None,
            "error": None, "incomplete_details": None, **more,
        }

    def partial_body(self, turn: Turn, status: str, output: list[Json], **more: object) -> Json:
        """Return the response object of an unfinished stream, without the long fields. SDKs
        require `tools` in each."""
        return self.body(turn, status, output, **{**_OMITTED_UNTIL_END, **more})

    def final_body(self, turn: Turn, output: list[Json], stop_reason: str, usage: Usage) -> Json:
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
            **service_tier(turn, usage),
        )

    def answer_body(self, turn: Turn, answers: list[Answer]) -> Json:
        answer, form = answers[0], turn.reply_format
        refused = [{"type": "refusal", "refusal": answer.refusal}] if answer.refusal else []
        blocks = [*answer.blocks, *refused]
        output = list(output_items(
            form.forms, blocks, has_summary=form.has_summary, is_sealed=form.has_sealed_thinking
        ))
        return self.final_body(turn, output, answer.stop_reason, answer.usage)

    def renderer(self, turn: Turn) -> Renderer:
        return ResponsesRenderer(self, turn)

    def stores(self, turn: Turn) -> bool:
        return bool(turn.reply_format.is_stored)

    def stored_input(self, turn: Turn) -> tuple[list[Message], list[Json]]:
        # `instructions` are for one response only.
        return turn.reply_format.opening, [stored_item(item) for item in turn.reply_format.items]


#: Error codes, besides invalid_prompt, after which Codex does not retry.
_FINAL_CODES = ("context_length_exceeded", "insufficient_quota")


class ResponsesRenderer(Renderer):
    """Renderer of a streamed response.

    The stream is response.created and .in_progress, then the items one after another, then
    response.completed, .incomplete or .failed. Each item has output_item.added, the events of its
    part or arguments, and output_item.done.

    At most one item is open. It is closed as late as possible:

    - BlockStopped does not close it: claude sends one also for a block cut off by the token limit.
    - The next block, or a stop reason "tool_use", proves that the item is complete. A text goes on
      in a text block that follows it.
    - At any other end, a text is closed as it is; a call is closed only if its arguments are valid
      JSON and not empty. An incomplete call gets no output_item.done: Codex would run it.
    """

    def __init__(self, dialect: ResponsesDialect, turn: Turn) -> None:
        super().__init__(dialect, turn)
        self._responses = dialect
        self._sequence_number = 0
        self._output: list[Json] = []
        #: The open item, and how it is written: one of the two forms.
        self._item: Json | None = None
        self._part: PartForm | None = None
        self._call: CallForm | None = None
        #: The block of thinking that the item brings back, without its text; None = it does not.
        self._sealed: Block | None = None
        #: Whether it is a search of the API, which has neither form.
        self._is_search = False
        #: The sources of a text: where they stand, and the annotations that were sent.
        self._cited = CitedText()
        self._annotations: list[Json] = []
        #: For the call of a custom tool: the reader of its input.
        self._reader: FreeformReader | None = None
        #: The pieces of the open item, as they came and as they were sent.
        self._pieces: list[str] = []
        self._sent: list[str] = []

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
        if isinstance(event, Finished):
            return self._finish(event)
        frames = b""
        if isinstance(event, BlockStarted):
            frames = self._start_block(event.block)
        elif isinstance(event, Delta):
            opened = self._open({"type": "refusal"}) if event.kind == "refusal" else b""
            frames = opened + self._delta(event)
        elif isinstance(event, BlockStopped) and self._is_search:
            frames = self._event("web_search_call.searching")
        return frames + self._annotate(self._cited.add(event))

    def _start_block(self, block: Block) -> bytes:
        if block["type"] == "text" and self._item is not None and self._part is _TEXT_FORM:
            return b""
        if self._is_search:
            return self._close_search(block) + self._open(block)
        return self._close(is_complete=True) + self._open(block)

    def _annotate(self, annotations: list[Json]) -> bytes:
        """Return the events of new annotations of the open text."""
        frames = b""
        for each in annotations if self._item is not None else ():
            index = len(self._annotations)
            frames += self._event(
                "output_text.annotation.added", annotation_index=index, annotation=each
            )
            self._annotations.append(each)
        return frames

    def _open_search(self) -> bytes:
        self._item, self._part, self._call = new_search_item(), None, None
        self._pieces, self._is_search = [], True
        added = self._begin() + self._item_event("added", self._item)
        return added + self._event("web_search_call.in_progress")

    def _close_search(self, block: Block) -> bytes:
        """Return the events that end the open search. `block` follows it: its result, or the next
        of several searches."""
        result = block if "tool_use_id" in block else None
        arguments = parse_arguments("".join(self._pieces))
        done = finished_search_item(self._item or {}, arguments, result)
        is_over = done["status"] == "completed"
        frames = self._event("web_search_call.completed") if is_over else b""
        frames += self._item_event("done", done)
        self._output.append(done)
        self._item, self._is_search = None, False
        return frames

    def _open(self, block: Block) -> bytes:
        kind, form = block["type"], self._turn.reply_format
        self._sealed = dict(block) if is_thinking(block) and form.has_sealed_thinking else None
        if kind == "server_tool_use" and block["name"] == WEB_SEARCH:
            return self._open_search()
        is_hidden = kind == "thinking" and not form.has_summary
        has_form = kind in ("tool_use", *_PART_FORMS) and not is_hidden
        if not has_form and self._sealed is None:
            return b""
        item = new_item(form.forms, block)
        self._item, self._pieces, self._sent = item, [], []
        self._cited, self._annotations = CitedText(), []
        self._part = None if is_hidden else _PART_FORMS.get(kind)
        self._call = _FORMS_BY_ITEM.get(item["type"])
        self._reader = FreeformReader() if self._call is _CALL_FORMS["custom"] else None
        if self._call is not None and not self._call.event:
            return self._begin()
        return self._begin() + self._item_event("added", item) + self._part_event("added", "")

    def _item_event(self, step: str, item: Json) -> bytes:
        """Return the event of the open item. `step` is "added" or "done"."""
        index = len(self._output)
        return self._frame(f"response.output_item.{step}", output_index=index, item=item)

    def _part_event(self, step: str, text: str) -> bytes:
        """Return the event of the open item's part, nothing for a call."""
        if self._part is None:
            return b""
        part = self._part.part(text, self._annotations)
        return self._event(f"{self._part.part_event}.{step}", part=part)

    def _event(self, stem: str, **fields: object) -> bytes:
        """Return an event that refers to the open item and its part."""
        position: Json = {"output_index": len(self._output)}
        if self._item is not None:
            position["item_id"] = self._item["id"]
        if self._part is not None:
            position[f"{self._part.field}_index"] = 0
        return self._frame(f"response.{stem}", **position, **fields)

    def _delta(self, event: Delta) -> bytes:
        if event.kind == "signature" and self._sealed is not None:
            signature = self._sealed.get("signature", "")
            self._sealed["signature"] = signature + event.text
        if self._item is None or event.kind == "signature" or not event.text:
            return b""
        self._pieces.append(event.text)
        return self._send(event.text if self._reader is None else self._reader.feed(event.text))

    def _send(self, text: str) -> bytes:
        """Return the event of a piece of text, arguments or input."""
        form = self._part or self._call
        if not text or form is None or not form.event:
            return b""
        self._sent.append(text)
        more = self._part.more if self._part else {}
        return self._event(f"{form.event}.delta", delta=text, **more)

    def _close(self, *, is_complete: bool = False) -> bytes:
        """Return the events that close the open item, none for a call that may be incomplete."""
        item, text = self._item, "".join(self._pieces)
        if item is None:
            return b""
        done: Json | None = None
        if self._part is not None:
            frames = self._end_text(self._part, text)
            done = self._part.finished(item, text, self._annotations)
        elif self._sealed is not None:
            frames, done = b"", item
        elif self._call is not None and (text or is_complete):
            frames, done = self._end_call(item, self._call, text, is_complete)
        else:
            return b""
        if done is not None and self._sealed is not None:
            done = {**done, **sealed_thinking({**self._sealed, "thinking": text})}
        if done is not None:
            frames += self._item_event("done", done)
            self._output.append(done)
        self._item = None
        return frames

    def _end_text(self, form: PartForm, text: str) -> bytes:
        said = self._event(f"{form.event}.done", **{form.text_field: text}, **form.more)
        return said + self._part_event("done", text)

    def _end_call(
        self, item: Json, form: CallForm, arguments: str, is_complete: bool
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
        done = form.finished(item, parse_arguments(arguments))
        if not form.event:
            return self._item_event("added", item), done
        frames, value = b"", arguments or "{}"
        if self._reader is not None:
            frames = self._send(self._reader.close())
            value = "".join(self._sent)
            done = {**done, form.field: value}
        end = self._event(f"{form.event}.done", name=item["name"], **{form.field: value})
        return frames + end, done

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
        form = turn.reply_format._replace(user_items=user_items)
        return turn._replace(reply_format=form)

    def answer_body(self, turn: Turn, answers: list[Answer]) -> Json:
        summary = answers[0].joined("text")
        if not summary.strip():
            raise UpstreamFailed("The model gave no summary of the conversation.")
        done = super().answer_body(turn, answers)
        item: Json = {
            "id": new_id("cmp_"), "type": "compaction",
            "encrypted_content": encoded_content(summary),
        }
        return {
            "id": done["id"], "object": "response.compaction", "created_at": done["created_at"],
            "output": [*turn.reply_format.user_items, item], "usage": done["usage"],
        }


COMPACTION = CompactionDialect()


# ==== 22. Claude protocol ====================================================
# Control requests and their replies, and the tools of the client, which claude calls by such
# requests. No pipes and no processes here, nor in the next section.
# Facts about the protocol were measured on the versions that the contract tests run (2.1.197 and
# the newest).

#: The oldest claude that the contract tests have run against.
OLDEST_CLAUDE = (2, 1, 197)
#: The first tested version that honours "client_composed", which prevents slash commands.
CLIENT_COMPOSED_SINCE = (2, 1, 329)
#: The first tested version that can rewind to before the first user message. Older versions need an
#: earlier answer in front of it.
REWINDS_ALL_SINCE = (2, 1, 329)
#: The first tested version whose interrupt can drop a message that it has not begun to answer
#: (`cancel_queued`). A plain interrupt does nothing then, and the answer runs to its end.
CANCELS_QUEUED_SINCE = (2, 1, 329)
#: The first tested version that puts its reminders (environment, model, date) beside the first
#: message that asks. Older versions put them beside the first message of the conversation.
REMINDS_WHERE_ASKED_SINCE = (2, 1, 329)

Version = tuple[int, ...]

#: The tool with which the model returns an answer that has an output schema.
STRUCTURED_OUTPUT = "StructuredOutput"
#: Tool names with a special meaning for claude. A tool named ToolSearch, for example, would make it
#: hold back all other tools of the client.
_RESERVED_TOOL_NAMES = (STRUCTURED_OUTPUT, "ToolSearch", *PROTOTYPE_NAMES)
#: The longest tool result that claude passes on whole; of a longer one it keeps a preview.
MAX_RESULT_CHARS = 400_000
#: claude passes on the text of a failed call, of a longer one the two ends, and no images.
_MAX_FAILURE_CHARS = 10_000
#: What the model is told of a result without content. claude would choose words of its own.
_NO_OUTPUT = "(no output)"
#: The name under which claude knows the client's tools.
TOOL_SERVER = "client"
#: The variable with the number of tokens from which claude refuses a prompt by itself, without a
#: request to the API: a value that no prompt reaches, and one that every prompt reaches.
BLOCKING_LIMIT = "CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE"
UNREACHED_LIMIT = "1000000000"
_REACHED_LIMIT = "1"


def _line(value: Json) -> bytes:
    return to_json(value) + b"\n"


def _object(value: object) -> Json:
    """Return `value` if it is a JSON object, else an empty object."""
    return value if isinstance(value, dict) else {}


def control_line(subtype: str, *, request_id: str = "", **fields: object) -> bytes:
    """Return a control request. claude answers each request by its id."""
    request = {"subtype": subtype, **fields}
    request_id = request_id or new_id("r")
    return _line({"type": "control_request", "request_id": request_id, "request": request})


def control_reply(line: Json, request_id: str) -> Json | None:
    """Return the reply to this control request, an error too; None for another line."""
    response = _object(line.get("response"))
    is_reply = line.get("type") == "control_response" and response.get("request_id") == request_id
    return response if is_reply else None


def _reply_line(request_id: object, response: Json) -> bytes:
    success = {"subtype": "success", "request_id": request_id, "response": response}
    return _line({"type": "control_response", "response": success})


#: Makes claude tell, before it ends a turn that failed, what the API said. Its own message for some
#: failures leaves that out: of a prompt that is too long it does not tell the number of tokens.
_FAILURE_HOOKS = {"StopFailure": [{"hookCallbackIds": ["failure"]}]}


def hook_reply(line: Json) -> bytes:
    """Return the reply to claude's call of a hook; empty for another control request."""
    if _object(line.get("request")).get("subtype") != "hook_callback":
        return b""
    return _reply_line(line.get("request_id"), {})


def _refusal_line(request_id: object) -> bytes:
    """Return the reply to a control request of claude that is not supported here."""
    response = {"subtype": "error", "request_id": request_id, "error": "not supported"}
    return _line({"type": "control_response", "response": response})


def wire_name(name: str) -> str:
    """Return a name that the API accepts for a tool: the same name if it can be used."""
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) and name not in _RESERVED_TOOL_NAMES:
        return name
    tail = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:50] + "_" + tail


def earlier_call(block: Block, tools: Mapping[str, Tool]) -> Block:
    """Return a tool call of the history with its arguments as the model wrote them. `tools` maps
    names to tools."""
    tool = tools.get(block["name"])
    if tool is None or not (tool.wrapped or tool.renamed):
        return block
    own_names = {own: name for name, own in tool.renamed}
    arguments = rename_properties(block["input"], own_names)
    return {**block, "input": {WRAPPER_NAME: arguments} if tool.wrapped else arguments}


def failure_text(result: Block) -> str | None:
    """Return the text that claude makes of the result of a failed call, or would make if it were
    told. None if it would leave out a part."""
    texts = [block["text"] for block in result["content"] if block["type"] == "text"]
    text = "\n".join(texts).strip() or _NO_OUTPUT
    chars = len(text.encode("utf-16-le", "surrogatepass")) // 2
    is_whole = len(texts) == len(result["content"]) and chars <= _MAX_FAILURE_CHARS
    return text if is_whole else None


def mcp_content(result: Block) -> list[Json] | None:
    """Return the content of a tool result in MCP's form; None when MCP has no form for it or when
    it is too long."""
    if result.get("is_error"):
        text = failure_text(result)
        return None if text is None else text_blocks(text)
    blocks = result["content"] or text_blocks(_NO_OUTPUT)
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
    """An MCP server with the client's tools. claude talks to it in control requests. It has no
    input or output of its own: lines in, lines out. A call gets its reply when the client has sent
    the result, which can be much later. claude sends one call at a time, so a result can arrive
    before its call."""

    def __init__(self, tools: tuple[Tool, ...]) -> None:
        self._tools = tools
        self._calls: dict[str, tuple[object, object]] = {}
        self._results: dict[str, Json] = {}

    def reply(self, line: Json) -> bytes:
        """Return the reply to a control request of claude; empty when the result is not here
        yet."""
        message = _object(_object(line.get("request")).get("message"))
        if not message:
            return _refusal_line(line.get("request_id"))
        if message.get("method") == "tools/call":
            return self._call(line.get("request_id"), message)
        if message.get("method") == "notifications/cancelled":
            self._forget_call(_object(message.get("params")).get("requestId"))
        result = self._mcp_result(message)
        answer: Json = {"jsonrpc": "2.0", "id": message.get("id", 0)}
        if result is None:
            answer["error"] = {"code": -32601, "message": "not served here"}
        else:
            answer["result"] = result
        return _reply_line(line.get("request_id"), {"mcp_response": answer})

    def _mcp_result(self, message: Json) -> Json | None:
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
                        # claude would write a longer result to a file and give the model a preview.
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
        return self._pending_replies()

    def _forget_call(self, rpc_id: object) -> None:
        """Forget a call whose turn was interrupted."""
        self._calls = {call_id: call for call_id, call in self._calls.items() if call[1] != rpc_id}

    def deliver(self, results: Iterable[Block]) -> bytes:
        """Store the client's results. Return the replies to calls that have their results."""
        for block in results:
            content = mcp_content(block) or []
            result = {"content": content, "isError": bool(block.get("is_error"))}
            self._results[block["tool_use_id"]] = result
        return self._pending_replies()

    def _pending_replies(self) -> bytes:
        lines = b""
        for call_id in [call_id for call_id in self._calls if call_id in self._results]:
            request_id, rpc_id = self._calls.pop(call_id)
            result = self._results.pop(call_id)
            response = {"jsonrpc": "2.0", "id": rpc_id, "result": result}
            lines += _reply_line(request_id, {"mcp_response": response})
        return lines


# ==== 23. Claude input =======================================================
# What a request becomes on claude's standard input: messages, options, a history in steps; and how
# claude drops a question again.


def escape_slash_command(content: list[Block], version: Version) -> list[Block]:
    """Return the content so that no version of claude runs its last text as a slash command.
    Versions before CLIENT_COMPOSED_SINCE run it unless a space comes first."""
    last = content[-1] if content else {}
    text = last.get("text")
    if version >= CLIENT_COMPOSED_SINCE or not isinstance(text, str) or text[:1] != "/":
        return content
    return [*content[:-1], {**last, "text": " " + text}]


class RewindPoint(NamedTuple):
    """A user message that a claude process holds. The process can be rewound to the state before
    it, once it is the last one."""

    #: The UUID of the line that sent the user message.
    id: str
    #: The number of messages before the user message.
    message_index: int


#: claude scales down an image with a longer side or more bytes than these, except in results of the
#: client's tools. The API rejects such images there, at least by their side when there are many
#: images.
_MAX_UNSCALED_SIDE = 2_000
_MAX_UNSCALED_BYTES = 3_932_160
#: The base64 characters to decode of an image: its sides stand within them.
_HEAD_CHARS = 349_524


def _needs_scaling(block: Block) -> bool:
    data = block["source"].get("data") or ""
    head = binascii.a2b_base64(data[:_HEAD_CHARS])
    return base64_bytes(data) > _MAX_UNSCALED_BYTES or largest_side(head) > _MAX_UNSCALED_SIDE


def extract_large_images(content: list[Block]) -> list[Block]:
    """Return the content with large images moved from the tool results to after them, where
    claude scales images. Text blocks connect each image with its result."""
    extracted: list[Block] = []

    def replaced(block: Block) -> Block:
        if block["type"] != "image" or not _needs_scaling(block):
            return block
        name = f"Image {len(extracted) // 2 + 1} of the results"
        extracted.extend([{"type": "text", "text": f"{name}:"}, block])
        return {"type": "text", "text": f"[{name} is below.]"}

    results = [
        {**block, "content": [replaced(inner) for inner in block["content"]]}
        for block in content if block["type"] == "tool_result"
    ]
    rest = [block for block in content if block["type"] != "tool_result"]
    return [*results, *extracted, *rest] if extracted else content


def _api_call_id(call_id: str) -> str:
    """Return the id of a call as the API wrote it: plain ids lack the mark in it."""
    return re.sub(r"\Atoolu(?=[0-9])", "toolu_", call_id)


def _as_claude_writes(block: Block) -> Block:
    """Return a block of a history as claude itself would have written it: with the id and the name
    of its call as the API knows them, and a result in the form that it gets when it is given to the
    call, down to the order of its fields."""
    if block["type"] == "tool_use":
        return {**block, "id": _api_call_id(block["id"]), "name": wire_name(block["name"])}
    if block["type"] != "tool_result":
        return block
    call = {"tool_use_id": _api_call_id(block["tool_use_id"])}
    text = failure_text(block) if block.get("is_error") else None
    if text is not None:
        return {"type": "tool_result", "content": text, "is_error": True, **call}
    content = block["content"] or text_blocks(_NO_OUTPUT)
    return {**call, **block, **call, "content": content}


def message_line(
    message: Message, version: Version, *, ask: bool, line_id: str = "", model_id: str = "",
) -> bytes:
    """Return the line for one message of the conversation. With `ask` claude answers the message;
    without it the message is history. `line_id` is the UUID of a user message. claude keeps the
    thinking of an earlier answer if it is said to be from the model of the process, `model_id`;
    2.1.197 compares the exact id, and no version expects the mark of the long context window."""
    body: Json = {"role": message.role, "content": message.content}
    line: Json = {
        "type": message.role,
        "message": body,
        "parent_tool_use_id": None,
        "session_id": "default",
    }
    if message.role == "assistant":
        # 2.1.197 merges answers without an id, even across the results between them.
        body["id"] = new_id("msg_")
        if any(map(is_thinking, message.content)):
            body["model"] = model_id
    else:
        body["content"] = escape_slash_command(extract_large_images(message.content), version)
        # Without this, newer versions run slash commands and read files named with an @.
        line["client_composed"] = True
        if not ask:
            line["shouldQuery"] = False
        if line_id:
            line["uuid"] = line_id
    body["content"] = [_as_claude_writes(block) for block in body["content"]]
    return _line(line)


def _tool_choice_body(choice: ToolChoice) -> Json | None:
    """Return the API's tool_choice; None for the default."""
    if choice.kind == "auto" and choice.parallel:
        return None
    body: Json = {"type": choice.kind}
    if choice.kind == "tool":
        body["name"] = wire_name(choice.name)
    if not choice.parallel and choice.kind != "none":
        body["disable_parallel_tool_use"] = True
    return body


#: claude truncates longer descriptions of tools.
_MAX_DESCRIPTION_CHARS = 2_000


#: The words in which claude describes the tool for a structured answer.
_STRUCTURED_DESCRIPTION = (
    "Use this tool to return your final response in the requested structured format. You MUST call "
    "this tool exactly once at the end of your response to provide the structured output."
)


def _structured_tool(schema: OutputSchema) -> Json:
    """Return claude's tool for a structured answer in the API's form."""
    return {
        "name": STRUCTURED_OUTPUT, "description": _STRUCTURED_DESCRIPTION,
        "input_schema": schema.schema,
    }


def tools_body(tools: tuple[Tool, ...], more: tuple[Json, ...] = ()) -> list[Json]:
    """Return all tools in the API's form if claude would change their descriptions, or cannot
    offer `more` tools; else an empty list. The list takes the place of claude's own."""
    texts = [tool.description for tool in tools]
    is_plain = all(text.isascii() and len(text) <= _MAX_DESCRIPTION_CHARS for text in texts)
    if is_plain and not more:
        return []
    client_tools: list[Json] = [
        {
            "name": wire_name(tool.name),
            "description": tool.description,
            "input_schema": tool.schema,
        }
        for tool in sorted(tools, key=lambda tool: wire_name(tool.name))
    ]
    return [*client_tools, *more]


def lifetime_environment(lifetime: str) -> dict[str, str]:
    """Return the environment that makes claude ask for this lifetime in the API's prompt cache;
    empty = as claude decides. Newer versions have CLAUDE_CODE_PROMPT_CACHE_TTL for that; these two
    variables work in all."""
    return {
        "FORCE_PROMPT_CACHING_5M": "1" if lifetime == "5m" else "",
        "ENABLE_PROMPT_CACHING_1H": "1" if lifetime == "1h" else "",
    }


def settings_lines(
    options: Options, choice: ToolChoice, tools: tuple[Tool, ...] = (),
    more_tools: tuple[Json, ...] = (), lifetime: str = "",
) -> bytes:
    """Return the control requests that set the options of one request; empty when there are none.
    Pass `tools` only when the model gets no others but `more_tools`, which are in the API's form:
    they then go to the API unchanged."""
    extra: Json = dict(options.sampling)
    body = tools_body(tools, more_tools)
    if body:
        extra["tools"] = body
    if options.api_stops:
        extra["stop_sequences"] = list(options.api_stops)
    choice_body = _tool_choice_body(choice)
    if choice_body is not None:
        extra["tool_choice"] = choice_body
    if options.thinking_type:
        extra["thinking"] = {"type": options.thinking_type}
    env = lifetime_environment(lifetime) if lifetime else {}
    if options.max_tokens is not None:
        env["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(max(1, options.max_tokens))
    if extra:
        env["CLAUDE_CODE_EXTRA_BODY"] = to_json(extra).decode("utf-8")
    settings: Json = {}
    if env:
        settings["env"] = env
    if options.effort is not None:
        settings["effortLevel"] = options.effort
    if options.fast_mode:
        settings["fastMode"] = True
    lines = control_line("apply_flag_settings", settings=settings) if settings else b""
    if options.thinking_tokens is not None:
        lines += _thinking_line(options)
    return lines


def _thinking_line(options: Options) -> bytes:
    """Return the control request that sets the thinking budget."""
    return control_line("set_max_thinking_tokens", max_thinking_tokens=options.thinking_tokens)


def _rebuild_options(turn: Turn) -> Options:
    """Return the options for a conversation that is rebuilt. A model that thinks by budget needs
    the thinking before a tool call back together with the result. Where the history lacks it,
    thinking is switched off."""
    *earlier, last = turn.messages
    if turn.model.thinking != "budget" or not last.has_results:
        return turn.options
    if earlier and is_thinking(earlier[-1].content[0]):
        return turn.options
    return turn.options._replace(thinking_tokens=0)


def _told_call(turn: Turn) -> str:
    """Return what the model is told in place of a forced tool call; empty if none is needed."""
    if not turn.must_be_told_to_call:
        return ""
    name = turn.tool_choice.name
    tool = f"the tool {wire_name(name)}" if name else "one of the tools"
    return f"Call {tool} before anything else, and write nothing before the call."


def with_reminder(turn: Turn) -> Turn:
    """Return the turn whose last message tells once more to call a tool."""
    *earlier, last = turn.messages
    reminder = text_blocks("Your answer must begin with a tool call. " + _told_call(turn))
    return turn._replace(messages=[*earlier, Message(last.role, [*last.content, *reminder])])


#: What the API refuses for one model and accepts for others, by its words: the field of Model that
#: says so, the value that it has, and the pattern. The first one that fits wins: the API may name
#: thinking when it refuses a forced call.
_MODEL_REFUSALS: tuple[tuple[str, Any, re.Pattern[str]], ...] = (
    ("forced_tools", False, re.compile(r"tool_choice|forces? tool use", re.IGNORECASE)),
    # Messages about a block of thinking, or a level of effort, say nothing about switching it off.
    (
        "thinking_off", "never",
        re.compile(r"^(?!messages\.|output_config\.effort).*\bthinking\b", re.IGNORECASE),
    ),
    (
        "fast_mode", False,
        re.compile(r"^(?!messages\.|tools\.).*(?:\bspeed\b|\bfast mode\b)", re.IGNORECASE),
    ),
)


def refusal_of_model(turn: Turn, error: BadRequest) -> ModelRefusal | None:
    """Return what an error of the API shows of the turn's model; None for another error, and where
    the turn did not ask for it."""
    options, (_, choice) = turn.options, turn.tools_for_model
    asked = {
        "forced_tools": choice.forces,
        "thinking_off": options.thinking_tokens == 0 and turn.model.can_stop_thinking,
        "fast_mode": options.fast_mode,
    }
    for field, value, pattern in _MODEL_REFUSALS:
        if asked[field] and pattern.search(error.message):
            return ModelRefusal(turn.model.id, field, value)
    return None


def after_refusal(turn: Turn, refusal: ModelRefusal) -> Turn:
    """Return the turn without what the API has refused."""
    model, options = refusal.applied_to(turn.model), turn.options
    if refusal.field == "thinking_off":
        options = least_thinking(model, options._replace(sampling=()))
    is_fast = options.fast_mode and model.fast_mode
    return turn._replace(model=model, options=options._replace(fast_mode=is_fast))
def _earlier_message(message: Message, tools: Mapping[str, Tool]) -> Message:
    """Return a message of the history in a form that claude accepts. `tools` maps names to
    tools."""
    kept: list[Block] = []
    for block in message.content:
        if is_server_block(block):
            kept += text_blocks(server_block_text(block))
        elif block["type"] == "tool_use":
            kept.append(earlier_call(block, tools))
        else:
            kept.append(block)
    return Message(message.role, kept)


#: The user message that is put before a conversation that starts with the assistant.
_OPENING_TEXT = "(The user opens the conversation.)"


def _limit_line(tokens: str) -> bytes:
    """Return the control request that sets the length from which claude refuses a prompt."""
    return control_line("apply_flag_settings", settings={"env": {BLOCKING_LIMIT: tokens}})


def setup_lines(
    turn: Turn, operator_prompt: str, *, agent: bool = False, is_primed: bool = False
) -> bytes:
    """Return the lines that make a fresh process, or one that was primed (see `priming_steps`),
    ready for a conversation."""
    texts = (turn.system, operator_prompt.strip(), _told_call(turn))
    system = "\n\n".join(text for text in texts if text)
    tools, choice = turn.tools_for_model
    more_tools = turn.server_tools_for_model
    if more_tools and turn.output_schema is not None:
        more_tools = (_structured_tool(turn.output_schema), *more_tools)
    alone = not agent and (turn.output_schema is None or bool(more_tools))
    if is_primed:
        setup = _primed_setup(turn.model.argument, system, has_tools=bool(tools))
    else:
        setup = _first_setup(system, turn.output_schema, has_tools=bool(tools))
    return setup + settings_lines(
        _rebuild_options(turn), choice, tools if alone else (), more_tools, turn.cache_lifetime
    )


def _first_setup(system: str, output_schema: OutputSchema | None, *, has_tools: bool) -> bytes:
    fields: Json = {"systemPrompt": [system] if system else [], "hooks": _FAILURE_HOOKS}
    if has_tools:
        fields["sdkMcpServers"] = [TOOL_SERVER]
    if output_schema is not None:
        fields["jsonSchema"] = output_schema.schema
    return control_line("initialize", **fields)


def _primed_setup(model_id: str, system: str, *, has_tools: bool) -> bytes:
    """Return the lines for what claude takes from the first `initialize` alone, which a primed
    process has got already. It takes an output schema from nothing else."""
    lines = b""
    if system:
        # Without the last field claude asks the API to try the model. With it the model has to be
        # named as at the start.
        lines += control_line(
            "set_model", model=model_id, system_prompt=system, only_if_model_is_current=True
        )
    if has_tools:
        server = {"type": "sdk", "name": TOOL_SERVER}
        lines += control_line("mcp_set_servers", servers={TOOL_SERVER: server})
    return lines


def priming_steps() -> tuple[bytes, list[bytes]]:
    """Return the lines that make a process run once what its first question needs, which takes
    longer the first time. claude refuses the question by itself (see `is_pinned`), and then drops
    it: send the first lines, wait for that, then send the control requests of the second part, the
    first of which has to rewind."""
    point = RewindPoint(str(uuid.uuid4()), 0)
    message = Message("user", text_blocks("Hi"))
    first = _first_setup("", None, has_tools=False) + _limit_line(_REACHED_LIMIT)
    first += message_line(message, REWINDS_ALL_SINCE, ask=True, line_id=point.id)
    return first, [rewind_line(point), _limit_line(UNREACHED_LIMIT)]


def message_steps(
    turn: Turn, version: Version, setup: bytes, *, start: int = 0, pin: bool = False
) -> tuple[list[bytes], tuple[RewindPoint, ...]]:
    """Return the lines that give a process the messages from the index `start` on, as steps with
    `setup` in front, and where it can be rewound to. Wait for a `result` line after each step but
    the last, which requests the answer. Each earlier step ends with one user message: without
    waiting, claude would lose the order of the messages. Assistant messages get no `result` of
    their own.

    With `pin` the first step asks, under a limit that makes claude refuse the question by itself
    (see `is_pinned`). claude puts its reminders beside the first message that asks, so they stand
    beside the first message of the conversation, as they do where it has grown turn by turn."""
    steps: list[bytes] = []
    points: list[RewindPoint] = []
    pending = setup
    *earlier, last = _told_messages(turn, start)
    for index, message in earlier:
        is_pinned = pin and not steps and message.role == "user"
        pending += _limit_line(_REACHED_LIMIT) if is_pinned else b""
        line_id = _new_point(points, index, message)
        pending += message_line(
            message, version, ask=is_pinned, line_id=line_id, model_id=turn.model.id
        )
        if message.role == "user":
            steps.append(pending)
            pending = _limit_line(UNREACHED_LIMIT) if is_pinned else b""
    line_id = _new_point(points, *last)
    steps.append(pending + message_line(last[1], version, ask=True, line_id=line_id))
    return steps, tuple(points)


def _told_messages(turn: Turn, start: int) -> list[tuple[int, Message]]:
    """Return the messages to tell from the index `start` on, with their indexes."""
    by_name = {tool.name: tool for tool in turn.tools}
    last = len(turn.messages) - 1
    told = [(i, _earlier_message(turn.messages[i], by_name)) for i in range(start, last)]
    # claude answers no empty message, and waiting for a `result` would never end.
    told = [(index, message) for index, message in told if message.content]
    if start == 0 and told and told[0][1].role == "assistant":
        # claude loses an answer that has no message before it.
        told.insert(0, (0, Message("user", text_blocks(_OPENING_TEXT))))
    return [*told, (last, turn.messages[last])]


def _new_point(points: list[RewindPoint], index: int, message: Message) -> str:
    """Add a rewind point for a user message and return the UUID for its line. Return nothing for
    other messages, and for tool results: claude cannot rewind to before them."""
    if message.role != "user" or message.has_results:
        return ""
    points.append(RewindPoint(str(uuid.uuid4()), index))
    return points[-1].id


def lifetime_line(lifetime: str) -> bytes:
    """Return the control request that changes the lifetime in the API's prompt cache, also in the
    middle of a turn."""
    return control_line("apply_flag_settings", settings={"env": lifetime_environment(lifetime)})


def thinking_again(turn: Turn) -> bytes:
    """Return the control request that sets the thinking budget of this turn for a process that has
    served the conversation before; empty if all turns have the same. A turn that was rebuilt in a
    tool loop has none."""
    options = _rebuild_options(turn)
    can_differ = turn.model.thinking == "budget" and turn.options.thinking_tokens
    return _thinking_line(options) if can_differ or options != turn.options else b""


def rewind_line(rewind_point: RewindPoint, request_id: str = "") -> bytes:
    """Return the control request that makes an idle claude drop the user message and everything
    after it. Another message of the user must not stand behind it: it is to be dropped first."""
    return control_line(
        "rewind_conversation", request_id=request_id, target_message_uuid=rewind_point.id
    )


def was_rewound(reply: Json) -> bool:
    """Return whether the reply to `rewind_line` reports success."""
    return _object(_object(reply.get("response")).get("response")).get("rewound") is True


def interrupt_line(request_id: str) -> bytes:
    """Return the control request that ends the running turn, or drops its user message if claude
    has not begun to answer it. In the former case a `result` line follows."""
    return control_line("interrupt", request_id=request_id, cancel_queued=True)


def has_cancelled(reply: Json) -> bool:
    """Return whether the reply to `interrupt_line` reports that the turn has not begun. There will
    be no `result` line, and nothing to rewind."""
    return bool(_object(reply.get("response")).get("cancelled"))


def is_without(reply: Json) -> bool:
    """Return whether the reply to `rewind_line` says that claude does not hold the user message,
    whether or not it was dropped by this request."""
    response = _object(reply.get("response"))
    return response.get("rewound") is True or response.get("error") == "target not found"


# ==== 24. Plan and failures ==================================================
# What claude reports of the plan, and the errors that its failures become.

#: Settings that allow claude to fetch the plan's usage, which FIXED_ENVIRONMENT forbids, and that
#: forbid it again.
_MAY_READ_USAGE = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": ""}
_MUST_NOT_READ_USAGE = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}


def usage_lines() -> list[bytes]:
    """Return three control requests that read the plan's usage from an idle process and leave the
    process as it was. Each gets a reply; pass the second to `plan_report`."""
    return [
        control_line("apply_flag_settings", settings={"env": _MAY_READ_USAGE}),
        control_line("get_usage", skip_behaviors=True),
        control_line("apply_flag_settings", settings={"env": _MUST_NOT_READ_USAGE}),
    ]


#: The latest plausible reset, in epoch seconds.
_LATEST_S = 10**11


class PlanWindow(NamedTuple):
    """A usage window of the plan. Each field can be unknown."""

    #: The used share, 0 to 1.
    utilization: float | None = None
    resets_at_s: float | None = None
    status: str | None = None
    #: When the utilization was reported, once Account has the window.
    observed_s: float | None = None


class ExtraUsageBudget(NamedTuple):
    """The extra usage of the billing period, in units of the currency. None = unknown, or no
    limit."""

    is_enabled: bool | None = None
    used: float | None = None
    limit: float | None = None
    utilization: float | None = None
    currency: str | None = None


class PlanReport(NamedTuple):
    """The state of the plan as claude reports it at one time. Each part can be unknown."""

    #: Keyed by the API's names: five_hour, seven_day, seven_day_opus, ...
    windows: Mapping[str, PlanWindow]
    #: The status, the name and the reset of the window that decides.
    status: str | None = None
    claim: str | None = None
    resets_at_s: float | None = None
    overage_status: str | None = None
    overage_reason: str | None = None
    subscription: str | None = None
    #: Whether answers are billed as extra usage. The status is "rejected" then too.
    is_overage: bool | None = None
    overage_resets_at_s: float | None = None
    #: Whether usage is refused for a reason that no reset ends.
    is_final: bool = False
    budget: ExtraUsageBudget | None = None

    @property
    def is_limit_reached(self) -> bool:
        """Return whether a limit of the plan is reached. A plain 429 is "rejected" too, but is no
        limit of the plan and names no window."""
        names_window = self.claim is not None or self.resets_at_s is not None
        is_reached = self.status == "rejected" and names_window and not self.is_overage
        return is_reached or self.is_final

    @property
    def blocked_until_s(self) -> float | None:
        """Return when a limit that is reached ends: at the reset of the window or of the extra
        usage, whichever is earlier. None = never by itself, unknown, or no limit is reached."""
        resets = [self.resets_at_s, self.overage_resets_at_s]
        known = [reset_s for reset_s in resets if reset_s is not None]
        is_known = bool(known) and self.is_limit_reached and not self.is_final
        return min(known) if is_known else None


def _text_field(found: Json, name: str) -> str | None:
    value = found.get(name)
    return value if isinstance(value, str) else None


def _reset_field(found: Json, name: str) -> float | None:
    """Return a time in epoch seconds. The field holds epoch seconds or ISO 8601."""
    value = found.get(name)
    with contextlib.suppress(ValueError):
        value = parse_time(value) if isinstance(value, str) else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 < value < _LATEST_S else None


def _share_field(found: Json, whole: float) -> float | None:
    value = found.get("utilization")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # More than 1 is possible where extra usage can be bought.
    return round(value / whole, 4) if 0 <= value <= 10 * whole else None


#: Currencies that have no minor unit.
_WHOLE_CURRENCIES = ("CLP", "ISK", "JPY", "KRW", "VND")
#: The largest plausible amount, in minor units.
_LARGEST_AMOUNT = 10**12


def _amount_field(found: Json, name: str, currency: str | None) -> float | None:
    """Return an amount in units of its currency. The field holds minor units, such as cents."""
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    units = 1 if currency in _WHOLE_CURRENCIES else 100
    return round(value / units, 2) if 0 <= value <= _LARGEST_AMOUNT else None


def _budget_field(limits: Json) -> ExtraUsageBudget | None:
    found = limits.get("extra_usage")
    if not isinstance(found, dict):
        return None
    currency = (_text_field(found, "currency") or "").upper()
    known = currency if re.fullmatch("[A-Z]{3}", currency) else None
    return ExtraUsageBudget(
        found.get("is_enabled") is True, _amount_field(found, "used_credits", known),
        _amount_field(found, "monthly_limit", known), _share_field(found, 100), known,
    )


#: The most windows of single models that are kept of one report.
_MAX_MODEL_WINDOWS = 16


def _model_windows(limits: Json) -> dict[str, PlanWindow]:
    """Return the weekly windows of single models, named like those of Opus and Sonnet, which have
    fields of their own: seven_day_opus."""
    rows = limits.get("model_scoped")
    windows = {}
    for row in map(_object, rows[:_MAX_MODEL_WINDOWS] if isinstance(rows, list) else []):
        label = (_text_field(row, "display_name") or "").lower()
        name = re.sub("[^a-z0-9]+", "_", label[:40]).strip("_")
        if name:
            windows[f"seven_day_{name}"] = PlanWindow(
                _share_field(row, 100), _reset_field(row, "resets_at")
            )
    return windows


def plan_event(line: Json) -> PlanReport | None:
    """Return the plan's state from a rate_limit_event; None for other lines. An event that names no
    window, such as that of a plain 429, reports a status and no windows."""
    found = line.get("rate_limit_info")
    if line.get("type") != "rate_limit_event" or not isinstance(found, dict):
        return None
    claim, status = _text_field(found, "rateLimitType"), _text_field(found, "status")
    resets_at_s = _reset_field(found, "resetsAt")
    windows = {}
    if claim is not None:
        windows = {
            name: PlanWindow(
                _share_field(entry, 1), _reset_field(entry, "resetsAt"),
                _text_field(entry, "status"),
            )
            for name, entry in _object(found.get("unifiedWindows")).items()
            if isinstance(entry, dict)
        }
        windows.setdefault(claim, PlanWindow(_share_field(found, 1), resets_at_s, status))
    return PlanReport(
        windows, status, claim, resets_at_s,
        _text_field(found, "overageStatus"), _text_field(found, "overageDisabledReason"),
        is_overage=found.get("isUsingOverage") is True or found.get("overageInUse") is True,
        overage_resets_at_s=_reset_field(found, "overageResetsAt"),
        is_final=(
            found.get("dailyCapPaused") is True or found.get("errorCode") == "credits_required"
        ),
    )


def plan_report(reply: Json) -> PlanReport:
    """Return the plan's state from the reply to get_usage. It is empty for a login by a bare
    token."""
    found = _object(_object(reply.get("response")).get("response"))
    limits = _object(found.get("rate_limits"))
    windows = {
        name: PlanWindow(_share_field(entry, 100), _reset_field(entry, "resets_at"))
        for name, entry in limits.items()
        if isinstance(entry, dict) and "resets_at" in entry
    }
    return PlanReport(
        {**windows, **_model_windows(limits)}, budget=_budget_field(limits),
        subscription=_text_field(found, "subscription_type"),
    )


class ReportedFailure(NamedTuple):
    """A failure as claude reports it: text, claude's name for its kind, and the API's status if
    any."""

    text: str
    kind: str
    status: int | None


def api_message(details: str) -> str:
    """Return the message of the API's error in claude's `error_details`, such as
    `400 {"type":"error","error":{"type":"...","message":"..."}}`; empty if there is none."""
    body: Json = {}
    with contextlib.suppress(ValueError):
        body = _object(from_json(details[details.find("{"):]))
    return _text_field(_object(body.get("error")), "message") or ""


LOGIN_ADVICE = (
    "claude on the server is not logged in: run `claude auth login` there, or on a machine "
    "without a browser `claude setup-token` and set CLAUDE_CODE_OAUTH_TOKEN for the server."
)

_ERROR_BY_STATUS: dict[int, type[OcpError]] = {
    400: BadRequest, 401: LoginLost, 402: PlanLimit, 403: UpstreamForbidden, 404: UnknownModel,
    408: UpstreamTimeout, 413: TooLarge, 429: RateLimited, 504: UpstreamTimeout,
    529: Overloaded,
}
#: Kinds of failures that are more exact than the status beside them.
_ERROR_BY_KIND_FIRST: dict[str, type[OcpError]] = {
    "account_on_hold": UpstreamForbidden,
    "billing_error": PlanLimit,
    "cloud_credential_error": UpstreamForbidden,
    "verification_required": UpstreamForbidden,
}
#: Patterns of failures of the account that come with the status of a bad request. If an agent got
#: them as a 400, it would blame its history and truncate it.
_ACCOUNT_FAILURES: tuple[tuple[re.Pattern[str], type[OcpError]], ...] = (
    (
        re.compile(
            r"out of (?:extra )?usage|(?:usage )?credits? (?:are |is )?required|credits_required"
            r"|(?:requires?|needs?|runs on|add funds to continue with) usage credits"
            r"|usage credits are (?:off|turned off|disabled)|usage is paused"
            r"|extra usage is required|credit balance is too low|spend(?:ing)?[ _]limit",
            re.IGNORECASE,
        ),
        PlanLimit,
    ),
    (
        re.compile(
            r"(?:organi[sz]ation|account|workspace)(?: has been| is| was|:)? "
            r"(?:disabled|suspended|deactivated|banned|on hold)"
            r"|disabled organi[sz]ation|account_on_hold|verification_required",
            re.IGNORECASE,
        ),
        UpstreamForbidden,
    ),
)
#: Vaguer patterns, for failures of which neither the status nor the kind tells the class.
_LIKELY_ACCOUNT_FAILURES: tuple[tuple[re.Pattern[str], type[OcpError]], ...] = (
    (re.compile(r"\bcredits?\b", re.IGNORECASE), PlanLimit),
    (re.compile(r"\bon hold\b", re.IGNORECASE), UpstreamForbidden),
)
#: The statuses with which those patterns apply; None means no status.
_ACCOUNT_STATUSES = (None, 400, 402, 403, 429)
_ERROR_BY_KIND: dict[str, type[OcpError]] = {
    "authentication_failed": LoginLost,
    "oauth_org_not_allowed": LoginLost,
    "rate_limit": RateLimited,
    "invalid_request": BadRequest,
    "model_not_found": UnknownModel,
    "overloaded": Overloaded,
}
#: Text that claude adds to the API's message: a prefix, and advice for its own terminal.
_CLI_PROSE = re.compile(
    r"^(?:Failed to authenticate\. )?(?:API Error: )?(?:\d{3} )?"
    r"|\.? This is a server-side issue.*$|\.? Run --model to pick.*$"
)
#: What claude puts before a 429 that comes without a window, a spend limit too.
_NOT_YOUR_LIMIT = re.compile(r"^Server is temporarily limiting requests \([^)]*\)\W*")
#: A revoked login comes as a 403.
_LOGIN_REVOKED = re.compile(r"token.*(?:revoked|expired)", re.IGNORECASE)
#: What the API and claude say of a prompt that does not fit the model, and how the API begins it,
#: by which agents know it.
_TOO_LONG = re.compile("(?:prompt|input) is too long|exceed context limit", re.IGNORECASE)
_TOO_LONG_START = "prompt is too long"
_RATE_LIMIT_PAUSE_S = 20.0
_OVERLOAD_PAUSE_S = 10.0


def reset_sentence(resets_at_s: float) -> str:
    """Return when a limit resets, for clients that show only the message of an error."""
    resets = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(resets_at_s))
    return f"The limit resets at {resets}."


def _too_long_upstream(message: str) -> ContextTooLong:
    """Return the error for a prompt that the API or claude refuses for its length."""
    start = len(_TOO_LONG_START)
    is_usual = message[:start].lower() == _TOO_LONG_START
    rest = message[start:] if is_usual else f": {message}"
    return ContextTooLong(_TOO_LONG_START + rest, param="messages")


def upstream_error(
    failure: ReportedFailure, plan: PlanReport | None, now_s: float
) -> OcpError:
    """Return the error for the client for a failure that claude reports. The class comes from the
    API's status, then from claude's name for the failure. The text gives the message, and the class
    only for failures of the account."""
    error_class = (
        _ERROR_BY_KIND_FIRST.get(failure.kind)
        or _ERROR_BY_STATUS.get(failure.status or 0)
        or _ERROR_BY_KIND.get(failure.kind, UpstreamFailed)
    )
    message = redact_paths(redact(_CLI_PROSE.sub("", one_line(failure.text, 1000))))
    message = message or "claude reported a failure and gave no reason."
    if failure.status in _ACCOUNT_STATUSES:
        likely = _LIKELY_ACCOUNT_FAILURES if error_class is UpstreamFailed else ()
        for pattern, account_error in (*likely, *_ACCOUNT_FAILURES):
            error_class = account_error if pattern.search(message) else error_class
    if error_class is RateLimited and plan is not None and plan.is_limit_reached:
        error_class = PlanLimit
    if error_class is PlanLimit:
        message = _NOT_YOUR_LIMIT.sub("", message) or message
        resets_at_s = plan.blocked_until_s if plan else None
        if resets_at_s is None:
            return PlanLimit(message)
        message = f"{message.rstrip('.')}. {reset_sentence(resets_at_s)}"
        return PlanLimit(message, retry_after_s=resets_at_s - now_s)
    if error_class is UpstreamForbidden and _LOGIN_REVOKED.search(message):
        error_class = LoginLost
    if error_class is LoginLost:
        return LoginLost(f"{LOGIN_ADVICE} (claude reported: {message})")
    if error_class in (BadRequest, TooLarge) and _TOO_LONG.search(message):
        return _too_long_upstream(message)
    if error_class is UnknownModel:
        return UnknownModel(message, param="model")
    pauses = {RateLimited: _RATE_LIMIT_PAUSE_S, Overloaded: _OVERLOAD_PAUSE_S}
    return error_class(message, retry_after_s=pauses.get(error_class))


# ==== 25. Claude answers =====================================================
# What claude prints becomes lines, and the lines of a turn become the events of an answer.

#: The longest line that claude can print, and the most other output between two of its lines. Each
#: meaningless line counts as some more bytes than it has.
_MAX_CLAUDE_LINE_BYTES = 64 * 1024 * 1024
_LINE_COST_BYTES = 100


class LineBuffer:
    """What a process has printed and nobody has parsed. Bounds the length of a line, and of all
    output between two of claude's lines, which can be any program's."""

    def __init__(self) -> None:
        self._data = bytearray()
        #: How many of these bytes contain no end of a line.
        self._searched = 0
        #: Bytes of other output since claude's last line.
        self._noise_bytes = 0
        #: Whether there was more output than claude can have printed.
        self.is_flooded = False

    def add(self, data: bytes) -> None:
        """Append output. Raise UpstreamFailed when a line becomes too long."""
        self._data += data
        self._check(len(self._data))

    def lines(self) -> Iterator[bytes]:
        """Take the complete lines. Raise UpstreamFailed for a flood of them."""
        while True:
            end = self._data.find(b"\n", self._searched)
            if end < 0:
                self._searched = len(self._data)
                return
            line = bytes(self._data[:end]).strip()
            del self._data[: end + 1]
            self._searched = 0
            self.count_noise(len(line) + _LINE_COST_BYTES)
            yield line

    def count_noise(self, size_bytes: int) -> None:
        """Count output that may not be claude's. Raise UpstreamFailed for a flood of it."""
        self._noise_bytes += size_bytes
        self._check(self._noise_bytes)

    def reset_noise(self) -> None:
        """Start to count anew: claude itself has printed a line."""
        self._noise_bytes = 0

    def _check(self, size_bytes: int) -> None:
        if size_bytes > _MAX_CLAUDE_LINE_BYTES:
            self.is_flooded = True
            self._data.clear()
            self._searched = 0
            raise UpstreamFailed("claude on the server printed too much foreign output.")


def parse_line(raw: bytes) -> Json | None:
    """Return a line of claude; None for a line that is no JSON object, such as a plugin's output.
    Raise UpstreamFailed for broken JSON: a part of the answer is lost then."""
    if not raw.startswith(b"{"):
        return None
    try:
        line = from_json(raw)
    except ValueError:
        raise UpstreamFailed("claude printed a broken line of JSON.") from None
    return line if isinstance(line, dict) else None


def _count(usage: Json, name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) else 0


#: Fields of the API's usage object that Anthropic clients get unchanged, and their types.
_USAGE_FIELDS = (
    ("cache_creation", dict), ("server_tool_use", dict), ("service_tier", str), ("speed", str),
)


def usage_of(found: object, before: Usage = NO_USAGE) -> Usage:
    """Return the API's usage object as Usage. Missing counts are taken from `before`."""
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
        more={
            **before.more,
            **{name: found[name] for name, kind in _USAGE_FIELDS
               if isinstance(found.get(name), kind)},
        },
        web_search_requests=(
            _count(_object(found.get("server_tool_use")), "web_search_requests")
            or before.web_search_requests
        ),
    )


def _sum_more(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Usage.more` with the sums of their counts. What is no count is that of
    the second."""
    added = dict(first)
    for name, value in second.items():
        before = first.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            added[name] = _sum_more(before, value)
        elif isinstance(value, int) and isinstance(before, int):
            added[name] = before + value
        else:
            added[name] = value
    return added


def sum_usage(usages: Iterable[Usage]) -> Usage:
    """Return the sum of several usages. The reasoning is unknown if it is unknown in all."""
    added = NO_USAGE
    for usage in usages:
        known = [each.reasoning_tokens for each in (added, usage)]
        reasoning = [tokens for tokens in known if tokens is not None]
        added = Usage(
            added.input_tokens + usage.input_tokens, added.output_tokens + usage.output_tokens,
            added.cache_read_tokens + usage.cache_read_tokens,
            added.cache_write_tokens + usage.cache_write_tokens,
            sum(reasoning) if reasoning else None, _sum_more(added.more, usage.more),
            added.web_search_requests + usage.web_search_requests,
        )
    return added


#: Tools whose name in claude's `init` line differs from the name that the model gets.
_UNLISTED_NAMES = {"Task": "Agent"}


def check_tools_offered(
    line: Json, tools: Mapping[str, Tool], output_schema: OutputSchema | None
) -> None:
    """Check the `init` line, which claude prints before it calls the API. Raise BadRequest when
    claude dropped a tool or the output schema, and UpstreamFailed when claude has not loaded the
    client's tools. `tools` maps their names for claude to them."""
    names, servers = line.get("tools"), line.get("mcp_servers")
    if not isinstance(names, list):
        return
    listed = {_UNLISTED_NAMES.get(name, name) for name in names if isinstance(name, str)}
    missing = [tool.name for name, tool in tools.items() if name not in {*names, *listed}]
    found = servers if isinstance(servers, list) else []
    states = [
        _object(each).get("status") for each in found if _object(each).get("name") == TOOL_SERVER
    ]
    if missing and states not in ([], ["connected"]):
        raise UpstreamFailed("claude did not load the client's tools; try again.")
    if missing:
        raise BadRequest(
            f"tools: claude does not accept {', '.join(missing)}; simplify the schema.",
            param="tools",
        )
    if output_schema is not None and STRUCTURED_OUTPUT not in names:
        raise BadRequest(
            "response_format: claude does not accept the schema of the answer; simplify it.",
            param="response_format",
        )


#: Stop reasons after which claude waits for the client and does nothing by itself.
PARKABLE = ("end_turn", "stop_sequence", "tool_use")


def stop_reason_of(line: Json) -> object:
    """Return why the API ended a message; None for every other line."""
    return _object(_object(line.get("event")).get("delta")).get("stop_reason")


def check_control_response(line: Json) -> None:
    """Raise UpstreamFailed when claude refused a control request."""
    found = line.get("response")
    response = _object(found)
    if response.get("subtype") == "error":
        reason = redact_paths(redact(one_line(str(response.get("error")))))
        raise UpstreamFailed(f"claude refused a control request: {reason}")


def check_history_result(line: Json) -> None:
    """Raise UpstreamFailed when claude did not accept a message of the history."""
    if line.get("is_error"):
        reason = redact_paths(redact(one_line(str(line.get("result")))))
        raise UpstreamFailed(f"claude did not accept the conversation: {reason}")


class NotPinned(Exception):
    """claude did not refuse the first message of a history as it should; see `message_steps`.
    The process is of no use."""

    def __init__(self, line: Json, *, was_asked: bool) -> None:
        """`line` shows it. `was_asked` means that claude has sent the message to the API."""
        super().__init__(one_line(str(line.get("terminal_reason") or line.get("type"))))
        self.line = line
        self.was_asked = was_asked


def is_pinned(line: Json) -> bool:
    """Return whether claude has refused the first message of a history with this line, which is one
    of those that come after it. Raise NotPinned when claude asks the API, or refuses something
    else.

    A refused message prints `init`, `status`, a message of the model <synthetic> and a `result`."""
    kind = line.get("type")
    is_result, is_error = kind == "result", bool(line.get("is_error"))
    if is_result and is_error and line.get("terminal_reason") == "blocking_limit":
        return True
    is_synthetic = _object(line.get("message")).get("model") == "<synthetic>"
    was_asked = (
        kind in ("stream_event", "rate_limit_event")
        or (kind == "assistant" and not is_synthetic)
        or line.get("subtype") == "api_retry"
        or (is_result and (not is_error or line.get("api_error_status") is not None))
    )
    is_refused = _object(line.get("response")).get("subtype") == "error"
    if was_asked or is_result or is_refused:
        raise NotPinned(line, was_asked=was_asked)
    return False


# How a turn is read. claude prints the API's stream events of one message or several, lines of its
# own between them, and a `result` at the end. Three machines and a record of failures read these
# lines. TurnReader gives each line to the one that it concerns, and makes the transitions in which
# several take part. A line of an unknown type changes nothing, because new types will come.
#
# 1. MessageReader, with the Extent of what the client has got of the answer:
#
#        NOTHING -> BEGUN -> CONTENT -> CALL     by deltas, and by a call of a client's tool
#        any     -> NOTHING                      when claude repeats its API request
#
#    Calls and results of tools that the API runs come within a message and pass as they are.
#
# 2. RoundReader, with the Round. claude runs some tools itself: its own in agent mode, and unknown
#    ones, which it reports to the model. The client gets the messages around them as one.
#
#        WRITING    -> TOOLS_RUN     the message stops to call only such tools
#        TOOLS_RUN  -> CONTINUING    message_start: the message continues the answer
#        CONTINUING -> WRITING       the client gets the first block of the message
#        CONTINUING -> WRITING       message_start: claude repeats its API request
#
# 3. StructuredAnswer, with a StructuredState. The table _STRUCTURED_STEPS has its transitions.
#
# Transitions in which several take part. The first row that fits applies:
#
#    line                      state                effect
#    message_start             Round TOOLS_RUN      the answer goes on without an event
#    message_start             Extent NOTHING       Started
#    message_start             any                  Restarted and Started
#    stop reason tool_use      Extent CALL          Finished
#    stop reason tool_use      structured call      Finished when the call is COMPLETE
#    stop reason tool_use      any                  Round TOOLS_RUN
#    stop reason end_turn      Extent < CONTENT     none: claude repeats its request or gives up
#    any other stop reason     any                  Finished
#    user (tool results)       structured call      Finished when the call is COMPLETE
#    result                    schema, no failure   a refusal and Finished
#    result                    any                  the error is raised
#
# A turn is finished at the API's stop reason, not at claude's `result`. In between claude can call
# the API again, for example after max_tokens; the client does not want that answer.

#: Delta types of the API's stream, with the kind of our Delta and the field that holds the text.
_DELTA_KINDS = {
    "text_delta": ("text", "text"),
    "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("signature", "signature"),
    "input_json_delta": ("arguments", "partial_json"),
}
#: Block types that clients get unchanged.
_PLAIN_BLOCKS = ("text", "thinking", "redacted_thinking")


class StructuredState(enum.Enum):
    """How far the call of claude's StructuredOutput tool has come in the current message."""

    OPEN = "not called"
    CALLED = "called"
    STOPPED = "called, and the message has stopped"
    ACCEPTED = "accepted by claude"
    COMPLETE = "accepted, and the message has stopped"


#: What each step makes of a state. A step that is not listed changes nothing.
_STRUCTURED_STEPS = {
    (StructuredState.OPEN, "call"): StructuredState.CALLED,
    (StructuredState.CALLED, "stop"): StructuredState.STOPPED,
    (StructuredState.CALLED, "accept"): StructuredState.ACCEPTED,
    (StructuredState.ACCEPTED, "reject"): StructuredState.CALLED,
    (StructuredState.ACCEPTED, "stop"): StructuredState.COMPLETE,
    (StructuredState.STOPPED, "accept"): StructuredState.COMPLETE,
    (StructuredState.COMPLETE, "reject"): StructuredState.STOPPED,
}


class StructuredAnswer:
    """An answer with an output schema, in one message. claude checks the model's call."""

    def __init__(self, output_schema: OutputSchema | None) -> None:
        #: None if the client wants no such answer.
        self.schema = output_schema
        self.state = StructuredState.OPEN
        #: The arguments of the call, and the text beside it, which the client does not get.
        self.arguments: list[str] = []
        self.prose: list[str] = []

    def step(self, name: Literal["call", "stop", "accept", "reject"]) -> None:
        """Make a transition."""
        self.state = _STRUCTURED_STEPS.get((self.state, name), self.state)

    def start_message(self) -> None:
        """Forget the last message."""
        self.state = StructuredState.OPEN
        self.arguments.clear()
        self.prose.clear()

    def record_results(self, message: Json) -> None:
        """Read from the tool results of a `user` line whether claude accepted the call. The line
        can come before or after the stop reason."""
        content = message.get("content")
        for block in content if isinstance(content, list) else ():
            if isinstance(block, dict) and block.get("type") == "tool_result":
                self.step("reject" if block.get("is_error") else "accept")

    def check(self) -> None:
        """Raise UpstreamFailed for an answer that claude accepted but that breaks the client's
        schema."""
        exact = self.schema.exact if self.schema is not None else None
        if exact is None:
            return
        try:
            fit = fits(from_json("".join(self.arguments)), exact, exact.get("$defs", {}))
        except (ValueError, RecursionError):
            fit = False
        if not fit:
            raise UpstreamFailed("The model's answer does not fit the schema; ask again.")

    def refusal(self) -> str:
        """Return what the model wrote instead of the call."""
        prose = "".join(self.prose).strip()
        return prose or "The model did not give an answer that fits the requested schema."


class Extent(enum.IntEnum):
    """How much of an answer the client has got."""

    NOTHING = 0
    #: Thinking, or a text that is empty so far.
    BEGUN = 1
    CONTENT = 2
    #: A call of one of its tools.
    CALL = 3


class ClientBlock(NamedTuple):
    """A block of the model that the client gets."""

    #: Its number for the client.
    number: int
    #: Converts the model's JSON to the client's form, where the two differ.
    converter: ClientJsonConverter | None = None
    #: Whether it is the call of a structured answer, which the client gets as a text.
    is_structured: bool = False
    #: Whether it is the call of a tool that the API runs.
    is_server_call: bool = False


def _converter(source: Tool | OutputSchema) -> ClientJsonConverter | None:
    if not (source.wrapped or source.renamed):
        return None
    return ClientJsonConverter(wrapped=source.wrapped, renamed=source.renamed)


class MessageReader:
    """Turns the blocks of messages into those that the client gets. The API numbers the blocks of
    each message from 0. The client gets other numbers: hidden blocks leave no gap, and the numbers
    go on in a message that continues the answer."""

    def __init__(self, tools: Mapping[str, Tool], structured: StructuredAnswer) -> None:
        self._tools = tools
        self._structured = structured
        self.extent = Extent.NOTHING
        #: The blocks of the current message that the client gets, by the API's index.
        self._blocks: dict[int, ClientBlock] = {}
        self._next_number = 0
        self._line_ended = False
        self.usage = NO_USAGE
        self._earlier_usages: list[Usage] = []

    @property
    def spent(self) -> Usage:
        """Return the usage of all messages, including abandoned ones."""
        return sum_usage([*self._earlier_usages, self.usage])

    @property
    def is_mid_line(self) -> bool:
        """Return whether the answer so far ends in the middle of a line."""
        return self.extent >= Extent.CONTENT and not self._line_ended

    def start(self, message: Json) -> Started:
        """Begin a message."""
        self._earlier_usages.append(self.usage)
        self.usage = usage_of(message.get("usage"))
        self._blocks.clear()
        self._structured.start_message()
        return Started(str(message.get("id", "")), str(message.get("model", "")), self.usage)

    def restart(self) -> None:
        """Begin the whole answer anew."""
        self.extent = Extent.NOTHING
        self.restart_numbers()

    def restart_numbers(self) -> None:
        """Number the next blocks from 0 again."""
        self._next_number = 0

    def start_block(self, index: int, block: Json) -> BlockStarted | None:
        """Begin a block. Return None if the client does not get it."""
        kind, name = block.get("type"), str(block.get("name"))
        schema, number = self._structured.schema, self._next_number
        if kind == "tool_use" and schema is not None and name == STRUCTURED_OUTPUT:
            self._structured.step("call")
            shown: Block = {"type": "text", "text": ""}
            self._blocks[index] = ClientBlock(number, _converter(schema), is_structured=True)
        elif kind == "tool_use" and name in self._tools:
            self.extent, tool = Extent.CALL, self._tools[name]
            call_id = plain_id(str(block.get("id")))
            shown = {"type": "tool_use", "id": call_id, "name": tool.name, "input": {}}
            self._blocks[index] = ClientBlock(number, _converter(tool))
        elif is_server_block({"type": str(kind)}):
            shown = dict(block)
            self._blocks[index] = ClientBlock(number, is_server_call=kind == "server_tool_use")
        elif kind not in _PLAIN_BLOCKS or (kind == "text" and schema is not None):
            return None
        else:
            shown = dict(block)
            self._blocks[index] = ClientBlock(number)
        self._next_number += 1
        return BlockStarted(number, shown)

    def citation(self, index: int, delta: Json) -> Citation | None:
        """Return a source of a block; None if the client gets nothing."""
        block, citation = self._blocks.get(index), delta.get("citation")
        if block is None or not isinstance(citation, dict):
            return None
        return Citation(block.number, citation)

    def delta(self, index: int, delta: Json) -> Delta | None:
        """Return a piece of a block; None if the client gets nothing."""
        kind, field = _DELTA_KINDS.get(str(delta.get("type")), ("", ""))
        text = delta.get(field)
        if not kind or not isinstance(text, str):
            return None
        block = self._blocks.get(index)
        if block is None:
            if kind == "text":
                self._structured.prose.append(text)
            return None
        if block.is_structured:
            kind = "text"
            self._structured.arguments.append(text)
        if block.is_server_call:
            kind = "server_input"
        if block.converter is not None:
            text = block.converter.feed(text)
        if not text and (block.is_structured or block.converter is not None):
            return None
        if self.extent < Extent.CONTENT:
            is_content = text and kind in ("text", "arguments", "server_input")
            self.extent = Extent.CONTENT if is_content else Extent.BEGUN
        self._line_ended = text.endswith("\n")
        return Delta(block.number, kind, text)

    def stop_block(self, index: int) -> list[Event]:
        """End a block."""
        block = self._blocks.get(index)
        if block is None:
            return []
        rest = block.converter.close() if block.converter is not None else ""
        kind = "text" if block.is_structured else "arguments"
        stopped = BlockStopped(block.number)
        return [Delta(block.number, kind, rest), stopped] if rest else [stopped]


class Round(enum.Enum):
    """What the current message is in an answer of several messages."""

    WRITING = "the message goes to the client"
    TOOLS_RUN = "it has stopped, and claude runs the tools that it called"
    CONTINUING = "it continues the answer, and the client has no block of it yet"


class RoundReader:
    """The messages of one answer. With `final_only` the client gets only the last of them: events
    are held back, because another message may follow."""

    def __init__(self, *, final_only: bool) -> None:
        self.final_only = final_only
        self._state = Round.WRITING
        self._held: list[Event] = []

    def run_tools(self) -> None:
        """Record that claude runs the tools that the message called."""
        self._state = Round.TOOLS_RUN

    def start_message(self) -> bool:
        """Begin a message. Return whether it continues the answer."""
        continues = self._state is Round.TOOLS_RUN
        self._state = Round.CONTINUING if continues else Round.WRITING
        return continues

    def drop_held(self) -> None:
        """Forget the events that are held back."""
        self._held.clear()

    def start_block(self) -> bool:
        """Record a block that the client gets. Return whether it is its first one of a message
        that continues the answer."""
        continues = self._state is Round.CONTINUING
        self._state = Round.WRITING
        return continues

    def release(self, events: list[Event], *, finished: bool) -> list[Event]:
        """Return the events for the client out of these and those that were held back."""
        if not self.final_only:
            return events
        self._held += events
        if not finished:
            return []
        events, self._held = self._held, []
        return events


class FailureRecord:
    """What claude reports of a failure: a message of a model named <synthetic>, whose text is never
    content, and a `result`. And the plan's state, which explains a rate limit."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failure = ReportedFailure("", "", None)
        #: The latest report.
        self.plan: PlanReport | None = None

    @property
    def is_empty(self) -> bool:
        """Return whether neither a reason nor a status is known."""
        return not self._failure.text and self._failure.status is None

    def record_message(self, line: Json) -> None:
        """Record a failure from an `assistant` line."""
        message = _object(line.get("message"))
        if message.get("model") != "<synthetic>" and not line.get("error"):
            return
        content = message.get("content")
        blocks = content if isinstance(content, list) else [{"text": content}]
        texts = [block.get("text") for block in blocks if isinstance(block, dict)]
        text = " ".join(text for text in texts if isinstance(text, str))
        self._failure = ReportedFailure(text, str(line.get("error") or ""), None)
        self.record_status(line)

    def record_status(self, line: Json) -> None:
        """Record the API's status from a line that has one."""
        status = line.get("api_error_status")
        if isinstance(status, int):
            self._failure = self._failure._replace(status=status)

    def record_api_message(self, line: Json) -> None:
        """Record the API's own message from the call of the hook for failures. claude replaces it
        only for requests that it calls invalid; for other failures its text has more advice."""
        hook = _object(_object(line.get("request")).get("input"))
        if hook.get("error") == "invalid_request":
            message = api_message(str(hook.get("error_details") or ""))
            self._failure = self._failure._replace(text=message or self._failure.text)

    def error(self, result: Json) -> OcpError:
        """Return the error for a turn that ends with this `result` line."""
        failure = self._failure
        if not failure.text and result.get("is_error"):
            errors = result.get("errors")
            reasons = errors if isinstance(errors, list) else []
            text = str(result.get("result") or "; ".join(str(reason) for reason in reasons))
            failure = failure._replace(text=text or f"claude ended: {result.get('subtype')}")
        if not failure.text and not failure.status:
            return EmptyAnswer("The model ended its turn without an answer.")
        error = upstream_error(failure, self.plan, self._clock())
        # The API reports missing credits as a 400 and a revoked login as a 403.
        statuses = (failure.status or error.status, error.status)
        error.refused_upstream = any(each in (401, 429) or each >= 500 for each in statuses)
        return error


class TurnReader:
    """Turns the lines of one running turn into events."""

    def __init__(
        self, tools: tuple[Tool, ...] = (), output_schema: OutputSchema | None = None, *,
        final_only: bool = False, clock: Clock = time.time,
    ) -> None:
        """With `final_only`, return only the events of the answer's last message."""
        self._tools = {wire_name(tool.name): tool for tool in tools}
        self._structured = StructuredAnswer(output_schema)
        self._message = MessageReader(self._tools, self._structured)
        self._rounds = RoundReader(final_only=final_only)
        self._failures = FailureRecord(clock)
        self.finished = False
        #: How often claude reported that it repeats its API request.
        self.retries = 0

    @property
    def spent(self) -> Usage:
        """Return the usage that the API has reported so far, including abandoned messages."""
        return self._message.spent

    @property
    def plan(self) -> PlanReport | None:
        """Return claude's latest report about the plan."""
        return self._failures.plan

    def events(self, line: Json) -> list[Event]:
        """Return the events of this line. Raise the OcpError of a failure that the line reports."""
        return self._rounds.release(self._events_of_line(line), finished=self.finished)

    def _events_of_line(self, line: Json) -> list[Event]:
        kind = line.get("type")
        if kind == "stream_event":
            return self._on_stream_event(_object(line.get("event")))
        if kind == "assistant":
            self._failures.record_message(line)
        elif kind == "user":
            self._structured.record_results(_object(line.get("message")))
            return self._finish_structured()
        elif kind == "control_request":
            self._failures.record_api_message(line)
        elif kind == "rate_limit_event":
            self._failures.plan = plan_event(line) or self.plan
        elif kind == "system" and line.get("subtype") == "init":
            check_tools_offered(line, self._tools, self._structured.schema)
        elif kind == "system" and line.get("subtype") == "api_retry":
            self.retries += 1
        elif kind == "control_response":
            check_control_response(line)
        elif kind == "result":
            return self._on_result(line)
        return []

    def _on_stream_event(self, event: Json) -> list[Event]:
        kind = event.get("type")
        if kind == "content_block_delta":
            return self._on_delta(_count(event, "index"), _object(event.get("delta")))
        if kind == "content_block_start":
            return self._on_block_start(_count(event, "index"), _object(event.get("content_block")))
        if kind == "content_block_stop":
            return self._message.stop_block(_count(event, "index"))
        if kind == "message_start":
            return self._on_message_start(_object(event.get("message")))
        if kind == "message_delta":
            return self._on_message_delta(event)
        return []

    def _on_delta(self, index: int, delta: Json) -> list[Event]:
        is_citation = delta.get("type") == "citations_delta"
        read = self._message.citation if is_citation else self._message.delta
        event = read(index, delta)
        return [] if event is None else [event]

    def _on_message_start(self, message: Json) -> list[Event]:
        started = self._message.start(message)
        if not self._rounds.start_message():
            restarts = self._message.extent > Extent.NOTHING
            self._message.restart()
            return [Restarted(), started] if restarts else [started]
        if not self._rounds.final_only:
            return []
        self._rounds.drop_held()
        self._message.restart_numbers()
        return [started]

    def _on_block_start(self, index: int, block: Json) -> list[Event]:
        is_mid_line = self._message.is_mid_line and not self._rounds.final_only
        began = self._message.start_block(index, block)
        if began is None:
            return []
        continues = self._rounds.start_block()
        if continues and is_mid_line and began.block["type"] == "text":
            # Separate the messages of one answer by paragraphs.
            return [began, Delta(began.block_index, "text", "\n\n")]
        return [began]

    def _on_message_delta(self, event: Json) -> list[Event]:
        delta, message = _object(event.get("delta")), self._message
        message.usage = usage_of(event.get("usage"), message.usage)
        reason = delta.get("stop_reason")
        if not isinstance(reason, str):
            return []
        if reason == "tool_use" and message.extent < Extent.CALL:
            if self._structured.state is StructuredState.OPEN:
                self._rounds.run_tools()
                return []
            self._structured.step("stop")
            return self._finish_structured()
        if reason == "end_turn" and message.extent < Extent.CONTENT:
            return []
        details = delta.get("stop_details")
        return self._finish(
            reason, _text_field(delta, "stop_sequence"),
            details if isinstance(details, dict) else None,
        )

    def _on_result(self, line: Json) -> list[Event]:
        """Handle a `result` line before the end of an answer. Return a refusal if the model did not
        use the output schema; else raise the failure."""
        self._failures.record_status(line)
        is_unfit = not line.get("is_error") or "structured_output" in str(line.get("subtype"))
        if self._structured.schema is None or not is_unfit or not self._failures.is_empty:
            raise self._failures.error(line)
        restarts: list[Event] = [Restarted()] if self._message.extent > Extent.NOTHING else []
        refusal = Delta(0, "refusal", self._structured.refusal())
        return [*restarts, refusal, *self._finish("end_turn")]

    def _finish_structured(self) -> list[Event]:
        if self._structured.state is not StructuredState.COMPLETE:
            return []
        self._structured.check()
        return self._finish("end_turn")

    def _finish(
        self, reason: str, sequence: str | None = None, details: Json | None = None
    ) -> list[Event]:
        self.finished = True
        return [Finished(reason, sequence, self._message.usage, details)]


# ==== 26. Claude program =====================================================
# The program on disk: where it is, its version, its environment and arguments, the folders that it
# runs in, and what the server waits for while it runs. And the watchdog, which ends the processes
# that a killed server leaves.

#: Variables of the server's environment that claude gets; a name can end in a star. Nothing else is
#: passed on, so that no variable can point claude back at this server or leak a key.
CHILD_ENVIRONMENT = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "TERM",
    "TMPDIR", "XDG_*", "DBUS_SESSION_BUS_ADDRESS", "CLAUDE_CONFIG_DIR",
    "CLAUDE_CODE_OAUTH_TOKEN", "SSL_CERT_FILE", "SSL_CERT_DIR", "NODE_EXTRA_CA_CERTS",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)

#: Variables that every claude gets. They prevent it from reading files that a message names, from
#: loading memory, from repeating API requests in its own way, from updating itself, and from
#: logging content: it writes failed tool calls to logs below XDG_CACHE_HOME, and this path cannot
#: be created.
FIXED_ENVIRONMENT = {
    "CLAUDE_AGENT_SDK_MCP_NO_PREFIX": "1",
    # claude would refuse some 90 small images, because it estimates 2,000 tokens for each. The API
    # enforces the real limit.
    BLOCKING_LIMIT: UNREACHED_LIMIT,
    "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1",
    "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
    "CLAUDE_CODE_DISABLE_CLAUDE_MDS": "1",
    "CLAUDE_CODE_DISABLE_LEGACY_MODEL_REMAP": "1",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "1",
    "CLAUDE_CODE_DISABLE_REFUSAL_FALLBACK": "1",
    "CLAUDE_CODE_DISABLE_REFUSAL_RETRY": "1",
    "CLAUDE_CODE_DISABLE_TERMINAL_TITLE": "1",
    # The pieces of an answer take a shorter way through claude, as the same lines. Older versions
    # do not know these two.
    "CLAUDE_CODE_PLAIN_DELTA_DIRECT_WRITE": "1",
    "CLAUDE_CODE_PLAIN_DELTA_FAST_PATH": "1",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_AUTO_COMPACT": "1",
    "DISABLE_COMPACT": "1",
    "ENABLE_MCP_LARGE_OUTPUT_FILES": "0",
    "MAX_MCP_OUTPUT_TOKENS": "100000000",
    "MAX_STRUCTURED_OUTPUT_RETRIES": "2",
    "XDG_CACHE_HOME": "/dev/null/none",
}
#: Set outside agent mode. claude then does not open its socket for other sessions of the user; and
#: it tells the model this shell rather than the owner's, alike however the server was started.
_RESTRICTED = {"CLAUDE_CODE_RESTRICTED": "1", "SHELL": "/bin/bash"}


def child_environment(environ: Mapping[str, str], config: Config) -> dict[str, str]:
    """Return the environment of a claude process: allowed variables of the server, variables that
    the operator names, and fixed ones. A variable that holds one of the server's own keys is left
    out unless the operator names it, because claude processes untrusted text."""
    named = split_list(config.pass_env)
    keys = {key for key in config.secrets if len(key) >= 8}
    passed = {
        name: value
        for name, value in environ.items()
        if matches_any(name, named) or (
            matches_any(name, CHILD_ENVIRONMENT)
            and value not in keys and not has_key_format(value)
        )
    }
    return {
        **passed, **FIXED_ENVIRONMENT, **({} if config.is_agent else _RESTRICTED),
        "CLAUDE_CODE_MAX_RETRIES": str(config.max_retries),
    }


def _tool_arguments(config: Config) -> list[str]:
    """Return the arguments that select claude's tools: none of its own, or in agent mode those that
    the operator allows."""
    if not config.is_agent:
        return ["--tools", "", "--strict-mcp-config", "--allowedTools", f"mcp__{TOOL_SERVER}"]
    allowed: tuple[str, ...] = DEFAULT_AGENT_TOOLS
    if config.allowed_tools != "default":
        allowed = split_list(config.allowed_tools)
    arguments = ["--strict-mcp-config", "--allowedTools", f"mcp__{TOOL_SERVER}", *allowed]
    if config.skip_permissions:
        arguments.append("--dangerously-skip-permissions")
    else:
        arguments += ["--tools", ",".join(allowed)]
    if config.mcp_config:
        arguments += ["--mcp-config", os.path.expanduser(config.mcp_config)]
    return arguments


def claude_arguments(model_id: str, config: Config) -> list[str]:
    """Return the arguments of a claude process that waits for input. Outside agent mode it has no
    tools of its own. It never has user settings, slash commands or memory on disk."""
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


class Client(Protocol):
    """The client of a request, for code that waits."""

    def fileno(self) -> int:
        """Return the descriptor to wait on; negative = there is none."""

    def gone(self) -> bool:
        """Return whether the client has hung up. Never blocks. Keeps data that it sent early."""

    def can_detect_hangup(self) -> bool:
        """Return whether a hang-up can still be detected."""

    def cancel(self) -> None:
        """Make `gone` return True from now on, as if the client had hung up."""


class NoClient:
    """Stands for a client that has left, where a process is still worth a wait."""

    def fileno(self) -> int:
        """Return that there is no descriptor."""
        return -1

    def gone(self) -> bool:
        """Return False: nobody can leave."""
        return False

    def can_detect_hangup(self) -> bool:
        """Return False: there is no hang-up to detect."""
        return False

    def cancel(self) -> None:
        """Do nothing."""


class WaitLimits(NamedTuple):
    """What ends or interrupts a wait."""

    client: Client
    #: The deadline of the whole request, on the monotonic clock.
    deadline_s: float
    #: A Tick is due after this much silence; 0 = never.
    tick_s: float


class TurnInput(NamedTuple):
    """The input of a process for one turn: lines to write in steps (see `message_steps`), and
    after them the results of the tool calls of its last answer."""

    steps: list[bytes]
    results: Iterable[Block] = ()
    #: Whether the first of several steps asks, so that claude refuses it.
    pins: bool = False


class Program(NamedTuple):
    """A claude program that can be used."""

    #: The start of its command line.
    command: tuple[str, ...]
    version: Version

    @property
    def version_text(self) -> str:
        """Return the version as text."""
        return ".".join(str(part) for part in self.version)


INSTALL_ADVICE = (
    "install it on the server with `npm install -g @anthropic-ai/claude-code@latest`, "
    "or name it in CLAUDE_BIN"
)
_USUAL_PATHS = (
    "~/.local/bin/claude", "~/.claude/local/claude", "/opt/homebrew/bin/claude",
    "/usr/local/bin/claude", "/usr/bin/claude", "~/.npm-global/bin/claude", "~/.bun/bin/claude",
)
#: The time that a process gets to end by itself before it is killed.
_END_GRACE_S = 2.0
_VERSION_PROBE_TIMEOUT_S = 20
#: The rest of longer output is not read.
_MAX_OUTPUT_BYTES = 256 * 1024
#: After an unreadable or too old version, wait this long before reading it again.
_VERSION_RETRY_S = 30.0
#: A program that has been missing for less than this is probably being updated. Until then its
#: version is read more often, and clients are asked to retry after this pause.
_MAX_AWAY_S = 60.0
_AWAY_RETRY_S = 5.0
#: Patterns for the version in the output of `--version`, the safest first: the output can contain
#: notices with versions of other things.
_VERSION_PATTERNS = tuple(
    re.compile(pattern, re.MULTILINE) for pattern in (
        r"(\d+)\.(\d+)\.(\d+)\S* \(Claude Code\)",
        r"^\s*v?(\d+)\.(\d+)\.(\d+)",
        r"\b(\d+)\.(\d+)\.(\d+)",
    )
)


def version_in(text: str) -> Version | None:
    """Return the version of claude in its output; None if there is none."""
    for pattern in _VERSION_PATTERNS:
        found = pattern.search(text)
        if found is not None:
            return tuple(int(part) for part in found.groups())
    return None


def _check_version(version: Version) -> None:
    """Raise ClaudeTooOld."""
    if version < OLDEST_CLAUDE:
        raise ClaudeTooOld(
            f"claude {'.'.join(map(str, version))} on the server is older than "
            f"{'.'.join(map(str, OLDEST_CLAUDE))}: run `claude update` there."
        )


def cannot_start(problem: OSError) -> OcpError:
    """Return the error for a program that the system did not start: ClaudeMissing if it is not a
    program, UpstreamFailed if the machine lacks a resource."""
    if problem.errno in (errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR):
        return ClaudeMissing(
            f"The claude program does not start ({problem.strerror}): {INSTALL_ADVICE}."
        )
    return UpstreamFailed(
        f"The server could not start claude ({problem.strerror}).", retry_after_s=5
    )


_NO_VARIABLES: Mapping[str, str] = MappingProxyType({})


class Probe(NamedTuple):
    """A program file, and what `claude --version` told of it."""

    command: tuple[str, ...]
    #: Changes with the file.
    stamp: object
    found: Program | OcpError
    valid_until_s: float


class ClaudeProgram:
    """Finds claude and its version. Reads the version again when the file changes."""

    def __init__(
        self, config: Config, environ: Mapping[str, str], command: tuple[str, ...],
        clock: Clock = time.monotonic,
    ) -> None:
        """`command` replaces the search; the demo passes its own command line."""
        self._config = config
        self._environ = environ
        self._command = command
        self._clock = clock
        # Held while a version is read, so that only one thread reads it. The field below is
        # replaced as a whole and can be read without the lock.
        self._probe_lock = threading.Lock()
        self._probe: Probe | None = None
        #: When the program was last found.
        self._last_seen_s = -math.inf

    def resolve(self) -> Program:
        """Return the program. Raise ClaudeMissing, ClaudeAway or ClaudeTooOld. Blocks while `claude
        --version` runs if the file is new or the last failure has expired."""
        try:
            found = self._probed().found
            if isinstance(found, OcpError):
                # Without its last traceback, which would grow each time.
                raise found.with_traceback(None)
        except ClaudeMissing as error:
            raise self.as_away_if_recent(error) from None
        self._last_seen_s = self._clock()
        return found

    def as_away_if_recent(self, error: OcpError) -> OcpError:
        """Return the error to raise: ClaudeAway instead of ClaudeMissing if the program was there
        within the last minute."""
        if not isinstance(error, ClaudeMissing) or not self._is_away():
            return error
        return ClaudeAway(
            "The claude program is missing, perhaps because it is being updated; try again soon.",
            retry_after_s=_AWAY_RETRY_S,
        )

    def _is_away(self) -> bool:
        return self._clock() - self._last_seen_s < _MAX_AWAY_S

    def correct_version(self, version: Version) -> None:
        """Store the version that a process reports. A script that starts claude can stay the same
        while the file behind it is replaced."""
        with self._probe_lock:
            probe = self._probe
            is_news = probe is not None and isinstance(probe.found, Program)
            if probe is not None and is_news and probe.found != Program(probe.command, version):
                self._probe = self._new_probe(probe.command, probe.stamp, version)

    def last_result(self) -> tuple[Program | None, OcpError | None]:
        """Return the known program, or the known error, or neither, without running anything."""
        try:
            self._file()
        except OcpError as error:
            return None, error
        found = self._probe.found if self._probe is not None else None
        return (None, found) if isinstance(found, OcpError) else (found, None)

    def _probed(self) -> Probe:
        command, stamp = self._file()
        probe = self._known(command, stamp)
        if probe is None:
            with self._probe_lock:
                probe = self._known(command, stamp) or self._new_probe(command, stamp)
                self._probe = probe
        return probe

    def _known(self, command: tuple[str, ...], stamp: object) -> Probe | None:
        """Return the last result for a file while it is valid."""
        probe = self._probe
        if probe is None or self._clock() >= probe.valid_until_s:
            return None
        return probe if (probe.command, probe.stamp) == (command, stamp) else None

    def _new_probe(
        self, command: tuple[str, ...], stamp: object, version: Version | None = None
    ) -> Probe:
        """Return what is known of a file. Read its version if it is not given."""
        try:
            program = Program(command, version or self._read_version(command))
            _check_version(program.version)
        except OcpError as error:
            # It can be temporary.
            pause_s = _AWAY_RETRY_S if self._is_away() else _VERSION_RETRY_S
            return Probe(command, stamp, error, self._clock() + pause_s)
        return Probe(command, stamp, program, math.inf)

    def _file(self) -> tuple[tuple[str, ...], object]:
        """Return the start of the command line, and a value that changes with the file. Raise
        ClaudeMissing."""
        command = self._command or (self._path(),)
        try:
            status = os.stat(command[0])
        except OSError:
            raise ClaudeMissing(f"The claude program was not found: {INSTALL_ADVICE}.") from None
        return command, (status.st_ino, status.st_size, status.st_mtime_ns)

    def _path(self) -> str:
        named = os.path.expanduser(self._config.claude_bin)
        if named:
            path = shutil.which(named, path=self._environ.get("PATH"))
            if path is None:
                raise ClaudeMissing(f"CLAUDE_BIN does not name a program: {INSTALL_ADVICE}.")
            # claude runs in another folder than the server.
            return os.path.abspath(path)
        found = shutil.which("claude", path=self._environ.get("PATH"))
        for place in () if found else _USUAL_PATHS:
            found = found or shutil.which(os.path.expanduser(place))
        if not found:
            raise ClaudeMissing(f"The claude program was not found: {INSTALL_ADVICE}.")
        return os.path.abspath(found)

    def _read_version(self, command: tuple[str, ...]) -> Version:
        try:
            output = self._output_of([*command, "--version"])
        except OSError as problem:
            raise cannot_start(problem) from None
        except subprocess.TimeoutExpired:
            raise ClaudeMissing(
                f"The claude program does not answer `--version`: {INSTALL_ADVICE}."
            ) from None
        version = version_in(output.decode("utf-8", "replace"))
        if version is None:
            raise ClaudeMissing(
                f"The claude program does not print its version: {INSTALL_ADVICE}."
            )
        return version

    def has_login(self, variables: Mapping[str, str]) -> bool:
        """Return whether claude reports a login when it runs with these extra variables. Blocks
        while `claude auth status` runs. Return False when that fails."""
        return self.login_state(variables) is True

    def login_state(self, variables: Mapping[str, str]) -> bool | None:
        """Return what claude reports of its login, as `has_login` does; None if it does not tell.
        Nothing is asked of the API."""
        with contextlib.suppress(OcpError, OSError, subprocess.TimeoutExpired, ValueError):
            command = [*self.resolve().command, "auth", "status"]
            state = _object(from_json(self._output_of(command, variables))).get("loggedIn")
            return state if isinstance(state, bool) else None
        return None

    def _output_of(self, command: list[str], variables: Mapping[str, str] = _NO_VARIABLES) -> bytes:
        """Return the output of a command, cut at a limit. Raise OSError, and TimeoutExpired when it
        takes too long. The whole process group is killed at the end, because the command can be a
        script around claude."""
        env = {**child_environment(self._environ, self._config), **variables}
        with subprocess.Popen(
            command, env=env, start_new_session=True, bufsize=0,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        ) as popen:
            assert popen.stdout is not None
            try:
                output = _read_output(popen.stdout.fileno(), _VERSION_PROBE_TIMEOUT_S)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    popen.wait(_END_GRACE_S)
                return output
            finally:
                with contextlib.suppress(OSError):
                    os.killpg(popen.pid, signal.SIGKILL)


def _read_output(descriptor: int, timeout_s: float) -> bytes:
    """Read up to the end or the limit. Raise TimeoutExpired."""
    deadline_s = time.monotonic() + timeout_s
    poll, output = select.poll(), b""
    poll.register(descriptor, select.POLLIN)
    while len(output) < _MAX_OUTPUT_BYTES:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise subprocess.TimeoutExpired("claude", timeout_s)
        piece = os.read(descriptor, 65_536)
        if not piece:
            break
        output += piece
    return output


def work_folder(config: Config, environ: Mapping[str, str]) -> str:
    """Create and return the folder in which claude runs. claude puts its path into every request.
    So outside agent mode the path does not identify the owner, the folder is empty, and the path
    stays the same, which keeps the API's prompt cache valid. It is not the root folder, because
    2.1.197 lists all files below it."""
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
            # Another user owns it and could put files into it for claude.
            return tempfile.mkdtemp(prefix="ocp-", dir=parent)
    return folder


def leftover_paths(
    pid: int, env: Mapping[str, str], folder: str, platform: str = sys.platform
) -> list[str]:
    """Return the paths that a killed claude can leave behind: the socket on which it listens for
    other sessions, and on macOS the folder of its logs, which hold failed tool calls. `folder` is
    the folder in which it ran."""
    runtime = env.get("XDG_RUNTIME_DIR") or env.get("CLAUDE_CODE_TMPDIR") or env.get("TMPDIR")
    sockets = (os.path.join(runtime or "/tmp", "cc-socks"), f"/tmp/cc-socks-{os.getuid()}")
    paths = [os.path.join(parent, f"{pid}.sock") for parent in sockets]
    if platform == "darwin" and env.get("HOME"):
        # On other systems XDG_CACHE_HOME sets the folder of the logs.
        caches = os.path.join(env["HOME"], "Library", "Caches", "claude-cli-nodejs")
        name = re.sub(r"[^a-zA-Z0-9]", "-", os.path.realpath(folder))
        paths.append(os.path.join(caches, name))
    return paths


#: The account fields that claude needs; none identifies the owner.
_ACCOUNT_FIELDS = (
    "accountUuid", "organizationUuid", "organizationType", "billingType", "accountCreatedAt",
    "subscriptionCreatedAt", "hasExtraUsageEnabled", "ccOnboardingFlags", "userRateLimitTier",
    "organizationRateLimitTier", "seatTier",
)
#: The time of a profile fetched in 2100: claude then does not fetch the profile, and so does not
#: get the e-mail address again.
_FETCHED_IN_2100_MS = 4_102_444_800_000


def folder_variables(path: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that give claude this configuration folder, with the login of its
    owner's."""
    own = environ.get("CLAUDE_CONFIG_DIR", "")
    return {"CLAUDE_CONFIG_DIR": path, "CLAUDE_SECURESTORAGE_CONFIG_DIR": own}


class ClaudeFolder:
    """The configuration folder of the claudes that the server starts.

    With its owner's own folder, claude puts the owner's e-mail address into the first message of
    every conversation (2.1.197 to 2.1.332). In this folder it finds the account without address and
    names. The login stays in the owner's folder and only claude reads it: an empty
    CLAUDE_SECURESTORAGE_CONFIG_DIR selects the default place.

    If claude finds its login only with the owner's folder, that folder is used and `is_private` is
    False. No such system is known, but the keychain of macOS was not tested.
    """

    def __init__(
        self, path: str, environ: Mapping[str, str], log: Log,
        logged_in: Callable[[Mapping[str, str]], bool] | None = None,
    ) -> None:
        """`logged_in` returns whether claude has a login with extra variables. None means that the
        login does not depend on the folder."""
        self._path = path
        self._log = log
        self._logged_in = logged_in
        own = environ.get("CLAUDE_CONFIG_DIR", "")
        home = environ.get("HOME") or os.path.expanduser("~")
        self._source = os.path.join(own or home, ".claude.json")
        self._credentials = os.path.join(
            own or os.path.join(home, ".claude"), ".credentials.json"
        )
        self._variables = folder_variables(path, environ)
        # Guards the two fields below and the file. Held while claude checks its login, once.
        self._lock = threading.Lock()
        self._login_checked = logged_in is None
        self.is_private = True

    def environment(self) -> dict[str, str]:
        """Prepare the folder and return the variables that select it; none if the owner's folder
        has to be used."""
        with self._lock:
            try:
                self._prepare()
            except OSError as problem:
                self._use_owner_folder(f"{self._path} cannot be written: {problem}")
            if not self._login_checked:
                self._check_login()
            return dict(self._variables) if self.is_private else {}

    def login_stamp(self) -> object:
        """Return a value that changes with claude's credentials file; None without such a file."""
        try:
            status = os.stat(self._credentials)
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def login_changed(self) -> None:
        """Check again at the next start where claude finds its login."""
        with self._lock:
            self._login_checked, self.is_private = self._logged_in is None, True

    def _check_login(self) -> None:
        assert self._logged_in is not None
        self._login_checked = True
        if not self._logged_in(self._variables) and self._logged_in({}):
            self._use_owner_folder("claude has its login in its own folder only")

    def _use_owner_folder(self, why: str) -> None:
        if self.is_private:
            self._log.event(
                "warn", "owner_not_hidden", error=why,
                help="claude puts the e-mail address of its login into each conversation",
            )
        self.is_private = False

    def _prepare(self) -> None:
        """Update the file in the folder. Raise OSError."""
        os.makedirs(self._path, mode=0o700, exist_ok=True)
        path = os.path.join(self._path, ".claude.json")
        found = _json_object_of(path)
        account = _object(_json_object_of(self._source).get("oauthAccount"))
        wanted: Json = {name: account[name] for name in _ACCOUNT_FIELDS if name in account}
        wanted["profileFetchedAt"] = _FETCHED_IN_2100_MS
        if found.get("oauthAccount") != wanted or not found.get("hasCompletedOnboarding"):
            updated = {**found, "hasCompletedOnboarding": True, "oauthAccount": wanted}
            write_private(path, to_json(updated).decode("utf-8"))


def _json_object_of(path: str) -> Json:
    """Return the JSON object in a file of claude's; an empty object if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return _object(from_json(file.read()))
    except (OSError, ValueError):
        return {}


#: The watchdog's program. It ends the remaining process groups when its input closes.
_WATCHDOG_SOURCE = """
import os, signal, sys, time
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for number in (signal.SIGINT, signal.SIGKILL):
    for group in groups:
        try:
            os.killpg(group, number)
        except OSError:
            pass
    time.sleep(0.5 if groups else 0)
"""


class Watchdog:
    """A small process that outlives the server briefly and ends the children that are left. A
    claude that is answering does not notice that the server was killed; the watchdog does."""

    def __init__(self) -> None:
        # Guards everything below. Held for a write of a few bytes or for starting the process.
        self._lock = threading.Lock()
        self._groups: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None

    def watch(self, group: int) -> None:
        """End this process group when the server ends. Raise OSError."""
        with self._lock:
            self._groups.add(group)
            if self._process is None or not self._send(f"+{group}\n"):
                self._restart()

    def forget(self, group: int) -> None:
        """Remove a process group that has ended."""
        with self._lock:
            self._groups.discard(group)
            self._send(f"-{group}\n")

    def _send(self, text: str) -> bool:
        """Write a line to the watchdog. Return whether that succeeded."""
        if self._process is None or self._process.stdin is None:
            return False
        try:
            self._process.stdin.write(text.encode("ascii"))
        except (OSError, ValueError):
            return False
        return True

    def _restart(self) -> None:
        """Start a new watchdog with all groups. Raise OSError."""
        self._end()
        # The interpreter may need this variable to find its library; it gets no other.
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCHDOG_SOURCE],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            bufsize=0, start_new_session=True, cwd="/", env=kept,
        )
        self._send("".join(f"+{group}\n" for group in self._groups))

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
        """End the watchdog, which ends the groups that it still has. Blocks for two seconds at
        most."""
        with self._lock:
            self._end()


# ==== 27. Claude process =====================================================
# One child process and its pipes. A ClaudeProcess belongs to the thread that uses it. That thread
# waits for the pipes and for the client's socket in one selector, so that it notices output,
# silence and a hang-up at once. Children have process groups of their own and end with the server,
# even when the server is killed.


#: The longest time for the reply to a control request, and the longest silence.
_REPLY_TIMEOUT_S = 20.0
#: A longer limit for a claude that is still starting: many can start at once on a slow machine.
_MAX_START_S = 60.0
_STDERR_TAIL_BYTES = 4096
#: Types of lines of a running turn. They show that claude has read all earlier requests.
_TURN_LINES = ("assistant", "result", "stream_event", "system", "user")
_CONTROL_REQUEST = b'{"type":"control_request"'
#: The id of the control request that probes a silent claude.
_PRESENCE_ID = "presence"


def presence_request() -> bytes:
    """Return a control request without effect. claude answers it even in the middle of a turn."""
    request = {"subtype": "mcp_status"}
    return _line({"type": "control_request", "request_id": _PRESENCE_ID, "request": request})


def _is_presence_reply(line: Json) -> bool:
    return _object(line.get("response")).get("request_id") == _PRESENCE_ID


def processor_s(pid: int) -> float:
    """Return the processor time that a process has used; 0 where the system does not report it."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# How a hanging claude is found, without limiting how long the API may take:
#
# - claude answers control requests within _REPLY_TIMEOUT_S. A line of the turn also shows that it
#   has read them.
# - After half of that time without a line, one presence request is sent, which claude answers even
#   while it waits for the API. Without a reply in the other half, claude hangs.
# - A claude that has printed nothing yet gets up to _MAX_START_S while it uses the processor.


class HangDetector:
    """Decides from claude's output whether it hangs."""

    def __init__(self, now_s: float) -> None:
        #: When the last line came, or the wait began.
        self._last_line_s = now_s
        #: The number of control requests without a reply, and since when there are any.
        self._unanswered = 0
        self._unanswered_since_s = now_s
        self._probe_sent = False

    def record_sent(self, data: bytes, now_s: float) -> None:
        """Count the control requests in data that is sent."""
        count = data.startswith(_CONTROL_REQUEST) + data.count(b"\n" + _CONTROL_REQUEST)
        if count and not self._unanswered:
            self._unanswered_since_s = now_s
        self._unanswered += count

    def record_probe(self) -> None:
        """Record that the presence request was sent."""
        self._probe_sent = True

    def record_line(self, line: Json, now_s: float) -> bool:
        """Record a line. Return whether claude itself printed it."""
        kind = line.get("type")
        if kind in _TURN_LINES:
            self._unanswered = 0
        elif kind != "control_response":
            return False
        elif not _is_presence_reply(line):
            self._unanswered = max(0, self._unanswered - 1)
        self._last_line_s, self._probe_sent = now_s, False
        return True

    def exclude_time(self, span_s: float) -> None:
        """Exclude a time span in which nobody read claude's output."""
        self._last_line_s += span_s
        self._unanswered_since_s += span_s

    def next_check_s(self) -> float:
        """Return when to check again, unless claude prints a line before."""
        return min(self.probe_at_s(), self.hung_at_s())

    def probe_at_s(self) -> float:
        """Return when to send the presence request; once for each silence."""
        return math.inf if self._probe_sent else self._last_line_s + _REPLY_TIMEOUT_S / 2

    def hung_at_s(self) -> float:
        """Return when claude counts as hung."""
        silent_s = self._last_line_s if self._probe_sent else math.inf
        unanswered_s = self._unanswered_since_s if self._unanswered else math.inf
        return min(silent_s, unanswered_s) + _REPLY_TIMEOUT_S


class Liveness:
    """Finds out whether one claude hangs, while somebody waits for its lines."""

    def __init__(self, pid: int, clock: Clock) -> None:
        self._pid = pid
        self._clock = clock
        self._born_s = clock()
        self._detector = HangDetector(self._born_s)
        #: Whether it is starting: it has printed nothing yet.
        self._is_starting = True
        self._processor_s = 0.0
        self.is_hung = False

    def start_wait(self) -> None:
        """Begin anew: nobody has waited until now."""
        self._detector = HangDetector(self._clock())

    def record_sent(self, data: bytes) -> None:
        """Expect the replies to the control requests in data that is sent."""
        self._detector.record_sent(data, self._clock())

    def record_line(self, line: Json) -> bool:
        """Record a line. Return whether claude itself printed it."""
        is_own = self._detector.record_line(line, self._clock())
        self._is_starting = self._is_starting and not is_own
        return is_own

    def exclude_since(self, start_s: float) -> None:
        """Exclude the time since then, in which nobody read claude's output."""
        self._detector.exclude_time(self._clock() - start_s)

    def next_check_s(self) -> float:
        """Return until when to wait for output before the next check."""
        return self._detector.next_check_s()

    def needs_probe(self) -> bool:
        """Return whether the presence request is to be sent now; counts it as sent. Raise
        UpstreamFailed when claude hangs."""
        now_s = self._clock()
        if now_s < self._detector.next_check_s():
            return False
        if now_s >= self._detector.hung_at_s() and not self._is_slow_start():
            self.is_hung = True
            raise UpstreamFailed(
                f"claude on the server hung: it gave no answer for {_REPLY_TIMEOUT_S:.0f} s."
            )
        if now_s < self._detector.probe_at_s():
            return False
        self._detector.record_probe()
        self._processor_s = processor_s(self._pid)
        return True

    def _is_slow_start(self) -> bool:
        """Return whether the process is young and has used the processor since the last look. It
        gets more time then."""
        before_s, self._processor_s = self._processor_s, processor_s(self._pid)
        is_young = self._clock() - self._born_s < _MAX_START_S
        if not (self._is_starting and is_young and self._processor_s > before_s):
            return False
        self._detector.exclude_time(_REPLY_TIMEOUT_S / 2)
        return True


class Child:
    """A child process in a group of its own, with non-blocking pipes and what it can leave
    behind."""

    def __init__(
        self, command: list[str], *, env: Mapping[str, str], cwd: str,
        watchdog: Watchdog | None = None, keeps_logs: bool = False,
    ) -> None:
        """Start it and add it to the watchdog. With `keeps_logs`, the logs of its folder are not
        removed after its end. Raise ClaudeMissing, UpstreamFailed."""
        self._watchdog = watchdog
        #: Once it is to end: when to kill it.
        self._kill_at_s: float | None = None
        self.popen = self._spawn(command, env, cwd)
        self.pid = self.popen.pid
        self._leftover_paths = leftover_paths(self.pid, env, cwd)
        if keeps_logs:
            del self._leftover_paths[2:]
        pipes = (self.popen.stdin, self.popen.stdout, self.popen.stderr)
        self.stdin, self.stdout, self.stderr = (pipe.fileno() for pipe in pipes if pipe is not None)
        for descriptor in (self.stdin, self.stdout, self.stderr):
            os.set_blocking(descriptor, False)

    def _spawn(
        self, command: list[str], env: Mapping[str, str], cwd: str
    ) -> subprocess.Popen[bytes]:
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

    def runs(self) -> bool:
        """Return whether it has not ended yet."""
        return self.popen.poll() is None

    def is_closed(self) -> bool:
        """Return whether it has ended and nothing of it is left."""
        return self.popen.stdout is None or self.popen.stdout.closed

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and to all processes that it started."""
        with contextlib.suppress(OSError):
            os.killpg(self.pid, number)

    @property
    def is_stopping(self) -> bool:
        """Return whether `stop` was called."""
        return self._kill_at_s is not None

    def stop(self, now_s: float, *, graceful: bool) -> None:
        """Start to end it and return at once; `reap` completes it.

        With `graceful`, only close its input: claude ends by itself after a complete answer. Else
        send SIGINT: claude then cancels its API request and sends no other. With SIGTERM it was
        seen to send another request first, and SIGKILL leaves files behind.
        """
        if self._kill_at_s is not None:
            return
        self._kill_at_s = now_s + _END_GRACE_S
        if not graceful:
            self.signal(signal.SIGINT)
        if self.popen.stdin is not None:
            with contextlib.suppress(OSError):
                self.popen.stdin.close()

    def reap(self, now_s: float) -> bool:
        """Return whether it has ended, with its pipes and files removed. Kill it when its grace
        time is over."""
        if self.runs():
            if self._kill_at_s is not None and now_s >= self._kill_at_s:
                self.signal(signal.SIGKILL)
            return False
        self._close()
        return True

    def _close(self) -> None:
        """After its end: kill what it started, close its pipes, remove what it left behind."""
        self.signal(signal.SIGKILL)
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        for path in self._leftover_paths:
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
                continue
            with contextlib.suppress(OSError):
                os.unlink(path)
        if self._watchdog is not None:
            self._watchdog.forget(self.pid)


class ChildPipes:
    """The pipes of a child: what is still to be written, and what it has printed."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._unsent = bytearray()
        #: Whether the selector waits for room in the input pipe.
        self._waits_for_room = False
        self._stderr_tail = bytearray()
        self.output = LineBuffer()
        #: Whether its output has ended.
        self.ended = False

    def send(self, data: bytes) -> None:
        """Write data with the next `flush`."""
        self._unsent += data

    def selector(self, client: Client) -> selectors.BaseSelector:
        """Return a selector that waits for output and for the client's hang-up. The data of each
        key is the function to call with the selector."""
        def check_client(selector: selectors.BaseSelector) -> None:
            if client.gone():
                raise ClientGone
            if not client.can_detect_hangup():
                # It sent more than the read-ahead buffer holds: its hang-up cannot be seen.
                selector.unregister(client.fileno())

        selector = selectors.DefaultSelector()
        selector.register(self._child.stdout, selectors.EVENT_READ, self._read_stdout)
        selector.register(self._child.stderr, selectors.EVENT_READ, self._read_stderr)
        if client.fileno() >= 0:
            selector.register(client.fileno(), selectors.EVENT_READ, check_client)
        self._waits_for_room = False
        return selector

    def flush(self, selector: selectors.BaseSelector) -> None:
        """Write what the pipe takes. Register for room in the pipe only while data is left."""
        if not self._unsent:
            return
        self.write()
        is_left = bool(self._unsent)
        if is_left and not self._waits_for_room:
            selector.register(self._child.stdin, selectors.EVENT_WRITE, self.flush)
        elif self._waits_for_room and not is_left:
            selector.unregister(self._child.stdin)
        self._waits_for_room = is_left

    def write(self) -> None:
        """Write what the pipe takes. Never blocks."""
        try:
            while self._unsent:
                written = os.write(self._child.stdin, self._unsent[:262_144])
                del self._unsent[:written]
        except BlockingIOError:
            return
        except OSError:
            # The process is ending. The other pipes have the reason.
            self._unsent.clear()

    def read(self) -> None:
        """Read what there is. Never blocks. Raise UpstreamFailed for a flood."""
        self._read_stderr(None)
        self._read_stdout(None)

    def _read_stdout(self, _selector: object) -> None:
        piece = self._piece(self._child.stdout)
        self.ended = self.ended or piece == b""
        self.output.add(piece or b"")

    def _read_stderr(self, selector: selectors.BaseSelector | None) -> None:
        piece = self._piece(self._child.stderr)
        if piece == b"" and selector is not None:
            selector.unregister(self._child.stderr)
        self._stderr_tail += piece or b""
        del self._stderr_tail[:-_STDERR_TAIL_BYTES]
        self.output.count_noise(len(piece or b""))

    def _piece(self, descriptor: int) -> bytes | None:
        """Return the available data: empty at the end, None when there is none yet."""
        try:
            return os.read(descriptor, 262_144)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def exit_error(self) -> OcpError:
        """Return the error for a process that exited before its answer was complete."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.popen.wait(1)
        self._stderr_tail += self._piece(self._child.stderr) or b""
        output = self._stderr_tail.decode("utf-8", "replace").strip()
        last = output.splitlines()[-1] if output else "no error output"
        last = redact_paths(redact(one_line(last)))
        if "unknown option" in last:
            return ClaudeTooOld(f"claude on the server is too old, run `claude update`: {last}")
        code = self._child.popen.returncode
        how = "exiting" if code is None else f"signal {-code}" if code < 0 else f"exit {code}"
        return UpstreamFailed(f"claude ended before its answer was complete ({how}): {last}")


def _until_pinned(lines: Iterator[Json | Tick | Pause]) -> Iterator[Event]:
    """Wait until claude has refused the first message of the history. Raise NotPinned."""
    for line in lines:
        if not isinstance(line, dict):
            yield line
        elif is_pinned(line):
            return


def _until_result(lines: Iterator[Json | Tick | Pause]) -> Iterator[Event]:
    """Wait until claude has accepted a message of the history."""
    for line in lines:
        if not isinstance(line, dict):
            yield line
        elif line.get("type") == "control_response":
            check_control_response(line)
        elif line.get("type") == "result":
            check_history_result(line)
            return


class ClaudeProcess:
    """One claude. It serves one caller, one conversation at a time, and is then stopped."""

    def __init__(
        self, child: Child, model_id: str, *, version: Version = OLDEST_CLAUDE,
        on_report: Callable[[Json], None] | None = None, clock: Clock = time.monotonic,
    ) -> None:
        """`on_report` gets its lines about the plan, also after an answer, its `init` line if it
        reports another version than `version`, and the models that it offers. The callback must
        not block."""
        self.model_id = model_id
        self.version = version
        self.born_s = clock()
        self._child = child
        self._pipes = ChildPipes(child)
        self._liveness = Liveness(child.pid, clock)
        self._clock = clock
        self._on_report = on_report
        self.tools = ToolServer(())
        #: Whether the process reports another version than it was started with.
        self.version_differs = False
        self.rewinds = 0
        #: Whether it has run what a first question needs; see `prime`.
        self.is_primed = False
        #: When the client last got an event. A Tick is due `tick_s` later.
        self._last_event_s = 0.0
        #: Whether claude has printed the `result` of its last turn.
        self._turn_is_over = True
        #: Whether the last turn was sent to its end: with the question, not the history alone.
        self.has_asked = False

    def __repr__(self) -> str:
        ended = "ended" if self._pipes.ended else "alive"
        state = "stopping" if self._child.is_stopping else ended
        return f"<claude {self.model_id} pid={self.pid} {state}>"

    @property
    def pid(self) -> int:
        """Return the process id, which is the id of its process group too."""
        return self._child.pid

    @property
    def broken(self) -> bool:
        """Return whether it hangs or prints output that is not claude's. It is not used again."""
        return self._liveness.is_hung or self._pipes.output.is_flooded

    def alive(self) -> bool:
        """Return whether the process runs and is not broken."""
        return not self.broken and self._child.runs()

    def converse(
        self, turn_input: TurnInput, limits: WaitLimits, reader: TurnReader
    ) -> Iterator[Event]:
        """Send one turn and yield the events of its answer, with Pauses and Ticks.

        Tool results continue the turn that ended with the calls; no step need precede them. The
        iterator ends after Finished. Raise an error that claude reports or that its exit causes,
        UpstreamTimeout at the deadline, ClientGone, NotPinned. A process that hangs is `broken`
        afterwards.
        """
        self._last_event_s = self._clock()
        events: list[Event] = []
        # A kept exception also keeps alive what its traceback refers to.
        with contextlib.closing(self._lines(limits)) as lines:
            yield from self._send_turn(turn_input, lines)
            for line in lines:
                if not isinstance(line, dict):
                    yield line
                    continue
                events = reader.events(line)
                if reader.finished:
                    break
                if events:
                    yield from events
                    self._last_event_s = self._clock()
        # With the last of these events the process is parked, and another thread can take it. So
        # nothing here may use the process from now on.
        yield from events

    def _send_turn(
        self, turn_input: TurnInput, lines: Iterator[Json | Tick | Pause]
    ) -> Iterator[Event]:
        """Send the steps of a turn, and yield Ticks while claude accepts all but the last."""
        self.has_asked = False
        self._liveness.start_wait()
        if not turn_input.results and not self._turn_is_over:
            yield from _until_result(lines)
        for index, step in enumerate(turn_input.steps[:-1]):
            self._send(step)
            is_pin = turn_input.pins and index == 0
            yield from _until_pinned(lines) if is_pin else _until_result(lines)
        self._send(b"".join(turn_input.steps[-1:]) + self.tools.deliver(turn_input.results))
        self._turn_is_over, self.has_asked = False, True

    def control(self, requests: list[bytes], limits: WaitLimits) -> list[Json]:
        """Send control requests and return the replies in the same order. Waits first until the
        last turn is over. Raise what `converse` raises."""
        self._liveness.start_wait()
        answers: list[Json] = []
        with contextlib.closing(self._lines(limits)) as lines:
            if not self._turn_is_over:
                # An answer can be complete before claude prints the `result` of its turn.
                for _ in _until_result(lines):
                    pass
            self._send(b"".join(requests))
            for line in lines:
                if isinstance(line, dict) and line.get("type") == "control_response":
                    check_control_response(line)
                    answers.append(line)
                if len(answers) == len(requests):
                    break
        return answers

    def prime(self, limits: WaitLimits) -> None:
        """Make a process that holds nothing quicker at its first question, which then must not have
        an output schema. Raise what `converse` raises."""
        first, requests = priming_steps()
        self._liveness.start_wait()
        with contextlib.closing(self._lines(limits)) as lines:
            self._send(first)
            for _ in _until_pinned(lines):
                pass
        if not was_rewound(self.control(requests, limits)[0]):
            raise UpstreamFailed("claude did not drop the question that it was primed with.")
        self.is_primed = True

    def take_back(self, rewind_point: RewindPoint, limits: WaitLimits) -> bool:
        """Interrupt the turn that the user message at `rewind_point` began, and drop the message.
        Return whether claude now waits for another one in its place. Raise what `converse`
        raises."""
        self._liveness.start_wait()
        with contextlib.closing(self._lines(limits)) as lines:
            if not self._interrupt(lines):
                return False
            request_id = new_id("r")
            self._send(rewind_line(rewind_point, request_id))
            replies = (control_reply(line, request_id) for line in lines if isinstance(line, dict))
            self.rewinds += 1
            return is_without(next(filter(None, replies), {}))

    def _interrupt(self, lines: Iterator[Json | Tick | Pause]) -> bool:
        """End the running turn. Return False if claude may ask the API once more, as it does by
        itself after a stop at a limit; an interrupt does not prevent that."""
        request_id = new_id("r")
        self._send(interrupt_line(request_id))
        is_answered = False
        for line in lines:
            if not isinstance(line, dict):
                continue
            reply = control_reply(line, request_id)
            if reply is not None:
                is_answered = reply.get("subtype") == "success"
                self._turn_is_over = self._turn_is_over or has_cancelled(reply)
                if not is_answered:
                    return False
            if stop_reason_of(line) not in (None, *PARKABLE):
                return False
            if is_answered and self._turn_is_over:
                return True
        return False

    def _send(self, data: bytes) -> None:
        self._pipes.send(data)
        self._liveness.record_sent(data)

    def _lines(self, limits: WaitLimits) -> Generator[Json | Tick | Pause, None, None]:
        """Yield each line of claude, a Pause before each wait, and a Tick whenever the client has
        had no event for `tick_s`. Raise UpstreamFailed when claude hangs or exits."""
        if limits.client.gone():
            # A client that was cancelled earlier may show no event on its descriptor.
            raise ClientGone
        with self._pipes.selector(limits.client) as selector:
            while True:
                for line in self._take_lines():
                    if not _is_presence_reply(line):
                        yield line
                    # After the yield: the time that the client takes for a line is not claude's.
                    if self._liveness.record_line(line):
                        self._pipes.output.reset_noise()
                if self._pipes.ended:
                    if limits.client.gone():
                        raise ClientGone
                    raise self._pipes.exit_error()
                paused_s = self._clock()
                yield Pause()
                self._liveness.exclude_since(paused_s)
                if self._wait(selector, limits):
                    paused_s = self._last_event_s = self._clock()
                    # A process that claude started can hold the pipes open after claude's end.
                    self._pipes.ended = self._pipes.ended or not self.alive()
                    yield Tick()
                    self._liveness.exclude_since(paused_s)

    def _wait(self, selector: selectors.BaseSelector, limits: WaitLimits) -> bool:
        """Write, read, or wait until one of these is possible. Return whether a Tick is due. Raise
        ClientGone, UpstreamTimeout, and UpstreamFailed when claude hangs."""
        if self._liveness.needs_probe():
            self._pipes.send(presence_request())
        self._pipes.flush(selector)
        tick_at_s = self._last_event_s + (limits.tick_s or math.inf)
        until_s = min(limits.deadline_s, tick_at_s, self._liveness.next_check_s())
        for key, _ in selector.select(max(0.0, until_s - self._clock())):
            key.data(selector)
        now_s = self._clock()
        if now_s >= limits.deadline_s:
            raise UpstreamTimeout("The answer took longer than CLAUDE_TIMEOUT allows.")
        return now_s >= tick_at_s

    def _take_lines(self) -> Iterator[Json]:
        """Yield the complete lines read so far, and do what each requires whether or not a request
        reads it."""
        for raw in self._pipes.output.lines():
            line = parse_line(raw)
            if line is not None:
                self._handle_line(line)
                yield line

    def _handle_line(self, line: Json) -> None:
        kind = line.get("type")
        if kind == "control_request":
            self._pipes.send(hook_reply(line) or self.tools.reply(line))
        self._turn_is_over = self._turn_is_over or kind == "result"
        # This line comes after the end of an answer, when no request reads any more.
        has_news = kind == "rate_limit_event"
        if kind == "system" and line.get("subtype") == "init":
            reported = version_in(str(line.get("claude_code_version")))
            has_news = self.version_differs = reported not in (None, self.version)
        if kind == "control_response":
            self._report_models(line)
        if has_news and self._on_report is not None:
            self._on_report({**line, "model": self.model_id})

    def _report_models(self, line: Json) -> None:
        """Pass on the models of the account, which the reply to `initialize` lists."""
        offered = _object(_object(line.get("response")).get("response")).get("models")
        if offered and self._on_report is not None:
            self._on_report({"models": offered, "version": self.version, "model": self.model_id})

    # -- idling and ending --------------------------------------------------------------------

    def drain_output(self) -> None:
        """Read and answer what an idle claude prints: its pipes must not fill up. Never blocks."""
        self._read_idle()
        self._pipes.write()

    def _read_idle(self) -> None:
        with contextlib.suppress(OcpError):
            self._pipes.read()
            for _ in self._take_lines():
                pass

    def stop(self, *, graceful: bool) -> None:
        """Start to end the process and return at once; `is_gone` completes it. `graceful` is for
        a process that has nothing left to do."""
        self._child.stop(self._clock(), graceful=graceful)

    def is_gone(self) -> bool:
        """Return whether the process has ended, with its pipes and files removed. Kill it when its
        grace time is over."""
        if self._child.is_closed():
            return True
        self._read_idle()
        return self._child.reap(self._clock())


class ClaudeStarter:
    """Starts claude in its working folder, with the settings of the moment."""

    def __init__(
        self, program: ClaudeProgram, folder: ClaudeFolder, settings: Settings,
        environ: Mapping[str, str], log: Log, on_report: Callable[[Json], None], clock: Clock,
    ) -> None:
        """`on_report` is for ClaudeProcess."""
        self._program = program
        self._folder = folder
        self._settings = settings
        self._environ = environ
        self._log = log
        self._on_report = on_report
        self._clock = clock
        self._watchdog = Watchdog()
        self._work_folder = work_folder(settings.config, environ)

    def start(self, model_id: str) -> ClaudeProcess:
        """Return a new process of this model. Raise ClaudeUnavailable, UpstreamFailed."""
        config, program = self._settings.config, self._program.resolve()
        with contextlib.suppress(OSError):
            # Whoever cleans up temporary files may have taken it away.
            os.makedirs(self._work_folder, mode=0o700, exist_ok=True)
        env = {**child_environment(self._environ, config), **self._folder.environment()}
        try:
            child = Child(
                [*program.command, *claude_arguments(model_id, config)], env=env,
                cwd=self._work_folder, watchdog=self._watchdog,
                # In agent mode the owner can use the same folder, and so the same logs.
                keeps_logs=config.is_agent,
            )
        except ClaudeMissing as error:
            raise self._program.as_away_if_recent(error) from None
        process = ClaudeProcess(
            child, model_id, version=program.version, on_report=self._on_report, clock=self._clock
        )
        self._log.event("debug", "claude_spawned", pid=process.pid, model=model_id)
        return process

    def close(self) -> None:
        """End what is left of the processes. Blocks for two seconds at most."""
        self._watchdog.close()


# ==== 28. Gate ===============================================================
# Which requests may run. The gate knows the callers and nothing of the content of their requests.

#: How often a waiting request checks its client.
_CLIENT_POLL_S = 0.2


class Gate:
    """Limits how many requests run at a time. The others wait in one queue for each caller. The
    callers take turns, so that fifty requests of one caller do not delay a single one of
    another."""

    def __init__(self, config: Config) -> None:
        # Guards the fields below. Never held during a wait.
        self._lock = threading.Lock()
        self._config = config
        #: The number of running requests, by the scope of their callers.
        self._running: collections.Counter[str] = collections.Counter()
        #: The waiting slots by scope. The scopes are in the order of their turns.
        self._queues: dict[str, collections.deque[Slot]] = {}
        self._refused = 0

    def __repr__(self) -> str:
        return f"<gate running={self.running} waiting={self.waiting} refused={self.refused}>"

    @property
    def running(self) -> int:
        """Return the number of running requests."""
        with self._lock:
            return sum(self._running.values())

    def running_by_caller(self) -> dict[str, int]:
        """Return the number of running requests by the scope of their callers."""
        with self._lock:
            return dict(self._running)

    @property
    def waiting(self) -> int:
        """Return the number of waiting requests."""
        with self._lock:
            return sum(map(len, self._queues.values()))

    @property
    def refused(self) -> int:
        """Return the number of requests refused so far."""
        return self._refused

    def configure(self, config: Config) -> None:
        """Apply new limits."""
        with self._lock:
            self._config = config
            self._admit_waiting()

    def slot(self, caller: Caller) -> Slot:
        """Return a slot for a `with` block; call its `wait` inside the block."""
        return Slot(self, caller)

    def join(self, slot: Slot) -> None:
        """Queue a slot. Admit waiting slots, or refuse one if the queues are full."""
        with self._lock:
            self._queues.setdefault(slot.scope, collections.deque()).append(slot)
            self._admit_waiting()
            waiting = sum(map(len, self._queues.values()))
            if waiting <= self._config.max_queue:
                return
            # Refuse the last of the longest queue, so that one caller cannot fill the queues alone.
            longest = max(self._queues, key=lambda s: (len(self._queues[s]), s == slot.scope))
            refused = self._queues[longest].pop()
            if not self._queues[longest]:
                del self._queues[longest]
            self._refused += 1
            running = sum(self._running.values())
            refused.decide(
                QueueFull(
                    f"{running} answers are running and {waiting - 1} requests wait; "
                    "try again in a moment.",
                    retry_after_s=self._config.queue_retry_after_s,
                )
            )

    def _admit_waiting(self) -> None:
        """Admit waiting slots while there is room. The caller holds the lock."""
        while sum(self._running.values()) < self._config.max_concurrent:
            scope = next((s for s, slots in self._queues.items() if self._has_room(slots[0])), None)
            if scope is None:
                return
            slots = self._queues.pop(scope)
            slot = slots.popleft()
            if slots:
                # The scope goes behind all other scopes.
                self._queues[scope] = slots
            self._running[scope] += 1
            slot.decide(None)

    def _has_room(self, slot: Slot) -> bool:
        """Return whether the slot's caller may have one more answer at a time. One key never gets
        the last place, so that another key's request need not wait for the end of a long answer."""
        running = self._running[slot.scope]
        if slot.has_key and running and running >= self._config.max_concurrent - 1:
            return False
        return not slot.maximum or running < slot.maximum

    def release(self, slot: Slot) -> None:
        """Free a slot: its place among the running requests, or its place in the queue."""
        with self._lock:
            slots = self._queues.get(slot.scope, ())
            if slot in slots:
                self._queues[slot.scope].remove(slot)
                if not self._queues[slot.scope]:
                    del self._queues[slot.scope]
            elif slot.runs:
                self._running[slot.scope] -= 1
                if not self._running[slot.scope]:
                    del self._running[slot.scope]
            self._admit_waiting()


class Slot:
    """The right to run, from the end of `wait` to the end of the block."""

    def __init__(self, gate: Gate, caller: Caller) -> None:
        self._gate = gate
        self.scope = caller.scope
        self.maximum = caller.max_concurrent
        self.has_key = caller.key_id is not None
        #: Whether the request may run. `decide` sets it.
        self.runs = False
        self.refusal: QueueFull | None = None
        self._decided = threading.Event()

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, *_: object) -> None:
        self._gate.release(self)

    def decide(self, refusal: QueueFull | None) -> None:
        """Admit or refuse the request, which ends its wait. The gate calls this under its lock."""
        self.runs, self.refusal = refusal is None, refusal
        self._decided.set()

    def wait(self, limits: WaitLimits, clock: Clock = time.monotonic) -> Iterator[Event]:
        """Yield Ticks until the request may run. Raise QueueFull, UpstreamTimeout at the deadline,
        ClientGone."""
        self._gate.join(self)
        last_tick_s = clock()
        if limits.client.gone():
            raise ClientGone
        while not self._decided.wait(_CLIENT_POLL_S):
            if limits.client.gone():
                raise ClientGone
            now_s = clock()
            if now_s >= limits.deadline_s:
                raise UpstreamTimeout("The request waited longer than CLAUDE_TIMEOUT allows.")
            if limits.tick_s and now_s - last_tick_s >= limits.tick_s:
                last_tick_s = now_s
                yield Tick()
        if self.refusal is not None:
            raise self.refusal


# ==== 29. Conversations ======================================================
# The identity of a conversation, and what an idle process can do with the next request of one.
# Digests identify it: one for everything but the messages, and one for each message, in a form that
# does not depend on how a client writes it.
#
# A process that holds a conversation serves a request in one of two ways:
#
# - continued: the process holds the whole conversation but the last message, which alone is sent.
#   If its last answer ended with tool calls, the message must hold exactly their results.
# - rewound: the process holds a beginning of the conversation and then other messages. It drops
#   these, one user message after the other (RewindPoint), and gets the rest of the conversation.
#
# Else the conversation is rebuilt: a fresh process gets all of it from the client's own history. So
# no answer depends on a process that holds a conversation.


class History(NamedTuple):
    """The identity of a conversation."""

    #: The digest of the caller, the model, the system prompt, the tools and the options.
    base: str
    #: The digest of each message.
    digests: tuple[str, ...]
    #: The context in the last message. No later request has it in this place.
    context: str = ""
    #: The scope of the caller.
    caller: str = ""


def history_of(turn: Turn, caller: str, operator_prompt: str) -> History:
    """Return the identity of this turn's conversation."""
    base = [
        caller, turn.model.argument, turn.system, operator_prompt, repr(turn.tool_choice),
        canonical_json(list(turn.options)), canonical_json(turn.output_schema),
        canonical_json(list(turn.server_tools)),
        *(tool.digest for tool in turn.tools),
    ]
    digests = tuple(message.digest for message in turn.messages)
    return History(digest(base), digests, context_of(turn.messages[-1]), caller)


def results_with_context(message: Message, known_context: str) -> list[Block]:
    """Return the tool results of a message. Context that the process does not know is added to the
    last result, because in the middle of a turn claude accepts nothing else."""
    results = [block for block in message.content if block["type"] == "tool_result"]
    context = context_of(message)
    if results and context not in ("", known_context):
        content = [*results[-1]["content"], {"type": "text", "text": context}]
        results[-1] = {**results[-1], "content": content}
    return results


#: Stands for the digest of an answer from which no conversation continues.
_DEAD_END = ""
#: The most user messages to drop for another conversation. Each takes claude 1 to 5 ms, and what
#: has come further is worth more as it stands.
_MAX_DROPPED = 8


class Conversation(NamedTuple):
    """What an idle process holds of a conversation, including its last answer."""

    history: History
    #: The ids of the tool calls that wait for results.
    awaiting: frozenset[str] = frozenset()
    #: The user messages that the process holds, but for those with tool results.
    rewind_points: tuple[RewindPoint, ...] = ()
    #: How many messages the process got before its first question: other conversations can start
    #: with the same ones.
    messages_given: int = 0
    #: The lifetime in the API's prompt cache that the process asks for; see Turn.
    cache_lifetime: str = ""

    def after(self, answer: Answer, history: History, *, is_dead_end: bool) -> Conversation:
        """Return the conversation after an answer to the last message of `history`."""
        last = _DEAD_END
        if not is_dead_end:
            last = Message("assistant", answer.blocks).digest
        digests = (*history.digests, last)
        awaiting = frozenset(call["id"] for call in answer.calls)
        return self._replace(history=history._replace(digests=digests), awaiting=awaiting)

    def rewound(self, dropped: tuple[RewindPoint, ...]) -> Conversation:
        """Return what is left of it once the process has dropped these user messages, the last
        ones, with all that came after them."""
        if not dropped:
            return self
        digests = self.history.digests[:dropped[-1].message_index]
        return self._replace(
            history=self.history._replace(digests=digests, context=""),
            awaiting=frozenset(), rewind_points=self.rewind_points[:-len(dropped)],
        )

    def with_history_of(
        self, history: History, points: tuple[RewindPoint, ...], lifetime: str
    ) -> Conversation:
        """Return it with the rest of `history` up to the last message, told to a process that holds
        the beginning; `points` are those of the rest."""
        held, given = len(self.history.digests), len(history.digests) - 1
        context = self.history.context if held == given else ""
        return self._replace(
            history=history._replace(digests=history.digests[:-1], context=context),
            rewind_points=self.rewind_points + points,
            # What is left of the first questions still tells it from other conversations.
            messages_given=self.messages_given if held > self.messages_given else given,
            cache_lifetime=lifetime,
        )

    @property
    def is_dead_end(self) -> bool:
        """Return whether no conversation can continue from here."""
        return self.history.digests[-1:] == (_DEAD_END,)

    def can_continue(self, history: History, message: Message) -> bool:
        """Return whether `history` is this conversation plus `message`, its last one."""
        length = len(self.history.digests)
        if self.history.base != history.base or self.history.digests != history.digests[:length]:
            return False
        if len(history.digests) != length + 1:
            return False
        results = results_with_context(message, self.history.context)
        if not self.awaiting:
            return not results
        fit = all(mcp_content(block) is not None for block in results)
        ids = {block["tool_use_id"] for block in results}
        other = [b for b in message.content if b["type"] != "tool_result" and not _is_context(b)]
        return fit and ids == self.awaiting and len(results) == len(ids) and not other

    def dropped_for(
        self, history: History, version: Version
    ) -> tuple[RewindPoint, ...] | None:
        """Return the user messages to drop, the last one first, so that a claude of this version
        holds a beginning of `history`. Return None if it cannot, or has to drop too many."""
        if self.awaiting or self.history.base != history.base:
            return None
        shared = min(self.common_prefix(history), len(history.digests) - 1)
        if shared == len(self.history.digests):
            return ()
        count = sum(point.message_index <= shared for point in self.rewind_points)
        dropped = self.rewind_points[count - 1:][::-1] if count else ()
        if not dropped or len(dropped) > _MAX_DROPPED:
            return None
        can_drop = dropped[-1].message_index > 0 or version >= REWINDS_ALL_SINCE
        return dropped if can_drop else None

    def is_superseded_by(self, history: History) -> bool:
        """Return whether `history` repeats or edits a user message of this conversation: they share
        more than the history that both started with. A question does not count if the answers to it
        differ: many conversations have the same first one."""
        shared, length = self.common_prefix(history), len(history.digests)
        if shared not in (length, len(self.history.digests)):
            indexes = (point.message_index for point in self.rewind_points)
            shared = max((index for index in indexes if index <= shared), default=0)
        return length > 1 and shared > self.messages_given

    def common_prefix(self, history: History) -> int:
        """Return how many messages at the start are the same."""
        pairs = list(zip(self.history.digests, history.digests))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


#: What a process holds before its first turn. No history has this base.
NO_CONVERSATION = Conversation(History("", ()))


# ==== 30. Process pool =======================================================
# All processes that no request is using. Each is in one of three states:
#
# - spare: it was started for a model that was used lately, and holds no conversation. After a
#   moment it is primed: it then answers a first question in half the time, but takes no output
#   schema any more. So the spares of a model that was lately used with one stay as they are.
# - parked: it holds a conversation of one caller and waits for that caller's next message.
# - stopping: it was told to end, and is reaped once it has.
#
#     start -> spare -> (taken by a request) -> parked -> (taken by a request) -> parked -> ...
#     from everywhere -> stopping -> gone
#
# A process that is taken is not in the pool. It belongs to the thread that took it, which parks it,
# puts it back or stops it. So requests never share a process, not even retries and branches of one
# conversation. No parked process becomes a spare, so a process never changes its caller.
#
# The function `plan_pool` alone decides which idle processes end and which spares are started. Only
# the housekeeper's thread acts on it (`tend`, `refill`) and reaps; a request never waits for that.
# `drop` ends everything idle, because claude or its login has changed.


class ProcessState(enum.Enum):
    """What a process of the pool waits for: any request, its caller's next message, or its end."""

    SPARE = "spare"
    PARKED = "parked"
    STOPPING = "stopping"


class PooledProcess(NamedTuple):
    """A process in the pool."""

    process: ClaudeProcess
    state: ProcessState
    #: When a spare was started, and when any other process got into its state.
    since_s: float
    #: What a parked process holds.
    conversation: Conversation = NO_CONVERSATION


class ModelUse(NamedTuple):
    """The use of a model that spares are kept for."""

    last_used_s: float
    #: When to start missing spares; inf = only after the next use.
    refill_at_s: float = math.inf
    #: The last use with an output schema, for which a primed spare is of no use.
    last_schema_s: float = -math.inf

    def with_refill_at(self, time_s: float) -> ModelUse:
        """Return it with a refill at this time, or earlier: later uses do not postpone a refill."""
        return self._replace(refill_at_s=min(time_s, self.refill_at_s))


class PoolPlan(NamedTuple):
    """What is to be done with the processes of the pool."""

    stop: list[PooledProcess]
    #: A model is listed once for each process to start.
    start: list[str]


def plan_pool(
    processes: list[PooledProcess], uses: Mapping[str, ModelUse], config: Config, now_s: float, *,
    may_start: bool = True,
) -> PoolPlan:
    """Return the idle processes to stop and the models to start: stop what has ended, has waited
    too long or exceeds a limit, and start the missing spares of the models in use."""
    max_idle_s = {
        ProcessState.SPARE: config.warm_idle_ms / 1000,
        ProcessState.PARKED: config.session_ttl_ms / 1000,
    }
    idle = [p for p in processes if p.state in max_idle_s]
    kept = [p for p in idle if p.process.alive() and now_s - p.since_s <= max_idle_s[p.state]]
    oldest_s = now_s - max_idle_s[ProcessState.SPARE]
    primed = [p for p in kept if p.state is ProcessState.SPARE and p.process.is_primed]
    useless = [p for p in primed if _has_schemas(uses, p.process.model_id, oldest_s)]
    kept = [p for p in kept if p not in useless]
    outdated = [p for p in idle if p not in kept]
    parked = [p for p in kept if p.state is ProcessState.PARKED]
    evicted = evicted_by_limit(parked, config.parked_processes, now_s, running={})
    spares = [p for p in kept if p.state is ProcessState.SPARE]
    uses = {model_id: use for model_id, use in uses.items() if use.last_used_s >= oldest_s}
    due = [m for m, use in uses.items() if may_start and use.refill_at_s <= now_s]
    surplus, start = _plan_spares(spares, uses, due, config)
    return PoolPlan(outdated + evicted + surplus, start)


def _has_schemas(uses: Mapping[str, ModelUse], model_id: str, since_s: float) -> bool:
    """Return whether a model was used with an output schema since then."""
    return model_id in uses and uses[model_id].last_schema_s >= since_s


#: How long a parked process is safe from other callers that have as few.
_FRESH_S = 60.0


def evicted_by_limit(
    parked: list[PooledProcess], max_parked: int, now_s: float, *, running: Mapping[str, int]
) -> list[PooledProcess]:
    """Return the parked processes to stop when only `max_parked` may stay, in the order of
    eviction. `running` is how many more each caller will park; they count as parked last.

    The caller with the most gives up one, again and again: its dead ends, but for the one that was
    parked last, and then its oldest. Among callers with as many, it is the one whose process has
    waited longest, if that is longer than _FRESH_S. Else it is the one that parked last: when more
    callers are at work than there are places, the others still find their processes.
    """
    # The caller that parked last comes first.
    shares: dict[str, list[PooledProcess | None]] = {
        caller: [None] * count for caller, count in running.items()
    }
    for pooled in reversed(parked):
        shares.setdefault(pooled.conversation.history.caller, []).insert(0, pooled)
    for share in filter(None, shares.values()):
        last = share[-1]
        share.sort(key=lambda p: p is last or p is None or not p.conversation.is_dead_end)

    def precedence(share: list[PooledProcess | None]) -> tuple[int, float]:
        waited_s = now_s - share[0].since_s if share[0] is not None else 0.0
        return len(share), waited_s if waited_s > _FRESH_S else 0.0

    excess = len(parked) + sum(running.values()) - max_parked
    evicted = [max(filter(None, shares.values()), key=precedence).pop(0) for _ in range(excess)]
    return [pooled for pooled in evicted if pooled is not None]


def _plan_spares(
    spares: list[PooledProcess], uses: Mapping[str, ModelUse], due: list[str], config: Config
) -> PoolPlan:
    """Give the places for spares to the models that were used last. A spare beyond the place of its
    model is stopped only when the limit requires it or another model's spare is started."""
    waiting: dict[str, list[PooledProcess]] = {model_id: [] for model_id in uses}
    for spare in spares:
        waiting.setdefault(spare.process.model_id, []).append(spare)
    last_used_s = {model_id: use.last_used_s for model_id, use in uses.items()}
    surplus: list[PooledProcess] = []
    replaceable: list[PooledProcess] = []
    start: list[str] = []
    places = config.warm_total
    for model_id in sorted(waiting, key=lambda m: -last_used_s.get(m, 0.0)):
        own = waiting[model_id]
        count = min(config.warm_processes, places)
        places -= count
        surplus += own[config.warm_processes:]
        # The least recently used model comes first.
        replaceable = own[count:config.warm_processes] + replaceable
        if model_id in due:
            start += [model_id] * (count - len(own))
    excess = len(spares) - len(surplus) + len(start) - config.warm_total
    return PoolPlan(surplus + replaceable[: max(0, excess)], start)


#: The pause before a refill: the request that took the spare needs the machine first.
_REFILL_PAUSE_S = 0.2
#: When a spare is primed: it has started by then, and the request that took its predecessor has had
#: the machine to itself. And the pause after a spare that could not be primed.
_PRIMING_AGE_S = 1.0
_PRIMING_PAUSE_S = 600.0
#: The pause after a spare that ended within _YOUNG_S or could not be started.
_FAILURE_PAUSE_S = 30.0
_YOUNG_S = 5.0
#: The memory of a claude grows with each rewind: from 202 to 307 MB after this many messages of 20
#: KB (2.1.330). Then another process replaces it.
MAX_REWINDS = 500


class ProcessPool:
    """The processes that no request is using; see above."""

    def __init__(
        self, start: Callable[[str], ClaudeProcess], clock: Clock = time.monotonic
    ) -> None:
        """`start` starts a process of a model."""
        self._start = start
        self._clock = clock
        # Guards the fields below. Never held while a process is started or ended. It is held while
        # pipes are read without blocking, so that a process is either here or in use, never both.
        self._lock = threading.Lock()
        #: In the order in which they came into their state.
        self._processes: list[PooledProcess] = []
        #: The models that were used lately.
        self._uses: dict[str, ModelUse] = {}
        #: Nothing is started, nothing is rewound, and nothing is primed before these times.
        self._refills_from_s = -math.inf
        self._rewinds_from_s = -math.inf
        self._primings_from_s = -math.inf
        #: When all processes were dropped. A process that was started before is outdated.
        self._dropped_s = -math.inf
        self.spawned = 0

    def __repr__(self) -> str:
        spares = ", ".join(f"{model}={count}" for model, count in sorted(self.spares().items()))
        return f"<pool {spares or 'no spares'} parked={self.parked} stopping={self.stopping}>"

    def spares(self) -> dict[str, int]:
        """Return the number of spares by model."""
        with self._lock:
            return dict(
                collections.Counter(p.process.model_id for p in self._in(ProcessState.SPARE))
            )

    @property
    def parked(self) -> int:
        """Return the number of parked processes."""
        with self._lock:
            return len(self._in(ProcessState.PARKED))

    @property
    def stopping(self) -> int:
        """Return the number of processes whose end is not complete."""
        with self._lock:
            return len(self._in(ProcessState.STOPPING))

    def _in(self, *states: ProcessState) -> list[PooledProcess]:
        """Return the processes in these states. The caller holds the lock."""
        return [p for p in self._processes if p.state in states]

    # -- taking: the process then belongs to the caller's thread ----------------------------------

    def start(self, model_id: str) -> ClaudeProcess:
        """Return a new process. Raise the error of its start."""
        process = self._start(model_id)
        with self._lock:
            self.spawned += 1
        return process

    def mark_used(self, model_id: str, *, has_schema: bool = False) -> None:
        """Record that a model is in use, so that spares are kept for it: unprimed ones if
        this request has an output schema."""
        now_s = self._clock()
        with self._lock:
            use = self._uses.get(model_id, ModelUse(now_s))._replace(last_used_s=now_s)
            if has_schema:
                use = use._replace(last_schema_s=now_s)
            self._uses[model_id] = use.with_refill_at(now_s + _REFILL_PAUSE_S)

    def take_spare(self, model_id: str, *, has_schema: bool = False) -> ClaudeProcess | None:
        """Take a spare of this model, a primed one first. One that is primed does not take an
        output schema."""
        with self._lock:
            spares = [p for p in self._in(ProcessState.SPARE) if p.process.model_id == model_id]
            primed = [p for p in spares if p.process.is_primed and not has_schema]
            taken = self._take_first([*primed, *(p for p in spares if not p.process.is_primed)])
            return taken and taken.process

    def take_to_prime(
        self, config: Config, can_prime: Callable[[Version], bool]
    ) -> ClaudeProcess | None:
        """Take a spare that is to be primed, and then put back."""
        now_s = self._clock()
        oldest_s = now_s - config.warm_idle_ms / 1000
        with self._lock:
            if now_s < self._primings_from_s:
                return None
            taken = self._take_first(
                p for p in self._in(ProcessState.SPARE)
                if not p.process.is_primed and now_s - p.since_s >= _PRIMING_AGE_S
                and can_prime(p.process.version)
                and not _has_schemas(self._uses, p.process.model_id, oldest_s)
            )
            return taken and taken.process

    def take_any_spare(self) -> ClaudeProcess | None:
        """Take a spare to put it back soon. None is started in its place unless its model is
        used."""
        with self._lock:
            taken = self._take_first(self._in(ProcessState.SPARE))
            return taken and taken.process

    def take(self, history: History, message: Message) -> PooledProcess | None:
        """Take the newest process that holds all messages but `message`, the last one."""
        with self._lock:
            return self._take_first(self._continuable(history, message))

    def can_continue(self, history: History, message: Message) -> bool:
        """Return whether `take` would return a process."""
        with self._lock:
            return any(p.process.alive() for p in self._continuable(history, message))

    def common_prefix(self, history: History) -> int | None:
        """Return the index of the first message that differs from the nearest conversation of the
        same base; None if no conversation is near."""
        with self._lock:
            prefixes = [
                p.conversation.common_prefix(history) for p in self._in(ProcessState.PARKED)
                if p.conversation.history.base == history.base
            ]
        return max(prefixes, default=0) or None

    def take_rewindable(
        self, history: History, config: Config, running: Mapping[str, int]
    ) -> PooledProcess | None:
        """Take a process that can be rewound to this conversation. First choice is one of which a
        user message is repeated or edited here. Else a process with the same base serves like a
        spare, and faster. But its own conversation can still continue: it is taken only if it is a
        dead end, or if it will be evicted anyway when the `running` requests, counted by caller and
        this one included, have parked their processes. Of several, take the one that holds most of
        this conversation."""
        now_s = self._clock()
        with self._lock:
            if now_s < self._rewinds_from_s:
                return None
            parked = self._in(ProcessState.PARKED)
            evicted = evicted_by_limit(parked, config.parked_processes, now_s, running=running)
            candidates = [
                p for p in parked
                if p.conversation.dropped_for(history, p.process.version) is not None
                and p.process.rewinds < MAX_REWINDS and not self._is_outdated(p.process)
                and now_s - p.process.born_s <= config.session_ttl_ms / 1000
            ]
            superseded = [
                p for p in reversed(candidates) if p.conversation.is_superseded_by(history)
            ]
            dead_ends = [p for p in candidates if p.conversation.is_dead_end]
            others = [p for p in evicted if p in candidates]
            for choice in (superseded, dead_ends, others):
                choice.sort(key=lambda p: -p.conversation.common_prefix(history))
            return self._take_first([*superseded, *dead_ends, *others])

    def pause_rewinds(self, for_s: float) -> None:
        """Let `take_rewindable` return None for so long, because a rewind has failed."""
        with self._lock:
            self._rewinds_from_s = self._clock() + for_s

    def _continuable(self, history: History, message: Message) -> Iterator[PooledProcess]:
        parked = reversed(self._in(ProcessState.PARKED))
        return (p for p in parked if p.conversation.can_continue(history, message))

    def _take_first(self, candidates: Iterable[PooledProcess]) -> PooledProcess | None:
        """Remove and return the first that runs. The caller holds the lock."""
        taken = next((p for p in candidates if p.process.alive()), None)
        if taken is not None:
            self._processes.remove(taken)
        return taken

    def _is_outdated(self, process: ClaudeProcess) -> bool:
        """Return whether the process was started before all processes were dropped."""
        return process.born_s <= self._dropped_s

    # -- giving back a process that was taken or started ------------------------------------------

    def park(self, process: ClaudeProcess, conversation: Conversation) -> None:
        """Keep a process for the next message of its conversation."""
        pooled = PooledProcess(process, ProcessState.PARKED, self._clock(), conversation)
        with self._lock:
            self._processes.append(pooled)

    def put_spare(self, process: ClaudeProcess) -> None:
        """Keep a process that holds no conversation; stop it if it is outdated."""
        with self._lock:
            is_outdated = self._is_outdated(process)
            if not is_outdated:
                spare = PooledProcess(process, ProcessState.SPARE, process.born_s)
                self._processes.append(spare)
        if is_outdated:
            self.stop(process, graceful=True)

    def stop_unprimed(self, process: ClaudeProcess) -> None:
        """Stop a spare that could not be primed, have another one started, and let `take_to_prime`
        return None for a while."""
        with self._lock:
            self._primings_from_s = self._clock() + _PRIMING_PAUSE_S
            self._schedule_refill([process.model_id], self._clock() + _REFILL_PAUSE_S)
        self.stop(process, graceful=False)

    def stop(self, process: ClaudeProcess, *, graceful: bool) -> None:
        """Stop a process without waiting for its end."""
        process.stop(graceful=graceful)
        with self._lock:
            pooled = PooledProcess(process, ProcessState.STOPPING, self._clock())
            self._processes.append(pooled)

    def drop(self) -> None:
        """Stop all idle processes, because the program or its login has changed."""
        with self._lock:
            self._dropped_s = self._clock()
            dropped = self._in(ProcessState.SPARE, ProcessState.PARKED)
            self._processes = self._in(ProcessState.STOPPING)
            self._schedule_refill(self._uses, self._dropped_s + _REFILL_PAUSE_S)
        for pooled in dropped:
            self.stop(pooled.process, graceful=pooled.state is ProcessState.SPARE)

    # -- housekeeping, in one thread --------------------------------------------------------------

    def drain_parked(self) -> None:
        """Read what parked processes have printed since their answers."""
        with self._lock:
            for pooled in self._in(ProcessState.PARKED):
                pooled.process.drain_output()

    def tend(self, config: Config) -> None:
        """Drain the pipes of parked processes, stop what `plan_pool` returns, and reap."""
        now_s = self._clock()
        self.drain_parked()
        with self._lock:
            for pooled in self._in(ProcessState.SPARE):
                if now_s - pooled.since_s < _YOUNG_S and not pooled.process.alive():
                    self._refills_from_s = now_s + _FAILURE_PAUSE_S
            to_stop = self._plan(config, now_s).stop
            self._processes = [p for p in self._processes if p not in to_stop]
            spares = [p for p in to_stop if p.state is ProcessState.SPARE]
            self._schedule_refill([p.process.model_id for p in spares], now_s)
        for pooled in to_stop:
            self.stop(pooled.process, graceful=False)
        self.reap()

    def refill(self, config: Config) -> None:
        """Start the spares that `plan_pool` returns. Raise the error of a start."""
        now_s = self._clock()
        with self._lock:
            to_start = self._plan(config, now_s).start
            self._forget_due_refills(config, now_s)
        try:
            for model_id in to_start:
                self.put_spare(self.start(model_id))
        except OcpError:
            with self._lock:
                self._refills_from_s = self._clock() + _FAILURE_PAUSE_S
                self._schedule_refill(to_start, self._refills_from_s)
            raise

    def _schedule_refill(self, model_ids: Iterable[str], time_s: float) -> None:
        """Have the missing spares of these models started, as far as the models are in use. The
        caller holds the lock."""
        for model_id in self._uses.keys() & set(model_ids):
            self._uses[model_id] = self._uses[model_id].with_refill_at(time_s)

    def _forget_due_refills(self, config: Config, now_s: float) -> None:
        """Forget the refills that are due, and the models out of use. The caller holds the
        lock."""
        oldest_s = now_s - config.warm_idle_ms / 1000
        may_start = now_s >= self._refills_from_s
        self._uses = {
            model_id: use._replace(refill_at_s=math.inf)
            if may_start and use.refill_at_s <= now_s else use
            for model_id, use in self._uses.items() if use.last_used_s >= oldest_s
        }

    def _plan(self, config: Config, now_s: float) -> PoolPlan:
        """Return the plan for this time. The caller holds the lock."""
        may_start = now_s >= self._refills_from_s
        return plan_pool(self._processes, self._uses, config, now_s, may_start=may_start)

    def has_work_soon(self, config: Config) -> bool:
        """Return whether the housekeeper has work within a moment: a stopping process or a
        refill."""
        with self._lock:
            soon = self._plan(config, self._clock() + 2 * _REFILL_PAUSE_S)
            return bool(soon.start or self._in(ProcessState.STOPPING))

    def reap(self) -> None:
        """Complete the end of stopping processes."""
        with self._lock:
            stopping = self._in(ProcessState.STOPPING)
        gone = [pooled for pooled in stopping if pooled.process.is_gone()]
        with self._lock:
            self._processes = [p for p in self._processes if p not in gone]

    def close(self) -> None:
        """Stop all processes and wait for their end, a few seconds at most."""
        self.drop()
        deadline_s = self._clock() + 2 * _END_GRACE_S
        self.reap()
        while self.stopping and self._clock() < deadline_s:
            time.sleep(0.01)
            self.reap()


# ==== 31. Sessions and responses =============================================
# Conversations that the server remembers for clients that send only new messages: sessions on disk,
# and responses by their ids. And the thinking of answers, for conversations that are rebuilt.


class Sessions:
    """Conversations stored for clients that send only new messages. A session belongs to its caller
    and to one system prompt."""

    def __init__(self, store: Store, clock: Clock = time.time) -> None:
        self._store = store
        self._clock = clock

    def _key(self, caller: str, session_id: str, system: str) -> str:
        # Written as this text, because the keys of stored sessions are digests of it.
        text = canonical_json([caller, session_id, system])
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def messages(self, caller: str, session_id: str, system: str, ttl_s: float) -> list[Message]:
        """Return the messages so far; empty for a new or expired session."""
        rows = self._store.rows(
            "SELECT messages FROM sessions WHERE key = ? AND used_s >= ?",
            self._key(caller, session_id, system), self._clock() - ttl_s,
        )
        found = json.loads(rows[0]["messages"]) if rows else []
        return [Message(role, content) for role, content in found]

    def put(self, caller: str, turn: Turn, messages: list[Message], ttl_s: float) -> None:
        """Store a conversation with its last answer, and delete expired sessions."""
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
        """Return the sessions without their messages, the last used first."""
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
        """Delete the sessions with this id, or all sessions. Return how many there were."""
        with self._store.transaction() as connection:
            if session_id is None:
                return connection.execute("DELETE FROM sessions").rowcount
            return connection.execute(
                "DELETE FROM sessions WHERE id = ?", (session_id,)
            ).rowcount


class StoredResponse(NamedTuple):
    """A response that clients can fetch and continue from."""

    caller: str
    body: Json
    #: The whole conversation including this answer. System messages come first.
    messages: list[Message]
    #: The input items, including those before the previous response.
    items: list[Json]
    size_bytes: int
    #: How long the response is kept after the last reference to it, and until when.
    ttl_s: float
    until_s: float


#: The reason in errors about a missing response or item.
_NOT_STORED = "it was not stored, or it has expired"
#: The limit for all stored responses together.
_MAX_STORED_BYTES = 64 * 1024 * 1024


class Responses:
    """The stored responses, in memory. Each belongs to its caller."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        # Guards the fields below.
        self._lock = threading.Lock()
        self._stored: dict[str, StoredResponse] = {}
        #: The response id of each item, by the item's id.
        self._items: dict[str, str] = {}
        self._size_bytes = 0

    def put(
        self, caller: str, body: Json, messages: list[Message], items: list[Json], config: Config
    ) -> None:
        """Store a response, and delete expired responses and the oldest above the limit. `items`
        are the items of its own request; earlier items are shared with the previous response."""
        size_bytes = sum(message.size_bytes for message in messages)
        size_bytes += len(to_json(items)) + len(to_json(body))
        now_s, ttl_s = self._clock(), config.session_ttl_ms / 1000
        with contextlib.suppress(NotFound):
            before = self.get(caller, body.get("previous_response_id") or "")
            items = [*before.items, *before.body["output"], *items]
        stored = StoredResponse(caller, body, messages, items, size_bytes, ttl_s, now_s + ttl_s)
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
        """Delete a response. The caller holds the lock."""
        stored = self._stored.pop(response_id, None)
        if stored is not None:
            self._size_bytes -= stored.size_bytes
            for item in stored.body["output"]:
                self._items.pop(item["id"], None)

    def get(self, caller: str, response_id: str) -> StoredResponse:
        """Return the response with this id. Raise NotFound if there is none or it belongs to
        another caller."""
        with self._lock:
            stored = self._stored.get(response_id)
        if stored is None or stored.caller != caller or stored.until_s <= self._clock():
            raise NotFound(f"There is no response {one_line(response_id, 80)!r}: {_NOT_STORED}.")
        return stored

    def messages(self, caller: str, response_id: str) -> list[Message]:
        """Return the conversation of a response. Raise BadRequest with the code that makes clients
        send the conversation themselves."""
        try:
            return self.get(caller, response_id).messages
        except NotFound as error:
            raise BadRequest(
                f"{error.message} Send the conversation itself.",
                param="previous_response_id", code="previous_response_not_found",
            ) from None

    def item(self, caller: str, item_id: str) -> Json:
        """Return an output item of a response. Raise NotFound. This extends the time of the
        response: a conversation that refers to items needs all of them at each step."""
        with self._lock:
            response_id = self._items.get(item_id, "")
        with contextlib.suppress(NotFound):
            stored = self.get(caller, response_id)
            with self._lock:
                # The dictionary is ordered by age, oldest first.
                if self._stored.pop(response_id, None) is not None:
                    until_s = self._clock() + stored.ttl_s
                    self._stored[response_id] = stored._replace(until_s=until_s)
            return next(dict(item) for item in stored.body["output"] if item["id"] == item_id)
        raise NotFound(
            f"There is no item {one_line(item_id, 80)!r}: {_NOT_STORED}. Send the item itself.",
            param="input",
        )

    def remove(self, caller: str, response_id: str) -> None:
        """Delete a response. Raise NotFound."""
        self.get(caller, response_id)
        with self._lock:
            self._forget(response_id)


#: The limit for all remembered answers together.
_MAX_THINKING_BYTES = 32 * 1024 * 1024
#: How many digests of thinking are kept on disk, and how long.
_MAX_THINKING_DIGESTS = 100_000
_THINKING_DIGEST_S = 90 * 86_400


def _owner_of_thinking(turn: Turn, scope: str) -> list[str]:
    """Return what else thinking is known by: the caller, the model, and whether thinking is
    switched off, since the API may refuse thinking where it is."""
    return [scope, turn.model.id, str(turn.options.thinking_tokens == 0)]


def _answer_places(turn: Turn, scope: str) -> Iterator[tuple[int, str]]:
    """Yield the index of each answer in a turn's history, and the key under which its thinking is
    remembered. Ids of tool calls make an answer unique; any other one is known by the whole
    conversation up to it. So no thinking gets into another conversation that happens to have an
    answer of the same words."""
    owner = _owner_of_thinking(turn, scope)
    conversation = hashlib.sha256(joined_parts([*owner, turn.system]))
    for index, message in enumerate(turn.messages):
        conversation.update(message.digest.encode("ascii"))
        if message.role == "assistant":
            has_calls = any(block["type"] == "tool_use" for block in message.content)
            key = digest([*owner, message.digest]) if has_calls else conversation.hexdigest()
            yield index, key


def _thinking_digest(owner: list[str], blocks: list[Block]) -> bytes:
    """Return the digest by which the thinking of an answer is recognized when a client sends it
    back: of all its thinking and its calls, in their order."""
    parts = list(owner)
    for block in blocks:
        if is_thinking(block):
            seal = block.get("signature") or block.get("data") or ""
            parts += [block["type"], block.get("thinking", ""), seal]
        elif block["type"] == "tool_use":
            parts += [block["type"], plain_id(block["id"])]
    return hashlib.sha256(joined_parts(parts)).digest()[:16]


class ThinkingMemory:
    """The latest answers with thinking. A conversation that goes to another process gets them back
    as the model gave them: the API's prompt cache holds them like this, and a model that thinks by
    budget needs its thinking in a tool loop.

    Answers are kept in memory. Of those that memory has lost, the client's own copy is taken if it
    is what this server has sent: the database has digests for that, and no text. All other thinking
    of clients is left out, so that nobody can make the API refuse a prompt by a signature that is
    not its own."""

    def __init__(
        self, store: Store, clock: Clock = time.time, max_bytes: int = _MAX_THINKING_BYTES
    ) -> None:
        self._store = store
        self._clock = clock
        self._max_bytes = max_bytes
        # Guards the fields below.
        self._lock = threading.Lock()
        #: The blocks of an answer as JSON, by its key; the least recently used first.
        self._answers: dict[str, bytes] = {}
        self._size_bytes = 0

    def put(self, turn: Turn, scope: str, blocks: list[Block]) -> None:
        """Remember the answer to a turn of this caller if it can be told again as it was: its
        thinking is complete, and it has no blocks of the API's own tools."""
        thinking = [block for block in blocks if is_thinking(block)]
        is_whole = all(block.get("signature") or block.get("data") for block in thinking)
        if not thinking or not is_whole or any(map(is_server_block, blocks)):
            return
        answered = turn._replace(messages=[*turn.messages, Message("assistant", blocks)])
        *_, (_, key) = _answer_places(answered, scope)
        data = to_json(blocks)
        with self._lock:
            self._size_bytes += len(data) - len(self._answers.pop(key, b""))
            self._answers[key] = data
            while self._size_bytes > self._max_bytes:
                self._size_bytes -= len(self._answers.pop(next(iter(self._answers))))
        hidden = {"thinking": ""} if turn.options.hides_thinking else {}
        sent = _thinking_digest(
            _owner_of_thinking(turn, scope), [{**block, **hidden} for block in blocks]
        )
        # The row of usage, which comes next, takes it along.
        self._store.write_later(
            "INSERT OR REPLACE INTO thinking (digest, at_s) VALUES (?, ?)",
            sent, int(self._clock()),
        )

    def restored(self, turn: Turn, scope: str) -> Turn:
        """Return the turn of this caller with the thinking that is known, and no other."""
        owner, messages = _owner_of_thinking(turn, scope), list(turn.messages)
        for index, key in _answer_places(turn, scope):
            data = self._take(key)
            if data:
                blocks: list[Block] = json.loads(data)
                messages[index] = Message("assistant", blocks)
            elif not self._was_sent(owner, messages[index].content):
                messages[index] = without_thinking(messages[index])
        return turn._replace(messages=messages)

    def _take(self, key: str) -> bytes:
        """Return a remembered answer, which is the last to be forgotten then."""
        with self._lock:
            data = self._answers.pop(key, b"")
            if data:
                self._answers[key] = data
        return data

    def _was_sent(self, owner: list[str], blocks: list[Block]) -> bool:
        """Return whether the thinking in an answer is what this server has sent. It is not if the
        database cannot be read."""
        if not any(map(is_thinking, blocks)):
            return False
        with contextlib.suppress(sqlite3.Error):
            query = "SELECT 1 FROM thinking WHERE digest = ?"
            return bool(self._store.rows(query, _thinking_digest(owner, blocks)))
        return False

    def prune(self) -> None:
        """Delete digests that are too old or too many. Raises sqlite3.Error."""
        with self._store.transaction() as connection:
            connection.execute(
                "DELETE FROM thinking WHERE at_s < ? OR id <= (SELECT MAX(id) FROM thinking) - ?",
                (int(self._clock()) - _THINKING_DIGEST_S, _MAX_THINKING_DIGESTS),
            )


# ==== 32. Cache ==============================================================
# Stored answers to repeated requests of one caller, and answers in progress that several such
# requests share. Off unless the operator sets a time to live. In memory only: no answer is written
# to disk for this.


def cache_key(turn: Turn, caller: Caller, operator_prompt: str) -> str:
    """Return a digest of everything that shapes an answer, equal for requests that can share one.

    Messages count exactly, not as a conversation compares them: an answer is stored for longer
    than a process waits, and serves other conversations."""
    parts = [
        caller.scope, turn.model.argument, turn.system, operator_prompt,
        canonical_json(list(turn.options)), canonical_json(turn.output_schema), str(turn.choices),
    ]
    for messages in (turn.messages, *turn.other_prompts):
        parts.append(str(len(messages)))
        for message in messages:
            plain = [block.keys() == {"type", "text"} for block in message.content]
            parts.append(f"{message.role} {plain}")
            parts += (
                block["text"] if is_plain else canonical_json(block)
                for is_plain, block in zip(plain, message.content)
            )
    return digest(parts)


def is_cacheable(turn: Turn, config: Config) -> bool:
    """Return whether this turn can be answered from the cache."""
    has_tools = bool(turn.tools or turn.server_tools)
    repeatable = not (turn.session_id or has_tools or turn.bypass_cache or config.is_agent)
    return bool(config.cache_ttl_ms) and repeatable


class FlightClient:
    """The Client of a shared answer. It is cancelled when no request waits for the answer any
    more."""

    def __init__(self) -> None:
        """Raise OSError when the system has no descriptors left."""
        self._reader, self._writer = os.pipe()
        self._cancelled = False

    def fileno(self) -> int:
        return self._reader

    def gone(self) -> bool:
        return self._cancelled

    def can_detect_hangup(self) -> bool:
        return True

    def cancel(self) -> None:
        self._cancelled = True
        with contextlib.suppress(OSError):
            os.write(self._writer, b".")

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self._reader)
        os.close(self._writer)


class Flight:
    """An answer in progress that several requests share. Its producer adds the events. Each
    follower gets all of them, from the first on."""

    def __init__(self, key: str) -> None:
        """Raise OSError when the system has no descriptors left."""
        self.key = key
        self.client = FlightClient()
        #: The number of requests that wait for the answer. Guarded by the cache.
        self.followers = 1
        # Guards the fields below. Followers are woken when one of them changes.
        self._changed = threading.Condition()
        self._events: list[Choice] = []
        #: For each choice that was restarted, the index of its first valid event.
        self._restarted_at: dict[int, int] = {}
        self._is_over = False
        self._error: OcpError | None = None

    def add(self, choice: Choice) -> None:
        """Add the next event."""
        with self._changed:
            self._events.append(choice)
            if isinstance(choice[1], Restarted):
                self._restarted_at[choice[0]] = len(self._events)
            self._changed.notify_all()

    def end(self, error: OcpError | None) -> None:
        """End the answer. All followers share the error."""
        with self._changed:
            self._is_over, self._error = True, error
            self._changed.notify_all()

    def follow(self, client: Client, tick_s: float, clock: Clock) -> Iterator[Choice]:
        """Yield each event as it comes, Pauses and Ticks. A late follower does not get events that
        a restart has voided. Raise the error of the answer, and ClientGone."""
        position, last_event_s = 0, clock()
        polled_s = last_event_s
        with self._changed:
            restarted_at = dict(self._restarted_at)
        while True:
            with self._changed:
                if position == len(self._events) and not self._is_over:
                    self._changed.wait(_CLIENT_POLL_S)
                events, is_over = self._events[position:], self._is_over
            for index, choice in enumerate(events, position):
                if index >= restarted_at.get(choice[0], 0):
                    yield choice
            if events:
                yield 0, Pause()
            position += len(events)
            now_s = clock()
            if is_over and not events:
                break
            if now_s - polled_s >= _CLIENT_POLL_S:
                polled_s = now_s
                if client.gone():
                    raise ClientGone
            if events:
                last_event_s = now_s
            elif tick_s and now_s - last_event_s >= tick_s:
                last_event_s = now_s
                yield 0, Tick()
        if self._error is not None:
            raise self._error


class CachedAnswers(NamedTuple):
    """The stored answers to one request."""

    #: One answer for each choice.
    answers: tuple[Answer, ...]
    size_bytes: int
    since_s: float


class CacheLookup(NamedTuple):
    """The result of a lookup. `status` goes to the client: "hit" has answers, "miss" has a flight
    that this request has to produce, "shared" has a flight of another request."""

    status: str
    answers: tuple[Answer, ...] = ()
    flight: Flight | None = None


#: The memory of an answer besides its text.
_ANSWER_OVERHEAD_BYTES = 1_000


class Cache:
    """The stored answers, and the flights in progress."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        # Guards the fields below: an answer is either in progress or stored.
        self._lock = threading.Lock()
        #: Ordered by age, oldest first.
        self._cached: dict[str, CachedAnswers] = {}
        self._flights: dict[str, Flight] = {}
        self._size_bytes = 0
        self._counts: collections.Counter[str] = collections.Counter()

    def __repr__(self) -> str:
        return f"<cache kept={len(self._cached)} flights={len(self._flights)}>"

    def lookup(self, key: str, ttl_s: float) -> CacheLookup:
        """Return where the answer to this key comes from. Leave a flight with `unfollow`, and also
        end a missed one with `settle`. Raise OSError when the system has no descriptors left."""
        with self._lock:
            cached = self._cached.get(key)
            if cached is not None and self._clock() - cached.since_s < ttl_s:
                lookup = CacheLookup("hit", answers=cached.answers)
            elif key in self._flights:
                flight = self._flights[key]
                flight.followers += 1
                lookup = CacheLookup("shared", flight=flight)
            else:
                self._flights[key] = Flight(key)
                lookup = CacheLookup("miss", flight=self._flights[key])
            self._counts[lookup.status] += 1
            return lookup

    def unfollow(self, flight: Flight) -> None:
        """Remove a request from a flight. The last one cancels the flight."""
        with self._lock:
            flight.followers -= 1
            # From here on no request can join a flight that is about to be cancelled.
            abandoned = not flight.followers and self._flights.get(flight.key) is flight
            if abandoned:
                del self._flights[flight.key]
                flight.client.cancel()

    def settle(self, flight: Flight, answers: tuple[Answer, ...], config: Config) -> None:
        """End a flight. Store its answers, if any."""
        with self._lock:
            if self._flights.get(flight.key) is flight:
                del self._flights[flight.key]
            flight.client.close()
            size_bytes = len(to_json([answer.blocks for answer in answers]))
            size_bytes += _ANSWER_OVERHEAD_BYTES * len(answers)
            if answers and size_bytes <= config.cache_max_bytes:
                self._forget(flight.key)
                self._cached[flight.key] = CachedAnswers(answers, size_bytes, self._clock())
                self._size_bytes += size_bytes
        self.tend(config)

    def count_bypass(self) -> None:
        """Count a request that bypasses the cache."""
        with self._lock:
            self._counts["bypass"] += 1

    def _forget(self, key: str) -> None:
        """Delete the answers to a key. The caller holds the lock."""
        cached = self._cached.pop(key, None)
        self._size_bytes -= cached.size_bytes if cached is not None else 0

    def tend(self, config: Config) -> None:
        """Delete expired answers, and the oldest ones above the limit."""
        with self._lock:
            oldest_s = self._clock() - config.cache_ttl_ms / 1000
            for key, cached in list(self._cached.items()):
                if self._size_bytes <= config.cache_max_bytes and cached.since_s > oldest_s:
                    break
                self._forget(key)

    def clear(self) -> int:
        """Delete all stored answers. Return how many there were."""
        with self._lock:
            cleared = len(self._cached)
            self._cached.clear()
            self._size_bytes = 0
            return cleared

    def stats(self) -> Json:
        """Return the numbers for /cache/stats."""
        with self._lock:
            return {
                "entries": len(self._cached),
                "totalHits": self._counts["hit"],
                "sizeBytes": self._size_bytes,
                "inflight": len(self._flights),
                "requesters": sum(flight.followers for flight in self._flights.values()),
                "hits": self._counts["hit"],
                "misses": self._counts["miss"],
                "shared": self._counts["shared"],
                "bypassed": self._counts["bypass"],
            }


# ==== 33. Account ============================================================
# The state of claude's login and of the plan's limits, learned from the reports that claude sends
# with its answers. OCP never reads a token and never spends a message to find out.

#: The windows that every report lists, known or not.
_MAIN_WINDOWS = ("five_hour", "seven_day")
#: Reset times that are closer together than this belong to the same window.
_RESET_TOLERANCE_S = 60.0
#: Minimum time between two plan queries to claude, and how long one may take; claude gives up
#: itself before that.
_PLAN_QUERY_INTERVAL_S = 60.0
PLAN_QUERY_TIMEOUT_S = 8.0


#: How long a used-up window of which no reset is known counts as used up.
_UNKNOWN_RESET_S = 5 * 3600.0


#: What the operator can do about requests that are stopped.
ALLOW_EXTRA_USAGE = "The operator can allow extra usage: `ocp settings extraUsage allow`."


class BilledWindow(NamedTuple):
    """A window of the plan that is used up, while answers go on as extra usage."""

    resets_at_s: float
    #: The id of the model whose answers are billed, or the family of several; None = every model.
    scope: str | None


def _model_scopes(model_id: str | None) -> tuple[str | None, str | None]:
    """Return what a window of this model can be for: the model with any context window, or its
    family."""
    if model_id is None:
        return None, None
    return model_id.replace(LONG_CONTEXT_SUFFIX, ""), lineage_of(model_id)[0] or None


class BilledWindows:
    """The windows for which claude has said that answers are billed as extra usage."""

    def __init__(self) -> None:
        # Guards the next field.
        self._lock = threading.Lock()
        self._windows: dict[str, BilledWindow] = {}

    def record(self, report: PlanReport, model_id: str | None, now_s: float) -> None:
        """Record a report that came with an answer of this model. One that names no window says
        nothing about the end of extra usage."""
        claim = report.claim or "unknown"
        is_of_model = claim.startswith("seven_day_") and claim != "seven_day_oauth_apps"
        model, family = _model_scopes(model_id)
        of_model = family if claim == f"seven_day_{family}" else model
        with self._lock:
            if report.is_overage:
                resets_at_s = report.resets_at_s or now_s + _UNKNOWN_RESET_S
                self._windows[claim] = BilledWindow(resets_at_s, of_model if is_of_model else None)
            elif report.is_overage is False and report.claim is not None:
                self._windows = {
                    name: window for name, window in self._windows.items()
                    if name != claim and (is_of_model or window.scope is not None)
                }

    def find(self, model_id: str | None, now_s: float) -> tuple[str, BilledWindow] | None:
        """Return the used-up window that applies to this model and resets last, with its name.
        Without a model, return one that applies to every model."""
        scopes = (None, *_model_scopes(model_id))
        with self._lock:
            found = [
                (name, window) for name, window in self._windows.items()
                if window.resets_at_s > now_s and window.scope in scopes
            ]
        return max(found, key=lambda each: each[1].resets_at_s) if found else None

    def is_any(self, now_s: float) -> bool:
        """Return whether answers of any model are billed as extra usage."""
        with self._lock:
            return any(window.resets_at_s > now_s for window in self._windows.values())


def _is_same_window(before: PlanWindow, now: PlanWindow) -> bool:
    """Compare the reset times; some reports round them to whole seconds."""
    if before.resets_at_s is None or now.resets_at_s is None:
        return before.resets_at_s is now.resets_at_s
    return abs(before.resets_at_s - now.resets_at_s) <= _RESET_TOLERANCE_S


class Account:
    """The last known state of the login and of the plan."""

    def __init__(self, clock: Clock = time.time) -> None:
        self._clock = clock
        # Guards the fields below.
        self._lock = threading.Lock()
        self._logged_in: bool | None = None
        self._login_checked_s: float | None = None
        self._windows: dict[str, PlanWindow] = {}
        self._last_report = PlanReport({})
        self._budget = ExtraUsageBudget()
        self._billed = BilledWindows()
        self._subscription: str | None = None
        self._windows_updated_s: float | None = None
        self._last_query_s = -math.inf

    # -- login --------------------------------------------------------------------------------

    def set_login(self, accepted: bool | None) -> None:
        """Record whether the API accepted the login of a request; None = unknown again."""
        with self._lock:
            self._logged_in = accepted
            self._login_checked_s = None if accepted is None else self._clock()

    @property
    def is_login_refused(self) -> bool:
        """Return whether the last known result is a refused login."""
        return self._logged_in is False

    def login_report(self) -> Json:
        """Return the login state for /health; `ok` is null while it is unknown."""
        with self._lock:
            checked_s = self._login_checked_s
            return {
                "ok": self._logged_in,
                "okAt": None if checked_s is None else iso_time(checked_s),
                "message": LOGIN_ADVICE if self._logged_in is False else None,
            }

    # -- plan ---------------------------------------------------------------------------------

    def update_plan(self, report: PlanReport, model_id: str | None = None) -> None:
        """Merge a report, which came with an answer of this model if any. A window that comes
        without utilization keeps the known one until it is reset."""
        now_s = self._clock()
        self._billed.record(report, model_id, now_s)
        with self._lock:
            if report.windows:
                self._windows_updated_s = now_s
            self._budget = report.budget or self._budget
            self._subscription = report.subscription or self._subscription
            for name, window in report.windows.items():
                window = window._replace(observed_s=now_s)
                before = self._windows.get(name)
                if before is not None and _is_same_window(before, window):
                    window = self._completed(window, before)
                self._windows[name] = window
            # A reply to a query has no status, and a plain 429 has no windows.
            if report.windows and report.status is not None:
                self._last_report = report

    def state(self) -> str:
        """Return what is known of the plan as JSON, for `restore`; empty if nothing is known."""
        with self._lock:
            if self._windows_updated_s is None:
                return ""
            return json.dumps({
                "windows": {name: list(window) for name, window in self._windows.items()},
                "budget": list(self._budget),
                "subscription": self._subscription,
                "updated_s": self._windows_updated_s,
            })

    def restore(self, state: str) -> None:
        """Set what an earlier server knew of the plan; each number keeps the time of its report.
        Raises ValueError, TypeError, KeyError if `state` is not from `state`."""
        stored = json.loads(state)
        windows = {str(name): PlanWindow(*each) for name, each in stored["windows"].items()}
        if not all(isinstance(each, (int, float, type(None))) for window in windows.values()
                   for each in (window.utilization, window.resets_at_s, window.observed_s)):
            raise ValueError("a window has no numbers")
        with self._lock:
            self._windows = windows
            self._budget = ExtraUsageBudget(*stored["budget"])
            self._subscription = stored["subscription"]
            self._windows_updated_s = float(stored["updated_s"])

    def _completed(self, window: PlanWindow, before: PlanWindow) -> PlanWindow:
        """Return a window with what only an earlier report told."""
        if window.utilization is not None:
            return window._replace(status=window.status or before.status)
        return window._replace(utilization=before.utilization, observed_s=before.observed_s)

    def query_plan(self, pool: ProcessPool, limits: WaitLimits) -> None:
        """Ask a spare how much of the plan is used, if there is one, at most once a minute. This
        spends nothing. Raise what the question to claude raises."""
        process = pool.take_any_spare()
        if process is None:
            return
        replies = None
        try:
            if self.claim_plan_query():
                replies = process.control(usage_lines(), limits)
        except BaseException:
            pool.stop(process, graceful=False)
            raise
        pool.put_spare(process)
        if replies is not None:
            self.update_plan(plan_report(replies[1]))

    def claim_plan_query(self) -> bool:
        """Return whether a plan query to claude is due, and count it as done if so."""
        with self._lock:
            due = self._clock() - self._last_query_s >= _PLAN_QUERY_INTERVAL_S
            if due:
                self._last_query_s = self._clock()
            return due

    def windows(self) -> dict[str, PlanWindow]:
        """Return the known windows, without those that have been reset since."""
        now_s = self._clock()
        with self._lock:
            return {
                name: window for name, window in self._windows.items()
                if window.resets_at_s is None or window.resets_at_s > now_s
            }

    def plan(self) -> Json:
        """Return the plan for /usage; null = unknown, `observedAt` = time of the report."""
        known = self.windows()
        with self._lock:
            report, subscription = self._last_report, self._subscription
            # Of a window that has been reset, only the time of its last report is still true.
            past = {
                name: PlanWindow(observed_s=window.observed_s)
                for name, window in self._windows.items()
            }
        entries = {
            name: self._window_entry(known.get(name) or past.get(name) or PlanWindow())
            for name in (*_MAIN_WINDOWS, *known)
        }
        others = {
            name.replace("seven_day_", ""): entries[name] for name in known
            if name not in _MAIN_WINDOWS
        }
        return {
            "currentSession": entries["five_hour"],
            "weeklyLimits": {"allModels": entries["seven_day"], **others},
            "extraUsage": self._extra_usage(report),
            "representativeClaim": report.claim,
            "subscription": subscription,
        }

    def _extra_usage(self, report: PlanReport) -> Json:
        budget = self._budget
        is_on = budget.is_enabled
        if report.overage_status is not None:
            # Extra usage that is enabled is refused when its own limit is spent.
            is_on = report.overage_status != "rejected"
        state = "billed" if self.is_billed else {None: None, True: "on", False: "off"}[is_on]
        reason = {"disabledReason": report.overage_reason} if report.overage_reason else {}
        return {
            # What reports show: "billed" if answers are, "on", "off", or null = unknown.
            "state": state,
            "status": report.overage_status,
            **reason,
            "inUse": self.is_billed,
            "enabled": budget.is_enabled,
            "used": budget.used,
            "limit": budget.limit,
            "currency": budget.currency,
            "utilization": budget.utilization,
        }

    @property
    def is_billed(self) -> bool:
        """Return whether claude has said that answers are billed as extra usage."""
        return self._billed.is_any(self._clock())

    @property
    def budget(self) -> ExtraUsageBudget:
        """Return the extra usage of the billing period, as last reported."""
        return self._budget

    def check_not_billed(self, model_id: str | None) -> None:
        """Raise ExtraUsageStopped if answers of this model are billed as extra usage; without a
        model, if those of every model are."""
        found = self._billed.find(model_id, self._clock())
        if found is not None:
            name, window = found
            raise ExtraUsageStopped(
                f"The plan's limit ({name}) is used up: claude's answers are billed as extra "
                f"usage, which this server is set to stop. {reset_sentence(window.resets_at_s)} "
                f"{ALLOW_EXTRA_USAGE}",
                retry_after_s=window.resets_at_s - self._clock(),
            )

    def _window_entry(self, window: PlanWindow) -> Json:
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
            "observedAt": None if window.observed_s is None else iso_time(window.observed_s),
        }

    def report(self) -> Json:
        """Return the plan for /usage, and when its windows were reported."""
        plan = self.plan()
        with self._lock:
            updated_s = self._windows_updated_s
            return {
                "status": self._last_report.status,
                "fetchedAt": None if updated_s is None else iso_time(updated_s),
                "plan": plan,
            }


class PlanRecord:
    """Keeps what is known of the plan in the database, so that a restart does not forget it."""

    def __init__(self, store: Store, account: Account, log: Log) -> None:
        """Read what an earlier server knew."""
        self._store = store
        self._account = account
        self._written = ""
        rows = store.rows("SELECT state FROM plan")
        try:
            if rows:
                account.restore(rows[0]["state"])
                self._written = account.state()
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            log.event("warn", "stored_plan_ignored", error=repr(problem))

    def write(self) -> None:
        """Write what has changed. Raises sqlite3.Error."""
        state = self._account.state()
        if state != self._written:
            with self._store.transaction() as connection:
                connection.execute("INSERT OR REPLACE INTO plan VALUES (1, ?)", (state,))
            self._written = state


# ==== 34. Metrics ============================================================
# Counters and histograms since the start, for /health and /metrics. Each metric is a row of
# METRICS. Labels take their values from small fixed sets, so that no client can make memory grow.


class Metric(NamedTuple):
    """A metric; `kind` is its Prometheus type, `bounds` are a histogram's buckets in seconds."""

    name: str
    kind: str
    help: str
    bounds: tuple[float, ...] = ()


_FIRST_TOKEN_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_DURATION_BOUNDS_S = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

METRICS = (
    Metric("ocp_build_info", "gauge", "Always 1; the labels name the versions."),
    Metric("ocp_uptime_seconds", "gauge", "Time since the server started."),
    Metric("ocp_requests_started_total", "counter", "Model requests received."),
    Metric("ocp_requests_total", "counter", "Model requests finished, by outcome."),
    Metric("ocp_tokens_total", "counter", "Tokens charged to the plan, by kind."),
    Metric("ocp_web_searches_total", "counter", "Searches of the web by the API."),
    Metric(
        "ocp_first_token_seconds", "histogram", "Time to the first token.", _FIRST_TOKEN_BOUNDS_S
    ),
    Metric(
        "ocp_request_seconds", "histogram", "Time to the end of the answer.", _DURATION_BOUNDS_S
    ),
    Metric(
        "ocp_answers_total", "counter", "Answers by path: how claude received the conversation."
    ),
    Metric("ocp_running", "gauge", "Answers in progress."),
    Metric("ocp_queued", "gauge", "Requests in the queue."),
    Metric("ocp_queue_refusals_total", "counter", "Requests refused because the queue was full."),
    Metric("ocp_connections", "gauge", "Open client connections."),
    Metric("ocp_spawns_total", "counter", "claude processes started."),
    Metric("ocp_spares", "gauge", "Idle spare claude processes, by model."),
    Metric("ocp_parked", "gauge", "claude processes kept with their conversation."),
    Metric("ocp_cache_requests_total", "counter", "Requests by cache result."),
    Metric("ocp_cache_entries", "gauge", "Answers in the cache."),
    Metric("ocp_cache_bytes", "gauge", "Size of the cache."),
    Metric(
        "ocp_plan_utilization", "gauge", "Used share of a plan window, 0 to 1, as last reported."
    ),
    Metric("ocp_plan_resets_timestamp_seconds", "gauge", "When a plan window resets."),
    Metric("ocp_extra_usage_in_use", "gauge", "1 = answers are billed as extra usage."),
    Metric("ocp_extra_usage_spent", "gauge", "Extra usage of the billing period, by currency."),
    Metric("ocp_extra_usage_limit", "gauge", "Limit of the extra usage, by currency."),
    Metric("ocp_logged_in", "gauge", "1 = the login works, 0 = it was refused; absent = unknown."),
)

Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Cumulative bucket counts, the number of values and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.bucket_counts = [0] * len(bounds)
        self.count = 0
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.sum += value
        for index, bound in enumerate(self.bounds):
            self.bucket_counts[index] += value <= bound


def _label_text(labels: Labels) -> str:
    def escaped(text: str) -> str:
        return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    inside = ",".join(f'{name}="{escaped(value)}"' for name, value in labels)
    return f"{{{inside}}}" if inside else ""


def _number(value: float) -> str:
    """Format a number for Prometheus; integers stay exact."""
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
        with self._lock:
            self._counts[name][tuple(labels.items())] += count

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        with self._lock:
            by_labels = self._histograms[name]
            key = tuple(labels.items())
            by_labels.setdefault(key, Histogram(self._bounds[name])).add(seconds)

    def total(self, name: str, **labels: str) -> int:
        """Return the sum of a counter over all label sets that contain these labels."""
        required = set(labels.items())
        with self._lock:
            return sum(n for key, n in self._counts[name].items() if required <= set(key))

    def text(self, gauges: Mapping[str, Mapping[Labels, float]]) -> str:
        """Return all metrics in Prometheus' text format. `gauges` holds the current gauges, and
        the counters that other objects keep."""
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
        for bound, count in zip(histogram.bounds, histogram.bucket_counts):
            yield f"{name}_bucket{_label_text((*labels, ('le', f'{bound:g}')))} {count}"
        yield f"{name}_bucket{_label_text((*labels, ('le', '+Inf')))} {histogram.count}"
        yield f"{name}_sum{_label_text(labels)} {histogram.sum:.6f}"
        yield f"{name}_count{_label_text(labels)} {histogram.count}"


# ==== 35. Connections ========================================================
# The server's address; client sockets and their shared limits: how many connections stay open, and
# how much memory request bodies and unread answers use together. Nothing here knows HTTP.

#: Bound to one of these, the server listens on all addresses.
_ALL_ADDRESSES = ("0.0.0.0", "::")
#: How long a client that is refused early may go on sending before its connection is closed, so
#: that it reads the refusal instead of a connection reset.
_LINGER_S = 2.0
#: How much of a pipelined request is read before the current one is answered.
_MAX_AHEAD_BYTES = 65_536
#: The memory budget: this many bodies of the largest size, and at least this many bytes.
_MEMORY_BODIES = 4
_MIN_MEMORY_BYTES = 64 * 1024 * 1024
#: The largest single read and write on a socket. A TLS record holds 16 KB.
_MAX_READ_BYTES = 262_144
_MAX_SENT_BYTES = 16_384
#: How long a new connection may take to show its key before it counts as one without a key.
_NEWCOMER_S = 2.0
#: What a non-blocking socket raises when it is not ready.
_WOULD_BLOCK = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class ServerAddress(NamedTuple):
    """Where the server listens, and under which addresses it is reached."""

    config: Config
    #: The address that the socket is bound to, and its port.
    host: str
    port: int

    def _url(self, host: str) -> str:
        scheme = "https" if self.config.tls_cert else "http"
        host = f"[{host}]" if ":" in host else host
        return f"{scheme}://{host}:{self.port}"

    @property
    def local_url(self) -> str:
        """The address for programs on this machine."""
        return self._url("127.0.0.1" if self.host in _ALL_ADDRESSES else self.host)

    def for_devices(self) -> tuple[str, str]:
        """Return the address for other devices and an empty string; or an empty string and why
        there is none."""
        if self.config.public_url == "none":
            return "", "Use the address and the port under which this machine publishes the server."
        if self.config.public_url:
            return self.config.public_url.rstrip("/"), ""
        if is_loopback(self.host):
            return "", (
                f"Only this machine can reach the server, because it listens on {self.host}: "
                "`ocp lan` says how to open it to other devices."
            )
        host = network_address() if self.host in _ALL_ADDRESSES else self.host
        return (self._url(host), "") if host else ("", "This machine is in no network.")


class Hold:
    """The part of the memory budget that one request body or one unread answer uses."""

    def __init__(self, cut: Callable[[], None]) -> None:
        """`cut` ends the connection that the bytes belong to; it must not block."""
        self.cut = cut
        #: Who is charged: a caller's scope, or the address of a client without a key.
        self.owner = ""
        #: Guarded by the budget.
        self.size_bytes = 0


class MemoryBudget:
    """The limit for the bytes of all request bodies and all unread answers together.

    One owner may hold half of it. When the total exceeds the limit, the largest hold of the owner
    that holds the most is cut, so that no client suffers for the memory of another.
    """

    def __init__(self) -> None:
        # Guards the set and the sizes of all holds. Not held while a connection is cut.
        self._lock = threading.Lock()
        self._holds: set[Hold] = set()

    @property
    def size_bytes(self) -> int:
        with self._lock:
            return sum(hold.size_bytes for hold in self._holds)

    def resize(self, hold: Hold, size_bytes: int, config: Config) -> None:
        """Set the size of a hold. Raises MemoryFull when its owner would hold too much."""
        total_bytes = max(_MIN_MEMORY_BYTES, _MEMORY_BODIES * config.max_body_bytes)
        with self._lock:
            owned_bytes: collections.Counter[str] = collections.Counter()
            for each in self._holds:
                owned_bytes[each.owner] += each.size_bytes
            owned_bytes[hold.owner] += size_bytes - hold.size_bytes
            if size_bytes > hold.size_bytes and owned_bytes[hold.owner] > total_bytes // 2:
                raise MemoryFull(
                    "This key's requests and unread answers use all the memory that one caller "
                    "may have; try again when one of them is finished.", retry_after_s=1,
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


# How a Connection sends. Its socket never blocks, so a slow client does not hold up the thread
# that produces the answer (and that holds a slot of the gate). States:
#   direct    `_unsent` is empty: send() writes to the socket. Bytes that the socket does not accept
#             go to `_unsent`, a sender thread is started, and the state is buffered.
#   buffered  `_has_sender` is true: send() only appends, within the memory budget. The sender
#             thread writes when the client reads. When `_unsent` is empty it ends: direct again.
#   broken    `_is_broken` is true, for good: the client disconnected, read nothing for the write
#             timeout, or used up its memory. send() and flush() raise ClientGone.


class Connection:
    """A client's connection: the Client that producers of answers watch, the socket of its
    Exchange, and the facts by which the server chooses a connection to close for a new one."""

    def __init__(self, sock: socket.socket, peer: str, budget: MemoryBudget) -> None:
        self.peer = peer
        #: Whether a request on it is being answered.
        self.is_busy = False
        #: Whether it has sent a request of a caller that may use the API.
        self.is_trusted = False
        self.opened_s = time.monotonic()
        #: When bytes last came from the client or were last sent to it.
        self.quiet_since_s = self.opened_s
        #: The config of its current request.
        self.config: Config | None = None
        self._socket = sock
        sock.setblocking(False)
        self._budget = budget
        self.unread = Hold(self.cut)
        # Guards the fields below and the socket: a TLS socket must not be read and written at the
        # same time, and a sender thread may write while the client is watched.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        #: Bytes that were read while watching for a hang-up.
        self._read_ahead = bytearray()
        #: Bytes that the client has not accepted yet.
        self._unsent = bytearray()
        self._has_sender = False
        self._is_read_closed = False
        self._is_broken = False
        #: Whether `cancel` ended it: no further request can be read.
        self.is_cancelled = False

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def is_tls(self) -> bool:
        return isinstance(self._socket, ssl.SSLSocket)

    # -- reading --------------------------------------------------------------------------------

    def gone(self) -> bool:
        with self._lock:
            if not self._is_read_closed and not self._is_broken and self._free_ahead_bytes():
                try:
                    piece = self._socket.recv(self._free_ahead_bytes())
                    self._is_read_closed = not piece
                    self._read_ahead += piece
                except _WOULD_BLOCK:
                    pass
                except OSError:
                    self._is_read_closed = True
            return self._is_read_closed or self._is_broken

    def can_detect_hangup(self) -> bool:
        """Return whether there is room to read ahead: a full buffer hides the end of the stream."""
        return bool(self._free_ahead_bytes())

    def cancel(self) -> None:
        """Make `gone` return True from now on. Bytes sent to the client still arrive."""
        self.is_cancelled = self._is_read_closed = True
        with contextlib.suppress(OSError):
            # Not SSLSocket.shutdown, which would end the encryption too.
            socket.socket.shutdown(self._socket, socket.SHUT_RD)

    def _free_ahead_bytes(self) -> int:
        return _MAX_AHEAD_BYTES - len(self._read_ahead)

    def receive_into(self, buffer: Any) -> int | None:
        """Read available bytes and return their number: 0 = end of stream, None = none yet."""
        with self._lock:
            count = min(len(buffer), len(self._read_ahead))
            if count:
                buffer[:count] = self._read_ahead[:count]
                del self._read_ahead[:count]
                return count
            try:
                count = self._socket.recv_into(buffer)
            except _WOULD_BLOCK:
                return None
        self.quiet_since_s = time.monotonic()
        return count

    def wait_readable(self, timeout_s: float) -> None:
        self._poll(select.POLLIN, timeout_s)

    def peek(self, timeout_s: float) -> bytes:
        """Return the next byte and leave it in the socket, which must not use TLS; return b"" at
        the end of the stream. Raises OSError, also when no byte arrives in time."""
        self.wait_readable(timeout_s)
        return self._socket.recv(1, socket.MSG_PEEK)

    def start_tls(self, context: ssl.SSLContext, timeout_s: float) -> None:
        """Perform the TLS handshake. Raises OSError."""
        self._socket.settimeout(timeout_s)
        self._socket = context.wrap_socket(self._socket, server_side=True)
        self._socket.setblocking(False)

    # -- writing --------------------------------------------------------------------------------

    @property
    def has_unread(self) -> bool:
        """Return whether bytes for the client are still unsent."""
        return bool(self._unsent)

    def send(self, data: bytes) -> None:
        """Send data without waiting; what the socket does not accept is sent later. Raises
        ClientGone when the connection is broken."""
        with self._lock:
            if self._is_broken:
                raise ClientGone
            if not self._unsent:
                data = data[self._send_now(data):]
            if not data:
                return
            self._unsent += data
            needs_sender = not self._has_sender
            self._has_sender = True
        self._update_budget()
        if needs_sender:
            try:
                threading.Thread(target=self._run_sender, daemon=True).start()
            except RuntimeError:
                self._break()
                raise ClientGone from None

    def flush(self) -> None:
        """Wait until all data is sent. Raises ClientGone when the connection is broken."""
        with self._lock:
            self._changed.wait_for(lambda: self._is_broken or not self._unsent)
            if self._is_broken:
                raise ClientGone

    def _send_now(self, data: bytes | bytearray) -> int:
        """Send what the socket accepts and return the number of bytes. Raises ClientGone. The
        caller holds the lock."""
        sent = 0
        # Before the bytes leave: the client may act on them before this thread runs again.
        self.quiet_since_s = time.monotonic()
        try:
            with memoryview(data) as view:
                while sent < len(data):
                    # TLS requires that a retry begins with the same bytes and is not shorter.
                    sent += self._socket.send(view[sent:sent + _MAX_SENT_BYTES])
        except _WOULD_BLOCK:
            pass
        except OSError:
            self._is_broken = True
            raise ClientGone from None
        return sent

    def _run_sender(self) -> None:
        """Send the unsent bytes as the client reads, until all are sent or it stops reading."""
        while True:
            timeout_s = self.config.write_timeout_ms / 1000 if self.config else _LINGER_S
            can_write = self._poll(select.POLLOUT, timeout_s)
            with self._lock:
                if not can_write:
                    self._is_broken = True
                try:
                    if not self._is_broken:
                        del self._unsent[:self._send_now(self._unsent)]
                except ClientGone:
                    pass
                if self._is_broken:
                    self._unsent.clear()
                is_done = not self._unsent
                self._has_sender = not is_done
                self._changed.notify_all()
            self._update_budget()
            if is_done:
                if self._is_broken:
                    self.cut()
                return

    def _update_budget(self) -> None:
        """Charge the unsent bytes to the budget; break the connection if they are too many."""
        if self.config is None:
            return
        try:
            self._budget.resize(self.unread, len(self._unsent), self.config)
        except MemoryFull:
            self._break()

    def _poll(self, event: int, timeout_s: float) -> bool:
        """Wait for the socket; return whether it is ready or failed before the timeout."""
        try:
            poller = select.poll()
            poller.register(self._socket, event)
            return bool(poller.poll(max(0.0, timeout_s) * 1000))
        except (OSError, ValueError):
            # Another thread closed the socket.
            return True

    # -- closing --------------------------------------------------------------------------------

    def cut(self) -> None:
        """Break the connection. Any thread may call this; pending reads and writes fail."""
        self._is_broken = True
        with contextlib.suppress(OSError):
            # Not SSLSocket.shutdown, which drops the TLS state while other threads use it.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _break(self) -> None:
        """Cut the connection, drop the unsent bytes and wake up flush()."""
        self.cut()
        with self._lock:
            self._unsent.clear()
            self._changed.notify_all()

    def linger(self, timeout_s: float) -> None:
        """Close the sending side, then read and drop what the client still sends, because closing
        at once would reset the connection before the client has read the answer."""
        deadline_s = time.monotonic() + timeout_s
        buffer = bytearray(_MAX_SENT_BYTES)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline_s:
                count = self.receive_into(memoryview(buffer))
                if count is None:
                    self.wait_readable(deadline_s - time.monotonic())
                elif not count:
                    return

    def close(self) -> None:
        """Close the socket; over TLS after a close notification."""
        if isinstance(self._socket, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                self._socket.unwrap()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_WR)
        self._socket.close()


class DeadlineReader(io.RawIOBase):
    """A reader of a connection with one deadline for all reads, not one for each."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._deadline_s = 0.0
        self.received_bytes = 0

    def allow(self, seconds: float) -> None:
        """Set the deadline to this many seconds from now."""
        self._deadline_s = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for bytes and read them; return their number. Raises socket.timeout at the
        deadline."""
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
    """The open connections. When there are too many, an idle one is closed for a new one, so that
    clients that hold connections without using them cannot lock others out."""

    def __init__(self) -> None:
        # Guards the set.
        self._lock = threading.Lock()
        self._open: set[Connection] = set()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Connection, maximum: int) -> Connection | None:
        """Add a connection; return the one that was closed for it, if any. Raises Busy when there
        is no idle one to close."""
        with self._lock:
            evicted = self._eviction_candidate() if len(self._open) >= maximum else None
            if evicted is not None:
                self._open.remove(evicted)
            elif len(self._open) >= maximum:
                raise Busy("Too many connections are open.", retry_after_s=5)
            self._open.add(connection)
        if evicted is not None:
            evicted.cut()
        return evicted

    def remove(self, connection: Connection) -> None:
        with self._lock:
            self._open.discard(connection)

    def is_any_unread(self) -> bool:
        """Return whether a client has not read all of its answer yet."""
        with self._lock:
            return any(each.has_unread for each in self._open)

    def _eviction_candidate(self) -> Connection | None:
        """Return the idle connection to close first. Untrusted ones come first, unless they are so
        new that their request may be on its way; then those of the address with the most
        connections, then the longest quiet. The caller holds the lock."""
        open_per_peer = collections.Counter(each.peer for each in self._open)
        newcomers_s = time.monotonic() - _NEWCOMER_S
        return max(
            (each for each in self._open if not each.is_busy),
            key=lambda each: (
                not each.is_trusted and each.opened_s <= newcomers_s,
                open_per_peer[each.peer], -each.quiet_since_s,
            ),
            default=None,
        )


# ==== 36. State folder =======================================================
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
#: Written by `ocp update --check`.
_NEWEST_RELEASE_FILE = "newest-release"
#: How often the place of the database is looked at.
_LOOK_EVERY_S = 10.0


class StateFolder:
    """The folder of the database, the log and the admin key."""

    def __init__(self, config: Config, log: Log, clock: Clock, *, is_demo: bool) -> None:
        """Open the database; the log goes to the folder from now on. A demo keeps everything in
        memory, so that several can run. Raises HomeInUse."""
        self._path = config.home_path
        self._log = log
        self._clock = clock
        self._lock: HomeLock | None = None
        #: What to do about a folder that cannot be used; empty when it can be.
        self._memory_fix = ""
        #: Whether the file admin-key has the admin key.
        self.has_admin_key_file = False
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
        if self.store.is_in_memory:
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

    def path_of(self, name: str) -> str:
        """Return the path of a file or folder in it."""
        return os.path.join(self._path, name)

    def newer_release(self) -> str | None:
        """Return the release that `ocp update --check` has found, if it is newer than this one. The
        server itself asks nobody."""
        try:
            with open(self.path_of(_NEWEST_RELEASE_FILE), encoding="ascii") as file:
                found = file.read(40).strip()
        except (OSError, UnicodeDecodeError):
            return None
        if not re.fullmatch(r"[0-9]+(\.[0-9]+){2}", found):
            return None
        numbers = [[int(part) for part in text.split(".")] for text in (found, VERSION)]
        return found if numbers[0] > numbers[1] else None

    def with_admin_key(self, config: Config) -> Config:
        """Return the configuration with the admin key, which the first start creates."""
        if config.admin_key or config.mode == "none":
            return config
        path = self.path_of("admin-key")
        try:
            with open(path, encoding="ascii") as file:
                found = file.read().strip()
        except (OSError, ValueError):
            found = ""
        key = found or "ocp_admin_" + secrets.token_urlsafe(24)
        self.has_admin_key_file = bool(found)
        if not found:
            try:
                write_private(path, key + "\n")
                self._log.audit("admin_key_made", path=path)
                self.has_admin_key_file = True
            except OSError as problem:
                self._log.event(
                    "error", "admin_key_not_kept", error=str(problem),
                    help="set OCP_ADMIN_KEY: nobody knows the admin key now",
                )
        return dataclasses.replace(config, admin_key=key)

    def announce_stop(self) -> None:
        """Let a server that starts in this folder wait for this one."""
        if self._lock is not None:
            self._lock.mark_stopping()

    def close(self) -> None:
        """Close the database and leave the folder to the next server."""
        self.store.close()
        self._log.close()
        if self._lock is not None:
            self._lock.close()

    def _open_store(self, config: Config, is_demo: bool) -> Store:
        path = self.path_of("ocp.db")
        try:
            for folder in (os.path.dirname(self._path), self._path) if is_demo else (self._path,):
                os.makedirs(folder, mode=0o700, exist_ok=True)
            self._lock = HomeLock(self._path, config.drain_ms / 1000 + _STOP_PATIENCE_S)
            logs = self.path_of("logs")
            self._log.to_file(os.path.join(logs, "ocp.log"))
            self._make_private(self._path, *_entries(self._path), *_entries(logs))
            return Store(":memory:" if is_demo else path)
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


# ==== 37. Answering ==========================================================
# One request from its quota to its row of usage. `Requests` has all that are being answered and
# decides where an answer comes from; a `TurnRunner` gets one answer from a claude process; a `Job`
# is one request, and its `AnswerRecord`s hold what is known of its answers meanwhile.


class AnswerRecord:
    """What is known of one answer while it is generated."""

    def __init__(self, turn: Turn, started_s: float) -> None:
        self.turn = turn
        self.started_s = started_s
        #: The process that generates it, until that is parked or stopped.
        self.process: ClaudeProcess | None = None
        self.first_token_s: float | None = None
        #: Whether an idle process took it, and how the process got the conversation: "continued",
        #: "rewound" to another last question, "rebuilt" from its history, or "fresh": it has none.
        self.warm: bool | None = None
        self.path: str | None = None
        self.parted_at: int | None = None
        self.finished: Finished | None = None
        #: The reader of each request to claude. There is more than one after a retry.
        self.readers: list[TurnReader] = []
        #: Whether the API refused it before the answer began, or because it is too long: then the
        #: model has not read it.
        self.refused = False
        self.is_unread = False
        self.response_chars = 0
        self._begun: Usage | None = None
        #: Whether the client got a block of it.
        self.has_output = False
        #: Whether the log has it.
        self.is_logged = False
        self._builder = AnswerBuilder()

    def add(self, event: Event, now_s: float) -> None:
        """Record an event."""
        self._builder.add(event)
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
        """Return whether the process failed for a reason that another process does not have: it
        hangs, or it had died while it was idle."""
        process = self.process
        return process is not None and (
            process.broken or (bool(self.warm) and not process.alive())
        )

    @property
    def usage(self) -> Usage:
        """Return the usage so far. The output of an unfinished answer is estimated."""
        if self.finished is not None:
            return self.finished.usage
        begun = self._begun or NO_USAGE
        return begun._replace(output_tokens=round(self.response_chars / ESTIMATE_CHARS_PER_TOKEN))

    @property
    def spent(self) -> Usage:
        """Return the usage of all attempts, failed ones included. What the API did not report is
        estimated; what it refused counts as nothing."""
        if not self.readers or self.refused:
            return NO_USAGE
        spent = sum_usage(reader.spent for reader in self.readers)
        if not spent.prompt_tokens and not self.is_unread:
            spent = spent._replace(input_tokens=estimate_tokens(self.turn))
        if not self.readers[-1].finished:
            estimate = round(self.response_chars / ESTIMATE_CHARS_PER_TOKEN)
            spent = spent._replace(output_tokens=max(spent.output_tokens, estimate))
        return spent

    def fail(self, error: OcpError) -> None:
        """Record why there is no answer."""
        self.refused = error.refused_upstream and self._begun is None
        self.is_unread = isinstance(error, ContextTooLong)

    def answer(self) -> Answer:
        """Return the whole answer. Raises UpstreamFailed when it is not complete."""
        if self.finished is None:
            raise UpstreamFailed("The answer ended before it was complete.")
        return self._builder.answer(self.finished)

    def fields(self, now_s: float) -> Json:
        """Return the fields of the log line."""
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


class Job:
    """A request that is being answered, up to its one row of usage."""

    def __init__(
        self, turn: Turn, caller: Caller, client: Client, request_id: str, dialect: str,
        now_s: float, *, peer: str = "", user_agent: str = "",
    ) -> None:
        """`dialect` is the name of the dialect; `peer` and `user_agent` tell the operator who
        sent a request that fails."""
        self.turn = turn
        self.caller = caller
        self.client = client
        self.request_id = request_id
        self.dialect = dialect
        self.peer = peer
        self.user_agent = user_agent
        self.started_s = now_s
        self.records = [AnswerRecord(turn.choice(index), now_s) for index in range(turn.choices)]
        self.reservation = Reservation(None, 0)
        #: What the cache did for it: "hit", "miss", "shared" or "bypass".
        self.cache_status = "bypass"
        #: "cached" or "shared" for an answer that another request generated.
        self.path: str | None = None
        #: Response headers that are known only when claude has answered.
        self.headers: dict[str, str] = {}
        #: Why it was cancelled although its client waits.
        self.ended_by: OcpError | None = None
        #: Whether the row of usage is written, or is left to another job.
        self.is_recorded = False

    @property
    def finished(self) -> bool:
        """Return whether all answers are complete."""
        return all(record.finished is not None for record in self.records)

    def glance(self, now_s: float) -> Json:
        """Return what the operator sees of a running request."""
        first = self.records[0]
        first_s = first.first_token_s
        return {
            "request_id": self.request_id,
            "key_name": self.caller.name,
            "model": self.turn.model.id,
            "dialect": self.dialect,
            "stream": self.turn.stream,
            "state": "running" if first.path or self.path or first_s is not None else "queued",
            "path": self.path or first.path,
            "first_token_ms": None if first_s is None else round((first_s - self.started_s) * 1000),
            "elapsed_ms": round((now_s - self.started_s) * 1000),
            "response_chars": sum(record.response_chars for record in self.records),
        }

    @property
    def counted(self) -> int:
        """Return the number of requests that it counts for in quotas."""
        asked = [record for record in self.records if record.readers and not record.refused]
        return 0 if self.path else len(asked)

    @property
    def was_asked(self) -> bool:
        """Return whether any part of it was sent to claude."""
        return any(record.readers for record in self.records)

    def answers(self) -> tuple[Answer, ...]:
        """Return the whole answers. Raises UpstreamFailed when they are not complete."""
        return tuple(record.answer() for record in self.records)

    def row(self, word: str, status: int, at_s: float, now_s: float) -> UsageRow:
        """Return the row of usage for a request that ended like this."""
        first = self.records[0]
        usages = [NO_USAGE if self.path else record.spent for record in self.records]
        firsts = [
            record.first_token_s for record in self.records
            # A cached answer says nothing about how fast claude is.
            if record.first_token_s is not None and self.path != "cached"
        ]
        return UsageRow(
            at_s=at_s,
            request_id=self.request_id,
            key_id=self.caller.key_id,
            caller=self.caller.name,
            model=self.turn.model.id,
            dialect=self.dialect,
            outcome=word,
            status=status,
            counted=self.counted,
            stop_reason=first.finished.stop_reason if first.finished else None,
            stream=self.turn.stream,
            warm=first.warm,
            path=self.path or first.path,
            prompt_chars=prompt_chars(self.turn),
            response_chars=sum(record.response_chars for record in self.records),
            input_tokens=sum(usage.input_tokens for usage in usages),
            output_tokens=sum(usage.output_tokens for usage in usages),
            cache_read_tokens=sum(usage.cache_read_tokens for usage in usages),
            cache_write_tokens=sum(usage.cache_write_tokens for usage in usages),
            first_token_ms=round((min(firsts) - self.started_s) * 1000) if firsts else None,
            total_ms=round((now_s - self.started_s) * 1000),
            web_search_requests=sum(usage.web_search_requests for usage in usages),
        )


class CallWatch:
    """Holds an answer back until it calls the tool that the client forces, for a model that can
    only be told to. An answer without the call is dropped once, to be asked for again."""

    def __init__(self, choice: ToolChoice) -> None:
        #: Empty = any tool.
        self._name = choice.name
        self._held: list[Event] = []
        self._is_released = False
        #: The usage of the answer that was dropped; None = there was none.
        self._dropped: Usage | None = None
        #: Whether the answer goes to the client without the call.
        self.is_missing = False

    def begin(self) -> None:
        """Begin an answer: nothing of an earlier one counts."""
        self._held = []
        self._is_released = False

    def events(self, event: Event) -> list[Event]:
        """Return the events for the client; none if `event` ends an answer that is dropped."""
        if isinstance(event, Restarted):
            was_released = self._is_released
            self.begin()
            return [event] if was_released else [Pause()]
        if self._is_released or isinstance(event, (Tick, Pause)):
            return [event]
        self._held.append(event)
        if isinstance(event, Finished):
            # A limit or a refusal would be met again.
            if self._dropped is None and event.stop_reason in ("end_turn", "tool_use"):
                self._dropped = event.usage
                return []
            self.is_missing = self._had_room(event)
        elif not self._is_call(event):
            return [Pause()]
        self._is_released = True
        return self._held

    def _had_room(self, finished: Finished) -> bool:
        """Return whether the limit left room for a call: the model did more than think."""
        blocks = (event.block for event in self._held if isinstance(event, BlockStarted))
        has_content = any("thinking" not in block["type"] for block in blocks)
        return has_content or finished.stop_reason != "max_tokens"

    def _is_call(self, event: Event) -> bool:
        block = event.block if isinstance(event, BlockStarted) else {}
        is_call = block.get("type") in ("tool_use", "server_tool_use")
        return is_call and self._name in ("", block["name"])

    def with_dropped(self, usage: Usage) -> Usage:
        """Return the usage of an answer together with that of the dropped one."""
        return usage if self._dropped is None else sum_usage([self._dropped, usage])


#: How long claude may take to rewind, which is a matter of milliseconds; and the pause after a
#: process that could not.
_REWIND_TIMEOUT_S = 2.0
_REWIND_PAUSE_S = 60.0
#: How long claude may take to forget a question whose client has left. Its answer keeps its place
#: among the running ones for so long.
_TAKE_BACK_TIMEOUT_S = 1.0


#: The shortest prompt that the API caches for every model (Anthropic's docs, "Prompt caching").
_MIN_CACHED_TOKENS = 4_096


def missed_prompt_cache(usage: Usage) -> bool:
    """Return whether the API read less than half of a prompt from its cache, although the prompt
    is long enough for it."""
    prompt_tokens = usage.prompt_tokens
    return prompt_tokens >= _MIN_CACHED_TOKENS and 2 * usage.cache_read_tokens < prompt_tokens


def tick_s_of(config: Config, turn: Turn) -> float:
    """Return the silence after which a client needs a sign of life; 0 = never."""
    return (config.heartbeat_ms if turn.stream else config.whole_silence_ms) / 1000


class Attempt(NamedTuple):
    """A way to the answer, with a process that was taken for it."""

    process: ClaudeProcess
    #: What the process holds before the last message, once it has the input.
    conversation: Conversation
    turn_input: TurnInput
    #: The rewind point of the last message, in a tuple; empty if that has tool results.
    question: tuple[RewindPoint, ...] = ()


class AttemptSource:
    """Takes processes for the attempts to get one answer: continued, rewound or rebuilt, see
    Conversations."""

    def __init__(
        self, app: App, job: Job, record: AnswerRecord, turn: Turn, limits: WaitLimits
    ) -> None:
        self._app = app
        self._job = job
        self._record = record
        self._config = app.config
        self._limits = limits
        self._message = turn.messages[-1]
        #: Whether reminders may be pinned to the first message of the history.
        self.can_pin = True
        self.set_turn(turn)

    def set_turn(self, turn: Turn) -> None:
        """Get the answer to another form of the same request from now on."""
        self.turn = turn
        self.history = history_of(turn, self._job.caller.scope, self._config.system_prompt)

    def can_continue(self) -> bool:
        """Return whether `continued` would return an attempt."""
        return self._app.pool.can_continue(self.history, self._message)

    def continued(self) -> Attempt | None:
        """Take a process that holds everything but the last message."""
        pool = self._app.pool
        pooled = pool.take(self.history, self._message)
        if pooled is None:
            self._record.parted_at = pool.common_prefix(self.history)
            return None
        return self._next_messages(pooled.process, pooled.conversation, "continued")

    def rewound(self) -> Attempt | None:
        """Take a process that holds a beginning of the conversation and other messages, and make it
        drop these.

        Not in agent mode: what claude's own tools have begun would not be dropped."""
        app = self._app
        if self._config.is_agent:
            return None
        pooled = app.pool.take_rewindable(
            self.history, self._config, app.gate.running_by_caller()
        )
        if pooled is None:
            return None
        process, held = pooled.process, pooled.conversation
        self._record.process = process
        dropped = held.dropped_for(self.history, process.version)
        if dropped is not None and self._drops(process, dropped):
            return self._next_messages(process, held.rewound(dropped), "rewound")
        app.pool.pause_rewinds(_REWIND_PAUSE_S)
        self.give_up()
        return None

    def _drops(self, process: ClaudeProcess, dropped: tuple[RewindPoint, ...]) -> bool:
        """Make a process drop its last user messages, if any. Return whether it did; a failure
        counts as a refusal."""
        if not dropped:
            return True
        deadline_s = self._app.clock() + _REWIND_TIMEOUT_S
        limits = self._limits._replace(deadline_s=deadline_s, tick_s=0.0)
        try:
            replies = process.control([rewind_line(point) for point in dropped], limits)
        except (UpstreamFailed, UpstreamTimeout):
            return False
        process.rewinds += len(dropped)
        return all(map(was_rewound, replies))

    def _next_messages(
        self, process: ClaudeProcess, held: Conversation, path: str
    ) -> Attempt:
        """Return the attempt to send a process the messages that it does not hold yet."""
        record, turn = self._record, self.turn
        record.process, record.warm, record.path = process, True, path
        lifetime = turn.cache_lifetime
        settings = b"" if lifetime == held.cache_lifetime else lifetime_line(lifetime)
        if held.awaiting:
            results = results_with_context(self._message, held.history.context)
            held = held._replace(cache_lifetime=lifetime)
            return Attempt(process, held, TurnInput([settings], results))
        if len(held.history.digests) < len(turn.messages) - 1:
            turn = self._with_thinking()
        return self._attempt_with(process, held, turn, settings + thinking_again(turn))

    def _with_thinking(self) -> Turn:
        """Return the turn with the thinking that its client does not send."""
        return self._app.thinking.restored(self.turn, self._job.caller.scope)

    def _attempt_with(
        self, process: ClaudeProcess, held: Conversation, turn: Turn, setup: bytes
    ) -> Attempt:
        """Return the attempt to send a process the messages that it does not hold yet, with `setup`
        in front."""
        start = len(held.history.digests)
        # An agent that asked the API would run its tools.
        pins = start == 0 and self.can_pin and not self._config.is_agent and (
            self._app.pinning.is_used(process.version)
        )
        steps, points = message_steps(turn, process.version, setup, start=start, pin=pins)
        count = len(points) - (not turn.messages[-1].has_results)
        held = held.with_history_of(self.history, points[:count], turn.cache_lifetime)
        return Attempt(process, held, TurnInput(steps, pins=pins), points[count:])

    def rebuilt(self) -> Attempt:
        """Take a fresh process for the whole conversation."""
        app, record, turn = self._app, self._record, self._with_thinking()
        record.path = "rebuilt" if len(turn.messages) > 1 else "fresh"
        has_schema = turn.output_schema is not None
        if turn.model.known:
            # Other models have to prove that they exist before processes wait for them.
            app.pool.mark_used(turn.model.argument, has_schema=has_schema)
        spare = app.pool.take_spare(turn.model.argument, has_schema=has_schema)
        process = record.process = spare or app.pool.start(turn.model.argument)
        record.warm = spare is not None
        app.wakeups.put("tend")
        process.tools = ToolServer(turn.tools)
        config = app.config
        setup = setup_lines(
            turn, config.system_prompt, agent=config.is_agent, is_primed=process.is_primed
        )
        return self._attempt_with(process, NO_CONVERSATION, turn, setup)

    def give_up(self) -> None:
        """Stop the process of an answer that is not complete."""
        process, self._record.process = self._record.process, None
        if process is not None:
            self._app.pool.stop(process, graceful=False)
            self._app.wakeups.put("tend")


class TurnRunner:
    """Gets one answer from claude: waits for a place, takes a process, converses with it, and puts
    it away.

    The ways to an answer are tried from the quickest to the slowest: a parked process is continued
    or rewound; else the conversation is rebuilt on a fresh process, and once more if that process
    dies before any text was sent. It is also rebuilt, with another turn, when the API refuses what
    other models accept, and when a tool call is missing.
    """

    def __init__(self, app: App, job: Job, record: AnswerRecord) -> None:
        self._app = app
        self._job = job
        self._record = record
        config = self._config = app.config
        #: The attempt that is under way.
        self._attempt: Attempt | None = None
        #: Whether the process of an answer that nobody waits for serves again.
        self._is_process_kept = False
        self._limits = WaitLimits(
            client=job.client,
            deadline_s=record.started_s + config.timeout_ms / 1000,
            tick_s=tick_s_of(config, record.turn),
        )
        self._source = AttemptSource(app, job, record, record.turn, self._limits)
        self._watch = self._watch_for(record.turn)

    def _watch_for(self, turn: Turn) -> CallWatch | None:
        # A structured answer is a tool call already.
        is_watched = turn.must_be_told_to_call and turn.output_schema is None
        return CallWatch(turn.tool_choice) if is_watched else None

    @contextlib.contextmanager
    def answering(self) -> Iterator[Iterator[Event]]:
        """Give the events of the answer; leaving the block frees its place and its process. The
        log has its line before the last event, or before the failure, is passed on."""
        record = self._record
        try:
            with contextlib.ExitStack() as stack:
                # The events are closed first: nothing else may read the process then.
                with contextlib.closing(self._events(stack)) as events:
                    yield self._logged(events)
        except ClientGone:
            self._log("info", "answer_abandoned", process_kept=self._is_process_kept)
            raise
        except OcpError as error:
            record.fail(error)
            if isinstance(error, UnknownModel):
                error.message += self._other_models()
            if isinstance(error, LoginLost):
                self._app.login_lost()
            error.logged = True
            self._log(
                "warn", "answer_failed", status=error.status, kind=error.kind,
                message=error.message,
            )
            raise

    def _logged(self, events: Iterator[Event]) -> Iterator[Event]:
        for event in events:
            if isinstance(event, Finished):
                self._log("info", "answer_finished")
                if self._record.path == "rebuilt" and missed_prompt_cache(event.usage):
                    self._log_cache_miss(event.usage)
            yield event

    def _log(self, level: str, name: str, **more: object) -> None:
        record, job = self._record, self._job
        if record.is_logged:
            return
        record.is_logged = True
        self._app.log.event(
            level, name, request_id=job.request_id, caller=job.caller.name,
            dialect=job.dialect, **record.fields(self._app.clock()), **more,
        )

    def _log_cache_miss(self, usage: Usage) -> None:
        """Log that the API read most of a rebuilt conversation anew, which takes and costs more."""
        self._app.log.event(
            "info", "prompt_cache_missed", request_id=self._job.request_id,
            caller=self._job.caller.name, model=self._source.turn.model.id,
            prompt_tokens=usage.prompt_tokens, cached_tokens=usage.cache_read_tokens,
            parted_at=self._record.parted_at,
        )

    def _other_models(self) -> str:
        """Return what to tell a client whose model the API does not know."""
        models = self._app.models
        own = self._source.turn.model.id
        others = [name for name in models.names() if models.find(name).id != own]
        return f" Use one of: {', '.join(others)}." if others else ""

    def _events(self, stack: contextlib.ExitStack) -> Generator[Event, None, None]:
        app, record, source = self._app, self._record, self._source
        if not source.can_continue():
            # A process that holds the conversation continues it also while claude is updated.
            app.check_program()
        slot = stack.enter_context(app.gate.slot(self._job.caller))
        yield from slot.wait(self._limits, app.clock)
        app.check_extra_usage(source.turn.model.argument)
        stack.push(self._release)
        attempts: list[Callable[[], Attempt | None]] = [
            source.continued, source.rewound, source.rebuilt, source.rebuilt
        ]
        while attempts:
            attempt = attempts.pop(0)()
            if attempt is None:
                continue
            try:
                yield from self._converse(attempt)
                if record.finished is not None:
                    return
                self._log_change("call_missing")
                source.turn = with_reminder(source.turn)
                attempts = [source.rebuilt, source.rebuilt]
            except UpstreamFailed:
                may_retry = record.first_token_s is None and record.lost_its_process
                if not (attempts and may_retry):
                    raise
            except BadRequest as error:
                self._adapt(error)
                attempts = [source.rebuilt, source.rebuilt]
            except NotPinned as problem:
                self._stop_pinning(attempt.process.version, problem)
                attempts = [source.rebuilt, source.rebuilt]
            source.give_up()
            if record.has_output:
                record.add(Restarted(), app.clock())
                yield Restarted()

    def _adapt(self, error: BadRequest) -> None:
        """Change the turn, and remember it for the model, if the API refused what it accepts for
        other models; else raise the error."""
        refusal = refusal_of_model(self._source.turn, error)
        if refusal is None or self._record.has_output:
            raise error
        self._app.catalog.add_refusal(refusal)
        self._log_change("model_refuses", refused=refusal.field, detail=error.message)
        turn = after_refusal(self._source.turn, refusal)
        self._source.set_turn(turn)
        self._watch = self._watch_for(turn)

    def _stop_pinning(self, version: Version, problem: NotPinned) -> None:
        """Give the rest of this request's attempts, and all later ones if claude has asked the API,
        a history without a pin."""
        self._source.can_pin = False
        if problem.was_asked:
            self._app.pinning.give_up(version, str(problem))
        if problem.line.get("type") == "stream_event":
            # What the API has counted until now.
            self._record.readers[-1].events(problem.line)

    def _log_change(self, name: str, **more: object) -> None:
        """Log why the request is repeated in another form."""
        self._app.log.event(
            "warn", name, request_id=self._job.request_id, model=self._source.turn.model.id, **more
        )

    # -- converse ---------------------------------------------------------------------------------

    def _converse(self, attempt: Attempt) -> Iterator[Event]:
        """Give the events of the answer. The process is parked before the last of them is passed
        on, so that the client's next message finds it."""
        record, turn = self._record, self._source.turn
        self._attempt = attempt
        final_only = self._config.is_agent and self._config.agent_text == "final"
        offered, _ = turn.tools_for_model
        reader = TurnReader(offered, turn.output_schema, final_only=final_only)
        record.readers.append(reader)
        bounds = AnswerFilter(turn.options, turn.output_schema)
        told = AnswerBuilder() if turn.options.hides_thinking else None
        if self._watch is not None:
            self._watch.begin()
        for heard in attempt.process.converse(attempt.turn_input, self._limits, reader):
            if isinstance(heard, Pause):
                yield heard
                continue
            if told is not None:
                told.add(heard)
            for event in self._released(bounds.events(heard)):
                if isinstance(event, Finished):
                    usage = record.usage if bounds.ended else event.usage
                    if self._watch is not None:
                        usage = self._watch.with_dropped(usage)
                    event = event._replace(usage=usage)
                record.add(event, self._app.clock())
                if isinstance(event, Finished):
                    if not bounds.ended:
                        self._remember_thinking(event, told)
                    self._put_away(attempt, event, is_cut=bounds.ended)
                yield event
            if bounds.ended:
                return

    def _released(self, events: list[Event]) -> list[Event]:
        """Return the events that need not wait for a call, and tell the client if it is missing."""
        watch = self._watch
        if watch is None:
            return events
        released = [each for event in events for each in watch.events(event)]
        if watch.is_missing:
            self._job.headers["X-OCP-Tool-Choice"] = "not-honoured"
        return released

    def _remember_thinking(self, finished: Finished, told: AnswerBuilder | None) -> None:
        """Keep the thinking of an answer that is one message of the model. An agent's answer has
        several, and a structured one was a call of claude's own. `told` has what the client does
        not get of it."""
        turn, scope = self._record.turn, self._job.caller.scope
        is_message = not self._config.is_agent and turn.output_schema is None
        if is_message and finished.stop_reason in PARKABLE:
            answer = self._record.answer() if told is None else told.answer(finished)
            self._app.thinking.put(turn, scope, answer.blocks)

    # -- release ----------------------------------------------------------------------------------

    def _put_away(self, attempt: Attempt, finished: Finished, *, is_cut: bool) -> None:
        """Park the process of a complete answer if it can serve again, else stop it. `is_cut`
        means that claude still writes an answer that was ended here."""
        app, process = self._app, attempt.process
        app.account.set_login(True)
        app.pool.mark_used(process.model_id)
        conversation = None if is_cut else self._conversation_after(attempt, finished)
        self._record.process = None
        if conversation is not None:
            app.pool.park(process, conversation)
        else:
            # With a call unanswered, or after a limit, claude would send another request on its
            # own.
            is_complete = finished.stop_reason in ("end_turn", "stop_sequence") and not is_cut
            app.pool.stop(process, graceful=is_complete)
        app.wakeups.put("tend")

    def _conversation_after(self, attempt: Attempt, finished: Finished) -> Conversation | None:
        """Return what the process holds after a complete answer; None if it cannot serve again."""
        process = attempt.process
        if finished.stop_reason not in PARKABLE or not self._can_park(process):
            return None
        # A structured answer ended in a call of claude's own.
        is_dead_end = self._source.turn.output_schema is not None
        answer, held = self._record.answer(), attempt.conversation
        held = held._replace(rewind_points=held.rewind_points + attempt.question)
        conversation = held.after(answer, self._source.history, is_dead_end=is_dead_end)
        if is_dead_end and not self._can_rewind(process, conversation):
            return None
        return conversation

    def _can_park(self, process: ClaudeProcess) -> bool:
        """Return whether processes are parked, and this one is of the claude in use."""
        is_current = self._app.program_monitor.is_current(process.version)
        return bool(self._config.parked_processes) and is_current and not process.version_differs

    def _can_rewind(self, process: ClaudeProcess, conversation: Conversation) -> bool:
        """Return whether a process can be rewound to the start of a conversation. Tool results go
        to a fresh process, and a call without its result cannot be rewound past."""
        if not conversation.rewind_points or conversation.awaiting:
            return False
        return process.version >= REWINDS_ALL_SINCE and not self._config.is_agent

    def _release(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Put away the process of an answer that is not complete. It serves again if only the
        client has left. This thread alone may touch it, so it waits for that itself."""
        attempt = self._attempt
        try:
            if isinstance(error, ClientGone) and attempt is not None and self._takes_back(attempt):
                self._record.process, self._is_process_kept = None, True
                self._app.pool.park(attempt.process, attempt.conversation)
                self._app.wakeups.put("tend")
        finally:
            self._source.give_up()

    def _takes_back(self, attempt: Attempt) -> bool:
        """Make the process of an answer that nobody waits for drop the question. Return whether it
        did; a failure counts as a refusal."""
        if not attempt.question or not self._can_take_back(attempt.process):
            return False
        deadline_s = self._app.clock() + _TAKE_BACK_TIMEOUT_S
        try:
            return attempt.process.take_back(
                attempt.question[-1], WaitLimits(NoClient(), deadline_s, 0.0)
            )
        except OcpError:
            return False

    def _can_take_back(self, process: ClaudeProcess) -> bool:
        """Return whether a process can drop the question that it is answering, and somebody may
        need it then. What claude's own tools have begun would not be dropped; a process that has
        not got its whole history holds no conversation; after an answer that has stopped, claude
        may be asking the API once more."""
        app, record = self._app, self._record
        is_wanted = self._job.ended_by is None and not app.draining and self._can_park(process)
        is_new_enough = process.version >= CANCELS_QUEUED_SINCE and process.rewinds < MAX_REWINDS
        if not (is_wanted and is_new_enough) or self._config.is_agent:
            return False
        is_answering = process is record.process and process.has_asked
        return is_answering and not record.readers[-1].finished


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
    def answering(self, job: Job) -> Iterator[Iterator[Choice]]:
        """Give the events of the answers to a request, as they come. Nothing but a place in the
        quotas is acquired before they are read; leaving the block frees everything, and by then
        the row of usage is written."""
        app = self._app
        app.metrics.add("ocp_requests_started_total")
        with self._lock:
            self._jobs.append(job)
        try:
            with self._recording(job):
                self._admit(job)
                with self._choices(job) as choices:
                    yield self._recorded(job, choices)
        finally:
            with self._lock:
                self._jobs.remove(job)

    def _admit(self, job: Job) -> None:
        """Reserve a place in the quotas of the job's key. Raises Draining, Unauthorized,
        QuotaExceeded, QueueFull, sqlite3.Error."""
        app, turn = self._app, job.turn
        if app.draining:
            raise Draining("The server is stopping; try again in a moment.", retry_after_s=5)
        # Only now that it can be seen among those that run: a key that ends now ends it.
        app.keys.current(job.caller)
        job.reservation = app.ledger.reserve(
            job.caller, self._likely_tokens(job), requests=turn.choices,
            bounded=turn.options.max_tokens is not None,
        )

    def _choices(self, job: Job) -> contextlib.AbstractContextManager[Iterator[Choice]]:
        """Return what gives the events: from the cache if that may be used, or from claude."""
        if is_cacheable(job.turn, self._app.config):
            return self._from_cache(job)
        self._app.cache.count_bypass()
        return self._produced(job)

    def end_unwanted(self) -> None:
        """End the requests whose keys were revoked or have expired, and tell their clients."""
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            try:
                self._app.keys.current(job.caller)
            except Unauthorized as ended:
                job.ended_by = job.ended_by or ended
                job.client.cancel()

    def check_quota(self, caller: Caller, dialect: Dialect) -> None:
        """Refuse, before its body is read, a request whose quota is used up. Raises
        QuotaExceeded, QueueFull, sqlite3.Error."""
        metrics = self._app.metrics
        try:
            self._app.ledger.check(caller)
        except OcpError as error:
            metrics.add("ocp_requests_started_total")
            metrics.add(
                "ocp_requests_total", dialect=dialect.name, model="other", outcome=error.kind
            )
            raise

    def running(self) -> list[Json]:
        """Return what can be seen of each request, oldest first."""
        with self._lock:
            jobs = list(self._jobs)
        return [job.glance(self._app.clock()) for job in jobs]

    def _likely_tokens(self, job: Job) -> int:
        """Return the tokens that the request is likely to take of its key's quotas."""
        turn = job.turn
        if job.caller.key_id is None:
            return 0
        maximum = min(turn.options.max_tokens or _LIKELY_ANSWER_TOKENS, turn.model.max_tokens)
        prompts = (estimate_tokens(turn.choice(index)) for index in range(turn.choices))
        # Of a longer prompt than the window the model reads nothing.
        return sum(min(prompt, turn.model.context_window) + maximum for prompt in prompts)

    # -- cached and shared answers ----------------------------------------------------------------

    @contextlib.contextmanager
    def _from_cache(self, job: Job) -> Iterator[Iterator[Choice]]:
        """Give the cached answer, or the one that is on its way to all who sent the same."""
        app, config = self._app, self._app.config
        key = cache_key(job.turn, job.caller, config.system_prompt)
        try:
            place = app.cache.lookup(key, config.cache_ttl_ms / 1000)
        except OSError as problem:
            raise cannot_start(problem) from None
        flight, job.cache_status = place.flight, place.status
        if flight is None:
            job.path = "cached"
            stored, is_streamed = enumerate(place.answers), job.turn.stream
            events = (
                (index, event) for index, answer in stored
                for event in replay_events(answer, is_streamed=is_streamed)
            )
            yield self._noted(job, events)
            return
        try:
            if place.status == "miss":
                self._start_producer(job, flight, config)
            else:
                job.path = "shared"
            tick_s = tick_s_of(config, job.turn)
            yield self._noted(job, flight.follow(job.client, tick_s, app.clock))
        finally:
            app.cache.unfollow(flight)

    def _noted(self, job: Job, choices: Iterator[Choice]) -> Iterator[Choice]:
        """Note events that another job's process made."""
        for index, event in choices:
            job.records[index].add(event, self._app.clock())
            yield index, event

    def _start_producer(self, job: Job, flight: Flight, config: Config) -> None:
        """Start a thread that produces the answer, so that it outlives the client that sent the
        request first. The row of usage and the reservation are the producer's from now on."""
        produced = Job(
            job.turn, job.caller, flight.client, job.request_id, job.dialect, job.started_s,
            peer=job.peer, user_agent=job.user_agent,
        )
        produced.reservation = job.reservation
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
        job.is_recorded, job.reservation = True, Reservation(None, 0)

    def _produce(self, job: Job, flight: Flight, config: Config) -> None:
        app = self._app
        answers: tuple[Answer, ...] = ()
        failure: OcpError | None = OcpError("OCP failed; its log has the details.")
        try:
            with self._recording(job), self._produced(job) as choices:
                for choice in self._recorded(job, choices):
                    if not isinstance(choice[1], (Tick, Pause)):
                        flight.add(choice)
            failure = None
            if all(a.stop_reason in _CACHEABLE and not a.refusal for a in job.answers()):
                answers = job.answers()
        except ClientGone:
            # All followers have left.
            pass
        except OcpError as error:
            failure = error
        except Exception as error:
            app.log.event(
                "error", "request_broke", request_id=job.request_id, error=format_failure(error)
            )
        finally:
            app.cache.settle(flight, answers, config)
            flight.end(failure)

    # -- produced answers -------------------------------------------------------------------------

    @contextlib.contextmanager
    def _produced(self, job: Job) -> Iterator[Iterator[Choice]]:
        """Give the events of claude's answers, one answer after another."""
        with contextlib.ExitStack() as running:
            def choices() -> Iterator[Choice]:
                for index, record in enumerate(job.records):
                    record.started_s = self._app.clock()
                    runner = TurnRunner(self._app, job, record)
                    for event in running.enter_context(runner.answering()):
                        yield index, event
                    # The next answer, too, waits for its turn.
                    running.close()

            yield choices()

    # -- usage ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _recording(self, job: Job) -> Iterator[None]:
        """Release the job's reservation at the end; write the row of usage if it failed."""
        failure: OcpError | ClientGone | None = None
        try:
            yield
        except ClientGone as left:
            failure = job.ended_by or left
            if job.ended_by is not None:
                raise job.ended_by from None
            raise
        except Exception as error:
            broke = OcpError(f"OCP failed: {redact_paths(repr(error))}")
            failure = error if isinstance(error, OcpError) else broke
            raise
        finally:
            if failure is not None:
                self._record(job, failure)
            self._app.ledger.release(job.reservation)

    def _recorded(self, job: Job, choices: Iterator[Choice]) -> Iterator[Choice]:
        """Write the row of usage before the last event is passed on."""
        for index, event in choices:
            if isinstance(event, Finished) and job.finished:
                self._record(job)
            yield index, event

    def _record(self, job: Job, error: OcpError | ClientGone | None = None) -> None:
        """Write the row of usage of a request that is over, once. One that was refused before
        any work is counted and logged only, or refusals could fill the disk."""
        app = self._app
        if job.is_recorded:
            return
        job.is_recorded = True
        word, status = "ok", 200
        if isinstance(error, OcpError):
            word, status = error.kind, error.status
        elif error is not None:
            word, status = error.outcome, error.status
        row = job.row(word, status, time.time(), app.clock())
        if isinstance(error, OcpError):
            row = row._replace(
                message=safe_text(error.message, 500), peer=job.peer,
                user_agent=safe_text(job.user_agent, 120),
            )
        self._count(row, known=job.turn.model.known)
        if job.path:
            app.log.event(
                "info", "answer_reused", request_id=row.request_id, caller=row.caller,
                dialect=row.dialect, path=job.path, model=row.model, stream=row.stream,
                total_ms=row.total_ms, outcome=word,
            )
        if isinstance(error, OcpError):
            if error.rejected_before_work and not job.was_asked:
                return
            error.has_row = True
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
        if row.web_search_requests:
            metrics.add("ocp_web_searches_total", row.web_search_requests, model=model)
        if row.path is not None:
            metrics.add("ocp_answers_total", path=row.path)


# ==== 38. App ================================================================
# Owns every long-lived object. The main thread is the housekeeper: it sleeps until a wakeup, then
# does what is due.

#: How often old rows of usage are deleted.
_PRUNE_EVERY_S = 3600.0
#: How often a login that was refused is looked at again, by asking claude for it.
_LOGIN_LOOK_S = 45.0

#: How long a start waits for claude to tell its version.
_FIRST_LOOK_S = 2.0

#: Smaller bodies are parsed side by side.
_LARGE_BODY_BYTES = 262_144

#: How often the housekeeper looks around, and how often while something is due.
_TEND_EVERY_S = 1.0
#: How long claude may take to be primed. The housekeeper waits for it.
_PRIMING_TIMEOUT_S = 5.0
_TEND_SOON_S = 0.05


class Intervals:
    """When things were done that are not done too often, such as a warning in the log."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # Guards the next field.
        self._lock = threading.Lock()
        self._pauses_until_s: dict[str, float] = {}

    def claim(self, name: str, pause_s: float) -> bool:
        """Return whether this was not done for so long, and count it as done now."""
        now_s = self._clock()
        with self._lock:
            self._pauses_until_s = {
                each: until_s for each, until_s in self._pauses_until_s.items() if until_s > now_s
            }
            is_due = name not in self._pauses_until_s
            if is_due:
                self._pauses_until_s[name] = now_s + pause_s
            return is_due


class LargeBodies:
    """Makes large bodies be parsed one at a time: they would multiply each other's memory."""

    def __init__(self) -> None:
        # Held while a large body is parsed.
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def parsing(self, size_bytes: int) -> Iterator[None]:
        """Enter while a body of this size is parsed. For large ones the garbage collector is off:
        it would scan all the new objects again and again."""
        if size_bytes < _LARGE_BODY_BYTES:
            yield
            return
        with self._lock:
            gc.disable()
            try:
                yield
            finally:
                gc.enable()


class ProgramMonitor:
    """Notices a claude that was installed, updated or removed."""

    def __init__(self, program: ClaudeProgram, log: Log, on_change: Callable[[], None]) -> None:
        """`on_change` is called when processes of the last claude must not be used any more."""
        self._program = program
        self._log = log
        self._on_change = on_change
        # Guards the fields below.
        self._lock = threading.Lock()
        self._seen: Program | None = None
        #: The kind of failure that the log has, until there is a claude again.
        self._logged_failure: type[OcpError] | None = None

    def is_current(self, version: Version) -> bool:
        """Return whether this is the version of the claude that was seen last."""
        seen = self._seen
        return seen is None or version == seen.version

    def check(self) -> Program:
        """Look for another claude and return the one to use. Raise ClaudeUnavailable."""
        try:
            program = self._program.resolve()
        except ClaudeAway:
            # Running processes do not need the file to go on.
            raise
        except OcpError:
            self._on_change()
            raise
        if self._record(program):
            self._on_change()
        return program

    def _record(self, program: Program) -> bool:
        """Record a claude that can be used. Return whether it replaces another one."""
        with self._lock:
            before, self._seen = self._seen, program
            is_news = program != before or self._logged_failure is not None
            self._logged_failure = None
        if is_news:
            self._log.event("info", "claude_found", version=program.version_text)
        return before not in (None, program)

    def log_failure(self, error: OcpError) -> None:
        """Log why no process can be started, once for each kind of reason."""
        with self._lock:
            is_news = self._logged_failure is not type(error)
            self._logged_failure = type(error)
        if is_news:
            level = "warn" if error.retryable else "error"
            self._log.event(level, "claude_unavailable", detail=error.message)


class Pinning:
    """Which versions of claude put their reminders beside the first message of a rebuilt
    conversation because OCP makes them, so that the API's prompt cache knows its beginning.

    They are made to with an undocumented variable. A version that turned out to ignore it would ask
    the API each time."""

    def __init__(self, log: Log) -> None:
        self._log = log
        # Guards the set.
        self._lock = threading.Lock()
        self._unpinned: set[Version | None] = set()

    def is_used(self, version: Version) -> bool:
        """Return whether conversations are pinned with this version. Older ones do not need it."""
        return version >= REMINDS_WHERE_ASKED_SINCE and self.works(version)

    def works(self, version: Version | None) -> bool:
        """Return whether this version has not failed; None is a version that is not known."""
        with self._lock:
            return version not in self._unpinned

    def give_up(self, version: Version, reason: str) -> None:
        """Pin nothing with this version any more, and log that once."""
        with self._lock:
            is_news = version not in self._unpinned
            self._unpinned.add(version)
        if is_news:
            self._log.event(
                "warn", "prompt_cache_not_kept", claude=".".join(map(str, version)), reason=reason,
                help="conversations that move to another claude miss the API's prompt cache",
            )


class LoginMonitor:
    """When to check a login again that was refused: when claude's credentials have changed, and
    from time to time, because they are not always in a file."""

    def __init__(self, folder: ClaudeFolder, clock: Clock) -> None:
        self._folder = folder
        self._clock = clock
        self._stamp: object = None
        self._checked_s = -math.inf

    def is_due(self) -> bool:
        """Return whether the login has to be checked, and count it as checked now."""
        is_old = self._clock() - self._checked_s >= _LOGIN_LOOK_S
        is_due = is_old or self._folder.login_stamp() != self._stamp
        if is_due:
            self.mark_checked()
        return is_due

    def mark_checked(self) -> None:
        """Count the login as checked now."""
        self._stamp, self._checked_s = self._folder.login_stamp(), self._clock()


class App:
    """The server without its sockets."""

    def __init__(
        self, config: Config, *, environ: Mapping[str, str], log: Log, models: Models,
        demo_command: tuple[str, ...] = (), clock: Clock = time.monotonic,
    ) -> None:
        """Create the state folder. `demo_command` starts the stand-in instead of claude. Raises
        HomeInUse."""
        self.log = log
        self.catalog = ModelCatalog(models)
        self.demo = bool(demo_command)
        self.started_s, self.started_at_s = clock(), time.time()
        self.clock = clock
        environ = dict(environ)
        self._open_state(config, environ)
        self.catalog.set_aliases(self.config.model_aliases)
        self.metrics = Metrics()
        self.refusals = Refusals(log)
        self.wrong_keys = WrongKeys(clock)
        self.gate = Gate(self.config)
        self.program = ClaudeProgram(config, environ, demo_command)
        self.claude_folder = self._claude_folder(environ)
        #: What processes said about the plan, until somebody takes it to the account.
        self._notices: queue.SimpleQueue[Json] = queue.SimpleQueue()
        self._starter = ClaudeStarter(
            self.program, self.claude_folder, self.settings, environ, log, self._take_report, clock
        )
        self.pool = ProcessPool(self._starter.start, clock)
        self.program_monitor = ProgramMonitor(self.program, log, self.pool.drop)
        self.responses = Responses(clock)
        self.pinning = Pinning(log)
        self.cache = Cache(clock)
        self.draining = False
        self.large_bodies = LargeBodies()
        self.requests = Requests(self)
        self.intervals = Intervals(clock)
        self.connections = Connections()
        self.address = ServerAddress(config, config.bind, config.port)
        #: Wakes the housekeeper: "tend" or "stop". Signal handlers may put into it.
        self.wakeups: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._login_monitor = LoginMonitor(self.claude_folder, clock)

    def _claude_folder(self, environ: Mapping[str, str]) -> ClaudeFolder:
        # Only on macOS the login can depend on the folder.
        check_login = self.program.has_login if sys.platform == "darwin" else None
        folder = self.state_folder.path_of("claude")
        return ClaudeFolder(folder, environ, self.log, check_login)

    @property
    def config(self) -> Config:
        """Return the settings of this moment. Read them once where they have to be consistent."""
        return self.settings.config

    @property
    def models(self) -> Models:
        """Return the models as they are known at this moment."""
        return self.catalog.models

    def _open_state(self, config: Config, environ: Mapping[str, str]) -> None:
        """Open the database and read what the first request needs."""
        self.state_folder = StateFolder(config, self.log, self.clock, is_demo=self.demo)
        self.store = self.state_folder.store
        config = self.state_folder.with_admin_key(config)
        self.settings = Settings(self.store, config, environ)
        for name, why in self.settings.problems:
            self.log.event("warn", "stored_setting_ignored", setting=name, why=why)
        self.keys = Keys(self.store)
        for key_id, why in self.keys.problems:
            self.log.event("error", "stored_key_ignored", id=key_id, why=why)
        self.ledger = Ledger(self.store)
        self.sessions = Sessions(self.store)
        self.thinking = ThinkingMemory(self.store)
        self.account = Account()
        self._plan_record = PlanRecord(self.store, self.account, self.log)
        self._prune_at_s = self._write_use_at_s = self.clock()

    def _tend_storage(self) -> None:
        """Write what had to wait for the database, and look where it is."""
        with contextlib.suppress(sqlite3.Error):
            self.store.write_queued()
            if self.clock() >= self._write_use_at_s:
                self._write_use_at_s = self.clock() + _LAST_USE_EVERY_S
                self.keys.write_last_use()
                self._plan_record.write()
        self.state_folder.check()

    def _take_report(self, report: Json) -> None:
        """Take what a process reports. The next request already needs the models."""
        if "models" in report:
            offered = offered_models(report["models"])
            self.catalog.add_report(report["version"], report["model"], offered)
        else:
            self._notices.put(report)

    # -- claude -------------------------------------------------------------------------------

    def check_program(self) -> None:
        """Notice a claude that was installed, updated or removed. Raises ClaudeUnavailable."""
        self._take_notices()
        self.catalog.set_version(self.program_monitor.check().version)

    def check_extra_usage(self, model_id: str | None) -> None:
        """Raise ExtraUsageStopped if an answer of this model would be billed as extra usage and the
        operator does not want that; see Account.check_not_billed."""
        if self.config.extra_usage == "stop":
            # claude says it after the answer, and the next request may come at once.
            self.pool.drain_parked()
            self._take_notices()
            self.account.check_not_billed(model_id)

    def login_lost(self) -> None:
        """Stop using processes whose login the API has refused."""
        self.account.set_login(False)
        self._login_monitor.mark_checked()
        self.claude_folder.login_changed()
        self.pool.drop()

    # -- housekeeping -------------------------------------------------------------------------

    def run(self) -> None:
        """Do the housekeeping until a wakeup says stop. For the main thread."""
        with contextlib.suppress(UnknownModel):
            # The default model can be an alias of the operator, which was removed at run time.
            self.pool.mark_used(self.models.find(self.config.default_model).argument)
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
            self.catalog.set_version(self.program.resolve().version)

    def tend(self) -> float:
        """Do what is due; return the seconds until the next call. Never raises."""
        try:
            self.pool.tend(self.config)
            self.requests.end_unwanted()
            self._tend_storage()
            self.cache.tend(self.config)
            self._prune()
            self.refusals.tend()
            self._watch_login()
            self.check_program()
            self.pool.refill(self.config)
            self._prime_spare()
        except OcpError as error:
            self.program_monitor.log_failure(error)
            # Without claude no spares are started, but stopping processes have to be reaped.
            return _TEND_SOON_S if self.pool.stopping else _TEND_EVERY_S
        except Exception as error:
            self.log.event("error", "housekeeping_failed", error=format_failure(error))
        return _TEND_SOON_S if self.pool.has_work_soon(self.config) else _TEND_EVERY_S

    def _prime_spare(self) -> None:
        """Prime one of the spares that have started. That takes a tenth of a second. Agents would
        show their tools, and are not made quicker."""
        if self.config.is_agent or self.draining:
            return
        process = self.pool.take_to_prime(self.config, self.pinning.is_used)
        if process is None:
            return
        try:
            process.prime(WaitLimits(NoClient(), self.clock() + _PRIMING_TIMEOUT_S, 0.0))
        except (NotPinned, OcpError) as problem:
            if isinstance(problem, NotPinned) and problem.was_asked:
                self.pinning.give_up(process.version, str(problem))
            self.log.event("warn", "spare_not_primed", model=process.model_id, reason=str(problem))
            self.pool.stop_unprimed(process)
        else:
            self.log.event("debug", "spare_primed", pid=process.pid, model=process.model_id)
            self.pool.put_spare(process)

    def _watch_login(self) -> None:
        if self.account.is_login_refused and self._login_monitor.is_due():
            # claude takes seconds to answer; the housekeeper must not wait for it.
            threading.Thread(target=self._look_at_login, daemon=True).start()

    def _look_at_login(self) -> None:
        if self.program.has_login(self.claude_folder.environment()):
            self.claude_folder.login_changed()
            # Idle processes may still hold the login that was refused.
            self.pool.drop()
            self.account.set_login(None)
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
                self.program.correct_version(version)
            elif news is not None:
                self.account.update_plan(news, _text_field(notice, "model"))

    def _prune(self) -> None:
        """Delete rows of usage, and digests of thinking, that are too old, once an hour."""
        if self.clock() < self._prune_at_s:
            return
        self._prune_at_s = self.clock() + _PRUNE_EVERY_S
        try:
            self.ledger.prune(self.config.usage_days)
            self.keys.prune(self.config.usage_days)
            self.thinking.prune()
        except sqlite3.Error as problem:
            self.log.event("error", "usage_not_pruned", error=str(problem))

    def learn_plan(self, client: Client) -> None:
        """Refresh what is known about the plan. Raises ClientGone."""
        self._take_notices()
        limits = WaitLimits(client, self.clock() + PLAN_QUERY_TIMEOUT_S, 0.0)
        try:
            self.account.query_plan(self.pool, limits)
        except OcpError as error:
            self.log.event("warn", "plan_not_learned", detail=error.message)

    def change_setting(self, name: str, value: object) -> object:
        """Change a setting for good; see Settings.change. Raises ValueError also for an alias whose
        model does not exist."""
        if name == "modelAliases" and isinstance(value, str):
            self.models.check_aliases(value)
        value = self.settings.change(name, value)
        self.catalog.set_aliases(self.config.model_aliases)
        self.gate.configure(self.config)
        self.cache.tend(self.config)
        self.wakeups.put("tend")
        return value

    def drain(self) -> None:
        """Refuse new requests and wait, `drain_ms` at most, for those that run and for clients
        that have not read their answers yet."""
        self.draining = True
        self.state_folder.announce_stop()
        give_up_s = self.clock() + self.config.drain_ms / 1000
        while (self.requests or self.connections.is_any_unread()) and self.clock() < give_up_s:
            self.pool.reap()
            try:
                if self.wakeups.get(timeout=0.02) == "stop":
                    # The second signal stops the server at once.
                    return
            except queue.Empty:
                pass

    def close(self) -> None:
        """Stop every child and close the database and the log."""
        self.refusals.tend(at_once=True)
        self.pool.close()
        self._starter.close()
        with contextlib.suppress(sqlite3.Error):
            self.store.write_queued()
            self.keys.write_last_use()
            self._plan_record.write()
        self.state_folder.close()


# ==== 39. Routes =============================================================
# The type of a route, and the choice of a route for a method and a path. Paths match exactly, after
# repeated slashes are merged. The /v1 of a path may be missing or doubled, because users write base
# addresses with and without it.


class Route(NamedTuple):
    """A row of the table of routes. A {name} in the path becomes an argument of the endpoint."""

    method: str
    path: str
    access: Access
    #: The format of errors. None = both APIs have the path; the client's headers tell which it is.
    dialect: Dialect | None
    endpoint: Callable[..., None]

    @property
    def operation(self) -> str:
        """Return the operation id: the name of the endpoint, unique for each row."""
        name = self.endpoint.__name__
        return f"{name}_{self.dialect.name}" if name == "answer" and self.dialect else name


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(path)))


#: A route, and the arguments that a path has for its names in braces, percent-decoded.
Match = tuple[Route, dict[str, str]]


class Router:
    """The routes: those without arguments by their paths, the others with compiled patterns."""

    def __init__(self, routes: tuple[Route, ...]) -> None:
        self._fixed: dict[str, list[Match]] = {}
        self._patterns: list[tuple[re.Pattern[str], Route]] = []
        for route in routes:
            if "{" in route.path:
                self._patterns.append((_pattern(route.path), route))
            else:
                self._fixed.setdefault(route.path, []).append((route, {}))

    def matches(self, path: str) -> list[Match]:
        """Return the routes of a path, for all methods. Routes without arguments win: the path
        of one is not an id of another. Raises BadRequest."""
        path = re.sub("/+", "/", path).rstrip("/") or "/"
        while path.startswith("/v1/v1/"):
            path = path[len("/v1"):]
        fixed = [*self._fixed.get(path, ()), *self._fixed.get("/v1" + path, ())]
        if fixed:
            return fixed
        matches = []
        for pattern, route in self._patterns:
            match = pattern.fullmatch(path) or pattern.fullmatch("/v1" + path)
            if match:
                arguments = {
                    name: _percent_decode(value) for name, value in match.groupdict().items()
                }
                matches.append((route, arguments))
        return matches

    def choose(self, method: str, path: str, matches: list[Match]) -> Match:
        """Return the match for this method. Raises NotFound, MethodNotAllowed."""
        route_method = "GET" if method == "HEAD" else method
        for route, arguments in matches:
            if route.method == route_method:
                return route, arguments
        if matches:
            allowed = allowed_methods(matches)
            raise MethodNotAllowed(f"{path} allows {', '.join(allowed)}.", allowed)
        raise NotFound(f"There is no path {one_line(path, 80)}; /openapi.json lists all paths.")


def allowed_methods(matches: list[Match]) -> list[str]:
    """Return the methods of a path; empty = the path does not exist."""
    methods = [route.method for route, _ in matches]
    if "GET" in methods:
        methods.append("HEAD")
    return [*methods, "OPTIONS"] if methods else []


def _percent_decode(text: str) -> str:
    try:
        return urllib.parse.unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise BadRequest("The path has percent escapes that are not UTF-8.") from None


# ==== 40. HTTP server ========================================================
# A Server accepts connections and gives each a thread, in which a ConnectionHandler serves one
# request after the other. An Exchange is one request: it reads its body with the connection's
# BodyReader and has a Response. A request that is too large or too slow is refused. Every error,
# also one before the request or of the listening socket, is sent by Response.send_error.

#: Limits of a request's head: its bytes, including the request line, and its headers.
_MAX_HEAD_BYTES = 65_536
_MAX_HEADERS = 100
#: Limit of the extensions and the trailer of a chunked body together.
_MAX_CHUNK_EXTRA_BYTES = 65_536
#: How long a connection may be idle between two requests; the second limit is for connections
#: that have not sent a valid key.
_IDLE_S = 120.0
_UNTRUSTED_IDLE_S = 10.0

#: The headers of a stream; the last one keeps reverse proxies from buffering it.
_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(%b) ([\x21-\x7e]+) (HTTP/1\.[01])" % _TOKEN)
_HEADER_LINE = re.compile(rb"(%b):([\t\x20-\x7e\x80-\xff]*)" % _TOKEN)
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})([ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?)\r\n")
_UNSAFE_IN_HEADER = re.compile(r"[^\x20-\x7e]")

#: The first byte of a TLS connection, and the answers to clients that use http for https, or https
#: for http.
_TLS_HANDSHAKE = b"\x16"
_NOT_HTTPS = "This server uses http: write http:// in the address."
_NOT_HTTP = "This server uses https: write https:// in the address."
#: How often the log repeats a warning about connections.
_WARNING_INTERVAL_S = 60.0
_CONNECTIONS_HELP = "raise OCP_MAX_CONNECTIONS if this many connections are expected"
#: How many connections above the limit get an error response at a time; others are just closed.
_MAX_REJECTIONS = 32

#: Headers that may not be repeated: a proxy and OCP could use different ones of them.
_SINGLE_HEADERS = (
    "Host", "Origin", "Authorization", "x-api-key", "Content-Type", "Content-Length",
    "Content-Encoding", "Transfer-Encoding", "Expect",
)


def head_lines(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a head without their line ends; none at the end of the stream. Raises
    HeadTooLarge, BadRequest."""
    left_bytes, count = _MAX_HEAD_BYTES, 0
    while True:
        line = stream.readline(left_bytes + 1)
        left_bytes -= len(line)
        if line == (b"\r\n" if count else b""):
            return
        if left_bytes < 0 or count > _MAX_HEADERS:
            raise HeadTooLarge(
                f"The head of the request has more than {_MAX_HEAD_BYTES} bytes or "
                f"{_MAX_HEADERS} headers."
            )
        if line == b"\r\n":
            # Some clients send an extra line end after a body.
            continue
        if not line.endswith(b"\r\n"):
            raise BadRequest("The head of the request is malformed: lines must end with CR LF.")
        count += 1
        yield line[:-2]


def parse_request_line(line: bytes) -> tuple[str, str, str]:
    """Return the method, the target and the version. Raises BadRequest."""
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise BadRequest(
            "The request line is malformed: it must be METHOD PATH HTTP/1.1, with percent escapes "
            "for characters outside ASCII; HTTP/0.9 and HTTP/2 are not supported."
        )
    method, target, version = (part.decode("ascii") for part in match.groups())
    # urlsplit would take a path that starts with two slashes for a host.
    return method, re.sub("^/+", "/", target), version


def parse_headers(lines: Iterable[bytes]) -> Headers:
    """Return the headers in these lines. Raises BadRequest."""
    headers = Headers()
    for line in lines:
        match = _HEADER_LINE.fullmatch(line)
        if match is None:
            raise BadRequest(
                "A header line of the request is malformed: it must be NAME: VALUE on one line, "
                "without control characters."
            )
        name, value = match.groups()
        headers[name.decode("ascii")] = value.strip(b" \t").decode("latin-1")
    for single in _SINGLE_HEADERS:
        if len(headers.get_all(single, [])) > 1:
            raise BadRequest(f"The request has more than one {single} header.")
    return headers


def body_length(headers: Headers, version: str) -> int | None:
    """Return the length of the body; None = chunked. Raises BadRequest if it is ambiguous."""
    length, coding = headers.get("Content-Length"), headers.get("Transfer-Encoding")
    if coding is not None and length is not None:
        raise BadRequest("Content-Length and Transfer-Encoding cannot be combined.")
    if coding is not None and version == "HTTP/1.0":
        raise BadRequest("HTTP/1.0 has no Transfer-Encoding: send a Content-Length, or HTTP/1.1.")
    if coding is not None and coding.lower() != "chunked":
        raise BadRequest("Transfer-Encoding: only chunked is supported.")
    if length is not None and not re.fullmatch("[0-9]{1,15}", length):
        raise BadRequest("Content-Length must be one whole number.")
    return None if coding is not None else int(length or 0)


def dialect_of_client(headers: Headers) -> Dialect:
    """Return the dialect of the API that a client speaks, as its headers tell."""
    return MESSAGES if "anthropic-version" in headers else CHAT


class Response:
    """The response to one request: whole, or in parts of unknown total length. What the client
    does not accept at once is sent later. Methods raise ClientGone."""

    def __init__(self, client: Connection) -> None:
        self._client = client
        self.request_id = new_id("req_")
        #: The version of the request, and whether it was HEAD: its response has no body.
        self.version = "HTTP/1.1"
        self.is_head = False
        #: Headers of a success or an error, besides those that every response has.
        self.headers: dict[str, str] = {}
        #: The status that was sent; 0 = none yet.
        self.status = 0
        #: Whether the connection has to be closed after the response.
        self.must_close = False
        #: Whether bytes of the request, or what may be bytes of it, were not read. The next head
        #: cannot be found then.
        self.has_unread_body = True
        self._renderer: Renderer | None = None
        #: The head, until the first part of the body is sent with it.
        self._unsent_head = b""
        self._is_chunked = False
        self._is_complete = False

    def send_json(self, value: object, status: int = 200) -> None:
        """Send a JSON body; after `keep_alive` has sent the head, its end."""
        if not self.status:
            self._send_body(status, to_json(value) + b"\n", {"Content-Type": "application/json"})
        else:
            self._end_parts(to_json(value))

    def send_text(self, text: str, content_type: str) -> None:
        self._send_body(200, text.encode("utf-8"), {"Content-Type": content_type})

    def send_nothing(self, status: int) -> None:
        """Send a response without a body."""
        # By HTTP, 204 and 304 never have one; of others the client has to be told.
        self._begin(status, {} if status in (204, 304) else {"Content-Length": "0"})
        self._write(b"")
        self._is_complete = True

    def send_events(self, frames: Iterator[bytes]) -> None:
        """Send server-sent events as they come; a HEAD request gets none."""
        self._begin_parts(_STREAM_HEADERS)
        self._write(b"")
        if self.is_head:
            self._is_complete = True
            return
        for frame in frames:
            self._send(frame)
        self._end_parts(b"")

    def send_stream(
        self, renderer: Renderer, events: Iterator[Choice], heartbeat_s: float,
        finished: Callable[[Json], None],
    ) -> None:
        """Send an answer as it comes. `finished` gets the complete body before the last event is
        sent. A keepalive is also due when events render to nothing for too long."""
        sent_s = time.monotonic()
        unsent = b""
        try:
            for index, event in events:
                if not isinstance(event, (Tick, Pause)):
                    unsent += renderer.event(index, event)
                    if isinstance(event, Finished):
                        finished(renderer.body)
                    if len(unsent) < _MAX_SENT_BYTES:
                        continue
                now_s = time.monotonic()
                is_silent = heartbeat_s and now_s - sent_s >= heartbeat_s
                if not unsent and (isinstance(event, Tick) or is_silent):
                    unsent = renderer.keepalive()
                if unsent:
                    data, unsent, sent_s = unsent, b"", now_s
                    self._send_frames(renderer, data)
        except OcpError:
            self._send_frames(renderer, unsent)
            raise
        self._begin_stream(renderer)
        self._end_parts(unsent + renderer.end())

    def _send_frames(self, renderer: Renderer, data: bytes) -> None:
        """Send a part of a stream. The first one begins the response, as late as possible: an
        error before it is sent with its own status."""
        if data:
            self._begin_stream(renderer)
            self._send(data)

    def _begin_stream(self, renderer: Renderer) -> None:
        if self._renderer is None:
            self._renderer = renderer
            self._begin_parts(_STREAM_HEADERS)

    def keep_alive(self, events: Iterator[Choice], silence_s: float) -> None:
        """Wait for all events of an answer; send white space before its JSON after each
        `silence_s`, 0 = never. Node clients disconnect after 300 s without a byte."""
        silent_since_s = time.monotonic()
        for _ in events:
            if silence_s and time.monotonic() - silent_since_s >= silence_s:
                silent_since_s = time.monotonic()
                if not self.status:
                    self._begin_parts({"Content-Type": "application/json"})
                self._send(b" \n")

    def send_error(self, error: OcpError, dialect: Dialect) -> None:
        """Report an error: as a response, as an event of a stream, or by closing the connection,
        depending on how much was sent. Never raises."""
        try:
            if not self.status:
                body = to_json(dialect.error_body(error, self.request_id)) + b"\n"
                headers = {"Content-Type": "application/json", **error.headers()}
                self._send_body(error.status, body, headers)
            elif self._renderer is not None and not self._is_complete:
                self._end_parts(self._renderer.failure(error, self.request_id))
            else:
                # The response is complete, or a JSON body has begun with status 200.
                self.must_close = True
        except ClientGone:
            self.must_close = True

    def finish(self) -> None:
        """Wait until the client has read the response. Never raises."""
        try:
            self._client.flush()
        except ClientGone:
            self.must_close = True
        if self.status and self.must_close and self.has_unread_body:
            self._client.linger(_LINGER_S)

    def _send_body(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self._begin(status, {"Content-Length": str(len(body)), **headers})
        self._write(b"" if self.is_head else body)
        self._is_complete = True

    def _begin_parts(self, headers: Mapping[str, str]) -> None:
        """Start a response of unknown length: chunked, or for HTTP/1.0 until the connection
        closes."""
        self._is_chunked = self.version == "HTTP/1.1"
        coding = {"Transfer-Encoding": "chunked"} if self._is_chunked else {}
        self._begin(200, {**headers, **coding})

    def _send(self, data: bytes) -> None:
        """Send a part of the body, if there is any."""
        if data:
            self._write(self._framed(data))

    def _end_parts(self, data: bytes) -> None:
        """Send the last part of the body."""
        self._is_complete = True
        self._write(self._framed(data) + (b"0\r\n\r\n" if self._is_chunked else b""))

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked and data else data

    def _write(self, data: bytes) -> None:
        """Send the head, unless that is done, and data."""
        head, self._unsent_head = self._unsent_head, b""
        self._client.send(head + data)

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Make the head. It is sent with the first part of the body, in one system call."""
        if self.has_unread_body or self.version == "HTTP/1.0" or self._client.is_cancelled:
            self.must_close = True
        self.status = status
        every: dict[str, str] = {
            "Server": f"ocp/{VERSION}", "Date": email.utils.formatdate(usegmt=True),
            "X-Request-Id": self.request_id, "request-id": self.request_id,
            "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
            **self.headers, **headers,
        }
        if self.must_close:
            every["Connection"] = "close"
        lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"]
        # A line break in a value would let it inject a header.
        lines += [f"{name}: {_UNSAFE_IN_HEADER.sub('?', text)}" for name, text in every.items()]
        self._unsent_head = "\r\n".join([*lines, "", ""]).encode("ascii")


class BodyReader:
    """Reads the bodies of the requests of one connection, within the limits of size, time and
    memory."""

    def __init__(
        self, client: Connection, reader: DeadlineReader, stream: BinaryIO, server: Server
    ) -> None:
        """`stream` buffers what `reader` reads."""
        self._client = client
        self._reader = reader
        self._stream = stream
        self._app = server.app
        self._memory = server.memory
        self._hold = Hold(client.cut)

    def read(self, length: int | None, owner: str) -> bytearray:
        """Return a body of this length, None = chunked, whose memory is charged to `owner`. While
        it arrives, the connection counts as idle and may be closed to make room. Raises BadRequest,
        TooLarge, RequestTimeout, MemoryFull, ClientGone."""
        self._hold.owner = owner
        self._reader.allow(self._app.config.body_timeout_ms / 1000)
        is_busy, self._client.is_busy = self._client.is_busy, False
        try:
            data = self._read_chunks() if length is None else self._read_exactly(length)
        except socket.timeout:
            raise RequestTimeout("The body of the request did not arrive in time.") from None
        except OSError:
            raise ClientGone from None
        self._client.is_busy = is_busy
        return data

    def release(self) -> None:
        """Free the memory of the last body."""
        self._memory.resize(self._hold, 0, self._app.config)

    def check_size(self, size_bytes: int) -> None:
        """Raise TooLarge if a body of this size is larger than the limit."""
        maximum = self._app.config.max_body_bytes
        if size_bytes > maximum:
            raise TooLarge(
                f"The body is larger than {maximum} bytes (CLAUDE_MAX_BODY_SIZE of the server)."
            )

    def _read_exactly(self, count: int) -> bytearray:
        data = bytearray()
        self._read_more(data, count)
        if len(data) < count:
            raise BadRequest("The body ended before its Content-Length was reached.")
        return data

    def _read_more(self, data: bytearray, count: int) -> None:
        """Append `count` bytes of the body to `data`, or fewer if the connection ends."""
        end = len(data) + count
        while len(data) < end:
            piece = self._stream.read(min(end - len(data), _MAX_READ_BYTES))
            if not piece:
                return
            self._memory.resize(self._hold, len(data) + len(piece), self._app.config)
            data += piece

    def _read_chunks(self) -> bytearray:
        """Return a chunked body. Its trailer is read and dropped."""
        data = bytearray()
        extra_bytes = 0
        while True:
            match = _CHUNK_LINE.fullmatch(self._stream.readline(1024))
            if match is None:
                raise _bad_chunks()
            size, extra_bytes = int(match[1], 16), extra_bytes + len(match[2])
            if extra_bytes > _MAX_CHUNK_EXTRA_BYTES:
                raise _bad_chunks()
            if size == 0:
                break
            self.check_size(len(data) + size)
            self._read_more(data, size)
            if self._stream.readline(2) != b"\r\n":
                raise _bad_chunks()
        self._drop_trailer(_MAX_CHUNK_EXTRA_BYTES - extra_bytes)
        return data

    def _drop_trailer(self, left_bytes: int) -> None:
        """Read the header lines after the last chunk. Raises BadRequest."""
        line = b""
        while line != b"\r\n":
            line = self._stream.readline(left_bytes + 1)
            left_bytes -= len(line)
            is_whole = left_bytes >= 0 and line.endswith(b"\r\n")
            if not is_whole or not (line == b"\r\n" or _HEADER_LINE.fullmatch(line[:-2])):
                raise _bad_chunks()


def _bad_chunks() -> BadRequest:
    return BadRequest("The chunked body is malformed, or ended early.")


class Exchange:
    """One request and its response. Endpoints read the request from the attributes and from
    `body`, and respond with one of the `send_` methods of `response`."""

    def __init__(self, client: Connection, bodies: BodyReader, routes: tuple[Route, ...]) -> None:
        self.client = client
        self.peer = client.peer
        self.routes = routes
        self.response = Response(client)
        self.request_id = self.response.request_id
        self.method = ""
        #: The target as it was sent, and its parts.
        self.target = ""
        self.path = ""
        self.query: Mapping[str, str] = {}
        self.headers = Headers()
        #: The format of errors.
        self.dialect: Dialect = CHAT
        self.caller = Caller("public")
        self._bodies = bodies
        #: The length of the body; None = chunked.
        self._length: int | None = 0

    def parse_head(self, line: bytes, lines: Iterator[bytes]) -> None:
        """Set the fields from the head: the request line, and the lines after it. Raises
        BadRequest, HeadTooLarge."""
        response = self.response
        # Known before the line is valid: an error response to HEAD must have no body, because the
        # client would read it as the next response.
        response.is_head = line.startswith(b"HEAD ")
        self.method, self.target, response.version = parse_request_line(line)
        self.headers = parse_headers(lines)
        if response.version == "HTTP/1.1" or "Host" in self.headers:
            host_name(self.headers.get("Host", ""))
        self._length = body_length(self.headers, response.version)
        response.has_unread_body = self._length != 0
        options = ",".join(self.headers.get_all("Connection", [])).lower().split(",")
        response.must_close = "close" in (option.strip() for option in options)

    @property
    def owner(self) -> str:
        """The name under which the memory of the request is counted."""
        return self.peer if self.caller.key_id is None else self.caller.scope

    def refused(self, error: OcpError) -> Refused:
        """Return what the operator is told when the request is refused with this error."""
        caller = "" if self.caller.name == "public" else self.caller.name
        return Refused(
            self.peer, error.status, error.kind, error.message, caller or error.key_name,
            error.preview, self.path, self.request_id, self.headers.get("User-Agent", ""),
        )

    def body(self) -> bytearray:
        """Return the body. Raises BadRequest, TooLarge, RequestTimeout, MemoryFull, ClientGone."""
        if self._length is not None:
            self._bodies.check_size(self._length)
        if self.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise BadRequest("Compressed bodies are not supported: send the body uncompressed.")
        expects = self.headers.get("Expect", "").lower() == "100-continue"
        if expects and self.response.version == "HTTP/1.1":
            self.client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        data = self._bodies.read(self._length, self.owner)
        self.response.has_unread_body = False
        return data


class ConnectionHandler(socketserver.BaseRequestHandler):
    """Serves the requests of one connection, one after the other; runs in its thread."""

    server: Server

    def setup(self) -> None:
        self._client: Connection = self.request
        self._app = self.server.app
        self._reader = DeadlineReader(self._client)
        self._stream = io.BufferedReader(self._reader, _MAX_HEAD_BYTES)
        self._bodies = BodyReader(self._client, self._reader, self._stream, self.server)
        #: Whether a request has been served on the connection.
        self._has_served = False

    def handle(self) -> None:
        while self._serve_request():
            self._has_served = True

    def finish(self) -> None:
        """Close the reader; the server closes the connection."""
        self._stream.close()

    def _serve_request(self) -> bool:
        """Read one request and answer it; return whether the connection stays open."""
        exchange = Exchange(self._client, self._bodies, self.server.routes)
        is_request = self._read_head(exchange)
        started_s = time.monotonic()
        if is_request:
            self._answer(exchange)
        else:
            exchange.response.must_close = True
        self._client.is_busy = False
        self._bodies.release()
        exchange.response.finish()
        if is_request:
            self._app.log.event(
                "debug", "request_answered", request_id=exchange.request_id,
                method=exchange.method, status=exchange.response.status,
                total_ms=round((time.monotonic() - started_s) * 1000),
            )
        return not exchange.response.must_close

    # -- head -------------------------------------------------------------------------------------

    def _read_head(self, exchange: Exchange) -> bool:
        """Return whether a valid head was read in time; any other one is refused here."""
        received_before = self._reader.received_bytes
        head_timeout_s = self._app.config.header_timeout_ms / 1000
        idle_s = _IDLE_S if self._client.is_trusted else _UNTRUSTED_IDLE_S
        try:
            # An idle connection may wait longer than a head that has begun.
            self._reader.allow(idle_s if self._has_served else head_timeout_s)
            first = self._stream.peek(1)[:1]
            self._reader.allow(head_timeout_s)
            if first == _TLS_HANDSHAKE and not self._client.is_tls:
                self.server.log_tls_attempt(self._client.peer)
                raise BadRequest(_NOT_HTTPS)
            lines = head_lines(self._stream)
            line = next(lines, b"")
            if line:
                exchange.parse_head(line, lines)
            return bool(line)
        except socket.timeout:
            if self._reader.received_bytes > received_before:
                late = RequestTimeout("The head of the request did not arrive in time.")
                self._refuse(exchange, late)
        except OcpError as error:
            # What follows may belong to this request.
            exchange.response.has_unread_body = True
            self._refuse(exchange, error)
        except (ClientGone, OSError):
            pass
        return False

    # -- answer -----------------------------------------------------------------------------------

    def _answer(self, exchange: Exchange) -> None:
        """Answer a request; every error of a request ends here."""
        try:
            self._call_endpoint(exchange)
        except ClientGone:
            exchange.response.must_close = True
        except OcpError as error:
            self._refuse(exchange, error)
        except sqlite3.Error as problem:
            self._refuse(exchange, storage_failure(problem, _NOTHING_CHANGED))
        except RecursionError:
            # Writing JSON recurses deeper than reading it.
            self._refuse(exchange, BadRequest("The body is nested too deeply."))
        except Exception as problem:
            self._app.log.event(
                "error", "request_broke", request_id=exchange.request_id,
                method=exchange.method, error=format_failure(problem),
            )
            failure = OcpError(f"OCP failed; its log has the details under {exchange.request_id}.")
            failure.logged = True
            self._refuse(exchange, failure)

    def _call_endpoint(self, exchange: Exchange) -> None:
        """Find the route of a request, authorize its caller, and call the endpoint."""
        config = self._app.config
        try:
            target = urllib.parse.urlsplit(exchange.target)
        except ValueError:
            raise BadRequest("The path of the request is malformed.") from None
        exchange.path = target.path
        exchange.query = dict(urllib.parse.parse_qsl(target.query))
        matches = self.server.router.matches(target.path)
        # From here on, errors have the format of the path's API.
        exchange.dialect = (
            (matches[0][0].dialect if matches else None) or dialect_of_client(exchange.headers)
        )
        # In an absolute target the host replaces the Host header.
        self._check_origin(exchange, target.netloc or exchange.headers.get("Host", ""))
        if exchange.method == "OPTIONS":
            self._answer_options(exchange, matches)
            return
        route, arguments = self.server.router.choose(exchange.method, target.path, matches)
        exchange.caller = self._authorize(exchange, route.access)
        if route.access is not Access.PUBLIC:
            self._client.is_trusted = self._client.is_busy = True
        self._client.config = config
        self._client.unread.owner = exchange.owner
        route.endpoint(self._app, exchange, **arguments)

    def _check_origin(self, exchange: Exchange, host: str) -> None:
        """Refuse the pages of foreign web sites, and let those of allowed ones read the response.
        Raises Forbidden."""
        config, headers = self._app.config, exchange.headers
        origin = headers.get("Origin", "")
        check_origin(config, origin, host, headers.get("Content-Type", ""), exchange.peer)
        if is_allowed_origin(config, origin):
            exchange.response.headers.update(
                {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
            )

    def _authorize(self, exchange: Exchange, access: Access) -> Caller:
        """Return the caller. Raises Forbidden, and Unauthorized after a delay that grows with
        the wrong keys from this address."""
        app, headers, peer = self._app, exchange.headers, exchange.peer
        try:
            return authorize(app.config, app.keys, access, headers, peer)
        except Unauthorized:
            if any(presented_keys(headers)):
                max_delay_s = app.config.wrong_key_delay_ms / 1000
                with app.wrong_keys.delay_answer(peer, max_delay_s) as wait_s:
                    time.sleep(wait_s)
            raise

    def _answer_options(self, exchange: Exchange, matches: list[Match]) -> None:
        allowed = ", ".join(allowed_methods(matches))
        if not allowed:
            raise NotFound(f"There is no path {one_line(exchange.path, 80)}.")
        headers = exchange.response.headers
        headers["Allow"] = allowed
        if "Access-Control-Allow-Origin" in headers:
            requested = exchange.headers.get("Access-Control-Request-Headers", "")
            headers.update({
                "Access-Control-Allow-Methods": allowed,
                "Access-Control-Allow-Headers": one_line(requested, 1000) or "*",
                "Access-Control-Max-Age": "600",
            })
        exchange.response.send_nothing(204)

    # -- errors -----------------------------------------------------------------------------------

    def _refuse(self, exchange: Exchange, error: OcpError) -> None:
        """Send an error, keep it for /api/errors if no row of usage has it, and log it, unless it
        was logged as the failure of a turn. Refusals of callers without a key are summed up when
        there are many."""
        refused = exchange.refused(error)
        if not error.has_row:
            # First, so that the operator finds what a client complains of.
            self._app.refusals.kept.add(refused)
        exchange.response.send_error(error, exchange.dialect)
        if error.logged:
            return
        fields = {
            "request_id": exchange.request_id, "method": exchange.method, "path": exchange.path,
            "caller": exchange.caller.name, "kind": error.kind, "param": error.param,
            "preview": refused.preview or None, "message": error.message,
        }
        if exchange.caller.name == "public":
            fields["key"] = refused.key or None
            self._app.refusals.record(exchange.peer, error.status, **fields)
        else:
            self._app.log.event(
                "info", _REFUSED_EVENT, peer=exchange.peer, status=error.status, **fields
            )


def tls_context(config: Config) -> ssl.SSLContext | None:
    """Return the TLS context, or None for plain HTTP. Raises ConfigError if the certificate and
    the key cannot be used."""
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
            f"OCP_TLS_CERT and OCP_TLS_KEY cannot be used: {problem}{where}; they must be PEM "
            "files, and the key must have no password"
        ) from None
    return context


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


@functools.cache
def certificate_pin(path: str) -> str | None:
    """Return the fingerprint by which devices know the server with this certificate file.

    None for a certificate that somebody else vouches for, and for a file without one. It is read
    once, as the server reads it.
    """
    with contextlib.suppress(OSError, ValueError):
        with open(os.path.expanduser(path), encoding="ascii") as file:
            text = file.read(1_000_000)
        end = "-----END CERTIFICATE-----"
        start = text.index("-----BEGIN CERTIFICATE-----")
        certificate = ssl.PEM_cert_to_DER_cert(text[start:text.index(end, start) + len(end)])
        issuer, subject = (certificate_fields(certificate)[place].whole for place in (2, 4))
        return fingerprint_of(certificate) if issuer == subject else None
    return None


class Server(ThreadingHTTPServer):
    """The listening socket, with one thread for each of a limited number of connections."""

    block_on_close = False
    #: As many newcomers at once are not made to try again a second later.
    request_queue_size = 1024

    def __init__(
        self, app: App, routes: tuple[Route, ...], tls: ssl.SSLContext | None = None
    ) -> None:
        """Bind and listen. Raises OSError."""
        self.app = app
        self.routes = routes
        self.router = Router(routes)
        self.memory = MemoryBudget()
        self._tls = tls
        #: Free places for connections that get an error response.
        self._rejections = threading.BoundedSemaphore(_MAX_REJECTIONS)
        host = app.config.bind
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, app.config.port), ConnectionHandler)
        bound, port = self.server_address[:2]
        app.address = ServerAddress(app.config, str(bound), int(port))

    @property
    def url(self) -> str:
        """Return the address for clients on this machine."""
        return self.app.address.local_url

    def server_bind(self) -> None:
        """Bind the socket. The address :: accepts IPv4 too."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # HTTPServer would look up the name of the address, which can take seconds.
        socketserver.TCPServer.server_bind(self)

    def get_request(self) -> tuple[Any, Any]:
        """Return the next connection and its address. Raises OSError."""
        try:
            sock, address = super().get_request()
        except OSError as problem:
            if problem.errno in (errno.EMFILE, errno.ENFILE):
                # No descriptor is free: the accept loop would spin.
                time.sleep(0.05)
            raise
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        return Connection(sock, str(address[0]), self.memory), address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread, or reject it if all open connections are busy."""
        connection: Connection = request
        app = self.app
        try:
            evicted = app.connections.add(connection, app.config.max_connections)
        except Busy as error:
            self._reject(connection, error)
            return
        if evicted is not None and app.intervals.claim("connections_full", _WARNING_INTERVAL_S):
            app.log.event("warn", "connections_full", peer=evicted.peer, help=_CONNECTIONS_HELP)
        try:
            super().process_request(request, client_address)
        except BaseException:
            app.connections.remove(connection)
            raise

    def log_tls_attempt(self, peer: str) -> None:
        """Warn in the log about a client that uses https on a plain HTTP server."""
        if self.app.intervals.claim("https_on_http_port", _WARNING_INTERVAL_S):
            self.app.log.event("warn", "https_on_http_port", peer=peer)

    def _reject(self, connection: Connection, error: Busy) -> None:
        """Close a connection; send the error first, in a thread, if few are being rejected."""
        if self._tls is not None or not self._rejections.acquire(blocking=False):
            connection.close()
            return
        arguments = (connection, error)
        try:
            threading.Thread(target=self._send_rejection, args=arguments, daemon=True).start()
        except RuntimeError:
            # The machine has no thread left.
            self._end_rejection(connection)

    def _send_rejection(self, connection: Connection, error: Busy) -> None:
        try:
            self._refuse(connection, error)
        finally:
            self._end_rejection(connection)

    def _end_rejection(self, connection: Connection) -> None:
        connection.close()
        self._rejections.release()

    def _refuse(self, connection: Connection, error: OcpError) -> None:
        """Answer a connection before anything was read from it."""
        response = Response(connection)
        self.app.refusals.kept.add(Refused(
            connection.peer, error.status, error.kind, error.message,
            request_id=response.request_id,
        ))
        response.send_error(error, CHAT)
        response.finish()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection until it ends; runs in its thread."""
        connection: Connection = request
        if self._start_tls(connection):
            super().finish_request(request, client_address)

    def _start_tls(self, connection: Connection) -> bool:
        """Start TLS if the server uses it; return whether the connection can be used."""
        if self._tls is None:
            return True
        timeout_s = self.app.config.header_timeout_ms / 1000
        try:
            if connection.peek(timeout_s) not in (_TLS_HANDSHAKE, b""):
                self._refuse(connection, BadRequest(_NOT_HTTP))
                return False
            connection.start_tls(self._tls, timeout_s)
        except OSError as problem:
            self.app.log.event("debug", "tls_failed", error=str(problem))
            return False
        return True

    def shutdown_request(self, request: Any) -> None:
        connection: Connection = request
        self.app.connections.remove(connection)
        connection.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error of a connection outside any request."""
        error = sys.exc_info()[1] or RuntimeError("unknown")
        level = "debug" if isinstance(error, OSError) else "error"
        self.app.log.event(level, "connection_broke", error=format_failure(error))


# ==== 41. Dashboard ==========================================================
# One static page, dashboard.html beside this file. The server writes no values into it: the page
# fetches JSON and sets text. Its content security policy allows only its own style and script, by
# their hashes.

DASHBOARD_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "dashboard.html")

#: The page for a server whose ocp_server.py was copied without dashboard.html.
_PAGE_WITHOUT_DASHBOARD = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>OCP</title>
<style>body { font: 1rem/1.5 system-ui, sans-serif; max-width: 40rem; margin: 2rem auto; }</style>
</head>
<body>
<h1>OCP</h1>
<p>There is no dashboard.html beside this server's ocp_server.py. Copy it there from the same
version of OCP and reload this page, or use <code>ocp status</code>.</p>
<p id="state">Loading /health ...</p>
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
    """An HTML page and its response headers."""

    html: str
    headers: Mapping[str, str]


def _csp_hash(tag: str, html: str) -> str:
    """Return the policy's hash source for the only element with this tag in a page."""
    inside = html.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    digest = base64.b64encode(hashlib.sha256(inside.encode("utf-8")).digest())
    return f"'sha256-{digest.decode('ascii')}'"


@functools.lru_cache(maxsize=2)
def _page_with_headers(html: str) -> Page:
    policy = (
        "default-src 'none'", f"style-src {_csp_hash('style', html)}",
        f"script-src {_csp_hash('script', html)}", "connect-src 'self'", "img-src data:",
        "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    )
    return Page(html, {
        "Content-Security-Policy": "; ".join(policy),
        "Referrer-Policy": "no-referrer",
        "ETag": f'"{hashlib.sha256(html.encode("utf-8")).hexdigest()[:32]}"',
        "Cache-Control": "no-cache",
    })


def dashboard_page() -> Page:
    """Return the dashboard, or a page that says where to put dashboard.html."""
    try:
        with open(DASHBOARD_FILE, encoding="utf-8", newline="") as file:
            return _page_with_headers(file.read())
    except (OSError, UnicodeDecodeError):
        return _page_with_headers(_PAGE_WITHOUT_DASHBOARD)


# ==== 42. API endpoints ======================================================
# What clients of the APIs call: answers, stored responses, sessions, models. An endpoint is a
# function (app, exchange, **names in the path). It reads the request from the exchange, sends the
# response through it, and raises errors. The first sentence of its docstring is its summary in
# /openapi.json.


def parse_json_body(data: bytearray) -> object:
    """Return the JSON value of a request's body. Raises BadRequest."""
    if data.startswith(codecs.BOM_UTF8):
        del data[:len(codecs.BOM_UTF8)]
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4]:
        raise BadRequest("The body is not UTF-8: send the JSON in UTF-8.")
    if not data or data.isspace():
        raise BadRequest("The body is empty; it must be a JSON object.")
    if has_many_values(data):
        raise BadRequest(
            f"The body has more than {_MAX_JSON_VALUES} arrays, objects and values: send less."
        )
    try:
        return from_json(data)
    except ValueError as problem:
        reason = one_line(str(problem), 120)
        raise BadRequest(f"The body is not JSON: {reason}.") from None


def query_integer(query: Mapping[str, str], name: str, default: int, maximum: int) -> int:
    """Return a number from 0 to `maximum` of the query string. Raises BadRequest."""
    text = query.get(name, "") or str(default)
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) > maximum:
        raise BadRequest(f"{name}: must be a whole number up to {maximum}.", param=name)
    return int(text)


#: The prefix of the API beta that requests the long context window.
_LONG_CONTEXT_BETA = "context-1m-"


def _check_model_allowed(models: Models, caller: Caller, model: Model) -> None:
    """Raise Forbidden if the caller may not use this model."""
    if caller.models and model.id not in models.resolve(caller.models):
        raise ModelNotAllowed(
            f"This key may use {', '.join(caller.models)} only.", param="model"
        )


def _parse_environment(
    app: App, exchange: Exchange, models: Models, *, counted: bool
) -> ParseEnvironment:
    """Return what a dialect needs from the server and the caller to parse a body."""
    config, scope = app.config, exchange.caller.scope
    limits = Limits(
        config.image_allow_url, config.max_image_bytes,
        config.max_images, config.max_image_total_bytes,
    )
    return ParseEnvironment(
        models, config.default_model, limits,
        recall=lambda response_id: app.responses.messages(scope, response_id),
        item=lambda item_id: app.responses.item(scope, item_id),
        session=lambda session_id, system: app.sessions.messages(
            scope, session_id, system, config.session_ttl_ms / 1000
        ),
        count_only=counted,
        long_context=_LONG_CONTEXT_BETA in exchange.headers.get("anthropic-beta", ""),
        default_effort=exchange.caller.effort or config.default_effort,
        web_search=config.web_search and exchange.caller.web_search and not config.is_agent,
        fast_mode=config.fast_mode,
        cache_lifetime=config.cache_lifetime,
    )


def _read_turn(app: App, exchange: Exchange, *, counted: bool = False) -> Turn:
    """Read the body and return its Turn. `counted` only measures it: no quota is checked, and a
    long prompt is not truncated."""
    if not counted:
        app.requests.check_quota(exchange.caller, exchange.dialect)
    data = exchange.body()
    # The key may have been changed or revoked while the body arrived.
    exchange.caller = app.keys.current(exchange.caller)
    with app.large_bodies.parsing(len(data)):
        turn = _parse_turn(app, exchange, parse_json_body(data), counted=counted)
    if not turn.model.known:
        app.log.event(
            "warn", "model_not_listed", model=turn.model.id, request_id=exchange.request_id
        )
    _set_turn_headers(exchange, turn)
    return turn


def _parse_turn(app: App, exchange: Exchange, body: object, *, counted: bool) -> Turn:
    # Both are replaced while requests are parsed.
    config, models = app.config, app.models
    if config.session_id and isinstance(body, dict):
        session_id = body.pop("session_id", None) or exchange.headers.get("X-Session-Id")
        body.setdefault(SESSION_FIELD, session_id)
    parsing = _parse_environment(app, exchange, models, counted=counted)
    turn = exchange.dialect.parse(body, parsing)
    _check_model_allowed(models, exchange.caller, turn.model)
    models.check_runs(turn.model)
    if not counted:
        turn = _fit_prompt(app, exchange, turn, config.max_prompt_chars)
    if config.cache_ttl_ms:
        bypass = wants_cache_bypass(body, sampled_too=config.cache_sampled)
        turn = turn._replace(bypass_cache=bypass)
    return turn


def _fit_prompt(app: App, exchange: Exchange, turn: Turn, max_chars: int) -> Turn:
    """Return the turn within the operator's limit of its length; 0 = none. Raises
    ContextTooLong."""
    if not max_chars:
        check_window(turn)
        return turn
    turn, dropped = truncate_to_budget(turn, max_chars)
    if not dropped:
        return turn
    app.log.event(
        "warn", "prompt_truncated", dropped_messages=dropped, request_id=exchange.request_id
    )
    return turn._replace(adjusted=(*turn.adjusted, ("messages_dropped", dropped)))


def _set_turn_headers(exchange: Exchange, turn: Turn) -> None:
    """List ignored parameters and adjustments of the request in the response's headers."""
    if turn.ignored:
        exchange.response.headers["X-OCP-Ignored-Params"] = header_list(turn.ignored)
    if turn.adjusted:
        counts = (f"{name}={count}" for name, count in turn.adjusted)
        exchange.response.headers["X-OCP-Adjusted"] = header_list(counts)


def answer(app: App, exchange: Exchange) -> None:
    """Answer a request with a model."""
    dialect, turn = exchange.dialect, _read_turn(app, exchange)
    job = Job(
        turn, exchange.caller, exchange.client, exchange.request_id, dialect.name, app.clock(),
        peer=exchange.peer, user_agent=exchange.headers.get("User-Agent", ""),
    )
    with app.requests.answering(job) as events:
        def store(body: Json) -> None:
            # Before the last byte is sent: the client's next request may refer to this answer.
            if job.finished and (dialect.stores(turn) or turn.session_id):
                _store_conversation(app, exchange, turn, job.answers()[0], body)

        def with_headers() -> Iterator[Choice]:
            for choice in events:
                response.headers.update(job.headers)
                yield choice

        config, response = app.config, exchange.response
        response.headers["X-OCP-Cache"] = job.cache_status
        if turn.stream:
            heartbeat_s = config.heartbeat_ms / 1000
            response.send_stream(dialect.renderer(turn), with_headers(), heartbeat_s, store)
        else:
            response.keep_alive(with_headers(), config.whole_silence_ms / 1000)
            body = dialect.answer_body(turn, list(job.answers()))
            store(body)
            response.send_json(body)


def _store_conversation(
    app: App, exchange: Exchange, turn: Turn, answer: Answer, body: Json
) -> None:
    """Store the conversation under its response id, its session id, or both."""
    answered = Message("assistant", blocks_to_store(answer.blocks))
    messages = [*map(without_thinking, turn.messages), answered]
    if exchange.dialect.stores(turn) and body:
        system, items = exchange.dialect.stored_input(turn)
        app.responses.put(exchange.caller.scope, body, [*system, *messages], items, app.config)
    if not turn.session_id:
        return
    try:
        app.sessions.put(exchange.caller.scope, turn, messages, app.config.session_ttl_ms / 1000)
    except sqlite3.Error as problem:
        # On a full disk, for example. The answer itself is complete, so the request succeeds.
        app.log.event("error", "session_not_kept", error=str(problem))


def get_sessions(app: App, exchange: Exchange) -> None:
    """GET /sessions: list the stored conversations."""
    entries = app.sessions.all(app.config.session_ttl_ms / 1000)
    names = {key.caller.scope: key.name for key in app.keys.all()}
    sessions = [
        {**entry, "caller": names.get(entry["caller"], entry["caller"])} for entry in entries
    ]
    exchange.response.send_json({"sessions": sessions})


def clear_sessions(app: App, exchange: Exchange) -> None:
    """DELETE /sessions: delete all stored conversations."""
    exchange.response.send_json({"cleared": app.sessions.clear()})


def clear_session(app: App, exchange: Exchange, id: str) -> None:
    """DELETE /sessions/{id}: delete one stored conversation."""
    cleared = app.sessions.clear(id)
    if not cleared:
        raise NotFound(f"There is no session {one_line(id, 80)!r}.", param="id")
    exchange.response.send_json({"cleared": cleared})


def _estimate(app: App, exchange: Exchange) -> int:
    """Return the estimated tokens of the request, and mark the response as an estimate."""
    turn = _read_turn(app, exchange, counted=True)
    exchange.response.headers["X-OCP-Estimate"] = "true"
    return estimate_tokens(turn)


def count_tokens(app: App, exchange: Exchange) -> None:
    """POST /v1/messages/count_tokens: estimate the input tokens of a request."""
    exchange.response.send_json({"input_tokens": _estimate(app, exchange)})


def count_input_tokens(app: App, exchange: Exchange) -> None:
    """POST /v1/responses/input_tokens: estimate the input tokens of a request."""
    tokens = _estimate(app, exchange)
    exchange.response.send_json({"object": "response.input_tokens", "input_tokens": tokens})


def get_response(app: App, exchange: Exchange, id: str) -> None:
    """GET /v1/responses/{id}: return a stored response."""
    stored = app.responses.get(exchange.caller.scope, id)
    if exchange.query.get("stream", "").lower() not in ("", "false", "0"):
        raise Unsupported(
            "stream: a stored response cannot be streamed again; request it without `stream`.",
            param="stream",
        )
    exchange.response.send_json(stored.body)


def cancel_response(app: App, exchange: Exchange, id: str) -> None:
    """POST /v1/responses/{id}/cancel: refuse, because no response runs in the background."""
    app.responses.get(exchange.caller.scope, id)
    raise BadRequest(
        "This response is complete and cannot be cancelled. To stop one that is running, close "
        "its connection."
    )


#: How many input items a page has by default, and at most.
_DEFAULT_ITEMS, _MAX_ITEMS = 20, 100


def get_input_items(app: App, exchange: Exchange, id: str) -> None:
    """GET /v1/responses/{id}/input_items: list the input items of a stored response."""
    query = Fields(dict(exchange.query))
    order = query.one_of("order", ("asc", "desc")) or "desc"
    limit = query_integer(exchange.query, "limit", _DEFAULT_ITEMS, _MAX_ITEMS)
    if not limit:
        raise query.invalid("limit", f"a whole number from 1 to {_MAX_ITEMS}")
    items = app.responses.get(exchange.caller.scope, id).items
    items = items[::-1] if order == "desc" else items
    after = query.text("after")
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise BadRequest(f"after: there is no item {one_line(after, 80)!r}.", param="after")
        items = items[ids.index(after) + 1:]
    page = items[:limit]
    exchange.response.send_json({
        "object": "list", "data": page, "has_more": len(items) > len(page),
        "first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None,
    })


def delete_response(app: App, exchange: Exchange, id: str) -> None:
    """DELETE /v1/responses/{id}: delete a stored response."""
    app.responses.remove(exchange.caller.scope, id)
    exchange.response.send_json({"id": id, "object": "response", "deleted": True})


def no_embeddings(app: App, exchange: Exchange) -> None:
    """POST /v1/embeddings: refuse, and name an alternative."""
    raise NotFound(
        "This server has no embeddings: Claude models do not make any. Use a local embedding "
        "model, such as Ollama's nomic-embed-text, for this part of your tool."
    )


#: A fixed time for `created`: clients require the field, but its value is unknown.
_MODELS_CREATED_S = 1_750_000_000


def _model_entry(models: Models, model: Model, default_name: str) -> Json:
    """Return the fields of OpenAI's and of Anthropic's model entries, those of other servers that
    clients read (OpenRouter's context_length, vLLM's max_model_len), and those of OCP."""
    is_default = models.resolve([default_name]) == {model.id}
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
        "context_length": model.context_window,
        "max_model_len": model.context_window,
        "max_output_tokens": model.max_tokens,
        "reasoning": model.reasoning,
        "efforts": list(model.efforts),
        "default_effort": model.default_effort or None,
        "aliases": models.aliases_of(model),
        "default": is_default,
    }


#: The most models on one page.
_MAX_PAGE = 1000


def _page(query: Mapping[str, str], ids: list[str]) -> tuple[slice, bool]:
    """Return the requested page of ids (Anthropic's `after_id`, `before_id` and `limit`), and
    whether more ids follow in its direction. Raises BadRequest."""
    def index(name: str, default: int) -> int:
        if not query.get(name):
            return default
        if query[name] not in ids:
            raise BadRequest(f"{name}: must be the id of an entry of this list.", param=name)
        return ids.index(query[name])

    first, end = index("after_id", -1) + 1, index("before_id", len(ids))
    limit = query_integer(query, "limit", 0, _MAX_PAGE) or _MAX_PAGE
    has_more = limit < end - first
    if query.get("before_id") and not query.get("after_id"):
        return slice(max(first, end - limit), end), has_more
    return slice(first, min(end, first + limit)), has_more


def get_models(app: App, exchange: Exchange) -> None:
    """GET /v1/models: list the models that the caller may use, or a page of them."""
    known = app.models
    models = known.offered()
    allowed = known.resolve(exchange.caller.models)
    if allowed:
        # A key can name models that are not listed.
        models = [model for model in known.all() if model.id in allowed and known.can_run(model)]
    page, has_more = _page(exchange.query, [model.id for model in models])
    default_name = app.config.default_model
    entries = [_model_entry(known, model, default_name) for model in models[page]]
    ends = [entries[0]["id"], entries[-1]["id"]] if entries else [None, None]
    exchange.response.send_json({
        "object": "list", "data": entries, "has_more": has_more,
        "first_id": ends[0], "last_id": ends[1],
    })


def get_model(app: App, exchange: Exchange, model: str) -> None:
    """GET /v1/models/{model}: return the model with this id or alias."""
    models = app.models
    found = models.find(model)
    _check_model_allowed(models, exchange.caller, found)
    models.check_runs(found)
    exchange.response.send_json(_model_entry(models, found, app.config.default_model))


# ==== 43. Management endpoints ===============================================
# What operators and holders of keys call: health, logs, keys, usage, settings, the cache, the
# pages, and the OpenAPI document. Reports pick their numbers from one `snapshot`.


def _status(app: App) -> tuple[str, str]:
    """Return "ok", "degraded" or "draining", and what the operator should do about it."""
    problem = app.program.last_result()[1]
    login = app.account.login_report()
    if app.draining:
        return "draining", "The server is stopping."
    if problem is not None or login["ok"] is False:
        return "degraded", problem.message if problem is not None else str(login["message"])
    _, advice = app.state_folder.status
    return ("degraded", advice) if advice else ("ok", "")


def _extra_usage(app: App) -> tuple[str, str]:
    """Return "none", "billed" or "stopped", and what the operator should know about it."""
    if not app.account.is_billed:
        return "none", ""
    if app.config.extra_usage != "stop":
        return "billed", ""
    try:
        app.account.check_not_billed(None)
    except ExtraUsageStopped as stopped:
        return "stopped", stopped.message
    return "stopped", (
        "Requests to some models are refused, because their answers are billed as extra usage. "
        f"{ALLOW_EXTRA_USAGE}"
    )


def _stats(app: App) -> Json:
    """Return the counts of requests since the start."""
    finished = app.metrics.total("ocp_requests_total")
    not_failed = sum(
        app.metrics.total("ocp_requests_total", outcome=word) for word in ("ok", "abandoned")
    )
    paths = ("continued", "rewound", "rebuilt", "fresh", "cached", "shared")
    return {
        "totalRequests": app.metrics.total("ocp_requests_started_total"),
        "activeRequests": app.gate.running,
        "queued": app.gate.waiting,
        "queueRejections": app.gate.refused,
        "spawned": app.pool.spawned,
        "errors": finished - not_failed,
        "timeouts": app.metrics.total("ocp_requests_total", outcome=str(UpstreamTimeout.code)),
        **{path: app.metrics.total("ocp_answers_total", path=path) for path in paths},
    }


def _tls_state(config: Config) -> Json:
    """Return whether the server speaks https, and what devices have to know of its certificate."""
    return {"tls": bool(config.tls_cert), "tlsFingerprint": certificate_pin(config.tls_cert)}


def snapshot(app: App) -> Json:
    """Return the state and the numbers of the server, from which all reports pick. /health shows
    it to everybody, so it contains no path, no prompt and no error text."""
    config, stats, uptime_s = app.config, _stats(app), app.clock() - app.started_s
    program, problem = app.program.last_result()
    status, fix = _status(app)
    extra_usage, advice = _extra_usage(app)
    return {
        "status": status,
        "version": VERSION,
        "demo": app.demo,
        "instanceName": config.instance_name,
        "uptime": round(uptime_s * 1000),
        "uptimeHuman": format_uptime(uptime_s),
        "authMode": config.mode,
        **_tls_state(config),
        "auth": app.account.login_report(),
        # Whether claude's system prompt leaves out the account's identity.
        "ownerHidden": app.claude_folder.is_private,
        # Where keys, settings and usage are stored: "disk", or the problem with it.
        "storage": app.state_folder.status[0],
        "storageFix": app.state_folder.status[1] or None,
        "claudeBinaryOk": problem is None,
        "claudeVersion": program.version_text if program is not None else None,
        # Whether conversations that move to another process keep the API's prompt cache.
        "promptCacheKept": app.pinning.works(program.version if program is not None else None),
        # Whether answers are billed as extra usage: "none", "billed", or "stopped" for that reason.
        "extraUsage": extra_usage,
        "fix": fix or advice or None,
        "stats": stats,
        "concurrency": {
            "maxConcurrent": config.max_concurrent,
            "maxQueue": config.max_queue,
            "inflight": stats["activeRequests"],
            "queued": stats["queued"],
            "queueRejections": stats["queueRejections"],
        },
        "spares": app.pool.spares(),
        "parked": app.pool.parked,
    }


def get_health(app: App, exchange: Exchange) -> None:
    """GET /health: return the state of the server."""
    advertised = app.config.advertised_key
    key = {"anonymousKey": advertised} if advertised else {}
    exchange.response.send_json({**snapshot(app), **key})


def get_ready(app: App, exchange: Exchange) -> None:
    """GET /ready: respond 200 if requests can be answered, otherwise 503."""
    status, fix = _status(app)
    if status != "ok":
        raise NotReady(fix)
    exchange.response.send_json({"ready": True})


#: How often /api/events checks for changes, and when it sends a keepalive instead.
_EVENTS_INTERVAL_S = 0.5
_EVENTS_KEEPALIVE_S = 15.0


def get_events(app: App, exchange: Exchange) -> None:
    """GET /api/events: stream server-sent events, `state` for each change of the server's state
    and `log` for new log entries."""
    exchange.response.send_events(_live_frames(app, exchange.client))


def _live_frames(app: App, client: Client) -> Iterator[bytes]:
    """Yield the frames of /api/events until the server stops. Raises ClientGone."""
    seen, state = 0, b""
    sent_s = app.clock()
    while not app.draining:
        frames = b""
        entries, seen = app.log.since(seen)
        if entries:
            frames += sse_event({"entries": entries}, "log")
        before, state = state, sse_event(_live_state(app), "state")
        frames += state if state != before else b""
        if not frames and app.clock() - sent_s >= _EVENTS_KEEPALIVE_S:
            frames = b": keepalive\n\n"
        if frames:
            sent_s = app.clock()
            yield frames
        poller = select.poll()
        if client.can_detect_hangup():
            poller.register(client.fileno(), select.POLLIN)
        poller.poll(_EVENTS_INTERVAL_S * 1000)
        if client.gone():
            raise ClientGone


def _live_state(app: App) -> Json:
    """Return the state for /api/events, without values that change all the time."""
    health = {name: each for name, each in snapshot(app).items() if "uptime" not in name}
    return {
        "startedAt": iso_time(app.started_at_s),
        "health": health,
        "running": app.requests.running(),
        "plan": app.account.plan(),
        "cache": {**app.cache.stats(), "ttl": app.config.cache_ttl_ms},
        "connections": len(app.connections),
        "newerRelease": app.state_folder.newer_release(),
        "finished": app.metrics.total("ocp_requests_total"),
    }


_MAX_LOG_LINES = 1000


def _query_time(query: Mapping[str, str], name: str, default_s: float) -> float:
    """Return a time of the query string in epoch seconds; it is ISO 8601, epoch seconds, or a span
    before now such as 2h. Raises BadRequest."""
    text = query.get(name, "")
    back_ms = parse_duration_ms(text)
    try:
        if back_ms is not None:
            return max(0.0, time.time() - back_ms / 1000)
        if re.fullmatch(r"[0-9]{1,11}(\.[0-9]+)?", text):
            return float(text)
        # In a query string the plus of a time zone arrives as a space.
        return parse_time(re.sub(r" (?=\d\d:?\d\d$)", "+", text)) if text else default_s
    except (ValueError, OverflowError, OSError):
        raise BadRequest(
            f"{name}: must be a time such as 2026-11-20T14:00:00Z, a span such as 30m, 2h or 7d, "
            "or epoch seconds.", param=name,
        ) from None


def _log_filter(query: Mapping[str, str]) -> Callable[[Json], bool]:
    """Return what tells whether a log event is of the key and the request that the query names,
    and not older than it says. Raises BadRequest."""
    key, request_id = query.get("key", "").lower(), query.get("request", "")
    since_s = _query_time(query, "since", 0.0)
    since = iso_time(since_s) if since_s else ""

    def matches(entry: Json) -> bool:
        names = (str(entry.get(field, "")).lower() for field in ("key", "caller"))
        is_of_request = not request_id or entry.get("request_id") == request_id
        return is_of_request and (not key or key in names) and str(entry["ts"]) >= since

    return matches


def get_logs(app: App, exchange: Exchange) -> None:
    """GET /logs?n=30&level=all&key=&request=&since=: list the newest log events of this level or
    above, oldest first, of one key or request if they are named; level=audit lists the operator's
    changes."""
    level = exchange.query.get("level", "all").lower()
    level = "warn" if level == "warning" else level
    if level not in ("all", "audit", *LEVELS):
        raise BadRequest(f"level: must be one of all, audit, {', '.join(LEVELS)}.", param="level")
    count = query_integer(exchange.query, "n", 30, _MAX_LOG_LINES)
    entries = app.log.recent(count, level, _log_filter(exchange.query))
    exchange.response.send_json({"count": len(entries), "level": level, "entries": entries})


# -- keys -------------------------------------------------------------------------------------

_QUOTA_NAMES = tuple(quota.name for quota in QUOTAS)
#: The highest limit of a quota, and the length of a note on a key.
_MAX_QUOTA = 10**15
_MAX_KEY_NOTE_CHARS = 500


def _with_known_fields(fields: Fields, known: tuple[str, ...]) -> Fields:
    """Return the fields. Raises BadRequest if there are others than the known ones."""
    for name in fields.object:
        if name not in known:
            place = one_line(fields.path_of(name), 80)
            raise BadRequest(
                f"{place}: unknown field; allowed: {', '.join(known)}.", param=place
            )
    return fields


def _read_fields(exchange: Exchange, known: tuple[str, ...]) -> Fields:
    """Return the fields of the body. Raises BadRequest, also for unknown fields."""
    return _with_known_fields(Fields(parse_json_body(exchange.body())), known)


def _expiry(fields: Fields) -> int | None:
    """Return when a key expires, in epoch seconds; None = never. Raises BadRequest."""
    text = fields.text("expiry")
    if text is None:
        return None
    span_ms = parse_duration_ms(text)
    try:
        at_s = parse_time(text) if span_ms is None else time.time() + span_ms / 1000
        # Raises ValueError after the year 9999.
        datetime.datetime.fromtimestamp(at_s)
    except (ValueError, OverflowError, OSError):
        allowed = "a time such as 2027-01-31 or 2027-01-31T12:00:00Z, or a span such as 30d or 12h"
        raise fields.invalid("expiry", allowed) from None
    if at_s <= time.time():
        raise fields.invalid("expiry", "in the future")
    return int(at_s)


def _allowed_models(app: App, fields: Fields) -> list[str]:
    """Return the aliases and ids of the models that a key may use; empty = all. An alias stays one,
    so that the key may use what it stands for later. Raises BadRequest."""
    names, models = [], app.models
    for name in fields.texts("models"):
        try:
            found = models.find(name).id
        except UnknownModel as problem:
            raise BadRequest(problem.message, param="models") from None
        plain = name.strip().lower()
        names.append(plain if models.is_alias(plain) else found)
    return list(dict.fromkeys(names))


def _key_effort(fields: Fields) -> str:
    """Return the effort of a key; empty = the server's default. Raises BadRequest."""
    level = (fields.text("effort") or "").strip().lower()
    if level not in ("", *EFFORTS):
        raise fields.invalid("effort", "one of " + ", ".join(EFFORTS))
    return level


def _note(fields: Fields) -> str:
    """Return the operator's note on a key. Lone surrogates, which are not UTF-8, are replaced."""
    text = one_line(fields.text("note") or "", _MAX_KEY_NOTE_CHARS)
    return text.encode("utf-8", "replace").decode("utf-8")


def _quota_limits(fields: Fields) -> dict[str, int | None]:
    """Return the quota limits in a body; None removes a limit."""
    return {name: fields.integer(name, 0, _MAX_QUOTA) for name in fields.object}


#: The fields of a key that can be set: the name in JSON, the column, the parser, and the schema
#: for /openapi.json.
_KEY_FIELDS: tuple[tuple[str, str, Callable[[App, Fields], object], Json], ...] = (
    (
        "name", "name", lambda app, fields: fields.required_text("name"),
        {
            "type": "string", "minLength": 1, "maxLength": 64,
            "description": "visible characters, no slash; not a number",
        },
    ),
    (
        "expiry", "expiry_s", lambda app, fields: _expiry(fields),
        {"type": ["string", "null"], "description": "2027-01-31, an ISO time, 30d, 12h"},
    ),
    (
        "models", "models", _allowed_models,
        {"type": ["array", "null"], "items": {"type": "string", "minLength": 1}},
    ),
    (
        "maxConcurrent", "max_concurrent",
        lambda app, fields: fields.integer("maxConcurrent", 0, 1000) or 0,
        {"type": ["integer", "null"], "minimum": 0, "maximum": 1000},
    ),
    (
        "note", "note", lambda app, fields: _note(fields),
        {"type": ["string", "null"], "maxLength": _MAX_KEY_NOTE_CHARS},
    ),
    (
        "effort", "effort", lambda app, fields: _key_effort(fields),
        {"enum": ["", *EFFORTS, None]},
    ),
    (
        "webSearch", "web_search", lambda app, fields: fields.flag("webSearch"),
        {"type": ["boolean", "null"]},
    ),
)
_KEY_NAMES = tuple(name for name, *_ in _KEY_FIELDS)


def _key_columns(app: App, fields: Fields) -> dict[str, object]:
    """Return the columns that a body sets, with their values."""
    return {
        column: parse(app, fields) for name, column, parse, _ in _KEY_FIELDS
        if name in fields.object
    }


def _key_entry(app: App, key: Key) -> Json:
    def iso(epoch_s: int | None) -> str | None:
        return None if epoch_s is None else iso_time(epoch_s)

    old = app.keys.in_grace(key)
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
        "effort": key.effort or None,
        "webSearch": key.web_search,
        "lastUsed": iso(key.used_s),
        "createdAt": iso(key.created_s),
        "revokedAt": iso(key.revoked_s),
        # The secret before the last rotation, while it is still valid.
        "oldSecret": old and {"keyPreview": old.preview, "until": iso(old.valid_until_s)},
        "quota": app.ledger.quota_report(key) if key.revoked_s is None else None,
    }


def _audit(app: App, exchange: Exchange, event: str, **fields: object) -> None:
    """Log a change by the operator."""
    app.log.audit(event, **fields, by=exchange.caller.name, peer=exchange.peer)


def _connect_fields(app: App) -> Json:
    """Return where a device with a key reaches this server; null with the reason if it cannot."""
    url, note = app.address.for_devices()
    if app.config.mode != "multi":
        note += (
            f" In mode {app.config.mode} keys of devices have no effect: set "
            "CLAUDE_AUTH_MODE=multi and restart the server."
        )
    return {"connectUrl": url or None, "connectNote": note.strip() or None}


def get_keys(app: App, exchange: Exchange) -> None:
    """GET /api/keys: list all keys, newest first, with the use of their quotas but without their
    secrets; revoked keys are included. `connectUrl` is the address that devices reach, or null,
    and `connectNote` says why."""
    keys = app.keys.all()
    entries = [_key_entry(app, key) for key in keys]
    exchange.response.send_json({"keys": entries, **_connect_fields(app)})


def _with_storage_warning(app: App, body: Json) -> Json:
    """Return the body, with a warning if a restart may undo the change that it reports."""
    _, advice = app.state_folder.status
    return {**body, **({"warning": f"Not kept safely: {advice}"} if advice else {})}


@contextlib.contextmanager
def _audited_change(
    app: App, exchange: Exchange, event: str, key: Key, **fields: object
) -> Iterator[None]:
    """Change a key in the block, then cancel requests that it no longer allows, and log it. A
    change that could not be stored is in force in memory: its StorageFailed is raised last."""
    not_stored: StorageFailed | None = None
    try:
        yield
    except StorageFailed as failure:
        not_stored = failure
    app.requests.end_unwanted()
    _audit(
        app, exchange, event, key=key.name, id=key.id, **fields,
        late=not_stored and not_stored.error_code,
    )
    if not_stored is not None:
        raise not_stored


def create_key(app: App, exchange: Exchange) -> None:
    """POST /api/keys: create a key; only this response contains its secret."""
    fields = _read_fields(exchange, (*_KEY_NAMES, "quota"))
    columns = _key_columns(app, fields)
    quota = fields.child("quota")
    if quota is not None:
        limits = _quota_limits(_with_known_fields(quota, _QUOTA_NAMES))
        columns["quota"] = {name: limit for name, limit in limits.items() if limit is not None}
    key, secret = app.keys.create(str(columns.pop("name", "")), columns)
    _audit(app, exchange, "key_created", key=key.name, id=key.id)
    body = {"id": key.id, "key": secret, **_key_entry(app, key), **_connect_fields(app)}
    exchange.response.send_json(_with_storage_warning(app, body), status=201)


def get_key(app: App, exchange: Exchange, key: str) -> None:
    """GET /api/keys/{key}: return the key with this id or name, with the use of its quotas."""
    exchange.response.send_json(_key_entry(app, app.keys.find(key)))


def change_key(app: App, exchange: Exchange, key: str) -> None:
    """PATCH /api/keys/{key}: change fields of the key; the others stay."""
    found = app.keys.find(key)
    fields = _read_fields(exchange, _KEY_NAMES)
    columns = _key_columns(app, fields)
    with _audited_change(app, exchange, "key_changed", found, fields=list(fields.object)):
        app.keys.change(found, columns)
    entry = _key_entry(app, app.keys.find(str(found.id)))
    exchange.response.send_json(_with_storage_warning(app, entry))


def revoke_key(app: App, exchange: Exchange, key: str) -> None:
    """DELETE /api/keys/{key}: revoke the key and cancel its running requests; its usage records
    stay."""
    revoked = False
    with contextlib.suppress(NotFound):
        found = app.keys.find(key)
        with _audited_change(app, exchange, "key_revoked", found):
            revoked = app.keys.revoke(found)
    exchange.response.send_json(_with_storage_warning(app, {"revoked": revoked, "idOrName": key}))


def rotate_key(app: App, exchange: Exchange, key: str) -> None:
    """POST /api/keys/{key}/rotate {"grace": "24h"}: replace the key's secret; the old one works
    until the end of `grace`, or without it stops working at once."""
    found = app.keys.find(key)
    raw = exchange.body()
    fields = _with_known_fields(Fields(parse_json_body(raw) if raw else {}), ("grace",))
    grace_s = _grace_s(fields)
    secret = app.keys.rotate(found, grace_s)
    _audit(app, exchange, "key_rotated", key=found.name, id=found.id, grace_s=grace_s or None)
    old = _key_entry(app, app.keys.find(str(found.id)))["oldSecret"]
    body = {"id": found.id, "name": found.name, "key": secret, "oldSecret": old}
    exchange.response.send_json(_with_storage_warning(app, {**body, **_connect_fields(app)}))


#: The longest time for which a replaced secret can stay valid.
_MAX_GRACE_S = 30 * 86_400


def _grace_s(fields: Fields) -> int:
    """Return how long the old secret of a rotated key is valid; 0 = not at all. Raises
    BadRequest."""
    text = fields.text("grace")
    duration_ms = 0 if text is None else parse_duration_ms(text)
    if duration_ms is None or duration_ms > _MAX_GRACE_S * 1000:
        raise fields.invalid("grace", "a duration up to 30d, such as 24h")
    return duration_ms // 1000


def end_grace(app: App, exchange: Exchange, key: str) -> None:
    """DELETE /api/keys/{key}/grace: make the secret before the last rotation invalid now."""
    found = app.keys.find(key)
    with _audited_change(app, exchange, "key_grace_ended", found):
        ended = app.keys.end_grace(found)
    exchange.response.send_json(_with_storage_warning(app, {"ended": ended, "name": found.name}))


def get_quota(app: App, exchange: Exchange, key: str) -> None:
    """GET /api/keys/{key}/quota: return the limits, their use and their resets."""
    found = app.keys.find(key)
    report = app.ledger.quota_report(found)
    exchange.response.send_json({"keyId": found.id, "name": found.name, "quota": report})


def change_quota(app: App, exchange: Exchange, key: str) -> None:
    """PATCH /api/keys/{key}/quota: set limits; null removes one, the others stay."""
    found = app.keys.find(key)
    fields = _read_fields(exchange, _QUOTA_NAMES)
    limits = _quota_limits(fields)
    if not limits:
        raise BadRequest(f"Set at least one of {', '.join(_QUOTA_NAMES)}.")
    quota = {n: limit for n, limit in {**found.quota, **limits}.items() if limit is not None}
    with _audited_change(app, exchange, "quota_updated", found, quota=limits):
        app.keys.change(found, {"quota": quota})
    body = {"ok": True, "idOrName": key, "quota": limits}
    exchange.response.send_json(_with_storage_warning(app, body))


# -- usage ------------------------------------------------------------------------------------

_MAX_RECENT = 500
#: How often reading the usage of all callers is logged, for each caller and address.
_USAGE_AUDIT_INTERVAL_S = 60.0
_MAX_HOURS = 24 * 400


def get_api_usage(app: App, exchange: Exchange) -> None:
    """GET /api/usage?since=&until=&hours=24&limit=50&all=true: return the caller's own usage, or
    with `all` that of all callers, for the operator only."""
    query, caller = exchange.query, exchange.caller
    limit = query_integer(query, "limit", 50, _MAX_RECENT)
    hours = query_integer(query, "hours", 24, _MAX_HOURS)
    until_s = _query_time(query, "until", time.time() + 1)
    since_s = _query_time(query, "since", until_s - hours * 3600)
    all_callers = caller.is_admin and query.get("all", "").lower() in _TRUE_WORDS
    # Not every time, because an open dashboard polls.
    audit_id = f"usage {caller.name} {exchange.peer}"
    if all_callers and app.intervals.claim(audit_id, _USAGE_AUDIT_INTERVAL_S):
        app.log.event("info", "admin_usage_full_scope", by=caller.name, peer=exchange.peer)
    report = app.ledger.report(since_s, until_s, limit, None if all_callers else caller)
    exchange.response.send_json(
        {
            "since": iso_time(since_s),
            "until": iso_time(until_s),
            "scope": {"self": None if all_callers else caller.name, "all": all_callers},
            **report,
        }
    )


# -- failures ---------------------------------------------------------------------------------


def _failure_entry(row: Json, paths: Mapping[str, str]) -> Json:
    """Return a failed request, from its row of usage. `paths` are those of the dialects."""
    return {
        "id": row["request_id"],
        "at": iso_time(row["at_s"]),
        "key": row["key_name"],
        "peer": row["peer"],
        "path": paths.get(row["dialect"]),
        "model": row["model"],
        "status": row["status"],
        "kind": row["outcome"],
        "message": row["message"] or "",
        "action": _action(row["outcome"], row),
        "userAgent": row["user_agent"],
        "totalMs": row["total_ms"],
    }


def _action(kind: str, row: Json) -> str:
    """Return what to do about a failure of the row's caller, which may have no key."""
    return action_for(kind, "" if row["key_id"] is None else row["key_name"])


def _refusal_entry(group: RefusedGroup, since_s: float, request_id: str) -> Json:
    """Return a group of refusals, with the last one, or the one of this request, as an example."""
    shown = group.with_id(request_id) or group.newest
    key_name = "" if shown.key.lower() in _RESERVED_NAMES else shown.key
    return {
        "id": shown.request_id,
        "at": iso_time(group.at_s),
        "lastAt": iso_time(group.last_s),
        "count": group.count_since(since_s),
        "peer": shown.peer,
        "path": shown.path or None,
        "status": shown.status,
        "kind": shown.kind,
        "preview": shown.preview or None,
        "key": shown.key or None,
        "message": shown.message,
        "action": action_for(shown.kind, key_name),
        "userAgent": shown.user_agent or None,
    }


def _by_kind(kinds: list[Json], refusals: list[Json]) -> list[Json]:
    """Return for each kind its count and the newest failure's time, message and action; the most
    frequent kind first."""
    sums: dict[str, Json] = {}
    entries = [
        {
            **each, "lastAt": iso_time(each["last_s"]), "message": each["message"] or "",
            "action": _action(each["kind"], each),
        }
        for each in kinds
    ]
    for entry in (*entries, *refusals):
        kind = entry["kind"]
        known = sums.get(kind, {"count": 0, "lastAt": ""})
        newest = max(known, entry, key=lambda each: str(each["lastAt"]))
        sums[kind] = {
            "kind": kind, "status": newest["status"], "count": known["count"] + entry["count"],
            "lastAt": newest["lastAt"], "message": newest["message"], "action": newest["action"],
        }
    return sorted(sums.values(), key=lambda each: int(each["count"]), reverse=True)


def _failure_filter(app: App, query: Mapping[str, str]) -> FailureFilter:
    """Return which failures the query string asks for. Raises BadRequest, NotFound."""
    name, key_id = query.get("key", "").strip(), None
    if name and name.lower() not in _RESERVED_NAMES:
        key = app.keys.find(name)
        name, key_id = key.name, key.id
    return FailureFilter(
        since_s=_query_time(query, "since", 0.0), key=name, key_id=key_id,
        request_id=query.get("request", "").strip(), kind=query.get("kind", "").strip(),
    )


_MAX_FAILURES = 500


def get_errors(app: App, exchange: Exchange) -> None:
    """GET /api/errors?key=&request=&kind=&since=&limit=50: list failed requests, refusals, and the
    sums by kind, newest first, with what to do about each. Refusals are kept since the start."""
    limit = query_integer(exchange.query, "limit", 50, _MAX_FAILURES)
    wanted = _failure_filter(app, exchange.query)
    rows, kinds = app.ledger.failures(wanted, limit)
    paths = {
        route.dialect.name: route.path for route in reversed(exchange.routes)
        if route.dialect is not None and route.method == "POST"
    }
    refusals = [
        _refusal_entry(group, wanted.since_s, wanted.request_id)
        for group in app.refusals.kept.groups()
        if group.last_s >= wanted.since_s and wanted.takes(group.newest)
        and (not wanted.request_id or group.with_id(wanted.request_id) is not None)
    ]
    exchange.response.send_json({
        "errors": [_failure_entry(row, paths) for row in rows],
        "refusals": refusals[:limit],
        "byKind": _by_kind(kinds, refusals),
    })


#: The counts of requests in /usage.
_TOTALS = ("totalRequests", "activeRequests", "errors", "timeouts")
#: The numbers of one model in /usage, and their columns in the ledger's sums.
_MODEL_NUMBERS = (
    ("requests", "requests"), ("successes", "successes"), ("errors", "errors"),
    ("timeouts", "timeouts"), ("avgElapsed", "avg_elapsed_ms"), ("maxElapsed", "max_elapsed_ms"),
    ("avgPromptChars", "avg_prompt_chars"), ("maxPromptChars", "max_prompt_chars"),
    ("inputTokens", "input_tokens"), ("outputTokens", "output_tokens"),
    ("cacheReadTokens", "cache_read_tokens"), ("cacheWriteTokens", "cache_write_tokens"),
    ("cacheReadShare", "cache_read_share"),
)


def get_usage(app: App, exchange: Exchange) -> None:
    """GET /usage: return the use of the plan as claude reported it, and totals since the start."""
    app.learn_plan(exchange.client)
    now = snapshot(app)
    totals = {name: now["stats"][name] for name in _TOTALS}
    models = {
        row["model"]: {name: row[column] for name, column in _MODEL_NUMBERS}
        for row in app.ledger.by_model(app.started_at_s)
    }
    proxy = {**totals, "uptime": now["uptimeHuman"]}
    exchange.response.send_json({**app.account.report(), "proxy": proxy, "models": models})


#: How many failed requests /status shows, and how old they may be.
_STATUS_FAILURES = 3
_STATUS_FAILURES_S = 86_400.0


def get_status(app: App, exchange: Exchange) -> None:
    """GET /status: return a summary of the server, the plan and the last errors."""
    app.learn_plan(exchange.client)
    now = snapshot(app)
    login, stats = now["auth"], now["stats"]
    login_words = {True: "logged in", None: "not known yet", False: "not logged in"}
    recent = FailureFilter(since_s=time.time() - _STATUS_FAILURES_S)
    failures, _ = app.ledger.failures(recent, _STATUS_FAILURES)
    exchange.response.send_json({
        "proxy": {
            "status": now["status"], "version": now["version"], "demo": now["demo"],
            "uptime": now["uptimeHuman"],
            "auth": login_words[login["ok"]], "fix": now["fix"],
        },
        "requests": {
            "total": stats["totalRequests"], "active": stats["activeRequests"],
            "errors": stats["errors"], "timeouts": stats["timeouts"],
        },
        "plan": app.account.plan(),
        "recentErrors": [
            {
                "time": iso_time(row["at_s"]), "id": row["request_id"], "key": row["key_name"],
                "model": row["model"], "kind": row["outcome"],
                "message": row["message"] or row["outcome"],
            }
            for row in reversed(failures)
        ],
    })


# -- settings, cache, metrics -----------------------------------------------------------------


def get_settings(app: App, exchange: Exchange) -> None:
    """GET /settings: list the settings that can be changed at run time, with ranges and
    sources."""
    exchange.response.send_json(app.settings.report())


def change_settings(app: App, exchange: Exchange) -> None:
    """PATCH /settings {name: value}: change settings permanently; null restores the startup value.

    Respond 200 if all changes succeeded and 207 if some did. If none did, respond 400, or 503 or
    507 when the database failed.
    """
    results: Json = {}
    errors = []
    status_if_none = BadRequest.status
    for name, value in Fields(parse_json_body(exchange.body())).object.items():
        try:
            results[name] = {"ok": True, "value": app.change_setting(name, value)}
            _audit(app, exchange, "setting_changed", setting=name, value=value)
        except KeyError:
            reason = f"unknown setting; allowed: {', '.join(live_settings())}"
        except ValueError as problem:
            reason = str(problem)
        except sqlite3.Error as problem:
            failure = storage_failure(problem, _NOTHING_CHANGED)
            reason, status_if_none = f"could not be stored: {failure.message}", failure.status
        if name not in results:
            results[name] = {"error": reason}
            errors.append(f"{one_line(name, 80)}: {reason}")
    some_changed = len(results) > len(errors)
    status = 200 if not errors else 207 if some_changed else status_if_none
    more = {"errors": errors} if errors else {}
    body = {"results": results, **more, "current": app.settings.report()}
    exchange.response.send_json(body, status)


def get_cache_stats(app: App, exchange: Exchange) -> None:
    """GET /cache/stats: return the size, limits and hit counts of the cache."""
    limits = {"maxBytes": app.config.cache_max_bytes, "ttl": app.config.cache_ttl_ms}
    exchange.response.send_json({**app.cache.stats(), **limits})


def clear_cache(app: App, exchange: Exchange) -> None:
    """DELETE /cache: delete all cached answers."""
    cleared = app.cache.clear()
    _audit(app, exchange, "cache_cleared", cleared=cleared)
    exchange.response.send_json({"cleared": cleared})


#: The results of /cache/stats, by the label of ocp_cache_requests_total.
_CACHE_RESULTS = {"hit": "hits", "miss": "misses", "shared": "shared", "bypass": "bypassed"}


def _gauges(app: App) -> dict[str, dict[Labels, float]]:
    """Return the metrics whose values other objects keep."""
    now, cache, windows = snapshot(app), app.cache.stats(), app.account.windows()
    budget = app.account.budget
    currency = (("currency", budget.currency or ""),)
    stats, logged_in = now["stats"], now["auth"]["ok"]
    return {
        "ocp_build_info": {(("version", VERSION), ("claude", now["claudeVersion"] or "")): 1},
        "ocp_uptime_seconds": {(): now["uptime"] / 1000},
        "ocp_running": {(): stats["activeRequests"]},
        "ocp_queued": {(): stats["queued"]},
        "ocp_queue_refusals_total": {(): stats["queueRejections"]},
        "ocp_connections": {(): len(app.connections)},
        "ocp_spawns_total": {(): stats["spawned"]},
        "ocp_spares": {(("model", m),): count for m, count in now["spares"].items()},
        "ocp_parked": {(): now["parked"]},
        "ocp_cache_requests_total": {
            (("result", result),): cache[name] for result, name in _CACHE_RESULTS.items()
        },
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
        "ocp_extra_usage_in_use": {(): int(app.account.is_billed)},
        "ocp_extra_usage_spent": {} if budget.used is None else {currency: budget.used},
        "ocp_extra_usage_limit": {} if budget.limit is None else {currency: budget.limit},
        "ocp_logged_in": {} if logged_in is None else {(): int(logged_in)},
    }


def get_metrics(app: App, exchange: Exchange) -> None:
    """GET /metrics: return all metrics in Prometheus' text format."""
    text = app.metrics.text(_gauges(app))
    exchange.response.send_text(text, "text/plain; version=0.0.4; charset=utf-8")


# -- pages --------------------------------------------------------------------------------------


def get_root(app: App, exchange: Exchange) -> None:
    """GET /: lead a browser to the dashboard, and tell a program in three lines what is here."""
    if "text/html" in exchange.headers.get("Accept", ""):
        # Relative, because a reverse proxy may serve this server below a path.
        exchange.response.headers.update({"Location": "dashboard", "Vary": "Accept"})
        exchange.response.send_nothing(302)
        return
    exchange.response.headers["Vary"] = "Accept"
    exchange.response.send_text(
        "OCP: a Claude plan as an API, for OpenAI clients at /v1, for Anthropic clients here.\n"
        "State: /health. Every path: /openapi.json. For a browser: /dashboard.\n"
        "To set up this machine's tools: GET /connect returns a script for python3.\n",
        "text/plain; charset=utf-8",
    )


def get_dashboard(app: App, exchange: Exchange) -> None:
    """GET /dashboard: return the operator's page, which fetches its data with the admin key."""
    page = dashboard_page()
    exchange.response.headers.update(page.headers)
    if exchange.headers.get("If-None-Match") == page.headers["ETag"]:
        exchange.response.send_nothing(304)
        return
    exchange.response.send_text(page.html, "text/html; charset=utf-8")


#: The script that sets up clients; the server also works without this file.
CONNECT_SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ocp_connect.py")


def get_connect(app: App, exchange: Exchange) -> None:
    """GET /connect: return ocp_connect.py, to be piped into python3 on a client."""
    try:
        with open(CONNECT_SCRIPT, encoding="utf-8") as file:
            script = file.read()
    except (OSError, UnicodeDecodeError):
        raise NotFound(
            "There is no ocp_connect.py beside this server's ocp_server.py. Copy it there, or "
            "copy it to the client and run: python3 ocp_connect.py HOST"
        ) from None
    exchange.response.headers["X-OCP-Version"] = VERSION
    exchange.response.send_text(script, "text/plain; charset=utf-8")


# -- the OpenAPI document ---------------------------------------------------------------------


def _object_type(required: Iterable[str], properties: Mapping[str, Json]) -> Json:
    return {"type": "object", "properties": dict(properties), "required": list(required)}


_TEXT: Json = {"type": "string"}
_NAME: Json = {"type": "string", "minLength": 1}
_FLAG: Json = {"type": ["boolean", "null"]}
_PART = _object_type(
    ["type", "text"], {"type": {"enum": ["text", "input_text"]}, "text": _NAME}
)
_CONTENT: Json = {"anyOf": [_NAME, {"type": "array", "minItems": 1, "items": _PART}]}
_MESSAGE = _object_type(["role", "content"], {
    "role": {"enum": ["system", "developer", "user", "assistant"]}, "content": _CONTENT,
})
_MESSAGES: Json = {"type": "array", "minItems": 1, "items": _MESSAGE}
_COUNT: Json = {"type": ["integer", "null"], "minimum": 1, "maximum": 1_000_000}

#: Schemas of the main fields of requests to models. _REFERENCES have the rest of them.
_REQUEST_FIELDS: dict[str, Json] = {
    "model": _NAME, "messages": _MESSAGES, "input": {"anyOf": [_NAME, _MESSAGES]},
    "prompt": _NAME, "system": _CONTENT, "instructions": {"type": ["string", "null"]},
    "max_tokens": _COUNT, "max_completion_tokens": _COUNT, "max_output_tokens": _COUNT,
    "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 2},
    "top_p": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
    "stop": {
        "anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": _TEXT, "maxItems": 4}]
    },
    "stop_sequences": {"type": ["array", "null"], "items": _TEXT},
    "n": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_CHOICES},
    "tools": {"type": ["array", "null"], "items": {"type": "object"}},
    "reasoning_effort": {"enum": [None, "none", *EFFORT_BUDGETS]},
    "response_format": {"type": ["object", "null"]},
    "service_tier": {"type": ["string", "null"]}, "speed": {"enum": [None, "fast", "standard"]},
    "stream": _FLAG, "store": _FLAG, "echo": _FLAG,
    "previous_response_id": {"type": ["string", "null"]},
    SESSION_FIELD: {"type": ["string", "null"], "maxLength": 256},
}
#: The required fields of requests to models, and the others, by operation.
_REQUESTS = {
    "answer_chat": (
        "messages", "model stream max_tokens max_completion_tokens temperature top_p stop n tools "
        f"reasoning_effort response_format service_tier {SESSION_FIELD}",
    ),
    "answer_messages": (
        "messages max_tokens", "model system stream temperature top_p stop_sequences tools speed"
    ),
    "count_tokens": ("messages", "model system tools"),
    "answer_responses": (
        "input", "model instructions stream store max_output_tokens temperature top_p tools "
        "previous_response_id service_tier",
    ),
    "answer_compaction": ("input", "model instructions previous_response_id"),
    "count_input_tokens": ("input", "model instructions tools previous_response_id"),
    "answer_completions": ("prompt", "model stream max_tokens temperature top_p stop n echo"),
    "no_embeddings": ("input", "model"),
}
#: The references of the APIs, by the name of a route's dialect.
_REFERENCES = {
    CHAT.name: "https://platform.openai.com/docs/api-reference/chat",
    COMPLETIONS.name: "https://platform.openai.com/docs/api-reference/completions",
    RESPONSES.name: "https://platform.openai.com/docs/api-reference/responses",
    COMPACTION.name: "https://platform.openai.com/docs/api-reference/responses/compact",
    MESSAGES.name: "https://docs.anthropic.com/en/api/messages",
}


def _closed(properties: Mapping[str, Json]) -> Json:
    """Return the schema of an object without other fields than these."""
    return {**_object_type([], properties), "additionalProperties": False}


_KEY_PROPERTIES = {name: schema for name, _, _, schema in _KEY_FIELDS}
_QUOTA_BODY = _closed(dict.fromkeys(_QUOTA_NAMES, {
    "type": ["integer", "null"], "minimum": 0, "maximum": _MAX_QUOTA,
}))

#: Schemas of request bodies, by operation.
_BODIES: dict[str, Json] = {
    **{
        operation: _object_type(
            required.split(),
            {name: _REQUEST_FIELDS[name] for name in (*required.split(), *more.split())},
        )
        for operation, (required, more) in _REQUESTS.items()
    },
    "create_key": _closed({**_KEY_PROPERTIES, "quota": _QUOTA_BODY}),
    "change_key": _closed(_KEY_PROPERTIES),
    "rotate_key": _closed({"grace": {"type": ["string", "null"], "description": "24h, 90m, 7d"}}),
    "change_quota": {**_QUOTA_BODY, "minProperties": 1},
    "change_settings": _closed({
        name: {"type": [
            _JSON_TYPES[type(row.default)], *(["string"] if is_duration(row) else []), "null",
        ]}
        for name, row in live_settings().items()
    }),
}


def _up_to(maximum: int, minimum: int = 0) -> Json:
    return {"type": "integer", "minimum": minimum, "maximum": maximum}


#: Schemas of query parameters, by operation.
_QUERIES: dict[str, dict[str, Json]] = {
    "get_models": {"limit": _up_to(_MAX_PAGE), "after_id": _TEXT, "before_id": _TEXT},
    "get_logs": {
        "n": _up_to(_MAX_LOG_LINES), "level": {"enum": ["all", "audit", *LEVELS]},
        "key": _TEXT, "request": _TEXT, "since": {"type": "string", "format": "date-time"},
    },
    "get_errors": {
        "key": _TEXT, "request": _TEXT, "kind": _TEXT,
        "since": {"type": "string", "format": "date-time"}, "limit": _up_to(_MAX_FAILURES),
    },
    "get_response": {"stream": {"type": "boolean"}},
    "get_input_items": {
        "limit": _up_to(_MAX_ITEMS, 1), "order": {"enum": ["asc", "desc"]}, "after": _NAME,
    },
    "get_api_usage": {
        "since": {"type": "string", "format": "date-time"},
        "until": {"type": "string", "format": "date-time"},
        "hours": _up_to(_MAX_HOURS), "limit": _up_to(_MAX_RECENT), "all": {"type": "boolean"},
    },
}
#: Status codes of responses that are not in the error format, by operation; otherwise 200.
_STATUSES = {
    "create_key": ("201",), "change_settings": ("200", "207", "400"), "get_root": ("200", "302"),
}
#: Media types of responses, by operation; otherwise JSON.
_MEDIA_TYPES = {
    "get_metrics": "text/plain", "get_events": "text/event-stream", "get_dashboard": "text/html",
    "get_connect": "text/plain", "get_root": "text/plain",
}


def _operation(route: Route) -> Json:
    """Return the OpenAPI description of a route."""
    name = route.operation
    summary = " ".join((route.endpoint.__doc__ or "").split()).partition(". ")[0].rstrip(".") + "."
    parameters = [
        {"in": "path", "name": parameter, "required": True, "schema": _NAME}
        for parameter in re.findall(r"{(\w+)}", route.path)
    ]
    parameters += [
        {"in": "query", "name": parameter, "required": False, "schema": schema}
        for parameter, schema in _QUERIES.get(name, {}).items()
    ]
    media_type = _MEDIA_TYPES.get(name, "application/json")
    success: Json = {"description": "Done.", "content": {media_type: {"schema": {}}}}
    if "stream" in _BODIES.get(name, {}).get("properties", {}):
        success["content"]["text/event-stream"] = {"schema": {}}
    failure = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    operation: Json = {
        "operationId": name,
        "summary": summary,
        "parameters": parameters,
        "responses": {
            **dict.fromkeys(_STATUSES.get(name, ("200",)), success),
            "4XX": {"description": "The request cannot be answered.", "content": failure},
            "5XX": {"description": "The server or claude failed.", "content": failure},
        },
        "security": [] if route.access is Access.PUBLIC else [{"bearer": []}, {"x-api-key": []}],
        "tags": [route.access.value],
    }
    if name in _BODIES:
        body = {"application/json": {"schema": _BODIES[name]}}
        operation["requestBody"] = {"required": name != "rotate_key", "content": body}
    if name in _REQUESTS and route.dialect is not None:
        operation["externalDocs"] = {"url": _REFERENCES[route.dialect.name]}
    return operation


def openapi(routes: Iterable[Route]) -> Json:
    """Return the OpenAPI 3.1 document of these routes."""
    paths: Json = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    error = _object_type(["message", "type"], {"message": _TEXT, "type": _TEXT})
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "OCP",
            "version": VERSION,
            "description": "Your Claude plan, through the official claude program, as an API.",
        },
        "paths": paths,
        "components": {
            "schemas": {"Error": _object_type(["error"], {"error": error})},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def get_openapi(app: App, exchange: Exchange) -> None:
    """GET /openapi.json: return the OpenAPI document of this API."""
    exchange.response.send_json(openapi(exchange.routes))


# ==== 44. Table of routes ====================================================
# The paths of the server, who may call each, and the endpoint that answers.

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
    Route("GET",    "/v1/models",                Access.CALLER, None,        get_models),
    Route("GET",    "/v1/models/{model}",        Access.CALLER, None,        get_model),
    Route("GET",    "/sessions",                 Access.ADMIN,  CHAT,        get_sessions),
    Route("DELETE", "/sessions",                 Access.ADMIN,  CHAT,        clear_sessions),
    Route("DELETE", "/sessions/{id}",            Access.ADMIN,  CHAT,        clear_session),
    Route("GET",    "/api/keys",                 Access.ADMIN,  CHAT,        get_keys),
    Route("POST",   "/api/keys",                 Access.ADMIN,  CHAT,        create_key),
    Route("GET",    "/api/keys/{key}",           Access.ADMIN,  CHAT,        get_key),
    Route("PATCH",  "/api/keys/{key}",           Access.ADMIN,  CHAT,        change_key),
    Route("DELETE", "/api/keys/{key}",           Access.ADMIN,  CHAT,        revoke_key),
    Route("POST",   "/api/keys/{key}/rotate",    Access.ADMIN,  CHAT,        rotate_key),
    Route("DELETE", "/api/keys/{key}/grace",     Access.ADMIN,  CHAT,        end_grace),
    Route("GET",    "/api/keys/{key}/quota",     Access.ADMIN,  CHAT,        get_quota),
    Route("PATCH",  "/api/keys/{key}/quota",     Access.ADMIN,  CHAT,        change_quota),
    Route("GET",    "/api/usage",                Access.CALLER, CHAT,        get_api_usage),
    Route("GET",    "/api/errors",               Access.ADMIN,  CHAT,        get_errors),
    Route("GET",    "/api/events",               Access.ADMIN,  CHAT,        get_events),
    Route("GET",    "/usage",                    Access.ADMIN,  CHAT,        get_usage),
    Route("GET",    "/status",                   Access.ADMIN,  CHAT,        get_status),
    Route("GET",    "/settings",                 Access.ADMIN,  CHAT,        get_settings),
    Route("PATCH",  "/settings",                 Access.ADMIN,  CHAT,        change_settings),
    Route("GET",    "/cache/stats",              Access.ADMIN,  CHAT,        get_cache_stats),
    Route("DELETE", "/cache",                    Access.ADMIN,  CHAT,        clear_cache),
    Route("GET",    "/logs",                     Access.ADMIN,  CHAT,        get_logs),
    Route("GET",    "/metrics",                  Access.ADMIN,  CHAT,        get_metrics),
    Route("GET",    "/",                         Access.PUBLIC, CHAT,        get_root),
    Route("GET",    "/health",                   Access.PUBLIC, CHAT,        get_health),
    Route("GET",    "/ready",                    Access.PUBLIC, CHAT,        get_ready),
    Route("GET",    "/dashboard",                Access.PUBLIC, CHAT,        get_dashboard),
    Route("GET",    "/connect",                  Access.PUBLIC, CHAT,        get_connect),
    Route("GET",    "/openapi.json",             Access.PUBLIC, CHAT,        get_openapi),
)


# ==== 45. Demo claude ========================================================
# The stand-in for --demo: a process that speaks claude's protocol with canned answers, so that
# everything around the model can be tried without an account. Every answer says that it is a demo.
# The history of some made-up devices gives the dashboard something to show.

_DEMO_WORD_PAUSE_S = 0.03


class DemoClaude:
    """One demo process: it reads and writes the lines of claude's protocol."""

    def __init__(self, model_id: str, write: Callable[[bytes], object]) -> None:
        self._model_id = model_id
        self._write = write
        self._max_tokens = 10**9
        self._limit = UNREACHED_LIMIT

    def read(self, line: Json) -> None:
        """Answer one line of input."""
        if line.get("type") == "control_request":
            settings = line.get("request", {}).get("settings", {})
            limit = settings.get("env", {}).get("CLAUDE_CODE_MAX_OUTPUT_TOKENS")
            self._max_tokens = int(limit) if limit else self._max_tokens
            self._limit = settings.get("env", {}).get(BLOCKING_LIMIT, self._limit)
            response = {"subtype": "success", "request_id": line.get("request_id")}
            # The demo keeps no conversation, so every rewind succeeds.
            self._print("control_response", response={**response, "response": {"rewound": True}})
        elif line.get("type") == "user" and line.get("shouldQuery") is False:
            self._print_result(num_turns=0)
        elif line.get("type") == "user" and self._limit != UNREACHED_LIMIT:
            self._print("result", is_error=True, terminal_reason="blocking_limit")
        elif line.get("type") == "user":
            self._answer(line.get("message", {}).get("content"))

    def _answer(self, content: object) -> None:
        blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
        prompt = " ".join(str(block.get("text", "")) for block in blocks if "text" in block)
        reply = (
            "This is the demo of OCP: no model was asked and no account is used. "
            f"You wrote: {one_line(prompt, 200)}"
        )
        words = re.findall(r"\S+\s*", reply)
        sent = words[: self._max_tokens]
        usage = {"input_tokens": len(prompt.split()), "output_tokens": len(sent)}
        message = {"id": new_id("msg_"), "model": self._model_id, "usage": usage}
        self._print_event("message_start", message=message)
        empty = {"type": "text", "text": ""}
        self._print_event("content_block_start", index=0, content_block=empty)
        for word in sent:
            time.sleep(_DEMO_WORD_PAUSE_S)
            delta = {"type": "text_delta", "text": word}
            self._print_event("content_block_delta", index=0, delta=delta)
        self._print_event("content_block_stop", index=0)
        reason = "end_turn" if len(sent) == len(words) else "max_tokens"
        self._print_event("message_delta", delta={"stop_reason": reason}, usage=usage)
        self._print_event("message_stop")
        self._print_result(num_turns=1)

    def _print_result(self, num_turns: int) -> None:
        self._print("result", subtype="success", is_error=False, num_turns=num_turns)

    def _print_event(self, kind: str, **fields: object) -> None:
        self._print("stream_event", event={"type": kind, **fields})

    def _print(self, kind: str, **fields: object) -> None:
        self._write(to_json({"type": kind, **fields}) + b"\n")


class DemoDevice(NamedTuple):
    """A made-up device: its key, and how it uses the server."""

    name: str
    note: str
    dialect: Dialect
    #: What it asks for, from often to seldom.
    models: tuple[str, ...]
    requests_per_day: int
    #: The hours of the day in which it asks.
    hours: range
    prompt_tokens: int
    answer_tokens: int
    peer: str
    quota: Mapping[str, int] = MappingProxyType({})


_DEMO_DEVICES = (
    DemoDevice("laptop", "Codex and an editor", RESPONSES, ("sonnet", "opus"), 34, range(8, 19),
               24_000, 700, "192.168.1.20"),
    DemoDevice("desktop", "Claude Code", MESSAGES, ("opus", "sonnet", "haiku"), 26, range(9, 23),
               38_000, 900, "192.168.1.21"),
    DemoDevice("kitchen tablet", "chat in a browser", CHAT, ("haiku", "sonnet"), 9, range(7, 22),
               900, 350, "192.168.1.34", {"daily": 40}),
    DemoDevice("night jobs", "summaries of news", CHAT, ("haiku",), 12, range(2, 5), 6_000, 450,
               "127.0.0.1", {"tokensDaily": 400_000}),
)
_DEMO_DAYS = 30
#: What became of requests: status, outcome, message, and how many of a thousand.
_DEMO_OUTCOMES = (
    (200, "ok", None, 962), (499, "abandoned", None, 12),
    (529, "overloaded", "The API is overloaded (made up by the demo).", 10),
    (504, "timeout", "No answer within 600 s (made up by the demo).", 6),
    (502, "upstream_failed", "claude ended without an answer (made up by the demo).", 5),
    (400, "context_length_exceeded", "prompt is too long (made up by the demo).", 5),
)
#: How answers came about, and how many of a hundred.
_DEMO_PATHS = {"continued": 58, "fresh": 22, "rewound": 8, "rebuilt": 7, "cached": 5}


def _demo_row(
    device: DemoDevice, key: Key, at_s: float, models: Models, chance: random.Random
) -> UsageRow:
    """Return the row of one made-up request."""
    weights = [float(each[-1]) for each in _DEMO_OUTCOMES]
    ((status, outcome, message, _),) = chance.choices(_DEMO_OUTCOMES, weights)
    (path,) = chance.choices(list(_DEMO_PATHS), list(_DEMO_PATHS.values()))
    # The first model is asked for twice as often as the second one, and so on.
    weights = [2.0 ** -rank for rank in range(len(device.models))]
    model = models.find(chance.choices(device.models, weights)[0]).id
    prompt = round(device.prompt_tokens * chance.lognormvariate(0, 0.6))
    answer = round(device.answer_tokens * chance.lognormvariate(0, 0.6)) if status == 200 else 0
    is_asked = status in (200, 499) and path != "cached"
    cached = round(prompt * 0.85) if path == "continued" else 0
    first_ms = 40 if path == "cached" else round(700 * chance.lognormvariate(0, 0.4))
    return UsageRow(
        at_s, new_id("req_"), key.id, key.name, model, device.dialect.name, outcome, status,
        counted=int(is_asked), stop_reason="end_turn" if status == 200 else None, stream=True,
        warm=path != "rebuilt", path=path if status in (200, 499) else None,
        prompt_chars=prompt * 4, response_chars=answer * 4,
        input_tokens=prompt - cached if is_asked else 0, output_tokens=answer if is_asked else 0,
        cache_read_tokens=cached if is_asked else 0, cache_write_tokens=0,
        first_token_ms=first_ms if status == 200 and path != "cached" else None,
        total_ms=first_ms if path == "cached" else first_ms + answer * 12, message=message,
        peer=device.peer,
    )


def _demo_times(device: DemoDevice, now_s: float, chance: random.Random) -> list[float]:
    """Return when a device asked in the last days; fewer times at weekends."""
    times = []
    for days_ago in range(_DEMO_DAYS):
        day = datetime.datetime.fromtimestamp(now_s - days_ago * 86_400).replace(
            hour=0, minute=0, second=0, microsecond=0
        )
        share = chance.uniform(0.5, 1.3) * (0.4 if day.weekday() >= 5 else 1.0)
        times += [
            day.timestamp() + chance.choice(device.hours) * 3600 + chance.uniform(0, 3600)
            for _ in range(round(device.requests_per_day * share))
        ]
    return sorted(at_s for at_s in times if at_s < now_s)


def _demo_plan(now_s: float) -> PlanReport:
    """Return a made-up report about the plan."""
    windows = {
        "five_hour": PlanWindow(0.38, now_s + 2.2 * 3600, "allowed"),
        "seven_day": PlanWindow(0.61, now_s + 3.4 * 86_400, "allowed"),
        "seven_day_opus": PlanWindow(0.24, now_s + 3.4 * 86_400, "allowed"),
    }
    return PlanReport(
        windows, status="allowed", claim="five_hour", resets_at_s=now_s + 2.2 * 3600,
        subscription="max", is_overage=False,
    )


def fill_demo(app: App) -> None:
    """Fill the empty database of a demo with keys and usage, and report a login and a plan, so that
    the dashboard and the reports have something to show."""
    now_s, chance = time.time(), random.Random(1)
    rows: list[UsageRow] = []
    for device in _DEMO_DEVICES:
        times = _demo_times(device, now_s, chance)
        key, _ = app.keys.create(device.name, {
            "note": device.note, "quota": dict(device.quota), "used_s": int(times[-1]),
            "created_s": int(now_s - _DEMO_DAYS * 86_400),
        })
        rows += [_demo_row(device, key, at_s, app.models, chance) for at_s in times]
    rows.sort(key=lambda row: row.at_s)
    marks = ", ".join("?" * len(UsageRow._fields))
    with app.store.transaction() as connection:
        connection.executemany(
            f"INSERT INTO usage ({', '.join(UsageRow._fields)}) VALUES ({marks})", rows
        )
    app.account.set_login(True)
    app.account.update_plan(_demo_plan(now_s))


def demo_claude(arguments: list[str]) -> int:
    """Run the demo process, the `claude` of a server that was started with --demo."""
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


# ==== 46. Command line =======================================================
# Arguments, signals, the banner, and the order of start and shutdown.

_DEMO_FLAG = "--demo-claude"

#: Settings with an option of their own: the variable, and the placeholder and the help text of the
#: option.
_OPTIONS = {
    "--port": ("CLAUDE_PROXY_PORT", "N", "TCP port to listen on"),
    "--host": ("CLAUDE_BIND", "ADDR", "address to listen on; 0.0.0.0 = all"),
}


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ocp_server.py",
        description="Serves your Claude plan, through the official claude program, to tools "
        "that speak the OpenAI or the Anthropic API. Settings are environment variables, or lines "
        "NAME=VALUE in the file ocp.env of OCP_HOME (~/.ocp by default): see --print-settings.",
    )
    parser.add_argument(
        "--demo", action="store_true", help="answer from a stand-in, without an account"
    )
    parser.add_argument(
        "--check", action="store_true", help="validate settings and environment; exit 0 or 2"
    )
    parser.add_argument(
        "--print-settings", action="store_true",
        help="print the settings table as Markdown, and which settings are in use",
    )
    for option, (name, placeholder, text) in _OPTIONS.items():
        parser.add_argument(
            option, metavar=placeholder, help=f"{text}; overrides {name}", default=""
        )
    parser.add_argument("--version", action="version", version=f"ocp {VERSION}")
    return parser


def _is_this_machine(host: str) -> bool:
    """Return whether a name or an address belongs to this machine."""
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, _, _, address in addresses:
        # Binding succeeds only for an address of this machine.
        with contextlib.suppress(OSError), socket.socket(family, kind) as sock:
            sock.bind(address)
            return True
    return False


def check_no_loop(config: Config, environ: Mapping[str, str]) -> None:
    """Raise ConfigError if claude would send its API requests to this server."""
    url = child_environment(environ, config).get("ANTHROPIC_BASE_URL", "")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return
    if parts.hostname and port == config.port and _is_this_machine(parts.hostname):
        raise ConfigError(
            f"ANTHROPIC_BASE_URL={url}, which OCP_PASS_ENV passes to claude, leads back to this "
            "server: claude would send its requests here. Remove it from OCP_PASS_ENV."
        )


def _fail_start(problem: object) -> int:
    """Print why the server cannot start; return the exit code."""
    for line in str(problem).splitlines():
        print(f"ocp: {line}", file=sys.stderr)
    return 2


def environment_of(options: argparse.Namespace, environ: Mapping[str, str]) -> Environment:
    """Return the variables of a start with these options. Raises ConfigError.

    A demo reads no settings file, and has a folder of its own: it never touches real data."""
    given = {
        name: (getattr(options, option[2:]), option) for option, (name, *_) in _OPTIONS.items()
        if getattr(options, option[2:])
    }
    if not options.demo:
        return read_environment(environ, given)
    home = Config(home=environ.get("OCP_HOME", "").strip() or "~/.ocp").home_path
    given["OCP_HOME"] = (os.path.join(home, "demo"), "--demo")
    values = {name: value for name, (value, _) in given.items()}
    sources = {name: option for name, (_, option) in given.items()}
    return Environment({**environ, **values}, "", sources)


def advice_on_settings(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each variable that looks like a setting and has no effect."""
    for name, why in removed_settings(environ):
        yield f"{name} has no effect: {why}"
    for name, meant in unknown_settings(environ):
        yield f"{name} is not a setting." + (f" Did you mean {meant}?" if meant else "")


def print_settings_in_use(config: Config, environment: Environment) -> None:
    """Print the settings that are not the default, as Markdown, and which have no effect."""
    found = settings_in_use(config, environment)
    print("\nIn use here:\n" if found else "\nAll have their defaults here.")
    for name, value, source in found:
        print(f"- `{name}={printable(value)}` from {source}")
    for sentence in advice_on_settings(environment.variables):
        print(f"\nATTENTION: {sentence}")


def _login_words(program: ClaudeProgram, environ: Mapping[str, str]) -> str:
    """Return what is known of the login of claude. Nothing is asked of the API."""
    with tempfile.TemporaryDirectory(prefix="ocp-check-") as folder:
        state = program.login_state(folder_variables(folder, environ))
        if not state and sys.platform == "darwin":
            # The keychain may give the login only to the owner's own folder.
            state = program.login_state({}) or state
    return {
        True: "logged in", False: "not logged in: run `claude auth login` as this user",
        None: "not known yet: the first answer tells",
    }[state]


#: What to do when the server cannot listen, by the number of the error.
_LISTEN_ADVICE = {
    errno.EADDRINUSE:
        "Is OCP running already? --port N, or CLAUDE_PROXY_PORT, sets another port; `ocp doctor` "
        "names the program that has this one.",
    errno.EACCES:
        "Only root may use ports below 1024: --port N, or CLAUDE_PROXY_PORT, sets another port.",
}
_OTHER_LISTEN_ADVICE = (
    "--host ADDR, or CLAUDE_BIND, has to be an address of this machine: 127.0.0.1, or 0.0.0.0 for "
    "all of them.")


def _listen_failure(config: Config, problem: OSError) -> str:
    """Return what prevents the server from listening, and what to do."""
    return (
        f"cannot listen on {config.bind} port {config.port}: {problem.strerror}. "
        f"{_LISTEN_ADVICE.get(problem.errno or 0, _OTHER_LISTEN_ADVICE)}"
    )


def _check_address(config: Config) -> str:
    """Return what would prevent the server from listening. A port in use is fine: OCP may run."""
    family = socket.AF_INET6 if ":" in config.bind else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((config.bind, config.port))
    except OSError as problem:
        return "" if problem.errno == errno.EADDRINUSE else _listen_failure(config, problem)
    return ""


def check(config: Config, environment: Environment, demo_command: tuple[str, ...]) -> int:
    """Print what a start would use; return the exit code: 0 = it would work, 2 = it would not."""
    environ = environment.variables
    print(f"ocp {VERSION}, Python {sys.version.split()[0]}")
    print(f"listens on {config.bind} port {config.port}, access mode {config.mode}")
    print(f"writes its log to {os.path.join(config.home_path, 'logs')}")
    if environment.file:
        print(f"reads settings from {environment.file}")
    if config.tls_cert:
        print(f"serves https with {config.tls_cert}")
    for name, value, source in settings_in_use(config, environment):
        print(f"{name}={printable(value)} (from {source})")
    for sentence in advice_on_settings(environ):
        print(f"ATTENTION: {sentence}")
    unusable = _check_address(config)
    if unusable:
        return _fail_start(unusable)
    program = ClaudeProgram(config, environ, demo_command)
    try:
        found = program.resolve()
    except OcpError as error:
        return _fail_start(error.message)
    print(f"uses claude {found.version_text}: {' '.join(found.command)}")
    login = "none needed" if demo_command else _login_words(program, environ)
    print(f"login: {login}")
    print("all good, but for the login" if login.startswith("not logged in") else "all good")
    return 0


def _try_it(app: App) -> str:
    """Return a command that gets an answer, in the shell of this user; empty if there is none."""
    if app.program.last_result()[1] is not None:
        return ""
    words = ["curl"]
    if app.config.tls_cert:
        # The certificate seldom names the address of loopback.
        words.append("--insecure")
    if app.config.mode != "none":
        path = app.state_folder.path_of("admin-key")
        if not app.state_folder.has_admin_key_file:
            return ""
        words.append(f'-H "Authorization: Bearer $(cat {shlex.quote(path)})"')
    body = '{"messages": [{"role": "user", "content": "Hello"}]}'
    url = f"{app.address.local_url}/v1/chat/completions"
    return " ".join([*words, url, "-d", shlex.quote(body)])


def _addresses(app: App) -> Iterator[str]:
    """Yield the lines of the banner that say where the server is reached."""
    url, reason = app.address.for_devices()
    if url or not is_loopback(app.address.host):
        yield f"Other devices: {url}/v1" if url else f"Other devices: {reason}"
    key = ""
    if app.config.mode != "none":
        path = app.state_folder.path_of("admin-key")
        key = f", with the key in {path}" if app.state_folder.has_admin_key_file else (
            ", with OCP_ADMIN_KEY")
    yield f"Dashboard: {app.address.local_url}/dashboard{key}"


def _banner(server: Server) -> str:
    app = server.app
    problem = app.program.last_result()[1]
    lines = [f"OCP {VERSION} serves {server.url}/v1", *_addresses(app)]
    if app.demo:
        lines.append(
            "DEMO: answers, plan and history are made up; no account, no model and none of your "
            "data is used"
        )
    if app.config.is_agent:
        lines.append("AGENT MODE: claude uses its own tools on this machine")
    if app.config.is_usable_without_key:
        remedy = "PROXY_API_KEY" if app.config.mode == "none" else "PROXY_ADVERTISE_ANON_KEY=0"
        lines.append(f"ATTENTION: anyone who can connect can use your plan; set {remedy}")
    advice = app.state_folder.status[1]
    if advice and not app.demo:
        lines.append(f"ATTENTION: {advice}")
    if problem is not None:
        lines.append(f"ATTENTION: {problem.message}")
    command = _try_it(app)
    return "\n".join([*lines, *(["Try it:", f"  {command}"] if command else [])])


#: M_MMAP_THRESHOLD of glibc's malloc.h, and the size from which blocks are mapped by themselves.
_M_MMAP_THRESHOLD, _MAPPED_BYTES = -3, 1_048_576


def return_large_blocks() -> None:
    """Let the memory of large bodies go back to the system as soon as they are done.

    glibc raises the threshold by itself, up to 32 MB, and then keeps blocks below it in arenas
    that do not shrink. Does nothing with other C libraries, or in a Python without ctypes."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import ctypes

        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def raise_descriptor_limit(config: Config) -> None:
    """Raise the limit of open files to the need of full load, if the system permits it."""
    needed = 2 * config.max_connections + 8 * config.max_concurrent + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def serve(app: App, tls: ssl.SSLContext | None) -> int:
    """Serve until a signal stops the server; return the exit code."""
    raise_descriptor_limit(app.config)
    return_large_blocks()
    try:
        server = Server(app, ROUTES, tls)
    except OSError as problem:
        app.close()
        print(f"ocp: {_listen_failure(app.config, problem)}", file=sys.stderr)
        return 1
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # A signal that is ignored already, by nohup for example, stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: app.wakeups.put("stop"))
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    app.look()
    with contextlib.suppress(OSError):
        # The output may be a file on a full disk.
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


def _models_of(config: Config, folder: str) -> Models:
    """Return the models of `folder`, to which App gives the operator's aliases. Raises ConfigError,
    also for an alias and a default model that do not exist."""
    models = load_models(folder)
    try:
        models.check_aliases(config.model_aliases)
        models.with_aliases(config.model_aliases).find(config.default_model)
    except ValueError as problem:
        raise ConfigError(f"OCP_MODEL_ALIASES: {problem}") from None
    except UnknownModel as problem:
        raise ConfigError(f"OCP_DEFAULT_MODEL: {problem.message}") from None
    return models


def main(arguments: list[str], environ: Mapping[str, str]) -> int:
    """Run the program; return the exit code: 0 = success, 1 = the port or the state folder is in
    use, 2 = wrong settings."""
    if arguments[:1] == [_DEMO_FLAG]:
        return demo_claude(arguments)
    options = argument_parser().parse_args(arguments)
    if options.print_settings:
        print(settings_markdown())
    here = os.path.abspath(__file__)
    demo_command = (sys.executable, "-I", "-S", here, _DEMO_FLAG) if options.demo else ()
    environment = Environment({}, "", {})
    try:
        environment = environment_of(options, environ)
        environ = environment.variables
        config = load_config(environ, machine_memory_bytes())
        models = _models_of(config, os.path.dirname(here))
        check_no_loop(config, environ)
        tls = tls_context(config)
        if options.print_settings:
            print_settings_in_use(config, environment)
            return 0
    except ConfigError as problem:
        hint = f"\nSettings were read from {environment.file} too." if environment.file else ""
        return _fail_start(f"{problem}{hint}")
    if options.check:
        return check(config, environment, demo_command)
    log = Log(sys.stderr, config.log_level)
    for name, why in removed_settings(environ):
        log.event("warn", "setting_removed", setting=name, why=why)
    for name, meant in unknown_settings(environ):
        log.event("warn", "setting_unknown", setting=name, did_you_mean=meant or None)
    try:
        app = App(config, environ=environ, log=log, models=models, demo_command=demo_command)
    except HomeInUse as problem:
        print(f"ocp: {problem}", file=sys.stderr)
        return 1
    if app.demo:
        fill_demo(app)
    return serve(app, tls)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
