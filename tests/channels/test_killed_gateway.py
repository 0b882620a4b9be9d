"""What kill -9 and SIGTERM leave behind: no message is lost, and none is answered twice."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path
from typing import Iterator

import pytest

from depth import by_depth, rest
from fake_agent import FakeAgent, streamed
from fake_telegram import FakeTelegram
from forks import forker
from gateway import Gateway
from waiting import eventually, stays

KILLED = Path(__file__).parents[1] / "kit" / "killed_gateway.py"
#: Between these two moments nobody can tell whether Telegram has shown a part.
UNCERTAIN = ("after sendMessage", "before UPDATE outbox SET status=?, due_s=?, why=?, attempts="
             "attempts+")


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    """A gateway that does not run yet."""
    with FakeTelegram(hold_s=0.5) as telegram, FakeAgent() as agent:
        made = Gateway(telegram, agent)
        try:
            made.write()
            yield made
        finally:
            made.__exit__()


def killed_at(gateway: Gateway, step: int) -> str:
    """Run the gateway until it kills itself at a step, and return the step's name; empty if it
    answered without having come to that step."""
    file = gateway.home / "step"
    file.unlink(missing_ok=True)
    nothing = Path(os.devnull)
    process = forker(KILLED).fork([str(step), str(file), "start"], gateway.env, gateway.home,
                                  nothing, nothing)
    try:
        eventually(lambda: process.poll() is not None or is_all_done(gateway), timeout_s=100)
    finally:
        process.kill()
        process.wait()
    return file.read_text() if file.exists() else ""


def is_all_done(gateway: Gateway) -> bool:
    """Whether every message is acknowledged, answered, and its answer sent."""
    asked = gateway.telegram.called("getUpdates")
    return any(body["offset"] > gateway.telegram.last_id for body in asked) and not gateway.rows(
        "SELECT 1 FROM inbox WHERE NOT is_done UNION SELECT 1 FROM outbox WHERE status<>'sent'")


def times_answered(gateway: Gateway, text: str) -> int:
    """How often the answer to a message is on the screen in the end."""
    def seen() -> int:
        return gateway.telegram.screen(1000).count(f"You said: {text}")

    eventually(seen)
    eventually(lambda: not gateway.rows("SELECT 1 FROM inbox WHERE NOT is_done"))
    return stays(seen, 0.2)


@pytest.mark.slow
def test_a_message_is_answered_once_wherever_the_gateway_was_killed(gateway: Gateway) -> None:
    steps: list[str] = []
    every = by_depth(8, 5, 1)
    for step in range(1, 200, every):
        gateway.telegram.say(f"message {step}")
        steps.append(killed_at(gateway, step))
        gateway.start()
        seen = times_answered(gateway, f"message {step}")
        assert seen == 1 or seen == 2 and steps[-1].startswith(UNCERTAIN), steps
        gateway.kill()
        if not steps[-1]:
            break
    assert not steps[-1] and len(steps) > 24 // every, steps


@pytest.mark.slow
def test_a_preview_of_before_the_kill_becomes_the_answer(gateway: Gateway) -> None:
    telegram, agent = gateway.telegram, gateway.agent
    words = [f"This is sentence {n}. " for n in range(20)]
    agent.enqueue(streamed(*words, pause_s=0.5), streamed(*words))
    gateway.start()
    telegram.say("tell me")
    eventually(lambda: "shown" in str(gateway.rows("SELECT progress FROM inbox")))
    gateway.kill()
    gateway.start()
    eventually(lambda: telegram.screen(1000) == ["".join(words).strip()])
    assert agent.asked() == ["tell me", "tell me"]
    assert stays(lambda: len(telegram.screen(1000)), 0.3) == 1


@pytest.mark.slow
def test_a_message_that_killed_it_twice_is_not_asked_a_third_time(gateway: Gateway) -> None:
    telegram, agent = gateway.telegram, gateway.agent
    agent.enqueue(*[streamed("a", "b", pause_s=30)] * 2)
    telegram.say("poison")
    for count in (1, 2):
        gateway.start()
        eventually(functools.partial(agent.was_asked, count))
        gateway.kill()
    gateway.start()
    eventually(lambda: telegram.screen(1000) == ["I was interrupted; please send that again."])
    assert len(agent.requests) == 2


def test_the_end_waits_for_an_answer_that_is_being_written(gateway: Gateway) -> None:
    gateway.agent.enqueue(streamed("at ", "last", pause_s=1.5))
    gateway.start()
    gateway.telegram.say("hello")
    eventually(lambda: gateway.agent.running)
    assert gateway.terminate() == 0
    assert gateway.telegram.screen(1000) == ["at last"]
    assert not (gateway.home / "channels.sock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("pauses", [["_DRAIN_S=0.5"], *rest([])], ids=["short", "as it is"])
def test_an_answer_that_the_end_does_not_wait_for_is_asked_for_again_in_its_preview(
    gateway: Gateway, pauses: list[str]
) -> None:
    telegram, agent = gateway.telegram, gateway.agent
    words = [f"This is sentence {n}. " for n in range(20)]
    agent.enqueue(streamed("".join(words[:3]), "never", pause_s=60), streamed(*words))
    gateway.start(pauses=pauses)
    telegram.say("tell me")
    eventually(lambda: "shown" in str(gateway.rows("SELECT progress FROM inbox")))
    assert gateway.terminate() == 0
    assert agent.cut == 1 and "sentence 19" not in telegram.screen(1000)[0]
    assert gateway.rows("SELECT is_done, attempts FROM inbox") == [(0, 1)]
    telegram.say("and then?")
    gateway.start(pauses=pauses)
    eventually(lambda: telegram.screen(1000) == ["".join(words).strip(), "You said: and then?"])
    assert agent.asked() == ["tell me", "tell me", "and then?"]
    assert len(telegram.called("sendMessage")) == 2 and telegram.called("editMessageText")


def test_what_was_written_meanwhile_is_answered_at_the_start(gateway: Gateway) -> None:
    for sender in (1000, 1000):
        gateway.telegram.say("anybody there", sender=sender)
    gateway.start()
    eventually(lambda: gateway.telegram.screen(1000))
    assert gateway.telegram.screen(1000)[0].startswith("You said: anybody there")


def test_messages_of_another_bot_with_smaller_ids_are_answered(gateway: Gateway) -> None:
    telegram = gateway.telegram
    gateway.start()
    telegram.say("one")
    eventually(lambda: gateway.rows("SELECT 1 FROM outbox WHERE status='sent'"))
    gateway.kill()
    telegram.change_bot()
    telegram.say("two")
    gateway.start()
    assert eventually(lambda: telegram.screen(1000) == ["You said: one", "You said: two"])


def test_a_second_signal_ends_it_at_once_and_the_question_stays(gateway: Gateway) -> None:
    gateway.agent.enqueue(streamed("a", "b", pause_s=30))
    gateway.start()
    gateway.telegram.say("hello")
    eventually(lambda: gateway.agent.running)
    process = gateway.process
    assert process is not None
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert gateway.rows("SELECT is_done FROM inbox") == [(0,)]
