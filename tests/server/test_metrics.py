"""Numbers for machines: /metrics in Prometheus' text format, /ready, and the stats of /health.

The format is read by a parser that takes nothing but what the format's description allows.
"""
from __future__ import annotations

import json
import math
import os
import re
import signal
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chat import CHAT_PATH, NO_IDLE, ask, encoded, question
from dialects import CHAT, COMPLETIONS, MESSAGES, RESPONSES
from http_client import Reply
from keys import MULTI, as_admin, ask_as, new_key
from processes import is_gone
from project import load_script
from raw_http import RawConnection, post
from server import Server, asked_process, at_rest, health, running, running_server
from waiting import eventually

ocp = load_script("ocp_server.py")

Json = Any

SONNET = "claude-sonnet-5-5"


# ---------------------------------------------------------------------------
# The format
# ---------------------------------------------------------------------------

Labels = tuple[tuple[str, str], ...]


class Family(NamedTuple):
    """One metric: its head, and its samples, (name, labels, value) each."""
    name: str
    help: str
    kind: str
    samples: list[tuple[str, Labels, float]]


_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(?:,|$)')
_VALUE = r"[+-]?(?:Inf|[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)|NaN"
_SAMPLE = re.compile(rf"({_NAME})(?:\{{(.*)\}})? ({_VALUE})")
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count")}


def parsed(text: str) -> dict[str, Family]:
    """The metrics of a text by their names. Raises AssertionError for whatever is not allowed."""
    assert text.endswith("\n") and "\r" not in text
    families: dict[str, Family] = {}
    lines = text.split("\n")[:-1]
    for at, line in enumerate(lines):
        if line.startswith("# HELP "):
            name, _, words = line[len("# HELP "):].partition(" ")
            assert re.fullmatch(_NAME, name) and name not in families, line
            kind = re.fullmatch(rf"# TYPE {name} (counter|gauge|histogram)", lines[at + 1])
            assert kind and words, line
            families[name] = Family(name, words, kind[1], [])
        elif not line.startswith("# TYPE "):
            # Samples follow the head of their own metric.
            _take_sample(list(families.values())[-1], line)
    assert sum(line.startswith("# TYPE ") for line in lines) == len(families)
    for family in families.values():
        _check_family(family)
    return families


def _take_sample(family: Family, line: str) -> None:
    found = _SAMPLE.fullmatch(line)
    assert found, line
    name, inside, value = found[1], found[2] or "", found[3]
    assert name in [family.name + suffix for suffix in _SUFFIXES.get(family.kind, ("",))], line
    labels, at = [], 0
    while at < len(inside):
        pair = _LABEL.match(inside, at)
        assert pair, line
        labels.append((pair[1], re.sub(r"\\(.)", _unescaped, pair[2])))
        at = pair.end()
    assert len({label for label, _ in labels}) == len(labels), line
    family.samples.append((name, tuple(labels), float(value.replace("Inf", "inf"))))


def _unescaped(match: re.Match[str]) -> str:
    return "\n" if match[1] == "n" else match[1]


def _check_family(family: Family) -> None:
    keys = [(name, tuple(sorted(labels))) for name, labels, _ in family.samples]
    assert len(set(keys)) == len(keys), f"{family.name} has a sample twice"
    if family.kind == "counter":
        assert family.name.endswith("_total")
        # Counts, but for money.
        is_money = "usd" in family.name
        assert all(value >= 0 and (is_money or value == int(value))
                   for _, _, value in family.samples)
    if family.kind == "histogram":
        _check_histogram(family)


def _check_histogram(family: Family) -> None:
    series: dict[Labels, dict[str, float]] = {}
    for name, labels, value in family.samples:
        rest = tuple(pair for pair in labels if pair[0] != "le")
        field = dict(labels)["le"] if name.endswith("_bucket") else name[len(family.name):]
        series.setdefault(rest, {})[field] = value
    for labels, fields in series.items():
        total, count = fields.pop("_sum"), fields.pop("_count")
        bounds = [float(bound.replace("Inf", "inf")) for bound in fields]
        assert bounds == sorted(bounds) and bounds[-1] == math.inf, (family.name, labels)
        counts = list(fields.values())
        assert counts == sorted(counts) and counts[-1] == count, (family.name, labels)
        assert total >= 0 and (count or not total)


