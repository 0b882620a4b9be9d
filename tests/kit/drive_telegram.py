"""Uses a Bot API with python-telegram-bot, as the fake's judge: what this client cannot read is
wrong. Run by the Python of .channels: `drive_telegram.py URL TOKEN`, prints one JSON object."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Awaitable

import telegram  # type: ignore[import-not-found,unused-ignore]
from telegram.constants import ParseMode  # type: ignore[import-not-found,unused-ignore]


async def outcome(call: Awaitable[Any]) -> str:
    """The name of the exception that a call raises, and what it says."""
    try:
        return f"no failure: {await call}"
    except telegram.error.RetryAfter as error:
        return f"RetryAfter {int(getattr(error.retry_after, 'total_seconds', lambda: 0)()) or 2}"
    except telegram.error.TelegramError as error:
        return f"{type(error).__name__} {error.message}"


async def drive(url: str, token: str) -> dict[str, Any]:
    bot = telegram.Bot(token, base_url=f"{url}/bot", base_file_url=f"{url}/file/bot")
    wrong = telegram.Bot("1:wrong", base_url=f"{url}/bot")
    found: dict[str, Any] = {}
    async with bot:
        found["me"] = (await bot.get_me()).username
        updates = await bot.get_updates(timeout=1, allowed_updates=["message"])
        found["updates"] = [
            (each.message.text or each.message.caption, each.message.chat.type,
             each.message.from_user.id) for each in updates]
        found["again"] = len(await bot.get_updates(timeout=0))
        found["after"] = len(await bot.get_updates(offset=updates[-1].update_id + 1, timeout=0))
        sent = await bot.send_message(
            9, "<b>a</b> &lt; b", parse_mode=ParseMode.HTML, message_thread_id=None,
            link_preview_options=telegram.LinkPreviewOptions(is_disabled=True),
            reply_parameters=telegram.ReplyParameters(5, allow_sending_without_reply=True))
        found["sent"] = sent.text
        edited = await bot.edit_message_text("new", chat_id=9, message_id=sent.message_id)
        found["edited"] = edited.text
        found["typing"] = await bot.send_chat_action(9, "typing")
        photo = updates[-1].message.photo[-1]
        found["photo"] = bytes(await (await bot.get_file(photo.file_id)).download_as_bytearray()
                               ).decode()
        found["failures"] = [
            await outcome(bot.edit_message_text("new", chat_id=9, message_id=sent.message_id)),
            await outcome(bot.send_message(9, "<b>", parse_mode=ParseMode.HTML)),
            await outcome(bot.send_message(9, "x" * 4097)),
            await outcome(bot.send_message(9, "slow")),
            await outcome(bot.send_message(9, "blocked")),
            await outcome(bot.send_message(-5, "moved")),
            await outcome(bot.get_updates(timeout=0)),
            await outcome(wrong.get_me()),
        ]
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(drive(sys.argv[1], sys.argv[2]))))
