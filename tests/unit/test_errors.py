"""Errors: what a client is told about each failure, and what it is never told."""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from project import REPO, TRANSCRIPTS, load_script

ocp = load_script("ocp_server.py")

INVALID, AUTHENTICATION = "invalid_request_error", "authentication_error"

#: What clients rely on: status, type, code, and whether the same request may succeed later.
CONTRACT = {
    "OcpError": (500, "server_error", None, True),
    "BadRequest": (400, INVALID, None, False),
    "Unsupported": (400, INVALID, "unsupported_parameter", False),
    "ContextTooLong": (400, INVALID, "context_length_exceeded", False),
    "CodeRefused": (400, INVALID, "login_code_refused", False),
    "EmptyAnswer": (400, INVALID, "empty_answer", False),
    "RequestStopped": (400, INVALID, "request_stopped", False),
    "RepeatStopped": (400, INVALID, "request_stopped", False),
    "Unauthorized": (401, AUTHENTICATION, "invalid_api_key", False),
    "MissingKey": (401, AUTHENTICATION, "missing_api_key", False),
    "ReplacedKey": (401, AUTHENTICATION, "replaced_api_key", False),
    "ExpiredKey": (401, AUTHENTICATION, "expired_api_key", False),
    "RevokedKey": (401, AUTHENTICATION, "revoked_api_key", False),
    "LoginLost": (401, AUTHENTICATION, "upstream_login_required", False),
    "Forbidden": (403, "permission_error", None, False),
    "AdminKeyRequired": (403, "permission_error", "admin_key_required", False),
    "LocalOnly": (403, "permission_error", "local_only", False),
    "HostNotAllowed": (403, "permission_error", "host_not_allowed", False),
    "OriginNotAllowed": (403, "permission_error", "origin_not_allowed", False),
    "ModelNotAllowed": (403, "permission_error", "model_not_allowed", False),
    "UpstreamForbidden": (403, "permission_error", "upstream_forbidden", False),
    "NotFound": (404, INVALID, "not_found", False),
    "UnknownModel": (404, INVALID, "model_not_found", False),
    "ModelNeedsNewerClaude": (404, INVALID, "model_needs_newer_claude", False),
    "MethodNotAllowed": (405, INVALID, "method_not_allowed", False),
    "Conflict": (409, INVALID, "name_taken", False),
    "KeyExists": (409, INVALID, "key_exists", False),
    "FolderExists": (409, INVALID, "folder_exists", False),
    "LoginConflict": (409, INVALID, "login_conflict", False),
    "CaptureRuns": (409, INVALID, "capture_runs", False),
    "RequestTimeout": (408, INVALID, "request_timeout", True),
    "TooLarge": (413, INVALID, "request_too_large", False),
    "QueueFull": (429, "rate_limit_error", "rate_limit_exceeded", True),
    "RateLimited": (429, "rate_limit_error", "rate_limit_exceeded", True),
    "QuotaExceeded": (429, "quota_exceeded", "insufficient_quota", False),
    "ExtraUsageStopped": (429, "insufficient_quota", "insufficient_quota", False),
    "PlanLimit": (429, "insufficient_quota", "insufficient_quota", False),
    "HeadTooLarge": (431, INVALID, "head_too_large", False),
    "UpstreamFailed": (502, "server_error", "upstream_failed", True),
    "Busy": (503, "server_error", "too_many_connections", True),
    "MemoryFull": (503, "server_error", "memory_full", True),
    "ClaudeUnavailable": (503, "server_error", "claude_unavailable", False),
    "ClaudeMissing": (503, "server_error", "claude_unavailable", False),
    "ClaudeAway": (503, "server_error", "claude_unavailable", True),
    "ClaudeTooOld": (503, "server_error", "claude_unavailable", False),
    "SandboxUnavailable": (503, "server_error", "sandbox_unavailable", False),
    "NotReady": (503, "server_error", "not_ready", True),
    "Draining": (503, "server_error", "shutting_down", True),
    "StorageFailed": (503, "server_error", "database_failed", True),
    "StorageLocked": (503, "server_error", "database_locked", True),
    "StorageFull": (507, "server_error", "disk_full", True),
    "UpstreamTimeout": (504, "server_error", "timeout", True),
    "Overloaded": (529, "server_error", "overloaded", True),
}
ANTHROPIC_TYPES = {
    "api_error", "authentication_error", "invalid_request_error", "not_found_error",
    "overloaded_error", "permission_error", "rate_limit_error", "request_too_large",
    "timeout_error",
}


