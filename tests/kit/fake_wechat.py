"""A stand-in for WeChat's bot API on loopback: the login by QR code, long polls, messages and the
tokens that answer them, "typing", and encrypted files. It keeps what people see, and refuses what
WeChat refuses.

    with FakeWeChat() as wechat:
        ...                                  # wechat.settings(); wechat.login() is its state
        wechat.say("hello", sender="anna@im.wechat")
        assert wechat.screen("anna@im.wechat") == ["hi"]
"""

from __future__ import annotations

import base64
import itertools
import threading
import time
import urllib.parse
from collections import defaultdict
from typing import Any, Callable

from aes import encrypted
from fake_api import Call, FakeApi

Json = Any
OWNER = "owner@im.wechat"
#: How many messages answer one, and where a longer text ends.
BUDGET, MAX_TEXT = 10, 2000
QR_PATHS = ("/ilink/bot/get_bot_qrcode", "/ilink/bot/get_qrcode_status")
NOT_NOW, NOT_LOGGED_IN = -2, -14


class FakeWeChat(FakeApi):
    """WeChat for one bot."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self.token, self.bot_id, self.logins = "token-of-the-bot", "bot1@im.bot", 0
        self._changed = threading.Condition(self._lock)
        self._is_over = False
        #: For how long a poll is held.
        self.hold_s = 20.0
        self._ids = itertools.count(7_500_000_000_000_000_001)
        self.messages: list[Json] = []
        #: The newest token of each person, and how often each token was used.
        self._newest: dict[str, str] = {}
        self._used: dict[str, int] = defaultdict(int)
        self._screens: dict[str, list[str]] = defaultdict(list)
        #: Person and state of each call about typing.
        self.typed: list[tuple[str, int]] = []
        #: The id of each message that was sent, as the client gave it.
        self.client_ids: list[str] = []
        self.notices: list[str] = []
        #: What the next questions of a login are answered with; then it is confirmed.
        self.login_states: list[Json] = []
        self.codes_shown = 0
        self._numbers: set[str] = set()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_over = True
            self._changed.notify_all()
        super().__exit__()

    # -- what a test does ---------------------------------------------------------------------

    def settings(self, **more: Json) -> Json:
        """An account that is not logged in."""
        return {"loginBaseUrl": self.url, "cdnBaseUrl": f"{self.url}/files", **more}

    def login(self, **more: Json) -> Json:
        """The state of an account that is logged in."""
        return {"bot_token": self.token, "bot_id": self.bot_id, "base_url": self.url,
                "user_id": OWNER, **more}

    def say(self, text: str, sender: str = OWNER, **fields: Json) -> Json:
        """Let somebody write; returns the message."""
        return self.emit([{"type": 1, "text_item": {"text": text}}], sender, **fields)

    def emit(self, items: list[Json], sender: str = OWNER, **fields: Json) -> Json:
        """Let a message with these items come."""
        with self._lock:
            number = next(self._ids)
            self._newest[sender] = f"context{number}"
            message = {
                "seq": len(self.messages) + 1, "message_id": number, "from_user_id": sender,
                "to_user_id": self.bot_id, "create_time_ms": int(time.time() * 1000),
                "session_id": "s", "message_type": 1, "message_state": 2,
                "context_token": self._newest[sender], "item_list": items, **fields}
            self.messages.append(message)
            self._changed.notify_all()
        return message

    def photo(self, data: bytes, key: bytes, **where: Json) -> Json:
        """An item with an encrypted photo; `where` says otherwise where its key is."""
        name = f"download?encrypted_query_param=p{len(self.files)}%2F%3D"
        self.files[name] = encrypted(data, key)
        param = urllib.parse.unquote(name.partition("=")[2])
        return {"type": 2, "image_item": {
            "aeskey": key.hex(), "media": {"encrypt_query_param": param}, **where}}

    def log_out(self) -> None:
        """Bind the bot elsewhere: only the next login is taken."""
        with self._lock:
            self.token += "-anew"
            self._changed.notify_all()

    def screen(self, person: str) -> list[str]:
        """What the bot's messages to somebody say, in order."""
        with self._lock:
            return list(self._screens[person])

    # -- calls --------------------------------------------------------------------------------

    def check(self, call: Call, headers: Json, told: dict[str, str]) -> None:
        path = call.path.partition("?")[0]
        self.fail_as_told(call._replace(path=path))
        wanted = {"iLink-App-Id": "bot", "iLink-App-ClientVersion": "132105"}
        if call.method == "POST":
            wanted |= {"AuthorizationType": "ilink_bot_token", "Content-Type": "application/json"}
            number = headers.get("X-WECHAT-UIN", "")
            if number in self._numbers or int(base64.b64decode(number) or b"-1") not in range(
                    1 << 32):
                self.faults.append(f"X-WECHAT-UIN {number}")
            self._numbers.add(number)
        if any(headers.get(name) != value for name, value in wanted.items()):
            self.faults.append(f"headers of {path}")
        if (path in QR_PATHS) != ("Authorization" not in headers):
            self.faults.append(f"Authorization of {path}")
        if path not in QR_PATHS:
            info = call.body.get("base_info") or {}
            if info.get("channel_version") != "2.4.9" or not info.get("bot_agent"):
                self.faults.append(f"base_info {info}")
        self.is_known = headers.get("Authorization") == f"Bearer {self.token}"

    def perform(self, call: Call) -> Json:
        path = call.path.partition("?")[0].removeprefix("/ilink/bot/")
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(call.path).query))
        if path == "get_bot_qrcode":
            return self._show_code(query, call.body)
        if path == "get_qrcode_status":
            return self._scanned(query)
        if not self.is_known:
            return {"ret": NOT_LOGGED_IN, "errcode": NOT_LOGGED_IN, "errmsg": "session timeout"}
        does = {"getupdates": self._updates, "sendmessage": self._send, "getconfig": self._config,
                "sendtyping": self._type}
        if path in does:
            return does[path](call.body)
        self.notices.append(path)
        return {"ret": 0}

    def _show_code(self, query: Json, body: Json) -> Json:
        if query != {"bot_type": "3"} or not isinstance(body.get("local_token_list"), list):
            self.faults.append(f"a code with {query} {body}")
        self.codes_shown += 1
        return {"qrcode": f"qr{self.codes_shown}",
                "qrcode_img_content": f"https://liteapp.weixin.qq.com/q/{self.codes_shown}"}

    def _scanned(self, query: Json) -> Json:
        if query.get("qrcode") != f"qr{self.codes_shown}":
            self.faults.append(f"a question about {query}")
        if self.login_states:
            state = self.login_states.pop(0)
            if callable(state):
                state = state(query)
            return {"ret": 0, **state}
        self.logins += 1
        return {"ret": 0, "status": "confirmed", "bot_token": self.token,
                "ilink_bot_id": self.bot_id, "ilink_user_id": OWNER, "baseurl": self.url}

    def _updates(self, body: Json) -> Json:
        place, token = int(body["get_updates_buf"].removeprefix("place") or 0), self.token
        self._changed.wait_for(
            lambda: len(self.messages) > place or self._is_over or self.token != token,
            self.hold_s)
        if self.token != token:
            return {"ret": NOT_LOGGED_IN}
        return {"msgs": self.messages[place:], "get_updates_buf": f"place{len(self.messages)}",
                "longpolling_timeout_ms": 35_000}

    def _send(self, body: Json) -> Json:
        message = body["msg"]
        items, person = message["item_list"], message["to_user_id"]
        if (message["from_user_id"], message["message_type"], message["message_state"],
                len(items)) != ("", 2, 2, 1) or not message["client_id"]:
            self.faults.append(f"a message {message}")
        token = message.get("context_token")
        if not token:
            # It is taken, and nobody sees it.
            return {"ret": 0}
        self._used[token] += 1
        if token != self._newest.get(person) or self._used[token] > BUDGET:
            return {"ret": NOT_NOW, "errmsg": "not now"}
        self.client_ids.append(message["client_id"])
        self._screens[person].append(items[0]["text_item"]["text"][:MAX_TEXT])
        return {"ret": 0, "message_id": next(self._ids)}

    def _config(self, body: Json) -> Json:
        is_known = body.get("context_token") == self._newest.get(body["ilink_user_id"])
        return {"ret": 0, "typing_ticket": f"ticket-{body['ilink_user_id']}"} if is_known else {
            "ret": NOT_NOW}

    def _type(self, body: Json) -> Json:
        if body["typing_ticket"] != f"ticket-{body['ilink_user_id']}":
            self.faults.append("a ticket that is not valid")
        self.typed.append((body["ilink_user_id"], body["status"]))
        return {"ret": 0}
