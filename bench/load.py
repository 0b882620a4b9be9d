"""Many clients at few slots, with several keys: is anything lost, and is it shared fairly? And how
many answers a second come out of the cache, beside a bare server that sends the same bytes?

    python3 bench/load.py [--seconds 120] [--answers 0] [--queue 16]
        [--hit-seconds 4] [--hit-rounds 5] [--hit-clients 4]

One run, Markdown on stdout. No claude is needed: the tests' stand-in answers with the question, and
each question holds a word that no other one does. A client that is refused comes back when it was
told to. The last column of the first table is the share of a key among those that always want more.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import http.server
import json
import math
import multiprocessing
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common

Json = Any

SLOTS = 8
#: The names of keys and how many clients have each. Whoever has more clients than its part of the
#: slots and of the queue always wants more; the last one does not.
DEMAND = (("workshop", 100), ("office", 50), ("laptop", 30), ("phone", 19), ("visitor", 1))
CLIENTS = sum(clients for _, clients in DEMAND)
GREEDY = tuple(name for name, clients in DEMAND if clients > SLOTS)
#: What a share may differ from an equal one.
MOST_UNFAIRNESS = 0.1
#: The start of a run, when not everybody asks yet, is not counted: so long, or this part of it.
RAMP_S, RAMP_PART = 5.0, 0.25
LEAST_HIT_RATIO = 0.5
#: How long what has no answer yet gets one after the end.
GRACE_S = 120.0
MODEL = "claude-haiku-4-5"


# ---------------------------------------------------------------------------
# OCP with keys
# ---------------------------------------------------------------------------

class KeyedOcp(common.KeyedOcp):
    """OCP over the tests' fake claude, with few places."""

    def __init__(
        self, folder: Path, settings: Mapping[str, str], tree: Path = common.REPO
    ) -> None:
        """See common.Ocp."""
        given = {"CLAUDE_MAX_CONCURRENT": str(SLOTS), "CLAUDE_QUEUE_RETRY_AFTER": "1"}
        # No API is behind the stand-in.
        environ = common.clean_environment(folder, "http://127.0.0.1:9")
        program = common.write_fake_claude(folder)
        super().__init__(folder, program, MODEL, environ, {**given, **settings}, tree)


class Holdings(NamedTuple):
    """What the server holds; None where the system does not tell."""

    memory: common.Memory | None
    threads: int | None
    descriptors: int | None
    #: Processes below it; those that it says it keeps, with the guardian; and ended ones.
    children: int | None
    kept: int
    zombies: int | None


def holdings(ocp: common.Ocp) -> Holdings:
    """What the server holds now."""
    health = ocp.get("/health")
    kept = sum(health["spares"].values()) + health["parked"] + 1
    folder = Path(f"/proc/{ocp.pid}")
    if not folder.exists():
        return Holdings(None, None, None, None, kept, None)
    states = [state for _, state in children_of(ocp.pid)]
    return Holdings(
        common.memory_of(ocp.pid), len(os.listdir(folder / "task")),
        len(os.listdir(folder / "fd")), len(states) - states.count("Z"), kept, states.count("Z"))


