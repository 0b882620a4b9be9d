"""Tools of the client over the real claude: loops, ways on, choices, schemas, and odd ends."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest

import stub_api as stub
from conversation import (
    EVERY_DIALECT,
    WHOLE_AND_STREAMED,
    Conversation,
    is_continued,
    path_of,
    stats,
)
from depth import rest
from dialects import (
    CHAT,
    MESSAGES,
    RESPONSES,
    TOOL_DIALECTS,
    Answer,
    Call,
    Dialect,
    ForcedTool,
    Result,
    Tool,
)
from rig import (
    ANSWER_S,
    BUDGET_MODEL,
    Claude,
    Rig,
    claude_pids,
    running_rig,
    wait_until,
)
from upstream import plain_id, upstream_call, upstream_messages, upstream_result

Json = Any

BLACK = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
WEATHER, CLOCK, NEWS = Tool("weather"), Tool("clock"), Tool("news")
TOOLS = (WEATHER, CLOCK, NEWS)
#: Calls as the stub takes them.
PARIS, ROME, NOON = ("weather", {"city": "Paris"}), ("weather", {"city": "Rome"}), ("clock", {})



def answered(call: Call) -> tuple[str, Result]:
    """A result that says which call it is for."""
    return call.id, Result(f"{call.name} said {call.arguments}")


def paths(rig: Rig, *answers: Answer) -> list[str]:
    return [path_of(rig, said) for said in answers]


# ---------------------------------------------------------------------------
# Loops
# ---------------------------------------------------------------------------

@EVERY_DIALECT
@WHOLE_AND_STREAMED
def test_three_rounds_are_four_requests_on_one_process(
    rig: Rig, dialect: Dialect, streams: bool
) -> None:
    rig.script(
        stub.tool_calls([PARIS, NOON], text="Two things."), stub.tool_calls([PARIS, ROME]),
        stub.tool_calls([("news", {"city": "Oslo"})], text="One more."), stub.text("All done."))
    talk = Conversation(rig, dialect, TOOLS, streams=streams)
    first = talk.ask("What is new?")
    # In the other order than they were called.
    second = talk.send_results([answered(call) for call in reversed(first.calls)])
    third = talk.send_results([answered(call) for call in reversed(second.calls)])
    last = talk.send_results([answered(third.call)])

    assert [said.finish for said in (first, second, third, last)] == [
        *["tool_calls"] * 3, "stop"]
    assert [(call.name, call.input) for call in first.calls] == [PARIS, NOON]
    assert [(call.name, call.input) for call in second.calls] == [PARIS, ROME]
    assert [first.text, second.text, third.text, last.text] == [
        "Two things.", "", "One more.", "All done."]
    assert is_continued(rig, [first, second, third, last])
    assert len(rig.bodies()) == 4
    assert upstream_messages(rig.last_body()) == [
        ("user", ["What is new?"]), *exchange(first), *exchange(second), *exchange(third)]


def exchange(said: Answer) -> list[tuple[str, list[Json]]]:
    """An answer with calls, and their results in the order of the calls, upstream."""
    return [
        ("assistant", [*([said.text] if said.text else []), *map(upstream_call, said.calls)]),
        ("user", [upstream_result(call, answered(call)[1]) for call in said.calls])]


def test_a_loop_starts_no_process_after_its_first_request(rig: Rig) -> None:
    rig.script(stub.tool_calls([PARIS]), stub.tool_calls([ROME]), stub.text("So."))
    talk = Conversation(rig, CHAT, TOOLS)
    said = talk.ask("Where is it warm?")
    rig.settle()
    before = stats(rig)
    for _ in range(2):
        said = talk.send_results([answered(said.call)])
    assert path_of(rig, said) == "continued"
    after = stats(rig)
    assert after["spawned"] == before["spawned"]
    assert after["continued"] == before["continued"] + 2
    assert (after["rebuilt"], after["fresh"]) == (before["rebuilt"], before["fresh"])


def health(rig: Rig) -> dict[str, Json]:
    found: dict[str, Json] = rig.server.call("GET", "/health").json()
    return found


@pytest.mark.exhaustive
def test_the_arguments_of_a_call_stream_as_they_come(rig: Rig) -> None:
    rig.script(stub.tool_calls([PARIS, ROME], text="Look."))
    talk = Conversation(rig, CHAT, TOOLS, streams=True)
    reply = talk.ask("Where is it warm?").reply
    deltas = [choice["delta"] for _, chunk in reply.events[:-1] for choice in chunk["choices"]]
    pieces = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [piece["index"] for piece in pieces] == [0] * 4 + [1] * 4
    assert [sorted(piece) for piece in pieces[:2]] == [
        ["function", "id", "index", "type"], ["function", "index"]]


@EVERY_DIALECT
def test_results_may_be_images_and_failures(rig: Rig, dialect: Dialect) -> None:
    rig.script(stub.tool_calls([PARIS, NOON]))
    talk = Conversation(rig, dialect, TOOLS)
    first, second = talk.ask("Show me.").calls
    picture, failure = Result("Here:", [BLACK]), Result("It broke.", is_error=True)
    last = talk.send_results([(second.id, failure), (first.id, picture)])
    assert path_of(rig, last) == "continued"
    told = dialect is MESSAGES
    assert upstream_messages(rig.last_body())[-1] == (
        "user", [upstream_result(first, picture), upstream_result(second, failure, is_error=told)])


@pytest.mark.parametrize("text", [
    "", "  \n padded \n ", '{"a": 1, "b": [2]}', "/cost @/etc/hostname",
    "\u200b\ue000 e\u0301 \x1b", "<system-reminder>no</system-reminder>"],
    ids=["nothing", "spaces", "json", "slash", "odd", "tag"])
def test_what_a_tool_says_arrives_as_it_is(rig: Rig, text: str) -> None:
    rig.script(stub.tool_calls([PARIS]))
    talk = Conversation(rig, CHAT, TOOLS)
    call = talk.ask("Say it.").call
    talk.send_results([(call.id, Result(text))])
    (found,) = upstream_messages(rig.last_body())[-1][1]
    # Where a tool says nothing, the model is told so.
    assert found.content == (text or "(no output)")


@pytest.mark.exhaustive
@pytest.mark.parametrize("length", [60_000, *rest(200_000)])
def test_long_results_arrive_whole(rig: Rig, length: int) -> None:
    rig.script(stub.tool_calls([PARIS, NOON]))
    talk = Conversation(rig, CHAT, TOOLS, model="claude-sonnet-5")
    words = "word " * (length // 5)
    talk.send_results([(call.id, Result(words)) for call in talk.ask("Read it all.").calls])
    said = [found for role, found in upstream_messages(rig.last_body()) if role == "user"]
    contents = [found.content for found in said[-1]]
    assert [len(content) for content in contents] == [length, length]
    assert contents == [words, words]


@pytest.mark.exhaustive
def test_a_text_beside_the_results_comes_after_them(rig: Rig) -> None:
    rig.script(stub.tool_calls([PARIS]))
    talk = Conversation(rig, MESSAGES, TOOLS)
    call = talk.ask("Where?").call
    (message,) = MESSAGES.results([answered(call)])
    talk.messages.append(
        {"role": "user", "content": [{"type": "text", "text": "Quick!"}, *message["content"]]})
    last = talk.send()
    assert path_of(rig, last) == "rebuilt"
    assert upstream_messages(rig.last_body())[-1] == (
        "user", [upstream_result(call, answered(call)[1]), "Quick!"])
    assert len(rig.bodies()) == 2


@pytest.mark.exhaustive
def test_a_conversation_goes_on_after_its_loop(rig: Rig) -> None:
    rig.script(stub.tool_calls([PARIS]), stub.text("Sunny."), stub.text("Bye."))
    talk = Conversation(rig, CHAT, TOOLS)
    said = talk.ask("Where?")
    last = [talk.send_results([answered(said.call)]), talk.ask("Thanks.")]
    assert paths(rig, *last) == ["continued", "continued"]
    assert upstream_messages(rig.last_body()) == [
        ("user", ["Where?"]), *exchange(said), ("assistant", ["Sunny."]), ("user", ["Thanks."])]


# ---------------------------------------------------------------------------
# Ids
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
@EVERY_DIALECT
def test_ids_are_letters_and_digits_and_come_back_in_any_form(
    rig: Rig, dialect: Dialect
) -> None:
    rig.script(stub.tool_calls([PARIS]))
    talk = Conversation(rig, dialect, TOOLS)
    call = talk.ask("Where?").call
    assert call.id == plain_id(call.id)
    odd = f"{call.id[:5]}_{call.id[5:]}-"
    talk.messages = json.loads(json.dumps(talk.messages).replace(call.id, odd))
    last = talk.send_results([(odd, Result("warm"))])
    assert path_of(rig, last) == "continued"
    assert upstream_messages(rig.last_body())[-1] == (
        "user", [upstream_result(call, Result("warm"))])


@EVERY_DIALECT
def test_an_id_that_nobody_called_is_named(rig: Rig, dialect: Dialect) -> None:
    rig.script(stub.tool_calls([PARIS, ROME]))
    talk = Conversation(rig, dialect, TOOLS)
    first, _ = talk.ask("Where?").calls
    unknown = talk.send_results([(first.id, Result("a")), ("elsewhere", Result("b"))]).reply
    assert unknown.status == 400
    assert "elsewhere" in unknown.text
    assert len(rig.bodies()) == 1


# ---------------------------------------------------------------------------
# Ways on: what cannot be continued is rebuilt
# ---------------------------------------------------------------------------

def other_system(talk: Conversation) -> None:
    talk.system = "Be brief."


def other_tools(talk: Conversation) -> None:
    talk.tools = (WEATHER, CLOCK)


def other_description(talk: Conversation) -> None:
    talk.tools = (WEATHER._replace(description="Tells another thing."), CLOCK, NEWS)


def other_message(talk: Conversation) -> None:
    talk.messages[0]["content"] = "What was new?"


def other_answer(talk: Conversation) -> None:
    talk.messages = json.loads(json.dumps(talk.messages).replace("Two things.", "Three things."))


CHANGES = [
    *[(dialect, change) for change in (other_system, other_tools, other_message)
      for dialect in TOOL_DIALECTS],
    (CHAT, other_description), (CHAT, other_answer)]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("dialect", "change"), [*CHANGES[:6], *rest(*CHANGES[6:])],
    ids=[f"{each.name}-{how.__name__}" for each, how in CHANGES])
def test_what_was_changed_is_rebuilt(
    rig: Rig, dialect: Dialect, change: Callable[[Conversation], None]
) -> None:
    rig.script(stub.tool_calls([PARIS, NOON], text="Two things."), stub.text("Done."))
    talk = Conversation(rig, dialect, TOOLS, "Be kind.")
    said = talk.ask("What is new?")
    change(talk)
    last = talk.send_results([answered(call) for call in said.calls])
    # A process of an earlier case may hold the beginning, and drop the rest.
    assert last.text == "Done." and path_of(rig, last) in ("rebuilt", "rewound")
    assert len(rig.bodies()) == 2
    assert_rebuilt(rig, talk, said)


@pytest.mark.exhaustive
@EVERY_DIALECT
def test_rounds_of_the_past_keep_their_order_when_they_are_rebuilt(
    rig: Rig, dialect: Dialect
) -> None:
    rig.script(stub.tool_calls([PARIS]), stub.tool_calls([NOON], text="And when?"),
               stub.text("Sunny at noon."), stub.text("Bye."))
    talk = Conversation(rig, dialect, TOOLS, "Be kind.")
    first = talk.ask("What is new?")
    second = talk.send_results([answered(call) for call in first.calls])
    talk.send_results([answered(call) for call in second.calls])
    straight = upstream_messages(rig.last_body())
    # In each dialect another one, or a process of the last one would drop its messages for this.
    talk.system = f"Be brief in {dialect.name}."
    last = talk.ask("Thanks.")
    assert (last.text, path_of(rig, last)) == ("Bye.", "rebuilt")
    assert upstream_messages(rig.last_body()) == [
        *straight, ("assistant", ["Sunny at noon."]), ("user", ["Thanks."])]


def assert_rebuilt(rig: Rig, talk: Conversation, said: Answer) -> None:
    """The whole loop reached the API in one request, with the talk's system prompt and tools."""
    body = rig.last_body()
    question, (_, contents), results = upstream_messages(body)
    assert question[1] in (["What is new?"], ["What was new?"])
    assert [each for each in contents if not isinstance(each, str)] == [
        upstream_call(call) for call in said.calls]
    assert results == exchange(said)[1]
    assert talk.system == "" or talk.system in [block["text"] for block in body["system"]]
    assert sorted((tool["name"], tool["description"]) for tool in body["tools"]) == sorted(
        (tool.name, tool.description) for tool in talk.tools)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *rest(signal.SIGTERM)], ids=lambda each: each.name)
