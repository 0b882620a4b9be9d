"""Lets scripted people chat for an hour through ocp_channels.py, cuts its connections and kills it
at random moments, and counts what became of every message.

    python3 tools/soak_channels.py [--minutes 60] [--seed N] [--only telegram,qqbot]

The platforms and the agent are the stand-ins of the tests, on loopback; the gateway has a folder
of its own, which is removed. Every message has a name, and its answer begins and ends with it, so
that the screens tell what was answered, how often, and whether to its end. SIGTERM ends it early.

People write directly and in groups, where half of them do not mention the bot and one is not on its
list: those must get no answer. Some send a text file, which the agent has to read. A further bot of
Telegram asks an agent that answers later, by calls that it repeats until they are taken.

A message that is not answered may have been refused because too many waited, or killed twice with
the gateway (the person is told so each time), or its end waits for the next message on a platform
with a budget. A part may come twice where it was being sent when the gateway was killed, on a
platform that does not know parts by a number. All else is a flaw, as are a gateway that grows and
whatever a platform would have refused. In the last third nothing is killed, so that memory tells.

Index: 1 platforms   2 the agent   3 the gateway   4 what happens   5 counting   6 program
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import functools
import http.client
import importlib
import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tests" / "kit"))

from fake_agent import FakeAgent, Reply, Request, refused, streamed, whole  # noqa: E402
from fake_discord import BOT_ID as DISCORD_BOT  # noqa: E402
from fake_telegram import BOT_NAME as TELEGRAM_BOT  # noqa: E402
from project import clean_env  # noqa: E402

Json = Any
Fault = Callable[[Any], object]

#: How long the gateway gets to come to rest in the end, to start, and to end in good order.
REST_S, START_S, END_S = 240.0, 30.0, 45.0
SAMPLE_S = 5.0
#: Means of the pauses between the messages of a person, faults of platforms, and kills.
PERSON_S, FAULT_S, KILL_S = 14.0, 8.0, 45.0
#: What memory may grow by from a minute after a start to the end of the longest life.
MOST_GROWTH_BYTES = 4_000_000
MOST_MORE_FILES = 6
FLOOD = 26
#: Shares of what is said: in a group, with a file; and in a group without a mention, by a stranger.
GROUP_SHARE, FILE_SHARE, ASIDE_SHARE, STRANGER_SHARE = 0.25, 0.12, 0.4, 0.1
#: How long an agent that answers later takes at most, and how long it tries to call.
LATER_S, CALLING_S = 4.0, 90.0


# ---------------------------------------------------------------------------
# 1 Platforms
# ---------------------------------------------------------------------------

class Platform(NamedTuple):
    """How a platform's stand-in is used."""

    #: The id of the channel, the module of the stand-in, and its class.
    channel: str
    module: str
    kind: str
    people: Sequence[str]
    #: The settings of its account.
    settings: Callable[[Any], Json]
    say: Callable[[Any, str, str], object]
    screen: Callable[[Any, str], list[str]]
    faults: Sequence[Fault]
    #: Whether a part that was being sent at a kill may come twice.
    may_repeat: bool
    #: The state of its account before the first start, for what is logged in by a code.
    state: Callable[[Any], Optional[Json]] = lambda fake: None
    #: What the platform does by itself again and again.
    tend: Fault = lambda fake: None
    #: The group as the screen knows it, somebody in it who is not on the list, and how somebody
    #: writes there, with a mention or without; none if the platform has no groups.
    group: str = ""
    stranger: str = ""
    say_in_group: Callable[[Any, str, str, bool], object] = lambda *_: None
    #: How somebody sends a text and a file with this name and content; None if that is not tried.
    send_file: Optional[Callable[[Any, str, str, str, bytes], object]] = None
    #: Whether its agent answers later, and the token of its bot if it is not the usual one.
    is_async: bool = False
    token: str = ""


def failing(*words: Json, **more: Json) -> Fault:
    """Refuse the next call."""
    return lambda fake: fake.fail(*words, **more)


