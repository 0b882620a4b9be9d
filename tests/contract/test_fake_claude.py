"""The fake claude and the real ones, asked the same and expected to answer the same."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Sequence

import pytest

import depth
import stub_api as stub
from claude_driver import CLAUDE_ARGS, ClaudeDriver
from programs import HOW_TO_INSTALL, real_claude_env, real_claudes
from project import clean_env, read_json_lines, run_compiled
from server import FAKE_CLAUDE

Json = Any
Line = dict[str, Json]

TOOLS = [
    {"name": name, "description": name, "inputSchema": {"type": "object", "properties": {}}}
    for name in ("zeta", "alpha")
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]}

GREETING = "Hello to you"
TEXT_MESSAGE = [
    "status", "message_start", "content_block_start", "content_block_delta", "assistant",
    "content_block_stop", "message_delta", "message_stop",
]


class Answer(NamedTuple):
    """What the model is to say: for the fake, and for a stub of the API."""
    steps: Sequence[Mapping[str, Json]]
    replies: Sequence[stub.Reply]


def text(words: str) -> Answer:
    return Answer([{"say": words}], [stub.text(words)])


def thought(thinking: str, words: str) -> Answer:
    return Answer([{"think": thinking}, {"say": words}], [stub.thinking(thinking, words)])


def calls(*wanted: tuple[str, Mapping[str, Json]]) -> Answer:
    steps = [{"tool": {"name": name, "input": given}} for name, given in wanted]
    return Answer(steps, [stub.tool_calls(wanted)])


def half(words: str, seconds: float) -> Answer:
    """Some text, and then silence."""
    return Answer([{"say": words}, {"sleep_ms": seconds * 1000}], [stub.hang(words, seconds)])


def refused(
    status: int, word: str, message: str, shown: str, tries: int = 1, details: Optional[str] = None
) -> Answer:
    error = {"status": status, "word": word, "text": shown, "details": details}
    steps = [{"api_error": error, "retries": tries - 1}]
    return Answer(steps, [stub.error(status, message)] * tries)


# ---------------------------------------------------------------------------
# Two kinds of claude
# ---------------------------------------------------------------------------

class Subject:
    """A claude under test. `script` says what the model answers, `queries` what it was asked."""

    def __init__(self, version: str, command: Sequence[str], folder: Path) -> None:
        self.version = version
        self.command = command
        self.folder = folder
        self.env = clean_env(
            HOME=str(folder / "home"), CLAUDE_AGENT_SDK_MCP_NO_PREFIX="1",
            CLAUDE_CODE_DISABLE_ATTACHMENTS="1", CLAUDE_CODE_MAX_RETRIES="1",
            DISABLE_AUTO_COMPACT="1", DISABLE_COMPACT="1")
        (folder / "home").mkdir()
        (folder / "work").mkdir()

    def start(
        self, *args: str, tools: Sequence[Mapping[str, Json]] = (), keep: bool = False,
        more: Sequence[Mapping[str, Json]] = (),
    ) -> ClaudeDriver:
        forget = () if keep else ("--no-session-persistence",)
        command = [*self.command, *CLAUDE_ARGS, *forget, *args]
        return ClaudeDriver(command, self.env, self.folder / "work", tools, more)

    def script(self, *answers: Answer) -> None:
        raise NotImplementedError

    def queries(self) -> list[dict[str, Json]]:
        raise NotImplementedError


class FakeSubject(Subject):
    def __init__(self, version: str, folder: Path) -> None:
        super().__init__(
            version, [sys.executable, "-I", "-S", *run_compiled(FAKE_CLAUDE)], folder)
        self._scenario = folder / "scenario.json"
        self._log = folder / "fake.log"
        self.env.update(FAKE_CLAUDE=str(self._scenario), FAKE_CLAUDE_LOG=str(self._log))
        self.script()

    def script(self, *answers: Answer) -> None:
        turns = [answer.steps for answer in answers]
        scenario = {"version": self.version, "turns": turns, "repeat_last": False,
                    "shared": True}
        self._scenario.write_text(json.dumps(scenario))

    def queries(self) -> list[dict[str, Json]]:
        events = read_json_lines(self._log)
        return [self._query(event) for event in events if event["event"] == "query"]

    def _query(self, event: Line) -> dict[str, Json]:
        env = event["settings"].get("env", {})
        extra = json.loads(env.get("CLAUDE_CODE_EXTRA_BODY", "{}"))
        return {
            "system": event["system"],
            "messages": plain_messages(event["messages"]),
            "tools": [tool["name"] for tool in event["tools"]],
            "max_tokens": int(env.get("CLAUDE_CODE_MAX_OUTPUT_TOKENS", "32000")),
            "temperature": extra.get("temperature"),
            "effort": event["settings"].get("effortLevel", "high"),
            "thinks": event["thinking"] != 0,
            "reminded": event["reminded"],
        }


class RealSubject(Subject):
    def __init__(self, version: str, path: Path, folder: Path, api: stub.StubApi) -> None:
        super().__init__(version, [str(path)], folder)
        self._api = api
        self.env.update(real_claude_env(api.url))

    def script(self, *answers: Answer) -> None:
        for answer in answers:
            self._api.enqueue(*answer.replies)

    def queries(self) -> list[dict[str, Json]]:
        return [self._query(request.body) for request in self._api.requests]

    def _query(self, body: Mapping[str, Json]) -> dict[str, Json]:
        return {
            # The first two are the program's own, and not to be changed.
            "system": [block["text"] for block in body["system"][2:]],
            "messages": plain_messages(body["messages"]),
            "tools": [tool["name"] for tool in body.get("tools") or []],
            "max_tokens": body["max_tokens"],
            "temperature": body.get("temperature"),
            "effort": body["output_config"]["effort"],
            "thinks": body.get("thinking", {}).get("type", "disabled") != "disabled",
            "reminded": reminded(body["messages"]),
        }


def reminded(messages: Sequence[Mapping[str, Json]]) -> int:
    """The number of the message with the program's reminders."""
    (number,) = [number for number, message in enumerate(messages)
                 if "<system-reminder>" in json.dumps(message["content"])]
    return number