def family(kind: type[Any]) -> Iterator[type[Any]]:
    """A class and all below it."""
    yield kind
    for child in kind.__subclasses__():
        yield from family(child)


KINDS = {kind.__name__: kind for kind in family(ocp.OcpError)}


def raised(name: str, message: str = "Do this.", **details: Any) -> Any:
    """An error of this class."""
    if name == "MethodNotAllowed":
        return KINDS[name](message, ["GET", "HEAD"])
    return KINDS[name](message, **details)


# -- each class ---------------------------------------------------------------


def test_every_failure_is_in_the_contract() -> None:
    assert set(KINDS) == set(CONTRACT)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_failure_keeps_its_contract(name: str) -> None:
    kind = KINDS[name]

    assert (kind.status, kind.openai_type, kind.code, kind.retryable) == CONTRACT[name]


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_failure_has_a_type_that_the_other_dialect_knows_too(name: str) -> None:
    assert KINDS[name].anthropic_type in ANTHROPIC_TYPES


@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_body_of_a_failure_has_the_openai_shape(name: str) -> None:
    status, openai_type, code, _ = CONTRACT[name]

    body = json.loads(json.dumps(ocp.CHAT.error_body(raised(name), "req_1")))

    error = {"message": "Do this.", "type": openai_type, "param": None, "code": code}
    assert body == {"error": error}


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"MethodNotAllowed"}))
def test_an_instance_may_name_the_field_and_a_code_of_its_own(name: str) -> None:
    body = ocp.CHAT.error_body(raised(name, param="messages[0]", code="odd"), "req_1")

    assert (body["error"]["param"], body["error"]["code"]) == ("messages[0]", "odd")


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_client_is_told_not_to_repeat_what_will_not_heal(name: str) -> None:
    told = raised(name).headers().get("x-should-retry")

    assert told == (None if CONTRACT[name][3] else "false")


@pytest.mark.parametrize("name", sorted(KINDS))
def test_an_error_frame_is_one_event_and_no_end_of_a_good_stream(name: str) -> None:
    frame = ocp.Renderer(ocp.CHAT, None).failure(raised(name, "One\nline."), "req_1")

    assert frame.startswith(b'data: {"error":{"message":"One\\nline."')
    assert frame.endswith(b"}\n\n")
    assert frame.count(b"\n") == 2
    assert b"[DONE]" not in frame


@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_text_of_a_failure_is_its_message(name: str) -> None:
    assert str(raised(name)) == raised(name).message == "Do this."


# -- one name, and what to do -------------------------------------------------


@pytest.mark.parametrize("name", sorted(KINDS))
def test_each_kind_of_failure_says_what_the_operator_can_do(name: str) -> None:
    kind = raised(name).kind

    assert ocp.action_for(kind).endswith(".")
    assert kind in ocp.ACTIONS or issubclass(KINDS[name], ocp.BadRequest)


def test_no_action_is_for_a_failure_that_does_not_exist() -> None:
    codes = {raised(name).kind for name in KINDS}
    codes |= set(re.findall(r'code="(\w+)"', (REPO / "ocp_server.py").read_text("utf-8")))

    assert set(ocp.ACTIONS) <= codes


def test_a_quota_of_a_key_and_a_limit_of_the_plan_have_names_of_their_own() -> None:
    assert raised("QuotaExceeded").kind == "quota_exceeded"
    assert raised("PlanLimit").kind == raised("ExtraUsageStopped").kind == "insufficient_quota"


def test_a_failure_without_a_code_has_the_name_of_its_type() -> None:
    assert raised("BadRequest").kind == INVALID
    assert raised("BadRequest", code="odd").kind == "odd"


def test_an_action_names_the_key_as_a_shell_takes_it() -> None:
    assert "`ocp keys rotate phone`" in ocp.action_for("replaced_api_key", "phone")
    quoted = ocp.action_for("replaced_api_key", "mum's pad")
    assert "`ocp keys rotate 'mum'\"'\"'s pad'`" in quoted
    assert "OCP_ADMIN_KEY" in ocp.action_for("admin_key_required", "phone")


