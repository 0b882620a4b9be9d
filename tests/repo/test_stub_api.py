"""What the stub promises to the tests that stand on it."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Iterator

import pytest

import stub_api
from stub_api import (
    Recorded,
    Reply,
    StubApi,
    cut,
    error,
    hang,
    plan_limit,
    stream_error,
    text,
    thinking,
    tool_calls,
)
from waiting import eventually


@pytest.fixture
def stub() -> Iterator[StubApi]:
    with StubApi() as started:
        yield started


def ask(url: str, said: str = "Hi", stream: bool = True, **fields: Any) -> tuple[Any, bytes]:
    """The response, already read, and its content."""
    body = {"model": "m", "stream": stream, "messages": [{"role": "user", "content": said}],
            **fields}
    request = urllib.request.Request(
        url + "/v1/messages?beta=true", json.dumps(body).encode(),
        {"content-type": "application/json", "X-Test": "yes"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response, response.read()
    except urllib.error.HTTPError as failure:
        with failure:
            return failure, failure.read()


def events(content: bytes) -> list[Any]:
    """The parsed SSE events; every event's name has to be its type."""
    parsed = []
    for frame in content.decode().split("\n\n")[:-1]:
        name, line = frame.split("\n")
        event = json.loads(line[len("data: "):])
        assert name == "event: " + event["type"]
        parsed.append(event)
    return parsed


def deltas(parsed: list[Any]) -> list[Any]:
    return [event["delta"] for event in parsed if event["type"] == "content_block_delta"]


