"""What clients ask for beside their messages: the model's name, limits, stop texts, keys."""
from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from chat import CHAT_PATH, UNLISTED_MODEL, ask, both_ways, error_of, question
from conversation import EVERY_DIALECT, Conversation
from dialects import (
    CHAT,
    COMPLETIONS,
    DIALECTS,
    MESSAGES,
    RESPONSES,
    Answer,
    Dialect,
    Tool,
    dialect_name,
)
from http_client import Reply
from keys import ADMIN_KEY, MULTI, as_admin, bearer, new_key
from server import Server, running_server
from waiting import eventually

Json = Any

ALL_DIALECTS = pytest.mark.parametrize("dialect", DIALECTS, ids=dialect_name)


@pytest.fixture
def server(shared_server: Server) -> Server:
    """A server with default settings, to be given a script."""
    return shared_server


@pytest.fixture(scope="module")
def multi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that wants keys."""
    with running_server(tmp_path_factory.mktemp("multi"), env=MULTI) as running:
        yield running


def answered(server: Server, dialect: Dialect, text: str = "hi", **fields: Json) -> Answer:
    return dialect.read_answer(server.call("POST", dialect.path, dialect.body(text, **fields)))


# ---------------------------------------------------------------------------
# Stop texts and limits that the API does not take
# ---------------------------------------------------------------------------

def stop_fields(dialect: Dialect, *stops: str) -> dict[str, Json]:
    return {"stop_sequences" if dialect is MESSAGES else "stop": list(stops)}


@both_ways
@ALL_DIALECTS
def test_an_answer_ends_before_a_stop_text_of_white_space(
    server: Server, dialect: Dialect, stream: bool
) -> None:
    says = [{"say": "one\nand two\n"}, {"say": "\nthree"}, {"hang": True}]
    server.write_scenario([says])

    answer = answered(server, dialect, stream=stream, **stop_fields(dialect, "\n\n", "END"))

    assert (answer.text, answer.finish) == ("one\nand two", "stop")
    assert answer.is_complete and answer.usage
    env = server.queries()[-1]["settings"]["env"]
    assert json.loads(env["CLAUDE_CODE_EXTRA_BODY"])["stop_sequences"] == ["END"]


@both_ways
def test_the_stop_text_is_named_to_clients_of_anthropic_s(server: Server, stream: bool) -> None:
    server.write_scenario([[{"say": "one\ntwo"}, {"hang": True}]])

    reply = server.call("POST", MESSAGES.path, MESSAGES.body(
        "hi", stream=stream, stop_sequences=["\n"]))

    last = reply.events[-2][1]["delta"] if stream else reply.json()
    assert (last["stop_reason"], last["stop_sequence"]) == ("stop_sequence", "\n")


def test_claude_is_ended_with_an_answer_that_was_ended_here(server: Server) -> None:
    fine = [{"say": "Fine."}, {"finish": "end_turn"}]
    server.write_scenario([[{"say": "one\ntwo"}, {"hang": True}], fine], shared=True)

    assert ask(server, stop="\n").status == 200
    pid = server.queries()[-1]["pid"]
    eventually(lambda: pid not in server.children())
    again = ask(server, stop="\n")

    assert again.json()["choices"][0]["message"]["content"] == "Fine."


@both_ways
@pytest.mark.parametrize("dialect", [MESSAGES, COMPLETIONS], ids=dialect_name)
def test_a_limit_of_no_tokens_reads_the_prompt_and_answers_nothing(
    server: Server, dialect: Dialect, stream: bool
) -> None:
    server.write_scenario([[{"say": "one"}, {"finish": "max_tokens"}]])

    answer = answered(server, dialect, stream=stream, max_tokens=0)

    assert (answer.text, answer.finish, answer.is_complete) == ("", "length", True)
    assert server.queries()[-1]["settings"]["env"]["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "1"


@both_ways
@pytest.mark.parametrize("dialect", [CHAT, MESSAGES], ids=dialect_name)
def test_thinking_that_is_not_wanted_is_not_shown(
    server: Server, dialect: Dialect, stream: bool
) -> None:
    server.write_scenario([[{"think": "Hm."}, {"say": "Fine."}, {"finish": "end_turn"}]])
    wish: Json = {"reasoning": {"exclude": True}}
    if dialect is MESSAGES:
        wish = {"thinking": {"type": "adaptive", "display": "omitted"}}

    answer = answered(server, dialect, stream=stream, **wish)

    assert (answer.thinking, answer.text) == ("", "Fine.")
    assert bool(answer.signature) is (dialect is MESSAGES)


# ---------------------------------------------------------------------------
# A process that dies between the beginning of a block and its first piece
# ---------------------------------------------------------------------------

TOOL = Tool("weather")
BEGINNINGS: dict[str, Json] = {
    "text": {"type": "text", "text": ""},
    "call": {"type": "tool_use", "id": "toolu_dead", "name": "weather", "input": {}},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}


def streamed(kind: str, **fields: Json) -> dict[str, Json]:
    return {"raw": {"type": "stream_event", "event": {"type": kind, **fields}}}


def began(block: Json) -> list[dict[str, Json]]:
    message = {"id": "msg_dead", "model": "claude-sonnet-4-6", "usage": {}}
    return [
        streamed("message_start", message=message),
        streamed("content_block_start", index=0, content_block=block),
    ]


def goes_on(server: Server, dialect: Dialect, death: list[Json], stream: bool) -> Answer:
    """The answer to the second question, whose process dies like that and is replaced by one
    that calls the tool."""
    tells = [{"tool": {"name": "weather", "input": {"city": "Oslo"}}}, {"finish": "tool_use"}]
    server.write_scenario([[{"say": "Hello."}, {"finish": "end_turn"}], death, tells], shared=True)
    rig: Any = SimpleNamespace(server=server)
    talk = Conversation(rig, dialect, [TOOL], streams=stream)
    talk.ask("Hi?")
    talk.messages.append({"role": "user", "content": "The weather?"})
    reply = server.call("POST", dialect.path, talk.body())
    return dialect.read_answer(reply)


@pytest.mark.few_cases
@both_ways
@EVERY_DIALECT
@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_death_before_the_first_piece_of_a_block_is_never_seen(
    server: Server, dialect: Dialect, name: str, stream: bool
) -> None:
    death = [*began(BEGINNINGS[name]), {"kill": signal.SIGKILL}]

    answer = goes_on(server, dialect, death, stream)

    assert answer.error is None and answer.finish == "tool_calls"
    assert (answer.call.name, answer.call.input) == ("weather", {"city": "Oslo"})


@both_ways
@EVERY_DIALECT
def test_a_call_that_was_told_is_not_told_again(
    server: Server, dialect: Dialect, stream: bool
) -> None:
    death = [*began(BEGINNINGS["call"]), streamed("content_block_stop", index=0),
             {"sleep_ms": 100}, {"kill": signal.SIGKILL}]

    answer = goes_on(server, dialect, death, stream)

    if stream:
        assert answer.error and not answer.is_complete
        assert len(answer.calls) <= 1
    else:
        assert (answer.call.name, answer.call.input) == ("weather", {"city": "Oslo"})


# ---------------------------------------------------------------------------
# Many prompts
# ---------------------------------------------------------------------------

@both_ways
def test_more_prompts_than_are_answered_at_once_are_answered_in_turn(
    server: Server, stream: bool
) -> None:
    server.write_scenario([])
    prompts = [f"prompt {number}" for number in range(19)]

    answer = answered(server, COMPLETIONS, prompt=prompts, stream=stream)

    assert list(answer.texts) == [f"You said: {prompt}" for prompt in prompts]
    assert answer.is_complete


# ---------------------------------------------------------------------------
# Bodies and parameters
# ---------------------------------------------------------------------------

def test_a_body_may_begin_with_a_byte_order_mark(server: Server) -> None:
    server.write_scenario([])
    body = b"\xef\xbb\xbf" + json.dumps(question()).encode()

    assert server.call("POST", CHAT_PATH, body).status == 200


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_body_in_another_coding_is_told_what_to_do(server: Server, coding: str) -> None:
    reply = server.call("POST", CHAT_PATH, json.dumps(question()).encode(coding))

    assert reply.status == 400 and "UTF-8" in error_of(reply)["message"]


def test_parameters_that_nobody_reads_are_in_a_header(server: Server) -> None:
    server.write_scenario([])

    reply = ask(server, frobnicate=1, reasoning="much", seed=3)

    assert reply.headers["X-OCP-Ignored-Params"] == "reasoning, frobnicate, seed"


def test_without_any_there_is_no_header(server: Server) -> None:
    assert ask(server, temperature=1, stream=False).headers["X-OCP-Ignored-Params"] is None


# ---------------------------------------------------------------------------
# Names of models
# ---------------------------------------------------------------------------

def model_asked(server: Server) -> str:
    arguments = [entry["argv"] for entry in server.fake_log("start") if "--model" in entry["argv"]]
    pids = {entry["pid"]: entry["argv"] for entry in server.fake_log("start")}
    assert arguments
    asked = pids[server.queries()[-1]["pid"]]
    return str(asked[asked.index("--model") + 1])


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("anthropic/claude-sonnet-4.6", "claude-sonnet-4-6"),
        ("claude-sonnet-4-6[1m]", "claude-sonnet-4-6[1m]"),
        (" Claude Opus 4.5 ", "claude-opus-4-5-20251101"),
    ],
)
def test_claude_is_started_with_the_name_that_it_knows(
    server: Server, name: str, argument: str
) -> None:
    server.write_scenario([])

    reply = ask(server, model=name)

    assert (reply.status, reply.json()["model"]) == (200, argument.partition("[")[0])
    assert model_asked(server) == argument


@pytest.mark.parametrize(
    ("model", "argument"),
    [("claude-sonnet-4-6", "claude-sonnet-4-6[1m]"), ("haiku", "claude-haiku-5-5")],
)
def test_the_beta_for_the_long_window_is_as_good_as_the_suffix(
    server: Server, model: str, argument: str
) -> None:
    server.write_scenario([])
    beta = {"anthropic-beta": "files-api-2025-04-14,context-1m-2025-08-07"}

    reply = server.call("POST", MESSAGES.path, MESSAGES.body("hi", model=model), beta)

    assert reply.status == 200 and model_asked(server) == argument


def test_the_long_window_holds_what_the_usual_one_does_not(server: Server) -> None:
    server.write_scenario([[{"say": "Read."}]])
    long_text = "word " * 1_400_000

    short, long = (ask(server, long_text, model=name)
                   for name in ("claude-sonnet-4-6", "claude-sonnet-4-6[1m]"))

    assert (short.status, long.status) == (400, 200)


def test_a_model_that_the_api_does_not_know_is_answered_with_others(server: Server) -> None:
    failure = {"status": 404, "word": "model_not_found", "text": "model: claude-opus-5-5"}
    server.write_scenario([[{"api_error": failure}]])

    error = error_of(ask(server, model="opus"))

    assert error["code"] == "model_not_found"
    told = error["message"].partition("Use one of: ")[2]
    assert "claude-sonnet-5-5" in told and "opus," not in told
    assert "claude-opus-5-5" not in told and "best" not in told


def test_a_list_of_models_has_pages(server: Server) -> None:
    def page(query: str) -> Json:
        return server.call("GET", f"/v1/models{query}").json()

    every = [row["id"] for row in page("")["data"]]
    seen: list[str] = []
    after = ""
    while True:
        found = page(f"?limit=2{after}")
        seen += [row["id"] for row in found["data"]]
        assert (found["first_id"], found["last_id"]) == (
            found["data"][0]["id"], found["data"][-1]["id"])
        if not found["has_more"]:
            break
        after = f"&after_id={found['last_id']}"
    assert seen == every and len(every) > 4
    before = page(f"?limit=2&before_id={every[4]}")
    assert [row["id"] for row in before["data"]] == every[2:4] and before["has_more"]
    assert page(f"?after_id={every[-1]}") == {
        "object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}
    assert not any("4-5-20251101" in model_id for model_id in every)


@pytest.mark.parametrize("query", ["limit=x", "limit=-1", "limit=2000", "after_id=gone"])
def test_a_page_that_there_is_not_is_refused(server: Server, query: str) -> None:
    reply = server.call("GET", f"/v1/models?{query}")

    assert (reply.status, error_of(reply)["param"]) == (400, query.partition("=")[0])


# ---------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------

NAMES = {
    "claude-sonnet-4-6": (
        ["claude-sonnet-4.6", "anthropic/claude-sonnet-4-6", "claude-sonnet-4-6[1m]",
         "Claude Sonnet 4.6", "claude-sonnet-4-6@20250514"],
        ["claude-sonnet-4-5", "sonnet", "claude-sonnet-5-5", "claude-opus-4-6[1m]"],
    ),
    "haiku": (["claude-haiku-5.5", "claude-haiku-5-5-20270101", "haiku:low"], ["claude-haiku-4-5"]),
    "claude-haiku-4.5": (["claude-haiku-4-5-20251001", "claude-haiku-4-5-20270101"], ["haiku"]),
    "claude-opus-4-5": (["claude-opus-4-5-20251101", "claude-opus-4.5"], ["opus"]),
}


@pytest.mark.parametrize("limit", NAMES)
def test_a_spelling_neither_loses_nor_gains_rights(multi: Server, limit: str) -> None:
    multi.write_scenario([])
    key = new_key(multi, name=f"limited to {limit}", models=[limit])["key"]
    good, bad = NAMES[limit]

    def status(name: str) -> int:
        return multi.call("POST", CHAT_PATH, question(model=name), bearer(key)).status

    assert [status(name) for name in (limit, *good)] == [200] * (len(good) + 1)
    assert [status(name) for name in bad] == [403] * len(bad)
    listed = multi.call("GET", "/v1/models", None, bearer(key)).json()["data"]
    assert len(listed) == 1


def test_of_two_keys_either_may_be_ours(multi: Server) -> None:
    multi.write_scenario([])
    key = new_key(multi, name="beside another")["key"]

    def reply(authorization: str, x_api_key: str) -> Reply:
        headers = {"Authorization": authorization, "x-api-key": x_api_key}
        return multi.call("POST", CHAT_PATH, question(), headers)

    assert reply("Bearer sk-of-somebody-else", key).status == 200
    assert reply(f"Bearer {key}", "sk-of-somebody-else").status == 200
    assert reply("Basic dTpw", key).status == 200
    assert reply("Bearer ", key).status == 200
    assert reply("Bearer sk-of-somebody-else", "sk-of-a-third").status == 401
    beside = {"Authorization": f"Bearer {key}", "x-api-key": ADMIN_KEY}
    assert multi.call("GET", "/api/keys", None, beside).status == 200
    assert as_admin(multi, "GET", "/api/keys", key=key).status == 403


# ---------------------------------------------------------------------------
# Failures of the account
# ---------------------------------------------------------------------------

ACCOUNT = [
    (400, "invalid_request", "You're out of extra usage. Add more at claude.ai/settings/usage "
     "and keep going.", 429),
    (400, "invalid_request", "Your credit balance is too low to access the Anthropic API. Please "
     "go to Plans & Billing to upgrade or purchase credits.", 429),
    (400, "billing_error", "Credit balance is too low", 429),
    (429, "rate_limit", "Usage credits are required for this model.", 429),
    (429, "rate_limit", "Usage credits required for 1M context", 429),
    (429, "rate_limit", "Extra usage is required for long context requests.", 429),
    (429, "rate_limit", "enforced_spend_limit_reached", 429),
    (400, "invalid_request", "This organization has been disabled.", 403),
    (403, "unknown", "Your account has been suspended.", 403),
    (None, "account_on_hold", "Your account is on hold.", 403),
    (None, "verification_required", "Verify your identity.", 403),
    (None, "cloud_credential_error", "No credentials.", 403),
]


@pytest.mark.few_cases
@pytest.mark.parametrize(("status", "word", "text", "told"), ACCOUNT, ids=[a[2] for a in ACCOUNT])
@pytest.mark.parametrize("dialect", [CHAT, MESSAGES, RESPONSES], ids=dialect_name)
def test_a_failure_of_the_account_is_no_fault_of_the_request_and_final(
    server: Server, dialect: Dialect, status: int | None, word: str, text: str, told: int
) -> None:
    failure = {"status": status, "word": word, "text": f"API Error: {text}"}
    server.write_scenario([[{"api_error": failure}]])

    reply = server.call("POST", dialect.path, dialect.body("hi", model=UNLISTED_MODEL))

    assert reply.status == told
    assert reply.headers["x-should-retry"] == "false"
    assert text in reply.json()["error"]["message"]


def test_a_fault_of_the_request_that_speaks_of_accounts_stays_one(server: Server) -> None:
    text = "messages.0: the account of the disabled user is not text"
    server.write_scenario([[{"api_error": {"status": 400, "word": "invalid_request",
                                           "text": text}}]])

    assert ask(server).status == 400


# ---------------------------------------------------------------------------
# What the API tells at the end
# ---------------------------------------------------------------------------

@both_ways
def test_tables_of_counts_and_the_details_of_a_refusal_are_passed_on(
    server: Server, stream: bool
) -> None:
    cache = {"ephemeral_5m_input_tokens": 1, "ephemeral_1h_input_tokens": 2}
    details = {"type": "refusal", "category": "cyber", "explanation": "No."}
    delta = {"stop_reason": "refusal", "stop_sequence": None, "stop_details": details}
    message = {"id": "msg_1", "model": "claude-sonnet-5-5", "usage": {"cache_creation": cache}}
    tools = {"web_search_requests": 1, "web_fetch_requests": 0}
    server.write_scenario([[
        streamed("message_start", message=message),
        streamed("content_block_start", index=0, content_block=BEGINNINGS["text"]),
        streamed("content_block_delta", index=0, delta={"type": "text_delta", "text": "No."}),
        streamed("content_block_stop", index=0),
        streamed("message_delta", delta=delta, usage={"server_tool_use": tools}),
    ]])

    reply = server.call("POST", MESSAGES.path, MESSAGES.body("hi", stream=stream))

    end = reply.events[-2][1] if stream else reply.json()
    told = end["delta"] if stream else end
    assert (told["stop_reason"], told["stop_details"]) == ("refusal", details)
    assert end["usage"]["server_tool_use"] == tools
    began = reply.events[0][1]["message"] if stream else end
    assert began["usage"]["cache_creation"] == cache


