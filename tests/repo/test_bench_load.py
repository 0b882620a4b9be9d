"""The load benchmark: its arithmetic and tables on made-up numbers, what it takes for a wrong
answer, and one short run in which nothing may be lost, doubled or unfair.

Speed is never asserted in a test."""

from __future__ import annotations

import argparse
import importlib
import json
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from project import REPO

Json = Any

BENCH = REPO / "bench"
WORD = "0123456789abcdef"


@pytest.fixture(scope="module")
def load() -> ModuleType:
    return importlib.import_module("load")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def holdings(load: ModuleType, **fields: Json) -> Json:
    memory = importlib.import_module("common").Memory(50_000_000, 40_000_000)
    given = {"memory": memory, "threads": 2, "descriptors": 12, "children": 2, "kept": 2,
             "zombies": 0, **fields}
    return load.Holdings(**given)


def run_of(load: ModuleType, counted: Mapping[str, int], **fields: Json) -> Json:
    """A run in which each key got so many answers, all of which are booked."""
    loads = [load.KeyLoad(name, clients, counted[name], counted[name], counted[name], 3,
                          [0.1, 0.2, 0.3]) for name, clients in load.DEMAND]
    given = {"seconds": 120.0, "keys": loads, "failures": {}, "refused": 3 * len(loads),
             "before": holdings(load), "after": holdings(load, children=6, kept=6), **fields}
    return load.LoadRun(**given)


def equal(load: ModuleType, count: int = 100) -> dict[str, int]:
    return {name: count for name, _ in load.DEMAND}


def last_words(lines: Sequence[str]) -> list[str]:
    return [line.rpartition(" ")[2] for line in lines]


# -- figures and tables --------------------------------------------------------------------------

def test_two_hundred_clients_belong_to_keys_of_different_demand(load: ModuleType) -> None:
    assert sum(clients for _, clients in load.DEMAND) == 200
    assert len({clients for _, clients in load.DEMAND}) == len(load.DEMAND)
    assert load.GREEDY == ("workshop", "office", "laptop", "phone")


def test_a_share_is_measured_against_those_who_always_want_more(load: ModuleType) -> None:
    run = run_of(load, {"workshop": 120, "office": 100, "laptop": 100, "phone": 80, "visitor": 7})

    assert run.shares == {"workshop": 1.2, "office": 1.0, "laptop": 1.0, "phone": 0.8}
    assert cells(load.load_table(run).splitlines()[-1])[-1] == "-"


def test_a_run_without_fault_reaches_everything(load: ModuleType) -> None:
    run = run_of(load, equal(load))

    assert last_words(load.load_targets(run)) == ["reached"] * 4
    assert last_words(load.holdings_targets(run)) == ["reached"] * 2


@pytest.mark.parametrize("fields, missed", [
    ({"failures": {"lost: ConnectionResetError": 1}}, 0),
    ({"refused": 16}, 2),
])
def test_a_fault_of_a_run_is_told(load: ModuleType, fields: Json, missed: int) -> None:
    found = load.load_targets(run_of(load, equal(load), **fields))

    assert [at for at, word in enumerate(last_words(found)) if word == "MISSED"] == [missed]


def test_an_answer_that_is_not_in_the_books_is_told(load: ModuleType) -> None:
    run = run_of(load, equal(load))
    keys = [run.keys[0]._replace(booked=99), *run.keys[1:]]

    found = load.load_targets(run._replace(keys=keys))

    assert last_words(found) == ["reached", "MISSED", "reached", "reached"]


def test_an_unfair_run_is_told(load: ModuleType) -> None:
    run = run_of(load, {**equal(load), "phone": 80})

    assert last_words(load.load_targets(run))[-1] == "MISSED"


@pytest.mark.parametrize("fields, words", [
    ({"children": 7}, ["MISSED", "reached"]),
    ({"zombies": 1}, ["MISSED", "reached"]),
    ({"threads": 3}, ["reached", "MISSED"]),
])
def test_what_a_server_keeps_for_itself_is_told(
    load: ModuleType, fields: Json, words: list[str]
) -> None:
    after = holdings(load, **{"children": 6, "kept": 6, **fields})

    assert last_words(load.holdings_targets(run_of(load, equal(load), after=after))) == words


def test_a_system_that_tells_nothing_is_borne(load: ModuleType) -> None:
    dumb = load.Holdings(None, None, None, None, 6, None)
    run = run_of(load, equal(load), before=dumb, after=dumb)

    assert cells(load.holdings_table(run).splitlines()[-1]) == ["after", *"-----", "6", "-"]
    assert load.holdings_targets(run)[0].endswith("does not tell")


def test_the_cache_is_compared_in_the_middle_of_the_rounds(load: ModuleType) -> None:
    rates = {"ocp": [50.0, 90.0, 10.0], "bare": [100.0, 100.0, 100.0],
             "ready": [200.0, 200.0, 200.0]}
    hits = load.Hits(rates, 718)

    assert (hits.ratio("bare"), hits.ratio("ready")) == (0.5, 0.25)
    assert cells(load.hits_table(hits, 4).splitlines()[2])[1:] == ["50", "90", "10"]
    assert last_words(load.hits_targets(hits)) == ["reached", "comparison)"]


