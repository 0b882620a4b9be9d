"""The management command: what it asks, what it shows, and with which code it ends.

With OCP_UPDATE_DOCS=1 the samples in docs/ocp-command.md are written anew instead of compared.
"""
from __future__ import annotations

import dataclasses
import datetime
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from pathlib import Path
from typing import Any, Callable

import pytest

import ocp_samples as samples
from ocp_command import (
    DEAD_URL,
    HEALTH,
    Request,
    ocp,
    ocp_env,
    run,
    run_env,
    stub_server,
    write_record,
)
from project import REPO, clean_env, load_script
from server import running_server
from tls_files import write_tls_files

Json = Any
PLAIN = ocp.Style(now_s=samples.NOW_S)
TERMINAL = ocp.Style(color=True, bars=True, now_s=samples.NOW_S)
DOCS = REPO / "docs" / "ocp-command.md"

#: Command line, what the server is asked, its answer, what shows it.
READING: tuple[tuple[str, str, Json, Callable[..., str]], ...] = (
    ("usage", "GET /usage", samples.USAGE, ocp.show_usage),
    ("usage --days 2", "GET /api/usage", samples.API_USAGE, ocp.show_usage_days),
    ("usage --by key", "GET /api/usage", samples.API_USAGE, ocp.show_usage_by_key),
    ("usage --by model", "GET /api/usage", samples.API_USAGE, ocp.show_usage_by_model),
    ("usage --by tag", "GET /api/usage", samples.API_USAGE, ocp.show_usage_by_tag),
    ("requests", "GET /api/requests", samples.REQUESTS, ocp.show_requests),
    ("status", "GET /status", samples.STATUS, ocp.show_status),
    ("health", "GET /health", HEALTH, ocp.show_health),
    ("models", "GET /v1/models", samples.MODELS, ocp.show_models),
    ("settings", "GET /settings", samples.SETTINGS, ocp.show_settings),
    ("logs", "GET /logs", samples.LOGS, ocp.show_logs),
    ("errors", "GET /api/errors", samples.ERRORS, ocp.show_errors),
    ("alerts", "GET /api/alerts", samples.ALERTS, ocp.show_alerts),
    ("sessions", "GET /sessions", samples.SESSIONS, ocp.show_sessions),
    ("keys", "GET /api/keys", samples.KEYS, ocp.show_keys),
    ("keys list", "GET /api/keys", samples.KEYS, ocp.show_keys),
    ("keys list --all", "GET /api/keys", samples.KEYS, ocp.show_all_keys),
    ("cache", "GET /cache/stats", samples.CACHE, ocp.show_cache),
    ("keys show laptop", "GET /api/keys/laptop", samples.KEY, ocp.show_key_and_quota),
    ("keys quota laptop", "GET /api/keys/laptop/quota", samples.QUOTA, ocp.show_quota),
)
each_reading = pytest.mark.parametrize("line, asked, answer, show", READING, ids=lambda v: (
    v if isinstance(v, str) and " /" not in v else ""))


def sse(*texts: str, finish: str = "stop", done: bool = True) -> str:
    """A streamed chat answer."""
    chunks = [{"model": "claude-sonnet-5", "choices": [{"delta": {"content": t}}]} for t in texts]
    if finish:
        chunks.append({"choices": [{"delta": {}, "finish_reason": finish}]})
    lines = [": comment"] + [f"data: {json.dumps(chunk)}\n" for chunk in chunks]
    return "\n".join([*lines, "data: [DONE]\n\n"] if done else [*lines, "\n"])


# ---------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------

@each_reading
def test_json_is_printed_as_the_server_wrote_it(
    tmp_path: Path, line: str, asked: str, answer: Json, show: Callable[..., str],
) -> None:
    odd = json.dumps(answer, indent=1).replace("{", "{ ", 1)
    with stub_server({asked: (200, odd)}) as server:
        found = run(tmp_path, server.url, *line.split(), "--json")
    assert (found.code, found.stdout) == (0, odd + "\n")


@pytest.mark.parametrize(("state", "words"), [
    ("billed", "answers are billed as extra usage"), ("on", "on"), ("off", "off"),
    (None, "not known yet")])
def test_extra_usage_is_what_the_server_says_it_is(state: str | None, words: str) -> None:
    extra = {"state": state, "status": "rejected", "enabled": True}

    assert f"Extra usage          {words}" in ocp.show_plan({"extraUsage": extra}, PLAIN)


@each_reading
def test_a_pipe_gets_plain_text(
    tmp_path: Path, line: str, asked: str, answer: Json, show: Callable[..., str],
) -> None:
    with stub_server({asked: (200, answer)}) as server:
        found = run(tmp_path, server.url, *line.split())
    assert (found.code, found.stderr) == (0, "")
    assert "\x1b" not in found.stdout and "[#" not in found.stdout
    assert found.stdout.isascii()


@each_reading
def test_nothing_known_and_odd_text_do_no_harm(
    line: str, asked: str, answer: Json, show: Callable[..., str],
) -> None:
    assert show({}, PLAIN) is not None
    hostile = json.loads(json.dumps(answer).replace("laptop", "\\u001b[2Jlaptop\\u202e"))
    assert "\x1b[2J" not in show(hostile, TERMINAL) and "\u202e" not in show(hostile, TERMINAL)


@pytest.mark.parametrize("environ, colour", [({}, True), ({"NO_COLOR": "1"}, False),
                                             ({"TERM": "dumb"}, False)])
def test_colour_is_for_terminals_and_no_color_is_honoured(
    tmp_path: Path, environ: dict[str, str], colour: bool,
) -> None:
    with stub_server({"GET /usage": (200, samples.USAGE)}) as server:
        found = run(tmp_path, server.url, "usage", environ=environ, terminal=True)
    assert ("\x1b[" in found.stdout) is colour
    assert "####" in found.stdout


def test_by_key_asks_for_everybodys_rows_of_the_days(tmp_path: Path) -> None:
    with stub_server({"GET /api/usage": (200, samples.API_USAGE)}) as server:
        run(tmp_path, server.url, "usage", "--by-key", "--days", "7")
        path = server.requests[-1].path
    assert "all=true" in path
    assert abs(ocp_env(tmp_path).clock() - 7 * 86_400 - since_of(path)) < 60


@pytest.mark.parametrize("words, back_s", [
    ("--by key", 86_400), ("--by model --since 7d", 7 * 86_400), ("--by key --since 12h", 43_200),
    ("--by-key", 86_400)])
def test_usage_goes_back_as_far_as_asked(tmp_path: Path, words: str, back_s: float) -> None:
    with stub_server({"GET /api/usage": (200, samples.API_USAGE)}) as server:
        run(tmp_path, server.url, "usage", *words.split())
        at_s = since_of(server.requests[-1].path)
    assert abs(ocp_env(tmp_path).clock() - back_s - at_s) < 60


@pytest.mark.parametrize("words, days", [
    ("--by day", 7), ("--days 3", 3), ("--by day --since 2d", 2), ("--since 1d", 1)])
def test_days_of_usage_are_whole_and_as_many_as_asked(
    tmp_path: Path, words: str, days: int,
) -> None:
    with stub_server({"GET /api/usage": (200, samples.API_USAGE)}) as server:
        run(tmp_path, server.url, "usage", *words.split())
        at_s = since_of(server.requests[-1].path)
    first = datetime.datetime.fromtimestamp(at_s)
    today = datetime.date.fromtimestamp(ocp_env(tmp_path).clock())
    assert (first.hour, first.minute) == (0, 0) and (today - first.date()).days == days - 1


def since_of(path: str) -> float:
    """The beginning of the period that is asked for."""
    found = urllib.parse.parse_qs(path.partition("?")[2])
    return float(ocp.parse_time(found["since"][0]))


def test_counts_have_their_plural_and_the_login_its_word(tmp_path: Path) -> None:
    shown = ocp.show_status(samples.STATUS, PLAIN)
    assert "up 1h 3m, logged in" in shown and "1 error | 0 timeouts" in shown
    proxy = {**samples.STATUS["proxy"], "demo": True}
    assert shown.startswith("OCP 1.0.0: ")
    assert ocp.show_status({**samples.STATUS, "proxy": proxy}, PLAIN).startswith(
        "OCP 1.0.0 (demo): ")
    proxy = {**samples.STATUS["proxy"], "auth": "not known yet", "fix": "log in"}
    shown = ocp.show_status({**samples.STATUS, "proxy": proxy}, PLAIN)
    assert "login not known yet" in shown and "To do: log in" in shown
    for ok, word in ((True, "logged in"), (False, "not logged in"), (None, "not known yet")):
        assert f"login            {word}\n" in ocp.show_health({"auth": {"ok": ok}}, PLAIN)


def test_the_newest_error_comes_first() -> None:
    (older,) = samples.STATUS["recentErrors"]
    newer = {**older, "time": "2026-11-20T14:50:00Z", "message": "no place"}
    shown = ocp.show_status({**samples.STATUS, "recentErrors": [older, newer]}, PLAIN)
    assert shown.index("no place") < shown.index(older["message"])


def test_the_lines_of_the_plan_fit_a_narrow_terminal() -> None:
    narrow = ocp.show_plan(samples.PLAN, ocp.Style(bars=True, width=80))
    assert max(map(len, narrow.split("\n"))) <= 80 and "resets in 3h 12m" in narrow
    assert "(Fri, Nov 20, 6:12 PM)" in ocp.show_plan(samples.PLAN, ocp.Style(bars=True, width=99))


def test_unknown_plan_is_said_to_be_unknown() -> None:
    plan = {"currentSession": {"utilization": None, "percent": None}, "weeklyLimits": {}}
    shown = ocp.show_usage({"plan": plan, "proxy": {}, "models": {}}, PLAIN)
    assert shown.count("not known yet") == 3 and "0%" not in shown
    assert "claude reports the limits of a plan with its answers" in shown


@pytest.mark.parametrize(("later_s", "words"), [(60, ""), (7200, "  as of 2h ago")])
def test_an_old_plan_is_shown_with_its_age(later_s: int, words: str) -> None:
    style = PLAIN._replace(now_s=samples.NOW_S + later_s)

    assert ocp.show_plan(samples.PLAN, style).splitlines()[0] == f"Plan Usage Limits{words}"


def test_health_of_a_server_that_is_not_well_is_a_failure(tmp_path: Path) -> None:
    ill = {**HEALTH, "status": "degraded", "fix": "log in again"}
    with stub_server({"GET /health": (200, ill)}) as server:
        found = run(tmp_path, server.url, "health")
    assert found.code == 1 and "degraded" in found.stdout and "log in again" in found.stdout


def test_watch_goes_on_through_a_restart(tmp_path: Path) -> None:
    rounds = []

    def sleep(seconds: float) -> None:
        rounds.append(seconds)
        env.environ["OCP_URL"] = DEAD_URL if len(rounds) == 1 else server.url
        if len(rounds) == 3:
            raise KeyboardInterrupt

    with stub_server({"GET /status": (200, samples.STATUS)}) as server:
        env = ocp_env(tmp_path, "status", "--watch", environ={"OCP_URL": server.url}, sleep=sleep)
        found = run_env(env)
    assert found.code == ocp.Exit.INTERRUPTED
    assert found.stdout.count("OCP 1.0.0: ok") == 2 and found.stdout.count("Cannot connect") == 1