TELEGRAM_FAULTS = (
    failing("getUpdates", 0, "dropped"), failing("getUpdates", 502, "Bad Gateway"),
    failing("getUpdates", 429, "Too Many Requests", retry_after=1),
    failing("sendMessage", 0, "dropped"), failing("sendMessage", 500, "Internal Server Error"),
    failing("sendMessage", 429, "Too Many Requests", retry_after=2),
    failing("editMessageText", 429, "Too Many Requests", retry_after=3),
    failing("editMessageText", 500, "Internal Server Error"),
    failing("sendChatAction", 500, "Internal Server Error"),
)
def say_in_telegram(fake: Any, person: str, text: str, is_mention: bool) -> None:
    """Write in the group."""
    name = f"@{TELEGRAM_BOT}" * is_mention
    entities = [{"type": "mention", "offset": 0, "length": len(name)}] if name else []
    fake.say(f"{name} {text}".strip(), sender=int(person), chat=-100777, entities=entities)


def send_to_telegram(fake: Any, person: str, text: str, name: str, data: bytes) -> None:
    """Send a document with a text below it."""
    fake.files[name] = data
    fake.say("", sender=int(person), caption=text, document={
        "file_id": name, "file_name": name, "mime_type": "text/plain", "file_size": len(data)})


def send_to_dingtalk(fake: Any, person: str, text: str, name: str, data: bytes) -> None:
    """Send a file, which comes without a text."""
    fake.files[name] = data
    fake.downloads[name] = f"{fake.url}/files/{name}"
    fake.emit(fake.message(person, msgtype="file", content={
        "fileName": name, "downloadCode": name}))


def send_to_wechat(fake: Any, person: str, text: str, name: str, data: bytes) -> None:
    """Send a text and a file that is encrypted."""
    media = fake.photo(data, b"0123456789abcdef")["image_item"]["media"]
    key = base64.b64encode(b"0123456789abcdef").decode()
    fake.emit([{"type": 1, "text_item": {"text": text}}, {"type": 4, "file_item": {
        "file_name": name, "len": len(data), "media": {**media, "aes_key": key}}}], person)


OPCODE_FAULTS: tuple[Fault, ...] = (
    lambda fake: fake.drop(), lambda fake: fake.ask_to_reconnect(),
    lambda fake: fake.invalidate(True), lambda fake: fake.ask_for_heartbeat(),
    lambda fake: fake.garbage("{not JSON"), failing("POST", "messages", 500),
    failing("POST", "messages", 502, "<html>Bad Gateway</html>"),
)
PLATFORMS = (
    Platform(
        "telegram", "fake_telegram", "FakeTelegram", ("1001", "1002", "1003", "1004"),
        lambda fake: {"botToken": fake.token, "apiRoot": fake.url},
        lambda fake, person, text: fake.say(text, sender=int(person)),
        lambda fake, person: list(fake.screen(int(person))), TELEGRAM_FAULTS, may_repeat=True,
        group="-100777", stranger="1999", say_in_group=say_in_telegram,
        send_file=send_to_telegram),
    Platform(
        "discord", "fake_discord", "FakeDiscord", ("2001", "2002", "2003", "2004"),
        lambda fake: {"token": fake.token, "apiRoot": fake.url},
        lambda fake, person, text: fake.say(text, sender=person),
        lambda fake, person: list(fake.screen(person if person == "701" else fake.dm(person))),
        (*OPCODE_FAULTS, lambda fake: fake.close(4000), failing("PATCH", "", 500),
         failing("GET", "/channels/701", 502)),
        may_repeat=False,
        # A thread, which belongs to the channel that is listed.
        tend=lambda fake: fake.threads.update({"701": "70"}),
        group="701", stranger="2999", say_in_group=lambda fake, person, text, is_mention: fake.say(
            f"<@{DISCORD_BOT}> {text}" if is_mention else text, sender=person, guild="7",
            channel="701"),
        send_file=lambda fake, person, text, name, data: fake.say(
            text, sender=person, attachments=[fake.attachment(name, data, "text/plain")])),
    Platform(
        "qqbot", "fake_qq", "FakeQQ", ("QA", "QB", "QC", "QD"), lambda fake: fake.settings(),
        lambda fake, person, text: fake.say(text, sender=person),
        lambda fake, person: list(fake.screen(person)),
        (*OPCODE_FAULTS, lambda fake: fake.close(4009), lambda fake: fake.expire()),
        may_repeat=False, group="QGROUP", stranger="QX",
        say_in_group=lambda fake, person, text, is_mention: fake.say(
            text, sender=person, group="QGROUP", is_at=is_mention),
        send_file=lambda fake, person, text, name, data: fake.say(
            text, sender=person, attachments=[fake.attachment(name, data, "text/plain")])),
    Platform(
        "dingtalk-connector", "fake_dingtalk", "FakeDingTalk", ("da", "db", "dc", "dd"),
        lambda fake: fake.settings(),
        lambda fake, person, text: fake.say(text, sender=person),
        lambda fake, person: list(fake.screen(person)),
        (lambda fake: fake.expire(), lambda fake: fake.garbage("{not JSON"),
         lambda fake: fake.system("disconnect")),
        may_repeat=True, tend=lambda fake: fake.send_again(), group="cidgroup", stranger="dx",
        say_in_group=lambda fake, person, text, is_mention: fake.say(
            text, sender=person, group="cidgroup", isInAtList=is_mention),
        send_file=send_to_dingtalk),
    Platform(
        "openclaw-weixin", "fake_wechat", "FakeWeChat",
        ("wa@im.wechat", "wb@im.wechat", "wc@im.wechat"), lambda fake: fake.settings(),
        lambda fake, person, text: fake.say(text, sender=person),
        lambda fake, person: list(fake.screen(person)),
        (failing("POST", "getupdates", 502), failing("POST", "sendmessage", 500)),
        may_repeat=True, state=lambda fake: fake.login(), send_file=send_to_wechat),
    Platform(
        "telegram:later", "fake_telegram", "FakeTelegram", ("1501", "1502"),
        lambda fake: {"botToken": fake.token, "apiRoot": fake.url},
        lambda fake, person, text: fake.say(text, sender=int(person)),
        lambda fake, person: list(fake.screen(int(person))), TELEGRAM_FAULTS, may_repeat=True,
        is_async=True, token="4343:TEST-token-of-the-later-one"),
)


