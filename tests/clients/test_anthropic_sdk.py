"""The official `anthropic` package as a client, over the fake claude."""
from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from libraries import library
from server import Server, running_server

anthropic = library("anthropic")
pydantic = pytest.importorskip("pydantic", reason="the pydantic package is not installed")

Json = Any

MODEL = "claude-sonnet-4-6"
HELLO: list[Json] = [{"role": "user", "content": "hello"}]
TOOLS: list[Json] = [{"name": "weather", "description": "Tells it.", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string"}}}}]


class City(pydantic.BaseModel):  # type: ignore[misc,name-defined]
    """What is asked for."""
    city: str


@pytest.fixture
def server(shared_server: Server) -> Server:
    shared_server.write_scenario([])
    return shared_server


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with sdk(server) as found:
        yield found


def sdk(server: Server, **options: Any) -> Any:
    """A client of the package, deaf to proxies that the environment may name."""
    wanted = {
        "api_key": "any", "base_url": server.url, "timeout": 60, "max_retries": 0, **options}
    return anthropic.Anthropic(
        http_client=anthropic.DefaultHttpxClient(trust_env=False), **wanted)


def ask(client: Any, messages: Json = None, **fields: Json) -> Any:
    return client.messages.create(
        **{"model": MODEL, "max_tokens": 2000, "messages": messages or HELLO, **fields})


def call(city: str) -> Json:
    return {"tool": {"name": "weather", "input": {"city": city}}}


LOOP = [
    [{"say": "Let me look."}, call("Rome"), call("Oslo")], [call("Bern")], [call("Graz")],
    [{"say": "All warm."}]]


# ---------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------

def test_a_message_is_parsed(client: Any) -> None:
    found = ask(client, system="Be kind.")

    assert (found.content[0].text, found.stop_reason) == ("You said: hello", "end_turn")
    assert found.usage.input_tokens + found.usage.cache_read_input_tokens == 15
    assert (found.role, found.type, found._request_id[:4]) == ("assistant", "message", "req_")


def test_the_helper_for_streams_gives_text_and_message(client: Any) -> None:
    with client.messages.stream(model=MODEL, max_tokens=99, messages=HELLO) as stream:
        text = "".join(stream.text_stream)
        found = stream.get_final_message()

    assert text == found.content[0].text == "You said: hello"
    assert (found.stop_reason, found.usage.output_tokens) == ("end_turn", 7)


def test_a_raw_stream_has_the_apis_events_in_the_apis_order(client: Any) -> None:
    events = [event.type for event in ask(client, stream=True)]

    assert [kind for kind in events if kind != "content_block_delta"] == [
        "message_start", "content_block_start", "content_block_stop", "message_delta",
        "message_stop"]
    assert events[1:4] == ["content_block_start", *["content_block_delta"] * 2]


def test_thinking_blocks_have_their_signatures(server: Server, client: Any) -> None:
    server.write_scenario([[{"think": "Hm."}, {"say": "Yes."}]])
    with client.messages.stream(
        model=MODEL, max_tokens=4000, messages=HELLO,
        thinking={"type": "enabled", "budget_tokens": 1024},
    ) as stream:
        kinds = [event.type for event in stream]
        found = stream.get_final_message()

    thought, answer = found.content
    assert (thought.type, thought.thinking, answer.text) == ("thinking", "Hm.", "Yes.")
    assert thought.signature and "thinking" in kinds and "signature" in kinds
    server.write_scenario([])
    again = ask(client, [*HELLO, {"role": "assistant", "content": found.content}, *HELLO])
    assert again.content[0].text == "You said: hello"


def test_tokens_are_estimated(client: Any) -> None:
    short = client.messages.count_tokens(model=MODEL, messages=HELLO)
    long = client.messages.count_tokens(
        model=MODEL, messages=HELLO, system="word " * 700, tools=TOOLS)

    assert 0 < short.input_tokens < 20 < 900 < long.input_tokens < 1500


def test_models_may_be_listed(client: Any) -> None:
    page = client.models.list()
    assert MODEL in [model.id for model in page]
    assert page.has_more is False and page.first_id == page.data[0].id
    assert page.last_id == page.data[-1].id
    found = client.models.retrieve(MODEL)
    assert (found.type, found.display_name) == ("model", "Claude Sonnet 4.6")
    assert found.created_at.year == 2025
    told = found.model_dump()
    assert (told["max_input_tokens"], told["max_tokens"], told["lifecycle"]) == (
        200_000, 128_000, "active")


# ---------------------------------------------------------------------------
# Tools
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_a_tool_loop_goes_three_rounds(server: Server, client: Any, streams: bool) -> None:
    server.write_scenario(LOOP)
    messages, rounds = list(HELLO), []
    while True:
        found = next_message(client, messages, streams)
        messages.append({"role": "assistant", "content": found.content})
        calls = [block for block in found.content if block.type == "tool_use"]
        if found.stop_reason != "tool_use":
            break
        rounds.append([block.input for block in calls])
        messages.append({"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": block.id, "content": "20"}
            for block in calls]})

    assert [[made["city"] for made in calls] for calls in rounds] == [
        ["Rome", "Oslo"], ["Bern"], ["Graz"]]
    assert found.content[-1].text == "All warm."


