"""The claude protocol: what is written to claude, and what its lines mean. No processes."""
from __future__ import annotations

import base64
import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from claude_lines import RESULT, START, lines_of, stream
from depth import by_depth
from project import TRANSCRIPTS, load_script
from rendering import MODELS, SONNET, steps_for

ocp = load_script("ocp_server.py")

OLD, NEW = (2, 1, 197), (2, 1, 329)

Json = dict[str, Any]


def read_jsonl(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


TRANSCRIPTS = {
    path.stem: read_jsonl(path) for path in sorted(TRANSCRIPTS.glob("*.jsonl"))
}


def version_and_scenario(name: str) -> tuple[str, str]:
    version, _, scenario = name.partition("-")
    return version, scenario


def printed(name: str) -> list[Json]:
    """What claude printed in this transcript."""
    return [row["line"] for row in TRANSCRIPTS[name] if row["dir"] == "out"]


# -- whole turns, as recorded -------------------------------------------------


def turn_lines(name: str) -> Iterator[Json]:
    """The lines of the first turn that was asked for, without those that history gave."""
    waits_for_history = False
    for row in TRANSCRIPTS[name]:
        line = row["line"]
        if row["dir"] == "in":
            waits_for_history = waits_for_history or line.get("shouldQuery") is False
        elif not waits_for_history:
            yield line
        elif line["type"] == "result":
            ocp.check_history_result(line)
            waits_for_history = False


def tools_of(name: str) -> tuple[Any, ...]:
    """The client's tools of a recorded turn."""
    names = ("weather", "time_of_day") if "-tool_call" in name else ()
    return tuple(ocp.Tool(tool, "", {}) for tool in names)


def shape_of(name: str) -> Any:
    """The shape that a recorded answer has to have."""
    return ocp.OutputSchema({"type": "object"}, wrapped=False) if "-structured" in name else None


def replayed(name: str) -> tuple[list[Any], Any]:
    """The events of a recorded turn up to its end, and the reader that read it."""
    reader = ocp.TurnReader(
        tools_of(name), shape_of(name), clock=lambda: 1_999_999_000.0
    )
    events: list[Any] = []
    for line in turn_lines(name):
        events += reader.events(line)
        if reader.finished:
            break
    return events, reader


PARIS = "Paris is the capital."
WEATHER = '{"city": "Paris"}'
#: What a recorded turn comes to: (text, thinking, arguments, stop reason).
ANSWERS = {
    "cut_then_text": (PARIS, "", "", "end_turn"),
    "history": ("Rome is the capital.", "", "", "end_turn"),
    "max_tokens": ("Paris is the cap", "", "", "max_tokens"),
    "max_tokens_repeated": ("Paris is", "", "", "max_tokens"),
    "plain": (PARIS, "", "", "end_turn"),
    "refusal": ("I cannot", "", "", "refusal"),
    "retry": (PARIS, "", "", "end_turn"),
    "stop_sequence": ("Paris is", "", "", "stop_sequence"),
    "stream_error_at_once_then_text": (PARIS, "", "", "end_turn"),
    "stream_error_in_thinking_then_text": (PARIS, "", "", "end_turn"),
    "structured": (WEATHER, "", "", "end_turn"),
    "structured_prose_first": (WEATHER, "", "", "end_turn"),
    "thinking": ("Paris.", "France, so Paris.", "", "end_turn"),
    "tool_call": ("Let me look.", "", WEATHER, "tool_use"),
    "tool_calls_parallel": ("", "", WEATHER * 2, "tool_use"),
    "two_turns": (PARIS, "", "", "end_turn"),
}
#: The class of the error, and a part of its message.
FAILURES = {
    "cut": ("UpstreamFailed", "Connection to the API was lost"),
    "error_400": ("BadRequest", "text content must be non-empty"),
    "error_400_too_long": ("ContextTooLong", "prompt is too long"),
    "error_401": ("LoginLost", "OAuth token has been revoked."),
    "error_403": ("UpstreamForbidden", "Your organization has disabled"),
    "error_404": ("UnknownModel", "There's an issue with the selected model"),
    "error_413": ("TooLarge", "Request too large (max 32MB)"),
    "error_429_plain": ("RateLimited", "Server is temporarily limiting requests"),
    "error_429_plan_limit": ("PlanLimit", "You've hit your limit"),
    "error_500": ("UpstreamFailed", "Internal server error"),
    "error_529": ("Overloaded", "Overloaded"),
    "interrupt": ("UpstreamFailed", ""),
    "network_down": ("UpstreamFailed", "onnect"),
    "not_logged_in": ("LoginLost", "Not logged in"),
    "stream_error": ("Overloaded", "Overloaded"),
    "unknown_control": ("UpstreamFailed", "no_such_subtype"),
}
#: Where the versions differ: the older one gives up, or knows less about why.
OLDER_FAILURES = {
    "cut_then_text": ("UpstreamFailed", "Connection to the API was lost"),
    "stream_error": ("UpstreamFailed", "Overloaded"),
}


def verdict(name: str) -> Any:
    """What this transcript has to come to: a row of one of the tables above."""
    version, scenario = version_and_scenario(name)
    if version == "2.1.197" and scenario in OLDER_FAILURES:
        return OLDER_FAILURES[scenario]
    return FAILURES.get(scenario) or ANSWERS[scenario]


ANSWERED = sorted(name for name in TRANSCRIPTS if len(verdict(name)) == 4)
FAILED = sorted(name for name in TRANSCRIPTS if len(verdict(name)) == 2)


def test_both_versions_have_every_transcript() -> None:
    found = {version_and_scenario(name) for name in TRANSCRIPTS}
    scenarios = {*ANSWERS, *FAILURES}

    assert found == {(v, scenario) for v in ("2.1.197", "2.1.329") for scenario in scenarios}


def summed_up(events: list[Any]) -> tuple[str, str, str, str]:
    """Text, thinking, arguments and stop reason, as a client ends up with them."""
    pieces: dict[str, str] = {}
    for event in events:
        if isinstance(event, ocp.Restarted):
            pieces.clear()
        elif isinstance(event, ocp.Delta):
            pieces[event.kind] = pieces.get(event.kind, "") + event.text
    kinds = ("text", "thinking", "arguments")
    text, thinking, arguments = (pieces.get(kind, "") for kind in kinds)
    return text, thinking, arguments, events[-1].stop_reason


@pytest.mark.parametrize("name", ANSWERED)
def test_a_recorded_answer_is_read_as_it_was_given(name: str) -> None:
    events, reader = replayed(name)

    assert reader.finished
    assert summed_up(events) == verdict(name)


@pytest.mark.parametrize("name", ANSWERED)
def test_a_recorded_answer_gives_its_usage(name: str) -> None:
    reasoning = 4 if name.endswith("-thinking") else None

    events, _ = replayed(name)

    usage = events[-1].usage
    assert usage == ocp.Usage(10, 7, 5, 3, reasoning, usage.more)
    lasting = {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 3}
    assert usage.more == {"cache_creation": lasting, "service_tier": "standard"}


@pytest.mark.parametrize("name", ANSWERED)
def test_blocks_are_started_before_and_stopped_after_their_deltas(name: str) -> None:
    is_open: set[int] = set()

    for event in replayed(name)[0]:
        if isinstance(event, ocp.BlockStarted):
            is_open.add(event.block_index)
        elif isinstance(event, ocp.Delta):
            assert event.block_index in is_open
        elif isinstance(event, ocp.BlockStopped):
            is_open.remove(event.block_index)
        elif isinstance(event, (ocp.Started, ocp.Restarted)):
            is_open.clear()

    assert not is_open


@pytest.mark.parametrize("name", FAILED)
def test_a_recorded_failure_becomes_its_error(name: str) -> None:
    kind, words = verdict(name)

    with pytest.raises(ocp.OcpError) as caught:
        replayed(name)

    assert type(caught.value).__name__ == kind
    assert words in caught.value.message


def hook_line(**told: Any) -> Json:
    """The line by which claude calls the hook for failures."""
    called = {"hook_event_name": "StopFailure", **told}
    request = {"subtype": "hook_callback", "callback_id": "failure", "input": called}
    return {"type": "control_request", "request_id": "h1", "request": request}


def details(message: str) -> str:
    return "400 " + json.dumps({"type": "error", "error": {"type": "x", "message": message}})


TOO_LONG = "prompt is too long: 250123 tokens > 200000 maximum"


def failure_after(*lines: Json, text: str = "Prompt is too long") -> Any:
    """The error of a turn that fails with this text of claude's, after some more lines."""
    said = {"model": "<synthetic>", "content": [{"type": "text", "text": text}]}
    reader = ocp.TurnReader()
    with pytest.raises(ocp.OcpError) as caught:
        for line in (
            {"type": "assistant", "message": said, "error": "invalid_request"}, *lines,
            {**RESULT, "is_error": True, "api_error_status": 400, "result": text},
        ):
            assert reader.events(line) == []
    return caught.value


def test_the_api_s_own_words_take_the_place_of_claude_s() -> None:
    hook = hook_line(error="invalid_request", error_details=details(TOO_LONG))

    assert failure_after(hook).message == TOO_LONG
    assert failure_after(hook, text="Image was too large.").message == TOO_LONG


@pytest.mark.parametrize("told", [
    {}, {"error": "invalid_request"}, {"error": "invalid_request", "error_details": 7},
    {"error": "invalid_request", "error_details": "gone wrong"},
    # The text of claude has more advice then.
    {"error": "rate_limit", "error_details": details("No.")},
], ids=repr)
def test_without_them_the_words_of_claude_stay(told: Json) -> None:
    assert failure_after(hook_line(**told), text="It broke.").message == "It broke."


@pytest.mark.parametrize("request_", [None, 7, {}, {"subtype": "hook_callback", "input": 7}])
def test_an_odd_call_of_a_hook_changes_nothing(request_: object) -> None:
    line = {"type": "control_request", "request": request_}

    assert failure_after(line, text="It broke.").message == "It broke."


def test_a_call_of_a_hook_is_answered_and_other_requests_are_not_its_concern() -> None:
    reply = json.loads(ocp.hook_reply(hook_line()))

    assert reply["response"] == {"subtype": "success", "request_id": "h1", "response": {}}
    assert ocp.hook_reply({"type": "control_request", "request": {"subtype": "mcp_message"}}) == b""
    assert ocp.hook_reply({"type": "control_request"}) == b""


@pytest.mark.parametrize("name", FAILED)
def test_no_recorded_failure_is_passed_on_as_text(name: str) -> None:
    reader = ocp.TurnReader()
    events: list[Any] = []

    with pytest.raises(ocp.OcpError):
        for line in turn_lines(name):
            events += reader.events(line)

    text = "".join(event.text for event in events if isinstance(event, ocp.Delta))
    assert text in ("", "Paris is", "Paris is" * 2)


def test_a_plan_limit_of_the_transcripts_tells_when_it_resets() -> None:
    for version in ("2.1.197", "2.1.329"):
        with pytest.raises(ocp.PlanLimit) as caught:
            replayed(f"{version}-error_429_plan_limit")
        assert caught.value.headers()["Retry-After"] == "1000"


@pytest.mark.parametrize("version", ["2.1.197", "2.1.329"])
def test_retries_of_claude_s_own_are_counted(version: str) -> None:
    _, reader = replayed(f"{version}-retry")

    assert reader.retries == 1


@pytest.mark.parametrize("scenario", ["cut_then_text", "stream_error_in_thinking_then_text"])
def test_a_second_attempt_voids_what_the_first_one_said(scenario: str) -> None:
    events, _ = replayed(f"2.1.329-{scenario}")

    kinds = [type(event).__name__ for event in events]
    assert kinds.count("Started") == 2
    assert kinds[kinds.index("Started", 1) - 1] == "Restarted"


@pytest.mark.parametrize("version", ["2.1.197", "2.1.329"])
def test_an_attempt_that_said_nothing_leaves_nothing_to_void(version: str) -> None:
    events, _ = replayed(f"{version}-stream_error_at_once_then_text")

    assert not any(isinstance(event, ocp.Restarted) for event in events)


# -- lines that are not understood --------------------------------------------


@pytest.mark.parametrize("name", sorted(TRANSCRIPTS))
def test_no_line_makes_the_reader_stumble_wherever_it_comes(name: str) -> None:
    for line in printed(name):
        try:
            ocp.TurnReader().events(line)
        except ocp.OcpError:
            assert line["type"] in ("result", "control_response")


@pytest.mark.parametrize("name", sorted(TRANSCRIPTS))
def test_types_of_lines_that_are_not_known_are_skipped(name: str) -> None:
    reader = ocp.TurnReader()

    found = [reader.events({**line, "type": "new_" + line["type"]}) for line in printed(name)]

    assert not any(found)
    assert not reader.finished


@pytest.mark.parametrize("name", ANSWERED)
def test_types_of_stream_events_that_are_not_known_are_skipped(name: str) -> None:
    events, _ = replayed(name)
    reader = ocp.TurnReader(tools_of(name), shape_of(name))
    odd = {"type": "stream_event", "event": {"type": "content_block_blinked", "index": 0}}

    mixed: list[Any] = []
    for line in turn_lines(name):
        mixed += [*reader.events(odd), *reader.events({"type": "keep_alive"})]
        mixed += [] if reader.finished else reader.events(line)

    assert mixed == events


@pytest.mark.parametrize(
    "delta",
    [None, 7, {}, {"type": "citations_delta", "citation": {}}, {"type": "text_delta"},
     {"type": "text_delta", "text": 7}, {"type": "thinking_delta", "text": "x"}],
)
def test_a_delta_that_is_not_understood_is_skipped(delta: object) -> None:
    assert ocp.TurnReader().events(stream("content_block_delta", index=0, delta=delta)) == []


#: Words of the protocol, so that garbage gets past the first look.
FIELDS = (
    "type", "subtype", "event", "message", "error", "index", "delta", "usage", "content_block",
    "rate_limit_info", "resetsAt", "status", "response", "is_error", "errors", "result", "model",
    "api_error_status", "stop_reason", "stop_sequence", "text", "id", "output_tokens",
    "output_tokens_details", "thinking_tokens", "input_tokens", "request_id",
)
WORDS = (
    "stream_event", "assistant", "rate_limit_event", "system", "api_retry", "control_response",
    "result", "message_start", "content_block_start", "content_block_delta", "text_delta",
    "content_block_stop", "message_delta", "error", "<synthetic>", "rejected", "end_turn", "",
)
SCALARS = (None, True, False, 0, -1, 429, 1.5, 1e308, "text", "\ud83d")


def garbage(source: random.Random, depth: int = 0) -> Any:
    """A random JSON value out of the protocol's own words."""
    choice = source.random()
    if depth > 4 or choice < 0.3:
        return source.choice(SCALARS)
    if choice < 0.55:
        return source.choice(WORDS)
    if choice < 0.65:
        return [garbage(source, depth + 1) for _ in range(source.randrange(3))]
    found = {name: garbage(source, depth + 1) for name in source.sample(FIELDS, 6)}
    return {**found, "type": source.choice(WORDS), "content": [garbage(source, depth + 1)]}


@pytest.mark.parametrize("seed", range(by_depth(5, 20, 20)))
def test_garbage_raises_nothing_but_errors_that_a_client_can_be_told(seed: int) -> None:
    source = random.Random(seed)
    reader = ocp.TurnReader()
    for _ in range(300):
        line = garbage(source)
        if not isinstance(line, dict):
            continue
        try:
            reader.events(line)
            ocp.plan_event(line)
            ocp.check_history_result(line)
        except ocp.OcpError as error:
            assert ocp.to_json(ocp.CHAT.error_body(error, "req_1"))
            error.headers()


# -- the reader, line by line -------------------------------------------------


def delta(text: str, kind: str = "text_delta", field: str = "text") -> Json:
    return stream("content_block_delta", index=0, delta={"type": kind, field: text})


def ending(reason: str | None, **usage: int) -> Json:
    return stream("message_delta", delta={"stop_reason": reason}, usage=usage)


TEXT = stream("content_block_start", index=0, content_block={"type": "text", "text": ""})
THOUGHT = stream("content_block_start", index=0, content_block={"type": "thinking"})


def reader_after(*lines: Json) -> Any:
    """A reader that has read these lines."""
    reader = ocp.TurnReader()
    for line in lines:
        reader.events(line)
    return reader


def test_a_turn_is_over_at_the_stop_reason() -> None:
    reader = reader_after(START, TEXT, delta("Hello"))

    events = reader.events(ending("end_turn", output_tokens=2))

    assert events == [ocp.Finished("end_turn", None, ocp.Usage(output_tokens=2))]
    assert reader.finished


def test_a_usage_without_a_stop_reason_does_not_end_the_turn() -> None:
    reader = reader_after(START, TEXT, delta("Hello"))

    assert reader.events(ending(None, output_tokens=2)) == []
    assert not reader.finished


def test_text_without_a_letter_is_no_answer() -> None:
    reader = reader_after(START, TEXT, delta(""))

    assert reader.events(ending("end_turn")) == []
    assert not reader.finished


def test_an_end_without_a_word_is_no_answer() -> None:
    reader = reader_after(START, THOUGHT, delta("Hm.", "thinking_delta", "thinking"))

    assert reader.events(ending("end_turn")) == []
    assert not reader.finished


@pytest.mark.parametrize("reason", ["max_tokens", "stop_sequence", "refusal"])
def test_any_other_end_without_a_word_is_the_model_s_own(reason: str) -> None:
    reader = reader_after(START)

    [event] = reader.events(ending(reason))

    assert event.stop_reason == reason


def test_a_result_without_an_answer_is_a_failure() -> None:
    with pytest.raises(ocp.EmptyAnswer) as caught:
        reader_after(START, ending("end_turn"), RESULT)

    assert caught.value.error_code == "empty_answer"


def test_the_stop_sequence_that_was_met_is_told() -> None:
    line = stream("message_delta", delta={"stop_reason": "stop_sequence", "stop_sequence": "END"})

    [event] = reader_after(START).events(line)

    assert event.stop_sequence == "END"


def test_a_new_message_after_thinking_voids_the_thinking() -> None:
    reader = reader_after(START, THOUGHT, delta("Hm.", "thinking_delta", "thinking"))

    [first, second] = reader.events(START)

    assert (first, type(second)) == (ocp.Restarted(), ocp.Started)


def test_the_latest_word_about_the_plan_is_kept() -> None:
    allowed = {"type": "rate_limit_event", "rate_limit_info": {"status": "allowed"}}
    rejected = {"status": "rejected", "rateLimitType": "five_hour", "resetsAt": 5}

    reader = reader_after(allowed, {**allowed, "rate_limit_info": rejected}, {"type": "system"})

    assert (reader.plan.is_limit_reached, reader.plan.resets_at_s) == (True, 5.0)


def test_the_reason_of_a_result_without_a_complaint_before_it_is_told() -> None:
    line = {"type": "result", "is_error": True, "subtype": "error_max_turns", "errors": ["Why."]}

    with pytest.raises(ocp.UpstreamFailed, match=r"Why\."):
        reader_after(line)


@pytest.mark.parametrize("content", [7, True, 1.5, None, {}, [7], [{"text": 7}]])
def test_a_complaint_in_no_form_that_is_known_is_skipped(content: object) -> None:
    reader = reader_after({"type": "assistant", "error": "x", "message": {"content": content}})

    assert not reader.finished
    assert reader.events(START)[0].message_id == START["event"]["message"]["id"]


def test_a_complaint_may_be_a_plain_text() -> None:
    message = {"model": "<synthetic>", "content": "Why."}

    with pytest.raises(ocp.OcpError, match=r"Why\."):
        reader_after({"type": "assistant", "error": "unknown", "message": message}, RESULT)


def test_the_status_of_the_result_decides() -> None:
    message = {"model": "<synthetic>", "content": [{"type": "text", "text": "Busy"}]}
    complaint = {"type": "assistant", "error": "unknown", "message": message}

    with pytest.raises(ocp.Overloaded):
        reader_after(complaint, {**RESULT, "is_error": True, "api_error_status": 529})


def test_a_finished_block_of_the_model_is_no_complaint() -> None:
    message = {"model": "claude-x", "content": [{"type": "text", "text": "Hello"}]}

    with pytest.raises(ocp.EmptyAnswer) as caught:
        reader_after({"type": "assistant", "message": message}, RESULT)

    assert "Hello" not in caught.value.message


@pytest.mark.parametrize(
    ("line", "window"),
    [
        ({"status": "rejected", "resetsAt": 7}, (True, 7.0)),
        ({"status": "rejected", "rateLimitType": "seven_day"}, (True, None)),
        ({"status": "allowed", "resetsAt": 7}, (False, 7.0)),
        ({"status": "allowed_warning"}, (False, None)),
        ({"status": "rejected", "isUsingOverage": False}, (False, None)),
        ({"resetsAt": "soon"}, (False, None)),
        ({"status": "rejected", "resetsAt": 10**400}, (False, None)),
        ({"status": "rejected", "resetsAt": float("inf")}, (False, None)),
        ({"status": "rejected", "resetsAt": float("nan")}, (False, None)),
        ({"status": "rejected", "resetsAt": -5, "rateLimitType": "x"}, (True, None)),
    ],
)
def test_a_rate_limit_event_tells_about_the_plan(line: Json, window: tuple[bool, float]) -> None:
    found = ocp.plan_event({"type": "rate_limit_event", "rate_limit_info": line})

    assert (found.is_limit_reached, found.resets_at_s) == window


@pytest.mark.parametrize(
    "line",
    [{}, {"type": "rate_limit_event"}, {"type": "rate_limit_event", "rate_limit_info": 7},
     {"type": "system", "rate_limit_info": {"status": "rejected"}}],
)
def test_no_other_line_tells_about_the_plan(line: Json) -> None:
    assert ocp.plan_event(line) is None


def test_a_history_that_was_taken_is_no_failure() -> None:
    ocp.check_history_result(RESULT)

    with pytest.raises(ocp.UpstreamFailed, match="did not accept the conversation"):
        ocp.check_history_result({**RESULT, "is_error": True})


# -- several rounds in one answer, as in agent mode ----------------------------

OWN_TOOL = stream(
    "content_block_start", index=0, content_block={"type": "tool_use", "id": "t", "name": "Bash"}
)
OUTCOME = {"type": "user", "message": {"content": [{"type": "tool_result", "content": "done"}]}}


def told(*lines: Json, final_only: bool = False) -> list[Any]:
    """The events of these lines."""
    reader = ocp.TurnReader(final_only=final_only)
    return [event for line in lines for event in reader.events(line)]


def rounds(*texts: str) -> list[Json]:
    """An answer that says these texts, with a tool of claude's own between each two."""
    lines: list[Json] = []
    for text in texts:
        lines += [START, TEXT, *([delta(text)] if text else [])]
        last = text is texts[-1]
        lines += [ending("end_turn")] if last else [OWN_TOOL, ending("tool_use"), OUTCOME]
    return lines


def words(events: list[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, ocp.Delta))


def test_the_rounds_of_an_answer_are_its_paragraphs() -> None:
    events = told(*rounds("First.", "Second.", "Third."))

    assert words(events) == "First.\n\nSecond.\n\nThird."
    assert [type(event) for event in events].count(ocp.Started) == 1
    assert not any(isinstance(event, ocp.Restarted) for event in events)


def test_blocks_of_later_rounds_have_numbers_of_their_own() -> None:
    events = told(*rounds("First.", "Second."))

    began = [event.block_index for event in events if isinstance(event, ocp.BlockStarted)]
    assert began == [0, 1]


def test_tools_of_claude_s_own_are_never_told() -> None:
    events = told(*rounds("First.", "Second."))

    blocks = [event.block["type"] for event in events if isinstance(event, ocp.BlockStarted)]
    assert blocks == ["text", "text"]


def test_an_answer_that_begins_anew_in_a_later_round_begins_without_a_paragraph() -> None:
    first = rounds("First.", "Second.")[:-3]
    assert first[-1] == START

    events = told(*first, START, TEXT, delta("Anew."), ending("end_turn"))

    begun = events[events.index(ocp.Restarted()):]
    assert words(begun) == "Anew."


def test_only_the_last_round_is_told_where_the_operator_wants_that() -> None:
    events = told(*rounds("First.", "Second.", "Third."), final_only=True)

    assert words(events) == "Third."
    assert [type(event) for event in events] == [
        ocp.Started, ocp.BlockStarted, ocp.Delta, ocp.Finished,
    ]


def test_nothing_of_the_last_round_is_told_before_its_end() -> None:
    assert told(*rounds("First.", "Second.")[:-1], final_only=True) == []


# -- usage --------------------------------------------------------------------


@pytest.mark.parametrize("found", [None, 7, "many", []])
def test_what_is_no_usage_leaves_it_as_it_was(found: object) -> None:
    before = ocp.Usage(1, 2, 3, 4, 5)

    assert ocp.usage_of(found, before) is before


def test_every_count_of_the_api_has_its_place() -> None:
    found = {
        "input_tokens": 1, "output_tokens": 2, "cache_read_input_tokens": 3,
        "cache_creation_input_tokens": 4, "output_tokens_details": {"thinking_tokens": 5},
    }

    assert ocp.usage_of(found) == ocp.Usage(1, 2, 3, 4, 5)


def test_what_else_the_api_says_of_usage_is_kept_as_it_gives_it() -> None:
    cache = {"ephemeral_5m_input_tokens": 1, "ephemeral_1h_input_tokens": 2}
    tools = {"web_search_requests": 3}

    begun = ocp.usage_of({"cache_creation": cache, "server_tool_use": None, "speed": {"a": 1}})
    usage = ocp.usage_of(
        {"output_tokens": 4, "server_tool_use": tools, "service_tier": "standard", "speed": "fast"},
        begun)

    assert begun.more == {"cache_creation": cache}
    assert usage.more == {"cache_creation": cache, "server_tool_use": tools,
                          "service_tier": "standard", "speed": "fast"}


def test_a_repeated_answer_counts_for_all_that_the_api_counted() -> None:
    cache = {"ephemeral_5m_input_tokens": 1, "ephemeral_1h_input_tokens": 2}
    first = ocp.Usage(1, 2, 3, 4, 5, {"cache_creation": cache}, 6)
    second = ocp.Usage(10, 20, 30, 40, None, {
        "cache_creation": {"ephemeral_5m_input_tokens": 10}, "server_tool_use": {"a": 7}}, 60)

    assert ocp.sum_usage([first, second]) == ocp.Usage(11, 22, 33, 44, 5, {
        "cache_creation": {"ephemeral_5m_input_tokens": 11, "ephemeral_1h_input_tokens": 2},
        "server_tool_use": {"a": 7}}, 66)
    assert ocp.sum_usage([second]).reasoning_tokens is None


def test_counts_that_are_left_out_are_those_of_before() -> None:
    before = ocp.Usage(1, 2, 3, 4, 5)

    assert ocp.usage_of({}, before) == before
    assert ocp.usage_of({"output_tokens": 9}, before) == before._replace(output_tokens=9)


@pytest.mark.parametrize("count", [None, "7", 1.5, [], {}])
def test_a_count_that_is_no_whole_number_is_left_out(count: object) -> None:
    found = {"input_tokens": count, "output_tokens_details": {"thinking_tokens": count}}

    assert ocp.usage_of(found) == ocp.Usage()


def test_the_prompt_is_what_was_read_from_the_cache_or_not() -> None:
    assert ocp.Usage(10, 7, 5, 3).prompt_tokens == 18


# -- what is written: options -------------------------------------------------


def requests_of(data: bytes) -> list[Json]:
    """The control requests in these bytes."""
    return [line["request"] for line in lines_of(data)]


def test_without_options_nothing_is_written() -> None:
    assert ocp.settings_lines(ocp.Options(), ocp.ToolChoice()) == b""


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"max_tokens": 7}, {"env": {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "7"}}),
        ({"effort": "low"}, {"effortLevel": "low"}),
        (
            {"sampling": (("temperature", 0.0),)},
            {"env": {"CLAUDE_CODE_EXTRA_BODY": '{"temperature":0.0}'}},
        ),
        (
            {"sampling": (("top_k", 5), ("top_p", 0.5))},
            {"env": {"CLAUDE_CODE_EXTRA_BODY": '{"top_k":5,"top_p":0.5}'}},
        ),
        (
            {"stop_sequences": ("END", "\u00fc\"")},
            {"env": {"CLAUDE_CODE_EXTRA_BODY": '{"stop_sequences":["END","\u00fc\\""]}'}},
        ),
        (
            {"max_tokens": 7, "sampling": (("temperature", 0.5),), "effort": "high"},
            {"env": {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "7",
                     "CLAUDE_CODE_EXTRA_BODY": '{"temperature":0.5}'}, "effortLevel": "high"},
        ),
    ],
)
def test_an_option_is_written_where_claude_reads_it(options: Json, settings: Json) -> None:
    found = requests_of(ocp.settings_lines(ocp.Options(**options), ocp.ToolChoice()))

    assert found == [{"subtype": "apply_flag_settings", "settings": settings}]


