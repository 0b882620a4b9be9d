"""A scriptable stand-in for the `claude` program, for tests.

It speaks the stream-json protocol of `claude -p --input-format stream-json` over real pipes,
keeps a conversation, and plays scripted answers where the real program would ask the API.

Environment:
    FAKE_CLAUDE      path of a scenario file; without it every turn is `You said: ...`
    FAKE_CLAUDE_LOG  path of a log in JSON lines, which several processes may share:
        {"event": "start", "pid", "argv", "env", "cwd"}
        {"event": "line",  "pid", "line"}       every line of stdin
        {"event": "query", "pid", "model", "system", "settings", "thinking", "schema",
                           "tools", "messages", "reminded"} every time the model would be asked;
                           the program's own reminders are in the message of the last number
        {"event": "exit",  "pid", "why", "code"}

Scenario file, read again whenever a turn begins; a new content starts at its first turn:
    version         what --version prints, default 2.1.329; some lines depend on it
    notice          what --version prints in front of it
    logged_in       what `auth status` says, default true
    usage           fields for the answer to get_usage
    login           what the requests of a login do: `code` is the right one, `account` what is told
                    then, `error` what every code is answered with, `delay_ms` how long a code
                    takes, `url` the address
    models          what the answer to `initialize` lists, default nothing
    unsupported     control requests that are refused
    unlimited       true: BLOCKING_LIMIT is ignored
    start_delay_ms  sleep before the first look at stdin
    startup         steps played before the first look at stdin, for instance an exit
    turns           list of lists of steps: the n-th query of a process plays the n-th list
    repeat_last     true (default): the last list goes on for ever; false: `You said: ...`
    shared          true: queries are counted over all processes instead of per process

A step is an object with one of the names in STEPS, and its function there says what it does.
A list that leaves the model's message open is finished as {"finish": "end_turn"} does it,
or "tool_use" if there are calls. After a message with tool calls the next list is played.
"""

from __future__ import annotations

# Every test of a server starts this program, so it imports nothing that takes long: not typing,
# and neither signal nor json as they are, because these import enum and re.
import _signal as signal  # type: ignore[import-not-found]
import os
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterator, NoReturn, Optional

    Json = Any
    Step = dict[str, Json]


#: What it says it is, unless its scenario has another one.
VERSION = "2.1.329"


class Blanks:
    """What json sees of re while it is imported. It looks for the blanks around a value with it;
    for all else it has C code."""

    VERBOSE = MULTILINE = DOTALL = 0

    def __init__(self, end: int = 0) -> None:
        self._end = end

    def compile(self, *_: Any) -> Blanks:
        return self

    def match(self, text: str, start: int) -> Blanks:
        end = start
        while text[end:end + 1] in (" ", "\t", "\n", "\r"):
            end += 1
        return Blanks(end)

    def end(self) -> int:
        return self._end


if "re" in sys.modules:
    import json
else:
    sys.modules["re"] = Blanks()  # type: ignore[assignment]
    import json
    del sys.modules["re"]

USAGE = {
    "input_tokens": 10,
    "cache_read_input_tokens": 5,
    "cache_creation_input_tokens": 3,
    "output_tokens": 7,
}
#: The number of tokens from which a prompt is refused without asking the model.
BLOCKING_LIMIT = "CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE"
TOO_LONG = "Prompt is too long"
#: The query's system prompt when `initialize` named none, or never came.
AGENT_PROMPT = "(the long prompt of an interactive agent)"
#: The JSON-RPC id of each tools/call: there is never more than one under way.
CALL_ID = 2
REJECTED_TOOL = "The user doesn't want to proceed with this tool use."
LOST_TOOL = "The tool call was interrupted before a result was received."
#: A forgotten process ends itself after this time, also in a stubborn hang.
LIFE_S = 900

#: Options without a value, and with one. Any other is refused, as by the real program.
FLAGS = frozenset((
    "-p", "--print", "--verbose", "--include-partial-messages", "--strict-mcp-config",
    "--disable-slash-commands", "--no-session-persistence", "--dangerously-skip-permissions",
    "--allow-dangerously-skip-permissions", "--exclude-dynamic-system-prompt-sections",
    "--fork-session", "--replay-user-messages", "--include-hook-events", "--safe-mode", "--bare",
))
OPTIONS = frozenset((
    "--input-format", "--output-format", "--model", "--fallback-model", "--effort",
    "--thinking", "--thinking-display", "--max-thinking-tokens", "--max-turns",
    "--max-budget-usd", "--task-budget", "--tools", "--allowedTools", "--allowed-tools",
    "--disallowedTools", "--disallowed-tools", "--permission-mode", "--permission-prompt-tool",
    "--mcp-config", "--setting-sources", "--settings", "--add-dir", "--plugin-dir", "--agents",
    "--betas", "--session-id", "--resume", "-r", "--json-schema", "--prefill",
    "--system-prompt", "--system-prompt-file", "--append-system-prompt",
    "--append-system-prompt-file", "-n", "--name",
))


class Refused(Exception):
    """A control request is answered with an error."""


class Interrupted(Exception):
    """The client has ended the running turn."""


# ---------------------------------------------------------------------------
# Log, exit, pipes
# ---------------------------------------------------------------------------

def record(event: str, **fields: Json) -> None:
    """Append one event to the log; one write, so that processes can share the file."""
    path = os.environ.get("FAKE_CLAUDE_LOG")
    if not path:
        return
    line = json.dumps({"event": event, "pid": os.getpid(), **fields}) + "\n"
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(log, line.encode())
    os.close(log)


def leave(code: int, why: str) -> NoReturn:
    record("exit", why=why, code=code)
    # No clean-up: it could wait for a pipe that nobody reads.
    os._exit(code)


def complain(text: str) -> None:
    os.write(2, text.encode() + b"\n")


def refuse_constant(word: str) -> NoReturn:
    """NaN and Infinity are JSON for Python only."""
    raise ValueError(word)


class Pipes:
    """stdin as lines, stdout in lines or in smaller pieces."""

    def __init__(self) -> None:
        #: Bytes per write, 0 = a whole line.
        self.piece_bytes = 0
        self.ended = False
        self._unread = b""

    def write(self, output: bytes) -> None:
        size = self.piece_bytes or len(output) or 1
        for at in range(0, len(output), size):
            piece = memoryview(output)[at:at + size]
            while piece:
                piece = piece[os.write(1, piece):]

    def write_line(self, line: Json) -> None:
        try:
            text = json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            text = json.dumps(line, separators=(",", ":")).encode()
        self.write(text + b"\n")

    def read_lines(self, timeout_s: Optional[float]) -> Iterator[bytes]:
        """The lines that one read brings within the time; None waits as long as it takes."""
        if self.ended:
            # Whoever waits for a line in a loop must not spin.
            time.sleep(0.05 if timeout_s is None else min(0.05, timeout_s))
            return
        if not select.select([0], [], [], timeout_s)[0]:
            return
        piece = os.read(0, 1 << 16)
        self.ended = not piece
        lines = (self._unread + piece).split(b"\n")
        self._unread = b"" if self.ended else lines.pop()
        yield from (line for line in lines if line.strip())


