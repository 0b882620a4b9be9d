"""What the API's prompt cache sees of a conversation that goes to another claude: the same as of
one that went on in its process, to the byte."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import stub_api as stub
from conversation import EVERY_DIALECT, Conversation, path_of
from depth import rest
from dialects import CHAT, MESSAGES, RESPONSES, Answer, Dialect, Result, Tool, dialect_name
from rig import BUDGET_MODEL, MODEL, NEWEST_MODEL, Claude, Rig, running_rig
from upstream import turns, unmarked

Json = Any
Body = dict[str, Json]

BLACK = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
PDF = base64.b64encode(
    b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n").decode()
WEATHER = Tool("weather")


def cached_part(body: Body) -> Body:
    """What the cache compares of a request: all of it but the marks and the session's id."""
    found: Body = unmarked(body)
    del found["metadata"]
    return found


def text_of(body: Body) -> str:
    """The same as text, so that the order of fields counts too."""
    return json.dumps(cached_part(body), indent=1)


def thinking_fields(dialect: Dialect, model: str) -> dict[str, Json]:
    """The fields that ask a model to think."""
    if dialect is MESSAGES and model == BUDGET_MODEL:
        return {"thinking": {"type": "enabled", "budget_tokens": 2000}}
    return {
        MESSAGES.name: {"thinking": {"type": "adaptive"}}, CHAT.name: {"reasoning_effort": "low"},
        RESPONSES.name: {"reasoning": {"effort": "low"}},
    }[dialect.name]


def thoughtful(reply: stub.Reply) -> stub.Reply:
    """The reply with thinking in front."""
    return reply._replace(blocks=(*stub.thinking("Hm, let me see.", "").blocks[:1], *reply.blocks))


def sealed(reply: stub.Reply) -> stub.Reply:
    """The reply with thinking in front that nobody can read."""
    thought = stub.Block({"type": "redacted_thinking", "data": "c2VhbGVk"}, ())
    return reply._replace(blocks=(thought, *reply.blocks))


def rebuilt(rig: Rig, talk: Conversation) -> Answer:
    """The answer to what was just asked, from a claude that did not know the conversation."""
    rig.end_parked()
    said = talk.send()
    assert path_of(rig, said) == "rebuilt"
    return said


def assert_same(rig: Rig, talk: Conversation, *results: tuple[str, Result]) -> Answer:
    """Send results, or a question if it is the user's turn, to the process that knows the
    conversation, and to another one. Both requests to the API are the same. Return the second
    answer; `talk` goes on from it."""
    if results:
        talk.messages += talk.dialect.results(results)
    elif talk.messages[-1].get("role") != "user":
        talk.messages.append({"role": "user", "content": "Sure?"})
    before, other = len(rig.bodies()), talk.branch()
    assert path_of(rig, other.send()) == "continued"
    said = rebuilt(rig, talk)
    first, second = map(text_of, rig.bodies()[before:])
    assert second == first
    return said


@EVERY_DIALECT
@pytest.mark.parametrize("model", [BUDGET_MODEL, NEWEST_MODEL, *rest(MODEL)])
def test_a_conversation_with_tools_and_thinking_is_the_same_elsewhere(
    rig: Rig, dialect: Dialect, model: str
) -> None:
    call = thoughtful(stub.tool_calls([("weather", {"city": "Bern"})], text="I look."))
    rig.script(
        stub.thinking("Hm.", " So. "),
        thoughtful(stub.tool_calls([("weather", {"city": "Rome"}), ("weather", {"city": "Oslo"})])),
        call, call, stub.thinking("Ah.", "Warm."), then=stub.text("Bye."))
    talk = Conversation(
        rig, dialect, [WEATHER], f"Be {dialect.name} and {model}.", model=model,
        **thinking_fields(dialect, model))
    talk.ask("Hello?")
    first, second = talk.ask("Weather?").calls
    # In the middle of the loop, where the last message has nothing but results.
    failed = Result("No snow.", is_error=dialect is MESSAGES)
    asked = assert_same(rig, talk, (first.id, Result("Sun.")), (second.id, failed))
    talk.send_results([(asked.call.id, Result("Rain."))])
    assert_same(rig, talk)
    answers = [contents for role, contents in turns(rig.last_body()) if role == "assistant"]
    assert [contents[0]["type"] for contents in answers] == ["thinking"] * 4
    assert rig.last_body()["thinking"]["type"] != "disabled"


