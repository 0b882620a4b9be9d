"""The whole chain: a chat, the gateway, and a server of OCP."""

from __future__ import annotations

from fake_agent import FakeAgent
from fake_telegram import FakeTelegram
from gateway import Gateway
from server import Server
from waiting import eventually


def test_a_second_message_goes_on_in_the_servers_conversation(server: Server) -> None:
    with FakeTelegram() as telegram, FakeAgent() as unused:
        with Gateway(telegram, unused, {"agentUrl": f"http://127.0.0.1:{server.port}"}) as gateway:
            for count in (1, 2):
                telegram.say("hello")
                eventually(lambda: gateway.rows("SELECT COUNT(*) FROM outbox WHERE"
                                                " status='sent'") == [(count,)])  # noqa: B023
            assert all(telegram.screen(1000)), gateway.log
            health = server.call("GET", "/health").json()
            assert health["stats"]["continued"] == 1
            telegram.say("/model")
            eventually(lambda: "haiku" in telegram.screen(1000)[-1])
