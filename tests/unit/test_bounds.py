"""Where an answer ends that the client bounds in a way which the API does not take."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from project import load_script
from rendering import STARTED, call, finished

ocp = load_script("ocp_server.py")

BEGUN = ocp.BlockStarted(0, {"type": "text", "text": ""})
STOPPED = ocp.BlockStopped(0)
THINKING = ocp.BlockStarted(0, {"type": "thinking", "thinking": ""})


def bounds(*stops: str, shape: Any = None, **options: Any) -> Any:
    return ocp.AnswerFilter(ocp.Options(stop_sequences=stops, **options), shape)


def told(of: Any, events: Iterable[Any]) -> list[Any]:
    """What the client gets, up to where the answer is ended."""
    found: list[Any] = []
    for event in events:
        found += of.events(event)
        if of.ended:
            break
    return found


def said(pieces: Iterable[str]) -> list[Any]:
    """The events of a text in these pieces."""
    return [STARTED, BEGUN, *(ocp.Delta(0, "text", piece) for piece in pieces), STOPPED, finished()]


def text_of(events: Iterable[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, ocp.Delta))


def end_of(events: Sequence[Any]) -> tuple[str, str | None]:
    """The reason and the sequence of the only end, which comes last."""
    assert [isinstance(event, ocp.Finished) for event in events].count(True) == 1
    return events[-1].stop_reason, events[-1].stop_sequence


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "stop"),
    [
        (["\n"], ["one\ntwo"], "one", "\n"),
        (["\n"], ["one", "\n", "two"], "one", "\n"),
        (["\n"], ["\none"], "", "\n"),
        (["\n\n"], ["a\nb\n", "\nc"], "a\nb", "\n\n"),
        (["\n\n"], ["a\n", "b\n", "c"], "a\nb\nc", None),
        (["\n\n"], ["a\n"], "a\n", None),
        (["\n\n", "\n"], ["a\n\nb"], "a", "\n"),
        ([" \t ", "\n \n"], ["a \t", "\n \n"], "a \t", "\n \n"),
        (["\r\n"], ["a\r", "\r", "\nb"], "a\r", "\r\n"),
    ],
    ids=str,
)
def test_a_text_ends_before_the_first_stop_text_however_it_is_cut(
    stops: list[str], pieces: list[str], text: str, stop: str | None
) -> None:
    whole = "".join(pieces)
    for cuts in (pieces, [whole], list(whole)):
        found = told(bounds(*stops), said(cuts))

        assert text_of(found) == text
        assert end_of(found) == (("stop_sequence", stop) if stop else ("end_turn", None))
        assert STOPPED in found


def test_stop_sequences_beyond_what_the_api_takes_are_kept_here() -> None:
    stops = [f"<{number}>" for number in range(30)]

    assert text_of(told(bounds(*stops), said(["a<29>b"]))) == "a"
    assert text_of(told(bounds(*stops), said(["a<3>b"]))) == "a<3>b"


def test_what_claude_makes_of_its_own_stop_sequences_is_passed_on() -> None:
    end = finished("stop_sequence", sequence="END")

    found = told(bounds("END", "\n"), [STARTED, BEGUN, ocp.Delta(0, "text", "a"), STOPPED, end])

    assert found[-1] == end and text_of(found) == "a"


def test_no_stop_text_ends_a_call_or_a_thought_or_a_shaped_answer() -> None:
    thought = [THINKING, ocp.Delta(0, "thinking", "a\nb"), STOPPED]
    events = [STARTED, *thought, *call(1, "id1", "f", '{"a":\n', "1}"), finished("tool_use")]

    assert told(bounds("\n"), events) == events
    shape = ocp.OutputSchema({"type": "object"}, False)
    assert told(bounds("\n", shape=shape), said(["a\nb"])) == said(["a\nb"])


def test_what_was_held_back_is_void_when_claude_begins_again() -> None:
    of = bounds("\n\n")
    events = [STARTED, BEGUN, ocp.Delta(0, "text", "a\n"), ocp.Restarted(), *said(["\nb"])]

    found = told(of, events)

    assert text_of(found[found.index(ocp.Restarted()):]) == "\nb"


def test_the_beginning_of_a_block_is_told_with_what_follows_it() -> None:
    of = bounds()

    assert of.events(BEGUN) == []
    assert of.events(ocp.Tick()) == [ocp.Tick()]
    assert of.events(ocp.Delta(0, "text", "a")) == [BEGUN, ocp.Delta(0, "text", "a")]
    assert of.events(BEGUN) == [] and of.events(ocp.Restarted()) == [ocp.Restarted()]
    assert told(bounds(), said(["a", "b"])) == said(["a", "b"])


def test_an_answer_of_no_tokens_ends_before_it_begins() -> None:
    of = bounds(max_tokens=0)

    assert told(of, said(["a"])) == [STARTED, ocp.Finished("max_tokens", None, ocp.NO_USAGE)]
    assert of.ended


def test_thinking_that_is_not_wanted_keeps_its_place_and_its_signature() -> None:
    signature = ocp.Delta(0, "signature", "c2ln")
    events = [THINKING, ocp.Delta(0, "thinking", "Hm."), signature, STOPPED]

    found = told(bounds(hides_thinking=True), events)

    assert text_of(found) == "c2ln"
    assert [type(event) for event in found] == [type(event) for event in events]
