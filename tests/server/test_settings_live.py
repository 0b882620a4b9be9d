"""Settings that are changed while the server runs: what they take, where they come from, what
they do at once, and that they last."""
from __future__ import annotations

import dataclasses
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Optional

import pytest

from chat import CHAT_PATH, HANG, NO_IDLE, ask, content_of, encoded, error_of, question, stream_chat
from http_client import Reply
from project import load_script
from raw_http import RawConnection, post
from server import Place, Server, at_rest, running, running_server, spares, waiting
from waiting import eventually, in_parallel

ocp = load_script("ocp_server.py")

Json = Any

ROWS = ocp.live_settings()
FLAGS = sorted(name for name, row in ROWS.items() if isinstance(row.default, bool))
TEXTS = sorted(name for name, row in ROWS.items() if isinstance(row.default, str))
NUMBERS = sorted(set(ROWS) - set(FLAGS) - set(TEXTS))


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for all tests, which leave it as they found it."""
    env = {**NO_IDLE, "OCP_WARM_TOTAL": "0"}
    with running_server(tmp_path_factory.mktemp("shared"), env=env) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """A server with the settings of its start, and a claude that repeats what it hears."""
    shared_server.write_scenario([])
    # Of the test before; its clients have left.
    assert eventually(lambda: at_rest(shared_server))
    yield shared_server
    assert patch(shared_server, dict.fromkeys(ROWS)).status == 200


def patch(server: Server, body: Json) -> Reply:
    return server.call("PATCH", "/settings", body)


def settings_of(server: Server) -> dict[str, dict[str, Json]]:
    found: dict[str, dict[str, Json]] = server.call("GET", "/settings").json()
    return found


def in_force(server: Server, name: str) -> tuple[Json, str]:
    """The value of a setting, and where it comes from."""
    entry = settings_of(server)[name]
    return entry["value"], entry["source"]


def set_to(server: Server, **values: Json) -> None:
    reply = patch(server, values)
    assert reply.status == 200, reply


def database_of(folder: Path) -> Path:
    return Place(folder).ocp_home / "ocp.db"


def stored(folder: Path) -> dict[str, str]:
    """What the database of a server holds, as it stands there."""
    with closing(sqlite3.connect(str(database_of(folder)))) as connection:
        return dict(connection.execute("SELECT name, value FROM settings").fetchall())


# ---------------------------------------------------------------------------
# Every row
# ---------------------------------------------------------------------------

def test_every_setting_that_can_be_changed_is_described(server: Server) -> None:
    told_ = settings_of(server)

    assert list(told_) == list(ROWS)
    for name, row in ROWS.items():
        known = {each: told_[name][each] for each in told_[name]
                 if each not in ("value", "text", "source")}
        assert known == {
            "type": {bool: "boolean", int: "number", str: "string"}[type(row.default)],
            "min": row.metadata["minimum"],
            "max": row.metadata["maximum"], "unit": row.metadata["unit"],
            "desc": row.metadata["help"],
            "default": ocp.default_of(row, ocp.machine_memory_bytes()), "env": row.metadata["env"],
            "secret": row.metadata["secret"],
        }


@pytest.mark.parametrize("wanted", [
    "timeout", "maxConcurrent", "maxQueue", "cacheTTL", "cacheMaxBytes", "cacheSampled",
    "sessionTTL", "maxPromptChars", "warmProcesses", "warmIdleMs", "parkedProcesses",
    "sessionId", "writeTimeout", "usageDays",
])
def test_this_setting_can_be_changed_while_the_server_runs(wanted: str) -> None:
    assert wanted in ROWS


def test_the_only_secret_that_can_be_changed_is_an_address_whose_host_may_be_shown() -> None:
    secret = [row for row in ROWS.values() if row.metadata["secret"]]

    assert [row.metadata["live"] for row in secret] == ["alertUrl"]
    assert [ocp.shown_value(secret[0], value) for value in (
        "", "https://name:pass@hooks.example.org:8443/s3cret?token=s3cret",
    )] == ["", "hooks.example.org:8443 (secret)"]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_takes_both_ends_of_its_range_and_goes_back_with_null(
    server: Server, name: str
) -> None:
    before = in_force(server, name)

    for end in ("minimum", "maximum"):
        value = ROWS[name].metadata[end]
        reply = patch(server, {name: value})
        assert reply.status == 200
        assert reply.json()["results"] == {name: {"ok": True, "value": value}}
        assert "errors" not in reply.json()
        assert (reply.json()["current"][name]["value"],
                reply.json()["current"][name]["source"]) == (value, "stored")
        assert in_force(server, name) == (value, "stored")
    reply = patch(server, {name: None})

    assert reply.json()["results"] == {name: {"ok": True, "value": before[0]}}
    assert in_force(server, name) == before


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_switched_on_and_off_and_back(server: Server, name: str) -> None:
    before = in_force(server, name)

    for value in (True, False):
        assert patch(server, {name: value}).json()["results"][name] == {"ok": True, "value": value}
        assert in_force(server, name) == (value, "stored")
    set_to(server, **{name: None})

    assert in_force(server, name) == before


def assert_refused(server: Server, name: str, value: Json, *words: str) -> None:
    """A change to this value is refused with these words in the error, and changes nothing."""
    before = settings_of(server)
    reply = patch(server, {name: value})
    assert reply.status == 400, reply
    told_ = reply.json()
    assert list(told_["results"]) == [name] and list(told_["results"][name]) == ["error"]
    assert told_["errors"] == [f"{name}: {told_['results'][name]['error']}"]
    assert told_["current"] == before == settings_of(server)
    for word in words:
        assert word in told_["results"][name]["error"]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_its_range_is_refused_and_told_the_range(
    server: Server, name: str
) -> None:
    least, most = ROWS[name].metadata["minimum"], ROWS[name].metadata["maximum"]

    for value in (least - 1, most + 1, -10**15, 10**15):
        assert_refused(server, name, value, f"from {least} to {most}")


@pytest.mark.parametrize("value", [10**18, 10**300, -10**300, 1e30, 1e300],
                         ids=["18", "300", "minus", "point", "more"])
def test_a_number_beyond_all_measure_is_out_of_range_too(server: Server, value: Json) -> None:
    assert_refused(server, "maxQueue", value, "from 0 to 1000")


def test_a_number_that_takes_long_to_read_is_no_json(server: Server) -> None:
    reply = patch(server, '{"maxQueue": ' + "9" * 5000 + "}")

    assert reply.status == 400
    assert "too many digits" in error_of(reply)["message"]


@pytest.mark.few_cases
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["2000", "", 1000.5, True, False, [2000], {"value": 2000}])
def test_what_is_no_number_is_refused_for_one(server: Server, name: str, value: Json) -> None:
    assert_refused(server, name, value, "must be a whole number")


@pytest.mark.parametrize(("name", "text", "value"), [
    ("sessionTTL", "2h", 7_200_000), ("timeout", "90s", 90_000), ("queueRetryAfter", "1m", 60),
    ("usageDays", "30d", 30),
])
def test_a_duration_may_be_written_with_its_unit(
    server: Server, name: str, text: str, value: int
) -> None:
    assert patch(server, {name: text}).json()["results"] == {name: {"ok": True, "value": value}}
    row = server.call("GET", "/settings").json()[name]
    assert (row["value"], row["source"]) == (value, "stored")
    assert ocp.parse_duration_ms(row["text"]) == ocp.parse_duration_ms(text)


@pytest.mark.few_cases
@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [1, 0, "true", "", 1.0, [], {}])
def test_what_is_not_true_or_false_is_refused_for_a_flag(
    server: Server, name: str, value: Json
) -> None:
    assert_refused(server, name, value, "must be true or false")


def test_a_number_may_be_written_with_a_point_if_it_is_whole(server: Server) -> None:
    reply = patch(server, b'{"maxQueue": 7.0, "timeout": 6e4}')

    values = {name: each["value"] for name, each in reply.json()["results"].items()}
    assert (reply.status, values) == (200, {"maxQueue": 7, "timeout": 60_000})
    assert all(isinstance(value, int) for value in values.values())


@pytest.mark.few_cases
@pytest.mark.parametrize("name", [
    "nothing", "", "max_concurrent", "maxconcurrent", "CLAUDE_TIMEOUT", "port", "bind", "authMode",
    "apiKey", "PROXY_API_KEY", "__class__",
])
@pytest.mark.parametrize("value", [5, None])
def test_a_setting_that_cannot_be_changed_is_refused_and_told_which_can(
    server: Server, name: str, value: Json
) -> None:
    assert_refused(server, name, value, "unknown setting", *ROWS)


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"5", b'"timeout"', b"{", b"[{}]"])
def test_a_body_that_is_no_object_is_refused(server: Server, body: bytes) -> None:
    reply = patch(server, body)

    assert reply.status == 400
    assert error_of(reply)["type"] == "invalid_request_error"


def test_a_change_of_nothing_is_fine(server: Server) -> None:
    reply = patch(server, {})

    assert reply.status == 200
    assert reply.json() == {"results": {}, "current": settings_of(server)}


def test_of_several_changes_those_that_can_be_are_made(server: Server) -> None:
    reply = patch(server, {"timeout": 1, "maxQueue": 3, "nothing": 1, "cacheTTL": 500})

    results = reply.json()["results"]
    assert reply.status == 207
    assert list(results) == ["timeout", "maxQueue", "nothing", "cacheTTL"]
    assert [list(each) for each in results.values()] == [
        ["error"], ["ok", "value"], ["error"], ["ok", "value"]]
    assert [line.partition(":")[0] for line in reply.json()["errors"]] == ["timeout", "nothing"]
    assert (in_force(server, "maxQueue"), in_force(server, "cacheTTL")) == (
        (3, "stored"), (500, "stored"))
    assert in_force(server, "timeout") == (600_000, "default")


def test_a_change_leaves_a_line_that_says_who_made_it_and_a_refusal_none(server: Server) -> None:
    count = len(server.log_entries("setting_changed"))

    patch(server, {"maxQueue": 4, "timeout": 1})

    [entry] = server.log_entries("setting_changed")[count:]
    told_ = {name: entry[name] for name in ("setting", "value", "by", "peer", "level")}
    assert told_ == {"setting": "maxQueue", "value": 4, "by": "local", "peer": "127.0.0.1",
                     "level": "info"}


def test_changes_at_once_are_all_made(server: Server) -> None:
    values = {"maxQueue": 11, "timeout": 70_000, "cacheTTL": 90, "queueRetryAfter": 6}

    in_parallel([lambda pair=pair: set_to(server, **dict([pair])) for pair in values.items()])

    assert {name: in_force(server, name)[0] for name in values} == values


# ---------------------------------------------------------------------------
# Where a value comes from
# ---------------------------------------------------------------------------

def test_what_is_stored_beats_the_environment_which_beats_the_default(tmp_path: Path) -> None:
    env = {**NO_IDLE, "CLAUDE_TIMEOUT": "50000", "OCP_CACHE_SAMPLED": "0"}
    with running_server(tmp_path, env=env) as server:
        seen = [in_force(server, "timeout")]
        for value in (40_000, 50_000, None):
            set_to(server, timeout=value)
            seen.append(in_force(server, "timeout"))
        others = (in_force(server, "maxQueue"), in_force(server, "cacheSampled"))

    assert seen == [(50_000, "environment"), (40_000, "stored"), (50_000, "stored"),
                    (50_000, "environment")]
    assert others == ((16, "default"), (False, "environment"))


def test_a_value_of_the_settings_file_or_of_an_option_names_that_as_its_source() -> None:
    sources = {"CLAUDE_MAX_QUEUE": "/home/owner/.ocp/ocp.env", "CLAUDE_TIMEOUT": "--option"}
    environ = {**dict.fromkeys(sources, "9"), "OCP_CACHE_SAMPLED": "0"}
    environment = ocp.Environment(environ, "/home/owner/.ocp/ocp.env", sources)
    report = ocp.Settings(ocp.Store(":memory:"), ocp.Config(), environment).report()

    assert [report[name]["source"] for name in ("maxQueue", "timeout", "cacheSampled")] == [
        "ocp.env", "--option", "environment"]


def test_what_is_stored_lasts_over_a_restart_and_another_environment(tmp_path: Path) -> None:
    with running_server(tmp_path, env=NO_IDLE) as server:
        set_to(server, timeout=45_000, maxConcurrent=3, cacheSampled=False, maxQueue=9)
        set_to(server, maxQueue=None)
        server.kill()
    env = {**NO_IDLE, "CLAUDE_TIMEOUT": "50000", "CLAUDE_MAX_QUEUE": "8"}
    with running_server(tmp_path, env=env) as server:
        seen = {name: in_force(server, name)
                for name in ("timeout", "maxConcurrent", "cacheSampled", "maxQueue")}
        health = server.call("GET", "/health").json()["concurrency"]

    assert seen == {"timeout": (45_000, "stored"), "maxConcurrent": (3, "stored"),
                    "cacheSampled": (False, "stored"), "maxQueue": (8, "environment")}
    assert (health["maxConcurrent"], health["maxQueue"]) == (3, 8)


#: What a database may hold that is of no use any more, and what the log says about it.
USELESS = {
    "timeout": ("5", "from 1000 to 3600000"),
    "maxQueue": ('"many"', "must be a whole number"),
    "cacheSampled": ("1", "must be true or false"),
    "warmTotal": ("{", ""),
    "turboMode": ("true", "no such setting"),
}


def put_into(folder: Path, rows: Mapping[str, str]) -> None:
    """Settings in the database of a server that does not run."""
    database_of(folder).parent.mkdir(parents=True, mode=0o700)
    with closing(ocp.Store(str(database_of(folder)))) as store, store.transaction() as connection:
        connection.executemany("INSERT INTO settings VALUES (?, ?)", rows.items())


def test_what_is_stored_and_of_no_use_is_ignored_with_a_warning(tmp_path: Path) -> None:
    put_into(tmp_path, {**{name: value for name, (value, _) in USELESS.items()},
                        "maxConcurrent": "3"})

    with running_server(tmp_path, env={**NO_IDLE, "CLAUDE_MAX_QUEUE": "8"}) as server:
        warned = {entry["setting"]: entry for entry in server.log_entries("stored_setting_ignored")}
        seen = {name: in_force(server, name)
                for name in ("timeout", "maxQueue", "cacheSampled", "warmTotal", "maxConcurrent")}

    assert set(warned) == set(USELESS)
    assert {entry["level"] for entry in warned.values()} == {"warn"}
    assert seen == {
        "timeout": (600_000, "default"), "maxQueue": (8, "environment"),
        "cacheSampled": (True, "default"),
        "warmTotal": (ocp.spare_places(ocp.machine_memory_bytes()), "follows memory"),
        "maxConcurrent": (3, "stored")}


@pytest.mark.parametrize("name", [name for name, (_, why) in USELESS.items() if why])
def test_the_warning_says_what_is_wrong_with_it(tmp_path: Path, name: str) -> None:
    value, why = USELESS[name]
    put_into(tmp_path, {name: value})

    with closing(ocp.Store(str(database_of(tmp_path)))) as store:
        problems = dict(ocp.Settings(store, ocp.Config(), ocp.Environment({}, "", {})).problems)

    assert why in problems[name]


@pytest.mark.parametrize("value", [70_000, None])
def test_a_useless_value_is_gone_once_the_setting_is_changed(
    tmp_path: Path, value: Optional[int]
) -> None:
    put_into(tmp_path, {"timeout": "5"})

    with running_server(tmp_path, env=NO_IDLE) as server:
        set_to(server, timeout=value)

    assert stored(tmp_path) == ({"timeout": "70000"} if value else {})


# ---------------------------------------------------------------------------
# Rules across settings, and databases that take nothing
# ---------------------------------------------------------------------------

@pytest.fixture
def ruled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule across two settings."""
    rule = (lambda config: config.max_queue < config.max_concurrent, "maxQueue is too small for it")
    monkeypatch.setattr(ocp, "CONFIG_RULES", (*ocp.CONFIG_RULES, rule))