@pytest.mark.parametrize("tokens", [0, 1_024])
def test_a_budget_of_thinking_has_a_request_of_its_own(tokens: int) -> None:
    found = requests_of(ocp.settings_lines(ocp.Options(thinking_tokens=tokens), ocp.ToolChoice()))

    assert found == [{"subtype": "set_max_thinking_tokens", "max_thinking_tokens": tokens}]


def test_every_control_request_has_an_id_of_its_own() -> None:
    data = ocp.control_line("interrupt") + ocp.control_line("interrupt")

    first, second = (line["request_id"] for line in lines_of(data))

    assert first != second


def test_a_request_of_claude_s_is_refused_by_its_id() -> None:
    asked = {"type": "control_request", "request_id": "abc", "request": {"subtype": "can_use_tool"}}

    [line] = lines_of(ocp.ToolServer(()).reply(asked))

    assert line["type"] == "control_response"
    assert (line["response"]["subtype"], line["response"]["request_id"]) == ("error", "abc")


# -- what is written: messages ------------------------------------------------


def text(words: str) -> Json:
    return {"type": "text", "text": words}


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}


@pytest.mark.parametrize(
    ("content", "sent"),
    [
        ([text("/cost")], [text(" /cost")]),
        ([text("a"), text("/cost")], [text("a"), text(" /cost")]),
        ([IMAGE, text("/cost")], [IMAGE, text(" /cost")]),
        ([text("/cost"), text("why?")], [text("/cost"), text("why?")]),
        ([text("/cost"), IMAGE], [text("/cost"), IMAGE]),
        ([text(" /cost")], [text(" /cost")]),
        ([text("a /cost")], [text("a /cost")]),
        ([IMAGE], [IMAGE]),
        ([], []),
    ],
)
def test_only_a_last_text_that_looks_like_a_command_gets_a_space(
    content: list[Json], sent: list[Json]
) -> None:
    assert ocp.escape_slash_command(content, OLD) == sent


