"""Chats on WeChat, from the login to what is on the screen."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pty
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest

from channel_rows import Chat, channels
from fake_agent import FakeAgent, whole
from fake_wechat import BUDGET, OWNER, FakeWeChat
from gateway import SCRIPT, Gateway
from project import clean_env
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


@pytest.fixture
def wechat() -> Iterator[FakeWeChat]:
    with FakeWeChat() as running:
        yield running


@pytest.fixture
def agent(wechat: FakeWeChat) -> Iterator[FakeAgent]:
    """An agent that is asked on WeChat, by a gateway in this process that does not pause."""
    def logged_in(tools: Any, http: Any) -> Any:
        tools.shared.store.put_state(tools.id, wechat.login())
        return channels.WeChat(tools, http)

    row = channels.WeChat.row._replace(make=logged_in, pace_s=0.0)
    with FakeAgent() as running, Chat(running.url, row=row, **wechat.settings(allowFrom=[OWNER])):
        yield running


def test_a_long_answer_comes_in_ten_messages_and_the_rest_with_the_next_one(
    wechat: FakeWeChat, agent: FakeAgent
) -> None:
    paragraphs = [f"Paragraph {number} " + "x" * 1500 for number in range(15)]
    agent.enqueue(whole({"choices": [{"message": {"content": "\n\n".join(paragraphs)}}]}))
    wechat.say("tell me everything")
    eventually(lambda: "write anything" in "".join(wechat.screen(OWNER)))
    assert len(stays(lambda: wechat.screen(OWNER), 0.2)) <= BUDGET
    wechat.say("go on")
    eventually(lambda: "You said: go on" in wechat.screen(OWNER))
    shown = "".join(wechat.screen(OWNER))
    assert [shown.count(f"Paragraph {number} ") for number in range(15)] == [1] * 15
    assert all(len(text) <= 1800 for text in wechat.screen(OWNER)) and not wechat.faults


def test_what_wechat_does_not_take_comes_with_the_next_message(
    wechat: FakeWeChat, agent: FakeAgent
) -> None:
    wechat.fail("POST", "sendmessage", 200, {"ret": -2, "errmsg": "not now"})
    wechat.say("one")
    eventually(lambda: wechat.called("POST", "sendmessage"))
    assert stays(lambda: len(wechat.called("POST", "sendmessage")), 0.3) == 1
    wechat.say("two")
    eventually(lambda: wechat.screen(OWNER) == ["You said: one", "You said: two"])


@pytest.mark.slow
def test_a_login_on_a_terminal_shows_a_code_and_asks_for_the_number(tmp_path: Path) -> None:
    with FakeWeChat() as wechat:
        wechat.login_states = [
            {"status": "wait"}, {"status": "expired"},
            {"status": "scaned"}, asked_for_a_number("41"), asked_for_a_number("42"),
            lambda query: {"status": "verify_code_blocked" * (query["verify_code"] == "42")},
            {"status": "scaned_but_redirect", "redirect_host": wechat.url.rpartition("/")[2]},
            {"status": "scaned"}]
        settings = {"channels": {"wechat": wechat.settings()}}
        (tmp_path / "channels.json").write_text(json.dumps(settings))
        text = login_on_a_terminal(tmp_path, "41", "42")
        assert text.count("https://liteapp.weixin.qq.com/q/") == 3 and "\u2588" in text
        assert text.count("Which number does the phone show?") == 2
        assert "That number is wrong. Which" in text
        assert text.count("The code is not valid any more.") == 2
        assert "Scanned; confirm it on the phone." in text
        assert "Saved openclaw-weixin:default" in text and not wechat.login_states
        wechat.login_states = [{"status": "binded_redirect"}]
        assert "It is connected already." in login_on_a_terminal(tmp_path)
        assert wechat.token not in text and not wechat.faults and wechat.logins == 1


def asked_for_a_number(number: str) -> Any:
    """A state of a login in which the phone shows a number that nobody has typed yet."""
    return lambda query: {"status": "need_verifycode" * (query.get("verify_code") != number)}


def login_on_a_terminal(home: Path, *numbers: str) -> str:
    """What is on the terminal after a login that asks for these numbers."""
    child, terminal = pty.fork()
    if not child:
        os.execve(sys.executable, [sys.executable, str(SCRIPT), "login", "--channel", "wechat"],
                  {**clean_env(), "OCP_HOME": str(home), "COLUMNS": "100", "LINES": "40"})
    shown, left = b"", list(numbers)
    with os.fdopen(terminal, "r+b", buffering=0) as screen:
        # Linux ends the reading of a terminal that nobody has open with an error.
        with contextlib.suppress(OSError):
            while piece := screen.read(65_536):
                shown += piece
                if b"Which number" in piece:
                    screen.write(left.pop(0).encode() + b"\n")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and not left
    return shown.decode()
