"""Calls and results of a history, whatever ids a client gives them. No server, no processes."""
from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from depth import by_depth
from project import load_script
from rendering import USER, block, conversation, parsing, steps_for

ocp = load_script("ocp_server.py")

GO_ON = "The result of an earlier tool call is there now; go on with it."

Json = dict[str, Any]


class Call(NamedTuple):
    """A tool call as the client tells it; its name is like no other's."""

    id: str
    name: str


class Said(NamedTuple):
    """A part of a history: what the user or the assistant said, or the result of a call."""

    role: str
    text: str = ""
    calls: tuple[Call, ...] = ()
    id: str = ""


# -- wire forms ---------------------------------------------------------------


def chat_body(history: list[Said]) -> Json:
    def message(said: Said) -> Json:
        if said.role == "result":
            return {"role": "tool", "tool_call_id": said.id, "content": said.text}
        if not said.calls:
            return {"role": said.role, "content": said.text}
        calls = [
            {"id": call.id, "type": "function",
             "function": {"name": call.name, "arguments": json.dumps({"of": call.name})}}
            for call in said.calls
        ]
        return {"role": said.role, "content": said.text or None, "tool_calls": calls}

    return {"messages": [message(said) for said in history]}


def messages_body(history: list[Said]) -> Json:
    def message(said: Said) -> Json:
        if said.role == "result":
            content: Json = {"type": "tool_result", "tool_use_id": said.id, "content": said.text}
            return {"role": "user", "content": [content]}
        calls = [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": {"of": call.name}}
            for call in said.calls
        ]
        texts = [block(said.text)] if said.text else []
        return {"role": said.role, "content": [*texts, *calls]}

    return {"messages": [message(said) for said in history]}


def responses_body(history: list[Said]) -> Json:
    items: list[Json] = []
    for said in history:
        if said.role == "result":
            items.append(
                {"type": "function_call_output", "call_id": said.id, "output": said.text})
        elif said.text:
            items.append({"role": said.role, "content": said.text})
        items += [
            {"type": "function_call", "call_id": call.id, "name": call.name,
             "arguments": json.dumps({"of": call.name})}
            for call in said.calls
        ]
    return {"input": items}


DIALECTS: dict[str, tuple[Any, Callable[[list[Said]], Json]]] = {
    "chat": (ocp.CHAT, chat_body),
    "messages": (ocp.MESSAGES, messages_body),
    "responses": (ocp.RESPONSES, responses_body),
}
each_dialect = pytest.mark.parametrize("dialect", DIALECTS)


def turn(dialect: str, *history: Said) -> Any:
    """The Turn of a request with this history."""
    parser, body = DIALECTS[dialect]
    return parser.parse(body(list(history)), parsing())


def user(text: str = "Go on.") -> Said:
    return Said("user", text)


def calling(*ids: str, names: str = "", text: str = "") -> Said:
    """An answer that calls tools with these ids; the names are letters, `a` and so on."""
    letters = names or "abcdefgh"
    return Said("assistant", text, tuple(Call(i, n) for i, n in zip(ids, letters)))


def result(call_id: str, text: str) -> Said:
    return Said("result", text, id=call_id)


def exchanges(found: Any) -> list[tuple[str, list[str]]]:
    """The names of the calls in order, each with the texts of the result beside it."""
    told = []
    for message, after in zip(found.messages, found.messages[1:]):
        calls = [part for part in message.content if part["type"] == "tool_use"]
        for call, beside in zip(calls, after.content):
            assert beside["type"] == "tool_result"
            assert beside["tool_use_id"] == call["id"]
            assert call["input"] == {"of": call["name"]}
            told.append((call["name"], [part["text"] for part in beside["content"]]))
    return told


# -- any history --------------------------------------------------------------