@pytest.mark.usefixtures("ruled")
def test_a_change_that_breaks_a_rule_across_settings_is_refused(store: Any) -> None:
    settings = ocp.Settings(store, ocp.Config(), ocp.Environment({}, "", {}))

    with pytest.raises(ValueError, match="too small for it"):
        settings.change("maxConcurrent", 17)

    assert settings.config == ocp.Config()
    assert store.rows("SELECT * FROM settings") == []
    settings.change("maxQueue", 17)
    settings.change("maxConcurrent", 17)
    with pytest.raises(ValueError, match="too small for it"):
        settings.change("maxQueue", None)
    assert (settings.config.max_queue, settings.config.max_concurrent) == (17, 17)


@pytest.mark.usefixtures("ruled")
def test_what_is_stored_and_breaks_a_rule_is_ignored_with_the_rule(store: Any) -> None:
    with store.transaction() as connection:
        connection.execute("INSERT INTO settings VALUES ('maxConcurrent', '20')")

    settings = ocp.Settings(store, ocp.Config(), ocp.Environment({}, "", {}))

    assert settings.config == ocp.Config()
    assert settings.problems == [("maxConcurrent", "maxQueue is too small for it")]


@pytest.mark.usefixtures("ruled")
def test_the_order_in_which_settings_are_stored_breaks_no_rule(store: Any) -> None:
    settings = ocp.Settings(store, ocp.Config(), ocp.Environment({}, "", {}))
    for name, value in (("maxQueue", 40), ("maxConcurrent", 20), ("maxQueue", 30)):
        settings.change(name, value)

    again = ocp.Settings(store, ocp.Config(), ocp.Environment({}, "", {}))

    assert (again.config, again.problems) == (settings.config, [])


