"""A running ocp_server.py on the fake claude, and what it says of its own state."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Sequence, Union

import fake_claude
from forks import Fork, forker
from http_client import Body, Reply, Stream, http_call, http_request
from processes import Ran, descendants, kill_all, processes_with
from project import REPO, clean_env, read_json_lines, run_compiled
from waiting import eventually

Json = Any
FAKE_CLAUDE = REPO / "tests" / "kit" / "fake_claude.py"
Turns = Sequence[Sequence[Mapping[str, Json]]]
#: A server's own process.
Process = Union["subprocess.Popen[bytes]", Fork]


#: Every server asks for the version first, and a shell starts in a thirtieth of Python's time. A
#: scenario with a version of its own has no file .plain.
SHELL_CLAUDE = """\
#!/bin/sh
if [ "$*" = --version ] && [ -e "$FAKE_CLAUDE.plain" ]; then
    echo "{version} (Claude Code)"
    exit
fi
exec {command} "$@"
"""


@functools.cache
def source() -> str:
    """The server's own source."""
    return (REPO / "ocp_server.py").read_text()


class Place:
    """The folder of one server: its home, its fake claude, and what it prints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.home = self.folder / "home"
        self.ocp_home = self.folder / "ocp"
        self.temporary = self.folder / "tmp"
        #: The folder that claude runs in.
        self.work_folder = self.temporary / f"ocp-{os.getuid()}"
        self.claude = self.folder / "claude"
        self.scenario = self.folder / "scenario.json"
        self.fake_log = self.folder / "fake.log"
        self.stdout = self.folder / "stdout.txt"
        self.stderr = self.folder / "stderr.txt"

    def prepare(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        self.temporary.mkdir(exist_ok=True)
        command = shlex.join([sys.executable, "-I", "-S", *run_compiled(FAKE_CLAUDE)])
        # Not over the old one: a claude of the server before may run it for a moment yet.
        draft = self.claude.with_suffix(".new")
        draft.write_text(SHELL_CLAUDE.format(version=fake_claude.VERSION, command=command))
        draft.chmod(0o755)
        draft.replace(self.claude)
        if not self.scenario.exists():
            self.write_scenario([])

    def write_scenario(self, turns: Turns, **fields: Json) -> None:
        """Give the fake claude another script; processes that run already notice it too."""
        # A number in it, because the same script again has to start again.
        fields = {"turns": turns, "written_ns": time.time_ns(), **fields}
        draft = self.scenario.with_suffix(".draft")
        draft.write_text(json.dumps(fields))
        counter = Path(f"{self.scenario}.turns")
        if counter.exists():
            counter.unlink()
        plain = Path(f"{self.scenario}.plain")
        plain.unlink(missing_ok=True)
        os.replace(draft, self.scenario)
        if not {"version", "notice"} & {*fields}:
            plain.touch()

    def env(self, more: Mapping[str, Optional[str]], pass_env: Sequence[str]) -> dict[str, str]:
        """The environment of the server; a None in `more` takes a variable away."""
        unknown = [name for name in more if name.startswith("OCP_") and name not in source()]
        assert not unknown, f"the server has no such settings: {unknown}"
        passed = ["FAKE_CLAUDE", "FAKE_CLAUDE_LOG", *pass_env]
        if more.get("OCP_PASS_ENV"):
            passed.append(str(more["OCP_PASS_ENV"]))
        values: dict[str, Optional[str]] = {
            **clean_env(), "HOME": str(self.home), "OCP_HOME": str(self.ocp_home),
            "TMPDIR": str(self.temporary),
            "CLAUDE_PROXY_PORT": "0", "CLAUDE_BIN": str(self.claude),
            "FAKE_CLAUDE": str(self.scenario), "FAKE_CLAUDE_LOG": str(self.fake_log),
            **more, "OCP_PASS_ENV": ",".join(passed),
        }
        return {name: value for name, value in values.items() if value is not None}


class Server:
    """A running ocp_server.py, from running_server()."""

    def __init__(self, place: Place, process: Process, port: int) -> None:
        self.place = place
        self.process = process
        self.port = port
        self.pid = process.pid
        self.home = place.home
        self.ocp_home = place.ocp_home
        self.url = f"http://127.0.0.1:{port}"

    def __repr__(self) -> str:
        return f"<Server {self.url} pid={self.pid}>"

    # -- as a client -----------------------------------------------------------

    def call(
        self, method: str, path: str, body: Body = None,
        headers: Optional[Mapping[str, str]] = None, timeout_s: float = 60,
    ) -> Reply:
        """One request on a connection of its own. Objects go out as JSON."""
        return http_call(self.port, method, path, body, headers, timeout_s)

    def stream(
        self, path: str, body: Mapping[str, Json],
        headers: Optional[Mapping[str, str]] = None, timeout_s: float = 60,
    ) -> Stream:
        """A POST with "stream": true, once its headers are there; to be used in a `with`."""
        sent = {"stream": True, **body}
        return Stream(http_request(self.port, "POST", path, sent, headers, timeout_s))

    # -- the fake claude -------------------------------------------------------

    def write_scenario(self, turns: Turns, **fields: Json) -> None:
        """Give the fake claude another script, also to processes that run already."""
        self.place.write_scenario(turns, **fields)

    def fake_log(self, event: Optional[str] = None) -> list[dict[str, Json]]:
        """What the fake claudes have logged so far, all of it or one kind of event."""
        logged = read_json_lines(self.place.fake_log)
        return [each for each in logged if event in (None, each["event"])]

    def queries(self) -> list[dict[str, Json]]:
        """The "query" events: every time that the model would have been asked."""
        return self.fake_log("query")

    def lines(self, kind: Optional[str] = None) -> list[dict[str, Json]]:
        """The lines that the server has sent to its fake claudes, all or of one type."""
        lines = [each["line"] for each in self.fake_log("line")]
        return [line for line in lines if kind in (None, line.get("type"))]

    # -- from outside ----------------------------------------------------------

    def children(self) -> list[int]:
        """The pids of the live processes that the server has started, grandchildren too."""
        family = descendants(self.pid)
        zombies = {each.pid for each in family if each.is_zombie}
        marked = processes_with(self.place.folder)
        return sorted(({each.pid for each in family} | marked) - zombies - {self.pid})

    def zombies(self) -> list[int]:
        """The pids of children that have ended but were not waited for."""
        return [each.pid for each in descendants(self.pid) if each.is_zombie]

    def log_entries(self, name: Optional[str] = None) -> list[dict[str, Json]]:
        """The server's own log, all of it or the entries with this value of "event"."""
        entries = read_json_lines(self.ocp_home / "logs" / "ocp.log")
        return [entry for entry in entries if name in (None, entry.get("event"))]

    @property
    def output(self) -> str:
        """What the server has printed so far, stdout first."""
        return output_of(self.place)

    def stop(self, timeout_s: float = 120) -> int:
        """End the server as a service manager does; its exit code. Again: the same code."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """End the server without any warning."""
        self.process.kill()
        self.process.wait()


def output_of(place: Place) -> str:
    texts = [path.read_text(errors="replace") for path in (place.stdout, place.stderr)
             if path.exists()]
    return "\n".join(text for text in texts if text)


@contextmanager
def running_server(
    folder: Path,
    scenario: Union[None, Turns, Mapping[str, Json]] = None,
    claude: Optional[Path] = None,
    env: Optional[Mapping[str, Optional[str]]] = None,
    args: Sequence[str] = (),
    pass_env: Sequence[str] = (),
    script: Path = REPO / "ocp_server.py",
    as_program: bool = False,
) -> Iterator[Server]:
    """A server of one's own on a free port, which is gone at the end of the block.

    folder     holds everything: home, ocp, logs. The same folder again continues with it
    scenario   turns for the fake claude, or a whole scenario; see fake_claude.py
    claude     another program instead of the fake
    env        more variables; None takes one away
    pass_env   names for OCP_PASS_ENV, beside those of the fake
    as_program start the script as people do, for who looks at its command line; see forks.py

    A claude that outlives the server fails the test, and so does a ResourceWarning."""
    place = Place(folder)
    place.prepare()
    if isinstance(scenario, Mapping):
        place.write_scenario(**{"turns": [], **scenario})
    elif scenario is not None:
        place.write_scenario(scenario)
    more = {**({"CLAUDE_BIN": str(claude)} if claude else {}), **(env or {})}
    start = start_program if as_program else start_fork
    process = start(place, script, args, place.env(more, pass_env))
    try:
        server = Server(place, process, wait_for_port(place, process))
        yield server
        server.stop()
        assert_clean_end(server)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        kill_all(sorted(processes_with(place.folder)))


def start_program(
    place: Place, script: Path, arguments: Sequence[str], env: Mapping[str, str]
) -> Process:
    command = [sys.executable, "-W", "error::ResourceWarning", str(script), *arguments]
    with open(place.stdout, "wb") as stdout, open(place.stderr, "wb") as stderr:
        return subprocess.Popen(
            command, env=dict(env), cwd=place.folder, stdin=subprocess.DEVNULL, stdout=stdout,
            stderr=stderr, start_new_session=True)


def start_fork(
    place: Place, script: Path, arguments: Sequence[str], env: Mapping[str, str]
) -> Process:
    for output in (place.stdout, place.stderr):
        output.write_bytes(b"")
    return forker(script).fork(arguments, env, place.folder, place.stdout, place.stderr)


def wait_for_port(place: Place, process: Process, timeout_s: float = 120) -> int:
    """The port in the line that the server prints when it is ready."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        ended = process.poll() is not None
        found = re.search(r"https?://(?:127\.0\.0\.1|\[::1\]):(\d+)", place.stdout.read_text())
        if found:
            return int(found[1])
        if ended:
            raise AssertionError(f"server ended with {process.poll()}:\n{output_of(place)}")
        time.sleep(0.01)
    raise AssertionError(f"server not ready within {timeout_s} s:\n{output_of(place)}")


