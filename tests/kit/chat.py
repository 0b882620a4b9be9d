"""Chat completions in short: requests, and checks of what came back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from http_client import Reply, Stream
from server import Server

Json = Any
CHAT_PATH = "/v1/chat/completions"
#: A model of which the server remembers no limit, so that a test with one leaves none behind.
UNLISTED_MODEL = "claude-opus-99"
#: For a server on which every process that there is works on an answer.
NO_IDLE = {"OCP_WARM_PROCESSES": "0", "OCP_PARKED_PROCESSES": "0"}
#: The fields of an error in the OpenAI shape, all of them always there.
ERROR_FIELDS = {"message", "type", "param", "code"}
#: A step of the fake claude, at which it stays for good.
HANG: dict[str, Json] = {"hang": True}
#: Whole answers and streamed ones.
both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
#: A text of many pieces, with characters of one to four bytes.
LONG = "Gr\u00fc\u00dfe aus K\u00f6ln \U0001f642 \u4f60\u597d, " * 40
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "number"}}}


def question(text: Json = "hi", **fields: Json) -> dict[str, Json]:
    """The body of a chat request with one message."""
    return {"model": "sonnet", "messages": [{"role": "user", "content": text}], **fields}


def shaped(schema: Json) -> dict[str, Json]:
    """The fields that ask for an answer of this schema."""
    return {"response_format": {
        "type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


def encoded(value: Json) -> bytes:
    return json.dumps(value).encode()


def ask(server: Server, text: Json = "hi", **fields: Json) -> Reply:
    """A chat request and its complete answer, streamed if the fields say so."""
    return server.call("POST", CHAT_PATH, question(text, **fields))


def stream_chat(server: Server, text: Json = "hi", **fields: Json) -> Stream:
    """A chat request whose answer is read as it comes; to be used in a `with`."""
    return server.stream(CHAT_PATH, question(text, **fields))


def chunks(events: Iterable[tuple[str, Json]]) -> list[Json]:
    """The chunks of a streamed answer; errors and [DONE] are none."""
    return [data for _, data in events if isinstance(data, dict) and "choices" in data]


def pieces(events: Iterable[tuple[str, Json]], field: str = "content") -> list[str]:
    """What the chunks say, piece by piece."""
    deltas = [choice["delta"] for chunk in chunks(events) for choice in chunk["choices"]]
    return [delta[field] for delta in deltas if delta.get(field)]


def finish_reasons(events: Iterable[tuple[str, Json]]) -> list[str]:
    choices = [choice for chunk in chunks(events) for choice in chunk["choices"]]
    return [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


def content_of(reply: Reply) -> str:
    """The text of a whole answer."""
    assert reply.status == 200, reply
    return str(reply.json()["choices"][0]["message"]["content"])


def error_of(reply: Reply) -> dict[str, Json]:
    """The error in a reply, which has to have the OpenAI shape."""
    assert reply.status >= 400, reply
    assert reply.headers["Content-Type"] == "application/json"
    body = reply.json()
    assert set(body) == {"error"} and set(body["error"]) == ERROR_FIELDS, body
    assert isinstance(body["error"]["message"], str) and body["error"]["message"]
    return dict(body["error"])


def stream_error(events: list[tuple[str, Json]]) -> dict[str, Json]:
    """The error that ends a stream; nothing in the stream may look like a success."""
    assert finish_reasons(events) == []
    assert "[DONE]" not in [data for _, data in events]
    error: dict[str, Json] = events[-1][1]["error"]
    assert set(error) == ERROR_FIELDS
    return error
