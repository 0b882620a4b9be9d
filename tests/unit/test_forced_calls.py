"""Calls that can only be asked for: what is held back, and what is learned from a refusal."""
from __future__ import annotations

from typing import Any

import pytest

import ocp_server as ocp

MODELS = ocp.load_models("")
USAGE = ocp.Usage(10, 7, 5, 3)
STARTED = ocp.Started("msg_1", "claude-opus-5-5", USAGE)
WORDS = [
    ocp.BlockStarted(0, {"type": "text", "text": ""}), ocp.Delta(0, "text", "Hm."),
    ocp.BlockStopped(0),
]
ENDED = ocp.Finished("end_turn", None, USAGE)


def call(name: str = "clock", kind: str = "tool_use") -> Any:
    return ocp.BlockStarted(1, {"type": kind, "id": "toolu_1", "name": name, "input": {}})


def seen(watch: Any, *events: Any) -> list[list[Any]]:
    """What comes out for each event."""
    return [list(watch.events(event)) for event in events]


def watch_for(name: str = "") -> Any:
    return ocp.CallWatch(ocp.ToolChoice("tool" if name else "any", name))


@pytest.mark.parametrize("name", ["", "clock"])
def test_all_before_the_call_comes_with_it_and_the_rest_at_once(name: str) -> None:
    watch = watch_for(name)
    delta = ocp.Delta(1, "arguments", "{}")

    found = seen(watch, STARTED, *WORDS, call(), delta, ENDED)

    assert found == [
        *[[ocp.Pause()]] * 4, [STARTED, *WORDS, call()], [delta], [ENDED]]
    assert (watch.is_missing, watch.with_dropped(USAGE)) == (False, USAGE)


def test_a_search_that_is_forced_is_a_call() -> None:
    search = call("web_search", "server_tool_use")

    assert seen(watch_for("web_search"), STARTED, search)[-1] == [STARTED, search]


def test_a_call_of_another_tool_is_held_back_like_words() -> None:
    watch = watch_for("clock")
    called = ocp.Finished("tool_use", None, USAGE)

    assert seen(watch, STARTED, call("weather"), called) == [[ocp.Pause()], [ocp.Pause()], []]


def test_the_second_answer_without_the_call_is_given_and_both_are_counted() -> None:
    watch = watch_for()
    first = seen(watch, STARTED, *WORDS, ENDED)
    watch.begin()
    second = seen(watch, STARTED, *WORDS, ENDED)

    assert (first[-1], second[-1]) == ([], [STARTED, *WORDS, ENDED])
    assert watch.is_missing
    assert watch.with_dropped(USAGE) == ocp.Usage(20, 14, 10, 6)


def test_an_answer_after_a_command_of_a_tenant_is_given_and_not_asked_for_again() -> None:
    watch = watch_for()
    seen(watch, STARTED, *WORDS)

    assert watch.events(ENDED, may_repeat=False) == [STARTED, *WORDS, ENDED]
    assert watch.is_missing


@pytest.mark.parametrize("reason", ["max_tokens", "refusal", "stop_sequence"])
def test_an_answer_that_would_end_like_that_again_is_given(reason: str) -> None:
    watch, ended = watch_for(), ocp.Finished(reason, None, USAGE)

    assert seen(watch, STARTED, *WORDS, ended)[-1] == [STARTED, *WORDS, ended]
    assert (watch.is_missing, watch.with_dropped(USAGE)) == (True, USAGE)


@pytest.mark.parametrize("held", [[], [ocp.BlockStarted(0, {"type": "thinking", "thinking": ""})]],
                         ids=["nothing", "thinking"])
def test_no_call_is_missing_where_the_limit_left_no_room_for_one(held: list[Any]) -> None:
    watch, ended = watch_for(), ocp.Finished("max_tokens", None, USAGE)

    assert seen(watch, STARTED, *held, ended)[-1] == [STARTED, *held, ended]
    assert not watch.is_missing


def test_an_answer_that_begins_anew_forgets_what_was_held_back() -> None:
    watch = watch_for()

    found = seen(watch, STARTED, *WORDS, ocp.Restarted(), STARTED, call(), ocp.Restarted())

    assert found[-3:] == [[ocp.Pause()], [STARTED, call()], [ocp.Restarted()]]


def test_an_answer_that_begins_anew_after_its_call_is_held_back_again() -> None:
    watch = watch_for()

    found = seen(watch, STARTED, call(), ocp.Restarted(), STARTED, *WORDS, ENDED)

    assert found[2:] == [[ocp.Restarted()], *[[ocp.Pause()]] * 4, []]


