"""The fake Telegram is held against the client that most bots use."""

from __future__ import annotations

import json
import subprocess

import pytest

from fake_telegram import BOT_NAME, FakeTelegram
from programs import CLIENTS, how_to_install
from project import REPO

CLIENT = REPO / CLIENTS["telegram"] / "bin" / "python"


@pytest.mark.skipif(not CLIENT.exists(), reason=how_to_install("telegram"))
def test_python_telegram_bot_reads_all_that_the_fake_says() -> None:
    with FakeTelegram() as telegram:
        telegram.say("hello", sender=9)
        telegram.say("in a group", sender=9, chat=-5)
        telegram.files["photo1"] = b"jpeg"
        telegram.say("", sender=9, caption="look", photo=[
            {"file_id": "photo1", "file_unique_id": "u", "width": 1, "height": 1, "file_size": 4}])
        for refused in (
            ("sendMessage", 429, "Too Many Requests: retry after 2", {"retry_after": 2}),
            ("sendMessage", 403, "Forbidden: bot was blocked by the user", {}),
            ("sendMessage", 400, "Bad Request: group chat was upgraded",
             {"migrate_to_chat_id": -100}),
        ):
            telegram.fail_later(*refused[:3], skip=3, **refused[3])
        telegram.fail_later("getUpdates", 409, "Conflict: terminated by other request", skip=3)
        done = subprocess.run(
            [str(CLIENT), str(REPO / "tests/kit/drive_telegram.py"), telegram.url, telegram.token],
            capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    failures = found.pop("failures")
    assert found == {
        "me": BOT_NAME, "again": 3, "after": 0, "sent": "a < b", "edited": "new", "typing": True,
        "photo": "jpeg", "updates": [["hello", "private", 9], ["in a group", "supergroup", 9],
                                     ["look", "private", 9]]}
    expected = ["BadRequest Message is not modified", "BadRequest Can't parse entities",
                "BadRequest Message is too long", "RetryAfter 2",
                "Forbidden Forbidden: bot was blocked", "ChatMigrated Group migrated",
                "Conflict", "InvalidToken"]
    assert [failure.startswith(start) for failure, start in zip(failures, expected)] == (
        [True] * len(expected)), failures