@pytest.mark.parametrize("words, query", [
    ([], "n=20&level=all"), (["5"], "n=5&level=all"), (["error"], "n=20&level=error"),
    (["50", "warning"], "n=50&level=warn"), (["debug", "7"], "n=7&level=debug"),
    (["audit"], "n=20&level=audit"), (["-n", "5", "--level", "warn"], "n=5&level=warn"),
    (["--lines", "7"], "n=7&level=all"), (["--since", "1h"], "n=1000&level=all"),
    (["--since", "1h", "-n", "9", "error"], "n=9&level=error"),
    (["error", "--json", "9"], "n=9&level=error"),
])
def test_logs_take_number_and_level_in_any_order(
    tmp_path: Path, words: list[str], query: str,
) -> None:
    with stub_server({"GET /logs": (200, samples.LOGS)}) as server:
        run(tmp_path, server.url, "logs", *words)
        assert server.requests[-1].path == f"/logs?{query}"


def test_logs_since_leave_out_what_is_older(tmp_path: Path) -> None:
    def entry(age_s: float) -> Json:
        at_s = ocp_env(tmp_path).clock() - age_s
        return {"ts": ocp.iso_time(at_s), "level": "info", "event": f"e{age_s:.0f}"}

    entries = [entry(7200), entry(1800), entry(60)]
    with stub_server({"GET /logs": (200, {"entries": entries, "level": "all"})}) as server:
        plain = run(tmp_path, server.url, "logs", "--since", "1h").stdout
        found = run(tmp_path, server.url, "logs", "--since", "1h", "--json").stdout
    assert "e7200" not in plain and "e1800" in plain and "e60" in plain
    assert json.loads(found) == {"entries": entries[1:], "level": "all", "count": 2}


def test_logs_of_a_key_and_of_a_request_are_asked_for(tmp_path: Path) -> None:
    with stub_server({"GET /logs": (200, samples.LOGS)}) as server:
        run(tmp_path, server.url, "logs", "--key", "mum's pad", "--request", "req_1", "warn")
        assert server.requests[-1].path == "/logs?n=20&level=warn&key=mum%27s+pad&request=req_1"


@pytest.mark.parametrize("words, query", [
    ([], "limit=20"), (["phone"], "limit=20&key=phone"),
    (["-n", "5", "--since", "2h"], "limit=5&since=2h"), (["req_ab12"], "limit=20&request=req_ab12"),
    (["req phone"], "limit=20&key=req+phone"),
])
def test_errors_are_asked_for_by_key_by_request_and_by_time(
    tmp_path: Path, words: list[str], query: str,
) -> None:
    with stub_server({"GET /api/errors": (200, samples.ERRORS)}) as server:
        assert run(tmp_path, server.url, "errors", *words).code == 0
        assert server.requests[-1].path == f"/api/errors?{query}"


def test_of_failures_and_refusals_together_only_the_newest_are_shown(tmp_path: Path) -> None:
    errors = [{**samples.ERROR, "id": f"req_e{at}", "at": f"2026-11-20T14:0{at}:00Z"}
              for at in range(3)]
    refusals = [{**error, "id": error["id"].replace("_e", "_r"), "count": 2, "lastAt": error["at"]}
                for error in errors]
    answer = {"errors": errors, "refusals": refusals, "byKind": []}
    with stub_server({"GET /api/errors": (200, answer)}) as server:
        found = run(tmp_path, server.url, "errors", "-n", "3")
    assert sorted(re.findall(r"req_\w+", found.stdout)) == ["req_e1", "req_e2", "req_r2"]


def test_one_request_is_shown_in_full_with_what_to_do(tmp_path: Path) -> None:
    answer = {"errors": [samples.ERROR], "refusals": [], "byKind": []}
    with stub_server({"GET /api/errors": (200, answer)}) as server:
        found = run(tmp_path, server.url, "errors", samples.ERROR["id"])
    for name in ("id", "key", "peer", "path", "model", "status", "kind", "message", "action",
                 "userAgent"):
        assert str(samples.ERROR[name]) in found.stdout
    assert f"ocp logs --request {samples.ERROR['id']}" in found.stdout


def test_a_request_that_did_not_fail_is_told_as_such(tmp_path: Path) -> None:
    answer = {"errors": [], "refusals": [], "byKind": []}
    with stub_server({"GET /api/errors": (200, answer)}) as server:
        found = run(tmp_path, server.url, "errors", "req_1")
        none = run(tmp_path, server.url, "errors")
    assert (found.code, none.code, none.stdout) == (1, 0, "no failed requests\n")
    assert "No failure of req_1 is known" in found.stderr


@pytest.mark.parametrize("status", [429, 502, 529])
def test_a_failed_question_names_the_command_that_tells_more(tmp_path: Path, status: int) -> None:
    answer = {"error": {"message": "Not now."}}
    with stub_server({"POST /v1/chat/completions": (status, answer)}) as server:
        found = run(tmp_path, server.url, "ask", "hi")
    assert found.code == 1
    assert "Not now." in found.stderr and found.stderr.endswith("More: `ocp errors`\n")


def test_following_prints_every_event_once(tmp_path: Path) -> None:
    entries = [{"ts": "2026-11-20T14:00:00Z", "level": "info", "event": f"e{n}"} for n in range(6)]
    rounds: list[float] = []

    def logs(request: Request) -> tuple[int, Json]:
        # The ring holds the newest four.
        return 200, {"entries": entries[:len(rounds) + 2][-4:]}

    def sleep(seconds: float) -> None:
        rounds.append(seconds)
        if len(rounds) == 5:
            raise KeyboardInterrupt

    with stub_server({"GET /logs": logs}) as server:
        found = run(tmp_path, server.url, "logs", "--follow", "--json", sleep=sleep)
    assert [json.loads(line)["event"] for line in found.stdout.splitlines()] == [
        f"e{n}" for n in range(6)]


@pytest.mark.parametrize("seen, entries, fresh", [
    ([], [1, 2], [1, 2]), ([1, 2], [1, 2], []), ([1, 2], [2, 3], [3]), ([1, 2], [7], [7]),
    ([5, 5], [5, 5, 5], [5]), ([1, 2, 3, 4], [1, 4, 5], [5]), ([1, 2, 3], [1], []),
])
def test_fresh_entries_come_after_the_overlap(
    seen: list[int], entries: list[int], fresh: list[int],
) -> None:
    assert list(ocp.new_entries(seen, entries)) == fresh


# ---------------------------------------------------------------------------
# Changing
# ---------------------------------------------------------------------------

def settings_stub(results: Json, status: int = 200) -> dict[str, Any]:
    answer = {"results": results, "current": samples.SETTINGS}
    return {"GET /settings": (200, samples.SETTINGS), "PATCH /settings": (status, answer)}


@pytest.mark.parametrize("words, sent", [
    (["timeout", "300000"], {"timeout": 300_000}), (["timeout", "20m"], {"timeout": 1_200_000}),
    (["timeout", "1h30m"], {"timeout": 5_400_000}), (["CLAUDE_TIMEOUT", "5"], {"timeout": 5}),
    (["sessionId", "on"], {"sessionId": True}),
    (["logLevel", "warn"], {"logLevel": "warn"}), (["--reset", "timeout"], {"timeout": None}),
])
def test_a_setting_is_sent_with_its_own_type(
    tmp_path: Path, words: list[str], sent: Json,
) -> None:
    name = next(iter(sent))
    with stub_server(settings_stub({name: {"ok": True, "value": sent[name]}})) as server:
        found = run(tmp_path, server.url, "settings", *words)
        assert server.requests[-1].body == sent
    assert found.code == 0 and found.stdout.startswith(f"{name} = ")


@pytest.mark.parametrize("name", ["timeout", "TimeOut", "time_out", "CLAUDE_TIMEOUT"])
def test_a_setting_that_can_be_changed_is_found_in_any_case(tmp_path: Path, name: str) -> None:
    with stub_server(settings_stub({})) as server:
        found = run(tmp_path, server.url, "settings", name)
    assert found.code == 0 and found.stdout.startswith("timeout\n")


@pytest.mark.parametrize("status", [400, 207])
def test_a_refused_setting_is_a_failure_with_the_servers_words(tmp_path: Path, status: int) -> None:
    results = {"timeout": {"error": "must be from 1000 to 3600000"}}
    with stub_server(settings_stub(results, status)) as server:
        found = run(tmp_path, server.url, "settings", "timeout", "5")
    assert found.code == 1 and "must be from 1000" in found.stderr and found.stdout == ""


@pytest.mark.parametrize("words, hint", [
    (["timeuot"], "Did you mean timeout?"), (["timeout", "soon"], "takes a number of ms"),
    (["sessionId", "perhaps"], "on or off"),
    (["timeout", "1", "--reset", "timeout"], "--reset"),
])
def test_settings_used_wrongly(tmp_path: Path, words: list[str], hint: str) -> None:
    with stub_server(settings_stub({})) as server:
        found = run(tmp_path, server.url, "settings", *words)
        assert not [request for request in server.requests if request.method == "PATCH"]
    assert found.code == ocp.Exit.USAGE and hint in found.stderr


def test_one_setting_is_shown_in_full(tmp_path: Path) -> None:
    with stub_server(settings_stub({})) as server:
        found = run(tmp_path, server.url, "settings", "timeout")
        assert run(tmp_path, server.url, "settings", "CLAUDE_TIMEOUT").stdout == found.stdout
    assert "CLAUDE_TIMEOUT" in found.stdout and "range        1s..1h" in found.stdout


def test_a_setting_of_the_start_says_where_it_is_set(tmp_path: Path) -> None:
    with stub_server(settings_stub({})) as server:
        for name in ("bind", "CLAUDE_BIND", "authMode", "api_key"):
            found = run(tmp_path, server.url, "settings", name, "x")
            assert found.code == ocp.Exit.USAGE and "at the start of the server" in found.stderr
        assert f"Set PROXY_API_KEY in {tmp_path}/.ocp/ocp.env" in found.stderr
        record = {"version": 1, "actions": [], "url": server.url, "env_file": "/etc/ocp.env"}
        (tmp_path / ".ocp").mkdir()
        (tmp_path / ".ocp" / "install.json").write_text(json.dumps(record))
        found = run(tmp_path, server.url, "settings", "bind")
    assert "Set CLAUDE_BIND in /etc/ocp.env, and restart" in found.stderr


def test_the_settings_of_the_start_are_read_from_the_server_s_table(tmp_path: Path) -> None:
    found = ocp.start_settings(ocp_env(tmp_path))
    fields = dataclasses.fields(load_script("ocp_server").Config)
    assert found == {field.name: field.metadata["env"] for field in fields}
    assert ocp.start_settings(ocp_env(tmp_path, tree=tmp_path)) == {}


def test_changed_settings_are_those_that_somebody_has_set(tmp_path: Path) -> None:
    with stub_server(settings_stub({})) as server:
        found = run(tmp_path, server.url, "settings", "--changed", "--json")
        assert set(json.loads(found.stdout)) == {"sessionId", "logLevel"}
        wrong = run(tmp_path, server.url, "settings", "timeout", "--changed")
    assert wrong.code == ocp.Exit.USAGE
    assert "every setting is at its default" in ocp.show_settings({}, PLAIN)


@pytest.mark.parametrize("columns", [40, 80, 100])
def test_words_of_the_last_column_are_cut_to_the_terminal(columns: int) -> None:
    row = {"name": "timeout", **samples.SETTINGS["timeout"], "desc": "long " * 40}
    style = TERMINAL._replace(width=columns, color=False)
    shown = ocp.table(ocp.SETTING_COLUMNS, [row], style)
    assert max(map(len, shown.split("\n"))) == columns and shown.endswith("...")
    assert "..." not in ocp.show_settings({"timeout": row}, PLAIN)
    assert "ocp settings SETTING shows one in full" in ocp.show_settings({"timeout": row}, style)


