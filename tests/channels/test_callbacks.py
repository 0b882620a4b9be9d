"""Agents that answer later, by a call to an address that works once."""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
from typing import Any, Iterator, Optional

import pytest

from channel_rows import ROW, Chat, channels
from channel_rows import message as chat_message
from fake_agent import FakeAgent, raw_stream, refused, whole
from fake_telegram import FakeTelegram
from gateway import Gateway
from waiting import eventually, in_parallel, stays

ACCEPTED = whole({"status": "accepted"}, 202)
TOKEN = "0" * 64


@pytest.fixture(scope="module")
def agent() -> Iterator[FakeAgent]:
    with FakeAgent() as running:
        running.default = lambda request: ACCEPTED
        yield running


@pytest.fixture
def chat(agent: FakeAgent) -> Iterator[Chat]:
    with Chat(agent.url, **{"async": True}) as running:
        yield running


@pytest.fixture
def signed(agent: FakeAgent) -> Iterator[Chat]:
    with Chat(agent.url, {"callbackSecret": "secret"}, **{"async": True}) as running:
        yield running


def ask(chat: Chat, agent: FakeAgent, text: str = "hello") -> str:
    """Let somebody write; returns the address that the agent got."""
    chat.say(text)
    eventually(lambda: agent.asked()[-1:] == [text] and not chat.store.open_lanes())
    return agent.requests[-1].headers["x-ocg-callback"]


