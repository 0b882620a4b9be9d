"""A rig for contract tests: the server over a real claude over a stub of the upstream API.

Index: 1 the rig   2 chat messages   3 processes
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest

import patient_server
import programs
import stub_api
from dialects import CHAT, Answer
from http_client import Stream
from processes import of_process
from programs import HOW_TO_INSTALL, real_claude_env
from server import Server, running_server
from stub_api import StubApi
from upstream import turns
from waiting import eventually

Json = Any
Body = Mapping[str, Json]
Messages = Sequence[Mapping[str, Json]]

#: How long a client waits for a word: several claudes that start at once on a busy machine.
ANSWER_S = 180.0
#: A model as most are: it thinks by itself, and takes sampling parameters.
MODEL = "claude-sonnet-4-6"
#: The newest model that every claude knows to which the newest one speaks in another form.
NEWEST_MODEL = "claude-opus-4-8"
BUDGET_MODEL = "claude-haiku-4-5"

#: Where claude is slow, a sign of life would send the headers before there is a failure to tell.
NO_HEARTBEATS = {"CLAUDE_HEARTBEAT_INTERVAL": "0", "OCP_WHOLE_SILENCE": "0"}

#: Two of these would otherwise depend on the memory of the machine. There are no spares, because a
#: claude that only waits takes a hundredth of a core, and more in its first seconds.
SAME_EVERYWHERE = {
    "OCP_PARKED_PROCESSES": "4", "OCP_WARM_TOTAL": "4", "OCP_WARM_PROCESSES": "0"}
#: Settings for a test of spares.
WARM = {"OCP_WARM_PROCESSES": "1"}


# ---------------------------------------------------------------------------
# 1 The rig
# ---------------------------------------------------------------------------

class Claude(NamedTuple):
    """A real claude program."""
    version: str
    path: Path


@functools.cache
def real_claudes() -> tuple[Claude, ...]:
    return tuple(Claude(*found) for found in programs.real_claudes())


def each_claude() -> list[Any]:
    """Fixture parameters: every real claude, or one that is skipped with the reason."""
    found = [pytest.param(claude, id=claude.version) for claude in real_claudes()]
    missing = pytest.mark.skip(reason=HOW_TO_INSTALL)
    return found or [pytest.param(None, id="none", marks=missing)]


class Case(NamedTuple):
    """One request among several that run at the same time."""
    model: str = MODEL
    #: Further fields of the request.
    fields: Mapping[str, Json] = {}
    streams: bool = False
    replies: Sequence[stub_api.Reply] = ()


class Outcome(NamedTuple):
    """What became of a case: the client's answer, and the bodies that reached the API."""
    answer: Answer
    bodies: list[dict[str, Json]]


