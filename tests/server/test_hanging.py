"""Claudes that are frozen, silent, babbling or replaced: each costs one turn some seconds, and is
never offered again."""
from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chat import NO_IDLE, ask, content_of, error_of, pieces, question, stream_error
from clock import FakeClock
from http_client import Reply
from processes import is_gone
from project import clean_env, load_script, run_compiled
from server import (
    FAKE_CLAUDE,
    Place,
    Server,
    asked_process,
    health,
    running_server,
    spares,
)
from waiting import eventually, in_parallel, stays

ocp = load_script("ocp_server.py")

Json = Any
SONNET = "claude-sonnet-5-5"
#: What a claude may do instead of its work, in steps of the fake one.
ILLS: dict[str, Json] = {
    "frozen": {"freeze": True},
    "silent": {"mute": True},
    "deaf": {"hang": True, "stubborn": True},
    "babbling slowly": {"babble": "what?\n", "pause_ms": 50},
    "babbling JSON": {"babble": '{"type":"noise"}\n', "pause_ms": 50},
    "flooding": {"babble": "what?\n"},
    "endless line": {"babble": "what? "},
    "flooding stderr": {"babble": "what?\n", "on": 2},
}
each_ill = pytest.mark.parametrize("name", ILLS)


# ---------------------------------------------------------------------------
# One process
# ---------------------------------------------------------------------------

class Nobody:
    """A client that waits and never leaves."""

    def __init__(self) -> None:
        self._ends = os.pipe()

    def fileno(self) -> int:
        return self._ends[0]

    def gone(self) -> bool:
        return False

    def can_detect_hangup(self) -> bool:
        return True

    def close(self) -> None:
        for end in self._ends:
            os.close(end)


class Patient:
    """One process of the fake claude, spoken to without a server."""

    def __init__(self, place: Place) -> None:
        environ = clean_env(
            HOME=str(place.home), FAKE_CLAUDE=str(place.scenario),
            FAKE_CLAUDE_LOG=str(place.fake_log))
        self.client = Nobody()
        command = [sys.executable, "-I", "-S", *run_compiled(FAKE_CLAUDE)]
        child = ocp.Child(
            [*command, *ocp.claude_arguments(SONNET, ocp.load_config(environ))],
            env=environ, cwd=str(place.folder))
        self.process = ocp.ClaudeProcess(child, SONNET, version=(2, 1, 329))

    def answer(self, **steps: Json) -> list[Any]:
        """The events of an answer. Raises what becomes of it."""
        watch = ocp.WaitLimits(self.client, time.monotonic() + 100, 0.0)
        line = ocp.message_line(ocp.Message("user", ocp.text_blocks("hi")), (2, 1, 329), ask=True)
        first = ocp.control_line("initialize", systemPrompt=[], hooks=None)
        script = ocp.TurnInput([first + line])
        return list(self.process.converse(script, watch, ocp.TurnReader()))

    def close(self) -> None:
        self.process.stop(graceful=False)
        eventually(self.process.is_gone)
        self.client.close()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    found = Place(tmp_path)
    found.prepare()
    return found


@pytest.fixture
def patient(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Patient]]:
    """Makes a process that gets a second to answer, and four megabytes to say it."""
    monkeypatch.setattr(ocp, "_REPLY_TIMEOUT_S", 1.0)
    monkeypatch.setattr(ocp, "_MAX_START_S", 0.0)
    monkeypatch.setattr(ocp, "_MAX_CLAUDE_LINE_BYTES", 4 * 1024 * 1024)
    monkeypatch.setattr(ocp, "_END_GRACE_S", 0.2)
    made: list[Patient] = []

    def make() -> Patient:
        made.append(Patient(place))
        return made[-1]

    yield make
    for each in made:
        each.close()


def check_broken(patient: Patient) -> None:
    """Asserts that it is given up on, and for good."""
    with pytest.raises(ocp.UpstreamFailed):
        patient.answer()

    assert patient.process.broken and not patient.process.alive()


