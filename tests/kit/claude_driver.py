"""One claude process, real or fake, spoken to line by line."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Mapping, Optional, Sequence

Json = Any
CLAUDE_ARGS = (
    "-p", "--input-format", "stream-json", "--output-format", "stream-json", "--verbose",
    "--include-partial-messages", "--model", "claude-sonnet-4-6", "--tools", "",
    "--strict-mcp-config", "--setting-sources", "", "--disable-slash-commands",
    "--allowedTools", "mcp__client", "mcp__server",
)


class ClaudeDriver:
    """One claude process, real or fake, spoken to line by line; to be used in a `with`.

    tools   what the client's tool server lists. Its calls wait in `calls` for answer_call()
    more    what a second server lists, called "server"; its calls wait there too"""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], cwd: Path,
        tools: Sequence[Mapping[str, Json]] = (), more: Sequence[Mapping[str, Json]] = (),
    ) -> None:
        self.tools = {"client": list(tools), "server": list(more)}
        self.calls: list[dict[str, Json]] = []
        #: What hooks were told, each answered at once.
        self.hooks: list[dict[str, Json]] = []
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
            self.process.wait(60)
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

    def send_assistant(self, content: Json, **fields: Json) -> None:
        """Put an answer into the history; `fields` are of its message."""
        message = {"role": "assistant", "content": content, "id": f"msg_{os.urandom(8).hex()}",
                   **fields}
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
        if line["request"]["subtype"] == "hook_callback":
            self.hooks.append(line["request"]["input"])
            self.send({"type": "control_response", "response": {
                "subtype": "success", "request_id": line["request_id"], "response": {}}})
            return
        message = line["request"]["message"]
        method = message["method"]
        if method == "tools/call":
            self.calls.append(line)
        elif method == "tools/list":
            self._answer_mcp(line, {"tools": self.tools[line["request"]["server_name"]]})
        elif method == "initialize":
            self._answer_mcp(line, {
                "protocolVersion": message["params"]["protocolVersion"],
                "capabilities": {"tools": {}}, "serverInfo": {"name": "test", "version": "1"}})
        else:
            self._answer_mcp(line, {})

    # -- lines out -------------------------------------------------------------

    def until_result(self, timeout_s: float = 120) -> list[dict[str, Json]]:
        return self.until(lambda line: line["type"] == "result", timeout_s)

    def until_event(self, kind: str, timeout_s: float = 120) -> list[dict[str, Json]]:
        """The lines up to this event of the API's stream."""
        def is_event(line: dict[str, Json]) -> bool:
            return line["type"] == "stream_event" and bool(line["event"]["type"] == kind)

        return self.until(is_event, timeout_s)

    def until(
        self, wanted: Callable[[dict[str, Json]], bool], timeout_s: float = 120
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

    def wait(self, timeout_s: float = 60) -> tuple[int, str]:
        """The exit code and what was on stderr, once the process has ended."""
        code = self.process.wait(timeout_s)
        assert self.process.stderr
        return code, self.process.stderr.read().decode()