def test_a_process_that_died_in_its_sleep_is_rebuilt(
    claude: Claude, tmp_path: Path, number: signal.Signals
) -> None:
    with running_rig(tmp_path, claude) as rig:
        rig.script(stub.tool_calls([PARIS]), stub.text("Done."))
        talk = Conversation(rig, CHAT, TOOLS)
        said = talk.ask("What is new?")
        wait_until(lambda: health(rig)["parked"])
        for pid in claude_pids(rig.server):
            os.kill(pid, number)
        wait_until(lambda: not claude_pids(rig.server))
        last = talk.send_results([answered(said.call)])
        assert (last.text, len(rig.bodies())) == ("Done.", 2)
        assert_rebuilt(rig, talk, said)


@pytest.mark.exhaustive
def test_evicted_and_expired_processes_are_rebuilt(claude: Claude, tmp_path: Path) -> None:
    settings = {"OCP_PARKED_PROCESSES": "1", "CLAUDE_SESSION_TTL": "2500"}
    with running_rig(tmp_path, claude, **settings) as rig:
        rig.script(stub.tool_calls([PARIS]), stub.tool_calls([ROME]))
        old, new = (Conversation(rig, CHAT, TOOLS) for _ in range(2))
        said = old.ask("What is new?")
        other = new.ask("What is new?")
        wait_until(lambda: health(rig)["parked"] <= 1)
        rig.script(stub.text("Done."), stub.text("Done too."))
        evicted = old.send_results([answered(said.call)])
        # The younger one had to go for it in turn, a moment behind the answer.
        wait_until(lambda: health(rig)["parked"] <= 1)
        last = new.send_results([answered(other.call)])
        # The process of the other one may drop what it has of its own, and serve this one.
        first, second = paths(rig, evicted, last)
        assert first == "rebuilt" and second in ("rebuilt", "rewound")
        assert_rebuilt(rig, new, other)
        wait_until(lambda: health(rig)["parked"] == 0)
        after = new.ask("And now?")
        assert (after.finish, path_of(rig, after)) == ("stop", "rebuilt")


