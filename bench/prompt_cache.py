"""What the API has to read anew: scripted days over a stand-in that keeps a prompt cache.

    python3 bench/prompt_cache.py [--claude PATH]... [--model MODEL]... [--script NAME]...
        [--before FOLDER] [--original PATH] [--explain]

One run, Markdown on stdout. The API is tests/kit/stub_api.py with the cache of
tests/kit/api_cache.py. Each script is played by OCP, and by one claude for each conversation, which
the benchmark drives by hand and never restarts. Fresh tokens are those that the API read anew: its
input_tokens and cache_creation_input_tokens. Time between requests is made up. --explain shows on
stderr where a request of OCP that read too much parts from the earlier ones.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import http.client
import itertools
import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import common

sys.path.insert(0, str(common.REPO / "tests" / "kit"))

import api_cache  # noqa: E402 (of tests/kit)
import stub_api  # noqa: E402
from api_rules import as_blocks  # noqa: E402
from claude_driver import ClaudeDriver  # noqa: E402

Json = Any

#: Fresh tokens of OCP, at most so many times those of the claude by hand.
MOST_OF_HAND = 1.05
#: Made-up time: before a question, and before the results of a round. An entry of five minutes is
#: gone at the next question; one of an hour is there when an early question is edited.
QUESTION_S, ROUND_S = 330.0, 20.0
#: Characters of what is said.
SYSTEM_CHARS, QUESTION_CHARS, THOUGHT_CHARS = 9_000, 300, 400
ANSWER_CHARS, RESULT_CHARS = 1_500, 900
TOOL_COUNT = 12
#: Each so many rounds has two calls.
TWO_CALLS_EVERY = 5
#: After which question of the chat which one is edited: so many back.
EDITS = {4: 1, 8: 3, 12: 6}
PATHS = ("fresh", "continued", "rewound", "rebuilt")
OCP, BEFORE, HAND, ORIGINAL = "OCP", "before", "by hand", "original"


# ---------------------------------------------------------------------------
# 1 What is said
# ---------------------------------------------------------------------------

def prose(seed: str, chars: int) -> str:
    """The same lines of made-up words for the same seed."""
    dice = random.Random(seed)
    words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(chars // 6)]
    lines = [" ".join(words[at:at + 12]) for at in range(0, len(words), 12)]
    return "\n".join(lines)


SYSTEM = "You are the assistant of a workshop.\n\n" + prose("system", SYSTEM_CHARS)
TOOLS: Sequence[dict[str, Json]] = [
    {
        "name": f"tool_{number:02d}",
        "description": prose(f"tool {number}", 400),
        "input_schema": {
            "type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    }
    for number in range(TOOL_COUNT)
]
_STEP = re.compile(r"\[(\w+ \w+)(?:, (\d+) rounds)?\]")


def question(name: str, number: int | str, rounds: int = 0) -> str:
    """What a user asks; the words in brackets tell the stand-in where it is."""
    wish = f", {rounds} rounds" if rounds else ""
    return f"[{name} {number}{wish}] {prose(f'{name} {number}', QUESTION_CHARS)}"


class Place(NamedTuple):
    """Where a conversation stands."""

    #: The words in brackets of the last question.
    step: str
    #: How many rounds it wants, and has behind it.
    rounds: int
    done: int

    @property
    def name(self) -> str:
        """The same in the requests of every contestant."""
        return f"{self.step}.{self.done}"


def place_of(body: Mapping[str, Json]) -> Place:
    """Where the conversation of a request stands."""
    done = 0
    for message in reversed(body["messages"]):
        blocks = as_blocks(message["content"])
        if message["role"] != "user":
            continue
        found = [each for block in blocks if block["type"] == "text"
                 for each in _STEP.findall(block["text"])]
        if found:
            step, rounds = found[-1]
            return Place(step, int(rounds or 0), done)
        done += any(block["type"] == "tool_result" for block in blocks)
    return Place("", 0, done)


def reply_to(body: Mapping[str, Json], *, thinks: bool) -> stub_api.Reply:
    """Calls until there were enough rounds, and then a text; a thought before it if the model
    `thinks` and the request lets it."""
    place = place_of(body)
    if place.done < place.rounds:
        count = 2 if place.done % TWO_CALLS_EVERY == TWO_CALLS_EVERY - 1 else 1
        reply = stub_api.tool_calls([
            (TOOLS[(place.done + at) % TOOL_COUNT]["name"], {"query": f"{place.name}.{at}"})
            for at in range(count)])
    else:
        reply = stub_api.text(prose(f"answer {place.name}", ANSWER_CHARS))
    if thinks and body.get("thinking", {}).get("type") in ("adaptive", "enabled"):
        thought = stub_api.thinking(prose(f"thought {place.name}", THOUGHT_CHARS), "").blocks[0]
        reply = reply._replace(blocks=(thought, *reply.blocks))
    return reply


# ---------------------------------------------------------------------------
# 2 The API's side of a day
# ---------------------------------------------------------------------------

class Seen(NamedTuple):
    """A request, as the API saw it."""

    place: Place
    usage: api_cache.Usage
    body: Mapping[str, Json]


class Day:
    """One script, played by one contestant."""

    def __init__(self, *, thinks: bool) -> None:
        self._thinks = thinks
        self.cache = api_cache.PromptCache()
        #: How often OCP came to a conversation in which way.
        self.paths: Mapping[str, int] = {}
        self._lock = threading.Lock()
        self._seen: list[Seen] = []

    def answer(self, body: Mapping[str, Json]) -> stub_api.Reply:
        """For StubApi."""
        usage = self.cache.take(body)
        with self._lock:
            self._seen.append(Seen(place_of(body), usage, body))
        return reply_to(body, thinks=self._thinks)._replace(**usage._asdict())

    @property
    def seen(self) -> Sequence[Seen]:
        """The requests, in order."""
        with self._lock:
            return list(self._seen)

    @property
    def usage(self) -> api_cache.Usage:
        """The tokens of all requests."""
        columns = zip(*(each.usage for each in self.seen))
        return api_cache.Usage(*(sum(column) for column in columns))


# ---------------------------------------------------------------------------
# 3 Contestants
# ---------------------------------------------------------------------------

class Talk(Protocol):
    """A conversation. Each method returns how many results the model asks for."""

    def ask(self, text: str) -> int:
        """The next question."""

    def give(self, texts: Sequence[str]) -> int:
        """The results of all calls."""

    def edit(self, back: int, text: str) -> int:
        """Another question in place of the one so many questions back; what came after is gone."""


class Side(Protocol):
    """A contestant."""

    def talk(self, name: str, *, with_tools: bool) -> Talk:
        """A new conversation, of a user of its own."""

    def restart(self) -> None:
        """The server ends and starts."""

    def paths(self) -> Mapping[str, int]:
        """How often a conversation was continued, rebuilt and so on; empty = nobody tells."""


#: Sends a body to a path, and returns the body of the answer.
Post = Callable[[str, Json], Json]


class AgentTalk:
    """A client of the Messages API, which sends back all that it was given."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._fixed: Json = {
            "max_tokens": 8_000, "system": SYSTEM, "thinking": {"type": "adaptive"},
            "tools": TOOLS}
        self._messages: list[Json] = []

    def ask(self, text: str) -> int:
        """See Talk."""
        return self._send([{"type": "text", "text": text}])

    def give(self, texts: Sequence[str]) -> int:
        """See Talk."""
        calls = [block["id"] for block in self._messages[-1]["content"]
                 if block["type"] == "tool_use"]
        return self._send([
            {"type": "tool_result", "tool_use_id": call, "content": text}
            for call, text in zip(calls, texts)])

    def edit(self, back: int, text: str) -> int:
        """See Talk."""
        raise common.BenchError("no script edits what an agent was asked")

    def _send(self, content: Json) -> int:
        self._messages.append({"role": "user", "content": content})
        body = {**self._fixed, "messages": self._messages}
        answer = self._post("/v1/messages", body)["content"]
        self._messages.append({"role": "assistant", "content": answer})
        return sum(block["type"] == "tool_use" for block in answer)


