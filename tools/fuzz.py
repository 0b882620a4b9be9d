"""Sends a server thousands of broken and odd requests, and says what it did wrong.

    python3 tools/fuzz.py [--seed N] [--requests 5000] [--only NUMBER]

The server runs on the fake claude, in mode multi with the cache on. Every other request puts a
value of some type into some field of some route's body, until each had each; all others are thrown
by dice, and come with the admin key, with a user's key, with wrong ones and with none. The n-th
request of a seed is always the same one, but for keys and ids: --only sends one of them alone and
shows what came back.

Wanted of the server: no 500, nothing broken in its log, an answer or a closed connection for
whatever comes, answers that can be parsed, no processes, threads, descriptors or memory that stay,
and a normal answer in the end.

Index: 1 odd values   2 bodies   3 requests   4 answers   5 sending   6 the server   7 program
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kit"))

import http_client  # noqa: E402
from project import read_json_lines  # noqa: E402
from server import Server, running_server  # noqa: E402

Json = Any

#: No connection may last longer without being answered or closed.
PATIENCE_S = 60.0
WORKERS = 6
#: How long a server gets to come to rest.
REST_S = 60.0
#: What memory may grow by in the last quarter of a run. Bounded memories, such as the log's events
#: and SQLite's pages, are full after 9,000 requests, so a long run needs 12,000.
MOST_GROWTH_BYTES = 2_500_000
#: After so many requests, what they may have set or revoked is put right again.
MEND_EVERY = 250
#: The last user message of a conversation is what the fake claude answers with.
GREETING = "hello"

SETTINGS = {
    "CLAUDE_AUTH_MODE": "multi", "OCP_WRONG_KEY_DELAY": "0",
    "CLAUDE_CACHE_TTL": "600000", "OCP_CACHE_MAX_BYTES": "262144",
    "CLAUDE_MAX_BODY_SIZE": "300000", "OCP_HEADER_TIMEOUT": "1500", "OCP_BODY_TIMEOUT": "1500",
    "CLAUDE_MAX_QUEUE": "64", "CLAUDE_SESSION_TTL": "5000", "CLAUDE_TIMEOUT": "15000",
    "OCP_DRAIN": "2000", "MALLOC_ARENA_MAX": "1",
}


class Flaw(Exception):
    """Something that the server must not do; the message says what."""


# ---------------------------------------------------------------------------
# 1 Odd values
# ---------------------------------------------------------------------------

class Raw(str):
    """A piece of JSON text as it is, right or wrong."""


class Pairs(list):  # type: ignore[type-arg]
    """An object as a list of names and values, of which several may have one name."""


def nested(depth: int, inner: str = "1") -> Raw:
    """Arrays in arrays."""
    return Raw("[" * depth + inner + "]" * depth)


def nested_objects(depth: int) -> Raw:
    """Objects in objects."""
    return Raw('{"a":' * depth + "1" + "}" * depth)


ODD: Sequence[Json] = (
    None, True, False, 0, 1, -1, 2, 8, 3.5, -0.0, 1e308, 10**15, 10**18, -(10**30),
    Raw("1e400"), Raw("-1e400"), Raw("1E-400"), Raw("9" * 399), Raw("9" * 5000),
    Raw("0." + "1" * 3000), Raw("NaN"), Raw("-Infinity"), Raw("1."), Raw("01"), Raw("'a'"),
    "", " ", "\n", "a", "0", "true", "null", "\x00", "\x7f", "\x85", "\u2028", "\ufeff", "\uffff",
    "\U0010ffff", "\u202e", "e\u0301" * 50, Raw('"\\ud800"'), Raw('"\\udc00\\ud800"'),
    Raw('"\\ud83d\\ude00"'), Raw('"\\u0000"'), Raw('"\\x"'), Raw('"\t"'), Raw('"a'),
    "x" * 20_000, "../../etc/passwd", "@/etc/passwd", "/clear", "<script>", "'; DROP TABLE keys;",
    "data:image/png;base64,iVBORw0KGgo=", "data:,", "data:image/png;base64,", "http://[::1",
    "file:///etc/passwd", "sonnet", "claude-nobody-1", "2027-01-31", "0000-00-00", "999999d",
    "9999-12-31T23:59:59.999999999+23:59", "0001-01-01T00:00:00Z", "-1d", "admin", "fuzz-user",
    [], {}, [[]], [{}], [None], [1], ["a"], [""], {"a": 1}, {"": ""}, {"type": "text"},
    {"type": "text", "text": None}, {"role": "user"}, {"type": "function"}, {"$ref": "#"},
    Pairs([("type", "text"), ("type", 1), ("text", "a"), ("text", "b")]),
    nested(50), nested(600), nested(985), nested(5000), nested_objects(100), nested_objects(900),
    Raw("[" * 20_000), Raw(""), Raw(","), Raw("}"),
)


def any_text(dice: random.Random, most: int = 30) -> str:
    """Characters from all of Unicode, surrogates and those that are none included."""
    ranges = ((0, 0x20), (0x20, 0x7f), (0x80, 0x250), (0x2000, 0x2070), (0xd800, 0xe000),
              (0xfdd0, 0x10000), (0x1f300, 0x1f700), (0, 0x110000))
    count = dice.randrange(most)
    return "".join(chr(dice.randrange(*dice.choice(ranges))) for _ in range(count))


def odd_value(dice: random.Random) -> Json:
    if dice.random() < 0.25:
        return any_text(dice)
    if dice.random() < 0.05:
        # About where what can just be read can no longer be written.
        return nested(dice.randrange(930, 1000))
    return copied(dice.choice(ODD))


def copied(value: Json) -> Json:
    """A copy in which everything can be changed."""
    if isinstance(value, Pairs):
        return Pairs((name, copied(each)) for name, each in value)
    if isinstance(value, dict):
        return {name: copied(each) for name, each in value.items()}
    return [copied(each) for each in value] if isinstance(value, list) else value


def encode(value: Json, *, ascii_only: bool) -> str:
    """JSON text, with whatever Raw and Pairs put into it."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, (dict, Pairs)):
        pairs = value.items() if isinstance(value, dict) else value
        fields = (f"{json.dumps(str(name), ensure_ascii=ascii_only)}:"
                  f"{encode(each, ascii_only=ascii_only)}" for name, each in pairs)
        return "{" + ",".join(fields) + "}"
    if isinstance(value, list):
        return "[" + ",".join(encode(each, ascii_only=ascii_only) for each in value) + "]"
    return json.dumps(value, ensure_ascii=ascii_only)


# ---------------------------------------------------------------------------
# 2 Bodies
# ---------------------------------------------------------------------------

