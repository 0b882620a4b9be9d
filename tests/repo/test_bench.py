"""The benchmarks' arithmetic and tables on made-up numbers, and their command lines.

Nothing is measured here: speed is never asserted in a test."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest

from api_rules import as_blocks
from project import REPO

BENCH = REPO / "bench"
PROGRAMS = ("first_token", "throughput")
EVERY_PROGRAM = sorted(path.stem for path in BENCH.glob("*.py") if path.stem != "common")


def bench(name: str) -> ModuleType:
    return importlib.import_module(name)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def first_token_results(ocp_ms: float) -> dict[str, object]:
    first_token = bench("first_token")
    middles_ms = {
        "ocp": ocp_ms, "ocp_max_tokens": 60, "ocp_again": 20, "hand": 40, "cold": 900,
        "plain": 1500}
    return {
        name: first_token.Result([ms / 1000 for ms in (1.0, middle_ms, 5000.0)], 1048)
        for name, middle_ms in middles_ms.items()
    }


def load(timings_ms: Sequence[float], **fields: object) -> object:
    throughput = bench("throughput")
    timing = bench("common").Timing
    timings = [timing(ms / 2000, ms / 1000) for ms in timings_ms]
    given = {"elapsed_s": 2.0, "failures": {}, "spawned": len(timings), **fields}
    return throughput.Load(timings, **given)


def memory_run(*sizes_mb: float) -> object:
    throughput = bench("throughput")
    memory = bench("common").Memory
    points = [
        throughput.MemoryPoint(answers, memory(int(size * 1e6), int(size * 5e5)))
        for answers, size in zip((0, 100, 1000), sizes_mb)
    ]
    return throughput.MemoryRun("fake", points)


# -- first_token -------------------------------------------------------------------------------

def test_first_token_table_has_a_line_for_each_contestant() -> None:
    text = bench("first_token").table(first_token_results(50.0), 0.0, "a machine")
    lines = text.splitlines()
    assert cells(lines[2]) == ["OCP, spare ready", "50.0", "4,010", "1.0", "1,048"]
    middles = [cells(line)[1] for line in lines[2:8]]
    assert middles == ["50.0", "60.0", "20.0", "40.0", "900", "1,500"]
    assert lines[-1] == "3 rounds, API without delay; a machine"


def test_first_token_says_which_targets_are_reached() -> None:
    found = bench("first_token").targets(first_token_results(50.0))
    last_words = [line.rpartition(" ")[2] for line in found]
    assert last_words == ["reached", "reached", "comparison)", "comparison)", "reached"]
    assert [line.partition(": ")[2][:5] for line in found] == [
        "1.25 ", "18.00", "30.00", "45.00", "1.05 "]
    found = bench("first_token").targets(first_token_results(200.0))
    last_words = [line.rpartition(" ")[2] for line in found]
    assert last_words == ["MISSED", "MISSED", "comparison)", "comparison)", "reached"]


def test_every_contestant_comes_first_in_turn() -> None:
    first_token = bench("first_token")
    orders = first_token.orders(8)
    assert [order[0] for order in orders[:6]] == list(first_token.CONTESTANTS)
    assert all(sorted(order) == sorted(first_token.CONTESTANTS) for order in orders)


def effort_timings(first_ms: float, thought_ms: float | None = None) -> list[object]:
    timing = bench("common").Timing
    thought_s = None if thought_ms is None else thought_ms / 1000
    return [timing(each / 1000, 2.0, thought_s) for each in (first_ms - 5, first_ms, 3000.0)]


def test_first_token_sets_the_efforts_side_by_side() -> None:
    timings = {"low": effort_timings(80), "default": effort_timings(1090, 260)}
    text = bench("first_token").effort_table(timings, 10.0, 1000.0, "a machine")
    low, default = text.splitlines()[2:4]

    assert cells(low) == ["low", "none", "80.0", "2,416", "75.0", "10", "70.0"]
    assert cells(default) == ["default", "260", "1,090", "2,618", "1,085", "1,010", "80.0"]
    assert text.splitlines()[-1] == (
        "3 rounds, API delayed by 10 ms, its 1000 ms of thinking made up; a machine")


def test_first_token_knows_the_efforts() -> None:
    first_token = bench("first_token")

    assert first_token.parser().parse_args(["--efforts", "low, default,low"]).efforts == [
        "low", "default"]
    with pytest.raises(SystemExit):
        first_token.parser().parse_args(["--efforts", "low,much"])


def test_readme_has_a_place_for_the_table_by_effort() -> None:
    assert "<!-- table: first_token by effort -->" in (BENCH / "README.md").read_text()


def test_every_effort_comes_first_in_turn() -> None:
    assert bench("first_token").orders(2, ["low", "default"]) == [
        ["low", "default"], ["default", "low"]]


# -- throughput --------------------------------------------------------------------------------

def test_throughput_table_sets_the_two_side_by_side() -> None:
    throughput = bench("throughput")
    rows = [throughput.Row(8, load([100, 200, 300, 400]), load([1000, 1200], spawned=2))]
    lines = throughput.load_table(rows).splitlines()
    assert cells(lines[2]) == [
        "8", "2.00", "250", "385", "4 for 4", "1.00", "1,100", "1,190", "2.00"]
    assert throughput.failure_lines(rows) == []


def test_throughput_bears_a_contestant_without_any_answer() -> None:
    throughput = bench("throughput")
    rows = [throughput.Row(1, load([]), load([], failures={"status 503": 3}))]
    assert cells(throughput.load_table(rows).splitlines()[2])[-1] == "-"
    assert throughput.failure_lines(rows) == ["- cold with 1 clients FAILED 3 times: status 503"]


def test_throughput_says_whether_the_memory_grows() -> None:
    throughput = bench("throughput")
    steady = throughput.memory_targets(memory_run(30, 35, 36))
    assert [line.rpartition(" ")[2] for line in steady] == ["reached", "reached"]
    growing = throughput.memory_targets(memory_run(30, 35, 61))
    assert [line.rpartition(" ")[2] for line in growing] == ["MISSED", "MISSED"]
    table = throughput.table([], memory_run(30, 35, 36), 15.0, 800.0, "a machine")
    assert "| at the start " in table and "| after 1,000 answers " in table
    assert table.endswith("15 s for each OCP figure, 9 s for each cold one, "
                          "API delayed by 800 ms; a machine")


def test_throughput_bears_a_system_that_tells_no_memory() -> None:
    throughput = bench("throughput")
    run = throughput.MemoryRun("fake", [throughput.MemoryPoint(0, None)])
    assert cells(throughput.memory_table(run).splitlines()[2]) == ["at the start", "-", "-"]
    assert "does not tell" in throughput.memory_targets(run)[0]


@pytest.mark.parametrize("answers, points", [
    (1, [0, 1]), (100, [0, 100]), (150, [0, 100, 150]), (1000, [0, 100, 1000]),
    (5000, [0, 100, 1000, 5000]),
])
def test_memory_is_looked_at_up_to_the_last_answer(answers: int, points: list[int]) -> None:
    assert bench("throughput").memory_points(answers) == points


# -- cost ------------------------------------------------------------------------------------------

def test_cost_table_sets_the_versions_side_by_side() -> None:
    module = bench("cost")
    before = module.Cost({"parse": 0.002, "history": 0.005}, {"burst": 5e-5})
    now = module.Cost({"parse": 0.002, "history": 0.001}, {"burst": 4e-5})

    assert module.rows_of([before, now]) == [
        ["parse, ms", "2.00", "2.00", "1.00"], ["history, ms", "5.00", "1.00", "0.20"],
        ["a continued request, ms", "7.00", "3.00", "0.43"],
        ["the same without parse, ms", "5.00", "1.00", "0.20"],
        ["a piece in a burst, us", "50.00", "40.00", "0.80"]]
    assert module.rows_of([now])[0] == ["parse, ms", "2.00"]


def test_the_best_round_of_each_step_counts() -> None:
    rounds = [{"a": 1.0, "b": 4.0}, {"a": 2.0, "b": 3.0}]

    assert bench("cost").best_of(rounds) == {"a": 1.0, "b": 3.0}


def test_the_request_whose_cost_is_measured_is_as_large_as_the_table_says() -> None:
    module = bench("cost")
    body = json.loads(module.request_body())

    assert len(body["messages"]) == module.MESSAGES and len(body["tools"]) == module.TOOLS
    assert 600_000 < len(module.request_body()) < 660_000


def test_every_step_of_a_request_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    module = bench("cost")
    monkeypatch.setattr(module, "REPEATS", 1)
    found = module.measure_request(REPO)

    assert set(found) == {"parse", "truncate", "estimate", "history", "usage row"}
    assert min(found.values()) > 0


# -- prompt_cache ------------------------------------------------------------------------------

class DirectSide:
    """A contestant that asks the API itself, and marks the last block of each request."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.restarts = 0

    def __enter__(self) -> DirectSide:
        return self

    def __exit__(self, *_: object) -> None:
        """There is nothing to end."""

    def _post(self, path: str, body: Any) -> Any:
        system, messages = body.get("system"), [dict(each) for each in body["messages"]]
        is_chat = system is None
        if is_chat:
            system = messages.pop(0)["content"]
        *blocks, last = as_blocks(messages[-1]["content"])
        mark = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
        messages[-1]["content"] = [*blocks, {**last, **mark}]
        asked = {"model": "claude-sonnet-5", "max_tokens": 9, **body, "system": system,
                 "messages": messages}
        request = urllib.request.Request(self._url + "/v1/messages", json.dumps(asked).encode())
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.loads(response.read())
        if not is_chat:
            return answer
        return {"choices": [{"message": {"content": answer["content"][-1]["text"]}}]}

    def talk(self, name: str, *, with_tools: bool) -> Any:
        module = bench("prompt_cache")
        return (module.AgentTalk if with_tools else module.ChatTalk)(self._post)

    def restart(self) -> None:
        self.restarts += 1

    def paths(self) -> dict[str, int]:
        return {"rebuilt": self.restarts}


