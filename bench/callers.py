"""Several keys at one server, and clients that leave: how many answers a second, how many processes
are started for them, and what a turn costs after one that was cancelled.

    python3 bench/callers.py --claude /path/to/claude [--before FOLDER] [--seconds 6] [--rounds 8]

One run, Markdown on stdout. With --before, the version in that folder goes through the same in the
same run, and the two take turns. In the first part five clients ask questions of their own, with
1, 3 and 5 keys, and one client with 5 keys in turn; each question is a conversation of its own. In
the second part five agents with a key each call tools. In the third, one client leaves in the
middle of every second answer.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import load

Json = Any

CLIENTS = 5
KEYS = (1, 3, 5)
#: The throughput with several keys, as a part of that with one.
LEAST_SHARE = 0.8
#: Places for parked processes, and those on a machine with 4 GB.
PLACES, FEW_PLACES = 4, 2
#: What a tool takes, and how many tools an agent calls in a conversation.
TOOL_S = 1.0
TOOL_ROUNDS = 6
#: The answers of each client before a measurement, with which all places fill up.
WARM_ANSWERS = 12
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


class House(common.KeyedOcp):
    """OCP over a real claude, in mode multi."""

    def __init__(
        self, folder: Path, claude: Path, model: str, url: str, settings: Mapping[str, str],
        tree: Path,
    ) -> None:
        """See common.Ocp; `url` is that of the API."""
        folder.mkdir()
        environ = common.clean_environment(folder, url)
        super().__init__(folder, claude, model, environ, settings, tree)

    def counts(self) -> dict[str, int]:
        """How many processes were started, and how answers got their conversations."""
        stats = self.get("/health")["stats"]
        names = ("spawned", "fresh", "rewound", "continued", "rebuilt")
        return {name: int(stats[name]) for name in names}


class Keyed:
    """A client on a connection of its own, which uses its keys in turn."""

    def __init__(self, ocp: House, keys: Sequence[str]) -> None:
        self._ocp = ocp
        self._keys = itertools.cycle(keys)
        self._connection = http.client.HTTPConnection(
            "127.0.0.1", ocp.port, timeout=common.PATIENCE_S)

    def ask(self, messages: Sequence[Json], **fields: Json) -> dict[str, Json]:
        """The message of an answer. Raises BenchError."""
        body = {"model": self._ocp.model_id, "messages": messages, **fields}
        headers = {"Authorization": f"Bearer {next(self._keys)}"}
        self._connection.request(
            "POST", "/v1/chat/completions", json.dumps(body).encode("utf-8"), headers)
        response = self._connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise common.BenchError(f"status {response.status}: {content[:200]!r}")
        message: dict[str, Json] = json.loads(content)["choices"][0]["message"]
        return message

    def close(self) -> None:
        """Hangs up."""
        self._connection.close()


class Served(NamedTuple):
    """What came of some clients asking for some time."""

    answers_per_s: float
    #: The processor time of the server and of its processes for an answer; 0 = there was none.
    processor_s: float
    #: The part of the answers that no process had to be started or told anything anew for.
    kept: float
    spawned: int


#: Asks until the time is over; calls its last argument for each answer.
Work = Callable[[Keyed, Callable[[], bool], Callable[[], None]], None]


def ask_questions(
    client: Keyed, may_go_on: Callable[[], bool], count: Callable[[], None]
) -> None:
    """Questions that are conversations of their own."""
    while may_go_on():
        client.ask([{"role": "user", "content": f"{common.QUESTION} ({time.perf_counter_ns()})"}])
        count()


def call_tools(client: Keyed, may_go_on: Callable[[], bool], count: Callable[[], None]) -> None:
    """Conversations of an agent: a question that makes the model call a tool, the result, again."""
    while may_go_on():
        messages: list[Json] = []
        for number in range(TOOL_ROUNDS):
            if not may_go_on():
                return
            messages.append({"role": "user", "content": f"TOOL {time.perf_counter_ns()} {number}"})
            called = client.ask(messages, tools=TOOLS)
            count()
            time.sleep(TOOL_S)
            call_id = called["tool_calls"][0]["id"]
            result = {"role": "tool", "tool_call_id": call_id, "content": "Nothing."}
            messages += [called, result]
            messages.append(client.ask(messages, tools=TOOLS))
            count()


class Crowd:
    """Clients at work for some time, which begins after their first answers."""

    def __init__(self, ocp: House, seconds: float) -> None:
        self._ocp = ocp
        self._seconds = seconds
        self._is_over = False
        # Guards the two fields below.
        self._lock = threading.Lock()
        self._answers = 0
        self._problems: list[BaseException] = []

    def run(self, clients: Sequence[Sequence[str]], work: Work) -> Served:
        """Everything until the last client has its last answer. Raises BenchError. A client is
        its keys."""
        threads = [threading.Thread(target=self._client, args=(keys, work)) for keys in clients]
        for thread in threads:
            thread.start()
        give_up_s = time.perf_counter() + 2 * common.PATIENCE_S
        while self._answers < WARM_ANSWERS * len(clients) and time.perf_counter() < give_up_s:
            time.sleep(0.05)
        before, used_s, from_s = self._ocp.counts(), processor_s(self._ocp.pid), time.perf_counter()
        answers = self._answers
        time.sleep(self._seconds)
        after, seconds = self._ocp.counts(), time.perf_counter() - from_s
        used_s, answers = processor_s(self._ocp.pid) - used_s, self._answers - answers
        self._is_over = True
        for thread in threads:
            thread.join()
        if self._problems:
            raise common.BenchError(str(self._problems[0]))
        grown = {name: after[name] - before[name] for name in after}
        kept, anew = grown["continued"] + grown["rewound"], grown["fresh"] + grown["rebuilt"]
        return Served(
            answers / seconds, used_s / answers if answers else 0.0, kept / max(1, kept + anew),
            grown["spawned"])

    def _client(self, keys: Sequence[str], work: Work) -> None:
        with contextlib.closing(Keyed(self._ocp, keys)) as client:
            try:
                work(client, lambda: not self._is_over, self._count)
            except (common.BenchError, OSError, http.client.HTTPException, KeyError) as problem:
                with self._lock:
                    self._problems.append(problem)

    def _count(self) -> None:
        with self._lock:
            self._answers += 1


class Case(NamedTuple):
    """One row of the first table."""

    label: str
    keys: int
    work: Work
    settings: Mapping[str, str] = {}
    #: Whether one client uses the keys in turn; else each of CLIENTS has one.
    in_turn: bool = False


CASES = (
    *(Case(f"questions of their own, {count} key{'s' if count > 1 else ''}", count, ask_questions)
      for count in KEYS),
    Case("the same, 5 keys in turn", 5, ask_questions, in_turn=True),
    Case(f"the same, {PLACES} places", 5, ask_questions, {
        "OCP_PARKED_PROCESSES": str(PLACES)}, in_turn=True),
    Case("agents with tools, 5 keys", 5, call_tools),
    Case(f"the same, {FEW_PLACES} places", 5, call_tools, {
        "OCP_PARKED_PROCESSES": str(FEW_PLACES), "OCP_WARM_TOTAL": "1"}),
)


def measure_case(
    case: Case, tree: Path, claude: Path, options: argparse.Namespace, folder: Path
) -> Served:
    """One case with a new server."""
    with common.Stub(folder.parent) as stub:
        with House(folder, claude, options.model, stub.url, case.settings, tree) as ocp:
            keys = [ocp.new_key(f"key-{number}") for number in range(case.keys)]
            ocp.wait_until_ready()
            clients = [[keys[number % case.keys]] for number in range(CLIENTS)]
            return Crowd(ocp, options.seconds).run([keys] if case.in_turn else clients, case.work)


# ---------------------------------------------------------------------------
# Clients that leave
# ---------------------------------------------------------------------------

class Left(NamedTuple):
    """What a cancelled turn and the one after it cost, in the middle."""

    first_s: float
    processor_s: float
    spawned: int


def processor_s(pid: int) -> float:
    """The processor time of a server and of all processes that it has started."""
    pids = [pid, *(child for child, _ in load.children_of(pid))]
    ticks = 0
    for each in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            # Those that have ended count for the one that waited for them.
            ticks += sum(map(int, fields[11:15] if each == pid else fields[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def leave(ocp: common.Ocp, messages: Sequence[Json]) -> None:
    """Asks, and hangs up at the first word."""
    connection = http.client.HTTPConnection("127.0.0.1", ocp.port, timeout=common.PATIENCE_S)
    body = {"model": ocp.model_id, "stream": True, "messages": messages}
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(body).encode("utf-8"))
        with connection.getresponse() as response:
            for line in iter(response.readline, b""):
                if b'"content":"H' in line:
                    break
    while ocp.get("/health")["stats"]["activeRequests"]:
        time.sleep(0.01)


def measure_leaving(
    tree: Path, claude: Path, options: argparse.Namespace, folder: Path
) -> Left:
    """A conversation in which each question is cancelled once."""
    folder.mkdir()
    firsts_s, spent_s = [], []
    with common.Stub(folder.parent) as stub:
        environ = common.clean_environment(folder, stub.url)
        with common.Ocp(folder, claude, options.model, environ, None, tree) as ocp:
            with contextlib.closing(common.Client(ocp.port)) as client:
                messages: list[Json] = []
                before = 0
                for number in range(options.rounds + 1):
                    ocp.wait_until_ready()
                    started_s = processor_s(ocp.pid)
                    before = before or ocp.spawned() if number else 0
                    leave(ocp, [*messages, {"role": "user", "content": f"SLOW {number}"}])
                    messages.append({"role": "user", "content": f"Question {number}?"})
                    firsts_s.append(client.ask(ocp.model_id, messages=messages).first_s)
                    messages.append({"role": "assistant", "content": "Hello from the stub."})
                    ocp.wait_until_ready()
                    spent_s.append(processor_s(ocp.pid) - started_s)
                spawned = ocp.spawned() - before
    # The first one starts what the others go on with.
    return Left(common.median(firsts_s[1:]), common.median(spent_s[1:]), spawned)


# ---------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------

def versions(count: int) -> list[str]:
    """The names of the versions that were measured."""
    return ["before", "now"][-count:]


def case_table(results: Mapping[str, Sequence[Served]]) -> str:
    """The first two parts as Markdown."""
    head = ["clients"]
    for word in versions(len(next(iter(results.values())))):
        head += [f"{word}: answers/s", "processor ms", "kept", "started"]
    rows = [
        [label, *(cell for served in found for cell in (
            f"{served.answers_per_s:.1f}", common.shown_ms(served.processor_s),
            f"{served.kept:.0%}", str(served.spawned)))]
        for label, found in results.items()
    ]
    return common.markdown_table(head, rows)


def left_table(results: Sequence[Left]) -> str:
    """The third part as Markdown."""
    head = ["a cancelled turn, and the next", *versions(len(results))]
    return common.markdown_table(head, [
        ["first token of the next, ms", *(common.shown_ms(left.first_s) for left in results)],
        ["processor time of both, ms", *(common.shown_ms(left.processor_s) for left in results)],
        ["processes started", *(str(left.spawned) for left in results)],
    ])


def targets(results: Mapping[str, Sequence[Served]]) -> list[str]:
    """Whether several keys get what one gets."""
    one, *several = [results[case.label][-1].answers_per_s for case in CASES[:len(KEYS)]]
    return [
        common.verdict(
            f"{count} keys / one", rate / one if one else 0.0, f"at least {LEAST_SHARE}",
            rate >= LEAST_SHARE * one)
        for count, rate in zip(KEYS[1:], several)
    ]


def run(options: argparse.Namespace) -> str:
    """Everything from the start of the servers to their end; the Markdown."""
    claude = common.find_claude(options.claude)
    trees = [*([options.before] if options.before else []), common.REPO]
    with tempfile.TemporaryDirectory(prefix="ocp-bench-") as name:
        results: dict[str, list[Served]] = {}
        for number, case in enumerate(CASES):
            for place, tree in enumerate(trees):
                folder = Path(name) / f"{number}-{place}"
                served = measure_case(case, tree, claude, options, folder)
                results.setdefault(case.label, []).append(served)
                common.progress(f"callers: {case.label}: {served.answers_per_s:.1f}/s")
        left = [
            measure_leaving(tree, claude, options, Path(name) / f"left-{place}")
            for place, tree in enumerate(trees)
        ]
    return "\n".join([
        case_table(results), "", left_table(left), "", *targets(results), "",
        f"{options.seconds:g} s for each, {options.rounds} cancelled turns; "
        f"{common.machine(claude)}"])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--claude", default="", metavar="PATH", help="default: on PATH")
    options.add_argument("--model", default="claude-haiku-4-5", help="default: claude-haiku-4-5")
    options.add_argument("--seconds", type=float, default=6.0, help="default: 6")
    options.add_argument("--rounds", type=int, default=8, help="cancelled turns; default: 8")
    options.add_argument("--before", type=Path, help="folder of the version to compare with")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables; 1 when they could not be measured."""
    options = parser().parse_args(arguments)
    return common.report("callers", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