@pytest.mark.parametrize("secret", [
    "hunter2", "correct horse battery", "sk-ant-api03-abcdefghijkl", "sk-1234567890abcdef",
    "ocp_short", "ocp_" + "x" * 500, "\x1b[2Jabcdefgh", "\u202eabcdefghijkl",
    "K\u00fcche-Geheimnis",
])
def test_a_preview_shows_too_little_of_a_key_to_be_of_use(secret: str) -> None:
    preview = ocp.key_preview(secret)

    assert len(preview) <= 60 and preview.isprintable()
    shown = preview.replace("...", "")
    assert secret not in preview
    assert secret.startswith("ocp_") or len(shown) <= 8 or shown.startswith(("(", "sk-", "\\"))


# -- headers ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wait_s", "told"),
    [(None, None), (5, "5"), (4.4, "4"), (59.6, "60"), (0.2, "1"), (0, "1"), (-30.0, "1")],
)
def test_retry_after_is_whole_seconds_and_at_least_one(wait_s: float, told: str) -> None:
    error = ocp.QueueFull("Later.", retry_after_s=wait_s)

    assert error.headers().get("Retry-After") == told


def test_a_missing_key_is_answered_with_the_scheme_that_is_wanted() -> None:
    assert ocp.Unauthorized("Key?").headers()["WWW-Authenticate"] == 'Bearer realm="ocp"'


def test_a_lost_login_of_the_server_does_not_ask_the_client_for_a_key() -> None:
    assert "WWW-Authenticate" not in ocp.LoginLost("Log in.").headers()


def test_a_wrong_method_is_told_the_right_ones() -> None:
    assert ocp.MethodNotAllowed("No.", ["GET", "HEAD"]).headers()["Allow"] == "GET, HEAD"


# -- what claude reports ------------------------------------------------------

#: (the API's status, claude's word) as claude prints them, and what the client is told.
REPORTED = {
    (400, "unknown"): "BadRequest",
    (400, "billing_error"): "PlanLimit",
    (400, "invalid_request"): "BadRequest",
    (401, "authentication_failed"): "LoginLost",
    (402, "unknown"): "PlanLimit",
    (403, "oauth_org_not_allowed"): "UpstreamForbidden",
    (404, "model_not_found"): "UnknownModel",
    (408, "unknown"): "UpstreamTimeout",
    (409, "unknown"): "UpstreamFailed",
    (413, "invalid_request"): "TooLarge",
    (422, "unknown"): "UpstreamFailed",
    (429, "rate_limit"): "RateLimited",
    (500, "server_error"): "UpstreamFailed",
    (502, "server_error"): "UpstreamFailed",
    (503, "server_error"): "UpstreamFailed",
    (504, "server_error"): "UpstreamTimeout",
    (529, "overloaded"): "Overloaded",
    (529, "server_error"): "Overloaded",
    (529, "unknown"): "Overloaded",
    (None, "authentication_failed"): "LoginLost",
    (None, "billing_error"): "PlanLimit",
    (None, "invalid_request"): "BadRequest",
    (None, "max_output_tokens"): "UpstreamFailed",
    (None, "model_not_found"): "UnknownModel",
    (None, "overloaded"): "Overloaded",
    (None, "rate_limit"): "RateLimited",
    (None, "server_error"): "UpstreamFailed",
    (None, "unknown"): "UpstreamFailed",
    (None, "a_word_of_next_year"): "UpstreamFailed",
    (None, ""): "UpstreamFailed",
    (599, ""): "UpstreamFailed",
}
NOW_S = 1_000_000.0
REJECTED = ocp.PlanReport({}, "rejected", resets_at_s=NOW_S + 3600)


def told(text: str, word: str = "", status: int | None = None, plan: Any = None) -> Any:
    """The error for a complaint of claude's."""
    return ocp.upstream_error(ocp.ReportedFailure(text, word, status), plan, NOW_S)


def printed_combinations() -> set[tuple[int | None, str]]:
    """(status, word) of every complaint in the transcripts, as the end of the turn has them."""
    found = set()
    for path in sorted(TRANSCRIPTS.glob("*.jsonl")):
        word = ""
        for row in map(json.loads, path.read_text("utf-8").splitlines()):
            line = row["line"]
            if line.get("type") == "assistant":
                word = line.get("error") or word
            elif line.get("type") == "result" and word:
                found.add((line.get("api_error_status"), word))
    return found