#: Ways in which clients and other models' servers name calls; the numbers are those of the answer
#: and of the call in it.
ID_STYLES: dict[str, Callable[[int, int], str]] = {
    "unique": lambda answer, call: f"call_{answer}_{call}",
    "again in each answer": lambda answer, call: f"call_{call}",
    "again in one answer": lambda answer, call: f"exec:{answer}",
    "always the same": lambda answer, call: "call_0",
    "empty": lambda answer, call: "",
    "equal without their marks": lambda answer, call: "call" + "_" * (3 * answer + call + 1) + "1",
    "nothing but marks": lambda answer, call: "_" * (answer + call + 1),
    "long": lambda answer, call: "call_" + "x" * 200 + str(answer + call),
    "letters of all kinds": lambda answer, call: f"\u547c\u53eb {answer}\n\u00e9{call}",
    "as functions": lambda answer, call: f"functions.get:{call}",
}


def random_history(seed: int) -> tuple[list[Said], list[str], dict[str, str]]:
    """A history, its texts in order, and the result of each call by its name."""
    rng = random.Random(seed)
    style = ID_STYLES[rng.choice(list(ID_STYLES))]
    history, texts, results = [user("0")], ["0"], {}
    for answer in range(rng.randint(1, 6)):
        text = rng.choice(["", f"answer {answer}"])
        calls = tuple(
            Call(style(answer, number), f"f{answer}_{number}")
            for number in range(rng.randint(0 if text else 1, 4))
        )
        history.append(Said("assistant", text, calls))
        answered = list(calls[: rng.choice([len(calls), len(calls), rng.randint(0, len(calls))])])
        if len({call.id for call in calls if call.id}) == len(calls):
            rng.shuffle(answered)
        told = [result(call.id, f"result of {call.name}") for call in answered]
        results.update({call.name: f"result of {call.name}" for call in answered})
        question = [user(f"question {answer}")]
        history += rng.choice([told + question, question + told])
        texts += [*filter(None, [text]), f"question {answer}"]
    return history, texts, results


@pytest.mark.parametrize("seed", range(by_depth(25, 100, 300)))
@each_dialect
def test_every_text_call_and_result_reaches_the_model_once_and_in_its_place(
    dialect: str, seed: int
) -> None:
    history, texts, results = random_history(seed)

    found = turn(dialect, *history)

    calls = [call.name for said in history for call in said.calls]
    assert exchanges(found) == [
        (name, [results.get(name, "No result was given.")]) for name in calls]
    parts = [part for message in found.messages for part in message.content]
    assert [part["text"] for part in parts if part["type"] == "text"] == texts
    ids = [part["id"] for part in parts if part["type"] == "tool_use"]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9]{1,64}", call_id) for call_id in ids)
    roles = [message.role for message in found.messages]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


@pytest.mark.parametrize("seed", range(30))
@each_dialect
def test_the_ids_of_a_history_stay_as_it_grows(dialect: str, seed: int) -> None:
    history, _, _ = random_history(seed)
    grown = [*history, calling("call_0", "call0r2", text="More."), user()]

    before, after = turn(dialect, *history), turn(dialect, *grown)

    assert after.messages[: len(before.messages)] == before.messages


# -- repairs ------------------------------------------------------------------


@each_dialect
def test_a_result_that_comes_late_moves_to_its_call(dialect: str) -> None:
    found = turn(
        dialect, user(), calling("c1", "c2"), result("c1", "one"), user("Well?"),
        calling("c3", names="c", text="Wait."), result("c3", "three"), result("c2", "two"),
    )

    assert exchanges(found) == [("a", ["one"]), ("b", ["two"]), ("c", ["three"])]
    assert found.adjusted == (("late_tool_result", 1),)


@each_dialect
def test_after_a_late_result_at_the_end_the_model_is_asked_to_go_on(dialect: str) -> None:
    found = turn(
        dialect, user(), calling("c1"), user("Well?"), Said("assistant", "Hm."),
        result("c1", "one"),
    )

    assert exchanges(found) == [("a", ["one"])]
    assert conversation(found)[-2:] == [
        ("assistant", ["Hm."]), ("user", [GO_ON])]
    assert found.adjusted == (("late_tool_result", 1), ("assistant_last", 1))





