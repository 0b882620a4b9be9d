"""How long the first word takes: through OCP, through a warm claude by hand, through a cold one.

    python3 bench/first_token.py --claude /path/to/claude [--rounds 15] [--model MODEL]
                                 [--delay-ms 0]
    python3 bench/first_token.py --efforts none,low,medium,default --model sonnet
                                 [--think-ms 1000]

One run, one Markdown table on stdout. The contestants take turns, each round in another order,
so that whatever else the machine does meets all of them alike. Each waits until the machine is
at rest and, where it needs one, a claude process stands ready that is 3 s old.

With --efforts the contestants are requests to OCP with these efforts, and the API thinks before
its text at an effort above low, for a time that is made up.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import common

#: The keys of the results, in the order of the table.
OCP, OCP_LIMITED, OCP_AGAIN = "ocp", "ocp_max_tokens", "ocp_again"
HAND, COLD, PLAIN = "hand", "cold", "plain"
NAMES = {
    OCP: "OCP, spare ready",
    OCP_LIMITED: "OCP, spare ready, with max_tokens",
    OCP_AGAIN: "OCP, after another question",
    HAND: "warm claude by hand",
    COLD: "cold `claude -p`, OCP's arguments",
    PLAIN: "cold `claude -p`, its own defaults",
}
MOST_OF_HAND = 1.3
LEAST_OF_COLD = 8.0
MOST_UPSTREAM_BYTES = 2_200
#: Efforts that can be compared; the first one leaves the effort to the model.
DEFAULT = "default"
EFFORTS = (DEFAULT, "none", "minimal", "low", "medium", "high", "xhigh", "max")


class Result(NamedTuple):
    """What was measured of one contestant."""

    #: Seconds to the first word, one for each round.
    firsts_s: Sequence[float]
    #: The body of its request to the API.
    upstream_bytes: int


class Setting(NamedTuple):
    """What the contestants are asked with."""

    #: One that keeps no process after its answer, and one that keeps one.
    ocp: common.Ocp
    keeping: common.Ocp
    stub: common.Stub
    #: How OCP starts claude, for those that do without OCP; and how others start it.
    spawn: common.Spawn
    plain: common.Spawn


def ask_ocp(setting: Setting) -> common.Timing:
    """A new connection, one streamed answer."""
    return _ask_ocp(setting, None)


def ask_ocp_limited(setting: Setting) -> common.Timing:
    """The same with a parameter, which costs one more control request."""
    return _ask_ocp(setting, 1000)


def _ask_ocp(setting: Setting, max_tokens: int | None) -> common.Timing:
    options = {} if max_tokens is None else {"max_tokens": max_tokens}
    setting.ocp.wait_until_ready()
    with contextlib.closing(common.Client(setting.ocp.port)) as client:
        return client.ask(setting.ocp.model_id, common.QUESTION, **options)


def ask_ocp_again(setting: Setting) -> common.Timing:
    """Another question than before; a recent claude has forgotten that one."""
    setting.keeping.wait_until_ready()
    with contextlib.closing(common.Client(setting.keeping.port)) as client:
        client.ask(setting.keeping.model_id, f"{common.QUESTION} And {time.time_ns()}?")
        time.sleep(common.SETTLED_S)
        return client.ask(setting.keeping.model_id, common.QUESTION)


def ask_by_hand(setting: Setting) -> common.Timing:
    """A process of the age that OCP's spare has, and nothing between it and the clock."""
    setting.ocp.wait_until_ready()
    with common.WarmClaude(setting.spawn) as warm:
        time.sleep(max(0.0, warm.born_s + common.SETTLED_S - time.monotonic()))
        return warm.ask()


def ask_cold(setting: Setting) -> common.Timing:
    """What a program pays that starts claude for each question."""
    setting.ocp.wait_until_ready()
    return common.ask_cold(setting.spawn)


def ask_plain(setting: Setting) -> common.Timing:
    """The same with claude's own tools and its own system prompt."""
    setting.ocp.wait_until_ready()
    return common.ask_cold(setting.plain)


CONTESTANTS: dict[str, Callable[[Setting], common.Timing]] = {
    OCP: ask_ocp,
    OCP_LIMITED: ask_ocp_limited,
    OCP_AGAIN: ask_ocp_again,
    HAND: ask_by_hand,
    COLD: ask_cold,
    PLAIN: ask_plain,
}