@pytest.mark.exhaustive
@pytest.mark.parametrize("dialect", [MESSAGES, RESPONSES], ids=dialect_name)
@pytest.mark.parametrize("model", [BUDGET_MODEL, *rest(NEWEST_MODEL)])
def test_a_loop_with_thinking_is_the_same_after_a_restart(
    claude: Claude, tmp_path: Path, dialect: Dialect, model: str
) -> None:
    fields = thinking_fields(dialect, model)
    if dialect is RESPONSES:
        fields["include"] = ["reasoning.encrypted_content"]
    with running_rig(tmp_path, claude) as rig:
        rig.script(
            stub.thinking("Hm.", " So. "),
            thoughtful(stub.tool_calls([("weather", {"city": "Rome"}), ("news", {})], text="Two.")),
            sealed(stub.tool_calls([("weather", {"city": "Bern"})])), then=stub.text("Bye."))
        talk = Conversation(
            rig, dialect, [WEATHER, Tool("news")], f"Be {dialect.name}.", model=model, **fields)
        talk.ask("Hello?")
        first, second = talk.ask("What is new?").calls
        said = talk.send_results([(first.id, Result("Sun.")), (second.id, Result("No."))])
        talk.messages += dialect.results([(said.call.id, Result("Rain."))])
        assert path_of(rig, talk.branch().send()) == "continued"
        known = text_of(rig.last_body())
    with running_rig(tmp_path, claude) as rig:
        rig.script(then=stub.text("Bye."))
        talk.rig = rig
        assert path_of(rig, talk.send()) == "rebuilt"
        body = rig.last_body()
    assert text_of(body) == known
    firsts = [contents[0] for role, contents in turns(body) if role == "assistant"]
    assert [first["type"] for first in firsts] == ["thinking", "thinking", "redacted_thinking"]
    assert body["thinking"]["type"] != "disabled"


def test_hidden_thinking_comes_back_sealed_after_a_restart(claude: Claude, tmp_path: Path) -> None:
    thinking = {"type": "adaptive", "display": "omitted"}
    with running_rig(tmp_path, claude) as rig:
        rig.script(thoughtful(stub.tool_calls([("weather", {"city": "Rome"})])))
        talk = Conversation(rig, MESSAGES, [WEATHER], thinking=thinking)
        call = talk.ask("Weather?").call
    with running_rig(tmp_path, claude) as rig:
        talk.rig = rig
        talk.send_results([(call.id, Result("Sun."))])
        _, (_, (thought, _)), _ = turns(rig.last_body())
    assert thought == {**stub.thinking("", "").blocks[0].content, "thinking": ""}


#: The contents of results, and whether the call failed. claude is told others by another process.
RESULTS: Sequence[tuple[Json, bool]] = (
    ("Sun.", False), ([MESSAGES.text("Sun."), MESSAGES.text(" Snow.\n")], False), ("", False),
    ([MESSAGES.text("Look:"), MESSAGES.image(BLACK)], False), ("\u2028\U0001f642 " * 900, False),
    ("No snow.", True), ([MESSAGES.text(" No sun.\n"), MESSAGES.text("No snow. ")], True),
    ("", True), ("x" * 9_999, True),
)