@pytest.mark.exhaustive
@EVERY_DIALECT
def test_a_loop_survives_a_restart_of_the_server(
    claude: Claude, tmp_path: Path, dialect: Dialect
) -> None:
    with running_rig(tmp_path, claude) as rig:
        rig.script(stub.tool_calls([PARIS, NOON], text="Two things."))
        talk = Conversation(rig, dialect, TOOLS, "Be kind.")
        said = talk.ask("What is new?")
    with running_rig(tmp_path, claude) as rig:
        rig.script(stub.text("Done."))
        talk.rig = rig
        last = talk.send_results([answered(call) for call in said.calls])
        assert (last.text, path_of(rig, last)) == ("Done.", "rebuilt")
        assert_rebuilt(rig, talk, said)
        assert len(rig.bodies()) == 1


# ---------------------------------------------------------------------------
# Choices
# ---------------------------------------------------------------------------

class Chosen(NamedTuple):
    """What a client may say about its tools, and the API's tool_choice that it comes to."""
    fields: Callable[[Dialect], Mapping[str, Json]]
    wanted: Json
    #: Who it can be said in.
    dialects: Sequence[Dialect] = TOOL_DIALECTS
    tools: Sequence[Tool] = TOOLS

    @property
    def forces(self) -> bool:
        return bool(self.wanted) and self.wanted["type"] in ("any", "tool")