def is_there(platform: Platform) -> bool:
    """Whether the tests have a stand-in for a platform."""
    return (REPO / "tests" / "kit" / f"{platform.module}.py").exists()


# ---------------------------------------------------------------------------
# 2 The agent
# ---------------------------------------------------------------------------

SENTENCE = "This is one more sentence of a **long** answer, with `code` in it. "


def names_in(request: Request) -> list[str]:
    """The names of the messages that are asked, once each."""
    return list(dict.fromkeys(re.findall(r"\bm\d+\b", request.text)))


class LateAgent:
    """An agent that says only that it has taken the question, and calls when it has the answer."""

    def __init__(self, agent: FakeAgent, dice: random.Random) -> None:
        self._agent, self._dice = agent, dice
        #: Statuses of calls, and how many were never taken.
        self.statuses: collections.Counter[int] = collections.Counter()
        agent.default = self._take

    def _take(self, request: Request) -> Reply:
        names, kind = names_in(request), self._dice.random()
        text = " ".join([*(f"begin-{name}" for name in names), SENTENCE,
                         *(f"end-{name}" for name in names)])
        if kind < 0.05:
            return refused(503, "overloaded", "later", Retry_After="1")
        if kind < 0.15:
            return whole({"choices": [{"message": {"content": text}}]})
        wait_s = 0.0 if kind < 0.25 else self._dice.uniform(0.0, LATER_S)
        threading.Thread(target=self._call, daemon=True, args=(
            request.headers["x-ocg-callback"], text, wait_s, kind > 0.9)).start()
        if not wait_s:
            # The call may be there before this answer.
            time.sleep(0.2)
        return whole({"status": "accepted"}, 202)

    def _call(self, url: str, text: str, wait_s: float, is_twice: bool) -> None:
        time.sleep(wait_s)
        until_s = time.monotonic() + CALLING_S
        while time.monotonic() < until_s:
            request = urllib.request.Request(url, json.dumps({"reply": text}).encode())
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    status = int(answer.status)
            except urllib.error.HTTPError as refusal:
                status = refusal.code
            except (OSError, http.client.HTTPException):
                status = 0
            self.statuses[status] += 1
            if status in (200, 404) and not is_twice:
                return
            is_twice = is_twice and status not in (200, 404)
            time.sleep(0.5)


