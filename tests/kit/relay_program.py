"""A program in the place of docker or openclaw, for tests of the server's own tools.

It writes down each call, and then does what a test has put into does.py beside it."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from project import read_json_lines

Json = Any

_PROGRAM = """#!{python} -SE
import json, os, sys
place = {place!r}
call = {{"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid(), "cwd": os.getcwd(),
        "session": os.getsid(0), "stdin": sys.stdin.read()}}
with open(place + "/calls.jsonl", "a") as file:
    file.write(json.dumps(call) + "\\n")
exec(open(place + "/does.py").read())
"""


_ASKS = """
import urllib.request
request = urllib.request.Request({url!r}, json.dumps({{"model": "sonnet", "messages": [
    {{"role": "user", "content": "from the command"}}]}}).encode(),
    {{"Authorization": "Bearer {key}", "Content-Type": "application/json"}})
print(json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["message"]["content"])
"""


def asks(url: str, key: str) -> str:
    """What makes a call ask a server with a key, and print the answer."""
    return _ASKS.format(url=url, key=key)


class RelayProgram:
    """Such a program, called `name`, in a folder of its own."""

    def __init__(self, folder: Path, name: str = "docker", does: str = "print('no jobs')") -> None:
        self.folder = folder / "relay"
        self.folder.mkdir()
        self.path = self.folder / name
        self.path.write_text(_PROGRAM.format(python=sys.executable, place=str(self.folder)))
        self.path.chmod(0o700)
        self.does(does)

    def does(self, code: str) -> None:
        """Set what a call does once it is written down. `place` is the folder."""
        (self.folder / "does.py").write_text(code)

    @property
    def calls(self) -> list[dict[str, Json]]:
        path = self.folder / "calls.jsonl"
        return list(read_json_lines(path)) if path.exists() else []

    def env(self, **more: str) -> dict[str, str]:
        """The settings of a server of tenants that reaches containers by this program."""
        return {"OCP_TENANT_LEVEL": "tools", "OCP_DOCKER": str(self.path), **more}
