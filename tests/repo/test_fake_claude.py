"""The fake claude's script: every step, the log, and how processes share a scenario.

What it has in common with the real program is in tests/contract/test_fake_claude.py."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any, Optional, Sequence

import pytest

from claude_driver import CLAUDE_ARGS, ClaudeDriver
from processes import processes_with
from project import TRANSCRIPTS, clean_env, read_json_lines, run_compiled
from server import FAKE_CLAUDE, Place, Turns
from waiting import eventually

Json = Any


class Bench:
    """A place with a scenario in which fakes can be started."""

    def __init__(self, folder: Path) -> None:
        self.place = Place(folder)
        self.place.prepare()

    def start(
        self, turns: Optional[Turns] = None, *,
        tools: Sequence[Json] = (), args: Sequence[str] = CLAUDE_ARGS, **fields: Json,
    ) -> ClaudeDriver:
        if turns is not None or fields:
            self.place.write_scenario(turns or [], **fields)
        env = self.place.env({"CLAUDE_AGENT_SDK_MCP_NO_PREFIX": "1"}, ())
        command = [str(self.place.claude), *args]
        return ClaudeDriver(command, env, self.place.folder, tools)

    def log(self, event: str) -> list[dict[str, Json]]:
        logged = read_json_lines(self.place.fake_log)
        return [each for each in logged if each["event"] == event]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def answer(claude: ClaudeDriver, content: Json = "hi") -> str:
    return str(claude.turn(content)[-1]["result"])


def deltas(lines: Sequence[Json], field: str = "text") -> list[str]:
    events = [line["event"] for line in lines if line["type"] == "stream_event"]
    return [event["delta"][field] for event in events if field in event.get("delta", {})]


# -- without a script --------------------------------------------------------------

def test_without_a_script_it_repeats_the_last_user_text(bench: Bench) -> None:
    with bench.start() as claude:
        lines = claude.turn([{"type": "text", "text": "no"}, {"type": "text", "text": "a b c"}])
    assert deltas(lines) == ["You ", "said: ", "a ", "b ", "c"]
    assert lines[-1]["result"] == "You said: a b c"
    assert lines[-1]["usage"] == {
        "input_tokens": 10, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 3,
        "output_tokens": 7}


def test_without_any_environment_it_works_too(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", *run_compiled(FAKE_CLAUDE), *CLAUDE_ARGS]
    with ClaudeDriver(command, clean_env(HOME=str(tmp_path)), tmp_path) as claude:
        assert answer(claude, "x") == "You said: x"


def test_version_and_login_state_are_scripted(bench: Bench) -> None:
    with bench.start(version="1.0.5", args=["--version"]) as claude:
        assert claude.process.stdout and claude.process.stdout.read() == b"1.0.5 (Claude Code)\n"
        assert claude.wait()[0] == 0
    for logged_in in (True, False):
        with bench.start(logged_in=logged_in, args=["auth", "status"]) as claude:
            assert claude.process.stdout
            assert json.loads(claude.process.stdout.read())["loggedIn"] is logged_in
            assert claude.wait()[0] == int(not logged_in)


def test_without_stream_json_it_refuses(bench: Bench) -> None:
    with bench.start(args=["-p", "hello"]) as claude:
        assert claude.wait()[0] == 1


def test_without_partial_messages_nothing_is_streamed(bench: Bench) -> None:
    args = [arg for arg in CLAUDE_ARGS if arg != "--include-partial-messages"]
    with bench.start(args=args) as claude:
        kinds = [line["type"] for line in claude.turn("hi")]
    assert kinds == ["system", "system", "assistant", "rate_limit_event", "result"]


# -- steps: the model's message ----------------------------------------------------

def test_say_is_cut_into_as_many_pieces_as_wanted(bench: Bench) -> None:
    with bench.start([[{"say": "abcdefgh", "chunks": 3}]]) as claude:
        assert deltas(claude.turn("hi")) == ["abc", "def", "gh"]


def test_two_says_are_one_block_unless_told_otherwise(bench: Bench) -> None:
    with bench.start([
        [{"say": "a"}, {"say": "b"}], [{"say": "a"}, {"say": "b", "new_block": True}],
    ]) as claude:
        one, two = claude.turn("1"), claude.turn("2")
    texts = [[line["message"]["content"][0]["text"] for line in lines
              if line["type"] == "assistant"] for lines in (one, two)]
    assert texts == [["ab"], ["a", "b"]]


def test_finish_sets_stop_reason_usage_and_plan_usage(bench: Bench) -> None:
    usage = {"input_tokens": 100, "output_tokens": 50}
    limits = {"status": "allowed_warning", "rateLimitType": "seven_day"}
    with bench.start([[{"say": "a"}, {
        "finish": "stop_sequence", "stop_sequence": "X", "usage": usage,
        "rate_limit_info": limits}]]) as claude:
        lines = claude.turn("hi")
    start = next(line["event"]["message"] for line in lines
                 if line.get("event", {}).get("type") == "message_start")
    final = next(line["event"] for line in lines
                 if line.get("event", {}).get("type") == "message_delta")
    info = next(line for line in lines if line["type"] == "rate_limit_event")
    assert (start["usage"]["input_tokens"], start["usage"]["output_tokens"]) == (100, 1)
    assert final["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "X"}
    assert (final["usage"]["output_tokens"], lines[-1]["usage"]["output_tokens"]) == (50, 50)
    assert limits.items() <= info["rate_limit_info"].items()


def test_plan_usage_is_told_again_only_when_it_changes(bench: Bench) -> None:
    warning = {"finish": "end_turn", "rate_limit_info": {"status": "allowed_warning"}}
    with bench.start([[{"say": "a"}], [{"say": "b"}], [{"say": "c"}, warning]]) as claude:
        told = [any(line["type"] == "rate_limit_event" for line in claude.turn("hi"))
                for _ in range(3)]
    assert told == [True, False, True]


def test_an_api_error_can_have_a_reset_time_and_retries(bench: Bench) -> None:
    error = {"status": 429, "word": "rate_limit", "text": "You've hit your limit"}
    with bench.start([[{"api_error": error, "resets_at": 123, "retries": 2}]]) as claude:
        lines = claude.turn("hi")
    info = next(line["rate_limit_info"] for line in lines if line["type"] == "rate_limit_event")
    assert [line["attempt"] for line in lines if line.get("subtype") == "api_retry"] == [1, 2]
    assert (info["status"], info["resetsAt"]) == ("rejected", 123)
    assert (lines[-1]["is_error"], lines[-1]["api_error_status"]) == (True, 429)


def test_a_tool_that_is_not_the_clients_runs_by_itself(bench: Bench) -> None:
    tool = {"name": "Bash", "input": {"command": "ls"}, "id": "toolu_1", "result": "files"}
    with bench.start([[{"say": "Look:"}, {"tool": tool}], [{"say": "Done."}]]) as claude:
        lines = claude.turn("hi")
    results = [line["message"]["content"] for line in lines if line["type"] == "user"]
    assert results == [[{"type": "tool_result", "tool_use_id": "toolu_1", "content": "files"}]]
    assert (lines[-1]["result"], lines[-1]["num_turns"]) == ("Done.", 2)
    assert not claude.calls


def test_a_tool_of_the_client_needs_to_be_allowed(bench: Bench) -> None:
    tools = [{"name": "find", "inputSchema": {"type": "object"}}]
    args = [arg for arg in CLAUDE_ARGS if arg != "mcp__client"]
    turns: Turns = [[{"tool": {"name": "find"}}], [{"say": "Done."}]]
    with bench.start(turns, tools=tools, args=args) as claude:
        claude.control("initialize", sdkMcpServers=["client"])
        lines = claude.turn("hi")
    denied = next(line["message"]["content"][0] for line in lines if line["type"] == "user")
    assert denied["is_error"] and "permissions" in denied["content"]


# -- steps: trouble ------------------------------------------------------------------

def test_raw_lines_come_as_they_are(bench: Bench) -> None:
    turns: Turns = [[
        {"raw": "not json"}, {"raw": {"type": "new_thing"}}, {"raw_bytes_hex": "ff0a"}]]
    with bench.start(turns) as claude:
        claude.send_user("hi")
        claude.until(lambda line: line.get("subtype") == "status")
        expected = b'not json\n{"type": "new_thing"}\n\xff\n'
        assert claude.raw_output(len(expected)) == expected


def test_split_lines_are_still_the_same_lines(bench: Bench) -> None:
    with bench.start([[{"split": 3}, {"say": "a\u00e4\u20ac\U0001f600 b"}]]) as claude:
        assert answer(claude) == "a\u00e4\u20ac\U0001f600 b"


def test_stderr_and_exit(bench: Bench) -> None:
    with bench.start([[{"say": "a"}, {"stderr": "boom"}, {"exit": 3}]]) as claude:
        claude.send_user("hi")
        claude.until_event("content_block_delta")
        assert claude.wait() == (3, "boom\n")
    assert bench.log("exit")[0]["code"] == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_kill(bench: Bench, number: signal.Signals) -> None:
    with bench.start([[{"kill": int(number)}]]) as claude:
        claude.send_user("hi")
        assert claude.wait()[0] == -number


def test_sleep_keeps_it_silent_but_not_deaf(bench: Bench) -> None:
    with bench.start([[{"sleep_ms": 300}, {"say": "late"}]]) as claude:
        started_s = time.monotonic()
        assert answer(claude) == "late"
        assert time.monotonic() - started_s > 0.29
    with bench.start([[{"sleep_ms": 60_000}, {"say": "late"}]]) as claude:
        claude.send_user("hi")
        claude.until(lambda line: line.get("subtype") == "status")
        claude.control("get_usage")
        assert "result" not in [line["type"] for line in claude.lines]


def test_a_hang_ends_by_interrupt_or_signal(bench: Bench) -> None:
    with bench.start([[{"hang": True}], [{"say": "back"}]]) as claude:
        claude.send_user("hi")
        claude.until(lambda line: line.get("subtype") == "status")
        claude.control("interrupt")
        assert claude.until_result()[-1]["is_error"]
        assert answer(claude) == "back"
    with bench.start() as claude:
        claude.send_user("hi")
        claude.until(lambda line: line.get("subtype") == "status")
        claude.process.terminate()
        assert claude.wait()[0] == 143


def ignores(pid: int, number: signal.Signals) -> bool:
    """Whether a process has made itself deaf to a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_stubborn_hang_dies_of_sigkill_only(bench: Bench) -> None:
    with bench.start([[{"hang": True, "stubborn": True}]]) as claude:
        claude.send_user("hi")
        claude.until(lambda line: line.get("subtype") == "status")
        eventually(lambda: ignores(claude.process.pid, signal.SIGTERM))
        claude.close_stdin()
        claude.process.send_signal(signal.SIGINT)
        claude.process.terminate()
        time.sleep(0.2)
        assert claude.process.poll() is None
        claude.process.kill()
        assert claude.wait()[0] == -signal.SIGKILL