def reply_to(dice: random.Random, request: Request, seen: set[str]) -> Reply:
    """An answer that begins and ends with the names of the messages it answers: at once, slowly,
    long, or in paragraphs; or, now and then, a refusal that passes. `seen` gets the files."""
    seen.update(re.findall(r"inside-(m\d+)", request.text))
    names = names_in(request)
    begin = " ".join(f"begin-{name}" for name in names) + ". "
    end = " ".join(f"end-{name}" for name in names)
    kind = dice.random()
    if kind < 0.02:
        return refused(503, "overloaded", "later", Retry_After="1")
    if kind < 0.6:
        return streamed(begin, SENTENCE, end)
    if kind < 0.85:
        middle = [SENTENCE] * dice.randrange(3, 10)
        return streamed(begin, *middle, end, pause_s=dice.uniform(0.2, 0.8))
    if kind < 0.93:
        return streamed(begin, *[SENTENCE] * 120, end, pause_s=0.03)
    return streamed(begin, *[f"\n\n{SENTENCE * 4}"] * dice.randrange(2, 8), f"\n\n{end}",
                    pause_s=0.3)


# ---------------------------------------------------------------------------
# 3 The gateway
# ---------------------------------------------------------------------------

class Sample(NamedTuple):
    """What the gateway has at a moment of one of its lives."""

    life: int
    age_s: float
    rss_bytes: int
    files: int
    database_bytes: int


class Gateway:
    """ocp_channels.py, started again and again in one folder."""

    def __init__(self, home: Path, settings: Json) -> None:
        self.home = home
        self.samples: list[Sample] = []
        self.lives = 0
        self.processor_s = 0.0
        path = home / "channels.json"
        path.write_text(json.dumps(settings))
        path.chmod(0o600)
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._started_s = 0.0

    def start(self) -> None:
        """Start it and wait until it listens. Raises RuntimeError."""
        control = self.home / "channels.sock"
        control.unlink(missing_ok=True)
        environ = {**clean_env(), "HOME": str(self.home), "OCP_HOME": str(self.home)}
        with open(self.home / "stderr", "ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, str(REPO / "ocp_channels.py"), "start", "--log-file"],
                env=environ, cwd=self.home, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr)
        self.lives += 1
        self._started_s = time.monotonic()
        while not control.exists():
            if self._process.poll() is not None or time.monotonic() > self._started_s + START_S:
                raise RuntimeError(f"it does not start: {(self.home / 'stderr').read_text()}")
            time.sleep(0.05)

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process is not None and self._process.poll() is None

    def end(self, number: int) -> int:
        """End it with a signal and return its exit code."""
        assert self._process is not None
        self.sample()
        self.processor_s += self._processor_s()
        self._process.send_signal(number)
        try:
            return self._process.wait(END_S)
        finally:
            self._process.kill()
            self._process.wait()

    def _processor_s(self) -> float:
        assert self._process is not None
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def sample(self) -> None:
        """Note what it has."""
        assert self._process is not None
        place = Path(f"/proc/{self._process.pid}")
        with contextlib.suppress(OSError):
            pages = int((place / "statm").read_text().split()[1])
            self.samples.append(Sample(
                self.lives, time.monotonic() - self._started_s, pages * os.sysconf("SC_PAGE_SIZE"),
                len(os.listdir(place / "fd")), self.database_bytes()))

    def database_bytes(self) -> int:
        """The size of its database with what is not merged into it yet."""
        return sum(path.stat().st_size for path in self.home.glob("channels.db*"))

    def rows(self, statement: str, *values: object) -> list[Any]:
        """What its database has."""
        with contextlib.closing(sqlite3.connect(self.home / "channels.db", timeout=10)) as database:
            return database.execute(statement, values).fetchall()

    def is_at_rest(self) -> bool:
        """Whether every message is settled and every part that can be sent is sent."""
        return not self.rows("SELECT 1 FROM inbox WHERE NOT is_done UNION ALL SELECT 1 FROM outbox"
                             " WHERE status IN ('pending','sending') LIMIT 1")


# ---------------------------------------------------------------------------
# 4 What happens
# ---------------------------------------------------------------------------

class Said(NamedTuple):
    """A message of a person."""

    name: str
    platform: Platform
    person: str
    #: The person, or the group, as the screen knows it.
    chat: str
    is_for_bot: bool = True
    has_file: bool = False


