"""Chat completions over the real claude: what the API is asked, and what the client gets."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import stub_api as stub
from depth import by_depth, rest
from dialects import CHAT
from rig import (
    BUDGET_MODEL,
    MODEL,
    NEWEST_MODEL,
    Case,
    Claude,
    Outcome,
    Rig,
    assistant,
    running_rig,
    system,
    user,
)
from upstream import system_texts, turns

Json = Any

# Each request has another model or comes at once: a spare would cost more than it saves. And most
# have no successor, so a process is better rewound for the next one than kept.

#: Two images of one pixel.
BLACK = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
WHITE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAG7buVgAAAABJRU5ErkJggg==")

BOTH_FORMS = pytest.mark.parametrize("model", [MODEL, *rest(NEWEST_MODEL)])


# ---------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("model", [MODEL, NEWEST_MODEL])
def test_a_question_gets_its_answer(rig: Rig, model: str) -> None:
    rig.script(then=stub.text("It is \u00e9t\u00e9, \U0001f600."))
    answers = rig.ask_whole_and_streamed("What is it? \u00bf\U0001f914", model=model)
    for answer, body in zip(answers, rig.bodies()):
        assert (answer.status, answer.text, answer.finish) == (
            200, "It is \u00e9t\u00e9, \U0001f600.", "stop")
        assert body["model"] == model
        assert turns(body) == [("user", ["What is it? \u00bf\U0001f914"])]
        assert system_texts(body) == []
        assert not body["tools"]
    assert len(rig.bodies()) == 2


def test_deltas_arrive_one_by_one_as_the_api_sends_them(rig: Rig) -> None:
    pieces = ["One", ", two", ",", " three"]
    # The API sends the next one when the client has the one before.
    gate = threading.Semaphore(1)
    rig.script(stub.text(pieces, gate=gate))
    came: list[str] = []
    with rig.open() as stream:
        for _, chunk in stream:
            for choice in chunk["choices"] if chunk != "[DONE]" else ():
                came.append(choice["delta"].get("content"))
                if came[-1]:
                    gate.release()
    assert came == ["", *pieces, None]


@pytest.mark.exhaustive
def test_a_stream_has_a_role_its_pieces_one_finish_and_an_end(rig: Rig) -> None:
    rig.script(stub.text(["a", "b"]))
    with rig.open() as stream:
        *chunks, end = [data for _, data in stream]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert end == "[DONE]"
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {}]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


def test_thinking_is_reasoning_and_not_content(rig: Rig) -> None:
    rig.script(then=stub.thinking("Let me see what that is.", "It is this."))
    for answer in rig.ask_whole_and_streamed():
        assert (answer.thinking, answer.text) == ("Let me see what that is.", "It is this.")
        assert answer.finish == "stop"


def test_several_text_blocks_are_one_answer(rig: Rig) -> None:
    first, second = stub.text(["One. "]), stub.text(["Two."])
    rig.script(first._replace(blocks=first.blocks + second.blocks))
    assert rig.ask().text == "One. Two."


# ---------------------------------------------------------------------------
# Conversations
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
@BOTH_FORMS
def test_instructions_are_apart_and_in_order(rig: Rig, model: str) -> None:
    rig.ask([
        {"role": "developer", "content": "First rule."},
        system([CHAT.text("Second"), CHAT.text("rule.")]),
        user("one"), assistant("eins"), system("Third rule."), user("two")], model)
    body = rig.only_body()
    late = "<system-reminder>\nThird rule.\n</system-reminder>"
    assert system_texts(body) == ["First rule.\n\nSecond\n\nrule."]
    assert turns(body) == [("user", ["one"]), ("assistant", ["eins"]), ("user", [late, "two"])]


@pytest.mark.parametrize(("model", "count"), [
    (MODEL, 3), (NEWEST_MODEL, 3), *rest((MODEL, 1), (MODEL, 10))])
def test_history_is_the_same_turns_upstream(rig: Rig, model: str, count: int) -> None:
    messages, wanted = [], []
    for number in range(count):
        question, answer = f" Question\t{number}?\n", f"Answer {number}.\n\n- so\n"
        messages += [user(question), assistant(answer)]
        wanted += [("user", [question]), ("assistant", [answer])]
    answer = rig.ask([*messages, user("And now?")], model)
    assert answer.finish == "stop"
    assert turns(rig.only_body()) == [*wanted, ("user", ["And now?"])]


def test_neighbours_of_one_role_keep_their_texts_and_order(rig: Rig) -> None:
    rig.ask([
        user("one"), user([CHAT.text("two"), CHAT.text("three")]),
        assistant("four"), assistant("five"), user(""), user("six"), assistant(None),
        user("seven"), user(None)])
    assert turns(rig.only_body()) == [
        ("user", ["one", "two", "three"]), ("assistant", ["four", "five"]),
        ("user", ["six", "seven"])]


def test_a_history_that_begins_with_the_assistant_arrives_in_order(rig: Rig) -> None:
    rig.ask([assistant("Welcome."), user("Thanks."), assistant("So?"), user("Well.")])
    found = turns(rig.only_body())
    assert found[-3:] == [("user", ["Thanks."]), ("assistant", ["So?"]), ("user", ["Well."])]
    assert [texts for role, texts in found[:-3] if role == "assistant"] == [["Welcome."]]


@BOTH_FORMS
def test_images_arrive_as_they_are_also_in_history(rig: Rig, model: str) -> None:
    rig.ask([
        user([CHAT.text("What is it?"), CHAT.image(BLACK)]), assistant("A dot."),
        user([CHAT.image(WHITE), CHAT.text("And this?"), CHAT.image(BLACK)])], model)
    assert turns(rig.only_body()) == [
        ("user", ["What is it?", upstream_image(BLACK)]), ("assistant", ["A dot."]),
        ("user", [upstream_image(WHITE), "And this?", upstream_image(BLACK)])]


@BOTH_FORMS
def test_a_message_may_be_an_image_and_nothing_else(rig: Rig, model: str) -> None:
    answer = rig.ask(
        [user([CHAT.image(BLACK)]), assistant("A dot."), user([CHAT.image(WHITE)])], model)
    assert answer.finish == "stop"
    assert turns(rig.only_body()) == [
        ("user", [upstream_image(BLACK)]), ("assistant", ["A dot."]),
        ("user", [upstream_image(WHITE)])]


def upstream_image(base64_data: str) -> dict[str, Json]:
    source = {"type": "base64", "media_type": "image/png", "data": base64_data}
    return {"type": "image", "source": source}


@pytest.mark.exhaustive
def test_nothing_of_one_request_is_in_the_next(rig: Rig) -> None:
    rig.ask([system("Say CANARY-1."), user("CANARY-2"), assistant("CANARY-3"), user("CANARY-4")])
    rig.ask("Next?")
    assert "CANARY" in str(rig.bodies()[0])
    assert "CANARY" not in str(rig.bodies()[1])


# ---------------------------------------------------------------------------
# Usage
# ---------------------------------------------------------------------------

def test_usage_is_the_apis_and_equal_in_both_modes(rig: Rig) -> None:
    rig.script(then=stub.text(
        "So.", input_tokens=11, cache_read=100, cache_creation=30, output_tokens=9))
    for answer in rig.ask_whole_and_streamed(stream_options={"include_usage": True}):
        assert answer.usage == {
            "prompt_tokens": 141, "completion_tokens": 9, "total_tokens": 150,
            "prompt_tokens_details": {"cached_tokens": 100}}


@pytest.mark.exhaustive
def test_reasoning_tokens_are_told_when_the_api_tells_them(rig: Rig) -> None:
    rig.script(then=stub.thinking("Hm.", "So.", output_tokens=9, thinking_tokens=4))
    for answer in rig.ask_whole_and_streamed(stream_options={"include_usage": True}):
        assert answer.usage and answer.usage["completion_tokens"] == 9
        assert answer.usage["completion_tokens_details"] == {"reasoning_tokens": 4}


# ---------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------

NO_THINKING = {"type": "disabled"}
BY_ITSELF = {"type": "adaptive", "display": "summarized"}


def by_budget(tokens: int) -> dict[str, Json]:
    return {"budget_tokens": tokens, "type": "enabled", "display": "summarized"}


class ParameterCase(NamedTuple):
    """What a client asks for, and what it comes to in the API's body."""
    model: str
    fields: Mapping[str, Json]
    #: Fields of the body; None: it is not there.
    wanted: Mapping[str, Json]
    ignored: str | None = None

    @property
    def name(self) -> str:
        return f"{self.model} {dict(self.fields)}"


