"""Record what a real claude CLI prints in the situations that the tests replay.

    python3 tools/record_transcripts.py /path/to/claude [--only NAME ...] [--into DIR]

Each scenario drives one fresh CLI process, whose API is a StubApi on loopback, and writes
`VERSION-SCENARIO.jsonl`: one {"dir": "in" | "out", "line": {...}} a line, "in" for what
the process was sent and "out" for what it printed, in the order in which the driver sent and
read. Whatever differs from one machine or run to the next is replaced by placeholders, and
a transcript in which something of this machine survives is not saved.

Index: 1 driving the CLI   2 scenarios   3 scrubbing   4 program
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import queue
import re
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Callable, Iterable, Mapping, NamedTuple, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kit"))

import stub_api  # noqa: E402
from project import TRANSCRIPTS  # noqa: E402
from stub_api import Reply, StubApi, text  # noqa: E402

Json = Any
Line = dict[str, Json]

MODEL = "claude-sonnet-4-6"
TOKEN = "sk-ant-oat01-for-the-stub"

ARGUMENTS = (
    "-p", "--input-format", "stream-json", "--output-format", "stream-json", "--verbose",
    "--include-partial-messages", "--model", MODEL, "--tools", "", "--strict-mcp-config",
    "--setting-sources", "", "--disable-slash-commands", "--no-session-persistence",
    "--allowedTools", "mcp__client", "--thinking-display", "summarized",
)

ENVIRONMENT = {
    "CLAUDE_AGENT_SDK_MCP_NO_PREFIX": "1",
    "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "1",
    "CLAUDE_CODE_DISABLE_REFUSAL_FALLBACK": "1",
    "CLAUDE_CODE_DISABLE_REFUSAL_RETRY": "1",
    "CLAUDE_CODE_MAX_RETRIES": "1",
    "DISABLE_AUTO_COMPACT": "1",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_COMPACT": "1",
}

#: The longest silence of the CLI that is not taken for a failure.
PATIENCE_S = 60.0
#: How long lines are awaited that may follow the last one expected.
AFTERMATH_S = 0.5


# ---------------------------------------------------------------------------
# 1 Driving the CLI
# ---------------------------------------------------------------------------

class Session:
    """One CLI process; `transcript` is what has been sent and read so far."""

    def __init__(self, claude: str, home: Path, url: str, token: Optional[str]) -> None:
        self.transcript: list[Line] = []
        self._ids = 0
        self._arrived: queue.Queue[Optional[str]] = queue.Queue()
        # Open as long as the process is.
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        directory = home / "empty"
        directory.mkdir(parents=True)
        environment = dict(
            ENVIRONMENT, PATH=os.environ["PATH"], HOME=str(home), ANTHROPIC_BASE_URL=url)
        if token:
            environment["CLAUDE_CODE_OAUTH_TOKEN"] = token
        self._process = subprocess.Popen(
            [claude, *ARGUMENTS], cwd=directory, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr)
        self._reader = threading.Thread(target=self._read_stdout, daemon=True)

    def __enter__(self) -> Session:
        self._reader.start()
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            assert stream
            stream.close()

    def _read_stdout(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._arrived.put(line)
        self._arrived.put(None)

    def send(self, line: Line) -> None:
        self.transcript.append({"dir": "in", "line": line})
        assert self._process.stdin
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()

    def control(self, subtype: str, **fields: Json) -> str:
        """Send a control request; its id."""
        self._ids += 1
        request_id = f"request-{self._ids}"
        self.send({"type": "control_request", "request_id": request_id,
                   "request": dict(fields, subtype=subtype)})
        return request_id

    def ask(self, content: Json, **fields: Json) -> None:
        """Send a user message, which starts a turn unless shouldQuery is False."""
        self.send({"type": "user", "message": {"role": "user", "content": content},
                   "parent_tool_use_id": None, "session_id": "default",
                   "client_composed": True, **fields})

    def remember(self, answer: str) -> None:
        """Send an earlier answer of the model."""
        message = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        self.send({"type": "assistant", "message": message, "parent_tool_use_id": None,
                   "session_id": "default"})

    def read_until(self, *wanted: Callable[[Line], bool]) -> None:
        """Read until each of `wanted` has been true of a line; tool traffic is answered."""
        open_wishes = list(wanted)
        while open_wishes:
            line = self._read(PATIENCE_S)
            if line is None:
                raise RuntimeError("the CLI ended too early: " + self.complaints())
            open_wishes = [wish for wish in open_wishes if not wish(line)]

    def finish(self) -> int:
        """Read what follows, close stdin, read the rest; the exit code."""
        try:
            while self._read(AFTERMATH_S) is not None:
                pass
        except queue.Empty:
            assert self._process.stdin
            self._process.stdin.close()
            while self._read(PATIENCE_S) is not None:
                pass
        return self._process.wait(PATIENCE_S)

    def complaints(self) -> str:
        """What the CLI wrote on stderr."""
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace").strip()

    def _read(self, timeout_s: float) -> Optional[Line]:
        """The next line, None at the end of the output; raises queue.Empty."""
        raw = self._arrived.get(timeout=timeout_s)
        if raw is None:
            return None
        line: Line = json.loads(raw)
        self.transcript.append({"dir": "out", "line": line})
        if line["type"] == "control_request":
            self._answer(line)
        return line

    def _answer(self, line: Line) -> None:
        answer = answer_as_mcp_server(line["request"]["message"])
        self.send({"type": "control_response", "response": {
            "subtype": "success", "request_id": line["request_id"],
            "response": {"mcp_response": answer}}})


TOOLS = [
    {"name": name, "description": f"Tells the {name} of a city.", "inputSchema": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}
    for name in ("weather", "time_of_day")
]


def answer_as_mcp_server(message: Line) -> Line:
    """The JSON-RPC answer of the client's tool server to the CLI."""
    params = message.get("params", {})
    results: dict[str, Callable[[], Line]] = {
        "initialize": lambda: {
            "protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}},
            "serverInfo": {"name": "client", "version": "1"}},
        "tools/list": lambda: {"tools": TOOLS},
        "tools/call": lambda: {"content": [{
            "type": "text", "text": f"{params['name']} of {params['arguments']['city']}"}]},
    }
    result = results.get(message["method"], dict[str, Any])()
    return {"jsonrpc": "2.0", "id": message.get("id", 0), "result": result}