def call(url: str, content: Any = None, method: str = "POST",
         headers: Optional[dict[str, str]] = None) -> tuple[int, Any]:
    """Call an address; returns status and JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    http = channels.Http(channels.Connector("", {}))
    answer = http.call(method, url, body, headers or {})
    http.close()
    return answer.status, answer.json()


def test_a_later_answer_reaches_the_chat_and_its_address_works_once(
    chat: Chat, agent: FakeAgent
) -> None:
    url = ask(chat, agent)
    assert agent.requests[-1].body["stream"] is False
    assert call(url, {"reply": "later"}) == (200, {"ok": True})
    eventually(lambda: chat.channel.sent == ["later"])
    assert call(url, {"reply": "again"})[0] == 404
    assert stays(lambda: len(chat.channel.sent), 0.2) == 1


@pytest.mark.parametrize(("reply", "text"), [
    ({"reply": {"text": "a"}}, "a"), ({"reply": {"content": "a"}}, "a"),
    ({"reply": {"content": [{"type": "text", "text": "a"}]}}, "a"),
    ({"reply": {"other": 1}}, '{"other":1}'), ({"reply": "a", "isError": True}, "\u26a0\ufe0f a"),
])
def test_forms_of_a_reply(reply: Any, text: str) -> None:
    assert channels.reply_of(json.dumps(reply).encode()) == text


@pytest.mark.parametrize(("method", "path", "content", "status", "told"), [
    ("OPTIONS", f"/{TOKEN}", None, 204, None),
    ("POST", "", {"token": TOKEN}, 400, "the token belongs in the path"),
    ("POST", "/abc", {"reply": "a"}, 404, "not found"),
    ("POST", f"/{TOKEN.replace('0', 'A')}", {"reply": "a"}, 404, "not found"),
    ("GET", f"/{TOKEN}", None, 405, "use POST"), ("PATCH", f"/{TOKEN}", None, 405, "use POST"),
    ("PUT", "/abc", None, 404, "not found"),
    ("POST", f"/{TOKEN}", b"x" * 1_048_577, 413, "more than"),
    ("POST", f"/{TOKEN}", b"no json", 400, "not a JSON object"),
    ("POST", f"/{TOKEN}", [1], 400, "not a JSON object"),
    ("POST", f"/{TOKEN}", {"reply": ""}, 400, "reply: use"),
    ("POST", f"/{TOKEN}", {"reply": 3}, 400, "reply: use"),
    ("POST", f"/{TOKEN}", {"reply": "a", "isError": "no"}, 400, "isError"),
    ("POST", f"/{TOKEN}?x=1", {"reply": "a"}, 404, "unknown or expired"),
])
def test_a_call_that_is_wrong_is_told_why_and_costs_no_token(
    chat: Chat, agent: FakeAgent, method: str, path: str, content: Any, status: int, told: Any
) -> None:
    url = ask(chat, agent)
    base = url.rpartition("/")[0]
    found, answer = call(base + path, content, method)
    assert found == status and (told or "") in answer.get("error", "")
    assert call(url, {"reply": "right"})[0] == 200


def test_a_call_has_to_be_signed_where_there_is_a_secret(signed: Chat, agent: FakeAgent) -> None:
    url, body = ask(signed, agent), b'{"reply": "a"}'
    right = hmac.new(b"secret", body, hashlib.sha256).hexdigest()
    for wrong in ("", right, f"sha256={right[:-1]}", f"sha256={right[:-1]}g", f"sha1={right}"):
        status, answer = call(url, body, headers={"X-OCG-Signature": wrong})
        assert (status, answer) == (401, {"error": "signature verification failed"})
    other = hmac.new(b"secret", b'{"reply": "b"}', hashlib.sha256).hexdigest()
    assert call(url, body, headers={"X-OCG-Signature": f"sha256={other}"})[0] == 401
    assert call(url, body, headers={"X-OCG-Signature": f"sha256={right.upper()}"})[0] == 200


def test_what_is_wrong_with_a_call_is_told_in_the_order_of_its_checks(
    signed: Chat, agent: FakeAgent
) -> None:
    url = ask(signed, agent)
    base, large = url.rpartition("/")[0], b"x" * 1_048_577

    def status_of(path: str, body: bytes, *, is_signed: bool = False, method: str = "POST") -> int:
        digest = hmac.new(b"secret", body, hashlib.sha256).hexdigest()
        headers = {"X-OCG-Signature": f"sha256={digest}"} if is_signed else {}
        return call(base + path, body, method, headers)[0]

    good, token = b'{"reply": "a"}', f"/{url.rpartition('/')[2]}"
    assert [
        status_of(token, large, method="OPTIONS"), status_of("", large), status_of("/abc", large),
        status_of(token, large, method="GET"), status_of(token, large),
        status_of(token, b"no json"), status_of(f"/{TOKEN}", b"no json", is_signed=True),
        status_of(f"/{TOKEN}", good, is_signed=True), status_of(token, good, is_signed=True),
        status_of(token, good, is_signed=True)] == [
        204, 400, 404, 405, 413, 401, 400, 404, 200, 404]


def test_pages_of_other_sites_may_call(chat: Chat, agent: FakeAgent) -> None:
    http = channels.Http(channels.Connector("", {}))
    for method, body in (("OPTIONS", None), ("POST", {"reply": "a"}), ("POST", {"reply": "a"})):
        headers = http.call(method, ask(chat, agent), body).headers
        assert headers["access-control-allow-origin"] == "*"
        assert headers["access-control-allow-methods"] == "POST, OPTIONS"
        assert headers["access-control-allow-headers"] == "Content-Type, X-OCG-Signature"
    http.close()


def test_of_two_calls_at_once_one_is_taken(chat: Chat, agent: FakeAgent) -> None:
    url = ask(chat, agent)
    found = in_parallel([lambda: call(url, {"reply": "a"})[0]] * 2)
    assert sorted(found) == [200, 404]


def test_an_agent_that_answers_at_once_needs_no_call(chat: Chat, agent: FakeAgent) -> None:
    agent.enqueue(whole({"choices": [{"message": {"content": "at once"}}]}))
    url = ask(chat, agent)
    eventually(lambda: chat.channel.sent == ["at once"])
    assert call(url, {"reply": "too"})[0] == 404


def test_a_refusal_is_told_and_ends_the_token(chat: Chat, agent: FakeAgent) -> None:
    agent.enqueue(refused(401, "invalid_api_key"))
    url = ask(chat, agent)
    assert "needs its owner" in eventually(lambda: chat.channel.sent)[0]
    assert call(url, {"reply": "too"})[0] == 404


def test_a_turn_that_is_stopped_waits_for_no_call(chat: Chat, agent: FakeAgent) -> None:
    agent.enqueue(raw_stream([(30.0, b"")]))
    chat.say("hello")
    eventually(lambda: agent.running)
    chat.say("/stop")
    eventually(lambda: chat.channel.sent == ["Stopped."] and not chat.app.lanes.count())
    assert not chat.store.rows("SELECT 1 FROM tokens")


def test_an_answer_that_does_not_come_is_told_once(chat: Chat, agent: FakeAgent) -> None:
    url = ask(chat, agent)
    chat.store.run("UPDATE tokens SET until_s=0")
    chat.app._callbacks.expire()
    chat.app._callbacks.expire()
    assert "No answer came in time. (" in eventually(lambda: chat.channel.sent)[0]
    assert stays(lambda: len(chat.channel.sent), 0.2) == 1
    assert call(url, {"reply": "late"})[0] == 404


def test_a_database_that_fails_costs_no_token(chat: Chat, agent: FakeAgent) -> None:
    url = ask(chat, agent)
    chat.store.run("ALTER TABLE outbox RENAME TO elsewhere")
    assert call(url, {"reply": "a"})[0] == 500
    chat.store.run("ALTER TABLE elsewhere RENAME TO outbox")
    assert call(url, {"reply": "a"})[0] == 200


def test_a_reply_to_a_conversation_that_has_ended_still_arrives(
    chat: Chat, agent: FakeAgent
) -> None:
    url = ask(chat, agent)
    chat.say("/new")
    eventually(lambda: chat.channel.sent)
    call(url, {"reply": "late"})
    assert eventually(lambda: chat.channel.sent[1:] == ["late"])


def test_typing_shows_until_the_call_comes(agent: FakeAgent) -> None:
    row = ROW._replace(typing_every_s=0.05)
    with Chat(agent.url, row=row, **{"async": True}) as chat:
        url = ask(chat, agent)
        eventually(lambda: chat.channel.typed > 5)
        call(url, {"reply": "later"})
        eventually(lambda: chat.channel.sent)
        assert stays(lambda: chat.channel.typed, 0.3)


def test_the_database_has_no_token(chat: Chat, agent: FakeAgent) -> None:
    url = ask(chat, agent)
    token = url.rpartition("/")[2]
    assert len(token) == 64
    assert token.encode() not in b"".join(
        path.read_bytes() for path in chat.folder.glob("channels.*") if path.is_file())


def test_an_address_still_works_after_a_kill(agent: FakeAgent) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with FakeTelegram() as telegram:
        with Gateway(telegram, agent, {"callbackPort": port, "async": True}) as gateway:
            telegram.say("hello from afar")
            eventually(lambda: gateway.rows("SELECT 1 FROM inbox WHERE is_done"))
            url = agent.requests[-1].headers["x-ocg-callback"]
            assert url.startswith(f"http://127.0.0.1:{port}/ocg/callback/")
            gateway.kill()
            gateway.start()
            eventually(lambda: is_taken(url))
            eventually(lambda: telegram.screen(1000) == ["after the kill"])


def is_taken(url: str) -> bool:
    """Whether a call is taken; at first nobody listens, and then the account does not run yet."""
    try:
        status, _ = call(url, {"reply": "after the kill"})
    except channels.NetworkFailed:
        return False
    assert status in (200, 500)
    return status == 200


def test_a_question_that_is_asked_again_has_no_other_address(chat: Chat, agent: FakeAgent) -> None:
    message = channels.message_of(channels.message_json(chat_message()))
    first, second = (chat.app._callbacks.new(chat.live.id, 7, "s", message)[1] for _ in range(2))
    assert not chat.app._callbacks.is_open(first) and chat.app._callbacks.is_open(second)


def test_a_call_that_comes_between_a_kill_and_the_question_asked_anew_is_the_only_answer(
    chat: Chat, agent: FakeAgent
) -> None:
    lane, asked = "made-up:default:1000", len(agent.requests)
    chat.app.lanes.nudge(lane, 60.0)
    with chat.store.transaction():
        for number in (1, 2, 3):
            chat.store.put_in(chat.live.id, lane, chat_message(f"m{number}", id=str(number)))
        chat.store.run("UPDATE inbox SET attempts=1 WHERE id<3")
    url, _ = chat.app._callbacks.new(chat.live.id, 1, lane, chat_message())
    assert call(url, {"reply": "later"})[0] == 200
    chat.app.lanes.nudge(lane)
    eventually(lambda: chat.channel.sent == ["later"] and not chat.store.open_lanes())
    assert agent.asked()[asked:] == ["m3"]


def test_an_answer_that_comes_before_the_word_that_it_will_is_remembered_after_its_question(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call_early(request: Any) -> Any:
        assert call(request.headers["x-ocg-callback"], {"reply": f"to {request.text}"})[0] == 200
        return ACCEPTED

    monkeypatch.setattr(agent, "default", call_early)
    with Chat(agent.url, memory="gateway", **{"async": True}) as chat:
        for number, text in enumerate(("one", "two"), 1):
            chat.say(text)
            eventually(lambda number=number: len(chat.channel.sent) == number
                       and not chat.app.lanes.count())
        history = [(each["role"], each["content"]) for _, each in chat.store.history(
            "made-up:default:1000")]
        assert history == [("user", "one"), ("assistant", "to one"), ("user", "two"),
                           ("assistant", "to two")]


def test_a_body_without_a_length_is_told(chat: Chat, agent: FakeAgent) -> None:
    url = ask(chat, agent)
    status, answer = call(url, b"0\r\n\r\n", headers={"Transfer-Encoding": "chunked"})
    assert status == 411 and "Content-Length" in answer["error"]
    assert call(url, {"reply": "right"})[0] == 200


def test_a_port_that_is_taken_is_named(agent: FakeAgent) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, FakeTelegram() as telegram:
        port = taken.getsockname()[1]
        gateway = Gateway(telegram, agent, {"callbackPort": port, "async": True})
        gateway.write()
        done = gateway.run("start")
        assert done.code == 1 and f"callbackPort {port} on 127.0.0.1" in done.stderr
        gateway.__exit__()
