"""Ends: clients that leave, servers that stop or are killed, queues that overflow, spares.

Whatever happens, no process, no slot and no zombie stays behind."""
from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chat import (
    CHAT_PATH,
    HANG,
    NO_IDLE,
    ask,
    both_ways,
    content_of,
    encoded,
    error_of,
    finish_reasons,
    pieces,
    question,
    stream_chat,
)
from http_client import Reply
from processes import cpu_s, is_dead, is_gone, of_process, processes_with
from project import REPO
from raw_http import RawConnection, head, post
from server import (
    Place,
    Server,
    asked_process,
    at_rest,
    health,
    last_entry,
    running,
    running_server,
    spares,
    waiting,
)
from shell_claude import ShellClaude
from waiting import SOON_S, eventually, in_parallel, stays

Json = Any

SONNET = "claude-sonnet-5-5"


@pytest.fixture(scope="module")
def shared_common(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two places."""
    env = {**NO_IDLE, "CLAUDE_MAX_CONCURRENT": "2"}
    with running_server(tmp_path_factory.mktemp("common"), env=env) as running_one:
        yield running_one


@pytest.fixture
def common(shared_common: Server) -> Server:
    """That server, with nothing of the test before."""
    assert eventually(lambda: at_rest(shared_common))
    return shared_common


def waiter(server: Server, text: str = "hi", *, stream: bool) -> RawConnection:
    """A client that has sent its question and waits."""
    wire = RawConnection(server.port)
    wire.send(post(encoded(question(text, stream=stream))))
    return wire


def next_process(server: Server, count: int) -> int:
    """The pid of the claude that is asked next after so many questions."""
    return asked_process(server, count + 1)


def is_over(server: Server, pid: int) -> Callable[[], bool]:
    """Whether a turn has left nothing: no process, no zombie, no slot."""
    return lambda: is_gone(pid) and at_rest(server)


def check_over(server: Server, pid: int) -> None:
    """Asserts that a turn is over soon, by the first signal: the second one leaves no word."""
    assert eventually(is_over(server, pid), SOON_S)
    assert [each["why"] for each in server.fake_log("exit") if each["pid"] == pid] == ["SIGINT"]


# ---------------------------------------------------------------------------
# Clients that leave
# ---------------------------------------------------------------------------

@both_ways
def test_a_client_that_leaves_before_the_first_token_ends_its_turn(
    common: Server, stream: bool
) -> None:
    common.write_scenario([[HANG]])
    count = len(common.queries())

    with waiter(common, stream=stream):
        pid = next_process(common, count)

    check_over(common, pid)


@both_ways
def test_a_client_that_leaves_in_the_middle_ends_its_turn(common: Server, stream: bool) -> None:
    common.write_scenario([[{"say": "so far"}, HANG]])
    count, noted = len(common.queries()), len(common.log_entries("answer_abandoned"))

    with RawConnection(common.port) as wire:
        # A model of its own, because the test before may be logged only now.
        wire.send(post(encoded(question(model="opus", stream=stream))))
        pid = next_process(common, count)
        if stream:
            assert wire.status_line() == "HTTP/1.1 200 OK"

    check_over(common, pid)
    (entry,) = eventually(lambda: [
        each for each in common.log_entries("answer_abandoned")[noted:]
        if each["model"] == "claude-opus-5-5"])
    assert entry["stream"] is stream


def test_a_client_that_leaves_amid_many_deltas_ends_its_turn(common: Server) -> None:
    # It goes on for far longer than the client stays.
    common.write_scenario([[step for _ in range(3000) for step in (
        {"say": "word "}, {"sleep_ms": 20})]])
    count = len(common.queries())

    with stream_chat(common) as stream:
        next(iter(stream))
        pid = next_process(common, count)

    check_over(common, pid)


def test_a_client_that_sent_its_next_request_already_and_leaves_ends_its_turn(
    common: Server,
) -> None:
    common.write_scenario([[HANG]])
    count = len(common.queries())

    with waiter(common, stream=False) as wire:
        wire.send(head("GET", "/health"))
        pid = next_process(common, count)

    check_over(common, pid)


def test_a_client_that_is_cut_off_ends_its_turn(common: Server) -> None:
    common.write_scenario([[HANG]])
    count = len(common.queries())

    wire = waiter(common, stream=True)
    pid = next_process(common, count)
    # With a linger of nothing, close sends a reset.
    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    wire.hang_up()

    check_over(common, pid)


def test_a_client_that_leaves_while_history_is_laid_down_ends_its_turn(common: Server) -> None:
    common.write_scenario([], start_delay_ms=60_000)
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
                {"role": "user", "content": "three"}]
    started = len(common.fake_log("start"))

    with RawConnection(common.port) as wire:
        wire.send(post(encoded(question(messages=messages))))
        pid = eventually(lambda: common.fake_log("start")[started:])[0]["pid"]

    check_over(common, pid)


@both_ways
def test_a_client_that_leaves_the_queue_is_never_asked_about(
    common: Server, stream: bool
) -> None:
    common.write_scenario([[{"say": "busy"}, HANG]])
    count = len(common.queries())

    with stream_chat(common), stream_chat(common):
        eventually(lambda: running(common) == 2)
        queued = waiter(common, "impatient", stream=stream)
        assert eventually(lambda: waiting(common) == 1)
        queued.hang_up()
        assert eventually(lambda: waiting(common) == 0, SOON_S)
    eventually(lambda: at_rest(common))

    asked = [query["messages"][-1]["content"][0]["text"] for query in common.queries()[count:]]
    assert asked == ["hi", "hi"]


def test_a_grandchild_ends_with_its_turn(common: Server) -> None:
    common.write_scenario([[{"spawn_grandchild": True}, {"say": "so far"}, HANG]])
    count = len(common.queries())

    with waiter(common, stream=True) as wire:
        wire.status_line()
        pid = next_process(common, count)
        grandchild = common.fake_log("grandchild")[-1]["child"]

    check_over(common, pid)
    assert eventually(lambda: is_dead(grandchild), SOON_S)


def test_a_grandchild_of_a_complete_answer_ends_too(common: Server) -> None:
    common.write_scenario([[{"spawn_grandchild": True}, {"say": "done"}]])

    assert content_of(ask(common)) == "done"

    grandchild = common.fake_log("grandchild")[-1]["child"]
    assert eventually(lambda: is_dead(grandchild), SOON_S)


@pytest.mark.slow
def test_a_process_that_heeds_no_signal_is_killed(common: Server) -> None:
    common.write_scenario([[{"say": "so far"}, {"hang": True, "stubborn": True}]])
    count = len(common.queries())

    with waiter(common, stream=True) as wire:
        wire.status_line()
        pid = next_process(common, count)

    # Its slot is free at once all the same, while it gets its two seconds.
    seen: list[str] = []

    def both() -> bool:
        for word, is_so in (("free", at_rest(common)), ("gone", is_gone(pid))):
            if is_so and word not in seen:
                seen.append(word)
        return len(seen) == 2

    assert eventually(both) and seen == ["free", "gone"]
    assert eventually(is_over(common, pid))


@pytest.mark.slow
def test_a_process_is_seen_to_its_end_when_claude_is_there_no_more(tmp_path: Path) -> None:
    stubborn = [{"say": "so far"}, {"hang": True, "stubborn": True}]
    with running_server(tmp_path, [stubborn]) as server:
        spare = ready_spare(server)
        with stream_chat(server) as stream:
            next(iter(stream))
            assert asked_process(server) == spare
            another = ready_spare(server, spare)
            server.place.claude.rename(tmp_path / "elsewhere")

        assert eventually(lambda: is_gone(spare), SOON_S)
        assert server.zombies() == []
        # It may be back in a moment: who waits goes on waiting.
        assert spare_pids(server) == {another}


def test_a_process_that_goes_on_after_its_answer_is_ended(common: Server) -> None:
    again = [{"say": "cut off"}, {"finish": "max_tokens"}, HANG]
    common.write_scenario([again])

    assert content_of(ask(common)) == "cut off"

    check_over(common, common.queries()[-1]["pid"])


def test_no_choice_follows_one_that_has_failed(tmp_path: Path) -> None:
    turns = [[{"exit": 1}], [{"say": "for nobody"}, HANG]]
    with running_server(tmp_path, {"turns": turns, "shared": True}, env=NO_IDLE) as server:
        # The client stays connected all the time.
        with RawConnection(server.port) as wire:
            wire.send(post(encoded(question(n=2))))
            assert wire.reply().status == 502

            assert eventually(lambda: at_rest(server), SOON_S)
        assert len(server.queries()) == 1


@pytest.mark.slow
def test_a_client_that_does_not_read_is_dropped(tmp_path: Path) -> None:
    half = {"say": "x" * 8_000_000, "chunks": 32}
    env = {**NO_IDLE, "OCP_WRITE_TIMEOUT": "300"}

    # A client that has not read is dropped when there is more for it.
    with running_server(tmp_path, [[half, {"sleep_ms": 1_500}, half]], env=env) as server:
        with waiter(server, stream=True):
            pid = asked_process(server)
            assert eventually(lambda: is_gone(pid))
            assert eventually(lambda: at_rest(server))
            # Its place may be free before that: a client that left meanwhile was not dropped.
            assert last_entry(server, "answer_abandoned")


def test_an_answer_that_nobody_reads_yet_frees_its_place_and_is_whole_when_it_is_read(
    tmp_path: Path
) -> None:
    large = {"say": "x" * 6_000_000, "chunks": 64}
    env = {**NO_IDLE, "CLAUDE_MAX_CONCURRENT": "1"}
    with running_server(tmp_path, [[large]], env=env) as server:
        with waiter(server, stream=True) as wire:
            assert eventually(lambda: unread_bytes(wire.socket) > 50_000)
            assert eventually(lambda: at_rest(server))
            assert ask(server, messages=[]).status == 400
            body = wire.reply().body

        assert last_entry(server, "answer_finished")["stop_reason"] == "end_turn"
    assert body.count(b"x" * 90_000) >= 64 and body.endswith(b"data: [DONE]\n\n")


@pytest.mark.slow
def test_a_reader_that_is_slow_but_steady_gets_its_whole_answer(tmp_path: Path) -> None:
    large = {"say": "x" * 6_000_000, "chunks": 64}
    # Of the pauses none is as long as this, and all together are.
    env = {**NO_IDLE, "OCP_WRITE_TIMEOUT": "3000"}
    with running_server(tmp_path, [[large]], env=env) as server:
        with waiter(server, stream=True) as wire:
            for _ in range(12):
                wire.said += wire.socket.recv(400_000)
                time.sleep(0.3)
            wire.hear(b"data: [DONE]")

    assert wire.said.count(b"x") >= 6_000_000


@pytest.mark.slow
def test_what_a_client_left_unread_is_given_back_when_it_leaves(tmp_path: Path) -> None:
    large = {"say": "x" * 40_000_000, "chunks": 64}
    with running_server(tmp_path, [[large]], env=NO_IDLE) as server:
        before = memory_kb(server.pid)
        with waiter(server, stream=True):
            assert eventually(lambda: memory_kb(server.pid) > before + 20_000)
        assert eventually(lambda: at_rest(server))
        assert eventually(lambda: memory_kb(server.pid) < before + 20_000)


def test_a_name_of_no_model_is_not_kept(tmp_path: Path) -> None:
    with running_server(tmp_path, env=NO_IDLE) as server:
        before = memory_kb(server.pid)
        for number in range(30):
            assert ask(server, model=f"claude-{number}-" + "x" * 1_000_000).status == 404
        assert memory_kb(server.pid) < before + 20_000


def unread_bytes(connection: socket.socket) -> int:
    """How much has come that nobody has read."""
    found = fcntl.ioctl(connection, termios.FIONREAD, struct.pack("i", 0))
    return int(struct.unpack("i", found)[0])


def memory_kb(pid: int) -> int:
    """The resident memory of a process."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


# ---------------------------------------------------------------------------
# More than fits
# ---------------------------------------------------------------------------

def test_100_requests_at_once_get_4_places_and_the_rest_waits_or_is_refused(
    tmp_path: Path,
) -> None:
    env = {**NO_IDLE, "CLAUDE_MAX_CONCURRENT": "4", "CLAUDE_MAX_QUEUE": "16",
           "CLAUDE_QUEUE_RETRY_AFTER": "7"}

    door = tmp_path / "door"

    with running_server(
        tmp_path / "server", [[{"wait_for": str(door)}, {"say": "ok"}]], env=env
    ) as server:
        seen, stop = [], threading.Event()

        def look() -> None:
            while not stop.is_set():
                seen.append(running(server))

        def open_door() -> None:
            eventually(lambda: health(server)["concurrency"]["queueRejections"] == 80)
            eventually(lambda: (running(server), waiting(server)) == (4, 16))
            door.touch()

        looker = threading.Thread(target=look)
        looker.start()
        opener = threading.Thread(target=open_door)
        opener.start()
        replies = in_parallel([lambda: ask(server)] * 100)
        opener.join()
        stop.set()
        looker.join()

        asked = len(server.queries())
        assert eventually(lambda: at_rest(server))

    answered = [reply for reply in replies if reply.status == 200]
    refused = [reply for reply in replies if reply.status == 429]
    assert (len(answered), asked, len(refused)) == (20, 20, 80)
    assert max(seen) == 4
    check_overflow(refused)


def check_overflow(refused: list[Reply]) -> None:
    for reply in refused:
        assert error_of(reply)["type"] == "rate_limit_error"
        assert error_of(reply)["code"] == "rate_limit_exceeded"
        assert reply.headers["Retry-After"] == "7"
        assert reply.headers["x-should-retry"] is None


def test_the_line_is_first_come_first_served_and_never_two_in_one_place(common: Server) -> None:
    common.write_scenario([[{"say": "busy"}, HANG]])
    count = len(common.queries())
    words = [f"no. {number}" for number in range(8)]

    def asked() -> list[str]:
        queries = common.queries()[count:]
        return [query["messages"][-1]["content"][0]["text"] for query in queries]

    wires = []
    for number, word in enumerate(words):
        wires.append(waiter(common, word, stream=True))
        eventually(lambda so_far=number: running(common) + waiting(common) == so_far + 1)
    found = []
    for number, wire in enumerate(wires):
        eventually(lambda so_far=number: len(asked()) == min(so_far + 2, len(words)))
        found.append(sorted(asked()))
        wire.hang_up()

    assert found == [words[:number + 2] for number in range(len(words))]
    assert eventually(lambda: at_rest(common))


def test_a_full_queue_is_told_at_once_even_to_a_stream(tmp_path: Path) -> None:
    env = {"CLAUDE_MAX_CONCURRENT": "1", "CLAUDE_MAX_QUEUE": "0"}

    turns = [[{"say": "busy"}, HANG]]
    with running_server(tmp_path, turns, env=env) as server, stream_chat(server):
        eventually(lambda: running(server) == 1)
        replies = ask(server), ask(server, stream=True)
        counts = health(server)["concurrency"]

    assert [reply.status for reply in replies] == [429, 429]
    assert (counts["inflight"], counts["queued"], counts["queueRejections"]) == (1, 0, 2)


def test_of_too_many_connections_the_one_that_rested_longest_goes(tmp_path: Path) -> None:
    with running_server(tmp_path, env={"OCP_MAX_CONNECTIONS": "4"}) as server:
        first, *others = [RawConnection(server.port) for _ in range(4)]
        for wire in (first, *others):
            wire.send(head("GET", "/health"))
            assert wire.reply().status == 200
        # A connection rests only once its thread has come back from the answer, which is not seen.
        time.sleep(0.3)
        fifth = RawConnection(server.port)
        fifth.send(head("GET", "/health"))

        assert fifth.reply().status == 200
        assert first.is_closed()
        first.hang_up()
        for wire in (*others, fifth):
            wire.send(head("GET", "/health"))
            assert wire.reply().status == 200
            wire.hang_up()
        assert len(server.log_entries("connections_full")) == 1


def test_a_connection_that_is_answered_is_never_closed_for_another(tmp_path: Path) -> None:
    env = {**NO_IDLE, "OCP_MAX_CONNECTIONS": "4", "CLAUDE_MAX_CONCURRENT": "4"}
    with running_server(tmp_path, [[HANG]], env=env) as server:
        busy = [waiter(server, stream=True) for _ in range(4)]
        assert eventually(lambda: len(server.queries()) == 4)
        with RawConnection(server.port) as fifth:
            reply = fifth.reply()
        server.write_scenario([])
        busy[0].hang_up()
        after = eventually(lambda: is_served(server))
        for wire in busy[1:]:
            wire.hang_up()

    assert (reply.status, error_of(reply)["code"]) == (503, "too_many_connections")
    assert reply.headers["Retry-After"] == "5"
    assert after


def is_served(server: Server) -> bool:
    try:
        return ask(server).status == 200
    except OSError:
        return False


# ---------------------------------------------------------------------------
# Servers that stop
# ---------------------------------------------------------------------------

def is_refused(port: int) -> bool:
    try:
        RawConnection(port).hang_up()
    except ConnectionError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_server_that_is_told_to_stop_finishes_what_runs(
    tmp_path: Path, number: signal.Signals
) -> None:
    door = tmp_path / "door"
    script = [[{"say": "so far"}, {"wait_for": str(door)}, {"say": " and to the end"}]]

    with running_server(tmp_path / "server", script) as server, RawConnection(server.port) as idle:
        idle.send(head("GET", "/v1/models"))
        idle.reply()
        with stream_chat(server) as stream:
            events = iter(stream)
            first = next(events)
            os.kill(server.pid, number)
            eventually(lambda: is_refused(server.port))
            idle.send(post(encoded(question())))
            late = idle.reply()
            door.touch()
            rest = [first, *events]
        code = server.process.wait(120)

    assert "".join(pieces(rest)) == "so far and to the end"
    assert finish_reasons(rest) == ["stop"] and rest[-1][1] == "[DONE]"
    assert (late.status, error_of(late)["code"]) == (503, "shutting_down")
    assert late.headers["Retry-After"] == "5"
    assert code == 0


def test_a_server_that_is_told_to_stop_finishes_what_waits(tmp_path: Path) -> None:
    door = tmp_path / "door"
    script = [[{"wait_for": str(door)}, {"say": "done"}]]

    with running_server(
        tmp_path / "server", script, env={"CLAUDE_MAX_CONCURRENT": "1"}
    ) as server:
        wires = [waiter(server, stream=False) for _ in range(3)]
        eventually(lambda: waiting(server) == 2)
        server.process.terminate()
        eventually(lambda: is_refused(server.port))
        door.touch()
        replies = [wire.reply() for wire in wires]
        code = server.process.wait(120)
        for wire in wires:
            wire.hang_up()

    assert [content_of(reply) for reply in replies] == ["done"] * 3
    assert code == 0


def test_a_server_does_not_wait_longer_than_its_drain_time(tmp_path: Path) -> None:
    script = [[{"say": "so far"}, {"hang": True, "stubborn": True}]]

    with running_server(tmp_path, script, env={"OCP_DRAIN": "200"}) as server:
        with stream_chat(server) as stream:
            next(iter(stream))
            started_s = time.monotonic()
            server.process.terminate()
            code = server.process.wait(120)
            taken_s = time.monotonic() - started_s
            rest = list(stream)
        left = processes_with(server.place.folder)

    # Without the setting it would wait for 20 seconds.
    assert code == 0 and 0.2 <= taken_s < 20
    assert finish_reasons(rest) == [] and "[DONE]" not in [data for _, data in rest]
    assert left == set()


def test_a_second_signal_ends_the_server_at_once(tmp_path: Path) -> None:
    script = [[{"say": "so far"}, {"hang": True, "stubborn": True}]]

    with running_server(
        tmp_path, script, env={"OCP_DRAIN": "600000"}
    ) as server, stream_chat(server) as stream:
        next(iter(stream))
        server.process.terminate()
        eventually(lambda: is_refused(server.port))
        server.process.terminate()

        # The first signal alone would have it wait for ten minutes.
        assert server.process.wait(60) == 0


def test_a_server_started_as_a_program_needs_little_memory_and_is_the_same_process(
    tmp_path: Path
) -> None:
    # By a link in a folder whose modules have names of Python's own, which are not wanted.
    link = tmp_path / "programs" / "ocp_server.py"
    link.parent.mkdir()
    link.symlink_to(REPO / "ocp_server.py")
    (link.parent / "random.py").write_text("raise SystemExit(3)")

    with running_server(tmp_path / "server", as_program=True, script=link) as server:
        words = of_process(server.pid, "cmdline").decode().split("\0")

        assert content_of(ask(server)) == "You said: hi"
        # The syntax tree of the script alone would be more than 40 MB.
        assert memory_kb(server.pid) < 60_000
        assert words[1:3] == ["-W", "error::ResourceWarning"]
        assert words[6].endswith("/ocp_server.py")


def test_a_server_that_was_started_to_survive_hangups_does(tmp_path: Path) -> None:
    # As nohup does it: what is ignored stays ignored in the program that is started.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with running_server(tmp_path, as_program=True) as server:
            os.kill(server.pid, signal.SIGHUP)
            reply = ask(server)

            assert content_of(reply) == "You said: hi"
            assert server.process.poll() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_killed_server_leaves_no_process(tmp_path: Path) -> None:
    script = [[{"say": "so far"}, {"spawn_grandchild": True},
               {"hang": True, "stubborn": True}]]

    with running_server(tmp_path, script) as server:
        eventually(lambda: spares(server) == {SONNET: 1})
        with stream_chat(server) as first, stream_chat(server) as second:
            next(iter(first))
            next(iter(second))
            eventually(lambda: len(server.fake_log("grandchild")) == 2)
            eventually(lambda: len(spare_pids(server)) == 1)
            busy = len(server.children())
            server.kill()

        assert busy >= 6
        assert eventually(lambda: not processes_with(server.place.folder))


def test_a_watchdog_that_was_killed_is_replaced(tmp_path: Path) -> None:
    with running_server(tmp_path, [[{"say": "so far"}, {"hang": True, "stubborn": True}]],
                        env=NO_IDLE) as server:
        with stream_chat(server) as first:
            next(iter(first))
            (watchdog,) = set(server.children()) - {asked_process(server)}
            os.kill(watchdog, signal.SIGKILL)
            eventually(lambda: server.zombies() == [watchdog])
            with stream_chat(server) as second:
                next(iter(second))
                server.kill()

        assert eventually(lambda: not processes_with(server.place.folder))


# ---------------------------------------------------------------------------
# Spares
# ---------------------------------------------------------------------------

def spare_pids(server: Server) -> set[int]:
    """The live processes that have not been asked anything."""
    started = {each["pid"] for each in server.fake_log("start") if each["argv"][:1] == ["-p"]}
    return {pid for pid in started - {each["pid"] for each in server.queries()}
            if not is_gone(pid)}


def ready_spare(server: Server, *others: int) -> int:
    """The pid of the spare, once there is one besides these others."""
    (spare,) = eventually(lambda: spare_pids(server) - set(others))
    eventually(lambda: spares(server) == {SONNET: 1})
    return spare


def is_warm(server: Server, count: int) -> bool:
    """Whether the answer after so many others was given by a spare."""
    entries = eventually(lambda: server.log_entries("answer_finished")[count:])
    return bool(entries[0]["warm"])


def test_the_first_request_after_the_start_is_warm_and_the_spare_is_replaced(
    tmp_path: Path,
) -> None:
    with running_server(tmp_path) as server:
        first = ready_spare(server)
        ask(server)
        second = ready_spare(server, first)
        ask(server, "Something else")

        assert [query["pid"] for query in server.queries()] == [first, second]
        assert is_warm(server, 0) and is_warm(server, 1)


def test_a_model_that_was_asked_gets_a_spare_of_its_own(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        ask(server, model="haiku")
        wanted = {SONNET: 1, "claude-haiku-5-5": 1}
        eventually(lambda: spares(server) == wanted)
        ask(server, model="haiku")

        assert (is_warm(server, 0), is_warm(server, 1)) == (False, True)


def test_a_model_that_was_made_up_gets_no_spare(tmp_path: Path) -> None:
    error = {"status": 404, "word": "model_not_found", "text": "there is none"}

    with running_server(tmp_path, [[{"api_error": error}]]) as server:
        spare = ready_spare(server)
        ask(server, model="claude-made-up-1")
        ask(server, model="claude-made-up-2")

        assert stays(lambda: spare_pids(server), 0.6) == {spare}


def test_the_model_that_was_wanted_last_gets_the_place_of_another(tmp_path: Path) -> None:
    with running_server(tmp_path, env={"OCP_WARM_TOTAL": "1"}) as server:
        eventually(lambda: spares(server) == {SONNET: 1})
        ask(server, model="opus")

        assert eventually(lambda: spares(server) == {"claude-opus-5-5": 1})


def test_without_spares_every_answer_comes_from_a_new_process(tmp_path: Path) -> None:
    with running_server(tmp_path, env=NO_IDLE) as server:
        replies = [ask(server) for _ in range(3)]
        eventually(lambda: all(is_gone(query["pid"]) for query in server.queries()))

        assert [content_of(reply) for reply in replies] == ["You said: hi"] * 3
        assert spares(server) == {}
        assert len({query["pid"] for query in server.queries()}) == 3
        assert not is_warm(server, 0)


def test_a_process_serves_one_conversation(tmp_path: Path) -> None:
    with running_server(tmp_path, env={"OCP_WARM_PROCESSES": "2"}) as server:
        eventually(lambda: spares(server) == {SONNET: 2})
        for number in range(4):
            ask(server, f"conversation {number}")

        assert len({query["pid"] for query in server.queries()}) == 4
        assert [len(query["messages"]) for query in server.queries()] == [1] * 4


@pytest.mark.slow
def test_spares_that_die_young_are_not_started_over_and_over(tmp_path: Path) -> None:
    with running_server(tmp_path, {"startup": [{"exit": 1}]}) as server:
        # It was asked for its version before, and came to an end too.
        (died,) = eventually(lambda: [
            each["pid"] for each in server.fake_log("exit") if each["why"] == "scripted"])
        # Whoever takes its zombie away has seen how young it was.
        eventually(lambda: is_gone(died) and spares(server) == {})
        before = len(server.fake_log("start"))
        server.write_scenario([])
        reply = ask(server)

        assert content_of(reply) == "You said: hi"
        assert len(server.fake_log("start")) <= before + 1


@pytest.mark.slow
def test_a_dead_spare_is_replaced(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        spare = ready_spare(server)
        born_s = time.monotonic()
        # One that dies younger counts as broken, and is not replaced for a while.
        eventually(lambda: time.monotonic() - born_s > 5.2)
        os.kill(spare, signal.SIGKILL)
        another = ready_spare(server, spare)
        ask(server)

        assert server.queries()[0]["pid"] == another
        assert is_warm(server, 0)


def test_a_spare_that_died_a_moment_ago_is_not_used(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        spare = ready_spare(server)
        os.kill(spare, signal.SIGKILL)
        eventually(lambda: is_dead(spare))
        reply = ask(server)

        assert content_of(reply) == "You said: hi"
        assert eventually(lambda: is_gone(spare))


@pytest.mark.slow
def test_a_claude_that_was_updated_replaces_the_spares(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        old = ready_spare(server)
        server.write_scenario([], version="2.1.400")
        os.utime(server.place.claude)
        new = ready_spare(server, old)
        ask(server)

        assert health(server)["claudeVersion"] == "2.1.400"
        assert eventually(lambda: is_gone(old))
        assert server.queries()[0]["pid"] == new
        assert len(server.log_entries("claude_found")) == 2


@pytest.mark.slow
def test_a_server_without_requests_does_nothing(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        ready_spare(server)
        # The spare is primed first.
        eventually(lambda: "rewind_conversation" in [
            line["request"]["subtype"] for line in server.lines("control_request")])
        stays(lambda: len(server.fake_log()), 0.3)
        before = len(server.fake_log()), cpu_s(server.pid)

        assert stays(lambda: len(server.fake_log()), 1.2) == before[0]
        assert cpu_s(server.pid) - before[1] < 0.2


# ---------------------------------------------------------------------------
# Parked processes
# ---------------------------------------------------------------------------

def parked(server: Server) -> int:
    return int(health(server)["parked"])


def next_turn(reply: Reply, text: str) -> list[Json]:
    """The messages of a conversation that goes on after its first answer."""
    return [{"role": "user", "content": "hi"},
            {"role": "assistant", "content": content_of(reply)},
            {"role": "user", "content": text}]


def test_a_conversation_goes_on_in_its_process(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        first = ask(server)
        second = ask(server, messages=next_turn(first, "and now?"))
        asked = server.queries()

        assert content_of(second) == "You said: and now?"
        assert [len(query["messages"]) for query in asked] == [1, 3]
        assert asked[0]["pid"] == asked[1]["pid"]
        assert parked(server) == 1


def test_a_parked_process_that_died_is_replaced_by_one_that_is_told_everything(
    tmp_path: Path,
) -> None:
    with running_server(tmp_path) as server:
        first = ask(server)
        os.kill(asked_process(server), signal.SIGKILL)
        second = ask(server, messages=next_turn(first, "and now?"))
        asked = server.queries()

        assert content_of(second) == "You said: and now?"
        assert [len(query["messages"]) for query in asked] == [1, 3]
        assert asked[0]["pid"] != asked[1]["pid"]


def test_a_client_that_leaves_a_conversation_that_goes_on_ends_its_turn(tmp_path: Path) -> None:
    # It could go on, but for what this claude does not know.
    scenario = {"turns": [], "unsupported": ["interrupt"]}
    with running_server(tmp_path, scenario) as server:
        first = ask(server)
        server.write_scenario([[HANG]], unsupported=["interrupt"])
        with RawConnection(server.port) as wire:
            wire.send(post(encoded(question(messages=next_turn(first, "and now?")))))
            pid = asked_process(server, 2)

        check_over(server, pid)
        assert parked(server) == 0


def test_the_oldest_of_too_many_parked_processes_ends(tmp_path: Path) -> None:
    env = {"OCP_PARKED_PROCESSES": "2", "OCP_WARM_PROCESSES": "0"}

    with running_server(tmp_path, env=env) as server:
        for number in range(4):
            ask(server, messages=[{"role": "system", "content": f"Be number {number}."},
                                  {"role": "user", "content": "hi"}])
        pids = [query["pid"] for query in server.queries()]

        assert eventually(lambda: [is_gone(pid) for pid in pids] == [True, True, False, False])
        assert parked(server) == 2


def test_a_parked_process_does_not_outlive_its_server(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        ask(server)
        eventually(lambda: parked(server) == 1)
        server.kill()

        assert eventually(lambda: not processes_with(server.place.folder))


# ---------------------------------------------------------------------------
# The long run
# ---------------------------------------------------------------------------

def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


WORD: list[Json] = [{"type": "stream_event", "event": event} for event in (
    {"type": "message_start", "message": {"id": "msg_1"}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "word"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {}},
)]


def answers(server: Server, count: int) -> None:
    """So many answers over two connections, whole and streamed ones, none of them wrong."""
    def one_client(stream: bool) -> None:
        with RawConnection(server.port) as wire:
            for _ in range(count // 2):
                wire.send(post(encoded(question(stream=stream)), path=CHAT_PATH))
                reply = wire.reply()
                assert reply.status == 200 and b"word" in reply.body

    in_parallel([lambda: one_client(False), lambda: one_client(True)])
    eventually(lambda: at_rest(server))
    eventually(lambda: spares(server) == {SONNET: 1})


@pytest.mark.exhaustive
def test_hundreds_of_answers_leave_no_memory_no_files_and_no_threads(tmp_path: Path) -> None:
    claude = ShellClaude(tmp_path)
    claude.play(WORD)

    with running_server(tmp_path, claude=claude.program) as server:
        answers(server, 100)
        before = memory_kb(server.pid), open_files(server.pid), threads(server.pid)
        answers(server, 300)
        eventually(lambda: open_files(server.pid) <= before[1])
        eventually(lambda: threads(server.pid) <= before[2])
        after = memory_kb(server.pid)

        assert after - before[0] < 2_000
        assert after < 60_000
        assert eventually(lambda: server.zombies() == [])


def test_a_place_can_be_used_by_one_server_after_the_other(tmp_path: Path) -> None:
    for _ in range(2):
        with running_server(tmp_path) as server:
            assert content_of(ask(server)) == "You said: hi"

    assert not processes_with(Place(tmp_path).folder)