# ---------------------------------------------------------------------------
# 2 Scenarios
# ---------------------------------------------------------------------------

def is_result(line: Line) -> bool:
    return bool(line["type"] == "result")


def is_delta(line: Line) -> bool:
    is_event = line["type"] == "stream_event"
    return bool(is_event and line["event"]["type"] == "content_block_delta")


def is_response_to(request_id: str) -> Callable[[Line], bool]:
    return lambda line: (line["type"] == "control_response"
                         and line["response"]["request_id"] == request_id)


def one_turn(session: Session) -> None:
    session.ask("What is the capital of France?")
    session.read_until(is_result)


def two_turns(session: Session) -> None:
    one_turn(session)
    session.ask("And of Spain?")
    session.read_until(is_result)


def history(session: Session) -> None:
    earlier = (("What is the capital of France?", "Paris."), ("And of Spain?", "Madrid."))
    for question, answer in earlier:
        session.ask(question, shouldQuery=False)
        session.read_until(is_result)
        session.remember(answer)
    session.ask("And of Italy?")
    session.read_until(is_result)


def interrupt(session: Session) -> None:
    session.ask("What is the capital of France?")
    session.read_until(is_delta)
    request_id = session.control("interrupt")
    session.read_until(is_response_to(request_id), is_result)


def unknown_control(session: Session) -> None:
    session.read_until(is_response_to(session.control("no_such_subtype")))
    one_turn(session)


class Scenario(NamedTuple):
    name: str
    #: The API's answers in order; the last one is repeated for ever.
    replies: tuple[Reply, ...]
    play: Callable[[Session], None] = one_turn
    #: Added to the initialize request.
    initialize: Mapping[str, Json] = {}
    network: bool = True
    token: Optional[str] = TOKEN


PARIS = text("Paris is the capital.")
# The gap lets the CLI print the text before it learns of the end.
OVERLOADED_MIDWAY = stub_api.stream_error(after="Paris is", gap_s=0.2)
CUT_MIDWAY = stub_api.cut(after="Paris is", gap_s=0.2)
THOUGHTS = stub_api.thinking("France, so Paris.", then="Paris.", thinking_tokens=4)
OVERLOADED_IN_THOUGHT = OVERLOADED_MIDWAY._replace(blocks=THOUGHTS.blocks[:1])
CLIENT_TOOLS = {"sdkMcpServers": ["client"]}
SCHEMA = {"jsonSchema": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
    "additionalProperties": False}}
WEATHER = ("weather", {"city": "Paris"})
TIME = ("time_of_day", {"city": "Paris"})
PLAIN_429 = "Number of requests has exceeded your rate limit."
TOO_LONG = "prompt is too long: 250000 tokens > 200000 maximum"
REVOKED = "OAuth token has been revoked."
NOT_ALLOWED = "OAuth authentication is currently not allowed for this organization."
REFUSAL = {"type": "refusal", "category": "cyber", "explanation": "Not this."}

