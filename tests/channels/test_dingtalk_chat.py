"""Chats on DingTalk, from what a person writes to what is on the screen."""

from __future__ import annotations

import json
import threading

from fake_agent import FakeAgent, whole
from fake_dingtalk import FakeDingTalk
from gateway import Gateway
from waiting import eventually


def test_each_message_is_answered_once_whatever_the_platform_does() -> None:
    with FakeDingTalk() as dingtalk, FakeAgent() as agent:
        account = dingtalk.settings(dmPolicy="open", allowFrom=["*"], groups={"cidG": {}})
        accounts = {"dingtalk": {"accounts": {"default": account, "new": {}}}}
        with Gateway(None, agent, channels=accounts) as gateway:
            eventually(lambda: dingtalk.connections)
            said = dingtalk.say("hello")
            dingtalk.emit(said)
            eventually(lambda: dingtalk.screen("staff1"))
            dingtalk.emit(said)
            dingtalk.system("disconnect")
            eventually(lambda: len(dingtalk.connections) == 2)
            dingtalk.say("hi", sender="staff2", group="cidG")
            eventually(lambda: dingtalk.screen("cidG"))
            can_answer = threading.Event()
            agent.default = lambda request: can_answer.wait(20) and whole(
                {"choices": [{"message": {"content": "late"}}]})
            dingtalk.say("slow", sender="staff3")
            eventually(lambda: "slow" in agent.asked())
            dingtalk.expire()
            can_answer.set()
            eventually(lambda: dingtalk.screen("staff3"))
            eventually(lambda: not dingtalk.unanswered)
            log, status = gateway.log, gateway.run("status", "--json").stdout
            assert [each["status"] for each in json.loads(status)["channels"]] == [
                "running", "login needed"]
    assert dingtalk.screen("staff1") == ["You said: hello"]
    assert dingtalk.screen("cidG") == ["@staff2  \nYou said: [Person staff2]: hi"]
    assert dingtalk.screen("staff3") == ["late"] and dingtalk.called_by_name == ["staff2"]
    assert len(agent.requests) == 3 and not dingtalk.faults and not dingtalk.gateway.faults
    for secret in (dingtalk.secret, "session=hook", "ticket", "hello", dingtalk.token):
        assert secret not in log + status
