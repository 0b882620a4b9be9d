"""The whole chain: a chat on Telegram, the gateway, the server, and the real claude."""

from __future__ import annotations

import functools

from conversation import stats
from fake_agent import FakeAgent
from fake_telegram import FakeTelegram
from gateway import Gateway
from rig import Rig
from waiting import eventually


def test_a_chat_goes_on_in_the_same_claude_until_its_older_half_is_forgotten(rig: Rig) -> None:
    before = stats(rig)["continued"]
    top = {"agentUrl": rig.server.url, "historyMessages": 4}
    with FakeTelegram() as telegram, FakeAgent() as unused:
        with Gateway(telegram, unused, top) as gateway:
            continued = []
            for count, text in enumerate(("one", "two", "three", "four", "five"), 1):
                telegram.say(f"This is {text}.")
                eventually(functools.partial(is_sent, gateway, count))
                continued.append(stats(rig)["continued"] - before)
            assert len(telegram.screen(1000)) == 5 and all(telegram.screen(1000)), gateway.log
    # The fourth question comes with half of the conversation, which no claude holds.
    assert continued == [0, 1, 2, 2, 3]
    told = str(rig.bodies()[-1]["messages"])
    assert [f"This is {text}." in told for text in ("one", "two", "three", "four", "five")] == [
        False, False, True, True, True]


def is_sent(gateway: Gateway, count: int) -> bool:
    """Whether so many answers have been sent."""
    return gateway.rows("SELECT COUNT(*) FROM outbox WHERE status='sent'") == [(count,)]