SCENARIOS = (
    Scenario("plain", (PARIS,)),
    Scenario("thinking", (THOUGHTS,)),
    Scenario("two_turns", (PARIS, text("Madrid is the capital.")), two_turns),
    Scenario("history", (text("Rome is the capital."),), history),
    Scenario("max_tokens", (
        text("Paris is the cap", stop_reason="max_tokens"), text("ital of France."))),
    Scenario("max_tokens_repeated", (text("Paris is", stop_reason="max_tokens"),)),
    Scenario("refusal", (
        text("I cannot", stop_reason="refusal", stop_details=REFUSAL),)),
    Scenario("stop_sequence", (
        text("Paris is", stop_reason="stop_sequence", stop_sequence="END"),)),
    Scenario("error_400", (stub_api.error(400, "messages: text content must be non-empty"),)),
    Scenario("error_400_too_long", (stub_api.error(400, TOO_LONG),)),
    Scenario("error_401", (stub_api.error(401, REVOKED),)),
    Scenario("error_403", (stub_api.error(403, NOT_ALLOWED),)),
    Scenario("error_404", (stub_api.error(404, "model: " + MODEL),)),
    Scenario("error_413", (stub_api.error(413, "Request exceeds the maximum size"),)),
    Scenario("error_429_plan_limit", (stub_api.plan_limit(resets_in_s=3000),)),
    Scenario("error_429_plain", (stub_api.error(429, PLAIN_429),)),
    Scenario("error_500", (stub_api.error(500, "Internal server error"),)),
    Scenario("error_529", (stub_api.error(529, "Overloaded"),)),
    Scenario("retry", (stub_api.error(529, "Overloaded"), PARIS)),
    Scenario("network_down", (PARIS,), network=False),
    Scenario("not_logged_in", (PARIS,), token=None),
    Scenario("stream_error", (OVERLOADED_MIDWAY,)),
    Scenario("stream_error_at_once_then_text", (stub_api.stream_error(gap_s=0.2), PARIS)),
    Scenario("stream_error_in_thinking_then_text", (OVERLOADED_IN_THOUGHT, PARIS)),
    Scenario("cut", (CUT_MIDWAY,)),
    Scenario("cut_then_text", (CUT_MIDWAY, PARIS)),
    Scenario("tool_call", (
        stub_api.tool_calls([WEATHER], text="Let me look."), text("It is sunny.")),
        initialize=CLIENT_TOOLS),
    Scenario("tool_calls_parallel", (
        stub_api.tool_calls([WEATHER, TIME]), text("It is a sunny morning.")),
        initialize=CLIENT_TOOLS),
    Scenario("structured", (
        stub_api.tool_calls([("StructuredOutput", {"city": "Paris"})]), PARIS),
        initialize=SCHEMA),
    Scenario("structured_prose_first", (
        PARIS, stub_api.tool_calls([("StructuredOutput", {"city": "Paris"})]), PARIS),
        initialize=SCHEMA),
    Scenario("interrupt", (stub_api.hang(after="Paris is", seconds=60),), interrupt),
    Scenario("unknown_control", (PARIS,), unknown_control),
)


class Take(NamedTuple):
    """One scenario as it was played."""
    transcript: list[Line]
    exit_code: int
    api_requests: int
    complaints: str


def play(scenario: Scenario, claude: str, home: Path) -> Take:
    with StubApi(lambda body: scenario.replies[-1]) as stub:
        stub.enqueue(*scenario.replies)
        url = stub.url if scenario.network else unused_url()
        with Session(claude, home, url, scenario.token) as session:
            session.read_until(is_response_to(session.control(
                "initialize", systemPrompt=["Be brief."], hooks=None, **scenario.initialize)))
            scenario.play(session)
            exit_code = session.finish()
            return Take(
                session.transcript, exit_code, len(stub.requests), session.complaints())


