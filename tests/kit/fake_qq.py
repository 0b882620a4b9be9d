"""A stand-in for QQ's official bot API on loopback: tokens, the gateway, and replies. It keeps what
people see in each chat, and refuses what QQ refuses.

    with FakeQQ() as qq:
        ...                                  # qq.settings() is its account
        qq.say("hello", sender="PERSON")
        qq.say("hi", sender="MEMBER", group="GROUP")
        assert qq.screen("PERSON") == ["hi"]
"""

from __future__ import annotations

import itertools
import re
import time
from collections import defaultdict
from typing import Any, Callable, NamedTuple

from fake_api import Call, Refusal
from fake_opcodes import FakeOpcodes, Session

Json = Any
BOT_ID, BOT_NAME = "9911", "ocp_test_bot"
INTENTS, GUILD_INTENTS = 1 << 25, 1 << 30 | 1 << 12
MAX_TEXT, BUDGET = 4000, 5
#: How long a message may be answered, by the kind of its chat.
WINDOWS_S = {"users": 3600.0, "groups": 300.0, "channels": 300.0, "dms": 300.0}
FIELDS = {"content", "msg_type", "msg_id", "msg_seq", "markdown", "input_notify"}
#: What the vendor's client adds: where it sends to, and fields without a value.
PLACE_FIELDS = {"openid", "group_openid", "channel_id", "guild_id"}


def refused(status: int, code: int, message: str) -> Refusal:
    """A refusal in QQ's form."""
    return Refusal(status, {"message": message, "code": code, "err_code": code, "trace_id": "t"})


class Heard(NamedTuple):
    """A message that may be answered."""

    place: str
    at_s: float
    #: The numbers of its answers.
    numbers: list[int]


