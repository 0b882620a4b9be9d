"""The channel of QQ against its stand-in: tokens, what is received, resumed, sent, and refused."""

from __future__ import annotations

import base64
import copy
import json
import random
from pathlib import Path
from typing import Any, Iterator

import pytest

from channel_rows import account, message
from channel_tools import FakeTools, channels, receiving
from clock import FakeClock
from depth import by_depth
from fake_qq import BOT_ID, BOT_NAME, FakeQQ
from junk import mutated
from waiting import eventually

Json = Any


@pytest.fixture
def clock() -> FakeClock:
    """The clock of tokens, and of how long a message may be answered."""
    return FakeClock()


@pytest.fixture
def qq(clock: FakeClock) -> Iterator[FakeQQ]:
    with FakeQQ(clock) as running:
        yield running


@pytest.fixture
def tools(qq: FakeQQ) -> FakeTools:
    return FakeTools(**qq.settings())


@pytest.fixture
def channel(tools: FakeTools, clock: FakeClock) -> Iterator[Any]:
    http = channels.Http(channels.Connector("", {}))
    yield channels.QQ(tools, http, clock)
    http.close()


def part(text: str, nonce: str = "0123456789abcdef0123", *, is_plain: bool = False) -> Any:
    return channels.Part(text, True, nonce, is_plain)


def parts(count: int) -> list[Any]:
    return [part(f"part {number}", f"{number:06x}") for number in range(count)]


@pytest.fixture
def heard(qq: FakeQQ, channel: Any, tools: FakeTools) -> Any:
    """A message of a person, which may be answered."""
    with receiving(channel, tools):
        qq.say("hello")
        return eventually(lambda: tools.messages)[0]


def kind_of_failure(call: Any) -> str:
    """The kind of failure that a call ends with."""
    with pytest.raises(channels.SendFailed) as failed:
        call()
    return str(failed.value.kind)


# -- the token ------------------------------------------------------------------------------------

def test_a_token_is_used_until_shortly_before_its_end(
    qq: FakeQQ, channel: Any, clock: FakeClock
) -> None:
    assert channel.probe() == f"@{BOT_NAME}" and channel.token() == "QQBot token-number-1"
    clock.advance(6899)
    channel.probe()
    assert qq.tokens == 1
    clock.advance(1)
    channel.probe()
    assert qq.tokens == 2


def test_a_token_of_a_minute_is_used_for_two_thirds_of_it(
    qq: FakeQQ, channel: Any, clock: FakeClock
) -> None:
    qq.life_s = 60
    channel.probe()
    clock.advance(39)
    channel.probe()
    assert qq.tokens == 1
    clock.advance(1)
    channel.probe()
    assert qq.tokens == 2


def test_a_token_that_ends_before_its_time_costs_no_answer(
    qq: FakeQQ, channel: Any, heard: Any
) -> None:
    qq.expire()
    channel.send(heard.route, part("hi"))
    assert qq.screen("PERSON") == ["hi"]


def test_credentials_that_do_not_fit_are_told(qq: FakeQQ, channel: Any) -> None:
    qq.secret = "another"
    with pytest.raises(channels.Fatal) as fatal:
        channel.probe()
    assert "copy both" in fatal.value.fix


@pytest.mark.parametrize(("body", "wait_s"), [
    ({"code": 100001, "message": "too often"}, 60.0), ({"code": 7}, 0.0), ("<html>", 0.0),
    ({"access_token": "x"}, 0.0), ({"access_token": "x", "expires_in": "soon"}, 0.0),
])
def test_no_token_is_a_reason_to_try_again(
    qq: FakeQQ, channel: Any, body: Json, wait_s: float
) -> None:
    qq.fail("POST", "getAppAccessToken", 200, body)
    with pytest.raises(channels.Retry) as failed:
        channel.probe()
    assert failed.value.after_s == wait_s


def test_an_address_that_is_not_listed_is_told(qq: FakeQQ, channel: Any) -> None:
    qq.is_address_listed = False
    with pytest.raises(channels.Fatal, match="address") as fatal:
        channel.run()
    assert "white list" in fatal.value.fix


# -- receiving ------------------------------------------------------------------------------------