@pytest.mark.parametrize("name, requests, restarts", [
    ("agent", 61, 0), ("edits", 15, 0), ("keys", 30, 0), ("restart", 12, 2),
    ("restart_thinking", 12, 2), ("loop", 29, 1), ("loop_thinking", 29, 1)])
def test_each_script_of_prompt_cache_goes_to_its_end(
    name: str, requests: int, restarts: int
) -> None:
    module = bench("prompt_cache")
    day = module.play(module.SCRIPTS[name], DirectSide)

    assert (len(day.seen), day.paths["rebuilt"]) == (requests, restarts)
    assert day.usage.prompt_tokens > day.usage.cache_read > 0
    # Each place is asked once, and each but the first requests reads what was there before.
    assert len(module.fresh_by_place(day)) == requests
    assert max(each.usage.fresh_tokens for each in day.seen[5:]) < 1_500


def test_prompt_cache_reads_from_a_request_where_its_conversation_stands() -> None:
    module = bench("prompt_cache")
    results = {"role": "user", "content": [{"type": "tool_result"}, {"type": "tool_result"}]}
    asked = [{"role": "user", "content": module.question("agent", number, 7)} for number in (1, 2)]

    place = module.place_of({"messages": [*asked, {"role": "assistant", "content": []}, results]})

    assert place == ("agent 2", 7, 1) and place.name == "agent 2.1"
    assert module.place_of({"messages": [{"role": "user", "content": "Hi"}]}).name == ".0"