@pytest.mark.parametrize("text, ms", [
    ("90s", 90_000), ("1h", 3_600_000), ("1h30m", 5_400_000), ("2d", 172_800_000), ("5ms", 5)])
def test_a_period_is_read_and_written_alike(text: str, ms: int) -> None:
    assert ocp.span_ms(text) == ms
    assert ocp.span_ms(ocp.span(ms)) == ms


@pytest.mark.parametrize("text", ["", "h", "1", "1.5h", "-1h", "1w", "1h 30m", "1h30"])
def test_what_is_no_period_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="takes a period"):
        ocp.span_ms(text)


def test_a_new_key_is_printed_first_and_alone(tmp_path: Path) -> None:
    made = {"id": 3, "key": "ocp_secret", "name": "lap top"}
    with stub_server({"POST /api/keys": (201, made)}) as server:
        found = run(
            tmp_path, server.url, "keys", "add", "lap top", "--expiry", "30d",
            "--models", "opus, haiku", "--max-concurrent", "2", "--daily", "50",
            "--tokens-weekly", "none")
        body = server.requests[0].body
    assert (found.code, found.stdout) == (0, "ocp_secret\n")
    assert "OPENAI_BASE_URL=http" in found.stderr
    assert body == {
        "name": "lap top", "expiry": "30d", "models": ["opus", "haiku"], "maxConcurrent": 2,
        "quota": {"daily": 50, "tokensWeekly": None}}


def test_a_key_is_made_with_limits_for_a_single_model(tmp_path: Path) -> None:
    with stub_server({"POST /api/keys": (201, {"id": 3, "key": "ocp_s", "name": "tv"})}) as server:
        run(tmp_path, server.url, "keys", "add", "tv", "--model", " Opus", "--usd-daily", "1.50",
            "--models", "opus,haiku")
        body = server.requests[0].body
    assert body == {
        "name": "tv", "models": ["opus", "haiku"], "modelQuotas": {"opus": {"usdDaily": 1.5}}}


def test_a_new_key_is_not_lost_in_an_answer_that_is_not_understood(tmp_path: Path) -> None:
    with stub_server({"POST /api/keys": (201, '{"secret": "ocp_lost?"}')}) as server:
        found = run(tmp_path, server.url, "keys", "add", "x")
    assert found.code == 1 and "ocp_lost?" in found.stdout


@pytest.mark.parametrize("words, sent", [
    (["rename", "a/b", "c"], ("PATCH", "/api/keys/a%2Fb", {"name": "c"})),
    (["edit", "1", "--expiry", "never"], ("PATCH", "/api/keys/1", {"expiry": None})),
    (["rotate", "1", "--yes"], ("POST", "/api/keys/1/rotate", None)),
    (["rotate", "1", "--grace", "24h"], ("POST", "/api/keys/1/rotate", {"grace": "24h"})),
    (["rotate", "K\u00fcche", "--grace", "none"],
     ("DELETE", "/api/keys/K%C3%BCche/grace", None)),
    (["revoke", "lap top", "-y"], ("DELETE", "/api/keys/lap%20top", None)),
    (["quota", "1", "--daily", "0"], ("PATCH", "/api/keys/1/quota", {"daily": 0})),
    (["quota", "1", "--usd-daily", "2.50", "--usd-monthly", "none"],
     ("PATCH", "/api/keys/1/quota", {"usdDaily": 2.5, "usdMonthly": None})),
    (["quota", "1", "--model", "haiku", "--usd-daily", "2", "--daily", "5"],
     ("PATCH", "/api/keys/1", {"modelQuotas": {
         "opus": {"usdDaily": 1.5}, "haiku": {"daily": 5, "usdDaily": 2}}})),
    (["quota", "1", "--model", "Opus", "--usd-daily", "none", "--weekly", "9"],
     ("PATCH", "/api/keys/1", {"modelQuotas": {"opus": {"weekly": 9}}})),
    (["edit", "1", "--soft-percent", "80"], ("PATCH", "/api/keys/1", {"softPercent": 80})),
    (["edit", "1", "--soft-percent", "none"], ("PATCH", "/api/keys/1", {"softPercent": None})),
])
def test_keys_are_changed_by_the_api(tmp_path: Path, words: list[str], sent: Json) -> None:
    answers = {
        "PATCH /api/keys/a%2Fb": (200, samples.KEY), "PATCH /api/keys/1": (200, samples.KEY),
        "POST /api/keys/1/rotate": (200, {"id": 1, "name": "x", "key": "ocp_new"}),
        "DELETE /api/keys/lap%20top": (200, {"revoked": True, "idOrName": "lap top"}),
        "DELETE /api/keys/K%C3%BCche/grace": (200, {"ended": True, "name": "K\u00fcche"}),
        "PATCH /api/keys/1/quota": (200, {"ok": True}), "GET /api/keys/1": (200, samples.KEY),
        "GET /api/keys/1/quota": (200, samples.QUOTA)}
    with stub_server(answers) as server:
        found = run(tmp_path, server.url, "keys", *words)
        changes = [r for r in server.requests if r.method != "GET"]
    assert found.code == 0, found
    assert [(r.method, r.path, r.body) for r in changes] == [sent]


LOGIN_REPLY = {**samples.KEY, "login": {
    "id": "0123456789ab", "kind": "token", "folder": None, "state": "not known yet"}}


def test_a_token_comes_over_standard_input_and_is_not_shown(tmp_path: Path) -> None:
    with stub_server({"PUT /api/keys/anna/login": (200, LOGIN_REPLY)}) as server:
        found = run(tmp_path, server.url, "keys", "login", "anna", stdin="sk-ant-oat01-\nabc\n")
        (asked,) = (r for r in server.requests if r.method == "PUT")
    assert found.code == 0, found
    assert asked.body == {"token": "sk-ant-oat01-\nabc\n"}
    assert "claude login" in found.stdout and "its own, by token: not known yet" in found.stdout
    assert "sk-ant" not in found.stdout + found.stderr


@pytest.mark.parametrize("words, sent", [
    (["--folder", "/home/anna/.claude"],
     ("PUT", "/api/keys/anna/login", {"folder": "/home/anna/.claude"})),
    (["--server"], ("DELETE", "/api/keys/anna/login", None)),
])
def test_a_login_can_be_a_folder_or_the_servers(
    tmp_path: Path, words: list[str], sent: Json
) -> None:
    answers = {f"{method} /api/keys/anna/login": (200, samples.KEY) for method in ("PUT", "DELETE")}
    with stub_server(answers) as server:
        found = run(tmp_path, server.url, "keys", "login", "anna", *words)
        changes = [(r.method, r.path, r.body) for r in server.requests if r.method != "GET"]
    assert (found.code, changes) == (0, [sent])


@pytest.mark.parametrize("words, stdin", [
    ([], ""), ([], " \n"), (["--server", "--folder", "/x"], "")])
def test_without_a_token_nothing_is_sent(tmp_path: Path, words: list[str], stdin: str) -> None:
    with stub_server({}) as server:
        found = run(tmp_path, server.url, "keys", "login", "anna", *words, stdin=stdin)
        assert not [r for r in server.requests if r.method == "PUT"]
    assert found.code == 2


def test_an_old_secret_with_grace_is_shown(tmp_path: Path) -> None:
    old = {"keyPreview": "ocp_aaaa...zzzz", "until": "2027-01-31T12:00:00.000Z"}
    answers = {
        "POST /api/keys/x/rotate": (200, {"id": 1, "name": "x", "key": "ocp_n", "oldSecret": old}),
        "GET /api/keys/x": (200, {**samples.KEY, "oldSecret": old}),
        "GET /api/keys/x/quota": (200, samples.QUOTA)}
    with stub_server(answers) as server:
        rotated = run(tmp_path, server.url, "keys", "rotate", "x", "--grace", "24h")
        shown = run(tmp_path, server.url, "keys", "show", "x")
    assert rotated.stdout == "ocp_n\n"
    assert "The old secret ocp_aaaa...zzzz works until 2027-01-" in rotated.stderr
    assert "ocp_aaaa...zzzz, works until 2027-01-" in shown.stdout


def test_a_quota_over_the_warning_level_is_amber() -> None:
    lines = ocp.show_quota(samples.QUOTA, TERMINAL).split("\n")

    amber = [line for line in lines if line.startswith("\x1b[33m")]
    assert len(amber) == 1 and "usd-monthly" in amber[0]
    assert "usd-monthly 16.8243/20!, opus usd-daily 0.21/1.5" in ocp.show_keys(samples.KEYS, PLAIN)


@pytest.mark.parametrize(("amount", "text"), [
    (None, "-"), (0, "$0.00"), (0.00000515, "<$0.0001"), (0.0047, "$0.0047"), (0.5, "$0.5000"),
    (1, "$1.00"), (1234.5, "$1,234.50")])
def test_an_amount_of_money_for_people(amount: float | None, text: str) -> None:
    assert ocp.usd(amount) == text


def test_revoking_nothing_is_a_failure(tmp_path: Path) -> None:
    answers = {"DELETE /api/keys/labtop": (200, {"revoked": False}),
               "GET /api/keys": (200, samples.KEYS)}
    with stub_server(answers) as server:
        found = run(tmp_path, server.url, "keys", "revoke", "labtop", "--yes")
    assert found.code == 1 and "No active key" in found.stderr
    assert "Did you mean laptop?" in found.stderr


LOSING: dict[str, tuple[int, Json]] = {
    "DELETE /sessions": (200, {"cleared": 1}), "DELETE /api/keys/1": (200, {"revoked": True}),
    "POST /api/keys/1/rotate": (200, {"id": 1, "name": "x", "key": "ocp_new"})}


@pytest.mark.parametrize("line", ["clear", "sessions clear", "keys revoke 1", "keys rotate 1"])
def test_what_is_lost_for_good_is_asked_about_first(tmp_path: Path, line: str) -> None:
    with stub_server(LOSING) as server:
        def changes(*more: str, stdin: str = "", terminal: bool = False) -> tuple[int, int, str]:
            server.requests.clear()
            found = run(tmp_path, server.url, *line.split(), *more, stdin=stdin, terminal=terminal)
            assert "?" not in found.stdout
            return found.code, sum(each.method != "GET" for each in server.requests), found.stderr

        assert changes(stdin="y\n", terminal=True)[:2] == (0, 1)
        assert changes(stdin="\n", terminal=True)[:2] == (1, 0)
        assert changes("--yes")[:2] == (0, 1)
        code, sent, words = changes(stdin="y\n")
    assert (code, sent) == (ocp.Exit.USAGE, 0) and "say --yes" in words


# -- running requests --

FIRST, SECOND = (str(row["request_id"]) for row in samples.REQUESTS["requests"])


def stopping(*words: str, gone: str = "", **more: Any) -> tuple[Any, list[str]]:
    """Runs `ocp requests stop`; returns what it says, and the ids that it asked to be stopped.
    `gone` is the id of a request that has ended meanwhile."""
    def stop(request: Any) -> Any:
        request_id = request.path.rpartition("/")[2]
        if request_id == gone:
            return 404, {"error": {"message": "It has ended.", "code": "not_found"}}
        return 200, {"id": request_id, "stopped": True}

    answers = {"GET /api/requests": (200, samples.REQUESTS),
               **{f"DELETE /api/requests/{each}": stop for each in (FIRST, SECOND)}}
    with tempfile.TemporaryDirectory() as home, stub_server(answers) as server:
        found = run(Path(home), server.url, "requests", "stop", *words, **more)
        return found, [each.path.rpartition("/")[2] for each in server.requests
                       if each.method == "DELETE"]


