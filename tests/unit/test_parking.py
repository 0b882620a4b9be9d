"""Parking: which process goes on with which conversation. Processes and time are fakes."""
from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from clock import FakeClock
from project import load_script
from rendering import MODELS, SONNET, assistant, block, user

ocp = load_script("ocp_server.py")

Json = dict[str, Any]


class FakeProcess:
    """A process, as far as parking looks at it."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.login = ocp.SERVER_LOGIN
        self.lives = True
        self.looks = 0
        self.version = ocp.REWINDS_ALL_SINCE
        self.born_s = 0.0
        self.rewinds = 0
        self.stops: list[bool] = []

    def __repr__(self) -> str:
        return f"<process {self.name}>"

    def alive(self) -> bool:
        """Whether it still runs."""
        return self.lives

    def drain_output(self) -> None:
        """Counts how often it was looked after."""
        self.looks += 1

    def set_tap(self, tap: object) -> None:
        self.tap = tap

    def stop(self, *, graceful: bool) -> None:
        """Notes how it was asked to go."""
        self.stops.append(graceful)

    def is_gone(self) -> bool:
        """It ends as soon as it was asked to."""
        return bool(self.stops)


def use(call_id: str = "t1", name: str = "weather", **arguments: object) -> Json:
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def result(call_id: str = "t1", *content: Json, **fields: object) -> Json:
    return {
        "type": "tool_result", "tool_use_id": call_id,
        "content": list(content) or [block("Sunny.")], **fields,
    }


def picture(data: str = "aaaa") -> Json:
    return {"type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": data}}


def context(text: str = "It is noon.") -> Json:
    """What OpenClaw keeps at the end of a conversation."""
    return ocp.ContextBlock(block(
        f"<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\n{text}\n<<<END_OPENCLAW_INTERNAL_CONTEXT>>>"
    ))


ADDRESS = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}


# -- messages that are the same -----------------------------------------------

THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
SAME = {
    "white space around the text": (assistant("Hello"), assistant(" Hello\n")),
    "text in several blocks": (user("a", "b"), user("ab")),
    "thinking": (assistant(THOUGHT, "a"), assistant("a")),
    "redacted thinking": (assistant({"type": "redacted_thinking", "data": "x"}, "a"),
                          assistant("a")),
    "the order of arguments": (assistant(use(a=1, b=2)), assistant(use(b=2, a=1))),
    "an argument that is null": (assistant(use(a=1, b=None)), assistant(use(a=1))),
    "a whole number with a point": (assistant(use(a=1.0, b=[-20.0, 0.5])),
                                    assistant(use(a=1, b=[-20, 0.5]))),
    "text before or after a call": (assistant("a", use()), assistant(use(), "a")),
    "an id without what is no letter": (assistant(use("toolu_1")), assistant(use("toolu1"))),
    "no error, said or not": (user(result(is_error=False)), user(result())),
    "text of a result in several blocks": (
        user(result("t1", block("a"), block("b"))), user(result("t1", block("ab"))),
    ),
    "context that moves to the end": (user("a", context()), user("a")),
    "another such context": (user("a", context("It is one.")), user(context(), "a")),
    "the halves of a character": (user("\ud83d", "\ude00"), user("\U0001f600")),
    "fields that are for caching": (
        user({**block("a"), "cache_control": {"type": "ephemeral"}}), user("a"),
    ),
}


@pytest.mark.parametrize("name", sorted(SAME))
def test_what_clients_write_differently_is_the_same_message(name: str) -> None:
    one, other = SAME[name]

    assert one.digest == other.digest


DIFFERENT = {
    "the text": (user("a"), user("b")),
    "words beside a context": (user("a", block("Look: " + context()["text"])), user("a")),
    "white space within": (user("a b"), user("a  b")),
    "a context that the model has said": (assistant(context("a")), assistant(context("b"))),
    "the role": (user("a"), assistant("a")),
    "a call": (assistant("a"), assistant("a", use())),
    "the id of a call": (assistant(use("t1")), assistant(use("t2"))),
    "the name of a call": (assistant(use("t1", "a")), assistant(use("t1", "b"))),
    "an argument": (assistant(use(a=1)), assistant(use(a=2))),
    "the type of an argument": (assistant(use(a=1)), assistant(use(a="1"))),
    "a number or its text": (assistant(use(a=1.0)), assistant(use(a="1.0"))),
    "null in a list": (assistant(use(a=[None])), assistant(use(a=[]))),
    "a fraction": (assistant(use(a=1.05)), assistant(use(a=1))),
    "a text with a number": (assistant(use(a="1.0", b=2.0)), assistant(use(a="1", b=2))),
    "the order of calls": (assistant(use("t1"), use("t2")), assistant(use("t2"), use("t1"))),
    "a result": (user(result("t1", block("a"))), user(result("t1", block("b")))),
    "an error": (user(result(is_error=True)), user(result())),
    "the result's call": (user(result("t1")), user(result("t2"))),
    "an image": (user(picture("aaaa")), user(picture("bbbb"))),
    "an image or none": (user("a", picture()), user("a")),
    "an image in a result": (user(result("t1", picture())), user(result("t1", picture("bb")))),
    "an address or data": (user(ADDRESS), user(picture())),
    "where a result ends": (user(result("t1", block("a")), result("t2", block("b"))),
                            user(result("t1", block("a"), result("t2", block("b"))))),
    "text or a call that reads alike": (assistant("tool_use t1 weather {}"), assistant(use())),
}


@pytest.mark.parametrize("name", sorted(DIFFERENT))
def test_what_means_something_else_is_another_message(name: str) -> None:
    one, other = DIFFERENT[name]

    assert one.digest != other.digest


def test_a_digest_leaves_its_message_alone() -> None:
    message = assistant(THOUGHT, " a ", use("t_1", b=2, a=1))
    before = copy.deepcopy(message)

    assert message.digest

    assert message == before


@pytest.mark.parametrize("text", ["\ud83d", "\u00e9", "\u2028", "\x00"])
def test_any_text_has_a_digest(text: str) -> None:
    assert len(user(text).digest) == 64


# -- what a conversation is known by ------------------------------------------

WEATHER = ocp.Tool("weather", "Tells it.", {"type": "object", "properties": {}})


def turn(*messages: Any, **fields: Any) -> Any:
    """A Turn with these messages, or with one from the user."""
    return ocp.Turn(
        **{"model": SONNET, "messages": list(messages) or [user("Hello")],
           "options": ocp.Options(), **fields}
    )


def known(asked: Any, caller: str = "local", operator: str = "") -> Any:
    return ocp.history_of(asked, caller, operator)


CHANGES: dict[str, Json] = {
    "the model": {"model": MODELS.find("opus")},
    "the system prompt": {"system": "Be brief."},
    "a tool": {"tools": (WEATHER,)},
    "a tool's description": {"tools": (WEATHER._replace(description=""),)},
    "a tool's schema": {"tools": (WEATHER._replace(schema={"type": "object"}),)},
    "the choice of a tool": {"tool_choice": ocp.ToolChoice("any")},
    "calls side by side": {"tool_choice": ocp.ToolChoice(parallel=False)},
    "a shape": {"output_schema": ocp.OutputSchema({"type": "object"}, wrapped=False)},
    "the limit": {"options": ocp.Options(max_tokens=7)},
    "a stop sequence": {"options": ocp.Options(stop_sequences=("END",))},
    "sampling": {"options": ocp.Options(sampling=(("temperature", 0.5),))},
    "the effort": {"options": ocp.Options(effort="low")},
    "thinking": {"options": ocp.Options(thinking_tokens=0)},
    "no thinking in the body": {"options": ocp.Options(thinking_type="disabled")},
    "thinking that is not shown": {"options": ocp.Options(hides_thinking=True)},
    "fast mode": {"options": ocp.Options(fast_mode=True)},
}


def test_every_setting_of_a_request_makes_another_conversation() -> None:
    bases = {known(turn(**change)).base for change in CHANGES.values()}

    assert len(bases | {known(turn()).base}) == len(CHANGES) + 1


def test_every_option_is_among_them() -> None:
    changed = {
        name for change in CHANGES.values() if "options" in change
        for name, value in change["options"]._asdict().items()
        if value != getattr(ocp.Options(), name)
    }

    assert changed == set(ocp.Options._fields)


def test_callers_and_the_operator_s_prompt_make_another_conversation() -> None:
    bases = {known(turn(), caller, operator).base
             for caller in ("local", "shared") for operator in ("", "Be kind.")}

    assert len(bases) == 4


@pytest.mark.parametrize(
    "change",
    [{"stream": True}, {"ignored": ("seed",)}, {"session_id": "s1"}, {"reply_format": "x"},
     {"choices": 2}, {"cache_lifetime": "5m"}],
    ids=str,
)
def test_how_an_answer_is_delivered_makes_no_difference(change: Json) -> None:
    assert known(turn(**change)) == known(turn())


def test_a_conversation_has_a_digest_of_each_message() -> None:
    messages = [user("a"), assistant("b"), user("c")]

    found = known(turn(*messages))

    assert found.digests == tuple(message.digest for message in messages)
    assert found.base == known(turn()).base


# -- whether a parked process takes a message ---------------------------------


def points_of(*messages: Any) -> Any:
    """Where a process that was told these messages can be rewound to."""
    told = ocp.message_steps(turn(*messages, user("")), ocp.REWINDS_ALL_SINCE, b"")
    return told[1][:-1]


def parked(*messages: Any, awaiting: tuple[str, ...] = (), **fields: Any) -> Any:
    """A parked conversation of these messages."""
    return ocp.Conversation(known(turn(*messages, **fields)), frozenset(awaiting))


def takes(held: Any, *messages: Any, **fields: Any) -> bool:
    return bool(held.can_continue(known(turn(*messages, **fields)), messages[-1]))


SAID = (user("a"), assistant("b"))


def test_the_next_message_is_taken() -> None:
    assert takes(parked(*SAID), *SAID, user("c"))


@pytest.mark.parametrize(
    "messages",
    [
        (user("a"),),
        SAID,
        (*SAID, user("c"), assistant("d"), user("e")),
        (user("A"), assistant("b"), user("c")),
        (user("a"), assistant("B"), user("c")),
        (user("c"),),
        (*SAID, user(result("t1"))),
    ],
    ids=["less", "the same", "more than one new", "another start", "another answer",
         "something else", "a result that was not asked for"],
)
def test_anything_else_is_not(messages: tuple[Any, ...]) -> None:
    assert not takes(parked(*SAID), *messages)


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_nothing_is_taken_under_other_settings(name: str) -> None:
    assert not takes(parked(*SAID), *SAID, user("c"), **CHANGES[name])
    assert not takes(parked(*SAID, **CHANGES[name]), *SAID, user("c"))


CALLED = (user("a"), assistant(use("t1"), use("t2")))


@pytest.mark.parametrize(
    ("content", "taken"),
    [
        ((result("t1"), result("t2")), True),
        ((result("t2"), result("t1")), True),
        ((result("t1", picture()), result("t2", is_error=True)), True),
        ((result("t1"),), False),
        ((result("t1"), result("t2"), result("t3")), False),
        ((result("t1"), result("t2"), "And then?"), False),
        ((result("t1"), result("t2"), context()), True),
        ((result("t1"), result("t2"), context(), "And then?"), False),
        ((result("t1"), result("t1"), result("t2")), False),
        ((result("t1"), result("t2", ADDRESS)), False),
        ((result("t1"), result("t2", {"type": "document", "source": {}})), False),
        (("Never mind.",), False),
    ],
)
def test_waiting_calls_take_their_results_all_at_once_and_alone(
    content: tuple[Any, ...], taken: bool
) -> None:
    held = parked(*CALLED, awaiting=("t1", "t2"))

    assert takes(held, *CALLED, user(*content)) is taken


def answer(*content: Any) -> Any:
    """An answer of these blocks."""
    blocks = assistant(*content).content
    return ocp.Answer("msg", SONNET.id, blocks, "", "end_turn", None, ocp.NO_USAGE)


def test_a_conversation_goes_on_with_its_answer() -> None:
    points = points_of(user("a"))
    asked = ocp.Conversation(known(turn(user("a"))), rewind_points=points, messages_given=3)

    held = asked.after(answer("b"), asked.history, is_dead_end=False)

    assert held == asked._replace(history=known(turn(*SAID)))
    assert takes(held, *SAID, user("c"))


def test_after_calls_a_conversation_waits_for_their_results() -> None:
    asked = ocp.Conversation(known(turn(user("a"))))

    held = asked.after(answer(use("t1"), use("t2")), asked.history, is_dead_end=False)

    assert held.awaiting == {"t1", "t2"}
    assert takes(held, *CALLED, user(result("t1"), result("t2")))


def test_nothing_goes_on_from_a_dead_end() -> None:
    asked = ocp.Conversation(known(turn(user("a"))))

    held = asked.after(answer("b"), asked.history, is_dead_end=True)

    assert held.is_dead_end and not asked.is_dead_end
    assert not takes(held, *SAID, user("c"))


def test_context_is_told_with_a_result_unless_it_is_known() -> None:
    message = user(result("t1"), result("t2"), context("It is one."))

    assert ocp.results_with_context(message, context("It is one.")["text"]) == message.content[:2]
    first, last = ocp.results_with_context(message, context("It is noon.")["text"])
    assert first == result("t1")
    assert last == result("t2", block("Sunny."), context("It is one."))
    assert message == user(result("t1"), result("t2"), context("It is one."))


def test_a_result_that_context_would_make_too_long_is_not_taken() -> None:
    long = result("t2", block("x" * ocp.MAX_RESULT_CHARS))
    held = parked(*CALLED, awaiting=("t1", "t2"))

    assert takes(held, *CALLED, user(result("t1"), long))
    assert not takes(held, *CALLED, user(result("t1"), long, context()))


@pytest.mark.parametrize(
    ("messages", "count"),
    [((user("x"),), 0), (SAID[:1], 1), (SAID, 2), ((*SAID, user("c")), 2),
     ((user("a"), assistant("x")), 1)],
)
def test_what_two_conversations_share_is_their_beginning(
    messages: tuple[Any, ...], count: int
) -> None:
    assert parked(*SAID).common_prefix(known(turn(*messages))) == count


# -- the parking --------------------------------------------------------------


class Lot:
    """A pool with a clock, in which processes are parked."""

    def __init__(self, **settings: object) -> None:
        self.clock = FakeClock()
        self.pool = ocp.ProcessPool(FakeProcess, self.clock)
        self.config = dataclasses.replace(ocp.Config(), **settings)
        #: Every process that was parked, in this order.
        self.processes: list[FakeProcess] = []

    def put(self, *messages: Any, awaiting: tuple[str, ...] = (), name: str = "",
            caller: str = "local", given: int = 0, **fields: Any) -> FakeProcess:
        """Parks a process with this conversation."""
        process = FakeProcess(name)
        process.born_s = self.clock.now_s
        held = known(turn(*messages, **fields), caller)
        points = points_of(*messages)
        self.park(process, ocp.Conversation(held, frozenset(awaiting), points, given))
        return process

    def put_dead_end(self, process: FakeProcess, asked: Any) -> None:
        """Parks a process that has answered in a form from which nothing continues."""
        held = asked._replace(digests=(*asked.digests, ""))
        self.park(process, ocp.Conversation(held, rewind_points=points_of(user("a"))))

    def park(self, process: FakeProcess, conversation: Any) -> None:
        self.processes.append(process)
        self.pool.park(process, conversation)

    def take_rewindable(
        self, *messages: Any, caller: str = "local", running: int = 1,
        others: Mapping[str, int] = MappingProxyType({}), **fields: Any
    ) -> Any:
        """The process that would have to forget its last question for this conversation, while so
        many requests of its caller run, itself included, and those of others."""
        asked = known(turn(*messages, **fields), caller)
        pooled = self.pool.take_rewindable(asked, self.config, {**others, caller: running})
        return pooled and pooled.process

    def take(self, *messages: Any, caller: str = "local", **fields: Any) -> Any:
        """The process for this conversation, or the index at which the nearest one parts."""
        asked = turn(*messages, **fields)
        history = known(asked, caller)
        pooled = self.pool.take(history, asked.messages[-1])
        return (pooled.process, None) if pooled else (None, self.pool.common_prefix(history))

    def tend(self, after_s: float = 0.0) -> list[FakeProcess]:
        """Lets time pass; what leaves."""
        self.clock.advance(after_s)
        before = self.stopped()
        self.pool.tend(self.config)
        return [process for process in self.stopped() if process not in before]

    def stopped(self) -> list[FakeProcess]:
        """The processes that were stopped. All of them were interrupted."""
        stopped = [process for process in self.processes if process.stops]
        assert all(process.stops == [False] for process in stopped)
        return stopped


def test_a_parking_begins_empty() -> None:
    lot = Lot()

    assert (lot.pool.parked, repr(lot.pool)) == (0, "<pool no spares parked=0 stopping=0>")
    assert lot.take(*SAID, user("c")) == (None, None)


def test_a_process_is_taken_once() -> None:
    lot = Lot()
    process = lot.put(*SAID)

    assert lot.take(*SAID, user("c")) == (process, None)
    assert lot.take(*SAID, user("c")) == (None, None)
    assert lot.pool.parked == 0


def test_of_two_processes_the_one_parked_last_is_taken_first() -> None:
    lot = Lot()
    first, second = lot.put(*SAID), lot.put(*SAID)

    assert [lot.take(*SAID, user("c"))[0] for _ in range(3)] == [second, first, None]


def test_a_process_that_died_is_not_taken() -> None:
    lot = Lot()
    alive, dead = lot.put(*SAID), lot.put(*SAID)
    dead.lives = False

    assert lot.take(*SAID, user("c")) == (alive, None)


def test_nobody_takes_another_caller_s_process() -> None:
    lot = Lot()
    lot.put(*SAID, caller="somebody")

    assert lot.take(*SAID, user("c")) == (None, None)
    assert lot.pool.parked == 1


def test_the_place_where_the_nearest_conversation_parts_is_told() -> None:
    lot = Lot()
    lot.put(user("x"), assistant("y"))
    lot.put(*SAID, user("c"), assistant("d"))
    lot.put(*SAID)

    assert lot.take(*SAID, user("c"), assistant("D"), user("e")) == (None, 3)
    assert lot.take(user("z")) == (None, None)


def test_looking_for_a_process_that_is_not_there_changes_nothing() -> None:
    lot = Lot()
    process = lot.put(*SAID)

    for messages in ((user("z"),), SAID, (*SAID, user("c"), assistant("d"), user("e"))):
        assert lot.take(*messages)[0] is None

    assert lot.take(*SAID, user("c"))[0] is process


def test_tending_looks_after_each_process_and_keeps_it() -> None:
    lot = Lot()
    processes = [lot.put(*SAID), lot.put(user("x"), assistant("y"))]

    assert lot.tend(after_s=10) == []
    assert [process.looks for process in processes] == [1, 1]
    assert lot.pool.parked == 2


def test_a_process_whose_time_is_up_leaves() -> None:
    lot = Lot(session_ttl_ms=60_000)
    old = lot.put(*SAID)
    lot.clock.advance(30)
    lot.put(*SAID)

    assert (lot.tend(after_s=30), lot.tend(after_s=1)) == ([], [old])
    assert lot.pool.parked == 1


def test_a_process_that_died_leaves() -> None:
    lot = Lot()
    dead, _ = lot.put(*SAID), lot.put(*SAID)
    dead.lives = False

    assert lot.tend() == [dead]


@pytest.mark.parametrize("most", [0, 1, 2])
def test_of_too_many_the_oldest_leave(most: int) -> None:
    lot = Lot(parked_processes=most)
    processes = [lot.put(*SAID) for _ in range(3)]

    assert lot.tend() == processes[: 3 - most]
    assert lot.pool.parked == most


def test_the_dead_take_nobody_s_place() -> None:
    lot = Lot(parked_processes=1)
    alive, dead = lot.put(*SAID), lot.put(*SAID)
    dead.lives = False

    assert lot.tend() == [dead]
    assert lot.take(*SAID, user("c"))[0] is alive


LATER = (*SAID, user("c"), assistant("d"))


@pytest.mark.parametrize(
    "messages", [(*SAID, user("C")), (*SAID, user("c")), (*SAID, user("c", picture()))],
    ids=["another question", "the same again", "more in it"])
def test_another_last_question_is_for_the_process_that_can_forget_its_own(
    messages: tuple[Any, ...]
) -> None:
    lot = Lot()
    process = lot.put(*LATER)

    assert lot.take(*messages)[0] is None
    assert lot.take_rewindable(*messages) is process
    assert lot.pool.parked == 0


def talk(*names: str) -> tuple[Any, ...]:
    """A conversation of questions and answers; the last question has none."""
    told = [each for name in names for each in (user(f"q {name}"), assistant(f"a {name}"))]
    return tuple(told[:-1])


FIVE = (*talk(*"12345"), assistant("a 5"))
#: What somebody asks whose conversation was these five questions, and how many are dropped.
EDITS: dict[str, tuple[tuple[Any, ...], int]] = {
    "the last one": (talk(*"1234x"), 1),
    "the last one again": (talk(*"12345"), 1),
    "the third one": (talk(*"12x"), 3),
    "the third one of all": (talk(*"12x456"), 3),
    "the third answer": ((*talk(*"123"), assistant("x"), *talk(*"45")), 3),
    "the first one of all": (talk(*"x23456"), 5),
    "another conversation": (talk("x"), 5),
    "the beginning": (talk("1"), 5),
    "a question without its answer": ((user("q 1"), user("x")), 5),
    "it went on elsewhere": (talk(*"1234567"), 0),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_process_drops_the_questions_from_an_edit_on_the_last_one_first(name: str) -> None:
    messages, count = EDITS[name]
    held, asked = parked(*FIVE), known(turn(*messages))
    held = held._replace(rewind_points=points_of(*FIVE))

    dropped = held.dropped_for(asked, ocp.REWINDS_ALL_SINCE)
    assert dropped == held.rewind_points[::-1][:count]
    # An older claude keeps the first question.
    expected = dropped if count < 5 else None
    assert held.dropped_for(asked, ocp.OLDEST_CLAUDE) == expected
    left = held.rewound(dropped)
    assert left.rewind_points == held.rewind_points[:5 - count]
    assert left.history.digests == asked.digests[:10 - 2 * count]


def test_a_process_drops_eight_questions_and_no_more() -> None:
    for count in (8, 9):
        names = [str(number) for number in range(count)]
        lot = Lot(parked_processes=0)
        process = lot.put(*talk(*names), assistant("x"))
        assert lot.take_rewindable(user("b")) is (process if count == 8 else None)


def test_of_several_that_can_drop_questions_the_one_that_keeps_most_is_taken() -> None:
    for size, given in ((9, 0), (0, 9)):
        lot = Lot(parked_processes=size)
        processes = [
            lot.put(*talk(*names), assistant("x"), given=given) for names in ("1yz", "123", "12x")]
        lot.put(*talk(*"12xyz"), assistant("x"), caller="somebody", given=given)

        assert lot.take_rewindable(*talk(*"1234")) is processes[1]
        assert lot.take_rewindable(*talk(*"1234")) is processes[2]


def test_an_opening_that_was_put_before_a_greeting_is_dropped_with_it() -> None:
    lot = Lot(parked_processes=0)
    process = lot.put(assistant("Welcome!"), user("a"), assistant("b"))

    assert [point.message_index for point in points_of(assistant("Welcome!"), user("a"))] == [0, 1]
    assert lot.take_rewindable(user("z")) is process


def test_waiting_calls_and_told_results_are_never_forgotten() -> None:
    lot = Lot(parked_processes=0)
    lot.put(*CALLED, awaiting=("t1", "t2"))

    assert lot.take_rewindable(user("b")) is None
    assert lot.take_rewindable(*CALLED, user("Never mind.")) is None
    told = (*CALLED, user(result("t1"), result("t2"), "And?"), assistant("Sunny."))
    process = lot.put(*told)
    # No question is where the results are: the one that led to them is dropped too.
    assert [point.message_index for point in points_of(*told)] == [0]
    assert lot.take_rewindable(*CALLED, user("Never mind.")) is process


def test_a_process_forgets_for_its_caller_and_its_settings_only() -> None:
    lot = Lot(parked_processes=0)
    process = lot.put(*SAID)

    assert lot.take_rewindable(user("b"), caller="somebody") is None
    for fields in CHANGES.values():
        assert lot.take_rewindable(user("b"), **fields) is None
    assert lot.take_rewindable(user("b")) is process


@pytest.mark.parametrize(
    ("parked_now", "running", "taken"),
    [(1, 1, False), (2, 1, False), (3, 1, True), (2, 2, True), (1, 3, True), (0, 9, False)])
def test_for_a_conversation_of_its_own_only_who_would_be_pushed_out_forgets(
    parked_now: int, running: int, taken: bool
) -> None:
    lot = Lot(parked_processes=3)
    for name in "xyz"[:parked_now]:
        lot.put(user(name), assistant("ok"))

    assert (lot.take_rewindable(user("new"), running=running) is not None) is taken


def test_nobody_forgets_in_the_place_of_another_that_would_be_pushed_out() -> None:
    lot = Lot(parked_processes=3)
    lot.put(user("x"), assistant("ok"), awaiting=("t1",))
    processes = [lot.put(user(name), assistant("ok")) for name in "xy"]

    assert lot.take_rewindable(user("new")) is None
    assert lot.take_rewindable(user("new"), running=2) is processes[0]


def test_what_no_conversation_goes_on_from_forgets_at_once() -> None:
    lot = Lot(parked_processes=9)
    process = lot.put(user("a"), assistant("b"))
    ended = FakeProcess()
    lot.put_dead_end(ended, known(turn(user("a"))))

    assert lot.take(*SAID, user("c"))[0] is process
    assert lot.take_rewindable(user("new")) is ended


def test_the_same_first_question_of_somebody_else_leaves_a_conversation_alone() -> None:
    lot = Lot(parked_processes=5)
    processes = [lot.put(user(name), assistant("ok")) for name in "xyzz"]

    assert lot.take_rewindable(user("z")) is None
    assert lot.take_rewindable(user("z"), running=2) is processes[0]


def test_another_answer_to_the_same_first_question_leaves_a_conversation_alone() -> None:
    lot = Lot()
    process = lot.put(*FIVE)
    other = (user("q 1"), assistant("x"), user("q 2"))

    assert lot.take_rewindable(*other) is None
    # An answer that was edited later tells which conversation it is.
    assert lot.take_rewindable(*talk("1"), assistant("a 1"), user("q 2"), *other[1:]) is process


def test_what_was_at_work_when_all_were_dropped_forgets_nothing() -> None:
    lot = Lot()
    lot.clock.advance(1)
    lot.pool.drop()
    old = lot.put(*LATER)
    old.born_s -= 1
    assert lot.pool.parked == 1

    assert lot.take_rewindable(*SAID, user("e")) is None
    assert lot.take(*LATER, user("e"))[0] is old


def test_conversations_that_begin_with_the_same_examples_do_not_take_from_each_other() -> None:
    lot = Lot(parked_processes=2)
    process = lot.put(*LATER, given=len(SAID))

    assert lot.take_rewindable(*SAID, user("e")) is None
    assert lot.take_rewindable(*SAID, user("e"), running=2) is process
    lot.put(*LATER, given=len(SAID))
    # The same again, and another question behind one that was asked here, need no reason.
    assert lot.take_rewindable(*SAID, user("c")) is not None
    longer = lot.put(*LATER, user("e"), assistant("f"), given=len(SAID))
    assert lot.take_rewindable(*LATER, user("g")) is longer


def test_what_no_conversation_goes_on_from_pushes_out_one_conversation_at_most() -> None:
    lot = Lot(parked_processes=3)
    going_on = [lot.put(user(name), assistant("ok")) for name in "xyz"]
    ended = [FakeProcess(f"ended {number}") for number in range(4)]
    gone = []
    for process in ended:
        lot.put_dead_end(process, known(turn(user(process.name), system=process.name)))
        gone += lot.tend()

    assert gone == [going_on[0], *ended[:3]]


def test_a_process_that_forgot_its_question_goes_on_from_what_was_before() -> None:
    points = (ocp.RewindPoint("p", 0), ocp.RewindPoint("q", 2))
    held = parked(*LATER)._replace(rewind_points=points, messages_given=1)
    left = held.rewound(points[1:])

    assert takes(left, *SAID, user("e")) and not takes(left, *LATER, user("e"))
    assert (left.rewind_points, left.awaiting, left.messages_given) == (
        points[:1], frozenset(), 1)
    nothing = held.rewound(points[::-1])
    assert takes(nothing, user("z")) and not takes(nothing, *SAID, user("z"))
    assert nothing.rewind_points == () and held.rewound(()) is held


@pytest.mark.parametrize(("given", "later"), [(0, 0), (1, 1), (2, 6), (3, 6)])
def test_what_is_told_anew_counts_as_given_unless_a_first_question_is_left(
    given: int, later: int
) -> None:
    left = parked(*SAID)._replace(rewind_points=points_of(*SAID), messages_given=given)
    asked = known(turn(*LATER, user("e"), assistant("f"), user("g")))
    more = (ocp.RewindPoint("c", 2), ocp.RewindPoint("e", 4))

    held = left.with_history_of(asked, more, "5m")

    assert held.history.digests == asked.digests[:-1]
    assert held.rewind_points == (*left.rewind_points, *more)
    assert (held.messages_given, held.cache_lifetime) == (later, "5m")


# -- one parking, many callers ------------------------------------------------


class Parked(NamedTuple):
    """What is parked, what is at work, and who has to leave."""

    #: In the order in which they were parked: a letter for the caller, then a number; `!` = a dead
    #: end; and how long ago in seconds, if it is not 1.
    parked: str
    most: int
    leave: str
    #: A letter for each request that will park a process.
    running: str = ""


SHARES = {
    "all fit": Parked("a1 b1 c1", 3, ""),
    "one caller may have all places": Parked("a1 a2 a3 a4", 4, ""),
    "the oldest of an only caller": Parked("a1 a2 a3 a4", 2, "a1 a2"),
    "the oldest of who has the most": Parked("b1 a1 a2 a3", 3, "a1"),
    "a busy caller never pushes out another": Parked("b1 c1 a1 a2 a3 a4 a5", 4, "a1 a2 a3"),
    "down to equal shares, then the last ones": Parked("a1 a2 a3 b1 b2 c1", 3, "a1 b1 a2"),
    "none may stay": Parked("a1 b1 c1", 0, "c1 b1 a1"),
    "dead ends first": Parked("a1 a2! a3", 2, "a2!"),
    "the last dead end may stay": Parked("a1 a2! a3!", 2, "a2!"),
    "a dead end of another is safe": Parked("b1! a1 a2", 2, "a1"),
    "of those with as many, the one that came last": Parked("a1 b1 c1 d1 e1", 4, "e1"),
    "of those with as many, the one that is away": Parked("b1:90 c1:70 a1:9 d1 e1", 4, "b1"),
    "who is away the longest goes first": Parked("b1:90 a1:70 c1 d1", 2, "b1 a1"),
    "away or not, the most first": Parked("a1:90 b1 b2", 2, "b1"),
    "its own, for who comes back": Parked("a1 b1", 2, "a1", running="a"),
    "its own, though another has as many": Parked("a1 b1 b2", 3, "a1", running="a"),
    "nobody's, while there is room": Parked("a1 b1", 3, "", running="a"),
    "a caller at work pushes out nobody": Parked("a1 b1", 2, "", running="c"),
    "many at work push out none but their own": Parked("a1 b1 c1", 3, "c1", running="cccccccc"),
    "who is away makes room for who is at work": Parked("a1:90 b1", 2, "a1", running="c"),
    "everybody at work": Parked("a1 b1 c1 d1", 4, "a1 b1 c1 d1", running="abcd"),
}


def lot_of(words: str) -> dict[str, Any]:
    """Parked processes by their short names; the time is 1000."""
    found = {}
    for word in words.split():
        name, _, age_s = word.partition(":")
        last = "" if "!" in name else "answer"
        held = ocp.History("base", ("question", last), "", name[0])
        found[name] = ocp.PooledProcess(
            FakeProcess(name), ocp.ProcessState.PARKED, 1000.0 - float(age_s or 1),
            ocp.Conversation(held))
    return found


def leaving(case: Parked) -> list[str]:
    """The names of those that leave, in their order."""
    parked, running = lot_of(case.parked), {each: case.running.count(each) for each in case.running}
    found = ocp.evicted_by_limit(list(parked.values()), case.most, 1000.0, running=running)
    return [pooled.process.name for pooled in found]


@pytest.mark.parametrize("case", SHARES.values(), ids=SHARES)
def test_the_shares_of_callers(case: Parked) -> None:
    assert leaving(case) == case.leave.split()


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_parked_the_shares_are_fair(seed: int) -> None:
    source = random.Random(seed)
    for _ in range(50):
        callers = "abcdefgh"[:source.randint(1, 8)]
        words = [f"{source.choice(callers)}{number}{source.choice(['', '', '!'])}"
                 for number in range(source.randint(0, 20))]
        most = source.randint(0, 12)

        left = leaving(Parked(" ".join(words), most, ""))

        stay = [word for word in words if word not in left]
        counts = {caller: sum(word[0] == caller for word in stay) for caller in callers}
        assert len(stay) == min(most, len(words))
        # Nobody had to leave whose caller has less than one that kept all it has.
        assert all(counts[word[0]] >= max(counts.values()) - 1 for word in left)


def test_one_busy_caller_leaves_the_conversations_of_all_others_alone() -> None:
    lot = Lot(parked_processes=4)
    quiet = {name: lot.put(*SAID, caller=name) for name in ("ann", "bob", "cid")}
    gone: list[FakeProcess] = []
    for number in range(20):
        lot.put(user(f"{number}"), assistant("ok"), caller="busy")
        gone += lot.tend(after_s=0.1)

    assert len(gone) == 19 and not set(gone) & set(quiet.values())
    for name, process in quiet.items():
        assert lot.take(*SAID, user("c"), caller=name)[0] is process


def test_with_more_callers_than_places_those_that_have_one_go_on() -> None:
    lot = Lot(parked_processes=4)
    continued = 0
    for _ in range(10):
        for caller in ("ann", "bob", "cid", "dan", "eve"):
            continued += lot.take(*SAID, user("c"), caller=caller)[0] is not None
            lot.put(*SAID, caller=caller)
            lot.tend(after_s=1)

    assert continued == 4 * 9


def test_who_is_away_loses_the_place_to_who_is_not() -> None:
    lot = Lot(parked_processes=1)
    away = lot.put(*SAID, caller="ann")
    first = lot.put(*SAID, caller="bob")
    gone = lot.tend()
    lot.clock.advance(61)
    lot.put(*SAID, caller="bob")

    assert (gone, lot.tend()) == ([first], [away])


def test_a_full_parking_makes_a_caller_s_own_process_forget_and_nobody_else_s() -> None:
    lot = Lot(parked_processes=4)
    processes = {name: lot.put(user("x"), assistant("ok"), caller=name) for name in "abcd"}

    assert lot.take_rewindable(user("new"), caller="e", others=dict.fromkeys("abcd", 1)) is None
    assert lot.take_rewindable(user("new"), caller="b") is processes["b"]
    # There is room for both of b's from here on.
    lot.put(user("x"), assistant("ok"), caller="b")
    lot.config = dataclasses.replace(lot.config, parked_processes=5)
    assert lot.take_rewindable(user("new"), caller="b") is None


def test_old_processes_and_old_versions_do_not_forget_everything() -> None:
    lot = Lot(parked_processes=0, session_ttl_ms=60_000)
    for version, after_s in ((ocp.OLDEST_CLAUDE, 0), (ocp.REWINDS_ALL_SINCE, 61)):
        lot.put(*SAID).version = version
        lot.clock.advance(after_s)
        assert lot.take_rewindable(user("new")) is None


def test_a_process_forgets_so_often_and_no_more() -> None:
    lot = Lot(parked_processes=0)
    process = lot.put(*LATER)
    process.rewinds = 500

    assert lot.take_rewindable(*SAID, user("e")) is None
    process.rewinds = 499
    assert lot.take_rewindable(*SAID, user("e")) is process


def test_after_one_that_could_not_forget_none_is_asked_to_for_a_while() -> None:
    lot = Lot()
    process = lot.put(*LATER)
    lot.pool.pause_rewinds(60)

    assert lot.take_rewindable(*SAID, user("e")) is None
    lot.clock.advance(61)
    assert lot.take_rewindable(*SAID, user("e")) is process


def test_dropping_lets_all_of_them_go() -> None:
    lot = Lot()
    processes = [lot.put(*SAID), lot.put(*SAID)]

    lot.pool.drop()
    lot.pool.drop()

    assert (lot.pool.parked, lot.stopped()) == (0, processes)


# -- whatever is asked, a process only goes on with its own conversation ------


class Asked(NamedTuple):
    """Everything that a process may depend on, in plain values."""

    caller: str
    settings: str
    #: (role, text or ids of calls or results) of each message.
    messages: tuple[tuple[str, tuple[str, ...]], ...]


SETTINGS: dict[str, Json] = {"": {}, **{name: CHANGES[name] for name in sorted(CHANGES)}}


def message_of(said: tuple[str, tuple[str, ...]]) -> Any:
    role, parts = said
    content = [
        use(part[1:]) if part.startswith("!") else
        result(part[1:]) if part.startswith("?") else block(part)
        for part in parts
    ]
    return ocp.Message(role, content)


def random_answer(source: random.Random) -> tuple[str, tuple[str, ...]]:
    if source.random() < 0.3:
        return "assistant", tuple(source.sample(("!t1", "!t2", "!t3"), source.randint(1, 2)))
    return "assistant", (source.choice("xy"),)


def random_question(
    source: random.Random, answer: tuple[str, tuple[str, ...]] | None
) -> tuple[str, tuple[str, ...]]:
    """The user's next message: the results that were asked for, as a rule, else a text."""
    calls = [part[1:] for part in answer[1] if part.startswith("!")] if answer else []
    if calls and source.random() < 0.85:
        more = [source.choice("ab")] if source.random() < 0.2 else []
        return "user", (*(f"?{call_id}" for call_id in calls), *more)
    return "user", (source.choice("ab"),)


