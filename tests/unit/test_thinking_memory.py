"""The thinking of answers, which a conversation gets back when it goes to another process."""

from __future__ import annotations

from typing import Any

import pytest

from project import load_script
from rendering import MODELS, SONNET

ocp = load_script("ocp_server.py")

Json = Any

THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}
SEALED = {"type": "redacted_thinking", "data": "c2VhbGVk"}


def text(words: str) -> Json:
    return {"type": "text", "text": words}


def call(call_id: str = "toolu01a", city: str = "Rome") -> Json:
    return {"type": "tool_use", "id": call_id, "name": "weather", "input": {"city": city}}


def result(call_id: str = "toolu01a") -> Json:
    return {"type": "tool_result", "tool_use_id": call_id, "content": [text("Warm.")]}


def turn(*contents: list[Json], system: str = "", model: Any = SONNET) -> Any:
    """A turn of these contents, the user's first."""
    roles = ("user", "assistant")
    messages = [ocp.Message(roles[index % 2], list(content))
                for index, content in enumerate(contents)]
    return ocp.Turn(model=model, system=system, messages=messages, options=ocp.Options())


def contents(found: Any) -> list[list[Json]]:
    return [message.content for message in found.messages]


def restored(memory: Any, asked: Any, scope: str = "a") -> list[Json]:
    """The first answer of a turn's history as claude is told it."""
    found: list[Json] = memory.restored(asked, scope).messages[1].content
    return found


ASKED = [text("Hi")]
#: What the model says, and how a client repeats it.
PLAIN = [THOUGHT, text(" So. ")], [text("So.")]
CALLING = [THOUGHT, text("Look."), SEALED, call()], [text("Look."), call()]


@pytest.mark.parametrize(("said", "repeated"), [PLAIN, CALLING], ids=["plain", "calling"])
def test_an_answer_comes_back_as_the_model_gave_it(said: list[Json], repeated: list[Json]) -> None:
    memory = ocp.ThinkingMemory()
    memory.put(turn(ASKED), "a", said)

    later = turn(ASKED, repeated, [text("Thanks.")])
    again = turn(ASKED, [{**THOUGHT, "signature": "forged"}, *repeated], [text("Thanks.")])

    assert restored(memory, later) == restored(memory, again) == said
    assert contents(later)[1] == repeated, "the client's own message is left alone"
    assert memory.restored(later, "a").messages[1].digest == later.messages[1].digest


@pytest.mark.parametrize("case", ["key", "model", "text", "arguments", "question", "system"])
def test_an_answer_of_another_caller_model_or_conversation_does_not(case: str) -> None:
    memory = ocp.ThinkingMemory()
    memory.put(turn(ASKED, system="Be kind."), "a", PLAIN[0])
    memory.put(turn(ASKED, system="Be kind."), "a", CALLING[0])
    other = MODELS.find("claude-opus-4-8")
    scope = "b" if case == "key" else "a"
    first = [text("Hello")] if case == "question" else ASKED
    system = "Be terse." if case == "system" else "Be kind."
    for repeated in (PLAIN[1], CALLING[1]):
        if case in ("question", "system") and repeated is CALLING[1]:
            continue
        changed = [dict(block) for block in repeated]
        if case == "text":
            changed[0]["text"] += " No."
        if case == "arguments":
            changed = [text("Look."), call(city="Oslo")]
        asked = turn(first, changed, [text("Thanks.")], system=system,
                     model=other if case == "model" else SONNET)
        assert restored(memory, asked, scope) == changed


@pytest.mark.parametrize("is_off", [False, True])
def test_thinking_is_left_out_where_it_is_switched_on_or_off_later(is_off: bool) -> None:
    memory = ocp.ThinkingMemory()
    on, off = ocp.Options(), ocp.Options(thinking_tokens=0)
    before, after = (off, on) if is_off else (on, off)
    memory.put(turn(ASKED)._replace(options=before), "a", CALLING[0])
    later = turn(ASKED, CALLING[1], [result()])

    assert restored(memory, later._replace(options=before)) == CALLING[0]
    assert restored(memory, later._replace(options=after)) == CALLING[1]


@pytest.mark.parametrize("before", [[text("Edited")], ASKED])
def test_an_answer_with_calls_is_known_by_their_ids_whatever_stands_before(
    before: list[Json]
) -> None:
    memory = ocp.ThinkingMemory()
    memory.put(turn(ASKED, system="Be kind."), "a", CALLING[0])

    assert restored(memory, turn(before, CALLING[1], [result()])) == CALLING[0]


def test_later_answers_come_back_too() -> None:
    memory = ocp.ThinkingMemory()
    memory.put(turn(ASKED), "a", CALLING[0])
    memory.put(turn(ASKED, CALLING[1], [result()]), "a", PLAIN[0])

    found = memory.restored(turn(ASKED, CALLING[1], [result()], PLAIN[1], [text("Bye")]), "a")

    assert contents(found)[1::2] == [CALLING[0], PLAIN[0]]


SEARCH = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}}


@pytest.mark.parametrize("said", [
    [text("So.")], [{**THOUGHT, "signature": ""}, text("So.")],
    [{"type": "thinking", "thinking": "Hm."}, text("So.")], [THOUGHT, SEARCH, text("So.")],
], ids=["no thinking", "not signed", "cut off", "searched"])
def test_an_answer_that_cannot_be_told_as_it_was_is_not_kept(said: list[Json]) -> None:
    memory = ocp.ThinkingMemory()
    memory.put(turn(ASKED), "a", said)

    assert restored(memory, turn(ASKED, [text("So.")], ASKED)) == [text("So.")]


def test_what_was_not_used_for_longest_is_forgotten_when_there_is_no_room() -> None:
    memory = ocp.ThinkingMemory(max_bytes=350)
    answers = [[THOUGHT, call(f"toolu0{number}")] for number in range(3)]
    later = [turn(ASKED, said[1:], [result(said[1]["id"])]) for said in answers]
    memory.put(turn(ASKED), "a", answers[0])
    memory.put(turn(ASKED), "a", answers[1])
    assert restored(memory, later[0]) == answers[0]
    memory.put(turn(ASKED), "a", answers[2])
    memory.put(turn(ASKED), "a", answers[2])

    assert [len(restored(memory, each)) for each in later] == [2, 1, 2]


def test_an_answer_that_is_larger_than_all_room_is_not_kept() -> None:
    memory = ocp.ThinkingMemory(max_bytes=50)
    memory.put(turn(ASKED), "a", CALLING[0])

    assert restored(memory, turn(ASKED, CALLING[1], [result()])) == CALLING[1]