# ---------------------------------------------------------------------------
# Scenario and command line
# ---------------------------------------------------------------------------

class Scenario:
    """The scenario file, and how far this process has come in it."""

    def __init__(self, path: Optional[str]) -> None:
        self._path = path
        self._text = ""
        self._played = 0
        self.fields: dict[str, Json] = {}
        self.refresh()

    def refresh(self) -> None:
        if not self._path:
            return
        with open(self._path, encoding="utf-8") as file:
            text = file.read()
        if text != self._text:
            self._text, self._played = text, 0
            self.fields = json.loads(text)

    @property
    def version(self) -> str:
        return str(self.fields.get("version", VERSION))

    @property
    def is_recent(self) -> bool:
        """Whether lines look like those of 2.1.329 rather than those of 2.1.197."""
        return tuple(int(part) for part in self.version.split(".")) >= (2, 1, 329)

    def next_steps(self) -> Optional[list[Step]]:
        """The steps of the next query, None for the default answer."""
        turns = self.fields.get("turns") or []
        number = self._next_number()
        if number < len(turns):
            return list(turns[number])
        if turns and self.fields.get("repeat_last", True):
            return list(turns[-1])
        return None

    def _next_number(self) -> int:
        if self.fields.get("shared"):
            # Appending is atomic, so the file's length is a ticket counter for all processes.
            counter = os.open(f"{self._path}.turns", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(counter, b".")
            position = os.lseek(counter, 0, os.SEEK_CUR)
            os.close(counter)
            return position - 1
        self._played += 1
        return self._played - 1


def parse_options(arguments: list[str]) -> dict[str, str]:
    """The options by name, flags with ""; leaves with an error at an unknown one."""
    options: dict[str, str] = {}
    name = ""
    words = iter(arguments)
    for word in words:
        if word in OPTIONS:
            name = word
            options[name] = next(words, "")
        elif word in FLAGS:
            name = ""
            options[word] = ""
        elif word.startswith("-"):
            complain(f"error: unknown option '{word}'")
            leave(1, "unknown option")
        elif name:
            # A further value, as --allowedTools and others take several.
            options[name] += " " + word
    return options


# ---------------------------------------------------------------------------
# Conversation
# ---------------------------------------------------------------------------

def as_blocks(content: Json) -> list[Step]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


THINKING = ("thinking", "redacted_thinking")


def is_same_model(said: str, own: str, is_recent: bool) -> bool:
    """Whether an answer of the history counts as one of the process's own model. The newer program
    takes the id with a date for the same."""
    own = own.replace("[1m]", "")
    if not is_recent:
        return said == own
    return undated(said.replace("[1m]", "")) == undated(own)


def undated(model_id: str) -> str:
    """A model's id without the day at its end."""
    rest, _, day = model_id.rpartition("-")
    return rest if len(day) == 8 and day.isdigit() else model_id


def new_uuid() -> str:
    digits = os.urandom(16).hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


class History:
    """The messages so far, kept in a file too when the session is to be resumed."""

    def __init__(self, options: dict[str, str]) -> None:
        resumed = options.get("--resume") or options.get("-r")
        self.session_id = resumed or options.get("--session-id") or new_uuid()
        self._messages: list[Step] = []
        #: The message beside which the newer program put its reminders.
        self._reminded: Optional[int] = None
        #: Where the user's lines are, by their UUIDs, but for those with results of tools.
        self._places: dict[str, int] = {}
        self._path = None if "--no-session-persistence" in options else self._file()
        if self._path and resumed:
            self._load(self._path)
        elif self._path and os.path.exists(self._path):
            complain(f"Error: Session ID {self.session_id} is already in use.")
            leave(1, "session exists")

    def _file(self) -> str:
        home = os.environ.get("CLAUDE_CONFIG_DIR") or os.path.expanduser("~/.claude")
        folder = "".join(sign if sign.isalnum() else "-" for sign in os.getcwd())
        return os.path.join(home, "projects", folder, self.session_id + ".jsonl")

    def _load(self, path: str) -> None:
        if not os.path.exists(path):
            complain(f"No conversation found with session ID: {self.session_id}")
            leave(1, "no such session")
        with open(path, encoding="utf-8") as file:
            self._messages = [json.loads(line)["message"] for line in file]

    def add(self, role: str, content: Json, line_id: Optional[str] = None) -> None:
        """`line_id` is the UUID of the line that it came by; results of tools have none."""
        message = {"role": role, "content": as_blocks(content)}
        self._messages.append(message)
        if line_id:
            self._places[line_id] = len(self._messages) - 1
        if self._path:
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"type": role, "message": message}) + "\n")

    def forget(self, line_id: str, is_recent: bool) -> str:
        """Forget the last line of the user and all behind it; why not, "" when it is done."""
        place = self._places.get(line_id)
        if place is None:
            return "target not found"
        if place != max(self._places.values()):
            return "stale target"
        if not is_recent and all(m["role"] != "assistant" for m in self._messages[:place]):
            return "no preceding assistant"
        del self._messages[place:], self._places[line_id]
        if self._reminded is not None and self._reminded >= place:
            self._reminded = None
        return ""

    def remind(self) -> None:
        """Put the reminders beside the last message, unless they are somewhere already."""
        if self._reminded is None:
            self._reminded = len(self._messages) - 1

    def for_model(self) -> list[Step]:
        """The messages as the API takes them: neighbours of one role joined."""
        return self._joined(self._messages)

    def reminded(self) -> int:
        """The number of the message for the model with the reminders."""
        before = self._messages[:(self._reminded or 0) + 1]
        return len(self._joined(before)) - 1

    def _joined(self, messages: list[Step]) -> list[Step]:
        joined: list[Step] = []
        for message in messages:
            blocks = message["content"]
            if joined and joined[-1]["role"] == message["role"]:
                joined[-1]["content"] += blocks
            elif blocks:
                joined.append({"role": message["role"], "content": list(blocks)})
        return joined

    def last_user_text(self) -> str:
        for message in reversed(self._messages):
            if message["role"] == "user":
                texts = [block["text"] for block in message["content"]
                         if block.get("type") == "text"]
                return texts[-1] if texts else ""
        return ""


