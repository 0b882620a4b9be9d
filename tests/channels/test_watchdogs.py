"""A gateway that Discord or QQ has forgotten: it answers no heartbeat, and brings nothing more."""

from __future__ import annotations

from typing import Any, Callable

import pytest

from channel_tools import FakeTools, channels, receiving
from fake_discord import FakeDiscord
from fake_qq import FakeQQ
from waiting import eventually


@pytest.mark.parametrize(("make", "cls", "settings"), [
    (FakeDiscord, channels.Discord, lambda fake: {"token": fake.token, "apiRoot": fake.url}),
    (FakeQQ, channels.QQ, lambda fake: fake.settings())], ids=["discord", "qq"])
def test_a_connection_on_which_no_heartbeat_is_answered_is_left_and_nothing_is_lost(
    make: Callable[[], Any], cls: Any, settings: Callable[[Any], Any]
) -> None:
    http = channels.Http(channels.Connector("", {}))
    with make() as fake:
        fake.interval_ms = 1000
        tools = FakeTools(**settings(fake))
        with receiving(cls(tools, http), tools):
            fake.say("before")
            eventually(lambda: tools.texts() == ["before"])
            fake.is_deaf = True
            fake._leave()
            fake.say("meanwhile")
            assert eventually(lambda: fake.sent(6))
            fake.is_deaf = False
            fake.say("after")
            eventually(lambda: tools.texts() == ["before", "meanwhile", "after"])
        assert fake.closes[0] == 4000 and "heartbeat" in str(tools.ends[0])
        assert len(fake.sent(2)) == 1 and not fake.faults
    http.close()
