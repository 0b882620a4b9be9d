"""Failures of the API, seen by a client through the real claude."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import stub_api as stub
from conversation import EVERY_DIALECT, WHOLE_AND_STREAMED, Conversation
from depth import by_depth, rest
from dialects import CHAT, MESSAGES, Answer, Dialect
from rig import MODEL, Case, Claude, Outcome, Rig, assistant, running_rig, user
from upstream import turns

Json = Any

RIG_SETTINGS = {"CLAUDE_MAX_RETRIES": "1"}
# Most cases were asked together, by a fixture.
pytestmark = pytest.mark.each_case

MODES = {"whole": False, "stream": True}


class Failure(NamedTuple):
    """What the API answers, every time, and what the client is told."""
    name: str
    reply: stub.Reply
    status: int
    type: str
    code: str | None
    param: str | None = None
    #: Whether to try again makes sense; then the header x-should-retry is not there.
    retryable: bool = False
    #: Whether a Retry-After within a minute comes with it.
    waits: bool = False
    #: How often the API may be asked, one retry of claude's included.
    requests: int = 2


FAILURES = (
    Failure(
        "a bad request", stub.error(400, "messages.0: this is no good"),
        400, "invalid_request_error", None,
        # The newest claude suspects its own beta headers, and tries without them.
        requests=3),
    Failure(
        "too long a prompt",
        stub.error(400, "prompt is too long: 250000 tokens > 200000 maximum"),
        400, "invalid_request_error", "context_length_exceeded", param="messages", requests=1),
    Failure(
        "a refused login", stub.error(401, "Invalid bearer token"),
        401, "authentication_error", "upstream_login_required"),
    Failure(
        "a forbidden thing", stub.error(403, "This account may not do that"),
        403, "permission_error", "upstream_forbidden", requests=1),
    Failure(
        "an unknown model", stub.error(404, "model: claude-sonnet-4-6"),
        404, "invalid_request_error", "model_not_found", param="model"),
    Failure(
        "too large a request", stub.error(413, "Request exceeds the maximum size"),
        413, "invalid_request_error", "request_too_large", requests=1),
    Failure(
        "too many requests", stub.error(429, "Number of requests has exceeded your rate limit"),
        429, "rate_limit_error", "rate_limit_exceeded", retryable=True, waits=True),
    Failure(
        "credits for a long context",
        stub.error(429, "Extra usage is required for long context requests."),
        429, "insufficient_quota", "insufficient_quota", requests=1),
    Failure(
        "credits for a model",
        stub.error(429, "Usage credits are required for this model.",
                   headers={"x-should-retry": "false"}),
        429, "insufficient_quota", "insufficient_quota", requests=1),
    Failure(
        "an enforced spend limit",
        stub.error(429, "You have reached your spend limit (enforced_spend_limit_reached).",
                   headers={"x-should-retry": "false"}),
        429, "insufficient_quota", "insufficient_quota", requests=1),
    Failure(
        "an account on hold", stub.error(403, "Your account is on hold."),
        403, "permission_error", "upstream_forbidden", requests=1),
    Failure(
        "a failure of the API", stub.error(500, "Internal server error"),
        502, "server_error", "upstream_failed", retryable=True),
    Failure(
        "a bad gateway", stub.error(502, "Bad gateway"),
        502, "server_error", "upstream_failed", retryable=True),
    Failure(
        "an overloaded API", stub.error(529, "Overloaded"),
        529, "server_error", "overloaded", retryable=True, waits=True),
    Failure(
        "an answer without a word", stub.Reply(),
        400, "invalid_request_error", "empty_answer"),
)


CASES = [(failure, mode) for failure in FAILURES for mode in MODES]
#: Each failure in one mode, now this one and now the other.
IN_ONE_MODE = [CASES[2 * number + number % 2] for number in range(len(FAILURES))]
CHECKED_CASES = by_depth(IN_ONE_MODE, IN_ONE_MODE, CASES)
EACH_CASE = pytest.mark.parametrize(
    ("failure", "mode"), CHECKED_CASES, ids=[f"{each.name}-{mode}" for each, mode in CHECKED_CASES])


def outcomes(rig: Rig, replies: dict[str, Sequence[stub.Reply]]) -> dict[str, Outcome]:
    """What becomes of a request that is answered with these, whole and streamed."""
    rig.begin()
    return rig.run({
        f"{name}, {mode}": Case(streams=streams, replies=scripted)
        for name, scripted in replies.items() for mode, streams in MODES.items()}, at_once=4)


def assert_failed(answer: Answer, status: int, kind: str, code: str | None) -> None:
    """The client got this failure and nothing else, whatever its mode."""
    assert answer.error is not None, answer
    assert (answer.status, answer.error["type"], answer.error["code"]) == (status, kind, code)
    assert answer.headers["Content-Type"] == "application/json"
    assert not answer.is_complete and not answer.stop_reasons
    assert not answer.pieces and not answer.text


# ---------------------------------------------------------------------------
# Before the first word
# ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def failure_outcomes(shared_rig: Rig) -> dict[str, Outcome]:
    shared_rig.begin()
    return shared_rig.run({
        f"{each.name}, {mode}": Case(streams=MODES[mode], replies=[each.reply] * 9)
        for each, mode in CHECKED_CASES}, at_once=4)


@pytest.mark.exhaustive
@EACH_CASE
def test_a_failure_has_its_own_status_type_and_code(
    failure_outcomes: dict[str, Outcome], failure: Failure, mode: str
) -> None:
    answer, bodies = failure_outcomes[f"{failure.name}, {mode}"]
    assert_failed(answer, failure.status, failure.type, failure.code)
    assert answer.error and answer.error["param"] == failure.param
    assert answer.headers["x-should-retry"] == (None if failure.retryable else "false")
    assert (1 <= int(answer.headers["Retry-After"] or 0) <= 60) == failure.waits
    assert 1 <= len(bodies) <= failure.requests


@pytest.mark.exhaustive
@EACH_CASE
def test_a_failure_is_told_in_words_for_people(
    failure_outcomes: dict[str, Outcome], failure: Failure, mode: str
) -> None:
    error = failure_outcomes[f"{failure.name}, {mode}"].answer.error
    assert error is not None
    message = error["message"]
    assert len(message) > 8
    assert not re.match(r"API Error|\d{3} |\{", message)
    assert "sk-ant" not in message and "/tmp" not in message


@pytest.mark.exhaustive
def test_a_lost_login_names_the_command_that_helps(failure_outcomes: dict[str, Outcome]) -> None:
    error = failure_outcomes["a refused login, whole"].answer.error
    assert error is not None
    assert "claude auth login" in error["message"]
    assert "claude setup-token" in error["message"]


TOO_LONG = "prompt is too long: 250123 tokens > 200000 maximum"


@EVERY_DIALECT
@WHOLE_AND_STREAMED
def test_a_prompt_that_is_too_long_is_one_request_and_told_in_the_apis_words(
    rig: Rig, dialect: Dialect, streams: bool
) -> None:
    rig.script(then=stub.error(400, TOO_LONG))
    talk = Conversation(rig, dialect, streams=streams)
    # With a conversation, of which claude could think that it has to be made shorter.
    talk.messages += [user("One? " * 100), assistant("Yes. " * 100)] * 3
    reply = talk.ask("Two?").reply
    error = reply.json()["error"]
    assert (reply.status, error["message"]) == (400, TOO_LONG)
    assert dialect is MESSAGES or error["code"] == "context_length_exceeded"
    rig.settle()
    assert len(rig.bodies()) == 1


@pytest.mark.parametrize("suffix", ["", *rest("[1m]")])
def test_what_claude_would_find_too_long_is_for_the_api_to_decide(rig: Rig, suffix: str) -> None:
    # By claude's guess, of four characters a token, more than twice the window.
    words = "word " * 350_000
    rig.script(stub.text("Read."))
    assert rig.ask(words, MODEL + suffix).text == "Read."
    assert turns(rig.only_body()) == [("user", [words])]


def test_claudes_own_words_for_what_is_too_large_are_replaced_by_the_apis(rig: Rig) -> None:
    found = {413: "Request exceeds the maximum size", 400: (
        "messages.0.content.0.image.source.base64: image exceeds 5 MB maximum")}
    for status, message in found.items():
        rig.script(then=stub.error(status, message))
        answer = rig.ask()
        assert answer.error and (answer.status, answer.error["message"]) == (status, message)


@pytest.mark.parametrize(
    ("model", "resets_in_s"), [("claude-opus-4-6", 1800), *rest(("claude-opus-4-7", 5 * 86_400))])
def test_a_used_up_plan_says_when_it_resets(
    rig: Rig, model: str, resets_in_s: int
) -> None:
    limit = stub.plan_limit(resets_in_s)
    rig.script(then=limit)
    resets_at_s = int(limit.headers["anthropic-ratelimit-unified-reset"])
    before_s = time.time()
    resets = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(resets_at_s))
    for streams in (False, True):
        answer = rig.ask(model=model, stream=streams)
        assert_failed(answer, 429, "insufficient_quota", "insufficient_quota")
        assert answer.error and f"The limit resets at {resets}." in answer.error["message"]
        assert answer.headers["x-should-retry"] == "false"
        pause_s = int(answer.headers["Retry-After"])
        assert resets_at_s - time.time() - 2 <= pause_s <= resets_at_s - before_s + 2
    rig.settle()
    assert len(rig.bodies()) == 2


@pytest.mark.exhaustive
def test_what_heals_within_claudes_retries_is_never_seen(rig: Rig) -> None:
    seen = outcomes(rig, {
        f"{status}": [stub.error(status, "For a moment"), stub.text("Fine.")]
        for status in by_depth((529,), (529,), (500, 529))})
    for answer, bodies in seen.values():
        assert (answer.text, answer.finish) == ("Fine.", "stop")
        assert len(bodies) == 2


@pytest.mark.exhaustive
def test_a_good_answer_after_a_refused_login_is_a_login(rig: Rig) -> None:
    rig.script(*[stub.error(401, "Invalid bearer token")] * 2)
    assert rig.ask().status == 401
    assert rig.server.call("GET", "/health").json()["auth"]["ok"] is False
    assert rig.ask().finish == "stop"
    assert rig.server.call("GET", "/health").json()["auth"]["ok"] is True


# ---------------------------------------------------------------------------
# In the middle of an answer
# ---------------------------------------------------------------------------

#: The pause lets the first words through before the end overtakes them.
OVERLOADED = stub.stream_error("Half ", gap_s=0.2)
BROKEN = stub.stream_error("Half ", type="api_error", message="Internal server error", gap_s=0.2)
CUT = stub.cut("Half ", gap_s=0.2)
BREAKS = {
    "overloaded": [OVERLOADED] * 9, "broken": [BROKEN] * 9, "cut": [CUT] * 9,
    "cut once": [CUT, stub.text("Fine.")],
    "overloaded at once": [stub.stream_error(gap_s=0.1)] * 9,
    "cut at once": [stub.cut(gap_s=0.1)] * 9,
}


#: What the gate runs: an error of the API and a cut, in the middle and before the first word.
SOME_BREAKS = ("overloaded", "cut once", "cut at once")


@pytest.fixture(scope="module")
def break_outcomes(shared_rig: Rig) -> dict[str, Outcome]:
    names = by_depth(SOME_BREAKS, SOME_BREAKS, tuple(BREAKS))
    return outcomes(shared_rig, {name: BREAKS[name] for name in names})


@pytest.mark.parametrize("name", ["overloaded", "cut once", *rest("broken", "cut")])
def test_a_broken_stream_ends_with_an_error_and_nothing_good(
    break_outcomes: dict[str, Outcome], name: str
) -> None:
    answer, bodies = break_outcomes[f"{name}, stream"]
    assert (answer.status, answer.pieces) == (200, ["Half "])
    assert answer.error and answer.error["type"] == "server_error"
    assert answer.error["code"] in ("overloaded", "upstream_failed")
    assert (answer.stop_reasons, answer.is_complete, answer.usage) == ([], False, None)
    assert len(bodies) <= 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["cut at once", *rest("overloaded at once")])
def test_a_stream_broken_before_its_first_word_has_a_status(
    break_outcomes: dict[str, Outcome], name: str, mode: str
) -> None:
    answer, bodies = break_outcomes[f"{name}, {mode}"]
    assert_failed(answer, answer.status, "server_error", answer.error and answer.error["code"])
    assert answer.status in (502, 529)
    assert len(bodies) <= 3


@pytest.mark.parametrize("name", ["overloaded", *rest("broken", "cut")])
def test_half_an_answer_is_no_whole_answer(
    break_outcomes: dict[str, Outcome], shared_rig: Rig, name: str
) -> None:
    answer, bodies = break_outcomes[f"{name}, whole"]
    # The old claude does not tell what kind of failure came in the stream.
    overloaded = name == "overloaded" and not shared_rig.is_old
    status, code = (529, "overloaded") if overloaded else (502, "upstream_failed")
    assert_failed(answer, status, "server_error", code)
    assert len(bodies) <= 2


def test_a_retry_replaces_what_a_cut_left(
    break_outcomes: dict[str, Outcome], shared_rig: Rig
) -> None:
    answer = break_outcomes["cut once, whole"].answer
    if shared_rig.is_old:
        # It does not try again once words have come.
        assert_failed(answer, 502, "server_error", "upstream_failed")
    else:
        assert (answer.text, answer.finish) == ("Fine.", "stop")


# ---------------------------------------------------------------------------
# No API, no login
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
def test_a_network_that_is_down_is_told(claude: Claude, tmp_path: Path) -> None:
    with closed_port() as port, running_rig(
        tmp_path, claude, CLAUDE_MAX_RETRIES="1",
        ANTHROPIC_BASE_URL=f"http://127.0.0.1:{port}",
    ) as rig:
        for answer in rig.ask_whole_and_streamed():
            assert_failed(answer, 502, "server_error", "upstream_failed")
            assert answer.error and "connect" in answer.error["message"].lower()
            assert answer.headers["x-should-retry"] is None


class closed_port:
    """A port that refuses every connection for as long as the block lasts."""

    def __enter__(self) -> int:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        port: int = self._socket.getsockname()[1]
        return port

    def __exit__(self, *error: object) -> None:
        self._socket.close()


@pytest.mark.exhaustive
def test_without_a_login_nothing_is_asked(claude: Claude, tmp_path: Path) -> None:
    with running_rig(tmp_path, claude, CLAUDE_CODE_OAUTH_TOKEN=None) as rig:
        for answer in rig.ask_whole_and_streamed():
            assert_failed(answer, 401, "authentication_error", "upstream_login_required")
            assert answer.error and "claude auth login" in answer.error["message"]
            assert answer.headers["x-should-retry"] == "false"
        health = rig.server.call("GET", "/health")
        assert (health.status, health.json()["auth"]["ok"]) == (200, False)
        assert rig.bodies() == []


def test_a_refused_body_never_reaches_the_api(rig: Rig) -> None:
    bad = rig.server.call("POST", CHAT.path, {"messages": [{"content": "no role"}]})
    assert (bad.status, bad.json()["error"]["param"]) == (400, "messages[0].role")
    assert rig.bodies() == []