def played(texts: Sequence[str]) -> Any:
    """A day of two requests, the second with one more block than the first."""
    day = bench("prompt_cache").Day(thinks=False)
    day.cache = bench("api_cache").PromptCache(shortest_tokens=0)
    mark = {"cache_control": {"type": "ephemeral"}}
    first, then = ({"type": "text", "text": text} for text in texts)
    for blocks in ([{**first, **mark}], [first, {**then, **mark}]):
        day.answer({"model": "m", "messages": [{"role": "user", "content": blocks}]})
    return day


def test_prompt_cache_table_compares_with_the_claude_by_hand() -> None:
    module = bench("prompt_cache")
    ocp, by_hand = played(["[chat 1]", "[chat 2]"]), played(["[chat 1]", "[chat 2]"])
    ocp.paths = {"fresh": 1, "rebuilt": 2}
    tokens = by_hand.usage

    lines = module.table({"edits": {"OCP": ocp, "by hand": by_hand}}, "a machine").splitlines()

    share = f"{tokens.cache_read / tokens.prompt_tokens:.1%}"
    counts = ["2", str(tokens.prompt_tokens), share, str(tokens.fresh_tokens)]
    assert cells(lines[2]) == ["chat, three edits", "OCP", *counts, "1.000", "1", "0", "0", "2"]
    assert cells(lines[3]) == ["", "by hand", *counts, "", "", "", "", ""]
    assert lines[5].endswith("1.00 (to reach: at most 1.05): reached")
    by_hand.answer({"model": "m", "messages": []})
    worse = {"OCP": played(["[chat 1] and more of it", "[chat 2]"]), "by hand": by_hand}
    assert module.table({"edits": worse}, "a machine").splitlines()[5].endswith("MISSED")


