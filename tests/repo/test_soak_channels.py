"""`tools/soak_channels.py`: what it makes of what it sees, and a run of half a minute."""

from __future__ import annotations

import collections
import json
import random
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import soak_channels
from fake_agent import Request
from project import REPO, clean_env, load_script
from soak_channels import PLATFORMS, Sample, Soak

Json = Any
TELEGRAM, DISCORD = PLATFORMS[:2]


class Screens:
    """A platform with nothing but what is on the screens."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)

    def dm(self, person: str) -> str:
        return person

    def screen(self, chat: object) -> list[str]:
        return self.texts


def soak_that_saw(folder: Path, *texts: str, platform: Any = TELEGRAM) -> Soak:
    """A soak after one person has written once: m1, the first row of the inbox."""
    gateway = soak_channels.Gateway(folder, {})
    load_script("ocp_channels").Store(str(folder / "channels.db")).close()
    change(folder, "INSERT INTO inbox (account, lane, sender, message, is_done, at_s) VALUES"
           " ('a', 'lane', '1', ?, 1, 0)", json.dumps({"text": "Tell me of m1, please."}))
    soak = Soak(gateway, {platform.channel: Screens(*texts)}, [platform], None,  # type: ignore
                random.Random(1), 10.0)
    soak.said.append(soak_channels.Said("m1", platform, *platform.people[:1] * 2))
    return soak


def change(folder: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(folder / "channels.db")) as database, database:
        database.execute(statement, values)


def fate(soak: Soak) -> str:
    return str(soak_channels.Judge(soak).fate(soak.said[0]))


@pytest.mark.parametrize(("texts", "wanted"), [
    (["begin-m1. a end-m1"], "answered"),
    (["begin-m1. a", "b end-m1"], "answered"),
    (["begin-m1 begin-m2. a", "b end-m1 end-m2"], "answered"),
    (["begin-m1", "begin-m1. a end-m1"], "left over"),
    (["begin-m1. a end-m1", "begin-m1. a end-m1"], "twice"),
    (["begin-m1. a", "b end-m1", "b end-m1"], "twice"),
    (["begin-m1. a"], "lost"), (["end-m1"], "lost"), (["begin-m11 end-m11"], "lost"), ([], "lost"),
])
def test_the_screen_tells_what_became_of_a_message(
    tmp_path: Path, texts: list[str], wanted: str
) -> None:
    assert fate(soak_that_saw(tmp_path, *texts)) == wanted


def test_what_is_not_for_the_bot_may_not_be_answered_and_a_file_has_to_be_read(
    tmp_path: Path
) -> None:
    soak = soak_that_saw(tmp_path, "begin-m1. a end-m1")
    soak.said[0] = soak.said[0]._replace(has_file=True)
    assert fate(soak) == "unread"
    soak.files_seen.add("m1")
    assert fate(soak) == "answered"
    soak.said[0] = soak.said[0]._replace(is_for_bot=False)
    assert fate(soak) == "uninvited"
    soak.fakes[TELEGRAM.channel].texts.clear()
    assert fate(soak) == "uninvited"
    change(tmp_path, "DELETE FROM inbox")
    soak.files_seen.clear()
    assert fate(soak) == "unheard"


def test_a_part_may_come_twice_only_where_a_kill_hit_it_and_the_platform_has_no_numbers(
    tmp_path: Path
) -> None:
    twice = ["begin-m1. a end-m1"] * 2
    for platform, wanted in ((TELEGRAM, "repeated"), (DISCORD, "twice")):
        folder = tmp_path / platform.channel
        folder.mkdir()
        soak = soak_that_saw(folder, *twice, platform=platform)
        soak.uncertain = collections.Counter(["begin-m1", "end-m1"])
        assert fate(soak) == wanted


def test_the_database_tells_why_there_is_no_answer(tmp_path: Path) -> None:
    put = ("INSERT INTO outbox (account, chat, answer, route, text, is_last, nonce, status, at_s)"
           " VALUES ('a', 'c', ?, '{}', ?, 1, '', ?, 0)")
    soak = soak_that_saw(tmp_path)
    change(tmp_path, put, 9, "I was interrupted; please send that again.", "sent")
    assert fate(soak) == "lost"
    change(tmp_path, put, 1, "I was interrupted; please send that again.", "sent")
    assert fate(soak) == "interrupted"
    change(tmp_path, "INSERT INTO inbox SELECT 0, account, lane, sender, '{\"text\": \"m0\"}', 1,"
           " 2, '{}', 0 FROM inbox")
    change(tmp_path, "UPDATE outbox SET answer=0")
    assert fate(soak) == "swept along"
    change(tmp_path, put, 1, "rest end-m1", "held")
    assert fate(soak) == "held"
    change(tmp_path, "DELETE FROM inbox")
    soak.fakes[TELEGRAM.channel].texts = ["Too many messages are waiting; please ..."]
    change(tmp_path, "DELETE FROM outbox")
    assert fate(soak) == "refused"


def test_memory_is_judged_by_the_longest_life_after_its_first_minute() -> None:
    first = [Sample(1, 10.0, 90_000_000, 90, 0)]
    life = [Sample(2, age_s, rss, 20, 0) for age_s, rss in (
        (5.0, 20_000_000), (65.0, 50_000_000), (600.0, 52_000_000))]
    told, flaws = soak_channels.memory_flaws([*first, *life])
    assert "50.0 MB after 1.1 min, 52.0 MB at the end" in told and not flaws
    assert soak_channels.memory_flaws(life[:2] + first)[1] == []
    grown = [*life, Sample(2, 900.0, 60_000_000, 40, 0)]
    assert soak_channels.memory_flaws(grown)[1] == ["memory grows", "files stay open"]


def test_every_answer_begins_and_ends_with_what_it_answers() -> None:
    dice = random.Random(4)
    statuses = set()
    for _ in range(300):
        request = Request({}, {"messages": [{"role": "user", "content": "of m7, and of m12."}]})
        reply = soak_channels.reply_to(dice, request, set())
        statuses.add(reply.status)
        if reply.status == 200:
            texts = b"".join(piece for _, piece in reply.pieces).decode()
            assert "begin-m7 begin-m12. " in texts and "end-m7 end-m12" in texts
    assert statuses == {200, 503}


@pytest.mark.exhaustive
def test_half_a_minute_of_chats_with_kills_loses_nothing() -> None:
    ran = subprocess.run(
        [sys.executable, str(REPO / "tools" / "soak_channels.py"), "--minutes", "0.6", "--seed",
         "11", "--kill-every", "4"], env=clean_env(), capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.rstrip().endswith("passed")