@pytest.mark.parametrize("word", [FIRST, "req_4f2", "4f2a", FIRST.partition("_")[2]])
def test_a_request_is_stopped_by_the_beginning_of_its_id(word: str) -> None:
    found, stopped = stopping(word)
    assert (found.code, found.stdout, stopped) == (0, f"stopped {FIRST}\n", [FIRST])


def test_several_requests_are_stopped_once_each() -> None:
    found, stopped = stopping("4f2a", "9b1d", FIRST)
    assert (found.code, stopped) == (0, [FIRST, SECOND])


def test_all_requests_are_stopped_after_a_question() -> None:
    assert stopping("--all", stdin="y\n", terminal=True)[1] == [FIRST, SECOND]
    found, stopped = stopping("--all", stdin="\n", terminal=True)
    assert (found.code, stopped) == (1, []) and "Stop 2 requests on" in found.stderr
    assert stopping("--all")[0].code == ocp.Exit.USAGE
    assert stopping("--all", "--yes")[1] == [FIRST, SECOND]


def test_one_that_has_ended_meanwhile_is_no_failure() -> None:
    found, stopped = stopping("--all", "--yes", gone=FIRST)
    assert (found.code, found.stdout) == (0, f"stopped {SECOND}\n")
    assert stopped == [FIRST, SECOND]


@pytest.mark.parametrize(("words", "code", "said"), [
    (["req_"], 1, "2 running requests begin with req_"), (["req_7"], 1, "`ocp errors ID`"),
    ([], 2, "Say which request, or --all"), (["req_4f2a", "--all"], 2, "Say which request"),
])
def test_what_is_no_running_request_stops_nothing(
    words: list[str], code: int, said: str
) -> None:
    found, stopped = stopping(*words)
    assert (found.code, stopped) == (code, []) and said in found.stderr


# -- CSV --


def test_the_csv_goes_into_a_new_file_of_its_owner_only(tmp_path: Path, real: Any) -> None:
    path = tmp_path / "usage.csv"
    words = ("usage", "--csv", "--by", "model", "-o", str(path))
    key = {"OCP_ADMIN_KEY": "admin-key"}

    found = run(tmp_path, real.url, *words, environ=key)

    assert (found.code, found.stdout) == (0, f"written to {path}\n")
    assert path.read_bytes().startswith(b"model,requests,")
    assert path.stat().st_mode & 0o777 == 0o600
    again = run(tmp_path, real.url, *words, environ=key)
    assert again.code == 1 and "is there already" in again.stderr
    nowhere = run(tmp_path, real.url, "usage", "-o", str(tmp_path / "no" / "x"), environ=key)
    assert nowhere.code == 1 and "cannot be written" in nowhere.stderr


@pytest.mark.parametrize(("line", "table", "back_s"), [
    ("usage --csv", "rows", 86_400), ("usage --csv --since 7d", "rows", 7 * 86_400),
    ("usage --csv --by tag", "tag", 86_400), ("usage -o x --by-key", "key", 86_400),
    ("usage --csv --days 3", "daily", None), ("usage --csv --by day", "daily", None),
])
def test_the_csv_has_the_table_and_the_span_that_are_asked_for(
    tmp_path: Path, line: str, table: str, back_s: float | None
) -> None:
    # This server gives JSON, as an older one does.
    with stub_server({"GET /api/usage": (200, samples.API_USAGE)}) as server:
        found = run(tmp_path, server.url, *line.split())
        path = server.requests[-1].path
    asked = urllib.parse.parse_qs(path.partition("?")[2])
    assert found.code == 1 and "too old for CSV" in found.stderr
    assert not (tmp_path / "x").exists()
    assert (asked["format"], asked["table"], asked["all"]) == (["csv"], [table], ["true"])
    assert back_s is None or abs(ocp_env(tmp_path).clock() - back_s - since_of(path)) < 60


def test_csv_and_json_exclude_each_other(tmp_path: Path) -> None:
    found = run(tmp_path, DEAD_URL, "usage", "--csv", "--json")
    assert found.code == ocp.Exit.USAGE and "exclude each other" in found.stderr


def test_one_session_is_cleared_without_a_question(tmp_path: Path) -> None:
    with stub_server({"DELETE /sessions/a%2Fb": (200, {"cleared": 1})}) as server:
        found = run(tmp_path, server.url, "sessions", "clear", "a/b")
    assert (found.code, found.stdout) == (0, "cleared 1 session\n")


def test_the_cache_is_cleared(tmp_path: Path) -> None:
    with stub_server({"DELETE /cache": (200, {"cleared": 3})}) as server:
        assert run(tmp_path, server.url, "cache", "clear").stdout == "cleared 3 answers\n"
    assert "switches it on" in ocp.show_cache({**samples.CACHE, "ttl": 0}, PLAIN)


def test_revoked_keys_are_shown_when_asked_for(tmp_path: Path) -> None:
    with stub_server({"GET /api/keys": (200, samples.KEYS)}) as server:
        for words in (["keys"], ["keys", "list"]):
            few = run(tmp_path, server.url, *words).stdout
            assert "old phone" not in few and "1 revoked: ocp keys list --all" in few
            assert "old phone" in run(tmp_path, server.url, *words, "--all").stdout
            assert "old phone" in run(tmp_path, server.url, *words, "--json").stdout
    assert "daily 12/50, tokens-daily 50.4K/1M" in few


def test_a_name_that_is_taken_is_said_in_the_servers_words(tmp_path: Path) -> None:
    body = {"error": {"message": "There is a key laptop already.", "code": "name_taken"}}
    with stub_server({"POST /api/keys": (409, body)}) as server:
        found = run(tmp_path, server.url, "keys", "add", "laptop")
    assert found.code == 1 and "There is a key laptop already" in found.stderr


# ---------------------------------------------------------------------------
# Asking
# ---------------------------------------------------------------------------

def test_ask_prints_the_answer(tmp_path: Path) -> None:
    with stub_server({"POST /v1/chat/completions": (200, sse("Hel", "lo"))}) as server:
        found = run(tmp_path, server.url, "ask", "hi", "--model", "opus")
        body = server.requests[-1].body
    assert (found.code, found.stdout, found.stderr) == (0, "Hello\n", "")
    assert body["stream"] and body["model"] == "opus" and body["messages"][0]["content"] == "hi"


def test_ask_reads_the_question_from_standard_input(tmp_path: Path) -> None:
    with stub_server({"POST /v1/chat/completions": (200, sse("ok"))}) as server:
        run(tmp_path, server.url, "ask", "-", stdin="from a pipe")
        assert server.requests[-1].body["messages"][0]["content"] == "from a pipe"


@pytest.mark.parametrize("words, stdin, content", [
    (["why", "is", "it"], "", "why is it"), (["sum", "up"], "a\nb\n", "a\nb\n\n\nsum up"),
    (["why", "-m", "opus", "is", "it"], "", "why is it"), (["-m", "opus", "why"], "", "why"),
    ([], "alone", "alone"), (["-"], "x", "x"), (["--", "-v", "means"], "", "-v means"),
])
def test_ask_takes_words_and_what_comes_through_a_pipe(
    tmp_path: Path, words: list[str], stdin: str, content: str,
) -> None:
    with stub_server({"POST /v1/chat/completions": (200, sse("ok"))}) as server:
        found = run(tmp_path, server.url, "ask", *words, stdin=stdin)
        assert server.requests[-1].body["messages"] == [{"role": "user", "content": content}]
    assert found.code == 0, found


def test_ask_does_not_wait_for_a_terminal_s_input(tmp_path: Path) -> None:
    with stub_server({"POST /v1/chat/completions": (200, sse("ok"))}) as server:
        run(tmp_path, server.url, "ask", "hi", stdin="not read", terminal=True)
        assert server.requests[-2].body["messages"][0]["content"] == "hi"


def test_ask_sends_a_system_prompt_and_prints_the_whole_answer_as_json(tmp_path: Path) -> None:
    answer = {"id": "x", "choices": [{"message": {"content": "hello"}}]}
    with stub_server({"POST /v1/chat/completions": (200, answer)}) as server:
        found = run(tmp_path, server.url, "ask", "-s", "be short", "hi", "--json")
        body = server.requests[-1].body
    assert (found.code, json.loads(found.stdout)) == (0, answer)
    assert "stream" not in body and [each["role"] for each in body["messages"]] == [
        "system", "user"]


@pytest.mark.parametrize("demo, words", [(True, "(the demo, no model was asked;"),
                                         (False, "(claude-sonnet-5;")])
def test_an_answer_of_the_demo_is_said_to_be_one(tmp_path: Path, demo: bool, words: str) -> None:
    answers = {"POST /v1/chat/completions": (200, sse("ok")),
               "GET /health": (200, {**HEALTH, "demo": demo})}
    with stub_server(answers) as server:
        assert words in run(tmp_path, server.url, "ask", "hi", terminal=True).stderr


def test_an_answer_does_not_command_a_terminal(tmp_path: Path) -> None:
    with stub_server({"POST /v1/chat/completions": (200, sse("a\x1b[2Jb\n"))}) as server:
        found = run(tmp_path, server.url, "ask", "hi", terminal=True)
    assert found.stdout == "a?[2Jb\n\n" and "first token" in found.stderr


@pytest.mark.parametrize("body, message", [
    (sse("part", finish=""), "broke off"),
    (sse("part", finish="", done=False), "broke off"),
    ('data: {"error": {"message": "claude died"}}\n\n', "claude died"),
    ("data: {oops\n\n", "no answer"),
])
def test_an_answer_that_fails_in_its_middle_is_a_failure(
    tmp_path: Path, body: str, message: str,
) -> None:
    with stub_server({"POST /v1/chat/completions": (200, body)}) as server:
        found = run(tmp_path, server.url, "ask", "hi")
    assert found.code == 1 and message in found.stderr
    # The message of the error begins a line of its own.
    assert found.stdout == ("part\n" if "part" in body else "")


def test_an_answer_that_ended_early_says_so(tmp_path: Path) -> None:
    with stub_server({"POST /v1/chat/completions": (200, sse("long", finish="length"))}) as server:
        found = run(tmp_path, server.url, "ask", "hi")
    assert found.code == 0 and "length" in found.stderr


# ---------------------------------------------------------------------------
# Finding the server, and its key
# ---------------------------------------------------------------------------

def test_the_server_is_looked_for_in_order(tmp_path: Path) -> None:
    def found(environ: dict[str, str]) -> str:
        return str(ocp.server_url(ocp_env(tmp_path, environ=environ)))

    assert found({}) == "http://127.0.0.1:3456"
    home = tmp_path / ".ocp"
    home.mkdir()
    (home / "install.json").write_text(json.dumps(
        {"version": 1, "actions": [], "port": 4000, "url": "http://127.0.0.1:4000"}))
    assert found({}) == "http://127.0.0.1:4000"
    assert found({"CLAUDE_PROXY_PORT": "5000"}) == "http://127.0.0.1:5000"
    both = {"CLAUDE_PROXY_PORT": "5000", "OCP_URL": "https://box.lan:8443/v1/"}
    assert found(both) == "https://box.lan:8443"
    for text, url in (("box", "http://box:3456"), ("box:80", "http://box:80"), (
            "192.0.2.7:3999/", "http://192.0.2.7:3999"), ("[::1]:80", "http://[::1]:80"), (
            "[::1]", "http://[::1]:3456")):
        assert found({"OCP_URL": text}) == url
    other = tmp_path / "other"
    assert found({"OCP_HOME": str(other)}) == "http://127.0.0.1:3456"


