"""What clients ask for beside their messages, through the real claude."""
from __future__ import annotations

from typing import Any

import pytest

import stub_api as stub
from depth import rest
from dialects import CHAT, DIALECTS, MESSAGES, RESPONSES, Dialect, Result, Tool, dialect_name
from rig import ANSWER_S, Case, Rig
from waiting import eventually

Json = Any

RIG_SETTINGS = {
    "CLAUDE_MAX_RETRIES": "1"}


def body_for(rig: Rig, model: str, dialect: Dialect = CHAT, **fields: Json) -> dict[str, Json]:
    """What the API is asked for a question to this model."""
    rig.begin()
    reply = rig.server.call(
        "POST", dialect.path, dialect.body("Hi there?", model=model, **fields), timeout_s=ANSWER_S)
    assert dialect.read_answer(reply).error is None, reply.text[-500:]
    return rig.only_body()


# ---------------------------------------------------------------------------
# Models by family and version
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
@pytest.mark.differs_by_version
@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("claude-opus-4-5", "claude-opus-4-5-20251101"),
        ("claude-haiku-4-5-20270101", "claude-haiku-4-5-20270101"),
        *rest(
            ("anthropic/claude-haiku-4.5", "claude-haiku-4-5-20251001"),
            ("claude-opus-4-1-20250805", "claude-opus-4-1-20250805")),
    ],
)
def test_an_older_model_gets_its_temperature_and_no_budget_of_claude_s_own(
    rig: Rig, name: str, model: str
) -> None:
    body = body_for(rig, name, temperature=0.5, max_tokens=4_000)

    assert (body["model"], body["temperature"]) == (model, 0.5)
    assert body["thinking"] == {"type": "disabled"} and body["max_tokens"] == 4_000


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", ["claude-opus-4-5", *rest("claude-haiku-4-5")])
def test_a_budget_of_the_client_s_reaches_an_older_model_as_it_is(rig: Rig, model: str) -> None:
    body = body_for(
        rig, model, MESSAGES, max_tokens=4_096, thinking={"type": "enabled", "budget_tokens": 3_000}
    )

    assert (body["thinking"]["type"], body["thinking"]["budget_tokens"]) == ("enabled", 3_000)
    assert body["max_tokens"] == 4_096


@pytest.mark.parametrize("way", ["suffix", *rest("beta")])
def test_the_long_window_is_asked_for(rig: Rig, way: str) -> None:
    model = "claude-sonnet-4-6" + ("[1m]" if way == "suffix" else "")
    beta = {"anthropic-beta": "context-1m-2025-08-07"} if way == "beta" else {}

    reply = rig.server.call(
        "POST", MESSAGES.path, MESSAGES.body("Hi there?", model=model), beta, timeout_s=ANSWER_S)

    assert reply.status == 200 and rig.only_body()["model"] == "claude-sonnet-4-6"
    assert "context-1m-" in rig.stub.requests[-1].headers["anthropic-beta"]


# ---------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------

@pytest.mark.parametrize(
    ("model", "top_p", "sent"),
    [("claude-sonnet-4-6", 0.97, 0.97), ("claude-sonnet-4-6", 0.5, None),
     *rest(("claude-haiku-4-5", 0.5, None))],
)
def test_the_api_never_gets_a_temperature_beside_top_p(
    rig: Rig, model: str, top_p: float, sent: float | None
) -> None:
    body = body_for(rig, model, top_p=top_p)

    assert body.get("top_p") == sent
    assert sent is None or "temperature" not in body


@pytest.mark.parametrize("dialect", DIALECTS, ids=dialect_name)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_answer_that_is_ended_here_is_ended_at_the_api(
    rig: Rig, dialect: Dialect, stream: bool
) -> None:
    aborted = rig.stub.aborted
    rig.script(stub.text(["one\nand", " two\n", "\nthree", "four", "five"], gap_s=0.2, hang_s=60,
                         ending="hang"))
    field = "stop_sequences" if dialect is MESSAGES else "stop"

    reply = rig.server.call("POST", dialect.path, dialect.body(
        "Hi there?", model="claude-sonnet-4-6", stream=stream, **{field: ["\n\n", "END"]}),
        timeout_s=ANSWER_S)

    answer = dialect.read_answer(reply)
    assert (answer.text, answer.finish) == ("one\nand two", "stop")
    assert rig.only_body()["stop_sequences"] == ["END"]
    eventually(lambda: rig.stub.aborted > aborted)