def allowed(dialect: Dialect) -> dict[str, Json]:
    names = ["weather", "news"]
    if dialect is CHAT:
        tools = [{"type": "function", "function": {"name": name}} for name in names]
        choice: Json = {"allowed_tools": {"mode": "required", "tools": tools}}
    else:
        tools = [{"type": "function", "name": name} for name in names]
        choice = {"mode": "required", "tools": tools}
    return {"tool_choice": {"type": "allowed_tools", **choice}}


CHOICES = {
    "left out": Chosen(lambda dialect: {}, None),
    "auto": Chosen(lambda dialect: {"tool_choice": dialect.choice("auto")}, None),
    "none": Chosen(lambda dialect: {"tool_choice": dialect.choice("none")}, {"type": "none"}),
    "required": Chosen(
        lambda dialect: {"tool_choice": dialect.choice("required")}, {"type": "any"}),
    "named": Chosen(
        lambda dialect: {"tool_choice": dialect.choice(ForcedTool("clock"))},
        {"type": "tool", "name": "clock"}),
    "allowed": Chosen(allowed, {"type": "any"}, (CHAT, RESPONSES), (WEATHER, NEWS)),
    "one at a time": Chosen(
        lambda dialect: dialect.one_call_fields("auto"),
        {"type": "auto", "disable_parallel_tool_use": True}),
}


