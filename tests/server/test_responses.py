"""The paths below a response: what it came of, its end, its size, and a conversation cut short."""
from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from chat import NO_IDLE, question
from http_client import Reply
from raw_http import RawConnection, raw_http
from server import Server, running_server

Json = Any

PATH = "/v1/responses"


@pytest.fixture
def server(shared_server: Server) -> Server:
    """A server with default settings; claude says `You said: ...`."""
    shared_server.write_scenario([])
    return shared_server


def respond(server: Server, given: Json, **fields: Json) -> Json:
    """The response to this input."""
    reply = server.call("POST", PATH, {"input": given, **fields})
    assert reply.status == 200, reply.text
    return reply.json()


def listed(server: Server, response: Json, query: str = "?order=asc") -> Json:
    """The list of a response's input items."""
    reply = server.call("GET", f"{PATH}/{response['id']}/input_items{query}")
    assert reply.status == 200, reply.text
    return reply.json()


def texts(page: Json) -> list[str]:
    return [item["content"][0]["text"] for item in page["data"]]


def refused(reply: Reply, status: int = 400) -> Json:
    """The error of a request that was refused."""
    assert reply.status == status, reply.text
    return reply.json()["error"]


# ---------------------------------------------------------------------------
# What a response came of
# ---------------------------------------------------------------------------


def test_a_text_is_listed_as_a_message(server: Server) -> None:
    page = listed(server, respond(server, "Hello"))

    [item] = page["data"]
    assert page == {"object": "list", "data": [item], "has_more": False,
                    "first_id": item["id"], "last_id": item["id"]}
    assert item["id"].startswith("msg_")
    assert (item["type"], item["role"], item["status"]) == ("message", "user", "completed")
    assert item["content"] == [{"type": "input_text", "text": "Hello"}]


def test_items_are_listed_as_they_came(server: Server) -> None:
    given = [
        {"role": "user", "content": "Hi"},
        {"type": "function_call", "id": "fc_9", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "Done."}]

    page = listed(server, respond(server, given))

    assert [item["type"] for item in page["data"]] == [
        "message", "function_call", "function_call_output"]
    assert page["data"][1] == {**given[1], "status": "completed"}
    assert len({item["id"] for item in page["data"]}) == 3


def test_a_chain_lists_the_responses_before_it_too(server: Server) -> None:
    first = respond(server, "one")
    second = respond(server, "two", previous_response_id=first["id"])
    reference = [{"type": "item_reference", "id": second["output"][0]["id"]}]
    third = respond(server, [*reference, {"role": "user", "content": "three"}])

    chain = texts(listed(server, second))
    assert chain == ["one", "You said: one", "two"]
    assert texts(listed(server, third)) == ["You said: two", "three"]


@pytest.mark.parametrize(
    ("query", "found", "has_more"),
    [
        ("", ["c", "b", "a"], False),
        ("?order=asc", ["a", "b", "c"], False),
        ("?limit=2", ["c", "b"], True),
        ("?limit=3&order=desc", ["c", "b", "a"], False),
        ("?order=asc&after=m1", ["b", "c"], False),
        ("?order=asc&after=m1&limit=1", ["b"], True),
        ("?after=m1", [], False),
    ],
)
def test_items_come_in_pages(
    server: Server, query: str, found: list[str], has_more: bool
) -> None:
    given = [{"id": f"m{number}", "role": "user", "content": text}
             for number, text in enumerate("abc", 1)]

    page = listed(server, respond(server, given), query)

    assert (texts(page), page["has_more"]) == (found, has_more)
    assert page["last_id"] == (page["data"][-1]["id"] if found else None)


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("order=up", "order"),
     ("after=m9", "after")],
)
def test_a_page_that_cannot_be_is_refused(server: Server, query: str, param: str) -> None:
    response = respond(server, "Hello")

    reply = server.call("GET", f"{PATH}/{response['id']}/input_items?{query}")

    assert refused(reply)["param"] == param


# ---------------------------------------------------------------------------
# Its end
# ---------------------------------------------------------------------------


def test_a_response_that_is_there_cannot_be_cancelled(server: Server) -> None:
    response = respond(server, "Hello")

    error = refused(server.call("POST", f"{PATH}/{response['id']}/cancel", {}))

    assert "cannot be cancelled" in error["message"]
    assert server.call("GET", f"{PATH}/{response['id']}").json() == response


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "resp_9/cancel"), ("GET", "resp_9/input_items"), ("GET", "resp_9"),
     ("GET", "resp_9?stream=true")],
)
def test_a_response_that_is_not_there_is_not_found(
    server: Server, method: str, path: str
) -> None:
    error = refused(server.call(method, f"{PATH}/{path}", {} if method == "POST" else None), 404)

    assert "resp_9" in error["message"]


def test_a_response_is_not_streamed_again(server: Server) -> None:
    path = f"{PATH}/{respond(server, 'Hello')['id']}"

    error = refused(server.call("GET", f"{path}?stream=true"))

    assert (error["param"], error["code"]) == ("stream", "unsupported_parameter")
    assert server.call("GET", f"{path}?stream=false&include=x").status == 200


