"""A stand-in for DingTalk on loopback: stream mode, replies by address and by API, files, and the
login that makes an app. It keeps what people see in each chat, and refuses what DingTalk refuses.

    with FakeDingTalk() as dingtalk:
        ...                                  # dingtalk.settings() is its account
        dingtalk.say("hello", sender="staff1")
        dingtalk.say("hi", sender="staff1", group="cidG")
        assert dingtalk.screen("staff1") == ["hi"]

A message that the bot has not answered comes again, under another id, at `send_again`.
"""

from __future__ import annotations

import itertools
import json
import time
import urllib.parse
from collections import defaultdict
from typing import Any, Callable, NamedTuple, Optional

from fake_api import Call, FakeApi, Refusal
from websocket_server import Gone, Peer, WebSocketServer

Json = Any
TOPIC = "/v1.0/im/bot/messages/get"
MAX_BODY_BYTES = 20_000
ROBOT = "dingrobot"


class Webhook(NamedTuple):
    """An address for replies."""

    chat: str
    until_ms: int


def refused(status: int, code: str, message: str) -> Refusal:
    """A refusal in the form of the API."""
    return Refusal(status, {"code": code, "message": message, "requestid": "r"})


class FakeDingTalk(FakeApi):
    """DingTalk for one app."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self.client_id, self.secret = ROBOT, "secret-of-the-fake"
        self.gateway = WebSocketServer(self._serve)
        self._tickets: set[str] = set()
        self._ids = itertools.count(1)
        #: Connections in order; the last one gets what is new.
        self.connections: list[Peer] = []
        #: The ids of callbacks that are not answered, with their data; and each answer by id.
        self.unanswered: dict[str, Json] = {}
        self.answers: dict[str, Json] = {}
        self.tokens, self._webhooks = 0, dict[str, Webhook]()
        #: By chat: what people see; and who was called by his name.
        self._screens: dict[str, list[str]] = defaultdict(list)
        self.called_by_name: list[str] = []
        #: What the next questions of a login are answered with.
        self.login_states: list[Json] = []
        self.downloads: dict[str, str] = {}

    def __enter__(self) -> FakeDingTalk:
        self.gateway.__enter__()
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.gateway.__exit__()

    # -- what a test does ---------------------------------------------------------------------

    def settings(self, **more: Json) -> Json:
        """An account of this app."""
        return {"clientId": self.client_id, "clientSecret": self.secret, "endpoint": self.url,
                "oapiEndpoint": self.url, **more}

    def say(self, text: str, sender: str = "staff1", group: str = "", **fields: Json) -> Json:
        """Let somebody write, in a group to the bot; returns the message."""
        data = self.message(sender, group, text={"content": text}, msgtype="text", **fields)
        self.emit(data)
        return data

    def message(self, sender: str = "staff1", group: str = "", **fields: Json) -> Json:
        """A message that is not sent yet."""
        number = next(self._ids)
        chat = group or sender
        now_ms = int(time.time() * 1000)
        self._webhooks[f"hook{number}"] = Webhook(chat, now_ms + 5_400_000)
        return {
            "conversationId": group or f"cid-{sender}", "conversationType": "2" if group else "1",
            "chatbotUserId": "$:bot", "chatbotCorpId": "corp", "senderCorpId": "corp",
            "msgId": f"msg{number}", "senderId": f"$:{sender}", "senderStaffId": sender,
            "senderNick": f"Person {sender}", "robotCode": ROBOT, "isAdmin": False,
            "createAt": now_ms, "sessionWebhookExpiredTime": now_ms + 5_400_000,
            "sessionWebhook": f"{self.url}/robot/sendBySession?session=hook{number}",
            **({"isInAtList": True, "conversationTitle": "Team",
                "atUsers": [{"dingtalkId": "$:bot"}]} if group else {}), **fields}

    def emit(self, data: Json, topic: str = TOPIC, peer: Optional[Peer] = None) -> str:
        """Send a callback, which has to be answered; returns the id of the frame."""
        with self._lock:
            frame_id = f"frame{next(self._ids)}"
            self.unanswered[frame_id] = data
            self._send(peer, "CALLBACK", topic, frame_id, data)
            return frame_id

    def send_again(self) -> None:
        """Send what is not answered once more, under new ids."""
        with self._lock:
            waiting, self.unanswered = self.unanswered, {}
            for data in waiting.values():
                self.emit(data)

    def system(self, topic: str, data: Json = None, kind: str = "SYSTEM") -> str:
        """Send a frame of the platform itself; returns its id."""
        frame_id = f"frame{next(self._ids)}"
        self._send(None, kind, topic, frame_id, data or {})
        return frame_id

    def garbage(self, text: str) -> None:
        """Send a text that is no frame."""
        self.connections[-1].send(text)

    def expire(self) -> None:
        """Let all addresses for replies end before their time."""
        self._webhooks.clear()

    def screen(self, chat: str) -> list[str]:
        """What the bot's messages in a chat say, in order."""
        with self._lock:
            return list(self._screens[chat])

    # -- stream mode --------------------------------------------------------------------------

    def _send(self, peer: Optional[Peer], kind: str, topic: str, frame_id: str,
              data: Json) -> None:
        headers = {"topic": topic, "messageId": frame_id, "contentType": "application/json",
                   "time": str(int(time.time() * 1000)), "appId": "app", "connectionId": "c"}
        if peer is None and self.connections:
            peer = self.connections[-1]
        if peer is not None:
            peer.send(json.dumps({"specVersion": "1.0", "type": kind, "headers": headers,
                                  "data": json.dumps(data)}))

    def _serve(self, peer: Peer) -> None:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(peer.path).query)
        ticket = query.get("ticket", [""])[0]
        with self._lock:
            if ticket not in self._tickets:
                self.faults.append("a ticket that is not valid")
                peer.close(4001)
                return
            self._tickets.remove(ticket)
            self.connections.append(peer)
        try:
            while True:
                self._take(json.loads(peer.receive()))
        except Gone:
            pass

    def _take(self, answer: Json) -> None:
        with self._lock:
            frame_id = answer["headers"].get("messageId")
            self.answers[frame_id] = answer
            self.unanswered.pop(frame_id, None)
            if answer["headers"].get("contentType") != "application/json" or not isinstance(
                    json.loads(answer["data"]), dict) or "message" not in answer:
                self.faults.append(f"an answer {answer}")

    # -- calls --------------------------------------------------------------------------------

    @property
    def token(self) -> str:
        """The token that is valid."""
        return f"token-number-{self.tokens}"

    def check(self, call: Call, headers: Json, told: dict[str, str]) -> None:
        self.fail_as_told(call._replace(path=call.path.partition("?")[0]))
        if call.path.startswith("/v1.0/robot/") and (
                headers.get("x-acs-dingtalk-access-token") != self.token):
            raise refused(401, "InvalidAuthentication", "no such token")
        if int(headers.get("Content-Length", "0")) > MAX_BODY_BYTES:
            raise Refusal(200, {"errcode": 460101, "errmsg": "message too long"})

    def perform(self, call: Call) -> Json:
        path = call.path.partition("?")[0].removeprefix("/v1.0")
        if path.startswith("/app/registration/"):
            return self._register(path.rpartition("/")[2], call.body)
        does = {"/gateway/connections/open": self._open, "/oauth2/accessToken": self._give_token,
                "/robot/sendBySession": lambda body: self._reply(call.path, body),
                "/robot/oToMessages/batchSend": self._send_to_people,
                "/robot/groupMessages/send": self._send_to_group,
                "/robot/messageFiles/download": self._file}
        if path not in does:
            raise refused(404, "InvalidAction.NotFound", "no such path")
        return does[path](call.body)

    def _check_app(self, client_id: str, secret: str) -> None:
        if (client_id, secret) != (self.client_id, self.secret):
            raise refused(401, "authFailed", "clientId or clientSecret is wrong")

    def _open(self, body: Json) -> Json:
        self._check_app(body.get("clientId"), body.get("clientSecret"))
        if {"type": "CALLBACK", "topic": TOPIC} not in body["subscriptions"]:
            self.faults.append("a connection without the bot's messages")
        ticket = f"ticket+{next(self._ids)}/="
        self._tickets.add(ticket)
        return {"endpoint": f"{self.gateway.url}/connect", "ticket": ticket}

    def _give_token(self, body: Json) -> Json:
        self._check_app(body.get("appKey"), body.get("appSecret"))
        self.tokens += 1
        return {"accessToken": self.token, "expireIn": 7200}

    def _reply(self, path: str, body: Json) -> Json:
        webhook = self._webhooks.get(path.partition("session=")[2])
        if webhook is None or webhook.until_ms < time.time() * 1000:
            return {"errcode": 300001, "errmsg": "session is gone"}
        if body.get("msgtype") not in ("text", "markdown"):
            return {"errcode": 400105, "errmsg": "no such msgtype"}
        content = body[body["msgtype"]]
        called = body.get("at", {}).get("atUserIds", [])
        self._show(webhook.chat, content.get("text") or content.get("content"), called)
        return {"errcode": 0, "errmsg": "ok"}

    def _show(self, chat: str, text: str, called: list[str]) -> None:
        if not text:
            self.faults.append("an empty message")
        self.called_by_name += [each for each in called if f"@{each}" in text]
        self._screens[chat].append(text)

    def _sent(self, chat: str, body: Json) -> Json:
        content = json.loads(body["msgParam"])
        if body["robotCode"] != ROBOT or body["msgKey"] != "sampleMarkdown" or not (
                0 < len(content["title"]) <= 20):
            raise refused(400, "invalidParameter", "no such message")
        self._show(chat, content["text"], [])
        return {"processQueryKey": f"key{next(self._ids)}"}

    def _send_to_people(self, body: Json) -> Json:
        for each in body["userIds"]:
            found = self._sent(each, body)
        return {**found, "invalidStaffIdList": [], "flowControlledStaffIdList": []}

    def _send_to_group(self, body: Json) -> Json:
        return self._sent(body["openConversationId"], body)

    def _file(self, body: Json) -> Json:
        if body["robotCode"] != ROBOT or body["downloadCode"] not in self.downloads:
            raise refused(400, "invalidParameter.downloadCode", "no such file")
        return {"downloadUrl": self.downloads[body["downloadCode"]]}

    def _register(self, step: str, body: Json) -> Json:
        if step == "init":
            return {"errcode": 0, "nonce": "n1"} if body.get("source") else {"errcode": 40035}
        if step == "begin" and body == {"nonce": "n1"}:
            return {"errcode": 0, "device_code": "d1", "interval": 0, "expires_in": 7200,
                    "verification_uri_complete": "https://oapi.dingtalk.com/scan?code=d1"}
        if step == "poll" and body == {"device_code": "d1"}:
            return self.login_states.pop(0) if self.login_states else {
                "errcode": 0, "status": "SUCCESS", "client_id": self.client_id,
                "client_secret": self.secret}
        return {"errcode": 40035, "errmsg": "invalid"}