def test_default_answer_is_a_text_in_three_deltas(stub: StubApi) -> None:
    response, content = ask(stub.url)
    parsed = events(content)
    assert [event["type"] for event in parsed] == [
        "message_start", "content_block_start", "ping", "content_block_delta",
        "content_block_delta", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop"]
    assert "".join(delta["text"] for delta in deltas(parsed)) == "Hello from the stub."
    assert response.headers["anthropic-ratelimit-unified-5h-status"] == "allowed"
    assert response.headers["anthropic-ratelimit-unified-7d-utilization"] == "0.4"


def test_requests_are_recorded_and_other_paths_are_not(stub: StubApi) -> None:
    with pytest.raises(urllib.error.HTTPError) as not_found:
        urllib.request.urlopen(stub.url + "/api/other", timeout=60)
    not_found.value.close()
    ask(stub.url, "What?")
    (recorded,) = stub.wait_for_requests(1)
    assert isinstance(recorded, Recorded)
    assert recorded.path == "/v1/messages?beta=true"
    assert recorded.headers["x-test"] == "yes"
    assert recorded.body["messages"][0]["content"] == "What?"
    assert recorded.size_bytes == int(recorded.headers["content-length"])


def test_script_is_first_in_first_out_and_then_the_default_answers(stub: StubApi) -> None:
    stub.default = lambda body: text("default")
    stub.reply("one")
    stub.enqueue(text("two"), text("three"))
    said = ["".join(delta["text"] for delta in deltas(events(ask(stub.url)[1])))
            for _ in range(4)]
    assert said == ["one", "two", "three", "default"]


def test_thinking_comes_first_and_is_signed(stub: StubApi) -> None:
    stub.enqueue(thinking("I wonder.", then="Yes.", thinking_tokens=4))
    parsed = events(ask(stub.url)[1])
    kinds = [delta["type"] for delta in deltas(parsed)]
    assert kinds[:4] == ["thinking_delta"] * 3 + ["signature_delta"]
    assert set(kinds[4:]) == {"text_delta"}
    assert parsed[-2]["usage"]["output_tokens_details"] == {"thinking_tokens": 4}


@pytest.mark.parametrize(("kind", "effort", "thinks"), [
    ("adaptive", "low", False), ("adaptive", "medium", True), ("adaptive", "max", True),
    ("between_tools", "medium", False), ("disabled", "high", False),
])
def test_a_model_that_thinks_by_effort_is_played(kind: str, effort: str, thinks: bool) -> None:
    body = {"thinking": {"type": kind}, "output_config": {"effort": effort}}

    assert stub_api.thinks_first(body) == thinks
    assert not stub_api.thinks_first({})


def test_thought_takes_equal_steps_up_to_the_text() -> None:
    reply = stub_api.think_for(1.0)

    # Each delta waits for one step, and the next one after the thought is the first of the text.
    assert [block.content["type"] for block in reply.blocks] == ["thinking", "text"]
    assert (len(reply.blocks[0].deltas) + 1) * reply.gap_s == pytest.approx(1.0)


def test_parallel_tool_calls_stream_their_input_in_pieces(stub: StubApi) -> None:
    stub.enqueue(tool_calls([("look", {"at": "sky"}), ("listen", {})], text="Let me see."))
    parsed = events(ask(stub.url)[1])
    started = [event["content_block"] for event in parsed
               if event["type"] == "content_block_start"]
    pieces = [event["delta"]["partial_json"] for event in parsed
              if event["type"] == "content_block_delta" and event["index"] == 1]
    assert [block["type"] for block in started] == ["text", "tool_use", "tool_use"]
    assert started[1]["input"] == {} and started[1]["id"] != started[2]["id"]
    assert len(pieces) > 2 and json.loads("".join(pieces)) == {"at": "sky"}
    assert parsed[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize("reply", [
    text("Paris."), thinking("Hm.", then="Paris."), tool_calls([("look", {"at": "sky"})]),
])
def test_without_stream_the_same_content_is_one_message(stub: StubApi, reply: Reply) -> None:
    stub.enqueue(reply)
    message = json.loads(ask(stub.url, stream=False)[1])
    assert message["type"] == "message" and message["stop_reason"] == reply.stop_reason
    assert ([block["type"] for block in message["content"]]
            == [block.content["type"] for block in reply.blocks])
    assert message["usage"]["output_tokens"] == 7


def test_options_reach_the_wire(stub: StubApi) -> None:
    stub.enqueue(text("x", stop_reason="stop_sequence", stop_sequence="END", input_tokens=99,
                      cache_read=0, headers={"x-extra": "1"}))
    response, content = ask(stub.url)
    parsed = events(content)
    assert parsed[0]["message"]["usage"]["input_tokens"] == 99
    assert parsed[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "END"}
    assert response.headers["x-extra"] == "1"


def test_unknown_option_is_refused() -> None:
    with pytest.raises(ValueError):
        text("x", stop_raison="end_turn")


def test_errors_have_the_type_of_their_status(stub: StubApi) -> None:
    stub.enqueue(error(529, "Overloaded"), error(400, "no", type="odd_error"))
    response, content = ask(stub.url)
    assert response.status == 529
    assert json.loads(content)["error"] == {"type": "overloaded_error", "message": "Overloaded"}
    assert json.loads(ask(stub.url)[1])["error"]["type"] == "odd_error"


def test_plan_limit_carries_the_rejected_window(stub: StubApi) -> None:
    stub.enqueue(plan_limit(resets_in_s=600))
    response, _ = ask(stub.url)
    reset = int(response.headers["anthropic-ratelimit-unified-5h-reset"])
    assert response.status == 429
    assert response.headers["anthropic-ratelimit-unified-status"] == "rejected"
    assert 590 < reset - time.time() < 610


def test_stream_error_comes_after_the_text(stub: StubApi) -> None:
    stub.enqueue(stream_error(after="some text"))
    parsed = events(ask(stub.url)[1])
    assert deltas(parsed)[0]["text"] == "some text"
    assert parsed[-1]["error"] == {"type": "overloaded_error", "message": "Overloaded"}


def test_cut_breaks_the_transfer(stub: StubApi) -> None:
    stub.enqueue(cut(after="some text"), cut(after="some text"))
    with pytest.raises(http.client.IncompleteRead):
        ask(stub.url)
    with pytest.raises(http.client.IncompleteRead):
        ask(stub.url, stream=False)
    assert stub.aborted == 0


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="only Linux tells")
def test_a_cut_waits_until_the_client_has_read_what_came_before(stub: StubApi) -> None:
    stub.enqueue(cut(after="some text", gap_s=0.05))
    connection = socket.create_connection(("127.0.0.1", int(stub.url.rpartition(":")[2])), 30)
    with connection:
        body = b'{"stream": true, "messages": []}'
        connection.sendall(b"POST /v1/messages HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (
            len(body), body))
        stub.wait_for_requests(1)
        own, its = connection.getsockname()[1], connection.getpeername()[1]
        eventually(lambda: stub_api.is_unread(own, its))
        time.sleep(0.3)
        # The end of the connection would be seen already.
        state = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        assert state == b"\x01"
        read = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert b"some text" in read


