"""Clients that leave while the real claude answers: one request reaches the API, and the next one
shows nothing of it, whether its process forgot the question or ended."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import stub_api as stub
from conversation import Conversation, path_of
from depth import by_depth, rest
from dialects import CHAT, Result, Tool
from raw_http import RawConnection, post
from rig import MODEL, Rig, assistant, claude_pids, user, wait_until
from upstream import turns

Json = Any

RIG_SETTINGS = {
    "CLAUDE_MAX_RETRIES": "1"}
WEATHER = Tool("weather")
ARGUMENTS = {"city": "a city with a long name"}

#: What the API sends while the client leaves.
MOMENTS: dict[str, stub.Reply] = {
    "in the text": stub.hang("Half ", seconds=600),
    "before the first token": stub.hang(seconds=600),
    "before the headers": stub.text("Late.", delay_s=600),
    "in its thoughts": stub.thinking("Let me think about it.", "Done.", gap_s=20),
    "in the arguments of a call": stub.tool_calls([("weather", ARGUMENTS)], gap_s=20),
    "after a call, before the next": stub.tool_calls(
        [("weather", {}), ("weather", ARGUMENTS)], gap_s=0.4),
}
each_moment = pytest.mark.parametrize("moment", [
    "in the text", "in the arguments of a call",
    *rest(*(name for name in MOMENTS if name not in ("in the text", "in the arguments of a call"))),
])


def cancel(rig: Rig, messages: Json, *, after_s: float = 1.0, **fields: Json) -> None:
    """A question whose client leaves so long after it was sent."""
    body = {"model": MODEL, "stream": True, "messages": messages, **fields}
    with RawConnection(rig.server.port) as wire:
        wire.send(post(json.dumps(body).encode()))
        time.sleep(after_s)


def leave(rig: Rig, reply: stub.Reply, messages: Json, **fields: Json) -> None:
    """A question that the API has got and answers like this when its client leaves."""
    rig.script(reply)
    before = len(rig.bodies())
    body = {"model": MODEL, "stream": True, "messages": messages, **fields}
    with RawConnection(rig.server.port) as wire:
        wire.send(post(json.dumps(body).encode()))
        wait_until(lambda: len(rig.bodies()) == before + 1)
        time.sleep(0.6)
    rig.settle()
    assert len(rig.bodies()) == before + 1


def is_kept(rig: Rig) -> bool:
    """Whether the process of the last answer that was abandoned serves again."""
    return bool(rig.server.log_entries("answer_abandoned")[-1]["process_kept"])


@pytest.mark.exhaustive
@each_moment
def test_a_first_question_leaves_no_trace(rig: Rig, moment: str) -> None:
    fields = {"tools": CHAT.tools([WEATHER])} if "call" in moment else {}
    system = {"role": "system", "content": f"Be kind, {moment}."}
    leave(rig, MOMENTS[moment], [system, user("Secret?")], **fields)
    assert is_kept(rig) is not rig.is_old
    before = set(claude_pids(rig.server))

    rig.script()
    later = rig.ask([system, user("Two?")], **fields)
    assert later.text == "Hello from the stub."
    assert path_of(rig, later) == ("fresh" if rig.is_old else "continued")
    assert rig.is_old or set(claude_pids(rig.server)) == before
    first, last = rig.bodies()
    assert turns(last) == [("user", ["Two?"])]
    assert "Secret" not in json.dumps(last) and "nterrupt" not in json.dumps(last)
    assert without_question(last) == without_question(first)


def without_question(body: Mapping[str, Json]) -> Json:
    """The body but for the question, and for what names the process or the words."""
    text = json.dumps({**body, "metadata": None, "system": body["system"][1:]})
    return text.replace("Secret?", "Two?")


@pytest.mark.exhaustive
@each_moment
def test_a_conversation_is_as_it_was_before_the_question(rig: Rig, moment: str) -> None:
    fields = {"tools": CHAT.tools([WEATHER])} if "call" in moment else {}
    messages = [user(f"One, {moment}?")]
    messages += [assistant(rig.ask(messages, **fields).text)]
    leave(rig, MOMENTS[moment], [*messages, user("Secret?")], **fields)
    assert is_kept(rig) is not rig.is_old

    rig.script()
    later = rig.ask([*messages, user("Two?")], **fields)
    assert path_of(rig, later) == ("rebuilt" if rig.is_old else "continued")
    assert turns(rig.last_body()) == [
        ("user", [f"One, {moment}?"]), ("assistant", ["Hello from the stub."]), ("user", ["Two?"])]
    assert "nterrupt" not in json.dumps(rig.last_body())


@pytest.mark.exhaustive
def test_a_question_is_forgotten_while_claude_waits_to_ask_the_api_again(rig: Rig) -> None:
    messages = [user("One, with an overloaded API?")]
    messages += [assistant(rig.ask(messages).text)]
    rig.script(stub.error(529, "Overloaded"), then=stub.text("Too late."))
    before = len(rig.bodies())
    with RawConnection(rig.server.port) as wire:
        wire.send(post(json.dumps({
            "model": MODEL, "messages": [*messages, user("Secret?")]}).encode()))
        wait_until(lambda: len(rig.bodies()) == before + 1)
        time.sleep(0.1)
    rig.settle()
    time.sleep(1)
    assert len(rig.bodies()) == before + 1
    later = rig.ask([*messages, user("Two?")])
    assert path_of(rig, later) == ("rebuilt" if rig.is_old else "continued")
    assert "Secret" not in json.dumps(rig.last_body())


def test_a_request_that_is_stopped_leaves_no_trace_either(rig: Rig) -> None:
    messages = [user("One, before the stop?")]
    messages += [assistant(rig.ask(messages).text)]
    rig.script(MOMENTS["in the text"])
    before = len(rig.bodies())
    body = {"model": MODEL, "stream": True, "messages": [*messages, user("Secret?")]}
    with RawConnection(rig.server.port) as wire:
        wire.send(post(json.dumps(body).encode()))
        wire.hear(b"Half")
        (entry,) = rig.server.call("GET", "/api/requests").json()["requests"]
        path = f"/api/requests/{entry['request_id']}"
        assert rig.server.call("DELETE", path).status == 200
        wire.hear(b'"code":"request_stopped"')
    rig.settle()
    assert is_kept(rig) is not rig.is_old
    assert len(rig.bodies()) == before + 1

    rig.script()
    later = rig.ask([*messages, user("Two?")])
    assert path_of(rig, later) == ("rebuilt" if rig.is_old else "continued")
    assert "Secret" not in json.dumps(rig.last_body())


def test_tools_work_after_a_call_that_was_cancelled(rig: Rig) -> None:
    talk = Conversation(rig, CHAT, [WEATHER], system="Tell the weather.")
    leave(rig, MOMENTS["after a call, before the next"],
          [{"role": "system", "content": "Tell the weather."}, user("Secret?")],
          tools=CHAT.tools([WEATHER]))
    rig.script(stub.tool_calls([("weather", ARGUMENTS)]), stub.text("Warm."))
    call = talk.ask("Weather?").call
    last = talk.send_results([(call.id, Result("20"))])
    assert (last.text, path_of(rig, last)) == ("Warm.", "continued")
    assert [role for role, _ in turns(rig.last_body())] == ["user", "assistant", "user"]
    assert "Secret" not in json.dumps(rig.last_body())


@pytest.mark.exhaustive
def test_clients_that_leave_at_any_moment_cost_one_request_at_most_and_mix_nothing(
    rig: Rig
) -> None:
    count = by_depth(6, 12, 40)
    source, numbers = random.Random(5), itertools.count()
    rig.stub.default = lambda body: stub.text(["a "] * 20, gap_s=0.01)
    lock = threading.Lock()

    def leave_soon(_: object) -> None:
        with lock:
            number, after_s = next(numbers), source.choice([0.0, 0.03, 0.1, 0.3, 0.8])
        cancel(rig, [user(f"Secret-{number}?")], after_s=after_s)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(leave_soon, range(count)))
    rig.settle()
    later = [Conversation(rig, CHAT).ask(f"Plain-{number}?") for number in range(3)]
    rig.settle()

    texts = [json.dumps(body["messages"]) for body in rig.bodies()]
    for number in range(count):
        assert sum(f"Secret-{number}?" in text for text in texts) <= 1
    assert all(text.count("Secret-") + text.count("Plain-") == 1 for text in texts)
    assert all(said.finish == "stop" for said in later)
    assert len(claude_pids(rig.server)) <= 2