class Soak:
    """The people, the faults and the kills, one thing after the other in one thread."""

    def __init__(self, gateway: Gateway, fakes: dict[str, Any], platforms: Sequence[Platform],
                 agent: FakeAgent, dice: random.Random, kill_s: float) -> None:
        self._kill_s = kill_s
        self.gateway, self.fakes, self._platforms = gateway, fakes, platforms
        self._agent, self._dice = agent, dice
        self.said: list[Said] = []
        #: The names of messages whose files the agent has read.
        self.files_seen: set[str] = set()
        self.faults: collections.Counter[str] = collections.Counter()
        #: Names at the edge of parts that were being sent at a kill, by their word.
        self.uncertain: collections.Counter[str] = collections.Counter()
        self.exit_codes: collections.Counter[int] = collections.Counter()
        #: Set to come to an end before the time.
        self.is_over = False

    def run(self, seconds: float) -> float:
        """Let it all happen for some time, without kills in the last third; return how long."""
        began_s = time.monotonic()
        things: list[tuple[Callable[[], None], float]] = [
            (self._tend, SAMPLE_S), (self._tell, 60.0), (self._fault, FAULT_S),
            (self._kill, self._kill_s)]
        things += [(functools.partial(self._speak, platform, person), PERSON_S)
                   for platform in self._platforms for person in platform.people]
        due = [(began_s + self._pause(every_s), n) for n, (_, every_s) in enumerate(things)]
        while time.monotonic() < began_s + seconds and not self.is_over:
            due_s, number = min(due)
            time.sleep(max(0.0, min(due_s, began_s + seconds) - time.monotonic()))
            do, every_s = things[number]
            if do != self._kill or time.monotonic() < began_s + seconds * 2 / 3:
                do()
            due[number] = (time.monotonic() + self._pause(every_s), number)
        return time.monotonic() - began_s

    def _pause(self, mean_s: float) -> float:
        if mean_s in (SAMPLE_S, 60.0):
            return mean_s
        return min(self._dice.expovariate(1 / mean_s), 4 * mean_s)

    def rest(self) -> bool:
        """Wait until everything is settled, and return whether it is."""
        until_s = time.monotonic() + REST_S
        seconds_at_rest = 0
        # What was said last may still wait for a connection.
        while seconds_at_rest < 20 and time.monotonic() < until_s:
            self._tend()
            time.sleep(1.0)
            seconds_at_rest = seconds_at_rest + 1 if self.gateway.is_at_rest() else 0
        return seconds_at_rest > 0

    def _tend(self) -> None:
        """Do what platforms do by themselves, and look at the gateway."""
        for platform in self._platforms:
            with contextlib.suppress(OSError):
                platform.tend(self.fakes[platform.channel])
        self.gateway.sample()

    def _speak(self, platform: Platform, person: str) -> None:
        """Write once, several times in a hurry, or far too often."""
        kind = self._dice.random()
        count = FLOOD if kind < 0.004 else self._dice.randrange(2, 5) if kind < 0.15 else 1
        if platform.group and self._dice.random() < GROUP_SHARE:
            self._speak_in_group(platform, person)
            count = 0
        for _ in range(count):
            name, fake = f"m{len(self.said) + 1}", self.fakes[platform.channel]
            has_file = platform.send_file is not None and self._dice.random() < FILE_SHARE
            self.said.append(Said(name, platform, person, person, True, has_file))
            if has_file:
                assert platform.send_file is not None
                platform.send_file(fake, person, f"Read {name}, please.", f"{name}.txt",
                                   f"inside-{name}".encode())
            else:
                platform.say(fake, person, f"Tell me of {name}, please.")
        if kind > 0.99:
            # Between two connections nobody can be told anything.
            self._fault(platform)
        # Each request has the whole conversation in it.
        del self._agent.requests[:-2]

    def _speak_in_group(self, platform: Platform, person: str) -> None:
        """Write in the group: with a mention or without, or as somebody who may not."""
        name, kind = f"m{len(self.said) + 1}", self._dice.random()
        is_stranger = kind < STRANGER_SHARE
        is_mention = is_stranger or kind > STRANGER_SHARE + ASIDE_SHARE
        author = platform.stranger if is_stranger else person
        self.said.append(Said(name, platform, author, platform.group,
                              is_mention and not is_stranger))
        platform.say_in_group(self.fakes[platform.channel], author, f"Tell me of {name}, please.",
                              is_mention)

    def _fault(self, platform: Optional[Platform] = None) -> None:
        platform = platform or self._dice.choice(self._platforms)
        number = self._dice.randrange(len(platform.faults))
        with contextlib.suppress(IndexError, OSError):
            platform.faults[number](self.fakes[platform.channel])
            self.faults[platform.channel] += 1

    def _kill(self) -> None:
        """End the gateway while it has something to do, and start it again after a while."""
        for platform in self._platforms:
            self._speak(platform, self._dice.choice(platform.people))
        time.sleep(self._dice.uniform(0.0, 3.0))
        is_kill = self._dice.random() < 0.65
        code = self.gateway.end(signal.SIGKILL if is_kill else signal.SIGTERM)
        self.exit_codes[code] += 1
        if is_kill:
            for (text,) in self.gateway.rows("SELECT text FROM outbox WHERE status='sending'"):
                self.uncertain.update(set(re.findall(r"\b(?:begin|end)-m\d+\b", text)))
        time.sleep(self._dice.uniform(0.0, 2.0))
        self.gateway.start()

    def _tell(self) -> None:
        last = self.gateway.samples[-1]
        print(f"{len(self.said):6,} said, life {last.life} of {last.age_s / 60:.1f} min: "
              f"RSS {last.rss_bytes / 1e6:.1f} MB, {last.files} files, "
              f"database {last.database_bytes / 1e6:.1f} MB", flush=True)


