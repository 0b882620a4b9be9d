"""Histories as clients really send them, over the real claude: ids that come again, results that
come late or never, late instructions, and answers at the end."""

from __future__ import annotations

import json
from typing import Any

import pytest

import stub_api as stub
from conversation import EVERY_DIALECT, Conversation, is_continued, path_of
from depth import rest
from dialects import CHAT, MESSAGES, RESPONSES, Dialect, Result, Tool
from rig import Rig
from upstream import UpstreamBlock, upstream_messages

Json = Any

WEATHER = Tool("weather")
NO_RESULT = "No result was given."
GO_ON = "Continue exactly where your last message ends."
#: The dialects that take a history which ends with the assistant.
GOING_ON = pytest.mark.parametrize("dialect", [CHAT, RESPONSES], ids=lambda each: each.name)


def call_message(dialect: Dialect, *calls: tuple[str, str]) -> list[Json]:
    """An answer of another model that calls the tool with (id, city) each."""
    if dialect is RESPONSES:
        return [{"type": "function_call", "call_id": call_id, "name": "weather",
                 "arguments": json.dumps({"city": city})} for call_id, city in calls]
    if dialect is MESSAGES:
        return [{"role": "assistant", "content": [
            {"type": "tool_use", "id": call_id, "name": "weather", "input": {"city": city}}
            for call_id, city in calls]}]
    return [{"role": "assistant", "content": None, "tool_calls": [
        {"id": call_id, "type": "function",
         "function": {"name": "weather", "arguments": json.dumps({"city": city})}}
        for call_id, city in calls]}]


def history(rig: Rig, dialect: Dialect, *rounds: list[tuple[str, str]]) -> Conversation:
    """A conversation that another model had: each round's calls, and their results in order."""
    talk = Conversation(rig, dialect, [WEATHER])
    talk.messages.append({"role": "user", "content": "Where is it warm?"})
    for calls in rounds:
        talk.messages += call_message(dialect, *calls)
        talk.messages += dialect.results(
            [(call_id, Result(f"{city} is warm")) for call_id, city in calls])
    return talk


def upstream_rounds(rig: Rig) -> list[list[tuple[str, str]]]:
    """The rounds of the last request as (city, result); each result under the id of its call."""
    found = []
    messages = upstream_messages(rig.last_body())
    for (_, calls), (_, results) in zip(messages, messages[1:]):
        asked = [each for each in calls
                 if isinstance(each, UpstreamBlock) and each.kind == "tool_use"]
        beside = results[:len(asked)]
        if asked:
            assert [each.id for each in asked] == [each.id for each in beside]
            found.append([(call.content["city"], result.content)
                          for call, result in zip(asked, beside)])
    return found


ROUNDS: dict[str, list[list[tuple[str, str]]]] = {
    "the same in each turn": [[("call_0", "Rome")], [("call_0", "Oslo")], [("call_0", "Bonn")]],
    "the same in one answer": [[("exec:2", "Rome"), ("exec:2", "Oslo")], [("exec:2", "Bonn")]],
    "equal without their marks": [[("call_1_10", "Rome"), ("call_11_0", "Oslo")]],
    "nothing but marks": [[("__", "Rome"), ("___", "Oslo")]],
    "as functions": [[("functions.weather:0", "Rome")], [("functions.weather:0", "Oslo")]],
}


@EVERY_DIALECT
@pytest.mark.parametrize(
    "rounds", [*list(ROUNDS.values())[:2], *rest(*list(ROUNDS.values())[2:])], ids=ROUNDS)
def test_whatever_the_ids_each_result_reaches_the_model_beside_its_call(
    rig: Rig, dialect: Dialect, rounds: list[list[tuple[str, str]]]
) -> None:
    rig.script(stub.text("Everywhere."))
    said = history(rig, dialect, *rounds).send()
    assert said.text == "Everywhere."
    assert upstream_rounds(rig) == [
        [(city, f"{city} is warm") for _, city in calls] for calls in rounds]
    ids = [each.id for _, contents in upstream_messages(rig.last_body()) for each in contents
           if isinstance(each, UpstreamBlock) and each.kind == "tool_use"]
    assert len(set(ids)) == len(ids)


