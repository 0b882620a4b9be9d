"""How many answers a second: through OCP, against a cold `claude -p` for each; and its memory.

    python3 bench/throughput.py --claude /path/to/claude [--seconds 15] [--model MODEL]
                                [--delay-ms 0] [--memory-answers 1000]
                                [--memory-claude fake|real]

One run, Markdown on stdout. Each client asks, reads its streamed answer to the end, and asks
again, on a connection of its own. The two contestants take turns at each number of clients.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import common

CLIENTS = (1, 8, 16)
#: The cold contestant gets this share of the time: its figures vary less.
COLD_SHARE = 0.6
MEMORY_POINTS = (0, 100, 1_000)
MEMORY_CLIENTS = 4
MOST_MEMORY_BYTES = 60_000_000
#: What counts as not growing, from the second point to the last.
MOST_GROWTH_BYTES = 2_000_000


class Load(NamedTuple):
    """What came of some clients asking for some time."""

    timings: Sequence[common.Timing]
    #: Until the last answer was there.
    elapsed_s: float
    #: How often each kind of failure came, by its short name.
    failures: Mapping[str, int]
    #: Claude processes started meanwhile.
    spawned: int

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.timings) / self.elapsed_s if self.elapsed_s else 0.0


class Row(NamedTuple):
    """Both contestants with the same number of clients."""

    clients: int
    ocp: Load
    cold: Load


class MemoryPoint(NamedTuple):
    """The server's own memory after so many answers; None where the system does not tell."""

    answers: int
    memory: common.Memory | None


class MemoryRun(NamedTuple):
    """The server's memory over one life, and which claude answered."""

    claude: str
    points: Sequence[MemoryPoint]


#: Asks once. Raises common.Refused when there was no answer.
Ask = Callable[[], common.Timing]


# ---------------------------------------------------------------------------
# Load
# ---------------------------------------------------------------------------

class Crowd:
    """Clients that ask at the same time until `may_go_on` says no."""

    def __init__(self, may_go_on: Callable[[], bool]) -> None:
        self._may_go_on = may_go_on
        # Guards the two fields below; held for an append.
        self._lock = threading.Lock()
        self._timings: list[common.Timing] = []
        self._failures: collections.Counter[str] = collections.Counter()

    def run(self, clients: Sequence[Callable[[], contextlib.AbstractContextManager[Ask]]]) -> Load:
        """Everything until the last client has its last answer; spawned is left at 0."""
        threads = [threading.Thread(target=self._client, args=(each,)) for each in clients]
        started_s = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed_s = time.perf_counter() - started_s
        return Load(self._timings, elapsed_s, dict(self._failures), 0)

    def _client(self, opened: Callable[[], contextlib.AbstractContextManager[Ask]]) -> None:
        with opened() as ask:
            while self._may_go_on():
                try:
                    timing = ask()
                except (common.Refused, common.BenchError) as problem:
                    with self._lock:
                        self._failures[str(problem)] += 1
                    # A refusal that comes at once must not become a load of its own.
                    time.sleep(0.1)
                else:
                    with self._lock:
                        self._timings.append(timing)


def for_seconds(seconds: float) -> Callable[[], bool]:
    """True for so long, from now."""
    end_s = time.perf_counter() + seconds
    return lambda: time.perf_counter() < end_s


def for_times(times: int) -> Callable[[], bool]:
    """True so many times, whoever asks."""
    numbers = itertools.count()
    return lambda: next(numbers) < times


@contextlib.contextmanager
def ocp_client(ocp: common.Ocp) -> Iterator[Ask]:
    """A client of OCP on a connection of its own, which it keeps. No question comes twice."""
    with contextlib.closing(common.Client(ocp.port)) as client:
        yield lambda: client.ask(ocp.model_id, f"{common.QUESTION} ({time.perf_counter_ns()})")


@contextlib.contextmanager
def cold_client(spawn: common.Spawn) -> Iterator[Ask]:
    """A client that starts `claude -p` for each question."""
    yield lambda: common.ask_cold(spawn)


def load_ocp(ocp: common.Ocp, clients: int, may_go_on: Callable[[], bool]) -> Load:
    """So many clients at OCP."""
    before = ocp.spawned()
    load = Crowd(may_go_on).run([lambda: ocp_client(ocp)] * clients)
    return load._replace(spawned=ocp.spawned() - before)


def load_cold(spawn: common.Spawn, clients: int, may_go_on: Callable[[], bool]) -> Load:
    """So many clients at claude itself; each answer is one process."""
    load = Crowd(may_go_on).run([lambda: cold_client(spawn)] * clients)
    return load._replace(spawned=len(load.timings) + sum(load.failures.values()))


def measure_load(claude: Path, options: argparse.Namespace, folder: Path) -> list[Row]:
    """OCP and cold starts in turn, with more and more clients."""
    rows, model, seconds = [], options.model, options.seconds
    with common.Stub(folder, delay_ms=options.delay_ms) as stub:
        environ = common.clean_environment(folder, stub.url)
        spawn = common.record_spawn(folder, claude, model, environ)
        with common.Ocp(folder, claude, model, environ) as ocp:
            load_ocp(ocp, 1, for_times(1))
            for clients in CLIENTS:
                ocp.wait_until_ready()
                warm_load = load_ocp(ocp, clients, for_seconds(seconds))
                ocp.wait_until_ready()
                cold_load = load_cold(spawn, clients, for_seconds(seconds * COLD_SHARE))
                rows.append(Row(clients, warm_load, cold_load))
                common.progress(
                    f"{clients} clients: OCP {warm_load.rate:.2f}/s, cold {cold_load.rate:.2f}/s")
    return rows


# ---------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------