@pytest.mark.parametrize("version", [NEW, (2, 2, 0), (3, 0, 0)])
def test_versions_that_leave_commands_alone_get_the_text_as_it_is(version: Any) -> None:
    assert ocp.escape_slash_command([text("/cost")], version) == [text("/cost")]


def test_guarding_leaves_the_client_s_own_message_alone() -> None:
    content = [text("/cost")]

    ocp.escape_slash_command(content, OLD)

    assert content == [text("/cost")]


def a_turn(*messages: tuple[str, str], system: str = "", **options: Any) -> Any:
    """A Turn of these messages, (role, text) each."""
    return ocp.Turn(
        model=SONNET, system=system,
        messages=[ocp.Message(role, [text(words)]) for role, words in messages],
        options=ocp.Options(**options),
    )


def steps_of(turn: Any, operator_prompt: str = "", version: Any = NEW) -> list[list[Json]]:
    """The lines of each step of a conversation."""
    return [lines_of(step) for step in steps_for(turn, operator_prompt, version)]


def brief(line: Json) -> str:
    """A line in a word: its kind, its text, and a + when claude is to answer it."""
    if line["type"] == "control_request":
        return str(line["request"]["subtype"])
    asks = "+" if line["type"] == "user" and line.get("shouldQuery") is not False else ""
    return f"{line['type']} {line['message']['content'][0]['text']}{asks}"