@pytest.mark.parametrize("value", [5, None])
def test_nothing_changes_in_a_database_that_is_read_only(store: Any, value: Json) -> None:
    settings = ocp.Settings(store, ocp.Config(), ocp.Environment({}, "", {}))
    settings.change("maxQueue", 9)
    before = settings.config, settings.report()
    store.rows("PRAGMA query_only=1")

    with pytest.raises(sqlite3.Error, match="readonly"):
        settings.change("maxQueue", value)

    assert (settings.config, settings.report()) == before
    store.rows("PRAGMA query_only=0")
    assert ocp.Settings(store, ocp.Config(), ocp.Environment({}, "", {})).config.max_queue == 9


def test_a_disk_that_is_full_is_told_as_such_and_nothing_changes(store: Any) -> None:
    settings = ocp.Settings(store, ocp.Config(), ocp.Environment({}, "", {}))
    pages = store.rows("PRAGMA page_count")[0][0]
    store.rows(f"PRAGMA max_page_count={pages}")

    with pytest.raises(sqlite3.Error, match="disk is full"), store.transaction() as connection:
        connection.execute("INSERT INTO settings VALUES ('maxQueue', ?)", ("9" * 100_000,))

    store.rows("PRAGMA max_page_count=1000000")
    settings.change("maxQueue", 9)
    assert ocp.Settings(store, ocp.Config(), ocp.Environment({}, "", {})).config.max_queue == 9