PNG = "data:image/png;base64,iVBORw0KGgo="
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "d", "parameters": SCHEMA, "strict": True}
CALL = {"id": "call1", "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}

CHAT_FULL = {
    "model": "sonnet", "stream": False, "n": 1, "max_tokens": 100, "max_completion_tokens": 100,
    "temperature": 0.5, "top_p": 0.9, "stop": ["END"], "reasoning_effort": "low", "user": "u",
    "seed": 1, "logprobs": False, "top_logprobs": 0, "frequency_penalty": 0.1, "store": True,
    "metadata": {"a": "b"}, "logit_bias": {}, "modalities": ["text"], "parallel_tool_calls": True,
    "stream_options": {"include_usage": True}, "response_format": {"type": "text"},
    "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "auto",
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "name": "me", "content": [
            {"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": PNG}}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call1", "content": "rain"},
        {"role": "user", "content": GREETING},
    ],
}
CHAT_SHAPED = {
    "messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": GREETING}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
}
CHAT_SESSION = {
    "model": "haiku", "ocp_session_id": "fuzz-session", "stream": True,
    "messages": [{"role": "user", "content": GREETING}],
}
CHAT_LEGACY = {
    "functions": [FUNCTION], "function_call": "auto",
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "function_call": CALL["function"]},
        {"role": "function", "name": "weather", "content": "rain"},
    ],
}
MESSAGES_FULL = {
    "model": "claude-sonnet-4-6", "max_tokens": 100, "stream": False, "temperature": 0.5,
    "top_p": 0.9, "top_k": 5, "stop_sequences": ["END"], "metadata": {"user_id": "u"},
    "system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "tools": [{"name": "weather", "description": "d", "input_schema": SCHEMA}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": False},
    "messages": [
        {"role": "user", "content": [
            {"type": "text", "text": "a"},
            {"type": "image", "source": {
                "type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}},
            {"type": "document", "source": {
                "type": "text", "media_type": "text/plain", "data": "b"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
            {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": False,
             "content": [{"type": "text", "text": "rain"}]},
            {"type": "text", "text": GREETING}]},
    ],
}
MESSAGES_PLAIN = {
    "max_tokens": 50, "stream": True, "output_config": {"effort": "low"}, "ocp_session_id": "fuzz",
    "messages": [{"role": "user", "content": GREETING}],
}
RESPONSES_FULL = {
    "model": "sonnet", "instructions": "be brief", "stream": False, "store": True,
    "max_output_tokens": 100, "temperature": 0.5, "top_p": 0.9, "metadata": {"a": "b"},
    "parallel_tool_calls": True, "previous_response_id": None, "truncation": "disabled",
    "reasoning": {"effort": "low", "summary": "auto"}, "text": {"format": {"type": "text"}},
    "tools": [{"type": "function", **FUNCTION}], "tool_choice": "auto", "include": [],
    "background": False, "service_tier": "auto", "user": "u", "max_tool_calls": 1,
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "x"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "a"},
                                     {"type": "input_image", "image_url": PNG}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "reasoning", "summary": []},
        {"role": "user", "content": GREETING},
    ],
}
COMPLETIONS_FULL = {
    "model": "haiku", "prompt": GREETING, "suffix": "", "stream": False, "max_tokens": 50, "n": 1,
    "temperature": 0, "top_p": 1, "stop": "END", "echo": True, "logprobs": None, "best_of": 1,
    "stream_options": {"include_usage": True}, "seed": 1, "user": "u",
}
QUOTA = {"daily": 100_000, "weekly": None, "monthly": 100_000,
         "tokensDaily": None, "tokensWeekly": 10**9, "tokensMonthly": None,
         "usdDaily": 900.25, "usdWeekly": None, "usdMonthly": 1e5}
KEY = {"name": "phone", "expiry": "30d", "models": ["sonnet"], "maxConcurrent": 2, "note": "mine",
       "softPercent": 80, "modelQuotas": {"opus": QUOTA, "claude-haiku-5-5": {"usdDaily": 1.5}}}
#: Settings that leave the server as quick as it is.
LIVE = {"cacheTTL": 600_000, "cacheMaxBytes": 262_144, "maxQueue": 64, "heartbeatInterval": 15_000,
        "cacheSampled": True, "sessionId": False, "usageDays": 400, "writeTimeout": 60_000}

#: How a client begins that speaks TLS.
TLS_HELLO = b"\x16\x03"

TENANT: Json = {"level": "api", "prompt": "Be brief.", "instance": {"container": "box-1"}}
#: What a route takes, in one or several forms. A route that is not here takes no body.
BODIES: Mapping[tuple[str, str], Sequence[Json]] = {
    ("POST", "/v1/chat/completions"): (CHAT_FULL, CHAT_SHAPED, CHAT_SESSION, CHAT_LEGACY),
    ("POST", "/v1/messages"): (MESSAGES_FULL, MESSAGES_PLAIN),
    ("POST", "/v1/messages/count_tokens"): (MESSAGES_FULL,),
    ("POST", "/v1/responses"): (RESPONSES_FULL, {"input": GREETING, "stream": True}),
    ("POST", "/v1/responses/compact"): (RESPONSES_FULL, {"input": GREETING}),
    ("POST", "/v1/responses/input_tokens"): (RESPONSES_FULL, {"input": GREETING}),
    ("POST", "/v1/completions"): (COMPLETIONS_FULL, {"prompt": ["a", GREETING], "stream": True}),
    ("POST", "/v1/embeddings"): ({"model": "m", "input": "text"},),
    ("POST", "/api/keys"): ({**KEY, "quota": QUOTA},),
    ("PATCH", "/api/keys/{key}"): (KEY,),
    ("PUT", "/api/keys/{key}/login"): ({"token": "sk-ant-oat01-of-another-account"},),
    ("PUT", "/api/keys/{key}/tenant"): (TENANT,),
    ("PATCH", "/api/keys/{key}/tenant"): (TENANT,),
    ("PATCH", "/api/keys/{key}/tenant/env"): ({"SECRET": "value", "OLD": None},),
    ("PUT", "/api/keys/{key}/tenant/login"): ({"folder": True},),
    ("POST", "/api/keys/{key}/rotate"): ({"grace": "1h"},),
    ("PATCH", "/api/keys/{key}/quota"): (QUOTA,),
    ("PATCH", "/settings"): (LIVE,),
    ("POST", "/api/login/code"): ({"code": "code#state"},),
    ("POST", "/api/capture"): ({"requests": 2, "minutes": 1, "key": "laptop"},),
}


def places(value: Json, path: tuple[Json, ...] = ()) -> Iterator[tuple[Json, ...]]:
    """Where something stands in a body: every name and index, from the outside in."""
    if isinstance(value, (dict, list)) and not isinstance(value, Pairs):
        for name in value if isinstance(value, dict) else range(len(value)):
            yield (*path, name)
            yield from places(value[name], (*path, name))


