"""Chats on Telegram, from what a person writes to what is on the screen."""

from __future__ import annotations

import base64
import functools
from typing import Iterator

import pytest

from fake_agent import FakeAgent, refused, streamed
from fake_telegram import BOT_NAME, FakeTelegram
from gateway import Gateway
from waiting import eventually, stays


@pytest.fixture(scope="module")
def shared() -> Iterator[Gateway]:
    """A gateway for all tests of this file; each uses chats of its own."""
    with FakeTelegram() as telegram, FakeAgent() as agent:
        with Gateway(telegram, agent, allowFrom=["*"], dmPolicy="open",
                     groups={"*": {}}) as running:
            yield running


def talk(gateway: Gateway, sender: int, *texts: str) -> None:
    """Let somebody write one message after the other, each when the last one is answered."""
    for text in texts:
        count = len(gateway.telegram.screen(sender))
        gateway.telegram.say(text, sender=sender)
        eventually(functools.partial(has_more, gateway, sender, count))


def has_more(gateway: Gateway, chat: int, count: int) -> bool:
    """Whether more than so many messages are on a screen."""
    return len(gateway.telegram.screen(chat)) > count


def test_a_message_is_answered_by_the_agent(shared: Gateway) -> None:
    shared.telegram.say("hello", sender=1)
    assert eventually(lambda: shared.telegram.screen(1) == ["You said: hello"])


def test_the_agent_gets_the_conversation_so_far(shared: Gateway) -> None:
    agent = shared.agent
    talk(shared, 2, "one", "two")
    body = agent.requests[-1].body
    assert body["messages"] == [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "You said: one"},
        {"role": "user", "content": "two"}]
    assert body["user"] == "telegram:default:2"
    assert body["model"] == "sonnet"


def test_new_begins_another_conversation(shared: Gateway) -> None:
    agent = shared.agent
    talk(shared, 3, "one", "/new", "two")
    assert [message["content"] for message in agent.requests[-1].body["messages"]] == ["two"]
    assert agent.requests[-1].body["user"] == "telegram:default:3#2"


def test_a_burst_of_three_messages_is_one_turn(shared: Gateway) -> None:
    for text in ("a", "b", "c"):
        shared.telegram.say(text, sender=4)
    assert eventually(lambda: shared.telegram.screen(4) == ["You said: a\n\nb\n\nc"])


def test_stop_ends_a_running_turn_and_the_agent_sees_it(shared: Gateway) -> None:
    telegram, agent = shared.telegram, shared.agent
    cut = agent.cut
    agent.enqueue(streamed("x" * 50, "never", pause_s=30))
    telegram.say("work", sender=5)
    eventually(lambda: agent.running)
    telegram.say("/stop", sender=5)
    assert eventually(lambda: agent.cut == cut + 1, timeout_s=5)
    eventually(lambda: "Stopped." in telegram.screen(5))
    telegram.say("next", sender=5)
    eventually(lambda: telegram.screen(5)[-1] == "You said: next")


def test_the_model_can_be_chosen_for_a_conversation(shared: Gateway) -> None:
    telegram = shared.telegram
    talk(shared, 6, "/model", "/model nothing", "/model opus", "hello")
    listed, unknown, chosen, _ = telegram.screen(6)
    assert "sonnet, opus" in listed and 'no model "nothing"' in unknown and chosen == "Model: opus"
    assert shared.agent.requests[-1].body["model"] == "opus"


def test_an_unknown_slash_word_goes_to_the_agent(shared: Gateway) -> None:
    shared.telegram.say("/etc/hosts what is it", sender=7)
    assert eventually(lambda: shared.telegram.screen(7) == ["You said: /etc/hosts what is it"])


@pytest.mark.slow
def test_an_answer_grows_on_the_screen_and_comes_once(shared: Gateway) -> None:
    telegram = shared.telegram
    shared.agent.enqueue(streamed(*(f"This is sentence {n}. " for n in range(8)), pause_s=0.5))
    telegram.say("tell me", sender=8)
    first = eventually(lambda: telegram.screen(8))
    assert "sentence 7" not in first[0]
    eventually(lambda: "sentence 7" in telegram.screen(8)[0])
    assert stays(lambda: len(telegram.screen(8)), 0.5) == 1
    edits = [call.at_s for call in telegram.calls if call.method == "editMessageText"]
    assert all(later - earlier > 0.9 for earlier, later in zip(edits, edits[1:-1]))


