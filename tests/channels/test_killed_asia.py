"""What kill -9 leaves behind on DingTalk and WeChat: every message is answered, and twice only if
the kill fell between sending a part and noting that."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple

import pytest

from fake_agent import FakeAgent
from fake_dingtalk import FakeDingTalk
from fake_wechat import OWNER, FakeWeChat
from forks import forker
from gateway import Gateway
from waiting import eventually, stays

KILLED = Path(__file__).parents[1] / "kit" / "killed_gateway.py"


class Platform(NamedTuple):
    name: str
    make: Callable[[], Any]
    settings: Callable[[Any], Any]
    chat: str
    #: Whether an account is logged in by a command.
    has_login: bool
    #: How the name of the call that sends a part begins.
    call: str


PLATFORMS = [
    Platform("dingtalk-connector", FakeDingTalk,
             lambda fake: fake.settings(allowFrom=["staff1"]), "staff1", False, "sendBySession"),
    Platform("openclaw-weixin", FakeWeChat, lambda fake: fake.settings(allowFrom=[OWNER]), OWNER,
             True, "sendmessage")]
each_platform = pytest.mark.parametrize("platform", PLATFORMS, ids=lambda each: each.name)


@each_platform
@pytest.mark.slow
def test_an_answer_is_there_when_the_gateway_was_killed_before_it_knew(
    platform: Platform
) -> None:
    # The message is safe, and not acknowledged yet.
    wanted = ["after a transaction", "before INSERT INTO outbox"]
    steps = killed_at_each(platform, wanted)
    assert len(steps) == len(wanted) and all(steps), "it was killed at each of them"


@each_platform
@pytest.mark.exhaustive
def test_an_answer_is_there_wherever_the_gateway_was_killed(platform: Platform) -> None:
    steps = killed_at_each(platform, map(str, range(1, 100)))
    assert any(step.startswith(f"after {platform.call}") for step in steps) and not steps[-1]


def killed_at_each(platform: Platform, wanted: Iterable[str]) -> list[str]:
    """Let a gateway be killed at each of these steps, and check how often each message is answered.
    Returns the names of the steps; the last one is empty if there were no more."""
    steps: list[str] = []
    with platform.make() as fake, FakeAgent() as agent:
        gateway = Gateway(None, agent, channels={platform.name: platform.settings(fake)})
        gateway.write()
        try:
            if platform.has_login:
                assert gateway.run("login", "--channel", platform.name).code == 0
            for step in wanted:
                text = f"message {step}"
                steps.append(killed_at(gateway, step, text, fake, platform.chat))
                gateway.start()
                if hasattr(fake, "unanswered"):
                    # The platform repeats what nobody has acknowledged.
                    eventually(lambda: fake.send_again() or not fake.unanswered)
                times = times_answered(fake, platform.chat, f"You said: {text}")
                most = 2 if steps[-1].startswith(f"after {platform.call}") else 1
                assert 1 <= times <= most, (step, steps[-1], times)
                gateway.kill()
                if not steps[-1]:
                    break
        finally:
            gateway.__exit__()
    assert not fake.faults
    return steps


def killed_at(gateway: Gateway, step: str, text: str, fake: Any, chat: str) -> str:
    """Run the gateway until it kills itself at a step, and return the step's name; empty if it
    answered without having come to that step."""
    file = gateway.home / "step"
    file.unlink(missing_ok=True)
    nothing = Path(os.devnull)
    heard = len(getattr(fake, "connections", ()))
    process = forker(KILLED).fork(
        [step, str(file), "start"], gateway.env, gateway.home, nothing, nothing)
    try:
        if hasattr(fake, "connections"):
            eventually(lambda: len(fake.connections) > heard)
        fake.say(text, sender=chat)
        unfinished = ("SELECT 1 FROM inbox WHERE NOT is_done UNION "
                      "SELECT 1 FROM outbox WHERE status<>'sent'")
        eventually(lambda: process.poll() is not None or (
            f"You said: {text}" in fake.screen(chat) and not gateway.rows(unfinished)))
    finally:
        process.kill()
        process.wait()
    return file.read_text() if file.exists() else ""


def times_answered(fake: Any, chat: str, answer: str) -> int:
    """How often an answer is on the screen in the end."""
    eventually(lambda: answer in fake.screen(chat))
    return stays(lambda: int(fake.screen(chat).count(answer)), 0.2)