def orders(rounds: int, names: Sequence[str] = tuple(CONTESTANTS)) -> list[list[str]]:
    """The order of each round: everybody comes first, second and last equally often."""
    names = list(names)
    return [names[at % len(names):] + names[:at % len(names)] for at in range(rounds)]


def measure(setting: Setting, rounds: int) -> dict[str, Result]:
    """All rounds, after one that does not count: the first start of a claude reads its disk."""
    sizes = {name: _upstream_bytes(setting, name) for name in CONTESTANTS}
    firsts: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for number, order in enumerate(orders(rounds), 1):
        for name in order:
            firsts[name].append(CONTESTANTS[name](setting).first_s)
        shown = ", ".join(f"{name} {common.shown_ms(firsts[name][-1])}" for name in CONTESTANTS)
        common.progress(f"round {number} of {rounds}: {shown} ms")
    return {name: Result(firsts[name], sizes[name]) for name in CONTESTANTS}


def _upstream_bytes(setting: Setting, name: str) -> int:
    """What the timed question of this contestant sends to the API."""
    before = len(setting.stub.sizes())
    CONTESTANTS[name](setting)
    asked = 2 if name == OCP_AGAIN else 1
    sizes = setting.stub.sizes()[before:]
    return sum(sizes[asked - 1:])


def table(results: Mapping[str, Result], delay_ms: float, machine: str) -> str:
    """The results as Markdown: the table, the targets, and the machine."""
    rows = [
        [
            NAMES[name],
            common.shown_ms(common.median(result.firsts_s)),
            common.shown_ms(common.percentile(result.firsts_s, 0.9)),
            common.shown_ms(min(result.firsts_s)),
            f"{result.upstream_bytes:,}",
        ]
        for name, result in results.items()
    ]
    head = ["first token", "median ms", "p90 ms", "best ms", "bytes upstream"]
    rounds = len(results[OCP].firsts_s)
    about = f"{rounds} rounds, {common.shown_delay(delay_ms)}; {machine}"
    return "\n".join([common.markdown_table(head, rows), "", *targets(results), "", about])


def targets(results: Mapping[str, Result]) -> list[str]:
    """One line for each thing to reach."""
    middle = {name: common.median(result.firsts_s) for name, result in results.items()}
    to_hand = middle[OCP] / middle[HAND]
    to_cold = middle[COLD] / middle[OCP]
    sent = results[OCP].upstream_bytes
    return [
        common.verdict(
            "OCP / warm claude by hand", to_hand, f"at most {MOST_OF_HAND}",
            to_hand <= MOST_OF_HAND),
        common.verdict(
            "cold `claude -p` with OCP's arguments / OCP", to_cold, f"at least {LEAST_OF_COLD}",
            to_cold >= LEAST_OF_COLD),
        common.comparison(
            "cold `claude -p` with its own defaults / OCP", middle[PLAIN] / middle[OCP]),
        common.comparison(
            "cold `claude -p` with OCP's arguments / OCP after another question",
            middle[COLD] / middle[OCP_AGAIN]),
        common.verdict(
            "KB upstream through OCP", sent / 1000, f"at most {MOST_UPSTREAM_BYTES / 1000}",
            sent <= MOST_UPSTREAM_BYTES),
    ]


def _ocp_with(
    parked: str, folder: Path, claude: Path, model: str, environ: Mapping[str, str]
) -> common.Ocp:
    """A server that keeps so many processes after their answers."""
    place = folder / f"parked-{parked}"
    place.mkdir()
    return common.Ocp(place, claude, model, environ, {"OCP_PARKED_PROCESSES": parked})


# -- by effort ---------------------------------------------------------------------------------

def ask_with_effort(ocp: common.Ocp, effort: str) -> common.Timing:
    """A new connection, one streamed answer."""
    options = {} if effort == DEFAULT else {"reasoning_effort": effort}
    ocp.wait_until_ready()
    with contextlib.closing(common.Client(ocp.port)) as client:
        return client.ask(ocp.model_id, common.QUESTION, **options)