class ChatTalk:
    """A client of chat completions, which keeps nothing of an answer but its text."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._messages = [{"role": "system", "content": SYSTEM}]

    def ask(self, text: str) -> int:
        """See Talk."""
        self._messages.append({"role": "user", "content": text})
        answer = self._post("/v1/chat/completions", {"messages": self._messages})
        content = answer["choices"][0]["message"]["content"]
        self._messages.append({"role": "assistant", "content": content})
        return 0

    def give(self, texts: Sequence[str]) -> int:
        """See Talk."""
        raise common.BenchError("no script gives a chat tools")

    def edit(self, back: int, text: str) -> int:
        """See Talk."""
        del self._messages[-2 * back:]
        return self.ask(text)


class OcpSide:
    """OCP, and a key for each conversation; to be used in a `with`."""

    def __init__(
        self, folder: Path, claude: Path, model: str, api_url: str,
        settings: Mapping[str, str], tree: Path = common.REPO,
    ) -> None:
        folder.mkdir()
        environ = common.clean_environment(folder, api_url)
        self._start: Callable[[], common.KeyedOcp] = lambda: common.KeyedOcp(
            folder, claude, model, environ, settings, tree)
        self._ocp = self._start()

    def __enter__(self) -> OcpSide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ocp.__exit__(kind, error, trace)

    def talk(self, name: str, *, with_tools: bool) -> Talk:
        """See Side."""
        key = self._ocp.new_key(name)

        def post(path: str, body: Json) -> Json:
            return self._ocp.call("POST", path, {"model": self._ocp.model_id, **body}, key)
        return AgentTalk(post) if with_tools else ChatTalk(post)

    def restart(self) -> None:
        """See Side."""
        self._ocp.__exit__(None, None, None)
        self._ocp = self._start()

    def paths(self) -> Mapping[str, int]:
        """See Side."""
        rows = self._ocp.get("/api/usage?all=true")["byPath"]
        return {row["path"]: int(row["requests"]) for row in rows}


class HandTalk:
    """A claude process of its own, driven by hand and never restarted."""

    def __init__(self, driver: ClaudeDriver) -> None:
        self._driver = driver
        #: The UUIDs of the lines that asked.
        self._asked: list[str] = []

    def ask(self, text: str) -> int:
        """See Talk."""
        self._asked.append(str(uuid.uuid4()))
        self._driver.send_user([{"type": "text", "text": text}], uuid=self._asked[-1])
        return self._listen()

    def give(self, texts: Sequence[str]) -> int:
        """See Talk."""
        for text in texts:
            while not self._driver.calls:
                self._driver.until(lambda _: True)
            self._driver.answer_call([{"type": "text", "text": text}])
        return self._listen()

    def edit(self, back: int, text: str) -> int:
        """See Talk. claude forgets one question after the other, the last one first."""
        for _ in range(back):
            reply = self._driver.control(
                "rewind_conversation", target_message_uuid=self._asked.pop())
            if not reply.get("response", {}).get("rewound"):
                raise common.BenchError(f"claude does not forget a question: {reply}")
        return self.ask(text)

    def _listen(self) -> int:
        lines = self._driver.until_event("message_stop", common.PATIENCE_S)
        starts = [line["event"]["content_block"]["type"] for line in lines
                  if line["type"] == "stream_event"
                  and line["event"]["type"] == "content_block_start"]
        calls = starts.count("tool_use")
        if not calls:
            self._driver.until_result(common.PATIENCE_S)
        return calls


class HandSide:
    """claude processes that are started as OCP starts its own; to be used in a `with`."""

    def __init__(self, spawn: common.Spawn, api_url: str) -> None:
        self._spawn = spawn
        self._environ = {**spawn.environ, "ANTHROPIC_BASE_URL": api_url}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> HandSide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def talk(self, name: str, *, with_tools: bool) -> Talk:
        """See Side."""
        command = [str(self._spawn.claude), *self._spawn.arguments]
        tools = [
            {"name": tool["name"], "description": tool["description"],
             "inputSchema": tool["input_schema"]}
            for tool in TOOLS] if with_tools else []
        driver = self._stack.enter_context(
            ClaudeDriver(command, self._environ, self._spawn.folder, tools))
        servers = {"sdkMcpServers": ["client"]} if with_tools else {}
        driver.control("initialize", systemPrompt=[SYSTEM], hooks=None, **servers)
        return HandTalk(driver)

    def restart(self) -> None:
        """See Side. There is no server."""

    def paths(self) -> Mapping[str, int]:
        """See Side."""
        return {}


class OriginalSide:
    """The original program, which is run by node; to be used in a `with`."""

    def __init__(
        self, folder: Path, program: Path, claude: Path, model_id: str, api_url: str
    ) -> None:
        folder.mkdir()
        # It takes the variable away from its claude.
        wrapper = folder / "claude"
        wrapper.write_text(
            f"#!/bin/sh\nANTHROPIC_BASE_URL={shlex.quote(api_url)} "
            f'exec {shlex.quote(str(claude))} "$@"\n')
        wrapper.chmod(0o755)
        self._model_id = model_id
        node = shutil.which("node")
        if node is None:
            raise common.BenchError("no node on PATH, which runs the original program")
        self._command = [node, str(program)]
        self._environ = {**common.clean_environment(folder, api_url), "CLAUDE_BIN": str(wrapper)}
        self._folder = folder
        self._begin()

    def _begin(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self._process = subprocess.Popen(
            self._command, env={**self._environ, "CLAUDE_PROXY_PORT": str(self._port)},
            cwd=self._folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        give_up_s = time.monotonic() + common.PATIENCE_S
        while time.monotonic() < give_up_s and self._process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self._port), 1.0).close()
                return
            time.sleep(0.1)
        raise common.BenchError("the original program does not start")

    def __enter__(self) -> OriginalSide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        common.end(self._process)

    def talk(self, name: str, *, with_tools: bool) -> Talk:
        """See Side. It knows no tools."""
        return ChatTalk(self._post)

    def _post(self, path: str, body: Json) -> Json:
        content = json.dumps({"model": self._model_id, **body}).encode("utf-8")
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=common.PATIENCE_S)
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"}
            connection.request("POST", path, content, headers)
            response = connection.getresponse()
            found = json.loads(response.read())
        if response.status != 200:
            raise common.BenchError(f"the original program answers with {response.status}: {found}")
        return found

    def restart(self) -> None:
        """See Side."""
        self.__exit__(None, None, None)
        self._begin()

    def paths(self) -> Mapping[str, int]:
        """See Side."""
        return {}


# ---------------------------------------------------------------------------
# 4 Scripts
# ---------------------------------------------------------------------------

class Stage(NamedTuple):
    """A contestant, and the day that it plays."""

    side: Side
    day: Day

    def converse(
        self, talk: Talk, name: str, number: int | str, rounds: int = 0, *, back: int = 0,
        restart_after: int = 0,
    ) -> None:
        """A question up to the last answer. `back` edits an earlier one; the server restarts before
        the results of a round."""
        self.day.cache.pass_time(QUESTION_S)
        text = question(name, number, rounds)
        calls = talk.edit(back, text) if back else talk.ask(text)
        for done in itertools.count(1):
            if not calls:
                return
            if done == restart_after:
                self.side.restart()
            self.day.cache.pass_time(ROUND_S)
            calls = talk.give([
                prose(f"result {name} {number}.{done}.{at}", RESULT_CHARS) + "\n"
                for at in range(calls)])


def agent(stage: Stage) -> None:
    """One question and 60 rounds of tools."""
    stage.converse(stage.side.talk("agent", with_tools=True), "agent", 1, 60)


def edits(stage: Stage) -> None:
    """The last question is edited, later the third-last, later the sixth-last."""
    talk = stage.side.talk("chat", with_tools=False)
    for number in range(1, 13):
        stage.converse(talk, "chat", number)
        if number in EDITS:
            stage.converse(talk, "chat", f"{number}edited", back=EDITS[number])


def restart(stage: Stage) -> None:
    """A restart between two questions, and another one."""
    talk = stage.side.talk("chat", with_tools=False)
    for number in range(1, 13):
        stage.converse(talk, "chat", number)
        if number in (5, 9):
            stage.side.restart()


def restart_in_a_loop(stage: Stage) -> None:
    """An agent whose server restarts while it runs a tool."""
    talk = stage.side.talk("agent", with_tools=True)
    stage.converse(talk, "agent", 1, 3)
    stage.converse(talk, "agent", 2, 20, restart_after=10)
    stage.converse(talk, "agent", 3, 3)


def keys(stage: Stage) -> None:
    """Five users, who all ask at the same moment, six times."""
    names = [f"user{number}" for number in range(1, 6)]
    talks = {name: stage.side.talk(name, with_tools=False) for name in names}
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        for number in range(1, 7):
            asked = [pool.submit(stage.converse, talks[name], name, number) for name in names]
            for each in asked:
                each.result()


class Script(NamedTuple):
    """A day, by what it is called in the table."""

    title: str
    play: Callable[[Stage], None]
    with_tools: bool = False
    thinks: bool = True
    #: Of OCP, beyond its defaults.
    settings: Mapping[str, str] = {}


SCRIPTS: Mapping[str, Script] = {
    "agent": Script("agent, 60 rounds", agent, with_tools=True),
    "edits": Script("chat, three edits", edits),
    "keys": Script("five keys at once", keys, settings={"OCP_PARKED_PROCESSES": "4"}),
    "restart": Script("chat, two restarts, no thinking", restart, thinks=False),
    "loop": Script(
        "agent, restart in its loop, no thinking", restart_in_a_loop, with_tools=True,
        thinks=False),
    "restart_thinking": Script("chat, two restarts", restart),
    "loop_thinking": Script("agent, restart in its loop", restart_in_a_loop, with_tools=True),
}


#: Starts a contestant whose API is at the URL that it gets.
Begin = Callable[[str], AbstractContextManager[Side]]


def play(script: Script, begin: Begin) -> Day:
    """What the API saw of a script."""
    day = Day(thinks=script.thinks)
    with stub_api.StubApi(day.answer, keep_requests=False, strict=True) as stub:
        with begin(stub.url) as side:
            script.play(Stage(side, day))
            day.paths = side.paths()
        refused = stub.take_refusals()
    if refused:
        raise common.BenchError(f"the API refused a request: {refused[0].message}")
    return day


# ---------------------------------------------------------------------------
# 5 Why a request read too much
# ---------------------------------------------------------------------------

def fresh_by_place(day: Day) -> dict[str, int]:
    """The fresh tokens of each place."""
    found: dict[str, int] = {}
    for seen in day.seen:
        found[seen.place.name] = found.get(seen.place.name, 0) + seen.usage.fresh_tokens
    return found


def around(text: str, other: str) -> tuple[str, str]:
    """Both texts, from shortly before the first character that differs."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, other))
    at = max(0, sum(1 for _ in pairs) - 40)
    return text[at:at + 200], other[at:at + 200]


