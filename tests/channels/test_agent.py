"""What an agent's answers are read as."""

from __future__ import annotations

import itertools
import json
import re
import threading
from typing import Any, Iterable, Iterator

import pytest

from channel_rows import channels
from depth import by_depth
from fake_agent import FakeAgent, chunk, raw_stream, refused, streamed, whole

TEXT = "Gr\u00fc\u00dfe, \u4f60\u597d, and \U0001f600."
STREAM = b": heartbeat\n\n" + chunk(TEXT[:7]) + b"event: x\r\n\r\n" + chunk(TEXT[7:]) + (
    b"data: [DONE]\n\n")


@pytest.fixture(scope="module")
def agent() -> Iterator[FakeAgent]:
    with FakeAgent() as running:
        yield running


def answer_of(agent: FakeAgent, *, is_async: bool = False) -> str:
    """The whole text that comes. Raises AgentFailed."""
    body = {"messages": [{"content": "hello"}]}
    http = channels.Http(channels.Connector("", {}))
    question = channels.Question(agent.url, "the-key", body, 20.0, {}, is_async)
    asking = channels.Answering(http, question)
    texts = iter(lambda: asking.next(20.0), None)
    return "".join(texts)


def lines_of(data: bytes) -> Iterable[bytes]:
    return data.splitlines(keepends=True)


def test_a_stream_that_comes_byte_by_byte_gives_the_same_text(agent: FakeAgent) -> None:
    agent.enqueue(raw_stream([(0.001, STREAM[place:place + 1]) for place in range(len(STREAM))]))
    assert answer_of(agent) == TEXT


def test_a_stream_cut_at_every_byte_gives_the_same_text(agent: FakeAgent) -> None:
    for cut in range(1, len(STREAM), by_depth(49, 37, 1)):
        agent.enqueue(raw_stream([(0.0, STREAM[:cut]), (0.001, STREAM[cut:])]))
        assert answer_of(agent) == TEXT


@pytest.mark.parametrize("data", [
    b'data: {"choices":\ndata: [{"delta": {"content": "Hi"}}]}\n\ndata: [DONE]\n\n',
    b'data:{"choices":[{"delta":{"content":"Hi"},"finish_reason":"stop"}]}\n\n',
    b'data: {"choices":[{"delta":{"reasoning_content":"hm"}}]}\n\n' + chunk("Hi")
    + b"data: [DONE]\n\n",
    b"data: no json\n\ndata: 3\n\ndata: {}\n\n" + chunk("Hi") + b"data: [DONE]\n\n",
    chunk("Hi") + b"data: [DONE]\n", chunk("Hi") + b"data: [DONE]",
    b'data: {"choices":[{"delta":{"content":"Hi"},"finish_reason":"stop"}]}\n',
])
def test_forms_of_a_stream(data: bytes) -> None:
    assert "".join(channels.stream_texts(lines_of(data))) == "Hi"


@pytest.mark.parametrize(("data", "code"), [
    (chunk("Hi"), "cut_off"), (chunk("Hi") + b'data: {"choices": [{"del', "cut_off"),
    (chunk("Hi") + b'data: {"error": {"message": "m", "code": "c"}}\n\n', "c"),
])
def test_a_stream_that_breaks_off_is_a_failure_after_its_text(data: bytes, code: str) -> None:
    texts = []
    with pytest.raises(channels.AgentFailed) as failed:
        for text in channels.stream_texts(lines_of(data)):
            texts.append(text)
    assert (texts, failed.value.code) == (["Hi"], code)


@pytest.mark.parametrize("event", [
    {"choices": [{"delta": "Hi"}]}, {"choices": [{"delta": [1], "message": 3}]},
    {"choices": [{"message": "Hi"}]},
])
def test_an_answer_in_no_known_form_is_a_failure_and_not_waited_for(
    agent: FakeAgent, event: Any
) -> None:
    agent.enqueue(raw_stream([(0.0, b"data: " + json.dumps(event).encode() + b"\n\n")]))
    with pytest.raises(channels.AgentFailed, match="not understood"):
        answer_of(agent)


def test_an_answer_without_end_is_given_up() -> None:
    texts = []
    with pytest.raises(channels.AgentFailed, match="too large"):
        for text in channels.stream_texts(
                line for _ in itertools.count() for line in lines_of(chunk("x" * 60_000))):
            texts.append(text)
    assert len("".join(texts)) == 1024 * 1024
    with pytest.raises(channels.AgentFailed, match="too large"):
        list(channels.stream_texts(itertools.repeat(b"data: " + b"x" * 60_000 + b"\n")))


def test_a_question_is_stopped_at_once_while_its_connection_is_being_made() -> None:
    class Slow:
        is_asked, is_over = threading.Event(), threading.Event()

        def open(self, *_: Any, **__: Any) -> Any:
            self.is_asked.set()
            self.is_over.wait(30)
            raise channels.NetworkFailed("late")

    asking = channels.Answering(Slow(), channels.Question("http://x", "", {}, 20.0))
    assert Slow.is_asked.wait(10)
    asking.cut()
    with pytest.raises(channels.AgentFailed):
        asking.next(20.0)
    assert not Slow.is_over.is_set()
    Slow.is_over.set()


