"""Lines as claude prints them, and lines that are written to it."""

from __future__ import annotations

import json
from typing import Any

Json = dict[str, Any]


def stream(kind: str, **fields: object) -> Json:
    """A line that carries an event of the API."""
    return {"type": "stream_event", "event": {"type": kind, **fields}}


START = stream("message_start", message={"id": "msg_1", "model": "claude-x", "usage": {}})
#: The line that ends a good answer.
RESULT = {"type": "result", "subtype": "success", "is_error": False, "result": ""}


def lines_of(data: bytes) -> list[Json]:
    """The lines in these bytes, all of them complete."""
    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]