def plain_messages(messages: Sequence[Mapping[str, Json]]) -> list[tuple[str, list[Json]]]:
    """Role and blocks, without what the program adds of its own."""
    plain: list[tuple[str, list[Json]]] = []
    for message in messages:
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        kept = [block for block in map(plain_block, blocks) if block.get("text") != ""]
        if plain and plain[-1][0] == message["role"]:
            plain[-1][1].extend(kept)
        elif kept:
            plain.append((message["role"], kept))
    return plain


def plain_block(block: Mapping[str, Json]) -> dict[str, Json]:
    fields = {name: value for name, value in block.items() if name != "cache_control"}
    if fields["type"] == "text":
        fields["text"] = without_reminder(fields["text"])
    if fields["type"] == "tool_result":
        content = fields["content"]
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content)
        fields["content"] = without_reminder(content)
    return fields


def without_reminder(words: str) -> str:
    return re.sub(r"<system-reminder>.*?</system-reminder>", "", words, flags=re.DOTALL).strip()


def said(role: str, *words: str) -> tuple[str, list[Json]]:
    return role, [{"type": "text", "text": each} for each in words]


class Kind(NamedTuple):
    """A claude to be asked."""
    version: str
    #: None for the fake one.
    path: Optional[Path]


SUBJECTS = [
    pytest.param(Kind("2.1.329", None), id="fake-2.1.329"),
    pytest.param(Kind("2.1.197", None), id="fake-2.1.197"),
]
# What a pinned claude does changes with its version only, so the gate asks the fake one alone.
SUBJECTS += [
    pytest.param(Kind(*found), id=f"real-{found[0]}", marks=pytest.mark.exhaustive)
    for found in real_claudes()
] or [pytest.param(None, id="real", marks=pytest.mark.skip(reason=HOW_TO_INSTALL))]


@contextmanager
def subject_of(kind: Kind, folder: Path) -> Iterator[Subject]:
    if kind.path is None:
        yield FakeSubject(kind.version, folder)
        return
    with stub.StubApi() as api:
        yield RealSubject(kind.version, kind.path, folder, api)


@pytest.fixture(scope="module", params=SUBJECTS)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture
def subject(kind: Kind, tmp_path: Path) -> Iterator[Subject]:
    """A claude for one test, which starts as many processes as it needs."""
    with subject_of(kind, tmp_path) as found:
        yield found


class Greeted(NamedTuple):
    """A process that has answered its first question, and the lines that came with the answer."""
    claude: ClaudeDriver
    lines: list[Line]


@pytest.fixture(scope="module")
def greeted(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Greeted]:
    """One process for the tests of what a process says at any time, or of its first answer."""
    with subject_of(kind, tmp_path_factory.mktemp("greeted")) as subject:
        subject.script(text(GREETING))
        with subject.start() as claude:
            ready(claude)
            yield Greeted(claude, claude.turn("hi"))


def ready(claude: ClaudeDriver, **fields: Json) -> None:
    setup = {"systemPrompt": ["Be brief."], "hooks": None, **fields}
    assert claude.control("initialize", **setup)["subtype"] == "success"


def shape(lines: Sequence[Line]) -> list[str]:
    """The kinds of the lines in their order; a run of deltas or retries counts once."""
    kinds: list[str] = []
    for line in lines:
        kind = str(line["type"])
        if kind == "stream_event":
            kind = line["event"]["type"]
        elif kind == "system":
            kind = line["subtype"]
        ours = kind in ("control_request", "control_response")
        known = kind in ("init", "status", "api_retry") or line["type"] != "system"
        goes_on = kinds[-1:] == [kind] and kind in ("content_block_delta", "api_retry")
        if known and not ours and not goes_on:
            kinds.append(kind)
    return kinds


# ---------------------------------------------------------------------------
# The contract
# ---------------------------------------------------------------------------

def test_version_is_the_first_word_of_version(subject: Subject) -> None:
    with ClaudeDriver(
            [*subject.command, "--version"], subject.env, subject.folder) as claude:
        assert claude.process.stdout
        assert claude.process.stdout.read().decode().split()[0] == subject.version
        assert claude.wait()[0] == 0


def test_a_turn_has_its_lines_in_this_order(greeted: Greeted) -> None:
    assert shape(greeted.lines) == ["init", *TEXT_MESSAGE, "rate_limit_event", "result"]


def test_deltas_blocks_and_result_tell_the_same_text(greeted: Greeted) -> None:
    lines = greeted.lines
    deltas = [line["event"]["delta"] for line in lines if line["type"] == "stream_event"
              and line["event"]["type"] == "content_block_delta"]
    finished = next(line for line in lines if line["type"] == "assistant")
    assert "".join(delta["text"] for delta in deltas) == GREETING
    assert finished["message"]["content"] == [{"type": "text", "text": GREETING}]
    result = lines[-1]
    assert (result["result"], result["subtype"]) == (GREETING, "success")
    assert (result["is_error"], result["stop_reason"]) == (False, "end_turn")


def test_usage_is_in_the_stream_and_in_the_result(greeted: Greeted) -> None:
    lines = greeted.lines
    events = [line["event"] for line in lines if line["type"] == "stream_event"]
    start = next(event["message"]["usage"] for event in events if "message" in event)
    final = next(event["usage"] for event in events if event["type"] == "message_delta")
    for usage in (start, final, lines[-1]["usage"]):
        assert usage["input_tokens"] == 10
        assert usage["cache_read_input_tokens"] == 5
        assert usage["cache_creation_input_tokens"] == 3
    assert (start["output_tokens"], final["output_tokens"]) == (1, 7)
    assert lines[-1]["usage"]["output_tokens"] == 7