def mutate(dice: random.Random, body: Json) -> Json:
    """The body with one thing in it changed."""
    found = list(places(body))
    if dice.random() < 0.4:
        found = [place for place in found if len(place) == 1]
    if not found or dice.random() < 0.02:
        return odd_value(dice)
    *outer, name = dice.choice(found)
    holder = body
    for part in outer:
        holder = holder[part]
    what = dice.random()
    if what < 0.72:
        holder[name] = odd_value(dice)
    elif what < 0.78:
        del holder[name]
    elif what < 0.83:
        holder[name] = [copied(holder[name]) for _ in range(dice.choice((1, 2, 50)))]
    elif what < 0.87:
        holder[name] = {any_text(dice, 5): holder[name]}
    elif what < 0.92 and isinstance(holder, dict):
        holder[dice.choice((str(name).upper(), any_text(dice, 8), "constructor"))] = odd_value(dice)
    elif outer and isinstance(holder, dict):
        twice = Pairs([*holder.items(), (name, odd_value(dice))])
        place = body
        for part in outer[:-1]:
            place = place[part]
        place[outer[-1]] = twice
    return body


def odd_body(dice: random.Random, template: Json) -> bytes:
    """A body that is close to what the route takes, or is not."""
    body = copied(template)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        if isinstance(body, (dict, list)) and not isinstance(body, Pairs):
            body = mutate(dice, body)
    text = encode(body, ascii_only=dice.random() < 0.5)
    data = text.encode("utf-8", "surrogatepass")
    what = dice.random()
    if what < 0.9:
        return data
    return dice.choice((
        lambda: data[:dice.randrange(len(data) + 1)],
        lambda: data + dice.choice((b"}", b"{}", b"\x00", b"garbage", b" \r\n")),
        lambda: b"\xef\xbb\xbf" + data,
        lambda: text.encode("utf-16", "surrogatepass"),
        lambda: flipped(dice, data),
        lambda: b"",
        lambda: dice.randbytes(dice.randrange(200)),
        lambda: b" " * dice.randrange(2000) + data,
    ))()


def flipped(dice: random.Random, data: bytes) -> bytes:
    """The data with a few bytes changed."""
    changed = bytearray(data or b"x")
    for _ in range(dice.randrange(1, 6)):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
    return bytes(changed)


# ---------------------------------------------------------------------------
# 3 Requests
# ---------------------------------------------------------------------------

class World(NamedTuple):
    """What requests may refer to."""

    #: (method, path template) of every route.
    routes: Sequence[tuple[str, str]]
    admin: str
    user: str
    #: A response that was stored.
    response_id: str
    #: The name of the user's key.
    user_name: str = "fuzz-user"


class Case(NamedTuple):
    """What is sent on one connection."""

    kind: str
    #: In the pieces in which it is sent.
    pieces: Sequence[bytes]
    #: The methods of its requests, as far as their ends are clear; each has to be answered.
    methods: Sequence[str] = ()
    #: Whether nothing but those answers may come back.
    exact: bool = False
    #: What comes after it: "read" waits for the answers, "shut" says that nothing more comes,
    #: "stall" says nothing, "leave" closes, "reset" cuts.
    #: A client that says so is gone for the server: its answer may break off.
    ending: str = "shut"
    #: The route of its only request; ("", "") = none, or unknown.
    route: tuple[str, str] = ("", "")

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)


class Sent(NamedTuple):
    """One request before it is bytes."""

    method: str
    target: bytes
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes
    route: tuple[str, str]

    def bytes(self, version: bytes = b"HTTP/1.1") -> bytes:
        lines = [b"%b %b %b" % (self.method.encode("utf-8", "replace"), self.target, version)]
        lines += [name + b": " + value for name, value in self.headers]
        return b"\r\n".join(lines) + b"\r\n\r\n" + self.body


#: Values for names in paths.
ODD_NAMES = ("0", "1", "2", "-1", "999999999999999", "9" * 30, "nobody", "fuzz user", "%00", "%ff",
             "%ED%A0%80", "%2F", "%2e%2e", "..", "%", "%zz", "%u0041", "a%20b", "%F0%9F%98%80",
             "'", "%27--", "*", "x" * 3000, "sonnet", "claude-x", "resp_0", "{id}", ";a=b", "a;b")
ODD_QUERIES = (
    "", "=", "&", "&&&=&", "n=1", "n=0", "n=-1", "n=1001", "n=%00", "n=1e3", "n=", "n=1&n=2",
    "level=all", "level=ERROR", "level=%ff", "level[]=warn", "hours=0", "hours=9600", "hours=9601",
    "limit=500", "limit=501", "limit=9999999999", "all=true", "all=1&limit=0", "all=maybe",
    "since=0", "since=99999999999", "since=99999999999.999", "since=-1", "since=1e5",
    "since=0001-01-01", "since=0001-01-01T00:00:00%2B23:59", "until=9999-12-31T23:59:59Z",
    "until=9999-12-31T23:59:59-23:59", "until=2026-02-30", "until=0&hours=9600", "since=nan",
    "until=2026-11-20T14:00:00 01:00", "since=%D9%A2%D9%A0%D9%A2%D9%A6-01-01", "since=" + "9" * 400,
    "until=0000-01-01", "a=" + "b" * 5000, "%", "%zz=%zz", "\xe9=\xff", "a=1;b=2", "?", "#x",
    "&".join(f"a{number}=1" for number in range(1500)),
)
ODD_HEADERS: Sequence[tuple[bytes, bytes]] = (
    (b"Host", b""), (b"Host", b"evil.example.org"), (b"Host", b"["), (b"Host", b"[::1]:99999"),
    (b"Host", b"localhost:port"), (b"Host", b"a" * 5000), (b"Host", b"\xff\xfe"),
    (b"Host", b"user@localhost"), (b"Host", b"localhost/path"), (b"Host", b"127.0.0.1:1, b"),
    (b"Origin", b"null"), (b"Origin", b"http://localhost"), (b"Origin", b"http://evil.example"),
    (b"Origin", b"\x80"), (b"Origin", b"//"), (b"Content-Type", b"text/plain"),
    (b"Content-Type", b""), (b"Content-Type", b"application/json; charset=utf-16"),
    (b"Content-Type", b"\xff/\xff"), (b"Content-Type", b"multipart/form-data; boundary="),
    (b"Content-Type", b"message/rfc822"), (b"Content-Type", b"multipart/mixed; boundary=x"),
    (b"Content-Encoding", b"gzip"), (b"Content-Encoding", b"identity"),
    (b"Content-Encoding", b"\x00"), (b"Expect", b"100-continue"), (b"Expect", b"200-ok"),
    (b"Connection", b"close"), (b"Connection", b"keep-alive, close"), (b"Connection", b"Upgrade"),
    (b"Upgrade", b"h2c"), (b"Upgrade", b"websocket"), (b"TE", b"trailers"),
    (b"Authorization", b""), (b"Authorization", b"Bearer"), (b"Authorization", b"Basic YTpi"),
    (b"Authorization", b"Bearer " + b"x" * 20_000), (b"Authorization", b"bearer \xff\x00"),
    (b"x-api-key", b"\xf0\x9f\x98\x80"), (b"Accept", b"text/event-stream"),
    (b"Accept", b"*/" * 999),
    (b"Accept-Encoding", b"gzip, br"), (b"Range", b"bytes=0-"), (b"If-None-Match", b"*"),
    (b"If-None-Match", b'W/"' + b"x" * 200 + b'"'), (b"Last-Event-ID", b"-1"),
    (b"Last-Event-ID", b"\xff"), (b"X-Session-Id", b"\xff\xfe"), (b"X-Session-Id", b"fuzz"),
    (b"X-Request-Id", b"a\tb"), (b"X-Forwarded-For", b"127.0.0.1"), (b"Forwarded", b"for=\x01"),
    (b"Cookie", b"a=b" * 2000), (b"anthropic-version", b"2023-06-01"), (b"anthropic-beta", b",,"),
    (b"Access-Control-Request-Method", b"POST"), (b"Access-Control-Request-Headers", b"\xff" * 99),
    (b"X-" + b"n" * 3000, b"1"), (b"X-Empty", b""), (b"X-Tab", b"\t\t"), (b"X-Eight", b"\x80\xff"),
    (b"X-Huge", b"h" * 70_000), (b"X-Nul", b"a\x00b"), (b"X-Vertical", b"a\x0bb\x0cc\x1cd\x85e"),
    (b"X Space", b"1"), (b"X-Name ", b"1"), (b"", b"no name"), (b"\xff", b"1"), (b"X-(", b"1"),
    (b"X-Fold", b"a\r\n b\r\n\tc"), (b"X-Fold", b"\r\n"), (b"X-Cr", b"a\rb"), (b"X-Lf", b"a\nb: c"),
    (b"From a@b Thu", b"1"), (b" Lead", b"1"), (b"No-Colon\r\nX", b"1"),
)