class Call:
    """A tool call of the model."""

    def __init__(
        self, block: Step, tool: Optional[str], result: Json, server: str = "client"
    ) -> None:
        self.block = block
        #: The client's own name of the tool, None if the tool is not the client's.
        self.tool = tool
        #: Which of the client's tool servers has it.
        self.server = server
        #: The tool_result block; a tool that is not the client's has it at once.
        self.result: Optional[Step] = result
        self.asked = False


class Message:
    """One message of the model while it is streamed."""

    def __init__(self, usage: Step) -> None:
        self.id = "msg_" + os.urandom(6).hex()
        self.usage = usage
        self.content: list[Step] = []
        self.calls: list[Call] = []
        #: The text block that is open, None if there is none.
        self.open_text: Optional[Step] = None
        self.ended = False

    @property
    def index(self) -> int:
        return len(self.content)


class Turn:
    """From a user line to its result."""

    def __init__(self) -> None:
        self.started_s = time.monotonic()
        self.message: Optional[Message] = None
        self.usage = dict.fromkeys(USAGE, 0)
        self.tool_results = 0
        self.structured_output: Json = None
        self.over = False


# ---------------------------------------------------------------------------
# The process
# ---------------------------------------------------------------------------

class FakeClaude:
    """One process: its pipes, its conversation, and the turn that it is in."""

    def __init__(self, scenario: Scenario, options: dict[str, str]) -> None:
        self.scenario = scenario
        self.options = options
        self.pipes = Pipes()
        self.history = History(options)
        self.turn: Optional[Turn] = None
        #: The first `initialize` request, later ones do not count.
        self.setup: Optional[Step] = None
        self.settings: Step = {}
        #: Which login a code belongs to; empty = none has begun.
        self.login_state = ""
        self.thinking: Optional[int] = None
        self.tools: list[Step] = []
        self.user_lines: list[Step] = []
        #: What to do with the answer to one of our own control requests, by its id.
        self.awaited: dict[str, Callable[[Step], None]] = {}
        self.interrupted = False
        self.failed = False
        self.queries = 0
        #: The usage of the message that is being scripted.
        self.planned_usage: Step = USAGE
        #: Tool servers of the client whose tools are not known yet.
        self.connecting = 0
        self.rate_limit_info: Step = {}
        self.started_s = int(time.time())

    # -- lines in -------------------------------------------------------------

    def serve(self) -> NoReturn:
        while True:
            while self.user_lines:
                self.wait_for_tools()
                if self.user_lines:
                    self.take_user_line(self.user_lines.pop(0))
            if self.pipes.ended:
                leave(int(self.failed), "end of stdin")
            self.pump(None)

    def pump(self, timeout_s: Optional[float]) -> None:
        """Take the lines that come within the time, None = wait for some.

        Control requests and history are dealt with at once, as by the real program; user
        lines wait for their turn. So history that is sent without waiting gets out of order."""
        for text in self.pipes.read_lines(timeout_s):
            try:
                line = json.loads(text, parse_constant=refuse_constant)
            except ValueError:
                kind = f"(type=unknown, {len(text)} chars)"
                complain(f"Error parsing streaming input line {kind}: SyntaxError")
                leave(1, "stdin is not JSON")
            record("line", line=line)
            self.take_line(line if isinstance(line, dict) else {})
        if self.interrupted and self.turn:
            self.interrupted = False
            raise Interrupted

    def take_line(self, line: Step) -> None:
        kind = line.get("type")
        if kind == "control_request":
            answer_control(self, line)
        elif kind == "control_response":
            response = line["response"]
            then = self.awaited.pop(response.get("request_id"), None)
            if then:
                then(response)
        elif kind == "user":
            self.user_lines.append(line)
        elif kind == "assistant":
            self.take_answer(line["message"])

    def take_answer(self, message: Step) -> None:
        """Put an answer into the history, with its thinking only if it is said to be by the same
        model."""
        blocks = as_blocks(message["content"])
        if not is_same_model(str(message.get("model")), self.model, self.scenario.is_recent):
            blocks = [block for block in blocks if block.get("type") not in THINKING]
        self.history.add("assistant", blocks)

    def sleep(self, seconds: float) -> None:
        """Pass the time; during a turn the client is heard meanwhile."""
        if self.turn is None:
            time.sleep(seconds)
            return
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s:
            self.pump(max(0.0, deadline_s - time.monotonic()))

    # -- lines out ------------------------------------------------------------

    def emit(self, kind: str, **fields: Json) -> None:
        line = {"type": kind, **fields, "session_id": self.history.session_id}
        self.pipes.write_line({**line, "uuid": new_uuid()})

    def emit_event(self, kind: str, **fields: Json) -> None:
        """One event of the API's stream."""
        if "--include-partial-messages" in self.options:
            event = {"type": kind, **fields}
            self.emit("stream_event", event=event, parent_tool_use_id=None)

    def emit_blocks(self, message: Message, blocks: list[Step], **fields: Json) -> None:
        """A finished block, or a whole message, as an `assistant` line."""
        body = {
            "id": message.id, "type": "message", "role": "assistant", "model": self.model,
            "content": blocks, "stop_reason": None, "stop_sequence": None,
            "usage": dict(message.usage, output_tokens=1), "context_management": None,
        }
        body.update(fields)
        self.emit("assistant", message=body, parent_tool_use_id=None)

    def emit_synthetic(self, text: str, **fields: Json) -> None:
        """A text of the program's own, as an `assistant` line."""
        body = {
            "id": new_uuid(), "type": "message", "role": "assistant", "model": "<synthetic>",
            "content": as_blocks(text), "stop_reason": "stop_sequence", "stop_sequence": "",
            "usage": dict.fromkeys(USAGE, 0), "context_management": None,
        }
        self.emit("assistant", message=body, parent_tool_use_id=None, **fields)

    def call_failure_hooks(
        self, status: int, word: str, text: str, details: Optional[str]
    ) -> None:
        """Tell the client's hooks that a turn has failed. Nobody waits for their answers."""
        told: Step = {"hook_event_name": "StopFailure", "error": word}
        if details is not None:
            failure = {"type": "error", "error": {"type": word + "_error", "message": details}}
            told["error_details"] = f"{status} {json.dumps(failure, separators=(',', ':'))}"
        told["last_assistant_message"] = text
        hooks = (self.setup or {}).get("hooks") or {}
        for hook in hooks.get("StopFailure", []):
            for callback_id in hook["hookCallbackIds"]:
                request = {"subtype": "hook_callback", "callback_id": callback_id, "input": told}
                self.pipes.write_line(
                    {"type": "control_request", "request_id": new_uuid(), "request": request})

    def emit_user(self, blocks: list[Step]) -> None:
        message = {"role": "user", "content": blocks}
        self.emit("user", message=message, parent_tool_use_id=None)

    def emit_init(self) -> None:
        servers = (self.setup or {}).get("sdkMcpServers") or []
        self.emit(
            "system", subtype="init", cwd=os.getcwd(), model=self.model,
            tools=[
                *(shown_name(tool["name"], tool["server"]) for tool in self.tools),
                *(["StructuredOutput"] if (self.setup or {}).get("jsonSchema") else [])],
            mcp_servers=[{"name": name, "status": "connected"} for name in servers],
            permissionMode="default", slash_commands=[], apiKeySource="none",
            claude_code_version=self.scenario.version, output_style="default", agents=[],
            skills=[], plugins=[])

    def emit_result(self, text: str, **fields: Json) -> None:
        """The last line of a turn; `fields` win over those of a success."""
        turn = self.turn or Turn()
        line: Step = {
            "subtype": "success", "is_error": False, "api_error_status": None,
            "duration_ms": int((time.monotonic() - turn.started_s) * 1000),
            "duration_api_ms": 1, "num_turns": 1 + turn.tool_results, "result": text,
            "stop_reason": None, "total_cost_usd": 0.0001 * self.queries,
            "usage": turn.usage, "modelUsage": self.model_usage(), "permission_denials": [],
            "terminal_reason": "completed",
        }
        line.update(fields)
        self.failed = bool(line["is_error"])
        turn.over = True
        self.emit("result", **line)

    def model_usage(self) -> Step:
        """What the model has used since the process began, as the result tells it."""
        names = ("inputTokens", "cacheReadInputTokens", "cacheCreationInputTokens",
                 "outputTokens")
        spent = dict(zip(names, (count * self.queries for count in USAGE.values())))
        spent.update(webSearchRequests=0, contextWindow=200000, maxOutputTokens=32000)
        return {self.model: spent} if self.queries else {}

    def emit_rate_limit(self, fields: Step) -> None:
        """The plan's usage, but only if it has changed since it was last told."""
        resets_s, week_s = self.started_s + 3000, self.started_s + 90000
        told: Step = {
            "status": "allowed", "resetsAt": resets_s, "rateLimitType": "five_hour",
            "overageStatus": "rejected", "isUsingOverage": False,
        }
        told.update(fields)
        if self.scenario.is_recent and "unifiedWindows" not in told:
            five_hour = {"utilization": 0.21, "resetsAt": told["resetsAt"],
                         "status": told["status"]}
            seven_day = {"utilization": 0.4, "resetsAt": week_s, "status": "allowed"}
            told["unifiedWindows"] = {"five_hour": five_hour, "seven_day": seven_day}
        if told != self.rate_limit_info:
            self.rate_limit_info = told
            self.emit("rate_limit_event", rate_limit_info=told)

    # -- one turn -------------------------------------------------------------

    @property
    def model(self) -> str:
        return self.options.get("--model", "claude-sonnet-4-6")

    def take_user_line(self, line: Step) -> None:
        self.scenario.refresh()
        content = line["message"]["content"]
        command = self.command_in(line)
        if command:
            self.emit_init()
            self.emit_synthetic(f"Unknown command: {command}")
            self.emit_result(f"Unknown command: {command}", num_turns=0)
            return
        is_result = any(block.get("type") == "tool_result" for block in as_blocks(content))
        line_id = None if is_result else line.get("uuid") or new_uuid()
        self.history.add("user", content, line_id)
        if line.get("shouldQuery") is False:
            self.emit_init()
            self.emit_result("", num_turns=0)
            return
        if self.scenario.is_recent:
            self.history.remind()
        if self.is_too_long():
            self.emit_init()
            self.emit("system", subtype="status", status="requesting")
            self.emit_synthetic(TOO_LONG, error="invalid_request")
            self.emit_result(TOO_LONG, is_error=True, stop_reason="stop_sequence",
                             terminal_reason="blocking_limit")
            return
        self.take_turn()

    def is_too_long(self) -> bool:
        """Whether the program refuses the prompt by itself."""
        env = self.settings.get("env", {})
        limit = env.get(BLOCKING_LIMIT, os.environ.get(BLOCKING_LIMIT))
        if not limit or self.scenario.fields.get("unlimited"):
            return False
        return len(json.dumps(self.history.for_model())) // 4 >= int(limit)

    def command_in(self, line: Step) -> str:
        """The slash command that the older program sees at the start of the last text."""
        texts = [block["text"] for block in as_blocks(line["message"]["content"])
                 if block.get("type") == "text"]
        if self.scenario.is_recent or not texts or not texts[-1].startswith("/"):
            return ""
        return str(texts[-1].split()[0])

    def take_turn(self) -> None:
        self.turn = Turn()
        self.emit_init()
        try:
            while not self.turn.over:
                self.query()
        except Interrupted:
            self.end_interrupted(self.turn)
        self.turn = None

    def query(self) -> None:
        """Ask the model, that is: play the next list of steps, and run the tools called."""
        turn = self.turn
        assert turn
        self.queries += 1
        setup = self.setup or {}
        record(
            "query", model=self.model, system=setup.get("systemPrompt", [AGENT_PROMPT]),
            settings=self.settings, thinking=self.thinking, schema=setup.get("jsonSchema"),
            tools=[{name: each for name, each in tool.items() if name != "server"}
                   for tool in self.tools],
            messages=self.history.for_model(),
            reminded=self.history.reminded())
        self.emit("system", subtype="status", status="requesting")
        steps = self.scenario.next_steps()
        if steps is None:
            steps = [{"say": f"You said: {self.history.last_user_text()}"}]
        turn.message = None
        self.play(steps)
        message = turn.message
        if message and not message.ended:
            step_finish(self, {"finish": "tool_use" if message.calls else "end_turn"})
        if turn.over:
            return
        if message and message.calls:
            self.run_tools(turn, message)
        else:
            # The script printed lines of its own, or none, and that was all.
            turn.over = True

    def play(self, steps: list[Step]) -> None:
        usages = [step["usage"] for step in steps if step.get("usage")]
        self.planned_usage = {**USAGE, **(usages[0] if usages else {})}
        for step in steps:
            if self.turn:
                self.pump(0)
            name = next((key for key in step if key in STEPS), None)
            if name is None:
                complain(f"fake_claude: no step in {json.dumps(step)}")
                leave(70, "bad scenario")
            STEPS[name](self, step)

    def end_interrupted(self, turn: Turn) -> None:
        note = "[Request interrupted by user]"
        message = turn.message
        if message and message.open_text:
            self.emit_blocks(message, [message.open_text])
            message.content.append(message.open_text)
        if message and message.content and not message.ended:
            self.history.add("assistant", message.content)
        calls = message.calls if message else []
        if calls:
            note = "[Request interrupted by user for tool use]"
            for call in calls:
                if call.asked and call.result is None:
                    self.ask(call.server, {"method": "notifications/cancelled",
                                        "params": {"requestId": CALL_ID}})
                call.result = call.result or tool_result(call.block["id"], REJECTED_TOOL, True)
                self.emit_user([call.result])
            self.history.add("user", [call.result for call in calls])
        self.history.add("user", note)
        self.emit_user(as_blocks(note))
        if message and not calls and self.scenario.is_recent:
            self.seem_to_end(message)
        self.emit_result(
            "", subtype="error_during_execution", is_error=True,
            stop_reason="tool_use" if calls else None,
            terminal_reason="aborted_tools" if calls else "aborted_streaming",
            errors=["[ede_diagnostic] result_type=user last_content_type=n/a"])

    def seem_to_end(self, message: Message) -> None:
        """The events that end an interrupted message; its stop reason is null."""
        if message.open_text:
            self.emit_event("content_block_stop", index=message.index - 1)
        self.emit_event("message_delta", delta={"stop_reason": None, "stop_sequence": None},
                        usage=dict(message.usage, output_tokens=1))
        self.emit_event("message_stop")

    # -- the model's message ---------------------------------------------------

    def message(self) -> Message:
        """The message that is being streamed; begins one if there is none."""
        turn = self.turn
        assert turn
        if turn.message is None or turn.message.ended:
            turn.message = Message(self.planned_usage)
            self.emit_event("message_start", message={
                "id": turn.message.id, "type": "message", "role": "assistant",
                "model": self.model, "content": [], "stop_reason": None,
                "stop_sequence": None, "usage": dict(self.planned_usage, output_tokens=1),
            })
        return turn.message

    def start_block(self, block: Step) -> Message:
        message = self.message()
        self.close_text()
        self.emit_event("content_block_start", index=message.index, content_block=block)
        return message

    def stop_block(self, message: Message, block: Step) -> None:
        # The finished block comes first, and only then the event that ends it.
        self.emit_blocks(message, [block])
        self.ask_first_tool(message)
        self.emit_event("content_block_stop", index=message.index)
        message.content.append(block)

    def close_text(self) -> None:
        message = self.message()
        if message.open_text is not None:
            block, message.open_text = message.open_text, None
            self.stop_block(message, block)

    def emit_delta(self, message: Message, kind: str, field: str, piece: str) -> None:
        delta = {"type": kind, field: piece}
        self.emit_event("content_block_delta", index=message.index, delta=delta)

    # -- tools of the client ----------------------------------------------------

    def may_call(self, server: str) -> bool:
        allowed = self.options.get("--allowedTools") or self.options.get("--allowed-tools", "")
        is_allowed = f"mcp__{server}" in allowed.split()
        return is_allowed or "--dangerously-skip-permissions" in self.options

    def ask(
        self, server: str, message: Step, then: Optional[Callable[[Step], None]] = None
    ) -> None:
        """Send the client's tool server a JSON-RPC message."""
        request_id = new_uuid()
        if then:
            self.awaited[request_id] = then
        self.pipes.write_line({
            "type": "control_request", "request_id": request_id,
            "request": {"subtype": "mcp_message", "server_name": server,
                        "message": {"jsonrpc": "2.0", **message}},
        })

    def connect_tools(self, server: str) -> None:
        """Shake hands with a tool server of the client and get its tools."""
        def listed(response: Step) -> None:
            self.connecting -= 1
            found = (mcp_result(response) or {}).get("tools", [])
            tools = [{**tool, "server": server} for tool in found]
            self.tools = sorted(self.tools + tools, key=lambda tool: str(tool["name"]))

        def connected(response: Step) -> None:
            self.ask(server, {"method": "notifications/initialized"})
            self.ask(server, {"method": "tools/list", "id": 1}, listed)

        self.connecting += 1
        client = {"name": "claude-code", "version": self.scenario.version}
        params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": client}
        self.ask(server, {"method": "initialize", "id": 0, "params": params}, connected)

    def wait_for_tools(self) -> None:
        """Wait until the client's tools are known, but not for ever."""
        deadline_s = time.monotonic() + 5
        while self.connecting and not self.pipes.ended and time.monotonic() < deadline_s:
            self.pump(0.1)

    def ask_first_tool(self, message: Message) -> None:
        """Ask for the first call without a result: there is never more than one under way."""
        call = next((call for call in message.calls if call.result is None), None)
        if call is None or call.asked or call.tool is None:
            return
        call.asked = True
        asked = call

        def answered(response: Step) -> None:
            asked.result = call_result(asked.block["id"], response)

        meta = {"claudecode/toolUseId": call.block["id"], "progressToken": 2}
        params = {"name": call.tool, "arguments": call.block["input"], "_meta": meta}
        self.ask(call.server, {"method": "tools/call", "id": CALL_ID, "params": params}, answered)

    def run_tools(self, turn: Turn, message: Message) -> None:
        """Get the results of the calls, one after the other, into the conversation."""
        for call in message.calls:
            self.ask_first_tool(message)
            while call.result is None and not self.pipes.ended:
                self.pump(None)
            if call.result is None:
                call.result = tool_result(call.block["id"], LOST_TOOL, True)
            self.emit_user([call.result])
        turn.tool_results += len(message.calls)
        self.history.add("user", [call.result for call in message.calls])


