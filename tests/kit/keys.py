"""How tests use a server that wants keys: the keys of its operator, and those made for devices."""
from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Optional

from chat import CHAT_PATH, NO_IDLE, question
from http_client import Body, Reply
from project import load_script
from server import Server

ocp = load_script("ocp_server.py")

Json = Any

ADMIN_KEY = "the-admin-key-of-the-tests"
ANONYMOUS_KEY = "the-key-that-everybody-may-have"
SHARED_KEY = "the-key-of-the-whole-house"
#: A server of mode multi on which every process that there is works on an answer.
MULTI = {
    **NO_IDLE, "CLAUDE_AUTH_MODE": "multi", "OCP_ADMIN_KEY": ADMIN_KEY,
    # Tests send many wrong keys.
    "OCP_WRONG_KEY_DELAY": "0",
}
#: The same in mode shared.
SHARED = {
    **NO_IDLE, "CLAUDE_AUTH_MODE": "shared", "PROXY_API_KEY": SHARED_KEY,
    "OCP_ADMIN_KEY": ADMIN_KEY, "OCP_WRONG_KEY_DELAY": "0",
}


def bearer(key: str) -> dict[str, str]:
    """The header that presents a key; none for an empty one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def as_admin(
    server: Server, method: str, path: str, body: Body = None, key: str = ADMIN_KEY
) -> Reply:
    return server.call(method, path, body, bearer(key))


def new_key(server: Server, **fields: Json) -> dict[str, Json]:
    """A new key as the server tells it, its secret under "key"."""
    reply = as_admin(server, "POST", "/api/keys", fields)
    assert reply.status == 201, reply
    made: dict[str, Json] = reply.json()
    return made


def ask_as(server: Server, key: str, text: Json = "hi", **fields: Json) -> Reply:
    """A chat request of whoever holds this key, and its complete answer."""
    return server.call(
        "POST", CHAT_PATH, question(text, **fields), bearer(key), timeout_s=240)


def key_in_place(
    database: Path, name: str, *, columns: Optional[Mapping[str, Json]] = None,
    revoked: bool = False,
) -> str:
    """The secret of a key that is put into the database of a server that does not run."""
    database.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with closing(ocp.Store(str(database))) as store:
        keys = ocp.Keys(store, time.time)
        key, secret = keys.create(name, columns or {})
        if revoked:
            keys.revoke(key)
    return str(secret)
