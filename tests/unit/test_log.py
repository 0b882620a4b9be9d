"""The log: a ring, a private file that is rotated, and lines on a stream. It never raises."""
from __future__ import annotations

import io
import json
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clock import FakeClock
from depth import by_depth
from project import load_script

ocp = load_script("ocp_server.py")

TOKEN = "sk-ant-oat01-AbCdEf_123456-789"


class Notebook:
    """A log, with its stream and its file at hand."""

    def __init__(self, folder: Path, level: str = "info") -> None:
        self.stream = io.StringIO()
        self.path = Path(folder, "logs", "ocp.log")
        self.log = ocp.Log(self.stream, level, clock=lambda: 1_700_000_000.25)

    def lines(self) -> list[dict[str, Any]]:
        """What is in the file."""
        return [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]

    def names(self, count: int = 1000, level: str = "all") -> list[str]:
        """The names of the events in the ring."""
        return [entry["event"] for entry in self.log.recent(count, level)]


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[Notebook]:
    """A log that writes to a file."""
    made = Notebook(tmp_path)
    made.log.to_file(str(made.path))
    yield made
    made.log.close()


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- what an event becomes ----------------------------------------------------


def test_an_event_is_one_flat_record(notebook: Notebook) -> None:
    notebook.log.event("info", "door_opened", door="front", times=2, wide=False)

    entry = {
        "ts": "2023-11-14T22:13:20.250Z", "level": "info", "event": "door_opened",
        "door": "front", "times": 2, "wide": False,
    }
    assert notebook.log.recent(1, "all") == [entry]
    assert notebook.lines() == [entry]


def test_on_the_stream_it_is_a_line_for_people(notebook: Notebook) -> None:
    notebook.log.event("warn", "door_opened", door="front", times=2)

    line = notebook.stream.getvalue()
    assert line.endswith(" warn  door_opened door=front times=2\n")


def test_a_field_without_a_value_is_left_out(notebook: Notebook) -> None:
    notebook.log.event("info", "door_opened", door=None, times=0, note="")

    [entry] = notebook.log.recent(1, "all")
    assert "door" not in entry
    assert (entry["times"], entry["note"]) == (0, "")


def test_a_text_is_cut_to_one_line(notebook: Notebook) -> None:
    notebook.log.event("info", "door_opened", note="a\nb\r\n\tc " + "x" * 5000)

    [entry] = notebook.log.recent(1, "all")
    assert entry["note"].startswith("a b c xxx")
    assert len(entry["note"]) == 500
    assert notebook.stream.getvalue().count("\n") == 1
    assert len(notebook.lines()) == 1


def test_a_token_is_blotted_out_everywhere(notebook: Notebook) -> None:
    notebook.log.event("error", "door_broke", detail=f"key was {TOKEN}, sorry")

    places = (
        json.dumps(notebook.log.recent(1, "all")),
        notebook.path.read_text("utf-8"),
        notebook.stream.getvalue(),
    )
    assert all("key was sk-ant-[redacted], sorry" in place for place in places)
    assert not any("AbCdEf" in place for place in places)


def test_text_that_is_no_unicode_is_in_the_ring_all_the_same(notebook: Notebook) -> None:
    notebook.log.event("info", "door_opened", note="\ud83d \u00fc")

    assert notebook.log.recent(1, "all")[0]["note"] == "\\ud83d \u00fc"


def test_a_value_of_any_type_is_logged(notebook: Notebook) -> None:
    notebook.log.event("info", "door_opened", door=Path("/front"), counts={"a": 1})

    assert notebook.lines()[0]["door"] == "/front"
    assert notebook.lines()[0]["counts"] == {"a": 1}


#: Controls of both kinds, marks of direction, what has no width, a mark of byte order.
UNSEEN = ("\x00", "\x07", "\x1b", "\x7f", "\x80", "\x9b", "\u00ad", "\u061c", "\u200b", "\u200e",
          "\u202e", "\u2066", "\u2069", "\ufeff", "\U000e0041", "\udc9b")