def test_a_reason_is_short_whatever_the_server_says() -> None:
    failed = channels.refusal_of(channels.HttpAnswer(
        500, {}, json.dumps({"error": {"message": "a\x1b" * 9000}}).encode()))
    assert len(str(failed)) == 500 and "\x1b" not in str(failed)


@pytest.mark.parametrize(("after_s", "told"), [
    (0.0, "The limit is used up."), (60.0, r"The limit is used up until \d\d:\d\d\."),
    (3 * 86_400.0, r"The limit is used up until \d\d [A-Z][a-z]+, \d\d:\d\d\."),
])
def test_until_when_a_limit_is_used_up_is_told_with_its_day(after_s: float, told: str) -> None:
    failed = channels.AgentFailed("insufficient_quota", "", 429, after_s)
    assert re.fullmatch(told, channels.failure_text(failed, "", "ref1", is_owner=False))


@pytest.mark.parametrize("content", [
    {"choices": [{"message": {"content": "Hi"}}]},
    {"choices": [{"message": {"content": [{"type": "text", "text": "Hi"}]}}]},
    {"text": "Hi"}, {"content": "Hi"}, {"response": "Hi"}, {"output": "Hi"}, b"Hi", b'"Hi"',
])
def test_forms_of_an_answer_that_comes_at_once(content: Any) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    assert channels.whole_text(data) == "Hi"


@pytest.mark.parametrize("reply", [
    refused(503, "overloaded"), refused(529, "x"), refused(429, "rate_limit_exceeded"),
    raw_stream([(0.0, b"")]),
])
def test_what_may_pass_is_asked_again(agent: FakeAgent, reply: Any) -> None:
    agent.enqueue(reply)
    assert answer_of(agent) == "You said: hello"


@pytest.mark.parametrize("reply", [
    refused(503, "overloaded", x_should_retry="false"), refused(429, "insufficient_quota"),
    refused(401, "invalid_api_key"), streamed("a part", end=b""),
])
def test_what_will_not_pass_is_asked_once(agent: FakeAgent, reply: Any) -> None:
    asked = len(agent.requests)
    agent.enqueue(reply)
    with pytest.raises(channels.AgentFailed):
        answer_of(agent)
    assert len(agent.requests) == asked + 1


def test_the_key_and_the_wish_for_a_stream_are_sent(agent: FakeAgent) -> None:
    answer_of(agent)
    headers = agent.requests[-1].headers
    assert headers["authorization"] == "Bearer the-key"
    assert headers["accept"] == "text/event-stream"


@pytest.mark.parametrize(("reply", "text"), [
    (whole({"status": "accepted"}, 202), ""), (whole({"status": "accepted"}), ""),
    (whole({"choices": [{"message": {"content": "at once"}}]}), "at once"),
])
def test_a_later_answer_is_told_from_one_at_once(agent: FakeAgent, reply: Any, text: str) -> None:
    agent.enqueue(reply)
    assert answer_of(agent, is_async=True) == text


@pytest.mark.parametrize(("status", "code", "stranger", "owner"), [
    (0, "unreachable", "not reachable right now. (ref1)", "Is OCP running?"),
    (500, "x", "not reachable right now. (ref1)", "Is OCP running?"),
    (401, "x", "needs its owner. (ref1)", "the reason"),
    (503, "claude_unavailable", "needs its owner. (ref1)", "the reason"),
    (429, "insufficient_quota", "The limit is used up until", "The limit"),
    (404, "model_not_found", 'There is no model "opus"', "/model lists"),
    (400, "context_length_exceeded", "/new begins another", "/new"),
    (400, "x", "cannot process this. (ref1)", "the reason"),
])
def test_what_a_person_is_told_of_a_failure(
    status: int, code: str, stranger: str, owner: str
) -> None:
    failed = channels.AgentFailed(code, "the reason", status, 60.0)
    text = channels.failure_text(failed, "opus", "ref1", is_owner=False)
    assert stranger in text and "the reason" not in text
    assert owner in channels.failure_text(failed, "opus", "ref1", is_owner=True)


@pytest.mark.parametrize(("data", "kind"), [
    (b"\x89PNG\r\n\x1a\nx", "image_url"), (b"%PDF-1.7", "file"), (b"text ``` here", "text"),
    (b"RIFF0000WEBPVP8", "image_url"),
])
def test_files_that_agents_read(data: bytes, kind: str) -> None:
    attachment = channels.Attachment("file", "../a\x1b\\b.txt", "", len(data), {})
    part = channels.attachment_part(attachment, data)
    assert part["type"] == kind
    if kind == "text":
        assert part["text"] == "b.txt:\n````\ntext ``` here\n````"


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"a\0b", b"x" * 100_001, b"RIFF0000WAVE\0"])
def test_files_that_agents_do_not_read(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a photo"):
        channels.attachment_part(channels.Attachment("file", "a", "", 1, {}), data)
