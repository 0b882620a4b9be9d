"""A stand-in for Discord on loopback: the gateway and the REST API of one bot. It keeps what people
see in each channel, and refuses what Discord refuses.

    with FakeDiscord() as discord:
        ...                                  # apiRoot: discord.url, token: discord.token
        discord.say("hello", sender="1000")
        discord.say("<@4242> hi", guild="7", channel="70")
        discord.fail("POST", "messages", 500)
        assert discord.screen(discord.dm("1000")) == ["hi"]
"""

from __future__ import annotations

import itertools
import re
import time
from collections import defaultdict
from typing import Any, Callable

from fake_api import Call, Refusal
from fake_opcodes import FakeOpcodes, Session

Json = Any
BOT_ID, BOT_NAME = "4242", "ocp_test_bot"
INTENTS = 1 | 1 << 9 | 1 << 12 | 1 << 15
MAX_TEXT, MAX_NONCE = 2000, 25
#: The fields that each call takes.
SEND_FIELDS = {"content", "nonce", "enforce_nonce", "message_reference", "allowed_mentions",
               "flags", "tts", "embeds", "components", "attachments"}
EDIT_FIELDS = {"content", "allowed_mentions", "flags", "embeds", "components", "attachments",
               "tts"}


class FakeDiscord(FakeOpcodes):
    """Discord for one bot."""

    def __init__(self, token: str = "MTA0.TEST.token-of-the-fake",
                 clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self.token = token
        self.user: Json = {"id": BOT_ID, "username": BOT_NAME, "discriminator": "0", "bot": True,
                           "global_name": None, "avatar": None}
        self.has_content_intent = True
        #: By thread: the channel that it is in.
        self.threads: dict[str, str] = {}
        self.sessions_left = 1000
        #: What would have rung for somebody.
        self.pings: list[str] = []
        #: How many calls of a kind each channel takes in how long.
        self.limit, self.window_s = 5, 5.0
        self._windows: dict[str, tuple[float, int]] = {}
        self._ids = itertools.count(1_300_000_000_000_000_001)
        #: By channel, by id: the bot's messages, which people see.
        self._screens: dict[str, dict[str, Json]] = defaultdict(dict)
        self._nonces: dict[tuple[str, str], Json] = {}

    # -- what a test does ---------------------------------------------------------------------

    def dm(self, sender: str) -> str:
        """The channel of direct messages with somebody."""
        return f"9{sender}"

    def say(self, text: str, sender: str = "1000", guild: str = "", channel: str = "",
            **fields: Json) -> str:
        """Let somebody write; returns the id of the message."""
        place: Json = {"channel_id": channel or self.dm(sender)}
        if guild:
            place["guild_id"] = guild
        mentions = [self.person(each) for each in re.findall(r"<@!?(\d+)>", text)]
        message = {**self.new_message(text, self.person(sender), **place, mentions=mentions),
                   **fields}
        self.emit("MESSAGE_CREATE", message)
        return str(message["id"])

    def person(self, user_id: str) -> Json:
        """What the platform tells of somebody."""
        return self.user if user_id == BOT_ID else {
            "id": user_id, "username": f"person{user_id}", "discriminator": "0",
            "global_name": f"Person {user_id}", "avatar": None}

    def new_message(self, text: str, author: Json, **fields: Json) -> Json:
        """A message with all fields that it always has."""
        return {
            "id": str(next(self._ids)), "type": 0, "content": text, "author": author,
            "timestamp": "2026-12-01T00:00:00.000000+00:00", "edited_timestamp": None,
            "tts": False, "mention_everyone": "@everyone" in text, "mentions": [],
            "mention_roles": [], "attachments": [], "embeds": [], "pinned": False, "flags": 0,
            **fields}

    def attachment(self, name: str, data: bytes, mime: str) -> Json:
        """A file that people can send."""
        self.files[name] = data
        url = f"{self.url}/files/{name}"
        return {"id": str(next(self._ids)), "filename": name, "size": len(data), "url": url,
                "proxy_url": url, "content_type": mime}

    def screen(self, channel: str) -> list[str]:
        """What the bot's messages in a channel say, in order."""
        with self._lock:
            return [message["content"] for message in self._screens[channel].values()]

    # -- the gateway --------------------------------------------------------------------------

    def is_token(self, token: str) -> bool:
        return token == self.token

    def check_identity(self, content: Json) -> None:
        if not {"os", "browser", "device"} <= set(content["properties"]):
            self.faults.append("identify without properties")
        if content["intents"] & 1 << 15 and not self.has_content_intent:
            self.connections[-1].close(4014)

    def ready(self, session: Session) -> Json:
        return {"v": 10, "session_id": session.id, "resume_gateway_url": self.gateway.url,
                "user": self.user, "guilds": [], "application": {"id": BOT_ID, "flags": 0}}

    # -- the REST API -------------------------------------------------------------------------

    def check(self, call: Call, headers: Json, limits: dict[str, str]) -> None:
        if not re.match(r"DiscordBot \(\S+ \S+\)", headers.get("User-Agent", "")):
            raise Refusal(403, "<html>error code: 1010</html>")
        if headers.get("Authorization") != f"Bot {self.token}":
            raise Refusal(401, {"message": "401: Unauthorized", "code": 0}, Via="1.1 google")
        self.fail_as_told(call)
        if call.path.startswith("/channels/"):
            self._count(f"{call.method} {'/'.join(call.path.split('/')[:4])}", limits)

    def _count(self, bucket: str, limits: dict[str, str]) -> None:
        now_s = self.clock()
        began_s, count = self._windows.get(bucket, (now_s, 0))
        if now_s - began_s >= self.window_s:
            began_s, count = now_s, 0
        left_s = began_s + self.window_s - now_s
        if count >= self.limit:
            raise Refusal(429, {"message": "You are being rate limited.", "global": False,
                                "retry_after": left_s}, Via="1.1 google",
                          **{"Retry-After": str(int(left_s) + 1)})
        self._windows[bucket] = began_s, count + 1
        limits.update({"X-RateLimit-Limit": str(self.limit), "X-RateLimit-Bucket": bucket[-32:],
                       "X-RateLimit-Remaining": str(self.limit - count - 1),
                       "X-RateLimit-Reset-After": f"{left_s:.3f}"})

    def perform(self, call: Call) -> Json:
        method, path, body = call.method, call.path, call.body
        if (method, path) == ("GET", "/users/@me"):
            return self.user
        if (method, path) == ("GET", "/oauth2/applications/@me"):
            return {"id": BOT_ID, "name": BOT_NAME, "description": "", "icon": None,
                    "bot_public": True, "bot_require_code_grant": False, "verify_key": "",
                    "flags": 0, "owner": self.person("1")}
        if (method, path) == ("GET", "/gateway/bot"):
            return {"url": self.gateway.url, "shards": 1, "session_start_limit": {
                "total": 1000, "remaining": self.sessions_left, "reset_after": 3_600_000,
                "max_concurrency": 1}}
        place = re.fullmatch(r"/channels/(\d+)", path)
        if method == "GET" and place is not None:
            parent = self.threads.get(place[1])
            return {"id": place[1], "type": 11 if parent else 0, "parent_id": parent}
        found = re.fullmatch(r"/channels/(\d+)/(messages|typing)(?:/(\d+))?", path)
        if found is None:
            raise Refusal(404, {"message": "404: Not Found", "code": 0})
        if found[2] == "typing":
            return None
        return self._send_message(found[1], body) if method == "POST" else (
            self._edit_message(found[1], found[3], body))

    def _check_text(self, body: Json, fields: set[str]) -> str:
        unknown = set(body) - fields
        if unknown:
            self.faults.append(f"fields {unknown}")
        text, nonce = body.get("content") or "", str(body.get("nonce") or "")
        if len(text) > MAX_TEXT or len(nonce) > MAX_NONCE:
            raise Refusal(400, {"message": "Invalid Form Body", "code": 50035})
        if not text.strip():
            raise Refusal(400, {"message": "Cannot send an empty message", "code": 50006})
        allowed = body.get("allowed_mentions") or {"parse": ["everyone", "users"]}
        if re.search(r"@everyone|@here|<@", text) and allowed["parse"]:
            self.pings.append(text)
        return str(text)

    def _send_message(self, channel: str, body: Json) -> Json:
        text = self._check_text(body, SEND_FIELDS)
        key = (channel, str(body.get("nonce")))
        if body.get("enforce_nonce") and key in self._nonces:
            return self._nonces[key]
        message = self.new_message(text, self.user, channel_id=channel, nonce=body.get("nonce"),
                                   flags=body.get("flags", 0))
        self._screens[channel][message["id"]] = message
        self._nonces[key] = message
        return message

    def _edit_message(self, channel: str, message_id: str, body: Json) -> Json:
        text = self._check_text(body, EDIT_FIELDS)
        message = self._screens[channel].get(message_id)
        if message is None:
            raise Refusal(404, {"message": "Unknown Message", "code": 10008})
        message["content"] = text
        return message