@pytest.mark.parametrize("character", UNSEEN)
def test_what_cannot_be_seen_or_commands_a_terminal_is_escaped_everywhere(
    notebook: Notebook, character: str
) -> None:
    text = f"a{character}[2Jb"

    notebook.log.event("info", "door_opened", note=text, keys=[text], counts={text: text})

    escaped = "a" + character.encode("unicode_escape").decode() + "[2Jb"
    [entry] = notebook.log.recent(1, "all")
    assert (entry["note"], entry["keys"]) == (escaped, [escaped])
    assert entry["counts"] == {escaped: escaped}
    assert notebook.lines() == [entry]
    assert f"note={escaped}" in notebook.stream.getvalue()
    for place in (notebook.path.read_text("utf-8"), notebook.stream.getvalue()):
        assert place.replace("\n", "").isprintable()


def test_text_of_every_script_stays_as_it_is(notebook: Notebook) -> None:
    words = "K\u00fcche \u53a8\u623f \u0645\u0637\u0628\u062e \U0001f373"

    notebook.log.event("info", "door_opened", note=words)

    assert notebook.lines()[0]["note"] == words


# -- levels and the ring ------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "kept"),
    [
        ("debug", ["debug", "info", "warn", "error"]), ("info", ["info", "warn", "error"]),
        ("warn", ["warn", "error"]), ("error", ["error"]),
    ],
)
def test_events_below_the_level_are_not_kept(tmp_path: Path, least: str, kept: list[str]) -> None:
    notebook = Notebook(tmp_path, least)

    for level in ocp.LEVELS:
        notebook.log.event(level, level)

    assert notebook.names() == kept
    assert notebook.stream.getvalue().count("\n") == len(kept)


@pytest.mark.parametrize(
    ("count", "level", "found"),
    [
        (10, "all", ["a", "b", "c", "d"]), (10, "debug", ["a", "b", "c", "d"]),
        (2, "all", ["c", "d"]), (10, "warn", ["b", "d"]), (1, "warn", ["d"]),
        (10, "error", ["d"]), (0, "all", []),
    ],
)
def test_the_newest_events_of_a_level_or_worse_are_given_oldest_first(
    tmp_path: Path, count: int, level: str, found: list[str]
) -> None:
    notebook = Notebook(tmp_path, "debug")
    for kind, name in (("info", "a"), ("warn", "b"), ("debug", "c"), ("error", "d")):
        notebook.log.event(kind, name)

    assert notebook.names(count, level) == found


def test_the_ring_keeps_the_last_eight_hundred(tmp_path: Path) -> None:
    notebook = Notebook(tmp_path)

    for number in range(1_000):
        notebook.log.event("info", f"event_{number}")

    names = notebook.names(2_000)
    assert (len(names), names[0], names[-1]) == (800, "event_200", "event_999")


def test_those_who_follow_get_each_event_once(tmp_path: Path) -> None:
    notebook = Notebook(tmp_path)
    notebook.log.event("info", "a")
    notebook.log.audit("b")

    first, seen = notebook.log.since(0)
    notebook.log.audit("c")
    notebook.log.event("info", "d")
    second, _ = notebook.log.since(seen)

    assert [entry["event"] for entry in first] == ["a", "b"]
    assert [entry["event"] for entry in second] == ["c", "d"]


# -- what the operator changed ------------------------------------------------


def test_no_flood_of_events_pushes_out_what_the_operator_changed(notebook: Notebook) -> None:
    notebook.log.event("info", "before")
    notebook.log.audit("key_created", key="phone")

    for number in range(5_000):
        notebook.log.event("warn", f"event_{number}")

    names = notebook.names()
    assert (len(names), names[0], names[-1]) == (801, "key_created", "event_4999")
    assert notebook.names(10, "audit") == ["key_created"]


def test_the_last_two_hundred_changes_are_kept(notebook: Notebook) -> None:
    for number in range(250):
        notebook.log.audit(f"change_{number}")

    names = notebook.names(1000, "audit")
    assert (len(names), names[0], names[-1]) == (200, "change_50", "change_249")
    assert notebook.names() == names