def test_thinking_is_a_block_of_its_own_with_a_signature(subject: Subject) -> None:
    subject.script(thought("let me see", "yes"))
    with subject.start() as claude:
        ready(claude)
        lines = claude.turn("hi")
    deltas = [line["event"]["delta"]["type"] for line in lines if line["type"] == "stream_event"
              and line["event"]["type"] == "content_block_delta"]
    blocks = [line["message"]["content"][0] for line in lines if line["type"] == "assistant"]
    assert list(dict.fromkeys(deltas)) == ["thinking_delta", "signature_delta", "text_delta"]
    assert [block["type"] for block in blocks] == ["thinking", "text"]
    assert blocks[0]["thinking"] == "let me see" and blocks[0]["signature"]


@pytest.mark.differs_by_version
def test_plan_usage_is_told(greeted: Greeted, kind: Kind) -> None:
    info = next(line["rate_limit_info"] for line in greeted.lines
                if line["type"] == "rate_limit_event")
    assert (info["status"], info["rateLimitType"]) == ("allowed", "five_hour")
    assert time.time() < info["resetsAt"] < time.time() + 6000
    assert ("unifiedWindows" in info) == (kind.version != "2.1.197")


def test_history_reaches_the_model_as_it_was_sent(subject: Subject) -> None:
    call = {"type": "tool_use", "id": "toolu_9", "name": "zeta", "input": {"q": 1}}
    result = {"type": "tool_result", "tool_use_id": "toolu_9", "content": "nine"}
    with subject.start() as claude:
        ready(claude)
        past = claude.past("one")
        claude.send_assistant([{"type": "text", "text": "eins"}])
        claude.past([{"type": "text", "text": "two"}])
        claude.send_assistant([
            {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
            {"type": "text", "text": "zwei"}, call])
        claude.turn([result])
        claude.turn("three")
    assert shape(past) == ["init", "result"]
    assert past[-1]["num_turns"] == 0
    first, second = subject.queries()
    history = [said("user", "one"), said("assistant", "eins"), said("user", "two"),
               ("assistant", [{"type": "text", "text": "zwei"}, call]), ("user", [result])]
    answer = second["messages"][5]
    assert first["system"] == ["Be brief."]
    assert first["messages"] == history
    assert second["messages"] == [*history, answer, said("user", "three")]
    assert answer[0] == "assistant" and answer[1][0]["text"]


@pytest.mark.differs_by_version
def test_thinking_of_the_history_stays_if_it_is_said_to_be_of_the_same_model(
    subject: Subject,
) -> None:
    thinking = [{"type": "thinking", "thinking": "hm", "signature": "c2ln"},
                {"type": "redacted_thinking", "data": "c2VhbGVk"}]
    words = [{"type": "text", "text": "eins"}]
    named = ("claude-sonnet-4-6", "claude-sonnet-4-6-20260101", "claude-opus-4-8", None)
    with subject.start() as claude:
        ready(claude)
        for model in named:
            claude.past("one")
            claude.send_assistant([*thinking, *words], **({"model": model} if model else {}))
        claude.turn("two")
    answers = [blocks for role, blocks in subject.queries()[0]["messages"] if role == "assistant"]
    recent = subject.version != "2.1.197"
    # 2.1.197 wants the exact id.
    assert answers == [
        [*thinking, *words], [*thinking, *words] if recent else words, words, words]


def limit(claude: ClaudeDriver, tokens: str) -> None:
    env = {"CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE": tokens}
    assert claude.control("apply_flag_settings", settings={"env": env})["subtype"] == "success"


@pytest.mark.differs_by_version
def test_reminders_stand_beside_the_first_message_that_asks(subject: Subject) -> None:
    recent = subject.version != "2.1.197"
    for first_asks in (True, False):
        with subject.start() as claude:
            ready(claude)
            claude.turn("one") if first_asks else claude.past("one")
            if not first_asks:
                claude.send_assistant([{"type": "text", "text": "eins"}])
            claude.turn("two")
            claude.turn("three")
    assert [query["reminded"] for query in subject.queries()] == [
        0, 0, 0, *([2, 2] if recent else [0, 0])]


@pytest.mark.differs_by_version
def test_a_question_beyond_the_limit_is_refused_without_asking_and_keeps_the_reminders(
    subject: Subject,
) -> None:
    subject.script(text("zwei"), text("drei"))
    with subject.start() as claude:
        ready(claude)
        limit(claude, "1")
        lines = claude.turn("one")
        assert subject.queries() == []
        limit(claude, "1000000000")
        claude.send_assistant([{"type": "text", "text": "eins"}])
        claude.turn("two", uuid=question_id(2))
        assert forgets(claude, 2)["rewound"] is True
        claude.turn("three")
    assert shape(lines) == ["init", "status", "assistant", "result"]
    assert lines[-2]["message"]["model"] == "<synthetic>"
    assert (lines[-1]["is_error"], lines[-1]["terminal_reason"]) == (True, "blocking_limit")
    assert (lines[-1]["api_error_status"], lines[-1]["result"]) == (None, "Prompt is too long")
    history = [said("user", "one"), said("assistant", "eins")]
    assert [(query["messages"], query["reminded"]) for query in subject.queries()] == [
        ([*history, said("user", "two")], 0), ([*history, said("user", "three")], 0)]


def test_user_messages_in_a_row_become_one(subject: Subject) -> None:
    with subject.start() as claude:
        ready(claude)
        claude.past("one")
        claude.past("two")
        claude.turn("three")
    assert subject.queries()[0]["messages"] == [said("user", "one", "two", "three")]


def test_only_the_first_initialize_sets_the_system_prompt(subject: Subject) -> None:
    with subject.start() as claude:
        ready(claude)
        ready(claude, systemPrompt=["Be verbose."])
        claude.turn("hi")
    assert subject.queries()[0]["system"] == ["Be brief."]


def test_an_empty_system_prompt_is_none_and_a_missing_one_is_the_agents(
    subject: Subject,
) -> None:
    with subject.start() as claude:
        ready(claude, systemPrompt=[])
        claude.turn("hi")
    with subject.start() as claude:
        claude.turn("hi")
    empty, missing = subject.queries()
    assert empty["system"] == []
    assert "agent" in missing["system"][0]


def test_settings_reach_the_next_request(subject: Subject) -> None:
    env = {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "77",
           "CLAUDE_CODE_EXTRA_BODY": '{"temperature":0.5}'}
    with subject.start() as claude:
        ready(claude)
        claude.turn("before")
        answers = [
            claude.control("apply_flag_settings", settings={"env": env, "effortLevel": "low"}),
            claude.control("set_max_thinking_tokens", max_thinking_tokens=0)]
        claude.turn("after")
        claude.control("set_max_thinking_tokens", max_thinking_tokens=None)
        claude.turn("restored")
    assert [answer["subtype"] for answer in answers] == ["success", "success"]
    before, after, restored = subject.queries()
    assert (before["max_tokens"], before["temperature"]) == (32000, None)
    assert (before["effort"], before["thinks"]) == ("high", True)
    assert (after["max_tokens"], after["temperature"]) == (77, 0.5)
    assert (after["effort"], after["thinks"]) == ("low", False)
    assert restored["thinks"]


def test_an_unknown_control_request_is_an_error_and_no_end(greeted: Greeted) -> None:
    answer = greeted.claude.control("nonsense")
    result = greeted.claude.turn("hi")[-1]
    assert (answer["subtype"], answer["error"]) == (
        "error", "Unsupported control request subtype: nonsense")
    assert not result["is_error"]


def test_get_usage_tells_the_session_and_that_no_limits_are_known(subject: Subject) -> None:
    with subject.start() as claude:
        ready(claude)
        claude.turn("hi")
        usage = claude.control("get_usage")["response"]
    assert usage["session"]["model_usage"]["claude-sonnet-4-6"]["outputTokens"] == 7
    assert usage["rate_limits_available"] is False


# -- errors --------------------------------------------------------------------

@pytest.mark.differs_by_version
def test_what_the_api_said_of_a_prompt_that_is_too_long_is_told_to_a_hook(
    subject: Subject,
) -> None:
    said = "prompt is too long: 250123 tokens > 200000 maximum"
    shown = "Prompt is too long"
    subject.script(refused(400, "invalid_request", said, shown, details=said))
    # Else it looks for something to compact, and its text speaks of that.
    subject.env["DISABLE_COMPACT"] = "1"
    with subject.start() as claude:
        ready(claude, hooks={"StopFailure": [{"hookCallbackIds": ["failure"]}]})
        lines = claude.turn("hi")
        again = claude.turn("hi again")
    assert shape(lines) == ["init", "status", "assistant", "result"]
    # The hook is called before the turn ends, and its answer is not waited for.
    assert [line["type"] for line in lines[-3:]] == ["assistant", "control_request", "result"]
    (told,) = claude.hooks
    assert (told["hook_event_name"], told["error"]) == ("StopFailure", "invalid_request")
    assert told["last_assistant_message"] == shown == lines[-1]["result"]
    status, _, failure = told["error_details"].partition(" ")
    assert (status, json.loads(failure)["error"]["message"]) == ("400", said)
    assert not again[-1]["is_error"]


def test_an_api_error_is_a_synthetic_message_and_an_error_result(subject: Subject) -> None:
    shown = "Failed to authenticate. API Error: 403 No."
    subject.script(refused(403, "authentication_failed", "No.", shown))
    with subject.start() as claude:
        ready(claude)
        lines = claude.turn("hi")
        again = claude.turn("hi again")
    assert shape(lines) == ["init", "status", "assistant", "result"]
    message, result = lines[-2]["message"], lines[-1]
    assert (message["model"], message["content"][0]["text"]) == ("<synthetic>", shown)
    assert lines[-2]["error"] == "authentication_failed"
    assert (result["is_error"], result["api_error_status"]) == (True, 403)
    assert (result["subtype"], result["result"]) == ("success", shown)
    assert not again[-1]["is_error"]
    assert subject.queries()[-1]["messages"] == [said("user", "hi", "hi again")]


def test_retries_are_told_and_the_last_failure_is_the_result(subject: Subject) -> None:
    shown = "Failed to authenticate. API Error: 401 Who?"
    subject.script(refused(401, "authentication_failed", "Who?", shown, tries=2))
    with subject.start() as claude:
        ready(claude)
        lines = claude.turn("hi")
    retry = next(line for line in lines if line.get("subtype") == "api_retry")
    assert shape(lines) == ["init", "status", "api_retry", "assistant", "result"]
    assert (retry["attempt"], retry["max_retries"], retry["error_status"]) == (1, 1, 401)
    assert (retry["error"], retry["retry_delay_ms"] > 0) == ("authentication_failed", True)
    assert (lines[-1]["api_error_status"], lines[-1]["result"]) == (401, shown)


def test_a_plan_limit_comes_with_its_reset_time(subject: Subject) -> None:
    shown = "You've hit your limit"
    error = {"status": 429, "word": "rate_limit", "text": shown}
    resets_at = int(time.time() + 3600)
    subject.script(Answer(
        [{"api_error": error, "resets_at": resets_at}], [stub.plan_limit(3600)]))
    with subject.start() as claude:
        ready(claude)
        lines = claude.turn("hi")
    info = next(line["rate_limit_info"] for line in lines if line["type"] == "rate_limit_event")
    assert shape(lines) == ["init", "status", "rate_limit_event", "assistant", "result"]
    assert (info["status"], abs(info["resetsAt"] - resets_at) < 10) == ("rejected", True)
    assert lines[-2]["error"] == "rate_limit"
    assert lines[-1]["api_error_status"] == 429
    assert lines[-1]["result"].startswith(shown)


def test_a_stream_that_fails_ends_with_a_whole_answer_in_one_line(subject: Subject) -> None:
    subject.script(Answer(
        [{"say": "Half "}, {"whole": "All of it."}],
        [stub.stream_error("Half "), stub.text("All of it.")]))
    with subject.start() as claude:
        ready(claude)
        lines = claude.turn("hi")
    assert "message_delta" not in shape(lines)
    messages = [line["message"] for line in lines if line["type"] == "assistant"]
    assert [message["content"][0]["text"] for message in messages] == ["All of it."]
    assert messages[0]["stop_reason"] == "end_turn"
    assert (lines[-1]["is_error"], lines[-1]["result"]) == (False, "All of it.")


@pytest.mark.differs_by_version
def test_a_cut_stream_is_void_and_the_answer_begins_again(subject: Subject) -> None:
    recent = subject.version != "2.1.197"
    again: Sequence[Line] = [{"restart": True}, {"say": "All of it."}]
    subject.script(Answer(
        [{"say": "Half "}, *(again if recent else [{"whole": "All of it."}])],
        # The pause lets the first piece through before the connection is gone.
        [stub.text(["Half ", "it "], gap_s=0.2, ending="cut"), stub.text("All of it.")]))
    with subject.start() as claude:
        ready(claude)
        lines = claude.turn("hi")
    begun = ["message_start", "content_block_start", "content_block_delta"]
    void = [*begun, "content_block_stop", "message_stop", "api_retry", *TEXT_MESSAGE[1:],
            "rate_limit_event", "result"]
    whole = [*begun, "rate_limit_event", "assistant", "result"]
    assert shape(lines) == ["init", "status", *(void if recent else whole)]
    messages = [line["message"] for line in lines if line["type"] == "assistant"]
    assert [message["content"][0]["text"] for message in messages] == ["All of it."]
    assert (lines[-1]["is_error"], lines[-1]["result"]) == (False, "All of it.")


# -- forgetting --------------------------------------------------------------------

def question_id(number: int) -> str:
    # Only its first digits are compared.
    return str(uuid.uuid5(uuid.NAMESPACE_OID, str(number)))


def forgets(claude: ClaudeDriver, number: int) -> Line:
    """The answer to a request to forget a question."""
    answer = claude.control("rewind_conversation", target_message_uuid=question_id(number))
    assert answer["subtype"] == "success"
    return dict(answer["response"])


def test_the_last_question_is_forgotten_with_what_came_of_it(subject: Subject) -> None:
    subject.script(text("eins"), thought("hm", "zwei"), text("drei"), text("vier"))
    with subject.start() as claude:
        ready(claude)
        claude.turn("one")
        for number, words in ((2, "two"), (3, "three")):
            claude.turn(words, uuid=question_id(number))
            assert forgets(claude, number)["rewound"] is True
        claude.turn("four")
    first = [said("user", "one"), said("assistant", "eins")]
    assert [query["messages"] for query in subject.queries()] == [
        first[:1], [*first, said("user", "two")], [*first, said("user", "three")],
        [*first, said("user", "four")]]


@pytest.mark.differs_by_version
def test_the_only_question_is_forgotten_by_a_recent_one(subject: Subject) -> None:
    recent = subject.version != "2.1.197"
    with subject.start() as claude:
        ready(claude)
        claude.turn("one", uuid=question_id(1))
        answer = forgets(claude, 1)
        claude.turn("two")
    assert answer["rewound"] is recent
    assert recent or answer["error"] == "no preceding assistant"
    messages = subject.queries()[1]["messages"]
    assert (messages == [said("user", "two")]) is recent
    assert (messages[0] == said("user", "one")) is not recent


def test_what_was_told_before_stays_when_a_question_is_forgotten(subject: Subject) -> None:
    call = {"type": "tool_use", "id": "toolu_9", "name": "zeta", "input": {"q": 1}}
    result = {"type": "tool_result", "tool_use_id": "toolu_9", "content": "nine"}
    with subject.start() as claude:
        ready(claude)
        claude.past("one")
        claude.send_assistant([call])
        claude.past([result])
        claude.send_assistant([{"type": "text", "text": "zwei"}])
        claude.turn("two", uuid=question_id(2))
        assert forgets(claude, 2)["rewound"] is True
        claude.turn("three")
    history = [said("user", "one"), ("assistant", [call]), ("user", [result]),
               said("assistant", "zwei")]
    assert subject.queries()[1]["messages"] == [*history, said("user", "three")]


def test_only_the_last_question_can_be_forgotten(subject: Subject) -> None:
    with subject.start() as claude:
        ready(claude)
        claude.turn("one")
        claude.turn("two", uuid=question_id(2))
        claude.turn("three", uuid=question_id(3))
        refusals = [forgets(claude, 2), forgets(claude, 9)]
        claude.turn("four")
    assert [(each["rewound"], each["error"]) for each in refusals] == [
        (False, "stale target"), (False, "target not found")]
    assert len(subject.queries()[3]["messages"]) == 7


@pytest.mark.differs_by_version
def test_questions_are_forgotten_one_after_the_other_also_told_ones(subject: Subject) -> None:
    call = {"type": "tool_use", "id": "toolu_9", "name": "zeta", "input": {"q": 1}}
    result = {"type": "tool_result", "tool_use_id": "toolu_9", "content": "nine"}
    with subject.start() as claude:
        ready(claude)
        for number in (1, 2):
            claude.send_user("told", uuid=question_id(number), shouldQuery=False)
            claude.until_result()
            claude.send_assistant([{**call, "id": f"toolu_{number}"}])
            claude.past([{**result, "tool_use_id": f"toolu_{number}"}])
            claude.send_assistant([{"type": "text", "text": "So."}])
        for number in (3, 4):
            claude.turn("asked", uuid=question_id(number))
        answers = [forgets(claude, number) for number in (2, 4, 3, 2, 1)]
        claude.turn("last")
    recent = subject.version != "2.1.197"
    assert [answer["rewound"] for answer in answers] == [False, True, True, True, recent]
    first = [said("user", "told"), ("assistant", [{**call, "id": "toolu_1"}]),
             ("user", [{**result, "tool_use_id": "toolu_1"}]), said("assistant", "So.")]
    assert subject.queries()[-1]["messages"] == [*([] if recent else first), said("user", "last")]


@pytest.mark.differs_by_version
@pytest.mark.parametrize("is_server_first", [True, *depth.rest(False)])
def test_calls_of_two_servers_come_one_after_the_other_each_to_its_own(
    subject: Subject, is_server_first: bool
) -> None:
    wanted = [("middle", {}), ("zeta", {"q": 1})]
    subject.script(calls(*(wanted if is_server_first else wanted[::-1])), text("Done."))
    middle = {"name": "middle", "description": "m",
              "inputSchema": {"type": "object", "properties": {}}}
    with subject.start(tools=TOOLS, more=[middle]) as claude:
        ready(claude, sdkMcpServers=["client", "server"])
        claude.send_user("hi")
        asked = []
        for number in range(2):
            claude.until(lambda line: bool(claude.calls))
            (call,) = claude.calls
            asked.append((call["request"]["server_name"],
                          call["request"]["message"]["params"]["name"]))
            claude.answer_call([{"type": "text", "text": f"result {number}"}])
        assert claude.until_result()[-1]["result"] == "Done."
    in_order = [("server", "middle"), ("client", "zeta")]
    assert asked == (in_order if is_server_first else in_order[::-1])
    first, second = subject.queries()
    assert first["tools"] == ["alpha", "middle", "zeta"]
    assert [block["content"] for block in second["messages"][-1][1]] == ["result 0", "result 1"]


def test_a_process_that_was_initialized_takes_a_prompt_and_tools_later(subject: Subject) -> None:
    if subject.version == "2.1.197":
        return  # It has neither.
    limit = {"env": {"CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE": "1"}}
    with subject.start(tools=TOOLS, more=[{**TOOLS[0], "name": "middle"}]) as claude:
        ready(claude, systemPrompt=[])
        claude.control("apply_flag_settings", settings=limit)
        lines = claude.turn("one", uuid=question_id(1))
        assert lines[-1]["terminal_reason"] == "blocking_limit" and forgets(claude, 1)["rewound"]
        limit["env"]["CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE"] = "1000000000"
        claude.control("apply_flag_settings", settings=limit)
        answers = [claude.control(
            "set_model", model=model, system_prompt="Be kind.", only_if_model_is_current=True
        )["subtype"] for model in ("claude-sonnet-4-6", "claude-opus-5-5")]
        servers = {name: {"type": "sdk", "name": name} for name in ("client", "server")}
        claude.control("mcp_set_servers", servers=servers)
        claude.turn("two")
    (query,) = subject.queries()
    assert answers == ["success", "error"]
    assert (query["system"], query["tools"]) == (["Be kind."], ["alpha", "middle", "zeta"])
    assert query["messages"] == [said("user", "two")]


def test_a_question_is_forgotten_with_the_calls_that_it_led_to(subject: Subject) -> None:
    subject.script(text("eins"), calls(("zeta", {"q": 1})), text("zwei"), text("drei"))
    with subject.start(tools=TOOLS) as claude:
        ready(claude, sdkMcpServers=["client"])
        claude.turn("one")
        claude.send_user("two", uuid=question_id(2))
        claude.until(lambda line: bool(claude.calls))
        claude.answer_call([{"type": "text", "text": "nine"}])
        claude.until_result()
        assert forgets(claude, 2)["rewound"] is True
        claude.turn("three")
    assert subject.queries()[3]["messages"] == [
        said("user", "one"), said("assistant", "eins"), said("user", "three")]


# -- interruption and end --------------------------------------------------------

@pytest.mark.differs_by_version
def test_an_interrupt_ends_the_turn_and_the_process_stays_usable(subject: Subject) -> None:
    subject.script(half("Half ", 600), text("Whole."))
    with subject.start() as claude:
        ready(claude)
        claude.send_user("hi")
        claude.until_event("content_block_delta")
        assert claude.control("interrupt")["subtype"] == "success"
        lines = claude.until_result()
        again = claude.turn("again")[-1]
    end = ["content_block_stop", "message_delta", "message_stop"]
    recent = subject.version != "2.1.197"
    assert shape(lines) == ["assistant", "user", *(end if recent else []), "result"]
    assert (lines[-1]["subtype"], lines[-1]["is_error"]) == ("error_during_execution", True)
    assert (again["is_error"], again["result"]) == (False, "Whole.")
    roles_and_texts = [(role, [block["text"] for block in blocks])
                       for role, blocks in subject.queries()[-1]["messages"]]
    assert roles_and_texts == [
        ("user", ["hi"]), ("assistant", ["Half"]),
        ("user", ["[Request interrupted by user]", "again"])]


def interrupted(claude: ClaudeDriver, number: int) -> Line:
    """The reply to an interrupt that also drops a question that waits, once its turn is over."""
    claude.send({"type": "control_request", "request_id": "stop",
                 "request": {"subtype": "interrupt", "cancel_queued": True}})
    is_over = any(line["type"] == "result" for line in claude.lines)
    reply: Line = {}
    while not reply or not (is_over or question_id(number) in reply.get("cancelled", ())):
        line = claude.next_line(time.monotonic() + 60)
        is_over = is_over or line["type"] == "result"
        if line["type"] == "control_response" and line["response"]["request_id"] == "stop":
            assert line["response"]["subtype"] == "success"
            reply = {"is_there": True, **(line["response"].get("response") or {})}
    return reply


@pytest.mark.differs_by_version
@pytest.mark.parametrize("pause_ms", [0, 3, *depth.rest(10, 30, 100)])
def test_an_interrupt_behind_the_question_leaves_one_request_at_most_and_no_trace(
    subject: Subject, pause_ms: int
) -> None:
    # Long enough for the interrupt, and for a second question that gets this answer.
    subject.script(half("Half ", 2))
    with subject.start() as claude:
        ready(claude)
        claude.send_user("one", uuid=question_id(1))
        time.sleep(pause_ms / 1000)
        reply = interrupted(claude, 1)
        if subject.version == "2.1.197":
            # It cannot forget its only question.
            return
        assert reply["still_queued"] == []
        answer = forgets(claude, 1)
        assert answer["rewound"] is True or answer["error"] == "target not found"
        asked = len(subject.queries())
        assert asked <= 1
        claude.turn("two")
    assert subject.queries()[asked]["messages"] == [said("user", "two")]


@pytest.mark.exhaustive
@pytest.mark.differs_by_version
def test_a_question_that_waits_for_tools_is_dropped_and_cannot_be_forgotten(
    subject: Subject
) -> None:
    if subject.version == "2.1.197":
        pytest.skip("not for this claude: it drops nothing that waits")
    with subject.start() as claude:
        # Nobody answers what it asks the server of the tools.
        ready(claude, sdkMcpServers=["client"])
        claude.send_user("one", uuid=question_id(1))
        reply = interrupted(claude, 1)
        assert forgets(claude, 1)["error"] == "turn running"
    assert reply["cancelled"] == [question_id(1)]
    assert subject.queries() == []


@pytest.mark.differs_by_version
def test_a_call_whose_turn_is_interrupted_is_taken_back(subject: Subject) -> None:
    subject.script(text("eins"), calls(("zeta", {"q": 1}), ("alpha", {})), text("drei"))
    with start_with_tools(subject) as claude:
        claude.turn("one")
        before = len(claude.lines)
        claude.send_user("two", uuid=question_id(2))
        claude.until(lambda line: bool(claude.calls))
        claude.until_event("message_stop")
        claude.control("interrupt", cancel_queued=True)
        claude.until_result()
        assert forgets(claude, 2)["rewound"] is True
        claude.turn("three")
    asked = [line["request"]["message"] for line in claude.lines[before:]
             if line["type"] == "control_request"]
    (call,) = (message["id"] for message in asked if message["method"] == "tools/call")
    (taken_back,) = (message["params"]["requestId"] for message in asked
                     if message["method"] == "notifications/cancelled")
    assert taken_back == call
    assert subject.queries()[2]["messages"] == [
        said("user", "one"), said("assistant", "eins"), said("user", "three")]


def test_an_interrupt_while_idle_changes_nothing(greeted: Greeted) -> None:
    assert greeted.claude.control("interrupt")["subtype"] == "success"
    assert not greeted.claude.turn("hi")[-1]["is_error"]


def test_the_end_of_stdin_is_the_end(subject: Subject) -> None:
    with subject.start() as claude:
        ready(claude)
        claude.turn("hi")
        claude.close_stdin()
        assert claude.wait()[0] == 0


def test_the_exit_code_tells_that_the_last_turn_failed(subject: Subject) -> None:
    subject.script(refused(403, "authentication_failed", "No.", "API Error: 403 No."))
    with subject.start() as claude:
        ready(claude)
        claude.turn("hi")
        claude.close_stdin()
        assert claude.wait()[0] == 1


def test_the_end_of_stdin_lets_a_running_turn_finish(subject: Subject) -> None:
    subject.script(half("Half ", 0.3))
    with subject.start() as claude:
        ready(claude)
        claude.send_user("hi")
        claude.until_event("content_block_delta")
        claude.close_stdin()
        assert claude.until_result()[-1]["result"] == "Half "
        assert claude.wait()[0] == 0


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "mid-turn"])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_signals_end_it_at_once(
    subject: Subject, number: signal.Signals, code: int, busy: bool
) -> None:
    subject.script(half("Half ", 600))
    with subject.start() as claude:
        ready(claude)
        if busy:
            claude.send_user("hi")
            claude.until_event("content_block_delta")
        claude.process.send_signal(number)
        assert claude.wait()[0] == code


