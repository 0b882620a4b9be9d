"""The official `openai` package with tools, wanted forms and responses, over the fake claude."""
from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from libraries import library
from server import Server

openai = library("openai")
pydantic = pytest.importorskip("pydantic", reason="the pydantic package is not installed")

Json = Any

MODEL = "claude-sonnet-4-6"
ASKED: list[Json] = [{"role": "user", "content": "How warm is it?"}]
PARAMETERS = {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
    "additionalProperties": False}
CHAT_TOOLS: list[Json] = [{"type": "function", "function": {
    "name": "weather", "description": "Tells it.", "parameters": PARAMETERS, "strict": True}}]
TOOLS: list[Json] = [{"type": "function", "name": "weather", "parameters": PARAMETERS}]
SHAPED = [[{"tool": {"name": "StructuredOutput", "input": {"city": "Rome", "warm": True}}}]]


class City(pydantic.BaseModel):  # type: ignore[misc,name-defined]
    """What is asked for."""
    city: str
    warm: bool


@pytest.fixture
def client(shared_server: Server) -> Iterator[Any]:
    shared_server.write_scenario([])
    with openai.OpenAI(
        api_key="any", base_url=f"{shared_server.url}/v1", timeout=60, max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as found:
        yield found


def call(city: str) -> Json:
    return {"tool": {"name": "weather", "input": {"city": city}}}


#: Two parallel calls, two rounds of one, and the answer.
LOOP = [
    [{"say": "Let me look."}, call("Rome"), call("Oslo")], [call("Bern")], [call("Graz")],
    [{"say": "All warm."}]]


def warmth(arguments: str) -> str:
    return f"20 degrees in {json.loads(arguments)['city']}"


# ---------------------------------------------------------------------------
# Chat
# ---------------------------------------------------------------------------

def test_a_tool_loop_goes_three_rounds(shared_server: Server, client: Any) -> None:
    shared_server.write_scenario(LOOP)
    messages, rounds = list(ASKED), []
    while True:
        found = client.chat.completions.create(model=MODEL, messages=messages, tools=CHAT_TOOLS)
        (choice,) = found.choices
        messages.append(choice.message)
        if choice.finish_reason != "tool_calls":
            break
        rounds.append([each.function.arguments for each in choice.message.tool_calls])
        messages += [
            {"role": "tool", "tool_call_id": each.id, "content": warmth(each.function.arguments)}
            for each in choice.message.tool_calls]

    assert [[json.loads(each)["city"] for each in each_round] for each_round in rounds] == [
        ["Rome", "Oslo"], ["Bern"], ["Graz"]]
    assert choice.message.content == "All warm."
    results = [block for message in shared_server.queries()[-1]["messages"]
               for block in message["content"] if block["type"] == "tool_result"]
    assert "20 degrees in Oslo" in json.dumps(results)
    assert len(results) == 4


def test_the_helper_for_streams_puts_calls_together(shared_server: Server, client: Any) -> None:
    shared_server.write_scenario(LOOP)
    with client.chat.completions.stream(
        model=MODEL, messages=ASKED, tools=CHAT_TOOLS
    ) as stream:
        done = [event for event in stream
                if event.type == "tool_calls.function.arguments.done"]
        found = stream.get_final_completion().choices[0]

    assert [event.parsed_arguments for event in done] == [{"city": "Rome"}, {"city": "Oslo"}]
    assert [event.index for event in done] == [0, 1]
    assert found.finish_reason == "tool_calls" and found.message.content == "Let me look."
    assert [each.function.name for each in found.message.tool_calls] == ["weather"] * 2


def test_parse_gives_an_object(shared_server: Server, client: Any) -> None:
    shared_server.write_scenario(SHAPED)
    found = client.chat.completions.parse(model=MODEL, messages=ASKED, response_format=City)

    assert found.choices[0].message.parsed == City(city="Rome", warm=True)


def test_an_object_can_be_streamed(shared_server: Server, client: Any) -> None:
    shared_server.write_scenario(SHAPED)
    with client.chat.completions.stream(
        model=MODEL, messages=ASKED, response_format=City
    ) as stream:
        done = [event.parsed for event in stream if event.type == "content.done"]

    assert done == [City(city="Rome", warm=True)]


def test_parse_gives_the_arguments_of_strict_tools(shared_server: Server, client: Any) -> None:
    shared_server.write_scenario([[call("Rome")]])
    found = client.chat.completions.parse(model=MODEL, messages=ASKED, tools=CHAT_TOOLS)

    (made,) = found.choices[0].message.tool_calls
    assert made.function.parsed_arguments == {"city": "Rome"}


def test_a_refusal_is_no_object(shared_server: Server, client: Any) -> None:
    shared_server.write_scenario([[{"say": "No."}]])
    found = client.chat.completions.parse(model=MODEL, messages=ASKED, response_format=City)

    message = found.choices[0].message
    assert (message.refusal, message.parsed) == ("No.", None)


def test_an_answer_that_is_too_long_is_no_object(shared_server: Server, client: Any) -> None:
    shared_server.write_scenario([[{"say": "Half"}, {"finish": "max_tokens"}]])
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=ASKED, response_format=City)