def test_what_the_operator_changed_is_in_a_private_file_of_its_own_too(
    notebook: Notebook
) -> None:
    path = notebook.path.with_name("audit.log")

    notebook.log.event("info", "door_opened")
    existed = path.exists()
    notebook.log.audit("key_created", key="phone\u202e")
    notebook.log.close()

    [line] = path.read_text("utf-8").splitlines()
    assert not existed
    assert json.loads(line) == notebook.lines()[-1]
    assert json.loads(line)["key"] == "phone\\u202e"
    assert mode_of(path) == 0o600


def test_what_the_operator_changed_is_kept_at_every_level(tmp_path: Path) -> None:
    notebook = Notebook(tmp_path, "error")

    notebook.log.audit("key_revoked")

    assert notebook.names() == ["key_revoked"]


# -- after a restart ----------------------------------------------------------


def restarted(notebook: Notebook, folder: Path) -> Notebook:
    """A log that goes on in the files of another one."""
    notebook.log.close()
    again = Notebook(folder)
    again.log.event("info", "before_the_file")
    again.log.to_file(str(again.path))
    return again


def test_after_a_restart_the_end_of_the_files_is_in_memory(
    notebook: Notebook, tmp_path: Path
) -> None:
    notebook.log.event("info", "a")
    notebook.log.audit("b", key="phone")
    notebook.log.event("warn", "c")

    again = restarted(notebook, tmp_path)
    again.log.event("info", "d")
    followed, following = again.log.since(0)
    again.log.close()

    names = ["a", "b", "c", "before_the_file", "d"]
    assert again.names() == [entry["event"] for entry in followed] == names
    assert following == len(names)
    assert again.names(10, "audit") == ["b"]


def test_only_as_much_is_read_back_as_memory_keeps(notebook: Notebook, tmp_path: Path) -> None:
    for number in range(1_000):
        notebook.log.event("info", f"event_{number}")
    for number in range(250):
        notebook.log.audit(f"change_{number}")

    again = restarted(notebook, tmp_path)
    again.log.close()

    names = again.names(2_000)
    assert len(again.names(1_000, "audit")) == 200
    assert len(names) == 801 and names[-2:] == ["change_249", "before_the_file"]


def test_a_file_that_was_put_aside_is_read_too(notebook: Notebook, tmp_path: Path) -> None:
    notebook.log.event("info", "old")
    notebook.log.close()
    notebook.path.rename(notebook.path.with_name("ocp.log.1"))

    again = restarted(notebook, tmp_path)
    again.log.close()

    assert again.names() == ["old", "before_the_file"]


@pytest.mark.parametrize("garbage", [
    b"\xff\xfe", b"{", b"[]", b"null", b'"text"', b'{"ts": 1, "level": "info", "event": "x"}',
    b'{"ts": "2026", "level": [], "event": "x"}', b'{"level": "info"}', b"[" * 5_000,
    b"\0" * 600_000,
], ids=lambda data: repr(data[:12]))
def test_lines_that_are_no_events_are_skipped(
    notebook: Notebook, tmp_path: Path, garbage: bytes
) -> None:
    notebook.log.event("info", "good")
    with notebook.path.open("r+b") as file:
        file.seek(0)
        content = file.read()
        file.seek(0)
        file.write(garbage + b"\n" + content)

    again = restarted(notebook, tmp_path)
    again.log.close()

    assert again.names() == ["good", "before_the_file"]


def test_a_file_that_cannot_be_read_stops_no_start(notebook: Notebook, tmp_path: Path) -> None:
    notebook.path.with_name("ocp.log.1").mkdir()

    again = restarted(notebook, tmp_path)
    again.log.close()

    assert again.names() == ["before_the_file"]


# -- refusals that are kept ---------------------------------------------------


