"""What a gateway that runs tells of itself: no secret, and nothing of what people say."""

from __future__ import annotations

import contextlib
import re
from typing import Any, Iterator

import pytest

from channel_rows import channels
from fake_agent import FakeAgent, Reply, Request, refused, whole
from fake_telegram import FakeTelegram
from fake_wechat import OWNER
from gateway import Gateway
from platforms import Platforms
from processes import descendants, of_process
from waiting import eventually

Json = Any


class Everything(Platforms):
    """Each platform, and a gateway with an account of each, and some that do not get on."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        super().__init__(stack)
        self.later = stack.enter_context(FakeTelegram("77:token-of-the-later"))
        self.agent = stack.enter_context(FakeAgent())
        accounts = {
            "later": {"botToken": self.later.token, "apiRoot": self.later.url, "async": True,
                      "allowFrom": ["1000"]},
            "dead": {"botToken": "1:token-of-the-dead", "apiRoot": "http://127.0.0.1:1"},
            "odd": {"botToken": "1:token of the odd", "apiRoot": self.telegram.url},
            "wrong": {"botToken": "1:token-of-the-wrong", "apiRoot": self.telegram.url}}
        self.gateway = Gateway(None, self.agent, {
            "apiKey": "key-of-the-agent", "callbackSecret": "secret-of-calls", "callbackPort": 0,
        }, channels=self.settings(accounts=accounts))
        stack.callback(self.gateway.__exit__)
        stack.callback(self.gateway.run, "stop")

    def chats(self) -> Iterator[tuple[Any, Any]]:
        """The platforms on which somebody is answered, and where."""
        yield self.telegram, 1000
        yield self.later, 1000
        yield self.discord, "91000"
        yield self.qq, "PERSON"
        yield self.dingtalk, "staff1"
        yield self.wechat, OWNER

    def secrets(self) -> set[str]:
        """What nobody may read."""
        callbacks = [headers["x-ocg-callback"] for headers in self.agent.headers
                     if "x-ocg-callback" in headers]
        assert callbacks
        return {
            self.telegram.token, self.later.token, "token-of-the-dead", "token of the odd",
            "token-of-the-wrong", self.discord.token, self.qq.secret, "token-number",
            self.dingtalk.secret, "session=hook", "ticket+", "ticket%2B", self.wechat.token,
            "context75", "key-of-the-agent", "secret-of-calls", "private",
            *(url.rpartition("/")[2] for url in callbacks)}


def answer(request: Request) -> Reply:
    """An answer that is nobody's business; of the account whose agent answers later, a call."""
    url = request.headers.get("x-ocg-callback")
    return whole({"status": "accepted"}, 202) if url else whole(
        {"choices": [{"message": {"content": f"private answer to {request.text}"}}]})


@pytest.mark.slow
def test_no_secret_and_no_text_is_in_the_log_the_status_or_the_list_of_processes() -> None:
    with contextlib.ExitStack() as stack:
        every = Everything(stack)
        gateway, agent = every.gateway, every.agent
        gateway.write()
        assert gateway.run("login", "--channel", "openclaw-weixin").code == 0
        assert gateway.run("start", "-d", "--log-dir", str(gateway.home)).code == 0
        eventually(lambda: gateway.status()["running"] == 6 and every.dingtalk.connections)
        agent.default = answer
        agent.enqueue(refused(401, "invalid_api_key", "this key is wrong"))
        every.telegram.fail("sendMessage", 500, "Internal")
        every.telegram.say("a private question of a stranger", sender=5)
        for fake, chat in every.chats():
            fake.say("a private question")
            if fake is every.later:
                call_back(agent)
            eventually(lambda fake=fake, chat=chat: fake.screen(chat))  # type: ignore[misc]
        every.dingtalk.expire()
        every.dingtalk.say("a private question")
        eventually(lambda: len(every.dingtalk.screen("staff1")) == 2)
        pid = gateway.status()["pid"]
        processes = b" ".join(of_process(each, "cmdline") for each in [
            pid, *(each.pid for each in descendants(pid))]).decode()
        told = {"the log": gateway.log, "the list of processes": processes, **{
            " ".join(words): str(gateway.run(*words)) for words in (
                ("status",), ("status", "--json"), ("status", "--probe"), ("outbox",),
                ("outbox", "--json"), ("pairing", "list"), ("list", "--json"))}}
        assert "ocp_channels.py" in processes and "connection lost" in told["the log"]
        assert told["the log"].count("[IN]") == 8 and "the agent failed" in told["the log"]
        for place, text in told.items():
            for secret in every.secrets():
                assert secret not in text, (place, secret)
        assert not re.search("[0-9a-f]{64}", told["the log"])


def call_back(agent: FakeAgent) -> None:
    """Answer the question that an agent has taken, as whoever has the secret may."""
    found = eventually(lambda: [request for request in agent.requests
                                if "x-ocg-callback" in request.headers])[-1]
    body = channels.compact({"reply": "a private answer"}).encode()
    digest = channels.hmac.new(b"secret-of-calls", body, "sha256").hexdigest()
    http = channels.Http(channels.Connector("", {}))
    url = found.headers["x-ocg-callback"]
    taken = http.call("POST", url, body, {"X-OCG-Signature": f"sha256={digest}"})
    http.close()
    assert taken.status == 200, taken
