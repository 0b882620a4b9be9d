"""The whole chain: a chat on Telegram, the gateway, the server, and the real claude."""

from __future__ import annotations

from conversation import stats
from fake_agent import FakeAgent
from fake_telegram import FakeTelegram
from gateway import Gateway
from rig import Rig
from waiting import eventually


def test_a_chat_goes_on_in_the_same_claude_from_its_second_message_on(rig: Rig) -> None:
    before = stats(rig)["continued"]
    with FakeTelegram() as telegram, FakeAgent() as unused:
        with Gateway(telegram, unused, {"agentUrl": rig.server.url}) as gateway:
            for count, text in enumerate(("one", "two", "three"), 1):
                telegram.say(text)
                eventually(lambda: gateway.rows("SELECT COUNT(*) FROM outbox WHERE"
                                                " status='sent'") == [(count,)])  # noqa: B023
            assert len(telegram.screen(1000)) == 3 and all(telegram.screen(1000)), gateway.log
    assert stats(rig)["continued"] - before == 2
    assert len(rig.bodies()[-1]["messages"]) >= 5
