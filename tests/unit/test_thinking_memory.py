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


def new_memory(store: Any = None, **settings: Any) -> Any:
    return ocp.ThinkingMemory(store or ocp.Store(":memory:"), **settings)


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
    memory = new_memory()
    memory.put(turn(ASKED), "a", said)

    later = turn(ASKED, repeated, [text("Thanks.")])
    again = turn(ASKED, [{**THOUGHT, "signature": "forged"}, *repeated], [text("Thanks.")])

    assert restored(memory, later) == restored(memory, again) == said
    assert contents(later)[1] == repeated, "the client's own message is left alone"
    assert memory.restored(later, "a").messages[1].digest == later.messages[1].digest


@pytest.mark.parametrize("case", ["key", "model", "text", "arguments", "question", "system"])
def test_an_answer_of_another_caller_model_or_conversation_does_not(case: str) -> None:
    memory = new_memory()
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
    memory = new_memory()
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
    memory = new_memory()
    memory.put(turn(ASKED, system="Be kind."), "a", CALLING[0])

    assert restored(memory, turn(before, CALLING[1], [result()])) == CALLING[0]


def test_later_answers_come_back_too() -> None:
    memory = new_memory()
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
    memory = new_memory()
    memory.put(turn(ASKED), "a", said)

    assert restored(memory, turn(ASKED, [text("So.")], ASKED)) == [text("So.")]


def test_what_was_not_used_for_longest_is_forgotten_when_there_is_no_room() -> None:
    memory = new_memory(max_bytes=350)
    answers = [[THOUGHT, call(f"toolu0{number}")] for number in range(3)]
    later = [turn(ASKED, said[1:], [result(said[1]["id"])]) for said in answers]
    memory.put(turn(ASKED), "a", answers[0])
    memory.put(turn(ASKED), "a", answers[1])
    assert restored(memory, later[0]) == answers[0]
    memory.put(turn(ASKED), "a", answers[2])
    memory.put(turn(ASKED), "a", answers[2])

    assert [len(restored(memory, each)) for each in later] == [2, 1, 2]


def test_an_answer_that_is_larger_than_all_room_is_not_kept() -> None:
    memory = new_memory(max_bytes=50)
    memory.put(turn(ASKED), "a", CALLING[0])

    assert restored(memory, turn(ASKED, CALLING[1], [result()])) == CALLING[1]


# -- after a restart ----------------------------------------------------------


@pytest.fixture
def store() -> Any:
    return ocp.Store(":memory:")


def kept(store: Any) -> int:
    """How many digests the database has, once what waits is written."""
    store.write_queued()
    return len(store.rows("SELECT * FROM thinking"))


def put_and_restart(store: Any, asked: Any, said: list[Json]) -> Any:
    """The memory of the next server after this answer."""
    new_memory(store).put(asked, "a", said)
    store.write_queued()
    return new_memory(store)


#: What the model says, with all its thinking, where calls stand between.
TWICE = [THOUGHT, text("Look."), call(), SEALED, call("toolu01b")]


@pytest.mark.parametrize("said", [PLAIN[0], CALLING[0], TWICE], ids=["plain", "calling", "twice"])
def test_the_client_s_copy_is_believed_after_a_restart(store: Any, said: list[Json]) -> None:
    memory = put_and_restart(store, turn(ASKED, system="Be kind."), said)
    # Other words do not matter: what is signed is the thinking.
    later = turn([text("Edited")], [*said, text("More.")], [text("Thanks.")])

    assert restored(memory, later) == [*said, text("More.")]


FORGED = {
    "signature": [{**THOUGHT, "signature": "forged"}, *CALLING[0][1:]],
    "words": [{**THOUGHT, "thinking": "Hm!"}, *CALLING[0][1:]],
    "sealed": [*CALLING[0][:2], {**SEALED, "data": "forged"}, call()],
    "first missing": CALLING[0][1:], "last missing": [THOUGHT, text("Look."), call()],
    "moved": [SEALED, text("Look."), THOUGHT, call()],
    "behind its call": [THOUGHT, text("Look."), call(), SEALED],
    "another call": [*CALLING[0][:3], call("toolu01x")],
    "another block": [*CALLING[0][:3], THOUGHT, call()],
}


@pytest.mark.parametrize("sent", FORGED.values(), ids=FORGED)
def test_other_thinking_is_left_out_after_a_restart(store: Any, sent: list[Json]) -> None:
    memory = put_and_restart(store, turn(ASKED), CALLING[0])

    found = restored(memory, turn(ASKED, sent, [result()]))

    assert found == [block for block in sent if "thinking" not in block["type"]]


@pytest.mark.parametrize("case", ["key", "model", "thinking off"])
def test_thinking_of_others_is_left_out_after_a_restart(store: Any, case: str) -> None:
    memory = put_and_restart(store, turn(ASKED), CALLING[0])
    later = turn(ASKED, CALLING[0], [result()],
                 model=MODELS.find("claude-opus-4-8") if case == "model" else SONNET)
    if case == "thinking off":
        later = later._replace(options=ocp.Options(thinking_tokens=0))

    assert restored(memory, later, "b" if case == "key" else "a") == CALLING[1]


def test_hidden_thinking_is_known_as_the_client_got_it(store: Any) -> None:
    hides = ocp.Options(hides_thinking=True)
    memory = put_and_restart(store, turn(ASKED)._replace(options=hides), CALLING[0])
    sent = [{**THOUGHT, "thinking": ""}, *CALLING[0][1:]]

    for options in (hides, ocp.Options()):
        later = turn(ASKED, sent, [result()])._replace(options=options)
        assert restored(memory, later) == sent


def test_memory_comes_before_the_client_s_copy(store: Any) -> None:
    memory = new_memory(store)
    memory.put(turn(ASKED), "a", PLAIN[0])
    store.write_queued()

    assert restored(memory, turn(ASKED, [THOUGHT, text("So.")], ASKED)) == PLAIN[0]


def test_the_disk_has_no_words_of_it(store: Any) -> None:
    put_and_restart(store, turn(ASKED), CALLING[0])

    [row] = store.rows("SELECT * FROM thinking")
    assert [type(value) for value in row] == [int, bytes, int] and len(row["digest"]) == 16


def test_the_same_answer_is_kept_once(store: Any) -> None:
    for _ in range(3):
        put_and_restart(store, turn(ASKED), CALLING[0])

    assert kept(store) == 1


def test_digests_are_forgotten_when_they_are_old_or_too_many(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1_000_000_000.0
    memory = new_memory(store, clock=lambda: now_s)
    for number in range(4):
        memory.put(turn(ASKED), "a", [THOUGHT, call(f"toolu0{number}")])
        now_s += 86_400
    assert kept(store) == 4

    now_s += 87 * 86_400
    memory.prune()
    assert kept(store) == 3, "the first one is 91 days old"
    monkeypatch.setattr(ocp, "_MAX_THINKING_DIGESTS", 2)
    memory.prune()
    assert kept(store) == 2

    sent = [[THOUGHT, call(f"toolu0{number}")] for number in range(4)]
    found = [restored(new_memory(store), turn(ASKED, each, ASKED)) for each in sent]
    assert [len(each) for each in found] == [1, 1, 2, 2]


def test_nothing_is_believed_while_the_database_cannot_be_read(store: Any) -> None:
    memory = put_and_restart(store, turn(ASKED), CALLING[0])
    store.close()

    assert restored(memory, turn(ASKED, CALLING[0], [result()])) == CALLING[1]