def parting(body: Mapping[str, Json], earlier: Sequence[Mapping[str, Json]]) -> list[str]:
    """Where a request parts from the one before it that has most in common with it."""
    pieces = api_cache.pieces_of(body)
    candidates = [api_cache.pieces_of(each) for each in earlier]
    # Of those with equally much in common, the longest shows what comes next.
    nearest: Sequence[api_cache.Piece] = max(candidates, key=lambda each: (
        api_cache.common_pieces(pieces, each), len(each)), default=[])
    count = api_cache.common_pieces(pieces, nearest)
    if count == len(nearest):
        return ["  goes on where an earlier one ended"]
    here = pieces[count] if count < len(pieces) else api_cache.Piece("the end", "", 0)
    was, text = around(nearest[count].text, here.text)
    return [
        f"  the first {count} pieces are those of an earlier request; then",
        f"  {nearest[count].path} was {was!r}", f"  {here.path} is  {text!r}"]


def explanation(day: Day, ideal: Day) -> list[str]:
    """Lines about each request that read more anew than the claude by hand did."""
    allowed = fresh_by_place(ideal)
    lines = []
    for at, seen in enumerate(day.seen):
        if seen.usage.fresh_tokens <= MOST_OF_HAND * allowed.get(seen.place.name, 0):
            continue
        lines.append(
            f"{seen.place.name or 'a request of no script'}: read {seen.usage.cache_read:,} of "
            f"{seen.usage.prompt_tokens:,} tokens, fresh {seen.usage.fresh_tokens:,}, by hand "
            f"{allowed.get(seen.place.name, 0):,}")
        lines += parting(seen.body, [each.body for each in day.seen[:at]])
    return lines