# ---------------------------------------------------------------------------
# Its size, and a conversation cut short
# ---------------------------------------------------------------------------


def test_the_tokens_of_a_request_are_estimated(server: Server) -> None:
    asked = len(server.fake_log("line"))
    counts = []
    for length in (100, 1_000):
        body = {"input": "word " * length, "instructions": "Be brief."}
        reply = server.call("POST", f"{PATH}/input_tokens", body)
        assert reply.headers["X-OCP-Estimate"] == "true"
        found = reply.json()
        assert (found["object"], set(found)) == (
            "response.input_tokens", {"object", "input_tokens"})
        counts.append(found["input_tokens"])

    assert 100 < counts[0] < counts[1] < 3_000
    assert len(server.fake_log("line")) == asked


def test_the_tokens_of_a_conversation_that_goes_on_are_estimated(server: Server) -> None:
    response = respond(server, "word " * 500)

    reply = server.call(
        "POST", f"{PATH}/input_tokens", {"previous_response_id": response["id"]})

    assert reply.json()["input_tokens"] > 500


def test_a_conversation_is_compacted_and_goes_on(server: Server) -> None:
    given = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"},
             {"role": "user", "content": "two"}]
    reply = server.call("POST", f"{PATH}/compact", {"input": given, "instructions": "Count."})
    body = reply.json()

    assert (reply.status, body["object"]) == (200, "response.compaction")
    assert [item["type"] for item in body["output"]] == ["message", "message", "compaction"]
    assert body["usage"]["total_tokens"] > 0
    goes_on = respond(server, [*body["output"], {"role": "user", "content": "three"}])
    assert goes_on["status"] == "completed"
    said = server.fake_log("line")[-1]
    assert "Summary of the conversation" in str(said) and "three" in str(said)
    assert server.call("GET", f"{PATH}/{body['id']}").status == 404


# ---------------------------------------------------------------------------
# Other programs at the door
# ---------------------------------------------------------------------------


def test_a_path_that_does_not_exist_is_told_in_one_line(server: Server) -> None:
    error = refused(server.call("GET", "/v1/frobnicate"), 404)

    assert "/v1/frobnicate" in error["message"] and "/openapi.json" in error["message"]
    assert len(error["message"]) < 100


#: How a browser or an SDK greets a server of https.
HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x7f" * 200


def test_https_on_the_port_of_http_gets_a_word_at_once(server: Server) -> None:
    began_s = time.monotonic()
    for _ in range(3):
        said = raw_http(server.port, HELLO)
        assert said.startswith(b"HTTP/1.1 400 ") and b"write http://" in said

    assert time.monotonic() - began_s < 8
    assert len(server.log_entries("https_on_http_port")) == 1


def test_https_on_the_port_of_http_waits_for_nothing(server: Server) -> None:
    with RawConnection(server.port) as wire:
        wire.send(HELLO[:1])
        assert wire.status_line().startswith("HTTP/1.1 400 ")


ORIGINS = (
    "app://obsidian.md, vscode-webview://*, chrome-extension://*, http://localhost:8080/, "
    "https://*.example.org, http://127.0.0.1:*")


@pytest.fixture(scope="module")
def welcoming(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes pages of these origins."""
    env = {**NO_IDLE, "OCP_ALLOWED_ORIGINS": ORIGINS}
    with running_server(tmp_path_factory.mktemp("welcoming"), env=env) as running:
        yield running


@pytest.mark.parametrize("origin", [
    "app://obsidian.md", "vscode-webview://0a1b2c", "chrome-extension://abcdefgh",
    "http://localhost:8080", "https://a.example.org", "https://A.b.Example.org",
    "http://127.0.0.1:5173",
])
def test_a_page_of_an_origin_that_fits_is_welcome(welcoming: Server, origin: str) -> None:
    asked = welcoming.call("OPTIONS", "/v1/chat/completions", headers={
        "Origin": origin, "Access-Control-Request-Method": "POST"})
    reply = welcoming.call("POST", "/v1/chat/completions", question(), {"Origin": origin})

    assert (asked.status, reply.status) == (204, 200)
    assert reply.headers["Access-Control-Allow-Origin"] == origin


@pytest.mark.parametrize("origin", [
    "app://obsidian.md.evil", "http://localhost:80801", "http://localhost:8081",
    "https://example.org.evil.example", "https://evil.example/a.example.org", "null",
    "https://example.org", "https://evilexample.org", "http://127.0.0.1.evil.example:80",
    "chrome-extension:", "https://vscode-webview://x",
])
def test_a_page_of_an_origin_that_almost_fits_is_refused(
    welcoming: Server, origin: str
) -> None:
    reply = welcoming.call("POST", "/v1/chat/completions", question(), {"Origin": origin})

    assert reply.status == 403
    assert reply.headers["Access-Control-Allow-Origin"] is None