def test_a_database_that_takes_no_change_is_told_and_nothing_changes(tmp_path: Path) -> None:
    with running_server(tmp_path, env=NO_IDLE) as server:
        set_to(server, maxQueue=9)
        with closing(sqlite3.connect(str(database_of(tmp_path)))) as connection:
            for moment in ("INSERT", "DELETE"):
                connection.execute(f"CREATE TRIGGER no_{moment} BEFORE {moment} ON settings "
                                   "BEGIN SELECT RAISE(ABORT, 'the disk is made of stone'); END")
        before = settings_of(server)
        replies = [patch(server, {"maxQueue": value, "timeout": 60_000}) for value in (5, None)]
        after = settings_of(server)
        works = ask(server).status

    for reply in replies:
        assert reply.status == 503
        assert list(reply.json()["results"]) == ["maxQueue", "timeout"]
        for result in reply.json()["results"].values():
            assert result["error"].startswith("could not be stored: The database cannot be used: "
                                              "the disk is made of stone. Nothing was changed")
    assert (after, works) == (before, 200)


def test_settings_can_be_changed_without_a_folder_to_keep_them(tmp_path: Path) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("")

    with running_server(tmp_path, env={**NO_IDLE, "OCP_HOME": str(blocked / "home")}) as server:
        set_to(server, timeout=60_000)
        seen = in_force(server, "timeout")

    assert seen == (60_000, "stored")


