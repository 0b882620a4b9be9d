"""Lanes, the outbox, and platforms with budgets, with a made-up channel in this process."""

from __future__ import annotations

import contextlib
import re
import socket
import sqlite3
import threading
import time
from typing import Any, Iterator

import pytest

from channel_rows import ROW, Chat, channels, message
from fake_agent import FakeAgent, refused, streamed
from waiting import eventually, stays

SendFailed = channels.SendFailed
BUDGET_ROW = ROW._replace(budget=5)


@pytest.fixture(scope="module")
def agent() -> Iterator[FakeAgent]:
    with FakeAgent() as running:
        yield running


@pytest.fixture
def chat(agent: FakeAgent) -> Iterator[Chat]:
    with Chat(agent.url) as running:
        yield running


def test_thirty_messages_in_five_chats_keep_their_order(agent: FakeAgent) -> None:
    agent.most_running = 0
    with Chat(agent.url, {"maxTurns": 2}, allowFrom=["*"], dmPolicy="open") as chat:
        agent.enqueue(*[streamed("an ", "answer", pause_s=0.1)] * 12)
        for number in range(30):
            chat.say(f"m{number:02}", sender=str(number % 5))
        eventually(lambda: not chat.store.open_lanes())
        for sender in range(5):
            asked = "".join(request.text for request in agent.requests
                            if request.body["user"].endswith(f":{sender}"))
            assert asked.replace("\n", "") == "".join(f"m{n:02}" for n in range(sender, 30, 5))
        assert agent.most_running == 2
        agent._replies.clear()


def test_what_was_asked_before_a_kill_is_asked_again_without_what_came_later(
    chat: Chat
) -> None:
    chat.app.lanes.nudge("lane", 60.0)
    for number, attempts in enumerate((1, 1, 0, 0), 1):
        chat.store.put_in(chat.live.id, "lane", message(f"m{number}", id=str(number)))
        chat.store.run("UPDATE inbox SET attempts=? WHERE id=?", attempts, number)
    rows = chat.store.waiting("lane")
    assert [each.text for _, each in channels.batch_of(rows)] == ["m1", "m2"]
    assert [each.text for _, each in channels.batch_of(rows[2:])] == ["m3", "m4"]
    chat.store.finish(range(1, 5))


def test_a_message_that_killed_it_twice_takes_no_other_along(chat: Chat) -> None:
    with chat.store.transaction():
        for number in (1, 2):
            chat.store.put_in(chat.live.id, f"{chat.live.id}:1000",
                              message(f"m{number}", id=str(number)))
        chat.store.run("UPDATE inbox SET attempts=2 WHERE id=1")
    chat.app.lanes.nudge()
    assert eventually(lambda: chat.channel.sent == [
        "I was interrupted; please send that again.", "You said: m2"])


def test_a_message_that_comes_again_is_answered_once(chat: Chat) -> None:
    for _ in range(3):
        chat.say("hello", id="same")
    eventually(lambda: chat.channel.sent == ["You said: hello"])
    assert stays(lambda: len(chat.channel.sent), 0.5) == 1


def test_state_and_message_are_kept_together_or_not_at_all(chat: Chat) -> None:
    chat.live.accept(None, {"offset": 1})
    chat.store.run("ALTER TABLE inbox RENAME TO elsewhere")
    with pytest.raises(OSError, match=r"channels\.db"):
        chat.live.accept(message("lost?", id="9"), {"offset": 2})
    chat.store.run("ALTER TABLE elsewhere RENAME TO inbox")
    assert chat.live.state() == {"offset": 1}
    chat.live.accept(message("lost?", id="9"), {"offset": 2})
    eventually(lambda: chat.channel.sent == ["You said: lost?"])