class Book:
    """What is kept of refusals."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.kept = ocp.RefusedRequests(self.clock)

    def add(self, peer: str = "10.0.0.7", kind: str = "invalid_api_key", **fields: Any) -> None:
        fields = {"message": "No.", **fields}
        self.kept.add(ocp.Refused(peer, 401, kind, **fields))


def test_refusals_are_summed_by_peer_key_preview_and_kind() -> None:
    book = Book()
    for _ in range(3):
        book.add(preview="ocp_a...b", request_id="req_1")
        book.clock.advance(1)
    book.add(preview="ocp_c...d")
    book.add(kind="not_found")
    book.add(key="phone")
    book.add("10.0.0.8", preview="ocp_a...b")

    groups = book.kept.groups()

    assert sorted(group.count for group in groups) == [1, 1, 1, 1, 3]
    (often,) = [group for group in groups if group.count == 3]
    assert often.last_s - often.at_s == 2
    assert often.count_since(often.last_s) == 1 and often.count_since(0) == 3


def test_strangers_displace_only_strangers_and_one_of_them_only_its_own() -> None:
    book = Book()
    book.add("10.0.0.1", key="phone")
    book.add("10.0.0.2", preview="ocp_a...b")
    for number in range(5_000):
        book.add("10.0.0.3", preview=f"key {number}")

    groups = book.kept.groups()

    assert len(groups) == 1 + 1 + 20 + 1
    assert {group.newest.peer for group in groups} == {"10.0.0.1", "10.0.0.2", "10.0.0.3"}
    assert max(group.count for group in groups) == 5_000 - 20
    for number in range(1_000):
        book.add(f"peer {number}")
    groups = book.kept.groups()
    assert len(groups) == 100 + 1 and "phone" in {group.newest.key for group in groups}


def test_what_a_client_wrote_is_kept_short_and_without_secrets() -> None:
    book = Book()
    book.add(message=f"a\x1b[2J {TOKEN} " + "x" * 9_000, path="/p" * 900, user_agent="u\n" * 900)

    (group,) = book.kept.groups()

    assert "AbCdEf" not in group.newest.message and group.newest.message.isprintable()
    assert len(group.newest.message) <= 510
    assert len(group.newest.path) == 100 and len(group.newest.user_agent) <= 120


REFUSED_LINE = {
    "ts": "2026-11-20T14:00:00.000Z", "level": "info", "event": "request_refused",
    "peer": "10.0.0.7", "status": 401, "kind": "invalid_api_key", "message": "No.",
    "caller": "public", "request_id": "req_1", "preview": "ocp_a...b",
}


@pytest.mark.parametrize(("fields", "key"), [
    ({}, ""), ({"key": "phone"}, "phone"), ({"caller": "tablet"}, "tablet"),
])
def test_a_start_takes_refusals_from_the_log(
    tmp_path: Path, fields: dict[str, Any], key: str
) -> None:
    notebook = Notebook(tmp_path)
    notebook.path.parent.mkdir()
    notebook.path.write_text(json.dumps({**REFUSED_LINE, **fields}) + "\n")
    notebook.log.to_file(str(notebook.path))
    notebook.log.close()

    (group,) = ocp.Refusals(notebook.log).kept.groups()

    assert ocp.iso_time(group.at_s) == REFUSED_LINE["ts"]
    assert (group.newest.key, group.newest.preview) == (key, "ocp_a...b")
    assert group.with_id("req_1") == group.newest and group.with_id("req_2") is None


@pytest.mark.parametrize("fields", [
    {"event": "answer_finished"}, {"status": "401"}, {"kind": None}, {"kind": ""}, {"peer": 7},
    {"ts": "yesterday"}, {"message": ["No."]},
], ids=str)
def test_a_line_that_tells_no_refusal_is_passed_over(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    notebook = Notebook(tmp_path)
    notebook.path.parent.mkdir()
    notebook.path.write_text(json.dumps({**REFUSED_LINE, **fields}) + "\n")
    notebook.log.to_file(str(notebook.path))
    notebook.log.close()

    assert ocp.Refusals(notebook.log).kept.groups() == []


# -- refusals -----------------------------------------------------------------


class Door:
    """What strangers are refused, with the log at hand."""

    def __init__(self, folder: Path) -> None:
        self.notebook = Notebook(folder)
        self.clock = FakeClock()
        self.refusals = ocp.Refusals(self.notebook.log, self.clock)

    def sums(self) -> list[tuple[str, int, dict[str, int]]]:
        """The sums in the log: peer, number, statuses."""
        return [
            (entry["peer"], entry["count"], entry["statuses"])
            for entry in self.notebook.log.recent(1000, "all")
            if entry["event"] == "requests_refused"
        ]


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return Door(tmp_path)


def test_a_few_refusals_have_a_line_each_and_no_sum(door: Door) -> None:
    for number in range(5):
        door.refusals.record("10.0.0.7", 401, path=f"/{number}")
    door.clock.advance(61)
    door.refusals.tend()

    assert door.notebook.names() == ["request_refused"] * 5
    assert door.notebook.log.recent(1, "all")[0]["path"] == "/4"


def test_many_refusals_of_a_minute_become_one_line(door: Door) -> None:
    for number in range(12_000):
        door.refusals.record("10.0.0.7", 404 if number % 3 else 401)
    door.refusals.tend()
    before = len(door.notebook.names())
    door.clock.advance(61)
    door.refusals.tend()
    door.refusals.tend()

    assert before == 5
    assert door.sums() == [("10.0.0.7", 12_000, {"401": 4_000, "404": 8_000})]


def test_each_minute_begins_anew(door: Door) -> None:
    for _ in range(3):
        for _ in range(7):
            door.refusals.record("10.0.0.7", 401)
        door.clock.advance(61)
        door.refusals.tend()

    assert door.notebook.names() == (["request_refused"] * 5 + ["requests_refused"]) * 3


def test_refusals_of_very_many_peers_take_few_lines_and_little_memory(door: Door) -> None:
    count = by_depth(10_000, 100_000, 100_000)
    for number in range(count):
        door.refusals.record(f"peer-{number}", 401)
    door.clock.advance(61)
    door.refusals.tend()

    assert door.notebook.names() == ["request_refused"] * 32 + ["requests_refused"]
    assert door.sums() == [("others", count - 32, {"401": count - 32})]


def test_the_addresses_of_a_network_of_ipv6_are_summed_up_together(door: Door) -> None:
    for number in range(100):
        door.refusals.record(f"2001:db8:1:2::{number:x}", 401)
    door.refusals.tend(at_once=True)

    first = door.notebook.log.recent(1000, "all")[1]
    assert first["peer"] == "2001:db8:1:2::1"
    assert door.sums() == [("2001:db8:1:2::/64", 100, {"401": 100})]


def test_at_the_end_the_sums_are_told_at_once(door: Door) -> None:
    for _ in range(9):
        door.refusals.record("10.0.0.7", 401)
    door.refusals.tend(at_once=True)

    assert door.sums() == [("10.0.0.7", 9, {"401": 9})]


# -- the file -----------------------------------------------------------------


def test_the_file_and_its_folder_are_private_from_birth(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        notebook = Notebook(tmp_path)
        notebook.log.to_file(str(notebook.path))
    finally:
        os.umask(before)
    notebook.log.close()

    assert (mode_of(notebook.path), mode_of(notebook.path.parent)) == (0o600, 0o700)


def test_a_new_start_goes_on_in_the_same_file(notebook: Notebook, tmp_path: Path) -> None:
    notebook.log.event("info", "first")
    notebook.log.close()

    again = Notebook(tmp_path)
    again.log.to_file(str(again.path))
    again.log.event("info", "second")
    again.log.close()

    assert [entry["event"] for entry in again.lines()] == ["first", "second"]


def fill(notebook: Notebook) -> None:
    """Makes the file so large that the next line does not fit, as a log finds it at a start."""
    notebook.log.close()
    os.truncate(notebook.path, 10_000_000)
    notebook.log.to_file(str(notebook.path))


def test_a_full_file_is_put_aside_and_the_new_one_is_private_too(notebook: Notebook) -> None:
    fill(notebook)

    notebook.log.event("info", "after")

    assert [entry["event"] for entry in notebook.lines()] == ["after"]
    old = notebook.path.with_name("ocp.log.1")
    assert old.stat().st_size == 10_000_000
    assert (mode_of(notebook.path), mode_of(old)) == (0o600, 0o600)


def test_three_old_files_are_kept(notebook: Notebook) -> None:
    for _ in range(5):
        fill(notebook)
        notebook.log.event("info", "after")

    names = sorted(path.name for path in notebook.path.parent.iterdir())
    assert names == ["ocp.log", "ocp.log.1", "ocp.log.2", "ocp.log.3"]


def test_a_file_that_cannot_be_put_aside_stops_nothing(
    notebook: Notebook, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2, 3):
        notebook.path.with_name(f"ocp.log.{number}").mkdir()
    fill(notebook)

    notebook.log.event("info", "after")

    assert notebook.names() == ["after"]
    assert "after" in notebook.stream.getvalue()
    assert capfd.readouterr().err == ""


def test_a_home_that_was_removed_stops_nothing_and_is_not_made_again(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    notebook = Notebook(home)
    notebook.log.to_file(str(notebook.path))
    shutil.rmtree(home)

    notebook.log.event("info", "after")
    notebook.log.close()

    assert notebook.names() == ["after"] and not home.exists()


@pytest.mark.parametrize("spoil", ["moved", "deleted", "folder", "audit"])
def test_a_file_that_was_moved_or_deleted_is_begun_anew(notebook: Notebook, spoil: str) -> None:
    notebook.log.audit("before")
    path = notebook.path.with_name("audit.log") if spoil == "audit" else notebook.path
    if spoil == "moved":
        path.rename(path.with_name("elsewhere"))
    elif spoil == "folder":
        shutil.rmtree(path.parent)
    else:
        path.unlink()
    notebook.log.audit("after")
    notebook.log.audit("and_after")

    lines = [json.loads(line)["event"] for line in path.read_text().splitlines()]
    assert lines == ["after", "and_after"]
    assert (mode_of(path), mode_of(path.parent)) == (0o600, 0o700)


def test_a_file_that_cannot_be_made_is_told_to_the_caller(tmp_path: Path) -> None:
    Path(tmp_path, "logs").write_text("in the way", "ascii")
    notebook = Notebook(tmp_path)

    with pytest.raises(OSError, match="logs"):
        notebook.log.to_file(str(notebook.path))

    notebook.log.event("info", "after")
    assert notebook.names() == ["after"]


def test_after_closing_events_still_go_to_the_ring_and_the_stream(notebook: Notebook) -> None:
    notebook.log.close()
    notebook.log.close()

    notebook.log.event("info", "after")

    assert notebook.names() == ["after"]
    assert "after" in notebook.stream.getvalue()
    assert notebook.lines() == []


# -- the stream ---------------------------------------------------------------


class BrokenStream(io.StringIO):
    """A terminal that has gone away."""

    def write(self, text: str) -> int:
        """Fails."""
        raise BrokenPipeError


def closed_stream() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize(
    "stream",
    [BrokenStream(), closed_stream(), io.TextIOWrapper(io.BytesIO(), encoding="ascii"), None],
    ids=["broken", "closed", "ascii", "none"],
)
def test_a_stream_that_cannot_be_written_stops_nothing(stream: Any) -> None:
    log = ocp.Log(stream, "info")

    log.event("info", "door_opened", note="\u00fc")

    assert [entry["note"] for entry in log.recent(1, "all")] == ["\u00fc"]


def test_events_of_many_threads_stay_whole(notebook: Notebook) -> None:
    def chatter(name: str) -> None:
        for _ in range(50):
            notebook.log.event("info", name, note=name * 20)

    threads = [threading.Thread(target=chatter, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(notebook.lines()) == 200
    assert all(entry["note"] == entry["event"] * 20 for entry in notebook.lines())
    assert all(len(line.split()) == 4 for line in notebook.stream.getvalue().splitlines())