def test_a_direct_message_is_for_the_bot(heard: Any, qq: FakeQQ) -> None:
    assert (heard.kind, heard.sender, heard.chat, heard.text) == (
        "direct", "PERSON", "PERSON", "hello")
    assert heard.is_mentioned and heard.group == heard.place == ""
    assert not qq.faults


@pytest.mark.parametrize(("text", "fields", "shown", "is_mentioned"), [
    (" hi", {}, "hi", True),
    ("hi", {"is_at": False}, "hi", False),
    ("<@ME> hi", {"is_at": False, "mentions": [{"member_openid": "ME", "is_you": True}]}, "hi",
     True),
    ("<@YOU> hi", {"is_at": False, "mentions": [{"member_openid": "YOU", "nickname": "Anna"}]},
     "@Anna hi", False),
    ("<@NOBODY> hi", {"is_at": False}, "<@NOBODY> hi", False),
])
def test_a_message_in_a_group_is_for_the_bot_when_it_names_it(
    qq: FakeQQ, channel: Any, tools: FakeTools, text: str, fields: Json, shown: str,
    is_mentioned: bool
) -> None:
    with receiving(channel, tools):
        qq.say(text, sender="MEMBER", group="GROUP", **fields)
        message = eventually(lambda: tools.messages)[0]
    assert (message.kind, message.chat, message.group, message.sender_name) == (
        "group", "GROUP", "GROUP", "Person MEMBER")
    assert (message.text, message.is_mentioned) == (shown, is_mentioned)


def test_guilds_are_listened_to_if_they_are_named(
    qq: FakeQQ, channel: Any, tools: FakeTools
) -> None:
    tools.settings["guilds"] = {"7": {}}
    qq.has_guilds = True
    with receiving(channel, tools):
        qq.say_in_guild(f"<@!{BOT_ID}> hi", "1", "7", "70")
        qq.say_in_guild("between us", "1", "8", "")
        group, direct = eventually(lambda: len(tools.messages) == 2 and tools.messages)
    assert (group.kind, group.text, group.group, group.place) == ("group", "hi", "7", "70")
    assert (direct.kind, direct.text, direct.group) == ("direct", "between us", "")
    channel.send(group.route, part("**a**"))
    channel.send(direct.route, part("b"))
    assert (qq.screen("70"), qq.screen("8")) == (["a"], ["b"])
    channel.type(direct.route)
    assert not qq.faults and not qq.typed


def test_what_is_said_and_quoted_and_shown_by_an_emoji_is_text(
    qq: FakeQQ, channel: Any, tools: FakeTools
) -> None:
    name = base64.b64encode(json.dumps({"text": "smile"}).encode()).decode()
    with receiving(channel, tools):
        qq.say(f'hm <faceType=1,faceId="13",ext="{name}"> <faceType=1,faceId="13",ext="%">',
               message_type=103, msg_elements=[{"content": "before"}],
               attachments=[{"content_type": "voice", "url": "x", "asr_refer_text": "spoken"}])
        message = eventually(lambda: tools.messages)[0]
    assert message.text == "hm [smile] [emoji]\nspoken"
    assert message.quoted == "before" and not message.attachments


def test_a_file_comes_byte_for_byte(qq: FakeQQ, channel: Any, tools: FakeTools) -> None:
    with receiving(channel, tools):
        qq.say("", attachments=[
            qq.attachment("a.png", b"data", "image/png"),
            {"content_type": "file", "filename": "b.pdf", "size": 9, "url": "//host/b"}])
        image, file = eventually(lambda: tools.messages)[0].attachments
    assert (image.kind, image.name, image.size_bytes) == ("image", "a.png", 4)
    assert channel.fetch(image, 100) == b"data"
    assert (file.kind, file.ref) == ("file", {"url": "https://host/b"})


@pytest.mark.parametrize("fields", [
    {"author": {"id": "9", "user_openid": "9", "bot": True}}, {"content": " "}])
def test_what_no_person_says_is_no_message(
    qq: FakeQQ, channel: Any, tools: FakeTools, fields: Json
) -> None:
    with receiving(channel, tools):
        qq.emit_message("C2C_MESSAGE_CREATE", "users/9", **{
            "content": "x", "author": {"user_openid": "9"}, **fields})
        qq.emit("FRIEND_ADD", {"openid": "9"})
        qq.say("end")
        eventually(lambda: tools.messages)
    assert tools.texts() == ["end"]