def key_headers(dice: random.Random, world: World, path: str) -> list[tuple[bytes, bytes]]:
    """The key of a request: mostly a good one, and the operator's where it has to be."""
    good = (35, 55) if path.startswith("/v1/") else (75, 15)
    key = dice.choices((world.admin, world.user, "ocp_" + "0" * 32, "\xff", ""),
                       (*good, 4, 2, 4))[0].encode("latin-1")
    if not key:
        return []
    scheme = dice.choice((b"Bearer ", b"Bearer ", b"bearer  ", b"BEARER "))
    named = (b"x-api-key", key) if dice.random() < 0.3 else (b"Authorization", scheme + key)
    return [named]


def filled(dice: random.Random, path: str, world: World) -> str:
    """A path with something for the names in it, mostly of things that there are."""
    def name_for(match: re.Match[str]) -> str:
        ids = (world.response_id,) if path.startswith("/v1/") else ("fuzz-session", "fuzz")
        there = {"key": (world.user_name, "1", "2"), "model": ("sonnet", "claude-sonnet-5"),
                 "id": ids}.get(match[1], ())
        return dice.choice(there if there and dice.random() < 0.6 else ODD_NAMES)

    return re.sub(r"{(\w+)}", name_for, path)


def request_for(
    dice: random.Random, world: World, route: Optional[tuple[str, str]] = None,
    body: Optional[Callable[[random.Random, Json], bytes]] = None,
) -> Sent:
    """A request for a route, any if none is named; its framing is right. `body` makes the body
    from one that the route takes."""
    method, path = route or dice.choice(world.routes)
    templates = BODIES.get((method, path), ())
    content = b""
    if templates:
        content = (body or plain_body)(dice, dice.choice(templates))
    elif dice.random() < 0.05:
        content = b"{}"
    headers = [(b"Host", b"localhost"), *key_headers(dice, world, path)]
    if content:
        headers += [(b"Content-Type", b"application/json")]
        headers += [(b"Content-Length", b"%d" % len(content))]
    target = filled(dice, path, world).encode("latin-1")
    return Sent(method, target.replace(b" ", b"%20"), headers, content, (method, path))


def plain_body(dice: random.Random, template: Json) -> bytes:
    return json.dumps(template).encode()


def one(kind: str, sent: Sent, dice: random.Random) -> Case:
    """A connection with one request whose end is clear."""
    return Case(kind, split(dice, sent.bytes()), [sent.method], True, "read", sent.route)