def unused_url() -> str:
    """The URL of a port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return "http://127.0.0.1:%d" % probe.getsockname()[1]


# ---------------------------------------------------------------------------
# 3 Scrubbing: nothing of this machine or run, and the same placeholder for the same thing
# ---------------------------------------------------------------------------

FAKE_HOME = "/home/user"
FAKE_TIMESTAMP = "2000-01-01T00:00:00.000Z"
FAKE_EPOCH_S = 2_000_000_000
DAY_S = 86_400

UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

#: What is replaced wherever it stands in a string.
PATTERNS = (
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"), FAKE_TIMESTAMP),
    (re.compile(r"\b[0-9a-f]{64}\b"), "0" * 64),
    (re.compile(r"127\.0\.0\.1:\d+"), "127.0.0.1:8800"),
    (re.compile(r"/[^ \"]*/cc-socks/\d+\.sock"), "/tmp/cc-socks/1.sock"),
    (re.compile(r"resets [^\u00b7]*\([^)]*\)"), "resets 5pm (UTC)"),
)


class Scrubber:
    """Replaces what belongs to this machine; one scrubber for one transcript."""

    def __init__(self, home: Path) -> None:
        self._uuids: dict[str, str] = {}
        self._epochs: dict[int, int] = {}
        self._words: list[tuple[re.Pattern[str], str]] = []
        for path in (str(home.resolve()), str(home)):
            # The CLI makes folder names of paths by putting a dash for every odd character.
            dashed = re.sub(r"[^A-Za-z0-9]", "-", path)
            self._words.append((re.compile(re.escape(path)), FAKE_HOME))
            self._words.append((re.compile(re.escape(dashed)), FAKE_HOME.replace("/", "-")))
        self._words += [(whole_word(name), fake) for name, fake in own_names()]

    def line(self, line: Line) -> Line:
        response = line.get("response", {}).get("response", {})
        if "commands" in response:
            short = {name: [] if isinstance(value, list) else value
                     for name, value in response.items()}
            line = dict(line, response=dict(line["response"], response=short))
        plain: Line = self._value("", line)
        return plain

    def _value(self, name: str, value: Json) -> Json:
        if isinstance(value, dict):
            return {key: self._value(key, inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._value(name, inner) for inner in value]
        if isinstance(value, str):
            return self._text(value)
        if name == "pid":
            return 1
        if name == "resetsAt":
            return self._epochs.setdefault(value, FAKE_EPOCH_S + DAY_S * len(self._epochs))
        if name.endswith("_ms") and value:
            # Whether it is whole differs between versions, and may trip a parser.
            return 10 if isinstance(value, int) else 10.5
        return value

    def _text(self, value: str) -> str:
        value = UUID.sub(self._numbered, value)
        for pattern, fake in (*self._words, *PATTERNS):
            value = pattern.sub(fake, value)
        return value

    def _numbered(self, found: re.Match[str]) -> str:
        fake = f"00000000-0000-4000-8000-{len(self._uuids) + 1:012d}"
        return self._uuids.setdefault(found[0], fake)


def own_names() -> list[tuple[str, str]]:
    """The names that no transcript may hold, and their placeholders."""
    return [(getpass.getuser(), "user"), (socket.gethostname(), "host")]


def whole_word(name: str) -> re.Pattern[str]:
    return re.compile(r"(?<![A-Za-z0-9])" + re.escape(name) + r"(?![A-Za-z0-9])")


def leaks(content: str, home: Path) -> list[str]:
    """What of this machine is still found in `content`."""
    paths = (str(home), str(home.resolve()), str(Path.home()), TOKEN)
    found = [path for path in paths if path in content]
    return found + [name for name, _ in own_names() if whole_word(name).search(content)]


# ---------------------------------------------------------------------------
# 4 Program
# ---------------------------------------------------------------------------

def version_of(claude: str) -> str:
    shown = subprocess.run([claude, "--version"], check=True, text=True, stdout=subprocess.PIPE)
    return shown.stdout.split()[0]


def record(scenario: Scenario, claude: str, file: Path) -> Take:
    """Play a scenario and save its transcript; raises ValueError if something leaks."""
    with tempfile.TemporaryDirectory(prefix="record-") as scratch:
        home = Path(scratch) / "home"
        take = play(scenario, claude, home)
        scrubber = Scrubber(home)
        lines = [{"dir": entry["dir"], "line": scrubber.line(entry["line"])}
                 for entry in take.transcript]
        content = "".join(json.dumps(line) + "\n" for line in lines)
        found = leaks(content, home)
    if found:
        raise ValueError(f"{file.name} not saved, it holds {found}")
    file.write_text(content, encoding="ascii")
    return take


def main(arguments: Optional[Iterable[str]] = None) -> int:
    parser = argparse.ArgumentParser(description="Record what a claude CLI prints.")
    parser.add_argument("claude", help="the program to record")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these scenarios alone")
    parser.add_argument("--into", type=Path, default=TRANSCRIPTS)
    options = parser.parse_args(None if arguments is None else list(arguments))
    options.into.mkdir(parents=True, exist_ok=True)
    version = version_of(options.claude)
    for scenario in SCENARIOS:
        if options.only and scenario.name not in options.only:
            continue
        file = options.into / f"{version}-{scenario.name}.jsonl"
        take = record(scenario, options.claude, file)
        print(f"{file.name}: {len(take.transcript)} lines, exit code {take.exit_code}, "
              f"{take.api_requests} API requests {take.complaints}".rstrip(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
