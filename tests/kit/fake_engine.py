"""A stand-in for the daemon of docker: the real client runs against the containers of FakeDocker.

It speaks as much of the engine's HTTP on a unix socket as `docker ps, inspect, exec` and `cp` ask
for, and lets the program of fake_docker.py do the work.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socketserver
import stat
import struct
import subprocess
import threading
import urllib.parse
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Iterator, Optional

from fake_docker import FakeDocker

Json = Any
API_VERSION = "1.47"
#: Go's bits for a folder and a link in a mode.
GO_DIR, GO_LINK = 1 << 31, 1 << 27


def real_client() -> Optional[str]:
    """The path of the real docker client, None if it is not installed."""
    return shutil.which("docker")


class Engine(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def __init__(self, path: str, docker: FakeDocker) -> None:
        super().__init__(path, Handler)
        self.docker = docker
        self.execs: list[dict[str, Json]] = []

    def run(self, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([str(self.docker.bin / "docker"), *words], input=stdin,
                              env=self.docker.environ, capture_output=True, check=False)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Engine

    def log_message(self, *_: object) -> None:
        pass

    def address_string(self) -> str:
        return "socket"

    def send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Api-Version": API_VERSION, "Ostype": "linux", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value: Json, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while True:
            size = int(self.rfile.readline(), 16)
            parts.append(self.rfile.read(size))
            self.rfile.readline()
            if not size:
                return b"".join(parts)

    def answer(self) -> None:
        path, _, query = self.path.partition("?")
        path = re.sub(r"^/v[0-9.]+", "", path)
        asked = {name: values[0] for name, values in urllib.parse.parse_qs(query).items()}
        container = re.fullmatch(r"/containers/([^/]+)/(json|archive|exec)", path)
        if path == "/_ping":
            self.send(200, b"OK")
        elif path == "/containers/json":
            ids = self.server.run("ps", "--no-trunc", "--quiet", "--all").stdout.decode().split()
            self.send_json([{"Id": each} for each in ids])
        elif container:
            name = urllib.parse.unquote(container[1])
            getattr(self, f"on_{container[2]}")(name, asked)
        elif path.startswith("/exec/"):
            self.on_running(int(path.split("/")[2]), path.endswith("/start"))
        else:
            self.send_json({"message": f"no {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def inspected(self, name: str) -> Json:
        """What is said of a container; answers and returns None if it is gone."""
        found = json.loads(self.server.run("inspect", "--type", "container", name).stdout)
        if not found:
            self.send_json({"message": f"No such container: {name}"}, 404)
        return found[0] if found else None

    def on_json(self, name: str, asked: dict[str, str]) -> None:
        told = self.inspected(name)
        if told:
            self.send_json(told)

    def on_archive(self, name: str, asked: dict[str, str]) -> None:
        told = self.inspected(name)
        if not told:
            return
        place, path = told["Name"].lstrip("/"), asked["path"]
        if self.command == "PUT":
            ran = self.server.run("cp", "--", "-", f"{place}:{path}", stdin=self.body())
            self.send_complaint(ran) if ran.returncode else self.send(200)
            return
        ran = self.server.run("cp", "--", f"{place}:{path}", "-")
        if ran.returncode:
            self.send_complaint(ran)
        else:
            file = self.server.docker.folder / place / "root" / path.lstrip("/")
            header = base64.b64encode(json.dumps(go_stat(file)).encode()).decode()
            self.send(200, ran.stdout, X_Docker_Container_Path_Stat=header,
                      Content_Type="application/x-tar")

    def send_complaint(self, ran: subprocess.CompletedProcess[bytes]) -> None:
        message = re.sub(r"^Error response from daemon: ", "", ran.stderr.decode().strip())
        self.send_json({"message": message}, 404 if "find the file" in message else 500)

    def on_exec(self, name: str, asked: dict[str, str]) -> None:
        told, wanted = self.inspected(name), json.loads(self.body())
        if told and not told["State"]["Running"]:
            self.send_json({"message": f"container {name} is not running"}, 409)
        elif told:
            self.server.execs.append({**wanted, "container": told["Name"].lstrip("/")})
            self.send_json({"Id": str(len(self.server.execs) - 1)}, 201)

    def on_running(self, number: int, is_start: bool) -> None:
        """Start a program and send its two streams in frames, or say how it ended."""
        entry = self.server.execs[number]
        if not is_start:
            self.send_json({"ID": str(number), "Running": False, "ExitCode": entry["code"]})
            return
        self.body()
        ran = self.server.run("exec", "--", entry["container"], *entry["Cmd"])
        entry["code"] = ran.returncode
        self.wfile.write(b"HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker."
                         b"raw-stream\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
        for stream, content in ((1, ran.stdout), (2, ran.stderr)):
            if content:
                self.wfile.write(struct.pack(">BxxxL", stream, len(content)) + content)
        self.close_connection = True


def go_stat(path: Path) -> Json:
    told = path.lstat()
    kind = GO_DIR if stat.S_ISDIR(told.st_mode) else GO_LINK if path.is_symlink() else 0
    return {"name": path.name, "size": told.st_size, "mode": kind | stat.S_IMODE(told.st_mode),
            "mtime": "2026-12-01T00:00:00Z",
            "linkTarget": os.readlink(path) if path.is_symlink() else ""}


@contextmanager
def fake_engine(folder: Path, docker: FakeDocker) -> Iterator[dict[str, str]]:
    """The environment in which the real client sees the containers of `docker`."""
    client = real_client()
    assert client
    path = folder / "docker.sock"
    engine = Engine(str(path), docker)
    thread = threading.Thread(target=engine.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield {"OCP_DOCKER": client, "DOCKER_HOST": f"unix://{path}",
               "DOCKER_CONFIG": str(folder)}
    finally:
        engine.shutdown()
        engine.server_close()
        thread.join()