PARAMETER_CASES = (
    ParameterCase(MODEL, {"max_tokens": 77}, {"max_tokens": 77, "thinking": NO_THINKING}),
    ParameterCase(MODEL, {"max_tokens": 5, "max_completion_tokens": 78}, {"max_tokens": 78}),
    ParameterCase(MODEL, {"stop": "END"}, {"stop_sequences": ["END"], "thinking": BY_ITSELF}),
    ParameterCase(MODEL, {"temperature": 0.3}, {"temperature": 0.3, "thinking": NO_THINKING}),
    ParameterCase(
        MODEL, {"temperature": 1.7}, {"temperature": None, "thinking": BY_ITSELF},
        ignored="temperature"),
    ParameterCase(MODEL, {"reasoning_effort": "low"}, {"output_config": {"effort": "low"}}),
    ParameterCase(MODEL, {"reasoning_effort": "xhigh"}, {"output_config": {"effort": "high"}}),
    ParameterCase(MODEL, {"reasoning_effort": "none"}, {"thinking": NO_THINKING}),
    ParameterCase(
        MODEL, {"temperature": 0.2, "top_p": 0.5, "max_tokens": 9, "stop": ["a", "b"]},
        {"temperature": 0.2, "top_p": None, "max_tokens": 9, "stop_sequences": ["a", "b"]},
        ignored="top_p"),
    ParameterCase(
        MODEL, {"temperature": 0.2, "reasoning_effort": "high"},
        {"temperature": None, "thinking": BY_ITSELF, "output_config": {"effort": "high"}},
        ignored="temperature"),
    ParameterCase(BUDGET_MODEL, {}, {"thinking": NO_THINKING, "output_config": None}),
    ParameterCase(
        BUDGET_MODEL, {"temperature": 0.3, "max_tokens": 50, "stop": ["X"]},
        {"temperature": 0.3, "max_tokens": 50, "stop_sequences": ["X"],
         "thinking": NO_THINKING}),
    ParameterCase(
        BUDGET_MODEL, {"reasoning_effort": "medium"},
        {"thinking": by_budget(8192), "temperature": None}),
    ParameterCase(
        BUDGET_MODEL, {"reasoning_effort": "high", "max_tokens": 900},
        {"thinking": NO_THINKING, "max_tokens": 900}),
    ParameterCase(
        NEWEST_MODEL,
        {"temperature": 0.3, "top_p": 0.4, "max_tokens": 9, "stop": ["a", "b"],
         "reasoning_effort": "minimal"},
        {"temperature": None, "top_p": None, "max_tokens": 9, "stop_sequences": ["a", "b"],
         "output_config": {"effort": "low"}, "thinking": BY_ITSELF},
        ignored="temperature, top_p"),
    ParameterCase(NEWEST_MODEL, {"reasoning_effort": "max"}, {"output_config": {"effort": "max"}}),
)
#: They have all fields, and each kind of model.
SOME_CASES = PARAMETER_CASES[8::2]
CHECKED_CASES = by_depth(SOME_CASES, SOME_CASES, PARAMETER_CASES)


