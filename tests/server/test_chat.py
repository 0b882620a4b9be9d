"""Chat completions, end to end: real sockets, the real server, a scripted claude.

Bad requests, failures and clients that leave have files of their own."""
from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from chat import (
    CHAT_PATH,
    ask,
    chunks,
    content_of,
    encoded,
    error_of,
    finish_reasons,
    pieces,
    question,
    stream_chat,
)
from http_client import Reply
from processes import cpu_s
from project import REPO, TRANSCRIPTS
from raw_http import RawConnection, head, post
from server import Server, asked_process, at_rest, last_entry, running_server, waiting
from waiting import eventually, in_parallel

Json = Any

#: A model whose API takes temperature and top_p.
SAMPLING = "claude-sonnet-4-6"
PNG = "data:image/png;base64,iVBORw0KGgo="
KEY, ADMIN_KEY = "the-shared-key-of-the-tests", "the-admin-key-of-the-tests"
PAGE = "https://chat.example"
CANARY = "canary-7f3a"


@pytest.fixture
def chat(shared_server: Server) -> Server:
    """A server with default settings; claude says `You said: ...` unless told otherwise."""
    shared_server.write_scenario([])
    return shared_server


@pytest.fixture(scope="module")
def nervous(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that answers one request at a time and takes every pause for a silence."""
    env = {
        "CLAUDE_MAX_CONCURRENT": "1", "CLAUDE_HEARTBEAT_INTERVAL": "60",
        "OCP_WHOLE_SILENCE": "60",
    }
    with running_server(tmp_path_factory.mktemp("nervous"), env=env) as running:
        yield running


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys, a prompt of its operator, a friendly web page, and all its log."""
    env = {
        "PROXY_API_KEY": KEY, "OCP_ADMIN_KEY": ADMIN_KEY, "OCP_ALLOWED_ORIGINS": PAGE,
        "OCP_ALLOWED_HOSTS": "box.example", "CLAUDE_SYSTEM_PROMPT": "Speak like a pirate.",
        "OCP_LOG_LEVEL": "debug", "ANTHROPIC_BASE_URL": "http://127.0.0.1:3456",
        "OPENAI_API_KEY": "sk-of-somebody", "CLAUDECODE": "1", "OCP_WRONG_KEY_DELAY": "0",
    }
    with running_server(tmp_path_factory.mktemp("locked"), env=env) as running:
        yield running


@pytest.fixture(scope="module", params=["2.1.197", "2.1.329"])
def versioned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server on a claude that takes slash commands for its own, and on one that need not."""
    scenario = {"version": request.param}
    with running_server(tmp_path_factory.mktemp("versioned"), scenario) as running:
        yield running


def with_key(server: Server, body: Json = None, key: str = KEY) -> Reply:
    return server.call("POST", CHAT_PATH, body or question(), {"Authorization": f"Bearer {key}"})


# ---------------------------------------------------------------------------
# The shape of an answer
# ---------------------------------------------------------------------------

def test_a_whole_answer_has_every_field_of_the_api(chat: Server) -> None:
    reply = ask(chat, "hello")

    body = reply.json()
    assert reply.headers["Content-Type"] == "application/json"
    assert re.fullmatch(r"chatcmpl-[0-9A-Za-z]{20,}", body["id"])
    assert isinstance(body["created"], int)
    assert (body["object"], body["model"]) == ("chat.completion", "claude-sonnet-5-5")
    assert body["choices"] == [{
        "index": 0, "logprobs": None, "finish_reason": "stop",
        "message": {"role": "assistant", "content": "You said: hello", "refusal": None},
    }]


def test_a_stream_begins_with_the_role_and_ends_with_one_finish_and_one_done(
    chat: Server,
) -> None:
    reply = ask(chat, "hello", stream=True)

    first, *middle, last = chunks(reply.events)
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    assert reply.headers["X-Accel-Buffering"] == "no"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in middle] == [None] * len(middle)
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert [data for _, data in reply.events].count("[DONE]") == 1
    assert reply.events[-1][1] == "[DONE]"


def test_all_chunks_of_a_stream_carry_the_same_envelope(chat: Server) -> None:
    found = chunks(ask(chat, "hello", stream=True).events)

    envelopes = [
        {key: chunk[key] for key in ("id", "object", "created", "model")} for chunk in found
    ]
    assert envelopes == [envelopes[0]] * len(found)
    assert envelopes[0]["object"] == "chat.completion.chunk"
    assert re.fullmatch(r"chatcmpl-[0-9A-Za-z]{20,}", envelopes[0]["id"])


def test_every_delta_of_claude_is_one_chunk(chat: Server) -> None:
    chat.write_scenario([[{"say": "one two three"}, {"say": "fourfive", "chunks": 2}]])

    found = pieces(ask(chat, stream=True).events)

    assert found == ["one ", "two ", "three", "four", "five"]


def test_a_delta_is_sent_before_the_next_one_is_there(chat: Server) -> None:
    chat.write_scenario([[{"say": "early"}, {"hang": True}]])

    with stream_chat(chat) as stream:
        said = next(piece for event in stream for piece in pieces([event]))

    assert said == "early"


def test_every_answer_has_an_id_of_its_own(chat: Server) -> None:
    replies = in_parallel([lambda: ask(chat)] * 3)

    assert len({reply.json()["id"] for reply in replies}) == 3
    assert len({reply.headers["X-Request-Id"] for reply in replies}) == 3


FINISHES = [
    ("end_turn", "stop"), ("stop_sequence", "stop"), ("max_tokens", "length"),
    ("model_context_window_exceeded", "length"), ("refusal", "content_filter"),
    ("a_word_of_the_future", "stop"),
]


@pytest.mark.parametrize(("upstream", "wanted"), FINISHES)
def test_the_reason_of_the_end_is_one_of_the_words_clients_know(
    chat: Server, upstream: str, wanted: str
) -> None:
    chat.write_scenario([[{"say": "so far"}, {"finish": upstream}]])

    whole, streamed = ask(chat), ask(chat, stream=True)

    assert whole.json()["choices"][0]["finish_reason"] == wanted
    assert finish_reasons(streamed.events) == [wanted]


def test_an_answer_cut_by_its_limit_is_not_continued(chat: Server) -> None:
    again = [{"say": "first"}, {"finish": "max_tokens"}]
    chat.write_scenario([again])

    reply = ask(chat)

    assert content_of(reply) == "first"


def test_thinking_is_reasoning_content_and_never_content(chat: Server) -> None:
    chat.write_scenario([[{"think": "let me see"}, {"say": "the answer"}]])

    whole, streamed = ask(chat), ask(chat, stream=True)

    message = whole.json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("let me see", "the answer")
    assert "".join(pieces(streamed.events, "reasoning_content")) == "let me see"
    assert "".join(pieces(streamed.events)) == "the answer"


def test_an_answer_without_thinking_has_no_reasoning_content(chat: Server) -> None:
    whole, streamed = ask(chat), ask(chat, stream=True)

    assert "reasoning_content" not in whole.json()["choices"][0]["message"]
    assert b"reasoning_content" not in streamed.body


def test_several_blocks_of_text_are_one_content(chat: Server) -> None:
    chat.write_scenario([[{"say": "one,"}, {"say": " two", "new_block": True}]])

    whole, streamed = ask(chat), ask(chat, stream=True)

    assert content_of(whole) == "one, two" == "".join(pieces(streamed.events))


def test_answers_at_the_same_time_are_not_mixed_up(chat: Server) -> None:
    words = [f"word{number}" for number in range(6)]

    replies = in_parallel([partial(ask, chat, word) for word in words])

    assert [content_of(reply) for reply in replies] == [f"You said: {word}" for word in words]


# ---------------------------------------------------------------------------
# Usage
# ---------------------------------------------------------------------------

COUNTS = {
    "input_tokens": 100, "cache_read_input_tokens": 40, "cache_creation_input_tokens": 2,
    "output_tokens": 9,
}
WANTED_USAGE = {
    "prompt_tokens": 142, "completion_tokens": 9, "total_tokens": 151,
    "prompt_tokens_details": {"cached_tokens": 40},
}


def test_usage_counts_the_cache_and_is_the_same_in_both_modes(chat: Server) -> None:
    chat.write_scenario([[{"say": "hi"}, {"finish": "end_turn", "usage": COUNTS}]])

    whole = ask(chat)
    streamed = ask(chat, stream=True, stream_options={"include_usage": True})

    *others, last = chunks(streamed.events)
    assert whole.json()["usage"] == WANTED_USAGE == last["usage"]
    assert last["choices"] == []
    assert [chunk["usage"] for chunk in others] == [None] * len(others)


@pytest.mark.parametrize("options", [{}, {"stream_options": None},
                                     {"stream_options": {"include_usage": False}}])
def test_a_stream_has_no_usage_unless_asked(chat: Server, options: Json) -> None:
    reply = ask(chat, stream=True, **options)

    assert b"usage" not in reply.body
    assert finish_reasons(reply.events) == ["stop"]


def test_tokens_of_thinking_are_told_when_claude_tells_them(chat: Server) -> None:
    recorded = TRANSCRIPTS / "2.1.329-thinking.jsonl"
    chat.write_scenario([[{"replay": str(recorded), "skip": ["control_response"]}]])

    usage = ask(chat).json()["usage"]

    told_tokens = usage["completion_tokens_details"]["reasoning_tokens"]
    assert isinstance(told_tokens, int) and 0 < told_tokens <= usage["completion_tokens"]


# ---------------------------------------------------------------------------
# What reaches claude
# ---------------------------------------------------------------------------

def last_query(server: Server) -> dict[str, Json]:
    return server.queries()[-1]


def extra_body(query: dict[str, Json]) -> Json:
    return json.loads(query["settings"]["env"]["CLAUDE_CODE_EXTRA_BODY"])


def test_options_reach_claude_and_never_the_next_request(chat: Server) -> None:
    wanted = {"max_tokens": 77, "stop": ["END", "FIN"], "temperature": 0.25}

    assert ask(chat, model=SAMPLING, **wanted).status == 200
    with_options = last_query(chat)
    assert ask(chat, model=SAMPLING).status == 200
    without = last_query(chat)

    assert with_options["settings"]["env"]["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "77"
    assert extra_body(with_options) == {"temperature": 0.25, "stop_sequences": ["END", "FIN"]}
    assert (without["settings"], without["thinking"]) == ({}, None)


@pytest.mark.parametrize("fields", [
    {"max_completion_tokens": 5}, {"max_tokens": 5}, {"max_tokens": 9, "max_completion_tokens": 5},
    {"max_tokens": 5.0},
])
def test_both_names_of_the_token_limit_work(chat: Server, fields: Json) -> None:
    ask(chat, **fields)

    assert last_query(chat)["settings"]["env"]["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "5"


def test_a_high_top_p_reaches_claude_together_with_thinking(chat: Server) -> None:
    ask(chat, model=SAMPLING, top_p=0.95)

    query = last_query(chat)
    assert extra_body(query) == {"top_p": 0.95}
    assert query["thinking"] is None


def test_a_low_top_p_alone_is_named_as_ignored(chat: Server) -> None:
    reply = ask(chat, model=SAMPLING, top_p=0.5)

    assert reply.headers["X-OCP-Ignored-Params"] == "top_p"
    assert "env" not in last_query(chat)["settings"]


def test_one_stop_sequence_may_be_a_string(chat: Server) -> None:
    ask(chat, stop="END")

    assert extra_body(last_query(chat)) == {"stop_sequences": ["END"]}


def test_effort_reaches_claude(chat: Server) -> None:
    ask(chat, reasoning_effort="low")

    assert last_query(chat)["settings"] == {"effortLevel": "low"}


def test_effort_none_turns_thinking_off(chat: Server) -> None:
    ask(chat, model=SAMPLING, reasoning_effort="none")

    query = last_query(chat)
    assert (query["thinking"], query["settings"]) == (0, {})


def test_a_model_whose_thinking_claude_does_not_stop_is_told_in_the_body(chat: Server) -> None:
    ask(chat, reasoning_effort="none")

    query = last_query(chat)
    assert (query["thinking"], extra_body(query)) == (0, {"thinking": {"type": "between_tools"}})


def test_what_a_model_does_not_take_is_left_out_and_named(chat: Server) -> None:
    reply = ask(chat, model="claude-sonnet-5-5", temperature=0.5, top_p=0.9)

    assert reply.headers["X-OCP-Ignored-Params"] == "temperature, top_p"
    assert last_query(chat)["settings"] == {}


def test_ignored_parameters_are_named_in_a_header(chat: Server) -> None:
    wanted = {"seed": 7, "user": "me", "frequency_penalty": 0.5, "logit_bias": {"1": 2}}

    replies = ask(chat, **wanted), ask(chat, stream=True, **wanted), ask(chat, seed=None)

    for reply in replies[:2]:
        named = set(reply.headers["X-OCP-Ignored-Params"].split(", "))
        assert named == set(wanted)
    assert "X-OCP-Ignored-Params" not in replies[2].headers


def test_fields_that_nobody_knows_are_no_reason_to_refuse(chat: Server) -> None:
    assert ask(chat, some_field_of_the_future={"deep": [1]}).status == 200


def test_history_arrives_as_real_turns_in_order(chat: Server) -> None:
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"),
             ("user", "five")]
    messages = [{"role": role, "content": text} for role, text in turns]

    reply = ask(chat, messages=messages)

    found = [(message["role"], [block["text"] for block in message["content"]])
             for message in last_query(chat)["messages"]]
    assert content_of(reply) == "You said: five"
    assert found == [(role, [text]) for role, text in turns]


def test_nothing_of_one_conversation_is_in_the_next(chat: Server) -> None:
    said = [{"role": "system", "content": CANARY}, {"role": "user", "content": CANARY},
            {"role": "assistant", "content": CANARY}, {"role": "user", "content": "so?"}]

    ask(chat, messages=said)
    ask(chat, "other")

    query = last_query(chat)
    assert CANARY not in json.dumps(query)
    assert query["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "other"}]}]


def test_system_messages_at_the_start_are_the_system_prompt_in_order(chat: Server) -> None:
    messages = [
        {"role": "system", "content": "first"},
        {"role": "developer", "content": [{"type": "text", "text": "second"}]},
        {"role": "system", "content": "third"}, {"role": "user", "content": "hi"},
    ]

    assert ask(chat, messages=messages).status == 200

    assert last_query(chat)["system"] == ["first\n\nsecond\n\nthird"]


def test_a_request_without_a_system_message_has_no_system_prompt(chat: Server) -> None:
    ask(chat)

    assert last_query(chat)["system"] == []


CONTENTS = [
    ("plain", [{"type": "text", "text": "plain"}]),
    ([{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}],
     [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
    ([{"type": "text", "text": ""}, {"type": "text", "text": "not empty"}],
     [{"type": "text", "text": "not empty"}]),
    ([{"type": "image_url", "image_url": {"url": PNG}}],
     [{"type": "image", "source": {
         "type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}]),
]


@pytest.mark.parametrize(("content", "blocks"), CONTENTS)
def test_content_is_taken_in_every_form(chat: Server, content: Json, blocks: Json) -> None:
    chat.write_scenario([[{"say": "ok"}]])

    assert ask(chat, content).status == 200

    assert last_query(chat)["messages"] == [{"role": "user", "content": blocks}]


@pytest.mark.parametrize("nothing", [None, "", [], "  \n"])
def test_messages_without_content_are_left_out(chat: Server, nothing: Json) -> None:
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": nothing},
                {"role": "user", "content": "two"}]

    assert ask(chat, messages=messages).status == 200

    (message,) = last_query(chat)["messages"]
    assert [block["text"] for block in message["content"]] == ["one", "two"]


@pytest.mark.parametrize("text", ["/cost", "/clear all", "!ls", "@/etc/hostname", "#note"])
def test_text_that_looks_like_a_command_reaches_the_model(versioned: Server, text: str) -> None:
    assert content_of(ask(versioned, text)).endswith(text)


def test_emoji_and_control_characters_make_the_round_trip(chat: Server) -> None:
    text = "\U0001f600 \u6f22\u5b57 \u00e9 \u2028 \x01 \\ \" \t tail"

    whole, streamed = ask(chat, text), ask(chat, text, stream=True)

    assert content_of(whole) == f"You said: {text}" == "".join(pieces(streamed.events))


def test_a_large_prompt_arrives_complete(chat: Server) -> None:
    text = "0123456789abcdef" * 125_000
    chat.write_scenario([[{"say": "read"}]])

    assert ask(chat, text).status == 200

    (message,) = last_query(chat)["messages"]
    assert message["content"] == [{"type": "text", "text": text}]


def test_a_prompt_is_counted_to_its_end_however_long_it_is(tmp_path: Path) -> None:
    def counted(*messages: Json) -> int:
        reply = running.call("POST", "/v1/messages/count_tokens", {"messages": list(messages)})
        assert reply.status == 200, reply
        return int(reply.json()["input_tokens"])

    long = {"role": "user", "content": "word " * 1000}
    short = {"role": "assistant", "content": "Yes, it is."}
    with running_server(tmp_path, env={"CLAUDE_MAX_PROMPT_CHARS": "3000"}) as running:
        once = counted(long)
        assert 1000 < once < counted(long, short) < 2 * once < counted(long, short, long)
        assert running.log_entries("prompt_truncated") == []
        refused = running.call("POST", "/v1/messages", {"messages": [long, short]})
        assert (refused.status, refused.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_prompt_of_the_operator_is_appended_to_the_system_prompt(locked: Server) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]

    with_key(locked, {"messages": messages})
    both = last_query(locked)["system"]
    with_key(locked)
    alone = last_query(locked)["system"]

    assert both == ["Be brief.\n\nSpeak like a pirate."]
    assert alone == ["Speak like a pirate."]


def test_claude_gets_no_key_and_nothing_that_points_it_elsewhere(locked: Server) -> None:
    with_key(locked)

    starts = [each for each in locked.fake_log("start") if each["argv"][:1] == ["-p"]]
    env = starts[-1]["env"]
    assert not {"ANTHROPIC_BASE_URL", "OPENAI_API_KEY", "CLAUDECODE", "PROXY_API_KEY",
                "OCP_ADMIN_KEY"} & set(env)
    assert not [value for value in env.values() if KEY in value or ADMIN_KEY in value]
    assert env["CLAUDE_CODE_DISABLE_ATTACHMENTS"] == "1"
    assert env["CLAUDE_CODE_MAX_RETRIES"] == "2"


def test_no_text_of_a_request_is_on_a_command_line(chat: Server) -> None:
    ask(chat, CANARY, messages=[{"role": "system", "content": CANARY},
                                {"role": "user", "content": CANARY}])

    assert CANARY not in json.dumps([each["argv"] for each in chat.fake_log("start")])


# ---------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------

def model_asked(server: Server) -> str:
    return str(last_query(server)["model"])


@pytest.mark.parametrize(("name", "model_id"), [
    ("sonnet", "claude-sonnet-5-5"), ("haiku", "claude-haiku-5-5"), ("fable", "claude-fable-5-2"),
    ("best", "claude-opus-5-5"), ("anthropic/claude-sonnet-5.5:low", "claude-sonnet-5-5"),
    ("claude-opus-4", "claude-opus-4-7"), ("claude-sonnet-4-6", "claude-sonnet-4-6"),
])
def test_an_alias_s_model_is_asked_and_named_in_the_answer(
    chat: Server, name: str, model_id: str
) -> None:
    reply = ask(chat, model=name)

    assert reply.json()["model"] == model_id
    assert model_asked(chat) == model_id


def test_a_request_without_a_model_gets_the_default(chat: Server) -> None:
    reply = chat.call("POST", CHAT_PATH, {"messages": [{"role": "user", "content": "hi"}]})

    assert reply.json()["model"] == "claude-sonnet-5-5"
    assert model_asked(chat) == "claude-sonnet-5-5"


def test_an_unknown_model_is_not_found_and_claude_is_not_asked(chat: Server) -> None:
    before = len(chat.queries())

    for stream in (False, True):
        reply = ask(chat, model="gpt-9", stream=stream)
        error = error_of(reply)
        assert (reply.status, error["code"]) == (404, "model_not_found")
        assert error["param"] == "model" and "sonnet" in error["message"]
        assert reply.headers["x-should-retry"] == "false"

    assert len(chat.queries()) == before


def test_a_model_that_is_new_goes_through_with_a_warning_in_the_log(chat: Server) -> None:
    reply = ask(chat, model="claude-nova-9")

    warning = last_entry(chat, "model_not_listed")
    assert reply.json()["model"] == "claude-nova-9" == model_asked(chat)
    assert (warning["level"], warning["model"]) == ("warn", "claude-nova-9")


@pytest.mark.parametrize("name", ["claude-", "claude-x+y", "claude-x;rm", "claude-" + "x" * 200])
def test_an_odd_name_is_no_new_model(chat: Server, name: str) -> None:
    assert ask(chat, model=name).status == 404


MODEL_ROWS = json.loads((REPO / "models.json").read_text())["models"]


def test_models_are_listed_and_found_one_by_one(chat: Server) -> None:
    listed = chat.call("GET", "/v1/models").json()

    assert listed["object"] == "list" and len(listed["data"]) >= 7
    for entry in listed["data"]:
        assert entry["object"] == "model" and entry["owned_by"]
        assert isinstance(entry["created"], int)
        row = next(row for row in MODEL_ROWS if row["id"] == entry["id"])
        assert entry["context_window"] == row["contextWindow"]
        assert entry["context_length"] == entry["max_model_len"] == row["contextWindow"]
        assert entry["max_output_tokens"] == row["maxTokens"]
        assert entry["default_effort"] == row.get("defaultEffort")
        assert (entry["reasoning"], entry["efforts"]) == (row["reasoning"], row["efforts"])
        assert chat.call("GET", f"/v1/models/{entry['id']}").json() == entry


def test_an_alias_can_be_looked_up_as_a_model(chat: Server) -> None:
    entry = chat.call("GET", "/v1/models/opus").json()

    assert (entry["id"], entry["aliases"]) == ("claude-opus-5-5", ["opus", "best"])


def test_an_unknown_model_cannot_be_looked_up(chat: Server) -> None:
    reply = chat.call("GET", "/v1/models/gpt%2D9")

    assert (reply.status, error_of(reply)["code"]) == (404, "model_not_found")


# ---------------------------------------------------------------------------
# Silence
# ---------------------------------------------------------------------------

BEAT = b": keepalive"


def lines_of(text: str) -> str:
    """A stream in short: "." for a heartbeat, "d" for a delta, and so on."""
    signs = []
    for frame in text.split("\n\n")[:-1]:
        if frame.startswith(":"):
            signs.append(".")
        elif frame == "data: [DONE]":
            signs.append("!")
        else:
            assert frame.startswith("data: {"), frame
            choice = json.loads(frame[6:])["choices"][0]
            kind = "r" if "role" in choice["delta"] else "f" if choice["finish_reason"] else "d"
            signs.append(kind)
    return "".join(signs)


def test_heartbeats_fill_the_silence_before_and_between_deltas(
    nervous: Server, tmp_path: Path
) -> None:
    doors = [tmp_path / name for name in ("0", "1", "2")]
    first, second, third = ({"wait_for": str(door)} for door in doors)
    nervous.write_scenario([[first, {"say": "one"}, second, {"say": "two"}, third]])
    started_s = time.monotonic()

    with listener(nervous) as wire:
        for door, word in zip(doors, (b'"one"', b'"two"', b"[DONE]")):
            hear_beats(wire, 1)
            door.touch()
            wire.hear(word)
        said = lines_of(all_of(wire))

    assert re.fullmatch(r"\.+r\.*d\.+d\.+f!", said), said
    assert said.count(".") <= (time.monotonic() - started_s) / 0.06


def listener(server: Server, **fields: Json) -> RawConnection:
    """A client that has asked, and is sent everything as it is."""
    wire = RawConnection(server.port)
    wire.send(post(encoded(question(**{"stream": True, **fields})), version="HTTP/1.0"))
    return wire


def hear_beats(wire: RawConnection, count: int) -> None:
    """Reads on until so many more heartbeats have come."""
    wire.hear(BEAT, wire.said.count(BEAT) + count)


def all_of(wire: RawConnection) -> str:
    """The body of an answer, to its end."""
    for piece in iter(lambda: wire.socket.recv(1 << 16), b""):
        wire.said += piece
    return wire.said.partition(b"\r\n\r\n")[2].decode()


def test_heartbeats_come_although_claude_prints_what_no_client_sees(nervous: Server) -> None:
    unseen = [{"raw": {"type": "system", "subtype": "thinking_tokens"}}, {"sleep_ms": 20}]
    nervous.write_scenario([[{"say": "one"}, *unseen * 1500]])

    with listener(nervous) as wire:
        wire.hear(b'"one"')
        hear_beats(wire, 2)
    assert eventually(lambda: at_rest(nervous))
    count = len(nervous.queries())
    with listener(nervous, stream=False) as wire:
        asked_process(nervous, count + 1)
        # More than come until claude has begun.
        wire.hear(b" \n", 20)


def test_heartbeats_come_while_claude_is_in_the_middle_of_a_line(
    nervous: Server, tmp_path: Path
) -> None:
    door = tmp_path / "door"
    half = {"raw_bytes_hex": b'a long line that has no end'.hex()}
    end = {"raw_bytes_hex": b"\n".hex()}
    nervous.write_scenario([[
        {"say": "one"}, half, {"wait_for": str(door)}, end, {"say": "two"}]])
    before_s = cpu_s(nervous.pid)

    with listener(nervous) as wire:
        wire.hear(b'"one"')
        hear_beats(wire, 5)
        door.touch()
        said = lines_of(all_of(wire))

    assert re.fullmatch(r"\.*r\.*d\.{5,}d\.*f!", said), said
    assert cpu_s(nervous.pid) - before_s < 0.2


def test_heartbeats_come_while_history_is_laid_down(nervous: Server) -> None:
    nervous.write_scenario([[{"say": "ok"}]], start_delay_ms=300)
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
                {"role": "user", "content": "three"}]
    # A model without a spare, whose process has to begin its life first.
    reply = ask(nervous, model="claude-opus-4-6", stream=True, messages=messages)

    assert re.fullmatch(r"\.+r\.*d\.*f!", lines_of(reply.text)), reply.text


def test_heartbeats_come_while_a_request_is_queued(nervous: Server) -> None:
    nervous.write_scenario([[{"say": "long"}, {"hang": True}]])

    with stream_chat(nervous) as first:
        next(iter(first))
        nervous.write_scenario([[{"say": "short"}]])
        with stream_chat(nervous) as second:
            assert waiting(nervous) == 1
            first.close()
            found = list(second)

    assert pieces(found) == ["short"]
    assert second.comments


def test_a_quick_answer_has_no_heartbeat(chat: Server) -> None:
    assert ask(chat, stream=True).comments == []


def test_nothing_comes_after_the_end(nervous: Server) -> None:
    nervous.write_scenario([[{"say": "all"}, {"finish": "end_turn"}, {"sleep_ms": 200}]])

    reply = ask(nervous, stream=True)

    assert re.search(r"d\.*f!$", lines_of(reply.text))
    assert reply.body.endswith(b"data: [DONE]\n\n")


def test_a_whole_answer_in_a_long_silence_gets_headers_and_white_space(nervous: Server) -> None:
    nervous.write_scenario([[{"sleep_ms": 200}, {"say": "at last"}]])

    reply = ask(nervous)

    assert reply.headers["Transfer-Encoding"] == "chunked"
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.body.startswith(b" \n")
    assert content_of(reply) == "at last"


def test_the_headers_of_a_slow_whole_answer_come_before_the_answer(nervous: Server) -> None:
    nervous.write_scenario([[{"hang": True}]])

    with RawConnection(nervous.port) as wire:
        wire.send(post(encoded(question())))
        status = wire.status_line()

    assert status == "HTTP/1.1 200 OK"


def test_a_quick_whole_answer_has_a_length(chat: Server) -> None:
    reply = ask(chat)

    assert int(reply.headers["Content-Length"]) == len(reply.body)


# ---------------------------------------------------------------------------
# Routes
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("path", [
    "/v1/models", "/models", "/v1/v1/models", "/v1/models/", "/models?limit=3", "/v1/models?a=b&c",
])
def test_models_are_at_every_spelling_of_their_path(chat: Server, path: str) -> None:
    reply = chat.call("GET", path)

    assert reply.status == 200 and reply.json()["object"] == "list"


@pytest.mark.parametrize("path", [
    "/v1/chat/completions", "/chat/completions", "/v1/v1/chat/completions",
    "/v1/chat/completions/", "/v1/chat/completions?api-version=2024-10-21",
    "/v1//chat/completions", "//chat/completions", "/v1//v1//chat/completions//",
])
def test_chat_is_at_every_spelling_of_its_path(chat: Server, path: str) -> None:
    assert content_of(chat.call("POST", path, question())) == "You said: hi"


@pytest.mark.parametrize("path", ["/v1", "/v2/models", "/v1/chat", "/v1/models/a/b",
                                  "/health/x", "/V1/models", "/v1/completions/chat"])
def test_any_other_path_is_not_found(chat: Server, path: str) -> None:
    reply = chat.call("GET", path)

    assert reply.status == 404
    assert error_of(reply)["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/sonnet", "/logs?n=1"])
def test_head_is_get_without_a_body(chat: Server, path: str) -> None:
    with RawConnection(chat.port) as wire:
        wire.send(head("HEAD", path))
        reply = wire.reply(bodyless=True)
        wire.send(head("GET", "/v1/models"))
        after = wire.reply()

    assert reply.status == 200 and int(reply.headers["Content-Length"]) > 0
    assert after.json()["object"] == "list"


def test_a_wrong_method_is_told_which_ones_there_are(chat: Server) -> None:
    get, delete = chat.call("GET", CHAT_PATH), chat.call("DELETE", "/v1/models")

    assert (get.status, get.headers["Allow"]) == (405, "POST, OPTIONS")
    assert (delete.status, delete.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")
    assert error_of(get) and error_of(delete)


def test_a_path_is_refused_in_its_own_words_whatever_the_reason(chat: Server) -> None:
    method = chat.call("GET", "/v1/messages")
    origin = chat.call("POST", "/v1/messages", {}, {"Origin": "http://evil.example"})

    assert (method.status, origin.status) == (405, 403)
    for reply in (method, origin):
        assert reply.json()["type"] == "error" and reply.json()["request_id"]


def test_options_is_answered_with_the_methods(chat: Server) -> None:
    reply = chat.call("OPTIONS", CHAT_PATH)

    assert (reply.status, reply.body) == (204, b"")
    assert reply.headers["Allow"] == "POST, OPTIONS"


def test_options_of_the_whole_server_is_answered_with_all_methods(chat: Server) -> None:
    foreign = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    reply, refused = (chat.call("OPTIONS", "*", headers=headers) for headers in ({}, foreign))

    assert (reply.status, reply.body) == (204, b"")
    assert set(reply.headers["Allow"].split(", ")) == {
        "GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}
    assert reply.headers["Allow"].count("POST") == 1
    assert not [name for name in reply.headers if name.startswith("Access-Control-")]
    assert refused.status == 403


def test_one_connection_serves_many_requests(chat: Server) -> None:
    with RawConnection(chat.port) as wire:
        replies = []
        for number in range(3):
            wire.send(post(encoded(question(f"no. {number}", stream=number == 1))))
            replies.append(wire.reply())

    assert [reply.status for reply in replies] == [200, 200, 200]
    assert content_of(replies[2]) == "You said: no. 2"


def test_health_is_ok_and_counts(chat: Server) -> None:
    before = chat.call("GET", "/health").json()
    ask(chat)
    after = chat.call("GET", "/health").json()

    assert (after["status"], after["demo"], after["fix"]) == ("ok", False, None)
    assert (after["claudeBinaryOk"], after["claudeVersion"]) == (True, "2.1.329")
    assert after["stats"]["totalRequests"] == before["stats"]["totalRequests"] + 1


def test_health_tells_strangers_no_path_and_no_pid(chat: Server) -> None:
    text = chat.call("GET", "/health").text

    assert str(chat.place.folder) not in text and str(REPO) not in text
    assert str(chat.pid) not in re.findall(r"\d+", text)


# ---------------------------------------------------------------------------
# Web pages
# ---------------------------------------------------------------------------

def test_a_page_of_another_origin_is_refused(chat: Server) -> None:
    before = len(chat.queries())

    for origin in ("https://evil.example", "null", "http://localhost:9999", "file://"):
        reply = chat.call("POST", CHAT_PATH, question(), {"Origin": origin})
        assert reply.status == 403, origin
        assert "Access-Control-Allow-Origin" not in reply.headers
        assert error_of(reply)["type"] == "permission_error"

    assert len(chat.queries()) == before


def test_a_preflight_of_another_origin_is_refused(chat: Server) -> None:
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}

    reply = chat.call("OPTIONS", CHAT_PATH, headers=asked)

    assert reply.status == 403
    assert "Access-Control-Allow-Origin" not in reply.headers


def test_a_page_of_the_server_itself_is_welcome(chat: Server) -> None:
    own = {"Origin": f"http://127.0.0.1:{chat.port}"}

    assert chat.call("GET", "/v1/models", headers=own).status == 200


def test_a_page_of_a_named_origin_may_call(locked: Server) -> None:
    reply = locked.call("POST", CHAT_PATH, question(stream=True),
                        {"Origin": PAGE, "Authorization": f"Bearer {KEY}"})
    refused = locked.call("GET", "/v1/models", headers={"Origin": PAGE})

    assert reply.status == 200 and refused.status == 401
    for each in (reply, refused):
        assert each.headers["Access-Control-Allow-Origin"] == PAGE
        assert each.headers["Vary"] == "Origin"
        # Its client may read when and whether to ask again, and the id of the request.
        assert each.headers["Access-Control-Expose-Headers"] == "*"


def test_a_preflight_of_a_named_origin_gets_what_it_asks_for(locked: Server) -> None:
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization, content-type"}

    reply = locked.call("OPTIONS", CHAT_PATH, headers=asked)

    assert reply.status == 204
    assert reply.headers["Access-Control-Allow-Origin"] == PAGE
    assert "POST" in reply.headers["Access-Control-Allow-Methods"]
    assert reply.headers["Access-Control-Allow-Headers"] == "authorization, content-type"


def test_without_an_origin_there_are_no_cors_headers(locked: Server) -> None:
    reply = with_key(locked)

    assert not [name for name in reply.headers if name.startswith("Access-Control")]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:3456", "127.0.0.1.evil.example",
                                  "localhost.evil.example"])
def test_a_foreign_host_name_is_refused(chat: Server, host: str) -> None:
    reply = chat.call("POST", CHAT_PATH, question(), {"Host": host})

    assert reply.status == 403
    assert "OCP_ALLOWED_HOSTS" in error_of(reply)["message"]


@pytest.mark.parametrize("host", ["localhost", "localhost:3456", "127.0.0.1", "192.168.1.7:3456",
                                  "[::1]:3456", "mybox", "mybox.local", "MyBox.LAN:80"])
def test_a_local_host_name_is_fine(locked: Server, host: str) -> None:
    assert locked.call("GET", "/health", headers={"Host": host}).status == 200


def test_a_named_host_is_fine(locked: Server) -> None:
    assert locked.call("GET", "/health", headers={"Host": "Box.Example:443"}).status == 200


# ---------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("headers", [
    {}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {KEY}x"},
    {"Authorization": f"Bearer {KEY[:-1]}"}, {"Authorization": f"Basic {KEY}"},
    {"x-api-key": "wrong"}, {"Authorization": "Bearer "}, {"X-Forwarded-For": "127.0.0.1"},
])
def test_without_the_key_nothing_is_served(locked: Server, headers: dict[str, str]) -> None:
    before = len(locked.queries())
    came = headers.get("Authorization", "").partition("Bearer ")[2] or headers.get("x-api-key")
    code = "invalid_api_key" if came else "missing_api_key"

    for method, path in (("POST", CHAT_PATH), ("GET", "/v1/models"), ("GET", "/logs")):
        reply = locked.call(method, path, question() if method == "POST" else None, headers)
        assert (reply.status, error_of(reply)["code"]) == (401, code)
        assert reply.headers["WWW-Authenticate"].startswith("Bearer")

    assert len(locked.queries()) == before


@pytest.mark.parametrize("headers", [
    {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"bearer {KEY}"},
    {"Authorization": f"BEARER   {KEY}"}, {"x-api-key": KEY}, {"X-API-Key": KEY},
    {"Authorization": f"Bearer {ADMIN_KEY}"},
])
def test_the_key_is_taken_in_every_form(locked: Server, headers: dict[str, str]) -> None:
    assert locked.call("POST", CHAT_PATH, question(), headers).status == 200


def test_health_needs_no_key(locked: Server) -> None:
    assert locked.call("GET", "/health").json()["authMode"] == "shared"


def test_logs_need_the_admin_key(locked: Server) -> None:
    with_shared = locked.call("GET", "/logs", headers={"x-api-key": KEY})
    with_admin = locked.call("GET", "/logs", headers={"x-api-key": ADMIN_KEY})

    assert with_shared.status == 403 and "OCP_ADMIN_KEY" in error_of(with_shared)["message"]
    assert with_admin.status == 200


# ---------------------------------------------------------------------------
# The log
# ---------------------------------------------------------------------------

def test_every_answer_leaves_one_line_at_info(chat: Server) -> None:
    before = len(chat.log_entries("answer_finished"))

    reply = ask(chat, model=SAMPLING)
    entries = eventually(lambda: chat.log_entries("answer_finished")[before:])

    (entry,) = entries
    assert (entry["level"], entry["model"], entry["stream"]) == ("info", SAMPLING, False)
    assert (entry["prompt_tokens"], entry["output_tokens"]) == (18, 7)
    assert 0 <= entry["first_token_ms"] <= entry["total_ms"]
    assert isinstance(entry["warm"], bool)
    assert entry["request_id"] == reply.headers["X-Request-Id"]


def test_a_refused_request_leaves_a_line_too(chat: Server) -> None:
    reply = ask(chat, temperature="hot")

    (entry,) = eventually(lambda: [
        each for each in chat.log_entries("request_refused")
        if each["request_id"] == reply.headers["X-Request-Id"]])
    assert (entry["level"], entry["status"], entry["param"]) == ("info", 400, "temperature")


def test_no_word_of_a_conversation_is_logged(locked: Server) -> None:
    locked.write_scenario([[{"think": CANARY}, {"say": CANARY}]])
    messages = [{"role": role, "content": CANARY} for role in ("system", "user", "assistant")]
    messages.append({"role": "user", "content": CANARY})

    replies = [
        with_key(locked, {"messages": messages, "user": CANARY}),
        with_key(locked, {"messages": messages, "stream": True}),
        with_key(locked, {"messages": messages, "temperature": CANARY}),
        with_key(locked, {"messages": messages, "stream": CANARY}),
        with_key(locked, {"messages": [{"role": CANARY, "content": CANARY}]}),
    ]
    locked.write_scenario([])
    eventually(lambda: len(locked.log_entries("request_answered")) >= len(replies))

    assert [reply.status for reply in replies] == [200, 200, 400, 400, 400]
    assert CANARY not in json.dumps(locked.log_entries())
    assert CANARY not in locked.output
    assert KEY not in locked.output and KEY not in json.dumps(locked.log_entries())


def test_the_log_can_be_asked_for_by_number_and_level(chat: Server) -> None:
    ask(chat, model="claude-nova-9")
    ask(chat)
    last_entry(chat, "answer_finished")

    newest = chat.call("GET", "/logs?n=2").json()
    warnings = chat.call("GET", "/logs?n=1000&level=warn").json()
    nothing = chat.call("GET", "/logs?n=0").json()

    assert newest["count"] == len(newest["entries"]) == 2
    levels = {entry["level"] for entry in warnings["entries"]}
    assert levels <= {"warn", "error"} and "warn" in levels
    assert nothing["entries"] == []
    assert newest["entries"][-1]["ts"] >= newest["entries"][0]["ts"]


@pytest.mark.parametrize(("query", "param"), [
    ("level=loud", "level"), ("n=-1", "n"), ("n=many", "n"), ("n=1.5", "n"),
])
def test_a_bad_question_about_the_log_is_refused(chat: Server, query: str, param: str) -> None:
    reply = chat.call("GET", f"/logs?{query}")

    assert (reply.status, error_of(reply)["param"]) == (400, param)


def test_the_log_file_is_private(chat: Server) -> None:
    folder = chat.ocp_home / "logs"

    assert (folder / "ocp.log").stat().st_mode & 0o077 == 0
    assert chat.ocp_home.stat().st_mode & 0o077 == 0