def test_several_choices_are_told_apart(client: Any) -> None:
    found = client.chat.completions.create(model=MODEL, messages=ASKED, n=3)

    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert {choice.message.content for choice in found.choices} == {"You said: How warm is it?"}


def test_legacy_completions_are_parsed(client: Any) -> None:
    found = client.completions.create(model=MODEL, prompt="Once", echo=True)

    assert found.choices[0].text == "OnceYou said: Once"
    pieces = client.completions.create(model=MODEL, prompt=["a", "b"], stream=True)
    texts = ["", ""]
    for chunk in pieces:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["You said: a", "You said: b"]


def test_embeddings_are_not_found_and_say_what_to_do(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="embedding"):
        client.embeddings.create(model="any", input="text")


# ---------------------------------------------------------------------------
# Responses
# ---------------------------------------------------------------------------

def test_a_response_is_parsed_kept_and_deleted(client: Any) -> None:
    found = client.responses.create(model=MODEL, input="hello", instructions="Be kind.")

    assert (found.status, found.output_text) == ("completed", "You said: hello")
    assert (found.usage.input_tokens, found.usage.output_tokens) == (18, 7)
    assert client.responses.retrieve(found.id).output_text == found.output_text
    client.responses.delete(found.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(found.id)


def test_what_a_developer_said_lasts_over_responses(shared_server: Server, client: Any) -> None:
    shared_server.write_scenario([])
    rule = {"role": "developer", "content": "Be kind."}
    first = client.responses.create(model=MODEL, input=[rule, *ASKED], instructions="Once.")
    second = client.responses.create(model=MODEL, input="And?", previous_response_id=first.id)
    third = client.responses.create(model=MODEL, input="So?", previous_response_id=second.id)

    assert third.output_text == "You said: So?"
    assert [query["system"] for query in shared_server.queries()[-3:]] == [
        ["Once.\n\nBe kind."], ["Be kind."], ["Be kind."]]


def test_responses_go_three_rounds_by_their_ids(shared_server: Server, client: Any) -> None:
    shared_server.write_scenario(LOOP)
    found = client.responses.create(model=MODEL, input="How warm is it?", tools=TOOLS)
    rounds = []
    while True:
        calls = [item for item in found.output if item.type == "function_call"]
        if not calls:
            break
        rounds.append(len(calls))
        outputs = [{"type": "function_call_output", "call_id": each.call_id,
                    "output": warmth(each.arguments)} for each in calls]
        found = client.responses.create(
            model=MODEL, input=outputs, previous_response_id=found.id, tools=TOOLS)

    assert (rounds, found.output_text) == ([2, 1, 1], "All warm.")


def test_responses_go_rounds_with_references_to_their_own_output(
    shared_server: Server, client: Any
) -> None:
    shared_server.write_scenario([[{"say": "I look."}, call("Rome")], [{"say": "Warm."}]])
    found = client.responses.create(model=MODEL, input=ASKED, tools=TOOLS)
    [said, made] = found.output
    references = [{"type": "item_reference", "id": item.id} for item in (said, made)]
    output = {"type": "function_call_output", "call_id": made.call_id, "output": "20"}

    last = client.responses.create(
        model=MODEL, input=[*ASKED, *references, output], tools=TOOLS)

    assert last.output_text == "Warm."
    client.responses.delete(found.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=MODEL, input=[*ASKED, *references, output], tools=TOOLS)


def test_responses_go_rounds_with_their_own_output_as_input(
    shared_server: Server, client: Any
) -> None:
    shared_server.write_scenario([[{"think": "Hm."}, call("Rome")], [{"say": "Warm."}]])
    items = list(ASKED)
    fields: Json = {
        "model": MODEL, "tools": TOOLS, "store": False, "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "low", "summary": "auto"}}
    found = client.responses.create(input=items, **fields)
    items += found.output
    items += [{"type": "function_call_output", "call_id": item.call_id, "output": "20"}
              for item in found.output if item.type == "function_call"]
    last = client.responses.create(input=items, **fields)

    assert [item.type for item in found.output] == ["reasoning", "function_call"]
    assert last.output_text == "Warm."


def test_the_helper_for_streams_of_responses_sees_everything(
    shared_server: Server, client: Any
) -> None:
    shared_server.write_scenario(
        [[{"think": "Hm."}, {"say": "Let me look."}, call("Rome")]])
    with client.responses.stream(
        model=MODEL, input="How warm?", tools=TOOLS,
        reasoning={"effort": "low", "summary": "auto"},
    ) as stream:
        events = list(stream)
        found = stream.get_final_response()

    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert [item.type for item in found.output] == ["reasoning", "message", "function_call"]
    assert found.output[0].summary[0].text == "Hm."
    assert found.output_text == "Let me look."
    assert found.output[2].arguments == '{"city":"Rome"}' or json.loads(
        found.output[2].arguments) == {"city": "Rome"}


def test_responses_parse_gives_an_object(shared_server: Server, client: Any) -> None:
    shared_server.write_scenario(SHAPED)
    found = client.responses.parse(model=MODEL, input="Which?", text_format=City)

    assert found.output_parsed == City(city="Rome", warm=True)


def test_a_stream_that_fails_says_so(shared_server: Server, client: Any) -> None:
    shared_server.write_scenario([[{"say": "so far"}, {"exit": 1}]])
    events = list(client.responses.create(model=MODEL, input="hello", stream=True))

    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code
    assert events[-1].response.status == "failed"


@pytest.mark.parametrize(("fields", "kind"), [
    ({"previous_response_id": "resp_none"}, "BadRequestError"),
    ({"model": "gpt-9"}, "NotFoundError"),
    ({"temperature": 7}, "BadRequestError"),
    ({"conversation": "conv_1"}, "BadRequestError"),
])
def test_what_cannot_be_answered_is_a_typed_error(
    client: Any, fields: dict[str, Json], kind: str
) -> None:
    with pytest.raises(getattr(openai, kind)) as found:
        client.responses.create(**{"model": MODEL, "input": "hello", **fields})
    assert found.value.param == next(iter(fields))


def test_the_asynchronous_client_streams_both(shared_server: Server) -> None:
    shared_server.write_scenario([])

    async def both() -> list[str]:
        async with openai.AsyncOpenAI(
            api_key="any", base_url=f"{shared_server.url}/v1", timeout=60,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        ) as client:
            async with client.responses.stream(model=MODEL, input="one") as stream:
                first = await stream.get_final_response()
            async with client.chat.completions.stream(model=MODEL, messages=ASKED) as stream:
                second = await stream.get_final_completion()
        return [first.output_text, second.choices[0].message.content]

    assert asyncio.run(both()) == ["You said: one", "You said: How warm is it?"]


# ---------------------------------------------------------------------------
# Custom tools, and the paths below a response
# ---------------------------------------------------------------------------

PATCH = '*** Begin Patch\n"caf\u00e9" \\ \U0001f600\n*** End Patch'
GRAMMAR = {"syntax": "lark", "definition": "start: patch"}
EDITS: list[Json] = [[{"tool": {"name": "edit", "input": {"input": PATCH}}}], [{"say": "Done."}]]
CUSTOM: Json = {"type": "custom", "name": "edit", "format": {"type": "grammar", **GRAMMAR}}
CHAT_CUSTOM: Json = {"type": "custom", "custom": {
    "name": "edit", "format": {"type": "grammar", "grammar": GRAMMAR}}}


def test_a_custom_tool_of_chat_is_called_and_answered(
    shared_server: Server, client: Any
) -> None:
    shared_server.write_scenario(EDITS)
    found = client.chat.completions.create(model=MODEL, messages=ASKED, tools=[CHAT_CUSTOM])
    (call_made,) = found.choices[0].message.tool_calls
    messages = [*ASKED, found.choices[0].message,
                {"role": "tool", "tool_call_id": call_made.id, "content": "Patched."}]
    last = client.chat.completions.create(model=MODEL, messages=messages, tools=[CHAT_CUSTOM])

    assert (call_made.type, call_made.custom.name, call_made.custom.input) == (
        "custom", "edit", PATCH)
    assert last.choices[0].message.content == "Done."


def test_a_custom_tool_of_chat_is_streamed(shared_server: Server, client: Any) -> None:
    shared_server.write_scenario(EDITS)
    with client.chat.completions.create(
        model=MODEL, messages=ASKED, tools=[CHAT_CUSTOM], stream=True
    ) as chunks:
        calls = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or ()]

    # The package has no type for these yet, and hands them over as they are.
    assert "".join(each.custom["input"] for each in calls) == PATCH
    assert (calls[0].type, calls[0].custom["name"], calls[0].function) == ("custom", "edit", None)


def test_a_custom_tool_of_responses_goes_on_by_the_id(
    shared_server: Server, client: Any
) -> None:
    shared_server.write_scenario(EDITS)
    with client.responses.stream(model=MODEL, input=ASKED, tools=[CUSTOM]) as stream:
        events = list(stream)
        first = stream.get_final_response()
    (item,) = first.output
    result = {"type": "custom_tool_call_output", "call_id": item.call_id, "output": "Patched."}
    last = client.responses.create(
        model=MODEL, input=[result], previous_response_id=first.id, tools=[CUSTOM])

    deltas = [each.delta for each in events
              if each.type == "response.custom_tool_call_input.delta"]
    (done,) = [each for each in events if each.type == "response.custom_tool_call_input.done"]
    assert "".join(deltas) == done.input == item.input == PATCH
    assert (item.type, item.name, last.output_text) == ("custom_tool_call", "edit", "Done.")
    listed = [each.type for each in client.responses.input_items.list(last.id, order="asc")]
    assert listed == ["message", "custom_tool_call", "custom_tool_call_output"]


def test_the_input_items_of_a_response_come_page_by_page(client: Any) -> None:
    said = [{"role": "user", "content": f"{number}"} for number in range(5)]
    found = client.responses.create(model=MODEL, input=said)

    pages = client.responses.input_items.list(found.id, limit=2, order="asc")

    assert [item.content[0].text for item in pages] == list("01234")


def test_a_conversation_is_counted_compacted_and_gone_on_from(client: Any) -> None:
    counted = client.responses.input_tokens.count(model=MODEL, input=ASKED)
    compacted = client.responses.compact(model=MODEL, input=[
        *ASKED, {"role": "assistant", "content": "Very."}])
    found = client.responses.create(
        model=MODEL, input=[*compacted.output, {"role": "user", "content": "Why?"}])

    assert counted.object == "response.input_tokens" and counted.input_tokens > 0
    assert [item.type for item in compacted.output] == ["message", "compaction"]
    assert compacted.usage.total_tokens > 0
    assert found.status == "completed"


def test_a_complete_response_cannot_be_cancelled(client: Any) -> None:
    found = client.responses.create(model=MODEL, input=ASKED)

    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(found.id)


def test_a_complete_response_of_the_background_is_returned_as_it_is(client: Any) -> None:
    found = client.responses.create(model=MODEL, input=ASKED, background=True)

    assert client.responses.cancel(found.id).status == "completed"


def test_a_response_is_cancelled_while_it_is_streamed(shared_server: Server, client: Any) -> None:
    shared_server.write_scenario([[{"say": "To begin with, ", "chunks": 1}, {"hang": True}]])
    with client.responses.create(model=MODEL, input=ASKED, stream=True) as stream:
        created = next(stream)

        cancelled = client.responses.cancel(created.response.id)

        *_, last = stream
    assert (cancelled.id, cancelled.status) == (created.response.id, "cancelled")
    assert (last.type, last.response.id) == ("response.failed", created.response.id)
    # The server ends the connection of a stopped stream, which the client may try to use again.
    patient = client.with_options(max_retries=2)
    assert patient.responses.cancel(created.response.id).status == "cancelled"


# ---------------------------------------------------------------------------
# Searches of the web
# ---------------------------------------------------------------------------

YR = {"type": "web_search_result_location", "cited_text": "It rains", "url": "https://yr.no",
      "title": "Yr", "encrypted_index": "xx"}
SEARCHED = [[
    {"search": "oslo", "found": [{"type": "web_search_result", "url": "https://yr.no"}]},
    {"say": "Well: "}, {"cite": "it rains.", "citations": [YR]}]]


def test_a_chat_answer_has_its_sources(shared_server: Server, client: Any) -> None:
    shared_server.write_scenario(SEARCHED)

    found = client.chat.completions.create(model=MODEL, messages=ASKED, web_search_options={})

    (annotation,) = found.choices[0].message.annotations
    cited = annotation.url_citation
    assert found.choices[0].message.content[cited.start_index:cited.end_index] == "it rains."
    assert (cited.url, cited.title) == ("https://yr.no", "Yr")


def test_a_streamed_response_has_its_search_and_sources(
    shared_server: Server, client: Any
) -> None:
    shared_server.write_scenario(SEARCHED)

    with client.responses.stream(
        model=MODEL, input=ASKED, tools=[{"type": "web_search"}]
    ) as stream:
        kinds = [event.type for event in stream]
        called, message = stream.get_final_response().output

    assert (called.type, called.status, called.action.query) == (
        "web_search_call", "completed", "oslo")
    (annotation,) = message.content[0].annotations
    assert (annotation.url, annotation.start_index, annotation.end_index) == (
        "https://yr.no", 6, 15)
    assert "response.web_search_call.searching" in kinds
    assert "response.output_text.annotation.added" in kinds