def shown_name(name: str, server: str) -> str:
    """The name by which the model knows a tool of the client."""
    plain = os.environ.get("CLAUDE_AGENT_SDK_MCP_NO_PREFIX") == "1"
    return name if plain else f"mcp__{server}__{name}"


def tool_result(call_id: str, content: Json, is_error: bool = False) -> Step:
    block = {"type": "tool_result", "tool_use_id": call_id, "content": content}
    return dict(block, is_error=True) if is_error else block


def mcp_result(response: Step) -> Json:
    """The result in the client's answer, None if it is an error."""
    return ((response.get("response") or {}).get("mcp_response") or {}).get("result")


def call_result(call_id: str, response: Step) -> Step:
    """The client's answer to tools/call as the model sees it."""
    result = mcp_result(response)
    if result is None:
        reply = (response.get("response") or {}).get("mcp_response") or {}
        failure = (reply.get("error") or {}).get("message") or response.get("error")
        return tool_result(call_id, str(failure), True)
    content = result.get("content")
    if result.get("isError"):
        texts = [part["text"] for part in content if part["type"] == "text"]
        return tool_result(call_id, "\n".join(texts).strip() or "Unknown error", True)
    return tool_result(call_id, content)


# ---------------------------------------------------------------------------
# Control requests
# ---------------------------------------------------------------------------