def children_of(pid: int) -> list[tuple[int, str]]:
    """The pids and states of the processes that this one has started and not waited for."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The command is in brackets and may itself contain brackets and spaces.
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid:
                found.append((int(stat.parent.name), state))
    return found


def settled(
    ocp: common.Ocp, before: Holdings | None = None, patience_s: float = common.PATIENCE_S
) -> Holdings:
    """What the server holds once nothing runs, it keeps no more processes than it says, and no
    more threads than before."""
    give_up_s = time.monotonic() + patience_s
    found = holdings(ocp)
    while time.monotonic() < give_up_s:
        idle = not ocp.get("/health")["stats"]["activeRequests"]
        idle = idle and (before is None or (found.threads or 0) <= (before.threads or 0))
        if idle and found.children in (None, found.kept) and not found.zombies:
            break
        time.sleep(0.2)
        found = holdings(ocp)
    return found


# ---------------------------------------------------------------------------
# A crowd
# ---------------------------------------------------------------------------

class Served(NamedTuple):
    """An answer: whose it is, when it was there, and how long its client waited for it."""

    key: str
    at_s: float
    waited_s: float


class Crowd:
    """Clients that ask one question after the other, until the time is up and so many answers
    were given. The time begins when all have asked and each key that always wants more has got an
    answer: the server may need seconds to hear everybody out."""

    def __init__(self, ocp: KeyedOcp, seconds: float, least: int) -> None:
        self._ocp = ocp
        self._seconds = seconds
        self._least = least
        #: From when on answers count, and to when; not known at first.
        self.first_s = math.inf
        self.ends_s = math.inf
        # Guards the fields above and below; held for a moment.
        self._lock = threading.Lock()
        self._born_s = time.monotonic()
        self._begins_s = math.inf
        self._asked: set[http.client.HTTPConnection] = set()
        self._answered: set[str] = set()
        self._counted = 0
        self.served: list[Served] = []
        self.refusals: collections.Counter[str] = collections.Counter()
        self.failures: collections.Counter[str] = collections.Counter()

    def run(self, keys: Mapping[str, str]) -> None:
        """Everything until the last client has its last answer. `keys` are by their names."""
        threads = [
            threading.Thread(target=self._client, args=(name, keys[name], number))
            for name, clients in DEMAND for number in range(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, name: str, key: str, number: int) -> None:
        connection = http.client.HTTPConnection(
            "127.0.0.1", self._ocp.port, timeout=common.PATIENCE_S)
        with contextlib.closing(connection):
            while self._goes_on():
                word = secrets.token_hex(12)
                # Every other client reads its answers as streams.
                failure = self._answer(connection, name, key, word, stream=number % 2 == 1)
                if failure:
                    connection.close()
                    with self._lock:
                        self.failures[failure] += 1

    def _goes_on(self) -> bool:
        """Whether there is another question to ask."""
        now_s = time.monotonic()
        with self._lock:
            all_there = len(self._asked) == CLIENTS and self._answered >= set(GREEDY)
            if self._begins_s == math.inf and (all_there or now_s > self._born_s + GRACE_S):
                self._begins_s = now_s
                self.first_s = now_s + min(RAMP_S, self._seconds * RAMP_PART)
            if now_s >= self._begins_s + self._seconds and self._counted >= self._least:
                self.ends_s = min(self.ends_s, now_s)
        return now_s < self.ends_s


    def _answer(
        self, connection: http.client.HTTPConnection, name: str, key: str, word: str, *,
        stream: bool,
    ) -> str:
        """Asks until there is an answer; what is wrong with it, or an empty string."""
        asked_s = time.monotonic()
        messages = [{"role": "user", "content": word}]
        body = json.dumps({"model": self._ocp.model_id, "stream": stream, "messages": messages})
        while True:
            try:
                connection.request(
                    "POST", "/v1/chat/completions", body.encode("utf-8"),
                    {"Authorization": f"Bearer {key}"})
                with self._lock:
                    self._asked.add(connection)
                response = connection.getresponse()
                content = response.read()
            except (OSError, http.client.HTTPException) as problem:
                return f"lost: {type(problem).__name__}"
            if response.status != 429:
                break
            dishonest = dishonesty(dict(response.headers.items()))
            with self._lock:
                self.refusals[name] += 1
            if dishonest or time.monotonic() > self.ends_s + GRACE_S:
                return dishonest or "refused for ever"
            time.sleep(int(response.headers["Retry-After"]))
        if response.status != 200:
            return f"status {response.status}"
        wrong = wrong_answer(content, word, stream=stream)
        now_s = time.monotonic()
        with self._lock:
            self.served.append(Served(name, now_s, now_s - asked_s))
            self._answered.add(name)
            self._counted += now_s >= self.first_s
        return wrong


def dishonesty(headers: Mapping[str, str]) -> str:
    """What is wrong with the headers of a refusal, or an empty string."""
    after = headers.get("Retry-After") or ""
    if not re.fullmatch("[0-9]{1,2}", after) or not 1 <= int(after) <= 60:
        return f"refusal with Retry-After {after!r}"
    return "refusal that forbids to come back" if headers.get("x-should-retry") else ""


def wrong_answer(content: bytes, word: str, *, stream: bool) -> str:
    """What is wrong with an answer to this word, or an empty string."""
    try:
        said = streamed_text(content) if stream else whole_text(content)
    except (ValueError, KeyError, IndexError, TypeError):
        return "broken answer"
    return "" if said == f"You said: {word}" else "somebody else's answer, or half of one"


def whole_text(content: bytes) -> str:
    """What an answer says."""
    return str(json.loads(content)["choices"][0]["message"]["content"])


def streamed_text(content: bytes) -> str:
    """What a stream says. Raises ValueError if it does not end once, and at its end."""
    *events, last = [line[6:] for line in content.split(b"\n") if line.startswith(b"data: ")]
    if last != b"[DONE]" or b"[DONE]" in events:
        raise ValueError("the end")
    deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


class KeyLoad(NamedTuple):
    """What came of one key's clients."""

    key: str
    clients: int
    #: All answers, those that count for the shares, and how many the server has in its books.
    answers: int
    counted: int
    booked: int
    refusals: int
    waits_s: Sequence[float]


