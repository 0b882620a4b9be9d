"""A gateway with every platform, each of which sends what no platform should: it goes on with all
of them, and keeps nothing of that."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from depth import by_depth
from fake_agent import FakeAgent
from fake_discord import BOT_ID
from fake_wechat import OWNER
from gateway import Gateway
from junk import JUNK, mutated
from platforms import Platforms
from waiting import eventually

Json = Any
ROUNDS = 3
#: How many messages of each platform in each round.
COUNT = by_depth(40, 70, 1000)
#: What the memory may grow by from the second round on.
MOST_GROWTH_BYTES = 2_000_000


class Fuzzed(Platforms):
    """The platforms, and a gateway that runs between them and an agent."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        super().__init__(stack)
        self._chance = random.Random(13)
        agent = stack.enter_context(FakeAgent())
        self.gateway = Gateway(None, agent, channels=self.settings())
        stack.callback(self.gateway.__exit__)
        self.gateway.write()
        assert self.gateway.run("login", "--channel", "openclaw-weixin").code == 0
        self.gateway.start()
        eventually(lambda: self.gateway.status()["running"] == 5 and self.dingtalk.connections)

    def platforms(self) -> Iterator[tuple[Any, Any, Callable[[], None]]]:
        """Each platform, the chat of who is answered there, and what sends junk."""
        yield self.telegram, 1000, self._telegram
        yield self.discord, "91000", self._discord
        yield self.qq, "PERSON", self._qq
        yield self.dingtalk, "staff1", self._dingtalk
        yield self.wechat, OWNER, self._wechat

    def _mutated(self, value: Json) -> Json:
        return mutated(copy.deepcopy(value), self._chance)

    def _frame(self) -> str:
        """A text that is no frame, or one that is odd."""
        event = {"op": self._chance.choice([0, 11, 99, None, []]), "s": None, "t": "MESSAGE_CREATE",
                 "d": self._chance.choice(JUNK), "type": "CALLBACK", "headers": {}, "data": "x"}
        text = json.dumps(self._mutated(event))
        return text[:self._chance.randrange(len(text) + 1)]

    def _telegram(self) -> None:
        self.telegram.say_raw(self._mutated({
            "message_id": 5, "date": 1, "chat": {"id": 9, "type": "private"}, "text": "hello @x",
            "from": {"id": 9, "is_bot": False, "first_name": "A"}, "media_group_id": "1",
            "entities": [{"type": "mention", "offset": 6, "length": 2}],
            "photo": [{"file_id": "a", "file_size": 3}], "document": {"file_id": "b"}}))

    def _discord(self) -> None:
        made = self.discord.new_message(
            f"<@{BOT_ID}> hi", self.discord.person("1"), channel_id="70", guild_id="7",
            mentions=[self.discord.user], message_snapshots=[{"message": {"content": "x"}}],
            referenced_message=self.discord.new_message("x", self.discord.user))
        self.discord.emit("MESSAGE_CREATE", self._mutated(made))
        self.discord.garbage(self._frame())

    def _qq(self) -> None:
        self.qq.emit("GROUP_MESSAGE_CREATE", self._mutated({
            "id": f"m{self._chance.random()}", "content": "<@A> hi", "group_openid": "G",
            "author": {"id": "1", "member_openid": "1"}, "message_type": 103,
            "mentions": [{"member_openid": "A", "is_you": True}], "msg_elements": [{}],
            "attachments": [{"content_type": "image/png", "url": "x"}]}))
        self.qq.garbage(self._frame())

    def _dingtalk(self) -> None:
        data = self.dingtalk.message("9", "cidG", msgtype="richText", content={
            "richText": [{"text": "a"}, {"type": "picture", "downloadCode": "c"}]})
        self.dingtalk.emit(self._mutated(data))
        self.dingtalk.garbage(self._frame())

    def _wechat(self) -> None:
        with self.wechat._lock:
            made = self.wechat.emit([self.wechat.photo(b"x", b"k" * 16), {
                "type": 1, "text_item": {"text": "a"}, "ref_msg": {"title": "t"}}], "9@im.wechat")
            self.wechat.messages[-1] = self._mutated(made)

    def round(self, number: int) -> None:
        """Let all platforms send junk, and then one message each that is answered."""
        for fake, chat, send_junk in self.platforms():
            for _ in range(COUNT):
                send_junk()
            fake.say(f"round {number}")
            eventually(lambda fake=fake, chat=chat: (  # type: ignore[misc]
                f"You said: round {number}" in fake.screen(chat)), timeout_s=60)

    def memory(self) -> dict[str, int]:
        """What the system tells of the gateway: bytes, and threads."""
        assert self.gateway.process is not None
        lines = Path(f"/proc/{self.gateway.process.pid}/status").read_text().splitlines()
        found = dict(line.split(":", 1) for line in lines)
        return {"bytes": 1024 * int(found["VmRSS"].split()[0]), "threads": int(found["Threads"])}


@pytest.mark.slow
def test_no_message_and_no_frame_of_any_form_ends_an_account_or_stays_in_memory() -> None:
    with contextlib.ExitStack() as stack:
        fuzzed = Fuzzed(stack)
        sizes = []
        for number in range(ROUNDS):
            fuzzed.round(number)
            eventually(lambda: not fuzzed.gateway.status()["turns"])
            sizes.append(fuzzed.memory())
        log, status = fuzzed.gateway.log, fuzzed.gateway.status()
    assert {each["status"] for each in status["channels"]} == {"running"}, status
    assert "connection lost" not in log and " error " not in log, log[-3000:]
    assert log.count("a message was not understood") > COUNT // 10
    # Nothing was answered but what is said at the end of each round.
    assert sizes[-1]["threads"] <= sizes[1]["threads"], sizes
    assert sizes[-1]["bytes"] - sizes[1]["bytes"] < MOST_GROWTH_BYTES, sizes
