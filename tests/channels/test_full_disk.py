"""A disk that is full: no platform is told that a message was received, and none is lost."""

from __future__ import annotations

import contextlib
import shutil
import threading
from typing import Any, Callable, Iterator, NamedTuple

import pytest

from depth import rest
from disks import ShortFiles, SmallDisk, may_mount
from fake_agent import FakeAgent, streamed
from fake_dingtalk import FakeDingTalk
from fake_discord import FakeDiscord
from fake_qq import FakeQQ
from fake_telegram import FakeTelegram
from fake_wechat import OWNER, FakeWeChat
from gateway import Gateway
from waiting import eventually, stays

DATABASE = "channels.db"


class Platform(NamedTuple):
    channel: str
    make: Callable[[], Any]
    settings: Callable[[Any], Any]
    #: The chat of direct messages with the one who writes.
    chat: Any
    #: Whether everything that was said has been acknowledged.
    is_told: Callable[[Any], bool]


def has_resumed_after_all(fake: Any) -> bool:
    """Whether a client has asked for what came after the last message, or said that it has that."""
    last = max(number for number, event in enumerate(fake.newest.events, 1)
               if "MESSAGE" in event["t"])
    resumed = [content["seq"] for content in fake.sent(6)]
    return any(seq >= last for seq in [*resumed, *filter(None, fake.sent(1))])


TELEGRAM = Platform(
    "telegram", lambda: FakeTelegram(hold_s=0.5),
    lambda fake: {"botToken": fake.token, "apiRoot": fake.url, "allowFrom": ["1000"]}, 1000,
    lambda fake: any(each["offset"] > fake.last_id for each in fake.called("getUpdates")))
DISCORD = Platform(
    "discord", FakeDiscord,
    lambda fake: {"token": fake.token, "apiRoot": fake.url, "allowFrom": ["1000"]}, "91000",
    has_resumed_after_all)
QQ = Platform("qqbot", FakeQQ, lambda fake: fake.settings(allowFrom=["PERSON"]), "PERSON",
              has_resumed_after_all)
DINGTALK = Platform(
    "dingtalk-connector", FakeDingTalk, lambda fake: fake.settings(allowFrom=["staff1"]), "staff1",
    lambda fake: not fake.unanswered)
WECHAT = Platform(
    "openclaw-weixin", FakeWeChat, lambda fake: fake.settings(allowFrom=[OWNER]), OWNER,
    lambda fake: f"place{len(fake.messages)}" in [
        each["get_updates_buf"] for each in fake.called("POST", "getupdates")])


class Full(NamedTuple):
    """A gateway whose disk can be filled, and what it talks to."""

    platform: Platform
    fake: Any
    agent: FakeAgent
    gateway: Gateway
    disk: Any

    def fill(self) -> None:
        self.disk.fill(self.gateway.process)

    def free(self) -> None:
        self.disk.free(self.gateway.process)

    def screen(self) -> list[str]:
        return list(self.fake.screen(self.platform.chat))

    def why(self) -> str:
        """What the status tells of the account, which goes on to be tried."""
        (account,) = self.gateway.status()["channels"]
        return str(account["error"]) if account["status"] == "retrying" else ""


@contextlib.contextmanager
def full_disk(platform: Platform, kind: Any) -> Iterator[Full]:
    """A gateway that runs, and has answered once, on a disk that can be filled."""
    with platform.make() as fake, FakeAgent() as agent, contextlib.ExitStack() as stack:
        gateway = Gateway(None, agent, channels={platform.channel: platform.settings(fake)})
        stack.callback(gateway.__exit__)
        if kind is SmallDisk:
            stack.callback(shutil.rmtree, gateway.home)
            gateway.home = gateway.home / "disk"
            disk: Any = SmallDisk(gateway.home)
        else:
            disk = ShortFiles(gateway.home, DATABASE)
        stack.callback(disk.close)
        stack.callback(gateway.kill)
        # Each heartbeat tells how far a client has come.
        fake.interval_ms = 1000
        gateway.write()
        if platform is WECHAT:
            assert gateway.run("login", "--channel", platform.channel).code == 0
        gateway.start()
        eventually(lambda: gateway.status()["running"] == 1)
        if platform is DINGTALK:
            eventually(lambda: fake.connections)
        found = Full(platform, fake, agent, gateway, disk)
        fake.say("before")
        eventually(lambda: found.screen() == ["You said: before"] and platform.is_told(fake))
        yield found


each_disk = pytest.mark.parametrize("kind", [
    SmallDisk if may_mount() else ShortFiles, *rest(*[ShortFiles] * may_mount())],
    ids=lambda kind: kind.__name__)


@pytest.mark.slow
@pytest.mark.parametrize("platform", [TELEGRAM, DISCORD, QQ, DINGTALK, WECHAT],
                         ids=lambda each: each.channel)
@each_disk
def test_a_message_that_cannot_be_kept_is_not_acknowledged_and_comes_again(
    platform: Platform, kind: Any
) -> None:
    with full_disk(platform, kind) as full:
        full.fill()
        full.fake.say("is there room?")
        assert "disk" in eventually(full.why)
        assert not platform.is_told(full.fake)
        assert full.screen() == ["You said: before"] and full.agent.asked() == ["before"]
        full.free()
        if platform is DINGTALK:
            eventually(lambda: full.fake.send_again() or not full.fake.unanswered)
        eventually(lambda: full.screen()[1:] == ["You said: is there room?"], timeout_s=60)
        eventually(lambda: platform.is_told(full.fake))
        assert stays(lambda: len(full.screen()), 0.3) == 2
        assert full.agent.asked() == ["before", "is there room?"]


@pytest.mark.slow
@each_disk
def test_an_answer_that_cannot_be_kept_is_asked_for_again(kind: Any) -> None:
    with full_disk(TELEGRAM, kind) as full:
        can_answer = threading.Event()
        full.agent.default = lambda request: can_answer.wait(30) and streamed("kept")
        full.fake.say("is there room?")
        eventually(lambda: len(full.agent.requests) == 2)
        full.fill()
        can_answer.set()
        eventually(lambda: "a turn failed" in full.gateway.log or full.gateway.rows(
            "SELECT 1 FROM inbox WHERE NOT is_done") and not full.agent.running)
        assert full.screen() == ["You said: before"]
        full.free()
        eventually(lambda: full.screen()[1:] == ["kept"])
        assert len(full.agent.requests) == 3
        assert stays(lambda: len(full.screen()), 0.3) == 2


if may_mount():
    @pytest.mark.slow
    def test_a_start_on_a_full_disk_says_why() -> None:
        with full_disk(TELEGRAM, SmallDisk) as full:
            full.gateway.kill()
            full.fill()
            done = full.gateway.run("start")
            assert (done.code, done.stderr) == (1, "channels.db: database or disk is full\n")