@each_dialect
def test_a_call_that_was_given_up_is_told_so(dialect: str) -> None:
    found = turn(dialect, user(), calling("c1", "c2"), result("c2", "two"), user("Stop."))

    assert exchanges(found) == [("a", ["No result was given."]), ("b", ["two"])]
    assert conversation(found)[-1] == ("user", ["tool_result", "tool_result", "Stop."])
    assert found.adjusted == (("missing_tool_result", 1),)


@each_dialect
def test_of_equal_ids_the_newest_call_gets_the_result(dialect: str) -> None:
    found = turn(
        dialect, user(), calling("c1"), user("Stop."), calling("c1", names="b"),
        result("c1", "two"), result("c1", "one"),
    )

    assert exchanges(found) == [("a", ["one"]), ("b", ["two"])]


@each_dialect
def test_a_result_whose_id_has_lost_its_marks_finds_its_call(dialect: str) -> None:
    found = turn(dialect, user(), calling("call_1", "call-2"), result("call2", "two"),
                 result("call1", "one"))

    assert exchanges(found) == [("a", ["one"]), ("b", ["two"])]


@each_dialect
def test_the_exact_id_wins_over_one_without_its_marks(dialect: str) -> None:
    found = turn(dialect, user(), calling("call_1_10", "call_11_0"), result("call_11_0", "two"),
                 result("call_1_10", "one"))

    assert exchanges(found) == [("a", ["one"]), ("b", ["two"])]


def test_thousands_of_equal_ids_take_no_time_to_speak_of() -> None:
    """A search through all calls for each result would take minutes."""
    count = by_depth(5_000, 19_000, 19_000)
    calls = calling(*["c"] * count, names="n" * count)
    answers = [result("c", str(number)) for number in range(count)]

    found = turn("chat", user(), calls, *answers)

    assert [texts for _, texts in exchanges(found)] == [[str(n)] for n in range(count)]


# -- a session ----------------------------------------------------------------


def test_a_session_goes_on_from_a_call_that_nobody_answered() -> None:
    earlier = [
        ocp.Message("user", [block("Look.")]),
        ocp.Message("assistant", [block("I look."), {
            "type": "tool_use", "id": "c1", "name": "look", "input": {}}]),
    ]
    about = parsing(session=lambda session_id, system: list(earlier))

    found = ocp.CHAT.parse({"ocp_session_id": "s", "messages": [USER]}, about)

    assert conversation(found)[-1] == ("user", ["tool_result", "Hello"])
    assert found.messages[-1].content[0]["content"] == [block("No result was given.")]


# -- blocks of tools that the API ran ------------------------------------------

FOUND = [{"type": "web_search_result", "title": "Paris", "url": "https://a", "page_age": None,
          "encrypted_content": "c2VhbGVk"}]
SERVER_BLOCKS: list[tuple[Json, str]] = [
    ({"type": "web_search_tool_result", "tool_use_id": "s1", "content": FOUND},
     '[web_search_tool_result]\n[{"type":"web_search_result","title":"Paris",'
     '"url":"https://a","page_age":null}]'),
    ({"type": "web_search_tool_result", "tool_use_id": "s1",
      "content": {"type": "web_search_tool_result_error", "error_code": "max_uses_exceeded"}},
     '[web_search_tool_result]\n{"type":"web_search_tool_result_error",'
     '"error_code":"max_uses_exceeded"}'),
    ({"type": "mcp_tool_result", "tool_use_id": "m1", "content": [block("It"), block("rains.")]},
     "[mcp_tool_result]\nIt\nrains."),
    ({"type": "advisor_tool_result", "tool_use_id": "a1", "content": "Think twice."},
     "[advisor_tool_result]\nThink twice."),
    ({"type": "bash_code_execution_tool_result", "tool_use_id": "b1",
      "content": {"type": "bash_code_execution_result", "stdout": "4", "return_code": 0}},
     '[bash_code_execution_tool_result]\n{"type":"bash_code_execution_result","stdout":"4",'
     '"return_code":0}'),
    ({"type": "compaction", "content": "So far: nothing."}, "So far: nothing."),
]


