"""The official `openai` package as a client: what it parses, raises and sends again."""
from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from libraries import library
from server import Server, at_rest, running_server
from waiting import eventually, in_parallel

openai = library("openai")

Json = Any

KEY = "the-key-of-the-tests"
HELLO: list[Json] = [{"role": "user", "content": "hello"}]
PNG = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that wants a key. It has no spares, because it asks again by itself if one dies."""
    env = {"PROXY_API_KEY": KEY, "OCP_WARM_PROCESSES": "0"}
    with running_server(tmp_path_factory.mktemp("server"), env=env) as running:
        yield running


@pytest.fixture
def server(locked: Server) -> Server:
    locked.write_scenario([])
    return locked


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with sdk(server) as found:
        yield found


def sdk(server: Server, **options: Any) -> Any:
    """A client of the package, deaf to proxies that the environment may name."""
    wanted = {"api_key": KEY, "base_url": f"{server.url}/v1", "timeout": 60, **options}
    return openai.OpenAI(http_client=openai.DefaultHttpxClient(trust_env=False), **wanted)


def fail_with(server: Server, status: int, word: str, **more: Json) -> None:
    error = {"status": status, "word": word, "text": "it failed"}
    server.write_scenario([[{"api_error": error, **more}]])


def queries_of(server: Server, before: int) -> int:
    eventually(lambda: at_rest(server))
    return len(server.queries()) - before


# ---------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------

def test_a_completion_is_parsed(client: Any) -> None:
    found = client.chat.completions.create(model="sonnet", messages=HELLO)

    choice = found.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "You said: hello")
    assert (choice.finish_reason, found.model) == ("stop", "claude-sonnet-5-5")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (18, 7)
    assert found.usage.total_tokens == 25
    assert found.usage.prompt_tokens_details.cached_tokens == 5
    assert found._request_id.startswith("req_")


def test_a_stream_is_parsed_chunk_by_chunk(client: Any) -> None:
    chunks = list(client.chat.completions.create(model="sonnet", messages=HELLO, stream=True))

    assert [chunk.choices[0].delta.content or "" for chunk in chunks] == [
        "", "You ", "said: ", "hello", ""]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)


def test_the_usage_of_a_stream_is_its_last_chunk(client: Any) -> None:
    *others, last = client.chat.completions.create(
        model="sonnet", messages=HELLO, stream=True, stream_options={"include_usage": True})

    assert last.choices == [] and last.usage.total_tokens == 25
    assert all(chunk.usage is None for chunk in others)


def test_the_helper_for_streams_puts_the_answer_together(client: Any) -> None:
    with client.chat.completions.stream(model="sonnet", messages=HELLO) as stream:
        found = stream.get_final_completion()

    assert found.choices[0].message.content == "You said: hello"
    assert found.choices[0].finish_reason == "stop"


def test_thinking_can_be_read(server: Server, client: Any) -> None:
    server.write_scenario([[{"think": "hmm"}, {"say": "yes"}]])

    found = client.chat.completions.create(model="sonnet", messages=HELLO)

    assert found.choices[0].message.reasoning_content == "hmm"


def test_heartbeats_are_no_chunks(tmp_path_factory: pytest.TempPathFactory) -> None:
    script = [[{"sleep_ms": 150}, {"say": "one"}, {"sleep_ms": 150}, {"say": "two"}]]
    env = {"CLAUDE_HEARTBEAT_INTERVAL": "40"}

    with running_server(tmp_path_factory.mktemp("slow"), script, env=env) as slow:
        with sdk(slow) as client:
            chunks = list(client.chat.completions.create(
                model="sonnet", messages=HELLO, stream=True))

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "onetwo"


def test_white_space_before_a_whole_answer_is_no_harm(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    script = [[{"sleep_ms": 150}, {"say": "late"}]]
    env = {"OCP_WHOLE_SILENCE": "40"}

    with running_server(tmp_path_factory.mktemp("slow"), script, env=env) as slow:
        with sdk(slow) as client:
            found = client.chat.completions.create(model="sonnet", messages=HELLO)

    assert found.choices[0].message.content == "late"


def test_an_image_reaches_claude(server: Server, client: Any) -> None:
    parts = [{"type": "text", "text": "what is it?"},
             {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}}]

    client.chat.completions.create(
        model="sonnet", messages=[{"role": "user", "content": parts}])

    (message,) = server.queries()[-1]["messages"]
    assert [block["type"] for block in message["content"]] == ["text", "image"]
    assert message["content"][1]["source"]["data"] == PNG.partition(",")[2]


def test_every_option_of_the_package_that_has_a_meaning_is_taken(
    server: Server, client: Any
) -> None:
    found = client.chat.completions.create(
        model="claude-sonnet-4-6", messages=HELLO, max_completion_tokens=50, temperature=0.5,
        stop=["END"], reasoning_effort="none", seed=1, user="me", n=1, presence_penalty=0,
        metadata={"a": "b"}, parallel_tool_calls=True, response_format={"type": "text"})

    env = server.queries()[-1]["settings"]["env"]
    assert found.choices[0].finish_reason == "stop"
    assert env["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "50"


def test_models_are_listed_and_retrieved(client: Any) -> None:
    listed = client.models.list().data

    assert "claude-sonnet-5-5" in [model.id for model in listed]
    assert client.models.retrieve("sonnet").id == "claude-sonnet-5-5"


def test_many_threads_may_share_a_client(client: Any) -> None:
    def one(word: str) -> str:
        found = client.chat.completions.create(
            model="sonnet", messages=[{"role": "user", "content": word}])
        return str(found.choices[0].message.content)

    words = [f"word{number}" for number in range(12)]
    answers = in_parallel([partial(one, word) for word in words])

    assert answers == [f"You said: {word}" for word in words]


def test_the_asynchronous_client_works_at_the_same_time(server: Server) -> None:
    async def one(client: Any, word: str) -> str:
        stream = await client.chat.completions.create(
            model="sonnet", messages=[{"role": "user", "content": word}], stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of(words: list[str]) -> list[str]:
        deaf = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(
            api_key=KEY, base_url=f"{server.url}/v1", timeout=60, http_client=deaf
        ) as client:
            return await asyncio.gather(*[one(client, word) for word in words])

    words = [f"word{number}" for number in range(6)]

    assert asyncio.run(all_of(words)) == [f"You said: {word}" for word in words]


def test_a_stream_that_is_left_ends_its_turn(server: Server, client: Any) -> None:
    server.write_scenario([[{"say": "so far"}, {"hang": True}]])

    with client.chat.completions.create(model="sonnet", messages=HELLO, stream=True) as stream:
        next(iter(stream))
        stream.close()

    assert eventually(lambda: at_rest(server))


# ---------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------

def raised(client: Any, kind: Any, **fields: Json) -> Any:
    """The exception of this kind that a request raises."""
    with pytest.raises(kind) as found:
        client.chat.completions.create(**{"model": "sonnet", "messages": HELLO, **fields})
    return found.value


def test_an_unknown_model_is_not_found(client: Any) -> None:
    error = raised(client, openai.NotFoundError, model="gpt-9")

    assert (error.code, error.param, error.status_code) == ("model_not_found", "model", 404)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_a_wrong_key_is_an_authentication_error(server: Server) -> None:
    with sdk(server, api_key="wrong") as client:
        error = raised(client, openai.AuthenticationError)

    assert (error.code, error.type) == ("invalid_api_key", "authentication_error")


def test_a_bad_field_is_a_bad_request(client: Any) -> None:
    error = raised(client, openai.BadRequestError, temperature=5)

    assert (error.param, error.type) == ("temperature", "invalid_request_error")


def test_a_parameter_that_cannot_be_had_is_a_bad_request(client: Any) -> None:
    error = raised(client, openai.BadRequestError, logprobs=True)

    assert (error.code, error.param) == ("unsupported_parameter", "logprobs")


NOT_SENT_AGAIN = [
    (400, "invalid_request", "BadRequestError", {}),
    (401, "authentication_failed", "AuthenticationError", {}),
    (403, "unknown", "PermissionDeniedError", {}),
    (404, "model_not_found", "NotFoundError", {}),
    (429, "rate_limit", "RateLimitError", {"resets_at": int(time.time()) + 3600}),
]


@pytest.mark.parametrize(("status", "word", "kind", "more"), NOT_SENT_AGAIN)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_does_not_heal_is_raised_and_not_sent_again(
    server: Server, client: Any, status: int, word: str, kind: str, more: Json, stream: bool
) -> None:
    fail_with(server, status, word, **more)
    before = len(server.queries())

    error = raised(client, getattr(openai, kind), stream=stream)

    assert error.status_code == status and "it failed" in error.message
    assert error.response.headers["x-should-retry"] == "false"
    assert queries_of(server, before) == 1


def test_what_may_heal_is_sent_again(server: Server) -> None:
    script = [[{"exit": 1}], [{"say": "second try"}]]
    server.write_scenario(script, shared=True)

    with sdk(server, max_retries=1) as client:
        found = client.chat.completions.create(model="sonnet", messages=HELLO)

    assert found.choices[0].message.content == "second try"


def test_a_failure_that_stays_is_an_internal_server_error(server: Server) -> None:
    server.write_scenario([[{"exit": 1}]])
    before = len(server.queries())

    with sdk(server, max_retries=0) as client:
        error = raised(client, openai.InternalServerError)

    assert (error.status_code, error.code) == (502, "upstream_failed")
    # A process that has waited may have died of that: then another one is asked, once.
    assert queries_of(server, before) in (1, 2)


def test_a_failure_in_the_middle_of_a_stream_is_raised(server: Server, client: Any) -> None:
    server.write_scenario([[{"say": "so far"}, {"exit": 1}]])
    said = []

    with pytest.raises(openai.APIError, match="ended before its answer") as found:
        for chunk in client.chat.completions.create(
            model="sonnet", messages=HELLO, stream=True
        ):
            said.append(chunk.choices[0].delta.content)

    assert found.value.code == "upstream_failed"
    assert said == ["", "so ", "far"]


def test_a_whole_answer_that_fails_after_its_headers_is_a_connection_error(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    script = [[{"sleep_ms": 150}, {"exit": 1}]]
    env = {"OCP_WHOLE_SILENCE": "40"}

    with running_server(tmp_path_factory.mktemp("slow"), script, env=env) as slow:
        with sdk(slow, max_retries=0) as client:
            error = raised(client, Exception)

    assert type(error).__name__ in ("APIConnectionError", "RemoteProtocolError")


def test_a_full_queue_is_a_rate_limit_error(tmp_path_factory: pytest.TempPathFactory) -> None:
    env = {"CLAUDE_MAX_CONCURRENT": "1", "CLAUDE_MAX_QUEUE": "0"}
    script = [[{"say": "busy"}, {"hang": True}]]

    with running_server(tmp_path_factory.mktemp("full"), script, env=env) as full:
        with sdk(full, max_retries=0) as client, client.chat.completions.create(
            model="sonnet", messages=HELLO, stream=True
        ) as stream:
            next(iter(stream))
            error = raised(client, openai.RateLimitError)

    assert (error.code, error.response.headers["Retry-After"]) == ("rate_limit_exceeded", "5")


def test_a_server_without_claude_says_so_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("none")

    with running_server(folder, claude=folder / "nothing") as none:
        with sdk(none) as client:
            error = raised(client, openai.InternalServerError)
        failures = eventually(lambda: none.log_entries("answer_failed"))

    assert (error.status_code, error.code) == (503, "claude_unavailable")
    assert "npm install" in error.message
    assert len(failures) == 1