def memory_points(answers: int) -> list[int]:
    """After how many answers to look, at most `answers`."""
    return sorted({point for point in MEMORY_POINTS if point < answers} | {answers})


def measure_memory(
    claude: Path, kind: str, model: str, answers: int, folder: Path
) -> MemoryRun:
    """A new server, asked so often, by few clients: it is about memory, not about speed."""
    folder.mkdir()
    points = []
    with common.Stub(folder) as stub:
        environ = common.clean_environment(folder, stub.url)
        program = claude if kind == "real" else common.write_fake_claude(folder)
        with common.Ocp(folder, program, model, environ) as ocp:
            done = 0
            for point in memory_points(answers):
                load = load_ocp(ocp, MEMORY_CLIENTS, for_times(point - done))
                _require_answers(load, point - done)
                done = point
                ocp.wait_until_ready()
                points.append(MemoryPoint(point, common.memory_of(ocp.pid)))
                common.progress(f"memory after {point} answers of the {kind} claude")
    return MemoryRun(kind, points)


def _require_answers(load: Load, wanted: int) -> None:
    if len(load.timings) < wanted:
        raise common.BenchError(f"only {len(load.timings)} of {wanted} answers: {load.failures}")


# ---------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------

def load_cells(load: Load) -> list[str]:
    """One contestant's part of a row."""
    totals_s = [timing.total_s for timing in load.timings]
    if not totals_s:
        return ["0.00", "-", "-"]
    middle, slow = common.median(totals_s), common.percentile(totals_s, 0.95)
    return [f"{load.rate:.2f}", common.shown_ms(middle), common.shown_ms(slow)]


def load_table(rows: Sequence[Row]) -> str:
    """The loads as Markdown."""
    head = [
        "clients", "OCP answers/s", "median ms", "p95 ms", "processes started",
        "cold answers/s", "median ms", "p95 ms", "OCP / cold",
    ]
    cells = [
        [
            str(row.clients), *load_cells(row.ocp),
            f"{row.ocp.spawned} for {len(row.ocp.timings)}", *load_cells(row.cold),
            f"{row.ocp.rate / row.cold.rate:.2f}" if row.cold.timings else "-",
        ]
        for row in rows
    ]
    return common.markdown_table(head, cells)


def failure_lines(rows: Sequence[Row]) -> list[str]:
    """One line for each kind of failure; none is what is wanted."""
    lines = []
    for row in rows:
        for name, load in (("OCP", row.ocp), ("cold", row.cold)):
            for reason, count in sorted(load.failures.items()):
                lines.append(f"- {name} with {row.clients} clients FAILED {count} times: {reason}")
    return lines


def memory_table(run: MemoryRun) -> str:
    """The server's own memory as Markdown."""
    head = [f"the server's own memory, {run.claude} claude", "RSS MB", "PSS MB"]
    rows = []
    for answers, memory in run.points:
        shown = (memory.rss_bytes, memory.pss_bytes) if memory else ()
        cells = [common.shown_mb(count) for count in shown] or ["-", "-"]
        rows.append([f"after {answers:,} answers" if answers else "at the start", *cells])
    return common.markdown_table(head, rows)


def memory_targets(run: MemoryRun) -> list[str]:
    """Whether the server is small, and stays so once it has warmed up."""
    sizes = [point.memory.rss_bytes for point in run.points if point.memory]
    if not sizes:
        return ["- the server's memory: this system does not tell"]
    grown = sizes[-1] - sizes[min(1, len(sizes) - 1)]
    most_mb, growth_mb = MOST_MEMORY_BYTES / 1e6, MOST_GROWTH_BYTES / 1e6
    return [
        common.verdict(
            "MB of RSS, at most", max(sizes) / 1e6, f"under {most_mb:.0f}",
            max(sizes) < MOST_MEMORY_BYTES),
        common.verdict(
            "MB of RSS grown after the first hundred", grown / 1e6, f"at most {growth_mb:.0f}",
            grown <= MOST_GROWTH_BYTES),
    ]


def table(
    rows: Sequence[Row], memory: MemoryRun, seconds: float, delay_ms: float, machine: str
) -> str:
    """Everything as Markdown."""
    about = (
        f"{seconds:g} s for each OCP figure, {seconds * COLD_SHARE:g} s for each cold one, "
        f"{common.shown_delay(delay_ms)}; {machine}"
    )
    parts = [load_table(rows), ""]
    failures = failure_lines(rows)
    parts += [*failures, ""] if failures else []
    parts += [memory_table(memory), "", *memory_targets(memory), "", about]
    return "\n".join(parts)


# ---------------------------------------------------------------------------
# Program
# ---------------------------------------------------------------------------

def run(options: argparse.Namespace) -> str:
    """Everything from the start of the servers to their end; the Markdown."""
    claude = common.find_claude(options.claude)
    with tempfile.TemporaryDirectory(prefix="ocp-bench-") as name:
        folder = Path(name)
        rows = measure_load(claude, options, folder)
        memory = measure_memory(
            claude, options.memory_claude, options.model, max(1, options.memory_answers),
            Path(os.path.join(name, "memory")))
    return table(rows, memory, options.seconds, options.delay_ms, common.machine(claude))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    common.add_arguments(options)
    options.add_argument("--seconds", type=float, default=15.0, help="default: 15")
    options.add_argument(
        "--memory-answers", type=int, default=1000, metavar="N",
        help="answers before the last look at the memory; default: 1000")
    options.add_argument(
        "--memory-claude", choices=("real", "fake"), default="fake",
        help="who gives those answers: the tests' stand-in, or the real one, which takes minutes; "
        "default: fake")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables; 1 when they could not be measured."""
    options = parser().parse_args(arguments)
    return common.report("throughput", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