@pytest.mark.parametrize(("part", "told"), SERVER_BLOCKS, ids=lambda value: str(value)[:40])
def test_results_of_tools_that_the_api_ran_are_told_as_text(part: Json, told: str) -> None:
    called = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"q": "a"}}
    answer = {"role": "assistant", "content": [called, part, block("So it is.")]}

    found = ocp.MESSAGES.parse({"messages": [USER, answer, USER]}, parsing())

    assert told_answers(found) == [[told, "So it is."]]
    assert found.ignored == ()


def told_answers(turn: Any) -> list[list[str]]:
    """The texts of the answers that claude is given when a conversation is rebuilt."""
    steps = steps_for(turn, "", ocp.OLDEST_CLAUDE)
    lines = [json.loads(line) for line in b"".join(steps).splitlines()]
    contents = [line["message"]["content"] for line in lines if line["type"] == "assistant"]
    return [[part["text"] for part in content] for content in contents]


def test_what_a_server_tool_found_counts_as_its_text_and_is_not_compared() -> None:
    found = {"type": "web_search_tool_result", "tool_use_id": "s1", "content": FOUND}
    called = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"q": "a"}}
    cited = {**block("So it is."), "citations": [{"url": "https://a"}]}
    plain, searched = (
        ocp.Message("assistant", content)
        for content in ([block("So it is.")], [called, found, cited])
    )

    assert plain.digest == searched.digest
    assert searched.chars == plain.chars + len(SERVER_BLOCKS[0][1])


def test_an_answer_of_nothing_but_a_call_is_not_told() -> None:
    called = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"q": "a"}}
    paused = {"role": "assistant", "content": [called]}

    found = ocp.MESSAGES.parse({"messages": [USER, paused]}, parsing())

    assert [message.role for message in found.messages] == ["user", "assistant", "user"]
    assert (told_answers(found), found.adjusted) == ([], (("assistant_last", 1),))


def test_a_result_that_is_in_no_answer_is_text() -> None:
    part, told = SERVER_BLOCKS[0]

    found = ocp.MESSAGES.parse({"messages": [{"role": "user", "content": [part]}]}, parsing())

    assert conversation(found) == [("user", [told])]


@pytest.mark.parametrize("kind", ["container_upload", "fallback", "quantum"])
def test_a_block_of_an_unknown_type_is_left_out_and_named(kind: str) -> None:
    said = {"role": "assistant", "content": [block("Yes."), {"type": kind, "of": {"a": 1}}]}

    found = ocp.MESSAGES.parse({"messages": [USER, said, USER]}, parsing())

    assert conversation(found)[1] == ("assistant", ["Yes."])
    assert found.ignored == ("messages[1].content[1]",)


# -- the line of another claude -------------------------------------------------

HEADER = "x-anthropic-billing-header: cc_version=2.1.300; cch=1;"


@pytest.mark.parametrize(
    ("system", "told"),
    [
        ([block(HEADER), block("Be kind.")], "Be kind."),
        ([block(f"{HEADER}\nBe kind.\nAlways.")], "Be kind.\nAlways."),
        (f"{HEADER}\n\nBe kind.", "\nBe kind."),
        ([block(f"Be kind.\n{HEADER}")], f"Be kind.\n{HEADER}"),
        (HEADER, ""),
    ],
)
def test_of_the_system_prompt_only_the_billing_line_of_another_claude_is_left_out(
    system: object, told: str
) -> None:
    found = ocp.MESSAGES.parse({"messages": [USER], "system": system}, parsing())

    assert found.system == told