def thinking_of(lines: list[Json]) -> list[object]:
    """What the lines say about how much to think."""
    requests = [line["request"] for line in lines if line["type"] == "control_request"]
    return [found["max_thinking_tokens"] for found in requests if "max_thinking_tokens" in found]


@pytest.mark.parametrize(("name", "in_loop"), [("claude-haiku-4-5", [0]), ("sonnet", [2_048])])
def test_a_loop_is_not_told_anew_with_a_budget_for_thinking(
    name: str, in_loop: list[int]
) -> None:
    call = {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [text("Sunny.")]}
    asked = a_turn(("user", "Hi"), ("assistant", ""), ("user", ""), thinking_tokens=2_048)
    asked = asked._replace(model=MODELS.find(name))
    asked.messages[1].content[:] = [call]
    question = asked._replace(messages=[*asked.messages[:2], ocp.Message("user", [text("So?")])])

    asked.messages[2].content[:] = [result, text("So?")]
    assert thinking_of(steps_of(asked)[0]) == in_loop
    assert thinking_of(steps_of(question)[0]) == [2_048]
    for turn, budget in ((question, 2_048), (asked, 0)):
        again = lines_of(ocp.thinking_again(turn))
        assert thinking_of(again) == ([budget] if in_loop == [0] else [])


