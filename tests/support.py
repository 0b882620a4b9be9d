"""What the tests share: a running server, its replies, the fake claude, and a few waits.

Index: 1 places and small things   2 HTTP   3 processes   4 a running server
       5 claude driven by hand
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import random
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Optional, Sequence, TypeVar, Union

Json = Any
Found = TypeVar("Found")

REPO = Path(__file__).resolve().parent.parent
FAKE_CLAUDE = REPO / "tests" / "fake_claude.py"
#: Where .ci/run installs the two versions of the real program.
REAL_CLAUDES = (".claude-cli/old", ".claude-cli/new")
HOW_TO_INSTALL = "no real claude: run .ci/run once, or name programs in OCP_TEST_CLAUDES"
#: Where .ci/run installs the clients, each folder with node_modules/.bin or bin.
CLIENT_FOLDERS = (".agents", ".agents/python", ".agents/aider", ".openclaw")
NPM, PIP = "npm install --prefix {0} {1}", "python3 -m venv {0} && {0}/bin/pip install {1}"
#: OpenClaw refuses an older node even while it is installed.
NPM_NEWER = ("npm install --prefix {0} node@24 && PATH=$PWD/{0}/node_modules/.bin:$PATH "
             "npm install --prefix {0} {1}")
#: Client, or a library for Python -> the command that installs it, its folder, its packages.
CLIENTS = {
    "codex": (NPM, ".agents", "@openai/codex"),
    "opencode": (NPM, ".agents", "opencode-ai"),
    "cn": (NPM, ".agents", "@continuedev/cli"),
    "cline": (NPM, ".agents", "cline"),
    "llm": (PIP, ".agents/python", "llm"),
    "langchain_openai": (PIP, ".agents/python", "langchain-openai"),
    "openai": (PIP, ".agents/python", "openai"),
    # It asks for old versions of what the others need too.
    "aider": (PIP, ".agents/aider", "aider-chat"),
    "litellm": (PIP, ".agents/aider", "litellm"),
    # Without its version, npm on an older node takes the very first one without a word.
    "openclaw": (NPM_NEWER, ".openclaw", "openclaw@2026.9.6"),
    "node": (NPM, ".openclaw", "node@24"),
}


# ---------------------------------------------------------------------------
# 1 Places and small things
# ---------------------------------------------------------------------------

def eventually(check: Callable[[], Found], timeout_s: float = 25) -> Found:
    """The first true value of `check`, which may also raise AssertionError meanwhile.

    Raises AssertionError when there was none in time. That is long for a busy machine, and less
    than the pauses of the server that a test may want to tell from at once."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        failure: Optional[AssertionError] = None
        try:
            found = check()
            if found:
                return found
        except AssertionError as error:
            failure = error
        if time.monotonic() > deadline_s:
            raise failure or AssertionError(f"not within {timeout_s} s: {check}")
        time.sleep(0.01)


def free_port() -> int:
    """A port that nobody has, for a server that is started later. It is none of those that the
    system gives to whoever asks for any: others would get it meanwhile."""
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue  # Somebody has it.
            return port


def load_script(name: str) -> ModuleType:
    """A top-level script as a module, loaded once. Its name with or without the last ".py"."""
    path = REPO / name if name.endswith(".py") else REPO / f"{name}.py"
    module_name = path.stem.replace(".", "_")
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up there while it is being executed.
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    return sys.modules[module_name]


def real_claudes() -> list[tuple[str, Path]]:
    """(version, path) of every real claude that contract tests can use."""
    named = os.environ.get("OCP_TEST_CLAUDES")
    if named:
        paths = [Path(path) for path in named.split(os.pathsep)]
    else:
        programs = [REPO / folder / "node_modules/.bin/claude" for folder in REAL_CLAUDES]
        paths = [path for path in programs if path.exists()]
    return [(claude_version(path), path) for path in paths]


def client_folders() -> list[Path]:
    """Where clients are looked for: the folders in OCP_TEST_AGENTS, else those of .ci/run."""
    named = os.environ.get("OCP_TEST_AGENTS")
    folders = named.split(os.pathsep) if named else CLIENT_FOLDERS
    return [REPO / folder for folder in folders if folder]