@pytest.mark.parametrize("environ", [
    {"OCP_URL": "box:"}, {"OCP_URL": "box:x"}, {"OCP_URL": "ftp://box"}, {"OCP_URL": "http://box:99999"},
    {"OCP_URL": "http://a b"}, {"OCP_URL": "http://user:pass@box"},
    {"OCP_URL": "http://[::1"}, {"CLAUDE_PROXY_PORT": "http"},
    {"CLAUDE_PROXY_PORT": "0"}, {"OCP_URL": DEAD_URL, "OCP_ADMIN_KEY": "a\nb"},
])
def test_what_is_no_address_or_key_is_wrong_usage(tmp_path: Path, environ: dict[str, str]) -> None:
    found = run_env(ocp_env(tmp_path, "models", environ=environ))
    assert found.code == ocp.Exit.USAGE, found
    assert next(iter(environ)) in found.stderr or "OCP_ADMIN_KEY" in found.stderr


@pytest.mark.parametrize("text", [
    "", "{", "[]", '{"actions": 1}', '"\\ud800"', '{"version": 1, "actions": [], "port": "x"}',
    '{"version": 1, "actions": [], "url": 5}'])
def test_a_broken_record_is_said_to_be_one(tmp_path: Path, text: str) -> None:
    (tmp_path / ".ocp").mkdir()
    (tmp_path / ".ocp" / "install.json").write_text(text)
    found = run_env(ocp_env(tmp_path, "models"))
    assert found.code == 1 and "install.json is damaged" in found.stderr


def test_the_admin_key_comes_from_environment_or_file(tmp_path: Path) -> None:
    (tmp_path / ".ocp").mkdir()
    (tmp_path / ".ocp" / "admin-key").write_text("from-file\n")
    with stub_server({"GET /sessions": (200, samples.SESSIONS)}) as server:
        run(tmp_path, server.url, "sessions")
        run(tmp_path, server.url, "sessions", environ={"OCP_ADMIN_KEY": "from-environment"})
        assert [r.key for r in server.requests] == ["from-file", "from-environment"]


def test_the_admin_key_of_a_service_of_the_machine_is_in_its_own_folder(tmp_path: Path) -> None:
    state = tmp_path / "var-lib-ocp"
    state.mkdir()
    (tmp_path / ".ocp").mkdir()
    with stub_server({"GET /sessions": (403, {"error": {"message": "no"}})}) as server:
        record = {"version": 1, "actions": [], "url": server.url, "data_dir": str(state)}
        (tmp_path / ".ocp" / "install.json").write_text(json.dumps(record))
        without = run_env(ocp_env(tmp_path, "sessions"))
        (state / "admin-key").write_text("from-file\n")
        run_env(ocp_env(tmp_path, "sessions"))
        assert [r.key for r in server.requests] == ["", "from-file"]
    assert f"none to read in {state}/admin-key" in without.stderr
    assert "demo" not in without.stderr


def test_the_admin_key_in_the_settings_of_the_service_is_that_of_this_machine(
    tmp_path: Path,
) -> None:
    ocp_home = tmp_path / ".ocp"
    ocp_home.mkdir()
    (ocp_home / "admin-key").write_text("left-over\n")
    (ocp_home / "ocp.env").write_text("CLAUDE_AUTH_MODE=multi\nOCP_ADMIN_KEY='of-the-service'\n")
    answers = {"GET /sessions": (200, samples.SESSIONS),
               "GET /health": (200, {**HEALTH, "authMode": "multi"})}
    with stub_server(answers) as server:
        record = {"version": 1, "actions": [], "url": server.url,
                  "env_file": str(ocp_home / "ocp.env")}
        (ocp_home / "install.json").write_text(json.dumps(record))
        run_env(ocp_env(tmp_path, "sessions"))
        assert server.requests[0].key == "of-the-service"
        shown = run_env(ocp_env(tmp_path, "dashboard")).stdout
    assert f"the admin key: OCP_ADMIN_KEY in {ocp_home}/ocp.env\n" in shown
    assert "of-the-service" not in shown


def test_the_admin_key_of_a_demo_is_pointed_at(tmp_path: Path) -> None:
    (tmp_path / ".ocp" / "demo").mkdir(parents=True)
    (tmp_path / ".ocp" / "demo" / "admin-key").write_text("of-the-demo")
    with stub_server({"GET /api/keys": (401, {"error": {"message": "no"}})}) as server:
        found = run(tmp_path, server.url, "keys")
    assert f"OCP_HOME={tmp_path}/.ocp/demo" in found.stderr


def test_the_key_of_the_file_goes_to_no_other_machine(tmp_path: Path) -> None:
    (tmp_path / ".ocp").mkdir()
    (tmp_path / ".ocp" / "admin-key").write_text("secret")
    (tmp_path / ".ocp" / "install.json").write_text(json.dumps(
        {"version": 1, "actions": [], "url": "http://192.0.2.1:3456"}))
    env = ocp_env(tmp_path)
    assert ocp.admin_key(env, "http://192.0.2.1:3456") == "secret"
    assert ocp.admin_key(env, "http://127.0.0.1:9") == "secret"
    assert ocp.admin_key(env, "http://192.0.2.9:3456") == ""
    assert ocp.admin_key(env, "http://127.0.0.1.example.org") == ""


def test_a_redirection_is_not_followed_and_no_proxy_used(tmp_path: Path) -> None:
    environ = {"OCP_ADMIN_KEY": "secret"}
    with stub_server() as other, stub_server({"GET /models": (302, "")}) as server:
        server.answers["GET /v1/models"] = (302, "")
        server.headers["Location"] = other.url + "/v1/models"
        proxies = {"http_proxy": other.url, "HTTP_PROXY": other.url, "all_proxy": other.url}
        os.environ.update(proxies)
        try:
            found = run(tmp_path, server.url, "models", environ={**environ, **proxies})
        finally:
            for name in proxies:
                del os.environ[name]
        assert found.code == 1 and "answered 302" in found.stderr
        assert other.requests == []


def test_the_shared_block_stands_alone() -> None:
    source = (REPO / "ocp.py").read_text("ascii")
    block = source.split("# --- shared: http_json\n")[1].split("# --- end shared\n")[0]
    lead = ("from __future__ import annotations\n"
            "import contextlib, http.client, json, urllib.parse\n"
            "from collections.abc import Iterator\nfrom typing import Any\n")
    names: dict[str, Any] = {}
    exec(compile(lead + block, "shared", "exec"), names)
    with stub_server() as server:
        assert names["http_json"]("GET", server.url + "/health")["status"] == "ok"
        for url, kind in ((DEAD_URL, "unreachable"), (server.url + "/nowhere", "refused")):
            with pytest.raises(names["HttpProblem"]) as raised:
                names["http_json"]("GET", url)
            assert raised.value.kind == kind


# ---------------------------------------------------------------------------
# Three kinds of failure, and the others
# ---------------------------------------------------------------------------

FAILURES = (
    (None, ocp.Exit.UNREACHABLE, "Cannot connect to"),
    ((401, {"error": {"message": "wants its key"}}), ocp.Exit.DENIED, "refused: wants its key"),
    ((403, {"error": {"message": "admin key"}}), ocp.Exit.DENIED, "refused: admin key"),
    ((401, {"error": {"message": "log in", "code": "upstream_login_required"}}), ocp.Exit.FAILED,
     "upstream trouble (401): log in"),
    ((502, {"error": {"message": "claude died"}}), ocp.Exit.FAILED, "upstream trouble (502)"),
    ((500, '{"error": "text"}'), ocp.Exit.FAILED, "upstream trouble (500): text"),
    ((404, {"error": {"message": "There is no"}}), ocp.Exit.FAILED, "answered 404"),
    ((200, "<html>"), ocp.Exit.FAILED, "is not an OCP server"),
    ((200, "[]"), ocp.Exit.FAILED, "is not an OCP server"),
)


@pytest.mark.few_cases
@pytest.mark.parametrize("reply, code, words", FAILURES)
def test_failures_are_told_apart(
    tmp_path: Path, reply: Any, code: int, words: str,
) -> None:
    for line, asked, _, _ in READING:
        with stub_server({asked: reply or (200, {})}) as server:
            found = run(tmp_path, server.url if reply else DEAD_URL, *line.split())
        assert found.code == code and words in found.stderr, line
        assert found.stdout == "" and "Traceback" not in found.stderr


def test_an_odd_answer_to_clear_is_no_traceback(tmp_path: Path) -> None:
    with stub_server({"DELETE /sessions": (200, "<html>")}) as server:
        found = run(tmp_path, server.url, "clear", "--yes")
    assert found.code == 1 and "is not an OCP server" in found.stderr


@pytest.mark.few_cases
@pytest.mark.parametrize("status, page", [
    *((status, "<html>It works!</html>") for status in (200, 302, 403, 404, 405, 501, 502)),
    *((status, '{"detail": "html"}') for status in (404, 502))])
@pytest.mark.parametrize("line", [
    "status", "status --json", "keys add x", "ask hi", "ask hi --json", "lan", "dashboard",
    "health", "clear --yes", "logs --since 1h"])
def test_another_program_is_named_as_such(
    tmp_path: Path, line: str, status: int, page: str,
) -> None:
    asked = ("GET /health", "GET /status", "GET /logs", "DELETE /sessions", "POST /api/keys",
             "POST /v1/chat/completions")
    with stub_server(dict.fromkeys(asked, (status, page))) as server:
        found = run(tmp_path, server.url, *line.split())
    assert found.code == 1 and "not an OCP server" in found.stderr, found
    assert "html" not in found.stdout + found.stderr


@pytest.mark.parametrize("line", ["health", "lan", "dashboard", "keys add x", "ask hi --json"])
def test_another_program_that_answers_in_json_is_found_out(tmp_path: Path, line: str) -> None:
    asked = ("GET /health", "POST /api/keys", "POST /v1/chat/completions")
    with stub_server(dict.fromkeys(asked, (200, {"detail": "html"}))) as server:
        found = run(tmp_path, server.url, *line.split())
    assert found.code == 1 and "not an OCP server" in found.stderr


@pytest.mark.parametrize("words, hint", [
    (["health", "--jsn"], "--json"), (["logs", "--sinse", "1h"], "--since")])
def test_an_unknown_option_comes_with_the_most_similar_one(
    tmp_path: Path, words: list[str], hint: str,
) -> None:
    found = run(tmp_path, DEAD_URL, *words)
    assert found.code == ocp.Exit.USAGE and f"Did you mean {hint}?" in found.stderr


@pytest.mark.parametrize("verb", ["start", "stop", "restart"])
def test_the_service_here_is_left_alone_when_another_machine_is_named(
    tmp_path: Path, verb: str,
) -> None:
    write_record(tmp_path, "http://127.0.0.1:3456")
    found = run_env(ocp_env(tmp_path, verb, "--url", "192.0.2.9"))
    assert found.code == 1 and f"run `ocp {verb}` there" in found.stderr