def test_a_grandchild_keeps_the_pipes_open(bench: Bench) -> None:
    with bench.start([[{"spawn_grandchild": True}, {"say": "a"}]]) as claude:
        claude.turn("hi")
        child = bench.log("grandchild")[0]["child"]
        claude.process.kill()
        claude.process.wait()
        assert claude.process.stdout
        assert not select.select([claude.process.stdout], [], [], 0.1)[0]
        assert eventually(lambda: child in processes_with(bench.place.folder))
        os.kill(child, signal.SIGKILL)
    eventually(lambda: child not in processes_with(bench.place.folder))


def test_replay_prints_the_lines_of_a_transcript(bench: Bench) -> None:
    transcript = bench.place.folder / "transcript.jsonl"
    lines = [("in", {"type": "user"}), ("out", {"type": "control_response", "response": {}}),
             ("out", {"type": "odd"}), ("out", {"type": "result", "is_error": False})]
    transcript.write_text("".join(
        json.dumps({"dir": way, "line": line}) + "\n" for way, line in lines))
    replay = {"replay": str(transcript), "skip": ["control_response"]}
    with bench.start([[replay], [{**replay, "lines": 1}, {"exit": 0}]]) as claude:
        whole = claude.turn("hi")
        claude.send_user("again")
        claude.until(lambda line: line["type"] == "odd")
        assert claude.wait()[0] == 0
    assert [line["type"] for line in whole] == ["system", "system", "odd", "result"]


