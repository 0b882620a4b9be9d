"""What a server tells of its cache, of shared answers and of past requests."""

from __future__ import annotations

from typing import Any

from http_client import Reply
from server import Server

Json = Any

#: For a server that keeps answers for an hour.
HOUR = {"CLAUDE_CACHE_TTL": "3600000"}


def word_of(reply: Reply) -> str:
    """What the cache did for a request: "hit", "miss", ..."""
    return str(reply.headers["X-OCP-Cache"])


def stats_of(server: Server) -> dict[str, Json]:
    found: dict[str, Json] = server.call("GET", "/cache/stats").json()
    return found


def newest(server: Server, count: int) -> list[Json]:
    """The last rows of usage, oldest first."""
    rows = server.call("GET", f"/api/usage?limit={count}").json()["recent"]
    return list(reversed(rows))