def test_prompt_cache_explains_where_a_request_parts_from_the_earlier_ones() -> None:
    module = bench("prompt_cache")
    day, ideal = played(["[chat 1]", "[chat 2]"]), played(["[chat 1]", "[chat 2]"])
    assert module.explanation(day, ideal) == []

    day.answer({"model": "m", "messages": [
        {"role": "user", "content": "[chat 1]"}, {"role": "user", "content": "[other 1]"}]})

    found = module.explanation(day, ideal)
    assert found[0].startswith("other 1.0: read 0 of ")
    assert "messages.0.content.1 was " in found[2] and "[chat 2]" in found[2]
    assert "messages.1.content.0 is  " in found[3] and "[other 1]" in found[3]


# -- what they share ---------------------------------------------------------------------------

def test_percentiles_lie_between_their_neighbours() -> None:
    common = bench("common")
    assert common.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert common.percentile([0.0, 10.0], 0.9) == 9.0
    assert common.percentile([7.0], 0.95) == 7.0


def test_cold_claude_gets_its_question_before_any_option_that_takes_several_words() -> None:
    common = bench("common")
    arguments = ["-p", "--input-format", "stream-json", "--tools", ""]
    spawn = common.Spawn(REPO / "claude", arguments, {}, REPO)
    command = common.cold_command(spawn, "Why?")
    assert command[1:] == ["-p", "Why?", "--tools", ""]


@pytest.mark.parametrize("error", ["BenchError", "Refused"])
def test_a_measurement_that_cannot_go_on_is_one_line_and_a_failure(
    error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = bench("common")
    monkeypatch.setattr(common, "clean_up_at_the_end", lambda: None)

    def fail() -> str:
        raise getattr(common, error)("no claude")

    assert (common.report("cost", fail), common.report("cost", lambda: "| 1 |")) == (1, 0)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("| 1 |\n", "cost: no claude\n")


def test_only_a_piece_of_text_is_a_first_word() -> None:
    common = bench("common")
    assert common.is_first_word(b'{"event":{"delta":{"type":"text_delta","text":"Hi"}}}')
    assert not common.is_first_word(b'{"event":{"delta":{"type":"text_delta","text":""}}}')
    assert not common.is_first_word(b'{"event":{"delta":{"type":"thinking_delta"}}}')


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_names_the_options(program: str) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / f"{program}.py"), "--help"], check=True,
        stdout=subprocess.PIPE, timeout=120)
    assert b"--claude" in done.stdout and b"--delay-ms" in done.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_claude_that_is_not_there_is_said_so(program: str) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / f"{program}.py"), "--claude", "/nowhere/claude"],
        check=False, capture_output=True, timeout=120)
    assert done.returncode == 1
    assert b"--claude PATH" in done.stderr
    assert done.stdout == b""