def test_no_event_of_any_form_stops_the_next_one(
    qq: FakeQQ, channel: Any, tools: FakeTools
) -> None:
    chance = random.Random(3)
    good = {"id": "m", "content": "<@A> hi", "author": {"id": "1", "member_openid": "1"},
            "group_openid": "G", "mentions": [{"member_openid": "A", "is_you": True}],
            "message_type": 103, "msg_elements": [{"content": "x"}],
            "attachments": [{"content_type": "image/png", "url": "x", "asr_refer_text": "y"}]}
    with receiving(channel, tools):
        for _ in range(by_depth(100, 200, 1000)):
            event = chance.choice(["GROUP_MESSAGE_CREATE", "C2C_MESSAGE_CREATE"])
            qq.emit(event, mutated(copy.deepcopy(good), chance))
        qq.say("still there")
        eventually(lambda: "still there" in tools.texts())
    assert not tools.ends


# -- connections ----------------------------------------------------------------------------------

@pytest.mark.parametrize(("code", "ops", "tokens"), [
    (4004, [2, 6], 2), (4009, [2, 6], 2), (4006, [2, 2], 2), (4906, [2, 2], 2), (1000, [2, 6], 2)])
def test_what_follows_a_close(
    qq: FakeQQ, channel: Any, tools: FakeTools, code: int, ops: list[int], tokens: int
) -> None:
    with receiving(channel, tools):
        qq.close(code)
        eventually(lambda: len([each for each in qq.frames if each.op in (2, 6)]) == 2)
        qq.say("after")
        eventually(lambda: tools.texts() == ["after"])
    assert [each.op for each in qq.frames if each.op in (2, 6)] == ops
    assert qq.tokens == tokens


@pytest.mark.parametrize(("code", "words"), [
    (4014, "guilds"), (4914, "sandbox.api"), (4915, "q.qq.com")])
def test_a_close_that_no_retry_mends_says_what_to_do(
    qq: FakeQQ, channel: Any, tools: FakeTools, code: int, words: str
) -> None:
    qq.refusals.append(code)
    with receiving(channel, tools):
        eventually(lambda: tools.ends)
    assert isinstance(tools.ends[0], channels.Fatal) and words in tools.ends[0].fix


# -- sending --------------------------------------------------------------------------------------

def test_a_part_is_sent_as_markdown_and_once(qq: FakeQQ, channel: Any, heard: Any) -> None:
    channel.send(heard.route, part("**hi** ![a](b)"))
    channel.send(heard.route, part("**hi** ![a](b)"))
    assert qq.screen("PERSON") == ["**hi** [a](b)"]
    assert {body["msg_type"] for body in qq.called("POST", "messages")} == {2}


def test_a_sixth_answer_waits_for_the_next_message(
    qq: FakeQQ, channel: Any, heard: Any
) -> None:
    for each in parts(5):
        channel.send(heard.route, each)
    assert kind_of_failure(lambda: channel.send(heard.route, part("sixth", "ffffff"))) == "held"


def test_typing_counts_as_an_answer(qq: FakeQQ, channel: Any, heard: Any) -> None:
    channel.type(heard.route)
    channel.type(heard.route, is_over=True)
    assert qq.typed == ["PERSON"]
    for each in parts(4):
        channel.send(heard.route, each)
    assert kind_of_failure(lambda: channel.send(heard.route, part("fifth", "ffffff"))) == "held"


def test_an_answer_that_comes_too_late_waits_for_the_next_message(
    qq: FakeQQ, channel: Any, heard: Any, clock: FakeClock
) -> None:
    clock.advance(3601)
    assert kind_of_failure(lambda: channel.send(heard.route, part("late"))) == "held"


def test_markdown_that_is_not_allowed_is_not_tried_again(
    qq: FakeQQ, channel: Any, heard: Any
) -> None:
    qq.allows_markdown = False
    assert kind_of_failure(lambda: channel.send(heard.route, part("**a**"))) == "plain"
    channel.send(heard.route, part("**a**", is_plain=True))
    channel.send(heard.route, part("**b**", "ffffff"))
    assert qq.screen("PERSON") == ["a", "b"]
    assert [body["msg_type"] for body in qq.called("POST", "messages")] == [2, 0, 0]


