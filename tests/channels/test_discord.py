"""The channel of Discord against its stand-in: what is received, resumed, sent, and refused."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any, Iterator

import pytest

from channel_rows import message
from channel_tools import FakeTools, channels, receiving
from clock import FakeClock
from depth import by_depth
from fake_discord import BOT_ID, BOT_NAME, INTENTS, FakeDiscord
from waiting import eventually

Json = Any


@pytest.fixture
def clock() -> FakeClock:
    """The clock of the limits."""
    return FakeClock()


@pytest.fixture
def discord(clock: FakeClock) -> Iterator[FakeDiscord]:
    with FakeDiscord(clock=clock) as running:
        yield running


@pytest.fixture
def tools(discord: FakeDiscord) -> FakeTools:
    return FakeTools(token=discord.token, apiRoot=discord.url)


@pytest.fixture
def channel(tools: FakeTools, clock: FakeClock) -> Iterator[Any]:
    http = channels.Http(channels.Connector("", {}))
    yield channels.Discord(tools, http, clock)
    http.close()


def part(text: str, nonce: str = "0123456789abcdef01234") -> Any:
    return channels.Part(text, True, nonce)


ROUTE = {"channel_id": "70", "message_id": "5"}


# -- receiving ------------------------------------------------------------------------------------

def test_it_asks_for_messages_and_what_they_say(
    discord: FakeDiscord, channel: Any, tools: FakeTools
) -> None:
    with receiving(channel, tools):
        assert discord.gateway.peers[0].path == "/?v=10&encoding=json"
    assert [content["intents"] for content in discord.sent(2)] == [INTENTS]
    assert not discord.faults and not tools.ends


def test_a_direct_message_is_for_the_bot(
    discord: FakeDiscord, channel: Any, tools: FakeTools
) -> None:
    with receiving(channel, tools):
        discord.say("hello", sender="1000")
        message = eventually(lambda: tools.messages)[0]
    assert (message.kind, message.sender, message.sender_name) == (
        "direct", "1000", "Person 1000")
    assert (message.text, message.is_mentioned, message.chat) == ("hello", True, "91000")
    assert message.group == message.place == ""


@pytest.mark.parametrize(("text", "shown", "is_mentioned"), [
    (f"<@{BOT_ID}> who am I", "who am I", True),
    (f"hi <@!{BOT_ID}>", "hi", True),
    ("<@77> hi", "@Person 77 hi", False),
    ("@everyone hi", "@everyone hi", False),
])
def test_a_message_in_a_guild_is_for_the_bot_when_it_names_it(
    discord: FakeDiscord, channel: Any, tools: FakeTools, text: str, shown: str,
    is_mentioned: bool
) -> None:
    with receiving(channel, tools):
        discord.say(text, guild="7", channel="70")
        message = eventually(lambda: tools.messages)[0]
    assert (message.kind, message.group, message.place) == ("group", "7", "70")
    assert (message.text, message.is_mentioned) == (shown, is_mentioned)


def test_a_reply_to_the_bot_is_for_it_and_quotes(
    discord: FakeDiscord, channel: Any, tools: FakeTools
) -> None:
    own = discord.new_message("as I said", discord.user)
    with receiving(channel, tools):
        discord.say("why?", guild="7", channel="70", type=19, referenced_message=own)
        message = eventually(lambda: tools.messages)[0]
    assert message.is_mentioned and message.quoted == "as I said"


@pytest.mark.parametrize("fields", [
    {"author": {"id": "9", "username": "other", "bot": True}},
    {"author": {"id": BOT_ID, "username": BOT_NAME, "bot": True}},
    {"webhook_id": "3"}, {"type": 7}, {"content": ""},
])
def test_what_no_person_says_is_no_message(
    discord: FakeDiscord, channel: Any, tools: FakeTools, fields: Json
) -> None:
    with receiving(channel, tools):
        discord.say("hello", **fields)
        discord.say("end")
        eventually(lambda: tools.messages)
    assert tools.texts() == ["end"]


@pytest.mark.parametrize(("fields", "text"), [
    ({"content": "", "sticker_items": [{"id": "1", "name": "Wave", "format_type": 1}]},
     "[sticker Wave]"),
    ({"content": "look:", "message_snapshots": [{"message": {"content": "said elsewhere"}}]},
     "look:\n\nsaid elsewhere"),
])
def test_a_sticker_and_what_is_forwarded_are_told(
    discord: FakeDiscord, channel: Any, tools: FakeTools, fields: Json, text: str
) -> None:
    with receiving(channel, tools):
        discord.say("x", **fields)
        assert eventually(tools.texts) == [text]


def test_a_thread_belongs_to_its_channel_and_is_a_conversation_of_its_own(
    discord: FakeDiscord, channel: Any, tools: FakeTools
) -> None:
    tools.settings["guilds"] = {"7": {"channels": {"70": {}}}}
    discord.threads["701"] = "70"
    with receiving(channel, tools):
        discord.fail("GET", "/channels/701", 503)
        for place in ("701", "701", "71", "70"):
            discord.say("hi", guild="7", channel=place)
        eventually(lambda: len(tools.messages) == 4)
    assert [(each.chat, each.place) for each in tools.messages] == [
        ("701", "70"), ("701", "70"), ("71", "71"), ("70", "70")]
    # Asked until it is known, and then not again.
    assert len(discord.called("GET", "/channels")) == 3


def test_a_file_comes_byte_for_byte(
    discord: FakeDiscord, channel: Any, tools: FakeTools
) -> None:
    data = b"\xff\xd8\xff" + bytes(range(256))
    with receiving(channel, tools):
        discord.say("", attachments=[discord.attachment("a.jpg", data, "image/jpeg")])
        found = eventually(lambda: tools.messages)[0].attachments[0]
    assert (found.kind, found.name, found.mime, found.size_bytes) == (
        "image", "a.jpg", "image/jpeg", len(data))
    assert channel.fetch(found, 1000) == data
    with pytest.raises(ValueError, match="larger"):
        channel.fetch(found, 10)
    with pytest.raises(channels.SendFailed):
        channel.fetch(found._replace(ref={"url": f"{discord.url}/files/none"}), 1000)


@pytest.mark.parametrize("url", ["http://example.com/a", "ftp://a/b", "file:///etc/passwd"])
def test_a_file_is_asked_for_by_https_only(tools: FakeTools, url: str) -> None:
    channel = channels.Discord(FakeTools(token="x"), None)
    with pytest.raises(channels.SendFailed, match="https"):
        channel.fetch(channels.Attachment("file", "a", "", 1, {"url": url}), 10)


def test_a_file_in_the_network_of_this_machine_is_not_asked_for() -> None:
    http = channels.Http(channels.Connector("", {}))
    channel = channels.Discord(FakeTools(token="x"), http)
    with pytest.raises(channels.SendFailed, match="not public"):
        channel.fetch(channels.Attachment("file", "a", "", 1, {"url": "https://127.0.0.1/a"}), 10)


# -- connections ----------------------------------------------------------------------------------

@pytest.mark.parametrize("cut", ["drop", "ask_to_reconnect", "close 1000", "close 4000",
                                 "close 4999", "invalidate"])
def test_nothing_is_lost_and_nothing_comes_twice_when_a_connection_ends(
    discord: FakeDiscord, channel: Any, tools: FakeTools, cut: str
) -> None:
    name, _, code = cut.partition(" ")
    with receiving(channel, tools):
        discord.say("before")
        eventually(lambda: tools.texts() == ["before"])
        arguments = {"close": [int(code or 0)], "invalidate": [True]}.get(name, [])
        getattr(discord, name)(*arguments)
        discord.say("meanwhile")
        eventually(lambda: discord.sent(6))
        discord.say("after")
        eventually(lambda: "after" in tools.texts())
    assert tools.texts() == ["before", "meanwhile", "after"]
    assert len(discord.sent(2)) == 1 and not discord.faults


def test_a_session_that_is_over_is_followed_by_another(
    discord: FakeDiscord, channel: Any, tools: FakeTools
) -> None:
    with receiving(channel, tools):
        discord.invalidate(False)
        eventually(lambda: len(discord.sent(2)) == 2)
        discord.say("hello")
        eventually(lambda: tools.texts() == ["hello"])
    assert not discord.sent(6)


def test_the_end_of_the_program_leaves_the_session_open(
    discord: FakeDiscord, channel: Any, tools: FakeTools
) -> None:
    with receiving(channel, tools):
        pass
    assert eventually(lambda: discord.closes == [4000])
    discord.say("while it was away")
    tools.stop.clear()
    with receiving(channel, tools):
        assert eventually(lambda: tools.texts() == ["while it was away"])


def test_a_token_that_is_refused_is_told_with_what_to_do(
    discord: FakeDiscord, channel: Any, tools: FakeTools
) -> None:
    discord.token = "another"
    with receiving(channel, tools):
        eventually(lambda: tools.ends)
    assert isinstance(tools.ends[0], channels.Fatal) and "Reset Token" in tools.ends[0].fix
    with pytest.raises(channels.Fatal):
        channel.probe()


@pytest.mark.parametrize(("code", "words"), [
    (4004, "Reset Token"), (4013, "newer version"), (4014, "Message Content Intent")])
def test_a_close_that_no_retry_mends_says_what_to_do(
    discord: FakeDiscord, channel: Any, tools: FakeTools, code: int, words: str
) -> None:
    discord.refusals.append(code)
    with receiving(channel, tools):
        eventually(lambda: tools.ends)
    assert isinstance(tools.ends[0], channels.Fatal) and words in tools.ends[0].fix


def test_a_refusal_of_something_before_the_platform_passes(
    discord: FakeDiscord, channel: Any
) -> None:
    discord.fail("GET", "/users/@me", 401, "<html>Unauthorized</html>")
    with pytest.raises(channels.Retry):
        channel.probe()


def test_the_last_sessions_of_a_day_are_left_to_others(
    discord: FakeDiscord, channel: Any
) -> None:
    discord.sessions_left = 9
    with pytest.raises(channels.Retry) as failed:
        channel.run()
    assert failed.value.after_s == 3600.0 and not discord.sent(2)


def test_who_the_bot_is(discord: FakeDiscord, channel: Any) -> None:
    assert channel.probe() == f"@{BOT_NAME}"
    discord.fail("GET", "@me", 503, Retry_After="7")
    with pytest.raises(channels.Retry) as failed:
        channel.probe()
    assert failed.value.after_s == 7.0


JUNK = (None, 0, -1, True, "", "text", [], [1], {}, {"id": "x"}, 10 ** 30, [None], [{}])


def mutated(value: Any, chance: random.Random) -> Any:
    """A value of which some part is something else."""
    if chance.random() < 0.12:
        return chance.choice(JUNK)
    if isinstance(value, dict):
        return {key: mutated(each, chance) for key, each in value.items()
                if chance.random() > 0.05}
    return [mutated(each, chance) for each in value] if isinstance(value, list) else value


def test_no_event_of_any_form_stops_the_next_one(
    discord: FakeDiscord, channel: Any, tools: FakeTools
) -> None:
    chance = random.Random(3)
    good = discord.new_message(
        "<@1> hi", discord.person("1"), channel_id="70", guild_id="7",
        mentions=[discord.person("1")], referenced_message=discord.new_message("x", discord.user),
        attachments=[discord.attachment("a", b"x", "image/png")])
    with receiving(channel, tools):
        for _ in range(by_depth(100, 200, 1000)):
            discord.emit("MESSAGE_CREATE", mutated(copy.deepcopy(good), chance))
        discord.say("still there")
        eventually(lambda: "still there" in tools.texts())
    assert not tools.ends


# -- sending --------------------------------------------------------------------------------------

def test_a_part_is_sent_and_edited(discord: FakeDiscord, channel: Any) -> None:
    message_id = channel.send(ROUTE, part("**hi**"))
    channel.edit(ROUTE, message_id, part("**hi** there"))
    channel.type(ROUTE)
    channel.type(ROUTE, is_over=True)
    assert discord.screen("70") == ["**hi** there"]
    assert len(discord.called("POST", "typing")) == 1
    assert discord.called("POST", "messages")[0]["flags"] == 4 and not discord.faults


def test_a_part_that_is_sent_again_is_on_the_screen_once(
    discord: FakeDiscord, channel: Any
) -> None:
    assert channel.send(ROUTE, part("hi")) == channel.send(ROUTE, part("hi"))
    assert discord.screen("70") == ["hi"]


def test_no_answer_rings_for_anybody(discord: FakeDiscord, channel: Any) -> None:
    message_id = channel.send(ROUTE, part("@everyone and <@77>"))
    channel.edit(ROUTE, message_id, part("@here <@&5>"))
    assert discord.screen("70") == ["@here <@&5>"] and not discord.pings


def test_previews_of_links_may_be_shown(discord: FakeDiscord, channel: Any) -> None:
    channel.tools.settings["suppressEmbeds"] = False
    channel.send(ROUTE, part("https://example.com"))
    assert "flags" not in discord.called("POST", "messages")[0]


def test_a_quote_that_is_not_allowed_costs_no_answer(
    discord: FakeDiscord, channel: Any
) -> None:
    discord.fail("POST", "messages", 400, {"message": "Cannot reply", "code": 160002})
    channel.send({**ROUTE, "is_reply": True}, part("hi"))
    quoting, bare = discord.called("POST", "messages")
    assert quoting["message_reference"] == {"message_id": "5", "fail_if_not_exists": False}
    assert "message_reference" not in bare and discord.screen("70") == ["hi"]


@pytest.mark.parametrize(("status", "body", "kind"), [
    (500, "<html>", "later"), (502, {}, "later"), (401, {"message": "Unauthorized"}, "later"),
    (403, {"message": "Missing Access", "code": 50001}, "never"),
    (404, {"message": "Unknown Channel", "code": 10003}, "never"),
    (400, {"message": "Invalid Form Body", "code": 50035}, "never"),
])
def test_what_follows_a_refusal(
    discord: FakeDiscord, channel: Any, status: int, body: Json, kind: str
) -> None:
    discord.fail("POST", "messages", status, body)
    with pytest.raises(channels.SendFailed) as failed:
        channel.send(ROUTE, part("hi"))
    assert failed.value.kind == kind


def test_a_limit_that_is_used_up_is_waited_for_without_a_call(
    discord: FakeDiscord, channel: Any, clock: FakeClock
) -> None:
    for number in range(5):
        channel.send(ROUTE, part("hi", f"n{number}"))
    with pytest.raises(channels.SendFailed) as failed:
        channel.send(ROUTE, part("hi", "n5"))
    assert (failed.value.kind, failed.value.after_s) == ("wait", 5.0)
    assert len(discord.called("POST", "messages")) == 5
    channel.send({**ROUTE, "channel_id": "71"}, part("hi", "n6"))
    channel.type(ROUTE)
    clock.advance(5.0)
    channel.send(ROUTE, part("hi", "n5"))
    assert len(discord.screen("70")) == 6


@pytest.mark.parametrize(("body", "headers", "wait_s", "is_of_all"), [
    ({"retry_after": 1.5, "global": False}, {"Via": "1.1 google"}, 1.5, False),
    ({"retry_after": 2.5, "global": True}, {"Via": "1.1 google"}, 2.5, True),
    ({"retry_after": 2.5}, {}, 600.0, True),
    ("<html>banned</html>", {"Via": "x"}, 600.0, True),
    ({"retry_after": "soon"}, {"Via": "x"}, 1.0, False),
])
def test_a_pause_that_is_asked_for_is_kept(
    discord: FakeDiscord, channel: Any, clock: FakeClock, body: Json, headers: Json,
    wait_s: float, is_of_all: bool
) -> None:
    discord.fail("POST", "messages", 429, body, **headers)
    for _ in range(2):
        with pytest.raises(channels.SendFailed) as failed:
            channel.send(ROUTE, part("hi"))
        assert (failed.value.kind, failed.value.after_s) == ("wait", wait_s)
    assert len(discord.called("POST", "messages")) == 1
    if is_of_all:
        with pytest.raises(channels.SendFailed):
            channel.type(ROUTE)
    else:
        channel.type(ROUTE)
    clock.advance(wait_s)
    channel.send(ROUTE, part("hi"))
    assert discord.screen("70") == ["hi"]


def test_a_network_that_fails_is_tried_again(channel: Any, discord: FakeDiscord) -> None:
    channel._root = "http://127.0.0.1:9"
    with pytest.raises(channels.SendFailed) as failed:
        channel.send(ROUTE, part("hi"))
    assert failed.value.kind == "later"
    with pytest.raises(channels.Retry):
        channel.probe()


@pytest.mark.parametrize(("markdown", "shown"), [
    ("#### deep\n# top", "**deep**\n# top"),
    ("![a](https://b/c.png)", "[a](https://b/c.png)"),
    ("[https://b](https://b)", "https://b"),
    ("```py\nx\n```", "```py\nx\n```"),
    ("| a | b |\n|---|---|\n| 1 | 2 |", "a: 1\nb: 2"),
])
def test_the_markdown_that_discord_shows(channel: Any, markdown: str, shown: str) -> None:
    assert channel.render(markdown) == shown


# -- settings -------------------------------------------------------------------------------------

def settings(**values: Json) -> Any:
    """The accounts of a file with these settings of Discord."""
    content = {"channels": {"discord": {"allowFrom": ["1000"], **values}}}
    return channels.parse_settings(content, "none", {}, [channels.Discord.row]).accounts


def test_a_token_may_have_the_name_that_it_has_elsewhere() -> None:
    assert [each.settings["token"] for each in settings(botToken="one")] == ["one"]
    both = settings(
        botToken="one", accounts={"other": {"botToken": "two"}, "third": {"token": "3"}})
    assert {each.name: each.settings["token"] for each in both} == {
        "default": "one", "other": "two", "third": "3"}
    assert not any(each.missing for each in both)
    assert settings(botToken="one", token="two")[0].settings["token"] == "two"


def test_an_account_is_added_when_discord_knows_the_bot(
    discord: FakeDiscord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def add(token: str) -> int:
        return int(channels.main(
            ["add", "--channel", "discord", "--botToken", token, "--apiRoot", discord.url],
            {"OCP_HOME": str(tmp_path), "HOME": str(tmp_path)}))

    assert add("wrong") == 1 and "Reset Token" in capsys.readouterr().err
    assert add(discord.token) == 0
    assert f"The bot is @{BOT_NAME}." in capsys.readouterr().out
    saved = json.loads((tmp_path / "channels.json").read_text())["channels"]["discord"]
    assert saved["botToken"] == discord.token


@pytest.mark.parametrize(("guilds", "reason"), [
    ({"7": {}}, ""), ({"*": {}}, ""), (["7"], ""), ({"7": {"channels": {"70": {}}}}, ""),
    ({"7": {"channels": {"*": {"allow": True}}}}, ""),
    ({"8": {}}, "the group is not listed"), ({}, "the group is not listed"),
    ({"7": {"channels": {"71": {}}}}, "the channel is not listed"),
    ({"7": {"channels": {}}}, "the channel is not listed"),
    ({"7": {"channels": {"70": {"allow": False}}}}, "the channel is not listed"),
    ({"7": {"channels": {"70": {"enabled": False}}}}, "the channel is not listed"),
    ({"7": {"channels": {"70": False}}}, "the channel is not listed"),
    ({"7": False}, "the channel is not listed"),
    ({"7": {"enabled": False}}, "the channel is not listed"),
])
def test_where_in_a_guild_it_answers(guilds: Json, reason: str) -> None:
    asked = message(kind="group", group="7", place="70", is_mentioned=True)
    assert channels.judge_group(settings(token="x", guilds=guilds)[0], asked).reason == reason


@pytest.mark.parametrize(("guild", "channel", "is_answered"), [
    (None, None, False), (False, None, True), (True, None, False), (False, True, False),
    (True, False, True)])
def test_a_mention_is_needed_unless_the_place_says_otherwise(
    guild: Any, channel: Any, is_answered: bool
) -> None:
    levels = [{} if each is None else {"requireMention": each} for each in (guild, channel)]
    guilds = {"7": {**levels[0], "channels": {"70": levels[1]}}}
    asked = message(kind="group", group="7", place="70", is_mentioned=False)
    verdict = channels.judge_group(settings(token="x", guilds=guilds)[0], asked)
    assert verdict.reason == ("" if is_answered else "not mentioned")
