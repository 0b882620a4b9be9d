"""A machine with OpenClaw instances on which ocp_tenants.py works: a home, containers, a server."""

from __future__ import annotations

import io
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from fake_docker import FakeDocker
from fake_tenants_api import ADMIN, FakeServer, fake_server
from processes import Ran
from project import REPO, load_script

Json = Any
tenants = load_script("ocp_tenants")
#: When all commands run.
NOW_S = 1_795_953_600.0


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
        return {f"http://{host}:{self.port}": self.server.url}

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


@contextmanager
def tenants_lab(folder: Path) -> Iterator[Lab]:
    """A Lab whose server listens."""
    ocp_home = folder / "ocp"
    for each in (ocp_home, folder / "home"):
        os.mkdir(each)
    with fake_server(ocp_home) as server:
        yield Lab(folder, server)