def assert_clean_end(server: Server) -> None:
    """Raises AssertionError if the server that has ended left anything behind."""
    def nobody_left() -> bool:
        left = processes_with(server.place.folder)
        assert not left, f"processes outlive the server: {sorted(left)}"
        return True

    eventually(nobody_left)
    assert "ResourceWarning" not in server.output, server.output


def run_server(
    folder: Path, *args: str, env: Optional[Mapping[str, Optional[str]]] = None
) -> Ran:
    """Run ocp_server.py to its end in the same surroundings as those of a running server."""
    place = Place(folder)
    place.prepare()
    process = start_fork(place, REPO / "ocp_server.py", args, place.env(env or {}, ()))
    return Ran(process.wait(120), place.stdout.read_text(), place.stderr.read_text())


def health(server: Server) -> dict[str, Json]:
    found: dict[str, Json] = server.call("GET", "/health").json()
    return found


def running(server: Server) -> int:
    return int(health(server)["concurrency"]["inflight"])


def waiting(server: Server) -> int:
    return int(health(server)["concurrency"]["queued"])


def at_rest(server: Server) -> bool:
    """Whether nobody runs or waits."""
    return running(server) == 0 and waiting(server) == 0


def spares(server: Server) -> dict[str, int]:
    return dict(health(server)["spares"])


def asked_process(server: Server, number: int = 1) -> int:
    """The pid of the claude that got this question, counted from 1; waits for it."""
    return int(eventually(lambda: server.queries()[number - 1:number])[0]["pid"])


def last_entry(server: Server, name: str) -> dict[str, Json]:
    """The newest log entry of this name; waits for one."""
    return eventually(lambda: server.log_entries(name))[-1]