class Rig:
    """A server, its stub, and the version of the claude between them."""

    def __init__(self, server: Server, stub: StubApi, claude: Claude) -> None:
        self.server = server
        self.stub = stub
        self.claude = claude
        self.is_old = claude.version == "2.1.197"
        #: How many requests had reached the API before the test.
        self.requests_before = 0

    def __repr__(self) -> str:
        return f"<Rig {self.claude.version} {self.server} {self.stub}>"

    def begin(self) -> None:
        """Begin a test: forget the requests and the replies of those before it.

        Parked processes, sessions and log entries stay, so a test asks something of its own, and
        looks at differences of counters."""
        self.script()
        self.requests_before = len(self.stub.requests)

    def script(
        self, *replies: stub_api.Reply, then: stub_api.Reply | None = None
    ) -> None:
        """Set what the API answers: these in order, then always `then` or the stub's own text."""
        left: deque[stub_api.Reply] = deque(replies)

        def answer(body: Body) -> stub_api.Reply:
            return left.popleft() if left else then or stub_api.hello(body)

        self.stub.default = answer

    def ask(
        self, question: str | Messages = "Hi there?", model: str = MODEL, **fields: Json
    ) -> Answer:
        """Return the answer to a chat completion."""
        body = {"model": model, "messages": as_messages(question), **fields}
        return CHAT.read_answer(self.server.call("POST", CHAT.path, body, timeout_s=ANSWER_S))

    def open(
        self, question: str | Messages = "Hi there?", model: str = MODEL, **fields: Json
    ) -> Stream:
        """Return a streamed chat completion, once its headers are there."""
        body = {"model": model, "messages": as_messages(question), **fields}
        return self.server.stream(CHAT.path, body, timeout_s=ANSWER_S)

    def bodies(self) -> list[dict[str, Json]]:
        """Return the request bodies that reached the API in this test."""
        return [recorded.body for recorded in self.stub.requests[self.requests_before:]]

    def ask_whole_and_streamed(
        self, question: str | Messages = "Hi there?", **fields: Json
    ) -> list[Answer]:
        """Return the answers to the same chat completion in both modes, asked at the same time."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(
                lambda streams: self.ask(question, stream=streams, **fields), (False, True)))

    def run(self, cases: Mapping[str, Case], at_once: int = 2) -> dict[str, Outcome]:
        """Send all these requests, `at_once` at a time, and return what became of each, by name.

        The API knows which is which by its question."""
        left = {name: deque(case.replies) for name, case in cases.items()}

        def answer(body: Body) -> stub_api.Reply:
            replies = left[_case_of(body)]
            return replies.popleft() if replies else stub_api.hello(body)

        def ask(name: str) -> Answer:
            case = cases[name]
            return self.ask(f"Question {name}?", case.model, stream=case.streams, **case.fields)

        self.stub.default = answer
        with ThreadPoolExecutor(at_once) as pool:
            answers = dict(zip(cases, pool.map(ask, cases)))
        self.settle()
        bodies = self.bodies()
        return {name: Outcome(answers[name], [
            body for body in bodies if _case_of(body) == name]) for name in cases}

    def only_body(self) -> dict[str, Json]:
        """Return the only body that reached the API in this test."""
        (body,) = self.bodies()
        return body

    def last_body(self) -> dict[str, Json]:
        return self.bodies()[-1]

    def take_refusals(self) -> list[str]:
        """Return why the API refused requests in this test. One that was not taken fails it."""
        return [refusal.message for refusal in self.stub.take_refusals()]

    def assert_nothing_refused(self) -> None:
        """Raise an AssertionError for requests that broke a rule of the API; see api_rules.py."""
        refusals = self.take_refusals()
        assert not refusals, f"the API would have refused what was sent: {refusals}"

    def end_parked(self) -> None:
        """End the processes that are parked, as if their conversations had been given up."""
        self.server.call("PATCH", "/settings", {"parkedProcesses": 0})
        eventually(lambda: not self.server.call("GET", "/health").json()["parked"])
        self.server.call("PATCH", "/settings", {"parkedProcesses": None})

    def settle(self, timeout_s: float = 60) -> None:
        """Wait until no claude has work, and only those are left that wait for some."""
        def settled() -> bool:
            health = self.server.call("GET", "/health").json()
            stats, waiting = health["stats"], health["parked"] + sum(health["spares"].values())
            left = claude_pids(self.server)
            assert not stats["activeRequests"] + stats["queued"], stats
            assert len(left) == waiting, f"{left} run, but only {waiting} wait"
            return True

        eventually(settled, timeout_s)


@contextmanager
def running_rig(folder: Path, claude: Claude, **settings: str | None) -> Iterator[Rig]:
    """Start a rig in this folder. Settings are more of the server's environment."""
    with StubApi(strict=True) as stub:
        env = {**real_claude_env(stub.url), "OCP_DEFAULT_MODEL": MODEL, **NO_HEARTBEATS,
               **SAME_EVERYWHERE, **settings}
        with running_server(
            folder, claude=claude.path, env=env, pass_env=["ANTHROPIC_BASE_URL"],
            script=Path(patient_server.__file__),
        ) as server:
            rig = Rig(server, stub, claude)
            yield rig
            rig.assert_nothing_refused()


def _case_of(body: Body) -> str:
    """Return the name of the case of this body, to which claude may have added messages."""
    texts = [text for _, contents in turns(body) for text in contents if isinstance(text, str)]
    (name,) = (text for text in texts if text.startswith("Question "))
    return name.strip()[len("Question "):-1]


# ---------------------------------------------------------------------------
# 2 Chat messages
# ---------------------------------------------------------------------------

def as_messages(question: str | Messages) -> Messages:
    return [user(question)] if isinstance(question, str) else question


def user(content: Json) -> dict[str, Json]:
    return {"role": "user", "content": content}


def assistant(content: Json) -> dict[str, Json]:
    return {"role": "assistant", "content": content}


def system(content: Json) -> dict[str, Json]:
    return {"role": "system", "content": content}


# ---------------------------------------------------------------------------
# 3 Processes
# ---------------------------------------------------------------------------

def claude_pids(server: Server) -> list[int]:
    """Return the pids of the claude processes that the server has started and that still run."""
    return [pid for pid in server.children() if b"stream-json" in command_line(pid)]


def command_line(pid: int) -> bytes:
    return of_process(pid, "cmdline")


def environment(pid: int) -> dict[str, str]:
    """Return the environment that a process was started with."""
    pairs = of_process(pid, "environ").decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def wait_until(check: Callable[[], Any], timeout_s: float = 30) -> None:
    eventually(lambda: bool(check()), timeout_s)