def told_by(*names: str) -> list[tuple[str, Dialect]]:
    """These choices, each in every dialect that has it."""
    return [(name, dialect) for name in names for dialect in CHOICES[name].dialects]


@pytest.mark.parametrize(("name", "dialect"), [
    *told_by("none", "named", "one at a time"),
    *rest(*told_by("left out", "auto", "required", "allowed"))],
    ids=lambda value: value if isinstance(value, str) else value.name)
def test_a_choice_reaches_the_api(rig: Rig, name: str, dialect: Dialect) -> None:
    chosen = CHOICES[name]
    said = Conversation(rig, dialect, TOOLS, **chosen.fields(dialect)).ask("What is new?")
    assert said.finish == "stop"
    body = rig.only_body()
    assert body.get("tool_choice") == chosen.wanted
    assert sorted(tool["name"] for tool in body["tools"]) == sorted(
        tool.name for tool in chosen.tools)
    if chosen.forces:
        # The API refuses the two together.
        assert body.get("thinking", {}).get("type") in (None, "disabled")


@pytest.mark.exhaustive
def test_a_budget_for_thinking_pauses_in_a_loop_that_is_told_anew(rig: Rig) -> None:
    rig.script(stub.tool_calls([PARIS]), stub.text("Done."), stub.text("Bye."))
    thinking = {"type": "enabled", "budget_tokens": 1500}
    talk = Conversation(rig, MESSAGES, TOOLS, model=BUDGET_MODEL, thinking=thinking)
    said = talk.ask("What is new?")
    talk.messages[0]["content"] = "What is old?"
    assert talk.send_results([answered(said.call)]).text == "Done."
    last = talk.ask("Thanks.")
    assert (last.text, path_of(rig, last)) == ("Bye.", "continued")
    budgets = [body["thinking"].get("budget_tokens") for body in rig.bodies()]
    # With one, the API wants to see thinking before the call, and there was none.
    assert budgets == [1500, None, 1500]