@pytest.mark.slow
def test_a_preview_that_outgrows_a_message_goes_on_in_the_next_one(shared: Gateway) -> None:
    telegram = shared.telegram
    paragraphs = [f"{letter * 1500}\n\n" for letter in "abcdef"]
    shared.agent.enqueue(streamed(*paragraphs, pause_s=0.4))
    telegram.say("much", sender=9)
    eventually(lambda: "f" * 1500 in "".join(telegram.screen(9)))
    joined = "".join(stays(lambda: telegram.screen(9), 0.5))
    assert joined.replace("\n", "") == "".join(paragraphs).replace("\n", "")


@pytest.mark.slow
def test_a_pause_that_telegram_asks_for_costs_no_answer(shared: Gateway) -> None:
    telegram, before = shared.telegram, len(shared.telegram.calls)
    telegram.fail("editMessageText", 429, "Too Many Requests: retry after 2", retry_after=2)
    shared.agent.enqueue(streamed(*("some words come " for _ in range(7)), "END", pause_s=0.7))
    telegram.say("tell me", sender=10)
    eventually(lambda: telegram.screen(10) and telegram.screen(10)[0].endswith("END"))
    assert stays(lambda: len(telegram.screen(10)), 0.3) == 1
    calls = [call for call in telegram.calls[before:] if call.method != "getUpdates"]
    refused_at = [call.method for call in calls].index("editMessageText")
    # Nothing at all is sent meanwhile, also no "typing".
    assert calls[refused_at + 1].at_s - calls[refused_at].at_s >= 2
    texts = [call.body["text"] for call in calls[refused_at:] if "text" in call.body]
    assert sum(text.endswith("END") for text in texts) == 1


@pytest.mark.exhaustive
def test_typing_is_shown_without_a_gap_for_as_long_as_an_answer_takes(shared: Gateway) -> None:
    telegram, before = shared.telegram, len(shared.telegram.calls)

    def typed() -> list[float]:
        return [call.at_s for call in telegram.calls[before:] if call.method == "sendChatAction"]

    shared.agent.enqueue(streamed("", "at last", pause_s=12))
    telegram.say("hello", sender=23)
    eventually(lambda: telegram.screen(23) == ["at last"])
    shown, over_s = typed(), telegram.calls[-1].at_s
    # Telegram shows it for five seconds.
    assert all(later - sooner < 5 for sooner, later in zip(shown, [*shown[1:], over_s]))
    assert 3 <= len(shown) <= 4
    assert stays(lambda: len(typed()), 5) == len(shown)


def test_markup_that_telegram_refuses_is_sent_as_plain_text(shared: Gateway) -> None:
    shared.telegram.fail("sendMessage", 400, "Bad Request: can't parse entities: whatever")
    shared.agent.enqueue(streamed("**bold**"))
    shared.telegram.say("hello", sender=11)
    eventually(lambda: shared.telegram.screen(11) == ["bold"])
    assert "parse_mode" not in shared.telegram.called("sendMessage")[-1]


def test_a_photo_reaches_the_agent_byte_for_byte(shared: Gateway) -> None:
    telegram, data = shared.telegram, b"\xff\xd8\xff" + bytes(range(256))
    telegram.files["photo1"] = data
    telegram.say("", sender=13, caption="what is it", photo=[
        {"file_id": "small", "file_size": 3}, {"file_id": "photo1", "file_size": len(data)}])
    eventually(lambda: telegram.screen(13) == ["You said: what is it"])
    parts = shared.agent.requests[-1].body["messages"][-1]["content"]
    encoded = base64.b64encode(data).decode()
    assert parts[1]["image_url"]["url"] == f"data:image/jpeg;base64,{encoded}"


def test_a_file_that_is_not_read_is_named_with_the_reason(shared: Gateway) -> None:
    telegram = shared.telegram
    telegram.files["voice1"] = b"OggS\0"
    telegram.say("", sender=14, voice={"file_id": "voice1", "mime_type": "audio/ogg",
                                       "file_size": 5})
    eventually(lambda: telegram.screen(14))
    assert "[file: voice" in shared.agent.asked()[-1]
    assert "not read: not a photo, PDF or short text" in shared.agent.asked()[-1]