def split(dice: random.Random, data: bytes) -> list[bytes]:
    """The data in one piece, or in a few."""
    if dice.random() < 0.8 or len(data) < 4:
        return [data]
    cuts = sorted(dice.randrange(1, len(data)) for _ in range(dice.randrange(1, 5)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]


# -- kinds of cases ------------------------------------------------------------

def plain_case(dice: random.Random, world: World) -> Case:
    """What every client sends."""
    sent = request_for(dice, world)
    if sent.method == "GET" and dice.random() < 0.35:
        sent = sent._replace(method="HEAD")
    return one("plain", sent, dice)


def field_case(dice: random.Random, world: World, field: tuple[Json, ...]) -> Case:
    """One field with one value."""
    route, template, (*outer, name), value = field
    body = holder = copied(template)
    for part in outer:
        holder = holder[part]
    holder[name] = value
    content = encode(body, ascii_only=True).encode()
    sent = request_for(dice, world, route, lambda *_: content)
    keys = (b"Authorization", b"x-api-key")
    headers = [header for header in sent.headers if header[0] not in keys]
    key = (b"Authorization", b"Bearer " + world.admin.encode())
    return one("field", sent._replace(headers=[*headers, key]), dice)


def json_case(dice: random.Random, world: World) -> Case:
    """Odd JSON."""
    sent = request_for(dice, world, dice.choice(list(BODIES)), odd_body)
    return one("json", sent, dice)


def target_case(dice: random.Random, world: World) -> Case:
    """Odd paths, names, escapes and queries."""
    sent = request_for(dice, world)
    path = sent.target
    bend = dice.randrange(10)
    if bend < 5:
        path += b"?" + dice.choice(ODD_QUERIES).encode("latin-1").replace(b" ", b"%20")
    elif bend == 5:
        path = dice.choice((b"/v1", b"/v1/v1", b"//", b"/.", b"/../..")) + path
    elif bend == 6:
        path += dice.choice((b"/", b"//", b"/x", b";x=1", b"%20", b"%00", b"#f", b"\xff", b"?",))
    elif bend == 7:
        at = dice.randrange(len(path))
        path = path[:at] + b"%%%02X" % path[at] + path[at + 1:]
    elif bend == 8:
        path = b"/" + b"/".join(dice.choice(ODD_NAMES).encode().replace(b" ", b"+")
                                for _ in range(dice.randrange(4)))
    else:
        path = dice.choice((b"http://localhost" + path, b"http://[::1" + path, b"*", b"//evil/x",
                            b"http://" + b"a" * 300, b"localhost:80", b"/" + b"a/" * 5000))
    method = dice.choice((sent.method,) * 6 + ("HEAD", "OPTIONS", "PUT", "GET", "DELETE", "POST"))
    route = sent.route if method == sent.method else ("", "")
    return one("target", sent._replace(method=method, target=path, route=route), dice)


def headers_case(dice: random.Random, world: World) -> Case:
    """Odd headers, beside the right ones or instead of them."""
    sent = request_for(dice, world)
    headers = list(sent.headers)
    for _ in range(dice.randrange(1, 5)):
        name, value = dice.choice(ODD_HEADERS)
        named = [at for at, header in enumerate(headers) if header[0].lower() == name.lower()]
        if named and dice.random() < 0.7:
            headers[named[0]] = (name, value)
        else:
            headers.insert(dice.randrange(len(headers) + 1), (name, value))
    if dice.random() < 0.03:
        headers += [(b"X-Many-%d" % number, b"1") for number in range(150)]
    data = sent._replace(headers=headers).bytes()
    ending = dice.choice(("read", "read", "read", "shut"))
    return Case("headers", split(dice, data), [sent.method], False, ending, sent.route)


def framing_case(dice: random.Random, world: World) -> Case:
    """Lengths and chunks that are wrong, or right and unusual."""
    sent = request_for(dice, world, dice.choice(list(BODIES)))
    if dice.random() < 0.25:
        return one("framing", in_chunks(dice, sent), dice)
    length = len(sent.body)
    headers = [header for header in sent.headers if header[0] != b"Content-Length"]
    if dice.random() < 0.5:
        true = b"%d" % length
        values = (b"%d" % (length + 1), b"%d" % max(0, length - 1), b"-1", b"+" + true, b"", b"0",
                  true + b", " + true, b"0x10", b"1e2", b"\xd9\xa1", b" " + true + b" ",
                  b"9" * 15, b"9" * 16, b"999999999", true + b"\x0b")
        headers += [(b"Content-Length", dice.choice(values))]
        if dice.random() < 0.2:
            headers += [(b"content-length", dice.choice(values))]
        if dice.random() < 0.2:
            headers += [(b"Transfer-Encoding", dice.choice((b"chunked", b"identity", b"")))]
        data = sent._replace(headers=headers).bytes()
        return Case("framing", split(dice, data), route=sent.route)
    codings = (b"chunked",) * 8 + (b"Chunked", b"gzip, chunked", b"chunked, chunked",
                                   b"chunked;q=1", b"identity", b"\x0bchunked", b"xchunked")
    headers += [(b"Transfer-Encoding", dice.choice(codings))]
    body = chunked(dice, sent.body)
    data = sent._replace(headers=headers, body=body).bytes()
    return Case("framing", split(dice, data), route=sent.route)


def in_chunks(dice: random.Random, sent: Sent) -> Sent:
    """The request with its body in chunks, as they may be."""
    headers = [header for header in sent.headers if header[0] != b"Content-Length"]
    endings = (b"", b";a=b", b" ; a", b";" + b"e" * 300)
    framed = b"".join(b"%x%b\r\n%b\r\n" % (len(part), dice.choice(endings), part)
                      for part in split(dice, sent.body) if part)
    framed += b"0\r\n" + dice.choice((b"", b"Trailer: t\r\n")) + b"\r\n"
    return sent._replace(headers=[*headers, (b"Transfer-Encoding", b"chunked")], body=framed)


def chunked(dice: random.Random, body: bytes) -> bytes:
    """A body in chunks, and now and then something that is no chunk."""
    parts = split(dice, body)
    framed = b""
    for part in (part for part in parts if part):
        size = b"%x" % len(part)
        if dice.random() < 0.15:
            size = dice.choice((b"0" + size, size.upper(), size + b";a=b", size + b" ", b" " + size,
                                b"-1", b"", b"g", b"0x" + size, b"ffffffff", b"fffffffff",
                                size + b";" + b"e" * 2000, b"\xd9\xa1"))
        framed += size + dice.choice((b"\r\n",) * 9 + (b"\n",)) + part
        framed += dice.choice((b"\r\n",) * 12 + (b"\n", b"", b"xx"))
    ends = (b"0\r\n\r\n",) * 8 + (b"0\r\nA: b\r\n\r\n", b"0\r\n", b"", b"000\r\n\r\n",
                                  b"0;x\r\n\r\n", b"0\r\n" + b"T: t\r\n" * 120 + b"\r\n",
                                  b"0\r\n\x00\r\n\r\n")
    return framed + dice.choice(ends)


def line_case(dice: random.Random, world: World) -> Case:
    """Odd request lines, versions and line ends."""
    sent = request_for(dice, world)
    method = dice.choice((sent.method, sent.method, sent.method.lower(), "", "G\xc9T", "X" * 3000,
                          "CONNECT", "TRACE", "PRI", "GET\t", "\x00", "HTTP/1.1", "OPTIONS"))
    version = dice.choice((b"HTTP/1.1",) * 3 + (
        b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.2", b"HTTP/1.1.1", b"HTTP/11", b"HTTP/-1.1",
        b"http/1.1", b"HTTP/1.\xb2", b"HTTP/1.1 x", b"", b"HTTP/", b"HTTP/99999999999.1",
        b"HTTP/1.1\x00", b"ICY"))
    data = sent._replace(method=method).bytes(version)
    bend = dice.randrange(8)
    if bend == 0:
        data = data.replace(b"\r\n", b"\n")
    elif bend == 1:
        data = data.replace(b"\r\n", b"\r")
    elif bend == 2:
        data = dice.choice((b"\r\n", b"\r\n\r\n", b"\n\n\n", b" ", b"\x00")) + data
    elif bend == 3:
        data = flipped(dice, data)
    elif bend == 4:
        data = data.replace(b" ", dice.choice((b"  ", b"\t", b"\x0b", b"\xa0")), 2)
    return Case("line", split(dice, data))


def pipeline_case(dice: random.Random, world: World) -> Case:
    """Several requests before the first answer."""
    requests = [request_for(dice, world) for _ in range(dice.randrange(2, 7))]
    # An answer that never ends keeps the rest waiting.
    requests = [sent for sent in requests if sent.target != b"/api/events"]
    data = b"".join(sent.bytes() for sent in requests)
    if dice.random() < 0.3:
        garbage = dice.choice((b"\r\n\r\n", b"x", dice.randbytes(50), b"GET / HTTP/1.1\r\n"))
        return Case("pipeline", split(dice, data + garbage))
    return Case("pipeline", split(dice, data), [sent.method for sent in requests], True, "read")


def half_case(dice: random.Random, world: World) -> Case:
    """A request that breaks off somewhere."""
    data = request_for(dice, world).bytes()
    body_at = data.index(b"\r\n\r\n") + 4
    in_body = body_at < len(data) and dice.random() < 0.5
    most = dice.randrange(body_at, len(data)) if in_body else dice.randrange(body_at)
    ending = dice.choices(("shut", "leave", "reset", "stall"), (8, 6, 6, 3))[0]
    return Case("half", split(dice, data[:most]), ending=ending)


def leaving_case(dice: random.Random, world: World) -> Case:
    """A client that asks and goes away."""
    sent = request_for(dice, world, dice.choice(list(BODIES)))
    return Case("leaving", split(dice, sent.bytes()), ending=dice.choice(("leave", "reset")))


def garbage_case(dice: random.Random, world: World) -> Case:
    """What is no HTTP at all."""
    data = dice.choice((
        b"", b"\r\n", b"\n" * 500, b"\x00" * 500, b" " * 70_000, b"A" * 70_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + dice.randbytes(100),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"SSH-2.0-x\r\n", b"GET", b"GET /\r\n\r\n",
        b"GET /health\r\n", b"HTTP/1.1 200 OK\r\n\r\n", dice.randbytes(dice.randrange(2000)),
        b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b" folded\r\n" * 3000 + b"\r\n",
    ))
    return Case("garbage", split(dice, data))


#: The kinds and how often each comes.
KINDS: Sequence[tuple[Callable[[random.Random, World], Case], int]] = (
    (json_case, 42), (target_case, 15), (headers_case, 13), (framing_case, 8), (plain_case, 8),
    (line_case, 5), (pipeline_case, 2), (half_case, 3), (leaving_case, 2), (garbage_case, 2),
)


#: A value of each type, as odd as it can be.
OF_EACH_TYPE: Sequence[Json] = (Raw("1e400"), Raw('"\\ud800"'), True, [], {})
#: Each field of each body with each of them: (route, body, where, value).
FIELDS = [(route, template, place, value) for route, templates in BODIES.items()
          for template in templates for place in places(template) for value in OF_EACH_TYPE]


def case_of(seed: int, number: int, world: World) -> Case:
    """The case of this number."""
    dice = random.Random(f"{seed}:{number}")
    # Every other one, so that a run is the same mixture all along.
    if number % 2 == 0 and number // 2 < len(FIELDS):
        return field_case(dice, world, FIELDS[number // 2])
    makers, weights = zip(*KINDS)
    case: Case = dice.choices(makers, weights)[0](dice, world)
    return case


# ---------------------------------------------------------------------------
# 4 Answers
# ---------------------------------------------------------------------------

class Reply(NamedTuple):
    status: int
    #: By their names in small letters.
    headers: Mapping[str, str]
    body: bytes


_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5]\d\d) [\x20-\x7e]*")
_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ([\x20-\x7e]*)")


def first_reply(
    data: bytes, *, bodyless: bool = False, ended: bool = False
) -> Optional[tuple[Reply, bytes]]:
    """The first answer in the bytes, and what follows it; None when more of it has to come.

    `bodyless` = it answers a HEAD; `ended` = nothing more comes. Raises Flaw."""
    head, found, rest = data.partition(b"\r\n\r\n")
    if not found:
        return None
    status_line, *lines = head.split(b"\r\n")
    match = _STATUS_LINE.fullmatch(status_line)
    if not match:
        raise Flaw(f"status line {status_line[:100]!r}")
    status, headers = int(match[1]), _headers(lines)
    if status < 200:
        # Only a word in between.
        return first_reply(rest, bodyless=bodyless, ended=ended)
    if bodyless or status in (204, 304):
        return Reply(status, headers, b""), rest
    if "transfer-encoding" in headers:
        whole = _chunks(rest)
        return None if whole is None else (Reply(status, headers, whole[0]), whole[1])
    if "content-length" in headers:
        length = int(headers["content-length"])
        short = len(rest) < length
        return None if short else (Reply(status, headers, rest[:length]), rest[length:])
    return (Reply(status, headers, rest), b"") if ended else None


def _headers(lines: Sequence[bytes]) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in lines:
        match = _HEADER_LINE.fullmatch(line)
        if not match:
            raise Flaw(f"header line {line[:100]!r}")
        name = match[1].decode().lower()
        if name in found and name in ("content-length", "content-type", "transfer-encoding"):
            raise Flaw(f"{name} twice")
        found[name] = match[2].decode()
    if "content-length" in found and "transfer-encoding" in found:
        raise Flaw("a length and chunks")
    return found


def _chunks(data: bytes) -> Optional[tuple[bytes, bytes]]:
    """A chunked body and what follows; None when more has to come. Raises Flaw."""
    body = b""
    while True:
        line, found, data = data.partition(b"\r\n")
        if not found:
            return None
        if not re.fullmatch(b"[0-9a-f]+", line):
            raise Flaw(f"chunk size {line[:50]!r}")
        size = int(line, 16)
        if len(data) < size + 2:
            return None
        if data[size:size + 2] != b"\r\n":
            raise Flaw("a chunk longer than it says")
        body, data = body + data[:size], data[size + 2:]
        if not size:
            return body, data


def strict_json(text: bytes) -> Json:
    """The value of a JSON text. Raises Flaw for what only Python takes for JSON."""
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    try:
        return json.loads(text.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as problem:
        raise Flaw(f"not JSON: {problem}: {text[:200]!r}") from None


def check_reply(reply: Reply) -> None:
    """Raises Flaw when an answer is not as answers have to be."""
    kind = reply.headers.get("content-type", "").partition(";")[0]
    # A time-out may be what a changed setting asked for; 503 says so itself.
    if reply.status >= 500 and reply.status not in (503, 504):
        raise Flaw(f"status {reply.status}: {reply.body[:300]!r}")
    if not reply.headers.get("x-request-id") and "retry-after" not in reply.headers:
        raise Flaw("no X-Request-Id")
    if kind == "application/json" and reply.body:
        found = strict_json(reply.body)
        if reply.status >= 400:
            check_error(found)
    elif kind == "text/event-stream":
        check_events(reply.body)
    elif reply.status >= 400 and reply.body:
        raise Flaw(f"an error of type {kind!r}")


def check_error(body: Json) -> None:
    if isinstance(body, dict) and "results" in body:
        # Settings, none of which could be changed.
        return
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    if not isinstance(message, str) or not message:
        raise Flaw(f"an error without a message: {str(body)[:200]}")


def check_events(body: bytes) -> None:
    """Each event of a stream is JSON, or says that this was all."""
    for line in body.split(b"\n"):
        field, _, value = line.partition(b": ")
        if field == b"data" and value != b"[DONE]":
            strict_json(value)
        elif field not in (b"data", b"event", b"id", b"retry", b""):
            raise Flaw(f"a line in a stream: {line[:100]!r}")


# ---------------------------------------------------------------------------
# 5 Sending
# ---------------------------------------------------------------------------

class Played(NamedTuple):
    """What came back for a case."""

    received: bytes
    #: Whether the server closed the connection.
    closed: bool
    #: Whether it was given up on.
    hung: bool
    replies: Sequence[Reply] = ()


def play(port: int, case: Case, patience_s: float = PATIENCE_S) -> Played:
    """Sends a case and reads what there is to read. Raises Flaw for an answer that is broken."""
    deadline_s = time.monotonic() + patience_s
    with socket.create_connection(("127.0.0.1", port), timeout=patience_s) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for piece in case.pieces:
                connection.sendall(piece)
            if case.ending == "shut":
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # It did not want all of it; what it says about that can be read.
        if case.ending in ("leave", "reset"):
            if case.ending == "reset":
                option = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
            return Played(b"", closed=True, hung=False)
        return _listen(connection, case, deadline_s)


def _listen(connection: socket.socket, case: Case, deadline_s: float) -> Played:
    received = b""
    while True:
        if case.ending == "read" and is_answered(case, received):
            return _played(case, received, closed=False)
        connection.settimeout(max(0.01, deadline_s - time.monotonic()))
        try:
            piece = connection.recv(1 << 18)
        except socket.timeout:
            return Played(received, closed=False, hung=True)
        except ConnectionError:
            piece = b""
        received += piece
        if not piece:
            return _played(case, received, closed=True)


def is_answered(case: Case, received: bytes) -> bool:
    """Whether all answers that have to come are there, or one that never ends has begun."""
    if case.methods == ["GET"] and b"text/event-stream" in received.partition(b"\r\n\r\n")[0]:
        return b"\n\n" in received.partition(b"\r\n\r\n")[2]
    return len(replies_in(case, received, ended=False)[0]) >= len(case.methods)


def replies_in(case: Case, received: bytes, *, ended: bool) -> tuple[list[Reply], bytes]:
    """The complete answers, and what is left."""
    found = []
    methods = iter(case.methods)
    while received:
        bodyless = next(methods, "") == "HEAD"
        next_one = first_reply(received, bodyless=bodyless, ended=ended)
        if next_one is None:
            break
        reply, received = next_one
        found.append(reply)
    return found, received


def _played(case: Case, received: bytes, *, closed: bool) -> Played:
    if speaks_old(case) and not received.startswith(b"HTTP/"):
        # Before there were heads, an answer was its body.
        return Played(received, closed, hung=False)
    if case.data.lstrip().startswith(b"HEAD") and case.ending != "read":
        # Whether a broken HEAD was understood as one cannot be known.
        return Played(received, closed, hung=False)
    replies, rest = replies_in(case, received, ended=closed)
    begins = rest.startswith(b"HTTP/1.1 "[:len(rest)])
    endless = b"text/event-stream" in rest.partition(b"\r\n\r\n")[0]
    if rest and not (begins and (endless or not case.exact)):
        raise Flaw(f"an answer that breaks off, or garbage: {rest[:300]!r}")
    return Played(received, closed, False, replies)


def speaks_old(case: Case) -> bool:
    """Whether the first line is that of a request without a version, or of one before 1.0."""
    lines = re.split("[\r\n]", case.data.decode("latin-1"))
    words = next((line for line in lines if line.strip()), "").split()
    return len(words) == 2 or words[2:] == ["HTTP/0.9"]


def check(case: Case, played: Played) -> None:
    """Raises Flaw when the server did not do what it has to."""
    if played.hung:
        raise Flaw(f"neither answered nor closed: {played.received[:200]!r}")
    if case.data.startswith(TLS_HELLO):
        # It is told in plain text that this is http.
        return
    for reply in played.replies:
        check_reply(reply)
    ends = any(reply.headers.get("connection") == "close" for reply in played.replies)
    if case.ending == "read" and not played.received:
        raise Flaw("a whole request without an answer")
    if case.exact and played.closed and not ends and len(played.replies) < len(case.methods):
        raise Flaw(f"{len(played.replies)} answers to {len(case.methods)} requests")
    if case.exact and len(played.replies) > len(case.methods):
        raise Flaw(f"{len(played.replies)} answers to {len(case.methods)} requests")


# ---------------------------------------------------------------------------
# 6 The server
# ---------------------------------------------------------------------------

class State(NamedTuple):
    """What a server holds while it does nothing."""

    children: int
    zombies: int
    threads: int
    descriptors: int


class Report(NamedTuple):
    """What a run found."""

    #: Complaints about answers, each with the number of its case.
    flaws: Sequence[str]
    #: Complaints out of the server's own log and output.
    log_flaws: Sequence[str]
    #: For each route, how often each status came; 0 = another end.
    statuses: Mapping[tuple[str, str], Mapping[int, int]]
    kinds: Mapping[str, int]
    before: State
    after: State
    #: The resident memory of the server as the run went on, in bytes.
    memory: Sequence[int]
    #: What a plain question was answered with at the end.
    last_answer: str
    elapsed_s: float

    @property
    def grown_bytes(self) -> int:
        """By how much the memory grew in the last quarter. Caches fill up before."""
        return self.memory[-1] - self.memory[len(self.memory) * 3 // 4]


class Fuzzed:
    """A server and those who send to it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.admin = (server.ocp_home / "admin-key").read_text().strip()
        self.memory: list[int] = []
        self.flaws: list[str] = []
        self.statuses: dict[tuple[str, str], collections.Counter[int]] = {}
        self.kinds: collections.Counter[str] = collections.Counter()
        # Guards the fields above and the world; held for a moment.
        self._lock = threading.Lock()
        paths = server.call("GET", "/openapi.json").json()["paths"]
        self.routes = [(method.upper(), path) for path in paths for method in paths[path]]
        self._users = 0
        self.world = World(self.routes, self.admin, "", "")

    def call(self, method: str, path: str, body: Json = None, key: str = "") -> http_client.Reply:
        """A request that is meant well."""
        headers = {"Authorization": f"Bearer {key or self.admin}"}
        return self.server.call(method, path, body, headers, timeout_s=PATIENCE_S)

    def mend(self) -> None:
        """Puts settings and the user's key right again, and measures the memory."""
        live, name = self.call("GET", "/settings").json(), self.world.user_name
        self.call("PATCH", "/settings", dict.fromkeys(live))
        user = self.world.user
        greeting = {"messages": [{"role": "user", "content": GREETING}]}
        # Its key may be revoked, or have used up a quota that the fuzz gave it.
        if not user or self.call("POST", "/v1/chat/completions", greeting, user).status != 200:
            self._users += 1
            name = f"fuzz-user-{self._users}"
            user = self.call("POST", "/api/keys", {"name": name}).json()["key"]
        self.call("PUT", f"/api/keys/{name}/tenant", {"adopt": True})
        stored = self.call("POST", "/v1/responses", {"input": GREETING}, user).json()
        self.call("POST", "/v1/chat/completions", CHAT_SESSION)
        with self._lock:
            self.world = World(self.routes, self.admin, user, stored.get("id", ""), name)
            self.memory.append(resident_bytes(self.server.pid))

    def rest(self, wanted: Optional[State] = None) -> State:
        """What the server holds once nothing goes on and no claude waits; as soon as that is no
        more than what is wanted, or has not changed for a while."""
        idle = {"parkedProcesses": 0, "warmProcesses": 0, "warmIdleMs": 1000}
        self.call("PATCH", "/settings", idle)
        now_s = time.monotonic()
        state, since_s, give_up_s = self.state(), now_s, now_s + REST_S
        while time.monotonic() < give_up_s:
            time.sleep(0.05)
            before, state, now_s = state, self.state(), time.monotonic()
            since_s = since_s if state == before else now_s
            if wanted is not None and not grown(wanted, state):
                break
            # One child is the guardian, which stays as long as the server.
            if wanted is None and state.children <= 1 and now_s - since_s > 1:
                break
        return state

    def state(self) -> State:
        folder = Path(f"/proc/{self.server.pid}")
        return State(
            len(self.server.children()), len(self.server.zombies()),
            len(os.listdir(folder / "task")), len(os.listdir(folder / "fd")))

    def send(self, number: int, case: Case) -> Optional[Played]:
        """Plays a case and notes what is wrong with it."""
        played, flaw = None, ""
        try:
            played = play(self.server.port, case)
            check(case, played)
        except Flaw as found:
            flaw = str(found)
        except OSError as problem:
            flaw = f"no connection: {problem}"
        with self._lock:
            self.kinds[case.kind] += 1
            statuses = self.statuses.setdefault(case.route, collections.Counter())
            statuses.update(statuses_in(played) if played else [])
            if flaw:
                self.flaws.append(f"case {number} ({case.kind}): {flaw}")
        return played

    def send_all(self, seed: int, requests: int) -> None:
        """The cases of a seed, by several workers; in between, what they broke is mended."""
        for first in range(0, requests, MEND_EVERY):
            self.mend()
            with ThreadPoolExecutor(WORKERS) as workers:
                cases = ((number, case_of(seed, number, self.world))
                         for number in range(first, min(requests, first + MEND_EVERY)))
                for sent in [workers.submit(self.send, *case) for case in cases]:
                    sent.result()
        self.mend()

    def log_flaws(self) -> list[str]:
        """What the server itself says went wrong."""
        names = ("request_broke", "connection_broke", "housekeeping_failed")
        entries = [entry for entry in logged(self.server.ocp_home / "logs")
                   if entry["level"] == "error" or entry["event"] in names]
        return [json.dumps(entry) for entry in entries] + traces(self.server.output)


def statuses_in(played: Played) -> list[int]:
    """The statuses of the answers, or of one that never ends."""
    begun = re.match(rb"HTTP/1\.1 ([2-5]\d\d) ", played.received)
    return [reply.status for reply in played.replies] or ([int(begun[1])] if begun else [])


def resident_bytes(pid: int) -> int:
    """The memory of a process that is in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def grown(before: State, after: State) -> list[str]:
    """What is held after and was not held before."""
    pairs = zip(State._fields, before, after)
    return [f"{name}: {was} before, {now} after" for name, was, now in pairs if now > was]


def logged(folder: Path) -> list[dict[str, Json]]:
    """The server's log, the files it was rotated into included."""
    return [entry for path in sorted(folder.glob("ocp.log*"))
            for entry in read_json_lines(path)]


def traces(output: str) -> list[str]:
    """The exceptions that were printed, which nobody caught."""
    return [output[at.start():][:600] for at in re.finditer("Traceback|Exception in", output)]


def run(folder: Path, seed: int, requests: int) -> Report:
    """Starts a server in the folder, sends it so many requests, and ends it.

    Raises AssertionError if the server leaves processes behind."""
    started_s = time.monotonic()
    with running_server(folder, env=SETTINGS) as server:
        fuzzed = Fuzzed(server)
        fuzzed.mend()
        # SQLite keeps the descriptor of the first report for the next one.
        fuzzed.call("GET", "/api/usage")
        before = fuzzed.rest()
        fuzzed.memory.clear()
        fuzzed.send_all(seed, requests)
        after = fuzzed.rest(before)
        body = {"messages": [{"role": "user", "content": GREETING}]}
        last = fuzzed.call("POST", "/v1/chat/completions", body, fuzzed.world.user)
        return Report(
            fuzzed.flaws, fuzzed.log_flaws(), fuzzed.statuses, fuzzed.kinds, before, after,
            fuzzed.memory, said(last), time.monotonic() - started_s)


def said(reply: http_client.Reply) -> str:
    """The text of an answer, or why there is none."""
    try:
        return str(reply.json()["choices"][0]["message"]["content"])
    except (ValueError, KeyError):
        return repr(reply)


# ---------------------------------------------------------------------------
# 7 Program
# ---------------------------------------------------------------------------

def complaints(report: Report) -> list[str]:
    """Everything that is not as it should be."""
    found = [*report.flaws, *report.log_flaws, *grown(report.before, report.after)]
    if report.grown_bytes > MOST_GROWTH_BYTES:
        found.append(f"memory grew by {report.grown_bytes / 1e6:.1f} MB in the last quarter")
    if report.last_answer != f"You said: {GREETING}":
        found.append(f"the last answer: {report.last_answer}")
    return found


def show_one(folder: Path, seed: int, number: int) -> int:
    """Sends one case and prints it."""
    with running_server(folder, env=SETTINGS) as server:
        fuzzed = Fuzzed(server)
        fuzzed.mend()
        case = case_of(seed, number, fuzzed.world)
        print(f"{case.kind}, then {case.ending}:\n{case.data[:3000]!r}\n")
        played = fuzzed.send(number, case)
        print(played.received[:3000] if played else "")
        found = [*fuzzed.flaws, *fuzzed.log_flaws()]
    print("\n".join(found) or "fine")
    return int(bool(found))


def show_all(folder: Path, seed: int, requests: int) -> int:
    report = run(folder, seed, requests)
    found = complaints(report)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.kinds.items()))
    memory = ", ".join(f"{size / 1e6:.1f}" for size in report.memory)
    print(f"seed {seed}: {kinds}\n{report.before}\n{report.after}\nMB: {memory}")
    print(f"{report.elapsed_s:.1f} s, {len(found)} complaints")
    print("\n".join(found[:50]))
    return int(bool(found))


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="send this case alone")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="ocp-fuzz-") as name:
        if options.only is not None:
            return show_one(Path(name), options.seed, options.only)
        return show_all(Path(name), options.seed, options.requests)


if __name__ == "__main__":
    sys.exit(main())