def scraped(server: Server) -> dict[str, Family]:
    """What /metrics says now."""
    return parsed(as_admin(server, "GET", "/metrics").text)


def value(families: Mapping[str, Family], name: str, **labels: str) -> float:
    """The sum of the samples that have these labels."""
    base = re.sub("_(bucket|sum|count)$", "", name)
    family = families.get(name) or families[base]
    wanted = set(labels.items())
    return sum(v for n, found, v in family.samples if n == name and wanted <= set(found))


def label_values(families: Mapping[str, Family], label: str) -> set[str]:
    """All values that a label has anywhere."""
    return {dict(labels)[label] for family in families.values()
            for _, labels, _ in family.samples if label in dict(labels)}


# -- without a server ---------------------------------------------------------


def test_every_metric_has_one_head_even_without_a_value() -> None:
    families = parsed(ocp.Metrics().text({}))

    assert list(families) == [metric.name for metric in ocp.METRICS]
    assert [family.kind for family in families.values()] == [m.kind for m in ocp.METRICS]


HOSTILE = 'a"} 1\nocp_requests_total{x="\\\u2028\U0001f642,b="c"}'


def test_labels_are_escaped() -> None:
    metrics = ocp.Metrics()

    metrics.add("ocp_requests_total", model=HOSTILE, outcome="\\n")

    ((_, labels, count),) = parsed(metrics.text({}))["ocp_requests_total"].samples
    assert (dict(labels), count) == ({"model": HOSTILE, "outcome": "\\n"}, 1)


def test_a_histogram_counts_each_value_in_every_bound_that_is_not_below_it() -> None:
    metrics = ocp.Metrics()
    bounds = next(m.bounds for m in ocp.METRICS if m.name == "ocp_request_seconds")

    for seconds in (0.0, bounds[0], bounds[0] + 0.001, bounds[-1] + 1):
        metrics.observe("ocp_request_seconds", seconds, dialect="chat")

    samples = parsed(metrics.text({}))["ocp_request_seconds"].samples
    buckets = {dict(labels)["le"]: count for name, labels, count in samples if "le" in dict(labels)}
    assert [buckets["0.1"], buckets["0.5"], buckets["600"], buckets["+Inf"]] == [2, 3, 3, 4]
    assert samples[-2][2] == pytest.approx(sum((0.2, 0.001, 601)))


@pytest.mark.parametrize("count", [9_999_999_999, 12_345_678_901, 2**53 - 1])
def test_large_counts_are_exact(count: int) -> None:
    metrics = ocp.Metrics()

    metrics.add("ocp_tokens_total", count, model="m", kind="cache_read")

    ((_, _, found),) = parsed(metrics.text({}))["ocp_tokens_total"].samples
    assert int(found) == count


def test_gauges_may_be_of_any_size() -> None:
    values = (0, 0.21, 1e-7, 1_795_267_453.5, 4e9, 1e17)

    text = ocp.Metrics().text({"ocp_plan_utilization": {
        (("window", str(number)),): number for number in values}})

    found = [number for _, _, number in parsed(text)["ocp_plan_utilization"].samples]
    assert found == pytest.approx(values, rel=1e-9)


@pytest.mark.parametrize("broken", [
    "a 1\n", "# HELP a b\na 1\n", "# HELP a b\n# TYPE a gauge\na 1", "# HELP a b\n# TYPE a gauge\n"
    'a{x="1} 1\n', "# HELP a b\n# TYPE a gauge\na 1\na 2\n", "# HELP a b\n# TYPE a gauge\nb 1\n",
    "# HELP a b\n# TYPE a gauge\na x\n", "# HELP a b\n# TYPE a counter\na 1\n",
    '# HELP a b\n# TYPE a histogram\na_bucket{le="1"} 2\na_bucket{le="+Inf"} 1\na_sum 1\n'
    "a_count 1\n",
    '# HELP a b\n# TYPE a histogram\na_bucket{le="+Inf"} 1\na_sum 1\na_count 2\n',
])
def test_the_parser_of_these_tests_is_strict(broken: str) -> None:
    with pytest.raises((AssertionError, IndexError)):
        parsed(broken)