def test_a_single_question_is_one_step() -> None:
    assert [[brief(line) for line in step] for step in steps_of(a_turn(("user", "Hi")))] == [
        ["initialize", "user Hi+"],
    ]


def test_each_earlier_question_is_a_step_and_answers_ride_with_the_next_one() -> None:
    turn = a_turn(
        ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"),
        max_tokens=7,
    )

    steps = steps_of(turn)

    assert [[brief(line) for line in step] for step in steps] == [
        ["initialize", "apply_flag_settings", "user a"],
        ["assistant b", "user c"],
        ["assistant d", "user e+"],
    ]


def test_a_conversation_that_the_assistant_began_is_laid_down_too() -> None:
    steps = steps_of(a_turn(("assistant", "Hello!"), ("user", "Hi")))

    assert [[brief(line) for line in step] for step in steps] == [
        ["initialize", "user (The user opens the conversation.)"],
        ["assistant Hello!", "user Hi+"],
    ]


def test_a_message_of_which_nothing_is_left_is_no_step() -> None:
    turn = a_turn(("user", ""), ("assistant", "b"), ("assistant", ""), ("user", ""), ("user", "c"))
    turn.messages[0].content[:] = [{"type": "server_tool_use", "id": "s", "name": "x", "input": {}}]
    turn.messages[2].content[:] = []
    turn.messages[3].content[:] = []

    assert [[brief(line) for line in step] for step in steps_of(turn)] == [
        ["initialize", "user (The user opens the conversation.)"],
        ["assistant b", "user c+"],
    ]


