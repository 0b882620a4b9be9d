"""What the benchmarks share: the programs under test, a timing client, figures and tables.

Everything runs on this machine: the API is tests/kit/stub_api.py in a process of its own, OCP is
the ocp_server.py of this repository with an empty home, and claude is a real one. The claude that
is driven by hand gets the arguments and the environment that a running OCP was seen to give to
its own (record_spawn), so that the two differ in nothing but OCP.

Index: 1 places   2 the stand-in for the API   3 OCP   4 a client with a watch
       5 claude without OCP   6 figures, tables, and what the programs print
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import re
import select
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

Json = Any

REPO = Path(__file__).resolve().parent.parent
FAKE_CLAUDE = REPO / "tests" / "kit" / "fake_claude.py"
STUB_API = REPO / "tests" / "kit" / "stub_api.py"
QUESTION = "What is the capital of France?"
#: No step of a benchmark takes longer, not even on a busy machine.
PATIENCE_S = 60.0
ADMIN_KEY = "the-admin-key-of-the-benchmark"
#: The age from which a claude process counts as started, also on a busy machine.
SETTLED_S = 3.0


class BenchError(Exception):
    """The measurement cannot go on; the message says why."""


class Timing(NamedTuple):
    """One answer: seconds from the question to its first word, and to its end."""

    first_s: float
    total_s: float
    #: To the first piece of thinking that was streamed; None = none came before the text.
    thought_s: float | None = None


# ---------------------------------------------------------------------------
# 1 Places
# ---------------------------------------------------------------------------

def find_claude(named: str) -> Path:
    """The claude program: the one named, else the one on PATH. Raises BenchError."""
    found = shutil.which(os.path.expanduser(named or "claude"))
    if found is None:
        raise BenchError("no claude program: name it with --claude PATH")
    return Path(os.path.abspath(found))


def write_fake_claude(folder: Path) -> Path:
    """A program in `folder` that starts the tests' fake claude: it answers without any API."""
    program = folder / "fake-claude"
    words = " ".join(shlex.quote(word) for word in (sys.executable, "-E", "-S", str(FAKE_CLAUDE)))
    program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    program.chmod(0o755)
    return program


def clean_environment(folder: Path, api_url: str) -> dict[str, str]:
    """What a server that nobody has set up yet has in its environment; the home is empty."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return {
        **kept,
        "HOME": str(home),
        "ANTHROPIC_BASE_URL": api_url,
        "CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-for-the-stub",
    }


def clean_up_at_the_end() -> None:
    """Lets a SIGTERM, too, end whatever the benchmark has started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def end(process: subprocess.Popen[bytes], patience_s: float = 10.0) -> None:
    """Waits for a process that was told to end, and kills it when it does not."""
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def line_within(process: subprocess.Popen[bytes], pattern: str, what: str) -> re.Match[str]:
    """The first match in a line of the output of a program that starts. Raises BenchError."""
    if process.stdout is None:
        raise BenchError(f"{what} has no output to read")
    give_up_s = time.monotonic() + PATIENCE_S
    while select.select([process.stdout], [], [], max(0.0, give_up_s - time.monotonic()))[0]:
        line = process.stdout.readline()
        found = re.search(pattern, line.decode("utf-8", "replace"))
        if found:
            return found
        if not line:
            break
    process.kill()
    process.wait()
    raise BenchError(f"{what} does not start")


# ---------------------------------------------------------------------------
# 2 The stand-in for the API
# ---------------------------------------------------------------------------

class Stub:
    """tests/kit/stub_api.py as a process of its own; to be used in a `with`."""

    def __init__(
        self, folder: Path, *, delay_ms: float = 0.0, think_ms: float = 0.0, log: bool = False
    ) -> None:
        """`delay_ms` is the silence of the API before its first byte, `think_ms` how long it thinks
        before the text at an effort above low; `log` keeps sizes."""
        command = [
            sys.executable, str(STUB_API), "--delay-ms", str(delay_ms), "--think-ms", str(think_ms)]
        self._log = folder / "stub.jsonl"
        if log:
            command += ["--log", str(self._log)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0)
        self.url = line_within(self._process, r"http://\S+", "the stand-in for the API")[0]

    def __enter__(self) -> Stub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        end(self._process)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def sizes(self) -> list[int]:
        """The bytes of each request body so far, in order. Needs `log`."""
        if not self._log.exists():
            return []
        lines = self._log.read_bytes().split(b"\n")[:-1]
        return [json.loads(line)["size_bytes"] for line in lines]


