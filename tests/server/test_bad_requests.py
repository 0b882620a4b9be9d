"""Bad requests: each gets a clear 4xx in the OpenAI shape, reaches no claude, and harms nobody."""
from __future__ import annotations

import gzip
from collections.abc import Iterator
from typing import Any

import pytest

from chat import CHAT_PATH, NO_IDLE, ask, content_of, encoded, error_of, pieces, question
from http_client import Reply
from raw_http import RawConnection, chunked, exchange, head, post
from server import Server, running_server
from waiting import seconds_of

Json = Any

MAX_BODY_BYTES = 20_000
HELLO = encoded(question("hello"))


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes small bodies only."""
    env = {**NO_IDLE, "CLAUDE_MAX_BODY_SIZE": str(MAX_BODY_BYTES), "CLAUDE_MAX_IMAGES": "2",
           "CLAUDE_MAX_IMAGE_BYTES": "100"}
    with running_server(tmp_path_factory.mktemp("strict"), env=env) as running:
        yield running


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits for nobody."""
    env = {**NO_IDLE, "OCP_HEADER_TIMEOUT": "1000", "OCP_BODY_TIMEOUT": "1000"}
    with running_server(tmp_path_factory.mktemp("hasty"), env=env) as running:
        yield running


def refusal(server: Server, request: bytes, *, ends: bool = False) -> Reply:
    """The refusal of these bytes, after which the server works as before.

    `ends` = the client says that nothing more will come."""
    before = len(server.fake_log("line"))
    with RawConnection(server.port) as wire:
        wire.send(request)
        if ends:
            wire.end_sending()
        reply = wire.reply()
        if reply.headers["Connection"] == "close":
            assert wire.is_closed()
    assert 400 <= reply.status < 500, reply
    assert error_of(reply)
    assert len(server.fake_log("line")) == before
    assert server.call("GET", "/v1/models").status == 200
    return reply


def param_of(reply: Reply) -> Json:
    assert reply.status == 400, reply
    assert error_of(reply)["type"] == "invalid_request_error"
    assert reply.headers["x-should-retry"] == "false"
    return error_of(reply)["param"]


# ---------------------------------------------------------------------------
# The JSON in the body
# ---------------------------------------------------------------------------

NO_REQUESTS = {
    "nothing": b"", "spaces": b"  \r\n ", "prose": b"hello", "half": HELLO[:-9],
    "two": HELLO + HELLO, "null": b"null", "number": b"42", "list": b"[]", "string": b'"hi"',
    "true": b"true", "not-utf8": b'{"messages": "\xff\xfe"}', "latin-1": b'{"model": "\xe9"}',
    "nan": b'{"temperature": NaN}', "infinity": b'{"temperature": -Infinity}',
    "deep": b"[" * 9_000, "deep-balanced": b"[" * 9_000 + b"]" * 9_000,
    "deep-objects": b'{"a":' * 3_000 + b"1" + b"}" * 3_000,
    "single-quotes": b"{'messages': []}", "form": b"model=sonnet&messages=hi",
    "zeros": b"\x00" * 50, "bad-escape": b'{"model": "\\x41"}',
}


@pytest.mark.parametrize("body", NO_REQUESTS.values(), ids=NO_REQUESTS)
def test_a_body_that_is_no_json_object_is_refused(strict: Server, body: bytes) -> None:
    assert param_of(refusal(strict, post(body))) is None


BAD_MESSAGES: list[tuple[Json, str]] = [
    (None, "messages"), ([], "messages"), ("hi", "messages"), ({}, "messages"), (42, "messages"),
    ([None], "messages[0]"), (["hi"], "messages[0]"), ([[]], "messages[0]"),
    ([{}], "messages[0].role"), ([{"content": "hi"}], "messages[0].role"),
    ([{"role": None}], "messages[0].role"), ([{"role": 5}], "messages[0].role"),
    ([{"role": ["user"]}], "messages[0].role"), ([{"role": "boss"}], "messages[0].role"),
    ([{"role": "user"}], "messages"), ([{"role": "user", "content": None}], "messages"),
    ([{"role": "user", "content": " "}], "messages"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "user", "content": {}}], "messages[0].content"),
    ([{"role": "user", "content": True}], "messages[0].content"),
    ([{"role": "user", "content": [None]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "poem"}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": 5}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [{"type": "text", "text": 5}]}],
     "messages[0].content[0].text"),
    ([{"role": "user", "content": "a"}, {"role": "user", "content": 5}], "messages[1].content"),
    ([{"role": "tool", "content": "x"}], "messages"),
    ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "messages"),
    ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls[0].function"),
]


