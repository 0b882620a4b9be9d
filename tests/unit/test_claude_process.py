"""What is known of a claude from outside: how long to wait, its version, what it leaves."""
from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from claude_lines import START, stream
from clock import FakeClock
from processes import descriptors
from project import load_script

ocp = load_script("ocp_server.py")

Json = Any


def answer(request_id: str = "r_1") -> Json:
    """An answer to a control request."""
    return {"type": "control_response", "response": {"request_id": request_id}}


def controls(count: int) -> bytes:
    """So many control requests, and a question."""
    question = ocp.message_line(
        ocp.Message("user", ocp.text_blocks('{"type":"control_request"')), (2, 1, 329), ask=True)
    return b"".join([ocp.control_line("initialize") for _ in range(count)]) + question


class Waiting:
    """A patience with its clock."""

    def __init__(self) -> None:
        self.clock = FakeClock(0.0)
        self.detector = ocp.HangDetector(0.0)

    def tell(self, data: bytes) -> None:
        """Tells claude something."""
        self.detector.record_sent(data, self.clock())

    def hear(self, line: Json) -> None:
        """Gets a line of claude's."""
        self.detector.record_line(line, self.clock())

    def ends_s(self) -> float:
        """In how many seconds claude is taken for one that hangs, if it stays silent."""
        if self.detector.probe_at_s() < self.detector.hung_at_s():
            self.clock.now_s = max(self.clock.now_s, self.detector.probe_at_s())
            self.detector.record_probe()
        return float(self.detector.hung_at_s())


# -- patience -----------------------------------------------------------------


def test_a_claude_that_says_nothing_hangs_after_20_seconds() -> None:
    waiting = Waiting()
    waiting.tell(controls(0))

    assert waiting.detector.probe_at_s() == 10
    assert waiting.ends_s() == 20


@pytest.mark.parametrize("line", [
    {"type": "noise"}, {"type": ["result"]}, {}, {"type": "control_request"},
])
def test_what_means_nothing_is_no_sign_of_life(line: Json) -> None:
    waiting = Waiting()
    waiting.clock.advance(9)
    waiting.hear(line)

    assert waiting.ends_s() == 20


def test_a_claude_that_waits_for_the_api_is_asked_whether_it_is_there_again_and_again() -> None:
    waiting = Waiting()
    waiting.tell(controls(1))
    waiting.hear(answer())
    waiting.hear({"type": "system", "subtype": "init"})
    for _ in range(100):
        waiting.ends_s()
        waiting.clock.advance(9)
        waiting.hear(answer("presence"))

    assert waiting.ends_s() - waiting.clock() == 10


def test_a_control_request_is_answered_whatever_else_is_said() -> None:
    waiting = Waiting()
    waiting.tell(controls(2))
    waiting.hear(answer())
    for _ in range(3):
        waiting.clock.advance(6)
        waiting.hear(answer("presence"))

    assert waiting.ends_s() == 20


def test_a_turn_that_has_begun_shows_that_all_was_heard() -> None:
    waiting = Waiting()
    waiting.tell(controls(2))
    waiting.clock.advance(15)
    waiting.hear({"type": "stream_event"})

    assert waiting.ends_s() == 35


def test_time_in_which_nobody_listened_is_not_claude_s() -> None:
    waiting = Waiting()
    waiting.tell(controls(1))
    waiting.detector.exclude_time(100)

    assert waiting.ends_s() == 120


def test_a_word_of_a_client_is_no_control_request() -> None:
    waiting = Waiting()
    waiting.tell(controls(0) + controls(0))
    waiting.detector.record_probe()
    waiting.hear({"type": "system"})

    assert waiting.detector.hung_at_s() == float("inf")


# -- versions -----------------------------------------------------------------