def test_a_limit_of_no_tokens_has_the_prompt_read_and_nothing_said(rig: Rig) -> None:
    rig.script(stub.text("Word", stop_reason="max_tokens", output_tokens=1, cache_creation=900))

    reply = rig.server.call("POST", MESSAGES.path, MESSAGES.body(
        "Hi there?", model="claude-sonnet-4-6", max_tokens=0), timeout_s=ANSWER_S)

    told = reply.json()
    assert (told["content"], told["stop_reason"]) == ([], "max_tokens")
    assert told["usage"]["cache_creation_input_tokens"] == 900
    rig.settle()
    assert rig.only_body()["max_tokens"] == 1


@pytest.mark.parametrize("dialect", [CHAT, MESSAGES, RESPONSES], ids=dialect_name)
def test_a_shaped_answer_may_forbid_the_tools_of_its_history(rig: Rig, dialect: Dialect) -> None:
    tool = Tool("weather")
    rig.script(stub.tool_calls([("StructuredOutput", {"a": "b"})]))
    first = {"role": "user", "content": "The weather?"}
    called = _called(dialect)
    results = dialect.results([("call1", Result("Rain."))])
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    none: Json = {"type": "none"} if dialect is MESSAGES else "none"
    body = {
        "model": "claude-sonnet-4-6", dialect.field: [first, called, *results],
        "tools": dialect.tools([tool]), "tool_choice": none, "max_tokens": 500,
        **dialect.schema_fields(schema),
    }
    if dialect is RESPONSES:
        body.pop("max_tokens")

    reply = rig.server.call("POST", dialect.path, body, timeout_s=ANSWER_S)

    answer = dialect.read_answer(reply)
    assert reply.status == 200, reply.text
    assert (answer.text, answer.refusal, answer.finish) == ('{"a": "b"}', "", "stop")
    sent = rig.only_body()
    assert [each["name"] for each in sent["tools"]] == ["StructuredOutput"]
    assert sent.get("tool_choice", {}).get("type") != "none"
    assert "weather" in str(sent["messages"])


def _called(dialect: Dialect) -> dict[str, Json]:
    """A call as the history has it."""
    if dialect is RESPONSES:
        return {"type": "function_call", "call_id": "call1", "name": "weather", "arguments": "{}"}
    if dialect is MESSAGES:
        block = {"type": "tool_use", "id": "call1", "name": "weather", "input": {}}
        return {"role": "assistant", "content": [block]}
    call = {"id": "call1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


# ---------------------------------------------------------------------------
# Failures of the account, and what the API tells at the end
# ---------------------------------------------------------------------------

ACCOUNT = {
    "out of usage": (400, "You're out of extra usage. Add more at claude.ai/settings/usage and "
                          "keep going.", 429),
    "no credit": (400, "Your credit balance is too low to access the Anthropic API. Please go to "
                       "Plans & Billing to upgrade or purchase credits.", 429),
    "disabled": (400, "This organization has been disabled.", 403),
    "credits": (429, "Usage credits are required for this model.", 429),
    "long context": (429, "Extra usage is required for long context requests.", 429),
}


@pytest.mark.exhaustive
def test_a_failure_of_the_account_is_final_and_no_fault_of_the_request(rig: Rig) -> None:
    rig.begin()
    found = rig.run({
        name: Case(replies=[stub.error(status, text)] * 9)
        for name, (status, text, _) in ACCOUNT.items()})

    told = {name: (each.answer.status, each.answer.headers["x-should-retry"])
            for name, each in found.items()}
    assert told == {name: (status, "false") for name, (_, _, status) in ACCOUNT.items()}


@pytest.mark.exhaustive
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_details_of_a_refusal_and_of_the_cache_reach_the_client(rig: Rig, stream: bool) -> None:
    details = {"type": "refusal", "category": "cyber", "explanation": "No."}
    rig.script(stub.text("No.", stop_reason="refusal", stop_details=details))

    reply = rig.server.call("POST", MESSAGES.path, MESSAGES.body(
        "Hi there?", model="claude-sonnet-4-6", stream=stream), timeout_s=ANSWER_S)

    end = reply.events[-2][1] if stream else reply.json()
    told = end["delta"] if stream else end
    assert (told["stop_reason"], told["stop_details"]) == ("refusal", details)
    assert end["usage"]["cache_creation"] == {
        "ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 3}