# ---------------------------------------------------------------------------
# 5 Counting
# ---------------------------------------------------------------------------

#: What can have become of a message, with what each one means. The last five are flaws.
FATES = (
    ("answered", "once, to its end"),
    ("unheard", "in a group without a mention or by a stranger, and not answered"),
    ("repeated", "as answered, with a part twice that was being sent at a kill"),
    ("left over", "as answered, under a beginning of it that was being sent at a kill"),
    ("held", "its end waits for the next message, or a newer answer took its place"),
    ("refused", "too many were waiting, and the person was told"),
    ("interrupted", "the gateway was killed twice under it, and the person was told"),
    ("uninvited", "answered in a group, although nobody asked the bot, or a stranger did"),
    ("unread", "answered, and the agent did not get its file"),
    ("swept along", "told the same, although it had not been asked twice"),
    ("twice", "a part came twice for no such reason"),
    ("lost", "not answered, or not to its end"),
)
FLAWS = ("uninvited", "unread", "swept along", "twice", "lost")


class Row(NamedTuple):
    """What the database says of a message."""

    id: int
    lane: str
    attempts: int
    has_blocks: bool


class Judge:
    """Says what became of each message."""

    def __init__(self, soak: Soak) -> None:
        self._soak, gateway = soak, soak.gateway
        self._rows: dict[str, Row] = {}
        for number, lane, message, attempts in gateway.rows(
                "SELECT id, lane, message, attempts FROM inbox"):
            # What is sent as a file alone has its name in that of the file.
            found = re.search(r"\bm\d+\b", message)
            if found:
                self._rows[found[0]] = Row(number, lane, attempts, False)
        self._notices = [answer for (answer,) in gateway.rows(
            "SELECT answer FROM outbox WHERE text LIKE 'I was interrupted%'")]
        self._unsent = "\n".join(text for (text,) in gateway.rows(
            "SELECT text FROM outbox WHERE status='held' OR status='dead' AND"
            " why='a newer answer'"))
        self._lanes = {row.id: row.lane for row in self._rows.values()}
        screens = {(said.platform.channel, said.chat) for said in soak.said}
        self._words: dict[tuple[str, str], collections.Counter[str]] = {}
        self._screens: dict[tuple[str, str], list[str]] = {}
        kinds = {platform.channel: platform for platform in PLATFORMS}
        for channel, person in screens:
            shown = kinds[channel].screen(soak.fakes[channel], person)
            self._screens[channel, person] = shown
            self._words[channel, person] = collections.Counter(
                re.findall(r"\b(?:begin|end)-m\d+\b", "\n".join(shown)))

    def fate(self, said: Said) -> str:
        """What became of a message."""
        words, name = self._words[said.platform.channel, said.chat], said.name
        begins, ends = words[f"begin-{name}"], words[f"end-{name}"]
        if not said.is_for_bot:
            return "uninvited" if begins or ends or name in self._rows else "unheard"
        if said.has_file and begins and name not in self._soak.files_seen:
            return "unread"
        uncertain = self._soak.uncertain if said.platform.may_repeat else collections.Counter()
        if begins > 1 + uncertain[f"begin-{name}"] or ends > 1 + uncertain[f"end-{name}"]:
            is_preview = ends == 1 and not said.platform.is_async and (
                said.platform.channel in ("telegram", "discord"))
            return "left over" if is_preview and begins == 2 else "twice"
        if begins and ends:
            return "answered" if begins == ends == 1 else "repeated"
        if f"end-{name}" in self._unsent:
            return "held"
        return self._why_not(said)

    def _why_not(self, said: Said) -> str:
        row = self._rows.get(said.name)
        if row is None:
            shown = self._screens[said.platform.channel, said.chat]
            is_told = any("Too many messages are waiting" in text for text in shown)
            return "refused" if is_told else "lost"
        notices = [each for each in self._notices
                   if each <= row.id and self._lanes.get(each) == row.lane]
        if not notices:
            return "lost"
        return "interrupted" if row.attempts or max(notices) == row.id else "swept along"