# ---------------------------------------------------------------------------
# What they do at once
# ---------------------------------------------------------------------------

def waiter(server: Server) -> RawConnection:
    """A client that has sent its question and waits."""
    wire = RawConnection(server.port)
    wire.send(post(encoded(question(stream=True))))
    return wire


def test_more_answers_at_a_time_let_those_who_wait_begin(server: Server) -> None:
    server.write_scenario([[{"say": "well "}, HANG]])
    set_to(server, maxConcurrent=1)

    with stream_chat(server), waiter(server) as second, waiter(server) as third:
        eventually(lambda: (running(server), waiting(server)) == (1, 2))
        set_to(server, maxConcurrent=2)
        eventually(lambda: (running(server), waiting(server)) == (2, 1))
        set_to(server, maxConcurrent=None)
        begun = {wire.status_line() for wire in (second, third)}

    assert begun == {"HTTP/1.1 200 OK"}


def test_fewer_answers_at_a_time_end_none_that_runs(server: Server) -> None:
    server.write_scenario([[{"say": "well "}, HANG]])

    with stream_chat(server) as first, stream_chat(server):
        set_to(server, maxConcurrent=1)
        with waiter(server):
            assert eventually(lambda: (running(server), waiting(server)) == (2, 1))
            first.close()
            assert eventually(lambda: (running(server), waiting(server)) == (1, 1))