@pytest.mark.parametrize(
    "path", sorted(TRANSCRIPTS.glob("*.jsonl")),
    ids=lambda path: str(path.stem))
def test_every_transcript_can_be_replayed(bench: Bench, path: Path) -> None:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    expected = sum(entry["dir"] == "out" for entry in entries)
    with bench.start([[{"replay": str(path)}, {"exit": 0}]]) as claude:
        claude.send_user("hi")
        assert claude.process.stdout
        printed = [json.loads(line) for line in claude.process.stdout]
    assert len(printed) == expected + 2


def test_a_step_that_does_not_exist_is_an_error_of_the_test(bench: Bench) -> None:
    with bench.start([[{"sya": "a"}]]) as claude:
        claude.send_user("hi")
        code, complaint = claude.wait()
    assert code == 70 and "sya" in complaint


# -- scenarios ---------------------------------------------------------------------

def test_startup_steps_come_before_anything_is_read(bench: Bench) -> None:
    with bench.start(startup=[{"stderr": "no luck"}, {"exit": 9}]) as claude:
        assert claude.wait() == (9, "no luck\n")


def test_a_slow_start_is_slow(bench: Bench) -> None:
    with bench.start(start_delay_ms=200) as claude:
        started_s = time.monotonic()
        claude.control("initialize")
        assert time.monotonic() - started_s > 0.15