def test_the_log_of_a_server_that_is_off_is_named(tmp_path: Path) -> None:
    assert "What it wrote" not in run(tmp_path, DEAD_URL, "logs").stderr, "there is none"
    path = tmp_path / ".ocp/logs/ocp.log"
    path.parent.mkdir(parents=True)
    path.write_text("{}\n")
    found = run(tmp_path, DEAD_URL, "logs")
    assert found.code == ocp.Exit.UNREACHABLE and f"is in {path}\n" in found.stderr, found
    assert "What it wrote" not in run(tmp_path, "http://box.invalid", "logs").stderr


def test_of_a_server_elsewhere_it_is_the_address_that_may_be_wrong(tmp_path: Path) -> None:
    near, far = run(tmp_path, DEAD_URL, "status"), run(tmp_path, "http://box.invalid", "status")
    assert "`ocp start`" in near.stderr and "`ocp lan`" not in near.stderr
    assert "`ocp lan`" in far.stderr and "`ocp start`" not in far.stderr


def test_failures_of_ask_are_told_apart(tmp_path: Path) -> None:
    for answer, code, words in FAILURES[:7]:
        with stub_server({"POST /v1/chat/completions": answer}) as server:
            found = run(tmp_path, server.url if answer else DEAD_URL, "ask", "hi")
        assert found.code == code and words in found.stderr


@pytest.mark.parametrize("words", [
    ["nonsense"], ["keys", "nonsense"], ["--json", "start"], ["status", "--url", "http://"],
    ["usage", "--since", "soon"], ["logs", "-n", "error"], ["usage", "--by", "phase"],
    ["keys", "add"], ["usage", "--days", "0"],
    ["usage", "--days", "many"], ["logs", "loud"], ["logs", "0"], ["ask"], ["ask", "  "],
    ["completion", "tcsh"], ["restart", "everything"], ["keys", "edit", "1"],
    ["keys", "quota", "1", "--daily", "-1"], ["keys", "quota", "1", "--usd-daily", "-1"],
    ["keys", "quota", "1", "--usd-daily", "1.2345678"], ["keys", "quota", "1", "--model", "opus"],
    ["keys", "quota", "1", "--model", "", "--daily", "5"], ["keys", "add", "x", "--model", "opus"],
    ["keys", "quota", "1", "--usd-daily", "nan"], ["keys", "edit", "1", "--soft-percent", "0"],
    ["keys", "edit", "1", "--soft-percent", "101"], ["update", "--list"], ["health", "extra"],
    ["update", "--rollback", "--target", "v1.0.0"], ["health", "--js"], ["connect"],
    ["help", "nonsense"],
])
def test_wrong_usage_is_2_and_asks_nobody(tmp_path: Path, words: list[str]) -> None:
    found = run(tmp_path, DEAD_URL, *words)
    assert found.code == ocp.Exit.USAGE, found
    assert found.stderr.startswith("ocp: ") and found.stdout == ""


def test_a_program_that_is_run_has_no_terminal_to_ask_on() -> None:
    script = "import os; print(os.getsid(0) == os.getpid())"
    assert ocp.run_program([sys.executable, "-c", script], os.environ).output == "True\n"


@pytest.mark.parametrize("code, output, error, complaint", [
    (128, "", "Warning: new host\nfatal: no remote\nPlease make sure\n", "fatal: no remote"),
    (1, "", "Traceback (most recent call last):\n  File x\nKeyError: 1\n", "KeyError: 1"),
    (1, "\nfirst\nsecond\n", "", "first"), (3, "", "\n", "it ended with 3"),
    (1, "", "a\x1b[2J", "a?[2J"),
])
def test_the_complaint_of_a_program_is_its_reason_in_one_line(
    code: int, output: str, error: str, complaint: str,
) -> None:
    assert ocp.Completed(code, output, error).complaint == complaint


def test_an_unexpected_error_is_one_line_and_with_debug_more(tmp_path: Path) -> None:
    def fails() -> float:
        raise RuntimeError("oh\x1b")

    found = run(tmp_path, DEAD_URL, "usage", "--days", "1", clock=None)
    assert found.code == 3
    words = ["usage", "--days", "1"]
    for line, traced in ((words, False), (["--debug", *words], True), ([*words, "--debug"], True)):
        env = ocp_env(tmp_path, *line)
        env.clock = fails
        found = run_env(env)
        assert found.code == 1 and "RuntimeError: oh?" in found.stderr
        assert ("Traceback" in found.stderr) is traced


# ---------------------------------------------------------------------------
# Help, versions, completion
# ---------------------------------------------------------------------------

def all_commands() -> list[list[str]]:
    return [[command.name, *more] for command in ocp.COMMANDS
            for more in [[], *([action.name] for action in command.actions)]]


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["-h"]])
def test_help_lists_every_command(tmp_path: Path, words: list[str]) -> None:
    found = run(tmp_path, DEAD_URL, *words)
    assert found.code == 0 and found.stderr == ""
    for command in ocp.COMMANDS:
        assert found.stdout.count(f"  {command.name} ") >= 1 and command.summary in found.stdout
    assert max(map(len, found.stdout.splitlines())) <= 80


def test_the_help_of_the_environment_names_variables_and_exit_codes(tmp_path: Path) -> None:
    found = run(tmp_path, DEAD_URL, "help", "environment")
    assert found.code == 0 and "OCP_ADMIN_KEY" in found.stdout
    for code in ocp.Exit:
        assert re.search(rf"\b{code.value} ", found.stdout), code


@pytest.mark.parametrize("words", [["connect", "--help"], ["help", "connect"],
                                   ["--url", "box", "connect", "-h"]])
def test_the_help_of_connect_is_that_of_its_script(words: list[str]) -> None:
    ran = subprocess.run([sys.executable, str(REPO / "ocp.py"), *words], capture_output=True,
                         text=True, check=True)
    assert "--provider-name" in ran.stdout and "--undo" in ran.stdout


@pytest.mark.parametrize("words", [["tenants", "--help"], ["help", "tenants"]])
def test_the_help_of_tenants_is_that_of_its_script(words: list[str]) -> None:
    ran = subprocess.run([sys.executable, str(REPO / "ocp.py"), *words], capture_output=True,
                         text=True, check=True)
    assert "usage: ocp tenants" in ran.stdout and "discover" in ran.stdout


def all_examples() -> list[str]:
    rows = [row for command in ocp.COMMANDS for row in (command, *command.actions)]
    return [example for row in rows for example in row.examples]


@pytest.mark.parametrize("example", all_examples())
def test_every_example_is_a_command_line_that_is_understood(tmp_path: Path, example: str) -> None:
    words = shlex.split(example.partition(" < ")[0])
    if words[0] not in ("help", "--version"):
        assert ocp.parse(ocp_env(tmp_path), words).run is not None


def test_every_command_has_an_example() -> None:
    rows = [row for command in ocp.COMMANDS for row in (command, *command.actions)]
    assert [row.name for row in rows if not row.examples] == [
        "connect", "channels"], "their scripts have their own"


@pytest.mark.parametrize("words", [
    ["--json", "health"], ["health", "--json"], ["--debug", "health", "--json"],
    ["health", "--json", "--debug"], ["--url", "{url}", "--json", "health"],
    ["health", "--json", "--url", "{url}"], ["--url={url}", "health", "--json"],
])
def test_options_of_every_command_stand_on_both_sides_of_it(
    tmp_path: Path, words: list[str],
) -> None:
    with stub_server() as server:
        words = [word.replace("{url}", server.url) for word in words]
        url = DEAD_URL if any("url" in word for word in words) else server.url
        assert json.loads(run(tmp_path, url, *words).stdout) == HEALTH


@pytest.mark.parametrize("words, usage", [
    (["ask", "hi", "--loud"], "ocp ask "), (["status", "now"], "ocp status "),
    (["keys", "add"], "ocp keys add "), (["keys", "show", "1", "2"], "ocp keys show "),
    (["usage", "--since", "soon"], "ocp usage "), (["--json", "start"], "ocp start "),
])
def test_wrong_arguments_show_the_usage_of_their_command(
    tmp_path: Path, words: list[str], usage: str,
) -> None:
    found = run(tmp_path, DEAD_URL, *words)
    assert found.code == ocp.Exit.USAGE and f"Usage: {usage}" in found.stderr


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version_option_is_one_line_and_asks_nobody(tmp_path: Path, option: str) -> None:
    with stub_server() as server:
        found = run(tmp_path, server.url, option)
        assert server.requests == []
    version = ocp.version_of(str(REPO / "ocp_server.py"))
    assert (found.code, found.stdout) == (0, f"ocp {version}\n")


@pytest.mark.few_cases
@pytest.mark.parametrize("words", [
    each for each in all_commands() if each not in (["connect"], ["channels"], ["tenants"])
], ids=" ".join)
def test_every_command_has_help_and_a_function(tmp_path: Path, words: list[str]) -> None:
    found = run(tmp_path, DEAD_URL, *words, "--help")
    assert (found.code, found.stderr) == (0, "") and f"ocp {' '.join(words)}" in found.stdout
    assert run(tmp_path, DEAD_URL, "help", *words).stdout == found.stdout
    assert callable(getattr(ocp, "_".join(["cmd", *words])))


@pytest.mark.parametrize("line, hint", [
    ("keys edit laptop --usd-daily 3", "`ocp keys add` and `ocp keys quota` take it."),
    ("keys quota laptop --soft-percent=80", "`ocp keys add` and `ocp keys edit` take it."),
    ("keys quota laptop --grace 2h", "`ocp keys rotate` takes it."),
    ("keys quota laptop daily 3", "Did you mean --daily?"),
    ("--csv usage", "It goes behind `ocp usage`."),
    ("requests --all stop", "`ocp requests stop` takes it."),
    ("keys add Anna phone --daily 3", "A name with spaces needs quotes."),
    ("keys show the old laptop", "A name with spaces needs quotes."),
])
def test_arguments_in_the_wrong_place_come_with_the_right_one(
    tmp_path: Path, line: str, hint: str
) -> None:
    found = run(tmp_path, DEAD_URL, *line.split())
    assert found.code == ocp.Exit.USAGE
    assert found.stderr.splitlines()[0].endswith(hint)


def test_names_of_wide_characters_leave_the_columns_straight() -> None:
    names = ("laptop", "\u65e5\u672c\u8a9e", "e\u0301t\u00e9")
    rows = [{"name": name, "count": 5} for name in names]
    columns = (ocp.Column("Name", "name"), ocp.number("Count", "count"))

    lines = ocp.table(columns, rows, PLAIN).splitlines()

    assert {ocp.width_of(line) for line in lines} == {2 + 6 + 2 + 5}


@pytest.mark.parametrize("value, text", [
    (0, "0"), (0.00000515, "0.00000515"), (1e-05, "0.00001"), (16.824312, "16.8243"), (2.5, "2.5"),
    (300_000, "300K")])
def test_a_number_for_people_has_no_exponent(value: float, text: str) -> None:
    assert ocp.short_number(value) == text


def test_every_function_of_a_command_is_in_the_table() -> None:
    named = {"_".join(["cmd", *words]) for words in all_commands()}
    assert named == {name for name in vars(ocp) if name.startswith("cmd_")}


def test_an_unknown_command_comes_with_the_most_similar_one(tmp_path: Path) -> None:
    for words, hint in (
            (["statsu"], "status"), (["--json", "Status"], "status"),
            (["--url", "box", "kesy"], "keys"), (["keys", "ad"], "add"),
            (["cache", "claer"], "clear"), (["help", "keys", "revok"], "revoke"),
            (["stat"], "status"), (["dash"], "dashboard"), (["keys", "rot"], "rotate")):
        found = run(tmp_path, DEAD_URL, *words)
        assert found.code == ocp.Exit.USAGE and f"Did you mean {hint}?" in found.stderr