def next_message(client: Any, messages: Json, streams: bool) -> Any:
    if not streams:
        return ask(client, messages, tools=TOOLS)
    with client.messages.stream(
        model=MODEL, max_tokens=2000, messages=messages, tools=TOOLS
    ) as stream:
        return stream.get_final_message()


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_the_runner_of_tools_runs_them(server: Server, client: Any, streams: bool) -> None:
    runner = getattr(client.beta.messages, "tool_runner", None)
    if runner is None or not hasattr(anthropic, "beta_tool"):
        pytest.skip("this anthropic package has no tool runner")
    server.write_scenario(LOOP)
    asked = []

    @anthropic.beta_tool  # type: ignore[untyped-decorator]
    def weather(city: str) -> str:
        """Tells how warm it is.

        Args:
            city: where
        """
        asked.append(city)
        return "20"

    running = runner(
        model=MODEL, max_tokens=2000, messages=HELLO, tools=[weather], stream=streams)
    last = running.until_done()

    assert last.content[-1].text == "All warm."
    assert asked == ["Rome", "Oslo", "Bern", "Graz"]


def test_parse_gives_an_object(server: Server, client: Any) -> None:
    if not hasattr(client.messages, "parse"):
        pytest.skip("this anthropic package cannot parse")
    server.write_scenario([[{"tool": {"name": "StructuredOutput", "input": {"city": "Rome"}}}]])
    found = client.messages.parse(
        model=MODEL, max_tokens=99, messages=HELLO, output_format=City)

    assert found.parsed_output == City(city="Rome")


def test_the_runner_gives_and_takes_tools_while_it_runs(server: Server, client: Any) -> None:
    if not hasattr(client.beta.messages, "thread"):
        pytest.skip("the tool runner of this anthropic package has no changes of tools")
    # A claude that is asked with other tools is another process, which begins anew.
    server.write_scenario([[call("Rome")]])

    @anthropic.beta_tool  # type: ignore[untyped-decorator]
    def weather(city: str) -> str:
        """Tells how warm it is in a city."""
        return "20"

    @anthropic.beta_tool  # type: ignore[untyped-decorator]
    def clock() -> str:
        """Tells the time."""
        return "noon"

    offered = []
    running = client.beta.messages.tool_runner(
        model=MODEL, max_tokens=2000, messages=HELLO, tools=[weather], max_iterations=3)
    for number, _ in enumerate(running):
        offered.append({each["name"] for each in server.queries()[-1]["tools"]})
        if number == 0:
            running.add_tools(clock)
        elif number == 1:
            running.remove_tools("clock")

    assert offered == [{"weather"}, {"weather", "clock"}, {"weather"}]


# ---------------------------------------------------------------------------
# What else the package can ask for
# ---------------------------------------------------------------------------

@pytest.fixture
def threading_client(client: Any) -> Any:
    if not hasattr(client.beta.messages, "thread"):
        pytest.skip("this anthropic package has no threads")
    return client


def test_a_thread_is_refused_by_its_own_exception(threading_client: Any) -> None:
    thread = threading_client.beta.messages.thread(model=MODEL, max_tokens=99)

    with pytest.raises(anthropic.BadRequestError, match="send the messages") as found:
        thread.send(*HELLO)
    assert type(found.value).__name__ == "ThreadUnsupportedRequestError"