def test_a_shorter_queue_turns_the_next_one_away_as_told(server: Server) -> None:
    server.write_scenario([[{"say": "well "}, HANG]])
    set_to(server, maxConcurrent=1, maxQueue=0, queueRetryAfter=7)

    with stream_chat(server):
        reply = ask(server)

    assert (reply.status, reply.headers["Retry-After"]) == (429, "7")


def cache_words(server: Server, text: str, times: int, **fields: Json) -> list[str]:
    return [str(ask(server, text, **fields).headers["X-OCP-Cache"]) for _ in range(times)]


def test_the_cache_is_switched_on_and_off(server: Server) -> None:
    seen = [cache_words(server, "cached?", 2)]
    set_to(server, cacheTTL=60_000)
    seen.append(cache_words(server, "cached?", 2))
    set_to(server, cacheTTL=0)
    seen.append(cache_words(server, "cached?", 2))

    assert seen == [["bypass"] * 2, ["miss", "hit"], ["bypass"] * 2]
    assert server.call("GET", "/cache/stats").json()["entries"] == 0


def test_a_smaller_cache_forgets_at_once(server: Server) -> None:
    set_to(server, cacheTTL=60_000, cacheMaxBytes=1_000_000)
    for number in range(5):
        ask(server, f"{number} " + "x" * 20_000)
    before = server.call("GET", "/cache/stats").json()

    set_to(server, cacheMaxBytes=65_536)

    after = server.call("GET", "/cache/stats").json()
    assert (before["entries"], before["sizeBytes"] > 100_000) == (5, True)
    assert (after["entries"], after["sizeBytes"] <= 65_536, after["maxBytes"]) == (3, True, 65_536)


def test_answers_that_were_sampled_are_kept_or_not(server: Server) -> None:
    fields = {"model": "claude-haiku-4-5", "temperature": 0.7}
    set_to(server, cacheTTL=60_000)
    seen = [cache_words(server, "sampled?", 2, **fields)]
    set_to(server, cacheSampled=False)
    seen.append(cache_words(server, "sampled?", 1, **fields))

    assert seen == [["miss", "hit"], ["bypass"]]