# ---------------------------------------------------------------------------
# 6 The table
# ---------------------------------------------------------------------------

Days = Mapping[str, Day]

HEAD = ["script", "through", "requests", "prompt tokens", "read from the cache", "fresh tokens",
        "/ by hand", *PATHS]


def ratio(days: Days, side: str) -> float:
    """Fresh tokens, as multiples of those of the claude by hand."""
    fresh, by_hand = (days[each].usage.fresh_tokens for each in (side, HAND))
    return float(fresh / max(1, by_hand))


def rows_of(title: str, days: Days) -> list[list[str]]:
    """A row for each contestant of a script."""
    rows = []
    for side, day in days.items():
        usage = day.usage
        share = usage.cache_read / max(1, usage.prompt_tokens)
        rows.append([
            title if side == OCP else "", side, str(len(day.seen)), f"{usage.prompt_tokens:,}",
            f"{share:.1%}", f"{usage.fresh_tokens:,}",
            "" if side == HAND else f"{ratio(days, side):.3f}",
            *(str(day.paths.get(path, 0)) if day.paths else "" for path in PATHS)])
    return rows


def table(results: Mapping[str, Days], about: str) -> str:
    """One claude's scripts as Markdown."""
    rows = [row for name, days in results.items() for row in rows_of(SCRIPTS[name].title, days)]
    name, worst = max(
        ((name, ratio(days, OCP)) for name, days in results.items()), key=lambda pair: pair[1])
    verdict = common.verdict(
        f"fresh tokens, OCP / by hand, at worst ({SCRIPTS[name].title})", worst,
        f"at most {MOST_OF_HAND}", worst <= MOST_OF_HAND)
    return "\n".join([common.markdown_table(HEAD, rows), "", verdict, "", about])