def test_every_combination_in_the_transcripts_has_a_verdict() -> None:
    assert printed_combinations() <= set(REPORTED)


@pytest.mark.parametrize(("status", "word"), sorted(REPORTED, key=str))
def test_a_reported_failure_becomes_the_error_for_it(status: int | None, word: str) -> None:
    error = told("API Error: It broke.", word, status)

    assert type(error).__name__ == REPORTED[status, word]
    assert "It broke." in error.message


@pytest.mark.parametrize("status", [400, None])
def test_a_prompt_that_is_too_long_has_the_code_that_makes_agents_compact(
    status: int | None,
) -> None:
    error = told("Prompt is too long", "invalid_request", status)

    assert (error.status, error.error_code) == (400, "context_length_exceeded")
    assert (error.message, error.param) == ("prompt is too long", "messages")


#: What the API and claude say of prompts that do not fit, and what clients read.
TOO_LONG = {
    "prompt is too long: 250123 tokens > 200000 maximum":
        "prompt is too long: 250123 tokens > 200000 maximum",
    "API Error: 400 prompt is too long: 1200000 tokens > 1000000 maximum":
        "prompt is too long: 1200000 tokens > 1000000 maximum",
    "Prompt is too long \u00b7 the request is ~250123 tokens (limit 200000)":
        "prompt is too long \u00b7 the request is ~250123 tokens (limit 200000)",
    "input is too long for requested model":
        "prompt is too long: input is too long for requested model",
    "input length and `max_tokens` exceed context limit: 190000 + 32000 > 200000":
        "prompt is too long: input length and `max_tokens` exceed context limit: "
        "190000 + 32000 > 200000",
}


@pytest.mark.parametrize("status", [400, 413, None])
@pytest.mark.parametrize("text", TOO_LONG)
def test_a_prompt_that_is_too_long_is_told_in_the_words_that_agents_know(
    text: str, status: int | None
) -> None:
    error = told(text, "invalid_request", status)

    assert (type(error), error.message) == (ocp.ContextTooLong, TOO_LONG[text])


@pytest.mark.parametrize("text", ["Request exceeds the maximum size", "image exceeds 5 MB maximum"])
def test_what_is_too_large_in_bytes_is_no_prompt_that_is_too_long(text: str) -> None:
    assert type(told(text, "invalid_request", 413)) is ocp.TooLarge
    assert type(told(text, "invalid_request", 400)) is ocp.BadRequest


#: Details of a failure as claude gives them to a hook, and the API's message in them.
DETAILS = {
    '400 {"type":"error","error":{"type":"x","message":"No {good}."},"request_id":"r"}':
        "No {good}.",
    'request_too_large: 413 {"error":{"message":"Too big."}}': "Too big.",
    '{"error":{"message":"Bare."}}': "Bare.",
    "": "", "400": "", "400 {": "", "400 {}": "", "400 []": "", '400 {"error":"no"}': "",
    '400 {"error":{"message":7}}': "", '400 {"error":{}} {': "",
}


@pytest.mark.parametrize("details", DETAILS)
def test_the_api_s_own_message_is_found_in_the_details(details: str) -> None:
    assert ocp.api_message(details) == DETAILS[details]


def test_an_unknown_model_of_the_api_names_the_field() -> None:
    assert told("No such model.", "model_not_found", 404).param == "model"


def test_a_used_up_plan_says_when_it_resets() -> None:
    error = told("You've hit your limit", "rate_limit", 429, REJECTED)

    assert type(error) is ocp.PlanLimit
    assert error.headers() == {"Retry-After": "3600", "x-should-retry": "false"}


def test_a_reset_that_has_passed_means_soon() -> None:
    passed = ocp.PlanReport({}, "rejected", resets_at_s=NOW_S - 60)

    assert told("Limit", "rate_limit", 429, passed).headers()["Retry-After"] == "1"