def test_a_second_attempt_after_the_call_is_held_back_again() -> None:
    watch = watch_for()
    [*_, released] = seen(watch, STARTED, call())
    watch.begin()

    assert seen(watch, STARTED, *WORDS, call())[-1] == [STARTED, *WORDS, call()]
    assert released == [STARTED, call()]


def test_signs_of_life_are_never_held_back() -> None:
    assert seen(watch_for(), ocp.Tick(), ocp.Pause()) == [[ocp.Tick()], [ocp.Pause()]]


# -- what the model is sent -----------------------------------------------------

CLOCK = ocp.Tool("clock", "", {"type": "object"})


def turn_of(model: str, **fields: Any) -> Any:
    options = fields.pop("options", ocp.Options())
    message = ocp.Message("user", [{"type": "text", "text": "What time is it?"}])
    return ocp.Turn(MODELS.find(model), [message], options, tools=(CLOCK,), **fields)


@pytest.mark.parametrize(
    ("model", "choice", "sent"),
    [
        ("claude-opus-5-5", ocp.ToolChoice("any", "", False), ocp.ToolChoice("auto", "", False)),
        ("claude-opus-5-5", ocp.ToolChoice("tool", "clock"), ocp.ToolChoice()),
        ("claude-opus-5-5", ocp.ToolChoice("none"), ocp.ToolChoice("none")),
        ("claude-haiku-5-5", ocp.ToolChoice("any"), ocp.ToolChoice("any")),
    ],
)
def test_a_choice_that_the_model_refuses_becomes_auto(model: str, choice: Any, sent: Any) -> None:
    turn = turn_of(model, tool_choice=choice)

    assert turn.tools_for_model == ((CLOCK,), sent)


@pytest.mark.parametrize("name", ["clock", "my clock"])
def test_the_model_is_told_the_name_that_it_knows(name: str) -> None:
    turn = turn_of("claude-opus-5-5", tool_choice=ocp.ToolChoice("tool", name), system="Be brief.")

    first = ocp.setup_lines(turn, "Be kind.").decode()

    assert f"Be kind.\\n\\nCall the tool {ocp.wire_name(name)} before anything else" in first


def test_a_reminder_stands_at_the_end_of_the_last_message() -> None:
    turn = turn_of("claude-opus-5-5", tool_choice=ocp.ToolChoice("any"))

    reminded = ocp.with_reminder(turn)

    texts = [block["text"] for block in reminded.messages[-1].content]
    assert texts[0] == "What time is it?" and "Call one of the tools" in texts[1]
    assert len(turn.messages[-1].content) == 1


# -- refusals --------------------------------------------------------------------

OFF = ocp.Options(thinking_tokens=0, thinking_type="disabled", effort="high")
FORCED = {"tool_choice": ocp.ToolChoice("any")}


@pytest.mark.parametrize(
    ("fields", "message", "learned"),
    [
        (FORCED, "tool_choice forces tool use is not compatible with this model.", "forced_tools"),
        (FORCED, "Thinking may not be enabled when tool_choice forces tool use.", "forced_tools"),
        ({**FORCED, "options": OFF}, '"thinking.type.disabled" is not supported for this model.',
         "thinking_off"),
        ({"options": OFF}, "thinking: disabled thinking is not supported", "thinking_off"),
        ({}, "tool_choice forces tool use is not compatible with this model.", None),
        ({}, '"thinking.type.disabled" is not supported for this model.', None),
        ({"options": OFF}, "messages.1.content.0: Invalid `signature` in `thinking` block", None),
        ({"options": OFF}, "output_config.effort 'max' is not supported when thinking is disabled",
         None),
        ({"options": OFF}, "max_tokens: must be greater than or equal to 0", None),
    ],
    ids=str,
)
def test_a_refusal_shows_what_the_model_refuses(
    fields: dict[str, Any], message: str, learned: str | None
) -> None:
    turn = turn_of("claude-haiku-5-5", **fields)

    found = ocp.refusal_of_model(turn, ocp.BadRequest(message))

    assert (found and (found.model_id, found.field)) == (
        learned and ("claude-haiku-5-5", learned))
    if found:
        # The same refusal would not be learned twice.
        again = ocp.after_refusal(turn, found)
        assert ocp.refusal_of_model(again, ocp.BadRequest(message)) is None


def test_a_turn_whose_thinking_could_not_be_switched_off_thinks_least() -> None:
    options = ocp.Options(
        sampling=(("temperature", 0.3),), thinking_tokens=0, thinking_type="disabled")
    refusal = ocp.ModelRefusal("claude-haiku-5-5", "thinking_off", "never")

    found = ocp.after_refusal(turn_of("claude-haiku-5-5", options=options), refusal)

    assert found.options == ocp.Options(effort="low")
