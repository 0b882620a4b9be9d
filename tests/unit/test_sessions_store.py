"""What the server remembers: the database, sessions in it, and responses in memory."""
from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clock import FakeClock
from project import load_script
from rendering import MODELS, block

ocp = load_script("ocp_server.py")

Json = dict[str, Any]
#: Where the clock of every test begins.
NOW_S = 1_700_000_000.0


# -- the database -------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[sqlite3.Connection]]:
    """The connections that the server opens; they are closed when the test is over."""
    made: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def noting(*arguments: Any, **fields: Any) -> sqlite3.Connection:
        made.append(connect(*arguments, **fields))
        return made[-1]

    monkeypatch.setattr(sqlite3, "connect", noting)
    yield made
    for connection in made:
        connection.close()


def version_of(store: Any) -> int:
    return int(store.rows("PRAGMA user_version")[0][0])


def tables(store: Any) -> set[str]:
    rows = store.rows("SELECT name FROM sqlite_master WHERE type = 'table'")
    return {row["name"] for row in rows}


def test_a_new_database_has_the_newest_version(store: Any) -> None:
    assert version_of(store) == len(ocp.MIGRATIONS)
    assert "sessions" in tables(store)


TABLES = {
    "sessions", "keys", "usage", "settings", "replaced_secrets", "plan", "thinking",
    "sqlite_sequence", "original", "alerts", "tenants",
}


def test_a_database_of_version_0_is_brought_up(store_path: Path) -> None:
    connection = sqlite3.connect(str(store_path))
    connection.execute("CREATE TABLE other (a)")
    connection.close()

    store = ocp.Store(str(store_path))

    assert (version_of(store), tables(store)) == (len(ocp.MIGRATIONS), {"other", *TABLES})
    store.close()


def test_a_database_that_is_up_is_left_as_it_is(store_path: Path) -> None:
    first = ocp.Store(str(store_path))
    with first.transaction() as connection:
        connection.execute("CREATE TABLE kept (a)")
    first.close()

    second = ocp.Store(str(store_path))

    assert "kept" in tables(second)
    assert version_of(second) == len(ocp.MIGRATIONS)
    second.close()


