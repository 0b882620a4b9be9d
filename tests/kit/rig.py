"""What the contract tests share: the server over a real claude over a stub of the API.

Index: 1 the rig   2 what the client heard   3 what the API was asked   4 processes
"""

from __future__ import annotations

import functools
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest

import programs
import stub_api
from http_client import Reply, Stream
from programs import HOW_TO_INSTALL, real_claude_env
from server import Server, running_server
from stub_api import StubApi
from waiting import eventually

Json = Any
Body = Mapping[str, Json]
Messages = Sequence[Mapping[str, Json]]

CHAT = "/v1/chat/completions"
#: A model as most are: it thinks by itself, and takes sampling parameters.
MODEL = "claude-sonnet-4-6"
#: A model of the newest kind: the newest claude speaks to it in another form.
NEWEST_MODEL = "claude-opus-5"
BUDGET_MODEL = "claude-haiku-4-5"


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
    heard: Heard
    bodies: list[dict[str, Json]]


class Rig:
    """A server, its stub, and the version of the claude between them."""

    def __init__(self, server: Server, stub: StubApi, claude: Claude) -> None:
        self.server = server
        self.stub = stub
        self.claude = claude
        self.is_old = claude.version == "2.1.197"
        #: How many requests had reached the API before the test.
        self.seen = 0

    def __repr__(self) -> str:
        return f"<Rig {self.claude.version} {self.server} {self.stub}>"

    def begin(self) -> None:
        """A test begins: what was asked and scripted before is none of its business."""
        self.script()
        self.seen = len(self.stub.requests)

    def script(
        self, *replies: stub_api.Reply, then: stub_api.Reply | None = None
    ) -> None:
        """What the API answers: these in order, and then `then` or the stub's own words."""
        left: deque[stub_api.Reply] = deque(replies)

        def answer(body: Body) -> stub_api.Reply:
            return left.popleft() if left else then or stub_api.hello(body)

        self.stub.default = answer

    def ask(
        self, said: str | Messages = "Hi there?", model: str = MODEL, **fields: Json
    ) -> Heard:
        """One chat completion; its answer."""
        body = {"model": model, "messages": conversation(said), **fields}
        return heard(self.server.call("POST", CHAT, body, timeout_s=60))

    def open(
        self, said: str | Messages = "Hi there?", model: str = MODEL, **fields: Json
    ) -> Stream:
        """A streamed chat completion, once its headers are there."""
        body = {"model": model, "messages": conversation(said), **fields}
        return self.server.stream(CHAT, body, timeout_s=60)

    def asked(self) -> list[dict[str, Json]]:
        """The bodies that reached the API in this test."""
        return [recorded.body for recorded in self.stub.requests[self.seen:]]

    def both(self, said: str | Messages = "Hi there?", **fields: Json) -> list[Heard]:
        """The same request whole and streamed, at the same time; the two answers."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(
                lambda streams: self.ask(said, stream=streams, **fields), (False, True)))

    def run(self, cases: Mapping[str, Case], at_once: int = 2) -> dict[str, Outcome]:
        """All these requests, `at_once` at a time; what became of each, by name.

        The API knows which is which by its question."""
        left = {name: deque(case.replies) for name, case in cases.items()}

        def answer(body: Body) -> stub_api.Reply:
            replies = left[_case_of(body)]
            return replies.popleft() if replies else stub_api.hello(body)

        def ask(name: str) -> Heard:
            case = cases[name]
            return self.ask(f"Question {name}?", case.model, stream=case.streams, **case.fields)

        self.stub.default = answer
        with ThreadPoolExecutor(at_once) as pool:
            answers = dict(zip(cases, pool.map(ask, cases)))
        self.settle()
        bodies = self.asked()
        return {name: Outcome(answers[name], [
            body for body in bodies if _case_of(body) == name]) for name in cases}

    def only_body(self) -> dict[str, Json]:
        """The one body that reached the API in this test."""
        (body,) = self.asked()
        return body

    def last_body(self) -> dict[str, Json]:
        return self.asked()[-1]

    def settle(self, timeout_s: float = 30) -> None:
        """Wait until no claude has work, and only those are left that wait for some."""
        def settled() -> bool:
            health = self.server.call("GET", "/health").json()
            stats, waiting = health["stats"], health["parked"] + sum(health["spares"].values())
            left = claudes(self.server)
            assert not stats["activeRequests"] + stats["queued"], stats
            assert len(left) == waiting, f"{left} run, but only {waiting} wait"
            return True

        eventually(settled, timeout_s)


@contextmanager
def running_rig(folder: Path, claude: Claude, **settings: str | None) -> Iterator[Rig]:
    """A rig in this folder; the settings are more of the server's environment."""
    with StubApi() as stub:
        env = {**real_claude_env(stub.url), "OCP_DEFAULT_MODEL": MODEL, **settings}
        with running_server(
            folder, claude=claude.path, env=env, pass_env=["ANTHROPIC_BASE_URL"]
        ) as server:
            yield Rig(server, stub, claude)


