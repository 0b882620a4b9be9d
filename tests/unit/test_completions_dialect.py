"""The dialect of legacy completions: a prompt, or several, and plain text."""
from __future__ import annotations

import json
from typing import Any

import pytest

from project import load_script
from rendering import (
    CREATED_S,
    GOLDEN,
    REASONED,
    REQUEST_ID,
    STARTED,
    TEXT,
    THINKING,
    USAGE,
    check_golden,
    conversation,
    finished,
    frames,
    golden_name,
    parsing,
    refusal_of,
    stream_bytes,
    whole_bytes,
)

ocp = load_script("ocp_server.py")

Json = dict[str, Any]


def turn(prompt: object = "Once", **fields: object) -> Any:
    """The Turn of a request with this prompt."""
    return ocp.COMPLETIONS.parse({"prompt": prompt, **fields}, parsing())


def prompts_of(found: Any) -> list[str]:
    """What each choice is asked."""
    choices = [found.choice(index) for index in range(found.choices)]
    return [conversation(choice)[0][1][0] for choice in choices]


# -- parsing ------------------------------------------------------------------


def test_the_prompt_is_the_user_s_message() -> None:
    found = turn("Once upon", model="claude-haiku-4-5", max_tokens=7, stop=["END"], temperature=0.5,
                 stream=True)

    assert conversation(found) == [("user", ["Once upon"])]
    assert (found.model.id, found.stream) == ("claude-haiku-4-5-20251001", True)
    assert found.options == ocp.Options(
        max_tokens=7, stop_sequences=("END",), sampling=(("temperature", 0.5),), thinking_tokens=0
    )
    assert (found.system, found.tools, found.output_schema, found.ignored) == ("", (), None, ())


@pytest.mark.parametrize(
    ("prompt", "count", "asked"),
    [
        ("a", None, ["a"]),
        ("a", 3, ["a"] * 3),
        (["a"], 1, ["a"]),
        (["a", "b"], None, ["a", "b"]),
        (["a", "b"], 2, ["a", "a", "b", "b"]),
        (list("abcdefghi"), 1, list("abcdefghi")),
        (["a"] * 128, None, ["a"] * 128),
        (["a", "b"], 8, ["a"] * 8 + ["b"] * 8),
    ],
)
def test_each_prompt_is_answered_so_many_times(prompt: Any, count: int, asked: list[str]) -> None:
    assert prompts_of(turn(prompt, n=count)) == asked


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [" "]}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": [1, 2, 3]}, "prompt"),
        ({"prompt": [[1, 2]]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 43, "n": 3}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"model": 7}, "model"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"stop": 7}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"echo": "yes"}, "echo"),
        ({"stream_options": 7}, "stream_options"),
        ({"stream_options": {"include_usage": 7}}, "stream_options.include_usage"),
    ],
    ids=str,
)
def test_a_field_that_is_wrong_is_refused_with_its_path(fields: Json, param: str) -> None:
    error = refusal_of(ocp.COMPLETIONS, {"prompt": "Once", **fields})

    assert (error.status, error.param) == (400, param)


@pytest.mark.parametrize(("name", "value"), [("suffix", "The end."), ("logprobs", 3)])
def test_what_cannot_be_had_is_refused(name: str, value: object) -> None:
    error = refusal_of(ocp.COMPLETIONS, {"prompt": "Once", name: value})

    assert (error.error_code, error.param) == ("unsupported_parameter", name)


@pytest.mark.parametrize("fields", [{"suffix": ""}, {"logprobs": 0}, {"echo": False}, {"n": 1}])
def test_the_plain_form_of_a_parameter_is_fine(fields: Json) -> None:
    assert turn(**fields).ignored == ()


@pytest.mark.parametrize(
    ("name", "value"), [("best_of", 3), ("seed", 7), ("user", "me"), ("logit_bias", {"1": 1})]
)
def test_a_harmless_parameter_is_named_as_ignored(name: str, value: object) -> None:
    assert turn(**{name: value}).ignored == (name,)


def test_a_body_that_is_no_object_is_refused() -> None:
    assert refusal_of(ocp.COMPLETIONS, ["Once"]).status == 400


# -- answers, byte for byte ---------------------------------------------------


def of_both(*events: Any) -> list[Any]:
    """The events of two choices, side by side."""
    return [(index, event) for event in events for index in (1, 0)]