@pytest.mark.parametrize(("messages", "param"), BAD_MESSAGES)
def test_bad_messages_are_refused_by_name(strict: Server, messages: Json, param: str) -> None:
    body = encoded({"model": "sonnet", "messages": messages})

    assert param_of(refusal(strict, post(body))) == param


BAD_VALUES: dict[str, tuple[Json, ...]] = {
    "model": (5, [], {}, True),
    "stream": ("yes", 1, []),
    "stream_options": ("usage", [], 1),
    "max_tokens": (-2, 0.5, 1.5, "5", True, [], 10**20),
    "max_completion_tokens": (-2, "5", {}),
    "temperature": (-0.1, 2.1, "1", True, []),
    "top_p": (-0.5, 1.1, "1", {}),
    "stop": (5, {}, [5], [None]),
    "reasoning_effort": ("utmost", 5, []),
    "n": (0, "1", 1.5, 1000),
    "modalities": ("text", ["audio"], 5),
    "response_format": ("json", [], 5),
    "logprobs": (True,),
    "top_logprobs": (3,),
    "audio": ({"voice": "alloy"},),
    "tools": (5, "all", {}),
    "tool_choice": ("sometimes", [], 5),
}
BAD_FIELDS = [(name, value) for name, values in BAD_VALUES.items() for value in values]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_a_field_of_the_wrong_kind_is_refused_by_name(
    strict: Server, name: str, value: Json
) -> None:
    body = encoded(question("hi", **{name: value}))

    assert param_of(refusal(strict, post(body))) == name