def test_each_migration_is_done_once_and_in_its_order(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ocp.Store(str(store_path)).close()
    more = ("CREATE TABLE one (a)", "ALTER TABLE one ADD COLUMN b")
    monkeypatch.setattr(ocp, "MIGRATIONS", (*ocp.MIGRATIONS, *more))

    for _ in range(2):
        store = ocp.Store(str(store_path))
        assert version_of(store) == len(ocp.MIGRATIONS)
        assert store.rows("SELECT a, b FROM one") == []
        store.close()


def test_a_migration_that_fails_leaves_the_version_before(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = len(ocp.MIGRATIONS)
    monkeypatch.setattr(
        ocp, "MIGRATIONS", (*ocp.MIGRATIONS, "CREATE TABLE one (a)", "CREATE TABLE one (a)")
    )
    with pytest.raises(sqlite3.Error):
        ocp.Store(str(store_path))

    with contextlib.closing(sqlite3.connect(str(store_path))) as connection:
        assert connection.execute("PRAGMA user_version").fetchone()[0] == done + 1


@pytest.mark.usefixtures("opened")
def test_a_file_that_is_no_database_is_refused(store_path: Path) -> None:
    store_path.write_bytes(b"This is no database. " * 100)

    with pytest.raises(sqlite3.Error):
        ocp.Store(str(store_path))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        ocp.Store(str(Path(tmp_path, "gone", "ocp.db")))


def test_every_file_of_the_database_is_private(store_path: Path, store: Any) -> None:
    put(ocp.Sessions(store), "s1", "a")

    files = list(store_path.parent.iterdir())
    assert store_path in files
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_transaction_happens_whole(store: Any) -> None:
    with store.transaction() as connection:
        connection.execute("CREATE TABLE one (a)")
        connection.execute("INSERT INTO one VALUES (1)")

    assert [row["a"] for row in store.rows("SELECT a FROM one WHERE a = ?", 1)] == [1]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_or_not_at_all(store: Any, error: type[BaseException]) -> None:
    with pytest.raises(error), store.transaction() as connection:
        connection.execute("CREATE TABLE one (a)")
        raise error

    assert "one" not in tables(store)
    with store.transaction() as connection:
        connection.execute("CREATE TABLE one (a)")


def test_threads_wait_for_each_other(store: Any) -> None:
    with store.transaction() as connection:
        connection.execute("CREATE TABLE one (a)")

    def insert(start: int) -> None:
        for number in range(start, start + 20):
            with store.transaction() as mine:
                mine.execute("INSERT INTO one VALUES (?)", (number,))

    threads = [threading.Thread(target=insert, args=(100 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert len(store.rows("SELECT DISTINCT a FROM one")) == 80


def test_a_database_may_live_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    store = ocp.Store(":memory:")

    assert tables(store) == TABLES
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_what_may_be_lost_comes_with_the_next_write_or_not_at_all(store_path: Path) -> None:
    store, statement = ocp.Store(str(store_path)), "INSERT INTO settings VALUES (?, '1')"
    other = sqlite3.connect(str(store_path), isolation_level=None)

    def written() -> list[str]:
        return [name for name, _ in other.execute("SELECT * FROM settings ORDER BY name")]

    store.write_later(statement, "a")
    assert written() == []
    store.write_or_queue(statement, "b")
    assert written() == ["a", "b"]
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.Error):
        store.write_or_queue(statement, "c")
    store.write_later(statement, "d")
    other.execute("COMMIT")
    store.write_queued()
    assert written() == ["a", "b", "c"]
    other.close()
    store.close()


# -- sessions -----------------------------------------------------------------

TTL_S = 3_600.0
PICTURE = {"type": "image",
           "source": {"type": "base64", "media_type": "image/png", "data": "aaaa"}}
SAID = [
    ocp.Message("user", [block("Gr\u00fc\u00dfe \ud83d"), PICTURE]),
    ocp.Message("assistant", [{"type": "tool_use", "id": "t1", "name": "a", "input": {"b": [1]}}]),
]


def turn(session_id: str, system: str = "", model: str = "sonnet") -> Any:
    return ocp.Turn(
        model=MODELS.find(model), messages=[], options=ocp.Options(), system=system,
        session_id=session_id,
    )


def put(sessions: Any, session_id: str, *texts: str, caller: str = "local", system: str = "",
        ttl_s: float = TTL_S) -> None:
    """Remembers a conversation of these texts."""
    roles = ("user", "assistant")
    messages = [ocp.Message(roles[i % 2], [block(text)]) for i, text in enumerate(texts)]
    sessions.put(caller, turn(session_id, system), messages, ttl_s)


def texts(sessions: Any, session_id: str, caller: str = "local", system: str = "",
          ttl_s: float = TTL_S) -> list[str]:
    """The texts of what is remembered."""
    found = sessions.messages(caller, session_id, system, ttl_s)
    return [message.content[0]["text"] for message in found]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(NOW_S)


@pytest.fixture
def sessions(store: Any, clock: FakeClock) -> Any:
    """Sessions in an empty database."""
    return ocp.Sessions(store, clock)


def test_a_new_session_is_empty(sessions: Any) -> None:
    assert sessions.messages("local", "s1", "", TTL_S) == []


def test_a_conversation_comes_back_as_it_was(sessions: Any) -> None:
    sessions.put("local", turn("s1"), SAID, TTL_S)

    assert sessions.messages("local", "s1", "", TTL_S) == SAID


def test_a_longer_conversation_replaces_the_shorter_one(sessions: Any) -> None:
    put(sessions, "s1", "a", "b")
    put(sessions, "s1", "a", "b", "c", "d")

    assert texts(sessions, "s1") == ["a", "b", "c", "d"]
    assert len(sessions.all(TTL_S)) == 1


def test_a_session_belongs_to_its_caller_and_to_one_system_prompt(sessions: Any) -> None:
    put(sessions, "s1", "a")
    put(sessions, "s1", "b", caller="other")
    put(sessions, "s1", "c", system="Be brief.")

    assert texts(sessions, "s1") == ["a"]
    assert texts(sessions, "s1", caller="other") == ["b"]
    assert texts(sessions, "s1", system="Be brief.") == ["c"]
    assert texts(sessions, "s1", caller="other", system="Be brief.") == []
    assert texts(sessions, "s2") == []


@pytest.mark.parametrize(("later_s", "left"), [(0, ["a"]), (3_600, ["a"]), (3_601, [])])
def test_a_session_is_kept_for_its_time(
    sessions: Any, clock: FakeClock, later_s: float, left: list[str]
) -> None:
    put(sessions, "s1", "a")
    clock.advance(later_s)

    assert texts(sessions, "s1") == left
    assert len(sessions.all(TTL_S)) == len(left)


def test_its_time_begins_anew_with_each_message(sessions: Any, clock: FakeClock) -> None:
    put(sessions, "s1", "a")
    clock.advance(3_000)
    put(sessions, "s1", "a", "b", "c")
    clock.advance(3_000)

    assert texts(sessions, "s1") == ["a", "b", "c"]


def test_what_is_out_of_time_is_deleted_at_the_next_message(
    sessions: Any, clock: FakeClock
) -> None:
    put(sessions, "s1", "a")
    clock.advance(4_000)
    put(sessions, "s2", "b")

    assert sessions.clear() == 1


def test_the_list_tells_about_sessions_and_nothing_of_what_was_said(
    sessions: Any, clock: FakeClock
) -> None:
    put(sessions, "s1", "secret", "secret")
    clock.advance(60)
    put(sessions, "s2", "secret", caller="shared")
    clock.advance(60)
    put(sessions, "s1", "secret", "secret", "secret")

    assert sessions.all(TTL_S) == [
        {"id": "s1", "caller": "local", "model": "claude-sonnet-5-5", "messages": 3,
         "created": "2023-11-14T22:13:20.000Z", "lastUsed": "2023-11-14T22:15:20.000Z"},
        {"id": "s2", "caller": "shared", "model": "claude-sonnet-5-5", "messages": 1,
         "created": "2023-11-14T22:14:20.000Z", "lastUsed": "2023-11-14T22:14:20.000Z"},
    ]


def test_the_model_of_the_last_message_is_told(sessions: Any) -> None:
    sessions.put("local", turn("s1"), SAID, TTL_S)
    sessions.put("local", turn("s1", model="claude-haiku-4-5"), SAID, TTL_S)

    assert sessions.all(TTL_S)[0]["model"] == "claude-haiku-4-5-20251001"


def test_clearing_forgets_one_id_or_all(sessions: Any) -> None:
    put(sessions, "s1", "a")
    put(sessions, "s1", "b", caller="other")
    put(sessions, "s2", "c")
    put(sessions, "s3", "d")

    assert (sessions.clear("s1"), sessions.clear("s1"), sessions.clear("")) == (2, 0, 0)
    assert (texts(sessions, "s1"), texts(sessions, "s2")) == ([], ["c"])
    assert (sessions.clear(), sessions.clear()) == (2, 0)
    assert sessions.all(TTL_S) == []


@pytest.mark.parametrize(
    "odd", ["'; DROP TABLE sessions; --", "%", "\u00fc", "x" * 10_000, "\x00"],
    ids=["a statement", "a pattern", "an umlaut", "very long", "a null"],
)
def test_an_id_may_be_any_text(sessions: Any, odd: str) -> None:
    put(sessions, odd, "a")

    assert texts(sessions, odd) == ["a"]


def test_sessions_survive_a_restart(store_path: Path, clock: FakeClock) -> None:
    store = ocp.Store(str(store_path))
    put(ocp.Sessions(store, clock), "s1", "a", "b")
    store.close()

    again = ocp.Store(str(store_path))

    assert texts(ocp.Sessions(again, clock), "s1") == ["a", "b"]
    again.close()


def test_sessions_of_several_threads_do_not_mix(sessions: Any) -> None:
    def talk(name: str) -> None:
        for count in range(1, 15):
            put(sessions, name, *[name] * count)
            assert texts(sessions, name) == [name] * count

    threads = [threading.Thread(target=talk, args=(f"s{index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert sessions.clear() == 4


# -- stored responses ---------------------------------------------------------


class Shelf:
    """Stored responses, with a clock."""

    def __init__(self, **settings: object) -> None:
        self.clock = FakeClock(NOW_S)
        self.responses = ocp.Responses(self.clock)
        self.config = dataclasses.replace(ocp.Config(), **settings)

    def put(self, response_id: str, text: str = "a", caller: str = "local") -> None:
        messages = [ocp.Message("user", [block(text)])]
        body = {"id": response_id, "output": [{"id": f"msg_{response_id}"}]}
        self.responses.put(caller, body, messages, [], self.config)

    def has(self, response_id: str, caller: str = "local") -> bool:
        try:
            return bool(self.responses.get(caller, response_id).body["id"] == response_id)
        except ocp.NotFound:
            return False


def test_a_response_can_be_had_again() -> None:
    shelf = Shelf()
    shelf.put("r1", "Hello")

    found = shelf.responses.get("local", "r1")

    assert found.body == {"id": "r1", "output": [{"id": "msg_r1"}]}
    assert shelf.responses.item("local", "msg_r1") == {"id": "msg_r1"}
    assert shelf.responses.messages("local", "r1") == found.messages
    assert found.messages == [ocp.Message("user", [block("Hello")])]


def test_somebody_else_s_response_is_as_if_it_were_not_there() -> None:
    shelf = Shelf()
    shelf.put("r1")

    errors = []
    for caller, response_id in (("other", "r1"), ("other", "r9")):
        with pytest.raises(ocp.NotFound) as caught:
            shelf.responses.get(caller, response_id)
        errors.append(caught.value)

    assert errors[0].message == errors[1].message.replace("r9", "r1")
    with pytest.raises(ocp.NotFound):
        shelf.responses.item("other", "msg_r1")


def test_a_conversation_that_is_gone_has_the_code_by_which_clients_send_it_again() -> None:
    with pytest.raises(ocp.BadRequest) as caught:
        Shelf().responses.messages("local", "r9")

    assert caught.value.error_code == "previous_response_not_found"
    assert caught.value.param == "previous_response_id"


def test_nobody_removes_somebody_else_s_response() -> None:
    shelf = Shelf()
    shelf.put("r1")

    with pytest.raises(ocp.NotFound):
        shelf.responses.remove("other", "r1")
    assert shelf.has("r1")


def test_a_response_that_was_removed_is_gone() -> None:
    shelf = Shelf()
    shelf.put("r1")
    shelf.put("r2")

    shelf.responses.remove("local", "r1")

    assert (shelf.has("r1"), shelf.has("r2")) == (False, True)
    with pytest.raises(ocp.NotFound):
        shelf.responses.remove("local", "r1")


def test_responses_out_of_time_go_when_the_next_one_comes() -> None:
    shelf = Shelf(session_ttl_ms=60_000)
    shelf.put("r1")
    shelf.clock.advance(30)
    shelf.put("r2")
    shelf.clock.advance(31)
    shelf.put("r3")

    assert [shelf.has(name) for name in ("r1", "r2", "r3")] == [False, True, True]


def test_a_response_that_is_referred_to_is_kept_on() -> None:
    shelf = Shelf(session_ttl_ms=60_000)
    shelf.put("r1")
    shelf.put("r2")
    for number in range(3, 6):
        shelf.clock.advance(40)
        shelf.responses.item("local", "msg_r1")
        shelf.put(f"r{number}")

    assert [shelf.has(f"r{number}") for number in range(1, 6)] == [True, False, False, True, True]
    with pytest.raises(ocp.NotFound):
        shelf.responses.item("local", "msg_r2")


def test_all_responses_together_have_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocp, "_MAX_STORED_BYTES", 1_000)
    shelf = Shelf()

    for number in range(5):
        shelf.put(f"r{number}", "x" * 300)

    kept = [number for number in range(5) if shelf.has(f"r{number}")]
    assert kept == [3, 4] or kept == [2, 3, 4]


def test_what_was_removed_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocp, "_MAX_STORED_BYTES", 1_000)
    shelf = Shelf()

    shelf.put("r0", "x" * 100)
    for number in range(1, 50):
        shelf.put(f"r{number}", "x" * 500)
        shelf.responses.remove("local", f"r{number}")

    assert shelf.has("r0")


def test_a_response_that_is_larger_than_all_may_be_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ocp, "_MAX_STORED_BYTES", 1_000)
    shelf = Shelf()

    shelf.put("r1", "x" * 5_000)
    shelf.put("r2")

    assert (shelf.has("r1"), shelf.has("r2")) == (False, True)