@pytest.mark.parametrize("program", EVERY_PROGRAM)
def test_readme_has_a_place_for_the_table(program: str) -> None:
    assert f"<!-- table: {program} -->" in (BENCH / "README.md").read_text()


# -- attacks -------------------------------------------------------------------------------------

def attack_result(worst_s: float, statuses: dict[int, int], memory_mb: float) -> object:
    module = bench("attacks")
    wait = module.attackers.Wait()
    wait.worst_s, wait.statuses = worst_s, statuses
    return module.Result(wait, int(memory_mb * 1e6))


def test_attacks_table_has_the_figures_of_each_version() -> None:
    before = attack_result(30.5, {200: 3, 0: 1, 503: 2}, 1891.94)
    now = attack_result(0.126, {200: 40}, 142.3)

    assert bench("attacks").row_of("many_values", [before, now]) == [
        "many values", "30.50", "1891.9", "3", "0.13", "142.3", "0"]


def test_attacks_that_go_on_together_exist() -> None:
    module = bench("attacks")

    assert set(module.TOGETHER) <= set(module.attackers.ATTACKS)


# -- channels ------------------------------------------------------------------------------------

def test_channels_table_tells_how_late_and_whether_that_is_good_enough() -> None:
    module = bench("channels")
    load = module.Load(300, 10.0, 1.5, 28_000_000, 29_500_000)
    delays = [[0.01, 0.03, 0.02] for _ in module.LINES]
    lines = module.table(delays, load, "a machine").splitlines()

    assert cells(lines[2])[1:] == ["20.0", "28.0", "30.0"]
    assert "| messages a second                           | 30.0 |" in lines
    assert "| processor time of the gateway a message, ms |  5.0 |" in lines
    assert "p90 ms: 28.00 (to reach: at most 100): reached" in lines[-3]
    delays[3] = [0.2]
    assert module.table(delays, load, "a machine").count("MISSED") == 1


# -- callers -------------------------------------------------------------------------------------

def served(*rates: float) -> dict[str, list[object]]:
    """What each version did in each case."""
    module = bench("callers")
    return {case.label: [module.Served(rate, 0.05, 0.875, 3) for rate in rates]
            for case in module.CASES}


def test_callers_table_sets_the_versions_side_by_side() -> None:
    module = bench("callers")
    lines = module.case_table(served(4.0, 20.0)).splitlines()

    assert len(lines) == 2 + len(module.CASES)
    assert cells(lines[0])[1:] == [
        "before: answers/s", "processor ms", "kept", "started",
        "now: answers/s", "processor ms", "kept", "started"]
    assert cells(lines[3])[1:] == ["4.0", "50.0", "88%", "3", "20.0", "50.0", "88%", "3"]
    assert cells(module.case_table(served(4.0)).splitlines()[0])[1] == "now: answers/s"


def test_callers_says_whether_several_keys_get_what_one_gets() -> None:
    module = bench("callers")
    results = served(10.0)
    for case, rate in zip(module.CASES, (10.0, 8.0, 7.9)):
        results[case.label] = [module.Served(rate, 0.0, 1.0, 0)]

    assert [line.rpartition(" ")[2] for line in module.targets(results)] == ["reached", "MISSED"]


def test_callers_table_has_what_a_cancelled_turn_costs() -> None:
    module = bench("callers")
    lines = module.left_table([module.Left(0.9, 0.8, 4), module.Left(0.05, 0.1, 0)]).splitlines()

    assert [cells(line)[1:] for line in lines[2:]] == [
        ["900", "50.0"], ["800", "100"], ["4", "0"]]


def test_callers_counts_the_processor_time_of_ended_processes_too() -> None:
    burn = "for _ in range(4_000_000): pass"
    before_s = bench("callers").processor_s(os.getpid())
    subprocess.run([sys.executable, "-I", "-S", "-c", burn], check=True)

    assert bench("callers").processor_s(os.getpid()) - before_s >= 0.03