BAD_INSIDE: list[tuple[dict[str, Json], str]] = [
    ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ({"response_format": {"type": "poem"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ({"tools": [5]}, "tools[0]"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": 5}]}, "tools[0].function"),
    ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_INSIDE)
def test_a_field_inside_a_field_is_named_with_its_path(
    strict: Server, fields: dict[str, Json], param: str
) -> None:
    assert param_of(refusal(strict, post(encoded(question(**fields))))) == param


def test_a_number_too_long_for_any_computer_is_refused(strict: Server) -> None:
    for number in (b"9" * 5_000, b"1e999", b"-1e999"):
        body = b'{"max_tokens": ' + number + b', "messages": [{"role":"user","content":"hi"}]}'
        assert param_of(refusal(strict, post(body))) in ("max_tokens", None)


SMALL_PNG = "data:image/png;base64,iVBORw0KGgo="
BAD_IMAGES = [
    ({"url": "data:image/png;base64,####"}, 400, "invalid_data_uri"),
    ({"url": "data:image/png;base64,"}, 400, "invalid_data_uri"),
    ({"url": "data:image/png,plain"}, 400, "invalid_data_uri"),
    ({"url": "data:"}, 400, "invalid_data_uri"),
    ({"url": "data:text/html;base64,aGk="}, 400, "unsupported_image_type"),
    ({"url": "file:///etc/passwd"}, 400, "unsupported_url_scheme"),
    ({"url": "/etc/passwd"}, 400, "unsupported_image_type"),
    ({"url": "http://127.0.0.1/x.png"}, 400, "remote_url_disabled"),
    ({"url": ""}, 400, "invalid_image_url"), ({}, 400, "invalid_image_url"),
    (None, 400, "invalid_image_url"), (5, 400, "invalid_image_url"),
    ({"url": "data:image/png;base64," + "A" * 400}, 400, "unsupported_image_type"),
    ({"url": "data:image/png;base64,iVBORw0K" + "A" * 400}, 413, "image_too_large"),
]


@pytest.mark.parametrize(("image_url", "status", "code"), BAD_IMAGES)
def test_an_image_that_cannot_be_taken_is_refused_by_place(
    strict: Server, image_url: Json, status: int, code: str
) -> None:
    content = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": image_url}]

    reply = refusal(strict, post(encoded(question(content))))

    assert (reply.status, error_of(reply)["code"]) == (status, code)
    assert error_of(reply)["param"] == "messages[0].content[1].image_url"


def test_too_many_images_are_refused(strict: Server) -> None:
    content = [{"type": "image_url", "image_url": {"url": SMALL_PNG}}] * 3

    reply = refusal(strict, post(encoded(question(content))))

    assert (reply.status, error_of(reply)["code"]) == (413, "too_many_images")


def test_images_of_the_history_that_are_too_many_are_left_out_and_told(strict: Server) -> None:
    look = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": SMALL_PNG}}]}
    body = {"messages": [look, {"role": "assistant", "content": "So."}] * 3 + [look]}

    reply = strict.call("POST", "/v1/chat/completions", body)

    assert (reply.status, reply.headers["X-OCP-Adjusted"]) == (200, "images_dropped=2")


def test_too_many_images_are_counted_all_the_same(strict: Server) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": SMALL_PNG.partition(",")[2]}
    body = {"messages": [{"role": "user", "content": [{"type": "image", "source": source}] * 3}]}

    assert strict.call("POST", "/v1/messages", body).status == 413
    assert strict.call("POST", "/v1/messages/count_tokens", body).json()["input_tokens"] > 2_000


def test_an_image_in_a_system_message_is_refused(strict: Server) -> None:
    content = [{"type": "image_url", "image_url": {"url": SMALL_PNG}}]
    messages = [{"role": "system", "content": content}, {"role": "user", "content": "hi"}]

    reply = refusal(strict, post(encoded({"messages": messages})))

    assert param_of(reply) == "messages[0].content[0]"


# ---------------------------------------------------------------------------
# The length of the body
# ---------------------------------------------------------------------------

def test_a_body_that_is_too_large_is_refused_before_it_is_sent(strict: Server) -> None:
    announced = head("POST", CHAT_PATH, f"Content-Length: {10**9}")

    reply = refusal(strict, announced + b'{"model"')

    assert reply.status == 413
    assert "CLAUDE_MAX_BODY_SIZE" in error_of(reply)["message"]


def test_a_client_that_sends_all_of_a_large_body_can_read_the_refusal(strict: Server) -> None:
    assert refusal(strict, post(b"x" * 3_000_000)).status == 413


def test_a_body_of_just_the_largest_size_is_taken(strict: Server) -> None:
    room = MAX_BODY_BYTES - len(encoded(question("")))

    fits = exchange(strict, post(encoded(question("x" * room))))
    too_large = exchange(strict, post(encoded(question("x" * (room + 1)))))

    assert (fits.status, too_large.status) == (200, 413)


def test_a_truncated_body_is_refused(strict: Server) -> None:
    request = head("POST", CHAT_PATH, "Content-Length: 500") + HELLO

    assert param_of(refusal(strict, request, ends=True)) is None


LENGTHS = ["-1", "abc", "1e3", "+5", "0x10", "5, 5", "5 5", "", "9" * 30, "5.0"]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_length_that_is_no_number_is_refused(strict: Server, length: str) -> None:
    request = head("POST", CHAT_PATH, f"Content-Length: {length}") + HELLO

    assert param_of(refusal(strict, request)) is None


def test_two_lengths_are_refused(strict: Server) -> None:
    lines = f"Content-Length: {len(HELLO)}", "Content-Length: 3"

    assert param_of(refusal(strict, head("POST", CHAT_PATH, *lines) + HELLO)) is None


def test_a_length_and_a_transfer_encoding_together_are_refused(strict: Server) -> None:
    lines = f"Content-Length: {len(HELLO)}", "Transfer-Encoding: chunked"

    assert param_of(refusal(strict, head("POST", CHAT_PATH, *lines) + chunked(HELLO))) is None


@pytest.mark.parametrize("coding", ["gzip", "gzip, chunked", "identity", "chunked, chunked"])
def test_a_transfer_encoding_besides_chunked_is_refused(strict: Server, coding: str) -> None:
    request = head("POST", CHAT_PATH, f"Transfer-Encoding: {coding}") + chunked(HELLO)

    assert param_of(refusal(strict, request)) is None


def test_a_compressed_body_is_refused(strict: Server) -> None:
    assert param_of(refusal(strict, post(gzip.compress(HELLO), "Content-Encoding: gzip"))) is None


def test_a_refused_smuggler_has_his_connection_closed(strict: Server) -> None:
    hidden = head("GET", "/v1/models")
    lines = f"Content-Length: {len(hidden)}", "Transfer-Encoding: chunked"

    with RawConnection(strict.port) as wire:
        wire.send(head("POST", CHAT_PATH, *lines) + hidden)
        reply = wire.reply()
        closed = wire.is_closed()

    assert (reply.status, reply.headers["Connection"], closed) == (400, "close", True)


@pytest.mark.parametrize(("method", "path"), [("POST", CHAT_PATH), ("GET", "/health")])
def test_nothing_is_smuggled_behind_two_lengths(strict: Server, method: str, path: str) -> None:
    hidden = head("GET", "/v1/models")
    lines = "Content-Length: 0", f"Content-Length: {len(hidden)}"

    with RawConnection(strict.port) as wire:
        wire.send(head(method, path, *lines) + hidden)
        reply = wire.reply()
        closed = wire.is_closed()

    assert (reply.status, reply.headers["Connection"], closed) == (400, "close", True)


# ---------------------------------------------------------------------------
# Chunked bodies
# ---------------------------------------------------------------------------

CHUNKED = head("POST", CHAT_PATH, "Transfer-Encoding: chunked")


@pytest.mark.parametrize("body", [
    chunked(HELLO), chunked(*[HELLO[at:at + 1] for at in range(len(HELLO))]),
    chunked(HELLO, trailer=b"X-Checksum: 1\r\nX-More: 2\r\n"),
    b"%x;name=value\r\n%b\r\n0\r\n\r\n" % (len(HELLO), HELLO),
    b"000%X\r\n%b\r\n0000\r\n\r\n" % (len(HELLO), HELLO),
], ids=["one", "many", "trailer", "extension", "zeros"])
def test_a_chunked_body_is_taken_and_the_connection_goes_on(strict: Server, body: bytes) -> None:
    with RawConnection(strict.port) as wire:
        wire.send(CHUNKED + body)
        first = wire.reply()
        wire.send(post(HELLO))
        second = wire.reply()

    assert content_of(first) == "You said: hello" == content_of(second)


@pytest.mark.parametrize("body", [
    b"zz\r\nhello\r\n0\r\n\r\n", b"-5\r\nhello\r\n0\r\n\r\n", b"\r\nhello\r\n0\r\n\r\n",
    b"5\r\nhello!!\r\n0\r\n\r\n", b"fffffffff\r\nhello", b"0x5\r\nhello\r\n0\r\n\r\n",
    b"5 5\r\nhello\r\n0\r\n\r\n", b"1" * 3_000,
], ids=["letters", "negative", "empty", "too-much", "huge", "prefix", "two", "endless"])
def test_a_broken_chunked_body_is_refused(strict: Server, body: bytes) -> None:
    reply = refusal(strict, CHUNKED + body)

    assert reply.status in (400, 413)
    assert reply.headers["Connection"] == "close"


@pytest.mark.parametrize("body", [
    b"5\r\nhel", b"5\r\nhello", b"5\r\nhello\r\n", b"5\r\nhello\r\n0\r\n", b"",
])
def test_a_chunked_body_that_ends_early_is_refused(strict: Server, body: bytes) -> None:
    assert param_of(refusal(strict, CHUNKED + body, ends=True)) is None


def test_a_chunked_body_that_grows_too_large_is_refused(strict: Server) -> None:
    reply = refusal(strict, CHUNKED + chunked(*[b"x" * 1_000] * 30))

    assert reply.status == 413


def test_a_single_chunk_that_is_too_large_is_refused_before_it_is_sent(strict: Server) -> None:
    assert refusal(strict, CHUNKED + b"7fffffff\r\nxxx").status == 413


# ---------------------------------------------------------------------------
# The head
# ---------------------------------------------------------------------------

BAD_HEADS = {
    "one word": (b"HELLO\r\n\r\n", 400),
    "four words": (b"GET / HTTP/1.1 please\r\n\r\n", 400),
    "no version": (b"GET /health FTP/1.1\r\n\r\n", 400),
    "future version": (b"GET /health HTTP/3.0\r\n\r\n", 400),
    "http/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "zeros": (b"\x00\x00\x00\x00\r\n\r\n", 400),
    "no colon": (b"GET /health HTTP/1.1\r\nno colon here\r\nHost: evil.example\r\n\r\n", 400),
    "space before the colon": (
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length : 5\r\n\r\nhello", 400),
    "bad host": (b"GET /health HTTP/1.1\r\nHost: [::1\r\n\r\n", 400),
    "bad origin": (head("GET", "/health", "Origin: http://[x"), 403),
    "bad escape": (head("GET", "/v1/models/%ff%fe"), 400),
    "bad authority": (head("GET", "http://[::1/health"), 400),
    "long line": (head("GET", "/" + "a" * 70_000), 431),
    "very long line": (head("GET", "/" + "a" * 3_000_000), 431),
    "long header": (head("GET", "/health", "X-Long: " + "a" * 70_000), 431),
    "200 headers": (head("GET", "/health", *[f"X-{n}: {n}" for n in range(200)]), 431),
    "long key": (head("GET", "/health", "Authorization: Bearer " + "k" * 70_000), 431),
    "unknown method": (head("BREW", CHAT_PATH), 405),
    "lower case method": (head("get", "/health"), 405),
    "unknown method, unknown path": (head("BREW", "/coffee"), 404),
    "connect": (head("CONNECT", "example.com:443"), 404),
    "get star": (head("GET", "*"), 404),
}


@pytest.mark.parametrize("name", BAD_HEADS)
def test_a_bad_head_is_refused(strict: Server, name: str) -> None:
    request, status = BAD_HEADS[name]

    assert refusal(strict, request).status == status


@pytest.mark.parametrize("name", ["four words", "no colon", "long line", "long header"])
def test_a_bad_head_ends_its_connection_and_says_so(strict: Server, name: str) -> None:
    request, status = BAD_HEADS[name]

    with RawConnection(strict.port) as wire:
        wire.send(head("GET", "/v1/models"))
        first = wire.reply()
        wire.send(request)
        reply = wire.reply()
        closed = wire.is_closed()

    assert first.status == 200
    assert (reply.status, reply.headers["Connection"], closed) == (status, "close", True)


def test_text_of_a_request_cannot_become_a_header_of_the_answer(strict: Server) -> None:
    body = encoded(question("hi", model="claude-x\r\nX-Evil: 1"))

    reply = refusal(strict, post(body, "Origin: http://a\rX-Evil: 1"))

    assert "X-Evil" not in reply.headers


def test_http_1_0_gets_its_answer_and_the_end_of_the_connection(strict: Server) -> None:
    for body in (HELLO, encoded(question("hello", stream=True))):
        with RawConnection(strict.port) as wire:
            wire.send(post(body, version="HTTP/1.0"))
            reply = wire.reply()
            closed = wire.is_closed()
        assert (reply.status, reply.headers["Transfer-Encoding"], closed) == (200, None, True)
        assert b"said" in reply.body


def test_a_target_may_be_a_whole_address(strict: Server) -> None:
    reply = exchange(strict, head("GET", f"http://localhost:{strict.port}/v1/models?x=1"))

    assert reply.status == 200


def test_requests_sent_ahead_are_answered_one_after_the_other(strict: Server) -> None:
    words = ["one", "two", "three"]
    bodies = [encoded(question(word, stream=word == "two")) for word in words]

    with RawConnection(strict.port) as wire:
        wire.send(b"".join(post(body) for body in bodies) + head("GET", "/v1/models"))
        first, second, third, models = [wire.reply() for _ in range(4)]

    assert content_of(first) == "You said: one"
    assert "".join(pieces(second.events)) == "You said: two"
    assert content_of(third) == "You said: three"
    assert models.json()["object"] == "list"


def test_a_client_that_waits_for_100_continue_gets_it(strict: Server) -> None:
    request = post(HELLO, "Expect: 100-continue")

    with RawConnection(strict.port) as wire:
        wire.send(request[:-len(HELLO)])
        first = wire.reply()
        wire.send(HELLO)
        second = wire.reply()

    assert first.status == 100
    assert content_of(second) == "You said: hello"


@pytest.mark.parametrize("request_head", [
    head("POST", "/v1/nothing", "Expect: 100-continue", "Content-Length: 50"),
    head("POST", CHAT_PATH, "Expect: 100-continue", "Content-Length: 999999"),
    head("POST", CHAT_PATH, "Expect: 100-continue", "Content-Length: x"),
    head("POST", CHAT_PATH, "Expect: 100-continue", "Content-Length: 50", "Origin: http://evil"),
])
def test_a_client_that_will_be_refused_is_not_asked_to_go_on(
    strict: Server, request_head: bytes
) -> None:
    assert refusal(strict, request_head).status != 100


def test_a_connection_goes_on_after_an_error(strict: Server) -> None:
    with RawConnection(strict.port) as wire:
        wire.send(post(b"not json"))
        no_json = wire.reply()
        wire.send(post(encoded(question(temperature="hot"))))
        bad_field = wire.reply()
        wire.send(head("GET", "/nothing"))
        nothing = wire.reply()
        wire.send(post(HELLO))
        good = wire.reply()

    assert [no_json.status, bad_field.status, nothing.status] == [400, 400, 404]
    assert content_of(good) == "You said: hello"


def test_a_body_that_nobody_wants_ends_the_connection(strict: Server) -> None:
    with RawConnection(strict.port) as wire:
        wire.send(post(HELLO, path="/v1/nothing"))
        reply = wire.reply()
        closed = wire.is_closed()

    assert (reply.status, reply.headers["Connection"], closed) == (404, "close", True)


# ---------------------------------------------------------------------------
# Slow clients
# ---------------------------------------------------------------------------

def test_a_head_that_does_not_arrive_in_time_is_refused(hasty: Server) -> None:
    reply = refusal(hasty, b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc")

    assert reply.status == 408


def test_a_head_that_drips_in_is_refused_as_soon(hasty: Server) -> None:
    def drip() -> None:
        with RawConnection(hasty.port) as wire:
            wire.dribble(head("GET", "/health", "X-Slow: " + "a" * 1500), 0.02)
            assert wire.reply().status == 408

    # All of it would take half a minute.
    assert seconds_of(drip) < 20


def test_a_body_that_does_not_arrive_in_time_is_refused(hasty: Server) -> None:
    reply = refusal(hasty, post(HELLO)[:-5])

    assert reply.status == 408


def test_a_body_that_drips_in_is_refused_as_soon(hasty: Server) -> None:
    def drip() -> None:
        with RawConnection(hasty.port) as wire:
            wire.send(head("POST", CHAT_PATH, "Content-Length: 1600"))
            wire.dribble(b"a" * 1500, 0.02)
            assert wire.reply().status == 408

    # All of it would take half a minute.
    assert seconds_of(drip) < 20


def test_a_silent_connection_is_closed_without_a_word(hasty: Server) -> None:
    with RawConnection(hasty.port) as wire:
        assert wire.is_closed()


def test_slow_clients_do_not_hold_up_quick_ones(hasty: Server) -> None:
    slow = [RawConnection(hasty.port) for _ in range(20)]

    reply = ask(hasty)

    for wire in slow:
        wire.hang_up()
    assert content_of(reply) == "You said: hi"