@pytest.mark.exhaustive
def test_another_choice_in_the_next_round_is_kept(rig: Rig) -> None:
    rig.script(stub.tool_calls([PARIS]), stub.text("Done."))
    talk = Conversation(rig, CHAT, TOOLS)
    said = talk.ask("What is new?", tool_choice="required")
    assert talk.send_results([answered(said.call)], tool_choice="auto").text == "Done."
    first, second = rig.bodies()
    assert first["tool_choice"] == {"type": "any"} and "tool_choice" not in second
    assert upstream_messages(second)[1:] == exchange(said)


# ---------------------------------------------------------------------------
# Schemas, names and descriptions
# ---------------------------------------------------------------------------

NESTED: dict[str, Json] = {
    "type": "object",
    "properties": {
        "where": {"anyOf": [{"type": "string", "format": "uri"}, {"$ref": "#/$defs/place"}]},
        "kind": {"const": "now"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
    },
    "required": ["where"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": ["number", "null"]}}}},
}
LONG_NAME = "n" * 64


@EVERY_DIALECT
def test_schemas_arrive_untouched(rig: Rig, dialect: Dialect) -> None:
    rig.script(stub.tool_calls([(LONG_NAME, {"where": {"x": None}, "kind": "now"})]))
    said = Conversation(rig, dialect, [Tool(LONG_NAME, NESTED), Tool("bare", {})]).ask("Go.")
    bare, nested = sorted(rig.last_body()["tools"], key=lambda tool: len(tool["name"]))
    assert nested["input_schema"] == NESTED
    assert nested["name"] == LONG_NAME
    assert bare["input_schema"] == {"type": "object", "properties": {}}
    assert (said.call.name, said.call.input) == (LONG_NAME, {"where": {"x": None}, "kind": "now"})


@pytest.mark.exhaustive
def test_an_odd_schema_takes_no_other_tool_away(rig: Rig) -> None:
    odd = {"type": "object", "properties": {"any": True, "none": False}, "required": None}
    void_schema = {"properties": None}
    Conversation(rig, CHAT, [Tool("odd", odd), Tool("void", void_schema), CLOCK]).ask("Go.")
    clock, found, void = rig.last_body()["tools"]
    assert [clock["name"], void["name"]] == ["clock", "void"]
    assert found["input_schema"]["properties"] == {"any": {}, "none": {"not": {}}}


@pytest.mark.parametrize("description", [
    *rest("", "Long. " * 3000 + "The end."),
    "\u00e9t\u00e9 \U0001f468\u200d\U0001f469 \u200b\n\n  - so"], ids=["none", "long", "odd"])
def test_descriptions_arrive_untouched(rig: Rig, description: str) -> None:
    Conversation(rig, CHAT, [WEATHER._replace(description=description)]).ask("Go.")
    (tool,) = rig.last_body()["tools"]
    assert tool.get("description", "") == description


@pytest.mark.parametrize(("dialect", "name"), [
    *[(dialect, "my.tool/one") for dialect in TOOL_DIALECTS], (RESPONSES, "StructuredOutput"),
    *rest((CHAT, "Bash"), (CHAT, "mcp__x__y"), (MESSAGES, "\u00e9t\u00e9"), (CHAT, "n" * 80))])
def test_odd_names_come_back_as_they_were(rig: Rig, dialect: Dialect, name: str) -> None:
    def answer(body: Mapping[str, Json]) -> stub.Reply:
        (tool,) = body["tools"]
        results = any(role == "user" and not isinstance(contents[0], str)
                      for role, contents in upstream_messages(body))
        return stub.text("Done.") if results else stub.tool_calls([(tool["name"], {"city": "A"})])

    rig.stub.default = answer
    talk = Conversation(rig, dialect, [Tool(name)])
    said = talk.ask("Go.")
    assert (said.call.name, said.call.input) == (name, {"city": "A"})
    last = talk.send_results([answered(said.call)])
    assert (last.text, path_of(rig, last)) == ("Done.", "continued")
    (tool,) = rig.last_body()["tools"]
    assert upstream_messages(rig.last_body())[1][1] == [
        upstream_call(said.call)._replace(name=tool["name"])]


@pytest.mark.exhaustive
def test_arguments_that_break_the_schema_are_the_clients_to_judge(rig: Rig) -> None:
    rig.script(stub.tool_calls([("weather", {"city": 5, "more": True})]))
    talk = Conversation(rig, CHAT, [Tool("weather", NESTED)])
    said = talk.ask("Go.")
    last = talk.send_results([answered(said.call)])
    assert said.call.input == {"city": 5, "more": True}
    assert (last.finish, path_of(rig, last)) == ("stop", "continued")
    assert upstream_messages(rig.last_body())[1:] == exchange(said)
    assert len(rig.bodies()) == 2


# ---------------------------------------------------------------------------
# Odd calls and ends
# ---------------------------------------------------------------------------

@EVERY_DIALECT
@WHOLE_AND_STREAMED
def test_a_call_of_a_tool_that_was_not_offered_is_not_forwarded(
    rig: Rig, dialect: Dialect, streams: bool
) -> None:
    rig.script(stub.tool_calls([("Bash", {"command": "true"})], text="Hm."), stub.text("Well."))
    said = Conversation(rig, dialect, TOOLS, streams=streams).ask("Go.")
    assert (said.calls, said.finish) == ([], "stop")
    assert said.text == "Hm.\n\nWell."
    (outcome,) = upstream_messages(rig.last_body())[-1][1]
    assert outcome.is_error and "Bash" in outcome.content
    assert len(rig.bodies()) == 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("calls", [
    [PARIS, ("Bash", {"command": "true"})],
    *rest([("Bash", {"command": "true"}), PARIS])], ids=["after", "before"])
@WHOLE_AND_STREAMED
def test_a_call_that_was_not_offered_beside_one_that_was_is_left_out(
    rig: Rig, calls: Sequence[tuple[str, Json]], streams: bool
) -> None:
    rig.script(stub.tool_calls(calls), stub.text("Done."))
    talk = Conversation(rig, CHAT, TOOLS, streams=streams)
    said = talk.ask("Go.")
    assert (said.call.name, said.finish) == ("weather", "tool_calls")
    last = talk.send_results([answered(said.call)])
    assert (last.text, len(rig.bodies())) == ("Done.", 2)
    results = [found for found in upstream_messages(rig.last_body())[-1][1]
               if found.id == plain_id(said.call.id)]
    assert results == [upstream_result(said.call, answered(said.call)[1])]


@EVERY_DIALECT
@WHOLE_AND_STREAMED
def test_arguments_that_are_cut_off_are_no_call(
    rig: Rig, dialect: Dialect, streams: bool
) -> None:
    rig.script(cut_off(stub.tool_calls([PARIS], text="Look.")))
    reply = Conversation(rig, dialect, TOOLS, streams=streams, max_tokens=50).ask("Go.").reply
    assert any(f'"{word}"' in reply.text for word in ("length", "max_tokens", "incomplete"))
    assert "function_call_arguments.done" not in reply.text
    if not streams:
        assert dialect.read_answer(reply).calls == []
    # What claude may still ask on a busy machine is not for the next test.
    rig.settle()


def cut_off(reply: stub.Reply) -> stub.Reply:
    """The same answer, ended by the limit in the middle of its last call."""
    *others, last = reply.blocks
    last = last._replace(deltas=last.deltas[:-1])
    return reply._replace(blocks=(*others, last), stop_reason="max_tokens")


@pytest.mark.exhaustive
@WHOLE_AND_STREAMED
def test_an_answer_that_breaks_off_inside_a_call_is_a_failure(rig: Rig, streams: bool) -> None:
    broken = stub.tool_calls([PARIS], text="Look.")._replace(ending="cut", gap_s=0.05)
    rig.script(then=broken)
    reply = rig.server.call(
        "POST", CHAT.path, Conversation(rig, CHAT, TOOLS, streams=streams).body(
            messages=[{"role": "user", "content": "Go."}]), timeout_s=ANSWER_S)
    assert reply.status >= 500 or ("error" in reply.text and "[DONE]" not in reply.text)
    assert "tool_calls\"" not in reply.text.rpartition("finish_reason")[2]


@pytest.mark.exhaustive
def test_legacy_functions_go_round(rig: Rig) -> None:
    rig.script(stub.tool_calls([PARIS], text="Look."), stub.text("Sunny."))
    functions = [{"name": "weather", "parameters": WEATHER.schema}]
    talk = Conversation(rig, CHAT, functions=functions, function_call="auto")
    talk.messages.append({"role": "user", "content": "Where?"})
    message, finish = first_choice(rig, talk)
    assert finish == "function_call"
    assert message["function_call"]["name"] == "weather"
    assert json.loads(message["function_call"]["arguments"]) == {"city": "Paris"}
    talk.messages += [message, {"role": "function", "name": "weather", "content": "warm"}]
    assert first_choice(rig, talk)[0]["content"] == "Sunny."
    found = upstream_messages(rig.last_body())
    assert found[2][1][0].content == "warm"
    assert found[1][1][1].id == found[2][1][0].id
    assert len(rig.bodies()) == 2


def first_choice(rig: Rig, talk: Conversation) -> tuple[dict[str, Json], str]:
    reply = rig.server.call("POST", CHAT.path, talk.body(), timeout_s=ANSWER_S)
    assert reply.status == 200, reply
    choice = reply.json()["choices"][0]
    return choice["message"], choice["finish_reason"]


@pytest.mark.exhaustive
@WHOLE_AND_STREAMED
def test_legacy_functions_are_called_one_at_a_time(rig: Rig, streams: bool) -> None:
    rig.script(stub.tool_calls([PARIS, ROME]))
    functions = [{"name": "weather", "parameters": WEATHER.schema}]
    talk = Conversation(rig, CHAT, functions=functions, stream=streams)
    talk.messages.append({"role": "user", "content": "Where?"})
    reply = rig.server.call("POST", CHAT.path, talk.body(), timeout_s=ANSWER_S)
    chunks = [data for _, data in reply.events[:-1]] if streams else [reply.json()]
    said = [choice.get("delta") or choice.get("message") or {}
            for chunk in chunks for choice in chunk["choices"]]
    calls = [each["function_call"] for each in said if each.get("function_call")]
    arguments = "".join(call["arguments"] for call in calls)
    assert json.loads(arguments) == {"city": "Paris"}
    assert [call["name"] for call in calls if "name" in call] == ["weather"]


@pytest.mark.exhaustive
def test_many_loops_at_once_keep_to_themselves(rig: Rig) -> None:
    def answer(body: Mapping[str, Json]) -> stub.Reply:
        contents = [each for _, contents in upstream_messages(body) for each in contents]
        (word,) = [each for each in contents if isinstance(each, str)]
        results = [each.content for each in contents if getattr(each, "kind", "") == "tool_result"]
        if len(results) == 2:
            return stub.text(f"{word}: {' '.join(results)}")
        return stub.tool_calls([("weather", {"city": f"{word}{len(results)}"})])

    def loop(word: str) -> str:
        talk = Conversation(rig, CHAT, TOOLS)
        said = talk.ask(word)
        while said.calls:
            said = talk.send_results([(said.call.id, Result(f"<{said.call.input['city']}>"))])
        return said.text

    rig.stub.default = answer
    words = [f"word{number}" for number in range(5)]
    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(loop, words)) == [f"{word}: <{word}0> <{word}1>" for word in words]
    assert len(rig.bodies()) == 15