def test_what_is_not_json_ends_it_with_a_complaint(subject: Subject) -> None:
    with subject.start() as claude:
        ready(claude)
        claude.send_bytes(b"not json\n")
        code, complaint = claude.wait()
    assert code == 1
    assert complaint.startswith("Error parsing streaming input line")


def test_an_unknown_option_ends_it_with_a_complaint(subject: Subject) -> None:
    with subject.start("--nonsense") as claude:
        assert claude.wait() == (1, "error: unknown option '--nonsense'\n")


# -- sessions --------------------------------------------------------------------

SESSION = "5b1f0c7e-58a4-4a3c-9d0a-3f1d6c2b7a10"


def test_a_kept_session_can_be_resumed(subject: Subject) -> None:
    subject.script(text("Noted."), text("Seven."))
    with subject.start("--session-id", SESSION, keep=True) as claude:
        ready(claude)
        claude.turn("remember 7")
        claude.close_stdin()
        claude.wait()
    with subject.start("--resume", SESSION, keep=True) as claude:
        ready(claude)
        result = claude.turn("which number?")[-1]
    assert (result["result"], result["session_id"]) == ("Seven.", SESSION)
    assert subject.queries()[-1]["messages"] == [
        said("user", "remember 7"), said("assistant", "Noted."), said("user", "which number?")]