# ---------------------------------------------------------------------------
# 3 OCP
# ---------------------------------------------------------------------------

class Memory(NamedTuple):
    """What a process occupies: all of it, and its share of what it has in common with others."""

    rss_bytes: int
    pss_bytes: int


def memory_of(pid: int) -> Memory | None:
    """From the kernel's books; None where they are not kept (only Linux does)."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return None
    found = dict(re.findall(r"^(Rss|Pss):\s+(\d+) kB", text, re.MULTILINE))
    return Memory(int(found.get("Rss", 0)) * 1024, int(found.get("Pss", 0)) * 1024)


_Server = TypeVar("_Server", bound="Ocp")


class Ocp:
    """ocp_server.py on a free port; to be used in a `with`."""

    def __init__(
        self, folder: Path, claude: Path, model: str, environ: Mapping[str, str],
        settings: Mapping[str, str] | None = None, tree: Path = REPO,
    ) -> None:
        """`environ` is from clean_environment; `settings` are more variables; `tree` is the folder
        of another version to run."""
        passed = {
            **environ, "CLAUDE_BIN": str(claude), "CLAUDE_PROXY_PORT": "0",
            "OCP_HOME": str(folder / "ocp"), "OCP_DEFAULT_MODEL": model,
            "OCP_PASS_ENV": "ANTHROPIC_BASE_URL", **(settings or {}),
        }
        with open(folder / "ocp.stderr", "ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, str(tree / "ocp_server.py")], env=passed, cwd=folder,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, bufsize=0)
        self.pid = self._process.pid
        self.port = int(line_within(self._process, r"http://127\.0\.0\.1:(\d+)", "OCP")[1])
        self.model_id = str(self.get(f"/v1/models/{model}")["id"])

    def __enter__(self: _Server) -> _Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        end(self._process, 30.0)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def get(self, path: str) -> dict[str, Json]:
        """The JSON of a GET. Raises BenchError when OCP refuses it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            found = json.loads(response.read())
        if response.status != 200 or not isinstance(found, dict):
            raise BenchError(f"OCP answers {path} with {response.status}: {found}")
        return found

    def spawned(self) -> int:
        """How many claude processes it has started so far."""
        return int(self.get("/health")["stats"]["spawned"])

    def wait_until_ready(self, age_s: float = SETTLED_S) -> None:
        """Returns when a spare of the model waits that was there `age_s` ago, and nothing runs."""
        give_up_s = time.monotonic() + PATIENCE_S
        seen: tuple[int, float] | None = None
        while time.monotonic() < give_up_s:
            health = self.get("/health")
            spawned = int(health["stats"]["spawned"])
            busy = health["stats"]["activeRequests"] or not health["spares"].get(self.model_id)
            if busy or seen is None or seen[0] != spawned:
                seen = None if busy else (spawned, time.monotonic())
            elif time.monotonic() - seen[1] >= age_s:
                return
            time.sleep(0.05 if seen is None else age_s / 3)
        raise BenchError("OCP keeps no spare ready: see ocp.stderr, or is the machine too busy?")