def answer_control(fake: FakeClaude, line: Step) -> None:
    request = line["request"]
    subtype = request.get("subtype")
    refused = subtype in fake.scenario.fields.get("unsupported", ())
    handler = None if refused else CONTROLS.get(subtype)
    response: Step = {"subtype": "success", "request_id": line.get("request_id")}
    if handler is None:
        response.update(subtype="error", error=f"Unsupported control request subtype: {subtype}")
    else:
        try:
            answer = handler(fake, request)
        except Refused as problem:
            response.update(subtype="error", error=str(problem))
        else:
            if answer is not None:
                response["response"] = answer
    fake.pipes.write_line({"type": "control_response", "response": response})


def control_initialize(fake: FakeClaude, request: Step) -> Step:
    if fake.setup is None:
        fake.setup = request
        for server in request.get("sdkMcpServers") or []:
            fake.connect_tools(server)
    account = {"tokenSource": "CLAUDE_CODE_OAUTH_TOKEN", "apiProvider": "firstParty"}
    return {"commands": [], "agents": [], "output_style": "default",
            "models": fake.scenario.fields.get("models", []),
            "available_output_styles": ["default"], "account": account, "pid": os.getpid()}


def control_settings(fake: FakeClaude, request: Step) -> None:
    settings = dict(request.get("settings") or {})
    if "env" in settings:
        settings["env"] = {**fake.settings.get("env", {}), **settings["env"]}
    fake.settings = {**fake.settings, **settings}