class LoadRun(NamedTuple):
    """One run with all clients."""

    seconds: float
    keys: Sequence[KeyLoad]
    failures: Mapping[str, int]
    #: Refusals as the server counts them.
    refused: int
    before: Holdings
    after: Holdings

    @property
    def shares(self) -> dict[str, float]:
        """How much each key that always wants more got, 1 = an equal share."""
        counted = {load.key: load.counted for load in self.keys if load.key in GREEDY}
        equal = sum(counted.values()) / len(counted)
        return {key: count / equal if equal else 0.0 for key, count in counted.items()}


def measure_load(folder: Path, seconds: float, least: int, queue: int) -> LoadRun:
    """All clients at once at a new server."""
    folder.mkdir()
    # Each answer costs a process, or the keys with few clients would get all that they want.
    settings = {"OCP_PARKED_PROCESSES": "0", "CLAUDE_MAX_QUEUE": str(queue)}
    with KeyedOcp(folder, settings) as ocp:
        keys = {name: ocp.new_key(name) for name, _ in DEMAND}
        ocp.wait_until_ready(0.0)
        before = settled(ocp)
        crowd = Crowd(ocp, seconds, least)
        crowd.run(keys)
        after = settled(ocp, before)
        booked = {entry["key_name"]: entry for entry in
                  ocp.get("/api/usage?all=true&hours=24")["byKey"]}
        refused = int(ocp.get("/health")["stats"]["queueRejections"])
    loads = []
    for name, clients in DEMAND:
        mine = [each for each in crowd.served if each.key == name]
        counted = [each for each in mine if crowd.first_s <= each.at_s <= crowd.ends_s]
        loads.append(KeyLoad(
            name, clients, len(mine), len(counted), booked_of(booked.get(name)),
            crowd.refusals[name], [each.waited_s for each in counted]))
    return LoadRun(seconds, loads, dict(crowd.failures), refused, before, after)


def booked_of(entry: Mapping[str, Json] | None) -> int:
    """How many answers the server's books have; -1 when they have something else too."""
    if entry is None:
        return 0
    return int(entry["successes"]) if entry["successes"] == entry["requests"] else -1


# ---------------------------------------------------------------------------
# Cache hits
# ---------------------------------------------------------------------------

