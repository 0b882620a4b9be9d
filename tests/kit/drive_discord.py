"""Uses a Discord with discord.py, as the judge of the fake: what this client cannot read is wrong.
Run by the Python of .channels: `drive_discord.py REST GATEWAY TOKEN`, prints one JSON object.

It is a bot that writes down what it hears. At the message "act" it does what bots do, and at "stop"
it ends; two more bots then try a wrong token and an intent that they do not have."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Awaitable

import discord  # type: ignore[import-not-found,unused-ignore]
import yarl  # type: ignore[import-not-found,unused-ignore]


async def outcome(call: Awaitable[Any]) -> str:
    """The name of the exception that a call raises, and its code."""
    try:
        return f"no failure: {getattr(await call, 'content', '')}"
    except discord.HTTPException as error:
        return f"{type(error).__name__} {error.status} {error.code}"
    except discord.DiscordException as error:
        return type(error).__name__


class Judge(discord.Client):  # type: ignore[misc,unused-ignore]
    """A bot."""

    def __init__(self) -> None:
        intents = discord.Intents.none()
        intents.guilds = intents.messages = intents.message_content = True
        super().__init__(intents=intents)
        self.found: dict[str, Any] = {"messages": [], "resumed": 0}
        self.has_acted, self.has_read_file = asyncio.Event(), asyncio.Event()

    async def setup_hook(self) -> None:
        self.found["me"] = self.user.name

    async def on_resumed(self) -> None:
        self.found["resumed"] += 1

    async def on_message(self, message: Any) -> None:
        files: list[str] = []
        # Before the files are read: discord.py begins with the next message meanwhile.
        self.found["messages"].append([
            message.content, getattr(message.channel, "guild_id", None), message.author.name,
            self.user in message.mentions, files])
        for each in message.attachments:
            files.append((await each.read()).decode())
            self.has_read_file.set()
        if message.content == "act":
            self.found["sent"] = await self.act(message)
            self.has_acted.set()
        if message.content == "stop":
            await self.has_acted.wait()
            await self.has_read_file.wait()
            await self.close()

    async def act(self, message: Any) -> list[Any]:
        """Send, edit, type, and do what is refused."""
        quiet = discord.AllowedMentions.none()
        sent = await message.reply("@everyone hi", nonce="n1", allowed_mentions=quiet,
                                   suppress_embeds=True)
        again = await message.channel.send("@everyone hi", nonce="n1", allowed_mentions=quiet)
        edited = await sent.edit(content="edited", allowed_mentions=quiet)
        async with message.channel.typing():
            pass
        waited = [(await message.channel.send(f"number {number}")).content for number in range(7)]
        return [
            again.id == sent.id, edited.content, waited[-1],
            await outcome(message.channel.send("x" * 2001)),
            await outcome(message.channel.send("slow")),
            await outcome(message.channel.send("banned")),
            await outcome(message.channel.get_partial_message(5).edit(content="unknown")),
        ]


async def drive(rest: str, gateway: str, token: str) -> dict[str, Any]:
    discord.http.Route.BASE = rest
    discord.gateway.DiscordWebSocket.DEFAULT_GATEWAY = yarl.URL(gateway)
    judge = Judge()
    await asyncio.wait_for(judge.start(token), 150)
    found: dict[str, Any] = judge.found
    found["failures"] = []
    for wrong in ("wrong", token):
        async with Judge() as other:
            found["failures"].append(await outcome(asyncio.wait_for(other.start(wrong), 20)))
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(drive(*sys.argv[1:]))))
