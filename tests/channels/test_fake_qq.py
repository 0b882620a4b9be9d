"""The fake QQ is held against the vendor's own client."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from fake_qq import BOT_NAME, FakeQQ
from programs import CLIENTS, how_to_install
from project import REPO
from waiting import eventually

CLIENT = REPO / CLIENTS["botpy"] / "bin" / "python"


@pytest.mark.skipif(not CLIENT.exists(), reason=how_to_install("botpy"))
@pytest.mark.slow
def test_botpy_reads_all_that_the_fake_says(tmp_path: Path) -> None:
    with FakeQQ() as qq:
        qq.has_guilds = True
        process = subprocess.Popen(
            [str(CLIENT), str(REPO / "tests/kit/drive_qq.py"), qq.url, qq.app_id, qq.secret],
            stdout=subprocess.PIPE, text=True, cwd=tmp_path)
        try:
            eventually(lambda: qq.newest)
            qq.say("hello", attachments=[qq.attachment("a.txt", b"inside", "file")])
            qq.say(" to the bot", sender="MEMBER", group="GROUP")
            qq.say_in_guild("hi", "1", "7", "70")
            qq.say_in_guild("between us", "1", "8", "")
            eventually(lambda: qq.screen("GROUP") and qq.screen("70") and qq.screen("8"))
            qq.drop()
            qq.say("act")
            eventually(lambda: len(qq.screen("PERSON")) == 5)
            qq.say("stop")
            output, _ = process.communicate(timeout=200)
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == 0
    assert not qq.faults and not qq.gateway.faults
    assert json.loads(output) == {
        "me": BOT_NAME, "resumed": 1,
        "messages": [
            ["c2c", "hello", "PERSON", [["a.txt", 6]]], ["group", " to the bot", "GROUP", "MEMBER"],
            ["guild", "hi", "70", "1"], ["dm", "between us", "8", "1"],
            ["c2c", "act", "PERSON", []], ["c2c", "stop", "PERSON", []]],
        "group": "sent", "dm": "sent",
        "guild": ["sent", "ServerError reply message not allow markdown"],
        "acted": ["sent", "ServerError deduplicated, see msgseq", "sent",
                  "ServerError no right to speak first", "sent", "sent", "sent",
                  "ServerError msg limit exceed"],
        "wrong": "{'code': 100016, 'message': 'invalid appid or secret'}",
    }