class KeyedOcp(Ocp):
    """OCP in mode multi; what is asked here is asked by the operator."""

    def __init__(
        self, folder: Path, claude: Path, model: str, environ: Mapping[str, str],
        settings: Mapping[str, str] | None = None, tree: Path = REPO,
    ) -> None:
        """See Ocp."""
        keyed = {"CLAUDE_AUTH_MODE": "multi", "OCP_ADMIN_KEY": ADMIN_KEY, **(settings or {})}
        super().__init__(folder, claude, model, environ, keyed, tree)

    def call(self, method: str, path: str, body: Json = None, key: str = ADMIN_KEY) -> Json:
        """The JSON of an answer. Raises BenchError when OCP refuses."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            content = None if body is None else json.dumps(body).encode("utf-8")
            connection.request(method, path, content, {"Authorization": f"Bearer {key}"})
            response = connection.getresponse()
            found = json.loads(response.read())
        if response.status >= 300:
            raise BenchError(f"OCP answers {path} with {response.status}: {found}")
        return found

    def get(self, path: str) -> dict[str, Json]:
        """See Ocp."""
        found: dict[str, Json] = self.call("GET", path)
        return found

    def new_key(self, name: str) -> str:
        """A key for clients."""
        return str(self.call("POST", "/api/keys", {"name": name})["key"])


# ---------------------------------------------------------------------------
# 4 A client with a watch
# ---------------------------------------------------------------------------

class Refused(Exception):
    """OCP answered with an error; the first argument is a short name for it."""


class Client:
    """A connection to OCP on which one question is asked at a time."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)

    def close(self) -> None:
        """Hangs up."""
        self._connection.close()

    def ask(self, model: str, question: str = QUESTION, **options: Json) -> Timing:
        """One streamed answer, timed from before connecting. Raises Refused."""
        messages = [{"role": "user", "content": question}]
        body = json.dumps({"model": model, "stream": True, "messages": messages, **options})
        started_s = time.perf_counter()
        try:
            self._connection.request("POST", "/v1/chat/completions", body.encode("utf-8"))
            response = self._connection.getresponse()
            if response.status != 200:
                response.read()
                raise Refused(f"status {response.status}")
            thought_at_s, first_at_s = self._first_pieces(response)
            rest = response.read()
        except (OSError, http.client.HTTPException) as problem:
            self.close()
            raise Refused(type(problem).__name__) from problem
        if not rest.endswith(b"data: [DONE]\n\n"):
            raise Refused("unfinished answer")
        thought_s = thought_at_s - started_s if thought_at_s else None
        return Timing(first_at_s - started_s, time.perf_counter() - started_s, thought_s)

    def _first_pieces(self, response: http.client.HTTPResponse) -> tuple[float | None, float]:
        """When the first pieces of thinking and of text were there. The role alone is no text."""
        thought_at_s = None
        for line in iter(response.readline, b""):
            choices = json.loads(line[6:]).get("choices") if line.startswith(b"data: {") else None
            delta = choices[0]["delta"] if choices else {}
            if delta.get("content"):
                return thought_at_s, time.perf_counter()
            if delta.get("reasoning_content") and thought_at_s is None:
                thought_at_s = time.perf_counter()
        raise Refused("no word")


# ---------------------------------------------------------------------------
# 5 Claude without OCP
# ---------------------------------------------------------------------------

class Spawn(NamedTuple):
    """How a claude process is started."""

    claude: Path
    arguments: Sequence[str]
    environ: Mapping[str, str]
    #: Where it runs: an empty folder.
    folder: Path


#: Notes how it is started, and becomes the program that OCP believes it to be.
_RECORDER = """#!{python}
import json, os, sys
if "--input-format" in sys.argv:
    with open({note!r} + ".draft", "w") as note:
        json.dump([sys.argv[1:], dict(os.environ)], note)
    os.replace({note!r} + ".draft", {note!r})
os.execv({claude!r}, [{claude!r}, *sys.argv[1:]])
"""


def record_spawn(folder: Path, claude: Path, model: str, environ: Mapping[str, str]) -> Spawn:
    """How OCP starts its claude processes, from one that it was let start. Takes a second."""
    place = folder / "record"
    empty = place / "empty"
    empty.mkdir(parents=True)
    recorder, note = place / "claude", place / "note.json"
    names = {"python": sys.executable, "note": str(note), "claude": str(claude)}
    recorder.write_text(_RECORDER.format(**names))
    recorder.chmod(0o755)
    with Ocp(place, recorder, model, environ) as ocp:
        ocp.wait_until_ready(0.0)
        give_up_s = time.monotonic() + PATIENCE_S
        while not note.exists() and time.monotonic() < give_up_s:
            time.sleep(0.02)
    if not note.exists():
        raise BenchError("OCP starts no claude process")
    arguments, seen = json.loads(note.read_text())
    return Spawn(claude, arguments, seen, empty)


