"""The lives of real claudes: spares, conversations that go on, clients that leave, ends."""

from __future__ import annotations

import http.client
import os
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import stub_api as stub
from dialects import CHAT
from http_client import http_request
from processes import all_processes, kill_all, processes_with
from rig import (
    MODEL,
    WARM,
    Case,
    Claude,
    Rig,
    assistant,
    claude_pids,
    environment,
    running_rig,
    user,
    wait_until,
)
from upstream import turns
from waiting import eventually

Json = Any

#: Half an answer, and then silence.
HALF = stub.hang("Half ", seconds=600)
SILENCE = stub.hang(seconds=600)


def spares(rig: Rig) -> int:
    """How many processes wait for a question to the usual model."""
    return int(rig.server.call("GET", "/health").json()["spares"].get(MODEL, 0))


def last_answer(rig: Rig) -> dict[str, Json]:
    """What the server's log has about the answer that was last complete."""
    return rig.server.log_entries("answer_finished")[-1]


def session_files(rig: Rig) -> dict[Path, int]:
    """The files that claude keeps for its living processes, with the process of each."""
    folder = rig.server.home / ".claude" / "sessions"
    return {path: int(path.name.split(".")[0]) for path in folder.glob("*")}


def files_of_dead(rig: Rig) -> set[Path]:
    """The files that are left of claudes that have ended."""
    alive = set(claude_pids(rig.server))
    return {path for path, pid in session_files(rig).items() if pid not in alive}


def assert_nothing_left(rig: Rig, before: set[Path]) -> None:
    """No file is left of a claude that has ended in this test; `before` are those of others."""
    rig.settle()

    def tidy() -> bool:
        left = files_of_dead(rig) - before
        assert not left, f"{left} are left, alive are only {claude_pids(rig.server)}"
        return True

    eventually(tidy)


# ---------------------------------------------------------------------------
# Spares and conversations
# ---------------------------------------------------------------------------

def test_the_first_answer_is_warm_and_the_spare_is_replaced(
    claude: Claude, tmp_path: Path
) -> None:
    with running_rig(tmp_path, claude, **WARM) as rig:
        wait_until(lambda: spares(rig) == 1)
        waiting = set(claude_pids(rig.server))
        assert rig.ask().finish == "stop"
        assert last_answer(rig)["warm"] is True
        wait_until(lambda: spares(rig) == 1 and set(claude_pids(rig.server)) - waiting)


@pytest.mark.exhaustive
def test_a_spare_that_was_killed_is_not_missed(claude: Claude, tmp_path: Path) -> None:
    with running_rig(tmp_path, claude, **WARM) as rig:
        wait_until(lambda: spares(rig) == 1)
        killed = set(claude_pids(rig.server))
        kill_all(sorted(killed))
        wait_until(lambda: not killed & {each.pid for each in all_processes()})
        assert rig.ask("Still there?").finish == "stop"
        assert len(rig.bodies()) == 1


@pytest.mark.exhaustive
def test_a_claude_that_is_asked_whether_it_is_there_says_so_and_does_nothing_else(
    claude: Claude, tmp_path: Path
) -> None:
    with running_rig(tmp_path, claude, **WARM) as rig:
        wait_until(lambda: spares(rig) == 1)
        rig.script(stub.text("Late.", delay_s=40.0), stub.text("At once."))
        late = rig.ask("Are you there?")
        messages = [user("Are you there?"), assistant(late.text), user("And now?")]
        assert (late.text, rig.ask(messages).text) == ("Late.", "At once.")
        assert last_answer(rig)["path"] == "continued"
        first, second = rig.bodies()
        assert [role for role, _ in turns(first)] == ["user"]
        assert [role for role, _ in turns(second)] == ["user", "assistant", "user"]


@pytest.mark.exhaustive
def test_a_frozen_claude_is_replaced_in_time(claude: Claude, tmp_path: Path) -> None:
    with running_rig(tmp_path, claude, **WARM) as rig:
        wait_until(lambda: spares(rig) == 1)
        (frozen,) = claude_pids(rig.server)
        os.kill(frozen, signal.SIGSTOP)
        assert rig.ask("Still there?").text == "Hello from the stub."
        wait_until(lambda: frozen not in claude_pids(rig.server))
        assert len(rig.bodies()) == 1