def test_a_thread_that_may_do_without_the_server_is_a_conversation(
    server: Server, threading_client: Any
) -> None:
    thread = threading_client.beta.messages.thread(
        model=MODEL, max_tokens=99, unsupported_request_behavior="continue_unthreaded")
    said = [thread.send(*HELLO).content[0].text,
            thread.send({"role": "user", "content": "and again"}).content[0].text]
    with thread.stream({"role": "user", "content": "the last"}) as stream:
        said.append("".join(stream.text_stream))

    assert said == ["You said: hello", "You said: and again", "You said: the last"]
    assert (len(thread.messages), thread.previous_message_id) == (6, None)


def test_the_beta_twins_answer_like_the_others(server: Server, client: Any) -> None:
    beta = client.beta
    asked: Json = {"model": MODEL, "max_tokens": 99, "messages": HELLO}

    assert beta.messages.create(**asked).content[0].text == "You said: hello"
    with beta.messages.stream(**asked) as stream:
        assert stream.get_final_message().content[0].text == "You said: hello"
    counted = {twin.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens
               for twin in (client, beta)}
    assert len(counted) == 1
    assert [each.id for each in beta.models.list()] == [each.id for each in client.models.list()]
    assert beta.models.retrieve(MODEL).id == MODEL


def test_models_come_page_by_page(client: Any) -> None:
    assert [each.id for each in client.models.list(limit=2)] == [
        each.id for each in client.models.list()]


def test_a_streamed_form_becomes_an_object(server: Server, client: Any) -> None:
    server.write_scenario([[{"tool": {"name": "StructuredOutput", "input": {"city": "Rome"}}}]])
    with client.messages.stream(
        model=MODEL, max_tokens=99, messages=HELLO, output_format=City
    ) as stream:
        assert stream.get_final_message().parsed_output == City(city="Rome")


def test_fields_that_only_the_api_itself_can_honour_are_named(client: Any) -> None:
    unknown: Json = {
        "billing_policy": {"type": "plan"}, "compaction": {"type": "summarize"}, "container": "c",
        "context_management": {"edits": []}, "fallbacks": [{"model": MODEL}],
        "inference_geo": "us", "mcp_servers": [{"type": "url"}], "speed": "fast"}
    answered = client.messages.with_raw_response.create(
        model=MODEL, max_tokens=99, messages=HELLO, extra_body=unknown)

    assert sorted(answered.headers["X-OCP-Ignored-Params"].split(", ")) == sorted(unknown)
    assert answered.parse().content[0].text == "You said: hello"


#: Methods whose routes the server does not have; the path that each asks for.
ELSEWHERE: dict[str, Callable[[Any], object]] = {
    "/v1/messages/batches": lambda client: client.messages.batches.create(requests=[]),
    "/v1/messages/batches/b": lambda client: client.messages.batches.retrieve("b"),
    "/v1/messages/batches/b/cancel": lambda client: client.messages.batches.cancel("b"),
    "/v1/files": lambda client: client.beta.files.upload(file=("a.txt", b"hello")),
    "/v1/files/f": lambda client: client.beta.files.retrieve_metadata("f"),
    "/v1/files/f/content": lambda client: client.beta.files.download("f"),
    "/v1/skills": lambda client: list(client.beta.skills.list()),
    "/v1/agents": lambda client: list(client.beta.agents.list()),
    "/v1/sessions": lambda client: list(client.beta.sessions.list()),
    "/v1/vaults": lambda client: list(client.beta.vaults.list()),
    "/v1/organizations/me": lambda client: client.organization.retrieve(),
}


@pytest.mark.parametrize("path", ELSEWHERE)
def test_a_method_that_the_server_has_no_route_for_is_a_typed_error_that_names_the_path(
    client: Any, path: str
) -> None:
    try:
        with pytest.raises(anthropic.NotFoundError) as found:
            ELSEWHERE[path](client)
    except AttributeError:
        pytest.skip("this anthropic package does not have the method")

    assert found.value.body["error"]["type"] == "not_found_error"
    assert f"There is no path {path};" in found.value.body["error"]["message"]


