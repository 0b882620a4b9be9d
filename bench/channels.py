"""How soon an answer shows in a chat, and what a message costs: ocp_channels.py between a
stand-in for Telegram and one for the agent.

    python3 bench/channels.py [--rounds 15] [--messages 300]

One run of about two minutes, Markdown on stdout. Both stand-ins are those of the tests, in the
process of the benchmark; the gateway is a process of its own with an empty folder. No claude is
needed: the agent's answers are made up, at a pace that is known.

Index: 1 the agent and the gateway   2 how soon   3 how many   4 table and program
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common

sys.path.insert(0, str(common.REPO / "tests" / "kit"))

from fake_agent import FakeAgent, Reply, Request, chunk, raw_stream, streamed  # noqa: E402
from fake_telegram import FakeTelegram  # noqa: E402
from project import clean_env  # noqa: E402

Json = Any
#: What the program waits for on purpose: the next message of somebody, and, so that short answers
#: are no previews, the first one of those.
QUIET_S, PREVIEW_AFTER_S = 0.3, 1.2
TARGET_S = 0.1
#: Long enough for a preview.
FIRST_WORDS = "These are the first words of an answer that takes its time. "
MORE_WORDS = "And here is more. "


# ---------------------------------------------------------------------------
# 1 The agent and the gateway
# ---------------------------------------------------------------------------

class Answer:
    """A streamed answer, and when what of it was sent."""

    def __init__(self, first_after_s: float, more: int) -> None:
        self._first_after_s, self._more = first_after_s, more
        self.asked_s = self.first_s = self.last_s = 0.0

    def __call__(self, request: Request) -> Reply:
        self.asked_s = time.monotonic()
        return raw_stream(self._pieces())  # type: ignore[arg-type]

    def _pieces(self) -> Iterator[tuple[float, bytes]]:
        # A piece is asked for when the one before it has been sent.
        yield self._first_after_s, chunk(FIRST_WORDS)
        self.first_s = self.last_s = time.monotonic()
        for _ in range(self._more):
            yield 0.1, chunk(MORE_WORDS)
            self.last_s = time.monotonic()
        yield 0.0, b"data: [DONE]\n\n"


class Gateway:
    """ocp_channels.py; to be used in a `with`."""

    def __init__(self, folder: Path, telegram: FakeTelegram, agent: FakeAgent) -> None:
        settings = {"agentUrl": agent.url, "perSenderHour": 0, "channels": {"telegram": {
            "botToken": telegram.token, "apiRoot": telegram.url,
            "dmPolicy": "open", "allowFrom": ["*"]}}}
        path = folder / "channels.json"
        path.write_text(json.dumps(settings))
        path.chmod(0o600)
        environ = {**clean_env(), "HOME": str(folder), "OCP_HOME": str(folder)}
        # As a second start finds it: compiled.
        program = "import os, sys, ocp_channels as it; sys.exit(it.main(sys.argv[1:], os.environ))"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, "start", "--log-file"], cwd=folder,
            env={**environ, "PYTHONPATH": str(common.REPO)}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.pid = self._process.pid

    def __enter__(self) -> Gateway:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        common.end(self._process, 30.0)

    def processor_s(self) -> float:
        """The processor time that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> int:
        """The memory that it occupies; 0 where that is not known."""
        memory = common.memory_of(self.pid)
        return memory.rss_bytes if memory else 0


def wait_for(what: str, is_there: Callable[[], object]) -> None:
    """Return when it is there. Raises BenchError."""
    until_s = time.monotonic() + common.PATIENCE_S
    while not is_there():
        if time.monotonic() > until_s:
            raise common.BenchError(f"no {what}")
        time.sleep(0.002)


# ---------------------------------------------------------------------------
# 2 How soon
# ---------------------------------------------------------------------------

class Chat:
    """What the rounds have in common."""

    def __init__(self, telegram: FakeTelegram, agent: FakeAgent) -> None:
        self._telegram, self._agent = telegram, agent
        self._sender = 100

    def ask(self, answer: Answer) -> tuple[float, list[float]]:
        """Let somebody new write; returns when, and when the screen changed up to the end."""
        self._sender += 1
        sender = self._sender
        self._agent.default = answer
        said_s = time.monotonic()
        self._telegram.say("Tell me.", sender=sender)
        wait_for("answer", lambda: answer.last_s and not self._agent.running)
        whole = answer_text(answer).strip()
        wait_for("end of an answer", lambda: self._telegram.screen(sender) == [whole])
        return said_s, [call.at_s for call in list(self._telegram.calls)
                        if call.method in ("sendMessage", "editMessageText")
                        and call.body["chat_id"] == sender]


def answer_text(answer: Answer) -> str:
    """The whole text of an answer."""
    return FIRST_WORDS + MORE_WORDS * answer._more