@pytest.mark.parametrize("shown", [
    "2.1.329 (Claude Code)", "  2.1.329\n", "v2.1.329", "2.1.329-beta.1 (Claude Code)\n",
    "Update available: 2.1.300 -> 2.1.400\n2.1.329 (Claude Code)\n",
    "npm notice 11.0.1\n\n2.1.329\n", "\x1b[33mclaude 2.1.329\x1b[0m",
    "2.1.329 (Claude Code)\nnpm notice 11.0.1\n",
    "(node:7) Warning of v20.11.0\r\n2.1.329 (Claude Code)\r\n",
])
def test_a_version_is_found_wherever_it_stands(shown: str) -> None:
    assert ocp.version_in(shown) == (2, 1, 329)


@pytest.mark.parametrize("shown", ["", "hello", "2.1", "None"])
def test_what_tells_no_version_has_none(shown: str) -> None:
    assert ocp.version_in(shown) is None


class Installed:
    """A claude program in a few lines of shell, and who looks for it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "claude"
        self.clock = FakeClock()
        environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "CLAUDE_BIN": str(self.path)}
        self.program = ocp.ClaudeProgram(ocp.load_config(environ), environ, (), self.clock)

    def install(self, script: str) -> None:
        """Puts a whole program in place."""
        draft = self.path.with_name("draft")
        draft.write_text(f"#!/bin/sh\n{script}\n")
        draft.chmod(0o755)
        os.replace(draft, self.path)

    def failure(self) -> Any:
        """Why there is no program."""
        with pytest.raises(ocp.OcpError) as caught:
            self.program.resolve()
        return caught.value


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    """A claude that was there a moment ago."""
    found = Installed(tmp_path)
    found.install("echo 2.1.329")
    found.program.resolve()
    return found


AWAY = {"gone": "", "half": "exit 1", "broken": "echo not yet", "no script": "exec /nonexistent"}


@pytest.mark.parametrize("name", AWAY)
def test_a_program_that_is_away_is_waited_for_a_minute(installed: Installed, name: str) -> None:
    installed.install(AWAY[name])
    if name == "gone":
        installed.path.unlink()
    first = installed.failure()
    installed.clock.advance(59)
    later = installed.failure()
    installed.clock.advance(2)
    last = installed.failure()

    for error in (first, later):
        assert (error.status, error.error_code) == (503, "claude_unavailable")
        assert error.headers() == {"Retry-After": "5"}
    assert isinstance(last, ocp.ClaudeMissing)
    assert last.headers() == {"x-should-retry": "false"}


def test_a_program_that_comes_back_is_found_at_once(installed: Installed) -> None:
    installed.path.unlink()
    installed.failure()
    installed.install("echo 2.1.400")

    assert installed.program.resolve().version == (2, 1, 400)


def test_a_program_that_fails_while_it_is_updated_is_asked_again_soon(tmp_path: Path) -> None:
    installed = Installed(tmp_path)
    installed.install(f"cat {tmp_path}/version")
    (tmp_path / "version").write_text("2.1.329")
    installed.program.resolve()
    installed.install(f"cat {tmp_path}/version ")
    (tmp_path / "version").write_text("")
    installed.failure()
    (tmp_path / "version").write_text("2.1.400")
    installed.clock.advance(6)

    assert installed.program.resolve().version == (2, 1, 400)


def test_a_program_that_was_never_there_is_not_waited_for(tmp_path: Path) -> None:
    assert isinstance(Installed(tmp_path).failure(), ocp.ClaudeMissing)


def test_one_that_became_too_old_is_not_waited_for(installed: Installed) -> None:
    installed.install("echo 2.1.100")

    assert isinstance(installed.failure(), ocp.ClaudeTooOld)


def test_the_word_of_a_process_counts_more_than_that_of_a_script(installed: Installed) -> None:
    installed.program.correct_version((2, 1, 400))

    assert installed.program.resolve().version == (2, 1, 400)


def test_a_process_that_is_too_old_makes_its_program_too_old(installed: Installed) -> None:
    installed.program.correct_version((2, 1, 100))

    assert isinstance(installed.failure(), ocp.ClaudeTooOld)


def test_a_program_that_prints_without_end_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocp, "_END_GRACE_S", 0.1)
    installed = Installed(tmp_path)
    installed.install("exec yes hello")

    assert isinstance(installed.failure(), ocp.ClaudeMissing)


# -- after an answer ----------------------------------------------------------


class Piped:
    """A child without a process: its pipes hold what it prints."""

    def __init__(self, *lines: Json) -> None:
        self.pid = os.getpid()
        self.is_stopping = False
        self.input, self.stdin = os.pipe()
        self.stdout, self._output = os.pipe()
        self.stderr, self._errors = os.pipe()
        self._silent, self._silence = os.pipe()
        self._ends = [self.input, self.stdin, self.stdout, self._output, self.stderr,
                      self._errors, self._silent, self._silence]
        for end in self._ends:
            os.set_blocking(end, False)
        self.prints(*lines)

    def prints(self, *lines: Json) -> None:
        """Prints more."""
        os.write(self._output, b"".join(ocp.to_json(line) + b"\n" for line in lines))

    def runs(self) -> bool:
        return True

    def close(self) -> None:
        for end in self._ends:
            os.close(end)

    # It is its own client, which waits.

    def fileno(self) -> int:
        return self._silent

    def gone(self) -> bool:
        return False

    def can_detect_hangup(self) -> bool:
        return True


def test_nothing_touches_a_process_once_the_last_event_of_its_answer_is_out() -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather"}
    child = Piped(
        START, stream("content_block_start", index=0, content_block=call),
        stream("message_delta", delta={"stop_reason": "tool_use"}), {"type": "keep_alive"})
    clock = FakeClock()
    process = ocp.ClaudeProcess(child, "claude-x", clock=clock)
    reader = ocp.TurnReader((ocp.Tool("weather", "", {}),))
    limits = ocp.WaitLimits(child, clock() + 60, 0.0)
    question = ocp.TurnInput([b"question\n"])
    before = descriptors(os.getpid())
    try:
        events = process.converse(question, limits, reader)
        for event in events:
            if isinstance(event, ocp.Finished):
                break
        # Somebody else has it from now on.
        state = dict(vars(process))
        assert descriptors(os.getpid()) == before
        clock.advance(5)

        assert list(events) == []

        assert vars(process) == state
        assert os.read(child.input, 100) == b"question\n"
    finally:
        child.close()


# -- a question that is taken back --------------------------------------------


def reply(request_id: str, **response: Json) -> Json:
    """The successful reply to a control request."""
    return {"type": "control_response", "response": {
        "subtype": "success", "request_id": request_id, "response": response}}


def refusal(request_id: str) -> Json:
    """The reply to a control request that claude does not know."""
    return {"type": "control_response", "response": {
        "subtype": "error", "request_id": request_id, "error": "Unsupported"}}


STOPPED = reply("stop", still_queued=[], cancelled=[])
DROPPED = reply("stop", still_queued=[], cancelled=["q"])
REWOUND = reply("rewind", rewound=True)
NOT_FOUND = reply("rewind", rewound=False, error="target not found")
RESULT = {"type": "result", "subtype": "error_during_execution", "is_error": True}

#: What claude says, and whether it may serve again.
TAKEN_BACK = {
    "interrupted": ([STOPPED, RESULT, REWOUND], True),
    "not begun": ([DROPPED, NOT_FOUND], True),
    "its end came first": ([RESULT, STOPPED, REWOUND], True),
    "interrupted before it was recorded": ([STOPPED, RESULT, NOT_FOUND], True),
    "replies to what was sent before": ([reply("r1"), STOPPED, RESULT, reply("r2"), REWOUND], True),
    "more of the answer": ([
        stream("content_block_delta", delta={"type": "text_delta", "text": "max_tokens"}),
        STOPPED, stream("message_delta", delta={"stop_reason": None}), RESULT, REWOUND], True),
    "a complete answer": ([
        stream("message_delta", delta={"stop_reason": "end_turn"}), RESULT, STOPPED, REWOUND],
        True),
    "an answer that was cut": ([
        stream("message_delta", delta={"stop_reason": "max_tokens"}), STOPPED, RESULT, REWOUND],
        False),
    "an answer that was cut later": ([
        STOPPED, stream("message_delta", delta={"stop_reason": "pause_turn"}), RESULT, REWOUND],
        False),
    "no interrupt": ([refusal("stop"), RESULT, REWOUND], False),
    "no rewind": ([STOPPED, RESULT, refusal("rewind")], False),
    "still running": ([
        DROPPED, reply("rewind", rewound=False, error="turn running")], False),
    "not the last one": ([
        STOPPED, RESULT, reply("rewind", rewound=False, error="stale target")], False),
}


@pytest.mark.parametrize("name", TAKEN_BACK)
def test_only_a_claude_that_says_so_has_forgotten_the_question(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, expected = TAKEN_BACK[name]
    ids = iter(["stop", "rewind"])
    monkeypatch.setattr(ocp, "new_id", lambda prefix: next(ids))
    child = Piped(START, *lines)
    clock = FakeClock()
    process = ocp.ClaudeProcess(child, "claude-x", clock=clock)
    limits = ocp.WaitLimits(ocp.NoClient(), clock() + 60, 0.0)
    try:
        # As after a question.
        with contextlib.closing(process.converse(
                ocp.TurnInput([b"question\n"]), limits, ocp.TurnReader())) as events:
            next(events)
        assert process.has_asked

        assert process.take_back(ocp.RewindPoint("q", 0), limits) is expected
        sent = [json.loads(line) for line in os.read(child.input, 9_000).splitlines()[1:]]
    finally:
        child.close()
    assert sent[0]["request"] == {"subtype": "interrupt", "cancel_queued": True}
    assert all(each["request"]["target_message_uuid"] == "q" for each in sent[1:])


def test_no_tool_of_the_server_runs_once_its_turn_has_ended(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tools(ocp.Beside):
        def __init__(self) -> None:
            self.told: list[str] = []

        def advance(self, *_: object) -> None:
            self.told.append("advance")

        def close(self) -> None:
            self.told.append("close")

    ids = iter(["stop", "rewind"])
    monkeypatch.setattr(ocp, "new_id", lambda prefix: next(ids))
    child, clock, tools = Piped(START), FakeClock(), Tools()
    process = ocp.ClaudeProcess(child, "claude-x", clock=clock)
    limits = ocp.WaitLimits(ocp.NoClient(), clock() + 60, 0.0)
    try:
        with contextlib.closing(process.converse(
                ocp.TurnInput([b"question\n"]), limits, ocp.TurnReader(), tools)) as events:
            next(events)
            next(events)
        # claude does not say that it has cancelled this one.
        process.tools.own_calls.append(ocp.OwnCall("toolu_1", "openclaw_cli", {}))
        child.prints(STOPPED, RESULT, REWOUND)
        assert process.take_back(ocp.RewindPoint("q", 0), limits)
    finally:
        child.close()

    assert tools.told == ["advance", "close"]
    # Nor does the next turn answer what the last one asked for.
    assert process.tools.own_calls == []


# -- what is left -------------------------------------------------------------


@pytest.mark.parametrize("env, folder", [
    ({"XDG_RUNTIME_DIR": "/run/user/7", "TMPDIR": "/t"}, "/run/user/7/cc-socks"),
    ({"CLAUDE_CODE_TMPDIR": "/c", "TMPDIR": "/t"}, "/c/cc-socks"),
    ({"TMPDIR": "/t"}, "/t/cc-socks"), ({}, "/tmp/cc-socks"),
])
def test_a_socket_lies_where_claude_puts_it(env: dict[str, str], folder: str) -> None:
    left = ocp.leftover_paths(77, env, "/tmp/ocp-1", "linux")

    assert left == [f"{folder}/77.sock", f"/tmp/cc-socks-{os.getuid()}/77.sock"]


def test_on_macos_the_logs_of_the_work_folder_are_left_too(tmp_path: Path) -> None:
    (tmp_path / "ocp_1").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "ocp_1")

    left = ocp.leftover_paths(77, {"HOME": "/Users/me"}, str(tmp_path / "link"), "darwin")

    name = f"{tmp_path.resolve()}/ocp-1".replace("/", "-").replace("_", "-")
    assert left[2:] == [f"/Users/me/Library/Caches/claude-cli-nodejs/{name}"]