def plain_spawn(spawn: Spawn, model_id: str, environ: Mapping[str, str]) -> Spawn:
    """How somebody starts claude who does without OCP and its options.

    Only what would leave this machine is turned off."""
    arguments = [
        "-p", "--input-format", "text", "--output-format", "stream-json", "--verbose",
        "--include-partial-messages", "--model", model_id,
    ]
    quiet = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1"}
    return spawn._replace(arguments=arguments, environ={**environ, **quiet})


def opening_bytes(question: str = QUESTION) -> bytes:
    """The least that a fresh process has to be told to answer a one-line question."""
    request: Json = {"subtype": "initialize", "systemPrompt": [], "hooks": None}
    line = {"type": "control_request", "request_id": "r1", "request": request}
    return json.dumps(line).encode("utf-8") + b"\n" + question_bytes(question)


def question_bytes(question: str) -> bytes:
    """The line that asks."""
    line = {
        "type": "user",
        "message": {"role": "user", "content": [{"type": "text", "text": question}]},
        "parent_tool_use_id": None,
        "session_id": "default",
        "client_composed": True,
    }
    return json.dumps(line).encode("utf-8") + b"\n"


def is_first_word(line: bytes) -> bool:
    """Whether this line of claude's carries a piece of text of the answer."""
    if b"text_delta" not in line:
        return False
    event = json.loads(line).get("event") or {}
    return bool((event.get("delta") or {}).get("text"))


class WarmClaude:
    """A claude process that waits for its question, as OCP keeps them; used in a `with`."""

    def __init__(self, spawn: Spawn) -> None:
        self.born_s = time.monotonic()
        self._process = subprocess.Popen(
            [str(spawn.claude), *spawn.arguments], env=dict(spawn.environ), cwd=spawn.folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            start_new_session=True)
        if self._process.stdout is None:
            raise BenchError("claude has no output")
        self._lines = _lines(self._process.stdout.fileno())

    def __enter__(self) -> WarmClaude:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        end(self._process)

    def ask(self, question: str = QUESTION) -> Timing:
        """The answer to its first question, timed from before writing it. Raises BenchError."""
        return self._answer(opening_bytes(question))

    def ask_again(self, question: str) -> Timing:
        """The same for a later question of the conversation."""
        return self._answer(question_bytes(question))

    def _answer(self, lines: bytes) -> Timing:
        if self._process.stdin is None:
            raise BenchError("claude has no input")
        started_s = time.perf_counter()
        self._process.stdin.write(lines)
        return _timed_lines(self._lines, started_s, b'"type":"result"')


def cold_command(spawn: Spawn, question: str = QUESTION) -> list[str]:
    """`claude -p` with the question on its command line, and otherwise the same arguments."""
    arguments = list(spawn.arguments)
    at = arguments.index("--input-format")
    del arguments[at:at + 2]
    # Some options take any number of words: the question must not come after one of those.
    return [str(spawn.claude), "-p", question, *(word for word in arguments if word != "-p")]


def ask_cold(spawn: Spawn, question: str = QUESTION) -> Timing:
    """One `claude -p` from its start to its exit. Raises BenchError."""
    command = cold_command(spawn, question)
    started_s = time.perf_counter()
    process = subprocess.Popen(
        command, env=dict(spawn.environ), cwd=spawn.folder, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, start_new_session=True)
    try:
        if process.stdout is None:
            raise BenchError("claude has no output")
        with process.stdout:
            timing = _timed_lines(_lines(process.stdout.fileno()), started_s, b"")
    finally:
        end(process)
    return Timing(timing.first_s, time.perf_counter() - started_s)