@pytest.fixture(scope="module")
def parameter_outcomes(shared_rig: Rig) -> dict[str, Outcome]:
    shared_rig.begin()
    return shared_rig.run({
        case.name: Case(case.model, case.fields) for case in CHECKED_CASES})


@pytest.mark.each_case
@pytest.mark.parametrize("case", CHECKED_CASES, ids=lambda case: case.name)
def test_parameters_reach_the_api_as_the_model_takes_them(
    parameter_outcomes: dict[str, Outcome], case: ParameterCase
) -> None:
    answer, (body,) = parameter_outcomes[case.name]
    assert answer.finish == "stop"
    assert {name: body.get(name) for name in case.wanted} == case.wanted
    assert answer.headers["X-OCP-Ignored-Params"] == case.ignored


@pytest.mark.exhaustive
@pytest.mark.parametrize(("model", "fields"), [
    (BUDGET_MODEL, {"max_tokens": 3000, "reasoning_effort": "high"}),
    (BUDGET_MODEL, {"max_tokens": 100}),
    ("claude-opus-4-5", {"max_tokens": 100})])
def test_thinking_fits_into_the_limit(rig: Rig, model: str, fields: Json) -> None:
    rig.ask(model=model, **fields)
    budget = rig.only_body().get("thinking", {}).get("budget_tokens")
    # The API takes none that is smaller, and none that leaves no room for an answer.
    assert budget is None or 1024 <= budget < fields["max_tokens"]


@BOTH_FORMS
def test_parameters_are_gone_in_the_next_request(rig: Rig, model: str) -> None:
    rig.ask("Same?", model)
    rig.ask("Same?", model, temperature=0.1, max_tokens=99, stop="X", reasoning_effort="low")
    rig.ask("Same?", model)
    before, changed, after = (without_identity(body) for body in rig.bodies())
    assert changed != before
    assert after == before