def random_asked(source: random.Random, earlier: list[Asked]) -> Asked:
    """A request: new, or one of before gone on with, repeated, or edited somewhere."""
    caller = source.choice(("one", "two"))
    settings = source.choice(("", "", "", *SETTINGS))
    if not earlier or source.random() < 0.2:
        return Asked(caller, settings, (random_question(source, None),))
    past = source.choice(earlier[-6:])
    messages = list(past.messages)
    if source.random() < 0.2:
        place = source.randrange(len(messages))
        role = messages[place][0]
        messages[place] = random_answer(source) if role == "assistant" else (role, ("c",))
    if source.random() < 0.15:
        messages = messages[: 2 * source.randint(1, (len(messages) + 1) // 2)]
    if messages[-1][0] == "assistant":
        messages.append(random_question(source, messages[-1]))
    keep = source.random() < 0.8
    return Asked(past.caller if keep else caller, past.settings if keep else settings,
                 tuple(messages))


def may_go_on(held: Asked, asked: Asked) -> bool:
    """The rule: the same in everything, and exactly one message more, of the kind it awaits."""
    if held[:2] != asked[:2] or held.messages != asked.messages[:-1]:
        return False
    awaited = {part[1:] for part in held.messages[-1][1] if part.startswith("!")}
    parts = asked.messages[-1][1]
    results = {part[1:] for part in parts if part.startswith("?")}
    return results == awaited and (not awaited or len(parts) == len(awaited))


def checked_take(lot: Lot, holds: dict[FakeProcess, Asked], asked: Asked) -> bool:
    """Takes a process and holds that against the rule; whether there was one."""
    request = turn(*map(message_of, asked.messages), **SETTINGS[asked.settings])
    history = known(request, asked.caller)
    before = copy.deepcopy(request.messages)
    process, parted_at = lot.take(
        *request.messages, caller=asked.caller, **SETTINGS[asked.settings]
    )

    fitting = [process for process, held in holds.items() if may_go_on(held, asked)]
    assert request.messages == before and history == known(request, asked.caller)
    assert (process is None) == (not fitting)
    assert parted_at is None or 0 < parted_at < len(asked.messages) + 1
    if process is not None:
        assert process in fitting
        del holds[process]
    assert lot.pool.parked == len(holds)
    return process is not None


@pytest.mark.parametrize("seed", range(12))
def test_a_process_goes_on_with_its_own_conversation_only(seed: int) -> None:
    source = random.Random(seed)
    lot = Lot()
    holds: dict[FakeProcess, Asked] = {}
    earlier: list[Asked] = []
    taken = 0

    for _ in range(80):
        asked = random_asked(source, earlier)
        taken += checked_take(lot, holds, asked)
        whole = asked._replace(messages=(*asked.messages, random_answer(source)))
        earlier.append(whole)
        if source.random() < 0.8:
            calls = tuple(p[1:] for p in whole.messages[-1][1] if p.startswith("!"))
            process = lot.put(
                *map(message_of, whole.messages), awaiting=calls, caller=whole.caller,
                **SETTINGS[whole.settings],
            )
            holds[process] = whole

    assert taken > 5