def test_a_question_with_a_photo_that_the_agent_refuses_is_asked_without(shared: Gateway) -> None:
    telegram = shared.telegram
    telegram.files["photo2"] = b"\xff\xd8\xff"
    shared.agent.enqueue(refused(400, "invalid_image"))
    telegram.say("", sender=15, caption="look", photo=[{"file_id": "photo2", "file_size": 3}])
    assert eventually(lambda: telegram.screen(15) == [
        "(I could not read the attachment.)\n\nYou said: look"])


def test_an_album_is_one_message(shared: Gateway) -> None:
    telegram = shared.telegram
    for name in ("album1", "album2"):
        telegram.files[name] = b"\xff\xd8\xff" + name.encode()
        telegram.say("", sender=16, media_group_id="77", caption="both" * (name == "album1"),
                     photo=[{"file_id": name, "file_size": 9}])
    eventually(lambda: telegram.screen(16) == ["You said: both"])
    assert len(shared.agent.requests[-1].body["messages"][-1]["content"]) == 3


def test_in_a_group_only_mentions_are_answered_with_the_name_and_a_quote(shared: Gateway) -> None:
    telegram = shared.telegram
    name = f"@{BOT_NAME}"
    telegram.say("not for the bot", sender=17, chat=-17)
    telegram.say(f"{name} who am I", sender=17, chat=-17,
                 entities=[{"type": "mention", "offset": 0, "length": len(name)}])
    eventually(lambda: telegram.screen(-17) == ["You said: [Person 17]: who am I"])
    assert telegram.called("sendMessage")[-1]["reply_parameters"]["message_id"]
    assert shared.agent.requests[-1].body["user"] == "telegram:default:group:-17"


def test_topics_are_conversations_of_their_own(shared: Gateway) -> None:
    telegram = shared.telegram
    name = f"@{BOT_NAME}"
    telegram.say(f"hi {name}", sender=18, chat=-18, is_topic_message=True, message_thread_id=9,
                 entities=[{"type": "mention", "offset": 3, "length": len(name)}])
    eventually(lambda: telegram.screen(-18))
    assert shared.agent.requests[-1].body["user"] == "telegram:default:group:-18:topic:9"
    assert telegram.called("sendMessage")[-1]["message_thread_id"] == 9


def test_bots_and_service_messages_start_no_turn(shared: Gateway) -> None:
    telegram, asked = shared.telegram, len(shared.agent.requests)
    telegram.say("hello", sender=19, **{"from": {"id": 19, "is_bot": True}})
    telegram.say("", sender=19, new_chat_title="x")
    telegram.say("/help", sender=19)
    eventually(lambda: telegram.screen(19))
    assert "/new: begin" in telegram.screen(19)[0]
    assert len(shared.agent.requests) == asked


def test_a_long_answer_arrives_whole_in_parts_that_fit(shared: Gateway) -> None:
    telegram = shared.telegram
    text = "```python\n" + "\n".join(f"line_{n} = '<&>'" for n in range(700)) + "\n```"
    shared.agent.enqueue(streamed(text))
    telegram.say("code", sender=20)
    eventually(lambda: "line_699" in "".join(telegram.screen(20)))
    lines = "\n".join(telegram.screen(20)).splitlines()
    assert [line for line in lines if line] == [f"line_{n} = '<&>'" for n in range(700)]


def test_the_answer_no_reply_is_silence(shared: Gateway) -> None:
    shared.agent.enqueue(streamed("NO_REPLY"))
    shared.telegram.say("hm", sender=21)
    eventually(lambda: "hm" in shared.agent.asked())
    shared.telegram.say("hello", sender=21)
    assert eventually(lambda: shared.telegram.screen(21) == ["You said: hello"])


def test_no_secret_and_no_text_is_in_the_log_or_the_status(shared: Gateway) -> None:
    shared.telegram.say("a private sentence", sender=22)
    eventually(lambda: shared.telegram.screen(22))
    told = shared.log + str(shared.status())
    assert shared.telegram.token not in told
    assert "private sentence" not in told
    assert "Session: telegram:default:22" in told