@pytest.mark.exhaustive
def test_every_kind_of_result_is_the_same_elsewhere(rig: Rig) -> None:
    rig.script(
        stub.tool_calls([("weather", {"z": 1, "a": [None, {"y": 0.5}]})] * len(RESULTS)),
        then=stub.text("Bye."))
    talk = Conversation(rig, MESSAGES, [WEATHER], "Results.")
    calls = talk.ask("Weather?").calls
    talk.messages.append({"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": call.id, "content": content, "is_error": failed}
        for call, (content, failed) in zip(calls, RESULTS)]})
    assert_same(rig, talk)


FIRST_MESSAGES: Mapping[str, Json] = {
    "image": [MESSAGES.text("What is it?"), MESSAGES.image(BLACK)],
    "document": [MESSAGES.pdf(PDF), MESSAGES.text("What is it?")],
    "command": "/cost", "file": "@/etc/hostname what is in it?", "hash": "# Remember this.",
    "shell": "!ls", "long": "word " * 40_000, "two": [MESSAGES.text("One."), MESSAGES.text("Two.")],
    "only an image": [MESSAGES.image(BLACK)], "spaces": "  Hello?  ",
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", [NEWEST_MODEL, *rest(MODEL)])
@pytest.mark.parametrize("name", ["image", *rest(*list(FIRST_MESSAGES)[1:])])
def test_whatever_a_conversation_begins_with_it_is_the_same_elsewhere(
    rig: Rig, name: str, model: str
) -> None:
    rig.script(then=stub.text("Yes."))
    talk = Conversation(rig, MESSAGES, system=f"First {name}.", model=model)
    talk.ask(FIRST_MESSAGES[name])
    assert_same(rig, talk)
    assert len(rig.bodies()) == 3


@pytest.mark.exhaustive
def test_an_assistant_may_begin_the_conversation(rig: Rig) -> None:
    rig.script(then=stub.text("Yes."))
    talk = Conversation(rig, CHAT, system="Begin.")
    talk.messages = [{"role": "assistant", "content": "Welcome!"}]
    talk.ask("Hello?")
    assert_same(rig, talk)
    assert len(rig.bodies()) == 3


def edited(talk: Conversation, place: int, *, keeps: bool = False) -> Conversation:
    """A client that has edited this message of the conversation. It keeps what comes after it, or
    asks at once."""
    other = talk.branch()
    if not keeps:
        del other.messages[place + 1:]
    other.messages[place]["content"] = f"Not {other.messages[place]['content']}"
    return other


def sent(rig: Rig, talk: Conversation, path: str) -> tuple[Conversation, Body]:
    """The conversation before its next answer, which came by this path, and what the API got."""
    before = talk.branch()
    assert path_of(rig, talk.send()) == path
    return before, cached_part(rig.last_body())


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", [NEWEST_MODEL, MODEL])
def test_a_process_that_drops_questions_sends_what_another_one_would(
    rig: Rig, model: str
) -> None:
    call = thoughtful(stub.tool_calls([("weather", {"city": "Bern"})], text="I look."))
    rig.script(
        stub.thinking("Hm.", "Yes."), stub.text("No."), call, then=stub.thinking("Ah.", "Fine."))
    talk = Conversation(
        rig, MESSAGES, [WEATHER], "Drop.", model=model, thinking={"type": "adaptive"})
    for words in ("One?", "Two?"):
        talk.ask(words)
    talk.send_results([(talk.ask("Weather?").call.id, Result("Sun."))])
    for words in ("Four?", "Five?"):
        talk.ask(words)

    talk = edited(talk, 4)
    found = [sent(rig, talk, "rewound")]
    talk.messages.append({"role": "user", "content": "And then?"})
    found.append(sent(rig, talk, "continued"))
    # All but the first question are dropped, and what comes after the edit is told anew.
    talk.messages.append({"role": "user", "content": "And now?"})
    talk = edited(talk, 2, keeps=True)
    found.append(sent(rig, talk, "rewound"))
    talk = edited(talk, 6)
    found.append(sent(rig, talk, "rewound"))

    for again, body in found[1:]:
        rebuilt(rig, again)
        assert cached_part(rig.last_body()) == body
    # The process of the last one has been told all of it. Where it is the only one that may be
    # kept, other conversations get it.
    rig.server.call("PATCH", "/settings", {"parkedProcesses": 1})
    asks = [edited(talk, 4, keeps=True)] + ([] if rig.is_old else [edited(talk, 0, keeps=True)])
    for other in asks:
        other.messages.append({"role": "user", "content": "Sure?"})
    found = [sent(rig, other, "rewound") for other in asks]
    for again, body in found:
        rebuilt(rig, again)
        assert cached_part(rig.last_body()) == body


def test_what_stands_before_an_edit_is_the_same(rig: Rig) -> None:
    rig.script(then=stub.thinking("Hm.", "Yes."))
    talk = Conversation(rig, CHAT, system="Edit.")
    for number in range(3):
        talk.ask(f"Question {number}?")
    known = cached_part(rig.last_body())["messages"]
    talk = edited(talk, 2)
    rebuilt(rig, talk)
    found = cached_part(rig.last_body())["messages"]
    assert found[:2] == known[:2] and found[2] != known[2]
    # A last question of such a conversation can be forgotten, as of any other.
    paths = []
    for question in ("More?", "Or this?"):
        later = talk.branch()
        paths.append(path_of(rig, later.ask(question)))
        assert cached_part(rig.last_body())["messages"][:2] == known[:2]
    assert paths == ["continued", "rewound"]
    assert len(rig.bodies()) == 6


@pytest.mark.exhaustive
def test_an_answer_of_a_given_shape_in_a_conversation_costs_one_request(rig: Rig) -> None:
    rig.script(stub.text("Hi."), stub.tool_calls([("StructuredOutput", {"a": 1})]))
    schema = {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]}
    talk = Conversation(rig, CHAT, system="Shape.")
    talk.ask("Hello?")
    said = talk.ask("And now?", response_format={
        "type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    assert (said.text, path_of(rig, said)) == ('{"a": 1}', "rebuilt")
    first, second = (cached_part(body)["messages"] for body in rig.bodies())
    assert second[:len(first)] == first


#: A claude that does not know the variable with which OCP makes it refuse a message.
_FORGETFUL = """#!/bin/sh
unset CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE
sed -u s/CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE/UNKNOWN/g | {claude} "$@"
"""


@pytest.mark.exhaustive
def test_a_claude_that_ignores_the_limit_answers_all_the_same(
    claude: Claude, tmp_path: Path
) -> None:
    program = tmp_path / "claude"
    program.write_text(_FORGETFUL.format(claude=shlex.quote(str(claude.path))))
    program.chmod(0o755)
    other = Claude(claude.version, program)
    with running_rig(tmp_path / "rig", other) as rig:
        def answer(body: Mapping[str, Json]) -> stub.Reply:
            # Slow enough to be stopped before it is complete.
            alone = stub.text(["Nobody ", "reads ", "this."], gap_s=5.0)
            return alone if len(turns(body)) == 1 else stub.text("Yes.")

        rig.stub.default = answer
        talk = Conversation(rig, CHAT)
        talk.messages = [{"role": "user", "content": "One?"},
                         {"role": "assistant", "content": "Eins."}]
        assert [talk.branch().ask(each).text for each in ("Two?", "Three?")] == ["Yes."] * 2
        is_kept = rig.server.call("GET", "/health").json()["promptCacheKept"]
        # Only newer ones are made to refuse the message.
        stopped = [] if rig.is_old else [[("user", ["One?"])]]
        *asked, second, third = map(turns, rig.bodies())
        assert (asked, len(second), len(third)) == (stopped, 3, 3)
        rig.stub.wait_for_aborted(len(stopped))
        assert (is_kept, len(rig.server.log_entries("prompt_cache_not_kept"))) == (
            rig.is_old, len(stopped))