@pytest.mark.few_cases
@each_ill
def test_a_process_that_is_ill_from_its_start_is_given_up(
    place: Place, patient: Callable[[], Patient], name: str
) -> None:
    place.write_scenario([], startup=[ILLS[name]])

    check_broken(patient())


@pytest.mark.few_cases
@each_ill
def test_a_process_that_falls_ill_in_a_turn_is_given_up(
    place: Place, patient: Callable[[], Patient], name: str
) -> None:
    place.write_scenario([[ILLS[name]]])

    check_broken(patient())


@pytest.mark.slow
def test_a_process_that_waits_for_the_api_is_not_given_up(
    place: Place, patient: Callable[[], Patient], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So slow that a busy machine does not matter, and still less than the wait.
    monkeypatch.setattr(ocp, "_REPLY_TIMEOUT_S", 5.0)
    place.write_scenario([[{"sleep_ms": 11_000}, {"say": "late"}]])

    events = patient().answer()

    assert [event.text for event in events if isinstance(event, ocp.Delta)] == ["late"]


def test_a_process_that_waits_is_ended_when_it_babbles(
    place: Place, patient: Callable[[], Patient]
) -> None:
    place.write_scenario([], startup=[ILLS["flooding"]])
    idle = patient().process

    def looked_after() -> bool:
        idle.drain_output()
        return not idle.alive()

    assert eventually(looked_after)


def test_a_flood_takes_a_bounded_memory(place: Place, patient: Callable[[], Patient]) -> None:
    place.write_scenario([], startup=[ILLS["endless line"]])
    patients = [patient() for _ in range(3)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    for each in patients:
        check_broken(each)

    # Kilobytes: three times four megabytes, and as much again while they grow.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000


@pytest.mark.exhaustive
def test_a_slow_start_is_no_hanging_one(
    place: Place, patient: Callable[[], Patient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocp, "_MAX_START_S", 60.0)
    busy = "import time\nend_s = time.monotonic() + 4\nwhile time.monotonic() < end_s: pass\n"
    slow = place.folder / "slow.py"
    slow.write_text(busy + run_compiled(FAKE_CLAUDE)[1])
    monkeypatch.setattr(sys.modules[__name__], "run_compiled", lambda script: [str(slow)])

    assert patient().answer()


def test_the_socket_of_a_killed_process_is_removed(
    place: Place, patient: Callable[[], Patient], monkeypatch: pytest.MonkeyPatch
) -> None:
    sockets = place.folder / "cc-socks"
    sockets.mkdir()
    monkeypatch.setattr(ocp, "leftover_paths", lambda pid, *_: [str(sockets / f"{pid}.sock")])
    process = patient().process
    left = sockets / f"{process.pid}.sock"
    left.touch()
    (sockets / "1.sock").touch()

    os.kill(process.pid, signal.SIGKILL)

    assert eventually(process.is_gone)
    assert os.listdir(sockets) == ["1.sock"]


# ---------------------------------------------------------------------------
# A server
# ---------------------------------------------------------------------------

def started(server: Server) -> list[int]:
    """The pids of the processes that were started to answer."""
    return [each["pid"] for each in server.fake_log("start") if each["argv"][:1] == ["-p"]]


def spare(server: Server) -> int:
    """The pid of the process that waits, once it does."""
    eventually(lambda: spares(server) == {SONNET: 1})
    return eventually(lambda: started(server))[-1]


def check_gone(pid: int) -> None:
    assert eventually(lambda: is_gone(pid))


def next_turn(reply: Reply, text: str) -> list[Json]:
    return [{"role": "user", "content": "hi"},
            {"role": "assistant", "content": content_of(reply)},
            {"role": "user", "content": text}]


@pytest.mark.slow
def test_a_frozen_spare_and_a_frozen_conversation_cost_one_turn_some_seconds(
    tmp_path: Path,
) -> None:
    with running_server(tmp_path / "a") as one, running_server(tmp_path / "b") as other:
        frozen_spare = spare(one)
        os.kill(frozen_spare, signal.SIGSTOP)
        first = ask(other)
        frozen_parked = asked_process(other)
        os.kill(frozen_parked, signal.SIGSTOP)

        replies = in_parallel([
            lambda: ask(one, stream=True),
            lambda: ask(other, messages=next_turn(first, "and now?"))])

        assert "".join(pieces(replies[0].events)) == "You said: hi"
        assert content_of(replies[1]) == "You said: and now?"
        for server, pid in ((one, frozen_spare), (other, frozen_parked)):
            check_gone(pid)
            assert server.queries()[-1]["pid"] != pid
            assert health(server)["stats"]["errors"] == 0


@pytest.mark.exhaustive
def test_a_process_that_hangs_at_its_start_is_replaced_and_two_are_an_error(
    tmp_path: Path,
) -> None:
    mute = {"startup": [ILLS["silent"]]}
    with running_server(tmp_path / "a", mute) as one, \
            running_server(tmp_path / "b", mute, env=NO_IDLE) as other:
        silent = spare(one)
        one.write_scenario([])

        replies = in_parallel([lambda: ask(one), lambda: ask(other)])

        assert content_of(replies[0]) == "You said: hi"
        assert one.queries()[0]["pid"] != silent
        assert (replies[1].status, error_of(replies[1])["code"]) == (502, "upstream_failed")
        assert "hung" in error_of(replies[1])["message"]
        assert len(started(other)) == 2


@pytest.mark.slow
def test_a_process_that_freezes_in_the_middle_of_an_answer_is_told_in_time(
    tmp_path: Path,
) -> None:
    script = [[{"say": "so far"}, ILLS["frozen"]]]
    with running_server(tmp_path, script, env=NO_IDLE) as server:
        reply = ask(server, stream=True)

        assert "".join(pieces(reply.events)) == "so far"
        assert stream_error(reply.events)["code"] == "upstream_failed"
        assert eventually(lambda: is_gone(asked_process(server)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flooding", "endless line", "flooding stderr"])
def test_a_flood_ends_before_anybody_waits_for_long(tmp_path: Path, name: str) -> None:
    with running_server(tmp_path, {"startup": [ILLS[name]]}) as server:
        babbling = spare(server)
        server.write_scenario([])

        assert content_of(ask(server)) == "You said: hi"
        assert server.queries()[0]["pid"] != babbling
        assert eventually(lambda: is_gone(babbling))


# ---------------------------------------------------------------------------
# A program that changes
# ---------------------------------------------------------------------------

def test_a_version_behind_a_notice_is_understood(tmp_path: Path) -> None:
    notice = "npm notice New major version: 10.9.0 -> 11.2.0\n\n"
    with running_server(tmp_path, {"notice": notice, "version": "2.1.330"}) as server:
        assert content_of(ask(server)) == "You said: hi"
        assert health(server)["claudeVersion"] == "2.1.330"


def test_what_is_exchanged_behind_a_script_is_noticed_by_the_first_word(tmp_path: Path) -> None:
    with running_server(tmp_path, {"version": "2.1.329"}) as server:
        before = spare(server)
        server.write_scenario([], version="2.1.400")
        first = ask(server)
        second = ask(server, messages=next_turn(first, "and now?"))

        assert [content_of(each) for each in (first, second)] == [
            "You said: hi", "You said: and now?"]
        assert health(server)["claudeVersion"] == "2.1.400"
        # It was told things as the old one has to be.
        pids = [query["pid"] for query in server.queries()]
        assert pids[0] == before and pids[1] != before
        assert eventually(lambda: is_gone(before))
        third = ask(server, messages=[*next_turn(first, "and now?"), {
            "role": "assistant", "content": content_of(second)}, question("so?")["messages"][0]])
        assert content_of(third) == "You said: so?"
        assert server.queries()[-1]["pid"] == pids[1]


def away(server: Server) -> Path:
    """Takes the program away, as an update does; the path that it has meanwhile."""
    elsewhere = server.place.claude.with_name("away")
    server.place.claude.rename(elsewhere)
    return elsewhere


def test_while_the_program_is_away_conversations_go_on_and_others_come_again(
    tmp_path: Path,
) -> None:
    with running_server(tmp_path) as server:
        first = ask(server)
        waiting = spare(server)
        elsewhere = away(server)
        refused, streamed = ask(server, "new"), ask(server, "new", stream=True)
        on = ask(server, messages=next_turn(first, "and now?"))
        elsewhere.rename(server.place.claude)
        back = ask(server, "new")

        for reply in (refused, streamed):
            assert (reply.status, error_of(reply)["code"]) == (503, "claude_unavailable")
            assert int(reply.headers["Retry-After"]) <= 60
            assert reply.headers["x-should-retry"] is None
        assert content_of(on) == "You said: and now?"
        assert content_of(back) == "You said: new"
        assert server.queries()[1]["pid"] == server.queries()[0]["pid"]
        # The spare of the same claude waited.
        assert waiting in [query["pid"] for query in server.queries()] or not is_gone(waiting)


def test_without_a_program_the_housekeeper_rests(tmp_path: Path) -> None:
    environ = clean_env(
        HOME=str(tmp_path), OCP_HOME=str(tmp_path / "ocp"), TMPDIR=str(tmp_path),
        CLAUDE_BIN=str(tmp_path / "nothing"))
    clock = FakeClock()
    app = ocp.App(
        ocp.load_config(environ), ocp.Environment(environ, "", {}), log=ocp.Log(None, "error"),
        models=ocp.Models(ocp.BUILTIN_MODELS), clock=clock)
    app.pool.mark_used(ocp.ProcessKind(SONNET))

    pauses = []
    for _ in range(5):
        pauses.append(app.tend())
        clock.advance(pauses[-1])

    app.close()
    assert pauses == [1.0] * 5


def test_a_login_that_is_regained_is_seen_without_a_request(tmp_path: Path) -> None:
    error = {"status": 401, "word": "authentication_failed", "text": "no"}
    with running_server(tmp_path, [[{"api_error": error}]]) as server:
        ask(server)
        lost = server.call("GET", "/ready").status
        asked = len(server.queries())
        server.write_scenario([])
        credentials = server.home / ".claude" / ".credentials.json"
        credentials.parent.mkdir(exist_ok=True)
        credentials.write_text("{}")

        assert lost == 503
        assert eventually(lambda: server.call("GET", "/ready").status == 200)
        assert len(server.queries()) == asked
        assert health(server)["auth"]["ok"] is None


def test_the_credentials_of_claude_are_looked_at_but_never_opened(tmp_path: Path) -> None:
    credentials = Place(tmp_path).home / ".claude" / ".credentials.json"
    credentials.parent.mkdir(parents=True)
    # Whoever opens it waits for a writer, and is there when one comes.
    os.mkfifo(credentials)
    error = {"status": 401, "word": "authentication_failed", "text": "no"}
    with running_server(tmp_path, [[{"api_error": error}]]) as server:
        ask(server)
        lost = server.call("GET", "/ready").status
        server.write_scenario([])
        os.utime(credentials)

        assert lost == 503
        assert eventually(lambda: server.call("GET", "/ready").status == 200)
        assert content_of(ask(server))
        with pytest.raises(OSError, match="No such device or address"):
            os.open(credentials, os.O_WRONLY | os.O_NONBLOCK)


def test_credentials_that_are_no_login_change_nothing(tmp_path: Path) -> None:
    error = {"status": 401, "word": "authentication_failed", "text": "no"}
    with running_server(tmp_path, [[{"api_error": error}]]) as server:
        ask(server)
        server.write_scenario([], logged_in=False)
        (server.home / ".claude").mkdir(exist_ok=True)
        (server.home / ".claude" / ".credentials.json").write_text("{}")

        eventually(lambda: [e for e in server.fake_log("start") if e["argv"][:1] == ["auth"]])
        assert stays(lambda: server.call("GET", "/ready").status, 1.0) == 503