@pytest.mark.parametrize("line, right", [
    ("settings set timeout 1h", "settings timeout 1h"), ("settings get timeout",
     "settings timeout"), ("settings reset timeout", "settings --reset timeout")])
def test_an_action_that_settings_do_not_have_comes_with_the_right_line(
    tmp_path: Path, line: str, right: str,
) -> None:
    found = run(tmp_path, DEAD_URL, *line.split())
    assert found.code == ocp.Exit.USAGE and found.stderr.endswith(f"Write: ocp {right}\n"), found


def test_version_names_all_three(tmp_path: Path) -> None:
    with stub_server() as server:
        found = run(tmp_path, server.url, "version", "--json")
    installed = ocp.version_of(str(REPO / "ocp_server.py"))
    assert json.loads(found.stdout) == {
        "installed": installed, "served": "1.0.0", "claude": "2.1.329"}
    assert "no server answers" in run(tmp_path, DEAD_URL, "version").stdout
    with stub_server({"GET /health": (200, "<html>")}) as server:
        assert "another program answers" in run(tmp_path, server.url, "version").stdout


def completed(tmp_path: Path, url: str, *words: str) -> set[str]:
    """What `ocp __complete` offers for the last word."""
    found = run(tmp_path, url, "__complete", *words)
    assert (found.code, found.stderr) == (0, "")
    return {line.partition("\t")[0] for line in found.stdout.splitlines()}


def test_commands_actions_options_and_choices_are_completed(tmp_path: Path) -> None:
    assert completed(tmp_path, DEAD_URL, "st") == {"status", "start", "stop"}
    assert {"list", "add", "rotate", "--json"} <= completed(tmp_path, DEAD_URL, "keys", "")
    assert "--tokens-daily" in completed(tmp_path, DEAD_URL, "keys", "add", "--")
    assert "list" not in completed(tmp_path, DEAD_URL, "keys", "add", "")
    assert completed(tmp_path, DEAD_URL, "usage", "--b") == {"--by", "--by-key"}
    assert completed(tmp_path, DEAD_URL, "usage", "--by", "") == {
        "key", "model", "tag", "day"}
    assert completed(tmp_path, DEAD_URL, "logs", "--level", "") == set(ocp.LOG_WORDS)
    assert "clear" in completed(tmp_path, DEAD_URL, "--url", "box", "--json", "cache", "")
    assert completed(tmp_path, DEAD_URL, "status", "--u") == {"--url"}
    offered = completed(tmp_path, DEAD_URL, "connect", "box", "--")
    assert {"--undo", "--provider-name", "--primary"} <= offered and "--url" not in offered
    assert {"discover", "setup", "gen-key"} <= completed(tmp_path, DEAD_URL, "tenants", "")
    assert completed(tmp_path, DEAD_URL, "completion", "z") == {"zsh"}
    assert completed(tmp_path, DEAD_URL, "logs", "e") == {"error"}
    assert completed(tmp_path, DEAD_URL, "help", "keys", "re") == {"rename", "revoke"}
    assert completed(tmp_path, DEAD_URL, "nonsense", "") == completed(tmp_path, DEAD_URL, "--") == {
        "--help", "--url", "--debug", "--json", "--version"}
    assert completed(tmp_path, DEAD_URL, "status", "--url", "") == set()
    assert completed(tmp_path, DEAD_URL) >= {command.name for command in ocp.COMMANDS}


@pytest.mark.parametrize("words, asked, answer, names", [
    (["keys", "show", ""], "GET /api/keys", samples.KEYS, {"laptop", "anna"}),
    (["ask", "--model", "claude-s"], "GET /v1/models", samples.MODELS, {"claude-sonnet-5-5"}),
    (["clear", ""], "GET /sessions", samples.SESSIONS, {"chat-1"}),
    (["requests", "stop", "req_4"], "GET /api/requests", samples.REQUESTS,
     {"req_4f2a90c1b7d3e5a86c0f1e2d"}),
    (["settings", "t"], "GET /settings", samples.SETTINGS, {"timeout"}),
    (["settings", "--reset", "log"], "GET /settings", samples.SETTINGS, {"logLevel"}),
])
def test_names_of_the_server_are_completed_and_its_absence_is_silent(
    tmp_path: Path, words: list[str], asked: str, answer: Json, names: set[str],
) -> None:
    with stub_server({asked: (200, answer)}) as server:
        found = completed(tmp_path, server.url, *words)
    # A name with a space would have to be quoted.
    assert names == {name for name in found if not name.startswith("-")}
    assert not names & completed(tmp_path, DEAD_URL, *words)


#: How a shell is asked for the words that may come next, without a terminal.
ASKED = {
    "bash": 'COMP_WORDS=(ocp keys re); COMP_CWORD=2; _ocp; printf "%s\n" "${COMPREPLY[@]}"',
    "zsh": "words=(ocp keys re); CURRENT=3; _describe() { print -l -- ${(P)2} }; _ocp",
    "fish": 'complete -C "ocp keys re"',
}


@pytest.mark.parametrize("shell", sorted(ASKED))
def test_each_shell_completes_by_asking_ocp(tmp_path: Path, shell: str) -> None:
    script = run_env(ocp_env(tmp_path, "completion", shell)).stdout
    program = tmp_path / "ocp"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{REPO}/ocp.py" "$@"\n')
    program.chmod(0o755)
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    environ = clean_env(HOME=str(tmp_path), PATH=f"{tmp_path}:{os.environ['PATH']}")
    compdef = "compdef() { :; }\n" if shell == "zsh" else ""
    done = subprocess.run([shell, "-c", f"{compdef}{script}\n{ASKED[shell]}"], text=True,
                          capture_output=True, env=environ, check=False)
    names = [re.split("[\t:]", line)[0] for line in done.stdout.splitlines()]
    assert (done.stderr, names) == ("", ["rename", "revoke"]), done


# ---------------------------------------------------------------------------
# The neighbourhood
# ---------------------------------------------------------------------------

def test_lan_gives_the_address_and_sends_no_key_there(tmp_path: Path) -> None:
    with stub_server() as server:
        found = run(tmp_path, server.url, "lan", addresses=lambda: ["127.0.0.1"],
                    environ={"OCP_ADMIN_KEY": "secret"})
        assert server.requests[-1].key == ""
    assert found.code == 0 and f"{server.url}/v1" in found.stdout
    assert "reachable    yes" in found.stdout


def test_lan_says_what_to_do_when_others_cannot_connect(tmp_path: Path) -> None:
    with stub_server() as server:
        # The stub listens on 127.0.0.1 and so not here.
        found = run(tmp_path, server.url, "lan", addresses=lambda: ["127.0.0.77"])
        nowhere = run(tmp_path, server.url, "lan", addresses=lambda: [])
    assert found.code == 1
    assert f"python3 {REPO}/setup.py_install.py --bind 0.0.0.0 --auth-mode multi" in found.stdout
    assert nowhere.code == 1 and "no address" in nowhere.stderr


def test_connect_runs_its_script_with_the_arguments(tmp_path: Path) -> None:
    (tmp_path / "ocp_connect.py").write_text(
        "import sys; open('seen', 'w').write(repr(sys.argv[1:])); sys.exit(4)")
    ran = subprocess.run(
        [sys.executable, str(copied(tmp_path)), "connect", "box.lan", "--key", "k", "--dry-run"],
        cwd=tmp_path, env=clean_env(HOME=str(tmp_path)), check=False)
    assert ran.returncode == 4
    assert (tmp_path / "seen").read_text() == "['box.lan', '--key', 'k', '--dry-run']"


@pytest.mark.parametrize("url, note", [
    ("https://ocp.example", None), (None, "This machine is in no network."),
    ("http://192.0.2.7:3456", "In mode none keys have no effect.")])
def test_what_the_server_knows_of_its_address_is_told_with_a_new_key(
    tmp_path: Path, url: str | None, note: str | None,
) -> None:
    made = {"key": "ocp_secret", "name": "x", "connectUrl": url, "connectNote": note}
    with stub_server({"POST /api/keys": (201, made)}) as server:
        found = run(tmp_path, server.url, "keys", "add", "x")
        assert len(server.requests) == 1
    assert (f"curl -fsSL {url}/connect" in found.stderr) is bool(url)
    assert f"OPENAI_BASE_URL={url or server.url}/v1" in found.stderr
    assert (f"\n  {url}/me\n" in found.stderr) is bool(url)
    assert (f"ATTENTION: {note}" in found.stderr) is bool(note)


@pytest.mark.parametrize("mode, environ, key", [
    ("none", {}, "none needed on this machine"),
    ("multi", {}, "the admin key: cat {home}/.ocp/admin-key"),
    ("multi", {"OCP_ADMIN_KEY": "secret"}, "the admin key: what OCP_ADMIN_KEY has"),
])
def test_the_dashboard_is_told_with_how_to_get_in_and_opened_when_asked(
    tmp_path: Path, mode: str, environ: dict[str, str], key: str,
) -> None:
    opened: list[str] = []

    def browse(url: str) -> bool:
        opened.append(url)
        return len(opened) == 1

    with stub_server({"GET /health": (200, {**HEALTH, "authMode": mode})}) as server:
        def shown(*words: str) -> Any:
            return run(tmp_path, server.url, "dashboard", *words, environ=environ, browse=browse,
                       addresses=lambda: [])

        assert key.format(home=tmp_path) in shown().stdout and not opened
        assert (shown("--open").code, shown("--open").code) == (0, 1)
    assert opened == [f"{server.url}/dashboard"] * 2


