"""The fake Discord is held against the client that most bots use."""

from __future__ import annotations

import json
import subprocess

import pytest

from fake_discord import BOT_ID, BOT_NAME, FakeDiscord
from programs import CLIENTS, how_to_install
from project import REPO
from waiting import eventually

CLIENT = REPO / CLIENTS["discord"] / "bin" / "python"


@pytest.mark.skipif(not CLIENT.exists(), reason=how_to_install("discord"))
@pytest.mark.slow
def test_discord_py_reads_all_that_the_fake_says() -> None:
    with FakeDiscord() as discord:
        discord.limit, discord.window_s = 5, 0.3
        process = subprocess.Popen(
            [str(CLIENT), str(REPO / "tests/kit/drive_discord.py"), discord.url,
             discord.gateway.url, discord.token], stdout=subprocess.PIPE, text=True)
        try:
            eventually(lambda: discord.newest)
            discord.say("hello", sender="9")
            discord.say(f"<@{BOT_ID}> hi", sender="9", guild="7", channel="70")
            discord.ask_to_reconnect()
            eventually(lambda: discord.sent(6))
            discord.drop()
            discord.say("", sender="9", attachments=[
                discord.attachment("a.txt", b"inside", "text/plain")])
            eventually(lambda: len(discord.sent(6)) == 2)
            discord.fail("POST", "messages", 429, {"retry_after": 0.01, "global": False},
                         when="slow", Via="1.1 google")
            discord.fail("POST", "messages", 429, "<html>banned</html>", when="banned")
            discord.say("act", sender="9")
            eventually(lambda: discord.called("PATCH", "messages")[1:])
            discord.has_content_intent = False
            discord.say("stop", sender="9")
            output, _ = process.communicate(timeout=200)
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == 0
    assert not discord.faults and not discord.gateway.faults
    assert json.loads(output) == {
        "me": BOT_NAME, "resumed": 2,
        "messages": [
            ["hello", None, "person9", False, []],
            [f"<@{BOT_ID}> hi", 7, "person9", True, []],
            ["", None, "person9", False, ["inside"]],
            ["act", None, "person9", False, []], ["stop", None, "person9", False, []]],
        "sent": [True, "edited", "number 6", "HTTPException 400 50035", "no failure: slow",
                 "HTTPException 429 0", "NotFound 404 10008"],
        "failures": ["LoginFailure", "PrivilegedIntentsRequired"],
    }