def without_identity(body: Mapping[str, Json]) -> dict[str, Json]:
    """A body without what claude makes new for every process."""
    return {name: value for name, value in body.items() if name != "metadata"}


@pytest.mark.exhaustive
def test_the_operators_prompt_follows_the_clients(claude: Claude, tmp_path: Path) -> None:
    with running_rig(
            tmp_path, claude, CLAUDE_SYSTEM_PROMPT="Operator.") as rig:
        rig.ask([system("Client."), user("Hi")])
        rig.ask("Hi")
        assert [system_texts(body) for body in rig.bodies()] == [
            ["Client.\n\nOperator."], ["Operator."]]


# ---------------------------------------------------------------------------
# Ends
# ---------------------------------------------------------------------------

FINISHES = {
    "end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length",
    "model_context_window_exceeded": "length", "refusal": "content_filter",
}
ALL_ENDS = [
    (reason, model, streams) for reason, finish in FINISHES.items() for streams in (False, True)
    for model in ((MODEL,) if finish == "stop" else (MODEL, NEWEST_MODEL))
]
#: Every third one has every reason, and both manners and models.
SOME_ENDS = ALL_ENDS[::3]
ENDS = {
    f"{reason} {model} {'stream' if streams else 'whole'}": (reason, model, streams)
    for reason, model, streams in by_depth(SOME_ENDS, SOME_ENDS, ALL_ENDS)
}


@pytest.fixture(scope="module")
def aborted_before(shared_rig: Rig) -> int:
    """How many requests had been aborted before those of end_outcomes."""
    return shared_rig.stub.aborted


@pytest.fixture(scope="module")
def end_outcomes(shared_rig: Rig, aborted_before: int) -> dict[str, Outcome]:
    """Whoever asks the API again after a good end waits for ever."""
    shared_rig.begin()
    return shared_rig.run({
        name: Case(model, {}, streams, [
            stub.text(["Half ", "an"], stop_reason=reason), *[stub.hang(seconds=600)] * 5])
        for name, (reason, model, streams) in ENDS.items()})


@pytest.mark.each_case
@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_an_answer_is_told_in_openais_words(
    end_outcomes: dict[str, Outcome], name: str
) -> None:
    answer = end_outcomes[name].answer
    assert (answer.status, answer.text) == (200, "Half an")
    assert answer.finish == FINISHES[name.split()[0]]


def test_an_answer_is_asked_for_once(
    end_outcomes: dict[str, Outcome], shared_rig: Rig, aborted_before: int
) -> None:
    counts = {name: len(outcome.bodies) for name, outcome in end_outcomes.items()}
    again = sum(counts.values()) - len(counts)
    # claude may be faster than the signal that ends it, but not by more than a request.
    assert max(counts.values()) <= 2
    shared_rig.stub.wait_for_aborted(aborted_before + again)
    assert again < len(counts) / 2


def test_a_refusal_before_the_first_word_is_an_answer(rig: Rig) -> None:
    rig.script(then=stub.Reply(stop_reason="refusal"))
    for answer in rig.ask_whole_and_streamed():
        assert (answer.status, answer.text, answer.finish) == (200, "", "content_filter")
    rig.settle()
    assert len(rig.bodies()) == 2


# ---------------------------------------------------------------------------
# Models and size
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
@pytest.mark.parametrize(("named", "wanted"), [
    ("claude-next-9-20300101", "claude-next-9-20300101"),
    *rest(("claude-haiku-4-5", "claude-haiku-4-5-20251001"),
          ("claude-opus-4-1-20250805", "claude-opus-4-1-20250805"))])
def test_the_api_is_asked_for_the_model_that_was_named(
    rig: Rig, named: str, wanted: str
) -> None:
    answer = rig.ask(model=named)
    assert answer.finish == "stop"
    assert rig.only_body()["model"] == wanted


def test_a_question_of_one_line_costs_at_most_2252_bytes(claude: Claude) -> None:
    with tempfile.TemporaryDirectory(prefix="ocp") as folder, running_rig(
            Path(folder), claude, OCP_DEFAULT_MODEL=None) as rig:
        for model in ("claude-sonnet-5", "claude-haiku-4-5"):
            rig.ask("What is the capital of France?", model)
        sizes = [recorded.size_bytes for recorded in rig.stub.requests]
        assert len(sizes) == 2
        assert max(sizes) <= 2252
