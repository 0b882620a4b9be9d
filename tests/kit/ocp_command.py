"""How tests run the ocp command in their own process, against a server that answers as told and
with programs of the system that only write down how they were called."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Sequence, Union

from clock import SkippingClock
from forks import forker
from processes import Ran
from project import REPO, load_script

Json = Any
ocp = load_script("ocp")
setup = load_script("setup.py_install.py")
#: Nobody listens there: binding it takes rights that tests have not, and it is never assigned.
DEAD_URL = "http://127.0.0.1:1"


# ---------------------------------------------------------------------------
# A server that answers as told
# ---------------------------------------------------------------------------

class Request(NamedTuple):
    method: str
    #: With its query.
    path: str
    key: str
    body: Json


#: A status and a body; JSON unless it is text. The status 0 hangs up without an answer.
Answer = tuple[int, Union[Json, str]]
HEALTH = {
    "status": "ok", "version": "1.0.0", "demo": False,
    "instanceName": "", "uptime": 3_780_000, "uptimeHuman": "1h 3m", "authMode": "multi",
    "auth": {"ok": True, "okAt": "2026-11-20T14:00:00Z", "message": None},
    "claudeBinaryOk": True, "claudeVersion": "2.1.329", "fix": None,
    "stats": {"totalRequests": 18, "errors": 0, "timeouts": 0},
    "concurrency": {"maxConcurrent": 8, "maxQueue": 16, "inflight": 0, "queued": 0},
    "spares": {"claude-sonnet-5-5": 1}, "parked": 2,
}


class StubServer:
    """A server on loopback; `answers` may be changed while it runs."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        #: "METHOD /path" without the query: an Answer, or a function of the Request.
        self.answers: dict[str, Any] = {"GET /health": (200, dict(HEALTH)), **answers}
        self.requests: list[Request] = []
        self.headers: dict[str, str] = {}
        self.url = ""

    def answer(self, request: Request) -> Answer:
        self.requests.append(request)
        found = self.answers.get(f"{request.method} {request.path.partition('?')[0]}")
        if found is None:
            return 404, {"error": {"message": f"There is no {request.path} here.", "type": "x"}}
        status, body = found(request) if callable(found) else found
        return status, body


@contextmanager
def stub_server(answers: Optional[Mapping[str, Any]] = None) -> Iterator[StubServer]:
    """A StubServer that listens."""
    told = StubServer(answers or {})

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            content = self.rfile.read(length)
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            body = json.loads(content) if content else None
            status, value = told.answer(Request(self.command, self.path, key, body))
            if status == 0:
                self.close_connection = True
                return
            text = value if isinstance(value, str) else json.dumps(value)
            self.send_response(status)
            for name, header in told.headers.items():
                self.send_header(name, header)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    told.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# ---------------------------------------------------------------------------
# Running a command
# ---------------------------------------------------------------------------

class Stream(io.StringIO):
    """A stream in memory that may pass for a terminal."""

    def __init__(self, text: str = "", terminal: bool = False) -> None:
        super().__init__(text)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


#: The scripts that ocp starts often, and its words before their arguments.
FORKED = {
    REPO / "ocp_connect.py": [sys.executable, str(REPO / "ocp_connect.py")],
    REPO / "ocp_server.py": [sys.executable, "-B", str(REPO / "ocp_server.py")],
}


def run_program(command: Sequence[str], environ: Mapping[str, str], **more: Any) -> Any:
    """What ocp.run_program does, but quicker for scripts of this repository."""
    for script, words in FORKED.items():
        if list(command[:len(words)]) == words and not more.get("attached"):
            arguments = command[len(words):]
            return ocp.Completed(*forker(script).run(arguments, environ, Path.cwd(), 180))
    return ocp.run_program(command, environ, **more)


def ocp_env(
    home: Path, *argv: str, environ: Optional[Mapping[str, str]] = None, terminal: bool = False,
    stdin: str = "", tree: Path = REPO, clock: Optional[SkippingClock] = None, **more: Any,
) -> Any:
    """An Env of ocp whose home is `home`, and which sees nothing of the machine's own."""
    clock = clock or SkippingClock()
    surroundings = {"PATH": os.environ["PATH"], "HOME": str(home), **(environ or {})}
    return ocp.Env(
        list(argv), surroundings, Stream(stdin, terminal), Stream(terminal=terminal),
        Stream(terminal=terminal), str(home), str(tree),
        **{"clock": clock.time, "sleep": clock.sleep, "platform": "linux", "run": run_program,
           **more},
    )


def run_env(env: Any) -> Ran:
    """Runs the command of an Env."""
    code = ocp.main(env)
    return Ran(int(code), env.stdout.getvalue(), env.stderr.getvalue())


def run(home: Path, url: str, *argv: str, environ: Optional[Mapping[str, str]] = None,
        **more: Any) -> Ran:
    """Runs a command against the server at `url`."""
    return run_env(ocp_env(home, *argv, environ={"OCP_URL": url, **(environ or {})}, **more))


# ---------------------------------------------------------------------------
# Programs of the system
# ---------------------------------------------------------------------------

class Programs:
    """A folder for PATH with programs that write down how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "calls.log"
        folder.mkdir(parents=True)

    def add(self, name: str, script: str = "exit 0") -> None:
        path = self.folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> "{self.log}"\n{script}\n')
        path.chmod(0o755)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    @property
    def path(self) -> str:
        return f"{self.folder}:{os.environ['PATH']}"


def write_record(home: Path, url: str, tree: Path = REPO, **fields: Json) -> dict[str, Json]:
    """An install.json as the installer writes it."""
    folder = home / ".ocp"
    folder.mkdir(mode=0o700, exist_ok=True)
    label, platform = fields.get("label", "ocp.service"), fields.get("platform", "systemd-user")
    domain = fields.pop("domain", "gui/0")
    service = setup.launchd_service(str(home), domain, label, "") if platform == "launchd" else (
        setup.systemd_service(str(home), label, is_system=platform == "systemd-system"))
    unit = Path(service.unit_path)
    unit.parent.mkdir(parents=True, exist_ok=True)
    unit.write_text("[Service]\n")
    record = {
        "version": 1, "installed_at": "2026-11-20T14:00:00Z", "platform": "systemd-user",
        "label": "ocp.service", "unit_path": str(unit), "python": sys.executable,
        "server_path": str(tree / "ocp_server.py"), "install_dir": str(tree),
        "data_dir": str(folder), "env_file": None, "port": int(url.rpartition(":")[2]),
        "bind": "127.0.0.1", "url": url, "launcher": None,
        "commands": service.commands, "actions": [], **fields,
    }
    (folder / "install.json").write_text(json.dumps(record))
    return record