def limits_of(step: list[Json]) -> list[str]:
    """The lengths from which claude refuses a prompt, as a step sets them."""
    settings = [line["request"].get("settings", {}) for line in step if "request" in line]
    name = "CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE"
    return [found["env"][name] for found in settings if name in found.get("env", {})]


@pytest.mark.parametrize("opening", [(), ("assistant",)], ids=["user", "assistant"])
def test_a_pinned_history_asks_its_first_message_under_a_limit_of_its_own(
    opening: tuple[str, ...]
) -> None:
    begun = [("assistant", "Welcome!")] if opening else []
    turn = a_turn(*begun, ("user", "a"), ("assistant", "b"), ("user", "c"), max_tokens=7)

    steps = [lines_of(step) for step in steps_for(turn, "", NEW, pin=True)]

    first, *later = [[brief(line) for line in step] for step in steps]
    head = "(The user opens the conversation.)" if opening else "a"
    assert first == ["initialize", *["apply_flag_settings"] * 2, f"user {head}+"]
    assert later[0][0] == "apply_flag_settings"
    assert [line for step in later for line in step[-1:]] == [
        *(["user a"] if opening else []), "user c+"]
    assert [limits_of(step) for step in steps[:2]] == [
        ["1"], [ocp.FIXED_ENVIRONMENT["CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE"]]]


def test_a_single_question_needs_no_pin() -> None:
    turn = a_turn(("user", "Hi"))

    (step,) = steps_for(turn, "", NEW, pin=True)

    assert [brief(line) for line in lines_of(step)] == ["initialize", "user Hi+"]


SYNTHETIC = {"type": "assistant", "message": {"model": "<synthetic>", "content": []}}
REFUSED = {"type": "result", "subtype": "success", "is_error": True,
           "terminal_reason": "blocking_limit", "api_error_status": None}


def test_a_message_counts_as_pinned_when_claude_has_refused_it_by_itself() -> None:
    lines = [
        {"type": "control_response", "response": {"subtype": "success"}},
        {"type": "system", "subtype": "init"}, {"type": "system", "subtype": "status"},
        {"type": "news"}, {"type": ["result"]}, SYNTHETIC, REFUSED]

    assert [ocp.is_pinned(line) for line in lines] == [*[False] * 6, True]


@pytest.mark.parametrize(("line", "was_asked"), [
    (stream("message_start"), True),
    ({"type": "assistant", "message": {"model": "claude-sonnet-4-6"}}, True),
    ({"type": "assistant", "message": "odd"}, True),
    ({"type": "system", "subtype": "api_retry"}, True),
    ({"type": "rate_limit_event"}, True),
    ({**REFUSED, "terminal_reason": "api_error", "api_error_status": 429}, True),
    ({**REFUSED, "is_error": False}, True),
    ({**REFUSED, "terminal_reason": "completed", "is_error": False}, True),
    ({**REFUSED, "terminal_reason": "error"}, False),
    ({"type": "result", "is_error": True}, False),
    ({"type": "control_response", "response": {"subtype": "error", "error": "no"}}, False),
])
def test_anything_else_shows_that_the_first_message_is_not_pinned(
    line: Json, was_asked: bool
) -> None:
    with pytest.raises(ocp.NotPinned) as raised:
        ocp.is_pinned(line)

    assert raised.value.was_asked is was_asked


THINKING = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}


def test_an_answer_of_the_history_with_thinking_names_its_model() -> None:
    turn = a_turn(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"),
                  ("user", "e"))
    turn.messages[1].content.insert(0, THINKING)
    turn = turn._replace(model=MODELS.find("claude-sonnet-4-6")._replace(argument="x[1m]"))

    answers = [line["message"] for step in steps_of(turn) for line in step
               if line["type"] == "assistant"]

    assert [answer.get("model") for answer in answers] == ["claude-sonnet-4-6", None]
    assert answers[0]["content"] == [THINKING, text("b")]


