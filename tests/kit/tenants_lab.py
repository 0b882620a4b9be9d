"""A machine with OpenClaw instances on which ocp_tenants.py works: a home, containers, a server."""

from __future__ import annotations

import io
import json
import os
import shutil
import ssl
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Optional, Sequence

import pytest

import fake_docker
from fake_docker import FakeDocker
from fake_engine import fake_engine, real_client
from fake_tenants_api import ADMIN, FakeServer, fake_server
from processes import Ran
from project import REPO, load_script

Json = Any
tenants = load_script("ocp_tenants")
Running: Any = tenants.Running
#: When all commands run.
NOW_S = 1_795_953_600.0


class Quick(Running):  # type: ignore[misc]
    """A program at work, in this process where it is the fake docker or ocp_connect.py."""

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], stdin: bytes, timeout_s: float
    ) -> None:
        self.reason = ""
        folder = Path(environ.get("FAKE_DOCKER", "/nonexistent"))
        is_docker = shutil.which(command[0], path=environ.get("PATH", "")) == str(
            folder.parent / "bin" / "docker") and not (folder / "hang").exists()
        is_connect = command[0] == sys.executable and command[1].endswith("ocp_connect.py")
        self.ran: Json = None
        if is_docker:
            self.ran = in_process(lambda: docker(folder, command[1:]), stdin)
        elif is_connect:
            self.ran = in_process(lambda: connect(command[1], command[2:], environ), stdin)
        else:
            super().__init__(command, environ, stdin, timeout_s)
        if self.ran:
            self.output = io.BytesIO(self.ran[1])

    def __exit__(self, *_: object) -> None:
        if not self.ran:
            super().__exit__()

    def kill(self, reason: str) -> None:
        self.reason = reason
        if not self.ran:
            super().kill(reason)

    def finish(self, output: bytes = b"") -> Any:
        if not self.ran:
            return super().finish(output)
        if self.reason:
            return tenants.Ran(None, output, f"docker {self.reason}")
        return tenants.Ran(self.ran[0], output, self.ran[2])


def in_process(do: Callable[[], int], stdin: bytes) -> tuple[int, bytes, str]:
    """Exit code, output and errors of a program's main."""
    streams = {name: io.TextIOWrapper(io.BytesIO(content), "utf-8", write_through=True)
               for name, content in (("stdin", stdin), ("stdout", b""), ("stderr", b""))}
    with pytest.MonkeyPatch.context() as patch:
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        try:
            code = do()
        except SystemExit as end:
            code = int(end.code or 0)
    buffers: Any = [streams[name].buffer for name in ("stdout", "stderr")]
    output, error = (buffer.getvalue() for buffer in buffers)
    return code, output, error.decode()


def docker(folder: Path, words: Sequence[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_docker, "ROOT", folder)
        return fake_docker.main(list(words))


def connect(script: str, words: Sequence[str], environ: Mapping[str, str]) -> int:
    module = tenants.connect_module(script)
    machine = module.Machine(environ["HOME"], environ, sys.platform, False)
    try:
        return int(module.program(words, machine, module.Terminal("/nowhere")))
    except module.Problem as problem:
        print(f"ocp_connect: {problem}", file=sys.stderr)
        return int(problem.code)


class Lab:
    """The machine, and ocp_tenants at work on it."""

    def __init__(self, folder: Path, server: FakeServer) -> None:
        self.home = folder / "home"
        self.ocp_home = server.folder
        self.server = server
        self.docker = FakeDocker(folder / "docker")
        self.environ = {
            **self.docker.environ, "HOME": str(self.home), "OCP_URL": server.url,
            "OCP_ADMIN_KEY": ADMIN, "OCP_HOME": str(self.ocp_home)}
        self.tree = str(REPO)

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])

    def reach(self, host: str = "172.17.0.1") -> dict[str, str]:
        """What a container needs to reach the server at a host."""
        scheme = self.server.url.partition(":")[0]
        return {f"{scheme}://{host}:{self.port}": self.server.url}

    def world(self, stdin: str = "") -> Any:
        return tenants.World(
            self.environ, str(self.home), io.StringIO(stdin), io.StringIO(), io.StringIO(),
            self.tree, lambda: NOW_S)

    def run(self, *words: str, stdin: str = "") -> Ran:
        """A command, without a terminal."""
        world = self.world(stdin)
        code = tenants.main(words, world)
        return Ran(code, world.stdout.getvalue(), world.stderr.getvalue())

    def json(self, *words: str) -> Json:
        ran = self.run(*words, "--json")
        assert ran.stdout, ran.stderr
        return json.loads(ran.stdout)

    def local(self, entry: str = ".openclaw", text: str = "{}\n") -> Path:
        """Make a local instance; the path of its openclaw.json."""
        path = self.home / entry / "openclaw.json"
        path.parent.mkdir(parents=True)
        path.write_text(text)
        return path

    def names(self) -> list[str]:
        """The instances that are found, `?` after one in doubt."""
        found = self.json("discover")["instances"]
        return sorted(row["name"] + "?" * bool(row["doubt"]) for row in found)

    def tree_of(self, *folders: Path) -> dict[str, tuple[int, bytes]]:
        """Every file below folders, with its mode and content."""
        return {str(path): (path.stat().st_mode, path.read_bytes())
                for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()
                and path.name != "calls.jsonl"}

    def everything(self) -> dict[str, tuple[int, bytes]]:
        return self.tree_of(self.home, self.ocp_home, self.docker.folder)

    def times(self) -> dict[str, int]:
        """When each file was written: one that is written again with its content has another."""
        return {path: os.stat(path).st_mtime_ns for path in self.everything()}


@contextmanager
def tenants_lab(
    folder: Path, quick: bool = True, tls: Optional[ssl.SSLContext] = None
) -> Iterator[Lab]:
    """A Lab whose server listens. Unless it is quick, programs are started as they are."""
    ocp_home = folder / "ocp"
    for each in (ocp_home, folder / "home"):
        os.mkdir(each)
    with fake_server(ocp_home, tls=tls) as server, pytest.MonkeyPatch.context() as patch:
        if quick:
            patch.setattr(tenants, "Running", Quick)
        yield Lab(folder, server)


@contextmanager
def real_docker_lab(folder: Path) -> Iterator[Lab]:
    """A Lab whose docker is docker's own client, over a stand-in for its daemon."""
    if real_client() is None:
        pytest.skip("the docker client is not installed")
    with tenants_lab(folder, quick=False) as lab, fake_engine(folder, lab.docker) as environ:
        lab.environ.update(environ)
        yield lab
