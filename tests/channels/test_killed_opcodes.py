"""What kill -9 leaves behind on Discord and QQ: an answer that was sent is not sent again, because
both know the part by its number."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple

import pytest

from fake_agent import FakeAgent
from fake_discord import FakeDiscord
from fake_qq import FakeQQ
from forks import forker
from gateway import Gateway
from waiting import eventually, stays

KILLED = Path(__file__).parents[1] / "kit" / "killed_gateway.py"


class Platform(NamedTuple):
    name: str
    make: Callable[[], Any]
    settings: Callable[[Any], Any]
    #: The chat of direct messages with the one who writes.
    chat: Callable[[Any], str]


DISCORD = Platform(
    "discord", FakeDiscord,
    lambda fake: {"token": fake.token, "apiRoot": fake.url, "allowFrom": ["1000"]},
    lambda fake: str(fake.dm("1000")))
QQ = Platform("qqbot", FakeQQ, lambda fake: fake.settings(allowFrom=["PERSON"]),
              lambda fake: "PERSON")


each_platform = pytest.mark.parametrize("platform", [DISCORD, QQ], ids=["discord", "qq"])


@each_platform
@pytest.mark.slow
def test_an_answer_is_there_once_when_the_gateway_was_killed_before_it_knew(
    platform: Platform
) -> None:
    assert killed_at_each(platform, ["after messages"]) == ["after messages"]


@each_platform
@pytest.mark.exhaustive
def test_an_answer_is_there_once_wherever_the_gateway_was_killed(platform: Platform) -> None:
    steps = killed_at_each(platform, map(str, range(1, 100)))
    assert "after messages" in steps and not steps[-1]


def killed_at_each(platform: Platform, wanted: Iterable[str]) -> list[str]:
    """Let a gateway be killed at each of these steps, and check that each message is answered once.
    Returns the names of the steps; the last one is empty if there were no more."""
    steps: list[str] = []
    with platform.make() as fake, FakeAgent() as agent:
        fake.limit, chat = 1000, platform.chat(fake)
        gateway = Gateway(None, agent, channels={platform.name: platform.settings(fake)})
        try:
            gateway.start()
            eventually(lambda: gateway.rows("SELECT 1 FROM states"))
            for step in wanted:
                gateway.kill()
                fake.say(f"message {step}")
                steps.append(killed_at(gateway, step, fake, chat))
                gateway.start()
                times = times_answered(fake, chat, f"You said: message {step}")
                assert times == 1, (step, steps[-1])
                if not steps[-1]:
                    break
        finally:
            gateway.__exit__()
    assert not fake.faults
    return steps


def killed_at(gateway: Gateway, step: str, fake: Any, chat: str) -> str:
    """Run the gateway until it kills itself at a step, and return the step's name; empty if it
    answered without having come to that step."""
    file = gateway.home / "step"
    file.unlink(missing_ok=True)
    nothing = Path(os.devnull)
    process = forker(KILLED).fork(
        [step, str(file), "start"], gateway.env, gateway.home, nothing, nothing)
    unfinished = ("SELECT 1 FROM inbox WHERE NOT is_done UNION "
                  "SELECT 1 FROM outbox WHERE status<>'sent'")
    try:
        eventually(lambda: process.poll() is not None or (
            f"You said: message {step}" in fake.screen(chat) and not gateway.rows(unfinished)))
    finally:
        process.kill()
        process.wait()
    return file.read_text() if file.exists() else ""


def times_answered(fake: Any, chat: str, answer: str) -> int:
    """How often an answer is on the screen in the end."""
    eventually(lambda: answer in fake.screen(chat))
    return stays(lambda: int(fake.screen(chat).count(answer)), 0.2)