# ---------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------

@pytest.mark.parametrize(("status", "word", "kind"), [
    (400, "invalid_request", "BadRequestError"),
    (401, "authentication_failed", "AuthenticationError"),
    (403, "unknown", "PermissionDeniedError"),
    (429, "rate_limit", "RateLimitError"),
    (529, "overloaded", "OverloadedError"),
])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_failure_has_its_own_exception(
    tmp_path: Any, status: int, word: str, kind: str, stream: bool
) -> None:
    error = {"status": status, "word": word, "text": "it failed"}
    with running_server(tmp_path, [[{"api_error": error}]]) as server, sdk(server) as client:
        wanted = getattr(anthropic, kind, anthropic.InternalServerError)
        with pytest.raises(wanted) as found:
            ask(client, stream=stream)

    assert found.value.status_code == status
    assert found.value.body["type"] == "error"
    assert found.value.body["error"]["message"]


def test_a_failure_in_the_middle_of_a_stream_is_raised(server: Server, client: Any) -> None:
    server.write_scenario([[{"say": "so far"}, {"exit": 1}]])
    with pytest.raises(anthropic.APIStatusError, match="ended before its answer"):
        list(ask(client, stream=True))


@pytest.mark.parametrize(("fields", "kind"), [
    ({"model": "gpt-9"}, "NotFoundError"),
    ({"temperature": 5}, "BadRequestError"),
    ({"messages": []}, "BadRequestError"),
])
def test_a_request_that_is_wrong_is_a_typed_error(
    client: Any, fields: dict[str, Json], kind: str
) -> None:
    body = {"model": MODEL, "max_tokens": 9, "messages": HELLO, "extra_body": fields}
    with pytest.raises(getattr(anthropic, kind)):
        client.messages.create(**body)


def test_a_wrong_key_is_an_authentication_error(tmp_path: Any) -> None:
    with running_server(tmp_path, env={"PROXY_API_KEY": "right-key-of-tests"}) as server:
        with sdk(server, api_key="wrong") as client, pytest.raises(
            anthropic.AuthenticationError
        ):
            ask(client)
        with sdk(server, api_key="right-key-of-tests") as client:
            assert ask(client).content[0].text == "You said: hello"


def test_the_asynchronous_client_streams(server: Server) -> None:
    async def one(client: Any, word: str) -> str:
        said = [{"role": "user", "content": word}]
        async with client.messages.stream(model=MODEL, max_tokens=99, messages=said) as stream:
            return "".join([text async for text in stream.text_stream])

    async def all_of(words: list[str]) -> list[str]:
        deaf = anthropic.DefaultAsyncHttpxClient(trust_env=False)
        async with anthropic.AsyncAnthropic(
            api_key="any", base_url=server.url, timeout=60, http_client=deaf
        ) as client:
            return list(await asyncio.gather(*[one(client, word) for word in words]))

    words = [f"word{number}" for number in range(5)]
    assert asyncio.run(all_of(words)) == [f"You said: {word}" for word in words]


# ---------------------------------------------------------------------------
# Searches of the web
# ---------------------------------------------------------------------------

def test_a_streamed_message_has_its_search_and_sources(server: Server, client: Any) -> None:
    cited = {"type": "web_search_result_location", "cited_text": "It rains",
             "url": "https://yr.no", "title": "Yr", "encrypted_index": "xx"}
    found = [{"type": "web_search_result", "url": "https://yr.no", "title": "Yr",
              "encrypted_content": "abc", "page_age": None}]
    server.write_scenario([[{"search": "oslo", "found": found},
                            {"cite": "It rains.", "citations": [cited]}]])
    tools = [{"type": "web_search_20250305", "name": "web_search"}]

    with client.messages.stream(
        model=MODEL, max_tokens=2000, messages=HELLO, tools=tools
    ) as stream:
        called, result, text = stream.get_final_message().content

    assert (called.type, called.input) == ("server_tool_use", {"query": "oslo"})
    assert result.content[0].url == text.citations[0].url == "https://yr.no"
    again = ask(client, [*HELLO, {"role": "assistant", "content": [called, result, text]}, *HELLO],
                tools=tools)
    assert again.content[-1].text == "It rains."
