"""Chats on WeChat, from the login to what is on the screen."""

from __future__ import annotations

import base64
from typing import Any

from channel_rows import Chat, channels
from fake_agent import FakeAgent, whole
from fake_wechat import BUDGET, OWNER, FakeWeChat
from gateway import Gateway
from waiting import eventually, stays

PHOTO = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 3


def test_a_login_is_enough_to_chat_and_a_new_one_heals() -> None:
    with FakeWeChat() as wechat, FakeAgent() as agent:
        gateway = Gateway(None, agent, channels={"wechat": wechat.settings()})
        try:
            gateway.write()
            assert gateway.run("login", "--channel", "wechat").code == 0
            gateway.start()
            wechat.emit([wechat.photo(PHOTO, b"k" * 16), {
                "type": 1, "text_item": {"text": "what is this?"}}])
            eventually(lambda: wechat.screen(OWNER) == ["You said: what is this?"])
            image = agent.requests[0].body["messages"][-1]["content"][1]["image_url"]["url"]
            assert base64.b64decode(image.partition("base64,")[2]) == PHOTO
            wechat.log_out()
            eventually(lambda: gateway.status()["channels"][0]["status"] == "login needed")
            assert gateway.run("login", "--channel", "wechat").code == 0
            wechat.say("again")
            eventually(lambda: wechat.screen(OWNER)[1:] == ["You said: again"])
            log = gateway.log
        finally:
            gateway.__exit__()
    assert not wechat.faults and len(agent.requests) == 2
    for secret in ("token-of-the-bot", "context7", "what is this"):
        assert secret not in log


def test_a_long_answer_comes_in_ten_messages_and_the_rest_with_the_next_ones() -> None:
    paragraphs = [f"Paragraph {number} " + "x" * 1500 for number in range(15)]
    with FakeWeChat() as wechat, FakeAgent() as agent:
        def logged_in(tools: Any, http: Any) -> Any:
            tools.shared.store.put_state(tools.id, wechat.login())
            return channels.WeChat(tools, http)

        row = channels.WeChat.row._replace(make=logged_in, pace_s=0.0)
        with Chat(agent.url, row=row, **wechat.settings(allowFrom=[OWNER])):
            agent.enqueue(whole({"choices": [{"message": {"content": "\n\n".join(paragraphs)}}]}))
            wechat.say("tell me everything")
            eventually(lambda: "write anything" in "".join(wechat.screen(OWNER)))
            assert len(stays(lambda: wechat.screen(OWNER), 0.2)) <= BUDGET
            wechat.fail("POST", "sendmessage", 200, {"ret": -2, "errmsg": "not now"})
            wechat.say("go on")
            # What was refused waits with all that follows it, and is not tried again.
            eventually(lambda: "not now" not in str(wechat._failures))
            count = stays(lambda: len(wechat.called("POST", "sendmessage")), 0.3)
            wechat.say("/more")
            eventually(lambda: "Paragraph 14 " in "".join(wechat.screen(OWNER)))
            eventually(lambda: "You said: go on" in wechat.screen(OWNER))
            assert len(wechat.called("POST", "sendmessage")) > count
            whole_text = "".join(wechat.screen(OWNER))
    assert [whole_text.count(f"Paragraph {number} ") for number in range(15)] == [1] * 15
    assert all(len(text) <= 1800 for text in wechat.screen(OWNER)) and not wechat.faults