#: What is timed, with the answer that shows it, and how late something was.
LINES: tuple[tuple[str, Callable[[], Answer], Callable[[Answer, float, list[float]], float]],
             ...] = (
    ("the agent is asked, after the message and 0.3 s of quiet", lambda: Answer(0.0, 0),
     lambda answer, said_s, seen_s: answer.asked_s - said_s - QUIET_S),
    ("a short answer is on the screen, after its end", lambda: Answer(0.3, 0),
     lambda answer, said_s, seen_s: seen_s[0] - answer.last_s),
    ("the preview is on the screen, after 1.2 s, of an agent that began at 0.3 s",
     lambda: Answer(0.3, 20),
     lambda answer, said_s, seen_s: seen_s[0] - answer.asked_s - PREVIEW_AFTER_S),
    ("the preview is on the screen, after the first token, of an agent that began at 1.8 s",
     lambda: Answer(1.8, 15),
     lambda answer, said_s, seen_s: seen_s[0] - answer.first_s),
    ("the last edit is on the screen, after the last token", lambda: Answer(0.3, 15),
     lambda answer, said_s, seen_s: seen_s[-1] - answer.last_s),
)


def measure_delays(chat: Chat, rounds: int) -> list[list[float]]:
    """Return the delays of each line, in seconds."""
    found: list[list[float]] = [[] for _ in LINES]
    for number in range(rounds + 1):
        common.progress(f"channels: round {number} of {rounds}")
        for delays, (_, make, late) in zip(found, LINES):
            answer = make()
            said_s, seen_s = chat.ask(answer)
            # The first round is for what is done once.
            if number:
                delays.append(late(answer, said_s, seen_s))
    return found


# ---------------------------------------------------------------------------
# 3 How many
# ---------------------------------------------------------------------------

class Load(NamedTuple):
    """What messages of as many people at once cost."""

    messages: int
    seconds: float
    processor_s: float
    rss_before_bytes: int
    rss_after_bytes: int


def measure_load(gateway: Gateway, telegram: FakeTelegram, agent: FakeAgent, count: int) -> Load:
    """Let so many people write at once to an agent that answers at once."""
    agent.default = lambda request: streamed("You said: ", request.text)
    before_bytes, before_s = gateway.rss_bytes(), gateway.processor_s()
    began_s = time.monotonic()
    people = range(100_000, 100_000 + count)
    for sender in people:
        telegram.say(f"I am {sender}.", sender=sender)
    wait_for("answers", lambda: all(telegram.screen(sender) for sender in people))
    ended_s = time.monotonic()
    time.sleep(1.0)
    return Load(count, ended_s - began_s, gateway.processor_s() - before_s, before_bytes,
                gateway.rss_bytes())


# ---------------------------------------------------------------------------
# 4 Table and program
# ---------------------------------------------------------------------------

def table(delays: Sequence[Sequence[float]], load: Load, host: str) -> str:
    """The Markdown."""
    rows = [[name, common.shown_ms(common.median(each)),
             common.shown_ms(common.percentile(each, 0.9)), common.shown_ms(max(each))]
            for (name, _, _), each in zip(LINES, delays)]
    costs = [
        ["messages a second", f"{load.messages / load.seconds:.1f}"],
        ["processor time of the gateway a message, ms",
         common.shown_ms(load.processor_s / load.messages)],
        ["RSS before, MB", common.shown_mb(load.rss_before_bytes)],
        ["RSS after, MB", common.shown_mb(load.rss_after_bytes)],
    ]
    worst_s = max(common.percentile(each, 0.9) for each in delays[2:4])
    return "\n".join([
        common.markdown_table(["how late", "median ms", "p90 ms", "worst ms"], rows), "",
        common.markdown_table([f"{load.messages} people write at once", "now"], costs), "",
        common.verdict("preview after the first token and 1.2 s, p90 ms", worst_s * 1000,
                       "at most 100", worst_s <= TARGET_S),
        "", f"{len(delays[0])} rounds; {host}",
    ])


def run(options: argparse.Namespace) -> str:
    """Everything from the start of the stand-ins to their end; the Markdown."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ocp-b-", dir="/tmp")))
        telegram = stack.enter_context(FakeTelegram())
        agent = stack.enter_context(FakeAgent())
        gateway = stack.enter_context(Gateway(folder, telegram, agent))
        wait_for("poll of the gateway", lambda: telegram.called("getUpdates"))
        delays = measure_delays(Chat(telegram, agent), max(1, options.rounds))
        load = measure_load(gateway, telegram, agent, max(1, options.messages))
    return table(delays, load, common.machine())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 when it could not be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    parser.add_argument("--messages", type=int, default=300, help="default: 300")
    options = parser.parse_args(arguments)
    return common.report("channels", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
