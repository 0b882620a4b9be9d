"""One client against all others: how long does an innocent client with a key wait at worst, and how
much memory does the server take, while somebody takes more than a fair share?

    python3 bench/attacks.py [--seconds 10] [--before FOLDER] [NAME ...]

One run, Markdown on stdout. No claude is needed: the tests' stand-in answers. The attacks are those
of tests/kit/attackers.py, each in a process of its own beside a server with an empty home. With
--before, the version in that folder goes through the same in the same run. Four at once are all
attacks of `TOGETHER`. Not answered are requests that were refused, cut off, or waited for longer
than the run lasted.
"""

from __future__ import annotations

import argparse
import contextlib
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import common
import load

KIT = common.REPO / "tests" / "kit"
sys.path.insert(0, str(KIT))

import attackers  # noqa: E402 (of tests/kit)

#: What goes on at once in the last row.
TOGETHER = ("many_values", "idle_connections", "unread_streams", "unknown_paths")
#: How many rows the reports have to read.
USAGE_ROWS = 131_000
WORST_ALONE_S, WORST_TOGETHER_S = 1.0, 3.0
MEMORY_BYTES = 70_000_000 + 12 * 33_554_432


class Result(NamedTuple):
    """What one attack did to the innocent client and to the server."""

    wait: attackers.Wait
    memory_bytes: int

    @property
    def lost(self) -> int:
        """How many of the innocent's requests were not answered."""
        return sum(self.wait.statuses.values()) - self.wait.statuses.get(200, 0)


@contextlib.contextmanager
def under_attack(names: Sequence[str], port: int, keys: Sequence[str]) -> Iterator[None]:
    """Attack while the block lasts."""
    started = [
        subprocess.Popen(
            [sys.executable, str(KIT / "attackers.py"), name, str(port), key],
            stdin=subprocess.PIPE)
        for name, key in zip(names, keys)
    ]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def fill_usage(home: Path, key_id: int) -> None:
    """Put rows of usage into the database of a running server, spread over a year."""
    with contextlib.closing(sqlite3.connect(home / "ocp.db", timeout=60)) as database, database:
        columns = [row[1] for row in database.execute("pragma table_info(usage)")]
        given: dict[str, object] = {name: 0 for name in columns if name != "id"}
        given.update(
            request_id="req_x", key_id=key_id, caller="bad", model=load.MODEL,
            dialect="chat", outcome="ok", status=200, path="fresh", stop_reason="end_turn")
        now_s, names = time.time(), list(given)
        time_column = names.index("at_s") if "at_s" in names else names.index("at")
        marks = ",".join("?" * len(names))
        rows = []
        for number in range(USAGE_ROWS):
            row = list(given.values())
            row[time_column] = now_s - number * 240
            rows.append(row)
        database.executemany(f"insert into usage ({','.join(names)}) values ({marks})", rows)


def measure(tree: Path, names: Sequence[str], seconds: float) -> Result:
    """Return how an innocent client fares for so long beside these attacks."""
    with tempfile.TemporaryDirectory(prefix="ocp-bench-") as folder:
        with load.KeyedOcp(Path(folder), {"CLAUDE_MAX_CONCURRENT": "4"}, tree) as ocp:
            made = [ocp.call("POST", "/api/keys", {"name": f"bad-{number}"})
                    for number in range(len(names))]
            innocent = ocp.new_key("good")
            if "reports" in names:
                fill_usage(Path(folder) / "ocp", made[0]["id"])
            attackers.ask_once(ocp.port, innocent)
            with attackers.highest_memory(ocp.pid) as peak:
                with under_attack(names, ocp.port, [each["key"] for each in made]):
                    wait = attackers.wait_beside(ocp.port, innocent, seconds, timeout_s=4 * seconds)
            return Result(wait, peak[0])


def row_of(name: str, results: Sequence[Result]) -> list[str]:
    """The cells of one attack: each version's worst wait, memory and requests not answered."""
    cells = [name.replace("_", " ")]
    for result in results:
        cells += [f"{result.wait.worst_s:.2f}", common.shown_mb(result.memory_bytes),
                  str(result.lost)]
    return cells


def run(options: argparse.Namespace) -> str:
    """Return the table."""
    trees = [*([options.before] if options.before else []), common.REPO]
    head = ["attack"]
    for word in ["before", "now"] if options.before else ["now"]:
        head += [f"{word}: worst wait s", "memory MB", "not answered"]
    rows, worst_s, together_s, memory = [], 0.0, 0.0, 0
    for names in [*([name] for name in options.names or attackers.ATTACKS), list(TOGETHER)]:
        label = names[0] if len(names) == 1 else "four at once"
        common.progress(f"attacks: {label}")
        results = [measure(tree, names, options.seconds) for tree in trees]
        rows.append(row_of(label, results))
        memory = max(memory, results[-1].memory_bytes)
        if len(names) == 1:
            worst_s = max(worst_s, results[-1].wait.worst_s)
        else:
            together_s = results[-1].wait.worst_s
    reached = [
        common.verdict("worst wait beside one, s", worst_s, "under 1", worst_s < WORST_ALONE_S),
        common.verdict("worst wait beside four, s", together_s, "under 3",
                       together_s < WORST_TOGETHER_S),
        common.verdict("memory, MB", memory / 1e6, f"under {MEMORY_BYTES / 1e6:.0f}",
                       memory < MEMORY_BYTES),
    ]
    return "\n".join([common.markdown_table(head, rows), "", *reached, "",
                      f"{options.seconds:g} s for each; {common.machine()}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 when it could not be measured."""
    parser = argparse.ArgumentParser(description="One client against all others.")
    parser.add_argument("names", nargs="*", help="all by default")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--before", type=Path, help="folder of the version to compare with")
    options = parser.parse_args(arguments)
    return common.report("attacks", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