class FakeQQ(FakeOpcodes):
    """QQ for one bot."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self.app_id, self.secret = "102000001", "secret-of-the-fake"
        self.user: Json = {"id": BOT_ID, "username": BOT_NAME, "bot": True}
        #: How many tokens were given, and for how long each is valid.
        self.tokens, self.life_s = 0, 7200.0
        self._token_until_s = 0.0
        self.allows_markdown = self.allows_links = self.is_address_listed = True
        self.has_guilds = False
        self._heard: dict[str, Heard] = {}
        self._ids = itertools.count(1)
        #: By chat: what people see, and how often they saw that it is typing.
        self._screens: dict[str, list[str]] = defaultdict(list)
        self.typed: list[str] = []

    # -- what a test does ---------------------------------------------------------------------

    @property
    def token_url(self) -> str:
        """Where tokens are given."""
        return f"{self.url}/app/getAppAccessToken"

    @property
    def token(self) -> str:
        """The token that is valid."""
        return f"token-number-{self.tokens}"

    def settings(self, **more: Json) -> Json:
        """An account of this bot."""
        return {"appId": self.app_id, "clientSecret": self.secret, "apiRoot": self.url,
                "tokenUrl": self.token_url, **more}

    def expire(self) -> None:
        """Let the token end before its time."""
        with self._lock:
            self._token_until_s = 0.0

    def say(self, text: str, sender: str = "PERSON", group: str = "", is_at: bool = True,
            **fields: Json) -> str:
        """Let somebody write; returns the id of the message. In a group to the bot, or not."""
        if group:
            name = "GROUP_AT_MESSAGE_CREATE" if is_at else "GROUP_MESSAGE_CREATE"
            author = {"id": sender, "member_openid": sender, "username": f"Person {sender}"}
            return self.emit_message(name, f"groups/{group}", content=text, author=author,
                                     group_id=group, group_openid=group, **fields)
        author = {"id": sender, "user_openid": sender, "union_openid": ""}
        return self.emit_message("C2C_MESSAGE_CREATE", f"users/{sender}", content=text,
                                 author=author, **fields)

    def say_in_guild(self, text: str, sender: str, guild: str, channel: str) -> str:
        """Let somebody write in a channel of a guild, or directly without a channel."""
        author = {"id": sender, "username": f"Person {sender}", "bot": False}
        name = "AT_MESSAGE_CREATE" if channel else "DIRECT_MESSAGE_CREATE"
        place = f"channels/{channel}" if channel else f"dms/{guild}"
        return self.emit_message(name, place, content=text, author=author, guild_id=guild,
                                 channel_id=channel or "dm", mentions=[self.user])

    def emit_message(self, event: str, place: str, **fields: Json) -> str:
        """Let a message come that may be answered at a place."""
        with self._lock:
            message_id = f"ROBOT1.0_{next(self._ids):06}"
            self._heard[message_id] = Heard(place, self.clock(), [])
            self.emit(event, {"id": message_id, "timestamp": "2026-12-01T00:00:00+08:00",
                              "message_type": 0, **fields})
        return message_id

    def attachment(self, name: str, data: bytes, mime: str, **fields: Json) -> Json:
        """A file that people can send."""
        self.files[name] = data
        return {"content_type": mime, "filename": name, "size": len(data),
                "url": f"{self.url}/files/{name}", **fields}

    def screen(self, chat: str) -> list[str]:
        """What the bot's messages in a chat say, in order."""
        with self._lock:
            return list(self._screens[chat])

    # -- the gateway --------------------------------------------------------------------------

    def is_token(self, token: str) -> bool:
        return token == f"QQBot {self.token}" and self.clock() < self._token_until_s

    def check_identity(self, content: Json) -> None:
        wanted = INTENTS | GUILD_INTENTS * self.has_guilds
        if content["intents"] != wanted or content["shard"] != [0, 1]:
            self.faults.append(f"identify with {content['intents']} {content['shard']}")

    def ready(self, session: Session) -> Json:
        return {"version": 1, "session_id": session.id, "user": self.user, "shard": [0, 1]}

    # -- calls --------------------------------------------------------------------------------

    def check(self, call: Call, headers: Json, told: dict[str, str]) -> None:
        self.fail_as_told(call)
        if call.path == "/app/getAppAccessToken":
            return
        if not self.is_address_listed:
            raise refused(401, 11298, "ip not in the white list")
        if not self.is_token(headers.get("Authorization", "")):
            raise refused(401, 11244, "token not exist or expire")

    def perform(self, call: Call) -> Json:
        if call.path == "/app/getAppAccessToken":
            if call.body != {"appId": self.app_id, "clientSecret": self.secret}:
                return {"code": 100016, "message": "invalid appid or secret"}
            self.tokens += 1
            self._token_until_s = self.clock() + self.life_s
            return {"access_token": self.token, "expires_in": str(int(self.life_s))}
        if call.path == "/users/@me":
            return self.user
        if call.path in ("/gateway", "/gateway/bot"):
            return {"url": self.gateway.url, "shards": 1, "session_start_limit": {
                "total": 1000, "remaining": 1000, "reset_after": 3_600_000, "max_concurrency": 1}}
        found = re.fullmatch(r"/(?:v2/)?(users|groups|channels|dms)/([\w-]+)/messages", call.path)
        if found is None or call.path.startswith("/v2/") != (found[1] in ("users", "groups")):
            raise refused(404, 11260, "no such path")
        return self._send(f"{found[1]}/{found[2]}", call.body)

    def _send(self, place: str, body: Json) -> Json:
        kind, _, chat = place.partition("/")
        body = {name: value for name, value in body.items() if value is not None}
        unknown = set(body) - FIELDS - PLACE_FIELDS
        if unknown:
            self.faults.append(f"fields {unknown}")
        if not body.get("msg_id"):
            raise refused(400, 40034102, "no right to speak first")
        heard = self._heard.get(body["msg_id"])
        if heard is None or heard.place != place:
            raise refused(400, 40034024, "msg_id is not valid")
        if self.clock() - heard.at_s > WINDOWS_S[kind]:
            raise refused(400, 40034025, "msg_id is too old")
        text = self._check_text(kind, body)
        number = body.get("msg_seq", len(heard.numbers)) if kind in ("users", "groups") else -1
        if not isinstance(number, int) or not -1 <= number < 1 << 31:
            raise refused(400, 11255, "msg_seq is not valid")
        if number in heard.numbers and number >= 0:
            raise refused(400, 40054005, "deduplicated, see msgseq")
        if len(heard.numbers) >= BUDGET:
            raise refused(400, 22009, "msg limit exceed")
        heard.numbers.append(number)
        if body.get("msg_type") == 6:
            self.typed.append(chat)
        else:
            self._screens[chat].append(text)
        return {"id": f"sent{next(self._ids)}", "timestamp": "2026-12-01T00:00:00+08:00"}

    def _check_text(self, kind: str, body: Json) -> str:
        """What people read of a message. Raises Refusal."""
        message_type = body.get("msg_type", 0)
        if message_type == 6:
            if kind != "users" or body.get("input_notify", {}).get("input_type") != 1:
                raise refused(400, 11255, "no typing here")
            return ""
        is_markdown = bool(body.get("markdown"))
        if is_markdown and kind in ("channels", "dms"):
            raise refused(500, 304041, "reply message not allow markdown")
        if is_markdown != (message_type == 2):
            raise refused(400, 11255, "msg_type does not fit")
        if is_markdown and not self.allows_markdown:
            raise refused(400, 40034012, "native markdown is not allowed")
        text = str(body["markdown"]["content"] if is_markdown else body.get("content") or "")
        if not text.strip() or len(text) > MAX_TEXT:
            raise refused(400, 11255, "content is empty or too long")
        if not self.allows_links and re.search(r"https?://|\w\.[a-z]{2,}\b", text):
            raise refused(400, 40054010, "url is not allowed")
        return text
