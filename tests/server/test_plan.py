"""Plan usage over HTTP: what /usage and /status make of what claude says.

The lines in data/plan.json are those of two versions of claude, word for word.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from chat import CHAT_PATH, NO_IDLE, ask, both_ways, error_of, pieces, question, stream_chat
from keys import MULTI, as_admin
from plan_lines import NEW, UNKNOWN, shares
from processes import is_gone
from project import load_script
from raw_http import RawConnection, head
from rig import claude_pids
from server import Server, running_server
from shell_claude import ShellClaude, lines_of_an_answer
from waiting import eventually, in_parallel, seconds_of

ocp = load_script("ocp_server.py")

Json = Any


# ---------------------------------------------------------------------------
# Over HTTP
# ---------------------------------------------------------------------------

SONNET = "claude-sonnet-5-5"
REPLY = NEW["replies"]["login"]["response"]["response"]


def later(reply: Json) -> Json:
    """The same reply with its windows open for another hour."""
    resets_at = ocp.iso_time(time.time() + 3_600)
    limits = {name: {**entry, "resets_at": resets_at} if entry and "resets_at" in entry else entry
              for name, entry in reply["rate_limits"].items() if name != "limits"}
    return {**reply, "rate_limits": limits}


def usage_requests(server: Server) -> list[int]:
    """The processes that were asked about the plan."""
    return [entry["pid"] for entry in server.fake_log("line")
            if entry["line"].get("request", {}).get("subtype") == "get_usage"]


def has_spare(server: Server) -> bool:
    return bool(server.call("GET", "/health").json()["spares"])


@pytest.fixture
def spared(tmp_path: Path) -> Iterator[Server]:
    """A server with a spare whose login knows its plan."""
    with running_server(tmp_path / "spared", {"usage": later(REPLY)}) as server:
        eventually(lambda: has_spare(server))
        yield server


def plan_of(server: Server) -> Json:
    reply = server.call("GET", "/usage")
    assert reply.status == 200, reply
    return reply.json()


def test_a_spare_is_asked_and_nothing_is_spent(spared: Server) -> None:
    report = plan_of(spared)

    plan = report["plan"]
    assert (plan["currentSession"]["percent"], plan["weeklyLimits"]["allModels"]["percent"]) == (
        "21%", "40%")
    assert (plan["weeklyLimits"]["sonnet"]["percent"], plan["subscription"]) == ("3%", "max")
    assert report["fetchedAt"] is not None
    assert len(usage_requests(spared)) == 1
    assert spared.queries() == [] and spared.lines("user") == []


def test_the_next_look_within_a_minute_asks_nobody(spared: Server) -> None:
    first = plan_of(spared)["plan"]

    for path in ("/usage", "/status", "/metrics", "/health"):
        spared.call("GET", path)

    assert plan_of(spared)["plan"]["currentSession"]["percent"] == (
        first["currentSession"]["percent"])
    assert len(usage_requests(spared)) == 1


def test_status_asks_too_and_tells_the_same_plan(spared: Server) -> None:
    status = spared.call("GET", "/status").json()

    assert len(usage_requests(spared)) == 1
    assert status["plan"] == plan_of(spared)["plan"]


def test_many_who_look_at_once_ask_once(spared: Server) -> None:
    replies = in_parallel([lambda: spared.call("GET", "/usage")] * 8)

    assert [reply.status for reply in replies] == [200] * 8
    assert len(usage_requests(spared)) == 1


def test_a_spare_that_was_asked_serves_the_next_conversation_as_it_was(spared: Server) -> None:
    plan_of(spared)
    (asked,) = usage_requests(spared)

    ask(spared, "hi")

    (query,) = spared.queries()
    assert query["pid"] == asked
    # The fixed environment forbids what the question needed.
    assert query["settings"]["env"]["CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC"] == "1"
    assert [message["content"] for message in query["messages"]] == [
        [{"type": "text", "text": "hi"}]]


def test_the_plan_is_remembered_over_a_restart_with_the_time_of_its_report(tmp_path: Path) -> None:
    with running_server(tmp_path, {"usage": later(REPLY)}) as server:
        eventually(lambda: has_spare(server))
        before = plan_of(server)
    # Without a spare nobody can be asked.
    with running_server(tmp_path, env={**NO_IDLE, "OCP_WARM_TOTAL": "0"}) as server:
        after = plan_of(server)

    assert after["fetchedAt"] == before["fetchedAt"] is not None
    assert after["plan"]["subscription"] == "max"
    for report in (before, after):
        report["plan"] = {**report["plan"]["weeklyLimits"], "now": report["plan"]["currentSession"]}
    for name, window in before["plan"].items():
        for number in ("utilization", "resetsAt", "observedAt"):
            assert after["plan"][name][number] == window[number] is not None


@pytest.mark.parametrize("state", ["", "{}", "[1]", '{"windows": {"five_hour": ["x"]}}', "nul"])
def test_a_stored_plan_that_is_none_is_ignored(tmp_path: Path, state: str) -> None:
    with running_server(tmp_path):
        pass
    with closing(sqlite3.connect(tmp_path / "ocp" / "ocp.db")) as database, database:
        database.execute("INSERT OR REPLACE INTO plan VALUES (1, ?)", (state,))
    with running_server(tmp_path) as server:
        assert server.call("GET", "/usage").json()["plan"]["currentSession"]["utilization"] is None
        assert server.log_entries("stored_plan_ignored")


def test_when_there_is_nobody_to_ask_the_next_look_may_ask(tmp_path: Path) -> None:
    scenario = {"usage": later(REPLY)}

    with running_server(tmp_path, scenario, env={"OCP_WARM_PROCESSES": "0"}) as server:
        before = plan_of(server)["plan"]["subscription"]
        server.call("PATCH", "/settings", {"warmProcesses": 1})
        ask(server)
        eventually(lambda: has_spare(server))

        assert (before, plan_of(server)["plan"]["subscription"]) == (None, "max")


def test_a_bare_token_leaves_unknown_what_answers_did_not_tell(tmp_path: Path) -> None:
    with running_server(tmp_path, {"version": "2.1.197"}) as server:
        eventually(lambda: has_spare(server))
        ask(server)
        session = eventually(lambda: plan_of(server)["plan"]["currentSession"]["resetsAt"]
                             and plan_of(server))["plan"]

        assert session["currentSession"]["utilization"] is None
        assert session["weeklyLimits"] == {"allModels": UNKNOWN}
        assert session["subscription"] is None


def test_a_claude_that_cannot_be_asked_is_no_failure(tmp_path: Path) -> None:
    with running_server(tmp_path, {"unsupported": ["get_usage"]}) as server:
        eventually(lambda: has_spare(server))
        report = plan_of(server)
        reply = ask(server)

        assert report["plan"]["currentSession"] == UNKNOWN
        assert reply.status == 200
        assert len(server.log_entries("plan_not_learned")) == 1


@pytest.mark.slow
def test_a_claude_that_does_not_reply_holds_up_one_look_and_no_request(tmp_path: Path) -> None:
    # It answers questions and knows no control requests.
    silent = ShellClaude(tmp_path)
    silent.play(lines_of_an_answer("Hello."))

    with running_server(tmp_path / "server", claude=silent.program) as server:
        eventually(lambda: has_spare(server))
        over: list[str] = []

        def look(name: str) -> None:
            plan_of(server)
            over.append(name)

        def others() -> None:
            eventually(lambda: not has_spare(server))
            ask(server)
            over.append("request")
            look("second look")

        first_s = seconds_of(lambda: in_parallel([lambda: look("first look"), others]))

        assert over == ["request", "second look", "first look"] and first_s > 1
        assert server.log_entries("plan_not_learned")


@pytest.mark.slow
def test_one_who_stops_waiting_for_the_plan_leaves_nothing(tmp_path: Path) -> None:
    silent = ShellClaude(tmp_path)

    with running_server(tmp_path / "server", claude=silent.program) as server:
        eventually(lambda: has_spare(server))
        (spare,) = claude_pids(server)
        with RawConnection(server.port) as wire:
            wire.send(head("GET", "/usage"))
            eventually(lambda: not has_spare(server))

        assert eventually(lambda: is_gone(spare))


def test_garbage_about_the_plan_harms_no_report(tmp_path: Path) -> None:
    garbage = {"rate_limits": {"five_hour": {"utilization": 1e308, "resets_at": -5},
                               "seven_day": {"utilization": 10**350, "resets_at": "x"}},
               "subscription_type": ["max"]}
    event = {"type": "rate_limit_event", "rate_limit_info": {
        "rateLimitType": "five_hour", "utilization": 10**350, "resetsAt": "soon"}}

    with running_server(tmp_path, {"usage": garbage}) as server:
        eventually(lambda: has_spare(server))
        server.write_scenario([[{"raw": event}, {"say": "Hello."}]], usage=garbage)
        ask(server)
        # Behind the garbage came a line that can be read.
        eventually(lambda: 'window="five_hour"} 0.21' in server.call("GET", "/metrics").text)
        eventually(lambda: has_spare(server))

        reports = [server.call("GET", path) for path in ("/usage", "/status")]

        assert [reply.status for reply in reports] == [200, 200]
        assert [ocp.from_json(reply.body) is not None for reply in reports] == [True, True]
        assert shares(reports[0].json()) == [None, None]
        assert server.log_entries("housekeeping_failed") == []


# ---------------------------------------------------------------------------
# Extra usage
# ---------------------------------------------------------------------------

#: What claude says beside an answer that is billed as extra usage.
BILLED = {"status": "rejected", "overageStatus": "allowed", "isUsingOverage": True}
BILLED_ANSWER = [[{"say": "Hello."}, {"finish": "end_turn", "rate_limit_info": BILLED}]]
ANSWER = [[{"say": "Hello."}, {"finish": "end_turn"}]]


def extra_usage(server: Server) -> Json:
    return server.call("GET", "/health").json()["extraUsage"]


@contextmanager
def billed_server(folder: Path, setting: str, turns: Json = BILLED_ANSWER) -> Iterator[Server]:
    """A server that has given an answer which was billed as extra usage."""
    env = {**NO_IDLE, "OCP_EXTRA_USAGE": setting}
    with running_server(folder, {"turns": turns}, env=env) as server:
        assert ask(server).status == 200
        assert eventually(lambda: extra_usage(server) != "none")
        yield server


def test_billed_answers_go_on_and_are_told(tmp_path: Path) -> None:
    with billed_server(tmp_path, "allow") as server:
        assert ask(server, "Again").status == 200

        health, plan = server.call("GET", "/health").json(), plan_of(server)["plan"]
        metrics = server.call("GET", "/metrics").text

    assert (health["extraUsage"], health["status"], health["fix"]) == ("billed", "ok", None)
    assert (plan["extraUsage"]["inUse"], plan["extraUsage"]["status"]) == (True, "allowed")
    assert "\nocp_extra_usage_in_use 1\n" in metrics


@both_ways
def test_billed_answers_are_stopped_if_the_operator_wants_that(
    tmp_path: Path, stream: bool
) -> None:
    with billed_server(tmp_path, "stop") as server:
        asked = len(server.queries())
        reply = ask(server, "Again", stream=stream)
        error, health = error_of(reply), server.call("GET", "/health").json()

        assert (reply.status, error["type"], error["code"]) == (
            429, "insufficient_quota", "insufficient_quota")
        assert "`ocp settings extraUsage allow`" in error["message"]
        assert reply.headers["x-should-retry"] == "false"
        assert 2_900 < int(reply.headers["Retry-After"]) <= 3_000
        assert len(server.queries()) == asked, "claude was asked although it bills the answer"
        assert (health["extraUsage"], health["status"]) == ("stopped", "ok")
        assert "ocp settings extraUsage allow" in health["fix"]


def test_where_some_models_are_stopped_the_operator_is_told_what_to_do(tmp_path: Path) -> None:
    info = {**BILLED, "rateLimitType": "seven_day_sonnet"}
    turns = [[{"say": "Hello."}, {"finish": "end_turn", "rate_limit_info": info}]]
    with billed_server(tmp_path, "stop", turns) as server:
        statuses = [ask(server, model=model).status for model in ("sonnet", "haiku")]
        health = server.call("GET", "/health").json()

    assert (statuses, health["extraUsage"]) == ([429, 200], "stopped")
    assert "some models" in health["fix"]
    assert "`ocp settings extraUsage allow`" in health["fix"]


def test_the_next_request_of_a_conversation_is_stopped_too(tmp_path: Path) -> None:
    with running_server(
        tmp_path, {"turns": BILLED_ANSWER}, env={"OCP_EXTRA_USAGE": "stop"}
    ) as server:
        opening = [{"role": "user", "content": "One"}]
        first = server.call("POST", CHAT_PATH, question(messages=opening))
        # claude is a process of its own, and says it behind the answer.
        time.sleep(0.2)
        going_on = [*opening, {"role": "assistant", "content": "Hello."},
                    {"role": "user", "content": "Two"}]
        second = server.call("POST", CHAT_PATH, question(messages=going_on))

    assert (first.status, second.status) == (200, 429)


def test_the_operator_can_allow_extra_usage_and_stop_it_again(tmp_path: Path) -> None:
    with billed_server(tmp_path, "stop") as server:
        statuses = []
        for value in ("stop", "allow", "stop", None):
            assert server.call("PATCH", "/settings", {"extraUsage": value}).status == 200
            statuses.append((ask(server, f"With {value}").status, extra_usage(server)))

    assert statuses == [
        (429, "stopped"), (200, "billed"), (429, "stopped"), (429, "stopped")]


def test_answers_within_the_plan_end_the_stop(tmp_path: Path) -> None:
    with billed_server(tmp_path, "allow") as server:
        server.write_scenario(ANSWER)
        assert ask(server, "Within the plan").status == 200
        assert eventually(lambda: extra_usage(server) == "none")
        server.call("PATCH", "/settings", {"extraUsage": "stop"})

        assert ask(server, "Again").status == 200


@pytest.mark.slow
def test_the_stop_ends_with_the_reset_of_the_window(tmp_path: Path) -> None:
    info = {**BILLED, "resetsAt": time.time() + 3}
    turns = [[{"say": "Hello."}, {"finish": "end_turn", "rate_limit_info": info}]]
    with billed_server(tmp_path, "stop", turns) as server:
        assert ask(server, "Again").status == 429
        server.write_scenario(ANSWER)

        assert eventually(lambda: ask(server, "And again").status == 200)


def test_an_answer_that_runs_when_the_stop_comes_is_finished(tmp_path: Path) -> None:
    held = tmp_path / "go"
    slow = [{"say": "One"}, {"wait_for": str(held)}, {"say": " two."}, {"finish": "end_turn"}]
    env = {**NO_IDLE, "OCP_EXTRA_USAGE": "stop"}
    with running_server(tmp_path / "server", {"turns": [slow]}, env=env) as server:
        with stream_chat(server, "Slow") as running:
            events = iter(running)
            next(events)
            server.write_scenario(BILLED_ANSWER)
            assert ask(server, "Quick").status == 200
            assert eventually(lambda: extra_usage(server) == "stopped")
            assert ask(server, "Refused").status == 429
            held.touch()

            assert "".join(pieces(list(events))).endswith(" two.")


def test_cached_answers_are_given_while_new_ones_are_stopped(tmp_path: Path) -> None:
    env = {**NO_IDLE, "OCP_EXTRA_USAGE": "stop", "CLAUDE_CACHE_TTL": "60000"}
    with running_server(tmp_path, {"turns": BILLED_ANSWER}, env=env) as server:
        assert ask(server, "Known").status == 200
        assert eventually(lambda: extra_usage(server) == "stopped")

        assert [ask(server, text).status for text in ("Known", "New")] == [200, 429]


def test_the_budget_and_the_weeks_of_models_are_told(tmp_path: Path) -> None:
    usage = later(REPLY)
    usage["rate_limits"].update(
        extra_usage={"is_enabled": True, "monthly_limit": 5_000, "used_credits": 1_234,
                     "utilization": 24.68, "currency": "USD"},
        model_scoped=[{"display_name": "Fable", "utilization": 55,
                       "resets_at": ocp.iso_time(time.time() + 3_600)}])
    with running_server(tmp_path, {"usage": usage}) as server:
        eventually(lambda: has_spare(server))

        plan = plan_of(server)["plan"]
        metrics = server.call("GET", "/metrics").text

    assert plan["weeklyLimits"]["fable"]["percent"] == "55%"
    assert plan["extraUsage"] == {
        "state": "on", "status": None, "inUse": False, "enabled": True, "used": 12.34,
        "limit": 50.0, "currency": "USD", "utilization": 0.2468}
    assert 'ocp_plan_utilization{window="seven_day_fable"} 0.55' in metrics
    assert 'ocp_extra_usage_spent{currency="USD"} 12.34' in metrics
    assert 'ocp_extra_usage_limit{currency="USD"} 50' in metrics


def test_usage_has_the_shape_that_clients_know(spared: Server) -> None:
    ask(spared)
    spared.write_scenario([[{"exit": 1}]])
    ask(spared)

    report = plan_of(spared)

    assert set(report) == {"status", "fetchedAt", "plan", "proxy", "models"}
    assert set(report["proxy"]) == {
        "totalRequests", "activeRequests", "errors", "timeouts", "uptime"}
    assert [report["proxy"][name] for name in ("totalRequests", "errors")] == [2, 1]
    model = report["models"][SONNET]
    assert {name: model[name] for name in (
        "requests", "successes", "errors", "timeouts", "avgPromptChars", "maxPromptChars")} == {
        "requests": 2, "successes": 1, "errors": 1, "timeouts": 0, "avgPromptChars": 2,
        "maxPromptChars": 2}
    assert set(model) >= {"avgElapsed", "maxElapsed", "cacheReadShare"}
    assert model["outputTokens"] > 0 and model["inputTokens"] > 0


def test_status_has_the_shape_that_clients_know(spared: Server) -> None:
    before = spared.call("GET", "/status").json()
    ask(spared)
    spared.write_scenario([[{"api_error": {
        "status": 500, "word": "api_error", "text": "It broke in /root/secret/place"}}]])
    for number in range(4):
        ask(spared, f"Fails {number}")

    after = spared.call("GET", "/status").json()

    assert set(after) == {"proxy", "requests", "plan", "recentErrors"}
    assert (before["proxy"]["auth"], after["proxy"]["auth"]) == ("not known yet", "logged in")
    assert after["proxy"]["status"] == "ok" and after["proxy"]["version"] == ocp.VERSION
    assert after["requests"] == {"total": 5, "active": 0, "errors": 4, "timeouts": 0}
    assert len(after["recentErrors"]) == 3
    for entry in after["recentErrors"]:
        assert set(entry) == {"time", "id", "key", "model", "kind", "message"}
        assert "/root" not in entry["message"]
        assert "It broke" in entry["message"]


def test_the_plan_is_the_operators_business(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        statuses = [server.call("GET", path).status for path in ("/usage", "/status")]

        assert statuses == [401, 401]
        assert as_admin(server, "GET", "/usage").status == 200
