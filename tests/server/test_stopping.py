"""Requests that the operator, or their own caller, stops while they run: what their clients are
told, what becomes of the process, and what is kept of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cached import HOUR
from chat import HANG, NO_IDLE, ask, both_ways, content_of, encoded, error_of, question
from dialects import CHAT, DIALECTS, MESSAGES, RESPONSES, Dialect, dialect_name
from http_client import Reply
from keys import ADMIN_KEY, MULTI, as_admin, ask_as, bearer, new_key
from processes import is_gone
from raw_http import RawConnection, post
from server import Server, asked_process, at_rest, last_entry, running_server
from waiting import SOON_S, eventually, in_parallel

Json = Any

#: No spares, so that every process is one that a test has asked.
NO_SPARES = {"OCP_WARM_PROCESSES": "0", "OCP_PARKED_PROCESSES": "4"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}]
HANGS_IN_THE_TEXT: list[Json] = [{"say": "so far", "chunks": 1}, HANG]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running_server(tmp_path, env=NO_SPARES) as running_one:
        yield running_one


def listed(server: Server) -> list[dict[str, Json]]:
    """What runs and waits, as the operator sees it."""
    reply = as_admin(server, "GET", "/api/requests")
    assert reply.status == 200, reply
    found: list[dict[str, Json]] = reply.json()["requests"]
    return found


def stop(server: Server, request_id: str, key: str = ADMIN_KEY) -> Reply:
    return server.call("DELETE", f"/api/requests/{request_id}", headers=bearer(key))


def stopped(server: Server, *, count: int = 1) -> list[str]:
    """Stops all requests once there are so many; returns their ids."""
    found = eventually(lambda: len(listed(server)) == count and listed(server))
    ids = [entry["request_id"] for entry in found]
    for request_id in ids:
        assert stop(server, request_id).json() == {"id": request_id, "stopped": True}
    return ids


def rows(server: Server) -> list[dict[str, Json]]:
    """The rows of usage, the oldest first."""
    found = as_admin(server, "GET", "/api/usage?limit=100&all=true").json()["recent"]
    return list(reversed(found))


def says(server: Server) -> bool:
    """Whether the only request has begun to answer."""
    (entry,) = listed(server) or [{"response_chars": 0}]
    return bool(entry["response_chars"])


# ---------------------------------------------------------------------------
# What the client is told
# ---------------------------------------------------------------------------


@pytest.mark.few_cases
@both_ways
@pytest.mark.parametrize("dialect", DIALECTS, ids=dialect_name)
def test_the_client_of_a_stopped_request_gets_an_error_of_its_own_kind(
    server: Server, dialect: Dialect, stream: bool
) -> None:
    server.write_scenario([HANGS_IN_THE_TEXT])
    body = dialect.body("Hello", stream=stream)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(server.call, "POST", dialect.path, body)
        eventually(lambda: says(server))
        (request_id,) = stopped(server)
        reply = asked.result()

    answer = dialect.read_answer(reply)
    assert reply.headers["X-Request-Id"] == request_id
    assert answer.error["message"] == "The operator stopped this request while it ran."
    assert reply.status == (200 if stream else 400)
    if stream:
        assert "".join(answer.pieces) == "so far"
    else:
        assert reply.headers["x-should-retry"] == "false"
        assert reply.headers["Connection"] == "close"
    if dialect in (CHAT, MESSAGES):
        assert answer.error["type"] == "invalid_request_error"
    if dialect is CHAT:
        assert answer.error["code"] == "request_stopped"
    if dialect is RESPONSES and stream:
        # The code after which Codex does not ask again.
        assert answer.error["code"] == "invalid_prompt"


def test_a_request_that_waits_for_its_turn_can_be_stopped(tmp_path: Path) -> None:
    with running_server(tmp_path, env={**NO_IDLE, "CLAUDE_MAX_CONCURRENT": "1"}) as server:
        server.write_scenario([[HANG]])
        with RawConnection(server.port) as first, RawConnection(server.port) as second:
            first.send(post(encoded(question("first"))))
            asked_process(server)
            second.send(post(encoded(question("second"))))
            entries = eventually(lambda: len(listed(server)) == 2 and listed(server))
            assert [entry["state"] for entry in entries] == ["running", "queued"]

            stop(server, entries[1]["request_id"])

            assert error_of(second.reply())["code"] == "request_stopped"
            assert [entry["request_id"] for entry in listed(server)] == [
                entries[0]["request_id"]]
        eventually(lambda: at_rest(server))
        assert len(server.queries()) == 1


@both_ways
def test_a_round_of_tools_can_be_stopped_and_its_process_ends(
    server: Server, stream: bool
) -> None:
    server.write_scenario([
        [{"tool": {"name": "weather", "input": {}}}], HANGS_IN_THE_TEXT])
    first = ask(server, "Weather?", tools=TOOLS).json()["choices"][0]["message"]
    # The call waits for its result, which is not a request that runs.
    assert eventually(lambda: not listed(server))
    messages = [
        {"role": "user", "content": "Weather?"}, first,
        {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "Rain."}]
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(ask, server, messages=messages, tools=TOOLS, stream=stream)
        eventually(lambda: says(server))
        stopped(server)
        asked.result()

    entry = last_entry(server, "answer_abandoned")
    assert (entry["process_kept"], entry["ended_by"]) == (False, "request_stopped")
    pid = server.queries()[0]["pid"]
    assert eventually(lambda: is_gone(pid), SOON_S)


def test_a_process_of_a_stopped_request_forgets_the_question_and_takes_the_next(
    server: Server,
) -> None:
    server.write_scenario([HANGS_IN_THE_TEXT])
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(ask, server, "secret")
        eventually(lambda: says(server))
        stopped(server)
        assert error_of(asked.result())["code"] == "request_stopped"
    server.write_scenario([])

    assert content_of(ask(server, "And now?")) == "You said: And now?"

    assert len({query["pid"] for query in server.queries()}) == 1
    assert last_entry(server, "answer_abandoned")["process_kept"] is True
    assert [row["path"] for row in rows(server)] == ["fresh", "continued"]


def test_many_requests_can_be_stopped_at_once_and_others_go_on(tmp_path: Path) -> None:
    env = {**NO_IDLE, "CLAUDE_MAX_CONCURRENT": "3", "CLAUDE_MAX_QUEUE": "20"}
    door = tmp_path / "door"
    with running_server(tmp_path / "home", env=env) as server:
        server.write_scenario([[{"wait_for": str(door)}, {"say": "Done."}]])
        with ThreadPoolExecutor(16) as pool:
            asked = [pool.submit(ask, server, str(number), stream=number % 2 == 0)
                     for number in range(12)]
            entries = eventually(lambda: len(listed(server)) == 12 and listed(server))
            kept, *others = (entry["request_id"] for entry in reversed(entries))
            replies = in_parallel(
                [lambda each=each: stop(server, each) for each in others for _ in range(2)])
            eventually(lambda: len(listed(server)) == 1)
            door.touch()
            answers = [each.result() for each in asked]
        assert {reply.status for reply in replies} <= {200, 404}
        by_id = {str(reply.headers["X-Request-Id"]): reply for reply in answers}
        assert "Done." in by_id.pop(kept).text
        assert {error_of(reply)["code"] for reply in by_id.values()} == {"request_stopped"}
        eventually(lambda: at_rest(server))
        assert content_of(ask(server, "after")) == "Done."


def test_the_next_request_on_a_connection_is_not_touched(server: Server) -> None:
    server.write_scenario([[HANG]])
    with RawConnection(server.port) as wire:
        wire.send(post(encoded(question("first"))))
        eventually(lambda: listed(server))
        stopped(server)
        assert wire.reply().headers["Connection"] == "close"
        assert wire.is_closed()


# ---------------------------------------------------------------------------
# What the operator sees
# ---------------------------------------------------------------------------


def test_the_list_says_who_asks_for_what_since_when(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        key = new_key(server, name="laptop")
        server.write_scenario([HANGS_IN_THE_TEXT])
        with RawConnection(server.port) as wire:
            wire.send(post(encoded(question("hi", stream=True)),
                           f"Authorization: Bearer {key['key']}"))
            eventually(lambda: says(server))
            (entry,) = listed(server)
            assert {name: entry[name] for name in (
                "key_name", "model", "dialect", "state", "stream", "path")} == {
                "key_name": "laptop", "model": "claude-sonnet-5-5", "dialect": "chat",
                "state": "running", "stream": True, "path": "fresh"}
            assert entry["prompt_tokens"] > 0 and entry["output_tokens"] > 0
            assert entry["since"].endswith("Z") and entry["elapsed_ms"] >= 0
            stopped(server)


def test_a_stopped_request_has_one_row_with_its_tokens(server: Server) -> None:
    server.write_scenario([HANGS_IN_THE_TEXT])
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(ask, server, "Hello")
        eventually(lambda: says(server))
        (request_id,) = stopped(server)
        asked.result()

    (row,) = rows(server)

    assert (row["outcome"], row["status"], row["request_id"], row["counted"]) == (
        "request_stopped", 400, request_id, 1)
    assert row["input_tokens"] > 0 and row["output_tokens"] > 0
    report = server.call("GET", f"/api/errors?request={request_id}").json()
    assert [entry["kind"] for entry in report["errors"]] == ["request_stopped"]
    assert report["refusals"] == []
    audit = server.call("GET", "/logs?level=audit").json()["entries"][-1]
    assert (audit["event"], audit["request_id"]) == ("request_stopped", request_id)


@pytest.mark.parametrize("request_id", ["req_unknown", "resp_unknown", "1", "%20"])
def test_an_id_that_does_not_run_is_not_found(server: Server, request_id: str) -> None:
    error = error_of(stop(server, request_id))

    assert (error["code"], error["param"]) == ("not_found", "id")
    assert "ocp requests" in error["message"]


def test_stopping_twice_is_the_same_as_once(server: Server) -> None:
    server.write_scenario([[HANG]])
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(ask, server, "Hello")
        eventually(lambda: listed(server))
        (request_id,) = stopped(server)
        assert stop(server, request_id).status in (200, 404)
        asked.result()
    assert stop(server, request_id).status == 404
    assert [row["outcome"] for row in rows(server)] == ["request_stopped"]


# ---------------------------------------------------------------------------
# Who may
# ---------------------------------------------------------------------------


def test_a_key_stops_its_own_requests_and_no_others(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        mine, other = (new_key(server, name=name)["key"] for name in ("mine", "other"))
        server.write_scenario([[HANG]])
        with RawConnection(server.port) as wire:
            wire.send(post(encoded(question()), f"Authorization: Bearer {mine}"))
            (entry,) = eventually(lambda: listed(server))

            assert server.call("GET", "/api/requests", headers=bearer(mine)).status == 403
            assert stop(server, entry["request_id"], other).status == 404
            assert stop(server, entry["request_id"], "wrong").status == 401
            assert stop(server, entry["request_id"], mine).status == 200

            error = error_of(wire.reply())
            assert error["message"] == "The caller stopped this request while it ran."


@pytest.mark.parametrize("by_operator", [True, False], ids=["operator", "caller"])
def test_only_what_the_operator_has_stopped_is_refused_when_it_is_asked_again(
    tmp_path: Path, by_operator: bool
) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        mine, other = (new_key(server, name=name)["key"] for name in ("mine", "other"))
        server.write_scenario([HANGS_IN_THE_TEXT])
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(ask_as, server, mine, "Hello", stream=True)
            (entry,) = eventually(lambda: says(server) and listed(server))
            stop(server, entry["request_id"], ADMIN_KEY if by_operator else mine)
            asked.result()
        server.write_scenario([])
        before = len(server.queries())

        # Claude Code asks again like this, also in another dialect or with other options.
        again = [ask_as(server, mine, "Hello"), ask_as(server, mine, "Hello", max_tokens=9)]
        others = [ask_as(server, mine, "Hello?"), ask_as(server, other, "Hello")]

        assert [reply.status for reply in others] == [200, 200]
        assert [reply.status for reply in again] == ([400, 400] if by_operator else [200, 200])
        if by_operator:
            error = error_of(again[0])
            assert error["code"] == "request_stopped" and "30 s" in error["message"]
            assert again[0].headers["x-should-retry"] == "false"
            assert len(server.queries()) == before + 2
            # Refusals cannot fill the disk.
            assert len(rows(server)) == 3


def test_what_the_operator_has_stopped_stays_refused_when_its_caller_stops_another_one(
    tmp_path: Path,
) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        mine = new_key(server, name="mine")["key"]
        server.write_scenario([HANGS_IN_THE_TEXT])
        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(ask_as, server, mine, "Hello", stream=True) for _ in range(2)]
            first, second = eventually(lambda: len(listed(server)) == 2 and listed(server))
            assert stop(server, first["request_id"]).status == 200
            assert stop(server, second["request_id"], mine).status == 200
            for each in asked:
                each.result()
        server.write_scenario([])

        assert error_of(ask_as(server, mine, "Hello"))["code"] == "request_stopped"


# ---------------------------------------------------------------------------
# Shared answers
# ---------------------------------------------------------------------------


def test_a_stopped_request_leaves_a_shared_answer_to_the_others(tmp_path: Path) -> None:
    door = tmp_path / "door"
    with running_server(tmp_path / "home", env={**HOUR, **NO_IDLE}) as server:
        server.write_scenario([[{"say": "Yes.", "chunks": 1}, {"wait_for": str(door)}]])
        with ThreadPoolExecutor() as pool:
            first = pool.submit(ask, server, "same")
            eventually(lambda: says(server))
            second = pool.submit(ask, server, "same")
            entries = eventually(lambda: len(listed(server)) == 2 and listed(server))

            stop(server, entries[0]["request_id"])

            assert error_of(first.result())["code"] == "request_stopped"
            door.touch()
            assert content_of(second.result()) == "Yes."


def test_the_last_one_of_a_shared_answer_ends_it(tmp_path: Path) -> None:
    with running_server(tmp_path, env={**HOUR, **NO_IDLE}) as server:
        server.write_scenario([HANGS_IN_THE_TEXT])
        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(ask, server, "same") for _ in range(2)]
            eventually(lambda: len(listed(server)) == 2)
            eventually(lambda: listed(server)[0]["response_chars"])
            stopped(server, count=2)
            codes = {error_of(each.result())["code"] for each in asked}
        assert codes == {"request_stopped"}
        eventually(lambda: at_rest(server) and len(rows(server)) == 2)
        assert sorted((row["outcome"], row["path"]) for row in rows(server)) == [
            ("request_stopped", "fresh"), ("request_stopped", "shared")]
        errors = server.call("GET", "/api/errors").json()
        assert len(errors["errors"]) == 2 and errors["refusals"] == []


# ---------------------------------------------------------------------------
# Responses
# ---------------------------------------------------------------------------


def begun(server: Server, seen: list[str], **fields: Json) -> Json:
    """Streams a response to its end; puts its id into `seen` as soon as it is known. Returns the
    last event."""
    body = RESPONSES.body("Hello", stream=True, **fields)
    last: Json = None
    with server.stream(RESPONSES.path, body) as stream:
        for _, last in stream:
            if last["type"] == "response.created":
                seen.append(last["response"]["id"])
    return last


def test_a_response_that_runs_is_cancelled_by_its_id(server: Server) -> None:
    server.write_scenario([HANGS_IN_THE_TEXT])
    seen: list[str] = []
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(begun, server, seen)
        (response_id,) = eventually(lambda: list(seen))
        path = f"{RESPONSES.path}/{response_id}"

        reply = server.call("POST", f"{path}/cancel", {})

        last = asked.result()
    body = reply.json()
    assert (reply.status, body["id"], body["status"], body["output"]) == (
        200, response_id, "cancelled", [])
    assert (last["type"], last["response"]["id"]) == ("response.failed", response_id)
    assert last["response"]["error"]["message"] == "This response was cancelled."
    # Again, and later: the same.
    assert server.call("POST", f"{path}/cancel", {}).json() == body
    assert server.call("GET", path).json() == body
    assert [row["outcome"] for row in rows(server)] == ["request_stopped"]


def test_a_conversation_goes_on_from_a_cancelled_response(server: Server) -> None:
    server.write_scenario([HANGS_IN_THE_TEXT])
    seen: list[str] = []
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(begun, server, seen)
        (response_id,) = eventually(lambda: list(seen))
        server.call("POST", f"{RESPONSES.path}/{response_id}/cancel", {})
        asked.result()
    server.write_scenario([])

    reply = server.call("POST", RESPONSES.path, RESPONSES.body(
        "And now?", previous_response_id=response_id))

    assert reply.status == 200, reply
    texts = [block["text"] for block in server.queries()[-1]["messages"][-1]["content"]]
    assert texts == ["Hello", "And now?"]


def test_a_cancelled_response_that_was_not_to_be_stored_is_gone(server: Server) -> None:
    server.write_scenario([HANGS_IN_THE_TEXT])
    seen: list[str] = []
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(begun, server, seen, store=False)
        (response_id,) = eventually(lambda: list(seen))
        path = f"{RESPONSES.path}/{response_id}"
        assert server.call("POST", f"{path}/cancel", {}).json()["status"] == "cancelled"
        asked.result()
    assert server.call("POST", f"{path}/cancel", {}).status == 404


def test_another_key_cannot_cancel_a_response(tmp_path: Path) -> None:
    with running_server(tmp_path, env=MULTI) as server:
        mine, other = (new_key(server, name=name)["key"] for name in ("mine", "other"))
        server.write_scenario([HANGS_IN_THE_TEXT])
        body = encoded(RESPONSES.body("Hello", stream=True))
        with RawConnection(server.port) as wire:
            wire.send(post(body, f"Authorization: Bearer {mine}", path=RESPONSES.path))
            wire.hear(b'"resp_')
            response_id = wire.said.split(b'"id":"')[1].split(b'"')[0].decode()
            path = f"{RESPONSES.path}/{response_id}/cancel"
            assert server.call("POST", path, {}, bearer(other)).status == 404
            assert server.call("POST", path, {}, bearer(mine)).status == 200


def test_an_id_of_a_request_is_none_of_a_response(server: Server) -> None:
    server.write_scenario([[HANG]])
    with RawConnection(server.port) as wire:
        wire.send(post(encoded(question())))
        (entry,) = eventually(lambda: listed(server))
        path = f"{RESPONSES.path}/{entry['request_id']}/cancel"
        assert server.call("POST", path, {}).status == 404


def test_a_response_that_ends_while_it_is_cancelled_is_one_or_the_other(server: Server) -> None:
    for _ in range(5):
        seen: list[str] = []
        replies: list[Reply] = []

        def cancel(seen: list[str] = seen, replies: list[Reply] = replies) -> None:
            (response_id,) = eventually(lambda: list(seen))
            replies.append(server.call("POST", f"{RESPONSES.path}/{response_id}/cancel", {}))

        canceller = threading.Thread(target=cancel)
        canceller.start()
        last = begun(server, seen)
        canceller.join()
        eventually(lambda: at_rest(server))
        time.sleep(0.05)

        kept = server.call("GET", f"{RESPONSES.path}/{seen[0]}").json()["status"]

        if replies[0].status == 400:
            assert (last["type"], kept) == ("response.completed", "completed")
        else:
            assert kept in ("cancelled", "completed")
            assert last["type"] in ("response.failed", "response.completed")
