"""A server as far as ocp_tenants.py asks one: keys, tenants, their variables, models, one answer.

It has the routes, the refusals and the shapes of the admin API of tenants, keeps everything in
memory, and writes down each request. Requests that `fail` names are refused.
"""

from __future__ import annotations

import json
import re
import ssl
import threading
import time
import urllib.parse
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional

from tls_files import FINGERPRINT

Json = Any
ADMIN = "admin-key-of-the-fake"
PROFILE: Json = {
    "level": "api", "prompt": "", "clientTools": "keep", "skills": True, "relay": None,
    "commands": "read", "tools": ["Read", "Grep", "Bash"], "sandbox": True, "text": "all",
    "instance": None}
LEVELS = ("api", "tools", "agent")
BLOCKED = re.compile(
    r"PATH|HOME|SHELL|USER|LOGNAME|TMPDIR|IFS|ENV|BASH_ENV|(LD|DYLD|NODE|BUN|GIT|SSH|ANTHROPIC|"
    r"OPENAI|OPENCLAW|OCP|PROXY|DOCKER|DISABLE|ENABLE|MAX|MCP|XDG|DBUS|SSL)_.*|"
    r"(PYTHON|PERL|RUBY|CLAUDE).*|.*_PROXY", re.I)
MODELS: Json = [
    {"id": "claude-sonnet-5-5", "display_name": "Claude Sonnet 5.5", "context_window": 1_000_000,
     "max_output_tokens": 128_000},
    {"id": "claude-haiku-5-5", "display_name": "Claude Haiku 5.5", "context_window": 200_000,
     "max_output_tokens": 64_000}]


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Call(NamedTuple):
    method: str
    path: str
    key: str
    body: Json