def test_the_socket_of_a_claude_that_was_killed_is_removed(claude: Claude, tmp_path: Path) -> None:
    # The path of a socket has room for some hundred characters, and the test's folder takes more.
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary, running_rig(
        tmp_path, claude, CLAUDE_ALLOWED_TOOLS="Read", TMPDIR=temporary, **WARM
    ) as rig:
        wait_until(lambda: spares(rig) == 1)
        sockets = Path(temporary) / "cc-socks"
        (pid,) = claude_pids(rig.server)
        if rig.is_old:
            assert not sockets.exists()
            return
        wait_until(lambda: (sockets / f"{pid}.sock").exists())
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not (sockets / f"{pid}.sock").exists())


def test_a_conversation_goes_on_where_it_was(rig: Rig) -> None:
    messages = [user("One?")]
    for question in ("Two?", "Three?"):
        messages += [assistant(rig.ask(messages).text), user(question)]
    assert rig.ask(messages).finish == "stop"
    first, second, third = rig.bodies()
    said = [("assistant", ["Hello from the stub."])]
    assert turns(third) == [
        ("user", ["One?"]), *said, ("user", ["Two?"]), *said, ("user", ["Three?"])]
    assert last_answer(rig)["warm"] is True
    # What the API has read already comes first and unchanged, so that its cache works.
    assert roles_and_texts(second)[:len(roles_and_texts(first))] == roles_and_texts(first)
    assert roles_and_texts(third)[:len(roles_and_texts(second))] == roles_and_texts(second)


def roles_and_texts(body: Mapping[str, Json]) -> list[Json]:
    """Role and blocks of the messages, whatever their form and the marks on them."""
    found = []
    for message in body["messages"]:
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        found += [(message["role"], block["type"], block.get("text")) for block in blocks]
    return found


@pytest.mark.exhaustive
def test_a_conversation_goes_on_though_its_claude_was_killed(
    claude: Claude, tmp_path: Path
) -> None:
    with running_rig(tmp_path, claude) as rig:
        messages = [user("One?"), assistant(rig.ask("One?").text), user("Two?")]
        kill_all(claude_pids(rig.server))
        assert rig.ask(messages).finish == "stop"
        assert turns(rig.last_body()) == [
            ("user", ["One?"]), ("assistant", ["Hello from the stub."]), ("user", ["Two?"])]


@pytest.mark.exhaustive
def test_branches_of_a_conversation_do_not_mix(rig: Rig) -> None:
    start = [user("One?"), assistant(rig.ask("One?").text)]
    for branch in ("Left?", "Right?"):
        rig.ask([*start, user(branch)])
    for body, branch in zip(rig.bodies()[1:], ("Left?", "Right?")):
        assert turns(body) == [
            ("user", ["One?"]), ("assistant", ["Hello from the stub."]), ("user", [branch])]


# ---------------------------------------------------------------------------
# Clients that leave
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("reply", [HALF, SILENCE], ids=["half", "silence"])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_ends_the_request(
    rig: Rig, streams: bool, reply: stub.Reply
) -> None:
    rig.script(then=reply)
    aborted, files_before = rig.stub.aborted, files_of_dead(rig)
    body = {"model": MODEL, "messages": [user("Hi")], "stream": streams}
    connection = http_request(rig.server.port, "POST", CHAT.path, body)
    rig.stub.wait_for_requests(rig.requests_before + 1)
    if streams and reply is HALF:
        read_until(connection, b"Half")
    connection.close()
    rig.stub.wait_for_aborted(aborted + 1)
    rig.settle()
    assert len(rig.bodies()) == 1
    # One that had to be killed in the end would leave files.
    assert_nothing_left(rig, files_before)


def read_until(connection: http.client.HTTPConnection, wanted: bytes) -> None:
    """Read the answer up to these bytes."""
    assert connection.sock
    read = b""
    while wanted not in read:
        piece = connection.sock.recv(65_536)
        assert piece, read
        read += piece


def test_a_client_that_leaves_a_conversation_can_come_back(rig: Rig) -> None:
    messages = [user("One?"), assistant(rig.ask("One?").text), user("Two?")]
    rig.script(HALF)
    with rig.open(messages) as stream:
        next(iter(stream))
    wait_until(lambda: rig.server.call("GET", "/health").json()["stats"]["activeRequests"] == 0)
    assert rig.ask(messages).finish == "stop"
    assert turns(rig.last_body()) == [
        ("user", ["One?"]), ("assistant", ["Hello from the stub."]), ("user", ["Two?"])]


