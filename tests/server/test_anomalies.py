"""What can go wrong at a line goes wrong at every line: claude dies, garbage comes, the client
leaves. Whatever happens, the answer is well formed and nothing stays behind.

The answers are those that the real program printed."""
from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chat import (
    NO_IDLE,
    ask,
    encoded,
    error_of,
    finish_reasons,
    pieces,
    question,
    stream_error,
)
from http_client import Reply
from processes import descendants
from project import TRANSCRIPTS
from raw_http import RawConnection, post
from server import Server, at_rest, running_server
from shell_claude import ShellClaude
from waiting import eventually

Json = Any

RECORDINGS = ("2.1.197-plain", "2.1.329-thinking")
#: It reads on, so that the end of its input is its end too.
HANG = "while read -r line; do :; done; exit"


class Recording(NamedTuple):
    """What claude printed for one question."""

    lines: list[Json]
    #: How many lines it takes until the answer is complete.
    complete: int
    text: str


@cache
def recording(name: str) -> Recording:
    entries = map(json.loads, (TRANSCRIPTS / f"{name}.jsonl").read_text().splitlines())
    lines = [entry["line"] for entry in entries
             if entry["dir"] == "out" and entry["line"]["type"] != "control_response"]
    events = [line["event"] if line["type"] == "stream_event" else {} for line in lines]
    reasons = [event.get("delta", {}).get("stop_reason") for event in events]
    complete = next(number for number, reason in enumerate(reasons, 1) if reason)
    texts = [event["delta"].get("text", "") for event in events[:complete] if "delta" in event]
    assert reasons[complete - 1] == "end_turn"
    return Recording(lines, complete, "".join(texts))


def every_line(*names: str) -> list[Any]:
    """A parameter for each place before, between and after the lines of the recordings."""
    return [pytest.param(name, place, id=f"{name} {place}")
            for name in names for place in range(len(recording(name).lines) + 1)]


class Stage(NamedTuple):
    """A server, and the claude whose lines are the test's own."""

    server: Server
    claude: ShellClaude


def on_stage(folder: Path, env: dict[str, str]) -> Iterator[Stage]:
    claude = ShellClaude(folder)
    with running_server(folder, claude=claude.program, env={**NO_IDLE, **env}) as server:
        yield Stage(server, claude)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A server that has place for one request, so that a leak shows at once."""
    env = {"CLAUDE_MAX_CONCURRENT": "1", "CLAUDE_MAX_QUEUE": "0"}
    yield from on_stage(tmp_path_factory.mktemp("narrow"), env)


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A server that sends the headers of a whole answer after a short silence."""
    yield from on_stage(tmp_path_factory.mktemp("impatient"), {"OCP_WHOLE_SILENCE": "40"})


def check_nothing_is_left(stage: Stage) -> None:
    server = stage.server
    # The one that stays ends the others if the server is killed.
    assert eventually(lambda: at_rest(server) and len(descendants(server.pid)) == 1)
    assert server.zombies() == []
    assert server.log_entries("request_broke") == []
    assert server.log_entries("housekeeping_failed") == []


def when_free(server: Server, **fields: Json) -> Reply:
    """The answer to a question that is asked once nobody else is running."""
    eventually(lambda: at_rest(server))
    return ask(server, **fields)


def check_answers(server: Server, found: Recording) -> None:
    """Both modes give the whole answer."""
    whole, streamed = when_free(server), when_free(server, stream=True)
    choice = whole.json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (found.text, "stop")
    assert "".join(pieces(streamed.events)) == found.text
    assert finish_reasons(streamed.events) == ["stop"]
    assert streamed.events[-1][1] == "[DONE]"


def check_failures(server: Server, found: Recording) -> None:
    """Both modes fail, and show nothing that was not said."""
    whole, streamed = when_free(server), when_free(server, stream=True)
    assert whole.status >= 500 and error_of(whole)["type"] == "server_error"
    if streamed.status == 200:
        assert stream_error(streamed.events)["type"] == "server_error"
        assert found.text.startswith("".join(pieces(streamed.events)))
    else:
        assert error_of(streamed) == error_of(whole)


# ---------------------------------------------------------------------------
# (a) claude dies
# ---------------------------------------------------------------------------

def check_death(stage: Stage, found: Recording, place: int) -> None:
    if place >= found.complete:
        check_answers(stage.server, found)
    else:
        check_failures(stage.server, found)
    check_nothing_is_left(stage)


