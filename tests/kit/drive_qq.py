"""Uses a QQ with qq-botpy, as the judge of the fake: what this client cannot read is wrong. Run by
the Python of .channels: `drive_qq.py URL APP_ID SECRET`, prints one JSON object.

It is a bot that writes down what it hears. At the message "act" it does what bots do and what is
refused, and at "stop" it ends."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Awaitable

import aiohttp  # type: ignore[import-not-found,unused-ignore]
import botpy  # type: ignore[import-not-found,unused-ignore]

TOKENS = "https://bots.qq.com"


async def outcome(call: Awaitable[Any]) -> str:
    """The name of the exception that a call raises, and what it says."""
    try:
        return "sent" if (await call)["id"] else "no id"
    except RuntimeError as error:
        return f"{type(error).__name__} {error}"


class Judge(botpy.Client):  # type: ignore[misc,unused-ignore]
    """A bot."""

    def __init__(self) -> None:
        intents = botpy.Intents(public_messages=True, public_guild_messages=True,
                                direct_message=True)
        super().__init__(intents=intents, bot_log=None, ext_handlers=False, log_level=60)
        self.found: dict[str, Any] = {"messages": [], "resumed": 0}
        self.is_done = asyncio.Event()

    async def on_ready(self) -> None:
        self.found["me"] = self.robot.name

    async def on_resumed(self) -> None:
        self.found["resumed"] += 1

    async def on_c2c_message_create(self, message: Any) -> None:
        files = [(each.filename, each.size) for each in message.attachments]
        self.found["messages"].append(
            ["c2c", message.content, message.author.user_openid, files])
        if message.content == "act":
            self.found["acted"] = await self.act(message)
        if message.content == "stop":
            self.is_done.set()

    async def on_group_at_message_create(self, message: Any) -> None:
        self.found["messages"].append(
            ["group", message.content, message.group_openid, message.author.member_openid])
        self.found["group"] = await outcome(message.reply(content="hi"))

    async def on_at_message_create(self, message: Any) -> None:
        self.found["messages"].append(
            ["guild", message.content, message.channel_id, message.author.id])
        self.found["guild"] = [
            await outcome(message.reply(content="hi")),
            await outcome(message.reply(markdown={"content": "**hi**"}))]

    async def on_direct_message_create(self, message: Any) -> None:
        self.found["messages"].append(["dm", message.content, message.guild_id, message.author.id])
        self.found["dm"] = await outcome(message.reply(content="hi"))

    async def act(self, message: Any) -> list[str]:
        """Answer a message, and do what is refused."""
        marked = {"content": "**hi**"}
        proactive = self.api.post_c2c_message(openid=message.author.user_openid, content="x")
        calls = [
            message.reply(content="one", msg_seq=1), message.reply(content="again", msg_seq=1),
            message.reply(markdown=marked, msg_type=2, msg_seq=2), proactive,
            *(message.reply(content="more", msg_seq=number) for number in range(3, 7)),
        ]
        return [await outcome(call) for call in calls]


def lead_to(url: str) -> None:
    """Let the client ask here, wherever it thinks that it asks."""
    botpy.http.Route.SCHEME, _, botpy.http.Route.DOMAIN = url.partition("://")
    request = aiohttp.ClientSession._request

    async def rewritten(self: Any, method: str, asked: str, **options: Any) -> Any:
        return await request(self, method, str(asked).replace(TOKENS, url), **options)

    aiohttp.ClientSession._request = rewritten


async def drive(url: str, app_id: str, secret: str) -> dict[str, Any]:
    lead_to(url)
    judge = Judge()
    running = asyncio.create_task(judge.start(app_id, secret))
    await asyncio.wait_for(judge.is_done.wait(), 150)
    running.cancel()
    other = Judge()
    try:
        await other.start(app_id, "wrong")
    except RuntimeError as error:
        judge.found["wrong"] = str(error)
    await asyncio.gather(judge.close(), other.close())
    return judge.found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(drive(*sys.argv[1:]))))