#: Those who send the same bytes, and what they are called in the table.
CONTESTANTS = {
    "ocp": "OCP, out of its cache",
    "bare": "bare ThreadingHTTPServer, header by header",
    "ready": "the same with the whole answer lying ready",
}


class Hits(NamedTuple):
    """Answers a second of each contestant, for each round."""

    rates: Mapping[str, Sequence[float]]
    #: How long an answer is, with its head.
    size_bytes: int

    def ratio(self, other: str) -> float:
        """OCP against another one, in the middle of the rounds."""
        pairs = zip(self.rates["ocp"], self.rates[other])
        return common.median([ocp / theirs for ocp, theirs in pairs])


def request_bytes(key: str, model_id: str) -> bytes:
    """A request whose answer is in the cache from the second time on."""
    messages = [{"role": "user", "content": common.QUESTION}]
    body = json.dumps({"model": model_id, "messages": messages}).encode("utf-8")
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("ascii") + body


def read_answer(connection: socket.socket) -> bytes:
    """One answer with its head. Raises BenchError."""
    received = b""
    while True:
        head, found, rest = received.partition(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        if found and not (length and head.startswith(b"HTTP/1.1 200")):
            raise common.BenchError(f"no whole answer: {head[:100]!r}")
        if length and len(rest) >= int(length[1]):
            return received
        piece = connection.recv(65_536)
        if not piece:
            raise common.BenchError("the server closed the connection")
        received += piece


def ask_for(port: int, request: bytes, starts_at_s: float, seconds: float) -> int:
    """How many answers one client gets in its time, on one connection. A process of its own."""
    with socket.create_connection(("127.0.0.1", port), timeout=common.PATIENCE_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(request)
        size = len(read_answer(connection))
        # The clocks of processes agree in this one only.
        time.sleep(max(0.0, starts_at_s - time.time()))
        ends_at_s = time.time() + seconds
        answers = 0
        while time.time() < ends_at_s:
            connection.sendall(request)
            missing = size
            while missing > 0:
                piece = connection.recv(65_536)
                if not piece:
                    raise common.BenchError("the server closed the connection")
                missing -= len(piece)
            if missing < 0:
                raise common.BenchError("answers of different sizes")
            answers += 1
    return answers


def hit_rate(port: int, request: bytes, clients: int, seconds: float) -> float:
    """Answers a second, for so many clients at once."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(clients) as pool:
        pool.map(abs, range(clients))
        starts_at_s = time.time() + 0.3
        jobs = [(port, request, starts_at_s, seconds)] * clients
        return sum(pool.starmap(ask_for, jobs, chunksize=1)) / seconds


class BareHandler(http.server.BaseHTTPRequestHandler):
    """Reads a request and sends an answer's head, header by header, and its body."""

    protocol_version = "HTTP/1.1"
    # Without this the body would wait for the client's word that it has the head.
    disable_nagle_algorithm = True
    headers_out: Sequence[tuple[str, str]] = ()
    body = b""

    def do_POST(self) -> None:
        """Answers."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        for name, value in self.headers_out:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.body)

    def version_string(self) -> str:
        """What OCP says, so that the answers are equally long."""
        return self.server_version

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""


class ReadyHandler(BareHandler):
    """Reads a request and sends an answer that lies ready, head and all, in one piece."""

    def do_POST(self) -> None:
        """Answers."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.wfile.write(self.body)


class BareServer(http.server.ThreadingHTTPServer):
    """A thread for each connection, as OCP has it."""

    daemon_threads = True


def serve_bare(kind: str, path: str) -> None:
    """Serves the answer in this file, until the process is ended."""
    answer = Path(path).read_bytes()
    handler = ReadyHandler if kind == "ready" else BareHandler
    handler.body = answer
    if kind == "bare":
        head, _, handler.body = answer.partition(b"\r\n\r\n")
        lines = [line.partition(": ") for line in head.decode("ascii").split("\r\n")[1:]]
        found = {name: value for name, _, value in lines}
        handler.server_version = found.pop("Server")
        del found["Date"]
        handler.headers_out = list(found.items())
    server = BareServer(("127.0.0.1", 0), handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


@contextlib.contextmanager
def bare_server(folder: Path, kind: str, answer: bytes) -> Iterator[int]:
    """The port of a bare server in a process of its own."""
    path = folder / "answer.http"
    path.write_bytes(answer)
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--serve", kind, str(path)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0)
    try:
        yield int(common.line_within(process, r"http://127\.0\.0\.1:(\d+)", "the bare server")[1])
    finally:
        process.terminate()
        common.end(process)
        if process.stdout is not None:
            process.stdout.close()


def cached_answer(port: int, request: bytes) -> bytes:
    """The answer as it comes out of the cache. Raises BenchError."""
    answer = b""
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", port), common.PATIENCE_S) as connection:
            connection.sendall(request)
            answer = read_answer(connection)
    if b"\r\nX-OCP-Cache: hit\r\n" not in answer:
        raise common.BenchError("the cache has no answer")
    return answer


def measure_hits(folder: Path, clients: int, seconds: float, rounds: int) -> Hits:
    """All contestants in turns."""
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        ocp = stack.enter_context(KeyedOcp(folder, {"CLAUDE_CACHE_TTL": "3600000"}))
        request = request_bytes(ocp.new_key("laptop"), ocp.model_id)
        answer = cached_answer(ocp.port, request)
        ports = {"ocp": ocp.port}
        for kind in ("bare", "ready"):
            ports[kind] = stack.enter_context(bare_server(folder, kind, answer))
        rates: dict[str, list[float]] = {name: [] for name in ports}
        names = list(ports)
        for number in range(rounds):
            # The one that comes first is another one each time.
            for name in names[number % len(names):] + names[:number % len(names)]:
                rates[name].append(hit_rate(ports[name], request, clients, seconds))
            shown = ", ".join(f"{name} {found[-1]:,.0f}/s" for name, found in rates.items())
            common.progress(f"round {number + 1}: {shown}")
    return Hits(rates, len(answer))


# ---------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------

def load_table(run: LoadRun) -> str:
    """The keys as Markdown."""
    head = ["key", "clients", "answers", "in the server's books", "refused and came back",
            "median wait ms", "p95 wait ms", "share"]
    rows = []
    for load in run.keys:
        waits = [common.shown_ms(common.percentile(load.waits_s, share)) if load.waits_s else "-"
                 for share in (0.5, 0.95)]
        share = f"{run.shares[load.key]:.3f}" if load.key in run.shares else "-"
        rows.append([load.key, str(load.clients), f"{load.answers:,}", f"{load.booked:,}",
                     f"{load.refusals:,}", *waits, share])
    return common.markdown_table(head, rows)


def verdict(name: str, value: str, met: bool) -> str:
    """One line below a table for what is counted."""
    return f"- {name}: {value}: {'reached' if met else 'MISSED'}"


def load_targets(run: LoadRun) -> list[str]:
    """Whether everything came once, and to everybody in turn."""
    failed = ", ".join(f"{count} x {reason}" for reason, count in sorted(run.failures.items()))
    unbooked = sum(abs(load.answers - load.booked) for load in run.keys)
    uncounted = abs(sum(load.refusals for load in run.keys) - run.refused)
    unfair = max(abs(share - 1) for share in run.shares.values())
    return [
        verdict("answers lost, doubled or mixed up (to reach: none)", failed or "none", not failed),
        verdict("answers that are not in the server's books once (to reach: 0)", str(unbooked),
                not unbooked),
        verdict("refusals that the server does not count (to reach: 0)", str(uncounted),
                not uncounted),
        common.verdict(
            "the share that is farthest from an equal one, by how much", unfair,
            f"at most {MOST_UNFAIRNESS}", unfair <= MOST_UNFAIRNESS),
    ]


def holdings_table(run: LoadRun) -> str:
    """What the server holds before and after, as Markdown."""
    head = ["the server, idle", "RSS MB", "PSS MB", "threads", "descriptors", "processes",
            "kept as it says", "zombies"]
    rows = []
    for name, held in (("before", run.before), ("after", run.after)):
        sizes = [common.shown_mb(size) for size in held.memory or ()] or ["-", "-"]
        counts = (held.threads, held.descriptors, held.children, held.kept, held.zombies)
        rows.append([name, *sizes, *("-" if count is None else str(count) for count in counts)])
    return common.markdown_table(head, rows)


def holdings_targets(run: LoadRun) -> list[str]:
    """Whether nothing stayed."""
    before, after = run.before, run.after
    if after.children is None:
        return ["- what the server holds: this system does not tell"]
    left = abs(after.children - after.kept) + (after.zombies or 0)
    threads = (after.threads or 0) - (before.threads or 0)
    return [
        verdict("processes that it does not know of (to reach: 0)", str(left), not left),
        verdict("threads that stayed (to reach: 0)", str(threads), threads <= 0),
    ]


def hits_table(hits: Hits, clients: int) -> str:
    """The cache's speed as Markdown."""
    head = [f"{clients} connections, {hits.size_bytes:,} bytes", "answers/s", "best", "worst"]
    rows = []
    for name, rates in hits.rates.items():
        values = (common.median(rates), max(rates), min(rates))
        rows.append([CONTESTANTS[name], *(f"{value:,.0f}" for value in values)])
    return common.markdown_table(head, rows)


def hits_targets(hits: Hits) -> list[str]:
    """Whether the cache is fast enough."""
    ratio = hits.ratio("bare")
    return [
        common.verdict("OCP / bare", ratio, f"at least {LEAST_HIT_RATIO}",
                       ratio >= LEAST_HIT_RATIO),
        common.comparison("OCP / the answer lying ready", hits.ratio("ready")),
    ]


def table(run: LoadRun, hits: Hits, options: argparse.Namespace, machine: str) -> str:
    """Everything as Markdown."""
    about = (
        f"{CLIENTS} clients at {SLOTS} slots for {run.seconds:g} s; {options.hit_rounds} rounds of "
        f"{options.hit_seconds:g} s for each cache figure; {machine}"
    )
    parts = [
        load_table(run), "", *load_targets(run), "",
        holdings_table(run), "", *holdings_targets(run), "",
        hits_table(hits, options.hit_clients), "", *hits_targets(hits), "", about,
    ]
    return "\n".join(parts)


# ---------------------------------------------------------------------------
# Program
# ---------------------------------------------------------------------------

def run(options: argparse.Namespace) -> str:
    """Everything from the start of the servers to their end; the Markdown."""
    with tempfile.TemporaryDirectory(prefix="ocp-bench-") as name:
        folder = Path(name)
        hits = measure_hits(
            folder / "hits", options.hit_clients, options.hit_seconds, options.hit_rounds)
        common.progress(f"load for {options.seconds:g} s")
        load = measure_load(folder / "load", options.seconds, options.answers, options.queue)
        on = common.machine()
    return table(load, hits, options, f"{on}, the tests' stand-in for claude")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    options.add_argument("--seconds", type=float, default=120.0, help="of load; default: 120")
    options.add_argument(
        "--answers", type=int, default=0, help="go on until there are so many; default: 0")
    options.add_argument(
        "--queue", type=int, default=16, help="requests that may wait for a slot; default: 16")
    options.add_argument(
        "--hit-seconds", type=float, default=4.0, help="for each figure of the cache; default: 4")
    options.add_argument("--hit-rounds", type=int, default=5, help="default: 5")
    options.add_argument(
        "--hit-clients", type=int, default=4, help="processes that read the cache; default: 4")
    options.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables; 1 when they could not be measured."""
    options = parser().parse_args(arguments)
    if options.serve:
        serve_bare(*options.serve)
    return common.report("load", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