@pytest.mark.few_cases
@pytest.mark.parametrize(("name", "place"), every_line(*RECORDINGS))
def test_claude_may_die_after_any_line(narrow: Stage, name: str, place: int) -> None:
    found = recording(name)
    narrow.claude.play(found.lines[:place], "exit 0" if place % 2 else "kill -9 $$")

    check_death(narrow, found, place)


@pytest.mark.few_cases
@pytest.mark.parametrize(("name", "place"), every_line("2.1.197-plain"))
def test_claude_may_die_within_any_line(narrow: Stage, name: str, place: int) -> None:
    found = recording(name)
    line = encoded(found.lines[min(place, len(found.lines) - 1)])
    narrow.claude.play([*found.lines[:place], line[:len(line) // 2]], "exit 1")

    check_death(narrow, found, place)


# ---------------------------------------------------------------------------
# (b) the client leaves
# ---------------------------------------------------------------------------

@pytest.mark.few_cases
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("name", "place"), every_line("2.1.329-thinking"))
def test_a_client_may_leave_after_any_line(
    narrow: Stage, name: str, place: int, stream: bool
) -> None:
    found = recording(name)
    narrow.claude.play(found.lines[:place], HANG)
    eventually(lambda: at_rest(narrow.server))
    count = len(narrow.claude.asked())

    with RawConnection(narrow.server.port) as wire:
        wire.send(post(encoded(question(stream=stream))))
        eventually(lambda: len(narrow.claude.asked()) > count)
        if stream and any(is_shown(line) for line in found.lines[:place]):
            assert wire.status_line() == "HTTP/1.1 200 OK"

    check_nothing_is_left(narrow)


def is_shown(line: Json) -> bool:
    """Whether a client sees something of it."""
    delta = line.get("event", {}).get("delta", {})
    return bool(delta.get("text") or delta.get("thinking"))


# ---------------------------------------------------------------------------
# (c) garbage
# ---------------------------------------------------------------------------

GARBAGE: list[Json] = [
    b"a plugin says: {hello}\n",
    b"\xff\xfe\x00 noise\r\n\n",
    {"type": "stream_event", "event": [1, 2]},
    {"type": "a_type_of_the_future", "event": {"type": "message_stop"}},
    [{"type": "result"}],
]


@pytest.mark.few_cases
@pytest.mark.parametrize(("name", "place"), every_line(*RECORDINGS))
def test_garbage_may_come_after_any_line(narrow: Stage, name: str, place: int) -> None:
    found = recording(name)
    narrow.claude.play([*found.lines[:place], *GARBAGE, *found.lines[place:]])

    check_answers(narrow.server, found)
    check_nothing_is_left(narrow)


@pytest.mark.parametrize(("name", "place"), every_line("2.1.197-plain"))
def test_half_a_line_may_come_after_any_line(narrow: Stage, name: str, place: int) -> None:
    found = recording(name)
    half = b'{"type":"stream_event","event":{"type":"content_bl\n'
    narrow.claude.play([*found.lines[:place], half, *found.lines[place:]])

    check_death(narrow, found, place)


@pytest.mark.parametrize(("name", "place"), every_line("2.1.197-plain"))
def test_any_line_may_come_twice_or_not_at_all(narrow: Stage, name: str, place: int) -> None:
    lines = recording(name).lines
    for changed in (lines[:place] + lines[place + 1:], lines[:place + 1] + lines[place:]):
        narrow.claude.play(changed, "exit 0")

        whole, streamed = when_free(narrow.server), when_free(narrow.server, stream=True)

        assert whole.status in (200, 400, 502)
        check_form(whole, streamed)
    check_nothing_is_left(narrow)


def check_form(whole: Reply, streamed: Reply) -> None:
    """Both answers are a success or a failure, and never something between."""
    if whole.status == 200:
        assert whole.json()["choices"][0]["finish_reason"] in ("stop", "length")
    else:
        error_of(whole)
    if streamed.status != 200:
        error_of(streamed)
    elif streamed.events[-1][1] == "[DONE]":
        assert len(finish_reasons(streamed.events)) == 1
    else:
        stream_error(streamed.events)


# ---------------------------------------------------------------------------
# After the headers of a whole answer
# ---------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "place"), every_line("2.1.197-plain"))
def test_a_whole_answer_whose_headers_are_out_is_whole_or_cut(
    impatient: Stage, name: str, place: int
) -> None:
    found = recording(name)
    impatient.claude.play(found.lines[:place], "sleep 0.1; exit 0")

    try:
        reply = ask(impatient.server)
    except http.client.IncompleteRead as cut:
        assert cut.partial.strip() == b"" and place < found.complete
    else:
        assert reply.json()["choices"][0]["message"]["content"] == found.text
        assert place >= found.complete
    check_nothing_is_left(impatient)