#: Sentences of claude about usage, credits and spend limits, with the API's status.
LIMIT_SENTENCES = (
    (429, "API Error: Usage credits required for 1M context \u00b7 turn on usage credits at "
          "https://claude.ai/settings/usage"),
    (429, "Extra usage is required for long context requests."),
    (429, "Usage credits are required for this model."),
    (429, "You're out of usage credits \u00b7 /usage-credits to buy more"),
    (429, "Fable 5 requires usage credits"),
    (429, "Usage credits are off \u00b7 /usage-credits to turn them on"),
    (429, "Your org is out of usage \u00b7 add funds to continue"),
    (429, "You've hit your monthly spend limit."),
    (429, "enforced_spend_limit_reached"),
    (429, "contract_spend_limit_reached"),
    (429, "Usage is paused for your organization. For help, please contact support."),
    (400, "Your credit balance is too low to access the API."),
    (402, "Payment required"),
)
HOLD_SENTENCES = (
    (403, "Failed to authenticate. API Error: 403 Your account is on hold."),
    (403, "Your account is on hold and can't use Claude Code. View details or appeal: "
          "https://claude.ai/restricted"),
    (None, "OAuth account is on hold"),
    (400, "This organization has been disabled."),
)


@pytest.mark.parametrize("word", ["unknown", "rate_limit", "a_word_of_next_year"])
@pytest.mark.parametrize(("status", "text"), LIMIT_SENTENCES)
def test_no_retry_gets_past_missing_credits(status: int | None, text: str, word: str) -> None:
    error = told(text, word, status)

    assert (type(error), error.headers()) == (ocp.PlanLimit, {"x-should-retry": "false"})
    assert error.message in text and len(error.message) > 8


@pytest.mark.parametrize("word", ["unknown", "authentication_failed", "a_word_of_next_year"])
@pytest.mark.parametrize(("status", "text"), HOLD_SENTENCES)
def test_an_account_on_hold_is_forbidden(status: int | None, text: str, word: str) -> None:
    error = told(text, word, status)

    assert (type(error), error.headers()) == (ocp.UpstreamForbidden, {"x-should-retry": "false"})


@pytest.mark.parametrize("word", ["unknown", "", "a_word_of_next_year"])
@pytest.mark.parametrize(("text", "kind"), [
    ("You have no credits left.", "PlanLimit"),
    ("Access is on hold for this workspace.", "UpstreamForbidden")])
def test_a_failure_without_a_class_is_judged_by_its_sentence(
    text: str, kind: str, word: str
) -> None:
    assert type(told(text, word)).__name__ == kind


@pytest.mark.parametrize(("word", "kind"), [
    ("account_on_hold", "UpstreamForbidden"), ("verification_required", "UpstreamForbidden"),
    ("cloud_credential_error", "UpstreamForbidden"), ("billing_error", "PlanLimit")])
@pytest.mark.parametrize("status", [None, 401, 403, 429])
def test_words_about_the_account_are_final(word: str, kind: str, status: int | None) -> None:
    error = told("No.", word, status)

    assert (type(error).__name__, error.retryable) == (kind, False)


@pytest.mark.parametrize("text", [
    "tools.0.name: 'credits' is no valid name", "messages.1: nothing is on hold here"])
def test_a_bad_request_that_only_names_such_words_stays_one(text: str) -> None:
    assert type(told(text, "invalid_request", 400)) is ocp.BadRequest


@pytest.mark.parametrize("status", [500, 502])
def test_a_failure_of_the_api_that_names_credits_stays_one(status: int) -> None:
    assert type(told("The credits service failed.", "server_error", status)) is ocp.UpstreamFailed


def test_missing_credits_do_not_promise_the_reset_of_a_window_that_is_open() -> None:
    allowed = ocp.PlanReport({}, "allowed", "five_hour", NOW_S + 3600)

    error = told("Usage credits are required for this model.", "rate_limit", 429, allowed)

    assert error.headers() == {"x-should-retry": "false"} and "resets" not in error.message


def test_a_spend_limit_is_not_told_as_a_pause_of_the_server() -> None:
    text = ("API Error: Server is temporarily limiting requests (not your usage limit) \u00b7 "
            "enforced_spend_limit_reached")

    assert told(text, "rate_limit", 429).message == "enforced_spend_limit_reached"


def test_a_plain_429_during_extra_usage_is_worth_a_retry() -> None:
    billed = ocp.PlanReport({}, "rejected", "five_hour", NOW_S + 3600, is_overage=True)

    assert type(told("Too many requests", "rate_limit", 429, billed)) is ocp.RateLimited


