"""Who is answered in a group, on each platform as it tells of groups."""

from __future__ import annotations

import functools
import itertools
from typing import Any, Callable, NamedTuple, Optional

import pytest

from channel_rows import Chat, channels
from fake_agent import FakeAgent
from fake_dingtalk import FakeDingTalk
from fake_discord import BOT_ID, FakeDiscord
from fake_qq import FakeQQ
from fake_telegram import BOT_NAME, FakeTelegram
from fake_wechat import FakeWeChat
from waiting import eventually

Json = Any


class Platform(NamedTuple):
    row: Any
    make: Callable[[], Any]
    settings: Callable[[Any], Json]
    #: Lets the sender write in the group, with a mention of the bot or without.
    say: Callable[[Any, str, bool], object]
    group: str
    sender: str
    #: The setting that lists groups.
    places: str = "groups"


def say_on_telegram(fake: FakeTelegram, text: str, is_mentioned: bool) -> None:
    name = f"@{BOT_NAME} " * is_mentioned
    entities = [{"type": "mention", "offset": 0, "length": len(name) - 1}] * is_mentioned
    fake.say(name + text, sender=17, chat=-17, entities=entities)


def logged_in(fake: FakeWeChat, tools: Any, http: Any) -> Any:
    tools.shared.store.put_state(tools.id, fake.login())
    return channels.WeChat(tools, http)


PLATFORMS = [
    Platform(channels.Telegram.row, FakeTelegram,
             lambda fake: {"botToken": fake.token, "apiRoot": fake.url}, say_on_telegram, "-17",
             "17"),
    Platform(channels.Discord.row, FakeDiscord,
             lambda fake: {"token": fake.token, "apiRoot": fake.url},
             lambda fake, text, is_mentioned: fake.say(
                 f"<@{BOT_ID}> " * is_mentioned + text, "17", "7", "70"), "7", "17", "guilds"),
    Platform(channels.QQ.row, FakeQQ, lambda fake: fake.settings(),
             lambda fake, text, is_mentioned: fake.say(text, "17", "GROUP", is_mentioned), "GROUP",
             "17"),
    Platform(channels.DingTalk.row, FakeDingTalk, lambda fake: fake.settings(),
             lambda fake, text, is_mentioned: fake.say(
                 text, "17", "cidG", isInAtList=is_mentioned), "cidG", "17"),
]
#: Policy, whether the group is listed, whether the sender is, and whether the bot is mentioned.
CASES = list(itertools.product(("allowlist", "open", "disabled"), *[(True, False)] * 3))


def account_for(platform: Platform, fake: Any, policy: str, is_listed: bool, may_sender: bool
                ) -> Any:
    """The account with the settings of a case."""
    values = {**platform.settings(fake), "groupPolicy": policy,
              platform.places: {platform.group if is_listed else "other": {}},
              "groupAllowFrom": [platform.sender if may_sender else "7"], "perSenderHour": 0}
    content = {"channels": {platform.row.id: values}}
    return channels.parse_settings(content, "none", {}, [platform.row]).accounts[0]


def reason_for(policy: str, is_listed: bool, may_sender: bool, is_mentioned: bool) -> str:
    """Why a message is not answered; empty if it is."""
    return next((reason for is_so, reason in (
        (policy == "disabled", "groups are off"),
        (policy == "allowlist" and not is_listed, "the group is not listed"),
        (not may_sender, "not in groupAllowFrom"), (not is_mentioned, "not mentioned")) if is_so),
        "")


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda each: each.row.id)
def test_a_group_message_needs_its_place_its_sender_and_a_mention_on_each_platform(
    platform: Platform
) -> None:
    row = platform.row._replace(pace_s=0.0)
    with platform.make() as fake, FakeAgent() as agent, Chat(
            agent.url, row=row, **platform.settings(fake)) as chat:
        if isinstance(fake, FakeDingTalk):
            eventually(lambda: fake.connections)
        expected: list[str] = []
        for number, case in enumerate(CASES):
            chat.live.account = account_for(platform, fake, *case[:3])
            before, reason = dict(chat.live.dropped), reason_for(*case)
            platform.say(fake, f"case {number}", case[3])
            eventually(functools.partial(is_judged, chat, agent, number, len(expected)))
            if reason:
                assert chat.live.dropped[reason] == before.get(reason, 0) + 1, (case, reason)
            else:
                expected.append(f"[{name_of(platform)}]: case {number}")
        assert sum(chat.live.dropped.values()) == len(CASES) - len(expected) == 21
        eventually(lambda: agent.asked() == expected)


def name_of(platform: Platform) -> str:
    """How the agent is told who writes."""
    return f"Person {platform.sender}"


def is_judged(chat: Chat, agent: FakeAgent, number: int, asked: int) -> Optional[bool]:
    """Whether so many messages have been judged, and the agent has been asked where it is."""
    dropped = sum(chat.live.dropped.values())
    return dropped + asked == number + 1 or len(agent.requests) > asked


def test_wechat_has_no_groups_whatever_the_settings_say() -> None:
    with FakeWeChat() as wechat, FakeAgent() as agent:
        row = channels.WeChat.row._replace(make=functools.partial(logged_in, wechat))
        settings = wechat.settings(dmPolicy="open", allowFrom=["*"], groupPolicy="open")
        with Chat(agent.url, row=row, **settings) as chat:
            wechat.say("in a group", "17@im.wechat", group_id="g")
            wechat.say("directly", "17@im.wechat")
            eventually(lambda: agent.asked() == ["directly"])
            assert not chat.live.dropped