class FakeServer:
    """The state of the server; `folder` is its OCP_HOME."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mode = "multi"
        self.has_tenants = True
        self.is_demo = False
        #: The highest level that works.
        self.bound = "agent"
        #: By name: {"id", "name", "secret", "maxConcurrent"}.
        self.keys: dict[str, dict[str, Json]] = {}
        self.used_secrets: set[str] = set()
        #: By name: profile, env and folder.
        self.tenants: dict[str, dict[str, Json]] = {}
        self.calls: list[Call] = []
        #: "METHOD pattern" -> how often it is refused with 500; -1: always.
        self.fail: dict[str, int] = {}
        self.started = time.monotonic()
        self.url = ""
        self.fingerprint: Optional[str] = None

    # -- answers ----------------------------------------------------------------------------

    def answer(self, call: Call) -> tuple[int, Json]:
        self.calls.append(call)
        path = call.path.partition("?")[0]
        for pattern, times in self.fail.items():
            if times and re.fullmatch(pattern, f"{call.method} {path}"):
                self.fail[pattern] -= 1
                raise Refused(500, "server_error", "made to fail")
        for pattern, access, do in ROUTES:
            found = re.fullmatch(pattern, f"{call.method} {path}")
            if found:
                self.check(access, call.key)
                return do(self, call, *map(urllib.parse.unquote, found.groups()))
        raise Refused(404, "not_found", f"There is no {path} here")

    def check(self, access: str, key: str) -> None:
        is_admin = key == ADMIN
        if access == "admin" and not is_admin or access == "key" and not (
                is_admin or self.holder(key)):
            raise Refused(401, "invalid_api_key", "The key is not valid")

    def holder(self, secret: str) -> str:
        return next((name for name, key in self.keys.items() if key["secret"] == secret), "")

    def health(self, call: Call) -> tuple[int, Json]:
        return 200, {
            "status": "ok", "version": "1.0.0", "demo": self.is_demo, "authMode": self.mode,
            "fix": None,
            "uptime": round((time.monotonic() - self.started) * 1000),
            "stats": {"totalRequests": 0, "activeRequests": 0},
            "tenantCount": len(self.tenants), "tlsFingerprint": self.fingerprint}

    def models(self, call: Call) -> tuple[int, Json]:
        return 200, {"object": "list", "data": MODELS}

    def chat(self, call: Call) -> tuple[int, Json]:
        return 200, {"choices": [{"message": {"role": "assistant", "content": "pong"}}]}

    def usage(self, call: Call) -> tuple[int, Json]:
        return 200, {"scope": {"self": self.holder(call.key) or "admin", "all": False}}

    def settings(self, call: Call) -> tuple[int, Json]:
        rows = (("maxConcurrent", 8, 1, 64), ("timeout", 600_000, 1000, 3_600_000),
                ("sessionTTL", 3_600_000, 1000, 86_400_000))
        return 200, {name: {"value": value, "min": least, "max": most}
                     for name, value, least, most in rows}

    # -- keys -------------------------------------------------------------------------------

    def key(self, name: str) -> dict[str, Json]:
        if name not in self.keys:
            raise Refused(404, "key_not_found", f"There is no key {name}")
        return self.keys[name]

    def new_secret(self, body: Json) -> str:
        secret = (body or {}).get("secret") or f"ocp_{len(self.used_secrets):032}"
        if not re.fullmatch(r"[A-Za-z0-9_-]{32,128}", secret):
            raise Refused(400, "invalid_value", "secret: 32 to 128 characters")
        if secret in self.used_secrets:
            raise Refused(409, "key_exists", "Some key has or had this secret")
        self.used_secrets.add(secret)
        return str(secret)

    def list_keys(self, call: Call) -> tuple[int, Json]:
        rows = [{"id": key["id"], "name": key["name"], "revokedAt": None,
                 "keyPreview": key["secret"][:8]} for key in self.keys.values()]
        return 200, {"keys": rows}

    def create_key(self, call: Call) -> tuple[int, Json]:
        name = call.body["name"]
        if re.fullmatch(r"admin|anonymous|local|public|remote|shared|[0-9]+", name):
            raise Refused(400, "invalid_value", f"name: must not be {name}")
        if name in self.keys:
            raise Refused(409, "name_taken", f"There is a key {name}")
        secret = self.new_secret(call.body)
        self.keys[name] = {"id": len(self.used_secrets), "name": name, "secret": secret,
                           "maxConcurrent": call.body.get("maxConcurrent")}
        return 201, {"id": self.keys[name]["id"], "name": name, "key": secret}

    def rotate_key(self, call: Call, name: str) -> tuple[int, Json]:
        key = self.key(name)
        key["secret"] = self.new_secret(call.body)
        return 200, {"id": key["id"], "name": name, "key": key["secret"], "oldSecret": None}

    def revoke_key(self, call: Call, name: str) -> tuple[int, Json]:
        self.tenants.pop(name, None)
        return 200, {"revoked": self.keys.pop(name, None) is not None, "idOrName": name}

    # -- tenants ----------------------------------------------------------------------------

    def row(self, name: str) -> Json:
        """A tenant as GET /api/tenants has it."""
        told = self.tenants[name]
        return {
            "keyId": self.keys[name]["id"], "name": name, **told["profile"],
            "levelInForce": min(told["profile"]["level"], self.bound, key=LEVELS.index),
            "folder": str(self.folder / "tenants" / told["folder"]),
            "login": None, "env": sorted(told["env"]),
            "skills": {"count": 0, "skipped": 0}, "maxConcurrent": 1, "running": 0, "waiting": 0,
            "parked": 0, "spares": 0, "lastUsed": None}

    def tenant(self, name: str) -> dict[str, Json]:
        self.key(name)
        if name not in self.tenants:
            raise Refused(404, "no_tenant", f"{name} has no tenant")
        return self.tenants[name]

    def whole(self, name: str) -> Json:
        return self.row(name)

    def list_tenants(self, call: Call) -> tuple[int, Json]:
        if not self.has_tenants:
            raise Refused(404, "not_found", "There is no /api/tenants here")
        return 200, {"tenants": [self.row(name) for name in sorted(self.tenants)]}

    def get_tenant(self, call: Call, name: str) -> tuple[int, Json]:
        self.tenant(name)
        return 200, self.whole(name)

    def fields(self, body: Json) -> dict[str, Json]:
        for field, value in body.items():
            if field not in PROFILE:
                raise Refused(400, "unknown_field", f"{field} is no field")
            if field == "level" and value not in LEVELS:
                raise Refused(400, "invalid_value", "level: one of api, tools, agent")
        return dict(body)

    def put_tenant(self, call: Call, name: str) -> tuple[int, Json]:
        self.key(name)
        body = dict(call.body or {})
        adopt, fields = body.pop("adopt", False), self.fields(body)
        if name in self.tenants:
            is_changed = {**PROFILE, **fields} != self.tenants[name]["profile"]
            self.tenants[name]["profile"] = {**PROFILE, **fields}
            return 200, {**self.whole(name), "changed": is_changed}
        if (self.folder / "tenants" / name).exists() and not adopt:
            raise Refused(409, "folder_exists", f"There is a folder {name}")
        self.tenants[name] = {"profile": {**PROFILE, **fields}, "env": {}, "folder": name}
        return 201, {**self.whole(name), "changed": True}

    def patch_tenant(self, call: Call, name: str) -> tuple[int, Json]:
        told = self.tenant(name)
        told["profile"] = {**told["profile"], **self.fields(call.body)}
        return 200, self.whole(name)

    def delete_tenant(self, call: Call, name: str) -> tuple[int, Json]:
        self.tenant(name)
        del self.tenants[name]
        return 200, {"removed": True}

    def patch_env(self, call: Call, name: str) -> tuple[int, Json]:
        env = self.tenant(name)["env"]
        for each, value in call.body.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", each) or BLOCKED.fullmatch(each):
                raise Refused(400, "invalid_value", f"{each} may not be set")
            if value is not None and ("\0" in value or len(value.encode()) > 32_768):
                raise Refused(400, "invalid_value", f"{each}: NUL, or more than 32768 bytes")
        changed = [each for each, value in call.body.items() if value is not None]
        removed = [each for each, value in call.body.items() if value is None and each in env]
        env.update({each: call.body[each] for each in changed})
        for each in removed:
            del env[each]
        return 200, {"changed": changed, "removed": removed, "names": sorted(env)}


Do = Callable[..., tuple[int, Json]]
_KEY = r"/api/keys/([^/]+)"
ROUTES: list[tuple[str, str, Do]] = [
    (r"GET /health", "all", FakeServer.health),
    (r"GET /v1/models", "key", FakeServer.models),
    (r"POST /v1/chat/completions", "key", FakeServer.chat),
    (r"GET /api/usage", "key", FakeServer.usage),
    (r"GET /settings", "admin", FakeServer.settings),
    (r"GET /api/keys", "admin", FakeServer.list_keys),
    (r"POST /api/keys", "admin", FakeServer.create_key),
    (rf"POST {_KEY}/rotate", "admin", FakeServer.rotate_key),
    (rf"DELETE {_KEY}", "admin", FakeServer.revoke_key),
    (r"GET /api/tenants", "admin", FakeServer.list_tenants),
    (rf"GET {_KEY}/tenant", "admin", FakeServer.get_tenant),
    (rf"PUT {_KEY}/tenant", "admin", FakeServer.put_tenant),
    (rf"PATCH {_KEY}/tenant", "admin", FakeServer.patch_tenant),
    (rf"DELETE {_KEY}/tenant", "admin", FakeServer.delete_tenant),
    (rf"PATCH {_KEY}/tenant/env", "admin", FakeServer.patch_env),
]


@contextmanager
def fake_server(
    folder: Path, port: int = 0, tls: Optional[ssl.SSLContext] = None
) -> Iterator[FakeServer]:
    """A FakeServer that listens, for https with a context."""
    told = FakeServer(folder)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            body: Optional[Json] = json.loads(content) if content else None
            try:
                status, value = told.answer(Call(self.command, self.path, key, body))
            except Refused as refused:
                status, value = refused.status, {
                    "error": {"message": str(refused), "code": refused.code, "type": "x"}}
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        told.fingerprint = FINGERPRINT
    told.url = f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