def test_an_unknown_session_cannot_be_resumed(subject: Subject) -> None:
    with subject.start("--resume", SESSION, keep=True) as claude:
        code, complaint = claude.wait()
    assert (code, complaint) == (1, f"No conversation found with session ID: {SESSION}\n")


def test_a_session_cannot_be_begun_twice(subject: Subject) -> None:
    with subject.start("--session-id", SESSION, keep=True) as claude:
        ready(claude)
        claude.turn("hi")
        claude.close_stdin()
        claude.wait()
    with subject.start("--session-id", SESSION, keep=True) as claude:
        assert claude.wait() == (1, f"Error: Session ID {SESSION} is already in use.\n")


# -- tools -----------------------------------------------------------------------

def call_of(line: Line) -> Line:
    params: Line = line["request"]["message"]["params"]
    return params


def start_with_tools(subject: Subject) -> ClaudeDriver:
    claude = subject.start(tools=TOOLS)
    ready(claude, sdkMcpServers=["client"])
    return claude


def test_the_clients_tools_have_their_own_names_in_order(subject: Subject) -> None:
    with start_with_tools(subject) as claude:
        claude.turn("hi")
    assert subject.queries()[0]["tools"] == ["alpha", "zeta"]


def test_parallel_calls_are_streamed_first_and_asked_one_by_one(subject: Subject) -> None:
    subject.script(calls(("zeta", {"q": 1}), ("alpha", {"q": 2})), text("Done."))
    with start_with_tools(subject) as claude:
        claude.send_user("hi")
        message = claude.until_event("message_stop")
        claude.until(lambda line: bool(claude.calls))
        first = call_of(claude.calls[0])
        assert len(claude.calls) == 1
        claude.answer_call([{"type": "text", "text": "one"}])
        claude.until(lambda line: bool(claude.calls))
        second = call_of(claude.calls[0])
        claude.answer_call([{"type": "text", "text": "two"}], isError=True)
        rest = claude.until_result()
    blocks = [line["message"]["content"][0] for line in message if line["type"] == "assistant"]
    assert [(block["name"], block["input"]) for block in blocks] == [
        ("zeta", {"q": 1}), ("alpha", {"q": 2})]
    assert [call["_meta"]["claudecode/toolUseId"] for call in (first, second)] == [
        block["id"] for block in blocks]
    assert (first["name"], first["arguments"]) == ("zeta", {"q": 1})
    assert (rest[-1]["result"], rest[-1]["num_turns"]) == ("Done.", 3)
    assert rest[-1]["usage"]["output_tokens"] == 14
    results = subject.queries()[1]["messages"][-1][1]
    assert [(block["tool_use_id"], block["content"]) for block in results] == [
        (blocks[0]["id"], "one"), (blocks[1]["id"], "two")]
    assert [bool(block.get("is_error")) for block in results] == [False, True]


