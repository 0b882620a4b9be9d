"""Telegram's answers and messages in forms that nobody expects, and its HTML."""

from __future__ import annotations

import copy
import random
import threading
from typing import Any, Iterator, Optional

import pytest

from channel_rows import channels
from depth import by_depth
from fake_agent import FakeAgent
from fake_telegram import BOT_ID, BOT_NAME, FakeTelegram, shown_text
from gateway import Gateway
from waiting import eventually

JUNK = (None, 0, -1, True, "", "text", [], [1], {}, {"id": "x"}, "\ud83d", 10 ** 30, [None], [{}])
GOOD = {
    "message_id": 5, "date": 1, "chat": {"id": 9, "type": "private"}, "message_thread_id": 3,
    "from": {"id": 9, "is_bot": False, "first_name": "A"}, "text": "hello @x",
    "entities": [{"type": "mention", "offset": 6, "length": 2}],
    "reply_to_message": {"text": "before", "from": {"id": 1}}, "media_group_id": "1",
    "photo": [{"file_id": "a", "file_size": 3}], "document": {"file_id": "b", "file_name": "c"},
}


class Tools:
    """What a channel is given, without a program behind it."""

    def __init__(self, telegram: FakeTelegram, **settings: Any) -> None:
        self.settings = {"botToken": telegram.token, "apiRoot": telegram.url,
                         "requireMention": True, **settings}
        self.stop = threading.Event()
        self.accepted: list[tuple[Any, Any]] = []
        self.word = ""

    def accept(self, message: Any, state: Optional[Any] = None) -> None:
        self.accepted.append((message, state))

    def state(self) -> Any:
        return self.accepted[-1][1] if self.accepted else {}

    def on_stop(self, wake: Any) -> None:
        pass

    def note_frame(self) -> None:
        pass

    def note(self, word: str) -> None:
        self.word = word

    def log(self, level: str, event: str, **fields: object) -> None:
        pass


@pytest.fixture
def telegram() -> Iterator[FakeTelegram]:
    with FakeTelegram(hold_s=0.2) as running:
        yield running


@pytest.fixture
def http() -> Iterator[Any]:
    made = channels.Http(channels.Connector("", {}))
    yield made
    made.close()


@pytest.fixture
def channel(telegram: FakeTelegram, http: Any) -> Any:
    made = channels.Telegram(Tools(telegram), http)
    made.probe()
    return made


def mutated(value: Any, chance: random.Random) -> Any:
    """A value of which some part is something else."""
    if chance.random() < 0.12:
        return chance.choice(JUNK)
    if isinstance(value, dict):
        return {key: mutated(each, chance) for key, each in value.items()
                if chance.random() > 0.05}
    return [mutated(each, chance) for each in value] if isinstance(value, list) else value


def test_no_message_of_any_form_stops_the_next_one() -> None:
    chance = random.Random(7)
    with FakeTelegram(hold_s=0.2) as telegram, FakeAgent() as agent:
        for _ in range(by_depth(50, 100, 500)):
            telegram.say_raw(mutated(copy.deepcopy(GOOD), chance))
        telegram.say_raw({**GOOD, "date": 10 ** 400})
        with Gateway(telegram, agent) as gateway:
            telegram.say("still there?")
            eventually(lambda: telegram.screen(1000) == ["You said: still there?"])
            assert gateway.status()["running"] == 1


@pytest.mark.parametrize("content", [b"", b"no json", b"[]", b'{"ok": true, "result": 7}', b"{}"])
def test_an_answer_of_any_form_is_a_reason_to_try_again(
    telegram: FakeTelegram, channel: Any, content: bytes
) -> None:
    channel.http.call = lambda *_, **__: channels.HttpAnswer(200, {}, content)
    with pytest.raises(channels.Retry):
        channel.probe()


def test_a_refusal_of_something_before_the_platform_passes(
    telegram: FakeTelegram, channel: Any
) -> None:
    for status in (401, 404):
        channel.http.call = lambda *_, s=status, **__: channels.HttpAnswer(s, {}, b"<html></html>")
        with pytest.raises(channels.Retry):
            channel.probe()
        with pytest.raises(channels.SendFailed) as failed:
            channel.send({"chat_id": 1}, channels.Part("a", True, "n"))
        assert failed.value.kind == "later"


@pytest.mark.parametrize(("fields", "text"), [
    ({"sticker": {"emoji": "\U0001f600"}}, "[sticker \U0001f600]"),
    ({"location": {"latitude": 1.0}}, "[location]"),
    ({"video_note": {"length": 1}}, "[video note]"), ({"new_chat_members": [{"id": 3}]}, None),
    ({"text": "post", "is_automatic_forward": True}, None),
    ({"text": "hi", "from": {"id": 8, "is_bot": True}}, None),
])
def test_what_is_no_text_is_named_and_what_no_person_says_is_no_message(
    channel: Any, fields: Any, text: Optional[str]
) -> None:
    base = {**GOOD, "text": None, "photo": None, "document": None, "media_group_id": None}
    found = channel._message([{"update_id": 1, "message": {**base, **fields}}])
    assert (found.text if found else None) == text


def test_a_platform_that_answers_at_once_with_nothing_is_not_asked_without_end(
    telegram: FakeTelegram, channel: Any
) -> None:
    telegram.hold_s = 0
    thread = threading.Thread(target=channel.run)
    thread.start()
    channel.tools.stop.wait(0.3)
    channel.tools.stop.set()
    thread.join()
    assert len(telegram.called("getUpdates")) <= 2