def _timed_lines(lines: Iterator[bytes], started_s: float, last: bytes) -> Timing:
    """Reads up to a line with `last` in it, or to the end if that is empty."""
    first_s: float | None = None
    for line in lines:
        if first_s is None and is_first_word(line):
            first_s = time.perf_counter() - started_s
        if last and last in line:
            break
    if first_s is None:
        raise BenchError("claude gave no answer")
    return Timing(first_s, time.perf_counter() - started_s)


def _lines(descriptor: int) -> Iterator[bytes]:
    """The lines of a pipe, each at the moment when it is there."""
    unread = b""
    while True:
        if not select.select([descriptor], [], [], PATIENCE_S)[0]:
            raise BenchError("claude is silent")
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            return
        *lines, unread = (unread + piece).split(b"\n")
        yield from lines


# ---------------------------------------------------------------------------
# 6 Figures, tables, and what the programs print
# ---------------------------------------------------------------------------

def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, between neighbours if need be."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def shown_ms(seconds: float) -> str:
    """Milliseconds, with one decimal where it says something."""
    return f"{seconds * 1000:.1f}" if seconds < 0.1 else f"{seconds * 1000:,.0f}"


def shown_mb(count: int) -> str:
    """Millions of bytes."""
    return f"{count / 1e6:.1f}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its columns aligned; all but the first are numbers."""
    widths = [max(len(row[at]) for row in (head, *rows)) for at in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:])]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *rest]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), line(rule), *(line(row) for row in rows)])


def verdict(name: str, value: float, wanted: str, met: bool) -> str:
    """One line below a table: a ratio or a size, and whether it is what it should be."""
    return f"- {name}: {value:.2f} (to reach: {wanted}): {'reached' if met else 'MISSED'}"


def comparison(name: str, value: float) -> str:
    """One line below a table for a number without a target."""
    return f"- {name}: {value:.2f} (for comparison)"


def _first_match(path: str, pattern: str) -> str:
    try:
        found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1].strip() if found else ""


def version_of(claude: Path) -> str:
    """Return the version that a claude program tells."""
    shown = subprocess.run(
        [str(claude), "--version"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        timeout=PATIENCE_S, check=True)
    return shown.stdout.decode().split()[0]


def machine(claude: Path | None = None) -> str:
    """Return one line about what the numbers were measured on."""
    processor = _first_match("/proc/cpuinfo", r"^model name\s*:\s*(.+)$")
    memory_kb = _first_match("/proc/meminfo", r"^MemTotal:\s*(\d+) kB")
    parts = [
        processor or platform.machine(),
        f"{os.cpu_count()} cores",
        f"{int(memory_kb) / 1e6:.0f} GB" if memory_kb else "",
        f"{platform.system()} {platform.release().split('-')[0]}",
        f"Python {platform.python_version()}",
        f"claude {version_of(claude)}" if claude else "",
    ]
    return ", ".join(part for part in parts if part)


def shown_delay(delay_ms: float) -> str:
    """How fast the stand-in for the API was."""
    return f"API delayed by {delay_ms:g} ms" if delay_ms else "API without delay"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks have."""
    parser.add_argument("--claude", default="", metavar="PATH", help="default: on PATH")
    parser.add_argument("--model", default="claude-haiku-4-5", help="default: claude-haiku-4-5")
    parser.add_argument(
        "--delay-ms", type=float, default=0.0, metavar="MS",
        help="silence of the API before its first byte; default: 0, the hardest for OCP")


def report(program: str, measure: Callable[[], str]) -> int:
    """Prints what `measure` returns. The exit code of the program: 1 when it could not be
    measured."""
    clean_up_at_the_end()
    try:
        print(measure())
    except (BenchError, Refused) as problem:
        progress(f"{program}: {problem}")
        return 1
    return 0


def progress(text: str) -> None:
    """A line for whoever waits, apart from the table on stdout."""
    print(text, file=sys.stderr, flush=True)