def test_the_last_line_says_how_it_was_measured(load: ModuleType) -> None:
    hits = load.Hits(dict.fromkeys(("ocp", "bare", "ready"), [1.0]), 718)
    options = argparse.Namespace(hit_seconds=4.0, hit_rounds=5, hit_clients=4)

    text = load.table(run_of(load, equal(load)), hits, options, "a machine")

    assert text.splitlines()[-1] == (
        "200 clients at 8 slots for 120 s; 5 rounds of 4 s for each cache figure; a machine")


# -- what is wrong with an answer ----------------------------------------------------------------

def whole(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def stream(*pieces: str, ends: int = 1) -> bytes:
    chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    events = [json.dumps(chunk) for chunk in chunks] + ["[DONE]"] * ends
    return "".join(f"data: {event}\n\n" for event in events).encode()


def test_ones_own_answer_is_right_whole_and_streamed(load: ModuleType) -> None:
    assert load.wrong_answer(whole(f"You said: {WORD}"), WORD, stream=False) == ""
    assert load.wrong_answer(stream("You said: ", WORD), WORD, stream=True) == ""


@pytest.mark.parametrize("content, streamed", [
    (whole("You said: fedcba9876543210"), False),
    (whole(f"You said: {WORD}You said: {WORD}"), False),
    (b"", False),
    (b'{"choices": []}', False),
    (stream("You said: ", WORD, WORD), True),
    (stream("You said: "), True),
    (stream("You said: ", WORD, ends=0), True),
    (stream("You said: ", WORD, ends=2), True),
    (b"", True),
])
def test_any_other_answer_is_wrong(load: ModuleType, content: bytes, streamed: bool) -> None:
    assert load.wrong_answer(content, WORD, stream=streamed)


@pytest.mark.parametrize("headers, honest", [
    ({"Retry-After": "1"}, True), ({"Retry-After": "60"}, True), ({}, False),
    ({"Retry-After": "0"}, False), ({"Retry-After": "61"}, False), ({"Retry-After": "x"}, False),
    ({"Retry-After": "1", "x-should-retry": "false"}, False),
])
def test_an_honest_refusal_says_when_to_come_back(
    load: ModuleType, headers: dict[str, str], honest: bool
) -> None:
    assert (load.dishonesty(headers) == "") is honest


@pytest.mark.parametrize("entry, count", [
    (None, 0), ({"requests": 5, "successes": 5}, 5), ({"requests": 6, "successes": 5}, -1),
])
def test_books_with_anything_but_answers_do_not_agree(
    load: ModuleType, entry: Json, count: int
) -> None:
    assert load.booked_of(entry) == count


# -- a run ---------------------------------------------------------------------------------------

def test_the_bare_server_sends_the_recorded_bytes(load: ModuleType, free_home: Path) -> None:
    body = b'{"a": 1}'
    answer = (b"HTTP/1.1 200 OK\r\nServer: ocp/1\r\nDate: Sat, 21 Nov 2026 13:24:41 GMT\r\n"
              b"X-A: b\r\nContent-Length: 8\r\n\r\n" + body)
    request = load.request_bytes("key", "model")

    for kind in ("bare", "ready"):
        with load.bare_server(free_home, kind, answer) as port:
            received = received_from(port, request, len(answer))

        same = [line for line in received.split(b"\r\n") if not line.startswith(b"Date")]
        assert same == [line for line in answer.split(b"\r\n") if not line.startswith(b"Date")]
        assert len(received) == len(answer)


def received_from(port: int, request: bytes, count: int) -> bytes:
    """What comes back for these bytes: so many, and what comes within a moment of them."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(request)
        while len(received) < count or select.select([connection], [], [], 0.1)[0]:
            piece = connection.recv(1 << 16)
            assert piece, received
            received += piece
    return received


@pytest.mark.exhaustive
def test_a_short_run_loses_nothing_and_is_fair(load: ModuleType) -> None:
    # In a line that long those with few clients always stand too, however long it takes others
    # to come back; and enough answers for shares are there only after a while on a busy machine.
    done = subprocess.run(
        [sys.executable, str(BENCH / "load.py"), "--seconds", "8",
         "--answers", "200", "--queue", "80", "--hit-seconds", "0.3", "--hit-rounds", "1",
         "--hit-clients", "2"],
        check=False, capture_output=True, text=True, timeout=900)

    assert done.returncode == 0, done.stderr
    verdicts = [line for line in done.stdout.splitlines() if line.startswith("- ")]
    load_verdicts, speed = verdicts[:6], verdicts[6:]
    sure = [line for line in load_verdicts if "share" not in line]
    assert [line for line in sure if not line.endswith(": reached")] == []
    assert len(load_verdicts) == 6 and len(sure) == 5 and len(speed) == 2
    lines = done.stdout.splitlines()
    rows = {name: next(cells(line) for line in lines if line.startswith(f"| {name} "))
            for name in load.GREEDY}
    assert [name for name, row in rows.items() if not is_fair(load, row)] == []
    # Somebody was refused, and came back.
    assert int(rows["workshop"][4].replace(",", "")) > 0


def is_fair(load: ModuleType, row: Sequence[str]) -> bool:
    """Whether a key's share is an equal one, but for two answers where there are only a few."""
    off = abs(float(row[-1]) - 1)
    return bool(off <= load.MOST_UNFAIRNESS or off * int(row[2].replace(",", "")) <= 2)


def test_help_names_the_options() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "load.py"), "--help"], check=True, stdout=subprocess.PIPE,
        timeout=120)

    assert b"--seconds" in done.stdout and b"--hit-seconds" in done.stdout