def test_markup_of_2000_texts_is_what_telegram_takes() -> None:
    chance = random.Random(11)
    pieces = ["**", "*", "_", "`", "```\n", "~~", "[a](http://b/c_d)", "<b>", "&", ">", "\n", " ",
              "# ", "- ", "| a | b |\n|---|---|\n| 1 | 2 |\n", "x_y_z", "\U0001f600", "](", "\\",
              "[<i>](javascript:x)", '"', "1. ", "http://a.b/c?d=e&f=g"]
    for _ in range(by_depth(200, 500, 2000)):
        text = "a" + "".join(chance.choice(pieces) for _ in range(chance.randint(1, 25)))
        marked = {"text": channels.render(text, channels.TELEGRAM_HTML), "parse_mode": "HTML"}
        # Raises for markup that Telegram refuses. The "a" that each text begins with is shown.
        assert "a" in shown_text(marked), text


def test_the_names_in_a_message_are_found_by_utf16_units(channel: Any) -> None:
    name = f"@{BOT_NAME}"
    entity = {"type": "mention", "offset": 3, "length": len(name)}
    found = channel._without_mention({"text": f"\U0001f600 {name} hi", "entities": [entity]})
    assert found == ("\U0001f600  hi", True)


@pytest.mark.parametrize(("text", "entity", "expected"), [
    (f"/new@{BOT_NAME}", {"type": "bot_command", "offset": 0, "length": 5 + len(BOT_NAME)},
     ("/new", True)),
    ("/new@other_bot", {"type": "bot_command", "offset": 0, "length": 14},
     ("/new@other_bot", False)),
    ("@other_bot hi", {"type": "mention", "offset": 0, "length": 10}, ("@other_bot hi", False)),
    ("Bot hi", {"type": "text_mention", "offset": 0, "length": 3, "user": {"id": BOT_ID}},
     ("hi", True)),
])
def test_what_is_for_this_bot(
    telegram: FakeTelegram, channel: Any, text: str, entity: Any, expected: tuple[str, bool]
) -> None:
    assert channel._without_mention({"text": text, "entities": [entity]}) == expected


def test_a_reply_to_the_bot_is_for_it(telegram: FakeTelegram, channel: Any) -> None:
    replied = {"text": "yes", "reply_to_message": {"from": {"id": BOT_ID}}}
    assert channel._without_mention(replied) == ("yes", True)


@pytest.mark.parametrize(("code", "description", "kind"), [
    (429, "Too Many Requests", "wait"), (500, "Internal", "later"), (401, "Unauthorized", "later"),
    (403, "Forbidden: bot was blocked by the user", "never"),
    (400, "Bad Request: chat not found", "never"),
    (400, "Bad Request: can't parse entities", "plain"),
])
def test_what_follows_a_refusal(
    telegram: FakeTelegram, channel: Any, code: int, description: str, kind: str
) -> None:
    telegram.fail("sendMessage", code, description, retry_after=2)
    with pytest.raises(channels.SendFailed) as failed:
        channel.send({"chat_id": 1, "message_id": 2}, channels.Part("a", True, "n"))
    assert failed.value.kind == kind
    assert failed.value.after_s == (2.5 if kind == "wait" else 0.0)


def test_a_group_that_became_a_supergroup_still_gets_its_answer(
    telegram: FakeTelegram, channel: Any
) -> None:
    telegram.fail("sendMessage", 400, "Bad Request: group chat was upgraded",
                  migrate_to_chat_id=-100)
    channel.send({"chat_id": -5}, channels.Part("a", True, "n"))
    assert telegram.screen(-100) == ["a"]


def test_a_message_that_is_gone_is_answered_without_a_quote(
    telegram: FakeTelegram, channel: Any
) -> None:
    telegram.fail("sendMessage", 400, "Bad Request: message to be replied not found")
    route = {"chat_id": -5, "message_id": 3, "is_reply": True, "thread": 4}
    channel.send(route, channels.Part("a", True, "n"))
    assert telegram.screen(-5) == ["a"]


def test_privacy_mode_is_told_where_it_matters(telegram: FakeTelegram, channel: Any) -> None:
    channel.tools.settings["requireMention"] = False
    channel.tools.stop.set()
    channel.run()
    assert "privacy mode" in channel.tools.word


def test_calls_share_a_connection(telegram: FakeTelegram, channel: Any) -> None:
    made: list[Any] = []
    connect = channel.http.connector.connect
    channel.http.connector.connect = lambda *args, **options: made.append(1) or connect(
        *args, **options)
    for _ in range(3):
        channel.send({"chat_id": 1}, channels.Part("a", True, "n"))
    assert not made


def test_a_poll_that_nothing_ends_is_given_up(
    telegram: FakeTelegram, channel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "_TELEGRAM_HOLD_S", 20)
    monkeypatch.setattr(channels, "_TELEGRAM_SLACK_S", -19.7)
    telegram.hold_s = 20
    with pytest.raises(channels.Retry, match="timed out"):
        channel.run()


def test_an_offset_is_asked_for_only_when_its_message_is_safe(
    telegram: FakeTelegram, channel: Any
) -> None:
    telegram.say("one")
    accept = channel.tools.accept

    def fail_once(message: Any, state: Any = None) -> None:
        channel.tools.accept = accept
        raise OSError("disk full")

    channel.tools.accept = fail_once
    with pytest.raises(OSError, match="disk full"):
        channel.run()
    assert [body["offset"] for body in telegram.called("getUpdates")] == [0]
    accepted: list[str] = []

    def accept_one(message: Any, state: Any = None) -> None:
        accepted.append(message.text)
        channel.tools.stop.set()

    channel.tools.accept = accept_one
    channel.run()
    assert accepted == ["one"]