def test_a_loop_that_is_told_with_its_thinking_keeps_the_budget() -> None:
    call = {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [text("Sunny.")]}
    turn = a_turn(("user", "Hi"), ("assistant", ""), ("user", ""), thinking_tokens=2_048)
    turn.messages[1].content[:] = [THINKING, call]
    turn.messages[2].content[:] = [result]

    (first, _) = steps_of(turn._replace(model=MODELS.find("claude-haiku-4-5")))

    assert thinking_of(first) == [2_048]


@pytest.mark.parametrize(("known", "told"), [
    ("toolu01AbC", "toolu_01AbC"), ("toolu01AbCr2", "toolu_01AbCr2"), ("tooluAbC", "tooluAbC"),
    ("call1", "call1"), ("xtoolu01", "xtoolu01")])
def test_calls_are_told_by_the_ids_that_the_api_gave_them(known: str, told: str) -> None:
    call = {"type": "tool_use", "id": known, "name": "weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": known, "content": [text("Sunny.")]}
    lines = [
        *lines_of(ocp.message_line(ocp.Message("assistant", [call]), NEW, ask=False)),
        *lines_of(ocp.message_line(ocp.Message("user", [result]), NEW, ask=True))]

    asked, answered = [line["message"]["content"][0] for line in lines]

    assert (asked["id"], answered["tool_use_id"]) == (told, told)


@pytest.mark.parametrize(
    ("system", "operator", "sent"),
    [
        ("", "", []),
        ("Be brief.", "", ["Be brief."]),
        ("", " Be kind.\n", ["Be kind."]),
        ("Be brief.", "Be kind.", ["Be brief.\n\nBe kind."]),
        ("", "  ", []),
    ],
)
def test_the_system_prompt_is_the_client_s_and_then_the_operator_s(
    system: str, operator: str, sent: list[str]
) -> None:
    [[initialize, _]] = steps_of(a_turn(("user", "Hi"), system=system), operator)

    assert initialize["request"]["systemPrompt"] == sent


@pytest.mark.parametrize("ask", [True, False])
def test_every_message_of_the_user_is_marked_as_composed_by_a_client(ask: bool) -> None:
    [line] = lines_of(ocp.message_line(ocp.Message("user", [text("@/etc/passwd")]), NEW, ask=ask))

    assert line["client_composed"] is True
    assert line["message"] == {"role": "user", "content": [text("@/etc/passwd")]}


def test_commands_in_the_history_are_guarded_too() -> None:
    steps = steps_of(a_turn(("user", "/clear"), ("assistant", "/b"), ("user", "/c")), "", OLD)

    assert [brief(line) for step in steps for line in step][1:] == [
        "user  /clear", "assistant /b", "user  /c+",
    ]


def test_text_that_is_no_unicode_is_written_as_json() -> None:
    line = ocp.message_line(ocp.Message("user", [text("\ud83d \n")]), NEW, ask=True)

    assert line.count(b"\n") == 1
    assert lines_of(line)[0]["message"]["content"] == [text("\ud83d \n")]


# -- images in results --------------------------------------------------------


def short(number: int, count: int, order: Any = "big") -> bytes:
    return number.to_bytes(count, order)


def jpeg(width: int, height: int, before: bytes = b"") -> bytes:
    return (b"\xff\xd8" + before + b"\xff\xff\xc2\0\x11\x08" + short(height, 2)
            + short(width, 2) + b"\x03\x01")


#: A preview inside of the image, as cameras write it.
PREVIEW = b"\xff\xe1" + short(2 + len(jpeg(160, 120)), 2) + jpeg(160, 120)
#: The heads of images of some width and height.
HEADS = {
    "png": lambda w, h: b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + short(w, 4) + short(h, 4),
    "gif": lambda w, h: b"GIF89a" + short(w, 2, "little") + short(h, 2, "little"),
    "jpeg": jpeg,
    "jpeg with a preview": lambda w, h: jpeg(w, h, PREVIEW),
    "webp": lambda w, h: (b"RIFF\0\0\0\0WEBPVP8 \0\0\0\0\x30\x01\0\x9d\x01\x2a"
                          + short(w, 2, "little") + short(h, 2, "little")),
    "webp without loss": lambda w, h: (b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0\x2f" + short(
        w - 1 | (h - 1) << 14, 4, "little")),
    "extended webp": lambda w, h: (b"RIFF\0\0\0\0WEBPVP8X\0\0\0\0\0\0\0\0" + short(
        w - 1, 3, "little") + short(h - 1, 3, "little")),
}


def image(content: bytes) -> Json:
    data = base64.b64encode(content).decode()
    return {"type": "image", "source": {"type": "base64", "media_type": "?", "data": data}}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (2000, 7), (7, 2001), (300, 12_000)])
def test_the_longer_side_of_an_image_stands_in_its_head(kind: str, width: int, height: int) -> None:
    head = HEADS[kind](width, height)

    assert ocp.largest_side(head + b"\0" * 50) == max(width, height)
    for length in range(len(head) + 1):
        assert ocp.largest_side(head[:length]) <= max(width, height)


def result_of(*content: Json) -> Json:
    return {"type": "tool_result", "tool_use_id": "t1", "content": list(content)}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("side", [2001, 9_000])
def test_a_long_image_of_an_earlier_result_stands_behind_it(kind: str, side: int) -> None:
    long, small = image(HEADS[kind](side, 10)), image(HEADS[kind](2000, 1999))
    content = [result_of(text("a"), small, long), result_of(long, small), text("b"), long]

    line = ocp.message_line(ocp.Message("user", content), NEW, ask=True)

    assert lines_of(line)[0]["message"]["content"] == [
        result_of(text("a"), small, text("[Image 1 of the results is below.]")),
        result_of(text("[Image 2 of the results is below.]"), small),
        text("Image 1 of the results:"), long, text("Image 2 of the results:"), long,
        text("b"), long,
    ]


def test_a_heavy_image_of_an_earlier_result_stands_behind_it() -> None:
    for size_bytes, moved in ((3_932_160, False), (3_932_161, True)):
        heavy = image(HEADS["png"](10, 10).ljust(size_bytes, b"\0"))

        assert (ocp.extract_large_images([result_of(heavy)])[0] != result_of(heavy)) is moved


@pytest.mark.parametrize(
    "content",
    [[text("a"), image(HEADS["png"](3000, 1))], [result_of(image(HEADS["gif"](9, 9))), text("a")],
     [result_of({"type": "image", "source": {"type": "url", "url": "https://a"}})],
     [result_of({"type": "document", "source": {"type": "base64", "data": "JVBERi0="}})], []],
)
def test_all_other_content_is_told_as_it_is(content: list[Json]) -> None:
    assert ocp.extract_large_images(content) is content