def find_client(name: str) -> Optional[Path]:
    """The path of a client, None if it is nowhere.

    Only what was installed for the tests is taken, whatever else the machine has."""
    places = ("node_modules/.bin", "bin")
    paths = [folder / place / name for folder in client_folders() for place in places]
    return next((path for path in paths if path.exists()), None)


def how_to_install(name: str) -> str:
    """The reason of a test that is skipped because a client or a library is not there."""
    command, folder, packages = CLIENTS[name]
    return (f"no {name}: run .ci/run once, or {command.format(folder, packages)}, "
            "or name folders in OCP_TEST_AGENTS")


def claude_version(path: Path) -> str:
    shown = subprocess.run(
        [str(path), "--version"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        env=clean_env(), timeout=30, check=True)
    return shown.stdout.decode().split()[0]


def clean_env(**more: str) -> dict[str, str]:
    """The few inherited variables that a program needs, and `more`."""
    kept = ("PATH", "LANG", "VIRTUAL_ENV")
    inherited = {name: os.environ[name] for name in kept if name in os.environ}
    return {"LANG": "C.UTF-8", **inherited, **more}


def real_claude_env(stub_url: str) -> dict[str, str]:
    """What a real claude needs to talk to a stub of the API instead of the API."""
    return {
        "ANTHROPIC_BASE_URL": stub_url,
        "CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-test",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }


def read_json_lines(path: Path) -> list[Json]:
    """The complete lines of a file, [] if it does not exist."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


# ---------------------------------------------------------------------------
# 2 HTTP
# ---------------------------------------------------------------------------

Body = Union[None, bytes, str, Mapping[str, Json], Sequence[Json]]


class SseParser:
    """Server-sent events out of lines: (name, data) each.

    The name is "message" if the server gave none, the data is parsed if it is JSON."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Json]] = []
        self.comments: list[str] = []
        self._name = "message"
        self._data: list[str] = []

    def feed(self, line: bytes) -> Optional[tuple[str, Json]]:
        """Take one line; the event that it completes, if any."""
        text = line.rstrip(b"\r\n").decode()
        field, _, value = text.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if text.startswith(":"):
            self.comments.append(value)
        elif field == "event":
            self._name = value
        elif field == "data":
            self._data.append(value)
        elif not text and self._data:
            event = (self._name, _parsed("\n".join(self._data)))
            self._name, self._data = "message", []
            self.events.append(event)
            return event
        return None


def _parsed(data: str) -> Json:
    try:
        return json.loads(data)
    except ValueError:
        return data


class Reply:
    """A complete answer."""

    def __init__(self, status: int, headers: http.client.HTTPMessage, body: bytes) -> None:
        self.status = status
        #: Names in any case; [] gives None for a header that is not there.
        self.headers = headers
        self.body = body

    def __repr__(self) -> str:
        return f"<Reply {self.status} {self.body[:300]!r}>"

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Json:
        return json.loads(self.body)

    def _parsed_sse(self) -> SseParser:
        parser = SseParser()
        for line in self.body.split(b"\n"):
            parser.feed(line)
        return parser

    @property
    def events(self) -> list[tuple[str, Json]]:
        """The body as server-sent events: (name, parsed data or "[DONE]")."""
        return self._parsed_sse().events

    @property
    def comments(self) -> list[str]:
        """The comment lines of a body of server-sent events."""
        return self._parsed_sse().comments


class Stream:
    """A streamed answer, event by event. Leaving the `with` block hangs up."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection
        self._response = connection.getresponse()
        self._parser = SseParser()
        self.status = self._response.status
        self.headers = self._response.headers

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[str, Json]]:
        """The events as they come, until the answer ends."""
        for line in iter(self._response.readline, b""):
            event = self._parser.feed(line)
            if event:
                yield event

    @property
    def comments(self) -> list[str]:
        """The comments so far."""
        return self._parser.comments

    def read(self) -> bytes:
        """What is left of the body as it is, for an answer that is not a stream."""
        return self._response.read()

    def close(self) -> None:
        self._response.close()
        self._connection.close()


def http_request(
    port: int, method: str, path: str, body: Body = None,
    headers: Optional[Mapping[str, str]] = None, timeout_s: float = 30,
) -> http.client.HTTPConnection:
    """A connection on which the request has been sent. Objects go out as JSON."""
    sent = dict(headers or {})
    if body is not None and not isinstance(body, (bytes, str)):
        body = json.dumps(body)
    content = body.encode() if isinstance(body, str) else body
    if content is not None and "content-type" not in (name.lower() for name in sent):
        sent["Content-Type"] = "application/json"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    connection.request(method, path, content, sent)
    return connection


def http_call(
    port: int, method: str, path: str, body: Body = None,
    headers: Optional[Mapping[str, str]] = None, timeout_s: float = 30,
) -> Reply:
    connection = http_request(port, method, path, body, headers, timeout_s)
    try:
        response = connection.getresponse()
        return Reply(response.status, response.headers, response.read())
    finally:
        connection.close()


def raw_http(port: int, request: bytes, timeout_s: float = 30) -> bytes:
    """Everything that comes back for these bytes until the server closes, or the time is up."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        deadline_s = time.monotonic() + timeout_s
        try:
            connection.sendall(request)
            while time.monotonic() < deadline_s:
                connection.settimeout(max(0.001, deadline_s - time.monotonic()))
                piece = connection.recv(1 << 16)
                if not piece:
                    break
                received += piece
        except (socket.timeout, ConnectionError):
            pass  # What came before is the answer.
    return received


# ---------------------------------------------------------------------------
# 3 Processes
# ---------------------------------------------------------------------------

class Process(NamedTuple):
    pid: int
    parent: int
    is_zombie: bool


def all_processes() -> list[Process]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The command is in brackets and may itself contain brackets and spaces.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # It ended meanwhile.
        found.append(Process(int(folder.name), int(fields[1]), fields[0] == "Z"))
    return found


def descendants(pid: int) -> list[Process]:
    """The children of a process, their children, and so on; zombies too."""
    processes = all_processes()
    family = {pid}
    grown = True
    while grown:
        more = {each.pid for each in processes if each.parent in family} - family
        family |= more
        grown = bool(more)
    return [each for each in processes if each.pid in family and each.pid != pid]


def processes_with(folder: Path) -> set[int]:
    """The pids of all processes that were started with this folder in their environment."""
    needle = str(folder).encode() + b"/"
    found = set()
    for process in all_processes():
        try:
            if needle in Path(f"/proc/{process.pid}/environ").read_bytes():
                found.add(process.pid)
        except OSError:
            continue  # It ended meanwhile, or belongs to somebody else.
    return found - {os.getpid()}


def kill_all(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


# ---------------------------------------------------------------------------
# 4 A running server
# ---------------------------------------------------------------------------

Turns = Sequence[Sequence[Mapping[str, Json]]]


class Place:
    """The folder of one server: its home, its fake claude, and what it prints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.home = self.folder / "home"
        self.ocp_home = self.folder / "ocp"
        self.claude = self.folder / "claude"
        self.scenario = self.folder / "scenario.json"
        self.fake_log = self.folder / "fake.log"
        self.stdout = self.folder / "stdout.txt"
        self.stderr = self.folder / "stderr.txt"

    def prepare(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        program = shlex.quote(str(FAKE_CLAUDE))
        python = shlex.quote(sys.executable)
        self.claude.write_text(f'#!/bin/sh\nexec {python} -I -S {program} "$@"\n')
        self.claude.chmod(0o755)
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
        os.replace(draft, self.scenario)

    def env(self, more: Mapping[str, Optional[str]], pass_env: Sequence[str]) -> dict[str, str]:
        """The environment of the server; a None in `more` takes a variable away."""
        passed = ["FAKE_CLAUDE", "FAKE_CLAUDE_LOG", *pass_env]
        if more.get("OCP_PASS_ENV"):
            passed.append(str(more["OCP_PASS_ENV"]))
        values: dict[str, Optional[str]] = {
            **clean_env(), "HOME": str(self.home), "OCP_HOME": str(self.ocp_home),
            "CLAUDE_PROXY_PORT": "0", "CLAUDE_BIN": str(self.claude),
            "FAKE_CLAUDE": str(self.scenario), "FAKE_CLAUDE_LOG": str(self.fake_log),
            **more, "OCP_PASS_ENV": ",".join(passed),
        }
        return {name: value for name, value in values.items() if value is not None}


class Server:
    """A running ocp_server.py, from running_server()."""

    def __init__(self, place: Place, process: subprocess.Popen[bytes], port: int) -> None:
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
        headers: Optional[Mapping[str, str]] = None, timeout_s: float = 30,
    ) -> Reply:
        """One request on a connection of its own. Objects go out as JSON."""
        return http_call(self.port, method, path, body, headers, timeout_s)

    def stream(
        self, path: str, body: Mapping[str, Json],
        headers: Optional[Mapping[str, str]] = None, timeout_s: float = 30,
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

    def stop(self, timeout_s: float = 30) -> int:
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
) -> Iterator[Server]:
    """A server of one's own on a free port, which is gone at the end of the block.

    folder     holds everything: home, ocp, logs. The same folder again continues with it
    scenario   turns for the fake claude, or a whole scenario; see fake_claude.py
    claude     another program instead of the fake
    env        more variables; None takes one away
    pass_env   names for OCP_PASS_ENV, beside those of the fake

    A claude that outlives the server fails the test, and so does a ResourceWarning."""
    place = Place(folder)
    place.prepare()
    if isinstance(scenario, Mapping):
        place.write_scenario(**{"turns": [], **scenario})
    elif scenario is not None:
        place.write_scenario(scenario)
    more = {**({"CLAUDE_BIN": str(claude)} if claude else {}), **(env or {})}
    process = start_script(place, script, args, place.env(more, pass_env))
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


def start_script(
    place: Place, script: Path, args: Sequence[str], env: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "error::ResourceWarning", str(script), *args]
    with open(place.stdout, "wb") as stdout, open(place.stderr, "wb") as stderr:
        return subprocess.Popen(
            command, env=dict(env), cwd=place.folder, stdin=subprocess.DEVNULL, stdout=stdout,
            stderr=stderr, start_new_session=True)


def wait_for_port(place: Place, process: subprocess.Popen[bytes], timeout_s: float = 30) -> int:
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


def run_script(
    folder: Path, name: str, *args: str, env: Optional[Mapping[str, Optional[str]]] = None,
    stdin: bytes = b"", timeout_s: float = 30,
) -> subprocess.CompletedProcess[bytes]:
    """Run a top-level script to its end in the same surroundings as a server's."""
    place = Place(folder)
    place.prepare()
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", str(REPO / name), *args], input=stdin,
        env=place.env(env or {}, ()), cwd=place.folder, capture_output=True, timeout=timeout_s)


# ---------------------------------------------------------------------------
# 5 Claude driven by hand
# ---------------------------------------------------------------------------

CLAUDE_ARGS = (
    "-p", "--input-format", "stream-json", "--output-format", "stream-json", "--verbose",
    "--include-partial-messages", "--model", "claude-sonnet-4-6", "--tools", "",
    "--strict-mcp-config", "--setting-sources", "", "--disable-slash-commands",
    "--allowedTools", "mcp__client",
)


class ClaudeDriver:
    """One claude process, real or fake, spoken to line by line; to be used in a `with`.

    tools   what the client's tool server lists. Its calls wait in `calls` for answer_call()"""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], cwd: Path,
        tools: Sequence[Mapping[str, Json]] = (),
    ) -> None:
        self.tools = tools
        self.calls: list[dict[str, Json]] = []
        #: Every line so far.
        self.lines: list[dict[str, Json]] = []
        self._unread = b""
        self._requests = 0
        self.process = subprocess.Popen(
            list(command), env=dict(env), cwd=cwd, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def __enter__(self) -> ClaudeDriver:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        # Killed at once, a real one leaves its socket and its session key behind.
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass

    # -- lines in --------------------------------------------------------------

    def send_bytes(self, content: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(content)
        self.process.stdin.flush()

    def send(self, line: Mapping[str, Json]) -> None:
        self.send_bytes(json.dumps(line).encode() + b"\n")

    def send_user(self, content: Json, **fields: Json) -> None:
        message = {"role": "user", "content": content}
        self.send({"type": "user", "message": message, "parent_tool_use_id": None,
                   "session_id": "default", "client_composed": True, **fields})

    def send_assistant(self, content: Json) -> None:
        message = {"role": "assistant", "content": content, "id": f"msg_{os.urandom(8).hex()}"}
        self.send({"type": "assistant", "message": message, "parent_tool_use_id": None,
                   "session_id": "default"})

    def close_stdin(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()

    # -- whole exchanges -------------------------------------------------------

    def control(self, subtype: str, **fields: Json) -> dict[str, Json]:
        """The `response` of the control_response to this request."""
        self._requests += 1
        request_id = f"test-{self._requests}"
        request = {"subtype": subtype, **fields}
        self.send({"type": "control_request", "request_id": request_id, "request": request})

        def is_answer(line: dict[str, Json]) -> bool:
            answered = line["type"] == "control_response"
            return answered and bool(line["response"]["request_id"] == request_id)

        response: dict[str, Json] = self.until(is_answer)[-1]["response"]
        return response

    def past(self, content: Json) -> list[dict[str, Json]]:
        """Put a user message into the history; the lines that came for it."""
        self.send_user(content, shouldQuery=False)
        return self.until_result()

    def turn(self, content: Json, **fields: Json) -> list[dict[str, Json]]:
        """Send a user message; all lines up to the result."""
        self.send_user(content, **fields)
        return self.until_result()

    def answer_call(self, content: Json, **fields: Json) -> None:
        """Give the client's oldest unanswered tool call its result."""
        self._answer_mcp(self.calls.pop(0), {"content": content, **fields})

    def _answer_mcp(self, request: dict[str, Json], result: Json) -> None:
        message = request["request"]["message"]
        reply = {"jsonrpc": "2.0", "id": message.get("id", 0), "result": result}
        self.send({"type": "control_response", "response": {
            "subtype": "success", "request_id": request["request_id"],
            "response": {"mcp_response": reply}}})

    def _take_request(self, line: dict[str, Json]) -> None:
        message = line["request"]["message"]
        method = message["method"]
        if method == "tools/call":
            self.calls.append(line)
        elif method == "tools/list":
            self._answer_mcp(line, {"tools": list(self.tools)})
        elif method == "initialize":
            self._answer_mcp(line, {
                "protocolVersion": message["params"]["protocolVersion"],
                "capabilities": {"tools": {}}, "serverInfo": {"name": "test", "version": "1"}})
        else:
            self._answer_mcp(line, {})

    # -- lines out -------------------------------------------------------------

    def until_result(self, timeout_s: float = 60) -> list[dict[str, Json]]:
        return self.until(lambda line: line["type"] == "result", timeout_s)

    def until_event(self, kind: str, timeout_s: float = 60) -> list[dict[str, Json]]:
        """The lines up to this event of the API's stream."""
        def is_event(line: dict[str, Json]) -> bool:
            return line["type"] == "stream_event" and bool(line["event"]["type"] == kind)

        return self.until(is_event, timeout_s)

    def until(
        self, wanted: Callable[[dict[str, Json]], bool], timeout_s: float = 60
    ) -> list[dict[str, Json]]:
        """The lines from here up to the wanted one; tool servers are answered meanwhile."""
        deadline_s = time.monotonic() + timeout_s
        came = []
        while True:
            line = self.next_line(deadline_s)
            came.append(line)
            if line["type"] == "control_request":
                self._take_request(line)
            if wanted(line):
                return came

    def next_line(self, deadline_s: float) -> dict[str, Json]:
        """The next line; raises AssertionError when there is none in time."""
        assert self.process.stdout
        while b"\n" not in self._unread:
            left_s = max(0.0, deadline_s - time.monotonic())
            ready = select.select([self.process.stdout], [], [], left_s)[0]
            piece = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            if not piece:
                state = "ended" if ready else "silent"
                shown = "\n".join(json.dumps(line)[:300] for line in self.lines[-20:])
                raise AssertionError(f"claude is {state}, after:\n{shown}")
            self._unread += piece
        text, _, self._unread = self._unread.partition(b"\n")
        line: dict[str, Json] = json.loads(text)
        self.lines.append(line)
        return line

    def raw_output(self, count: int) -> bytes:
        """What comes on stdout, whatever it is: so many bytes, and what comes with them."""
        assert self.process.stdout
        output, self._unread = self._unread, b""
        while len(output) < count and select.select([self.process.stdout], [], [], 60)[0]:
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            if not piece:
                break
            output += piece
        return output

    def wait(self, timeout_s: float = 30) -> tuple[int, str]:
        """The exit code and what was on stderr, once the process has ended."""
        code = self.process.wait(timeout_s)
        assert self.process.stderr
        return code, self.process.stderr.read().decode()