def test_a_shorter_time_holds_for_the_next_request(server: Server) -> None:
    server.write_scenario([[HANG]])
    set_to(server, timeout=1000)
    started_s = time.monotonic()

    reply = ask(server)

    assert (reply.status, error_of(reply)["code"]) == (504, "timeout")
    # Unchanged it would be ten minutes.
    assert 0.9 < time.monotonic() - started_s < 25


def test_comments_in_a_silent_stream_come_as_often_as_told(server: Server) -> None:
    server.write_scenario([[{"say": "well "}, HANG]])
    set_to(server, heartbeatInterval=50)

    started_s = time.monotonic()
    with waiter(server) as wire:
        wire.hear(b"well ")
        wire.hear(b": keepalive", wire.said.count(b": keepalive") + 6)
        elapsed_s = time.monotonic() - started_s

    # Each after 50 ms of silence, also before the first word; untold, six would take 90 s.
    assert 0.05 * wire.said.count(b": keepalive") <= elapsed_s < 60


def test_a_body_may_be_as_large_as_told(server: Server) -> None:
    text = "x" * 2000
    set_to(server, maxBodySize=1024)
    small = ask(server, text).status
    set_to(server, maxBodySize=None)

    assert (small, ask(server, text).status) == (413, 200)


def test_a_prompt_may_be_as_long_as_told(server: Server) -> None:
    set_to(server, maxPromptChars=100)

    reply = ask(server, "x" * 200)

    assert (reply.status, error_of(reply)["code"]) == (400, "context_length_exceeded")


def test_spares_are_kept_and_dropped_as_told(server: Server) -> None:
    set_to(server, warmTotal=2, warmProcesses=2)
    content_of(ask(server))
    assert eventually(lambda: spares(server) == {"claude-sonnet-5-5": 2})

    set_to(server, warmProcesses=1)
    assert eventually(lambda: spares(server) == {"claude-sonnet-5-5": 1})

    set_to(server, warmTotal=0)
    assert eventually(lambda: spares(server) == {})


@pytest.mark.slow
def test_spares_are_dropped_when_they_have_waited_as_long_as_told(server: Server) -> None:
    set_to(server, warmTotal=2, warmProcesses=1)
    content_of(ask(server))
    eventually(lambda: spares(server) != {})

    set_to(server, warmIdleMs=1000)

    assert eventually(lambda: spares(server) == {})


def test_conversations_are_parked_and_dropped_as_told(server: Server) -> None:
    set_to(server, parkedProcesses=2)
    content_of(ask(server))
    assert server.call("GET", "/health").json()["parked"] == 1

    set_to(server, parkedProcesses=0)

    assert eventually(lambda: server.call("GET", "/health").json()["parked"] == 0)


def test_names_of_sessions_that_others_use_are_taken_from_now_on(server: Server) -> None:
    header = {"X-Session-Id": "from-the-header"}
    server.call("POST", CHAT_PATH, question(), header)
    server.call("POST", CHAT_PATH, question(session_id="from-the-body"), header)
    before = server.call("GET", "/sessions").json()["sessions"]

    set_to(server, sessionId=True)
    server.call("POST", CHAT_PATH, question(), header)
    server.call("POST", CHAT_PATH, question(session_id="from-the-body"), header)
    server.call("POST", CHAT_PATH, question(session_id="theirs", ocp_session_id="own"), header)

    after = server.call("GET", "/sessions").json()["sessions"]
    assert before == []
    assert {each["id"] for each in after} == {"from-the-header", "from-the-body", "own"}
    assert server.call("DELETE", "/sessions").json() == {"cleared": 3}


def test_every_live_setting_names_a_field_that_the_server_has() -> None:
    fields = {field.name for field in dataclasses.fields(ocp.Config)}

    assert {row.name for row in ROWS.values()} <= fields
    assert json.loads(json.dumps(list(ROWS))) == list(ROWS)