#: Answers by the name of their golden file, which also says how they are asked for.
ANSWERS = {
    "whole": [STARTED, *TEXT, finished()],
    "whole-thinking": [STARTED, *THINKING, *TEXT, REASONED],
    "whole-length": [STARTED, *TEXT, finished("max_tokens")],
    "whole-empty": [STARTED, finished("stop_sequence")],
    "whole-restart": [STARTED, *TEXT, ocp.Restarted(), STARTED, *TEXT, finished()],
    "whole-echo": [STARTED, *TEXT, finished()],
    "whole-choices-echo": of_both(STARTED, *TEXT, finished()),
    "stream": [STARTED, *TEXT, finished()],
    "stream-thinking": [STARTED, *THINKING, *TEXT, REASONED],
    "stream-length": [STARTED, *TEXT, finished("max_tokens")],
    "stream-empty-echo": [STARTED, finished("stop_sequence")],
    "stream-echo": [STARTED, *TEXT, finished()],
    "stream-choices-echo-usage": of_both(STARTED, *TEXT, finished()),
    "stream-usage": [STARTED, *TEXT, REASONED],
    "stream-ticks": [ocp.Tick(), STARTED, *TEXT, ocp.Tick(), finished()],
    "stream-restart-in-thinking": [
        STARTED, *THINKING, ocp.Restarted(), STARTED, *THINKING, *TEXT, finished(),
    ],
    "stream-restart-in-text": [STARTED, *TEXT, ocp.Restarted(), STARTED, *TEXT, finished()],
    "stream-error": [STARTED, *TEXT, ocp.Overloaded("Overloaded")],
}
STREAMS = sorted(name for name in ANSWERS if name.startswith("stream"))
BROKEN = ("stream-error", "stream-restart-in-text")


def asked(name: str) -> Any:
    """The Turn that a golden answer belongs to, with nothing in it that changes."""
    found = turn(
        ["Once", "Twice"] if "choices" in name else "Once", stream=name.startswith("stream"),
        echo="echo" in name, stream_options={"include_usage": name.endswith("usage")},
    )
    form = found.reply_format._replace(id="cmpl-1", created_s=CREATED_S, model="sonnet")
    return found._replace(reply_format=form)


def answer(name: str) -> bytes:
    """The bytes of an answer as the server sends them."""
    render = whole_bytes if name.startswith("whole") else stream_bytes
    return render(ocp.COMPLETIONS, asked(name), ANSWERS[name])


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_an_answer_is_the_same_to_the_byte(name: str) -> None:
    check_golden(golden_name("completions", name), answer(name))


def test_every_golden_file_has_its_answer() -> None:
    assert {file.name for file in GOLDEN.glob("completions-*")} == {
        golden_name("completions", name) for name in ANSWERS
    }


# -- answers, in words --------------------------------------------------------


def texts(name: str) -> dict[int, str]:
    """The text of each choice, put together from its chunks."""
    found: dict[int, str] = {}
    for _, chunk in frames(answer(name)):
        for choice in chunk.get("choices", ()) if isinstance(chunk, dict) else ():
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return found


@pytest.mark.parametrize("name", [name for name in STREAMS if name not in BROKEN])
def test_a_complete_stream_has_one_finish_reason_for_each_choice_and_then_done(name: str) -> None:
    *found, (_, last) = frames(answer(name))

    choices = [choice for _, chunk in found for choice in chunk["choices"]]
    ends = [choice["index"] for choice in choices if choice["finish_reason"]]
    assert last == "[DONE]"
    assert sorted(ends) == sorted(set(ends)) == list(range(asked(name).choices))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_stream_ends_with_its_error_and_has_no_finish(name: str) -> None:
    *found, (_, last) = frames(answer(name))

    assert set(last) == {"error"}
    assert not any(choice["finish_reason"] for _, chunk in found for choice in chunk["choices"])


@pytest.mark.parametrize(
    ("stream", "same"),
    [("stream", "whole"), ("stream-thinking", "whole"), ("stream-echo", "whole-echo"),
     ("stream-choices-echo-usage", "whole-choices-echo"), ("stream-restart-in-thinking", "whole")],
)
def test_a_stream_holds_the_same_text_as_the_whole_answer(stream: str, same: str) -> None:
    choices = json.loads(answer(same))["choices"]

    assert texts(stream) == {choice["index"]: choice["text"] for choice in choices}


def test_an_echo_stands_before_the_answer_of_its_prompt() -> None:
    found = texts("stream-choices-echo-usage")

    assert (found[0][:5], found[1][:5]) == ("OnceG", "Twice")
    assert texts("stream-empty-echo") == {0: "Once"}


def test_thinking_is_no_part_of_a_completion() -> None:
    assert b"greets" not in answer("stream-thinking") + answer("whole-thinking")


def test_usage_is_told_in_a_chunk_of_its_own_when_asked() -> None:
    *_, (_, last), _ = frames(answer("stream-choices-echo-usage"))

    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2 * USAGE.output_tokens
    assert last["usage"]["prompt_tokens"] == 2 * USAGE.prompt_tokens
    assert b"usage" not in answer("stream")


def test_silence_is_a_comment() -> None:
    assert answer("stream-ticks").count(b": keepalive\n\n") == 2


def test_nothing_is_sent_before_the_first_text() -> None:
    renderer = ocp.COMPLETIONS.renderer(asked("stream"))

    for event in (STARTED, *THINKING, ocp.Restarted(), TEXT[0]):
        assert renderer.event(0, event) == b""


def test_a_failure_has_the_shape_of_openai_s() -> None:
    error = ocp.Overloaded("Overloaded")
    body = {"error": {"message": "Overloaded", "type": "server_error", "param": None,
                      "code": "overloaded"}}

    assert ocp.COMPLETIONS.error_body(error, REQUEST_ID) == body
    sent = ocp.COMPLETIONS.renderer(turn()).failure(error, REQUEST_ID)
    assert frames(sent) == [("message", body)]