# ---------------------------------------------------------------------------
# What is counted
# ---------------------------------------------------------------------------

@pytest.fixture
def own(tmp_path: Path) -> Iterator[Server]:
    """A server that starts a process for every answer, for one test alone."""
    with running_server(tmp_path / "own", env=NO_IDLE) as running_one:
        yield running_one


def steps_of_error(status: int, word: str) -> list[Json]:
    return [{"api_error": {"status": status, "word": word, "text": "It says no."}}]


def abandoned(server: Server, text: str) -> None:
    """A client that leaves in the middle of its answer."""
    server.write_scenario([[{"say": "Half "}, {"hang": True}]])
    count = len(server.queries())
    with RawConnection(server.port) as wire:
        wire.send(post(encoded(question(text, stream=True))))
        pid = asked_process(server, count + 1)
        wire.hear(b"Half")
    assert eventually(lambda: is_gone(pid) and at_rest(server))
    assert eventually(lambda: value(scraped(server), "ocp_requests_total", outcome="abandoned"))


def test_a_known_series_of_requests_gives_known_numbers(tmp_path: Path) -> None:
    env = {**NO_IDLE, "CLAUDE_CACHE_TTL": "3600000"}
    spent = {"input_tokens": 21, "output_tokens": 43, "cache_read_input_tokens": 65,
             "cache_creation_input_tokens": 87}

    with running_server(tmp_path, env=env) as server:
        server.write_scenario([[{"say": "Hello.", "usage": spent}]])
        for dialect in (CHAT, MESSAGES, RESPONSES, COMPLETIONS):
            # The first is made, the others are the same again.
            server.call("POST", dialect.path, dialect.body("Same"))
        ask(server, "Two", n=2, model="opus", ocp_session_id="s")
        server.write_scenario([steps_of_error(529, "overloaded")])
        ask(server, "Overloaded")
        server.call("POST", MESSAGES.path, MESSAGES.body("Overloaded"))
        server.write_scenario([[{"hang": True}]])
        server.call("PATCH", "/settings", {"timeout": 1000})
        ask(server, "Takes too long")
        server.call("PATCH", "/settings", {"timeout": None})
        abandoned(server, "Leaves")
        ask(server, model="gpt-9")
        found = scraped(server)
        stats = health(server)["stats"]

    def requests(**labels: str) -> float:
        return value(found, "ocp_requests_total", **labels)

    assert value(found, "ocp_requests_started_total") == requests() == 9
    assert {word: requests(outcome=word) for word in label_values(found, "outcome")} == {
        "ok": 5, "overloaded": 2, "timeout": 1, "abandoned": 1}
    assert {name: requests(dialect=name) for name in label_values(found, "dialect")} == {
        "chat": 5, "messages": 2, "responses": 1, "completions": 1}
    assert requests(model="claude-opus-5-5", outcome="ok", dialect="chat") == 1
    assert {kind: value(found, "ocp_tokens_total", kind=kind, model=SONNET)
            for kind in ("input", "cache_read", "cache_write")} == {
        # Of the two that were asked and said nothing, the prompts are estimated: 2 tokens each.
        "input": 21 + 10 + 2 + 2, "cache_read": 65 + 5, "cache_write": 87 + 3}
    assert value(found, "ocp_tokens_total", kind="output", model="claude-opus-5-5") == 86
    opus = 2 * (21 * 4 + 43 * 20 + 65 * 0.2 + 87 * 8) / 1e6
    assert value(found, "ocp_list_price_usd_total", model="claude-opus-5-5") == pytest.approx(opus)
    assert {path: value(found, "ocp_answers_total", path=path)
            for path in label_values(found, "path")} == {"fresh": 6, "cached": 3}
    assert {word: value(found, "ocp_cache_requests_total", result=word)
            for word in ("hit", "miss", "shared", "bypass")} == {
        "hit": 3, "miss": 5, "shared": 0, "bypass": 1}
    assert value(found, "ocp_request_seconds_count") == 9
    assert value(found, "ocp_request_seconds_count", dialect="chat") == 5
    assert value(found, "ocp_request_seconds_bucket", dialect="chat", le="0.5") <= 4
    assert value(found, "ocp_request_seconds_sum", dialect="chat") >= 1
    # Those out of the cache say nothing about how fast claude is.
    assert value(found, "ocp_first_token_seconds_count") == 3
    assert value(found, "ocp_spawns_total") == stats["spawned"] == 7
    assert {name: stats[name] for name in (
        "totalRequests", "errors", "timeouts", "activeRequests", "fresh", "cached")} == {
        "totalRequests": 9, "errors": 3, "timeouts": 1, "activeRequests": 0, "fresh": 6,
        "cached": 3}