def memory_flaws(samples: Sequence[Sample]) -> tuple[str, list[str]]:
    """What the longest life says of memory and files; and what is wrong with it."""
    lives = collections.Counter(sample.life for sample in samples)
    life = [sample for sample in samples if sample.life == lives.most_common(1)[0][0]]
    # What is younger still fills its caches.
    settled = [sample for sample in life if sample.age_s >= 60.0] or life[-1:]
    first, last = settled[0], settled[-1]
    grown = last.rss_bytes - first.rss_bytes
    told = (f"the longest life, {last.age_s / 60:.1f} min: RSS {first.rss_bytes / 1e6:.1f} MB "
            f"after {first.age_s / 60:.1f} min, {last.rss_bytes / 1e6:.1f} MB at the end, "
            f"most {max(each.rss_bytes for each in life) / 1e6:.1f} MB; files {first.files}, "
            f"{last.files}, most {max(each.files for each in life)}")
    flaws = ["memory grows"] if grown > MOST_GROWTH_BYTES else []
    flaws += ["files stay open"] if last.files > first.files + MOST_MORE_FILES else []
    return told, flaws


def report(soak: Soak, is_settled: bool, seconds: float) -> bool:
    """Print what became of everything, and return whether it is as it should be."""
    gateway, judge = soak.gateway, Judge(soak)
    flaws = [] if is_settled else ["it did not come to rest"]
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for said in soak.said:
        fate = judge.fate(said)
        counts[said.platform.channel][fate] += 1
        if fate in FLAWS:
            print(f"{fate}: {said.name} of {said.person} in {said.chat} on "
                  f"{said.platform.channel}")
    total = sum(counts.values(), collections.Counter())
    print("\n| platform | said | faults | " + " | ".join(name for name, _ in FATES) + " |")
    print("| --- |" + " --: |" * (len(FATES) + 2))
    for name, row in [*counts.items(), ("all", total)]:
        faults = soak.faults[name] if name != "all" else sum(soak.faults.values())
        print(f"| {name} | {sum(row.values()):,} | {faults:,} | "
              + " | ".join(f"{row[fate]:,}" for fate, _ in FATES) + " |")
    told, memory = memory_flaws(gateway.samples)
    flaws += memory
    flaws += [f"{total[fate]} {fate}" for fate in FLAWS if total[fate]]
    for channel, fake in soak.fakes.items():
        flaws += [f"{channel} would refuse: {fault}" for fault in getattr(fake, "faults", [])[:5]]
    log = (gateway.home / "channels.log").read_text(errors="replace")
    broken = re.findall(r"(?m)^.*(?:a turn failed|Sender failed|Lanes failed|Traceback).*$", log)
    flaws += [f"in the log: {line[:200]}" for line in dict.fromkeys(broken[:5])]
    ends = {str(code): count for code, count in soak.exit_codes.items()}
    flaws += ["SIGTERM did not end with 0"] if set(ends) - {"0", "-9"} else []
    said_count = max(1, len(soak.said))
    print(f"\n{gateway.lives} lives, ends by exit code {ends}; {told}")
    print(f"database {gateway.database_bytes() / 1e6:.1f} MB, "
          f"{gateway.database_bytes() / said_count:,.0f} bytes a message; the gateway's processor "
          f"time {gateway.processor_s / said_count * 1000:.0f} ms a message, "
          f"{gateway.processor_s / seconds:.1%} of a core; the stand-ins' {os.times()[0]:.0f} s")
    answered = sum(total[name] for name in ("answered", "repeated", "left over"))
    print(f"soak: {len(soak.said):,} said in {seconds / 60:.0f} min, {answered:,} answered, "
          f"{total['lost']} lost, {total['twice']} twice, {total['refused']} refused: "
          f"{'; '.join(flaws) or 'passed'}")
    return not flaws


# ---------------------------------------------------------------------------
# 6 Program
# ---------------------------------------------------------------------------

