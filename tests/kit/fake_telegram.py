"""A stand-in for Telegram's Bot API on loopback. It keeps what people see on their screens, and
refuses what Telegram refuses.

    with FakeTelegram() as telegram:
        ...                                  # apiRoot: telegram.url, botToken: telegram.token
        telegram.say("hello", sender=1000)
        telegram.fail("sendMessage", 429, "Too Many Requests", retry_after=1)
        assert telegram.screen(1000) == ["hi"]
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
import urllib.parse
from collections import defaultdict
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Optional

Json = Any
BOT_ID = 4242
BOT_NAME = "ocp_test_bot"
_MAX_TEXT = 4096
_TAGS = {"b", "i", "u", "s", "code", "pre", "a", "blockquote", "tg-spoiler"}
_ATTRIBUTES = {"a": {"href"}, "code": {"class"}}
#: Fields that a form has as they are; the others of a form are JSON.
_TEXTS = {"text", "parse_mode", "action", "file_id"}
#: The fields that each method takes.
_FIELDS = {
    "getMe": set(), "deleteWebhook": {"drop_pending_updates"}, "setMyCommands": {"commands"},
    "getUpdates": {"offset", "timeout", "limit", "allowed_updates"},
    "sendMessage": {"chat_id", "text", "parse_mode", "message_thread_id", "reply_parameters",
                    "link_preview_options"},
    "editMessageText": {"chat_id", "message_id", "text", "parse_mode", "link_preview_options"},
    "sendChatAction": {"chat_id", "action", "message_thread_id"}, "getFile": {"file_id"},
}


class Refusal(Exception):
    """An error of the Bot API."""

    def __init__(self, code: int, description: str, **parameters: Json) -> None:
        super().__init__(description)
        self.code, self.description, self.parameters = code, description, parameters


class Call(NamedTuple):
    method: str
    body: Json
    at_s: float


class _Checker(HTMLParser):
    """Reads HTML as strictly as Telegram does, and keeps the text without its tags."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[str] = []
        self.plain = ""
        bare = re.sub(r"</?[a-z-]+( [a-z]+=\"[^\"<>]*\")*>", "", text)
        if "<" in bare or ">" in bare or re.search(r"&(?!(lt|gt|amp|quot|#\d+);)", bare):
            raise Refusal(400, "Bad Request: can't parse entities: unescaped character")
        self.feed(text)
        self.close()
        if self._open:
            raise Refusal(400, f"Bad Request: can't parse entities: unclosed {self._open[-1]}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        known = _ATTRIBUTES.get(tag, set())
        if tag not in _TAGS or any(name not in known for name, _ in attrs):
            raise Refusal(400, f"Bad Request: can't parse entities: unsupported tag {tag}")
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            raise Refusal(400, f"Bad Request: can't parse entities: unexpected end of {tag}")

    def handle_data(self, data: str) -> None:
        self.plain += data


def shown_text(body: Json) -> str:
    """What people read of a text. Raises Refusal."""
    text = body["text"]
    if body.get("parse_mode") == "HTML":
        text = _Checker(text).plain
    if not text.strip():
        raise Refusal(400, "Bad Request: message text is empty")
    if len(text.encode("utf-16-le")) // 2 > _MAX_TEXT:
        raise Refusal(400, "Bad Request: message is too long")
    return str(text)


class FakeTelegram:
    """The API for one bot."""

    def __init__(self, token: str = f"{BOT_ID}:TEST-token-of-the-fake", hold_s: float = 30) -> None:
        self.token, self.hold_s = token, hold_s
        self.bot: Json = {"id": BOT_ID, "is_bot": True, "first_name": "Test",
                          "username": BOT_NAME, "can_read_all_group_messages": False}
        self.calls: list[Call] = []
        self.files: dict[str, bytes] = {}
        #: Scripted refusals by method; None for a call that is answered.
        self._failures: dict[str, list[Optional[Refusal]]] = defaultdict(list)
        #: Guards everything, and wakes up polls.
        self._changed = threading.Condition()
        self._updates: list[Json] = []
        self._update_ids, self._message_ids = itertools.count(7001), itertools.count(501)
        #: By chat: what is on the screen, by message id.
        self._screens: dict[str, dict[int, str]] = defaultdict(dict)
        self._is_closed = False
        #: The id of the last update.
        self.last_id = 0
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeTelegram:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    # -- what a test does ---------------------------------------------------------------------

    def say(self, text: str, sender: int = 1000, chat: Optional[int] = None, **fields: Json) -> int:
        """Let somebody write; returns the id of the message. A negative chat is a group."""
        with self._changed:
            message_id = next(self._message_ids)
            place = {"id": chat, "type": "supergroup", "title": "Group"} if chat else (
                {"id": sender, "type": "private", "first_name": f"Person {sender}"})
            self._push({
                "message_id": message_id, "date": int(time.time()), "chat": place,
                "from": {"id": sender, "is_bot": False, "first_name": f"Person {sender}"},
                **({"text": text} if text else {}), **fields})
        return message_id

    def say_raw(self, message: Json) -> None:
        """Deliver a message of any form."""
        with self._changed:
            self._push(message)

    def _push(self, message: Json) -> None:
        self.last_id = next(self._update_ids)
        self._updates.append({"update_id": self.last_id, "message": message})
        self._changed.notify_all()

    def change_bot(self) -> None:
        """Let the token belong to another bot, whose updates begin anew."""
        with self._changed:
            self.bot["id"] += 1
            self._updates, self._update_ids = [], itertools.count(1)

    def fail(self, method: str, code: int, description: str, times: int = 1,
             **parameters: Json) -> None:
        """Refuse the next calls of a method; with code 0 hang up instead of an answer."""
        with self._changed:
            self._failures[method] += [Refusal(code, description, **parameters)] * times

    def fail_later(self, method: str, code: int, description: str, skip: int,
                   **parameters: Json) -> None:
        """Refuse a call of a method after `skip` calls that are answered."""
        with self._changed:
            queued = self._failures[method]
            queued += [None] * (skip - sum(each is None for each in queued))
            queued.append(Refusal(code, description, **parameters))

    def screen(self, chat: int) -> list[str]:
        """What the bot's messages in a chat say, in order."""
        with self._changed:
            return list(self._screens[str(chat)].values())

    def called(self, method: str) -> list[Json]:
        """The bodies of all calls of a method."""
        return [call.body for call in list(self.calls) if call.method == method]

    # -- what the bot does --------------------------------------------------------------------

    def answer(self, token: str, method: str, body: Json) -> tuple[int, Json]:
        """The answer to a call."""
        self.calls.append(Call(method, body, time.monotonic()))
        try:
            if token != self.token:
                raise Refusal(401, "Unauthorized")
            if method not in _FIELDS:
                raise Refusal(404, "Not Found")
            unknown = set(body) - _FIELDS[method]
            assert not unknown, f"{method} does not take {unknown}"
            with self._changed:
                refusal = self._failures[method].pop(0) if self._failures[method] else None
            if refusal is not None:
                raise refusal
            result = getattr(self, f"do_{method}", lambda body: True)(body)
        except Refusal as refusal:
            content = {"ok": False, "error_code": refusal.code, "description": refusal.description}
            if refusal.parameters:
                content["parameters"] = refusal.parameters
            return refusal.code, content
        return 200, {"ok": True, "result": result}

    def do_getMe(self, body: Json) -> Json:  # noqa: N802
        return self.bot

    def do_getUpdates(self, body: Json) -> Json:  # noqa: N802
        until_s = time.monotonic() + min(body.get("timeout", 0), self.hold_s)
        with self._changed:
            # A larger offset acknowledges everything before it.
            first = body.get("offset", 0)
            self._updates = [each for each in self._updates if each["update_id"] >= first]
            while not self._updates and time.monotonic() < until_s and not self._is_closed:
                self._changed.wait(until_s - time.monotonic())
            return self._updates[:body.get("limit", 100)]

    def do_sendMessage(self, body: Json) -> Json:  # noqa: N802
        text = shown_text(body)
        with self._changed:
            message_id = next(self._message_ids)
            self._screens[str(body["chat_id"])][message_id] = text
        return self._message(body, message_id, text)

    def _message(self, body: Json, message_id: int, text: str) -> Json:
        kind = "supergroup" if int(body["chat_id"]) < 0 else "private"
        return {"message_id": message_id, "date": int(time.time()), "from": self.bot,
                "chat": {"id": body["chat_id"], "type": kind}, "text": text}

    def do_editMessageText(self, body: Json) -> Json:  # noqa: N802
        text = shown_text(body)
        with self._changed:
            screen = self._screens[str(body["chat_id"])]
            if body["message_id"] not in screen:
                raise Refusal(400, "Bad Request: message to edit not found")
            if screen[body["message_id"]] == text:
                raise Refusal(400, "Bad Request: message is not modified: the text is the same")
            screen[body["message_id"]] = text
        return self._message(body, body["message_id"], text)

    def do_getFile(self, body: Json) -> Json:  # noqa: N802
        if body["file_id"] not in self.files:
            raise Refusal(400, "Bad Request: invalid file_id")
        return {"file_id": body["file_id"], "file_unique_id": "u",
                "file_path": f"files/{body['file_id']}"}


class _Handler(BaseHTTPRequestHandler):
    fake: FakeTelegram
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:  # noqa: N802
        data = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if "form" in self.headers.get("Content-Type", ""):
            body = {name: value if name in _TEXTS else json.loads(value)
                    for name, value in urllib.parse.parse_qsl(data.decode())}
        else:
            body = json.loads(data or b"{}")
        found = re.fullmatch(r"/bot([^/]+)/(\w+)", self.path)
        status, content = self.fake.answer(found[1], found[2], body) if found else (404, {})
        self._send(status, json.dumps(content).encode())

    def do_GET(self) -> None:  # noqa: N802
        path = urllib.parse.unquote(self.path)
        found = re.fullmatch(r"/file/bot([^/]+)/files/([\w.]+)", path)
        data = self.fake.files.get(found[2]) if found and found[1] == self.fake.token else None
        self._send(404 if data is None else 200, data or b"")

    def _send(self, status: int, data: bytes) -> None:
        if status == 0:
            self.close_connection = True
            return
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            # The bot has gone.
            self.close_connection = True

    def log_message(self, format: str, *args: Json) -> None:
        pass