def test_refusals_are_counted(tmp_path: Path) -> None:
    env = {**MULTI, "CLAUDE_MAX_CONCURRENT": "1", "CLAUDE_MAX_QUEUE": "0"}

    with running_server(tmp_path, [[{"hang": True}]], env=env) as server:
        key = new_key(server, name="laptop")["key"]
        new = new_key(server, name="frugal", quota={"daily": 0})["key"]
        with RawConnection(server.port) as wire:
            wire.send(post(encoded(question()), f"Authorization: Bearer {key}"))
            eventually(lambda: running(server) == 1)
            statuses = [ask_as(server, each).status for each in (key, key, new)]
            found = scraped(server)

        assert statuses == [429] * 3
        assert value(found, "ocp_requests_total", outcome="rate_limit_exceeded") == 2
        assert value(found, "ocp_requests_total", outcome="quota_exceeded") == 1
        assert value(found, "ocp_queue_refusals_total") == 2
        assert [value(found, name) for name in ("ocp_running", "ocp_queued")] == [1, 0]


def test_gauges_follow_what_happens(tmp_path: Path) -> None:
    env = {"OCP_WARM_PROCESSES": "2", "CLAUDE_MAX_CONCURRENT": "1"}

    with running_server(tmp_path, env=env) as server:
        eventually(lambda: value(scraped(server), "ocp_spares", model=SONNET) == 2)
        assert value(scraped(server), "ocp_parked") == 0
        ask(server)
        eventually(lambda: value(scraped(server), "ocp_parked") == 1)
        server.write_scenario([[{"hang": True}]])
        wires = [RawConnection(server.port) for _ in range(3)]
        for number, wire in enumerate(wires):
            wire.send(post(encoded(question(f"hi {number}"))))
        eventually(lambda: value(scraped(server), "ocp_queued") == 2)

        # The one that asks is a connection too.
        assert eventually(lambda: value(scraped(server), "ocp_connections") == 4)
        assert value(scraped(server), "ocp_running") == 1
        for wire in wires:
            wire.hang_up()
        assert eventually(lambda: value(scraped(server), "ocp_connections") == 1)
        assert eventually(lambda: value(scraped(server), "ocp_running") == 0)


def test_the_build_and_the_uptime_are_told(shared_server: Server) -> None:
    before = scraped(shared_server)
    eventually(lambda: scraped(shared_server)["ocp_uptime_seconds"].samples[0][2]
               > before["ocp_uptime_seconds"].samples[0][2])

    ((_, labels, one),) = before["ocp_build_info"].samples
    assert (dict(labels), one) == ({"version": ocp.VERSION, "claude": "2.1.329"}, 1)