def test_the_last_turn_repeats_or_not(bench: Bench) -> None:
    turns = [[{"say": "1"}], [{"say": "2"}]]
    with bench.start(turns) as claude:
        assert [answer(claude) for _ in range(3)] == ["1", "2", "2"]
    with bench.start(turns, repeat_last=False) as claude:
        assert [answer(claude) for _ in range(3)] == ["1", "2", "You said: hi"]


def test_turns_are_counted_per_process_or_over_all_of_them(bench: Bench) -> None:
    turns = [[{"say": "1"}], [{"say": "2"}]]
    for shared, second in ((False, "1"), (True, "2")):
        with bench.start(turns, shared=shared) as one, bench.start() as two:
            assert (answer(one), answer(two)) == ("1", second)


def test_a_new_scenario_reaches_processes_that_run_already(bench: Bench) -> None:
    with bench.start([[{"say": "old 1"}], [{"say": "old 2"}]]) as claude:
        assert answer(claude) == "old 1"
        bench.place.write_scenario([[{"say": "new 1"}], [{"say": "new 2"}]])
        assert [answer(claude), answer(claude)] == ["new 1", "new 2"]


def test_a_login_with_plan_limits_is_scripted(bench: Bench) -> None:
    limits = {"five_hour": {"utilization": 12, "resets_at": "2030-01-01T00:00:00Z"}}
    fields = {"rate_limits_available": True, "rate_limits": limits, "subscription_type": "max"}
    with bench.start(usage=fields) as claude:
        usage = claude.control("get_usage")["response"]
    assert fields.items() <= usage.items() and "session" in usage


# -- log ---------------------------------------------------------------------------

def test_the_log_has_start_lines_queries_and_exit(bench: Bench) -> None:
    with bench.start() as claude:
        claude.control("initialize", systemPrompt=["S"], jsonSchema={"type": "object"})
        claude.control("apply_flag_settings", settings={"env": {"A": "1"}})
        claude.control("apply_flag_settings", settings={"env": {"B": "2"}, "effortLevel": "low"})
        claude.control("set_max_thinking_tokens", max_thinking_tokens=0)
        claude.turn("hi")
        claude.close_stdin()
        claude.wait()
    start, = bench.log("start")
    query, = bench.log("query")
    ends, = bench.log("exit")
    assert start["argv"] == list(CLAUDE_ARGS)
    assert start["env"]["FAKE_CLAUDE"] == str(bench.place.scenario)
    assert start["cwd"] == str(bench.place.folder)
    assert [each["line"]["type"] for each in bench.log("line")] == ["control_request"] * 4 + [
        "user"]
    assert query["system"] == ["S"] and query["schema"] == {"type": "object"}
    assert query["settings"] == {"env": {"A": "1", "B": "2"}, "effortLevel": "low"}
    assert query["thinking"] == 0 and query["tools"] == []
    assert query["messages"] == [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert (ends["why"], ends["code"]) == ("end of stdin", 0)
    assert {start["pid"], query["pid"], ends["pid"]} == {claude.process.pid}


def test_history_that_is_not_waited_for_gets_out_of_order(bench: Bench) -> None:
    door = bench.place.folder / "door"
    with bench.start([[{"wait_for": str(door)}, {"say": "x"}]]) as claude:
        claude.send_user("first")
        claude.until(lambda line: line.get("subtype") == "status")
        claude.send_user("past", shouldQuery=False)
        claude.send_assistant([{"type": "text", "text": "past answer"}])
        eventually(lambda: bench.log("line")[-1]["line"]["type"] == "assistant")
        door.touch()
        claude.until_result()
        claude.until_result()
        claude.turn("now")
    texts = [block["text"] for message in bench.log("query")[-1]["messages"]
             for block in message["content"]]
    assert texts.index("past answer") < texts.index("past")