def run(minutes: float, dice: random.Random, platforms: Sequence[Platform], kept: str,
        kill_s: float) -> bool:
    """Everything from the start of the stand-ins to their end."""
    with contextlib.ExitStack() as stack:
        agent, late = (stack.enter_context(FakeAgent()) for _ in range(2))
        calls = LateAgent(late, random.Random(dice.random()))
        fakes: dict[str, Any] = {}
        for platform in platforms:
            kind = getattr(importlib.import_module(platform.module), platform.kind)
            made = kind(platform.token) if platform.token else kind()
            fakes[platform.channel] = stack.enter_context(made)
        folder = kept or stack.enter_context(tempfile.TemporaryDirectory(
            prefix="ocp-soak-", dir="/tmp"))
        gateway = Gateway(Path(folder), {
            "agentUrl": agent.url, "perSenderHour": 0, "historyMessages": 20,
            # The calls of before a kill come to the same port.
            "callbackPort": free_port(), "channels": settings_of(platforms, fakes, late.url)})
        soak = Soak(gateway, fakes, platforms, agent, dice, kill_s)
        agent.default = functools.partial(
            reply_to, random.Random(dice.random()), seen=soak.files_seen)
        gateway.start()
        log_in(gateway, fakes, platforms)
        try:
            # Until every platform has a connection it has nobody to tell anything.
            time.sleep(3.0)
            signal.signal(signal.SIGTERM, lambda *_: setattr(soak, "is_over", True))
            seconds = soak.run(minutes * 60)
            is_settled = gateway.is_alive() and soak.rest()
            print(f"SIGTERM at the end: {gateway.end(signal.SIGTERM)}; "
                  f"calls by status: {dict(calls.statuses)}")
        finally:
            if gateway.is_alive():
                gateway.end(signal.SIGKILL)
        return report(soak, is_settled, seconds)


def settings_of(platforms: Sequence[Platform], fakes: dict[str, Any], late_url: str) -> Json:
    """The accounts of all platforms; one whose name follows a colon has its channel's other."""
    channels: Json = {}
    for platform in platforms:
        channel, _, name = platform.channel.partition(":")
        places: Json = {"guilds": {"7": {"channels": {"70": {}}}}} if channel == "discord" else {
            "groups": {platform.group: {}} if platform.group else {}}
        values = {**platform.settings(fakes[platform.channel]), **places,
                  "allowFrom": list(platform.people)}
        if platform.is_async:
            values.update({"async": True, "agentUrl": late_url})
        if name:
            channels.setdefault(channel, {}).setdefault("accounts", {})[name] = values
        else:
            channels.setdefault(channel, {}).update(values)
    return channels


def free_port() -> int:
    """A port of loopback that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def log_in(gateway: Gateway, fakes: dict[str, Any], platforms: Sequence[Platform]) -> None:
    """Give accounts the state that a login would give them, and start the gateway again."""
    states = {platform.channel: platform.state(fakes[platform.channel]) for platform in platforms}
    if not any(states.values()):
        return
    gateway.end(signal.SIGTERM)
    with contextlib.closing(sqlite3.connect(gateway.home / "channels.db")) as database:
        for channel, state in states.items():
            if state:
                database.execute("INSERT OR REPLACE INTO states VALUES (?,?)",
                                 (f"{channel}:default", json.dumps(state)))
        database.commit()
    gateway.start()


def main(words: Optional[Sequence[str]] = None) -> int:
    """Return 0 if all is as it should be, 1 if not."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    options.add_argument("--minutes", type=float, default=60.0)
    options.add_argument("--seed", type=int, default=0, help="of the dice; default: a new one")
    options.add_argument("--only", default="", metavar="LIST", help="these channels alone")
    options.add_argument("--keep", default="", metavar="FOLDER", help="an empty folder to use, "
                         "which stays")
    options.add_argument("--kill-every", type=float, default=KILL_S, metavar="S",
                         help=f"mean of the pauses between kills; default: {KILL_S:g}")
    given = options.parse_args(words)
    seed = given.seed or random.randrange(1, 1_000_000)
    wanted = given.only.split(",") if given.only else [each.channel for each in PLATFORMS]
    platforms = [each for each in PLATFORMS if each.channel in wanted and is_there(each)]
    print(f"seed {seed}, {given.minutes:g} min, {', '.join(each.channel for each in platforms)}",
          flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return 0 if run(given.minutes, random.Random(seed), platforms, given.keep,
                    given.kill_every) else 1


if __name__ == "__main__":
    sys.exit(main())