def test_a_certificate_that_nobody_here_trusts_is_no_reason_to_be_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `ocp lan`, which asks at the address of the network, and OCP_URL elsewhere."""
    # What is asked is loopback, and taken for another machine.
    monkeypatch.setattr(ocp, "is_loopback", lambda url: False)
    with running_server(tmp_path / "server", env=write_tls_files(tmp_path)) as server:
        url = f"https://127.0.0.1:{server.port}"
        assert ocp.is_ocp_server(url)
        found = run(tmp_path, url, "models")
    assert found.code == 3 and "SSL_CERT_FILE" in found.stderr


def test_the_command_for_a_device_is_short_at_the_usual_port() -> None:
    assert ocp.connect_line("http://192.0.2.7:3456") == (
        "curl -fsSL http://192.0.2.7:3456/connect | python3 - 192.0.2.7")
    assert ocp.connect_line("https://ocp.example").endswith("- https://ocp.example:443")
    assert ocp.connect_line("http://[::1]:80").endswith("- http://[::1]:80")


@pytest.mark.few_cases
@pytest.mark.parametrize("words", [
    ["connect", "--undo", "--yes"], ["connect", "box", "--list"], ["channels", "start", "-d"],
    ["tenants"], ["tenants", "--json"], ["tenants", "setup", "alice", "--yes", "--help"]])
def test_every_option_behind_a_script_is_its_own(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / f"ocp_{words[0]}.py").write_text("import sys; print(sys.argv[1:])")
    ran = subprocess.run([sys.executable, str(copied(tmp_path)), *words], capture_output=True,
                         text=True, check=True)
    assert ran.stdout == f"{words[1:]}\n"


@pytest.mark.parametrize("variable, value, address", [
    ("CLAUDE_PROXY_PORT", "3999", "http://127.0.0.1:3999"),
    ("OCP_URL", "https://ocp.example/v1", "https://ocp.example:443")])
def test_sync_asks_the_script_for_the_server_that_is_in_use(
    tmp_path: Path, variable: str, value: str, address: str
) -> None:
    (tmp_path / "ocp_connect.py").write_text("import sys; print(sys.argv[1:]); sys.exit(1)")
    ran = subprocess.run(
        [sys.executable, str(copied(tmp_path)), "sync", "--dry-run", "--json"], text=True,
        env=clean_env(HOME=str(tmp_path), **{variable: value}), capture_output=True)
    assert (ran.returncode, ran.stdout) == (
        1, f"['--sync', '{address}', '--dry-run', '--json']\n")


def copied(folder: Path) -> Path:
    """ocp.py in a folder of its own."""
    return Path(shutil.copy(REPO / "ocp.py", folder))


@pytest.mark.parametrize("name", ["connect", "channels", "tenants"])
def test_a_script_that_is_not_there_is_told(tmp_path: Path, name: str) -> None:
    found = run_env(ocp_env(tmp_path, name, "box", tree=tmp_path))
    assert found.code == 1 and f"Copy ocp_{name}.py" in found.stderr


def test_progress_is_said_on_a_terminal_only(tmp_path: Path) -> None:
    env = ocp_env(tmp_path, terminal=True)
    waited = []

    class Timer:
        daemon = False

        def __init__(self, seconds: float, function: Any, arguments: Any) -> None:
            waited.append(seconds)

        def start(self) -> None:
            pass

        def cancel(self) -> None:
            pass

    real, ocp.threading.Timer = ocp.threading.Timer, Timer
    try:
        with ocp.progress(env, "asking"), ocp.progress(ocp_env(tmp_path), "asking"):
            pass
    finally:
        ocp.threading.Timer = real
    assert waited == [1.0]


# ---------------------------------------------------------------------------
# Against the real server
# ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Any:
    env = {"PROXY_API_KEY": "shared-key", "OCP_ADMIN_KEY": "admin-key"}
    with running_server(tmp_path_factory.mktemp("server"), env=env) as server:
        yield server


@pytest.mark.parametrize("words, shown", [
    (["health"], "OCP is ok"), (["models"], "claude-opus-5"), (["logs", "5"], "server_started"),
    (["sessions"], "no sessions"), (["clear", "--yes"], "cleared 0 sessions"),
    (["cache"], "hits"), (["cache", "clear"], "cleared 0 answers"),
    (["alerts"], "no alerts are sent: `ocp settings alertUrl ADDRESS`"),
    (["settings", "queueRetryAfter", "60"], "queueRetryAfter = 1m"),
    (["settings", "usageDays", "30d"], "usageDays = 30d"),
    (["settings", "sessionTTL", "2h"], "sessionTTL = 2h"),
    (["models"], "claude-sonnet-5-5 *"), (["usage", "--by", "day"], "Since"),
    (["dashboard"], "/dashboard"), (["requests"], "nothing runs"),
    (["requests", "stop", "--all"], "nothing runs"), (["usage", "--by", "tag"], "tagFrom"),
    (["usage", "--csv"], "at,request_id,model,"), (["usage", "--csv", "--by", "day"], "day,"),
    (["ask", "Hello there"], "You said: Hello there"), (["version"], "2.1.329"),
])
def test_a_real_server_is_read(tmp_path: Path, real: Any, words: list[str], shown: str) -> None:
    found = run(tmp_path, real.url, *words, environ={"OCP_ADMIN_KEY": "admin-key"})
    assert found.code == 0 and shown in found.stdout, found


@pytest.mark.parametrize("delivered, code, words", [
    (True, 0, "the webhook took it"), (False, 1, "not delivered: it failed itself (status 500)"),
])
def test_a_test_of_the_alerts_tells_how_it_went(
    tmp_path: Path, delivered: bool, code: int, words: str
) -> None:
    answer = {"delivered": delivered, "status": 204 if delivered else 500,
              "problem": None if delivered else "it failed itself (status 500)"}
    with stub_server({"POST /api/alerts/test": (200, answer)}) as server:
        found = run(tmp_path, server.url, "alerts", "test")
        machine = run(tmp_path, server.url, "alerts", "test", "--json")

    assert (found.code, found.stdout.strip()) == (code, words)
    assert (machine.code, json.loads(machine.stdout)) == (code, answer)


def test_the_address_of_the_webhook_can_be_set_and_is_never_shown(
    tmp_path: Path, real: Any
) -> None:
    def run_real(*words: str) -> Any:
        return run(tmp_path, real.url, *words, environ={"OCP_ADMIN_KEY": "admin-key"})

    url = "https://hooks.example.org/s3cret?token=s3cret"
    found = [run_real("settings", "alertUrl", url), run_real("settings", "alertUrl"),
             run_real("settings", "--changed"), run_real("settings", "--json"), run_real("alerts"),
             run_real("settings", "alertUrl", "hooks.example.org/s3cret"),
             run_real("settings", "--reset", "alertUrl")]

    told = "\n".join(each.stdout + each.stderr for each in found)
    assert found[0].stdout.strip() == "alertUrl = hooks.example.org (secret)"
    assert "to hooks.example.org (secret), format json" in found[4].stdout
    assert "OCP_ALERT_URL takes the address of a webhook" in found[5].stderr
    assert "s3cret" not in told
    assert [each.code for each in found] == [0, 0, 0, 0, 0, 1, 0]


def test_a_real_server_refuses_without_the_key(tmp_path: Path, real: Any) -> None:
    found = run(tmp_path, real.url, "sessions")
    assert found.code == 4 and "No admin key was sent" in found.stderr
    wrong = run(tmp_path, real.url, "sessions", environ={"OCP_ADMIN_KEY": "wrong"})
    assert wrong.code == 4 and "is not this server's" in wrong.stderr
    other = run(tmp_path, real.url, "logs", environ={"OCP_ADMIN_KEY": "shared-key"})
    assert other.code == 4


@pytest.mark.parametrize("command, code", [
    ("models >&-", 0), ("models 2>&-", 0), ("models >&- 2>&-", 0), ("nonsense 2>&-", 2),
    ("ask - <&-", 2), ("ask - < <(printf 'gr\\xfc')", 2), ("ask hi <&-", 0)])
def test_as_a_program_whose_streams_are_closed_or_odd(
    tmp_path: Path, real: Any, command: str, code: int
) -> None:
    environ = clean_env(
        HOME=str(tmp_path), OCP_URL=real.url, OCP_ADMIN_KEY="admin-key", PYTHONIOENCODING="utf-8")
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {REPO}/ocp.py {command}"], text=True,
        capture_output=True, env=environ, check=False, timeout=120)
    assert done.returncode == code and "Traceback" not in done.stderr, done
    assert "not have happened" not in done.stderr


def test_as_a_program_in_a_pipe(tmp_path: Path, real: Any) -> None:
    command = f"{sys.executable} -W error {REPO}/ocp.py"
    environ = clean_env(
        HOME=str(tmp_path), OCP_URL=real.url, OCP_ADMIN_KEY="admin-key", LANG="C",
        PYTHONIOENCODING="ascii")
    done = subprocess.run(
        ["bash", "-c", f"{command} models | cat && {command} logs 1000 | head -1 && "
         f"{command} usage --csv | true && "
         f"{command} ask 'sch\u00f6n \u4e2d' && exit 7"],
        capture_output=True, env=environ, check=False, timeout=300)
    assert done.returncode == 7 and done.stderr == b"", done
    assert b"claude-opus-5" in done.stdout and b"You said: sch?n ?" in done.stdout


@pytest.mark.parametrize("words", [
    ("models",), ("ask", "hi"), ("usage", "--csv"), ("keys", "--json")])
def test_output_for_which_the_disk_is_full_is_told(
    tmp_path: Path, real: Any, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    env = ocp_env(tmp_path, *words, environ={"OCP_URL": real.url, "OCP_ADMIN_KEY": "admin-key"})
    monkeypatch.setattr(env.stdout, "flush", fail)
    found = run_env(env)

    assert found.code == ocp.Exit.FAILED and "No space left on device" in found.stderr
    assert "not have happened" not in found.stderr and "broke off" not in found.stderr


# ---------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------

def doctor_sample() -> str:
    return str(ocp.show_doctor(samples.DOCTOR, PLAIN))


NOT_ON_THE_PAGE = ("keys list", "keys list --all", "usage --by model")
SHOWN: dict[str, Callable[[], str]] = {
    **{line: lambda show=show, answer=answer: str(show(answer, PLAIN))  # type: ignore[misc]
       for line, _, answer, show in READING if line not in NOT_ON_THE_PAGE},
    "settings timeout": lambda: str(
        ocp.show_setting("timeout", samples.SETTINGS["timeout"], PLAIN)),
    "dashboard": lambda: str(ocp.show_dashboard(samples.DASHBOARD, PLAIN)),
    f"errors {samples.REFUSAL['id']}": lambda: str(ocp.show_error(samples.REFUSAL, PLAIN)),
    "lan": lambda: str(ocp.show_lan(samples.LAN, PLAIN)),
    "doctor": doctor_sample,
    "help": lambda: str(ocp.commands_text()),
    "capture 5 --key laptop": lambda: str(ocp.show_capture(samples.CAPTURE, PLAIN)),
    "update --dry-run": lambda: str(ocp.show_update_plan(SNAPSHOT.journal, None)),
    "update --rollback --list": lambda: str(ocp.show_snapshots([SNAPSHOT], PLAIN)),
}
SNAPSHOT = ocp.Snapshot("/home/u/.ocp/snapshots/20261120T143000.000000Z", ocp.Journal(
    "done", "/home/u/ocp", "/home/u/.ocp", "a" * 40, "main", "1.0.0", "b" * 40, "1.1.0",
    "2026-11-20T14:30:00Z"))


def test_the_samples_of_the_page_are_what_is_shown() -> None:
    pattern = re.compile(r"(<!-- ocp ([^>]*?) -->\n```text\n)(.*?)(\n?```)", re.S)
    text = DOCS.read_text("utf-8")
    wanted = pattern.sub(lambda m: m[1] + f"$ ocp {m[2]}\n" + SHOWN[m[2]]() + "\n```", text)
    if os.environ.get("OCP_UPDATE_DOCS"):
        DOCS.write_text(wanted, "utf-8")
    assert DOCS.read_text("utf-8") == wanted
    assert {match[2] for match in pattern.finditer(text)} == set(SHOWN)


def test_the_page_lists_the_checks_of_the_doctor() -> None:
    rows = [f"| `{check.id}` | {check.title} | {check.about} | {'yes' if check.mend else ''} |"
            for check in ocp.CHECKS]
    wanted = "\n".join(["| check | title | what it looks at | `--fix` mends it |",
                        "| --- | --- | --- | --- |", *rows])
    pattern = re.compile(r"(<!-- checks -->\n)(.*?)(\n?<!-- end checks -->)", re.S)
    text = DOCS.read_text("utf-8")
    if os.environ.get("OCP_UPDATE_DOCS"):
        text = pattern.sub(lambda m: f"{m[1]}{wanted}\n<!-- end checks -->", text)
        DOCS.write_text(text, "utf-8")
    found = pattern.search(DOCS.read_text("utf-8"))
    assert found is not None and found[2] == wanted


def test_the_page_names_every_command_and_exit_code() -> None:
    text = DOCS.read_text("utf-8")
    missing = [" ".join(words) for words in all_commands() if f"ocp {' '.join(words)}" not in text]
    assert not missing
    for code in ocp.Exit:
        assert f"| {code.value} |" in text

