"""The fake WeChat is held against the vendor's own plugin."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from fake_wechat import OWNER, FakeWeChat
from programs import CLIENTS, how_to_install
from project import REPO
from waiting import eventually

MODULES = REPO / CLIENTS["openclaw-weixin"] / "node_modules"
PLUGIN, NODE = MODULES / "@tencent-weixin" / "openclaw-weixin", MODULES / ".bin" / "node"


@pytest.mark.skipif(not (PLUGIN.exists() and NODE.exists()),
                    reason=how_to_install("openclaw-weixin"))
# It needs a newer node, which comes with OpenClaw.
@pytest.mark.exhaustive
def test_the_plugin_reads_all_that_the_fake_says(tmp_path: Path) -> None:
    data = bytes(range(256)) * 2
    with FakeWeChat() as wechat:
        wechat.login_states = [{"status": "scaned"}]
        env = {**os.environ, "HOME": str(tmp_path), "OPENCLAW_STATE_DIR": str(tmp_path)}
        process = subprocess.Popen(
            [str(NODE), str(REPO / "tests/kit/drive_wechat.mjs"), str(PLUGIN), wechat.url],
            stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=env)
        try:
            eventually(lambda: "msg/notifystart" in wechat.notices)
            first = wechat.say("hello")
            second = wechat.emit([wechat.photo(data, b"k" * 16)])
            third = wechat.emit([{
                "type": 1, "text_item": {"text": "and?"}, "ref_msg": {"title": "before"}}])
            output, _ = process.communicate(timeout=200)
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == 0
    found = json.loads(output.splitlines()[-1])
    assert found.pop("login") == ["https://liteapp.weixin.qq.com/q/1", wechat.bot_id, OWNER]
    assert found.pop("heard") == [
        ["hello", OWNER, str(first["message_id"]), None],
        ["[\u56fe\u7247]", OWNER, str(second["message_id"]), None, data.hex()],
        ["and?", OWNER, str(third["message_id"]), "before"]]
    assert found == {
        "start": {"ret": 0}, "stop": {"ret": 0}, "buffer": "place3", "sent": True,
        "eleventh": "sendMessage ret=-2 errmsg=not now",
        "wrong": {"ret": -14, "errcode": -14, "errmsg": "session timeout"}}
    assert wechat.screen(OWNER) == ["**hi**"] * 10 and wechat.typed == [(OWNER, 1), (OWNER, 2)]
    assert not wechat.faults
