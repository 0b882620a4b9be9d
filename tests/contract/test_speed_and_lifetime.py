"""Fast mode, and the lifetime in the API's prompt cache, over the real claude: what goes up, also
from a process that goes on to another request, and what is left when the API refuses."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import stub_api as stub
from conversation import Conversation, path_of
from depth import rest
from dialects import CHAT, MESSAGES, RESPONSES, Dialect, Result, Tool, dialect_name
from rig import Claude, Rig, running_rig
from stub_api import Reply

Json = Any

RIG_SETTINGS = {
    "OCP_FAST_MODE": "1",
    "OCP_CACHE_LIFETIME": "client", "CLAUDE_MAX_RETRIES": "2"}
#: For each dialect what asks for fast mode.
WISHES: dict[Dialect, Json] = {
    CHAT: {"service_tier": "priority"}, RESPONSES: {"service_tier": "fast"},
    MESSAGES: {"speed": "fast", "max_tokens": 4_096},
}
PLAIN: dict[Dialect, Json] = {CHAT: {}, RESPONSES: {}, MESSAGES: {"max_tokens": 4_096}}
EACH_WISH = pytest.mark.parametrize(
    "dialect", [CHAT, *rest(MESSAGES, RESPONSES)], ids=dialect_name)
CREDITS = "Usage credits are required for fast mode."
NO_CREDITS = {"anthropic-ratelimit-unified-overage-disabled-reason": "overage_not_provisioned"}


def known_fast_model(rig: Rig) -> str:
    """A model with fast mode. Of those that the oldest claude knows, it reports one by itself."""
    if not rig.is_old:
        return "claude-opus-5-5"
    # A process for another model than the alias stands for lists the alias.
    rig.ask("Who is there?")
    rig.begin()
    return "claude-opus-4-8"


@pytest.fixture
def talk(rig: Rig, dialect: Dialect) -> Conversation:
    """A conversation with a model that has fast mode."""
    return Conversation(rig, dialect, model=known_fast_model(rig))


def speed_told(dialect: Dialect, body: Json) -> str:
    """How fast an answer was by what a client is told of it."""
    return str(body["usage"]["speed"] if dialect is MESSAGES else body["service_tier"])


def lifetimes(body: Json) -> set[str]:
    """The lifetimes that the API is asked for; "5m" is its default."""
    if isinstance(body, list):
        return set().union(*map(lifetimes, body))
    if not isinstance(body, dict):
        return set()
    control = body.get("cache_control")
    own = {str(control.get("ttl", "5m"))} if isinstance(control, dict) else set()
    return own.union(*map(lifetimes, body.values()))


def marked(question: str, ttl: str) -> Json:
    return [{"type": "text", "text": question, "cache_control": {"type": "ephemeral", "ttl": ttl}}]


# -- fast mode --------------------------------------------------------------------

@EACH_WISH
def test_fast_mode_reaches_the_api_and_ends_with_its_request(
    rig: Rig, dialect: Dialect, talk: Conversation
) -> None:
    first = talk.ask(f"Quick, {dialect}!", **WISHES[dialect])
    second = talk.ask("And quick again!", **WISHES[dialect])
    talk.ask("No hurry.", **PLAIN[dialect])

    assert [body.get("speed") for body in rig.bodies()] == ["fast", "fast", None]
    assert path_of(rig, second) == "continued"
    told = speed_told(dialect, first.reply.json())
    assert told == ("fast" if dialect is MESSAGES else "priority")


@pytest.mark.parametrize("model", ["claude-fable-5-2", *rest("claude-opus-5")])
def test_every_model_with_fast_mode_gets_it(rig: Rig, model: str) -> None:
    if rig.is_old:
        pytest.skip("not for this claude: it does not know the model")
    rig.ask("Quick!", model, service_tier="fast")

    assert rig.only_body()["speed"] == "fast"


@pytest.mark.exhaustive
@pytest.mark.differs_by_version
@pytest.mark.parametrize("dialect", [CHAT], ids=dialect_name)
@pytest.mark.parametrize(
    "refusal",
    [stub.error(429, CREDITS, headers=NO_CREDITS),
     *rest(stub.error(429, CREDITS),
           stub.error(400, "Fast mode is not enabled for your organization."))],
    ids=["no credits", "a plain 429", "not enabled"])
def test_what_the_api_refuses_is_answered_at_the_usual_speed_and_says_so(
    rig: Rig, talk: Conversation, dialect: Dialect, refusal: Reply
) -> None:
    # A process to which the API has refused it may not ask again.
    rig.end_parked()
    rig.script(refusal)
    answer = talk.ask(f"Quick, {refusal.status} {refusal.headers}!", **WISHES[dialect])

    assert [body.get("speed") for body in rig.bodies()] == ["fast", None]
    assert (answer.status, speed_told(dialect, answer.reply.json())) == (200, "default")


@pytest.mark.exhaustive
@pytest.mark.parametrize("dialect", [CHAT], ids=dialect_name)
def test_a_model_that_has_lost_fast_mode_answers_and_is_remembered(
    claude: Claude, dialect: Dialect, tmp_path: Path
) -> None:
    refused = stub.error(400, "'claude-opus' does not support the `speed` parameter.")
    with running_rig(tmp_path, claude, **RIG_SETTINGS) as rig:
        model = known_fast_model(rig)
        rig.stub.default = lambda body: refused if "speed" in body else stub.hello(body)
        answers = [rig.ask(f"Quick {number}!", model, **WISHES[dialect]) for number in range(2)]

        assert [each.status for each in answers] == [200, 200]
        assert [speed_told(dialect, each.reply.json()) for each in answers] == ["default"] * 2
        assert "speed" in rig.bodies()[0] and "speed" not in rig.last_body()


@pytest.mark.exhaustive
@pytest.mark.parametrize("dialect", [CHAT], ids=dialect_name)
def test_an_account_without_credits_gets_a_final_error(
    rig: Rig, talk: Conversation, dialect: Dialect
) -> None:
    rig.script(then=stub.error(429, CREDITS, headers=NO_CREDITS))
    answer = talk.ask("Quick, and in vain!", **WISHES[dialect])

    assert (answer.status, answer.headers["x-should-retry"]) == (429, "false")
    assert CREDITS in str(answer.error) and "insufficient_quota" in str(answer.error)


# -- lifetime ---------------------------------------------------------------------

@pytest.mark.exhaustive
@pytest.mark.parametrize("dialect", [MESSAGES, *rest(CHAT)], ids=dialect_name)
def test_a_lifetime_reaches_the_api_and_ends_with_its_request(rig: Rig, dialect: Dialect) -> None:
    talk = Conversation(rig, dialect, system="Be brief.", **PLAIN[dialect])
    paths = []
    for number, ttl in enumerate(("5m", "1h", "5m", None)):
        question = f"Question {number}, {dialect}?"
        answer = talk.ask(marked(question, ttl) if ttl else question)
        talk.messages[2 * number]["content"] = question
        paths.append(path_of(rig, answer))

    # Without a wish claude asks for an hour on a plan.
    assert [lifetimes(body) for body in rig.bodies()] == [{"5m"}, {"1h"}, {"5m"}, {"1h"}]
    assert paths[1:] == ["continued"] * 3


@pytest.mark.exhaustive
def test_a_lifetime_changes_in_the_middle_of_a_turn(rig: Rig) -> None:
    rig.script(stub.tool_calls([("clock", {})]), stub.text("Noon."))
    talk = Conversation(rig, MESSAGES, [Tool("clock")], **PLAIN[MESSAGES])
    first = talk.ask(marked("What time is it?", "5m"))
    talk.messages[0]["content"] = "What time is it?"
    second = talk.send_results([(first.call.id, Result("noon"))])

    assert (second.text, path_of(rig, second)) == ("Noon.", "continued")
    assert [lifetimes(body) for body in rig.bodies()] == [{"5m"}, {"1h"}]


@pytest.mark.exhaustive
def test_a_process_that_forgets_a_question_forgets_its_lifetime(rig: Rig) -> None:
    seen = []
    for ttl in ("5m", None):
        talk = Conversation(rig, CHAT, system="Forget.")
        talk.messages = [{"role": "user", "content": "Example"},
                         {"role": "assistant", "content": "Yes"}]
        answer = talk.ask(marked(f"With {ttl}?", ttl) if ttl else "With none?")
        seen.append(path_of(rig, answer))

    assert [lifetimes(body) for body in rig.bodies()] == [{"5m"}, {"1h"}]
    assert seen[0] in ("rebuilt", "rewound")