# -- how claude is started ----------------------------------------------------


def value_after(flag: str) -> str:
    arguments = ocp.claude_arguments("claude-x", ocp.Config())
    return str(arguments[arguments.index(flag) + 1])


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--model", "claude-x"), ("--tools", ""), ("--setting-sources", ""),
     ("--input-format", "stream-json"), ("--output-format", "stream-json")],
)
def test_claude_is_started_with_nothing_of_its_own(flag: str, value: str) -> None:
    assert value_after(flag) == value


@pytest.mark.parametrize(
    "flag",
    ["-p", "--strict-mcp-config", "--disable-slash-commands", "--no-session-persistence",
     "--include-partial-messages"],
)
def test_claude_is_started_with_the_flags_that_keep_it_to_itself(flag: str) -> None:
    assert flag in ocp.claude_arguments("claude-x", ocp.Config())


def agent_arguments(**settings: object) -> list[str]:
    """The arguments of a claude whose server has these settings."""
    config = dataclasses.replace(ocp.Config(), **settings)
    return list(ocp.claude_arguments("claude-x", config))


def test_the_only_tools_that_claude_may_use_by_itself_are_the_client_s_and_the_server_s() -> None:
    arguments = ocp.claude_arguments("claude-x", ocp.Config())

    assert arguments[arguments.index("--allowedTools") + 1:] == ["mcp__client", "mcp__server"]


def test_in_agent_mode_claude_has_the_tools_that_the_operator_names() -> None:
    arguments = agent_arguments(allowed_tools="Read, Bash")

    assert arguments[arguments.index("--tools") + 1] == "Read,Bash"
    assert "Read" in arguments and "Bash" in arguments and "mcp__client" in arguments
    assert "--dangerously-skip-permissions" not in arguments
    assert "--strict-mcp-config" in arguments


def test_the_usual_tools_of_agent_mode_have_a_short_name() -> None:
    arguments = agent_arguments(allowed_tools="default")

    assert arguments[arguments.index("--tools") + 1] == ",".join(ocp.DEFAULT_AGENT_TOOLS)


def test_in_agent_mode_permissions_may_be_skipped_and_servers_added() -> None:
    arguments = agent_arguments(skip_permissions=True, mcp_config="/etc/mcp.json")

    assert "--dangerously-skip-permissions" in arguments
    assert "--tools" not in arguments
    assert arguments[arguments.index("--mcp-config") + 1] == "/etc/mcp.json"


USUAL = {"PATH": "/bin", "HOME": "/home/me", "LC_ALL": "C", "XDG_CONFIG_HOME": "/x", "TZ": "UTC"}
LOGIN = {"CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-x", "CLAUDE_CONFIG_DIR": "/c"}
UNUSUAL = {
    "ANTHROPIC_API_KEY": "k", "ANTHROPIC_BASE_URL": "http://127.0.0.1:3456",
    "ANTHROPIC_AUTH_TOKEN": "k", "OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "u", "CLAUDECODE": "1",
    "CLAUDE_CODE_ENTRYPOINT": "cli", "CLAUDE_CODE_USE_BEDROCK": "1", "AWS_SECRET_ACCESS_KEY": "k",
    "PROXY_API_KEY": "client-key", "OCP_ADMIN_KEY": "admin-key", "CLAUDE_BIN": "/bin/claude",
    "NODE_OPTIONS": "--require=/tmp/x.js", "LD_PRELOAD": "/tmp/x.so", "PATHS": "x", "path": "x",
}
FIXED = {
    **ocp.FIXED_ENVIRONMENT, "CLAUDE_CODE_MAX_RETRIES": "2", "CLAUDE_CODE_RESTRICTED": "1",
    "SHELL": "/bin/bash"}


def child_env(environ: Json, **settings: str) -> dict[str, str]:
    """The environment of a claude whose server has this environment and these settings."""
    return dict(ocp.child_environment(environ, ocp.load_config(settings)))


def test_claude_gets_the_usual_variables_and_the_fixed_ones_only() -> None:
    assert child_env({**USUAL, **LOGIN, **UNUSUAL}) == {**USUAL, **LOGIN, **FIXED}


@pytest.mark.parametrize("name", sorted(UNUSUAL))
def test_a_variable_that_is_not_usual_does_not_get_through(name: str) -> None:
    assert name not in child_env({name: UNUSUAL[name]})


@pytest.mark.parametrize("setting", ["PROXY_API_KEY", "OCP_ADMIN_KEY"])
def test_a_key_of_the_server_s_own_does_not_get_through_under_any_name(setting: str) -> None:
    keys = {"PROXY_API_KEY": "the-client-key", "OCP_ADMIN_KEY": "the-admin-key"}

    found = child_env({**USUAL, "LC_KEY": keys[setting], "TERM": "xterm"}, **keys)

    assert found == {**USUAL, "TERM": "xterm", **FIXED}


def test_a_short_key_takes_no_innocent_variable_with_it() -> None:
    assert child_env({"LANG": "C"}, PROXY_API_KEY="C")["LANG"] == "C"


@pytest.mark.parametrize("named", ["AWS_PROFILE,AWS_REGION", " AWS_PROFILE , AWS_REGION", "AWS_*"])
def test_the_operator_may_name_more_variables(named: str) -> None:
    environ = {"AWS_PROFILE": "p", "AWS_REGION": "r", "GCP_REGION": "g"}

    found = child_env(environ, OCP_PASS_ENV=named)

    assert found == {"AWS_PROFILE": "p", "AWS_REGION": "r", **FIXED}


def test_what_is_fixed_stays_so_whatever_the_operator_names() -> None:
    environ = {"CLAUDE_CODE_DISABLE_ATTACHMENTS": "0", "CLAUDE_CODE_MAX_RETRIES": "10"}

    found = child_env(environ, OCP_PASS_ENV="CLAUDE_CODE_*")

    assert found == FIXED


def test_the_number_of_retries_is_a_setting() -> None:
    assert child_env({}, CLAUDE_MAX_RETRIES="0")["CLAUDE_CODE_MAX_RETRIES"] == "0"


@pytest.mark.parametrize(
    "name",
    ["CLAUDE_CODE_DISABLE_ATTACHMENTS", "CLAUDE_CODE_DISABLE_AUTO_MEMORY", "DISABLE_AUTOUPDATER",
     "CLAUDE_CODE_DISABLE_CLAUDE_MDS", "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK"],
)
def test_what_keeps_files_and_memory_out_is_always_set(name: str) -> None:
    assert child_env({})[name] == "1"