def test_the_text_is_what_prometheus_asks_for(shared_server: Server) -> None:
    reply = shared_server.call("GET", "/metrics")

    assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_the_cache_is_measured(tmp_path: Path) -> None:
    with running_server(tmp_path, env={"CLAUDE_CACHE_TTL": "3600000"}) as server:
        for text in ("a", "b", "b"):
            ask(server, text)

        found = scraped(server)
        assert value(found, "ocp_cache_entries") == 2
        assert 2_000 < value(found, "ocp_cache_bytes") < 4_000


def test_the_login_is_absent_until_it_is_known(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        seen = [scraped(server)["ocp_logged_in"].samples]
        ask(server)
        seen.append(scraped(server)["ocp_logged_in"].samples)
        server.write_scenario([steps_of_error(401, "authentication_failed")])
        ask(server)
        seen.append(scraped(server)["ocp_logged_in"].samples)

    assert [[number for _, _, number in samples] for samples in seen] == [[], [1], [0]]


def test_the_plan_is_measured_as_far_as_it_is_known(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        before = scraped(server)["ocp_plan_utilization"].samples
        ask(server)
        eventually(lambda: scraped(server)["ocp_plan_utilization"].samples)
        found = scraped(server)

    assert before == []
    assert value(found, "ocp_plan_utilization", window="five_hour") == 0.21
    assert value(found, "ocp_plan_utilization", window="seven_day") == 0.4
    assert value(found, "ocp_plan_resets_timestamp_seconds", window="five_hour") > 1.7e9


# -- label sets ---------------------------------------------------------------


HOSTILE_NAMES = [
    'claude-x"} 1', "claude-\\", "claude-\n", "claude-" + "x" * 400, "claude-\u202e", "claude-x,y",
    *(f"claude-made-up-{number}" for number in range(8)),
]


def test_names_that_clients_make_up_do_not_become_labels(own: Server) -> None:
    before = scraped(own)

    statuses = {ask(own, model=name).status for name in HOSTILE_NAMES}

    found = scraped(own)
    assert statuses & {200}, "none of them was asked for"
    assert label_values(found, "model") - label_values(before, "model") <= {"other"}
    assert value(found, "ocp_requests_total", model="other", outcome="ok") >= 8


def test_nothing_else_that_clients_say_becomes_a_label(own: Server) -> None:
    ask(own)
    eventually(lambda: scraped(own)["ocp_plan_utilization"].samples)
    before = sum(len(family.samples) for family in scraped(own).values())

    for number in range(10):
        own.call("GET", f"/nowhere-{number}")
        ask(own, model=f"gpt-{number}")
        own.call("POST", CHAT_PATH, question(user=f"user-{number}", ocp_session_id=f"s-{number}"),
                 {"User-Agent": f"agent-{number}", "X-Request-Id": f"mine-{number}"})

    assert sum(len(family.samples) for family in scraped(own).values()) == before


def test_the_names_of_keys_are_no_labels(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        for name in ("laptop", "phone"):
            ask_as(server, new_key(server, name=name)["key"])

        text = as_admin(server, "GET", "/metrics").text

    assert "laptop" not in text and "phone" not in text


# ---------------------------------------------------------------------------
# Ready or not
# ---------------------------------------------------------------------------

def readiness(server: Server) -> tuple[int, str]:
    """The status of /ready, and what it says."""
    reply = server.call("GET", "/ready")
    if reply.status == 200:
        assert reply.json() == {"ready": True}
        return 200, ""
    error = reply.json()["error"]
    assert error["code"] == "not_ready"
    return reply.status, str(error["message"])


def test_a_server_is_ready_before_its_first_answer(shared_server: Server) -> None:
    assert readiness(shared_server) == (200, "")


def test_a_lost_login_is_not_ready_until_an_answer_comes_again(tmp_path: Path) -> None:
    with running_server(tmp_path, [steps_of_error(401, "authentication_failed")]) as server:
        ask(server)
        status, words = readiness(server)
        state = health(server)["status"]
        server.write_scenario([])
        ask(server)

        assert (status, state) == (503, "degraded") and "claude auth login" in words
        assert readiness(server) == (200, "")


def test_other_failures_do_not_make_it_unready(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        for status, word in ((529, "overloaded"), (429, "rate_limit"), (400, "invalid_request")):
            server.write_scenario([steps_of_error(status, word)])
            ask(server)

        assert readiness(server) == (200, "")


def test_without_claude_it_is_not_ready_and_says_what_to_do(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        program = server.place.claude
        program.rename(program.with_name("away"))
        missing = readiness(server)
        program.with_name("away").rename(program)

        assert missing[0] == 503 and "npm install" in missing[1]
        assert str(tmp_path) not in missing[1]
        assert eventually(lambda: readiness(server) == (200, ""))


def ready(wire: RawConnection) -> Reply:
    """What /ready says on a connection that is open."""
    wire.send(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return wire.reply()


def test_a_server_that_stops_is_not_ready(tmp_path: Path) -> None:
    with running_server(tmp_path, [[{"say": "One "}, {"hang": True}]]) as server:
        with RawConnection(server.port) as running_one, RawConnection(server.port) as open_one:
            open_one.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            open_one.reply()
            running_one.send(post(encoded(question(stream=True))))
            asked_process(server)
            os.kill(server.pid, signal.SIGTERM)
            reply = eventually(lambda: [found for found in [ready(open_one)]
                                        if found.status != 200])[0]
            open_one.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            state = open_one.reply().json()
        # Asked to stop a second time, it would not wait for the one that has just left.
        assert server.process.wait(120) == 0

    assert (reply.status, reply.json()["error"]["code"]) == (503, "not_ready")
    assert "stopping" in reply.json()["error"]["message"]
    assert state["status"] == "draining"


def test_readiness_and_health_need_no_key_and_metrics_do(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        found = [server.call("GET", path).status for path in ("/ready", "/health", "/metrics")]

    assert found == [200, 200, 401]


# ---------------------------------------------------------------------------
# The stats of /health
# ---------------------------------------------------------------------------

STATS = {"totalRequests", "activeRequests", "queued", "queueRejections", "spawned", "errors",
         "timeouts", "continued", "rewound", "rebuilt", "fresh", "cached", "shared"}


def test_health_has_its_fields_and_tells_strangers_nothing(own: Server) -> None:
    own.write_scenario([steps_of_error(500, "api_error")])
    ask(own, "A secret question")

    state = health(own)

    assert set(state["stats"]) == STATS
    assert {"status", "version", "uptime", "uptimeHuman", "authMode", "tls", "auth", "stats",
            "concurrency", "spares", "parked", "claudeVersion", "fix"} <= set(state)
    text = json.dumps(state)
    assert "secret" not in text and "It says no" not in text and "/" not in text.replace("\\/", "")


def numbers(state: Mapping[str, Json], *wanted: str) -> Iterable[int]:
    return [state["stats"][name] for name in wanted]


def test_the_stats_count_paths_errors_and_refusals(tmp_path: Path) -> None:
    env = {"CLAUDE_MAX_CONCURRENT": "1", "CLAUDE_MAX_QUEUE": "0"}

    with running_server(tmp_path, env=env) as server:
        said = ask(server).json()["choices"][0]["message"]
        for first in ("hi", "other"):
            eventually(lambda: at_rest(server))
            ask(server, messages=[{"role": "user", "content": first}, said,
                                  {"role": "user", "content": "more"}])
        server.write_scenario([[{"hang": True}]])
        # The place is free a moment after the client has its answer.
        eventually(lambda: at_rest(server))
        with RawConnection(server.port) as wire:
            wire.send(post(encoded(question("hang"))))
            eventually(lambda: running(server) == 1)
            ask(server, "refused")
            state = health(server)

        assert numbers(state, "totalRequests", "activeRequests", "queueRejections", "errors") == [
            5, 1, 1, 1]
        assert numbers(state, "fresh", "continued", "rebuilt") == [1, 1, 1]
        assert state["concurrency"] == {
            "maxConcurrent": 1, "maxQueue": 0, "inflight": 1, "queued": 0, "queueRejections": 1}