@pytest.mark.exhaustive
def test_twenty_answers_leave_no_file_behind(rig: Rig) -> None:
    files_before = files_of_dead(rig)
    outcomes = rig.run({str(number): Case() for number in range(20)}, at_once=4)
    assert {outcome.answer.finish for outcome in outcomes.values()} == {"stop"}
    assert_nothing_left(rig, files_before)


# ---------------------------------------------------------------------------
# Ends of the server
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
def test_a_stop_lets_a_running_answer_finish(claude: Claude, tmp_path: Path) -> None:
    with running_rig(tmp_path, claude, **WARM) as rig:
        rig.script(stub.text(list("abcdefgh"), gap_s=0.2))
        with rig.open() as stream:
            events = iter(stream)
            came = [next(events)[1] for _ in range(2)]
            os.kill(rig.server.pid, signal.SIGTERM)
            came += [data for _, data in events]
        assert rig.server.process.wait(30) == 0
        choices = [chunk["choices"][0] for chunk in came[:-1]]
        assert "".join(choice["delta"].get("content") or "" for choice in choices) == "abcdefgh"
        assert (choices[-1]["finish_reason"], came[-1]) == ("stop", "[DONE]")
        assert processes_with(tmp_path) == set()
        assert session_files(rig) == {}


def test_no_claude_outlives_a_server_that_is_killed(claude: Claude, tmp_path: Path) -> None:
    with running_rig(tmp_path, claude, **WARM) as rig:
        rig.ask("One?")
        rig.script(HALF)
        with rig.open("Two?") as stream:
            events = iter(stream)
            while not next(events)[1]["choices"][0]["delta"].get("content"):
                pass
            wait_until(lambda: spares(rig) == 1)
            parked_busy_and_spare = claude_pids(rig.server)
            assert len(parked_busy_and_spare) == 3
            rig.server.kill()
            # By itself, the one that is answering would go on for ten minutes.
            wait_until(lambda: not processes_with(tmp_path))
        rig.stub.wait_for_aborted(1)
        assert len(rig.bodies()) == 2


# ---------------------------------------------------------------------------
# The environment of a claude
# ---------------------------------------------------------------------------

KEY = "the-key-of-this-server"
UNWANTED = {
    "ANTHROPIC_API_KEY": "unwanted", "ANTHROPIC_AUTH_TOKEN": "unwanted",
    "ANTHROPIC_MODEL": "unwanted", "ANTHROPIC_CUSTOM_HEADERS": "X-Unwanted: 1",
    "OPENAI_API_KEY": "unwanted", "OPENAI_BASE_URL": "unwanted", "CLAUDECODE": "1",
    "CLAUDE_CODE_ENTRYPOINT": "unwanted", "CLAUDE_CODE_EXTRA_BODY": '{"unwanted":1}',
    "CLAUDE_CODE_USE_BEDROCK": "1", "NODE_OPTIONS": "--unwanted", "AWS_SECRET_ACCESS_KEY": "no",
    "PROXY_API_KEY": KEY, "OCP_ADMIN_KEY": "the-key-of-its-admin",
    # Passed by its name, were it not for its value.
    "LC_KEY": KEY,
}


def test_a_claude_knows_what_it_needs_and_no_more(claude: Claude, tmp_path: Path) -> None:
    wanted = {"OCP_PASS_ENV": "PASSED_ON,LC_ALL", "PASSED_ON": "yes", "TZ": "UTC"}
    with running_rig(tmp_path, claude, **UNWANTED, **wanted, **WARM) as rig:
        wait_until(lambda: claude_pids(rig.server))
        found = environment(claude_pids(rig.server)[0])
        assert not set(found) & set(UNWANTED)
        assert KEY not in found.values()
        assert (found["PASSED_ON"], found["TZ"]) == ("yes", "UTC")
        assert found["HOME"] == str(rig.server.home)
        assert found["ANTHROPIC_BASE_URL"] == rig.stub.url
        assert found["CLAUDE_CODE_DISABLE_ATTACHMENTS"] == "1"
        body = {"model": MODEL, "messages": [user("Hi")]}
        assert rig.server.call("POST", CHAT.path, body).status == 401
        with_key = {"Authorization": f"Bearer {KEY}"}
        assert rig.server.call("POST", CHAT.path, body, with_key).status == 200
        assert "unwanted" not in str(rig.stub.requests).lower()
