"""What kill -9 leaves behind of an answer in parts, some of which the platform takes only after the
next message: every part comes, in order, and twice only where nobody can tell whether it went."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import pytest

from depth import by_depth
from fake_agent import FakeAgent, Reply, Request, streamed, whole
from fake_qq import FakeQQ
from fake_telegram import FakeTelegram
from forks import Fork, forker
from gateway import Gateway
from waiting import eventually, stays

KILLED = Path(__file__).parents[1] / "kit" / "killed_gateway.py"
PARTS = 7
UNFINISHED = ("SELECT 1 FROM inbox WHERE NOT is_done UNION "
              "SELECT 1 FROM outbox WHERE status<>'sent'")


class Platform(NamedTuple):
    channel: str
    make: Callable[[], Any]
    settings: Callable[[Any], Any]
    chat: Any
    #: Whether it knows a part that is sent again.
    knows_parts: bool
    #: The states that parts go through here.
    states: set[str]
    #: The part after which the person goes on: the last one that the platform takes before that.
    last: int


TELEGRAM = Platform(
    "telegram", lambda: FakeTelegram(hold_s=0.5),
    lambda fake: {"botToken": fake.token, "apiRoot": fake.url, "allowFrom": ["1000"]}, 1000,
    False, {"pending", "sending", "sent"}, PARTS - 1)
QQ = Platform("qqbot", FakeQQ, lambda fake: fake.settings(allowFrom=["PERSON"]), "PERSON", True,
              {"pending", "sending", "sent", "held"}, 3)


def answer_in_parts(request: Request) -> Reply:
    """What the agent says: seven paragraphs, each as large as a part, or one sentence."""
    number = request.text.rpartition(" ")[2]
    if not request.text.startswith("tell"):
        return streamed(f"You said: {request.text}")
    paragraphs = [f"[{number}.{part}] " + "x" * 430 for part in range(PARTS)]
    return whole({"choices": [{"message": {"content": "\n\n".join(paragraphs)}}]})


def wanted_parts(number: int) -> list[str]:
    """What is to be read of a story, by marks."""
    return [*(f"[{number}.{part}]" for part in range(PARTS)), f"You said: go on {number}"]


class Story:
    """Somebody asks, and goes on when he has read as much as comes without that."""

    def __init__(self, platform: Platform, fake: Any, gateway: Gateway, number: int) -> None:
        self._platform, self._fake, self._gateway = platform, fake, gateway
        self._number, self._said = number, 0

    def screen(self) -> list[str]:
        return list(self._fake.screen(self._platform.chat))

    def goes_on(self) -> bool:
        """Say what is due, and return whether everything has come, and is known to have come."""
        shown = "".join(self.screen())
        if not self._said:
            self._say("tell")
        elif self._said == 1 and f"[{self._number}.{self._platform.last}]" in shown:
            self._say("go on")
        return f"You said: go on {self._number}" in shown and not self._gateway.rows(UNFINISHED)

    def _say(self, word: str) -> None:
        self._said += 1
        self._fake.say(f"{word} {self._number}")

    def parts(self) -> list[str]:
        """The parts on the screen, by their marks, in order."""
        marks = wanted_parts(self._number)
        return [mark for text in self.screen() for mark in marks if mark in text]


class Kill(NamedTuple):
    """A kill, and what it left behind."""

    #: Empty if everything came before.
    step: str
    #: The states of parts, and the texts of those that were being sent.
    states: set[str]
    being_sent: str


def killed_at(gateway: Gateway, story: Story, step: int) -> Kill:
    """Run the gateway until it kills itself at a step."""
    file = gateway.home / "step"
    file.unlink(missing_ok=True)
    nothing = Path(os.devnull)
    process: Fork = forker(KILLED).fork([str(step), str(file), "start"], gateway.env, gateway.home,
                                        nothing, nothing)
    try:
        eventually(lambda: process.poll() is not None or story.goes_on())
    finally:
        process.kill()
        process.wait()
    rows = gateway.rows("SELECT status, text FROM outbox")
    return Kill(file.read_text() if file.exists() else "", {status for status, _ in rows},
                "".join(text for status, text in rows if status == "sending"))


def stories(platform: Platform, steps: range) -> Iterator[tuple[int, Kill, list[str]]]:
    """Yield for each story its number, its kill, and the parts that were read in the end."""
    with platform.make() as fake, FakeAgent() as agent:
        agent.default = answer_in_parts
        account = {**platform.settings(fake), "replyChunkSize": 500}
        gateway = Gateway(None, agent, {"perSenderHour": 0}, channels={platform.channel: account})
        try:
            gateway.start()
            eventually(lambda: gateway.rows("SELECT 1 FROM states") or platform is TELEGRAM)
            for number in steps:
                gateway.kill()
                story = Story(platform, fake, gateway, number)
                kill = killed_at(gateway, story, number)
                gateway.start()
                eventually(story.goes_on)
                stays(lambda story=story: len(story.screen()), 0.2)  # type: ignore[misc]
                yield number, kill, story.parts()
                if not kill.step:
                    return
        finally:
            gateway.__exit__()
    assert not getattr(fake, "faults", None)


@pytest.mark.slow
@pytest.mark.parametrize("platform", [TELEGRAM, QQ], ids=lambda each: each.channel)
def test_every_part_of_an_answer_comes_wherever_the_gateway_was_killed(platform: Platform) -> None:
    every, states = by_depth(40, 24, 1), set[str]()
    for number, kill, parts in stories(platform, range(9, 300, every)):
        wanted = wanted_parts(number)
        assert list(dict.fromkeys(parts)) == wanted, kill
        for mark in wanted:
            may_be_doubled = mark in kill.being_sent and not platform.knows_parts
            assert parts.count(mark) <= 1 + may_be_doubled, (mark, kill)
        states |= kill.states
    assert not kill.step and number > 40, kill
    assert states == platform.states or every > 1
