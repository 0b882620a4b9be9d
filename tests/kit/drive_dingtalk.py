"""Uses a DingTalk with dingtalk-stream, as the judge of the fake: what this client cannot read is
wrong. Run by the Python of .channels with DINGTALK_OPENAPI_ENDPOINT, the address of the fake:
`drive_dingtalk.py CLIENT_ID SECRET`, prints one JSON object.

It is a robot that writes down what it hears, and answers. At the message "stop" it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from typing import Any

import dingtalk_stream  # type: ignore[import-not-found,unused-ignore]
from dingtalk_stream import AckMessage, ChatbotMessage


class Judge(dingtalk_stream.ChatbotHandler):  # type: ignore[misc,unused-ignore]
    """A robot."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []
        self.is_done = asyncio.Event()

    async def process(self, callback: Any) -> tuple[int, str]:
        message = ChatbotMessage.from_dict(callback.data)
        texts = message.get_text_list() or []
        # These block, and the connection must not wait for them.
        loop = asyncio.get_running_loop()
        urls = [await loop.run_in_executor(None, self.get_image_download_url, each)
                for each in message.get_image_list() or []]
        replied = await loop.run_in_executor(
            None, self.reply_markdown, "Title", "**hi**", message)
        self.found.append([message.conversation_type, message.sender_staff_id,
                           "".join(texts).strip(), urls, message.is_in_at_list, replied])
        if "stop" in texts:
            self.is_done.set()
        return AckMessage.STATUS_OK, "OK"


async def drive(client_id: str, secret: str) -> None:
    logger = logging.getLogger("judge")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    client = dingtalk_stream.DingTalkStreamClient(
        dingtalk_stream.Credential(client_id, secret), logger)
    judge = Judge()
    client.register_callback_handler(ChatbotMessage.TOPIC, judge)
    running = asyncio.create_task(client.start())
    await asyncio.wait_for(judge.is_done.wait(), 150)
    assert not running.done()
    # The answer to the last message goes out after its handler.
    await asyncio.sleep(0.3)
    wrong = dingtalk_stream.DingTalkStreamClient(
        dingtalk_stream.Credential(client_id, "wrong"), logger)
    print(json.dumps([*judge.found, wrong.open_connection(), client.get_access_token()]),
          flush=True)
    # The client takes a cancellation for a broken connection, and goes on.
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(drive(*sys.argv[1:]))
