"""How a conversation goes on: the first word of each turn, with and without parked processes.

    python3 bench/conversation.py --claude /path/to/claude [--turns 20] [--model MODEL]

One run, one Markdown table on stdout. The contestants hold the same conversation turn by turn and
take turns at it: OCP, OCP that parks nothing and so rebuilds every turn on a spare, a claude that
is driven by hand and stays, and a `claude -p` for each turn that is given the whole conversation
as one text, as programs without a protocol do.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import common

OCP, REBUILT, HAND, COLD = "ocp", "rebuilt", "hand", "cold"
NAMES = {
    OCP: "OCP, conversation parked",
    REBUILT: "OCP, nothing parked: rebuilt on a spare",
    HAND: "one claude by hand",
    COLD: "cold `claude -p` for each turn",
}
MOST_OF_HAND = 1.3
#: Between two turns: somebody reads and types.
PAUSE_S = 0.5


class Turn(NamedTuple):
    """One turn of one contestant."""

    first_s: float
    #: Processes that OCP started so far; 0 for the others.
    spawned: int


def question(number: int) -> str:
    """What the user says in a turn."""
    return f"Question {number}: tell me about the number {number}."


def ask_chat(port: int, model: str, messages: list[dict[str, str]]) -> tuple[float, str]:
    """Seconds to the first word of a streamed answer, and its text. Raises Refused."""
    body = json.dumps({"model": model, "stream": True, "messages": messages}).encode("utf-8")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=common.PATIENCE_S)
    started_s, first_s, words = time.perf_counter(), 0.0, []
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", body)
        response = connection.getresponse()
        if response.status != 200:
            raise common.Refused(f"status {response.status}")
        for line in iter(response.readline, b""):
            chunk = json.loads(line[6:]) if line.startswith(b"data: {") else {}
            for choice in chunk.get("choices", ()):
                word = choice["delta"].get("content")
                if word:
                    first_s = first_s or time.perf_counter() - started_s
                    words.append(word)
    return first_s, "".join(words)


class Conversation:
    """A conversation through a running OCP."""

    def __init__(self, ocp: common.Ocp) -> None:
        self._ocp = ocp
        self._messages: list[dict[str, str]] = []

    def turn(self, number: int) -> Turn:
        """The next turn."""
        self._messages.append({"role": "user", "content": question(number)})
        first_s, text = ask_chat(self._ocp.port, self._ocp.model_id, self._messages)
        self._messages.append({"role": "assistant", "content": text})
        return Turn(first_s, self._ocp.spawned())


class ByHand:
    """A conversation with one claude, and nothing between it and the clock."""

    def __init__(self, warm: common.WarmClaude) -> None:
        self._warm = warm

    def turn(self, number: int) -> Turn:
        """The next turn."""
        if number == 1:
            return Turn(self._warm.ask(question(1)).first_s, 0)
        return Turn(self._warm.ask_again(question(number)).first_s, 0)


class Cold:
    """A conversation in which each turn starts a claude and tells it everything."""

    def __init__(self, spawn: common.Spawn) -> None:
        self._spawn = spawn
        self._said: list[str] = []

    def turn(self, number: int) -> Turn:
        """The next turn."""
        self._said.append(f"User: {question(number)}")
        timing = common.ask_cold(self._spawn, "\n".join(self._said))
        self._said.append("Assistant: Hello from the stub.")
        return Turn(timing.first_s, 0)


def measure(
    contestants: Mapping[str, Callable[[int], Turn]], turns: int
) -> dict[str, list[Turn]]:
    """All turns, one contestant after the other within each."""
    found: dict[str, list[Turn]] = {name: [] for name in contestants}
    for number in range(1, turns + 1):
        for name, turn in contestants.items():
            found[name].append(turn(number))
            time.sleep(PAUSE_S)
        shown = ", ".join(f"{name} {common.shown_ms(found[name][-1].first_s)}" for name in found)
        common.progress(f"turn {number} of {turns}: {shown} ms")
    return found


def table(results: Mapping[str, Sequence[Turn]], machine: str) -> str:
    """The results as Markdown: the table, the targets, and the machine."""
    rows = []
    for name, turns in results.items():
        later = [turn.first_s for turn in turns[1:]]
        rows.append(
            [
                NAMES[name],
                common.shown_ms(turns[0].first_s),
                common.shown_ms(common.median(later)),
                common.shown_ms(common.percentile(later, 0.9)),
                str(turns[-1].spawned - turns[1].spawned) if turns[-1].spawned else "",
            ]
        )
    head = ["first token", "first turn ms", "later turns, median ms", "p90 ms", "later spawns"]
    about = f"{len(results[OCP])} turns, API without delay; {machine}"
    return "\n".join([common.markdown_table(head, rows), "", *targets(results), "", about])


def targets(results: Mapping[str, Sequence[Turn]]) -> list[str]:
    """One line for each thing to reach."""
    middle = {
        name: common.median([turn.first_s for turn in turns[1:]])
        for name, turns in results.items()
    }
    to_hand = middle[OCP] / middle[HAND]
    spawns = results[OCP][-1].spawned - results[OCP][1].spawned
    return [
        common.verdict(
            "later turns, OCP / one claude by hand", to_hand, f"at most {MOST_OF_HAND}",
            to_hand <= MOST_OF_HAND),
        common.verdict("spawns of OCP after the second turn", spawns, "none", spawns == 0),
        common.verdict(
            "later turns, cold `claude -p` / OCP", middle[COLD] / middle[OCP], "for comparison",
            True),
    ]


def run(claude: Path, model: str, turns: int) -> str:
    """Everything from the start of the servers to their end; the Markdown."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ocp-bench-")))
        stub = stack.enter_context(common.Stub(folder))
        environ = common.clean_environment(folder, stub.url)
        spawn = common.record_spawn(folder, claude, model, environ)
        other = folder / "rebuilding"
        os.makedirs(other)
        ocp = stack.enter_context(common.Ocp(folder, claude, model, environ))
        settings = {"OCP_PARKED_PROCESSES": "0"}
        rebuilding = stack.enter_context(common.Ocp(other, claude, model, environ, settings))
        warm = stack.enter_context(common.WarmClaude(spawn))
        ocp.wait_until_ready()
        rebuilding.wait_until_ready()
        results = measure(
            {
                OCP: Conversation(ocp).turn,
                REBUILT: Conversation(rebuilding).turn,
                HAND: ByHand(warm).turn,
                COLD: Cold(spawn).turn,
            },
            turns,
        )
    return table(results, common.machine(claude))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--claude", default="", metavar="PATH", help="default: on PATH")
    options.add_argument("--turns", type=int, default=20, help="default: 20")
    options.add_argument("--model", default="claude-haiku-4-5", help="default: claude-haiku-4-5")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 when it could not be measured."""
    options = parser().parse_args(arguments)
    return common.report("conversation", lambda: run(
        common.find_claude(options.claude), options.model, max(3, options.turns)))


if __name__ == "__main__":
    sys.exit(main())