@pytest.mark.exhaustive
@EVERY_DIALECT
def test_a_call_that_the_user_interrupted_goes_on_without_a_result(
    rig: Rig, dialect: Dialect
) -> None:
    rig.script(stub.tool_calls([("weather", {"city": "Rome"})]), stub.text("As you like."))
    talk = Conversation(rig, dialect, [WEATHER])
    talk.ask("Where is it warm?")
    said = talk.ask("Never mind.")
    assert said.text == "As you like."
    assert said.reply.headers["X-OCP-Adjusted"] == "missing_tool_result=1"
    assert upstream_rounds(rig) == [[("Rome", NO_RESULT)]]
    assert upstream_messages(rig.last_body())[-1][1][-1] == "Never mind."


@pytest.mark.exhaustive
@EVERY_DIALECT
def test_a_result_that_comes_late_is_told_beside_its_call(rig: Rig, dialect: Dialect) -> None:
    rig.script(stub.text("Oslo, then."))
    talk = history(rig, dialect, [("c1", "Rome"), ("c2", "Oslo")])
    late = dialect.results([("c2", Result("Oslo is warm"))])
    talk.messages[-1:] = (
        dialect.results([("c1", Result("Rome is warm"))]) if dialect is MESSAGES else [])
    talk.messages += [{"role": "assistant", "content": "Wait."}, *late,
                      {"role": "user", "content": "Well?"}]
    said = talk.send()
    assert said.text == "Oslo, then."
    assert said.reply.headers["X-OCP-Adjusted"] == "late_tool_result=1"
    assert upstream_rounds(rig) == [[("Rome", "Rome is warm"), ("Oslo", "Oslo is warm")]]


@EVERY_DIALECT
def test_late_instructions_stay_where_they_stand_and_the_conversation_goes_on(
    rig: Rig, dialect: Dialect
) -> None:
    rig.script(stub.text("Hi."), stub.text("Ok."), stub.text("Bye."))
    talk = Conversation(rig, dialect, system="Be kind.")
    role = "system" if dialect is MESSAGES else "developer"
    answers = [talk.ask("Hello?")]
    talk.messages.append({"role": role, "content": "The sandbox is read-only now."})
    answers.append(talk.ask("And now?"))
    answers.append(talk.ask("Bye!"))
    assert is_continued(rig, answers)
    assert upstream_messages(rig.last_body()) == [
        ("user", ["Hello?"]), ("assistant", ["Hi."]),
        ("user", ["<system-reminder>\nThe sandbox is read-only now.\n</system-reminder>",
                  "And now?"]),
        ("assistant", ["Ok."]), ("user", ["Bye!"])]


@pytest.mark.exhaustive
@GOING_ON
def test_a_history_that_ends_with_an_answer_is_continued(rig: Rig, dialect: Dialect) -> None:
    rig.script(stub.text("Once upon"), stub.text(" a time."))
    talk = Conversation(rig, dialect)
    talk.ask("Tell me a story.")
    said = talk.send()
    assert (said.text, path_of(rig, said)) == (" a time.", "continued")
    assert said.reply.headers["X-OCP-Adjusted"] == "assistant_last=1"
    assert upstream_messages(rig.last_body()) == [
        ("user", ["Tell me a story."]), ("assistant", ["Once upon"]), ("user", [GO_ON])]


@pytest.mark.exhaustive
def test_on_messages_a_history_that_ends_with_an_answer_is_refused(rig: Rig) -> None:
    rig.script(stub.text("Once upon"))
    talk = Conversation(rig, MESSAGES)
    talk.ask("Tell me a story.")
    assert talk.send().reply.status == 400
    assert len(rig.bodies()) == 1


@pytest.mark.exhaustive
def test_results_of_tools_that_the_api_ran_are_told_to_the_model(rig: Rig) -> None:
    rig.script(stub.text("Paris."))
    talk = Conversation(rig, MESSAGES)
    searched = [
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"q": "a"}},
        {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [
            {"type": "web_search_result", "title": "Paris", "url": "https://a",
             "encrypted_content": "c2VhbGVk"}]},
        {"type": "text", "text": "I found it."}, {"type": "quantum", "state": "both"}]
    talk.messages += [{"role": "user", "content": "Search."},
                      {"role": "assistant", "content": searched}]
    said = talk.ask("So?")
    assert said.reply.headers["X-OCP-Ignored-Params"] == "messages[1].content[3]"
    assert upstream_messages(rig.last_body())[1] == ("assistant", [
        '[web_search_tool_result]\n'
        '[{"type":"web_search_result","title":"Paris","url":"https://a"}]', "I found it."])