def test_a_gate_holds_up_each_delta(stub: StubApi) -> None:
    gate = threading.Semaphore(0)
    stub.enqueue(text(["one", "two"], gate=gate))
    request = urllib.request.Request(
        stub.url + "/v1/messages", b'{"stream": true, "messages": []}')
    with urllib.request.urlopen(request, timeout=60) as response:
        for word in (b"one", b"two"):
            assert stub.aborted == 0
            gate.release()
            while word not in response.readline():
                pass
        assert b"message_stop" in response.read()


def test_hang_ends_and_then_completes(stub: StubApi) -> None:
    stub.enqueue(hang(after="some text", seconds=0.05))
    before_s = time.monotonic()
    assert events(ask(stub.url)[1])[-1]["type"] == "message_stop"
    assert time.monotonic() - before_s >= 0.05


@pytest.mark.parametrize("reply", [
    hang(after="some text", seconds=60), text("late", delay_s=60), text("slow", gap_s=60),
])
def test_client_that_hangs_up_is_counted(stub: StubApi, reply: Reply) -> None:
    stub.enqueue(reply)
    connection = http.client.HTTPConnection(stub.url[len("http://"):], timeout=60)
    connection.request("POST", "/v1/messages", b'{"stream": true, "messages": []}')
    stub.wait_for_requests(1)
    connection.close()
    stub.wait_for_aborted(1)
    assert "aborted=1" in repr(stub)


def test_leaving_the_block_ends_a_hanging_reply() -> None:
    with StubApi() as stub:
        stub.enqueue(hang(seconds=60))
        connection = http.client.HTTPConnection(stub.url[len("http://"):], timeout=60)
        connection.request("POST", "/v1/messages", b'{"stream": true, "messages": []}')
        stub.wait_for_requests(1)
    connection.close()
    assert stub.aborted == 0


def test_waiting_for_a_request_that_never_comes_raises(stub: StubApi) -> None:
    with pytest.raises(TimeoutError):
        stub.wait_for_requests(1, timeout_s=0.01)


def test_a_strict_stub_refuses_what_breaks_a_rule_and_keeps_its_script() -> None:
    with StubApi(strict=True) as stub:
        stub.enqueue(text("scripted"))
        response, content = ask(stub.url)
        assert response.status == 400
        assert json.loads(content)["error"] == {
            "type": "invalid_request_error", "message": "max_tokens: Field required"}
        (refusal,) = stub.take_refusals()
        assert refusal.message == "max_tokens: Field required"
        assert [refusal.recorded] == stub.requests
        assert stub.take_refusals() == []
        stub.default = lambda body: text("default")
        assert b"scripted" in ask(stub.url, stream=False, max_tokens=10)[1]


@pytest.mark.parametrize("said, word", [
    ("STATUS 429 please", '"rate_limit_error"'), ("do THINK", '"thinking_delta"'),
    ("LONG 5", '"word4 "'), ("hello", '"the stub."'), ("STREAMERROR", '"overloaded_error"'),
])
def test_words_choose_the_answer_of_the_program(said: str, word: str) -> None:
    with StubApi(stub_api.answer_by_words) as stub:
        assert word in ask(stub.url, said)[1].decode()


def test_program_prints_its_url_and_logs(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    command = [sys.executable, stub_api.__file__, "--log", str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout
        url = program.stdout.readline().strip()
        ask(url, "Hello")
        program.terminate()
    assert json.loads(log.read_text())["body"]["messages"][0]["content"] == "Hello"