def test_markdown_can_be_switched_off(qq: FakeQQ, channel: Any, heard: Any) -> None:
    channel = channels.QQ(FakeTools(**qq.settings(markdownSupport=False)), channel.http)
    channel.send(heard.route, part("**a**"))
    assert qq.screen("PERSON") == ["a"]


@pytest.mark.parametrize("allows_markdown", [True, False])
def test_links_that_are_not_allowed_are_broken_up(
    qq: FakeQQ, channel: Any, heard: Any, tools: FakeTools, allows_markdown: bool
) -> None:
    qq.allows_links, qq.allows_markdown = False, allows_markdown
    if not allows_markdown:
        assert kind_of_failure(lambda: channel.send(heard.route, part("see a.com/b"))) == "plain"
    channel.send(heard.route, part("see https://example.com/a", is_plain=not allows_markdown))
    assert qq.screen("PERSON") == ["see https: //example. com/a"]
    assert "links were broken up" in tools.events


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("call", [
    "@everyone", "<@PERSON>", "<@!7>", '<qqbot-at-user id="7" />', "<qqbot-at-everyone />"])
def test_no_answer_rings_for_anybody(
    qq: FakeQQ, channel: Any, heard: Any, call: str, is_plain: bool
) -> None:
    channel.send(heard.route, part(f"hi {call} and me@example.com", is_plain=is_plain))
    (shown,) = qq.screen("PERSON")
    assert call not in shown and shown.replace("\u200b", "") == f"hi {call} and me@example.com"
    assert "me@example" in shown


@pytest.mark.parametrize(("status", "body", "kind"), [
    (400, {"code": 22009}, "held"), (400, {"code": 40034102}, "held"),
    (400, {"err_code": 40034025}, "held"), (400, {"code": 1, "message": "msg_id is odd"}, "held"),
    (400, {"code": 40034012}, "plain"), (500, {"code": 304041}, "plain"),
    (400, {"code": 7}, "never"), (403, {"code": "x"}, "never"), (500, {"code": 7}, "later"),
    (400, "<html>bad gateway</html>", "later"), (429, {"code": 7}, "wait"),
])
def test_what_follows_a_refusal(
    qq: FakeQQ, channel: Any, heard: Any, status: int, body: Json, kind: str
) -> None:
    qq.fail("POST", "messages", status, body)
    assert kind_of_failure(lambda: channel.send(heard.route, part("hi"))) == kind


def test_a_network_or_a_token_that_fails_is_tried_again(
    qq: FakeQQ, channel: Any, heard: Any
) -> None:
    qq.fail("POST", "getAppAccessToken", 500)
    qq.expire()
    assert kind_of_failure(lambda: channel.send(heard.route, part("hi"))) == "later"
    channel._root = "http://127.0.0.1:9"
    assert kind_of_failure(lambda: channel.send(heard.route, part("hi"))) == "later"
    with pytest.raises(channels.Retry):
        channel.probe()


@pytest.mark.parametrize(("guilds", "is_allowed"), [
    (None, False), (False, False), (True, True), ({"7": {}}, True), ({"8": {}}, False)])
def test_a_guild_is_listed_beside_groups(guilds: Json, is_allowed: bool) -> None:
    made = account(channels.QQ.row, appId="1", clientSecret="2", allowFrom=["1000"],
                   guilds=guilds, groups={"GROUP": {}})
    in_guild = message(kind="group", group="7", place="70", is_mentioned=True)
    in_group = message(kind="group", group="GROUP", place="GROUP", is_mentioned=True)
    assert bool(channels.judge_group(made, in_guild).reason) != is_allowed
    assert not channels.judge_group(made, in_group).reason


def test_an_account_is_added_by_one_word_when_qq_knows_the_bot(
    qq: FakeQQ, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def add(secret: str) -> int:
        return int(channels.main(
            ["add", "--channel", "qq", "--token", f"{qq.app_id}:{secret}", "--apiRoot", qq.url,
             "--tokenUrl", qq.token_url], {"OCP_HOME": str(tmp_path), "HOME": str(tmp_path)}))

    assert add("wrong") == 1 and "copy both" in capsys.readouterr().err
    assert add(qq.secret) == 0
    assert f"The bot is @{BOT_NAME}." in capsys.readouterr().out
    saved = json.loads((tmp_path / "channels.json").read_text())["channels"]["qqbot"]
    assert (saved["appId"], saved["clientSecret"]) == (qq.app_id, qq.secret)
