"""HTTP for tests: whole replies, and streams event by event."""

from __future__ import annotations

import http.client
import json
from typing import Any, Iterator, Mapping, Optional, Sequence, Union

Json = Any


Body = Union[None, bytes, str, Mapping[str, Json], Sequence[Json]]


class SseParser:
    """Server-sent events out of lines: (name, data) each.

    The name is "message" if the server gave none, the data is parsed if it is JSON."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Json]] = []
        self.comments: list[str] = []
        self._name = "message"
        self._data: list[str] = []

    def feed(self, line: bytes) -> Optional[tuple[str, Json]]:
        """Take one line; the event that it completes, if any."""
        text = line.rstrip(b"\r\n").decode()
        field, _, value = text.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if text.startswith(":"):
            self.comments.append(value)
        elif field == "event":
            self._name = value
        elif field == "data":
            self._data.append(value)
        elif not text and self._data:
            event = (self._name, _parsed("\n".join(self._data)))
            self._name, self._data = "message", []
            self.events.append(event)
            return event
        return None


def _parsed(data: str) -> Json:
    try:
        return json.loads(data)
    except ValueError:
        return data


class Reply:
    """A complete answer."""

    def __init__(self, status: int, headers: http.client.HTTPMessage, body: bytes) -> None:
        self.status = status
        #: Names in any case; [] gives None for a header that is not there.
        self.headers = headers
        self.body = body

    def __repr__(self) -> str:
        return f"<Reply {self.status} {self.body[:300]!r}>"

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Json:
        return json.loads(self.body)

    def _parsed_sse(self) -> SseParser:
        parser = SseParser()
        for line in self.body.split(b"\n"):
            parser.feed(line)
        return parser

    @property
    def events(self) -> list[tuple[str, Json]]:
        """The body as server-sent events: (name, parsed data or "[DONE]")."""
        return self._parsed_sse().events

    @property
    def comments(self) -> list[str]:
        """The comment lines of a body of server-sent events."""
        return self._parsed_sse().comments


class Stream:
    """A streamed answer, event by event. Leaving the `with` block hangs up."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection
        self._response = connection.getresponse()
        self._parser = SseParser()
        self.status = self._response.status
        self.headers = self._response.headers

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[str, Json]]:
        """The events as they come, until the answer ends."""
        for line in iter(self._response.readline, b""):
            event = self._parser.feed(line)
            if event:
                yield event

    @property
    def comments(self) -> list[str]:
        """The comments so far."""
        return self._parser.comments

    def read(self) -> bytes:
        """What is left of the body as it is, for an answer that is not a stream."""
        return self._response.read()

    def close(self) -> None:
        self._response.close()
        self._connection.close()


def http_request(
    port: int, method: str, path: str, body: Body = None,
    headers: Optional[Mapping[str, str]] = None, timeout_s: float = 60,
) -> http.client.HTTPConnection:
    """A connection on which the request has been sent. Objects go out as JSON."""
    sent = dict(headers or {})
    if body is not None and not isinstance(body, (bytes, str)):
        body = json.dumps(body)
    content = body.encode() if isinstance(body, str) else body
    if content is not None and "content-type" not in (name.lower() for name in sent):
        sent["Content-Type"] = "application/json"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    connection.request(method, path, content, sent)
    return connection


def http_call(
    port: int, method: str, path: str, body: Body = None,
    headers: Optional[Mapping[str, str]] = None, timeout_s: float = 60,
) -> Reply:
    connection = http_request(port, method, path, body, headers, timeout_s)
    try:
        response = connection.getresponse()
        return Reply(response.status, response.headers, response.read())
    finally:
        connection.close()