def control_thinking(fake: FakeClaude, request: Step) -> None:
    fake.thinking = request.get("max_thinking_tokens")


def control_interrupt(fake: FakeClaude, request: Step) -> Optional[Step]:
    fake.interrupted = fake.turn is not None
    if not fake.scenario.is_recent:
        return None
    waiting = [line.get("uuid") for line in fake.user_lines]
    if not request.get("cancel_queued"):
        return {"still_queued": waiting}
    fake.user_lines.clear()
    return {"still_queued": [], "cancelled": waiting}


def control_authenticate(fake: FakeClaude, request: Step) -> Step:
    """Begin a login: the page of the address shows CODE#STATE."""
    fake.login_state = f"state-of-{os.getpid()}"
    wanted = fake.scenario.fields.get("login") or {}
    url = wanted.get("url", "https://claude.com/cai/oauth/authorize?code=true&state=")
    return {"manualUrl": url + fake.login_state, "automaticUrl": url + fake.login_state}


def control_callback(fake: FakeClaude, request: Step) -> Step:
    """End a login with the code; there is no second try, as with the real program."""
    wanted = fake.scenario.fields.get("login") or {}
    if not fake.login_state:
        raise Refused("No active claude_authenticate flow")
    state, fake.login_state = fake.login_state, ""
    time.sleep(wanted.get("delay_ms", 0) / 1000)
    if "error" in wanted:
        raise Refused(wanted["error"])
    if (request["authorizationCode"], request["state"]) != (wanted.get("code", "good"), state):
        raise Refused("That code wasn't accepted. It may be incomplete, expired, already used, or "
                      "from an earlier sign-in attempt. Sign in again to get a new code."
                      if fake.scenario.is_recent else "Request failed with status code 400")
    account = {"email": "owner@example.com", "organization": "Example",
               "subscriptionType": "Claude Max", "apiProvider": "firstParty"}
    return {"account": wanted.get("account", account)}


def control_usage(fake: FakeClaude, request: Step) -> Step:
    session = {"total_cost_usd": 0.0001 * fake.queries, "model_usage": fake.model_usage()}
    usage = {"session": session, "subscription_type": None, "rate_limits_available": False,
             "rate_limits": None}
    return {**usage, **fake.scenario.fields.get("usage", {})}


def control_rewind(fake: FakeClaude, request: Step) -> Step:
    target = request["target_message_uuid"]
    answer = {"rewound": False, "prefillText": None, "precedingAssistantUuid": None}
    if fake.turn is not None or fake.connecting:
        return {**answer, "error": "turn running"}
    why_not = fake.history.forget(target, fake.scenario.is_recent)
    if why_not:
        return {**answer, "error": why_not}
    return {**answer, "rewound": True, "targetMessageUuid": target}


def control_model(fake: FakeClaude, request: Step) -> Step:
    """Change the system prompt, as the newer program does if the model named is its own."""
    if not fake.scenario.is_recent:
        return {}
    if request.get("only_if_model_is_current") and request.get("model") != fake.model:
        raise Refused("set_model: only_if_model_is_current is true, and the session cannot "
                      "confirm that it runs the model named.")
    if "system_prompt" in request:
        fake.setup = {**(fake.setup or {}), "systemPrompt": [request["system_prompt"]]}
    return {"model": fake.model}


def control_servers(fake: FakeClaude, request: Step) -> Step:
    for server in request["servers"]:
        fake.connect_tools(server)
    return {"added": list(request["servers"]), "removed": [], "errors": {}}


def control_status(fake: FakeClaude, request: Step) -> Step:
    return {"mcpServers": []}


CONTROLS: dict[Optional[str], Callable[[FakeClaude, Step], Optional[Step]]] = {
    "initialize": control_initialize,
    "apply_flag_settings": control_settings,
    "set_max_thinking_tokens": control_thinking,
    "interrupt": control_interrupt,
    "get_usage": control_usage,
    "claude_authenticate": control_authenticate,
    "claude_oauth_callback": control_callback,
    "rewind_conversation": control_rewind,
    "set_model": control_model,
    "mcp_set_servers": control_servers,
    "mcp_status": control_status,
}


# ---------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------