def contestants(
    options: argparse.Namespace, folder: Path, spawn: common.Spawn, script: Script
) -> dict[str, Begin]:
    """How each contestant of a script begins; OCP starts claude as `spawn` says."""
    folder.mkdir()
    model_id = spawn.arguments[list(spawn.arguments).index("--model") + 1]
    found: dict[str, Begin] = {
        OCP: lambda url: OcpSide(folder / "ocp", spawn.claude, model_id, url, script.settings)}
    if options.before:
        found[BEFORE] = lambda url: OcpSide(
            folder / "before", spawn.claude, model_id, url, script.settings, options.before)
    found[HAND] = lambda url: HandSide(spawn, url)
    if options.original and not script.with_tools:
        found[ORIGINAL] = lambda url: OriginalSide(
            folder / "original", options.original, spawn.claude, model_id, url)
    return found


def measure(options: argparse.Namespace, folder: Path, claude: Path, model: str) -> str:
    """All scripts with one claude and model; the Markdown."""
    folder.mkdir()
    environ = common.clean_environment(folder, "http://127.0.0.1:9")
    spawn = common.record_spawn(folder, claude, model, environ)
    results: dict[str, Days] = {}
    for name in options.script or SCRIPTS:
        begins = contestants(options, folder / name, spawn, SCRIPTS[name])
        days = {side: play(SCRIPTS[name], begin) for side, begin in begins.items()}
        results[name] = days
        common.progress(f"{claude}, {model}, {name}: {ratio(days, OCP):.3f}")
        if options.explain:
            common.progress("\n".join(explanation(days[OCP], days[HAND])))
    about = next(iter(results.values()))[OCP].seen[0].body["model"]
    return table(results, f"{about}; {common.machine(claude)}")


def run(options: argparse.Namespace) -> str:
    """Every claude with every model; the Markdown."""
    claudes = [common.find_claude(named) for named in options.claude or [""]]
    parts = []
    with tempfile.TemporaryDirectory(prefix="ocp-bench-") as temporary:
        numbers = itertools.count(1)
        for claude, model in itertools.product(claudes, options.model or ["sonnet"]):
            parts.append(measure(options, Path(temporary, str(next(numbers))), claude, model))
    return "\n\n".join(parts)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument(
        "--claude", action="append", metavar="PATH", help="may be repeated; default: on PATH")
    options.add_argument("--model", action="append", help="may be repeated; default: sonnet")
    options.add_argument(
        "--script", action="append", choices=list(SCRIPTS), help="may be repeated; default: all")
    options.add_argument(
        "--before", type=Path, metavar="FOLDER", help="another version of OCP to compare with")
    options.add_argument(
        "--original", type=os.path.abspath, metavar="PATH",
        help="the server.mjs of the original program, for the scripts without tools")
    options.add_argument(
        "--explain", action="store_true", help="show where requests part from earlier ones")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 when it could not be measured."""
    options = parser().parse_args(arguments)
    return common.report("prompt_cache", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