def measure_efforts(
    ocp: common.Ocp, efforts: Sequence[str], rounds: int
) -> dict[str, list[common.Timing]]:
    """All rounds, after one answer that does not count."""
    ask_with_effort(ocp, efforts[0])
    timings: dict[str, list[common.Timing]] = {effort: [] for effort in efforts}
    for number, order in enumerate(orders(rounds, efforts), 1):
        for effort in order:
            timings[effort].append(ask_with_effort(ocp, effort))
        shown = ", ".join(
            f"{effort} {common.shown_ms(timings[effort][-1].first_s)}" for effort in efforts)
        common.progress(f"round {number} of {rounds}: {shown} ms")
    return timings


def effort_table(
    timings: Mapping[str, Sequence[common.Timing]], delay_ms: float, think_ms: float, machine: str
) -> str:
    """The results as Markdown: the table, what was made up, and the machine."""
    rows = [_effort_row(effort, found, delay_ms, think_ms) for effort, found in timings.items()]
    head = ["effort", "first thinking, median ms", "first text, median ms", "p90 ms", "best ms",
            "of it the API", "added by claude and OCP"]
    rounds = len(next(iter(timings.values())))
    about = (f"{rounds} rounds, {common.shown_delay(delay_ms)}, its {think_ms:g} ms of thinking "
             f"made up; {machine}")
    return "\n".join([common.markdown_table(head, rows), "", about])


def _effort_row(
    effort: str, timings: Sequence[common.Timing], delay_ms: float, think_ms: float
) -> list[str]:
    thoughts = [each.thought_s for each in timings if each.thought_s is not None]
    texts = [each.first_s for each in timings]
    api_ms = delay_ms + (think_ms if thoughts else 0)
    middle_s = common.median(texts)
    return [
        effort,
        common.shown_ms(common.median(thoughts)) if thoughts else "none",
        common.shown_ms(middle_s),
        common.shown_ms(common.percentile(texts, 0.9)),
        common.shown_ms(min(texts)),
        f"{api_ms:,g}",
        common.shown_ms(middle_s - api_ms / 1000),
    ]


def run_efforts(options: argparse.Namespace) -> str:
    """Everything from the start of the servers to their end; the Markdown."""
    claude = common.find_claude(options.claude)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ocp-bench-")))
        stub = stack.enter_context(common.Stub(
            folder, delay_ms=options.delay_ms, think_ms=options.think_ms))
        environ = common.clean_environment(folder, stub.url)
        ocp = stack.enter_context(_ocp_with("0", folder, claude, options.model, environ))
        timings = measure_efforts(ocp, options.efforts, max(1, options.rounds))
    return effort_table(
        timings, options.delay_ms, options.think_ms, common.machine(claude))


def read_efforts(text: str) -> list[str]:
    """The efforts in a value of --efforts. Raises ArgumentTypeError."""
    efforts = [each.strip() for each in text.split(",")]
    for effort in efforts:
        if effort not in EFFORTS:
            raise argparse.ArgumentTypeError(
                f"there is no effort {effort!r}: take some of {','.join(EFFORTS)}")
    return list(dict.fromkeys(efforts))


# -- the program -------------------------------------------------------------------------------

def run(options: argparse.Namespace) -> str:
    """Everything from the start of the servers to their end; the Markdown."""
    if options.efforts:
        return run_efforts(options)
    claude, model = common.find_claude(options.claude), options.model
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ocp-bench-")))
        stub = stack.enter_context(common.Stub(folder, delay_ms=options.delay_ms, log=True))
        environ = common.clean_environment(folder, stub.url)
        spawn = common.record_spawn(folder, claude, model, environ)
        ocp, keeping = (
            stack.enter_context(_ocp_with(parked, folder, claude, model, environ))
            for parked in ("0", "1"))
        plain = common.plain_spawn(spawn, ocp.model_id, environ)
        results = measure(Setting(ocp, keeping, stub, spawn, plain), max(1, options.rounds))
    return table(results, options.delay_ms, common.machine(claude))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    common.add_arguments(options)
    options.add_argument("--rounds", type=int, default=15, help="default: 15")
    options.add_argument(
        "--efforts", type=read_efforts, metavar="LIST",
        help="compare these efforts through OCP instead, such as low,medium,default")
    options.add_argument(
        "--think-ms", type=float, default=1000.0, metavar="MS",
        help="with --efforts: how long the API thinks above effort low; default: 1000")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 when it could not be measured."""
    options = parser().parse_args(arguments)
    return common.report("first_token", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