def _case_of(body: Body) -> str:
    """The name of the case that this body belongs to; claude may have added messages."""
    texts = [text for _, contents in turns(body) for text in contents if isinstance(text, str)]
    (name,) = (text for text in texts if text.startswith("Question "))
    return name.strip()[len("Question "):-1]


def conversation(said: str | Messages) -> Messages:
    return [user(said)] if isinstance(said, str) else said


def user(content: Json) -> dict[str, Json]:
    return {"role": "user", "content": content}


def assistant(content: Json) -> dict[str, Json]:
    return {"role": "assistant", "content": content}


def system(content: Json) -> dict[str, Json]:
    return {"role": "system", "content": content}


def part(text: str) -> dict[str, Json]:
    """A text part of a message."""
    return {"type": "text", "text": text}


def image(base64_data: str, kind: str = "png") -> dict[str, Json]:
    """An image part of a message."""
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64_data}"}}


# ---------------------------------------------------------------------------
# 2 What the client heard
# ---------------------------------------------------------------------------

class Heard(NamedTuple):
    """An answer, whole or streamed, as a client puts it together."""
    status: int
    #: Names in any case; [] gives None for a header that is not there.
    headers: Any
    #: The content in the pieces in which it came.
    pieces: list[str]
    thinking: str
    #: Every finish reason that came: a good answer has exactly one.
    finishes: list[str]
    usage: dict[str, Json] | None
    error: dict[str, Json] | None
    #: Whether a stream ended with [DONE]; a whole answer that is none counts as not done.
    done: bool

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def finish(self) -> str | None:
        """The finish reason of a good answer, None for any other."""
        good = self.status == 200 and self.done and self.error is None
        return self.finishes[0] if good and len(self.finishes) == 1 else None


def heard(reply: Reply) -> Heard:
    kind = reply.headers["content-type"] or ""
    chunks = [data for _, data in reply.events] if "event-stream" in kind else [reply.json()]
    objects = [chunk for chunk in chunks if chunk != "[DONE]"]
    choices = [choice for each in objects for choice in each.get("choices", ())]
    said = [choice.get("delta") or choice.get("message") or {} for choice in choices]
    errors = [each["error"] for each in objects if "error" in each]
    usages = [each["usage"] for each in objects if each.get("usage")]
    return Heard(
        status=reply.status,
        headers=reply.headers,
        pieces=[each["content"] for each in said if each.get("content")],
        thinking="".join(each.get("reasoning_content", "") for each in said),
        finishes=[each["finish_reason"] for each in choices if each["finish_reason"]],
        usage=usages[-1] if usages else None,
        error=errors[-1] if errors else None,
        done=chunks[-1] == "[DONE]" or "choices" in chunks[-1] and "event-stream" not in kind,
    )


# ---------------------------------------------------------------------------
# 3 What the API was asked
# ---------------------------------------------------------------------------

#: What claude says to the model by itself, each in a text block of its own.
_OWN_WORDS = re.compile(
    r"<system-reminder>\n(As you answer the user's questions|# Environment\n|You are powered by "
    r"|Today's date is )(?:(?!</?system-reminder>).)*</system-reminder>\s*", re.DOTALL)
_OWN_SYSTEM = "# Environment\n"


def turns(body: Body) -> list[tuple[str, list[Json]]]:
    """The messages of a body as (role, contents) without what claude adds of its own.

    A text is given as it is, any other block as it came."""
    found = []
    for message in body["messages"]:
        contents = _after_own_words([_bare(block) for block in _blocks(message["content"])])
        if message["role"] != "system" or not contents[0].startswith(_OWN_SYSTEM):
            found.append((message["role"], contents))
    return found


def _blocks(content: Json) -> list[dict[str, Json]]:
    return [part(content)] if isinstance(content, str) else content


def _bare(block: Mapping[str, Json]) -> Json:
    fields = {name: value for name, value in block.items() if name != "cache_control"}
    return fields["text"] if set(fields) == {"type", "text"} else fields


def _after_own_words(contents: list[Json]) -> list[Json]:
    while contents and isinstance(contents[0], str) and _OWN_WORDS.fullmatch(contents[0]):
        contents = contents[1:]
    return contents


def system_texts(body: Body) -> list[str]:
    """The system prompt without the two blocks that claude puts in front."""
    texts = [block["text"] for block in body["system"]]
    assert texts[0].startswith("x-anthropic-billing-header:"), texts
    assert texts[1].startswith("You are a Claude agent"), texts
    return texts[2:]


def everything(rig: Rig) -> str:
    """All that reached the API in this test, as one text to search in."""
    return json.dumps(rig.asked(), ensure_ascii=False)


# ---------------------------------------------------------------------------
# 4 Processes
# ---------------------------------------------------------------------------

def claudes(server: Server) -> list[int]:
    """The pids of the claude processes that the server has started and that still run."""
    return [pid for pid in server.children() if b"stream-json" in command_line(pid)]


def command_line(pid: int) -> bytes:
    return _of_process(pid, "cmdline")


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    pairs = _of_process(pid, "environ").decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def _of_process(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""  # It ended meanwhile.


def wait_until(check: Callable[[], Any], timeout_s: float = 30) -> None:
    eventually(lambda: bool(check()), timeout_s)