def words_of(text: str, chunks: Optional[int]) -> list[str]:
    """`text` in so many pieces of equal length, None = a piece for every word."""
    if chunks is None:
        words = text.split(" ")
        return [word + " " for word in words[:-1]] + words[-1:]
    size = max(1, -(-len(text) // chunks))
    return [text[at:at + size] for at in range(0, len(text), size)]


def step_say(fake: FakeClaude, step: Step) -> None:
    """{"say": text, "chunks": n}: text in deltas, one per word without "chunks".

    A "say" right after another one goes on with its block, unless "new_block" is true."""
    message = fake.message()
    if message.open_text is None or step.get("new_block"):
        message = fake.start_block({"type": "text", "text": ""})
        message.open_text = {"type": "text", "text": ""}
    block = message.open_text
    assert block is not None
    for piece in words_of(step["say"], step.get("chunks")):
        block["text"] += piece
        fake.emit_delta(message, "text_delta", "text", piece)


def step_think(fake: FakeClaude, step: Step) -> None:
    """{"think": text, "chunks": n, "signature": s}: a whole thinking block."""
    signature = step.get("signature", "c2lnbmF0dXJl")
    message = fake.start_block({"type": "thinking", "thinking": "", "signature": ""})
    for piece in words_of(step["think"], step.get("chunks")):
        fake.emit_delta(message, "thinking_delta", "thinking", piece)
        fake.emit("system", subtype="thinking_tokens", estimated_tokens=1)
    fake.emit_delta(message, "signature_delta", "signature", signature)
    block = {"type": "thinking", "thinking": step["think"], "signature": signature}
    fake.stop_block(message, block)


def step_tool(fake: FakeClaude, step: Step) -> None:
    """{"tool": {"name", "input", "id", "result"}}: a tool_use block; give the client's own name.

    A tool of the client, or of its server, is called there; "StructuredOutput" ends the turn with
    its input; any other tool is one of the program's own, with "result" as what it says."""
    wanted = step["tool"]
    name, given = wanted["name"], wanted.get("input", {})
    server = next((tool["server"] for tool in fake.tools if tool["name"] == name), "")
    of_client = bool(server)
    block = {"type": "tool_use", "id": wanted.get("id") or "toolu_" + os.urandom(12).hex(),
             "name": shown_name(name, server) if of_client else name, "input": given}
    result = None if of_client else tool_result(block["id"], wanted.get("result", "ok"))
    if of_client and not fake.may_call(server):
        denied = f"Claude requested permissions to use {name}, but you haven't granted it yet."
        result = tool_result(block["id"], denied, True)
    message = fake.start_block(dict(block, input={}))
    for piece in [""] + words_of(json.dumps(given), step.get("chunks", 2)):
        fake.emit_delta(message, "input_json_delta", "partial_json", piece)
    message.calls.append(Call(block, name if of_client else None, result, server))
    fake.stop_block(message, block)
    if name == "StructuredOutput" and fake.turn:
        fake.turn.structured_output = given
        fake.emit_user([tool_result(block["id"], "Structured output provided successfully")])


def step_search(fake: FakeClaude, step: Step) -> None:
    """{"search": query, "found": [...]}: a search that the API runs, and the blocks' content of
    its result, or an object with the reason of a failure."""
    given, search_id = {"query": step["search"]}, "srvtoolu_" + os.urandom(12).hex()
    block = {"type": "server_tool_use", "id": search_id, "name": "web_search", "input": given}
    message = fake.start_block(dict(block, input={}))
    for piece in ["", *words_of(json.dumps(given), 2)]:
        fake.emit_delta(message, "input_json_delta", "partial_json", piece)
    fake.stop_block(message, block)
    found = {"type": "web_search_tool_result", "tool_use_id": search_id, "content": step["found"]}
    fake.stop_block(fake.start_block(found), found)
    counted = message.usage.get("server_tool_use", {}).get("web_search_requests", 0) + 1
    message.usage = {**message.usage, "server_tool_use": {"web_search_requests": counted}}


def step_cite(fake: FakeClaude, step: Step) -> None:
    """{"cite": text, "citations": [...]}: a whole text block with its sources."""
    message = fake.start_block({"type": "text", "text": "", "citations": []})
    for citation in step["citations"]:
        fake.emit_event("content_block_delta", index=message.index,
                        delta={"type": "citations_delta", "citation": citation})
    for piece in words_of(step["cite"], 2):
        fake.emit_delta(message, "text_delta", "text", piece)
    block = {"type": "text", "text": step["cite"], "citations": step["citations"]}
    fake.stop_block(message, block)


def step_finish(fake: FakeClaude, step: Step) -> None:
    """{"finish": stop_reason, "usage": {...}, "stop_sequence": s, "rate_limit_info": {...}}:
    ends the message, and the turn too unless tools were called."""
    message, turn = fake.message(), fake.turn
    assert turn
    fake.close_text()
    stop = {"stop_reason": step["finish"], "stop_sequence": step.get("stop_sequence")}
    fake.emit_event("message_delta", delta=stop, usage=message.usage)
    fake.emit_event("message_stop")
    end_message(fake, turn, message, step)
    if turn.structured_output is not None:
        given = turn.structured_output
        fake.emit_result(json.dumps(given, separators=(",", ":")), structured_output=given,
                         stop_reason=step["finish"])
    elif not message.calls:
        texts = [block["text"] for block in message.content if block["type"] == "text"]
        fake.emit_result("".join(texts[-1:]), stop_reason=step["finish"])


def end_message(fake: FakeClaude, turn: Turn, message: Message, step: Step) -> None:
    """Put a complete message into the books."""
    message.ended = True
    if message.content:
        fake.history.add("assistant", message.content)
    for name in USAGE:
        turn.usage[name] += message.usage[name]
    fake.emit_rate_limit(step.get("rate_limit_info", {}))


def step_whole(fake: FakeClaude, step: Step) -> None:
    """{"whole": text}: an answer in one `assistant` line and without stream events, which is
    how the program ends a turn whose stream broke. What was streamed before it is void."""
    turn = fake.turn
    assert turn
    if turn.message and fake.scenario.is_recent:
        fake.emit_event("content_block_stop", index=turn.message.index)
        fake.emit_event("message_stop")
    message = Message(fake.planned_usage)
    message.content = as_blocks(step["whole"])
    end_message(fake, turn, message, step)
    fake.emit_blocks(message, message.content, stop_reason="end_turn", usage=message.usage)
    fake.emit_result(step["whole"], stop_reason="end_turn")
    turn.message = message


def step_restart(fake: FakeClaude, step: Step) -> None:
    """{"restart": true}: the stream broke, and the program asks again by itself. What was
    streamed is void, though it seems to end; the next steps are a new message."""
    turn = fake.turn
    assert turn
    if turn.message:
        if turn.message.open_text:
            fake.emit_event("content_block_stop", index=turn.message.index)
        fake.emit_event("message_stop")
    fake.emit("system", subtype="api_retry", attempt=1, max_retries=1, retry_delay_ms=500,
              error_status=None, error="unknown")
    turn.message = None


def step_api_error(fake: FakeClaude, step: Step) -> None:
    """{"api_error": {"status", "word", "text", "details"}, "resets_at": epoch s, "retries": n}:
    an error of the API as the program tells it. "resets_at" makes it a plan limit; "details" are
    the API's own words, where the program tells them only to a hook."""
    error = step["api_error"]
    status, word, text = error["status"], error["word"], error["text"]
    retries = step.get("retries", 0)
    for attempt in range(1, retries + 1):
        fake.emit("system", subtype="api_retry", attempt=attempt, max_retries=retries,
                  retry_delay_ms=500 * attempt, error_status=status, error=word)
    if step.get("resets_at"):
        fake.emit_rate_limit({"status": "rejected", "resetsAt": step["resets_at"]})
    fields: Step = {"error": word}
    if fake.scenario.is_recent:
        fields["api_error_status"] = status
    fake.emit_synthetic(text, **fields)
    fake.call_failure_hooks(status, word, text, error.get("details"))
    fake.emit_result(text, is_error=True, api_error_status=status, stop_reason="stop_sequence",
                     terminal_reason="api_error" if fake.scenario.is_recent else "completed")
    if fake.turn:
        fake.turn.message = None


def step_raw(fake: FakeClaude, step: Step) -> None:
    """{"raw": text} or {"raw": object}: that line, whatever it is."""
    line = step["raw"]
    fake.pipes.write((line if isinstance(line, str) else json.dumps(line)).encode() + b"\n")


def step_raw_bytes(fake: FakeClaude, step: Step) -> None:
    """{"raw_bytes_hex": "00ff"}: these bytes, without a line end."""
    fake.pipes.write(bytes.fromhex(step["raw_bytes_hex"]))


def step_stderr(fake: FakeClaude, step: Step) -> None:
    """{"stderr": text}: a line on stderr."""
    complain(step["stderr"])


def step_sleep(fake: FakeClaude, step: Step) -> None:
    """{"sleep_ms": n}: silence; control requests and signals are still heard."""
    fake.sleep(step["sleep_ms"] / 1000)


def step_wait(fake: FakeClaude, step: Step) -> None:
    """{"wait_for": path}: silence until that file is there."""
    deadline_s = time.monotonic() + LIFE_S
    while not os.path.exists(step["wait_for"]) and time.monotonic() < deadline_s:
        fake.sleep(0.005)


def step_exit(fake: FakeClaude, step: Step) -> None:
    """{"exit": code}: the process ends."""
    leave(step["exit"], "scripted")


def step_kill(fake: FakeClaude, step: Step) -> None:
    """{"kill": signal}: the process ends by this signal."""
    record("exit", why="scripted", code=-step["kill"])
    if step["kill"] != signal.SIGKILL:
        signal.signal(step["kill"], signal.SIG_DFL)
    os.kill(os.getpid(), step["kill"])


def step_hang(fake: FakeClaude, step: Step) -> None:
    """{"hang": true, "stubborn": true}: silence for ever. It ends by a signal or an interrupt;
    a stubborn one reads nothing and dies of SIGKILL only."""
    if step.get("stubborn"):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(LIFE_S)
    fake.sleep(LIFE_S)


def step_freeze(fake: FakeClaude, step: Step) -> None:
    """{"freeze": true}: stopped as by a debugger; only SIGCONT and SIGKILL are heeded."""
    os.kill(os.getpid(), signal.SIGSTOP)


def step_mute(fake: FakeClaude, step: Step) -> None:
    """{"mute": true}: from here on it takes every line and never says a word."""
    while os.read(0, 1 << 16):
        pass
    leave(0, "end of stdin")


def step_babble(fake: FakeClaude, step: Step) -> None:
    """{"babble": text, "on": 2, "pause_ms": n}: writes it again and again, on stdout or where
    it is told to, as fast as it can or with pauses, and reads nothing."""
    output, pause_s = step["babble"].encode(), step.get("pause_ms", 0) / 1000
    output *= 1 if pause_s else max(1, (1 << 16) // len(output))
    while True:
        os.write(step.get("on", 1), output)
        time.sleep(pause_s)


def step_grandchild(fake: FakeClaude, step: Step) -> None:
    """{"spawn_grandchild": true}: a child of this process that keeps its pipes open."""
    child = os.fork()
    if child == 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.execvp("sleep", ["sleep", str(LIFE_S)])
    record("grandchild", child=child)


def step_split(fake: FakeClaude, step: Step) -> None:
    """{"split": n}: from here on stdout comes in writes of n bytes; 0 = whole lines again."""
    fake.pipes.piece_bytes = step["split"]


def step_replay(fake: FakeClaude, step: Step) -> None:
    """{"replay": path, "lines": n, "skip": [types]}: the "out" lines of a transcript, or the
    first n of them, but for those of the types to skip. Ends the turn."""
    shown = 0
    with open(step["replay"], encoding="utf-8") as file:
        for entry in map(json.loads, file):
            line = entry.get("line")
            kind = line.get("type") if isinstance(line, dict) else None
            if entry.get("dir") != "out" or kind in step.get("skip", ()):
                continue
            if shown == step.get("lines"):
                break
            shown += 1
            fake.pump(0)
            step_raw(fake, {"raw": line})


STEPS: dict[str, Callable[[FakeClaude, Step], None]] = {
    "say": step_say,
    "think": step_think,
    "tool": step_tool,
    "search": step_search,
    "cite": step_cite,
    "finish": step_finish,
    "whole": step_whole,
    "restart": step_restart,
    "api_error": step_api_error,
    "raw": step_raw,
    "raw_bytes_hex": step_raw_bytes,
    "stderr": step_stderr,
    "sleep_ms": step_sleep,
    "wait_for": step_wait,
    "exit": step_exit,
    "kill": step_kill,
    "hang": step_hang,
    "freeze": step_freeze,
    "mute": step_mute,
    "babble": step_babble,
    "spawn_grandchild": step_grandchild,
    "split": step_split,
    "replay": step_replay,
}


# ---------------------------------------------------------------------------
# Program
# ---------------------------------------------------------------------------

def print_login(scenario: Scenario) -> NoReturn:
    logged_in = bool(scenario.fields.get("logged_in", True))
    status = {"loggedIn": logged_in, "authMethod": "oauth_token" if logged_in else "none",
              "apiProvider": "firstParty"}
    os.write(1, json.dumps(status, indent=2).encode() + b"\n")
    leave(0 if logged_in else 1, "auth status")


def main(arguments: list[str]) -> NoReturn:
    signal.signal(signal.SIGTERM, lambda number, frame: leave(143, "SIGTERM"))
    signal.signal(signal.SIGINT, lambda number, frame: leave(0, "SIGINT"))
    signal.alarm(LIFE_S)
    record("start", argv=arguments, env=dict(os.environ), cwd=os.getcwd())
    scenario = Scenario(os.environ.get("FAKE_CLAUDE"))
    if arguments[:1] == ["--version"]:
        notice = scenario.fields.get("notice", "")
        os.write(1, f"{notice}{scenario.version} (Claude Code)\n".encode())
        leave(0, "version")
    if arguments[:2] == ["auth", "status"]:
        print_login(scenario)
    options = parse_options(arguments)
    if options.get("--input-format") != "stream-json":
        complain("fake_claude: this program speaks stream-json only")
        leave(1, "no stream-json")
    fake = FakeClaude(scenario, options)
    try:
        time.sleep(scenario.fields.get("start_delay_ms", 0) / 1000)
        fake.play(scenario.fields.get("startup", []))
        fake.serve()
    except BrokenPipeError:
        leave(1, "nobody reads stdout")


if __name__ == "__main__":
    main(sys.argv[1:])
