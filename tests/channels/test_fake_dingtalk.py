"""The fake DingTalk is held against the vendor's own client."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from fake_dingtalk import FakeDingTalk
from programs import CLIENTS, how_to_install
from project import REPO
from waiting import eventually

CLIENT = REPO / CLIENTS["dingtalk_stream"] / "bin" / "python"


@pytest.mark.skipif(not CLIENT.exists(), reason=how_to_install("dingtalk_stream"))
@pytest.mark.slow
def test_dingtalk_stream_reads_all_that_the_fake_says(tmp_path: Path) -> None:
    rich = {"richText": [{"text": "see"}, {"downloadCode": "d", "type": "picture"}]}
    with FakeDingTalk() as dingtalk:
        dingtalk.downloads["d"] = "https://example.com/d"
        env = {**os.environ, "DINGTALK_OPENAPI_ENDPOINT": dingtalk.url}
        process = subprocess.Popen(
            [str(CLIENT), str(REPO / "tests/kit/drive_dingtalk.py"), dingtalk.client_id,
             dingtalk.secret], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=env)
        try:
            eventually(lambda: dingtalk.connections)
            ping = dingtalk.system("ping", {"opaque": "7"})
            event = dingtalk.system("chat_update", {"a": 1}, kind="EVENT")
            dingtalk.say(" hello")
            dingtalk.say("to the robot", sender="staff2", group="cidG")
            dingtalk.emit(dingtalk.message(msgtype="richText", content=rich))
            eventually(lambda: not dingtalk.unanswered)
            dingtalk.say("stop")
            output, _ = process.communicate(timeout=200)
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == 0
    assert not dingtalk.faults and not dingtalk.gateway.faults and not dingtalk.unanswered
    assert (dingtalk.answers[ping]["code"], dingtalk.answers[event]["code"]) == (200, 404)
    assert json.loads(dingtalk.answers[ping]["data"]) == {"opaque": "7"}
    *heard, wrong, token = json.loads(output)
    sent = {"errcode": 0, "errmsg": "ok"}
    # It answers several at once.
    assert sorted(heard, key=str) == sorted([
        ["1", "staff1", "hello", [], None, sent], ["2", "staff2", "to the robot", [], True, sent],
        ["1", "staff1", "see", ["https://example.com/d"], None, sent],
        ["1", "staff1", "stop", [], None, sent]], key=str)
    assert wrong is None and token == dingtalk.token
    assert dingtalk.screen("staff1") == ["**hi**"] * 3