@pytest.mark.parametrize("status", [429, None])
def test_paused_usage_is_final_whatever_the_sentence_says(status: int | None) -> None:
    paused = ocp.PlanReport({}, "rejected", "five_hour", NOW_S + 3600, is_final=True)

    error = told("Please wait.", "rate_limit", status, paused)

    assert (type(error), error.headers()) == (ocp.PlanLimit, {"x-should-retry": "false"})


def test_a_rate_limit_within_the_plan_is_worth_a_retry() -> None:
    allowed = ocp.PlanReport({}, "allowed", resets_at_s=NOW_S + 3600)

    error = told("Too many requests", "rate_limit", 429, allowed)

    assert type(error) is ocp.RateLimited
    assert error.headers() == {"Retry-After": "20"}


def test_an_overload_says_when_to_come_back() -> None:
    assert told("Overloaded", "overloaded", 529).headers() == {"Retry-After": "10"}


@pytest.mark.parametrize("word", ["authentication_failed", "oauth_org_not_allowed", "unknown"])
@pytest.mark.parametrize("text", ["OAuth token revoked", "Your token has expired"])
def test_a_login_that_was_taken_back_is_a_lost_one(word: str, text: str) -> None:
    assert type(told(text, word, 403)) is ocp.LoginLost


def test_a_lost_login_says_how_to_log_in_and_what_claude_said() -> None:
    message = told("Not logged in", "authentication_failed").message

    assert "`claude auth login`" in message
    assert "`claude setup-token`" in message
    assert message.endswith("(claude reported: Not logged in)")


@pytest.mark.parametrize(
    "prefix",
    ["", "API Error: ", "API Error: 500 ", "Failed to authenticate. API Error: 401 "],
)
def test_the_message_is_the_api_s_own_without_claude_s_preface(prefix: str) -> None:
    assert told(prefix + "Internal server error", "server_error", 500).message == (
        "Internal server error"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Overloaded. This is a server-side issue, usually temporary", "Overloaded"),
        ("No access to it. Run --model to pick a different model.", "No access to it"),
    ],
)
def test_the_message_leaves_out_what_only_helps_at_claude_s_own_terminal(
    text: str, message: str
) -> None:
    assert told(text, "server_error", 500).message == message


@pytest.mark.parametrize("text", ["", "  \n"])
def test_a_failure_without_a_word_still_has_a_message(text: str) -> None:
    assert len(told(text, "server_error", 500).message) > 10


def test_a_long_complaint_is_cut() -> None:
    assert len(told("word " * 5000, "server_error", 500).message) <= 1000


# -- what nobody is told ------------------------------------------------------

PATH = "/home/olaf/.claude/.credentials.json"
TOKEN = "sk-ant-oat01-AbCdEf_123456-789"
TATTLE = (
    f"EACCES: permission denied, open '{PATH}'",
    f"at {PATH}:12:3 with {TOKEN}",
    f"Authorization: Bearer {TOKEN} was refused ({PATH})",
    f'{{"path":"{PATH}","key":"ocp_{"a1" * 16}"}}',
)


def is_discreet(text: str) -> bool:
    return not re.search(r"olaf|credentials|AbCdEf|a1a1", text)


@pytest.mark.parametrize("text", TATTLE)
@pytest.mark.parametrize(("status", "word"), sorted(REPORTED, key=str))
def test_no_failure_tells_a_path_or_a_token(status: int | None, word: str, text: str) -> None:
    error = told(text, word, status)

    assert is_discreet(json.dumps(ocp.CHAT.error_body(error, "req_1")))


@pytest.mark.parametrize("where", ["assistant", "result", "errors"])
def test_no_line_of_claude_s_tells_a_path_or_a_token(where: str) -> None:
    text = TATTLE[1]
    lines: dict[str, list[dict[str, Any]]] = {
        "assistant": [
            {"type": "assistant", "error": "unknown",
             "message": {"model": "<synthetic>", "content": [{"type": "text", "text": text}]}},
            {"type": "result", "is_error": True},
        ],
        "result": [{"type": "result", "is_error": True, "result": text}],
        "errors": [{"type": "result", "is_error": True, "errors": [text]}],
    }
    reader = ocp.TurnReader()

    with pytest.raises(ocp.OcpError) as caught:
        for line in lines[where]:
            reader.events(line)

    assert is_discreet(caught.value.message)