def test_a_database_that_somebody_else_has_locked_takes_the_message_later(chat: Chat) -> None:
    chat.store.run("PRAGMA busy_timeout=20")
    with contextlib.closing(sqlite3.connect(chat.folder / "channels.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OSError, match="locked"):
            chat.live.accept(message("still there?", id="9"), {"offset": 2})
        assert chat.live.state() == {}
        other.rollback()
    chat.live.accept(message("still there?", id="9"), {"offset": 2})
    assert eventually(lambda: chat.channel.sent == ["You said: still there?"])


def test_two_accounts_have_conversations_of_their_own_in_a_chat_with_the_same_id(
    agent: FakeAgent,
) -> None:
    other = {"accounts": {"b": {"token": "another-token", "allowFrom": ["1000"]}}}
    with Chat(agent.url, **other) as chat:
        eventually(lambda: len(chat.app.lanes.accounts) == 2)
        for number, name in enumerate(("b", "default", "b")):
            live = chat.app.lanes.accounts[f"made-up:{name}"]
            live.accept(message(f"hello of {name}", id=str(number)))
            eventually(lambda: not chat.store.open_lanes())
        assert [each["content"] for each in agent.requests[-1].body["messages"]] == [
            "hello of b", "You said: hello of b", "hello of b"]


def test_twenty_may_wait_and_the_next_one_is_refused_once(agent: FakeAgent) -> None:
    agent.enqueue(streamed("a", "b", pause_s=30))
    with Chat(agent.url) as chat:
        chat.say("first")
        eventually(lambda: agent.running)
        for number in range(23):
            chat.say(str(number))
        eventually(lambda: chat.channel.sent)
        assert "Too many" in chat.channel.sent[0]
        assert stays(lambda: len(chat.channel.sent), 0.3) == 1
        chat.say("/stop")
        eventually(lambda: chat.channel.sent[1:] == ["Stopped."])
        assert eventually(lambda: not chat.store.open_lanes())


@pytest.mark.parametrize(("failure", "sent"), [
    (SendFailed("wait", "slow down", 0.2), ["You said: hello"]),
    (SendFailed("later", "network", 0.2), ["You said: hello"]),
    (SendFailed("plain", "markup"), ["You said: hello"]),
    (RuntimeError("a fault of the channel"), ["You said: hello"]),
    (SendFailed("never", "blocked"), []),
])
def test_what_follows_a_part_that_was_not_sent(
    chat: Chat, failure: Exception, sent: list[str]
) -> None:
    chat.channel.failures.put(failure)
    chat.say("hello")
    eventually(lambda: [status for status, _ in chat.outbox()] in (["sent"], ["dead"]))
    assert chat.channel.sent == sent


@pytest.mark.slow
def test_one_chat_that_fails_does_not_hold_up_another(chat: Chat) -> None:
    chat.channel.failures.put(SendFailed("later", "network", 30.0))
    chat.say("one", sender="1000")
    eventually(lambda: chat.outbox() == [("pending", "You said: one")])
    chat.say("two", sender="1000", chat="other")
    assert eventually(lambda: chat.channel.sent == ["You said: two"])


def test_what_the_platform_will_not_take_is_held_for_the_next_message(agent: FakeAgent) -> None:
    paragraphs = [f"{n}" * 3900 for n in range(6)]
    with Chat(agent.url, row=BUDGET_ROW, streaming="off") as chat:
        agent.enqueue(streamed("\n\n".join(paragraphs)))
        chat.say("much")
        eventually(lambda: len(chat.channel.sent) == 4)
        assert chat.channel.sent[-1] == f"{paragraphs[3]}\n\n(more: write anything)"
        assert [status for status, _ in chat.outbox()[4:]] == ["held", "held"]
        chat.say("go on")
        eventually(lambda: chat.channel.sent[4:] == [*paragraphs[4:], "You said: go on"])


def test_typing_shows_until_the_answer_and_not_longer(agent: FakeAgent) -> None:
    with Chat(agent.url, row=ROW._replace(typing_every_s=0.1)) as chat:
        agent.enqueue(streamed("a", "b", pause_s=0.5))
        chat.say("hello")
        eventually(lambda: chat.channel.sent == ["ab"])
        assert chat.channel.typed >= 4
        assert stays(lambda: chat.channel.typed, 0.3)


def test_more_sends_only_what_was_held(agent: FakeAgent) -> None:
    with Chat(agent.url, row=BUDGET_ROW, streaming="off") as chat:
        agent.enqueue(streamed("\n\n".join(f"{n}" * 3900 for n in range(5))))
        chat.say("much")
        eventually(lambda: len(chat.channel.sent) == 4)
        asked = len(agent.requests)
        chat.say("/more")
        eventually(lambda: chat.channel.sent[4:] == ["4" * 3900])
        chat.say("/more")
        eventually(lambda: chat.channel.sent[5:] == ["There is nothing more."])
        assert len(agent.requests) == asked


def test_a_refusal_until_the_next_message_holds_the_rest(agent: FakeAgent) -> None:
    with Chat(agent.url, row=BUDGET_ROW, streaming="off") as chat:
        agent.enqueue(streamed("\n\n".join(f"{n}" * 3900 for n in range(3))))
        chat.channel.failures.put(SendFailed("held", "-2"))
        chat.say("much")
        eventually(lambda: [status for status, _ in chat.outbox()] == ["held"] * 3)
        assert chat.channel.sent == []
        chat.say("again")
        eventually(lambda: len(chat.channel.sent) == 4)


def test_paragraphs_come_as_they_are_whole_and_within_the_budget(agent: FakeAgent) -> None:
    paragraphs = [f"{chr(97 + n)}" * 250 + "\n\n" for n in range(12)]
    with Chat(agent.url, row=BUDGET_ROW) as chat:
        agent.enqueue(streamed(*paragraphs, pause_s=0.05))
        chat.say("much")
        eventually(lambda: not chat.store.open_lanes() and chat.channel.sent)
        stays(lambda: len(chat.channel.sent), 0.3)
        joined = "".join(chat.channel.sent)
        assert len(chat.channel.sent) <= 4
        assert joined.replace("\n", "") == "".join(paragraphs).replace("\n", "")


def test_an_answer_of_which_a_part_was_read_is_not_asked_again_after_a_kill(
    agent: FakeAgent,
) -> None:
    with Chat(agent.url) as chat:
        asked = len(agent.requests)
        with chat.store.transaction():
            chat.store.put_in(chat.live.account.id, "made-up:default:1000", message("old"))
            chat.store.run("UPDATE inbox SET attempts=1, progress=?", '{"blocks": 2}')
        chat.app.lanes.nudge("made-up:default:1000")
        eventually(lambda: chat.channel.sent == ["I was interrupted; please send that again."])
        assert len(agent.requests) == asked


def test_a_failure_is_told_with_a_reference_that_the_log_has(chat: Chat, agent: FakeAgent) -> None:
    agent.enqueue(refused(401, "invalid_api_key", "the key is wrong"))
    chat.say("hello")
    text = eventually(lambda: chat.channel.sent)[0]
    reference = text.rpartition("(")[2].rstrip(")")
    assert text.startswith("The assistant needs its owner.") and "wrong" not in text
    assert f"ref={reference}" in (chat.folder / "channels.log").read_text()


UNREACHABLE = r"The assistant is not reachable right now\. \((?P<ref>\w+)\)"
NEEDS_OWNER = r"The assistant needs its owner\. \((?P<ref>\w+)\)"
CANNOT = r"The assistant cannot process this\. \((?P<ref>\w+)\)"


@pytest.mark.parametrize("is_owner", [False, True], ids=["stranger", "owner"])
@pytest.mark.parametrize(("replies", "text", "more"), [
    (None, UNREACHABLE, " .*Is OCP running\\? ocp status"),
    ([streamed("", "never", pause_s=30)], UNREACHABLE, " It took too long\\. Is OCP running\\?.*"),
    ([refused(500, "x", "why")], UNREACHABLE, " why Is OCP running\\? ocp status"),
    ([refused(502, "x", "why")] * 4, UNREACHABLE, " why Is OCP running\\? ocp status"),
    ([refused(401, "upstream_login_required", "why")], NEEDS_OWNER, " why"),
    ([refused(401, "invalid_api_key", "why")], NEEDS_OWNER, " why"),
    ([refused(403, "x", "why")], NEEDS_OWNER, " why"),
    ([refused(503, "claude_unavailable", "why")] * 4, NEEDS_OWNER, " why"),
    ([refused(429, "insufficient_quota", "why", Retry_After="7200")],
     r"The limit is used up until \d\d:\d\d\.", ""),
    ([refused(404, "model_not_found", "why")],
     'There is no model "sonnet"; /model lists them.', ""),
    ([refused(400, "context_length_exceeded", "why")] * 2,
     "This conversation is too long; /new begins another.", ""),
    ([refused(422, "x", "why")], CANNOT, " why"),
    ([streamed("")], "I have nothing to say to that.", ""),
    ([streamed("as far as here", end=b"")],
     r"as far as here\n\n\(cut off, (?P<ref>\w+)\)", ""),
])
def test_what_a_person_reads_of_each_failure_and_its_owner_besides(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch, is_owner: bool, replies: Any, text: str,
    more: str
) -> None:
    monkeypatch.setattr(channels, "_RETRY_WAITS_S", (0.0, 0.0, 0.0))
    url = agent.url if replies else "http://127.0.0.1:1"
    with Chat(url, agentTimeout=1) as chat:
        chat.store.run("INSERT INTO people VALUES (?,'1000','','{}','','',?,0)", chat.live.id,
                       is_owner)
        agent.enqueue(*replies or [])
        chat.say("hello")
        read = eventually(lambda: chat.channel.sent)[0]
        found = re.fullmatch(text + more * is_owner, read)
        assert found, read
        log = (chat.folder / "channels.log").read_text()
        if "ref" in found.groupdict():
            assert f"ref={found['ref']}" in log
        assert is_owner or "why" not in read
        assert stays(lambda: len(chat.channel.sent), 0.1) == 1


def test_an_answer_that_breaks_off_is_kept_and_says_so(chat: Chat, agent: FakeAgent) -> None:
    agent.enqueue(streamed("as far as here", end=b""))
    chat.say("hello")
    assert "as far as here\n\n(cut off, " in eventually(lambda: chat.channel.sent)[0]


def test_a_conversation_that_is_too_long_is_halved_and_asked_again(
    chat: Chat, agent: FakeAgent
) -> None:
    for number in range(4):
        chat.say(f"m{number}")
        eventually(lambda: not chat.store.open_lanes())
    agent.enqueue(refused(400, "context_length_exceeded"))
    chat.say("last")
    eventually(lambda: chat.channel.sent[-1] == "You said: last")
    assert [len(request.body["messages"]) for request in agent.requests[-2:]] == [9, 5]


def test_a_conversation_loses_its_older_half_at_the_limit(agent: FakeAgent) -> None:
    with Chat(agent.url, historyMessages=4) as chat:
        for number in range(5):
            chat.say(f"m{number}")
            eventually(lambda: not chat.store.open_lanes())
        sizes = [len(request.body["messages"]) for request in agent.requests[-5:]]
        assert sizes == [1, 3, 5, 3, 5]
        assert agent.requests[-1].body["messages"][0]["role"] == "user"


def test_only_the_two_newest_photos_stay_in_a_conversation() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:x"}}
    text = {"type": "text", "text": "look"}
    left, keep = channels.without_files([text, image, image, image], 2)
    assert left == [text, {"type": "text", "text": "[photo]"}, image, image] and keep == 0
    assert channels.without_files([image], keep)[0] == [{"type": "text", "text": "[photo]"}]


@pytest.mark.parametrize(("memory", "has_session"), [("session", True), ("agent", False)])
def test_an_agent_that_remembers_gets_only_the_new_message(
    agent: FakeAgent, memory: str, has_session: bool
) -> None:
    with Chat(agent.url, memory=memory, systemPrompt="Be kind.") as chat:
        for text in ("one", "two"):
            chat.say(text)
            eventually(lambda: not chat.store.open_lanes())
        body = agent.requests[-1].body
        assert [each["content"] for each in body["messages"]] == ["Be kind.", "two"]
        assert body.get("session_id") == ("made-up:default:1000" if has_session else None)


def test_a_turn_that_is_cut_at_the_end_stays_in_the_inbox(agent: FakeAgent) -> None:
    agent.enqueue(streamed("a", "b", pause_s=30))
    with Chat(agent.url) as chat:
        chat.say("hello")
        eventually(lambda: agent.running)
        closing = threading.Thread(target=chat.app.lanes.close, args=(0.1,))
        closing.start()
        closing.join(10)
        assert eventually(lambda: not chat.app.lanes.count())
        assert len(chat.store.open_lanes()) == 1


def test_a_part_that_was_sent_but_not_marked_is_not_sent_again(chat: Chat) -> None:
    original, failures = chat.store.set_out, iter([True, False])

    def failing(part: int, status: str, *rest: Any) -> None:
        if status == "sent" and next(failures, False):
            raise OSError("disk full")
        original(part, status, *rest)

    chat.store.set_out = failing
    channels_pause = channels._RETRY_TURN_S
    try:
        channels._RETRY_TURN_S = 0.1
        chat.say("hello")
        eventually(lambda: chat.outbox() == [("sent", "You said: hello")])
    finally:
        channels._RETRY_TURN_S = channels_pause
    time.sleep(0.2)
    assert chat.channel.sent == ["You said: hello"]


def test_halves_of_a_character_in_two_pieces_of_a_stream_are_joined(
    chat: Chat, agent: FakeAgent
) -> None:
    agent.enqueue(streamed("a\ud83d", "\ude00 b\ud83d"))
    chat.say("hello \ud83d")
    eventually(lambda: chat.channel.sent == ["a\U0001f600 b\ufffd"])
    assert agent.asked()[-1] == "hello \ufffd"


def test_an_answer_in_paragraphs_is_whole_with_halves_of_characters_in_it(
    agent: FakeAgent,
) -> None:
    pairs = ["\ud83d", "\ude00"] * 130
    with Chat(agent.url) as chat:
        agent.enqueue(streamed(*pairs, "\n\nsecond", "\n\n" + "third " * 50, "\n\nlast",
                               pause_s=0.002))
        chat.say("hello")
        eventually(lambda: not chat.store.open_lanes() and chat.channel.sent[-1:] == ["last"])
        assert "\n\n".join(chat.channel.sent) == "\n\n".join([
            "\U0001f600" * 130, "second", ("third " * 50), "last"])


def test_what_precedes_an_answer_in_paragraphs_is_there_once(agent: FakeAgent) -> None:
    paragraphs = [f"{letter}" * 250 for letter in "abc"]
    photo = channels.Attachment("image", "a.png", "image/png", 9, {})
    with Chat(agent.url) as chat:
        chat.channel.fetch = lambda *_: b"\x89PNG\r\n\x1a\n"
        agent.enqueue(refused(400, "x"), streamed(*[f"{each}\n\n" for each in paragraphs],
                                                  pause_s=0.05))
        chat.say("look", attachments=(photo,))
        eventually(lambda: not chat.store.open_lanes() and "c" * 250 in chat.channel.sent)
        assert "\n\n".join(chat.channel.sent) == "\n\n".join([
            "(I could not read the attachment.)", *paragraphs])


def test_more_says_that_there_is_still_more(agent: FakeAgent) -> None:
    with Chat(agent.url, row=BUDGET_ROW, streaming="off") as chat:
        agent.enqueue(streamed("\n\n".join(f"{n}" * 3900 for n in range(9))))
        chat.say("much")
        eventually(lambda: len(chat.channel.sent) == 4)
        chat.say("/more")
        eventually(lambda: len(chat.channel.sent) == 8)
        assert chat.channel.sent[-1] == "7" * 3900 + "\n\n(more: write anything)"
        chat.say("/more")
        eventually(lambda: chat.channel.sent[8:] == ["8" * 3900])


def test_the_owner_reads_the_reason_of_a_failure_only_where_nobody_else_does(
    agent: FakeAgent,
) -> None:
    with Chat(agent.url, groups=["-5"]) as chat:
        chat.store.run("INSERT INTO people VALUES (?,'1000','','{}','','',1,0)", chat.live.id)
        agent.enqueue(*[refused(401, "invalid_api_key", "key 7 is wrong")] * 2)
        chat.say("hello")
        eventually(lambda: chat.channel.sent)
        chat.say("hello", kind="group", chat="-5", group="-5", is_mentioned=True)
        eventually(lambda: len(chat.channel.sent) == 2)
        assert ["key 7" in text for text in chat.channel.sent] == [True, False]


def test_a_pause_that_was_set_while_the_clock_was_wrong_is_not_waited_for(chat: Chat) -> None:
    chat.channel.failures.put(SendFailed("later", "network", 3000.0))
    chat.say("hello")
    eventually(lambda: chat.store.rows("SELECT 1 FROM outbox WHERE due_s>0"))
    chat.store.run("UPDATE outbox SET due_s=due_s+1e8")
    chat.live.nudge()
    assert eventually(lambda: chat.channel.sent == ["You said: hello"])


def test_a_platform_that_asks_for_no_pause_is_not_asked_without_end(chat: Chat) -> None:
    for seconds in (0.0, -1.0, float("nan")):
        began_s = time.monotonic()
        chat.live.hold(seconds)
        assert chat.live.hold_until_s > began_s


def test_a_part_that_is_being_sent_at_a_restart_is_sent_once(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "_JOIN_S", 0.05)
    is_sending, may_end, send = threading.Event(), threading.Event(), chat.channel.send

    def send_slowly(route: Any, part: Any) -> str:
        is_sending.set()
        may_end.wait(30)
        return str(send(route, part))

    chat.channel.send = send_slowly  # type: ignore[method-assign]
    chat.say("hello")
    assert is_sending.wait(10)
    told = chat.app.perform({"do": "restart", "channel": "made-up"})
    assert told["started"] == ["made-up:default"]
    new = eventually(lambda: chat.app.lanes.accounts.get("made-up:default"))
    eventually(lambda: new.status == "running")
    may_end.set()
    eventually(lambda: chat.outbox() == [("sent", "You said: hello")])
    assert (chat.channel.sent, new.channel.sent) == (["You said: hello"], [])


def test_an_answer_to_a_question_of_before_a_restart_comes_at_once(
    chat: Chat, agent: FakeAgent
) -> None:
    agent.enqueue(streamed("a", "b", pause_s=1.0))
    chat.say("hello")
    eventually(lambda: agent.running)
    chat.app.perform({"do": "restart"})
    new = chat.app.lanes.accounts["made-up:default"]
    assert new is not chat.live
    assert eventually(lambda: new.channel.sent == ["ab"], timeout_s=20)


def test_settings_that_cannot_be_used_do_not_end_what_runs(chat: Chat) -> None:
    chat.path.write_text("{not JSON")
    assert "not JSON" in chat.app.perform({"do": "restart"})["error"]
    assert chat.app.status()["running"] == 1


def test_a_port_for_callbacks_that_is_taken_does_not_end_what_runs(agent: FakeAgent) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Chat(agent.url, {"callbackPort": port}) as chat:
            chat.path.write_text(chat.path.read_text().replace(
                '"allowFrom"', '"async": true, "allowFrom"'))
            assert f"callbackPort {port}" in chat.app.perform({"do": "restart"})["error"]
            assert chat.app.status()["running"] == 1
            chat.say("hello")
            assert eventually(lambda: chat.channel.sent == ["You said: hello"])


def test_what_a_stranger_writes_is_not_kept(chat: Chat) -> None:
    chat.say("a private matter", sender="77")
    eventually(lambda: chat.channel.sent)
    assert "This bot is private" in chat.channel.sent[0]
    assert not chat.store.rows("SELECT 1 FROM inbox")
    assert chat.live.dropped == {"not approved": 1}


def test_beyond_the_limit_of_an_hour_one_sentence_is_said(agent: FakeAgent) -> None:
    with Chat(agent.url, perSenderHour=1) as chat:
        for text in ("one", "two", "three", "four"):
            chat.say(text)
            eventually(lambda: not chat.store.open_lanes())
        eventually(lambda: len(chat.channel.sent) == 2)
        assert "The limit is 1 messages" in stays(lambda: chat.channel.sent, 0.3)[1]


@pytest.mark.parametrize("word", ["/NEW", "/reset", "\u65b0\u5bf9\u8bdd"])
def test_commands_in_any_case_and_in_chinese(chat: Chat, word: str) -> None:
    chat.say(word)
    assert eventually(lambda: chat.channel.sent == ["A new conversation begins."])


def test_stop_without_a_turn_is_answered_at_once(chat: Chat) -> None:
    chat.say("/stop")
    assert eventually(lambda: chat.channel.sent == ["There is nothing to stop."], timeout_s=5)


def test_an_answer_of_which_a_part_is_held_is_held_to_its_end(agent: FakeAgent) -> None:
    paragraphs = [f"{chr(97 + n)}" * 250 + "\n\n" for n in range(6)]
    with Chat(agent.url, row=BUDGET_ROW._replace(budget=10)) as chat:
        chat.channel.failures.put(SendFailed("held", "-2"))
        agent.enqueue(streamed(*paragraphs, pause_s=0.1))
        chat.say("much")
        eventually(lambda: not chat.store.open_lanes() and not chat.app.lanes.count())
        assert {status for status, _ in chat.outbox()} == {"held"} and not chat.channel.sent
        chat.say("again")
        eventually(lambda: chat.channel.sent[-1:] == ["You said: again"])
        assert "".join(chat.channel.sent[:-1]).replace("\n", "") == "".join(paragraphs).replace(
            "\n", "")


def test_a_chat_that_always_has_to_wait_does_not_hold_up_another(chat: Chat) -> None:
    send, refused_chats = chat.channel.send, []

    def send_to_others(route: Any, part: Any) -> str:
        if route["to"] == "slow":
            refused_chats.append(1)
            raise SendFailed("wait", "slow down", 0.05)
        return str(send(route, part))

    chat.channel.send = send_to_others  # type: ignore[method-assign]
    chat.say("one", chat="slow")
    eventually(lambda: len(refused_chats) > 1)
    for number in range(3):
        chat.say(f"m{number}", chat=f"other{number}")
    assert eventually(lambda: sorted(chat.channel.sent) == [
        f"You said: m{number}" for number in range(3)])


def test_a_message_that_cannot_be_read_does_not_hold_up_other_chats(chat: Chat) -> None:
    with chat.store.transaction():
        for number, content in enumerate(("no JSON", '{"of": "a newer version"}', "[]"), 1):
            chat.store.put_in(chat.live.id, f"odd{number}", message(id=str(number)))
            chat.store.run("UPDATE inbox SET message=? WHERE id=?", content, number)
    chat.say("hello", id="9")
    eventually(lambda: chat.channel.sent == ["You said: hello"])
    assert (chat.folder / "channels.log").read_text().count("a turn failed") >= 3


def test_a_part_whose_route_cannot_be_read_does_not_hold_up_other_chats(chat: Chat) -> None:
    chat.store.put_out(chat.live.id, "odd", 0, [channels.OutRow("a", {})])
    chat.store.run("UPDATE outbox SET route='no JSON'")
    chat.say("hello")
    assert eventually(lambda: chat.channel.sent == ["You said: hello"])


def test_a_machine_without_a_thread_left_answers_later(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, failures = threading.Thread.start, [1, 1]

    def start_later(thread: threading.Thread) -> None:
        if thread.name == "turn" and failures:
            failures.pop()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(channels, "_RETRY_TURN_S", 0.1)
    monkeypatch.setattr(threading.Thread, "start", start_later)
    chat.say("hello")
    assert eventually(lambda: chat.channel.sent == ["You said: hello"]) and not failures


def test_halves_of_characters_in_errors_and_names_are_no_fault(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Chat(agent.url) as chat:
        chat.store.run("INSERT INTO people VALUES (?,'1000','','{}','','',1,0)", chat.live.id)
        agent.enqueue(refused(401, "invalid_api_key", "why \ud83d"))
        chat.channel.failures.put(SendFailed("wait", "later \ud800", 0.1))
        chat.say("hello")
        assert "why ?" in eventually(lambda: chat.channel.sent)[0]
        monkeypatch.setattr(agent, "models", ["sonnet", "half-\udc00"])
        chat.say("/model")
        assert "half-\ufffd" in eventually(lambda: chat.channel.sent[1:])[0]


@pytest.mark.parametrize("text", ["```\n```", "\n \n", "****\n\n```py\n```\n\nhi"])
def test_no_part_of_an_answer_shows_nothing(chat: Chat, agent: FakeAgent, text: str) -> None:
    agent.enqueue(streamed(text))
    chat.say("hello")
    sent = eventually(lambda: chat.channel.sent)
    assert sent == ["I have nothing to say to that." if "hi" not in text else text]


def test_a_pause_that_is_asked_for_is_kept_by_typing_too(agent: FakeAgent) -> None:
    with Chat(agent.url, row=ROW._replace(typing_every_s=0.05)) as chat:
        called: list[float] = []

        def refuse_to_type(route: Any, is_over: bool = False) -> None:
            if not is_over:
                called.append(time.monotonic())
                raise SendFailed("wait", "slow down", 0.6)

        chat.channel.type = refuse_to_type  # type: ignore[method-assign]
        agent.enqueue(streamed("a", "b", pause_s=1.5))
        chat.say("hello")
        eventually(lambda: chat.channel.sent == ["ab"])
    assert 2 <= len(called) <= 3
    assert all(later - sooner >= 0.6 for sooner, later in zip(called, called[1:]))


EDIT_ROW = ROW._replace(can_edit=True, edit_every_s=0.05, limit=500)


def test_what_was_shown_of_a_longer_answer_before_a_restart_is_taken_back(
    agent: FakeAgent,
) -> None:
    lane = "made-up:default:1000"
    with Chat(agent.url, row=EDIT_ROW) as chat:
        chat.app.lanes.nudge(lane, 60.0)
        with chat.store.transaction():
            chat.store.put_in(chat.live.id, lane, message("old"))
            chat.store.run("UPDATE inbox SET attempts=1, progress=?",
                           '{"shown": [["7", "long"], ["8", "longer"], ["9", "the longest"]]}')
        chat.app.lanes.nudge(lane)
        eventually(lambda: len(chat.channel.sent) == 3)
        assert chat.channel.sent == [("7", "You said: old"), *(
            (number, channels._WITHDRAWN) for number in "89")]


def test_lanes_and_chats_that_are_quiet_are_forgotten(agent: FakeAgent) -> None:
    with Chat(agent.url, row=ROW._replace(pace_s=0.01), allowFrom=["*"], dmPolicy="open") as chat:
        for number in range(20):
            chat.say("hello", sender=str(number))
            chat.say("/stop", sender=str(number))
        eventually(lambda: not chat.store.open_lanes() and not chat.app.lanes.count())
        eventually(lambda: not chat.store.next_out(chat.live.id))
        time.sleep(0.4)
        chat.say("hello")
        eventually(lambda: chat.channel.sent[-1] == "You said: hello")
        assert len(chat.app.lanes._quiet_s) <= 1 and len(chat.live.sender._pace_s) <= 1


def test_an_account_that_has_failed_is_not_running_because_something_was_heard(
    chat: Chat,
) -> None:
    for status in ("failed", "login needed", "stopped"):
        chat.live.status, chat.live.why = status, "why"
        chat.live.note_frame()
        assert (chat.live.status, chat.live.why) == (status, "why")
    chat.live.status = "retrying"
    chat.live.note_frame()
    assert (chat.live.status, chat.live.why) == ("running", "")