def test_the_end_of_stdin_during_a_call_asks_the_model_once_more(subject: Subject) -> None:
    subject.script(calls(("alpha", {})), text("Never mind."))
    with start_with_tools(subject) as claude:
        claude.send_user("hi")
        claude.until_event("message_stop")
        claude.close_stdin()
        result = claude.until_result()[-1]
        assert claude.wait()[0] == 0
    assert result["result"] == "Never mind."
    assert subject.queries()[1]["messages"][-1][1][0]["is_error"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_call_asks_the_model_no_more(
    subject: Subject, number: signal.Signals
) -> None:
    subject.script(calls(("alpha", {})))
    with start_with_tools(subject) as claude:
        claude.send_user("hi")
        claude.until_event("message_stop")
        claude.process.send_signal(number)
        claude.wait()
    assert len(subject.queries()) == 1


def test_an_interrupt_during_a_call_ends_the_turn(subject: Subject) -> None:
    subject.script(calls(("alpha", {})), text("On we go."))
    with start_with_tools(subject) as claude:
        claude.send_user("hi")
        claude.until_event("message_stop")
        claude.control("interrupt")
        result = claude.until_result()[-1]
        again = claude.turn("again")[-1]
    assert (result["subtype"], result["is_error"]) == ("error_during_execution", True)
    assert again["result"] == "On we go."


def test_structured_output_is_an_object_in_the_result(subject: Subject) -> None:
    subject.script(calls(("StructuredOutput", {"a": 1})))
    with subject.start() as claude:
        ready(claude, jsonSchema=SCHEMA)
        lines = claude.turn("hi")
    pieces = [line["event"]["delta"]["partial_json"] for line in lines
              if line["type"] == "stream_event" and "delta" in line["event"]
              and "partial_json" in line["event"]["delta"]]
    assert json.loads("".join(pieces)) == {"a": 1}
    assert lines[-1]["structured_output"] == {"a": 1}
    assert (lines[-1]["result"], lines[-1]["stop_reason"]) == ('{"a":1}', "tool_use")
    assert len(subject.queries()) == 1


# -- the user's text -------------------------------------------------------------

@pytest.mark.differs_by_version
def test_a_leading_slash_is_a_command_for_the_older_version_only(subject: Subject) -> None:
    with subject.start() as claude:
        ready(claude)
        taken = claude.turn("/anything else")[-1]
        plain = claude.turn(" /anything else")[-1]
    assert (taken["num_turns"] == 0) == (subject.version == "2.1.197")
    assert plain["num_turns"] == 1
    assert len(subject.queries()) == (1 if subject.version == "2.1.197" else 2)


def test_a_file_name_in_the_text_stays_a_file_name(subject: Subject) -> None:
    (subject.folder / "secret.txt").write_text("canary")
    with subject.start() as claude:
        ready(claude)
        claude.turn(f"@{subject.folder}/secret.txt what is in it?")
    assert "canary" not in json.dumps(subject.queries())