@pytest.mark.parametrize(
    ("status", "text", "is_refused"),
    [
        (400, "Your credit balance is too low", True),
        (402, "Payment required", True),
        (403, "OAuth token has been revoked.", True),
        (529, "Overloaded", True),
        (400, "messages: text content must be non-empty", False),
        (403, "This model is not available to you.", False),
    ],
    ids=["no credits", "no payment", "login revoked", "overloaded", "bad request", "forbidden"],
)
def test_a_failure_of_the_account_counts_for_no_key_whatever_its_status(
    status: int, text: str, is_refused: bool
) -> None:
    message = {"model": "<synthetic>", "content": [{"type": "text", "text": text}]}
    reader = ocp.TurnReader()

    with pytest.raises(ocp.OcpError) as caught:
        reader.events({"type": "assistant", "message": message, "error": "unknown",
                       "api_error_status": status})
        reader.events({"type": "result", "is_error": True})

    assert caught.value.refused_upstream is is_refused


def test_a_refused_control_request_tells_no_path() -> None:
    response = {"subtype": "error", "error": f"cannot read {PATH}"}

    with pytest.raises(ocp.UpstreamFailed) as caught:
        ocp.check_control_response({"type": "control_response", "response": response})

    assert is_discreet(caught.value.message)


def test_what_claude_refuses_tells_no_token() -> None:
    response = {"subtype": "error", "error": f"bad {TOKEN}"}

    with pytest.raises(ocp.UpstreamFailed) as control:
        ocp.check_control_response({"type": "control_response", "response": response})
    with pytest.raises(ocp.UpstreamFailed) as history:
        ocp.check_history_result({"is_error": True, "result": f"bad {TOKEN}"})

    assert is_discreet(control.value.message) and is_discreet(history.value.message)


def test_a_refused_history_tells_no_path() -> None:
    with pytest.raises(ocp.UpstreamFailed) as caught:
        ocp.check_history_result({"is_error": True, "result": f"cannot read {PATH}"})

    assert is_discreet(caught.value.message)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("sk-ant-api03-abcdef123", "sk-ant-[redacted]"),
        (f"key ocp_{'0123456789abcdef' * 2}.", "key ocp_[redacted]"),
        ('File "ocp_server.py", line 3', 'File "ocp_server.py", line 3'),
        ("Bearer   abcdef123456 and more", "Bearer   [redacted] and more"),
        ("sk-ant-abc", "sk-ant-abc"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_what_looks_like_a_token_is_blotted_out(text: str, clean: str) -> None:
    assert ocp.redact(text) == clean


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("open /etc/passwd now", "open [path] now"),
        ("open('/home/a/b')", "open('[path]')"),
        ("see https://claude.com/form/cyber", "see https://claude.com/form/cyber"),
        ("and/or either/or", "and/or either/or"),
        ("no access to /root", "no access to [path]"),
        ("ENOENT :/home/a/b", "ENOENT :[path]"),
        ("C:/home/a/b", "[path]"),
        ("see //example.org/a", "see //example.org/a"),
    ],
)
def test_paths_of_this_machine_are_blotted_out_and_addresses_are_not(
    text: str, clean: str
) -> None:
    assert ocp.redact_paths(text) == clean


@pytest.mark.parametrize(
    ("text", "line"),
    [(" a\n b\t\tc ", "a b c"), ("x" * 10, "x" * 10), ("x" * 11, "xxxxxxx..."), ("", "")],
)
def test_one_line_runs_white_space_together_and_cuts(text: str, line: str) -> None:
    assert ocp.one_line(text, 10) == line


@pytest.mark.parametrize(
    ("names", "value"),
    [
        ([], ""), (["seed"], "seed"), (["seed", "user", "seed"], "seed, user"),
        (["a,b", "c\r\nX: y", "\u00fcber", " "], "a?b, c X: y, ?ber, "),
        (["x" * 200], "x" * 77 + "..."),
        ([f"tools[{n}]" for n in range(6_000)],
         ", ".join(f"tools[{n}]" for n in range(91)) + ", 5909 more"),
    ],
    ids=["none", "one", "again", "odd", "long", "many"],
)
def test_a_list_in_a_header_is_short_and_holds_nothing_that_ends_it(
    names: list[str], value: str
) -> None:
    assert ocp.header_list(names) == value
