"""A stand-in of each chat platform, and the settings of an account on each."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from fake_dingtalk import FakeDingTalk
from fake_discord import FakeDiscord
from fake_qq import FakeQQ
from fake_telegram import FakeTelegram
from fake_wechat import OWNER, FakeWeChat

Json = Any


class Platforms:
    """All platforms, as long as the stack is open."""

    def __init__(self, stack: ExitStack) -> None:
        enter = stack.enter_context
        self.telegram, self.discord = enter(FakeTelegram()), enter(FakeDiscord())
        self.qq, self.dingtalk = enter(FakeQQ()), enter(FakeDingTalk())
        self.wechat = enter(FakeWeChat())

    def settings(self, **telegram: Json) -> Json:
        """One account of each platform, open to one person; `telegram` adds to its settings."""
        return {
            "telegram": {"botToken": self.telegram.token, "apiRoot": self.telegram.url,
                         "allowFrom": ["1000"], **telegram},
            "discord": {"token": self.discord.token, "apiRoot": self.discord.url,
                        "allowFrom": ["1000"]},
            "qqbot": self.qq.settings(allowFrom=["PERSON"]),
            "dingtalk-connector": self.dingtalk.settings(allowFrom=["staff1"]),
            "openclaw-weixin": self.wechat.settings(allowFrom=[OWNER])}
